"""Judge the documents of recipes.curate: read and count them, apply rules, score their quality, and
find near duplicates. A block is called with (documents, rank, number of tasks)."""

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
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data import (
    BadDocument,
    OnBad,
    files_of,
    load_tokenizer,
    read_documents,
    read_records,
    reader_of,
    write_whole,
)
from recipes.verify import Decontaminator, minhash, normalise, read_evaluations

Documents = Iterator[Any]  # datatrove's: text, id, metadata
Table = dict[str, Any]  # of TOML

# datatrove's filters, by module and class
FILTERS = {
    "gopher_quality": "gopher_quality_filter.GopherQualityFilter",
    "gopher_repetition": "gopher_repetition_filter.GopherRepetitionFilter",
    "c4_quality": "c4_filters.C4QualityFilter",
    "fineweb_quality": "fineweb_quality_filter.FineWebQualityFilter",
}

# ---- reading and counting ------------------------------------------------------------------------

WARC = re.compile(r"\.warc(\.gz)?$", re.IGNORECASE)


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
                    page = record.content_stream().read()
                    if record.raw_stream.limit:
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
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / f"{self.rule}.{self.rank:05d}.json", json.dumps(self.kept))


def gather_examples(folder: Path) -> list[Table]:
    """Return up to ten documents that each rule removed, for each of its reasons."""
    found = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        for reason, kept in json.loads(path.read_text()).items():
            found[path.name.split(".")[0], reason] += kept
    rows = []
    for (rule, reason), kept in found.items():
        for _, name, text in heapq.nsmallest(10, kept):
            rows.append({"rule": rule, "reason": reason, "id": name, "text": text})
    return rows


class Counted:
    """Runs one of datatrove's blocks, and counts what goes on: bytes and tokens, of which four
    bytes are one unless the recipe names a tokenizer."""

    def __init__(self, tokenizer: str, name: str, block: Any) -> None:
        self.block = block
        self.stats = block.stats
        self.stats.name = name
        self.tokenizer = tokenizer

    @cached_property
    def encode(self) -> Callable[[str], Any]:
        return load_tokenizer(self.tokenizer).encode

    def __call__(self, documents: Documents, rank: int, world: int) -> Documents:
        for document in self.block(documents, rank, world):
            n_bytes = len(document.text.encode())
            size = document.metadata.get("size", [0, 0])
            if size[0] != n_bytes:
                n_tokens = len(self.encode(document.text)) if self.tokenizer else n_bytes / 4
                size = document.metadata["size"] = [n_bytes, int(n_tokens)]
            self.stats["bytes"].update(size[0])
            self.stats["tokens"].update(size[1])
            yield document


class Write:
    """Writes a file for each task, also where no document is left: it is there to be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, documents: Documents, rank: int, world: int) -> Documents:
        from datatrove.pipeline.writers import JsonlWriter

        writer = JsonlWriter(str(self.folder), compression="zstd")
        writer.output_mg.get_file(f"{rank:05d}.jsonl.zst")
        yield from writer.run(documents, rank, world)


class Read:
    """Yields the documents of a task's files."""

    def __init__(self, files: list[tuple[str, str, str]], inputs: dict[str, Table], examples: Any):
        from datatrove.utils.stats import Stats

        self.files = files
        self.inputs = inputs
        self.stats = Stats("read")
        self.examples = examples

    def __call__(self, _: Any, rank: int, world: int) -> Documents:
        """Read every world-th file; what cannot be read is counted, and is among the examples."""
        from datatrove.data import Document

        def drop(reason: str, name: str) -> None:
            self.stats["dropped"].update(1)
            self.stats[f"dropped_{reason}"].update(1)
            self.examples.write(Document(name, name, metadata={"filter_reason": reason}), rank)

        on_bad = lambda bad: drop("cannot be read", str(bad))  # noqa: E731
        with self.examples:
            for name, root, file in self.files[rank::world]:
                said = self.inputs[name]
                html = said["html"] or bool(WARC.search(file))
                for number, text in enumerate(read_texts(Path(file), said["text_field"], on_bad)):
                    known = {"input": name, "language": "any", "quality": "any", "html": html}
                    where = f"{name}{file.removeprefix(root)}:{number}"
                    if text.strip():
                        self.stats["forwarded"].update(1)
                        yield Document(text, where, metadata=known)
                    else:
                        drop("empty", where)


def read_texts(path: Path, text_field: str, on_bad: OnBad) -> Iterator[str]:
    """Yield the documents of one file; what stops it goes to `on_bad` as well."""
    try:
        if WARC.search(path.name):
            yield from read_warc(path, on_bad)
        else:
            yield from read_documents([path], text_field, on_bad)
    except (ValueError, OSError) as e:
        on_bad(BadDocument(f"{path}: {e}"))


# ---- rules: True, or False and why a document goes -----------------------------------------------

Verdict = bool | tuple[bool, str]


