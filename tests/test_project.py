"""The house: imports run one way, every option is read, the README's first command is near its
top."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import data
import parallel
import train

ROOT = Path(__file__).parents[1]
# who may import whom (of ours)
ALLOWED = {
    "model": set(),
    "data": set(),
    "parallel": {"model"},
    "train": {"model", "data", "parallel"},
    "align": {"model", "data", "parallel", "train"},
    "generate": {"model", "data", "parallel"},
}


def sources():
    return {p.stem: p.read_text() for p in ROOT.glob("*.py")}


def test_modules_import_only_downwards():
    assert set(sources()) <= set(ALLOWED), "a seventh module"
    for name, text in sources().items():
        imported = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                imported |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        assert imported & set(ALLOWED) <= ALLOWED[name], name


def test_the_text_side_needs_no_torch():
    code = "import sys, data; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_model_knows_nothing_of_ranks():
    assert "distributed" not in sources()["model"]


def test_every_option_is_read_somewhere():
    text = "\n".join(sources().values())
    for config in (train.PretrainConfig, parallel.MeshConfig, data.PrepareConfig, data.ShowConfig):
        for field in dataclasses.fields(config):
            assert re.search(rf"\b(cfg|self)\.(mesh\.|model\.)?{field.name}\b", text), (
                f"{config.__name__}.{field.name}"
            )


def test_rank_zero_is_asked_for_only_where_files_are_written():
    # silence is set up once (set_up_logging); the other places write a file or make a folder
    assert not re.search(r"if .*rank.*:\s*\n\s*(log|print)\(", "\n".join(sources().values()))
    assert not any(re.search(r"^\s*print\(", text, re.M) for text in sources().values())


def test_the_first_command_of_the_readme_is_before_line_20():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any("train.py nano" in line for line in lines[:19])


def test_the_readme_names_files_and_commands_that_exist():
    text = (ROOT / "README.md").read_text()
    for file in set(re.findall(r"\b([a-z]+\.py)\b", text)) & {f"{m}.py" for m in ALLOWED}:
        assert (ROOT / file).exists(), file
    for preset in re.findall(r"train\.py ([a-z_0-9]+)", text):
        assert preset in train.PRESETS, preset
