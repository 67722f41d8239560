"""Text in, token batches out: tokenizers, `prepare`, token files, and a sampler without state.

Everything here is about text and needs neither a model nor torch. Section 2.1 of the report
(blend), arXiv 2402.16819 (tokenizer, hygiene).

    python data.py prepare english=books/ code=src/ --out data/mine
    python data.py show data/mine
"""

import ast
import base64
import difflib
import gzip
import hashlib
import inspect
import json
import logging
import os
import shutil
import sqlite3
import sys
import sysconfig
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

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


def read_jsonl(path: Path, text_field: str) -> Documents:
    """One JSON object a line, gzipped or not; a gzip stream that breaks off ends as bad."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield row_text(line, text_field, f"{path}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        yield BadDocument(path, f"broken gzip stream ({e}): fetch it again")


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
            yield from read_jsonl(path, text_field)
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
