"""One model, any mesh: pipeline × replicated × sharded data × tensor parallelism, laid over an
untouched model.py.

The report's layout (section 2.3): 8-way tensor, 12-way interleaved pipeline, up to 64-way data
parallelism with a distributed optimizer. Callers see `Runner.step(micro_batches, loss_fn)` and the
same numbers on every mesh.
"""

import difflib
import json
import logging
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate, product
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from model import (
    IGNORE,
    SHAPES,
    Head,
    ModelConfig,
    Nemotron,
    config_from_hf,
    count_params,
    flops_per_token,
    hf_config,
    hf_name,
    init_weights,
    rope_angles,
    whole,
)

log = logging.getLogger("nemotron4")

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
Batch = dict[str, Any]
LossFn = Callable[[Tensor, dict[str, Tensor]], Tensor]


# ---- the mesh ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeshConfig:
    """How a run is laid over its processes, and how they compute. Processes that no axis takes
    shard parameters, gradients and optimizer among them (dp_shard)."""

    tp: int = 1
    """Tensor (and sequence) parallel: heads, MLP, vocabulary and the residual's tokens divided."""
    pp: int = 1
    """Pipeline parallel: layers divided."""
    vp: int = 1
    """Virtual stages of each pipeline rank (interleaving)."""
    dp_replicate: int = 1
    """Copies of the sharded model (hybrid sharding)."""
    schedule: Literal["1f1b", "zero_bubble", "zbv"] = "1f1b"
    """Of the pipeline: 1F1B (interleaved where vp > 1), interleaved zero-bubble, or its V shape."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again: nothing, all but matrix products and attention, every block."""
    compile: bool = False
    """torch.compile each block."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """What matrices are multiplied in. Master weights, norms' statistics, softmax and loss are fp32
    either way."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """What gradients are summed in over data-parallel processes."""
    reshard: Literal["auto", "always", "never"] = "auto"
    """Free gathered parameters after a block's forward; auto: unless there is a pipeline."""

    def shape(self, world: int) -> dict[str, int]:
        """Axis → size, in the order of AXES."""
        rest = self.pp * self.dp_replicate * self.tp
        if min(self.pp, self.vp, self.dp_replicate, self.tp) < 1 or world % rest:
            raise ValueError(
                f"pp={self.pp} x dp_replicate={self.dp_replicate} x tp={self.tp} = {rest} does not "
                f"divide the {world} processes: start a multiple of {rest}"
            )
        return dict(zip(AXES, (self.pp, self.dp_replicate, world // rest, self.tp), strict=True))

    def check(self, model: ModelConfig, world: int, batch: int, micro_batch: int) -> None:
        """ValueError, naming the numbers and the rule, for what cannot run; needs no processes."""
        shape = self.shape(world)
        for name in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "seq_len"):
            if (n := getattr(model, name)) % self.tp:
                raise ValueError(f"tp={self.tp} does not divide {name}={n}: use a divisor of {n}")
        if self.pp * self.vp > model.n_layers:
            raise ValueError(
                f"pp={self.pp} x vp={self.vp} = {self.pp * self.vp} stages, but only n_layers="
                f"{model.n_layers}: each stage needs a layer"
            )
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
                f"micro_batch={micro_batch} does not divide the {batch // dp} sequences of each "
                f"data-parallel process (batch={batch} over {dp}): use a divisor of {batch // dp}"
            )
        self.check_pipeline(batch // dp // micro_batch)

    def check_pipeline(self, n_micro: int) -> None:
        """The rules of torch's pipeline schedules."""
        zero_bubble = self.schedule != "1f1b"
        if self.pp == 1:
            if self.vp > 1 or zero_bubble:
                raise ValueError(
                    f"vp={self.vp}, schedule={self.schedule} with pp=1: they belong to a pipeline"
                )
            return
        if n_micro < self.pp:
            raise ValueError(
                f"pp={self.pp} needs at least as many micro-batches, but each data-parallel "
                f"process has {n_micro}: raise batch or lower micro_batch"
            )
        rounds = max(1, n_micro // self.pp)
        if (self.vp > 1 or zero_bubble) and n_micro % rounds:
            raise ValueError(
                f"{n_micro} micro-batches are not a multiple of their {rounds} rounds (n_micro // "
                f"pp={self.pp}), as interleaved schedules need: use a multiple of {self.pp}"
            )
        if self.schedule == "zbv" and self.vp != 2:
            raise ValueError(f"schedule=zbv has two stages per rank, but vp={self.vp}: set vp=2")
        if zero_bubble and (self.compile or self.recompute == "selective"):
            raise ValueError(
                f"schedule={self.schedule} splits the backward pass, which torch cannot do with "
                f"compile={self.compile}, recompute={self.recompute}: use 1f1b, or none of the two"
            )

    def stages_of(self, rank: int) -> list[int]:
        """The pipeline rank's stages: looped, or for zbv a V."""
        if self.schedule == "zbv":
            return [rank, 2 * self.pp - 1 - rank]
        return list(range(rank, self.pp * self.vp, self.pp))


def split_layers(cfg: ModelConfig, n_stages: int) -> list[range]:
    """Layers of each stage: equal where they divide, as in the report; else a layer at a time goes
    to the stage with the least work, the head counted as work (the embedding's look-up is none)."""
    head = 6 * (cfg.n_attributes or cfg.vocab_size) * cfg.dim
    work = [0.0] * (n_stages - 1) + [
        head / (flops_per_token(cfg) - head) * cfg.n_layers
    ]  # in layers
    counts = [cfg.n_layers // n_stages if cfg.n_layers % n_stages == 0 else 1] * n_stages
    while sum(counts) < cfg.n_layers:
        least = min(range(n_stages), key=lambda s: (work[s] + counts[s], -s))
        counts[least] += 1
    ends = list(accumulate(counts))
    return [range(end - n, end) for n, end in zip(counts, ends, strict=True)]


@dataclass(frozen=True)
class Gpu:
    """Per GPU: bf16 dense FLOP/s, bytes of memory, bytes/s of memory, of NVLink and of the network
    (each way)."""

    flops: float
    memory: float
    hbm: float
    nvlink: float
    network: float = 50e9  # 8 x 400 Gb/s a node, the report's section 2.3


# NVIDIA's data sheets. The first key that a device's name holds counts; H100 is the SXM of the
# report.
GPUS = {
    "B200": Gpu(2250e12, 180e9, 8.0e12, 900e9),
    "H200": Gpu(989e12, 141e9, 4.8e12, 450e9),
    "H100 NVL": Gpu(835e12, 94e9, 3.9e12, 300e9),
    "H100 PCIe": Gpu(756e12, 80e9, 2.0e12, 300e9),
    "H100": Gpu(989e12, 80e9, 3.35e12, 450e9),
    "A100": Gpu(312e12, 80e9, 2.039e12, 300e9, 25e9),
}


def peak_flops(device: torch.device) -> float | None:
    """None for a device that the table does not know: better no MFU than a wrong one (torchtitan's
    helper assumes an A100)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((gpu.flops for kind, gpu in GPUS.items() if kind in name), None)


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
        alone = (
            {} if "WORLD_SIZE" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        )
        dist.init_process_group(backend, **alone)
    return init_device_mesh(device, tuple(cfg.shape(world_size()).values()), mesh_dim_names=AXES)


def shut_down() -> None:
    """Leave together: without the barrier a gloo process may abort at exit. Not for the failing
    path, where it would hang."""
    dist.barrier()
    dist.destroy_process_group()


# ---- token log-probabilities ---------------------------------------------------------------------


def fp32_logits(h: Tensor, weight: Tensor) -> Tensor:
    """h (n, D) · weightᵀ (D, V), fp32: bf16 logits would cost 0.14 nat on a 256-token answer."""
    if h.dtype == torch.bfloat16 and h.is_cuda:
        return torch.mm(h, weight.t(), out_dtype=torch.float32)
    fp = torch.promote_types(h.dtype, torch.float32)
    return F.linear(h.to(fp), weight.to(fp))


class TokenLogProbs(torch.autograd.Function):
    """log softmax(h Wᵀ)[target], fp32, a chunk of tokens at a time: the (N, V) logits never exist,
    backward redoes them. Under tensor parallelism W is this rank's rows of the vocabulary."""

    CHUNK = 1 << 25  # logits alive at once

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, tp: DeviceMesh | None
    ) -> Tensor:
        """h (..., D), weight (V, D), targets (...) → (...), zero where the target is IGNORE."""
        shape, h, targets = targets.shape, h.flatten(0, -2), targets.flatten()
        group = tp.get_group() if tp is not None else None
        mine = targets - (tp.get_local_rank() * len(weight) if tp is not None else 0)
        here = (mine >= 0) & (mine < len(weight))
        mine = mine.clamp(0, len(weight) - 1)
        ctx.chunk = max(1, TokenLogProbs.CHUNK // len(weight))
        norms, picked = [], []
        for hc, mc in zip(h.split(ctx.chunk), mine.split(ctx.chunk), strict=True):
            logits = fp32_logits(hc, weight)
            norms.append(logits.logsumexp(-1))
            picked.append(logits.gather(-1, mc[:, None])[:, 0])
        norm, logit = torch.cat(norms), torch.cat(picked) * here
        if group is not None:  # log of the ranks' summed exponentials, shifted by their maximum
            top = norm.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group)
            sums = torch.stack([(norm - top).exp(), logit])
            dist.all_reduce(sums, group=group)
            norm, logit = top + sums[0].log(), sums[1]
        ctx.save_for_backward(h, weight, mine, here, targets == IGNORE, norm)
        return (logit - norm).masked_fill(targets == IGNORE, 0.0).view(shape).clone()  # not a view

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Under tensor parallelism the gradient of h is this rank's part of a sum."""
        h, weight, mine, here, ignored, norm = ctx.saved_tensors
        shape = (*grad.shape, h.shape[-1])
        grad = grad.flatten().masked_fill(ignored, 0.0)
        dh, dw = torch.empty_like(h), torch.zeros_like(weight, dtype=norm.dtype)
        for at in range(0, len(h), ctx.chunk):
            part = slice(at, at + ctx.chunk)
            # d log p_target / d logits = onehot - softmax
            d = fp32_logits(h[part], weight).sub_(norm[part, None]).exp_().neg_()
            d.scatter_add_(1, mine[part, None], here[part, None].to(d.dtype))
            d = (d * grad[part, None]).to(h.dtype)
            dh[part] = d @ weight
            dw += d.t() @ h[part]
        return dh.view(shape), dw.to(weight.dtype), None, None


# ---- tensor parallelism --------------------------------------------------------------------------


def head_forward(
    head: nn.Module, tp: DeviceMesh | None, h: Tensor, targets: Tensor | None = None
) -> Tensor:
    """model.Head.forward without the (B, T, V) tensor; h sharded over tokens under tp."""
    if tp is None:
        return (
            F.linear(h, head.weight)
            if targets is None
            else TokenLogProbs.apply(h, head.weight, targets, tp)
        )
    h = h.redistribute(placements=[Replicate()])
    if targets is None:
        return F.linear(h, head.weight).full_tensor()
    # TokenLogProbs returns a partial gradient: summing and re-sharding it is one reduce-scatter
    h = h.to_local(grad_placements=[Partial()])
    return TokenLogProbs.apply(h, head.weight.to_local(), targets, tp)


def reward_head_forward(
    forward: Callable[..., Tensor], h: DTensor, targets: Tensor | None = None
) -> Tensor:
    """model.RewardHead.forward on a state sharded over tokens: the scores of all of them."""
    return forward(h.redistribute(placements=[Replicate()])).to_local()


class HeadParallel(ParallelStyle):
    """A head over the vocabulary's shards; a reward head on every rank."""

    def _apply(self, head: nn.Module, tp: DeviceMesh) -> nn.Module:
        placement = Shard(0) if isinstance(head, Head) else Replicate()
        for name, p in list(head.named_parameters()):
            head.register_parameter(name, nn.Parameter(distribute_tensor(p, tp, [placement])))
        wrapped = (
            partial(head_forward, head, tp)
            if isinstance(head, Head)
            else partial(reward_head_forward, head.forward)
        )
        head.forward = wrapped
        return head


def plan() -> dict[str, ParallelStyle]:
    """Megatron's tensor and sequence parallelism as data: residuals and norms sharded over tokens,
    matrices over heads, ffn or vocabulary. Every parameter is in it, so all share one mesh."""
    gather = partial(PrepareModuleInput, use_local_output=False)
    alone = (None,) * 4  # attention's other arguments are whole on every rank
    return {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "blocks.*.attn_norm": SequenceParallel(),
        "blocks.*.attn": gather(
            input_layouts=(Shard(1), *alone), desired_input_layouts=(Replicate(), *alone)
        ),
        "blocks.*.attn.wq": ColwiseParallel(),
        "blocks.*.attn.wk": ColwiseParallel(),
        "blocks.*.attn.wv": ColwiseParallel(),
        "blocks.*.attn.wo": RowwiseParallel(output_layouts=Shard(1)),
        "blocks.*.mlp_norm": SequenceParallel(),
        "blocks.*.mlp": gather(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "blocks.*.mlp.up": ColwiseParallel(),
        "blocks.*.mlp.down": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": HeadParallel(),
    }


# ---- recompute, compile, data parallelism --------------------------------------------------------


def keep_first_products(n: int) -> Callable[[], Any]:
    """Selective recompute of a branch: keep its first n matrix products and attention's result,
    which are dear, and do norms, gathers and element-wise steps again. The branch's last product,
    back to the residual, is neither kept nor redone: backward does not need its result."""

    def contexts() -> Any:
        seen = {False: 0, True: 0}  # forward, recompute

        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            product = op is torch.ops.aten.mm.default
            seen[ctx.is_recompute] += product
            keep = seen[ctx.is_recompute] <= n if product else "attention" in op.name()
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    return contexts


def recompute_blocks(model: Nemotron, how: str) -> None:
    """In place: torchtitan's FullAC and SelectiveAC wrap the module, which changes its names."""
    again = partial(partial, checkpoint, use_reentrant=False, preserve_rng_state=False)
    for block in model.blocks.values():
        if how == "full":
            block.forward = again(block.forward)
        else:  # keep q, k, v and attention; keep up
            block.attn_branch = again(block.attn_branch, context_fn=keep_first_products(3))
            block.mlp_branch = again(block.mlp_branch, context_fn=keep_first_products(1))


def shard_params(stage: "Stage", mesh: DeviceMesh, cfg: MeshConfig) -> None:
    """FSDP2, a unit per block and one for the rest. Gradients are summed, not averaged: the loss is
    already divided by a global count."""
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    policy = MixedPrecisionPolicy(
        param_dtype=None if cfg.dtype == "fp32" else dtypes[cfg.dtype],
        reduce_dtype=dtypes[cfg.reduce_dtype],
        cast_forward_inputs=False,  # it would round the rotary angles
    )
    reshard = cfg.reshard == "always" or (cfg.reshard == "auto" and cfg.pp == 1)
    for module in (*stage.model.blocks.values(), stage):
        fully_shard(
            module,
            mesh=mesh["dp_replicate", "dp_shard"],
            mp_policy=policy,
            reshard_after_forward=reshard,
        )
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum


class Stage(nn.Module):
    """One stage of the pipeline, or the whole model. What travels between stages is the hidden
    state; beside it each stage is told the micro-batch's number, and looks its tensors up."""

    def __init__(self, model: Nemotron, micro: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.model = model
        self.micro = micro

    def forward(self, x: Tensor | None, i: Tensor | int) -> Tensor:
        """x: the hidden state from the stage before; the first stage takes the batch's tokens."""
        batch = self.micro[int(i)]
        tokens = batch["tokens"]
        positions = batch.get("positions")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        x = tokens if self.model.embed is not None else x
        return self.model(x, positions, batch.get("documents"), targets=batch.get("targets"))


def build_stage(
    cfg: ModelConfig,
    index: int,
    layers: range,
    last: int,
    mesh: DeviceMesh,
    how: MeshConfig,
    micro: list,
) -> Stage:
    """One stage on the meta device: split → tensor parallel → recompute → compile → FSDP."""
    with torch.device("meta"):
        model = Nemotron(cfg)
    model.blocks = nn.ModuleDict({str(i): model.blocks[str(i)] for i in layers})
    if index > 0:
        model.embed = None
    if index < last:
        model.norm = model.head = None
    if how.tp > 1:
        parts = {
            k: style for k, style in plan().items() if getattr(model, k.split(".")[0]) is not None
        }
        parallelize_module(model, mesh["tp"], parts)
    elif isinstance(model.head, Head):
        model.head.forward = partial(head_forward, model.head, None)
    if how.recompute != "none":
        recompute_blocks(model, how.recompute)
    if how.compile:
        if how.tp > 1 and model.embed is not None:
            # an AsyncCollectiveTensor that enters a compiled block loses its gradient, silently
            model.embed.register_forward_hook(lambda module, args, out: out.clone())
        for block in model.blocks.values():
            block.compile()
    stage = Stage(model, micro)
    shard_params(stage, mesh, how)
    return stage


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
        cuts, key=lambda c: c[0] != "tp"
    ):  # FSDP cut what tp left
        if not placement.is_replicate():  # Shard, or what FSDP makes of two cuts of one dimension
            pieces = index[placement.dim].chunk(p.device_mesh[axis].size())
            index[placement.dim] = pieces[coordinate] if coordinate < len(pieces) else pieces[0][:0]
    return p.to_local(), index


class Runner:
    """Forward and backward over a list of micro-batches, on any mesh. Callers never ask whether
    there is a pipeline."""

    def __init__(
        self, model: ModelConfig, cfg: MeshConfig, mesh: DeviceMesh, micro_batch: int, seed: int
    ) -> None:
        """Built on the meta device, then straight into shards: no rank holds the whole model."""
        self.model, self.cfg, self.mesh, self.micro_batch = model, cfg, mesh, micro_batch
        self.device = torch.device(mesh.device_type)
        self.micro: list[dict[str, Tensor]] = []
        self.n_stages = cfg.pp * cfg.vp
        layers = split_layers(model, self.n_stages)
        self.stages = {
            i: build_stage(model, i, layers[i], self.n_stages - 1, mesh, cfg, self.micro)
            for i in cfg.stages_of(mesh["pp"].get_local_rank())
        }
        for stage in self.stages.values():
            stage.to_empty(device=self.device)
            init_weights(stage.model, seed, local_part)
        self.dp = mesh["dp_replicate"].size() * mesh["dp_shard"].size()
        self.dp_rank = (
            mesh["dp_replicate"].get_local_rank() * mesh["dp_shard"].size()
            + mesh["dp_shard"].get_local_rank()
        )
        self.first_of_its_pipeline_rank = self.dp_rank == 0 and mesh["tp"].get_local_rank() == 0
        self.pipeline_stages: list[PipelineStage] = []
        self.schedules: dict[int, Any] = {}

    def params(self) -> dict[str, nn.Parameter]:
        """This rank's parameters, of all its stages, by the whole model's names."""
        return {
            name: p for stage in self.stages.values() for name, p in stage.model.named_parameters()
        }

    def reduce(self, x: Tensor, *axes: str) -> Tensor:
        """Sum over the named axes, in place."""
        for axis in axes:
            if self.mesh[axis].size() > 1:
                dist.all_reduce(x, group=self.mesh[axis].get_group())
        return x

    def load(self, batches: list[Batch]) -> Tensor:
        """Micro-batches to the device; returns the global count that the loss is divided by."""

        def move(batch: Batch) -> dict[str, Tensor]:
            tensors = {k: torch.as_tensor(v) for k, v in batch.items() if k != "count"}
            return {k: v.to(self.device, non_blocking=True) for k, v in tensors.items()}

        self.micro[:] = [move(batch) for batch in batches]
        count = float(sum(batch["count"] for batch in batches))
        count = torch.tensor(count, dtype=torch.float64, device=self.device)
        return self.reduce(count, "dp_replicate", "dp_shard")

    def step(self, batches: list[Batch], loss_fn: LossFn) -> Tensor:
        """Forward and backward of this rank's micro-batches → the global loss, on every rank.

        loss_fn(output, batch) → the *sum* over the micro-batch; each batch carries its `count`.
        """
        count = self.load(batches)
        total = torch.zeros((), dtype=torch.float64, device=self.device)

        def loss_of(out: Tensor, i: Tensor | int) -> Tensor:
            loss = loss_fn(out, self.micro[int(i)]) / count
            total.add_(loss.detach())
            return loss

        if self.n_stages > 1:
            self.schedule_of(len(batches), loss_of)
        else:
            stage = self.stages[0]
            for i in range(len(batches)):
                stage.set_requires_gradient_sync(i == len(batches) - 1)
                loss_of(stage(None, i), i).backward()
        return self.reduce(total, "dp_replicate", "dp_shard", "pp")

    def schedule_of(self, n: int, loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        """One step of torch's pipeline schedule over n micro-batches. It splits tensors alone, so
        the target and an extra argument of every stage are the micro-batches' numbers."""
        kinds = {"zero_bubble": ScheduleInterleavedZeroBubble, "zbv": ScheduleZBVZeroBubble}
        kinds["1f1b"] = ScheduleInterleaved1F1B if self.cfg.vp > 1 else Schedule1F1B
        if n not in self.schedules:
            stages = self.pipeline_stages = self.pipeline_stages or self.make_pipeline_stages()
            kind = kinds[self.cfg.schedule]
            self.schedules[n] = kind(
                stages[0] if kind is Schedule1F1B else stages,
                n,
                loss_fn=lambda out, i: self.loss_of(out, i),
                scale_grads=False,
            )
        self.loss_of = loss_of
        numbers = torch.arange(n)
        first = (numbers,) if 0 in self.stages else ()
        last = {"target": numbers} if self.n_stages - 1 in self.stages else {}
        self.schedules[n].step(*first, i=numbers, **last)

    def make_pipeline_stages(self) -> list[PipelineStage]:
        """Static shapes, so that no first step has to infer them with real traffic."""
        B, T, scores = self.micro_batch, self.model.seq_len, self.model.n_attributes
        dtype = torch.bfloat16 if self.cfg.dtype == "bf16" else torch.float32
        meta = partial(torch.empty, device="meta", requires_grad=True)  # gradients travel back
        hidden = meta(B, T // self.cfg.tp, self.model.dim, dtype=dtype)
        out = meta(B, T, scores) if scores else meta(B, T)
        number = torch.empty(1, dtype=torch.long, device="meta")
        return [
            PipelineStage(
                stage, i, self.n_stages, self.device,
                input_args=(number if i == 0 else hidden,),
                output_args=(out if i == self.n_stages - 1 else hidden,),
                group=self.mesh["pp"].get_group(),
            )
            for i, stage in self.stages.items()
        ]  # fmt: skip

    @torch.no_grad()
    def eval(self, batches: list[Batch], loss_fn: LossFn) -> Tensor:
        """The global loss of these micro-batches, forward alone."""
        count = self.load(batches)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i in range(len(batches)):
            out = self.forward(i)
            if out is not None:
                total += loss_fn(out, self.micro[i]) / count
        for stage in self.stages.values():
            stage.reshard()  # no backward did; gathered parameters are not the optimizer's
        return self.reduce(total, "dp_replicate", "dp_shard", "pp")

    def forward(self, i: int) -> Tensor | None:
        """Micro-batch i through all stages in their order; its output on the last stage's ranks.

        Plain sends, not torch's schedule.eval, which zero-bubble schedules do not have.
        """
        x, group, rank = None, self.mesh["pp"].get_group(), self.mesh["pp"].get_local_rank()
        owner = {s: r for r in range(self.cfg.pp) for s in self.cfg.stages_of(r)}
        for s, stage in sorted(self.stages.items()):
            if s > 0 and owner[s - 1] != rank:
                dtype = torch.bfloat16 if self.cfg.dtype == "bf16" else torch.float32
                B, T = self.micro[i]["tokens"].shape
                x = torch.empty(
                    B, T // self.cfg.tp, self.model.dim, dtype=dtype, device=self.device
                )
                dist.recv(x, group=group, group_src=owner[s - 1])
            x = stage(x, i)
            if s < self.n_stages - 1 and owner[s + 1] != rank:
                dist.send(x.contiguous(), group=group, group_dst=owner[s + 1])
        return x if self.n_stages - 1 in self.stages else None

    def pipeline_rank_of(self) -> dict[str, int]:
        """Every parameter of the whole model → the pipeline rank that holds it."""
        with torch.device("meta"):
            names = [name for name, _ in Nemotron(self.model).named_parameters()]
        layers = split_layers(self.model, self.n_stages)
        stage_of = {str(i): s for s, part in enumerate(layers) for i in part}
        rank_of = {s: r for r in range(self.cfg.pp) for s in self.cfg.stages_of(r)}
        ends = {"embed": 0, "norm": self.n_stages - 1, "head": self.n_stages - 1}
        parts = {name: name.split(".") for name in names}
        return {
            n: rank_of[stage_of[p[1]] if p[0] == "blocks" else ends[p[0]]] for n, p in parts.items()
        }

    @torch.no_grad()
    def load_hf(self, folder: str | Path) -> None:
        """Fill the shards from a Hugging Face folder; each rank reads the slices that it needs."""
        params, theirs = self.params(), read_hf_config(folder)
        for key in (
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "ffn_dim",
            "vocab_size",
            "rope_base",
            "rope_fraction",
            "norm_eps",
            "n_attributes",
        ):
            if (a := getattr(theirs, key)) != (b := getattr(self.model, key)):
                raise ValueError(f"{folder} has {key}={a}, this run {key}={b}: set --model.{key}")
        for name, lazy in hf_slices(Path(folder), self.model, params):
            data, index = local_part(params[name])
            if data.numel():
                data.copy_(lazy[tuple(slice(int(i[0]), int(i[-1]) + 1) for i in index)])

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """The gradient's global L2 norm; then gradients are scaled down to max_norm where it is
        larger."""
        # torchtitan's clip_grad_norm_ warns of (_NormPartial, _NormPartial) on a 2-D mesh
        grads, squares = [], torch.zeros((), dtype=torch.float64, device=self.device)
        for p in self.params().values():
            grads.append(p.grad.to_local())
            copies = (
                self.mesh["tp"].size()
                if "tp" in p.grad.device_mesh.mesh_dim_names
                and p.grad.placements[-1].is_replicate()
                else 1
            )
            squares += grads[-1].double().square().sum() / copies
        norm = self.reduce(squares, "dp_shard", "tp", "pp").sqrt()
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0).float())
        return norm


# ---- checkpoints ---------------------------------------------------------------------------------


def step_folders(root: Path) -> list[Path]:
    """Checkpoints, oldest first: what is still being written has another name."""
    return sorted(p for p in root.glob("step_*") if re.fullmatch(r"step_\d+", p.name))


def checksum(file: Path) -> list[int]:
    """[size, CRC-32]."""
    crc, size = 0, 0
    with file.open("rb") as f:
        while piece := f.read(1 << 22):
            crc, size = zlib.crc32(piece, crc), size + len(piece)
    return [size, crc]


def damage(folder: Path, part: int = 0, of: int = 1) -> str:
    """What is wrong with a checkpoint, looking at every `of`-th file; empty if nothing is."""
    try:
        files = json.loads((folder / "state.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as e:
        return f"state.json: {e}"
    for name in sorted(files)[part::of]:
        if not (folder / name).exists():
            return f"{name} is missing"
        if (found := checksum(folder / name)) != files[name]:
            return f"{name} has [size, CRC] {found}, not {files[name]}"
    return ""


class Checkpoints:
    """A run's checkpoints: written aside, sealed with checksums, then renamed, so that a reader
    sees a whole one or none, and a damaged one is known.

    On torch.distributed.checkpoint directly: torchtitan's CheckpointManager writes in place, so a
    kill during a save leaves a folder that looks like a checkpoint.
    """

    def __init__(self, root: Path, keep: int, background: bool) -> None:
        self.root, self.keep, self.background = root, keep, background
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.group = (
            dist.new_group(backend="gloo") if background else None
        )  # its own: it runs beside
        self.writing: Path | None = None
        self.future: Any = None
        self.state: dict[str, Any] = {}

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint; in the background, return as soon as the tensors are copied."""
        self.finish()
        self.writing = self.root / f"step_{step:06d}.partial"
        self.state = {"step": step, **state}
        if self.rank == 0:
            shutil.rmtree(self.writing, ignore_errors=True)
            self.writing.mkdir(parents=True)
        dist.barrier()
        if self.background:
            options = {"checkpoint_id": str(self.writing), "process_group": self.group}
            self.future = dcp.async_save(tensors, **options)
        else:
            dcp.save(tensors, checkpoint_id=str(self.writing))
            self.finish()

    def poll(self) -> None:
        """Seal what the background has finished; asks nobody, so it may be called at any time."""
        if self.future is not None and self.future.done():
            self.sign()
        if self.writing and self.rank == 0 and len(list(self.writing.glob("sums_*"))) == self.world:
            self.seal()

    def finish(self) -> None:
        """Wait until what is being written is sealed, on every rank."""
        if self.writing is None:
            return
        self.sign()
        dist.barrier()
        if self.rank == 0 and self.writing.exists():
            self.seal()
        dist.barrier()
        self.writing = None

    def sign(self) -> None:
        """Leave the checksums of this rank's files beside them."""
        sums, done = self.writing / f"sums_{self.rank}.json", self.future
        self.future = None
        if done is not None:
            done.result()  # raises what went wrong in the background
        if self.writing.exists() and not sums.exists():
            own = [f for f in self.writing.glob(f"__{self.rank}_*")]
            own += [self.writing / ".metadata"] if self.rank == 0 else []
            sums.with_suffix(".tmp").write_text(json.dumps({f.name: checksum(f) for f in own}))
            sums.with_suffix(".tmp").rename(sums)

    def seal(self) -> None:
        """state.json with everyone's checksums, the rename, and the oldest removed."""
        files = {}
        for sums in sorted(self.writing.glob("sums_*")):
            files |= json.loads(sums.read_text())
            sums.unlink()
        (self.writing / "state.json").write_text(json.dumps({**self.state, "files": files}))
        final = self.writing.with_suffix("")
        self.discard([final] if final.exists() else [])
        self.writing.rename(final)
        self.discard(step_folders(self.root)[: -self.keep])

    def discard(self, folders: list[Path]) -> None:
        for folder in folders:  # half deleted, it must not have a checkpoint's name
            shutil.rmtree(folder.rename(folder.with_suffix(".old")))

    def load(self, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """Fill the tensors in place from the newest checkpoint that is whole, of any mesh; returns
        its state.json, or None where there is none. A damaged one is named, then the one before
        it is taken."""
        folders = step_folders(self.root)
        for folder in reversed(folders):
            found: list[str] = [""] * self.world
            dist.all_gather_object(found, damage(folder, self.rank, self.world))
            if wrong := next(filter(None, found), ""):
                log.warning(f"{folder} is damaged ({wrong}): trying the one before")
                continue
            dcp.load(tensors, checkpoint_id=str(folder))
            return json.loads((folder / "state.json").read_text())
        if folders:
            raise ValueError(f"{self.root}: no checkpoint is whole: remove them to start anew")
        return None


# ---- Hugging Face folders ------------------------------------------------------------------------


def hf_slices(folder: Path, cfg: ModelConfig, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """(our name, lazy slice) of the named tensors of a safetensors folder, whose names and shapes
    must be the whole model's exactly."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Nemotron(cfg).named_parameters()}
    ours = {hf_name(name, cfg): name for name in shapes}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no .safetensors file in it")
    where: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as f:
            names_in = f.keys()
        where |= {name: file for name in names_in if not name.endswith("inv_freq")}
    if where.keys() != ours.keys():
        missing, unknown = (
            sorted(a - b)[:5] for a, b in ((ours.keys(), where.keys()), (where.keys(), ours.keys()))
        )
        raise ValueError(f"{folder} is not this model: missing {missing}, unknown {unknown}")
    names = set(names)
    for file in files:
        with safe_open(file, framework="pt") as f:
            for theirs in (n for n, at in where.items() if at == file and ours[n] in names):
                lazy, name = f.get_slice(theirs), ours[theirs]
                if tuple(lazy.get_shape()) != shapes[name]:
                    shape = tuple(lazy.get_shape())
                    raise ValueError(
                        f"{folder}: {theirs} is {shape}, config.json makes it {shapes[name]}"
                    )
                yield name, lazy


def read_hf_config(folder: str | Path) -> ModelConfig:
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder}: no config.json: not a Hugging Face model folder")
    return config_from_hf(json.loads(path.read_text()))


def load_hf(folder: str | Path, dtype: torch.dtype | None = None) -> Nemotron:
    """A Hugging Face Nemotron folder (config.json + safetensors) → a whole Nemotron, strictly.
    dtype None keeps the file's. To fill a sharded model, see Runner.load_hf."""
    cfg = read_hf_config(folder)
    with torch.device("meta"):
        model = Nemotron(cfg)
    names = [name for name, _ in model.named_parameters()]
    slices = hf_slices(Path(folder), cfg, names)
    model.load_state_dict({name: lazy[:].to(dtype) for name, lazy in slices}, assign=True)
    return model


def save_hf(
    model: "Nemotron | Runner",
    folder: str | Path,
    dtype: torch.dtype | None = None,
    file_bytes: int = 5 << 30,
) -> None:
    """Write a folder that transformers opens, from a whole model or, together, from all ranks of a
    Runner: a file, at most file_bytes of one pipeline rank's tensors, is all that a host holds.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    runner = model if isinstance(model, Runner) else None
    cfg, mine = (
        (runner.model, runner.params()) if runner else (model.cfg, dict(model.named_parameters()))
    )
    dtype = dtype or next(iter(mine.values())).dtype
    with torch.device("meta"):
        sizes = {name: p.numel() * dtype.itemsize for name, p in Nemotron(cfg).named_parameters()}
    owner = runner.pipeline_rank_of() if runner else dict.fromkeys(sizes, 0)
    files: list[list[str]] = []
    for name in sorted(sizes, key=lambda n: owner[n]):
        if (
            not files
            or owner[files[-1][0]] != owner[name]
            or sum(map(sizes.get, files[-1])) + sizes[name] > file_bytes
        ):
            files.append([])
        files[-1].append(name)
    label = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    label = label if len(files) > 1 else ["model.safetensors"]
    for file, names in zip(label, files, strict=True):
        if names[0] in mine:
            whole_tensors = {}
            for name in names:
                p = mine[name].detach()
                p = p.full_tensor() if isinstance(p, DTensor) else p
                if runner is None or runner.first_of_its_pipeline_rank:
                    whole_tensors[hf_name(name, cfg)] = p.to(dtype).cpu().contiguous()
            if whole_tensors:
                save_file(whole_tensors, folder / file, metadata={"format": "pt"})
    if runner is None or dist.get_rank() == 0:
        if len(files) > 1:
            weight_map = {
                hf_name(n, cfg): file
                for file, names in zip(label, files, strict=True)
                for n in names
            }
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        config = hf_config(cfg) | {"dtype": str(dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    if runner is not None:
        dist.barrier()


# ---- the dry run ---------------------------------------------------------------------------------

# Shares of the data sheets' rates that real work reaches. Assumed, not measured: no GPU has run
# this code yet, and they are not fitted to the report's iteration times.
REACHED = {"flops": 0.70, "hbm": 0.80, "nvlink": 0.75, "network": 0.70}

# Report Table 2: GPUs, sequences, seconds an iteration, MFU in percent (tp 8, pp 12, vp 8, dp
# 16..64)
REPORT_ROWS = ((1536, 768, 10.3, 42.4), (3072, 1536, 10.3, 42.3), (6144, 2304, 8.0, 41.0))


@dataclass(frozen=True)
class PlanConfig:
    """What a layout needs of each GPU, and how long a step should take. Nothing is trained: the
    model is built by the training code itself, on meta tensors, in a process group that is not
    there."""

    shape: tyro.conf.Positional[str] = "nemotron4-340b"
    """A name of model.SHAPES."""
    gpus: int = 6144
    gpu: str = "H100"
    """A kind of GPU: B200, H200, H100, A100 ..."""
    batch: int = 2304
    """Sequences per step."""
    micro_batch: int = 1
    mesh: MeshConfig = MeshConfig(tp=8, pp=12, vp=8, recompute="selective")
    """By default the report's layout."""
    report: bool = False
    """The three rows of the report's Table 2 beside what is predicted for them."""
    search: int = 0
    """List this many meshes that fit the GPUs, fastest first."""
    serve: bool = False
    """Weights, KV cache and the bandwidth ceiling of decoding on these GPUs."""

    def __post_init__(self) -> None:
        for what, name, table in (("shape", self.shape, SHAPES), ("gpu", self.gpu, GPUS)):
            if name not in table:
                close = difflib.get_close_matches(name, table, n=1, cutoff=0.3) or list(table)
                raise ValueError(f"no {what} {name!r}: did you mean {', '.join(close)}?")


@contextmanager
def imagined_mesh(how: MeshConfig, world: int, rank: int) -> Iterator[DeviceMesh]:
    """The mesh as one rank of a job of any size would see it. A private module of torch, kept to
    the dry run."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield init_device_mesh("cpu", tuple(how.shape(world).values()), mesh_dim_names=AXES)
    finally:
        dist.destroy_process_group()


def flash_on_meta(q: Tensor, k: Tensor, v: Tensor, visible: None) -> Tensor:
    """What a flash kernel allocates; on meta tensors SDPA would pick the (T, T) path."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(q, k, v, 0.0, True)[0].transpose(1, 2)


@cache
def activation_bytes(cfg: ModelConfig, tp: int, micro_batch: int, recompute: str) -> int:
    """What one block keeps of one micro-batch until its backward: run on meta tensors, and
    counted."""
    how = MeshConfig(tp=tp)
    with imagined_mesh(how, tp, 0) as mesh, patch("model.attend", flash_on_meta):
        with torch.device("meta"):
            model = Nemotron(replace(cfg, n_layers=1)).to(torch.bfloat16)
            positions = torch.zeros(micro_batch, cfg.seq_len, dtype=torch.long)
            hidden = (micro_batch, cfg.seq_len // tp, cfg.dim)
            x = torch.empty(hidden, dtype=torch.bfloat16, requires_grad=True)
        if tp > 1:
            parallelize_module(model, mesh["tp"], plan())
        if recompute != "none":
            recompute_blocks(model, recompute)
        tracker = MemTracker()
        tracker.track_external(model, x)
        with tracker:
            out = model.blocks["0"](x, rope_angles(cfg, positions), None, positions, None)
            kept = tracker.get_tracker_snapshot("current")[torch.device("meta")]
        del out
    return sum(n for kind, n in kept.items() if "ACT" in str(kind))


def rank_params(cfg: ModelConfig, how: MeshConfig, rank: int) -> tuple[int, int]:
    """Parameters of a pipeline rank after the tensor-parallel cut, before FSDP's: (all, the largest
    unit that FSDP gathers at once)."""
    layers = split_layers(cfg, how.pp * how.vp)
    block = cfg.dim * 2 * (cfg.head_dim * (cfg.n_heads + cfg.n_kv_heads) + cfg.ffn_dim)
    block = block // how.tp + 4 * cfg.dim
    stages, ends = how.stages_of(rank), 0
    ends += (0 in stages) * cfg.vocab_size * cfg.dim // how.tp
    if how.pp * how.vp - 1 in stages:
        scores = cfg.n_attributes * (cfg.dim + 1)
        ends += 2 * cfg.dim + (scores or cfg.vocab_size * cfg.dim // how.tp)
    return sum(len(layers[s]) for s in stages) * block + ends, max(block, ends)


def in_flight(how: MeshConfig, rank: int, n_micro: int) -> int:
    """Largest number of (micro-batch, stage) pairs whose activations a rank holds."""
    if how.pp == 1:
        return 1
    if how.schedule == "zbv":
        return min(2 * n_micro, 2 * how.pp)
    if how.vp == 1 and how.schedule == "1f1b":
        return min(n_micro, how.pp - rank)
    warm_up = (how.vp - 1) * min(how.pp, n_micro) + 2 * (how.pp - rank - 1)  # interleaved 1F1B
    return min(n_micro * how.vp, warm_up + 1)


def memory_of(c: PlanConfig, rank: int) -> dict[str, float]:
    """Bytes on a GPU of a pipeline rank, by what they hold."""
    cfg, how, shape = SHAPES[c.shape], c.mesh, c.mesh.shape(c.gpus)
    n_micro = c.batch // (shape["dp_replicate"] * shape["dp_shard"]) // c.micro_batch
    params, unit = rank_params(cfg, how, rank)
    mine = -(-params // shape["dp_shard"])
    width = 2 if how.dtype == "bf16" else 4
    resharded = how.reshard == "always" or (how.reshard == "auto" and how.pp == 1)
    kept = activation_bytes(cfg, how.tp, c.micro_batch, how.recompute)
    layers = [len(part) for part in split_layers(cfg, how.pp * how.vp)]
    stage = max(layers[s] for s in how.stages_of(rank))
    parts = {
        "master weights (fp32)": 4 * mine,
        "optimizer (fp32)": 8 * mine,
        "gradients, sharded (fp32)": 4 * mine,
        "gathered weights": width * (2 * unit if resharded else params),
        "gradients, accumulating (fp32)": 4 * (params if n_micro > 1 else 2 * unit),
        "activations in flight": kept * stage * in_flight(how, rank, n_micro),
        "recomputed block": activation_bytes(cfg, how.tp, c.micro_batch, "none")
        * (how.recompute != "none"),
    }
    if how.pp * how.vp - 1 in how.stages_of(rank):
        logits = min(TokenLogProbs.CHUNK, c.micro_batch * cfg.seq_len * cfg.vocab_size // how.tp)
        states = c.micro_batch * cfg.seq_len * cfg.dim * width
        parts["logits and head gradient"] = (
            10 * logits + 4 * cfg.vocab_size * cfg.dim // how.tp + 2 * states
        )
    return parts


def step_of(c: PlanConfig) -> dict[str, float]:
    """A step's seconds by what they go to, and its wire traffic in bytes per GPU and axis: a
    roofline without overlap. The slowest pipeline rank sets the pace."""
    cfg, how, shape, gpu = SHAPES[c.shape], c.mesh, c.mesh.shape(c.gpus), GPUS[c.gpu]
    B, T, D, tp = c.micro_batch, cfg.seq_len, cfg.dim, how.tp
    n_micro = c.batch // (shape["dp_replicate"] * shape["dp_shard"]) // B
    layers = [len(part) for part in split_layers(cfg, how.pp * how.vp)]
    per_rank = [sum(layers[s] for s in how.stages_of(r)) for r in range(how.pp)]
    last = next(r for r in range(how.pp) if len(layers) - 1 in how.stages_of(r))
    head = 6 * cfg.vocab_size * D
    block = (flops_per_token(cfg) - head) / cfg.n_layers
    again = {"none": 0, "selective": 0, "full": 1 / 3}[how.recompute]
    work = [n * block * (1 + again) + (r == last) * head * 8 / 6 for r, n in enumerate(per_rank)]
    passes = {"none": 3, "selective": 4, "full": 4}[how.recompute]  # backward counts twice
    touched = (52 * D + 8 * cfg.ffn_dim) * B * T / tp * passes  # norms, residuals, squared ReLU
    gathers = {"none": 8, "selective": 10, "full": 12}[how.recompute]  # of (B, T, D) per layer
    wire_tp = gathers * (tp - 1) / tp * B * T * D * 2
    params = max(rank_params(cfg, how, r)[0] for r in range(how.pp))
    shards = shape["dp_shard"]
    wire = {
        "tp": n_micro * max(per_rank) * wire_tp,
        "pp": 2 * n_micro * (how.vp if how.pp > 1 else 0) * B * T * D * 2 / tp,
        "dp": (shards - 1) / shards * params * (2 + (4 if how.reduce_dtype == "fp32" else 2)),
    }
    if how.reshard == "always" or (how.reshard == "auto" and how.pp == 1):
        wire["dp"] += (shards - 1) / shards * params * 2 * (2 * n_micro - 1)  # gathered twice each
    wire["dp"] += (how.dp_replicate > 1) * 2 * 4 * params / shards
    seconds = {
        "matrix products": n_micro * B * T * max(work) / tp / (gpu.flops * REACHED["flops"]),
        "element-wise": n_micro * max(per_rank) * touched / (gpu.hbm * REACHED["hbm"]),
        "tp traffic": wire["tp"] / ((gpu.nvlink if tp <= 8 else gpu.network) * REACHED["nvlink"]),
    }
    seconds["bubble"] = sum(seconds.values()) * (how.pp - 1) / (how.vp * n_micro)
    if how.schedule != "1f1b":
        seconds["bubble"] /= 3  # weight gradients fill two thirds of it at best
    seconds["pp traffic"] = wire["pp"] / (gpu.network * REACHED["network"])
    seconds["dp traffic"] = wire["dp"] / (gpu.network * REACHED["network"])
    seconds["optimizer"] = 28 * params / shards / (gpu.hbm * REACHED["hbm"])
    total = sum(seconds.values())
    mfu = 100 * c.batch * T * flops_per_token(cfg) / (total * c.gpus * gpu.flops)
    return {"seconds": total, "mfu": mfu, **seconds, **{f"wire {k}": v for k, v in wire.items()}}


def built_params(c: PlanConfig, rank: int) -> tuple[int, int, int]:
    """Parameters of a pipeline rank as the training code lays them out: on its first GPU, all of
    the rank's before tensor and data parallelism, and what rank_params says the GPUs of a tp group
    share."""
    cfg, how = SHAPES[c.shape], c.mesh
    with imagined_mesh(how, c.gpus, rank * (c.gpus // how.pp)) as mesh:
        layers, last = split_layers(cfg, how.pp * how.vp), how.pp * how.vp - 1
        stages = [build_stage(cfg, s, layers[s], last, mesh, how, []) for s in how.stages_of(rank)]
        params = [p for stage in stages for p in stage.model.parameters()]
        return (
            sum(p.to_local().numel() for p in params),
            sum(p.numel() for p in params),
            len(params),
        )


def print_plan(c: PlanConfig) -> None:
    """The layout's table: first, middle and last pipeline rank, the wire, the prediction."""
    cfg, how, gpu = SHAPES[c.shape], c.mesh, GPUS[c.gpu]
    how.check(cfg, c.gpus, c.batch, c.micro_batch)
    shape = how.shape(c.gpus)
    log.info(
        f"{c.shape} on {c.gpus:,} x {c.gpu}: " + ", ".join(f"{k} {v}" for k, v in shape.items())
    )
    built = [built_params(c, rank) for rank in range(how.pp)]
    log.info(f"parameters, built stage by stage: {sum(whole for _, whole, _ in built):,}")
    ranks = sorted({0, how.pp // 2, how.pp - 1})
    tables = {rank: memory_of(c, rank) for rank in ranks}
    log.info(f"{'GB on a GPU of pipeline rank':34}" + "".join(f"{rank:>10}" for rank in ranks))
    log.info(
        f"{'parameters on it (millions)':34}"
        + "".join(f"{built[r][0] / 1e6:>10.2f}" for r in ranks)
    )
    for part in sorted({p for t in tables.values() for p in t}, key=list(tables[ranks[-1]]).index):
        row = "".join(f"{tables[r].get(part, 0) / 1e9:>10.2f}" for r in ranks)
        log.info(f"{part:34}{row}")
    peaks = [sum(memory_of(c, rank).values()) for rank in range(how.pp)]
    log.info(f"{'peak':34}" + "".join(f"{peaks[r] / 1e9:>10.2f}" for r in ranks))
    verdict = "fits" if max(peaks) <= gpu.memory else "DOES NOT FIT"
    log.info(
        f"{verdict}: the fullest GPU needs {max(peaks) / 1e9:.1f} GB of {gpu.memory / 1e9:.0f} GB"
    )
    step = step_of(c)
    for key in ("tp", "pp", "dp"):
        log.info(f"on the wire, {key}: {step[f'wire {key}'] / 1e9:.1f} GB per GPU and step")
    dp = shape["dp_replicate"] * shape["dp_shard"]
    bubble = (how.pp - 1) / (how.vp * (c.batch // dp // c.micro_batch))
    log.info(f"bubble (p - 1) / (v m): {100 * bubble:.1f} %")
    names = [k for k in step if k not in ("seconds", "mfu") and not k.startswith("wire")]
    log.info("seconds: " + ", ".join(f"{name} {step[name]:.2f}" for name in names))
    log.info(f"predicted: {step['seconds']:.2f} s an iteration, MFU {step['mfu']:.1f} %")


def print_report(c: PlanConfig) -> None:
    log.info("  GPUs  batch   predicted s   reported s   predicted MFU   reported MFU")
    for gpus, batch, seconds, mfu in REPORT_ROWS:
        step = step_of(replace(c, gpus=gpus, batch=batch))
        log.info(
            f"{gpus:6,} {batch:6,} {step['seconds']:13.2f} {seconds:12.1f} "
            f"{step['mfu']:15.1f} {mfu:14.1f}"
        )


def search(c: PlanConfig) -> list[tuple[float, float, PlanConfig]]:
    """(seconds, bytes, plan) of every mesh of powers and divisors that runs and fits, fastest
    first."""
    cfg, found = SHAPES[c.shape], []
    stages = [n for n in range(1, cfg.n_layers + 1) if cfg.n_layers % n == 0]
    virtual = [(pp, n // pp) for n in stages for pp in stages if n % pp == 0 and (pp > 1 or n == 1)]
    options = product((1, 2, 4, 8), virtual, (1, 2, 4), ("none", "selective", "full"))
    for tp, (pp, vp), micro_batch, recompute in options:
        how = replace(c.mesh, tp=tp, pp=pp, vp=vp, recompute=recompute, schedule="1f1b")
        plan_ = replace(c, mesh=how, micro_batch=micro_batch)
        try:
            how.check(cfg, c.gpus, c.batch, micro_batch)
        except ValueError:
            continue
        peak = max(sum(memory_of(plan_, rank).values()) for rank in (0, pp - 1))
        if peak <= GPUS[c.gpu].memory:
            found.append((step_of(plan_)["seconds"], peak, plan_))
    return sorted(found, key=lambda f: f[0])


def print_search(c: PlanConfig) -> None:
    found = search(c)
    log.info(f"{len(found)} meshes fit {c.gpus:,} x {c.gpu} with batch {c.batch:,}")
    for seconds, peak, p in found[: c.search]:
        m = p.mesh
        log.info(
            f"{seconds:8.2f} s  MFU {step_of(p)['mfu']:4.1f} %  {peak / 1e9:6.1f} GB  tp "
            f"{m.tp} pp {m.pp} "
            f"vp {m.vp} dp {m.shape(c.gpus)['dp_shard']} micro_batch {p.micro_batch} "
            f"recompute {m.recompute}"
        )


def print_serving(c: PlanConfig) -> None:
    """Decoding reads every weight but the input embedding once a step, and each sequence's
    cache."""
    cfg, gpu = SHAPES[c.shape], GPUS[c.gpu]
    embedding, rest = count_params(cfg)
    kv = cfg.n_layers * 2 * cfg.n_kv_heads * cfg.head_dim * 2
    log.info(f"{c.shape} on {c.gpus} x {c.gpu}; KV cache {kv:,} bytes a token (bf16)")
    for name, width, flops in (
        ("bf16", 2, gpu.flops),
        ("fp8 (embedding and head bf16)", 1, 2 * gpu.flops),
    ):
        weights = width * rest + 2 * embedding
        read = weights - embedding
        free = 0.9 * gpu.memory * c.gpus - weights
        log.info(f"{name}: weights {weights / 1e9:.1f} GB, {weights / c.gpus / 1e9:.1f} a GPU")
        if free <= 0:
            log.info(f"  DOES NOT FIT {c.gpus} x {gpu.memory / 1e9:.0f} GB at 90 %")
            continue
        log.info(
            f"  free for KV at 90 %: {free / 1e9:.0f} GB, {int(free // (kv * 4096))} "
            f"sequences of 4,096"
        )
        for batch, context in ((1, 0), (8, 1024), (32, 1024), (64, 2048), (128, 2048)):
            bandwidth = (read + batch * context * kv) / (gpu.hbm * c.gpus)
            compute = 2 * (rest + embedding / 2) * batch / (flops * c.gpus)
            rate = batch / max(bandwidth, compute)
            log.info(f"  ceiling, batch {batch:3} at {context:4} tokens: {rate:7.1f} tokens/s")
    log.info("a pipeline divides the batch-1 ceiling by its stages; no traffic is counted")


def main() -> None:
    log.handlers, log.propagate = [logging.StreamHandler(sys.stdout)], False
    log.setLevel(logging.INFO)
    try:
        if sys.argv[1:2] != ["plan"]:
            raise ValueError(
                "the only command is: parallel.py plan SHAPE; see parallel.py plan --help"
            )
        c = tyro.cli(PlanConfig, args=sys.argv[2:], prog="parallel.py plan")
        if c.report:
            print_report(c)
        elif c.search:
            print_search(c)
        elif c.serve:
            print_serving(c)
        else:
            print_plan(c)
    except ValueError as e:
        sys.exit(f"parallel.py: error: {e}")


if __name__ == "__main__":
    main()
