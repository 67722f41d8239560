"""Plan a run without a GPU: the memory that a layout needs, and the time that a step should take.

The training code itself builds a block, on meta tensors in a process group that does not exist, and
the pipeline's schedule; what they hold and send is counted, and a roofline predicts the step.

    python -m recipes.plan nemotron4-340b --gpus 6144
    python -m recipes.plan --report
    python -m recipes.plan nemotron4-15b --gpus 64 --batch 384 --search 10
"""

import logging
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from types import SimpleNamespace
from typing import Literal, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.distributed.tensor.parallel import parallelize_module

from model import SHAPES, ModelConfig, check_ranges, flops_per_token, matrix_params, rope_angles
from parallel import (
    DTYPES,
    MeshConfig,
    TokenLogProbs,
    make_schedule,
    on_meta,
    recompute_blocks,
    set_up_logging,
    split_layers,
    tp_plan,
)
from train import PEAK_FLOPS, PRESETS

log = logging.getLogger("nemotron4")


@dataclass(frozen=True)
class Gpu:
    """Bytes of memory, and bytes/s of memory, NVLink and network, each way."""

    memory: float
    hbm: float
    nvlink: float
    network: float = 50e9  # 8 x 400 Gb/s a node, the report's section 2.3


GPUS = {  # NVIDIA's data sheets
    "B200": Gpu(180e9, 8.0e12, 900e9),
    "H200": Gpu(141e9, 4.8e12, 450e9),
    "H100 NVL": Gpu(94e9, 3.9e12, 300e9),
    "H100 PCIe": Gpu(80e9, 2.0e12, 300e9),
    "H100": Gpu(80e9, 3.35e12, 450e9),
    "A100": Gpu(80e9, 2.039e12, 300e9, 25e9),
}

# Report Table 2: GPUs, sequences, seconds an iteration, MFU in percent; tp 8, pp 12, vp 8
REPORT_ROWS = ((1536, 768, 10.3, 42.4), (3072, 1536, 10.3, 42.3), (6144, 2304, 8.0, 41.0))
REPORT_MESH = MeshConfig(tp=8, pp=12, vp=8, recompute="selective")

# names that --help lists, read off the tables
ShapeName = Literal[tuple(SHAPES)]  # pyrefly: ignore[invalid-literal]
GpuName = Literal[tuple(GPUS)]  # pyrefly: ignore[invalid-literal]


