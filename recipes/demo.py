"""Tour the whole system in small: toy tasks that a program can mark, and every stage of alignment.

A base model reads calls such as sort(312) and their results. Two rounds of SFT teach it to answer
them, and questions in words; a reward model learns the program's marks; DPO and three RPOs train on
the model's own answers, ranked by the reward model. table.md tells what each stage brought. It
takes seven to thirteen minutes on two cores.

    python -m recipes.demo
"""

import json
import logging
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import tyro

from align import PreferenceConfig, RewardConfig, SftConfig, align
from data import (
    REWARD_SYSTEM,
    PrepareConfig,
    aggregate,
    hold,
    prepare,
    render_chat,
    render_reward,
    train_bpe,
    write_whole,
)
from generate import Engine, EngineConfig, SamplingParams, chat_stops, load_engine
from model import ModelConfig
from parallel import MeshConfig, world_size
from recipes.report import table
from recipes.rows import with_rows
from recipes.synthesize import SynthesizeConfig, listen, synthesize
from recipes.tasks import Task, draw_task, draw_text, scored_row
from train import PretrainConfig, pretrain, run, set_up_logging

log = logging.getLogger("nemotron4")


# ---- data and settings that the stages share -----------------------------------------------------


@dataclass(frozen=True)
class DemoConfig:
    """Train a base model, two SFTs, a reward model, DPO and three RPOs on small computations that a
    program can mark, and write a table of what each stage brought."""

    out: Path = Path("runs/demo")
    """Folder of runs, rows and table.md; a demo that was stopped goes on where it was."""
    seed: int = 0
    """Seed of tasks and of sampling."""
    scale: float = 1.0
    """Share of the tasks and of the pretraining steps: 0.01 is a test of the machinery."""

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise ValueError(f"scale={self.scale}: must be above 0 and at most 1")


# every detail of the 340B's architecture, at a size that learns the tasks in minutes
DEMO = ModelConfig(128, 4, 4, 2, 32, 512, vocab_size=480, seq_len=192, init_std=0.09)
FP32 = MeshConfig(dtype="fp32")
NEVER = 1 << 30
STAGE = dict(seq_len=DEMO.seq_len, mesh=FP32, micro_batch=16, eval_every=NEVER, save_every=NEVER)
SUPERVISED = SftConfig(lr=1e-3, min_lr=1e-4, warmup=16 * 10, batch=64, epochs=1, **STAGE)
# a model's own answers to given prompts, which the reward model ranks
OWN_ANSWERS = SynthesizeConfig(
    recipe="prompts", counts=dict(samples=6, preference_share=1, turns=1), max_tokens=40, slots=64,
    min_gap=0.3,
)  # fmt: skip


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows once: where the file is there, a generator of rows is not even started."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, map(json.dumps, rows))
    return path


def draw_tasks(
    cfg: DemoConfig, name: str, n: int, calls: float, held_out: bool = False
) -> list[Task]:
    """Draw the n tasks (at scale 1) of a name, of which a share is asked for as calls."""
    rng = random.Random(f"{cfg.seed}/{name}")
    count = max(40, round(n * cfg.scale))
    return [draw_task(rng, rng.random() < calls, held_out) for _ in range(count)]


def write_prompts(cfg: DemoConfig, name: str, n: int) -> tuple[Path]:
    tasks = draw_tasks(cfg, name, n, 0.25)
    rows = ({"prompt": task.prompt} for task in tasks)
    return (write_rows(cfg.out / f"{name}_prompts.jsonl", rows),)


def write_tasks(cfg: DemoConfig, name: str, n: int, held_out: bool = False) -> Path:
    """Write prompts with the tasks that they ask for, by which `mark` marks any answer."""
    tasks = draw_tasks(cfg, name, n, 0.25, held_out)
    rows = ({"prompt": task.prompt, "task": asdict(task)} for task in tasks)
    return write_rows(cfg.out / f"{name}_tasks.jsonl", rows)


