"""Text in, token batches out: tokenizers, `prepare`, token files, a sampler without state; chat
template, rows of conversations, pairs and scored responses, and their packing.

Everything here is about text and needs neither a model nor torch. Section 2.1 of the report
(blend), arXiv 2402.16819 (tokenizer, hygiene).

    python data.py prepare english=books/ code=src/ --out data/mine
    python data.py show data/mine
"""

import ast
import base64
import contextlib
import difflib
import gzip
import hashlib
import html
import inspect
import itertools
import json
import logging
import os
import random
import re
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import unicodedata
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

log = logging.getLogger("nemotron4")

IGNORE = -100  # a target that no loss counts: model.py's constant, without importing torch for it

# ---- tokenizers ----------------------------------------------------------------------------------

# Nemotron's control tokens and their ids (SPEC 2.1); <extra_id_0..2> open the system turn, a turn,
# and a label.
SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>")

# Words with one leading space, digits one by one, runs of marks, runs of white space. Without
# look-ahead, so that the regular expression runs in linear time; nothing is dropped, so decoding
# gives the text back byte for byte.
PATTERN = r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\p{N}|\s+"


class Tokenizer(Protocol):
    """What the rest of the code asks of any tokenizer."""

    vocab_size: int
    specials: dict[str, int]  # control token → id
    path: Path

    def encode(self, text: str) -> np.ndarray:
        """Text → int32 ids; control tokens spelt out in a text stay text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Ids → text, control tokens spelt out, broken UTF-8 replaced."""

    def special(self, name: str) -> int:
        """The id of a control token: one of SPECIALS."""
        if name not in self.specials:
            have = sorted(self.specials)
            raise ValueError(f"the tokenizer has no control token {name!r}, only {have}")
        return self.specials[name]

    def save(self, folder: Path) -> str:
        """Write what `load_tokenizer` needs into the folder; returns the file's name."""
        return shutil.copyfile(self.path, folder / f"tokenizer{self.path.suffix}").name


class BytePairs(Tokenizer):
    """Byte-level BPE run by tiktoken: ours, by `train_bpe`, or any encoding that tiktoken names."""

    def __init__(self, pattern: str, ranks: dict[bytes, int], specials: dict[str, int]) -> None:
        self.encoding = tiktoken.Encoding(
            "nemotron4", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
        )
        self.specials = specials
        self.vocab_size = self.encoding.max_token_value + 1

    @classmethod
    def named(cls, name: str) -> "BytePairs":
        """A tiktoken encoding, <|endoftext|> as </s>, the other control tokens added at its end."""
        base = tiktoken.get_encoding(name)
        specials = dict(base._special_tokens)
        specials["</s>"] = specials.pop("<|endoftext|>")  # one name an id
        new = (token for token in SPECIALS if token != "</s>")
        specials |= {token: base.max_token_value + 1 + i for i, token in enumerate(new)}
        return cls(base._pat_str, base._mergeable_ranks, specials)

    @classmethod
    def load(cls, path: Path) -> "BytePairs":
        spec = json.loads(path.read_text())
        ranks = {base64.b64decode(token): rank for token, rank in spec["ranks"].items()}
        return cls(spec["pattern"], ranks, spec["specials"])

    def save(self, folder: Path) -> str:
        ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        spec = {
            "pattern": self.encoding._pat_str,
            "specials": self.specials,
            "ranks": {base64.b64encode(token).decode(): rank for token, rank in ranks},
        }
        (folder / "tokenizer.bpe.json").write_text(json.dumps(spec, indent=0))
        return "tokenizer.bpe.json"

    def encode(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text, disallowed_special=()).view(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode(list(map(int, ids)))


class HuggingFace(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library."""

    # other tokenizers' spellings of our control tokens
    PADS, ENDS = ("[PAD]", "<|pad|>"), ("<|endoftext|>", "<|end_of_text|>", "<eos>")
    ALIASES = {"<pad>": PADS, "<s>": ("<bos>",), "</s>": ENDS}

    def __init__(self, path: Path) -> None:
        import tokenizers

        self.path = path
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.tokenizer.encode_special_tokens = True  # text stays text
        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values())
        added = self.tokenizer.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items()}
        for name in SPECIALS:
            if known := [s for s in (name, *self.ALIASES.get(name, ())) if s in vocab]:
                self.specials[name] = vocab[known[0]]

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)


class SentencePiece(Tokenizer):
    """A SentencePiece .model file, such as NVIDIA's nemotron_2_256k.model."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size, unk = self.processor.vocab_size(), self.processor.unk_id()
        ids = {name: self.processor.piece_to_id(name) for name in SPECIALS}
        self.specials = {name: i for name, i in ids.items() if i != unk or name == "<unk>"}

    def encode(self, text: str) -> np.ndarray:
        # user-defined pieces match anywhere in a text: a mark in it is cut after one character
        for mark in self.specials:
            if mark != "<unk>":
                text = text.replace(mark, mark[0] + "\0" + mark[1:])
        ids = [i for part in text.split("\0") for i in self.processor.encode(part)]
        return np.array(ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.processor.decode(list(map(int, ids)))


LOADERS = {".bpe.json": BytePairs.load, ".model": SentencePiece, ".json": HuggingFace}


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """A tokenizer from a file (LOADERS says which), a folder with one, or tiktoken by name."""
    path = Path(spec)
    if path.is_dir():
        names = [f"tokenizer{suffix}" for suffix in LOADERS]
        found = [path / name for name in names if (path / name).exists()]
        if not found:
            raise ValueError(f"{path}: no tokenizer in this folder; it needs {' or '.join(names)}")
        path = found[0]
    for suffix, load in LOADERS.items():
        if path.name.endswith(suffix) and path.exists():
            return load(path)
    names = tiktoken.list_encoding_names()
    if str(spec) in names:
        return BytePairs.named(str(spec))
    close = difflib.get_close_matches(str(spec), names, n=1)
    raise ValueError(
        f"tokenizer {str(spec)!r} is neither a file (.bpe.json, .model, tokenizer.json) nor one of "
        f"tiktoken's ({', '.join(names)})" + (f"; did you mean {close[0]}?" if close else "")
    )


def train_bpe(texts: Iterable[str], vocab_size: int) -> BytePairs:
    """Byte-level BPE: SPECIALS as ids 0..6, the 256 bytes, then merges. Same texts, same result."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    least = len(SPECIALS) + 256
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size}: control tokens and bytes need at least {least}")
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = hf_pre_tokenizer()
    start = dict(special_tokens=[*SPECIALS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **start)
    tok.train_from_iterator(texts, trainer)
    if (found := tok.get_vocab_size()) < vocab_size:
        raise ValueError(f"too few distinct words for vocab_size={vocab_size}: ask for {found}")
    byte = {char: b for b, char in byte_chars().items()}
    vocab = {t: i for t, i in tok.get_vocab().items() if t not in SPECIALS}
    ranks = {bytes(byte[char] for char in t): i for t, i in vocab.items()}
    return BytePairs(PATTERN, ranks, {t: i for i, t in enumerate(SPECIALS)})


def hf_pre_tokenizer() -> Any:
    """PATTERN for the `tokenizers` library: split, then bytes as printable characters."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, level])


def byte_chars() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes, as `tokenizers` writes its vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


# ---- documents -----------------------------------------------------------------------------------

# fmt: off
TEXT_SUFFIXES = (
    ".txt", ".md", ".rst", ".tex", ".html", ".xml", ".css", ".js", ".ts", ".tsx", ".jsx", ".py",
    ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala", ".go", ".rs", ".rb",
    ".php", ".swift", ".m", ".cs", ".lua", ".pl", ".r", ".jl", ".sh", ".sql", ".yaml", ".yml",
    ".toml", ".ini", ".cfg", ".cmake", ".asm", ".f90", ".hs", ".ml", ".ex", ".erl", ".clj", ".lisp",
    ".el", ".proto", ".tf", ".dart", ".v", ".vhd",
)
# fmt: on
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

# A larger text file becomes several documents, cut at line ends: memory stays bounded.
LONGEST = 4 << 20


class BadDocument(ValueError):
    """A document that cannot be read: file and line, the rule, and what to do."""

    def __init__(self, where: object, rule: str) -> None:
        super().__init__(f"{where}: {rule}, or --skip-bad")


# Readers yield what they could not read as well: whether that ends the run is the caller's choice.
Documents = Iterator[str | BadDocument]
Reader = Callable[[], Documents]


def files_of(root: Path) -> list[Path]:
    """The files to read below a folder, in a fixed order: none hidden, none of unknown suffix."""
    if not root.exists():
        raise ValueError(f"{root}: no such file or folder")
    if root.is_file():
        return [root]
    known = (p for p in root.rglob("*") if p.name.endswith(TEXT_SUFFIXES + ROW_SUFFIXES))
    seen = (p for p in known if "/." not in f"/{p.relative_to(root).as_posix()}")
    return sorted(p for p in seen if p.is_file())


def read_text(path: Path) -> Documents:
    """A text file as one document, or as several where it is larger than LONGEST."""
    line = 1
    with path.open("rb") as f:
        while piece := f.read(LONGEST):
            if len(piece) == LONGEST:
                piece += f.readline()
            try:
                yield piece.decode("utf-8")
            except UnicodeDecodeError as e:
                at, byte = line + piece[: e.start].count(b"\n"), piece[e.start]
                yield BadDocument(f"{path}:{at}", f"not UTF-8 (byte 0x{byte:02x}): convert it")
            line += piece.count(b"\n")


def numbered_lines(path: Path) -> Iterator[tuple[str, bytes | BadDocument]]:
    """("FILE:NUMBER", line), gzipped or not, blank lines left out; a gzip stream that breaks off
    ends as bad."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        yield str(path), BadDocument(path, f"broken gzip stream ({e}): fetch it again")


def row_text(line: bytes, text_field: str, where: str) -> str | BadDocument:
    try:
        row = json.loads(line)
        row[text_field].encode()
        return row[text_field]
    except UnicodeEncodeError as e:
        return BadDocument(where, f"a lone surrogate at character {e.start}: mend the line")
    except ValueError as e:
        return BadDocument(where, f"not JSON ({e}): mend the line")
    except (KeyError, TypeError, AttributeError):
        have = f"it has {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        return BadDocument(where, f"no string in field {text_field!r} ({have}): set --text-field")


def read_parquet(path: Path, text_field: str) -> Documents:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise ValueError(f"{path}: parquet needs pyarrow: pip install -e '.[parquet]'") from e
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if text_field not in (names := table.schema_arrow.names):
                rule = f"no column {text_field!r} (it has {names}): set --text-field"
                yield BadDocument(path, rule)
                return
            batches = table.iter_batches(batch_size=1024, columns=[text_field])
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
            for row, text in enumerate(texts, 1):
                rule = f"no string in column {text_field!r}: mend it"
                yield text if isinstance(text, str) else BadDocument(f"{path}: row {row}", rule)
    except pyarrow.ArrowException as e:
        yield BadDocument(path, f"broken parquet file ({e}): fetch it again")


def read_documents(paths: list[Path], text_field: str) -> Documents:
    for path in paths:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            for where, line in numbered_lines(path):
                yield line if isinstance(line, BadDocument) else row_text(line, text_field, where)
        elif path.suffix == ".parquet":
            yield from read_parquet(path, text_field)
        else:
            yield from read_text(path)


# ---- the corpus that every machine has -----------------------------------------------------------


def standard_library() -> list[Path]:
    """Python's own library, as source files; its tests and other people's packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "ensurepip"}
    return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))


def embedded_code() -> Documents:
    return read_documents(standard_library(), "")


