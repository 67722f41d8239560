"""Align by KTO: single answers, each of which was chosen or rejected, instead of pairs.

The loss weighs an answer against the policy's divergence from its reference, which is estimated on
strangers: each prompt with another row's answer. The estimate is of the whole batch, so that it is
the same on every mesh, and costs a forward pass before each step.

    python -m recipes.kto --init runs/sft --data answers.jsonl
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align import (
    AlignConfig,
    Objective,
    RowSet,
    Sums,
    align,
    check_rows,
    n_rows,
    reference_log_probs,
    response_sums,
    values_of,
)
from data import Example, Messages, Tokenizer, messages_of, read_rows, render_answer, required
from model import check_ranges
from parallel import Batch, Runner, run
from recipes.demo import with_preset
from recipes.online import before_each_step
from train import choose_config, set_up_logging

log = logging.getLogger("nemotron4")


@dataclass(frozen=True)
class KtoConfig(AlignConfig):
    """Align a model by answers that were chosen or rejected, one a row: `prompt`, `response` and
    `preference`."""

    beta: float = 0.2  # KL coefficient: factor of the log-ratio between policy and reference.
    reference: Path | None = None
    """File of reference log-probabilities; default: beside the rows, by the weights' hash."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"beta": (1e-12, 1e12)})


def kto() -> KtoConfig:
    """Train on single answers, in one epoch; rate and batch are as in DPO's stage."""
    return KtoConfig(lr=1e-7, batch=256)  # beta: NeMo-Aligner's


def kto_loss(log_ratio: Tensor, chosen: Tensor, kl: Tensor, beta: float) -> Tensor:
    """Return 1 − σ(β (L − z)) of each answer that was chosen, 1 − σ(β (z − L)) of any other (arXiv
    2402.01306), where L is its log π/π_ref, and z = kl ≥ 0 the divergence of π from π_ref."""
    margin = beta * (log_ratio - kl)
    return torch.sigmoid(torch.where(chosen, -margin, margin))


# ---- rows ----------------------------------------------------------------------------------------


def read_judged(row: dict[str, Any]) -> tuple[list[Messages], np.ndarray]:
    """Parse {"prompt" or "messages", "response", "preference"}; the last is chosen or rejected."""
    prompt = messages_of(row.get("prompt", row.get("messages")), "user")
    answer = messages_of(required(row, "response"), "assistant")
    if required(row, "preference") not in ("chosen", "rejected"):
        raise ValueError(f"preference is {row['preference']!r}: must be chosen or rejected")
    return [[*prompt, *answer]], np.float32([1 if row["preference"] == "chosen" else -1])


def with_strangers(rows: list[Example], seq_len: int) -> list[Example]:
    """Give each row a second segment: its prompt with the answer of the next row, which is cut
    where the window ends. A row that leaves no room for it goes."""
    out = []
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        start = int(row.trained[0].argmax())
        answer = other.ids[0][other.trained[0]][: max(0, seq_len - row.length - start)]
        ids = np.concatenate([row.ids[0][:start], answer])
        trained = np.arange(len(ids)) >= start
        if len(answer):
            both = dict(ids=(row.ids[0], ids), trained=(row.trained[0], trained))
            out.append(replace(row, **both))
    if not out:
        raise ValueError(f"no row leaves room for another's answer: raise --seq-len {seq_len}")
    log.info(f"{len(rows) - len(out):,} rows leave no room for another's answer beside them")
    return out


def kto_rows(cfg: KtoConfig, path: Path, tokenizer: Tokenizer) -> list[Example]:
    """Read a file of answers, each with its stranger."""
    how = dict(seq_len=cfg.model.seq_len, skip_bad=cfg.skip_bad, shorten=cfg.shorten)
    rows, _ = read_rows(path, read_judged, partial(render_answer, tokenizer=tokenizer), **how)
    rows = with_strangers(rows, cfg.model.seq_len)
    check_rows(cfg, rows, path)
    return rows


# ---- the stage -----------------------------------------------------------------------------------


def log_ratios(log_probs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return log π/π_ref of each row's answer and of its stranger, (N, 2)."""
    return response_sums(log_probs, batch) - batch["reference"][batch["rows"] >= 0]


def with_kl(runner: Runner, batches: list[Batch]) -> list[Batch]:
    """Give each micro-batch z: the mean log-ratio of all strangers of the step, on all processes,
    by the weights that the runner holds now; or zero, if that is negative."""
    mean = runner.eval(batches, lambda out, batch: log_ratios(out, batch)[:, 1].sum())
    return [batch | {"kl": mean.clamp(min=0)} for batch in batches]


def kto_objective(beta: float) -> Objective:
    """Return KTO's objective, a mean over rows. Logged are the share of answers on the right side
    of the divergence, their margin, and the divergence."""

    def measure(log_probs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Sums]:
        """Sum the loss of a micro-batch, and what `check_start` compares beside what is logged."""
        log_ratio, stranger = log_ratios(log_probs, batch).T
        chosen = values_of(batch)[:, 0] > 0
        kl = batch.get(
            "kl", torch.zeros_like(log_ratio.sum())
        )  # before the first step there is none
        loss = kto_loss(log_ratio, chosen, kl, beta).sum()
        margin = beta * (log_ratio.detach() - kl) * torch.where(chosen, 1, -1)
        n = torch.ones_like(margin).sum()
        sums = {"rows": n, "chosen": chosen.sum(), "kl": n * kl}
        right = margin > 1e-5  # less is rounding, of a policy that still is the reference
        sums |= {"accuracy": right.sum(), "beta_margin": margin.sum()}
        sums |= {"preference_loss": loss, "at_reference": n / 2}
        sums["abs_drift"] = torch.maximum(log_ratio.abs(), stranger.abs()).sum()
        return loss, sums

    names = ("rows", "chosen", "kl", "accuracy", "beta_margin")
    names += ("preference_loss", "at_reference", "abs_drift")
    return Objective(measure, n_rows, names, "rows")


class HeldOut(RowSet):
    """Holds rows to validate on, whose divergence is that of the moment."""

    def batches(self, cfg: AlignConfig, runner: Runner, numbers: Sequence[int]) -> list[Batch]:
        return with_kl(runner, super().batches(cfg, runner, numbers))


def row_set(cfg: KtoConfig, runner: Runner, rows: list[Example], name: str) -> RowSet:
    """Return rows with the reference's log-probabilities, by the weights that the runner holds."""
    training = name == "data"
    if training:
        before_each_step(runner, partial(with_kl, runner))
    reference = reference_log_probs(cfg, runner, rows, cfg.data if training else cfg.val)
    kind = RowSet if training else HeldOut
    return kind(rows, kto_objective(cfg.beta), reference)


def main() -> None:
    sys.argv[0] = "python -m recipes.kto"  # as the help names it
    args = with_preset("kto")
    set_up_logging()
    about = " ".join(KtoConfig.__doc__.split())
    run(lambda: align(*choose_config(args, {"kto": kto}, about), read=kto_rows, make=row_set))


if __name__ == "__main__":
    main()
