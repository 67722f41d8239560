"""Align from weak to strong: the generator of each round makes the data that aligns the next one.

python -m recipes.iterate --rounds 2
python -m recipes.iterate report --bases runs/base --data.model runs/first --data.reward runs/reward
"""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean

from align import PreferenceConfig, SftConfig, align, dpo, general_sft, rpo_1
from data import aggregate, hold, write_whole
from parallel import world_size
from recipes.backends import identity
from recipes.demo import (
    OWN_ANSWERS,
    STAGE,
    DemoConfig,
    finished_run,
    markdown,
    marks,
    preference_settings,
    run_stoppable,
    weak_start,
    with_preset,
    write_prompts,
)
from recipes.records import Pipeline
from recipes.synthesize import SynthesizeConfig, own_prompts, rate, synthesize, with_rows
from train import choose_config

log = logging.getLogger("nemotron4")


@dataclass(frozen=True)
class IterateConfig:
    """Align models from weak to strong (report section 3.2.4): the generator of round k makes data,
    SFT, DPO and RPO align a base with it, and the result generates the data of round k + 1."""

    rounds: int = 2  # Number of rounds.
    out: Path = Path("runs/iterate")
    """Folder of the rounds and table.md; a loop that was stopped goes on where it was."""
    bases: tuple[str, ...] = ()
    """Models to align, one a round; the last one in all rounds that follow."""
    data: SynthesizeConfig = field(default_factory=SynthesizeConfig)
    """Settings of the data; its model is the first generator, its prompts serve every stage."""
    sft: SftConfig = field(default_factory=SftConfig)
    dpo: PreferenceConfig = field(default_factory=PreferenceConfig)
    rpo: PreferenceConfig = field(default_factory=PreferenceConfig)
    held_out: Path | None = None
    """Prompts (JSON lines) that no round sees, on which the referee marks every model."""
    referee: str = ""
    """Folder of the reward model that marks; default: data.reward, which also chose the data."""
    demo: DemoConfig | None = None
    """Demo whose tasks, models and marks the loop uses; what is missing of it is made."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}: must be at least 1")
        if not self.demo and not self.bases:
            raise ValueError("bases: name the model that is aligned in each round")
        if self.held_out and not (self.referee or self.data.reward or self.demo):
            raise ValueError("held_out: name the referee, or data.reward, that marks the answers")


def weak_to_strong() -> IterateConfig:
    """Use the demo's tasks and models, on a laptop; this is what runs if none is named."""
    sft = SftConfig(lr=1e-3, min_lr=1e-4, warmup=16 * 10, batch=64, epochs=4, **STAGE)
    # milder than the demo: what SFT on filtered answers leaves is harder to tell apart
    milder = dict(beta=0.3, lr=5e-5, min_lr=5e-6)
    dpo = replace(preference_settings("dpo"), **milder)
    rpo = replace(preference_settings("rpo"), **milder)
    return IterateConfig(data=OWN_ANSWERS, sft=sft, dpo=dpo, rpo=rpo, demo=DemoConfig())


def report_loop() -> IterateConfig:
    """Use the report's stages with models of yours: set --bases, --data.model and --data.reward."""
    data = SynthesizeConfig(recipe="report")
    return IterateConfig(bases=("base",), data=data, sft=general_sft(), dpo=dpo(), rpo=rpo_1())


LOOPS = {"demo": weak_to_strong, "report": report_loop}

# a round's stages, the file that each reads, and the share of its prompts that get several answers
ROUND = (("sft", "sft", 0), ("dpo", "preference", 1), ("rpo", "rpo", 1))

Prompts = Callable[[int, str], tuple[Path, ...]]  # files of a round's stage
Score = Callable[[Path], dict[str, float]]  # a model's marks


def start(cfg: IterateConfig) -> tuple[IterateConfig, Prompts, Score]:
    """Return the config with all models named, and where prompts and marks come from: the demo,
    whose first models are trained here if need be, or files and the referee."""
    if not cfg.demo:
        return cfg, lambda k, stage: cfg.data.prompts, partial(score_of, cfg)
    weak = weak_start(cfg.demo)
    judge = cfg.demo.out / "reward"
    bases = cfg.bases or (str(cfg.demo.out / "base"),)
    cfg = replace(cfg, bases=bases, data=replace(cfg.data, model=weak, reward=str(judge)))
    return cfg, partial(demo_prompts, cfg), partial(marks, cfg.demo, judge=judge)


