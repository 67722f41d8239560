"""Align online: the policy answers prompts, its answers are marked, and it learns from the marks.

In each round the weights that are being trained go from their shards into an engine on the same
processes, without a file; every process answers a share of the round's prompts. A reward model or
a verifier marks the answers, and a few optimizer steps learn from them. A round is a function of
the weights, the seed and its number, so that a run goes on after a kill as if there had been none.

    python -m recipes.online --algorithm grpo
    torchrun --nproc_per_node 8 -m recipes.online own --init runs/sft --data prompts.jsonl \
        --reward runs/reward
"""

import hashlib
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from align import (
    AlignConfig,
    MetricSums,
    Objective,
    PreferenceConfig,
    Sums,
    batches_of,
    check_mesh,
    n_known,
    preference_objective,
    row_order,
    tokenizer_of,
    with_model,
)
from data import Example, Tokenizer, write_whole
from generate import SamplingParams
from model import IGNORE, check_ranges
from parallel import Batch, Runner, from_rank_0, init_mesh, world_size
from recipes.demo import (
    STAGE,
    DemoConfig,
    markdown,
    marks,
    run_stoppable,
    tuned_start,
    with_preset,
    write_tasks,
)
from recipes.rollouts import (
    Answer,
    Prompt,
    Sampler,
    cut,
    draw,
    figures,
    judge_of,
    mean_scores,
    pair_of,
    places,
    read_answers,
    read_prompts,
    starts_of,
    token_log_probs,
    trained_parts,
    verifier_of,
    weights_of,
    write_answers,
)
from train import choose_config, fit, start

log = logging.getLogger("nemotron4")


@dataclass(frozen=True)
class OnlineConfig(AlignConfig):
    """Align a model on its own answers to prompts, which a reward model or a verifier marks; in
    rounds of sampling, marking and optimizer steps."""

    algorithm: Literal["rloo", "grpo", "rs", "dpo", "rpo"] = "rloo"
    """REINFORCE with the others' mean as baseline; normalised advantages and a clipped ratio; SFT
    on the best answer; DPO or RPO on the best and the worst."""
    samples: int = 4  # Answers to each prompt.
    batch: int = 64  # Answers per optimizer step.
    updates: int = 1  # Optimizer steps on the answers of one round.
    kl: float = 0.01
    """KL coefficient: of the mean |log π/π_ref| in RLOO's reward, of the KL term in GRPO's loss."""
    clip_ratio: float = 0.2  # Distance from 1 at which GRPO clips the ratio of new to old policy.
    beta: float = 0.1  # KL coefficient of DPO and RPO.
    eta: float = 1.0  # Factor of the gap between the two rewards (RPO).
    sft_weight: float = 0.0  # Weight of the best answer's negative log-likelihood (DPO, RPO).
    temperature: float = 1.0  # Divisor of the logits in sampling.
    max_tokens: int = 1024  # Longest answer, in tokens.
    slots: int = 64  # Answers that a process samples at once.
    reward: Path | None = None  # Folder of the reward model that marks.
    verifier: str = ""
    """Function MODULE:NAME of a prompt's row and an answer; beside a reward model it only logs.
    Default: none beside a reward model, else the ground truth of the rows."""
    demo: DemoConfig | None = None
    """Demo whose tasks and models are used; what is missing of it is made."""

    def __post_init__(self) -> None:
        """Refuse settings that no run can have."""
        super().__post_init__()
        names = ("kl", "clip_ratio", "eta", "sft_weight", "temperature")
        ranges = dict.fromkeys(names, (0, 1e4)) | {"beta": (1e-12, 1e12)}
        ranges |= dict.fromkeys(("updates", "max_tokens", "slots"), (1, 1 << 24))
        check_ranges(self, ranges | {"samples": (2 - (self.algorithm == "rs"), 1024)})
        for name, unit in (("batch", "samples"), ("save_every", "updates")):
            if getattr(self, name) % getattr(self, unit):
                both = f"{name}={getattr(self, name)}, {unit}={getattr(self, unit)}"
                raise ValueError(f"{both}: {name} must be a multiple of {unit}")
        if self.shorten:
            raise ValueError("shorten: belongs to rows with answers, these are prompts")

    @property
    def learns_at_once(self) -> bool:
        """Tell whether the one step of a round is by the weights that sampled: GRPO's ratio is 1
        then, and what a token's log-probability was is what it is."""
        return self.algorithm == "grpo" and self.updates == 1


# ---- what is learnt ------------------------------------------------------------------------------


