"""recipes/blend.py: the blends of a TOML file over a folder's sources."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from data import REPORT_BLEND
from recipes import blend

ROOT = Path(__file__).parents[1]
FILE = ROOT / "recipes" / "blend.toml"


def folder(**sizes):
    """What a blend asks of a prepared folder; code_c stands for code-c."""
    sizes = {name.replace("_", "-"): size for name, size in sizes.items()}
    tokens = lambda source, split: sizes[source]  # noqa: E731
    return SimpleNamespace(folder="here", sources=tuple(sizes), n_tokens=tokens)


def test_sources_of_a_name_share_its_weight_by_their_tokens_to_a_power():
    data = folder(english=10, code_c=100, code_python=900, codex=5)
    found = blend.shared({"english": 0.5, "code": 0.5}, {}, data)
    assert found == {"english": 0.5, "code-c": 0.05, "code-python": 0.45}
    found = blend.shared({"code": 4, "code-c": 1}, {"code": 2.0}, data)  # 10 : 30, and one more
    assert found == {"code-c": pytest.approx(2), "code-python": pytest.approx(3)}
    for name in ("cod", "python", "english-a"):
        with pytest.raises(ValueError, match=f"'{name}' names no source with tokens; here has eng"):
            blend.shared({name: 1}, {}, data)
    with pytest.raises(ValueError, match="'english' names no source with tokens"):
        blend.shared({"english": 1}, {}, folder(english=0))


@pytest.mark.parametrize("preset", ["nemotron4_340b", "nemotron4_15b", "nano_two_phase"])
def test_the_files_blends_are_the_reports_over_any_number_of_languages(preset):
    sizes = {f"multilingual_{i}": 10 + i for i in range(53)}
    sizes |= {f"code_{i}": 2**i for i in range(43)}
    data = folder(english_web=900, english_books=100, quality=7, qa=1, **sizes)
    cfg = train.PRESETS[preset]()
    first, second = blend.with_blends(cfg, FILE, data).phases
    for name, weight in REPORT_BLEND.items():
        own = {s: w for s, w in first.blend.items() if s.startswith(name)}
        assert sum(own.values()) == pytest.approx(weight)
        assert len(own) == {"english": 2, "multilingual": 53, "code": 43}[name]
    assert first.blend["code-1"] == pytest.approx(2 ** (1 / 1.3) * first.blend["code-0"])
    assert not first.late_blend and second.late_blend["qa"] == pytest.approx(0.1)
    for weights in (first.blend, second.blend, second.late_blend):
        assert sum(weights.values()) == pytest.approx(1)
    assert replace(first, blend={}, late_blend={}) == replace(cfg.phases[0], blend={})


MISTAKES = {
    "phases = ": "no TOML",
    "": r"give \[alpha\] or none, and \[\[phases\]\]",
    "phases = 3": "and ..phases..",
    "phases = [3]": "phase 0: give its blend",
    "[[phases]]\nblend = {a = 1}\n[other]": "and ..phases..",
    "[[phases]]\nlate_blend = {a = 1}": "phase 0: give its blend, and a late_blend or none",
    "[[phases]]\nblend = {a = 1}\nlate = {a = 1}": "phase 0: give its blend",
    "[[phases]]\nblend = 3": "phase 0, blend: 3 is no table",
    '[[phases]]\nblend = {a = "1"}': "phase 0, blend: a = '1', not a number of at least 0",
    "[[phases]]\nblend = {a = nan}": "a = nan",
    "[[phases]]\nblend = {a = -1}": "a = -1",
    "[alpha]\na = 0\n[[phases]]\nblend = {a = 1}": "each above 0",
    "[[phases]]\nblend = {a = 1}": "has 1 phases, the run 2: take a preset of as many",
}


@pytest.mark.parametrize("text, says", MISTAKES.items(), ids=range(len(MISTAKES)))
def test_a_mistake_in_a_file_of_blends_is_named_in_one_line(tmp_path, text, says):
    path = tmp_path / "blend.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        blend.with_blends(train.PRESETS["nano_two_phase"](), path, folder(a=1))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_trains_on_the_files_blends(corpus, tmp_path):
    path = tmp_path / "blend.toml"
    path.write_text("[[phases]]\nblend = {code = 3, english = 1}\n[[phases]]\nblend = {code = 1}\n")
    command = [sys.executable, "-m", "recipes.blend", path, "nano_two_phase", "--steps", "1"]
    command += [
        "--data",
        corpus,
        "--model.vocab-size",
        "512",
        "--model.seq-len",
        "64",
        "--eval-batches",
        "1",
    ]
    done = subprocess.run([*command, "--out", tmp_path / "run"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    phases = json.loads((tmp_path / "run" / "config.json").read_text())["phases"]
    assert [phase["blend"] for phase in phases] == [{"code": 3.0, "english": 1.0}, {"code": 1.0}]
    assert b"blend from sample 0: english 0.250" in done.stdout + done.stderr
    assert b"recipes.blend recipes/blend.toml" in subprocess.check_output(command[:3], cwd=ROOT)
