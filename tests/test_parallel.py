"""parallel.py: the same numbers on every mesh, and checkpoints that are whole or not there."""

import dataclasses
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.distributed.pipelining import schedules as torchs
from torch.utils._python_dispatch import TorchDispatchMode

import parallel
from model import IGNORE, SHAPES, ModelConfig, Nemotron, count_params, hf_config, init_weights
from parallel import (
    Checkpoints,
    ExportConfig,
    MeshConfig,
    Runner,
    TokenLogProbs,
    build_stage,
    export,
    fill,
    init_mesh,
    load_hf,
    make_schedule,
    open_weights,
    read_config,
    save_hf,
    split_layers,
    step_folders,
)
from train import RunConfig, lm_loss, make_optimizer, nano, peak_flops, training_state

TINY = ModelConfig(64, 4, 8, 4, 8, 128, vocab_size=96, seq_len=16, init_std=0.1)


def config(**changes):
    axes = {k: changes.pop(k) for k in list(changes) if k in MeshConfig.__dataclass_fields__}
    mesh = MeshConfig(**{"dtype": "fp32", **axes})
    model = dataclasses.replace(TINY, n_layers=changes.pop("n_layers", 4))
    # eps: with 1e-8 AdamW makes full steps of the rounding noise in gradients that are all but zero
    base = dict(
        model=model, mesh=mesh, batch=8, micro_batch=2, lr=3e-3, min_lr=0.0, warmup=0, eps=1e-6
    )
    return dataclasses.replace(nano(), **(base | changes))


def global_batch(step, batch=8, ragged=True):
    """The step's sequences, the same wherever they are computed; rows with fewer targets than
    others."""
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, TINY.vocab_size, (batch, TINY.seq_len + 1), generator=g)
    x, y = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    if ragged:
        for i in range(batch):
            y[i, TINY.seq_len - 2 * i :] = IGNORE
    return x, y


def my_batches(cfg, runner, step):
    x, y = global_batch(step, cfg.batch)
    share = cfg.batch // runner.dp
    out = []
    for i in range(runner.dp_rank * share, (runner.dp_rank + 1) * share, cfg.micro_batch):
        rows = slice(i, i + cfg.micro_batch)
        out.append({"tokens": x[rows], "targets": y[rows], "count": int((y[rows] != IGNORE).sum())})
    return out


def train_three_steps(cfg):
    """[(loss, gradient norm)] of three optimizer steps, and the validation loss after them."""
    mesh = init_mesh(cfg.mesh)
    runner = Runner(cfg.model, cfg.mesh, mesh, cfg.micro_batch, seed=7)
    optimizer, out = make_optimizer(cfg, runner), []
    for step in range(3):
        loss = runner.step(my_batches(cfg, runner, step), lm_loss).item()
        out.append((loss, runner.clip_grad_norm(1.0).item()))
        optimizer.step()
        optimizer.zero_grad()
    return out + [(runner.eval(my_batches(cfg, runner, 9), lm_loss).item(), 0.0)]


def plain_pytorch(cfg):
    """The same three steps with nothing of parallel.py: one process, one batch, mean cross-entropy,
    torch's clipping."""
    model = Nemotron(cfg.model)
    init_weights(model, seed=7)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer, out = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps), []
    for step in range(3):
        x, y = global_batch(step, cfg.batch)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE)
        loss.backward()
        out.append((loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        x, y = global_batch(9, cfg.batch)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE)
    return out + [(loss.item(), 0.0)]


def step_with_warnings(cfg, n_attributes):
    """(messages of a step's warnings, its loss, gradient norm, loss of an evaluation)."""
    model = dataclasses.replace(cfg.model, n_attributes=n_attributes)
    runner = Runner(model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=7)
    batches = my_batches(cfg, runner, 0)
    loss_fn = lm_loss if n_attributes == 0 else lambda out, batch: out.square().sum()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = runner.step(batches, loss_fn)
        norm = runner.clip_grad_norm(1.0)
        after = runner.eval(batches, loss_fn)
    return [str(warning.message) for warning in caught], loss.item(), norm.item(), after.item()


VIEWS = [(1, {}), (2, {}), (2, {"pp": 2}), (2, {"tp": 2}), (4, {"tp": 2, "pp": 2})]
VIEWS += [(4, {"tp": 2, "pp": 2, "recompute": "full"})]


@pytest.mark.parametrize("n_attributes", [0, 5])
@pytest.mark.parametrize("n, axes", VIEWS)
def test_no_forward_hands_fsdp_a_view_which_torch_warns_of(on_ranks, n, axes, n_attributes):
    cfg = config(**axes)
    for said, *_ in on_ranks(n, step_with_warnings, cfg, n_attributes):
        assert not [line for line in said if "view" in line]


MESHES = {
    "one": (1, {}),
    "one_micro_batch_8": (1, {"micro_batch": 8}),
    "one_micro_batch_1": (1, {"micro_batch": 1}),
    "shard2": (2, {}),
    "replicate2": (2, {"dp_replicate": 2}),
    "replicate2_shard2": (4, {"dp_replicate": 2}),
    "shard4_micro_batch_1": (4, {"micro_batch": 1}),
    "tp2": (2, {"tp": 2}),
    "tp4": (4, {"tp": 4}),  # as many key-value heads as tp
    "pp2": (2, {"pp": 2}),
    "pp4": (4, {"pp": 4}),
    "pp2_vp2": (2, {"pp": 2, "vp": 2}),
    "dp2_tp2": (4, {"tp": 2}),
    "dp2_pp2": (4, {"pp": 2}),
    "tp2_pp2_vp2": (4, {"tp": 2, "pp": 2, "vp": 2}),
    "dp2_tp2_pp2_vp2": (8, {"tp": 2, "pp": 2, "vp": 2}),
    "zero_bubble": (2, {"pp": 2, "vp": 2, "schedule": "zero_bubble"}),
    "zero_bubble_vp1": (2, {"pp": 2, "vp": 1, "schedule": "zero_bubble"}),
    "zbv": (2, {"pp": 2, "vp": 2, "schedule": "zbv"}),
    "zero_bubble_full_recompute": (
        2,
        {"pp": 2, "vp": 2, "schedule": "zero_bubble", "recompute": "full"},
    ),
    "zbv_dp2_tp2": (8, {"pp": 2, "vp": 2, "tp": 2, "schedule": "zbv"}),
    "recompute_full": (2, {"recompute": "full"}),
    "recompute_selective": (2, {"recompute": "selective"}),
    "recompute_full_tp2_pp2": (4, {"recompute": "full", "tp": 2, "pp": 2}),
    "recompute_selective_tp2_pp2": (4, {"recompute": "selective", "tp": 2, "pp": 2, "vp": 2}),
    "reshard_never": (2, {"reshard": "never"}),
    "reshard_always_on_copies": (4, {"reshard": "always", "dp_replicate": 2, "batch": 16}),
    "reshard_always_pp2": (4, {"reshard": "always", "pp": 2}),
    "uneven_layers": (2, {"pp": 2, "vp": 2, "n_layers": 5}),
    "uneven_layers_pp3": (3, {"pp": 3, "n_layers": 5, "batch": 6}),
}


SLOW = {"tp4", "recompute_full_tp2_pp2", "recompute_selective_tp2_pp2", "zbv_dp2_tp2"}


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=[pytest.mark.slow] if m in SLOW else []) for m in MESHES]
)
def test_loss_and_gradient_norm_do_not_depend_on_the_mesh(on_ranks, name):
    n, changes = MESHES[name]
    cfg = config(**changes)
    want = torch.tensor(plain_pytorch(cfg))
    for got in on_ranks(n, train_three_steps, cfg):
        assert torch.allclose(torch.tensor(got), want, rtol=1e-5), (got, want)


