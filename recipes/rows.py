"""Turn public files of preferences and ratings into rows that the stages read.

Conversations, prompts with responses, pairs and HelpSteer2's ratings are read as they are; here is
what has to be made into them: one pair of several answers, a mean of several ratings.

python -m recipes.rows helpsteer3.jsonl.gz pairs.jsonl
python -m recipes.rows pairs.jsonl --stage dpo   # what a stage makes of the first rows
python align.py dpo --init runs/sft --data pairs.jsonl
"""

import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro

from data import (
    ATTRIBUTES,
    IGNORE,
    NINE_ATTRIBUTES,
    Messages,
    Tokenizer,
    check_messages,
    count_bad,
    in_our_names,
    messages_of,
    numbers,
    preference_rows,
    read_preference,
    read_records,
    read_scored,
    render_chat,
    required,
    reward_rows,
    sft_rows,
    split_turns,
    train_bpe,
)
from generate import run_command

log = logging.getLogger("nemotron4")

Record = dict[str, Any]


@dataclass(frozen=True)
class RowsConfig:
    """Convert a file of public rows; what each format becomes is in the table of this module."""

    file: tyro.conf.Positional[Path]
    """JSON Lines, also packed by gzip, a .json list or parquet, as it was published."""
    out: tyro.conf.Positional[Path | None] = None
    """File for the rows, as JSON lines; none: FILE holds rows that a stage reads, and is shown."""
    stage: Literal["sft", "reward", "dpo", "rpo"] = "sft"
    """Stage that is to read the rows that are shown."""
    split: str = ""  # Value of the rows' column `split`, which some files have; default: any
    skip_bad: bool = False  # Count and leave out what cannot be read, do not stop at the first


class Tie(ValueError):
    """Says that no answer of a row is the better one."""


# ---- what each format becomes --------------------------------------------------------------------


def best_and_worst(prompt: Any, answers: list[Any], scores: list[Any]) -> Record:
    """Return the first best answer and the first worst one as a pair, with scores as rewards."""
    names = [f"the score of answer {i}" for i in range(len(scores))]
    if len(numbers(scores, names)) < 2:
        raise ValueError(f"{len(scores)} answers: a pair needs two")
    best = scores.index(max(scores))
    worst = scores.index(min(scores))
    if scores[best] == scores[worst]:
        raise Tie
    pair = {"prompt": messages_of(prompt, "user"), "chosen": answers[best]}
    pair |= {"rejected": answers[worst], "chosen_reward": scores[best]}
    return pair | {"rejected_reward": scores[worst]}


def stronger(prompt: Any, first: Any, second: Any, strength: Any) -> Record:
    """Return the pair of a preference from -3, for the first answer, to 3; its size is the gap of
    the rewards, which is what Bradley-Terry's margin and RPO read."""
    numbers([strength], ["the preference"])
    if abs(strength) > 3:
        raise ValueError(f"the preference is {strength}: from -3 to 3")
    return best_and_worst(prompt, [first, second], [max(-strength, 0), max(strength, 0)])


def helpsteer2_preference(row: Record) -> Record:
    """Convert HelpSteer2's preferences, whose prompt holds several turns."""
    prompt = split_turns(required(row, "prompt", str))
    return stronger(prompt, row["response_1"], row["response_2"], row["preference_strength"])


def helpsteer3(row: Record) -> Record:
    """Convert HelpSteer3's preferences; in their texts a marker is text."""
    return stronger(row["context"], row["response1"], row["response2"], row["overall_preference"])


def nemo_rl(row: Record) -> Record:
    """Convert NeMo-RL's completions, of which the lowest rank is best; a rank is no reward."""
    completions = objects(row, "completions")
    answers = [required(one, "completion", list) for one in completions]
    ranks = [required(one, "rank") for one in completions]
    numbers(ranks, ["a rank"] * len(ranks))
    pair = best_and_worst(row["context"], answers, [-rank for rank in ranks])
    return {name: pair[name] for name in ("prompt", "chosen", "rejected")}


def ultrafeedback(row: Record) -> Record:
    """Convert openbmb's UltraFeedback by the mean of its four ratings: its overall score is known
    to be wrong where a critique began with a 10."""
    completions = objects(row, "completions")
    answers = [required(one, "response", str) for one in completions]
    scores = [required(one, "fine-grained_score") for one in completions]
    return best_and_worst(row["instruction"], answers, scores)


def hh_rlhf(row: Record) -> Record:
    r"""Convert texts like "\n\nHuman: Hi\n\nAssistant: Hello" into conversations."""
    return {side: split_dialogue(required(row, side, str)) for side in ("chosen", "rejected")}


