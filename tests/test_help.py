"""The help of every program, as a person reads it: texts that stand alone, for every option; and
what a recipe answers to a mistake."""

import contextlib
import importlib
import io
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

import align
import generate
import train
from recipes import iterate

ROOT = Path(__file__).resolve().parent.parent
JOBS = {
    "train.py": [*train.PRESETS],
    "align.py": [*align.PRESETS],
    "data.py": ["prepare", "show"],
    "parallel.py": ["export"],
    "generate.py": [*generate.COMMANDS],
    "recipes.iterate": [*iterate.LOOPS],
    "recipes.nemo": ["import", "export"],
    "recipes.steerlm": ["annotate", "sft", "sample", "demo"],
}
RECIPES = ("curate", "demo", "evaluate", "kto", "nemo", "online", "plan", "report", "rewardbench")
RECIPES += ("card", "mapped", "rows", "serve", "synthesize")
COMMANDS = [(program, job) for program, jobs in JOBS.items() for job in ["", *jobs]]
COMMANDS += [(f"recipes.{name}", "") for name in RECIPES]
# names that stand in the sources, and mean nothing to who reads the help
INTERNAL = re.compile(r"__|\b[A-Z]\w*Config\b|\b(SamplingParams|NoneType|MISSING)\b")
WIDTH = 100
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # by runpy


def run_program(program, *args):
    """Run a program as `python train.py` or `python -m recipes.demo`; return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *args])
        patch.setattr(os, "_exit", sys.exit)
        for name in ("handlers", "level", "propagate"):  # which a program sets for itself
            patch.setattr(train.log, name, getattr(train.log, name))
        with pytest.raises(SystemExit) as ended:
            if program.endswith(".py"):  # imported once: tyro remembers the sources of its classes
                importlib.import_module(program.removesuffix(".py")).main()
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
    return ended.value.code


@pytest.fixture(autouse=True)
def pipes_stay_as_python_has_them():
    """A program lets a closed pipe end it; the tests in this process must not end by one."""
    yield
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


@pytest.fixture(scope="module")
def helps():
    """The help of each command, printed once."""
    return {}


@pytest.fixture(params=COMMANDS, ids=lambda command: " ".join(command).strip())
def shown(request, helps, monkeypatch):
    """What a command prints for --help."""
    if request.param not in helps:
        program, job = request.param
        monkeypatch.setenv("COLUMNS", str(WIDTH))
        out = io.TextIOWrapper(io.BytesIO(), "utf-8")  # tyro draws boxes for this very spelling
        with contextlib.redirect_stdout(out):
            assert run_program(program, *filter(None, [job]), "--help") == 0
        out.seek(0)
        helps[request.param] = out.read()
    return helps[request.param]


def entries(text):
    """Yield (option or argument, its text, whether it is one of a table) from a help."""
    for box in re.split(r"^╭─ ", text, flags=re.M)[1:]:
        title, *lines = box.splitlines()
        inside = [line.strip("│").removeprefix(" ").rstrip() for line in lines if line[:1] == "│"]
        table = bool(re.match(r"\S*\b(counts|blend|late-blend) options", title))
        if "subcommands" not in title:
            joined = "\n" + "\n".join(inside).split("─\n")[-1]
            for entry in re.split(r"\n(?=[-\[{A-Z])", joined)[1:]:
                name, *rest = re.split(r"\n| {2,}", entry, maxsplit=1)
                yield name, " ".join(" ".join(rest).split()), table


def test_the_usage_names_the_command_as_it_is_typed(shown, request):
    program, job = request.node.callspec.params["shown"]
    typed = program if program.endswith(".py") else f"python -m {program}"
    assert shown.startswith(f"usage: {typed} {job}".rstrip() + " [-h]")


def test_help_has_no_name_from_the_sources(shown):
    assert not INTERNAL.search(shown), INTERNAL.search(shown)


def test_help_has_no_number_that_may_be_wrapped_at_its_comma(shown):
    assert not re.search(r"\d,\d{3}|\d,\s*│\n│\s*\d{3}\b", shown)


def test_every_option_has_a_text_of_its_own(shown):
    found = [*entries(shown)]
    assert found[0][0] == "-h, --help" or ("-h, --help" in [name for name, _, _ in found])
    for name, text, table in found:
        # the entries of a table are explained together, above them
        said = re.split(r"\((?:default|required)\b", text)[0]
        assert table or re.match(r"\S+ ?\S", said), f"{name}: {text!r}"


# with which no noun phrase begins that stands alone
DANGLING = "Of What Who Whose Those That By As Which Whether How If On At At most Is Are And Or It"


def test_a_text_begins_as_a_phrase_that_stands_alone(shown):
    for name, text, _ in entries(shown):
        first = text.split(" ")[0]
        assert first not in DANGLING.split(), f"{name}: {text}"


def test_a_text_is_not_broken_in_the_middle_of_a_line(shown):
    """tyro keeps a docstring's own line break, and wraps beside it: write it in one line."""
    for line, following in zip(shown.splitlines(), shown.splitlines()[1:], strict=False):
        inside = re.match(r"│( {8,})(\S.*?) *│$", line)
        after = re.match(r"│( {8,})([^\s(]\S*)", following)
        if inside and after and inside[1] == after[1]:
            room = WIDTH - 3 - len(inside[1]) - len(inside[2])
            assert len(after[2]) >= room, f"{line}\n{following}"


