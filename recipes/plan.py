"""The dry run: what a layout needs of each GPU, and how long a step should take.

python -m recipes.plan nemotron4-340b --gpus 6144
"""

import difflib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.tensor.parallel as styles
import tyro
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model import SHAPES, ModelConfig, count_params, flops_per_token, rope_angles
from parallel import (
    AXES,
    DTYPES,
    GPUS,
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


# ---- the dry run ---------------------------------------------------------------------------------

# Shares of the data sheets' rates that real work reaches. Assumed, not measured: no GPU has run
# this code yet, and they are not fitted to the report's iteration times.
REACHED = {"flops": 0.70, "hbm": 0.80, "nvlink": 0.75, "network": 0.70}

# Report Table 2: GPUs, sequences, seconds an iteration, MFU in percent; tp 8, pp 12, vp 8
REPORT_ROWS = ((1536, 768, 10.3, 42.4), (3072, 1536, 10.3, 42.3), (6144, 2304, 8.0, 41.0))


# Llama 3.1 for the dry run: SwiGLU's three matrices as two of 1.5 times the width, which have its
# parameters and FLOPs; rotary share and norms do not matter here
LLAMA = {
    "llama3.1-8b": ModelConfig(4096, 32, 32, 8, 128, 21504, vocab_size=128256, seq_len=8192),
    "llama3.1-70b": ModelConfig(8192, 80, 64, 8, 128, 43008, vocab_size=128256, seq_len=8192),
}
PLANNED = SHAPES | LLAMA

# torchtitan's benchmarks/llama3_h100_202412_torchtitan.md and issue 8: GPUs, local batch, tp,
# recompute, tokens/s of a GPU, compiled or not; bf16. The 70B's local batch is that of its table 4.
TITAN_ROWS = (
    ("llama3.1-8b", 128, 2, 1, "selective", "eager", 5605),
    ("llama3.1-8b", 128, 2, 1, "selective", "compiled", 6514),
    ("llama3.1-70b", 256, 16, 8, "full", "compiled", 597),
)


@dataclass(frozen=True)
class PlanConfig:
    """What a layout needs of each GPU, and how long a step should take. Nothing is trained: the
    model is built by the training code itself, on meta tensors, in a process group that is not
    there."""

    shape: tyro.conf.Positional[str] = "nemotron4-340b"
    """A name of model.SHAPES, or of LLAMA."""
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
        if min(self.gpus, self.batch, self.micro_batch) < 1:
            sizes = f"gpus={self.gpus}, batch={self.batch}, micro_batch={self.micro_batch}"
            raise ValueError(f"{sizes}: each must be at least 1")
        if self.report and self.shape != "nemotron4-340b":
            raise ValueError(f"--report is about nemotron4-340b, not {self.shape}")
        for what, name, table in (("shape", self.shape, PLANNED), ("gpu", self.gpu, GPUS)):
            if name not in table:
                close = difflib.get_close_matches(name, table, n=1, cutoff=0.3) or list(table)
                raise ValueError(f"no {what} {name!r}: did you mean {', '.join(close)}?")

    @property
    def n_micro(self) -> int:
        """Micro-batches of each data-parallel process."""
        return self.batch // self.mesh.dp(self.gpus) // self.micro_batch

    @property
    def shards(self) -> int:
        return self.mesh.shape(self.gpus)["dp_shard"]


@contextmanager
def imagined_mesh(how: MeshConfig, world: int, rank: int) -> Iterator[DeviceMesh]:
    """The mesh as one rank of a job of any size would see it."""
    # a private module of torch, kept to the dry run
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
    """What a block keeps of a micro-batch until its backward: run on meta tensors, and counted."""
    from torch.distributed._tools.mem_tracker import MemTracker  # private: the dry run alone

    with imagined_mesh(MeshConfig(tp=tp), tp, 0) as mesh, patch("model.attend", flash_on_meta):
        model = on_meta(replace(cfg, n_layers=1)).to(torch.bfloat16)
        with torch.device("meta"):
            positions = torch.zeros(micro_batch, cfg.seq_len, dtype=torch.long)
            hidden = (micro_batch, cfg.seq_len // tp, cfg.dim)
            x = torch.empty(hidden, dtype=torch.bfloat16, requires_grad=True)
        if tp > 1:
            styles.parallelize_module(model, mesh["tp"], tp_plan())
        if recompute != "none":
            recompute_blocks(model, recompute)
        tracker = MemTracker()
        tracker.track_external(model, x)
        with tracker:
            out = model.blocks["0"](x, rope_angles(cfg, positions), None, positions, None)
            kept = tracker.get_tracker_snapshot("current")[torch.device("meta")]
        del out
    return sum(n for kind, n in kept.items() if "ACT" in str(kind))


def layers_of(cfg: ModelConfig, how: MeshConfig) -> list[list[int]]:
    """For each pipeline rank, how many layers each of its stages has."""
    counts = [len(part) for part in split_layers(cfg, how.n_stages)]
    return [[counts[s] for s in how.stages_of(rank)] for rank in range(how.pp)]


def rank_params(cfg: ModelConfig, how: MeshConfig, rank: int) -> tuple[int, int]:
    """Parameters of a pipeline rank after the tensor-parallel cut, before FSDP's. (all, the largest
    unit that FSDP gathers at once)"""
    block = cfg.dim * 2 * (cfg.head_dim * (cfg.n_heads + cfg.n_kv_heads) + cfg.ffn_dim)
    block = block // how.tp + 4 * cfg.dim
    vocabulary, stages = cfg.vocab_size * cfg.dim // how.tp, how.stages_of(rank)
    embed = vocabulary if 0 in stages else 0
    last = 2 * cfg.dim + (cfg.n_attributes * (cfg.dim + 1) or vocabulary)
    head = last if how.n_stages - 1 in stages else 0
    return sum(layers_of(cfg, how)[rank]) * block + embed + head, max(block, embed, head)


def in_flight(how: MeshConfig, rank: int, n_micro: int) -> int:
    """Largest number of (micro-batch, stage) pairs whose activations a rank holds."""
    if how.pp == 1:
        return 1
    if how.schedule == "zbv":
        return min(2 * n_micro, 2 * how.pp)
    if how.vp == 1 and how.schedule == "1f1b":
        return min(n_micro, how.pp - rank)
    a_round = n_micro // max(1, n_micro // how.pp)  # torch's interleaved schedules go in rounds
    warm_up = (how.vp - 1) * a_round + 2 * (how.pp - rank - 1)
    return min(n_micro * how.vp, warm_up + 1)


def memory_of(c: PlanConfig, rank: int) -> dict[str, float]:
    """Bytes on a GPU of a pipeline rank, by what they hold."""
    cfg, how, B = PLANNED[c.shape], c.mesh, c.micro_batch
    width, reduced = DTYPES[how.dtype].itemsize, DTYPES[how.reduce_dtype].itemsize
    params, unit = rank_params(cfg, how, rank)
    mine = -(-params // c.shards)
    # FSDP adds the micro-batches' up whole, in the dtype that it will reduce in
    adding = params if c.n_micro > 1 else 2 * unit
    stages = max(layers_of(cfg, how)[rank]) * in_flight(how, rank, c.n_micro)
    kept = activation_bytes(cfg, how.tp, B, how.recompute)
    redone = activation_bytes(cfg, how.tp, B, "none") if how.recompute != "none" else 0
    parts = {
        "master weights (fp32)": 4 * mine,
        "optimizer (fp32)": 8 * mine,
        "gradients, sharded (fp32)": 4 * mine,
        "gathered weights": width * (2 * unit if how.reshards else params),
        f"gradients, adding up ({how.reduce_dtype})": reduced * adding,
        "activations in flight": kept * stages,
        "recomputed block": redone,
    }
    if how.n_stages - 1 in how.stages_of(rank):
        tokens, V = B * cfg.seq_len, cfg.vocab_size // how.tp
        chunks, kept_from = TokenLogProbs.chunks(tokens, V)
        logits = 4 * max(c.stop - c.start for c in chunks) + width * (tokens - kept_from)
        head = 4 * V * cfg.dim + 2 * width * tokens * cfg.dim
        parts["logits and head gradient"] = V * logits + head
    return parts


def wire_of(c: PlanConfig) -> dict[str, float]:
    """Bytes that a GPU of the busiest pipeline rank sends in a step, by axis."""
    cfg, how, n_micro, shards = PLANNED[c.shape], c.mesh, c.n_micro, c.shards
    hidden = c.micro_batch * cfg.seq_len * cfg.dim * 2  # bf16
    gathers = {"none": 8, "selective": 10, "full": 12}[how.recompute]  # a layer
    per_layer = gathers * hidden * (how.tp - 1) / how.tp
    params = max(rank_params(cfg, how, rank)[0] for rank in range(how.pp))
    # one reduction; weights gathered in bf16 once, or where they are freed for every pass
    passes = 2 * n_micro if how.reshards else 1
    dp = (shards - 1) / shards * params * (2 * passes + DTYPES[how.reduce_dtype].itemsize)
    return {
        "tp": n_micro * max(map(sum, layers_of(cfg, how))) * per_layer,
        "pp": 2 * n_micro * how.vp * hidden / how.tp if how.pp > 1 else 0.0,
        "dp": dp + (8 * params / shards if how.dp_replicate > 1 else 0),
    }


def step_of(c: PlanConfig) -> dict[str, float]:
    """A step's seconds and MFU in percent, then the seconds by what they go to. A roofline without
    overlap; the slowest pipeline rank sets the pace."""
    cfg, how, gpu, n_micro = PLANNED[c.shape], c.mesh, GPUS[c.gpu], c.n_micro
    rate = {name: getattr(gpu, name) * share for name, share in REACHED.items()}
    tokens, layers = c.micro_batch * cfg.seq_len, [sum(n) for n in layers_of(cfg, how)]
    head = 6 * cfg.vocab_size * cfg.dim
    block = (flops_per_token(cfg) - head) / cfg.n_layers * (4 / 3 if how.recompute == "full" else 1)
    work = [n * block for n in layers]
    work[how.rank_of()[how.n_stages - 1]] += head * 8 / 6  # its logits are computed twice
    # norms, residuals and squared ReLU, in bytes; backward counts twice
    passes = 3 if how.recompute == "none" else 4
    touched = (52 * cfg.dim + 8 * cfg.ffn_dim) * tokens / how.tp * passes
    wire, params = wire_of(c), max(rank_params(cfg, how, r)[0] for r in range(how.pp))
    seconds = {
        "matrix products": n_micro * tokens * max(work) / how.tp / rate["flops"],
        "element-wise": n_micro * max(layers) * touched / rate["hbm"],
        "tp traffic": wire["tp"] / rate["nvlink" if how.tp <= 8 else "network"],
    }
    # with zero-bubble schedules weight gradients fill two thirds of it at best
    unfilled = 1 if how.schedule == "1f1b" else 1 / 3
    seconds["bubble"] = sum(seconds.values()) * (how.pp - 1) / (how.vp * n_micro) * unfilled
    seconds["pp traffic"] = wire["pp"] / rate["network"]
    # a ring enters a node once: its GPUs of one dp group share their network cards
    seconds["dp traffic"] = wire["dp"] / min(rate["nvlink"], rate["network"] * max(1, 8 // how.tp))
    seconds["optimizer"] = 28 * params / c.shards / rate["hbm"]  # reads p, g, m, v; writes p, m, v
    total = sum(seconds.values())
    mfu = 100 * c.batch * cfg.seq_len * flops_per_token(cfg) / (total * c.gpus * gpu.flops)
    return {"seconds": total, "mfu": mfu, **seconds}


def built_params(c: PlanConfig, rank: int) -> tuple[int, int, int]:
    """Parameters of a pipeline rank as the training code lays them out. (elements on its first GPU,
    elements before tensor and data parallelism, tensors)"""
    cfg, how = PLANNED[c.shape], c.mesh
    with imagined_mesh(how, c.gpus, rank * (c.gpus // how.pp)) as mesh:
        layers, last = split_layers(cfg, how.n_stages), how.n_stages - 1
        stages = [build_stage(cfg, s, layers[s], last, mesh, how, []) for s in how.stages_of(rank)]
        params = [p for stage in stages for p in stage.model.parameters()]
        here = sum(p.to_local().numel() for p in params)
        return here, sum(p.numel() for p in params), len(params)


def print_plan(c: PlanConfig) -> None:
    """The layout's table: first, middle and last pipeline rank, the wire, the prediction."""
    how, gpu = c.mesh, GPUS[c.gpu]
    how.check(PLANNED[c.shape], c.gpus, c.batch, c.micro_batch)
    axes = ", ".join(f"{axis} {n}" for axis, n in how.shape(c.gpus).items())
    log.info(f"{c.shape} on {c.gpus:,} x {c.gpu}: {axes}")
    built = [built_params(c, rank) for rank in range(how.pp)]
    log.info(f"parameters, built stage by stage: {sum(whole for _, whole, _ in built):,}")
    tables = [memory_of(c, rank) for rank in range(how.pp)]
    peaks = [sum(table.values()) for table in tables]
    ranks = sorted({0, how.pp // 2, how.pp - 1})

    def row(name: str, values: list[float]) -> None:
        log.info(f"{name:34}" + "".join(f"{values[rank]:>10.2f}" for rank in ranks))

    log.info(f"{'GB on a GPU of pipeline rank':34}" + "".join(f"{rank:>10}" for rank in ranks))
    row("parameters on it (millions)", [here / 1e6 for here, _, _ in built])
    for part in tables[-1] | tables[0]:
        row(part, [table.get(part, 0) / 1e9 for table in tables])
    row("peak", [peak / 1e9 for peak in peaks])
    verdict = "fits" if max(peaks) <= gpu.memory else "DOES NOT FIT"
    needs = f"the fullest GPU needs {max(peaks) / 1e9:.1f} GB of {gpu.memory / 1e9:.0f} GB"
    log.info(f"{verdict}: {needs}")
    for axis, n in wire_of(c).items():
        log.info(f"on the wire, {axis}: {n / 1e9:.1f} GB per GPU and step")
    log.info(f"bubble (p - 1) / (v m): {100 * (how.pp - 1) / (how.vp * c.n_micro):.1f} %")
    step = step_of(c)
    seconds, mfu = step.pop("seconds"), step.pop("mfu")
    log.info("seconds: " + ", ".join(f"{what} {s:.2f}" for what, s in step.items()))
    log.info(f"predicted: {seconds:.2f} s an iteration, MFU {mfu:.1f} %")


def print_report(c: PlanConfig) -> None:
    log.info("  GPUs  batch   predicted s   reported s   predicted MFU   reported MFU")
    for gpus, batch, seconds, mfu in REPORT_ROWS:
        c.mesh.check(PLANNED[c.shape], gpus, batch, c.micro_batch)
        step = step_of(replace(c, gpus=gpus, batch=batch))
        ours = f"{gpus:6,} {batch:6,} {step['seconds']:13.2f} {seconds:12.1f}"
        log.info(f"{ours} {step['mfu']:15.1f} {mfu:14.1f}")
    log.info(f"{'torchtitan, tokens/s of a GPU':57}predicted  published   error")
    for name, gpus, batch, tp, recompute, how, published in TITAN_ROWS:
        mesh = MeshConfig(tp=tp, recompute=recompute)
        size = dict(gpus=gpus, batch=batch * gpus // tp, micro_batch=batch, gpu="H100 HBM2e")
        plan = PlanConfig(name, mesh=mesh, **size)
        rate = plan.batch * PLANNED[name].seq_len / gpus / step_of(plan)["seconds"]
        what = f"{name} on {gpus}, tp {tp}, {recompute} recompute, {how}"
        log.info(f"{what:57}{rate:9,.0f}{published:11,}{100 * (rate / published - 1):+6.0f} %")


def search(c: PlanConfig) -> list[tuple[float, float, PlanConfig]]:
    """(seconds, bytes, plan) of the meshes of powers and divisors that fit, fastest first."""
    cfg, found = PLANNED[c.shape], []
    stages = [n for n in range(1, cfg.n_layers + 1) if cfg.n_layers % n == 0]
    virtual = [(pp, n // pp) for n in stages for pp in stages if n % pp == 0 and (pp > 1 or n == 1)]
    options = product((1, 2, 4, 8), virtual, (1, 2, 4), ("none", "selective", "full"))
    for tp, (pp, vp), micro_batch, recompute in options:
        how = replace(c.mesh, tp=tp, pp=pp, vp=vp, recompute=recompute, schedule="1f1b")
        option = replace(c, mesh=how, micro_batch=micro_batch)
        try:
            how.check(cfg, c.gpus, c.batch, micro_batch)
        except ValueError:
            continue
        peak = max(sum(memory_of(option, rank).values()) for rank in (0, pp - 1))
        if peak <= GPUS[c.gpu].memory:
            found.append((step_of(option)["seconds"], peak, option))
    return sorted(found, key=lambda f: f[0])


def print_search(c: PlanConfig) -> None:
    found = search(c)
    log.info(f"{len(found)} meshes fit {c.gpus:,} x {c.gpu} with batch {c.batch:,}")
    for seconds, peak, p in found[: c.search]:
        m = p.mesh
        rate = f"{seconds:8.2f} s  MFU {step_of(p)['mfu']:4.1f} %  {peak / 1e9:6.1f} GB"
        axes = f"tp {m.tp} pp {m.pp} vp {m.vp} dp {p.shards}"
        log.info(f"{rate}  {axes} micro_batch {p.micro_batch} recompute {m.recompute}")


def print_serving(c: PlanConfig) -> None:
    """A decoding step reads every weight but the input embedding, and each sequence's cache."""
    cfg, gpu = PLANNED[c.shape], GPUS[c.gpu]
    embedding, rest = count_params(cfg)
    kv = cfg.n_layers * 2 * cfg.n_kv_heads * cfg.head_dim * 2
    log.info(f"{c.shape} on {c.gpus} x {c.gpu}; KV cache {kv:,} bytes a token (bf16)")
    for name, width in (("bf16", 2), ("fp8 (embedding and head bf16)", 1)):
        flops = gpu.flops * 2 / width
        weights = width * rest + 2 * embedding
        free = 0.9 * gpu.memory * c.gpus - weights
        log.info(f"{name}: weights {weights / 1e9:.1f} GB, {weights / c.gpus / 1e9:.1f} a GPU")
        if free <= 0:
            log.info(f"  DOES NOT FIT {c.gpus} x {gpu.memory / 1e9:.0f} GB at 90 %")
            continue
        n = int(free // (kv * 4096))
        log.info(f"  free for KV at 90 %: {free / 1e9:.0f} GB, {n} sequences of 4,096")
        for batch, context in ((1, 0), (8, 1024), (32, 1024), (64, 2048), (128, 2048)):
            read = weights - embedding + batch * context * kv
            compute = 2 * (rest + embedding / 2) * batch / (flops * c.gpus)
            rate = batch / max(read / (gpu.hbm * c.gpus), compute)
            log.info(f"  ceiling, batch {batch:3} at {context:4} tokens: {rate:7.1f} tokens/s")
    log.info("a pipeline divides the batch-1 ceiling by its stages; no traffic is counted")


def main() -> None:
    set_up_logging()
    try:
        c = tyro.cli(PlanConfig, prog="recipes.plan")
        modes = ((c.report, print_report), (c.search, print_search), (c.serve, print_serving))
        next((show for asked, show in modes if asked), print_plan)(c)
    except ValueError as e:
        sys.exit(f"recipes.plan: error: {e} (--search 10 lists what fits)")


if __name__ == "__main__":
    main()
