"""The engine: greedy equals transformers and one forward pass, on every mesh and in every batch;
samples follow the exact distribution; text comes out right whatever the tokens cut."""

import dataclasses
import io
import json
import math
import os
import queue
import random
import re
import signal
import sys
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tokenizers
import torch
import torch.distributed as dist
from scipy import stats
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LogitsProcessorList, NemotronForCausalLM, PreTrainedTokenizerFast
from transformers.generation import logits_process as hf

import data
import generate
import parallel
import train
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


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (8, 1), (4, 9), (63, 1), (1, 64)])
@pytest.mark.parametrize("onednn", [True, False])
def test_a_product_is_the_same_whichever_way_it_is_computed(shape, onednn, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 24, generator=g)
    linear = generate.InferenceLinear(weight, None)
    assert linear.weight.is_mkldnn == onednn
    for x in (torch.randn(*shape, 24, generator=g), torch.randn(24, *shape, generator=g)):
        x = x if x.shape[-1] == 24 else x.movedim(0, -1)  # strided
        got = linear(x)
        want = x.double() @ weight.double().t()
        assert got.shape == (*shape, 40) and torch.allclose(got.double(), want, atol=1e-5)
        half = generate.InferenceLinear(weight.bfloat16(), None)(x.bfloat16())
        assert half.dtype == torch.bfloat16 and torch.allclose(half.double(), want, atol=0.3)


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
    before = generate.perplexity(engine)
    engine.quantize()
    return (
        [vars(out) for out in greedy],
        [out.ids for out in sampled],
        [out.logprobs for out in scored],
        (before, generate.perplexity(engine)),
    )


MORE_MESHES = ((2, 1), (1, 2), (4, 1))


@pytest.mark.parametrize(
    "tp, pp", [(2, 2), *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in MORE_MESHES)]
)
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
        assert got[3][0] == pytest.approx(want[3][0], rel=1e-4)
        # each rank scales its share of a row, so that the rounding differs
        assert got[3][1] != got[3][0]
        assert got[3][1] == pytest.approx(want[3][1], rel=0.2)


# ---- sampling ------------------------------------------------------------------------------------


def filtered(logits, params, ids):
    """Oracle: transformers' processors in its own order → probabilities."""
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(hf.TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        chain.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(hf.MinPLogitsWarper(params.min_p))
    return chain(torch.tensor([ids]), logits[None].clone()).softmax(-1)[0]


FILTERS = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "penalty": {"repetition_penalty": 1.5},
    "all": {
        "temperature": 1.3,
        "top_k": 12,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
    },
}


@pytest.mark.parametrize("name", FILTERS)
def test_samples_follow_the_exact_distribution(name):
    """Chi-square over 40,000 samples of 40 tokens, each of its own random stream."""
    params, seen = SamplingParams(**FILTERS[name]), [3, 5, 5, 9]
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    want = filtered(logits, params, seen).double().numpy()
    n = 40_000
    u = [generate.uniform(seed, 0, 4) for seed in range(n)]
    ids = generate.sample(logits.expand(n, 40), [params] * n, [seen] * n, u)
    counts = np.bincount(ids.numpy(), minlength=40)
    assert counts[want == 0].sum() == 0
    expected = want[want > 0] * n
    rare = expected < 5  # too few for the test: together
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        counts = np.append(counts[want > 0][~rare], counts[want > 0][rare].sum())
    else:
        counts = counts[want > 0]
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3


def test_rows_of_a_batch_keep_their_own_settings():
    params = [SamplingParams(**changes) for changes in FILTERS.values()]
    params.append(SamplingParams(temperature=0))
    logits = torch.randn(len(params), 600, generator=torch.Generator().manual_seed(2)) * 3
    seen = [[i, 2 * i + 1] for i in range(len(params))]
    for k in range(50):
        u = [generate.uniform(k, i, 0) for i in range(len(params))]
        together = generate.sample(logits, params, seen, u)
        for i, p in enumerate(params):
            single = generate.sample(logits[i : i + 1], [p], [seen[i]], [u[i]])
            assert single[0] == together[i]
    assert together[-1] == logits[-1].argmax()


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9, 0.99])
def test_top_p_keeps_the_least_number_of_tokens_also_when_all_are_equally_likely(mass):
    for p in (torch.full((2, 1000), 1e-3), torch.randn(2, 1000).mul(4).softmax(1)):
        kept = generate.keep_top_p(p, torch.tensor([[mass], [mass]]))
        for row, before in zip(kept, p, strict=True):
            n = int((row > 0).sum())
            ordered = before.double().sort(descending=True).values.cumsum(0)
            assert n == pytest.approx(int((ordered < mass - 1e-6).sum()) + 1, abs=1)
            assert torch.equal(row[row > 0], before[row > 0])


def test_a_seed_is_a_stream_and_samples_of_one_prompt_differ():
    engine = Engine(tiny(), slots=8)
    params = SamplingParams(max_tokens=10, n=4, seed=5, stop_ids=())
    a = engine.generate([[9, 10]], params)
    assert [out.index for out in a] == [0, 1, 2, 3]
    assert len({tuple(out.ids) for out in a}) == 4
    assert [out.ids for out in engine.generate([[9, 10]], params)] == [out.ids for out in a]
    other = engine.generate([[9, 10]], dataclasses.replace(params, seed=6))
    assert not {tuple(out.ids) for out in other} & {tuple(out.ids) for out in a}
    assert engine.generate([[9, 10]], dataclasses.replace(params, n=1))[0].ids == a[0].ids


