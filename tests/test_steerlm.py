"""recipes/steerlm.py: labels are the reward model's own numbers, stand untrained before answers,
and are what a sample is asked for."""

import dataclasses
import json
import random
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from test_stages import TINY, write

import align
import data
import generate
from model import IGNORE, Nemotron, init_weights
from parallel import MeshConfig, load_hf, save_hf
from recipes import rows, steerlm
from recipes.tasks import draw_task

SHAPE = dataclasses.replace(TINY, vocab_size=284, seq_len=192)


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of a language model, one of a reward model, and a file of conversations."""
    root = tmp_path_factory.mktemp("steer")
    tokenizer = data.train_bpe(["one two three four five helpfulness verbosity"] * 50, 284)
    for name, n in (("lm", 0), ("judge", 5)):
        model = Nemotron(dataclasses.replace(SHAPE, n_attributes=n))
        init_weights(model, 3)
        if n:  # random heads say little: spread over 0..4 and beyond
            model.head.weight.data.mul_(40)
        save_hf(model, root / name)
        tokenizer.save(root / name)
    chats = [{"messages": [user("a b"), answer("one"), user("c"), answer("two three")]}]
    chats.append({"system": "S", "mask": "User", "conversations": [
        {"from": "User", "value": "d"}, {"from": "Assistant", "value": "four"}]})  # fmt: skip
    chats += [{"prompt": f"say {i}", "response": f"{i} five"} for i in range(6)]
    write(root / "chats.jsonl", chats)
    return root


@pytest.fixture(scope="module")
def labelled(base):
    """The conversations with the reward model's labels."""
    out = base / "labelled.jsonl"
    steerlm.annotate(steerlm.AnnotateConfig(base / "judge", file=base / "chats.jsonl", out=out))
    return out


def test_labels_are_what_the_reward_model_says_of_each_answer_in_whole_numbers(base, labelled):
    got = [json.loads(line)["messages"] for line in labelled.read_text().splitlines()]
    assert len(got) == 8 and got[1][0] == {"role": "system", "content": "S"}
    judge = data.load_tokenizer(base / "judge")
    model = load_hf(base / "judge")
    seen = set()
    for chat in got:
        for i, message in enumerate(chat):
            assert ("label" in message) == (message["role"] == "assistant")
            if "label" in message:
                ids = data.render_reward(chat[: i + 1], judge)
                scores = model(torch.tensor(ids)[None].long())[0, -1].tolist()
                whole = [min(4, max(0, round(score))) for score in scores]
                want = ",".join(f"{n}:{v}" for n, v in zip(data.ATTRIBUTES, whole, strict=True))
                assert message["label"] == want
                seen |= set(whole)
    assert len(seen) > 2 and len([m for chat in got for m in chat if "label" in m]) == 9


def test_labels_stand_before_the_answers_and_are_not_trained_by_hand(base):
    tokenizer = data.load_tokenizer(base / "lm")
    text, s = tokenizer.encode, tokenizer.special
    chat = [user("a"), answer("b", label="verbosity:1"), user("c"), answer("d"), user("e"),
            answer("f", label="helpfulness:4,verbosity:0")]  # fmt: skip
    turn = ([s("<extra_id_1>")], False)
    pieces = [([s("<extra_id_0>")], False), (text("System\n\n"), False)]
    pieces += [
        turn,
        (text("User\n"), False),
        (text("a\n"), False),
        turn,
        (text("Assistant\n"), False),
    ]
    pieces += [([s("<extra_id_2>")], False), (text("verbosity:1\n"), False), (text("b\n"), True)]
    pieces += [(turn[0], True), (text("User\n"), False), (text("c\n"), False), turn]
    # an answer without a label is not trained
    pieces += [(text("Assistant\n"), False), (text("d\n"), False), turn]
    pieces += [(text("User\n"), False), (text("e\n"), False), turn, (text("Assistant\n"), False)]
    pieces += [([s("<extra_id_2>")], False), (text("helpfulness:4,verbosity:0\n"), False)]
    pieces += [(text("f\n"), True), (turn[0], True)]
    ids, trained = steerlm.render_labelled(chat, tokenizer)
    assert ids.tolist() == np.concatenate([part for part, _ in pieces]).tolist()
    assert trained.tolist() == [flag for part, flag in pieces for _ in part]


def test_without_their_labels_the_rows_are_those_of_plain_sft(base, labelled):
    tokenizer = data.load_tokenizer(base / "lm")
    plain, _ = data.sft_rows(base / "chats.jsonl", tokenizer, 192)
    unlabelled, _ = data.sft_rows(labelled, tokenizer, 192)
    steered = steerlm.labelled_rows(steered_config(base, labelled, base), labelled, tokenizer)
    for want, same, more in zip(plain, unlabelled, steered, strict=True):
        assert want.key == same.key and more.length > want.length
        (ids,), (trained,) = more.ids, more.trained
        assert ids[trained].tolist() == want.ids[0][want.trained[0]].tolist()


