"""Text tools of the recipes: lists in an answer, duplicates, decontamination, verifiable
instructions, numbers, and code that is run to judge it."""

import ast
import contextlib
import html
import inspect
import itertools
import json
import logging
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from data import BadDocument, json_object, numbered_lines

log = logging.getLogger("nemotron4")


# ---- lists in a model's answer -------------------------------------------------------------------

LABEL = r"(?:Q|Question|(?:Sub)?[Tt]opic|Item|Idea|Prompt|Problem|Task|Exercise|Step|No\.)"
MARK = re.compile(
    rf"""(?P<indent>[ ]*)(?:>\s?)*(?:\#+\s+)?(?P<bold>\*\*|__)?(?:
    (?P<digit>\(?\d{{1,3}}[.)](?!\d)|\[\d{{1,3}}\](?!\()|\d{{1,3}}:(?!\d)|\d{{1,3}}[ ]?[-–—](?=\s)
        |\#\d{{1,3}}\b[.:)]?|[①-⑳]|\d\ufe0f?\u20e3
        |{LABEL}[ ]?\#?\d{{1,3}}[ ]?(?:[.:)]|[-–—](?=\s)))
    |(?P<letter>\(?(?:[a-zA-Z]|[ivxIVX]{{2,5}})[.)](?=\s))
    |(?P<bullet>[-*+•–—▪◦‣●○■✓✔✅➤►→⁃·🔹🔸]\ufe0f?(?=\s|$)(?:[ ]\[[ xX]\])?|[-•▪●](?=[^\W\d]|["“]))
    )(?P<close>\*\*|__)?\s*(?P<text>.*)""",
    re.VERBOSE,
)
HEADING = r"#+\s+(\S.*)|(\*\*|__)((?:(?!\2).)+)\2:?"
INTRO = (
    r"(?i:(sure|certainly|of course|absolutely|ok(ay)?|great)([,.!].*)?|here (are|is)\b.*[.!]|.*:)"
)
OUTRO = (
    r"(?i:(let me know|i hope|hope th(is|at)|feel free|these (are|\w+ (are|should))|note( that|:)"
    r"|good luck|i can also|(would you like|do you want) (me|more|any)|\(?please (let|note|feel)"
    r"|if you([’']d| need| want| have any)|enjoy( th(is|ese)|!)|happy \w+ing)(?!\w).*)"
)
REFUSAL = (
    r"(?i:sorry|unfortunately|as an ai|i([’']m| am) (sorry|afraid|unable|not able)"
    r"|i (can[’']?t|cannot|do not|don[’']?t|won[’']?t)\b)"
)
END = re.compile(rf"{HEADING}|[-=*_]{{3,}}|{OUTRO}")  # of an item, where not indented
QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`", "„": "“", "「": "」"}


def parse_list(text: str) -> list[str]:
    """The items of a list in a model's answer, in whatever shape it came; [] if there is none, and
    a model is to be asked again. Nothing is typed ("1984", "Yes" and "a: b" stay texts), and no
    word is in an item that is not in the answer."""
    text = re.sub(r"(?s)^.*</think>", "", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = re.sub("[\0\ufeff\u200b\u2060]", "", text).replace("\u00a0", " ").expandtabs(4)
    if not (items := json_items(text)):
        text = fenced_lines(table_lines(html_lines(text)))
        lines = [part for line in text.split("\n") for part in one_item_a_line(line)]
        items = marked_items(lines) or plain_items(lines)
    items = [item for item in map(clean_item, items) if re.search(r"\w", item)]
    key = re.match(r"([a-z_]+): ", items[0]) if len(items) > 1 else None
    if key and all(item.startswith(key[0]) for item in items):  # a YAML list of mappings
        items = [clean_item(item.removeprefix(key[0])) for item in items]
    return items


def json_items(text: str) -> list[str]:
    """Of a JSON or Python list that ends a line: an array of texts or of objects with a text, or an
    object with a list or with numbered texts."""
    as_json = partial(json.loads, parse_float=str, parse_int=str, parse_constant=str)
    readers = (as_json, ast.literal_eval)  # this for single quotes and a comma after the last item
    starts = [m.end() - 1 for m in re.finditer(r"(?m)^[ >]*[\[{]|(?<=[:=]) *\[", text)]
    ends = [m.end() for m in re.finditer(r"(?m)[\]}](?=[ ;.`]*$)", text)]
    # each try may read the whole text
    for start, end, read in itertools.product(starts[:8], ends[:-3:-1], readers):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            if items := texts_of(read(text[start:end])):
                return items
    return []


def texts_of(value: Any) -> list[str]:
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        numbered = all(re.search(r"\d$", str(k)) for k in value)
        value = lists[0] if len(lists) == 1 else [*value.values()] if numbered else []
    items = []
    for item in value if isinstance(value, list) else []:
        if isinstance(item, dict):
            item = ": ".join(v for v in item.values() if isinstance(v, str) and not v.isdigit())
        items += [str(item)] if isinstance(item, str | int | float) else []
    return items


