"""recipes/verify.py, ifeval.py and guard.py: what the recipes do to text without a model: lists in
answers, duplicates, decontamination, verifiable instructions, numbers, and running code."""

# ruff: noqa: E501 (a shape, an answer or a program stays on its line)

import contextlib
import html
import importlib
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest
import sympy

from recipes import guard
from recipes.ifeval import (
    BY_WORDS,
    ENDINGS,
    KEYWORDS,
    KINDS,
    LANGUAGES,
    REPEAT,
    compatible,
    language_of,
)
from recipes.verify import (
    SIGNATURE,
    Decontaminator,
    Instruction,
    bucket_shape,
    draw_instruction,
    draw_instructions,
    extract_code,
    final_answer,
    gram_hashes,
    minhash,
    near_duplicates,
    normalise,
    parse_list,
    read_evaluations,
    run_python,
    same_number,
    shingles,
    strings_in,
)

ABC = ["Alpha one", "Beta two", "Gamma three"]
QA = ["How do bees fly?", "Why is the sky blue?", "What is rust?"]
T = ["Sorting: quick sort", "Graphs: shortest paths", "Trees: red and black"]

NO_LIST = []  # a shape that is not read: the model is asked again. It must not be misread.
# (what a model wrote, the items)
LISTS = [
    # numbers
    ("1. Alpha one\n2. Beta two\n3. Gamma three", ABC),
    ("1) Alpha one\n2) Beta two\n3) Gamma three", ABC),
    ("(1) Alpha one\n(2) Beta two\n(3) Gamma three", ABC),
    ("1: Alpha one\n2: Beta two\n3: Gamma three", ABC),
    ("1 - Alpha one\n2 - Beta two\n3 – Gamma three", ABC),
    ("[1] Alpha one\n[2] Beta two\n[3] Gamma three", ABC),
    ("#1 Alpha one\n#2 Beta two\n#3: Gamma three", NO_LIST),
    ("1.Alpha one\n2.Beta two\n3.Gamma three", ABC),
    ("**1.** Alpha one\n**2.** Beta two\n**3.** Gamma three", ABC),
    ("**1. Alpha one**\n**2. Beta two**\n**3. Gamma three**", ABC),
    ("### 1. Alpha one\n### 2. Beta two\n### 3. Gamma three", ABC),
    ("1\ufe0f\u20e3 Alpha one\n2\ufe0f\u20e3 Beta two\n3\ufe0f\u20e3 Gamma three", ABC),
    ("① Alpha one\n② Beta two\n③ Gamma three", ABC),
    (" 8. Alpha one\n 9. Beta two\n10. Gamma three", NO_LIST),
    ("1. Alpha one 2. Beta two 3. Gamma three", NO_LIST),
    ("Here you go: 1) Alpha one 2) Beta two 3) Gamma three", NO_LIST),
    ("1.\nAlpha one\n2.\nBeta two\n3.\nGamma three", ABC),
    ("a. Alpha one\nb. Beta two\nc. Gamma three", ABC),
    ("A) Alpha one\nB) Beta two\nC) Gamma three", ABC),
    ("i. Alpha one\nii. Beta two\niii. Gamma three", ABC),
    ("Q1: How do bees fly?\nQ2: Why is the sky blue?\nQ3: What is rust?", QA),
    ("**Question 1:** How do bees fly?\n\n**Question 2:** Why is the sky blue?\n\n"
     "**Question 3:** What is rust?", QA),
    ("Topic 1 - Alpha one\nTopic 2 - Beta two\nTopic 3 - Gamma three", ABC),
    ("> 1. Alpha one\n> 2. Beta two\n> 3. Gamma three", ABC),
    ("1. 3.5 percent of what?\n2. 10:30 is when?\n3. 1984", ["3.5 percent of what?", "10:30 is when?", "1984"]),
    # bullets
    ("- Alpha one\n- Beta two\n- Gamma three", ABC),
    ("* Alpha one\n* Beta two\n* Gamma three", ABC),
    ("• Alpha one\n• Beta two\n• Gamma three", ABC),
    ("•Alpha one\n•Beta two\n•Gamma three", ABC),
    ("-Alpha one\n-Beta two\n-Gamma three", ABC),
    ("– Alpha one\n— Beta two\n– Gamma three", ABC),
    ("+ Alpha one\n+ Beta two\n+ Gamma three", ABC),
    ("- [ ] Alpha one\n- [x] Beta two\n- [ ] Gamma three", ABC),
    ("✅ Alpha one\n✅ Beta two\n✅ Gamma three", ABC),
    ("\t- Alpha one\n\t- Beta two\n\t- Gamma three", ABC),
    ("• Alpha one • Beta two • Gamma three", NO_LIST),
    ("- **Alpha one**\n- **Beta two**\n- **Gamma three**", ABC),
    ("* *Alpha one*\n* _Beta two_\n* `Gamma three`", ABC),
    # plain lines
    ("Alpha one\nBeta two\nGamma three", NO_LIST),
    ("Alpha one\n\nBeta two\n\nGamma three\n", NO_LIST),
    ("Alpha one\r\nBeta two\r\nGamma three\r\n", NO_LIST),
    ("Here are three topics:\nAlpha one\nBeta two\nGamma three", NO_LIST),
    ("Sure! Here are 3 topics:\n\nAlpha one\nBeta two\nGamma three\n\nLet me know if you want more!", NO_LIST),
    ("**Alpha one**\n**Beta two**\n**Gamma three**", NO_LIST),
    ('"Alpha one"\n"Beta two"\n"Gamma three"', NO_LIST),
    ('"Alpha one",\n"Beta two",\n"Gamma three"', NO_LIST),
    ("“Alpha one”\n“Beta two”\n“Gamma three”", NO_LIST),
    ("Write about how the harbour of a small town changed when the railway came and\n"
     "the fishing boats went elsewhere\nDescribe a day at a market",
     NO_LIST),
    # one line
    ("Alpha one, Beta two, Gamma three", NO_LIST),
    ("Alpha one, Beta two, and Gamma three.", NO_LIST),
    ("Here are three topics: Alpha one; Beta two; Gamma three", NO_LIST),
    ("Alpha one | Beta two | Gamma three", NO_LIST),
    ("代数、几何、概率", NO_LIST),
    # JSON and Python
    ('["Alpha one", "Beta two", "Gamma three"]', ABC),
    ('```json\n["Alpha one", "Beta two", "Gamma three"]\n```', ABC),
    ('Sure:\n\n```json\n[\n  "Alpha one",\n  "Beta two",\n  "Gamma three"\n]\n```\nEnjoy!', ABC),
    ('Here is the list: ["Alpha one", "Beta two", "Gamma three"]', NO_LIST),
    ("['Alpha one', 'Beta two', 'Gamma three']", NO_LIST),
    ("topics = ['Alpha one', 'Beta two', 'Gamma three',]", NO_LIST),
    ('["Alpha one", "Beta two", "Gamma three",]', NO_LIST),
    ('[{"topic": "Alpha one"}, {"topic": "Beta two"}, {"topic": "Gamma three"}]', NO_LIST),
    ('[{"id": 1, "q": "How do bees fly?"}, {"id": 2, "q": "Why is the sky blue?"}]', NO_LIST),
    ('{"topics": ["Alpha one", "Beta two", "Gamma three"]}', NO_LIST),
    ('{"n": 3, "topics": ["Alpha one", "Beta two", "Gamma three"]}', NO_LIST),
    ('{"1": "Alpha one", "2": "Beta two", "3": "Gamma three"}', NO_LIST),
    ('[1984, 2.50, "Yes"]', NO_LIST),
    ('["Say \\"hi\\" to all", "caf\\u00e9"]', ['Say "hi" to all', "café"]),
    ('[Topics] as asked:\n["Alpha one", "Beta two", "Gamma three"]', NO_LIST),
    # YAML
    ("- Sorting: quick sort\n- Graphs: shortest paths\n- Trees: red and black", T),
    ("- Yes\n- No\n- 1984\n- null\n- 1e3", ["Yes", "No", "1984", "null", "1e3"]),
    ("```yaml\n- Alpha one\n- Beta two\n- Gamma three\n```", NO_LIST),
    ("- 'Alpha one'\n- \"Beta two\"\n- Gamma three", ABC),
    ("topics:\n  - Alpha one\n  - Beta two\n  - Gamma three", ABC),
    ("- question: How do bees fly?\n- question: Why is the sky blue?", NO_LIST),
    ("- |\n  Alpha one\n- |\n  Beta two\n- >-\n  Gamma three", NO_LIST),
    ("- 'It''s late'\n- \"What's up?\"", NO_LIST),
    # fences, headings, first and last words
    ("```\nAlpha one\nBeta two\nGamma three\n```", NO_LIST),
    ("Here they are:\n```text\n1. Alpha one\n2. Beta two\n3. Gamma three\n```\nHope this helps.", NO_LIST),
    ("Sure! Here are 3 questions:\n\n1. How do bees fly?\n2. Why is the sky blue?\n"
     "3. What is rust?\n\nLet me know if you need more.", QA),
    ("1. How do bees fly?\n2. Why is the sky blue?\n3. What is rust?\nFeel free to ask again!", NO_LIST),
    ("1. How do bees fly?\n2. Why is the sky blue?\n3. What is rust?\n\nEvery question is open.", QA),
    ("# Topics\n\n- Alpha one\n- Beta two\n- Gamma three\n\n---\n*Sorted by name.*", ABC),
    ("**Letters**\n1. Alpha one\n2. Beta two\n\n**More letters:**\n3. Gamma three", ABC),
    ("Easy:\n- Alpha one\n- Beta two\n\nHard:\n- Gamma three", NO_LIST),
    ("<think>\n1. no\n2. not this\n</think>\n1. Alpha one\n2. Beta two\n3. Gamma three", ABC),
    ("\ufeff1.\u00a0Alpha one\n2.\u00a0Beta\u200b two\n3.\u00a0Gamma three", ABC),
    # titles, several lines, what is below an item
    ("1. **Sorting**: quick sort\n2. **Graphs:** shortest paths\n3. **Trees**: red and black", T),
    ("1. Sorting: quick sort\n2. Graphs: shortest paths\n3. Trees: red and black", T),
    ("1. **Sorting**\n   quick sort\n2. **Graphs**\n   shortest paths\n3. **Trees**\n   red and black", T),
    ("**Sorting**\nquick sort\n\n**Graphs**\nshortest paths\n\n**Trees**\nred and black", NO_LIST),
    ("### Sorting\nquick sort\n\n### Graphs\nshortest paths\n\n### Trees\nred and black", NO_LIST),
    ("1. **Sorting**\n\nquick sort\n\n2. **Graphs**\n\nshortest paths\n\n3. **Trees**\n\nred and black", NO_LIST),
    ("1. Sorting:\n   - quick sort\n2. Graphs:\n   - shortest paths\n3. Trees:\n   - red and black", T),
    ("1. Sorting\n   - quick\n   - merge\n2. Graphs\n   - paths", ["Sorting; quick; merge", "Graphs; paths"]),
    ("- Sorting\n    - quick\n    - merge\n- Graphs", ["Sorting; quick; merge", "Graphs"]),
    ("1. Sorting\n- quick\n- merge\n2. Graphs\n- paths", ["Sorting; quick; merge", "Graphs; paths"]),
    ("1. A train leaves at\n   noon. When does it\n   arrive?\n2. What is rust?",
     ["A train leaves at noon. When does it arrive?", "What is rust?"]),
    ("1. A train leaves at\nnoon. When does it\narrive?\n\n2. What is rust?",
     ["A train leaves at noon. When does it arrive?", "What is rust?"]),
    ("1. Solve:\n   (a) x = 1\n   (b) x = 2\n2. Prove it.", ["Solve: x = 1; x = 2", "Prove it."]),
    ("1. What does this print?\n   ```python\n   print(1)\n   ```\n2. What is rust?",
     NO_LIST),
    ("1. Alpha one\n\n\n2. Beta two\n\n\n3. Gamma three", ABC),
    ("A first line\nof a paragraph\n\nA second one\nof two lines", NO_LIST),
    ("1. **Sorting** a list of **n** numbers\n2. Use 2**3 and 4**5", ["Sorting a list of **n** numbers", "Use 2**3 and 4**5"]),
    ('1. "Alpha one"\n2. \'Beta two\'\n3. “Gamma three”', ABC),
    ('1. "Yes" and "no"\n2. The word "rust"', ['"Yes" and "no"', 'The word "rust"']),
    ("How high is it?\nWould you rather swim or fly?\nIf you could fly, where would you go?",
     NO_LIST),
    ("Great artists steal.\nI want to learn the piano.\nDo you want to be rich?",
     NO_LIST),
    ("Sure, I can do that!\n\nAlpha one\nBeta two\nGamma three\n\nIf you need more, just ask.", NO_LIST),
    ("Sure!\n1. Alpha one\n2. Beta two\n\nAnd one more, a harder one:\n\n3. Gamma three", ABC),
    # tables and html
    ("| # | Topic |\n|---|---|\n| 1 | Alpha one |\n| 2 | Beta two |\n| 3 | Gamma three |", NO_LIST),
    ("Area | Topic\n--- | ---\nSorting | quick sort\nGraphs | shortest paths\nTrees | red and black", NO_LIST),
    ("<ul>\n<li>Alpha one</li>\n<li>Beta two</li>\n<li>Gamma three</li>\n</ul>", NO_LIST),
    ("<p>Topics:</p><ol><li>Alpha <b>one</b></li><li>Beta two</li><li>Gamma three</li></ol><p>Bye</p>", NO_LIST),
    ("<ul><li>Bread &amp; butter</li><li>Sorting<ul><li>quick</li></ul></li></ul>",
     NO_LIST),
    ("<li>Alpha <i>one</i></li><li>Beta two</li><li>Gamma three</li>", NO_LIST),
    # one item
    ("1. Alpha one", ["Alpha one"]),
    ("Sure! Here is one:\n\n- Alpha one\n\nLet me know!", ["Alpha one"]),
    # no list
    ("Yes, I can, but why", []),
    ("Sorry.\nThat is not possible.", []),
    ("", []),
    ("I'm sorry, but I cannot help, advise or comment on that.", []),
    ("Alpha is a letter.", []),
    ("Bees fly. They beat their wings. It is quick.\nThe sky is blue. Light is scattered. So it "
     "looks blue.", []),
]  # fmt: skip


