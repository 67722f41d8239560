"""Turn text into batches of tokens: tokenizers, token files, sampler, chat template, rows, packing.

The blend is that of section 2.1 of the report (arXiv 2406.11704); tokenizer and cleaning of text
follow arXiv 2402.16819.

    python data.py prepare english=books/ code=src/ --out data/mine
    python data.py prepare web=crawl/ --out data/web --tokenizer data/mine --shard 3/128
"""

import ast
import bisect
import contextlib
import fcntl
import gzip
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import secrets
import shutil
import signal
import sys
import sysconfig
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from sqlite3 import Connection, connect
from typing import Any, Protocol

import numpy as np
import tiktoken
import tokenizers
import tyro
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

log = logging.getLogger("nemotron4")

IGNORE = -100  # a target that no loss counts: model.py's constant, without importing torch for it

Record = dict[str, Any]  # a JSON object
Texts = Iterator[str]
Array = np.ndarray
Arrays = dict[str, Array]
Counts = dict[str, int]
Blend = dict[str, float]  # source → weight

# ---- tokenizers ----------------------------------------------------------------------------------

# Nemotron's control tokens, in the order of their ids in NVIDIA's tokenizer. <extra_id_0> opens the
# system turn, <extra_id_1> every other turn, and <extra_id_2> the label of a scored response.
SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>")
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>")  # other tokenizers' spellings of </s>

# Cuts a text into words with one leading space, single digits, runs of punctuation and runs of
# white space; a combining mark, such as a Hindi vowel, belongs to its letter. It has no look-ahead,
# so that matching takes linear time, and drops nothing: decoding gives the text back byte for byte.
PATTERN = r" ?\p{L}[\p{L}\p{M}]*| ?[^\s\p{L}\p{N}]+|\p{N}|\s+"


class Tokenizer(Protocol):
    """Defines what the rest of the code asks of a tokenizer."""

    vocab_size: int
    specials: dict[str, int]  # control token → id

    def encode(self, text: str) -> Array:
        """Turn a text into int32 ids; control tokens spelt out in it stay text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Make text of ids: control tokens spelt out, bad UTF-8 replaced, unknown ids left out."""

    def save(self, folder: Path) -> str:
        """Write the file that `load_tokenizer` reads into the folder, and return its name."""

    def special(self, name: str) -> int:
        """Return the id of a control token, one of SPECIALS."""
        if name not in self.specials:
            raise ValueError(f"no control token {name!r} in the tokenizer, only {[*self.specials]}")
        return self.specials[name]


class HuggingFace(Tokenizer):
    """Runs a tokenizer.json with `tokenizers`, or with tiktoken, which is faster, if it can."""

    def __init__(self, standard: tokenizers.Tokenizer) -> None:
        """Find the control tokens, and make an encoder whose texts cannot spell them."""
        self.standard = standard
        standard.no_truncation()  # a file may ask for both, of every text
        standard.no_padding()
        vocab = standard.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values())
        added = standard.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items() if token.special}
        for name in (*ENDS, *SPECIALS):
            if name in vocab:
                own = "</s>" if name in ENDS else name
                self.specials[name] = self.specials[own] = vocab[name]
        spec = json.loads(standard.to_str())
        self.encoding = tiktoken_encoding(spec)
        if not self.encoding:
            unmarked = without_marks(spec, self.specials.keys())
            self.encoder = tokenizers.Tokenizer.from_str(unmarked)

    def save(self, folder: Path) -> str:
        (folder / "tokenizer.json").write_text(self.standard.to_str(), encoding="utf-8")
        return "tokenizer.json"

    def encode(self, text: str) -> Array:
        if self.encoding:
            return self.encoding.encode_to_numpy(text, disallowed_special=()).view(np.int32)
        text.encode()  # a ValueError for a lone surrogate
        return np.array(self.encoder.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(i) for i in ids if i < self.vocab_size]
        if self.encoding:
            return self.encoding.decode(ids)
        return self.standard.decode(ids, skip_special_tokens=False)


