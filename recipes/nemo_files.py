"""Read what NVIDIA's checkpoints hold, in place: arrays of two forms, settings and a tokenizer.

    python -m recipes.nemo import Nemotron-4-340B-Base out/hf --dry-run

`find_arrays(list_files(folder))` is a dict, the name of an array → a function that describes it; an
Array then reads any rectangle, and only the bytes of the chunks that it meets. Nothing else of a
checkpoint is opened: common.pt, the extra states and the optimizer's states stay closed.
"""

import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from math import ceil, prod
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from numpy.lib.stride_tricks import as_strided
from safetensors import safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from data import load_tokenizer
from model import ModelConfig

# zarr's words for the dtypes that are read; bfloat16 is tensorstore's addition, the rest is numpy's
ZARR_DTYPES = {"bfloat16": torch.bfloat16, "<f2": torch.float16, "<f4": torch.float32}
Files = dict[str, "Span"]
BLOCK = 1 << 22  # bytes that are read at a time


# ---- bytes: of a folder's files, or of a tar's members -------------------------------------------


class Span(io.RawIOBase):
    """Reads a range of bytes of one file, or of several that follow each other, as a file."""

    def __init__(self, parts: dict[Path, int], start: int, size: int) -> None:
        self.parts = parts  # with their sizes
        self.start = start
        self.size = size
        self.at = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the range goes; return the number of bytes."""
        view = memoryview(buffer)[: max(0, self.size - self.at)]
        position = self.start + self.at
        done = 0
        for path, size in self.parts.items():
            if position < size and done < len(view):
                with path.open("rb", buffering=0) as file:
                    file.seek(position)
                    done += file.readinto(view[done : done + size - position])
                position = size
            position -= size
        self.at += done
        return done

    def part(self, offset: int, size: int) -> "Span":
        return Span(self.parts, self.start + offset, size)

    def all(self) -> bytes:
        self.seek(0)
        return self.read()


def list_files(folder: Path, parts: tuple[Path, ...] = ()) -> Files:
    """Map the name of each file of a folder, or of an uncompressed tar in parts, to its bytes."""
    files = {}
    if folder.is_dir():
        for path in filter(Path.is_file, folder.rglob("*")):
            size = path.stat().st_size
            files[path.relative_to(folder).as_posix()] = Span({path: size}, 0, size)
        return files
    sizes = {path: path.stat().st_size for path in (folder, *parts)}
    whole = Span(sizes, 0, sum(sizes.values()))
    try:
        with tarfile.open(fileobj=whole, mode="r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                span = whole.part(member.offset_data, member.size)
                files[member.name.removeprefix("./")] = span
    except tarfile.TarError as e:
        todo = "unzip it, or give its other parts in order with --parts"
        raise ValueError(f"{folder}: no whole, uncompressed tar ({e}): {todo}") from None
    return files


# ---- arrays: rectangles of chunks ----------------------------------------------------------------


@dataclass(frozen=True)
class Array:
    """Reads rectangles of an array that is cut into chunks, which are rectangles too."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: np.ndarray  # begin, size and stride of each chunk: (n, 3, dimensions)
    data: list[Span]  # from each chunk's first element on

    def read(self, index: Sequence[slice]) -> Tensor:
        """Return a rectangle. Of each chunk that it meets, only the bytes from the first to the
        last element in it are read."""
        begin, end = np.array([(s.start, s.stop) for s in index]).T
        # numpy copies: torch would start threads for each small piece, and wait for them
        raw = np.dtype(f"i{self.dtype.itemsize}")
        out = np.empty(end - begin, raw)
        start, size, stride = self.boxes.swapaxes(0, 1)
        low = np.maximum(begin - start, 0)
        high = np.minimum(end - start, size)
        for i in np.flatnonzero((low < high).all(1)):
            first = low[i] @ stride[i]
            data = np.empty((high[i] - 1) @ stride[i] + 1 - first, raw)
            self.data[i].seek(first * data.itemsize)
            if self.data[i].readinto(data.view(np.uint8)) < data.nbytes:
                file = [*self.data[i].parts][0]
                raise ValueError(f"{file} became shorter while {self.name} was read: fetch it")
            part = as_strided(data, high[i] - low[i], stride[i] * data.itemsize)
            if part.shape == out.shape:
                out = part
            else:
                at = low[i] + start[i] - begin
                out[tuple(map(slice, at, at + part.shape))] = part
        return torch.from_numpy(out).view(self.dtype)


