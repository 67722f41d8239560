"""recipes/curate.py and sieve.py: recipes, the funnel, near duplicates across tasks, bad input, and
runs that die. What runs datatrove itself is skipped where it is not installed."""

import errno
import fcntl
import gzip
import itertools
import json
import os
import random
import re
import resource
import signal
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_verify import SCRIPTS, planted_pair

import data
from recipes import curate, sieve, verify
from recipes.curate import CurateConfig

ROOT = Path(__file__).parents[1]
needs_datatrove = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("datatrove"),
    reason="datatrove is not installed: pip install -e '.[curate]'",
)

# ---- without datatrove ---------------------------------------------------------------------------

INPUT = '[inputs.a]\npath = "."\n'
MISTAKES = {
    "[inputs": "no TOML",
    "": "give [inputs.NAME], each with a path",
    "[inputs.a]": "give [inputs.NAME], each with a path",
    INPUT + "[near_duplicate]\n": "'near_duplicate' is none of",
    INPUT + "[near_duplicates]\ntreshold = 0.7\n": "[near_duplicates]: 'treshold' is none of",
    INPUT + '[near_duplicates]\nthreshold = "0.7"\n': "threshold = '0.7' is no float",
    INPUT + "[near_duplicates]\nthreshold = true\n": "threshold = True is no float",
    'language = "en"\n' + INPUT: "language = 'en' is no dict",
    INPUT + 'pth = "."\n': "[inputs.a]: 'pth' is none of path, files",
    INPUT + '[[rules]]\nfilter = "gopher"\n': "filter = one of gopher_quality",
    INPUT + '[[rules]]\nfilter = "c4_quality"\ninputs = ["b"]\n': "'b' is none of a",
    INPUT + '[language]\nlanguages = ["en"]\ninputs = ["b"]\n': "'b' is none of a",
    'folder = "{quality}"\n' + INPUT: "no section [quality]",
    'folder = "{id}"\n' + INPUT: "no section [id]",
    'rules = ["c4_quality"]\n' + INPUT: "filter = one of",
    "inputs = 3": "inputs = 3 is no dict",
    '[inputs]\na = "."\n': "is no table of path",
}


@pytest.mark.parametrize("text, says", MISTAKES.items(), ids=range(len(MISTAKES)))
def test_a_mistake_in_a_recipe_is_named_in_one_line(tmp_path, text, says):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        curate.read_recipe(path)
    assert says in str(error.value) and "\n" not in str(error.value) and str(path) in str(error)


def test_the_example_recipe_names_all_that_a_recipe_may_say_and_nothing_else(tmp_path):
    example = ROOT / "recipes" / "curate.toml"
    assert curate.read_recipe(example)["inputs"].keys() == {"descriptions", "code", "licences"}
    lines = []
    for line in example.read_text().splitlines():
        said = line.removeprefix("# ")
        lines.append(said if "=" in said.split("#")[0] or said.startswith("[") else line)
    path = tmp_path / "all.toml"
    path.write_text("\n".join(line for line in lines if not line.startswith("# ")))
    recipe = curate.read_recipe(path)
    assert all(recipe[name] for name in (*curate.TOP, *curate.SECTIONS))
    for name in curate.SECTIONS.keys() - {"inputs"}:
        assert recipe[name].keys() == curate.SECTIONS[name].keys()
        assert f"[{name}]" in example.read_text()


def test_files_are_those_that_prepare_reads_or_of_a_pattern_the_largest_first(tmp_path):
    sizes = {"a.txt": 5, "b/c.jsonl": 9, "b/LICENSE": 7, "x.warc.gz": 20, "d.py": 1, ".h.txt": 3}
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x" * size)
    said = curate.SECTIONS["inputs"] | {"path": str(tmp_path)}
    found = [Path(file).name for _, _, file in sieve.list_files({"all": said})]
    assert found == ["x.warc.gz", "c.jsonl", "a.txt", "d.py"]
    found = sieve.list_files({"licences": said | {"files": "*LICEN[CS]E*"}})
    assert found == [("licences", str(tmp_path), str(tmp_path / "b" / "LICENSE"))]
    with pytest.raises(ValueError, match="input 'none'.*give its `files`"):
        sieve.list_files({"none": said | {"files": "*.zip"}})
    stdlib = curate.SECTIONS["inputs"] | {"path": "{stdlib}/json"}
    assert any(file.endswith("decoder.py") for _, _, file in sieve.list_files({"code": stdlib}))


def block(name, **counts):
    return {"name": name, "time_stats": {"total": 0.5}, "stats": counts}


