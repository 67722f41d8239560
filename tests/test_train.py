"""train.py: the loop, the run's folder, and what it says to bad input."""

import dataclasses
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import train
from data import Sampler, TokenData, hold
from model import ModelConfig, hf_config
from parallel import ExportConfig, MeshConfig, export, load_hf
from train import PRESETS, Phase, PretrainConfig, Schedule, choose_config, micro_batches, nano

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


def pretrain_offline(cfg):
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    pretrain(cfg)


def test_a_project_of_wandb_gets_the_settings_and_every_step(on_ranks, corpus, tmp_path):
    cfg = config(corpus, tmp_path / "a", steps=2, wandb="quarry")
    on_ranks(2, pretrain_offline, cfg)
    written = next((cfg.out / "wandb").glob("offline-run-*/*.wandb")).read_bytes()
    assert b"quarry" in written and b"micro_batch" in written
    assert written.count(b"tokens_per_s") >= 2 and b"val_loss/english" in written


def batches_on(cfg, step):
    data = TokenData(cfg.data)
    sampler = Sampler(data, data.blend(cfg.blend), cfg.model.seq_len, cfg.seed)

    def on(dp, dp_rank, micro_batch):
        here = type("Ranks", (), {"dp": dp, "dp_rank": dp_rank})
        at = dataclasses.replace(cfg, micro_batch=micro_batch)
        return micro_batches(at, here, sampler, step * cfg.batch, cfg.batch)

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
    phase = Phase(((300, 10), (800, 20)), lr=1.0, min_lr=0.1, warmup=100)
    assert phase.lr_at(0, 10) == pytest.approx(10 / 110)
    assert phase.lr_at(90, 10) == pytest.approx(100 / 110)
    assert phase.lr_at(100, 10) == 1.0
    half = 0.45 * math.sqrt(0.5)
    for share, want in ((0.25, 0.55 + half), (0.5, 0.55), (0.75, 0.55 - half), (1.0, 0.1)):
        assert phase.lr_at(100 + round(1000 * share), 20) == pytest.approx(want)


def test_without_a_min_lr_the_rate_is_constant():
    schedule = dataclasses.replace(nano(), min_lr=None, warmup=0).schedule()
    assert {schedule.lr(step) for step in range(schedule.steps)} == {nano().lr}


def test_the_340b_presets_totals_are_the_reports():
    cfg = PRESETS["nemotron4_340b"]()
    schedule = cfg.schedule()
    assert [s.steps for s in schedule.segments] == [63_578, 31_789, 805_325, 105_964]
    assert [s.batch for s in schedule.segments] == [768, 1536, 2304, 2304]
    first, second = cfg.phases
    assert first.samples == 1_953_125_000 and first.samples * 4096 == 8.0e12
    assert abs(schedule.segments[3].first_sample / first.samples - 1) < 1e-6
    assert second.samples * 4096 == 1.0e12 and cfg.schedule().steps == 1_006_656
    assert first.warmup * 4096 == pytest.approx(16.0e9, rel=1e-6)
    assert first.samples - first.warmup == 1_949_218_748  # NVIDIA's decay samples
    assert schedule.lr(63_578 + 31_789 + 805_325 - 1) == pytest.approx(1e-5)
    assert schedule.lr(schedule.steps - 1) == pytest.approx(1e-7, rel=1e-3)
    assert second.late_from() / second.samples == pytest.approx(0.711, abs=5e-4)


def test_the_15b_presets_totals_are_its_papers():
    schedule = PRESETS["nemotron4_15b"]().schedule()
    assert [s.batch for s in schedule.segments] == [384, 768, 1152, 1152]
    assert sum(s.steps * s.batch for s in schedule.segments[:3]) * 4096 == pytest.approx(
        8e12, rel=1e-6
    )
    assert max(map(schedule.lr, range(0, 100_000, 999))) == pytest.approx(4.5e-4, rel=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_the_checks_on_some_number_of_processes(name):
    cfg = PRESETS[name]()
    worlds = {"nemotron4_340b": 6144, "nemotron4_15b": 768, "minitron_8b": 16}
    for segment in cfg.schedule().segments:
        world = worlds.get(name, 1)
        cfg.mesh.check(cfg.model, world, segment.batch, cfg.micro_batch)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ramp": ()}, "ramp="),
        ({"ramp": ((10, 0),)}, "ramp="),
        ({"min_lr": 2.0}, "min_lr=2.0"),
        ({"late_blend": {"code": 1.0}}, "late_below=0.0"),
        ({"late_blend": {"code": 1.0}, "late_below": 1.5}, "late_below=1.5"),
    ],
)
def test_an_impossible_phase_is_refused_with_its_numbers(change, words):
    with pytest.raises(ValueError, match=words):
        Phase(**{"ramp": ((10, 2),), "lr": 1.0, "min_lr": 0.1, **change})


