"""Read, compare and judge texts for the recipes, without a model: lists in an answer, duplicates,
decontamination, verifiable instructions, final numbers, and code that is run to judge it."""

import ast
import contextlib
import itertools
import json
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data import read_jsonl
from recipes import guard
from recipes.ifeval import KEYWORDS, KINDS, LANGUAGES, REPEAT, Closed, DependsOn, Words, compatible

# ---- lists in a model's answer -------------------------------------------------------------------

# What may stand before an item: one of three kinds of marks, perhaps quoted, in a heading, or bold.
MARK = re.compile(
    r"""(?P<indent>[ ]*)(?:>\s?)*(?:\#+\s+)?(?P<bold>\*\*|__)?
    (?:(?:(?:Q|Question|Topic|Item|Idea|Prompt|Problem|Task)[ ]?)?              # Question 1:
       [(\[]?(?P<number>\d{1,3})(?:[.:)\]](?![\d(])|[ ]?[-–—](?=\s))             # 1. 1) (1) 1 -
    |  (?P<letter>(?:\(?(?:[a-zA-Z]|[ivx]{2,5}|[IVX]{2,5})\)                    # a) (B) ii)
       |(?:[a-z]|[ivx]{2,5})\.)(?=\s))                                          # a. ii.
    |  (?P<bullet>[-*+•–—▪◦‣●○■✓✔✅➤►→⁃·🔹🔸①-⑳]\ufe0f?(?=\s|$)(?:[ ]\[[ xX]\])?  # - [x]
       |\d\ufe0f?\u20e3|[-•▪●](?=[^\W\d]|["“]))                                 # -Alpha
    )(?(bold)(?P<closed>(?P=bold))?)\s*""",
    re.VERBOSE,
)
HEADING = r"#.*|(\*\*|__)[^*_]+\1:?|.*:\W*"
BOLD_TITLE = r"^(\*\*|__)([^*_]*[^*_.:?!])\1$"


def parse_list(text: str) -> list[str]:
    """Return the items of a list in a model's answer, or [] for "no list": it can be asked again.

    Items have marks (numbers from 1, letters, bullets), or are the strings of a JSON array. A shape
    is read exactly or not at all: what could be read in two ways is no list.
    """
    text = re.sub(r"(?s)^.*</think>|[\0\ufeff\u200b\u2060]", "", text).expandtabs(4)
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if MARK.match(line)]
    return clean_items(marked_items(lines[starts[0] :]) if starts else json_strings(text))


def marked_items(lines: list[str]) -> list[str]:
    """Return the items of a list that begins in the first line, or [] where it is not clear.

    An item has the first mark's kind and depth. Other marks below it, lines indented further, and
    lines that go on in small letters are joined to it.
    """
    first = MARK.match(lines[0])
    depth = first.end("indent")
    items: list[str] = []
    below = ""  # a paragraph below the last item: the next items' "heading", or the list's "end"
    blank = False
    for line in lines:
        mark = MARK.match(line)
        words = line.strip()
        open_item = items and (not re.search(r"\w", items[-1]) or line[: depth + 1].isspace())
        if words.startswith(("```", "~~~")):
            return []  # code
        elif mark and kind_of(mark) == kind_of(first) and mark.end("indent") < depth + 2:
            clear = not below
            if mark["number"]:
                clear = below != "end" and int(mark["number"]) == len(items) + 1
            if not clear:
                return []  # a second list, or an item between was not seen
            below = ""
            opened = "" if mark["closed"] else mark["bold"] or ""
            items.append(opened + line[mark.end() :].strip())
        elif blank and words and not open_item:
            below = below or ("heading" if re.fullmatch(HEADING, words) else "end")
        elif mark and not below:
            joint = "" if items[-1].rstrip("*_")[-1:] in ".:;,?!" else ";"
            items[-1] += f"{joint} {line[mark.end() :]}"
        elif words and not below:
            if not open_item and not words[0].islower():
                return []  # the item's next line, or the answer's last words?
            items[-1] = re.sub(BOLD_TITLE, r"\2:", items[-1]) + " " + words
        blank = not words
    return items


