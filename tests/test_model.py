"""model.py: the architecture against transformers, the report's figures, and its own invariants."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from model import (
    IGNORE,
    SHAPES,
    LayerNorm1P,
    ModelConfig,
    Nemotron,
    attend,
    config_from_hf,
    count_params,
    flops_per_token,
    gaussian,
    hf_config,
    hf_name,
)
from parallel import fp32_logits, load_hf, save_hf

# grouped-query, multi-head, head_dim != dim / n_heads (as in Minitron-8B)
PARITY = {
    "grouped_query": ModelConfig(64, 3, 8, 2, 8, 128, vocab_size=160, seq_len=64),
    "multi_head": ModelConfig(48, 2, 4, 4, 12, 96, vocab_size=160, seq_len=64),
    "free_head_dim": ModelConfig(32, 2, 6, 3, 16, 64, vocab_size=160, seq_len=64),
}
TINY = PARITY["grouped_query"]


def shaken(model, seed=0):
    """Random norms and biases too, and weights large enough that every part matters."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn(p.shape, generator=g, dtype=torch.float64)
                * (0.3 if p.ndim < 2 else 0.1)
            )
    return model


def tokens_of(cfg, *shape, seed=0):
    return torch.randint(0, cfg.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def hf_twin(cfg, dtype):
    from transformers import NemotronConfig, NemotronForCausalLM

    config = {k: v for k, v in hf_config(cfg).items() if k not in ("architectures", "model_type")}
    return (
        NemotronForCausalLM(NemotronConfig(**config, attn_implementation="sdpa")).to(dtype).eval()
    )


@pytest.mark.parametrize("name", PARITY)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=str
)
def test_logits_equal_transformers(name, dtype, tolerance):
    cfg = PARITY[name]
    ours, theirs = shaken(Nemotron(cfg)).to(dtype), hf_twin(cfg, dtype)
    theirs.load_state_dict({hf_name(n, cfg): p for n, p in ours.state_dict().items()}, strict=True)
    x = tokens_of(cfg, 2, 48)
    with torch.no_grad():
        a, b = ours(x), theirs(x).logits
    assert b.std() > 0.1
    assert (a - b).abs().max() < tolerance


