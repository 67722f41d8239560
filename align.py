"""Alignment (report section 3): staged supervised fine-tuning, reward model, DPO and RPO.

Losses are pure functions of log-probabilities summed over a response's tokens. They return values
per pair, or a sum and a count, never a mean: what a step divides by is counted over all processes.
A stage is rows, a loss and train.py's `fit`.

    python align.py general_sft --init runs/code_sft --data chats.jsonl
    python align.py reward --init runs/base --data helpsteer2.jsonl
    torchrun --nproc_per_node 8 align.py rpo_1 --init runs/dpo --data pairs.jsonl --mesh.tp 8
"""
# In comments: B windows of T tokens  S rows of a window, each of n segments (see data.pack)
# N rows of a batch  A attributes  K responses of one prompt

import hashlib
import json
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor

from data import (
    NINE_ATTRIBUTES,
    REWARD_SYSTEM,
    PrepareConfig,
    Row,
    Task,
    Tokenizer,
    aggregate,
    best_and_worst,
    draw_task,
    draw_text,
    load_tokenizer,
    pack,
    permute,
    preference_rows,
    prepare,
    render_chat,
    render_reward,
    reward_rows,
    scored_row,
    sft_rows,
    show_row,
    train_bpe,
)
from generate import (
    Engine,
    EngineConfig,
    Pipeline,
    SamplingParams,
    SynthesizeConfig,
    chat_stops,
    identity,
    load_engine,
    own_prompts,
    rate,
    synthesize,
    table,
)
from model import IGNORE, SHAPES, ModelConfig, count_params
from parallel import Batch, MeshConfig, Runner, init_mesh, read_config, world_size
from train import (
    PretrainConfig,
    RunConfig,
    check_init,
    choose_config,
    fit,
    free_folder,
    load_init,
    open_folder,
    pretrain,
    run,
    set_up_logging,
    step_folders,
)

__all__ = ["aggregate"]  # of data.py, as generate.py ranks with it too

log = logging.getLogger("nemotron4")
Sums = dict[str, Tensor]

# ---- losses --------------------------------------------------------------------------------------


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ). torch's own is off by up to 2e-9, as it returns x above 20."""
    return -F.logsigmoid(-x)


