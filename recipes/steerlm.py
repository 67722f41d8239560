"""Steer answers by attributes: SteerLM (arXiv 2310.05344), and SteerLM 2 (arXiv 2406.08673).

A reward model rates every answer of conversations; SFT learns the answers with their ratings before
them, as in <extra_id_2>helpfulness:4,...,verbosity:1, which are not trained; and then an answer is
asked for with the ratings that it should have.

    python -m recipes.steerlm annotate runs/reward chats.jsonl labelled.jsonl
    python -m recipes.steerlm sft --init runs/base --data labelled.jsonl --out runs/steered
    python -m recipes.steerlm sample runs/steered --prompts Hi --attributes verbosity=1,coherence=4
    python -m recipes.steerlm steerlm2 --init runs/steered --data weighed.jsonl
    python -m recipes.steerlm demo
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import tyro

from align import (
    AlignConfig,
    PreferenceConfig,
    SftConfig,
    align,
    check_rows,
    read_answers,
    with_absent_answers,
)
from data import (
    Example,
    Messages,
    Rendered,
    Tokenizer,
    check_messages,
    fit,
    in_our_names,
    messages_of,
    read_chat,
    read_records,
    read_rows,
    read_scored,
    render_chat,
    render_reward,
    required,
    trim,
    write_whole,
)
from generate import (
    Engine,
    EngineConfig,
    SampleConfig,
    SamplingParams,
    attributes_of,
    chat_sampling,
    chat_stops,
    load_engine,
    run_command,
    submit_rows,
    write_lines,
)
from generate import read_rows as read_prompts
from parallel import run, set_up_logging
from recipes.demo import (
    SUPERVISED,
    DemoConfig,
    draw_tasks,
    engine_of,
    finished_run,
    markdown,
    tuned_start,
)
from recipes.rows import label_ids, label_of, read_label, steered, wanted_label
from train import choose_config

log = logging.getLogger("nemotron4")


# ---- training ------------------------------------------------------------------------------------


def read_labelled(row: dict[str, Any]) -> tuple[list[Messages], None]:
    """Parse a conversation whose answers have a `label`, as annotate writes them, or a scored one,
    of which only the last answer has one."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not any("label" in turn for turn in turns):
        (chat,), values = read_scored(row, n_attributes=9)
        return [[*chat[:-1], chat[-1] | {"label": label_of(values)}]], None
    (chat,), _ = read_chat(row)
    for message, turn in zip(chat, turns, strict=True):
        if turn.get("label"):
            message["label"] = label_of(read_label(required(turn, "label", str)))
    return [chat], None


def read_weighed(row: dict[str, Any]) -> tuple[list[Messages], np.ndarray]:
    """Parse a prompt, a label and several responses, each with the logarithm of its weight as its
    reward; recipes.rows makes such rows of NeMo's for SteerLM 2."""
    chats, values = read_answers(row, "rpo_bwd")
    label = label_of(read_label(required(row, "label", str)))
    return [[*chat[:-1], chat[-1] | {"label": label}] for chat in chats], values


def render_labelled(messages: Messages, tokenizer: Tokenizer) -> Rendered:
    """Render messages as render_chat does, with its label, which is not trained, before each answer
    that has one. An answer without a label is not trained."""
    ids, trained = render_chat(messages, tokenizer)
    for i in reversed(range(len(messages))):  # an answer's place does not depend on later ones
        if messages[i]["role"] == "assistant":
            head = len(render_chat(messages[:i], tokenizer)[0])
            if "label" in messages[i]:
                label = label_ids(messages[i]["label"], tokenizer)
                ids = np.insert(ids, head, label)
                trained = np.insert(trained, head, np.zeros(len(label), bool))
            else:
                trained[head : len(render_chat(messages[: i + 1], tokenizer)[0])] = False
    return ids, trained


