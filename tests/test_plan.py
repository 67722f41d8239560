"""recipes/plan.py: the layout is what the training code builds, the roofline near the report."""

import re
import sys
from unittest.mock import patch

import pytest

from model import SHAPES
from parallel import MeshConfig, build_stage
from recipes.plan import (
    PlanConfig,
    activation_bytes,
    built_params,
    imagined_mesh,
    main,
    memory_of,
    search,
    shares_of,
    step_of,
    wire_of,
)


def plan_says(capsys, *args):
    with patch.object(sys, "argv", ["recipes.plan", *args]):
        main()
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_340b_is_built_for_6144_gpus_and_every_parameter_is_on_some_pipeline_rank():
    plan = PlanConfig()
    built = [built_params(plan, rank) for rank in range(12)]
    assert sum(whole for _, whole in built) == 341_029_195_776
    for share, (here, whole) in zip(shares_of(plan), built, strict=True):
        # the closed form of the memory table is what the code builds: an even cut over 8 x 64 GPUs
        # but for the norms, which tensor parallelism copies
        assert abs(here - share.params / 64) <= 1000 and share.unit < share.params < whole


@pytest.mark.slow
def test_the_reports_layout_fits_80_gb_and_tensor_parallelism_alone_does_not(capsys):
    out = plan_says(capsys)
    assert "341,029,195,776" in out and "fits: the fullest GPU needs" in out and "bubble" in out
    alone = plan_says(capsys, "--mesh.pp", "1", "--mesh.vp", "1")
    needs = re.search(r"DOES NOT FIT: the fullest GPU needs ([\d.]+) GB of 80 GB", alone)
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
    fullest = max(sum(memory_of(PlanConfig(), rank).values()) for rank in range(12))
    assert fullest == 42_478_397_984


def test_an_axis_of_size_one_sends_nothing():
    plan = PlanConfig("nemotron4-15b", gpus=1, batch=4, mesh=MeshConfig())
    assert wire_of(plan) == {"tp": 0, "pp": 0, "dp": 0}
    step = step_of(plan)
    assert step["bubble"] == step["tp traffic"] == step["pp traffic"] == 0


def test_search_lists_meshes_that_fit_fastest_first():
    found = search(PlanConfig(gpus=64, batch=64, shape="nemotron4-15b", mesh=MeshConfig()))
    assert len(found) > 10 and [entry[0] for entry in found] == sorted(entry[0] for entry in found)
    for _, peak, plan in found[:5]:
        assert peak <= 80e9
        plan.mesh.check(SHAPES["nemotron4-15b"], 64, 64, plan.micro_batch)
    assert not search(PlanConfig(gpus=8, batch=64, mesh=MeshConfig()))  # the 340B on 8 GPUs


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
    with pytest.raises(ValueError, match=f"{option}=-1: must be at least"):
        PlanConfig(**{option: -1})


def test_the_report_is_of_one_shape():
    with pytest.raises(ValueError, match="--report is of the report's own layout: leave shape out"):
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
    (name,) = changes
    with pytest.raises(ValueError, match=f"--report is of .*: leave {name} out"):
        PlanConfig(report=True, **changes)


@pytest.mark.parametrize("name, value", [("tp", 4), ("vp", 1), ("recompute", "none")])
def test_a_search_takes_no_mesh_that_it_would_overwrite(name, value):
    mesh = MeshConfig(**{"tp": 8, "pp": 12, "vp": 8, "recompute": "selective", name: value})
    with pytest.raises(ValueError, match=f"leave --mesh.{name} out"):
        PlanConfig(search=3, mesh=mesh)


@pytest.mark.parametrize("pp, vp, schedule", [(2, 1, "1f1b"), (3, 2, "1f1b"), (3, 2, "zbv")])
def test_stages_of_a_kind_are_equal_so_one_of_each_is_built(pp, vp, schedule):
    mesh = MeshConfig(tp=2, pp=pp, vp=vp, schedule=schedule)
    plan = PlanConfig("nano" if pp == 2 else "small", gpus=2 * pp, batch=24, mesh=mesh)
    for rank in range(pp):
        devices = imagined_mesh(mesh, plan.gpus, rank * 2)
        with devices as here:
            stages = [build_stage(plan.model, s, here, mesh, []) for s in mesh.stages_of(rank)]
            params = [p for stage in stages for p in stage.model.parameters()]
            want = sum(p.to_local().numel() for p in params), sum(p.numel() for p in params)
        assert built_params(plan, rank) == want


def test_a_layout_that_cannot_run_is_refused_in_a_line(capsys):
    with pytest.raises(SystemExit, match="96 does not divide the 100 processes"):
        plan_says(capsys, "--gpus", "100")
