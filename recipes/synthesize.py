"""Synthetic alignment data (report section 3.2): prompts, dialogues, preferences and code.

python -m recipes.synthesize --model runs/instruct --reward runs/reward
"""

import json
import logging
import random
import re
import signal
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, islice, permutations, product
from math import isnan, nan
from pathlib import Path
from statistics import fmean
from string import Formatter
from types import SimpleNamespace
from typing import Any, Literal

import tyro

from data import (
    ATTRIBUTES,
    MARKER,
    aggregate,
    check_messages,
    embedded_english,
    messages_of,
    read_documents,
    read_records,
    required,
    write_whole,
)
from generate import EngineConfig, check_ranges, run_command
from recipes import verify
from recipes.backends import Reply
from recipes.records import (
    Pipeline,
    Question,
    Questions,
    Record,
    digest_of,
    hash_of,
    prompt,
    row_of,
    wait_for_all,
)
from recipes.report import draw_histograms, table
from recipes.rows import ranked_row, with_rows

log = logging.getLogger("nemotron4")

# ---- what is asked, and how much -----------------------------------------------------------------


def load_library(paths: Iterable[Path] = ()) -> dict[str, Any]:
    """Read prompts.toml, and the user's files, whose keys replace those of the files before them.
    Add all `templates` by name, and the seeds by theirs."""
    library = tomllib.loads(Path(__file__).with_name("prompts.toml").read_text("utf-8"))
    for path in paths:
        try:
            own = tomllib.loads(path.read_text("utf-8-sig"))
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}: {e}") from e
        library = override(library, own, path)
    lists = {name: text + library["list_ending"] for name, text in library["lists"].items()}
    personas = {f"user_{i}": text for i, text in enumerate(library["personas"])}
    return library | library["seeds"] | {"templates": lists | personas | library["prompts"]}


def override(built_in: Any, given: Any, path: Path, name: str = "") -> Any:
    """Return the user's value of a key, with what a table lacks taken from the built-in one.

    A ValueError names the file, the key and the rule: types are the built-in ones, no key is new,
    and a template has the placeholders of the one that it replaces."""
    where = f"{path}: {name}"
    kind = type(built_in)
    if type(given) is not kind or given == []:
        raise ValueError(f"{where} = {given!r}: a {kind.__name__} is wanted, and not an empty one")
    if name.startswith("seeds.truths["):
        given_prompt(where, given)  # complains unless it is like a row of --prompts
        return given
    if kind is dict:
        merged = dict(built_in)
        for key, value in given.items():
            if key not in built_in:
                raise ValueError(f"{where}: no key {key!r}, there are {', '.join(built_in)}")
            merged[key] = override(built_in[key], value, path, f"{name}.{key}".lstrip("."))
        return merged
    if kind is list:
        return [override(built_in[0], one, path, f"{name}[{i}]") for i, one in enumerate(given)]
    if kind is str and not name.startswith("seeds"):
        for field in placeholders(given, where) ^ placeholders(built_in, where):
            raise ValueError(f"{where}: the placeholder {{{field}}} is missing or unknown")
    return given


def placeholders(template: str, where: str) -> set[str]:
    try:
        return {part[1] for part in Formatter().parse(template)} - {None}
    except ValueError as e:
        raise ValueError(f"{where}: {e}: write {{{{ and }}}} for braces") from e


