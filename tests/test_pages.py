"""The pages beside the README and the shell scripts: what they name is there, and what they say
happens, happens. A cluster of two nodes is two torchrun agents on this machine."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

import align
import train
from recipes import nemo, serve

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / ".github").glob("*.md"))]


# ---- pages ---------------------------------------------------------------------------------------


def test_the_front_page_is_short_and_narrow():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 180
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_and_presets_of_a_page_exist(page):
    text = page.read_text().replace("\\\n", " ")
    for program, job in re.findall(r"\b(train|align)\.py (\w+)", text):
        presets = train.PRESETS if program == "train" else align.PRESETS
        assert job in {*presets, "report", "demo", "iterate", "STAGE"}, f"{program}.py {job}"
    if page.name != "CHANGELOG.md":  # it names what has gone
        for module in set(re.findall(r"\brecipes\.([a-z_]+)", text)):
            assert list((ROOT / "recipes").glob(f"{module}.*")), module
        for file in set(re.findall(r"`((?:recipes|tests)/\w+\.\w+)`", text)):
            assert (ROOT / file).exists(), file


def test_options_that_the_pages_give_to_the_core_and_the_server_are_known():
    configs = {
        r"-m recipes\.serve": serve.ServeConfig,
        r"-m recipes\.nemo import": nemo.ImportConfig,
    }
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for program, config in configs.items():
            for arguments in re.findall(
                rf"^(?:torchrun.*|python) {program} ([^#`\n]*)", text, re.M
            ):
                tyro.cli(config, args=shlex.split(arguments))
        for arguments in re.findall(
            r"^\s*(?:torchrun.*|python) train\.py (\w[^#`\n]*)", text, re.M
        ):
            if "--help" not in arguments:
                train.choose_config(shlex.split(arguments), train.PRESETS, "")


def test_the_submissions_of_the_340b_fit_their_machines_and_follow_each_other():
    text = (ROOT / ".github/CLUSTER.md").read_text()
    said = re.findall(r"--nodes (\d+) recipes/slurm\.sh train\.py (nemotron4_340b.*)", text)
    done = []
    for nodes, arguments in said:
        _, config = train.choose_config(shlex.split(arguments), train.PRESETS, "")
        schedule = config.schedule()
        last = config.steps or schedule.steps
        for segment in schedule.segments:
            if sum(done[-1:]) <= segment.first_step < last:
                config.mesh.check(config.model, 8 * int(nodes), segment.batch, config.micro_batch)
        assert schedule.ends_a_segment(last)  # where the batch grows, which is kept
        done.append(last)
    assert done == [63_578, 95_367, 1_006_656]


def test_the_example_of_the_front_page_trains_with_a_schedule_of_its_own():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    code = code.split("config =")[0]
    names: dict = {}
    exec(code, names)
    phase = names["phase"]
    rates = [phase.lr_at(samples, 8) for samples in range(0, 2000, 8)]
    assert rates[0] < rates[10] < rates[20] == rates[100] == 1.5e-3  # warm-up, then constant
    assert rates[-1] < rates[-25] < 1.5e-3 and rates[-25] == pytest.approx(0.75e-3, rel=0.05)
    config = names["PretrainConfig"](names["SHAPES"]["nano"], phases=(phase,), steps=0)
    assert config.schedule().lr(249) == rates[-1]


# ---- scripts -------------------------------------------------------------------------------------

# Slurm's commands for two "nodes" of this machine, of which the first hosts the rendezvous
STUBS = {
    "srun": """
shift
for node in 0 1; do
    setsid "$@" > "$STUBS/node_$node.log" 2>&1 & echo $! > "$STUBS/node_$node.pid"; pids+=($!)
    until (: < "/dev/tcp/127.0.0.1/$PORT") 2> /dev/null; do sleep 0.2; done
done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "${status:-0}"
""",
    "scontrol": """
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> "$STUBS/said"; fi
""",
    "scancel": """