def weights_sum(cfg):
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=7)
    return {name: p.full_tensor().double().sum().item() for name, p in runner.params().items()}


@pytest.mark.parametrize("n, replicate", [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_initial_weights_are_the_same_on_every_mesh(on_ranks, n, replicate):
    model = Nemotron(TINY)
    init_weights(model, seed=7)
    want = {name: p.double().sum().item() for name, p in model.named_parameters()}
    for got in on_ranks(n, weights_sum, config(dp_replicate=replicate, batch=12)):
        assert got == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("chunk, kept", [(1, 1), (97 * 5, 97 * 7), (97 * 4, 1 << 20), (1 << 20, 1)])
def test_token_log_probs_and_their_gradients_equal_the_definition(monkeypatch, chunk, kept):
    for name, value in {"CHUNK": chunk, "KEPT": kept, "FEWEST": 1}.items():
        monkeypatch.setattr(TokenLogProbs, name, value)
    g = torch.Generator().manual_seed(0)
    h = torch.randn(2, 9, 16, generator=g, dtype=torch.float64, requires_grad=True)
    w = torch.randn(97, 16, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 97, (2, 9), generator=g)
    targets[1, 3:5] = IGNORE
    weight = torch.randn(2, 9, generator=g, dtype=torch.float64)

    def gradients(log_probs):
        return log_probs, *torch.autograd.grad((log_probs * weight).sum(), (h, w))

    with torch.no_grad():
        targets[0, :4] = (h @ w.t()).argmax(-1)[0, :4]
    out = TokenLogProbs.apply(h, w, targets, None)
    got = gradients(out)
    logits = (h @ w.t()).flatten(0, 1)
    chances = torch.distributions.Categorical(logits=logits)
    assert torch.allclose(out.seen["entropy"], chances.entropy(), atol=1e-12)
    assert out.seen["top1"].tolist() == (logits.argmax(-1) == targets.flatten()).tolist()
    assert 4 <= out.seen["top1"].sum() < 9
    want = gradients(-F.cross_entropy(logits, targets.flatten(), reduction="none").view(2, 9))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert (got[0][targets == IGNORE] == 0).all()


def test_log_probs_of_bf16_states_are_not_rounded_to_bf16():
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 64, generator=g).bfloat16() for n in (256, 4096))
    targets = torch.randint(0, 4096, (256,), generator=g)
    exact = -F.cross_entropy((h.double() @ w.double().t()), targets, reduction="none")
    assert (
        TokenLogProbs.apply(h, w, targets, None).sum() - exact.sum()
    ).abs() < 1e-3  # bf16 logits: off by 0.1 and more


@pytest.mark.parametrize("kept", [1, 1 << 20])
def test_gradients_of_bf16_log_probs_keep_what_is_left_of_near_certainty(monkeypatch, kept):
    """Where the target has probability 0.999, softmax - onehot is 0.001: a softmax rounded first
    would leave none of it."""
    monkeypatch.setattr(TokenLogProbs, "KEPT", kept)
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 64, generator=g).bfloat16() * std for n, std in ((512, 1), (1024, 0.1)))
    targets = torch.randint(0, 1024, (512,), generator=g)
    w[targets[:256]] = 0.2 * h[:256]  # logits near 13, the others' within 4
    got, want = [], []
    for fp, grads in ((torch.bfloat16, got), (torch.float64, want)):
        a, b = (t.detach().to(fp).requires_grad_() for t in (h, w))
        if fp == torch.bfloat16:
            TokenLogProbs.apply(a, b, targets, None).sum().backward()
        else:
            (-F.cross_entropy(a @ b.t(), targets, reduction="sum")).backward()
        grads += [a.grad.double(), b.grad.double()]
    certain = (h.double() @ w.double().t()).softmax(-1).gather(1, targets[:, None])[:, 0] > 0.99
    assert certain.sum() > 50
    for a, b in ((got[0][certain], want[0][certain]), (got[0], want[0]), (got[1], want[1])):
        assert (a - b).norm() < 0.01 * b.norm()


def bf16_run(cfg):
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=7)
    make_optimizer(cfg, runner)
    dtypes = {p.dtype for p in runner.params().values()}
    seen = set()

    def hook(module, args):
        seen.add((args[0].dtype, args[1][0].dtype))  # the residual stream, the rotary cosines

    runner.stages[0].model.blocks["1"].register_forward_pre_hook(hook)
    loss = runner.step(my_batches(cfg, runner, 0), lm_loss).item()
    return dtypes, seen, loss


def test_bf16_runs_keep_fp32_master_weights(on_ranks):
    cfg = dataclasses.replace(config(), mesh=MeshConfig(dtype="bf16"))
    for dtypes, seen, loss in on_ranks(2, bf16_run, cfg):
        assert dtypes == {torch.float32} and seen == {(torch.bfloat16, torch.float32)}
        assert abs(loss - plain_pytorch(config())[0][0]) < 0.05


def gradients_at_each_loss(cfg):
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=7)
    there = []

    def loss(out, batch):
        there.append({type(p.grad).__name__ == "DTensor" for p in runner.params().values()})
        return lm_loss(out, batch)

    runner.step(my_batches(cfg, runner, 0), loss)
    return there


