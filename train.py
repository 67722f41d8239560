"""Pretraining, and the one loop (`fit`) that every stage of the system runs through.

torchrun --nproc_per_node 2 train.py nano
python train.py nano --steps 50 --out runs/try --lr 2e-3
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
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from data import PrepareConfig, Sampler, TokenData, prepare
from model import SHAPES, ModelConfig, count_params, flops_per_token
from parallel import (
    Batch,
    Checkpoints,
    LossFn,
    MeshConfig,
    Runner,
    init_mesh,
    peak_flops,
    shut_down,
    world_size,
)

log = logging.getLogger("nemotron4")


# ---- configs and presets -------------------------------------------------------------------------


@dataclass(frozen=True)
class RunConfig:
    """What `fit` needs, whatever the stage."""

    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    out: Path | None = None
    """The run's folder; what it holds of the same run is continued. Default: the first unused of
    runs/PRESET, -2, -3 ..."""
    steps: int = 1000
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
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices; norms and biases have none."""
    clip: float = 1.0
    """Largest gradient norm."""
    eval_every: int = 100
    """Steps between validations; the first and the last step validate too."""
    eval_batches: int = 8
    """Batches of validation data per source."""
    save_every: int = 500
    """Steps between checkpoints; the last step saves too."""
    save_in_background: bool = False
    """Train on while a checkpoint is being written."""
    keep: int = 2
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "eval_batches", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"lr={self.lr}, min_lr={self.min_lr}: 0 <= min_lr <= lr is needed")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: samples, 0 or more")


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    data: Path = Path("data/python")
    """A folder made by data.py prepare."""
    blend: dict[str, float] = field(default_factory=dict)
    """Source weights; empty: 70/15/15 for english, multilingual, code (report section 2.1), else by
    tokens."""
    isolate: bool = False
    """Keep packed documents from seeing each other (the report's run did not)."""


def nano() -> PretrainConfig:
    """A laptop CPU, about two minutes; every detail of the architecture, on Python's own library
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


PRESETS: dict[str, Callable[[], PretrainConfig]] = {f.__name__: f for f in (nano,)}


# ---- optimizer and schedule ----------------------------------------------------------------------


def make_optimizer(cfg: RunConfig, runner: Runner) -> torch.optim.AdamW:
    """AdamW over matrices (decayed) and norms and biases (not)."""
    params = runner.params().values()
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
    for (
        p
    ) in params:  # AdamW makes these at its first step; a checkpoint needs them to load into before
        zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=runner.device), **zeros}
    return optimizer


def lr_at(samples: int, cfg: RunConfig) -> float:
    """Linear warm-up, then cosine to min_lr, in samples consumed (SPEC 3.4), so that a batch ramp
    does not bend it."""
    if samples < cfg.warmup:
        return cfg.lr * (samples + cfg.batch) / (cfg.warmup + cfg.batch)
    progress = (samples - cfg.warmup) / max(1, cfg.steps * cfg.batch - cfg.warmup)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * progress)) / 2


# ---- the run's folder ----------------------------------------------------------------------------

# What may change between two starts of one run: where and how fast it runs, how often it reports,
# when it ends.
FREE = {
    "out",
    "mesh",
    "micro_batch",
    "steps",
    "eval_every",
    "eval_batches",
    "save_every",
    "keep",
    "save_in_background",
}


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


def open_folder(cfg: RunConfig) -> None:
    """Write config.json into the run's folder, or refuse a folder that holds another run."""
    file, mine = cfg.out / "config.json", as_json(cfg)
    if file.exists():
        theirs = json.loads(file.read_text())
        differ = [
            k for k in sorted((mine.keys() | theirs.keys()) - FREE) if mine.get(k) != theirs.get(k)
        ]
        if differ:
            what = "; ".join(f"{k}: {theirs.get(k)} there, {mine.get(k)} here" for k in differ)
            raise ValueError(
                f"{cfg.out} holds another run ({what}): choose another --out, or remove it"
            )
    elif cfg.out.exists() and any(cfg.out.iterdir()):
        raise ValueError(
            f"{cfg.out} is not empty and holds no run (no config.json): choose another --out"
        )
    dist.barrier()  # everyone has looked before anyone writes
    if dist.get_rank() == 0:
        cfg.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(mine, indent=2))


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

    def __init__(self, cfg: RunConfig, step: int, device: torch.device) -> None:
        from torchtitan.components.metrics import TensorBoardLogger  # slow to import

        self.cfg, self.device, self.start, self.begun = cfg, device, step, time.monotonic()
        peak = peak_flops(device)
        self.flops = flops_per_token(cfg.model) / (peak * world_size()) if peak else None
        self.writes = dist.get_rank() == 0
        if self.writes:
            self.tensorboard = TensorBoardLogger(str(cfg.out / "tensorboard"))
            path = cfg.out / "metrics.jsonl"
            old = path.read_text().splitlines(keepends=True) if path.exists() else []
            self.file = path.open("w", buffering=1)
            self.file.writelines(
                row for row in old if row.endswith("}\n") and json.loads(row)["step"] <= step
            )

    def step(self, step: int, seconds: float, tokens: int, **values: float) -> None:
        """values: loss, grad_norm, lr, and val_loss... where this step validated."""
        rate = self.cfg.batch * self.cfg.model.seq_len / seconds
        mfu = 100 * self.flops * rate if self.flops else None
        row = {
            "step": step,
            "loss": values.pop("loss"),
            "grad_norm": values.pop("grad_norm"),
            "lr": values.pop("lr"),
        }
        row |= {
            "tokens": tokens,
            "tokens_per_s": rate,
            "mfu": mfu,
            "memory_gib": memory_gib(self.device),
            **values,
        }
        left = (time.monotonic() - self.begun) / (step - self.start) * (self.cfg.steps - step)
        log.info(
            f"step {step:6d}/{self.cfg.steps}  loss {row['loss']:7.4f}  "
            f"norm {row['grad_norm']:8.4f}  lr {row['lr']:.2e}  {rate / 1e3:8.1f}k tok/s  "
            f"mfu {'  --' if mfu is None else f'{mfu:4.1f}'}  {row['memory_gib']:5.1f} GiB  "
            f"eta {timedelta(seconds=round(left))}"
        )
        if "val_loss" in values:
            parts = "  ".join(
                f"{k.removeprefix('val_loss/')} {v:.4f}"
                for k, v in values.items()
                if k != "val_loss"
            )
            log.info(f"step {step:6d}/{self.cfg.steps}  val  {values['val_loss']:7.4f}  {parts}")
        if self.writes:
            self.file.write(json.dumps(row) + "\n")
            self.tensorboard.log(
                {k: v for k, v in row.items() if k != "step" and v is not None}, step
            )

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
        state |= {f"optim.{key}.{name}": value for key, value in optimizer.state[p].items()}
    return state