def sft_loss(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """−Σ log π(y_t | x, y_<t) over the trained tokens, and their number (report section 3.3.1)."""
    trained = targets != IGNORE
    return -torch.where(trained, log_probs, 0).sum(), trained.sum()


def dpo_loss(a: Tensor, eps: Tensor | float = 0.0) -> Tensor:
    """−(1 − ε) log σ(a) − ε log σ(−a) per pair: DPO (report section 3.3.2), with ε > 0 smoothed."""
    return (1 - eps) * softplus(-a) + eps * softplus(a)


def rpo_loss(a: Tensor, b: Tensor, form: str = "bwd") -> Tensor:
    """D[a ‖ b] per pair: reward-aware preference optimization (report section 3.3.2).

    bwd, the report's: σ(b) log σ(b)/σ(a) + σ(−b) log σ(−b)/σ(−a), a KL divergence between coins,
    with d/da = σ(a) − σ(b). fwd: a and b exchanged. sq: (a − b)².
    """
    if form == "sq":
        return (a - b).square()
    if form not in ("bwd", "fwd"):
        raise ValueError(f"form={form!r}: bwd (the report's), fwd or sq")
    a, b = (b, a) if form == "fwd" else (a, b)
    up, down = softplus(-a) - softplus(-b), softplus(a) - softplus(b)  # log σ(±b)/σ(±a)
    return torch.sigmoid(b) * up + torch.sigmoid(-b) * down


def rpo_k_loss(a: Tensor, b: Tensor) -> Tensor:
    """KL(softmax(b) ‖ softmax(a)) of K responses (..., K) → (...), with a = β log π/π_ref and
    b = η r* of each: D[a ‖ b] beyond pairs (arXiv 2502.00203)."""
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    return F.kl_div(log_a, log_b, reduction="none", log_target=True).sum(-1)


def ipo_loss(delta: Tensor, beta: float) -> Tensor:
    """(Δ − 1 / 2β)² per pair, Δ = a / β: IPO (arXiv 2310.12036, equation 17)."""
    return (delta - 1 / (2 * beta)).square()


def reward_loss(pred: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Σ (pred − label)² over the labelled attributes, and their number; (..., 5 or 9), the last
    five of nine where one has five (report section 3.1)."""
    sizes, n = {pred.shape[-1], label.shape[-1]}, min(pred.shape[-1], label.shape[-1])
    if not sizes <= {5, 9} or pred.shape[:-1] != label.shape[:-1]:
        shapes = f"pred {tuple(pred.shape)}, label {tuple(label.shape)}"
        raise ValueError(f"{shapes}: the same but for the last, which is 5 or 9")
    pred, label = pred[..., -n:], label[..., -n:]
    labelled = label != IGNORE
    return torch.where(labelled, pred - label, 0).square().sum(), labelled.sum()


def bradley_terry_loss(
    margin: Tensor, strength: Tensor | None = None, kind: str = "regular"
) -> Tensor:
    """−log σ(m) per pair, m = r(chosen) − r(rejected). With the strength s ≥ 0 of the preference,
    margin: −log σ(m − s), scaled: −s log σ(m) (HelpSteer2-Preference, arXiv 2410.01257)."""
    if kind not in ("regular", "margin", "scaled") or (kind == "regular") != (strength is None):
        given = "none" if strength is None else "one"
        raise ValueError(f"kind={kind!r}, strength: {given}: regular without, margin, scaled with")
    if kind == "margin":
        return softplus(strength - margin)
    return softplus(-margin) * (1 if strength is None else strength)


# ---- from tokens to responses --------------------------------------------------------------------


def response_sums(x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """x (B, T) → its sums over each segment of each row, fp64 (N, n): only differences of these
    sums count. x is a log-probability, zero where nothing is trained, or 1 to count."""
    slots, n = batch["rows"].shape[1], batch["ends"].shape[-1]
    sums = x.new_zeros((len(x), slots * n + 1), dtype=torch.float64)
    sums = sums.scatter_add(1, batch["documents"] + 1, x.double())  # padding, -1, to the first
    return sums[:, 1:].unflatten(1, (slots, n))[batch["rows"] >= 0]


def last_scores(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """A reward head's scores (B, T, A) → those of each row's segments (N, n, A)."""
    there = batch["rows"] >= 0
    window = torch.arange(len(scores), device=scores.device)[:, None].expand_as(there)[there]
    return scores[window[:, None], batch["ends"][there]]


def preference_margin(log_probs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """a = β [log π/π_ref (y_c) − log π/π_ref (y_l)] of (N, 2) sums → (N)."""
    ratio = log_probs - reference
    return beta * (ratio[:, 0] - ratio[:, 1])


# ---- metrics -------------------------------------------------------------------------------------


def pairwise_accuracy(margin: Tensor, ties: float = 0.0) -> tuple[Tensor, Tensor]:
    """How many margins are positive, a tie counted as `ties` (RewardBench: one half), and of how
    many."""
    return ((margin > 0) + ties * (margin == 0)).sum(), torch.ones_like(margin).sum()


def pair_sums(
    log_probs: Tensor, reference: Tensor, tokens: Tensor, beta: float, b: Tensor | None = None
) -> Sums:
    """Sums over pairs, fp64, to be added up over batches and processes, then `pair_values`.
    log_probs, reference and tokens, the trained ones: (N, 2); b = η × reward gap (N)."""
    ratio = (log_probs - reference).detach().double()
    a, longer = beta * (ratio[:, 0] - ratio[:, 1]), (tokens[:, 0] - tokens[:, 1]).double()
    x = {"pairs": torch.ones_like(a), "accuracy": a > 0, "beta_margin": a, "longer": longer}
    for i, side in enumerate(("chosen", "rejected")):
        x |= {f"beta_reward_{side}": beta * ratio[:, i], f"drift_{side}": ratio[:, i]}
        x |= {f"tokens_{side}": tokens[:, i]}
    x |= {"aa": a * a, "ll": longer * longer, "al": a * longer}
    if b is not None:
        b = b.double()
        x |= {"overshoot": a > b, "gap_error": (a - b).abs(), "reward_gap": b}
        x |= {"bb": b * b, "ab": a * b, "bl": b * longer}
    return {key: value.double().sum() for key, value in x.items()}


def spread(n: float, x: float, y: float, xy: float) -> float:
    """Covariance from moment sums: Σx, Σy, Σxy of n."""
    return xy / n - x / n * (y / n)


def correlation(n: float, x: float, y: float, xx: float, yy: float, xy: float) -> float | None:
    """Pearson's, from moment sums; None where x or y does not vary."""
    var = spread(n, x, x, xx), spread(n, y, y, yy)
    flat = var[0] <= 1e-12 * xx / n or var[1] <= 1e-12 * yy / n
    return None if flat else spread(n, x, y, xy) / (var[0] * var[1]) ** 0.5


def pair_values(sums: Sums) -> dict[str, float | None]:
    """What to log of `pair_sums`: means, the reward gap's deviation, and how a follows b and
    length. Named beta_...: times β. drift_...: log π/π_ref, in nats."""
    s = {key: float(value) for key, value in sums.items()}
    if not (n := s["pairs"]):
        return {}
    a, longer = s["beta_margin"], s["longer"]
    moments = ("pairs", "aa", "ll", "al", "bb", "ab", "bl", "longer")
    out = {key: value / n for key, value in s.items() if key not in moments} | {"pairs": n}
    out["length_margin_correlation"] = correlation(n, a, longer, s["aa"], s["ll"], s["al"])
    if "bb" in s:
        b, var = s["reward_gap"], spread(n, s["reward_gap"], s["reward_gap"], s["bb"])
        out["reward_gap_std"] = max(0.0, var) ** 0.5
        out["calibration_correlation"] = correlation(n, a, b, s["aa"], s["bb"], s["ab"])
        flat = out["calibration_correlation"] is None
        out["calibration_slope"] = None if flat else spread(n, a, b, s["ab"]) / var  # of a on b
        out["length_gap_correlation"] = correlation(n, b, longer, s["bb"], s["ll"], s["bl"])
    return out


def attribute_sums(pred: Tensor, label: Tensor) -> Sums:
    """Sums by attribute over labelled rows, fp64 (A), as `pair_sums`; pred and label (N, A)."""
    seen = label != IGNORE
    p, y = (torch.where(seen, x.detach().double(), 0) for x in (pred, label))
    x = {"n": seen, "mse": (p - y).square(), "mae": (p - y).abs(), "p": p, "y": y}
    x |= {"pp": p * p, "yy": y * y, "py": p * y}
    return {key: value.double().sum(0) for key, value in x.items()}


def attribute_values(sums: Sums) -> dict[str, float | None]:
    """mse, mae and correlation of each attribute that was labelled at all."""
    out = {}
    for i, name in enumerate(NINE_ATTRIBUTES[-len(sums["n"]) :]):
        n, p, y, pp, yy, py = (sums[key][i].item() for key in ("n", "p", "y", "pp", "yy", "py"))
        if n:
            out |= {f"{key}/{name}": sums[key][i].item() / n for key in ("mse", "mae")}
            out[f"correlation/{name}"] = correlation(n, p, y, pp, yy, py)
    return out


# ---- configs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AlignConfig(RunConfig):
    """What all stages share. Rates are constant: min_lr is lr unless it is set."""

    model: ModelConfig = SHAPES["nemotron4-340b"]
    """Of random weights; with --init, it is that model's."""
    data: Path = Path("data/align.jsonl")
    """Rows, as JSON lines."""
    val: Path | None = None
    """Rows to validate on."""
    tokenizer: str = ""
    """A file, folder or tiktoken name; default: the one in the folder of --init."""
    seq_len: int = 4096
    """Tokens of a window; longer rows are left out and counted."""
    steps: int = 1 << 30
    """At most so many; the end of the epochs comes first."""
    epochs: float = 1.0
    """How often each row is seen."""
    packed: bool = True
    """Several rows in a window; they do not see each other, and the result is the same."""
    shorten: bool = False
    """Rows that are too long lose their earliest exchanges instead of being left out."""
    lora_rank: int = 0
    """Train adapters of this rank, not the weights; export and the next stage merge them. 0: no."""
    lora_alpha: float = 32.0
    lora_targets: str = "wq wk wv wo up down"
    skip_bad: bool = False
    """Leave out and count rows that cannot be read, instead of ending the run."""
    batch: int = 128
    """Rows (conversations, scored responses, pairs) per optimizer step."""
    micro_batch: int = 1
    """Windows per forward pass of one process; changes memory and speed alone."""
    min_lr: float = -1.0
    """Where a cosine ends; -1: the rate is constant."""

    def __post_init__(self) -> None:
        if self.min_lr == -1:
            object.__setattr__(self, "min_lr", self.lr)
        if self.epochs <= 0:
            raise ValueError(f"epochs={self.epochs}: must be positive")
        super().__post_init__()


@dataclass(frozen=True)
class SftConfig(AlignConfig):
    """Supervised fine-tuning on the assistant's turns (report section 3.3.1)."""


@dataclass(frozen=True)
class RewardConfig(AlignConfig):
    """A language model with a linear head on the last token's state (report section 3.1)."""

    n_attributes: Literal[5, 9] = 5
    """Outputs: HelpSteer2's five, or as NVIDIA's checkpoint four more before them."""
    loss: Literal["regression", "regular", "margin", "scaled"] = "regression"
    """Masked squared error of the attributes; or Bradley-Terry's on the helpfulness of preference
    rows, whose reward gap is the strength of the preference (margin, scaled)."""
    pairs: Path | None = None
    """Preference rows, on which to measure how often the chosen one has the higher reward."""


@dataclass(frozen=True)
class PreferenceConfig(AlignConfig):
    """DPO and RPO (report section 3.3.2), from pairs of answers to one prompt."""

    loss: Literal["dpo", "ipo", "rpo_bwd", "rpo_fwd", "rpo_sq"] = "dpo"
    """rpo_bwd is the report's; the RPO losses need rows with rewards."""
    beta: float = 1e-3
    """KL coefficient: of the log-ratio between policy and reference."""
    eta: float = 1.0
    """Of the gap between the two rewards."""
    sft_weight: float = 0.0
    """Of the chosen answer's negative log-likelihood, summed over its tokens."""
    label_smoothing: float = 0.0
    """Share of pairs that are taken to be the wrong way round (dpo)."""
    reference: Path | None = None
    """File of reference log-probabilities; default: beside the rows, by the weights' hash."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.loss != "dpo":
            raise ValueError(f"label_smoothing={self.label_smoothing} belongs to dpo: {self.loss}")
        if self.eta != 1.0 and not self.loss.startswith("rpo"):
            raise ValueError(f"eta={self.eta} belongs to the RPO losses: {self.loss}")
        if self.beta <= 0 or self.sft_weight < 0 or not 0 <= self.label_smoothing < 0.5:
            numbers = f"beta={self.beta}, sft_weight={self.sft_weight}"
            rule = "beta above 0, sft_weight at least 0, label_smoothing in 0..0.5"
            raise ValueError(f"{numbers}, label_smoothing={self.label_smoothing}: {rule}")


# ---- presets -------------------------------------------------------------------------------------

# SPEC section 6. Where the report has a range that was searched, its middle (on a log scale) stands
# here; sequence length, packing and warm-up are not stated.


def code_sft() -> SftConfig:
    """Stage 1: 800K code samples, one epoch (6,250 steps)."""
    return SftConfig(lr=3e-7)


def general_sft() -> SftConfig:
    """Stage 2: 200K samples, 2 % of them code, three epochs (4,688 steps)."""
    return SftConfig(lr=2.2e-7, epochs=3)  # searched in [1e-7, 5e-7]


def reward() -> RewardConfig:
    """The reward model: HelpSteer2's 20K responses, two epochs (317 steps), from the base model."""
    return RewardConfig(lr=7e-7, epochs=2, warmup=10 * 128)


def dpo() -> PreferenceConfig:
    """Stage 3: 160K pairs, one epoch (625 steps)."""
    # rate searched in [3e-8, 3e-7], beta in [3e-4, 3e-3], weight of the SFT loss in [1e-5, 1e-3]
    return PreferenceConfig(lr=1e-7, beta=1e-3, sft_weight=1e-4, batch=256)


def rpo(init: str = "") -> PreferenceConfig:
    """Stage 4, three times: 300K pairs with rewards. Policy and reference begin as --init."""
    # beta searched in [1e-3, 1]; batch and epochs are not stated
    how = dict(loss="rpo_bwd", eta=1.0, sft_weight=1e-5)
    return PreferenceConfig(init=init, lr=3e-7, beta=3e-2, batch=256, **how)


def rpo_1() -> PreferenceConfig:
    """The first RPO, from runs/dpo."""
    return rpo("runs/dpo")


def rpo_2() -> PreferenceConfig:
    """The second RPO, from runs/rpo_1."""
    return rpo("runs/rpo_1")


def rpo_3() -> PreferenceConfig:
    """The third RPO, from runs/rpo_2: the released model."""
    return rpo("runs/rpo_2")


def sft() -> SftConfig:
    """Supervised fine-tuning, of your own."""
    return SftConfig(lr=5e-6)


PRESETS = {
    f.__name__: f for f in (sft, code_sft, general_sft, reward, dpo, rpo, rpo_1, rpo_2, rpo_3)
}


# ---- what a stage learns from a window -----------------------------------------------------------


class Objective(NamedTuple):
    """A stage's loss."""

    measure: Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, Sums]]
    """(the model's output, batch) → the summed loss, and sums of what is to be logged."""
    count: Callable[[Batch], int]
    """What the loss is divided by, of a batch: tokens, labels or pairs."""
    values: Callable[[Sums], dict[str, float | None]]
    """Sums over all processes → what is logged."""
    nothing: Sums
    """The sums of no row at all: what a process without the last stage adds."""