class SentencePiece(Tokenizer):
    """Runs a SentencePiece .model file, such as NVIDIA's nemotron_2_256k.model."""

    def __init__(self, path: Path) -> None:
        """Find the control tokens, and make an encoder whose texts cannot spell them."""
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        self.path = path
        model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
        self.processor = SentencePieceProcessor(model_file=str(path))
        self.vocab_size = len(model.pieces)
        self.specials = {}
        for i, piece in enumerate(model.pieces):
            if piece.piece in SPECIALS:
                self.specials[piece.piece] = i
                if piece.type != piece.UNKNOWN:
                    piece.type = piece.CONTROL  # no text matches it
        self.encoder = SentencePieceProcessor(model_proto=model.SerializeToString())

    def save(self, folder: Path) -> str:
        return shutil.copyfile(self.path, folder / "tokenizer.model").name

    def encode(self, text: str) -> Array:
        text.encode()  # a ValueError for a lone surrogate
        return np.array(self.encoder.encode(text), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.processor.decode([int(i) for i in ids if i < self.vocab_size])


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load a tokenizer from a file, or from a folder that holds one, as FOLDER or nemo:FOLDER."""
    path = Path(str(spec).removeprefix("nemo:"))
    if path.is_dir():
        path /= "tokenizer.model" if (path / "tokenizer.model").exists() else "tokenizer.json"
    if not path.exists():
        raise ValueError(f"{path}: no such file: give a .model or tokenizer.json, or their folder")
    try:
        if path.suffix == ".model":
            return SentencePiece(path)
        return HuggingFace(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as e:  # the libraries raise RuntimeError, TypeError and Exception itself
        raise ValueError(f"{path}: broken tokenizer file ({e}): fetch it again") from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFace:
    """Train a byte-level BPE, whose ids are SPECIALS, then the 256 bytes, then the merges."""
    standard = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    standard.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    standard.decoder = decoders.ByteLevel()
    how = dict(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIALS), **how)
    standard.train_from_iterator(texts, trainer)
    found = standard.get_vocab_size()
    if found != vocab_size:
        raise ValueError(f"vocab_size={vocab_size}: these texts make it {found}: ask for that")
    return HuggingFace(standard)


def tiktoken_encoding(spec: Record) -> tiktoken.Encoding | None:
    """Return what gives the same ids, if a tokenizer.json has the form that `train_bpe` makes."""
    added = spec["added_tokens"]
    specials = {token["content"]: token["id"] for token in added}
    match spec:
        case {
            "normalizer": None,
            "pre_tokenizer": {
                "pretokenizers": [
                    {"behavior": "Isolated", "pattern": {"Regex": pattern}},
                    {"add_prefix_space": False, "use_regex": False},
                ]
            },
            "model": {"ignore_merges": True, "vocab": vocab},
        } if specials.keys() >= set(SPECIALS) and all(token["special"] for token in added):
            # GPT-2's character of each byte: itself, if it prints
            chars = sorted(pre_tokenizers.ByteLevel.alphabet())
            order = sorted(range(256), key=lambda byte: (chr(byte) not in chars, byte))
            byte_of = dict(zip(chars, order, strict=True))
            ranks = {}
            for token in vocab.keys() - specials:
                ranks[bytes(byte_of[char] for char in token)] = vocab[token]
            return tiktoken.Encoding(
                "nemotron4", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
            )
    return None


def without_marks(spec: Record, marks: Set[str]) -> str:
    """Return a tokenizer.json in which marks have names that no text can spell; every id stays."""
    model = spec["model"]
    if "merges" in model:
        model["merges"] = [m for m in model["merges"] if marks.isdisjoint((*m, "".join(m)))]
    spelt = "|".join(map(re.escape, marks)) or "\0"
    secret = secrets.token_hex(16)
    return re.sub(f'"({spelt})"', rf'"\g<1>{secret}"', json.dumps(spec, ensure_ascii=False))


# ---- documents -----------------------------------------------------------------------------------

MAX_DOCUMENT_BYTES = 4 << 20  # a larger text is cut at line ends, so that memory stays bounded


class BadDocument(ValueError):
    """Says where a document or row cannot be read, which rule it breaks, and what to do."""


OnBad = Callable[[str], None]  # readers give it what they cannot read, and go on
Records = Iterator[tuple[str, Any]]  # what readers yield: ("FILE:LINE", a row or a text)


def refuse(bad: str) -> None:
    """Stop at the first bad document."""
    raise BadDocument(bad) from None


def count_bad(bad: str, skip_bad: bool, counts: Counts, level: int = logging.DEBUG) -> None:
    """Count and log a bad document if `skip_bad`, or else stop at it."""
    if not skip_bad:
        raise BadDocument(f"{bad}, or --skip-bad") from None
    log.log(level, f"left out: {bad}")
    counts["bad"] += 1


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Write a text, or lines, to a file that readers find either complete or not at all."""
    # a name of one's own: several runs may write the reference beside the same rows
    unfinished = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")
    lines = [text] if isinstance(text, str) else (f"{line}\n" for line in text)
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    unfinished.rename(path)


HELD = {}  # the lock files of the folders that this process writes


def hold(folder: Path) -> None:
    """Make this process a folder's only writer until it ends, however it ends: the kernel frees
    the lock. Raise a ValueError that names the process which has it."""
    path = folder.resolve() / ".lock"
    if path in HELD and os.fstat(HELD[path].fileno()).st_nlink:  # and it was not deleted since
        return
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(f"{folder}: {file.read()} writes into it: set another --out") from None
    except OSError as e:
        log.warning(f"{folder}: no locks here ({e.strerror}): see that nothing else writes into it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    HELD[path] = file


def unique(fields: list[tuple[str, Any]]) -> Record:
    """Make an object of its fields, of which none may come twice."""
    row = dict(fields)
    if len(row) < len(fields):
        raise ValueError(f"a field comes twice: {fields!s:.200}")
    return row


def parse_line(line: bytes, text_field: str) -> Record:
    """Return the JSON object on a line, or {text_field: line} if that is set and there is none."""
    if text_field and not line.startswith(b"{"):
        return {text_field: line.decode().rstrip("\r\n")}
    row = json.loads(line.decode(), object_pairs_hook=unique)
    if not isinstance(row, dict):
        raise ValueError(f"but a {type(row).__name__}")
    if b"\\ud" in line.lower():
        json.dumps(row, ensure_ascii=False).encode()  # raises a ValueError for a lone surrogate
    return row


@contextlib.contextmanager
def open_bytes(file: str | Path, on_bad: OnBad) -> Iterator[Any]:
    """Open a file, unpacked if its content is gzip, or for "-" standard input."""
    if str(file) == "-":
        yield sys.stdin.buffer
        return
    with open(file, "rb") as raw:
        packed = raw.peek(2).startswith(b"\x1f\x8b")
        with gzip.open(raw) if packed else contextlib.nullcontext(raw) as unpacked:
            try:
                yield unpacked
            except (EOFError, gzip.BadGzipFile, zlib.error) as e:
                on_bad(f"{file}: broken gzip stream ({e}): fetch it again")


def read_json(file: str | Path, on_bad: OnBad, text_field: str = "") -> Records:
    """Yield the object on each line that is not blank, or those of a .json file that is a list."""
    place = f"{file}:"
    with open_bytes(file, on_bad) as lines:
        listed = re.search(r"\.json(\.gz)?$", str(file), re.IGNORECASE)
        if listed and re.match(rb"[^\w{]*\[", lines.peek(9)):  # perhaps after a byte order mark
            place += " row "
            try:
                rows = json.loads(lines.read().decode("utf-8-sig"), object_pairs_hook=unique)
                lines = [json.dumps(row).encode() for row in rows]
            except (ValueError, RecursionError) as e:
                on_bad(f"{file}: not JSON, a list of objects ({e}): mend it")
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            try:
                if line.strip():
                    yield f"{place}{number}", parse_line(line, text_field)
            except (ValueError, RecursionError) as e:
                on_bad(f"{place}{number}: not JSON, an object a line ({e}): mend the line")


def read_parquet(file: str | Path, on_bad: OnBad) -> Records:
    """Yield the rows of a parquet file, a batch at a time."""
    import pyarrow.parquet  # of the extra `parquet`

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            batches = table.iter_batches(batch_size=1024)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, 1):
                yield f"{file}: row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as e:
        on_bad(f"{file}: broken parquet file ({e}): fetch it again")


def read_text(path: Path, on_bad: OnBad) -> Records:
    """Yield a text file as one document, or as several if it exceeds MAX_DOCUMENT_BYTES."""
    line = 1
    with open_bytes(path, on_bad) as file:
        while lines := file.readlines(MAX_DOCUMENT_BYTES):
            try:
                yield f"{path}:{line}", b"".join(lines).decode("utf-8")
            except UnicodeDecodeError as e:
                bad_line = line + e.object.count(b"\n", 0, e.start)
                on_bad(f"{path}:{bad_line}: not UTF-8 (byte 0x{e.object[e.start]:02x}): convert it")
            line += len(lines)


# by the end of a file's name, in any case, perhaps with .gz
READERS: dict[str, Callable[..., Any]] = {
    r"\.(jsonl|ndjson|json)": read_json,
    r"\.parquet": read_parquet,
    r"\.(txt|md|rst|tex|html|xml|css|js|ts|tsx|jsx|py|c|h|cc|cpp|hpp|cu|cuh|java|kt|scala|go|rs|rb"
    r"|php|swift|m|cs|lua|pl|r|jl|sh|sql|yaml|yml|toml|ini|cfg|cmake|asm|f90|hs|ml|ex|erl|clj|lisp"
    r"|el|proto|tf|dart|v|vhd)": read_text,
}


def reader_of(path: str | Path) -> Callable[..., Any] | None:
    """Return the reader of a file, or None if the end of its name is not known."""
    for ending, reader in READERS.items():
        if re.search(rf"{ending}(\.gz)?$", str(path), re.IGNORECASE):
            return reader
    return None


def read_records(file: str | Path, on_bad: OnBad = refuse, text_field: str = "") -> Records:
    """Yield (place, object) for each row of JSON Lines, a .json file's list or parquet. What cannot
    be read goes to `on_bad`. With `text_field`, a line that does not begin with { is a text."""
    if reader_of(file) is read_parquet:
        return read_parquet(file, on_bad)
    return read_json(file, on_bad, text_field)


def files_of(root: Path) -> list[Path]:
    """List the files below a folder in a fixed order, with hidden ones left out."""
    if not root.exists():
        raise ValueError(f"{root}: no such file or folder")
    if not root.is_dir():
        return [root]
    files = filter(Path.is_file, root.rglob("*"))
    return sorted(p for p in files if "/." not in f"/{p.relative_to(root).as_posix()}")


def read_documents(paths: Iterable[Path], text_field: str, on_bad: OnBad = refuse) -> Texts:
    """Yield the documents of files; a given file with another ending is read as text."""
    for path in paths:
        read = reader_of(path) or read_text
        for where, text in read(path, on_bad):
            if read is not read_text:
                text = text.get(text_field, text)
            if isinstance(text, str):
                yield text.removeprefix("\ufeff")  # a byte order mark
            else:
                found = sorted(text) if isinstance(text, dict) else type(text).__name__
                rule = f"no string in field {text_field!r} (found: {found}): set --text-field"
                on_bad(f"{where}: {rule}")


def embedded_code(on_bad: OnBad = refuse) -> Texts:
    """Yield the source files of Python's own library, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "ensurepip"}
    files = sorted(p for p in root.rglob("*.py") if skip.isdisjoint(p.relative_to(root).parts))
    return read_documents(files, "", on_bad)


def embedded_english(on_bad: OnBad = refuse) -> Texts:
    """Yield English by people: the topics that `help()` shows, and the docstrings of modules."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for code in embedded_code(on_bad):
        with contextlib.suppress(SyntaxError):  # a template has no docstrings
            nodes = filter(lambda node: isinstance(node, documented), ast.walk(ast.parse(code)))
            text = "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
            if len(text) > 200:
                yield text


EMBEDDED = {"english": embedded_english, "code": embedded_code}

# ---- prepare -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text into token files: files and folders of text, Markdown, source code, .jsonl (packed
    by gzip or not) or .parquet, and .json files of an object a line."""

    sources: tyro.conf.Positional[tuple[str, ...]] = ()
    """NAME=PATH of each source; several may share a name. Default: Python's own documentation."""
    out: Path = Path("data/python")  # Folder to make. It appears when it is complete, not before.
    tokenizer: str = ""  # .model or tokenizer.json file. Empty: one is trained on the texts.
    vocab_size: int = 32_768  # Size of the trained tokenizer (unused with --tokenizer).
    text_field: str = "text"  # Field of a JSON or parquet row that holds the text.
    val_fraction: float = 0.01  # Share of the documents for validation, picked by content's hash.
    skip_bad: bool = False  # Count and leave out what cannot be read, do not stop at the first.
    workers: int = os.cpu_count() or 1  # Threads that encode (encoders release Python's lock).
    shard: str = "1/1"
    """Part I/N of the files: N such tasks, anywhere, write a folder. Each drops its own repeats."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction}: at least 0, below 1")
        number, n_shards = self.part
        if not 1 <= number <= n_shards or n_shards > 1 and not (self.sources and self.tokenizer):
            raise ValueError(f"shard={self.shard!r}: I/N, as 3/128, with sources and --tokenizer")

    @property
    def part(self) -> tuple[int, ...]:
        return tuple(map(int, re.fullmatch("(?s)([0-9]+)/([0-9]+)|.*", self.shard).groups("0")))


Source = Callable[[OnBad], Texts]  # reads a source's documents from the start


def open_sources(cfg: PrepareConfig) -> tuple[dict[str, Source], list[str]]:
    """Return the sources by name, or the embedded corpus if none is given, and the names of all
    files, of which a shard has a run: the shards in their order hold the files in theirs."""
    if not cfg.sources:
        return EMBEDDED, []
    files = defaultdict(list)
    for source in cfg.sources:
        name, _, path = source.partition("=")
        if not path or not name.replace("-", "_").isidentifier():
            raise ValueError(f"source {source!r}: write NAME=PATH, NAME of letters, digits, -, _")
        root = Path(path).expanduser()
        for file in files_of(root):
            # a .json in a folder is settings more often than rows: it is to be given by name
            known = reader_of(file) and not re.search(r"\.json(\.gz)?$", file.name, re.I)
            if known or file == root:
                files[name].append(file)
        if not files[name]:
            raise ValueError(f"source {name!r}: no text, source code, .jsonl or .parquet in {root}")
    sources = {}
    names = []
    number, n_shards = cfg.part
    for name, found in files.items():
        share = np.array_split(found, n_shards)[number - 1]
        sources[name] = partial(read_documents, share, cfg.text_field)
        names += [name, *(file.name for file in found)]
    return sources, names


def training_texts(cfg: PrepareConfig, sources: dict[str, Source]) -> Texts:
    """Yield about 100 MB of text, an equal share from the beginning of each source."""
    on_bad = partial(count_bad, skip_bad=cfg.skip_bad, counts=dict(bad=0))
    for read in sources.values():
        left = 100_000_000 // len(sources)
        for text in read(on_bad):
            yield text
            left -= len(text)
            if left < 0:
                break


def clean(documents: Texts, seen: Connection, dropped: Counts) -> Iterator[tuple[str, int, int]]:
    """Yield (text, number of bytes, first 64 bits of its digest) of each document worth keeping.
    Blank ones, and exact duplicates whose digest is among `seen`, are counted in `dropped`."""
    for text in documents:
        raw = text.encode()
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        if not text.strip():
            dropped["empty"] += 1
        elif not seen.execute("INSERT OR IGNORE INTO digests VALUES (?)", (digest,)).rowcount:
            dropped["duplicate"] += 1
        else:
            yield text, len(raw), int.from_bytes(digest[:8], "big")


def encode_all(
    documents: Iterator[Any], encode: Callable[[str], Array], workers: int
) -> Iterator[tuple[Any, Array]]:
    """Yield (document, ids) in order, encoded by threads; a document is a tuple (text, ...). While
    some are yielded the next ones are read and encoded: a bounded number."""
    done = ()
    with ThreadPoolExecutor(workers) as pool:
        while some := list(itertools.islice(documents, 32 * workers)):
            ids = pool.map(encode, [document[0] for document in some])
            yield from done
            done = zip(some, ids, strict=True)
        yield from done


class TokenWriter:
    """Appends documents to STEM.bin: tokens, </s> after each document."""

    def __init__(self, stem: str) -> None:
        self.file = open(f"{stem}.bin", "wb")
        self.counts = dict(documents=0, tokens=0, bytes=0, crc=0)

    def write(self, document: Array, n_bytes: int) -> None:
        self.counts["documents"] += 1
        self.counts["tokens"] += len(document)
        self.counts["bytes"] += n_bytes
        self.counts["crc"] = zlib.crc32(document, self.counts["crc"])
        self.file.write(document)

    def close(self) -> Counts:
        """Flush the file to disk, and return the split's entry of the manifest."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.counts


