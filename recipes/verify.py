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
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data import read_records
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
    is read exactly or not at all: what could be read in two ways is no list."""
    text = re.sub(r"(?s)^.*</think>|[\0\ufeff\u200b\u2060]", "", text).expandtabs(4)
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if MARK.match(line)]
    return clean_items(marked_items(lines[starts[0] :]) if starts else json_strings(text))


def marked_items(lines: list[str]) -> list[str]:
    """Return the items of a list that begins in the first line, or [] where it is not clear.

    An item has the first mark's kind and depth. Other marks below it, lines indented further, and
    lines that go on in small letters are joined to it."""
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
    | or >, doubled quotes), or the next item's mark on the same line."""
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


SIGNS = "+<=>|~$^%"  # what Unicode calls signs among ASCII, and two more


class Plain(dict):
    """Maps a letter, digit or accent to itself, a sign to a word, punctuation to a space."""

    def __missing__(self, code: int) -> str | None:
        char = chr(code)
        kind = unicodedata.category(char)
        if kind[0] in "LMN" or char in SIGNS:
            self[code] = char
        elif char in "'’":
            self[code] = None
        else:
            self[code] = f" {char} " if kind in ("Sm", "Sc", "So") else " "
        return self[code]


PLAIN = Plain()
# letters of scripts without blanks between words (Thai, Lao, Burmese, Khmer, Japanese, Chinese),
# and words that are too long for one: each character counts as a word
UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]"
    r"|(?<!\S)\S{41,}"
)


def normalise(text: str) -> str:
    """Return a text in small letters, without punctuation, with single spaces, in Unicode's NFKC.

    Signs that count in a sum (+ % $ -3) stay, as words of their own, and so do the characters of
    scripts without blanks: what looks for shared words, here, looks for shared characters there."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    text = re.sub(r"[-*/](?=\s*\d)", lambda m: OPERATORS[m[0]], text)
    text = re.sub(r"\d\s*[-*/]", lambda m: m[0][:-1] + OPERATORS[m[0][-1]], text)
    for sign in SIGNS:  # translate is ten times as fast where it maps a letter to a letter
        text = text.replace(sign, f" {sign} ")
    words = text.translate(PLAIN).split()
    plain = " ".join(words)
    if text.isascii() and max(map(len, words), default=0) <= 40:
        return plain
    return " ".join(UNSPACED.sub(lambda m: f" {' '.join(m[0])} ", plain).split())


def shingles(text: str, n: int = 5) -> set[str]:
    """Return the n-grams of a text's words; a shorter text is one n-gram."""
    words = text.split()
    return {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def mix(x: np.ndarray) -> np.ndarray:
    """Hash 64-bit numbers, with the last steps of splitmix64 (prng.di.unimi.it/splitmix64.c)."""
    x = (x ^ x >> 30) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> 27) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> 31


def gram_hashes(text: str, n: int = 5) -> np.ndarray:
    """Return the sorted 64-bit hashes of a text's n-grams, as `shingles` has them, of its normal
    form; a text of punctuation alone is compared as it stands."""
    words = (normalise(text) or text.strip()).split()
    words += [""] * (n - len(words))
    hashes = np.array([zlib.crc32(word.encode(errors="replace")) for word in words], np.uint64)
    grams = np.zeros(len(words) - n + 1, np.uint64)
    for i in range(n):
        grams = mix(grams + hashes[i : i + len(grams)] + np.uint64(0x9E3779B97F4A7C15))
    return np.unique(grams)


SIGNATURE = 128  # numbers in a text's signature
FACTORS = mix(np.arange(1, SIGNATURE + 1, dtype=np.uint64)) | np.uint64(1)


def minhash(grams: np.ndarray) -> np.ndarray:
    """Return a text's signature, uint32 (SIGNATURE,): the least of its n-grams' hashes under each
    of as many hash functions. Two texts agree in a number with the probability of their Jaccard
    index (Broder, 1997)."""
    least = np.full(SIGNATURE, 2**32 - 1, np.uint32)
    for start in range(0, len(grams), 1024):  # so that memory stays bounded
        hashed = grams[start : start + 1024, None] * FACTORS >> np.uint64(32)
        least = np.minimum(least, hashed.min(axis=0).astype(np.uint32))
    return least


