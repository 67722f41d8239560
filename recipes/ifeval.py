"""Define IFEval's 25 kinds of verifiable instructions (arXiv 2311.07911): sentence for the prompt,
arguments with what they are drawn from, and check of an answer.

Names and arguments are IFEval's, so that its own verifiers can mark the same answers. The wording
is ours, and nothing is drawn while an answer is marked. recipes/verify.py draws and marks.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

# No word contains another, uses j, q, x or z, or occurs in ENDINGS.
WORDS = """
    river market garden winter bridge letter island morning engine village mountain kitchen library
    captain harbor forest silver window planet doctor teacher summer history machine"""
KEYWORDS = WORDS.split()
ENDINGS = ("That is all for now.", "Ask me again any time.", "I hope that helps!", "Over to you.")
POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
VERDICTS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

# languages that are told by common words, and those told by letters that no other one of them has
BY_WORDS = {
    "en": ("English", "the and of to is that it with for was are this you be have not from"),
    "de": ("German", "der die und das ist nicht ein eine mit zu den auf für es sich von sind"),
    "fr": ("French", "le la les et des est une un dans que pour qui pas sur au avec sont du"),
    "es": ("Spanish", "el la los y de que es en una un por con para las se no del como"),
    "it": ("Italian", "il la di che è e un una per non con sono gli della le si nel più"),
    "pt": ("Portuguese", "o a os que é em um uma para com não do da as se no na mais"),
    "nl": ("Dutch", "de het een en van is dat niet op te zijn voor met er aan ook die"),
}
BY_LETTERS = {
    "ru": ("Russian", "[а-яё]"),
    "el": ("Greek", "[α-ωά-ώ]"),
    "ar": ("Arabic", "[ء-ي]"),
    "hi": ("Hindi", "[ऀ-ॿ]"),
    "ko": ("Korean", "[가-힣]"),
    "ja": ("Japanese", "[ぁ-ヿ]"),
    "zh": ("Chinese", "[一-鿿]"),
}
LANGUAGES = {code: name for code, (name, _) in (BY_WORDS | BY_LETTERS).items()}


def language_of(text: str) -> str | None:
    """Return the code of a text's language; None if that is unclear."""
    text = text.lower()
    counts = {code: len(re.findall(letters, text)) for code, (_, letters) in BY_LETTERS.items()}
    if counts["ja"] * 10 > counts["zh"]:  # kana between the characters
        counts["ja"] += counts.pop("zh")
    code = max(counts, key=counts.get)
    if counts[code] * 2 > sum(map(str.isalpha, text)):
        return code
    words = Counter(re.findall(r"[^\W\d_]+", text))
    hits = Counter()
    for code, (_, common) in BY_WORDS.items():
        hits[code] = sum(words[word] for word in common.split())
    (first, most), (_, second) = hits.most_common(2)
    return first if most > max(second, words.total() / 12) else None


def parts_between(marks: str, text: str) -> list[str]:
    """Return a text's parts between marks; none if one is empty, but before the first and last."""
    parts = [part.strip() for part in re.split(marks, text)]
    inner = parts[not parts[0] : len(parts) - (not parts[-1])]
    return inner if all(inner) else []


class Closed(tuple):
    """Choices for an argument that takes no other value."""


class Words(int):
    """Number of words to draw for an argument; no other instruction of the prompt uses them."""


class DependsOn(NamedTuple):
    """Choices for an argument by the value of another one, which is drawn before."""

    argument: str
    choices: dict[Any, Sequence[Any]]


class Kind(NamedTuple):
    text: str  # the sentence for the prompt, with arguments in braces
    arguments: dict[str, Any]  # choices for each, in the order in which they are drawn
    check: Callable[..., Any]  # of an answer and of the arguments by their names: is it followed?
    only_with: Collection[str] | None  # kinds that it goes with; None: all


KINDS: dict[str, Kind] = {}  # a seed draws from them in the order of their definition
RELATIONS = Closed(("less than", "at least"))
REPEAT = "combination:repeat_prompt"
# kinds that go with any language: no English words, and neither words nor letters are counted
ANY_LANGUAGE = {
    "length_constraints:number_sentences",
    "length_constraints:number_paragraphs",
    "detectable_content:number_placeholders",
    "detectable_content:postscript",
    "detectable_format:number_bullet_lists",
    "detectable_format:number_highlighted_sections",
    "detectable_format:title",
    "punctuation:no_comma",
    "startend:quotation",
}
# groups of kinds of which one excludes the others
EXCLUSIVE = (
    {"length_constraints:number_paragraphs", "length_constraints:nth_paragraph_first_word"},
    {
        "change_case:capital_word_frequency",
        "change_case:english_capital",
        "change_case:english_lowercase",
        "detectable_format:multiple_sections",
    },
)


