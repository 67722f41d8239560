"""The whole system in small: toy tasks that a program can mark, and every stage of alignment.

python -m recipes.demo
"""

import json
import logging
import random
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import tyro

from align import PreferenceConfig, RewardConfig, SftConfig, align
from data import (
    REWARD_SYSTEM,
    PrepareConfig,
    aggregate,
    best_and_worst,
    prepare,
    render_chat,
    render_reward,
    train_bpe,
)
from generate import Engine, EngineConfig, SamplingParams, chat_stops, load_engine
from model import ModelConfig
from parallel import MeshConfig
from recipes.synthesize import SynthesizeConfig, synthesize, table
from train import PretrainConfig, pretrain, run, set_up_logging

log = logging.getLogger("nemotron4")


# ---- the demo's tasks ----------------------------------------------------------------------------
# What align.py's demo learns: small computations on digits, asked for as a call (code-like) or in
# words, then with instructions on the form. A program writes answers, good and bad, and marks any.

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGIT = {text: str(i % 10) for i, text in enumerate([*"0123456789", *NUMBERS])}
# what is done to the digits, and how it is asked for in words
OPERATIONS: dict[str, tuple[Callable[[str], str], str]] = {
    "sort": (lambda x: "".join(sorted(x)), "Sort {} upwards."),
    "first": (lambda x: x[0], "Give the first digit of {}."),
    "last": (lambda x: x[-1], "Give the last digit of {}."),
    "largest": (max, "Give the largest digit of {}."),
    "smallest": (min, "Give the smallest digit of {}."),
}
# how an instruction reads, what follows it, in this order, and which answers do
INSTRUCTIONS: dict[str, tuple[str, Callable[[str], str], str]] = {
    "words": (
        "In words.",
        lambda x: " ".join(NUMBERS[int(c)] for c in x),
        r"(?=.*[a-z]{3})[^0-9]+",
    ),
    "brackets": ("In brackets.", "({})".format, r".*\(.+\).*"),
    "sure": ("Begin with Sure:", "Sure: {}".format, "Sure:.*"),
    "mark": ("End with !", "{}!".format, ".*!"),
}
FAULTS = ("slip", "other", "cut", "chatter", "form")
BETWEEN = ("\n", " = ", " gives ", "\nResult:\n", "\nWhat comes out of it is\n")
CHATTER = ("Well, let me see.", "I think it is", "Here you go:")


def pieces(text: str) -> list[str]:
    """Digits, words and marks."""
    return re.findall(r"[0-9]|[^\W\d]+|[^\w\s]", text)


def digits_of(text: str) -> str:
    """All digits of a text, which has them as figures or as words."""
    return "".join(DIGIT.get(piece, "") for piece in pieces(text))


def form_of(text: str) -> set[str]:
    """What a text is made of, whichever the digits."""
    return {("0" if p.isdigit() else "zero") if p in DIGIT else p for p in pieces(text)}


def write_answer(result: str, instructions: Iterable[str]) -> str:
    for name in INSTRUCTIONS:
        result = INSTRUCTIONS[name][1](result) if name in instructions else result
    return result