def labelled_rows(cfg: AlignConfig, path: Path, tokenizer: Tokenizer) -> list[Example]:
    """Read a file of labelled conversations, or of weighed answers; see read_rows."""
    how = dict(seq_len=cfg.model.seq_len, skip_bad=cfg.skip_bad, shorten=cfg.shorten)
    render = partial(render_labelled, tokenizer=tokenizer)
    parse = read_weighed if isinstance(cfg, PreferenceConfig) else read_labelled
    rows = with_absent_answers(read_rows(path, parse, render, **how)[0])
    check_rows(cfg, rows, path)
    return rows


def steered_sft() -> SftConfig:
    """Fine-tune on labelled conversations, in two epochs."""
    return SftConfig(lr=5e-6, epochs=2, weight_decay=0.01)  # NeMo-Aligner's


def steerlm2() -> PreferenceConfig:
    """Bring the likelihoods of a prompt's answers to their weights (SteerLM 2): KL(w ‖ b), with b =
    softmax(log π/π_ref), is RPO's loss of K answers where β and η are 1."""
    return PreferenceConfig(loss="rpo_bwd", beta=1.0, lr=5e-6, epochs=2, weight_decay=0.01)


# ---- labelling -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig(EngineConfig):
    """Label each answer of conversations by a reward model: its attributes, in whole numbers from 0
    to 4. What is labelled is read by `sft`, and by `align.py sft` as if it had no labels."""

    file: tyro.conf.Positional[Path]
    """Conversations, in any form that `align.py sft` reads."""
    out: tyro.conf.Positional[Path]
    """File for the labelled conversations, as JSON lines."""


def submit_answers(engine: Engine, row: dict[str, Any]) -> tuple[Messages, dict[int, Any]]:
    """Submit a row's conversation up to each answer, without its earliest exchanges where it is too
    long; return the conversation, and what is submitted by the answer's place in it."""
    chat = trim(read_chat(in_our_names(row))[0][0], last=True)
    check_messages(chat, answered=True)
    render = lambda messages: (render_reward(messages, engine.tokenizer), np.zeros(0))  # noqa: E731
    submitted = {}
    for i, message in enumerate(chat):
        if message["role"] == "assistant":
            ((ids, _),), _ = fit([chat[: i + 1]], render, engine.context, shorten=True)
            if len(ids) <= engine.context:  # else it stays without a label
                submitted[i] = engine.submit(ids, SamplingParams(max_tokens=0))
    return chat, submitted


def annotate(cfg: AnnotateConfig) -> None:
    """Submit all answers, then write each conversation as soon as its answers are rated."""
    engine = load_engine(cfg)
    if not engine.cfg.n_attributes:
        raise ValueError(f"{cfg.model} is a language model: name a reward model to rate")
    work = submit_rows(read_records(cfg.file), partial(submit_answers, engine))

    def lines() -> Iterator[dict[str, Any]]:
        for _, (chat, submitted) in work:
            for i, sequences in submitted.items():
                for done in engine.finished(sequences):
                    chat[i]["label"] = label_of([*attributes_of(done.scores).values()])
            yield {"messages": chat}

    write_lines(cfg.out, engine, lines(), len(work))


# ---- sampling ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SteerConfig(SampleConfig):
    """Sample answers that have the wanted attributes; write JSON lines in the prompts' order."""

    attributes: str = ""
    """Wanted attributes, as helpfulness=4,verbosity=1; others: 4, toxicity, humor, creativity 0."""


def sample(cfg: SteerConfig) -> None:
    """Submit all prompts, then write each answer as soon as those before it are written."""
    wanted = cfg.attributes or "helpfulness=4"
    label = wanted_label(wanted)
    engine = load_engine(cfg)
    params = chat_sampling(cfg.sampling, engine.tokenizer)
    engine.check(params)

    def submit(row: dict[str, Any]) -> Any:
        messages = messages_of(row.get("messages") or row["prompt"], "user")
        return engine.submit(steered(messages, wanted, engine.tokenizer), params)

    rows = [("--prompts", {"prompt": text}) for text in cfg.prompts]
    work = submit_rows(rows or read_prompts(cfg.file, text_field="prompt"), submit)

    def lines() -> Iterator[dict[str, Any]]:
        for row, samples in work:
            for done in engine.finished(samples):
                line = {"index": done.index, "text": done.text, "finish_reason": done.finish_reason}
                if params.logprobs is not None:
                    line |= {"ids": done.ids, "logprobs": done.logprobs, "top_logprobs": done.tops}
                yield row | {"label": label} | line

    write_lines(cfg.out, engine, lines(), params.n * len(work))


