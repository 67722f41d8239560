"""One model, any mesh: pipeline × replicated × sharded data × tensor parallelism, laid over an
untouched model.py.

The report's layout (section 2.3): 8-way tensor, 12-way interleaved pipeline, up to 64-way data
parallelism with a distributed optimizer. Callers see `Runner.step(micro_batches, loss_fn)` and the
same numbers on every mesh.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import (
    IGNORE,
    ModelConfig,
    Nemotron,
    config_from_hf,
    hf_config,
    hf_name,
    init_weights,
    whole,
)

log = logging.getLogger("nemotron4")

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
Batch = dict[str, Any]
LossFn = Callable[[Tensor, dict[str, Tensor]], Tensor]


# ---- the mesh ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeshConfig:
    """How a run is laid over its processes, and in which numbers it computes."""

    dp_replicate: int = 1
    """Copies of the sharded model (hybrid sharding); parameters, gradients and optimizer are
    sharded over the other processes, which need no flag."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """What matrices are multiplied in. Master weights, norms' statistics, softmax and loss are fp32
    either way."""

    def shape(self, world: int) -> dict[str, int]:
        """Axis → size; ValueError where the processes cannot be divided so."""
        if self.dp_replicate < 1 or world % self.dp_replicate:
            raise ValueError(
                f"dp_replicate={self.dp_replicate} does not divide the {world} processes: use "
                f"a divisor of {world}"
            )
        return {
            "pp": 1,
            "dp_replicate": self.dp_replicate,
            "dp_shard": world // self.dp_replicate,
            "tp": 1,
        }

    def check(self, world: int, batch: int, micro_batch: int) -> None:
        """ValueError, naming both numbers, for what cannot run; needs no process group."""
        shape = self.shape(world)
        dp = shape["dp_replicate"] * shape["dp_shard"]
        if batch < 1 or micro_batch < 1:
            raise ValueError(f"batch={batch}, micro_batch={micro_batch}: both must be at least 1")
        if batch % dp:
            raise ValueError(
                f"batch={batch} sequences do not divide among {dp} data-parallel processes: "
                f"use a multiple of {dp}"
            )
        if batch // dp % micro_batch:
            raise ValueError(
                f"micro_batch={micro_batch} does not divide the {batch // dp} sequences of "
                f"each data-parallel process "
                f"(batch={batch} over {dp}): use a divisor of {batch // dp}"
            )


# bf16 dense peak, FLOP/s, from NVIDIA's data sheets; H100 SXM is the report's 989e12. First match
# on the device's name.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}


def peak_flops(device: torch.device) -> float | None:
    """None for a device that the table does not know: better no MFU than a wrong one (torchtitan's
    helper assumes an A100)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for kind, peak in PEAK_FLOPS.items() if kind in name), None)


def world_size() -> int:
    """Processes of this job: torchrun's word for it, one without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def init_mesh(cfg: MeshConfig) -> DeviceMesh:
    """Join the job (or start a job of one) and name its axes; every axis is there, of size 1 where
    unused."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device, tuple(cfg.shape(world_size()).values()), mesh_dim_names=AXES)


def shut_down() -> None:
    """Leave together: without the barrier a gloo process may abort at exit. Not for the failing
    path, where it would hang."""
    dist.barrier()
    dist.destroy_process_group()


# ---- token log-probabilities ---------------------------------------------------------------------


def fp32_logits(h: Tensor, weight: Tensor) -> Tensor:
    """h (n, D) · weightᵀ (D, V) with fp32 results: bf16 logits would cost 0.14 nat on a 256-token
    answer."""
    if h.dtype == torch.bfloat16 and h.is_cuda:
        return torch.mm(h, weight.t(), out_dtype=torch.float32)
    fp = torch.promote_types(h.dtype, torch.float32)
    return F.linear(h.to(fp), weight.to(fp))


