"""Convert NVIDIA's own checkpoints, NeMo folders and .nemo files, to Hugging Face folders and back.

    python -m recipes.nemo import Nemotron-4-340B-Base out/hf --dry-run
    python -m recipes.nemo import reward.nemo.part-aa out/hf --parts reward.nemo.part-a[b-z]
    python -m recipes.nemo export runs/nano out/nemo --tp 4

It reads zarr and torch_dist forms, folders in place and archives without unpacking them, and needs
none of NeMo, Megatron, zarr and tensorstore. A checkpoint becomes a dict, our name of a tensor →
Rows, which reads the rows and columns that it is asked for.
"""

import json
import logging
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from math import ceil
from pathlib import Path
from shutil import copyfile, disk_usage
from typing import Any

import torch
import torch.nn.functional as F
import tyro
import yaml
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module
from tqdm import tqdm

import parallel
from data import hold, write_whole
from model import ModelConfig, hf_config, hf_name
from recipes.nemo_files import (
    ARRAYS,
    FIXED,
    SIZES,
    ZARR_DTYPES,
    Rows,
    find_arrays,
    find_tokenizer,
    float8_slices,
    list_files,
    place,
    read_settings,
    read_shape,
)

log = logging.getLogger("nemotron4")
FILE_BYTES = 5 << 30  # of a safetensors file, at most
PADDED_TO = 128  # rows of an embedding on a tensor-parallel rank: a multiple of it
ST_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


# ---- the model in the arrays ---------------------------------------------------------------------