def stop_unless_finite(step: int, loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"step {step}: loss {loss}, gradient norm {norm}: stopped before the update; the "
            f"last checkpoint is untouched. "
            "Lower --lr, or look at the batch"
        )


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
    evaluate: Callable[[], dict[str, float]],
) -> None:
    """Train to cfg.steps, continuing from the newest checkpoint of cfg.out. batches(step) → this
    rank's micro-batches."""
    optimizer = make_optimizer(cfg, runner)
    checkpoints, step = Checkpoints(cfg.out / "checkpoints", cfg.keep, cfg.save_in_background), 0
    if saved := checkpoints.load(training_state(runner, optimizer)):
        step = saved["step"]
        finished = ": it is finished" if step >= cfg.steps else ""
        log.info(f"continuing from step {step} of {cfg.out}{finished}")
    metrics, asked = Metrics(cfg, step, runner.device), asked_to_stop()
    while step < cfg.steps:
        begun, lr = time.monotonic(), lr_at(step * cfg.batch, cfg)
        loss = runner.step(batches(step), loss_fn).item()
        norm = runner.clip_grad_norm(cfg.clip).item()
        stop_unless_finite(step + 1, loss, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        values = {"loss": loss, "grad_norm": norm, "lr": lr}
        seconds, tokens = time.monotonic() - begun, step * cfg.batch * cfg.model.seq_len
        if step == 1 or due(step, cfg.eval_every, cfg.steps):
            values |= evaluate()
        metrics.step(step, seconds, tokens, **values)
        stop = asked()
        if stop or due(step, cfg.save_every, cfg.steps):
            checkpoints.save(step, training_state(runner, optimizer), {"tokens": tokens})
        checkpoints.poll()
        if stop:
            log.info(
                f"asked to stop: saved step {step}; the same command with --out {cfg.out} goes on"
            )
            break
    checkpoints.finish()
    metrics.close()


# ---- pretraining ---------------------------------------------------------------------------------


def lm_loss(log_probs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Summed negative log-likelihood of the next tokens, (B, T) → scalar; the batch's count is its
    predicted tokens."""
    return -log_probs.sum()


def micro_batches(cfg: RunConfig, runner: Runner, sampler: Sampler, first: int) -> list[Batch]:
    """This rank's share of samples first ... first + batch - 1: contiguous, so the mesh does not
    change what is seen."""
    share = cfg.batch // runner.dp
    start = first + runner.dp_rank * share
    out = []
    for i in range(start, start + share, cfg.micro_batch):
        batch = sampler.batch(range(i, i + cfg.micro_batch))
        out.append({**batch, "count": (batch["targets"] >= 0).sum()})
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
        raise ValueError(
            f"{cfg.data} has a vocabulary of {data.vocab_size}, the model of "
            f"{cfg.model.vocab_size}: "
            f"set --model.vocab-size {data.vocab_size}, or prepare the data with the model's "
            f"tokenizer"
        )
    return data


def pretrain(preset: str, cfg: PretrainConfig) -> None:
    cfg.mesh.check(cfg.model, world_size(), cfg.batch, cfg.micro_batch)
    mesh = init_mesh(cfg.mesh)
    cfg = dataclasses.replace(cfg, out=cfg.out or free_folder(preset))
    data = open_data(cfg)
    blend = data.blend(cfg.blend)
    sampler = Sampler(data, blend, cfg.model.seq_len, cfg.seed, isolate=cfg.isolate)
    val = {
        s: Sampler(data, {s: 1.0}, cfg.model.seq_len, 0, "val", cfg.isolate)
        for s in blend
        if data.n_tokens(s, "val") > 1
    }
    open_folder(cfg)
    runner = Runner(cfg.model, cfg.mesh, mesh, cfg.micro_batch, cfg.seed)

    def evaluate() -> dict[str, float]:
        """Validation loss per source, and weighted by the blend."""
        losses = {}
        for source, val_sampler in val.items():
            n = min(cfg.eval_batches, max(1, val_sampler.windows[source] // cfg.batch))
            firsts = range(0, n * cfg.batch, cfg.batch)
            micro = [m for first in firsts for m in micro_batches(cfg, runner, val_sampler, first)]
            losses[source] = runner.eval(micro, lm_loss).item()
        if not losses:
            return {}
        weight = sum(blend[s] for s in losses)
        total = sum(blend[s] * loss for s, loss in losses.items()) / weight
        return {"val_loss": total} | {f"val_loss/{s}": loss for s, loss in losses.items()}

    embedding, rest = count_params(cfg.model)
    log.info(
        f"{preset}: {(embedding + rest) / 1e6:,.1f}M parameters ({embedding / 1e6:,.1f}M "
        f"embedding), {world_size()} process(es)"
    )
    sources = [f"{s} {w:.3f} ({sampler.windows[s]:,} windows)" for s, w in blend.items()]
    last = ", ".join(f"{s} {e:.2f}" for s, e in sampler.epochs(cfg.steps * cfg.batch).items())
    log.info(f"blend: {', '.join(sources)}; epochs by step {cfg.steps}: {last}")
    log.info(f"folder: {cfg.out}")
    fit(
        cfg,
        runner,
        lambda step: micro_batches(cfg, runner, sampler, step * cfg.batch),
        lm_loss,
        evaluate,
    )


def choose_config(
    argv: list[str], presets: dict[str, Callable[[], Any]], description: str
) -> tuple[str, Any]:
    """`preset --name value ...` → (preset, config). An unknown preset gets a suggestion here, an
    unknown option from tyro."""
    if argv and not argv[0].startswith("-") and argv[0] not in presets:
        close = difflib.get_close_matches(argv[0], presets, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(presets)}"
        raise ValueError(f"no preset {argv[0]!r}: {hint}")
    table = {name: (f.__doc__, f()) for name, f in presets.items()}
    return argv[0] if argv else "", tyro.extras.overridable_config_cli(
        table, args=argv, description=description
    )


def run(main: Callable[[], None]) -> None:
    """Run a stage as a program: errors of the user in a line, others with their traceback, and no
    collective teardown on the failing path, where it would hang; torchrun reaps the other ranks."""
    try:
        main()
        shut_down() if dist.is_initialized() else None
    except (ValueError, FloatingPointError) as e:
        log.error(f"error: {e}")
        os._exit(2)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def main() -> None:
    set_up_logging()
    run(lambda: pretrain(*choose_config(sys.argv[1:], PRESETS, __doc__)))


if __name__ == "__main__":
    main()