@dataclass(frozen=True)
class SynthesizeConfig(EngineConfig):
    """Prompts, dialogues, code and preferences from models: rows for align.py, a report.

    A model is a folder (a run's, or a Hugging Face one), which runs in this process, or a name that
    an OpenAI-compatible --endpoint serves. The same command goes on where it was stopped."""

    model: Path = Path()
    """Writer of prompts, of both sides of dialogues, and of verdicts."""
    endpoint: tuple[str, ...] = ()
    """URLs of servers, say vLLM, NIM, recipes.serve, that share the work; key: OPENAI_API_KEY."""
    answerers: tuple[str, ...] = ()  # Models that answer preference prompts; default: the model
    reward: str = ""  # Reward model that ranks, filters and labels; without one, the model rates
    judge: Literal["reward", "text"] = "reward"
    """Ranking of answers that nothing can verify: by rewards, or by the model's verdicts."""
    out: Path = Path("runs/synthesize")  # Folder of records, rows, manifest and report
    recipe: Literal["demo", "prompts", "report"] = "demo"
    """Amounts of everything that is made; prompts: no prompts but those of --prompts."""
    counts: dict[str, float] = field(default_factory=dict)
    """Changes of the recipe's amounts: --counts questions 5 turns 1."""
    templates: tuple[Path, ...] = ()
    """TOML files like recipes/prompts.toml, whose keys replace its templates, seeds and amounts."""
    documents: tuple[Path, ...] = ()
    """Text files for closed questions and keywords; default: Python's documentation."""
    prompts: tuple[Path, ...] = ()
    """JSON lines with a `prompt` or `messages`, perhaps with a true `answer`, or Python `tests`."""
    evaluations: tuple[Path, ...] = ()
    """JSON lines of benchmarks: prompts that share 13 words with one are dropped."""
    temperature: float = 0.2  # Divisor of logits, but for dialogues (0), answers and code (1)
    top_p: float = 0.7  # Probability mass that is sampled from
    max_tokens: int = 1024  # Longest answer
    longest: int = 4000  # Most characters of an answer; longer ones are dropped
    min_helpfulness: float = 3.0  # Least mean helpfulness of a dialogue's answers
    min_chosen: float = 0.0  # Least reward of a chosen answer that no ground truth judged
    min_gap: float = 0.0  # Least difference of chosen and rejected: rewards, or the judge's margins
    near: float = 0.7  # Similarity (Jaccard) from which a prompt repeats another
    concurrency: int = 16  # Requests under way, at all endpoints together
    retries: int = 12
    """Repetitions of a request that fails, each after a longer pause (a minute in all for 12)."""
    seed: int = 0  # Seed of sampling and of every draw

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("min_helpfulness", "min_chosen", "min_gap"), (-1e6, 1e6)) | {
            "temperature": (0, 10), "top_p": (1e-6, 1), "max_tokens": (1, 1 << 20),
            "near": (0.1, 1), "longest": (1, 1 << 30), "concurrency": (1, 4096),
            "retries": (0, 100),
        }  # fmt: skip
        check_ranges(self, ranges)
        self.amounts()

    def library(self) -> dict[str, Any]:
        return load_library(self.templates)

    def amounts(self) -> SimpleNamespace:
        """Return how much is made of everything: the recipe's amounts, changed by --counts."""
        library = self.library()
        amounts = {name: column[self.recipe] for name, column in library["amounts"].items()}
        limits = {"preference_share": 1, "materials": len(library["materials"])}
        for name, amount in (amounts | self.counts).items():
            if name not in amounts:
                raise ValueError(f"counts {name!r}: not one of {', '.join(amounts)}")
            most = limits.get(name, 1 << 31)
            if not 0 <= amount <= most:
                raise ValueError(f"amounts.{name}: {amount} is not in 0..{most}")
            amounts[name] = type(amounts[name])(amount)
        return SimpleNamespace(**amounts)


# ---- prompts -------------------------------------------------------------------------------------


def history(messages: Iterable[dict[str, str]]) -> str:
    """Write a conversation as a text to be filled into a template."""
    return "\n".join(f"<<{one['role'].upper()}>>\n{one['content']}" for one in messages)


def unique(items: Iterable[Question]) -> Questions:
    """Keep one question of each text."""
    return list({verify.normalise(item.text): item for item in items}.values())


def derive(
    pipeline: Pipeline, stage: str, parents: Questions, amount: int, kind: str = "", **more: Any
) -> Questions:
    """Ask for new items from each parent, whose text fills the stage's template. They are about its
    topic.

    What is missing, as a list was too short or repeats an item, is asked for again, at most twice.
    """
    found = [{} for _ in parents]  # items by their normalised text
    for attempt in range(3):
        short = [i for i, items in enumerate(found) if len(items) < amount]
        asked = []
        for i in short:
            text = parents[i].text
            inputs = dict(n=amount - len(found[i]), topic=text, text=text, document=text)
            inputs |= dict(tasks=text, **more)
            question = pipeline.fill(stage, parents[i].parents, **inputs)
            if found[i]:
                others = "".join(f"\n- {item.text}" for item in found[i].values())
                question.messages[0]["content"] += f"\nNone of these again:{others}"
            asked.append(replace(question, sample=attempt))
        records = as_lists(pipeline, pipeline.ask(stage, asked))
        for i, record in zip(short, records, strict=True):
            topic = parents[i].topic or parents[i].text
            items = verify.parse_list(record["text"])
            if record["finish_reason"] != "stop":
                items = items[:-1]  # the last one is cut
            for text in items:
                item = prompt(kind or stage, text, record["id"], topic=topic)
                found[i].setdefault(verify.normalise(text), item)
    pipeline.counts[f"{stage}: lists too short"] += sum(len(items) < amount for items in found)
    return list(chain.from_iterable(islice(items.values(), amount) for items in found))


