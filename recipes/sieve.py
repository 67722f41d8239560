"""Judge the documents of recipes.curate: read and count them, apply rules, score their quality, and
find near duplicates. A block is called with (documents, rank, number of tasks)."""

import errno
import hashlib
import heapq
import importlib
import json
import os
import re
import sysconfig
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np

from data import (
    MAX_DOCUMENT_BYTES,
    BadDocument,
    OnBad,
    files_of,
    load_tokenizer,
    open_bytes,
    read_documents,
    read_parquet,
    read_records,
    reader_of,
    write_whole,
)
from recipes.verify import Decontaminator, minhash, normalise

Documents = Iterator[Any]  # datatrove's: text, id, metadata
Table = dict[str, Any]  # of TOML
tokenizer_of = cache(load_tokenizer)

# datatrove's filters, by module and class
FILTERS = {
    "gopher_quality": "gopher_quality_filter.GopherQualityFilter",
    "gopher_repetition": "gopher_repetition_filter.GopherRepetitionFilter",
    "c4_quality": "c4_filters.C4QualityFilter",
    "fineweb_quality": "fineweb_quality_filter.FineWebQualityFilter",
}

# ---- reading and counting ------------------------------------------------------------------------

WARC = re.compile(r"\.warc(\.gz)?$", re.IGNORECASE)
LONGEST = 4 * MAX_DOCUMENT_BYTES  # of a line or page: rules take some sixty times its memory


def list_files(inputs: dict[str, Table]) -> list[tuple[str, str, str]]:
    """Return (input, its folder, file) of all files, the largest first: tasks take every n-th."""
    found = []
    for name, said in inputs.items():
        root = Path(said["path"].format(**sysconfig.get_paths())).expanduser()
        paths = files_of(root)
        if said["files"]:
            paths = [path for path in paths if path.match(said["files"])]
        elif root.is_dir():
            paths = [path for path in paths if reader_of(path) or WARC.search(path.name)]
        if not paths:
            raise ValueError(f"input {name!r}: no file in {root} that is read: give its `files`")
        found += [(-path.stat().st_size, name, str(root), str(path)) for path in paths]
    return [(name, root, file) for _, name, root, file in sorted(found)]


def read_warc(path: Path, on_bad: OnBad) -> Iterator[str]:
    """Yield the pages of a WARC file: its responses that are HTML."""
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    number = 0
    try:
        with path.open("rb") as file:
            for record in ArchiveIterator(file):
                number += 1
                if record.format != "warc":
                    raise EOFError("it is no WARC record")
                headers = record.http_headers if record.rec_type == "response" else None
                kind = headers.get_header("Content-Type", "") if headers else ""
                if "html" in kind:
                    named = re.search(r"charset=\W?([\w-]+)", kind)
                    page = record.content_stream().read(LONGEST + 1)
                    if record.raw_stream.limit and len(page) <= LONGEST:
                        raise EOFError("it ends within the record")
                    yield page.decode(named[1] if named else "utf-8", "replace")
    except (ArchiveLoadFailed, EOFError, LookupError, zlib.error) as e:
        on_bad(BadDocument(f"{path}: broken at record {number} ({e}): fetch it again"))