def steered_config(base, file, out):
    how = dict(seq_len=192, batch=8, lr=1e-3, epochs=2.0, mesh=MeshConfig(dtype="fp32"))
    model = dataclasses.replace(align.AlignConfig.model, **{**vars(SHAPE), "seq_len": 192})
    return align.SftConfig(model=model, init=f"hf:{base}/lm", data=file, out=out, **how)


def test_the_command_learns_the_answers_given_their_labels(base, labelled, tmp_path, monkeypatch):
    options = ["--init", f"hf:{base}/lm", "--data", labelled, "--out", tmp_path / "run"]
    options += ["--seq-len", "192", "--batch", "8", "--mesh.dtype", "fp32", "--lr", "1e-3"]
    monkeypatch.setattr(sys, "argv", ["steerlm", "sft", *map(str, options)])
    steerlm.main()
    first, second = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    model = load_hf(base / "lm")
    tokenizer, losses = data.load_tokenizer(base / "lm"), []
    for line in labelled.read_text().splitlines():
        ids, trained = steerlm.render_labelled(json.loads(line)["messages"], tokenizer)
        log_probs = model(torch.tensor(ids)[None].long())[0].float().log_softmax(-1)
        losses += [-log_probs[i - 1, ids[i]].item() for i in np.flatnonzero(trained)]
    assert first["trained_tokens"] == len(losses)
    assert (
        first["loss"] == pytest.approx(np.mean(losses), rel=1e-5) and second["loss"] < first["loss"]
    )


def test_steerlm_2_has_the_gradient_of_nemos_loss():
    rng = torch.Generator().manual_seed(0)
    log_q, reference, weights = torch.randn(3, 5, 4, generator=rng, dtype=torch.float64)
    log_q.requires_grad_()
    w, b = weights.softmax(-1), (log_q - reference).softmax(-1).detach()
    (due,) = torch.autograd.grad(((w - b) * -log_q).sum(), log_q)
    cfg = steerlm.steerlm2()
    loss = align.rpo_k_loss(cfg.beta * (log_q - reference), cfg.eta * weights).sum()
    (ours,) = torch.autograd.grad(loss, log_q)
    assert cfg.loss == "rpo_bwd" and not cfg.sft_weight
    torch.testing.assert_close(ours, due)


def test_nemos_rows_for_steerlm_2_become_weighed_answers_that_are_learnt(
    base, tmp_path, monkeypatch
):
    label = "helpfulness:4,correctness:4,coherence:4,complexity:2,verbosity:0"
    logs = [(-1.0, -8.0, -7.5), (-0.5, -9.0, -9.25), (-3.0, -2.0, -2.5)]
    answers = [
        {"from": "Assistant", "value": text} | dict(zip(rows.WEIGHTS, found, strict=True))
        for text, found in zip(("one", "two", "three"), logs, strict=True)
    ]
    turns = [{"from": "User", "value": "Count"}]
    row = {"system": "Be brief.", "prompt_turns": turns, "label": label, "responses": answers}
    out = tmp_path / "weighed.jsonl"
    rows.convert(rows.RowsConfig(write(tmp_path / "nemo.jsonl", [row]), out))
    got = json.loads(out.read_text())
    assert got["prompt"] == [{"role": "system", "content": "Be brief."}, user("Count")]
    assert got["rewards"] == [-1.5, -0.25, -2.5]
    shape = dataclasses.replace(SHAPE, seq_len=512)
    cfg = dataclasses.replace(steerlm.steerlm2(), model=shape)
    tokenizer = data.load_tokenizer(base / "lm")
    (example,) = steerlm.labelled_rows(cfg, out, tokenizer)
    assert example.values.tolist() == [-0.25, -2.5, -1.5]  # the best and the worst come first
    for ids, trained, text in zip(
        example.ids, example.trained, ("two", "three", "one"), strict=True
    ):
        assert label in tokenizer.decode(ids) and tokenizer.decode(ids[trained]).startswith(text)

    options = ["--init", f"hf:{base}/lm", "--data", out, "--out", tmp_path / "run"]
    options += ["--seq-len", "512", "--batch", "1", "--mesh.dtype", "fp32", "--lr", "1e-3"]
    monkeypatch.setattr(sys, "argv", ["steerlm", "steerlm2", *map(str, options), "--epochs", "8"])
    steerlm.main()
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    w = np.exp(example.values) / np.exp(example.values).sum()
    assert steps[0]["loss"] == pytest.approx((w * np.log(3 * w)).sum(), rel=1e-4)  # b is even
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]


