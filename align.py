"""Alignment (report section 3): staged supervised fine-tuning, reward model, DPO and RPO.

Losses are pure functions of log-probabilities summed over a response's tokens. They return values
per pair, or a sum and a count, never a mean: what a step divides by is counted over all processes.
A stage is rows, an objective and train.py's `fit`.

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
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that spin longer starve a busy machine

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data import (
    NINE_ATTRIBUTES,
    Example,
    Messages,
    Tokenizer,
    aggregate,
    load_tokenizer,
    messages_of,
    numbers,
    pack,
    permute,
    preference_rows,
    read_preference,
    read_rows,
    render_answer,
    required,
    reward_rows,
    sft_rows,
    write_whole,
)
from model import IGNORE, SHAPES, ModelConfig, check_ranges
from parallel import (
    Batch,
    Runner,
    copied_by_tp,
    from_rank_0,
    init_mesh,
    local_part,
    naming,
    read_config,
    step_folders,
    world_size,
)
from train import EvalSet, RunConfig, choose_config, evaluator, fit, run, set_up_logging, start

log = logging.getLogger("nemotron4")
Sums = dict[str, Tensor]  # scalars by name, to be added up over micro-batches and processes

# ---- losses --------------------------------------------------------------------------------------

# Symbols of report section 3.3.2, for a pair of a chosen answer y_c and a rejected one y_l:
#   a = β [log π/π_ref (y_c) − log π/π_ref (y_l)], the margin of policy π over its reference π_ref
#   b = η [r*(y_c) − r*(y_l)], the reward gap


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + eˣ). torch's own is off by up to 2e-9, as it returns x above 20."""
    return -F.logsigmoid(-x)


