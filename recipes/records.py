"""Backends that answer the questions of the synthetic data pipeline, and records of the answers."""

import hashlib
import json
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from tqdm import tqdm

from data import ATTRIBUTES, MARKER, Messages, hold, read_records, render_chat, render_reward
from generate import EngineConfig, SamplingParams, Sequence, attributes_of, chat_stops, load_engine
from parallel import step_folders, world_size
from recipes.verify import Decontaminator, read_evaluations

log = logging.getLogger("nemotron4")

Record = dict[str, Any]
Sampling = dict[str, Any]
Work = list[tuple[Messages, Sampling]]
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


class Reply(NamedTuple):
    """Holds what a backend answers."""

    text: str
    finish_reason: str = "stop"  # or length, too long, no answer, refused: why
    tokens: tuple[int, int] = (0, 0)  # of the prompt, of the answer
    scores: dict[str, float] = {}  # a reward model's attributes


# ---- backends ------------------------------------------------------------------------------------


class Local:
    """Answers with a model in this process: a language model writes, a reward model rates."""

    def __init__(self, cfg: EngineConfig, rates: bool) -> None:
        self.engine = load_engine(cfg)
        self.rates = rates
        self.name = identity(cfg.model)
        if cfg.quantize != "none":
            self.name += f" {cfg.quantize}"
        if rates != bool(self.engine.cfg.n_attributes):
            kinds = ("a language model", "a reward model")
            raise ValueError(f"{cfg.model} is {kinds[not rates]}, not {kinds[rates]}")

    def answers(self, work: Work) -> Iterator[Reply]:
        """Yield replies in the order of the work. A kill loses at most one window of them."""
        window = 16 * len(self.engine.slots)
        for start in range(0, len(work), window):
            running = [self.submit(*one) for one in work[start : start + window]]
            yield from map(self.reply, running)

    def submit(self, messages: Messages, sampling: Sampling) -> list[Sequence]:
        """Queue a conversation, unless it leaves no room for an answer in the context."""
        tokenizer = self.engine.tokenizer
        if self.rates:
            ids = render_reward(messages, tokenizer)
            sampling = dict(max_tokens=0)
        else:
            ids, _ = render_chat(messages, tokenizer)
        if len(ids) + (not self.rates) > self.engine.context:
            return []
        return self.engine.submit(ids, SamplingParams(stop_ids=chat_stops(tokenizer), **sampling))

    def reply(self, sequences: list[Sequence]) -> Reply:
        """Wait for the answer of the engine."""
        if not sequences:
            return Reply("", "too long")
        (done,) = self.engine.finished(sequences)
        tokens = (done.n_prompt, len(done.ids))
        if self.rates:
            return Reply("", "stop", tokens, attributes_of(done.scores))
        return Reply(done.text.strip(), done.finish_reason, tokens)