echo "$@" >> "$STUBS/said"
kill -TERM $(cat "$STUBS"/node_*.pid)
""",
}
SMALL = "train.py nano --model.n-layers 2 --model.dim 64 --model.ffn-dim 128 --model.n-heads 4"
SMALL += " --model.n-kv-heads 2 --model.head-dim 16 --batch 4 --micro-batch 1 --steps 4000"
SMALL += " --model.vocab-size 512 --model.seq-len 64 --save-every 10 --eval-batches 1"


@pytest.mark.parametrize("script", sorted((ROOT / "recipes").glob("*.sh")), ids=lambda s: s.name)
def test_a_script_is_sound_to_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def test_a_job_without_a_folder_of_its_own_is_refused():
    env = {name: value for name, value in os.environ.items() if name != "OUT"}
    done = subprocess.run(
        ["bash", ROOT / "recipes/slurm.sh", "train.py", "nano"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode and "set OUT to a folder" in done.stderr


def test_a_speedrun_that_is_asked_to_stop_begins_no_other_stage(tmp_path):
    # the stage that runs gets the signal as well, saves and ends well, as train.py does
    python = tmp_path / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
        echo "$1" >> {tmp_path}/started
        case $1 in
            -c) echo 1 ;;
            -) cat > /dev/null ;;
            train.py) trap : INT; kill -INT 0; exit 0 ;;
        esac
        """
    )
    python.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path)}
    done = subprocess.run(
        ["bash", ROOT / "recipes/speedrun.sh"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
        # what runs in the background ignores Ctrl-C, and a script cannot undo that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == 130 and "goes on from here" in done.stderr
    assert (tmp_path / "started").read_text().split()[-1] == "train.py"


def losses(out):
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [json.loads(line)["loss"] for line in lines]


def wait_for(condition, job, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_node_that_dies_and_comes_back_changes_no_loss_and_a_job_is_requeued_at_its_limit(
    tmp_path, corpus
):
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    out = tmp_path / "run"
    env = {**os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {"STUBS": str(tmp_path), "OUT": str(out), "PORT": port, "GPUS": "1", "SHUTDOWN": "60"}
    env |= {"OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    env |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_SUBMIT_DIR": str(ROOT)}
    where = ["--data", str(corpus), "--out", str(out)]
    command = ["bash", str(ROOT / "recipes/slurm.sh"), *SMALL.split(), *where[:2]]
    job = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    agent = None
    try:
        wait_for(lambda: len(losses(out)) >= 25, job)
        before = losses(out)
        victim = int((tmp_path / "node_1.pid").read_text())
        for pid in (victim, *children_of(victim)):
            os.kill(pid, signal.SIGKILL)
        again = f"torchrun --nnodes 2 --nproc_per_node 1 --rdzv-id 7 --rdzv-backend c10d {SMALL}"
        again = again.replace("c10d", f"c10d --rdzv-endpoint 127.0.0.1:{port} --max-restarts 3")
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        log = (tmp_path / "node_2.log").open("w")
        agent = subprocess.Popen(
            [*again.split(), *where], cwd=ROOT, env=env, stdout=log, stderr=log
        )
        (tmp_path / "node_1.pid").write_text(str(agent.pid))

        def logs():
            return "".join(path.read_text() for path in tmp_path.glob("node_*.log"))

        wait_for(lambda: "continuing from step" in logs(), job)
        wait_for(lambda: len(losses(out)) >= len(before) + 5, job)
        assert losses(out)[: len(before)] == before
        os.kill(job.pid, signal.SIGUSR1)
        assert job.wait(60) == 0
        agent.wait(60)
        assert (tmp_path / "said").read_text() == "--signal=TERM 7\nrequeue 7\n"
        (saved,) = re.findall(r"asked to stop: saved step (\d+)", logs())
        assert (out / "checkpoints" / f"step_{int(saved):06d}").exists()
        assert len(losses(out)) == int(saved)
    finally:
        started = [int(path.read_text()) for path in tmp_path.glob("node_*.pid")]
        for pid in (*started, *([agent.pid] if agent else []), job.pid):
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGTERM)