def test_steps_samples_batches_and_blends_of_a_schedule_agree():
    a, b, late = {"english": 1.0}, {"code": 1.0}, {"english": 0.5, "code": 0.5}
    phases = (
        Phase(((40, 4), (80, 8)), 1.0, 0.1, 8, a),
        Phase(((120, 12),), 0.1, 0.001, 0, b, late, 0.02),
    )
    schedule = Schedule(phases)
    assert [(s.first_step, s.steps, s.first_sample) for s in schedule.segments] == [
        (0, 10, 0), (10, 10, 40), (20, 10, 120)
    ]  # fmt: skip
    sample = 0
    for step in range(schedule.steps):
        assert schedule.samples(step) == sample
        sample += schedule.at(step).batch
    assert sample == schedule.samples(schedule.steps) == 240
    assert [step for step in range(1, 31) if schedule.ends_a_segment(step)] == [10, 20, 30]
    switch = next(step for step in range(20, 30) if schedule.lr(step) <= 0.02)
    assert schedule.blends() == {0: a, 120: b, schedule.samples(switch): late}


def two_phases(corpus, out, **changes):
    """A ramp 4, 8 with a change of blend and a second phase: 6 + 4 + 4 steps."""
    phases = (
        Phase(((24, 4), (32, 8)), 3e-3, 3e-4, 8, {"english": 0.75, "code": 0.25}),
        Phase(((32, 8),), 3e-4, 3e-6, 0, {"english": 0.5, "code": 0.5}, {"code": 1.0}, 6e-5),
    )
    default = {key: getattr(PretrainConfig, key) for key in ("batch", "lr", "min_lr", "warmup")}
    more = dict(phases=phases, steps=14, eval_every=100, save_every=100, micro_batch=1)
    return config(corpus, out, **(default | more | changes))