def embedded_english() -> Documents:
    """Text written by people: the topics that `help()` shows, and each module's docstrings."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for path in standard_library():
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a template or an example of bad code: it has no docstrings
        nodes = (n for n in ast.walk(tree) if isinstance(n, documented))
        docs = (d for n in nodes if (d := ast.get_docstring(n, clean=False)))
        text = "\n\n".join(map(inspect.cleandoc, docs))
        if len(text) > 200:
            yield text


EMBEDDED = {"english": embedded_english, "code": embedded_code}

# ---- prepare -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrepareConfig:
    """Text files → token files."""

    sources: tyro.conf.Positional[tuple[str, ...]] = ()
    """NAME=PATH of each source: a file or folder of text, Markdown, source code, .jsonl, .jsonl.gz
    or .parquet. Several paths may share a name. None: Python's own library and documentation."""
    out: Path = Path("data/python")
    """Folder to make. It appears when it is complete, not before."""
    tokenizer: str = ""
    """A tokenizer file or a tiktoken encoding's name. Empty: one is trained on these texts."""
    vocab_size: int = 32_768
    """Size of the trained tokenizer (unused with --tokenizer)."""
    text_field: str = "text"
    """Field of a JSON or parquet row that holds the text."""
    val_fraction: float = 0.01
    """Share of the documents kept for validation, picked by their content's hash."""
    skip_bad: bool = False
    """Count and leave out documents that cannot be read, instead of stopping at the first."""
    train_bytes: int = 100_000_000
    """About how much text the tokenizer is trained on."""
    workers: int = os.cpu_count() or 1
    """Threads that encode (tiktoken, tokenizers and sentencepiece all release Python's lock)."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction}: a share, 0 <= val_fraction < 1")
        if self.workers < 1 or self.train_bytes < 1:
            raise ValueError(f"workers={self.workers}, train_bytes={self.train_bytes}: at least 1")


def open_sources(cfg: PrepareConfig) -> dict[str, Reader]:
    """Source name → a function that reads its documents from the start."""
    if not cfg.sources:
        return dict(EMBEDDED)
    files: dict[str, list[Path]] = {}
    for source in cfg.sources:
        name, _, path = source.partition("=")
        if not path or not name.replace("-", "_").isidentifier():
            raise ValueError(f"source {source!r}: write NAME=PATH, NAME of letters, digits, -, _")
        files.setdefault(name, []).extend(files_of(Path(path).expanduser()))
    for name, paths in files.items():
        if not paths:
            raise ValueError(f"source {name!r}: no text, source code, .jsonl(.gz) or .parquet file")
    return {name: partial(read_documents, paths, cfg.text_field) for name, paths in files.items()}


class Hygiene:
    """Drops what is bad, empty or an exact duplicate, and counts it."""

    def __init__(self, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self.seen = sqlite3.connect("")  # a temporary file: memory stays bounded
        self.seen.execute("CREATE TABLE digests (digest BLOB PRIMARY KEY) WITHOUT ROWID")

    def clean(self, documents: Documents) -> Iterator[tuple[str, int, int]]:
        """→ (text, bytes, first 64 bits of its digest)."""
        self.counts = dict(bad=0, empty=0, duplicate=0)
        for text in documents:
            if isinstance(text, BadDocument):
                if not self.skip_bad:
                    raise text
                self.counts["bad"] += 1
            elif not text.strip():
                self.counts["empty"] += 1
            else:
                raw, insert = text.encode(), "INSERT OR IGNORE INTO digests VALUES (?)"
                digest = hashlib.blake2b(raw, digest_size=16).digest()
                if self.seen.execute(insert, (digest,)).rowcount:
                    yield text, len(raw), int.from_bytes(digest[:8], "big")
                else:
                    self.counts["duplicate"] += 1


def encode_all(
    docs: Iterable[Any], encode: Callable[[str], np.ndarray], workers: int
) -> Iterator[tuple[Any, np.ndarray]]:
    """(document, ids) in order, encoded by threads; a document is (text, bytes, ...)."""

    def work(group: list[Any]) -> list[tuple[Any, np.ndarray]]:
        return [(doc, encode(doc[0])) for doc in group]

    waiting, group, size = deque(), [], 0
    with ThreadPoolExecutor(workers) as pool:
        for doc in docs:
            group.append(doc)
            size += doc[1]
            if size >= 1 << 18:  # groups of about 256 kB, never more than 4 a worker in flight
                waiting.append(pool.submit(work, group))
                group, size = [], 0
                if len(waiting) >= 4 * workers:
                    yield from waiting.popleft().result()
        waiting.append(pool.submit(work, group))
        while waiting:
            yield from waiting.popleft().result()


class TokenWriter:
    """Appends to STEM.bin (tokens, </s> after each document) and STEM.idx (int64: its offsets)."""

    def __init__(self, stem: str, dtype: type, eos: int) -> None:
        self.bin, self.idx = open(f"{stem}.bin", "wb"), open(f"{stem}.idx", "wb")
        self.dtype, self.eos = dtype, np.array([eos], dtype).tobytes()
        self.counts, self.crc = dict(documents=0, tokens=0, bytes=0), 0
        self.idx.write(np.int64(0).tobytes())

    def write(self, ids: np.ndarray, n_bytes: int) -> None:
        document = ids.astype(self.dtype).tobytes() + self.eos
        self.crc = zlib.crc32(document, self.crc)
        self.bin.write(document)
        self.counts["documents"] += 1
        self.counts["tokens"] += len(ids) + 1
        self.counts["bytes"] += n_bytes
        self.idx.write(np.int64(self.counts["tokens"]).tobytes())

    def close(self) -> dict[str, int]:
        for f in (self.bin, self.idx):
            f.flush()
            os.fsync(f.fileno())
            f.close()
        return {**self.counts, "crc": self.crc}


def prepare(cfg: PrepareConfig) -> None:
    """Tokenize all sources: same input, same bytes; a killed run leaves only OUT.partial."""
    if cfg.out.exists():
        raise ValueError(f"{cfg.out} exists: remove it, or choose another --out")
    sources = open_sources(cfg)
    folder = cfg.out.with_name(cfg.out.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if cfg.tokenizer:
        tokenizer = load_tokenizer(cfg.tokenizer)
    else:
        tokenizer = train_bpe(training_texts(cfg, sources), cfg.vocab_size)
    file = tokenizer.save(folder)
    tokenizer = load_tokenizer(folder / file)
    hygiene, entries = Hygiene(cfg.skip_bad), {}
    for name, read in sources.items():
        entries[name] = prepare_source(cfg, folder / name, tokenizer, hygiene, read())
    vocab_size, eos = tokenizer.vocab_size, tokenizer.special("</s>")
    manifest = dict(vocab_size=vocab_size, eos=eos, tokenizer=file, sources=entries)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    folder.rename(cfg.out)
    log.info(f"{cfg.out}: complete, vocabulary {vocab_size:,}")


def training_texts(cfg: PrepareConfig, sources: dict[str, Reader]) -> Iterator[str]:
    """About cfg.train_bytes of text, an equal share from each source, in the order of the files."""
    for name, read in sources.items():
        share, title = cfg.train_bytes // len(sources), f"{name}: text for the tokenizer"
        left = share
        for text in tqdm(read(), desc=title, unit=" docs", leave=False):
            if isinstance(text, str):
                yield text
                left -= len(text)
                if left < 0:
                    break
            elif not cfg.skip_bad:
                raise text
        if left == share:
            raise ValueError(f"source {name!r} is empty: no document in it")


def prepare_source(
    cfg: PrepareConfig, stem: Path, tokenizer: Tokenizer, hygiene: Hygiene, documents: Documents
) -> dict[str, Any]:
    """One source's train and validation files; returns its entry of the manifest."""
    name, eos = stem.name, tokenizer.special("</s>")
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    writers = {split: TokenWriter(f"{stem}.{split}", dtype, eos) for split in ("train", "val")}
    encoded = encode_all(hygiene.clean(documents), tokenizer.encode, cfg.workers)
    with tqdm(desc=name, unit="B", unit_scale=True) as bar:
        for (_, n_bytes, digest), ids in encoded:
            split = "val" if digest < cfg.val_fraction * 2**64 else "train"
            writers[split].write(ids, n_bytes)
            bar.update(n_bytes)
    train, val = (writer.close() for writer in writers.values())
    if not train["documents"]:
        left = f"{hygiene.counts}, {val['documents']} for validation"
        raise ValueError(f"source {name!r} is empty: no document left for training ({left})")
    if not val["documents"] and cfg.val_fraction:
        log.warning(f"{name}: too few documents for a validation split of {cfg.val_fraction}")
    both = {unit: train[unit] + val[unit] for unit in ("documents", "tokens", "bytes")}
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in hygiene.counts.items())
    log.info(
        f"{name}: {both['documents']:,} documents ({val['documents']:,} for validation), "
        f"{both['tokens']:,} tokens, {both['bytes'] / both['tokens']:.2f} bytes per token; "
        f"dropped: {dropped}"
    )
    return dict(train=train, val=val, dropped=hygiene.counts, dtype=np.dtype(dtype).name)


# ---- token files and the sampler -----------------------------------------------------------------

REPORT_BLEND = {"english": 0.70, "multilingual": 0.15, "code": 0.15}  # report section 2.1


class TokenData:
    """A prepared folder, memory-mapped."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.exists():
            todo = f"run data.py prepare --out {folder}"
            raise ValueError(f"{folder}: not a prepared data folder (no manifest.json): {todo}")
        self.manifest = json.loads(path.read_text())
        self.vocab_size: int = self.manifest["vocab_size"]
        self.sources: tuple[str, ...] = tuple(self.manifest["sources"])

    @property
    def fingerprint(self) -> str:
        """Of the tokens: a run that is resumed on other data is another run."""
        entries = self.manifest["sources"].items()
        return " ".join(f"{s}:{e['train']['tokens']}:{e['train']['crc']:08x}" for s, e in entries)

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder / self.manifest["tokenizer"])

    def n_tokens(self, source: str, split: str) -> int:
        return self.manifest["sources"][source][split]["tokens"]

    def bytes_per_token(self, source: str) -> float:
        """Of the validation split: makes losses comparable between tokenizers."""
        val = self.manifest["sources"][source]["val"]
        return val["bytes"] / val["tokens"]

    def tokens(self, source: str, split: str) -> np.ndarray:
        path, n = self.folder / f"{source}.{split}.bin", self.n_tokens(source, split)
        dtype, size = np.dtype(self.manifest["sources"][source]["dtype"]), path.stat().st_size
        if size != n * dtype.itemsize:
            want = f"the manifest says {n} tokens of {dtype}"
            raise ValueError(f"{path}: {size} bytes, {want}: prepare it again")
        return np.memmap(path, dtype, "r") if n else np.zeros(0, dtype)  # no file maps as empty

    def offsets(self, source: str, split: str) -> np.ndarray:
        """int64 (documents + 1): document d is tokens[offsets[d] : offsets[d + 1]], with </s>."""
        return np.memmap(self.folder / f"{source}.{split}.idx", np.int64, "r")

    def blend(self, weights: dict[str, float]) -> dict[str, float]:
        """Weights that sum to one; by default the report's for its names, else by tokens."""
        if not weights and set(self.sources) <= set(REPORT_BLEND):
            weights = {s: REPORT_BLEND[s] for s in self.sources}
        elif not weights:
            weights = {s: self.n_tokens(s, "train") for s in self.sources}
        if unknown := sorted(set(weights) - set(self.sources)):
            raise ValueError(f"the blend names {unknown}, {self.folder} has {list(self.sources)}")
        total = sum(weights.values())
        if min(weights.values()) < 0 or not 0 < total < float("inf"):
            raise ValueError(f"blend {weights}: weights finite, none negative, and not all zero")
        # in the manifest's order: sample i must not depend on how the weights were written down
        return {s: weights[s] / total for s in self.sources if weights.get(s, 0) > 0}