def prepare_source(
    cfg: PrepareConfig, tokenizer: Tokenizer, seen: Connection, stem: Path, read: Source
) -> Record:
    """Write one source's train and validation files, and return its entry of the manifest."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    writers = {split: TokenWriter(f"{stem}.{split}") for split in ("train", "val")}
    dropped = dict(bad=0, empty=0, duplicate=0)
    on_bad = partial(count_bad, skip_bad=cfg.skip_bad, counts=dropped)
    texts = iter(tqdm(clean(read(on_bad), seen, dropped), desc=stem.name, unit=" documents"))
    for (_, n_bytes, digest), ids in encode_all(texts, tokenizer.encode, cfg.workers):
        split = "val" if digest < cfg.val_fraction * 2**64 else "train"
        writers[split].write(np.append(ids, tokenizer.special("</s>")).astype(dtype), n_bytes)
    entry = {split: writer.close() for split, writer in writers.items()}
    n = f"{entry['train']['documents']:,} documents, {entry['val']['documents']:,} for validation"
    tokens = f"{entry['train']['tokens'] + entry['val']['tokens']:,} tokens"
    log.info(f"{stem.name}: {n}, {tokens}; dropped: {dropped}")
    return dict(**entry, dropped=dropped, dtype=dtype.name)


def prepare(cfg: PrepareConfig) -> None:
    """Write a folder, or of a shard one in it, with the tokenizer, each source's token files and a
    manifest: FOLDER.partial until it is complete. The same input gives the same bytes."""
    whole = cfg.shard == "1/1"
    out = cfg.out if whole else cfg.out / "{:05d}-of-{:05d}".format(*cfg.part)
    if out.exists() and not whole:
        return log.info(f"{out}: complete before")
    if (cfg.out / "manifest.json").exists() or out.exists():
        raise ValueError(f"{cfg.out} exists: remove it, or choose another --out")
    sources, names = open_sources(cfg)
    folder = out.with_name(out.name + ".partial")
    folder.mkdir(parents=True, exist_ok=True)
    hold(folder)
    try:
        for path in folder.glob("[!.]*"):  # of a run that was killed
            path.unlink()
        tokenizer = load_tokenizer(cfg.tokenizer) if cfg.tokenizer else None
        tokenizer = tokenizer or train_bpe(training_texts(cfg, sources), cfg.vocab_size)
        file = tokenizer.save(folder)
        seen = connect("")  # a temporary file, so that memory stays bounded
        seen.execute("CREATE TABLE digests (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        writing = partial(prepare_source, cfg, tokenizer, seen)
        manifest = dict(
            vocab_size=tokenizer.vocab_size,
            eos=tokenizer.special("</s>"),
            tokenizer=file,
            sources={name: writing(folder / name, read) for name, read in sources.items()},
        )
        if not whole:
            same = f"{names} {cfg.text_field} {cfg.val_fraction}".encode()
            manifest["same"] = zlib.crc32(same + (folder / file).read_bytes())
        (folder / "manifest.json").write_text(json.dumps(manifest))
        folder.rename(out)
        (out / ".lock").unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    log.info(f"{out}: complete, vocabulary {tokenizer.vocab_size:,}")


# ---- token files and the sampler -----------------------------------------------------------------

REPORT_BLEND = {"english": 0.70, "multilingual": 0.15, "code": 0.15}  # report section 2.1


def read_manifests(folder: Path) -> tuple[list[Path], Record, Array]:
    """Return all shards of a folder, or itself, their manifests as one, and their counts (shards,
    sources, 11): 4 of train, of which tokens are the second, 4 of val, 3 of what was dropped."""
    files = [folder / "manifest.json"]
    if not files[0].exists():
        files = sorted(folder.glob("*-of-*[0-9]/manifest.json"))
        if not files:
            raise ValueError(f"{folder} has no manifest.json: run data.py prepare --out {folder}")
        names = {file.parent.name for file in files}
        n = int(max(names)[-5:])
        missing = [i for i in range(1, n + 1) if f"{i:05d}-of-{n:05d}" not in names]
        if missing or len(names) > n:
            raise ValueError(f"{folder}: {len(names)} shards of {n}, without {missing}: add them")
    counts = defaultdict(list)  # by what a shard's tokens depend on
    parts = manifest = {}
    for file in files:  # one at a time: the objects of thousands would take seconds
        manifest = json.loads(file.read_text())
        parts = [three for *three, _ in map(dict.values, manifest["sources"].values())]
        numbers = [[n for part in three for n in part.values()] for three in parts]
        counts[manifest.get("same")].append(np.array(numbers))
    same, *others = counts.values()
    if others:
        raise ValueError(f"{folder}: its shards are of other files, options or tokenizers: prepare")
    shards = np.stack(same)
    total = map(int, sum(shards).flat)
    for part in itertools.chain(*parts):
        part.update(zip(part, total, strict=False))
    return [file.parent for file in files], manifest, shards


class TokenStream:
    """Reads a split of a source: the token files of all shards as one. No file stays open."""

    def __init__(self, files: list[str], sizes: list[int], dtype: str) -> None:
        self.files = files
        self.dtype = np.dtype(dtype)
        self.starts = [0, *itertools.accumulate(sizes)]
        self[-1:]  # a folder that was cut short is found before a run

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, part: slice) -> Array:
        start, stop, _ = part.indices(len(self))
        pieces = [np.zeros(0, self.dtype)]
        while start < stop:
            shard = bisect.bisect(self.starts, start) - 1
            n_tokens = min(stop, self.starts[shard + 1]) - start
            offset = (start - self.starts[shard]) * self.dtype.itemsize
            pieces.append(np.fromfile(self.files[shard], self.dtype, n_tokens, offset=offset))
            if len(pieces[-1]) < n_tokens:
                raise ValueError(f"{self.files[shard]}: shorter than the manifest says: prepare it")
            start += n_tokens
        return np.concatenate(pieces)


class TokenData:
    """Opens a folder that `prepare` made, whole or in shards."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.shards, self.manifest, self.counts = read_manifests(self.folder)
        self.vocab_size = self.manifest["vocab_size"]
        self.sources = tuple(self.manifest["sources"])

    @property
    def fingerprint(self) -> str:
        """Identify the training tokens: a run must not be resumed on others."""
        entries = self.manifest["sources"].items()
        return " ".join(f"{s}:{e['train']['tokens']}:{e['train']['crc']:08x}" for s, e in entries)

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(f"{self.shards[0]}/{self.manifest['tokenizer']}")

    def n_tokens(self, source: str, split: str) -> int:
        return self.manifest["sources"][source][split]["tokens"]

    def bytes_per_token(self, source: str) -> float:
        """Return a source's validation ratio, which makes losses of tokenizers comparable."""
        val = self.manifest["sources"][source]["val"]
        return val["bytes"] / val["tokens"]

    def tokens(self, source: str, split: str) -> TokenStream:
        files = [f"{folder}/{source}.{split}.bin" for folder in self.shards]
        sizes = self.counts[:, self.sources.index(source), 1 if split == "train" else 5]
        return TokenStream(files, sizes.tolist(), self.manifest["sources"][source]["dtype"])

    def blend(self, weights: Blend) -> Blend:
        """Scale weights to sum to one; without any, take the report's or the sources' sizes."""
        if not weights and REPORT_BLEND.keys() >= set(self.sources):
            weights = {source: REPORT_BLEND[source] for source in self.sources}
        elif not weights:
            weights = {source: self.n_tokens(source, "train") for source in self.sources}
        unknown = sorted(weights.keys() - self.sources)
        if unknown:
            raise ValueError(f"the blend names {unknown}, {self.folder} has {list(self.sources)}")
        total = sum(weights.values())
        if min(weights.values()) < 0 or not 0 < total < float("inf"):
            raise ValueError(f"blend {weights}: weights finite, none negative, and not all zero")
        # in the manifest's order: sample i must not depend on how the weights were written down
        return {s: weights[s] / total for s in self.sources if weights.get(s)}


