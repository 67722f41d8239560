"""The house: imports run one way, every option is read, the README's first command is near its
top."""

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import tyro

import align
import data
import generate
import parallel
import train
from recipes import demo, evaluate, iterate, plan, report, serve, synthesize

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


def recipes():
    return {p.stem: p.read_text() for p in (ROOT / "recipes").glob("*.py")}


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


CONFIGS = (train.PretrainConfig, train.Phase, report.ReportConfig, parallel.MeshConfig)
CONFIGS += (plan.PlanConfig, data.PrepareConfig, data.ShowConfig, generate.Layout)
CONFIGS += (parallel.ExportConfig, demo.DemoConfig, iterate.IterateConfig)
CONFIGS += (align.SftConfig, align.RewardConfig, align.PreferenceConfig)
CONFIGS += (generate.SamplingParams, generate.EngineConfig, generate.SampleConfig)
CONFIGS += (generate.ChatConfig, generate.ScoreConfig, evaluate.EvaluateConfig)
CONFIGS += (serve.ServeConfig, synthesize.Recipe, synthesize.SynthesizeConfig)


def test_every_option_is_read_somewhere():
    text = "\n".join([*sources().values(), *recipes().values()])
    for config in CONFIGS:
        for field in dataclasses.fields(config):
            read = rf"\b(cfg|self|c|p|r|how|phase|mesh|params|sampling|layout)\.{field.name}\b"
            read += rf'|column\("{field.name}"\)'
            assert re.search(read, text), f"{config.__name__}.{field.name}"


def test_rank_zero_is_asked_for_only_where_files_are_written():
    # silence is set up once (set_up_logging); the other places write a file or make a folder
    assert not re.search(r"if .*rank.*:\s*\n\s*(log|print)\(", "\n".join(sources().values()))
    assert not any(re.search(r"^\s*print\(", text, re.M) for text in sources().values())


def test_the_first_command_of_the_readme_is_before_line_20():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any("train.py nano" in line for line in lines[:19])


def readme_commands(file):
    """The arguments of each command of the README that runs the file."""
    text = (ROOT / "README.md").read_text()
    lines = re.findall(rf"^(?:torchrun[^\n]*?|python) {file} ([^#`\n]*)", text, re.M)
    return [shlex.split(line) for line in lines]


def test_the_readmes_files_exist_and_its_commands_parse():
    text = (ROOT / "README.md").read_text()
    for file in set(re.findall(r"\b([a-z]+\.py)\b", text)) & {f"{m}.py" for m in ALLOWED}:
        assert (ROOT / file).exists(), file
    for name, least in (("train", 6), ("data", 2), ("parallel", 4), ("generate", 6), ("align", 5)):
        assert len(readme_commands(f"{name}.py")) >= least, name
    for args in readme_commands("train.py"):
        if args[0] == "report":
            tyro.cli(train.ReportConfig, args=args[1:])
        elif "--help" not in args:
            train.choose_config(args, train.PRESETS, "")
    for args in readme_commands("data.py"):
        tyro.cli({"prepare": data.PrepareConfig, "show": data.ShowConfig}[args[0]], args=args[1:])
    for command, *args in readme_commands("generate.py"):
        tyro.cli(generate.COMMANDS[command][0], args=args)
    for args in readme_commands("align.py"):
        if args[0] == "iterate":
            align.choose_config(
                args[1:] if args[1] in align.LOOPS else ["demo", *args[1:]], align.LOOPS, ""
            )
        elif args[0] != "demo" and "--help" not in args:
            align.choose_config(args, align.PRESETS, "")
    for command, *args in readme_commands("parallel.py"):
        tyro.cli(parallel.COMMANDS[command], args=args)


def test_pictures_of_the_readme_are_in_the_repository():
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / picture).read_bytes()[:4] == b"\x89PNG"