# ---- the demo ------------------------------------------------------------------------------------

# nothing (plain SFT), long or short answers, helpful ones or not, and what suits the demo's tasks
ASKED = ("", "verbosity=0", "verbosity=4", "helpfulness=0", "complexity=2,verbosity=1")


@dataclass(frozen=True)
class SteerDemoConfig(DemoConfig):
    """Train the demo's SFT model once more on answers that its reward model has labelled, and write
    steered.md: what asking for attributes changes."""


def measure(cfg: DemoConfig, run: Path, attributes: str) -> dict[str, float]:
    """Sample an answer to each held-out task, asked for with attributes: its true reward, that of
    the likeliest answer, and the length."""
    tasks = draw_tasks(cfg, "marks", 1000, 0.5, held_out=True)
    engine = engine_of(run)
    prompts = [steered(task.chat("")[:1], attributes, engine.tokenizer) for task in tasks]
    how = SamplingParams(max_tokens=40, seed=cfg.seed, stop_ids=chat_stops(engine.tokenizer))
    sampled, likeliest = (engine.generate(prompts, replace(how, temperature=t)) for t in (1, 0))
    both = list(zip(tasks, sampled, likeliest, strict=True))
    return {
        "true reward": mean(task.reward(done.text.strip()) for task, done, _ in both),
        "at temperature 0": mean(task.reward(done.text.strip()) for task, _, done in both),
        "tokens": mean(len(done.ids) for done in sampled),
        "characters": mean(len(done.text.strip()) for done in sampled),
    }


def demo(cfg: SteerDemoConfig) -> None:
    """Label the rows of general_sft, train on them with its settings, and write the table."""
    plain = tuned_start(cfg)
    labelled = cfg.out / "labelled.jsonl"
    if not labelled.exists():
        rows = cfg.out / "general_sft.jsonl"
        annotate(AnnotateConfig(cfg.out / "reward", slots=64, file=rows, out=labelled))
    settings = dict(data=labelled, init=str(cfg.out / "code_sft"), out=cfg.out / "steered")
    run = finished_run(align("steerlm", replace(SUPERVISED, **settings), read=labelled_rows))
    table = {asked or "plain SFT": measure(cfg, run if asked else plain, asked) for asked in ASKED}
    text = markdown(table, "asked for; all others 4")
    write_whole(cfg.out / "steered.md", f"{text}\n")
    log.info(text)


# ---- the program ---------------------------------------------------------------------------------

COMMANDS = {
    "annotate": (AnnotateConfig, annotate), "sample": (SteerConfig, sample),
    "demo": (SteerDemoConfig, demo),
}  # fmt: skip


def main() -> None:
    about = __doc__.partition("\n\n")[2]
    program = "python -m recipes.steerlm"
    trained = {"sft": steered_sft, "steerlm2": steerlm2}
    if sys.argv[1:2] and sys.argv[1] in trained:
        sys.argv[0] = program  # as the help names it
        set_up_logging()
        run(lambda: align(*choose_config(sys.argv[1:], trained, about), read=labelled_rows))
    else:
        configs = {name: config for name, (config, _) in COMMANDS.items()}
        how = dict(prog=program, description=about)
        parse = partial(tyro.extras.subcommand_cli_from_dict, configs, **how)
        run_command("recipes.steerlm", parse, lambda cfg: dict(COMMANDS.values())[type(cfg)](cfg))


if __name__ == "__main__":
    main()