def test_the_funnel_adds_what_tasks_counted_and_every_document_is_left_or_removed(tmp_path):
    first = {"forwarded": 3, "dropped": {"total": 2}, "dropped_short": 2, "bytes": {"total": 30}}
    second = {"forwarded": 4, "dropped": 0, "bytes": {"total": 50, "mean": 12.5}, "tokens": 9}
    for rank, counts in enumerate((first, second)):
        folder = tmp_path / "2-read" / "stats"
        folder.mkdir(parents=True, exist_ok=True)
        blocks = [block("read", **counts), block("gone", dropped=7, dropped_long=7)]
        text = json.dumps([*blocks, block("writer", total=7)])
        (folder / f"{rank:05d}.json").write_text(text)
    rows = curate.funnel_of(curate.merge_stats(tmp_path))
    assert [row["rule"] for row in rows] == ["read", "gone"]
    assert rows[0] == {
        "rule": "read", "removed": {"short": 2}, "forwarded": 7, "bytes": 80, "tokens": 9,
        "seconds": 1.0, "dropped": 2,
    }  # fmt: skip
    assert rows[1]["forwarded"] == 0 and rows[1]["removed"] == {"long": 14}
    page = "\n".join(curate.page_of(rows, {"english": 7}, {"recall": 0.5}))
    assert "| gone | 0 | 0.00 | 0 | 1.0 | 14: 14 long |" in page
    assert "| english | 7 |" in page and "'recall': 0.5" in page


def test_examples_do_not_depend_on_how_documents_fall_to_tasks(tmp_path):
    documents = []
    for i in range(60):
        why = {"filter_reason": "long" if i % 3 else "short"} if i % 5 else {}
        documents.append(SimpleNamespace(id=f"doc {i}", text=f"text {i}" * 200, metadata=why))
    found = []
    for world in (1, 4):
        folder = tmp_path / str(world)
        for rank in range(world + 1):  # the last finds nothing to remove
            with sieve.Examples(folder, "rule") as examples:
                for document in documents[rank::world] if rank < world else ():
                    examples.write(document, rank)
        found.append(sorted(sieve.gather_examples(folder), key=lambda row: row["id"]))
    assert found[0] == found[1]
    assert sorted({row["reason"] for row in found[0]}) == ["long", "rule", "short"]
    assert len(found[0]) == 30 and all(len(row["text"]) == 800 for row in found[0])