def as_lists(pipeline: Pipeline, records: list[Record]) -> list[Record]:
    """Let the model rewrite complete answers that cannot be read as a list."""
    broken = []
    for i, record in enumerate(records):
        complete = record["text"] and record["finish_reason"] == "stop"
        if complete and not verify.parse_list(record["text"]):
            broken.append(i)
    asked = [pipeline.fill("list", (records[i]["id"],), text=records[i]["text"]) for i in broken]
    for i, record in zip(broken, pipeline.ask("list", asked, temperature=0.0), strict=True):
        records[i] = record
    return records


ROOT = prompt("root", "")  # stands for a parent where there is none


def plain_questions(pipeline: Pipeline, topics: Questions) -> Questions:
    """Make open questions and writing tasks, as they are and refined."""
    amounts = pipeline.amounts
    questions = derive(pipeline, "questions", topics, amounts.questions, "open question")
    tasks = []
    for material in pipeline.library["materials"][: amounts.materials]:
        tasks += derive(pipeline, "writing", topics, 1, material=material)
    more = amounts.refinements
    questions += derive(pipeline, "refine_question", questions, more, "open question")
    return [*questions, *tasks, *derive(pipeline, "refine_writing", tasks, more, "writing")]


def documents_of(pipeline: Pipeline) -> Questions:
    """Return the beginnings of documents, 2,000 characters at most, cut at the end of a line if
    there is one. None comes twice or is in a benchmark."""
    paths = pipeline.cfg.documents
    given = read_documents(paths, "text") if paths else embedded_english()
    found = []
    for text in islice(filter(str.strip, given), pipeline.amounts.documents):
        if len(text) > 2000:
            cut = text.rfind("\n", 200, 2000)
            text = text[: 2000 if cut < 0 else cut].strip()
        found.append(prompt("document", text))
    return hygiene(pipeline, "documents", found)


def closed_questions(pipeline: Pipeline, documents: Questions) -> Questions:
    """Ask about each document, which is joined with the question in one way or another."""
    rng = random.Random(f"{pipeline.cfg.seed}/joins")
    questions = []
    for item in derive(pipeline, "closed", documents, pipeline.amounts.closed):
        document = item.topic
        text = rng.choice(pipeline.library["joins"]).format(document=document, text=item.text)
        questions.append(prompt("closed question", text, *item.parents, document=document))
    return questions


def says_yes(record: Record) -> bool:
    return re.match(r"(?i)\W*yes\b", record["text"]) is not None


def notions(pipeline: Pipeline, documents: Questions, about: str) -> Questions:
    """Find keywords of mathematics or Python: fields, notions within them, and the documents' words
    that the model takes for a notion."""
    amounts = pipeline.amounts
    levels = pipeline.library["math_levels"] if about == "math" else [""]
    fields = []
    for level in levels:
        fields += derive(pipeline, f"{about}_topics", [ROOT], amounts.fields, level=level)
    fields = unique(fields)
    text = "\n".join(document.text for document in documents)
    words = Counter(re.findall(r"[^\W\d_]{6,}", text.lower()))
    frequent = sorted(words, key=lambda word: (-words[word], word))[: amounts.entities]
    stage = f"{about}_entity"
    asked = [pipeline.fill(stage, entity=word) for word in frequent]
    judged = zip(frequent, pipeline.ask(stage, asked, temperature=0.0, max_tokens=64), strict=True)
    found = [prompt("notion", word, record["id"]) for word, record in judged if says_yes(record)]
    within = derive(pipeline, f"{about}_subtopics", fields, amounts.notions)
    return unique([*fields, *within, *found])


# stages that write problems of growing difficulty
GRADES = {
    "math": ("math_problems", "math_problems_easy"),
    "python": ("python_easy", "python_medium", "python_hard"),
}


def problems(pipeline: Pipeline, documents: Questions) -> Questions:
    """Make mathematics problems and Python exercises; each keyword serves one grade."""
    questions = []
    for about, grades in GRADES.items():
        words = notions(pipeline, documents, about)
        for i, grade in enumerate(grades):
            share = words[i :: len(grades)]
            questions += derive(pipeline, grade, share, pipeline.amounts.problems, about)
    return questions


