"""Text in, token batches out: tokenizers, `prepare`, token files, and a sampler that is a pure
function of the step.

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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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

    def encode(self, text: str) -> np.ndarray:
        """Text → int32 ids. Text is only ever text: control tokens spelt out in it do not become
        control ids."""

    def decode(self, ids: Iterable[int]) -> str:
        """Ids → text, control tokens spelt out, broken UTF-8 replaced."""

    def special(self, name: str) -> int:
        """The id of a control token: one of SPECIALS."""

    def save(self, folder: Path) -> str:
        """Write what `load_tokenizer` needs into the folder; returns the file's name."""


def no_such_special(name: str, known: Iterable[str]) -> ValueError:
    return ValueError(f"the tokenizer has no control token {name!r}; it has {sorted(known)}")


class BytePairs:
    """Byte-level BPE run by tiktoken: ours, trained by `train_bpe`, or any encoding that tiktoken
    names."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.vocab_size = encoding.max_token_value + 1

    @classmethod
    def build(cls, pattern: str, ranks: dict[bytes, int], specials: dict[str, int]) -> "BytePairs":
        return cls(
            tiktoken.Encoding(
                "nemotron4", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
            )
        )

    @classmethod
    def named(cls, name: str) -> "BytePairs":
        """A tiktoken encoding, with Nemotron's control tokens added after its own and <|endoftext|>
        as </s>."""
        base = tiktoken.get_encoding(name)
        specials = dict(base._special_tokens)
        end = specials["<|endoftext|>"]
        for token in SPECIALS:
            specials[token] = (
                end if token == "</s>" else max(base.max_token_value, *specials.values()) + 1
            )
        del specials["<|endoftext|>"]  # one name an id
        return cls.build(base._pat_str, base._mergeable_ranks, specials)

    @classmethod
    def load(cls, path: Path) -> "BytePairs":
        spec = json.loads(path.read_text())
        ranks = {base64.b64decode(token): rank for token, rank in spec["ranks"].items()}
        return cls.build(spec["pattern"], ranks, spec["specials"])

    def save(self, folder: Path) -> str:
        enc = self.encoding
        ranks = {
            base64.b64encode(t).decode(): r
            for t, r in sorted(enc._mergeable_ranks.items(), key=lambda i: i[1])
        }
        spec = {"pattern": enc._pat_str, "specials": enc._special_tokens, "ranks": ranks}
        (folder / "tokenizer.bpe.json").write_text(json.dumps(spec, indent=0))
        return "tokenizer.bpe.json"

    def encode(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text, disallowed_special=()).view(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode(list(map(int, ids)))

    def special(self, name: str) -> int:
        if name not in self.encoding._special_tokens:
            raise no_such_special(name, self.encoding._special_tokens)
        return self.encoding._special_tokens[name]


class HuggingFace:
    """A tokenizer.json, run by the `tokenizers` library."""

    ALIASES = {
        "<pad>": ("[PAD]", "<|pad|>"),
        "</s>": ("<|endoftext|>", "<|end_of_text|>", "<eos>"),
        "<s>": ("<bos>",),
    }

    def __init__(self, path: Path) -> None:
        import tokenizers

        self.path = path
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.tokenizer.encode_special_tokens = True  # text stays text
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def save(self, folder: Path) -> str:
        shutil.copyfile(self.path, folder / "tokenizer.json")
        return "tokenizer.json"

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)

    def special(self, name: str) -> int:
        for spelling in (name, *self.ALIASES.get(name, ())):
            if (found := self.tokenizer.token_to_id(spelling)) is not None:
                return found
        raise no_such_special(
            name, (t.content for t in self.tokenizer.get_added_tokens_decoder().values())
        )


class SentencePiece:
    """A SentencePiece .model file, such as NVIDIA's nemotron_2_256k.model."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self.processor.vocab_size()
        self.marks = [
            s for s in SPECIALS if self.processor.piece_to_id(s) != self.processor.unk_id()
        ]

    def save(self, folder: Path) -> str:
        shutil.copyfile(self.path, folder / "tokenizer.model")
        return "tokenizer.model"

    def encode(self, text: str) -> np.ndarray:
        # user-defined pieces match anywhere in a text: a mark that somebody wrote is cut after its
        # first character
        for mark in self.marks:
            text = text.replace(mark, mark[0] + "\0" + mark[1:])
        return np.array(
            [i for part in text.split("\0") for i in self.processor.encode(part)], dtype=np.int32
        )

    def decode(self, ids: Iterable[int]) -> str:
        return self.processor.decode(list(map(int, ids)))

    def special(self, name: str) -> int:
        if name not in self.marks and name != "<unk>":
            raise no_such_special(name, self.marks)
        return self.processor.piece_to_id(name)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """A file (our .bpe.json, SentencePiece .model, Hugging Face tokenizer.json), a folder with one,
    or a tiktoken name."""
    path = Path(spec)
    if path.is_dir():
        names = ("tokenizer.bpe.json", "tokenizer.model", "tokenizer.json")
        found = [path / n for n in names if (path / n).exists()]
        if not found:
            raise ValueError(
                f"{path}: a folder without a tokenizer; one of {', '.join(names)} is needed"
            )
        path = found[0]
    if path.name.endswith(".bpe.json") and path.exists():
        return BytePairs.load(path)
    if path.suffix == ".model" and path.exists():
        return SentencePiece(path)
    if path.suffix == ".json" and path.exists():
        return HuggingFace(path)
    known = tiktoken.list_encoding_names()
    if str(spec) in known:
        return BytePairs.named(str(spec))
    close = difflib.get_close_matches(str(spec), known, n=1)
    raise ValueError(
        f"tokenizer {str(spec)!r} is neither a file (.bpe.json, .model, tokenizer.json) nor a "
        f"tiktoken encoding "
        f"({', '.join(known)})" + (f"; did you mean {close[0]}?" if close else "")
    )


