"""recipes/mapped.py: mapped rows are the read ones, of which one process of a machine reads the
file; what a change makes stale is never used."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from test_stages import base, stage  # noqa: F401

import align
import data
from recipes import mapped

FIELDS = ("key", "where", "length")


@pytest.fixture
def large(monkeypatch):
    """Every file counts as a large one."""
    monkeypatch.setattr(mapped, "LARGE", 0)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def setting(base, tmp_path):  # noqa: F811
    """(the config of a stage over rows of two or three answers, the rows' file, the tokenizer)"""
    file = tmp_path / "rows.jsonl"
    file.write_bytes((base / "ranked.jsonl").read_bytes())
    cfg = align.with_model(stage(base, "rpo", tmp_path / "run", data=file, val=None))
    return cfg, file, data.load_tokenizer(base)


def counted(read=align.read_rows_of):
    """A reader that counts its calls."""
    reader = mock.Mock(side_effect=read)
    reader.__name__ = read.__name__
    reader.__module__ = read.__module__
    return reader


def test_mapped_rows_are_the_rows_that_were_read(large, setting):
    cfg, file, tokenizer = setting
    want = align.read_rows_of(cfg, file, tokenizer)
    got = mapped.shared_rows(cfg, file, tokenizer, align.read_rows_of)
    assert isinstance(got, mapped.Rows) and len(got) == len(want) == 24
    for a, b in zip(want, got, strict=True):
        assert [getattr(a, name) for name in FIELDS] == [getattr(b, name) for name in FIELDS]
        assert all(map(np.array_equal, a.ids, b.ids)) and b.ids[0].dtype == np.int32
        assert all(map(np.array_equal, a.trained, b.trained)) and len(a.ids) == len(b.ids)
        assert np.array_equal(a.values, b.values) and b.values.dtype == np.float32
    packed = (data.pack([rows[i] for i in (3, 0, 7)], 384) for rows in (want, got))
    a, b = packed
    assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_a_second_start_reads_nothing_again_and_a_small_file_is_not_written(large, setting):
    cfg, file, tokenizer = setting
    read = counted()
    first, second = (mapped.shared_rows(cfg, file, tokenizer, read) for _ in range(2))
    assert read.call_count == 1 and first.index == second.index
    with mock.patch.object(mapped, "LARGE", 1 << 30):
        assert isinstance(mapped.shared_rows(cfg, file, tokenizer, read), list)
    assert read.call_count == 2 and len([*file.parent.glob("rows.jsonl.rows-*")]) == 2


def test_whatever_rows_depend_on_changes_their_name(large, setting, base):  # noqa: F811
    cfg, file, tokenizer = setting
    name = lambda *args: mapped.file_of(*args)  # noqa: E731
    known = name(cfg, file, tokenizer, align.read_rows_of)
    assert known == name(replace(cfg, lr=1.0, batch=3), file, tokenizer, align.read_rows_of)
    others = [replace(cfg, loss="rpo_sq"), replace(cfg, seq_len=380), replace(cfg, shorten=True)]
    others += [replace(cfg, skip_bad=True), stage(base, "sft", "unused")]
    names = [name(other, file, tokenizer, align.read_rows_of) for other in others]
    names.append(name(cfg, file, data.train_bpe(["a b c"], 263), align.read_rows_of))
    with mock.patch.object(Path, "read_bytes", lambda path: b"another template"):
        names.append(name(cfg, file, tokenizer, align.read_rows_of))
    names.append(name(cfg, file, tokenizer, align.read_sets))
    file.touch()
    names.append(name(cfg, file, tokenizer, align.read_rows_of))
    assert len({known, *names}) == 1 + len(names)


def test_rows_of_a_file_or_code_that_changed_are_read_anew_and_the_old_ones_removed(large, setting):
    cfg, file, tokenizer = setting
    foreign = [file.with_name(f"rows.jsonl{end}") for end in (".rows-old.json", ".npy")]
    for path in foreign:
        path.touch()
    old = mapped.shared_rows(cfg, file, tokenizer, align.read_rows_of)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    new = mapped.shared_rows(cfg, file, tokenizer, align.read_rows_of)
    kept = lambda: {*file.parent.iterdir()} - {file, *foreign}  # noqa: E731
    assert (len(old), len(new)) == (24, 23) and len(kept()) == 2
    mapped.shared_rows(replace(cfg, loss="rpo_sq"), file, tokenizer, align.read_rows_of)
    assert len(kept()) == 4  # of two losses, side by side
    before = kept()
    text = Path.read_bytes
    with mock.patch.object(Path, "read_bytes", lambda p: text(p) + b" " * (p.suffix == ".py")):
        mapped.shared_rows(cfg, file, tokenizer, align.read_rows_of)
    assert len(kept()) == 4 and len(kept() - before) == 2 and all(map(Path.exists, foreign))
    assert all(map(np.array_equal, old[22].ids, new[22].ids))  # who has mapped them keeps them


def test_others_wait_for_the_process_that_reads_or_read_when_that_takes_too_long(
    large, setting, monkeypatch
):
    cfg, file, tokenizer = setting
    monkeypatch.setenv("LOCAL_RANK", "1")
    read = counted()
    found = []
    waiting = threading.Thread(
        target=lambda: found.append(mapped.shared_rows(cfg, file, tokenizer, read))
    )
    waiting.start()
    target = mapped.file_of(cfg, file, tokenizer, read)
    mapped.write(align.read_rows_of(cfg, file, tokenizer), target)
    waiting.join(20)
    assert isinstance(found[0], mapped.Rows) and read.call_count == 0
    target.unlink()
    monkeypatch.setattr(mapped, "PATIENCE", 0.2)
    assert isinstance(mapped.shared_rows(cfg, file, tokenizer, read), list)


def test_a_folder_that_cannot_take_the_rows_costs_nothing_but_their_reading(
    large, setting, monkeypatch
):
    cfg, file, tokenizer = setting
    monkeypatch.setattr(mapped.os, "access", lambda *_: False)
    assert isinstance(mapped.shared_rows(cfg, file, tokenizer, align.read_rows_of), list)
    monkeypatch.undo()
    monkeypatch.setattr(mapped, "LARGE", 0)
    full = mock.Mock(free=10)
    monkeypatch.setattr(mapped.shutil, "disk_usage", lambda _: full)
    assert isinstance(mapped.shared_rows(cfg, file, tokenizer, align.read_rows_of), list)
    assert [*file.parent.iterdir()] == [file]


def test_damaged_rows_are_named(large, setting):
    cfg, file, tokenizer = setting
    mapped.shared_rows(cfg, file, tokenizer, align.read_rows_of)
    (tokens,) = file.parent.glob("*.npy")
    os.truncate(tokens, 200)
    with pytest.raises(ValueError, match=r"rows\.jsonl\.rows-.*json or its \.npy is damaged"):
        mapped.shared_rows(cfg, file, tokenizer, align.read_rows_of)


KILLED = """
import os, sys, numpy
sys.path[:0] = sys.argv[3:]
import data
from pathlib import Path
from recipes import mapped
row = data.Example((numpy.arange(9, dtype=numpy.int32),), (numpy.ones(9, bool),), None, "x:1")
where = sys.argv[2]
owner, name = (numpy, "save") if where == "tokens" else (mapped, "write_whole")
def half(file, *args):
    Path(file).write_bytes(b"half")
    os.kill(os.getpid(), 9)
setattr(owner, name, half if where == "tokens" else lambda *_: os.kill(os.getpid(), 9))
mapped.write([row], Path(sys.argv[1]))
"""


@pytest.mark.parametrize("where", ["tokens", "index"])
def test_a_writer_that_is_killed_leaves_nothing_that_is_taken_for_whole(large, setting, where):
    cfg, file, tokenizer = setting
    target = mapped.file_of(cfg, file, tokenizer, align.read_rows_of)
    root = str(Path(data.__file__).parent)
    done = subprocess.run([sys.executable, "-c", KILLED, target, where, root], timeout=60)
    assert done.returncode == -signal.SIGKILL and not target.exists()
    assert [*file.parent.glob("*.npy")]  # what it left
    rows = mapped.shared_rows(cfg, file, tokenizer, align.read_rows_of)
    assert len(rows) == 24 and rows[23].length


def ranks_rows(cfg, file, base):  # noqa: F811
    """What a process of several gets."""
    mapped.LARGE = 0
    reads = []

    def read(*args):
        reads.append(1)
        return align.read_rows_of(*args)

    read.__module__ = "align"
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    time.sleep(random.random())
    rows = mapped.shared_rows(cfg, file, data.load_tokenizer(base), read)
    return len(reads), type(rows).__name__, [row.key for row in rows]


@pytest.mark.slow
def test_of_four_processes_one_reads(setting, base, on_ranks):  # noqa: F811
    cfg, file, _ = setting
    found = on_ranks(4, ranks_rows, cfg, file, str(base))
    assert [reads for reads, _, _ in found] == [1, 0, 0, 0]
    assert {kind for _, kind, _ in found} == {"Rows"}
    assert all(keys == found[0][2] for _, _, keys in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rpo", "sft"])
def test_a_stage_is_the_same_from_mapped_rows(large, base, tmp_path, name):  # noqa: F811
    results = []
    for i, size in enumerate((1 << 30, 0)):
        out = tmp_path / str(i)
        rows = tmp_path / f"{i}.jsonl"
        rows.write_bytes((base / ("ranked.jsonl" if name == "rpo" else "sft.jsonl")).read_bytes())
        with mock.patch.object(mapped, "LARGE", size):
            cfg = stage(base, name, out, data=rows, val=None, steps=2)
            align.align(name, cfg, read=mapped.stage_rows)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        results.append([json.loads(line)["loss"] for line in lines])
    assert results[0] == results[1] and [*tmp_path.glob("1.jsonl.rows-*.json")]