def leave_one_out(rewards: Tensor, finished: Tensor) -> Tensor:
    """Return each answer's baseline, (P, n): the mean reward of the others to its prompt that have
    come to their end, or where there are none its own."""
    kept = rewards * finished
    others = finished.sum(1, keepdim=True) - finished.to(rewards.dtype)
    mean = (kept.sum(1, keepdim=True) - kept) / others.clamp(min=1)
    return torch.where(others > 0, mean, rewards)


def advantages(algorithm: str, rewards: Tensor, finished: Tensor, penalty: Tensor) -> Tensor:
    """Return each answer's weight, (P, n), from rewards, which answers have come to their end, and
    a penalty (RLOO). Of several best answers, rejection sampling takes the first."""
    if algorithm == "rloo":
        return rewards - penalty - leave_one_out(rewards, finished)
    if algorithm == "grpo":
        spread = rewards.std(1, keepdim=True) + 1e-4
        return (rewards - rewards.mean(1, keepdim=True)) / spread
    best = rewards.argmax(1, keepdim=True)
    return torch.zeros_like(rewards).scatter(1, best, 1.0)


def policy_loss(log_probs: Tensor, old: Tensor, advantage: Tensor, clip: float | None) -> Tensor:
    """Return the loss of each token: −A log π; or with a clip ε, and the ratio ρ to the policy that
    sampled it, −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) (arXiv 1707.06347)."""
    if clip is None:
        return -advantage * log_probs
    ratio = (log_probs - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def kl_estimate(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Return r − 1 − log r of each token, r = π_ref/π: an estimate of KL(π ‖ π_ref) that is never
    negative (arXiv 2402.03300)."""
    log_ratio = reference - log_probs
    return log_ratio.expm1() - log_ratio


def policy_objective(cfg: OnlineConfig) -> Objective:
    """Return the objective of RLOO, GRPO and rejection sampling: a mean over all answers' tokens,
    of which those of one answer have the same advantage."""
    clip = cfg.clip_ratio if cfg.algorithm == "grpo" else None
    kl = cfg.kl if cfg.algorithm == "grpo" else 0.0

    def measure(log_probs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Sums]:
        """Sum the loss of a micro-batch; `clipped` counts the tokens that no longer learn. Where no
        `old` is known, the policy that sampled is the one that learns."""
        trained = batch["targets"] != IGNORE
        advantage = batch["labels"][..., 0].gather(1, batch["documents"].clamp(min=0))
        now = log_probs.detach()
        old = batch.get("old", now)
        loss = policy_loss(log_probs, old, advantage, clip)
        estimate = kl_estimate(log_probs, batch["reference"]) if kl else torch.zeros_like(loss)
        ratio = (now - old).exp()
        clipped = ((ratio - 1) * advantage.sign() > (torch.inf if clip is None else clip)) & trained
        total = torch.where(trained, loss + kl * estimate, 0).sum()
        sums = {"trained_tokens": trained.sum(), "clipped": clipped.sum()}
        sums["kl"] = (now - batch["reference"])[trained].sum()
        return total, sums

    names = ("trained_tokens", "clipped", "kl")
    return Objective(measure, partial(n_known, name="targets"), names, "trained_tokens")


def objective_of(cfg: OnlineConfig) -> Objective:
    """Return the objective of the algorithm."""
    how = dict(beta=cfg.beta, sft_weight=cfg.sft_weight)
    if cfg.algorithm == "dpo":
        return preference_objective(PreferenceConfig(loss="dpo", **how), rewards=True)
    if cfg.algorithm == "rpo":
        how |= dict(loss="rpo_bwd", eta=cfg.eta)
        return preference_objective(PreferenceConfig(**how), rewards=True)
    return policy_objective(cfg)


# ---- rounds --------------------------------------------------------------------------------------


class Rounds:
    """Makes the batches of an online run: samples and marks a round's answers with the weights of
    its first step, and keeps them in a file until the next round, for a run that is stopped."""

    def __init__(
        self, cfg: OnlineConfig, runner: Runner, tokenizer: Tokenizer, prompts: list[Prompt]
    ) -> None:
        """Take the runner with the weights of --init, which are the reference."""
        self.cfg = cfg
        self.runner = runner
        self.prompts = prompts
        judge = judge_of(cfg.reward, cfg, runner.mesh, cfg.slots) if cfg.reward else None
        verify = verifier_of(cfg.verifier or ("" if judge else "recipes.rollouts:ground_truth"))
        self.sampler = Sampler(runner, tokenizer, cfg.slots, cfg.seed, verify, judge)
        self.objective = objective_of(cfg)
        self.initial = {name: p.clone() for name, p in trained_parts(runner).items()}
        self.round = -1
        self.rows: list[Example] = []
        self.tokens: dict[str, list[list[float]]] = {}  # of each row: `old` and `reference`
        self.sums: np.ndarray | None = None  # log π_ref of each pair
        self.values: dict[str, float] = {}  # to be logged

    def sample(self, number: int) -> list[Answer]:
        """Make the answers of a round, with their log-probabilities by policy and reference."""
        cfg = self.cfg
        n = cfg.batch * cfg.updates // cfg.samples
        order = row_order(len(self.prompts), cfg.seed, number * n, n)
        prompts = [self.prompts[i] for i in order]
        begun = time.monotonic()
        how = SamplingParams(cfg.max_tokens, cfg.temperature, n=cfg.samples)
        answers = self.sampler.ask(prompts, f"round {number}", how)
        rows = [answer.example() for answer in answers]
        if not cfg.learns_at_once:
            for answer, found in zip(answers, token_log_probs(cfg, self.runner, rows), strict=True):
                answer.policy = found
        with weights_of(self.runner, self.initial):
            reference = token_log_probs(cfg, self.runner, rows)
        for answer, found in zip(answers, reference, strict=True):
            answer.reference = found
        seconds = time.monotonic() - begun
        shown = max(answers, key=lambda answer: answer.scores["reward"])
        asked = prompts[shown.place].messages[-1]["content"]
        log.info(f"round {number}: {seconds:.1f} s; the best: {asked!r:.80} -> {shown.text!r:.80}")
        return answers

    def enter(self, number: int, first: bool) -> None:
        """Begin a round, or go on in one at a step that is not its first."""
        if first:
            answers = self.sample(number)
            if dist.get_rank() == 0:
                write_answers(self.cfg.out, number, answers, self.cfg.updates)
        else:
            answers = from_rank_0(lambda: read_answers(self.cfg.out, number))
        self.round = number
        self.learn_from(answers)

    def learn_from(self, answers: list[Answer]) -> None:
        """Make rows of the answers as the algorithm wants them, and the figures to be logged."""
        cfg = self.cfg
        shape = (-1, cfg.samples)
        rewards = torch.tensor([a.scores["reward"] for a in answers]).double().view(shape)
        finished = torch.tensor([a.finished for a in answers]).view(shape)
        self.values = figures(answers, cfg.samples)
        if cfg.algorithm in ("dpo", "rpo"):
            self.learn_from_pairs(answers, rewards)
            return
        away = [0.0 if cfg.learns_at_once else a.divergence for a in answers]
        penalty = cfg.kl * torch.tensor(away).double().view(shape)
        weights = advantages(cfg.algorithm, rewards, finished, penalty).flatten().tolist()
        kept = [i for i, weight in enumerate(weights) if weight or cfg.algorithm != "rs"]
        self.rows = [answers[i].example(weights[i]) for i in kept]
        self.tokens["reference"] = [answers[i].reference for i in kept]
        if not cfg.learns_at_once:
            self.tokens["old"] = [answers[i].policy for i in kept]
        self.values["advantage_spread"] = float(np.std(weights))

    def learn_from_pairs(self, answers: list[Answer], rewards: Tensor) -> None:
        """Make a pair of the best and the worst answer to each prompt, unless all are alike, or
        both together are too long for a window."""
        self.rows = []
        sums = []
        n = self.cfg.samples
        for i, marked in enumerate(rewards):
            best, worst = (answers[i * n + int(k)] for k in (marked.argmax(), marked.argmin()))
            row = pair_of(best, worst)
            if marked.max() > marked.min() and row.length <= self.cfg.seq_len:
                self.rows.append(row)
                sums.append([sum(best.reference), sum(worst.reference)])
        if not self.rows:
            rule = "the answers to each prompt are alike, or two of them longer than a window"
            todo = "raise --samples, --batch, --temperature or --seq-len"
            raise ValueError(f"round {self.round}: no pair: {rule}: {todo}")
        self.sums = np.array(sums)

    def complete(self, batches: list[Batch]) -> list[Batch]:
        """Return this process's micro-batches of the step that `batches` names."""
        step = batches[0]["step"]
        number, i = divmod(step, self.cfg.updates)
        if number != self.round:
            self.enter(number, first=i == 0)
        n = len(self.rows)
        chosen = range(n * i // self.cfg.updates, n * (i + 1) // self.cfg.updates) or [i % n]
        rows = [self.rows[k] for k in chosen]
        sums = None if self.sums is None else self.sums[list(chosen)]
        out = cut(self.cfg, batches_of(self.cfg, self.runner, rows, self.objective.count, sums))
        for name, values in self.tokens.items():
            flat = torch.tensor([*chain.from_iterable(values[k] for k in chosen)])
            for batch in out:
                there, place = places(batch, starts_of(rows))
                batch[name] = torch.where(there, flat[place], 0)
        return out

    def evaluate(self, held_out: Sequence[Prompt]) -> dict[str, float]:
        """Return the mean scores of the likeliest answers to held-out prompts."""
        if not held_out:
            return {}
        greedy = SamplingParams(self.cfg.max_tokens, temperature=0.0)
        answers = self.sampler.ask(held_out, "held out", greedy)
        return {f"val_{name}": mean for name, mean in mean_scores(answers).items()}


# ---- a run ---------------------------------------------------------------------------------------


def before_each_step(runner: Runner, complete: Callable[[list[Batch]], list[Batch]]) -> None:
    """Let runner.step complete its micro-batches first, by the weights of that very step: `fit`
    asks for a step's batches before the update of the one before."""
    step = runner.step

    def completed(batches: list[Batch], loss_fn: Callable) -> Tensor:
        return step(complete(batches), loss_fn)

    runner.step = completed


def online(preset: str, cfg: OnlineConfig) -> Path:
    """Run all rounds, continuing from the newest checkpoint; return the run's folder."""
    if cfg.demo:
        cfg = with_demo(cfg)
    cfg = with_model(cfg)
    tokenizer = tokenizer_of(cfg)
    read = partial(read_prompts, tokenizer=tokenizer, seq_len=cfg.seq_len, skip_bad=cfg.skip_bad)
    prompts = read(cfg.data)
    held_out = read(cfg.val) if cfg.val else []
    rounds = math.ceil(len(prompts) * cfg.epochs * cfg.samples / (cfg.batch * cfg.updates))
    cfg = replace(cfg, steps=min(cfg.steps or rounds * cfg.updates, rounds * cfg.updates))
    check_mesh(cfg)
    keys = b"".join(prompt.ids.tobytes() for prompt in prompts)
    data = hashlib.blake2b(keys, digest_size=8).hexdigest()
    cfg, runner = start(preset, cfg, init_mesh(cfg.mesh), data, tokenizer)
    log.info(f"{cfg.steps:,} steps on {cfg.batch} answers each, {cfg.samples} a prompt")
    made = Rounds(cfg, runner, tokenizer, prompts)
    sums = MetricSums(made.objective, runner)
    before_each_step(runner, made.complete)
    fit(
        cfg,
        runner,
        lambda step: [{"step": step}],
        sums.loss_fn,
        lambda step: made.evaluate(held_out[: cfg.eval_batches * cfg.batch]),
        lambda step: f"round {step // cfg.updates}",
        lambda: sums.take() | made.values,
    )
    if dist.get_rank() == 0:
        draw(cfg.out)
    if cfg.demo and world_size() == 1 and not runner.asked:
        compare(cfg)
    return cfg.out


def with_demo(cfg: OnlineConfig) -> OnlineConfig:
    """Name the demo's SFT model and tasks, which are made if need be."""
    model = tuned_start(cfg.demo)
    held_out = write_tasks(cfg.demo, "held_out", 200, held_out=True)
    data = write_tasks(cfg.demo, "online", 4000)
    return replace(cfg, init=str(model), data=data, val=held_out)


def compare(cfg: OnlineConfig) -> None:
    """Mark the demo's model before and after the run, as the tour does, and write a table."""
    rows = {}
    for name, model in (("before", Path(cfg.init)), ("after", cfg.out)):
        rows[name] = marks(cfg.demo, model, cfg.demo.out / "reward")
    text = markdown(rows, cfg.algorithm) + "\n"
    write_whole(cfg.out / "table.md", text)
    log.info(text)


def toys() -> OnlineConfig:
    """Use the demo's tasks and its SFT model, on a laptop; this is what runs if none is named."""
    settings = STAGE | dict(save_every=50, eval_every=25)
    return OnlineConfig(
        lr=1e-4, batch=128, samples=4, steps=100, max_tokens=40, verifier="recipes.demo:mark",
        demo=DemoConfig(), **settings,
    )  # fmt: skip


def own() -> OnlineConfig:
    """Use a model and prompts of yours: set --init, --data, and --reward or --verifier."""
    # NeMo-Aligner's REINFORCE: 512 answers a round, four a prompt, 64 a step
    return OnlineConfig(lr=1e-6, weight_decay=0.01, batch=64, samples=4, updates=8, save_every=64)


PRESETS = {"demo": toys, "own": own}


def main() -> None:
    sys.argv[0] = "python -m recipes.online"  # as the help names it
    parse = partial(
        choose_config, with_preset("demo"), PRESETS, " ".join(OnlineConfig.__doc__.split())
    )
    run_stoppable(lambda: online(*parse()))


if __name__ == "__main__":
    main()