def test_uniform_numbers_are_uniform_and_never_zero_or_one():
    u = [
        generate.uniform(seed, sample, at)
        for seed in range(10)
        for sample in range(10)
        for at in range(100)
    ]
    assert min(u) > 0 and max(u) < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    "change, words",
    [
        ({"temperature": -1}, "temperature"), ({"temperature": math.nan}, "temperature"),
        ({"top_p": -0.1}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"), ({"n": 0}, "n=0"), ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"), ({"stop": "a"}, "stop"), ({"stop": ("",)}, "stop"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ],
)  # fmt: skip
def test_impossible_sampling_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**change)


def test_a_top_p_of_zero_keeps_the_likeliest_token_alone():
    p = torch.randn(5, 1000, generator=torch.Generator().manual_seed(3)).mul(3).softmax(1)
    kept = generate.keep_top_p(p, torch.zeros(5, 1))
    assert torch.equal(kept > 0, torch.nn.functional.one_hot(p.argmax(1), 1000) > 0)
    logits = p.log()
    params = [SamplingParams(top_p=0), *[SamplingParams()] * 4]
    assert generate.sample(logits, params, [[]] * 5, [0.99] * 5)[0] == p[0].argmax()


@pytest.mark.parametrize("token", [-1, 512, 99_999])
def test_a_stop_token_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match=f"token {token} is not in 0..511"):
        Engine(tiny()).generate([[9]], SamplingParams(stop_ids=(7, token)))


@pytest.mark.parametrize("prompt", [5, 1.5, None, {"a": 1}, [1.7], ["a"], [[1]]])
def test_a_prompt_that_is_neither_text_nor_token_ids_is_refused(prompt):
    with pytest.raises(ValueError, match="a text or a list of token ids"):
        Engine(tiny()).encode(prompt)


@pytest.mark.parametrize(
    "prompt, words",
    [
        ([], "empty"),
        ([-1], "token -1"),
        ([512], "token 512"),
        ([9] * 97, "context 96"),
        ("a", "tokenizer"),
    ],
)
def test_impossible_prompts_are_refused(prompt, words):
    with pytest.raises(ValueError, match=words):
        Engine(tiny()).generate([prompt])


def test_a_sample_ends_where_the_context_does():
    engine = Engine(tiny(), context=20)
    out = engine.generate([[9] * 15], dataclasses.replace(GREEDY, max_tokens=100))[0]
    assert len(out.ids) == 5 and out.finish_reason == "length"
    assert engine.generate([[9] * 20], GREEDY)[0].ids == []
    with pytest.raises(ValueError, match="context=97"):
        Engine(tiny(), context=97)


def test_echo_gives_the_prompt_and_its_log_probs(folder):
    engine = Engine(load_hf(folder), data.load_tokenizer(folder))
    params = SamplingParams(max_tokens=3, temperature=0, echo=True, logprobs=1, stop_ids=())
    out = engine.generate(["import os"], params)[0]
    prompt = engine.encode("import os")
    assert out.ids[: len(prompt)] == prompt and out.text.startswith("import os")
    assert out.logprobs[0] is None and len(out.logprobs) == len(out.ids) == len(out.tops)
    assert np.allclose(out.logprobs[1:], log_probs(load_hf(folder), out.ids), atol=1e-4)
    none = engine.generate(["import os"], dataclasses.replace(params, max_tokens=0))[0]
    assert none.ids == prompt and none.logprobs[1:] == pytest.approx(
        out.logprobs[1 : len(prompt)], abs=1e-5
    )


def test_scores_are_the_continuations_log_probs_and_share_their_contexts():
    model, prompts = tiny(), ragged_prompts()
    pairs = [(prompts[6], prompts[i]) for i in (1, 2, 3)] + [(prompts[1], prompts[3])]
    engine = Engine(model, slots=4, chunk=16)
    for (context, continuation), out in zip(pairs, engine.score(pairs), strict=True):
        want = log_probs(model, context + continuation)[len(context) - 1 :]
        assert np.allclose(out.logprobs, want, atol=1e-4)
        assert len(out.tops) == len(continuation) == len(out.logprobs)
    assert engine.cached_tokens == 2 * (len(prompts[6]) - 1)


# ---- text ----------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer of one byte a token: every character is cut."""

    specials = {"</s>": 256}  # and no mark of a turn
    vocab_size = 257

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def streamed(tokenizer, ids, stop=()):
    """The pieces that a stream gives, and whether it stopped."""
    stream, pieces = TextStream(tokenizer, stop), []
    for i in ids:
        pieces.append(stream.push(int(i)))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream.stopped


TEXTS = (
    "plain",
    "naïve café",
    "日本語のテキスト",
    "ends with 👩‍👩‍👧🏽",
    "🇨🇭" * 5,
    "a\ufffdb\ufffd",
    "\ufffd" * 9,
    "",
)