def mark(row: dict[str, Any], text: str) -> float:
    """Return the program's reward of an answer to a row of `write_tasks`: recipes.online's verifier
    in the demo."""
    return Task(**row["task"]).reward(text)


def engine_of(run: Path) -> Engine:
    return load_engine(EngineConfig(run, slots=64))


def answers(engine: Engine, tasks: list[Task], n: int, seed: int) -> list[list[str]]:
    """Sample n answers to each task."""
    how = SamplingParams(max_tokens=40, n=n, seed=seed, stop_ids=chat_stops(engine.tokenizer))
    prompts = [render_chat(task.chat("")[:1], engine.tokenizer)[0] for task in tasks]
    texts = [done.text.strip() for done in engine.generate(prompts, how)]
    return [texts[i : i + n] for i in range(0, len(texts), n)]


# ---- the stages, in order ------------------------------------------------------------------------


def pretrain_base(cfg: DemoConfig) -> Path:
    """Pretrain on calls and their results, which nobody asks for."""
    tokens = cfg.out / "tokens"
    if not tokens.exists():
        prepare_tokens(cfg, tokens)
    pretrain("base", PretrainConfig(
        model=DEMO, mesh=FP32, data=tokens, out=cfg.out / "base", batch=16, micro_batch=16,
        steps=max(8, round(600 * cfg.scale)), lr=3e-3, min_lr=3e-4, warmup=16 * 60,
        eval_every=400, isolate=True,
    ))  # fmt: skip
    return cfg.out / "base"


def prepare_tokens(cfg: DemoConfig, tokens: Path) -> None:
    """Write texts, train a tokenizer on some of them and on questions, and prepare token files."""
    cfg.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{cfg.seed}/base")
    texts = [draw_text(rng) for _ in range(max(3000, round(70_000 * cfg.scale)))]
    words = texts[:2000]
    for task in [draw_task(rng, call=False) for _ in range(3000)]:
        words += [task.prompt, task.answer, task.flawed(rng)]
    file = train_bpe([*words, REWARD_SYSTEM * 50], DEMO.vocab_size).save(cfg.out)
    rows = write_rows(cfg.out / "texts.jsonl", ({"text": text} for text in texts))
    how = dict(tokenizer=str(cfg.out / file), val_fraction=0.01)
    prepare(PrepareConfig(sources=(f"calls={rows}",), out=tokens, **how))


def supervised(cfg: DemoConfig, name: str, init: str, calls: float, n: int) -> Path:
    """Fine-tune on answers, of which a third have chatter before them, or miss their instruction:
    what preferences can mend."""

    def rows() -> Iterator[dict[str, Any]]:
        rng = random.Random(f"{cfg.seed}/{name}/flaws")
        for task in draw_tasks(cfg, name, n, calls):
            flawed = rng.random() < 0.35
            yield scored_row(task, task.flawed(rng, ("chatter", "form")) if flawed else task.answer)

    data = write_rows(cfg.out / f"{name}.jsonl", rows())
    start = str(cfg.out / init)
    return align(name, replace(SUPERVISED, data=data, init=start, out=cfg.out / name))


def marked_texts(
    cfg: DemoConfig, init: Path, tasks: list[Task]
) -> Iterator[tuple[Task, list[str]]]:
    """Yield each task with distinct texts: two sampled answers, the right one, and two flawed."""
    rng = random.Random(f"{cfg.seed}/reward/flaws")
    sampled = answers(engine_of(init), tasks, 2, cfg.seed)
    for task, texts in zip(tasks, sampled, strict=True):
        # two faults at a time: what misses its form must not be right more often
        made = [*texts, task.answer, task.flawed(rng), task.flawed(rng, n=2)]
        yield task, [text for text in dict.fromkeys(made) if text]