def digest(text: str) -> int:
    """Return 56 bits of a text's hash: an order that depends on nothing else."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


class Examples:
    """Takes what a rule removes, in place of datatrove's writers, and keeps ten for each reason:
    those whose names have the least digests, whatever task saw them."""

    def __init__(self, folder: Path, rule: str) -> None:
        self.folder = folder
        self.rule = rule

    def __enter__(self) -> "Examples":
        self.kept = defaultdict(list)
        return self

    def write(self, document: Any, rank: int = 0) -> None:
        self.rank = rank
        kept = self.kept[document.metadata.get("filter_reason", self.rule)]
        kept.append((digest(document.id), document.id, document.text[:800]))
        kept[:] = heapq.nsmallest(10, kept)

    def __exit__(self, *_: Any) -> None:
        if self.kept:
            self.folder.mkdir(exist_ok=True)
            write_whole(self.folder / f"{self.rule}.{self.rank:05d}.json", json.dumps(self.kept))


def gather_examples(folder: Path) -> Iterator[Table]:
    """Yield up to ten documents that each rule removed, for each of its reasons."""
    found = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        for reason, kept in json.loads(path.read_text()).items():
            found[path.name.split(".")[0], reason] += kept
    for (rule, reason), kept in found.items():
        for _, name, text in heapq.nsmallest(10, kept):
            yield {"rule": rule, "reason": reason, "id": name, "text": text}


class Counted:
    """Runs one of datatrove's blocks, and counts what goes on: bytes and tokens, of which four
    bytes are one unless the recipe names a tokenizer."""

    def __init__(self, tokenizer: str, name: str, block: Any) -> None:
        self.block = block
        self.stats = block.stats
        self.stats.name = name
        self.tokenizer = tokenizer

    def __call__(self, documents: Documents, rank: int, world: int) -> Documents:
        for document in self.block(documents, rank, world):
            n_bytes = len(document.text.encode())
            size = document.metadata.get("size", [0, 0])
            if size[0] != n_bytes:
                size = document.metadata["size"] = [n_bytes, n_bytes // 4]
                if self.tokenizer:
                    size[1] = len(tokenizer_of(self.tokenizer).encode(document.text))
            self.stats["bytes"].update(size[0])
            self.stats["tokens"].update(size[1])
            yield document


def write_rows(folder: Path, documents: Documents, rank: int, world: int) -> Documents:
    """Write a file for each task, also where no document is left: it is there to be read."""
    from datatrove.pipeline.writers import JsonlWriter

    writer = JsonlWriter(str(folder), compression="zstd")
    writer.output_mg.get_file(f"{rank:05d}.jsonl.zst")
    yield from writer.run(documents, rank, world)


class Read:
    """Yields the documents of a task's files."""

    def __init__(self, files: list, inputs: dict[str, Table], work: Path, examples: Any) -> None:
        from datatrove.utils.stats import Stats

        self.files = files
        self.inputs = inputs
        self.work = work
        self.stats = Stats("read")
        self.examples = examples

    def __call__(self, _: Any, rank: int, world: int) -> Documents:
        """Read every world-th file; what cannot be read is counted, and is among the examples."""
        from datatrove.data import Document

        def drop(reason: str, name: str) -> None:
            for count in ("dropped", f"dropped_{reason}"):
                self.stats[count].update(1)
            self.examples.write(Document(name, name, metadata={"filter_reason": reason}), rank)

        on_bad = lambda bad: drop("cannot be read", str(bad))  # noqa: E731
        with self.examples:
            for name, root, file in self.files[rank::world]:
                said = self.inputs[name]
                html = said["html"] or bool(WARC.search(file))
                texts = read_texts(Path(file), said["text_field"], self.work, on_bad)
                for number, text in enumerate(texts):
                    known = {"input": name, "language": "any", "quality": "any", "html": html}
                    where = f"{name}{file.removeprefix(root)}:{number}"
                    if not text.strip():
                        drop("empty", where)
                    elif len(text.encode()) > LONGEST:
                        drop("too long", where)
                    else:
                        self.stats["forwarded"].update(1)
                        yield Document(text, where, metadata=known)


def short_lines(path: Path, on_bad: OnBad) -> Iterator[bytes]:
    """Yield a file's lines; one that is too long is named, and blank."""
    with open_bytes(path, on_bad) as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST), b""), 1):
            if len(line) < LONGEST:
                yield line
            else:
                on_bad(f"{path}:{number}: a line of {LONGEST:,} bytes or more: cut it into several")
                yield b"\n"
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST)


def read_texts(path: Path, text_field: str, folder: Path, on_bad: OnBad) -> Iterator[str]:
    """Yield the documents of one file; what stops it goes to `on_bad` as well. Of a file with lines
    that are too long a copy without them is read, which lies in `folder` meanwhile."""
    long = []
    try:
        if WARC.search(path.name):
            yield from read_warc(path, on_bad)
        elif reader_of(path) != read_parquet and any(long for _ in short_lines(path, long.append)):
            with NamedTemporaryFile(suffix=path.name, dir=folder) as copy:
                copy.writelines(short_lines(path, on_bad))
                copy.flush()
                named = lambda bad: on_bad(bad.replace(copy.name, str(path)))  # noqa: E731
                yield from read_documents([Path(copy.name)], text_field, named)
        else:
            yield from read_documents([path], text_field, on_bad)
    except (ValueError, OSError) as e:
        if errno.ENOSPC in e.args:
            raise
        on_bad(BadDocument(f"{path}: {e}"))


