"""train.py: the loop, the run's folder, and what it says to bad input."""

import dataclasses
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from data import Sampler, TokenData
from model import ModelConfig
from parallel import MeshConfig
from train import PRESETS, PretrainConfig, choose_config, lr_at, micro_batches, nano

ROOT = Path(__file__).parents[1]
TINY = ModelConfig(64, 2, 4, 2, 16, 128, vocab_size=512, seq_len=32, init_std=0.05)


def config(corpus, out, **changes):
    base = dict(
        model=TINY,
        mesh=MeshConfig(dtype="fp32"),
        data=corpus,
        out=out,
        steps=8,
        batch=8,
        micro_batch=2,
    )
    base |= dict(lr=3e-3, min_lr=3e-4, warmup=16, eval_every=4, eval_batches=1, save_every=3)
    return PretrainConfig(**(base | changes))


def pretrain(cfg):
    train.set_up_logging()
    train.pretrain("tiny", cfg)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in rows(out)]


def test_the_same_run_on_1_2_and_4_processes_prints_the_same_losses(on_ranks, corpus, tmp_path):
    for n in (1, 2, 4):
        on_ranks(n, pretrain, config(corpus, tmp_path / str(n)))
    one = [f"{r['loss']:.4f} {r['grad_norm']:.4f}" for r in rows(tmp_path / "1")]
    for n in ("2", "4"):
        assert [f"{r['loss']:.4f} {r['grad_norm']:.4f}" for r in rows(tmp_path / n)] == one
    final = [rows(tmp_path / n)[-1]["val_loss"] for n in ("1", "2", "4")]
    assert final == pytest.approx([final[0]] * 3, rel=1e-6)


def test_training_lowers_the_validation_loss_from_log_vocab(on_ranks, corpus, tmp_path):
    on_ranks(1, pretrain, config(corpus, tmp_path / "a", steps=60, eval_every=60, save_every=60))
    first, last = rows(tmp_path / "a")[0]["val_loss"], rows(tmp_path / "a")[-1]["val_loss"]
    assert abs(first - math.log(512)) < 0.3 and last < 0.85 * first


def test_a_runs_folder_holds_what_the_readme_says(on_ranks, corpus, tmp_path):
    cfg = config(corpus, tmp_path / "a")
    on_ranks(2, pretrain, cfg)
    keys = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "memory_gib"}
    got = rows(cfg.out)
    assert [r["step"] for r in got] == list(range(1, 9)) and all(keys <= r.keys() for r in got)
    assert got[-1]["tokens"] == 8 * 8 * 32 and got[0]["mfu"] is None
    assert [r["step"] for r in got if "val_loss" in r] == [1, 4, 8]
    assert {"val_loss/english", "val_loss/code"} <= got[-1].keys()
    assert json.loads((cfg.out / "config.json").read_text())["model"]["dim"] == 64
    assert sorted(p.name for p in (cfg.out / "checkpoints").iterdir()) == [
        "step_000006",
        "step_000008",
    ]
    assert list((cfg.out / "tensorboard").glob("events*"))


def batches_on(cfg, step):
    data = TokenData(cfg.data)
    sampler = Sampler(data, data.blend(cfg.blend), cfg.model.seq_len, cfg.seed)

    def on(dp, dp_rank, micro_batch):
        here = type("Ranks", (), {"dp": dp, "dp_rank": dp_rank})
        return micro_batches(
            dataclasses.replace(cfg, micro_batch=micro_batch), here, sampler, step * cfg.batch
        )

    return on


def test_batch_contents_depend_on_seed_and_step_alone(corpus):
    cfg = config(corpus, None)
    for step in (0, 5):
        on = batches_on(cfg, step)
        whole = on(1, 0, 8)[0]["tokens"]
        for dp in (1, 2, 4):
            for micro in (1, 2):
                parts = [
                    torch.as_tensor(b["tokens"]) for rank in range(dp) for b in on(dp, rank, micro)
                ]
                assert torch.equal(torch.cat(parts), torch.as_tensor(whole)), (step, dp, micro)
    other = batches_on(dataclasses.replace(cfg, seed=1), 0)(1, 0, 8)[0]["tokens"]
    assert (other != batches_on(cfg, 0)(1, 0, 8)[0]["tokens"]).any()