def instructed(pipeline: Pipeline, sources: Questions) -> Questions:
    """Add verifiable instructions to prompts, in three forms: for one answer, for every answer of a
    conversation, and for a second answer that revises the first (report section 3.2.2)."""
    rng = random.Random(f"{pipeline.cfg.seed}/instructions")
    questions = []
    first = []
    texts = []
    for i in range(pipeline.amounts.instructed if sources else 0):
        source = rng.choice(sources)
        scope = ("single", "conversation", "revision")[i % 3]
        drawn = verify.draw_instructions(rng, rng.choice((1, 1, 2)), source.text)
        text = " ".join(instruction.text for instruction in drawn)
        truth = {"instructions": [asdict(one) for one in drawn], "scope": scope}
        new = replace(source, kind=f"instructions, {scope}", truth=truth)
        if scope == "revision":
            first.append(new)
            texts.append(text)
            continue
        if scope == "conversation":
            text = f"In each of your answers: {text}"
        new = replace(new, messages=())
        questions.append(new.with_message("user", f"{source.text}\n{text}"))
    for chat, text in zip(pipeline.answers("first_answers", first), texts, strict=True):
        if chat:
            questions.append(chat.with_message("user", f"Write your answer again. {text}"))
    return questions


def distracted(pipeline: Pipeline, topics: Questions) -> Questions:
    """Make conversations under rules that keep to a subject, with a last message that leads away
    from it."""
    chats = []
    for rules in derive(pipeline, "rules", topics[: pipeline.amounts.distracted], 1, "distracted"):
        first = f"I have a question about {rules.topic}. Where do I begin?"
        chat = replace(rules, messages=()).with_message("system", rules.text)
        chats.append(chat.with_message("user", first))
    chats = list(filter(None, pipeline.answers("on_topic", chats)))
    return with_user_turn(pipeline, "distractor", chats, template="distractor")


def with_user_turn(
    pipeline: Pipeline, stage: str, chats: Questions, first: int = 0, template: str = ""
) -> Questions:
    """Add a message of the user, whom the model plays, to each chat: greedily, in one persona after
    another from the first one on, or by the given template."""
    personas = len(pipeline.library["personas"])
    asked = []
    for i, chat in enumerate(chats, first):
        rules = chat.messages[0]
        said = history(chat.messages[rules["role"] == "system" :])
        inputs = dict(history=said, rules=rules["content"])
        name = template or f"user_{i % personas}"
        asked.append(pipeline.fill(name, chat.parents[-1:], **inputs))
    temperature = 1.0 if template else 0.0
    played = pipeline.answers(stage, asked, chats, role="user", temperature=temperature)
    return list(filter(None, played))


def converse(pipeline: Pipeline, stage: str, chats: Questions, turns: int) -> Questions:
    """Add `turns` answers to each chat, and users' messages between them, in three personas. The
    model plays both sides, greedily (report section 3.2.3)."""
    for turn in range(turns):
        if turn:
            chats = with_user_turn(pipeline, f"{stage}_user", chats, first=turn)
        said = pipeline.answers(f"{stage}_assistant", chats, temperature=0.0)
        chats = list(filter(None, said))
    return chats


def given_prompt(where: str, row: dict[str, Any]) -> Question:
    """Read a prompt that people gave, with what ground truth knows of its answer."""
    try:
        given = row["messages"] if "messages" in row else required(row, "prompt", str)
        chat = messages_of(given, "user")
        check_messages(chat)
        if chat[-1]["role"] != "user":
            raise ValueError("the last message is not the user's")
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: {e}") from e
    truth = {key: str(row[key]) for key in ("answer", "tests") if row.get(key) is not None}
    return Question("given", tuple(chat), truth=truth)


def own_prompts(pipeline: Pipeline) -> Questions:
    """Read --prompts, and the built-in ones that ground truth can judge."""
    given = []
    if pipeline.cfg.recipe != "prompts":
        given += [("seeds.truths", row) for row in pipeline.library["truths"]]
    for path in pipeline.cfg.prompts:
        given += read_records(path)
    return [given_prompt(*one) for one in given]


def all_prompts(pipeline: Pipeline) -> Questions:
    """Make all prompts. People's files are read first: a mistake in them shows before anything is
    asked."""
    amounts = pipeline.amounts
    own = own_prompts(pipeline)
    documents = documents_of(pipeline)
    macro = derive(pipeline, "macro_topics", [ROOT], amounts.macro_topics)
    topics = unique([*macro, *derive(pipeline, "subtopics", macro, amounts.subtopics)])
    plain = plain_questions(pipeline, topics)
    begun = [replace(one, kind="two turns") for one in plain if one.kind == "open question"]
    begun = converse(pipeline, "two_turn", begun[::-1][: amounts.two_turn], 1)
    return [
        *own,
        *plain,
        *closed_questions(pipeline, documents),
        *problems(pipeline, documents),
        *instructed(pipeline, plain),
        *distracted(pipeline, topics),
        *with_user_turn(pipeline, "two_turn_user", begun),
        *derive(pipeline, "incapable", topics[::-1][: amounts.incapable], 1),
    ]


