"""The engine: greedy equals transformers and one forward pass, on every mesh and in every batch;
samples follow the exact distribution; text comes out right whatever the tokens cut."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LogitsProcessorList, NemotronForCausalLM
from transformers.generation import logits_process as theirs

import data
import generate
from generate import Engine, EngineConfig, SamplingParams, TextStream, load_engine
from model import SHAPES, Nemotron, init_weights
from parallel import load_hf, save_hf

# every detail of the architecture, small; a wide init keeps random logits apart
TINY = dataclasses.replace(
    SHAPES["nano"], dim=64, n_layers=4, head_dim=16, ffn_dim=128, vocab_size=512, seq_len=96,
    init_std=0.2,
)  # fmt: skip
GREEDY = SamplingParams(max_tokens=12, temperature=0, stop_ids=())
SAMPLED = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, seed=7, stop_ids=())


def tiny(seed=3):
    model = Nemotron(TINY)
    init_weights(model, seed)
    return model


def ragged_prompts():
    """Different lengths, some with a common beginning, one a single token, some equal."""
    rng = np.random.default_rng(0)
    shared = rng.integers(7, 512, 40).tolist()
    prompts = [rng.integers(7, 512, n).tolist() for n in (1, 2, 5, 17, 33, 50, 64, 3)]
    prompts += [shared + rng.integers(7, 512, n).tolist() for n in (1, 4, 9, 20)]
    return [*prompts, shared, prompts[4], prompts[4], shared[:20]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory, corpus):
    """A Hugging Face folder with a tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    save_hf(tiny(), path)
    data.TokenData(corpus).tokenizer().save(path)
    return path


def alone(model, prompt, params):
    return Engine(model, slots=1).generate([prompt], params)[0]


def log_probs(model, ids):
    """Oracle: of each token but the first, by one forward pass in float64."""
    with torch.no_grad():
        out = model.double()(torch.tensor([ids])).log_softmax(-1)[0]
    model.float()
    return [out[i, token].item() for i, token in enumerate(ids[1:])]


# ---- the same tokens, whatever the batch ---------------------------------------------------------


@pytest.mark.parametrize("slots, chunk", [(16, 512), (4, 16), (3, 1)])
def test_greedy_tokens_and_log_probs_are_those_of_one_forward_pass(slots, chunk):
    model, prompts = tiny(), ragged_prompts()
    params = dataclasses.replace(GREEDY, logprobs=3)
    outs = Engine(model, slots=slots, chunk=chunk).generate(prompts, params)
    for prompt, out in zip(prompts, outs, strict=True):
        assert len(out.ids) == 12 and out.finish_reason == "length"
        want = log_probs(model, prompt + out.ids)[len(prompt) - 1 :]
        assert np.allclose(out.logprobs, want, atol=1e-4)
        for token, log_prob, top in zip(out.ids, out.logprobs, out.tops, strict=True):
            assert top[0] == (token, pytest.approx(log_prob)) and len(top) == 3
            assert top[0][1] >= top[1][1] >= top[2][1]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_what_a_prompt_yields_does_not_depend_on_what_it_is_batched_with(params):
    model, prompts = tiny(), ragged_prompts()
    want = [alone(model, prompt, params).ids for prompt in prompts]
    for slots, chunk in ((16, 512), (5, 7)):
        outs = Engine(model, slots=slots, chunk=chunk).generate(prompts, params)
        assert [out.ids for out in outs] == want
    backwards = Engine(model, slots=7).generate(prompts[::-1], params)
    assert [out.ids for out in backwards] == want[::-1]


def test_greedy_tokens_equal_transformers(folder):
    theirs = NemotronForCausalLM.from_pretrained(folder)
    prompts = ragged_prompts()
    outs = Engine(load_hf(folder), slots=16).generate(prompts, GREEDY)
    for prompt, out in zip(prompts, outs, strict=True):
        ids = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert out.ids == ids[0, len(prompt) :].tolist()


