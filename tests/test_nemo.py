"""recipes/nemo.py: NVIDIA's folders as an independent writer makes them, from the layout's
description alone; transformers and tensorstore are the oracles."""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tarfile
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file, save_file

import data
import generate
import parallel
from generate import EngineConfig, SamplingParams, load_engine
from model import SHAPES, ModelConfig, Nemotron, count_params, hf_config, hf_name
from parallel import MeshConfig, Runner, init_mesh, local_part
from recipes import nemo, nemo_files
from recipes.records import load_backend

BF16 = torch.bfloat16
TINY = ModelConfig(64, 2, 8, 2, 8, 96, vocab_size=300, seq_len=32)
# 2 and 3 layers; 1, 2 and 8 groups
SHAPED = {
    "1 group": dataclasses.replace(TINY, n_kv_heads=1),
    "2 groups": dataclasses.replace(TINY, n_layers=3),
    "8 groups": dataclasses.replace(TINY, n_kv_heads=8, head_dim=16, vocab_size=1024),
}
TOKENIZER = "0123456789abcdef0123456789abcdef_words.json"


def weights_of(cfg, seed=0):
    """Random weights by Hugging Face's names, gains near one, i.e. stored near zero."""
    g = torch.Generator().manual_seed(seed)
    names = {hf_name(name, cfg): shape for name, shape in parallel.full_shapes(cfg).items()}
    return {name: (torch.randn(shape, generator=g) * 0.2).to(BF16) for name, shape in names.items()}


# ---- the independent writer ----------------------------------------------------------------------


def raw(array):
    """The bytes of a bf16 tensor, row by row, little-endian."""
    return array.contiguous().view(torch.int16).numpy().astype("<i2").tobytes()


def stacked(weights, cfg, padded):
    """The arrays of a checkpoint: what the layers have is stacked, q, k and v of each group are
    next to each other, and the vocabulary is padded with rows that no one may read."""
    q = cfg.n_heads // cfg.n_kv_heads
    arrays = {}
    layers = {}
    for i in range(cfg.n_layers):
        own = f"model.layers.{i}."
        rows = []
        for group in range(cfg.n_kv_heads):
            for part, heads in (("q", q), ("k", 1), ("v", 1)):
                whole = weights[f"{own}self_attn.{part}_proj.weight"]
                n = heads * cfg.head_dim
                rows.append(whole[group * n : (group + 1) * n])
        of = {
            "self_attention.linear_qkv.weight": torch.cat(rows),
            "self_attention.linear_proj.weight": weights[f"{own}self_attn.o_proj.weight"],
            "mlp.linear_fc1.weight": weights[f"{own}mlp.up_proj.weight"],
            "mlp.linear_fc2.weight": weights[f"{own}mlp.down_proj.weight"],
        }
        for kind in ("weight", "bias"):
            norm = weights[f"{own}input_layernorm.{kind}"]
            of[f"self_attention.linear_qkv.layer_norm_{kind}"] = norm
            norm = weights[f"{own}post_attention_layernorm.{kind}"]
            of[f"mlp.linear_fc1.layer_norm_{kind}"] = norm
        for name, tensor in of.items():
            layers.setdefault(name, []).append(tensor)
    for name, parts in layers.items():
        arrays[f"decoder.layers.{name}"] = torch.stack(parts)
    arrays["decoder.final_layernorm.weight"] = weights["model.norm.weight"]
    arrays["decoder.final_layernorm.bias"] = weights["model.norm.bias"]
    embed = weights["model.embed_tokens.weight"]
    junk = torch.full((padded - len(embed), cfg.dim), 77.0, dtype=BF16)
    arrays["embedding.word_embeddings.weight"] = torch.cat([embed, junk])
    head = weights.get("lm_head.weight", embed)  # a reward model's, which nothing reads
    arrays["output_layer.weight"] = torch.cat([head, junk])
    if "score.weight" in weights:
        arrays["rm_head.weight"] = weights["score.weight"]
        arrays["rm_head.bias"] = weights["score.bias"]
    return arrays


CUT = {  # the axis of a matrix that tensor parallelism cuts
    "embedding.word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "decoder.layers.self_attention.linear_qkv.weight": 1,
    "decoder.layers.self_attention.linear_proj.weight": 2,
    "decoder.layers.mlp.linear_fc1.weight": 1,
    "decoder.layers.mlp.linear_fc2.weight": 2,
    "rm_head.weight": 1,
}


