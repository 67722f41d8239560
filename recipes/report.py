"""Draw runs' metrics into a picture, in the one style of all the house's pictures.

    python -m recipes.report runs/nano runs/try --out report.png

Pictures need matplotlib: pip install -e '.[report]'.
"""

import logging
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from data import read_records

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
    panels: tuple[Literal["loss", "difference", "lr", "batch", "speed"], ...] = ()
    """Panels to draw; default: all that have something to say."""


class Stage(NamedTuple):
    """Holds what a run's folder says of it."""

    folder: Path
    config: dict[str, Any]
    rows: Rows

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def rewards(self) -> bool:
        """Tell whether it is a reward model."""
        return bool(self.config["model"]["n_attributes"])

    @property
    def chats(self) -> bool:
        """Tell whether it has learnt the chat template: only pretraining has phases."""
        return "phases" not in self.config

    def seconds(self) -> float:
        """Return the time of its steps and its validations."""
        total = 0.0
        before = 0
        for row in self.rows:
            total += (row["tokens"] - before) / row["tokens_per_s"] + row.get("eval_seconds", 0.0)
            before = row["tokens"]
        return total

    def measured(self) -> bool:
        """Tell whether the peak of its device is known, of which the speed is a share."""
        return all(row["mfu"] is not None for row in self.rows)

    def changes(self, name: str) -> bool:
        """Tell whether a value of the rows changes."""
        return len({row[name] for row in self.rows}) > 1

    def numbers(self) -> dict[str, Any]:
        """Return what makes a run's numbers, and not its speed: equal for equal losses."""
        from train import MAY_CHANGE  # torch with it, as below: --help is quicker without

        free = {*MAY_CHANGE, "started", "agent"}
        return {key: value for key, value in self.config.items() if key not in free}


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


def read_stage(folder: Path) -> Stage:
    """Read a run's metrics, and its settings if they are there."""
    from train import settings_in

    return Stage(folder, settings_in(folder), read_metrics(folder))


# ---- the style of all pictures -------------------------------------------------------------------

# Okabe and Ito's colours, which people tell apart who see fewer of them; on white, which a dark
# page shows as a card
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": f"cycler('color', {COLORS})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.unicode_minus": True,
    "figure.dpi": 120,
    "font.size": 9.5,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 120,
}


def can_draw() -> bool:
    """Tell whether matplotlib is there; if not, say what brings it."""
    if find_spec("matplotlib"):
        return True
    log.warning("no picture: pip install -e '.[report]'")
    return False


