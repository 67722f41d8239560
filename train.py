"""Pretraining, and `fit`, the one loop that every stage of the system runs through.

A preset is a function that returns a complete frozen config; the command line changes its fields.

    torchrun --nproc_per_node 2 train.py nano
    python train.py nano --steps 50 --out runs/try --lr 2e-3
"""

import json
import logging
import math
import os
import resource
import signal
import sys
import time
from bisect import bisect, bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from fcntl import LOCK_EX, flock
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that spin longer starve a busy machine

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from data import (
    PrepareConfig,
    Sampler,
    TokenData,
    Tokenizer,
    hold,
    load_tokenizer,
    prepare,
    read_records,
    write_whole,
)
from model import SHAPES, ModelConfig, check_ranges, count_params, flops_per_token
from parallel import (
    Batch,
    Checkpoints,
    LossFn,
    MeshConfig,
    Runner,
    from_rank_0,
    init_mesh,
    parsed,
    read_config,
    run,
    set_up_logging,
    step_folders,
    world_size,
)

log = logging.getLogger("nemotron4")


# ---- configs -------------------------------------------------------------------------------------

MANY = 1 << 50  # more steps or samples than any run has


@dataclass(frozen=True)
class Phase:
    """Part of a run that has its own data and learning rate; lengths count samples (sequences)."""

    ramp: tuple[tuple[int, int], ...]
    """Pairs (samples, batch), one after the other; a single pair where the batch does not grow."""
    lr: float  # Peak learning rate.
    min_lr: float  # Learning rate at the end of the cosine, which spans the whole phase.
    warmup: int = 0  # Samples of linear warm-up.
    blend: dict[str, float] = field(default_factory=dict)  # Source weights; empty: the default.
    late_blend: dict[str, float] = field(default_factory=dict)
    """Source weights once the learning rate has fallen below late_below; empty: no change."""
    late_below: float = 0.0  # Learning rate below which late_blend begins.

    def __post_init__(self) -> None:
        check_ranges(self, {"lr": (0, 1e38), "warmup": (0, MANY), "late_below": (0, 1e38)})
        if not self.ramp or min(map(min, self.ramp)) < 1:
            raise ValueError(f"ramp={self.ramp}: pairs of samples and batch, each at least 1")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"lr={self.lr}, min_lr={self.min_lr}: 0 <= min_lr <= lr is needed")
        if self.late_blend and not self.min_lr < self.late_below <= self.lr:
            between = f"between min_lr={self.min_lr} and lr={self.lr}"
            raise ValueError(f"late_below={self.late_below}: a late blend needs a rate {between}")

    @property
    def samples(self) -> int:
        return sum(samples for samples, _ in self.ramp)

    def lr_at(self, samples: int, batch: int) -> float:
        """Return the rate after so many samples of the phase: linear warm-up, then a cosine. It
        counts samples, as NVIDIA's launch script does, so that a growing batch does not bend it."""
        if samples < self.warmup:
            return self.lr * (samples + batch) / (self.warmup + batch)
        progress = min(1.0, (samples - self.warmup) / max(1, self.samples - self.warmup))
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2

    def late_from(self) -> int:
        """Return the sample of the phase at which the rate falls below late_below."""
        cosine = 2 * (self.late_below - self.min_lr) / (self.lr - self.min_lr) - 1
        return self.warmup + math.ceil(math.acos(cosine) / math.pi * (self.samples - self.warmup))


class Segment(NamedTuple):
    """Consecutive steps that share a phase and a batch size."""

    first_step: int
    steps: int
    first_sample: int
    batch: int
    phase: Phase
    phase_sample: int  # first sample of the phase


class Schedule:
    """Phases laid out over steps: all that a step needs is a function of its number."""

    def __init__(self, phases: tuple[Phase, ...]) -> None:
        self.segments: list[Segment] = []
        step = 0
        sample = 0
        for phase in phases:
            phase_sample = sample
            for samples, batch in phase.ramp:
                steps = max(1, round(samples / batch))  # whole steps, as in the report's Table 2
                self.segments.append(Segment(step, steps, sample, batch, phase, phase_sample))
                step += steps
                sample += steps * batch
        self.steps = step

    def at(self, step: int) -> Segment:
        """Return the segment of a step."""
        return self.segments[bisect(self.segments, step, key=lambda s: s.first_step) - 1]

    def samples(self, step: int) -> int:
        """Count the samples consumed before a step."""
        segment = self.at(step)
        return segment.first_sample + (step - segment.first_step) * segment.batch

    def lr(self, step: int) -> float:
        segment = self.at(step)
        return segment.phase.lr_at(self.samples(step) - segment.phase_sample, segment.batch)

    def ends_a_segment(self, step: int) -> bool:
        """Tell whether after `step` steps the batch grows or a phase ends, a time to save."""
        return any(step == s.first_step + s.steps for s in self.segments)

    def blends(self) -> dict[int, dict[str, float]]:
        """Map the sample at which each blend begins, always the first of a step, to the blend."""
        begins = {}
        for segment in self.segments:
            if segment.first_sample == segment.phase_sample:
                phase = segment.phase
                begins[segment.first_sample] = phase.blend
                if phase.late_blend:
                    switch = segment.phase_sample + phase.late_from()
                    step = bisect_left(range(self.steps), switch, key=self.samples)
                    begins[self.samples(step)] = phase.late_blend
        return begins