def kind_of(mark: re.Match[str]) -> str:
    return next(kind for kind in ("number", "letter", "bullet") if mark[kind])


def json_strings(text: str) -> list[str]:
    """Return the strings of a JSON array that begins a line, or [] if there is none."""
    array = re.match(r"(?s)(?:[^\[]*\n)? *(\[.*\])", text)
    with contextlib.suppress(ValueError, RecursionError):
        items = json.loads(array[1]) if array else []
        if all(isinstance(item, str) for item in items):
            return items
    return []


def clean_items(items: list[str]) -> list[str]:
    """Return items without the marks around them: emphasis, quotes, a title's asterisks.

    Return [] if their text shows that they were not read right: YAML (one key before all items,
    | or >, doubled quotes), or the next item's mark on the same line.
    """
    unread = rf"^[|>]|^'.*''|[ ](?:•|\(?{len(items) + 1}[.)])[ ]|\A([a-z_]+: ).*(?:\n\1.*)*\Z"
    if re.search(f"(?m){unread}", "\n".join(items)):
        return []
    cleaned = []
    for item in items:
        item = re.sub(r"^(\*\*|__)(.+?)\1(?!\w)", r"\2", " ".join(item.split())).strip()
        item = re.sub(r"""^([*_`"'])((?:(?!\1).)+)\1$|^“([^“”]+)”$""", r"\2\3", item)
        if re.search(r"\w", item):
            cleaned.append(item)
    return cleaned


# ---- duplicates and decontamination --------------------------------------------------------------

# beside a number these are operators: "2 - 2" and "2 * 2" are not the same question
OPERATORS = {"-": "−", "*": "×", "/": "÷"}


@cache
def plain_char(char: str) -> str:
    """Return a letter, digit or accent as it is, a sign as a word, punctuation as a space."""
    kind = unicodedata.category(char)
    if kind in ("Sm", "Sc", "So") or char in "%^":
        return f" {char} "
    if kind[0] in "LMN":
        return char
    return "" if char in "'’" else " "


