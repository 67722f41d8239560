"""One engine that samples, chats, scores, evaluates and serves the model that was trained.

Many requests share a batch: each has a row of the key-value cache, a row is refilled as soon as it
is done, a prefix that another row has already computed is copied. What a request yields depends on
its own seed and positions, never on what it is batched with.

    python generate.py sample runs/nano --prompts "import os" "def main" --max-tokens 64
    python generate.py chat path/to/a/Nemotron/folder
    python generate.py serve runs/nano --port 8000
"""
# Shapes in comments: N rows  T tokens  S key slots  D dim  V vocab_size, as in model.py

import hashlib
import itertools
import json
import logging
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from data import (
    ATTRIBUTES,
    Tokenizer,
    aggregate,
    embedded_english,
    load_tokenizer,
    render_chat,
    render_reward,
)
from model import ModelConfig, Nemotron, RewardHead
from parallel import (
    DTYPES,
    MeshConfig,
    fp32_logits,
    init_mesh,
    load_parts,
    on_meta,
    project,
    read_config,
    shut_down,
    split_layers,
    tp_cuts,
    world_size,
)

log = logging.getLogger("nemotron4")


# ---- the model, laid out for inference -----------------------------------------------------------


class Linear(nn.Module):
    """A matrix, or its share; weight-only int8 or float8 with a scale for each row, if quantized.
    summed: over these processes, the last part of a tensor-parallel pair."""

    def __init__(self, weight: Tensor, summed: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale: Tensor | None = None
        self.summed = summed

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            y = project(x, self.weight)
        elif self.weight.dtype == torch.int8 and x.dtype == torch.bfloat16 and not x.is_cuda:
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale)
            y = y.view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        if self.summed is not None:
            dist.all_reduce(y, group=self.summed)
        return y

    def quantize(self, kind: str) -> None:
        dtype, top = {"int8": (torch.int8, 127), "float8": (torch.float8_e4m3fn, 448)}[kind]
        weight = self.weight.float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / top
        scaled = weight / scale
        scaled = scaled.round() if kind == "int8" else scaled
        self.scale = scale[:, 0].to(self.weight.dtype)
        self.weight = nn.Parameter(scaled.to(dtype), requires_grad=False)


class Embedding(nn.Module):
    """This rank's words; the others' are theirs to add."""

    def __init__(self, weight: Tensor, tp: DeviceMesh) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.group, self.first = tp.get_group(), tp.get_local_rank() * len(weight)

    def forward(self, ids: Tensor) -> Tensor:
        mine = ids - self.first
        here = (mine >= 0) & (mine < len(self.weight))
        h = F.embedding(mine.clamp(0, len(self.weight) - 1), self.weight) * here[..., None]
        dist.all_reduce(h, group=self.group)
        return h


def lay_out(cfg: ModelConfig, parts: dict[str, Tensor], tp: DeviceMesh | None) -> Nemotron:
    """A Nemotron around these tensors, a stage's layers and a tensor-parallel rank's share of them.
    The plan is parallel.py's; without a sequence to divide, plain tensors and an all-reduce do."""
    model, cuts = on_meta(cfg), tp_cuts(cfg) if tp is not None else {}
    for name in ("embed", "norm", "head"):
        if f"{name}.weight" not in parts:
            setattr(model, name, None)
    here = {key for key in model.blocks if f"blocks.{key}.attn.wq.weight" in parts}
    model.blocks = nn.ModuleDict({key: b for key, b in model.blocks.items() if key in here})
    for path, module in list(model.named_modules()):
        name = f"{path}.weight"
        if isinstance(module, nn.Linear) and not isinstance(module, RewardHead):
            summed = tp.get_group() if cuts.get(name) == 1 else None
            model.set_submodule(path, Linear(parts[name], summed))
        elif name in cuts:
            model.embed = Embedding(parts[name], tp)
    model.load_state_dict(parts, assign=True)
    return model.requires_grad_(False).eval()


# ---- keys and values -----------------------------------------------------------------------------