def hygiene(pipeline: Pipeline, stage: str, questions: Questions, new_from: int = 0) -> Questions:
    """Return the questions from index `new_from` on that are neither near-duplicates of one before
    them nor in a benchmark."""
    good = []
    twins = verify.near_duplicates([question.text for question in questions], pipeline.cfg.near)
    for question, twin in list(zip(questions, twins, strict=True))[new_from:]:
        marker = MARKER.search(question.text)
        contaminated = pipeline.benchmarks.evidence(question.text)
        if twin:
            index, similarity = twin
            reason = "duplicate" if similarity == 1 else "near-duplicate"
            pipeline.drop(stage, reason, question, f"{similarity:.3f}: {questions[index].text}")
        elif marker:
            pipeline.drop(stage, "has a marker", question, marker[0])
        elif contaminated:
            pipeline.drop(stage, "contaminated", question, contaminated)
        else:
            good.append(question)
    return good


def clean_prompts(pipeline: Pipeline, questions: Questions) -> Questions:
    """Drop repeated prompts within each kind, as a prompt may return in another one, say with an
    instruction, and within each document, as what is asked of one may be asked of another."""
    groups = defaultdict(list)
    for question in questions:
        groups[question.kind, question.document].append(question)
    kept = [hygiene(pipeline, "prompts", group) for group in groups.values()]
    return list(chain.from_iterable(kept))


# ---- ratings and dialogues -----------------------------------------------------------------------

Rating = list[float] | None  # ATTRIBUTES; None: there is none
# "helpfulness: 3.5", but not the scale in "helpfulness (0-4): 3"
RATED = re.compile(
    rf"\b({'|'.join(ATTRIBUTES)})\b(?:\W*\(.*?\))?[^\w\n]*([0-4](?:\.\d+)?)(?![\d-])"
)


def rate(pipeline: Pipeline, stage: str, chats: Questions) -> list[Rating]:
    """Rate each chat's last answer: by the reward model, or by what the model writes."""
    if pipeline.reward:
        found = [record["scores"] for record in pipeline.ask(stage, chats, pipeline.reward)]
    else:
        asked = []
        for chat in chats:
            asked.append(pipeline.fill("rate", chat.parents, history=history(chat.messages)))
        said = pipeline.ask(stage, asked, temperature=0.0, max_tokens=64)
        found = [dict(RATED.findall(record["text"].lower())) for record in said]
    ratings = []
    for scores in found:
        complete = scores.keys() >= set(ATTRIBUTES)
        ratings.append([float(scores[name]) for name in ATTRIBUTES] if complete else None)
    return ratings


def passes(pipeline: Pipeline, program: str) -> bool:
    """Tell whether a program ends without a fault. Its verdict is a record: one at the edge of its
    time limit has the same when the command goes on."""
    stage = "verdicts"
    key = hash_of(stage, program)
    if key not in pipeline.known.get(stage, {}):
        reply = Reply(verify.run_python(program).reason)
        said = prompt(stage, program).messages
        pipeline.append(dict(id=key, stage=stage, messages=said, **reply._asdict()))
    pipeline.used[key] = pipeline.known[stage][key]
    return pipeline.used[key]["text"] == "ok"


def satisfies_truth(pipeline: Pipeline, chat: Question, turns: int = 1) -> bool | None:
    """Judge the first answer of the last turns by ground truth, or all of them if it is about the
    conversation. None: nothing is known."""
    truth = chat.truth
    answers = [message["content"] for message in chat.messages[1 - 2 * turns :: 2]]
    if "answer" in truth:
        return verify.same_number(answers[0], truth["answer"])
    if "tests" in truth:
        code = verify.extract_code(answers[0])
        return code is not None and passes(pipeline, f"{code}\n{truth['tests']}\n")
    if "instructions" not in truth:
        return None
    asked = chat.messages[-2 * turns]["content"]
    if truth["scope"] != "conversation":
        answers = answers[:1]
    instructions = [verify.Instruction(**one) for one in truth["instructions"]]
    return all(one.met(text, asked) for one, text in product(instructions, answers))


