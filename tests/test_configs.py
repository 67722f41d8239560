"""Every number of every config: what no run can have is refused by the name of its field, and what
is not refused starts."""

import dataclasses
import math
from pathlib import Path

import pytest
from test_stages import STAGES, base, stage  # noqa: F401  base is a fixture
from test_train import config, pretrain

import align
import data
import generate
from recipes import evaluate, plan, serve, synthesize

WRONG = (math.nan, -1, 0, 2**62)
PARTS = ("", "model", "mesh")


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def variants(cfg):
    """(name, value, function that makes the config) of each number of a config, its model and its
    mesh, in turn NaN, negative, zero and huge."""
    named = {f.name for f in dataclasses.fields(cfg)}
    for part in PARTS:
        owner = getattr(cfg, part) if part in named else cfg
        if part and (owner is cfg or not dataclasses.is_dataclass(owner)):
            continue
        for f in dataclasses.fields(owner):
            default = getattr(owner, f.name)
            # the command line makes no NaN of an integer
            wrong = WRONG if isinstance(default, float) else WRONG[1:]
            for value in wrong if is_number(default) else ():

                def make(part=part, owner=owner, name=f.name, value=value):
                    changed = dataclasses.replace(owner, **{name: value})
                    return dataclasses.replace(cfg, **{part: changed}) if part else changed

                yield f.name, value, make


def accepted(cfg):
    """(name, value, config) of the variants that are no error; any other must name its field."""
    found = []
    for name, value, make in variants(cfg):
        try:
            found.append((name, value, make()))
        except ValueError as e:
            assert name in str(e), (name, value, e)
    assert not [name for name, value, _ in found if value != value], "NaN is accepted"
    return found


def start_each(folder, variants):
    """Start a run of each config; return how those ended that are neither refused by name nor ran.
    A loss that is not finite ends a run that has started."""
    wrong = []
    for i, (name, value, cfg) in enumerate(variants):
        try:
            pretrain(dataclasses.replace(cfg, out=Path(folder) / str(i)))
        except FloatingPointError:
            pass
        except ValueError as e:
            if name not in str(e) and name.replace("_", "-") not in str(e):
                wrong.append((name, value, repr(e)))
    return wrong


@pytest.mark.slow
def test_every_number_of_a_pretraining_run_is_refused_by_name_or_starts(on_ranks, corpus, tmp_path):
    cfg = config(corpus, None, steps=1, eval_every=1, save_every=1)
    assert on_ranks(1, start_each, str(tmp_path), accepted(cfg))[0] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_every_number_of_a_stage_is_refused_by_name_or_starts(base, tmp_path, name):  # noqa: F811
    for i, (field, value, cfg) in enumerate(accepted(stage(base, name, "unused", val=None))):
        few = min(cfg.steps or 1, 1)
        try:
            align.align(name, dataclasses.replace(cfg, out=tmp_path / str(i), steps=few))
        except FloatingPointError:  # it has started
            pass
        except ValueError as e:
            assert field in str(e) or field.replace("_", "-") in str(e), (field, value, e)


@pytest.mark.parametrize(
    "cfg",
    [
        generate.SamplingParams(), generate.EngineConfig(Path("x")), data.PrepareConfig(),
        plan.PlanConfig(), serve.ServeConfig(Path("x")), synthesize.SynthesizeConfig(),
        evaluate.EvaluateConfig(Path("x")),
    ],
    ids=lambda cfg: type(cfg).__name__,
)  # fmt: skip
def test_no_config_takes_nan_and_errors_name_the_field(cfg):
    accepted(cfg)