def bucket_shape(threshold: float, recall: float) -> tuple[int, int]:
    """Return (buckets, rows): cut a signature into buckets of `rows` numbers, and two texts share
    one with probability 1 - (1 - jaccard ** rows) ** buckets. The largest number of rows is taken
    that gives a pair at the threshold at least `recall`."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: a Jaccard index, 0 < threshold <= 1")
    rows = SIGNATURE
    while rows > 1 and (1 - threshold**rows) ** (SIGNATURE // rows) > 1 - recall:
        rows -= 1
    return SIGNATURE // rows, rows


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Jaccard index of two sorted arrays without repetitions."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def near_duplicates(texts: Sequence[str], threshold: float = 0.7) -> list[tuple[int, float] | None]:
    """Find for each text the kept one before it that it repeats most; None if it is kept itself.

    A hit is (its index, the Jaccard index of their word 5-grams), of equals the first. Signatures
    find what may be near, 999 of 1,000 pairs at the threshold and more above it; the index is then
    counted from the texts. Memory: a kilobyte a text, however long."""
    n_buckets, rows = bucket_shape(threshold, 0.999)
    grams = lru_cache(64)(lambda i: gram_hashes(texts[i]))
    signatures = np.zeros((len(texts), SIGNATURE), np.uint32)
    for i in range(len(texts)):
        signatures[i] = minhash(grams(i))
    keys = np.zeros((len(texts), n_buckets), np.uint64)
    for i in range(n_buckets * rows):
        keys[:, i // rows] = mix(keys[:, i // rows] + signatures[:, i] + np.uint64(i + 1))
    found, counts = np.unique(keys, return_counts=True)
    shared = np.isin(keys, found[counts > 1])
    kept_with = defaultdict(list)  # key that several texts have → the kept ones of them
    hits = []
    for i, own in enumerate(keys):
        own = own[shared[i]].tolist()
        near = np.array(sorted(set().union(*(kept_with[key] for key in own))), int)
        # an estimate, off by 0.2 once in a million times, saves counting most of them
        near = near[(signatures[near] == signatures[i]).mean(axis=1) >= threshold - 0.2]
        scores = {j: jaccard(grams(i), grams(j)) for j in near.tolist()}
        best = max(scores, key=scores.get, default=i)
        if scores.get(best, 0) >= threshold:
            hits.append((best, scores[best]))
            continue
        hits.append(None)
        for key in own:
            kept_with[key].append(i)
    return hits


def strings_in(value: Any) -> list[str]:
    """Return all strings in a JSON value, however deep, in their order."""
    strings = []
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            strings.append(value)
        elif isinstance(value, dict | list):
            left += [*(value.values() if isinstance(value, dict) else value)][::-1]
    return strings


def read_evaluations(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """Return ("FILE:LINE", text) of each text in the JSONL files of evaluation items."""
    texts = []
    for where, item in itertools.chain.from_iterable(map(read_records, paths)):
        texts += [(where, text) for text in strings_in(item)]
    return texts


class Decontaminator:
    """Finds what a text shares with evaluation items: 13 words in a row, or 8 with an item of
    fewer than 13; an item of 4 to 7 words only if it is the whole text. Shorter ones are counted as
    `unindexed`."""

    def __init__(self, evaluations: Iterable[tuple[str, str]]) -> None:
        self.sources: dict[str, str] = {}  # n-gram → FILE:LINE
        self.unindexed = 0
        for where, text in evaluations:
            plain = normalise(text)
            length = len(plain.split())
            if length < 4:
                self.unindexed += 1
                continue
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
    args: dict[str, Any] = field(default_factory=dict, hash=False)  # IFEval's keyword arguments

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

        An instruction to repeat the prompt means `prompt` where its arguments do not hold one."""
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

HASHES = r"####[ \t]*((?:[-+$.0-9(\\{*√]|[a-zA-Z] ?=)(?:(?!####)[^\n])*)"
ANSWER_IS = r"(?is)\A.*\banswer\s*(?:is|:|=)[\s:]*(.*?)(?:\n|(?:[.?;]|(?<![\d)])!)(?=\s|$)|\Z)"
REASON = r"\s(?:because|since|as|so|which|but)\s|,\s(?=[a-z])(?!or\b|and\b|plus\b|minus\b|times\b)"
TEX = {"−": "-", "–": "-", r"\times": "×", r"\cdot": "×", r"\$": "$", r"\%": "%", "{,}": ","}
TEX |= {r"\,": "", r"\!": "", r"\;": " ", r"\ ": " ", "~": " ", "⁄": "/", r"\dfrac": r"\frac"}
TEX |= {r"\tfrac": r"\frac", r"\(": "", r"\)": "", r"\[": "", r"\]": ""}
TEX |= {r"\left": "", r"\right": ""}
DECIMAL = r"""(?:(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:[ \xa0\u2009\u202f][0-9]{3})+)(?![0-9])|[0-9]+)
    (?:\.[0-9]+)?|\.[0-9]+)"""
