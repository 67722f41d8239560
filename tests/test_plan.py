"""recipes/plan.py: what it counts is what a real run does, and the roofline is near the report."""

import re
import sys
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.testing._internal.distributed.fake_pg import FakeStore

from model import SHAPES, ModelConfig
from parallel import AXES, MeshConfig, Runner, build_stage, init_mesh
from recipes.plan import (
    RESERVE,
    PlanConfig,
    activation_bytes,
    fullest,
    loads_of,
    main,
    memory_of,
    orders_of,
    search,
    shares_of,
    step_of,
    validation_of,
    wire_of,
)


@contextmanager
def imagined_mesh(mesh, world, rank):
    """Make the mesh as one rank of a job of any size would see it."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    yield init_device_mesh("cpu", tuple(mesh.shape(world).values()), mesh_dim_names=AXES)
    dist.destroy_process_group()


def plan_says(capsys, *args):
    with patch.object(sys, "argv", ["recipes.plan", *args]):
        main()
    return capsys.readouterr().out


def built(plan, stage):
    """Count a stage's parameters as the training code lays them out: on a GPU, and in all."""
    rank = plan.mesh.rank_of(stage) * (plan.gpus // plan.mesh.pp)
    with imagined_mesh(plan.mesh, plan.gpus, rank) as devices:
        params = list(build_stage(plan.model, stage, devices, plan.mesh, []).model.parameters())
        return sum(p.to_local().numel() for p in params), sum(p.numel() for p in params)


@pytest.mark.parametrize("shape, total", [("nemotron4-340b", 341_029_195_776), ("nano", None)])
def test_the_stages_have_all_parameters(shape, total):
    whole = PlanConfig(shape, gpus=2, batch=2, mesh=MeshConfig(pp=2))
    _, params, _ = shares_of(whole)
    want = total or sum(built(whole, stage)[1] for stage in range(2))
    assert sum(params) == want


@pytest.mark.slow
def test_the_340bs_stages_are_what_is_built_for_6144_gpus():
    plan = PlanConfig()
    layers, params, unit = shares_of(plan)
    for stage in (0, 1, 95):  # with the embedding, neither, with the head
        here, whole = built(plan, stage)
        # an even cut over 8 x 64 GPUs but for the norms, which tensor parallelism copies
        assert abs(here - params[stage] / 64) <= 1000 and params[stage] < whole
        assert layers[stage] == 1 and params[1] <= unit <= params[0]


@pytest.mark.parametrize("pp, vp, schedule", [(2, 1, "1f1b"), (3, 2, "1f1b"), (3, 2, "zbv")])
def test_the_closed_form_of_a_stage_is_what_is_built(pp, vp, schedule):
    mesh = MeshConfig(tp=2, pp=pp, vp=vp, schedule=schedule)
    plan = PlanConfig("nano" if pp == 2 else "small", gpus=2 * pp, batch=24, mesh=mesh)
    layers, params, _ = shares_of(plan)
    for stage in range(mesh.n_stages):
        assert built(plan, stage)[0] == params[stage]
    for rank, load in enumerate(loads_of(plan)):
        assert load.params == sum(params[stage] for stage in mesh.stages_of(rank))


@pytest.mark.slow
def test_the_reports_layout_fits_80_gb_and_tensor_parallelism_alone_does_not(capsys):
    out = plan_says(capsys)
    assert "fits: the fullest GPU needs" in out and "bubble" in out and "validation: " in out
    alone = plan_says(capsys, "--mesh.pp", "1", "--mesh.vp", "1")
    needs = re.search(r"DOES NOT FIT: the fullest GPU needs ([\d.]+) of 80 GB", alone)
    assert float(needs[1]) > 80


def test_predictions_stand_beside_the_reports_rows(capsys):
    rows = [line.split() for line in plan_says(capsys, "--report").splitlines()[1:]]
    assert [row[0] for row in rows] == ["1,536", "3,072", "6,144"]
    for row in rows:  # a roofline that is not fitted: within a fifth
        seconds, reported, mfu, reported_mfu = map(float, row[2:])
        assert abs(seconds / reported - 1) < 0.2 and abs(mfu - reported_mfu) < 8


def test_the_figures_of_the_reports_layout_stay_as_they_are():
    step = step_of(PlanConfig())
    assert step["seconds"] == pytest.approx(8.344497570437587, rel=1e-12)
    assert step["mfu"] == pytest.approx(39.17457856932368, rel=1e-12)
    parts = fullest(PlanConfig())
    assert parts.pop("sum") == sum(parts.values()) == 54_256_003_616 + RESERVE


def test_an_axis_of_size_one_sends_nothing():
    plan = PlanConfig("nemotron4-15b", gpus=1, batch=4, mesh=MeshConfig())
    assert wire_of(plan) == {"tp": 0, "pp": 0, "dp": 0}
    step = step_of(plan)
    assert step["bubble"] == step["tp traffic"] == step["pp traffic"] == 0


def test_search_lists_meshes_that_fit_fastest_first():
    base = PlanConfig(gpus=16, batch=16, shape="nemotron4-15b", mesh=MeshConfig())
    found = search(base)
    seconds = [step_of(plan)["seconds"] for plan in found]
    assert len(found) > 10 and seconds == sorted(seconds)
    for plan in found[:5]:
        assert fullest(plan)["sum"] <= 80e9
        plan.mesh.check(SHAPES["nemotron4-15b"], 16, 16, plan.micro_batch)
    assert not search(PlanConfig(gpus=2, batch=8, mesh=MeshConfig()))  # the 340B on 2 GPUs


def test_activations_shrink_with_recompute_and_tensor_parallelism():
    cfg = SHAPES["nemotron4-15b"]
    kept = {how: activation_bytes(cfg, 8, 1, how) for how in ("none", "selective", "full")}
    assert kept["none"] > 2 * kept["selective"] > 4 * kept["full"] > 0
    assert kept["full"] == pytest.approx(2 * 4096 * cfg.dim // 8, rel=0.2)  # input, rotary angles
    assert activation_bytes(cfg, 1, 1, "selective") > 4 * kept["selective"]
    assert activation_bytes(cfg, 8, 2, "none") == pytest.approx(2 * kept["none"], rel=0.02)


@pytest.mark.parametrize(
    "args, names",
    [
        (["nemotron-340b"], ["nemotron-340b", "nemotron4-340b"]),
        (["--gpu", "H10"], ["H10", "H100", "H200"]),
    ],
)
def test_an_unknown_shape_or_gpu_is_answered_with_those_there_are(capsys, args, names):
    with pytest.raises(SystemExit):
        plan_says(capsys, *args)
    said = capsys.readouterr()
    assert all(name in said.out + said.err for name in names)


@pytest.mark.parametrize("option", ["gpus", "batch", "micro_batch", "search"])
def test_a_negative_option_is_refused(option):
    with pytest.raises(ValueError, match=f"{option}=-1: must be in"):
        PlanConfig(**{option: -1})


def test_the_report_is_of_one_shape():
    with pytest.raises(ValueError, match="--report is of the report's own layout"):
        PlanConfig("nano", report=True)


IGNORED = [
    {"gpu": "A100"},
    {"gpus": 64},
    {"batch": 768},
    {"micro_batch": 2},
    {"search": 3},
    {"mesh": MeshConfig(tp=8, pp=12, vp=8)},
]


@pytest.mark.parametrize("changes", IGNORED, ids=str)
def test_the_reports_rows_stand_beside_no_other_layout(changes):
    with pytest.raises(ValueError, match="--report is of .*: leave other options out"):
        PlanConfig(report=True, **changes)


@pytest.mark.parametrize("name, value", [("tp", 4), ("vp", 1), ("recompute", "none")])
def test_a_search_takes_no_mesh_that_it_would_overwrite(name, value):
    mesh = MeshConfig(**{"tp": 8, "pp": 12, "vp": 8, "recompute": "selective", name: value})
    with pytest.raises(ValueError, match="leave --mesh out"):
        PlanConfig(search=3, mesh=mesh)


def test_a_layout_that_cannot_run_is_refused_in_a_line(capsys):
    with pytest.raises(SystemExit, match="96 does not divide the 100 processes"):
        plan_says(capsys, "--gpus", "100")


# ---- the schedule as built -----------------------------------------------------------------------

TINY = ModelConfig(32, 8, 4, 4, 8, 64, vocab_size=96, seq_len=16, init_std=0.1)


def what_a_run_does(mesh, n, n_validation):
    """Count parameters gathered in a step and in a round of validation, the buffers held, and the
    parameters whose gradients are reduced."""
    gathered, reduced = [0], [0]

    def counting(count, real):
        def call(params, *args, **kwargs):
            count[0] += sum(p._orig_size.numel() for p in params)
            return real(params, *args, **kwargs)

        return call

    def batches(n):
        tokens = torch.zeros(1, 16, dtype=torch.long)
        return [{"tokens": tokens, "targets": tokens, "count": 16} for _ in range(n)]

    def loss(out, batch):
        return -out.sum()

    runner = Runner(TINY, mesh, init_mesh(mesh), 1, seed=0)
    gather = counting(gathered, _fsdp_param_group.foreach_all_gather)
    reduce = counting(reduced, _fsdp_param_group.foreach_reduce)
    with patch.multiple(_fsdp_param_group, foreach_all_gather=gather, foreach_reduce=reduce):
        runner.step(batches(n), loss)
        step = gathered[0]
        runner.eval(batches(n_validation), loss)
    held = 0
    for stage in sum(runner.pipelines.values(), []):
        for infos in (*stage.args_recv_info.values(), *stage.grad_recv_info.values()):
            held += sum(info.buffer is not None for info in infos)
    return step, gathered[0] - step, held, reduced[0]


@pytest.mark.parametrize(
    "mesh",
    [
        dict(),
        dict(reshard="always"),
        pytest.param(dict(reshard="never"), marks=pytest.mark.slow),
        pytest.param(dict(pp=2), marks=pytest.mark.slow),
        pytest.param(dict(pp=2, reshard="always"), marks=pytest.mark.slow),
        dict(pp=2, vp=4),
        pytest.param(dict(pp=2, vp=4, reshard="always"), marks=pytest.mark.slow),
        pytest.param(dict(pp=2, vp=2, schedule="zbv"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gathers_and_buffers_are_those_of_a_real_run(on_ranks, mesh):
    mesh = MeshConfig(dtype="fp32", **mesh)
    n = 8 if mesh.pp > 1 else 3
    with patch.dict(SHAPES, tiny=TINY):
        plan = PlanConfig("tiny", gpus=4, batch=n * mesh.dp(4), mesh=mesh)
        runs = on_ranks(4, what_a_run_does, mesh, n, plan.round)
        a_round = replace(plan, batch=plan.round * mesh.dp(4), train=False)
        for rank in range(mesh.pp):
            step, validation, held, reduced = runs[rank * (4 // mesh.pp)]
            assert loads_of(plan)[rank].gathered == step
            assert loads_of(plan)[rank].reduced == reduced
            assert loads_of(a_round)[rank].gathered == validation
            hidden = 4 * TINY.seq_len * TINY.dim
            assert memory_of(plan, rank)["pipeline's receive buffers"] == held * hidden


def test_gradients_that_each_micro_batch_reduces_take_less_room_and_more_traffic():
    auto = PlanConfig("nemotron4-15b", gpus=64, batch=384, mesh=MeshConfig(tp=8))
    always = replace(auto, mesh=replace(auto.mesh, reshard="always"))
    assert auto.n_micro == 48
    for plan, share in ((auto, 1), (always, 2 * shares_of(auto)[2] / loads_of(auto)[0].params)):
        whole = 4 * loads_of(plan)[0].params  # bytes, in fp32
        assert memory_of(plan, 0)["gradients, adding up"] == pytest.approx(share * whole)
    sent = wire_of(always)["dp"] - wire_of(auto)["dp"]
    assert sent == pytest.approx(47 * 4 * loads_of(auto)[0].params * 7 / 8)  # a ring of 8


@pytest.mark.parametrize("schedule, vp", [("1f1b", 8), ("zero_bubble", 8), ("zbv", 2), ("1f1b", 1)])
def test_weights_that_a_pipeline_keeps_are_gathered_once_a_step(schedule, vp):
    recompute = "selective" if schedule == "1f1b" else "full"
    mesh = MeshConfig(tp=8, pp=12, vp=vp, schedule=schedule, recompute=recompute)
    plan = PlanConfig(mesh=mesh)
    for load in loads_of(plan):
        assert load.gathered == load.whole == load.params
    freed = replace(plan, mesh=replace(mesh, reshard="always"))
    for load in loads_of(freed):  # a micro-batch's forward, and many a backward, gathers again
        assert load.gathered > plan.n_micro * load.params
        assert load.whole < load.params or vp < 3
    assert wire_of(freed)["dp"] > 5 * wire_of(plan)["dp"]
    assert step_of(freed)["seconds"] > step_of(plan)["seconds"]


def peak(actions):
    """Count the most (stage, micro-batch) pairs between their forward and their backward."""
    waiting = set()
    most = 0
    for stage, kind, i in actions:
        if kind == "FORWARD":
            waiting.add((stage, i))
        elif kind in ("FULL_BACKWARD", "BACKWARD_WEIGHT"):
            waiting.remove((stage, i))
        most = max(most, len(waiting))
    return most


@pytest.mark.parametrize("pp, vp, schedule", [(4, 1, "1f1b"), (4, 3, "1f1b"), (3, 2, "zbv")])
@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_activations_in_flight_are_those_of_the_whole_schedule(pp, vp, schedule, rounds):
    n = rounds * pp
    mesh = MeshConfig(pp=pp, vp=vp, schedule=schedule)
    shape = replace(SHAPES["nano"], n_layers=mesh.n_stages)  # a layer a stage
    with patch.dict(SHAPES, tiny=shape):
        loads = loads_of(PlanConfig("tiny", gpus=pp, batch=n, mesh=mesh))
    for rank, load in enumerate(loads):
        if vp == 1:  # each rank runs ahead of the last by its distance
            assert load.waiting == min(n, pp - rank)
            continue
        assert load.waiting == peak(orders_of(mesh, n, True)[rank])
        if schedule == "1f1b":  # a round of every stage but the last, and both ways of the distance
            assert load.waiting == min(n * vp, (vp - 1) * pp + 2 * (pp - rank - 1) + 1)
        else:
            assert load.waiting <= min(2 * n, 2 * pp)


def test_a_rank_with_more_layers_in_a_stage_holds_them():
    shape = replace(SHAPES["nano"], n_layers=5, vocab_size=64)
    with patch.dict(SHAPES, tiny=shape):
        plan = PlanConfig("tiny", gpus=2, batch=4, mesh=MeshConfig(pp=2))
        layers, _, _ = shares_of(plan)
        assert sorted(layers) == [2, 3]
        assert [load.waiting for load in loads_of(plan)] == [2 * layers[0], layers[1]]


def test_buffers_and_validation_of_the_reports_layout():
    plan = PlanConfig()
    hidden = 2 * 4096 * 18432 // 8
    parts = memory_of(plan, 6)  # eight stages, neither the first nor the last
    assert parts["pipeline's receive buffers"] == hidden * 8 * (36 + 36 + 12)
    assert memory_of(plan, 0)["pipeline's receive buffers"] == hidden * (8 * 36 + 7 * (36 + 12))
    assert memory_of(plan, 0)["CUDA context and NCCL"] == RESERVE
    # eight batches forward: a third of their steps' work, and a bubble of an eighth a round
    assert 8 / 5 * step_of(plan)["seconds"] < validation_of(plan) < 8 / 2 * step_of(plan)["seconds"]
    alone = replace(plan, mesh=replace(plan.mesh, vp=1))
    assert validation_of(alone) > 0 and alone.round == 96