def n_rows(batch: Batch) -> int:
    return int((batch["rows"] >= 0).sum())


def sft_objective(cfg: SftConfig) -> Objective:
    def measure(log_probs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Sums]:
        loss, tokens = sft_loss(log_probs, batch["targets"])
        certain = (log_probs.detach() > math.log(0.5)) & (batch["targets"] != IGNORE)
        return loss, {
            "tokens": tokens,
            "certain": certain.sum(),
            "rows": (batch["rows"] >= 0).sum(),
        }

    def values(s: Sums) -> dict[str, float]:
        tokens = max(1.0, s["tokens"].item())
        # tokens that have more than half of the probability, which makes them the likeliest
        return {
            "trained_tokens": tokens,
            "certain": s["certain"].item() / tokens,
            "rows": s["rows"].item(),
        }

    count = lambda batch: int((batch["targets"] != IGNORE).sum())  # noqa: E731
    return Objective(
        measure, count, values, dict.fromkeys(("tokens", "certain", "rows"), torch.zeros(()))
    )


def reward_objective(cfg: RewardConfig) -> Objective:
    """Regression on labels; or a Bradley-Terry loss on helpfulness."""
    helpfulness = NINE_ATTRIBUTES[-cfg.n_attributes :].index("helpfulness")

    def measure(scores: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Sums]:
        pred, there = last_scores(scores, batch), batch["rows"] >= 0
        if cfg.loss == "regression":
            label = batch["labels"][there]
            loss, _ = reward_loss(pred[:, 0], label)
            return loss, attribute_sums(pred[:, 0], label)
        margin = pred[:, 0, helpfulness] - pred[:, 1, helpfulness]
        strength = None
        if cfg.loss != "regular":
            strength = batch["rewards"][there][:, 0] - batch["rewards"][there][:, 1]
        loss = bradley_terry_loss(margin, strength, cfg.loss).sum()
        won, pairs = pairwise_accuracy(margin.detach())
        return loss, {"won": won, "pairs": pairs}

    if cfg.loss == "regression":
        empty = torch.zeros(0, cfg.n_attributes)
        labelled = lambda batch: int((batch["labels"] != IGNORE).sum())  # noqa: E731
        return Objective(measure, labelled, attribute_values, attribute_sums(empty, empty))
    accuracy = lambda s: {"accuracy": s["won"].item() / max(1.0, s["pairs"].item())}  # noqa: E731
    return Objective(measure, n_rows, accuracy, dict.fromkeys(("won", "pairs"), torch.zeros(())))


