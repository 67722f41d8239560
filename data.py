"""Text in, token batches out: tokenizers, `prepare`, token files, a sampler without state; chat
template, rows of conversations, pairs and scored responses, and their packing.

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
import re
import shutil
import sqlite3
import sys
import sysconfig
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def read_jsonl(
    file: str | Path, on_bad: Callable[[BadDocument], None] | None = None, text_field: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("FILE:LINE", object) of each line of a JSON Lines file, gzipped or not; "-" is stdin.

    A line that is not a JSON object raises BadDocument, or is handed to `on_bad` and left out. With
    `text_field`, a line that does not begin with { is a text, read as {text_field: line}.
    """
    if str(file) == "-":
        lines = ((f"-:{n}", line.encode()) for n, line in enumerate(sys.stdin, 1) if line.strip())
    else:
        lines = numbered_lines(Path(file))
    for where, line in lines:
        if text_field and not isinstance(line, BadDocument) and not line.startswith(b"{"):
            yield where, {text_field: line.decode().rstrip("\n")}
            continue
        try:
            row = json_object(line)
        except ValueError as e:
            bad = e if isinstance(e, BadDocument) else BadDocument(where, f"{e}: mend the line")
            if on_bad is None:
                raise bad from None
            on_bad(bad)
            continue
        yield where, row


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Write a file, or the lines of one, so that a reader finds it whole or not at all."""
    with path.with_name(path.name + ".tmp").open("w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else (f"{line}\n" for line in text))
    path.with_name(path.name + ".tmp").rename(path)


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
class Example:
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
Parsed = tuple[list[Messages], np.ndarray | None]
Rows = tuple[list[Example], dict[str, int]]


def required(row: dict[str, Any], name: str, kind: type = object) -> Any:
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


def read_chat(row: dict[str, Any]) -> Parsed:
    """{"messages": [{role, content}]}, or NeMo's {"system", "conversations": [{from, value}]}."""
    if "messages" in row:
        return [plain(row["messages"])], None
    turns, names = required(row, "conversations", list), {v: k for k, v in ROLES.items()}
    turns = [turn if isinstance(turn, dict) else {} for turn in turns]
    if (mask := row.get("mask") or "User") != "User":
        raise ValueError(f"mask is {mask!r}: only 'User' is built, which trains the assistant")
    if row.get("type") and any(turn.get("label") is not None for turn in turns):
        raise ValueError(f"type is {row['type']!r}: conditioning on labels is not built")
    said = [(str(turn.get("from")), turn.get("value")) for turn in turns]
    chat = [{"role": names.get(role, role), "content": text} for role, text in said]
    return [[{"role": "system", "content": row.get("system") or ""}, *chat]], None


def read_preference(row: dict[str, Any], rewards: bool) -> Parsed:
    """NeMo's {"prompt", "chosen_response", "rejected_response"}: a templated prompt and answers
    that end with the next turn's mark, or messages and plain answers. Or {"chosen", "rejected"},
    plain answers or messages, perhaps whole conversations, with a "prompt", plain or messages."""
    nemo = "chosen_response" in row or "rejected_response" in row
    given = plain(required(row, "prompt") if nemo else row.get("prompt", row.get("messages", [])))
    sides = [plain(required(row, side + "_response" * nemo)) for side in ("chosen", "rejected")]
    if nemo and isinstance(given, str):
        chats = [parse_chat(f"{given}{side}", "<extra_id_1>") for side in sides]
        given = parse_chat(given, TO_ANSWER)
    else:
        given = given if isinstance(given, list) else [{"role": "user", "content": given}]
        said = [s if isinstance(s, list) else [{"role": "assistant", "content": s}] for s in sides]
        if not given and min(map(len, said)) < 2:
            required(row, "prompt")
        chats = [side if len(side) > 1 else [*given, *side] for side in said]
    if any(chat[:-1] != chats[0][:-1] or given != chat[-1 - len(given) : -1] for chat in chats):
        raise ValueError("chosen and rejected do not answer the same prompt")
    if chats[0] == chats[1]:
        raise ValueError("chosen and rejected are equal")
    names = ("chosen_reward", "rejected_reward")
    if rewards or any(row.get(name) is not None for name in names):
        return chats, numbers([required(row, name) for name in names], names)
    return chats, None


def read_scored(row: dict[str, Any], n_attributes: int) -> Parsed:
    """NeMo's {"text" in the template, "label"}, {"messages", "label"}, or HelpSteer2's columns,
    whose prompt has its earlier turns in the template."""
    if "messages" in row:
        chat, label = plain(row["messages"]), required(row, "label", list)
    elif "text" in row or "label" in row:
        chat, label = (
            parse_chat(required(row, "text", str), "<extra_id_2>"),
            required(row, "label", list),
        )
    else:
        before = (
            f"<extra_id_0>System\n\n<extra_id_1>User\n{required(row, 'prompt', str)}\n{TO_ANSWER}"
        )
        answer = {"role": "assistant", "content": required(row, "response", str)}
        chat = [*parse_chat(before, TO_ANSWER)[1:], answer]
        label = [required(row, name) for name in ATTRIBUTES]
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
    read: Callable[[dict[str, Any]], Parsed],
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
            row = Example(*zip(*map(render, chats), strict=True), values, where)
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


def show_row(row: Example, tokenizer: Tokenizer) -> str:
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


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
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
    rows: Sequence[Example], window: int, packed: bool = True, multiple: int = 1
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
    members = (
        best_fit([r.length for r in rows], window) if packed else [[i] for i in range(len(rows))]
    )
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
