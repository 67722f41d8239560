"""Run a stage of align.py whose rows are a large file's: one process of a machine reads it, and all
map what it becomes.

The tokens of all rows lie in one array beside the file, FILE.rows-KEY.npy, and what else is known
of each row in FILE.rows-KEY.json, which appears last. KEY names all that the rows depend on.

    torchrun --nproc_per_node 8 -m recipes.mapped dpo --data pairs.jsonl --init runs/sft
"""

import ctypes
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from align import PRESETS, align, read_rows_of
from data import Example, Tokenizer, write_whole
from parallel import run, set_up_logging
from train import choose_config

log = logging.getLogger("nemotron4")

LARGE = 1 << 24  # bytes of a file that takes seconds to read
PATIENCE = 3600.0  # seconds to wait for the process that reads
# what a stage's rows depend on beside its file, tokenizer and code
SETTINGS = ("loss", "n_attributes", "seq_len", "skip_bad", "shorten")


@dataclass(frozen=True, eq=False)
class Row:
    """Holds what a data.Example does, but makes ids and masks when they are asked for: of many rows
    that are held few are looked at."""

    tokens: np.ndarray  # int32, of all rows: each token's id, or ~id where it is trained
    key: str
    where: str
    listed: list[float] | None
    cuts: list[int]  # where each segment starts in tokens, and where the last one ends

    @property
    def parts(self) -> list[np.ndarray]:
        return [self.tokens[start:end] for start, end in pairwise(self.cuts)]

    @property
    def ids(self) -> tuple[np.ndarray, ...]:
        return tuple(np.maximum(part, ~part) for part in self.parts)

    @property
    def trained(self) -> tuple[np.ndarray, ...]:
        return tuple(part < 0 for part in self.parts)

    @property
    def values(self) -> np.ndarray | None:
        return None if self.listed is None else np.float32(self.listed)

    @property
    def length(self) -> int:
        return self.cuts[-1] - self.cuts[0]


class Rows(Sequence[Row]):
    """Holds the rows that `write` wrote to a file."""

    def __init__(self, file: Path) -> None:
        """Map the tokens, of which a process reads those of its own rows, and read the rest."""
        try:
            self.index = json.loads(file.read_text(encoding="utf-8"))
            tokens = np.load(file.with_suffix(".npy"), mmap_mode="r")
        except (ValueError, EOFError) as e:
            raise ValueError(f"{file} or its .npy is damaged ({e!r}): remove both") from None
        self.tokens = tokens.view(np.ndarray)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: Any) -> Any:
        return Row(self.tokens, *self.index[i])


def write(rows: Sequence[Example], file: Path) -> None:
    """Write rows so that a reader finds them whole or not at all, also if several write them."""
    tokens = np.empty(sum(row.length for row in rows), np.int32)
    index = []
    end = 0
    for row in rows:
        cuts = [end]
        for ids, trained in zip(row.ids, row.trained, strict=True):
            start = end
            end += len(ids)
            tokens[start:end] = np.where(trained, ~ids, ids)
            cuts.append(end)
        values = None if row.values is None else row.values.tolist()
        index.append((row.key, row.where, values, cuts))
    unfinished = file.with_suffix(f".{platform.node()}-{os.getpid()}.npy")
    try:
        np.save(unfinished, tokens)
        unfinished.rename(file.with_suffix(".npy"))
    finally:
        unfinished.unlink(missing_ok=True)
    write_whole(file, json.dumps(index))


def file_of(cfg: Any, path: Path, tokenizer: Tokenizer, read: Callable) -> Path:
    """Name the file of what `read` makes of a source, by the source's size and times, a hash of
    settings and tokenizer, and one of the code: a researcher may have changed the template."""
    own = path.stat()
    source = f"{own.st_size:x}{max(own.st_mtime_ns, own.st_ctime_ns):016x}"
    known = [type(cfg).__name__, read.__name__, cfg.model.vocab_size]
    known += [getattr(cfg, name, None) for name in SETTINGS]
    settings = hashlib.blake2b(repr(known).encode(), digest_size=8)
    with TemporaryDirectory() as folder:
        settings.update((Path(folder) / tokenizer.save(Path(folder))).read_bytes())
    code = hashlib.blake2b(digest_size=8)
    for place in (Tokenizer, type(cfg), read, file_of):
        code.update(Path(sys.modules[place.__module__].__file__).read_bytes())
    key = f"{source}-{settings.hexdigest()}-{code.hexdigest()}"
    return path.with_name(f"{path.name}.rows-{key}.json")


def remove_stale(file: Path) -> None:
    """Remove what was written before the source or the code changed; who has mapped it keeps it."""
    name = re.compile(r"(?s)(.*)\.rows-([0-9a-f]+)-([0-9a-f]{16})-([0-9a-f]{16})\..*(json|npy|tmp)")
    path, source, settings, code, _ = name.fullmatch(file.name).groups()
    for other in file.parent.iterdir():
        known = name.fullmatch(other.name)
        if not known or known[1] != path:
            continue
        if known[2] != source or known[3] == settings and known[4] != code:
            other.unlink(missing_ok=True)


def can_hold(folder: Path, size: int) -> bool:
    """Tell whether a folder can be written to and has room for the tokens of `size` bytes."""
    return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 8 * size


def shared_rows(cfg: Any, path: Path, tokenizer: Tokenizer, read: Callable) -> Sequence[Any]:
    """Return the rows that `read` reads for a stage. Those of a large file are mapped: one process
    of each machine reads and writes them, unless an earlier run did, and the others wait for it.
    Where the folder cannot take them, or the wait is too long, a process reads for itself."""
    if not path.is_file() or path.stat().st_size < LARGE:
        return read(cfg, path, tokenizer)
    file = file_of(cfg, path, tokenizer, read)
    begun = time.monotonic()
    leads = not int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    while not file.exists():
        if not can_hold(path.parent, path.stat().st_size) or time.monotonic() - begun > PATIENCE:
            return read(cfg, path, tokenizer)
        if leads:
            remove_stale(file)
            write(read(cfg, path, tokenizer), file)
            with suppress(OSError, AttributeError):  # glibc keeps what many small arrays have freed
                ctypes.CDLL("libc.so.6").malloc_trim(0)
        else:
            time.sleep(0.1)
    rows = Rows(file)
    log.info(f"{file}: {len(rows):,} rows, shared by the processes of a machine")
    return rows


def stage_rows(cfg: Any, path: Path, tokenizer: Tokenizer) -> Sequence[Any]:
    """Return the rows of a stage of align.py."""
    return shared_rows(cfg, path, tokenizer, read_rows_of)


def main() -> None:
    sys.argv[0] = "python -m recipes.mapped"  # as the help names it
    set_up_logging()
    about = "Align a model on a large file's rows, which the processes share: preset, options."
    run(lambda: align(*choose_config(sys.argv[1:], PRESETS, about), read=stage_rows))


if __name__ == "__main__":
    main()