def preference_objective(cfg: PreferenceConfig, rewards: bool) -> Objective:
    per_pair = {
        "dpo": lambda a, b: dpo_loss(a, cfg.label_smoothing),
        "ipo": lambda a, b: ipo_loss(a / cfg.beta, cfg.beta),
    } | {f"rpo_{form}": partial(rpo_loss, form=form) for form in ("bwd", "fwd", "sq")}

    def measure(log_probs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Sums]:
        there, targets = batch["rows"] >= 0, batch["targets"]
        sums = response_sums(log_probs, batch)  # (N, 2)
        tokens = response_sums((targets != IGNORE).to(log_probs.dtype), batch)
        reference = batch["reference"][there]
        a, b = preference_margin(sums, reference, cfg.beta), None
        if rewards:
            b = cfg.eta * (batch["rewards"][there][:, 0] - batch["rewards"][there][:, 1]).double()
        preference, sft = per_pair[cfg.loss](a, b).sum(), -sums[:, 0].sum()
        noted = pair_sums(sums, reference, tokens, cfg.beta, b)
        noted |= {"preference_loss": preference.detach(), "sft_loss": sft.detach()}
        noted["at_reference"] = per_pair[cfg.loss](torch.zeros_like(a), b).sum()
        noted["furthest"] = (sums - reference).detach().abs().sum()
        return preference + cfg.sft_weight * sft, noted

    none = torch.zeros(0, 2, dtype=torch.float64)
    gaps = none[:, 0] if rewards else None
    nothing = pair_sums(none, none, none, cfg.beta, gaps)
    more = ("preference_loss", "sft_loss", "at_reference", "furthest")
    return Objective(measure, n_rows, pair_values, nothing | dict.fromkeys(more, torch.zeros(())))


# ---- a stage -------------------------------------------------------------------------------------


class Tally:
    """An objective as a loss function, whose sums are added up over micro-batches and processes."""

    def __init__(self, objective: Objective, runner: Runner) -> None:
        self.objective, self.runner, self.sums = objective, runner, {}

    def loss_fn(self, out: Tensor, batch: dict[str, Tensor]) -> Tensor:
        loss, sums = self.objective.measure(out, batch)
        for key, value in sums.items():
            self.sums[key] = self.sums.get(key, 0) + value.detach().double()
        return loss

    def take(self) -> dict[str, float | None]:
        """What to log of all since the last time."""
        sums = {}
        for key, zero in self.objective.nothing.items():
            own = self.sums.get(key, zero).to(self.runner.device, torch.float64, copy=True)
            sums[key] = self.runner.reduce(own, "dp_replicate", "dp_shard", "pp").cpu()
        self.sums = {}
        return self.objective.values(sums)


def unit(cfg: AlignConfig, dp: int) -> int:
    """Windows of a step come in multiples of this: every process has its micro-batches, and every
    pipeline its rounds."""
    return dp * cfg.micro_batch * cfg.mesh.pp


def batches_of(
    cfg: AlignConfig,
    runner: Runner,
    rows: Sequence[Row],
    count: Callable[[Batch], int],
    extra: dict[str, np.ndarray],
) -> list[Batch]:
    """Rows → this process's micro-batches. Which rows share a window depends on these rows alone.
    extra: arrays by row, (rows, ...), each of which a batch gets as (B, S, ...)."""
    windows = pack(rows, cfg.model.seq_len, cfg.packed, unit(cfg, runner.dp))
    for key, values in extra.items():
        windows[key] = np.where((windows["rows"] >= 0)[..., None], values[windows["rows"]], 0)
    n = len(windows["tokens"])
    share = n // runner.dp
    start = runner.dp_rank * share
    out = []
    for i in range(start, start + share, cfg.micro_batch):
        batch = {key: value[i : i + cfg.micro_batch] for key, value in windows.items()}
        out.append(batch | {"count": count(batch)})
    return out


def row_order(n: int, seed: int, first: int, batch: int) -> list[int]:
    """Numbers of rows first ... first + batch - 1 of the run: each epoch a shuffle of its own."""
    out = []
    for i in range(first, first + batch):
        epoch, j = divmod(i, n)
        key = hashlib.blake2b(f"{seed}/rows/{epoch}".encode(), digest_size=8).digest()
        out.append(permute(j, n, int.from_bytes(key, "big")))
    return out


def read_rows_of(cfg: AlignConfig, path: Path, tokenizer: Tokenizer) -> list[Row]:
    how = dict(seq_len=cfg.model.seq_len, skip_bad=cfg.skip_bad, shorten=cfg.shorten)
    if isinstance(cfg, SftConfig):
        rows, _ = sft_rows(path, tokenizer, **how)
    elif isinstance(cfg, PreferenceConfig):
        needs = cfg.loss.startswith("rpo")
        rows, _ = preference_rows(path, tokenizer, rewards=needs, **how)
    elif cfg.loss == "regression":
        rows, _ = reward_rows(path, tokenizer, n_attributes=cfg.n_attributes, **how)
    else:
        needs = cfg.loss != "regular"
        rows, _ = preference_rows(path, tokenizer, rewards=needs, judged=True, **how)
    some = [row.values is not None for row in rows]
    if any(some) and not all(some):  # rewards that only some have are not used
        rows = [replace(row, values=None) for row in rows]
    check_rows(rows, path, isinstance(cfg, RewardConfig))
    return rows


def check_rows(rows: list[Row], path: Path, scored: bool) -> None:
    """The template's self-check on the real data: a trained share of none or all of the tokens is a
    wrong mask. Only a reward model trains none."""
    share = sum(t.sum() for row in rows for t in row.trained) / sum(row.length for row in rows)
    if not scored and not 0 < share < 1:
        raise ValueError(f"{path}: {share:.0%} of the tokens would be trained: look at its roles")
    longest = max(row.length for row in rows)
    log.info(f"{path}: longest row {longest:,} tokens, {share:.1%} of all are trained")


