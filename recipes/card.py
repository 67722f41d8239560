"""Write the report card of a model's stages: a page with what each of them cost, learnt and
answers, and a picture of their losses, time and tokens.

    python -m recipes.card runs/base runs/sft runs/reward runs/dpo --out card.md

The picture needs matplotlib: pip install -e '.[report]'.
"""

import logging
import signal
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path

import tyro

from data import (
    Messages,
    aggregate,
    messages_of,
    read_records,
    render_chat,
    render_reward,
    required,
    write_whole,
)
from generate import Completion, Engine, EngineConfig, SamplingParams, chat_stops, load_engine
from recipes.report import (
    COLORS,
    Stage,
    draw_loss,
    picture,
    plain,
    read_stage,
    smoothed,
    table,
    unit_of,
)
from train import run, set_up_logging

log = logging.getLogger("nemotron4")
QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "Why is the sky blue?",
    "Name three animals that can fly.",
    "Write a short poem about the sea.",
)


TOO_LONG = "(its context is too short for the question and an answer)"


@dataclass(frozen=True)
class CardConfig:
    """Write what each stage of a model cost, learnt and answers, with a picture beside the page. If
    a reward model is among the stages, it judges the answers."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the stages' runs, in their order."""
    out: Path = Path("card.md")
    """Markdown page to write; the picture has its name, and the ending png."""
    questions: Path | None = None
    """JSON lines of a `prompt` or `messages`, five of which are asked; None: five simple ones."""
    max_tokens: int = 64
    """Longest answer, in tokens."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: must be at least 1")


# ---- what the stages answer ----------------------------------------------------------------------


def questions_of(file: Path | None) -> list[Messages]:
    """Return five conversations up to a user's turn, of a file or ours."""
    if not file:
        return [messages_of(text, "user") for text in QUESTIONS]
    chats = []
    for where, row in islice(read_records(file), 5):
        try:
            chat = messages_of(row.get("messages") or required(row, "prompt", str), "user")
            chats.append(chat[: -1 if chat[-1]["role"] == "assistant" else None])
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e
    if not chats:
        raise ValueError(f"{file}: no question is in it")
    return chats


def engine_of(stage: Stage) -> Engine:
    return load_engine(EngineConfig(stage.folder))


def ask(engine: Engine, prompts: list[list[int]], how: SamplingParams) -> list[Completion | None]:
    """Return what the engine makes of each prompt; nothing of one that its context cannot hold."""
    short = [ids for ids in prompts if len(ids) + how.max_tokens <= engine.context]
    done = iter(engine.generate(short, how))
    return [next(done) if len(ids) + how.max_tokens <= engine.context else None for ids in prompts]


def answers_of(stage: Stage, chats: list[Messages], max_tokens: int) -> list[str]:
    """Let a stage answer greedily; one that knows no chat goes on with the last message's text."""
    engine = engine_of(stage)
    tokenizer = engine.tokenizer
    if stage.chats:
        prompts = [render_chat(chat, tokenizer)[0] for chat in chats]
        stops = chat_stops(tokenizer)
    else:
        prompts = [tokenizer.encode(chat[-1]["content"]) for chat in chats]
        stops = None
    how = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_ids=stops)
    return [done.text.strip() if done else TOO_LONG for done in ask(engine, prompts, how)]


def rewards_of(judge: Stage, chats: list[Messages], texts: list[str]) -> list[str]:
    """Return the reward that a reward model gives to each answer, with two digits."""
    engine = engine_of(judge)
    prompts = []
    for chat, text in zip(chats, texts, strict=True):
        answered = [*chat, {"role": "assistant", "content": text or "-"}]
        prompts.append(render_reward(answered, engine.tokenizer))
    scored = ask(engine, prompts, SamplingParams(max_tokens=0))
    return [f"{float(aggregate(done.scores)):.2f}" if done else "" for done in scored]


def cell(text: str) -> str:
    """Return a text as a cell of a Markdown table: in a line, as it is."""
    for mark, name in {"&": "&amp;", "<": "&lt;", "|": "&#124;", "`": "&#96;"}.items():
        text = text.replace(mark, name)
    return "<br>".join(text.splitlines())


