"""Pretraining, and the one loop (`fit`) that every stage of the system runs through.

A preset is a function that returns a complete frozen config; the command line changes its fields.

    torchrun --nproc_per_node 2 train.py nano
    python train.py nano --steps 50 --out runs/try --lr 2e-3
    python train.py report runs/nano runs/try
"""

import dataclasses
import difflib
import json
import logging
import math
import os
import resource
import signal
import sys
import time
import traceback
from bisect import bisect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from data import PrepareConfig, Sampler, TokenData, Tokenizer, prepare
from model import SHAPES, ModelConfig, count_params, flops_per_token
from parallel import (
    Batch,
    Checkpoints,
    LossFn,
    MeshConfig,
    Runner,
    init_mesh,
    load_run,
    peak_flops,
    shut_down,
    step_folders,
    world_size,
)

log = logging.getLogger("nemotron4")


# ---- configs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A part of a run with its own data and schedule; lengths in samples (sequences)."""

    ramp: tuple[tuple[int, int], ...]
    """(samples, batch), one after the other: the batch ramp, or one pair."""
    lr: float
    """Peak learning rate."""
    min_lr: float
    """Where the cosine over the whole phase ends."""
    warmup: int = 0
    """Samples of linear warm-up."""
    blend: dict[str, float] = field(default_factory=dict)
    """Source weights; empty: the default blend."""
    late_blend: dict[str, float] = field(default_factory=dict)
    """The blend once the rate has fallen below late_below."""
    late_below: float = 0.0

    def __post_init__(self) -> None:
        if not self.ramp or min(n for pair in self.ramp for n in pair) < 1:
            raise ValueError(f"ramp={self.ramp}: pairs of samples and batch, each at least 1")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"lr={self.lr}, min_lr={self.min_lr}: 0 <= min_lr <= lr is needed")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: samples, 0 or more")
        if self.late_blend and not self.min_lr < self.late_below <= self.lr:
            between = f"between min_lr={self.min_lr} and lr={self.lr}"
            raise ValueError(f"late_below={self.late_below}: a late blend needs a rate {between}")

    @property
    def samples(self) -> int:
        return sum(samples for samples, _ in self.ramp)

    def lr_at(self, samples: int, batch: int) -> float:
        """Linear warm-up, then cosine to min_lr, in samples of the phase (SPEC 3.4): a batch ramp
        does not bend it."""
        if samples < self.warmup:
            return self.lr * (samples + batch) / (self.warmup + batch)
        progress = min(1.0, (samples - self.warmup) / max(1, self.samples - self.warmup))
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2

    def late_from(self) -> int:
        """The sample of the phase from which the rate is below late_below."""
        cosine = 2 * (self.late_below - self.min_lr) / (self.lr - self.min_lr) - 1
        return self.warmup + math.ceil(math.acos(cosine) / math.pi * (self.samples - self.warmup))


class Segment(NamedTuple):
    """Consecutive steps of one batch size."""

    first_step: int
    steps: int
    first_sample: int
    batch: int
    phase: Phase
    phase_sample: int  # where its phase begins