@pytest.mark.parametrize("text", TEXTS)
def test_characters_cut_by_tokens_come_out_whole(text, corpus):
    for tokenizer in (Bytes(), data.TokenData(corpus).tokenizer()):
        pieces, stopped = streamed(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == text and not stopped
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


def test_any_tokens_whatever_stream_to_their_decoded_text(corpus):
    rng = np.random.default_rng(0)
    for tokenizer in (Bytes(), data.TokenData(corpus).tokenizer()):
        for _ in range(200):
            ids = rng.integers(0, tokenizer.vocab_size, rng.integers(0, 60)).tolist()
            assert "".join(streamed(tokenizer, ids)[0]) == tokenizer.decode(ids)


WORDS = [
    "the list of the lists 日本",
    "a list of things, naïve café",
    "  def main():\n    return  x",
]
PARTS = [
    *(
        "the list",
        " of",
        "a list",
        "naïve",
        " café",
        "日本",
        "日",
        "語テ",
        "🎈",
        "👩‍👩‍👧",
        "\n",
        "\n\n",
    ),
    *(" ", "   ", "\t", "x", "def main():", "\ufffd", "e\u0301", "\0", "हिन्दी", "</s>", "▁", "9"),
]


def saved(tokenizer, folder):
    """Save with transformers, without the bytes among the added tokens, as Llama's file has it."""
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def byte_fallback(folder):
    """Llama 2's form: a blank before the text, unknown characters as bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    blanks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(blanks)
    last = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *last])
    marks = [*data.SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    how = dict(vocab_size=340, limit_alphabet=30, special_tokens=marks, show_progress=False)
    tokenizer.train_from_iterator(WORDS * 50, trainers.BpeTrainer(**how))
    saved(tokenizer, folder)


def metaspace(folder):
    """Blanks as ▁, one of them before the text; unknown characters are one token."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    how = dict(vocab_size=120, unk_token="<unk>", show_progress=False)
    trainer = trainers.UnigramTrainer(special_tokens=list(data.SPECIALS), **how)
    tokenizer.train_from_iterator(WORDS * 50, trainer)
    saved(tokenizer, folder)


def sentencepiece_file(folder):
    """With byte fallback and a blank before the text, which are its defaults but for the first."""
    import sentencepiece

    (folder / "texts.txt").write_text("\n".join(WORDS * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texts.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=340, hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
        control_symbols=["<extra_id_0>", "<extra_id_1>"], remove_extra_whitespaces=False,
        normalization_rule_name="identity",
    )  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory, corpus):
    """Tokenizers by the name of what made their files."""
    found = {"ours": data.TokenData(corpus).tokenizer()}
    for make in (byte_fallback, metaspace, sentencepiece_file):
        folder = tmp_path_factory.mktemp(make.__name__)
        make(folder)
        found[make.__name__] = data.load_tokenizer(folder)
    return found


FILES = ["ours", "byte_fallback", "metaspace", "sentencepiece_file"]


def random_ids(tokenizer, rng):
    """A text's ids or, now and then, any at all."""
    if rng.random() < 0.2:
        return [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(60))]
    most = rng.choice([6, 40])
    return tokenizer.encode("".join(rng.choices(PARTS, k=rng.randrange(most)))).tolist()