def dialogues(pipeline: Pipeline, questions: Questions) -> list[Record]:
    """Make conversations. Kept are those that obey their truth and whose answers are rated helpful
    on average."""
    turns = pipeline.amounts.turns
    chats = converse(pipeline, "dialogue", questions if turns else [], turns)
    answers = []
    for chat in chats:
        answers += [chat.without_last(2 * k) for k in reversed(range(turns))]
    ratings = rate(pipeline, "dialogue_ratings", answers)
    rows = []
    for i, chat in enumerate(chats):
        rated = ratings[i * turns : (i + 1) * turns]
        mean = []
        if None not in rated:
            mean = [sum(values) / turns for values in zip(*rated, strict=True)]
        if satisfies_truth(pipeline, chat, turns) is False:
            pipeline.drop("dialogue", "false", chat, chat.truth)
        elif not mean:
            pipeline.drop("dialogue", "not rated", chat, rated)
        elif mean[0] < pipeline.cfg.min_helpfulness:
            pipeline.drop("dialogue", "not helpful", chat, rated)
        else:
            rows.append(row_of(chat, scores=mean))
    return rows


# ---- preferences ---------------------------------------------------------------------------------


@dataclass(eq=False)
class Candidate:
    """Holds an answer to a preference prompt, and what is known of it."""

    chat: Question  # its last message is the answer
    rating: Rating = None
    truth: bool | None = None
    margins: list[float] = field(default_factory=list)  # over the other answers, by the model

    @property
    def reward(self) -> float:
        """Return the rating's aggregate; nan if the answer is not rated."""
        return float(aggregate(self.rating)) if self.rating else nan

    @property
    def score(self) -> float:
        """Return what the answer is chosen by, where no ground truth judges."""
        return fmean(self.margins) if self.margins else self.reward