@pytest.mark.parametrize("reshard", ["auto", "always", "never"])
def test_gradients_are_reduced_after_each_micro_batch_or_add_up_whole(on_ranks, reshard):
    cfg = config(reshard=reshard)
    for there in on_ranks(2, gradients_at_each_loss, cfg):
        assert there == [{False}, {reshard == "always"}]


def shards_after_eval(cfg):
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=7)
    runner.eval(my_batches(cfg, runner, 0), lm_loss)
    return {(type(p).__name__, p.dtype) for p in runner.params().values()}


@pytest.mark.parametrize("n, axes", [(2, {"reshard": "never"}), (4, {"pp": 2, "vp": 2}), (2, {})])
def test_after_an_evaluation_the_parameters_are_the_sharded_fp32_ones(on_ranks, n, axes):
    for kinds in on_ranks(n, shards_after_eval, config(dtype="bf16", **axes)):
        assert kinds == {("DTensor", torch.float32)}


def decayed(cfg):
    optimizer = make_optimizer(
        cfg, Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=0)
    )
    return [
        (g["weight_decay"], sorted({p.ndim for p in g["params"]})) for g in optimizer.param_groups
    ]


def test_norms_and_biases_do_not_decay(on_ranks):
    assert on_ranks(1, decayed, config())[0] == [(0.1, [2]), (0.0, [1])]


def save_on(cfg, root, steps, background=False):
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=7)
    optimizer = make_optimizer(cfg, runner)
    runner.step(my_batches(cfg, runner, 0), lm_loss)
    optimizer.step()
    checkpoints = Checkpoints(root, 2, background)
    for step in range(1, steps + 1):
        checkpoints.save(step, training_state(runner, optimizer), {"tokens": step * 10})
    checkpoints.finish()
    return [p.name for p in step_folders(root)], sums(training_state(runner, optimizer))


def load_on(cfg, root):
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=1)
    optimizer = make_optimizer(cfg, runner)
    state = Checkpoints(root, 2, False).load(training_state(runner, optimizer))
    return state, sums(training_state(runner, optimizer))


def load_and_listen(cfg, root):
    """What was loaded, and what was said of it on this rank."""
    with mock.patch.object(parallel.log, "warning") as warning:
        state, _ = load_on(cfg, root)
    return state, " ".join(str(call.args[0]) for call in warning.call_args_list)


def sums(state):
    full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}
    return {k: v.double().sum().item() for k, v in full.items()}


def test_a_checkpoint_moves_between_meshes_and_the_newest_are_kept(on_ranks, tmp_path):
    folders, want = on_ranks(2, save_on, config(), tmp_path, 4)[0]
    assert folders == ["step_000003", "step_000004"]
    for n, replicate in ((1, 1), (4, 2)):
        for state, got in on_ranks(n, load_on, config(dp_replicate=replicate), tmp_path):
            assert state == {"step": 4, "tokens": 40} and got == pytest.approx(want, abs=1e-9)


