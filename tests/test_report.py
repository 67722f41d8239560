"""Pictures and cards: of runs as the loop writes them, in the files that were asked for."""

import dataclasses
import json
import random
import re
import shutil
from collections import Counter

import pytest

import train
from model import SHAPES, ModelConfig, Nemotron, init_weights
from parallel import MeshConfig, save_hf
from recipes.card import CardConfig, write_card
from recipes.report import (
    ReportConfig,
    differences,
    draw_histograms,
    read_metrics,
    read_stage,
    report,
    smoothed,
    titles_of,
)

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


def rewrite(folder, out, change):
    """Copy a run's settings, and its metrics with each row changed."""
    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    lines = [json.dumps(change(row)) for row in read_metrics(folder)]
    (out / "metrics.jsonl").write_text("\n".join(lines))
    return out


def test_skipped_steps_and_an_unknown_peak_are_drawn(runs, tmp_path):
    skipped = rewrite(runs[0], tmp_path / "skipped", lambda row: row | {"loss": None})
    measured = rewrite(runs[0], tmp_path / "$5", lambda row: row | {"mfu": 40.0})
    for folders in ((skipped, measured), (measured,)):
        report(ReportConfig(folders, tmp_path / "r.png"))
        assert (tmp_path / "r.png").stat().st_size > 1000


def test_a_panel_that_says_nothing_is_left_out(runs, tmp_path):
    stages = [read_stage(folder) for folder in runs]
    assert [*titles_of(stages, ["a", "b"], False, False)] == ["loss", "lr", "speed"]
    flat = rewrite(runs[0], tmp_path / "flat", lambda row: row | {"lr": 1e-3})
    ramp = rewrite(runs[0], tmp_path / "ramp", lambda row: row | {"lr": 1.0, "batch": row["step"]})
    assert [*titles_of([read_stage(flat)], ["a"], False, True)] == ["loss", "speed"]
    assert [*titles_of([read_stage(ramp)], ["a"], True, True)][1:3] == ["difference", "batch"]
    report(ReportConfig((flat,), tmp_path / "r.png", panels=("loss",)))
    both, one = tmp_path / "r.png", tmp_path / "one.png"
    report(ReportConfig((flat,), one))
    assert both.read_bytes() != one.read_bytes()
    with pytest.raises(ValueError, match="--panels lr: nothing to say: there are loss, speed"):
        report(ReportConfig((flat,), one, panels=("lr",)))


def test_only_runs_of_equal_settings_have_differences_which_are_exact(runs, tmp_path):
    first = read_stage(runs[0])
    assert differences([first]) == []
    assert len(differences([first, read_stage(runs[1])])) == 2  # steps may differ
    moved = rewrite(
        runs[0], tmp_path / "moved", lambda row: row | {"loss": row["loss"] + row["step"]}
    )
    (_, zero), (tokens, values) = differences([first, read_stage(moved)])
    assert zero == [0, 0, 0] and values == pytest.approx([1, 2, 3])
    assert tokens == [row["tokens"] for row in first.rows]
    settings = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(settings | {"seed": 7}))
    assert differences([first, read_stage(moved)]) == []
    (moved / "config.json").write_text(json.dumps(settings | {"micro_batch": 1, "agent": "else"}))
    assert len(differences([first, read_stage(moved)])) == 2


def test_a_smoothed_curve_keeps_a_constant_lies_within_its_values_and_leaves_out_nan():
    rng = random.Random(0)
    noisy = [rng.random() for _ in range(1000)]
    means = smoothed(noisy)
    assert smoothed([2.0] * 300) == pytest.approx([2.0] * 300)
    assert means[0] == noisy[0] and 0.3 < min(means[20:-20]) < max(means[20:-20]) < 0.7
    assert smoothed(noisy[:40]) == noisy[:40]  # too few to be smoothed
    unknown = noisy[:50] + [float("nan")] + noisy[51:60]
    assert smoothed(unknown)[50] == pytest.approx((noisy[49] + noisy[51]) / 2)


def test_a_smoothed_curve_has_no_lag():
    falling = [10.0 - 0.01 * i for i in range(1000)]
    assert smoothed(falling) == pytest.approx(falling)


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


