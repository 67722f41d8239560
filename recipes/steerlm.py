"""Steer answers by attributes: SteerLM (arXiv 2310.05344).

A reward model rates every answer of conversations; SFT learns the answers with their ratings before
them, as in <extra_id_2>helpfulness:4,...,verbosity:1, which are not trained; and then an answer is
asked for with the ratings that it should have.

    python -m recipes.steerlm annotate runs/reward chats.jsonl labelled.jsonl
    python -m recipes.steerlm sft --init runs/base --data labelled.jsonl --out runs/steered
    python -m recipes.steerlm sample runs/steered --prompts Hi --attributes verbosity=1,coherence=4
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from align import AlignConfig, SftConfig, align, check_rows
from data import (
    IGNORE,
    NINE_ATTRIBUTES,
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
)
from generate import (
    Engine,
    EngineConfig,
    SampleConfig,
    SamplingParams,
    attributes_of,
    chat_sampling,
    load_engine,
    run_command,
    submit_rows,
    write_lines,
)
from generate import read_rows as read_prompts
from parallel import run, set_up_logging
from recipes.rows import read_label
from train import choose_config

log = logging.getLogger("nemotron4")


# ---- labels --------------------------------------------------------------------------------------


def label_of(values: Sequence[float]) -> str:
    """Write five or nine attributes as a label, in whole numbers from 0 to 4; one that is IGNORE is
    left out."""
    named = zip(NINE_ATTRIBUTES[-len(values) :], values, strict=True)
    known = {name: value for name, value in named if value != IGNORE}
    return ",".join(f"{name}:{round(min(4, max(0, value)))}" for name, value in known.items())


def label_ids(label: str, tokenizer: Tokenizer) -> np.ndarray:
    """Return the tokens of a label, which follow the head of an answer."""
    return np.append(tokenizer.special("<extra_id_2>"), tokenizer.encode(f"{label}\n"))


def wanted_label(attributes: str) -> str:
    """Read helpfulness=4,verbosity=1. What is not named is 4; if one of the four before helpfulness
    is named, these are 4 for quality and else 0, as in NeMo-Aligner's examples."""
    named = read_label(attributes.replace("=", ":")) if attributes else [IGNORE] * 9
    usual = [4, 0, 0, 0] if set(named[:4]) - {IGNORE} else [IGNORE] * 4
    both = zip(named, [*usual, 4, 4, 4, 4, 4], strict=True)
    return label_of([other if value == IGNORE else value for value, other in both])


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
    """Read a file of labelled conversations; see read_rows."""
    how = dict(seq_len=cfg.model.seq_len, skip_bad=cfg.skip_bad, shorten=cfg.shorten)
    render = partial(render_labelled, tokenizer=tokenizer)
    rows, _ = read_rows(path, read_labelled, render, **how)
    check_rows(cfg, rows, path)
    return rows


def steered_sft() -> SftConfig:
    """Fine-tune on labelled conversations, in two epochs."""
    return SftConfig(lr=5e-6, epochs=2, weight_decay=0.01)  # NeMo-Aligner's


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
    label = wanted_label(cfg.attributes)
    engine = load_engine(cfg)
    params = chat_sampling(cfg.sampling, engine.tokenizer)
    engine.check(params)

    def submit(row: dict[str, Any]) -> Any:
        messages = messages_of(row.get("messages") or row["prompt"], "user")
        ids, _ = render_chat(messages, engine.tokenizer)
        return engine.submit(np.append(ids, label_ids(label, engine.tokenizer)), params)

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


# ---- the program ---------------------------------------------------------------------------------

COMMANDS = {"annotate": (AnnotateConfig, annotate), "sample": (SteerConfig, sample)}


def main() -> None:
    about = __doc__.partition("\n\n")[2]
    program = "python -m recipes.steerlm"
    if sys.argv[1:2] == ["sft"]:
        sys.argv[0] = program  # as the help names it
        set_up_logging()
        configs = {"sft": steered_sft}
        run(lambda: align(*choose_config(sys.argv[1:], configs, about), read=labelled_rows))
    else:
        configs = {name: config for name, (config, _) in COMMANDS.items()}
        how = dict(prog=program, description=about)
        parse = partial(tyro.extras.subcommand_cli_from_dict, configs, **how)
        run_command("recipes.steerlm", parse, lambda cfg: dict(COMMANDS.values())[type(cfg)](cfg))


if __name__ == "__main__":
    main()