@pytest.mark.slow
def test_a_checkpoint_moves_to_and_from_every_axis(on_ranks, tmp_path):
    four_axes = config(tp=2, pp=2, vp=2)
    want = on_ranks(8, save_on, four_axes, tmp_path, 1, True)  # in the background
    want = {k: v for _, sums_of_rank in want for k, v in sums_of_rank.items()}
    for n, axes in (
        (1, {}),
        (4, {"tp": 4}),
        (4, {"pp": 4}),
        (2, {"pp": 2, "vp": 2, "schedule": "zbv"}),
    ):
        got = {}
        for state, sums_of_rank in on_ranks(n, load_on, config(**axes), tmp_path):
            assert state == {"step": 1, "tokens": 10}
            got |= sums_of_rank
        assert got == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("harm", ["truncate", "flip", "delete", "state"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(on_ranks, tmp_path, harm):
    on_ranks(2, save_on, config(), tmp_path, 2)
    newest = tmp_path / "step_000002"
    file = newest / ("state.json" if harm == "state" else "part_0000/__1_0.distcp")
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    file.write_bytes(content if harm == "flip" else content[: len(content) // 2])
    if harm == "delete":
        file.unlink()
    for state, said in on_ranks(2, load_and_listen, config(), tmp_path):
        assert state["step"] == 1 and file.name in said
    (tmp_path / "step_000001" / "state.json").unlink()
    with pytest.raises(AssertionError, match="no checkpoint is whole"):
        on_ranks(1, load_on, config(), tmp_path)


def load_with_a_stale_listing(cfg, folder):
    """Load, where rank 1 does not see the newest checkpoint in its listing."""
    listing = parallel.step_folders
    if dist.get_rank() == 1:
        parallel.step_folders = lambda root: listing(root)[:-1]
    try:
        return load_on(cfg, folder)
    finally:
        parallel.step_folders = listing


def test_all_ranks_load_the_checkpoint_that_rank_0_sees(on_ranks, tmp_path):
    on_ranks(2, save_on, config(), tmp_path, 2)
    for state, _ in on_ranks(2, load_with_a_stale_listing, config(), tmp_path):
        assert state["step"] == 2


def test_what_is_still_being_written_is_not_a_checkpoint(tmp_path):
    for name in ("step_000010.partial", "step_000004.old", "step_000005", "other"):
        (tmp_path / name).mkdir()
    assert [p.name for p in step_folders(tmp_path)] == ["step_000005"]


def test_checkpoints_are_in_the_order_of_their_steps_past_a_million(tmp_path):
    for step in (999_500, 1_000_000, 20, 1_000_500):
        (tmp_path / f"step_{step:06d}").mkdir()
    names = ["step_000020", "step_999500", "step_1000000", "step_1000500"]
    assert [p.name for p in step_folders(tmp_path)] == names


def group_timeouts(cfg):
    mesh, cpu = init_mesh(cfg.mesh), torch.device("cpu")
    groups = [mesh[axis].get_group() for axis in mesh.mesh_dim_names]
    return [g._get_backend(cpu).options._timeout.total_seconds() for g in groups]


def test_every_axis_waits_as_long_as_it_is_told(on_ranks):
    assert on_ranks(4, group_timeouts, config(tp=2, timeout=77)) == [[77.0] * 4] * 4


def hf_round_trip(cfg, folder, run):
    """Loss of a Hugging Face folder's weights on this mesh, which are saved as a run's."""
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=1)
    runner.load_weights(folder)
    loss = runner.eval(my_batches(cfg, runner, 0), lm_loss).item()
    save_as_run(cfg, runner, run)
    return loss


def save_as_run(cfg, runner, run):
    weights = {f"model.{name}": p for name, p in runner.params().items()}
    Checkpoints(run / "checkpoints", 2, False).save(1, weights, {})
    (run / "config.json").write_text(json.dumps({"model": dataclasses.asdict(cfg.model)}))


HF_MESHES = [(1, {}), (3, {"batch": 6}), (4, {"tp": 2, "pp": 2, "vp": 2}), (8, {"tp": 2, "pp": 2})]


@pytest.mark.parametrize("n, axes", HF_MESHES)
def test_hugging_face_folders_go_in_and_out_of_every_mesh(on_ranks, tmp_path, n, axes):
    from transformers import AutoModelForCausalLM

    model = Nemotron(TINY)
    save_hf(model, tmp_path / "in", file_bytes=100_000)
    files = list((tmp_path / "in").glob("*.safetensors"))
    assert len(files) > 3 and max(f.stat().st_size for f in files) < 110_000
    cfg = config(**axes)
    losses = on_ranks(n, hf_round_trip, cfg, tmp_path / "in", tmp_path / "run")
    export(ExportConfig(tmp_path / "run", tmp_path / "out", "fp32"))
    x, y = global_batch(0, cfg.batch)
    with torch.no_grad():
        want = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE).item()
    assert losses == pytest.approx([want] * n, rel=1e-5)
    again = load_hf(tmp_path / "out")
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert (theirs(x).logits - model(x)).abs().max() < 1e-4


def test_a_hugging_face_folder_of_another_shape_is_refused(on_ranks, tmp_path):
    save_hf(Nemotron(dataclasses.replace(TINY, ffn_dim=64)), tmp_path)
    with pytest.raises(AssertionError, match=r"mlp.up.weight is torch.Size\(\[64, .*in this run"):
        on_ranks(1, hf_round_trip, config(), tmp_path, tmp_path / "out")


def one_rank_run(folder):
    """Make a run with a checkpoint."""
    cfg = config()
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=1)
    save_as_run(cfg, runner, folder)
    (folder / "tokenizer.json").write_text("{}")


def content(folder):
    """Map each path under a folder to its bytes."""
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_export_into_what_holds_anything_is_refused_and_changes_nothing(on_ranks, tmp_path):
    run = tmp_path / "run"
    on_ranks(1, one_rank_run, run)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = content(tmp_path)
    for name in ("run", "notes", "file"):
        with pytest.raises(ValueError, match=f"{name} is there, and no empty folder"):
            export(ExportConfig(run, tmp_path / name))
        with pytest.raises(ValueError, match=f"{name} is there, and no empty folder"):
            save_hf(Nemotron(TINY), tmp_path / name)
        assert content(tmp_path) == before
    (tmp_path / "empty").mkdir()
    export(ExportConfig(run, tmp_path / "empty"))
    names = {path.name for path in (tmp_path / "empty").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("breaks", ["save_file", "hf_config"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()], ids=repr)
def test_an_export_is_whole_or_not_there(on_ranks, tmp_path, monkeypatch, breaks, error):
    on_ranks(1, one_rank_run, tmp_path / "run")
    before = content(tmp_path)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(parallel, breaks, fail)
    for write in (
        lambda: export(ExportConfig(tmp_path / "run", tmp_path / "out")),
        lambda: save_hf(Nemotron(TINY), tmp_path / "out"),
    ):
        with pytest.raises(type(error)):
            write()
        assert content(tmp_path) == before and not (tmp_path / "out").exists()
        assert not list(tmp_path.glob("*.partial"))
        if dist.is_initialized():
            dist.destroy_process_group()


def test_an_export_to_where_nothing_can_be_written_ends_in_a_line(
    on_ranks, tmp_path, monkeypatch, capsys
):
    on_ranks(1, one_rank_run, tmp_path / "run")
    monkeypatch.setattr(os, "_exit", sys.exit)
    (tmp_path / "file").write_text("")
    for out in ("/proc/x/hf", str(tmp_path / "file" / "hf")):
        monkeypatch.setattr(sys, "argv", ["parallel.py", "export", str(tmp_path / "run"), out])
        with pytest.raises(SystemExit, match="2"):
            parallel.main()
        assert re.fullmatch("error: [^\n]*\n", capsys.readouterr().err)


def test_a_folder_of_another_kind_of_model_is_refused(tmp_path):
    save_hf(Nemotron(TINY), tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="config.json .*model_type='llama': only 'nemotron'"):
        load_hf(tmp_path / "hf")
    del written["model_type"]  # not every converter writes it
    file.write_text(json.dumps(written))
    load_hf(tmp_path / "hf")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_a_matrix_that_needs_a_scale_is_refused_by_its_name(tmp_path, dtype):
    save_hf(Nemotron(TINY), tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is .*8.*: convert it, with its scales"):
        load_hf(tmp_path / "hf")


def test_a_part_of_a_weight_file_is_named_whatever_its_length(tmp_path):
    save_hf(Nemotron(TINY), tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    whole = file.read_bytes()
    draw = random.Random(0)
    cuts = [0, 1, 7, 8, 9, 100, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(50))]
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n"
    for damaged in (pointer, b"<html>", *(whole[:n] for n in cuts)):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors: .*git lfs pull") as error:
            load_hf(tmp_path / "hf")
        assert "\n" not in str(error.value)


def spoilt(draw, value):
    """Replace a value somewhere in a JSON value, or leave a key out."""
    if isinstance(value, dict) and value and draw.random() < 0.95:
        key = draw.choice(sorted(value))
        if draw.random() < 0.3:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: spoilt(draw, value[key])}
    others = [None, [], {}, "", "64", -1, 0, 2**70, 1.5, float("nan"), True, [1], {"a": 1}]
    return draw.choice(others)


def test_any_config_json_is_read_or_refused_in_a_line_that_names_it(tmp_path):
    file = tmp_path / "config.json"
    run = {"model": dataclasses.asdict(TINY), "steps": 3}
    for text in ("", "{", "[]", "{}", "null", "3", '"a"', '{"model": []}', "[" * 100_000, "\x00"):
        file.write_text(text)
        with pytest.raises(ValueError, match="config.json") as error:
            read_config(tmp_path)
        assert "\n" not in str(error.value)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="config.json"):
        read_config(tmp_path)
    for whole in (run, hf_config(TINY)):
        file.write_text("\ufeff" + json.dumps(whole), encoding="utf-8")
        assert read_config(tmp_path) == TINY
        draw = random.Random(1)
        refused = 0
        for _ in range(1000):
            file.write_text(json.dumps(spoilt(draw, whole)))
            try:
                assert isinstance(read_config(tmp_path), ModelConfig)
            except ValueError as error:
                refused += 1
                assert "config.json" in str(error) and "\n" not in str(error)
        assert refused > 100


def load_edited(folder):
    file = folder / "config.json"
    written = json.loads(file.read_text())
    for name, value in {"dim": 32, "n_layers": 5, "vocab_size": 95, "ffn_dim": 64}.items():
        file.write_text(json.dumps({"model": written["model"] | {name: value}}))
        with pytest.raises((ValueError, OSError), match="step_000001: .*config.json") as error:
            params = dict(Nemotron(read_config(folder)).named_parameters())
            fill(params, open_weights(folder))
        assert "\n" not in str(error.value)


def test_a_config_json_that_is_not_its_checkpoints_is_told_in_a_line(on_ranks, tmp_path):
    on_ranks(1, one_rank_run, tmp_path)
    on_ranks(1, load_edited, tmp_path)


def save_on_a_full_disk(cfg, root, background, n_bytes):
    """Save twice, the second time where no file may grow beyond n_bytes; return what is said."""
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=7)
    state = training_state(runner, make_optimizer(cfg, runner))
    checkpoints = Checkpoints(root, 2, background)
    checkpoints.save(1, state, {})
    checkpoints.finish()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))
    try:
        checkpoints.save(2, state, {})
        checkpoints.finish()
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