def float8_slices(folder: Path) -> dict[str, tuple[Any, Tensor | None]]:
    """Open the tensors of a Hugging Face folder, of which matrices may be in float8 with a scale
    each, as vLLM's tools write them: lazy slices, with the scales of those."""
    lazy = {}
    scales = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                # an input_scale is for states in float8, with which nothing is computed here
                if name.endswith((".weight_scale", ".input_scale")):
                    scales[name] = file.get_tensor(name).float()
                else:
                    lazy[name] = file.get_slice(name)
    found = {}
    for name, tensor in lazy.items():
        scale = scales.get(f"{name}_scale")
        kind = tensor.get_dtype()
        n_scales = 0 if scale is None else scale.numel()
        if (kind, n_scales) not in (("F8_E4M3", 1), ("BF16", 0), ("F16", 0), ("F32", 0)):
            rule = "E4M3 with one scale, BF16, F16 or F32 without any is read"
            raise ValueError(f"{folder}: {name} is {kind} with {n_scales} scales: {rule}")
        found[name] = (tensor, scale)
    return found


def zarr_array(files: Files, name: str) -> Array:
    """Describe an array in zarr's second format, whose chunks are raw and little-endian."""
    where = f"{name}/.zarray"
    rules = {"zarr_format": [2], "compressor": [None], "filters": [None], "order": ["C"]}
    rules["dtype"] = [*ZARR_DTYPES]
    try:
        given = json.loads(files[where].all())
        found = {key: given[key] for key in rules}
        shape = tuple(map(int, given["shape"]))
        chunk = tuple(map(int, given["chunks"]))
        counts = [ceil(n / size) for n, size in zip(shape, chunk, strict=True)]
        places = [*np.ndindex(*counts)]
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as e:
        raise ValueError(f"{where} describes no array ({e!r}): fetch it again") from None
    for key, rule in rules.items():
        if found[key] not in rule:
            raise ValueError(f"{where}: {key} is {found[key]!r}: only {rule} can be read")
    dtype = ZARR_DTYPES[found["dtype"]]
    wanted = prod(chunk) * dtype.itemsize  # those at the edge too are stored whole
    data = []
    for which in places:
        file = f"{name}/{given.get('dimension_separator', '.').join(map(str, which))}"
        size = files[file].size if file in files else "no"
        if size != wanted:
            raise ValueError(f"{file} has {size} bytes, a whole chunk {wanted}: fetch it again")
        data.append(files[file])
    stride = torch.empty(chunk, device="meta").stride()
    boxes = np.broadcast_arrays(np.array(places) * chunk, chunk, stride)
    short = PurePosixPath(name).name
    return Array(short, shape, dtype, np.stack(boxes, 1), data)


# ---- the torch_dist form -------------------------------------------------------------------------