@contextmanager
def picture(out: Path, panels: int, size: tuple[float, float] | None = None) -> Iterator[list[Any]]:
    """Yield so many panels of a size in inches, two or three a row, in the house's style; what is
    drawn on them is then written to `out`."""
    if not find_spec("matplotlib"):
        raise ValueError("a picture needs matplotlib: pip install -e '.[report]'")
    import matplotlib
    from matplotlib.figure import Figure

    columns = {1: 1, 2: 2, 4: 2}.get(panels, 3)
    rows = -(-panels // columns)
    width, height = size or ((4.2, 2.8) if columns == 3 else (5.6, 3.4))
    with matplotlib.rc_context(STYLE):
        figure = Figure((width * columns, height * rows), layout="constrained")
        known = figure.canvas.get_supported_filetypes()
        if out.suffix[1:] not in known:
            raise ValueError(f"--out {out}: its ending must be one of {', '.join(known)}")
        found = list(figure.subplots(rows, columns, squeeze=False).flatten())
        for spare in found[panels:]:
            spare.set_axis_off()
        yield found[:panels]
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    log.info(f"wrote {out}")


def plain(name: str) -> str:
    """Escape what matplotlib takes for the beginning of a formula."""
    return name.replace("$", r"\$")


def unit_of(most: float) -> tuple[float, str]:
    """Return the unit in which a count of tokens is short, and its name."""
    units = {1e12: "trillion ", 1e9: "billion ", 1e6: "million ", 1e3: "thousand "}
    return next(((unit, name) for unit, name in units.items() if most >= unit), (1.0, ""))


LONG = 100  # values from which a curve is smoothed


def smoothed(values: list[float]) -> list[float]:
    """Return the mean of each value and of as many before it as after it, a twenty-fifth of all at
    most; nan is left out. Towards an end there are fewer, so that a falling curve has no lag."""
    reach = len(values) // 50
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        known = [value for value in values[i - near : i + near + 1] if value == value]
        means.append(sum(known) / len(known) if known else float("nan"))
    return means


def draw_curve(panel: Any, at: list[float], values: list[float], label: str, **look: Any) -> None:
    """Draw a curve: thin as it is, where it is long, and smoothed."""
    if len(values) >= LONG:
        panel.plot(at, values, color=look["color"], lw=0.6, alpha=0.35)
    panel.plot(at, smoothed(values), label=plain(label), **look)


def draw_loss(panel: Any, stage: Stage, unit: float, label: str, **look: Any) -> None:
    """Draw a run's loss over its tokens, and its validation losses as points."""
    at = [row["tokens"] / unit for row in stage.rows]
    losses = [float("nan") if row["loss"] is None else row["loss"] for row in stage.rows]
    draw_curve(panel, at, losses, label, **look)
    evaluated = [row for row in stage.rows if row.get("val_loss") is not None]
    at = [row["tokens"] / unit for row in evaluated]
    panel.plot(at, [row["val_loss"] for row in evaluated], "o", ms=4.5, color=look["color"])


# ---- runs beside each other ----------------------------------------------------------------------


def differences(stages: list[Stage]) -> list[tuple[list[float], list[float]]]:
    """Return, for runs that should have equal losses, the tokens and the difference of each one's
    losses from those of the first; nothing if their settings differ."""
    first, *others = stages
    if not first.config or any(other.numbers() != first.numbers() for other in others):
        return []
    losses = {row["step"]: row["loss"] for row in first.rows}
    found = []
    for stage in stages:
        tokens = []
        values = []
        for row in stage.rows:
            if row["loss"] is not None and losses.get(row["step"]) is not None:
                tokens.append(row["tokens"])
                values.append(row["loss"] - losses[row["step"]])
        found.append((tokens, values))
    return found if others else []


CHANGING = {"lr": "learning rate", "batch": "batch, sequences"}  # drawn where they do


def titles_of(stages: list[Stage], labels: list[str], equal: bool, share: bool) -> dict[str, str]:
    """Return the panels that have something to say, with their titles: a batch or a rate that never
    changes has none. equal: the runs should be; share: the speed is one of the device's peak."""
    titles = {"loss": "loss (points: validation)"}
    if any(len(stage.rows) >= LONG for stage in stages):
        titles["loss"] = "loss, smoothed (thin: as it is; points: validation)"
    if equal:
        titles["difference"] = plain(f"loss minus that of {labels[0]}")
    for name, title in CHANGING.items():
        if any(stage.changes(name) for stage in stages):
            titles[name] = title
    speed = "MFU, % of the device's peak" if share else "speed, thousand tokens/s"
    return titles | {"speed": speed}


def chosen(titles: dict[str, str], panels: tuple[str, ...]) -> dict[str, str]:
    """Return the panels that are asked for, or all."""
    for name in panels:
        if name not in titles:
            raise ValueError(f"--panels {name}: nothing to say: there are {', '.join(titles)}")
    return {name: title for name, title in titles.items() if not panels or name in panels}


def report(cfg: ReportConfig) -> None:
    """Draw all runs into the same panels and write the picture to `cfg.out`."""
    if not cfg.runs:
        raise ValueError("no run given: python -m recipes.report RUN ...")
    stages = [read_stage(folder) for folder in cfg.runs]
    names = [stage.name for stage in stages]
    labels = names if len({*names}) == len(names) else [str(stage.folder) for stage in stages]
    share = all(stage.measured() for stage in stages)
    apart = differences(stages)
    titles = chosen(titles_of(stages, labels, bool(apart), share), cfg.panels)
    unit, name = unit_of(max(stage.rows[-1]["tokens"] for stage in stages))
    with picture(cfg.out, len(titles)) as found:
        panels = dict(zip(titles, found, strict=True))
        for i, (stage, label) in enumerate(zip(stages, labels, strict=True)):
            look = {"color": f"C{i % len(COLORS)}", "lw": 1.6}
            if apart:  # earlier runs are wider, so that equal curves remain visible
                look["lw"] += 1.8 * (len(stages) - 1 - i)
            draw_run(panels, stage, unit, label, share, **look)
            if i and "difference" in panels:
                tokens, values = apart[i]
                at = [count / unit for count in tokens]
                panels["difference"].plot(at, values, ".", ms=3, color=look["color"])
                panels["difference"].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        for key, panel in panels.items():
            panel.set(title=titles[key], xlabel=f"{name}tokens")
        if len(stages) > 1:
            found[0].legend()


def draw_run(
    panels: dict[str, Any], stage: Stage, unit: float, label: str, share: bool, **look: Any
) -> None:
    """Draw a run's curves into the panels that there are."""
    at = [row["tokens"] / unit for row in stage.rows]
    if "loss" in panels:
        draw_loss(panels["loss"], stage, unit, label, **look)
    for key in panels.keys() & CHANGING.keys():
        panels[key].plot(at, [row[key] for row in stage.rows], label=plain(label), **look)
    if "speed" in panels:
        speeds = [row["mfu"] if share else row["tokens_per_s"] / 1e3 for row in stage.rows]
        draw_curve(panels["speed"], at, speeds, label, **look | {"lw": 1.6})
        panels["speed"].set_ylim(bottom=0)


# ---- what other programs draw and write ----------------------------------------------------------


def draw_histograms(path: Path, lengths: dict[str, list[int]], topics: Counter[str]) -> bool:
    """Draw the lengths of texts, by what they are, and the prompts of the 20 commonest topics into
    one picture, unless there is only one. Returns False if there is nothing to draw, or to draw
    with."""
    drawn = {f"{name} ({len(sizes)})": sizes for name, sizes in lengths.items() if sizes}
    commonest = topics.most_common(20) if len(topics) > 1 else []
    n_panels = bool(drawn) + bool(commonest)
    if not n_panels or not can_draw():
        return False
    with picture(path, n_panels, size=(5.6, max(3.4, 0.22 * len(commonest)))) as panels:
        if drawn:
            left = panels[0]
            left.hist(list(drawn.values()), bins=20, label=list(drawn), histtype="step", lw=1.6)
            left.set(title="lengths of texts", xlabel="characters", ylabel="texts")
            left.legend()
        if commonest:
            names = [plain(name[:30]) for name, _ in commonest]
            panels[-1].barh(range(len(names)), [n for _, n in commonest], tick_label=names)
            panels[-1].set(title="prompts of the commonest topics")
            panels[-1].xaxis.get_major_locator().set_params(integer=True)
            panels[-1].invert_yaxis()
            panels[-1].grid(axis="y", visible=False)
    return True


def table(head: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = (head, ["---"] * len(head), *rows)
    return ["", *(f"| {' | '.join(map(str, row))} |" for row in lines)]


def main() -> None:
    cfg = tyro.cli(ReportConfig, prog="python -m recipes.report")
    from train import run, set_up_logging

    set_up_logging()
    run(lambda: report(cfg))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends it without a word
    main()