@pytest.mark.parametrize("n_bytes", [0, 10_000])
@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_that_finds_no_room_is_gone_and_says_why(
    on_ranks, tmp_path, background, n_bytes
):
    for said in on_ranks(2, save_on_a_full_disk, config(), tmp_path, background, n_bytes):
        assert "step_000002.partial: not saved, and removed: rank " in said
        assert "File too large" in said and "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert on_ranks(2, load_on, config(), tmp_path)[0][0] == {"step": 1}


def save_beside_rubbish(cfg, root):
    """Save six times with keep=1 while the folder holds what is no checkpoint of the run."""
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=7)
    state = training_state(runner, make_optimizer(cfg, runner))
    checkpoints = Checkpoints(root, 1, False)
    (root / "step_000009.backup").mkdir()  # a user's copy
    for name in ("step_000002", "step_000004.tar", "notes", "step_000008.partial"):
        (root / name).write_text("x")
    for name, text in (("step_000001", "[]"), ("step_000007", "{")):  # damaged: before and later
        (root / name).mkdir()
        (root / name / "state.json").write_text(text)
    for step in (3, 4, 5):
        checkpoints.save(step, state, {})
    return checkpoints.load(state)["step"]


def test_a_stray_or_damaged_file_stops_no_run_and_costs_no_checkpoint(on_ranks, tmp_path):
    (tmp_path / "c").mkdir()
    assert on_ranks(1, save_beside_rubbish, config(), tmp_path / "c") == [5]
    left = {path.name for path in (tmp_path / "c").iterdir()}
    assert {"step_000005", "step_000009.backup", "step_000002", "step_000004.tar"} <= left
    assert "step_000004" not in left


NO_SIZES = (0, -1, 2**62, -(2**62), 10**9, 1e300, float("nan"), float("inf"))


@pytest.mark.parametrize("name", ["tp", "pp", "vp", "dp_replicate", "timeout"])
@pytest.mark.parametrize("value", NO_SIZES)
def test_a_number_that_no_mesh_can_have_is_refused_by_its_fields_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}=.*: must be in 1..") as error:
        MeshConfig(**{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["schedule", "recompute", "dtype", "reduce_dtype", "reshard"])
@pytest.mark.parametrize("value", ["fp64", "", None, 1, True])
def test_a_word_that_no_mesh_knows_is_refused_by_its_fields_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}={value}: must be one of "):
        dataclasses.replace(MeshConfig(), **{name: value})


def test_every_field_of_a_mesh_is_checked():
    for field in dataclasses.fields(MeshConfig):
        if field.type is not bool:
            with pytest.raises(ValueError, match=f"^{field.name}="):
                MeshConfig(**{field.name: 0})


@pytest.mark.parametrize("gpu", [False, True])
def test_auto_computes_in_bf16_on_a_gpu_and_in_fp32_on_a_cpu(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert MeshConfig().compute_dtype == ("bf16" if gpu else "fp32")
    for name in ("fp32", "bf16"):
        assert MeshConfig(dtype=name).compute_dtype == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is bf16 there")
@pytest.mark.parametrize("axes", [{}, {"pp": 2}])
def test_a_mesh_of_a_cpu_computes_in_fp32_if_not_told_otherwise(on_ranks, axes):
    runs = on_ranks(2, train_three_steps, config(dtype="auto", **axes))
    assert runs == on_ranks(2, train_three_steps, config(dtype="fp32", **axes))


def one_step_each(cfg, counts):
    """[(loss, gradient norm)] of a step of so many micro-batches."""
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=7)
    found = []
    for n in counts:
        batches = my_batches(dataclasses.replace(cfg, batch=n * cfg.micro_batch), runner, n)
        loss = runner.step(batches, lm_loss).item()
        found.append((loss, runner.clip_grad_norm(1e9).item()))
        for p in runner.params().values():
            p.grad = None
    return found


@pytest.mark.parametrize(
    "n, axes",
    [
        (2, {"pp": 2, "vp": 2, "schedule": "zbv"}),
        (2, {"pp": 2, "vp": 2}),
        pytest.param(2, {"pp": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"pp": 4, "schedule": "zero_bubble"}, marks=pytest.mark.slow),
        pytest.param(3, {"pp": 3, "vp": 2, "n_layers": 6}, marks=pytest.mark.slow),
        pytest.param(4, {"pp": 4, "vp": 2, "n_layers": 8}, marks=pytest.mark.slow),
    ],
)
def test_a_schedule_takes_every_number_of_micro_batches_that_the_mesh_says(on_ranks, n, axes):
    cfg = config(micro_batch=1, **axes)
    counts = sorted({cfg.mesh.micro_batches(i) for i in range(1, 2 * n + 3)})
    assert counts[0] == (n if axes == {"pp": 2} else 1)
    one = axes | {"pp": 1, "vp": 1, "schedule": "1f1b"}
    (alone,) = on_ranks(1, one_step_each, config(micro_batch=1, **one), counts)
    for rank in on_ranks(n, one_step_each, cfg, counts):
        assert torch.allclose(torch.tensor(rank), torch.tensor(alone), rtol=1e-5)