def train_bpe(texts: Iterable[str], vocab_size: int) -> BytePairs:
    """Byte-level BPE with SPECIALS as ids 0..6, the 256 bytes as 7..262, then merges. Same texts,
    same tokenizer."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(SPECIALS) + 256
    if vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size}: {len(SPECIALS)} control tokens and 256 bytes need at "
            f"least {least}"
        )
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = hf_pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    found = tok.get_vocab_size()
    if found < vocab_size:
        raise ValueError(
            f"the text has too few distinct words for vocab_size={vocab_size}: it gives "
            f"{found}; ask for less"
        )
    char_to_byte = {c: b for b, c in byte_chars().items()}
    ranks = {
        bytes(char_to_byte[c] for c in t): i
        for t, i in tok.get_vocab().items()
        if t not in SPECIALS
    }
    return BytePairs.build(PATTERN, ranks, {t: i for i, t in enumerate(SPECIALS)})


def hf_pre_tokenizer() -> Any:
    """PATTERN for the `tokenizers` library: split, then bytes as printable characters."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def byte_chars() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes, which `tokenizers` writes its byte-level
    vocabulary in."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


# ---- documents -----------------------------------------------------------------------------------

# fmt: off
TEXT_SUFFIXES = frozenset((
    ".txt", ".md", ".rst", ".tex", ".html", ".xml", ".css", ".js", ".ts", ".tsx", ".jsx", ".py",
    ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala", ".go", ".rs",
    ".rb", ".php", ".swift", ".m", ".cs", ".lua", ".pl", ".r", ".jl", ".sh", ".sql", ".yaml", ".yml",
    ".toml", ".ini", ".cfg", ".cmake", ".asm", ".f90", ".hs", ".ml", ".ex", ".erl", ".clj", ".lisp",
    ".el", ".proto", ".tf", ".dart", ".v", ".vhd",
))
# fmt: on
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
LONGEST = (
    4 << 20
)  # a larger text file becomes several documents, cut at line ends: memory stays bounded


class BadDocument(ValueError):
    """A document that cannot be read: file, line and rule."""


def files_of(root: Path) -> list[Path]:
    """The files to read below a folder, in a fixed order; hidden ones and unknown suffixes are left
    out."""
    if not root.exists():
        raise ValueError(f"{root}: no such file or folder")
    if root.is_file():
        return [root]
    inside = (
        p
        for p in root.rglob("*")
        if not any(part.startswith(".") for part in p.relative_to(root).parts)
    )
    return sorted(
        p
        for p in inside
        if p.is_file() and (p.suffix in TEXT_SUFFIXES or p.name.endswith(ROW_SUFFIXES))
    )


def read_text(path: Path) -> Iterator[str | BadDocument]:
    """A text file as one document, or as several where it is larger than LONGEST."""
    line = 1
    with path.open("rb") as f:
        while piece := f.read(LONGEST):
            if len(piece) == LONGEST:
                piece += f.readline()
            try:
                yield piece.decode("utf-8")
            except UnicodeDecodeError as e:
                at = line + piece[: e.start].count(b"\n")
                yield BadDocument(
                    f"{path}:{at}: not UTF-8 (byte 0x{piece[e.start]:02x}): convert it, or "
                    f"--skip-bad"
                )
            line += piece.count(b"\n")


