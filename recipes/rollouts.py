"""Answers of the weights that are being trained, and their marks: what recipes.online learns from.

The weights go from their shards into an engine on the same processes, without a file. Every process
holds the whole model for the while, answers a share of the prompts, and marks its answers with a
reward model or with a verifier, a function of the prompt's row and the answer.
"""

import hashlib
import importlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from align import AlignConfig, batches_of, check_mesh, n_known
from data import (
    Example,
    Messages,
    Tokenizer,
    check_messages,
    messages_of,
    read_records,
    render_chat,
    render_reward,
    required,
    write_whole,
)
from generate import Engine, EngineConfig, SamplingParams, dtypes_of, model_tokenizer, named_scores
from parallel import (
    DTYPES,
    Batch,
    Runner,
    full_shapes,
    local_part,
    on_meta,
    read_config,
    step_folders,
    world_size,
)
from recipes import verify
from recipes.report import can_draw, draw_curve, picture

log = logging.getLogger("nemotron4")
Verifier = Callable[[dict[str, Any], str], float]  # (a prompt's row, an answer) → its reward


# ---- prompts and verifiers -----------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """Holds a prompt: its row, its messages, and their tokens."""

    row: dict[str, Any]
    messages: Messages
    ids: np.ndarray


def read_prompts(path: Path, tokenizer: Tokenizer, seq_len: int, skip_bad: bool) -> list[Prompt]:
    """Read rows of a `prompt`, a text or messages, or of `messages`; what else a row has is the
    verifier's. A prompt that leaves no room for an answer is left out."""
    prompts = []
    long = 0
    for where, row in read_records(path):
        try:
            name = "messages" if "messages" in row else "prompt"
            messages = messages_of(required(row, name), "user")
            check_messages(messages)
            if messages[-1]["role"] != "user":
                raise ValueError("the last message is not the user's")
        except ValueError as e:
            if not skip_bad:
                raise ValueError(f"{where}: {e}") from e
            log.warning(f"left out: {where}: {e}")
            continue
        ids, _ = render_chat(messages, tokenizer)
        if len(ids) + 2 > seq_len:
            long += 1
        else:
            prompts.append(Prompt(row, messages, ids))
    if not prompts:
        raise ValueError(f"{path}: no prompt left, {long} were too long: raise --seq-len")
    log.info(f"{path}: {len(prompts):,} prompts; {long:,} are too long")
    return prompts


def ground_truth(row: dict[str, Any], text: str) -> float:
    """Return 1 for an answer that obeys what its row knows: `answer`, a number or formula; `tests`,
    Python that must pass; or `instructions`. Else 0."""
    if "answer" in row:
        return float(bool(verify.same_number(text, str(row["answer"]))))
    if "tests" in row:
        code = verify.extract_code(text)
        program = f"{code}\n{row['tests']}\n"
        return float(code is not None and verify.run_python(program).reason == "ok")
    asked = [verify.Instruction(**one) for one in required(row, "instructions", list)]
    return float(all(one.met(text, str(row.get("prompt", ""))) for one in asked))


def verifier_of(name: str) -> Verifier | None:
    """Import the function MODULE:NAME, if one is named."""
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise ValueError(f"verifier={name}: {e}: name a function as MODULE:NAME") from e


# ---- engines -------------------------------------------------------------------------------------


def whole_weights(runner: Runner) -> dict[str, Tensor]:
    """Gather the whole model's parameters on each process, from the shards of all pipeline stages;
    adapters are merged."""
    own = runner.params()
    group = runner.mesh["pp"].get_group()
    holders: list[Any] = [None] * runner.mesh["pp"].size()
    dist.all_gather_object(holders, list(own), group=group)
    whole = {}
    for name, shape in full_shapes(runner.model).items():
        if name in own:
            whole[name] = own[name].detach().full_tensor()
        else:
            whole[name] = torch.empty(shape, device=runner.device)
        if len(holders) > 1:
            source = next(i for i, names in enumerate(holders) if name in names)
            dist.broadcast(whole[name], group=group, group_src=source)
    for name in [name for name in whole if name.endswith("lora_a")]:
        a = whole.pop(name)
        b = whole.pop(name.replace("lora_a", "lora_b"))
        merged = name[:-6] + "weight"
        whole[merged] = whole[merged] + runner.model.lora_alpha / runner.model.lora_rank * (b @ a)
    return whole