def normalise(text: str) -> str:
    """Return a text in small letters, without punctuation, with single spaces, in Unicode's NFKC.

    Signs that count in a sum (+ % $ -3) stay, as words of their own.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    text = re.sub(r"(?<=\d)\s*[-*/]|[-*/](?=\s*\d)", lambda m: OPERATORS[m[0].strip()], text)
    return " ".join("".join(map(plain_char, text)).split())


def shingles(text: str, n: int = 5) -> set[str]:
    """Return the n-grams of a text's words; a shorter text is one n-gram."""
    words = text.split()
    return {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def near_duplicates(texts: Sequence[str], threshold: float = 0.7) -> list[tuple[int, float] | None]:
    """Find for each text the kept one before it that it repeats most; None if it is kept itself.

    A hit is (its index, the Jaccard index of their word 5-grams), of equals the first. The search
    is exact: two sets that share `threshold` of each one's grams share one of its rarest
    1 - threshold and the next, so only those are looked up.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: a Jaccard index, 0 < threshold <= 1")
    grams = [shingles(normalise(text) or text.strip()) for text in texts]
    count = Counter(itertools.chain.from_iterable(grams))
    kept_with = defaultdict(list)  # gram → kept texts that have it among their rarest
    hits = []
    for i, own in enumerate(grams):
        by_rarity = sorted(own, key=lambda gram: (count[gram], gram))
        rarest = by_rarity[: len(own) - int(threshold * len(own)) + 1]
        near = set().union(*(kept_with[gram] for gram in rarest))
        scores = {j: jaccard(own, grams[j]) for j in sorted(near)}
        best = max(scores, key=scores.get, default=i)
        if scores.get(best, 0) >= threshold:
            hits.append((best, scores[best]))
            continue
        hits.append(None)
        for gram in rarest:
            kept_with[gram].append(i)
    return hits


def strings_in(value: Any) -> list[str]:
    """Return all strings in a JSON value, however deep."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        return [*itertools.chain.from_iterable(map(strings_in, value))]
    return [value] if isinstance(value, str) else []


def read_evaluations(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """Return ("FILE:LINE", text) of each text in the JSONL files of evaluation items."""
    texts = []
    for where, item in itertools.chain.from_iterable(map(read_jsonl, paths)):
        texts += [(where, text) for text in strings_in(item)]
    return texts


class Decontaminator:
    """Finds what a text shares with evaluation items: 13 words in a row, or 8 with an item of
    fewer than 13; an item of 4 to 7 words only if it is the whole text."""

    def __init__(self, evaluations: Iterable[tuple[str, str]]) -> None:
        self.sources: dict[str, str] = {}  # n-gram → FILE:LINE
        for where, text in evaluations:
            plain = normalise(text)
            length = len(plain.split())
            if length >= 4:
                for gram in shingles(plain, 13 if length >= 13 else 8):
                    self.sources.setdefault(gram, where)

    def evidence(self, text: str) -> str | None:
        """Return the first hit in a text as FILE:LINE: "the shared n-gram", or None."""
        words = normalise(text).split()
        grams = [" ".join(words)]
        for i in range(len(words) - 7):  # near the end the longer one is cut, and in no source
            grams += [" ".join(words[i : i + n]) for n in (8, 13)]
        for gram in grams:
            if gram in self.sources:
                return f'{self.sources[gram]}: "{gram}"'
        return None


# ---- verifiable instructions ---------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """Writes an instruction of some kind into a prompt, and verifies it in an answer."""

    kind: str
    args: dict[str, Any] = field(default_factory=dict, hash=False)
    """IFEval's keyword arguments."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"instruction {self.kind!r} is none of {[*KINDS]}")
        takes = KINDS[self.kind].arguments
        if {"prompt_to_repeat", *takes} != {"prompt_to_repeat", *self.args}:
            rule = f"takes arguments {[*takes]}, not {[*self.args]}"
            raise ValueError(f"instruction {self.kind!r} {rule}")
        for name, value in self.args.items():
            if isinstance(takes[name], Closed) and value not in takes[name]:
                raise ValueError(f"{self.kind}: {name} is {value!r}, not one of {[*takes[name]]}")

    @classmethod
    def from_json(cls, obj: dict[str, Any]) -> "Instruction":
        return cls(obj["kind"], obj["args"])

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "args": self.args}

    @property
    def text(self) -> str:
        """Return the sentence for the prompt."""
        shown = dict(self.args)
        for name, value in self.args.items():
            if isinstance(value, list):
                shown[name] = ", ".join(value)
            elif value == "less than":
                shown[name] = "fewer than"
            elif name == "language":
                shown[name] = LANGUAGES[value]
        return KINDS[self.kind].text.format(**shown)

    def met(self, response: str, prompt: str = "") -> bool:
        """Return whether a response follows it.

        An instruction to repeat the prompt means `prompt` where its arguments do not hold one.
        """
        args = {"prompt_to_repeat": prompt} if self.kind == REPEAT else {}
        return KINDS[self.kind].check(response, **args | self.args)


MOST_INSTRUCTIONS = 8


def draw_instructions(rng: random.Random, n: int, prompt: str = "") -> list[Instruction]:
    """Draw n instructions that one answer can follow; without a prompt none asks to repeat it."""
    if not 0 <= n <= MOST_INSTRUCTIONS:
        raise ValueError(f"n={n} instructions: 0 to {MOST_INSTRUCTIONS}")
    kinds = [kind for kind in KINDS if prompt.strip() or kind != REPEAT]
    chosen: list[str] = []
    while len(chosen) < n:  # most often the first time
        chosen = []
        for kind in rng.sample(kinds, k=len(kinds)):
            if len(chosen) < n and all(compatible(kind, other) for other in chosen):
                chosen.append(kind)
    words = [word for word in KEYWORDS if word not in prompt.lower()]
    rng.shuffle(words)
    return [draw_instruction(rng, kind, words, prompt) for kind in chosen]


def draw_instruction(rng: random.Random, kind: str, words: list[str], prompt: str) -> Instruction:
    """Draw the arguments of an instruction; take its words off the list."""
    args: dict[str, Any] = {}
    for name, choices in KINDS[kind].arguments.items():
        if isinstance(choices, DependsOn):
            choices = choices.choices[args[choices.argument]]
        if kind == REPEAT:
            args[name] = prompt
        elif isinstance(choices, Words):
            drawn = [words.pop() for _ in range(choices)]
            args[name] = drawn if choices > 1 else drawn[0]
        else:
            args[name] = rng.choice(choices)
    return Instruction(kind, args)


# ---- ground truth: numbers and code --------------------------------------------------------------

# the content of \boxed{…}, with braces up to three deep
BOXED = r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
AFTER_HASHES = r"####\s*([-$.0-9][^\n]*)"
ANSWER_IS = r"(?is)\A.*\banswer\s*(?:is|:|=)[\s:]*(.*?)(?:\n|[.!?;](?=\s|$)|\Z)"
TEX = {"−": "-", "–": "-", r"\times": "×", r"\cdot": "×", r"\$": "$", r"\%": "%", "{,}": ","}
TEX |= {r"\,": "", r"\!": "", r"\;": " ", r"\ ": " ", "**": " ", "⁄": "/"}
DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NOT_READ = r"\s?(?:\^|√|π|\\(?:[dt]?frac|sqrt|pi))[^\s$=]*"  # powers, roots, π
# an integer, decimal, fraction or mixed number, perhaps with an exponent of ten
NUMBER = re.compile(
    rf"""(?<![\w.)\]])(?:(?P<sign>-)(?=[$0-9.]))?(?:\$\s?)?(?P<minus>-)?
    (?:(?P<whole>[0-9]+)[ -](?=[0-9]+/[0-9]))?(?P<top>{DECIMAL})(?:\s?/\s?(?P<under>{DECIMAL}))?
    (?:(?:e|\s?[×x*]\s?10\^\{{?)(?P<exponent>[+-]?[0-9]{{1,3}})(?![0-9])\}}?)?
    (?P<odd>e[+-]?[0-9]+|(?:\s?[×x*]\s?10)?{NOT_READ})?|{NOT_READ}""",
    re.IGNORECASE | re.VERBOSE,
)


def number_of(match: re.Match[str]) -> Fraction | None:
    """Return the value of a match of NUMBER, or None if its notation is one that is not read."""
    if match["top"] is None or match["odd"] or len(match[0]) > 200:
        return None
    top = Fraction(match["top"].replace(",", ""))
    under = Fraction((match["under"] or "1").replace(",", ""))
    if under == 0:
        return None
    value = int(match["whole"] or 0) + top / under
    value *= Fraction(10) ** int(match["exponent"] or 0)
    return -value if match["sign"] or match["minus"] else value


def final_number(text: str) -> Fraction | None:
    r"""Return the number that an answer comes to, or None if there is none or it is not read.

    It is the first one in the last \boxed{}, after the last ####, or after the last "answer is",
    and there behind the last equals sign, if one is; else the last one in the answer. 5 % is 5.
    """
    for tex, plain in TEX.items():
        text = text.replace(tex, plain)
    text = re.sub(r"(?<=[0-9])(?=\\[dt]?frac)", " ", text)
    part = r"(?:\{(-?[0-9.]+)\}|([0-9]))"
    text = re.sub(rf"\\[dt]?frac\s*{part}\s*{part}", r"\1\2/\3\4", text)
    marked = re.findall(BOXED, text) or re.findall(AFTER_HASHES, text)
    for said in (marked or re.findall(ANSWER_IS, text))[-1:]:
        if match := NUMBER.search(said.rpartition("=")[2]) or NUMBER.search(said):
            return number_of(match)
    matches = [] if marked else [*NUMBER.finditer(text)]
    return number_of(matches[-1]) if matches else None


def same_number(a: str | Fraction | float | None, b: str | Fraction | float | None) -> bool:
    """Return whether two answers, or numbers, come to the same, up to a millionth."""
    a = final_number(a) if isinstance(a, str) else a
    b = final_number(b) if isinstance(b, str) else b
    return a is not None and b is not None and abs(a - b) * 10**6 <= max(abs(a), abs(b))


def compiles(text: str) -> bool:
    """Return whether a text is a Python program, and not a word that happens to be one."""
    try:
        nodes = [*ast.walk(ast.parse(text))]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    words = ast.Module | ast.Expr | ast.Name | ast.Constant | ast.Load | ast.Tuple | ast.UnaryOp
    return any(not isinstance(node, words | ast.USub | ast.Attribute) for node in nodes)


def extract_code(text: str) -> str | None:
    """Return the Python in an answer, or None.

    It is in blocks marked as such, else in those without a mark that compile (a last one may be cut
    off); without blocks it is the whole text, if that is a program.
    """
    pattern = r"(?ms)^[ \t]*(```+|~~~+)[ \t]*([\w+.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1|\Z)"
    blocks = [(name.lower(), textwrap.dedent(body)) for _, name, body in re.findall(pattern, text)]
    code = [body for name, body in blocks if name in ("python", "py", "python3")]
    code = code or [body for name, body in blocks if not name and compiles(body)]
    if code:
        return "\n\n".join(body.strip("\n") for body in code) + "\n"
    return text if not blocks and compiles(text) else None


class Ran(NamedTuple):
    ok: bool
    reason: str
    """Verdict: ok, it came to its last line; error, an exception or a crash; exit, it left before
    (sys.exit, os._exit); refused, timeout, memory or output, it met that limit."""
    output: str


def run_guard(job: dict[str, Any], folder: str, out: BinaryIO) -> int:
    """Run recipes/guard.py on a job within its time, and return the exit status as a shell does."""
    # not -I, which would ignore this environment, and it has no more
    environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-s", "-P", "-B", "-u", os.path.abspath(guard.__file__)],
        cwd=folder,
        env=environment | {"TMPDIR": folder},
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=subprocess.STDOUT,
    )
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(json.dumps(job).encode(), job["timeout"])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    return status if status >= 0 else guard.SIGNALLED - status


def run_python(
    code: str, timeout: float = 5.0, memory_mib: int = 512, output_limit: int = 64_000
) -> Ran:
    """Run a program in a process of its own, to judge it, and return how it ended.

    It gets nothing on stdin, no environment, and an empty temporary folder; stdout and stderr are
    one output. The same program gives the same result: strings hash alike. It is no container:
    recipes/guard.py lists what is stopped and what is not.
    """
    if timeout <= 0 or memory_mib < 64 or not 0 <= output_limit < guard.FILE_BYTES:
        given = f"timeout={timeout}, memory_mib={memory_mib}, output_limit={output_limit}"
        raise ValueError(f"{given}: some time, at least 64 MiB, and output of less than 16 MiB")
    seal = f"\n{secrets.token_hex(16)} "  # before the verdict: a program cannot write its own
    job = {"code": code, "timeout": timeout, "memory_mib": memory_mib, "seal": seal}
    # output to a file, not a pipe: a process left behind with its end open is not waited for
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("a+b") as out:
        status = run_guard(job, folder, out)
        out.seek(0)
        output, _, verdict = out.read().partition(seal.encode())
    stopped_by = status - guard.SIGNALLED
    if len(output) > output_limit:
        reason = "output"
    elif verdict:
        reason = verdict.split()[0].decode()
    elif stopped_by in (signal.SIGKILL, signal.SIGXCPU):
        reason = "timeout"
    else:
        reason = "error" if stopped_by >= 0 else "exit"
    return Ran(reason == "ok", reason, output[:output_limit].decode(errors="replace"))