def start(cfg, n=1):
    """The run as a program, so that it can be killed."""
    code = (
        "import sys, train; sys.path.insert(0, 'tests'); import test_train as t; from pathlib "
        "import Path\n"
        "train.torch.set_num_threads(1)\n"
        f"t.pretrain(t.config(Path(sys.argv[1]), Path(sys.argv[2]), steps={cfg.steps}, "
        f"save_every={cfg.save_every}))"
    )
    args = [sys.executable, "-c", code, str(cfg.data), str(cfg.out)]
    return subprocess.Popen(args, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_a_killed_run_resumed_gives_bit_identical_losses(corpus, tmp_path):
    whole, killed = (
        config(corpus, tmp_path / n, steps=40, save_every=7) for n in ("whole", "killed")
    )
    assert start(whole).wait() == 0
    process, deadline = start(killed), time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        metrics = killed.out / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 17:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 17 <= len(rows(killed.out)) < 40, "the kill came too late to test anything"
    assert start(killed).wait() == 0
    assert losses(killed.out) == losses(whole.out)


def test_a_finished_run_is_not_trained_again(on_ranks, corpus, tmp_path):
    cfg = config(corpus, tmp_path / "a")
    on_ranks(1, pretrain, cfg)
    before = losses(cfg.out)
    on_ranks(1, pretrain, cfg)
    assert losses(cfg.out) == before


def test_isolating_documents_changes_the_loss(on_ranks, corpus, tmp_path):
    for isolate in (False, True):
        cfg = config(corpus, tmp_path / str(isolate), isolate=isolate, steps=2)
        cfg = dataclasses.replace(
            cfg, model=dataclasses.replace(TINY, seq_len=512), batch=2, micro_batch=2
        )
        on_ranks(1, pretrain, cfg)
    a, b = (rows(tmp_path / n) for n in ("False", "True"))
    assert a[1]["loss"] != b[1]["loss"]


def test_the_rate_warms_up_linearly_then_falls_as_a_cosine_in_samples():
    cfg = dataclasses.replace(nano(), lr=1.0, min_lr=0.1, warmup=100, batch=10, steps=110)
    assert lr_at(0, cfg) == pytest.approx(10 / 110) and lr_at(90, cfg) == pytest.approx(100 / 110)
    assert lr_at(100, cfg) == 1.0
    for share, want in (
        (0.25, 0.55 + 0.45 * math.sqrt(0.5)),
        (0.5, 0.55),
        (0.75, 0.55 - 0.45 * math.sqrt(0.5)),
        (1.0, 0.1),
    ):
        assert lr_at(100 + round(1000 * share), cfg) == pytest.approx(want)


def error_of(on_ranks, cfg):
    with pytest.raises(AssertionError) as e:
        on_ranks(1, pretrain, cfg)
    return str(e.value)


def test_a_vocabulary_that_differs_from_the_datas_is_refused(on_ranks, corpus, tmp_path):
    cfg = config(corpus, tmp_path / "a", model=dataclasses.replace(TINY, vocab_size=500))
    assert re.search(
        "ValueError.*vocabulary of 512, the model of 500: set --model.vocab-size 512",
        error_of(on_ranks, cfg),
    )


def test_a_sequence_beyond_the_data_is_refused(on_ranks, corpus, tmp_path):
    cfg = config(corpus, tmp_path / "a", model=dataclasses.replace(TINY, seq_len=4_000_000))
    assert "fewer than one window of seq_len=4000000" in error_of(on_ranks, cfg)
    assert not (tmp_path / "a").exists()


def test_unprepared_data_is_refused(on_ranks, tmp_path):
    assert "run data.py prepare" in error_of(on_ranks, config(tmp_path / "nothing", tmp_path / "a"))


def test_a_folder_with_another_runs_config_is_refused(on_ranks, corpus, tmp_path):
    cfg = config(corpus, tmp_path / "a", steps=2)
    on_ranks(1, pretrain, cfg)
    message = error_of(on_ranks, dataclasses.replace(cfg, seed=9))
    assert "holds another run (seed: 0 there, 9 here)" in message and "--out" in message
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("precious")
    assert "holds no run" in error_of(on_ranks, dataclasses.replace(cfg, out=tmp_path / "b"))
    assert (tmp_path / "b" / "thesis.txt").read_text() == "precious"


def test_a_non_finite_loss_stops_before_the_update(on_ranks, corpus, tmp_path):
    # the squared activations overflow fp32 after a few steps of an absurd rate
    cfg = config(corpus, tmp_path / "a", lr=1e30, min_lr=0.0, warmup=0, steps=8, save_every=1)
    message = error_of(on_ranks, cfg)
    assert re.search(r"FloatingPointError: step \d: loss .*stopped before the update", message)
    saved = sorted((cfg.out / "checkpoints").glob("step_*"))
    assert len(rows(cfg.out)) == int(saved[-1].name[-6:]) >= 1  # what was good is kept


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (1.0, math.inf)])
def test_neither_a_nan_loss_nor_an_infinite_norm_passes(loss, norm):
    with pytest.raises(FloatingPointError, match="step 3"):
        train.stop_unless_finite(3, loss, norm)