class Schedule:
    """A run's phases, laid out over its steps: what each step needs is a function of its number."""

    def __init__(self, phases: tuple[Phase, ...]) -> None:
        self.segments: list[Segment] = []
        step = sample = 0
        for phase in phases:
            begins = sample
            for samples, batch in phase.ramp:
                steps = max(1, round(samples / batch))  # whole steps, as in the report's Table 2
                self.segments.append(Segment(step, steps, sample, batch, phase, begins))
                step, sample = step + steps, sample + steps * batch
        self.steps = step

    def at(self, step: int) -> Segment:
        return self.segments[bisect(self.segments, step, key=lambda s: s.first_step) - 1]

    def samples(self, step: int) -> int:
        """Samples consumed before the step."""
        s = self.at(step)
        return s.first_sample + (step - s.first_step) * s.batch

    def lr(self, step: int) -> float:
        s = self.at(step)
        return s.phase.lr_at(self.samples(step) - s.phase_sample, s.batch)

    def ends_a_segment(self, step: int) -> bool:
        """After `step` steps the batch grows or a phase ends: a good place for a checkpoint."""
        return any(step == s.first_step + s.steps for s in self.segments)

    def blends(self) -> dict[int, dict[str, float]]:
        """First sample → blend, aligned to steps."""
        out, late = {}, set()
        for s in self.segments:
            if s.first_sample == s.phase_sample:
                out[s.first_sample] = s.phase.blend
            if s.phase.late_blend and s.phase_sample not in late:
                ahead = s.phase_sample + s.phase.late_from() - s.first_sample
                steps = max(0, -(-ahead // s.batch))
                if steps < s.steps:
                    out[s.first_sample + steps * s.batch] = s.phase.late_blend
                    late.add(s.phase_sample)
        return out


@dataclass(frozen=True)
class RunConfig:
    """What `fit` needs, whatever the stage."""

    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    out: Path | None = None
    """The run's folder; what it holds of the same run is continued. Default: the first unused of
    runs/PRESET, -2, -3 ..."""
    init: str = ""
    """Weights to start from, with a fresh optimizer: hf:FOLDER (a Hugging Face Nemotron), or the
    FOLDER of another run. Empty: random."""
    steps: int = 1000
    """Optimizer steps."""
    seed: int = 0
    """Of the initial weights and of the data order."""
    batch: int = 16
    """Sequences per optimizer step, over all processes: the result does not depend on the mesh."""
    micro_batch: int = 4
    """Sequences per forward pass of one process; changes memory and speed alone."""
    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Where the cosine ends."""
    warmup: int = 0
    """Samples of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW, as eps (which no source prints)."""
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices; norms and biases have none."""
    clip: float = 1.0
    """Largest gradient norm."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite, or a spike: end the run, or leave the update out."""
    spike: float = 0.0
    """A loss this many times the median of the last 32 is a spike; 0: none is."""
    max_skips: int = 10
    """Skipped steps after which the run ends all the same."""
    eval_every: int = 100
    """Steps between validations; the first and the last step validate too."""
    eval_batches: int = 8
    """Batches of validation data per source."""
    save_every: int = 500
    """Steps between checkpoints; the last step and the end of a phase save too."""
    save_in_background: bool = False
    """Train on while a checkpoint is being written."""
    keep: int = 2
    """Newest checkpoints kept, beside those where a phase ends or the batch grows."""
    grad_norms: bool = False
    """Also log the gradient norm of embedding, attention, MLP, norms and head."""
    profile: int = 0
    """Steps to profile, from this start's third on; the trace goes to OUT/trace."""

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "eval_batches", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("max_skips", "profile", "eps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.spike and self.spike <= 1:
            raise ValueError(f"spike={self.spike}: a factor above 1, or 0 for none")
        if self.clip <= 0:
            raise ValueError(f"clip={self.clip}: the largest norm is positive; inf clips nothing")
        self.schedule()

    def schedule(self) -> Schedule:
        ramp = ((self.steps * self.batch, self.batch),)
        return Schedule((Phase(ramp, self.lr, self.min_lr, self.warmup),))


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    data: Path = Path("data/python")
    """A folder made by data.py prepare."""
    blend: dict[str, float] = field(default_factory=dict)
    """Source weights; empty: 70/15/15 for english, multilingual, code (report section 2.1), else by
    tokens."""
    isolate: bool = False
    """Keep packed documents from seeing each other (the report's run did not)."""
    phases: tuple[Phase, ...] = ()
    """The recipe; where given, batch, lr, min_lr, warmup and blend are the phases', and the run may
    end sooner, at steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for f in dataclasses.fields(self):
            of_phases = f.name in ("batch", "lr", "min_lr", "warmup", "blend")
            default = {} if f.name == "blend" else f.default
            if self.phases and of_phases and getattr(self, f.name) != default:
                what = f"{f.name}={getattr(self, f.name)}"
                raise ValueError(f"{what}: this run has phases: set --phases.0.{f.name} and so on")

    def schedule(self) -> Schedule:
        if self.phases:
            return Schedule(self.phases)
        ramp = ((self.steps * self.batch, self.batch),)
        return Schedule((Phase(ramp, self.lr, self.min_lr, self.warmup, self.blend),))


# ---- presets -------------------------------------------------------------------------------------


def nano() -> PretrainConfig:
    """A laptop CPU, about two minutes: every detail of the architecture, on Python's own library
    and documentation."""
    # optimizer of the 8T phase (SPEC 3.4); rate, warm-up, batch and length are ours, for this size
    return PretrainConfig(
        model=SHAPES["nano"],
        mesh=MeshConfig(dtype="fp32"),
        steps=250,
        batch=8,
        micro_batch=2,
        lr=1.5e-3,
        min_lr=1.5e-4,
        warmup=160,
        eval_every=50,
        save_every=100,
    )


def nano_two_phase() -> PretrainConfig:
    """The full recipe in miniature, under five minutes on a laptop: batch ramp, two phases, three
    blends."""
    # the report's proportions: batch 1 : 2 : 3, rate to a tenth, then to a hundredth of that, the
    # last blend below a fifth of the phase's first rate; sizes are ours. The embedded corpus has no
    # question-answering data: its source code stands in for what the second phase weighs up.
    first = {"english": 0.85, "code": 0.15}
    phases = (
        Phase(((240, 4), (480, 8), (1200, 12)), 1.5e-3, 1.5e-4, 160, first),
        Phase(
            ((720, 12),), 1.5e-4, 1.5e-6, 0, {"english": 0.5, "code": 0.5},
            late_blend={"english": 0.2, "code": 0.8}, late_below=3e-5,
        ),
    )  # fmt: skip
    return PretrainConfig(
        model=SHAPES["nano"],
        mesh=MeshConfig(dtype="fp32"),
        phases=phases,
        steps=Schedule(phases).steps,
        micro_batch=2,
        eval_every=20,
    )


def small() -> PretrainConfig:
    """One GPU, 126M parameters, 2.6B tokens: a real run in hours. Prepare data/small with
    --vocab-size 32768 first."""
    # the report is silent at this size: rate, batch and length are common choices, not NVIDIA's
    return PretrainConfig(
        model=SHAPES["small"],
        data=Path("data/small"),
        steps=10_000,
        batch=256,
        micro_batch=32,
        lr=6e-4,
        min_lr=6e-5,
        warmup=256 * 500,
    )


def pretraining(lr: float, scale: int) -> tuple[Phase, ...]:
    """The two phases of the 340B and the 15B. Batches are `scale` times 384, 768, 1152.

    8T tokens: ramp of report Table 2 and arXiv 2402.16819 Table 2; warm-up 3,906,252 samples and
    cosine to a tenth from NVIDIA's launch script (SPEC 3.4). 1T more: the report gives no numbers;
    from the minimum rate to its hundredth, the second blend below a fifth of the first rate, is
    "Reuse, Don't Retrain" (arXiv 2407.07263), by the same team on the 15B. Blends: the report's
    70/15/15; the two of the second phase are unpublished, these are ours.
    """
    first = {"english": 0.70, "multilingual": 0.15, "code": 0.15}
    quality = {"english": 0.60, "multilingual": 0.10, "code": 0.20, "quality": 0.10}
    answers = {"english": 0.50, "multilingual": 0.10, "code": 0.20, "quality": 0.10, "qa": 0.10}
    b = 384 * scale
    ramp = ((48_828_125, b), (48_828_125, 2 * b), (1_855_468_750, 3 * b))  # 200 + 200 + 7600 B
    return (
        Phase(ramp, lr, lr / 10, 3_906_252, first),
        Phase(((244_140_625, 3 * b),), lr / 10, lr / 1000, 0, quality, answers, lr / 50),
    )


def nemotron4_340b() -> PretrainConfig:
    """The report: 9T tokens, tp 8, pp 12 interleaved by 8, on 1,536 to 6,144 H100s. Start it with
    --steps 63578 on 1,536, then --steps 95367 on 3,072, then the rest on 6,144."""
    phases = pretraining(1e-4, 2)  # 1e-4: NVIDIA's launch script (SPEC 3.4), not in the report
    return PretrainConfig(
        model=SHAPES["nemotron4-340b"],
        mesh=MeshConfig(tp=8, pp=12, vp=8, recompute="selective"),  # report section 2.3, SPEC 3.3
        data=Path("data/nemotron4"),
        phases=phases,
        steps=Schedule(phases).steps,
        micro_batch=1,
        save_in_background=True,
    )


def nemotron4_15b() -> PretrainConfig:
    """The 15B (arXiv 2402.16819): tp 8, 96 to 288-way data parallel; its second phase as the
    340B's."""
    phases = pretraining(4.5e-4, 1)  # 4.5e-4: launch script and arXiv 2407.07263
    return PretrainConfig(
        model=SHAPES["nemotron4-15b"],
        mesh=MeshConfig(tp=8, recompute="selective"),
        data=Path("data/nemotron4"),
        phases=phases,
        steps=Schedule(phases).steps,
        micro_batch=1,  # not printed
        save_in_background=True,
    )


def minitron_8b() -> PretrainConfig:
    """Continue the 8B on your own data, from its weights: --init hf:FOLDER."""
    # no source prints a recipe for this: the 15B's minimum rate, no warm-up, a steep decay
    phases = (Phase(((2_441_406, 1152),), 4.5e-5, 4.5e-7),)  # 10 B tokens
    return PretrainConfig(
        model=SHAPES["minitron-8b"],
        mesh=MeshConfig(tp=2, recompute="selective"),
        data=Path("data/nemotron4"),
        phases=phases,
        steps=Schedule(phases).steps,
        micro_batch=1,
        save_in_background=True,
    )


def minitron_4b() -> PretrainConfig:
    """Continue the 4B (Nemotron-Mini) on your own data, from its weights: --init hf:FOLDER."""
    mesh = MeshConfig(recompute="selective")
    return replace(minitron_8b(), model=SHAPES["minitron-4b"], mesh=mesh)


RECIPES = (nano, nano_two_phase, small, minitron_4b, minitron_8b, nemotron4_15b, nemotron4_340b)
PRESETS: dict[str, Callable[[], PretrainConfig]] = {f.__name__: f for f in RECIPES}


# ---- optimizer -----------------------------------------------------------------------------------


def make_optimizer(cfg: RunConfig, runner: Runner) -> torch.optim.AdamW:
    """AdamW over matrices (decayed) and norms and biases (not)."""
    params = runner.trained().values()
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
    for p in params:  # AdamW makes these at its first step; a checkpoint needs them before
        zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=runner.device), **zeros}
    return optimizer


def check_init(cfg: RunConfig) -> None:
    """Refuse an init that is not there, or another model's; what transformers wrote is checked as
    it is read."""
    if not cfg.init or cfg.init.startswith("hf:"):
        return
    file = Path(cfg.init) / "config.json"
    if not file.exists() or not step_folders(Path(cfg.init) / "checkpoints"):
        raise ValueError(
            f"init={cfg.init}: no run with a checkpoint there (hf:FOLDER is for others)"
        )
    theirs, mine = json.loads(file.read_text())["model"], as_json(cfg)["model"]
    free = {"seq_len", "init_std"}
    if mine["n_attributes"] and not theirs.get("n_attributes"):
        free.add("n_attributes")  # a reward model begins as a language model with a new head
    for key in sorted(k for k in mine.keys() - free if not k.startswith("lora_")):
        if theirs.get(key) != mine[key]:
            raise ValueError(
                f"init={cfg.init} has {key}={theirs.get(key)}, this run {mine[key]}: "
                f"set --model.{key.replace('_', '-')}"
            )


def load_init(cfg: RunConfig, runner: Runner) -> None:
    """Fill the weights from cfg.init: hf:FOLDER, or another run's newest checkpoint."""
    if cfg.init.startswith("hf:"):
        runner.load_hf(cfg.init[3:])
    elif cfg.init:
        theirs = json.loads((Path(cfg.init) / "config.json").read_text())["model"]
        same_head = theirs.get("n_attributes", 0) == cfg.model.n_attributes
        weights = {
            name: p
            for name, p in runner.params().items()
            if "lora_" not in name and (same_head or not name.startswith("head."))
        }
        load_run(Path(cfg.init), weights)


# ---- the run's folder ----------------------------------------------------------------------------

# What may change between two starts of one run: where and how fast it runs, how often it reports,
# when it ends, and what it does about a bad step.
FREE = {"out", "mesh", "micro_batch", "steps", "eval_every", "eval_batches", "save_every"}
FREE |= {"save_in_background", "keep", "grad_norms", "profile", "on_bad_step", "spike", "max_skips"}


def as_json(cfg: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(cfg), default=str))