def reward_model(cfg: DemoConfig, init: str) -> Path:
    """Train the reward model on the program's marks, and measure it on held-out pairs."""

    def rows() -> Iterator[dict[str, Any]]:
        for task, texts in marked_texts(cfg, cfg.out / init, draw_tasks(cfg, "reward", 5000, 0.25)):
            yield from (scored_row(task, text) for text in texts)

    def pairs() -> Iterator[dict[str, Any]]:
        tasks = draw_tasks(cfg, "reward pairs", 400, 0.25, held_out=True)
        for task, texts in marked_texts(cfg, cfg.out / init, tasks):
            rewards = {text: task.reward(text) for text in texts}
            best = max(rewards, key=rewards.__getitem__)
            worst = min(reversed(rewards), key=rewards.__getitem__)
            if rewards[best] > rewards[worst]:
                yield {"messages": task.chat("")[:1], "chosen": best, "rejected": worst}

    return align("reward", RewardConfig(
        data=write_rows(cfg.out / "reward.jsonl", rows()),
        pairs=write_rows(cfg.out / "reward_pairs.jsonl", pairs()), init=str(cfg.out / init),
        out=cfg.out / "reward", lr=1e-3, min_lr=1e-4, warmup=16 * 10, batch=64, **STAGE,
    ))  # fmt: skip


def preference_settings(name: str) -> PreferenceConfig:
    """Return DPO's settings, or for any other name RPO's."""
    how = dict(loss="dpo") if name == "dpo" else dict(loss="rpo_bwd", eta=1.0)
    return PreferenceConfig(
        beta=0.1, sft_weight=1e-3, lr=1e-4, warmup=16 * 4, batch=32, **STAGE, **how
    )


def preferences(cfg: DemoConfig, name: str, init: str) -> Path:
    """Sample the policy's own answers, take the best and the worst by the reward model, and train
    on them with DPO or RPO."""
    policy = cfg.out / init
    made = synthesize(replace(
        OWN_ANSWERS, model=policy, reward=str(cfg.out / "reward"), out=cfg.out / f"{name}_data",
        prompts=write_prompts(cfg, name, 1000), seed=cfg.seed,
        min_gap=OWN_ANSWERS.min_gap * cfg.scale,  # a judge of fewer rows tells less apart
    ))  # fmt: skip
    data = with_rows(made, "rpo", advice="" if cfg.scale == 1 else "; raise --scale")
    settings = preference_settings(name)
    return align(name, replace(settings, data=data, init=str(policy), out=cfg.out / name))


def stages_of(cfg: DemoConfig) -> dict[str, Callable[[], Path]]:
    """Return the tour: each stage's name, and what makes its data and trains it."""
    return {
        "base": partial(pretrain_base, cfg),
        "code_sft": partial(supervised, cfg, "code_sft", "base", calls=1.0, n=6_000),
        "general_sft": partial(supervised, cfg, "general_sft", "code_sft", calls=0.15, n=16_000),
        "reward": partial(reward_model, cfg, "general_sft"),
        "dpo": partial(preferences, cfg, "dpo", "general_sft"),
        "rpo_1": partial(preferences, cfg, "rpo_1", "dpo"),
        "rpo_2": partial(preferences, cfg, "rpo_2", "rpo_1"),
        "rpo_3": partial(preferences, cfg, "rpo_3", "rpo_2"),
    }


# ---- the tour ------------------------------------------------------------------------------------


def last_metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def finished_run(run: Path) -> Path:
    """Return a run that has come to its end. A signal ends a stage early, and here what would
    follow."""
    listen()  # training has had the signals for itself
    last = last_metrics(run)["step"]
    steps = json.loads((run / "config.json").read_text())["steps"]
    if last < steps:
        raise ValueError(f"{run} was stopped at step {last} of {steps}: start the same again")
    return run