def permute(i: int, n: int, key: int) -> int:
    """Return the place of element i of n in the shuffle that `key` names, in O(1) memory.
    A Feistel network of four rounds permutes the numbers of 2 * half bits, and is applied until the
    result is below n. Its constants are splitmix64's (https://prng.di.unimi.it/splitmix64.c)."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left = i >> half
        right = i & mask
        for turn in range(4):
            x = (right + key + turn * 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
            left ^= (x ^ x >> 29) * 0x94D049BB133111EB >> 32 & mask
            left, right = right, left
        i = left << half | right
        if i < n:
            return i


def shares_of(blend: Blend) -> Counts:
    """Return each source's share of what those before it leave, in units of 2^-32: weights 0.5,
    0.3, 0.2 give shares 0.5, 0.6, 1. Integers round alike on every machine."""
    rest = np.cumsum(list(blend.values())[::-1])[::-1]
    sources = zip(blend.items(), rest, strict=True)
    return {source: round(weight / left * 2**32) for (source, weight), left in sources}


@dataclass(eq=False)
class Sampler:
    """Maps sample number i to a window of seq_len tokens, as a pure function of (seed, i).
    After any number of samples each source is within a sample or two of its weight. Each epoch of a
    source is a fresh shuffle of its windows, each seen once; its last window is padded."""

    data: TokenData
    blend: Blend
    seq_len: int
    seed: int
    split: str = "train"
    isolate: bool = False  # keep documents apart, which end with </s>, see `batch`
    later: dict[int, Blend] = field(default_factory=dict)  # by the sample that each begins at

    def __post_init__(self) -> None:
        """Open the sources, and split the run by blend into parts (first sample, end, shares)."""
        blends = {0: self.blend, **self.later}
        sources = dict.fromkeys(itertools.chain(*blends.values()))
        self.tokens = {source: self.data.tokens(source, self.split) for source in sources}
        self.windows = {s: -(-(len(t) - 1) // self.seq_len) for s, t in self.tokens.items()}
        for source, tokens in self.tokens.items():
            if self.split == "train" and len(tokens) <= self.seq_len:
                rule = f"fewer than one window of seq_len={self.seq_len} + 1: add text, or lower it"
                raise ValueError(f"source {source!r} has {len(tokens)} tokens, {rule}")
        ends = itertools.pairwise([*sorted(blends), sys.maxsize])
        self.parts = [(first, end, shares_of(blends[first])) for first, end in ends]

    def counts(self, i: int) -> Counts:
        """Return how many of the first i samples come from each source.

        The first source of a blend gets its share of the samples, rounded down; the next one its
        share of what is left, and so on; the last one gets the rest. With weights 0.5, 0.3, 0.2 of
        a, b, c these are floor(0.5 i), floor(0.6 (i - a)) and i - a - b. From i to i + 1 one count
        grows, by one: that is the source of sample i."""
        counts = dict.fromkeys(self.windows, 0)
        for first, end, shares in self.parts:
            left = max(0, min(i, end) - first)
            for source, share in shares.items():
                n_samples = share * left >> 32
                counts[source] += n_samples
                left -= n_samples
        return counts

    def locate(self, i: int) -> tuple[str, int, int]:
        """Return (source, epoch, window) of sample i."""
        before = self.counts(i)
        after = self.counts(i + 1)
        source = next(source for source in after if after[source] > before[source])
        n_windows = self.windows[source]
        epoch, place = divmod(before[source], n_windows)
        key = hashlib.blake2b(f"{self.seed}/{source}/{epoch}".encode(), digest_size=8).digest()
        return source, epoch, permute(place, n_windows, int.from_bytes(key, "big"))

    def describe(self, samples: Iterable[int]) -> str:
        """Name the tokens that samples are cut from, by source and place, for the log."""
        located = map(self.locate, samples)
        return "; ".join(f"{source} from token {w * self.seq_len}" for source, _, w in located)

    def epochs(self, i: int) -> dict[str, float]:
        """Return how often each source has been gone through after i samples."""
        return {source: n / self.windows[source] for source, n in self.counts(i).items()}

    def batch(self, samples: Iterable[int]) -> Arrays:
        """Return tokens and targets, int64 (B, T), with IGNORE where there is nothing to predict,
        and with `isolate` document ids, and positions that restart with each document."""
        rows = [self.row(*self.locate(i)) for i in samples]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def row(self, source: str, epoch: int, window: int) -> Arrays:
        """Return one sample's row of each array of `batch`, int64 (T)."""
        T = self.seq_len
        start = window * T
        piece = self.tokens[source][start : start + T + 1].astype(np.int64)
        piece = np.pad(piece, (0, T + 1 - len(piece)), constant_values=IGNORE)
        row = {"tokens": np.maximum(piece[:T], 0), "targets": piece[1:]}
        if self.isolate:
            ends = row["tokens"] == self.data.manifest["eos"]
            row["targets"][ends] = IGNORE
            row["documents"] = np.cumsum(ends) - ends
            begins = np.roll(ends, 1)
            row["positions"] = np.arange(T) - np.maximum.accumulate(np.arange(T) * begins)
        return row