@pytest.mark.parametrize("name", PARITY)
def test_a_folder_written_by_save_hf_opens_in_transformers(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = shaken(Nemotron(PARITY[name]))
    save_hf(model, tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == "NemotronForCausalLM"
    assert not report["missing_keys"] and not report["unexpected_keys"]
    x = tokens_of(model.cfg, 2, 20)
    with torch.no_grad():
        assert (model(x) - theirs(x).logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", PARITY)
def test_a_folder_written_by_transformers_opens_in_load_hf(name, tmp_path):
    theirs = hf_twin(PARITY[name], torch.float32)
    # transformers initialises the gain offset to one, a gain of two: parity must come from the
    # weights, not from an init
    assert all((p == 1).all() for n, p in theirs.named_parameters() if n.endswith("norm.weight"))
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path)
    assert (ours.norm.weight == 1).all()
    assert replace(ours.cfg, init_std=0.0134) == replace(PARITY[name], init_std=0.0134)
    x = tokens_of(ours.cfg, 2, 20)
    with torch.no_grad():
        assert (ours(x) - theirs(x).logits).abs().max() < 1e-4


def test_load_hf_converts_to_the_dtype_asked_for(tmp_path):
    save_hf(shaken(Nemotron(TINY)), tmp_path)
    assert {p.dtype for p in load_hf(tmp_path, torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_hf(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize("spelling", ["partial_rotary_factor", "rope_percent", "rope_percentage"])
def test_every_spelling_of_the_rotary_share_is_honoured(spelling):
    config = {
        k: v
        for k, v in hf_config(TINY).items()
        if k not in ("rope_parameters", "partial_rotary_factor")
    }
    assert config_from_hf({**config, spelling: 0.25}).rope_fraction == 0.25
    assert config_from_hf(config).rope_fraction == 0.5


def test_missing_or_null_key_value_heads_mean_multi_head():
    config = hf_config(PARITY["multi_head"])
    assert config_from_hf({**config, "num_key_value_heads": None}).n_kv_heads == 4
    del config["num_key_value_heads"]
    assert config_from_hf(config).n_kv_heads == 4


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "silu"},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_percent": 0.25},
    ],
    ids=str,
)
def test_a_config_that_is_not_a_nemotron_is_refused(change):
    with pytest.raises(ValueError, match="config.json"):
        config_from_hf({**hf_config(TINY), **change})


def test_a_folder_with_a_missing_an_extra_or_a_misshapen_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_hf(Nemotron(TINY), tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for broken, words in (
        ({k: v for k, v in whole.items() if k != name}, "missing"),
        ({**whole, "model.layers.9.mlp.up_proj.weight": whole[name].clone()}, "unknown"),
        ({**whole, name: whole[name][:-1].contiguous()}, "config.json makes it"),
    ):
        save_file(broken, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=words):
            load_hf(tmp_path)


def test_the_340b_and_the_15b_have_the_reports_parameter_counts():
    assert count_params(SHAPES["nemotron4-340b"]) == (9_437_184_000, 331_592_011_776)
    embedding, rest = count_params(SHAPES["nemotron4-15b"])
    assert round(embedding / 1e9, 2) == 3.15 and round(rest / 1e9, 2) == 12.48


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("attributes", [0, 5, 9])
def test_count_params_equals_a_meta_device_build(name, attributes):
    cfg = replace(SHAPES[name], n_attributes=attributes)
    with torch.device("meta"):
        model = Nemotron(cfg)
    assert sum(count_params(cfg)) == sum(p.numel() for p in model.parameters())


def test_flops_per_token_reproduces_the_reports_mfu_column():
    cfg = SHAPES["nemotron4-340b"]
    sequence = flops_per_token(cfg) * 4096
    assert f"{sequence:.5e}" == "8.62124e+15"
    # report Table 2: GPUs, batch in sequences, seconds an iteration, MFU in percent; 8.0 s is
    # rounded to 0.05
    for gpus, batch, seconds, reported in (
        (1536, 768, 10.3, 42.4),
        (3072, 1536, 10.3, 42.3),
        (6144, 2304, 8.0, 41.0),
    ):
        mfu = 100 * batch * sequence / (seconds * gpus * 989e12)
        assert abs(mfu - reported) < 0.2


def test_packed_documents_equal_the_same_documents_alone():
    model = shaken(Nemotron(TINY)).double()
    a, b = tokens_of(TINY, 1, 11, seed=1), tokens_of(TINY, 1, 7, seed=2)
    positions = torch.cat([torch.arange(11), torch.arange(7)])[None]
    documents = torch.tensor([[0] * 11 + [1] * 7])
    with torch.no_grad():
        packed = model(torch.cat([a, b], dim=1), positions, documents)
        alone = torch.cat([model(a), model(b)], dim=1)
        leaky = model(torch.cat([a, b], dim=1), positions)
    assert (packed - alone).abs().max() < 1e-12
    assert (leaky - alone).abs().max() > 1e-3


class GrowingCache:
    """The least that model.py asks of a cache: slot = position."""

    def __init__(self, slots):
        self.n_keys = self.slots = slots
        self.kv = {}

    def extend(self, layer, k, v, positions):
        if layer not in self.kv:
            shape = (k.shape[0], self.slots, *k.shape[2:])
            self.kv[layer] = (torch.zeros(shape, dtype=k.dtype), torch.zeros(shape, dtype=k.dtype))
        for cached, new in zip(self.kv[layer], (k, v), strict=True):
            cached[torch.arange(len(new))[:, None], positions] = new
        return tuple(cached[:, : self.n_keys] for cached in self.kv[layer])


@pytest.mark.parametrize("rows", [1, 2])
def test_decoding_with_a_cache_equals_one_forward_pass(rows):
    model, x = shaken(Nemotron(TINY)).double(), tokens_of(TINY, rows, 12)
    cache = GrowingCache(12)
    with torch.no_grad():
        whole = model(x)
        steps = []
        # a beginning that needs no mask, a chunked prefill, then shorter and longer pieces
        for a, b in ((0, 5), (5, 6), (6, 9), (9, 12)):
            cache.n_keys = b
            steps.append(model(x[:, a:b], torch.arange(a, b).expand(rows, -1), cache=cache))
    assert (torch.cat(steps, dim=1) - whole).abs().max() < 1e-12


def test_rows_of_a_cache_may_stand_at_different_positions():
    model, x = shaken(Nemotron(TINY)).double(), tokens_of(TINY, 2, 9)
    cache = GrowingCache(16)
    with torch.no_grad():
        model(x[:, :4], torch.arange(4).expand(2, -1), cache=cache)
        model(x[1:, 4:6], torch.arange(4, 6)[None], cache=Rows(cache, slice(1, 2)))
        got = model(
            torch.stack([x[0, 4:7], x[1, 6:9]]), torch.tensor([[4, 5, 6], [6, 7, 8]]), cache=cache
        )
        want = model(x)
    assert (got[0] - want[0, 4:7]).abs().max() < 1e-12
    assert (got[1] - want[1, 6:9]).abs().max() < 1e-12


class Rows:
    """Some rows of a cache."""

    def __init__(self, cache, rows):
        self.cache, self.rows, self.n_keys = cache, rows, cache.n_keys

    def extend(self, layer, k, v, positions):
        for cached, new in zip(self.cache.kv[layer], (k, v), strict=True):
            cached[self.rows, positions[0]] = new
        return tuple(t[self.rows] for t in self.cache.kv[layer])


def test_attention_is_causal():
    model, x = shaken(Nemotron(TINY)), tokens_of(TINY, 1, 10)
    y = x.clone()
    y[0, 6] = (y[0, 6] + 1) % TINY.vocab_size
    with torch.no_grad():
        a, b = model(x), model(y)
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.allclose(a[:, 6:], b[:, 6:])


def test_only_the_first_part_of_each_head_is_rotated():
    cfg = replace(TINY, rope_fraction=0.5)
    model = shaken(Nemotron(cfg))
    heads = model.blocks["0"].attn.wq.weight.data.view(cfg.n_heads, cfg.head_dim, cfg.dim)
    assert cfg.rope_dim == cfg.head_dim // 2
    x = tokens_of(cfg, 1, 6)
    with torch.no_grad():
        shifted = lambda: (model(x, torch.arange(6)[None] + 100) - model(x)).abs().max()  # noqa: E731
        assert shifted() < 1e-4  # attention sees relative positions alone
        before = model(x, torch.arange(6)[None] * 3)
        heads[:, : cfg.rope_dim] = (
            0  # without the rotated dimensions of the queries positions cannot matter
        )
        for block in model.blocks.values():
            block.attn.wq.weight.view(cfg.n_heads, cfg.head_dim, cfg.dim)[:, : cfg.rope_dim] = 0
        assert torch.allclose(model(x, torch.arange(6)[None] * 3), model(x), atol=1e-6)
        assert not torch.allclose(before, model(x), atol=1e-3)


def test_layer_norm_has_a_zero_centred_gain_and_fp32_statistics():
    norm = LayerNorm1P(64, 1e-5)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(norm(x), F.layer_norm(x, (64,)), atol=1e-6)  # weight 0, bias 0: gain one
    with torch.no_grad():
        norm.weight.fill_(0.001)  # in bf16 1.001 would round to 1.0
        far = (x + 1000).bfloat16()
        want = F.layer_norm(far.double(), (64,)) * 1.001
        assert torch.allclose(
            norm(far).double(), want, rtol=2**-8
        )  # exact but for the result's own rounding
        big = norm(x.double()) / F.layer_norm(x.double(), (64,), eps=1e-5)
    assert (big - 1.001).abs().max() < 1e-6


def test_bf16_logits_are_near_fp64():
    exact = shaken(Nemotron(TINY)).double()
    x = tokens_of(TINY, 2, 32)
    with torch.no_grad():
        want, got = exact(x), copy.deepcopy(exact).bfloat16()(x).double()
    assert (got - want).pow(2).mean().sqrt() < 0.02 * want.std()


def test_initial_weights_have_the_reports_spread():
    cfg = replace(TINY, dim=256, ffn_dim=512, n_layers=8, init_std=0.0063)
    model = Nemotron(cfg)
    for name, p in model.named_parameters():
        if p.ndim < 2:
            assert (p == 0).all(), name  # gain offset zero: gain one
            continue
        std = (
            0.0063 / 4 if name.endswith(("wo.weight", "down.weight")) else 0.0063
        )  # sqrt(2 * 8 layers) = 4
        assert abs(p.std() / std - 1) < 0.05 and abs(p.mean()) < 0.1 * std, name


def test_random_numbers_depend_on_seed_name_and_index_alone():
    index = torch.arange(200_000)
    whole = gaussian(1, "a", index)
    assert torch.equal(whole[5000:5010], gaussian(1, "a", index[5000:5010]))
    for other in (gaussian(2, "a", index), gaussian(1, "b", index), gaussian(1, "a", index + 1)):
        assert abs(torch.corrcoef(torch.stack([whole, other]))[0, 1]) < 0.01
    moments = [whole.pow(k).mean().item() for k in (1, 2, 3, 4)]
    assert all(abs(m - want) < 0.05 for m, want in zip(moments, (0, 1, 0, 3), strict=True))


def test_the_head_given_targets_returns_their_log_probabilities():
    model, x = shaken(Nemotron(TINY)), tokens_of(TINY, 2, 8)
    targets = tokens_of(TINY, 2, 8, seed=3)
    targets[0, 2] = IGNORE
    with torch.no_grad():
        want = model(x).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        got = model(x, targets=targets)
    want[0, 2] = 0
    assert got.dtype == torch.float32 and torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("attributes", [5, 9])
def test_the_reward_head_scores_every_token_in_fp32(attributes):
    model = Nemotron(replace(TINY, n_attributes=attributes)).bfloat16()
    scores = model(tokens_of(TINY, 2, 7))
    assert scores.shape == (2, 7, attributes) and scores.dtype == torch.float32


def test_a_reward_model_survives_the_hugging_face_folder(tmp_path):
    model = shaken(Nemotron(replace(TINY, n_attributes=5)))
    save_hf(model, tmp_path)
    again = load_hf(tmp_path)
    assert again.cfg == model.cfg and torch.equal(again.head.bias, model.head.bias)
    assert json.loads((tmp_path / "config.json").read_text())["num_labels"] == 5


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n_kv_heads": 3}, "n_heads=8 is not a multiple of n_kv_heads=3"),
        ({"head_dim": 6}, "rope_fraction=0.5 of head_dim=6"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"n_attributes": -1}, "n_attributes=-1"),
    ],
)
def test_an_impossible_shape_is_refused_with_its_numbers(change, words):
    with pytest.raises(ValueError, match=words):
        replace(TINY, **change)