def demo_prompts(cfg: IterateConfig, k: int, stage: str) -> tuple[Path, ...]:
    """Draw new tasks of the demo for a round's stage."""
    tasks = replace(cfg.demo, out=cfg.out / f"round_{k}", seed=cfg.demo.seed + k)
    return write_prompts(tasks, stage, 5000 if stage == "sft" else 1000)


def score_of(cfg: IterateConfig, model: Path) -> dict[str, float]:
    """Return the referee's mean reward of a model's answers to the held-out prompts."""
    if not cfg.held_out:
        return {}
    pipeline = Pipeline(replace(
        cfg.data, recipe="prompts", prompts=(cfg.held_out,), model=model, answerers=(),
        reward=cfg.referee or cfg.data.reward, out=cfg.out / "marks",
    ))  # fmt: skip
    questions = own_prompts(pipeline)
    answers = pipeline.ask("held_out", questions, temperature=0.0)
    pairs = zip(questions, answers, strict=True)
    chats = [q.with_message("assistant", answer["text"], answer["id"]) for q, answer in pairs]
    ratings = rate(pipeline, "held_out_ratings", chats)
    rewards = [float(aggregate(rating)) for rating in ratings if rating]
    return {"reward": mean(rewards)} if rewards else {}


def round_data(
    cfg: IterateConfig, k: int, i: int, prompts: Prompts, generator: Path, policy: Path
) -> Path:
    """Make the rows of a round's i-th stage. The generator writes prompts and dialogues, but the
    policy itself answers the prompts for preferences: it learns less from others' answers."""
    name, file, share = ROUND[i]
    made = synthesize(replace(
        cfg.data, model=generator, answerers=(str(policy),) if share else (),
        counts=cfg.data.counts | {"preference_share": share}, prompts=prompts(k, name),
        seed=cfg.data.seed + len(ROUND) * k + i, out=cfg.out / f"round_{k}" / f"{name}_data",
    ))  # fmt: skip
    small = cfg.demo and cfg.demo.scale < 1
    return with_rows(made, file, advice="; raise --demo.scale" if small else "")


def iterate(cfg: IterateConfig) -> None:
    """Run the rounds, skipping every step that is done; lineage.json tells what came from what."""
    if world_size() > 1:
        raise ValueError("iterate runs in one process: on many, run each round's commands by hand")
    cfg.out.mkdir(parents=True, exist_ok=True)
    hold(cfg.out)
    cfg, prompts, score = start(cfg)
    generator = cfg.data.model
    lineage = []
    rows = {"the first generator": score(generator)}
    for k in range(1, cfg.rounds + 1):
        model = Path(cfg.bases[min(k, len(cfg.bases)) - 1])
        for i, (name, _, _) in enumerate(ROUND):
            data = round_data(cfg, k, i, prompts, generator, model)
            out = cfg.out / f"round_{k}" / name
            settings = replace(getattr(cfg, name), init=str(model), data=data, out=out)
            trained = finished_run(align(name, settings))
            lineage.append(dict(
                round=k, stage=name, init=str(model), data=str(data), generator=str(generator),
                run=str(trained), model=identity(trained),
            ))  # fmt: skip
            model = trained
            rows[f"round {k}, {name}"] = score(model)
        generator = model
        write_whole(cfg.out / "lineage.json", json.dumps(lineage, indent=2) + "\n")
    text = markdown(rows, "model") + "\n"
    write_whole(cfg.out / "table.md", text)
    log.info(text)


def main() -> None:
    sys.argv[0] = "python -m recipes.iterate"  # as the help names it
    parse = partial(
        choose_config, with_preset("demo"), LOOPS, " ".join(IterateConfig.__doc__.split())
    )
    run_stoppable(lambda: iterate(parse()[1]))


if __name__ == "__main__":
    main()