def reference_log_probs(
    cfg: PreferenceConfig, runner: Runner, rows: list[Row], path: Path
) -> np.ndarray:
    """log π_ref of each row's two answers, (rows, 2) fp64, of the weights the runner holds now.
    Kept in a file beside the rows, so that another rate or beta does not compute them again."""
    weights, dtype = runner.fingerprint(), cfg.mesh.dtype
    file = cfg.reference or path.with_name(f"{path.name}.reference-{weights}-{dtype}.json")
    known: dict[str, list[float]] = {}
    if file.exists():
        found = json.loads(file.read_text())
        if (found["weights"], found["dtype"]) != (weights, dtype):
            theirs = f"{found['weights']} in {found['dtype']}"
            rule = f"this run starts from {weights} in {dtype}: remove it, or set another file"
            raise ValueError(f"{file} is of the weights {theirs}, {rule}")
        known = found["log_probs"]
    missing = [i for i, row in enumerate(rows) if row.key not in known]
    out = torch.zeros(len(rows), 2, dtype=torch.float64, device=runner.device)
    log.info(f"{file}: {len(rows) - len(missing):,} known, {len(missing):,} to compute")
    for at in range(0, len(missing), cfg.batch):
        some = missing[at : at + cfg.batch]

        def collect(log_probs: Tensor, batch: dict[str, Tensor], some: list[int] = some) -> Tensor:
            which = torch.tensor(some, device=out.device)[batch["rows"][batch["rows"] >= 0]]
            out[which] = response_sums(log_probs, batch)
            return log_probs.new_zeros(())

        part = batches_of(cfg, runner, [rows[i] for i in some], n_rows, {})
        runner.eval(part, collect)
    runner.reduce(out, "dp_replicate", "dp_shard", "pp")
    known |= {rows[i].key: out[i].tolist() for i in missing}
    if not all(map(math.isfinite, (x for row in rows for x in known[row.key]))):
        raise ValueError(f"{path}: the reference gives a log-probability that is not finite")
    if missing and dist.get_rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"weights": weights, "dtype": dtype, "log_probs": known})
        file.with_suffix(".tmp").write_text(text)
        file.with_suffix(".tmp").rename(file)
    dist.barrier()
    return np.array([known[row.key] for row in rows])


def check_start(cfg: PreferenceConfig, values: dict[str, float | None]) -> None:
    """Before the first step policy and reference are one: a = 0, so that DPO's loss is ln 2 and
    RPO's ln 2 − H(σ(b)). Else the log-probabilities are of other weights, tokens or code."""
    nats = {"fp32": 1e-3, "bf16": 0.5}[cfg.mesh.dtype]  # of a whole answer's log-probability
    off = values["furthest"] / 2
    want, got = values["at_reference"], values["preference_loss"]
    if off > nats or abs(got - want) > 1e-6 + cfg.beta * 4 * nats * max(1.0, abs(want)):
        raise ValueError(
            f"before the first step policy and reference differ by {off:.4g} nats an answer, the "
            f"loss is {got:.6f} where {want:.6f} is due: wrong --reference, or a wrong rendering"
        )
    log.info(f"self-test: policy = reference within {off:.2g} nats, loss {got:.6f} as it must be")


def with_model(cfg: AlignConfig) -> AlignConfig:
    """The model is that of --init, with this stage's length and head."""
    model = cfg.model
    if cfg.init:
        model = read_config(cfg.init.removeprefix("hf:"))
    heads = cfg.n_attributes if isinstance(cfg, RewardConfig) else 0
    if model.n_attributes and not heads:
        raise ValueError(f"init={cfg.init} is a reward model: this stage trains a language model")
    lora = dict(lora_rank=cfg.lora_rank, lora_alpha=cfg.lora_alpha, lora_targets=cfg.lora_targets)
    return replace(cfg, model=replace(model, seq_len=cfg.seq_len, n_attributes=heads, **lora))


def align(preset: str, cfg: AlignConfig) -> Path:
    """Run a stage; returns its folder."""
    cfg = with_model(cfg)
    tokenizer = load_tokenizer(cfg.tokenizer or cfg.init.removeprefix("hf:") or "no --tokenizer")
    rows = read_rows_of(cfg, cfg.data, tokenizer)
    steps = max(1, int(len(rows) * cfg.epochs / cfg.batch))
    cfg = replace(cfg, steps=min(cfg.steps, steps))
    share = unit(cfg, cfg.mesh.dp(world_size()))
    cfg.mesh.check(cfg.model, world_size(), share, cfg.micro_batch)
    mesh = init_mesh(cfg.mesh)
    cfg = replace(cfg, out=cfg.out or free_folder(preset))
    check_init(cfg)
    keys = hashlib.blake2b("".join(row.key for row in rows).encode(), digest_size=8).hexdigest()
    open_folder(cfg, keys, tokenizer)
    runner = Runner(cfg.model, cfg.mesh, mesh, cfg.micro_batch, cfg.seed)
    size = sum(count_params(cfg.model)) / 1e6
    what = f"{size:,.1f}M parameters, {world_size()} process(es), {cfg.steps:,} steps"
    log.info(f"{preset}: {what} of {cfg.batch} rows")
    log.info(f"folder: {cfg.out}; the first row:\n{show_row(rows[0], tokenizer)}")

    load_init(cfg, runner)
    objective, extra = objective_of(cfg, rows), {}
    if isinstance(cfg, PreferenceConfig):
        extra = {"reference": reference_log_probs(cfg, runner, rows, cfg.data)}
    tally = Tally(objective, runner)

    def batches(step: int) -> list[Batch]:
        order = row_order(len(rows), cfg.seed, step * cfg.batch, cfg.batch)
        own = {key: values[order] for key, values in extra.items()}
        return batches_of(cfg, runner, [rows[i] for i in order], objective.count, own)

    def describe(step: int) -> str:
        order = row_order(len(rows), cfg.seed, step * cfg.batch, cfg.batch)
        return ", ".join(rows[i].where for i in order)

    if isinstance(cfg, PreferenceConfig) and not step_folders(cfg.out / "checkpoints"):
        runner.eval(batches(0), tally.loss_fn)
        check_start(cfg, tally.take())
    evaluate = evaluator(cfg, runner, tokenizer, objective)
    fit(cfg, runner, batches, tally.loss_fn, evaluate, describe, tally.take)
    return cfg.out


def objective_of(cfg: AlignConfig, rows: list[Row]) -> Objective:
    if isinstance(cfg, PreferenceConfig):
        return preference_objective(cfg, rewards=rows[0].values is not None)
    return reward_objective(cfg) if isinstance(cfg, RewardConfig) else sft_objective(cfg)