def html_lines(text: str) -> str:
    """<li> as bullets, indented by their depth; other tags left out."""
    depth = 0

    def as_text(tag: re.Match[str]) -> str:
        nonlocal depth
        name = (tag[1] or "").lower()
        depth = max(0, depth + {"<ul": 1, "<ol": 1, "</ul": -1, "</ol": -1}.get(name, 0))
        if name == "<li":
            return "\n" + "    " * (depth - 1) + "- "
        return "" if not name else " " if depth else "\n\n"

    if not re.search(r"(?i)<li\b", text):
        return text
    tags = r"(?i)\s*(</?(?:ul|ol|li|p|br|div|h[1-3]))\b[^<>]*>\s*|</?\w[^<>]*>"
    return html.unescape(re.sub(tags, as_text, text))


def table_lines(text: str) -> str:
    """A table's rows as "- cell: cell", without its header and cells with a number."""

    def rows(table: re.Match[str]) -> str:
        out = ""
        for line in table[1].splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            words = [cell for cell in cells if cell and not re.fullmatch(r"#?\d+[.)]?", cell)]
            out += "- " + ": ".join(words or cells) + "\n"
        return out

    return re.sub(r"(?m)^[^|\n]*\|.*\n(?=.*-)[ |:-]+\n((?:[^|\n]*\|.*(?:\n|\Z))*)", rows, text)


def fenced_lines(text: str) -> str:
    """What is in the only fence, where no item is outside; else what is in a fence as one line that
    begins with a \0, and its line ends as more of them."""
    parts = re.split(r"(?m)^ *(?:```|~~~).*\n?", text)  # outside, inside, outside, …
    if len(parts) in (2, 3) and not any(map(MARK.fullmatch, "\n".join(parts[::2]).split("\n"))):
        return textwrap.dedent(parts[1])
    parts[1::2] = ["\0" + part.rstrip("\n").replace("\n", "\0") + "\n" for part in parts[1::2]]
    return "".join(parts)


def one_item_a_line(line: str) -> list[str]:
    """Where 1. … 2. …, or • … • …, are on one."""
    starts = []
    for match in re.finditer(r"(?:^|(?<=\s))\(?(\d{1,3})[.)]\s", line):
        starts += [match.start()] if int(match[1]) == len(starts) + 1 else []
    if len(starts) < 2:
        starts = [match.start() for match in re.finditer(r"(?:^|(?<=\s))[•▪●]", line)]
    if len(starts) < 2:
        return [line.rstrip()]
    parts = (line[a:b] for a, b in itertools.pairwise([0, *starts, None]))
    return [part for part in parts if part.strip()]


def marked_items(lines: list[str]) -> list[str]:
    """Items with marks like the first one's, each with its further lines and what is below it."""
    blocks: list[list[str]] = []
    first = None  # its style and indent
    for line in lines:
        mark = MARK.fullmatch(line)
        style = mark and next(s for s in ("digit", "letter", "bullet") if mark[s])
        if mark and (not first or style == first[0] and len(mark["indent"]) < first[1] + 2):
            first = first or (style, len(mark["indent"]))
            opened = mark["bold"] if mark["bold"] and not mark["close"] else ""
            blocks.append([opened + mark["text"].strip()])
        elif blocks:
            blocks[-1].append(line)
    if not first:
        return []
    items, below = zip(*map(item_of, blocks), strict=True)
    if sum(map(bool, below[:-1])) * 2 < len(items) or len(items) == 1:
        below = (*below[:-1], "")  # these are the answer's last words
    return list(map(joined, items, below))


def item_of(block: list[str]) -> tuple[str, str]:
    """(an item, the paragraphs below it that are not indented), up to a heading or last words."""
    item, below, blank = block[0], "", False
    for line in block[1:]:
        text = line.strip()
        flush = item and text and not line.startswith(" ")
        if text.startswith("\0"):
            item += text
        elif mark := MARK.fullmatch(line):
            item += ("" if re.search(r"[.:;,?!]\W*$", item) else ";") + " " + mark["text"].strip()
        elif flush and (END.fullmatch(text) or blank and text.endswith(":")):
            break
        elif flush and blank:
            below = f"{below} {text}".strip()
        else:
            item = joined(item, text)
        blank = not text
    return item, below


def joined(first: str, more: str) -> str:
    """Two lines of an item; a bold one is a title."""
    title = re.fullmatch(r"(\*\*|__)(.+?)\1", first)
    if title and more:
        first = title[2] + ("" if title[2][-1] in ".:?!" else ":")
    return f"{first} {more}".strip()