# ---- rules: True, or False and why a document goes -----------------------------------------------

Verdict = bool | tuple[bool, str]


@cache
def sandbox() -> Any:
    from datatrove.pipeline.extractors.base import ExtractorSandbox

    return ExtractorSandbox(timeout=10, warmup_text="")


def extract(document: Any) -> Verdict:
    """Take the main text of a page by trafilatura, in a process of its own, as some pages hang."""
    if document.metadata.pop("html"):
        import trafilatura

        try:
            document.text = sandbox().process_document(document.text, trafilatura.extract) or ""
        except (OSError, EOFError):  # a TimeoutError among them
            return False, "no end to its extraction"
    return bool(document.text), "no main text"


@cache
def load_fasttext(path: str) -> Callable[[str], dict[str, float]]:
    """Load a fastText file, and return what gives a line's labels with their probabilities."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such fastText file: train one, or fetch it before")
    import fasttext

    model = fasttext.load_model(path)

    def predict(line: str) -> dict[str, float]:
        labels, shares = model.predict(line, k=-1)
        return dict(zip((label.removeprefix("__label__") for label in labels), shares, strict=True))

    return predict


@cache
def load_lingua() -> Callable[[str], dict[str, float]]:
    """Load lingua, and return what gives a line's languages with their probabilities."""
    from lingua import LanguageDetectorBuilder

    detector = LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()

    def predict(line: str) -> dict[str, float]:
        found = detector.compute_language_confidence_values(line)
        return {one.language.iso_code_639_1.name.lower(): one.value for one in found}

    return predict


def in_language(said: Table, document: Any) -> Verdict:
    """Keep a text in some languages, as lingua says, or a fastText file of the user's."""
    if said["inputs"] and document.metadata["input"] not in said["inputs"]:
        return True
    predict = load_fasttext(said["model"]) if said["model"] else load_lingua()
    shares = predict(" ".join(document.text[:3000].split()))
    language = max(shares, key=shares.get)
    document.metadata["language"] = language
    if language not in said["languages"]:
        return False, f"in {language}"
    return shares[language] >= said["threshold"], "language unsure"


def word_tokenizer() -> Any:
    """Return what datatrove's filters find words with: without a download, for any language that
    has blanks between them."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            ends = re.finditer(r"(?s).+?(?:[.!?。！？…]+[\"'”)]*\s+|\n+|$)", text)
            return [found.span() for found in ends]

        sent_tokenize = None  # filters take the spans

    return Words()


class Heuristic:
    """Applies one of datatrove's filters, perhaps to some inputs or languages alone."""

    def __init__(self, said: Table) -> None:
        self.only = [(key, said[f"{key}s"]) for key in ("input", "language") if f"{key}s" in said]
        module, name = FILTERS[said["filter"]].split(".")
        kind = getattr(importlib.import_module(f"datatrove.pipeline.filters.{module}"), name)
        options = {key: said[key] for key in said.keys() - {"filter", "inputs", "languages"}}
        try:
            self.filter = kind(**options, language=word_tokenizer())
        except TypeError as e:
            raise ValueError(f"rule {said['filter']!r}: {e}") from None

    def __call__(self, document: Any) -> Verdict:
        outside = any(document.metadata[key] not in allowed for key, allowed in self.only)
        return outside or self.filter.filter(document)


def decontaminate(evaluations: Decontaminator, document: Any) -> Verdict:
    """Remove what shares 13 words in a row with an evaluation."""
    evidence = evaluations.evidence(document.text)
    return not evidence, f"shares text with {str(evidence).split(': ')[0]}"


# ---- quality -------------------------------------------------------------------------------------