def test_a_sample_goes_on_from_the_label_that_is_asked_for(base, tmp_path):
    out = tmp_path / "samples.jsonl"
    sampling = generate.SamplingParams(max_tokens=6, seed=5, n=2, logprobs=1)
    how = dict(prompts=("a b",), out=out, attributes="helpfulness=3,verbosity=0", sampling=sampling)
    steerlm.sample(steerlm.SteerConfig(base / "lm", **how))
    got = [json.loads(line) for line in out.read_text().splitlines()]
    label = "helpfulness:3,correctness:4,coherence:4,complexity:4,verbosity:0"
    engine = generate.load_engine(generate.EngineConfig(base / "lm"))
    ids, _ = steerlm.render_labelled([user("a b"), answer("x", label=label)], engine.tokenizer)
    end = len(engine.tokenizer.encode("x\n")) + 1
    params = generate.chat_sampling(sampling, engine.tokenizer)
    want = engine.generate([ids[:-end]], params)
    assert [row["ids"] for row in got] == [done.ids for done in want]
    assert {row["label"] for row in got} == {label} and got[0]["prompt"] == "a b"


def test_what_is_not_asked_for_is_as_good_as_can_be():
    five = "helpfulness:4,correctness:4,coherence:4,complexity:4,verbosity:4"
    assert steerlm.wanted_label("") == five
    assert steerlm.wanted_label("verbosity=1") == five.replace("verbosity:4", "verbosity:1")
    assert steerlm.wanted_label("humor=2") == f"quality:4,toxicity:0,humor:2,creativity:0,{five}"
    assert steerlm.label_of([-3.0, 0.49, 2.6, 9, IGNORE]) == (
        "helpfulness:0,correctness:0,coherence:3,complexity:4"
    )
    for wrong in ("helpful=4", "verbosity=5", "verbosity", "verbosity=1;humor=2", "verbosity=-1"):
        with pytest.raises(ValueError, match="write helpfulness:4,correctness:3"):
            steerlm.wanted_label(wrong)


def test_scored_rows_and_nemos_are_labelled_already(tmp_path):
    scored = {"prompt": "a", "response": "b", **dict.fromkeys(data.ATTRIBUTES, 2)}
    (chat,), _ = steerlm.read_labelled(scored)
    assert chat[1]["label"] == "helpfulness:2,correctness:2,coherence:2,complexity:2,verbosity:2"
    nemo = {"system": "S", "mask": "User", "type": "VALUE_TO_TEXT", "conversations": [
        {"from": "User", "value": "a", "label": None},
        {"from": "Assistant", "value": "b", "label": "helpfulness:1"},
        {"from": "User", "value": "c"}, {"from": "Assistant", "value": "d", "label": "humor:3"},
    ]}  # fmt: skip
    made = rows.converted(nemo)
    assert made["label"] == [-100, -100, 3, *[-100] * 6]
    (chat,), _ = steerlm.read_labelled(data.in_our_names(made))
    assert [m.get("label") for m in chat] == [None, None, "helpfulness:1", None, "humor:3"]
    with pytest.raises(ValueError, match="label 'good'"):
        steerlm.read_labelled({"messages": [user("a"), answer("b", label="good")]})


def test_a_language_model_rates_nothing_and_a_row_that_is_no_conversation_is_named(base, tmp_path):
    how = dict(file=base / "chats.jsonl", out=tmp_path / "out")
    with pytest.raises(ValueError, match="lm is a language model: name a reward model"):
        steerlm.annotate(steerlm.AnnotateConfig(base / "lm", **how))
    how["file"] = write(tmp_path / "bad.jsonl", [{"messages": [answer("a")]}])
    with pytest.raises(ValueError, match=r"bad.jsonl:1: messages"):
        steerlm.annotate(steerlm.AnnotateConfig(base / "judge", **how))
    assert not (tmp_path / "out").exists() and Path(how["file"]).exists()


@pytest.mark.slow
def test_the_demo_tables_what_asking_for_attributes_changes(tmp_path):
    cfg = steerlm.SteerDemoConfig(out=tmp_path, scale=0.01)
    with mock.patch.object(steerlm, "draw_tasks", lambda cfg, *how, **more: tasks(4)):
        steerlm.demo(cfg)
    head, _, *table = (tmp_path / "steered.md").read_text().splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in table] == ["plain SFT", *steerlm.ASKED[1:]]
    assert head.count("|") == 6 and "true reward" in head
    labelled = [json.loads(line) for line in (tmp_path / "labelled.jsonl").read_text().splitlines()]
    plain = (tmp_path / "general_sft.jsonl").read_text().splitlines()
    assert len(labelled) == len(plain) and all("label" in row["messages"][1] for row in labelled)
    config = json.loads((tmp_path / "steered" / "config.json").read_text())
    assert config["batch"] == steerlm.SUPERVISED.batch and config["lr"] == steerlm.SUPERVISED.lr


def tasks(n):
    rng = random.Random(3)
    return [draw_task(rng, call=False, held_out=True) for _ in range(n)]