def stage_row(stage: Stage) -> list[str]:
    """Return the stage table's row: where it begins, its size, and what it learnt."""
    last = stage.rows[-1]
    losses = [row["loss"] for row in stage.rows if row["loss"] is not None]
    ends = [losses[0], smoothed(losses)[-1]] if losses else []
    learnt = [f"{key} {last[key]:.3f}" for key in ("pairs_accuracy", "accuracy") if key in last]
    evaluated = [row["val_loss"] for row in stage.rows if row.get("val_loss") is not None]
    learnt += [f"validation loss {value:.3f}" for value in evaluated[-1:]]
    seconds = stage.seconds()
    return [
        stage.name,
        Path(stage.config["init"]).name or "random weights",
        f"{last['step']:,}",
        f"{last['tokens']:,}",
        str(timedelta(seconds=round(seconds))),
        f"{last['tokens'] / seconds:,.0f}",
        " → ".join(f"{loss:.3f}" for loss in ends) or "–",
        ", ".join(learnt) or "–",
    ]


HEAD = ("stage", "begins from", "steps", "tokens", "time", "tokens/s", "loss", "at the end")


def sample_lines(cfg: CardConfig, stages: list[Stage]) -> list[str]:
    """Return a table for each question: what every stage answers, and the last reward model's
    reward of it."""
    chats = questions_of(cfg.questions)
    columns = {}
    for stage in stages:
        if not stage.rewards:
            columns[stage.name] = [answers_of(stage, chats, cfg.max_tokens)]
    judges = [stage for stage in stages if stage.rewards]
    for judge in judges[-1:]:
        for found in columns.values():
            found.append(rewards_of(judge, chats, found[0]))
    head = ("stage", "answer", *["reward"] * bool(judges))
    lines = []
    for i, chat in enumerate(chats):
        lines += ["", f"**{i + 1}.** {cell(chat[-1]['content'])}"]
        rows = []
        for name, found in columns.items():
            rows.append([name, *(cell(texts[i]) or "–" for texts in found)])
        lines += table(head, rows)
    return lines


def draw_stages(out: Path, stages: list[Stage]) -> None:
    """Draw each stage's loss, and the stages' time and tokens beside each other."""
    with picture(out, len(stages) + 2) as panels:
        *curves, time, tokens = panels
        for i, (stage, panel) in enumerate(zip(stages, curves, strict=True)):
            unit, name = unit_of(stage.rows[-1]["tokens"])
            draw_loss(panel, stage, unit, stage.name, color=f"C{i % len(COLORS)}")
            panel.set(title=plain(f"{stage.name}: loss"), xlabel=f"{name}tokens")
        names = [plain(stage.name) for stage in stages]
        colors = [f"C{i % len(COLORS)}" for i in range(len(stages))]
        seconds = [stage.seconds() for stage in stages]
        unit, name = (3600, "hours") if max(seconds) > 7200 else (60, "minutes")
        time.barh(names, [one / unit for one in seconds], color=colors)
        time.set(title=f"time of a stage, {name}")
        unit, name = unit_of(max(stage.rows[-1]["tokens"] for stage in stages))
        tokens.barh(names, [stage.rows[-1]["tokens"] / unit for stage in stages], color=colors)
        tokens.set(title=f"tokens of a stage, {name}".rstrip(", "))
        for panel in (time, tokens):
            panel.invert_yaxis()
            panel.grid(axis="y", visible=False)


def write_card(cfg: CardConfig) -> None:
    """Write the page and the picture of a model's stages."""
    if not cfg.runs:
        raise ValueError("no run given: python -m recipes.card RUN ...")
    stages = [read_stage(folder) for folder in cfg.runs]
    for stage in stages:
        if "model" not in stage.config:
            raise ValueError(f"{stage.folder}: no config.json: a stage is the folder of a run")
    drawn = cfg.out.with_suffix(".png")
    draw_stages(drawn, stages)
    seconds = sum(stage.seconds() for stage in stages)
    tokens = sum(stage.rows[-1]["tokens"] for stage in stages)
    total = f"Stages: {len(stages)}; {tokens:,} tokens; {timedelta(seconds=round(seconds))} in all."
    page = [
        f"# Report card: {' → '.join(stage.name for stage in stages)}",
        "",
        f"{total} Losses of different stages are of different kinds.",
        *table(HEAD, map(stage_row, stages)),
        "",
        f"![loss, time and tokens of each stage]({drawn.name})",
        "",
        "## What each stage answers",
        "",
        f"Greedily, in at most {cfg.max_tokens} tokens; a base model goes on with the text.",
        *sample_lines(cfg, stages),
    ]
    write_whole(cfg.out, page)
    log.info(f"wrote {cfg.out}")


def main() -> None:
    set_up_logging()
    run(lambda: write_card(tyro.cli(CardConfig, prog="python -m recipes.card")))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends it without a word
    main()
