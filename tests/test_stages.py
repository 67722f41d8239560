"""The stages of align.py: the same numbers on every mesh, with every micro-batch, packed or not;
the reference is data; what is wrong is refused before a step."""

import dataclasses
import json
import random
from pathlib import Path

import pytest

import align
import data
from model import SHAPES, Nemotron, init_weights
from parallel import MeshConfig, save_hf

TINY = dataclasses.replace(
    SHAPES["nano"], dim=32, n_layers=4, head_dim=8, ffn_dim=64, vocab_size=512, seq_len=256,
    init_std=0.1,
)  # fmt: skip
WORDS = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "four", "five", "six"]


def said(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, n)))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory, corpus):
    """A Hugging Face folder with a tokenizer, and rows for every stage."""
    root, rng = tmp_path_factory.mktemp("base"), random.Random(0)
    model = Nemotron(TINY)
    init_weights(model, 3)
    save_hf(model, root)
    data.TokenData(corpus).tokenizer().save(root)
    user = lambda: {"role": "user", "content": said(rng, 6)}  # noqa: E731
    answer = lambda: {"role": "assistant", "content": said(rng, 8)}  # noqa: E731
    write(root / "sft.jsonl", [{"messages": [user(), answer()]} for _ in range(24)])
    label = lambda: [rng.choice([0, 1, 2, 3, 4, -100]) for _ in range(4)] + [1]  # noqa: E731
    rows = [{"messages": [user(), answer()], "label": label()} for _ in range(24)]
    write(root / "reward.jsonl", rows)
    rows = [
        {
            "messages": [user()], "chosen": said(rng, 6) + " x", "rejected": said(rng, 6),
            "chosen_reward": rng.uniform(1, 4), "rejected_reward": rng.uniform(0, 3),
        }
        for _ in range(24)
    ]  # fmt: skip
    write(root / "pairs.jsonl", rows)
    return root


STAGES = {
    "sft": (align.SftConfig, "sft.jsonl", {}),
    "reward": (align.RewardConfig, "reward.jsonl", {}),
    "bradley_terry": (align.RewardConfig, "pairs.jsonl", {"loss": "scaled", "seq_len": 384}),
    "dpo": (align.PreferenceConfig, "pairs.jsonl", {"beta": 0.1, "sft_weight": 0.01}),
    "lora": (align.SftConfig, "sft.jsonl", {"lora_rank": 4, "lora_targets": "wq wo up down"}),
    "rpo": (align.PreferenceConfig, "pairs.jsonl", {"loss": "rpo_bwd", "beta": 0.1, "eta": 2.0}),
}


def stage(base, name, out, axes=None, **changes):
    kind, file, options = STAGES[name]
    options = dict(
        init=f"hf:{base}", data=base / file, val=base / file, seq_len=256, batch=8, lr=1e-3,
        eps=1e-6, warmup=8, out=Path(out), mesh=MeshConfig(dtype="fp32", **(axes or {})),
        eval_every=2,
    ) | options  # fmt: skip
    if "pp" in (axes or {}):
        changes.pop("micro", None)
    return kind(**{**options, **changes})


def run_stage(base, name, out, axes, changes):
    cfg = stage(Path(base), name, out, axes, **changes)
    align.align(name, cfg)
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


NOT_NUMBERS = {
    "tokens_per_s",
    "tokens_per_s_per_gpu",
    "step_s",
    "mfu",
    "memory_gib",
    "tokens",
    "seconds",
    "time",
}


def same(a, b, tolerance=1e-5):
    assert len(a) == len(b) == 3
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        # policy = reference: the sign of a margin that is rounding alone
        noise = {"accuracy", "length_margin_correlation"} if x["step"] == 1 else set()
        noise |= {"calibration_correlation", "calibration_slope"} if x["step"] == 1 else set()
        for key in x.keys() - NOT_NUMBERS - noise:
            if x[key] is None:
                assert y[key] is None, key
            else:
                assert x[key] == pytest.approx(y[key], rel=tolerance, abs=tolerance), key


@pytest.fixture(scope="session")
def alone(base, on_ranks, tmp_path_factory):
    """Each stage on one process, a window at a time, unpacked."""
    out = tmp_path_factory.mktemp("alone")
    return {
        name: on_ranks(1, run_stage, str(base), name, str(out / name), {}, {"packed": False})[0]
        for name in STAGES
    }


MESHES = {
    "packed": (1, {}, {}),
    "packed, micro 2": (1, {}, {"micro_batch": 2}),
    "micro 4": (1, {}, {"micro_batch": 4, "packed": False}),
    "dp2": (2, {}, {"micro_batch": 2}),
    "tp2": (2, {"tp": 2}, {}),
    "pp2 vp2": (2, {"pp": 2, "vp": 2}, {}),
    "dp2 tp2 pp2": (8, {"tp": 2, "pp": 2}, {"packed": False}),
}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_stage_is_the_same_on_every_mesh_and_however_it_is_packed(
    base, alone, on_ranks, tmp_path, name, mesh
):
    n, axes, changes = MESHES[mesh]
    got = on_ranks(n, run_stage, str(base), name, str(tmp_path / "run"), axes, changes)[0]
    same(got, alone[name])
