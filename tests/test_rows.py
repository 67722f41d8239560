"""Rows of published files: the columns are theirs, the content is made here, and what each row must
become is written out by hand."""

import gzip
import json
import math
import random
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_stages import base, stage  # noqa: F401  base is a fixture

import align
import data
from recipes import rows

READERS = {"sft": data.sft_rows, "preference": data.preference_rows, "reward": data.reward_rows}
HEAD = "<extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n"
HELLO = "Hello.\n<extra_id_1>"
ATTRIBUTES = dict(helpfulness=4, correctness=3, coherence=2, complexity=1, verbosity=0)


def user(text="Hi"):
    return {"role": "user", "content": text}


def answer(text="Hello."):
    return {"role": "assistant", "content": text}


def said(speaker, text, **more):
    return {"from": speaker, "value": text, **more}


@pytest.fixture(scope="session")
def tokenizer():
    """A byte a token, so that counts are those of bytes and marks."""
    return data.train_bpe([], 263)


def write(path, *objects):
    """Write rows into a file of the kind that its name says."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(objects)), path)
    elif path.suffix == ".json":
        path.write_text("\ufeff\n" + json.dumps(objects, indent=1))
    else:
        text = "".join(f"{json.dumps(row)}\r\n" for row in objects).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def spelt(row, tokenizer):
    """(all, trained) of each segment, as text."""
    both = zip(row.ids, row.trained, strict=True)
    return [(tokenizer.decode(ids), tokenizer.decode(ids[trained])) for ids, trained in both]


def read(kind, tmp_path, tokenizer, *objects, name="a.jsonl", **options):
    return READERS[kind](write(tmp_path / name, *objects), tokenizer, 4096, **options)


# ---- formats that the stages read as they are ----------------------------------------------------

PAIR = {
    "prompt": "Hi",
    "prompt_id": "7f",
    "chosen": [user(), answer()],
    "rejected": [user(), answer("No.")],
    "messages": [user(), answer()],
    "score_chosen": 8.5,
    "score_rejected": 2.0,
}
TURNS = [said("human", "Hi"), said("gpt", "Hello.")]
# fmt: off
CHATS = {
    "ultrachat": {"prompt": "Hi", "prompt_id": "1", "messages": [user(), answer()]},
    "sharegpt": {"id": "1", "conversations": TURNS},
    "daring anteater": {"system": "", "mask": "User", "dataset": "synthetic", "conversations": [
        said("User", "Hi", label=None), said("Assistant", "Hello.", label=None)]},
    "nemo's prompts": {"input": "Hi", "output": "Hello."},
    "prompts": {"prompt": "Hi", "response": "Hello."},
    "helpsteer2": {"prompt": "Hi", "response": "Hello.", **ATTRIBUTES},
    "ultrafeedback_binarized": PAIR,
}
PAIRS = {
    "ultrafeedback_binarized": (PAIR, [8.5, 2.0]),
    "tulu": ({"id": "1", "source": "x", "chosen": PAIR["chosen"], "rejected": PAIR["rejected"]},
             None),
    "nemo": ({"prompt": "Hi", "chosen_response": "Hello.", "rejected_response": "No.",
              "chosen_reward": 3, "rejected_reward": -1.5}, [3, -1.5]),
    "rewardbench": ({"prompt": "Hi", "chosen": "Hello.", "rejected": "No.", "subset": "x",
                     "id": 1, "chosen_model": "a", "rejected_model": "b"}, None),
}
# fmt: on


@pytest.mark.parametrize("name", CHATS)
def test_a_conversation_of_each_format_becomes_the_same_row(tmp_path, tokenizer, name):
    ((row,), counts) = read("sft", tmp_path, tokenizer, CHATS[name])
    assert spelt(row, tokenizer) == [(HEAD + HELLO, HELLO)]
    assert row.values is None and not any(counts.values())


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_each_format_becomes_the_same_row_with_its_rewards(tmp_path, tokenizer, name):
    given, rewards = PAIRS[name]
    ((row,), _) = read("preference", tmp_path, tokenizer, given)
    no = "No.\n<extra_id_1>"
    assert spelt(row, tokenizer) == [(HEAD + HELLO, HELLO), (HEAD + no, no)]
    assert rewards == (None if row.values is None else row.values.tolist())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_every_stage_reads_every_kind_of_file_and_names_its_rows(tmp_path, tokenizer, name):
    where = {"a.jsonl": ":2", "a.jsonl.gz": ":2"}.get(name, ": row 2")
    scored = {"messages": [user(), answer()], "label": [1.0, 2.0, 3.0, 4.0, 0.0]}
    for kind, good in (("sft", CHATS["sharegpt"]), ("preference", PAIR), ("reward", scored)):
        rows_, _ = read(kind, tmp_path, tokenizer, good, good, name=name)
        (plain, _), _ = read(kind, tmp_path, tokenizer, good, good)
        assert [row.key for row in rows_] == [plain.key] * 2
        assert rows_[1].where == f"{tmp_path / name}{where}"
        key = next(iter(good))
        bad = good | {key: type(good[key])()}  # an empty text or list
        bad |= {"conversations": []} if kind == "sft" else {}
        bad |= {"chosen": [], "prompt": "x"} if kind == "preference" else {"messages": []}
        with pytest.raises(data.BadDocument, match=re.escape(f"{name}{where}: ")):
            read(kind, tmp_path, tokenizer, good, bad, name=name)


def test_nemos_system_turn_joins_the_conversation_and_another_mask_is_refused(tmp_path, tokenizer):
    row = CHATS["daring anteater"] | {"system": "Be brief."}
    ((found,), _) = read("sft", tmp_path, tokenizer, row)
    assert spelt(found, tokenizer)[0][0].startswith("<extra_id_0>System\nBe brief.\n<extra_id_1>U")
    with pytest.raises(data.BadDocument, match="a.jsonl:1: the row has 'mask'"):
        read("sft", tmp_path, tokenizer, row | {"mask": "Assistant"})


def test_odd_ends_of_a_conversation_are_left_out_and_counted(tmp_path, tokenizer):
    system = {"role": "system", "content": "S"}
    whole = [user("a"), answer("b"), user("c"), answer("d")]
    ((plain,), _) = read("sft", tmp_path, tokenizer, {"messages": [system, *whole]})
    odd = [
        [system, answer("x"), *whole],
        [system, *whole, user("y")],
        [system, answer("x"), *whole, user("y")],
    ]
    found, counts = read("sft", tmp_path, tokenizer, *({"messages": chat} for chat in odd))
    assert {row.key for row in found} == {plain.key} and counts["trimmed"] == 3
    pair = {"prompt": [system, answer("x"), user("a")], "chosen": "b", "rejected": "e"}
    ((row,), counts) = read("preference", tmp_path, tokenizer, pair)
    assert spelt(row, tokenizer)[0][0].startswith("<extra_id_0>System\nS\n<extra_id_1>User\na\n")
    assert counts["trimmed"] == 1
    scored = {"messages": [*whole, user("y")], "label": [1] * 5}
    with pytest.raises(data.BadDocument, match="the last message is not the assistant's"):
        read("reward", tmp_path, tokenizer, scored)  # the label is of an answer that is not there
    for chat in ([user()], [answer()], [answer(), user()], [system, user()], [answer()] * 2):
        with pytest.raises(data.BadDocument, match="a.jsonl:1: "):
            read("sft", tmp_path, tokenizer, {"messages": chat})


def test_transformers_trains_as_many_tokens_of_the_same_messages(tmp_path, tokenizer):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.standard)
    template = (
        "{% if messages[0].role != 'system' %}<extra_id_0>System\n\n{% endif %}"
        "{% for m in messages %}{% if m.role == 'system' %}<extra_id_0>System\n{{ m.content }}\n"
        "{% else %}<extra_id_1>{{ m.role.capitalize() }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}\n{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}"
        "{% endif %}{% endfor %}<extra_id_1>"
    )
    rng = random.Random(0)
    for n in range(1, 6):
        texts = ["".join(rng.choices("ab \né", k=rng.randrange(1, 9))) + "z" for _ in range(2 * n)]
        chat = [(user, answer)[i % 2](text) for i, text in enumerate(texts)]
        chat = [{"role": "system", "content": "S"}] * (n % 2) + chat
        how = dict(tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        want = theirs.apply_chat_template(chat, chat_template=template, **how)
        ((row,), _) = read("sft", tmp_path, tokenizer, {"messages": chat})
        assert row.ids[0].tolist() == want["input_ids"]
        # ours also trains the mark after each answer, which their span ends before
        assert row.trained[0].sum() == sum(want["assistant_masks"]) + n


@pytest.mark.slow
def test_trl_splits_the_same_prompt_off_a_pair(tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    from trl.data_utils import extract_prompt

    assert trl
    before = [user("a"), answer("b"), user("c")]
    pair = {"chosen": [*before, answer("d")], "rejected": [*before, answer("e")]}
    split = extract_prompt(pair)
    both = [
        read("preference", tmp_path, tokenizer, given)[0][0]
        for given in (pair, split, pair | {"prompt": before})
    ]
    assert {row.key for row in both} == {both[0].key}
    head = spelt(both[0], tokenizer)[0][0].removesuffix("d\n<extra_id_1>")
    ids, _ = data.render_chat(split["prompt"], tokenizer)
    assert head == tokenizer.decode(ids)


# ---- formats that recipes.rows converts ----------------------------------------------------------

STEERED = "Hi\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\n2+2?"
BEFORE = [user(), answer("Yes?"), user("2+2?")]
# fmt: off
CONVERTED = {
    "helpsteer2_first": ({"split": "train", "prompt": STEERED, "response_1": "4", "response_2": "5",
        "preference_strength": -2, "preference_statement": "x", "preference_elaboration": "y",
        "three_most_similar_preferences": [], "all_preferences_unprocessed": []},
        dict(prompt=BEFORE, chosen="4", rejected="5", chosen_reward=2, rejected_reward=0)),
    "helpsteer2_second": ({"prompt": "Hi", "response_1": "4", "response_2": "5",
        "preference_strength": 3},
        dict(prompt=[user()], chosen="5", rejected="4", chosen_reward=3, rejected_reward=0)),
    "helpsteer3": ({"domain": "code", "language": "python", "context": [user(STEERED)],
        "response1": "4", "response2": "5", "overall_preference": 1, "individual_preference": []},
        dict(prompt=[user(STEERED)], chosen="5", rejected="4", chosen_reward=1, rejected_reward=0)),
    "helpsteer3_text": ({"context": "Hi", "response1": "4", "response2": "5",
        "overall_preference": -3},
        dict(prompt=[user()], chosen="4", rejected="5", chosen_reward=3, rejected_reward=0)),
    "nemo_rl": ({"context": [user()], "task_name": "x", "completions": [
        {"rank": 1, "completion": [answer("b")]}, {"rank": 0, "completion": [answer("a")]},
        {"rank": 2, "completion": [answer("c")]}]},
        dict(prompt=[user()], chosen=[answer("a")], rejected=[answer("c")])),
    "ultrafeedback": ({"source": "x", "instruction": "Hi", "models": [], "completions": [
        {"model": "m", "response": r, "annotations": {}, "overall_score": 10.0,
         "fine-grained_score": s} for r, s in (("a", 3.5), ("b", 4.75), ("c", 1.0), ("d", 1.0))]},
        dict(prompt=[user()], chosen="b", rejected="c", chosen_reward=4.75, rejected_reward=1.0)),
    "hh_rlhf": ({"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 2+2?\n\nAssistant: 4",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 2+2?\n\nAssistant: 5\n"},
        dict(chosen=[*BEFORE, answer("4")], rejected=[*BEFORE, answer("5\n")])),
    "annotators": ({"prompt": "Hi", "response": "Hello.", "helpfulness": [4, 3, 4],
        "correctness": [4], "coherence": [1, 2], "complexity": [0, 0], "verbosity": [2, 3]},
        dict(prompt="Hi", response="Hello.", helpfulness=11 / 3, correctness=4, coherence=1.5,
             complexity=0, verbosity=2.5)),
    "nemo_labels": ({"system": "S", "mask": "User", "type": "VALUE_TO_TEXT", "conversations": [
        said("User", "Hi", label=None), said("Assistant", "Hello.",
        label="quality:4,toxicity:0,helpfulness:3,verbosity:1")]},
        dict(messages=[{"role": "system", "content": "S"}, user(), answer()
             | {"label": "quality:4,toxicity:0,helpfulness:3,verbosity:1"}],
             label=[4, 0, -100, -100, 3, -100, -100, -100, 1])),
}
BAD = {
    "tie": ({"context": "Hi", "response1": "4", "response2": "5", "overall_preference": 0}, ""),
    "far": ({"context": "Hi", "response1": "4", "response2": "5", "overall_preference": 4},
            "from -3 to 3"),
    "nan": ({"context": "Hi", "response1": "4", "response2": "5",
             "overall_preference": float("nan")}, "finite number"),
    "unknown": ({"text": "x"}, "are those of none of HelpSteer2-Preference"),
    "no_human": ({"chosen": "x", "rejected": "y"}, "does not begin with"),
    "empty": ({"context": "Hi", "response1": "", "response2": "5", "overall_preference": 1},
              "empty response"),
    "one": ({"instruction": "Hi", "completions": [{"response": "a", "fine-grained_score": 1}]},
            "a pair needs two"),
    "text": ({"instruction": "Hi", "completions": ["a", "b"]}, "a list of objects"),
    "no_ratings": ({**CONVERTED["annotators"][0], "coherence": []}, "at least one data point"),
    "label": ({"conversations": [said("User", "Hi"), said("Assistant", "x", label="good")]},
              "write helpfulness:4"),
}
# fmt: on


@pytest.mark.parametrize("name", CONVERTED)
def test_a_row_of_each_format_is_converted_as_worked_out_by_hand(name):
    given, wanted = CONVERTED[name]
    assert rows.converted(given | {"empty": None}) == wanted


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_converted_is_named_by_its_line_or_counted(tmp_path, name, caplog):
    given, rule = BAD[name]
    path = write(tmp_path / "a.jsonl.gz", CONVERTED["helpsteer3"][0], given)
    cfg = rows.RowsConfig(path, tmp_path / "out.jsonl")
    if rule:
        with pytest.raises(data.BadDocument, match=rf"a\.jsonl\.gz:2: .*{rule}.*--skip-bad"):
            rows.convert(cfg)
        assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl.gz"]  # nothing half done
    caplog.set_level("INFO", logger="nemotron4")
    data.log.propagate = True
    rows.convert(rows.RowsConfig(path, tmp_path / "out.jsonl", skip_bad=True))
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [CONVERTED["helpsteer3"][1]]
    assert ("1 bad, 1 HelpSteer3" if rule else "1 HelpSteer3, 1 tied") in caplog.text


def test_a_split_is_chosen_and_files_of_no_row_or_that_exist_are_refused(tmp_path):
    first, _ = CONVERTED["helpsteer2_first"]
    both = [first | {"split": name} for name in ("train", "validation", "train")]
    path = write(tmp_path / "a.parquet", *({**row, "split": row["split"]} for row in both))
    rows.convert(rows.RowsConfig(path, tmp_path / "out.jsonl", split="validation"))
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1
    with pytest.raises(ValueError, match="out.jsonl exists"):
        rows.convert(rows.RowsConfig(path, tmp_path / "out.jsonl"))
    with pytest.raises(ValueError, match="no row left .3 of another split than test"):
        rows.convert(rows.RowsConfig(path, tmp_path / "other.jsonl", split="test"))


@pytest.mark.parametrize("loss", ["regular", "margin", "scaled"])
def test_a_published_strength_is_the_margin_or_the_factor_of_the_reward_stages_loss(
    tmp_path, tokenizer, loss
):
    names = ("helpsteer2_first", "helpsteer2_second", "helpsteer3")
    path = write(tmp_path / "a.jsonl", *(CONVERTED[name][0] for name in names))
    rows.convert(rows.RowsConfig(path, tmp_path / "out.jsonl"))
    shape = replace(align.SHAPES["nano"], seq_len=2048, n_attributes=5, vocab_size=263)
    cfg = align.RewardConfig(loss=loss, data=tmp_path / "out.jsonl", model=shape)
    found = align.read_rows_of(cfg, cfg.data, tokenizer)
    first = found[0].ids[0].tolist()
    assert first.count(5) == 4 and found[2].ids[0].tolist().count(5) == 2  # HelpSteer3's are text
    batch = {name: torch.as_tensor(array) for name, array in data.pack(found, 2048, False).items()}
    scores = torch.randn(3, 2048, 5, generator=torch.Generator().manual_seed(0)).double()
    got, _ = align.objective_of(cfg, found, "data").measure(scores, batch)
    want = 0.0
    for window, strength in enumerate((2, 3, 1)):  # as the columns say
        chosen, rejected = (scores[window, end, 0].item() for end in batch["ends"][window, 0])
        margin = chosen - rejected
        shift = strength if loss == "margin" else 0
        factor = strength if loss == "scaled" else 1
        want += factor * math.log1p(math.exp(shift - margin))
    assert got.item() == pytest.approx(want, rel=1e-12)


# ---- fuzz ----------------------------------------------------------------------------------------

JUNK = [None, 0, 1, -1.5, 10**400, True, "", "x", [], {}, [[]], [{}], [None], {"role": "user"},
        float("nan"), "\ud800", "<extra_id_1>", "\ufeff", "\0", [answer()], [user(), answer()],
        ["x", "y"], {"text": "x"}, "9" * 5000, "\r\n"]  # fmt: skip
SHAPES = [("sft", row) for row in CHATS.values()] + [
    ("preference", row) for row, _ in PAIRS.values()
]
SHAPES += [("reward", CHATS["helpsteer2"])]
SHAPES += [("reward", {"messages": [user(), answer()], "label": [1, 2, 3, 4, 0]})]
SHAPES += [("rows", row) for row, _ in CONVERTED.values()]
WEIGHED = [
    {"from": "Assistant", "value": text} | dict.fromkeys(rows.WEIGHTS, -2.5) for text in "ab"
]
ASKED = [{"from": "User", "value": "Hi"}]
SHAPES += [("rows", {"prompt_turns": ASKED, "label": "verbosity:1", "responses": WEIGHED})] * 2


def mutated(value, rng):
    """A copy of a JSON value with a part of it changed, added, gone or of another place."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        value = dict(value)
        key = rng.choice([*value])
        what = rng.random()
        if what < 0.2:
            del value[key]
        elif what < 0.4:
            value[rng.choice([*data.KNOWN, "system", "completions", "score_chosen"])] = rng.choice(
                JUNK
            )
        else:
            value[key] = mutated(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        value = list(value)
        i = rng.randrange(len(value))
        value[i : i + 1] = [[], [value[i]] * 2, [mutated(value[i], rng)]][rng.randrange(3)]
        return value
    return rng.choice(JUNK)


def damaged(row, rng):
    """A line of JSON of a row, perhaps with bytes changed, a field twice or a byte order mark."""
    line = json.dumps(row).encode()
    what = rng.random()
    if what < 0.05:
        cut = rng.randrange(len(line) + 1)
        line = line[:cut] + bytes(rng.choices(range(256), k=rng.randint(0, 3))) + line[cut + 1 :]
    elif what < 0.1 and row and isinstance(row, dict):
        line = line[:-1] + b", " + json.dumps(next(iter(row))).encode() + b": 1}"
    elif what < 0.15:
        line = b"\xef\xbb\xbf" + line + b"\r"
    return line.replace(b"\n", b" ")


@pytest.mark.parametrize("n", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_mutated_row_of_every_format_is_read_or_named_by_its_line(tmp_path, tokenizer, n):
    rng = random.Random(n)
    by_kind = {kind: [] for kind in (*READERS, "rows")}
    for _ in range(n):
        kind, row = rng.choice(SHAPES)
        for _ in range(rng.randint(0, 3)):
            row = mutated(row, rng)
        by_kind[kind].append(damaged(row, rng))
    for kind, lines in by_kind.items():
        path = tmp_path / f"{kind}.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        bad = []

        def note(e, bad=bad, **how):
            bad.append(e)
            how["counts"]["bad"] += 1

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data if kind != "rows" else rows, "count_bad", note)
            if kind == "rows":
                counts = rows.Counter()
                kept = list(rows.lines(rows.RowsConfig(path, path, skip_bad=True), counts))
            else:
                kept, counts = READERS[kind](path, tokenizer, sys.maxsize, skip_bad=True)
        assert all(re.match(rf"{re.escape(str(path))}:\d+: .", said) for said in bad)
        blank = sum(not line.removeprefix(b"\xef\xbb\xbf").strip() for line in lines)
        assert len(kept) + counts["bad"] + counts[
            "tied" if kind == "rows" else "long"
        ] + blank == len(lines)
        assert len(kept) > len(lines) // 20 and len(bad) > len(lines) // 20


def test_no_text_of_a_row_that_is_read_is_changed(tmp_path, tokenizer):
    rng = random.Random(0)
    for _ in range(100):
        texts = [
            "".join(rng.choices("aé\r\n\t <|\0日🦙", k=rng.randrange(1, 12))) + "x" for _ in "12"
        ]
        row = {"conversations": [said("human", texts[0]), said("gpt", texts[1])]}
        ((found,), _) = read("sft", tmp_path, tokenizer, row)
        ((text, trained),) = spelt(found, tokenizer)
        assert text.endswith(f"User\n{texts[0]}\n<extra_id_1>Assistant\n{texts[1]}\n<extra_id_1>")
        assert trained == f"{texts[1]}\n<extra_id_1>"
    assert np.array_equal(
        found.ids[0][found.trained[0]], tokenizer.encode(texts[1] + "\n").tolist() + [5]
    )


# ---- stages --------------------------------------------------------------------------------------

TRAINED = [("sft", name, row) for name, row in CHATS.items()]
TRAINED += [("rpo" if rewards else "dpo", name, row) for name, (row, rewards) in PAIRS.items()]
TRAINED += [("reward", "helpsteer2", CHATS["helpsteer2"])]
for name, (row, ours) in CONVERTED.items():
    kind = "rpo" if "chosen_reward" in ours else "dpo" if "chosen" in ours else "reward"
    TRAINED.append((kind, name, row))
    if name in ("helpsteer2_first", "helpsteer3"):
        TRAINED.append(("bradley_terry", name, row))


@pytest.mark.slow
@pytest.mark.parametrize("kind, name, row", TRAINED, ids=[f"{k} {n}" for k, n, _ in TRAINED])
def test_a_file_of_each_format_trains_its_stages(base, tmp_path, kind, name, row):  # noqa: F811
    path = write(tmp_path / "a.jsonl.gz", *[row] * 16)
    if name in CONVERTED:
        rows.convert(rows.RowsConfig(path, tmp_path / "rows.jsonl"))
        path = tmp_path / "rows.jsonl"
    cfg = stage(base, kind, tmp_path / "run", data=path, val=None, steps=2)
    align.align(kind, cfg)
    steps = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2]
    if kind == "bradley_terry":  # scaled: the first step's loss is the strength times softplus(-m)
        first = json.loads(steps[0])
        strength = CONVERTED[name][1]["chosen_reward"] - CONVERTED[name][1]["rejected_reward"]
        assert 0 < first["loss"] / strength < 5


def test_a_file_is_shown_as_the_rows_that_a_stage_would_train_on(tmp_path, caplog):
    file = tmp_path / "pairs.jsonl"
    pair = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "chosen_reward": 1.5}
    file.write_text(json.dumps(pair | {"rejected_reward": 0.5}))
    with caplog.at_level("INFO", "nemotron4"):
        rows.convert(rows.RowsConfig(file, stage="rpo"))
    shown = [message for message in caplog.messages if message.startswith("---")]
    assert len(shown) == 2 and all("2 + 2?" in text and "pairs.jsonl:1" in text for text in shown)
    trained = [re.search("trained: (.*), values: (.*)", text).groups() for text in shown]
    assert "4" in trained[0][0] and "2 + 2" not in trained[0][0] and "5" in trained[1][0]
    assert "1.5" in trained[0][1]
    assert file.read_text() == json.dumps(pair | {"rejected_reward": 0.5})