def evaluator(
    cfg: AlignConfig, runner: Runner, tokenizer: Tokenizer, objective: Objective
) -> Callable[[int], dict[str, float | None]]:
    """evaluate(step) → the loss and the objective's values on the validation rows, and a reward
    model's accuracy on --pairs."""
    sets: dict[str, tuple[list[Row], Objective, dict[str, np.ndarray]]] = {}
    if cfg.val:
        rows, extra = read_rows_of(cfg, cfg.val, tokenizer), {}
        if isinstance(cfg, PreferenceConfig):
            extra = {"reference": reference_log_probs(cfg, runner, rows, cfg.val)}
            objective = preference_objective(cfg, rewards=rows[0].values is not None)
        sets["val"] = rows, objective, extra
    if isinstance(cfg, RewardConfig) and cfg.pairs:
        rows, _ = preference_rows(cfg.pairs, tokenizer, cfg.model.seq_len, judged=True)
        sets["pairs"] = [replace(row, values=None) for row in rows], pair_accuracy(cfg), {}

    def evaluate(step: int) -> dict[str, float | None]:
        out = {}
        for name, (rows, objective, extra) in sets.items():
            n = min(len(rows), cfg.eval_batches * cfg.batch)
            tally = Tally(objective, runner)
            own = {key: values[:n] for key, values in extra.items()}
            part = batches_of(cfg, runner, rows[:n], objective.count, own)
            loss = runner.eval(part, tally.loss_fn).item()
            out |= {f"{name}_loss": loss}
            out |= {f"{name}_{key}": value for key, value in tally.take().items()}
        return out

    return evaluate


def pair_accuracy(cfg: RewardConfig) -> Objective:
    """How often the chosen answer has the higher reward; the loss is the share where it has not."""

    def measure(scores: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Sums]:
        reward = aggregate(last_scores(scores, batch))  # (N, 2)
        won, pairs = pairwise_accuracy(reward[:, 0] - reward[:, 1])
        return pairs - won, {"won": won, "pairs": pairs}

    accuracy = lambda s: {"accuracy": s["won"].item() / max(1.0, s["pairs"].item())}  # noqa: E731
    return Objective(measure, n_rows, accuracy, dict.fromkeys(("won", "pairs"), torch.zeros(())))


# ---- the demo ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemoConfig:
    """A base model, two SFTs, a reward model, DPO and three RPOs, on small computations that a
    program can mark (data.py's tasks), on two cores; and a table of what each stage brought."""

    out: Path = Path("runs/demo")
    """Runs, rows and table.md; a demo that was stopped goes on where it was."""
    seed: int = 0
    scale: float = 1.0
    """Share of the tasks and of the pretraining steps: 0.01 is a test of the machinery."""

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise ValueError(f"scale={self.scale}: must be above 0 and at most 1")


# every detail of the 340B's architecture, at a size that learns the tasks in minutes
DEMO = ModelConfig(128, 4, 4, 2, 32, 512, vocab_size=480, seq_len=192, init_std=0.09)
FP32 = MeshConfig(dtype="fp32")


def write_rows(path: Path, make: Callable[[], Iterable[dict[str, Any]]]) -> Path:
    """A file of rows, whole or not there, once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text("".join(json.dumps(row) + "\n" for row in make()))
        path.with_suffix(".tmp").rename(path)
    return path


def demo_tasks(
    cfg: DemoConfig, name: str, n: int, calls: float, held_out: bool = False
) -> list[Task]:
    rng = random.Random(f"{cfg.seed}/{name}")
    return [
        draw_task(rng, rng.random() < calls, held_out) for _ in range(max(40, round(n * cfg.scale)))
    ]


def demo_base(cfg: DemoConfig) -> Path:
    """A tokenizer, and pretraining on calls and their results, which nobody asks for."""
    rng, tokens = random.Random(f"{cfg.seed}/base"), cfg.out / "tokens"
    if not tokens.exists():
        cfg.out.mkdir(parents=True, exist_ok=True)
        texts = [draw_text(rng) for _ in range(max(3000, round(70_000 * cfg.scale)))]
        tasks = [draw_task(rng, call=False) for _ in range(3000)]
        asked = [text for t in tasks for text in (t.prompt, t.answer, t.flawed(rng))]
        words = [*texts[:2000], *asked, REWARD_SYSTEM * 50]
        file = train_bpe(words, DEMO.vocab_size).save(cfg.out)
        rows = write_rows(cfg.out / "texts.jsonl", lambda: ({"text": text} for text in texts))
        how = dict(sources=(f"calls={rows}",), tokenizer=str(cfg.out / file), val_fraction=0.01)
        prepare(PrepareConfig(out=tokens, **how))
    pretrain("base", PretrainConfig(
        model=DEMO, mesh=FP32, data=tokens, out=cfg.out / "base", batch=16, micro_batch=16,
        steps=max(8, round(600 * cfg.scale)), lr=3e-3, min_lr=3e-4, warmup=16 * 60,
        eval_every=400, isolate=True,
    ))  # fmt: skip
    return cfg.out / "base"


def demo_sft(cfg: DemoConfig, name: str, init: Path, calls: float, n: int) -> Path:
    """SFT on answers of which a third have chatter before them, or miss their instruction: what
    preferences can mend."""

    def rows() -> Iterator[dict[str, Any]]:
        rng = random.Random(f"{cfg.seed}/{name}/flaws")
        for task in demo_tasks(cfg, name, n, calls):
            flawed = rng.random() < 0.35
            yield scored_row(task, task.flawed(rng, ("chatter", "form")) if flawed else task.answer)

    return align(name, SftConfig(
        data=write_rows(cfg.out / f"{name}.jsonl", rows), **demo_stage(cfg.out / name, init),
        lr=1e-3, min_lr=1e-4, warmup=16 * 10, batch=64, epochs=1,
    ))  # fmt: skip


def demo_stage(out: Path, init: Path) -> dict[str, Any]:
    """What all stages have in common."""
    return dict(
        init=str(init), out=out, seq_len=DEMO.seq_len, mesh=FP32, micro_batch=16,
        eval_every=1 << 30, save_every=1 << 30,
    )  # fmt: skip


def answers(engine: Engine, tasks: list[Task], n: int, seed: int) -> list[list[str]]:
    """n sampled answers of each task."""
    how = SamplingParams(max_tokens=40, n=n, seed=seed, stop_ids=chat_stops(engine.tokenizer))
    asked = [[{"role": "user", "content": task.prompt}] for task in tasks]
    done = engine.generate([render_chat(chat, engine.tokenizer)[0] for chat in asked], how)
    return [[one.text.strip() for one in done[i : i + n]] for i in range(0, len(done), n)]


def demo_reward(cfg: DemoConfig, init: Path) -> Path:
    """The reward model: sampled, right and flawed answers, marked by the program."""

    def texts_of(tasks: list[Task]) -> Iterator[tuple[Task, list[str]]]:
        rng, engine = random.Random(f"{cfg.seed}/reward/flaws"), demo_engine(init)
        for task, sampled in zip(tasks, answers(engine, tasks, 2, cfg.seed), strict=True):
            # two faults at a time: what misses its form must not be right more often
            flawed = (task.flawed(rng), task.flawed(rng, n=2))
            made = dict.fromkeys([*sampled, task.answer, *flawed])
            yield task, [text for text in made if text]

    def rows() -> Iterator[dict[str, Any]]:
        for task, texts in texts_of(demo_tasks(cfg, "reward", 5000, 0.25)):
            yield from (scored_row(task, text) for text in texts)

    def pairs() -> Iterator[dict[str, Any]]:
        for task, texts in texts_of(demo_tasks(cfg, "reward pairs", 400, 0.25, held_out=True)):
            true = [float(aggregate(task.labels(text))) for text in texts]
            if found := best_and_worst(texts, true, [True] * len(texts)):
                sides = dict(zip(("chosen", "rejected"), (texts[i] for i in found), strict=True))
                yield {"messages": [{"role": "user", "content": task.prompt}], **sides}

    return align("reward", RewardConfig(
        data=write_rows(cfg.out / "reward.jsonl", rows),
        pairs=write_rows(cfg.out / "reward_pairs.jsonl", pairs),
        **demo_stage(cfg.out / "reward", init), lr=1e-3, min_lr=1e-4, warmup=16 * 10, batch=64,
    ))  # fmt: skip


# a model's own answers to given prompts, which the reward model ranks
OWN_ANSWERS = SynthesizeConfig(
    recipe="prompts", counts=dict(samples=6, preference_share=1, turns=1), max_tokens=40, slots=64,
    min_gap=0.3,
)  # fmt: skip


def demo_prompts(cfg: DemoConfig, name: str, n: int) -> tuple[Path]:
    tasks = partial(demo_tasks, cfg, name, n, 0.25)
    rows = lambda: ({"prompt": task.prompt} for task in tasks())  # noqa: E731
    return (write_rows(cfg.out / f"{name}_prompts.jsonl", rows),)


def demo_preference(cfg: DemoConfig, name: str, init: Path, judge: Path) -> Path:
    """The policy's own answers, the best and the worst by the reward model, then DPO or RPO."""
    prompts = demo_prompts(cfg, name, 1000)
    how = dict(prompts=prompts, out=cfg.out / f"{name}_data", seed=cfg.seed)
    made = synthesize(replace(OWN_ANSWERS, model=init, reward=str(judge), **how))
    stage = demo_stage(cfg.out / name, init)
    return align(name, replace(demo_loss(name), data=made / "rpo.jsonl", **stage))