def test_a_two_phase_run_logs_its_batches_rates_and_checkpoints(on_ranks, corpus, tmp_path):
    cfg = two_phases(corpus, tmp_path / "a", save_every=3, keep=1)  # ends of segments stay
    on_ranks(2, pretrain, cfg)
    got, schedule = rows(cfg.out), cfg.schedule()
    assert [r["batch"] for r in got] == [4] * 6 + [8] * 8
    assert [r["tokens"] // 32 for r in got] == [schedule.samples(s) for s in range(1, 14)] + [88]
    assert [r["lr"] for r in got] == pytest.approx([schedule.lr(s) for s in range(14)])
    saved = sorted(p.name for p in (cfg.out / "checkpoints").iterdir())
    assert saved == ["step_000006", "step_000010", "step_000014"]
    assert {"val_bpb/english", "val_bpb/code", "val_loss/english"} <= got[-1].keys()


def test_a_ramped_run_moved_to_more_ranks_gives_the_losses_of_one_that_was_not(
    on_ranks, corpus, tmp_path
):
    whole, moved = two_phases(corpus, tmp_path / "whole"), two_phases(corpus, tmp_path / "moved")
    on_ranks(2, pretrain, whole)
    on_ranks(2, pretrain, dataclasses.replace(moved, steps=6))  # up to where the batch grows
    on_ranks(4, pretrain, dataclasses.replace(moved, micro_batch=2))
    got, want = losses(moved.out), losses(whole.out)
    assert len(got) == 14
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_a_run_of_phases_lasts_as_long_as_they_do_unless_steps_are_given(
    on_ranks, corpus, tmp_path
):
    longer = two_phases(corpus, tmp_path / "a", steps=0)
    *rest, last = longer.phases
    longer = dataclasses.replace(longer, phases=(*rest, dataclasses.replace(last, ramp=((48, 8),))))
    on_ranks(1, pretrain, longer)
    assert len(rows(tmp_path / "a")) == longer.schedule().steps
    on_ranks(1, pretrain, dataclasses.replace(longer, out=tmp_path / "b", steps=2))
    assert len(rows(tmp_path / "b")) == 2
    assert all(PRESETS[name]().steps == 0 for name in PRESETS if PRESETS[name]().phases)


def test_the_blend_changes_at_the_right_sample(corpus):
    cfg = two_phases(corpus, None)
    schedule, data = cfg.schedule(), TokenData(corpus)
    blends = {at: data.blend(b) for at, b in schedule.blends().items()}
    sampler = Sampler(data, blends[0], 32, 0, later=blends)
    names = [sampler.locate(i)[0] for i in range(88)]
    assert names[:56].count("code") == 14
    switch = schedule.samples(next(s for s in range(10, 14) if schedule.lr(s) <= 6e-5))
    assert 56 < switch < 88 and set(names[switch:]) == {"code"}
    assert names[56:switch].count("english") == (switch - 56) // 2


def test_bits_per_byte_are_nats_per_token_in_the_datas_units(on_ranks, corpus, tmp_path):
    cfg = config(corpus, tmp_path / "a", steps=1)
    on_ranks(1, pretrain, cfg)
    row, val = rows(cfg.out)[0], TokenData(corpus).manifest["sources"]["code"]["val"]
    per_byte = row["val_loss/code"] / math.log(2) * val["tokens"] / val["bytes"]
    assert row["val_bpb/code"] == pytest.approx(per_byte)


def test_a_run_starts_from_another_runs_weights_with_a_fresh_optimizer(on_ranks, corpus, tmp_path):
    first = config(corpus, tmp_path / "a", steps=6)
    on_ranks(2, pretrain, first)
    on_ranks(
        1,
        pretrain,
        config(corpus, tmp_path / "b", init=str(first.out), steps=1, lr=0.0, min_lr=0.0),
    )
    assert rows(tmp_path / "b")[0]["val_loss"] == pytest.approx(
        rows(first.out)[-1]["val_loss"], rel=1e-6
    )
    for init, words in ((tmp_path, "neither a run nor"), (tmp_path / "empty", "no .safetensors")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        shutil.copy(first.out / "config.json", tmp_path / "empty")
        assert words in error_of(on_ranks, config(corpus, tmp_path / "c", init=str(init)))
    assert not (tmp_path / "c").exists()


def test_weights_of_another_shape_are_refused(on_ranks, corpus, tmp_path):
    first = config(corpus, tmp_path / "a", steps=2)
    on_ranks(1, pretrain, first)
    for change, words in (
        ({"n_layers": 1}, "n_layers=2, this run 1"),
        ({"rope_base": 5e5}, "rope_base"),
    ):
        other = dataclasses.replace(TINY, **change)
        cfg = config(corpus, tmp_path / "b", init=str(first.out), model=other)
        assert words in error_of(on_ranks, cfg)
    assert not (tmp_path / "b").exists()


def test_options_that_the_phases_own_are_refused_beside_them(corpus):
    for change in ({"lr": 1.0}, {"batch": 64}, {"blend": {"code": 1.0}}, {"warmup": 5}):
        with pytest.raises(ValueError, match=f"{list(change)[0]}=.*set --phases.0"):
            dataclasses.replace(PRESETS["nano_two_phase"](), **change)


def test_a_run_is_not_resumed_on_other_data(on_ranks, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "data")
    cfg = config(tmp_path / "data", tmp_path / "a", steps=2)
    on_ranks(1, pretrain, cfg)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    manifest["sources"]["code"]["train"]["crc"] ^= 1
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    assert "holds another run (data_fingerprint" in error_of(on_ranks, cfg)


def test_a_run_may_be_extended_and_says_that_its_schedule_changes(on_ranks, corpus, tmp_path):
    cfg = config(corpus, tmp_path / "a", steps=4)
    on_ranks(1, pretrain, cfg)
    said = on_ranks(1, poisoned, dataclasses.replace(cfg, steps=6), ())[0]
    assert any("4 steps before, 6 now" in line for line in said)
    assert [r["step"] for r in rows(cfg.out)] == [1, 2, 3, 4, 5, 6]


def test_a_start_that_failed_does_not_lock_its_folder(on_ranks, corpus, tmp_path):
    cfg = config(corpus, tmp_path / "a", steps=2, init=f"hf:{tmp_path}")
    assert "no config.json" in error_of(on_ranks, cfg)
    on_ranks(1, pretrain, dataclasses.replace(cfg, init=""))


@pytest.mark.slow
def test_a_transformers_folder_is_trained_saved_and_opened_again_in_transformers(
    on_ranks, corpus, tmp_path
):
    from transformers import AutoModelForCausalLM, NemotronConfig, NemotronForCausalLM

    config_ = {k: v for k, v in hf_config(TINY).items() if k not in ("architectures", "model_type")}
    theirs = NemotronForCausalLM(NemotronConfig(**config_))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.endswith("norm.weight"):
                p.zero_()  # transformers starts it at a gain of two
    theirs.save_pretrained(tmp_path / "hf")
    cfg = config(corpus, tmp_path / "a", init=f"hf:{tmp_path / 'hf'}", steps=20, save_every=20)
    cfg = dataclasses.replace(cfg, mesh=MeshConfig(tp=2, dtype="fp32"), micro_batch=2)
    on_ranks(4, pretrain, cfg)  # dp 2, tp 2
    export(ExportConfig(cfg.out, tmp_path / "out", "fp32"))
    ours, again = load_hf(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    x = torch.arange(30)[None]
    with torch.no_grad():
        assert (ours(x) - again(x).logits).abs().max() < 1e-4
        assert (ours(x) - theirs(x).logits).abs().max() > 0.1  # it has learnt something
    assert rows(cfg.out)[-1]["loss"] < rows(cfg.out)[0]["loss"] - 0.3


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
    message = error_of(on_ranks, dataclasses.replace(cfg, model=dataclasses.replace(TINY, dim=32)))
    assert "holds another run (model.dim: 64 there, 32 here)" in message
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("precious")
    assert "holds no run" in error_of(on_ranks, dataclasses.replace(cfg, out=tmp_path / "b"))
    assert (tmp_path / "b" / "thesis.txt").read_text() == "precious"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "nemotron"}')
    assert "holds no run" in error_of(on_ranks, dataclasses.replace(cfg, out=tmp_path / "hf"))


def test_a_restart_goes_on_in_the_folder_that_its_own_torchrun_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / "runs" / name for name in ("nano", "nano-2", "nano-3")]
    for folder, agent in zip(folders, ("other", "ours", "third"), strict=True):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"agent": agent}))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert train.free_folder("nano", "ours").name == "nano-4"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.free_folder("nano", "ours").name == "nano-2"
    assert train.free_folder("nano", "a fourth").name == "nano-4"


