"""The synthetic data pipeline (report section 3.2).

python -m recipes.synthesize --model runs/instruct --reward runs/reward
"""

import hashlib
import itertools
import json
import logging
import os
import random
import re
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch.distributed as dist
import tyro
from tqdm import tqdm

from data import (
    ATTRIBUTES,
    IGNORE,
    MARKER,
    ROLES,
    TO_ANSWER,
    Messages,
    aggregate,
    best_and_worst,
    check_messages,
    embedded_english,
    json_object,
    numbered_lines,
    plain,
    read_documents,
    render_chat,
    render_reward,
    required,
)
from generate import EngineConfig, SamplingParams, Sequence, chat_stops, load_engine, run_command
from parallel import step_folders, world_size
from recipes.verify import (
    Decontaminator,
    Instruction,
    compiles,
    draw_instructions,
    extract_code,
    near_duplicates,
    normalise,
    parse_list,
    read_evaluations,
    run_python,
    same_number,
)

log = logging.getLogger("nemotron4")


# ---- the synthetic data pipeline: what is asked --------------------------------------------------

# The report's 23 prompts and those that it does not print, in our own words. Those of the first
# table ask for {n} items as a list; data.parse_list reads whatever comes.
AS_LIST = (
    " Make them as different from each other as you can. Answer with a numbered list, one a line."
)
# fmt: off
LISTS = {
    # -- topics, open questions, writing, closed questions
    "macro_topics": "Name {n} broad subjects that people all over the world talk about: everyday "
    "life, nature, science, work, culture and so on.",
    "subtopics": "Name {n} narrower subjects that belong to the subject '{topic}'.",
    "questions": "Write {n} things that somebody interested in '{topic}' would ask an assistant, "
    "questions or requests.",
    "refine_question": "Here is what somebody asks an assistant:\n{text}\nRewrite it in {n} ways, "
    "each longer and more exact, in two to four sentences: tell why it is asked, add a situation, "
    "narrow it down, or ask for another form of answer.",
    "writing": "Write {n} requests to compose a text of the kind '{material}' about '{topic}', "
    "each in one or two sentences.",
    "refine_writing": "Here is a request to compose a text:\n{text}\nRewrite it in {n} ways, each "
    "with more demands, in two to four sentences: what must be in it, for whom it is, how long it "
    "is, how it is built, which facts support it.",
    "closed": "TEXT:\n{document}\nEND OF TEXT\nWrite {n} questions or tasks that can be done with "
    "this text alone: ask for something it says, have it summed up, explained or put in other "
    "words, or have a similar one written. Do not repeat the text.",
    # -- mathematics and Python
    "math_topics": "Name {n} fields of mathematics at the level: {level}.",
    "math_subtopics": "Name {n} notions or methods within the field '{topic}' of mathematics.",
    "math_problems": "Write {n} mathematics problems about '{topic}', each complete in itself and "
    "with a definite answer.",
    "math_problems_easy": "Write {n} mathematics problems about '{topic}' for beginners: small "
    "numbers, one step, a definite answer.",
    "python_topics": "Name {n} fields in which Python is used or that its programmers learn.",
    "python_subtopics": "Name {n} notions or tools within the field '{topic}' of Python.",
    "python_easy": "Write {n} Python exercises about '{topic}' for a beginner: one short function "
    "each.",
    "python_medium": "Write {n} Python exercises about '{topic}' for a working programmer: several "
    "functions, or a class.",
    "python_hard": "Write {n} hard Python exercises about '{topic}': an algorithm that has to be "
    "found, with limits on time or memory.",
    # -- conversations, and code by evolution (SPEC 5.7)
    "rules": "Write {n} instructions to an assistant that shall talk with customers about "
    "'{topic}': what it helps with, and that it keeps to that.",
    "incapable": "Write {n} requests about '{topic}' that an assistant which only writes text "
    "cannot carry out: they need the present day's news, a body, an account, a file it has not "
    "seen, or an act in the world.",
    "crossover": "These are programming tasks:\n{tasks}\nWrite {n} new ones in their spirit, on "
    "other things.",
}
SAID = "A user and an assistant said:\n{history}\n"
PAIR = SAID + ("Two answers to the last message:\n<<ANSWER A>>\n{a}\n<<ANSWER B>>\n{b}\n<<END>>\n"
               "Which one helps the user more, and is right? ")
YES_OR_NO = " Answer with Yes or No, then one reason."
PLAY = "You play the user of an assistant"
NEXT = " So far:\n{history}\nWrite the user's next message, and nothing else."
TEMPLATES = {name: text + AS_LIST for name, text in LISTS.items()} | {
    "math_entity": "Is '{entity}' a notion of mathematics: a thing that is defined, proved or "
    "computed, and on which exercises can be set?" + YES_OR_NO,
    "python_entity": "Is '{entity}' something a Python programmer would use or study: a part "
    "of the language, a library, an algorithm, a way of working?" + YES_OR_NO,
    "user_plain": PLAY + "." + NEXT,
    "user_probing": PLAY + ", a curious one who asks for reasons, comparisons and less obvious "
    "cases." + NEXT,
    "user_terse": PLAY + ", a busy and critical one who writes a few words, as people do." + NEXT,
    "distractor": "An assistant has these instructions:\n{rules}\nThis was said:\n{history}\nWrite "
    "a next message of the user that leads away from the subject in a friendly way, and nothing "
    "else.",
    "evolve": "Here is a programming task:\n{task}\nWrite one new task, made from it, that {how}. "
    "Answer with the task alone.",
    "solve": "{task}\nAnswer with one block of Python code that is complete and runs.",
    "fitness": "TASK:\n{task}\nSOLUTION:\n{code}\nDoes the solution do exactly what the task asks, "
    "without an error?" + YES_OR_NO,
    "judge": PAIR + "Neither length nor order counts. End with [[A]], [[B]], or [[C]] if they are "
    "as good.",
    "verdict": PAIR + "Answer with the letter A or B.",
    "rate": SAID + "Rate the last answer, each from 0 (lowest) "
    "to 4:\nhelpfulness: does it do what was asked\ncorrectness: is all of it true, and nothing "
    "missing\ncoherence: is it clear and consistent\ncomplexity: how much knowledge it takes to "
    "write\nverbosity: how long it is for what was asked\nAnswer with five lines, name: number.",
    "list": "Copy the items of this list word for word into a numbered list, one a line, and write "
    "nothing else:\n{text}",
}
MATERIALS = ("essay", "letter", "poem", "news item", "blog post", "short story", "dialogue",
             "product page", "speech", "summary")
LEVELS = ("elementary school", "middle school", "high school", "university")
USERS = ("user_plain", "user_probing", "user_terse")
# by hand: how a document and what is asked about it become one prompt
JOINS = ("{document}\n\n{text}", "{text}\n\nText: {document}",
         "Read this first.\n---\n{document}\n---\n{text}")