def free_folder(name: str) -> Path:
    """runs/NAME, or the first of runs/NAME-2, -3 ... that does not exist; the same answer on every
    rank."""
    root = Path("runs")
    taken = lambda n: (root / (name if n == 1 else f"{name}-{n}")).exists()  # noqa: E731
    n = torch.tensor(next(n for n in range(1, 1 << 20) if not taken(n)))
    dist.broadcast(n, src=0)
    return root / (name if n == 1 else f"{name}-{n}")


def open_folder(cfg: RunConfig, data: str, tokenizer: Tokenizer) -> None:
    """Write config.json and the tokenizer into the run's folder, or refuse a folder that holds
    another run. data: the fingerprint of what it trains on."""
    file, mine = cfg.out / "config.json", as_json(cfg) | {"data_fingerprint": data}
    begun = any((cfg.out / "checkpoints").glob("step_*")) or (cfg.out / "metrics.jsonl").exists()
    if file.exists() and begun:
        try:
            theirs = json.loads(file.read_text())
        except ValueError as e:
            raise ValueError(f"{file} is broken ({e}): mend it, or choose another --out") from e
        keys = sorted((mine.keys() | theirs.keys()) - FREE)
        if differ := [k for k in keys if mine.get(k) != theirs.get(k)]:
            what = "; ".join(f"{k}: {theirs.get(k)} there, {mine.get(k)} here" for k in differ)
            raise ValueError(f"{cfg.out} holds another run ({what}): choose another --out")
        if theirs["steps"] != cfg.steps and not mine.get("phases"):
            both = f"{theirs['steps']} steps before, {cfg.steps} now"
            log.warning(f"{cfg.out}: {both}: from here on the learning rate is that of {cfg.steps}")
    elif not file.exists() and any(p.name != "config.tmp" for p in cfg.out.glob("*")):
        raise ValueError(f"{cfg.out} is not empty and holds no run: choose another --out")
    dist.barrier()  # everyone has looked before anyone writes
    if dist.get_rank() == 0:
        cfg.out.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".tmp").write_text(json.dumps(mine, indent=2))
        file.with_suffix(".tmp").rename(file)
        tokenizer.save(cfg.out)  # generate.py needs no more than this folder


