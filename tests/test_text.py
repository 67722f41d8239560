"""data.py: what the synthetic data pipeline does to text without a model: lists in answers,
duplicates, decontamination, verifiable instructions, numbers, and running code."""

import collections
import itertools
import json
import os
import random
import re
import sys
import time
import types
from fractions import Fraction

import pytest

import data
from data import (
    Decontaminator,
    Instruction,
    draw_instructions,
    extract_code,
    final_number,
    near_duplicates,
    normalise,
    parse_list,
    read_evaluations,
    run_python,
    same_number,
)

ABC = ["Alpha one", "Beta two", "Gamma three"]
QA = ["How do bees fly?", "Why is the sky blue?", "What is rust?"]
T = ["Sorting: quick sort", "Graphs: shortest paths", "Trees: red and black"]

# (what a model wrote, the items)
LISTS = [
    # numbers
    ("1. Alpha one\n2. Beta two\n3. Gamma three", ABC),
    ("1) Alpha one\n2) Beta two\n3) Gamma three", ABC),
    ("(1) Alpha one\n(2) Beta two\n(3) Gamma three", ABC),
    ("1: Alpha one\n2: Beta two\n3: Gamma three", ABC),
    ("1 - Alpha one\n2 - Beta two\n3 – Gamma three", ABC),
    ("[1] Alpha one\n[2] Beta two\n[3] Gamma three", ABC),
    ("#1 Alpha one\n#2 Beta two\n#3: Gamma three", ABC),
    ("1.Alpha one\n2.Beta two\n3.Gamma three", ABC),
    ("**1.** Alpha one\n**2.** Beta two\n**3.** Gamma three", ABC),
    ("**1. Alpha one**\n**2. Beta two**\n**3. Gamma three**", ABC),
    ("### 1. Alpha one\n### 2. Beta two\n### 3. Gamma three", ABC),
    ("1\ufe0f\u20e3 Alpha one\n2\ufe0f\u20e3 Beta two\n3\ufe0f\u20e3 Gamma three", ABC),
    ("① Alpha one\n② Beta two\n③ Gamma three", ABC),
    (" 8. Alpha one\n 9. Beta two\n10. Gamma three", ABC),
    ("1. Alpha one 2. Beta two 3. Gamma three", ABC),
    ("Here you go: 1) Alpha one 2) Beta two 3) Gamma three", ABC),
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
    ("• Alpha one • Beta two • Gamma three", ABC),
    ("- **Alpha one**\n- **Beta two**\n- **Gamma three**", ABC),
    ("* *Alpha one*\n* _Beta two_\n* `Gamma three`", ABC),
    # plain lines
    ("Alpha one\nBeta two\nGamma three", ABC),
    ("Alpha one\n\nBeta two\n\nGamma three\n", ABC),
    ("Alpha one\r\nBeta two\r\nGamma three\r\n", ABC),
    ("Here are three topics:\nAlpha one\nBeta two\nGamma three", ABC),
    ("Sure! Here are 3 topics:\n\nAlpha one\nBeta two\nGamma three\n\nLet me know if you want more!", ABC),
    ("**Alpha one**\n**Beta two**\n**Gamma three**", ABC),
    ('"Alpha one"\n"Beta two"\n"Gamma three"', ABC),
    ('"Alpha one",\n"Beta two",\n"Gamma three"', ABC),
    ("“Alpha one”\n“Beta two”\n“Gamma three”", ABC),
    ("Write about how the harbour of a small town changed when the railway came and\n"
     "the fishing boats went elsewhere\nDescribe a day at a market",
     ["Write about how the harbour of a small town changed when the railway came and the fishing "
      "boats went elsewhere", "Describe a day at a market"]),
    # one line
    ("Alpha one, Beta two, Gamma three", ABC),
    ("Alpha one, Beta two, and Gamma three.", ABC),
    ("Here are three topics: Alpha one; Beta two; Gamma three", ABC),
    ("Alpha one | Beta two | Gamma three", ABC),
    ("代数、几何、概率", ["代数", "几何", "概率"]),
    # JSON and Python
    ('["Alpha one", "Beta two", "Gamma three"]', ABC),
    ('```json\n["Alpha one", "Beta two", "Gamma three"]\n```', ABC),
    ('Sure:\n\n```json\n[\n  "Alpha one",\n  "Beta two",\n  "Gamma three"\n]\n```\nEnjoy!', ABC),
    ('Here is the list: ["Alpha one", "Beta two", "Gamma three"]', ABC),
    ("['Alpha one', 'Beta two', 'Gamma three']", ABC),
    ("topics = ['Alpha one', 'Beta two', 'Gamma three',]", ABC),
    ('["Alpha one", "Beta two", "Gamma three",]', ABC),
    ('[{"topic": "Alpha one"}, {"topic": "Beta two"}, {"topic": "Gamma three"}]', ABC),
    ('[{"id": 1, "q": "How do bees fly?"}, {"id": 2, "q": "Why is the sky blue?"}]', QA[:2]),
    ('{"topics": ["Alpha one", "Beta two", "Gamma three"]}', ABC),
    ('{"n": 3, "topics": ["Alpha one", "Beta two", "Gamma three"]}', ABC),
    ('{"1": "Alpha one", "2": "Beta two", "3": "Gamma three"}', ABC),
    ('[1984, 2.50, "Yes"]', ["1984", "2.50", "Yes"]),
    ('["Say \\"hi\\" to all", "caf\\u00e9"]', ['Say "hi" to all', "café"]),
    # YAML
    ("- Sorting: quick sort\n- Graphs: shortest paths\n- Trees: red and black", T),
    ("- Yes\n- No\n- 1984\n- null\n- 1e3", ["Yes", "No", "1984", "null", "1e3"]),
    ("```yaml\n- Alpha one\n- Beta two\n- Gamma three\n```", ABC),
    ("- 'Alpha one'\n- \"Beta two\"\n- Gamma three", ABC),
    ("topics:\n  - Alpha one\n  - Beta two\n  - Gamma three", ABC),
    ("- question: How do bees fly?\n- question: Why is the sky blue?", QA[:2]),
    ("- |\n  Alpha one\n- |\n  Beta two\n- >-\n  Gamma three", ABC),
    ("- 'It''s late'\n- \"What's up?\"", ["It's late", "What's up?"]),
    # fences, headings, first and last words
    ("```\nAlpha one\nBeta two\nGamma three\n```", ABC),
    ("Here they are:\n```text\n1. Alpha one\n2. Beta two\n3. Gamma three\n```\nHope this helps.", ABC),
    ("Sure! Here are 3 questions:\n\n1. How do bees fly?\n2. Why is the sky blue?\n"
     "3. What is rust?\n\nLet me know if you need more.", QA),
    ("1. How do bees fly?\n2. Why is the sky blue?\n3. What is rust?\nFeel free to ask again!", QA),
    ("1. How do bees fly?\n2. Why is the sky blue?\n3. What is rust?\n\nEvery question is open.", QA),
    ("# Topics\n\n- Alpha one\n- Beta two\n- Gamma three\n\n---\n*Sorted by name.*", ABC),
    ("**Letters**\n1. Alpha one\n2. Beta two\n\n**More letters:**\n3. Gamma three", ABC),
    ("Easy:\n- Alpha one\n- Beta two\n\nHard:\n- Gamma three", ABC),
    ("<think>\n1. no\n2. not this\n</think>\n1. Alpha one\n2. Beta two\n3. Gamma three", ABC),
    ("\ufeff1.\u00a0Alpha one\n2.\u00a0Beta\u200b two\n3.\u00a0Gamma three", ABC),
    # titles, several lines, what is below an item
    ("1. **Sorting**: quick sort\n2. **Graphs:** shortest paths\n3. **Trees**: red and black", T),
    ("1. Sorting: quick sort\n2. Graphs: shortest paths\n3. Trees: red and black", T),
    ("1. **Sorting**\n   quick sort\n2. **Graphs**\n   shortest paths\n3. **Trees**\n   red and black", T),
    ("**Sorting**\nquick sort\n\n**Graphs**\nshortest paths\n\n**Trees**\nred and black", T),
    ("### Sorting\nquick sort\n\n### Graphs\nshortest paths\n\n### Trees\nred and black", T),
    ("1. **Sorting**\n\nquick sort\n\n2. **Graphs**\n\nshortest paths\n\n3. **Trees**\n\nred and black", T),
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
     ["What does this print?\n   print(1)", "What is rust?"]),
    ("1. Alpha one\n\n\n2. Beta two\n\n\n3. Gamma three", ABC),
    ("A first line\nof a paragraph\n\nA second one\nof two lines", ["A first line of a paragraph", "A second one of two lines"]),
    ("1. **Sorting** a list of **n** numbers\n2. Use 2**3 and 4**5", ["Sorting a list of **n** numbers", "Use 2**3 and 4**5"]),
    ('1. "Alpha one"\n2. \'Beta two\'\n3. “Gamma three”', ABC),
    ('1. "Yes" and "no"\n2. The word "rust"', ['"Yes" and "no"', 'The word "rust"']),
    # tables and html
    ("| # | Topic |\n|---|---|\n| 1 | Alpha one |\n| 2 | Beta two |\n| 3 | Gamma three |", ABC),
    ("Area | Topic\n--- | ---\nSorting | quick sort\nGraphs | shortest paths\nTrees | red and black", T),
    ("<ul>\n<li>Alpha one</li>\n<li>Beta two</li>\n<li>Gamma three</li>\n</ul>", ABC),
    ("<p>Topics:</p><ol><li>Alpha <b>one</b></li><li>Beta two</li><li>Gamma three</li></ol><p>Bye</p>", ABC),
    ("<ul><li>Bread &amp; butter</li><li>Sorting<ul><li>quick</li></ul></li></ul>",
     ["Bread & butter", "Sorting; quick"]),
    # one item
    ("1. Alpha one", ["Alpha one"]),
    ("Sure! Here is one:\n\n- Alpha one\n\nLet me know!", ["Alpha one"]),
    # no list
    ("", []),
    ("I'm sorry, but I cannot help, advise or comment on that.", []),
    ("Alpha is a letter.", []),
    ("Bees fly. They beat their wings. It is quick.\nThe sky is blue. Light is scattered. So it "
     "looks blue.", []),
]  # fmt: skip


@pytest.mark.parametrize("text, items", LISTS, ids=range(len(LISTS)))
def test_a_list_is_read_in_any_shape(text, items):
    assert parse_list(text) == items


def test_no_item_has_a_word_that_is_not_in_the_answer():
    plain = html_free = "".join(text for text, _ in LISTS)
    assert plain == html_free
    rng = random.Random(0)
    lines = [line for text, _ in LISTS for line in text.splitlines()]
    for _ in range(1000):  # and no mixture of shapes breaks the parser
        text = "\n".join(rng.choices(lines, k=rng.randint(0, 12)))
        words = set(re.findall(r"\w+", data.html.unescape(text).replace("\u200b", "")))
        words |= {"hi", "café"}  # escapes in JSON
        for item in parse_list(text):
            assert item and set(re.findall(r"\w+", item)) <= words, (text, item)
