"""Plan a run without a GPU: the memory that a layout needs, and the time that a step should take.

The training code itself builds the model, on meta tensors in a process group that does not exist;
a roofline then predicts the step.

    python -m recipes.plan nemotron4-340b --gpus 6144
    python -m recipes.plan --report
    python -m recipes.plan nemotron4-15b --gpus 64 --batch 384 --search 10
"""

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product
from typing import Literal, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from model import SHAPES, ModelConfig, flops_per_token, rope_angles
from parallel import (
    AXES,
    DTYPES,
    PEAK_FLOPS,
    MeshConfig,
    TokenLogProbs,
    build_stage,
    on_meta,
    recompute_blocks,
    split_layers,
    tp_plan,
)
from train import set_up_logging

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

# names that --help lists, read off the tables
ShapeName = Literal[tuple(SHAPES)]  # pyrefly: ignore[invalid-literal]
GpuName = Literal[tuple(GPUS)]  # pyrefly: ignore[invalid-literal]

REPORT_MESH = MeshConfig(tp=8, pp=12, vp=8, recompute="selective")
SEARCHED = ("tp", "pp", "vp", "recompute", "schedule")  # fields of a mesh that --search sets


@dataclass(frozen=True)
class PlanConfig:
    """Predict the memory that a layout needs on each GPU, and the time that a step takes."""

    shape: tyro.conf.Positional[ShapeName] = "nemotron4-340b"  # Name of a model.
    gpus: int = 6144  # Number of GPUs.
    gpu: GpuName = "H100"  # Kind of GPU.
    batch: int = 2304  # Sequences per step.
    micro_batch: int = 1  # Sequences per micro-batch.
    mesh: MeshConfig = REPORT_MESH
    """Layout of the GPUs; the default is the report's."""
    report: bool = False  # Predictions beside the three rows of the report's Table 2.
    search: int = 0  # Number of meshes to list, fastest first, of those that fit.

    def __post_init__(self) -> None:
        for name, least in (("gpus", 1), ("batch", 1), ("micro_batch", 1), ("search", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        for f in fields(self):
            if self.report and f.name != "report" and getattr(self, f.name) != f.default:
                raise ValueError(f"--report is of the report's own layout: leave {f.name} out")
        for name in SEARCHED if self.search else ():
            if getattr(self.mesh, name) != getattr(REPORT_MESH, name):
                raise ValueError(f"--search tries each {name} itself: leave --mesh.{name} out")

    @property
    def model(self) -> ModelConfig:
        return SHAPES[self.shape]

    @property
    def n_micro(self) -> int:
        """Return the number of micro-batches of each data-parallel process."""
        return self.batch // self.mesh.dp(self.gpus) // self.micro_batch

    @property
    def shards(self) -> int:
        """Return the number of GPUs that FSDP divides a parameter among."""
        return self.mesh.shape(self.gpus)["dp_shard"]

    def check(self) -> None:
        """Raise a ValueError for a layout that cannot run."""
        self.mesh.check(self.model, self.gpus, self.batch, self.micro_batch)


# ---- what a rank holds ---------------------------------------------------------------------------


@contextmanager
def imagined_mesh(mesh: MeshConfig, world: int, rank: int) -> Iterator[DeviceMesh]:
    """Build the mesh as one rank of a job of any size would see it."""
    # a private module of torch, kept to the dry run
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield init_device_mesh("cpu", tuple(mesh.shape(world).values()), mesh_dim_names=AXES)
    finally:
        dist.destroy_process_group()


def kinds_of(plan: PlanConfig) -> list[tuple[int, bool, bool]]:
    last = plan.mesh.n_stages - 1  # a stage: its layers, with the embedding or not, the head or not
    layers = split_layers(plan.model, plan.mesh.n_stages)
    return [(len(part), s == 0, s == last) for s, part in enumerate(layers)]


@cache
def stage_params(plan: PlanConfig, kind: tuple[int, bool, bool]) -> tuple[int, int]:
    """Count the parameters of a stage of this kind as the training code lays them out: (on the
    first GPU that has it, before they are divided by tensor and data parallelism)."""
    mesh = plan.mesh
    s = kinds_of(plan).index(kind)
    with imagined_mesh(mesh, plan.gpus, mesh.rank_of(s) * (plan.gpus // mesh.pp)) as devices:
        params = list(build_stage(plan.model, s, devices, mesh, []).model.parameters())
        here = sum(p.to_local().numel() for p in params)
    return here, sum(p.numel() for p in params)


def built_params(plan: PlanConfig, rank: int) -> tuple[int, int]:
    """Sum stage_params over a pipeline rank's stages: those of a kind are equal."""
    kinds = kinds_of(plan)
    counts = [stage_params(plan, kinds[s]) for s in plan.mesh.stages_of(rank)]
    here, whole = zip(*counts, strict=True)
    return sum(here), sum(whole)


class RankShare(NamedTuple):
    """Describe a pipeline rank's part of the model."""

    layers: list[int]  # of each of its stages
    params: int  # after tensor parallelism's cut, before FSDP's
    unit: int  # those of the largest unit that FSDP gathers at once


def shares_of(plan: PlanConfig) -> list[RankShare]:
    """Return each pipeline rank's part of the model, in closed form."""
    cfg = plan.model
    mesh = plan.mesh
    counts = [len(layers) for layers in split_layers(cfg, mesh.n_stages)]
    block = cfg.dim * 2 * (cfg.head_dim * (cfg.n_heads + cfg.n_kv_heads) + cfg.ffn_dim)
    block = block // mesh.tp + 4 * cfg.dim  # weight and bias of two norms
    vocabulary = cfg.vocab_size * cfg.dim // mesh.tp
    head = 2 * cfg.dim + (cfg.n_attributes * (cfg.dim + 1) or vocabulary)
    shares = []
    for rank in range(mesh.pp):
        stages = mesh.stages_of(rank)
        layers = [counts[s] for s in stages]
        ends = [vocabulary * (0 in stages), head * (mesh.n_stages - 1 in stages)]
        shares.append(RankShare(layers, sum(layers) * block + sum(ends), max(block, *ends)))
    return shares


def busiest(plan: PlanConfig) -> tuple[int, int]:
    """Return the most layers and the most parameters that a pipeline rank has."""
    shares = shares_of(plan)
    layers = max(sum(share.layers) for share in shares)
    return layers, max(share.params for share in shares)


# ---- memory --------------------------------------------------------------------------------------


def flash_on_meta(q: Tensor, k: Tensor, v: Tensor, visible: None) -> Tensor:
    """Allocate what a flash kernel does; on meta tensors SDPA would take the path with (T, T)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(q, k, v, 0.0, True)[0].transpose(1, 2)


@cache
def activation_bytes(cfg: ModelConfig, tp: int, micro_batch: int, recompute: str) -> int:
    """Count the bytes that a block keeps of a micro-batch until its backward, by running it on meta
    tensors."""
    from torch.distributed._tools.mem_tracker import MemTracker  # private: the dry run alone

    with imagined_mesh(MeshConfig(tp=tp), tp, 0) as devices, patch("model.attend", flash_on_meta):
        model = on_meta(replace(cfg, n_layers=1)).to(torch.bfloat16)
        positions = torch.zeros(micro_batch, cfg.seq_len, dtype=torch.long, device="meta")
        hidden = (micro_batch, cfg.seq_len // tp, cfg.dim)
        x = torch.empty(hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
        if tp > 1:
            parallelize_module(model, devices["tp"], tp_plan())
        if recompute != "none":
            recompute_blocks(model, recompute)
        tracker = MemTracker()
        tracker.track_external(model, x)
        with tracker:
            out = model.blocks["0"](x, rope_angles(cfg, positions), None, positions, None)
            kept = tracker.get_tracker_snapshot("current")[torch.device("meta")]
        del out
    return sum(size for kind, size in kept.items() if "ACT" in str(kind))


def in_flight(mesh: MeshConfig, rank: int, n_micro: int) -> int:
    """Return the largest number of (micro-batch, stage) pairs whose activations a rank holds."""
    if mesh.pp == 1:
        return 1
    if mesh.schedule == "zbv":
        return min(2 * n_micro, 2 * mesh.pp)
    if mesh.vp == 1 and mesh.schedule == "1f1b":
        return min(n_micro, mesh.pp - rank)
    a_round = n_micro // max(1, n_micro // mesh.pp)  # torch's interleaved schedules go in rounds
    warm_up = (mesh.vp - 1) * a_round + 2 * (mesh.pp - rank - 1)
    return min(n_micro * mesh.vp, warm_up + 1)


FP32 = 4  # bytes of a number
BF16 = 2


def memory_of(plan: PlanConfig, rank: int) -> dict[str, float]:
    """Return the bytes on a GPU of a pipeline rank, by what they hold."""
    cfg = plan.model
    mesh = plan.mesh
    width = DTYPES["fp32" if mesh.dtype == "fp32" else "bf16"].itemsize  # auto is for GPUs here
    layers, params, unit = shares_of(plan)[rank]
    mine = -(-params // plan.shards)
    two_units = 2 * unit  # the one that computes, and the next one, prefetched
    summed = params if plan.n_micro > 1 else two_units  # over micro-batches, before it is reduced
    stages = max(layers) * in_flight(mesh, rank, plan.n_micro)
    kept = activation_bytes(cfg, mesh.tp, plan.micro_batch, mesh.recompute)
    again = activation_bytes(cfg, mesh.tp, plan.micro_batch, "none")
    parts = {
        "master weights (fp32)": FP32 * mine,
        "optimizer (fp32)": 2 * FP32 * mine,  # AdamW's two moments
        "gradients, sharded (fp32)": FP32 * mine,
        "gathered weights": width * (two_units if mesh.reshards else params),
        f"gradients, adding up ({mesh.reduce_dtype})": DTYPES[mesh.reduce_dtype].itemsize * summed,
        "activations in flight": kept * stages,
        "recomputed block": again if mesh.recompute != "none" else 0,
        "logits and head gradient": 0,
    }
    if mesh.n_stages - 1 in mesh.stages_of(rank):
        tokens = plan.micro_batch * cfg.seq_len
        V = cfg.vocab_size // mesh.tp
        chunks, kept_from = TokenLogProbs.chunks(tokens, V)
        logits = FP32 * max(chunk.stop - chunk.start for chunk in chunks)
        exponentials = width * (tokens - kept_from)
        states = 2 * width * tokens * cfg.dim  # the head's input and its gradient
        parts["logits and head gradient"] = V * (logits + exponentials + FP32 * cfg.dim) + states
    return parts


# ---- traffic and time ----------------------------------------------------------------------------

# Transfers of the residual stream by tensor parallelism in a layer: forward gathers the inputs of
# attention and MLP and scatters their outputs (4), backward mirrors that (4); selective recompute
# repeats the two gathers, full recompute all four.
TP_TRANSFERS = {"none": 8, "selective": 10, "full": 12}
# passes over a block's element-wise operations: forward 1, backward 2, recompute 1
ELEMENT_PASSES = {"none": 3, "selective": 4, "full": 4}
# Bytes that such a pass moves for each of a token's dim values: two norms read bf16 and write fp32
# (2 x 6), normalise (2 x 8) and go back to bf16 (2 x 6); two residual sums read two and write one
# in bf16 (2 x 6)
BYTES_PER_DIM = 52
# ... and for each of its ffn_dim values: ReLU reads and writes bf16 (4), and so does the square
BYTES_PER_FFN = 8
# full recompute repeats the forward, which is a third of a block's matrix products
FULL_RECOMPUTE = 4 / 3
# FLOPs of a head weight and token: forward 2, backward 4, and its logits are computed twice: 2
HEAD_FLOPS = 8
# Bytes that AdamW moves for a parameter: reads parameter, gradient and both moments (4 x 4
# bytes), writes all but the gradient (3 x 4 bytes)
ADAMW_BYTES = 28
# share of 1F1B's bubble that zero-bubble schedules leave: weight gradients fill two thirds at best
ZERO_BUBBLE = 1 / 3
GPUS_PER_NODE = 8

# Shares of the data sheets' rates that real work reaches. Assumed, not measured: no GPU has run
# this code yet, and they are not fitted to the report's iteration times.
REACHED = {"flops": 0.70, "hbm": 0.80, "nvlink": 0.75, "network": 0.70}


def wire_of(plan: PlanConfig) -> dict[str, float]:
    """Return the bytes that a GPU of the busiest pipeline rank sends in a step, by axis."""
    mesh = plan.mesh
    layers, params = busiest(plan)
    hidden = plan.micro_batch * plan.model.seq_len * plan.model.dim * BF16
    layer = TP_TRANSFERS[mesh.recompute] * hidden * (mesh.tp - 1) / mesh.tp
    # a stage sends a micro-batch's states forward, and their gradient back
    pp = 2 * plan.n_micro * mesh.vp * hidden / mesh.tp if mesh.pp > 1 else 0.0
    # weights are gathered in bf16 once, or where they are freed for each forward and backward
    gathers = 2 * plan.n_micro if mesh.reshards else 1
    sent = BF16 * gathers + DTYPES[mesh.reduce_dtype].itemsize
    dp = (plan.shards - 1) / plan.shards * params * sent
    if mesh.dp_replicate > 1:
        dp += 2 * FP32 * params / plan.shards  # a ring sends the gradients twice
    return {"tp": plan.n_micro * layers * layer, "pp": pp, "dp": dp}


def matrix_flops(plan: PlanConfig) -> float:
    """Return the FLOPs of a token's matrix products in the busiest pipeline rank."""
    cfg = plan.model
    mesh = plan.mesh
    head = cfg.vocab_size * cfg.dim
    block = (flops_per_token(cfg) - 6 * head) / cfg.n_layers
    block *= FULL_RECOMPUTE if mesh.recompute == "full" else 1
    work = [sum(share.layers) * block for share in shares_of(plan)]
    work[mesh.rank_of(mesh.n_stages - 1)] += HEAD_FLOPS * head
    return max(work)


def step_of(plan: PlanConfig) -> dict[str, float]:
    """Return a step's seconds and MFU in percent, then the seconds by what they go to. It is a
    roofline without overlap; the slowest pipeline rank sets the pace."""
    cfg = plan.model
    mesh = plan.mesh
    gpu = GPUS[plan.gpu]
    peaks = {"flops": PEAK_FLOPS[plan.gpu], **vars(gpu)}
    rate = {name: peaks[name] * share for name, share in REACHED.items()}
    wire = wire_of(plan)
    layers, params = busiest(plan)
    tokens = plan.micro_batch * cfg.seq_len
    touched = (BYTES_PER_DIM * cfg.dim + BYTES_PER_FFN * cfg.ffn_dim) * tokens / mesh.tp
    touched *= ELEMENT_PASSES[mesh.recompute]
    seconds = {
        "matrix products": plan.n_micro * tokens * matrix_flops(plan) / mesh.tp / rate["flops"],
        "element-wise": plan.n_micro * layers * touched / rate["hbm"],
        "tp traffic": wire["tp"] / rate["nvlink" if mesh.tp <= GPUS_PER_NODE else "network"],
    }
    unfilled = 1 if mesh.schedule == "1f1b" else ZERO_BUBBLE
    seconds["bubble"] = sum(seconds.values()) * (mesh.pp - 1) / (mesh.vp * plan.n_micro) * unfilled
    seconds["pp traffic"] = wire["pp"] / rate["network"]
    # a ring enters a node once: its GPUs of one dp group share their network cards
    cards = max(1, GPUS_PER_NODE // mesh.tp)
    seconds["dp traffic"] = wire["dp"] / min(rate["nvlink"], rate["network"] * cards)
    seconds["optimizer"] = ADAMW_BYTES * params / plan.shards / rate["hbm"]
    total = sum(seconds.values())
    useful = plan.batch * cfg.seq_len * flops_per_token(cfg)
    return {"seconds": total, "mfu": 100 * useful / (total * plan.gpus * peaks["flops"]), **seconds}


# ---- tables --------------------------------------------------------------------------------------


def print_memory(plan: PlanConfig) -> None:
    """Log the memory of the first, middle and last pipeline rank, and whether the fullest fits."""
    pp = plan.mesh.pp
    columns = []
    total = 0
    for rank in range(pp):
        here, whole = built_params(plan, rank)
        total += whole
        column = {name: size / 1e9 for name, size in memory_of(plan, rank).items()}
        peak = sum(column.values())
        columns.append({"parameters on it (millions)": here / 1e6, **column, "peak": peak})
    log.info(f"parameters, built of a stage of each kind: {total:,}")
    ranks = sorted({0, pp // 2, pp - 1})
    log.info(f"{'GB on a GPU of pipeline rank':34}" + "".join(f"{rank:>10}" for rank in ranks))
    for name in columns[0]:
        log.info(f"{name:34}" + "".join(f"{columns[rank][name]:>10.2f}" for rank in ranks))
    peak = max(column["peak"] for column in columns)
    memory = GPUS[plan.gpu].memory / 1e9
    verdict = "fits" if peak <= memory else "DOES NOT FIT"
    log.info(f"{verdict}: the fullest GPU needs {peak:.1f} GB of {memory:.0f} GB")


def print_plan(plan: PlanConfig) -> None:
    """Log a layout's memory, traffic, bubble, and predicted seconds and MFU."""
    mesh = plan.mesh
    plan.check()
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape(plan.gpus).items())
    log.info(f"{plan.shape} on {plan.gpus:,} x {plan.gpu}: {axes}")
    print_memory(plan)
    for axis, sent in wire_of(plan).items():
        log.info(f"on the wire, {axis}: {sent / 1e9:.1f} GB per GPU and step")
    log.info(f"bubble (p - 1) / (v m): {100 * (mesh.pp - 1) / (mesh.vp * plan.n_micro):.1f} %")
    step = step_of(plan)
    seconds = step.pop("seconds")
    mfu = step.pop("mfu")
    log.info("seconds: " + ", ".join(f"{part} {value:.2f}" for part, value in step.items()))
    log.info(f"predicted: {seconds:.2f} s an iteration, MFU {mfu:.1f} %")


def print_report(plan: PlanConfig) -> None:
    """Log predictions beside the rows of the report's Table 2."""
    log.info("  GPUs  batch   predicted s   reported s   predicted MFU   reported MFU")
    for gpus, batch, seconds, mfu in REPORT_ROWS:
        row = replace(plan, gpus=gpus, batch=batch, report=False)
        row.check()
        step = step_of(row)
        ours = f"{gpus:6,} {batch:6,} {step['seconds']:13.2f} {seconds:12.1f}"
        log.info(f"{ours} {step['mfu']:15.1f} {mfu:14.1f}")


def search(plan: PlanConfig) -> list[tuple[float, float, PlanConfig]]:
    """Return (seconds, peak bytes, plan) of the meshes that fit, fastest first: tp and micro-batch
    in powers of two, stages that divide the layers, every recompute, schedule 1F1B."""
    n_layers = plan.model.n_layers
    divisors = [n for n in range(1, n_layers + 1) if n_layers % n == 0]
    options = product((1, 2, 4, 8), divisors, divisors, (1, 2, 4), TP_TRANSFERS)
    found = []
    for tp, pp, vp, micro_batch, recompute in options:
        if n_layers % (pp * vp):
            continue
        mesh = replace(plan.mesh, tp=tp, pp=pp, vp=vp, recompute=recompute, schedule="1f1b")
        option = replace(plan, mesh=mesh, micro_batch=micro_batch, search=0)
        try:
            option.check()
        except ValueError:
            continue
        peak = max(sum(memory_of(option, rank).values()) for rank in (0, pp - 1))
        if peak <= GPUS[plan.gpu].memory:
            found.append((step_of(option)["seconds"], peak, option))
    return sorted(found, key=lambda entry: entry[0])


def print_search(plan: PlanConfig) -> None:
    """Log the fastest meshes that fit."""
    found = search(plan)
    log.info(f"{len(found)} meshes fit {plan.gpus:,} x {plan.gpu} with batch {plan.batch:,}")
    for seconds, peak, option in found[: plan.search]:
        mesh = option.mesh
        rate = f"{seconds:8.2f} s  MFU {step_of(option)['mfu']:4.1f} %  {peak / 1e9:6.1f} GB"
        axes = f"tp {mesh.tp} pp {mesh.pp} vp {mesh.vp} dp {option.shards}"
        log.info(f"{rate}  {axes} micro_batch {option.micro_batch} recompute {mesh.recompute}")


def main() -> None:
    set_up_logging()
    try:
        plan = tyro.cli(PlanConfig, prog="python -m recipes.plan")
        if plan.report:
            print_report(plan)
        elif plan.search:
            print_search(plan)
        else:
            print_plan(plan)
    except ValueError as error:
        sys.exit(f"recipes.plan: error: {error} (--search 10 lists what fits)")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends it without a word
    main()