# ---- logging -------------------------------------------------------------------------------------


def set_up_logging() -> None:
    """The log is heard on rank 0 alone; nothing else asks for the rank before it speaks."""
    log.handlers = [logging.StreamHandler(sys.stdout)]
    log.setLevel(logging.ERROR if int(os.environ.get("RANK", 0)) else logging.INFO)
    log.propagate = False


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process: the device's, or the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Metrics:
    """One line per step in the log, one object per step in metrics.jsonl, the same scalars for
    TensorBoard."""

    def __init__(self, cfg: RunConfig, step: int, last: int, device: torch.device) -> None:
        from torchtitan.components.metrics import TensorBoardLogger  # slow to import

        self.seq_len, self.device, self.start, self.last = cfg.model.seq_len, device, step, last
        self.schedule, self.begun = cfg.schedule(), time.monotonic()
        peak = peak_flops(device)
        self.flops = flops_per_token(cfg.model) / (peak * world_size()) if peak else None
        self.writes = dist.get_rank() == 0
        if self.writes:
            self.tensorboard = TensorBoardLogger(str(cfg.out / "tensorboard"))
            path = cfg.out / "metrics.jsonl"
            old = path.read_text().splitlines(keepends=True) if path.exists() else []
            kept = (r for r in old if r.endswith("}\n") and json.loads(r)["step"] <= step)
            path.with_suffix(".tmp").write_text("".join(kept))
            path.with_suffix(".tmp").rename(path)
            self.file = path.open("a", buffering=1)

    def step(self, step: int, seconds: float, values: dict[str, Any]) -> None:
        """values: loss, grad_norm, lr, and what this step measured beside them."""
        batch, done = self.schedule.at(step - 1).batch, self.schedule.samples(step)
        rate = batch * self.seq_len / seconds
        mfu = 100 * self.flops * rate if self.flops else None
        row = {"step": step} | {key: values[key] for key in ("loss", "grad_norm", "lr")}
        row |= {"tokens": done * self.seq_len, "tokens_per_s": rate, "mfu": mfu}
        row |= {"tokens_per_s_per_gpu": rate / world_size(), "memory_gib": memory_gib(self.device)}
        row |= {"batch": batch} | values
        pace = (time.monotonic() - self.begun) / (done - self.schedule.samples(self.start))
        eta = pace * (self.schedule.samples(self.last) - done)
        number = {k: float("nan") if row[k] is None else row[k] for k in ("loss", "grad_norm")}
        log.info(
            f"step {step:6d}/{self.last}  loss {number['loss']:7.4f}  "
            f"norm {number['grad_norm']:8.4f}  lr {row['lr']:.2e}  {rate / 1e3:8.1f}k tok/s  "
            f"mfu {'  --' if mfu is None else f'{mfu:4.1f}'}  {row['memory_gib']:5.1f} GiB  "
            f"eta {timedelta(seconds=round(eta))}"
        )
        if "val_loss" in values:
            by_source = {k.split("/")[1]: v for k, v in values.items() if k.startswith("val_loss/")}
            parts = "  ".join(
                f"{source} {loss:.4f} ({values[f'val_bpb/{source}']:.3f} bits/byte)"
                for source, loss in by_source.items()
            )
            log.info(f"step {step:6d}/{self.last}  val  {values['val_loss']:7.4f}  {parts}")
        if self.writes:
            self.file.write(json.dumps(row) + "\n")
            scalars = {k: v for k, v in row.items() if k != "step" and v is not None}
            self.tensorboard.log(scalars, step)

    def close(self) -> None:
        if self.writes:
            self.file.close()
            self.tensorboard.close()