@pytest.mark.parametrize("n", [400, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_a_stream_gives_what_decoding_prompt_and_answer_adds_to_the_prompt(
    tokenizer_files, name, n
):
    tokenizer, rng = tokenizer_files[name], random.Random(n)
    for _ in range(n):
        ids = random_ids(tokenizer, rng)
        start = rng.randrange(len(ids) + 1)
        end = rng.choice([len(ids), rng.randrange(start, len(ids) + 1)])
        stream = TextStream(tokenizer, (), ids[:start])
        pieces = [stream.push(token) for token in ids[start:end]]
        want = tokenizer.decode(ids[:end])[len(tokenizer.decode(ids[:start])) :]
        assert "".join([*pieces, stream.finish()]) == want, (ids, start, end)


@pytest.mark.parametrize("name", FILES)
def test_a_stream_holds_back_no_more_than_a_few_tokens_of_words(tokenizer_files, name):
    tokenizer = tokenizer_files[name]
    ids = tokenizer.encode("the list of the lists of things " * 40)
    stream, shown = TextStream(tokenizer, ()), ""
    for n, token in enumerate(ids, 1):
        shown += stream.push(int(token))
        assert shown == tokenizer.decode(ids[:n]) and len(stream.ids) <= 40


def scripted(monkeypatch, prompt, ids):
    """The engine then samples these ids after the prompt, whatever the model says."""

    def sample(logits, params, seen, u):
        return torch.tensor([ids[len(before) - len(prompt)] for before in seen])

    monkeypatch.setattr(generate, "sample", sample)


@pytest.mark.parametrize("name", FILES)
def test_echo_joins_prompt_and_answer_as_their_text_was(tokenizer_files, name, monkeypatch):
    tokenizer = tokenizer_files[name]
    ids = tokenizer.encode("the list of things, 日本 naïve café\n").tolist()
    engine = Engine(tiny(), tokenizer)
    for n in range(1, len(ids), 2):
        scripted(monkeypatch, ids[:n], ids[n:])
        params = SamplingParams(max_tokens=len(ids) - n, echo=True, stop_ids=())
        (out,) = engine.generate([ids[:n]], params)
        before = tokenizer.decode(ids[:n])
        assert out.text == before + tokenizer.decode(ids)[len(before) :]
        plain = dataclasses.replace(params, echo=False)
        (answer,) = engine.generate([ids[:n]], plain)
        assert answer.text == out.text[len(before) :]


@pytest.mark.parametrize("name", FILES)
def test_a_stop_text_that_begins_with_a_blank_is_found(tokenizer_files, name, monkeypatch):
    tokenizer = tokenizer_files[name]
    ids = tokenizer.encode("the list of things").tolist()
    n = next(i for i in range(len(ids)) if tokenizer.decode(ids[:i]) == "the list")
    scripted(monkeypatch, ids[:n], ids[n:])
    params = SamplingParams(max_tokens=len(ids) - n, stop=(" of",), stop_ids=())
    (out,) = Engine(tiny(), tokenizer).generate([ids[:n]], params)
    assert (out.text, out.finish_reason) == ("", "stop")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "stop, end, want",
    [
        ((), "<extra_id_1>", "a list"),
        ((), "</s>", "a list\n"),
        (("naïve",), "</s>", "a list\n"),
        ((), None, "a list\n"),
    ],
)
def test_only_the_mark_of_a_turn_takes_an_answers_last_newline(
    tokenizer_files, name, stop, end, want, monkeypatch
):
    tokenizer = tokenizer_files[name]
    prompt, _ = data.render_chat(CHAT, tokenizer)
    n = len(tokenizer.encode("a list\n"))
    ids = tokenizer.encode("a list\nnaïve" if stop else "a list\n").tolist()
    ids += [tokenizer.special(end)] if end else []
    scripted(monkeypatch, prompt, ids)
    params = SamplingParams(max_tokens=20 if end else n, stop=stop)
    engine, pieces = Engine(tiny(), tokenizer), []
    (row,) = engine.submit(
        prompt, generate.chat_sampling(params, tokenizer), lambda out, text: pieces.append(text)
    )
    list(engine.finished([row]))
    assert row.out.text == want == "".join(pieces)


def test_a_stream_is_not_late():
    pieces, _ = streamed(Bytes(), Bytes().encode("ab é c"), ("xyz",))
    assert pieces == ["a", "b", " ", "", "é", " ", "c", ""]


@pytest.mark.parametrize(
    "text, stop, want, stopped",
    [
        ("one two three", ("two",), "one ", True),
        ("one two three", ("three", "two th"), "one ", True),
        ("ababac", ("abac",), "ab", True),
        ("aaaab", ("aab",), "aa", True),
        ("ends in a hal", ("half",), "ends in a hal", False),
        ("größe 👍 fin", ("👍",), "größe ", True),
        ("größe 👍", ("👍👎", "ß👍"), "größe 👍", False),
        ("stop", ("stop",), "", True),
        ("a<extra_id_1>User", ("<extra_id_1>User", "<extra_id_1>"), "a", True),
    ],
)
def test_stop_texts_split_over_tokens_end_the_text(text, stop, want, stopped, corpus):
    for tokenizer in (Bytes(), data.TokenData(corpus).tokenizer()):
        pieces, did = streamed(tokenizer, tokenizer.encode(text), stop)
        assert ("".join(pieces), did) == (want, stopped)


def test_random_stop_texts_cut_at_their_first_occurrence():
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choice("abé👍") for _ in range(rng.randrange(20)))
        stop = tuple(
            "".join(rng.choice("abé👍") for _ in range(rng.randrange(1, 4))) for _ in range(2)
        )
        found = [at for at in map(text.find, stop) if at >= 0]
        pieces, stopped = streamed(Bytes(), Bytes().encode(text), stop)
        assert "".join(pieces) == (text[: min(found)] if found else text)
        assert stopped == bool(found)


def test_the_engine_streams_what_it_returns_and_stops_at_texts_and_tokens(folder):
    engine = Engine(load_hf(folder), data.load_tokenizer(folder), slots=4)
    params = SamplingParams(max_tokens=40, seed=1, stop_ids=())
    free = engine.generate(["import"], params)[0]
    pieces = []
    engine.submit("import", params, lambda out, text: pieces.append((text, out.finish_reason)))
    while engine.busy:
        engine.step()
    assert "".join(text for text, _ in pieces) == free.text
    assert [reason for _, reason in pieces if reason] == ["length"]
    assert free.text == engine.tokenizer.decode(free.ids)
    stop = free.text[20:23]
    cut = engine.generate(["import"], dataclasses.replace(params, stop=(stop,)))[0]
    assert cut.text == free.text[: free.text.find(stop)] and cut.finish_reason == "stop"
    token = free.ids[10]
    ended = engine.generate(["import"], dataclasses.replace(params, stop_ids=(token,)))[0]
    assert ended.ids == free.ids[: free.ids.index(token)] and ended.finish_reason == "stop"


def test_generation_ends_at_the_end_of_a_document_by_default(folder):
    engine = Engine(load_hf(folder), data.load_tokenizer(folder), slots=16)
    outs = engine.generate(["x"], SamplingParams(max_tokens=90, n=16, temperature=3.0))
    assert {out.finish_reason for out in outs} == {"stop", "length"}
    assert not any(3 in out.ids for out in outs)


