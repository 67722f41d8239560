"""Questions of the synthetic data pipeline, and records of the answers."""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from data import MARKER, hold, read_records
from parallel import world_size
from recipes.backends import Backend, Sampling, load_backend
from recipes.verify import Decontaminator, read_evaluations

log = logging.getLogger("nemotron4")

Record = dict[str, Any]
# what a record is read for
SHAPE = dict(id=str, stage=str, text=str, finish_reason=str, scores=dict, messages=list)


@dataclass(frozen=True)
class Question:
    """Holds a conversation up to a user's turn, to be answered; also a topic, or a task."""

    kind: str
    messages: tuple[dict[str, str], ...] = ()
    parents: tuple[str, ...] = ()  # ids of the records that it comes from
    topic: str = ""
    template: str = ""  # the one that was filled
    sample: int = 0  # number among equal questions
    truth: dict[str, Any] = field(default_factory=dict)
    """Lets a program judge answers: `answer`, `tests`, or `instructions` and their `scope`."""
    document: str = ""  # what the question is about; it is included in the prompt

    @property
    def text(self) -> str:
        """Return what the user says, without the document, which other questions share."""
        said = [message["content"] for message in self.messages if message["role"] != "assistant"]
        text = "\n".join(said)
        return text.replace(self.document, "") if self.document else text

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    def with_message(self, role: str, text: str, *parents: str) -> "Question":
        """Add a message; `parents` are the ids of the records that it comes from."""
        messages = (*self.messages, {"role": role, "content": text})
        return replace(self, messages=messages, parents=(*self.parents, *parents), sample=0)

    def without_last(self, count: int) -> "Question":
        """Remove the last messages, each of which came from a record."""
        messages = self.messages[: len(self.messages) - count]
        return replace(self, messages=messages, parents=self.parents[: len(self.parents) - count])


Questions = list[Question]


def prompt(kind: str, text: str, *parents: str, **more: Any) -> Question:
    return Question(kind, **more).with_message("user", text, *parents)


# ---- the pipeline --------------------------------------------------------------------------------