def test_a_non_finite_loss_stops_before_the_update(on_ranks, corpus, tmp_path):
    # the squared activations overflow fp32 after a few steps of an absurd rate
    cfg = config(corpus, tmp_path / "a", lr=1e30, min_lr=0.0, warmup=0, steps=8, save_every=1)
    message = error_of(on_ranks, cfg)
    assert re.search(r"FloatingPointError: step \d: loss .*stopped before the update", message)
    saved = sorted((cfg.out / "checkpoints").glob("step_*"))
    assert len(rows(cfg.out)) == int(saved[-1].name[-6:]) >= 1  # what was good is kept


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (1.0, math.inf), (9.0, 1.0)])
def test_neither_a_nan_nor_an_infinite_norm_nor_a_spike_passes(loss, norm):
    cfg = dataclasses.replace(nano(), spike=2.0)
    assert train.what_is_wrong(cfg, loss, norm, [3.0] * 10)
    assert not train.what_is_wrong(cfg, 3.5, 1.0, [3.0] * 10)
    with pytest.raises(FloatingPointError, match="step 3: .*english documents 4-5"):
        train.handle_bad_step(cfg, 3, "loss nan", 1, "english documents 4-5")


def poisoned(cfg, steps):
    """The run with a loss that is not a number at some steps; returns what it warned of."""
    honest, count, said = train.Runner.step, iter(range(10_000)), []

    def step(self, batches, loss_fn):
        loss = honest(self, batches, loss_fn)
        return loss * math.nan if next(count) in steps else loss

    train.Runner.step = step
    train.log.addFilter(lambda record: said.append(record.getMessage()) or True)
    train.set_up_logging()
    train.pretrain("tiny", cfg)
    return said