# ---- models from folders -------------------------------------------------------------------------


def test_a_reward_model_gives_its_attributes_at_the_last_token(tmp_path):
    cfg = dataclasses.replace(TINY, n_attributes=5)
    model = Nemotron(cfg)
    init_weights(model, 1)
    prompts = ragged_prompts()
    outs = Engine(model, slots=4, chunk=16).generate(prompts, SamplingParams(max_tokens=0))
    for prompt, out in zip(prompts, outs, strict=True):
        with torch.no_grad():
            want = model(torch.tensor([prompt]))[0, -1]
        assert np.allclose(out.scores, want, atol=1e-5) and out.ids == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_float8_weights_cost_little_and_say_what(folder, dtype, caplog):
    with caplog.at_level("INFO", "nemotron4"):
        engine = load_engine(EngineConfig(folder, quantize="float8", dtype=dtype, slots=4))
    plain = load_engine(EngineConfig(folder, dtype=dtype, slots=4))
    said = re.fullmatch(r"float8: perplexity ([\d.]+) -> ([\d.]+)", caplog.messages[-1])
    before, after = map(float, said.groups())
    assert before == pytest.approx(generate.perplexity(plain), rel=1e-4)
    assert after == pytest.approx(generate.perplexity(engine), rel=1e-4)
    assert 0 < abs(after / before - 1) < 0.2
    pairs = [(p[:1], p[1:]) for p in ragged_prompts() if len(p) > 1]
    differ = [
        np.subtract(a.logprobs, b.logprobs)
        for a, b in zip(engine.score(pairs), plain.score(pairs), strict=True)
    ]
    spread = np.concatenate(differ).std()
    assert 0 < spread < 0.5
    linear = generate.InferenceLinear
    weights = {m.weight.dtype for m in engine.model.blocks.modules() if isinstance(m, linear)}
    assert weights == {torch.float8_e4m3fn}


def score_in_float8(folder, tp):
    cfg = EngineConfig(folder, quantize="float8", dtype="fp32", slots=4)
    cfg = dataclasses.replace(cfg, mesh=generate.Layout(tp=tp))
    pairs = [(p[:1], p[1:]) for p in ragged_prompts() if len(p) > 1]
    return [done.logprobs for done in load_engine(cfg).score(pairs)]


def test_float8_weights_are_the_same_however_many_processes_divide_them(on_ranks, folder):
    (alone,) = on_ranks(1, score_in_float8, folder, 1)
    for rank in on_ranks(2, score_in_float8, folder, 2):
        for a, b in zip(rank, alone, strict=True):
            assert np.allclose(a, b, atol=1e-4)


def test_a_quantized_reward_model_still_scores(reward_folder):
    prompts = ragged_prompts()[:4]
    plain = load_engine(EngineConfig(reward_folder)).generate(prompts, SamplingParams(max_tokens=0))
    engine = load_engine(EngineConfig(reward_folder, quantize="float8"))
    for a, b in zip(plain, engine.generate(prompts, SamplingParams(max_tokens=0)), strict=True):
        assert np.allclose(a.scores, b.scores, atol=0.5) and a.scores != b.scores


def test_bf16_gives_nearly_the_same_log_probs(folder):
    pairs = [(p[:1], p[1:]) for p in ragged_prompts() if len(p) > 1]
    exact = load_engine(EngineConfig(folder, dtype="fp32")).score(pairs)
    half = load_engine(EngineConfig(folder, dtype="bf16")).score(pairs)
    worst = max(
        np.abs(np.subtract(a.logprobs, b.logprobs)).mean() for a, b in zip(exact, half, strict=True)
    )
    assert 0 < worst < 0.1


@pytest.mark.slow
def test_compiled_blocks_yield_the_same(tmp_path, corpus):
    model = Nemotron(dataclasses.replace(TINY, n_layers=2))
    save_hf(model, tmp_path)
    data.TokenData(corpus).tokenizer().save(tmp_path)
    outs = []
    for compiled in (False, True):
        engine = load_engine(EngineConfig(tmp_path, slots=4, compile=compiled))
        outs.append([out.ids for out in engine.generate(ragged_prompts()[:3], GREEDY)])
    assert outs[0] == outs[1]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"mesh": generate.Layout(tp=2)}, "tp=2"),
        ({"tokenizer": "cl100k"}, "cl100k: no such file"),
        ({"slots": 0}, "slots=0"),
    ],
)
def test_an_impossible_engine_is_refused(folder, change, words):
    with pytest.raises(ValueError, match=words):
        load_engine(EngineConfig(folder, **change))


def test_a_folder_without_a_model_or_tokenizer_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="neither a run"):
        load_engine(EngineConfig(tmp_path))
    save_hf(tiny(), tmp_path)
    with pytest.raises(ValueError, match="--tokenizer"):
        load_engine(EngineConfig(tmp_path))