@dataclass(frozen=True)
class Task:
    operation: str
    digits: str
    instructions: tuple[str, ...] = ()
    call: bool = False
    """Asked for as a call, else in words."""

    @property
    def prompt(self) -> str:
        if self.call:
            return f"{self.operation}({self.digits})"
        asked = OPERATIONS[self.operation][1].format(self.digits)
        return " ".join([asked, *(INSTRUCTIONS[name][0] for name in self.instructions)])

    @property
    def held_out(self) -> bool:
        """A tenth of what can be asked, however it is worded: nothing is trained on it."""
        return zlib.crc32(f"{self.operation}({self.digits})".encode()) % 10 == 0

    @property
    def result(self) -> str:
        return OPERATIONS[self.operation][0](self.digits)

    @property
    def answer(self) -> str:
        return write_answer(self.result, self.instructions)

    def right(self, text: str) -> bool:
        return digits_of(text) == self.result

    def met(self, text: str) -> list[bool]:
        """Which of its instructions a text follows."""
        checks = (INSTRUCTIONS[name][2] for name in self.instructions)
        return [bool(re.fullmatch(check, text.strip(), re.DOTALL)) for check in checks]

    def labels(self, text: str) -> list[int]:
        """ATTRIBUTES of any text as an answer, 0 to 4 each: helpfulness, correctness in part by
        digits, coherence by what does not belong, complexity by what is done of what is asked."""
        got, met, right = digits_of(text), self.met(text), self.right(text)
        same = sum(a == b for a, b in zip(got, self.result, strict=False))
        correct = 4 if right else round(3 * same / max(len(got), len(self.result)))
        helpful = round(correct * (1 + sum(met)) / (1 + len(met)))
        coherent = max(0, 4 - len(form_of(text) - form_of(self.answer))) if pieces(text) else 0
        longer = len(pieces(text)) - len(pieces(self.answer))
        return [helpful, correct, coherent, 2 * right + sum(met), min(4, max(0, 1 + longer))]

    def flawed(self, rng: random.Random, faults: Sequence[str] = FAULTS, n: int = 0) -> str:
        """An answer with n faults (0: one, now and then two): a wrong digit, another operation's
        result, an early end, chatter, an instruction ignored or, where there is none, made up."""
        text = self.answer
        while text == self.answer:
            made, result = rng.sample(faults, k=n or rng.choice((1, 1, 2))), self.result
            if "slip" in made:
                i = rng.randrange(len(result))
                result = result[:i] + rng.choice("0123456789") + result[i + 1 :]
            if "other" in made:
                result = OPERATIONS[rng.choice([*OPERATIONS])][0](self.digits)
            changed = {rng.choice(self.instructions or [*INSTRUCTIONS])} if "form" in made else {}
            text = write_answer(result, {*self.instructions} ^ {*changed})
            text = f"{rng.choice(CHATTER)} {text}" if "chatter" in made else text
            text = text[: rng.randint(1, len(text))].strip() if "cut" in made else text
        return text


def draw_task(rng: random.Random, call: bool, held_out: bool = False) -> Task:
    """Three or four digits; in words, with up to two instructions."""
    while True:
        digits = "".join(rng.choices("0123456789", k=rng.randint(3, 4)))
        asked = [] if call else rng.sample([*INSTRUCTIONS], k=rng.choice((0, 1, 1, 2)))
        task = Task(rng.choice([*OPERATIONS]), digits, tuple(asked), call)
        if task.held_out == held_out:
            return task


def draw_text(rng: random.Random) -> str:
    """A document to pretrain on: calls and their results, perhaps with a verdict, and numbers in
    words. Nobody asks or answers. Several in one document, and more or less between a call and its
    result: what is learnt must not depend on places."""
    return "\n".join(draw_line(rng) for _ in range(rng.randint(1, 5)))


def draw_line(rng: random.Random) -> str:
    task, kind = draw_task(rng, call=True), rng.random()
    if kind < 0.2:
        return f"{task.digits}\n{write_answer(task.digits, ['words'])}"
    called = f"{task.prompt}{rng.choice(BETWEEN)}"
    if kind < 0.6:
        return f"{called}{task.result}"
    result = task.flawed(rng, ("slip", "other", "cut")) if rng.random() < 0.5 else task.result
    return f"{called}{result}\n{'right' if task.right(result) else 'wrong'}"