@pytest.mark.parametrize("text, items", LISTS, ids=range(len(LISTS)))
def test_a_list_is_read_exactly_or_not_at_all(text, items):
    assert parse_list(text) == items


def test_most_shapes_are_read():
    not_read = sum(items is NO_LIST for _, items in LISTS)
    assert (len(LISTS), not_read) == (123, 53)


def test_no_item_has_a_word_that_is_not_in_the_answer():
    rng = random.Random(0)
    lines = [line for text, _ in LISTS for line in text.splitlines()]
    for _ in range(3000):  # and no mixture of shapes breaks the parser
        text = "\n".join(rng.choices(lines, k=rng.randint(0, 12)))
        words = set(re.findall(r"[^\W_]+", html.unescape(text).replace("\u200b", "")))
        words |= {"hi", "café"}  # escapes in JSON
        for item in parse_list(text):
            assert item and set(re.findall(r"[^\W_]+", item)) <= words, (text, item)


STUCK = [
    "[",
    "[\n",
    "{",
    " ",
    "\n",
    "- ",
    "1. ",
    "**",
    "<li>",
    "|",
    "a, ",
    '"',
    "```\n",
    "_a",
    "*",
    "x",
]
STUCK += ["\\boxed{", "1/", "9,", "<", "(1) ", "Section 1 ", "p.", "<<", "1 -", "“"]


