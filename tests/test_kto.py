"""recipes/kto.py: the loss against its closed form and TRL's, strangers, and the same numbers on
every mesh and however rows are packed."""

import dataclasses
import json
import random
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from test_stages import TINY, said, same, write

import data
from align import align
from model import Nemotron, init_weights
from parallel import MeshConfig, save_hf
from recipes import kto
from recipes.kto import KtoConfig, kto_loss, with_strangers


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_the_loss_is_its_closed_form_in_value_and_gradient():
    L, chosen = (5 * drawn(60)).requires_grad_(), drawn(60, seed=1) > 0
    kl = torch.tensor(0.7).double()
    loss = kto_loss(L, chosen, kl, 0.3)
    p = 1 / (1 + torch.exp(-0.3 * (L.detach() - 0.7)))
    assert torch.allclose(loss, torch.where(chosen, 1 - p, p))
    (grad,) = torch.autograd.grad(loss.sum(), L)
    assert torch.allclose(grad, torch.where(chosen, -0.3, 0.3) * p * (1 - p))
    at_reference = kto_loss(torch.zeros(2), torch.tensor([True, False]), torch.zeros(()), 0.3)
    assert at_reference.tolist() == [0.5, 0.5]


@pytest.mark.slow
def test_trl_computes_the_same_loss():
    trainer = pytest.importorskip("trl").KTOTrainer
    policy, reference = drawn(5, 2), drawn(5, 2, seed=1)
    chosen = torch.tensor([1, 0, 0, 1, 1]).bool()
    fake = mock.MagicMock(
        beta=0.2, loss_type="kto", calculate_KL=True, precompute_ref_logps=True,
        desirable_weight=1.0, undesirable_weight=1.0, aux_loss_enabled=False,
    )  # fmt: skip
    fake.accelerator.gather_for_metrics = lambda x: x
    fake.accelerator.device = torch.device("cpu")
    fake._compute_kl_logps.return_value = policy[:, 1]
    out = mock.MagicMock(log_probs=policy[:, :1], entropy=torch.zeros(5, 1))
    inputs = dict(
        input_ids=torch.zeros(5, 2, dtype=torch.long), attention_mask=torch.ones(5, 2),
        completion_mask=torch.ones(5, 2), label=chosen, ref_logps=reference[:, 0],
        ref_KL_logps=reference[:, 1],
    )  # fmt: skip
    want = trainer._compute_loss(fake, mock.MagicMock(return_value=out), inputs, False)
    L, strangers = (policy - reference).T
    got = kto_loss(L, chosen, strangers.mean().clamp(min=0), 0.2).mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


def example(prompt, answer):
    ids = np.array([*prompt, *answer], np.int32)
    trained = np.arange(len(ids)) >= len(prompt)
    return data.Example((ids,), (trained,), np.float32([1]), "")


def test_a_stranger_is_the_prompt_with_the_next_rows_answer_cut_where_the_window_ends():
    rows = [example([1, 2], [3, 4]), example([5], [6, 7, 8]), example([9] * 7, [10])]
    got = with_strangers(rows, 9)
    assert [row.ids[1].tolist() for row in got] == [[1, 2, 6, 7, 8], [5, 10]]
    assert [row.trained[1].tolist() for row in got] == [[False] * 2 + [True] * 3, [False, True]]
    assert [row.ids[0].tolist() for row in got] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    (cut, *_) = with_strangers(rows, 8)
    assert cut.ids[1].tolist() == [1, 2, 6, 7] and cut.length == 8
    with pytest.raises(ValueError, match="raise --seq-len 4"):
        with_strangers(rows, 4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face folder with a tokenizer, and rows."""
    root, rng = tmp_path_factory.mktemp("kto"), random.Random(0)
    model = Nemotron(dataclasses.replace(TINY, vocab_size=280))
    init_weights(model, 3)
    save_hf(model, root)
    data.train_bpe(["alpha beta gamma delta one two three four five six"] * 50, 280).save(root)
    rows = [
        {
            "prompt": said(rng, 4), "response": said(rng, 6),
            "preference": rng.choice(["chosen", "rejected"]),
        }
        for _ in range(24)
    ]  # fmt: skip
    write(root / "rows.jsonl", rows)
    return root


def run_kto(base, out, axes, changes):
    options = dict(
        init=f"hf:{base}", data=Path(base) / "rows.jsonl", val=Path(base) / "rows.jsonl",
        seq_len=256, batch=8, lr=1e-3, eps=1e-6, out=Path(out), eval_every=2,
        mesh=MeshConfig(dtype="fp32", **axes),
    )  # fmt: skip
    cfg = KtoConfig(**options | changes)
    align("kto", cfg, read=kto.kto_rows, make=kto.row_set)
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    return run_kto(base, tmp_path_factory.mktemp("alone") / "run", {}, {"packed": False})


MESHES = {
    "packed": (1, {}, {}),
    "micro 4": (1, {}, {"micro_batch": 4}),
    "dp2": (2, {}, {"micro_batch": 2}),
    "tp2": (2, {"tp": 2}, {}),
    "pp2 vp2": (2, {"pp": 2, "vp": 2}, {}),
    "dp2 tp2 pp2": (8, {"tp": 2, "pp": 2}, {"packed": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_the_stage_is_the_same_on_every_mesh_and_however_it_is_packed(
    base, alone, on_ranks, tmp_path, mesh
):
    n, axes, changes = MESHES[mesh]
    args = (str(base), str(tmp_path / "run"), axes, changes)
    same(run_kto(*args) if n == 1 else on_ranks(n, run_kto, *args)[0], alone)


def test_each_step_weighs_its_answers_against_the_divergence_of_that_very_step(alone):
    assert alone[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert alone[0]["preference_loss"] == pytest.approx(0.5, abs=1e-4)
    assert alone[2]["kl"] > 1e-3 and alone[2]["val_loss"] < 0.5


@pytest.mark.slow
def test_a_stage_that_was_stopped_goes_on_as_if_it_had_not_been(base, alone, tmp_path):
    for steps in (2, 3):
        got = run_kto(base, tmp_path / "run", {}, {"packed": False, "steps": steps})
    for row, want in zip(got, alone, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], abs=1e-6)
        assert row["kl"] == pytest.approx(want["kl"], abs=1e-6)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"preference": "good"}, "rows.jsonl:2: preference is 'good': must be chosen or rejected"),
        ({"preference": None}, "rows.jsonl:2: no value in field 'preference'"),
        ({"response": ""}, "rows.jsonl:2: .*empty response"), ({"response": None}, "'response'"),
    ],
)  # fmt: skip
def test_a_row_without_its_answer_or_verdict_is_refused(base, tmp_path, change, words):
    row = {"prompt": "one", "response": "two", "preference": "chosen"}
    file = write(tmp_path / "rows.jsonl", [row, row | change])
    with pytest.raises(ValueError, match=words):
        run_kto(base, tmp_path / "run", {}, {"data": file})


def test_a_coefficient_that_is_none_is_refused():
    with pytest.raises(ValueError, match="beta=0"):
        KtoConfig(beta=0.0)