def read_jsonl(path: Path, text_field: str) -> Iterator[str | BadDocument]:
    """One JSON object a line, gzipped or not."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as f:
        for number, line in enumerate(lines_of(f, path), 1):
            if isinstance(line, BadDocument):
                yield line
            elif line.strip():
                yield row_text(line, text_field, f"{path}:{number}")


def lines_of(f: Any, path: Path) -> Iterator[bytes | BadDocument]:
    """The file's lines; a gzip stream that breaks off ends with a BadDocument."""
    try:
        yield from f
    except (EOFError, gzip.BadGzipFile) as e:
        yield BadDocument(
            f"{path}: broken gzip stream ({e}): fetch it again, or --skip-bad to keep what was read"
        )


def row_text(line: bytes, text_field: str, where: str) -> str | BadDocument:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        return BadDocument(f"{where}: not JSON ({e}): mend the line, or --skip-bad")
    if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
        have = f"fields {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        return BadDocument(
            f"{where}: no string in field {text_field!r} (the row has {have}): set "
            f"--text-field, or --skip-bad"
        )
    try:
        row[text_field].encode()
    except UnicodeEncodeError as e:
        return BadDocument(
            f"{where}: a lone surrogate at character {e.start}: mend the line, or --skip-bad"
        )
    return row[text_field]


def read_parquet(path: Path, text_field: str) -> Iterator[str | BadDocument]:
    try:
        import pyarrow.parquet as pq
    except ImportError as e:
        raise ValueError(
            f"{path}: reading parquet needs pyarrow: pip install -e '.[parquet]'"
        ) from e
    with pq.ParquetFile(path) as table:
        if text_field not in table.schema_arrow.names:
            names = table.schema_arrow.names
            raise BadDocument(
                f"{path}: no column {text_field!r} (it has {names}): set --text-field, or "
                f"--skip-bad"
            )
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                row += 1
                bad = (
                    f"{path}: row {row}: no string in column {text_field!r}: mend it, or --skip-bad"
                )
                yield text if isinstance(text, str) else BadDocument(bad)


def read_documents(path: Path, text_field: str) -> Iterator[str | BadDocument]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return read_jsonl(path, text_field)
    return read_parquet(path, text_field) if path.suffix == ".parquet" else read_text(path)


# ---- the corpus that every machine has -----------------------------------------------------------


