"""Weak to strong: the generator of each round makes data, with which the next one is aligned.

python -m recipes.iterate --rounds 2
"""

import json
import logging
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean

from align import PreferenceConfig, SftConfig, align, dpo, general_sft, rpo_1
from data import aggregate
from parallel import world_size
from recipes.demo import (
    OWN_ANSWERS,
    DemoConfig,
    demo_loss,
    demo_prompts,
    demo_sft,
    demo_stage,
    demo_start,
    finished_run,
    mark,
    markdown,
)
from recipes.synthesize import Pipeline, SynthesizeConfig, identity, own_prompts, rate, synthesize
from train import choose_config, run, set_up_logging

log = logging.getLogger("nemotron4")


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
            finished_run(make())
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
            run = finished_run(align(name, replace(stage, init=str(run), data=data, out=out)))
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
    chats = [q.with_message("assistant", a["text"], a["id"]) for q, a in both]
    rewards = [float(aggregate(x)) for x in rate(p, "held_out_ratings", chats) if x]
    return {"reward": mean(rewards)} if rewards else {}


def main() -> None:
    set_up_logging()
    args = sys.argv[1:]
    args = args if args[:1] and args[0] in LOOPS else ["demo", *args]
    run(lambda: iterate(choose_config(args, LOOPS, IterateConfig.__doc__)[1]))


if __name__ == "__main__":
    main()