# an integer, decimal (perhaps repeating), fraction or mixed number, perhaps with a power of ten
NUMBER = rf"""(?:(?P<sign>-)(?=[$0-9.]))?(?:\$\s?)?(?P<minus>-)?
    (?:(?P<whole>[0-9]+)[ ](?=[0-9]+/[0-9]))?
    (?P<top>{DECIMAL})(?:(?P<dot>\.?)(?:\\overline\{{|\()(?P<repeat>[0-9]{{1,12}})[)}}])?
    (?:\s?/\s?(?P<under>{DECIMAL}))?
    (?:(?:e|\s?[×x*]\s?10\^\{{?)(?P<exponent>[+-]?[0-9]{{1,3}})(?![0-9])\}}?)?"""
SHORT_UNIT = r"\s?(?:[%°€£]|\^?\{?\\circ\}?|(?:[cmk]m|[km]g|ml|ft|lb|oz|mph)(?:/[hs])?(?![a-zA-Z]))"
QUANTITY = re.compile(
    rf"""{NUMBER}(?:(?:{SHORT_UNIT}|\s?\\(?:text|mathrm|mbox|textbf)\{{(?P<text>[^{{}}0-9]*)\}}
    |[ ](?P<words>[^\W\d_]{{3,}}(?:[ /][^\W\d_]+)*))(?:\^\{{?[23]\}}?|[²³])?)?""",
    re.VERBOSE | re.IGNORECASE,
)
NUMBER_IN_PROSE = re.compile(rf"(?<![\w.)\]}}]){NUMBER}(?:{SHORT_UNIT})?", re.VERBOSE | re.I)
# words behind a number that are no unit: they change its value
NO_UNIT = r"""(?xi)\b(?:or|and|to|plus|minus|times|over|by|divided|mod|more|less|fewer|than|squared
    |cubed|half|halves|thirds?|quarters?|tenths|hundredths|hundred|thousand|million|billion|trillion
    |lakh|crore|dozen|score|roots?|power|factorial|choose|not|between|[b-z])\b"""
# what makes a number in a sentence a part of an expression
BEFORE = r"""(?xi)(?:[\w)\]}]\s*[-+*/^×÷]+|[0-9]\s*[,:]?|[(\[{}^_√π]|\\[a-z]+
    |\b(?:sin|cos|tan|log|ln|exp|sqrt|mod|plus|minus|times|over|negative|or))\s*\Z"""
AFTER = r"""(?x)\s*[+*/^×÷√π]|\s*\\(?!text|mathrm)|\s*-\s*[\w(]|[^\W_]|[.,'’:][0-9]|\.\.
    |[()\]}!…²³\xbc-\xbe\u0300-\u036f\u2070-\u218f]"""
# the left side of an equation that gives a value: a name, or a sum
NAME = r"\s*\\?[^\W\d]\w*(?: [^\W\d]+)*(?:\([\w, ]*\))?\s*"
SUM = r"(?:\\(?:sqrt|frac|pi)|[^a-zA-Z\\,;<>≤≥≠!]|,(?=[0-9]{3}))*"


def number_of(match: re.Match[str]) -> Fraction | None:
    """Return the value of a match of NUMBER, or None if its notation is one that is not read."""
    top, under = (re.sub(r"[^0-9.]", "", match[part] or "1") for part in ("top", "under"))
    repeat = match["repeat"] or "0"
    top += match["dot"] or ""
    read = ("." in top or not match["repeat"]) and top.count(".") < 2
    if not read or len(match[0]) > 200 or not Fraction(under):
        return None
    unit = Fraction(1, 10 ** len(top.partition(".")[2]))
    value = Fraction(top) + unit * int(repeat) / (10 ** len(repeat) - 1)
    value = int(match["whole"] or 0) + value / Fraction(under)
    value *= Fraction(10) ** int(match["exponent"] or 0)
    return -value if match["sign"] or match["minus"] else value


def with_slashes(text: str) -> str:
    r"""Write the \frac of two numbers as 3/4."""
    text = re.sub(r"(?<=[0-9])(?=\\frac)", " ", text)
    part = r"(?:\{(-?[0-9.]+)\}|([0-9]))"
    return re.sub(rf"\\frac\s*{part}\s*{part}", r"\1\2/\3\4 ", text)


