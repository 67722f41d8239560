"""Alignment (report section 3): staged supervised fine-tuning, reward model, DPO and RPO.

Losses are pure functions of log-probabilities summed over a response's tokens. They return values
per pair, or a sum and a count, never a mean: what a step divides by is counted over all processes.
"""
# In comments: B windows of T tokens  S rows of a window, each of n segments (see data.pack)
# N rows of a batch  A attributes  K responses of one prompt

import torch
import torch.nn.functional as F
from torch import Tensor

from data import NINE_ATTRIBUTES, aggregate
from model import IGNORE

__all__ = ["aggregate"]  # of data.py, as generate.py ranks with it too

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
