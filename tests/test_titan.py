"""torchtitan's own Trainer on our model, plan and data: the losses of train.py, step for step."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from model import SHAPES
from parallel import MeshConfig

ROOT = Path(train.__file__).parent
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)
needs_trainer = pytest.mark.skipif(OLD, reason="torchtitan's Trainer needs torch 2.14")
TINY = dataclasses.replace(
    SHAPES["nano"], dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=64,
    vocab_size=512, seq_len=32,
)  # fmt: skip


def plan_of(corpus, out, **more):
    """Twenty steps with warm-up, cosine, two sources, several micro-batches."""
    how = dict(steps=20, batch=8, micro_batch=2, warmup=24, eval_every=99, eval_batches=1, clip=0.5)
    return dataclasses.replace(
        train.PRESETS["nano"](), model=TINY, data=corpus, out=out, mesh=MeshConfig(dtype="fp32"),
        blend={"english": 3, "code": 1}, seed=3, **how | more,
    )  # fmt: skip


def ours(plan):
    train.pretrain("tiny", plan)


def theirs(plan, until=99, change=lambda config: None):
    """Train with torchtitan's Trainer; return (loss, norm) of each step that it logs."""
    from recipes.titan import config_of

    ranks = {"RANK": torch.distributed.get_rank(), "WORLD_SIZE": torch.distributed.get_world_size()}
    os.environ |= {"LOCAL_RANK": "0"} | {name: str(value) for name, value in ranks.items()}
    config = config_of("tiny", plan)
    config.dump_folder = str(plan.out)
    config.metrics.log_freq = 1
    config.checkpoint.enable = until < 99 or (plan.out / "checkpoint").exists()
    config.checkpoint.interval = 5
    change(config)
    trainer = config.build()
    seen = []
    trainer.metrics_processor.log = lambda step, loss, most, norm, **_: seen.append((loss, norm))
    trainer.should_continue_training = lambda: trainer.step < min(until, config.training.steps)
    trainer.train()
    trainer.close()
    return seen


def steps_of(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["loss"], row["grad_norm"]) for row in rows]


@needs_trainer
@pytest.mark.parametrize("ranks, isolate", [(1, True), (2, False)])
def test_twenty_steps_have_the_losses_and_norms_of_train(
    on_ranks, corpus, tmp_path, ranks, isolate
):
    plan = plan_of(corpus, tmp_path / "ours", isolate=isolate)
    on_ranks(1, ours, plan)
    want = steps_of(plan.out)
    for seen in on_ranks(ranks, theirs, dataclasses.replace(plan, out=tmp_path / "theirs")):
        for pair, due in zip(seen, want, strict=True):
            assert pair == pytest.approx(due, rel=2e-6)


@needs_trainer
@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_the_same_losses_on_another_number_of_ranks(
    on_ranks, corpus, tmp_path
):
    plan = plan_of(corpus, tmp_path / "whole", steps=10)
    (whole,) = on_ranks(1, theirs, plan)
    cut = dataclasses.replace(plan, out=tmp_path / "cut")
    first, _ = on_ranks(2, theirs, cut, 5)
    (rest,) = on_ranks(1, theirs, cut)
    assert len(first) == len(rest) == 5
    for pair, due in zip(first + rest, whole, strict=True):
        assert pair == pytest.approx(due, rel=2e-6)


def with_tensor_parallelism(config):
    config.parallelism.tensor_parallel_degree = 2


def with_rates_of_its_own(config):
    config.lr_scheduler.warmup_steps = 7


@needs_trainer
def test_what_it_cannot_do_is_refused_with_the_place_that_can(on_ranks, corpus, tmp_path):
    from recipes import titan

    for name in ("nano_two_phase", "nemotron4_340b"):
        with pytest.raises(ValueError, match="its batch grows from .* train.py can do that"):
            getattr(titan, name)()
    with pytest.raises(AttributeError):
        titan.no_such_preset  # noqa: B018
    plan = plan_of(corpus, tmp_path / "out", steps=1)
    with pytest.raises(AssertionError, match="ValueError: tensor_parallel_degree=2: train.py has"):
        on_ranks(2, theirs, plan, 99, with_tensor_parallelism)
    with pytest.raises(AssertionError, match="ValueError: --lr-scheduler: the rates are the plan"):
        on_ranks(1, theirs, plan, 99, with_rates_of_its_own)


@pytest.mark.skipif(not OLD, reason="this torch has what the Trainer needs")
def test_an_older_torch_is_refused_in_a_line():
    command = [sys.executable, "-m", "recipes.titan", "--config", "nano"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "recipes.titan: torchtitan's Trainer needs torch 2.14 or newer" in done.stderr
