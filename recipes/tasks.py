"""Toy tasks for the demo: small computations on digits, whose answers a program writes and marks.

They are asked for as a call (code-like), or in words with instructions on the answer's form. The
program writes answers, right and flawed, and marks any text.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data import aggregate

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGIT = {text: str(i % 10) for i, text in enumerate([*"0123456789", *NUMBERS])}


def in_words(digits: str) -> str:
    return " ".join(NUMBERS[int(digit)] for digit in digits)


# what is asked for: a question about digits, and its result
OPERATIONS: dict[str, tuple[str, Callable[[str], str]]] = {
    "sort": ("Sort {} upwards.", lambda digits: "".join(sorted(digits))),
    "first": ("Give the first digit of {}.", lambda digits: digits[0]),
    "last": ("Give the last digit of {}.", lambda digits: digits[-1]),
    "largest": ("Give the largest digit of {}.", max),
    "smallest": ("Give the smallest digit of {}.", min),
}


class Form(NamedTuple):
    """Hold an instruction on an answer's form, how a result gets it, and how any answer has it."""

    instruction: str
    write: Callable[[str], str]
    pattern: str


# in the order in which several are followed
FORMS = {
    "words": Form("In words.", in_words, r"(?=.*[a-z]{3})[^0-9]+"),
    "brackets": Form("In brackets.", "({})".format, r".*\(.+\).*"),
    "sure": Form("Begin with Sure:", "Sure: {}".format, "Sure:.*"),
    "mark": Form("End with !", "{}!".format, ".*!"),
}
# a wrong digit, another operation's result, an early end, chatter before the answer, an instruction
# ignored or, where there is none, made up
FAULTS = ("slip", "other", "cut", "chatter", "form")
BETWEEN = ("\n", " = ", " gives ", "\nResult:\n", "\nWhat comes out of it is\n")
CHATTER = ("Well, let me see.", "I think it is", "Here you go:")


def pieces(text: str) -> list[str]:
    """Split a text into digits, words and marks."""
    return re.findall(r"[0-9]|[^\W\d]+|[^\w\s]", text)


def digits_of(text: str) -> str:
    """Return all digits of a text, which has them as figures or as words."""
    return "".join(DIGIT.get(piece, "") for piece in pieces(text))


def form_of(text: str) -> set[str]:
    """Return a text's distinct pieces, with one figure and one word in place of all digits."""
    alike = pieces(re.sub("[0-9]", "0", text))
    return {"zero" if piece in NUMBERS else piece for piece in alike}


def write_answer(result: str, instructions: Iterable[str]) -> str:
    """Write a result in the form that instructions ask for."""
    for name, form in FORMS.items():
        if name in instructions:
            result = form.write(result)
    return result


@dataclass(frozen=True)
class Task:
    """Hold what is asked; tell the right answer, and mark any."""

    operation: str
    digits: str
    instructions: tuple[str, ...] = ()
    call: bool = False  # asked for as a call, else in words

    @property
    def prompt(self) -> str:
        if self.call:
            return f"{self.operation}({self.digits})"
        question = OPERATIONS[self.operation][0].format(self.digits)
        return " ".join([question, *(FORMS[name].instruction for name in self.instructions)])

    @property
    def held_out(self) -> bool:
        """Tell whether nothing is trained on it: a tenth of what can be asked, in any wording."""
        return zlib.crc32(f"{self.operation}({self.digits})".encode()) % 10 == 0

    @property
    def result(self) -> str:
        return OPERATIONS[self.operation][1](self.digits)

    @property
    def answer(self) -> str:
        return write_answer(self.result, self.instructions)

    def chat(self, text: str) -> list[dict[str, str]]:
        """Return the prompt and a text as the answer to it."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": text}]

    def right(self, text: str) -> bool:
        return digits_of(text) == self.result

    def met(self, text: str) -> list[bool]:
        """Tell for each instruction whether a text follows it."""
        text = text.strip()
        names = self.instructions
        return [bool(re.fullmatch(FORMS[name].pattern, text, re.DOTALL)) for name in names]

    def labels(self, text: str) -> list[int]:
        """Return ATTRIBUTES of any text as an answer, 0 to 4 each: correctness counts digits in
        place, coherence takes off for pieces that do not belong, complexity counts what is done of
        what is asked."""
        met = sum(self.met(text))
        right = self.right(text)
        digits = digits_of(text)
        same = sum(map(str.__eq__, digits, self.result))
        correct = 4 if right else round(3 * same / max(len(digits), len(self.result)))
        helpful = round(correct * (1 + met) / (1 + len(self.instructions)))
        foreign = form_of(text) - form_of(self.answer)
        coherent = max(0, 4 - len(foreign)) if pieces(text) else 0
        longer = len(pieces(text)) - len(pieces(self.answer))
        return [helpful, correct, coherent, 2 * right + met, min(4, max(0, 1 + longer))]

    def reward(self, text: str) -> float:
        return float(aggregate(self.labels(text)))

    def flawed(self, rng: random.Random, faults: Sequence[str] = FAULTS, n: int = 0) -> str:
        """Return an answer with n of the faults; 0: one, now and then two."""
        text = self.answer
        while text == self.answer:
            text = self.spoilt(rng, rng.sample(faults, k=n or rng.choice((1, 1, 2))))
        return text

    def spoilt(self, rng: random.Random, faults: list[str]) -> str:
        """Return an answer with these faults, which by chance may leave it as it should be."""
        result = self.result
        instructions = set(self.instructions)
        if "slip" in faults:
            i = rng.randrange(len(result))
            result = result[:i] + rng.choice("0123456789") + result[i + 1 :]
        if "other" in faults:
            result = OPERATIONS[rng.choice([*OPERATIONS])][1](self.digits)
        if "form" in faults:
            instructions ^= {rng.choice(self.instructions or [*FORMS])}
        text = write_answer(result, instructions)
        if "chatter" in faults:
            text = f"{rng.choice(CHATTER)} {text}"
        if "cut" in faults:
            text = text[: rng.randint(1, len(text))].strip()
        return text


def draw_task(rng: random.Random, call: bool, held_out: bool = False) -> Task:
    """Draw a task of three or four digits; in words, with up to two instructions."""
    while True:
        digits = "".join(rng.choices("0123456789", k=rng.randint(3, 4)))
        asked = [] if call else rng.sample([*FORMS], k=rng.choice((0, 1, 1, 2)))
        task = Task(rng.choice([*OPERATIONS]), digits, tuple(asked), call)
        if task.held_out == held_out:
            return task


def draw_text(rng: random.Random) -> str:
    """Draw a document to pretrain on: several lines, so that nothing depends on places."""
    return "\n".join(draw_line(rng) for _ in range(rng.randint(1, 5)))


def draw_line(rng: random.Random) -> str:
    """Draw a number in words, or a call and its result, perhaps with a verdict on it. Nobody asks
    or answers, and the text between call and result varies."""
    task = draw_task(rng, call=True)
    kind = rng.random()
    if kind < 0.2:
        return f"{task.digits}\n{in_words(task.digits)}"
    called = f"{task.prompt}{rng.choice(BETWEEN)}"
    if kind < 0.6:
        return f"{called}{task.result}"
    result = task.flawed(rng, ("slip", "other", "cut")) if rng.random() < 0.5 else task.result
    return f"{called}{result}\n{'right' if task.right(result) else 'wrong'}"


def scored_row(task: Task, text: str) -> dict[str, Any]:
    """Return a row for SFT and, with its label, for the reward model."""
    return {"messages": task.chat(text), "label": task.labels(text)}