def check_shape(what: str, rows: Rows, settings: dict[str, Any]) -> None:
    """Raise ValueError unless an array has the model's shape, or has more rows of the vocabulary,
    with which an embedding is padded."""
    length, period, _ = rows.runs
    found = [*rows.array.shape]
    wanted = [rows.shape[0] // length * period, *rows.shape[1:]]
    rule = "by its settings"
    pad = 1
    if rows.layer:
        wanted.insert(0, settings["num_layers"])
    if period > length:
        rule = "groups × (queries of a group + 2) × head_dim rows"
    if what.endswith((ARRAYS["embed"] + "weight", ARRAYS["head"] + "weight")):
        tp = max(settings.get("tensor_model_parallel_size") or 1, len(rows.array.data))
        pad = tp * (settings.get("make_vocab_size_divisible_by") or PADDED_TO)
        rule = f"rows of the tokenizer, padded to a multiple of {pad}"
    if [0, *found[1:]] != [0, *wanted[1:]] or not 0 <= found[0] - wanted[0] < pad:
        raise ValueError(f"{what} is {found}, not {wanted}: {rule}")


def vocabulary(folder: Path, asked: int | None, n_ids: int) -> int:
    """Return the number of the embeddings' rows that mean something: that which is asked for, or
    the tokenizer's, which must fit."""
    size = asked or n_ids
    if not size or n_ids > size:
        has = f"a tokenizer of {n_ids} ids, a vocab_size of {asked}"
        raise ValueError(f"{folder} has {has}: set --vocab-size to the embeddings' real rows")
    return size


@dataclass(frozen=True)
class Float8:
    """Reads rectangles of a tensor, as Array does: a matrix in float8 times its scale, in fp32."""

    name: str
    shape: torch.Size
    lazy: Any
    scale: Tensor | None
    dtype = torch.bfloat16  # in which an import writes it
    data = (None,)  # of one chunk

    def read(self, index: Any) -> Tensor:
        part = self.lazy[tuple(index)]
        return part if self.scale is None else part.float() * self.scale


def open_float8(folder: Path) -> tuple[ModelConfig, dict[str, Rows]]:
    """Return the shape of the model in a Hugging Face folder whose matrices are in float8, and its
    tensors by our names."""
    cfg = parallel.read_config(folder)
    found = float8_slices(folder)
    tensors = {}
    for name, shape in parallel.full_shapes(cfg).items():
        theirs = hf_name(name, cfg)
        lazy, scale = found.pop(theirs, (None, None))
        if lazy is None or lazy.get_shape() != list(shape):
            raise ValueError(f"{folder}: {theirs} is missing, or not {list(shape)}: fetch it again")
        tensors[name] = Rows(Float8(theirs, shape, lazy, scale), shape, [], [shape[0], shape[0], 0])
    if found:
        raise ValueError(f"{folder}: {min(found)} is none of the model that config.json describes")
    return cfg, tensors


def open_nemo(
    folder: Path, parts: tuple[Path, ...] = (), vocab_size: int | None = None
) -> tuple[ModelConfig, dict[str, Rows], tuple[str, bytes, int]]:
    """Return the model's shape, its tensors by our names, of which none is read yet, and the file
    of the tokenizer. The arrays must be exactly those of the model."""
    files = list_files(folder, parts)
    if folder.is_dir() and any(folder.glob("*.safetensors")):
        return *open_float8(folder), find_tokenizer(files, {})
    found = find_arrays(files)
    where, settings = read_settings(files)
    tokenizer = find_tokenizer(files, settings)
    asked = vocab_size or settings.get("vocab_size")
    settings["vocab_size"] = vocabulary(folder, asked, tokenizer[2])
    embed = ARRAYS["embed"] + "weight"
    found = {name: make for name, make in found.items() if not name.startswith("optimizer.")}
    prefix = next((name.removesuffix(embed) for name in found if name.endswith(embed)), "")
    n_attributes = 0
    if prefix + "rm_head.weight" in found:
        n_attributes = found[prefix + "rm_head.weight"]().shape[0]
    try:
        cfg = read_shape(settings, n_attributes)
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{where} describes no model: {e!r}") from None
    arrays = {}
    tensors = {}
    for name, shape in parallel.full_shapes(cfg).items():
        array, layer, runs = place(name, shape[0], cfg)
        if prefix + array not in found:
            raise ValueError(f"{folder}: array {prefix}{array} is missing: fetch it again")
        if array not in arrays:
            arrays[array] = found[prefix + array]()
        tensors[name] = Rows(arrays[array], shape, layer, runs)
        check_shape(f"{folder}: array {prefix}{array}", tensors[name], settings)
    known = {prefix + array for array in (*arrays, ARRAYS["head"] + "weight")}
    unknown = sorted(name for name in found.keys() - known if "_extra_state" not in name)
    if unknown:
        raise ValueError(
            f"{folder}: array {unknown[0]} is none of the model that {where} describes"
        )
    return cfg, tensors, tokenizer


# ---- to a Hugging Face folder --------------------------------------------------------------------


@dataclass(frozen=True)
class ImportConfig:
    """Convert a NeMo checkpoint to a Hugging Face folder, which transformers and engines open.
    Started again after a kill, it keeps the files that are whole."""

    folder: tyro.conf.Positional[Path]  # NeMo folder, or uncompressed .nemo file.
    out: tyro.conf.Positional[Path]  # Folder to write.
    parts: tuple[Path, ...] = ()  # Further parts of a split .nemo file, in order.
    vocab_size: int | None = None  # Rows of the embeddings to keep; default: the tokenizer's size.
    dry_run: bool = False  # List of what would be read and written, and no more.


def ahead(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield what an iterator yields, while a thread makes the next one."""
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(next, blocks, None)
        while (block := waiting.result()) is not None:
            waiting = reader.submit(next, blocks, None)
            yield block


def checksum(file: Path) -> list[int]:
    """Return [size, CRC-32] of a file."""
    crc = 0
    with file.open("rb") as f:
        while piece := f.read(1 << 22):
            crc = zlib.crc32(piece, crc)
    return [file.stat().st_size, crc]


def write_tensors(path: Path, tensors: dict[str, Rows], told: Callable[[int], Any]) -> list[int]:
    """Write a safetensors file block by block; return its size and CRC-32."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, rows in tensors.items():
        begin = end
        end += rows.nbytes
        dtype = ST_DTYPES[rows.array.dtype]
        head[name] = {"dtype": dtype, "shape": rows.shape, "data_offsets": [begin, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    crc = zlib.crc32(text)
    with path.open("wb") as file:
        file.write(text)
        for block in ahead(chain.from_iterable(rows.blocks() for rows in tensors.values())):
            data = block.contiguous().view(torch.uint8).numpy()
            file.write(data)
            crc = zlib.crc32(data, crc)
            told(block.nbytes)
    return [len(text) + end, crc]


def write_weights(
    folder: Path, files: dict[str, list[str]], tensors: dict[str, Rows], source: str
) -> None:
    """Write the safetensors files of a folder, and a record of those that are finished, with their
    checksums: another start from the same source keeps them if they are still whole."""
    record = folder / "finished.json"
    done = json.loads(record.read_text()) if record.exists() else {"source": source}
    if done["source"] != source:
        raise ValueError(f"{folder} is of {done['source']}: remove it, or name another folder")
    needed = total = sum(rows.nbytes for rows in tensors.values())
    for file in done.keys() & files.keys():
        needed -= sum(tensors[name].nbytes for name in files[file])
    free = disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder}: {needed:,} bytes to write, {free:,} bytes free: make room")
    with tqdm(total=total, unit="B", unit_scale=True, mininterval=1) as bar:
        for file, names in files.items():
            path = folder / file
            wanted = {name: tensors[name] for name in names}
            if file in done and path.exists() and checksum(path) == done[file]:
                bar.update(sum(rows.nbytes for rows in wanted.values()))
            else:
                done[file] = write_tensors(path, wanted, bar.update)
                write_whole(record, json.dumps(done))


def import_nemo(c: ImportConfig) -> None:
    """Write the Hugging Face folder, the tokenizer beside it."""
    cfg, tensors, (tokenizer, text, _) = open_nemo(c.folder, c.parts, c.vocab_size)
    named = {hf_name(name, cfg): rows for name, rows in tensors.items()}
    dtype = tensors["embed.weight"].array.dtype
    empty = {name: rows.on_meta() for name, rows in named.items()}
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=FILE_BYTES)
    for array in {rows.array.name: rows.array for rows in named.values()}.values():
        log.info(f"{array.name}: {array.dtype} {[*array.shape]} in {len(array.data)} chunks")
    files = plan.filename_to_tensors
    size = f"{plan.metadata['total_size']:,} bytes in {len(files)} files"
    log.info(f"{sum(rows.shape.numel() for rows in named.values()):,} parameters, {size}")
    if c.dry_run:
        for file, names in files.items():
            log.info(f"{c.out / file}: {sum(named[name].nbytes for name in names):,} bytes")
        return
    if c.out.exists() and any(c.out.iterdir()):
        raise ValueError(f"{c.out} is there, and no empty folder: name another")
    folder = c.out.with_name(f"{c.out.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    hold(folder)
    for unfinished in folder.glob("*.tmp"):  # by a kill
        unfinished.unlink()
    source = " ".join(map(str, [c.folder.resolve(), *c.parts, cfg.vocab_size]))
    write_weights(folder, files, named, source)
    config = hf_config(cfg) | {"dtype": str(dtype).removeprefix("torch.")}
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    texts = {"config": config, "generation_config": ends, "model.safetensors.index": index}
    for name, content in texts.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2))
    if tokenizer:
        (folder / tokenizer).write_bytes(text)
    (folder / ".lock").unlink()
    folder.rename(c.out)
    (c.out / "finished.json").unlink()


# ---- to a NeMo folder ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportConfig:
    """Convert a Hugging Face folder or a run's newest checkpoint to a NeMo folder, in zarr form."""

    folder: tyro.conf.Positional[Path]  # Hugging Face folder, or folder of a run.
    out: tyro.conf.Positional[Path]  # Folder to write.
    tp: int = 8  # Tensor-parallel size: the number of chunks of a matrix.


def tp_cuts(cfg: ModelConfig, tp: DeviceMesh) -> dict[str, int]:
    """Map each parameter that tensor parallelism cuts to the dimension it is cut along. Every rank
    holds the others whole."""
    model = parallelize_module(parallel.on_meta(cfg), tp, parallel.tp_plan())
    placed = {name: p.placements[0] for name, p in model.named_parameters()}
    return {name: cut.dim for name, cut in placed.items() if cut.is_shard()}


def share(name: str, weight: Any, shape: torch.Size, dim: int, rank: int, ranks: int) -> Tensor:
    """Return a tensor-parallel rank's share of a weight along a dimension. Each rank has as many
    rows of an embedding, a multiple of PADDED_TO: those after the last are zero."""
    multiple = PADDED_TO if dim == 0 and name in ("embed.weight", "head.weight") else 1
    size = ceil(shape[dim] / (ranks * multiple)) * multiple
    begin = min(rank * size, shape[dim])
    end = min(begin + size, shape[dim])
    index = [slice(0, n) for n in shape]
    index[dim] = slice(begin, end)
    part = weight(tuple(index))
    return F.pad(part, [0, 0, 0, begin + size - end]) if end < begin + size else part


def write_chunk(folder: Path, which: list[int], counts: list[int], chunk: Tensor) -> None:
    """Write a chunk of an array in zarr form, and what the array is. `which` and `counts`: which
    chunk along each dimension, and of how many."""
    folder.mkdir(parents=True, exist_ok=True)
    data = chunk.contiguous().view(torch.uint8).numpy()
    (folder / ".".join(map(str, which))).write_bytes(data)
    shape = [n * length for n, length in zip(counts, chunk.shape, strict=True)]
    words = [word for word, dtype in ZARR_DTYPES.items() if dtype == chunk.dtype]
    about = {"chunks": chunk.shape, "shape": shape, "dtype": words[0], "order": "C"}
    about |= {"compressor": None, "fill_value": None, "filters": None, "zarr_format": 2}
    (folder / ".zarray").write_text(json.dumps(about, indent=4, sort_keys=True))


def write_settings(folder: Path, cfg: ModelConfig, c: ExportConfig) -> None:
    """Write what stands beside the arrays: the model's settings, the tokenizer, the form."""
    settings = {key: getattr(cfg, ours) for ours, key in SIZES.items()} | FIXED
    settings |= {"tensor_model_parallel_size": c.tp, "make_vocab_size_divisible_by": PADDED_TO}
    settings |= {"max_position_embeddings": cfg.seq_len, "precision": "bf16-mixed"}
    settings |= {"mcore_gpt": True, "megatron_amp_O2": True}
    for file in c.folder.glob("tokenizer.*"):
        copyfile(file, folder / file.name)
        kind = "sentencepiece" if file.suffix == ".model" else "huggingface"
        settings["tokenizer"] = {"library": kind, "model": f"nemo:{file.name}"}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(settings))
    form = {"sharded_backend": "zarr", "sharded_backend_version": 1}
    form |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "model_weights" / "metadata.json").write_text(json.dumps(form))
    torch.save({}, folder / "model_weights" / "common.pt")