def plain_items(lines: list[str]) -> list[str]:
    """Items without marks: below headings, one a paragraph, one a line, or between commas."""
    text = re.sub(r"\n\n+", "\n\n", "\n".join(map(str.strip, lines)).strip())
    text = re.sub(rf"^{INTRO}\n+|(\n\n?{OUTRO}|\n\n{OUTRO}(\n.+)+)+$", "", text)
    bullets = re.sub(rf"(?m)^(?:{HEADING})$", r"- **\1\3**", text)
    bare = re.search(r"(?m)^- \*\*.*(\n+- \*\*|\Z)", bullets)
    if len(re.findall(r"(?m)^- \*\*", bullets)) > 1 and not bare:
        return marked_items(bullets.split("\n"))
    if "\n" not in text:
        return comma_items(text)
    paragraphs = text.split("\n\n")
    if len(paragraphs) > 1 and all("\n" in paragraph for paragraph in paragraphs):
        items = [paragraph.replace("\n", " ") for paragraph in paragraphs]
    else:
        wrapped = r"(?m)^(.{50,}[^.?!:;,\"\n])\n(?=[a-zß-ÿа-я])"
        items = [line for line in re.sub(wrapped, r"\1 ", text).split("\n") if line]
    prose = sum(len(re.findall(r"[.?!](?=\s|$)", item)) > 2 for item in items) * 2 > len(items)
    return [] if prose or re.match(REFUSAL, text) else items


def comma_items(line: str) -> list[str]:
    intro, _, rest = line.partition(":")
    line = " ".join((rest if rest and len(intro.split()) > 2 else line).split())
    parts = [part.rstrip(".") for part in re.split(r" ?[;；,，、] ?| \| ", line) if part]
    parts = [re.sub(r"^(and|or|&) ", "", part) for part in parts]
    short = all(len(part.split()) < 8 and not re.search(r"[.?!] ", part) for part in parts)
    talk = re.match(rf"{REFUSAL}|(?i:(i|i[’']m|yes|no|well|as)\b)", line)
    return parts if len(parts) > 2 and short and not talk else []


def clean_item(item: str) -> str:
    """Without the marks around it or its title: emphasis, quotes, a separator, YAML's | and >."""
    item, before = item.replace("\0", "\n") if "\0" in item else " ".join(item.split()), None
    while item != before:
        before = item = item.strip()
        item = re.sub(r"^[|>][-+]? |<br ?/?>$|\\$", "", item)
        item = re.sub(r"^(\*\*|__)(?=\S)(.+?)\1(?!\w)", r"\2", item)
        item = re.sub(r"^([*_])(?=[^\s*_])([^*_]+)\1$", r"\2", item)
        item = re.sub(r"(?<=[\"'”’`])[,;]$", "", item)
        close, inside = QUOTES.get(item[:1]), item[1:-1]
        if len(item) > 2 and close == item[-1]:
            bare = re.sub(rf"\\{close}|{close * 2}|(?<=\w)['’](?=\w)", "", inside)
            if close not in bare and item[0] not in bare:
                item = inside.replace("\\" + close, close).replace("''", "'")
    return item


# ---- duplicates and decontamination --------------------------------------------------------------

# between numbers these are operators: "2 - 2" and "2 * 2" are not the same question
OPERATORS = {"-": "−", "*": "×", "/": "÷"}


@cache
def plain_char(char: str) -> str:
    """Marks and control characters become spaces, signs words, apostrophes nothing."""
    kind = unicodedata.category(char)
    if kind in ("Sm", "Sc", "So") or char in "%^":
        return f" {char} "
    return "" if char in "'’" else " " if kind[0] in "PSZC" else char


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces, NFKC; what counts in a sum (+ % $ -3) stays."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    text = re.sub(r"(?<=\d)\s*[-*/]|[-*/](?=\s*\d)", lambda m: OPERATORS[m[0].strip()], text)
    return " ".join("".join(map(plain_char, text)).split())