def engine_of(runner: Runner, tokenizer: Tokenizer, slots: int) -> Engine:
    """Build an engine around a copy of the weights that the runner holds now."""
    model = on_meta(replace(runner.model, lora_rank=0))
    dtypes = dtypes_of(model, DTYPES[runner.cfg.compute_dtype])
    weights = {name: p.to(dtypes[name]) for name, p in whole_weights(runner).items()}
    model.load_state_dict(weights, assign=True)
    return Engine(model, tokenizer, slots)


def judge_of(folder: Path, cfg: AlignConfig, mesh: DeviceMesh, slots: int) -> Engine:
    """Load a reward model, whole, on each process."""
    model = replace(read_config(folder), lora_rank=0)
    if not model.n_attributes:
        raise ValueError(f"{folder} is a language model: name a reward model, which marks")
    tokenizer = model_tokenizer(EngineConfig(folder), model)
    check_mesh(replace(cfg, model=model))
    runner = Runner(model, cfg.mesh, mesh, cfg.micro_batch, cfg.seed)
    runner.load_weights(folder)
    return engine_of(runner, tokenizer, slots)


# ---- answers -------------------------------------------------------------------------------------


@dataclass
class Answer:
    """Holds an answer to the prompt at `place` in its round, and all that is known of it."""

    place: int
    ids: list[int]  # of prompt and answer
    n_prompt: int
    text: str
    finished: bool  # by its own end, not by max_tokens
    scores: dict[str, float]
    # log-probability of the token after each of ids, zero within the prompt
    policy: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.ids) - self.n_prompt

    @property
    def divergence(self) -> float:
        """Return the mean |log π/π_ref| of the answer's tokens."""
        return float(np.abs(np.subtract(self.policy, self.reference)).sum()) / self.length

    def example(self, weight: float = 0.0) -> Example:
        """Return a row of one segment, with a weight as its value."""
        trained = np.arange(len(self.ids)) >= self.n_prompt
        ids = np.array(self.ids, np.int32)
        return Example((ids,), (trained,), np.float32([weight]), f"prompt {self.place}")


@dataclass(frozen=True)
class Sampler:
    """Samples answers with the weights that a runner holds now, and has them marked."""

    runner: Runner
    tokenizer: Tokenizer
    slots: int
    seed: int
    verify: Verifier | None
    judge: Engine | None

    def ask(self, prompts: Sequence[Prompt], label: str, params: SamplingParams) -> list[Answer]:
        """Return the n answers to each prompt. Each process samples and marks a share of them; what
        comes out is a function of the weights, the seed, the label and the prompt's place."""
        engine = engine_of(self.runner, self.tokenizer, self.slots)
        stop = self.tokenizer.special("<extra_id_1>")
        own = range(dist.get_rank(), len(prompts), world_size())
        running = []
        for place in own:
            key = hashlib.blake2b(f"{self.seed}/{label}/{place}".encode(), digest_size=6)
            seed = int.from_bytes(key.digest(), "big")
            how = replace(params, seed=seed, stop_ids=(stop,))
            running.append(engine.submit(prompts[place].ids, how))
        answers = []
        for place, sequences in zip(own, running, strict=True):
            for done in engine.finished(sequences):
                ended = done.finish_reason == "stop"
                ids = [*prompts[place].ids.tolist(), *done.ids, *[stop] * ended]
                answers.append(Answer(place, ids, done.n_prompt, done.text.strip(), ended, {}))
        self.mark(prompts, answers)
        shares: list[Any] = [None] * world_size()
        dist.all_gather_object(shares, answers)
        return sorted(sum(shares, []), key=lambda answer: answer.place)

    def mark(self, prompts: Sequence[Prompt], answers: list[Answer]) -> None:
        """Fill in the scores: the verifier's as `verified`, and as `reward` that of the reward
        model, with its attributes, or where there is none the verifier's."""
        running = []
        for answer in answers:
            prompt = prompts[answer.place]
            if self.verify:
                verified = float(self.verify(prompt.row, answer.text))
                answer.scores = {"verified": verified, "reward": verified}
            if self.judge:
                said = {"role": "assistant", "content": answer.text or "-"}
                ids = render_reward([*prompt.messages, said], self.judge.tokenizer)
                last = ids[-self.judge.context :]
                running += self.judge.submit(last, SamplingParams(max_tokens=0))
        if self.judge:
            for answer, done in zip(answers, self.judge.finished(running), strict=True):
                answer.scores |= named_scores(done.scores)