# ---- commands ------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
    """run(command, *args) as from a terminal → the lines of stdout, as JSON where they are."""

    def command(*args, stdin=""):
        monkeypatch.setattr("sys.argv", ["generate.py", *map(str, args)])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with mock.patch.object(generate, "shut_down"):  # other tests go on in this process
            generate.main()
        lines = capsys.readouterr().out.splitlines()
        return [json.loads(line) if line.startswith("{") else line for line in lines]

    return command


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of_the_pipe(name):
    """Read stdin, which is a pipe on rank 0 and closed on the others, as one that is read is."""
    sys.stdin = open(name if dist.get_rank() == 0 else os.devnull)
    return generate.read_rows("-", text_field="prompt")


def test_processes_share_the_prompts_that_the_first_reads_from_stdin(on_ranks, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    text = "one\n" + json.dumps({"prompt": "two"}) + "\n"
    threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,)).start()
    first, second = on_ranks(2, rows_of_the_pipe, str(tmp_path / "pipe"))
    assert first == second and [row["prompt"] for _, row in first] == ["one", "two"]


def test_sample_answers_prompts_from_arguments_a_file_and_stdin(folder, tmp_path, run):
    how = ("--max-tokens", 5, "--temperature", 0)
    a = run("sample", folder, "--prompts", "import", "The", *how)
    assert [row["prompt"] for row in a] == ["import", "The"]
    b = run("sample", folder, *how, stdin="import\nThe\n")
    assert a == b
    chat = {"messages": CHAT, "id": 7}
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "import"}\n' + json.dumps(chat) + '\n{"prompt": [9, 10]}\n')
    out = tmp_path / "out.jsonl"
    how = (*how, "--n", 2, "--logprobs", 1)
    assert run("sample", folder, "--file", file, "--out", out, *how) == []
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1] * 3 and rows[0]["text"] == a[0]["text"]
    assert rows[2]["messages"] == CHAT and rows[2]["id"] == 7 and rows[4]["prompt"] == [9, 10]
    engine = Engine(load_hf(folder), data.load_tokenizer(folder))
    ids, _ = data.render_chat(CHAT, engine.tokenizer)
    want = engine.generate([ids], dataclasses.replace(GREEDY, max_tokens=5, stop_ids=(3, 5)))[0]
    assert rows[2]["ids"] == want.ids and rows[2]["text"] == want.text


CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def interrupted(monkeypatch):
    """interrupted(n): Ctrl-C in the n-th step from now; the exit status then is SystemExit's."""
    before = signal.getsignal(signal.SIGINT)
    real, steps = Engine.step, []

    def after(n):
        def step(engine):
            steps.append(engine)
            if len(steps) == n:
                signal.raise_signal(signal.SIGINT)
            real(engine)

        monkeypatch.setattr(Engine, "step", step)
        monkeypatch.setattr("os._exit", exit_with)

    def exit_with(status):
        raise SystemExit(status)

    yield after
    signal.signal(signal.SIGINT, before)


def test_a_first_interrupt_keeps_the_samples_that_are_done_and_says_how_many(
    folder, tmp_path, run, interrupted, capsys
):
    rows = [{"prompt": [9] * 80}, {"prompt": [10] * 94}, {"prompt": [11] * 90}]
    file = write_rows(tmp_path / "p.jsonl", rows)
    how = ("--max-tokens", 16, "--stop-ids", 0, "--n", 2, "--temperature", 0)
    interrupted(8)
    with pytest.raises(SystemExit) as e:
        run("sample", folder, "--file", file, "--out", tmp_path / "out.jsonl", *how)
    assert e.value.code == 130
    done = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    # those that need the least tokens, though another prompt is before them
    assert {row["prompt"][0] for row in done} == {10, 11} and len(done) == 4
    assert all(row["finish_reason"] == "length" for row in done)
    said = capsys.readouterr().err
    assert "generate.py: stopped after 4 of 6 lines\n" in said and "Traceback" not in said
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # a second one ends it at once


def test_an_interrupt_ends_an_answer_and_a_second_one_the_conversation(folder, monkeypatch):
    # a shell's background job, and all that it starts, ignore Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = Engine(load_hf(folder), data.load_tokenizer(folder))
    driver = generate.Driver(engine)
    step, cancel, cancelled, go_on = (
        engine.step,
        driver.cancel,
        threading.Event(),
        threading.Event(),
    )
    waiting = threading.Event()

    class Answers(queue.SimpleQueue):
        def get(self, *args, **kwargs):
            waiting.set()
            return super().get(*args, **kwargs)

    def interrupt():
        assert waiting.wait(30)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def cancel_and_tell(number):
        cancel(number)
        cancelled.set()

    def at_the_tenth():
        step()
        if engine.steps == 10:
            interrupt()
            assert cancelled.wait(30)

    def without_end():
        interrupt()
        assert cancelled.wait(30)
        interrupt()
        go_on.wait(30)
        step()

    monkeypatch.setattr(driver, "cancel", cancel_and_tell)
    monkeypatch.setattr(engine, "step", at_the_tenth)
    driver.thread.start()
    monkeypatch.setattr(queue, "SimpleQueue", Answers)
    params = SamplingParams(max_tokens=90, stop_ids=(), seed=1)
    answer = generate.talk(driver, [9, 10], params)
    assert answer and engine.new_tokens < 15
    cancelled.clear()
    waiting.clear()
    monkeypatch.setattr(engine, "step", without_end)
    with pytest.raises(KeyboardInterrupt):  # the step that goes on is not waited for
        generate.talk(driver, [9, 11], params)
    monkeypatch.setattr(engine, "step", step)
    go_on.set()
    driver.stop()
    signal.signal(signal.SIGINT, before)