class Pipeline:
    """Holds the models by their roles, records of what they were asked, and what was dropped.

    Records are one file a stage, appended to in the order of the questions, so that a killed run,
    started again, leaves the same bytes."""

    def __init__(self, cfg: Any) -> None:
        """Load the models of a SynthesizeConfig, and read the records that are there."""
        self.cfg = cfg
        self.library = cfg.library()
        self.amounts = cfg.amounts()
        self.counts = Counter()
        self.dropped = []
        evaluations = read_evaluations(cfg.evaluations)
        self.benchmarks = Decontaminator((Path(where).name, text) for where, text in evaluations)
        self.counts["evaluation texts too short to find"] = self.benchmarks.unindexed
        load = cache(partial(load_backend, cfg))
        self.model = load(str(cfg.model), rates=False)
        self.answerers = [load(name, rates=False) for name in cfg.answerers] or [self.model]
        self.reward = load(cfg.reward, rates=True) if cfg.reward else None
        self.leads = int(os.environ.get("RANK", 0)) == 0  # the first process writes
        self.folder = cfg.out / "records"
        self.known = {}  # records by stage and id
        self.used = {}  # those that this run needs, by id
        self.read_records()

    def read_records(self) -> None:
        """Read the records' files. A last line that a kill cut short is taken away; a damaged one
        is named and stays unread, so that it is asked for again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.leads:
            hold(self.cfg.out)
        files = sorted(self.folder.glob("*.jsonl"))
        for file in files if self.leads else []:
            os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
        wait_for_all()
        leave_out = partial(log.warning, "%s; it is asked for again")
        for file in files:
            for where, record in read_records(file, on_bad=leave_out):
                if all(isinstance(record.get(key), kind) for key, kind in SHAPE.items()):
                    self.keep(record)
                else:
                    leave_out(f"{where}: no whole record")
        wait_for_all()  # nobody writes before everybody has read

    def ask(
        self, stage: str, questions: Questions, backend: Backend | None = None, **sampling: Any
    ) -> list[Record]:
        """Return each question's record, known or made now."""
        backend = backend or self.model
        if not backend.rates:
            names = ("temperature", "top_p", "max_tokens")
            sampling = {name: getattr(self.cfg, name) for name in names} | sampling
        ids = [self.record_id(stage, one, backend, sampling) for one in questions]
        known = self.known.setdefault(stage, {})
        pairs = zip(ids, questions, strict=True)
        missing = {key: question for key, question in pairs if key not in known}
        work = []
        for key, question in missing.items():
            work.append(([*question.messages], dict(sampling, seed=int(key[:7], 16))))
        replies = zip(missing.items(), backend.answers(work), strict=True)
        bar = tqdm(
            replies, desc=stage, total=len(work), disable=not (self.leads and work), leave=False
        )
        for (key, question), reply in bar:
            record = dict(id=key, stage=stage, template=question.template, model=backend.name)
            record |= dict(sampling=sampling, seed=self.cfg.seed, sample=question.sample)
            record |= dict(parents=question.parents, messages=question.messages)
            self.append(record | reply._asdict())
        records = [known[key] for key in ids]
        self.used |= zip(ids, records, strict=True)
        return records

    def record_id(self, stage: str, one: Question, backend: Backend, sampling: Sampling) -> str:
        """Return the hash of everything that an answer depends on."""
        template = hash_of(self.library["templates"].get(one.template, ""))
        want = "rewards" if backend.rates else "text"
        asked = (stage, one.messages, one.sample, want, template)
        return hash_of(*asked, backend.name, sampling, self.cfg.seed)

    def append(self, record: Record) -> None:
        """Write a record to the end of its stage's file, and keep it."""
        if self.leads:
            with (self.folder / f"{record['stage']}.jsonl").open("ab") as file:
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.keep(record)

    def keep(self, record: Record) -> None:
        """Hold a record in memory, without what was asked: there may be millions."""
        del record["messages"]
        self.known.setdefault(record["stage"], {})[record["id"]] = record

    def fill(self, template: str, parents: tuple[str, ...] = (), **inputs: Any) -> Question:
        """Return the question that a template becomes."""
        text = self.library["templates"][template].format(**inputs)
        return prompt(template, text, *parents, template=template)

    def drop(self, stage: str, reason: str, chat: Question, evidence: Any) -> None:
        """Keep out of the rows what has a fault, and say why in a row of its own."""
        self.counts[f"{stage}: {reason}"] += 1
        self.dropped.append(row_of(chat, stage=stage, reason=reason, evidence=evidence))

    def answers(
        self,
        stage: str,
        asked: Questions,
        chats: Questions | None = None,
        role: str = "assistant",
        **how: Any,
    ) -> list[Question | None]:
        """Return each chat (by default, what was asked) with the answer as its next message.

        None stands for an answer that is dropped: it did not end by itself, says nothing, is
        over-long or has a marker of the chat template."""
        found = []
        records = self.ask(stage, asked, **how)
        for chat, record in zip(chats or asked, records, strict=True):
            text = clean(record["text"]) if role == "user" else record["text"]
            chat = chat.with_message(role, text, record["id"])
            reason, _, _ = record["finish_reason"].partition(":")
            if reason == "length":
                reason = "unfinished"
            elif reason == "stop" and not text:
                reason = "empty"
            elif reason == "stop" and len(text) > self.cfg.longest:
                reason = "over-long"
            elif reason == "stop" and MARKER.search(text):
                reason = "has a marker"
            if reason != "stop":
                evidence = f"{record['finish_reason']}, {len(text)} characters"
                self.drop(stage, reason, chat, evidence)
            found.append(chat if reason == "stop" else None)
        return found


def hash_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def row_of(chat: Question, **more: Any) -> Record:
    """Return a row as align.py reads it, with what it comes from."""
    origin = dict(kind=chat.kind, topic=chat.topic, parents=chat.parents)
    return dict(messages=chat.messages, **more, **origin)


PLEASANTRIES = re.compile(
    r"^\W*(thanks?( you)?( (so|very) much)?( for [^.!?\n]*)?|hi( there)?|hello( there)?|hey|sure|"
    r"great|of course|certainly|absolutely|i('d| would) be (happy|glad) to[^.!?\n]*|"
    r"that('s| is) (great|helpful|very helpful|interesting)[^.!?\n]*)\s*([.!,:?]+\s*|[-–—]+\s+|$)",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """Take from a played user's message its role, the assistant's next words, quotes around it,
    greetings and thanks."""
    text = re.sub(r"(?i)^\W*user[\s*]*[:>][\s*:>]*", "", text.strip())
    text = text.partition("<<ASSISTANT>>")[0].strip()
    text = re.sub(r"^[\"“]([^\"“”]*)[\"”]$", r"\1", text).strip()
    while PLEASANTRIES.match(text):
        text = PLEASANTRIES.sub("", text, count=1)
    return text[:1].upper() + text[1:]


def wait_for_all() -> None:
    if world_size() > 1:
        dist.barrier()