class Record:
    """Stands for every object of a pickle: it keeps the fields, and does nothing."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, dict) else {})


class Unpickler(pickle.Unpickler):
    """Reads the list of a checkpoint's arrays, a pickle, and runs no code that it names: but for
    shapes and dtypes a known class becomes a Record, and what is not known is refused."""

    KNOWN = ("torch.distributed.", "megatron.", "nemo.", "pathlib.")
    KNOWN += ("torch.serialization._get_layout", "collections.OrderedDict")

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if found is torch.Size or isinstance(found, torch.dtype):
            return found
        if not f"{module}.{name}".startswith(self.KNOWN):
            raise ValueError(f"it asks for {module}.{name}, which no list of arrays needs")
        return Record


def torch_dist_array(files: Files, where: str, listed: Any, name: str) -> Array:
    """Describe an array of torch_dist form. A chunk is a tensor as torch.save writes it, of which
    torch tells the offset of the first byte; no other is read."""
    entry = listed.state_dict_metadata[name]
    stored = {key.offset: at for key, at in listed.storage_data.items() if key.fqn == name}
    boxes = []
    data = []
    dtypes = set()
    for chunk in entry.chunks:
        try:
            at = stored[chunk.offsets]
            file = files[str(PurePosixPath(where).with_name(at.relative_path))]
            saved = file.part(at.offset, min(at.length, file.size - at.offset))
            with FakeTensorMode():
                tensor = torch.load(saved, weights_only=True).view(chunk.sizes)
            first = tensor.untyped_storage()._checkpoint_offset
        except Exception as e:  # torch.load has no end of errors
            what = f"{name} from {[*chunk.offsets]} on cannot be read"
            raise ValueError(f"{where}: {what} ({e!r}): fetch it again") from None
        first += tensor.storage_offset() * tensor.itemsize
        data.append(saved.part(first, saved.size - first))
        boxes.append((chunk.offsets, chunk.sizes, tensor.stride()))
        dtypes.add(tensor.dtype)
    covered = sum(prod(chunk.sizes) for chunk in entry.chunks) == prod(entry.size)
    if not covered or len(dtypes) != 1 or not dtypes <= {*ZARR_DTYPES.values()}:
        rule = f"chunks of one of {[*ZARR_DTYPES.values()]} that cover it"
        raise ValueError(f"{where}: {name} {[*entry.size]} is {dtypes}: it needs {rule}")
    return Array(name, tuple(entry.size), dtypes.pop(), np.array(boxes), data)


def find_arrays(files: Files) -> dict[str, Callable[[], Array]]:
    """Map the name of each array of a checkpoint to the function that describes it."""
    zarr = [name.removesuffix("/.zarray") for name in files if name.endswith("/.zarray")]
    if zarr:
        return {PurePosixPath(name).name: partial(zarr_array, files, name) for name in zarr}
    lists = [name for name in files if PurePosixPath(name).name == ".metadata"]
    if len(lists) != 1:
        old = "files of single ranks (.ckpt) need NeMo's own convert_gpt_nemo_to_mcore.py first"
        raise ValueError(f"{len(lists)} checkpoints of zarr or torch_dist form: give one; {old}")
    try:
        listed = Unpickler(files[lists[0]]).load()
        entries = listed.state_dict_metadata.items()
        names = [name for name, entry in entries if hasattr(entry, "chunks")]
    except Exception as e:  # there is no end to what a stranger's file may hold
        raise ValueError(f"{lists[0]} lists no arrays: {e}") from None
    return {name: partial(torch_dist_array, files, lists[0], listed, name) for name in names}


# ---- settings and tokenizer ----------------------------------------------------------------------

# fmt: off
SIZES = {  # ours, in NeMo's words
    "dim": "hidden_size", "n_layers": "num_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_query_groups", "head_dim": "kv_channels", "ffn_dim": "ffn_hidden_size",
    "vocab_size": "vocab_size", "seq_len": "encoder_seq_length", "init_std": "init_method_std",
    "norm_eps": "layernorm_epsilon", "rope_base": "rotary_base",
    "rope_fraction": "rotary_percentage",
}
ALIASES = {  # the words of NeMo 2 and Megatron-Bridge
    "seq_length": "encoder_seq_length", "rotary_percent": "rotary_percentage",
    "add_bias_linear": "bias", "activation_func": "activation",
}
FIXED = {  # what holds for every Nemotron
    "normalization": "layernorm1p", "activation": "squared-relu", "bias": False,
    "position_embedding_type": "rope", "share_embeddings_and_output_weights": False,
}
ABSENT = (  # or false, or null
    "num_moe_experts", "gated_linear_unit", "add_qkv_bias", "qk_layernorm", "rotary_interleaved",
    "seq_len_interpolation_factor", "window_size",
)
# fmt: on


def read_settings(files: Files) -> tuple[str, dict[str, Any]]:
    """Return the file of the model's settings, and these in NeMo 1's words; refuse a model of
    another kind."""
    names = ("model_config.yaml", "model.yaml", "run_config.yaml")
    where = next((name for name in files if PurePosixPath(name).name in names), "")
    if not where:
        raise ValueError(f"none of {names} is there: what is the model's shape?")
    try:
        top = yaml.safe_load(files[where].all())
        given = next(
            s for s in (top, top.get("config"), top.get("model")) if "num_layers" in (s or ())
        )
        given |= {key: given[alias] for alias, key in ALIASES.items() if alias in given}
        if given.get("layernorm_zero_centered_gamma") and given["normalization"] == "LayerNorm":
            given["normalization"] = "layernorm1p"
        word = given.get("activation")
        word = word["_target_"] if isinstance(word, dict) else str(word)  # a function's place
        given["activation"] = word.rpartition(".")[2].replace("_", "-")
    except Exception as e:  # there is no end to what a stranger's file may hold
        raise ValueError(f"{where} describes no model: {e!r}") from None
    for key, value in FIXED.items():
        if given.get(key) != value:
            raise ValueError(f"{where}: {key} is {given.get(key)!r}: only {value!r} is built")
    for key in ABSENT:
        if given.get(key):
            raise ValueError(f"{where}: {key} is {given[key]!r}: no model with it is built")
    return where, given


def read_shape(settings: dict[str, Any], n_attributes: int) -> ModelConfig:
    """Make the model's shape of its settings."""
    kinds: dict[str, Any] = {field.name: field.type for field in fields(ModelConfig)}
    given = {"rotary_percentage": 1.0} | settings
    sizes = {ours: kinds[ours](given[key]) for ours, key in SIZES.items() if given.get(key)}
    sizes.setdefault("n_kv_heads", sizes["n_heads"])
    sizes.setdefault("head_dim", sizes["dim"] // sizes["n_heads"])
    return ModelConfig(**sizes, n_attributes=n_attributes)


def find_tokenizer(files: Files, settings: dict[str, Any]) -> tuple[str, bytes, int]:
    """Return the tokenizer's file: its name in other folders, its bytes and its number of ids."""
    found = [name for name in sorted(files) if name.endswith((".model", "tokenizer.json"))]
    named = [name for name in found if name in str(settings.get("tokenizer"))]
    for name in named + found:
        with TemporaryDirectory() as folder:
            path = Path(folder, "tokenizer" + PurePosixPath(name).suffix)
            path.write_bytes(files[name].all())
            try:
                return path.name, path.read_bytes(), load_tokenizer(path).vocab_size
            except ValueError:  # it names the copy
                raise ValueError(f"{name} is no tokenizer: fetch it again") from None
    return "", b"", 0


# ---- our tensors in the arrays -------------------------------------------------------------------

# fmt: off
QKV = "decoder.layers.self_attention.linear_qkv."
ARRAYS = {  # our modules, and how their arrays' names begin; what is of the layers is stacked
    "embed": "embedding.word_embeddings.", "head": "output_layer.",
    "attn_norm": QKV + "layer_norm_", "attn.wq": QKV, "attn.wk": QKV, "attn.wv": QKV,
    "attn.wo": "decoder.layers.self_attention.linear_proj.",
    "mlp_norm": "decoder.layers.mlp.linear_fc1.layer_norm_",
    "mlp.up": "decoder.layers.mlp.linear_fc1.", "mlp.down": "decoder.layers.mlp.linear_fc2.",
    "norm": "decoder.final_layernorm.",
}
# fmt: on


def place(name: str, rows: int, cfg: ModelConfig) -> tuple[str, list[int], list[int]]:
    """Tell where one of our tensors is: its array, its layer there, and which rows of that: runs
    of some length, one every so many rows, from some row on."""
    path, _, kind = name.rpartition(".")
    layer = []
    if path.startswith("blocks."):
        _, number, path = path.split(".", 2)
        layer = [int(number)]
    if path == "head" and cfg.n_attributes:
        return f"rm_head.{kind}", layer, [rows, rows, 0]
    # the queries of a key-value head, its key and its value stand together
    q = cfg.n_heads // cfg.n_kv_heads
    turns = {"attn.wq": (q, q + 2, 0), "attn.wk": (1, q + 2, q), "attn.wv": (1, q + 2, q + 1)}
    runs = [cfg.head_dim * heads for heads in turns.get(path, ())]
    return ARRAYS[path] + kind, layer, runs or [rows, rows, 0]


@dataclass(frozen=True)
class Rows:
    """Reads one of our tensors from its array, sliced as a tensor is."""

    array: Any  # an Array, or what reads as one
    shape: torch.Size
    layer: list[int]
    runs: list[int]

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        rows, *rest = index
        length, period, first = self.runs
        lead = [slice(i, i + 1) for i in self.layer]
        found = []
        row = rows.start
        while row < rows.stop:
            turn, inside = divmod(row, length)
            n = min(length - inside, rows.stop - row)
            start = turn * period + first + inside
            found.append(self.array.read([*lead, slice(start, start + n), *rest]))
            row += n
        whole = found[0] if len(found) == 1 else torch.cat(found, len(lead))
        return whole.flatten(0, len(lead))

    __call__ = __getitem__  # as parallel.py reads

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.array.dtype.itemsize

    def on_meta(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.array.dtype, device="meta")

    def blocks(self) -> Iterator[Tensor]:
        """Yield the tensor in blocks of rows, which bounds the memory."""
        rest = [slice(0, n) for n in self.shape[1:]]
        step = max(1, BLOCK // (self.nbytes // self.shape[0]))
        for row in range(0, self.shape[0], step):
            block = self[slice(row, min(row + step, self.shape[0])), *rest]
            yield block.to(self.array.dtype)