def export_nemo(c: ExportConfig) -> None:
    """Write the NeMo folder as it would be saved at this tensor-parallel size. One chunk at a time
    is in memory, besides a run's weights."""
    cfg = replace(parallel.read_config(c.folder), lora_rank=0)
    for size in ("n_kv_heads", "dim", "ffn_dim"):
        if c.tp < 1 or getattr(cfg, size) % c.tp:
            raise ValueError(f"tp={c.tp} does not divide {size}={getattr(cfg, size)}")
    mesh = parallel.init_mesh(parallel.MeshConfig())
    cuts = tp_cuts(cfg, mesh["tp"])
    if cfg.n_attributes:
        cuts["head.weight"] = 1
    with parallel.new_folder(c.out) as folder:
        weights = parallel.open_weights(c.folder)
        of_a_run = (c.folder / "checkpoints").exists()  # in fp32
        stacks: dict[Any, list[str]] = {}
        shapes = parallel.full_shapes(cfg)
        for name, shape in shapes.items():
            array, layer, _ = place(name, shape[0], cfg)
            stacks.setdefault((array, *layer), []).append(name)
        for (array, *layer), names in tqdm(stacks.items(), unit=" arrays"):
            dim = cuts.get(names[0], 0)
            ranks = c.tp if names[0] in cuts else 1
            # the queries of a key-value head, its key and its value take turns
            turns = cfg.n_kv_heads // ranks if len(names) > 1 else 1
            for rank in range(ranks):
                shares = []
                for name in names:
                    part = share(name, weights[name], shapes[name], dim, rank, ranks)
                    shares.append(part.unflatten(0, (turns, -1)))
                chunk = torch.cat(shares, 1).flatten(0, 1)
                if of_a_run:
                    chunk = chunk.bfloat16()
                which = [*layer, *(rank * (d == dim) for d in range(chunk.ndim))]
                counts = [cfg.n_layers for _ in layer]
                counts += [ranks if d == dim else 1 for d in range(chunk.ndim)]
                at = folder / "model_weights" / f"model.{array}"
                write_chunk(at, which, counts, chunk[(None,) * len(layer)])
        write_settings(folder, cfg, c)
    log.info(f"{c.out}: {sum(map(torch.Size.numel, shapes.values())):,} parameters")


def main() -> None:
    """Run the command that the command line names."""
    parallel.set_up_logging()
    jobs = {"import": ImportConfig, "export": ExportConfig}
    how = dict(prog="python -m recipes.nemo", description=__doc__)
    c = parallel.parsed(lambda: tyro.extras.subcommand_cli_from_dict(jobs, **how))
    parallel.run(lambda: import_nemo(c) if isinstance(c, ImportConfig) else export_nemo(c))


if __name__ == "__main__":
    main()