def demo_loss(name: str) -> PreferenceConfig:
    how = dict(loss="dpo", beta=0.1) if name == "dpo" else dict(loss="rpo_bwd", beta=0.1, eta=1.0)
    return PreferenceConfig(sft_weight=1e-3, lr=1e-4, warmup=16 * 4, batch=32, **how)


def demo_engine(run: Path) -> Engine:
    return load_engine(EngineConfig(run, slots=64))


def mark(cfg: DemoConfig, run: Path, judge: Path) -> dict[str, float]:
    """What a run's model does with the held-out tasks, sampled once each at temperature 1, by the
    program, which no training has seen, and by the reward model, which made the preferences."""
    tasks = demo_tasks(cfg, "marks", 1000, 0.5, held_out=True)
    engine, referee = demo_engine(run), demo_engine(judge)
    texts = [some[0] for some in answers(engine, tasks, 1, cfg.seed)]
    pairs = []
    for task in tasks:
        ids, trained = render_chat(scored_row(task, task.answer)["messages"], engine.tokenizer)
        n = int(trained.argmax())
        pairs.append((ids[:n].tolist(), ids[n:].tolist()))
    said = [*zip(tasks, texts, strict=True)]
    chats = [render_reward(scored_row(t, x or "-")["messages"], engine.tokenizer) for t, x in said]
    judged = [
        aggregate(one.scores) for one in referee.generate(chats, SamplingParams(max_tokens=0))
    ]
    met = [ok for task, text in said for ok in task.met(text)]
    calls = [task.right(text) for task, text in said if task.call]
    words = [task.right(text) for task, text in said if not task.call]
    true = [float(aggregate(task.labels(text))) for task, text in said]
    return {
        "calls right": mean(calls), "words right": mean(words), "instructions met": mean(met),
        "true reward": mean(true), "model's reward": mean(map(float, judged)),
        "log p(ideal)": mean(sum(done.logprobs) for done in engine.score(pairs)),
    }  # fmt: skip


def last_metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def whole(run: Path) -> Path:
    """A run that has come to its end: SIGTERM ends a stage, and what would follow with it."""
    last = last_metrics(run)["step"]
    if last < (steps := json.loads((run / "config.json").read_text())["steps"]):
        raise ValueError(f"{run} was stopped at step {last} of {steps}: start the same again")
    return run


def markdown(rows: dict[str, dict[str, float]], first: str) -> str:
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = ([f"{row[name]:.3g}" if name in row else "" for name in names] for row in rows.values())
    body = ([key, *some] for key, some in zip(rows, cells, strict=True))
    return "\n".join(table((first, *names), body)).strip()


def demo_start(cfg: DemoConfig) -> dict[str, Callable[[], Path]]:
    """The stages before preferences, each of which makes what it needs."""
    at = {name: cfg.out / name for name in ("base", "code_sft", "general_sft", "reward")}
    return {
        "base": lambda: demo_base(cfg),
        "code_sft": lambda: demo_sft(cfg, "code_sft", at["base"], 1.0, 6_000),
        "general_sft": lambda: demo_sft(cfg, "general_sft", at["code_sft"], 0.15, 16_000),
        "reward": lambda: demo_reward(cfg, at["general_sft"]),
    }


def demo(cfg: DemoConfig) -> None:
    """All stages, and the table."""
    begun, stages = time.monotonic(), demo_start(cfg)
    policy, judge = "general_sft", cfg.out / "reward"
    for name in ("dpo", "rpo_1", "rpo_2", "rpo_3"):
        stages[name] = partial(demo_preference, cfg, name, cfg.out / policy, judge)
        policy = name
    seconds = {}
    for name, make in stages.items():
        start = time.monotonic()
        whole(make())
        seconds[name] = time.monotonic() - start
    rows = {name: mark(cfg, cfg.out / name, judge) for name in stages if name != "reward"}
    for name, row in rows.items():
        if (drift := last_metrics(cfg.out / name).get("drift_chosen")) is not None:
            row["chosen drift"] = drift
        row["seconds"] = seconds[name]
    accuracy = last_metrics(judge)["pairs_accuracy"]
    about = (
        f"Reward model: {accuracy:.3f} of held-out pairs, {seconds['reward']:.0f} s; "
        f"{(time.monotonic() - begun) / 60:.1f} minutes in all; seed {cfg.seed}."
    )
    text = f"{markdown(rows, 'stage')}\n\n{about}\n"
    (cfg.out / "table.md").write_text(text)
    log.info(text)


# ---- from weak to strong -------------------------------------------------------------------------