def chunk_shape(name, shape, tp, ragged):
    chunk = [1, *shape[1:]] if name.startswith("decoder.layers.") else [*shape]
    if name in CUT:
        axis = CUT[name]
        chunk[axis] = -(-shape[axis] // tp) + (3 if ragged else 0)
    return chunk


def write_zarr(folder, name, array, chunk):
    """An array as zarr's second format has it; a chunk that overhangs the edge is stored whole."""
    folder = folder / name
    folder.mkdir(parents=True)
    about = {
        "chunks": chunk, "compressor": None, "dtype": "bfloat16", "fill_value": None,
        "filters": None, "order": "C", "shape": [*array.shape], "zarr_format": 2,
    }  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(about, indent=4, sort_keys=True))
    for at in np.ndindex(*[-(-n // c) for n, c in zip(array.shape, chunk, strict=True)]):
        index = [slice(i * c, (i + 1) * c) for i, c in zip(at, chunk, strict=True)]
        part = array[tuple(index)]
        whole = torch.full(chunk, 55.0, dtype=BF16)
        whole[tuple(slice(0, n) for n in part.shape)] = part
        (folder / ".".join(map(str, at))).write_bytes(raw(whole))


def settings_of(cfg, tp=1, **more):
    """model_config.yaml with the keys of NVIDIA's, of which many say nothing of the shape."""
    return {
        "micro_batch_size": 1, "global_batch_size": 128, "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": 24, "encoder_seq_length": cfg.seq_len,
        "max_position_embeddings": cfg.seq_len, "num_layers": cfg.n_layers,
        "hidden_size": cfg.dim, "ffn_hidden_size": cfg.ffn_dim,
        "num_attention_heads": cfg.n_heads, "init_method_std": cfg.init_std,
        "use_scaled_init_method": True, "hidden_dropout": 0, "kv_channels": cfg.head_dim,
        "apply_query_key_layer_scaling": True, "normalization": "layernorm1p",
        "layernorm_epsilon": 1e-5, "make_vocab_size_divisible_by": 128, "pre_process": True,
        "bias": False, "activation": "squared-relu", "headscale": False,
        "transformer_block_type": "pre_ln", "num_query_groups": cfg.n_kv_heads,
        "position_embedding_type": "rope", "rotary_percentage": 0.5, "attention_type": "multihead",
        "share_embeddings_and_output_weights": False, "optim": {"name": "adam", "lr": 1e-5},
        "tokenizer": {"library": "sentencepiece", "model": f"nemo:{TOKENIZER}", "type": None},
        "precision": "bf16", "mcore_gpt": True,
        **more,
    }  # fmt: skip


def padded_rows(cfg, tp):
    return -(-cfg.vocab_size // (128 * tp)) * 128 * tp


def write_nemo(folder, weights, cfg, tp=1, ragged=False, **settings):
    """A folder as NVIDIA publishes one."""
    arrays = stacked(weights, cfg, padded_rows(cfg, tp))
    for name, array in arrays.items():
        chunk = chunk_shape(name, array.shape, tp, ragged)
        write_zarr(folder / "model_weights", f"model.{name}", array, chunk)
    inside = folder / "model_weights"
    text = '{"sharded_backend": "zarr", "sharded_backend_version": 1}'
    (inside / "metadata.json").write_text(text)
    (inside / "common.pt").write_bytes(b"never opened")
    extra = inside / "model.decoder.layers.mlp.linear_fc1._extra_state"
    extra.mkdir()
    for i in range(cfg.n_layers):
        (extra / f"shard_{i}_{cfg.n_layers}.pt").write_bytes(b"never opened")
    given = settings_of(cfg, tp, vocab_size=cfg.vocab_size, **settings)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(given))
    return folder


def write_torch_dist(folder, weights, cfg, prefix, tp=2):
    """The newer form: chunks as torch.save writes them, in files of two ranks, and a list of them
    that is an object of Megatron's own class."""
    from torch.distributed.checkpoint import metadata as meta
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    folder.mkdir(parents=True)
    listed, stored = {}, {}
    files = [io.BytesIO(), io.BytesIO()]
    for name, array in stacked(weights, cfg, padded_rows(cfg, tp)).items():
        name = prefix + name
        chunk = chunk_shape(name.removeprefix(prefix), array.shape, tp, False)
        boxes = []
        counts = [-(-n // c) for n, c in zip(array.shape, chunk, strict=True)]
        for n, at in enumerate(np.ndindex(*counts)):
            start = torch.Size(i * c for i, c in zip(at, chunk, strict=True))
            index = [slice(s, s + c) for s, c in zip(start, chunk, strict=True)]
            part = array[tuple(index)].clone()
            if n % 3 == 1:  # not in C order
                part = part.transpose(-1, -2).contiguous().transpose(-1, -2)
            boxes.append(meta.ChunkStorageMetadata(start, part.shape))
            file = files[n % 2]
            offset = file.tell()
            saved = io.BytesIO()
            torch.save(part, saved)
            file.write(saved.getvalue())
            info = _StorageInfo(f"__{n % 2}_0.distcp", offset, len(saved.getvalue()))
            stored[meta.MetadataIndex(name, start, n)] = info
        kind = meta.TensorProperties(dtype=BF16)
        listed[name] = meta.TensorStorageMetadata(kind, array.shape, boxes)
    extra = f"{prefix}decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"
    listed[extra] = meta.BytesStorageMetadata()
    stored[meta.MetadataIndex(extra)] = _StorageInfo("__0_0.distcp", files[0].tell(), 12)
    files[0].write(b"never opened")
    for i, file in enumerate(files):
        (folder / f"__{i}_0.distcp").write_bytes(file.getvalue())
    name = "megatron.core.dist_checkpointing.strategies.torch"
    own = types.ModuleType(name)
    own.MCoreMetadata = type("MCoreMetadata", (meta.Metadata,), {"__module__": name})
    parts = name.split(".")
    packages = [".".join(parts[: i + 1]) for i in range(len(parts) - 1)]
    with pytest.MonkeyPatch.context() as patch:
        for package in packages:
            patch.setitem(sys.modules, package, types.ModuleType(package))
        patch.setitem(sys.modules, name, own)
        index = own.MCoreMetadata(listed, storage_data=stored)
        index.mcore_data = {"some": {"thing": (1, 2)}}
        (folder / ".metadata").write_bytes(pickle.dumps(index))
    (folder / "common.pt").write_bytes(b"never opened")
    return folder


def convert(folder, out, **options):
    nemo.import_nemo(nemo.ImportConfig(folder, out, **options))
    return out


def tensors_in(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def bytes_in(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# ---- to a Hugging Face folder --------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("shape", SHAPED)
def test_an_imported_folder_has_the_weights_bit_for_bit(shape, tp, ragged, tmp_path):
    cfg = SHAPED[shape]
    weights = weights_of(cfg)
    out = convert(write_nemo(tmp_path / "nemo", weights, cfg, tp, ragged), tmp_path / "hf")
    assert_same(tensors_in(out), weights)
    assert parallel.read_config(out) == cfg
    assert not (tmp_path / "hf.partial").exists()
    left = {path.name for path in out.iterdir()}
    assert left == {"model.safetensors", "model.safetensors.index.json", "config.json"} | {
        "generation_config.json"
    }


def transformers_logits(folder, x):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(x).logits


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A transformers model, its folder, and its logits in fp64 for some tokens."""
    from transformers import NemotronConfig, NemotronForCausalLM

    cfg = SHAPED["2 groups"]
    config = {k: v for k, v in hf_config(cfg).items() if k not in ("architectures", "model_type")}
    model = NemotronForCausalLM(NemotronConfig(**config)).to(BF16)
    weights = weights_of(cfg, seed=1)
    model.load_state_dict(weights, strict=True)
    folder = tmp_path_factory.mktemp("twin")
    model.save_pretrained(folder)
    x = torch.randint(0, cfg.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    logits = transformers_logits(folder, x)
    assert logits.std() > 0.1
    return cfg, weights, x, logits


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_are_those_of_the_transformers_model_it_came_from(twin, tp, tmp_path):
    cfg, weights, x, logits = twin
    out = convert(write_nemo(tmp_path / "nemo", weights, cfg, tp), tmp_path / "hf")
    assert (transformers_logits(out, x) - logits).abs().max() < 1e-6
    ours = parallel.load_hf(out, torch.float64)
    with torch.no_grad():
        assert (ours(x) - logits).abs().max() < 1e-6


def swap(weights, one, other):
    """The weights with two names exchanged in every layer."""
    changed = dict(weights)
    for name in weights:
        if one in name:
            changed[name], changed[name.replace(one, other)] = (
                weights[name.replace(one, other)],
                weights[name],
            )
    return changed


def test_swapped_norms_swapped_k_and_v_and_whole_gains_change_the_logits(twin, tmp_path):
    cfg, weights, x, logits = twin
    gains = {n: w + 1 if "norm" in n and n.endswith("weight") else w for n, w in weights.items()}
    wrong = {
        "norms": swap(weights, "input_layernorm", "post_attention_layernorm"),
        "k and v": swap(weights, "k_proj", "v_proj"),
        "gain": {name: weight.to(BF16) for name, weight in gains.items()},
    }
    for what, changed in wrong.items():
        out = convert(write_nemo(tmp_path / what, changed, cfg, 2), tmp_path / f"{what} hf")
        with torch.no_grad():
            moved = (parallel.load_hf(out, torch.float64)(x) - logits).abs().max()
        assert moved > 0.1, what


def test_a_reward_model_keeps_its_nine_attributes_and_their_bias(tmp_path):
    cfg = dataclasses.replace(TINY, n_attributes=9)
    weights = weights_of(cfg)
    assert weights["score.weight"].shape == (9, 64) and weights["score.bias"].shape == (9,)
    out = convert(write_nemo(tmp_path / "nemo", weights, cfg, 8), tmp_path / "hf")
    assert_same(tensors_in(out), weights)
    assert parallel.read_config(out) == cfg
    x = torch.arange(20)[None]
    with torch.no_grad():
        scores = parallel.load_hf(out, torch.float64)(x)
    from transformers import AutoModelForSequenceClassification

    theirs = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float64)
    theirs.config.pad_token_id = 0
    with torch.no_grad():  # theirs has no bias
        other = theirs.eval()(x).logits + weights["score.bias"].double()
    assert scores.shape == (1, 20, 9)
    assert (scores[:, -1] - other).abs().max() < 1e-6
    helpsteer = data.aggregate(scores[0, -1])  # which counts the last five
    least = sum(w * s for w, s in zip(data.REWARD_WEIGHTS, scores[0, -1, 4:], strict=True))
    assert float(helpsteer) == pytest.approx(float(least))


@pytest.mark.parametrize("prefix", ["model.", "module.", ""])
def test_the_torch_dist_form_is_read_with_each_writers_names(prefix, tmp_path):
    cfg = SHAPED["2 groups"]
    weights = weights_of(cfg)
    inside = {"model.": "model_weights", "module.": "weights", "": "iter_0000100"}[prefix]
    write_torch_dist(tmp_path / "nemo" / inside, weights, cfg, prefix)
    given = settings_of(cfg, 2, vocab_size=cfg.vocab_size)
    if prefix != "model.":
        for old, new in (("encoder_seq_length", "seq_length"), ("bias", "add_bias_linear")):
            given[new] = given.pop(old)
        given["rotary_percent"] = given.pop("rotary_percentage")
        given["normalization"] = "LayerNorm"
        given["layernorm_zero_centered_gamma"] = True
        del given["activation"]
        place = "some.where.squared_relu"
        given["activation_func"] = {"_target_": place, "_call_": False}
        given = {"_target_": "some.Class", "config" if prefix else "model": given}
    name = {"model.": "model_config.yaml", "module.": "context/model.yaml"}.get(prefix)
    path = tmp_path / "nemo" / (name or f"{inside}/run_config.yaml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(given))
    out = convert(tmp_path / "nemo", tmp_path / "hf")
    assert_same(tensors_in(out), weights)
    assert parallel.read_config(out) == cfg
    assert "megatron" not in sys.modules


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torchs_own_writer_saves_is_read(tmp_path):
    import torch.distributed.checkpoint as dcp

    weights = weights_of(TINY)
    arrays = {f"module.{k}": v for k, v in stacked(weights, TINY, padded_rows(TINY, 1)).items()}
    more = {
        "module.decoder.layers.mlp.linear_fc1._extra_state/shard_0_2": io.BytesIO(b"not opened"),
        "optimizer.state.exp_avg.module.embedding.word_embeddings.weight": torch.ones(7),
        "rng_state": {"seed": 3},
    }
    dcp.save(arrays | more, checkpoint_id=tmp_path / "nemo" / "weights", no_dist=True)
    text = yaml.safe_dump(settings_of(TINY, vocab_size=300))
    (tmp_path / "nemo" / "model_config.yaml").write_text(text)
    assert_same(tensors_in(convert(tmp_path / "nemo", tmp_path / "hf")), weights)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_torch_dist_writer_of_this_test_is_read_by_torchs_own_reader(tmp_path):
    import torch.distributed.checkpoint as dcp

    weights = weights_of(TINY)
    write_torch_dist(tmp_path / "ck", weights, TINY, "module.")
    index = nemo_files.Unpickler(io.BytesIO((tmp_path / "ck/.metadata").read_bytes())).load()
    listed = {k: v for k, v in index.state_dict_metadata.items() if hasattr(v, "chunks")}
    wanted = {f"module.{k}": v for k, v in stacked(weights, TINY, padded_rows(TINY, 2)).items()}
    assert listed.keys() == wanted.keys()
    name = "megatron.core.dist_checkpointing.strategies.torch"
    own = types.ModuleType(name)
    own.MCoreMetadata = type("MCoreMetadata", (dcp.Metadata,), {})
    with pytest.MonkeyPatch.context() as patch:
        parts = name.split(".")
        for i in range(1, len(parts)):
            patch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType("empty"))
        patch.setitem(sys.modules, name, own)
        found = {k: torch.empty_like(v) for k, v in wanted.items()}
        dcp.load(found, checkpoint_id=tmp_path / "ck", no_dist=True)
    assert_same(found, wanted)


# ---- archives ------------------------------------------------------------------------------------


def write_tar(folder, path, n_parts=1):
    """An uncompressed tar as NeMo's, its members prefixed with ./, in parts of the same size."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        tar.add(folder, arcname=".")
    size = -(-len(whole.getvalue()) // n_parts)
    paths = []
    for i in range(n_parts):
        paths.append(Path(f"{path}.part-a{chr(97 + i)}") if n_parts > 1 else path)
        paths[-1].write_bytes(whole.getvalue()[i * size : (i + 1) * size])
    return paths


@pytest.mark.parametrize("n_parts", [1, 7])
def test_a_tar_is_read_in_place_whole_and_in_parts(n_parts, tmp_path):
    weights = weights_of(TINY)
    folder = write_nemo(tmp_path / "nemo", weights, TINY, 2)
    first, *parts = write_tar(folder, tmp_path / "model.nemo", n_parts)
    out = convert(first, tmp_path / "hf", parts=tuple(parts))
    assert_same(tensors_in(out), weights)
    if parts:
        for wrong in (parts[:-1], parts[::-1], []):
            with pytest.raises(ValueError, match="model.nemo.part-aa|missing|no bytes|--parts"):
                convert(first, tmp_path / "wrong", parts=tuple(wrong))


def test_a_tar_of_torch_dist_form_is_read_in_place(tmp_path):
    weights = weights_of(TINY)
    write_torch_dist(tmp_path / "nemo" / "model_weights", weights, TINY, "model.")
    text = yaml.safe_dump(settings_of(TINY, 2, vocab_size=300))
    (tmp_path / "nemo" / "model_config.yaml").write_text(text)
    first, *parts = write_tar(tmp_path / "nemo", tmp_path / "model.nemo", 3)
    assert_same(tensors_in(convert(first, tmp_path / "hf", parts=tuple(parts))), weights)


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "model.nemo", "w:gz") as tar:
        tar.add(__file__)
    with pytest.raises(ValueError, match="model.nemo: no whole, uncompressed tar"):
        convert(tmp_path / "model.nemo", tmp_path / "hf")


def test_a_slice_costs_its_own_bytes_and_an_import_reads_each_byte_once(tmp_path, monkeypatch):
    folder = write_nemo(tmp_path / "nemo", weights_of(TINY), TINY, 2)
    _, tensors, _ = nemo.open_nemo(folder)
    read = []
    plain = nemo_files.Span.readinto

    def counted(span, buffer):
        read.append(plain(span, buffer))
        return read[-1]

    monkeypatch.setattr(nemo_files.Span, "readinto", counted)
    wk = tensors["blocks.1.attn.wk.weight"]
    whole = torch.cat([*wk.blocks()])
    assert sum(read) == whole.nbytes
    del read[:]
    assert torch.equal(wk[3:8, 5:50], whole[3:8, 5:50])
    assert sum(read) == 2 * (4 * 64 + 45)  # from the first to the last element
    del read[:]
    for rows in tensors.values():
        for _ in rows.blocks():
            pass
    assert sum(read) == sum(rows.nbytes for rows in tensors.values())


# ---- an oracle -----------------------------------------------------------------------------------


def test_tensorstore_reads_what_this_test_and_export_write(tmp_path):
    tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    weights = weights_of(TINY)
    wanted = {f"model.{k}": v for k, v in stacked(weights, TINY, padded_rows(TINY, 2)).items()}
    write_nemo(tmp_path / "nemo", weights, TINY, 2, ragged=True)
    hf = convert(tmp_path / "nemo", tmp_path / "hf")
    nemo.export_nemo(nemo.ExportConfig(hf, tmp_path / "back", tp=2))
    for folder, padding in (("nemo", 77), ("back", 0)):
        for name, array in wanted.items():
            path = tmp_path / folder / "model_weights" / name
            where = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/"}}
            found = tensorstore.open(where, open=True).result().read().result()
            found = torch.from_numpy(found.view(np.int16)).view(BF16)
            used = array.clone()
            used[used == 77] = padding
            assert torch.equal(found, used), name


# ---- back to a NeMo folder -----------------------------------------------------------------------


@pytest.mark.parametrize("shape, tp", [("1 group", 1), ("2 groups", 2), ("8 groups", 8)])
@pytest.mark.parametrize("n_attributes", [pytest.param(0, marks=pytest.mark.slow), 9])
def test_export_and_import_are_inverse_bit_for_bit(shape, tp, n_attributes, tmp_path):
    cfg = dataclasses.replace(SHAPED[shape], n_attributes=n_attributes)
    first = convert(write_nemo(tmp_path / "nemo", weights_of(cfg), cfg, tp), tmp_path / "hf")
    nemo.export_nemo(nemo.ExportConfig(first, tmp_path / "back", tp=tp))
    second = convert(tmp_path / "back", tmp_path / "again")
    assert bytes_in(second) == bytes_in(first)
    # and the arrays are those of the first folder, but for the padding and what nothing reads
    arrays = stacked(weights_of(cfg), cfg, padded_rows(cfg, tp))
    unused = {"output_layer.weight"} if n_attributes else set()
    names = {path.parent.name for path in (tmp_path / "back").rglob(".zarray")}
    assert names == {f"model.{name}" for name in arrays.keys() - unused}
    found = bytes_in(tmp_path / "back" / "model_weights")
    for file, content in bytes_in(tmp_path / "nemo" / "model_weights").items():
        array = file.split("/")[0].removeprefix("model.")
        if array in arrays and array not in unused and not array.startswith(("embed", "output")):
            assert found[file] == content, file


def test_a_run_is_exported_in_bf16_as_its_hugging_face_folder_is(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    parallel.init_mesh(parallel.MeshConfig())
    weights = {f"model.{name}": p.detach() for name, p in Nemotron(TINY).named_parameters()}
    parallel.Checkpoints(run / "checkpoints", 2, False).save(1, weights, {})
    (run / "config.json").write_text(json.dumps({"model": dataclasses.asdict(TINY)}))
    parallel.export(parallel.ExportConfig(run, tmp_path / "hf"))
    nemo.export_nemo(nemo.ExportConfig(run, tmp_path / "nemo", tp=2))
    again = tensors_in(convert(tmp_path / "nemo", tmp_path / "again"))
    assert_same(again, tensors_in(tmp_path / "hf"))


def test_an_impossible_tensor_parallel_size_is_refused(tmp_path):
    first = convert(write_nemo(tmp_path / "nemo", weights_of(TINY), TINY), tmp_path / "hf")
    for tp in (3, 4, 0):
        with pytest.raises(ValueError, match=f"tp={tp} does not divide n_kv_heads=2"):
            nemo.export_nemo(nemo.ExportConfig(first, tmp_path / "back", tp=tp))
    assert not (tmp_path / "back").exists()


# ---- refusals ------------------------------------------------------------------------------------

QKV = "model_weights/model.decoder.layers.self_attention.linear_qkv.weight"
EMBED = "model_weights/model.embedding.word_embeddings.weight"


def edit(path, **values):
    """Change keys of a JSON or a YAML file; None removes one."""
    given = yaml.safe_load(path.read_text()) | values
    text = json.dumps(given) if path.name == ".zarray" else yaml.safe_dump(given)
    path.write_text(text)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-2])


BROKEN = {
    "a missing chunk": (lambda f: (f / QKV / "1.1.0").unlink(), f"{QKV}/1.1.0 has no bytes"),
    "a short chunk": (lambda f: cut_short(f / QKV / "1.0.0"), f"{QKV}/1.0.0 has 6142 bytes"),
    "a dtype": (lambda f: edit(f / QKV / ".zarray", dtype="<i2"), "dtype is '<i2': only"),
    "big-endian": (lambda f: edit(f / QKV / ".zarray", dtype=">f4"), "dtype is '>f4': only"),
    "a compressor": (
        lambda f: edit(f / QKV / ".zarray", compressor={"id": "zlib"}),
        "linear_qkv.weight/.zarray: compressor is",
    ),
    "a filter": (lambda f: edit(f / QKV / ".zarray", filters=[1]), "filters is"),
    "an order": (lambda f: edit(f / QKV / ".zarray", order="F"), "order is 'F': only"),
    "another zarr": (lambda f: edit(f / QKV / ".zarray", zarr_format=3), "zarr_format is 3"),
    "a text": (lambda f: (f / QKV / ".zarray").write_text("{"), "describes no array"),
    "no chunk size": (lambda f: edit(f / QKV / ".zarray", chunks=[0, 0, 0]), "describes no array"),
    "a missing array": (lambda f: shutil.rmtree(f / QKV), "linear_qkv.weight is missing"),
    "an unknown array": (
        lambda f: shutil.copytree(f / QKV, f / (QKV[:-6] + "bias")),
        "linear_qkv.bias is none of the model",
    ),
    "other qkv rows": (
        lambda f: edit(f / "model_config.yaml", num_query_groups=4),
        r"linear_qkv.weight is \[2, 96, 64\], not \[2, 128, 64\].*groups × .* head_dim",
    ),
    "an activation": (
        lambda f: edit(f / "model_config.yaml", activation="swiglu"),
        "model_config.yaml: activation is 'swiglu': only 'squared-relu'",
    ),
    "a norm": (
        lambda f: edit(f / "model_config.yaml", normalization="rmsnorm"),
        "normalization is 'rmsnorm': only 'layernorm1p'",
    ),
    "a plain norm": (
        lambda f: edit(f / "model_config.yaml", normalization="LayerNorm"),
        "normalization is 'LayerNorm'",
    ),
    "biases": (lambda f: edit(f / "model_config.yaml", bias=True), "bias is True: only False"),
    "no word of biases": (lambda f: edit(f / "model_config.yaml", bias=None), "bias is None"),
    "positions": (
        lambda f: edit(f / "model_config.yaml", position_embedding_type="alibi"),
        "position_embedding_type is 'alibi'",
    ),
    "tied embeddings": (
        lambda f: edit(f / "model_config.yaml", share_embeddings_and_output_weights=True),
        "share_embeddings_and_output_weights is True",
    ),
    "experts": (
        lambda f: edit(f / "model_config.yaml", num_moe_experts=8),
        "num_moe_experts is 8: no model with it is built",
    ),
    "an odd yaml": (
        lambda f: (f / "model_config.yaml").write_text("!!python/object/apply:os.abort []"),
        "model_config.yaml describes no model",
    ),
    "no yaml": (lambda f: (f / "model_config.yaml").unlink(), "model_config.yaml.*is there"),
    "half a yaml": (
        lambda f: edit(f / "model_config.yaml", ffn_hidden_size=None),
        "model_config.yaml describes no model",
    ),
    "no weights": (
        lambda f: shutil.rmtree(f / "model_weights"),
        "0 checkpoints of zarr or torch_dist form.*convert_gpt_nemo_to_mcore.py",
    ),
    "too few rows": (
        lambda f: edit(f / "model_config.yaml", vocab_size=600),
        r"word_embeddings.weight is \[512, 64\], not \[600, 64\]: rows of the tokenizer",
    ),
    "too many rows": (
        lambda f: edit(f / "model_config.yaml", vocab_size=200),
        r"word_embeddings.weight is \[512, 64\], not \[200, 64\]: rows of the tokenizer",
    ),
    "no vocabulary": (
        lambda f: edit(f / "model_config.yaml", vocab_size=None),
        "a tokenizer of 0 ids.*set --vocab-size",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_is_no_such_model_is_refused_by_name(what, tmp_path):
    harm, says = BROKEN[what]
    folder = write_nemo(tmp_path / "nemo", weights_of(TINY), TINY, 2)
    harm(folder)
    with pytest.raises(ValueError, match=says) as refused:
        convert(folder, tmp_path / "hf")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "hf").exists() and not (tmp_path / "hf.partial").exists()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer's file of 300 ids."""
    folder = tmp_path_factory.mktemp("words")
    data.train_bpe([next(data.embedded_english())], 300).save(folder)
    return (folder / "tokenizer.json").read_bytes()


def test_the_vocabulary_is_the_tokenizers_and_its_file_goes_along(words, tmp_path):
    weights = weights_of(TINY)
    folder = write_nemo(tmp_path / "nemo", weights, TINY, 2)
    edit(folder / "model_config.yaml", vocab_size=None)
    (folder / f"{TOKENIZER[:32]}_tokenizer.json").write_bytes(words)
    out = convert(folder, tmp_path / "hf")
    assert (out / "tokenizer.json").read_bytes() == words
    assert_same(tensors_in(out), weights)
    nemo.export_nemo(nemo.ExportConfig(out, tmp_path / "back", tp=1))
    assert bytes_in(convert(tmp_path / "back", tmp_path / "again")) == bytes_in(out)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    folder = write_nemo(tmp_path / "nemo", weights_of(TINY), TINY, 2)
    (folder / "words.model").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="words.model is no tokenizer: fetch it again"):
        convert(folder, tmp_path / "hf")


def test_a_tokenizer_of_another_size_is_refused(words, tmp_path):
    cfg = dataclasses.replace(TINY, vocab_size=200)
    folder = write_nemo(tmp_path / "nemo", weights_of(cfg), cfg)
    (folder / "tokenizer.json").write_bytes(words)
    with pytest.raises(ValueError, match="tokenizer of 300 ids, a vocab_size of 200"):
        convert(folder, tmp_path / "hf")
    edit(folder / "model_config.yaml", vocab_size=None)
    with pytest.raises(ValueError, match=r"is \[256, 64\], not \[300, 64\]: rows of the tokenizer"):
        convert(folder, tmp_path / "hf")


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("call", ["touch", "eval", "os.system"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(call, tmp_path):
    harmed = tmp_path / "harmed"
    scripts = {
        "touch": pickle.dumps(Harm(harmed)),
        "eval": f"cbuiltins\neval\n(Vopen({str(harmed)!r}, 'w')\ntR.".encode(),
        "os.system": f"cposix\nsystem\n(Vtouch {harmed}\ntR.".encode(),
    }
    weights = tmp_path / "nemo" / "weights"
    write_torch_dist(weights, weights_of(TINY), TINY, "module.")
    (weights / ".metadata").write_bytes(scripts[call])
    with pytest.raises(ValueError, match=r"weights/.metadata lists no arrays"):
        convert(tmp_path / "nemo", tmp_path / "hf")
    assert not harmed.exists()
    # the control: this test's own pickle does make its file where pickle itself reads it
    pickle.loads(scripts["touch"])
    assert harmed.exists()


def torch_dist_folder(tmp_path):
    write_torch_dist(tmp_path / "nemo" / "model_weights", weights_of(TINY), TINY, "model.")
    text = yaml.safe_dump(settings_of(TINY, 2, vocab_size=300))
    (tmp_path / "nemo" / "model_config.yaml").write_text(text)
    return tmp_path / "nemo"


@pytest.mark.parametrize(
    "harm",
    [
        lambda f: (f / "__1_0.distcp").unlink(),
        lambda f: (f / "__0_0.distcp").write_bytes((f / "__0_0.distcp").read_bytes()[:5000]),
        lambda f: (f / "__0_0.distcp").write_bytes(bytes((f / "__0_0.distcp").stat().st_size)),
    ],
    ids=["missing", "short", "zeros"],
)
def test_a_torch_dist_file_that_is_not_whole_is_refused_by_array(harm, tmp_path):
    folder = torch_dist_folder(tmp_path)
    harm(folder / "model_weights")
    with pytest.raises(ValueError, match=r"model_weights/.metadata: model\.\S+ from .* on cannot"):
        convert(folder, tmp_path / "hf")


def test_files_of_single_ranks_are_refused_with_the_name_of_what_converts_them(tmp_path):
    (tmp_path / "nemo" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "nemo" / "mp_rank_00" / "model_weights.ckpt").write_bytes(b"never opened")
    with pytest.raises(ValueError, match="single ranks.*convert_gpt_nemo_to_mcore.py"):
        convert(tmp_path / "nemo", tmp_path / "hf")


# ---- kills, disks, sizes -------------------------------------------------------------------------


@pytest.fixture
def small_files(monkeypatch):
    """Output files of 20 kB, and blocks of 2 kB, so that there are many of both."""
    monkeypatch.setattr(nemo, "FILE_BYTES", 20_000)
    monkeypatch.setattr(nemo_files, "BLOCK", 2_000)


def test_many_files_have_an_index_that_transformers_follows(small_files, twin, tmp_path):
    cfg, weights, x, logits = twin
    out = convert(write_nemo(tmp_path / "nemo", weights, cfg, 2), tmp_path / "hf")
    assert len([*out.glob("*.safetensors")]) > 10
    assert_same(tensors_in(out), weights)
    assert (transformers_logits(out, x) - logits).abs().max() < 1e-6


def files_kept(partial):
    """The files that an import has recorded as finished."""
    record = partial / "finished.json"
    return (json.loads(record.read_text()).keys() if record.exists() else set()) - {"source"}


def import_and_die(folder, out, n_files, seconds):
    """Import in a fork that is killed some seconds after it has finished some files."""
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            convert(folder, out)
        finally:
            os._exit(0)
    partial = out.with_name(f"{out.name}.partial")
    until = time.monotonic() + 60
    while not out.exists() and time.monotonic() < until:
        # the folder may get its last name between two looks
        with contextlib.suppress(FileNotFoundError):
            if len(files_kept(partial)) >= n_files:
                break
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.slow
def test_an_import_killed_at_ten_moments_ends_as_an_undisturbed_one(small_files, tmp_path):
    cfg = dataclasses.replace(TINY, n_layers=12, vocab_size=2000)
    folder = write_nemo(tmp_path / "nemo", weights_of(cfg), cfg, 2)
    wanted = bytes_in(convert(folder, tmp_path / "undisturbed"))
    dice = random.Random(0)
    for i in range(10):
        out = tmp_path / f"killed {i}"
        partial = tmp_path / f"killed {i}.partial"
        import_and_die(folder, out, 5 * i, dice.uniform(0, 0.01))
        before = files_kept(partial)
        assert len(before) >= 5 * i or out.exists()
        times = {file: (partial / file).stat().st_mtime_ns for file in before}
        if not out.exists():
            convert(folder, out)
            assert all((out / f).stat().st_mtime_ns == t for f, t in times.items())
        (out / "finished.json").unlink(missing_ok=True)  # a kill may come just before that
        assert bytes_in(out) == wanted


def test_an_import_leaves_nothing_behind_of_one_that_was_killed(small_files, tmp_path):
    folder = write_nemo(tmp_path / "nemo", weights_of(TINY), TINY, 2)
    wanted = bytes_in(convert(folder, tmp_path / "undisturbed"))
    (tmp_path / "hf.partial").mkdir()
    (tmp_path / "hf.partial" / "finished.json.host-7.tmp").write_text("{")
    assert bytes_in(convert(folder, tmp_path / "hf")) == wanted


def test_a_kept_file_that_was_damaged_is_written_again(small_files, tmp_path, monkeypatch):
    folder = write_nemo(tmp_path / "nemo", weights_of(TINY), TINY, 2)
    wanted = bytes_in(convert(folder, tmp_path / "undisturbed"))
    with monkeypatch.context() as patch:
        patch.setattr(nemo, "hf_config", lambda cfg: 1 / 0)  # after all the weights
        with pytest.raises(ZeroDivisionError):
            convert(folder, tmp_path / "hf")
    damaged, lost, *others = sorted((tmp_path / "hf.partial").glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    lost.unlink()
    times = {file.name: file.stat().st_mtime_ns for file in others}
    assert bytes_in(convert(folder, tmp_path / "hf")) == wanted
    assert all((tmp_path / "hf" / f).stat().st_mtime_ns == t for f, t in times.items())


def test_what_another_import_left_is_not_gone_on_with(small_files, tmp_path, monkeypatch):
    one = write_nemo(tmp_path / "one", weights_of(TINY), TINY, 2)
    two = write_nemo(tmp_path / "two", weights_of(TINY, seed=1), TINY, 2)
    with monkeypatch.context() as patch:
        patch.setattr(nemo, "hf_config", lambda cfg: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(one, tmp_path / "hf")
    with pytest.raises(ValueError, match="hf.partial is of .*one.*: remove it"):
        convert(two, tmp_path / "hf")


def test_a_folder_that_holds_something_is_not_written_into(tmp_path):
    folder = write_nemo(tmp_path / "nemo", weights_of(TINY), TINY, 2)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="hf is there, and no empty folder"):
        convert(folder, tmp_path / "hf")


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    folder = write_nemo(tmp_path / "nemo", weights_of(TINY), TINY, 2)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(nemo, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"\d bytes to write, 1,000 bytes free"):
        convert(folder, tmp_path / "hf")
    assert not [*(tmp_path / "hf.partial").glob("*.safetensors")]


# ---- the 340B ------------------------------------------------------------------------------------

ARRAYS_340B = {  # shape, chunk
    "embedding.word_embeddings.weight": ([256000, 18432], [32000, 18432]),
    "output_layer.weight": ([256000, 18432], [32000, 18432]),
    "decoder.layers.self_attention.linear_qkv.weight": ([96, 21504, 18432], [1, 2688, 18432]),
    "decoder.layers.self_attention.linear_proj.weight": ([96, 18432, 18432], [1, 18432, 2304]),
    "decoder.layers.mlp.linear_fc1.weight": ([96, 73728, 18432], [1, 9216, 18432]),
    "decoder.layers.mlp.linear_fc2.weight": ([96, 18432, 73728], [1, 18432, 9216]),
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": ([96, 18432], [1, 18432]),
    "decoder.layers.self_attention.linear_qkv.layer_norm_bias": ([96, 18432], [1, 18432]),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": ([96, 18432], [1, 18432]),
    "decoder.layers.mlp.linear_fc1.layer_norm_bias": ([96, 18432], [1, 18432]),
    "decoder.final_layernorm.weight": ([18432], [18432]),
    "decoder.final_layernorm.bias": ([18432], [18432]),
}
HEAD_340B = {"rm_head.weight": ([9, 18432], [9, 2304]), "rm_head.bias": ([9], [9])}


def write_sparse(folder, arrays, cfg):
    """The 340B's folder, whose chunks are holes: they read as zeros and take no disk."""
    for name, (shape, chunk) in arrays.items():
        at = folder / "model_weights" / f"model.{name}"
        at.mkdir(parents=True)
        about = {"chunks": chunk, "shape": shape, "dtype": "bfloat16", "order": "C"}
        about |= {"compressor": None, "fill_value": None, "filters": None, "zarr_format": 2}
        (at / ".zarray").write_text(json.dumps(about, indent=4, sort_keys=True))
        for place in np.ndindex(*[-(-n // c) for n, c in zip(shape, chunk, strict=True)]):
            with (at / ".".join(map(str, place))).open("wb") as file:
                file.truncate(2 * int(np.prod(chunk)))
    given = settings_of(cfg, 8, vocab_size=cfg.vocab_size) | {"kv_channels": None}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(given))
    return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    yield write_sparse(folder, ARRAYS_340B, SHAPES["nemotron4-340b"])
    shutil.rmtree(folder)


def test_the_340b_has_its_published_sizes(tmp_path):
    sizes = {name: int(np.prod(shape)) for name, (shape, _) in ARRAYS_340B.items()}
    assert sum(sizes.values()) == 341_029_195_776 == sum(count_params(SHAPES["nemotron4-340b"]))
    assert 2 * sum(sizes.values()) == 682_058_391_552
    assert sum(int(np.prod(shape)) for shape, _ in HEAD_340B.values()) == 165_897


def test_a_dry_run_plans_the_340b_and_writes_nothing(sparse, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(nemo.log, "propagate", True)
    with caplog.at_level("INFO", "nemotron4"):
        convert(sparse, tmp_path / "hf", dry_run=True)
    assert "341,029,195,776 parameters, 682,058,391,552 bytes in 1" in caplog.text
    for name, (shape, chunk) in ARRAYS_340B.items():
        n = int(np.prod([-(-s // c) for s, c in zip(shape, chunk, strict=True)]))
        assert f"model.{name}: torch.bfloat16 {shape} in {n} chunks" in caplog.text
    assert "model-00001-of-" in caplog.text
    assert not [*tmp_path.iterdir()]
    cfg, tensors, _ = nemo.open_nemo(sparse)
    assert cfg == SHAPES["nemotron4-340b"]
    arrays = {rows.array.name: rows.array for rows in tensors.values()}
    assert sum(len(array.data) for array in arrays.values()) == 3474


def peak_memory():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def peak_growth(work):
    """Run some work in a fork; return by how many bytes its memory grew at most."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
            before = peak_memory()
            work()
            os.write(write, str(peak_memory() - before).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as file:
        return int(file.read())


def test_a_matrix_of_the_340b_is_read_within_a_memory_bound(sparse):
    _, tensors, _ = nemo.open_nemo(sparse)

    def read():
        for name in ("blocks.7.attn.wk.weight", "blocks.7.attn.wv.weight"):
            for block in tensors[name].blocks():
                assert not block.any()

    assert peak_growth(read) < 100e6


@pytest.mark.slow
def test_a_layer_of_the_340b_is_imported_within_a_memory_bound(sparse):
    _, tensors, _ = nemo.open_nemo(sparse)
    layer = {name: rows for name, rows in tensors.items() if name.startswith("blocks.95.")}
    assert sum(rows.nbytes for rows in layer.values()) == 2 * 3_454_083_072
    growth = peak_growth(lambda: nemo.write_tensors(Path(os.devnull), layer, lambda n: None))
    assert growth < 200e6, f"{growth:,} bytes"


# ---- the command line ----------------------------------------------------------------------------


def test_the_commands_are_import_and_export(tmp_path, monkeypatch, capsys):
    folder = write_nemo(tmp_path / "nemo", weights_of(TINY), TINY, 2)
    monkeypatch.setattr(os, "_exit", sys.exit)
    for name in ("handlers", "level", "propagate"):
        monkeypatch.setattr(nemo.log, name, getattr(nemo.log, name))
    commands = {
        f"import {folder} {tmp_path}/hf": "bytes in 1 files",
        f"export {tmp_path}/hf {tmp_path}/back --tp 2": "parameters",
        f"import {tmp_path}/back {tmp_path}/again": "parameters",
    }
    for command, said in commands.items():
        monkeypatch.setattr(sys, "argv", ["nemo.py", *command.split()])
        nemo.main()
        assert said in capsys.readouterr().out
    assert bytes_in(tmp_path / "again") == bytes_in(tmp_path / "hf")
    monkeypatch.setattr(sys, "argv", ["nemo.py", "import", "nowhere", "hf"])
    with pytest.raises(SystemExit) as ended:
        nemo.main()
    assert ended.value.code == 2 and "'nowhere'" in capsys.readouterr().err


# ---- folders in float8 ---------------------------------------------------------------------------


def write_float8(folder, shape=()):
    """A folder whose projections are float8 with a scale each, as vLLM's tools write them; return
    what they stand for."""
    folder.mkdir()
    tensors, wanted = {}, {}
    for name, weight in weights_of(TINY).items():
        tensors[name] = weight
        wanted[name] = weight.float()
        if name.endswith("_proj.weight"):
            scale = weight.float().abs().max() / 448
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = scale.expand(shape).clone()
            tensors[name.replace("weight", "input_scale")] = torch.ones(())
            wanted[name] = tensors[name].float() * scale
    save_file(tensors, folder / "model.safetensors")
    how = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    config = hf_config(TINY) | {"quantization_config": how}
    (folder / "config.json").write_text(json.dumps(config))
    return wanted


@pytest.mark.parametrize("shape", [(), (1,)])
def test_float8_matrices_are_read_times_their_scales(shape, tmp_path):
    wanted = write_float8(tmp_path / "f8", shape)
    whole = parallel.load_hf(f"nemo:{tmp_path / 'f8'}", torch.float32)
    for name, p in whole.named_parameters():
        assert torch.equal(p, wanted[hf_name(name, TINY)]), name
    found = tensors_in(convert(tmp_path / "f8", tmp_path / "hf"))
    assert all(torch.equal(found[name], p.to(BF16)) for name, p in wanted.items())
    assert parallel.load_hf(tmp_path / "hf").embed.weight.dtype == BF16


def float8_products(folder, tp):
    """What each matrix of the blocks stands for in an engine that keeps them in float8."""
    mesh = generate.Layout(tp=tp)
    engine = load_engine(EngineConfig(folder, dtype="fp32", quantize="float8", slots=2, mesh=mesh))
    found = {}
    for name, module in engine.model.named_modules():
        if isinstance(module, generate.InferenceLinear) and module.scale is not None:
            found[name] = (module.weight.float() * module.scale[:, None]).numpy()
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_an_engine_in_float8_keeps_the_numbers_of_a_float8_folder(on_ranks, words, tmp_path, tp):
    wanted = write_float8(tmp_path / "f8")
    (tmp_path / "f8" / "tokenizer.json").write_bytes(words)
    for rank, found in enumerate(on_ranks(tp, float8_products, f"nemo:{tmp_path / 'f8'}", tp)):
        assert len(found) == 6 * TINY.n_layers
        for name, matrix in found.items():
            weight = wanted[hf_name(f"{name}.weight", TINY)].numpy()
            dim = next((d for d in (0, 1) if matrix.shape[d] < weight.shape[d]), 0)
            part = np.array_split(weight, weight.shape[dim] // matrix.shape[dim], dim)[rank % tp]
            assert np.allclose(matrix, part, rtol=1e-6, atol=0), name


NAME = "model.layers.0.self_attn.q_proj.weight"
REFUSED = {
    "F8_E4M3 with 64 scales": lambda t: {f"{NAME}_scale": torch.ones(64, 1)},
    "F8_E4M3 with 0 scales": lambda t: {f"{NAME}_scale": None},
    "BF16 with 1 scales": lambda t: {NAME: t[NAME].bfloat16()},
    "F8_E5M2 with 1 scales": lambda t: {NAME: t[NAME].float().to(torch.float8_e5m2)},
    "weight_scale_inv .*none of the model|weight_scale_inv is F32": lambda t: {
        f"{NAME}_scale_inv": torch.ones(1, 1)
    },
    "q_proj.weight is missing": lambda t: {NAME: t[NAME][:8]},
}


@pytest.mark.parametrize("says", REFUSED)
def test_other_float8_forms_are_refused(says, tmp_path):
    write_float8(tmp_path / "f8")
    file = tmp_path / "f8" / "model.safetensors"
    tensors = load_file(file)
    changed = tensors | REFUSED[says](tensors)
    save_file({name: t for name, t in changed.items() if t is not None}, file)
    with pytest.raises(ValueError, match=says):
        parallel.load_hf(f"nemo:{tmp_path / 'f8'}")


# ---- straight into a runner ----------------------------------------------------------------------


def shards_of(mesh, folders):
    """The parameters that this rank holds after loading each folder."""
    found = []
    for folder in folders:
        runner = Runner(TINY, mesh, init_mesh(mesh), 1, seed=1)
        runner.load_weights(folder)
        found.append({n: local_part(p)[0].detach().numpy() for n, p in runner.params().items()})
    return found


MESHES = [
    (1, {}),
    pytest.param(3, {}, marks=pytest.mark.slow),
    pytest.param(8, {"tp": 2, "pp": 2}, marks=pytest.mark.slow),
    (4, {"tp": 2, "pp": 2}),
]


@pytest.mark.parametrize("n, axes", MESHES)
def test_a_rank_reads_its_part_of_a_nemo_folder_as_of_what_it_is_converted_to(
    on_ranks, tmp_path, n, axes
):
    folder = write_nemo(tmp_path / "nemo", weights_of(TINY), TINY, 2)
    folders = (f"nemo:{folder}", str(convert(folder, tmp_path / "hf")))
    for straight, converted in on_ranks(n, shards_of, MeshConfig(dtype="fp32", **axes), folders):
        assert straight.keys() == converted.keys() and len(straight) > 10
        assert all(np.array_equal(straight[name], converted[name]) for name in straight)


def test_an_engine_answers_from_a_nemo_folder_as_from_what_it_is_converted_to(words, tmp_path):
    folder = write_nemo(tmp_path / "nemo", weights_of(TINY), TINY)
    convert(folder, tmp_path / "hf")
    answers = []
    for model in (f"nemo:{folder}", tmp_path / "hf"):
        (Path(str(model).removeprefix("nemo:")) / "tokenizer.json").write_bytes(words)
        cfg = EngineConfig(Path(model), dtype="fp32", slots=2)
        engine = load_engine(cfg)
        answers.append(engine.generate([[1, 2, 3]], SamplingParams(max_tokens=8, temperature=0)))
        dist.destroy_process_group()
    assert answers[0][0].ids == answers[1][0].ids


def test_the_synthesis_takes_a_nemo_folder_as_a_model_and_knows_it_by_its_weights(words, tmp_path):
    names = []
    for seed in (0, 1):
        folder = write_nemo(tmp_path / f"nemo{seed}" / "same", weights_of(TINY, seed), TINY)
        (folder / "tokenizer.json").write_bytes(words)
        backend = load_backend(EngineConfig(Path("x")), f"nemo:{folder}", rates=False)
        dist.destroy_process_group()
        work = [([{"role": "user", "content": "words"}], dict(max_tokens=4, temperature=0.0))]
        (reply,) = backend.answers(work)
        assert reply is not None
        names.append(backend.name)
    assert names[0] != names[1] and all(name.startswith("same@") for name in names)