@pytest.mark.parametrize("part", STUCK, ids=range(len(STUCK)))
def test_the_answer_of_a_model_that_got_stuck_takes_no_longer(part):
    text, start = part * (12_000 // len(part)), time.process_time()
    for read in (parse_list, normalise, final_answer, extract_code, language_of):
        read(text)
    near_duplicates([text, text + " a"])
    for kind in KINDS:
        instruction = draw_instruction(random.Random(0), kind, [*KEYWORDS], "")
        assert instruction.met(text) in (True, False), kind
    assert time.process_time() - start < 8


# ---- duplicates and decontamination --------------------------------------------------------------

WORDS = [a + b for a in ("ba", "ke", "li", "mo", "nu") for b in ("ran", "sel", "tip", "vor", "wug")]


def sentence(rng, n):
    return " ".join(rng.choices(WORDS, k=n))


def edited(rng, text, n):
    words = text.split()
    for _ in range(n):
        words[rng.randrange(len(words))] = rng.choice(WORDS)
    return " ".join(words)


def test_normalising_twice_changes_nothing_and_keeps_what_a_sum_is_made_of():
    odd = [
        "ＦＵＬＬ width",
        "ﬁne ½",
        "don’t DON'T",
        "Straße İ",
        "a–b—c_d",
        "हिन्दी भाषा",
        "x^2 + 3%",
    ]
    for text in [*odd, "2-3*4/5 - -6", " \n\t\0", *(text for text, _ in LISTS)]:
        once = normalise(text)
        assert normalise(once) == once
        assert "  " not in once and once == once.strip()
    assert normalise("  Hello,\n“World”!") == "hello world"
    assert normalise("ＦＵＬＬ don’t") == "full dont"
    assert normalise("हिन्दी भाषा।") == "हिन्दी भाषा"  # vowel signs are no punctuation
    assert len({normalise(f"What is 2 {sign} 2?") for sign in ("+", "-", "*", "/", "%")}) == 5


def index_of(a, b):
    """The Jaccard index of two sets, by its definition."""
    return len(a & b) / len(a | b)


def test_near_duplicates_are_those_that_brute_force_finds():
    rng = random.Random(0)
    texts = []
    for _ in range(120):
        texts.append(sentence(rng, rng.choice((1, 3, 4, 5, 8, 40, 80))))
        near = texts[rng.randrange(len(texts))]
        texts.append(edited(rng, near, rng.choice((0, 1, 1, 2, 5))).title() + rng.choice(" .!"))
    sets = [shingles(normalise(text)) for text in texts]
    for threshold in (0.5, 0.9):
        kept, likely = [], 0
        for i, hit in enumerate(near_duplicates(texts, threshold)):
            best, j = max(((index_of(sets[i], sets[j]), -j) for j in kept), default=(0, 0))
            assert hit == ((-j, best) if best >= threshold else None)
            likely += hit is not None
            kept += [] if hit else [i]
        assert likely > 20
    assert near_duplicates(texts) == near_duplicates(texts)


# letters to make words of, and whether the script has blanks between them
SCRIPTS = {
    "English": (range(ord("a"), ord("z") + 1), " "),
    "Russian": (range(ord("а"), ord("я") + 1), " "),
    "Hindi": (range(ord("क"), ord("ह") + 1), " "),
    "Chinese": (range(0x4E00, 0x5500), ""),
    "Thai": (range(ord("ก"), ord("ฮ") + 1), ""),
}


def planted_pair(rng, script, index, n=240):
    """Two texts of n words, the second a copy up to a word, from which on it is another text: the
    Jaccard index of their 5-grams is `index`, as near as a gram allows."""
    letters, blank = SCRIPTS[script]
    size = 5 if blank else 1
    words = ["".join(map(chr, rng.choices(letters, k=size))) for _ in range(2 * n)]
    same = 4 + round(2 * (n - 4) * index / (1 + index))
    return blank.join(words[:n]), blank.join(words[:same] + words[n : 2 * n - same])


@pytest.mark.parametrize("script", SCRIPTS)
def test_planted_pairs_are_found_from_the_threshold_on_in_any_script(script):
    rng = random.Random(3)
    found = {}
    for index in (0.5, 0.6, 0.68, 0.72, 0.8, 0.9, 0.95):
        pairs = [planted_pair(rng, script, index) for _ in range(8)]
        hits = near_duplicates([*itertools.chain(*pairs)], threshold=0.7)
        assert hits[::2] == [None] * 8  # no text of one pair is near one of another
        for i, hit in enumerate(hits[1::2]):
            true = index_of(*(shingles(normalise(text)) for text in pairs[i]))
            # scripts of few letters repeat a gram here and there
            assert true == pytest.approx(index, abs=0.012)
            assert hit is None or hit == (2 * i, true)
        found[index] = sum(hit is not None for hit in hits)
    assert [found[index] for index in (0.5, 0.6, 0.68)] == [0, 0, 0]
    assert [found[index] for index in (0.72, 0.8, 0.9, 0.95)] == [8, 8, 8, 8]


def test_signatures_agree_as_often_as_the_jaccard_index_says_and_buckets_by_their_formula():
    rng = random.Random(4)
    for index in (0.5, 0.7, 0.9):
        pairs = [planted_pair(rng, "English", index, 120) for _ in range(250)]
        signatures = np.array([[minhash(gram_hashes(t)) for t in pair] for pair in pairs])
        agree = signatures[:, 0] == signatures[:, 1]
        assert abs(agree.mean() - index) < 4 * (index * (1 - index) / agree.size) ** 0.5 + 0.002
        for rows in (4, 8):
            n_buckets = SIGNATURE // rows
            share = agree[:, : n_buckets * rows].reshape(250, n_buckets, rows).all(2).any(1).mean()
            said = 1 - (1 - index**rows) ** n_buckets
            assert abs(share - said) < 4 * (said * (1 - said) / 250) ** 0.5 + 0.015


def test_the_shape_of_buckets_gives_the_recall_asked_for_and_one_row_more_does_not():
    assert bucket_shape(0.7, 0.5) == (16, 8)
    for threshold in (0.05, 0.3, 0.7, 0.95):
        for recall in (0.5, 0.999):
            n_buckets, rows = bucket_shape(threshold, recall)
            assert n_buckets * rows <= SIGNATURE
            assert rows == 1 or 1 - (1 - threshold**rows) ** n_buckets >= recall
            more = rows + 1
            assert 1 - (1 - threshold**more) ** (SIGNATURE // more) < recall


def test_looking_for_near_duplicates_takes_a_kilobyte_or_two_a_text_however_long_it_is():
    rng = random.Random(5)
    texts = [sentence(rng, 1000) for _ in range(140)]
    peaks = []
    near_duplicates(texts[:2])  # what is loaded once
    for part in (texts[:70], texts):  # of the n-grams themselves, those of 64 texts are at hand
        tracemalloc.start()
        near_duplicates(part)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 70 < 2500  # the n-grams of one take 100 kB as texts


def test_duplicates_differ_in_case_and_punctuation_alone_or_by_a_little():
    long = sentence(random.Random(1), 60)
    texts = ["Why?", "why", "Name it: a, b", "name it A B!", "", " ", "?!", long, f"{long} ranwug"]
    got = near_duplicates(texts)
    assert got[:4] == [None, (0, 1.0), None, (2, 1.0)]
    assert got[4:7] == [None, (4, 1.0), None]
    assert got[7] is None and got[8] == (7, 56 / 57)
    assert near_duplicates(["2 + 2 =", "2 - 2 ="]) == [None, None]
    assert near_duplicates([]) == []
    with pytest.raises(ValueError, match="threshold=0"):
        near_duplicates(texts, 0)


def test_evidence_names_the_item_and_what_is_shared(tmp_path):
    rng = random.Random(2)
    question, short, tiny, word = (sentence(rng, n) for n in (30, 9, 5, 2))
    path = tmp_path / "eval.jsonl"
    rows = [{"question": question, "id": 7}, {"choices": [short, word], "answer": {"text": tiny}}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    items = read_evaluations([path])
    assert items == [
        (f"{path}:1", question),
        (f"{path}:2", short),
        (f"{path}:2", word),
        (f"{path}:2", tiny),
    ]
    found = Decontaminator(items).evidence
    shared = question.split()[5:18]
    padding = sentence(rng, 20)
    upper = " ".join(shared).upper().replace(" ", ", ")
    assert found(f"{padding} {upper}. {padding}") == f'{path}:1: "{" ".join(shared)}"'
    assert found(f"{padding} {' '.join(shared[:-1])} zzz") is None  # twelve words
    assert found(f"{padding} {short}") == f'{path}:2: "{" ".join(short.split()[:8])}"'
    assert found(" ".join(short.split()[:7]) + " zzz") is None
    thirteen = Decontaminator([("here", " ".join(shared))]).evidence
    assert thirteen(" ".join(shared)) and thirteen(" ".join(shared[:12])) is None
    assert found(tiny.title() + "!") == f'{path}:2: "{tiny}"'
    assert found(f"{tiny} and more") is None and found(word) is None and found("") is None
    assert found(f"zzz {short} {question}").startswith(f"{path}:2")  # the first hit in the text


CHINESE = "小明有十二个苹果，他把其中的三个送给了妹妹，又从市场买回来七个，后来哥哥吃掉了两个，请问小明现在一共还有多少个苹果？"
THAI = "กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทย"
UNSPACED = {
    "Chinese": CHINESE,
    "Thai": THAI,
    "one long word": "ab1c2d" * 12 + "".join(map(chr, range(97, 123))),
}


@pytest.mark.parametrize("name", UNSPACED)
def test_texts_without_blanks_are_compared_by_characters(name):
    text = UNSPACED[name]
    for i in (0, len(text) // 2, len(text) - 4):
        other = text[:i] + "z" + text[i + 1 :]
        index, similarity = near_duplicates([text, other])[1]
        assert index == 0 and 0.7 <= similarity < 1
    assert near_duplicates([text, text[::-1]]) == [None, None]
    found = Decontaminator([("here", text)])
    assert found.unindexed == 0 and found.evidence(f"Q: {text} A:").startswith("here: ")
    assert found.evidence(text[::-1]) is None and found.evidence(text[:6]) is None


def test_evaluation_texts_that_are_too_short_to_look_for_are_counted():
    texts = ["yes", "a b c", "", "?", "a b c d", "多少", "小明有苹"]
    found = Decontaminator([("here", text) for text in texts])
    assert found.unindexed == 5
    assert found.evidence("a b c d") and found.evidence("小明有苹") and not found.evidence("yes")


def test_strings_are_found_however_deep_and_in_their_order():
    value = ["a", {"b": "c", "d": ["e", 1, None]}, "f"]
    assert strings_in(value) == ["a", "c", "e", "f"]
    for _ in range(100_000):
        value = [value]
    assert strings_in(value) == ["a", "c", "e", "f"]


def test_an_evaluation_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text('{"a": "b"}\n[1]\n')
    with pytest.raises(ValueError, match=r"eval\.jsonl:2: .*a list"):
        read_evaluations([path])


# ---- verifiable instructions ---------------------------------------------------------------------

PROMPT = "Tell me about the weather."
# sentences of common words, with no letter and no word that is drawn
FILLER = {
    "en": "this is one of the many ways to be of use for you and it has that for all",
    "de": "das ist nicht der Weg und wir sind mit den Leuten auf dem Berg",
    "fr": "la vie est dans les rues et nous avons des amis pour le soir",
    "es": "el sol es grande y los campos son verdes para la gente en la tierra",
    "it": "il mare non è lontano e gli amici sono con me nella casa della zia",
    "pt": "o mar não é longe e os amigos com uma casa no campo são mais",
    "nl": "het is niet ver en de mensen zijn met een boot op het meer van dat land",
    "ru": "это хороший день и мы идём домой",
    "el": "αυτό είναι ένα καλό σπίτι",
    "ar": "هذا بيت كبير في المدينة",
    "hi": "यह एक अच्छा घर है",
    "ko": "이것은 좋은 집입니다",
    "ja": "これは良い家です",
    "zh": "这是一个很好的房子",
}


def least(args, name):
    return args[name] if "at least" in args.values() else 0


# what is added to a text of lines, then to the whole: (kind, its arguments, a phrase → text)
LINES = {
    "keywords:existence": lambda a, p: "\n".join(a["keywords"]),
    "keywords:frequency": lambda a, p: "\n".join([a["keyword"]] * least(a, "frequency")),
    "letter_frequency": lambda a, p: a["letter"] * least(a, "let_frequency"),
    "capital_word_frequency": lambda a, p: " ".join(["WE"] * least(a, "capital_frequency")),
    "number_placeholders": lambda a, p: f"[{p}] " * a["num_placeholders"],
    "highlighted_sections": lambda a, p: p + f" *{p}*" * a["num_highlights"],
    "number_words": lambda a, p: f"{p} " * least(a, "num_words"),
    "multiple_sections": lambda a, p: "\n".join(
        f"{a['section_spliter']} {i + 1}" for i in range(a["num_sections"])
    ),
    "number_sentences": lambda a, p: (
        (p + ("。" if p.isalpha() else ". ")) * least(a, "num_sentences")
    ),
    "bullet_lists": lambda a, p: "\n".join([f"* {p}"] * a["num_bullets"]),
}


def nth(text, a, phrase):
    parts = [text] + [phrase] * (a["num_paragraphs"] - 1)
    parts[a["nth_paragraph"] - 1] = f"{a['first_word']} {parts[a['nth_paragraph'] - 1]}"
    return "\n\n".join(parts)


WHOLE = {
    "number_paragraphs": lambda t, a, p: "\n***\n".join([t] + [p] * (a["num_paragraphs"] - 1)),
    "nth_paragraph_first_word": nth,
    "postscript": lambda t, a, p: f"{t}\n{a['postscript_marker']} {p}",
    "end_checker": lambda t, a, p: f"{t}\n{a['end_phrase']}",
    "english_capital": lambda t, a, p: t.upper(),
    "english_lowercase": lambda t, a, p: t.lower(),
    "two_responses": lambda t, a, p: f"{t}\n******\n{p}\n{t}",
    "repeat_prompt": lambda t, a, p: f"{a['prompt_to_repeat']}\n{t}",
    "constrained_response": lambda t, a, p: "My answer is no.",
    "json_format": lambda t, a, p: json.dumps(t),
    "quotation": lambda t, a, p: f'"{t}"',
}


def example_answer(instructions):
    """An answer that follows all of them: what a model has to be able to do."""
    asked = {i.kind: i.args for i in instructions}
    filler = FILLER[asked.get("language:response_language", {"language": "en"})["language"]]
    phrase = " ".join(filler.split()[:4])
    lines = [f"<<{phrase}>>"] if "detectable_format:title" in asked else []
    lines.append(filler)
    for name, write in LINES.items():
        lines += [write(a, phrase).strip() for kind, a in asked.items() if kind.endswith(name)]
    text = "\n".join(filter(None, lines))
    for name, change in WHOLE.items():
        for args in (a for kind, a in asked.items() if kind.endswith(name)):
            text = change(text, args, phrase)
    return text


def test_there_are_twenty_five_kinds_and_each_can_be_followed_and_broken():
    assert len(KINDS) == 25
    rng = random.Random(0)
    seen = set()
    while len(seen) < 25 or rng.random() < 0.997:
        (instruction,) = draw_instructions(rng, 1, PROMPT)
        seen.add(instruction.kind)
        assert instruction.met(example_answer([instruction]), PROMPT), instruction
        empty = "" if "less than" not in instruction.args.values() else None
        often = " ".join([*KEYWORDS, "JXQZ", "wee. "] * 60)
        bad = {"punctuation:no_comma": "a, b", "keywords:forbidden_words": often}
        assert not instruction.met(bad.get(instruction.kind, often if empty is None else "")), (
            instruction
        )
        assert instruction.text.endswith((".", "P.S.", "P.P.S"))
        assert not re.search(r"[{}]|\(\)|None", instruction.text)
        for name, value in instruction.args.items():
            shown = value if isinstance(value, list) else [value]
            shown = [LANGUAGES[value]] if name == "language" else shown
            for x in () if name == "prompt_to_repeat" else shown:
                assert str(x) in instruction.text or x == "less than"


def test_instructions_that_are_drawn_together_can_be_followed_together():
    rng, pairs = random.Random(0), set()
    for i in range(3000):
        asked = draw_instructions(rng, i % 9, PROMPT)
        assert len(asked) == i % 9 == len({a.kind for a in asked})
        text = example_answer(asked)
        assert all(a.met(text, PROMPT) for a in asked), (
            [a for a in asked if not a.met(text)],
            text,
        )
        pairs |= {frozenset((a.kind, b.kind)) for a in asked for b in asked if a != b}
    possible = {frozenset((a, b)) for a in KINDS for b in KINDS if a != b and compatible(a, b)}
    assert pairs == possible  # each pair that may come did


def test_drawing_is_a_function_of_the_seed_and_uses_no_word_of_the_prompt():
    draws = [draw_instructions(random.Random(7), 4, PROMPT) for _ in range(2)]
    assert draws[0] == draws[1] and len({*draws[0], *draws[1]}) == 4
    prompt = "The RIVER, the market and the garden."
    for seed in range(200):
        asked = draw_instructions(random.Random(seed), 2, prompt)
        values = [v for i in asked if i.kind != REPEAT for v in i.args.values()]
        words = {word for value in values for word in np.atleast_1d(value)}
        assert not words & {"river", "market", "garden"}
        assert REPEAT not in {i.kind for i in draw_instructions(random.Random(seed), 1)}
    with pytest.raises(ValueError, match="n=9 instructions: 0 to 8"):
        draw_instructions(random.Random(0), 9)


def test_an_instruction_survives_json_and_wrong_ones_are_named():
    for seed in range(100):
        for instruction in draw_instructions(random.Random(seed), 3, PROMPT):
            again = Instruction(**json.loads(json.dumps(asdict(instruction))))
            assert again == instruction and hash(again) == hash(instruction)
    with pytest.raises(ValueError, match="'keywords:any' is none of"):
        Instruction("keywords:any")
    with pytest.raises(
        ValueError, match=r"keywords:existence.* takes arguments \['keywords'\], not \[\]"
    ):
        Instruction("keywords:existence")
    with pytest.raises(ValueError, match=r"no_comma.* takes arguments \[\], not \['n'\]"):
        Instruction("punctuation:no_comma", {"n": 1})
    with pytest.raises(ValueError, match="language is 'xx', not one of"):
        Instruction("language:response_language", {"language": "xx"})


def test_the_words_that_are_drawn_do_not_get_in_each_others_way():
    assert not any(a in b for a in KEYWORDS for b in KEYWORDS if a != b)
    others = " ".join([*ENDINGS, *FILLER.values()]).lower()
    assert not any(word in others for word in KEYWORDS)
    assert not set("jqxz") & set("".join([*KEYWORDS, *ENDINGS, "p.s."]).lower())


def test_languages_are_told_apart():
    assert set(FILLER) == set(LANGUAGES) and len(BY_WORDS) == 7
    for code, text in FILLER.items():
        assert language_of(text) == language_of(text.upper()) == code
    assert language_of("日本語の文章です。東京都") == "ja" and language_of("東京都") == "zh"
    assert language_of("") is language_of("Tokyo 2020!") is None
    assert language_of("la") is None  # several have it
    assert language_of("the " + " ".join(KEYWORDS)) is None
    assert language_of("The house of the family is old. これは家です。") == "en"


@pytest.fixture(scope="module")
def ifeval():
    """lm-eval's verifiers, their three needs from the network stood in for: langdetect (it says
    English: so only the case of letters is compared), the trained sentence tokenizer (untrained,
    as no text here has abbreviations), and a sentence split before words are."""
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("lm_eval")
    stand_in = types.ModuleType("langdetect")
    stand_in.detect, stand_in.LangDetectException = lambda text: "en", ValueError
    frozen = types.ModuleType("immutabledict")
    frozen.immutabledict = dict
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, "langdetect", stand_in)
    patch.setitem(sys.modules, "immutabledict", frozen)
    patch.setattr(nltk.data, "find", lambda *args, **kwargs: "found")
    patch.setattr(nltk, "download", lambda *args, **kwargs: True)
    tokenize = nltk.tokenize.word_tokenize
    patch.setattr(nltk, "word_tokenize", lambda text: tokenize(text, preserve_line=True))
    with contextlib.redirect_stdout(None):
        util = importlib.import_module("lm_eval.tasks.ifeval.instructions_util")
        registry = importlib.import_module("lm_eval.tasks.ifeval.instructions_registry")
    patch.setattr(util, "_get_sentence_tokenizer", nltk.tokenize.PunktSentenceTokenizer)
    yield registry.INSTRUCTION_DICT
    patch.undo()


EDGES = [
    "", " ", '"', '""', '"a"', "a", "A", "NO, ", "My answer is yes.", "my answer is yes.", "***",
    "******", "a******b", "a ****** a", "******a******b", "a******b******", "a*******b",
    "a***b", "***a***b***", "a *** *** b", "a\n***\nb\n***\nc", "a\n\nb", "a\n\n\nb", "a\n\n\n\nb\n\n",
    "river\n\n'River, run\n\nriver", "\"River\n\nmarket", "river's bank", "riverside market", "River-bank",
    "RIVER river River rivers", "[", "[]", "[a][b]", "[a [b]]", "[a\nb]", "p.s. a", "P. S. a", "PS", "P.P.S a",
    "P.P.S. a", "p. p. s", "a P.S", "* a", "*a", "*a*", "**a**", "***a***", "** **", "* a\n* b", "- a\n-b\n  - c",
    "* a\n- b\n* c *d*", "*a* *b* *c* *d*", "*a\nb*", "**a** and *b*", "<<a>>", "<<>>", "<< >>", "<a>",
    "<<a\nb>>", "a <<<b>>> c", "{}", "[1, 2", "```json\n{}\n```", "```JSON\n[1]```", "``` 5 ```", "null", "NaN",
    "Section 1\na\nSection 2\nb", "SECTION 1 SECTION2 SECTION 3", "Section one", "SubSection 3Section4",
    PROMPT, PROMPT.upper() + " It is fine.", "So: " + PROMPT, "It rains. It snows! Does it hail? Yes",
    "That is all for now.", 'that IS all for now."', "That is all for now. Bye", "I hope that helps!",
    "I AM A B CD E-F x", "IT'S 5 PM", "a,b", "a，b", "quick jazz quiz", "eeeee eeeee", "straße ß", "İi",
]  # fmt: skip


def test_answers_are_marked_as_ifeval_marks_them(ifeval):
    """All 25 kinds but the language of an answer: langdetect is not there without the network."""
    assert set(ifeval) == set(KINDS)
    rng, compared = random.Random(0), {}
    for _ in range(400):
        (ours,) = draw_instructions(rng, 1, PROMPT)
        if ours.kind == "language:response_language":
            continue
        theirs = ifeval[ours.kind](ours.kind)
        theirs.build_description(**ours.args)
        if ours.kind.startswith("change_case:english"):  # nothing but the case can be compared
            texts = [
                FILLER["en"],
                FILLER["en"].upper(),
                FILLER["en"] + " X",
                FILLER["en"].upper() + "ß",
            ]
        else:
            others = draw_instructions(rng, 3, PROMPT)
            texts = [*EDGES, example_answer([ours]), example_answer(others), FILLER["en"] * 9]
        for text in texts:
            if ours.kind == "change_case:capital_word_frequency" and "'" in text:
                continue  # nltk's words end before 'S
            verdict = bool(theirs.check_following(text))
            assert ours.met(text, PROMPT) == verdict, (ours, text)
            compared.setdefault(ours.kind, set()).add(verdict)
    assert len(compared) == 24 and all(both == {True, False} for both in compared.values())


# ---- ground truth: numbers and code --------------------------------------------------------------

# (the answer's text, its number)
NUMBERS = [
    ("42", 42), ("The answer is 42.", 42), ("It costs $1,234.50 in all.", Fraction("1234.5")),
    ("so 7 * 6 = 42\n#### 42", 42), ("#### -1,000", -1000), ("#### $18.00", 18),
    (r"Thus $\boxed{42}$.", 42), (r"\boxed{\frac{3}{4}}", Fraction(3, 4)), (r"\boxed{-\dfrac{1}{2}}", Fraction(-1, 2)),
    (r"\boxed{x = 5}", 5), (r"\boxed{2^2 = 4}", 4), (r"\boxed{5 = x}", 5), (r"\boxed{10\text{ cm}^2}", 10), (r"first \boxed{1}, then \boxed{2}; 3", 2),
    (r"\boxed{\{1, 2\}} or so", None), (r"\boxed{1{,}000}", 1000), (r"\boxed{\text{none}} of the 3", None),
    ("The answer is 12 because 3 times 4 is that.", 12), ("The answer is 3 + 4 = 7.", 7),
    ("The answer is: **8** apples, of 10", 8), ("Answer: 1/3", Fraction(1, 3)),
    ("The answer is 5. No, wait. The answer is 6. Of 9.", 6), ("the answer is below\n\n99", 99),
    ("She has 3 apples and 4 pears.", 4), ("50%", 50), ("-5", -5), ("−5", -5), ("- 5 apples", 5), ("-$5", -5), ("$-5", -5),
    ("10-3", None), ("x = -0.25", Fraction(-1, 4)), (".5", Fraction(1, 2)), ("2 1/2 cups", Fraction(5, 2)),
    ("3.14.", Fraction("3.14")), ("1,2,3", None), ("1,234,567", 1234567), ("12,345.678", Fraction("12345.678")),
    ("1e3", 1000), ("2.5e-1", Fraction(1, 4)), (r"3 \times 10^{2}", 300), ("3 × 10^2", 300), ("1/0", None),
    ("", None), ("none", None), ("H2O", None), ("5kg", 5), ("9" * 50, int("9" * 50)), ("1e999999999", None), ("7 " + "9" * 5000, None), ("2**3", None), ("5 - 1/2", None),
    # what is not read is no other number either
    (r"\boxed{\sqrt{2}}", None), (r"\boxed{3\sqrt2}", None), (r"\boxed{2\pi}", None), (r"\boxed{\frac{\pi}{2}}", None),
    (r"\boxed{2^{10}}", None), ("It is 10^2.", None), ("3 × 10^1000", None), (r"\boxed{3 \times 10^{1000}}", None), (r"\boxed{1e-1000}", None), (r"\boxed{\sqrt{16} = 4}", 4), (r"\boxed{x^2 + 3}", None),
    # a box holds a number with at most a unit, or it is no number
    (r"\boxed{3\sqrt{2}}", None), (r"\boxed{(3, 4)}", None), (r"\boxed{3 \text{ or } 4}", None), (r"\boxed{x = 5, y = 6}", None),
    (r"\boxed{3x}", None), (r"\boxed{2x = 10}", None), (r"\boxed{5!}", None), (r"\boxed{5 \text{ million}}", None), (r"\boxed{5\text{ apples}}", 5), (r"\boxed{90^\circ}", 90),
    (r"\boxed{\frac{1}{2}3}", None), (r"\boxed{\text{Area} = 5\text{ m}^2}", 5), (r"\boxed{\frac{1}{\sqrt{\frac{\sqrt{\frac{a}{2}}}{3}}}}; 7", None), (r"\boxed{5", None), (r"The answer is \(5\).", 5),
    ("1 000 000", 1000000), (r"\boxed{1\,000\,000}", 1000000), ("It costs 1 000 000 euros.", 1000000), ("1.000.000", None), ("1,5 litres", None),
    (r"\boxed{0.\overline{3}}", Fraction(1, 3)), ("0.1(6)", Fraction(1, 6)), ("#### 0.333...", None), ("0.3…", None), ("5(3)", None),
    ("#### 5\n#### 6", 6), ("#### 5 #### 6", 6), ("#### 5\n#### x = 6", 6), (r"#### \frac{1}{2}", Fraction(1, 2)), ("#### (3, 4)", None),
    ("The answer is (3, 4).", None), ("The answer is 3 or 4.", None), ("The answer is 3 more than x.", None), ("The answer is that 5 apples are left.", 5),
    ("The answer is 60 km/h.", 60), (r"#### **$42**", 42), ("The answer is $42$ apples.", 42), ("It takes 5 million years.", None), ("It is 5² metres.", None), ("It is 2½ cups.", None), ("It is minus 5.", None), ("The answer is 3 million because of 2.", None),
    (r"2\frac12", Fraction(5, 2)), ("#### Step 1\nAdd: 2 + 3 = 5\n#### Result\nIt is 5", 5),
]  # fmt: skip


@pytest.mark.parametrize("text, number", NUMBERS, ids=range(len(NUMBERS)))
def test_the_number_of_an_answer(text, number):
    assert final_answer(text)[1] == number


def test_two_answers_come_to_the_same_number_in_any_notation():
    for a, b in (("1/2", "0.5"), (r"\boxed{1,000}", "#### 1000"), ("3", Fraction(3)), ("0", "0.0")):
        assert same_number(a, b) and same_number(b, a)
    assert same_number("0.333333333", "1/3") and not same_number("0.333", "1/3")
    assert not same_number("1000000", "1000002") and not same_number("5", "-5")
    assert not same_number("none", "none") and not same_number("none", "0")


def test_answers_that_are_no_numbers_are_the_same_text_or_cannot_be_judged():
    same = [
        (r"\boxed{3\sqrt{2}}", r"So \boxed{ 3 \sqrt 2 }."), (r"\boxed{(3,4)}", "#### (3, 4)"),
        (r"\boxed{\dfrac{\pi}{2}}", r"\frac{\pi}{2}"), ("The answer is B.", "B"),
        (r"\boxed{\left(1, \infty\right)}", r"\boxed{(1,\infty)}"),
    ]  # fmt: skip
    for a, b in same:
        assert same_number(a, b) is True and same_number(b, a) is True, (a, b)
    for first in (r"3\sqrt{2}", "2^{10}", "(3, 4)", "3x + 1", r"3 \pi", r"\frac{3}{\sqrt{2}}"):
        for number in ("3", "2", "4", "10", "1"):
            assert same_number(rf"\boxed{{{first}}}", number) is None
            assert same_number(f"#### {number}", first) is None
    assert same_number("I do not know.", "5") is False  # there is no number to judge
    assert same_number(r"\boxed{2^\frac{1}{2}}", r"\boxed{2^1/2}") is None
    assert same_number(r"\boxed{x}", r"\boxed{X}") is False


def number_and_value(rng):
    """A number as TeX or text, and sympy's value of it."""
    n = rng.choice((1, 2, 3, 5, 7, 10, 12, 30, 1000, 1000000))
    m = rng.choice((2, 3, 4, 8))
    grouped = f"{n:,}".replace(",", rng.choice((",", " ", r"\,", "{,}")))
    forms = [
        (str(n), n), (f"-{n}", -n), (grouped, n), (rf"\frac{{{n}}}{{{m}}}", sympy.Rational(n, m)),
        (f"{n}.5", n + sympy.Rational(1, 2)), (f"{n} 1/{m}", n + sympy.Rational(1, m)),
        (rf"0.\overline{{{n}}}", sympy.Rational(n, 10 ** len(str(n)) - 1)),
    ]  # fmt: skip
    text, value = rng.choice(forms)
    return text, sympy.sympify(value)


def expression_and_value(rng):
    """An expression of one or two numbers, with a unit or words perhaps, and its value."""
    (one, x), (two, y) = number_and_value(rng), number_and_value(rng)
    n, m = rng.choice((2, 3, 4, 5, 10)), rng.randrange(2, 10)
    n_, m_ = sympy.Integer(n), sympy.Integer(m)
    forms = [
        (one, x), (one, x), (f"{one} cm", x), (rf"{one}\text{{ apples}}", x),
        (f"({one}) + ({two})", x + y), (f"({one}) - {m}", x - m), (rf"({one}) \times ({two})", x * y),
        (f"{n} + {m}", n_ + m), (f"{n} - {m}", n_ - m), (f"{n}*{m}", n_ * m), (f"{n} : {m}", n_ / m),
        (rf"{n}\sqrt{{{m}}}", n * sympy.sqrt(m)), (f"{n}^{{{m}}}", n_**m), (f"{n}^{m}", n_**m),
        (f"{n}**{m}", n_**m), (rf"{n}\pi", n * sympy.pi), (f"{n}!", sympy.factorial(n)),
        (rf"\frac{{{n}}}{{\sqrt{{{m}}}}}", n / sympy.sqrt(m_)), (rf"\frac{{{n}}}{{{m}}}{m}", n_),
        (f"{n} million", n_ * 10**6), (rf"{n}\text{{ thousand}}", n_ * 1000), (f"{n} dozen", n_ * 12),
        (f"{n}x", n * sympy.Symbol("x")), (f"{n}x + {m}", n * sympy.Symbol("x") + m),
        (f"({n}, {m})", None), (rf"\{{{n}, {m}\}}", None), (rf"{n} \text{{ or }} {m}", None),
        (rf"\log {n}", sympy.log(n)), (rf"-({n} - {m})", m_ - n),
    ]  # fmt: skip
    return rng.choice(forms)


ANSWERS = [
    "{}", r"So we get $\boxed{{{}}}$.", r"\boxed{{x = {}}}", "Adding 3 and 4...\n#### {}", "#### 7\n#### {}",
    "The answer is {}.", "The answer is ${}$ because of that.", "It comes to {}.",
]  # fmt: skip


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 9))]
)
def test_no_answer_is_right_whose_value_is_another_one(seed):
    """Compared with the numbers in the expression, with the one before, and with its value."""
    rng = random.Random(seed)
    compared, right, before = 0, 0, ("1", sympy.Integer(1))
    while compared < (10_000 if seed else 3_000):
        expression, value = expression_and_value(rng)
        answer = rng.choice(ANSWERS).format(expression)
        numbers = set(re.findall(r"[0-9]+(?:,[0-9]{3})*", answer))
        others = [(text, sympy.Integer(text.replace(",", ""))) for text in sorted(numbers)]
        if value is not None and value.is_Rational:
            others.append((str(value), value))
        for other, known in [*others, before]:
            said = same_number(answer, other)
            assert said == same_number(other, answer)
            alike = value is not None and known is not None and (value - known).is_number
            alike = alike and abs(sympy.N(value - known)) <= 1.1e-6 * abs(sympy.N(known))
            formula = value is None and known is None and expression in other
            assert not said or alike or formula, (answer, other)
            compared += 1
            right += bool(said)
        before = (answer, value)
    assert right > 100