IMPOSSIBLE = [
    (3, {}, "batch=8 sequences: must be a multiple of 3 dp processes"),
    (2, {"micro_batch": 3}, "2 dp processes x micro_batch=3 = 6"),
    (4, {"dp_replicate": 3}, "dp_replicate=3 x tp=1 = 3 does not divide the 4 processes"),
    (1, {"micro_batch": 0}, "micro_batch=0"),
    (4, {"pp": 0}, "pp=0"),
    (8, {"tp": 8}, "tp=8 does not divide n_kv_heads=4"),
    (3, {"tp": 3}, "tp=3 does not divide n_heads=8"),
    (8, {"pp": 8}, "pp=8 x vp=1 = 8 stages: must have a layer each, but n_layers=4"),
    (2, {"pp": 2, "vp": 4}, "pp=2 x vp=4 = 8 stages"),
    (1, {"vp": 2}, "vp=2, schedule=1f1b with pp=1"),
    (1, {"schedule": "zbv"}, "schedule=zbv with pp=1"),
    (4, {"pp": 4, "micro_batch": 4}, "pp=4: 2 micro-batches for each .* takes 4"),
    (
        2,
        {"pp": 2, "vp": 2, "batch": 10, "micro_batch": 2},
        "pp=2: 5 micro-batches for each .* takes 6",
    ),
    (2, {"pp": 2, "schedule": "zbv"}, "two stages per rank, but vp=1"),
    (2, {"pp": 2, "schedule": "zero_bubble", "recompute": "selective"}, "recompute=selective"),
    (2, {"pp": 2, "schedule": "zero_bubble", "compile": True}, "compile=True"),
]


@pytest.mark.parametrize("world, changes, words", IMPOSSIBLE)
def test_an_impossible_mesh_is_refused_with_its_numbers(world, changes, words):
    with pytest.raises(ValueError, match=words):
        cfg = config(**changes)
        cfg.mesh.check(cfg.model, world, cfg.batch, cfg.micro_batch)


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_that_runs_passes_the_check(name):
    world, changes = MESHES[name]
    cfg = config(**changes)
    cfg.mesh.check(cfg.model, world, cfg.batch, cfg.micro_batch)


def test_layers_are_spread_evenly_with_the_head_counted_as_work():
    large = SHAPES["nemotron4-340b"]
    assert [len(r) for r in split_layers(large, 96)] == [1] * 96
    assert [len(r) for r in split_layers(large, 12)] == [8] * 12
    small = dataclasses.replace(
        TINY, n_layers=7, vocab_size=100_000
    )  # the head outweighs all layers
    assert [len(r) for r in split_layers(small, 3)] == [3, 3, 1]
    for n in (1, 2, 3, 5, 7):
        parts = split_layers(dataclasses.replace(TINY, n_layers=7), n)
        assert [i for r in parts for i in r] == list(range(7)) and min(map(len, parts)) >= 1


def test_an_unknown_device_has_no_peak(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("Some Card", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == peak


def failing_rank(rank_that_fails):
    if dist.get_rank() == rank_that_fails:
        raise RuntimeError("boom")
    dist.barrier()


def test_a_failing_rank_fails_the_whole_job(on_ranks):
    with pytest.raises(AssertionError, match="rank 1 of 2"):
        on_ranks(2, partial(failing_rank, 1))


HELD = [{}, {"tp": 2}, {"tp": 2, "pp": 2, "vp": 2}, {"pp": 3, "n_layers": 7}]


def held_here(cfg):
    """name → (this rank's piece of it, its size), built and not yet filled."""
    mesh, how = init_mesh(cfg.mesh), cfg.mesh
    held = {}
    for s in how.stages_of(mesh["pp"].get_local_rank()):
        stage = build_stage(cfg.model, s, mesh, how, [])
        for name, p in stage.model.named_parameters():
            where = zip(p.placements, p.device_mesh.get_coordinate(), strict=True)
            piece = tuple(i for cut, i in where if not cut.is_replicate())
            held[name, piece] = p.to_local().numel()
    return held


@pytest.mark.parametrize("axes", HELD)
def test_what_the_ranks_hold_sums_to_the_model(on_ranks, axes):
    cfg = config(**axes, batch=24)
    held = {}
    for pieces in on_ranks(6 if axes.get("pp", 1) == 3 else 8, held_here, cfg):
        held |= pieces
    assert sum(held.values()) == sum(count_params(cfg.model))


# ---- moving a run --------------------------------------------------------------------------------


def some_steps(cfg, root, first, last):
    """[(loss, norm)] of steps first..last-1, from the newest checkpoint on; saves at last."""
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=7)
    optimizer, out = make_optimizer(cfg, runner), []
    checkpoints = Checkpoints(root, 2, False)
    saved = checkpoints.load(training_state(runner, optimizer))
    assert (saved["step"] if saved else 0) == first
    for step in range(first, last):
        loss = runner.step(my_batches(cfg, runner, step), lm_loss).item()
        out.append((loss, runner.clip_grad_norm(1.0).item()))
        optimizer.step()
        optimizer.zero_grad()
    checkpoints.save(last, training_state(runner, optimizer), {})
    return out


MOVES = [(1, {}), (4, {"tp": 4}), (4, {"pp": 4}), (4, {"tp": 2, "dp_replicate": 2})]


@pytest.mark.slow
def test_a_run_moved_to_another_mesh_continues_the_same_loss_curve(on_ranks, tmp_path):
    want = torch.tensor(on_ranks(1, some_steps, config(), tmp_path / "whole", 0, 6)[0])
    four_axes = config(tp=2, pp=2, vp=2)
    start = on_ranks(8, some_steps, four_axes, tmp_path / "moved", 0, 3)[0]
    for n, axes in MOVES:
        here = tmp_path / f"moved_{n}_{len(axes)}_{list(axes)}"
        shutil.copytree(tmp_path / "moved", here)
        for rest in on_ranks(n, some_steps, config(**axes), here, 3, 6):
            assert torch.allclose(torch.tensor(start + rest), want, rtol=1e-5), axes


@pytest.mark.slow
@pytest.mark.parametrize(
    "n, axes", [(1, {}), (2, {"pp": 2}), (2, {"tp": 2, "recompute": "selective"})]
)
def test_compiled_blocks_train_alike(on_ranks, n, axes):
    want = torch.tensor(plain_pytorch(config()))
    for got in on_ranks(n, train_three_steps, config(compile=True, **axes), timeout=600):
        assert torch.allclose(torch.tensor(got), want, rtol=1e-5), (got, want)


@pytest.mark.parametrize("reduce_dtype", ["fp32", "bf16"])
def test_gradients_are_reduced_in_the_dtype_asked_for(on_ranks, reduce_dtype):
    cfg = config(reduce_dtype=reduce_dtype, dtype="bf16")
    exact = plain_pytorch(config())[0]
    loss, norm = on_ranks(2, train_three_steps, cfg)[0][0]
    assert abs(loss - exact[0]) < 0.05 and norm == pytest.approx(exact[1], rel=0.05)
    other = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, reduce_dtype="fp32"))
    same = on_ranks(2, train_three_steps, other)[0][0][1] == norm
    assert same == (reduce_dtype == "fp32")