def shingles(text: str, n: int = 5) -> set[str]:
    """Word n-grams; a shorter text is one."""
    words = text.split()
    return {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def near_duplicates(texts: Sequence[str], threshold: float = 0.7) -> list[tuple[int, float] | None]:
    """For each text the earlier kept one that it repeats most, the first of equals, and the Jaccard
    index of their word 5-grams; None if it is kept. Exact: two such sets share `threshold` of each
    one's grams, so one at least among its rarest 1 - threshold and the next, which alone are looked
    up."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: a Jaccard index, 0 < threshold <= 1")
    grams = [shingles(normalise(text) or text.strip()) for text in texts]
    count = Counter(itertools.chain.from_iterable(grams))
    having = defaultdict(list)  # gram → kept texts that have it among their rarest
    out = []
    for i, own in enumerate(grams):
        by_rarity = sorted(own, key=lambda gram: (count[gram], gram))
        rare = by_rarity[: len(own) - int(threshold * len(own)) + 1]
        near = {j for gram in rare for j in having[gram]}
        best, j = max(((jaccard(own, grams[j]), -j) for j in near), default=(0.0, 0))
        out.append((-j, best) if best >= threshold else None)
        if out[-1] is None:
            for gram in rare:
                having[gram].append(i)
    return out


def strings_in(value: Any) -> list[str]:
    if isinstance(value, list | dict):
        parts = value.values() if isinstance(value, dict) else value
        return [text for part in parts for text in strings_in(part)]
    return [value] if isinstance(value, str) else []


def read_evaluations(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """("FILE:LINE", text) of every text in the JSONL files of evaluation items."""
    out = []
    for where, line in itertools.chain.from_iterable(map(numbered_lines, map(Path, paths))):
        try:
            out += [(where, text) for text in strings_in(json_object(line))]
        except ValueError as e:
            raise e if isinstance(e, BadDocument) else ValueError(f"{where}: {e}") from None
    return out


class Decontaminator:
    """Finds what a text shares with evaluation items: 13 words in a row, or 8 with an item of
    fewer than 13; an item of 4 to 7 words only if it is the whole text."""

    def __init__(self, evaluations: Iterable[tuple[str, str]]) -> None:
        self.sources: dict[str, str] = {}  # n-gram → FILE:LINE
        for where, text in evaluations:
            plain = normalise(text)
            if (n := len(plain.split())) >= 4:
                for gram in shingles(plain, 13 if n >= 13 else 8):
                    self.sources.setdefault(gram, where)

    def evidence(self, text: str) -> str | None:
        """The first hit as FILE:LINE: "the shared n-gram"."""
        words = normalise(text).split()
        places = ((i, n) for i in range(len(words)) for n in (8, 13) if i + n <= len(words))
        grams = [" ".join(words), *(" ".join(words[i : i + n]) for i, n in places)]
        hit = next((gram for gram in grams if gram in self.sources), None)
        return hit and f'{self.sources[hit]}: "{hit}"'


# ---- verifiable instructions ---------------------------------------------------------------------
# IFEval's 25 kinds (arXiv 2311.07911) by its names and with its arguments, so that its own
# verifiers can mark the same answers; the wording is ours, and nothing is drawn while marking.

# none within another, none with the letters j, q, x, z, none in an ending
WORDS = """
    river market garden winter bridge letter island morning engine village mountain kitchen library
    captain harbor forest silver window planet doctor teacher summer history machine"""
KEYWORDS = WORDS.split()
ENDINGS = ("That is all for now.", "Ask me again any time.", "I hope that helps!", "Over to you.")
POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
VERDICTS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
# code: (name, common words, or the letters that only it has among these)
LANGUAGES = {
    "en": ("English", "the and of to is that it with for was are this you be have not from"),
    "de": ("German", "der die und das ist nicht ein eine mit zu den auf für es sich von sind"),
    "fr": ("French", "le la les et des est une un dans que pour qui pas sur au avec sont du"),
    "es": ("Spanish", "el la los y de que es en una un por con para las se no del como"),
    "it": ("Italian", "il la di che è e un una per non con sono gli della le si nel più"),
    "pt": ("Portuguese", "o a os que é em um uma para com não do da as se no na mais"),
    "nl": ("Dutch", "de het een en van is dat niet op te zijn voor met er aan ook die"),
    "ru": ("Russian", "[а-яё]"),
    "el": ("Greek", "[α-ωά-ώ]"),
    "ar": ("Arabic", "[ء-ي]"),
    "hi": ("Hindi", "[ऀ-ॿ]"),
    "ko": ("Korean", "[가-힣]"),
    "ja": ("Japanese", "[ぁ-ヿ]"),
    "zh": ("Chinese", "[一-鿿]"),
}
COMMON = {code: {*words.split()} for code, (_, words) in LANGUAGES.items() if words[0] != "["}
RELATIONS = ("less than", "at least")
# by the last word of an argument's name
CLOSED = {"relation": RELATIONS, "language": LANGUAGES, "marker": POSTSCRIPTS}


def language_of(text: str) -> str | None:
    """A code of LANGUAGES: by script, else by common words; None if neither decides."""
    text = text.lower()
    counts = {c: len(re.findall(LANGUAGES[c][1], text)) for c in LANGUAGES if c not in COMMON}
    if counts["ja"] * 10 > counts["zh"]:  # kana between the characters
        counts["ja"] += counts.pop("zh")
    code = max(counts, key=counts.__getitem__)
    if counts[code] * 2 > sum(map(str.isalpha, text)):
        return code
    words = re.findall(r"[^\W\d_]+", text)
    hits = {code: sum(word in common for word in words) for code, common in COMMON.items()}
    first, second, *_ = sorted(hits, key=hits.__getitem__, reverse=True)
    return first if hits[first] > max(hits[second], len(words) / 12) else None


def enough(n: int, relation: str, least: int) -> bool:
    return n < least if relation == "less than" else n >= least


def count_sentences(text: str) -> int:
    """Ends of sentences, and a last one without; a line's end is none, nor is the dot of a list's
    number, an initial or a common abbreviation."""
    short = r"(?:\d{1,3}|[a-z]|(?:[a-z]\.){1,3}[a-z]|mr|mrs|ms|dr|prof|st|vs|etc|no|jr)\."
    text = re.sub(r"(?m)^[ \t]*[-*•]\s", "", text)
    text = re.sub(rf"(?i)(?<!\w){short}(?=\s+\S)", "", text)
    parts = re.split(r"[.!?]+[\"”’')\]*_]*(?=\s|$)|[。！？]+[」』”]*", text)
    return sum(bool(re.search(r"\w", part)) for part in parts)


def parts_between(marks: str, text: str) -> list[str]:
    """None may be empty but what is outside the first and last mark; else there are no parts."""
    parts = [part.strip() for part in re.split(marks, text)]
    inner = parts[not parts[0] : len(parts) - (not parts[-1])]
    return inner if all(inner) else []


def nth_paragraph(text: str, n: int, nth: int, first_word: str) -> bool:
    parts = text.split("\n\n")
    begins = rf"(?i)\s*'*\"*{re.escape(first_word)}(?![^\s.,?!'\"])"
    right = nth <= len(parts) and re.match(begins, parts[nth - 1])
    return bool(right) and sum(bool(part.strip()) for part in parts) == n


def count_highlights(text: str) -> int:
    marked = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(mark.strip("*").strip()) for mark in marked)


def count_capital_words(text: str) -> int:
    return sum(map(str.isupper, re.findall(r"[^\W_]+(?:[-.][^\W_]+)*", text)))


def is_json(text: str) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(re.sub(r"^```(?:json|Json|JSON)?|```$", "", text.strip()).strip())
        return True
    return False


class Kind(NamedTuple):
    args: dict[str, Any]
    """What each is drawn from: a sequence, a dict of sequences by the first argument's value, or
    a number of words that no other instruction has. Such that all other kinds can be followed."""
    text: str
    """Asks for it."""
    met: Callable[..., bool]
    """Whether an answer follows it: of the answer and the arguments in their order."""


def bounded(n: str, less: Sequence[int], least: Sequence[int], of: str = "") -> dict[str, Any]:
    """Arguments: how a number bounds, and which it is."""
    return {f"{of}relation": RELATIONS, n: dict(zip(RELATIONS, (less, least), strict=True))}


REPEAT = "combination:repeat_prompt"
# fmt: off
KINDS: dict[str, Kind] = {
    "keywords:existence": Kind({"keywords": 2}, "Use each of these words: {keywords}.",
        lambda t, words: all(word.lower() in t.lower() for word in words)),
    "keywords:frequency": Kind({**bounded("frequency", (2, 3), (2, 3)), "keyword": 1},
        'Use the word "{keyword}" {relation} {frequency} times.',
        lambda t, relation, n, word: enough(t.lower().count(word.lower()), relation, n)),
    "keywords:forbidden_words": Kind({"forbidden_words": 2},
        "Do without these words: {forbidden_words}.",
        lambda t, words: not re.search(rf"(?i)\b({'|'.join(map(re.escape, words))})\b", t)),
    "keywords:letter_frequency": Kind(
        {**bounded("let_frequency", range(1, 5), range(5, 30), "let_"),
         "letter": {"less than": "jqxz", "at least": "etaoinsr"}},
        'Use the letter "{letter}" {let_relation} {let_frequency} times in all.',
        lambda t, relation, n, letter: enough(t.lower().count(letter.lower()), relation, n)),
    "language:response_language": Kind({"language": [*LANGUAGES]},
        "Answer in {language} and in no other language.",
        lambda t, language: language_of(t) == language),
    "length_constraints:number_sentences": Kind(
        bounded("num_sentences", range(6, 16), range(3, 13)),
        "Write {relation} {num_sentences} sentences.",
        lambda t, relation, n: enough(count_sentences(t), relation, n)),
    "length_constraints:number_paragraphs": Kind({"num_paragraphs": range(2, 6)},
        "Write exactly {num_paragraphs} paragraphs, with a line of *** between any two of them.",
        lambda t, n: len(parts_between(r"\s?\*\*\*\s?", t)) == n),
    "length_constraints:number_words": Kind(
        bounded("num_words", range(200, 500, 10), range(50, 350, 10)),
        "Write {relation} {num_words} words.",
        lambda t, relation, n: enough(len(re.findall(r"\w+", t)), relation, n)),
    "length_constraints:nth_paragraph_first_word": Kind(
        {"num_paragraphs": range(2, 6), "nth_paragraph": {n: range(1, n + 1) for n in range(2, 6)},
         "first_word": 1},
        "Write exactly {num_paragraphs} paragraphs, with an empty line between any two of them and "
        'nowhere else, and begin paragraph {nth_paragraph} with the word "{first_word}".',
        nth_paragraph),
    "detectable_content:number_placeholders": Kind({"num_placeholders": range(1, 5)},
        "Leave {num_placeholders} or more gaps to be filled in, in square brackets, as in [name].",
        lambda t, n: len(re.findall(r"\[.*?\]", t)) >= n),
    "detectable_content:postscript": Kind({"postscript_marker": [*POSTSCRIPTS]},
        "Close with a postscript that begins with {postscript_marker}",
        lambda t, marker: bool(re.search(POSTSCRIPTS[marker], t.lower()))),
    "detectable_format:number_bullet_lists": Kind({"num_bullets": range(2, 6)},
        "Include exactly {num_bullets} bullet points, each a line that begins with * and a space.",
        lambda t, n: len(re.findall(r"(?m)^[^\S\n]*(?:\*[^*]|-).*$", t)) == n),
    "detectable_format:constrained_response": Kind({},
        "Choose your answer among these: " + " ".join(VERDICTS),
        lambda t: any(verdict in t for verdict in VERDICTS)),
    "detectable_format:number_highlighted_sections": Kind({"num_highlights": range(1, 5)},
        "Emphasise {num_highlights} or more passages by asterisks, *like this*.",
        lambda t, n: count_highlights(t) >= n),
    "detectable_format:multiple_sections": Kind(
        {"section_spliter": ("Section", "SECTION"), "num_sections": range(2, 6)},
        "Divide your answer into {num_sections} or more sections, headed {section_spliter} 1, "
        "{section_spliter} 2 and so on.",
        lambda t, name, n: len(re.findall(rf"{re.escape(name)}\s?\d+", t)) >= n),
    "detectable_format:json_format": Kind({},
        "Give the whole answer as JSON, in a code block if you like.", is_json),
    "detectable_format:title": Kind({},
        "Give your answer a title in double angle brackets, as in <<my day>>.",
        lambda t: any(title.strip("<> \t") for title in re.findall(r"<<[^\n]+>>", t))),
    "combination:two_responses": Kind({},
        "Give two different answers and nothing else, with ****** (six asterisks) between them.",
        lambda t: len(parts := parts_between(r"\*{6}", t)) == len({*parts}) == 2),
    REPEAT: Kind({"prompt_to_repeat": ()},
        "Before you answer, repeat the request above this sentence word for word, with nothing "
        "before it.",
        lambda t, prompt: t.strip().lower().startswith(prompt.strip().lower() or "\0")),
    "startend:end_checker": Kind({"end_phrase": ENDINGS},
        'End with the words "{end_phrase}" and nothing after them.',
        lambda t, end: t.strip().strip('"').lower().endswith(end.strip().lower())),
    "change_case:capital_word_frequency": Kind(
        bounded("capital_frequency", range(4, 12), range(2, 12), "capital_"),
        "Use words in capital letters {capital_relation} {capital_frequency} times.",
        lambda t, relation, n: enough(count_capital_words(t), relation, n)),
    "change_case:english_capital": Kind({}, "Answer in English, in capital letters alone.",
        lambda t: t.isupper() and language_of(t) == "en"),
    "change_case:english_lowercase": Kind({},
        "Answer in English, in small letters alone, without any capital.",
        lambda t: t.islower() and language_of(t) == "en"),
    "punctuation:no_comma": Kind({}, "Do without commas.", lambda t: "," not in t),
    "startend:quotation": Kind({}, "Put your whole answer in double quotation marks.",
        lambda t: bool(re.fullmatch(r'(?s)".*"', t.strip()))),
}
# fmt: on

# the kinds that go with few others, and groups of which any two exclude one another
ONLY_WITH = {
    "constrained_response": "",
    "json_format": "existence forbidden_words",
    "two_responses": "existence forbidden_words title no_comma",
    "repeat_prompt": "existence title",
    # nothing with English words, or that counts words or letters
    "response_language": "number_sentences number_paragraphs number_placeholders postscript "
    "number_bullet_lists number_highlighted_sections title no_comma quotation",
}
EXCLUSIVE = (
    {"number_paragraphs", "nth_paragraph_first_word"},
    {"capital_word_frequency", "english_capital", "english_lowercase", "multiple_sections"},
)


def compatible(a: str, b: str) -> bool:
    """Whether one answer can follow instructions of both kinds, whatever their arguments."""
    a, b = (kind.partition(":")[2] for kind in (a, b))
    if a == b or any({a, b} <= group for group in EXCLUSIVE):
        return False
    return b in ONLY_WITH.get(a, b).split() and a in ONLY_WITH.get(b, a).split()


@dataclass(frozen=True)
class Instruction:
    """An instruction that writes itself into a prompt and verifies itself in an answer."""

    kind: str
    args: tuple[tuple[str, Any], ...] = ()
    """IFEval's keyword arguments, lists as tuples."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"instruction {self.kind!r} is none of {[*KINDS]}")
        args, takes = dict(self.args), KINDS[self.kind].args
        if args.keys() - takes or takes.keys() - args - {"prompt_to_repeat"}:
            raise ValueError(f"instruction {self.kind!r} takes arguments {[*takes]}, not {[*args]}")
        for name, value in args.items():
            known = CLOSED.get(name.rpartition("_")[2], [value])
            if value not in known:
                raise ValueError(f"{self.kind}: {name} is {value!r}, not one of {[*known]}")

    @classmethod
    def from_json(cls, obj: dict[str, Any]) -> "Instruction":
        args = {k: tuple(v) if isinstance(v, list) else v for k, v in obj["args"].items()}
        return cls(obj["kind"], tuple(args.items()))

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "args": dict(self.args)}

    @property
    def text(self) -> str:
        """The sentence for the prompt."""
        shown = {k: ", ".join(v) if isinstance(v, tuple) else v for k, v in self.args}
        shown = {k: "fewer than" if v == "less than" else v for k, v in shown.items()}
        if "language" in shown:
            shown["language"] = LANGUAGES[shown["language"]][0]
        return KINDS[self.kind].text.format(**shown)

    def met(self, response: str, prompt: str = "") -> bool:
        """prompt: what an instruction to repeat it means, where it does not say that itself."""
        kind, args = KINDS[self.kind], {"prompt_to_repeat": prompt, **dict(self.args)}
        return kind.met(response, *(args[name] for name in kind.args))