# ---- chat template and rewards -------------------------------------------------------------------

ROLES = {"user": "User", "assistant": "Assistant"}
MARKER = re.compile("<extra_id_[012]>")
# the system text that NVIDIA's reward model was trained with (NeMo-Aligner's steerlm examples)
REWARD_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
Messages = list[dict[str, str]]  # {"role": "system" | "user" | "assistant", "content": text}
Rendered = tuple[Array, Array]  # ids, int32 (T), and which of them are trained, bool (T)


def check_messages(messages: Messages, answered: bool = False) -> None:
    """Raise a ValueError unless messages are [system,] user, assistant, user ... in this order, and
    if they are to be `answered`, end with an answer and have no empty one."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: a list of {role, content}, at least one")
    turns = itertools.cycle(ROLES)
    role = ""
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"messages[{i}]: an object with a role and a text as content")
        role = message.get("role")
        want = role if (i, role) == (0, "system") else next(turns)
        if role != want:
            rule = f"not {want!r}: an optional system turn, then user and assistant in turns"
            raise ValueError(f"messages[{i}] has role {role!r}, {rule}")
        if answered and role == "assistant" and not message["content"].strip():
            raise ValueError(f"messages[{i}] is an empty response")
    if role == "system":
        raise ValueError("messages: a user turn is missing after the system turn")
    if answered and role != "assistant":
        raise ValueError("the last message is not the assistant's")


def render_chat(messages: Messages, tokenizer: Tokenizer) -> Rendered:
    """Render messages in the template of https://huggingface.co/nvidia/Nemotron-4-340B-Instruct.

    Trained are an assistant's text and the <extra_id_1> after it, by which it learns to stop. A
    missing system turn is an empty one. A last user turn is followed by the head of an answer, for
    the model to go on from. Each text is tokenized apart from what surrounds it, so that no token
    spans a boundary, and a marker spelt out in a text stays text. There is no <s>."""
    check_messages(messages)
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    system, *turns = messages
    start = [tokenizer.special("<extra_id_0>")]
    turn = [tokenizer.special("<extra_id_1>")]
    pieces = [(start, False), (tokenizer.encode(f"System\n{system['content']}\n"), False)]
    answered = False
    for message in turns:
        pieces += [(turn, answered), (tokenizer.encode(ROLES[message["role"]] + "\n"), False)]
        answered = message["role"] == "assistant"
        pieces.append((tokenizer.encode(message["content"] + "\n"), answered))
    pieces.append((turn, answered))
    if not answered:
        pieces.append((tokenizer.encode("Assistant\n"), False))
    ids, trained = zip(*pieces, strict=True)
    return np.concatenate(ids, dtype=np.int32), np.repeat(trained, [*map(len, ids)])


def render_reward(messages: Messages, tokenizer: Tokenizer) -> Array:
    """Render a conversation for the reward model, int32 (T), by default with REWARD_SYSTEM.
    Its head reads the hidden state of <extra_id_2>, which follows the assistant's scored turn."""
    check_messages(messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError("messages: the last one, which is scored, must be the assistant's")
    if messages[0]["role"] != "system" or not messages[0]["content"]:
        turns = messages[messages[0]["role"] == "system" :]
        messages = [{"role": "system", "content": REWARD_SYSTEM}, *turns]
    ids, _ = render_chat(messages, tokenizer)
    return np.append(ids[:-1], np.int32(tokenizer.special("<extra_id_2>")))


# HelpSteer2's attributes, each 0 to 4; NVIDIA's head has Open Assistant's four before them
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
NINE_ATTRIBUTES = ("quality", "toxicity", "humor", "creativity", *ATTRIBUTES)
REWARD_WEIGHTS = (0.3, 0.74, 0.46, 0.47, -0.33)  # huggingface.co/nvidia/Nemotron-4-340B-Reward


def aggregate(attributes: Any, weights: Sequence[float] = REWARD_WEIGHTS) -> Any:
    """Sum attributes (..., 5 or 9) by weights, of which five leave out the first four of nine."""
    if not hasattr(attributes, "shape"):
        attributes = np.asarray(attributes, dtype=float)
    n = attributes.shape[-1]
    k = len(weights)
    if n not in (5, 9) or k not in (5, n):
        raise ValueError(f"{n} attributes, {k} weights: 5 or 9 attributes, 5 weights or as many")
    return sum(weight * attributes[..., n - k + i] for i, weight in enumerate(weights))


# ---- rows of alignment data ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Example:
    """Holds one row in segments: a pair has two, chosen and rejected, any other row has one."""

    ids: tuple[Array, ...]  # int32 (T) of each segment
    trained: tuple[Array, ...]  # bool (T): the tokens that a loss counts
    values: Array | None  # float32: a pair's two rewards, or a scored response's label
    where: str  # FILE:LINE, or FILE: row NUMBER

    @property
    def length(self) -> int:
        return sum(map(len, self.ids))

    @property
    def key(self) -> str:
        """Hash what log-probabilities depend on: the tokens, and which of them are trained."""
        digest = hashlib.blake2b(digest_size=16)
        for ids, trained in zip(self.ids, self.trained, strict=True):
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes() + trained.tobytes())
        return digest.hexdigest()