CODE = [
    ("Here:\n```python\ndef f():\n    return 1\n```\nIt returns 1.", "def f():\n    return 1\n"),
    ("```py\na = 1\n```\nand\n```Python\nb = 2\n```", "a = 1\n\nb = 2\n"),
    ("```bash\npip install x\n```\n```python\nimport x\n```", "import x\n"),
    ("```\na = 1\n```\nprints\n```\n1\n```", "a = 1\n"),
    ("1. First:\n   ```python\n   if x:\n       y()\n   ```", "if x:\n    y()\n"),
    ("~~~python\na = 1\n~~~", "a = 1\n"),
    ("```python\na = 1\nb =", "a = 1\nb =\n"),
    ("```python\ns = '''\n``` is a mark'''\n```", "s = '''\n"),
    ("def f():\n    return 1\n", "def f():\n    return 1\n"),
    ("print(1)", "print(1)"),
    ("Yes", None), ("yes, no", None), ("42", None), ("I cannot do that.", None), ("", None), ("\0", None),
    ("```bash\nls\n```", None), ("(" * 10000, None),
]  # fmt: skip


@pytest.mark.parametrize("text, code", CODE, ids=range(len(CODE)))
def test_the_code_of_an_answer(text, code):
    assert extract_code(text) == code


def test_a_program_that_comes_to_its_end_is_all_right_and_runs_alike():
    code = """
import asyncio, collections, dataclasses, logging, tempfile, threading, typing, unittest.mock
@dataclasses.dataclass
class Point:
    x: int
print({str(i) for i in range(50)}, Point(1), __name__)
with tempfile.TemporaryDirectory() as folder:
    with open(folder + "/a", "w") as f:
        print("written", file=f)
    assert open(folder + "/a").read() == "written\\n"
open("here", "w").close()
thread = threading.Thread(target=print, args=("from a thread",))
thread.start()
thread.join()
class Tests(unittest.TestCase):
    def test_one(self):
        self.assertEqual(1, 1)
assert unittest.main(exit=False, verbosity=0).result.wasSuccessful()
print("end", flush=True)
"""
    code = code.replace(
        "assert unittest", "import sys; sys.stderr = open('log', 'w')\nassert unittest"
    )
    first, second = run_python(code), run_python(code)
    assert first == second and first.ok and first.reason == "ok"
    assert first.output.endswith("Point(x=1) __main__\nfrom a thread\nend\n")
    assert (
        run_python("import sys\nprint(sys.argv, sys.stdin.read() == '')").output
        == "['program.py'] True\n"
    )
    names = json.loads(run_python("import json, os\nprint(json.dumps([*os.environ]))").output)
    given = {"OPENBLAS_NUM_THREADS", "PYTHONHASHSEED", "PYTHONUTF8", "TMPDIR"}
    assert {*names} - {"LC_CTYPE"} == given
    ran = run_python("import os\nprint(os.listdir())\nos.close(1)\nos.close(2)")
    assert ran == (True, "ok", "[]\n")
    with pytest.raises(ValueError, match="memory_mib=8"):
        run_python("", memory_mib=8)