MOST_INSTRUCTIONS = 8


def draw_instructions(rng: random.Random, n: int, prompt: str = "") -> list[Instruction]:
    """n instructions that one answer can follow; without a prompt none asks to repeat it."""
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
    """Takes its words off the list."""
    args: dict[str, Any] = {}
    for name, choices in KINDS[kind].args.items():
        if isinstance(choices, dict):
            choices = choices[next(iter(args.values()))]
        if isinstance(choices, int):
            args[name] = tuple(words.pop() for _ in range(choices)) if choices > 1 else words.pop()
        else:
            args[name] = prompt if kind == REPEAT else rng.choice(choices)
    return Instruction(kind, tuple(args.items()))


# ---- ground truth: numbers and code --------------------------------------------------------------

# what the braces hold, three deep
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NUMBER = re.compile(
    rf"""(?<![\w.)\]])(?:(?P<sign>-)(?=[$0-9.]))?(?:\$\s?)?(?P<minus>-)?
    (?:(?P<whole>[0-9]+)[ -](?=[0-9]+/[0-9]))?(?P<top>{DECIMAL})(?:\s?/\s?(?P<under>{DECIMAL}))?
    (?:e(?P<e>[+-]?[0-9]{{1,3}})(?![0-9])|\s?[×x*]\s?10\^\{{?(?P<ten>-?[0-9]{{1,3}})\}}?)?""",
    re.IGNORECASE | re.VERBOSE,
)
TEX = {"−": "-", "–": "-", r"\times": "×", r"\cdot": "×", r"\$": "$", r"\%": "%", "{,}": ","}
TEX |= {r"\,": "", r"\!": "", r"\;": " ", r"\ ": " ", "**": " ", "⁄": "/"}