EVOLUTIONS = (
    "has one more condition or rule to keep", "needs a rarer idea in place of a usual one",
    "takes more steps of reasoning", "must also find and mend a mistake in given code",
    "sets a limit on time or memory",
)
# what ground truth can judge before you bring GSM8K's or MATH's training prompts (--prompts)
TRUTHS: tuple[dict[str, Any], ...] = (
    {"prompt": "A crate holds 12 jars. How many jars are in 7 crates?", "answer": "84"},
    {"prompt": "Ana reads 15 pages a day. In how many days has she read 180?", "answer": "12"},
    {"prompt": "Write a Python function double(x) that returns twice x.",
     "tests": "assert double(3) == 6\nassert double(-1) == -2"},
    {"prompt": "Write a Python function vowels(s) that counts the letters a, e, i, o, u in s.",
     "tests": "assert vowels('education') == 5\nassert vowels('') == 0"},
)
CODE_SEEDS = (
    "Write a function that returns the words of a text in reverse order.",
    "Write a function that tells whether two words are made of the same letters.",
    "Write a function that merges two sorted lists into one.",
    "Write a class for a queue of fixed size that drops its oldest item.",
)
# fmt: on


@dataclass(frozen=True)
class Recipe:
    """How much of everything."""

    macro_topics: int
    subtopics: int  # of each macro-topic
    questions: int  # open ones, of each topic
    refinements: int  # of each question and each writing task
    materials: int  # kinds of text, of each topic
    documents: int
    closed: int  # questions on each document
    fields: int  # of mathematics at each of four levels, and of Python
    notions: int  # of each field
    entities: int  # words of the documents that are classified as notions
    problems: int  # of each notion
    instructed: int  # prompts with verifiable instructions, in turns of three forms
    two_turn: int
    distracted: int
    incapable: int
    colonies: int
    generations: int
    offspring: int  # of each colony in a generation
    turns: int = 3  # of a dialogue (SPEC 5.3)
    samples: int = 2  # answers to a preference prompt, of each model that answers
    preference_share: float = 0.5
    """Of the prompts; the others become dialogues. No prompt becomes both."""

    def __post_init__(self) -> None:
        for name, most in (("preference_share", 1), ("materials", len(MATERIALS))):
            if getattr(self, name) > most:
                raise ValueError(f"counts {name!r}: {getattr(self, name)} is above {most}")