def test_progress_counts_samples(folder, run, capsys):
    run("sample", folder, "--prompts", "a", "--n", 5, "--max-tokens", 2)
    capsys.readouterr()
    with mock.patch.object(generate, "tqdm", wraps=generate.tqdm) as bar:
        run("sample", folder, "--prompts", "a", "b", "--n", 5, "--max-tokens", 2)
    assert bar.call_args.kwargs["total"] == 10


@pytest.mark.parametrize("command", ["sample", "chat"])
def test_a_reward_model_is_not_asked_to_write(reward_folder, run, command):
    args = ["--prompts", "hi"] if command == "sample" else []
    with pytest.raises(SystemExit, match="a reward model does not write, it scores"):
        run(command, reward_folder, *args, stdin="Hi\n\n")


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "a", "continuations": "abc"}, "a list of texts, not 'abc'"),
        ({"prompt": "a", "continuations": {"b": 1}}, "a list of texts"),
        ({"prompt": 5, "continuation": "b"}, "5: must be a text"),
        ({"prompt": "a", "continuation": 7}, "7: must be a text"),
        ({"prompt": "a", "continuations": ["b", None]}, "None: must be a text"),
        ({"prompt": "a", "continuation": ""}, "empty"),
        ({"prompt": "a", "continuations": []}, "continuation"),
        ({"prompt": None, "continuation": "b"}, "None: must be a text"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named_by_file_and_line(folder, tmp_path, run, row, words):
    file = write_rows(tmp_path / "r.jsonl", [{"prompt": "a", "continuation": "b"}, row])
    with pytest.raises(SystemExit, match=rf"r\.jsonl:2: .*{words}"):
        run("score", folder, "--file", file)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, "messages"),
        ({"prompt": "a", "chosen": "a", "rejected": 5}, "messages"),
        ({"messages": 5}, "messages"),
        ({"messages": CHAT}, "assistant"),
    ],
)
def test_a_pair_that_cannot_be_scored_is_named_by_file_and_line(
    reward_folder, tmp_path, run, row, words
):
    file = write_rows(tmp_path / "r.jsonl", [row])
    with pytest.raises(SystemExit, match=rf"r\.jsonl:1: .*{words}"):
        run("score", reward_folder, "--file", file)


def test_a_column_that_is_null_is_none(folder, reward_folder, tmp_path, run):
    rows = [{"prompt": "a", "messages": None}, {"messages": CHAT, "prompt": None}]
    how = ("--max-tokens", 2)
    assert len(run("sample", folder, "--file", write_rows(tmp_path / "p.jsonl", rows), *how)) == 2
    row = {"prompt": "a", "continuation": "b", "continuations": None}
    assert len(run("score", folder, "--file", write_rows(tmp_path / "s.jsonl", [row]))) == 1
    row = {"messages": None, "prompt": "a", "chosen": "b", "rejected": "c"}
    assert len(run("score", reward_folder, "--file", write_rows(tmp_path / "r.jsonl", [row]))) == 1


@pytest.mark.parametrize("command", ["sample", "score"])
@pytest.mark.parametrize(
    "raw, words",
    [
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b'{"prompt": "a", "continuation": "b"}\n\xac\xed\x00', r"f\.jsonl:2"),
        (b'{"prompt": "a", "continuation": "b", "x": ' + b"[" * 100_000 + b"\n", r"f\.jsonl:1"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", r"f\.jsonl:1"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_refused_in_one_line(
    folder, tmp_path, run, command, raw, words
):
    file = tmp_path / "f.jsonl"
    file.write_bytes(raw)
    with pytest.raises(SystemExit, match=words) as e:
        run(command, folder, "--file", file)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"text": "x"}', "prompt"),
        ("{oops", "2"),
        ('{"prompt": [-1]}', "token -1"),
        ('{"messages": []}', "at least one"),
    ],
)  # fmt: skip
def test_a_bad_prompt_is_named_by_file_and_line(folder, tmp_path, monkeypatch, line, words):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    monkeypatch.setattr("sys.argv", ["generate.py", "sample", str(folder), "--file", str(file)])
    with pytest.raises(SystemExit, match=rf"p\.jsonl:2.*{words}"):
        generate.main()


def test_chat_keeps_the_conversation_and_stops_at_the_next_turn(folder, monkeypatch, run):
    asked = []
    real = generate.Driver.submit

    def submit(driver, ids, params, listener):
        asked.append((driver.engine.tokenizer.decode(ids), params))
        return real(driver, ids, params, listener)

    monkeypatch.setattr(generate.Driver, "submit", submit)
    lines = run("chat", folder, "--max-tokens", 4, stdin="Hi\nMore\n\n")
    (first, params), (second, _) = asked
    assert first == "<extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n"
    assert second.startswith(first) and second.endswith(
        "<extra_id_1>User\nMore\n<extra_id_1>Assistant\n"
    )
    assert 5 in params.stop_ids and lines