def numbers_in(text: str) -> list[Fraction]:
    out = []
    for match in NUMBER.finditer(text):
        if len(match[0]) > 200:
            continue  # a model that got stuck
        top, under = (Fraction((match[k] or "1").replace(",", "")) for k in ("top", "under"))
        if under:
            value = top / under + int(match["whole"] or 0)
            value *= Fraction(10) ** int(match["e"] or match["ten"] or 0)
            out.append(-value if match["sign"] or match["minus"] else value)
    return out


def final_number(text: str) -> Fraction | None:
    r"""The number that an answer comes to: in its last \boxed{}, after its last ####, after its
    last "answer is", else the last in it. 5 % is 5."""
    for tex, plain in TEX.items():
        text = text.replace(tex, plain)
    part = r"(?:\{(-?[0-9.]+)\}|([0-9]))"
    text = re.sub(r"(?<=[0-9])(?=\\[dt]?frac)", " ", text)
    text = re.sub(rf"\\[dt]?frac\s*{part}\s*{part}", r"\1\2/\3\4", text)
    if marked := BOXED.findall(text) or re.findall(r"####\s*([-$.0-9][^\n]*)", text):
        said, otherwise = marked[-1], []
    else:
        after = re.split(r"(?i)\banswer\s*(?:is|:|=)", text)[1:]
        said = re.split(r"\n|[.!?;](?=\s|$)", after[-1].lstrip(" :\n"))[0] if after else ""
        otherwise = numbers_in(text)[-1:]
    values = numbers_in(said.rpartition("=")[2]) or numbers_in(said) or otherwise
    return values[0] if values else None