@dataclass(frozen=True)
class RunConfig:
    """Settings that `fit` needs, shared by all stages."""

    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    out: Path | None = None
    """Folder; a run in it is continued. Default: the first new one of runs/PRESET, PRESET-2 ..."""
    init: str = ""
    """Run or Hugging Face folder of the weights to start from (new optimizer). Empty: random."""
    steps: int = 1000  # Optimizer steps; 0: as many as the phases have.
    seed: int = 0  # Seed of the initial weights and of the data order.
    batch: int = 16
    """Sequences per optimizer step, over all processes: the result does not depend on the mesh."""
    micro_batch: int = 4  # Sequences per forward pass of a process; affects memory and speed only.
    lr: float = 1e-4  # Peak learning rate.
    min_lr: float | None = 1e-5  # Learning rate at the end of the cosine; None: a constant rate.
    warmup: int = 0  # Samples of linear warm-up.
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's betas.
    eps: float = 1e-8  # AdamW's epsilon; no source prints it.
    weight_decay: float = 0.1  # Weight decay of matrices; norms and biases have none.
    clip: float = 1.0  # Largest gradient norm; larger gradients are scaled down to it.
    on_bad_step: Literal["stop", "skip"] = "stop"
    """Reaction to a non-finite loss or gradient, or to a spike: end the run, or skip the update."""
    spike: float = 0.0
    """Factor over the median of the last 32 losses above which a loss is a spike; 0: no check."""
    max_skips: int = 10  # Skipped steps after which the run ends all the same.
    eval_every: int = 100  # Steps between validations; the first and the last step validate too.
    eval_batches: int = 8  # Batches of validation data per source.
    log_every: int = 1  # Steps between lines of the log; metrics.jsonl has each step.
    wandb: str = ""  # Project of Weights & Biases that gets the metrics too; empty: none.
    save_every: int = 500  # Steps between checkpoints; the last and the end of a phase save too.
    save_in_background: bool = False  # Training goes on while a checkpoint is being written.
    keep: int = 2  # Newest checkpoints to keep, beside those where a phase ends or the batch grows.
    profile: int = 0  # Steps to profile, from the third of a start on; the trace is in OUT/trace.

    def __post_init__(self) -> None:
        """Refuse settings that no run can have."""
        counts = ("eval_every", "eval_batches", "save_every", "log_every", "keep")
        ranges = dict.fromkeys(counts, (1, MANY))
        ranges |= dict.fromkeys(("steps", "max_skips", "profile", "weight_decay"), (0, MANY))
        ranges |= {"batch": (1, 1 << 24), "micro_batch": (1, 1 << 24), "seed": (-1e30, 1e30)}
        ranges |= {"eps": (0, 1), "clip": (1e-12, math.inf), "spike": (0, math.inf)}
        check_ranges(self, ranges)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: each must be at least 0 and below 1")
        if 0 < self.spike <= 1:
            raise ValueError(f"spike={self.spike}: a factor above 1, or 0 for none")
        self.schedule()  # raises what is wrong with the phases

    def schedule(self) -> Schedule:
        return Schedule((self.only_phase({}),))

    def only_phase(self, blend: dict[str, float]) -> Phase:
        """Return the phase of a run that has just one."""
        steps = max(1, self.steps)  # 0 where the data will tell
        ramp = ((steps * self.batch, self.batch),)
        min_lr = self.lr if self.min_lr is None else self.min_lr
        return Phase(ramp, self.lr, min_lr, self.warmup, blend)


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Settings of a pretraining run."""

    data: Path = Path("data/python")  # Folder made by data.py prepare.
    blend: dict[str, float] = field(default_factory=dict)
    """Source weights. Empty: english, multilingual, code 70/15/15 (the report's), or by tokens."""
    isolate: bool = False
    """Attention within a document only, where several share a window (not so in the report)."""
    phases: tuple[Phase, ...] = ()
    """Phases, which own batch, lr, min_lr, warmup and blend; the run may end sooner, at steps."""

    def __post_init__(self) -> None:
        if self.steps < 1 and not self.phases:
            raise ValueError(f"steps={self.steps}: must be at least 1")
        for name in ("n_attributes", "lora_rank"):
            if getattr(self.model, name):
                raise ValueError(f"model.{name}: none in pretraining, only in align.py's stages")
        super().__post_init__()
        for name in ("batch", "lr", "min_lr", "warmup", "blend"):
            default = getattr(PretrainConfig, name, {})  # blend's is no attribute of the class
            if self.phases and getattr(self, name) != default:
                what = f"{name}={getattr(self, name)}"
                raise ValueError(f"{what}: this run has phases: set --phases.0.{name} and so on")

    def schedule(self) -> Schedule:
        return Schedule(self.phases or (self.only_phase(self.blend),))


# ---- presets -------------------------------------------------------------------------------------


def nano() -> PretrainConfig:
    """Train on a laptop CPU in minutes: every detail of the architecture, on Python's own files."""
    # optimizer of the 8T phase (see `pretraining`); rate, warm-up, batch and length fit this size
    return PretrainConfig(
        model=SHAPES["nano"], mesh=MeshConfig(dtype="fp32"), steps=150, batch=8, micro_batch=2,
        lr=3e-3, min_lr=3e-4, warmup=160, eval_every=50, save_every=50,
    )  # fmt: skip


def nano_two_phase() -> PretrainConfig:
    """Run the full recipe in miniature, on a laptop: batch ramp, two phases, three blends."""
    # The proportions are the report's (see `pretraining`), the sizes ours. The embedded corpus has
    # no question-answering data: its source code takes that role in the second phase.
    ramp = ((240, 4), (480, 8), (1200, 12))
    first = {"english": 0.85, "code": 0.15}
    second = {"english": 0.5, "code": 0.5}
    late = {"english": 0.2, "code": 0.8}
    phases = (
        Phase(ramp, lr=1.5e-3, min_lr=1.5e-4, warmup=160, blend=first),
        Phase(((720, 12),), 1.5e-4, 1.5e-6, blend=second, late_blend=late, late_below=3e-5),
    )
    return PretrainConfig(
        model=SHAPES["nano"], mesh=MeshConfig(dtype="fp32"), phases=phases,
        steps=0, micro_batch=2, eval_every=20,
    )  # fmt: skip


def small() -> PretrainConfig:
    """Train 126M parameters on 2.6B tokens on one GPU, in hours. Prepare data/small with
    --vocab-size 32768 first."""
    # the report is silent at this size: rate, batch and length are common choices, not NVIDIA's
    return PretrainConfig(
        model=SHAPES["small"], data=Path("data/small"), steps=10_000, batch=256, micro_batch=32,
        lr=6e-4, min_lr=6e-5, warmup=256 * 500,
    )  # fmt: skip


def pretraining(lr: float, batch: int) -> tuple[Phase, ...]:
    """Return the two phases of the 340B and the 15B; the batch grows from `batch` to 2 and 3 times.

    8T tokens: batch ramp of the report's Table 2 and of arXiv 2402.16819, Table 2; warm-up of
    3,906,252 samples and cosine to a tenth from NVIDIA's Megatron-LM launch script. 1T more: the
    report prints no numbers; "Reuse, Don't Retrain" (arXiv 2407.07263), by the same team on the
    15B, goes from the minimum rate to its hundredth, with the second blend below a fifth of the
    first rate. The first blend is the report's (section 2.1); the others, unpublished, are ours.
    """
    # 200, 200 and 7600 B tokens, then 1000 B
    ramp = ((48_828_125, batch), (48_828_125, 2 * batch), (1_855_468_750, 3 * batch))
    second_ramp = ((244_140_625, 3 * batch),)
    first = {"english": 0.70, "multilingual": 0.15, "code": 0.15}
    second = {"english": 0.60, "multilingual": 0.10, "code": 0.20, "quality": 0.10}
    late = second | {"english": 0.50, "qa": 0.10}
    return (
        Phase(ramp, lr, lr / 10, warmup=3_906_252, blend=first),
        Phase(second_ramp, lr / 10, lr / 1000, 0, second, late_blend=late, late_below=lr / 50),
    )


def on_many_gpus(shape: str, mesh: MeshConfig, phases: tuple[Phase, ...]) -> PretrainConfig:
    """Return a config with the settings that all large models share."""
    # micro_batch=1 is the launch script's for the 340B; for the others it is not printed
    return PretrainConfig(
        model=SHAPES[shape], mesh=mesh, data=Path("data/nemotron4"), phases=phases,
        steps=0, micro_batch=1, eval_every=1000, save_in_background=True,
    )  # fmt: skip


def nemotron4_340b() -> PretrainConfig:
    """Pretrain as the report does: 9T tokens, tp 8, pp 12 interleaved by 8, 1536 to 6144 H100s.
    Start it with --steps 63578 on 1536, then --steps 95367 on 3072, then the rest on 6144."""
    # report section 2.3; the rate, vp and selective recompute are the launch script's
    mesh = MeshConfig(tp=8, pp=12, vp=8, recompute="selective")
    return on_many_gpus("nemotron4-340b", mesh, pretraining(lr=1e-4, batch=768))


def nemotron4_15b() -> PretrainConfig:
    """Pretrain the 15B (arXiv 2402.16819): tp 8, up to 288-way data parallel; the 340B's phases."""
    mesh = MeshConfig(tp=8, recompute="selective")
    # the rate: NVIDIA's launch script and arXiv 2407.07263
    return on_many_gpus("nemotron4-15b", mesh, pretraining(lr=4.5e-4, batch=384))


# No source prints a recipe for this: 10 B tokens from the 15B's minimum rate, with a steep decay
CONTINUED = (Phase(((2_441_406, 1152),), lr=4.5e-5, min_lr=4.5e-7),)


def minitron_8b() -> PretrainConfig:
    """Continue the 8B on your own data, from its weights: --init hf:FOLDER."""
    return on_many_gpus("minitron-8b", MeshConfig(tp=2, recompute="selective"), CONTINUED)


def minitron_4b() -> PretrainConfig:
    """Continue the 4B (Nemotron-Mini) on your own data, from its weights: --init hf:FOLDER."""
    return on_many_gpus("minitron-4b", MeshConfig(recompute="selective"), CONTINUED)


RECIPES = (nano, nano_two_phase, small, minitron_4b, minitron_8b, nemotron4_15b, nemotron4_340b)
PRESETS: dict[str, Callable[[], PretrainConfig]] = {f.__name__: f for f in RECIPES}


# ---- weights and optimizer -----------------------------------------------------------------------


def make_optimizer(cfg: RunConfig, runner: Runner) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only; its state exists before the first step."""
    params = [p for p in runner.params().values() if p.requires_grad]
    matrices = {"params": [p for p in params if p.ndim >= 2], "weight_decay": cfg.weight_decay}
    vectors = {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}
    how = dict(lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
    optimizer = torch.optim.AdamW([matrices, vectors], **how)
    for p in params:  # AdamW makes these at its first step; a checkpoint needs them before
        zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=runner.device), **zeros}
    return optimizer


# ---- the run's folder ----------------------------------------------------------------------------

# Settings that may change between two starts of one run: speed, reports, length, bad steps
MAY_CHANGE = {"out", "mesh", "micro_batch", "steps", "eval_every", "eval_batches", "save_every"}
MAY_CHANGE |= {"save_in_background", "keep", "profile", "on_bad_step", "spike", "max_skips"}
MAY_CHANGE |= {"log_every", "wandb"}
LONGEST_LAG = 60  # seconds in which a shared file system shows a new file everywhere


def settings_in(folder: Path) -> dict[str, Any]:
    """Read a run's config.json; nothing if it is not there, or not yet whole."""
    with suppress(OSError, ValueError):
        return json.loads((folder / "config.json").read_text())
    return {}


def free_folder(name: str, agent: str) -> Path:
    """Return runs/NAME, or the first new one of runs/NAME-2, -3 ...; or, when an agent (a torchrun)
    starts its processes again, the one that they began."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    folder = Path("runs") / name
    number = 1
    while folder.exists() and not (again and settings_in(folder).get("agent") == agent):
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


def start(
    preset: str, cfg: RunConfig, mesh: DeviceMesh, data: str, tokenizer: Tokenizer
) -> tuple[RunConfig, Runner]:
    """Build the model of a run, with the weights of init, and then its folder, so that a start that
    fails leaves none. preset: a name for it; data: the training data's fingerprint."""
    agent = f"{os.uname().nodename} {os.getppid()}"
    out = cfg.out or from_rank_0(lambda: free_folder(preset, agent))
    cfg = replace(cfg, out=out, mesh=replace(cfg.mesh, dtype=cfg.mesh.compute_dtype))
    settings = json.loads(json.dumps(asdict(cfg), default=str)) | {"data_fingerprint": data}
    from_rank_0(lambda: check_folder(cfg.out, settings))
    init = cfg.init.removeprefix("hf:")
    if init:
        check_same_model(read_config(init), cfg.model, f"init={cfg.init}")
        compare_tokenizers(cfg.init, tokenizer)
    runner = Runner(cfg.model, cfg.mesh, mesh, cfg.micro_batch, cfg.seed)
    if init:  # adapters and a head of another kind stay new
        runner.load_weights(init)
    if from_rank_0(lambda: data) != data:
        raise ValueError(f"rank {dist.get_rank()} reads other data than rank 0: share one copy")
    settings |= {"started": from_rank_0(time.time_ns), "agent": agent}
    dist.barrier()  # everyone has looked before anyone writes
    if dist.get_rank() == 0:
        cfg.out.mkdir(parents=True, exist_ok=True)
        hold(cfg.out)
        write_whole(cfg.out / "config.json", json.dumps(settings, indent=2))
        tokenizer.save(cfg.out)  # generate.py needs no more than this folder
    wait_for_folder(cfg.out, settings["started"])
    embedding, rest = count_params(cfg.model)
    size = f"{(embedding + rest) / 1e6:,.1f}M parameters ({embedding / 1e6:,.1f}M embedding)"
    log.info(f"{preset}: {size}, {world_size()} process(es), {cfg.mesh.dtype}, folder {cfg.out}")
    return cfg, runner


def check_same_model(theirs: ModelConfig, mine: ModelConfig, where: str | Path) -> None:
    """Raise ValueError unless the weights of `theirs`, found at `where`, fit the model `mine`."""
    free = {"seq_len", "init_std", "lora_rank", "lora_alpha", "lora_targets"}
    for key in sorted(vars(mine).keys() - free):
        found = getattr(theirs, key)
        # a reward model begins as a language model, with a new head
        if found != getattr(mine, key) and (found or key != "n_attributes"):
            option = f"set --model.{key.replace('_', '-')} {found}"
            raise ValueError(f"{where} has {key}={found}, this run {getattr(mine, key)}: {option}")


def wait_for_folder(folder: Path, started: int) -> None:
    """Wait until this rank sees the config.json of this start, or say that it is not shared."""
    given_up = time.monotonic() + LONGEST_LAG
    while settings_in(folder).get("started") != started:
        if time.monotonic() > given_up:
            raise ValueError(f"{folder}: rank {dist.get_rank()} cannot see it: share --out")
        time.sleep(1)


def compare_tokenizers(init: str, ours: Tokenizer) -> None:
    """Warn if the weights of init were trained with another tokenizer than the data is in."""
    probe = "def f(x_1):\n    return 0x2A + 31.5  # Déjà vu, 日本語, हिन्दी: “fine”"
    with suppress(ValueError):  # the folder has none, or one of another kind
        theirs = load_tokenizer(init.removeprefix("hf:"))
        if list(theirs.encode(probe)) != list(ours.encode(probe)):
            log.warning(f"init={init} has another tokenizer than the data: it knows other tokens")


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but this run, of which only MAY_CHANGE may differ."""
    before = settings_in(folder)
    others = [p for p in folder.glob("*") if p.suffix != ".tmp" and p.name != ".lock"]
    if others and "data_fingerprint" not in before:
        raise ValueError(f"{folder} is not empty and holds no run: choose another --out")
    if not any((folder / "checkpoints").glob("step_*")) and not (folder / "metrics.jsonl").exists():
        return
    now = dict(settings)
    for config in (before, now):  # so that only what differs of the model is told
        config |= {f"model.{name}": value for name, value in config.pop("model", {}).items()}
    keys = sorted(now.keys() - MAY_CHANGE)
    changed = [key for key in keys if now[key] != before.get(key)]
    if changed:
        what = "; ".join(f"{key}: {before.get(key)} there, {now[key]} here" for key in changed)
        raise ValueError(f"{folder} holds another run ({what}): choose another --out")
    steps = now["steps"]
    if before["steps"] != steps and not settings.get("phases"):
        both = f"{before['steps']} steps before, {steps} now"
        log.warning(f"{folder}: {both}: from here on the learning rate is that of {steps}")


# ---- logging -------------------------------------------------------------------------------------


# Dense bf16 FLOP/s of NVIDIA's data sheets; the first key that is part of a device's name counts
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12}
PEAK_FLOPS |= {"H100": 989e12, "A100": 312e12}


def peak_flops(device: torch.device) -> float | None:
    """Return dense bf16 FLOP/s, or None if unknown: better no MFU than a wrong one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for kind, peak in PEAK_FLOPS.items() if kind in name), None)