UNITTEST = """
import unittest
class Tests(unittest.TestCase):
    def test_one(self):
        self.assertEqual(1, EXPECTED)
CALL
print("end")
"""


@pytest.mark.parametrize(
    "call",
    [
        "unittest.main()",
        "if __name__ == '__main__': unittest.main(verbosity=2)",
        "unittest.main(exit=False)",
        "unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(Tests))",
    ],
)
def test_tests_that_pass_go_on_to_the_last_line_and_tests_that_fail_are_a_failure(call):
    code = UNITTEST.replace("CALL", call)
    ran = run_python(code.replace("EXPECTED", "1"))
    assert ran.ok and ran.output.endswith("OK\nend\n"), ran
    assert not run_python(code.replace("EXPECTED", "1") + "\nassert False").ok
    ran = run_python(code.replace("EXPECTED", "2"))
    assert (ran.ok, ran.reason) == (False, "error") and "end" not in ran.output, ran


def test_asyncio_runs_and_its_kind_of_socket_reaches_nothing(tmp_path):
    code = "import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    return 7\n"
    ran = run_python(code + "print(asyncio.run(asyncio.wait_for(f(), 1)))")
    assert ran == (True, "ok", "7\n")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "s"))
    server.listen()
    path = f"{str(tmp_path / 's')!r}"
    for call in (f"s.connect({path})", "s.bind('x')", f"s.sendto(b'x', {path})"):
        ran = run_python(f"import socket\ns = socket.socket(socket.AF_UNIX)\n{call}")
        assert ran.reason == "refused", call
    for call in (
        "asyncio.open_connection('127.0.0.1', 1)",
        f"asyncio.open_unix_connection({path})",
    ):
        ran = run_python(f"import asyncio\nasync def f(): await {call}\nasyncio.run(f())")
        assert ran.reason == "refused", call
    server.close()