def same_number(a: str | Fraction | float | None, b: str | Fraction | float | None) -> bool:
    """Whether two answers, or numbers, come to the same, up to a millionth."""
    a, b = (final_number(x) if isinstance(x, str) else x for x in (a, b))
    return a is not None and b is not None and abs(a - b) * 10**6 <= max(abs(a), abs(b))


def compiles(text: str) -> bool:
    """Whether a text is a Python program, not a word that happens to be one."""
    try:
        nodes = [*ast.walk(ast.parse(text))]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    words = ast.Module | ast.Expr | ast.Name | ast.Constant | ast.Load | ast.Tuple | ast.UnaryOp
    return any(not isinstance(node, words | ast.USub | ast.Attribute) for node in nodes)


def extract_code(text: str) -> str | None:
    """The Python in an answer: its blocks marked as such, else those without a mark that compile,
    a last one perhaps cut off; else the whole text if it is a program."""
    pattern = r"(?ms)^[ \t]*(```+|~~~+)[ \t]*([\w+.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1|\Z)"
    blocks = [(m[2].lower(), textwrap.dedent(m[3])) for m in re.finditer(pattern, text)]
    code = [body for name, body in blocks if name in ("python", "py", "python3")]
    code = code or [body for name, body in blocks if not name and compiles(body)]
    if code:
        return "\n\n".join(body.strip("\n") for body in code) + "\n"
    return text if not blocks and compiles(text) else None


class Ran(NamedTuple):
    ok: bool
    reason: str
    """ok: it came to its last line; error: an exception, or a crash; exit: it left before that
    (sys.exit, os._exit); refused, timeout, memory, output: it met that limit."""
    output: str


# The three functions that run_python's child runs: their source is handed over as text, so they
# import for themselves.