# topics, keywords, turns and colonies are the report's (SPEC 5.1, 5.3, 5.7), example counts are
# those of NVIDIA's published examples; what neither states is ours
RECIPES = {
    "demo": Recipe(
        macro_topics=2, subtopics=2, questions=2, refinements=1, materials=1, documents=2, closed=2,
        fields=1, notions=2, entities=4, problems=1, instructed=6, two_turn=3, distracted=2,
        incapable=2, colonies=2, generations=2, offspring=2,
    ),
    "prompts": Recipe(*[0] * 18),
    "report": Recipe(
        macro_topics=120, subtopics=24, questions=10, refinements=5, materials=5, documents=20_000,
        closed=3, fields=80, notions=50, entities=20_000, problems=3, instructed=40_000,
        two_turn=40_000, distracted=5_000, incapable=5_000, colonies=20, generations=20,
        offspring=2_500, samples=4,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class SynthesizeConfig(EngineConfig):
    """Prompts, dialogues, code and preferences from models: rows for align.py, a report.

    A model is a folder (a run's, or a Hugging Face one), which runs in this process, or a name that
    an OpenAI-compatible --endpoint serves. The same command goes on where it was stopped."""

    model: Path = Path()  # Writes the prompts, plays both sides of dialogues, judges
    endpoint: str = ""  # URL of a server, say vLLM, NIM, `generate.py serve`; key: OPENAI_API_KEY
    answerers: tuple[str, ...] = ()  # Who answers preference prompts; default: the model
    reward: str = ""  # A reward model: ranks, filters, labels; without one, the model rates
    judge: Literal["reward", "text", "logits"] = "reward"
    """Who ranks answers that nothing can verify: the rewards, or the model in both orders, by what
    it writes or by its probabilities of A and B."""
    out: Path = Path("runs/synthesize")
    recipe: Literal["demo", "prompts", "report"] = "demo"  # prompts: none but those of --prompts
    counts: dict[str, float] = field(default_factory=dict)
    """The recipe, changed: --counts questions 5 turns 1."""
    documents: tuple[Path, ...] = ()
    """Text files for closed questions and keywords; default: Python's documentation."""
    prompts: tuple[Path, ...] = ()
    """Your own: JSON lines with `prompt` or `messages`, perhaps an `answer` (a number) or `tests`
    (Python) by which ground truth judges."""
    evaluations: tuple[Path, ...] = ()
    """JSON lines of benchmarks: prompts that share 13 words with one are dropped."""
    temperature: float = 0.2  # Of everything but dialogues (greedy), answers and code (1)
    top_p: float = 0.7
    max_tokens: int = 1024
    longest: int = 4000  # Characters of an answer; longer ones are dropped
    min_helpfulness: float = 3.0  # Mean of a dialogue's answers; as NVIDIA's examples have it
    min_chosen: float = 0.0  # Reward of a chosen answer that no ground truth judged
    min_gap: float = 0.0  # Between chosen and rejected: rewards, or the other judges' margins
    near: float = 0.7  # Similarity (Jaccard) from which a prompt repeats another
    concurrency: int = 16  # Requests under way at the endpoint
    retries: int = 12
    """Of a request that the endpoint could not answer, each after a longer pause: a minute in all,
    as quotas are counted by the minute."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("concurrency", 1, 4096), ("retries", 0, 100), ("temperature", 0, 10), ("near", 0.1, 1),
            ("top_p", 1e-6, 1), ("max_tokens", 1, 1 << 20), ("longest", 1, 1 << 30),
        ):  # fmt: skip
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name}={value}: must be in {low:g}..{high:g}")
        known = {f.name for f in fields(Recipe)}
        if wrong := sorted(set(self.counts) - known):
            raise ValueError(f"counts {wrong[0]!r}: not one of {', '.join(sorted(known))}")
        if min(self.counts.values(), default=0) < 0:
            raise ValueError(f"counts {self.counts}: none below 0")
        self.amounts()

    def amounts(self) -> Recipe:
        whole = {k: v if k == "preference_share" else int(v) for k, v in self.counts.items()}
        return replace(RECIPES[self.recipe], **whole)


# ---- the synthetic data pipeline: who answers, and what is kept ----------------------------------

Record = dict[str, Any]
Want = Literal["text", "verdict", "rewards"]
Asked = list[tuple[Messages, dict[str, Any]]]  # and how to sample


@dataclass(frozen=True)
class Request:
    messages: Messages
    template: str = ""
    parents: tuple[str, ...] = ()
    sample: int = 0  # its number among equal requests


Paired = list[tuple[Any, Request]]  # with what each belongs to


class Reply(NamedTuple):
    text: str
    finish_reason: str = "stop"  # or length, too long, no answer, refused: why
    tokens: tuple[int, int] = (0, 0)  # of the prompt, of the answer
    scores: dict[str, float] = {}  # a reward model's attributes, or log-probabilities of A and B


@dataclass(frozen=True)
class Question:
    """A prompt: what is said up to a user's turn; a topic or a task as well."""

    kind: str
    messages: tuple[dict[str, str], ...]
    parents: tuple[str, ...] = ()
    topic: str = ""
    truth: dict[str, Any] = field(default_factory=dict)
    """By what a program judges: `answer`, `tests`, or `instructions` and their `scope`."""
    document: str = ""
    """That is asked about, and part of the prompt."""

    @property
    def text(self) -> str:
        """What the user says, but for the document, with which all questions on it are alike."""
        said = "\n".join(m["content"] for m in self.messages if m["role"] != "assistant")
        return said.replace(self.document, "") if self.document else said

    def with_message(self, role: str, text: str, *parents: str) -> "Question":
        messages = (*self.messages, {"role": role, "content": text})
        return replace(self, messages=messages, parents=(*self.parents, *parents))

    def without_last(self, n: int) -> "Question":
        """Without its last n messages, each of which came from a record."""
        cut = slice(0, -n if n else None)
        return replace(self, messages=self.messages[cut], parents=self.parents[cut])

    def request(self, sample: int = 0) -> Request:
        return Request([*self.messages], "", self.parents[-1:], sample)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def prompt(kind: str, text: str, *parents: str, **more: Any) -> Question:
    return Question(kind, (user(text),), parents, **more)


class Local:
    """A model in this process."""

    def __init__(self, cfg: EngineConfig, rates: bool) -> None:
        self.engine, self.name = load_engine(cfg), identity(cfg.model)
        if cfg.quantize != "none":
            self.name += f" {cfg.quantize}"
        if rates != bool(self.engine.cfg.n_attributes):
            kinds = ("a language model", "a reward model")
            raise ValueError(f"{cfg.model} is {kinds[not rates]}, not {kinds[rates]}")

    def answers(self, asked: Asked, want: Want) -> Iterator[Reply]:
        """In their order; a window of them is what a kill can lose."""
        window = 16 * len(self.engine.slots)
        for i in range(0, len(asked), window):
            for rows in [self.submit(*one, want) for one in asked[i : i + window]]:
                if not rows:
                    yield Reply("", "too long")
                    continue
                done, scores = [*self.engine.finished(rows)], {}
                if want == "rewards":
                    last = done[0].scores[-len(ATTRIBUTES) :]
                    scores = dict(zip(ATTRIBUTES, last, strict=True))
                elif want == "verdict":
                    scores = {x: sum(one.logprobs) for x, one in zip("AB", done, strict=True)}
                reason = "stop" if scores else done[0].finish_reason
                tokens = (done[0].n_prompt, len(done[0].ids))
                yield Reply(done[0].text.strip(), reason, tokens, scores)

    def submit(self, chat: Messages, how: dict[str, Any], want: Want) -> list[Sequence]:
        """What the engine computes for an answer; nothing if that has no room in its context."""
        engine, tokenizer = self.engine, self.engine.tokenizer
        ids = (
            render_reward(chat, tokenizer) if want == "rewards" else render_chat(chat, tokenizer)[0]
        )
        letters = [[*tokenizer.encode(x)] for x in "AB"]
        room = {"text": 1, "rewards": 0, "verdict": max(map(len, letters))}[want]
        if len(ids) + room > engine.context:
            return []
        if want == "verdict":
            return [engine.submit_pair(ids.tolist(), letter) for letter in letters]
        how = dict(max_tokens=0) if want == "rewards" else how
        return engine.submit(ids, SamplingParams(stop_ids=chat_stops(tokenizer), **how))


class Endpoint:
    """A model behind an OpenAI-compatible server. The openai package repeats what failed (429, 5xx,
    a lost connection) after growing pauses, or after the one that the server asks for."""

    def __init__(self, cfg: SynthesizeConfig, name: str) -> None:
        try:
            import openai
        except ImportError as e:
            raise ValueError("--endpoint needs `pip install -e '.[endpoint]'`") from e
        self.name, self.url, self.concurrency = name, cfg.endpoint, cfg.concurrency
        how = dict(max_retries=cfg.retries, timeout=openai.Timeout(3600, connect=30))
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.client = openai.OpenAI(base_url=cfg.endpoint, api_key=key, **how)

    def answers(self, asked: Asked, want: Want) -> Iterator[Reply]:
        """In their order, at most `concurrency` under way and as many waiting behind a slow one: so
        much a kill can lose."""
        pool, under_way = ThreadPoolExecutor(self.concurrency), deque()
        try:
            for one in asked:
                if len(under_way) == 2 * self.concurrency:
                    yield under_way.popleft().result()
                under_way.append(pool.submit(self.ask, *one, want))
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, messages: Messages, how: dict[str, Any], want: Want) -> Reply:
        import openai

        if want == "verdict":
            how = how | dict(max_tokens=1, logprobs=True, top_logprobs=20)
        try:
            done = self.client.chat.completions.create(model=self.name, messages=messages, **how)
            choices = getattr(done, "choices", None)
            if choices is None:
                raise ValueError(f"no chat completion: {str(done)[:200]}")
        except (openai.OpenAIError, ValueError) as e:
            if getattr(e, "status_code", 0) in (400, 413, 422):  # its own fault, now and ever
                return Reply("", drop_surrogates(f"refused: {e}"))
            what = f"{self.url}: {self.name}: {e}"
            raise ValueError(f"{what}: the same command goes on from here") from e
        if not choices:
            return Reply("", "no answer")
        used, said = done.usage, getattr(choices[0].message, "content", None)
        tokens = (used.prompt_tokens or 0, used.completion_tokens or 0) if used else (0, 0)
        text = drop_surrogates(said).strip() if isinstance(said, str) else ""
        scores = {} if want == "text" else self.scores(choices[0], want)
        return Reply(text, choices[0].finish_reason or "stop", tokens, scores)

    def scores(self, choice: Any, want: Want) -> dict[str, float]:
        """Attributes, which NVIDIA's endpoints give as if they were log-probabilities, or A and B,
        if one is among the likeliest; the other one is then below them."""
        if choice.logprobs is None:
            rule = "of the attributes" if want == "rewards" else "(another --judge needs none)"
            raise ValueError(f"{self.url}: {self.name} gives no log-probabilities {rule}")
        listed = choice.logprobs.content or []
        if want == "rewards":
            return {one.token: one.logprob for one in listed if one.token in ATTRIBUTES}
        tops = [(top.token.strip(), top.logprob) for one in listed[:1] for top in one.top_logprobs]
        found = {letter: [lp for t, lp in tops if t == letter] for letter in "AB"}
        least = [min((lp for _, lp in tops), default=0.0)]
        return {x: max(lps or least) for x, lps in found.items()} if any(found.values()) else {}


def drop_surrogates(text: str) -> str:
    """Half of a surrogate pair is nothing that a file can hold."""
    return text.encode(errors="replace").decode()


def identity(folder: Path) -> str:
    """A model's name in the records: other weights have another one. A run's checksums are those of
    its newest checkpoint; of a Hugging Face folder, each file's size and pieces all over it."""
    digest, steps = hashlib.sha256(), step_folders(folder / "checkpoints")
    for file in [steps[-1] / "state.json"] if steps else sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as f:
            for i in range(16):
                f.seek(size * i // 16)
                digest.update(f.read(1 << 16))
    return f"{folder.resolve().name}@{digest.hexdigest()[:12]}"


def record_id(*parts: Any) -> str:
    """The hash of what a record depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


Backend = Local | Endpoint
# what of a record stays in memory, where there may be millions: not what was asked
KEPT = ("id", "stage", "model", "text", "finish_reason", "tokens", "scores")


class Pipeline:
    """The models, and the records of what they were asked: one file a stage, appended to in the
    order of the requests, so that a killed run, started again, leaves the same bytes."""

    def __init__(self, cfg: SynthesizeConfig) -> None:
        self.cfg, self.counts, self.dropped = cfg, Counter(), []
        items = ((Path(where).name, text) for where, text in read_evaluations(cfg.evaluations))
        self.benchmarks = Decontaminator(items)
        self.backends: dict[str, Backend] = {}
        self.model = self.backend(str(cfg.model))
        self.answerers = [*map(self.backend, cfg.answerers)] or [self.model]
        self.reward = self.backend(cfg.reward, rates=True) if cfg.reward else None
        self.leads = int(os.environ.get("RANK", 0)) == 0
        self.folder = cfg.out / "records"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seconds: Counter[str] = Counter()
        self.known = {file.stem: self.read(file) for file in sorted(self.folder.glob("*.jsonl"))}
        self.used: dict[str, Record] = {}
        if world_size() > 1:
            dist.barrier()  # everyone has read before anyone writes

    def backend(self, name: str, rates: bool = False) -> Backend:
        if (key := f"{name} {rates}") not in self.backends:
            if Path(name).is_dir() and name != ".":
                made = Local(replace(self.cfg, model=Path(name)), rates)
            elif self.cfg.endpoint and name != ".":
                if world_size() > 1:
                    raise ValueError("an endpoint is asked by one process: start it with python")
                made = Endpoint(self.cfg, name)
            else:
                rule = "a model is a folder, or a name that --endpoint serves"
                raise ValueError(f"model {name!r}, endpoint {self.cfg.endpoint!r}: {rule}")
            self.backends[key] = made
        return self.backends[key]

    def read(self, file: Path) -> dict[str, Record]:
        """A stage's records; a last line that a kill cut short is taken away."""
        records, whole = {}, 0
        for number, line in enumerate(file.open("rb"), 1):
            if not line.endswith(b"\n"):
                if self.leads:
                    os.truncate(file, whole)
                break
            whole += len(line)
            try:
                record = json.loads(line)
                records[record["id"]] = {name: record[name] for name in KEPT}
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f"{file}:{number}: no record ({e}): take the line out") from e
        return records

    def ask(
        self, stage: str, requests: list[Request], by: Backend | None = None, want: Want = "text",
        **sampling: Any,
    ) -> list[Record]:  # fmt: skip
        """Each request's record: known, or made now."""
        begun, backend = time.monotonic(), by or self.model
        base = {name: getattr(self.cfg, name) for name in ("temperature", "top_p", "max_tokens")}
        sampling = base | sampling if want == "text" else {}
        known, todo, ids = self.known.setdefault(stage, {}), {}, []
        for request in requests:
            asked = (stage, request.messages, request.sample, want)
            template = record_id(TEMPLATES.get(request.template, ""))
            ids.append(record_id(*asked, template, backend.name, sampling, self.cfg.seed))
            if ids[-1] not in known:
                todo.setdefault(ids[-1], request)
        if todo:
            work = [(r.messages, dict(sampling, seed=int(k[:7], 16))) for k, r in todo.items()]
            bar = tqdm(total=len(todo), desc=stage, disable=not log.isEnabledFor(20), leave=False)
            path = self.folder / f"{stage}.jsonl" if self.leads else Path(os.devnull)
            replies = backend.answers(work, want)
            with path.open("ab") as f, bar:
                for (key, request), reply in zip(todo.items(), replies, strict=True):
                    record = dict(
                        id=key, stage=stage, template=request.template, model=backend.name,
                        sampling=sampling, seed=self.cfg.seed, sample=request.sample,
                        parents=request.parents, messages=request.messages, **reply._asdict(),
                    )  # fmt: skip
                    f.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                    f.flush()
                    known[key] = {name: record[name] for name in KEPT}
                    bar.update()
                if self.leads:
                    os.fsync(f.fileno())
        self.seconds[stage] += time.monotonic() - begun
        records = [known[key] for key in ids]
        self.used |= {record["id"]: record for record in records}
        return records

    def fill(self, template: str, parents: tuple[str, ...] = (), **inputs: Any) -> Request:
        return Request([user(TEMPLATES[template].format(**inputs))], template, parents)

    def lists(self, stage: str, n: int, inputs: list[dict[str, Any]]) -> list[list[Question]]:
        """Of each input n items: the answer is read as a list, rewritten by the model if it is
        none, and asked for again, twice at most, for what is missing."""
        found: list[dict[str, Question]] = [{} for _ in inputs]
        for attempt in range(3 if n else 0):
            short, requests = [i for i, items in enumerate(found) if len(items) < n], []
            for i in short:
                request = self.fill(stage, n=n - len(found[i]), **inputs[i])
                if found[i]:
                    others = "".join(f"\n- {q.text}" for q in found[i].values())
                    request.messages[0]["content"] += f"\nNone of these again:{others}"
                requests.append(replace(request, sample=attempt))
            records = self.ask(stage, requests)
            no_list = [a for a in records if a["text"] and a["finish_reason"] == "stop"]
            no_list = [a for a in no_list if not parse_list(a["text"])]
            mend = [self.fill("list", (a["id"],), text=a["text"]) for a in no_list]
            mended = zip(no_list, self.ask("list", mend, temperature=0.0), strict=True)
            instead = {a["id"]: b for a, b in mended}
            for i, a in zip(short, records, strict=True):
                a = instead.get(a["id"], a)
                items = parse_list(a["text"])
                for text in items if a["finish_reason"] == "stop" else items[:-1]:  # a cut one
                    found[i].setdefault(normalise(text), prompt(stage, text, a["id"]))
        self.counts[f"{stage}: lists too short"] += sum(len(items) < n for items in found)
        return [[*items.values()][:n] for items in found]

    def answers(
        self, stage: str, asked: Paired, by: Backend | None = None, **sampling: Any
    ) -> list[tuple[Any, Record]]:
        """What each request belongs to, with its answer; dropped are those that did not end by
        themselves, say nothing or are over-long."""
        good = []
        records = self.ask(stage, [request for _, request in asked], by, **sampling)
        for (what, _), a in zip(asked, records, strict=True):
            text, reason = a["text"], a["finish_reason"].partition(":")[0]
            if reason == "length":
                reason = "unfinished"
            elif reason == "stop" and not text:
                reason = "empty"
            elif reason == "stop" and len(text) > self.cfg.longest:
                reason = "over-long"
            elif reason == "stop" and MARKER.search(text):
                reason = "has a marker"
            if reason != "stop":
                evidence = f"{a['finish_reason']}, {len(text)} characters"
                self.drop(reason, stage, text, evidence, (a["id"],))
            else:
                good.append((what, a))
        return good

    def drop(self, reason: str, stage: str, text: Any, evidence: Any, parents: Any = ()) -> None:
        self.counts[f"{stage}: {reason}"] += 1
        row = dict(reason=reason, stage=stage, evidence=evidence, text=text, parents=parents)
        self.dropped.append(row)


# ---- the synthetic data pipeline: prompts --------------------------------------------------------


def history(messages: Iterable[dict[str, str]]) -> str:
    return "\n".join(f"<<{m['role'].upper()}>>\n{m['content']}" for m in messages)


def derived(
    p: Pipeline, stage: str, n: int, items: list[Question], kind: str = "", **more: Any
) -> list[Question]:
    """n new items from each item."""
    inputs = [{"topic": q.text, "text": q.text, "parents": q.parents, **more} for q in items]
    made, kind = zip(items, p.lists(stage, n, inputs), strict=True), kind or stage
    return [replace(x, kind=kind, topic=q.topic or q.text) for q, news in made for x in news]


def unique(items: Iterable[Question]) -> list[Question]:
    """One of each text."""
    return [*{normalise(q.text): q for q in items}.values()]


def plain_questions(p: Pipeline, r: Recipe, about: list[Question]) -> list[Question]:
    """Open questions and writing tasks, as they are and refined."""
    asked, tasks = derived(p, "questions", r.questions, about, "open question"), []
    for material in MATERIALS[: r.materials]:
        tasks += derived(p, "writing", 1, about, material=material)
    asked += derived(p, "refine_question", r.refinements, asked, "open question")
    return [*asked, *tasks, *derived(p, "refine_writing", r.refinements, tasks, "writing")]


def documents_of(p: Pipeline, n: int) -> list[str]:
    """The beginnings of documents, 2,000 characters at most, cut at a line's end if there is one;
    none comes twice or is in a benchmark."""
    paths, found = [*p.cfg.documents], []
    given = read_documents(paths, "text") if paths else embedded_english()
    for text in itertools.islice((d for d in given if isinstance(d, ValueError) or d.strip()), n):
        if isinstance(text, ValueError):
            raise text
        cut = text.rfind("\n", 200, 2000)
        text = text[: 2000 if cut < 0 else cut].strip() if len(text) > 2000 else text
        found.append(prompt("document", text))
    return [q.text for q in hygiene(p, "documents", found)]


def closed_questions(p: Pipeline, r: Recipe, documents: list[str]) -> list[Question]:
    """About a document, which is joined in by hand-made forms."""
    rng, questions = random.Random(f"{p.cfg.seed}/joins"), []
    lists = p.lists("closed", r.closed, [{"document": text} for text in documents])
    for document, items in zip(documents, lists, strict=True):
        for q in items:
            text = rng.choice(JOINS).format(document=document, text=q.text)
            questions.append(prompt("closed question", text, *q.parents, document=document))
    return questions


def approved(
    p: Pipeline, stage: str, asked: Paired, max_tokens: int
) -> list[tuple[Any, Record, bool]]:
    """What each request belongs to, the answer, and whether it begins with Yes, however it ends."""
    records = p.ask(stage, [one for _, one in asked], temperature=0.0, max_tokens=max_tokens)
    yes = re.compile(r"\W*yes\b", re.IGNORECASE)
    pairs = zip(asked, records, strict=True)
    return [(what, a, bool(yes.match(a["text"]))) for (what, _), a in pairs]


def notions(p: Pipeline, r: Recipe, documents: list[str], about: str) -> list[Question]:
    """Keywords of mathematics or Python: fields, what is within them, and the documents' words that
    the model takes for one."""
    inputs = [{"level": level} for level in LEVELS] if about == "math" else [{}]
    fields_ = unique(q for items in p.lists(f"{about}_topics", r.fields, inputs) for q in items)
    # what may be a notion: long words that return
    words = Counter(w.lower() for text in documents for w in re.findall(r"[^\W\d_]{6,}", text))
    names = sorted(words, key=lambda w: (-words[w], w))[: r.entities]
    asked = [(name, p.fill(f"{about}_entity", entity=name)) for name in names]
    judged = approved(p, f"{about}_entity", asked, 64)
    found = [prompt("notion", name, a["id"]) for name, a, yes in judged if yes]
    return unique([*fields_, *derived(p, f"{about}_subtopics", r.notions, fields_), *found])


def problems(p: Pipeline, r: Recipe, documents: list[str]) -> list[Question]:
    """Mathematics in two grades, Python in three, keywords in turns."""
    questions = []
    for about, grades in (
        ("math", ("math_problems", "math_problems_easy")),
        ("python", ("python_easy", "python_medium", "python_hard")),
    ):
        words = notions(p, r, documents, about)
        for k, grade in enumerate(grades):
            questions += derived(p, grade, r.problems, words[k :: len(grades)], about)
    return questions


def instructed(p: Pipeline, n: int, source: list[Question]) -> list[Question]:
    """Verifiable instructions in three forms: for one answer, for every answer of a conversation,
    and for a second answer that revises the first (SPEC 5.2)."""
    rng, out, revised = random.Random(f"{p.cfg.seed}/instructions"), [], []
    for i in range(n if source else 0):
        q, scope = rng.choice(source), ("single", "conversation", "revision")[i % 3]
        drawn = draw_instructions(rng, rng.choice((1, 1, 2)), q.text)
        text = " ".join(one.text for one in drawn)
        truth = {"instructions": [one.to_json() for one in drawn], "scope": scope}
        new = replace(q, kind=f"instructions, {scope}", truth=truth)
        if scope == "revision":
            revised.append(((new, text), q.request()))
        else:
            text = f"In each of your answers: {text}" if scope == "conversation" else text
            out.append(replace(new, messages=(user(f"{q.text}\n{text}"),)))
    for (q, text), a in p.answers("first_answers", revised):
        again = f"Write your answer again. {text}"
        out.append(q.with_message("assistant", a["text"], a["id"]).with_message("user", again))
    return out


def distracted(p: Pipeline, n: int, about: list[Question]) -> list[Question]:
    """Instructions to keep to a subject, a conversation, and a message that leads away from it."""
    asked = []
    for q in derived(p, "rules", 1, about[:n], "distracted"):
        rules = {"role": "system", "content": q.text}
        first = user(f"I have a question about {q.topic}. Where do I begin?")
        asked.append(replace(q, messages=(rules, first)))
    answered = answer_each(p, "on_topic", asked)
    return users_turn(p, "distractor", answered, styles=("distractor",))


def answer_each(p: Pipeline, stage: str, chats: list[Question], **sampling: Any) -> list[Question]:
    said = p.answers(stage, [(q, q.request()) for q in chats], **sampling)
    return [q.with_message("assistant", a["text"], a["id"]) for q, a in said]


def users_turn(
    p: Pipeline, stage: str, chats: list[Question], first: int = 0, styles: tuple[str, ...] = USERS
) -> list[Question]:
    """Each chat with one more message of the user, whom the model plays, greedily in a dialogue
    (SPEC 5.3), in one style or another from the first one on."""
    asked = []
    for i, q in enumerate(chats, first):
        rules, turns = q.messages[0]["content"], q.messages[q.messages[0]["role"] == "system" :]
        how = dict(history=history(turns), rules=rules)
        asked.append((q, p.fill(styles[i % len(styles)], q.parents[-1:], **how)))
    said = p.answers(stage, asked, temperature=0.0 if styles == USERS else 1.0)
    return [q.with_message("user", text, a["id"]) for q, a in said if (text := clean(a["text"]))]


PLEASANTRIES = re.compile(
    r"^\W*(thanks?( you)?( (so|very) much)?( for [^.!?\n]*)?|hi( there)?|hello( there)?|hey|sure|"
    r"great|of course|certainly|absolutely|i('d| would) be (happy|glad) to[^.!?\n]*|"
    r"that('s| is) (great|helpful|very helpful|interesting)[^.!?\n]*)\s*([.!,:?]+\s*|[-–—]+\s+|$)",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """A played user's message without its role, what the assistant would say then, quotes around
    it, greetings and thanks."""
    text = re.sub(r"^\W*user[\s*]*[:>][\s*:>]*", "", text.strip(), flags=re.IGNORECASE)
    text = text.partition("<<ASSISTANT>>")[0].strip()
    if quoted := re.fullmatch(r"[\"“]([^\"“”]*)[\"”]", text):
        text = quoted[1].strip()
    while (shorter := PLEASANTRIES.sub("", text, count=1)) != text:
        text = shorter
    return text[:1].upper() + text[1:]


def converse(p: Pipeline, stage: str, chats: list[Question], turns: int) -> list[Question]:
    """`turns` answers to each chat, greedily, and between them a user in one of three styles, both
    played by the model (SPEC 5.3)."""
    for turn in range(turns):
        if turn:
            chats = users_turn(p, f"{stage}_user", chats, first=turn)
        chats = answer_each(p, f"{stage}_assistant", chats, temperature=0.0)
    return chats


def own_prompts(cfg: SynthesizeConfig) -> list[Question]:
    """Those of --prompts, and a few that ground truth can judge."""
    given = [one for path in cfg.prompts for one in numbered_lines(path)]
    if cfg.recipe != "prompts":
        given = [("built in", json.dumps(row).encode()) for row in TRUTHS] + given
    questions = []
    for where, line in given:
        try:
            row = json_object(line)
            chat = (
                plain(row["messages"])
                if "messages" in row
                else [user(required(row, "prompt", str))]
            )
            check_messages(chat)
            if chat[-1]["role"] != "user":
                raise ValueError("the last message is not the user's")
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e
        truth = {k: str(row[k]) for k in ("answer", "tests") if row.get(k) is not None}
        questions.append(Question("given", (*chat,), truth=truth))
    return questions


def all_prompts(p: Pipeline, r: Recipe) -> list[Question]:
    """What people gave comes first: a mistake in it shows before anything is asked."""
    own, documents = own_prompts(p.cfg), documents_of(p, r.documents)
    macro = [replace(q, topic=q.text) for q in p.lists("macro_topics", r.macro_topics, [{}])[0]]
    about = unique([*macro, *derived(p, "subtopics", r.subtopics, macro)])
    both = plain_questions(p, r, about)
    begun = [replace(q, kind="two turns") for q in both if q.kind == "open question"]
    begun = converse(p, "two_turn", begun[::-1][: r.two_turn], 1)
    return [
        *own, *both, *closed_questions(p, r, documents), *problems(p, r, documents),
        *instructed(p, r.instructed, both), *distracted(p, r.distracted, about),
        *users_turn(p, "two_turn_user", begun),
        *derived(p, "incapable", 1, about[::-1][: r.incapable]),
    ]  # fmt: skip


def hygiene(
    p: Pipeline, stage: str, questions: list[Question], new_from: int = 0
) -> list[Question]:
    """Those, from the given one on, that repeat none before them and are in no benchmark."""
    good, twins = [], near_duplicates([q.text for q in questions], p.cfg.near)
    for q, twin in [*zip(questions, twins, strict=True)][new_from:]:
        reason = evidence = ""
        if twin is not None:
            reason = "duplicate" if twin[1] == 1 else "near-duplicate"
            evidence = f"{twin[1]:.3f}: {questions[twin[0]].text}"
        elif marker := MARKER.search(q.text):
            reason, evidence = "has a marker", marker[0]
        elif evidence := p.benchmarks.evidence(q.text) or "":
            reason = "contaminated"
        if reason:
            p.drop(reason, stage, q.text, evidence, q.parents)
        else:
            good.append(q)
    return good


def clean_prompts(p: Pipeline, questions: list[Question]) -> list[Question]:
    """Kind by kind, for a prompt may return in another one, say with an instruction, and document
    by document, for what is asked of one may be asked of another."""
    groups: dict[tuple[str, str], list[Question]] = {}
    for q in questions:
        groups.setdefault((q.kind, q.document), []).append(q)
    return [q for group in groups.values() for q in hygiene(p, "prompts", group)]


# ---- the synthetic data pipeline: dialogues, judges, preferences, code ---------------------------

Rating = list[float] | None  # ATTRIBUTES; None: there is none
# "helpfulness: 3.5", but not the scale in "helpfulness (0-4): 3"
RATED = re.compile(
    rf"(?i)\b({'|'.join(ATTRIBUTES)})\b(?:\W*\(.*?\))?[^\w\n]*([0-4](?:\.\d+)?)(?![\d-])"
)


def rate(p: Pipeline, stage: str, chats: list[Question]) -> list[Rating]:
    """The attributes of each chat's last answer: the reward model's, or what the model writes."""
    if p.reward:
        found = [
            a["scores"] for a in p.ask(stage, [q.request() for q in chats], p.reward, "rewards")
        ]
    else:
        asked = [p.fill("rate", q.parents[-1:], history=history(q.messages)) for q in chats]
        said = p.ask(stage, asked, temperature=0.0, max_tokens=64)
        found = [{k.lower(): float(x) for k, x in RATED.findall(a["text"])} for a in said]
    whole = [{*ATTRIBUTES} <= {*x} for x in found]
    return [
        [x[name] for name in ATTRIBUTES] if ok else None for x, ok in zip(found, whole, strict=True)
    ]


def satisfies_truth(q: Question, n: int) -> bool | None:
    """Ground truth about the answer after n messages, or about every answer from there on; None:
    nothing is known."""
    truth, answers = q.truth, [m["content"] for m in q.messages[n::2]]
    if "answer" in truth:
        return same_number(answers[0], truth["answer"])
    if "tests" in truth:
        code = extract_code(answers[0])
        return code is not None and run_python(f"{code}\n{truth['tests']}\n").ok
    if "instructions" in truth:
        asked = [Instruction.from_json(one) for one in truth["instructions"]]
        answers = answers if truth["scope"] == "conversation" else answers[:1]
        return all(one.met(text, q.messages[n - 1]["content"]) for one in asked for text in answers)
    return None


def dialogues(p: Pipeline, questions: list[Question], turns: int) -> list[Record]:
    """Conversations of some turns; kept are those that obey their truth and whose answers are rated
    helpful on average."""
    chats = converse(p, "dialogue", questions, turns) if turns else []
    rows, steps = [], [q.without_last(2 * k) for q in chats for k in reversed(range(turns))]
    ratings = iter(rate(p, "dialogue_ratings", steps))
    for q in chats:
        rated = [next(ratings) for _ in range(turns)]
        mean = [sum(x) / turns for x in zip(*rated, strict=True)] if all(rated) else None
        if satisfies_truth(q, len(q.messages) + 1 - 2 * turns) is False:
            p.drop("false", "dialogue", q.messages, q.truth, q.parents)
        elif mean is None:
            p.drop("not rated", "dialogue", q.messages, rated, q.parents)
        elif mean[0] < p.cfg.min_helpfulness:
            p.drop("not helpful", "dialogue", q.messages, rated, q.parents)
        else:
            rows.append(row_of(q, scores=mean))
    return rows


def row_of(q: Question, **more: Any) -> Record:
    """As align.py reads it, then what it comes from."""
    origin = dict(kind=q.kind, topic=q.topic, parents=q.parents)
    return {"messages": [*q.messages], **more, **origin}


def verdict_of(text: str) -> float | None:
    """1: A is better, -1: B, 0: as good; None: no verdict, or several."""
    found = {*re.findall(r"\[\[([ABC])\]\]", text)}
    return {"A": 1.0, "B": -1.0, "C": 0.0}[found.pop()] if len(found) == 1 else None


def compare(p: Pipeline, pairs: list[tuple[Question, str, str]]) -> list[float]:
    """How much better the first answer is, by the model that sees them in both orders: what it says
    counts if both orders agree, its log-odds of A are averaged. So swapping the answers negates
    the result, bit by bit."""
    logits, c = p.cfg.judge == "logits", p.counts
    asked = [
        p.fill("verdict" if logits else "judge", history=history(q.messages), a=x, b=y)
        for q, a, b in pairs
        for x, y in ((a, b), (b, a))
    ]
    if logits:
        scores = [a["scores"] for a in p.ask("judge", asked, want="verdict")]
        said = [x["A"] - x["B"] if x else None for x in scores]
    else:
        said = [verdict_of(a["text"]) for a in p.ask("judge", asked, temperature=0.0)]
    out = []
    for ab, ba in zip(said[::2], said[1::2], strict=True):
        c["judge: pairs"] += 1
        if ab is None or ba is None:
            c["judge: no verdict"] += 1
            out.append(0.0)
            continue
        agree = np.sign(ab) == -np.sign(ba)
        c["judge: both orders agree"] += int(agree)
        c["judge: first wins"] += (ab > 0) + (ba > 0)
        c["judge: decided"] += (ab != 0) + (ba != 0)
        out.append((ab - ba) / 2 if logits else ab if agree else 0.0)
    return out


class Answers(NamedTuple):
    """A prompt's, with the judge's scores (None: it has none) and the ratings."""

    question: Question
    texts: list[str]
    parents: list[str]
    scores: list[float | None]
    ratings: list[Rating]


def reward_of(rating: Rating) -> float | None:
    return None if rating is None else float(aggregate(rating))


def judged(p: Pipeline, questions: list[Question], samples: int) -> list[Answers]:
    """Several answers to each prompt from every model that answers, with scores by the judge,
    ground truth aside, and ratings for rewards and labels."""
    sets: list[tuple[Question, dict[str, str]]] = [(q, {}) for q in questions]  # text → record
    for backend in dict.fromkeys(p.answerers):
        asked = [(texts, q.request(k)) for q, texts in sets for k in range(samples)]
        for texts, a in p.answers("responses", asked, backend, temperature=1.0, top_p=1.0):
            if (twin := texts.setdefault(a["text"], a["id"])) != a["id"]:
                p.drop("repeated", "responses", a["text"], twin, (a["id"],))
    chats = [q.with_message("assistant", t, s) for q, texts in sets for t, s in texts.items()]
    ratings = iter(rate(p, "response_ratings", chats))
    pairs = [(q, a, b) for q, texts in sets for a, b in itertools.combinations(texts, 2)]
    margins = iter(compare(p, pairs) if p.cfg.judge != "reward" else [])
    out = []
    for q, texts in sets:
        rated = [next(ratings) for _ in texts]
        if p.cfg.judge == "reward":
            scores = [reward_of(x) for x in rated]
        else:  # the mean margin over the other answers
            scores = [0.0] * len(texts)
            for i, j in itertools.combinations(range(len(texts)), 2):
                margin = next(margins) / (len(texts) - 1)
                scores[i], scores[j] = scores[i] + margin, scores[j] - margin
        out.append(Answers(q, [*texts], [*texts.values()], scores, rated))
    return out


def choose(p: Pipeline, a: Answers) -> tuple[int, int, bool] | str:
    """The numbers of chosen and rejected and whether it is ground truth that says so, or the reason
    why there are none."""
    if len(a.texts) < 2:
        return "fewer than two answers"
    n = len(a.question.messages)
    truth = [satisfies_truth(a.question.with_message("assistant", text), n) for text in a.texts]
    scored = [x is not None for x in a.scores]
    if truth[0] is None:
        found = best_and_worst(a.texts, a.scores, scored, p.cfg.min_gap)
        reward = reward_of(a.ratings[found[0]]) if found else None
        if reward is not None and reward < p.cfg.min_chosen:
            return "chosen is not good enough"
        return (*found, False) if found else "tie" if sum(scored) > 1 else "not rated"
    # of the right ones the best by the judge, of the wrong ones the worst
    order = sorted(range(len(scored)), key=lambda i: (scored[i], a.scores[i] or 0.0))
    right, wrong = [i for i in order if truth[i]], [i for i in order if not truth[i]]
    for i, j in itertools.product(right, wrong):
        if scored[i] and scored[j]:
            p.counts["judge: pairs with a truth"] += 1
            p.counts["judge: agrees with the truth"] += a.scores[i] > a.scores[j]
    if not right or not wrong:
        return "all right" if right else "all wrong"
    return right[-1], wrong[0], True


def preference_row(p: Pipeline, a: Answers) -> Record | None:
    """With rewards where they say the same as the choice."""
    if isinstance(found := choose(p, a), str):
        p.drop(found, "preference", a.texts, a.scores, (*a.question.parents, *a.parents))
        return None
    best, worst, truth = found
    row = dict(chosen=a.texts[best], rejected=a.texts[worst])
    row["judge"] = "truth" if truth else p.cfg.judge
    high, low = reward_of(a.ratings[best]), reward_of(a.ratings[worst])
    if high is not None and low is not None and high > low:
        row |= dict(chosen_reward=high, rejected_reward=low)
    else:
        p.counts["preference: no rewards, or they contradict the choice"] += 1
    return row_of(replace(a.question, parents=(*a.question.parents, *a.parents)), **row)


def genetic(p: Pipeline, r: Recipe) -> list[Record]:
    """Genetic-Instruct (SPEC 5.7): colonies of programming tasks, new ones by crossover (few-shot)
    or by one of five evolutions; who has a solution that compiles and passes the judge lives on.
    The colonies are merged after every generation."""
    population, rows = [prompt("code", text, topic="Python") for text in CODE_SEEDS], []
    for generation in range(r.generations):
        crossed, evolved = [], []
        for colony in range(r.colonies):
            rng = random.Random(f"{p.cfg.seed}/colony {colony}/{generation}")
            for _ in range(r.offspring):
                if rng.random() < 0.5:
                    some = rng.sample(population, min(3, len(population)))
                    tasks = "\n".join(f"- {q.text}" for q in some)
                    parents = tuple(s for q in some for s in q.parents)
                    crossed.append({"tasks": tasks, "parents": parents})
                else:
                    q, how = rng.choice(population), rng.choice(EVOLUTIONS)
                    evolved.append((q, p.fill("evolve", q.parents, task=q.text, how=how)))
        made = [(q.text, *q.parents) for items in p.lists("crossover", 1, crossed) for q in items]
        made += [(a["text"], a["id"]) for _, a in p.answers("evolve", evolved, temperature=1.0)]
        born = [prompt("code", *one, topic="Python") for one in made]
        new = solved(p, hygiene(p, "code", [*population, *born], len(population)))
        rows += [row_of(chat) for chat in new]
        population += [chat.without_last(1) for chat in new]
    return rows


def solved(p: Pipeline, tasks: list[Question]) -> list[Question]:
    """The tasks with a solution that compiles and is judged right."""
    asked = [(q, p.fill("solve", q.parents, task=q.text)) for q in tasks]
    to_judge, fit = [], []
    for q, a in p.answers("solve", asked):
        code = extract_code(a["text"])
        if code is None or not compiles(code):
            p.drop("does not compile", "code", a["text"], q.text, (a["id"],))
        else:
            to_judge.append(((q, a), p.fill("fitness", (a["id"],), task=q.text, code=code)))
    for (q, a), verdict, yes in approved(p, "fitness", to_judge, 128):
        if yes:
            fit.append(q.with_message("assistant", a["text"], a["id"]))
        else:
            p.drop("not fit", "code", a["text"], verdict["text"], (a["id"], verdict["id"]))
    return fit


# ---- the synthetic data pipeline: files ----------------------------------------------------------


def nemo(name: str, row: Record) -> Record:
    """A row of a file in the shape that NeMo's has: preferences and labels with the template as
    text."""
    system, turns = "", row["messages"]
    if turns[0]["role"] == "system":
        system, turns = turns[0]["content"], turns[1:]
    if "sft" in name:
        said = [{"from": ROLES[m["role"]], "value": m["content"], "label": None} for m in turns]
        return {"system": system, "mask": "User", "conversations": said, "type": None}
    said = (f"<extra_id_1>{ROLES[m['role']]}\n{m['content']}\n" for m in turns)
    text = f"<extra_id_0>System\n{system}\n{''.join(said)}"
    if name == "reward":
        label = [float(min(4, max(0, round(x)))) for x in row["label"]]
        return {"text": f"{text}<extra_id_2>", "label": [float(IGNORE)] * 4 + label}
    out = {"prompt": text + TO_ANSWER}
    out |= {f"{side}_response": f"{row[side]}\n<extra_id_1>" for side in ("chosen", "rejected")}
    return out | {key: row[key] for key in ("chosen_reward", "rejected_reward") if key in row}


def put(path: Path, lines: Iterable[str]) -> dict[str, Any]:
    """A file, whole or not there; how many lines it has, and its hash."""
    rows, digest, new = 0, hashlib.sha256(), path.with_suffix(".tmp")
    with new.open("wb") as f:
        for line in lines:
            f.write(whole := line.encode() + b"\n")
            digest.update(whole)
            rows += 1
    new.rename(path)
    return dict(rows=rows, sha256=digest.hexdigest())


def synthesize(cfg: SynthesizeConfig) -> Path:
    """All stages; the folder with the rows, the manifest and the report."""
    begun = time.monotonic()
    p, r = Pipeline(cfg), cfg.amounts()
    questions = clean_prompts(p, all_prompts(p, r))
    random.Random(f"{cfg.seed}/split").shuffle(questions)
    n = round(len(questions) * r.preference_share)
    sets = judged(p, questions[:n], r.samples)
    rated = [
        row_of(a.question.with_message("assistant", text, parent), label=rating)
        for a in sets
        for text, parent, rating in zip(a.texts, a.parents, a.ratings, strict=True)
        if rating
    ]
    pairs = [row for a in sets if (row := preference_row(p, a))]
    files = {
        "sft": dialogues(p, questions[n:], r.turns), "code_sft": genetic(p, r), "preference": pairs,
        "rpo": [row for row in pairs if "chosen_reward" in row], "reward": rated,
        "dropped": p.dropped,
    }  # fmt: skip
    if p.leads:
        written, dump = {}, partial(json.dumps, ensure_ascii=False)
        for name, rows in files.items():
            written[name] = put(cfg.out / f"{name}.jsonl", map(dump, rows))
            if name != "dropped":
                shaped = (dump(nemo(name, row)) for row in rows)
                written[f"nemo_{name}"] = put(cfg.out / f"nemo_{name}.jsonl", shaped)
        write_manifest(p, written)
        drawn = draw_histograms(cfg.out / "histograms.png", files, questions)
        write_report(p, questions, written, drawn, time.monotonic() - begun)
    return cfg.out


def tokens_of(p: Pipeline) -> dict[str, dict[str, int]]:
    """Of each stage what this run used, made now or before."""
    stages: dict[str, dict[str, int]] = {}
    for record in p.used.values():
        stage = stages.setdefault(record["stage"], dict(records=0, prompt_tokens=0, new_tokens=0))
        for key, n in zip(stage, (1, *record["tokens"]), strict=True):
            stage[key] += n
    return stages


def write_manifest(p: Pipeline, written: dict[str, Record]) -> None:
    """Nothing in it depends on when, where or how fast it was made: models by their identities,
    files by their contents."""
    elsewhere = {"out", "endpoint", "concurrency", "retries", "slots", "chunk", "compile", "mesh"}
    given = ("documents", "prompts", "evaluations")
    names = dict(model=p.model.name, answerers=[one.name for one in p.answerers])
    names["reward"] = p.reward.name if p.reward else ""
    read = {key: [f"{f.name} {digest_of(f)}" for f in getattr(p.cfg, key)] for key in given}
    config = {k: v for k, v in asdict(p.cfg).items() if k not in elsewhere}
    manifest = {
        "config": config | names | read,
        "recipe": asdict(p.cfg.amounts()),
        "stages": tokens_of(p),
        "counts": dict(sorted(p.counts.items())),
        "files": written,
    }
    put(p.cfg.out / "manifest.json", [json.dumps(manifest, indent=2)])


def digest_of(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def table(head: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> list[str]:
    lines = (head, ["---"] * len(head), *rows)
    return ["", *(f"| {' | '.join(map(str, row))} |" for row in lines)]


def share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({part / whole:.1%})" if whole else "")


def write_report(
    p: Pipeline, questions: list[Question], written: dict[str, Record], drawn: bool, seconds: float
) -> None:
    stages, c = tokens_of(p), p.counts
    calls = sum(stage["records"] for stage in stages.values())
    mended = stages.get("list", {}).get("records", 0)
    reasons = Counter((row["stage"], row["reason"]) for row in p.dropped)
    spent = [(s, *n.values(), f"{p.seconds[s]:.1f}") for s, n in stages.items()]
    agree = share(c["judge: both orders agree"], c["judge: pairs"])
    first = share(c["judge: first wins"], c["judge: decided"])
    right = share(c["judge: agrees with the truth"], c["judge: pairs with a truth"])
    lines = [
        f"# {calls} answers, {seconds:.0f} s", "",
        f"Spent on lists that had to be rewritten: {share(mended, calls)}.",
        *table(("file", "rows"), [(f"{name}.jsonl", one["rows"]) for name, one in written.items()]),
        *table(("prompts", "kept"), sorted(Counter(q.kind for q in questions).items())),
        *table(("dropped at", "why", "rows"), [(*key, n) for key, n in sorted(reasons.items())]),
        *table(("stage", "answers", "prompt tokens", "new tokens", "seconds"), spent), "",
        f"Judge: {p.cfg.judge}. Both orders agree: {agree}; the first answer wins: {first}; no "
        f"verdict: {c['judge: no verdict']}; agrees with ground truth: {right}.", "",
        *["![lengths and topics](histograms.png)"] * drawn,
    ]  # fmt: skip
    put(p.cfg.out / "report.md", lines)
    log.info("\n".join(lines))


def draw_histograms(path: Path, files: dict[str, list[Record]], questions: list[Question]) -> bool:
    """Lengths of what was written, and the prompts of each topic; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no histograms: pip install -e '.[report]'")
        return False
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    said, pairs = [m for row in files["sft"] for m in row["messages"]], files["preference"]
    lengths = {
        "prompts": [len(q.text) for q in questions],
        "answers": [len(m["content"]) for m in said if m["role"] == "assistant"],
        "chosen": [len(row["chosen"]) for row in pairs],
        "rejected": [len(row["rejected"]) for row in pairs],
    }
    if drawn := {name: x for name, x in lengths.items() if x}:
        left.hist([*drawn.values()], bins=20, label=[*drawn])
        left.legend(frameon=False)
    left.set(xlabel="characters", ylabel="texts")
    found = Counter(q.topic or q.kind for q in questions).most_common(20)[::-1]
    names = [name[:30].replace("$", r"\$") for name, _ in found]  # dollars are no formula
    right.barh(range(len(found)), [n for _, n in found], tick_label=names)
    right.set(xlabel="prompts of a topic")
    figure.savefig(path, dpi=120)
    return True


if __name__ == "__main__":
    run_command("recipes.synthesize", partial(tyro.cli, SynthesizeConfig), synthesize)