def pair_of(best: Answer, worst: Answer) -> Example:
    """Return two answers to one prompt as a row with their rewards."""
    rows = [answer.example(answer.scores["reward"]) for answer in (best, worst)]
    values = np.concatenate([row.values for row in rows])
    ids = rows[0].ids + rows[1].ids
    return Example(ids, rows[0].trained + rows[1].trained, values, f"prompt {best.place}")


# ---- log-probabilities ---------------------------------------------------------------------------


def places(batch: dict[str, Any], starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return which tokens (B, T) of a batch belong to a row, and their places in all rows of one
    segment, one behind the other. starts: where each row begins."""
    documents, rows, positions = (
        torch.as_tensor(batch[k]) for k in ("documents", "rows", "positions")
    )
    there = documents >= 0
    row = rows.gather(1, documents.clamp(min=0))
    return there, torch.where(there, starts[row] + positions, 0)


def starts_of(rows: Sequence[Example], device: torch.device | None = None) -> Tensor:
    lengths = [0, *(row.length for row in rows)]
    return torch.tensor(lengths, device=device).cumsum(0)


def cut(cfg: AlignConfig, batches: list[Batch]) -> list[Batch]:
    """Cut the ends of windows in which no micro-batch has a token: answers are far shorter than
    what a window can hold. A pipeline's windows have one length."""
    if cfg.mesh.pp > 1:
        return batches
    used = [np.flatnonzero((batch["documents"] >= 0).any(0)) for batch in batches]
    longest = max(int(places[-1]) + 1 if len(places) else 1 for places in used)
    end = min(cfg.model.seq_len, -(-longest // 64) * 64)
    out = []
    for batch in batches:
        names = ("tokens", "targets", "positions", "documents")
        out.append(batch | {name: batch[name][:, :end] for name in names})
    return out


def token_log_probs(cfg: AlignConfig, runner: Runner, rows: list[Example]) -> list[list[float]]:
    """Run the runner's weights over rows of one segment; return the log-probability of the token
    after each of theirs, zero where nothing is trained."""
    starts = starts_of(rows, runner.device)
    out = torch.zeros(int(starts[-1]), device=runner.device)

    def collect(first: int, log_probs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        there, place = places(batch, starts[first:])
        out[place[there]] = log_probs[there].to(out.dtype)
        return log_probs.new_zeros(())

    count = partial(n_known, name="targets")
    for i in range(0, len(rows), cfg.batch):
        batches = batches_of(cfg, runner, rows[i : i + cfg.batch], count)
        runner.eval(cut(cfg, batches), partial(collect, i))
    found = runner.reduce(out, "dp_replicate", "dp_shard", "pp").cpu()
    return [part.tolist() for part in found.tensor_split(starts[1:-1].cpu())]


@contextmanager
def weights_of(runner: Runner, others: dict[str, Tensor]) -> Iterator[None]:
    """Let the runner compute with other values of its trained parameters, for a while."""

    def exchange() -> None:
        for name, p in trained_parts(runner).items():
            ours = p.clone()
            p.copy_(others[name])
            others[name].copy_(ours)

    with torch.no_grad():
        exchange()
        yield
        exchange()


def trained_parts(runner: Runner) -> dict[str, Tensor]:
    """Return this process's part of each parameter that is trained."""
    params = runner.params().items()
    return {name: local_part(p.detach())[0] for name, p in params if p.requires_grad}


# ---- files ---------------------------------------------------------------------------------------


def answer_file(run: Path, number: int) -> Path:
    return run / "rollouts" / f"round_{number:06d}.jsonl"


def write_answers(run: Path, number: int, answers: list[Answer], updates: int) -> None:
    """Write a round's answers; remove those that no checkpoint needs to go on from."""
    file = answer_file(run, number)
    steps = [int(folder.name[5:]) for folder in step_folders(run / "checkpoints")]
    needed = {file, *(answer_file(run, step // updates) for step in steps if step % updates)}
    file.parent.mkdir(exist_ok=True)
    write_whole(file, (json.dumps(asdict(answer)) for answer in answers))
    for other in set(file.parent.glob("round_*.jsonl")) - needed:
        other.unlink()


def read_answers(run: Path, number: int) -> list[Answer]:
    """Read the answers of a round in which a run was stopped."""
    file = answer_file(run, number)
    if not file.exists():
        raise ValueError(f"{file} is missing: the run was stopped in this round, and needs it")
    return [Answer(**row) for _, row in read_records(file)]


# ---- what is logged ------------------------------------------------------------------------------


def mean_scores(answers: list[Answer]) -> dict[str, float]:
    """Return the mean of each score that the answers have."""
    means = {}
    for name in answers[0].scores:
        means[name] = float(np.mean([answer.scores[name] for answer in answers]))
    return means


def figures(answers: list[Answer], samples: int) -> dict[str, float]:
    """Return what is logged of a round: scores, how far those of one prompt lie apart, the
    divergence from the reference, in nats a token as the sampled tokens estimate it, length, and
    the share that came to an end."""
    lengths = [answer.length for answer in answers]
    rewards = np.array([answer.scores["reward"] for answer in answers])
    known = {}
    if answers[0].policy:  # else the step measures it
        policy = sum(sum(answer.policy) for answer in answers) / sum(lengths)
        reference = sum(sum(answer.reference) for answer in answers) / sum(lengths)
        known = {"kl": policy - reference}
    return (
        mean_scores(answers)
        | known
        | {
            "reward_spread": float(rewards.reshape(-1, samples).std(1).mean()),
            "length": float(np.mean(lengths)),
            "finished": sum(answer.finished for answer in answers) / len(answers),
        }
    )


DRAWN = {
    "mean reward (points: validation)": {"reward": "judge", "verified": "verifier"},
    "KL divergence, nats a token": {"kl": ""},
    "length, tokens": {"length": ""},
    "entropy, nats a token": {"entropy": ""},
}


def draw(run: Path) -> None:
    """Draw a run's rewards, divergence, length and entropy over its steps into online.png. A reward
    that is another's, as where the verifier is the judge, is left out."""
    if not can_draw():
        return
    rows = [row for _, row in read_records(run / "metrics.jsonl")]

    def curve(name: str) -> tuple[list[float], list[float]]:
        known = [row for row in rows if row.get(name) is not None]
        return [row["step"] for row in known], [row[name] for row in known]

    with picture(run / "online.png", len(DRAWN)) as panels:
        for panel, (title, labels) in zip(panels, DRAWN.items(), strict=True):
            seen = []
            for i, (name, label) in enumerate(labels.items()):
                steps, values = curve(name)
                if not values or values in seen:
                    continue
                seen.append(values)
                draw_curve(panel, steps, values, label, color=f"C{i}", lw=1.6)
                panel.plot(*curve(f"val_{name}"), "o", ms=4.5, color=f"C{i}")
            panel.set(title=title, xlabel="step")
            if len(seen) > 1:
                panel.legend()