def memory_gib() -> float:
    """Return the peak memory of this process: its GPU's, or the resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# what the log says of a preference or ranking stage beside its loss
SAID = ("accuracy", "beta_margin", "beta_reward_chosen", "beta_reward_rejected")


class Metrics:
    """Writer of each step: a line in the log, a row of metrics.jsonl, TensorBoard, wandb."""

    def __init__(self, cfg: RunConfig, start: int, device: torch.device) -> None:
        """Open the files; rows of metrics.jsonl after step `start`, and damaged ones, go."""
        from torchtitan.components import metrics  # slow to import

        self.cfg = cfg
        self.schedule = cfg.schedule()
        self.start = start
        self.tokens = 0  # trained so far
        self.begun = 0.0  # when the first step, which warms up, was over
        peak = peak_flops(device)
        self.flops = flops_per_token(cfg.model) / (peak * world_size()) if peak else None
        self.writes = dist.get_rank() == 0
        if self.writes:
            self.loggers = metrics.LoggerContainer()
            self.loggers.add_logger(metrics.TensorBoardLogger(str(cfg.out / "tensorboard")))
            if cfg.wandb:
                os.environ["WANDB_PROJECT"] = cfg.wandb
                self.loggers.add_logger(metrics.WandBLogger(str(cfg.out), asdict(cfg)))
            path = cfg.out / "metrics.jsonl"
            path.touch()
            rows = read_records(path, lambda bad: log.warning(f"left out: {bad}"))
            kept = [row for _, row in rows if row.get("step") in range(start + 1)]
            self.tokens = kept[-1].get("tokens", 0) if kept else 0
            write_whole(path, map(json.dumps, kept))
            self.file = path.open("a", buffering=1)

    def step(self, step: int, seconds: float, values: dict[str, Any]) -> None:
        """Write a step of so many seconds. values: loss, grad_norm, lr, and what else it found."""
        batch = self.schedule.at(step - 1).batch
        # a stage counts them, as its windows are not all full
        tokens = values.pop("tokens", batch * self.cfg.model.seq_len)
        rate = tokens / seconds
        self.tokens += tokens
        row = {"step": step, **values, "batch": batch, "tokens": self.tokens, "tokens_per_s": rate}
        row["mfu"] = 100 * self.flops * rate if self.flops else None
        row["memory_gib"] = memory_gib()
        if "val_loss" in row or step == self.cfg.steps or step % self.cfg.log_every == 0:
            self.log_step(row)
        self.begun = self.begun or time.monotonic()
        if self.writes:
            # JSON has no word for a number that is not finite
            finite = {k: v for k, v in row.items() if v is not None and math.isfinite(v)}
            self.file.write(json.dumps(dict.fromkeys(row) | finite) + "\n")
            self.loggers.log(finite, finite.pop("step"))

    def log_step(self, row: dict[str, Any]) -> None:
        """Say a row in a line of the log, and its validation losses in another."""
        eta = "--"
        if self.begun:
            done = self.schedule.samples(row["step"])
            pace = (time.monotonic() - self.begun) / (done - self.schedule.samples(self.start + 1))
            eta = timedelta(seconds=round(pace * (self.schedule.samples(self.cfg.steps) - done)))
        mfu = "--" if row["mfu"] is None else f"{row['mfu']:.1f}"
        begin = f"step {row['step']:6d}/{self.cfg.steps}  "
        log.info(
            f"{begin}loss {row['loss']:7.4f}  norm {row['grad_norm']:8.4f}  lr {row['lr']:.2e}  "
            f"{row['tokens_per_s'] / 1e3:8.1f}k tok/s  mfu {mfu:>4}  "
            f"{row['memory_gib']:5.1f} GiB  eta {eta}"
        )
        found = [f"{key} {value:.4f}" for key, value in row.items() if key.endswith(SAID)]
        if found:
            log.info(begin + "  ".join(found))
        if "val_loss" in row:
            parts = ""
            for source in [key.split("/")[1] for key in row if key.startswith("val_loss/")]:
                bits = row[f"val_bpb/{source}"]
                parts += f"  {source} {row[f'val_loss/{source}']:.4f} ({bits:.3f} bits/byte)"
            parts += f"  in {row['eval_seconds']:.1f} s"
            log.info(f"{begin}val  {row['val_loss']:7.4f}{parts}")

    def close(self, step: int) -> None:
        """Close the files; after the last step, say where the run is and what reads it."""
        if self.writes:
            self.file.close()
            self.loggers.close()
        if step == self.cfg.steps:
            out = self.cfg.out
            use = f"score {out} --file ROWS" if self.cfg.model.n_attributes else f"sample {out}"
            log.info(f"finished: {out}. Next: python generate.py {use}")


# ---- the loop ------------------------------------------------------------------------------------


def training_state(runner: Runner, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, by parameter names that are the same on every mesh."""
    state = {}
    for name, p in runner.params().items():
        state[f"model.{name}"] = p
        state |= {f"optim.{key}.{name}": v for key, v in optimizer.state.get(p, {}).items()}
    return state