# ---- the loop ------------------------------------------------------------------------------------


def training_state(runner: Runner, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Everything a checkpoint holds, by parameter name: the names are the same on every mesh."""
    state = {}
    for name, p in runner.params().items():
        state[f"model.{name}"] = p
        state |= {f"optim.{key}.{name}": v for key, v in optimizer.state.get(p, {}).items()}
    return state


def what_is_wrong(cfg: RunConfig, loss: float, norm: float, recent: list[float]) -> str:
    """Why a step must not update the weights; empty if nothing is wrong with it."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"loss {loss}, gradient norm {norm}"
    if cfg.spike and len(recent) >= 8 and loss > cfg.spike * (middle := median(recent)):
        return f"loss {loss:.4f} is {loss / middle:.1f} times the median {middle:.4f} of late"
    return ""


def handle_bad_step(cfg: RunConfig, step: int, wrong: str, skipped: int, batch: str) -> None:
    """Raise, or say that the update is left out."""
    if cfg.on_bad_step == "stop":
        raise FloatingPointError(
            f"step {step}: {wrong}: stopped before the update; the last checkpoint is untouched. "
            f"Lower the rate, set --on-bad-step skip, or look at the batch: {batch}"
        )
    if skipped > cfg.max_skips:
        raise FloatingPointError(
            f"step {step}: {wrong}: {skipped} steps skipped, max_skips={cfg.max_skips}. "
            f"Lower the rate or look at the batch: {batch}"
        )
    log.warning(f"step {step}: {wrong}: update left out ({skipped} so far); batch: {batch}")


@contextmanager
def profiled(cfg: RunConfig) -> Iterator[Callable[[], None]]:
    """Call what this yields after each step; steps 3 .. 2 + cfg.profile go to OUT/trace."""
    if not cfg.profile:
        yield lambda: None
        return
    file = cfg.out / "trace" / f"rank{dist.get_rank()}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    window = torch.profiler.schedule(wait=1, warmup=1, active=cfg.profile, repeat=1)
    export = lambda p: p.export_chrome_trace(str(file))  # noqa: E731
    with torch.profiler.profile(schedule=window, on_trace_ready=export) as profiler:
        yield profiler.step


def asked_to_stop() -> Callable[[], bool]:
    """Listen for SIGTERM; the function returned says whether any rank has heard it, the same answer
    on all."""
    heard = torch.zeros((), dtype=torch.int32)
    signal.signal(signal.SIGTERM, lambda *_: heard.fill_(1))

    def asked() -> bool:
        anyone = heard.clone()
        dist.all_reduce(anyone, dist.ReduceOp.MAX)
        return bool(anyone)

    return asked


def due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


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
    what loss_fn has noted of the step, to be logged too.
    """
    optimizer, schedule = make_optimizer(cfg, runner), cfg.schedule()
    last = min(cfg.steps, schedule.steps)
    checkpoints = Checkpoints(cfg.out / "checkpoints", cfg.keep, cfg.save_in_background)
    state = checkpoints.load(training_state(runner, optimizer))
    if state is None:
        load_init(cfg, runner)
        state = {"step": 0, "recent": [], "skipped": 0}
    else:
        finished = ": it is finished" if state["step"] >= last else ""
        log.info(f"continuing from step {state['step']} of {cfg.out}{finished}")
    step, recent, skipped = state["step"], state["recent"], state["skipped"]
    metrics, asked = Metrics(cfg, step, last, runner.device), asked_to_stop()
    micro = batches(step) if step < last else []
    with profiled(cfg) as tick:
        while step < last:
            begun, lr = time.monotonic(), schedule.lr(step)
            loss = runner.step(micro, loss_fn)
            groups = runner.grad_norms() if cfg.grad_norms else {}
            norm = runner.clip_grad_norm(cfg.clip)
            micro = batches(step + 1) if step + 1 < last else []  # while a GPU still computes
            # the one wait of a step: nothing is updated before its loss is known to be good
            loss, norm = loss.item(), norm.item()
            values = {"loss": loss, "grad_norm": norm, "lr": lr, **groups, **observe()}
            if wrong := what_is_wrong(cfg, loss, norm, recent):
                skipped += 1
                handle_bad_step(cfg, step + 1, wrong, skipped, describe(step))
                shown = {k: v if math.isfinite(v or 0) else None for k, v in values.items()}
                values = shown | {"skipped": skipped}
            else:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                recent = [*recent[-31:], loss]
            optimizer.zero_grad()
            step += 1

            seconds = time.monotonic() - begun
            if step == 1 or due(step, cfg.eval_every, last):
                values |= evaluate(step)
            metrics.step(step, seconds, values)
            stop = asked()
            if stop or due(step, cfg.save_every, last) or schedule.ends_a_segment(step):
                pin = schedule.ends_a_segment(step) and step < schedule.steps
                saved = {"step": step, "recent": recent, "skipped": skipped, "pin": pin}
                checkpoints.save(step, training_state(runner, optimizer), saved)
            checkpoints.poll()
            tick()
            if stop:
                log.info(f"asked to stop: saved step {step}; --out {cfg.out} goes on from there")
                break
    checkpoints.finish()
    metrics.close()


# ---- pretraining ---------------------------------------------------------------------------------


def lm_loss(log_probs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Summed negative log-likelihood of the next tokens, (B, T) → scalar; the batch's count is its
    predicted tokens."""
    return -log_probs.sum()


def micro_batches(
    cfg: RunConfig, runner: Runner, sampler: Sampler, first: int, batch: int
) -> list[Batch]:
    """This rank's share of samples first ... first + batch - 1: contiguous, so that the mesh does
    not change what is seen."""
    share = batch // runner.dp
    start = first + runner.dp_rank * share
    out = []
    for i in range(start, start + share, cfg.micro_batch):
        rows = sampler.batch(range(i, i + cfg.micro_batch))
        out.append({**rows, "count": (rows["targets"] >= 0).sum()})
    return out


def open_data(cfg: PretrainConfig) -> TokenData:
    """The prepared folder; the default one is made on first use, from what is on any machine with
    Python."""
    default = PretrainConfig.data
    if cfg.data == default and not default.exists():
        if dist.get_rank() == 0:
            log.info(f"preparing {default} from Python's own library and documentation, once")
            prepare(PrepareConfig(out=default, vocab_size=cfg.model.vocab_size, val_fraction=0.05))
        dist.barrier()
    data = TokenData(cfg.data)
    if data.vocab_size != cfg.model.vocab_size:
        todo = f"set --model.vocab-size {data.vocab_size}, or prepare with the model's tokenizer"
        sizes = f"a vocabulary of {data.vocab_size}, the model of {cfg.model.vocab_size}"
        raise ValueError(f"{cfg.data} has {sizes}: {todo}")
    return data


def check_mesh(cfg: RunConfig) -> None:
    """Refuse what cannot run from here on; what the folder has behind it ran on another mesh."""
    done = [int(p.name[5:]) for p in step_folders(cfg.out / "checkpoints")] if cfg.out else []
    segments = cfg.schedule().segments
    for s in segments:
        ahead = max(done, default=0) < s.first_step + s.steps and s.first_step < cfg.steps
        if ahead or s is segments[-1]:  # validation takes the last batch size throughout
            cfg.mesh.check(cfg.model, world_size(), s.batch, cfg.micro_batch)


def evaluator(
    cfg: PretrainConfig, runner: Runner, data: TokenData, blends: dict[int, dict[str, float]]
) -> Callable[[int], dict[str, float]]:
    """evaluate(step) → validation loss and bits per byte of each source, and the loss weighted by
    the blend of the step."""
    schedule, make = cfg.schedule(), partial(Sampler, data, split="val", isolate=cfg.isolate)
    batch = schedule.segments[-1].batch  # of every validation: a ramp must not change the set
    sources = list(dict.fromkeys(s for blend in blends.values() for s in blend))
    if without := [s for s in sources if data.n_tokens(s, "val") < 2]:
        log.warning(f"no validation data in {', '.join(without)}: prepare with more documents")
    sources = [s for s in sources if s not in without]
    val = {s: make(blend={s: 1.0}, seq_len=cfg.model.seq_len, seed=0) for s in sources}

    def evaluate(step: int) -> dict[str, float]:
        first, out, losses = schedule.samples(step - 1), {}, {}
        for source, sampler in val.items():
            n = min(cfg.eval_batches, max(1, sampler.windows[source] // batch))
            micro = [
                m
                for at in range(0, n * batch, batch)
                for m in micro_batches(cfg, runner, sampler, at, batch)
            ]
            losses[source] = runner.eval(micro, lm_loss).item()
            out[f"val_loss/{source}"] = losses[source]
            out[f"val_bpb/{source}"] = losses[source] / math.log(2) / data.bytes_per_token(source)
        blend = blends[max(at for at in blends if at <= first)]
        weights = {s: blend.get(s, 0.0) for s in losses}
        if not sum(weights.values()):
            return out
        total = sum(weights[s] * losses[s] for s in losses) / sum(weights.values())
        return {"val_loss": total} | out

    return evaluate


def pretrain(preset: str, cfg: PretrainConfig) -> None:
    check_mesh(cfg)
    mesh = init_mesh(cfg.mesh)
    cfg = replace(cfg, out=cfg.out or free_folder(preset))
    data, schedule = open_data(cfg), cfg.schedule()
    blends = {first: data.blend(blend) for first, blend in schedule.blends().items()}
    sampler = Sampler(
        data, blends[0], cfg.model.seq_len, cfg.seed, isolate=cfg.isolate, later=blends
    )
    check_init(cfg)
    open_folder(cfg, data.fingerprint, data.tokenizer())
    runner = Runner(cfg.model, cfg.mesh, mesh, cfg.micro_batch, cfg.seed)
    evaluate = evaluator(cfg, runner, data, blends)

    embedding, rest = count_params(cfg.model)
    size = f"{(embedding + rest) / 1e6:,.1f}M parameters ({embedding / 1e6:,.1f}M embedding)"
    log.info(f"{preset}: {size}, {world_size()} process(es)")
    for first, blend in blends.items():
        parts = ", ".join(f"{s} {w:.3f} ({sampler.windows[s]:,} windows)" for s, w in blend.items())
        log.info(f"blend from sample {first:,}: {parts}")
    epochs = sampler.epochs(schedule.samples(min(cfg.steps, schedule.steps)))
    log.info("epochs by the end: " + ", ".join(f"{s} {e:.2f}" for s, e in epochs.items()))
    log.info(f"folder: {cfg.out}")

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
    """`preset --name value ...` → (preset, config). An unknown preset gets a suggestion here, an
    unknown option from tyro."""
    if argv and not argv[0].startswith("-") and argv[0] not in presets:
        close = difflib.get_close_matches(argv[0], presets, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(presets)}"
        raise ValueError(f"no preset {argv[0]!r}: {hint}")
    table = {name: (" ".join(f.__doc__.split()), f()) for name, f in presets.items()}
    return argv[0] if argv else "", tyro.extras.overridable_config_cli(
        table, args=argv, description=description
    )


def run(main: Callable[[], None]) -> None:
    """Run a stage as a program: errors of the user in a line, others with their traceback, and no
    collective teardown on the failing path, where it would hang; torchrun reaps the other ranks."""
    rank = int(os.environ.get("RANK", 0))
    try:
        main()
        if dist.is_initialized():
            shut_down()
    except (ValueError, FloatingPointError, OSError) as e:
        raised_in = Path(traceback.extract_tb(e.__traceback__)[-1].filename)
        if isinstance(e, ValueError) and Path(__file__).parent not in raised_in.parents:
            traceback.print_exc()  # torch's or a bug of ours, not the user's
        log.error(f"error: {e}" if rank == 0 else f"error on rank {rank}: {e}")
        os._exit(2)
    except Exception:
        log.error(f"rank {rank} failed:")
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def main() -> None:
    if sys.argv[1:2] == ["report"]:
        sys.exit("train.py report is now `python -m recipes.report`")
    set_up_logging()
    about = "Pretrain a preset, changed by options."
    run(lambda: pretrain(*choose_config(sys.argv[1:], PRESETS, about)))


if __name__ == "__main__":
    main()
