"""Draw runs' metrics, and the histograms of synthetic data, into pictures.

    python -m recipes.report runs/nano runs/try --out report.png

Both need matplotlib: pip install -e '.[report]'.
"""

import logging
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from data import read_records
from train import run, set_up_logging

log = logging.getLogger("nemotron4")
Rows = list[dict[str, Any]]
# what is drawn of each step; a step that was skipped has no loss, a CPU no MFU
DRAWN = dict.fromkeys(("batch", "lr", "tokens", "tokens_per_s"), int | float)
DRAWN |= dict.fromkeys(("loss", "mfu"), int | float | None)


@dataclass(frozen=True)
class ReportConfig:
    """Draw loss, learning rate, batch size and speed of one or several runs into one picture."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path = Path("report.png")
    """Picture to write; its ending is the format: png, pdf, svg …"""


def read_metrics(folder: Path) -> Rows:
    """Return the rows of a run's metrics.jsonl, of which each has what is drawn."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{folder}: no metrics.jsonl: not a run's folder")
    rows = []
    for where, row in read_records(path):
        for name, kind in DRAWN.items():
            if name not in row or not isinstance(row[name], kind):
                raise ValueError(f"{where}: no {name}: not a row of this program's metrics")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no step is in it")
    return rows


def draw_run(panels: Any, name: str, rows: Rows, measured: bool, **look: Any) -> None:
    """Draw a run's curves over its tokens; `measured`: the speed is given as MFU."""
    loss, rate, batch, speed = panels
    tokens = [row["tokens"] / 1e6 for row in rows]
    losses = [float("nan") if row["loss"] is None else row["loss"] for row in rows]
    loss.plot(tokens, losses, label=name, **look)
    evaluated = [row for row in rows if "val_loss" in row]
    at = [row["tokens"] / 1e6 for row in evaluated]
    loss.plot(at, [row["val_loss"] for row in evaluated], "o", ms=5, color=look["color"])
    rate.plot(tokens, [row["lr"] for row in rows], **look)
    batch.plot(tokens, [row["batch"] for row in rows], drawstyle="steps-post", **look)
    speeds = [row["mfu"] if measured else row["tokens_per_s"] / 1e3 for row in rows]
    speed.plot(tokens, speeds, **look | {"lw": 1})


def report(cfg: ReportConfig) -> None:
    """Draw all runs into the same four panels and write the picture to `cfg.out`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ValueError("the report needs matplotlib: pip install -e '.[report]'") from e
    if not cfg.runs:
        raise ValueError("no run given: python -m recipes.report RUN ...")
    histories = {folder: read_metrics(folder) for folder in cfg.runs}
    every_row = sum(histories.values(), [])
    measured = all(row["mfu"] is not None for row in every_row)
    figure = Figure(figsize=(12, 8), layout="constrained")
    kind = cfg.out.suffix[1:]
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"--out {cfg.out}: its ending must be one of {', '.join(known)}")
    panels = figure.subplots(2, 2).flatten()
    for i, (folder, rows) in enumerate(histories.items()):
        # earlier runs are wider, so that equal curves remain visible
        look = {"color": f"C{i % 10}", "lw": 1 + 1.5 * (len(histories) - 1 - i), "alpha": 0.8}
        draw_run(panels, folder.name, rows, measured, **look)
    speed = "MFU, %" if measured else "thousand tokens/s (a device has no known peak)"
    titles = ["loss (points: validation)", "learning rate", "batch, sequences", speed]
    for panel, title in zip(panels, titles, strict=True):
        panel.set(title=title, xlabel="million tokens")
        panel.grid(alpha=0.3)
    for panel in panels[2:]:
        panel.set_ylim(bottom=0)
    panels[0].legend()
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(cfg.out, dpi=110)
    log.info(f"wrote {cfg.out}")


def draw_histograms(path: Path, lengths: dict[str, list[int]], topics: Counter[str]) -> bool:
    """Draw the lengths of texts, by what they are, and the prompts of the 20 commonest topics into
    one picture. Returns False if there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no histograms: pip install -e '.[report]'")
        return False
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = {name: sizes for name, sizes in lengths.items() if sizes}
    if drawn:
        left.hist(list(drawn.values()), bins=20, label=list(drawn))
        left.legend(frameon=False)
    left.set(xlabel="characters", ylabel="texts")
    commonest = topics.most_common(20)[::-1]
    names = [name[:30].replace("$", r"\$") for name, _ in commonest]  # a dollar is no formula
    right.barh(range(len(names)), [count for _, count in commonest], tick_label=names)
    right.set(xlabel="prompts of a topic")
    figure.savefig(path, dpi=120)
    return True


def table(head: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = (head, ["---"] * len(head), *rows)
    return ["", *(f"| {' | '.join(map(str, row))} |" for row in lines)]


def main() -> None:
    set_up_logging()
    run(lambda: report(tyro.cli(ReportConfig, prog="python -m recipes.report")))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends it without a word
    main()