def test_bad_steps_are_skipped_logged_and_bounded(on_ranks, corpus, tmp_path):
    cfg = config(corpus, tmp_path / "a", on_bad_step="skip", max_skips=2)
    said = "\n".join(on_ranks(2, poisoned, cfg, (2, 5))[0])
    got = rows(cfg.out)
    assert [r["step"] for r in got if r["loss"] is None] == [3, 6] and len(got) == 8
    assert [r.get("skipped") for r in got if "skipped" in r] == [1, 2]
    assert re.search(r"step 3: loss nan.*left out \(1 so far\); batch: \w+ from token \d+", said)
    cfg = dataclasses.replace(cfg, out=tmp_path / "b")
    with pytest.raises(AssertionError, match="3 steps skipped, max_skips=2"):
        on_ranks(1, poisoned, cfg, (2, 4, 5))
    on_ranks(1, pretrain, dataclasses.replace(cfg, on_bad_step="stop", spike=9.0))  # goes on


def test_a_profile_window_writes_a_trace(on_ranks, corpus, tmp_path):
    cfg = config(corpus, tmp_path / "a", profile=2, steps=5)
    on_ranks(2, pretrain, cfg)
    trace = json.loads((cfg.out / "trace" / "rank0.json").read_text())
    assert any("aten::mm" in str(e.get("name")) for e in trace["traceEvents"])


def test_an_unknown_preset_or_option_gets_a_suggestion(capsys):
    with pytest.raises(ValueError, match="no preset 'nanoo': there are nano, "):
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
    "change",
    [
        {"steps": 0},
        {"lr": 1e-5, "min_lr": 1e-4},
        {"warmup": -1},
        {"keep": 0},
        {"spike": 0.5},
        {"clip": 0.0},
        {"max_skips": -1},
    ],
    ids=str,
)
def test_impossible_settings_are_refused_with_their_numbers(change):
    with pytest.raises(ValueError, match=f"{list(change)[0]}={list(change.values())[0]}"):
        dataclasses.replace(nano(), **change)