def sft_loss(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return −Σ log π(y_t | x, y_<t) over the trained tokens, and their number."""
    trained = targets != IGNORE
    return -torch.where(trained, log_probs, 0).sum(), trained.sum()


def dpo_loss(a: Tensor, label_smoothing: Tensor | float = 0.0) -> Tensor:
    """Return −log σ(a) per pair: DPO (report section 3.3.2). With label smoothing ε it is
    −(1 − ε) log σ(a) − ε log σ(−a)."""
    return (1 - label_smoothing) * softplus(-a) + label_smoothing * softplus(a)


def rpo_loss(a: Tensor, b: Tensor, form: str = "bwd") -> Tensor:
    """Return D[a ‖ b] per pair: reward-aware preference optimization (report section 3.3.2).

    bwd, the report's: σ(b) log σ(b)/σ(a) + σ(−b) log σ(−b)/σ(−a), a KL divergence between coins,
    with d/da = σ(a) − σ(b). fwd: a and b exchanged. sq: (a − b)².
    """
    if form not in ("bwd", "fwd", "sq"):
        raise ValueError(f"form={form!r}: bwd (the report's), fwd or sq")
    if form == "sq":
        return (a - b).square()
    if form == "fwd":
        a, b = b, a
    heads = softplus(-a) - softplus(-b)  # log σ(b)/σ(a)
    tails = softplus(a) - softplus(b)  # log σ(−b)/σ(−a)
    return torch.sigmoid(b) * heads + torch.sigmoid(-b) * tails


def rpo_k_loss(a: Tensor, b: Tensor) -> Tensor:
    """Return KL(softmax(b) ‖ softmax(a)) of K responses, (..., K) → (...): D[a ‖ b] beyond pairs
    (arXiv 2502.00203). Here a = β log π/π_ref and b = η r* of each, −∞ for one that is absent."""
    there = b > -torch.inf
    per_response = (b.log_softmax(-1) - a.where(there, b).log_softmax(-1)).where(there, 0)
    return (b.softmax(-1) * per_response).sum(-1)


def ipo_loss(delta: Tensor, beta: float) -> Tensor:
    """Return (Δ − 1 / 2β)² per pair, Δ = a / β: IPO (arXiv 2310.12036, equation 17)."""
    return (delta - 1 / (2 * beta)).square()


def reward_loss(pred: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ (pred − label)² over the labelled attributes, and their number (report section 3.1).
    Both are (..., 5 or 9); where one has five, the last five of nine count."""
    n = min(pred.shape[-1], label.shape[-1])
    if {pred.shape[-1], label.shape[-1]} - {5, 9} or pred.shape[:-1] != label.shape[:-1]:
        shapes = f"pred {tuple(pred.shape)}, label {tuple(label.shape)}"
        raise ValueError(f"{shapes}: the same but for the last, which is 5 or 9")
    labelled = label[..., -n:] != IGNORE
    error = torch.where(labelled, pred[..., -n:] - label[..., -n:], 0)
    return error.square().sum(), labelled.sum()


def bradley_terry_loss(
    margin: Tensor, shift: Tensor | float = 0.0, factor: Tensor | float = 1.0
) -> Tensor:
    """Return −f log σ(m − s) per pair, m = r(chosen) − r(rejected). The strength of the preference
    may be its shift s or its factor f (arXiv 2410.01257)."""
    return softplus(shift - margin) * factor


# ---- from tokens to responses --------------------------------------------------------------------


def response_sums(values: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Sum values (B, T) over each segment of each row, (N, n) in fp64: only differences of these
    sums count. A value is a log-probability, zero where nothing is trained, or 1 to count."""
    slots = batch["rows"].shape[1]
    n = batch["ends"].shape[-1]
    sums = values.new_zeros((len(values), slots * n + 1), dtype=torch.float64)
    # padding, whose document is -1, goes to the first
    sums = sums.scatter_add(1, batch["documents"] + 1, values.double())
    return sums[:, 1:].unflatten(1, (slots, n))[batch["rows"] >= 0]


def last_scores(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Pick a reward head's scores (B, T, A) at the end of each segment: (N, n, A)."""
    there = batch["rows"] >= 0
    window = torch.arange(len(scores), device=scores.device)[:, None].expand_as(there)[there]
    return scores[window[:, None], batch["ends"][there]]


def values_of(batch: dict[str, Tensor]) -> Tensor:
    """Return each row's values, (N, ...): the rewards of its answers, or its label."""
    return batch.get("rewards", batch.get("labels"))[batch["rows"] >= 0]


# ---- metrics -------------------------------------------------------------------------------------


def pair_sums(
    log_probs: Tensor, reference: Tensor, tokens: Tensor, beta: float, b: Tensor | None = None
) -> Sums:
    """Sum, in fp64, what is logged of N pairs: (N, 2) of each answer's log-probability, that of the
    reference and the trained tokens; b (N). beta_...: times β. drift_...: log π/π_ref, in nats."""
    log_ratio = (log_probs - reference).detach().double()
    a = beta * (log_ratio[:, 0] - log_ratio[:, 1])
    # a margin of less is rounding, of a policy that still is the reference
    per_pair = {"pairs": torch.ones_like(a), "accuracy": a > 1e-6, "beta_margin": a}
    for i, side in enumerate(("chosen", "rejected")):
        per_pair[f"beta_reward_{side}"] = beta * log_ratio[:, i]
        per_pair[f"drift_{side}"] = log_ratio[:, i]
        per_pair[f"tokens_{side}"] = tokens[:, i]
    if b is not None:
        per_pair["overshoot"] = a > b
        per_pair["gap_error"] = (a - b).abs()
        per_pair["reward_gap"] = b
    return {name: values.double().sum() for name, values in per_pair.items()}


def attribute_sums(pred: Tensor, label: Tensor) -> Sums:
    """Sum, in fp64, squared and absolute errors of each attribute where it is labelled; (N, A)."""
    labelled = label != IGNORE
    error = torch.where(labelled, pred.detach().double() - label.double(), 0)
    sums = {}
    for kind, values in {"labels": labelled, "mse": error.square(), "mae": error.abs()}.items():
        for i, name in enumerate(NINE_ATTRIBUTES[-pred.shape[-1] :]):
            sums[f"{kind}/{name}"] = values[:, i].double().sum()
    return sums


def means(sums: Sums, count: str) -> dict[str, float]:
    """Divide the sums by the one that is named `count`, which stays, and those of an attribute, as
    mse/verbosity, by count/ATTRIBUTE; nothing is said of what was counted nowhere."""
    values = {}
    for name, total in sums.items():
        kind, slash, attribute = name.partition("/")
        n = float(sums.get(count + slash + attribute, 0))
        if n:
            values[name] = n if kind == count else float(total) / n
    return values


# ---- configs -------------------------------------------------------------------------------------

# losses for which each answer must have its reward
NEED_REWARDS = {"margin", "scaled", "rpo_bwd", "rpo_fwd", "rpo_sq"}


@dataclass(frozen=True)
class AlignConfig(RunConfig):
    """Settings that all stages share. The learning rate is constant unless min_lr is set."""

    model: ModelConfig = SHAPES["nemotron4-340b"]
    """Shape of a model with random weights; --init brings its own."""
    data: Path = Path("data/align.jsonl")  # Rows, as JSON lines.
    val: Path | None = None  # Rows to validate on.
    tokenizer: str = ""  # File or folder of a tokenizer; default: the one in the folder of --init.
    seq_len: int = 4096  # Tokens of a window; longer rows are left out and counted.
    steps: int = 0
    """Limit of optimizer steps, beside that of the epochs; 0: no limit but the epochs."""
    epochs: float = 1.0  # Passes over the rows.
    packed: bool = True
    """Several rows in a window; they do not see each other, and the result is the same."""
    shorten: bool = False
    """Rows that are too long lose their earliest exchanges instead of being left out."""
    lora_rank: int = 0
    """Rank of adapters, trained in place of the weights and merged by export; 0: no adapters."""
    lora_alpha: float = 32.0  # Scale of the adapters, times 1 / rank.
    lora_targets: str = "wq wk wv wo up down"  # Matrices that have adapters.
    skip_bad: bool = False
    """Rows that cannot be read are left out and counted, instead of ending the run."""
    batch: int = 128  # Rows (conversations, scored responses, pairs) per optimizer step.
    micro_batch: int = 1  # Windows per forward pass of one process; affects memory and speed only.
    min_lr: float | None = None  # Learning rate at the end of a cosine; None: the rate is constant.

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("lora_rank", "lora_alpha"), (0, 1e8))
        check_ranges(self, ranges | {"epochs": (1e-6, 1e6), "seq_len": (1, 1e8)})
        super().__post_init__()


@dataclass(frozen=True)
class SftConfig(AlignConfig):
    """Supervised fine-tuning on the assistant's turns (report section 3.3.1)."""


@dataclass(frozen=True)
class RewardConfig(AlignConfig):
    """Language model with a linear head on the last token's state (report section 3.1)."""

    n_attributes: Literal[5, 9] = 5
    """Outputs: HelpSteer2's five, or as NVIDIA's checkpoint four more before them."""
    loss: Literal["regression", "regular", "margin", "scaled"] = "regression"
    # the reward gap of a preference row is the strength of the preference (margin, scaled)
    """Squared error of the attributes, or Bradley-Terry's on the helpfulness of pairs."""
    pairs: Path | None = None
    """Preference rows, on which to measure how often the chosen one has the higher reward."""


@dataclass(frozen=True)
class PreferenceConfig(AlignConfig):
    """DPO and RPO (report section 3.3.2), from two answers to one prompt, or more (RPO)."""

    loss: Literal["dpo", "ipo", "rpo_bwd", "rpo_fwd", "rpo_sq"] = "dpo"
    """Loss per row; the RPO losses need rewards; rpo_bwd, the report's, takes more than pairs."""
    beta: float = 1e-3  # KL coefficient: factor of the log-ratio between policy and reference.
    eta: float = 1.0  # Factor of the gap between the two rewards (RPO).
    sft_weight: float = 0.0
    """Weight of the chosen answer's negative log-likelihood, summed over its tokens."""
    label_smoothing: float = 0.0  # Share of pairs that are taken to be the wrong way round (DPO).
    reference: Path | None = None
    """File of reference log-probabilities; default: beside the rows, by the weights' hash."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.loss != "dpo":
            raise ValueError(f"label_smoothing={self.label_smoothing} belongs to dpo: {self.loss}")
        if self.eta != 1.0 and self.loss not in NEED_REWARDS:
            raise ValueError(f"eta={self.eta} belongs to the RPO losses: {self.loss}")
        ranges = {"beta": (1e-12, 1e12), "eta": (0, 1e12), "sft_weight": (0, 1e12)}
        check_ranges(self, ranges | {"label_smoothing": (0, 0.499)})


# ---- presets -------------------------------------------------------------------------------------

# Numbers are those of report sections 3.1 and 3.3; of a range that was searched, the middle (on a
# log scale) stands here. The report states neither sequence length, nor packing, nor warm-up.


def code_sft() -> SftConfig:
    """Fine-tune on code, stage 1: 800K samples, one epoch (6250 steps)."""
    return SftConfig(lr=3e-7)


def general_sft() -> SftConfig:
    """Fine-tune on all tasks, stage 2: 200K samples, 2 % code, three epochs (4688 steps)."""
    return SftConfig(lr=2.2e-7, epochs=3)  # searched in [1e-7, 5e-7]


def reward() -> RewardConfig:
    """Train the reward model from the base model: 20K responses, two epochs (318 steps)."""
    return RewardConfig(lr=7e-7, epochs=2, warmup=10 * 128)  # arXiv 2406.08673, HelpSteer2


def dpo() -> PreferenceConfig:
    """Train on preferences, stage 3: 160K pairs, one epoch (625 steps)."""
    # rate searched in [3e-8, 3e-7], beta in [3e-4, 3e-3], weight of the SFT loss in [1e-5, 1e-3]
    return PreferenceConfig(lr=1e-7, beta=1e-3, sft_weight=1e-4, batch=256)


def rpo(init: str = "") -> PreferenceConfig:
    """Train on preferences with rewards, stage 4, three times: 300K pairs each. Policy and
    reference begin as --init."""
    # beta searched in [1e-3, 1], eta 1; batch and epochs are not stated
    how = dict(loss="rpo_bwd", sft_weight=1e-5)
    return PreferenceConfig(init=init, lr=3e-7, beta=3e-2, batch=256, **how)


def rpo_1() -> PreferenceConfig:
    """Run RPO for the first time, from runs/dpo."""
    return rpo("runs/dpo")


def rpo_2() -> PreferenceConfig:
    """Run RPO for the second time, from runs/rpo_1."""
    return rpo("runs/rpo_1")


def rpo_3() -> PreferenceConfig:
    """Run RPO for the third time, from runs/rpo_2: the released model."""
    return rpo("runs/rpo_2")


def sft() -> SftConfig:
    """Fine-tune on conversations of your own."""
    return SftConfig(lr=5e-6)


PRESETS = {
    f.__name__: f for f in (sft, code_sft, general_sft, reward, dpo, rpo, rpo_1, rpo_2, rpo_3)
}


# ---- objectives ----------------------------------------------------------------------------------


class Objective(NamedTuple):
    """Loss of a stage, and what is logged beside it."""

    measure: Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, Sums]]
    """(the model's output, batch) → the summed loss, and the sums of what is logged."""
    count: Callable[[Batch], int]
    """A batch → the number that its loss is divided by: tokens, labels or pairs."""
    names: Sequence[str]
    """Names of the sums, as a process that lacks the model's last stage measures none."""
    counted: str
    """Name of the sum that the others are divided by, to be logged."""


def n_rows(batch: Batch) -> int:
    return int((batch["rows"] >= 0).sum())


def n_known(batch: Batch, name: str) -> int:
    return int((batch[name] != IGNORE).sum())


def sft_objective() -> Objective:
    """Return SFT's objective, a mean over trained tokens."""

    def measure(log_probs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Sums]:
        return sft_loss(log_probs, batch["targets"])[0], {}

    return Objective(measure, partial(n_known, name="targets"), (), "trained_tokens")


def regression_objective(n_attributes: int) -> Objective:
    """Return the report's objective of a reward model: squared errors of attributes."""

    def measure(scores: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Sums]:
        pred = last_scores(scores, batch)[:, 0]
        label = values_of(batch)
        return reward_loss(pred, label)[0], attribute_sums(pred, label)

    none = torch.zeros(0, n_attributes)
    known = partial(n_known, name="labels")
    return Objective(measure, known, [*attribute_sums(none, none)], "labels")


def ranking_objective(reward_of: Callable[[Tensor], Tensor], kind: str = "regular") -> Objective:
    """Return Bradley-Terry's objective of pairs. reward_of: attributes (..., A) → reward (...)."""

    def measure(scores: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Sums]:
        rewards = reward_of(last_scores(scores, batch))  # (N, 2)
        margin = rewards[:, 0] - rewards[:, 1]
        how = {}
        if kind != "regular":
            how["shift" if kind == "margin" else "factor"] = -values_of(batch).diff(dim=1)[:, 0]
        loss = bradley_terry_loss(margin, **how).sum()
        return loss, {"accuracy": (margin > 0).sum(), "ranked": torch.ones_like(margin).sum()}

    return Objective(measure, n_rows, ("accuracy", "ranked"), "ranked")


def preference_objective(cfg: PreferenceConfig, rewards: bool) -> Objective:
    """Return the objective of DPO, IPO or RPO; of each row's answers the first is chosen and the
    second rejected. rewards: rows have them, so that b is known."""

    def row_loss(policy: Tensor, reference: Tensor, b: Tensor | None) -> Tensor:
        a = cfg.beta * (policy - reference)
        if cfg.loss == "rpo_bwd":
            return rpo_k_loss(a, b)
        margin = a[:, 0] - a[:, 1]
        if cfg.loss == "dpo":
            return dpo_loss(margin, cfg.label_smoothing)
        if cfg.loss == "ipo":
            return ipo_loss(margin / cfg.beta, cfg.beta)
        return rpo_loss(margin, b[:, 0] - b[:, 1], cfg.loss.removeprefix("rpo_"))

    def measure(log_probs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Sums]:
        policy = response_sums(log_probs, batch)  # (N, K)
        reference = batch["reference"][batch["rows"] >= 0]
        tokens = response_sums((batch["targets"] != IGNORE).to(log_probs.dtype), batch)
        b = gap = None
        if rewards:
            b = (cfg.eta * values_of(batch).double()).masked_fill(tokens == 0, -torch.inf)
            gap = b[:, 0] - b[:, 1]
        sums = pair_sums(policy[:, :2], reference[:, :2], tokens[:, :2], cfg.beta, gap)
        sums["preference_loss"] = row_loss(policy, reference, b).sum()
        sums["sft_loss"] = -policy[:, 0].sum()
        sums["at_reference"] = row_loss(reference, reference, b).sum()  # for `check_start`
        sums["abs_drift"] = (policy - reference).abs().amax(1).sum()
        return sums["preference_loss"] + cfg.sft_weight * sums["sft_loss"], sums

    none = torch.zeros(0, 2)
    names = [*pair_sums(none, none, none, cfg.beta, none[:, 0] if rewards else None)]
    names += ["preference_loss", "sft_loss", "at_reference", "abs_drift"]
    return Objective(measure, n_rows, names, "pairs")


def objective_of(cfg: AlignConfig, rows: list[Example], name: str) -> Objective:
    """Return the objective of a stage over the rows of a set. A reward model ranks its held-out
    pairs by the aggregate of its attributes."""
    if isinstance(cfg, PreferenceConfig):
        return preference_objective(cfg, rewards=rows[0].values is not None)
    if not isinstance(cfg, RewardConfig):
        return sft_objective()
    if name == "pairs":
        return ranking_objective(aggregate)
    if cfg.loss == "regression":
        return regression_objective(cfg.n_attributes)
    return ranking_objective(lambda attributes: attributes[..., -5], cfg.loss)  # helpfulness


SEEN = ("entropy", "top1", "trained_tokens", "tokens")  # the last: all but padding


class MetricSums:
    """Loss function of an objective that also adds up what is to be logged."""

    def __init__(self, objective: Objective, runner: Runner) -> None:
        self.objective = objective
        self.runner = runner
        self.sums: Sums = {}

    def loss_fn(self, out: Tensor, batch: dict[str, Tensor]) -> Tensor:
        loss, sums = self.objective.measure(out, batch)
        sums["tokens"] = (batch["documents"] >= 0).sum()
        trained = (batch["targets"] != IGNORE).flatten()
        seen = getattr(out, "seen", {}) | {"trained_tokens": trained}
        sums |= {name: values[trained].sum() for name, values in seen.items()}
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()
        return loss

    def take(self) -> dict[str, float]:
        """Return what is logged of all processes' micro-batches since the last call."""
        names = [*self.objective.names, *SEEN]
        zero = self.runner.count * 0  # in fp64, on the device
        totals = torch.stack([self.sums.get(name, zero) for name in names])
        totals = self.runner.reduce(totals, "dp_replicate", "dp_shard", "pp").cpu()
        self.sums = {}
        found = dict(zip(names, totals, strict=True))
        # whatever the others are divided by, these are means over the trained tokens
        seen = means({name: found[name] for name in SEEN}, "trained_tokens")
        return means(found, self.objective.counted) | seen | {"tokens": int(found["tokens"])}


# ---- rows ----------------------------------------------------------------------------------------


def show_row(row: Example, tokenizer: Tokenizer) -> str:
    """Return a row as text for a terminal, with what is trained in green."""
    shown = ""
    for ids, trained in zip(row.ids, row.trained, strict=True):
        cuts = np.flatnonzero(np.diff(trained)) + 1
        for part, green in zip(np.split(ids, cuts), np.split(trained, cuts), strict=True):
            text = tokenizer.decode(part).replace("\x1b", "␛")  # a text must not steer the terminal
            shown += f"\x1b[32m{text}\x1b[0m" if green.all() else text
        shown += "\n"
    return shown


def read_answers(row: dict[str, Any], loss: str) -> tuple[list[Messages], np.ndarray | None]:
    """Parse a pair, or {"prompt" or "messages", "responses", "rewards"}: answers to one prompt, the
    best one first and then the worst, which for all losses but rpo_bwd are the pair."""
    if "responses" not in row:
        return read_preference(row, loss in NEED_REWARDS)
    prompt = messages_of(row.get("prompt", row.get("messages")), "user")
    answers = required(row, "responses", list)
    found = required(row, "rewards", list)
    if not 2 <= len(answers) == len(found):
        raise ValueError(
            f"{len(answers)} responses, {len(found)} rewards: two or more, and as many"
        )
    rewards = numbers(found, [f"rewards[{i}]" for i in range(len(found))])
    order = np.roll(np.argsort(rewards, kind="stable"), 1)[: None if loss == "rpo_bwd" else 2]
    chats = [[*prompt, *messages_of(answers[i], "assistant")] for i in order]
    return chats, rewards[order]


def with_absent_answers(rows: list[Example]) -> list[Example]:
    """Give each row as many segments as the longest has: answers of no token, without a reward."""
    most = max(len(row.ids) for row in rows)
    none = np.zeros(0, np.int32)
    out = []
    for row in rows:
        n = most - len(row.ids)
        values = None if row.values is None else np.pad(row.values, (0, n))
        out.append(Example(row.ids + (none,) * n, row.trained + (none > 0,) * n, values, row.where))
    return out


def read_rows_of(cfg: AlignConfig, path: Path, tokenizer: Tokenizer) -> list[Example]:
    """Read a file of the rows that the stage needs."""
    how = dict(seq_len=cfg.model.seq_len, skip_bad=cfg.skip_bad, shorten=cfg.shorten)
    if isinstance(cfg, SftConfig):
        rows, _ = sft_rows(path, tokenizer, **how)
    elif isinstance(cfg, PreferenceConfig):
        parse = partial(read_answers, loss=cfg.loss)
        render = partial(render_answer, tokenizer=tokenizer)
        rows = with_absent_answers(read_rows(path, parse, render, **how)[0])
    elif cfg.loss == "regression":
        rows, _ = reward_rows(path, tokenizer, n_attributes=cfg.n_attributes, **how)
    else:
        how["rewards"] = cfg.loss in NEED_REWARDS
        rows, _ = preference_rows(path, tokenizer, judged=True, **how)
    if any(row.values is None for row in rows):  # rewards that only some rows have are not used
        rows = [replace(row, values=None) for row in rows]
    check_rows(cfg, rows, path)
    return rows


def check_rows(cfg: AlignConfig, rows: list[Example], path: Path) -> None:
    """Refuse rows whose tokens the model does not have, or would all be trained, or none of them:
    the tokenizer or the template is not theirs. A reward model trains no token."""
    last = max(int(np.concatenate(row.ids).max()) for row in rows)
    if last >= cfg.model.vocab_size:
        sizes = f"token {last}, the model {cfg.model.vocab_size} tokens"
        raise ValueError(f"{path} has {sizes}: set --tokenizer to the model's own")
    lengths = [row.length for row in rows]
    share = sum(np.concatenate(row.trained).sum() for row in rows) / sum(lengths)
    if not isinstance(cfg, RewardConfig) and not 0 < share < 1:
        raise ValueError(f"{path}: {share:.0%} of the tokens would be trained: look at its roles")
    log.info(f"{path}: longest row {max(lengths):,} tokens, {share:.1%} of all are trained")


def row_order(n: int, seed: int, first: int, batch: int) -> list[int]:
    """Return the numbers, below n, of rows first ... first + batch - 1 of the run: each epoch is a
    shuffle of its own."""
    out = []
    for i in range(first, first + batch):
        epoch, j = divmod(i, n)
        key = hashlib.blake2b(f"{seed}/rows/{epoch}".encode(), digest_size=8).digest()
        out.append(permute(j, n, int.from_bytes(key, "big")))
    return out


def check_mesh(cfg: AlignConfig) -> None:
    """Raise ValueError for a mesh that cannot run a step, however many windows it has."""
    windows = cfg.mesh.dp(world_size()) * cfg.micro_batch * cfg.mesh.pp
    cfg.mesh.check(cfg.model, world_size(), windows, cfg.micro_batch)


def count_windows(cfg: AlignConfig, dp: int, held: int) -> int:
    """Return how many windows the mesh computes where so many hold rows: each process has as many
    micro-batches as the others, and as many as its pipeline's schedule can take."""
    at_once = dp * cfg.micro_batch
    return at_once * cfg.mesh.micro_batches(math.ceil(held / at_once))


def batches_of(
    cfg: AlignConfig,
    runner: Runner,
    rows: Sequence[Example],
    count: Callable[[Batch], int],
    reference: np.ndarray | None = None,
) -> list[Batch]:
    """Pack rows into windows, and return this process's micro-batches. Which rows share a window
    depends on these rows alone. reference: (rows, K), of which a batch gets its own, (B, S, K)."""
    pad = partial(count_windows, cfg, runner.dp)
    windows = pack(rows, cfg.model.seq_len, cfg.packed, pad)
    if reference is not None:
        there = windows["rows"][..., None] >= 0
        windows["reference"] = np.where(there, reference[windows["rows"]], 0)
    share = len(windows["tokens"]) // runner.dp
    start = runner.dp_rank * share
    out = []
    for i in range(start, start + share, cfg.micro_batch):
        batch = {key: value[i : i + cfg.micro_batch] for key, value in windows.items()}
        out.append(batch | {"count": count(batch)})
    return out


def say_how_full(cfg: AlignConfig, runner: Runner, rows: Sequence[Example]) -> None:
    """Log how many windows of a step hold rows, of those that the mesh computes all the same."""
    held = len(pack(rows, cfg.model.seq_len, cfg.packed)["tokens"])
    computed = count_windows(cfg, runner.dp, held)
    found = f"a step has {computed:,} windows, of which {held:,} hold rows"
    if 2 * held < computed:
        log.warning(f"{found}: raise --batch, or start fewer processes or pipeline stages")
    else:
        log.info(found)


@dataclass(frozen=True)
class RowSet:
    """Rows of a file, with what is learnt from them or measured on them."""

    rows: list[Example]
    objective: Objective
    reference: np.ndarray | None = None  # log π_ref (rows, K), of a preference stage

    def batches(self, cfg: AlignConfig, runner: Runner, numbers: Sequence[int]) -> list[Batch]:
        """Return this process's micro-batches of the rows with these numbers."""
        reference = None if self.reference is None else self.reference[list(numbers)]
        rows = [self.rows[i] for i in numbers]
        return batches_of(cfg, runner, rows, self.objective.count, reference)


def row_set(cfg: AlignConfig, runner: Runner, rows: list[Example], name: str) -> RowSet:
    """Return rows of the set `name` with the stage's objective. Preference stages get the reference
    of the weights that the runner holds now."""
    reference = None
    if isinstance(cfg, PreferenceConfig):
        reference = reference_log_probs(cfg, runner, rows, cfg.val if name == "val" else cfg.data)
    return RowSet(rows, objective_of(cfg, rows, name), reference)


# ---- the reference -------------------------------------------------------------------------------


@torch.no_grad()
def fingerprint(runner: Runner) -> str:
    """Return a hash of the weights that is the same on every mesh: the sum over their fp32 bits
    times an odd number of their place, modulo 2^64."""
    total = torch.zeros((), dtype=torch.int64, device=runner.device)
    for name, p in runner.params().items():
        if copied_by_tp(p) and runner.mesh["tp"].get_local_rank() > 0:
            continue  # counted once
        data, index = local_part(p)
        place = index[0] if len(index) == 1 else index[0][:, None] * p.shape[1] + index[1]
        bits = data.float().view(torch.int32).long()
        total += (bits * (2 * (place + zlib.crc32(name.encode())) + 1)).sum()
    return f"{runner.reduce(total, 'dp_shard', 'tp', 'pp').item() % 2**64:016x}"


def reference_log_probs(
    cfg: PreferenceConfig, runner: Runner, rows: list[Example], path: Path
) -> np.ndarray:
    """Return log π_ref of each row's answers, (rows, K) in fp64, by the weights that the runner
    holds now. A file beside the rows keeps them for a run with another rate or beta."""
    weights = fingerprint(runner)
    dtype = cfg.mesh.compute_dtype
    file = cfg.reference or path.with_name(f"{path.name}.reference-{weights}-{dtype}.json")
    known = from_rank_0(lambda: read_reference(file, weights, dtype))
    missing = {row.key: row for row in rows if row.key not in known}
    log.info(f"{file}: {len(rows) - len(missing):,} known, {len(missing):,} to compute")
    computed = compute_log_probs(cfg, runner, list(missing.values()))
    known |= zip(missing, computed, strict=True)
    log_probs = np.array([known[row.key] for row in rows])
    if not np.isfinite(log_probs).all():
        raise ValueError(f"{path}: the reference gives a log-probability that is not finite")
    if missing and dist.get_rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"weights": weights, "dtype": dtype, "log_probs": known}))
    dist.barrier()
    return log_probs