def test_a_program_that_fails_says_where():
    ran = run_python("def f():\n    assert 1 == 2, 'no'\nf()\n")
    assert (ran.ok, ran.reason) == (False, "error")
    assert ran.output.startswith("Traceback") and ran.output.endswith("AssertionError: no\n")
    assert 'File "program.py", line 2, in f' in ran.output and "<string>" not in ran.output
    for code in (
        "1 +",
        "\0",
        "raise KeyboardInterrupt",
        "import os; os.abort()",
        "'\ud800'.encode()",
    ):
        assert run_python(code).reason == "error", code
    assert run_python("f = lambda: f()\nf()").reason == "error"


# what a program may try, and what that comes to; OUT is a folder of the test's own, so that a hole
# costs nobody anything
HOSTILE = {
    "a fork bomb": ("import os\nfor _ in range(8): os.fork()", "refused"),
    "an endless loop": ("while True: pass", "timeout"),
    "sleep": ("import time; time.sleep(100)", "timeout"),
    "an endless loop that catches all": ("while True:\n  try:\n    while True: pass\n  except BaseException: pass", "timeout"),
    "a file outside": ("open('OUT/new', 'w')", "refused"),
    "a file above": ("open('../nemotron4-new', 'a')", "refused"),
    "a file by os.open": ("import os; os.open('OUT/new', os.O_CREAT | os.O_WRONLY)", "refused"),
    "a file by a link": ("import os; os.symlink('OUT/new', 'x'); open('x', 'w')", "refused"),
    "a file by a folder": ("import os; d = os.open('OUT', os.O_RDONLY); os.open('new', 66, dir_fd=d)", "refused"),
    "removal": ("import os; os.remove('OUT/old/file')", "refused"),
    "renaming": ("import os; open('a', 'w'); os.rename('a', 'OUT/new')", "refused"),
    "a tree's removal": ("import shutil; shutil.rmtree('OUT/old')", "refused"),
    "a huge file": ("with open('x', 'w') as f:\n  while True: f.write('x' * 2**20)", "error"),
    "huge output": ("while True: print('x' * 10000)", "output"),
    "huge output by os.write": ("import os\nwhile True: os.write(2, b'x' * 10000)", "output"),
    "a memory hog": ("x = []\nwhile True: x.append(bytearray(2**24))", "memory"),
    "one large object": ("x = bytearray(2**33)", "memory"),
    "a socket": ("import socket; socket.socket()", "refused"),
    "a connection": ("import urllib.request as r; r.urlopen('http://127.0.0.1:1')", "refused"),
    "a name looked up": ("import socket; socket.getaddrinfo('localhost', 1)", "refused"),
    "leaving": ("import os; os._exit(0)", "exit"),
    "leaving politely": ("import sys; sys.exit(0)", "exit"),
    "a false verdict": ("import os; os.write(1, b'ok\\n'); os._exit(0)", "exit"),
    "killing the parent": ("import os; os.kill(os.getppid(), 9)", "refused"),
    "killing the group": ("import os; os.killpg(0, 9)", "refused"),
    "reading stdin": ("input()", "error"),
    "a subprocess": ("import subprocess; subprocess.run(['true'])", "refused"),
    "a shell": ("import os; os.system('true')", "refused"),
    "exec": ("import os; os.execv('/bin/true', ['true'])", "refused"),
    "multiprocessing": ("import multiprocessing as m; m.Process(target=print).start()", "refused"),
    "a raw fork_exec": ("import _posixsubprocess as p; p.fork_exec()", "refused"),
    "native code": ("import ctypes; ctypes.CDLL(None).fork()", "refused"),
    "raising a limit": ("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "refused"),
    "closing all files": ("import os; os.closerange(0, 64)", "exit"),
    "many files": ("f = [open(str(i), 'w') for i in range(1000)]", "error"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained(name, tmp_path):
    code, reason = HOSTILE[name]
    (tmp_path / "old").mkdir()
    (tmp_path / "old/file").touch()
    start = time.monotonic()
    timeout = 0.7 if reason == "timeout" else 10
    ran = run_python(code.replace("OUT", str(tmp_path)), timeout=timeout, memory_mib=256)
    assert (ran.ok, ran.reason) == (False, reason), ran
    assert time.monotonic() - start < 8 and len(ran.output) <= 64_000
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "old"]


def alive(mark):
    """Processes that have the mark in their command line or environment."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/{name}", "rb") as f:
                found += [pid] if mark.encode() in f.read() else []
    return found


def gone(mark):
    deadline = time.monotonic() + 5
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(mark)


def test_a_program_that_is_stopped_is_gone_even_from_a_session_of_its_own():
    code = "import os, time\nprint(os.getcwd())\ntry: os.setsid()\nexcept OSError: pass\ntime.sleep(99)"
    ran = run_python(code, timeout=0.7)
    assert ran.reason == "timeout" and ran.output.startswith("/") and gone(ran.output.strip())
    assert not os.path.exists(ran.output.strip())


def test_nothing_that_a_program_started_outlives_it(monkeypatch, tmp_path):
    # as if the hook had a hole: a grandchild in a session of its own, which holds the output open
    with open(guard.__file__) as source:
        holed = source.read().replace("= refuse_ways_out()", "= PermissionError")
    (tmp_path / "guard.py").write_text(holed)
    monkeypatch.setattr(guard, "__file__", str(tmp_path / "guard.py"))
    code = (
        "import subprocess, time\nsubprocess.Popen(['sleep', '3333.25'], start_new_session=True)\n"
    )
    start = time.monotonic()
    assert run_python(code).ok
    assert run_python(code + "while True: pass", timeout=0.7).reason == "timeout"
    assert time.monotonic() - start < 5
    assert gone("3333.25") or not namespaces()


def namespaces():
    """Whether the kernel lets a process make namespaces of its own."""
    return subprocess.run(["unshare", "-Upn", "true"], capture_output=True).returncode == 0


def test_output_is_cut_at_its_limit_in_the_same_way():
    code = "print('x' * 99)"
    assert run_python(code, output_limit=100).ok
    for limit in (99, 50):
        ran = run_python(code, output_limit=limit)
        assert ran == (False, "output", "x" * limit)
    assert run_python("import os; os.write(1, b'\\xff')").output == "\ufffd"


def test_programs_run_side_by_side():
    ran = {}
    threads = [
        threading.Thread(target=lambda i=i: ran.update({i: run_python(f"print({i} ** 2)")}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {i: r.output for i, r in ran.items()} == {i: f"{i * i}\n" for i in range(8)}