Parsed = tuple[list[Messages], Array | None]  # the conversation or pair, values as in Example
Render = Callable[[Messages], Rendered]
Examples = tuple[list[Example], Counts]
# columns of NeMo's, ShareGPT's and UltraFeedback's files, and our names for them
OURS = {
    "conversations": "messages", "input": "prompt", "output": "response",
    "chosen_response": "chosen", "rejected_response": "rejected",
    "score_chosen": "chosen_reward", "score_rejected": "rejected_reward",
}  # fmt: skip
# Fields of a row or message that change what it says, or what of it is trained: no reader honours
# them. And those that readers know.
UNREAD = """tool_calls function_call tools functions documents system refusal reasoning_content
reasoning thinking audio image images weight train training mask"""
READ = """messages role content from value prompt chosen rejected chosen_reward rejected_reward
response responses rewards label"""
KNOWN = {*UNREAD.split(), *READ.split(), *ATTRIBUTES}
SPEAKERS = {"human": "user", "gpt": "assistant"}


def required(row: Record, name: str, kind: type = object) -> Any:
    """Return a field, or raise a ValueError that says which field is missing."""
    if row.get(name) is None or not isinstance(row[name], kind):
        noun = {str: "text", list: "list"}.get(kind, "value")
        raise ValueError(f"no {noun} in field {name!r} (it has {sorted(row)})")
    return row[name]


