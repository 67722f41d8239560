"""Pictures: of runs as the loop writes them, in the file that was asked for."""

import dataclasses
import json
from collections import Counter

import pytest

import train
from model import SHAPES
from parallel import MeshConfig
from recipes.report import ReportConfig, draw_histograms, read_metrics, report

TINY = dataclasses.replace(
    SHAPES["nano"], dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=64,
    vocab_size=512, seq_len=32,
)  # fmt: skip


def pretrain(corpus, out, steps):
    sizes = dict(steps=steps, batch=2, micro_batch=2, warmup=2, eval_every=2, eval_batches=1)
    mesh = MeshConfig(dtype="fp32")
    cfg = dataclasses.replace(
        train.PRESETS["nano"](), model=TINY, data=corpus, out=out, mesh=mesh, **sizes
    )
    train.pretrain("tiny", cfg)


@pytest.fixture(scope="module")
def runs(on_ranks, corpus, tmp_path_factory):
    """Folders of two runs of different lengths."""
    folders = [tmp_path_factory.mktemp("runs") / name for name in "ab"]
    for steps, folder in enumerate(folders, 3):
        on_ranks(1, pretrain, corpus, folder, steps)
    return tuple(folders)


@pytest.mark.parametrize("name, begins", [("r.png", b"\x89PNG"), ("deep/r.pdf", b"%PDF")])
def test_runs_are_drawn_into_exactly_the_file_named(runs, tmp_path, name, begins):
    out = tmp_path / name
    report(ReportConfig(runs, out))
    assert out.read_bytes()[:4] == begins
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [out]


def test_every_step_of_a_run_is_read(runs):
    assert [len(read_metrics(folder)) for folder in runs] == [3, 4]
    assert any("val_loss" in row for row in read_metrics(runs[0]))


def test_skipped_steps_and_an_unknown_peak_are_drawn(runs, tmp_path):
    for folder, changes in (("skipped", {"loss": None}), ("measured", {"mfu": 40.0})):
        (tmp_path / folder).mkdir()
        lines = [json.dumps(row | changes) for row in read_metrics(runs[0])]
        (tmp_path / folder / "metrics.jsonl").write_text("\n".join(lines))
    report(ReportConfig((tmp_path / "skipped", tmp_path / "measured"), tmp_path / "r.png"))
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_what_is_no_run_is_refused_with_its_name(runs, tmp_path):
    with pytest.raises(ValueError, match="not a run's folder"):
        report(ReportConfig((tmp_path,), tmp_path / "r.png"))
    with pytest.raises(ValueError, match="no run given"):
        report(ReportConfig((), tmp_path / "r.png"))
    row = json.dumps(read_metrics(runs[0])[0] | {"tokens": "many"})
    wrong = [("{", "metrics.jsonl:1: "), ('{"loss": 1}', "metrics.jsonl:1: no batch")]
    wrong += [(row, "metrics.jsonl:1: no tokens"), ("", "metrics.jsonl: no step is in it")]
    for line, says in wrong:
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match=says):
            report(ReportConfig((tmp_path,), tmp_path / "r.png"))
    for name in ("r", "r.doc"):
        with pytest.raises(ValueError, match=f"--out .*{name}: its ending must be one of .*png"):
            report(ReportConfig(runs, tmp_path / name))
        assert not (tmp_path / name).exists()


def test_histograms_are_drawn_of_any_lengths_and_topics(tmp_path):
    lengths = {"prompts": [3, 4, 50], "answers": [], "chosen": [7]}
    assert draw_histograms(tmp_path / "a.png", lengths, Counter({"lists": 3, "from $5 to $10": 1}))
    assert draw_histograms(tmp_path / "b.png", {"prompts": []}, Counter())
    for name in "ab":
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