def scored_row(task: Task, text: str) -> dict[str, Any]:
    """A row for sft_rows and, with its label, for reward_rows."""
    messages = [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": text}]
    return {"messages": messages, "label": task.labels(text)}


# ---- the demo ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemoConfig:
    """A base model, two SFTs, a reward model, DPO and three RPOs, on small computations that a
    program can mark (data.py's tasks), on two cores; and a table of what each stage brought."""

    out: Path = Path("runs/demo")
    """Runs, rows and table.md; a demo that was stopped goes on where it was."""
    seed: int = 0
    scale: float = 1.0
    """Share of the tasks and of the pretraining steps: 0.01 is a test of the machinery."""

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise ValueError(f"scale={self.scale}: must be above 0 and at most 1")


# every detail of the 340B's architecture, at a size that learns the tasks in minutes
DEMO = ModelConfig(128, 4, 4, 2, 32, 512, vocab_size=480, seq_len=192, init_std=0.09)
FP32 = MeshConfig(dtype="fp32")


def write_rows(path: Path, make: Callable[[], Iterable[dict[str, Any]]]) -> Path:
    """A file of rows, whole or not there, once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text("".join(json.dumps(row) + "\n" for row in make()))
        path.with_suffix(".tmp").rename(path)
    return path


def demo_tasks(
    cfg: DemoConfig, name: str, n: int, calls: float, held_out: bool = False
) -> list[Task]:
    rng = random.Random(f"{cfg.seed}/{name}")
    return [
        draw_task(rng, rng.random() < calls, held_out) for _ in range(max(40, round(n * cfg.scale)))
    ]


def demo_base(cfg: DemoConfig) -> Path:
    """A tokenizer, and pretraining on calls and their results, which nobody asks for."""
    rng, tokens = random.Random(f"{cfg.seed}/base"), cfg.out / "tokens"
    if not tokens.exists():
        cfg.out.mkdir(parents=True, exist_ok=True)
        texts = [draw_text(rng) for _ in range(max(3000, round(70_000 * cfg.scale)))]
        tasks = [draw_task(rng, call=False) for _ in range(3000)]
        asked = [text for t in tasks for text in (t.prompt, t.answer, t.flawed(rng))]
        words = [*texts[:2000], *asked, REWARD_SYSTEM * 50]
        file = train_bpe(words, DEMO.vocab_size).save(cfg.out)
        rows = write_rows(cfg.out / "texts.jsonl", lambda: ({"text": text} for text in texts))
        how = dict(sources=(f"calls={rows}",), tokenizer=str(cfg.out / file), val_fraction=0.01)
        prepare(PrepareConfig(out=tokens, **how))
    pretrain("base", PretrainConfig(
        model=DEMO, mesh=FP32, data=tokens, out=cfg.out / "base", batch=16, micro_batch=16,
        steps=max(8, round(600 * cfg.scale)), lr=3e-3, min_lr=3e-4, warmup=16 * 60,
        eval_every=400, isolate=True,
    ))  # fmt: skip
    return cfg.out / "base"


def demo_sft(cfg: DemoConfig, name: str, init: Path, calls: float, n: int) -> Path:
    """SFT on answers of which a third have chatter before them, or miss their instruction: what
    preferences can mend."""

    def rows() -> Iterator[dict[str, Any]]:
        rng = random.Random(f"{cfg.seed}/{name}/flaws")
        for task in demo_tasks(cfg, name, n, calls):
            flawed = rng.random() < 0.35
            yield scored_row(task, task.flawed(rng, ("chatter", "form")) if flawed else task.answer)

    return align(name, SftConfig(
        data=write_rows(cfg.out / f"{name}.jsonl", rows), **demo_stage(cfg.out / name, init),
        lr=1e-3, min_lr=1e-4, warmup=16 * 10, batch=64, epochs=1,
    ))  # fmt: skip


def demo_stage(out: Path, init: Path) -> dict[str, Any]:
    """What all stages have in common."""
    return dict(
        init=str(init), out=out, seq_len=DEMO.seq_len, mesh=FP32, micro_batch=16,
        eval_every=1 << 30, save_every=1 << 30,
    )  # fmt: skip


def answers(engine: Engine, tasks: list[Task], n: int, seed: int) -> list[list[str]]:
    """n sampled answers of each task."""
    how = SamplingParams(max_tokens=40, n=n, seed=seed, stop_ids=chat_stops(engine.tokenizer))
    asked = [[{"role": "user", "content": task.prompt}] for task in tasks]
    done = engine.generate([render_chat(chat, engine.tokenizer)[0] for chat in asked], how)
    return [[one.text.strip() for one in done[i : i + n]] for i in range(0, len(done), n)]


def demo_reward(cfg: DemoConfig, init: Path) -> Path:
    """The reward model: sampled, right and flawed answers, marked by the program."""

    def texts_of(tasks: list[Task]) -> Iterator[tuple[Task, list[str]]]:
        rng, engine = random.Random(f"{cfg.seed}/reward/flaws"), demo_engine(init)
        for task, sampled in zip(tasks, answers(engine, tasks, 2, cfg.seed), strict=True):
            # two faults at a time: what misses its form must not be right more often
            flawed = (task.flawed(rng), task.flawed(rng, n=2))
            made = dict.fromkeys([*sampled, task.answer, *flawed])
            yield task, [text for text in made if text]

    def rows() -> Iterator[dict[str, Any]]:
        for task, texts in texts_of(demo_tasks(cfg, "reward", 5000, 0.25)):
            yield from (scored_row(task, text) for text in texts)

    def pairs() -> Iterator[dict[str, Any]]:
        for task, texts in texts_of(demo_tasks(cfg, "reward pairs", 400, 0.25, held_out=True)):
            true = [float(aggregate(task.labels(text))) for text in texts]
            if found := best_and_worst(texts, true, [True] * len(texts)):
                sides = dict(zip(("chosen", "rejected"), (texts[i] for i in found), strict=True))
                yield {"messages": [{"role": "user", "content": task.prompt}], **sides}

    return align("reward", RewardConfig(
        data=write_rows(cfg.out / "reward.jsonl", rows),
        pairs=write_rows(cfg.out / "reward_pairs.jsonl", pairs),
        **demo_stage(cfg.out / "reward", init), lr=1e-3, min_lr=1e-4, warmup=16 * 10, batch=64,
    ))  # fmt: skip


# a model's own answers to given prompts, which the reward model ranks
OWN_ANSWERS = SynthesizeConfig(
    recipe="prompts", counts=dict(samples=6, preference_share=1, turns=1), max_tokens=40, slots=64,
    min_gap=0.3,
)  # fmt: skip


def demo_prompts(cfg: DemoConfig, name: str, n: int) -> tuple[Path]:
    tasks = partial(demo_tasks, cfg, name, n, 0.25)
    rows = lambda: ({"prompt": task.prompt} for task in tasks())  # noqa: E731
    return (write_rows(cfg.out / f"{name}_prompts.jsonl", rows),)


def demo_preference(cfg: DemoConfig, name: str, init: Path, judge: Path) -> Path:
    """The policy's own answers, the best and the worst by the reward model, then DPO or RPO."""
    prompts = demo_prompts(cfg, name, 1000)
    how = dict(prompts=prompts, out=cfg.out / f"{name}_data", seed=cfg.seed)
    made = synthesize(replace(OWN_ANSWERS, model=init, reward=str(judge), **how))
    stage = demo_stage(cfg.out / name, init)
    return align(name, replace(demo_loss(name), data=made / "rpo.jsonl", **stage))


def demo_loss(name: str) -> PreferenceConfig:
    how = dict(loss="dpo", beta=0.1) if name == "dpo" else dict(loss="rpo_bwd", beta=0.1, eta=1.0)
    return PreferenceConfig(sft_weight=1e-3, lr=1e-4, warmup=16 * 4, batch=32, **how)


def demo_engine(run: Path) -> Engine:
    return load_engine(EngineConfig(run, slots=64))


def mark(cfg: DemoConfig, run: Path, judge: Path) -> dict[str, float]:
    """What a run's model does with the held-out tasks, sampled once each at temperature 1, by the
    program, which no training has seen, and by the reward model, which made the preferences."""
    tasks = demo_tasks(cfg, "marks", 1000, 0.5, held_out=True)
    engine, referee = demo_engine(run), demo_engine(judge)
    texts = [some[0] for some in answers(engine, tasks, 1, cfg.seed)]
    pairs = []
    for task in tasks:
        ids, trained = render_chat(scored_row(task, task.answer)["messages"], engine.tokenizer)
        n = int(trained.argmax())
        pairs.append((ids[:n].tolist(), ids[n:].tolist()))
    said = [*zip(tasks, texts, strict=True)]
    chats = [render_reward(scored_row(t, x or "-")["messages"], engine.tokenizer) for t, x in said]
    judged = [
        aggregate(one.scores) for one in referee.generate(chats, SamplingParams(max_tokens=0))
    ]
    met = [ok for task, text in said for ok in task.met(text)]
    calls = [task.right(text) for task, text in said if task.call]
    words = [task.right(text) for task, text in said if not task.call]
    true = [float(aggregate(task.labels(text))) for task, text in said]
    return {
        "calls right": mean(calls), "words right": mean(words), "instructions met": mean(met),
        "true reward": mean(true), "model's reward": mean(map(float, judged)),
        "log p(ideal)": mean(sum(done.logprobs) for done in engine.score(pairs)),
    }  # fmt: skip


def last_metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def finished_run(run: Path) -> Path:
    """A run that has come to its end: SIGTERM ends a stage, and what would follow with it."""
    last = last_metrics(run)["step"]
    if last < (steps := json.loads((run / "config.json").read_text())["steps"]):
        raise ValueError(f"{run} was stopped at step {last} of {steps}: start the same again")
    return run


def markdown(rows: dict[str, dict[str, float]], first: str) -> str:
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = ([f"{row[name]:.3g}" if name in row else "" for name in names] for row in rows.values())
    body = ([key, *some] for key, some in zip(rows, cells, strict=True))
    return "\n".join(table((first, *names), body)).strip()


def demo_start(cfg: DemoConfig) -> dict[str, Callable[[], Path]]:
    """The stages before preferences, each of which makes what it needs."""
    at = {name: cfg.out / name for name in ("base", "code_sft", "general_sft", "reward")}
    return {
        "base": lambda: demo_base(cfg),
        "code_sft": lambda: demo_sft(cfg, "code_sft", at["base"], 1.0, 6_000),
        "general_sft": lambda: demo_sft(cfg, "general_sft", at["code_sft"], 0.15, 16_000),
        "reward": lambda: demo_reward(cfg, at["general_sft"]),
    }


def demo(cfg: DemoConfig) -> None:
    """All stages, and the table."""
    begun, stages = time.monotonic(), demo_start(cfg)
    policy, judge = "general_sft", cfg.out / "reward"
    for name in ("dpo", "rpo_1", "rpo_2", "rpo_3"):
        stages[name] = partial(demo_preference, cfg, name, cfg.out / policy, judge)
        policy = name
    seconds = {}
    for name, make in stages.items():
        start = time.monotonic()
        finished_run(make())
        seconds[name] = time.monotonic() - start
    rows = {name: mark(cfg, cfg.out / name, judge) for name in stages if name != "reward"}
    for name, row in rows.items():
        if (drift := last_metrics(cfg.out / name).get("drift_chosen")) is not None:
            row["chosen drift"] = drift
        row["seconds"] = seconds[name]
    accuracy = last_metrics(judge)["pairs_accuracy"]
    about = (
        f"Reward model: {accuracy:.3f} of held-out pairs, {seconds['reward']:.0f} s; "
        f"{(time.monotonic() - begun) / 60:.1f} minutes in all; seed {cfg.seed}."
    )
    text = f"{markdown(rows, 'stage')}\n\n{about}\n"
    (cfg.out / "table.md").write_text(text)
    log.info(text)


def main() -> None:
    set_up_logging()
    run(lambda: demo(tyro.cli(DemoConfig)))


if __name__ == "__main__":
    main()