def test_boundaries_are_where_each_document_begins_and_the_end_and_stay_as_they_are():
    from model import boundaries, visible_keys

    documents = torch.tensor([[0, 0, 1, 1, 1], [1, 2, 2, 7, 7]])  # a row begins one in any case
    starts = boundaries(documents)
    assert starts.tolist() == [0, 2, 5, 6, 8, 10] and starts.dtype == torch.int32
    assert visible_keys(documents, starts, None) is starts


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU; on meta it has a shape and a dtype, and no values."""

    is_cuda = True


def on_gpu(*shape, dtype=torch.bfloat16):
    tensor = torch.empty(*shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)
    return tensor.as_subclass(OnGpu)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_the_gpus_kernel_for_packed_documents_accepts_what_it_is_given(kv_heads, monkeypatch):
    # torch 2.15 asks which GPU it is, to choose between flash-attention and cuDNN
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    q, k, v = (on_gpu(2, 64, heads, 32) for heads in (8, kv_heads, kv_heads))
    starts = on_gpu(6, dtype=torch.int32)
    out = attend(q, k, v, starts)
    assert out.shape == q.shape and out.dtype == torch.bfloat16
    for tensor, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.shape == tensor.shape and grad.dtype == torch.bfloat16


def test_logits_of_bf16_states_are_fp32_on_a_gpu():
    logits = fp32_logits(on_gpu(6, 32), on_gpu(100, 32))
    assert logits.shape == (6, 100) and logits.dtype == torch.float32


def test_flash_attn_is_called_by_its_published_signature_and_only_in_half_precision(monkeypatch):
    calls = []

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # of 2.8  # fmt: skip
        calls.append((q.shape, k.shape, causal))
        return torch.empty_like(q)

    monkeypatch.setattr(
        model_module, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func)
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q, k, v = (on_gpu(2, 64, heads, 32, dtype=dtype) for heads in (8, 4, 4))
        assert attend(q, k, v, None).shape == q.shape
    assert calls == [((2, 64, 8, 32), (2, 64, 4, 32), True)] * 2
    assert attend(torch.rand(1, 3, 4, 8), *torch.rand(2, 1, 3, 2, 8), None).shape == (1, 3, 4, 8)
    assert len(calls) == 2  # none on a CPU


def test_a_package_of_flash_attn_4_alone_is_not_taken_for_flash_attn(tmp_path):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("def flash_attn_func(*a): ...")
    path = os.pathsep.join([str(tmp_path), str(Path(model_module.__file__).parent)])
    code = "import flash_attn.cute, model; print(model.flash_attn)"
    how = dict(capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert subprocess.run([sys.executable, "-c", code], **how).stdout == "None\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_every_attention_kernel_equals_float64(packed, head_dim):
    from model import boundaries, visible_keys

    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 256, h, head_dim, generator=g, dtype=torch.float64) for h in (12, 4, 4)
    )
    documents = (torch.arange(256) // 100).expand(2, -1).contiguous() if packed else None
    positions = torch.arange(256).expand(2, -1)
    want = attend(q, k, v, visible_keys(positions, documents, None))
    visible = boundaries(documents).cuda() if packed else None
    got = attend(*(t.cuda().bfloat16() for t in (q, k, v)), visible)
    assert (got.cpu().double() - want).abs().max() < 0.03