def stand_ins(cfg, rank):
    """A pipeline rank's stages, as far as a schedule looks at them before it runs."""
    return [
        SimpleNamespace(
            submod=torch.nn.Identity(), num_stages=cfg.n_stages, group_size=cfg.pp,
            group_rank=rank, stage_index=s, is_first=s == 0, is_last=s == cfg.n_stages - 1,
        )
        for s in cfg.stages_of(rank)
    ]  # fmt: skip


SCHEDULES = [("1f1b", 12, 8), ("1f1b", 4, 2), ("zero_bubble", 4, 8), ("zbv", 4, 2)]


@pytest.mark.parametrize("kind, pp, vp", SCHEDULES)
@pytest.mark.parametrize("reshard", ["auto", "always"])
def test_a_pipelines_weights_are_gathered_once_a_step_unless_they_are_to_be_freed(
    kind, pp, vp, reshard
):
    cfg = MeshConfig(tp=2, pp=pp, vp=vp, schedule=kind, reshard=reshard)
    order = make_schedule(cfg, stand_ins(cfg, 0), 3 * pp).pipeline_order_with_comms
    for rank in range(pp):
        gathers = sum(action.computation_type == torchs.UNSHARD for action in order[rank])
        assert gathers == vp if reshard == "auto" else gathers >= vp
        if reshard == "always" and vp > 3:
            assert gathers > 2 * vp  # as torch does


@pytest.mark.parametrize("kind, pp, vp", SCHEDULES)
def test_validation_takes_all_micro_batches_of_a_stage_before_the_next_stage(kind, pp, vp):
    cfg = MeshConfig(pp=pp, vp=vp, schedule=kind)
    order = make_schedule(cfg, stand_ins(cfg, 1), 5, train=False).pipeline_order_with_comms
    kinds = {
        rank: [(a.computation_type, a.stage_index, a.microbatch_index) for a in actions]
        for rank, actions in order.items()
    }
    for rank in range(pp):
        forward = [(s, i) for kind, s, i in kinds[rank] if kind == torchs.FORWARD]
        assert forward == [(s, i) for s in cfg.stages_of(rank) for i in range(5)]
    # every pair of ranks sends and receives in one order
    for a, b in itertools.permutations(range(pp), 2):
        sent = [
            (s + 1, i)
            for kind, s, i in kinds[a]
            if kind == torchs.SEND_F and cfg.rank_of(s + 1) == b
        ]
        got = [
            (s, i) for kind, s, i in kinds[b] if kind == torchs.RECV_F and cfg.rank_of(s - 1) == a
        ]
        assert sent == got