def what_is_wrong(cfg: RunConfig, loss: float, norm: float, recent: list[float]) -> str:
    """Say why a step must not update the weights; empty if nothing is wrong with it."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"loss {loss}, gradient norm {norm}"
    if cfg.spike and len(recent) >= 8 and loss > cfg.spike * median(recent):
        usual = median(recent)
        return f"loss {loss:.4f} is {loss / usual:.1f} times the recent median {usual:.4f}"
    return ""


def handle_bad_step(cfg: RunConfig, step: int, wrong: str, skipped: int, batch: str) -> None:
    """Raise FloatingPointError, or warn that the update is left out."""
    advice = f"lower the rate, or look at the batch: {batch}"
    if cfg.on_bad_step == "stop":
        kept = "stopped before the update; the last checkpoint is untouched"
        raise FloatingPointError(f"step {step}: {wrong}: {kept}. Set --on-bad-step skip, {advice}")
    if skipped > cfg.max_skips:
        many = f"{skipped} steps skipped, max_skips={cfg.max_skips}"
        raise FloatingPointError(f"step {step}: {wrong}: {many}: {advice}")
    log.warning(f"step {step}: {wrong}: update left out ({skipped} so far); batch: {batch}")


@contextmanager
def profiled(cfg: RunConfig) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step; steps 3 .. 2 + cfg.profile go to OUT/trace."""
    if not cfg.profile or dist.get_rank() % (world_size() // cfg.mesh.pp):  # one rank a stage
        yield lambda: None
        return
    file = cfg.out / "trace" / f"rank{dist.get_rank()}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    window = torch.profiler.schedule(wait=1, warmup=1, active=cfg.profile, repeat=1)
    export = lambda p: p.export_chrome_trace(str(file))  # noqa: E731
    with torch.profiler.profile(schedule=window, on_trace_ready=export) as profiler:
        yield profiler.step


@contextmanager
def asked_to_stop(runner: Runner) -> Iterator[None]:
    """Listen for SIGTERM and Ctrl-C, of which every rank learns with the next step. One more, a
    second later, ends the process: torchrun at once repeats what a terminal sends."""
    first = []

    def stop(number: int, _: Any) -> None:
        runner.asked = True
        if not first:
            log.info("asked to stop: after this step, which is saved; once more ends it at once")
        first.append(time.monotonic())
        if first[-1] - first[0] > 1:
            os._exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(
    cfg: RunConfig,
    runner: Runner,
    batches: Callable[[int], list[Batch]],
    loss_fn: LossFn,
    evaluate: Callable[[int], dict[str, float]],
    describe: Callable[[int], str],
    observe: Callable[[], dict[str, float]] = dict,
) -> None:
    """Train to cfg.steps, continuing from the newest checkpoint of cfg.out.

    batches(step) → this rank's micro-batches; evaluate(step) → what to log beside the loss;
    describe(step) → the batch in words, for the log when something is wrong with it; observe() →
    what loss_fn has noted of the step, to be logged too."""
    optimizer = make_optimizer(cfg, runner)
    schedule = cfg.schedule()
    last = cfg.steps
    if any(segment.phase.warmup >= segment.phase.samples for segment in schedule.segments):
        log.warning("the warm-up is as long as the run, whose rate never reaches its peak")
    checkpoints = Checkpoints(cfg.out / "checkpoints", cfg.keep, cfg.save_in_background, cfg.mesh)
    new = {"step": 0, "recent": [], "skipped": 0}
    state = checkpoints.load(training_state(runner, optimizer)) or new
    step, recent, skipped = (state[key] for key in new)
    if step:
        log.info(f"continuing from step {step} of {cfg.out}" + ": it is finished" * (step >= last))
    metrics = Metrics(cfg, step, runner.device)
    micro = batches(step) if step < last else []
    with profiled(cfg) as tick, asked_to_stop(runner):
        while step < last:
            begun = time.monotonic()
            lr = schedule.lr(step)
            loss = runner.step(micro, loss_fn)
            norm = runner.clip_grad_norm(cfg.clip)
            micro = batches(step + 1) if step + 1 < last else []  # while a GPU still computes
            # the one wait of a step: nothing is updated before its loss is known to be good
            values = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr, **observe()}
            wrong = what_is_wrong(cfg, values["loss"], values["grad_norm"], recent)
            if wrong:
                checkpoints.finish()  # what is being written is whole, should the run end here
                skipped += 1
                handle_bad_step(cfg, step + 1, wrong, skipped, describe(step))
                values["skipped"] = skipped
            else:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                recent = [*recent[-31:], values["loss"]]
            optimizer.zero_grad()
            step += 1
            seconds = time.monotonic() - begun
            if step in (1, last) or step % cfg.eval_every == 0:
                values |= evaluate(step)
                values["eval_seconds"] = time.monotonic() - begun - seconds
            metrics.step(step, seconds, values)
            pin = schedule.ends_a_segment(step) and step < schedule.steps
            if runner.n_asked or step == last or step % cfg.save_every == 0 or pin:
                saved = {"step": step, "recent": recent, "skipped": skipped, "pin": pin}
                checkpoints.save(step, training_state(runner, optimizer), saved)
            checkpoints.poll()
            tick()
            if runner.n_asked:
                log.info(f"asked to stop: saved step {step}; --out {cfg.out} goes on from there")
                break
    checkpoints.finish()
    metrics.close(step)