def labelled(said: Table) -> Iterator[tuple[str, bool]]:
    """Yield (line, whether it is good) of two folders, or of a judge's rows {text, score}."""
    if said["judged"]:
        for where, row in read_records(said["judged"]):
            if type(row.get("text")) is not str or type(row.get("score")) not in (int, float):
                raise ValueError(f"{where}: no `text` and `score`: give each row both")
            yield line_of(row["text"]), row["score"] >= said["good_from"]
    for name in ("good", "ordinary") if said["good"] else ():
        for text in read_documents(filter(reader_of, files_of(Path(said[name]))), "text"):
            yield line_of(text), name == "good"


def line_of(text: str) -> str:
    return normalise(text[:10_000])


def train_quality(said: Table, model: Path, *_: Any) -> None:
    """Train a classifier on nine tenths of the documents, and measure it on the rest."""
    import fasttext

    lines = model.with_suffix(".txt")
    held_out = []
    with lines.open("w", encoding="utf-8") as file:
        for line, good in labelled(said):
            if digest(line) % 10 == 0:
                held_out.append((line, good))
            else:
                file.write(f"__label__{'good' if good else 'ordinary'} {line}\n")
    if len({good for _, good in held_out}) < 2:
        raise ValueError("quality: too few good or ordinary documents: 100 of each, or more")
    options = dict(wordNgrams=2, dim=32, bucket=200_000, epoch=20, lr=0.5, thread=1, verbose=0)
    fasttext.train_supervised(str(lines), **options).save_model(f"{lines}.bin")
    predict = load_fasttext(f"{lines}.bin")
    said_good = Counter((predict(line)["good"] >= 0.5, good) for line, good in held_out)
    hits = said_good[True, True]
    found = {"held_out": len(held_out), "recall": hits / (hits + said_good[False, True])}
    found["precision"] = hits / max(1, hits + said_good[True, False])
    write_whole(model.with_suffix(".json"), json.dumps(found))
    os.replace(f"{lines}.bin", model)


def choose_folder(template: str, document: Any) -> Verdict:
    document.metadata["folder"] = template.format(**document.metadata)
    return True


def note_quality(model: str, buckets: list[float], document: Any) -> Verdict:
    """Note the probability that a document is good, and the bucket that this falls into."""
    score = load_fasttext(model)(line_of(document.text)).get("good", 0.0)
    bucket = int(np.searchsorted(buckets, score, side="right"))
    document.metadata |= {"score": round(score, 4), "quality": f"q{bucket}"}
    return True


# ---- near duplicates -----------------------------------------------------------------------------


def note_order(folder: Path, inputs: list[str], documents: Documents, rank: int, _: int):
    """Write down each document's place in an order that no task changes: of near duplicates the
    first is kept, and inputs come as the recipe names them."""
    folder.mkdir(exist_ok=True)
    with open(folder / f"{rank:05d}", "wb") as file:
        for document in documents:
            place = inputs.index(document.metadata["input"]) << 56
            file.write(np.uint64(place | digest(document.id)).tobytes())
            yield document


def cut_signature(grams: np.ndarray, n_buckets: int, rows: int) -> list[list[int]]:
    return minhash(grams)[: n_buckets * rows].reshape(n_buckets, rows).tolist()


def cluster(work: Path, *_: Any) -> None:
    """Join the pairs of all buckets, and list for each task the documents that repeat another."""
    parent = {}
    order = {}
    for path in work.glob("order/*"):
        if path.stat().st_size:  # no empty map exists
            order[int(path.name)] = np.memmap(path, np.uint64, "r")

    def root(node: Any) -> Any:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for path in sorted(work.glob("pairs/*.dups")):
        for a, i, b, j in np.fromfile(path, np.uint32).reshape(-1, 4).tolist():
            ends = root((a, i)), root((b, j))
            first, second = sorted(ends, key=lambda node: (order[node[0]][node[1]], node))
            parent[second] = first
    gone = defaultdict(list)
    for node in sorted(parent):
        if root(node) != node:
            gone[node[0]].append(node[1])
    (work / "repeats").mkdir(exist_ok=True)
    for file, documents in gone.items():
        np.array(documents, np.uint32).tofile(work / "repeats" / f"{file:06d}.remove")
