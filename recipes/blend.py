"""Pretrain a preset with the blends of a TOML file: each phase's sources and their weights.

A name is that of a source, or of all sources NAME-..., such as code-python, which share its weight.
recipes/blend.toml has the report's blend, and all that one can say.

    torchrun --nproc_per_node 8 -m recipes.blend recipes/blend.toml nemotron4_340b --data data/mine
"""

import logging
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from data import TokenData
from parallel import run, set_up_logging
from train import PRESETS, PretrainConfig, choose_config, pretrain

log = logging.getLogger("nemotron4")

Weights = dict[str, float]


def weights_in(table: Any, place: str) -> Weights:
    """Return a table of numbers by name, checked to be one."""
    if not isinstance(table, dict):
        raise ValueError(f"{place}: {table!r} is no table of names and numbers")
    for name, value in table.items():
        if type(value) not in (int, float) or not 0 <= value < float("inf"):
            raise ValueError(f"{place}: {name} = {value!r}, not a number of at least 0")
    return table


def read_blends(path: Path) -> tuple[Weights, list[dict[str, Weights]]]:
    """Return a file's alphas by name, and each phase's `blend` and perhaps `late_blend`."""
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ValueError(f"{path}: no TOML ({e}): mend it") from None
    phases = said.get("phases")
    if said.keys() - {"alpha", "phases"} or not phases or not isinstance(phases, list):
        raise ValueError(f"{path}: give [alpha] or none, and [[phases]], each with a blend")
    for number, phase in enumerate(phases):
        place = f"{path}: phase {number}"
        if not isinstance(phase, dict) or not {"blend"} <= phase.keys() <= {"blend", "late_blend"}:
            raise ValueError(f"{place}: give its blend, and a late_blend or none")
        for name, table in phase.items():
            weights_in(table, f"{place}, {name}")
    alphas = weights_in(said.get("alpha", {}), f"{path}: [alpha]")
    if not all(alphas.values()):
        raise ValueError(f"{path}: [alpha]: each above 0")
    return alphas, phases


def shared(weights: Weights, alphas: Weights, data: TokenData) -> Weights:
    """Return the weight of each source: a name's own goes to the source of this name and to those
    NAME-..., by their tokens to the power of 1 / alpha."""
    blend: Weights = {}
    for name, weight in weights.items():
        sources = [source for source in data.sources if f"{source}-".startswith(f"{name}-")]
        power = 1 / alphas.get(name, 1)
        sizes = {source: data.n_tokens(source, "train") ** power for source in sources}
        total = sum(sizes.values())
        if not total:
            found = f"names no source with tokens; {data.folder} has {', '.join(data.sources)}"
            raise ValueError(f"the blend's {name!r} {found}")
        for source, size in sizes.items():
            blend[source] = blend.get(source, 0) + weight * size / total
    return blend


def with_blends(cfg: PretrainConfig, path: Path, data: TokenData) -> PretrainConfig:
    """Return a config whose phases have a file's blends, over a folder's sources."""
    alphas, said = read_blends(path)
    if len(said) != len(cfg.phases):
        rule = "a preset of as many phases, as nano_two_phase, nemotron4_340b"
        raise ValueError(f"{path} has {len(said)} phases, the run {len(cfg.phases)}: take {rule}")
    phases = []
    for phase, own in zip(cfg.phases, said, strict=True):
        late_blend = shared(own.get("late_blend", {}), alphas, data)
        blend = shared(own["blend"], alphas, data)
        phases.append(replace(phase, blend=blend, late_blend=late_blend))
    return replace(cfg, phases=tuple(phases))


def pretrain_with_blends(argv: list[str]) -> None:
    """Run `FILE PRESET --name value ...`."""
    if not argv or argv[0].startswith("-"):
        log.info(__doc__)
        return
    preset, cfg = choose_config(argv[1:], PRESETS, "Pretrain a preset, with a file's blends.")
    pretrain(preset, with_blends(cfg, Path(argv[0]), TokenData(cfg.data)))


def main() -> None:
    set_up_logging()
    run(lambda: pretrain_with_blends(sys.argv[1:]))


if __name__ == "__main__":
    main()