@dataclass(frozen=True)
class IterateConfig:
    """The generator of round k makes data, with which SFT, DPO and RPO align the base; the better
    model generates round k + 1 (SPEC 5.5)."""

    rounds: int = 2
    out: Path = Path("runs/iterate")
    """Each round's data and runs, lineage.json, table.md; it goes on where it was stopped."""
    bases: tuple[str, ...] = ()
    """What is aligned in each round; the last one in those that follow as well."""
    data: SynthesizeConfig = field(default_factory=SynthesizeConfig)
    """How each round makes its data; its model is the first generator."""
    sft: SftConfig = field(default_factory=SftConfig)
    dpo: PreferenceConfig = field(default_factory=PreferenceConfig)
    rpo: PreferenceConfig = field(default_factory=PreferenceConfig)
    held_out: Path | None = None
    """Prompts (JSON lines) that no round sees, on which the referee marks every model."""
    referee: str = ""
    """A reward model's folder; default: data.reward, which has chosen the data as well."""
    demo: DemoConfig | None = None
    """The demo's tasks instead of data's prompts, its base and reward model, and as first generator
    a fifth of its SFT; what is not there is made first. The program marks each round."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}: at least 1")
        if not self.demo and not self.bases:
            raise ValueError("bases: name the model that is aligned in each round")
        if self.held_out and not (self.referee or self.data.reward or self.demo):
            raise ValueError("held_out: name the referee, or data.reward, that marks the answers")


def weak_to_strong() -> IterateConfig:
    """the demo's tasks and models, on a laptop"""
    stage = demo_stage(Path(), Path())
    sft = SftConfig(**stage, lr=1e-3, min_lr=1e-4, warmup=16 * 10, batch=64, epochs=4)
    # milder than the demo: what SFT on filtered answers leaves is harder to tell apart
    how = dict(beta=0.3, lr=5e-5, min_lr=5e-6, **stage)
    dpo, rpo = (replace(demo_loss(name), **how) for name in ("dpo", "rpo"))
    return IterateConfig(data=OWN_ANSWERS, sft=sft, dpo=dpo, rpo=rpo, demo=DemoConfig())


def report_loop() -> IterateConfig:
    """the report's stages with models of yours: set --bases, --data.model and --data.reward"""
    data = SynthesizeConfig(recipe="report")
    return IterateConfig(bases=("base",), data=data, sft=general_sft(), dpo=dpo(), rpo=rpo_1())


LOOPS = {"demo": weak_to_strong, "report": report_loop}


# a round's stages, the file that each reads, the share of its prompts that are for preferences, and
# how many of the demo's tasks
ROUND = (("sft", "sft", 0, 5000), ("dpo", "preference", 1, 1000), ("rpo", "rpo", 1, 1000))


def round_data(cfg: IterateConfig, k: int, i: int, generator: Path, policy: Path) -> Path:
    """The rows of a round's i-th stage: the generator writes prompts and dialogues; to preference
    prompts the policy itself answers, for of others' answers it learns less."""
    name, file, share, n = ROUND[i]
    data = replace(
        cfg.data, model=generator, answerers=(str(policy),) if share else (),
        counts=cfg.data.counts | {"preference_share": share}, seed=cfg.data.seed + 3 * k + i,
        out=cfg.out / f"round_{k}" / f"{name}_data",
    )  # fmt: skip
    if cfg.demo:
        tasks = replace(cfg.demo, out=cfg.out / f"round_{k}", seed=cfg.demo.seed + k)
        data = replace(data, prompts=demo_prompts(tasks, name, n))
    return synthesize(data) / f"{file}.jsonl"


def iterate(cfg: IterateConfig) -> None:
    """Every step is skipped that is done; lineage.json says what came from what."""
    if world_size() > 1:
        raise ValueError("iterate runs in one process: on many, run each round's commands by hand")
    if cfg.demo:
        at, stages = cfg.demo.out, demo_start(cfg.demo)
        stages["weak"] = partial(demo_sft, cfg.demo, "weak", at / "code_sft", 0.15, 3_500)
        for make in stages.values():
            whole(make())
        data = replace(cfg.data, model=at / "weak", reward=str(at / "reward"))
        cfg = replace(cfg, bases=cfg.bases or (str(at / "base"),), data=data)
    generator, lineage = cfg.data.model, []
    rows = {"the first generator": score_of(cfg, generator)}
    for k in range(1, cfg.rounds + 1):
        run = Path(cfg.bases[min(k, len(cfg.bases)) - 1])
        for i, stage in enumerate((cfg.sft, cfg.dpo, cfg.rpo)):
            name, data = ROUND[i][0], round_data(cfg, k, i, generator, run)
            out = cfg.out / f"round_{k}" / name
            came = dict(init=str(run), data=str(data), generator=str(generator))
            run = whole(align(name, replace(stage, init=str(run), data=data, out=out)))
            lineage.append(dict(round=k, stage=name, **came, run=str(run), model=identity(run)))
            rows[f"round {k}, {name}"] = score_of(cfg, run)
        generator = run
        (cfg.out / "lineage.json").write_text(json.dumps(lineage, indent=2) + "\n")
    text = markdown(rows, "model") + "\n"
    (cfg.out / "table.md").write_text(text)
    log.info(text)


def score_of(cfg: IterateConfig, run: Path) -> dict[str, float]:
    """The program's marks, or the referee's mean reward of answers to the held-out prompts."""
    if cfg.demo:
        return mark(cfg.demo, run, Path(cfg.data.reward))
    if not cfg.held_out:
        return {}
    how = dict(
        model=run, reward=cfg.referee or cfg.data.reward, out=cfg.out / "marks", answerers=()
    )
    p = Pipeline(replace(cfg.data, recipe="prompts", prompts=(cfg.held_out,), **how))
    asked = own_prompts(p.cfg)
    said = p.ask("held_out", [q.request() for q in asked], temperature=0.0)
    both = zip(asked, said, strict=True)
    chats = [q.grown("assistant", a["text"], a["id"]) for q, a in both]
    rewards = [float(aggregate(x)) for x in rate(p, "held_out_ratings", chats) if x]
    return {"reward": mean(rewards)} if rewards else {}


def main() -> None:
    set_up_logging()
    command, args = sys.argv[1:2], sys.argv[2:]
    if command == ["demo"]:
        return run(lambda: demo(tyro.cli(DemoConfig, args=args, prog="align.py demo")))
    if command == ["iterate"]:
        args = args if args[:1] and args[0] in LOOPS else ["demo", *args]
        return run(lambda: iterate(choose_config(args, LOOPS, IterateConfig.__doc__)[1]))
    about = "Align a model: a preset, changed by options. Also `demo` (all stages in small) and "
    about += "`iterate` (rounds of data and alignment)."
    run(lambda: align(*choose_config(sys.argv[1:], PRESETS, about)))


if __name__ == "__main__":
    main()
