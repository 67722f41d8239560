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
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data import (
    NINE_ATTRIBUTES,
    Example,
    Tokenizer,
    aggregate,
    load_tokenizer,
    pack,
    permute,
    preference_rows,
    reward_rows,
    sft_rows,
    show_row,
)
from model import IGNORE, SHAPES, ModelConfig, count_params
from parallel import Batch, Runner, init_mesh, read_config, world_size
from train import (
    RunConfig,
    check_init,
    choose_config,
    fit,
    free_folder,
    load_init,
    open_folder,
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


class MetricSums:
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
    rows: Sequence[Example],
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


def read_rows_of(cfg: AlignConfig, path: Path, tokenizer: Tokenizer) -> list[Example]:
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


def check_rows(rows: list[Example], path: Path, scored: bool) -> None:
    """The template's self-check on the real data: a trained share of none or all of the tokens is a
    wrong mask. Only a reward model trains none."""
    share = sum(t.sum() for row in rows for t in row.trained) / sum(row.length for row in rows)
    if not scored and not 0 < share < 1:
        raise ValueError(f"{path}: {share:.0%} of the tokens would be trained: look at its roles")
    longest = max(row.length for row in rows)
    log.info(f"{path}: longest row {longest:,} tokens, {share:.1%} of all are trained")


def reference_log_probs(
    cfg: PreferenceConfig, runner: Runner, rows: list[Example], path: Path
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
    tally = MetricSums(objective, runner)

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


def objective_of(cfg: AlignConfig, rows: list[Example]) -> Objective:
    if isinstance(cfg, PreferenceConfig):
        return preference_objective(cfg, rewards=rows[0].values is not None)
    return reward_objective(cfg) if isinstance(cfg, RewardConfig) else sft_objective(cfg)


def evaluator(
    cfg: AlignConfig, runner: Runner, tokenizer: Tokenizer, objective: Objective
) -> Callable[[int], dict[str, float | None]]:
    """evaluate(step) → the loss and the objective's values on the validation rows, and a reward
    model's accuracy on --pairs."""
    sets: dict[str, tuple[list[Example], Objective, dict[str, np.ndarray]]] = {}
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
            tally = MetricSums(objective, runner)
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


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in ("demo", "iterate"):
        sys.exit(f"align.py {sys.argv[1]} is now `python -m recipes.{sys.argv[1]}`")
    set_up_logging()
    about = "Align a model: a preset, changed by options."
    run(lambda: align(*choose_config(sys.argv[1:], PRESETS, about)))


if __name__ == "__main__":
    main()