def marks(cfg: DemoConfig, run: Path, judge: Path) -> dict[str, float]:
    """Mark a model's answers to held-out tasks, sampled once each at temperature 1: by the program,
    which no training has seen, and by the reward model, which made the preferences."""
    tasks = draw_tasks(cfg, "marks", 1000, 0.5, held_out=True)
    engine = engine_of(run)
    texts = [samples[0] for samples in answers(engine, tasks, 1, cfg.seed)]
    right = {True: [], False: []}  # by whether it was a call
    met = []
    rewards = []
    chats = []
    ideal = []
    for task, text in zip(tasks, texts, strict=True):
        right[task.call].append(task.right(text))
        met += task.met(text)
        rewards.append(task.reward(text))
        chats.append(render_reward(task.chat(text or "-"), engine.tokenizer))
        ids, trained = render_chat(task.chat(task.answer), engine.tokenizer)
        start = int(trained.argmax())
        ideal.append((ids[:start].tolist(), ids[start:].tolist()))
    judged = engine_of(judge).generate(chats, SamplingParams(max_tokens=0))
    log_probs = [sum(scored.logprobs) for scored in engine.score(ideal)]
    return {
        "calls right": mean(right[True]),
        "words right": mean(right[False]),
        "instructions met": mean(met),
        "true reward": mean(rewards),
        "model's reward": mean(float(aggregate(done.scores)) for done in judged),
        "log p(ideal)": mean(log_probs),
    }


def markdown(rows: dict[str, dict[str, float]], first: str) -> str:
    """Return a table with a row's name in the first column, and a column for each figure."""
    names = list(dict.fromkeys(chain.from_iterable(rows.values())))
    body = []
    for name, row in rows.items():
        figures = [f"{row[key]:.3g}" if key in row else "" for key in names]
        body.append([name, *figures])
    return "\n".join(table((first, *names), body)).strip()


def tuned_start(cfg: DemoConfig, last: str = "general_sft") -> Path:
    """Train the base, two SFTs and the reward model; return the SFT model, from which an online run
    begins, or the stage `last`, which is trained too."""
    if not (cfg.out / last).exists():  # many loops may share the folder when all is there
        cfg.out.mkdir(parents=True, exist_ok=True)
        hold(cfg.out)
    stages = stages_of(cfg) | {"weak": partial(supervised, cfg, "weak", "code_sft", 0.15, 3_500)}
    for name in ("base", "code_sft", "general_sft", "reward", last):
        finished_run(stages[name]())
    return cfg.out / last


def weak_start(cfg: DemoConfig) -> Path:
    """Train what tuned_start does and, with a fifth of the SFT, the weak model from which
    recipes.iterate begins."""
    return tuned_start(cfg, "weak")


def demo(cfg: DemoConfig) -> None:
    """Run the stages in order, mark each model, and write the table."""
    if world_size() > 1:
        raise ValueError("demo runs in one process: start it without torchrun")
    cfg.out.mkdir(parents=True, exist_ok=True)
    hold(cfg.out)
    begun = time.monotonic()
    seconds = {}
    for name, make in stages_of(cfg).items():
        start = time.monotonic()
        finished_run(make())
        seconds[name] = time.monotonic() - start
    judge = cfg.out / "reward"
    judge_seconds = seconds.pop("reward")
    rows = {}
    for name in seconds:
        rows[name] = marks(cfg, cfg.out / name, judge) | {"seconds": seconds[name]}
        drift = last_metrics(cfg.out / name).get("drift_chosen")
        if drift is not None:
            rows[name]["chosen drift"] = drift
    accuracy = last_metrics(judge)["pairs_accuracy"]
    minutes = (time.monotonic() - begun) / 60
    about = f"Reward model: {accuracy:.3f} of held-out pairs, {judge_seconds:.0f} s; "
    about += f"{minutes:.1f} minutes in all; seed {cfg.seed}."
    text = f"{markdown(rows, 'stage')}\n\n{about}\n"
    write_whole(cfg.out / "table.md", text)
    log.info(text)


def with_preset(default: str) -> list[str]:
    """Return the command line's arguments, begun with a preset where none is named."""
    args = sys.argv[1:]
    if not args or args[0].startswith("-") and args[0] not in ("-h", "--help"):
        return [default, *args]
    return args


def run_stoppable(main: Callable[[], None]) -> None:
    """Run a program of several stages. A first Ctrl-C or SIGTERM ends it with a line that says how
    to go on, a second one at once."""
    set_up_logging()
    listen()
    run(main)


def main() -> None:
    run_stoppable(lambda: demo(tyro.cli(DemoConfig, prog="python -m recipes.demo")))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends it without a word
    main()