class EvalSet(NamedTuple):
    """Held-out data, its loss, and what to log of it."""

    batches: Callable[[], list[Batch]]  # this rank's micro-batches
    loss_fn: LossFn
    values: Callable[[float], dict[str, float | None]]  # the set's loss → all that is logged


def evaluator(runner: Runner, sets: list[EvalSet]) -> Callable[[int], dict[str, float | None]]:
    """Return evaluate(step), which runs every set forward and returns what is logged of it."""

    def evaluate(step: int) -> dict[str, float | None]:
        values = {}
        for held_out in sets:
            values |= held_out.values(runner.eval(held_out.batches(), held_out.loss_fn).item())
        return values

    return evaluate


# ---- pretraining ---------------------------------------------------------------------------------


def lm_loss(log_probs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Sum the negative log-likelihood of the next tokens, (B, T) → scalar."""
    return -log_probs.sum()


def micro_batches(
    cfg: RunConfig, runner: Runner, sampler: Sampler, first: int, batch: int
) -> list[Batch]:
    """Return this rank's contiguous share of samples first ... first + batch - 1."""
    share = batch // runner.dp
    start = first + runner.dp_rank * share
    out = []
    for i in range(start, start + share, cfg.micro_batch):
        rows = sampler.batch(range(i, i + cfg.micro_batch))
        out.append({**rows, "count": (rows["targets"] >= 0).sum()})
    return out


def open_data(cfg: PretrainConfig) -> TokenData:
    """Open the prepared folder; the default one is made on first use, from Python's own files."""

    def make() -> None:
        file = Path(__file__).open()
        with suppress(OSError):  # of two first starts the second waits, where there are locks
            flock(file, LOCK_EX)
        if not cfg.data.exists():
            log.info(f"preparing {cfg.data} from Python's own library and documentation, once")
            prepare(PrepareConfig(out=cfg.data, vocab_size=cfg.model.vocab_size, val_fraction=0.05))

    if cfg.data == PretrainConfig.data:
        from_rank_0(make)
    data = TokenData(cfg.data)
    if data.vocab_size != cfg.model.vocab_size:
        todo = f"set --model.vocab-size {data.vocab_size}, or prepare with the model's tokenizer"
        sizes = f"a vocabulary of {data.vocab_size}, the model of {cfg.model.vocab_size}"
        raise ValueError(f"{cfg.data} has {sizes}: {todo}")
    return data


def check_mesh(cfg: RunConfig) -> None:
    """Refuse a mesh that cannot run the steps still to come; those done may have had another."""
    done = [int(p.name[5:]) for p in step_folders(cfg.out / "checkpoints")] if cfg.out else []
    segments = cfg.schedule().segments
    for s in segments:
        ahead = max(done, default=0) < s.first_step + s.steps and s.first_step < cfg.steps
        if ahead or s is segments[-1]:  # validation takes the last batch size throughout
            cfg.mesh.check(cfg.model, world_size(), s.batch, cfg.micro_batch)


def source_set(cfg: PretrainConfig, runner: Runner, data: TokenData, source: str) -> EvalSet:
    """Return the validation set of a source: its loss, and bits per byte."""
    batch = cfg.schedule().segments[-1].batch  # throughout: a ramp must not change the set
    how = dict(seq_len=cfg.model.seq_len, seed=0, split="val", isolate=cfg.isolate)
    sampler = Sampler(data, {source: 1.0}, **how)
    n = batch * min(cfg.eval_batches, max(1, sampler.windows[source] // batch))

    def values(loss: float) -> dict[str, float]:
        bits_per_byte = loss / math.log(2) / data.bytes_per_token(source)
        return {f"val_loss/{source}": loss, f"val_bpb/{source}": bits_per_byte}

    return EvalSet(lambda: micro_batches(cfg, runner, sampler, 0, n), lm_loss, values)


def source_evaluator(
    cfg: PretrainConfig, runner: Runner, data: TokenData, blends: dict[int, dict[str, float]]
) -> Callable[[int], dict[str, float]]:
    """Return evaluate(step): loss and bits per byte of each source, and as val_loss the mean of the
    losses, weighted by the blend of the step."""
    sources = sorted(set().union(*blends.values()), key=data.sources.index)
    held_out = [source for source in sources if data.n_tokens(source, "val") >= 2]
    without = [source for source in sources if source not in held_out]
    if without:
        log.warning(f"no validation data in {', '.join(without)}: prepare with more documents")
    schedule = cfg.schedule()
    evaluate_sources = evaluator(runner, [source_set(cfg, runner, data, s) for s in held_out])

    def evaluate(step: int) -> dict[str, float]:
        values = evaluate_sources(step)
        blend = blends[max(first for first in blends if first <= schedule.samples(step - 1))]
        weights = {source: blend.get(source, 0.0) for source in held_out}
        if not sum(weights.values()):
            return values
        total = sum(weight * values[f"val_loss/{source}"] for source, weight in weights.items())
        return {"val_loss": total / sum(weights.values())} | values

    return evaluate


def pretrain(preset: str, cfg: PretrainConfig) -> None:
    """Run a pretraining config from its data to its last step. preset: a name for its folder."""
    schedule = cfg.schedule()
    cfg = replace(cfg, steps=min(cfg.steps or schedule.steps, schedule.steps))
    check_mesh(cfg)
    mesh = init_mesh(cfg.mesh)
    data = open_data(cfg)
    blends = {first: data.blend(blend) for first, blend in schedule.blends().items()}
    sampler = Sampler(
        data, blends[0], cfg.model.seq_len, cfg.seed, isolate=cfg.isolate, later=blends
    )
    cfg, runner = start(preset, cfg, mesh, data.fingerprint, data.tokenizer())
    evaluate = source_evaluator(cfg, runner, data, blends)
    for first, blend in blends.items():
        parts = ", ".join(f"{s} {w:.3f} ({sampler.windows[s]:,} windows)" for s, w in blend.items())
        log.info(f"blend from sample {first:,}: {parts}")
    epochs = sampler.epochs(schedule.samples(cfg.steps))
    log.info("epochs by the end: " + ", ".join(f"{s} {e:.2f}" for s, e in epochs.items()))

    def batches(step: int) -> list[Batch]:
        return micro_batches(cfg, runner, sampler, schedule.samples(step), schedule.at(step).batch)

    def describe(step: int) -> str:
        first = schedule.samples(step)
        return sampler.describe(range(first, first + schedule.at(step).batch))

    fit(cfg, runner, batches, lm_loss, evaluate, describe)


# ---- entry points -------------------------------------------------------------------------------


def choose_config(
    argv: list[str], presets: dict[str, Callable[[], Any]], description: str
) -> tuple[str, Any]:
    """Parse `preset --name value ...` into (preset, config)."""
    if argv and not argv[0].startswith("-") and argv[0] not in presets:
        if argv[0] in ("report", "demo", "iterate"):
            sys.exit(f"{argv[0]} is now `python -m recipes.{argv[0]}`")
        raise ValueError(f"no preset {argv[0]!r}: there are {', '.join(presets)}")
    table = {name: (" ".join(f.__doc__.split()), f()) for name, f in presets.items()}
    cli = tyro.extras.overridable_config_cli
    return argv[0] if argv else "", parsed(lambda: cli(table, args=argv, description=description))


def main() -> None:
    set_up_logging()
    run(lambda: pretrain(*choose_config(sys.argv[1:], PRESETS, "Pretrain: preset, options.")))


if __name__ == "__main__":
    main()