def numbers(values: Sequence[Any], names: Sequence[str]) -> Array:
    """Return values as float32, each checked to be a finite number."""
    for value, name in zip(values, names, strict=True):
        if type(value) not in (int, float) or not abs(value) < 3e38:
            raise ValueError(f"{name} is {value!r:.60}, not a finite number")
    return np.array(values, np.float32)


def check_fields(fields: Record, place: str) -> None:
    """Raise a ValueError for one of UNREAD, unless it is empty, or 1 as a weight is by default."""
    for name in UNREAD.split():
        if fields.get(name) not in (None, "", [], {}, 1):
            raise ValueError(f"{place} has {name!r}, which changes it and is not read")


def in_our_names(row: Record) -> Record:
    """Return a row without null columns, with our names for the others; NeMo's system turn, which
    stands apart, joins the conversation."""
    row = {name: value for name, value in row.items() if value is not None}
    ours = {OURS.get(name, name): value for name, value in row.items()}
    if len(ours) < len(row):
        raise ValueError(f"a column twice, under two names: {sorted(row)!s:.200}")
    if "conversations" in row:
        turns = messages_of(ours["messages"], "user")
        if ours.get("system"):
            turns = messages_of(ours.pop("system"), "system") + turns
        ours["messages"] = turns
        if ours.get("mask") == "User":
            del ours["mask"]
    check_fields(ours, "the row")
    return ours


def messages_of(value: Any, role: str) -> Any:
    """Return a text as one message of `role`, and messages with their role and content alone, which
    ShareGPT and NeMo call "from" and "value"."""
    if not isinstance(value, list):
        return [{"role": role, "content": value}]
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{i}]: an object with a role and a text as content")
        check_fields(message, f"messages[{i}]")
        speaker = str(message.get("from")).lower()
        role = message.get("role", SPEAKERS.get(speaker, speaker))
        messages.append({"role": role, "content": message.get("content", message.get("value"))})
    return messages


def split_turns(text: str) -> Messages:
    r"""Split a HelpSteer2 prompt like "Hi\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\n2+2?"."""
    messages = []
    for turn in f"User\n{text}".split("\n<extra_id_1>"):
        name, _, content = turn.partition("\n")
        if name not in ROLES.values() or MARKER.search(content):
            rule = "User or Assistant, then lines without a marker"
            raise ValueError(f"turn {len(messages)} of the prompt is {turn[:60]!r}, not {rule}")
        messages.append({"role": name.lower(), "content": content})
    return messages


def read_chat(row: Record) -> Parsed:
    """Parse a conversation: messages, or a prompt and its response."""
    if "messages" in row:
        return [messages_of(row["messages"], "user")], None
    prompt = required(row, "prompt")
    if "helpfulness" in row and isinstance(prompt, str):
        prompt = split_turns(prompt)
    answer = messages_of(required(row, "response"), "assistant")
    return [messages_of(prompt, "user") + answer], None


def read_scored(row: Record, n_attributes: int) -> Parsed:
    """Parse a conversation and the attributes of its last answer, or HelpSteer2's columns."""
    own = "label" in row
    label = required(row, "label", list) if own else [required(row, name) for name in ATTRIBUTES]
    if len(label) not in (5, 9):
        raise ValueError(f"label has {len(label)} values, not 5 or 9")
    values = numbers(label, NINE_ATTRIBUTES[-len(label) :])
    # for nine attributes, the first four of a label of five are masked
    values = np.append(np.full(4, IGNORE, np.float32), values)[-n_attributes:]
    if (values == IGNORE).all():
        raise ValueError(f"none of the {n_attributes} attributes is labelled")
    return read_chat(row)[0], values


def read_preference(row: Record, rewards: bool) -> Parsed:
    """Parse two answers, chosen and rejected, perhaps with rewards: texts or messages, or whole
    conversations, which need no prompt."""
    prompt = messages_of(row.get("prompt", row.get("messages", [])), "user")
    sides = [messages_of(required(row, side), "assistant") for side in ("chosen", "rejected")]
    if not prompt and min(map(len, sides)) < 2:
        required(row, "prompt")
    chats = [side if len(side) > 1 else [*prompt, *side] for side in sides]
    before = chats[0][:-1]
    if chats[1][:-1] != before or any(message not in before for message in prompt):
        raise ValueError("chosen and rejected do not answer the same prompt")
    names = ["chosen_reward", "rejected_reward"]
    if rewards or row.keys() & names:
        return chats, numbers([required(row, name) for name in names], names)
    return chats, None


def trim(chat: Messages, last: bool) -> Messages:
    """Leave out an answer before the first question, and a `last` question without an answer."""
    system = [message for message in chat[:1] if message["role"] == "system"]
    turns = chat[len(system) :]
    if turns and turns[0]["role"] == "assistant":
        del turns[0]
    if last and turns[1:] and turns[-1]["role"] == "user":
        del turns[-1]
    return system + turns


def render_answer(messages: Messages, tokenizer: Tokenizer, judged: bool = False) -> Rendered:
    """Render messages as render_chat does, with only the last answer trained, or to be `judged` by
    a reward model, with nothing trained."""
    if judged:
        ids = render_reward(messages, tokenizer)
        return ids, np.zeros(len(ids), bool)
    ids, trained = render_chat(messages, tokenizer)
    trained[: np.flatnonzero(~trained)[-1]] = False
    return ids, trained


def fit(
    chats: list[Messages], render: Render, seq_len: int, shorten: bool
) -> tuple[list[Rendered], int]:
    """Render chats, with `shorten` without as many of their earliest exchanges as do not fit into
    seq_len tokens, and return this number too."""
    first = int(chats[0][0]["role"] == "system")
    n_removed = 0
    while True:
        rendered = [render(chat[:first] + chat[first + 2 * n_removed :]) for chat in chats]
        fits = sum(len(ids) for ids, _ in rendered) <= seq_len
        if fits or not shorten or n_removed + 1 >= len(chats[0]) // 2:
            return rendered, n_removed
        n_removed += 1