def test_the_command_reports_an_error_in_one_line_and_exits_non_zero(tmp_path):
    command = [sys.executable, "train.py", "nano", "--batch", "5", "--out", str(tmp_path / "a")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    assert "1 dp processes x micro_batch=2 = 2" in done.stdout + done.stderr


# ---- staying alive -------------------------------------------------------------------------------


def torchrun(cfg, n, *more, before=""):
    """The run as torchrun starts it, on n processes."""
    code = before + (
        "import sys, train, dataclasses; sys.path.insert(0, 'tests'); import test_train as t\n"
        "from pathlib import Path; train.set_up_logging()\n"
        "c = t.config(Path(sys.argv[1]), Path(sys.argv[2]), steps=int(sys.argv[3]), save_every=2)\n"
        "background = sys.argv[4] == 'background'\n"
        "mesh = dataclasses.replace(c.mesh, timeout=20)\n"
        "c = dataclasses.replace(c, save_in_background=background, eval_every=1000, mesh=mesh)\n"
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


@pytest.mark.slow
def test_torchrun_restarts_a_run_without_out_in_its_own_folder(corpus, tmp_path):
    script = tmp_path / "dies_once.py"
    script.write_text(
        "import os, sys, dataclasses, pathlib, train; sys.path.insert(0, sys.argv[2])\n"
        "import test_train as t; train.set_up_logging()\n"
        "c = t.config(pathlib.Path(sys.argv[1]), None, steps=6, save_every=2)\n"
        "poll = train.Checkpoints.poll\n"
        "def die_once(self):\n"
        "    poll(self)\n"
        "    late = (self.root / 'step_000004').exists()\n"
        "    if late and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': os._exit(9)\n"
        "train.Checkpoints.poll = die_once\n"
        "train.run(lambda: train.pretrain('tiny', c))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [script, corpus, ROOT / "tests"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else old addresses stay
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "continuing from step 4 of runs/tiny" in done.stdout, done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]
    assert [row["step"] for row in rows(tmp_path / "runs" / "tiny")] == [1, 2, 3, 4, 5, 6]


def ranks_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def wait_for(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None and not condition():
        time.sleep(0.002)


@pytest.mark.slow
def test_a_rank_killed_at_random_moments_never_loses_the_run(corpus, tmp_path):
    whole = config(corpus, tmp_path / "whole", steps=40)
    out, _ = torchrun(whole, 2, "foreground").communicate()
    assert len(rows(whole.out)) == 40, out
    killed, luck = dataclasses.replace(whole, out=tmp_path / "killed"), random.Random(0)
    metrics = killed.out / "metrics.jsonl"

    def steps_done():
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    during_a_save = 0
    for kill in range(3):
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_saves_and_exits_cleanly_and_a_second_process_is_kept_out(
    corpus, tmp_path, number
):
    cfg = config(corpus, tmp_path / "a", steps=10_000, save_every=5_000)
    process = start(cfg)
    wait_for(lambda: (cfg.out / "metrics.jsonl").exists() and len(rows(cfg.out)) > 3, process)
    if number == signal.SIGINT:
        with pytest.raises(ValueError, match=f"process {process.pid} on .* writes into it"):
            hold(cfg.out)
    process.send_signal(number)
    assert process.wait(timeout=60) == 0
    saved = list((cfg.out / "checkpoints").iterdir())
    assert [p.name for p in saved] == [f"step_{len(rows(cfg.out)):06d}"]


def say_what_a_signal_does():
    said = io.StringIO()
    train.set_up_logging(said)
    runner = SimpleNamespace(asked=False)
    with train.asked_to_stop(runner):
        before = runner.asked
        os.kill(os.getpid(), signal.SIGTERM)
        return before, runner.asked, said.getvalue()


def test_a_signal_is_answered_at_once(on_ranks):
    before, after, said = on_ranks(1, say_what_a_signal_does)[0]
    assert (before, after) == (False, True) and said.startswith("asked to stop: after this step")


def pretrain_and_signal_one_rank(cfg, rank, step):
    """Train, where one rank alone is asked to stop during a step. Returns the last step saved."""
    done = []
    original = train.Runner.step

    def with_signal(self, *args):
        done.append(1)
        if len(done) == step and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    train.Runner.step = with_signal
    try:
        pretrain(cfg)
    finally:
        train.Runner.step = original
    return len(done)


AXES = ["tp", *(pytest.param(axis, marks=pytest.mark.slow) for axis in ("pp", "dp_replicate"))]


@pytest.mark.parametrize("axis", AXES)
def test_all_ranks_stop_after_the_same_step_whichever_is_asked_to(on_ranks, corpus, tmp_path, axis):
    for rank in range(2):
        cfg = config(corpus, tmp_path / str(rank), mesh=MeshConfig(dtype="fp32", **{axis: 2}))
        assert on_ranks(2, pretrain_and_signal_one_rank, cfg, rank, 2) == [2, 2]
        assert (cfg.out / "checkpoints" / "step_000002" / "state.json").exists()


def pretrain_elsewhere(cfg, rank, what):
    """Train, where one rank has another folder, or other data, than the others."""
    train.LONGEST_LAG = 2
    if dist.get_rank() == rank and what == "out":
        cfg = dataclasses.replace(cfg, out=cfg.out.with_name("elsewhere"))
    if dist.get_rank() == rank and what == "data":
        own = cfg.out.with_name("data")
        shutil.copytree(cfg.data, own)
        manifest = json.loads((own / "manifest.json").read_text())
        manifest["sources"]["code"]["train"]["crc"] ^= 1
        (own / "manifest.json").write_text(json.dumps(manifest))
        cfg = dataclasses.replace(cfg, data=own)
    try:
        pretrain(cfg)
    except ValueError as error:
        cfg.out.with_name("said").write_text(str(error))
    os._exit(3)  # the other rank waits for this one


@pytest.mark.parametrize(
    "what, words",
    [
        ("out", "elsewhere: rank 1 cannot see it: share --out"),
        ("data", "rank 1 reads other data than rank 0: share one copy"),
    ],
)
def test_what_the_machines_do_not_share_is_noticed_before_the_first_step(
    on_ranks, corpus, tmp_path, what, words
):
    cfg = config(corpus, tmp_path / "run")
    with pytest.raises(AssertionError, match="of 2 died"):
        on_ranks(2, pretrain_elsewhere, cfg, 1, what)
    assert words in (tmp_path / "said").read_text()
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not rows(tmp_path / "run")


@pytest.mark.slow
def test_of_two_first_starts_at_once_the_second_waits_for_the_firsts_data(tmp_path):
    slowly = (
        "import time, train\n"
        "def prepare(cfg):\n"
        "    time.sleep(3)\n"
        "    cfg.out.mkdir(parents=True)  # fails where it is\n"
        "    print('prepared')\n"
        "train.prepare, train.TokenData = prepare, lambda folder: train.nano().model\n"
        "train.init_mesh(train.MeshConfig())\n"
        "train.open_data(train.nano())\n"
    )
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    where = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    starts = [subprocess.Popen([sys.executable, "-c", slowly], **pipes, **where) for _ in "ab"]
    texts = [start.communicate(timeout=120)[0] for start in starts]
    assert [start.returncode for start in starts] == [0, 0], texts
    assert "".join(texts).count("prepared") == 1


@pytest.mark.slow
def test_what_all_ranks_find_wrong_is_said_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3", "train.py"]
    command += ["nano", "--batch", "7", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr.count("batch=7") == 1 and done.returncode


@pytest.mark.slow
def test_the_first_rank_of_each_pipeline_stage_is_profiled(on_ranks, corpus, tmp_path):
    mesh = MeshConfig(dtype="fp32", pp=2)
    cfg = config(corpus, tmp_path / "a", profile=1, steps=4, mesh=mesh)
    on_ranks(4, pretrain, cfg)
    assert sorted(p.name for p in (cfg.out / "trace").iterdir()) == ["rank0.json", "rank2.json"]


def test_a_damaged_line_of_metrics_ends_no_run(corpus, tmp_path, caplog):
    cfg = config(corpus, tmp_path / "a", steps=2, save_every=1)
    train.pretrain("test", cfg)
    file = cfg.out / "metrics.jsonl"
    first, second = file.read_text().splitlines(keepends=True)
    file.write_text("\0\0\n" + first + '{"step": "two"}\n[1]\n' + second)
    train.pretrain("test", dataclasses.replace(cfg, steps=3))
    assert [row["step"] for row in rows(cfg.out)] == [1, 2, 3]
    assert rows(cfg.out)[1] == json.loads(second)
    assert "metrics.jsonl:1" in caplog.text


@pytest.mark.parametrize("name", ["n_attributes", "lora_rank"])
def test_pretraining_has_neither_scores_nor_adapters(name):
    nano = train.nano()
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(nano, model=dataclasses.replace(nano.model, **{name: 5}))


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


@pytest.mark.slow
def test_a_rank_that_stops_answering_ends_the_job_in_a_bounded_time(corpus, tmp_path):
    cfg = config(corpus, tmp_path / "a", steps=1000)
    silent = (
        "import os, time, parallel; step = parallel.Runner.step; count = iter(range(10**6))\n"
        "def hang(self, *args):\n"
        "    if os.environ['RANK'] == '1' and next(count) == 3: time.sleep(600)\n"
        "    return step(self, *args)\n"
        "parallel.Runner.step = hang\n"
    )
    process = torchrun(cfg, 2, "foreground", before=silent)
    out, _ = process.communicate(timeout=150)  # torchrun gives the sleeper 30 s to leave
    assert process.returncode != 0 and "Timed out waiting 20000ms" in out


def test_no_setting_of_a_run_is_nan_and_betas_are_below_one():
    for name, value in vars(train.nano()).items():
        if isinstance(value, float):
            with pytest.raises(ValueError, match=name):
                dataclasses.replace(train.nano(), **{name: math.nan})
    for betas in ((-0.1, 0.9), (0.9, 1.0), (0.9, math.nan)):
        with pytest.raises(ValueError, match="betas"):
            dataclasses.replace(train.nano(), betas=betas)