def candidates_of(pipeline: Pipeline, questions: Questions) -> list[list[Candidate]]:
    """Let every answering model answer each prompt several times, and judge the answers."""
    samples = pipeline.amounts.samples
    sets = [[] for _ in questions]
    asked = []
    for question in questions:
        asked += [replace(question, sample=k) for k in range(samples)]
    for backend in dict.fromkeys(pipeline.answerers):
        how = dict(backend=backend, temperature=1.0, top_p=1.0)
        for i, chat in enumerate(pipeline.answers("responses", asked, **how)):
            candidates = sets[i // samples]
            if chat and chat.answer in [one.chat.answer for one in candidates]:
                pipeline.drop("responses", "repeated", chat, backend.name)
            elif chat:
                candidates.append(Candidate(chat))
    everyone = list(chain.from_iterable(sets))
    ratings = rate(pipeline, "response_ratings", [one.chat for one in everyone])
    for one, rating in zip(everyone, ratings, strict=True):
        one.rating = rating
        one.truth = satisfies_truth(pipeline, one.chat)
    if pipeline.cfg.judge == "text":
        compare(pipeline, sets)
    return sets


VERDICTS = {"[[A]]": 1.0, "[[B]]": -1.0, "[[C]]": 0.0}  # how much better A is


def verdict_of(text: str) -> float:
    """Read a verdict; no verdict, or several, are nan."""
    found = [verdict for mark, verdict in VERDICTS.items() if mark in text]
    return found[0] if len(found) == 1 else nan


def compare(pipeline: Pipeline, sets: list[list[Candidate]]) -> None:
    """Give candidates their margins over each other, by a model that sees every pair in both
    orders. A verdict counts if both orders agree, so swapping the answers negates the margin."""
    pairs = list(chain.from_iterable(permutations(candidates, 2) for candidates in sets))
    asked = []
    for one, other in pairs:
        inputs = dict(a=one.chat.answer, b=other.chat.answer)
        asked.append(pipeline.fill("judge", history=history(one.chat.messages[:-1]), **inputs))
    records = pipeline.ask("judge", asked, temperature=0.0)
    verdicts = [verdict_of(record["text"]) for record in records]
    by_pair = dict(zip(pairs, verdicts, strict=True))
    for (one, other), verdict in by_pair.items():
        agree = verdict == -by_pair[other, one]  # nan equals nothing
        one.margins.append(verdict if agree else 0.0)
        pipeline.counts["judge: both orders agree"] += agree
    pipeline.counts["judge: verdicts"] += len(pairs)


def choose(pipeline: Pipeline, candidates: list[Candidate]) -> tuple[Candidate, Candidate] | str:
    """Return the chosen and the rejected answer: by ground truth, of the right ones the best and of
    the wrong ones the worst, or by the judge's scores. If there are none, return the reason."""
    if len(candidates) < 2:
        return "fewer than two answers"
    # from the best to the worst; those without a score are below the others
    ranked = sorted(candidates, key=lambda one: (isnan(one.score), -one.score))
    right = [one for one in ranked if one.truth]
    wrong = [one for one in ranked if one.truth is False]
    for winner, loser in product(right, wrong):
        if not isnan(winner.score - loser.score):
            pipeline.counts["judge: pairs with a truth"] += 1
            pipeline.counts["judge: agrees with the truth"] += winner.score > loser.score
    if right and wrong:
        return right[0], wrong[-1]
    if right or wrong:
        return "all right" if right else "all wrong"
    ranked = [one for one in ranked if not isnan(one.score)]
    if len(ranked) < 2:
        return "not rated"
    gap = ranked[0].score - ranked[-1].score
    if gap == 0 or gap < pipeline.cfg.min_gap:
        return "tie"
    if ranked[0].reward < pipeline.cfg.min_chosen:
        return "chosen is not good enough"
    return ranked[0], ranked[-1]


def preference_row(
    pipeline: Pipeline, question: Question, candidates: list[Candidate]
) -> Record | None:
    """Return a chosen and a rejected answer, with rewards where they say the same as the choice."""
    parents = (*question.parents, *[one.chat.parents[-1] for one in candidates])
    question = replace(question, parents=parents)
    found = choose(pipeline, candidates)
    if isinstance(found, str):
        evidence = [(one.chat.answer, one.rating, one.margins) for one in candidates]
        pipeline.drop("preference", found, question, evidence)
        return None
    best, worst = found
    row = dict(chosen=best.chat.answer, rejected=worst.chat.answer)
    row["judge"] = pipeline.cfg.judge if best.truth is None else "truth"
    if best.reward > worst.reward:
        row |= dict(chosen_reward=best.reward, rejected_reward=worst.reward)
    return row_of(question, **row)


# ---- code ----------------------------------------------------------------------------------------


def genetic(pipeline: Pipeline) -> list[Record]:
    """Run Genetic-Instruct (arXiv 2407.21077) on colonies of programming tasks.

    New tasks come from several by crossover (few-shot), or from one by an evolution. A task with a
    solution that compiles and passes the judge lives on. Colonies are merged after every
    generation."""
    amounts = pipeline.amounts
    population = [prompt("code", text) for text in pipeline.library["code_tasks"]]
    rows = []
    for generation in range(amounts.generations):
        crossed = []
        evolved = []
        for colony in range(amounts.colonies):
            rng = random.Random(f"{pipeline.cfg.seed}/colony {colony}/{generation}")
            for _ in range(amounts.offspring):
                if rng.random() < 0.5:
                    some = rng.sample(population, min(3, len(population)))
                    text = "\n".join(f"- {task.text}" for task in some)
                    parents = chain.from_iterable(task.parents for task in some)
                    crossed.append(prompt("tasks", text, *parents))
                else:
                    task = rng.choice(population)
                    how = rng.choice(pipeline.library["evolutions"])
                    evolved.append(pipeline.fill("evolve", task.parents, task=task.text, how=how))
        born = derive(pipeline, "crossover", crossed, 1)
        chats = pipeline.answers("evolve", evolved, temperature=1.0)
        born += [prompt("evolve", chat.answer, *chat.parents) for chat in chats if chat]
        born = [replace(task, kind="code", topic="Python") for task in born]
        born = hygiene(pipeline, "code", [*population, *born], len(population))
        chats = solved(pipeline, born)
        rows += [row_of(chat) for chat in chats]
        population += [chat.without_last(1) for chat in chats]
    return rows


def solved(pipeline: Pipeline, tasks: Questions) -> Questions:
    """Return the tasks with a solution that compiles and is judged right."""
    asked = [pipeline.fill("solve", task.parents, task=task.text) for task in tasks]
    chats = []
    to_judge = []
    for chat in filter(None, pipeline.answers("solve", asked, tasks)):
        code = verify.extract_code(chat.answer)
        if code is None or not verify.compiles(code):
            pipeline.drop("code", "does not compile", chat, code)
        else:
            chats.append(chat)
            to_judge.append(pipeline.fill("fitness", chat.parents, task=chat.text, code=code))
    verdicts = pipeline.ask("fitness", to_judge, temperature=0.0, max_tokens=128)
    fit = []
    for chat, verdict in zip(chats, verdicts, strict=True):
        if says_yes(verdict):
            fit.append(chat)
        else:
            pipeline.drop("code", "not fit", chat, verdict["text"])
    return fit


# ---- files ---------------------------------------------------------------------------------------


def synthesize(cfg: SynthesizeConfig) -> Path:
    """Run all stages, and return the folder with the rows, the manifest and the report."""
    pipeline = Pipeline(cfg)
    questions = clean_prompts(pipeline, all_prompts(pipeline))
    random.Random(f"{cfg.seed}/split").shuffle(questions)
    split = round(len(questions) * pipeline.amounts.preference_share)
    sets = candidates_of(pipeline, questions[:split])
    found = list(map(partial(preference_row, pipeline), questions[:split], sets))
    pairs = list(filter(None, found))
    everyone = chain.from_iterable(sets)
    files = {"sft": dialogues(pipeline, questions[split:]), "code_sft": genetic(pipeline)}
    files |= {"preference": pairs, "ranked": list(filter(None, map(ranked_row, found, sets)))}
    files["rpo"] = [row for row in pairs if "chosen_reward" in row]
    files["reward"] = [row_of(one.chat, label=one.rating) for one in everyone if one.rating]
    files["dropped"] = pipeline.dropped
    if pipeline.leads:
        write_files(pipeline, questions, files)
    wait_for_all()
    return cfg.out


def write_files(pipeline: Pipeline, questions: Questions, files: dict[str, list[Record]]) -> None:
    """Write the rows, the manifest, the report and the histograms."""
    out = pipeline.cfg.out
    written = {}
    for name, rows in files.items():
        path = out / f"{name}.jsonl"
        write_whole(path, (json.dumps(row, ensure_ascii=False) for row in rows))
        written[name] = dict(rows=len(rows), sha256=digest_of(path))
    stages = defaultdict(Counter)
    for record in pipeline.used.values():
        read, new = record["tokens"]
        stages[record["stage"]].update(answers=1, prompt_tokens=read, new_tokens=new)
    manifest = {
        "config": settled_config(pipeline),
        "amounts": vars(pipeline.amounts),
        "files": written,
        "prompts": Counter(question.kind for question in questions),
        "counts": dict(sorted(pipeline.counts.items())),
        "stages": stages,
    }
    write_whole(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    spent = [(stage, *used.values()) for stage, used in stages.items()]
    report = [
        f"# {len(pipeline.used)} answers",
        *table(("file", "rows"), [(name, one["rows"]) for name, one in written.items()]),
        *table(("prompts", "kept"), manifest["prompts"].items()),
        *table(("dropped and judged", "times"), manifest["counts"].items()),
        *table(("stage", "answers", "prompt tokens", "new tokens"), spent),
    ]
    write_whole(out / "report.md", report)
    log.info("\n".join(report))
    lengths = {"prompts": [len(question.text) for question in questions]}
    for side in ("chosen", "rejected"):
        lengths[side] = [len(row[side]) for row in files["preference"]]
    topics = Counter(question.topic or question.kind for question in questions)
    draw_histograms(out / "histograms.png", lengths, topics)


def settled_config(pipeline: Pipeline) -> Record:
    """Return the config without what says when, where or how fast rows were made: models are known
    by their identities, files by their contents."""
    cfg = asdict(pipeline.cfg)
    for name in ("out", "endpoint", "concurrency", "retries", "slots", "chunk", "compile", "mesh"):
        del cfg[name]
    for name in ("templates", "documents", "prompts", "evaluations"):
        cfg[name] = [f"{path.name} {digest_of(path)}" for path in cfg[name]]
    answerers = [backend.name for backend in pipeline.answerers]
    reward = pipeline.reward.name if pipeline.reward else ""
    return cfg | dict(model=pipeline.model.name, answerers=answerers, reward=reward)


# ---- the program ---------------------------------------------------------------------------------


def listen() -> None:
    """Let a first Ctrl-C or SIGTERM raise KeyboardInterrupt, and a second one end the process at
    once. What is written is whole, or mended by the next start."""
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, _: Any) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        raise KeyboardInterrupt(f"by {name}: the same command goes on from here")

    for each in signals:
        signal.signal(each, stop)


def main(cfg: SynthesizeConfig) -> None:
    """Make the rows, until they are there or a signal comes."""
    listen()
    with_rows(synthesize(cfg), "sft", "code_sft", "preference", "reward")


if __name__ == "__main__":
    parse = partial(tyro.cli, SynthesizeConfig, prog="python -m recipes.synthesize")
    run_command("recipes.synthesize", parse, main)
