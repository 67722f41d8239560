"""One model, any mesh: pipeline × replicated × sharded data × tensor parallelism, over model.py.

The report's layout (section 2.3): 8-way tensor, 12-way interleaved pipeline, up to 64-way data
parallelism with a distributed optimizer. Callers see `Runner.step(micro_batches, loss_fn)` and the
same numbers on every mesh.

    python parallel.py plan nemotron4-340b --gpus 6144
    python parallel.py export runs/nano out/hf
"""

import ctypes
import json
import logging
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.pipelining as pipe
import torch.distributed.tensor.parallel as styles
import torch.nn.functional as F
import torch.utils.checkpoint as ac
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from model import (
    IGNORE,
    Head,
    ModelConfig,
    Nemotron,
    all_of,
    config_from_hf,
    count_params,
    flops_per_token,
    freeze,
    hf_config,
    hf_name,
    init_weights,
)

log = logging.getLogger("nemotron4")

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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
    """Of matrix products. Master weights, norms' statistics, softmax and loss are always fp32."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """What gradients are summed in over data-parallel processes."""
    reshard: Literal["auto", "always", "never"] = "auto"
    """Free gathered parameters after a block's forward; auto: unless there is a pipeline."""

    timeout: int = 1800
    """Seconds after which a process that does not answer ends the job."""

    @property
    def n_stages(self) -> int:
        return self.pp * self.vp

    @property
    def reshards(self) -> bool:
        return self.reshard == "always" or (self.reshard == "auto" and self.pp == 1)

    def shape(self, world: int) -> dict[str, int]:
        """Axis → size, in the order of AXES."""
        pp, copies, tp = self.pp, self.dp_replicate, self.tp
        rest = pp * copies * tp
        if min(pp, copies, tp) < 1 or world % rest:
            axes = f"pp={pp} x dp_replicate={copies} x tp={tp} = {rest}"
            rule = f"does not divide the {world} processes: start a multiple of {rest}"
            raise ValueError(f"{axes} {rule}")
        return dict(zip(AXES, (pp, copies, world // rest, tp), strict=True))

    def dp(self, world: int) -> int:
        """Processes that see different sequences."""
        shape = self.shape(world)
        return shape["dp_replicate"] * shape["dp_shard"]

    def stages_of(self, rank: int) -> list[int]:
        """The pipeline rank's stages: looped, or for zbv a V."""
        if self.schedule == "zbv":
            return [rank, 2 * self.pp - 1 - rank]
        return list(range(rank, self.n_stages, self.pp))

    def rank_of(self) -> dict[int, int]:
        """Stage → the pipeline rank that holds it."""
        return {stage: rank for rank in range(self.pp) for stage in self.stages_of(rank)}

    def check(self, model: ModelConfig, world: int, batch: int, micro_batch: int) -> None:
        """ValueError, naming the numbers and the rule, for what cannot run; needs no processes."""
        for broken, message in self.rules(model, world, batch, micro_batch):
            if broken:
                raise ValueError(message)

    def rules(
        self, model: ModelConfig, world: int, batch: int, micro_batch: int
    ) -> Iterator[tuple[bool, str]]:
        """(is it broken?, what to say) of each rule; it relies on those before."""
        pp, vp, tp, dp = self.pp, self.vp, self.tp, self.dp(world)
        for name in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "seq_len"):
            n = getattr(model, name)
            yield n % tp > 0, f"tp={tp} does not divide {name}={n}: use a divisor of {n}"
        text = f"vp={vp}, batch={batch}, micro_batch={micro_batch}: all must be at least 1"
        yield min(vp, batch, micro_batch) < 1, text
        text = f"pp={pp} x vp={vp} = {pp * vp} stages, but only n_layers={model.n_layers}"
        yield pp * vp > model.n_layers, f"{text}: each stage needs a layer"
        text = f"batch={batch} sequences do not divide among {dp} data-parallel processes"
        yield batch % dp > 0, f"{text}: use a multiple of {dp}"
        share = batch // dp
        text = f"micro_batch={micro_batch} does not divide the {share} sequences of each process"
        yield share % micro_batch > 0, f"{text} (batch={batch} over {dp}): use a divisor of {share}"

        # what torch's pipeline schedules ask for
        schedule, plain = self.schedule, self.schedule == "1f1b"
        text = f"vp={vp}, schedule={schedule} with pp=1: they belong to a pipeline"
        yield pp == 1 and (vp > 1 or not plain), text
        n, rounds = share // micro_batch, max(1, share // micro_batch // pp)
        text = f"pp={pp} needs at least as many micro-batches, but each data-parallel process has"
        yield n < pp, f"{text} {n}: raise batch or lower micro_batch"
        text = f"{n} micro-batches are not a multiple of their {rounds} rounds (n // pp={pp})"
        looped = pp > 1 and (vp > 1 or not plain)
        yield looped and n % rounds > 0, f"{text}, which interleaving needs: use those of {pp}"
        text = f"schedule=zbv has two stages per rank, but vp={vp}: set vp=2"
        yield schedule == "zbv" and vp != 2, text
        text = f"schedule={schedule} splits the backward pass, which torch cannot do with"
        text += f" compile={self.compile}, recompute={self.recompute}: use 1f1b, or none of the two"
        yield not plain and (self.compile or self.recompute == "selective"), text


def split_layers(cfg: ModelConfig, n_stages: int) -> list[range]:
    """Layers of each stage: equal where they divide, as in the report. Else a layer at a time goes
    to the stage with the least work, the head counted as work and the embedding's look-up as
    none."""
    head = 6 * (cfg.n_attributes or cfg.vocab_size) * cfg.dim
    head_in_layers = head / (flops_per_token(cfg) - head) * cfg.n_layers
    work = [0.0] * (n_stages - 1) + [head_in_layers]
    counts = [cfg.n_layers // n_stages if cfg.n_layers % n_stages == 0 else 1] * n_stages
    while sum(counts) < cfg.n_layers:
        counts[min(range(n_stages), key=lambda s: (work[s] + counts[s], -s))] += 1
    return [range(end - n, end) for n, end in zip(counts, accumulate(counts), strict=True)]


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 FLOP/s, bytes of memory, and bytes/s of memory, NVLink and network, each way."""

    flops: float
    memory: float
    hbm: float
    nvlink: float
    network: float = 50e9  # 8 x 400 Gb/s a node, the report's section 2.3


# NVIDIA's data sheets. The first key that is part of a device's name counts; H100 is the SXM.
GPUS = {
    "B200": Gpu(2250e12, 180e9, 8.0e12, 900e9),
    "H200": Gpu(989e12, 141e9, 4.8e12, 450e9),
    "H100 NVL": Gpu(835e12, 94e9, 3.9e12, 300e9),
    "H100 PCIe": Gpu(756e12, 80e9, 2.0e12, 300e9),
    # torchtitan's: HBM2e at 500 W, its peak somewhere between the NVL's, taken here, and the SXM's
    "H100 HBM2e": Gpu(835e12, 96e9, 2.4e12, 450e9),
    "H100": Gpu(989e12, 80e9, 3.35e12, 450e9),
    "A100": Gpu(312e12, 80e9, 2.039e12, 300e9, 25e9),
}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s, or None for a device not in the table: better no MFU than a wrong one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((gpu.flops for kind, gpu in GPUS.items() if kind in name), None)


def world_size() -> int:
    """Processes of this job: torchrun's word for it, one without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def keep_freed_memory() -> None:
    """On a CPU, glibc hands a large tensor's memory back to the kernel and gets it again, zeroed
    page by page: a quarter of a step's time. M_MMAP_MAX 0, M_TRIM_THRESHOLD -1: it keeps what it
    has, as torch does on a GPU. Elsewhere than on Linux nothing happens."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0), mallopt(-1, -1)


def init_mesh(cfg: MeshConfig) -> DeviceMesh:
    """Join the job, or start a job of one; every axis is there, of size 1 where unused."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        alone = dict(store=dist.HashStore(), rank=0, world_size=1)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        started = {} if "WORLD_SIZE" in os.environ else alone
        dist.init_process_group(backend, timeout=timedelta(seconds=cfg.timeout), **started)
    mesh = init_device_mesh(device, tuple(cfg.shape(world_size()).values()), mesh_dim_names=AXES)
    for axis in AXES:  # the groups of the axes would start with torch's default
        group = mesh[axis].get_group()
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=cfg.timeout), group)
    return mesh


def shut_down() -> None:
    """Leave together: without the barrier gloo may abort at exit. Hangs on the failing path."""
    dist.barrier()
    dist.destroy_process_group()


# ---- token log-probabilities ---------------------------------------------------------------------


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., I) · weightᵀ (O, I), by what is fastest. On a CPU, F.linear leaves a few fp32 rows to
    one thread: oneDNN divides them, and does many faster; a single row is best as one batched
    product. No gradients."""
    ours = x.dtype == torch.float32 and not x.is_cuda and torch.backends.mkldnn.is_available()
    if torch.compiler.is_compiling() or not ours:
        return F.linear(x, weight)
    threads, (rows, width) = torch.get_num_threads(), weight.shape
    if x.numel() == width and rows % threads == 0:
        # as a transposed row: MKL is eight times slower with strides (1, 1)
        column = x.reshape(1, width).t().expand(threads, width, 1)
        return torch.bmm(weight.view(threads, -1, width), column).view(*x.shape[:-1], rows)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def fp32_logits(h: Tensor, weight: Tensor) -> Tensor:
    """h (n, D) · weightᵀ (D, V), fp32: bf16 logits would cost 0.14 nat on a 256-token answer."""
    if h.dtype == torch.bfloat16 and h.is_cuda:
        return torch.mm(h, weight.t(), out_dtype=torch.float32)
    fp = torch.promote_types(h.dtype, torch.float32)
    return project(h.to(fp), weight.to(fp))


class TokenLogProbs(torch.autograd.Function):
    """log softmax(h Wᵀ)[target], fp32, a chunk of tokens at a time. The (N, V) logits never exist:
    forward leaves the exponentials of the last tokens to backward, in h's precision, as that is
    what its products take; those of the others are computed again. Under tensor parallelism W is
    this rank's rows of the vocabulary."""

    CHUNK = 1 << 23  # fp32 logits alive at once, of FEWEST tokens at least
    KEPT = 1 << 27  # exponentials left to backward
    FEWEST = 256  # fewer make a slow product

    @staticmethod
    def chunks(n: int, V: int) -> tuple[list[slice], int]:
        """(chunks of n tokens, the token from which exponentials are kept)."""
        size = max(TokenLogProbs.FEWEST, TokenLogProbs.CHUNK // V)
        kept_from = max(0, n - max(size, TokenLogProbs.KEPT // V))
        spans = (0, kept_from), (kept_from, n)
        return [slice(i, min(i + size, b)) for a, b in spans for i in range(a, b, size)], kept_from

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, tp: DeviceMesh | None
    ) -> Tensor:
        """h (..., D), weight (V, D), targets (...) → (...), zero where the target is IGNORE."""
        shape, h, targets = targets.shape, h.flatten(0, -2), targets.flatten()
        mine = targets if tp is None else targets - tp.get_local_rank() * len(weight)
        here = (mine >= 0) & (mine < len(weight))
        mine = mine.clamp(0, len(weight) - 1)
        wide = weight if weight.is_cuda else weight.to(torch.promote_types(h.dtype, torch.float32))
        chunks, kept_from = TokenLogProbs.chunks(len(h), len(weight))
        ctx.kept = h.new_empty(len(h) - kept_from, len(weight))
        tops, sums, picked = [], [], []
        for part in chunks:
            logits = fp32_logits(h[part], wide)
            picked.append(logits.gather(-1, mine[part, None])[:, 0])
            tops.append(logits.amax(-1))
            logits.sub_(tops[-1][:, None]).exp_()
            sums.append(logits.sum(-1))
            if part.start >= kept_from:
                ctx.kept[part.start - kept_from : part.stop - kept_from] = logits
        top, total, logit = torch.cat(tops), torch.cat(sums), torch.cat(picked)
        norm, logit = top + total.log(), logit * here
        if tp is not None:  # log of the ranks' summed exponentials, shifted by their maximum
            highest, group = norm.clone(), tp.get_group()
            dist.all_reduce(highest, dist.ReduceOp.MAX, group)
            both = torch.stack([(norm - highest).exp(), logit])
            dist.all_reduce(both, group=group)
            norm, logit = highest + both[0].log(), both[1]
        ignored = targets == IGNORE
        ctx.save_for_backward(h, weight, mine, here, ignored, norm, top)
        # a clone, as a pipeline stage may not return a view
        return (logit - norm).masked_fill(ignored, 0.0).view(shape).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Under tensor parallelism the gradient of h is this rank's part of a sum."""
        h, weight, mine, here, ignored, norm, top = ctx.saved_tensors
        shape = (*grad.shape, h.shape[-1])
        # -d log p_target / d logits = softmax - onehot = scale (e - onehot / scale), e being the
        # exponentials: what varies by token alone is multiplied in after the product, where there
        # is less of it. At exp(-60) nothing of e is left, and 1 / scale is still a number.
        scale = (top - norm).clamp_(min=-60.0).exp_()
        grad = (-grad.flatten().masked_fill(ignored, 0.0) * scale)[:, None]
        onehot = here / scale
        dh, dw = torch.empty_like(h), None
        chunks, kept_from = TokenLogProbs.chunks(len(h), len(weight))
        for part in [slice(kept_from, len(h)), *(c for c in chunks if c.start < kept_from)]:
            if part.start == kept_from and ctx.kept is not None:
                e, ctx.kept = ctx.kept, None
            else:
                e = fp32_logits(h[part], weight).sub_(top[part, None]).exp_().to(h.dtype)
            # e of a likely target is 1, or nearly so: rounded before the subtraction, 0.001 is none
            at_target = e.gather(1, mine[part, None]) - onehot[part, None]
            e.scatter_(1, mine[part, None], at_target.to(e.dtype))
            dh[part] = grad[part] * (e @ weight)
            product = e.t() @ (grad[part] * h[part]).to(h.dtype)
            dw = product if dw is None else dw.to(norm.dtype).add_(product)
        return dh.view(shape), dw.to(weight.dtype), None, None


# ---- tensor parallelism --------------------------------------------------------------------------


def head_forward(
    head: nn.Module, tp: DeviceMesh | None, h: Tensor, targets: Tensor | None = None
) -> Tensor:
    """model.Head.forward without the (B, T, V) tensor; h sharded over tokens under tp."""
    if tp is not None:
        h = h.redistribute(placements=[Replicate()])
    if targets is None:
        logits = F.linear(h, head.weight)
        return logits if tp is None else logits.full_tensor()
    weight = head.weight
    if tp is not None:
        # TokenLogProbs returns a partial gradient: summing and re-sharding it is one reduce-scatter
        h, weight = h.to_local(grad_placements=[Partial()]), weight.to_local()
    return TokenLogProbs.apply(h, weight, targets, tp)


def reward_head_forward(
    forward: Callable[..., Tensor], h: DTensor, targets: Tensor | None = None
) -> Tensor:
    """model.RewardHead.forward on a state sharded over tokens: the scores of all of them."""
    return forward(h.redistribute(placements=[Replicate()])).to_local()


class HeadParallel(styles.ParallelStyle):
    """A head over the vocabulary's shards; a reward head on every rank."""

    def _apply(self, head: nn.Module, tp: DeviceMesh) -> nn.Module:
        lm = isinstance(head, Head)
        for name, p in list(head.named_parameters()):
            shards = distribute_tensor(p, tp, [Shard(0) if lm else Replicate()])
            head.register_parameter(name, nn.Parameter(shards))
        reward = partial(reward_head_forward, head.forward)
        head.forward = partial(head_forward, head, tp) if lm else reward
        return head


def tp_plan() -> dict[str, styles.ParallelStyle]:
    """Megatron's tensor and sequence parallelism as data: module name → style. Residuals and norms
    are sharded over tokens, matrices over heads, ffn or vocabulary. Every parameter is in it, so
    that all share one mesh."""
    tokens, every = Shard(1), Replicate()
    rest = (None,) * 4  # attention's other arguments are whole on every rank
    gather_first = styles.PrepareModuleInput(
        input_layouts=(tokens, *rest), desired_input_layouts=(every, *rest)
    )
    gather = styles.PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(every,))
    column, row = styles.ColwiseParallel(), styles.RowwiseParallel(output_layouts=tokens)
    return {
        "embed": styles.RowwiseParallel(input_layouts=every, output_layouts=tokens),
        "blocks.*.attn_norm": styles.SequenceParallel(),
        "blocks.*.attn": gather_first,
        "blocks.*.attn.wq": column,
        "blocks.*.attn.wk": column,
        "blocks.*.attn.wv": column,
        "blocks.*.attn.wo": row,
        "blocks.*.mlp_norm": styles.SequenceParallel(),
        "blocks.*.mlp": gather,
        "blocks.*.mlp.up": column,
        "blocks.*.mlp.down": row,
        "norm": styles.SequenceParallel(),
        "head": HeadParallel(),
    }


# ---- recompute, compile, data parallelism --------------------------------------------------------


def keep_first_products(n: int) -> Callable[[], Any]:
    """Selective recompute of a branch: keep its first n matrix products and attention's result.
    They are dear; norms, gathers and element-wise steps are done again. The branch's last product,
    back to the residual, is neither kept nor redone: backward does not need its result."""

    def contexts() -> Any:
        seen = {False: 0, True: 0}  # forward, recompute

        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> ac.CheckpointPolicy:
            product = op is torch.ops.aten.mm.default
            seen[ctx.is_recompute] += product
            # torch's kernels are called ..._attention or _varlen_attn, flash-attn's _flash_attn_...
            attention = "attention" in op.name() or "_attn" in op.name()
            keep = seen[ctx.is_recompute] <= n if product else attention
            return ac.CheckpointPolicy.MUST_SAVE if keep else ac.CheckpointPolicy.PREFER_RECOMPUTE

        return ac.create_selective_checkpoint_contexts(policy)

    return contexts


def recompute_blocks(model: Nemotron, how: str) -> None:
    """In place: torchtitan's FullAC and SelectiveAC wrap the module, which changes its names."""
    again = partial(partial, ac.checkpoint, use_reentrant=False, preserve_rng_state=False)
    for block in model.blocks.values():
        if how == "full":
            block.forward = again(block.forward)
        else:  # keep q, k, v and attention; keep up
            block.attn_branch = again(block.attn_branch, context_fn=keep_first_products(3))
            block.mlp_branch = again(block.mlp_branch, context_fn=keep_first_products(1))


def fsdp_units(stage: nn.Module) -> list[FSDPModule]:
    """The blocks and the stage itself: FSDPModule's methods are not recursive."""
    return [module for module in stage.modules() if isinstance(module, FSDPModule)]


def shard_params(stage: "Stage", mesh: DeviceMesh, cfg: MeshConfig) -> None:
    """FSDP2, a unit per block, embedding and head; gradients are summed, not averaged. The loss is
    already divided by a global count."""
    policy = MixedPrecisionPolicy(
        param_dtype=None if cfg.dtype == "fp32" else DTYPES[cfg.dtype],
        reduce_dtype=DTYPES[cfg.reduce_dtype],
        cast_forward_inputs=False,  # it would round the rotary angles
    )
    dp = mesh["dp_replicate", "dp_shard"]
    reshard = cfg.reshards and mesh["dp_shard"].size() > 1  # alone, it would only cast again
    model = stage.model
    last = [model.norm, model.head] if model.head is not None else None
    for unit in (*model.blocks.values(), model.embed, last, stage):
        if unit is not None:  # another pipeline stage's
            fully_shard(unit, mesh=dp, mp_policy=policy, reshard_after_forward=reshard)
    for module in fsdp_units(stage) if dp.size() > 1 else ():  # alone, it would divide by one
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
        tokens, positions = batch["tokens"], batch.get("positions")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        x = tokens if self.model.embed is not None else x
        return self.model(x, positions, batch.get("documents"), targets=batch.get("targets"))


def on_meta(cfg: ModelConfig) -> Nemotron:
    """A whole model that takes no memory."""
    with torch.device("meta"):
        return Nemotron(cfg)


def build_stage(
    cfg: ModelConfig, i: int, part: range, last: int, mesh: DeviceMesh, how: MeshConfig, micro: list
) -> Stage:
    """Stage i of 0..last on meta tensors: split → tensor parallel → recompute → compile → FSDP.
    part: its layers. micro: the list in which it will find its micro-batches."""
    model = on_meta(cfg)
    model.blocks = nn.ModuleDict({str(layer): model.blocks[str(layer)] for layer in part})
    if i > 0:
        model.embed = None
    if i < last:
        model.norm = model.head = None
    if how.tp > 1:
        here = {k: style for k, style in tp_plan().items() if getattr(model, k.split(".")[0])}
        styles.parallelize_module(model, mesh["tp"], here)
        freeze(model)  # the styles make new parameters, all of them trained
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
    """This rank's piece of a parameter, and its indices along each dimension of the whole one."""
    if not isinstance(p, DTensor):
        return all_of(p)
    mesh, index = p.device_mesh, [torch.arange(n, device=p.device) for n in p.shape]
    cuts = zip(mesh.mesh_dim_names, p.placements, mesh.get_coordinate(), strict=True)
    # tp first: FSDP cut what tp left
    for axis, placement, coordinate in sorted(cuts, key=lambda cut: cut[0] != "tp"):
        if not placement.is_replicate():  # Shard, or what FSDP makes of two cuts of one dimension
            pieces = index[placement.dim].chunk(mesh[axis].size())
            index[placement.dim] = pieces[coordinate] if coordinate < len(pieces) else pieces[0][:0]
    return p.to_local(), index


# ---- the runner ----------------------------------------------------------------------------------


class Runner:
    """Forward and backward over a list of micro-batches; callers never ask for the mesh."""

    def __init__(
        self, model: ModelConfig, cfg: MeshConfig, mesh: DeviceMesh, micro_batch: int, seed: int
    ) -> None:
        """Built on the meta device, then straight into shards: no rank holds the whole model."""
        self.model, self.cfg, self.mesh, self.micro_batch = model, cfg, mesh, micro_batch
        self.device = torch.device(mesh.device_type)
        self.micro: list[dict[str, Tensor]] = []
        self.last, layers = cfg.n_stages - 1, split_layers(model, cfg.n_stages)
        self.stages = {
            i: build_stage(model, i, layers[i], self.last, mesh, cfg, self.micro)
            for i in cfg.stages_of(mesh["pp"].get_local_rank())
        }
        for stage in self.stages.values():
            stage.to_empty(device=self.device)
            init_weights(stage.model, seed, local_part)
        replica, shard = mesh["dp_replicate"], mesh["dp_shard"]
        self.dp = replica.size() * shard.size()
        self.dp_rank = replica.get_local_rank() * shard.size() + shard.get_local_rank()
        self.first_of_its_pipeline_rank = self.dp_rank == 0 and mesh["tp"].get_local_rank() == 0
        self.pipeline_stages: list[pipe.PipelineStage] = []
        self.schedules: dict[int, Any] = {}

    def params(self) -> dict[str, nn.Parameter]:
        """This rank's parameters, of all its stages, by the whole model's names."""
        models = [stage.model for stage in self.stages.values()]
        return {name: p for model in models for name, p in model.named_parameters()}

    def trained(self) -> dict[str, nn.Parameter]:
        """Those of them that are not frozen."""
        return {name: p for name, p in self.params().items() if p.requires_grad}

    def reduce(self, x: Tensor, *axes: str) -> Tensor:
        """Sum over the named axes, in place."""
        for axis in axes:
            if self.mesh[axis].size() > 1:
                dist.all_reduce(x, group=self.mesh[axis].get_group())
        return x

    def load(self, batches: list[Batch]) -> tuple[Tensor, Tensor]:
        """Micro-batches to the device → what the loss is divided by, globally, and a zero."""

        def move(batch: Batch) -> dict[str, Tensor]:
            tensors = {k: torch.as_tensor(v) for k, v in batch.items() if k != "count"}
            return {k: v.to(self.device, non_blocking=True) for k, v in tensors.items()}

        self.micro[:] = [move(batch) for batch in batches]
        count = float(sum(batch["count"] for batch in batches))
        count = torch.tensor(count, dtype=torch.float64, device=self.device)
        return self.reduce(count, "dp_replicate", "dp_shard"), torch.zeros_like(count)

    def step(self, batches: list[Batch], loss_fn: LossFn) -> Tensor:
        """Forward and backward of this rank's micro-batches → the global loss, on every rank.
        loss_fn(output, batch) → the *sum* over the micro-batch; each batch carries its `count`."""
        count, total = self.load(batches)

        def loss_of(out: Tensor, i: Tensor | int) -> Tensor:
            loss = loss_fn(out, self.micro[int(i)]) / count
            total.add_(loss.detach())
            return loss

        if self.last > 0:
            self.run_schedule(len(batches), loss_of)
        else:
            stage = self.stages[0]
            for i in range(len(batches)):
                stage.set_requires_gradient_sync(i == len(batches) - 1)
                loss_of(stage(None, i), i).backward()
        return self.reduce(total, "dp_replicate", "dp_shard", "pp")

    def run_schedule(self, n: int, loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        """One step of torch's pipeline schedule over n micro-batches. It splits tensors alone:
        target and an extra argument are the micro-batches' numbers."""
        self.loss_of = loss_of  # the schedule outlives this step's loss
        if n not in self.schedules:
            stages = self.pipeline_stages = self.pipeline_stages or self.make_pipeline_stages()
            kinds = {"zero_bubble": pipe.ScheduleInterleavedZeroBubble}
            kinds |= {"zbv": pipe.ScheduleZBVZeroBubble, "1f1b": pipe.ScheduleInterleaved1F1B}
            loss = lambda out, i: self.loss_of(out, i)  # noqa: E731
            if self.cfg.schedule == "1f1b" and self.cfg.vp == 1:
                schedule = pipe.Schedule1F1B(stages[0], n, loss_fn=loss, scale_grads=False)
            else:
                schedule = kinds[self.cfg.schedule](stages, n, loss_fn=loss, scale_grads=False)
            self.schedules[n] = schedule
        numbers = torch.arange(n)
        first = (numbers,) if 0 in self.stages else ()
        last = {"target": numbers} if self.last in self.stages else {}
        self.schedules[n].step(*first, i=numbers, **last)

    def make_pipeline_stages(self) -> list[pipe.PipelineStage]:
        """Static shapes, so that no first step has to infer them with real traffic."""
        B, T, scores = self.micro_batch, self.model.seq_len, self.model.n_attributes
        meta = partial(torch.empty, device="meta", requires_grad=True)  # gradients travel back
        hidden = meta(B, T // self.cfg.tp, self.model.dim, dtype=DTYPES[self.cfg.dtype])
        out = meta(B, T, scores) if scores else meta(B, T)
        number = torch.empty(1, dtype=torch.long, device="meta")
        return [
            pipe.PipelineStage(
                stage, i, self.last + 1, self.device,
                input_args=(number if i == 0 else hidden,),
                output_args=(out if i == self.last else hidden,),
                group=self.mesh["pp"].get_group(),
            )
            for i, stage in self.stages.items()
        ]  # fmt: skip

    @torch.no_grad()
    def eval(self, batches: list[Batch], loss_fn: LossFn) -> Tensor:
        """The global loss of these micro-batches, forward alone."""
        count, total = self.load(batches)
        for i in range(len(batches)):
            out = self.forward(i)
            if out is not None:
                total += loss_fn(out, self.micro[i]) / count
        # no backward did it, and gathered parameters are not the optimizer's nor a checkpoint's
        for module in (m for stage in self.stages.values() for m in fsdp_units(stage)):
            module.reshard()
        return self.reduce(total, "dp_replicate", "dp_shard", "pp")

    def forward(self, i: int) -> Tensor | None:
        """Micro-batch i through all stages in their order; its output on the last stage's ranks.
        Plain sends, not torch's schedule.eval, which zero-bubble schedules do not have."""
        x, group, rank = None, self.mesh["pp"].get_group(), self.mesh["pp"].get_local_rank()
        owner, dtype = self.cfg.rank_of(), DTYPES[self.cfg.dtype]
        B, T = self.micro[i]["tokens"].shape
        for s, stage in sorted(self.stages.items()):
            if s > 0 and owner[s - 1] != rank:
                hidden = (B, T // self.cfg.tp, self.model.dim)
                x = torch.empty(hidden, dtype=dtype, device=self.device)
                dist.recv(x, group=group, group_src=owner[s - 1])
            x = stage(x, i)
            if s < self.last and owner[s + 1] != rank:
                dist.send(x.contiguous(), group=group, group_dst=owner[s + 1])
        return x if self.last in self.stages else None

    @torch.no_grad()
    def fingerprint(self) -> str:
        """Of the weights, the same on every mesh: the sum over all of their fp32 bits times an odd
        number of their place, modulo 2^64."""
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for name, p in self.params().items():
            data, index = local_part(p)
            axes = dict(zip(p.device_mesh.mesh_dim_names, p.placements, strict=True))
            # what tp copies is counted once
            if "tp" in axes and axes["tp"].is_replicate() and self.mesh["tp"].get_local_rank():
                continue
            place = index[0] if len(index) == 1 else index[0][:, None] * p.shape[1] + index[1]
            bits = data.float().view(torch.int32).long()
            total += (bits * (2 * (place + zlib.crc32(name.encode())) + 1)).sum()
        return f"{self.reduce(total, 'dp_shard', 'tp', 'pp').item() % 2**64:016x}"

    def pipeline_rank_of(self) -> dict[str, int]:
        """Every parameter of the whole model → the pipeline rank that holds it."""
        stage_of = {"embed": 0, "norm": self.last, "head": self.last}
        for stage, layers in enumerate(split_layers(self.model, self.last + 1)):
            stage_of |= {f"blocks.{i}": stage for i in layers}
        key, rank_of = re.compile(r"blocks\.\d+|\w+"), self.cfg.rank_of()
        return {name: rank_of[stage_of[key.match(name)[0]]] for name in full_shapes(self.model)}

    @torch.no_grad()
    def load_hf(self, folder: str | Path) -> None:
        """Fill the shards from a Hugging Face folder; each rank reads the slices that it needs."""
        params, theirs = self.params(), read_hf_config(folder)
        check_same_model(theirs, self.model, folder)
        if theirs.n_attributes != self.model.n_attributes:
            params = {name: p for name, p in params.items() if not name.startswith("head.")}
        params = {name: p for name, p in params.items() if "lora_" not in name}
        for name, lazy in hf_slices(Path(folder), theirs, params):
            data, index = local_part(params[name])
            if data.numel():
                data.copy_(lazy[tuple(slice(int(i[0]), int(i[-1]) + 1) for i in index)])

    @torch.no_grad()
    def squared_grads(self) -> dict[str, Tensor]:
        """Name → this rank's part of the squared gradient, fp64; what tp copies is shared out."""
        out = {}
        for name, p in self.trained().items():
            axes = dict(zip(p.grad.device_mesh.mesh_dim_names, p.grad.placements, strict=True))
            copies = self.cfg.tp if "tp" in axes and axes["tp"].is_replicate() else 1
            rows = torch.linalg.vector_norm(p.grad.to_local(), dim=-1)  # fp64 only of these
            out[name] = rows.double().square().sum() / copies
        return out

    def grad_norms(self) -> dict[str, float]:
        """The gradient norm of each kind of layer."""
        kinds = ("embed", "attn", "mlp", "norm", "head")
        squares = torch.zeros(len(kinds), dtype=torch.float64, device=self.device)
        for name, square in self.squared_grads().items():
            kind = "norm" if "norm." in name else next(k for k in kinds if k in name)
            squares[kinds.index(kind)] += square
        norms = self.reduce(squares, "dp_shard", "tp", "pp").sqrt().tolist()
        return {f"grad_norm/{kind}": norm for kind, norm in zip(kinds, norms, strict=True)}

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """The gradient's global L2 norm; where it is larger, gradients are scaled to max_norm."""
        # torchtitan's clip_grad_norm_ warns of (_NormPartial, _NormPartial) on a 2-D mesh
        squares = torch.stack(list(self.squared_grads().values())).sum()
        norm = self.reduce(squares, "dp_shard", "tp", "pp").sqrt()
        grads = [p.grad.to_local() for p in self.trained().values()]
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0).float())
        return norm


# ---- checkpoints ---------------------------------------------------------------------------------


def step_folders(root: Path) -> list[Path]:
    """Checkpoints, oldest first: what is still being written has another name."""
    folders = (p for p in root.glob("step_*") if re.fullmatch(r"step_\d+", p.name))
    return sorted(folders, key=lambda p: int(p.name[5:]))


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
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"state.json: {e}"
    for name in sorted(files)[part::of]:
        if not (folder / name).exists():
            return f"{name} is missing"
        if (found := checksum(folder / name)) != files[name]:
            return f"{name} has [size, CRC] {found}, not {files[name]}"
    return ""


class Checkpoints:
    """A run's checkpoints: written aside, sealed with checksums, then renamed. So a reader sees a
    whole one or none, and knows a damaged one. torchtitan's CheckpointManager writes in place: a
    kill during a save leaves a folder that looks like a checkpoint."""

    def __init__(self, root: Path, keep: int, background: bool) -> None:
        self.root, self.keep, self.background = root, keep, background
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # a group of its own, as it runs beside the training's collectives
        self.group = dist.new_group(backend="gloo") if background else None
        self.writing: Path | None = None
        self.signed = False
        self.future: Any = None
        self.state: dict[str, Any] = {}

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint; in the background, return as soon as the tensors are copied."""
        self.finish()
        self.writing, self.signed = self.root / f"step_{step:06d}.partial", False
        self.state = {"step": step, **state}
        if self.rank == 0:
            for left_by_a_kill in (*self.root.glob("*.partial"), *self.root.glob("*.old")):
                shutil.rmtree(left_by_a_kill)
            self.writing.mkdir(parents=True)
        dist.barrier()
        where = str(self.writing)
        if self.background:
            self.future = dcp.async_save(tensors, checkpoint_id=where, process_group=self.group)
        else:
            dcp.save(tensors, checkpoint_id=where)
            self.finish()

    def poll(self) -> None:
        """Seal what the background has finished; asks nobody, so it may be called at any time."""
        if self.future is not None and self.future.done():
            self.sign()
        if self.writing and self.rank == 0 and len(self.signatures()) == self.world:
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
        """Leave the checksums of this rank's files beside them, once: rank 0 takes them away."""
        if self.signed:
            return
        if self.future is not None:
            self.future.result()  # raises what went wrong in the background
        self.future, self.signed = None, True
        own = list(self.writing.glob(f"__{self.rank}_*"))
        own += [self.writing / ".metadata"] if self.rank == 0 else []
        sums = self.writing / f"sums_{self.rank}.tmp"
        sums.write_text(json.dumps({f.name: checksum(f) for f in own}))
        sums.rename(sums.with_suffix(".json"))

    def signatures(self) -> list[Path]:
        return sorted(self.writing.glob("sums_*.json"))

    def seal(self) -> None:
        """state.json with everyone's checksums, the rename, and the oldest removed."""
        files, signed = {}, self.signatures()
        if len(signed) < self.world:
            few = f"{len(signed)} of {self.world} processes' files are in {self.writing}"
            raise RuntimeError(f"{few}: --out must be a folder that all machines share")
        for sums in signed:
            files |= json.loads(sums.read_text())
            sums.unlink()
        (self.writing / "state.json").write_text(json.dumps({**self.state, "files": files}))
        final = self.writing.with_suffix("")
        self.discard([final] if final.exists() else [])
        self.writing.rename(final)
        self.discard([p for p in step_folders(self.root) if not self.pinned(p)][: -self.keep])

    def pinned(self, folder: Path) -> bool:
        """Whether a checkpoint was saved with pin=True: it stays."""
        try:
            return json.loads((folder / "state.json").read_text()).get("pin", False)
        except (OSError, ValueError):
            return False  # damaged: as any other

    def discard(self, folders: list[Path]) -> None:
        for folder in folders:  # half deleted, it must not have a checkpoint's name
            shutil.rmtree(folder.rename(folder.with_suffix(".old")))

    def load(self, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """Fill the tensors in place from the newest checkpoint that is whole, of any mesh. Returns
        its state.json, or None where there is none. A damaged one is named, then the one before it
        is taken."""
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


def full_shapes(cfg: ModelConfig) -> dict[str, torch.Size]:
    """Parameter → shape, of the whole model."""
    return {name: p.shape for name, p in on_meta(cfg).named_parameters()}


def hf_slices(folder: Path, cfg: ModelConfig, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """(our name, lazy slice) of the named tensors of a safetensors folder. Its names and shapes
    must be the whole model's exactly."""
    shapes, names = full_shapes(cfg), set(names)
    ours = {hf_name(name, cfg): name for name in shapes}
    where: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            names_in = f.keys()
        inside = {name: file for name in names_in if not name.endswith("inv_freq")}
        if twice := inside.keys() & where.keys():
            other = where[min(twice)].name  # what an earlier save in more or fewer files left
            raise ValueError(f"{folder}: {min(twice)} is in {other} and {file.name}: remove one")
        where |= inside
    if not where:
        raise ValueError(f"{folder}: no .safetensors file in it")
    if where.keys() != ours.keys():
        missing, unknown = sorted(ours.keys() - where.keys()), sorted(where.keys() - ours.keys())
        text = f"missing {missing[:5]}, unknown {unknown[:5]}"
        raise ValueError(f"{folder} is not this model: {text}")
    for file in sorted(set(where.values())):
        with safe_open(file, framework="pt") as f:
            for theirs in (n for n, at in where.items() if at == file and ours[n] in names):
                lazy, want = f.get_slice(theirs), list(shapes[ours[theirs]])
                if (shape := list(lazy.get_shape())) != want:
                    raise ValueError(f"{folder}: {theirs} is {shape}, config.json makes it {want}")
                yield ours[theirs], lazy


def tp_cuts(cfg: ModelConfig) -> dict[str, int]:
    """Parameter → the dimension that tensor parallelism cuts, read off the plan. Not in it: what
    every rank holds whole."""
    cuts = {}
    for name in full_shapes(cfg):
        module = re.sub(r"\.\d+\.", ".*.", name).rpartition(".")[0]
        style, lm = tp_plan()[module], not cfg.n_attributes
        if isinstance(style, styles.ColwiseParallel) or (isinstance(style, HeadParallel) and lm):
            cuts[name] = 0
        elif isinstance(style, styles.RowwiseParallel):
            cuts[name] = 0 if module == "embed" else 1
    return cuts


@torch.no_grad()
def load_run(folder: Path, weights: dict[str, Tensor]) -> None:
    """Fill the named weights, or shards, from a run's newest whole checkpoint, written on any mesh.
    Adapters are merged into their matrices."""
    cfg, adapters = read_config(folder), {}
    for name, shape in full_shapes(cfg).items():
        if "lora_" in name and f"{name.rpartition('.')[0]}.weight" in weights:
            adapters[name] = torch.empty(shape)
    state = {f"model.{name}": p for name, p in (weights | adapters).items()}
    if Checkpoints(folder / "checkpoints", 2, False).load(state) is None:
        raise ValueError(f"{folder}: a run without a checkpoint: train it first")
    for name, a in adapters.items():
        if name.endswith("lora_a"):
            data, (rows, cols) = local_part(weights[f"{name.rpartition('.')[0]}.weight"])
            b = adapters[name[:-1] + "b"][rows.cpu()]
            data += (cfg.lora_alpha / cfg.lora_rank * (b @ a[:, cols.cpu()])).to(data)


@torch.no_grad()
def load_parts(
    folder: Path, cfg: ModelConfig, dtypes: dict[str, torch.dtype], mesh: DeviceMesh
) -> dict[str, Tensor]:
    """This tensor-parallel rank's pieces of the named parameters, plain tensors for inference, from
    a Hugging Face folder or the newest whole checkpoint of a run, written on any mesh."""
    tp, shapes, cuts = mesh["tp"], full_shapes(cfg), tp_cuts(cfg)
    rank, parts, sharded = tp.get_local_rank(), {}, {}
    for name, dtype in dtypes.items():
        shape = list(shapes[name])
        if name in cuts:
            shape[cuts[name]] //= tp.size()
        parts[name] = torch.empty(shape, dtype=dtype, device=mesh.device_type)
        at = [Shard(cuts[name]) if name in cuts else Replicate()]
        sharded[name] = DTensor.from_local(parts[name], tp, at, run_check=False)
    if (folder / "checkpoints").exists():
        load_run(folder, sharded)
        return parts
    for name, lazy in hf_slices(folder, cfg, dtypes):
        index = [slice(None)] * len(shapes[name])
        if name in cuts:
            n = parts[name].shape[cuts[name]]
            index[cuts[name]] = slice(rank * n, (rank + 1) * n)
        parts[name].copy_(lazy[tuple(index)])
    return parts


def read_config(folder: str | Path) -> ModelConfig:
    """The model of a run's folder or of a Hugging Face folder."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder}: no config.json: neither a run nor a Hugging Face folder")
    found = json.loads(path.read_text())
    if "model" not in found:
        return config_from_hf(found)
    known = {f.name for f in fields(ModelConfig)}
    return ModelConfig(**{k: v for k, v in found["model"].items() if k in known})


def check_same_model(theirs: ModelConfig, mine: ModelConfig, where: str | Path) -> None:
    """Raise ValueError unless the weights of `theirs`, found at `where`, fit the model `mine`."""
    free = {"seq_len", "init_std", "lora_rank", "lora_alpha", "lora_targets"}
    if not theirs.n_attributes:
        free.add("n_attributes")  # a reward model begins as a language model with a new head
    for key in sorted(vars(mine).keys() - free):
        found, wanted = getattr(theirs, key), getattr(mine, key)
        if found != wanted:
            rule = f"set --model.{key.replace('_', '-')}"
            raise ValueError(f"{where} has {key}={found}, this run {wanted}: {rule}")


def read_hf_config(folder: str | Path) -> ModelConfig:
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder}: no config.json: not a Hugging Face model folder")
    return config_from_hf(json.loads(path.read_text()))


def load_hf(folder: str | Path, dtype: torch.dtype | None = None) -> Nemotron:
    """A Hugging Face Nemotron folder (config.json + safetensors) → a whole Nemotron, strictly.
    dtype None keeps the file's. To fill a sharded model, see Runner.load_hf."""
    cfg = read_hf_config(folder)
    model = on_meta(cfg)
    slices = hf_slices(Path(folder), cfg, full_shapes(cfg))
    model.load_state_dict({name: lazy[:].to(dtype) for name, lazy in slices}, assign=True)
    return model


def shard_files(sizes: dict[str, int], owner: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File name → its tensors, of one pipeline rank and together at most `limit` bytes."""
    files, last, room = [], None, 0
    for name in sorted(sizes, key=owner.get):
        if owner[name] != last or sizes[name] > room:
            files, last, room = [*files, []], owner[name], limit
        files[-1].append(name)
        room -= sizes[name]
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    n = len(files)
    return {f"model-{i + 1:05d}-of-{n:05d}.safetensors": part for i, part in enumerate(files)}


def save_hf(
    model: "Nemotron | Runner",
    folder: str | Path,
    dtype: torch.dtype | None = None,
    file_bytes: int = 5 << 30,
) -> None:
    """Write a folder that transformers opens, of a whole model or, all ranks together, a Runner. A
    file, at most file_bytes of one pipeline rank's tensors, is all that a host holds at once."""
    runner, folder = model if isinstance(model, Runner) else None, Path(folder)
    cfg, mine = (runner.model, runner.params()) if runner else (model.cfg, model.named_parameters())
    mine = dict(mine)
    if cfg.lora_rank:
        raise ValueError(f"lora_rank={cfg.lora_rank}: parallel.py export merges a run's adapters")
    writes = runner is None or runner.first_of_its_pipeline_rank
    dtype = dtype or next(iter(mine.values())).dtype
    sizes = {name: shape.numel() * dtype.itemsize for name, shape in full_shapes(cfg).items()}
    owner = runner.pipeline_rank_of() if runner else dict.fromkeys(sizes, 0)
    files = shard_files(sizes, owner, file_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in files.items():
        tensors = {}
        for name in names if names[0] in mine else ():
            p = mine[name].detach()
            p = p.full_tensor() if isinstance(p, DTensor) else p  # of all ranks together
            if writes:
                tensors[hf_name(name, cfg)] = p.to(dtype).cpu().contiguous()
        if tensors:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if runner is None or dist.get_rank() == 0:
        config = hf_config(cfg) | {"dtype": str(dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        if len(files) > 1:
            places = {hf_name(n, cfg): file for file, names in files.items() for n in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    if runner is not None:
        dist.barrier()


@dataclass(frozen=True)
class ExportConfig:
    """A run's newest checkpoint → a Hugging Face folder, for transformers and other engines."""

    run: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    dtype: Literal["fp32", "bf16"] = "bf16"


def export(c: ExportConfig) -> None:
    cfg = replace(read_config(c.run), lora_rank=0)
    dtypes = dict.fromkeys(full_shapes(cfg), DTYPES[c.dtype])
    model = on_meta(cfg)
    parts = load_parts(c.run, cfg, dtypes, init_mesh(MeshConfig()))
    model.load_state_dict(parts, assign=True)
    save_hf(model, c.out)
    for file in c.run.glob("tokenizer*"):
        shutil.copy(file, c.out)
    log.info(f"{c.out}: {sum(count_params(cfg)):,} parameters, {c.dtype}")
    shut_down()


def main() -> None:
    if sys.argv[1:2] == ["plan"]:
        sys.exit("parallel.py plan is now `python -m recipes.plan`")
    log.handlers, log.propagate = [logging.StreamHandler(sys.stdout)], False
    log.setLevel(logging.INFO)
    try:
        export(tyro.extras.subcommand_cli_from_dict({"export": ExportConfig}, description=__doc__))
    except ValueError as e:
        sys.exit(f"parallel.py: error: {e}")


if __name__ == "__main__":
    main()