def read_rows(
    path: str | Path,
    parse: Callable[[Record], Parsed],
    render: Render,
    seq_len: int,
    skip_bad: bool = False,
    shorten: bool = False,
) -> Examples:
    """Return a file's rows of at most seq_len tokens, both sides of a pair together. A bad row
    stops the run unless `skip_bad`. A long one is left out, or with `shorten` loses its earliest
    exchanges until it fits; no answer is ever cut. A null column is none."""
    examples = []
    columns = set()
    counts = dict(bad=0, trimmed=0, long=0, shortened=0)
    on_bad = partial(count_bad, skip_bad=skip_bad, counts=counts, level=logging.WARNING)
    for where, row in read_records(path, on_bad):
        try:
            row = in_our_names(row)
            given, values = parse(row)
            chats = [trim(chat, last=parse is read_chat) for chat in given]
            for chat in chats:
                check_messages(chat, answered=True)
            rendered, n_removed = fit(chats, render, seq_len, shorten)
            example = Example(*zip(*rendered, strict=True), values, where)
            if len(chats) == 2 and np.array_equal(*example.ids):
                raise ValueError("chosen and rejected are equal as tokens")
        except (ValueError, RecursionError) as e:
            on_bad(f"{where}: {e}: mend the line")
            continue
        columns |= row.keys()
        long = example.length > seq_len
        counts["long"] += long
        if not long:
            counts["trimmed"] += chats != given
            counts["shortened"] += n_removed > 0
            examples.append(example)
    found = ", ".join(f"{count:,} {what}" for what, count in counts.items())
    if not examples:
        todo = "raise --seq-len" if counts["long"] else "look at the file"
        raise ValueError(f"{path}: no row left ({found}): {todo}")
    said = f"read: {sorted(columns & KNOWN)}, fields not read: {sorted(columns - KNOWN)}"
    log.info(f"{path}: {len(examples):,} rows; {found}; {said}")
    return examples, counts


def sft_rows(path: str | Path, tokenizer: Tokenizer, seq_len: int, **options: Any) -> Examples:
    """Read conversations, in which every turn of the assistant is trained; see read_rows."""
    return read_rows(path, read_chat, partial(render_chat, tokenizer=tokenizer), seq_len, **options)


def preference_rows(
    path: str | Path,
    tokenizer: Tokenizer,
    seq_len: int,
    rewards: bool = False,
    judged: bool = False,
    **options: Any,
) -> Examples:
    """Read pairs, which must have `rewards`, or are `judged` by a reward model; see read_rows."""
    parse = partial(read_preference, rewards=rewards)
    render = partial(render_answer, tokenizer=tokenizer, judged=judged)
    return read_rows(path, parse, render, seq_len, **options)


def reward_rows(
    path: str | Path, tokenizer: Tokenizer, seq_len: int, n_attributes: int = 5, **options: Any
) -> Examples:
    """Read scored responses, for a head of 5 or 9 attributes; see read_rows."""
    parse = partial(read_scored, n_attributes=n_attributes)
    render = partial(render_answer, tokenizer=tokenizer, judged=True)
    return read_rows(path, parse, render, seq_len, **options)


# ---- packing -------------------------------------------------------------------------------------


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return which rows share each window of `room` tokens, by their numbers. Rows come longest
    first, and each goes where it leaves least room."""
    windows = []
    spaces = []  # sorted: (room left, window)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tightest = bisect.bisect_left(spaces, (lengths[i],))
        if tightest < len(spaces):
            left, window = spaces.pop(tightest)
        else:
            left = room
            window = len(windows)
            windows.append([])
        windows[window].append(i)
        bisect.insort(spaces, (left - lengths[i], window))
    return windows


def place(rows: Iterable[Example], into: Arrays) -> None:
    """Write rows one behind the other into one window of each array of `pack`."""
    start = 0
    for s, row in enumerate(rows):
        for k, ids in enumerate(row.ids):
            end = start + len(ids)
            into["tokens"][start:end] = ids
            into["targets"][start : end - 1] = np.where(row.trained[k][1:], ids[1:], IGNORE)
            into["positions"][start:end] = np.arange(len(ids))
            into["documents"][start:end] = s * len(row.ids) + k
            into["ends"][s, k] = end - 1
            start = end


def pack(rows: Sequence[Example], window: int, packed: bool = True, pad: Callable = int) -> Arrays:
    """Put rows of one kind into windows of T = window tokens, several in each or, if not, one.
    Empty ones follow, up to W = pad(number of those with rows). With S rows in the fullest window
    and n segments in a row, the arrays are:
    tokens, positions (from 0 in each segment), targets (the next token where that is trained, else
    IGNORE), documents (n s + k in segment k of the window's row s, -1 in padding): int64 (W, T)
    rows: number of row s, -1 for none (W, S); ends: last token of each segment (W, S, n)
    if all rows have values, rewards (W, S, n) or labels (W, S, 5 or 9), float32, IGNORE for none"""
    groups = [[i] for i in range(len(rows))]
    if packed:
        groups = best_fit([row.length for row in rows], window)
    n_segments = len(rows[0].ids)
    n_windows = pad(len(groups))
    slots = (n_windows, max(map(len, groups)))
    empty = dict(tokens=0, targets=IGNORE, positions=0, documents=-1)
    out = {name: np.full((n_windows, window), value) for name, value in empty.items()}
    out["rows"] = np.full(slots, -1)
    out["ends"] = np.zeros((*slots, n_segments), np.int64)
    for w, group in enumerate(groups):
        out["rows"][w, : len(group)] = group
        into = {name: array[w] for name, array in out.items()}
        place([rows[i] for i in group], into)
    if all(row.values is not None for row in rows):
        values = np.stack([row.values for row in rows])
        filled = out["rows"] >= 0
        name = "rewards" if n_segments > 1 else "labels"
        out[name] = np.full((*slots, values.shape[1]), IGNORE, np.float32)
        out[name][filled] = values[out["rows"][filled]]
    return out


# ---- command line --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShowConfig:
    """Show what a folder holds that `prepare` made."""

    folder: tyro.conf.Positional[Path]


def show(cfg: ShowConfig) -> None:
    """Log the weights and sizes of a folder's sources."""
    data = TokenData(cfg.folder)
    log.info(f"{cfg.folder}: weights {data.blend({})}, sizes {data.manifest['sources']}")


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `--help | head` just ends
    commands = {"prepare": PrepareConfig, "show": ShowConfig}
    try:
        cfg = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
        command: Any = prepare if isinstance(cfg, PrepareConfig) else show
        command(cfg)
    except (ValueError, OSError, ImportError) as e:
        sys.exit(f"data.py: error: {e}")
    except KeyboardInterrupt:
        sys.exit("data.py: stopped: nothing is left of it, start the same again")


if __name__ == "__main__":
    main()