def split_dialogue(text: str) -> list[Record]:
    """Split a text of hh-rlhf into messages."""
    start, *turns = re.split(r"\n\n(Human|Assistant): ?", text)
    if start or not turns:
        raise ValueError(rf"{text[:40]!r} does not begin with \n\nHuman:, and there is no prompt")
    said = [{"from": turns[i], "value": turns[i + 1]} for i in range(0, len(turns), 2)]
    return messages_of([turn | {"from": SPEAKERS[turn["from"]]} for turn in said], "user")


SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def helpsteer2_annotators(row: Record) -> Record:
    """Convert HelpSteer2's disagreements, a list of each attribute, to the lists' means."""
    means = {}
    for name in ATTRIBUTES:
        ratings = required(row, name, list)
        numbers(ratings, [name] * len(ratings))
        means[name] = fmean(ratings)  # an error for no rating at all
    return {name: row[name] for name in ("prompt", "response")} | means


def read_label(text: str) -> list[float]:
    """Return NINE_ATTRIBUTES of a label like `helpfulness:4,verbosity:2`; IGNORE for the others."""
    found = {}
    for part in text.split(","):
        name, _, value = part.partition(":")
        if name not in NINE_ATTRIBUTES or not re.fullmatch(r"[0-4](\.\d+)?", value):
            rule = "write helpfulness:4,correctness:3,..., each from 0 to 4"
            raise ValueError(f"label {text[:60]!r}: {rule}")
        found[name] = float(value)
    return [found.get(name, IGNORE) for name in NINE_ATTRIBUTES]


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


def steered(messages: Messages, attributes: str, tokenizer: Tokenizer) -> np.ndarray:
    """Render messages up to the answer that is wanted; if attributes are named, with their label,
    which the answer is to go on from."""
    ids, _ = render_chat(messages, tokenizer)
    return np.append(ids, label_ids(wanted_label(attributes), tokenizer)) if attributes else ids


def nemo_labelled(row: Record) -> Record:
    """Convert NeMo's turns with labels: the last one's is what a reward model learns, and those of
    all turns stay for recipes.steerlm."""
    turns = objects(row, "conversations")
    label = read_label(required(turns[-1], "label", str) if turns else "")
    messages = in_our_names({"conversations": turns, "system": row.get("system")})["messages"]
    for message, turn in zip(reversed(messages), reversed(turns), strict=False):
        if turn.get("label"):
            message["label"] = turn["label"]
    return {"messages": messages, "label": label}


WEIGHTS = ("log(P(a|x,y))", "log(P(y|x))", "log(Q(y|a,x))")  # of label a, prompt x and answer y


def steerlm2(row: Record) -> Record:
    """Convert NeMo's rows for SteerLM 2, whose answers come from the model Q that is to learn them.
    By Bayes an answer's weight is P(a|x,y) P(y|x) / Q; its logarithm becomes the reward."""
    prompt = in_our_names({"conversations": row["prompt_turns"], "system": row.get("system")})
    answers = objects(row, "responses")
    logs = [numbers([required(one, name) for name in WEIGHTS], WEIGHTS) for one in answers]
    read_label(required(row, "label", str))
    ours = {"prompt": prompt["messages"], "label": row["label"]}
    ours["responses"] = [required(one, "value", str) for one in answers]
    return ours | {"rewards": [float(judge + plain - q) for judge, plain, q in logs]}


def objects(row: Record, name: str) -> list[Record]:
    """Return a field that must be a list of objects."""
    values = required(row, name, list)
    if not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{name}: a list of objects, not {values!r:.60}")
    return values


class Format(NamedTuple):
    """Describes public rows by their columns, and says what they become."""

    name: str
    columns: str
    convert: Callable[[Record], Record]


# a row has the first format whose columns it has
FORMATS = (
    Format(
        "HelpSteer2-Preference",
        "prompt response_1 response_2 preference_strength",
        helpsteer2_preference,
    ),
    Format("HelpSteer3", "context response1 response2 overall_preference", helpsteer3),
    Format("NeMo-RL", "context completions", nemo_rl),
    Format("UltraFeedback", "instruction completions", ultrafeedback),
    Format(
        "HelpSteer2's annotators", f"prompt response {' '.join(ATTRIBUTES)}", helpsteer2_annotators
    ),
    Format("NeMo's labels", "conversations", nemo_labelled),
    Format("NeMo's SteerLM 2", "prompt_turns label responses", steerlm2),
    Format("hh-rlhf", "chosen rejected", hh_rlhf),
)


@lru_cache
def format_of(columns: frozenset[str]) -> Format:
    """Return the format that has these columns."""
    for known in FORMATS:
        if columns.issuperset(known.columns.split()):
            return known
    rule = "; ".join(f"{known.name}: {known.columns}" for known in FORMATS)
    raise ValueError(f"columns {str(sorted(columns)):.200} are those of none of {rule}")