def test_a_prefix_that_was_computed_before_changes_nothing_but_the_work():
    model, prompts = tiny(), ragged_prompts()
    engine = Engine(model, slots=4)
    long = prompts[6]
    first = engine.generate([long], GREEDY)[0]
    assert first.cached == 0
    turn = long + first.ids + [9, 8, 7]  # a conversation goes on
    longer = engine.generate([turn], GREEDY)[0]
    # all that was generated but the last token, whose keys nobody needed
    assert longer.cached == len(long) + len(first.ids) - 1
    again = engine.generate([long], GREEDY)[0]
    assert again.cached == len(long) - 1  # a prompt's last token is always computed
    # several that begin alike, at once: the beginning is computed once
    engine = Engine(model, slots=8, chunk=8)
    many = [prompts[9][:40] + [i] for i in range(20, 28)]
    outs = engine.generate(many, GREEDY)
    assert [out.ids for out in outs] == [alone(model, p, GREEDY).ids for p in many]
    assert sum(out.cached for out in outs) == 7 * 40 == engine.cached_tokens
    assert engine.prompt_tokens == 8 * 41 - 7 * 40


def test_rows_are_refilled_as_soon_as_they_are_free():
    prompts = [[10 + i, 20] for i in range(6)]
    engine = Engine(tiny(), slots=2)
    lengths = [12, 2, 2, 2, 2, 2]  # while the first goes on, the others pass through the other slot
    rows = []
    for prompt, n in zip(prompts, lengths, strict=True):
        rows += engine.submit(prompt, dataclasses.replace(GREEDY, max_tokens=n))
    steps = engine.steps
    while engine.busy:
        engine.step()
    assert engine.steps - steps <= 13
    assert [len(row.out.ids) for row in rows] == lengths


def test_random_traffic_with_cancellations_leaves_every_other_answer_as_it_was():
    model, rng = tiny(), random.Random(0)
    engine, rows, kept = Engine(model, slots=4, chunk=12), [], []
    base = [rng.randrange(7, 512) for _ in range(60)]
    while len(rows) < 60 or engine.busy:
        if len(rows) < 60 and rng.random() < 0.5:
            prompt = base[: rng.randrange(1, 50)] + [
                rng.randrange(7, 512) for _ in range(rng.randrange(1, 20))
            ]
            params = dataclasses.replace(
                SAMPLED, max_tokens=rng.randrange(1, 20), n=rng.randrange(1, 3)
            )
            new = engine.submit(prompt, params)
            rows += new
            kept.append((prompt, params, new))
        if rows and rng.random() < 0.1:
            engine.cancel(rng.choice(rows))
        engine.step()
    assert engine.active == engine.decoding == 0 and engine.slots == [None] * 4
    finished = 0
    for prompt, params, new in kept:
        want = Engine(model, slots=2).generate([prompt], params)
        for row, out in zip(new, want, strict=True):
            if row.out.finish_reason == "cancelled":
                assert row.out.ids == out.ids[: len(row.out.ids)]
            else:
                finished += 1
                assert row.out.ids == out.ids
    assert finished > 30


# ---- on every mesh -------------------------------------------------------------------------------


def generate_on_a_mesh(path, tp, pp):
    layout = generate.Layout(tp=tp, pp=pp)
    engine = load_engine(EngineConfig(path, slots=6, chunk=20, mesh=layout))
    prompts = ragged_prompts()
    greedy = engine.generate(prompts, dataclasses.replace(GREEDY, logprobs=2, echo=True))
    sampled = engine.generate(prompts, SAMPLED)
    scored = engine.score([(p[:1], p[1:]) for p in prompts if len(p) > 1])
    said = engine.quantize("int8")
    return (
        [vars(out) for out in greedy],
        [out.ids for out in sampled],
        [out.logprobs for out in scored],
        said,
    )


@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_every_mesh_yields_the_same_with_a_batch_of_many(on_ranks, folder, tp, pp):
    want = generate_on_a_mesh(folder, 1, 1)
    for got in on_ranks(tp * pp, generate_on_a_mesh, folder, tp, pp):
        assert [out["ids"] for out in got[0]] == [out["ids"] for out in want[0]]
        for a, b in zip(got[0], want[0], strict=True):
            assert np.allclose(a["logprobs"][1:], b["logprobs"][1:], atol=1e-4)
            assert [[i for i, _ in top] for top in a["tops"]] == [
                [i for i, _ in top] for top in b["tops"]
            ]
        assert got[1] == want[1]
        for a, b in zip(got[2], want[2], strict=True):
            assert np.allclose(a, b, atol=1e-4)
        assert got[3].startswith("int8")