def read_reference(file: Path, weights: str, dtype: str) -> dict[str, list[float]]:
    """Read a file of reference log-probabilities, if it exists: a row's key → its own."""
    if not file.exists():
        return {}
    with naming(file):
        found = json.loads(file.read_text())
        theirs = f"{found['weights']} in {found['dtype']}"
        log_probs = found["log_probs"]
    if theirs != f"{weights} in {dtype}":
        rule = f"this run starts from {weights} in {dtype}: remove it, or set another file"
        raise ValueError(f"{file} is of the weights {theirs}, {rule}")
    return log_probs


def compute_log_probs(
    cfg: PreferenceConfig, runner: Runner, rows: list[Example]
) -> list[list[float]]:
    """Run the runner's weights over all rows; return the log-probability of each row's answers."""
    shape = (len(rows), len(rows[0].ids) if rows else 0)
    out = torch.zeros(shape, dtype=torch.float64, device=runner.device)

    def collect(part: Tensor, log_probs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        part[batch["rows"][batch["rows"] >= 0]] = response_sums(log_probs, batch)
        return log_probs.new_zeros(())

    for i in range(0, len(rows), cfg.batch):
        batches = batches_of(cfg, runner, rows[i : i + cfg.batch], n_rows)
        runner.eval(batches, partial(collect, out[i : i + cfg.batch]))
    return runner.reduce(out, "dp_replicate", "dp_shard", "pp").tolist()


def check_start(cfg: PreferenceConfig, values: dict[str, float]) -> None:
    """Check that policy and reference are one before the first step: a = 0, so that DPO's loss is
    ln 2 and RPO's ln 2 − H(σ(b)). Otherwise the reference is of other weights, tokens or code."""
    nats = {"fp32": 1e-3, "bf16": 0.5}[cfg.mesh.compute_dtype]  # of an answer's log-probability
    off = values["abs_drift"]
    due = values["at_reference"]
    loss = values["preference_loss"]
    if off > nats or abs(loss - due) > 1e-6 + cfg.beta * 4 * nats * max(1.0, abs(due)):
        raise ValueError(
            f"before the first step policy and reference differ by {off:.4g} nats an answer, the "
            f"loss is {loss:.6f} where {due:.6f} is due: wrong --reference, or a wrong rendering"
        )
    log.info(f"self-test: policy = reference within {off:.2g} nats, loss {loss:.6f} as it must be")


# ---- a stage -------------------------------------------------------------------------------------


def with_model(cfg: AlignConfig) -> AlignConfig:
    """Return the config with the model of --init, in this stage's length and with its head."""
    if not cfg.init and cfg.model == AlignConfig.model:
        raise ValueError("init: no weights to start from: set --init RUN or --init hf:FOLDER")
    model = read_config(cfg.init.removeprefix("hf:")) if cfg.init else cfg.model
    heads = getattr(cfg, "n_attributes", 0)  # of a reward model
    if heads not in (5, 9) and (model.n_attributes or isinstance(cfg, RewardConfig)):
        raise ValueError(f"init={cfg.init} is a reward model, or n_attributes={heads} not 5 or 9")
    names = ("seq_len", "lora_rank", "lora_alpha", "lora_targets")
    own = {name: getattr(cfg, name) for name in names} | {"n_attributes": heads}
    for name, value in vars(cfg.model).items():
        given = value not in (getattr(AlignConfig.model, name), own.get(name))
        if given and (cfg.init or name in own):
            rule = "a stage has --init's model, and its own --seq-len, --lora-rank and so on"
            raise ValueError(f"model.{name}={value} would not be used: {rule}")
    return replace(cfg, model=replace(model, **own))


def tokenizer_of(cfg: AlignConfig) -> Tokenizer:
    """Load the tokenizer of the config, or that of --init."""
    spec = cfg.tokenizer or cfg.init.removeprefix("hf:")
    if not spec:
        raise ValueError("tokenizer: none given, nor an --init whose folder has one: set it")
    return load_tokenizer(spec)


def eval_set(name: str, cfg: AlignConfig, runner: Runner, held_out: RowSet) -> EvalSet:
    """Return rows to validate on, of which NAME_loss and NAME_... of the objective are logged."""
    sums = MetricSums(held_out.objective, runner)
    numbers = range(min(len(held_out.rows), cfg.eval_batches * cfg.batch))

    def values(loss: float) -> dict[str, float]:
        found = {"loss": loss} | sums.take()
        return {f"{name}_{key}": value for key, value in found.items() if key != "tokens"}

    return EvalSet(lambda: held_out.batches(cfg, runner, numbers), sums.loss_fn, values)


def read_sets(cfg: AlignConfig, tokenizer: Tokenizer, read: Callable) -> dict[str, list[Example]]:
    """Read the rows of --data, those of --val, and those of a reward model's --pairs."""
    sets = {}
    for name in ("data", "val", "pairs"):
        if path := getattr(cfg, name, None):
            how: Any = {"loss": "regular"} if name == "pairs" else {}
            sets[name] = read(replace(cfg, **how), path, tokenizer)
    return sets


def align(
    preset: str, cfg: AlignConfig, read: Callable = read_rows_of, make: Callable = row_set
) -> Path:
    """Run a stage of rows that `read` reads and `make` makes a RowSet of; return its folder."""
    cfg = with_model(cfg)
    tokenizer = tokenizer_of(cfg)
    sets = read_sets(cfg, tokenizer, read)
    rows = sets["data"]
    n_rows = max(1, round(len(rows) * cfg.epochs))
    steps = math.ceil(n_rows / cfg.batch)  # the last one takes what is left
    cfg = replace(cfg, steps=min(cfg.steps or steps, steps))
    check_mesh(cfg)
    data = hashlib.blake2b("".join(row.key for row in rows).encode(), digest_size=8).hexdigest()
    cfg, runner = start(preset, cfg, init_mesh(cfg.mesh), data, tokenizer)
    log.info(f"{cfg.steps:,} steps of {cfg.batch} rows; the first:\n{show_row(rows[0], tokenizer)}")
    row_sets = {name: make(cfg, runner, found, name) for name, found in sets.items()}
    train_set = row_sets.pop("data")
    sums = MetricSums(train_set.objective, runner)

    def numbers(step: int) -> list[int]:
        first = step * cfg.batch
        return row_order(len(rows), cfg.seed, first, min(cfg.batch, n_rows - first))

    def batches(step: int) -> list[Batch]:
        return train_set.batches(cfg, runner, numbers(step))

    def describe(step: int) -> str:
        return ", ".join(rows[i].where for i in numbers(step))

    say_how_full(cfg, runner, [rows[i] for i in numbers(0)])
    begun = from_rank_0(lambda: step_folders(cfg.out / "checkpoints"))
    if train_set.reference is not None and not begun:
        runner.eval(batches(0), sums.loss_fn)
        check_start(cfg, sums.take())
    evaluate = evaluator(runner, [eval_set(k, cfg, runner, v) for k, v in row_sets.items()])
    fit(cfg, runner, batches, sums.loss_fn, evaluate, describe, sums.take)
    return cfg.out


def main() -> None:
    set_up_logging()
    run(lambda: align(*choose_config(sys.argv[1:], PRESETS, "Align a model: preset, options.")))


if __name__ == "__main__":
    main()
