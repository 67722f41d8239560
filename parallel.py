"""One model, any mesh: pipeline × replicated × sharded data × tensor parallelism, over model.py.

The report's layout (section 2.3): 8-way tensor, 12-way interleaved pipeline, up to 64-way data
parallelism with a distributed optimizer. Callers see `Runner.step(micro_batches, loss_fn)` and the
same numbers on every mesh. `python -m recipes.plan` predicts memory and speed of a layout.

    python parallel.py export runs/nano out/hf
"""

import ctypes
import gc
import io
import json
import logging
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import partial, partialmethod
from importlib import import_module
from itertools import accumulate, product
from operator import add
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.tensor.parallel as styles
import torch.nn.functional as F
import torch.utils.checkpoint as ac
import tyro
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from model import (
    IGNORE,
    Head,
    ModelConfig,
    Nemotron,
    RewardHead,
    at_least_fp32,
    boundaries,
    check_ranges,
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
Tensors = dict[str, Tensor]
Region = tuple[slice, ...]  # of a tensor: what slices it
# where weights come from: the name of a tensor → a function that reads a region of it
Source = dict[str, Callable[[Region], Tensor]]
Batch = dict[str, Any]
LossFn = Callable[[Tensor, Tensors], Tensor]


# ---- the mesh ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeshConfig:
    """Layout of a run over its processes, and how they compute. The processes that the axes leave
    over divide parameters, gradients and optimizer among them (dp_shard)."""

    tp: int = 1  # Tensor (and sequence) parallel: heads, MLP, vocabulary and tokens divided.
    pp: int = 1  # Pipeline parallel: layers divided.
    vp: int = 1  # Virtual stages of each pipeline rank (interleaving).
    dp_replicate: int = 1  # Copies of the sharded model (hybrid sharding).
    schedule: Literal["1f1b", "zero_bubble", "zbv"] = "1f1b"
    """Pipeline schedule: 1F1B (interleaved where vp > 1), interleaved zero-bubble, or its V."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Work done again in backward: none, all but matrix products and attention, or every block."""
    compile: bool = False  # torch.compile of each block.
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Dtype of matrix products (all else is fp32); auto: bf16 on a GPU, fp32 on a CPU."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which gradients are summed over data-parallel processes."""
    reshard: Literal["auto", "always", "never"] = "auto"
    """Freeing of gathered parameters; auto: but in a pipeline; always: of whole gradients too."""
    timeout: int = 1800  # Seconds without an answer that end the job; within a step 600 at most.

    def __post_init__(self) -> None:
        """Refuse a field's value that no layout can have."""
        check_ranges(self, dict.fromkeys(("tp", "pp", "vp", "dp_replicate", "timeout"), (1, 1e8)))
        for field in fields(self):
            value = getattr(self, field.name)
            choices = get_args(field.type)
            if choices and value not in choices:
                raise ValueError(f"{field.name}={value}: must be one of {', '.join(choices)}")

    @property
    def compute_dtype(self) -> str:
        """Name of the dtype of matrix products on this machine. One for all CPUs, as they must
        agree; without instructions for bf16 that is a thousand times slower."""
        if self.dtype != "auto":
            return self.dtype
        return "bf16" if torch.cuda.is_available() else "fp32"

    @property
    def n_stages(self) -> int:
        return self.pp * self.vp

    @property
    def reshards(self) -> bool:
        return self.reshard == "always" or (self.reshard == "auto" and self.pp == 1)

    def shape(self, world: int) -> dict[str, int]:
        """Return each axis's size, in the order of AXES."""
        rest = self.pp * self.dp_replicate * self.tp
        if world % rest:
            axes = f"pp={self.pp} x dp_replicate={self.dp_replicate} x tp={self.tp} = {rest}"
            raise ValueError(f"{axes} does not divide the {world} processes: start a multiple")
        return dict(zip(AXES, (self.pp, self.dp_replicate, world // rest, self.tp), strict=True))

    def dp(self, world: int) -> int:
        """Count the processes that see different sequences."""
        self.shape(world)
        return world // (self.pp * self.tp)

    def rank_of(self, stage: int) -> int:
        """Return the pipeline rank that holds a stage: a loop over the ranks, or for zbv a V."""
        if self.schedule == "zbv" and stage >= self.pp:
            return 2 * self.pp - 1 - stage
        return stage % self.pp

    def stages_of(self, rank: int) -> list[int]:
        """List the stages of a pipeline rank."""
        return [stage for stage in range(self.n_stages) if self.rank_of(stage) == rank]

    def micro_batches(self, n: int) -> int:
        """Return the fewest micro-batches, from n on, that the pipeline's schedule can take."""
        if self.vp == 1 and self.schedule == "1f1b":
            return max(n, self.pp)
        while n % max(1, n // self.pp):  # torch's interleaved schedules go in rounds
            n += 1
        return n

    def check(self, model: ModelConfig, world: int, batch: int, micro_batch: int) -> None:
        """Raise ValueError, with the numbers and the rule, for what `world` processes cannot run.
        batch: sequences of a step, over all of them; micro_batch: computed at once by each."""
        dp = self.dp(world)
        for name in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "seq_len"):
            n = getattr(model, name)
            if n % self.tp:
                raise ValueError(f"tp={self.tp} does not divide {name}={n}: use a divisor of {n}")
        if self.n_stages > model.n_layers:
            rule = f"must have a layer each, but n_layers={model.n_layers}"
            raise ValueError(f"pp={self.pp} x vp={self.vp} = {self.n_stages} stages: {rule}")
        at_once = dp * micro_batch
        if batch % at_once:
            rule = f"a multiple of {dp} dp processes x micro_batch={micro_batch} = {at_once}"
            raise ValueError(f"batch={batch} sequences: must be {rule}")
        plain = self.schedule == "1f1b"
        if self.pp == 1 and (self.vp > 1 or not plain):
            raise ValueError(f"vp={self.vp}, schedule={self.schedule} with pp=1: set pp too")
        n = batch // at_once
        least = max(self.pp, self.micro_batches(n))
        if n < least:
            todo = f"its schedule takes {least}: change batch or micro_batch"
            raise ValueError(f"pp={self.pp}: {n} micro-batches for each dp process, {todo}")
        if self.schedule == "zbv" and self.vp != 2:
            raise ValueError(f"schedule=zbv has two stages per rank, but vp={self.vp}: set vp=2")
        if not plain and (self.compile or self.recompute == "selective"):
            raise ValueError(
                f"schedule={self.schedule} splits the backward pass, which torch cannot do with "
                f"compile={self.compile}, recompute={self.recompute}: use 1f1b, or none of the two"
            )


def split_layers(cfg: ModelConfig, n_stages: int) -> list[range]:
    """List the layers of each stage: equally many where they divide, as in the report. Else a layer
    at a time goes to the stage with the least work; the head is work, the embedding is none."""
    head = 6 * (cfg.n_attributes or cfg.vocab_size) * cfg.dim
    head_in_layers = head / (flops_per_token(cfg) - head) * cfg.n_layers
    work = [0.0] * (n_stages - 1) + [head_in_layers]
    counts = [cfg.n_layers // n_stages if cfg.n_layers % n_stages == 0 else 1] * n_stages
    while sum(counts) < cfg.n_layers:
        counts[min(range(n_stages), key=lambda s: (work[s] + counts[s], -s))] += 1
    return list(map(range, accumulate([0, *counts]), accumulate(counts)))


def world_size() -> int:
    """Count the processes of this job, also before the process group exists."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors. By default it goes back to the kernel and comes
    again zeroed page by page: a quarter of a step's time on a CPU. Nothing is done without it."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large allocations come from the heap too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


def init_mesh(cfg: MeshConfig) -> DeviceMesh:
    """Join the job, or start a job of one. Every axis exists, of size 1 where unused."""
    timeout = timedelta(seconds=cfg.timeout)
    gpus = torch.cuda.device_count()
    device = "cuda" if gpus else "cpu"
    if gpus:
        number = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        if number >= gpus:
            todo = f"start {gpus} on each machine, or hide the GPUs with CUDA_VISIBLE_DEVICES="
            raise ValueError(f"process {number} of a machine that has {gpus} GPU(s): {todo}")
        torch.cuda.set_device(number)
    else:
        keep_freed_memory()
    gc.set_threshold(100_000, 20)  # a first checkpoint's plan is a million objects
    if not dist.is_initialized():
        # gloo would connect everyone to everyone: past 500 ranks that is too many open files
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with suppress(ValueError, OSError):  # rank 0 still has two for each rank
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        alone = "WORLD_SIZE" not in os.environ
        who = dict(store=dist.HashStore(), rank=0, world_size=1) if alone else {}
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timeout, **who)
    mesh = init_device_mesh(device, tuple(cfg.shape(world_size()).values()), mesh_dim_names=AXES)
    timeout = min(timeout, timedelta(minutes=10))  # no step waits as long as a start or a save
    for axis in AXES:  # their groups would have torch's default
        dist.distributed_c10d._set_pg_timeout(timeout, mesh[axis].get_group())
    return mesh


def shut_down() -> None:
    """Leave the job together: without the barrier gloo may abort at exit. A failing rank hangs."""
    dist.barrier()
    dist.destroy_process_group()


def from_rank_0(make: Callable[[], Any]) -> Any:
    """Compute something on rank 0 alone and give it to all, as what they see of a file differs: NFS
    keeps a listing for half a minute, and all processes of a machine share one stdin."""
    box = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def set_up_logging(stream: TextIO | None = None) -> None:
    """Let rank 0 alone write the log, so that nothing else asks for the rank before it speaks."""
    log.handlers = [logging.StreamHandler(stream or sys.stdout)]
    log.setLevel(logging.ERROR if int(os.environ.get("RANK", 0)) else logging.INFO)
    log.propagate = False


def parsed(parse: Callable[[], Any]) -> Any:
    """Parse the command line, so that `--help | head` just ends."""
    default = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    config = parse()
    signal.signal(signal.SIGPIPE, default)
    return config


def run(main: Callable[[], None]) -> None:
    """Run a stage as a program. A user's error is one line, any other has its traceback.
    On the failing path no collective is called, as it would hang; torchrun ends the other ranks."""
    rank = int(os.environ.get("RANK", 0))
    try:
        main()
        if dist.is_initialized():
            shut_down()
    except KeyboardInterrupt as e:  # between steps `fit` listens for itself
        log.warning(f"stopped {str(e) or 'outside of the steps: the last checkpoint stays'}")
        os._exit(130)
    except Exception as e:
        if rank:  # what all ranks find, rank 0 says: as it ends, torchrun ends the others
            time.sleep(3)
        raised_in = traceback.extract_tb(e.__traceback__)[-1].filename
        ours = isinstance(e, ValueError) and raised_in.startswith(str(Path(__file__).parent))
        users = ours or isinstance(e, (FloatingPointError, OSError, SafetensorError))
        if not users:
            traceback.print_exc()
        sys.stderr.write(f"error{f' on rank {rank}' if rank else ''}: {e}\n")
        os._exit(2 if users else 1)


# ---- token log-probabilities ---------------------------------------------------------------------


def fp32_logits(h: Tensor, weight: Tensor) -> Tensor:
    """Compute h (n, D) · weightᵀ (D, V) in fp32: in bf16 the log-probability of a 256-token answer
    would be off by 0.14 nat."""
    if h.dtype == torch.bfloat16 and h.is_cuda:
        return torch.mm(h, weight.t(), out_dtype=torch.float32)
    return F.linear(at_least_fp32(h), at_least_fp32(weight))


class TokenLogProbs(torch.autograd.Function):
    """Compute log softmax(h Wᵀ)[target] in fp32, without ever holding the (N, V) logits.

    They are made a chunk of tokens at a time. Unless they are too many, forward keeps their
    exponentials for backward, in h's precision, as that is what its products take; else they are
    computed again. Under tensor parallelism W is this rank's rows of the vocabulary.
    """

    # For one token, with logits z = W h:  log p(target) = z[target] - logsumexp(z).
    # Its gradient is onehot - softmax, and softmax = scale * e with e = exp(z - row_max) and
    # scale = exp(row_max - logsumexp). So d log p / dz = -scale * (e - onehot / scale):
    # scale varies by token alone, and is multiplied in after the products with W and h.

    CHUNK = 1 << 23  # fp32 logits alive at once, of FEWEST tokens at least
    KEPT = 1 << 27  # most exponentials left to backward
    FEWEST = 256  # fewer make a slow product

    @staticmethod
    def chunks(n: int, V: int) -> list[slice]:
        """Divide n tokens into chunks."""
        size = max(TokenLogProbs.FEWEST, TokenLogProbs.CHUNK // V)
        return [slice(start, start + size) for start in range(0, n, size)]

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, tp: DeviceMesh | None
    ) -> Tensor:
        """Map h (..., D), weight (V, D), targets (...) to (...), zero where a target is IGNORE."""
        states = h.flatten(0, -2)
        labels = targets.flatten()
        V = len(weight)
        offset = labels if tp is None else labels - tp.get_local_rank() * V
        column = offset.clamp(0, V - 1)
        here = offset == column  # the others' logits are on other ranks
        keep = len(states) * V <= TokenLogProbs.KEPT
        ctx.exponentials = states.new_empty(len(states), V) if keep else None
        row_max, row_sum, row_dot, target_logit = at_least_fp32(states.new_empty(4, len(states)))
        for part in TokenLogProbs.chunks(len(states), V):
            logits = fp32_logits(states[part], weight)
            target_logit[part] = logits.gather(-1, column[part, None])[:, 0] * here[part]
            row_max[part] = logits.amax(-1)
            exponentials = (logits - row_max[part, None]).exp_()
            row_sum[part] = exponentials.sum(-1)
            row_dot[part] = logits.mul_(exponentials).sum(-1)
            if keep:
                ctx.exponentials[part] = exponentials
        highest = row_max.clone()
        if tp is not None:
            # each rank has its words alone: sum the exponentials, shifted by the maximum of all
            dist.all_reduce(highest, dist.ReduceOp.MAX, tp.get_group())
            factor = (row_max - highest).exp()
            sums = torch.stack([factor * row_sum, factor * row_dot, target_logit])
            dist.all_reduce(sums, group=tp.get_group())
            row_sum, row_dot, target_logit = sums
        logsumexp = highest + row_sum.log()
        ignored = labels == IGNORE
        ctx.save_for_backward(states, weight, column, here, ignored, row_max, logsumexp)
        # a clone, as a pipeline stage may not return a view
        out = (target_logit - logsumexp).masked_fill(ignored, 0.0).view(targets.shape).clone()
        # nats of each token, and whether the target is the likeliest
        out.seen = {"entropy": logsumexp - row_dot / row_sum, "top1": target_logit >= highest}
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of h and weight. Of h it is, under tp, this rank's part of a sum."""
        states, weight, column, here, ignored, row_max, logsumexp = ctx.saved_tensors
        # at exp(-60) nothing is left of the exponentials, and 1 / scale is still a number
        scale = (row_max - logsumexp).clamp_(min=-60.0).exp_()
        onehot = here / scale
        row_factor = (-grad.flatten().masked_fill(ignored, 0.0) * scale)[:, None]
        d_states = torch.empty_like(states)

        def products(part: slice, e: Tensor) -> Tensor:
            """Fill d_states[part], and return the part's share of the weight's gradient."""
            # e of a likely target is 1, or nearly so: rounded before the subtraction, 0.001 is none
            at_target = e.gather(1, column[part, None]) - onehot[part, None]
            e.scatter_(1, column[part, None], at_target.to(e.dtype))
            d_states[part] = row_factor[part] * (e @ weight)
            return e.t() @ (row_factor[part] * states[part]).to(states.dtype)

        if ctx.exponentials is not None:
            d_weight = products(slice(None), ctx.exponentials)
            ctx.exponentials = None  # products has changed them; a zero-bubble schedule comes again
        else:
            d_weight = torch.zeros_like(weight, dtype=logsumexp.dtype)
            for part in TokenLogProbs.chunks(len(states), len(weight)):
                logits = fp32_logits(states[part], weight)
                exponentials = logits.sub_(row_max[part, None]).exp_().to(states.dtype)
                d_weight += products(part, exponentials)
        return d_states.view(*grad.shape, -1), d_weight.to(weight.dtype), None, None


# ---- tensor parallelism --------------------------------------------------------------------------


def head_forward(
    head: nn.Module, tp: DeviceMesh | None, h: Tensor, targets: Tensor | None = None
) -> Tensor:
    """Compute model.Head.forward without the (B, T, V) tensor. Under tp, h is split over tokens,
    and model.RewardHead.forward too is computed here."""
    weight = head.weight
    if tp is not None:
        h = h.redistribute(placements=[Replicate()])
    if isinstance(head, RewardHead):
        return RewardHead.forward(head, h).to_local()
    if targets is None:
        logits = F.linear(h, weight)
        return logits if tp is None else logits.full_tensor()
    if tp is not None:
        # TokenLogProbs returns a partial gradient: summing and re-sharding it is one reduce-scatter
        h = h.to_local(grad_placements=[Partial()])
        weight = weight.to_local()
    return TokenLogProbs.apply(h, weight, targets, tp)


class HeadParallel(styles.ParallelStyle):
    """Style that shards a head's vocabulary, and puts a reward head on every rank."""

    def _apply(self, head: nn.Module, tp: DeviceMesh) -> nn.Module:
        head.forward = partial(head_forward, head, tp)
        placement = Shard(0) if isinstance(head, Head) else Replicate()
        for name, p in list(head.named_parameters()):
            head.register_parameter(name, nn.Parameter(distribute_tensor(p, tp, [placement])))
        return head


class Column(styles.ColwiseParallel):
    """Style that shards a matrix's rows and those of its adapter's B. A may have fewer rows than
    there are ranks: torch puts what is left out here on every rank."""

    def _partition_linear_fn(self, name: str, module: nn.Module, tp: DeviceMesh) -> None:
        a = module._parameters.pop("lora_a", None)
        super()._partition_linear_fn(name, module, tp)
        module.register_parameter("lora_a", a)


def tp_plan() -> dict[str, styles.ParallelStyle]:
    """Return Megatron's tensor and sequence parallelism as data: module name → style, for every
    parameter. Residuals and norms are sharded over tokens, matrices over heads, ffn, vocabulary."""
    tokens = Shard(1)
    every = Replicate()
    column = Column()
    row = styles.RowwiseParallel(output_layouts=tokens)

    def gather(*rest: None) -> styles.PrepareModuleInput:
        before, after = ((layout, *rest) for layout in (tokens, every))
        return styles.PrepareModuleInput(input_layouts=before, desired_input_layouts=after)

    return {
        "embed": styles.RowwiseParallel(input_layouts=every, output_layouts=tokens),
        "blocks.*.attn": gather(*[None] * 4),  # its other arguments are whole on every rank
        "blocks.*.attn.w[qkv]": column,
        "blocks.*.attn.wo": row,
        "blocks.*.*_norm": styles.SequenceParallel(),
        "blocks.*.mlp": gather(),
        "blocks.*.mlp.up": column,
        "blocks.*.mlp.down": row,
        "norm": styles.SequenceParallel(),
        "head": HeadParallel(),
    }


# ---- recompute, compile, data parallelism --------------------------------------------------------


def keep_first_products(n: int) -> Any:
    """Make the contexts of a selective recompute that keeps a branch's first n matrix products and
    attention's result. These are dear; norms, gathers and element-wise steps are done again. The
    last product, back to the residual, is neither kept nor redone: backward does not need it."""
    seen = [0, 0]  # in forward, in the recompute

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> ac.CheckpointPolicy:
        product = op is torch.ops.aten.mm.default
        seen[ctx.is_recompute] += product
        # torch's kernels are called ..._attention or _varlen_attn, flash-attn's _flash_attn_...
        attention = "attention" in op.name() or "_attn" in op.name()
        keep = seen[ctx.is_recompute] <= n if product else attention
        return ac.CheckpointPolicy.MUST_SAVE if keep else ac.CheckpointPolicy.PREFER_RECOMPUTE

    return ac.create_selective_checkpoint_contexts(policy)


def recompute_blocks(model: Nemotron, how: str) -> None:
    """Let backward compute blocks again, wholly or but for the dear parts. Forward methods are
    replaced: torchtitan's FullAC and SelectiveAC wrap the module, which changes its names."""
    again = partial(partial, ac.checkpoint, use_reentrant=False, preserve_rng_state=False)
    for block in model.blocks.values():
        if how == "full":
            block.forward = again(block.forward)
        else:  # keep q, k, v and attention; keep up
            block.attn_branch = again(block.attn_branch, context_fn=partial(keep_first_products, 3))
            block.mlp_branch = again(block.mlp_branch, context_fn=partial(keep_first_products, 1))


def fsdp_units(stage: nn.Module) -> list[FSDPModule]:
    """List the modules that fully_shard was given: FSDPModule's methods do not recurse."""
    return [module for module in stage.modules() if isinstance(module, FSDPModule)]


def shard_params(stage: "Stage", mesh: DeviceMesh, cfg: MeshConfig) -> None:
    """Apply FSDP2, a unit per block, embedding and head. Gradients are summed, not averaged, as the
    loss is already divided by a global count."""
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[cfg.compute_dtype],
        reduce_dtype=DTYPES[cfg.reduce_dtype],
        cast_forward_inputs=False,  # it would round the rotary angles
    )
    # a single copy would be summed over itself, block by block
    dp = mesh["dp_replicate", "dp_shard"] if cfg.dp_replicate > 1 else mesh["dp_shard"]
    reshard = cfg.reshards and mesh["dp_shard"].size() > 1  # alone, it would only cast again
    model = stage.model
    last = [model.norm, model.head] if model.head else None
    for unit in filter(None, (*model.blocks.values(), model.embed, last, stage)):
        fully_shard(unit, mesh=dp, mp_policy=policy, reshard_after_forward=reshard)
    for module in fsdp_units(stage) if dp.size() > 1 else ():  # alone, it would divide by one
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum


class Stage(nn.Module):
    """One stage of the pipeline, or the whole model. Stages hand on the hidden state, and each is
    told the micro-batch's number, by which it finds the other tensors in `micro`."""

    def __init__(self, model: Nemotron, micro: list[Tensors]) -> None:
        super().__init__()
        self.model = model
        self.micro = micro

    def forward(self, x: Tensor | None, i: Tensor | int) -> Tensor:
        """Compute micro-batch i; x is the hidden state of the stage before, if there is one."""
        batch = self.micro[int(i)]
        tokens = batch["tokens"]
        in_order = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        positions = batch.get("positions", in_order)
        x = tokens if self.model.embed else x
        return self.model(x, positions, batch.get("documents"), targets=batch.get("targets"))


def on_meta(cfg: ModelConfig, stage: int = 0, n_stages: int = 1) -> Nemotron:
    """Build a pipeline's stage, by default the whole model, that takes no memory."""
    with torch.device("meta"):
        model = Nemotron(cfg)
    layers = split_layers(cfg, n_stages)[stage]
    model.blocks = nn.ModuleDict({str(layer): model.blocks[str(layer)] for layer in layers})
    if stage > 0:
        model.embed = None
    if stage < n_stages - 1:
        model.norm = model.head = None
    return model


def build_stage(cfg: ModelConfig, i: int, mesh: DeviceMesh, how: MeshConfig, micro: list) -> Stage:
    """Build stage i on meta tensors: split → tensor parallel → recompute → compile → FSDP.
    micro: the list in which the stage will find its micro-batches."""
    model = on_meta(cfg, i, how.n_stages)
    if how.tp > 1:
        here = {k: style for k, style in tp_plan().items() if getattr(model, k.split(".")[0])}
        styles.parallelize_module(model, mesh["tp"], here)
        freeze(model)  # the styles make new parameters, all of them trained
    elif isinstance(model.head, Head):
        model.head.forward = partial(head_forward, model.head, None)
    # These return views: what is done to one in place FSDP would not see, and the embedding's, of
    # an AsyncCollectiveTensor, loses its gradient in a compiled block. A copy costs little.
    views = (how.tp > 1 and model.embed, cfg.n_attributes and model.head)
    for module in filter(None, views):
        module.register_forward_hook(lambda module, args, out: out.clone())
    if how.recompute != "none":
        recompute_blocks(model, how.recompute)
    if how.compile:
        for block in model.blocks.values():
            block.compile()
    stage = Stage(model, micro)
    shard_params(stage, mesh, how)
    return stage


def make_schedule(
    cfg: MeshConfig, stages: list[Any], n: int, train: bool = True, loss_fn: Any = None
) -> Any:
    """Make torch's pipeline schedule for a rank's stages and n micro-batches; or one of the forward
    pass alone, breadth first: all micro-batches of a stage come before the rank's next stage."""
    import torch.distributed.pipelining.schedules as torchs  # brings torch's compiler: seconds

    kinds = {
        "1f1b": torchs.ScheduleInterleaved1F1B if cfg.vp > 1 else torchs.Schedule1F1B,
        "zero_bubble": torchs.ScheduleInterleavedZeroBubble,
        "zbv": torchs.ScheduleZBVZeroBubble,
    }
    kind = kinds[cfg.schedule] if train else torchs._PipelineScheduleRuntime
    if kind is torchs.Schedule1F1B:
        return kind(stages[0], n, loss_fn=loss_fn, scale_grads=False)
    schedule = kind(stages, n, loss_fn=loss_fn, scale_grads=False)
    order = schedule.pipeline_order
    for rank in () if train else range(cfg.pp):
        all_of_each = product(cfg.stages_of(rank), range(n))
        order[rank] = [torchs._Action(s, torchs.FORWARD, i) for s, i in all_of_each]
    # torch gathers three stages at most and frees the others, many times a step
    active = 3 if cfg.reshards else cfg.vp
    lowered = {
        rank: torchs._add_reduce_grad(torchs._add_unshard_reshard(actions, active), n)
        for rank, actions in order.items()
    }
    order = torchs._add_send_recv(lowered, cfg.rank_of, cfg.n_stages)
    # torch 2.15 waits for each by name
    schedule.pipeline_order_with_comms = getattr(torchs, "_add_wait_send", dict)(order)
    for holder in (schedule, *stages):
        holder.stage_index_to_group_rank = {s: cfg.rank_of(s) for s in range(cfg.n_stages)}
    return schedule


def region_of(offsets: Iterable[int], sizes: Iterable[int]) -> Region:
    return tuple(map(slice, offsets, map(add, offsets, sizes)))


def own_region(p: Tensor) -> Region:
    """Return where this rank's piece of a parameter is in the whole."""
    if not isinstance(p, DTensor):
        return region_of([0] * p.ndim, p.shape)
    (chunk,) = p.__create_chunk_list__()  # DTensor's protocol with torch's checkpoints
    return region_of(chunk.offsets, chunk.sizes)


def local_part(p: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return this rank's piece of a parameter, and its indices in each dimension of the whole."""
    index = [torch.arange(i.start, i.stop, device=p.device) for i in own_region(p)]
    return p.to_local() if isinstance(p, DTensor) else p.data, index


def copied_by_tp(p: DTensor) -> bool:
    """Tell whether every tensor-parallel rank holds the same part of p."""
    axes = p.device_mesh.mesh_dim_names
    return "tp" in axes and p.placements[axes.index("tp")].is_replicate()


# ---- the runner ----------------------------------------------------------------------------------


class Runner:
    """Holder of the model's part on this rank. Callers need not know the mesh."""

    def __init__(
        self, model: ModelConfig, cfg: MeshConfig, mesh: DeviceMesh, micro_batch: int, seed: int
    ) -> None:
        """Build this rank's stages on the meta device, then initialise their shards: no rank ever
        holds the whole model."""
        self.model = model
        self.cfg = cfg
        self.mesh = mesh
        self.micro_batch = micro_batch
        self.device = torch.device(mesh.device_type)
        self.micro = []  # of the step; the stages look into this very list
        self.last = cfg.n_stages - 1
        pp_rank, replica, shard, _ = mesh.get_coordinate()
        self.stages = {}
        for i in cfg.stages_of(pp_rank):
            self.stages[i] = build_stage(model, i, mesh, cfg, self.micro)
            self.stages[i].to_empty(device=self.device)
            init_weights(self.stages[i].model, seed, local_part)
        self.dp = cfg.dp(mesh.size())
        self.dp_rank = replica * mesh["dp_shard"].size() + shard
        self.schedules = {}  # by the number of micro-batches, and whether to train
        # their stages, whose buffers for what is received fit one kind of schedule, of any length
        self.pipelines = defaultdict(self.pipeline_stages)
        self.asked = False  # to stop after this step; clip_grad_norm counts the ranks that are

    def params(self) -> dict[str, nn.Parameter]:
        """Return this rank's parameters, of all its stages, by the whole model's names."""
        params = {}
        for stage in self.stages.values():
            params |= dict(stage.model.named_parameters())
        return params

    def reduce(self, x: Tensor, *axes: str) -> Tensor:
        """Sum x over the named axes, in place."""
        for axis in axes:
            if self.mesh[axis].size() > 1:
                dist.all_reduce(x, group=self.mesh[axis].get_group())
        return x

    def load(self, batches: list[Batch]) -> None:
        """Move micro-batches to the device, and count what the global loss is divided by."""
        self.micro.clear()
        for batch in batches:
            tensors = {}
            for name in batch.keys() - {"count"}:
                tensor = torch.as_tensor(batch[name])
                if name == "documents" and self.device.type == "cuda":
                    tensor = boundaries(tensor)
                tensors[name] = tensor.to(self.device, non_blocking=True)
            self.micro.append(tensors)
        own = sum(batch["count"] for batch in batches)
        count = torch.tensor(own, dtype=torch.float64, device=self.device)
        self.count = self.reduce(count, "dp_replicate", "dp_shard")
        self.total = torch.zeros_like(count)  # loss of this rank, until it is that of all

    def loss_of(self, out: Tensor, i: Tensor | int) -> Tensor:
        """Compute and note the loss of micro-batch i, from what the last stage makes of it."""
        loss = self.loss_fn(out, self.micro[int(i)]) / self.count
        self.total += loss.detach()
        return loss

    def run(self, batches: list[Batch], loss_fn: LossFn, train: bool) -> Tensor:
        """Do forward and, to train, backward of this rank's micro-batches; return the global loss
        everywhere. loss_fn(output, batch) → the *sum* over the micro-batch, which has a `count`."""
        self.load(batches)
        self.loss_fn = loss_fn
        n = len(batches)
        if self.last > 0:  # forward alone in rounds: a bubble of an eighth, few states at once
            size = n if train else max(1, 8 * self.cfg.pp // self.cfg.vp)
            for first in range(0, n, size):
                self.run_schedule(range(n)[first : first + size], train)
        else:
            stage = self.stages[0]
            for i in range(n):
                stage.set_requires_gradient_sync(i == n - 1 or self.cfg.reshard == "always")
                stage.set_requires_all_reduce(i == n - 1)
                loss = self.loss_of(stage(None, i), i)
                if train:
                    loss.backward()
        return self.reduce(self.total, "dp_replicate", "dp_shard", "pp")

    step = partialmethod(run, train=True)  # `eval` is the other way to run

    @torch.no_grad()
    def eval(self, batches: list[Batch], loss_fn: LossFn) -> Tensor:
        """Return the global loss of these micro-batches, by forward alone."""
        total = self.run(batches, loss_fn, train=False)
        # no backward did it, and gathered parameters are not the optimizer's nor a checkpoint's
        for stage in self.stages.values():
            for unit in fsdp_units(stage):
                unit.reshard()
        for stage in self.pipelines.get(False, ()):
            stage.clear_runtime_states()  # of all that it handed on
        return total

    def run_schedule(self, micro: range, train: bool) -> None:
        """Run torch's pipeline schedule over some micro-batches. It splits tensors alone: target
        and the extra argument of each stage are the micro-batches' numbers."""
        key = (len(micro), train)
        if key not in self.schedules:
            stages = self.pipelines[train]
            self.schedules[key] = make_schedule(self.cfg, stages, *key, self.loss_of)
        numbers = torch.tensor(micro)
        first = (numbers,) if 0 in self.stages else ()
        last = {"target": numbers} if self.last in self.stages else {}
        go = self.schedules[key].step if train else self.schedules[key].eval
        go(*first, i=numbers, return_outputs=False, **last)

    def pipeline_stages(self) -> list[Any]:
        """Give each stage static shapes, so that no first step infers them with real traffic."""
        from torch.distributed.pipelining import PipelineStage  # as in make_schedule

        B = self.micro_batch
        T = self.model.seq_len
        meta = partial(torch.empty, device="meta", requires_grad=True)  # gradients travel back
        hidden = meta(B, T // self.cfg.tp, self.model.dim, dtype=DTYPES[self.cfg.compute_dtype])
        scores = (self.model.n_attributes,) if self.model.n_attributes else ()
        number = torch.empty(1, dtype=torch.long, device="meta")
        return [
            PipelineStage(
                stage, i, self.last + 1, self.device,
                input_args=(number if i == 0 else hidden,),
                output_args=(meta(B, T, *scores) if i == self.last else hidden,),
                group=self.mesh["pp"].get_group(),
            )
            for i, stage in self.stages.items()
        ]  # fmt: skip

    def load_weights(self, folder: str | Path) -> None:
        """Fill the shards from what open_weights reads. Adapters stay as initialised, and so does
        the head of a reward model that begins as a language model."""
        shapes = full_shapes(read_config(folder))
        source = open_weights(folder)
        for name, p in self.params().items():
            if name in source and shapes[name] == p.shape:
                fill({name: p}, source)
            elif "lora_" not in name and "head." not in name:
                raise ValueError(f"{folder}: {name} is {shapes.get(name)}, in this run {p.shape}")

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Return the gradients' global L2 norm, and scale them to max_norm where it is larger.
        torchtitan's clip_grad_norm_ warns of (_NormPartial, _NormPartial) on a 2-D mesh."""
        grads = [p.grad for p in self.params().values() if p.requires_grad]
        squares = []
        for grad in grads:
            rows = torch.linalg.vector_norm(grad.to_local(), dim=-1)  # fp64 only of these
            copies = self.cfg.dp_replicate * (self.cfg.tp if copied_by_tp(grad) else 1)
            squares.append(rows.double().square().sum() / copies)
        asked = torch.full_like(squares[0], self.asked)
        squared, self.n_asked = self.reduce(torch.stack([sum(squares), asked]), *AXES)
        norm = squared.sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
        torch._foreach_mul_([grad.to_local() for grad in grads], factor)
        return norm


# ---- checkpoints ---------------------------------------------------------------------------------


def step_folders(root: Path) -> list[Path]:
    """List the checkpoints, oldest first. One that is still being written has another name."""
    folders = [p for p in root.glob("step_*") if p.name[5:].isdecimal() and p.is_dir()]
    return sorted(folders, key=lambda p: int(p.name[5:]))


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Name a file that is damaged, whatever it makes its reader raise."""
    try:
        yield
    except Exception as e:
        raise OSError(f"{file} is damaged ({e!r})") from None


def read_pieces(part: Path, index: Any, name: str, wanted: Region) -> Tensor:
    """Read a region of a tensor from the pieces that ranks have written into a part of a
    checkpoint. index is the part's .metadata. A piece is an archive that holds its checksum."""
    about = index.state_dict_metadata[name]
    sizes = [i.stop - i.start for i in wanted]
    out = torch.empty(sizes, dtype=about.properties.dtype)
    chunk = dcp.metadata.ChunkStorageMetadata([i.start for i in wanted], sizes)
    for item in create_read_items_for_chunk_list(name, about, [chunk]):
        place = index.storage_data[item.storage_index]
        path = part / place.relative_path
        with naming(path), path.open("rb") as file:
            file.seek(place.offset)
            archive = io.BytesIO(file.read(place.length))
            if zipfile.ZipFile(archive).testzip():
                raise ValueError("a checksum differs")
            archive.seek(0)
            piece = torch.load(archive, "cpu", weights_only=True)
        there = region_of(item.storage_offsets, item.lengths)
        out[region_of(item.dest_offsets, item.lengths)] = piece[there]
    return out


def open_checkpoint(folder: Path, shapes: dict[str, torch.Size]) -> Source:
    """Open the tensors of a checkpoint with these names and shapes."""
    if not folder.exists():
        raise ValueError(f"{folder}: rank {dist.get_rank()} sees none: share --out")
    source = {}
    parts = sorted(folder.rglob(".metadata"))
    own = dist.get_rank() * len(parts) // dist.get_world_size()
    for path in parts[own:] + parts[:own]:  # on the mesh of the save this rank needs the first
        if source.keys() < shapes.keys():
            with naming(path):
                index = dcp.FileSystemReader(path.parent).read_metadata()
            for name in index.state_dict_metadata.keys() & shapes.keys():
                if index.state_dict_metadata[name].size != shapes[name]:
                    raise ValueError(f"{folder}: config.json gives {name} another shape")
                source[name] = partial(read_pieces, path.parent, index, name)
    for name in shapes.keys() - source.keys():
        raise OSError(f"{folder}: {name} of config.json's model is missing")
    return source


class Writer(dcp.filesystem._FileSystemWriter):  # the public one would copy once more
    """Writer of a rank's tensors. Of a full disk torch's archive only says that a position is odd:
    the system's error is told instead."""

    def write_data(self, *args: Any) -> Any:
        try:
            return super().write_data(*args)
        except RuntimeError as e:
            raise e.__context__ or e from None


class Planner(dcp.DefaultSavePlanner):
    """Planner of who writes which piece, once: the next save's plan is the same. torch's own would
    compare all pieces, which cannot overlap here: ten seconds, at 512 ranks to a part."""

    def _create_global_plan(self, all_plans: Any) -> Any:
        plan = dcp.default_planner.create_default_global_save_plan
        return plan(self._dedup_save_plans(all_plans))


class Checkpoints:
    """Checkpoints of a run, of which a reader sees a whole one or none, and knows a damaged one.

    1. Rank 0 makes the folder step_N.partial, which no reader takes for a checkpoint.
    2. The processes of each pipeline rank write a part of it, in the background if asked to. None
       needs to know of all tensors. A part's .metadata comes when all of the part is there.
    3. When all parts are there, rank 0 renames the folder to step_N, and removes the oldest.

    `save` does 1 and 2, `poll` what is due of 3 without waiting, `finish` all of it."""

    def __init__(
        self, root: Path, keep: int, background: bool, mesh: MeshConfig = MeshConfig()
    ) -> None:
        self.root = root
        self.keep = keep
        self.background = background
        self.rank = dist.get_rank()
        self.n_parts = mesh.pp
        # of its own, as it runs beside the training's collectives
        n = dist.get_world_size() // mesh.pp
        timeout = timedelta(seconds=mesh.timeout)
        self.group, _ = dist.new_subgroups(n, timeout=timeout, backend="gloo")
        self.writing: Path | None = None

    def save(self, step: int, tensors: Tensors, state: dict[str, Any]) -> None:
        """Write a checkpoint; in the background, return as soon as the tensors are copied."""
        self.finish()
        self.writing = self.root / f"step_{step:06d}.partial"
        self.state = {"step": step, **state}
        if self.rank == 0:
            for left in self.root.glob("step_*.partial"):  # by a kill
                shutil.rmtree(left, ignore_errors=True)
            self.writing.mkdir(parents=True)
        dist.barrier()
        self.future = dcp.async_save(
            tensors,
            storage_writer=Writer(self.writing / f"part_{self.rank // self.group.size():04d}"),
            planner=Planner(flatten_state_dict=False, enable_plan_caching=True),
            process_group=self.group,
        )
        if not self.background:
            self.finish()

    def failure(self, write: Callable[[], Any]) -> str:
        """Do what may fail, and return what went wrong and on which rank, or ""."""
        try:
            write()
        except (dcp.CheckpointException, OSError) as e:  # the first is no Exception by its class
            failures = getattr(e, "failures", {self.group.rank(): [e]})
            rank = min(failures)
            return f"rank {dist.get_global_rank(self.group, rank)}: {failures[rank][0]}"
        return ""

    def any_failure(self, write: Callable[[], Any]) -> str:
        """Do what may fail on every rank, and return what went wrong on one of them, or ""."""
        found = [""] * dist.get_world_size()
        dist.all_gather_object(found, self.failure(write))
        return max(found)

    def check(self, failure: str) -> None:
        """Remove, after a failure, what is half written, as it may be what fills the disk."""
        if failure:
            shutil.rmtree(self.writing, ignore_errors=True)
            raise OSError(f"{self.writing}: not saved, and removed: {failure}")

    def poll(self) -> None:
        """Go on with what is written. Asks no other rank, so it may be called at any time."""
        if self.writing is None:
            return
        if self.future.done():
            self.check(self.failure(self.future.result))
        # there are none once it has been renamed
        if self.rank == 0 and len([*self.writing.glob("*/.metadata")]) == self.n_parts:
            self.check(self.failure(self.seal))

    def finish(self) -> None:
        """Wait until what is being written is a checkpoint, on every rank."""
        if self.writing is None:
            return
        self.check(self.any_failure(self.future.result))
        if self.rank == 0 and self.writing.exists():  # poll may have been here
            self.check(self.failure(self.seal))
        dist.barrier()
        self.writing = None

    def seal(self) -> None:
        """Write state.json, rename the folder, and remove the oldest."""
        final = self.writing.with_suffix("")
        (self.writing / "state.json").write_text(json.dumps(self.state))
        if self.state.get("pin"):  # it stays
            (self.writing / "pin").touch()
        shutil.rmtree(final, ignore_errors=True)
        self.writing.rename(final)
        folders = step_folders(self.root)
        until_now = folders[: folders.index(final) + 1]  # a later one is damaged: it was not loaded
        unpinned = [folder for folder in until_now if not (folder / "pin").exists()]
        for folder in unpinned[: -self.keep]:
            shutil.rmtree(folder, ignore_errors=True)  # half there, it is a damaged one

    def read(self, folder: Path, tensors: Tensors) -> None:
        """Fill the tensors and `state` from a checkpoint."""
        file = folder / "state.json"
        with naming(file):
            self.state = json.loads(file.read_text())
        fill(tensors, open_checkpoint(folder, {name: p.shape for name, p in tensors.items()}))

    def load(self, tensors: Tensors) -> dict[str, Any] | None:
        """Fill the tensors in place from the newest checkpoint, of any mesh; return its state.json,
        or None. A damaged one is named, then the one before it is taken."""
        folders = from_rank_0(lambda: step_folders(self.root))
        for folder in reversed(folders):
            wrong = self.any_failure(partial(self.read, folder, tensors))
            if not wrong:
                return self.state
            log.warning(f"{wrong}: trying the checkpoint before")
        if folders:
            raise ValueError(f"{self.root}: no checkpoint is whole: remove them to start anew")


# ---- from a folder to weights --------------------------------------------------------------------


def full_shapes(cfg: ModelConfig) -> dict[str, torch.Size]:
    """Return the shape of every parameter of the whole model."""
    return {name: p.shape for name, p in on_meta(cfg).named_parameters()}


def nemo_of(folder: str | Path) -> tuple[ModelConfig, Source, Any] | None:
    """Open the model in nemo:FOLDER, NVIDIA's own form, which a recipe reads; None of others."""
    form, _, path = str(folder).partition(":")
    return import_module("recipes.nemo").open_nemo(Path(path)) if form == "nemo" else None


def read_config(folder: str | Path) -> ModelConfig:
    """Read the shape of the model in a run's folder, a Hugging Face folder or nemo:FOLDER."""
    nemo = nemo_of(folder)
    if nemo:
        return nemo[0]
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder}: no config.json: neither a run nor a Hugging Face folder")
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        if "model" in found:
            return ModelConfig(**found["model"])
        return config_from_hf(found)
    except Exception as e:  # there is no end to what a stranger's file may hold
        raise ValueError(f"{path} describes no model of this kind: {e!r}") from None


def open_hf(folder: Path) -> Source:
    """Open a Hugging Face folder's tensors: by name and shape exactly those of the whole model."""
    cfg = read_config(folder)
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    if name in found:  # by an earlier save, in more or fewer files
                        raise ValueError(f"{name} is in {path} and in another file: remove one")
                    if not name.endswith("inv_freq"):
                        found[name] = file.get_slice(name)
        except (SafetensorError, OSError) as e:
            todo = "a part of it, or a pointer of git-lfs? Fetch it again, or git lfs pull"
            raise ValueError(f"{path}: {e}: {todo}") from None
    if not found:
        raise ValueError(f"{folder}: no .safetensors file in it")
    whole = full_shapes(cfg)
    named = {name: hf_name(name, cfg) for name in whole}
    shapes = {named[name]: list(shape) for name, shape in whole.items()}
    for name in sorted(shapes.keys() | found.keys()):
        shape = found[name].get_shape() if name in found else "missing"
        rule = shapes.get(name, "unknown")
        if shape != rule:
            raise ValueError(f"{folder}: {name} is {shape}, config.json makes it {rule}")
        kind = found[name].get_dtype()
        if kind not in ("F64", "F32", "F16", "BF16"):
            todo = f"convert it, with its scales, or read it as nemo:{folder}"
            raise ValueError(f"{folder}: {name} is {kind}: {todo}")
    return {name: found[theirs].__getitem__ for name, theirs in named.items()}


def read_merged(matrix: Any, a: Any, b: Any, cfg: ModelConfig, wanted: Region) -> Tensor:
    """Read a rectangle of a matrix with its adapter in it: W + α / r · B A."""
    rows, columns = wanted
    rank = slice(0, cfg.lora_rank)
    return matrix(wanted) + cfg.lora_alpha / cfg.lora_rank * (b((rows, rank)) @ a((rank, columns)))


def open_weights(folder: str | Path) -> Source:
    """Open the weights in a Hugging Face folder, in nemo:FOLDER, or in the newest checkpoint
    of a run, its adapters merged into their matrices; for a run all ranks must ask together."""
    nemo = nemo_of(folder)
    if nemo:
        return nemo[1]
    root = Path(folder) / "checkpoints"
    if not root.exists():
        return open_hf(Path(folder))
    cfg = read_config(folder)
    newest = from_rank_0(lambda: step_folders(root)[-1:])
    if not newest:
        raise ValueError(f"{folder}: a run without a checkpoint: train it first")
    shapes = full_shapes(cfg)
    saved = open_checkpoint(*newest, {f"model.{name}": shape for name, shape in shapes.items()})
    source = {name: saved[f"model.{name}"] for name in shapes}
    for name in [name for name in source if name.endswith("lora_a")]:
        adapter = (source.pop(name), source.pop(name[:-1] + "b"))
        matrix = name.replace("lora_a", "weight")
        source[matrix] = partial(read_merged, source[matrix], *adapter, cfg)
    return source


@torch.no_grad()
def fill(params: Tensors, source: Source) -> None:
    """Fill parameters, whole or sharded, in place: a rank reads its own part of each."""
    for name, p in params.items():
        local_part(p)[0].copy_(source[name](own_region(p)))


def load_hf(folder: str | Path, dtype: torch.dtype | None = None) -> Nemotron:
    """Load a Hugging Face Nemotron folder (config.json + safetensors) as a whole model, strictly.
    dtype None keeps the file's. Runner.load_weights fills a sharded model."""
    model = on_meta(read_config(folder))
    source = open_weights(folder)
    weights = {name: source[name](own_region(p)).to(dtype) for name, p in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    return model


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into, named when all is done. One that holds anything is refused."""
    folder = folder.resolve()
    partial = folder.with_name(f"{folder.name}.partial")
    for path in (folder, partial):
        if path.is_file() or any(path.glob("*")):
            raise ValueError(f"{path} is there, and no empty folder: name another")
    partial.mkdir(parents=True)  # fails if another process has just made it
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@torch.no_grad()
def save_hf(
    model: Nemotron,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    file_bytes: int = 5 << 30,
    source: Source | None = None,
) -> None:
    """Write a folder that transformers opens, in files of at most file_bytes. dtype None keeps the
    weights'. With a source they are read there, a file's at a time: the model may be on meta."""
    cfg = model.cfg
    if cfg.lora_rank:
        raise ValueError(f"lora_rank={cfg.lora_rank}: parallel.py export merges a run's adapters")
    dtype = dtype or model.embed.weight.dtype
    params = dict(model.named_parameters())
    source = source or {name: p.__getitem__ for name, p in params.items()}
    ours = {hf_name(name, cfg): name for name in params}
    on_disk = {theirs: params[name].to("meta", dtype) for theirs, name in ours.items()}
    plan = split_torch_state_dict_into_shards(on_disk, max_shard_size=file_bytes)
    with new_folder(Path(folder)) as partial:
        for file, names in plan.filename_to_tensors.items():
            weights = {}
            for name in names:
                weights[name] = source[ours[name]](own_region(on_disk[name])).to("cpu", dtype)
            save_file(weights, partial / file, metadata={"format": "pt"})
            del weights  # before the next file's are read
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        config = hf_config(cfg) | {"dtype": str(dtype).removeprefix("torch.")}
        (partial / "config.json").write_text(json.dumps(config, indent=2))


@dataclass(frozen=True)
class ExportConfig:
    """Convert a run's newest checkpoint to a Hugging Face folder, for transformers and engines."""

    run: tyro.conf.Positional[Path]  # Folder of the run.
    out: tyro.conf.Positional[Path]  # Folder to write.
    dtype: Literal["fp32", "bf16"] = "bf16"  # Dtype of the weights.


def export(c: ExportConfig) -> None:
    """Write the Hugging Face folder, the tokenizer beside it."""
    if world_size() > 1:
        raise ValueError(f"export is for one process, not {world_size()}: start it by python")
    with new_folder(c.out) as partial:
        init_mesh(MeshConfig())
        cfg = replace(read_config(c.run), lora_rank=0)
        save_hf(on_meta(cfg), partial, DTYPES[c.dtype], source=open_weights(c.run))
        for file in c.run.glob("tokenizer*"):
            shutil.copy(file, partial)
    log.info(f"{c.out}: {sum(count_params(cfg)):,} parameters, {c.dtype}")


def main() -> None:
    set_up_logging()
    parse = partial(tyro.extras.subcommand_cli_from_dict, {"export": ExportConfig})
    run(lambda: export(parsed(partial(parse, description=__doc__))))


if __name__ == "__main__":
    main()