@dataclass(frozen=True)
class PlanConfig:
    """Predict the memory that a layout needs on each GPU, and the time that a step takes."""

    shape: tyro.conf.Positional[ShapeName] = "nemotron4-340b"  # Name of a model.
    gpus: int = 6144  # Number of GPUs.
    gpu: GpuName = "H100"  # Kind of GPU.
    batch: int = 2304  # Sequences per step.
    micro_batch: int = 1  # Sequences per micro-batch.
    mesh: MeshConfig = REPORT_MESH  # Layout of the GPUs; the default is the report's.
    report: bool = False  # Predictions beside the three rows of the report's Table 2.
    search: int = 0  # Number of meshes to list, fastest first, of those that fit.
    train: tyro.conf.Suppress[bool] = True  # no option: False where a round of validation is priced

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("gpus", "batch", "micro_batch"), (1, 1e8))
        check_ranges(self, ranges | {"search": (0, 1e8)})
        if self.report and replace(self, report=False) != PlanConfig():
            raise ValueError("--report is of the report's own layout: leave other options out")
        if self.search and self.mesh != REPORT_MESH:
            raise ValueError("--search tries the meshes itself: leave --mesh out")

    @property
    def model(self) -> ModelConfig:
        return SHAPES[self.shape]

    @property
    def n_micro(self) -> int:
        """Return the number of micro-batches of each data-parallel process."""
        return self.batch // self.mesh.dp(self.gpus) // self.micro_batch

    @property
    def round(self) -> int:
        """Return the number of micro-batches that validation takes through a pipeline at once."""
        return max(1, 8 * self.mesh.pp // self.mesh.vp) if self.mesh.pp > 1 else self.n_micro

    @property
    def shards(self) -> int:
        """Return the number of GPUs that FSDP divides a parameter among."""
        return self.mesh.shape(self.gpus)["dp_shard"]

    @property
    def passes(self) -> "Passes":
        return PASSES[self.mesh.recompute if self.train else "validation"]


# ---- what a pipeline rank holds, and when --------------------------------------------------------


@cache
def shares_of(plan: PlanConfig) -> tuple[list[int], list[int], int]:
    """Return each stage's layers; its parameters, after tensor parallelism's cut and before FSDP's;
    and those of the largest unit that FSDP gathers at once."""
    cfg = plan.model
    block = matrix_params(cfg) // plan.mesh.tp + 4 * cfg.dim  # weight and bias of two norms
    vocabulary = cfg.vocab_size * cfg.dim // plan.mesh.tp
    layers = [len(part) for part in split_layers(cfg, plan.mesh.n_stages)]
    params = [n * block for n in layers]
    params[0] += vocabulary
    params[-1] += vocabulary + 2 * cfg.dim  # the last norm
    return layers, params, max(block, vocabulary)


@cache
def orders_of(mesh: MeshConfig, n: int, train: bool) -> list[list[tuple]]:
    """List the (stage, kind, micro-batch) that each pipeline rank runs in its schedule."""
    if mesh.pp == 1:
        kinds = ("FORWARD", "FULL_BACKWARD", "RESHARD")[: 3 if train else 1]
        return [[(0, kind, i) for i in range(n) for kind in kinds]]
    last = mesh.n_stages - 1
    # what a schedule asks of a stage
    stage = partial(
        SimpleNamespace, submod=nn.Identity(), num_stages=last + 1, group_size=mesh.pp, group_rank=0
    )
    stages = [stage(stage_index=s, is_first=s == 0, is_last=s == last) for s in mesh.stages_of(0)]
    schedule = make_schedule(mesh, stages, n, train, loss_fn=print)
    # plain 1F1B does not gather by itself: FSDP does
    order = getattr(schedule, "pipeline_order_with_comms", None) or schedule._get_pipeline_order()
    return [[(a[0], a[1].name, a[2]) for a in filter(None, each)] for each in order.values()]


# actions that need weights, and how they change the number of those that wait for their backward
WAITING = {"UNSHARD": 0, "FORWARD": 1, "FULL_BACKWARD": -1}
WAITING |= {"BACKWARD_INPUT": 0, "BACKWARD_WEIGHT": -1}


class Load(NamedTuple):
    """Count a pipeline rank's part of the model, and what it gathers and holds in a step."""

    layers: int
    params: int
    gathered: int  # parameters, each as often as it is gathered
    reduced: int  # and as often as its gradient is summed over data-parallel processes
    whole: int  # most parameters gathered at a time
    waiting: int  # most layers times micro-batches whose activations wait for their backward


@cache
def loads_of(plan: PlanConfig) -> list[Load]:
    """Follow every pipeline rank through its actions."""
    mesh = plan.mesh
    layers, params, _ = shares_of(plan)
    frees = mesh.reshards and plan.shards > 1
    n = plan.n_micro
    if mesh.pp > 1 and not frees:  # two rounds show what warms up and stays
        n = min(n, 2 * (n // max(1, n // mesh.pp)))
    orders = orders_of(replace(mesh, tp=1, recompute="none"), n, plan.train)
    loads = []
    for rank, actions in enumerate(orders):
        whole = {}  # stage → its parameters, while they are gathered
        gathered = waiting = most_whole = most_waiting = 0
        for stage, kind, _ in actions:
            if kind in WAITING and stage not in whole:
                whole[stage] = params[stage]
                gathered += params[stage]
            # FSDP frees each unit after its forward; after its backward a pipeline keeps it
            if kind == "RESHARD" or (frees and (kind == "FORWARD" or mesh.pp == 1)):
                whole.pop(stage, None)
            waiting += layers[stage] * WAITING.get(kind, 0)
            most_whole = max(most_whole, sum(whole.values()))
            most_waiting = max(most_waiting, waiting)
        own_layers = sum(layers[stage] for stage in mesh.stages_of(rank))
        own_params = sum(params[stage] for stage in mesh.stages_of(rank))
        reduced = own_params * (n if mesh.reshard == "always" and mesh.pp == 1 else 1)
        loads.append(Load(own_layers, own_params, gathered, reduced, most_whole, most_waiting))
    return loads


def busiest(plan: PlanConfig) -> Load:
    """Return the largest of each count over the pipeline ranks."""
    return Load(*map(max, zip(*loads_of(plan), strict=True)))


# ---- memory --------------------------------------------------------------------------------------


def flash_on_meta(q: Tensor, k: Tensor, v: Tensor, visible: None) -> Tensor:
    """Allocate what a flash kernel does; on meta tensors SDPA would take the path with (T, T)."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(*heads_first, 0.0, True)[0].transpose(1, 2)


@cache
def activation_bytes(cfg: ModelConfig, tp: int, micro_batch: int, recompute: str) -> int:
    """Count the bytes that a block keeps until its backward, by running it on meta tensors."""
    # private modules of torch, kept to the dry run
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = on_meta(replace(cfg, n_layers=1)).to(torch.bfloat16)
    positions = torch.zeros(micro_batch, cfg.seq_len, dtype=torch.long, device="meta")
    hidden = (micro_batch, cfg.seq_len // tp, cfg.dim)
    x = torch.empty(hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
    parallelize_module(model, dist.init_device_mesh("cpu", (tp,)), tp_plan())
    if recompute != "none":
        recompute_blocks(model, recompute)
    tracker = MemTracker()
    tracker.track_external(model, x)
    with tracker, patch("model.attend", flash_on_meta):
        out = model.blocks["0"](x, rope_angles(cfg, positions), None, positions, None)
        kept = tracker.get_tracker_snapshot("current")[torch.device("meta")]
    del out
    dist.destroy_process_group()
    return sum(size for kind, size in kept.items() if "ACT" in str(kind))


FP32 = 4  # bytes of a number
BF16 = 2
# Beyond torch's own memory: a context and a first communicator, 1.06 GB on an H100 (github.com/
# NVIDIA/nccl/issues/1685); 688 MiB for each group that computes together (issues/964): tp, pp, dp.
RESERVE = 3.2e9


def memory_of(plan: PlanConfig, rank: int) -> dict[str, float]:
    """Return the bytes on a GPU of a pipeline rank, by what they hold."""
    cfg = plan.model
    mesh = plan.mesh
    width = FP32 if mesh.dtype == "fp32" else BF16  # auto is for GPUs here
    load = loads_of(plan)[rank]
    two_units = min(load.params, 2 * shares_of(plan)[2])  # one computes, the next is prefetched
    # gradients add up over micro-batches, unless each reduces its own
    summed = load.params if load.reduced < plan.n_micro * load.params else two_units
    kept = activation_bytes(cfg, mesh.tp, plan.micro_batch, mesh.recompute)
    again = activation_bytes(cfg, mesh.tp, plan.micro_batch, "none")
    tokens = plan.micro_batch * cfg.seq_len
    hidden = width * tokens * cfg.dim
    # Torch keeps room for all that a rank receives: each stage's micro-batches of a step, forward
    # and backward, and of a round of validation.
    stages = mesh.stages_of(rank)
    is_last = mesh.n_stages - 1 in stages
    states = (plan.n_micro + plan.round) * (len(stages) - (0 in stages))
    gradients = plan.n_micro * (len(stages) - is_last)
    # the head: logits of a chunk, exponentials, weight gradient; its input and that one's gradient
    V = cfg.vocab_size // mesh.tp
    chunk = TokenLogProbs.chunks(tokens, V)[0].stop
    exponentials = tokens if tokens * V <= TokenLogProbs.KEPT else 0
    head = V * (FP32 * (chunk + cfg.dim) + width * exponentials) + 2 * hidden
    parts = {
        "weights, gradients, two moments": 4 * FP32 * -(-load.params // plan.shards),
        "gathered weights": width * max(load.whole, two_units),
        "gradients, adding up": DTYPES[mesh.reduce_dtype].itemsize * summed,
        "activations in flight": kept * load.waiting,
        "recomputed block": again * (mesh.recompute != "none"),
        "logits and head gradient": head * is_last,
        "pipeline's receive buffers": hidden // mesh.tp * (states + gradients),
        "CUDA context and NCCL": RESERVE,
    }
    return {**parts, "sum": sum(parts.values())}


def fullest(plan: PlanConfig) -> dict[str, float]:
    """Return the bytes on the fullest GPU, by what they hold."""
    ranks = [memory_of(plan, rank) for rank in range(plan.mesh.pp)]
    return max(ranks, key=lambda parts: parts["sum"])


# ---- traffic and time ----------------------------------------------------------------------------


class Passes(NamedTuple):
    """Count how often a micro-batch does each kind of work, forward once."""

    products: int  # a block's matrix products
    elements: int  # its element-wise operations
    transfers: int  # the residual stream, by tensor parallelism
    head: int  # the head's products


# Backward takes twice a forward's products, and computes the head's logits again. Forward gathers
# the inputs of attention and MLP and scatters their outputs; backward mirrors that.
# Selective recompute repeats element-wise operations and the two gathers, full recompute all.
PASSES = {
    "none": Passes(3, 3, 8, 4),
    "selective": Passes(3, 4, 10, 4),
    "full": Passes(4, 4, 12, 4),
    "validation": Passes(1, 1, 4, 1),
}
# Bytes that such a pass moves for each of a token's dim values: two norms read bf16 and write fp32
# (2 x 6), normalise (2 x 8), go back to bf16 (2 x 6); two sums read two and write one (2 x 6)
BYTES_PER_DIM = 52
# ... and for each of its ffn_dim values: ReLU reads and writes bf16 (4), and so does the square
BYTES_PER_FFN = 8
# AdamW reads a parameter, its gradient and two moments, and writes all but the gradient (7 x 4)
ADAMW_BYTES = 28
# share of 1F1B's bubble that zero-bubble schedules leave: weight gradients fill two thirds at best
ZERO_BUBBLE = 1 / 3
GPUS_PER_NODE = 8
# Shares of the data sheets' rates that real work reaches: assumed, neither measured nor fitted to
# the report's iteration times.
REACHED = {"flops": 0.70, "hbm": 0.80, "nvlink": 0.75, "network": 0.70}


def wire_of(plan: PlanConfig) -> dict[str, float]:
    """Return the bytes that a GPU of the busiest pipeline rank sends in a step, by axis."""
    mesh = plan.mesh
    load = busiest(plan)
    hidden = plan.micro_batch * plan.model.seq_len * plan.model.dim * BF16
    tp = plan.n_micro * load.layers * plan.passes.transfers * hidden * (mesh.tp - 1) / mesh.tp
    # a stage sends a micro-batch's states forward, and their gradient back
    pp = (1 + plan.train) * plan.n_micro * mesh.vp * hidden / mesh.tp * (mesh.pp > 1)
    dp = BF16 * load.gathered + DTYPES[mesh.reduce_dtype].itemsize * plan.train * load.reduced
    dp *= (plan.shards - 1) / plan.shards
    # where there are copies, a ring sends the gradients twice
    dp += 2 * FP32 * plan.train * load.params / plan.shards * (mesh.dp_replicate > 1)
    return {"tp": tp, "pp": pp, "dp": dp}


def step_of(plan: PlanConfig) -> dict[str, float]:
    """Return a step's seconds and MFU in percent, then the seconds by what they go to. It is a
    roofline without overlap; the slowest pipeline rank sets the pace."""
    cfg = plan.model
    mesh = plan.mesh
    peaks = {"flops": PEAK_FLOPS[plan.gpu], **vars(GPUS[plan.gpu])}
    rate = {name: peaks[name] * share for name, share in REACHED.items()}
    wire = wire_of(plan)
    load = busiest(plan)
    head = 2 * cfg.vocab_size * cfg.dim
    block = plan.passes.products * (flops_per_token(cfg) / 3 - head) / cfg.n_layers
    work = [rank.layers * block for rank in loads_of(plan)]
    work[mesh.rank_of(mesh.n_stages - 1)] += plan.passes.head * head
    tokens = plan.n_micro * plan.micro_batch * cfg.seq_len
    touched = plan.passes.elements * (BYTES_PER_DIM * cfg.dim + BYTES_PER_FFN * cfg.ffn_dim)
    seconds = {
        "matrix products": tokens * max(work) / mesh.tp / rate["flops"],
        "element-wise": tokens * touched * load.layers / mesh.tp / rate["hbm"],
        "tp traffic": wire["tp"] / rate["nvlink" if mesh.tp <= GPUS_PER_NODE else "network"],
    }
    unfilled = ZERO_BUBBLE if plan.train and mesh.schedule != "1f1b" else 1
    seconds["bubble"] = sum(seconds.values()) * (mesh.pp - 1) / (mesh.vp * plan.n_micro) * unfilled
    seconds["pp traffic"] = wire["pp"] / rate["network"]
    # a ring enters a node once: its GPUs of one dp group share their network cards
    cards = max(1, GPUS_PER_NODE // mesh.tp)
    seconds["dp traffic"] = wire["dp"] / min(rate["nvlink"], rate["network"] * cards)
    seconds["optimizer"] = ADAMW_BYTES * plan.train * load.params / plan.shards / rate["hbm"]
    total = sum(seconds.values())
    useful = plan.batch * cfg.seq_len * flops_per_token(cfg)
    return {"seconds": total, "mfu": 100 * useful / (total * plan.gpus * peaks["flops"]), **seconds}


def validation_of(plan: PlanConfig) -> float:
    """Return the seconds of a validation, of one source, with the batches of the large presets."""
    rounds = PRESETS["nemotron4_340b"]().eval_batches * plan.n_micro / plan.round
    a_round = replace(plan, batch=plan.batch // plan.n_micro * plan.round, train=False)
    return rounds * step_of(a_round)["seconds"]


# ---- tables --------------------------------------------------------------------------------------


def print_plan(plan: PlanConfig) -> None:
    """Log a layout's memory, and the seconds and MFU that are predicted for it."""
    plan.mesh.check(plan.model, plan.gpus, plan.batch, plan.micro_batch)
    log.info(f"{plan.shape} on {plan.gpus:,} x {plan.gpu}: {plan.mesh.shape(plan.gpus)}")
    parts = fullest(plan)
    for name, size in parts.items():
        log.info(f"{name:34}{size / 1e9:8.2f} GB")
    memory = GPUS[plan.gpu].memory
    verdict = "fits" if parts["sum"] <= memory else "DOES NOT FIT"
    log.info(f"{verdict}: the fullest GPU needs {parts['sum'] / 1e9:.1f} of {memory / 1e9:.0f} GB")
    predicted = [f"{name} {value:.2f}" for name, value in step_of(plan).items()]
    log.info(f"predicted: {', '.join(predicted)}")
    log.info(f"validation: {validation_of(plan):.2f} s for each source")


def print_report(plan: PlanConfig) -> None:
    """Log predictions beside the rows of the report's Table 2."""
    log.info("  GPUs  batch   predicted s   reported s   predicted MFU   reported MFU")
    for gpus, batch, seconds, mfu in REPORT_ROWS:
        step = step_of(replace(plan, gpus=gpus, batch=batch, report=False))
        ours = f"{gpus:6,} {batch:6,} {step['seconds']:13.2f} {seconds:12.1f}"
        log.info(f"{ours} {step['mfu']:15.1f} {mfu:14.1f}")


def search(plan: PlanConfig) -> list[PlanConfig]:
    """Return the plans that fit, fastest first: tp and micro-batch in powers of two, stages that
    divide the layers, every recompute, schedule 1F1B."""
    n_layers = plan.model.n_layers
    divisors = [n for n in range(1, n_layers + 1) if n_layers % n == 0]
    found = []
    for tp, pp, vp, micro_batch, how in product(
        (1, 2, 4, 8), divisors, divisors, (1, 2, 4), ("none", "selective", "full")
    ):
        mesh = replace(plan.mesh, tp=tp, pp=pp, vp=vp, recompute=how, schedule="1f1b")
        option = replace(plan, mesh=mesh, micro_batch=micro_batch, search=0)
        with suppress(ValueError):
            mesh.check(plan.model, plan.gpus, plan.batch, micro_batch)
            if n_layers % mesh.n_stages == 0 and fullest(option)["sum"] <= GPUS[plan.gpu].memory:
                found.append(option)
    return sorted(found, key=lambda option: step_of(option)["seconds"])


def print_search(plan: PlanConfig) -> None:
    """Log the fastest meshes that fit."""
    found = search(plan)
    log.info(f"{len(found)} meshes fit {plan.gpus:,} x {plan.gpu} with batch {plan.batch:,}")
    for option in found[: plan.search]:
        mesh = option.mesh
        needs = f"{step_of(option)['seconds']:8.2f} s {fullest(option)['sum'] / 1e9:7.1f} GB"
        axes = f"tp {mesh.tp} pp {mesh.pp} vp {mesh.vp} dp {option.shards}"
        log.info(f"{needs}  {axes} micro_batch {option.micro_batch} recompute {mesh.recompute}")


def main() -> None:
    set_up_logging()
    try:
        plan = tyro.cli(PlanConfig, prog="python -m recipes.plan")
        show = print_report if plan.report else print_search if plan.search else print_plan
        show(plan)
    except ValueError as error:
        sys.exit(f"recipes.plan: error: {error} (--search 10 lists what fits)")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends it without a word
    main()