def test_histograms_are_drawn_of_what_has_two_sides(tmp_path):
    lengths = {"prompts": [3, 4, 50], "answers": [], "chosen": [7]}
    topics = Counter({"lists": 3, "from $5 to $10": 1})
    for name, *drawn in (("a", lengths, topics), ("b", {}, topics), ("c", lengths, Counter(x=9))):
        assert draw_histograms(tmp_path / f"{name}.png", *drawn)
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert not draw_histograms(tmp_path / "d.png", {"prompts": []}, Counter(one=5))
    assert not (tmp_path / "d.png").exists()


# ---- the card ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(runs, tmp_path_factory):
    """Folders of a base model, and of a chat and a reward model made from it by hand."""
    base, other = runs
    folders = [base]
    for name, change in (("chat", {}), ("judge", {"n_attributes": 5})):
        folder = tmp_path_factory.mktemp("stages") / name
        shutil.copytree(other, folder)
        settings = json.loads((folder / "config.json").read_text())
        del settings["phases"]
        settings |= {"init": str(base), "model": settings["model"] | change | {"seq_len": 320}}
        model = Nemotron(ModelConfig(**settings["model"]))
        init_weights(model, 1)
        shutil.rmtree(folder / "checkpoints")
        save_hf(model, folder / "weights")
        for path in (folder / "weights").iterdir():
            if path.suffix == ".safetensors":
                path.rename(folder / path.name)
        (folder / "config.json").write_text(json.dumps(settings))
        folders.append(folder)
    return folders


def test_a_card_has_each_stage_its_cost_and_its_answers_to_the_same_questions(stages, tmp_path):
    questions = tmp_path / "asked.jsonl"
    asked = [{"prompt": f"What|is <{i}>?"} for i in range(3)]
    asked.append(
        {"messages": [{"role": "user", "content": "Four"}, {"role": "assistant", "content": "4"}]}
    )
    asked += [{"prompt": "Five\nand more"}, {"prompt": "a sixth"}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked))
    how = CardConfig(tuple(stages), tmp_path / "deep/card.md", questions, max_tokens=4)
    write_card(how)
    page = how.out.read_text()
    rows = [read_metrics(folder) for folder in stages]
    for folder, found in zip(stages, rows, strict=True):
        (line,) = [
            line
            for line in page.splitlines()
            if line.startswith(f"| {folder.name} | ") and " → " in line
        ]
        seconds = sum(row.get("eval_seconds", 0) for row in found)
        seconds += sum(found[0]["tokens"] / row["tokens_per_s"] for row in found)
        assert read_stage(folder).seconds() == pytest.approx(seconds)
        assert f"| {found[-1]['step']} | {found[-1]['tokens']} |" in line
        assert f"validation loss {found[-1]['val_loss']:.3f}" in line
    assert "| chat | a |" in page and "| a | random weights |" in page
    said = [f"What&#124;is &lt;{i}>?" for i in range(3)] + ["Four", "Five<br>and more"]
    assert re.findall(r"^\*\*\d\.\*\* (.*)$", page, re.M) == said
    answers = re.findall(r"^\| (a|chat) \| .* \| (-?\d+\.\d\d) \|$", page, re.M)
    assert [name for name, _ in answers] == ["a", "chat"] * 5  # a reward model answers nothing
    assert f"]({how.out.stem}.png)" in page
    assert how.out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    write_card(dataclasses.replace(how, max_tokens=31, runs=how.runs[:1], questions=None))
    page = how.out.read_text()
    assert "capital of France" in page and "reward" not in page and "at most 31 tokens" in page
    assert page.count("its context is too short") == 5  # of 32 tokens


def test_a_card_of_what_is_none_is_refused_with_its_name(stages, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/metrics.jsonl").write_bytes((stages[0] / "metrics.jsonl").read_bytes())
    (tmp_path / "odd.jsonl").write_text('{"question": "?"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    for runs, questions, says in (
        ((), None, "no run given"),
        ((tmp_path / "bare",), None, "bare: no config.json"),
        (stages[:1], tmp_path / "odd.jsonl", "odd.jsonl:1: no text in field 'prompt'"),
        (stages[:1], tmp_path / "empty.jsonl", "no question is in it"),
    ):
        with pytest.raises(ValueError, match=says):
            write_card(CardConfig(tuple(runs), tmp_path / "card.md", questions))
    with pytest.raises(ValueError, match="max_tokens=0"):
        CardConfig(tuple(stages), max_tokens=0)