def test_an_unknown_preset_or_option_gets_a_suggestion(capsys):
    with pytest.raises(ValueError, match="no preset 'nanoo': did you mean nano"):
        choose_config(["nanoo"], PRESETS, "")
    with pytest.raises(SystemExit):
        choose_config(["nano", "--step", "5"], PRESETS, "")
    assert "--steps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        choose_config(["nano", "--steps", "many"], PRESETS, "")
    assert (
        choose_config(["nano", "--steps", "7", "--mesh.dtype", "bf16"], PRESETS, "")[1].steps == 7
    )


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"lr": 1e-5, "min_lr": 1e-4}, {"warmup": -1}, {"keep": 0}], ids=str
)
def test_impossible_settings_are_refused_with_their_numbers(change):
    with pytest.raises(ValueError, match=f"{list(change)[0]}={list(change.values())[0]}"):
        dataclasses.replace(nano(), **change)


def test_the_command_reports_an_error_in_one_line_and_exits_non_zero(tmp_path):
    command = [sys.executable, "train.py", "nano", "--batch", "5", "--out", str(tmp_path / "a")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    assert "micro_batch=2 does not divide the 5 sequences" in done.stdout + done.stderr


# ---- staying alive -------------------------------------------------------------------------------


def torchrun(cfg, n, *more, before=""):
    """The run as torchrun starts it, on n processes."""
    code = before + (
        "import sys, train, dataclasses; sys.path.insert(0, 'tests'); import test_train as t\n"
        "from pathlib import Path; train.set_up_logging()\n"
        "c = t.config(Path(sys.argv[1]), Path(sys.argv[2]), steps=int(sys.argv[3]), save_every=2)\n"
        "background = sys.argv[4] == 'background'\n"
        "c = dataclasses.replace(c, save_in_background=background, eval_every=1000)\n"
        "train.run(lambda: train.pretrain('tiny', c))\n"
    )
    script = cfg.out.with_suffix(".py")
    script.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n)]
    launcher += ["--master_port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    args = [*launcher, str(script), str(cfg.data), str(cfg.out), str(cfg.steps), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(args, cwd=ROOT, env=env, **pipes)


def ranks_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def wait_for(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None and not condition():
        time.sleep(0.002)


@pytest.mark.slow
def test_a_rank_killed_at_ten_random_moments_never_loses_the_run(corpus, tmp_path):
    whole = config(corpus, tmp_path / "whole", steps=60)
    out, _ = torchrun(whole, 2, "foreground").communicate()
    assert len(rows(whole.out)) == 60, out
    killed, luck = dataclasses.replace(whole, out=tmp_path / "killed"), random.Random(0)
    metrics = killed.out / "metrics.jsonl"

    def steps_done():
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    during_a_save = 0
    for kill in range(10):
        process = torchrun(killed, 2, "background" if kill % 2 else "foreground")
        target = steps_done() + luck.randint(2, 5)
        wait_for(lambda target=target: steps_done() >= target, process)
        if kill % 3 == 0:  # in the middle of a save
            wait_for(lambda: list(killed.out.glob("checkpoints/*.partial")), process, 5)
        time.sleep(luck.random() * 0.03)
        during_a_save += bool(list(killed.out.glob("checkpoints/*.partial")))
        if victims := ranks_of(process):
            os.kill(luck.choice(victims), signal.SIGKILL)
        process.communicate(timeout=120)
    out, _ = torchrun(killed, 2, "foreground").communicate()
    assert during_a_save >= 1
    assert losses(killed.out) == losses(whole.out), out


def test_sigterm_saves_and_exits_cleanly(corpus, tmp_path):
    cfg = config(corpus, tmp_path / "a", steps=10_000, save_every=5_000)
    process = start(cfg)
    wait_for(lambda: (cfg.out / "metrics.jsonl").exists() and len(rows(cfg.out)) > 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    saved = list((cfg.out / "checkpoints").iterdir())
    assert [p.name for p in saved] == [f"step_{len(rows(cfg.out)):06d}"]


@pytest.mark.slow
def test_one_ranks_failure_ends_the_job_with_its_traceback(corpus, tmp_path):
    cfg = config(corpus, tmp_path / "a", steps=1000)
    broken = (
        "import os, parallel; step = parallel.Runner.step\n"
        "def fail(self, *args):\n"
        "    if os.environ['RANK'] == '1': raise RuntimeError('the second rank is broken')\n"
        "    return step(self, *args)\n"
        "parallel.Runner.step = fail\n"
    )
    begun, process = time.monotonic(), torchrun(cfg, 2, "foreground", before=broken)
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - begun < 60
    assert "RuntimeError: the second rank is broken" in out