def enclose(memory_mib: int, timeout: float) -> None:
    """Namespaces of users, processes and networks of its own, where the kernel allows it: when the
    first process of one ends, all others do. Limits in any case."""
    import ctypes
    import resource

    libc = ctypes.CDLL(None)
    if libc.unshare(0x10000000 | 0x20000000 | 0x40000000) == 0:
        if pid := os.fork():
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255)
        libc.prctl(1, 9)  # killed when its parent is
    limits = {"AS": memory_mib << 20, "CPU": int(timeout) + 2, "FSIZE": 16 << 20, "CORE": 0}
    for name, value in {**limits, "NOFILE": 64}.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def refuse_ways_out() -> type[Exception]:
    """An audit hook; returns what it raises."""
    import _posixsubprocess

    class Refused(PermissionError):
        pass

    def refuse(*args: object) -> None:
        raise Refused("a new process is refused")

    banned = ("socket.", "subprocess.", "ctypes.", "pty.", "resource.", "os.fork", "os.exec")
    banned += ("os.spawn", "os.posix_spawn", "os.system", "os.kill", "signal.pthread_kill")
    paths = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod")
    paths += ("os.chown", "os.truncate", "os.utime", "os.setxattr", "shutil.rmtree")
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    real, isdir, decode, types = os.path.realpath, os.path.isdir, os.fsdecode, str | bytes
    inside = (real(os.getcwd()) + "/", "/dev/null/")

    def hook(event: str, args: tuple) -> None:
        if event.startswith(banned) and (event, args) != ("ctypes.dlopen", (None,)):
            raise Refused(f"{event} is refused")
        changed = args if event in paths else ()
        if event == "open" and (args[2] & writes or args[1] is None and isdir(args[0])):
            changed = args[:1]  # a folder as well, relative to which others could be named
        for path in changed:
            named = isinstance(path, types | os.PathLike)
            if named and not f"{real(decode(path))}/".startswith(inside):
                raise Refused(f"writing to {decode(path)} is refused")

    _posixsubprocess.fork_exec = refuse  # the one way that no audit event is raised for
    sys.addaudithook(hook)
    return Refused


def confined() -> None:
    import linecache
    import traceback
    import types

    job, out = json.load(sys.stdin), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    enclose(job["memory_mib"], job["timeout"])
    main, code, reason = types.ModuleType("__main__"), job["code"], "ok"
    sys.modules["__main__"], sys.argv = main, ["program.py"]
    linecache.cache["program.py"] = (len(code), None, code.splitlines(True), "program.py")
    refused = refuse_ways_out()
    try:
        exec(compile(code, "program.py", "exec"), main.__dict__)
    except SystemExit:
        reason = "exit"
    except BaseException as e:
        reason, cause = "memory" if isinstance(e, MemoryError) else "error", e
        for _ in range(20):
            reason = "refused" if isinstance(cause, refused) else reason
            cause = cause and (cause.__cause__ or cause.__context__)
        with contextlib.suppress(BaseException):
            traceback.print_exception(type(e), e, e.__traceback__.tb_next, limit=20)
    os.write(out, f"{job['seal']}{reason}\n".encode())
    os._exit(0)


def run_python(
    code: str, timeout: float = 5.0, memory_mib: int = 512, output_limit: int = 64_000
) -> Ran:
    """Runs a program in a process of its own, to judge it: nothing on stdin, no environment, stdout
    and stderr as one output, in a temporary folder and writing nowhere else, at most 16 MiB a file;
    no network, no other process. The same program gives the same result; strings hash alike.

    It is no container: limits of the kernel and Python's audit hooks stop what a model may write by
    mistake, not who wants to get out (by native code, or the caller's frames), and it can read what
    we can. The programs of strangers, in numbers, want a virtual machine."""
    if timeout <= 0 or memory_mib < 64 or not 0 <= output_limit < 16 << 20:
        given = f"timeout={timeout}, memory_mib={memory_mib}, output_limit={output_limit}"
        raise ValueError(f"{given}: some time, at least 64 MiB, and output of less than 16 MiB")
    seal = f"\n{secrets.token_hex(16)} "  # before the verdict: a program cannot write its own
    job = dict(code=code, timeout=timeout, memory_mib=memory_mib, seal=seal)
    guard = "\n".join(map(inspect.getsource, (enclose, refuse_ways_out, confined)))
    guard = f"import contextlib, json, os, sys\n{guard}\nconfined()"
    # not -I, which would ignore this environment, and it has no more
    environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1"}
    # a file, not a pipe: who is left behind with its end open is not waited for
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("a+b") as out:
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-B", "-u", "-c", guard],
            cwd=folder,
            env=environment | {"TMPDIR": folder},
            start_new_session=True,
            **dict(stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT),
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(json.dumps(job).encode(), timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait() % 256  # a signal is 256 - its number, as enclose tells it
        out.seek(0)
        output, _, verdict = out.read().partition(seal.encode())
    if len(output) > output_limit:
        reason = "output"
    elif verdict:
        reason = verdict.split()[0].decode()
    else:  # stopped by us or for its CPU time, gone, or crashed
        late = status in (256 - signal.SIGKILL, 256 - signal.SIGXCPU)
        reason = "timeout" if late else "exit" if status < 128 else "error"
    return Ran(reason == "ok", reason, output[:output_limit].decode(errors="replace"))