class Endpoint:
    """Asks a model behind an OpenAI-compatible server.

    The openai package repeats what failed (429, 5xx, a lost connection) after growing pauses, or
    after the one that the server asks for."""

    def __init__(self, cfg: Any, name: str, rates: bool) -> None:
        """Connect to the endpoint of a SynthesizeConfig, with the key in OPENAI_API_KEY."""
        try:
            import openai
        except ImportError as e:
            raise ValueError("--endpoint needs `pip install -e '.[endpoint]'`") from e
        if not re.match(r"https?://[^/\s]", cfg.endpoint):
            rule = "a URL such as http://localhost:8000/v1 is wanted"
            raise ValueError(f"endpoint {cfg.endpoint!r}: {rule}")
        self.openai = openai
        self.cfg = cfg
        self.name = name
        self.rates = rates
        self.limit = "max_tokens"  # the name under which the server wants it
        key = os.environ.get("OPENAI_API_KEY", "none")
        how = dict(max_retries=cfg.retries, timeout=openai.Timeout(3600, connect=30))
        self.client = openai.OpenAI(base_url=cfg.endpoint, api_key=key, **how)

    def answers(self, work: Work) -> Iterator[Reply]:
        """Yield replies in the order of the work.

        At most `concurrency` requests are under way, and as many done ones wait behind a slow one.
        If the process is killed, at most 2 x concurrency answers are lost."""
        pool = ThreadPoolExecutor(self.cfg.concurrency)
        under_way = deque()
        try:
            for one in work:
                if len(under_way) == 2 * self.cfg.concurrency:
                    yield under_way.popleft().result()
                under_way.append(pool.submit(self.ask, *one))
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, messages: Messages, sampling: Sampling) -> Reply:
        """Return the server's answer. A refusal of what is said is a reply too, as it would come
        again; any other failure ends the run, which the same command continues."""
        try:
            done = self.complete(messages, sampling)
        except (self.openai.OpenAIError, ValueError) as e:
            why = drop_surrogates(f"{e} {e.__cause__ or ''}").strip()
            rule = "the same command goes on from here"
            if getattr(e, "status_code", 0) in (400, 403, 413, 422):
                if self.takes(messages, sampling):
                    return Reply("", f"refused: {why}")
                rule = f"a request that only says Hello is refused too: mend its form, then {rule}"
            raise ValueError(f"{self.cfg.endpoint}: {self.name}: {why}: {rule}") from e
        if not done.choices:
            return Reply("", "no answer")
        choice = done.choices[0]
        said = getattr(choice.message, "content", None)
        text = drop_surrogates(said).strip() if isinstance(said, str) else ""
        used = done.usage
        tokens = (used.prompt_tokens or 0, used.completion_tokens or 0) if used else (0, 0)
        scores = self.scores(choice.logprobs) if self.rates else {}
        return Reply(text, choice.finish_reason or "stop", tokens, scores)

    def complete(self, messages: Messages, sampling: Sampling) -> Any:
        """Send a request, with the token limit under the name that the server asks for."""
        named = {self.limit if key == "max_tokens" else key: sampling[key] for key in sampling}
        try:
            done = self.client.chat.completions.create(model=self.name, messages=messages, **named)
        except self.openai.APIStatusError as e:
            wanted = "max_completion_tokens"
            if wanted in named or wanted not in str(e) or "max_tokens" not in named:
                raise
            self.limit = wanted
            return self.complete(messages, sampling)
        if getattr(done, "choices", None) is None:
            raise ValueError(f"no chat completion: {str(done)[:200]}")
        return done

    def takes(self, messages: Messages, sampling: Sampling) -> bool:
        """Tell whether the server answers a harmless request of the same form, so that what it
        refused was what was said. One that refuses the form (a parameter, the roles, a quota that
        is spent) refuses this one too."""
        try:
            self.complete([message | {"content": "Hello"} for message in messages], sampling)
        except (self.openai.OpenAIError, ValueError):
            return False
        return True

    def scores(self, logprobs: Any) -> dict[str, float]:
        """Return the attributes, which NVIDIA's endpoints give as if they were log-probabilities
        of tokens."""
        if logprobs is None:
            raise ValueError(
                f"{self.cfg.endpoint}: {self.name} gives no log-probabilities of attributes"
            )
        listed = logprobs.content or []
        return {one.token: one.logprob for one in listed if one.token in ATTRIBUTES}


Backend = Local | Endpoint


def drop_surrogates(text: str) -> str:
    """Replace halves of surrogate pairs, which no file can hold."""
    return text.encode(errors="replace").decode()


def identity(folder: Path) -> str:
    """Name a model by its weights, so that other weights have another name.

    A model is known by the size of each file of its weights, those of a Hugging Face folder, of
    NVIDIA's form or of a run's newest checkpoint, and by pieces from all over them."""
    digest = hashlib.sha256()
    nemo = str(folder).startswith("nemo:")
    folder = Path(str(folder).removeprefix("nemo:"))
    steps = step_folders(folder / "checkpoints")
    weights = steps[-1].rglob("*.distcp") if steps else folder.glob("*.safetensors")
    for path in sorted(filter(Path.is_file, folder.rglob("*")) if nemo else weights):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(16):
                file.seek(size * i // 16)
                digest.update(file.read(1 << 16))
    return f"{folder.resolve().name}@{digest.hexdigest()[:12]}"


# ---- the pipeline --------------------------------------------------------------------------------


def load_backend(cfg: Any, name: str, rates: bool) -> Backend:
    """Load the model of a folder, or connect to one at the endpoint."""
    if name.startswith("nemo:") or (Path(name) / "config.json").exists():
        return Local(replace(cfg, model=Path(name)), rates)
    if not cfg.endpoint:
        rule = "a model is a folder with a config.json, nemo:FOLDER, or what --endpoint serves"
        raise ValueError(f"model {name!r}, endpoint {cfg.endpoint!r}: {rule}")
    if world_size() > 1:
        raise ValueError("an endpoint is asked by one process: start it with python")
    return Endpoint(cfg, name, rates)


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