class Extract:
    """Takes the main text of a page by trafilatura, in a process of its own, as some pages hang."""

    @cached_property
    def sandbox(self) -> Any:
        from datatrove.pipeline.extractors.base import ExtractorSandbox

        return ExtractorSandbox(timeout=10, warmup_text="")

    def __call__(self, document: Any) -> Verdict:
        if document.metadata.pop("html"):
            from trafilatura import extract

            try:
                document.text = self.sandbox.process_document(document.text, extract) or ""
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


class InLanguage:
    """Keeps texts in some languages, as lingua says, or a fastText file of the user's."""

    def __init__(self, said: Table) -> None:
        self.said = said

    @cached_property
    def shares(self) -> Callable[[str], dict[str, float]]:
        """Return what gives the languages of a line with their probabilities."""
        if self.said["model"]:
            return load_fasttext(self.said["model"])
        from lingua import LanguageDetectorBuilder

        detector = LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()

        def shares(line: str) -> dict[str, float]:
            found = detector.compute_language_confidence_values(line)
            return {one.language.iso_code_639_1.name.lower(): one.value for one in found}

        return shares

    def __call__(self, document: Any) -> Verdict:
        if self.said["inputs"] and document.metadata["input"] not in self.said["inputs"]:
            return True
        shares = self.shares(" ".join(document.text[:3000].split()))
        language = max(shares, key=shares.get)
        document.metadata["language"] = language
        if language not in self.said["languages"]:
            return False, f"in {language}"
        return shares[language] >= self.said["threshold"], "language unsure"


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

        def sent_tokenize(self, text: str) -> list[str]:
            return [text[start:end].strip() for start, end in self.span_tokenize(text)]

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


class Decontaminate:
    """Removes what shares 13 words in a row with an evaluation, as verify.Decontaminator finds."""

    def __init__(self, paths: list[str]) -> None:
        self.found = Decontaminator(read_evaluations([*map(Path, paths)]))

    def __call__(self, document: Any) -> Verdict:
        evidence = self.found.evidence(document.text)
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
        files = [path for path in files_of(Path(said[name])) if reader_of(path)]
        for text in read_documents(files, "text"):
            yield line_of(text), name == "good"


def line_of(text: str) -> str:
    return normalise(text[:10_000])


def train_quality(said: Table, model: Path, *_: Any) -> None:
    """Train a classifier on nine tenths of the documents, and measure it on the rest."""
    import fasttext

    model.parent.mkdir(parents=True, exist_ok=True)
    lines = model.with_suffix(".txt")
    held_out = []
    with lines.open("w", encoding="utf-8") as file:
        for line, good in labelled(said):
            if digest(line) % 10 == 0:
                held_out.append((line, good))
            else:
                file.write(f"__label__{'good' if good else 'ordinary'} {line}\n")
    if {good for _, good in held_out} != {True, False}:
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


class Score:
    """Notes the probability that a document is good, and the bucket that this falls into."""

    def __init__(self, model: str, buckets: list[float]) -> None:
        self.model = model
        self.buckets = buckets

    def __call__(self, document: Any) -> Verdict:
        score = load_fasttext(self.model)(line_of(document.text)).get("good", 0.0)
        bucket = int(np.searchsorted(self.buckets, score, side="right"))
        document.metadata |= {"score": round(score, 4), "quality": f"q{bucket}"}
        return True


# ---- near duplicates -----------------------------------------------------------------------------


def note_order(folder: Path, inputs: list[str], documents: Documents, rank: int, _: int):
    """Write down each document's place in an order that no task changes: of near duplicates the
    first is kept, and inputs come as the recipe names them."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{rank:05d}", "wb") as file:
        for document in documents:
            place = inputs.index(document.metadata["input"]) << 56
            file.write(np.uint64(place | digest(document.id)).tobytes())
            yield document


def cut_signature(grams: np.ndarray, n_buckets: int, rows: int) -> list[list[int]]:
    return minhash(grams)[: n_buckets * rows].reshape(n_buckets, rows).tolist()


def cluster(work: Path, *_: Any) -> None:
    """Join the pairs of all buckets, and list for each task the documents that repeat another."""
    parent: dict[tuple[int, int], tuple[int, int]] = {}
    some = [path for path in work.glob("order/*") if path.stat().st_size]  # no empty map exists
    order = {int(path.name): np.memmap(path, np.uint64, "r") for path in some}

    def root(node: tuple[int, int]) -> tuple[int, int]:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for path in sorted(work.glob("pairs/*.dups")):
        for a, i, b, j in np.fromfile(path, np.uint32).reshape(-1, 4).tolist():
            ends = [root((a, i)), root((b, j))]
            first, second = sorted(ends, key=lambda node: (order[node[0]][node[1]], node))
            parent[second] = first
    gone = defaultdict(list)
    for node in sorted(parent):
        if root(node) != node:
            gone[node[0]].append(node[1])
    (work / "repeats").mkdir(exist_ok=True)
    for file, documents in gone.items():
        np.array(documents, np.uint32).tofile(work / "repeats" / f"{file:06d}.remove")