def standard_library() -> list[Path]:
    """Python's own library, as source files; its tests and other people's packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idle_test",
        "ensurepip",
    }
    return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))


def embedded_code() -> Iterator[str | BadDocument]:
    for path in standard_library():
        yield from read_text(path)


def embedded_english() -> Iterator[str | BadDocument]:
    """The documentation topics that `help()` shows, and each module's docstrings: text written by
    people."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    for path in standard_library():
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a template or an example of bad code: it has no docstrings
        nodes = [
            n
            for n in ast.walk(tree)
            if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        text = "\n\n".join(
            inspect.cleandoc(d) for n in nodes if (d := ast.get_docstring(n, clean=False))
        )
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
    """A tokenizer file or a tiktoken encoding's name. Empty: a byte-level BPE is trained on these
    texts."""
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
            raise ValueError(
                f"val_fraction={self.val_fraction}: a share of the documents, 0 <= val_fraction < 1"
            )
        if self.workers < 1 or self.train_bytes < 1:
            raise ValueError(
                f"workers={self.workers}, train_bytes={self.train_bytes}: both must be at least 1"
            )


Documents = Callable[[], Iterator[str | BadDocument]]


def open_sources(cfg: PrepareConfig) -> dict[str, Documents]:
    """Source name → a function that reads its documents from the start."""
    if not cfg.sources:
        return dict(EMBEDDED)
    files: dict[str, list[Path]] = {}
    for source in cfg.sources:
        name, equals, path = source.partition("=")
        if not (name and equals and path) or not name.replace("-", "_").isidentifier():
            raise ValueError(
                f"source {source!r}: write NAME=PATH, the name of letters, digits, '-' and '_'"
            )
        files.setdefault(name, []).extend(files_of(Path(path).expanduser()))
    for name, paths in files.items():
        if not paths:
            raise ValueError(
                f"source {name!r}: no text, source code, .jsonl, .jsonl.gz or .parquet file in it"
            )

    def reader(paths: list[Path]) -> Documents:
        return lambda: (doc for path in paths for doc in read_documents(path, cfg.text_field))

    return {name: reader(paths) for name, paths in files.items()}


class Hygiene:
    """Drops what is bad, empty or an exact duplicate, and counts it. Memory is bounded: the digests
    live in a temporary SQLite file, so the corpus may hold more documents than fit in memory."""

    def __init__(self, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self.seen = sqlite3.connect("")
        self.seen.execute("CREATE TABLE digests (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self.counts = dict(bad=0, empty=0, duplicate=0)

    def clean(self, documents: Iterable[str | BadDocument]) -> Iterator[tuple[str, int, int]]:
        """→ (text, bytes, first 64 bits of its digest)."""
        self.counts = dict(bad=0, empty=0, duplicate=0)
        for text in guarded(documents):
            if isinstance(text, BadDocument):
                if not self.skip_bad:
                    raise text
                self.counts["bad"] += 1
            elif not text.strip():
                self.counts["empty"] += 1
            else:
                raw = text.encode()
                digest = hashlib.blake2b(raw, digest_size=16).digest()
                if self.seen.execute(
                    "INSERT OR IGNORE INTO digests VALUES (?)", (digest,)
                ).rowcount:
                    yield text, len(raw), int.from_bytes(digest[:8], "big")
                else:
                    self.counts["duplicate"] += 1


def guarded(documents: Iterable[str | BadDocument]) -> Iterator[str | BadDocument]:
    """A reader that raises BadDocument (a whole file is unreadable) yields it instead and ends."""
    try:
        yield from documents
    except BadDocument as e:
        yield e


def encode_all(
    docs: Iterable[Any], encode: Callable[[str], np.ndarray], workers: int
) -> Iterator[tuple[Any, Any]]:
    """(document, ids) in order, encoded by threads in groups of about 256 kB, never more than 4 a
    worker in flight."""

    def groups() -> Iterator[list[Any]]:
        group, size = [], 0
        for doc in docs:
            group.append(doc)
            size += doc[1]
            if size >= 1 << 18:
                yield group
                group, size = [], 0
        yield group

    def work(group: list[Any]) -> list[tuple[Any, Any]]:
        return [(doc, encode(doc[0])) for doc in group]

    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for group in groups():
            waiting.append(pool.submit(work, group))
            if len(waiting) >= 4 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


class TokenWriter:
    """Appends documents to NAME.bin (tokens, each document closed by </s>) and NAME.idx (int64:
    where each begins)."""

    def __init__(self, stem: Path, dtype: type, eos: int) -> None:
        self.bin, self.idx = open(f"{stem}.bin", "wb"), open(f"{stem}.idx", "wb")
        self.eos = np.array([eos], dtype).tobytes()
        self.dtype = dtype
        self.documents = self.tokens = self.bytes = 0
        self.idx.write(np.int64(0).tobytes())

    def write(self, ids: np.ndarray, n_bytes: int) -> None:
        self.bin.write(ids.astype(self.dtype).tobytes() + self.eos)
        self.documents, self.bytes = self.documents + 1, self.bytes + n_bytes
        self.tokens += len(ids) + 1
        self.idx.write(np.int64(self.tokens).tobytes())

    def close(self) -> dict[str, int]:
        for f in (self.bin, self.idx):
            f.flush()
            os.fsync(f.fileno())
            f.close()
        return dict(documents=self.documents, tokens=self.tokens, bytes=self.bytes)


def prepare(cfg: PrepareConfig) -> None:
    """Tokenize all sources into cfg.out. Same input, same bytes; a killed run leaves only
    OUT.partial behind."""
    if cfg.out.exists():
        raise ValueError(f"{cfg.out} exists: remove it, or choose another --out")
    sources = open_sources(cfg)
    partial = cfg.out.with_name(cfg.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = (
        load_tokenizer(cfg.tokenizer)
        if cfg.tokenizer
        else train_bpe(training_texts(cfg, sources), cfg.vocab_size)
    )
    file = tokenizer.save(partial)
    tokenizer = load_tokenizer(partial / file)
    hygiene, manifest = Hygiene(cfg.skip_bad), {}
    for name, documents in sources.items():
        manifest[name] = prepare_source(cfg, name, documents, tokenizer, hygiene, partial)
    whole = {
        "vocab_size": tokenizer.vocab_size,
        "eos": tokenizer.special("</s>"),
        "tokenizer": file,
        "sources": manifest,
    }
    (partial / "manifest.json").write_text(json.dumps(whole, indent=2))
    partial.rename(cfg.out)
    log.info(f"{cfg.out}: complete, vocabulary {tokenizer.vocab_size:,}")


def training_texts(cfg: PrepareConfig, sources: dict[str, Documents]) -> Iterator[str]:
    """About cfg.train_bytes of text for the tokenizer, an equal share from each source, in the
    order of the files."""
    for name, documents in sources.items():
        left = cfg.train_bytes // len(sources)
        for text in tqdm(
            guarded(documents()), desc=f"{name}: text for the tokenizer", unit=" docs", leave=False
        ):
            if isinstance(text, BadDocument):
                if not cfg.skip_bad:
                    raise text
                continue
            yield text
            left -= len(text)
            if left < 0:
                break


def prepare_source(
    cfg: PrepareConfig,
    name: str,
    documents: Documents,
    tokenizer: Tokenizer,
    hygiene: Hygiene,
    folder: Path,
) -> dict[str, Any]:
    """One source's train and validation files; returns its entry of the manifest."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    eos = tokenizer.special("</s>")
    splits = {
        split: TokenWriter(folder / f"{name}.{split}", dtype, eos) for split in ("train", "val")
    }
    with tqdm(desc=name, unit="B", unit_scale=True) as bar:
        for (_, n_bytes, digest), ids in encode_all(
            hygiene.clean(documents()), tokenizer.encode, cfg.workers
        ):
            splits["val" if digest < cfg.val_fraction * 2**64 else "train"].write(ids, n_bytes)
            bar.update(n_bytes)
    stats = {split: writer.close() for split, writer in splits.items()}
    train, val = stats["train"], stats["val"]
    if not train["documents"]:
        raise ValueError(
            f"source {name!r} is empty: no document left for training ({hygiene.counts}, "
            f"{val['documents']} kept for validation)"
        )
    n = train["tokens"] + val["tokens"]
    log.info(
        f"{name}: {train['documents'] + val['documents']:,} documents ({val['documents']:,} "
        f"for validation), {n:,} tokens, "
        f"{(train['bytes'] + val['bytes']) / n:.2f} bytes per token; dropped: "
        + ", ".join(f"{count:,} {reason}" for reason, count in hygiene.counts.items())
    )
    return {**stats, "dropped": hygiene.counts, "dtype": np.dtype(dtype).name}


# ---- token files and the sampler -----------------------------------------------------------------

REPORT_BLEND = {"english": 0.70, "multilingual": 0.15, "code": 0.15}  # report section 2.1


class TokenData:
    """A prepared folder, memory-mapped."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "manifest.json").exists():
            raise ValueError(
                f"{folder}: not a prepared data folder (no manifest.json): run data.py "
                f"prepare --out {folder}"
            )
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        self.vocab_size: int = self.manifest["vocab_size"]
        self.sources: tuple[str, ...] = tuple(self.manifest["sources"])

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder / self.manifest["tokenizer"])

    def n_tokens(self, source: str, split: str) -> int:
        return self.manifest["sources"][source][split]["tokens"]

    def tokens(self, source: str, split: str) -> np.ndarray:
        path, n = self.folder / f"{source}.{split}.bin", self.n_tokens(source, split)
        dtype = np.dtype(self.manifest["sources"][source]["dtype"])
        if path.stat().st_size != n * dtype.itemsize:
            raise ValueError(
                f"{path}: {path.stat().st_size} bytes, the manifest says {n} tokens of "
                f"{dtype}: prepare it again"
            )
        return np.memmap(path, dtype, "r")

    def offsets(self, source: str, split: str) -> np.ndarray:
        """int64 (documents + 1): document d is tokens[offsets[d] : offsets[d + 1]], its </s>
        included."""
        return np.memmap(self.folder / f"{source}.{split}.idx", np.int64, "r")

    def blend(self, weights: dict[str, float]) -> dict[str, float]:
        """Weights that sum to one. None given: the report's 70/15/15 where the sources bear its
        names, else by tokens."""
        if not weights:
            named = set(self.sources) <= set(REPORT_BLEND)
            weights = {
                s: REPORT_BLEND[s] if named else self.n_tokens(s, "train") for s in self.sources
            }
        if unknown := sorted(set(weights) - set(self.sources)):
            raise ValueError(
                f"the blend names {unknown}, but {self.folder} has the sources {list(self.sources)}"
            )
        if min(weights.values()) < 0 or not 0 < sum(weights.values()) < float("inf"):
            raise ValueError(
                f"blend {weights}: weights must be finite, none negative, and not all zero"
            )
        return {s: w / sum(weights.values()) for s, w in weights.items() if w > 0}


def permute(i: int, n: int, key: int) -> int:
    """Where element i of n goes in the shuffle `key`: a four-round Feistel network, walked until it
    lands inside n.

    A bijection of 0..n-1 that needs no table, so an epoch of any size is shuffled in O(1) memory.
    """
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


def key_of(*parts: Any) -> int:
    return int.from_bytes(
        hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "big"
    )


class Sampler:
    """Sample number i → a window of seq_len tokens, as a pure function of (seed, i): nothing to
    save, nothing to resume.

    Sources are interleaved so that after any number of samples each is within a sample or two of
    its weight; within a source each epoch is a fresh shuffle of its windows, each window seen once.
    The last window of a source is padded.
    """

    def __init__(
        self,
        data: TokenData,
        blend: dict[str, float],
        seq_len: int,
        seed: int,
        split: str = "train",
        isolate: bool = False,
    ) -> None:
        self.seq_len, self.seed, self.isolate = seq_len, seed, isolate
        self.names = tuple(blend)
        self.tokens = {s: data.tokens(s, split) for s in blend}
        self.offsets = {s: data.offsets(s, split) for s in blend}
        self.windows = {s: -(-(len(t) - 1) // seq_len) for s, t in self.tokens.items()}
        for s, t in self.tokens.items():
            if len(t) <= seq_len:
                raise ValueError(
                    f"source {s!r} has {len(t)} {split} tokens, fewer than one window of "
                    f"seq_len={seq_len} + 1: "
                    "add text, or shorten --model.seq-len"
                )
        # share of each source among itself and the ones after it, in 2^-32: integers, so every
        # machine agrees
        rest = np.cumsum(list(blend.values())[::-1])[::-1]
        self.shares = [round(w / r * 2**32) for w, r in zip(blend.values(), rest, strict=True)]

    def counts(self, i: int) -> dict[str, int]:
        """How many of the first i samples come from each source."""
        out = {}
        for name, share in zip(self.names, self.shares, strict=True):
            out[name] = share * i >> 32
            i -= out[name]
        return out

    def locate(self, i: int) -> tuple[str, int, int]:
        """Sample i → (source, epoch, window)."""
        for name, share in zip(self.names, self.shares, strict=True):  # noqa: B007
            k = share * i >> 32  # samples of this source before sample i
            if share * (i + 1) >> 32 > k:
                break
            i -= k
        epoch, j = divmod(k, self.windows[name])
        return name, epoch, permute(j, self.windows[name], key_of(self.seed, name, epoch))

    def epochs(self, i: int) -> dict[str, float]:
        """How often each source has been gone through after i samples."""
        return {s: n / self.windows[s] for s, n in self.counts(i).items()}

    def batch(self, samples: Iterable[int]) -> dict[str, np.ndarray]:
        """tokens and targets, int64 (B, T), targets IGNOREd where there is nothing to predict; with
        `isolate` also positions that restart with each document and document ids, and no target
        across a document's end."""
        rows = [self.row(*self.locate(i)) for i in samples]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def row(self, source: str, epoch: int, window: int) -> dict[str, np.ndarray]:
        T, start = self.seq_len, window * self.seq_len
        piece = self.tokens[source][start : start + T + 1].astype(np.int64)
        tokens, targets = np.zeros(T, np.int64), np.full(T, IGNORE)
        tokens[: len(piece[:T])] = piece[:T]
        targets[: len(piece) - 1] = piece[1:]
        if not self.isolate:
            return {"tokens": tokens, "targets": targets}
        offsets = self.offsets[source]
        documents = np.searchsorted(offsets, np.arange(start, start + T + 1), side="right") - 1
        documents = np.minimum(documents, len(offsets) - 1)
        targets[documents[1:] != documents[:-1]] = IGNORE
        documents = documents[:-1]
        begins = np.maximum.accumulate(
            np.where(np.diff(documents, prepend=-1) != 0, np.arange(T), 0)
        )
        return {
            "tokens": tokens,
            "targets": targets,
            "positions": np.arange(T) - begins,
            "documents": documents,
        }


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
        log.info(
            f"{source}: weight {blend.get(source, 0):.3f}, {docs:,} documents, "
            f"{data.n_tokens(source, 'train'):,} tokens"
        )
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
