"""parallel.py: the same numbers on every mesh, and checkpoints that are whole or not there."""

import dataclasses
import json
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from model import IGNORE, ModelConfig, Nemotron, init_weights
from parallel import (
    MeshConfig,
    Runner,
    TokenLogProbs,
    init_mesh,
    load_checkpoint,
    peak_flops,
    save_checkpoint,
    step_folders,
)
from train import lm_loss, make_optimizer, nano, training_state

TINY = ModelConfig(64, 4, 8, 4, 8, 128, vocab_size=96, seq_len=16, init_std=0.1)


def config(**changes):
    mesh = MeshConfig(
        dtype="fp32", **{k: changes.pop(k) for k in ("dp_replicate",) if k in changes}
    )
    base = dict(
        model=TINY, mesh=mesh, batch=8, micro_batch=2, lr=1e-2, min_lr=0.0, steps=3, warmup=0
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
    runner = Runner(cfg.model, cfg.mesh, mesh, seed=7)
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
        x, y = global_batch(step)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE)
        loss.backward()
        out.append((loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        x, y = global_batch(9)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE)
    return out + [(loss.item(), 0.0)]


MESHES = {
    "one": (1, {}),
    "one_micro_batch_8": (1, {"micro_batch": 8}),
    "one_micro_batch_1": (1, {"micro_batch": 1}),
    "shard2": (2, {}),
    "replicate2": (2, {"dp_replicate": 2}),
    "replicate2_shard2": (4, {"dp_replicate": 2}),
    "shard4_micro_batch_1": (4, {"micro_batch": 1}),
}


@pytest.mark.parametrize("name", MESHES)
def test_loss_and_gradient_norm_do_not_depend_on_the_mesh(on_ranks, name):
    n, changes = MESHES[name]
    want = torch.tensor(plain_pytorch(config()))
    for got in on_ranks(n, train_three_steps, config(**changes)):
        assert torch.allclose(torch.tensor(got), want, rtol=1e-5), (got, want)


def weights_sum(cfg):
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), seed=7)
    return {name: p.full_tensor().double().sum().item() for name, p in runner.params().items()}


@pytest.mark.parametrize("n, replicate", [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_initial_weights_are_the_same_on_every_mesh(on_ranks, n, replicate):
    model = Nemotron(TINY)
    init_weights(model, seed=7)
    want = {name: p.double().sum().item() for name, p in model.named_parameters()}
    for got in on_ranks(n, weights_sum, config(dp_replicate=replicate, batch=12)):
        assert got == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("chunk", [1, 97 * 5, 1 << 20])
def test_token_log_probs_and_their_gradients_equal_the_definition(monkeypatch, chunk):
    monkeypatch.setattr(TokenLogProbs, "CHUNK", chunk)
    g = torch.Generator().manual_seed(0)
    h = torch.randn(2, 9, 16, generator=g, dtype=torch.float64, requires_grad=True)
    w = torch.randn(97, 16, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 97, (2, 9), generator=g)
    targets[1, 3:5] = IGNORE
    weight = torch.randn(2, 9, generator=g, dtype=torch.float64)

    def gradients(log_probs):
        return log_probs, *torch.autograd.grad((log_probs * weight).sum(), (h, w))

    got = gradients(TokenLogProbs.apply(h, w, targets))
    logits = (h @ w.t()).flatten(0, 1)
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
        TokenLogProbs.apply(h, w, targets).sum() - exact.sum()
    ).abs() < 1e-3  # bf16 logits: off by 0.1 and more


def bf16_run(cfg):
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), seed=7)
    make_optimizer(cfg, runner)
    dtypes = {p.dtype for p in runner.params().values()}
    seen = set()
    hook = lambda module, args: seen.add(args[0].dtype)  # noqa: E731
    runner.model.blocks["1"].register_forward_pre_hook(hook)
    loss = runner.step(my_batches(cfg, runner, 0), lm_loss).item()
    return dtypes, seen, loss


def test_bf16_runs_keep_fp32_master_weights(on_ranks):
    cfg = dataclasses.replace(config(), mesh=MeshConfig(dtype="bf16"))
    for dtypes, seen, loss in on_ranks(2, bf16_run, cfg):
        assert dtypes == {torch.float32} and seen == {torch.bfloat16}
        assert abs(loss - plain_pytorch(config())[0][0]) < 0.05


def decayed(cfg):
    optimizer = make_optimizer(cfg, Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), seed=0))
    return [
        (g["weight_decay"], sorted({p.ndim for p in g["params"]})) for g in optimizer.param_groups
    ]


def test_norms_and_biases_do_not_decay(on_ranks):
    assert on_ranks(1, decayed, config())[0] == [(0.1, [2]), (0.0, [1])]


def save_on(cfg, root, steps):
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), seed=7)
    optimizer = make_optimizer(cfg, runner)
    runner.step(my_batches(cfg, runner, 0), lm_loss)
    optimizer.step()
    for step in range(1, steps + 1):
        save_checkpoint(
            root, step, training_state(runner, optimizer), {"tokens": step * 10}, keep=2
        )
    return [p.name for p in step_folders(root)], sums(training_state(runner, optimizer))


def load_on(cfg, root):
    runner = Runner(cfg.model, cfg.mesh, init_mesh(cfg.mesh), seed=1)
    optimizer = make_optimizer(cfg, runner)
    state = load_checkpoint(step_folders(root)[-1], training_state(runner, optimizer))
    return state, sums(training_state(runner, optimizer))


def sums(state):
    full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}
    return {k: v.double().sum().item() for k, v in full.items()}


def test_a_checkpoint_moves_between_meshes_and_the_newest_are_kept(on_ranks, tmp_path):
    folders, want = on_ranks(2, save_on, config(), tmp_path, 4)[0]
    assert folders == ["step_000003", "step_000004"]
    for n, replicate in ((1, 1), (4, 2)):
        for state, got in on_ranks(n, load_on, config(dp_replicate=replicate), tmp_path):
            assert state == {"step": 4, "tokens": 40} and got == pytest.approx(want, abs=1e-9)


def test_half_a_checkpoint_is_not_a_checkpoint(tmp_path):
    (tmp_path / "step_000010.partial").mkdir()
    (tmp_path / "step_000020").mkdir()  # no state.json
    (tmp_path / "step_000005").mkdir()
    (tmp_path / "step_000005" / "state.json").write_text(json.dumps({"step": 5}))
    assert [p.name for p in step_folders(tmp_path)] == ["step_000005"]


@pytest.mark.parametrize(
    "world, batch, micro_batch, replicate, words",
    [
        (3, 8, 1, 1, "batch=8 sequences do not divide among 3"),
        (2, 8, 3, 1, "micro_batch=3 does not divide the 4 sequences"),
        (4, 8, 1, 3, "dp_replicate=3 does not divide the 4 processes"),
        (1, 8, 0, 1, "micro_batch=0"),
    ],
)
def test_an_impossible_mesh_is_refused_with_both_numbers(
    world, batch, micro_batch, replicate, words
):
    with pytest.raises(ValueError, match=words):
        MeshConfig(dp_replicate=replicate).check(world, batch, micro_batch)


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