def test_chat_forgets_the_earliest_turns_when_the_context_is_full(folder, monkeypatch, run):
    asked = []
    real = generate.Driver.submit

    def submit(driver, ids, params, listener):
        asked.append(driver.engine.tokenizer.decode(ids))
        return real(driver, ids, params, listener)

    monkeypatch.setattr(generate.Driver, "submit", submit)
    stdin = "one\n" + "two " * 200 + "\nthree\nfour\n\n"
    how = ("--max-tokens", 1, "--context", 60)
    run("chat", folder, *how, stdin=stdin)
    assert len(asked) == 3  # the second question alone is too long
    assert "one" in asked[0] and "three" in asked[1] and "four" in asked[2]
    assert all("System" in text and "two" not in text for text in asked)


def test_score_gives_log_likelihoods_of_continuations(folder, tmp_path, run):
    file = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "import", "continuations": [" os", " sys.path"]},
        {"prompt": "a", "continuation": "b c"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    got = run("score", folder, "--file", file)
    encode = data.load_tokenizer(folder).encode
    for row, texts in zip(got, ([" os", " sys.path"], ["b c"]), strict=True):
        for text, log_prob, n in zip(texts, row["logprobs"], row["n_tokens"], strict=True):
            before, after = encode(row["prompt"]).tolist(), encode(text).tolist()
            want = log_probs(load_hf(folder), before + after)[len(before) - 1 :]
            assert log_prob == pytest.approx(sum(want), abs=1e-3) and n == len(after)


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory, folder):
    path = tmp_path_factory.mktemp("reward")
    model = Nemotron(dataclasses.replace(TINY, n_attributes=9, seq_len=256))
    init_weights(model, 1)
    save_hf(model, path)
    data.load_tokenizer(folder).save(path)
    return path


def test_a_reward_model_scores_conversations_and_rewardbench_rows(reward_folder, tmp_path, run):
    texts, rng = ["yes", "no", "It is 4.", "Who knows"], random.Random(0)
    rows = [{"messages": [*CHAT, {"role": "assistant", "content": "Hello"}]}]
    for subset in ("math-prm", "hep-go", "donotanswer", "alpacaeval-easy", "anthropic_helpful"):
        for _ in range(4):
            chosen, rejected = rng.sample(texts, 2)
            rows.append(
                {"prompt": "2+2?", "chosen": chosen, "rejected": rejected, "subset": subset}
            )
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    got = run("score", reward_folder, "--file", file)
    model, tokenizer = load_hf(reward_folder), data.load_tokenizer(reward_folder)

    def reward(messages):
        ids = torch.from_numpy(data.render_reward(messages, tokenizer).astype(np.int64))
        with torch.no_grad():
            nine = model(ids[None])[0, -1]
        return nine, sum(
            w * s for w, s in zip((0.3, 0.74, 0.46, 0.47, -0.33), nine[4:].tolist(), strict=True)
        )

    nine, scalar = reward(rows[0]["messages"])
    assert got[0]["scores"]["helpfulness"] == pytest.approx(nine[4].item(), abs=1e-5)
    assert got[0]["scores"]["reward"] == pytest.approx(scalar, abs=1e-4)
    for row, scored in zip(rows[1:], got[1:], strict=True):
        for key in ("chosen", "rejected"):
            answer = {"role": "assistant", "content": row[key]}
            nine, scalar = reward([{"role": "user", "content": "2+2?"}, answer])
            scores = scored[f"{key}_scores"]
            assert scores["reward"] == pytest.approx(scalar, abs=1e-4)
            assert scores["verbosity"] == pytest.approx(nine[8].item(), abs=1e-5)
        assert scored["subset"] == row["subset"]


@pytest.mark.slow
def test_a_run_of_any_mesh_can_be_sampled_from(on_ranks, corpus, tmp_path):
    axes = {"tp": 2, "pp": 2, "vp": 2}
    on_ranks(4, train_tiny, str(corpus), str(tmp_path / "run"), axes)
    engine = load_engine(EngineConfig(tmp_path / "run"))
    outs = engine.generate(["import os", "The"], GREEDY)
    for rank in on_ranks(2, sample_run, str(tmp_path / "run")):
        assert rank == [out.text for out in outs]
    # what was trained is what is sampled from
    with mock.patch.object(parallel, "shut_down"):
        parallel.export(parallel.ExportConfig(tmp_path / "run", tmp_path / "hf", "fp32"))
    theirs = NemotronForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([engine.encode("import os")])
    want = theirs.generate(
        ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert outs[0].ids == want[0, ids.shape[1] :].tolist()


def trained(corpus, out, axes):
    cfg = train.PRESETS["nano"]()
    shape = dataclasses.replace(TINY, seq_len=32)
    return dataclasses.replace(
        cfg, model=shape, data=Path(corpus), out=Path(out), steps=3, batch=4, micro_batch=1,
        mesh=parallel.MeshConfig(dtype="fp32", **axes), warmup=1, eval_batches=1,
    )  # fmt: skip


def train_tiny(corpus, out, axes):
    train.pretrain("nano", trained(corpus, out, axes))


def sample_run(path):
    layout = generate.Layout(tp=2)
    engine = load_engine(EngineConfig(Path(path), mesh=layout))
    return [out.text for out in engine.generate(["import os", "The"], GREEDY)]