def without_reader(program, *args):
    """Run a program in a fork, its stdout a pipe that nobody reads; return what stderr has."""
    read, write = os.pipe()
    os.close(read)
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if not child:
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python begins
            os.dup2(errors.fileno(), 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            sys.stdout = os.fdopen(write, "w")
            try:
                run_program(program, *args)
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)  # no exit handlers of pytest's
        os.close(write)
        os.waitpid(child, 0)
        errors.seek(0)
        return errors.read()


@pytest.mark.parametrize(
    "command",
    ["train.py nano", "data.py prepare", "generate.py sample", "parallel.py export"]
    + ["recipes.demo", "recipes.plan", "recipes.iterate demo", "recipes.report"],
)
def test_help_that_is_not_read_to_its_end_is_no_error(command):
    """As in `python train.py nano --help | head -3`."""
    assert without_reader(*command.split(), "--help") == ""


EACH_IN_TURN = """
import contextlib, io, sys
import test_help

for program in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()):
        test_help.run_program(*program.split(), "--help")
    loaded = {"torch._dynamo", "torch._inductor"} & sys.modules.keys()
    assert not loaded, f"{program} --help imports {loaded}"
"""


def test_no_programs_help_waits_for_torchs_compiler():
    """It takes seconds to import, and a help or a mistake needs none of it."""
    programs = [f"{program} {job}".strip() for program, job in dict(COMMANDS).items()]  # a job each
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", EACH_IN_TURN, *programs],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


# ---- mistakes ------------------------------------------------------------------------------------

ASK = "synthesize --model x --endpoint http://127.0.0.1:9/v1 --out out"
MISTAKES = {
    "demo --out taken": "taken",
    "demo --scale nan": "scale",
    "evaluate nowhere --jsonl questions.jsonl": "nowhere: no config.json",
    "evaluate nowhere --jsonl deep.jsonl": "deep.jsonl:1",
    "evaluate nowhere --jsonl binary.jsonl": "binary.jsonl:1",
    "evaluate nowhere --jsonl nofile": "nofile",
    "evaluate foreign --jsonl questions.jsonl": "foreign/config.json",
    "iterate nosuch": "no preset 'nosuch'",
    "iterate report": "model '.'",
    "iterate --out taken": "taken",
    "iterate --demo.out taken --out rounds": "taken",
    "plan --gpus 100": "100 processes",
    "plan --batch 7": "batch=7",
    "plan --gpu RTX4090": "H100",
    "report nowhere": "nowhere: no metrics.jsonl",
    "report foreign --out a.xyz": "foreign: no metrics.jsonl",
    "rewardbench nowhere": "nowhere",
    "rewardbench folder": "folder",
    "rewardbench deep.jsonl": "deep.jsonl:1",
    "rewardbench list.jsonl": "list.jsonl:1",
    "serve nowhere --port 0": "nowhere: no config.json",
    "serve foreign --port 0": "foreign/config.json",
    "serve nowhere --port 99999": "port=99999",
    "synthesize": "a model is a folder",
    "synthesize --model foreign --out out": "foreign/config.json",
    "synthesize --model x --endpoint localhost": "endpoint 'localhost': a URL",
    f"{ASK} --retries 0": "Connection refused",
    f"{ASK} --out taken": "taken",
    f"{ASK} --templates deep.toml": "deep.toml",
    f"{ASK} --templates binary.jsonl": "binary.jsonl",
    f"{ASK} --templates nofile": "nofile",
    f"{ASK} --prompts deep.jsonl": "deep.jsonl:1",
    f"{ASK} --prompts list.jsonl": "list.jsonl:1",
    f"{ASK} --evaluations folder": "folder",
    f"{ASK} --documents nofile": "nofile",
    f"{ASK} --counts turns inf": "inf",
    f"{ASK} --near nan": "near=nan",
}


@pytest.fixture
def wrong_files(tmp_path, monkeypatch):
    """Files and folders that are not what a recipe asks for, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "else"}')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000 + "\n")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\x80\x81\0\n")
    (tmp_path / "questions.jsonl").write_text('{"question": "What?", "answer": "This"}\n')


@pytest.mark.parametrize("command, names", MISTAKES.items(), ids=list(MISTAKES))
def test_a_mistake_is_answered_with_a_line_that_names_it(wrong_files, capfd, command, names):
    name, *args = command.split()
    code = run_program(f"recipes.{name}", *args)
    said = code if isinstance(code, str) else capfd.readouterr().err
    assert code and names in " ".join(re.sub(r"[│|+╭╰─]", " ", said).split())
    assert "Traceback" not in said
    if not re.match(r"[╭+]", said):  # tyro's box
        errors = [line for line in said.splitlines() if "error: " in line]
        assert len(errors) == 1 and said.rstrip().endswith(errors[0])