class TokenLogProbs(torch.autograd.Function):
    """log softmax(h Wᵀ)[target], fp32, a chunk of tokens at a time: the (N, V) logits never exist,
    backward redoes them."""

    CHUNK = 1 << 25  # logits alive at once

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """h (..., D), weight (V, D), targets (...) → (...), zero where the target is IGNORE."""
        shape, h, targets = targets.shape, h.flatten(0, -2), targets.flatten()
        ctx.chunk = max(1, TokenLogProbs.CHUNK // len(weight))
        norms, picked = [], []
        for hc, tc in zip(h.split(ctx.chunk), targets.split(ctx.chunk), strict=True):
            logits = fp32_logits(hc, weight)
            norms.append(logits.logsumexp(-1))
            picked.append(logits.gather(-1, tc.clamp(min=0)[:, None])[:, 0])
        norm = torch.cat(norms)
        ctx.save_for_backward(h, weight, targets, norm)
        return (
            (torch.cat(picked) - norm).masked_fill(targets == IGNORE, 0.0).view(shape).clone()
        )  # FSDP wants no view

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        h, weight, targets, norm = ctx.saved_tensors
        shape, grad = (*grad.shape, h.shape[-1]), grad.flatten().masked_fill(targets == IGNORE, 0.0)
        dh, dw = torch.empty_like(h), torch.zeros_like(weight, dtype=norm.dtype)
        for at in range(0, len(h), ctx.chunk):
            part = slice(at, at + ctx.chunk)
            d = (
                fp32_logits(h[part], weight).sub_(norm[part, None]).exp_().neg_()
            )  # d logp_t / d logits = onehot - softmax
            d.scatter_add_(1, targets[part].clamp(min=0)[:, None], torch.ones_like(d[:, :1]))
            d = (d * grad[part, None]).to(h.dtype)
            dh[part] = d @ weight
            dw += d.t() @ h[part]
        return dh.view(shape), dw.to(weight.dtype), None


def head_forward(head: nn.Module, h: Tensor, targets: Tensor | None = None) -> Tensor:
    """model.Head.forward without the (B, T, V) tensor."""
    if targets is None:
        return F.linear(h, head.weight)
    return TokenLogProbs.apply(h, head.weight, targets)


# ---- building a rank's share ---------------------------------------------------------------------


class Stage(nn.Module):
    """One rank's share of the model, called with a micro-batch's number; it looks the batch up by
    it."""

    def __init__(self, model: Nemotron, micro: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.model = model
        self.micro = micro

    def forward(self, i: Tensor | int) -> Tensor:
        batch = self.micro[int(i)]
        more = {key: batch[key] for key in ("positions", "documents", "targets") if key in batch}
        return self.model(batch["tokens"], **more)


def shard_params(stage: Stage, mesh: DeviceMesh, cfg: MeshConfig) -> None:
    """FSDP2, a unit per block and one for the rest. Gradients are summed: the loss is already
    divided by a global count."""
    param_dtype = torch.bfloat16 if cfg.dtype == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for module in (*stage.model.blocks.values(), stage):
        fully_shard(module, mesh=mesh["dp_replicate", "dp_shard"], mp_policy=policy)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum


def local_part(p: Tensor) -> tuple[Tensor, list[Tensor]]:
    """This rank's piece of a parameter, and which indices along each of the whole parameter's
    dimensions it holds."""
    if not isinstance(p, DTensor):
        return whole(p)
    index = [torch.arange(n, device=p.device) for n in p.shape]
    cuts = zip(
        p.device_mesh.mesh_dim_names, p.placements, p.device_mesh.get_coordinate(), strict=True
    )
    for axis, placement, coordinate in sorted(
        cuts, key=lambda cut: cut[0] != "tp"
    ):  # FSDP cut what tp had cut
        if placement.is_shard():
            pieces = index[placement.dim].chunk(p.device_mesh[axis].size())
            index[placement.dim] = pieces[coordinate] if coordinate < len(pieces) else pieces[0][:0]
    return p.to_local(), index


class Runner:
    """Forward and backward over a list of micro-batches, on any mesh."""

    def __init__(self, model: ModelConfig, cfg: MeshConfig, mesh: DeviceMesh, seed: int) -> None:
        """Builds on the meta device, then straight into shards: no rank ever holds the whole
        model."""
        self.mesh, self.device = mesh, torch.device(mesh.device_type)
        self.micro: list[dict[str, Tensor]] = []
        with torch.device("meta"):
            self.model = Nemotron(model)
        if not model.n_attributes:
            self.model.head.forward = partial(head_forward, self.model.head)
        self.stage = Stage(self.model, self.micro)
        shard_params(self.stage, mesh, cfg)
        self.stage.to_empty(device=self.device)
        init_weights(self.model, seed, local_part)
        self.dp = mesh["dp_replicate"].size() * mesh["dp_shard"].size()
        self.dp_rank = (
            mesh["dp_replicate"].get_local_rank() * mesh["dp_shard"].size()
            + mesh["dp_shard"].get_local_rank()
        )

    def params(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def reduce(self, x: Tensor, *axes: str) -> Tensor:
        """Sum over the named axes, in place."""
        for axis in axes:
            if self.mesh[axis].size() > 1:
                dist.all_reduce(x, group=self.mesh[axis].get_group())
        return x

    def load(self, batches: list[Batch]) -> Tensor:
        """Micro-batches to the device; returns the global count that the loss is divided by (rule 6
        of the design)."""
        move = lambda v: torch.as_tensor(v).to(self.device, non_blocking=True)  # noqa: E731
        self.micro[:] = [{k: move(v) for k, v in b.items() if k != "count"} for b in batches]
        count = torch.tensor(
            float(sum(b["count"] for b in batches)), dtype=torch.float64, device=self.device
        )
        return self.reduce(count, "dp_replicate", "dp_shard")

    def step(self, batches: list[Batch], loss_fn: LossFn) -> Tensor:
        """Forward and backward of this rank's micro-batches; returns the global loss, the same
        number on every rank.

        loss_fn(output, batch) → the *sum* over the micro-batch; each batch carries its own `count`.
        """
        count = self.load(batches)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i in range(len(batches)):
            self.stage.set_requires_gradient_sync(i == len(batches) - 1)
            loss = loss_fn(self.stage(i), self.micro[i]) / count
            loss.backward()
            total += loss.detach()
        return self.reduce(total, "dp_replicate", "dp_shard", "pp")

    @torch.no_grad()
    def eval(self, batches: list[Batch], loss_fn: LossFn) -> Tensor:
        """The global loss of these micro-batches, forward alone."""
        count = self.load(batches)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i in range(len(batches)):
            total += loss_fn(self.stage(i), self.micro[i]) / count
        self.stage.reshard()  # no backward did; gathered parameters are not the optimizer's
        return self.reduce(total, "dp_replicate", "dp_shard", "pp")

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """The gradient's global L2 norm, then gradients scaled down to max_norm where it is
        larger."""
        # torchtitan's clip_grad_norm_ warns of (_NormPartial, _NormPartial) on a 2-D mesh; squares
        # summed here do not
        grads = [p.grad.to_local() for p in self.params().values() if p.grad is not None]
        squares = sum(g.double().square().sum() for g in grads)
        norm = self.reduce(squares, "dp_shard", "tp", "pp").sqrt()
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0).float())
        return norm


# ---- checkpoints ---------------------------------------------------------------------------------


def step_folders(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first: what is still being written has another name."""
    return sorted(
        p
        for p in root.glob("step_*")
        if re.fullmatch(r"step_\d+", p.name) and (p / "state.json").exists()
    )


def save_checkpoint(
    root: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int
) -> None:
    """Write aside, then rename, so that a reader sees a whole checkpoint or none; keep the newest
    `keep`.

    On torch.distributed.checkpoint directly: torchtitan's CheckpointManager writes in place, so a
    kill during a save leaves a folder that looks like a checkpoint.
    """
    folder = root / f"step_{step:06d}"
    partial_folder = folder.with_suffix(".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
    dist.barrier()
    dcp.save(tensors, checkpoint_id=str(partial_folder))
    if dist.get_rank() == 0:
        (partial_folder / "state.json").write_text(json.dumps({"step": step, **state}))
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.rename(folder)
        for old in step_folders(root)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fill the tensors in place from a checkpoint of any mesh; every name must be there. Returns
    its state.json."""
    dcp.load(tensors, checkpoint_id=str(folder))
    return json.loads((folder / "state.json").read_text())


# ---- Hugging Face folders ------------------------------------------------------------------------


def hf_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, lazy slice) of every tensor in the folder's safetensors files."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no .safetensors file in it")
    for file in files:
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118  (safe_open is not a mapping)
                yield name, f.get_slice(name)


@torch.no_grad()
def load_hf(folder: str | Path, dtype: torch.dtype | None = None) -> Nemotron:
    """A Hugging Face Nemotron folder (config.json + safetensors) → Nemotron, strictly; dtype None
    keeps the file's."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: no config.json: not a Hugging Face model folder")
    cfg = config_from_hf(json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        model = Nemotron(cfg)
    wanted = {hf_name(name, cfg): name for name in model.state_dict()}
    found, state, strange = set(), {}, []
    for name, lazy in hf_tensors(folder):
        if name.endswith("rotary_emb.inv_freq"):  # a buffer that old transformers versions wrote
            continue
        if name not in wanted:
            strange.append(name)
            continue
        p = model.get_parameter(wanted[name])
        if tuple(lazy.get_shape()) != tuple(p.shape):
            raise ValueError(
                f"{folder}: {name} is {tuple(lazy.get_shape())}, config.json makes it "
                f"{tuple(p.shape)}"
            )
        tensor = lazy[:]
        state[wanted[name]] = tensor.to(dtype) if dtype else tensor
        found.add(name)
    if strange or found != set(wanted):
        missing = sorted(set(wanted) - found)
        raise ValueError(
            f"{folder} is not this model: missing {missing[:5]}, unknown {sorted(strange)[:5]}"
        )
    model.load_state_dict(state, assign=True)
    return model


def save_hf(model: Nemotron, folder: str | Path) -> None:
    """Write a folder that transformers opens as NemotronForCausalLM."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        hf_name(name, model.cfg): p.detach().contiguous() for name, p in model.named_parameters()
    }
    config = hf_config(model.cfg) | {"dtype": str(model.norm.weight.dtype).removeprefix("torch.")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