class Cache:
    """Keys and values of n slots (rows), preallocated. Within a row, slot = position; what pads a
    batch goes behind the last. model.py calls `extend` for the rows that `select` chose."""

    def __init__(self, model: Nemotron, like: Tensor, tp: int, slots: int, context: int) -> None:
        cfg, n = model.cfg, len(model.blocks)
        # heads before positions: each reads its own from one stretch of memory
        shape = (n, 2, slots, cfg.n_kv_heads // tp, context + 1, cfg.head_dim)
        # CPUs attend faster in fp32; zeros, as a masked slot must hold a number: 0 x NaN is NaN
        self.dtype = like.dtype if like.is_cuda else torch.promote_types(like.dtype, torch.float32)
        self.kv = torch.zeros(shape, dtype=self.dtype, device=like.device)
        self.layers = {int(layer): i for i, layer in enumerate(model.blocks)}

    def select(self, rows: slice, n_keys: int) -> None:
        self.rows, self.n_keys = rows, n_keys
        self.index = torch.arange(rows.start, rows.stop, device=self.kv.device)[:, None]

    def extend(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.kv[self.layers[layer]]
        keys[self.index, :, positions] = k.to(self.dtype)
        values[self.index, :, positions] = v.to(self.dtype)
        return tuple(t[self.rows, :, : self.n_keys].transpose(1, 2) for t in (keys, values))


# ---- sampling ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingParams:
    """How a request is sampled. The filters apply in transformers' order: repetition penalty,
    temperature, top_k, top_p, min_p, each to what the one before left."""

    max_tokens: int = 256
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # Keep the likeliest tokens that together reach this probability
    top_k: int = 0  # Keep the k likeliest; 0: all
    min_p: float = 0.0  # Keep what is at least this share of the likeliest's probability
    repetition_penalty: float = 1.0
    """Divides a positive logit (multiplies a negative one) of each token that occurred before."""
    n: int = 1  # Samples of each prompt; they differ in their random stream
    seed: int = 0  # A sample is a function of (prompt, seed, its number) alone
    stop: tuple[str, ...] = ()  # Texts that end a sample; not part of it
    stop_ids: tuple[int, ...] | None = None
    """Tokens that end a sample; default: the tokenizer's </s>."""
    logprobs: int | None = None
    """Log-probabilities, before any filter, of each token and of that many likeliest ones."""
    echo: bool = False
    """The prompt is part of the result, with its own log-probabilities if asked for."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_tokens", 0, 1 << 31), ("temperature", 0, 1e4), ("top_p", 1e-6, 1), ("n", 1, 1024),
            ("top_k", 0, 1 << 31), ("repetition_penalty", 0.01, 100), ("min_p", 0, 1),
        ):  # fmt: skip
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name}={value}: must be in {low:g}..{high:g}")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise ValueError(f"logprobs={self.logprobs}: must be in 0..20")
        if isinstance(self.stop, str) or "" in self.stop:
            raise ValueError(f"stop={self.stop!r}: texts, none of them empty")


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in (0, 1) of these three alone."""
    digest = hashlib.blake2b(f"{seed}/{sample}/{position}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**32


def keep_likeliest(p: Tensor, mass: Tensor) -> Tensor:
    """p (N, V) → p where the likeliest tokens that together reach mass (N) are, else 0."""
    for n in (min(256, p.shape[1]), p.shape[1]):  # few tokens nearly always do
        top, index = p.topk(n)
        total = top.cumsum(1)
        if n == p.shape[1] or bool((total[:, -1] >= mass).all()):
            break
    top = top.masked_fill(total - top >= mass[:, None], 0)
    return torch.zeros_like(p).scatter_(1, index, top)


def sample(
    logits: Tensor, params: list[SamplingParams], seen: list[list[int]], u: list[float]
) -> Tensor:
    """One token of each row: logits fp32 (N, V), the tokens before, a uniform number → ids (N).

    By the inverse of the distribution function, in the vocabulary's order: one number a token, so
    that neither the batch nor the size of the vocabulary enters.
    """
    column = lambda name: logits.new_tensor([getattr(p, name) for p in params])  # noqa: E731
    if any(p.repetition_penalty != 1 for p in params):
        logits = logits.clone()
        for row, p, ids in zip(logits, params, seen, strict=True):
            at = torch.tensor(sorted(set(ids)), device=row.device)
            x, penalty = row[at], p.repetition_penalty
            row[at] = torch.where(x > 0, x / penalty, x * penalty)
    best = logits.argmax(1)
    temperature = column("temperature")
    if not temperature.any():
        return best
    x = logits / temperature.clamp(min=1e-6)[:, None]
    if largest := max(p.top_k for p in params):
        top = x.topk(min(largest, x.shape[1])).values
        k = column("top_k").long().clamp(max=x.shape[1])
        least = top.gather(1, (k[:, None] - 1).clamp(min=0))
        x = x.masked_fill((x < least) & (k > 0)[:, None], -torch.inf)
    probs = x.softmax(1)
    if min(p.top_p for p in params) < 1:
        top_p = column("top_p")
        probs = torch.where((top_p < 1)[:, None], keep_likeliest(probs, top_p), probs)
    if any(p.min_p for p in params):
        low = probs.amax(1, keepdim=True) * column("min_p")[:, None]
        probs = probs.masked_fill(probs < low, 0)
    total = probs.double().cumsum(1)
    at = torch.tensor(u, dtype=torch.float64, device=probs.device)[:, None] * total[:, -1:]
    drawn = torch.searchsorted(total, at, right=True)[:, 0]
    return torch.where(temperature > 0, drawn, best)


class TextStream:
    """Token ids → text as it becomes certain. Held back: a character whose bytes are not all there,
    and what may be the beginning of a stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.ids: list[int] = []  # those still needed to decode what follows
        self.taken = 0  # characters of their text that have been taken
        self.held = ""

    def push(self, token: int) -> str:
        """→ the text that is now certain; `stopped` once a stop text was met."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        # at most three replacement characters at the end may yet become one character
        certain = max(len(text.rstrip("\ufffd")), len(text) - 3)
        self.held += text[self.taken : certain]
        self.taken = max(self.taken, certain)
        if certain == len(text) and len(self.ids) > 8:
            self.ids = self.ids[-1:]
            self.taken = len(self.tokenizer.decode(self.ids))
        return self.release()

    def finish(self) -> str:
        """→ the rest."""
        self.held += self.tokenizer.decode(self.ids)[self.taken :]
        self.ids, self.taken = [], 0
        return self.release(final=True)

    def release(self, final: bool = False) -> str:
        if self.stopped:
            return ""
        if found := [at for at in map(self.held.find, self.stop) if at >= 0]:
            self.stopped = True
            return self.held[: min(found)]

        def begins(n: int) -> bool:  # whether the last n characters may begin a stop text
            return any(stop[:n] == self.held[-n:] for stop in self.stop if len(stop) > n)

        keep = 0 if final else max(filter(begins, range(1, len(self.held) + 1)), default=0)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out


# ---- the engine ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Completion:
    """One sample of one prompt, as far as it has come."""

    index: int  # Its number among the prompt's samples
    n_prompt: int
    ids: list[int] = field(default_factory=list)
    """Tokens, without the one that stopped it; after those of the prompt with echo."""
    text: str = ""
    finish_reason: Literal["", "stop", "length", "cancelled"] = ""
    logprobs: list[float | None] = field(default_factory=list)
    """Of each of ids, if asked for; None for a first token, which nothing predicts."""
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    """The likeliest tokens in its place, and their log-probabilities."""
    scores: list[float] = field(default_factory=list)  # A reward model's attributes of the prompt
    cached: int = 0  # Prompt tokens whose keys and values another row had computed


Listener = Callable[[Completion, str], None]


@dataclass(eq=False)
class Sequence:
    """A completion in the making, in a slot of the cache or waiting for one."""

    ids: list[int]  # prompt and what was sampled
    params: SamplingParams
    out: Completion
    stop_ids: tuple[int, ...]
    stream: TextStream | None
    listener: Listener | None
    score_from: int  # positions from here on want their log-probabilities
    done: int = 0  # tokens whose keys and values are in the cache


Prompt = str | list[int] | np.ndarray
Wanted = tuple[
    Sequence, int, int
]  # a row, the state that the head is to read, the position it predicts


class Engine:
    """A continuous batch over one copy of a model, on one process or on tp x pp of them, which then
    all call the same methods with the same arguments.

    Slots are ordered: those that decode, those that read their prompts, those that are free. A free
    slot keeps the keys of what it last held, for a later prompt that begins alike.
    """

    def __init__(
        self,
        model: Nemotron,
        tokenizer: Tokenizer | None = None,
        slots: int = 32,
        context: int = 0,
        chunk: int = 512,
        mesh: DeviceMesh | None = None,
    ) -> None:
        """model: a Nemotron, whole; with a mesh, this process's part by `load_engine`. context: the
        longest prompt and answer, by default the model's seq_len. chunk: prompt tokens computed
        between two tokens of the rows that decode."""
        self.cfg, self.tokenizer, self.chunk, self.mesh = model.cfg, tokenizer, chunk, mesh
        self.context = context or self.cfg.seq_len
        if slots < 1 or chunk < 1 or not 1 <= self.context <= self.cfg.seq_len:
            rule = f"slots and chunk at least 1, context in 1..{self.cfg.seq_len} (seq_len)"
            raise ValueError(f"slots={slots}, chunk={chunk}, context={context}: {rule}")
        if mesh is None:
            model = lay_out(self.cfg, dict(model.state_dict()), None)
        self.model = model
        self.tp, self.pp = (mesh["tp"].size(), mesh["pp"].size()) if mesh else (1, 1)
        self.stage = mesh["pp"].get_local_rank() if mesh else 0
        self.world = self.tp * self.pp
        self.leads = self.world == 1 or dist.get_rank() == 0
        weight = next(m.weight for m in model.modules() if isinstance(m, Linear))
        self.dtype, self.device = weight.dtype, weight.device
        self.cache = Cache(model, weight, self.tp, slots, self.context)
        self.slots: list[Sequence | None] = [None] * slots
        self.decoding = self.active = 0  # slots [0, decoding) and [decoding, active)
        # what each slot's keys are of, and how many of them are computed
        self.tokens = np.full((slots, self.context), -1, np.int32)
        self.computed = np.zeros(slots, np.int64)
        self.freed = np.zeros(slots, np.int64)  # at which step
        self.waiting: deque[Sequence] = deque()
        self.steps = self.prompt_tokens = self.new_tokens = self.cached_tokens = 0

    # -- requests

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids that may be given to the model, or a ValueError."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("a text needs a tokenizer: Engine(model, tokenizer)")
            prompt = self.tokenizer.encode(prompt)
        ids = [int(i) for i in prompt]
        if not ids:
            raise ValueError("an empty prompt: give at least one token")
        if len(ids) > self.context:
            raise ValueError(f"the prompt has {len(ids)} tokens, the context {self.context}")
        if wrong := [i for i in ids if not 0 <= i < self.cfg.vocab_size]:
            raise ValueError(f"token {wrong[0]} is not in 0..{self.cfg.vocab_size - 1}")
        return ids

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        listener: Listener | None = None,
        score_from: int | None = None,
    ) -> list[Sequence]:
        """Queue a prompt; its n rows. listener(completion, new text) is told of every step that
        adds to one, the last time with its finish_reason. score_from: log-probabilities of the
        prompt from this token on alone (echo asks for all)."""
        ids, stop_ids = self.encode(prompt), params.stop_ids
        if stop_ids is None:
            stop_ids = (self.tokenizer.special("</s>"),) if self.tokenizer else ()
        if params.stop and self.tokenizer is None:
            raise ValueError("stop texts need a tokenizer: Engine(model, tokenizer)")
        if params.echo and params.logprobs is not None:
            score_from = 1
        first = len(ids) if score_from is None else min(len(ids), max(1, score_from))
        rows = []
        for i in range(params.n):
            out, stream = Completion(i, len(ids)), None
            if self.tokenizer:
                stream = TextStream(self.tokenizer, params.stop)
            if params.echo:
                out.ids, out.text = list(ids), self.tokenizer.decode(ids) if self.tokenizer else ""
                if params.logprobs is not None:
                    out.logprobs, out.tops = [None], [[]]
            rows.append(Sequence(list(ids), params, out, stop_ids, stream, listener, first))
        self.waiting.extend(rows)
        return rows

    def cancel(self, row: Sequence) -> None:
        """It ends here, and leaves its slot at the next step."""
        if not row.out.finish_reason:
            self.tell(row, "", "cancelled")

    @property
    def busy(self) -> bool:
        return bool(self.active or self.waiting)

    def generate(
        self, prompts: Iterable[Prompt], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Prompts → completions in their order, the n of each one after the other."""
        rows = [r for prompt in prompts for r in self.submit(prompt, params or SamplingParams())]
        return list(self.finished(rows))

    def finished(self, rows: list[Sequence]) -> Iterator[Completion]:
        """Work until each is done, in their order."""
        for row in rows:
            while not row.out.finish_reason:
                self.step()
            yield row.out

    def submit_pair(self, context: list[int], continuation: list[int]) -> Sequence:
        """For the log-probabilities of the continuation, and the likeliest tokens in its place."""
        ask = SamplingParams(max_tokens=0, logprobs=1, stop_ids=())
        (row,) = self.submit([*context, *continuation], ask, score_from=len(context))
        return row

    def score(self, pairs: Iterable[tuple[list[int], list[int]]]) -> list[Completion]:
        """(context, continuation) → completions whose logprobs and tops (the likeliest token) are
        the continuation's."""
        return list(self.finished([self.submit_pair(*pair) for pair in pairs]))

    # -- one step

    @torch.inference_mode()
    def step(self) -> None:
        """Admit who fits, compute a chunk of the prompts being read, then a token of every row."""
        self.steps += 1
        self.rearrange()  # some may have been cancelled
        self.waiting = deque(row for row in self.waiting if not row.out.finish_reason)
        self.admit()
        if reading := self.active - self.decoding:
            rows = range(self.decoding, self.active)
            left = max(len(self.slots[i].ids) - self.slots[i].done for i in rows)
            self.advance(rows, min(left, max(1, self.chunk // reading)))
        if self.decoding:
            self.advance(range(self.decoding), 1)

    def admit(self) -> None:
        """Free slots to those who wait, each with the longest prefix that some slot has computed. A
        row waits for another that is about to compute a longer one."""
        for row in list(itertools.islice(self.waiting, len(self.slots))):
            if self.active == len(self.slots):
                return
            ids = np.array(row.ids, np.int32)
            # the last token, and those before a token to be scored, are computed in any case
            most = min(len(ids), row.score_from) - 1
            differ = np.c_[self.tokens[:, :most] != ids[:most], np.ones(len(self.slots), bool)]
            same = differ.argmax(1)
            have = np.minimum(same, self.computed)
            if same[self.decoding : self.active].max(initial=0) <= have.max():
                self.waiting.remove(row)
                self.place(row, ids, int(have.argmax()), int(have.max()))

    def place(self, row: Sequence, ids: np.ndarray, source: int, shared: int) -> None:
        """Into the first free slot: the source itself, if it is free and would not forget more than
        is shared; else the one longest unused."""
        slot = self.active
        if source >= slot and 2 * shared > self.computed[source]:
            self.swap(source, slot)
        else:
            oldest = slot + int(self.freed[slot:].argmin())
            self.swap(oldest, slot)
            source = oldest if source == slot else slot if source == oldest else source
            self.cache.kv[:, :, slot, :, :shared] = self.cache.kv[:, :, source, :, :shared]
        self.slots[slot], row.done, row.out.cached = row, shared, shared
        self.computed[slot] = shared
        self.tokens[slot, : len(ids)] = ids
        self.tokens[slot, len(ids) :] = -1
        self.cached_tokens += shared
        self.active += 1

    def swap(self, i: int, j: int) -> None:
        if i != j:
            n, kv = int(self.computed[[i, j]].max()), self.cache.kv
            kv[:, :, [i, j], :, :n] = kv[:, :, [j, i], :, :n]
            self.slots[i], self.slots[j] = self.slots[j], self.slots[i]
            for table in (self.tokens, self.computed, self.freed):
                table[[i, j]] = table[[j, i]]

    def advance(self, slots: range, T: int) -> None:
        """Compute the next T tokens of these slots' rows, or as many as they have; where the end of
        what is known is reached, sample a token."""
        rows = [self.slots[i] for i in slots]
        tokens = np.zeros((len(rows), T), np.int64)
        positions = np.full((len(rows), T), self.context)  # padding
        wanted: list[Wanted] = []
        for r, row in enumerate(rows):
            n = min(T, len(row.ids) - row.done)
            tokens[r, :n] = row.ids[row.done : row.done + n]
            positions[r, :n] = np.arange(row.done, row.done + n)
            first = min(row.score_from, len(row.ids)) - 1
            wanted += [
                (row, r * T + t, row.done + t + 1) for t in range(max(0, first - row.done), n)
            ]
            row.done += n
            self.computed[slots[r]] = row.done
            self.prompt_tokens += max(0, min(row.done, row.out.n_prompt) - row.done + n)
        h = self.forward(tokens, positions, slots)
        for (row, _, at), values in zip(wanted, self.read(h, wanted), strict=True):
            if at < len(row.ids):
                self.note(row, values)
            else:
                self.settle(row, values)
        self.rearrange()

    def rearrange(self) -> None:
        """Who is done leaves, and the last of its kind takes its place; who has read its prompt
        joins those that decode."""
        for slot in reversed(range(self.active)):
            row, last = self.slots[slot], slot
            if row.out.finish_reason:
                self.tokens[slot, : len(row.ids)] = row.ids
                self.freed[slot] = self.steps
                if slot < self.decoding:
                    last = self.decoding = self.decoding - 1
                    self.swap(slot, last)
                self.active -= 1
                self.swap(last, self.active)
                self.slots[self.active] = None
        for slot in range(self.decoding, self.active):
            if len(self.slots[slot].ids) - self.slots[slot].done == 1:
                self.swap(slot, self.decoding)
                self.decoding += 1

    def settle(self, row: Sequence, values: list[float]) -> None:
        """The end of what row knows is reached: a token was sampled, or attributes were read."""
        end = min(row.out.n_prompt + row.params.max_tokens, self.context)
        row.out.scores = values if self.cfg.n_attributes else []
        if self.cfg.n_attributes or len(row.ids) >= end:
            return self.tell(row, "", "length")
        token = int(values[0])
        self.new_tokens += 1
        if token in row.stop_ids:
            return self.tell(row, "", "stop")
        row.ids.append(token)
        row.out.ids.append(token)
        self.note(row, values)
        text = row.stream.push(token) if row.stream else ""
        if row.stream and row.stream.stopped:
            return self.tell(row, text, "stop")
        return self.tell(row, text, "length" if len(row.ids) == end else "")

    def note(self, row: Sequence, values: list[float]) -> None:
        """Keep a token's log-probability, and the likeliest ones, if asked for."""
        if row.params.logprobs is not None:
            top = list(zip(map(int, values[2::2]), values[3::2], strict=True))
            row.out.logprobs.append(values[1])
            row.out.tops.append(top[: row.params.logprobs])

    def tell(self, row: Sequence, text: str, reason: str) -> None:
        if reason and row.stream:
            text += row.stream.finish()
        row.out.text += text
        row.out.finish_reason = reason
        if row.listener and (text or reason or row.params.logprobs is not None):
            row.listener(row.out, text)

    # -- the model

    def forward(self, tokens: np.ndarray, positions: np.ndarray, slots: range) -> Tensor | None:
        """The states (N T, D) that the head reads, on the last pipeline rank. Through a pipeline
        the rows go in parts, one behind the other."""
        tokens, positions = (torch.from_numpy(x).to(self.device) for x in (tokens, positions))
        real = positions.where(positions < self.context, 0)
        parts = min(self.pp, len(slots))
        edges = [len(slots) * i // parts for i in range(parts + 1)]
        group = self.mesh["pp"].get_group() if self.pp > 1 else None
        states, sent = [], []
        for a, b in zip(edges, edges[1:], strict=False):
            self.cache.select(slice(slots[a], slots[b - 1] + 1), int(real[a:b].max()) + 1)
            x = tokens[a:b]
            if self.stage > 0:
                x = torch.empty((*x.shape, self.cfg.dim), dtype=self.dtype, device=self.device)
                dist.recv(x, group=group, group_src=self.stage - 1)
            states.append(self.model(x, positions[a:b], None, self.cache, head=False).contiguous())
            if self.stage < self.pp - 1:
                sent.append(dist.isend(states[-1], group=group, group_dst=self.stage + 1))
        for work in sent:
            work.wait()
        return None if sent else torch.cat(states).flatten(0, 1)

    def from_last(self, x: Tensor) -> Tensor:
        """x of the last stage's first process, on all of them: they go on with the same."""
        if self.world > 1:
            dist.broadcast(x, src=int(self.mesh.mesh[-1].flatten()[0]))
        return x

    def read(self, h: Tensor | None, wanted: list[Wanted]) -> list[list[float]]:
        """The head on states of h (n, D) → of each [token, its log-probability, then the likeliest
        tokens and theirs], or a reward model's attributes. The token is the one known to be there,
        else a sample."""
        exact = any(row.params.logprobs is not None for row, _, _ in wanted)
        most = max((row.params.logprobs or 0 for row, _, _ in wanted), default=0)
        shape = (len(wanted), self.cfg.n_attributes or 2 + 2 * most)
        out = torch.zeros(shape, dtype=torch.float64, device=self.device)
        if h is not None and wanted:
            h = h[[state for _, state, _ in wanted]]
            if self.cfg.n_attributes:
                out = self.model.head(h).double()
            else:
                step = max(1, (1 << 25) // self.cfg.vocab_size)  # logits alive at once
                for i in range(0, len(wanted), step):
                    part = slice(i, i + step)
                    out[part] = self.choose(h[part], wanted[part], exact, most)
        return self.from_last(out).tolist()

    def choose(self, h: Tensor, wanted: list[Wanted], exact: bool, most: int) -> Tensor:
        """States (n, D) → fp64 (n, 2 + 2 most), as `read` returns them."""
        logits = self.logits(h, exact)
        new = [i for i, (row, _, at) in enumerate(wanted) if at == len(row.ids)]
        known = [row.ids[at] if at < len(row.ids) else 0 for row, _, at in wanted]
        ids = torch.tensor(known, device=h.device)
        if new:
            rows = [wanted[i][0] for i in new]
            u = [uniform(row.params.seed, row.out.index, len(row.ids)) for row in rows]
            asked = logits if len(new) == len(wanted) else logits[new]
            ids[new] = sample(asked, [row.params for row in rows], [row.ids for row in rows], u)
        out = logits.new_zeros(len(h), 2 + 2 * most, dtype=torch.float64)
        out[:, 0] = ids
        if exact:
            log_probs = logits.log_softmax(1)
            out[:, 1] = log_probs.gather(1, ids[:, None])[:, 0]
            out[:, 3::2], out[:, 2::2] = log_probs.topk(most)
        return out

    def logits(self, h: Tensor, exact: bool) -> Tensor:
        """States (n, D) → at least fp32 (n, V). exact: without rounding to bf16 on the way, which
        does for a sample but not for a log-probability to report (see fp32_logits)."""
        weight = self.model.head.weight
        logits = fp32_logits(h, weight) if exact or h.is_cuda else project(h, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.tp == 1:
            return logits
        shares = [torch.empty_like(logits) for _ in range(self.tp)]
        dist.all_gather(shares, logits, group=self.mesh["tp"].get_group())
        return torch.cat(shares, dim=1)

    @torch.inference_mode()
    def quantize(self, kind: Literal["int8", "float8"]) -> str:
        """The blocks' matrices to 8 bits, a scale for each output row; embedding and head stay.
        Returns what that does to logits and perplexity on Python's documentation."""
        assert not self.busy
        text = "".join(t for t, _ in zip(embedded_english(), range(8), strict=False))
        ids = self.tokenizer.encode(text)[: min(1025, self.context)].astype(np.int64)
        tokens, targets = ids[None, :-1], torch.from_numpy(ids[1:]).to(self.device)

        def logits() -> Tensor:
            h = self.forward(tokens, np.arange(len(targets))[None], range(1))
            return self.logits(h, exact=True) if h is not None else torch.zeros(1, 1)

        exact = logits()
        for module in self.model.blocks.modules():
            if isinstance(module, Linear):
                module.quantize(kind)
        self.computed[:] = 0  # the cache holds keys of other weights
        new, numbers = logits(), torch.zeros(4, device=self.device)
        if self.stage == self.pp - 1:
            sizes = [x.square().mean().sqrt() for x in (new - exact, exact)]
            losses = [F.cross_entropy(x, targets) for x in (exact, new)]
            numbers = torch.stack([*sizes, *(loss.exp() for loss in losses)])
        error, size, before, after = self.from_last(numbers).tolist()
        return (
            f"{kind}: root mean square error of the logits {error:.4f} (they are {size:.3f}), "
            f"perplexity {before:.3f} -> {after:.3f} ({after / before - 1:+.2%}) "
            f"over {len(targets)} tokens"
        )


# ---- from the command line to an engine ----------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """One copy of the model over tp x pp processes: tp answers soonest, pp serves most."""

    tp: int = 1  # Tensor parallel: heads, MLP and vocabulary divided
    pp: int = 1  # Pipeline parallel: layers divided
    timeout: int = 1800  # Seconds after which a process that does not answer ends the job


@dataclass(frozen=True)
class EngineConfig:
    """Which model, and how it is run. Common to all commands."""

    model: tyro.conf.Positional[Path]
    """A run's folder (its newest checkpoint, written on any mesh) or a Hugging Face folder."""
    tokenizer: str = ""  # A file, folder or tiktoken name; default: the one in the model's folder
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    quantize: Literal["none", "int8", "float8"] = "none"
    """Weight-only, of the blocks' matrices; says what it costs."""
    slots: int = 32  # Rows of the batch
    context: int = 0  # Longest prompt and answer; default: the model's seq_len
    chunk: int = 512  # Prompt tokens computed between two tokens of the rows that decode
    compile: bool = False  # torch.compile the blocks
    mesh: Layout = field(default_factory=Layout)


def load_engine(cfg: EngineConfig) -> Engine:
    """The model's parts for this process, and an engine around them."""
    model, layout = replace(read_config(cfg.model), lora_rank=0), cfg.mesh  # adapters are merged
    try:
        tokenizer = load_tokenizer(cfg.tokenizer or cfg.model)
    except ValueError as e:
        raise ValueError(f"{e} (--tokenizer chooses one)") from e
    if tokenizer.vocab_size > model.vocab_size:
        both = f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}"
        raise ValueError(f"{both}: set --tokenizer to the one it was trained with")
    mesh_cfg = MeshConfig(tp=layout.tp, pp=layout.pp, timeout=layout.timeout)
    world = layout.tp * layout.pp
    if world != world_size():
        start = f"start {world} with torchrun, or set --mesh.tp and --mesh.pp"
        raise ValueError(f"tp={layout.tp} x pp={layout.pp} on {world_size()} processes: {start}")
    mesh_cfg.check(model, world, batch=layout.pp, micro_batch=1)
    mesh = init_mesh(mesh_cfg)
    auto = "bf16" if mesh.device_type == "cuda" else "fp32"
    dtype, stage = DTYPES[auto if cfg.dtype == "auto" else cfg.dtype], mesh["pp"].get_local_rank()
    here = [f"blocks.{layer}." for layer in split_layers(model, layout.pp)[stage]]
    here += ["embed."] * (stage == 0) + ["norm.", "head."] * (stage == layout.pp - 1)
    wanted = {}
    for name, p in on_meta(model).named_parameters():
        if name.startswith(tuple(here)):
            # norms and a reward head compute in fp32 anyhow
            small = p.ndim < 2 or (model.n_attributes and name.startswith("head."))
            wanted[name] = torch.float32 if small else dtype
    parts = load_parts(cfg.model, model, wanted, mesh)
    laid_out = lay_out(model, parts, mesh["tp"] if layout.tp > 1 else None)
    engine = Engine(laid_out, tokenizer, cfg.slots, cfg.context, cfg.chunk, mesh)
    if cfg.quantize != "none":
        log.info(engine.quantize(cfg.quantize))
    if cfg.compile:
        for block in laid_out.blocks.values():
            block.compile(dynamic=True)
    return engine


class Driver:
    """Runs an engine in its own thread, for callers in others. With several processes the first one
    drives; the others `follow`, told of every request and cancellation before each step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.news: queue.SimpleQueue = queue.SimpleQueue()
        self.listeners: dict[int, Listener] = {}  # of requests that are news, by number
        self.rows: dict[int, list[Sequence]] = {}  # those under way
        self.numbers = itertools.count()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.failed: BaseException | None = None

    def submit(self, ids: list[int], params: SamplingParams, listener: Listener) -> int:
        """Queue a request from any thread → its number. The listener is called in the engine's."""
        self.engine.encode(ids)  # what is wrong with it is the caller's to hear
        number = next(self.numbers)
        self.listeners[number] = listener
        self.news.put(("submit", number, ids, params))
        return number

    def cancel(self, number: int) -> None:
        """From any thread; nothing happens if the request is done. Its rows end as cancelled."""
        self.news.put(("cancel", number))

    def stop(self) -> None:
        """End the thread, and the processes that follow."""
        self.news.put(("stop",))
        if self.thread.is_alive():
            self.thread.join()

    def run(self) -> None:
        try:
            self.follow()
        except BaseException as e:
            self.failed = e  # the server says it is not alive
            log.exception("the engine failed")

    def follow(self) -> None:
        """What all processes do, until they are told to stop: take what is new, then one step."""
        going = True
        while going:
            for what, *args in self.take():
                if what == "stop":
                    going = False
                elif what == "cancel":
                    for row in self.rows.get(args[0], ()):
                        self.engine.cancel(row)
                else:
                    number, ids, params = args
                    listener = self.listeners.pop(number, None)
                    self.rows[number] = self.engine.submit(ids, params, listener)
            if self.engine.busy:
                self.engine.step()
                for number, rows in list(self.rows.items()):
                    if all(row.out.finish_reason for row in rows):
                        del self.rows[number]

    def take(self) -> list[tuple]:
        """What is new to the first process, on all of them. Without work it waits for some, but
        never so long that those who follow give up."""
        news = []
        with suppress(queue.Empty):
            if self.engine.leads and not self.engine.busy:
                news.append(self.news.get(timeout=30))
            while self.engine.leads:
                news.append(self.news.get_nowait())
        if self.engine.world > 1:
            dist.broadcast_object_list(box := [news], src=0, device=torch.device("cpu"))
            news = box[0]
        return news


# ---- commands ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleConfig(EngineConfig):
    """Prompts → samples, as JSON lines in the prompts' order."""

    prompts: tuple[str, ...] = ()  # Texts; by default they come from --file
    file: str = "-"
    """JSON lines with a `prompt` (text or token ids) or `messages`, or a text a line; -: stdin."""
    out: Path | None = None  # Where the lines go; default: stdout
    sampling: tyro.conf.OmitArgPrefixes[SamplingParams] = field(default_factory=SamplingParams)


def read_rows(file: str, to_prompts: Callable[[dict[str, Any]], Any]) -> list[tuple[dict, Any]]:
    """Each line's row, and what to_prompts makes of it; a bad line is named. A line that is no JSON
    object is a prompt."""
    rows = []
    lines = sys.stdin if file == "-" else Path(file).open(encoding="utf-8")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.startswith("{") else {"prompt": line.rstrip("\n")}
            rows.append((row, to_prompts(row)))
        except (ValueError, TypeError, KeyError) as e:
            what = f"no field {e}" if isinstance(e, KeyError) else e
            raise ValueError(f"{file}:{number}: {what}") from e
    return rows


@contextmanager
def json_lines(out: Path | None, engine: Engine) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """A function that writes a line, to the file or stdout; on the first process alone."""
    leads, dump = engine.leads, partial(json.dumps, ensure_ascii=False)
    with out.open("w", encoding="utf-8") if out and leads else nullcontext(sys.stdout) as file:
        yield lambda row: leads and (file.write(dump(row) + "\n"), file.flush())


def chat_stops(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends an answer: the mark of the next turn, or the end of the text."""
    return tokenizer.special("<extra_id_1>"), tokenizer.special("</s>")


def sample_command(cfg: SampleConfig) -> None:
    engine = load_engine(cfg)

    def submit(row: dict[str, Any]) -> list[Sequence]:
        if "messages" not in row:
            return engine.submit(row["prompt"], cfg.sampling)
        stops = chat_stops(engine.tokenizer) + (cfg.sampling.stop_ids or ())
        ids, _ = render_chat(row["messages"], engine.tokenizer)
        return engine.submit(ids, replace(cfg.sampling, stop_ids=stops))

    given = [{"prompt": text} for text in cfg.prompts]
    work = [(row, submit(row)) for row in given] or read_rows(cfg.file, submit)
    quiet = not log.isEnabledFor(logging.INFO)
    with json_lines(cfg.out, engine) as write:
        for row, samples in tqdm(work, unit=" prompts", disable=quiet):
            for done in engine.finished(samples):
                line = {"index": done.index, "text": done.text, "finish_reason": done.finish_reason}
                if cfg.sampling.logprobs is not None:
                    line |= {"ids": done.ids, "logprobs": done.logprobs, "top_logprobs": done.tops}
                write(row | line)
    log.info(f"{engine.prompt_tokens:,} prompt tokens, {engine.new_tokens:,} new ones")


@dataclass(frozen=True)
class ChatConfig(EngineConfig):
    """Talk to the model in the terminal. Ctrl-C ends an answer, an empty line the conversation."""

    system: str = ""  # The system turn; the 340B was trained with an empty one
    sampling: tyro.conf.OmitArgPrefixes[SamplingParams] = field(
        # NVIDIA's public examples (SPEC 5.1)
        default_factory=lambda: SamplingParams(max_tokens=1024, temperature=0.2, top_p=0.7)
    )


def chat(cfg: ChatConfig) -> None:
    engine = load_engine(cfg)
    driver, stops = Driver(engine), chat_stops(engine.tokenizer) + (cfg.sampling.stop_ids or ())
    params = replace(cfg.sampling, n=1, echo=False, stop_ids=stops)
    if not engine.leads:
        return driver.follow()
    driver.thread.start()
    messages = [{"role": "system", "content": cfg.system}]
    with suppress(EOFError, KeyboardInterrupt):
        while question := input("\n> "):
            messages.append({"role": "user", "content": question})
            while len(ids := render_chat(messages, engine.tokenizer)[0]) >= engine.context:
                if len(messages) == 2:
                    log.warning(f"{len(ids)} tokens, the context has {engine.context}: shorten it")
                    break
                del messages[1:3]  # the earliest question and its answer
            if len(ids) < engine.context and (answer := talk(driver, ids.tolist(), params)):
                messages.append({"role": "assistant", "content": answer})
            else:
                messages.pop()  # an answer that is not there takes its question with it
    return driver.stop()


def talk(driver: Driver, ids: list[int], params: SamplingParams) -> str:
    """Write an answer as it comes; returns it without the line end that the template adds."""
    done, pieces = threading.Event(), []

    def show(out: Completion, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        pieces.append(text)
        if out.finish_reason:
            done.set()

    number = driver.submit(ids, params, show)
    while not done.is_set() and not driver.failed:
        try:
            done.wait(timeout=1)
        except KeyboardInterrupt:
            driver.cancel(number)
    return "".join(pieces).rstrip("\n")


@dataclass(frozen=True)
class ScoreConfig(EngineConfig):
    """JSON lines → the same with scores. A language model takes `prompt` and `continuation` or
    `continuations`; a reward model `messages`, or RewardBench's `prompt`, `chosen`, `rejected` and
    `subset`, of which the accuracies are printed."""

    file: str = "-"  # JSON lines; -: stdin
    out: Path | None = None  # Where the lines go; default: stdout


def score(cfg: ScoreConfig) -> None:
    engine, wins = load_engine(cfg), {}
    work = read_rows(cfg.file, partial(submit_to_score, engine))
    with json_lines(cfg.out, engine) as write:
        for row, rows in work:
            done = list(engine.finished(rows))
            if not engine.cfg.n_attributes:
                row["logprobs"] = [sum(c.logprobs) for c in done]
                row["n_tokens"] = [len(c.logprobs) for c in done]
                row["greedy"] = [is_greedy(c) for c in done]
            elif "messages" in row:
                row["scores"] = named_scores(done[0].scores)
            else:
                chosen, rejected = (named_scores(c.scores) for c in done)
                row |= {"chosen_scores": chosen, "rejected_scores": rejected}
                won = chosen["reward"] > rejected["reward"]
                wins.setdefault(row.get("subset", "all"), []).append(won)
            write(row)
    if wins:
        log.info(rewardbench(wins))


def submit_to_score(engine: Engine, row: dict[str, Any]) -> list[Sequence]:
    """The rows of the batch that a row of the file needs."""
    if not engine.cfg.n_attributes:
        if "continuation" not in row and "continuations" not in row:
            raise ValueError("a language model needs `prompt` and `continuation(s)`")
        context = engine.encode(row["prompt"])
        texts = row.get("continuations") or [row["continuation"]]
        return [engine.submit_pair(context, engine.encode(text)) for text in texts]
    if "messages" in row:
        conversations = [row["messages"]]
    else:
        prompt = row["prompt"]
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answers = [row["chosen"], row["rejected"]]
        conversations = [[*before, {"role": "assistant", "content": text}] for text in answers]
    inputs = [render_reward(messages, engine.tokenizer) for messages in conversations]
    return [row for ids in inputs for row in engine.submit(ids, SamplingParams(max_tokens=0))]


def is_greedy(done: Completion) -> bool:
    """Whether each scored token was the likeliest."""
    return all(top[0][1] <= lp for top, lp in zip(done.tops, done.logprobs, strict=True))


def attributes_of(scores: list[float]) -> dict[str, float]:
    """A reward model's output by name; of NVIDIA's nine, the first four are untrained."""
    names = ATTRIBUTES if len(scores) in (5, 9) else [f"attribute_{i}" for i in range(len(scores))]
    return dict(zip(names, scores[-len(names) :], strict=True))


def named_scores(scores: list[float]) -> dict[str, float]:
    """A reward model's output by attribute, and the reward: their weighted sum."""
    return attributes_of(scores) | {"reward": float(aggregate(scores))}


# RewardBench's sections and the examples of each subset; math-prm counts 984 = 6 x 164, as much as
# the six code subsets together (SYNTHESIS 2.3)
REWARDBENCH = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat-Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
        "xstest-should-respond": 250, "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
        "hep-python": 164, "hep-rust": 164,
    },
}  # fmt: skip


def rewardbench(wins: dict[str, list[bool]]) -> str:
    """Accuracies (a tie is a loss) per subset and per section, and overall: the mean of the four
    sections, as the report has it; the leaderboard's, with the other sets at half weight; and of
    all rows."""
    share = {subset: sum(won) / len(won) for subset, won in wins.items()}
    table = {subset: f"{share[subset]:6.1%} of {len(wins[subset])}" for subset in wins}
    sections, other = [], set(wins)
    for section, sizes in REWARDBENCH.items():
        other -= set(sizes)
        if have := [subset for subset in sizes if subset in wins]:
            total = sum(share[subset] * sizes[subset] for subset in have)
            sections.append(total / sum(sizes[subset] for subset in have))
            table[section] = f"{sections[-1]:6.1%}"
    if sections:
        total, n = sum(sections), len(sections)
        table[f"mean of {n} sections"] = f"{total / n:6.1%}"
        if other:
            half = sum(share[subset] for subset in other) / len(other) / 2
            table["with other sets at half"] = f"{(total + half) / (n + 0.5):6.1%}"
    every = sum(wins.values(), [])
    table["all rows"] = f"{sum(every) / len(every):6.1%} of {len(every)}"
    return "\n".join(f"{name:28} {value}" for name, value in table.items())


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "sample": (SampleConfig, sample_command),
    "chat": (ChatConfig, chat),
    "score": (ScoreConfig, score),
}
MOVED = ("serve", "evaluate", "synthesize")


def run_command(name: str, parse: Callable[[], Any], command: Callable[[Any], Any]) -> None:
    """Run a command as a program. The log goes to stderr, from the first process alone: stdout is
    for answers."""
    log.handlers = [logging.StreamHandler()]
    log.setLevel(logging.ERROR if int(os.environ.get("RANK", 0)) else logging.INFO)
    log.propagate = False
    try:
        command(parse())
    except (ValueError, OSError) as e:
        sys.exit(f"{name}: error: {e}")
    except KeyboardInterrupt:
        os._exit(130)  # without waiting for what an endpoint has still to answer
    if dist.is_initialized():
        shut_down()


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in MOVED:
        sys.exit(f"generate.py {sys.argv[1]} is now `python -m recipes.{sys.argv[1]}`")
    configs = {name: config for name, (config, _) in COMMANDS.items()}
    parse = partial(tyro.extras.subcommand_cli_from_dict, configs, description=__doc__)
    run_command("generate.py", parse, lambda cfg: dict(COMMANDS.values())[type(cfg)](cfg))


if __name__ == "__main__":
    main()