# ---- rows that were made -------------------------------------------------------------------------


def ranked_row(pair: Record | None, candidates: list[Any]) -> Record | None:
    """Return the row of a pair with all rated candidates in its place, unless another one than the
    chosen has the highest reward, or another one than the rejected the lowest."""
    rewards = {one.chat.answer: one.reward for one in candidates if one.rating}
    ends = [max(rewards.values(), default=0), min(rewards.values(), default=0)]
    if not pair or [pair.get("chosen_reward"), pair.get("rejected_reward")] != ends:
        return None
    shared = {name: pair[name] for name in ("messages", "kind", "topic", "parents")}
    return shared | {"responses": [*rewards], "rewards": [*rewards.values()]}


def with_rows(made: Path, *names: str, advice: str = "") -> Path:
    """Return the first of some files of rows. If there is no row in any of them, raise a ValueError
    that says why, and what to do."""
    files = [made / f"{name}.jsonl" for name in names]
    if not any(file.stat().st_size for file in files):
        counts = json.loads((made / "manifest.json").read_text())["counts"]
        why = ", ".join(f"{times} x {reason}" for reason, times in counts.items() if times)
        none = "there is no prompt: name files by --prompts, or raise --counts"
        raise ValueError(f"{files[0]}: no row: {why or none}{advice}")
    return files[0]


# ---- the command ---------------------------------------------------------------------------------


def converted(row: Record) -> Record:
    """Return a row as the stages read it, or raise a ValueError that says why they could not."""
    row = {name: value for name, value in row.items() if value is not None}
    ours = format_of(frozenset(row)).convert(row)
    if "chosen" in ours:
        chats, _ = read_preference(in_our_names(ours), rewards=False)
    elif "responses" in ours:
        chats = [ours["prompt"] + messages_of(answer, "assistant") for answer in ours["responses"]]
    else:
        chats, _ = read_scored(in_our_names(ours), n_attributes=9)
    for chat in chats:
        check_messages(chat, answered=True)
    return ours


def lines(cfg: RowsConfig, counts: Counter) -> Iterator[str]:
    """Yield a JSON line of each row, and count rows by what they were."""
    on_bad = partial(count_bad, skip_bad=cfg.skip_bad, counts=counts, level=logging.WARNING)
    for where, row in read_records(cfg.file, on_bad):
        if cfg.split and row.get("split") != cfg.split:
            counts[f"of another split than {cfg.split}"] += 1
            continue
        try:
            line = json.dumps(converted(row), ensure_ascii=False)
        except Tie:
            counts["tied"] += 1
        except (ValueError, RecursionError) as e:
            on_bad(f"{where}: {e}: mend the line")
        else:
            counts[format_of(frozenset(name for name in row if row[name] is not None)).name] += 1
            yield line


def show(cfg: RowsConfig) -> None:
    """Log the first three rows of a file: each segment, what of it is trained, and the values."""
    readers = dict(sft=sft_rows, reward=reward_rows, dpo=preference_rows)
    readers["rpo"] = partial(preference_rows, rewards=True)
    tokenizer = train_bpe([], 263)  # each byte is a token
    rows, _ = readers[cfg.stage](cfg.file, tokenizer, sys.maxsize, skip_bad=True)
    for row in rows[:3]:
        for ids, trained in zip(row.ids, row.trained, strict=True):
            found = f"trained: {tokenizer.decode(ids[trained])!r}, values: {row.values}"
            log.info(f"--- {row.where}\n{tokenizer.decode(ids)}\n{found}")


def convert(cfg: RowsConfig) -> None:
    """Write the converted rows to a file that appears when it is complete, or show a file's."""
    if not cfg.out:
        show(cfg)
        return
    if cfg.out.exists():
        raise ValueError(f"{cfg.out} exists: remove it, or choose another file")
    counts: Counter = Counter(bad=0)
    unfinished = cfg.out.with_name(f"{cfg.out.name}.partial")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for line in lines(cfg, counts):
                file.write(f"{line}\n")
        made = sum(counts[known.name] for known in FORMATS)
        found = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        if not made:
            raise ValueError(
                f"{cfg.file}: no row left ({found or 'it is empty'}): look at the file"
            )
        unfinished.rename(cfg.out)
    finally:
        unfinished.unlink(missing_ok=True)
    log.info(f"{cfg.out}: {made:,} rows; {found}")


if __name__ == "__main__":
    parse = partial(tyro.cli, RowsConfig, prog="python -m recipes.rows")
    run_command("recipes.rows", parse, convert)