def quantity(text: str) -> Fraction | None:
    """Return the value of a text that is a number with at most a unit, or equal to one; of any
    other None."""
    text = re.sub(r"\\text\{([^{}]*)\}(?=.*=)", r"\1", with_slashes(" ".join(text.split())))
    *left, right = re.sub(r"\$(?!-?[0-9.])", "", text).split("=")
    if re.fullmatch(r"\s*[a-zA-Z]\s*", right) and left:  # 5 = x
        *left, right = right, *left
    match = QUANTITY.fullmatch(re.sub(r"^[ *:]+|(?<![.])\.?[ ,:*]*$", "", right))
    if not match or not all(re.fullmatch(SUM, part) for part in left[1:]):
        return None
    if left and not re.fullmatch(rf"{NAME}|{SUM}", left[0]):
        return None
    words = match["words"] or re.sub(r"\b\w\b", "", match["text"] or "")  # \text{ m}
    return None if re.search(NO_UNIT, words) else number_of(match)


def number_in_prose(text: str) -> Fraction | None:
    """Return the last number of a text, or None if it is part of an expression."""
    text = with_slashes(text)
    found = [*NUMBER_IN_PROSE.finditer(text)]
    if not found:
        return None
    start, end = found[-1].span()
    word = re.match(r"\s*(?:\\text\{\s*)?(?:[^\W\d_]{2,})?", text[end:])[0]
    part = re.search(BEFORE, text[max(0, start - 20) : start]) or re.match(AFTER, text[end:])
    return None if part or re.search(NO_UNIT, word) else number_of(found[-1])


def final_answer(text: str) -> tuple[str, Fraction | None]:
    r"""Return what a text marks as its answer, or "", and the number that it comes to, or None if
    there is none or it cannot be judged.

    The mark is the last \boxed{} or the last ####, and its content must be a number, perhaps with
    a unit; or the last "answer is". Else the number is the last one in the text. 5 % is 5."""
    for tex, plain in TEX.items():
        text = text.replace(tex, plain)
    _, box, after = text.rpartition(r"\boxed")
    marked = re.findall(HASHES, text)[-1:]
    if box:
        marked = [in_braces(after)]
    if marked:
        return marked[0], quantity(marked[0])
    text = re.sub(r"(?<![\w)])\*\*|\*\*(?![\w(])", " ", text)  # bold, and no power
    said = (re.findall(ANSWER_IS, text) or [""])[-1]
    if re.fullmatch(r"\W*(?:below|here|as follows|this)?\W*", said):
        prose = re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{3}", text)
        value = quantity(text)
        return "", number_in_prose(text) if value is None and prose else value
    parts = [said, re.split(REASON, said)[0]]
    values = [value for part in parts if (value := quantity(part)) is not None]
    if len(NUMBER_IN_PROSE.findall(said)) == 1:
        values.append(number_in_prose(said))
    return said, [*values, None][0]


def in_braces(text: str) -> str:
    """Return what is between the first brace and the one that closes it; "" if none does."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[1:i].strip()
    return ""


def same_number(a: str | Fraction | float | None, b: str | Fraction | float | None) -> bool | None:
    """Return whether two answers, or numbers, come to the same, up to a millionth; answers that
    are no numbers, whether they are the same texts. None: that cannot be judged."""
    (said, x), (other, y) = (final_answer(v) if isinstance(v, str) else ("", v) for v in (a, b))
    if x is not None and y is not None:
        return abs(x - y) * 10**6 <= max(abs(x), abs(y))
    if x is None and y is None and plain_math(said or str(a)) == plain_math(other or str(b)):
        return True if said or other else None
    readable = all(v is not None and re.search("[0-9]", str(v)) for v in (a, b))
    return None if readable else False


def plain_math(text: str) -> str:
    """Return a formula without blanks and braces that mean nothing."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", " ".join(text.split()))
    text = re.sub(r" ?([^\w ]) ?|(?<=[a-z]) (?=[0-9])", r"\1", text).strip(" .$")
    return re.sub(r"\{(\w)\}", r"\1", text)


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
    off); without blocks it is the whole text, if that is a program."""
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
    command = [sys.executable, "-s", "-P", "-B", "-u", os.path.abspath(guard.__file__)]
    place = dict(cwd=folder, env=environment | {"TMPDIR": folder}, start_new_session=True)
    streams = dict(stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT)
    process = subprocess.Popen(command, **place, **streams)
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
    recipes/guard.py lists what is stopped and what is not."""
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