def permute(i: int, n: int, key: int) -> int:
    """Where element i of n goes in the shuffle `key`: a bijection of 0..n-1, in O(1) memory."""
    # a four-round Feistel network, walked until it lands inside n
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for turn in range(4):
            x = (right + key + turn * 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
            left, right = right, left ^ ((x ^ x >> 29) * 0x94D049BB133111EB >> 32 & mask)
        i = left << half | right
        if i < n:
            return i


def shares_of(blend: dict[str, float]) -> dict[str, int]:
    """A source's share among itself and those after it, in 2^-32: integers agree everywhere."""
    rest = np.cumsum(list(blend.values())[::-1])[::-1]
    return {s: round(w / r * 2**32) for (s, w), r in zip(blend.items(), rest, strict=True)}


def drawn(shares: dict[str, int], i: int) -> dict[str, int]:
    """How many of the first i samples of one blend come from each source."""
    out = {}
    for name, share in shares.items():
        out[name] = share * i >> 32
        i -= out[name]
    return out


class Sampler:
    """Sample number i → a window of seq_len tokens, as a pure function of (seed, i).

    Nothing to save, nothing to resume. Sources are interleaved so that after any number of samples
    each is within a sample or two of its weight; within a source each epoch is a fresh shuffle of
    its windows, each window seen once. The last window of a source is padded.
    """

    def __init__(
        self,
        data: TokenData,
        blend: dict[str, float],
        seq_len: int,
        seed: int,
        split: str = "train",
        isolate: bool = False,
        later: dict[int, dict[str, float]] | None = None,
    ) -> None:
        """later: blends by the sample that they begin at; `blend` is the one before them."""
        self.seq_len, self.seed, self.isolate = seq_len, seed, isolate
        blends = {0: blend, **(later or {})}
        names = list(dict.fromkeys(s for b in blends.values() for s in b))
        self.tokens = {s: data.tokens(s, split) for s in names}
        self.offsets = {s: data.offsets(s, split) for s in names}
        self.windows = {s: -(-(len(t) - 1) // seq_len) for s, t in self.tokens.items()}
        for s, t in self.tokens.items():
            if split == "train" and len(t) <= seq_len:
                rule = f"fewer than one window of seq_len={seq_len} + 1: add text, or shorten it"
                raise ValueError(f"source {s!r} has {len(t)} tokens, {rule}")
        self.parts = [(first, shares_of(blends[first])) for first in sorted(blends)]

    def part(self, i: int) -> tuple[int, dict[str, int], dict[str, int]]:
        """The blend that sample i is drawn from: (its first sample, its shares, samples that each
        source gave before it)."""
        before = dict.fromkeys(self.windows, 0)
        for (first, shares), after in zip(self.parts, [*self.parts[1:], None], strict=True):
            if after is None or i < after[0]:
                return first, shares, before
            for s, n in drawn(shares, after[0] - first).items():
                before[s] += n

    def counts(self, i: int) -> dict[str, int]:
        """How many of the first i samples come from each source."""
        first, shares, before = self.part(max(0, i - 1))
        return before | {s: before[s] + n for s, n in drawn(shares, i - first).items()}

    def locate(self, i: int) -> tuple[str, int, int]:
        """Sample i → (source, epoch, window)."""
        first, shares, before = self.part(i)
        i -= first
        for name, share in shares.items():  # noqa: B007
            k = share * i >> 32  # samples of this source before sample i
            if share * (i + 1) >> 32 > k:
                break
            i -= k
        epoch, j = divmod(before[name] + k, self.windows[name])
        key = hashlib.blake2b(f"{self.seed}/{name}/{epoch}".encode(), digest_size=8).digest()
        return name, epoch, permute(j, self.windows[name], int.from_bytes(key, "big"))

    def describe(self, samples: Iterable[int]) -> str:
        """The documents that samples are cut from, by source and number."""
        out: dict[str, list[str]] = {}
        for source, _, window in map(self.locate, samples):
            ends = window * self.seq_len + np.array([0, self.seq_len])
            a, b = np.searchsorted(self.offsets[source], ends, side="right") - 1
            out.setdefault(source, []).append(f"{a}-{min(b, len(self.offsets[source]) - 2)}")
        return "; ".join(f"{s} documents {', '.join(d)}" for s, d in out.items())

    def epochs(self, i: int) -> dict[str, float]:
        """How often each source has been gone through after i samples."""
        return {s: n / self.windows[s] for s, n in self.counts(i).items()}

    def batch(self, samples: Iterable[int]) -> dict[str, np.ndarray]:
        """Tokens and targets, int64 (B, T), targets IGNOREd where there is nothing to predict.

        With `isolate` also document ids and positions that restart with each document, and no
        target across a document's end.
        """
        rows = [self.row(*self.locate(i)) for i in samples]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def row(self, source: str, epoch: int, window: int) -> dict[str, np.ndarray]:
        T, start = self.seq_len, window * self.seq_len
        piece = self.tokens[source][start : start + T + 1].astype(np.int64)
        tokens, targets = np.zeros(T, np.int64), np.full(T, IGNORE)
        tokens[: len(piece[:T])] = piece[:T]
        targets[: len(piece) - 1] = piece[1:]
        row = {"tokens": tokens, "targets": targets}
        if self.isolate:
            at = np.arange(start, start + T + 1)
            documents = np.searchsorted(self.offsets[source], at, side="right") - 1
            targets[documents[1:] != documents[:-1]] = IGNORE
            documents = documents[:-1]
            new = np.diff(documents, prepend=-1) != 0
            positions = np.arange(T) - np.maximum.accumulate(np.where(new, np.arange(T), 0))
            row |= {"positions": positions, "documents": documents}
        return row


# ---- chat template -------------------------------------------------------------------------------

ROLES = {"user": "User", "assistant": "Assistant"}
# NeMo-Aligner's system text for the reward model (SPEC 2.3)
REWARD_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
Messages = list[dict[str, str]]  # {"role": "system" | "user" | "assistant", "content": text}


def check_messages(messages: Messages) -> None:
    """ValueError, naming the message and the rule: an optional system turn, then user and assistant
    in turns, the user first."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: a list of {role, content}, at least one")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"messages[{i}]: an object with a role and a text as content")
        first = messages[0].get("role") == "system"
        want = "system" if i == 0 and first else ("user", "assistant")[(i - first) % 2]
        if (role := message.get("role")) != want:
            rule = "an optional system turn, then user and assistant in turns"
            raise ValueError(f"messages[{i}] has role {role!r}, not {want!r}: {rule}")
    if messages[-1]["role"] == "system":
        raise ValueError("messages: a user turn is missing after the system turn")


def render_chat(messages: Messages, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Messages in the Nemotron template → ids, int32 (T), and which of them are trained, bool (T).

    Trained are an assistant's text and the <extra_id_1> after it, by which it learns to stop. A
    missing system turn is an empty one. After a last user turn comes the head of the answer, for
    the model to go on from. Texts are tokenised apart from what surrounds them, so that no token
    spans a boundary, and a marker spelt out in one stays text. No bos. (SPEC 2.2)
    """
    check_messages(messages)
    start, turn = ([tokenizer.special(f"<extra_id_{i}>")] for i in (0, 1))
    system, turns = messages[0]["content"], messages[1:]
    if messages[0]["role"] != "system":
        system, turns = "", messages
    pieces = [(start, False), (tokenizer.encode(f"System\n{system}\n"), False)]
    answered = False
    for message in turns:
        pieces += [(turn, answered), (tokenizer.encode(ROLES[message["role"]] + "\n"), False)]
        answered = message["role"] == "assistant"
        pieces.append((tokenizer.encode(message["content"] + "\n"), answered))
    pieces.append((turn, answered))
    if not answered:
        pieces.append((tokenizer.encode("Assistant\n"), False))
    ids = np.concatenate([np.asarray(part, np.int32) for part, _ in pieces])
    return ids, np.concatenate([np.full(len(part), trained) for part, trained in pieces])


def render_reward(messages: Messages, tokenizer: Tokenizer) -> np.ndarray:
    """The reward model's input, int32 (T): the conversation up to the assistant turn to be scored,
    then <extra_id_2>, whose state the head reads."""
    check_messages(messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError("messages: the last one, which is scored, must be the assistant's")
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": REWARD_SYSTEM}, *messages]
    ids, _ = render_chat(messages, tokenizer)
    return np.append(ids[:-1], np.int32(tokenizer.special("<extra_id_2>")))


# ---- rewards -------------------------------------------------------------------------------------

# HelpSteer2's attributes, each 0 to 4; NVIDIA's head has Open Assistant's four before them
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
NINE_ATTRIBUTES = ("quality", "toxicity", "humor", "creativity", *ATTRIBUTES)
REWARD_WEIGHTS = (0.3, 0.74, 0.46, 0.47, -0.33)  # the released 340B's (SPEC 2.3)


def aggregate(attributes: Any, weights: Sequence[float] = REWARD_WEIGHTS) -> Any:
    """Attributes (..., 5 or 9) → one reward (...); five weights leave out the first four of nine.
    Lists, arrays and tensors alike."""
    x = attributes if hasattr(attributes, "shape") else np.asarray(attributes, dtype=float)
    n, k = x.shape[-1], len(weights)
    if n not in (5, 9) or k not in (5, n):
        raise ValueError(f"{n} attributes, {k} weights: 5 or 9 attributes, 5 weights or as many")
    return sum(w * x[..., n - k + i] for i, w in enumerate(weights))


def best_and_worst(
    responses: Sequence[str], rewards: Sequence[float], finished: Sequence[bool], min_gap: float = 0
) -> tuple[int, int] | None:
    """Of one prompt's responses the numbers of chosen and rejected; unfinished ones and repetitions
    are left out. None: a tie, or their rewards are less than min_gap apart."""
    first = {text: i for i, text in reversed([*enumerate(responses)]) if finished[i]}
    order = sorted(first.values(), key=lambda i: (-rewards[i], i))
    gap = rewards[order[0]] - rewards[order[-1]] if order else 0
    return (order[0], order[-1]) if gap > 0 and gap >= min_gap else None


# ---- rows of alignment data ----------------------------------------------------------------------

MARKER = re.compile("<extra_id_[012]>")
TO_ANSWER = "<extra_id_1>Assistant\n"  # what a templated prompt ends with


@dataclass(frozen=True, eq=False)
class Row:
    """An example as token ids: a conversation or a scored response is one segment, a preference
    pair two, chosen and rejected."""

    ids: tuple[np.ndarray, ...]  # int32 (T) of each segment
    trained: tuple[np.ndarray, ...]  # bool (T): the tokens that a loss counts
    values: np.ndarray | None  # float32: a pair's two rewards, or a scored response's label
    where: str  # FILE:LINE

    @property
    def length(self) -> int:
        return sum(map(len, self.ids))

    @property
    def key(self) -> str:
        """Hash of the tokens and of which are trained: what its log-probabilities depend on."""
        digest = hashlib.blake2b(digest_size=16)
        for ids, trained in zip(self.ids, self.trained, strict=True):
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes() + trained.tobytes())
        return digest.hexdigest()


# What a JSON object becomes: a conversation, or a pair's two, still unchecked, and values
Example = tuple[list[Messages], np.ndarray | None]
Rows = tuple[list[Row], dict[str, int]]


def need(row: dict[str, Any], name: str, kind: type = object) -> Any:
    if row.get(name) is None or not isinstance(row[name], kind):
        what = {str: "text", list: "list"}.get(kind, "value")
        raise ValueError(f"no {what} in field {name!r} (it has {sorted(row)})")
    return row[name]


def numbers(values: list[Any], names: Sequence[str]) -> np.ndarray:
    """float32, each checked to be a finite number."""
    for value, name in zip(values, names, strict=True):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < 3e38:
            raise ValueError(f"{name} is {value!r}, not a finite number")
    return np.array(values, np.float32)


def plain(messages: Any) -> Any:
    """Messages with role and content alone; what is none stays as it is."""
    if not isinstance(messages, list):
        return messages
    keys = ("role", "content")
    return [{k: m.get(k) for k in keys} if isinstance(m, dict) else m for m in messages]


def parse_chat(text: str, end: str) -> Messages:
    """A text in the Nemotron template → its messages, the system turn included. Its markers are
    structure: one in any other place, or another end than `end`, is an error."""
    if not text.endswith(f"\n{end}"):
        raise ValueError(f"a templated text must end with {chr(10) + end!r}, not {text[-40:]!r}")
    messages = []
    for i, turn in enumerate(text[: -len(end)].split("<extra_id_1>")):
        head, _, body = turn.partition("\n")
        roles = {v: k for k, v in ROLES.items()} if i else {"<extra_id_0>System": "system"}
        if head not in roles or not body.endswith("\n") or MARKER.search(body):
            rule = f"{' or '.join(roles)}, then lines without a marker"
            raise ValueError(f"turn {i} of a templated text is {turn[:60]!r}, not {rule}")
        messages.append({"role": roles[head], "content": body[:-1]})
    return messages


def read_chat(row: dict[str, Any]) -> Example:
    """{"messages": [{role, content}]}, or NeMo's {"system", "conversations": [{from, value}]}."""
    if "messages" in row:
        return [plain(row["messages"])], None
    turns, names = need(row, "conversations", list), {v: k for k, v in ROLES.items()}
    turns = [turn if isinstance(turn, dict) else {} for turn in turns]
    if (mask := row.get("mask") or "User") != "User":
        raise ValueError(f"mask is {mask!r}: only 'User' is built, which trains the assistant")
    if row.get("type") and any(turn.get("label") is not None for turn in turns):
        raise ValueError(f"type is {row['type']!r}: conditioning on labels is not built")
    said = [(str(turn.get("from")), turn.get("value")) for turn in turns]
    chat = [{"role": names.get(role, role), "content": text} for role, text in said]
    return [[{"role": "system", "content": row.get("system") or ""}, *chat]], None


def read_preference(row: dict[str, Any], rewards: bool) -> Example:
    """NeMo's {"prompt", "chosen_response", "rejected_response"}: a templated prompt and answers
    that end with the next turn's mark, or messages and plain answers. Or {"chosen", "rejected"},
    plain answers or messages, perhaps whole conversations, with a "prompt", plain or messages."""
    nemo = "chosen_response" in row or "rejected_response" in row
    given = plain(need(row, "prompt") if nemo else row.get("prompt", row.get("messages", [])))
    sides = [plain(need(row, side + "_response" * nemo)) for side in ("chosen", "rejected")]
    if nemo and isinstance(given, str):
        chats = [parse_chat(f"{given}{side}", "<extra_id_1>") for side in sides]
        given = parse_chat(given, TO_ANSWER)
    else:
        given = given if isinstance(given, list) else [{"role": "user", "content": given}]
        said = [s if isinstance(s, list) else [{"role": "assistant", "content": s}] for s in sides]
        if not given and min(map(len, said)) < 2:
            need(row, "prompt")
        chats = [side if len(side) > 1 else [*given, *side] for side in said]
    if any(chat[:-1] != chats[0][:-1] or given != chat[-1 - len(given) : -1] for chat in chats):
        raise ValueError("chosen and rejected do not answer the same prompt")
    if chats[0] == chats[1]:
        raise ValueError("chosen and rejected are equal")
    names = ("chosen_reward", "rejected_reward")
    if rewards or any(row.get(name) is not None for name in names):
        return chats, numbers([need(row, name) for name in names], names)
    return chats, None


def read_scored(row: dict[str, Any], n_attributes: int) -> Example:
    """NeMo's {"text" in the template, "label"}, {"messages", "label"}, or HelpSteer2's columns,
    whose prompt has its earlier turns in the template."""
    if "messages" in row:
        chat, label = plain(row["messages"]), need(row, "label", list)
    elif "text" in row or "label" in row:
        chat, label = parse_chat(need(row, "text", str), "<extra_id_2>"), need(row, "label", list)
    else:
        before = f"<extra_id_0>System\n\n<extra_id_1>User\n{need(row, 'prompt', str)}\n{TO_ANSWER}"
        answer = {"role": "assistant", "content": need(row, "response", str)}
        chat = [*parse_chat(before, TO_ANSWER)[1:], answer]
        label = [need(row, name) for name in ATTRIBUTES]
    if len(label) not in (5, 9):
        raise ValueError(f"label has {len(label)} values, not 5 or 9")
    values = numbers(label, NINE_ATTRIBUTES[-len(label) :])
    values = np.append(np.full(4, IGNORE, np.float32), values)[-n_attributes:]
    if (values == IGNORE).all():
        raise ValueError(f"none of the {n_attributes} attributes is labelled")
    return [chat], values


def check_answers(messages: Messages) -> None:
    check_messages(messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"messages[{i}] is an empty response")


def render_answer(messages: Messages, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """As render_chat, with the last answer alone trained."""
    ids, trained = render_chat(messages, tokenizer)
    trained[: len(render_chat(messages[:-1], tokenizer)[0])] = False
    return ids, trained


def render_judged(messages: Messages, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """As render_reward, with nothing trained. An empty system turn is none: the reward model has
    its own."""
    messages = messages[1:] if messages[0] == {"role": "system", "content": ""} else messages
    ids = render_reward(messages, tokenizer)
    return ids, np.zeros(len(ids), bool)


def json_object(line: bytes | BadDocument) -> dict[str, Any]:
    if isinstance(line, BadDocument):
        raise line
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not JSON ({e})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not an object")
    if b"\\ud" in line.lower():
        json.dumps(row, ensure_ascii=False).encode()  # UnicodeEncodeError for a lone surrogate
    return row


def without_first_exchange(messages: Messages) -> Messages:
    n = messages[0]["role"] == "system"
    return messages[:n] + messages[n + 2 :]


def read_rows(
    path: str | Path,
    read: Callable[[dict[str, Any]], Example],
    render: Callable[[Messages], tuple[np.ndarray, np.ndarray]],
    seq_len: int,
    window: int = 0,
    skip_bad: bool = False,
    shorten: bool = False,
) -> Rows:
    """The rows with segments of at most seq_len tokens, `window` (0: seq_len) together, and counts:
    bad ones end the run unless skip_bad; those too long are left out, or with `shorten` lose their
    earliest exchanges. No answer is ever cut."""
    rows, counts = [], dict(bad=0, long=0, shortened=0)
    for where, line in numbered_lines(Path(path)):
        try:
            chats, values = read(json_object(line))
            for chat in chats:
                check_answers(chat)
        except ValueError as e:
            bad = e if isinstance(e, BadDocument) else BadDocument(where, f"{e}: mend the line")
            if not skip_bad:
                raise bad from None
            log.warning(f"left out: {bad}")
            counts["bad"] += 1
            continue
        for cuts in range(len(chats[0]) // 2 if shorten else 1):
            chats = [without_first_exchange(chat) for chat in chats] if cuts else chats
            row = Row(*zip(*map(render, chats), strict=True), values, where)
            if max(map(len, row.ids)) <= seq_len and row.length <= (window or seq_len):
                rows.append(row)
                counts["shortened"] += cuts > 0
                break
        else:
            counts["long"] += 1
    found = ", ".join(f"{count:,} {what}" for what, count in counts.items())
    if not rows:
        raise ValueError(f"{path}: no row left ({found}): allow longer ones, or look at the file")
    log.info(f"{path}: {len(rows):,} rows; {found}")
    return rows, counts


def sft_rows(path: str | Path, tokenizer: Tokenizer, seq_len: int, **options: Any) -> Rows:
    """Conversations; every turn of the assistant is trained. options: read_rows'."""
    return read_rows(path, read_chat, partial(render_chat, tokenizer=tokenizer), seq_len, **options)


def preference_rows(
    path: str | Path,
    tokenizer: Tokenizer,
    seq_len: int,
    rewards: bool = False,
    judged: bool = False,
    **options: Any,
) -> Rows:
    """Pairs. rewards: a row must have its two, there is no default; judged: in a reward model's
    rendering. options: read_rows'."""
    read = partial(read_preference, rewards=rewards)
    render = partial(render_judged if judged else render_answer, tokenizer=tokenizer)
    return read_rows(path, read, render, seq_len, **options)


def reward_rows(
    path: str | Path, tokenizer: Tokenizer, seq_len: int, n_attributes: int = 5, **options: Any
) -> Rows:
    """Scored responses. A label of nine for five attributes loses its first four, one of five for
    nine has them masked. options: read_rows'."""
    if n_attributes not in (5, 9):
        raise ValueError(f"n_attributes={n_attributes}: 5 or 9")
    read = partial(read_scored, n_attributes=n_attributes)
    return read_rows(path, read, partial(render_judged, tokenizer=tokenizer), seq_len, **options)


def show_row(row: Row, tokenizer: Tokenizer) -> str:
    """A row as text for a terminal, what is trained in green."""
    out = ""
    for ids, trained in zip(row.ids, row.trained, strict=True):
        cuts = np.flatnonzero(np.diff(trained)) + 1
        for run, green in zip(np.split(ids, cuts), np.split(trained, cuts), strict=True):
            text = tokenizer.decode(run).replace("\x1b", "␛")  # a text must not steer the terminal
            out += f"\x1b[32m{text}\x1b[0m" if green[0] else text
        out += "\n"
    return out


# ---- packing -------------------------------------------------------------------------------------


def fill(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which rows share a window of `room` tokens, each of at most that: longest first, each where
    it leaves least room. A function of the lengths alone."""
    windows, of_room, rooms = [], {}, 0  # rooms: bit r is set where a window has r places left
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if enough := rooms >> lengths[i]:
            left = lengths[i] + (enough & -enough).bit_length() - 1
            w = of_room[left].pop()
            rooms ^= 0 if of_room[left] else 1 << left
        else:
            w, left = len(windows), room
            windows.append([])
        windows[w].append(i)
        left -= lengths[i]
        of_room.setdefault(left, []).append(w)
        rooms |= 1 << left
    return windows


def pack(
    rows: Sequence[Row], window: int, packed: bool = True, multiple: int = 1
) -> dict[str, np.ndarray]:
    """Rows of one kind → W windows of T = window tokens: packed, or one a window; then empty ones
    up to a multiple of `multiple`. With row s of its window made of n segments:

    tokens, positions (from 0 in each segment), targets (the next token where that is trained, else
    IGNORE), documents (n s + k in segment k of row s, -1 in padding): int64 (W, T)
    rows: number of row s, -1 for none (W, S); ends: last token of each segment (W, S, n)
    if all rows have values, rewards (W, S, 2) or labels (W, S, 5 or 9), float32, IGNORE for none
    """
    for row in rows:
        if row.length > window:
            raise ValueError(f"{row.where}: {row.length} tokens in a window of {window}: drop it")
    members = fill([r.length for r in rows], window) if packed else [[i] for i in range(len(rows))]
    n, shape = len(rows[0].ids), (-(-len(members) // multiple) * multiple, window)
    slots = (shape[0], max(map(len, members)))
    out = {"tokens": np.zeros(shape, np.int64), "targets": np.full(shape, IGNORE)}
    out |= {"positions": np.zeros(shape, np.int64), "documents": np.full(shape, -1)}
    out |= {"rows": np.full(slots, -1), "ends": np.zeros((*slots, n), np.int64)}
    for w, inside in enumerate(members):
        out["rows"][w, : len(inside)], at = inside, 0
        for d in range(len(inside) * n):
            row, k = rows[inside[d // n]], d % n
            ids, part = row.ids[k], slice(at, at + len(row.ids[k]))
            out["tokens"][w, part], out["documents"][w, part] = ids, d
            out["positions"][w, part] = np.arange(len(ids))
            out["targets"][w, part][:-1] = np.where(row.trained[k][1:], ids[1:], IGNORE)
            at += len(ids)
            out["ends"][w, d // n, k] = at - 1
    if all(row.values is not None for row in rows):
        values = np.full((*slots, len(rows[0].values)), IGNORE, np.float32)
        values[out["rows"] >= 0] = [rows[i].values for inside in members for i in inside]
        out["rewards" if n == 2 else "labels"] = values
    return out


# ---- lists in a model's answer -------------------------------------------------------------------

LABEL = r"(?:Q|Question|(?:Sub)?[Tt]opic|Item|Idea|Prompt|Problem|Task|Exercise|Step|No\.)"
MARK = re.compile(
    rf"""(?P<indent>[ ]*)(?:>\s?)*(?:\#+\s+)?(?P<bold>\*\*|__)?(?:
    (?P<digit>\(?\d{{1,3}}[.)](?!\d)|\[\d{{1,3}}\](?!\()|\d{{1,3}}:(?!\d)|\d{{1,3}}[ ]?[-–—](?=\s)
        |\#\d{{1,3}}\b[.:)]?|[①-⑳]|\d\ufe0f?\u20e3
        |{LABEL}[ ]?\#?\d{{1,3}}[ ]?(?:[.:)]|[-–—](?=\s)))
    |(?P<letter>\(?(?:[a-zA-Z]|[ivxIVX]{{2,5}})[.)](?=\s))
    |(?P<bullet>[-*+•–—▪◦‣●○■✓✔✅➤►→⁃·🔹🔸]\ufe0f?(?=\s|$)(?:[ ]\[[ xX]\])?|[-•▪●](?=[^\W\d]|["“]))
    )(?P<close>\*\*|__)?\s*(?P<text>.*)""",
    re.VERBOSE,
)
HEADING = r"#+\s+(\S.*)|(\*\*|__)((?:(?!\2).)+)\2:?"
INTRO = (
    r"(?i:(sure|certainly|of course|absolutely|ok(ay)?|great)([,.!].*)?|here (are|is)\b.*[.!]|.*:)"
)
OUTRO = (
    r"(?i:(let me know|i hope|hope th(is|at)|feel free|these (are|\w+ (are|should))|note( that|:)"
    r"|good luck|i can also|(would you like|do you want) (me|more|any)|\(?please (let|note|feel)"
    r"|if you([’']d| need| want| have any)|enjoy( th(is|ese)|!)|happy \w+ing)(?!\w).*)"
)
REFUSAL = (
    r"(?i:sorry|unfortunately|as an ai|i([’']m| am) (sorry|afraid|unable|not able)"
    r"|i (can[’']?t|cannot|do not|don[’']?t|won[’']?t)\b)"
)
END = re.compile(rf"{HEADING}|[-=*_]{{3,}}|{OUTRO}")  # of an item, where not indented
QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`", "„": "“", "「": "」"}


def parse_list(text: str) -> list[str]:
    """The items of a list in a model's answer, in whatever shape it came; [] if there is none, and
    a model is to be asked again. Nothing is typed ("1984", "Yes" and "a: b" stay texts), and no
    word is in an item that is not in the answer."""
    text = re.sub(r"(?s)^.*</think>", "", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = re.sub("[\0\ufeff\u200b\u2060]", "", text).replace("\u00a0", " ").expandtabs(4)
    if not (items := json_items(text)):
        text = fenced_lines(table_lines(html_lines(text)))
        lines = [part for line in text.split("\n") for part in one_item_a_line(line)]
        items = marked_items(lines) or plain_items(lines)
    items = [item for item in map(clean_item, items) if re.search(r"\w", item)]
    key = re.match(r"([a-z_]+): ", items[0]) if len(items) > 1 else None
    if key and all(item.startswith(key[0]) for item in items):  # a YAML list of mappings
        items = [clean_item(item.removeprefix(key[0])) for item in items]
    return items


def json_items(text: str) -> list[str]:
    """Of a JSON or Python list that ends a line: an array of texts or of objects with a text, or an
    object with a list or with numbered texts."""
    as_json = partial(json.loads, parse_float=str, parse_int=str, parse_constant=str)
    readers = (as_json, ast.literal_eval)  # this for single quotes and a comma after the last item
    starts = [m.end() - 1 for m in re.finditer(r"(?m)^[ >]*[\[{]|(?<=[:=]) *\[", text)]
    ends = [m.end() for m in re.finditer(r"(?m)[\]}](?=[ ;.`]*$)", text)]
    # each try may read the whole text
    for start, end, read in itertools.product(starts[:8], ends[:-3:-1], readers):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            if items := texts_of(read(text[start:end])):
                return items
    return []


def texts_of(value: Any) -> list[str]:
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        numbered = all(re.search(r"\d$", str(k)) for k in value)
        value = lists[0] if len(lists) == 1 else [*value.values()] if numbered else []
    items = []
    for item in value if isinstance(value, list) else []:
        if isinstance(item, dict):
            item = ": ".join(v for v in item.values() if isinstance(v, str) and not v.isdigit())
        items += [str(item)] if isinstance(item, str | int | float) else []
    return items


def html_lines(text: str) -> str:
    """<li> as bullets, indented by their depth; other tags left out."""
    depth = 0

    def as_text(tag: re.Match[str]) -> str:
        nonlocal depth
        name = (tag[1] or "").lower()
        depth = max(0, depth + {"<ul": 1, "<ol": 1, "</ul": -1, "</ol": -1}.get(name, 0))
        if name == "<li":
            return "\n" + "    " * (depth - 1) + "- "
        return "" if not name else " " if depth else "\n\n"

    if not re.search(r"(?i)<li\b", text):
        return text
    tags = r"(?i)\s*(</?(?:ul|ol|li|p|br|div|h[1-3]))\b[^<>]*>\s*|</?\w[^<>]*>"
    return html.unescape(re.sub(tags, as_text, text))


def table_lines(text: str) -> str:
    """A table's rows as "- cell: cell", without its header and cells with a number."""

    def rows(table: re.Match[str]) -> str:
        out = ""
        for line in table[1].splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            words = [cell for cell in cells if cell and not re.fullmatch(r"#?\d+[.)]?", cell)]
            out += "- " + ": ".join(words or cells) + "\n"
        return out

    return re.sub(r"(?m)^[^|\n]*\|.*\n(?=.*-)[ |:-]+\n((?:[^|\n]*\|.*(?:\n|\Z))*)", rows, text)


def fenced_lines(text: str) -> str:
    """What is in the only fence, where no item is outside; else what is in a fence as one line that
    begins with a \0, and its line ends as more of them."""
    parts = re.split(r"(?m)^ *(?:```|~~~).*\n?", text)  # outside, inside, outside, …
    if len(parts) in (2, 3) and not any(map(MARK.fullmatch, "\n".join(parts[::2]).split("\n"))):
        return textwrap.dedent(parts[1])
    parts[1::2] = ["\0" + part.rstrip("\n").replace("\n", "\0") + "\n" for part in parts[1::2]]
    return "".join(parts)


def one_item_a_line(line: str) -> list[str]:
    """Where 1. … 2. …, or • … • …, are on one."""
    starts = []
    for match in re.finditer(r"(?:^|(?<=\s))\(?(\d{1,3})[.)]\s", line):
        starts += [match.start()] if int(match[1]) == len(starts) + 1 else []
    if len(starts) < 2:
        starts = [match.start() for match in re.finditer(r"(?:^|(?<=\s))[•▪●]", line)]
    if len(starts) < 2:
        return [line.rstrip()]
    parts = (line[a:b] for a, b in itertools.pairwise([0, *starts, None]))
    return [part for part in parts if part.strip()]


def marked_items(lines: list[str]) -> list[str]:
    """Items with marks like the first one's, each with its further lines and what is below it."""
    blocks: list[list[str]] = []
    first = None  # its style and indent
    for line in lines:
        mark = MARK.fullmatch(line)
        style = mark and next(s for s in ("digit", "letter", "bullet") if mark[s])
        if mark and (not first or style == first[0] and len(mark["indent"]) < first[1] + 2):
            first = first or (style, len(mark["indent"]))
            opened = mark["bold"] if mark["bold"] and not mark["close"] else ""
            blocks.append([opened + mark["text"].strip()])
        elif blocks:
            blocks[-1].append(line)
    if not first:
        return []
    items, below = zip(*map(item_of, blocks), strict=True)
    if sum(map(bool, below[:-1])) * 2 < len(items) or len(items) == 1:
        below = (*below[:-1], "")  # these are the answer's last words
    return list(map(joined, items, below))


def item_of(block: list[str]) -> tuple[str, str]:
    """(an item, the paragraphs below it that are not indented), up to a heading or last words."""
    item, below, blank = block[0], "", False
    for line in block[1:]:
        text = line.strip()
        flush = item and text and not line.startswith(" ")
        if text.startswith("\0"):
            item += text
        elif mark := MARK.fullmatch(line):
            item += ("" if re.search(r"[.:;,?!]\W*$", item) else ";") + " " + mark["text"].strip()
        elif flush and (END.fullmatch(text) or blank and text.endswith(":")):
            break
        elif flush and blank:
            below = f"{below} {text}".strip()
        else:
            item = joined(item, text)
        blank = not text
    return item, below


def joined(first: str, more: str) -> str:
    """Two lines of an item; a bold one is a title."""
    title = re.fullmatch(r"(\*\*|__)(.+?)\1", first)
    if title and more:
        first = title[2] + ("" if title[2][-1] in ".:?!" else ":")
    return f"{first} {more}".strip()


def plain_items(lines: list[str]) -> list[str]:
    """Items without marks: below headings, one a paragraph, one a line, or between commas."""
    text = re.sub(r"\n\n+", "\n\n", "\n".join(map(str.strip, lines)).strip())
    text = re.sub(rf"^{INTRO}\n+|(\n\n?{OUTRO}|\n\n{OUTRO}(\n.+)+)+$", "", text)
    bullets = re.sub(rf"(?m)^(?:{HEADING})$", r"- **\1\3**", text)
    bare = re.search(r"(?m)^- \*\*.*(\n+- \*\*|\Z)", bullets)
    if len(re.findall(r"(?m)^- \*\*", bullets)) > 1 and not bare:
        return marked_items(bullets.split("\n"))
    if "\n" not in text:
        return comma_items(text)
    paragraphs = text.split("\n\n")
    if len(paragraphs) > 1 and all("\n" in paragraph for paragraph in paragraphs):
        items = [paragraph.replace("\n", " ") for paragraph in paragraphs]
    else:
        wrapped = r"(?m)^(.{50,}[^.?!:;,\"\n])\n(?=[a-zß-ÿа-я])"
        items = [line for line in re.sub(wrapped, r"\1 ", text).split("\n") if line]
    prose = sum(len(re.findall(r"[.?!](?=\s|$)", item)) > 2 for item in items) * 2 > len(items)
    return [] if prose or re.match(REFUSAL, text) else items


def comma_items(line: str) -> list[str]:
    intro, _, rest = line.partition(":")
    line = " ".join((rest if rest and len(intro.split()) > 2 else line).split())
    parts = [part.rstrip(".") for part in re.split(r" ?[;；,，、] ?| \| ", line) if part]
    parts = [re.sub(r"^(and|or|&) ", "", part) for part in parts]
    short = all(len(part.split()) < 8 and not re.search(r"[.?!] ", part) for part in parts)
    talk = re.match(rf"{REFUSAL}|(?i:(i|i[’']m|yes|no|well|as)\b)", line)
    return parts if len(parts) > 2 and short and not talk else []


def clean_item(item: str) -> str:
    """Without the marks around it or its title: emphasis, quotes, a separator, YAML's | and >."""
    item, before = item.replace("\0", "\n") if "\0" in item else " ".join(item.split()), None
    while item != before:
        before = item = item.strip()
        item = re.sub(r"^[|>][-+]? |<br ?/?>$|\\$", "", item)
        item = re.sub(r"^(\*\*|__)(?=\S)(.+?)\1(?!\w)", r"\2", item)
        item = re.sub(r"^([*_])(?=[^\s*_])([^*_]+)\1$", r"\2", item)
        item = re.sub(r"(?<=[\"'”’`])[,;]$", "", item)
        close, inside = QUOTES.get(item[:1]), item[1:-1]
        if len(item) > 2 and close == item[-1]:
            bare = re.sub(rf"\\{close}|{close * 2}|(?<=\w)['’](?=\w)", "", inside)
            if close not in bare and item[0] not in bare:
                item = inside.replace("\\" + close, close).replace("''", "'")
    return item


# ---- duplicates and decontamination --------------------------------------------------------------

# between numbers these are operators: "2 - 2" and "2 * 2" are not the same question
OPERATORS = {"-": "−", "*": "×", "/": "÷"}


@cache
def plain_char(char: str) -> str:
    """Marks and control characters become spaces, signs words, apostrophes nothing."""
    kind = unicodedata.category(char)
    if kind in ("Sm", "Sc", "So") or char in "%^":
        return f" {char} "
    return "" if char in "'’" else " " if kind[0] in "PSZC" else char


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces, NFKC; what counts in a sum (+ % $ -3) stays."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    text = re.sub(r"(?<=\d)\s*[-*/]|[-*/](?=\s*\d)", lambda m: OPERATORS[m[0].strip()], text)
    return " ".join("".join(map(plain_char, text)).split())


def shingles(text: str, n: int = 5) -> set[str]:
    """Word n-grams; a shorter text is one."""
    words = text.split()
    return {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def near_duplicates(texts: Sequence[str], threshold: float = 0.7) -> list[tuple[int, float] | None]:
    """For each text the earlier kept one that it repeats most, the first of equals, and the Jaccard
    index of their word 5-grams; None if it is kept. Exact: two such sets share `threshold` of each
    one's grams, so one at least among its rarest 1 - threshold and the next, which alone are looked
    up."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: a Jaccard index, 0 < threshold <= 1")
    grams = [shingles(normalise(text) or text.strip()) for text in texts]
    count = Counter(itertools.chain.from_iterable(grams))
    having = defaultdict(list)  # gram → kept texts that have it among their rarest
    out = []
    for i, own in enumerate(grams):
        by_rarity = sorted(own, key=lambda gram: (count[gram], gram))
        rare = by_rarity[: len(own) - int(threshold * len(own)) + 1]
        near = {j for gram in rare for j in having[gram]}
        best, j = max(((jaccard(own, grams[j]), -j) for j in near), default=(0.0, 0))
        out.append((-j, best) if best >= threshold else None)
        if out[-1] is None:
            for gram in rare:
                having[gram].append(i)
    return out


def strings_in(value: Any) -> list[str]:
    if isinstance(value, list | dict):
        parts = value.values() if isinstance(value, dict) else value
        return [text for part in parts for text in strings_in(part)]
    return [value] if isinstance(value, str) else []


def read_evaluations(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """("FILE:LINE", text) of every text in the JSONL files of evaluation items."""
    out = []
    for where, line in itertools.chain.from_iterable(map(numbered_lines, map(Path, paths))):
        try:
            out += [(where, text) for text in strings_in(json_object(line))]
        except ValueError as e:
            raise e if isinstance(e, BadDocument) else ValueError(f"{where}: {e}") from None
    return out


class Decontaminator:
    """Finds what a text shares with evaluation items: 13 words in a row, or 8 with an item of
    fewer than 13; an item of 4 to 7 words only if it is the whole text."""

    def __init__(self, evaluations: Iterable[tuple[str, str]]) -> None:
        self.sources: dict[str, str] = {}  # n-gram → FILE:LINE
        for where, text in evaluations:
            plain = normalise(text)
            if (n := len(plain.split())) >= 4:
                for gram in shingles(plain, 13 if n >= 13 else 8):
                    self.sources.setdefault(gram, where)

    def evidence(self, text: str) -> str | None:
        """The first hit as FILE:LINE: "the shared n-gram"."""
        words = normalise(text).split()
        places = ((i, n) for i in range(len(words)) for n in (8, 13) if i + n <= len(words))
        grams = [" ".join(words), *(" ".join(words[i : i + n]) for i, n in places)]
        hit = next((gram for gram in grams if gram in self.sources), None)
        return hit and f'{self.sources[hit]}: "{hit}"'


# ---- verifiable instructions ---------------------------------------------------------------------
# IFEval's 25 kinds (arXiv 2311.07911) by its names and with its arguments, so that its own
# verifiers can mark the same answers; the wording is ours, and nothing is drawn while marking.

# none within another, none with the letters j, q, x, z, none in an ending
WORDS = """
    river market garden winter bridge letter island morning engine village mountain kitchen library
    captain harbor forest silver window planet doctor teacher summer history machine"""
KEYWORDS = WORDS.split()
ENDINGS = ("That is all for now.", "Ask me again any time.", "I hope that helps!", "Over to you.")
POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
VERDICTS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
# code: (name, common words, or the letters that only it has among these)
LANGUAGES = {
    "en": ("English", "the and of to is that it with for was are this you be have not from"),
    "de": ("German", "der die und das ist nicht ein eine mit zu den auf für es sich von sind"),
    "fr": ("French", "le la les et des est une un dans que pour qui pas sur au avec sont du"),
    "es": ("Spanish", "el la los y de que es en una un por con para las se no del como"),
    "it": ("Italian", "il la di che è e un una per non con sono gli della le si nel più"),
    "pt": ("Portuguese", "o a os que é em um uma para com não do da as se no na mais"),
    "nl": ("Dutch", "de het een en van is dat niet op te zijn voor met er aan ook die"),
    "ru": ("Russian", "[а-яё]"),
    "el": ("Greek", "[α-ωά-ώ]"),
    "ar": ("Arabic", "[ء-ي]"),
    "hi": ("Hindi", "[ऀ-ॿ]"),
    "ko": ("Korean", "[가-힣]"),
    "ja": ("Japanese", "[ぁ-ヿ]"),
    "zh": ("Chinese", "[一-鿿]"),
}
COMMON = {code: {*words.split()} for code, (_, words) in LANGUAGES.items() if words[0] != "["}
RELATIONS = ("less than", "at least")
# by the last word of an argument's name
CLOSED = {"relation": RELATIONS, "language": LANGUAGES, "marker": POSTSCRIPTS}


def language_of(text: str) -> str | None:
    """A code of LANGUAGES: by script, else by common words; None if neither decides."""
    text = text.lower()
    counts = {c: len(re.findall(LANGUAGES[c][1], text)) for c in LANGUAGES if c not in COMMON}
    if counts["ja"] * 10 > counts["zh"]:  # kana between the characters
        counts["ja"] += counts.pop("zh")
    code = max(counts, key=counts.__getitem__)
    if counts[code] * 2 > sum(map(str.isalpha, text)):
        return code
    words = re.findall(r"[^\W\d_]+", text)
    hits = {code: sum(word in common for word in words) for code, common in COMMON.items()}
    first, second, *_ = sorted(hits, key=hits.__getitem__, reverse=True)
    return first if hits[first] > max(hits[second], len(words) / 12) else None


def enough(n: int, relation: str, least: int) -> bool:
    return n < least if relation == "less than" else n >= least


def count_sentences(text: str) -> int:
    """Ends of sentences, and a last one without; a line's end is none, nor is the dot of a list's
    number, an initial or a common abbreviation."""
    short = r"(?:\d{1,3}|[a-z]|(?:[a-z]\.){1,3}[a-z]|mr|mrs|ms|dr|prof|st|vs|etc|no|jr)\."
    text = re.sub(r"(?m)^[ \t]*[-*•]\s", "", text)
    text = re.sub(rf"(?i)(?<!\w){short}(?=\s+\S)", "", text)
    parts = re.split(r"[.!?]+[\"”’')\]*_]*(?=\s|$)|[。！？]+[」』”]*", text)
    return sum(bool(re.search(r"\w", part)) for part in parts)


def parts_between(marks: str, text: str) -> list[str]:
    """None may be empty but what is outside the first and last mark; else there are no parts."""
    parts = [part.strip() for part in re.split(marks, text)]
    inner = parts[not parts[0] : len(parts) - (not parts[-1])]
    return inner if all(inner) else []


def nth_paragraph(text: str, n: int, nth: int, first_word: str) -> bool:
    parts = text.split("\n\n")
    begins = rf"(?i)\s*'*\"*{re.escape(first_word)}(?![^\s.,?!'\"])"
    right = nth <= len(parts) and re.match(begins, parts[nth - 1])
    return bool(right) and sum(bool(part.strip()) for part in parts) == n


def count_highlights(text: str) -> int:
    marked = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(mark.strip("*").strip()) for mark in marked)


def count_capital_words(text: str) -> int:
    return sum(map(str.isupper, re.findall(r"[^\W_]+(?:[-.][^\W_]+)*", text)))


def is_json(text: str) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(re.sub(r"^```(?:json|Json|JSON)?|```$", "", text.strip()).strip())
        return True
    return False


class Kind(NamedTuple):
    args: dict[str, Any]
    """What each is drawn from: a sequence, a dict of sequences by the first argument's value, or
    a number of words that no other instruction has. Such that all other kinds can be followed."""
    text: str
    """Asks for it."""
    met: Callable[..., bool]
    """Whether an answer follows it: of the answer and the arguments in their order."""


def bounded(n: str, less: Sequence[int], least: Sequence[int], of: str = "") -> dict[str, Any]:
    """Arguments: how a number bounds, and which it is."""
    return {f"{of}relation": RELATIONS, n: dict(zip(RELATIONS, (less, least), strict=True))}


REPEAT = "combination:repeat_prompt"
# fmt: off
KINDS: dict[str, Kind] = {
    "keywords:existence": Kind({"keywords": 2}, "Use each of these words: {keywords}.",
        lambda t, words: all(word.lower() in t.lower() for word in words)),
    "keywords:frequency": Kind({**bounded("frequency", (2, 3), (2, 3)), "keyword": 1},
        'Use the word "{keyword}" {relation} {frequency} times.',
        lambda t, relation, n, word: enough(t.lower().count(word.lower()), relation, n)),
    "keywords:forbidden_words": Kind({"forbidden_words": 2},
        "Do without these words: {forbidden_words}.",
        lambda t, words: not re.search(rf"(?i)\b({'|'.join(map(re.escape, words))})\b", t)),
    "keywords:letter_frequency": Kind(
        {**bounded("let_frequency", range(1, 5), range(5, 30), "let_"),
         "letter": {"less than": "jqxz", "at least": "etaoinsr"}},
        'Use the letter "{letter}" {let_relation} {let_frequency} times in all.',
        lambda t, relation, n, letter: enough(t.lower().count(letter.lower()), relation, n)),
    "language:response_language": Kind({"language": [*LANGUAGES]},
        "Answer in {language} and in no other language.",
        lambda t, language: language_of(t) == language),
    "length_constraints:number_sentences": Kind(
        bounded("num_sentences", range(6, 16), range(3, 13)),
        "Write {relation} {num_sentences} sentences.",
        lambda t, relation, n: enough(count_sentences(t), relation, n)),
    "length_constraints:number_paragraphs": Kind({"num_paragraphs": range(2, 6)},
        "Write exactly {num_paragraphs} paragraphs, with a line of *** between any two of them.",
        lambda t, n: len(parts_between(r"\s?\*\*\*\s?", t)) == n),
    "length_constraints:number_words": Kind(
        bounded("num_words", range(200, 500, 10), range(50, 350, 10)),
        "Write {relation} {num_words} words.",
        lambda t, relation, n: enough(len(re.findall(r"\w+", t)), relation, n)),
    "length_constraints:nth_paragraph_first_word": Kind(
        {"num_paragraphs": range(2, 6), "nth_paragraph": {n: range(1, n + 1) for n in range(2, 6)},
         "first_word": 1},
        "Write exactly {num_paragraphs} paragraphs, with an empty line between any two of them and "
        'nowhere else, and begin paragraph {nth_paragraph} with the word "{first_word}".',
        nth_paragraph),
    "detectable_content:number_placeholders": Kind({"num_placeholders": range(1, 5)},
        "Leave {num_placeholders} or more gaps to be filled in, in square brackets, as in [name].",
        lambda t, n: len(re.findall(r"\[.*?\]", t)) >= n),
    "detectable_content:postscript": Kind({"postscript_marker": [*POSTSCRIPTS]},
        "Close with a postscript that begins with {postscript_marker}",
        lambda t, marker: bool(re.search(POSTSCRIPTS[marker], t.lower()))),
    "detectable_format:number_bullet_lists": Kind({"num_bullets": range(2, 6)},
        "Include exactly {num_bullets} bullet points, each a line that begins with * and a space.",
        lambda t, n: len(re.findall(r"(?m)^[^\S\n]*(?:\*[^*]|-).*$", t)) == n),
    "detectable_format:constrained_response": Kind({},
        "Choose your answer among these: " + " ".join(VERDICTS),
        lambda t: any(verdict in t for verdict in VERDICTS)),
    "detectable_format:number_highlighted_sections": Kind({"num_highlights": range(1, 5)},
        "Emphasise {num_highlights} or more passages by asterisks, *like this*.",
        lambda t, n: count_highlights(t) >= n),
    "detectable_format:multiple_sections": Kind(
        {"section_spliter": ("Section", "SECTION"), "num_sections": range(2, 6)},
        "Divide your answer into {num_sections} or more sections, headed {section_spliter} 1, "
        "{section_spliter} 2 and so on.",
        lambda t, name, n: len(re.findall(rf"{re.escape(name)}\s?\d+", t)) >= n),
    "detectable_format:json_format": Kind({},
        "Give the whole answer as JSON, in a code block if you like.", is_json),
    "detectable_format:title": Kind({},
        "Give your answer a title in double angle brackets, as in <<my day>>.",
        lambda t: any(title.strip("<> \t") for title in re.findall(r"<<[^\n]+>>", t))),
    "combination:two_responses": Kind({},
        "Give two different answers and nothing else, with ****** (six asterisks) between them.",
        lambda t: len(parts := parts_between(r"\*{6}", t)) == len({*parts}) == 2),
    REPEAT: Kind({"prompt_to_repeat": ()},
        "Before you answer, repeat the request above this sentence word for word, with nothing "
        "before it.",
        lambda t, prompt: t.strip().lower().startswith(prompt.strip().lower() or "\0")),
    "startend:end_checker": Kind({"end_phrase": ENDINGS},
        'End with the words "{end_phrase}" and nothing after them.',
        lambda t, end: t.strip().strip('"').lower().endswith(end.strip().lower())),
    "change_case:capital_word_frequency": Kind(
        bounded("capital_frequency", range(4, 12), range(2, 12), "capital_"),
        "Use words in capital letters {capital_relation} {capital_frequency} times.",
        lambda t, relation, n: enough(count_capital_words(t), relation, n)),
    "change_case:english_capital": Kind({}, "Answer in English, in capital letters alone.",
        lambda t: t.isupper() and language_of(t) == "en"),
    "change_case:english_lowercase": Kind({},
        "Answer in English, in small letters alone, without any capital.",
        lambda t: t.islower() and language_of(t) == "en"),
    "punctuation:no_comma": Kind({}, "Do without commas.", lambda t: "," not in t),
    "startend:quotation": Kind({}, "Put your whole answer in double quotation marks.",
        lambda t: bool(re.fullmatch(r'(?s)".*"', t.strip()))),
}
# fmt: on

# the kinds that go with few others, and groups of which any two exclude one another
ONLY_WITH = {
    "constrained_response": "",
    "json_format": "existence forbidden_words",
    "two_responses": "existence forbidden_words title no_comma",
    "repeat_prompt": "existence title",
    # nothing with English words, or that counts words or letters
    "response_language": "number_sentences number_paragraphs number_placeholders postscript "
    "number_bullet_lists number_highlighted_sections title no_comma quotation",
}
EXCLUSIVE = (
    {"number_paragraphs", "nth_paragraph_first_word"},
    {"capital_word_frequency", "english_capital", "english_lowercase", "multiple_sections"},
)


def compatible(a: str, b: str) -> bool:
    """Whether one answer can follow instructions of both kinds, whatever their arguments."""
    a, b = (kind.partition(":")[2] for kind in (a, b))
    if a == b or any({a, b} <= group for group in EXCLUSIVE):
        return False
    return b in ONLY_WITH.get(a, b).split() and a in ONLY_WITH.get(b, a).split()


@dataclass(frozen=True)
class Instruction:
    """An instruction that writes itself into a prompt and verifies itself in an answer."""

    kind: str
    args: tuple[tuple[str, Any], ...] = ()
    """IFEval's keyword arguments, lists as tuples."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"instruction {self.kind!r} is none of {[*KINDS]}")
        args, takes = dict(self.args), KINDS[self.kind].args
        if args.keys() - takes or takes.keys() - args - {"prompt_to_repeat"}:
            raise ValueError(f"instruction {self.kind!r} takes arguments {[*takes]}, not {[*args]}")
        for name, value in args.items():
            known = CLOSED.get(name.rpartition("_")[2], [value])
            if value not in known:
                raise ValueError(f"{self.kind}: {name} is {value!r}, not one of {[*known]}")

    @classmethod
    def from_json(cls, obj: dict[str, Any]) -> "Instruction":
        args = {k: tuple(v) if isinstance(v, list) else v for k, v in obj["args"].items()}
        return cls(obj["kind"], tuple(args.items()))

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "args": dict(self.args)}

    @property
    def text(self) -> str:
        """The sentence for the prompt."""
        shown = {k: ", ".join(v) if isinstance(v, tuple) else v for k, v in self.args}
        shown = {k: "fewer than" if v == "less than" else v for k, v in shown.items()}
        if "language" in shown:
            shown["language"] = LANGUAGES[shown["language"]][0]
        return KINDS[self.kind].text.format(**shown)

    def met(self, response: str, prompt: str = "") -> bool:
        """prompt: what an instruction to repeat it means, where it does not say that itself."""
        kind, args = KINDS[self.kind], {"prompt_to_repeat": prompt, **dict(self.args)}
        return kind.met(response, *(args[name] for name in kind.args))


MOST_INSTRUCTIONS = 8


def draw_instructions(rng: random.Random, n: int, prompt: str = "") -> list[Instruction]:
    """n instructions that one answer can follow; without a prompt none asks to repeat it."""
    if not 0 <= n <= MOST_INSTRUCTIONS:
        raise ValueError(f"n={n} instructions: 0 to {MOST_INSTRUCTIONS}")
    kinds = [kind for kind in KINDS if prompt.strip() or kind != REPEAT]
    chosen: list[str] = []
    while len(chosen) < n:  # most often the first time
        chosen = []
        for kind in rng.sample(kinds, k=len(kinds)):
            if len(chosen) < n and all(compatible(kind, other) for other in chosen):
                chosen.append(kind)
    words = [word for word in KEYWORDS if word not in prompt.lower()]
    rng.shuffle(words)
    return [draw_instruction(rng, kind, words, prompt) for kind in chosen]


def draw_instruction(rng: random.Random, kind: str, words: list[str], prompt: str) -> Instruction:
    """Takes its words off the list."""
    args: dict[str, Any] = {}
    for name, choices in KINDS[kind].args.items():
        if isinstance(choices, dict):
            choices = choices[next(iter(args.values()))]
        if isinstance(choices, int):
            args[name] = tuple(words.pop() for _ in range(choices)) if choices > 1 else words.pop()
        else:
            args[name] = prompt if kind == REPEAT else rng.choice(choices)
    return Instruction(kind, tuple(args.items()))


# ---- ground truth: numbers and code --------------------------------------------------------------

# what the braces hold, three deep
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NUMBER = re.compile(
    rf"""(?<![\w.)\]])(?:(?P<sign>-)(?=[$0-9.]))?(?:\$\s?)?(?P<minus>-)?
    (?:(?P<whole>[0-9]+)[ -](?=[0-9]+/[0-9]))?(?P<top>{DECIMAL})(?:\s?/\s?(?P<under>{DECIMAL}))?
    (?:e(?P<e>[+-]?[0-9]{{1,3}})(?![0-9])|\s?[×x*]\s?10\^\{{?(?P<ten>-?[0-9]{{1,3}})\}}?)?""",
    re.IGNORECASE | re.VERBOSE,
)
TEX = {"−": "-", "–": "-", r"\times": "×", r"\cdot": "×", r"\$": "$", r"\%": "%", "{,}": ","}
TEX |= {r"\,": "", r"\!": "", r"\;": " ", r"\ ": " ", "**": " ", "⁄": "/"}


def numbers_in(text: str) -> list[Fraction]:
    out = []
    for match in NUMBER.finditer(text):
        if len(match[0]) > 200:
            continue  # a model that got stuck
        top, under = (Fraction((match[k] or "1").replace(",", "")) for k in ("top", "under"))
        if under:
            value = top / under + int(match["whole"] or 0)
            value *= Fraction(10) ** int(match["e"] or match["ten"] or 0)
            out.append(-value if match["sign"] or match["minus"] else value)
    return out


def final_number(text: str) -> Fraction | None:
    r"""The number that an answer comes to: in its last \boxed{}, after its last ####, after its
    last "answer is", else the last in it. 5 % is 5."""
    for tex, plain in TEX.items():
        text = text.replace(tex, plain)
    part = r"(?:\{(-?[0-9.]+)\}|([0-9]))"
    text = re.sub(r"(?<=[0-9])(?=\\[dt]?frac)", " ", text)
    text = re.sub(rf"\\[dt]?frac\s*{part}\s*{part}", r"\1\2/\3\4", text)
    if marked := BOXED.findall(text) or re.findall(r"####\s*([-$.0-9][^\n]*)", text):
        said, otherwise = marked[-1], []
    else:
        after = re.split(r"(?i)\banswer\s*(?:is|:|=)", text)[1:]
        said = re.split(r"\n|[.!?;](?=\s|$)", after[-1].lstrip(" :\n"))[0] if after else ""
        otherwise = numbers_in(text)[-1:]
    values = numbers_in(said.rpartition("=")[2]) or numbers_in(said) or otherwise
    return values[0] if values else None


def same_number(a: str | Fraction | float | None, b: str | Fraction | float | None) -> bool:
    """Whether two answers, or numbers, come to the same, up to a millionth."""
    a, b = (final_number(x) if isinstance(x, str) else x for x in (a, b))
    return a is not None and b is not None and abs(a - b) * 10**6 <= max(abs(a), abs(b))


def compiles(text: str) -> bool:
    """Whether a text is a Python program, not a word that happens to be one."""
    try:
        nodes = [*ast.walk(ast.parse(text))]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    words = ast.Module | ast.Expr | ast.Name | ast.Constant | ast.Load | ast.Tuple | ast.UnaryOp
    return any(not isinstance(node, words | ast.USub | ast.Attribute) for node in nodes)


def extract_code(text: str) -> str | None:
    """The Python in an answer: its blocks marked as such, else those without a mark that compile,
    a last one perhaps cut off; else the whole text if it is a program."""
    pattern = r"(?ms)^[ \t]*(```+|~~~+)[ \t]*([\w+.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1|\Z)"
    blocks = [(m[2].lower(), textwrap.dedent(m[3])) for m in re.finditer(pattern, text)]
    code = [body for name, body in blocks if name in ("python", "py", "python3")]
    code = code or [body for name, body in blocks if not name and compiles(body)]
    if code:
        return "\n\n".join(body.strip("\n") for body in code) + "\n"
    return text if not blocks and compiles(text) else None


class Ran(NamedTuple):
    ok: bool
    reason: str
    """ok: it came to its last line; error: an exception, or a crash; exit: it left before that
    (sys.exit, os._exit); refused, timeout, memory, output: it met that limit."""
    output: str


# The three functions that run_python's child runs: their source is handed over as text, so they
# import for themselves.


def enclose(memory_mib: int, timeout: float) -> None:
    """Namespaces of users, processes and networks of its own, where the kernel allows it: when the
    first process of one ends, all others do. Limits in any case."""
    import ctypes
    import resource

    libc = ctypes.CDLL(None)
    if libc.unshare(0x10000000 | 0x20000000 | 0x40000000) == 0:
        if pid := os.fork():
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255)
        libc.prctl(1, 9)  # killed when its parent is
    limits = {"AS": memory_mib << 20, "CPU": int(timeout) + 2, "FSIZE": 16 << 20, "CORE": 0}
    for name, value in {**limits, "NOFILE": 64}.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def refuse_ways_out() -> type[Exception]:
    """An audit hook; returns what it raises."""
    import _posixsubprocess

    class Refused(PermissionError):
        pass

    def refuse(*args: object) -> None:
        raise Refused("a new process is refused")

    banned = ("socket.", "subprocess.", "ctypes.", "pty.", "resource.", "os.fork", "os.exec")
    banned += ("os.spawn", "os.posix_spawn", "os.system", "os.kill", "signal.pthread_kill")
    paths = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod")
    paths += ("os.chown", "os.truncate", "os.utime", "os.setxattr", "shutil.rmtree")
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    real, isdir, decode, types = os.path.realpath, os.path.isdir, os.fsdecode, str | bytes
    inside = (real(os.getcwd()) + "/", "/dev/null/")

    def hook(event: str, args: tuple) -> None:
        if event.startswith(banned) and (event, args) != ("ctypes.dlopen", (None,)):
            raise Refused(f"{event} is refused")
        changed = args if event in paths else ()
        if event == "open" and (args[2] & writes or args[1] is None and isdir(args[0])):
            changed = args[:1]  # a folder as well, relative to which others could be named
        for path in changed:
            named = isinstance(path, types | os.PathLike)
            if named and not f"{real(decode(path))}/".startswith(inside):
                raise Refused(f"writing to {decode(path)} is refused")

    _posixsubprocess.fork_exec = refuse  # the one way that no audit event is raised for
    sys.addaudithook(hook)
    return Refused


def confined() -> None:
    import linecache
    import traceback
    import types

    job, out = json.load(sys.stdin), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    enclose(job["memory_mib"], job["timeout"])
    main, code, reason = types.ModuleType("__main__"), job["code"], "ok"
    sys.modules["__main__"], sys.argv = main, ["program.py"]
    linecache.cache["program.py"] = (len(code), None, code.splitlines(True), "program.py")
    refused = refuse_ways_out()
    try:
        exec(compile(code, "program.py", "exec"), main.__dict__)
    except SystemExit:
        reason = "exit"
    except BaseException as e:
        reason, cause = "memory" if isinstance(e, MemoryError) else "error", e
        for _ in range(20):
            reason = "refused" if isinstance(cause, refused) else reason
            cause = cause and (cause.__cause__ or cause.__context__)
        with contextlib.suppress(BaseException):
            traceback.print_exception(type(e), e, e.__traceback__.tb_next, limit=20)
    os.write(out, f"{job['seal']}{reason}\n".encode())
    os._exit(0)


def run_python(
    code: str, timeout: float = 5.0, memory_mib: int = 512, output_limit: int = 64_000
) -> Ran:
    """Runs a program in a process of its own, to judge it: nothing on stdin, no environment, stdout
    and stderr as one output, in a temporary folder and writing nowhere else, at most 16 MiB a file;
    no network, no other process. The same program gives the same result; strings hash alike.

    It is no container: limits of the kernel and Python's audit hooks stop what a model may write by
    mistake, not who wants to get out (by native code, or the caller's frames), and it can read what
    we can. The programs of strangers, in numbers, want a virtual machine."""
    if timeout <= 0 or memory_mib < 64 or not 0 <= output_limit < 16 << 20:
        given = f"timeout={timeout}, memory_mib={memory_mib}, output_limit={output_limit}"
        raise ValueError(f"{given}: some time, at least 64 MiB, and output of less than 16 MiB")
    seal = f"\n{secrets.token_hex(16)} "  # before the verdict: a program cannot write its own
    job = dict(code=code, timeout=timeout, memory_mib=memory_mib, seal=seal)
    guard = "\n".join(map(inspect.getsource, (enclose, refuse_ways_out, confined)))
    guard = f"import contextlib, json, os, sys\n{guard}\nconfined()"
    # not -I, which would ignore this environment, and it has no more
    environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1"}
    # a file, not a pipe: who is left behind with its end open is not waited for
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("a+b") as out:
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-B", "-u", "-c", guard],
            cwd=folder,
            env=environment | {"TMPDIR": folder},
            start_new_session=True,
            **dict(stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT),
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(json.dumps(job).encode(), timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait() % 256  # a signal is 256 - its number, as enclose tells it
        out.seek(0)
        output, _, verdict = out.read().partition(seal.encode())
    if len(output) > output_limit:
        reason = "output"
    elif verdict:
        reason = verdict.split()[0].decode()
    else:  # stopped by us or for its CPU time, gone, or crashed
        late = status in (256 - signal.SIGKILL, 256 - signal.SIGXCPU)
        reason = "timeout" if late else "exit" if status < 128 else "error"
    return Ran(reason == "ok", reason, output[:output_limit].decode(errors="replace"))


# ---- the demo's tasks ----------------------------------------------------------------------------
# What align.py's demo learns: small computations on digits, asked for as a call (code-like) or in
# words, then with instructions on the form. A program writes answers, good and bad, and marks any.

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGIT = {text: str(i % 10) for i, text in enumerate([*"0123456789", *NUMBERS])}
# what is done to the digits, and how it is asked for in words
OPERATIONS: dict[str, tuple[Callable[[str], str], str]] = {
    "sort": (lambda x: "".join(sorted(x)), "Sort {} upwards."),
    "first": (lambda x: x[0], "Give the first digit of {}."),
    "last": (lambda x: x[-1], "Give the last digit of {}."),
    "largest": (max, "Give the largest digit of {}."),
    "smallest": (min, "Give the smallest digit of {}."),
}
# how an instruction reads, what follows it, in this order, and which answers do
INSTRUCTIONS: dict[str, tuple[str, Callable[[str], str], str]] = {
    "words": (
        "In words.",
        lambda x: " ".join(NUMBERS[int(c)] for c in x),
        r"(?=.*[a-z]{3})[^0-9]+",
    ),
    "brackets": ("In brackets.", "({})".format, r".*\(.+\).*"),
    "sure": ("Begin with Sure:", "Sure: {}".format, "Sure:.*"),
    "mark": ("End with !", "{}!".format, ".*!"),
}
FAULTS = ("slip", "other", "cut", "chatter", "form")
BETWEEN = ("\n", " = ", " gives ", "\nResult:\n", "\nWhat comes out of it is\n")
CHATTER = ("Well, let me see.", "I think it is", "Here you go:")


def pieces(text: str) -> list[str]:
    """Digits, words and marks."""
    return re.findall(r"[0-9]|[^\W\d]+|[^\w\s]", text)


def digits_of(text: str) -> str:
    """All digits of a text, which has them as figures or as words."""
    return "".join(DIGIT.get(piece, "") for piece in pieces(text))


def form_of(text: str) -> set[str]:
    """What a text is made of, whichever the digits."""
    return {("0" if p.isdigit() else "zero") if p in DIGIT else p for p in pieces(text)}


def write_answer(result: str, instructions: Iterable[str]) -> str:
    for name in INSTRUCTIONS:
        result = INSTRUCTIONS[name][1](result) if name in instructions else result
    return result


@dataclass(frozen=True)
class Task:
    operation: str
    digits: str
    instructions: tuple[str, ...] = ()
    call: bool = False
    """Asked for as a call, else in words."""

    @property
    def prompt(self) -> str:
        if self.call:
            return f"{self.operation}({self.digits})"
        asked = OPERATIONS[self.operation][1].format(self.digits)
        return " ".join([asked, *(INSTRUCTIONS[name][0] for name in self.instructions)])

    @property
    def held_out(self) -> bool:
        """A tenth of what can be asked, however it is worded: nothing is trained on it."""
        return zlib.crc32(f"{self.operation}({self.digits})".encode()) % 10 == 0

    @property
    def result(self) -> str:
        return OPERATIONS[self.operation][0](self.digits)

    @property
    def answer(self) -> str:
        return write_answer(self.result, self.instructions)

    def right(self, text: str) -> bool:
        return digits_of(text) == self.result

    def met(self, text: str) -> list[bool]:
        """Which of its instructions a text follows."""
        checks = (INSTRUCTIONS[name][2] for name in self.instructions)
        return [bool(re.fullmatch(check, text.strip(), re.DOTALL)) for check in checks]

    def labels(self, text: str) -> list[int]:
        """ATTRIBUTES of any text as an answer, 0 to 4 each: helpfulness, correctness in part by
        digits, coherence by what does not belong, complexity by what is done of what is asked."""
        got, met, right = digits_of(text), self.met(text), self.right(text)
        same = sum(a == b for a, b in zip(got, self.result, strict=False))
        correct = 4 if right else round(3 * same / max(len(got), len(self.result)))
        helpful = round(correct * (1 + sum(met)) / (1 + len(met)))
        coherent = max(0, 4 - len(form_of(text) - form_of(self.answer))) if pieces(text) else 0
        longer = len(pieces(text)) - len(pieces(self.answer))
        return [helpful, correct, coherent, 2 * right + sum(met), min(4, max(0, 1 + longer))]

    def flawed(self, rng: random.Random, faults: Sequence[str] = FAULTS, n: int = 0) -> str:
        """An answer with n faults (0: one, now and then two): a wrong digit, another operation's
        result, an early end, chatter, an instruction ignored or, where there is none, made up."""
        text = self.answer
        while text == self.answer:
            made, result = rng.sample(faults, k=n or rng.choice((1, 1, 2))), self.result
            if "slip" in made:
                i = rng.randrange(len(result))
                result = result[:i] + rng.choice("0123456789") + result[i + 1 :]
            if "other" in made:
                result = OPERATIONS[rng.choice([*OPERATIONS])][0](self.digits)
            changed = {rng.choice(self.instructions or [*INSTRUCTIONS])} if "form" in made else {}
            text = write_answer(result, {*self.instructions} ^ {*changed})
            text = f"{rng.choice(CHATTER)} {text}" if "chatter" in made else text
            text = text[: rng.randint(1, len(text))].strip() if "cut" in made else text
        return text


def draw_task(rng: random.Random, call: bool, held_out: bool = False) -> Task:
    """Three or four digits; in words, with up to two instructions."""
    while True:
        digits = "".join(rng.choices("0123456789", k=rng.randint(3, 4)))
        asked = [] if call else rng.sample([*INSTRUCTIONS], k=rng.choice((0, 1, 1, 2)))
        task = Task(rng.choice([*OPERATIONS]), digits, tuple(asked), call)
        if task.held_out == held_out:
            return task


def draw_text(rng: random.Random) -> str:
    """A document to pretrain on: calls and their results, perhaps with a verdict, and numbers in
    words. Nobody asks or answers. Several in one document, and more or less between a call and its
    result: what is learnt must not depend on places."""
    return "\n".join(draw_line(rng) for _ in range(rng.randint(1, 5)))


def draw_line(rng: random.Random) -> str:
    task, kind = draw_task(rng, call=True), rng.random()
    if kind < 0.2:
        return f"{task.digits}\n{write_answer(task.digits, ['words'])}"
    called = f"{task.prompt}{rng.choice(BETWEEN)}"
    if kind < 0.6:
        return f"{called}{task.result}"
    result = task.flawed(rng, ("slip", "other", "cut")) if rng.random() < 0.5 else task.result
    return f"{called}{result}\n{'right' if task.right(result) else 'wrong'}"


def scored_row(task: Task, text: str) -> dict[str, Any]:
    """A row for sft_rows and, with its label, for reward_rows."""
    messages = [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": text}]
    return {"messages": messages, "label": task.labels(text)}


# ---- command line --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShowConfig:
    """What a prepared folder holds, and how its batches read."""

    folder: tyro.conf.Positional[Path]
    samples: int = 3
    """How many samples of the training blend to print."""
    seq_len: int = 64
    seed: int = 0
    blend: dict[str, float] = field(default_factory=dict)
    """Source weights; empty: the default blend."""


def show(cfg: ShowConfig) -> None:
    data = TokenData(cfg.folder)
    blend, tokenizer = data.blend(cfg.blend), data.tokenizer()
    for source in data.sources:
        docs = data.manifest["sources"][source]["train"]["documents"]
        held = f"{docs:,} documents, {data.n_tokens(source, 'train'):,} tokens"
        log.info(f"{source}: weight {blend.get(source, 0):.3f}, {held}")
    sampler = Sampler(data, blend, cfg.seq_len, cfg.seed)
    for i in range(cfg.samples):
        source, epoch, window = sampler.locate(i)
        text = tokenizer.decode(sampler.batch([i])["tokens"][0])
        log.info(f"--- sample {i}: {source}, epoch {epoch}, window {window}\n{text}")


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    commands = {"prepare": PrepareConfig, "show": ShowConfig}
    try:
        cfg = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
        prepare(cfg) if isinstance(cfg, PrepareConfig) else show(cfg)
    except (ValueError, OSError) as e:
        sys.exit(f"data.py: error: {e}")


if __name__ == "__main__":
    main()