def compatible(a: str, b: str) -> bool:
    """Return whether one answer can follow instructions of both kinds, whatever their arguments."""
    if a == b or any({a, b} <= group for group in EXCLUSIVE):
        return False
    partners = [(KINDS[a].only_with, b), (KINDS[b].only_with, a)]
    return all(allowed is None or other in allowed for allowed, other in partners)


def instruction(
    kind: str, text: str, only_with: Collection[str] | None = None, **arguments: Any
) -> Callable:
    """Register the decorated function as the check of a kind of instruction."""

    def register(check: Callable[..., Any]) -> Callable[..., Any]:
        KINDS[kind] = Kind(text, arguments, check, only_with)
        return check

    return register


def bounded(relation: str, number: str, less: Sequence[int], least: Sequence[int]) -> dict:
    """Return the choices for two arguments: how a number bounds a count, and the number."""
    bounds = DependsOn(relation, {"less than": less, "at least": least})
    return {relation: RELATIONS, number: bounds}


def within(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


@instruction("keywords:existence", "Use each of these words: {keywords}.", keywords=Words(2))
def existence(answer: str, keywords: list[str]) -> bool:
    return all(word.lower() in answer.lower() for word in keywords)


@instruction(
    "keywords:frequency",
    'Use the word "{keyword}" {relation} {frequency} times.',
    **bounded("relation", "frequency", less=(2, 3), least=(2, 3)),
    keyword=Words(1),
)
def word_frequency(answer: str, relation: str, frequency: int, keyword: str) -> bool:
    return within(answer.lower().count(keyword.lower()), relation, frequency)


@instruction(
    "keywords:forbidden_words",
    "Do without these words: {forbidden_words}.",
    forbidden_words=Words(2),
)
def without_words(answer: str, forbidden_words: list[str]) -> bool:
    pattern = "|".join(map(re.escape, forbidden_words))
    return not re.search(rf"(?i)\b({pattern})\b", answer)


@instruction(
    "keywords:letter_frequency",
    'Use the letter "{letter}" {let_relation} {let_frequency} times in all.',
    **bounded("let_relation", "let_frequency", less=range(1, 5), least=range(5, 30)),
    letter=DependsOn("let_relation", {"less than": "jqxz", "at least": "etaoinsr"}),
)
def letter_frequency(answer: str, let_relation: str, let_frequency: int, letter: str) -> bool:
    return within(answer.lower().count(letter.lower()), let_relation, let_frequency)


@instruction(
    "language:response_language",
    "Answer in {language} and in no other language.",
    only_with=ANY_LANGUAGE,
    language=Closed(LANGUAGES),
)
def response_language(answer: str, language: str) -> bool:
    return language_of(answer) == language


@instruction(
    "length_constraints:number_sentences",
    "Write {relation} {num_sentences} sentences.",
    **bounded("relation", "num_sentences", less=range(6, 16), least=range(3, 13)),
)
def number_sentences(answer: str, relation: str, num_sentences: int) -> bool:
    """Count the ends of sentences, and a last one without.

    The end of a line is none, nor is the dot of a list's number, an initial or an abbreviation."""
    short = r"(?:\d{1,3}|[a-z]|(?:[a-z]\.){1,3}[a-z]|mr|mrs|ms|dr|prof|st|vs|etc|no|jr)\."
    text = re.sub(r"(?m)^[ \t]*[-*•]\s", "", answer)
    text = re.sub(rf"(?i)(?<!\w){short}(?=\s+\S)", "", text)
    parts = re.split(r"[.!?]+[\"”’')\]*_]*(?=\s|$)|[。！？]+[」』”]*", text)
    return within(sum(bool(re.search(r"\w", part)) for part in parts), relation, num_sentences)


@instruction(
    "length_constraints:number_paragraphs",
    "Write exactly {num_paragraphs} paragraphs, with a line of *** between any two of them.",
    num_paragraphs=range(2, 6),
)
def number_paragraphs(answer: str, num_paragraphs: int) -> bool:
    return len(parts_between(r"\s?\*\*\*\s?", answer)) == num_paragraphs


@instruction(
    "length_constraints:number_words",
    "Write {relation} {num_words} words.",
    **bounded("relation", "num_words", less=range(200, 500, 10), least=range(50, 350, 10)),
)
def number_words(answer: str, relation: str, num_words: int) -> bool:
    return within(len(re.findall(r"\w+", answer)), relation, num_words)


@instruction(
    "length_constraints:nth_paragraph_first_word",
    "Write exactly {num_paragraphs} paragraphs, with an empty line between any two of them and "
    'nowhere else, and begin paragraph {nth_paragraph} with the word "{first_word}".',
    num_paragraphs=range(2, 6),
    nth_paragraph=DependsOn("num_paragraphs", {n: range(1, n + 1) for n in range(2, 6)}),
    first_word=Words(1),
)
def paragraph_begins(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = answer.split("\n\n")
    if nth_paragraph > len(parts) or sum(bool(part.strip()) for part in parts) != num_paragraphs:
        return False
    begins = rf"(?i)\s*'*\"*{re.escape(first_word)}(?![^\s.,?!'\"])"
    return bool(re.match(begins, parts[nth_paragraph - 1]))


@instruction(
    "detectable_content:number_placeholders",
    "Leave {num_placeholders} or more gaps to be filled in, in square brackets, as in [name].",
    num_placeholders=range(1, 5),
)
def number_placeholders(answer: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


@instruction(
    "detectable_content:postscript",
    "Close with a postscript that begins with {postscript_marker}",
    postscript_marker=Closed(POSTSCRIPTS),
)
def postscript(answer: str, postscript_marker: str) -> bool:
    return bool(re.search(POSTSCRIPTS[postscript_marker], answer.lower()))


@instruction(
    "detectable_format:number_bullet_lists",
    "Include exactly {num_bullets} bullet points, each a line that begins with * and a space.",
    num_bullets=range(2, 6),
)
def number_bullets(answer: str, num_bullets: int) -> bool:
    return len(re.findall(r"(?m)^[^\S\n]*(?:\*[^*]|-).*$", answer)) == num_bullets


@instruction(
    "detectable_format:constrained_response",
    "Choose your answer among these: " + " ".join(VERDICTS),
    only_with=set(),
)
def constrained_response(answer: str) -> bool:
    return any(verdict in answer for verdict in VERDICTS)


@instruction(
    "detectable_format:number_highlighted_sections",
    "Emphasise {num_highlights} or more passages by asterisks, *like this*.",
    num_highlights=range(1, 5),
)
def number_highlights(answer: str, num_highlights: int) -> bool:
    marked = re.findall(r"\*[^\n*]*\*", answer) + re.findall(r"\*\*[^\n*]*\*\*", answer)
    return sum(bool(mark.strip("*").strip()) for mark in marked) >= num_highlights


@instruction(
    "detectable_format:multiple_sections",
    "Divide your answer into {num_sections} or more sections, headed {section_spliter} 1, "
    "{section_spliter} 2 and so on.",
    section_spliter=("Section", "SECTION"),
    num_sections=range(2, 6),
)
def multiple_sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", answer)) >= num_sections


@instruction(
    "detectable_format:json_format",
    "Give the whole answer as JSON, in a code block if you like.",
    only_with={"keywords:existence", "keywords:forbidden_words"},
)
def json_format(answer: str) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(re.sub(r"^```(?:json|Json|JSON)?|```$", "", answer.strip()).strip())
        return True
    return False


@instruction(
    "detectable_format:title",
    "Give your answer a title in double angle brackets, as in <<my day>>.",
)
def title(answer: str) -> bool:
    return any(found.strip("<> \t") for found in re.findall(r"<<[^\n]+>>", answer))


@instruction(
    "combination:two_responses",
    "Give two different answers and nothing else, with ****** (six asterisks) between them.",
    only_with={
        "keywords:existence",
        "keywords:forbidden_words",
        "detectable_format:title",
        "punctuation:no_comma",
    },
)
def two_responses(answer: str) -> bool:
    parts = parts_between(r"\*{6}", answer)
    return len(parts) == 2 and parts[0] != parts[1]


@instruction(
    REPEAT,
    "Before you answer, repeat the request above this sentence word for word, with nothing "
    "before it.",
    only_with={"keywords:existence", "detectable_format:title"},
    prompt_to_repeat=(),  # the prompt itself
)
def repeat_prompt(answer: str, prompt_to_repeat: str) -> bool:
    request = prompt_to_repeat.strip().lower()
    return bool(request) and answer.strip().lower().startswith(request)


@instruction(
    "startend:end_checker",
    'End with the words "{end_phrase}" and nothing after them.',
    end_phrase=ENDINGS,
)
def end_checker(answer: str, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@instruction(
    "change_case:capital_word_frequency",
    "Use words in capital letters {capital_relation} {capital_frequency} times.",
    **bounded("capital_relation", "capital_frequency", less=range(4, 12), least=range(2, 12)),
)
def capital_words(answer: str, capital_relation: str, capital_frequency: int) -> bool:
    count = sum(map(str.isupper, re.findall(r"[^\W_]+(?:[-.][^\W_]+)*", answer)))
    return within(count, capital_relation, capital_frequency)


@instruction("change_case:english_capital", "Answer in English, in capital letters alone.")
def english_capital(answer: str) -> bool:
    return answer.isupper() and language_of(answer) == "en"


@instruction(
    "change_case:english_lowercase",
    "Answer in English, in small letters alone, without any capital.",
)
def english_lowercase(answer: str) -> bool:
    return answer.islower() and language_of(answer) == "en"


@instruction("punctuation:no_comma", "Do without commas.")
def no_comma(answer: str) -> bool:
    return "," not in answer


@instruction("startend:quotation", "Put your whole answer in double quotation marks.")
def quotation(answer: str) -> bool:
    return bool(re.fullmatch(r'(?s)".*"', answer.strip()))