def test_of_near_duplicates_the_first_in_order_is_kept_whatever_the_tasks(tmp_path):
    rng = random.Random(0)
    n = 90
    order = rng.sample(range(1 << 50), n)
    edges = [(rng.randrange(n), rng.randrange(n)) for _ in range(60)]
    group = list(range(n))  # by brute force: the least number that can be reached
    for _ in range(n):
        for a, b in edges:
            group[a] = group[b] = min(group[a], group[b], key=lambda i: order[i])
    kept = []
    for world in (1, 3):
        work = tmp_path / str(world)
        for name in ("order", "pairs"):
            (work / name).mkdir(parents=True)
        for rank in range(world):
            np.array(order[rank::world], np.uint64).tofile(work / "order" / f"{rank:05d}")
        places = [(a % world, a // world, b % world, b // world) for a, b in edges]
        for number, part in enumerate((places[:20], places[20:])):
            np.array(part, np.uint32).tofile(work / "pairs" / f"{number:05d}_00.dups")
        sieve.cluster(work)
        gone = set()
        for path in (work / "repeats").iterdir():
            rank = int(path.stem)
            gone |= {i * world + rank for i in np.fromfile(path, np.uint32).tolist()}
        kept.append(set(range(n)) - gone)
    assert kept[0] == kept[1] == {i for i in range(n) if group[i] == i}


def test_an_input_that_the_recipe_names_first_comes_first_in_order(tmp_path):
    documents = []
    for i in range(20):
        known = {"input": "ab"[i % 2]}
        documents.append(SimpleNamespace(id=f"{i}", text="", metadata=known))
    assert [*sieve.note_order(tmp_path, ["b", "a"], documents, 3, 4)] == documents
    order = np.fromfile(tmp_path / "00003", np.uint64)
    assert order[0::2].min() > order[1::2].max() and len({*order.tolist()}) == 20


def test_a_plan_has_every_step_and_grows_with_the_input_and_shrinks_with_cores(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(INPUT + 'html = true\n[[rules]]\nfilter = "c4_quality"\n[near_duplicates]\n')
    recipe = curate.read_recipe(path)

    def read(**options):
        cfg = CurateConfig(path, cores=options.pop("cores", 1))
        *rows, _, said = curate.plan(recipe, cfg, options["n_bytes"])
        hours = {row.split(" | ")[0][2:]: float(row.split(" | ")[2][:-2]) for row in rows[3:]}
        return hours, said

    hours, said = read(n_bytes=1e12)
    assert [*hours] == ["read", "extract", "c4_quality", "near_duplicates", "write"]
    assert hours["extract"] == pytest.approx(1e6 / curate.SPEEDS["extract"] / 3600, abs=0.01)
    assert "1,000.00 GB, some 250.00 billion tokens" in said
    more = read(n_bytes=8e12, cores=4)[0]
    assert all(more[step] == pytest.approx(2 * hours[step], abs=0.02) for step in hours)
    assert curate.SPEEDS.keys() > {*sieve.FILTERS, *curate.SECTIONS} - {"inputs"}


def test_a_dry_run_writes_nothing_and_needs_no_datatrove(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "datatrove.io", None)
    (tmp_path / "a.txt").write_text("x" * 1000)
    path = tmp_path / "recipe.toml"
    path.write_text(f'[inputs.a]\npath = "{tmp_path}"\n')
    curate.log.propagate = True
    with caplog.at_level("INFO"):
        curate.curate(CurateConfig(path, tmp_path / "out", dry_run=True))
    assert "0.00 GB" in caplog.text and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"pip install -e '\.\[curate\]'"):
        curate.curate(CurateConfig(path, tmp_path / "out"))
    with pytest.raises(ValueError, match="tasks=0: a number, at least 1"):
        CurateConfig(path, tasks=0)


def test_labels_come_from_two_folders_or_from_the_scores_of_a_judge(tmp_path):
    for name in ("good", "ordinary"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"A {name.upper()} text!")
    said = curate.SECTIONS["quality"] | {"good": str(tmp_path / "good")}
    said |= {"ordinary": str(tmp_path / "ordinary")}
    assert [*sieve.labelled(said)] == [("a good text", True), ("a ordinary text", False)]
    path = tmp_path / "judged.jsonl"
    path.write_text('{"text": "One.", "score": 3}\n{"text": "Two.", "score": 2.9}\n')
    said = curate.SECTIONS["quality"] | {"judged": str(path)}
    assert [*sieve.labelled(said)] == [("one", True), ("two", False)]
    path.write_text('{"text": "One.", "score": "high"}\n')
    with pytest.raises(ValueError, match=r"judged\.jsonl:1: no `text` and `score`"):
        [*sieve.labelled(said)]


# ---- with datatrove ------------------------------------------------------------------------------

WORDS = [a + b for a in ("ba", "ke", "li", "mo", "nu", "ro") for b in ("ran", "sel", "tip", "vor")]
STOPS = ("the", "of", "and", "to", "that", "with")
SHARED = "how many apples has the boy who gave three of his twelve to her"
EVALUATION = f"Say: {SHARED} sister before noon?"

RULES = """
[[rules]]
filter = "gopher_quality"
[[rules]]
filter = "gopher_repetition"
inputs = ["prose", "rows"]
[near_duplicates]
[decontaminate]
evaluations = ["{here}/evaluations.jsonl"]
[inputs.prose]
path = "{here}/prose"
[inputs.rows]
path = "{here}/rows"
text_field = "content"
"""


def prose(rng, n=120):
    """A text of some sentences, in words that no other text has in this order."""
    words = [rng.choice(STOPS if i % 4 == 0 else WORDS) for i in range(n)]
    return ". ".join(" ".join(words[i : i + 12]) for i in range(0, n, 12)) + "."


@pytest.fixture
def corpus(tmp_path):
    """Good documents, and some that each rule removes: {what: its texts}."""
    rng = random.Random(1)
    texts = {"good": [prose(rng) for _ in range(40)]}
    texts["repeated"] = ["It is the same line of words again.\n" * 30 for _ in range(2)]
    texts["short"] = ["Too few words to keep.", "The end of it."]
    texts["leaked"] = [f"{prose(rng)} {SHARED.upper()}, and {prose(rng)}" for _ in range(3)]
    texts["near"] = [text.replace("ran", "ren", 1) for text in texts["good"][:12]]
    for folder in ("prose", "rows"):
        (tmp_path / folder).mkdir()
    every = [text for kind in texts.values() for text in kind]
    for i, text in enumerate(every):
        if i % 2:
            (tmp_path / "prose" / f"{i:03d}.txt").write_text(text)
    rows = [json.dumps({"content": text}) + "\n" for text in every[::2]]
    for i in range(3):
        with gzip.open(tmp_path / "rows" / f"{i}.jsonl.gz", "wt") as file:
            file.writelines(rows[i::3])
    (tmp_path / "evaluations.jsonl").write_text(json.dumps({"question": EVALUATION}) + "\n")
    (tmp_path / "recipe.toml").write_text(RULES.format(here=tmp_path))
    return texts


def curated(tmp_path, name, **options):
    curate.curate(CurateConfig(tmp_path / "recipe.toml", tmp_path / name, **options))
    return read_documents(tmp_path / name)


def with_fewer_buckets(tmp_path):
    """Change the recipe to one that has a third of the tasks, where only their number counts."""
    text = (tmp_path / "recipe.toml").read_text()
    text = text.replace("[near_duplicates]", "[near_duplicates]\nthreshold = 0.9")
    (tmp_path / "recipe.toml").write_text(text)


def read_documents(out):
    """(folder, id, text) of each document that a run wrote, in no particular order of files."""
    found = []
    for path in (out / "documents").rglob("*.jsonl.gz"):
        folder = path.parent.relative_to(out / "documents").as_posix()
        rows = [json.loads(line) for line in gzip.open(path, "rt")]
        found += [(folder, row["id"], row["text"]) for row in rows]
    return sorted(found)


def funnel(out):
    rows = json.loads((out / "funnel.json").read_text())["funnel"]
    for row in rows:
        del row["seconds"]
    return rows


def examples(out):
    return sorted((out / "examples.jsonl").read_text().splitlines())


@needs_datatrove
def test_a_recipe_leaves_what_is_good_and_says_why_the_rest_went(tmp_path, corpus):
    found = curated(tmp_path, "out", tasks=2)
    texts = {text for _, _, text in found}
    n_good = len(corpus["good"])
    assert len(found) == n_good and {folder for folder, _, _ in found} == {"prose", "rows"}
    near = {*corpus["good"], *corpus["near"]}
    assert texts <= near  # of a text and its near duplicate, one: that of the first input
    assert len({text.replace("ren", "ran") for text in texts}) == n_good
    rows = {row["rule"]: row for row in funnel(tmp_path / "out")}
    n_all = sum(map(len, corpus.values()))
    before = n_all
    for row in rows.values():
        assert row["forwarded"] + row["dropped"] == before
        before = row["forwarded"]
    assert before == n_good
    removed = {name: row["dropped"] for name, row in rows.items() if row["dropped"]}
    assert removed == {
        "1 gopher_quality": 2, "2 gopher_repetition": 2, "near_duplicates": 12, "decontaminate": 3
    }  # fmt: skip
    where = f"{tmp_path}/evaluations.jsonl:1"
    assert rows["decontaminate"]["removed"] == {f"shares text with {where}": 3}
    assert rows["1 gopher_quality"]["removed"] == {"gopher_short_doc": 2}
    n_bytes = sum(len(text.encode()) for text in texts)
    assert rows["folder"]["bytes"] == n_bytes
    assert rows["folder"]["tokens"] == pytest.approx(n_bytes / 4, abs=n_good)
    shown = [json.loads(line) for line in examples(tmp_path / "out")]
    for rule, kind in (("1 gopher_quality", "short"), ("decontaminate", "leaked")):
        texts = {row["text"] for row in shown if row["rule"] == rule}
        assert texts == {text[:800] for text in corpus[kind]}
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"funnel.md", "documents"}


@needs_datatrove
@pytest.mark.slow
def test_the_documents_do_not_depend_on_the_number_of_tasks(tmp_path, corpus):
    with_fewer_buckets(tmp_path)
    runs = {n: curated(tmp_path, f"out{n}", tasks=n) for n in (1, 2, 4)}
    assert all(found == runs[1] for found in runs.values())
    for n in runs:
        assert funnel(tmp_path / f"out{n}") == funnel(tmp_path / "out1")
        assert examples(tmp_path / f"out{n}") == examples(tmp_path / "out1")


@needs_datatrove
@pytest.mark.slow
def test_tasks_make_shards_of_the_documents_whatever_wrote_them(tmp_path, corpus):
    found = curated(tmp_path, "out", tasks=3)
    folder = tmp_path / "out" / "documents"
    sources = tuple(f"{name}={folder / name}" for name in ("prose", "rows"))
    whole = tmp_path / "whole"
    data.prepare(data.PrepareConfig(sources, whole, vocab_size=300))
    for shard in ("2/2", "1/2"):
        how = dict(tokenizer=str(whole), shard=shard)
        data.prepare(data.PrepareConfig(sources, tmp_path / "tokens", **how))
    in_shards, expected = (data.TokenData(path) for path in (tmp_path / "tokens", whole))
    n_documents = 0
    for source in ("prose", "rows"):
        for split in ("train", "val"):
            parts = [data_.tokens(source, split)[:] for data_ in (in_shards, expected)]
            assert np.array_equal(*parts)
            n_documents += in_shards.manifest["sources"][source][split]["documents"]
    assert n_documents == len(found)


@needs_datatrove
def test_a_run_goes_on_with_its_own_recipe_alone_and_is_done_only_once(tmp_path, corpus):
    (tmp_path / "recipe.toml").write_text(f'[inputs.prose]\npath = "{tmp_path}/prose"\n')
    found = curated(tmp_path, "out", tasks=1)
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.gz")}
    assert curated(tmp_path, "out", tasks=1) == found and len(found) > 20
    assert all(path.stat().st_mtime_ns == then for path, then in changed.items())
    with pytest.raises(ValueError, match="out: begun with other tasks: begin anew"):
        curated(tmp_path, "out", tasks=2)
    (tmp_path / "prose" / "more.txt").write_text("more")
    with pytest.raises(ValueError, match="begun with other files"):
        curated(tmp_path, "out", tasks=1)


def in_a_fork(job):
    """Start a function in a process of its own, which pytest does not see end."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        job()
        status = 0
    except BaseException as e:
        sys.stderr.write(f"{type(e).__name__}: {e}\n")
    finally:
        os._exit(status)


def wait_until_free(folder):
    """Wait for the tasks of a killed run, which end with it and hold its lock till then: the kernel
    takes some 30 ms to take their memory down."""
    deadline = time.monotonic() + 5
    while (folder / ".lock").exists():
        with open(folder / ".lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                assert time.monotonic() < deadline, "a task has outlived the run"
        time.sleep(0.005)


@needs_datatrove
@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_and_ends_alike(tmp_path, corpus):
    with_fewer_buckets(tmp_path)
    expected = curated(tmp_path, "whole", tasks=2)
    start = time.time()
    curated(tmp_path, "again", tasks=2)
    took = time.time() - start
    rng = random.Random(2)
    for i in range(10):
        name = "killed" if i < 5 else f"killed{i}"  # one run five times, and five runs once
        child = in_a_fork(lambda name=name: curated(tmp_path, name, tasks=2))
        time.sleep(rng.uniform(0.02, 0.9) * took)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        wait_until_free(tmp_path / name)
        if i >= 5:
            assert curated(tmp_path, name, tasks=2) == expected
    assert curated(tmp_path, "killed", tasks=2) == expected
    assert funnel(tmp_path / "killed") == funnel(tmp_path / "whole")
    assert examples(tmp_path / "killed") == examples(tmp_path / "whole")


@needs_datatrove
@pytest.mark.slow
@pytest.mark.parametrize("end", ["exception", "kill"])
def test_a_task_that_dies_is_named_and_the_others_go_on(tmp_path, corpus, monkeypatch, end):
    (tmp_path / "recipe.toml").write_text(f'[inputs.prose]\npath = "{tmp_path}/prose"\n')
    extract = sieve.extract

    def fatal(document):
        if "001.txt" in document.id:
            if end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("no good")
        return extract(document)

    monkeypatch.setattr(sieve, "extract", fatal)
    with pytest.raises(ValueError, match=r"2-read: of 5 tasks, \[\d\] did not end: see .*logs"):
        curated(tmp_path, "out", tasks=5, cores=2)
    assert len(list((tmp_path / "out" / "logs" / "2-read" / "completions").iterdir())) == 4
    monkeypatch.undo()
    found = curated(tmp_path, "out", tasks=5, cores=2)
    assert found == curated(tmp_path, "whole", tasks=5, cores=2)


@needs_datatrove
@pytest.mark.slow
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(tmp_path, corpus):
    (tmp_path / "recipe.toml").write_text(f'[inputs.prose]\npath = "{tmp_path}/prose"\n')

    def with_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
        curated(tmp_path, "out", tasks=1)

    child = in_a_fork(with_little_room)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    said = (tmp_path / "out" / "logs").rglob("task_*.log")
    assert any("File too large" in path.read_text() for path in said)
    assert curated(tmp_path, "out", tasks=1) == curated(tmp_path, "whole", tasks=1)


def write_recipe(tmp_path, inputs, more=""):
    text = "".join(f'[inputs.{name}]\npath = "{tmp_path / name}"\n' for name in inputs)
    (tmp_path / "recipe.toml").write_text(more + text)


@needs_datatrove
@pytest.mark.slow
def test_there_may_be_more_tasks_than_files_and_no_document_may_be_left(tmp_path, corpus):
    write_recipe(tmp_path, ["rows"], "[near_duplicates]\n")
    text = (tmp_path / "recipe.toml").read_text()
    (tmp_path / "recipe.toml").write_text(text + 'text_field = "content"\n')
    found = curated(tmp_path, "out", tasks=7)
    assert len(found) > 20 and found == curated(tmp_path, "one", tasks=1)
    (tmp_path / "prose" / "one.txt").write_text("One.")
    rule = '[[rules]]\nfilter = "gopher_quality"\nmin_doc_words = 5000\n[near_duplicates]\n'
    write_recipe(tmp_path, ["prose"], rule)
    assert curated(tmp_path, "none", tasks=2) == []
    assert funnel(tmp_path / "none")[-1]["dropped"] > 20


def warc_record(page, kind="text/html; charset=utf-8", status="200 OK"):
    body = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n\r\n".encode() + page.encode()
    head = "WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.b/\r\n"
    head += "WARC-Date: 2026-01-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
    head += "Content-Type: application/http; msgtype=response\r\n"
    return gzip.compress(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body + b"\r\n" * 2)


PAGE = "<html><head><title>T</title></head><body><nav><a href=x>Home</a></nav><article>{}</article>"


@needs_datatrove
@pytest.mark.slow
def test_bad_input_is_named_and_counted_and_the_rest_goes_on(tmp_path):
    pytest.importorskip("warcio")
    pytest.importorskip("trafilatura")
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    rng = random.Random(3)
    texts = [prose(rng) for _ in range(6)]
    web = tmp_path / "web"
    web.mkdir()
    pages = [PAGE.format(f"<p>{text}</p><p>{texts[0]}</p>") for text in texts[:3]]
    records = [warc_record(page) for page in pages]
    other = warc_record("x" * 99, kind="image/png")
    (web / "cut.warc.gz").write_bytes(records[0] + records[1] + records[2][:-40])
    (web / "no.warc.gz").write_bytes(b"this is no WARC file at all")
    (web / "whole.warc.gz").write_bytes(other + records[2])
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), web / "columns.parquet")
    (web / "torn.parquet").write_bytes(b"PAR1" + b"x" * 50)
    lines = [json.dumps({"text": text}) for text in texts[3:5]]
    (web / "rows.jsonl").write_text("\n".join([lines[0], "{broken", '{"txt": 1}', lines[1]]))
    (web / "cut.jsonl.gz").write_bytes(gzip.compress(f"{lines[0]}\n".encode() * 99)[:-30])
    (web / "packed.jsonl").write_bytes(b"\x28\xb5\x2f\xfd" + b"x" * 50)
    (web / "latin.txt").write_bytes("é".encode("latin-1"))
    (web / "good.txt").write_text(texts[5])
    (web / "empty.txt").write_text(" \n")
    write_recipe(tmp_path, ["web"])
    found = curated(tmp_path, "out", tasks=2)
    kept = " ".join(text for _, _, text in found)
    assert all(text in kept for text in texts) and "Home" not in kept
    read = funnel(tmp_path / "out")[0]
    assert read["removed"]["empty"] == 1 and read["removed"]["cannot be read"] >= 8
    assert read["dropped"] == sum(read["removed"].values())
    named = " ".join(json.loads(row)["text"] for row in examples(tmp_path / "out"))
    for name in ("cut.warc.gz", "no.warc.gz", "columns.parquet", "torn.parquet", "rows.jsonl:2"):
        assert name in named, name
    for name in ("rows.jsonl:3", "cut.jsonl.gz", "packed.jsonl", "latin.txt:1"):
        assert name in named, name


LONG = "a line without end " * 200


def test_a_line_that_is_too_long_is_named_and_the_rest_of_its_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sieve, "LONGEST", 500)
    rows = [json.dumps({"text": text}) for text in ("One.", LONG, "Two.", LONG[:501], "Three.")]
    lines = "\n".join([*rows[:2], "{broken", *rows[2:]])
    whole = gzip.compress(lines.encode())
    kept = ["One.", "Two.", "Three."]
    files = {
        "rows.jsonl": (lines.encode(), kept, [2, 3, 5]),
        "ends.jsonl": ("\n".join(rows[:2]).encode(), ["One."], [2]),
        "only.jsonl": (rows[1].encode(), [], [1]),
        "rows.jsonl.gz": (whole, kept, [2, 3, 5]),
        "list.json": (json.dumps([{"text": "One."}, {"text": LONG}]).encode(), [], [1]),
        "a.txt": (f"One.\n{LONG}\nTwo.\n".encode(), ["One.\n\nTwo.\n"], [2]),
        "latin.txt": (b"One.\n" + LONG.encode() + b"\n\xe9", [], [2, 3]),
        "just.txt": (b"x" * 499 + b"\n", ["\n"], [1]),
        "below.txt": (b"x" * 498 + b"\n" + b"x" * 499, ["x" * 498 + "\n" + "x" * 499], []),
    }
    copies = tmp_path / "copies"
    copies.mkdir()
    for name, (content, texts, bad_lines) in files.items():
        (tmp_path / name).write_bytes(content)
        bad = []
        assert [*sieve.read_texts(tmp_path / name, "text", copies, bad.append)] == texts, name
        places = [re.match(rf"{tmp_path}/{name}:(\d+): (.*)", str(one)) for one in bad]
        assert sorted(int(place[1]) for place in places) == bad_lines
        long = [place[2] == "a line of 500 bytes or more: cut it into several" for place in places]
        assert sum(long) == len([one for one in bad if not re.search("JSON|UTF-8", str(one))])
    assert not [*copies.iterdir()]


def test_of_a_line_that_is_too_long_no_more_is_in_memory_than_a_piece(tmp_path, monkeypatch):
    """Also where the line is packed, and where that is broken before its end."""
    monkeypatch.setattr(sieve, "LONGEST", 1 << 16)
    packed = gzip.compress(b'{"text": "One."}\n' + b"x" * (32 << 20) + b'\n{"text": "Two."}')
    for name, content in (("whole", packed), ("broken", packed[:-2000])):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        bad = []
        tracemalloc.start()
        texts = [*sieve.read_texts(path, "text", tmp_path, bad.append)]
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 4 << 20, name
        assert texts == ["One.", "Two."][: 2 if name == "whole" else 1]
        assert ":2: a line of 65,536 bytes" in bad[0] and len(bad) == (1 if name == "whole" else 2)


def test_a_disk_without_room_for_a_copy_stops_the_task_and_is_no_bad_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sieve, "LONGEST", 500)
    (tmp_path / "a.txt").write_text(f"One.\n{LONG}\nTwo.\n")

    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sieve, "NamedTemporaryFile", full)
    bad = []
    with pytest.raises(OSError, match="No space left"):
        [*sieve.read_texts(tmp_path / "a.txt", "text", tmp_path, bad.append)]
    assert not bad
    bad = []
    assert [*sieve.read_texts(tmp_path / "none.txt", "text", tmp_path, bad.append)] == []
    assert "none.txt" in str(bad[0])


@needs_datatrove
@pytest.mark.slow
def test_texts_that_are_too_long_are_counted_whatever_file_they_are_in(tmp_path, monkeypatch):
    pytest.importorskip("warcio")
    pytest.importorskip("trafilatura")
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(sieve, "LONGEST", 3000)
    rng = random.Random(6)
    texts = [prose(rng) for _ in range(5)]
    web = tmp_path / "web"
    web.mkdir()
    pages = [PAGE.format(f"<p>{text}</p>") for text in (texts[0], LONG, texts[1])]
    (web / "pages.warc.gz").write_bytes(b"".join(map(warc_record, pages)))
    table = pyarrow.table({"text": [texts[2], LONG, texts[3]]})
    pyarrow.parquet.write_table(table, web / "rows.parquet")
    (web / "lines.txt").write_text(f"{texts[4]}\n{LONG}")
    write_recipe(tmp_path, ["web"])
    found = curated(tmp_path, "out", tasks=2)
    kept = " ".join(text for _, _, text in found)
    assert all(text in kept for text in texts) and "line without end" not in kept
    assert funnel(tmp_path / "out")[0]["removed"] == {"cannot be read": 1, "too long": 2}
    named = {row["id"] for row in map(json.loads, examples(tmp_path / "out"))}
    assert {"web/pages.warc.gz:1", "web/rows.parquet:1"} < named
    assert any("lines.txt:2: a line of 3,000 bytes or more" in name for name in named)


@needs_datatrove
@pytest.mark.slow
def test_planted_pairs_are_found_as_often_as_the_formula_says_and_no_others(tmp_path):
    rng = random.Random(4)
    n = 20  # pairs of each script at each point
    points = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    folder = tmp_path / "pairs"
    folder.mkdir()
    texts = {}
    for script, point, i in itertools.product(SCRIPTS, points, range(n)):
        for side, text in zip("ab", planted_pair(rng, script, point, 160), strict=True):
            texts[f"{script} {point} {i} {side}"] = text
    names = rng.sample([*texts], len(texts))  # a pair's texts lie in different files
    for part in range(3):
        with open(folder / f"{part}.jsonl", "w") as file:
            file.writelines(json.dumps({"text": texts[name]}) + "\n" for name in names[part::3])
    write_recipe(tmp_path, ["pairs"], "[near_duplicates]\n")
    kept = {text for _, _, text in curated(tmp_path, "out", tasks=3)}
    hits = dict(zip(names, verify.near_duplicates([texts[name] for name in names]), strict=True))
    n_buckets, rows = verify.bucket_shape(0.7, 0.5)
    for point in points:
        pairs = [f"{s} {point} {i}" for s in SCRIPTS for i in range(n)]
        gone = [sum(texts[f"{pair} {side}"] not in kept for side in "ab") for pair in pairs]
        assert max(gone) <= 1  # one of a pair stays, and is no other's duplicate
        said = 1 - (1 - point**rows) ** n_buckets
        spread = (said * (1 - said) / len(pairs)) ** 0.5
        assert abs(sum(gone) / len(pairs) - said) < 4 * spread + 0.03, point
        for pair, one in zip(pairs, gone, strict=True):
            hit = hits[f"{pair} a"] or hits[f"{pair} b"]
            assert bool(hit) == (point >= 0.7) or point == 0.7  # at the threshold, by a gram
            assert one or point < 0.9 or not hit  # far above it both say the same


@needs_datatrove
@pytest.mark.slow
def test_a_classifier_tells_prose_from_shuffled_words_and_sorts_into_buckets(tmp_path):
    pytest.importorskip("fasttext")
    rng = random.Random(5)
    # in good texts each word follows its own: a bigram tells
    after = {word: rng.sample(WORDS, 2) for word in WORDS}
    for name, n in (("good", 150), ("ordinary", 150), ("new", 60)):
        (tmp_path / name).mkdir()
        for i in range(n):
            words = [rng.choice(WORDS)]
            while len(words) < 60:
                words.append(rng.choice(after[words[-1]]))
            if name == "ordinary" or name == "new" and i % 2:
                rng.shuffle(words)
            (tmp_path / name / f"{i}.txt").write_text(" ".join(words))
    quality = f'good = "{tmp_path}/good"\nordinary = "{tmp_path}/ordinary"\nbuckets = [0.2, 0.8]\n'
    more = 'folder = "{input}/{quality}"\n[quality]\n'
    write_recipe(tmp_path, ["new"], more + quality)
    found = curated(tmp_path, "out", tasks=2)
    measured = json.loads((tmp_path / "out" / "funnel.json").read_text())["quality"]
    assert measured["held_out"] > 15
    assert measured["precision"] >= 0.9 and measured["recall"] >= 0.9
    by_bucket = {"new/q0": [], "new/q1": [], "new/q2": []}
    for folder, name, _ in found:
        by_bucket[folder].append(int(re.search(r"(\d+)\.txt", name)[1]) % 2)
    assert len(found) == 60
    assert len(by_bucket["new/q2"]) > 24 and np.mean(by_bucket["new/q2"]) < 0.1
    assert len(by_bucket["new/q0"]) > 24 and np.mean(by_bucket["new/q0"]) > 0.9
    # the model is a file that another recipe may name, and a judge's scores train the same
    judged = tmp_path / "judged.jsonl"
    with open(judged, "w") as file:
        for name, score in (("good", 4), ("ordinary", 1.5)):
            for path in data.files_of(tmp_path / name):
                file.write(json.dumps({"text": path.read_text(), "score": score}) + "\n")
    for name, said in (("model", tmp_path / "out/work/quality.bin"), ("judged", judged)):
        write_recipe(tmp_path, ["new"], f'{more}{name} = "{said}"\nbuckets = [0.2, 0.8]\n')
        assert curated(tmp_path, name, tasks=1) == found


@needs_datatrove
@pytest.mark.slow
def test_languages_are_told_apart_and_rules_may_be_for_some_alone(tmp_path):
    pytest.importorskip("lingua")
    (tmp_path / "web").mkdir()
    texts = {
        "en": "The harbour changed when the railway came, and the fishing boats went elsewhere.",
        "de": "Der Hafen änderte sich, als die Eisenbahn kam und die Fischer anderswohin fuhren.",
        "fr": "Le port a changé quand le chemin de fer est arrivé et les bateaux sont partis.",
        "th": "ท่าเรือเปลี่ยนไปเมื่อรถไฟมาถึง และเรือประมงก็ย้ายไปที่อื่น",
    }
    for name, text in texts.items():
        (tmp_path / "web" / f"{name}.txt").write_text(text)
    more = 'folder = "{language}"\n[language]\nlanguages = ["en", "de", "th"]\n'
    more += '[[rules]]\nfilter = "gopher_quality"\nlanguages = ["de"]\n'
    write_recipe(tmp_path, ["web"], more)
    found = curated(tmp_path, "out", tasks=1)
    assert [(folder, text) for folder, _, text in found] == [
        ("en", texts["en"]),
        ("th", texts["th"]),
    ]
    rows = {row["rule"]: row["removed"] for row in funnel(tmp_path / "out")}
    assert rows["language"] == {"in fr": 1} and rows["1 gopher_quality"] == {"gopher_short_doc": 1}


SBATCH = """#!{python}
import os, re, subprocess, sys
*options, path = sys.argv[1:]
script = open(path).read()
number = len(os.listdir("{jobs}"))
open(f"{jobs}/{{number}}", "w").write(script + chr(10) + " ".join(options))
last = re.search(r"--array=0-(\\d+)", script)
for i in range(int(last[1]) + 1 if last and "merge_stats" not in script else 0):
    places = dict(os.environ, SLURM_ARRAY_TASK_ID=str(i), SLURM_NODELIST="here", RUN_OFFSET="0")
    subprocess.run(["bash", path], env=places, check=True, stdout=2)
print("Submitted batch job", 100 + number)
"""


@needs_datatrove
@pytest.mark.slow
def test_slurm_gets_a_job_of_each_stage_and_its_tasks_do_the_same(tmp_path, corpus, monkeypatch):
    """Commands of these names stand for Slurm's: a job's tasks run as soon as it is submitted."""
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    commands = tmp_path / "bin"
    commands.mkdir()
    written = {"sbatch": SBATCH.format(python=sys.executable, jobs=jobs)}
    written["srun"] = '#!/bin/bash\nshift 3\nexec "$@"\n'
    written["scontrol"] = "#!/bin/bash\necho here\n"
    for name, text in written.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    write_recipe(tmp_path, ["prose"], '[slurm]\npartition = "big"\ntime = "1:00:00"\n')
    found = curated(tmp_path, "slurm", tasks=2, executor="slurm")
    assert found == curated(tmp_path, "local", tasks=2)
    assert funnel(tmp_path / "slurm") == funnel(tmp_path / "local")
    scripts = [(jobs / str(i)).read_text() for i in range(6)]
    stages = ["2-read", "6-write", "7-report"]
    for stage, before, script in zip(stages, (None, 100, 102), scripts[::2], strict=True):
        assert f"--job-name={stage}\n" in script and "--partition=big\n" in script
        assert f"--array=0-{0 if stage == '7-report' else 1}\n" in script
        assert "--time=1:00:00" in script and f"PYTHONPATH={ROOT}" in script
        assert (f"--dependency=afterok:{before}" in script) == (before is not None)


@needs_datatrove
@pytest.mark.slow
def test_ray_does_the_same(tmp_path, corpus):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    with_fewer_buckets(tmp_path)  # ray takes some ten seconds for a stage, or for two buckets
    try:
        found = curated(tmp_path, "ray", tasks=2, executor="ray")
    finally:
        ray.shutdown()
    assert found == curated(tmp_path, "local", tasks=2)
    assert funnel(tmp_path / "ray") == funnel(tmp_path / "local")
    assert examples(tmp_path / "ray") == examples(tmp_path / "local")
    removed = {row["rule"]: row["dropped"] for row in funnel(tmp_path / "ray")}
    assert removed["near_duplicates"] >= 6