class Collectives(TorchDispatchMode):
    """Counts the collectives that are asked for, by kind."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kinds = "reduce_scatter|gather|scatter|reduce|send|recv|broadcast|all_to_all"
        kind = "c10d" in func.namespace and re.search(kinds, func.name())
        if kind:
            self.counts[kind[0]] = self.counts.get(kind[0], 0) + 1
        return func(*args, **(kwargs or {}))


def collectives(cfg):
    """The collectives of a training step after the first, by name."""
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=0)
    optimizer = make_optimizer(cfg, runner)
    for step in range(2):
        with Collectives() as seen:
            runner.step(my_batches(cfg, runner, step), lm_loss)
            runner.clip_grad_norm(1.0)
        optimizer.step()
        optimizer.zero_grad()
    return seen.counts


# FSDP has a unit for each of 4 layers, for the embedding, and for norm and head: 6, or 3 on a rank
# of a pipeline of 2. A step has 2 micro-batches on each of 2 data-parallel ranks.
COLLECTIVES = [
    (1, {}, {}),
    # each unit's weights are gathered in forward and in backward, its gradient scattered once; the
    # count, the loss and the norm are summed
    (2, {}, {"gather": 2 * 2 * 6, "reduce_scatter": 6, "reduce": 3}),
    # copies sum each unit's gradient instead
    (2, {"dp_replicate": 2}, {"reduce": 6 + 3}),
    # 4 micro-batches: 4 of each a layer, and 2 for embedding and head; 2 sums each of the logits'
    # maximum and exponentials; a sum of each norm's gradients, as its tokens are divided
    (2, {"tp": 2}, {"gather": 4 * 18, "reduce_scatter": 4 * 18, "reduce": 4 * 2 + 18 + 1}),
    # a pipeline gathers once; the loss and the norm are summed over it too; two of its three
    # borders between stages are sent over and received from, forward and backward
    (4, {"pp": 2, "vp": 2}, {"gather": 3, "reduce_scatter": 3, "reduce": 5, "send": 6, "recv": 6}),
]


@pytest.mark.parametrize("n, axes, want", COLLECTIVES)
def test_a_step_does_the_collectives_that_the_design_names(on_ranks, n, axes, want):
    assert on_ranks(n, collectives, config(**axes)) == [want] * n


def open_files(n_ranks, port):
    """Files that this process opens to join a job and to sum over all of it."""
    dist.destroy_process_group()
    os.environ |= {"WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    before = len(os.listdir("/proc/self/fd"))
    init_mesh(MeshConfig())
    dist.all_reduce(torch.ones(()))
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    return len(os.listdir("/proc/self/fd")) - before


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts Linux's open files")
def test_a_rank_does_not_connect_to_every_other(on_ranks):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    # rank 0 holds the store here, to which all connect; under torchrun its agent does
    few, many = (max(on_ranks(n, open_files, n, port)[1:]) for n in (4, 12))
    assert many - few < 8


def join_with(gpus, local_rank):
    """Start on a machine with so many GPUs, as the process with this number."""
    os.environ["LOCAL_RANK"] = str(local_rank)
    with mock.patch.object(torch.cuda, "device_count", lambda: gpus):
        init_mesh(MeshConfig())


def test_more_processes_than_gpus_are_refused_with_both_numbers_and_what_to_do(on_ranks):
    with pytest.raises(AssertionError, match="process 3 .* has 2 GPU.*start 2 .*VISIBLE_DEVICES="):
        on_ranks(1, join_with, 2, 3)


def lora_losses(cfg):
    """Losses and norms of three steps of adapters, whose B is zero in the first alone."""
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=0)
    optimizer = make_optimizer(cfg, runner)
    found = []
    for step in range(3):
        found.append(runner.step(my_batches(cfg, runner, step), lm_loss).item())
        found.append(runner.clip_grad_norm(1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("n, axes", [(2, {"tp": 2}), (4, {"tp": 4}), (4, {"tp": 2})])
def test_adapters_of_fewer_rows_than_ranks_train_alike(on_ranks, n, axes):
    model = dataclasses.replace(TINY, lora_rank=1)
    one = RunConfig(model, MeshConfig(dtype="fp32"), batch=12, micro_batch=1, lr=3e-3, eps=1e-6)
    (alone,) = on_ranks(1, lora_losses, one)
    cut = dataclasses.replace(one, mesh=MeshConfig(dtype="fp32", **axes))
    for got in on_ranks(n, lora_losses, cut):
        assert got == pytest.approx(alone, rel=1e-5)


def test_an_export_by_several_processes_is_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process, not 2: start it by python"):
        export(ExportConfig(tmp_path / "run", tmp_path / "hf"))
    assert not list(tmp_path.iterdir())


def states_left(cfg):
    """States that the stages of a pipeline still hold after a validation, and its micro-batches."""
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=0)
    runner.eval(my_batches(cfg, runner, 0), lm_loss)
    stages = runner.pipelines[False]
    name = "fwd_cache" if hasattr(stages[0], "fwd_cache") else "_forward_chunk_states"  # torch 2.15
    return sum(len(getattr(stage, name)) for stage in stages)


def test_a_validation_leaves_no_states_in_the_pipeline(on_ranks):
    assert on_ranks(2, states_left, config(pp=2, vp=2)) == [0, 0]


# ---- a checkpoint's parts ------------------------------------------------------------------------


def save_and_load_counting(cfg, root):
    """Save, and load twice; return which parts' indexes a load read, and how many pieces a load of
    the weights alone did."""
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=7)
    state = training_state(runner, make_optimizer(cfg, runner))
    checkpoints = Checkpoints(root / "checkpoints", 2, False, cfg.mesh)
    checkpoints.save(1, state, {})
    (root / "config.json").write_text(json.dumps({"model": dataclasses.asdict(cfg.model)}))
    dist.barrier()
    reader = torch.distributed.checkpoint.FileSystemReader
    read, indexes = reader.read_metadata, []

    def listening(self, *args, **kwargs):
        indexes.append(Path(self.path).name)
        return read(self, *args, **kwargs)

    pieces = []
    read_pieces = parallel.read_pieces

    def listing(part, index, name, wanted):
        pieces.append(name)
        return read_pieces(part, index, name, wanted)

    with mock.patch.object(reader, "read_metadata", listening):
        checkpoints.load(state)
    with mock.patch.object(parallel, "read_pieces", listing):
        fill(runner.params(), open_weights(root))
    return indexes, pieces


def test_a_rank_reads_the_index_of_its_own_part_and_no_optimizer_for_weights(on_ranks, tmp_path):
    found = on_ranks(4, save_and_load_counting, config(pp=4), tmp_path)
    assert [indexes for indexes, _ in found] == [[f"part_{rank:04d}"] for rank in range(4)]
    assert all(name.startswith("model.") for _, pieces in found for name in pieces)


def save_where_one_part_has_no_room(cfg, root):
    """Save where the ranks of the last part may not write; return what each is told."""
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=7)
    state = training_state(runner, make_optimizer(cfg, runner))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if runner.mesh.get_local_rank("pp") == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    with pytest.raises(OSError) as error:
        Checkpoints(root, 2, False, cfg.mesh).save(1, state, {})
    return str(error.value)


def test_all_ranks_are_told_where_one_part_of_a_checkpoint_finds_no_room(on_ranks, tmp_path):
    for said in on_ranks(4, save_where_one_part_has_no_room, config(pp=2), tmp_path):
        assert "not saved, and removed: rank 2: " in said and "File too large" in said
    assert not list(tmp_path.iterdir())


def save_where_listings_lag(cfg, root):
    """Save where a listing shows nothing yet of what other machines wrote, as on NFS; return the
    checkpoints."""
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=7)
    state = training_state(runner, make_optimizer(cfg, runner))
    glob = Path.glob

    def lagging(self, pattern):
        return [] if pattern.endswith(".metadata") else glob(self, pattern)

    with mock.patch.object(Path, "glob", lagging):
        checkpoints = Checkpoints(root, 2, False, cfg.mesh)
        for step in (1, 2):
            checkpoints.save(step, state, {})
            checkpoints.poll()
    return [folder.name for folder in parallel.step_folders(root)]


def test_a_save_needs_no_listing_of_what_others_wrote(on_ranks, tmp_path):
    saved = on_ranks(2, save_where_listings_lag, config(pp=2), tmp_path)
    assert saved == [["step_000001", "step_000002"]] * 2


def export_measured(root, file_bytes):
    """Export a run in files of this size; return how much memory that took at most."""
    writer = parallel.save_hf.__wrapped__
    with mock.patch.object(writer, "__defaults__", (None, file_bytes, None)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        export(ExportConfig(root, root / f"out-{file_bytes}", "bf16"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def save_a_wide_run(root):
    """Save a run of 100 MB in bf16; return the number of its parameters."""
    model = dataclasses.replace(TINY, dim=512, ffn_dim=4096, n_layers=10)
    cfg = dataclasses.replace(config(), model=model)
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), cfg.micro_batch, seed=1)
    save_as_run(cfg, runner, root)
    return sum(p.numel() for p in runner.params().values())


@pytest.mark.slow
def test_an_export_holds_one_file_at_a_time(on_ranks, tmp_path):
    (n,) = on_ranks(1, save_a_wide_run, tmp_path)
    assert 2 * n > 80e6
    grown, largest = [], []
    for file_bytes in (20_000_000, 60_000_000):
        grown += on_ranks(1, export_measured, tmp_path, file_bytes)
        files = (tmp_path / f"out-{file_bytes}").glob("*.safetensors")
        largest.append(max(file.stat().st_size for file in files))
    # a file and, while it is read, a tensor of it; torch and the process group take the rest
    assert grown[1] - grown[0] < 2 * (largest[1] - largest[0])
    assert grown[0] < 2 * n  # less than the model
