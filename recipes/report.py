"""A plot of runs: loss, learning rate, batch size and speed.

python -m recipes.report runs/nano runs/try
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from train import run, set_up_logging

log = logging.getLogger("nemotron4")


# ---- report --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReportConfig:
    """Draw loss, learning rate, batch size and speed of one or several runs into one PNG."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path = Path("report.png")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    path, rows = run / "metrics.jsonl", []
    if not path.exists():
        raise ValueError(f"{run}: no metrics.jsonl: not a run's folder")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in ("tokens", "batch", "mfu", "lr", "loss")} | row)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{number}: not a row of this program's metrics") from None
    return rows


def report(cfg: ReportConfig) -> None:
    try:
        import matplotlib
    except ImportError as e:
        raise ValueError("the report needs matplotlib: pip install -e '.[report]'") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if not cfg.runs:
        raise ValueError("no run given: train.py report RUN ...")
    fig, panels = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    loss, rate, batch, speed = panels.flat
    histories = {run: read_metrics(run) for run in cfg.runs}
    measured = all(row["mfu"] is not None for rows in histories.values() for row in rows)
    for i, (folder, rows) in enumerate(histories.items()):
        tokens = [r["tokens"] / 1e6 for r in rows]
        look = dict(color=f"C{i % 10}", lw=1 + 1.5 * (len(cfg.runs) - 1 - i), alpha=0.8)
        losses = [float("nan") if r["loss"] is None else r["loss"] for r in rows]
        loss.plot(tokens, losses, label=folder.name, **look)
        val = [(r["tokens"] / 1e6, r["val_loss"]) for r in rows if "val_loss" in r]
        loss.plot(*zip(*val, strict=True), "o", ms=5, color=look["color"]) if val else None
        rate.plot(tokens, [r["lr"] for r in rows], label=folder.name, **look)
        batch.plot(tokens, [r["batch"] for r in rows], drawstyle="steps-post", **look)
        ys = [r["mfu"] if measured else r["tokens_per_s"] / 1e3 for r in rows]
        speed.plot(tokens, ys, **{**look, "lw": 1})
    speed.set_title("MFU, %" if measured else "thousand tokens/s (a device has no known peak)")
    loss.set_title("loss (points: validation)")
    rate.set_title("learning rate")
    batch.set_title("batch, sequences")
    for panel in panels.flat:
        panel.set_xlabel("million tokens")
        panel.grid(alpha=0.3)
    batch.set_ylim(bottom=0)
    speed.set_ylim(bottom=0)
    loss.legend()
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(cfg.out, dpi=110)
    log.info(f"wrote {cfg.out}")


def main() -> None:
    set_up_logging()
    run(lambda: report(tyro.cli(ReportConfig)))


if __name__ == "__main__":
    main()
