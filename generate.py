"""One engine that samples, chats, scores, evaluates and serves the model that was trained.

Many requests share a batch: each has a row of the key-value cache, a row is refilled as soon as it
is done, a prefix that another row has already computed is copied. What a request yields depends on
its own seed and positions, never on what it is batched with.

    python generate.py sample runs/nano --prompts "import os" "def main" --max-tokens 64
    python generate.py chat path/to/a/Nemotron/folder
    python generate.py serve runs/nano --port 8000
"""
# Shapes in comments: N rows  T tokens  S key slots  D dim  V vocab_size, as in model.py

import asyncio
import hashlib
import hmac
import itertools
import json
import logging
import os
import queue
import random
import re
import secrets
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
    IGNORE,
    MARKER,
    ROLES,
    TO_ANSWER,
    Decontaminator,
    Instruction,
    Messages,
    Tokenizer,
    aggregate,
    best_and_worst,
    check_messages,
    compiles,
    draw_instructions,
    embedded_english,
    extract_code,
    json_object,
    load_tokenizer,
    near_duplicates,
    need,
    normalise,
    numbered_lines,
    parse_list,
    plain,
    read_documents,
    read_evaluations,
    render_chat,
    render_reward,
    run_python,
    same_number,
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
    step_folders,
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
class Row:
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
Wanted = tuple[Row, int, int]  # a row, the state that the head is to read, the position it predicts


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
        self.slots: list[Row | None] = [None] * slots
        self.decoding = self.active = 0  # slots [0, decoding) and [decoding, active)
        # what each slot's keys are of, and how many of them are computed
        self.tokens = np.full((slots, self.context), -1, np.int32)
        self.computed = np.zeros(slots, np.int64)
        self.freed = np.zeros(slots, np.int64)  # at which step
        self.waiting: deque[Row] = deque()
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
    ) -> list[Row]:
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
            rows.append(Row(list(ids), params, out, stop_ids, stream, listener, first))
        self.waiting.extend(rows)
        return rows

    def cancel(self, row: Row) -> None:
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

    def finished(self, rows: list[Row]) -> Iterator[Completion]:
        """Work until each is done, in their order."""
        for row in rows:
            while not row.out.finish_reason:
                self.step()
            yield row.out

    def submit_pair(self, context: list[int], continuation: list[int]) -> Row:
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

    def place(self, row: Row, ids: np.ndarray, source: int, shared: int) -> None:
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

    def settle(self, row: Row, values: list[float]) -> None:
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

    def note(self, row: Row, values: list[float]) -> None:
        """Keep a token's log-probability, and the likeliest ones, if asked for."""
        if row.params.logprobs is not None:
            top = list(zip(map(int, values[2::2]), values[3::2], strict=True))
            row.out.logprobs.append(values[1])
            row.out.tops.append(top[: row.params.logprobs])

    def tell(self, row: Row, text: str, reason: str) -> None:
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
            states.append(self.model.hidden(x, positions[a:b], None, self.cache).contiguous())
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
        self.rows: dict[int, list[Row]] = {}  # those under way
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


# ---- the server ----------------------------------------------------------------------------------

# The fields of a request, and those of OpenAI's that must ask for nothing
FIELDS = dict(
    model=str, n=int, max_tokens=int, temperature=float, top_p=float, top_k=int, min_p=float,
    repetition_penalty=float, seed=int, stop=object, stream=bool, stream_options=dict, user=str,
)  # fmt: skip
CHAT = dict(messages=object, max_completion_tokens=int, logprobs=bool, top_logprobs=int)
TEXT = dict(prompt=object, echo=bool, logprobs=int, best_of=int)
NEUTRAL = (
    "frequency_penalty", "presence_penalty", "logit_bias", "metadata", "tools", "functions",
    "suffix", "tool_choice", "function_call", "service_tier", "store", "parallel_tool_calls",
    "response_format",
)  # fmt: skip
NOTHING = (0, "", [], {}, "none", "auto", {"type": "text"})
Body = dict[str, Any]


@dataclass(frozen=True)
class ServeConfig(EngineConfig):
    """Serve OpenAI's /v1/chat/completions, /v1/completions and /v1/models, NVIDIA's
    /v1/health/live and /v1/health/ready, and /metrics for Prometheus."""

    host: str = "127.0.0.1"  # 0.0.0.0: all networks of this machine
    port: int = 8000
    api_key: str = ""  # What clients must send as their bearer token; empty: none is asked for
    max_queue: int = 256
    """Samples that may wait beyond the slots; who comes later is to try again (429)."""
    max_body: int = 4 << 20  # Bytes of a request
    model_name: str = ""  # What clients call the model; default: its folder's name


class Refused(Exception):
    """Ends a request with an OpenAI error object."""

    def __init__(self, status: int, message: str, **more: str) -> None:
        kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        error = {"message": message[:1000], "type": kind.get(status, "invalid_request_error")}
        self.body = {"error": error | {"param": None, "code": None} | more}
        self.status, self.headers = status, {"retry-after": "1"} if status == 429 else {}


def parse_body(raw: bytes, chat: bool) -> Body:
    """JSON → the fields that are not null, each of its type. By hand, beyond the syntax: a model of
    pydantic's lists every error of a list of a million."""
    from pydantic_core import from_json

    try:
        body = from_json(raw)
    except ValueError as e:
        raise ValueError(f"invalid JSON: {e}") from e
    if not isinstance(body, dict):
        raise ValueError("a request is a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    known = FIELDS | (CHAT if chat else TEXT)
    for name, value in body.items():
        kind = known.get(name, object)
        if name not in known and name not in NEUTRAL:
            raise ValueError(f"{name:.60}: no field of this route")
        if name in NEUTRAL and value not in NOTHING:
            raise ValueError(f"{name}={value!r:.60}: not possible here; leave it out")
        if kind not in (type(value), object) and (kind, type(value)) != (float, int):
            raise ValueError(f"{name}={value!r:.60}: must be {kind.__name__}")
    return body


def plain_message(message: Any) -> Any:
    """A message as data.py wants it: OpenAI's content may be a list of texts."""
    if not isinstance(message, dict):
        return message
    given = {key for key, value in message.items() if value is not None}
    if unknown := given - {"role", "content", "name", "type"}:  # lm-eval sends a type
        raise ValueError(f"messages: {min(unknown):.60}: no field of a message")
    content = message.get("content")
    if isinstance(content, list):
        with suppress(TypeError, KeyError):  # what is no text, data.py refuses
            content = "".join(part["text"] for part in content)
    return {"role": message.get("role"), "content": content}


def sampling(body: Body, chat: bool, engine: Engine) -> SamplingParams:
    """ValueError where a field's value is not possible."""
    known = SamplingParams.__dataclass_fields__
    given = {"max_tokens": 16, "seed": secrets.randbits(62)}
    given |= {name: value for name, value in body.items() if name in known}
    n, stop = body.get("n", 1), body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise ValueError("stop: a text or a list of texts")
    if n > 128 or len(stop) > 64 or abs(given["seed"]) >= 1 << 63 or body.get("best_of", n) != n:
        raise ValueError("at most n=128, 64 stop texts, a seed of 63 bits; best_of must be n")
    if "stream_options" in body and not body.get("stream"):
        raise ValueError("stream_options: only with stream: true")
    if chat:
        limits = [body[name] for name in ("max_tokens", "max_completion_tokens") if name in body]
        if len(limits) > 1 or ("top_logprobs" in body and not body.get("logprobs")):
            raise ValueError("one max_[completion_]tokens; top_logprobs only with logprobs: true")
        given["max_tokens"] = limits[0] if limits else engine.context
        given["logprobs"] = body.get("top_logprobs", 0) if body.get("logprobs") else None
        given["stop_ids"] = chat_stops(engine.tokenizer)
    elif given.get("echo") and "logprobs" in given:
        # so harnesses score a text, and cut off the max_tokens tokens that they count on
        given["stop_ids"] = ()
    return SamplingParams(**given | {"stop": tuple(stop)})


class Choice:
    """One sample in OpenAI's words, whole or piece by piece."""

    def __init__(self, tokenizer: Tokenizer, chat: bool, index: int = 0) -> None:
        self.tokenizer, self.chat, self.index = tokenizer, chat, index
        self.characters = self.tokens = 0  # written so far
        self.held, self.offset, self.stream = "", 0, TextStream(tokenizer, ())
        self.anchor = [int(i) for i in tokenizer.encode("a")[-1:]]

    def write(self, out: Completion, characters: int, tokens: int, reason: str) -> dict[str, Any]:
        """What is new, up to so many characters and tokens: the engine may have gone on."""
        text, new = out.text[self.characters : characters], slice(self.tokens, tokens)
        self.characters, self.tokens = characters, tokens
        noted = list(zip(out.ids[new], out.logprobs[new], out.tops[new], strict=True))
        choice: dict[str, Any] = {"index": self.index, "finish_reason": reason or None}
        if not self.chat:
            return choice | {"text": text, "logprobs": self.text_logprobs(noted)}
        content = self.chat_logprobs(noted)
        if out.scores:  # as NVIDIA's reward service: in the text, and as log-probabilities
            pairs = attributes_of(out.scores).items()
            text = ",".join(f"{name}:{x:.9g}" for name, x in pairs)
            blank = {"bytes": None, "top_logprobs": []}
            content = [{"token": name, "logprob": x} | blank for name, x in pairs]
        # the newline that the template has before <extra_id_1> is no part of the answer
        text, self.held = self.held + text, ""
        if text.endswith("\n") and reason in ("", "stop"):
            text, self.held = text[:-1], "\n"
        choice["logprobs"] = {"content": content, "refusal": None} if content else None
        return choice | {"message": {"role": "assistant", "content": text}}

    def spell(self, token: int) -> str:
        """A token's text: behind another, as some tokenizers drop a space at the beginning."""
        behind = len(self.tokenizer.decode(self.anchor))
        return self.tokenizer.decode([*self.anchor, token])[behind:]

    def chat_logprobs(self, noted: list) -> list[dict[str, Any]]:
        def entry(token: int, log_prob: float) -> dict[str, Any]:
            text = self.spell(token)
            whole = None if "\ufffd" in text else list(text.encode())
            return {"token": text, "logprob": log_prob, "bytes": whole}

        return [
            entry(token, log_prob) | {"top_logprobs": [entry(*pair) for pair in top]}
            for token, log_prob, top in noted
        ]

    def text_logprobs(self, noted: list) -> dict[str, Any] | None:
        rows = []
        for token, log_prob, top in noted:
            named: dict[str, float] = {}
            for other, value in [*top, (token, log_prob)]:
                named.setdefault(self.spell(other), value)  # the likeliest of those spelt alike
            text, start = self.spell(token), self.offset
            self.offset += len(self.stream.push(token))
            start = max(start, self.offset - len(text))  # behind what broken bytes held back
            rows.append((text, log_prob, None if log_prob is None else named, start))
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: [row[i] for row in rows] for i, name in enumerate(names)} if rows else None


def attributes_of(scores: list[float]) -> dict[str, float]:
    """A reward model's output by name; of NVIDIA's nine, the first four are untrained."""
    names = ATTRIBUTES if len(scores) in (5, 9) else [f"attribute_{i}" for i in range(len(scores))]
    return dict(zip(names, scores[-len(names) :], strict=True))


class Call:
    """A request under way: its samples come in from the engine's thread, its answer goes out."""

    def __init__(
        self, desk: "Desk", body: Body, chat: bool, params: SamplingParams, prompts: list[list[int]]
    ) -> None:
        self.desk, self.body, self.chat, self.params = desk, body, chat, params
        kind = "chat.completion" if chat else "text_completion"
        kind += ".chunk" if chat and body.get("stream") else ""
        self.head = {"id": f"{'chat' * chat}cmpl-{secrets.token_hex(12)}", "object": kind}
        self.head |= {"created": int(time.time()), "model": desk.name}
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.done: list[Completion] = []
        n, loop, tokenizer = params.n, asyncio.get_running_loop(), desk.engine.tokenizer
        self.samples = self.left = n * len(prompts)
        choices = [Choice(tokenizer, chat, i) for i in range(self.samples)]

        def tell(first: int, out: Completion, _: str) -> None:
            if out.finish_reason or body.get("stream"):
                until = len(out.text), len(out.logprobs), out.finish_reason
                with suppress(RuntimeError):  # the loop is closed: the server was made to hurry
                    loop.call_soon_threadsafe(self.arrive, choices[first + out.index], out, *until)

        desk.open += self.samples
        self.prompt_tokens = sum(map(len, prompts))
        self.numbers = [
            desk.driver.submit(p, params, partial(tell, i * n)) for i, p in enumerate(prompts)
        ]

    def arrive(self, choice: Choice, out: Completion, *until: Any) -> None:
        if reason := until[-1]:
            self.done.append(out)
            self.left -= 1
            self.desk.open -= 1
            self.desk.cancelled += reason == "cancelled"
        self.inbox.put_nowait(choice.write(out, *until))

    async def pieces(self, request: Any) -> AsyncIterator[dict[str, Any]]:
        """Until all samples are done, the engine fails or the client hangs up."""
        while (self.left or not self.inbox.empty()) and not await request.is_disconnected():
            self.desk.check()
            with suppress(TimeoutError):
                yield await asyncio.wait_for(self.inbox.get(), timeout=1)

    def usage(self) -> dict[str, Any]:
        echoed = self.params.echo
        new = sum(len(c.ids) - c.n_prompt * echoed + bool(c.scores) for c in self.done)
        cached = sum(c.cached for c in self.done if c.index == 0)
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": new}
        counts["total_tokens"] = self.prompt_tokens + new
        return counts | {"prompt_tokens_details": {"cached_tokens": cached}}

    async def whole(self, request: Any) -> dict[str, Any]:
        choices = [choice async for choice in self.pieces(request)]  # one of each sample
        choices.sort(key=lambda choice: choice["index"])
        return self.head | {"choices": choices, "usage": self.usage()}

    async def stream(self, request: Any) -> AsyncIterator[str]:
        """Server-sent events: roles, pieces, reasons, perhaps the usage, [DONE]."""
        wants = self.body.get("stream_options", {}).get("include_usage")
        head = self.head | ({"usage": None} if wants else {})
        line = lambda body: f"data: {json.dumps(body)}\n\n"  # noqa: E731
        blank = {"logprobs": None, "finish_reason": None}
        for i in range(self.samples if self.chat else 0):
            first = {"index": i, "delta": {"role": "assistant", "content": ""}}
            yield line(head | {"choices": [first | blank]})
        try:
            async for piece in self.pieces(request):
                if self.chat:
                    piece["delta"] = {"content": piece.pop("message")["content"]}
                yield line(head | {"choices": [piece]})
        except Refused as e:
            yield line(e.body)
            return
        if wants:
            yield line(head | {"choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"


class Desk:
    """What the requests of all clients have in common."""

    def __init__(self, engine: Engine, driver: Driver, cfg: ServeConfig) -> None:
        self.engine, self.driver, self.cfg = engine, driver, cfg
        self.name = cfg.model_name or cfg.model.resolve().name
        self.scores = bool(engine.cfg.n_attributes)
        self.most = cfg.slots + cfg.max_queue  # samples at a time
        self.open = self.cancelled = 0
        self.answers: Counter[int] = Counter()  # by status

    def check(self) -> None:
        if self.driver.failed or not self.driver.thread.is_alive():
            raise Refused(503, "the engine has failed, or has not begun")

    def read(self, raw: bytes, chat: bool) -> tuple[Body, SamplingParams, list[list[int]]]:
        """A request's bytes → what the engine is to do, Refused if it cannot."""
        try:
            body = parse_body(raw, chat)
            if (name := body.get("model")) != self.name:
                have = f"the model {name!r:.200} does not exist, only {self.name!r}"
                raise Refused(404, have, param="model", code="model_not_found")
            params, prompts = sampling(body, chat, self.engine), self.prompts(body, chat)
            params = SamplingParams(max_tokens=0) if self.scores else params
            if len(prompts) * params.n > self.most:
                asked = f"{len(prompts)} prompts, {params.n} samples of each"
                raise ValueError(f"{asked}: this server takes {self.most} samples at a time")
            return body, params, [self.engine.encode(prompt) for prompt in prompts]
        except ValueError as e:
            raise Refused(400, str(e)) from e

    def prompts(self, body: Body, chat: bool) -> list:
        """Texts or ids; ValueError where this model takes no such request."""
        if self.scores and (not chat or body.get("stream") or body.get("n", 1) != 1):
            raise ValueError("a reward model scores chats: /v1/chat/completions, n=1, no stream")
        if chat:
            messages = body.get("messages")
            if isinstance(messages, list):
                messages = [plain_message(message) for message in messages]
            if self.scores:
                return [render_reward(messages, self.engine.tokenizer)]
            ids, _ = render_chat(messages, self.engine.tokenizer)
            if messages[-1]["role"] != "user":
                raise ValueError("messages: the last one, which is answered, must be the user's")
            return [ids]

        def is_one(p: Any) -> bool:
            return isinstance(p, str) or (isinstance(p, list) and {type(i) for i in p} == {int})

        prompts = body.get("prompt")
        prompts = [prompts] if is_one(prompts) else prompts
        if not isinstance(prompts, list) or not prompts or not all(map(is_one, prompts)):
            raise ValueError("prompt: a text, a list of token ids, or a list of these, none empty")
        return prompts

    async def begin(self, request: Any) -> Call:
        """Read a request and submit it."""
        raw, chat = bytearray(), "chat" in request.url.path
        async for part in request.stream():
            raw += part
            if len(raw) > self.cfg.max_body:
                raise Refused(413, f"the request has more than {self.cfg.max_body} bytes")
        # in a thread: to tokenize a long text takes a while
        body, params, prompts = await asyncio.to_thread(self.read, bytes(raw), chat)
        self.check()
        if self.open + len(prompts) * params.n > self.most:
            raise Refused(429, f"{self.open} samples are under way or waiting: try again later")
        request.scope["call"] = Call(self, body, chat, params, prompts)
        return request.scope["call"]

    def admit(self, scope: dict) -> None:
        """Refused without the key, if there is one."""
        given = dict(scope["headers"]).get(b"authorization", b"")
        wanted = b"Bearer " + self.cfg.api_key.encode()
        open_to_all = not self.cfg.api_key or scope["path"].startswith("/v1/health/")
        if not open_to_all and not hmac.compare_digest(given, wanted):
            raise Refused(401, "a wrong API key, or none", code="invalid_api_key")

    def around(self, app: Callable) -> Callable:
        """ASGI middleware: asks for the key, counts answers, turns errors into OpenAI's, and when a
        request ends, however it does, ends its samples."""
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse

        async def run(scope: dict, receive: Callable, send: Callable) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            begun = False

            async def count(message: dict) -> None:
                nonlocal begun
                if message["type"] == "http.response.start":
                    begun = True
                    self.answers[message["status"]] += 1
                await send(message)

            try:
                self.admit(scope)
                await app(scope, receive, count)
            except (ClientDisconnect, asyncio.CancelledError):
                pass  # the client is gone, or the server stops
            except Exception as e:
                if not isinstance(e, Refused):
                    log.exception("a request failed")
                    e = Refused(500, "a bug of the server: its log has more")
                if not begun:
                    await JSONResponse(e.body, e.status, e.headers)(scope, receive, count)
            finally:
                for number in scope["call"].numbers if "call" in scope else ():
                    self.driver.cancel(number)

        return run

    def metrics(self) -> str:
        engine = self.engine
        values = {
            "prompt_tokens_total": engine.prompt_tokens + engine.cached_tokens,
            "cached_prompt_tokens_total": engine.cached_tokens,
            "new_tokens_total": engine.new_tokens,
            "cancelled_samples_total": self.cancelled,
            "running_samples": engine.active,
            "waiting_samples": max(0, self.open - engine.active),
        }
        values |= {f'answers_total{{status="{s}"}}': n for s, n in sorted(self.answers.items())}
        return "".join(f"nemotron4_{name} {value}\n" for name, value in values.items())


def make_app(engine: Engine, driver: Driver, cfg: ServeConfig) -> Any:
    """A FastAPI application; it starts the driver's thread, and stops it in the end."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException

    desk, created = Desk(engine, driver, cfg), int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        driver.thread.start()
        yield
        await asyncio.to_thread(driver.stop)

    app = FastAPI(title="nemotron4", lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.add_middleware(desk.around)

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    async def answer(request: Request) -> Response:
        call = await desk.begin(request)
        if call.body.get("stream"):
            return StreamingResponse(call.stream(request), media_type="text/event-stream")
        return JSONResponse(await call.whole(request))

    @app.get("/v1/models")
    async def models() -> dict:
        model = {"id": desk.name, "object": "model", "created": created, "owned_by": "nemotron4"}
        return {"object": "list", "data": [model | {"max_model_len": engine.context}]}

    @app.get("/v1/health/live")
    async def live() -> dict:
        return {"status": "live"}

    @app.get("/v1/health/ready")
    async def ready() -> dict:
        desk.check()
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(desk.metrics(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, e: HTTPException) -> None:
        refused = Refused(e.status_code, f"{e.detail}: {request.method} {request.url.path}")
        refused.headers |= e.headers or {}
        raise refused

    return app


def serve(cfg: ServeConfig) -> None:
    """Answer until SIGINT or SIGTERM. The first process talks, the others follow it."""
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as e:
        raise ValueError("serving needs FastAPI and uvicorn: pip install -e '.[serve]'") from e

    driver = Driver(load_engine(cfg))
    # uvicorn raises what stopped it once more when it is done; those who follow are told to stop
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    if not driver.engine.leads:
        return driver.follow()
    log.info(f"http://{cfg.host}:{cfg.port}/v1 serves {cfg.model_name or cfg.model.resolve().name}")
    if not cfg.api_key and cfg.host not in ("127.0.0.1", "localhost", "::1"):
        log.warning(f"whoever reaches {cfg.host} may use it: set --api-key")
    app, quiet = make_app(driver.engine, driver, cfg), dict(log_level="warning")
    uvicorn.run(app, host=cfg.host, port=cfg.port, timeout_graceful_shutdown=5, **quiet)
    driver.stop()  # again, if uvicorn was made to hurry
    if driver.failed:
        raise RuntimeError("the engine failed") from driver.failed


# ---- the synthetic data pipeline: what is asked --------------------------------------------------

# The report's 23 prompts and those that it does not print, in our own words. Those of the first
# table ask for {n} items as a list; data.parse_list reads whatever comes.
AS_LIST = (
    " Make them as different from each other as you can. Answer with a numbered list, one a line."
)
# fmt: off
LISTS = {
    # -- topics, open questions, writing, closed questions
    "macro_topics": "Name {n} broad subjects that people all over the world talk about: everyday "
    "life, nature, science, work, culture and so on.",
    "subtopics": "Name {n} narrower subjects that belong to the subject '{topic}'.",
    "questions": "Write {n} things that somebody interested in '{topic}' would ask an assistant, "
    "questions or requests.",
    "refine_question": "Here is what somebody asks an assistant:\n{text}\nRewrite it in {n} ways, "
    "each longer and more exact, in two to four sentences: tell why it is asked, add a situation, "
    "narrow it down, or ask for another form of answer.",
    "writing": "Write {n} requests to compose a text of the kind '{material}' about '{topic}', "
    "each in one or two sentences.",
    "refine_writing": "Here is a request to compose a text:\n{text}\nRewrite it in {n} ways, each "
    "with more demands, in two to four sentences: what must be in it, for whom it is, how long it "
    "is, how it is built, which facts support it.",
    "closed": "TEXT:\n{document}\nEND OF TEXT\nWrite {n} questions or tasks that can be done with "
    "this text alone: ask for something it says, have it summed up, explained or put in other "
    "words, or have a similar one written. Do not repeat the text.",
    # -- mathematics and Python
    "math_topics": "Name {n} fields of mathematics at the level: {level}.",
    "math_subtopics": "Name {n} notions or methods within the field '{topic}' of mathematics.",
    "math_problems": "Write {n} mathematics problems about '{topic}', each complete in itself and "
    "with a definite answer.",
    "math_problems_easy": "Write {n} mathematics problems about '{topic}' for beginners: small "
    "numbers, one step, a definite answer.",
    "python_topics": "Name {n} fields in which Python is used or that its programmers learn.",
    "python_subtopics": "Name {n} notions or tools within the field '{topic}' of Python.",
    "python_easy": "Write {n} Python exercises about '{topic}' for a beginner: one short function "
    "each.",
    "python_medium": "Write {n} Python exercises about '{topic}' for a working programmer: several "
    "functions, or a class.",
    "python_hard": "Write {n} hard Python exercises about '{topic}': an algorithm that has to be "
    "found, with limits on time or memory.",
    # -- conversations, and code by evolution (SPEC 5.7)
    "rules": "Write {n} instructions to an assistant that shall talk with customers about "
    "'{topic}': what it helps with, and that it keeps to that.",
    "incapable": "Write {n} requests about '{topic}' that an assistant which only writes text "
    "cannot carry out: they need the present day's news, a body, an account, a file it has not "
    "seen, or an act in the world.",
    "crossover": "These are programming tasks:\n{tasks}\nWrite {n} new ones in their spirit, on "
    "other things.",
}
SAID = "A user and an assistant said:\n{history}\n"
PAIR = SAID + ("Two answers to the last message:\n<<ANSWER A>>\n{a}\n<<ANSWER B>>\n{b}\n<<END>>\n"
               "Which one helps the user more, and is right? ")
YES_OR_NO = " Answer with Yes or No, then one reason."
PLAY = "You play the user of an assistant"
NEXT = " So far:\n{history}\nWrite the user's next message, and nothing else."
TEMPLATES = {name: text + AS_LIST for name, text in LISTS.items()} | {
    "math_entity": "Is '{entity}' a notion of mathematics: a thing that is defined, proved or "
    "computed, and on which exercises can be set?" + YES_OR_NO,
    "python_entity": "Is '{entity}' something a Python programmer would use or study: a part "
    "of the language, a library, an algorithm, a way of working?" + YES_OR_NO,
    "user_plain": PLAY + "." + NEXT,
    "user_probing": PLAY + ", a curious one who asks for reasons, comparisons and less obvious "
    "cases." + NEXT,
    "user_terse": PLAY + ", a busy and critical one who writes a few words, as people do." + NEXT,
    "distractor": "An assistant has these instructions:\n{rules}\nThis was said:\n{history}\nWrite "
    "a next message of the user that leads away from the subject in a friendly way, and nothing "
    "else.",
    "evolve": "Here is a programming task:\n{task}\nWrite one new task, made from it, that {how}. "
    "Answer with the task alone.",
    "solve": "{task}\nAnswer with one block of Python code that is complete and runs.",
    "fitness": "TASK:\n{task}\nSOLUTION:\n{code}\nDoes the solution do exactly what the task asks, "
    "without an error?" + YES_OR_NO,
    "judge": PAIR + "Neither length nor order counts. End with [[A]], [[B]], or [[C]] if they are "
    "as good.",
    "verdict": PAIR + "Answer with the letter A or B.",
    "rate": SAID + "Rate the last answer, each from 0 (lowest) "
    "to 4:\nhelpfulness: does it do what was asked\ncorrectness: is all of it true, and nothing "
    "missing\ncoherence: is it clear and consistent\ncomplexity: how much knowledge it takes to "
    "write\nverbosity: how long it is for what was asked\nAnswer with five lines, name: number.",
    "list": "Copy the items of this list word for word into a numbered list, one a line, and write "
    "nothing else:\n{text}",
}
MATERIALS = ("essay", "letter", "poem", "news item", "blog post", "short story", "dialogue",
             "product page", "speech", "summary")
LEVELS = ("elementary school", "middle school", "high school", "university")
USERS = ("user_plain", "user_probing", "user_terse")
# by hand: how a document and what is asked about it become one prompt
JOINS = ("{document}\n\n{text}", "{text}\n\nText: {document}",
         "Read this first.\n---\n{document}\n---\n{text}")
EVOLUTIONS = (
    "has one more condition or rule to keep", "needs a rarer idea in place of a usual one",
    "takes more steps of reasoning", "must also find and mend a mistake in given code",
    "sets a limit on time or memory",
)
# what ground truth can judge before you bring GSM8K's or MATH's training prompts (--prompts)
TRUTHS: tuple[dict[str, Any], ...] = (
    {"prompt": "A crate holds 12 jars. How many jars are in 7 crates?", "answer": "84"},
    {"prompt": "Ana reads 15 pages a day. In how many days has she read 180?", "answer": "12"},
    {"prompt": "Write a Python function double(x) that returns twice x.",
     "tests": "assert double(3) == 6\nassert double(-1) == -2"},
    {"prompt": "Write a Python function vowels(s) that counts the letters a, e, i, o, u in s.",
     "tests": "assert vowels('education') == 5\nassert vowels('') == 0"},
)
CODE_SEEDS = (
    "Write a function that returns the words of a text in reverse order.",
    "Write a function that tells whether two words are made of the same letters.",
    "Write a function that merges two sorted lists into one.",
    "Write a class for a queue of fixed size that drops its oldest item.",
)
# fmt: on


@dataclass(frozen=True)
class Recipe:
    """How much of everything."""

    macro_topics: int
    subtopics: int  # of each macro-topic
    questions: int  # open ones, of each topic
    refinements: int  # of each question and each writing task
    materials: int  # kinds of text, of each topic
    documents: int
    closed: int  # questions on each document
    fields: int  # of mathematics at each of four levels, and of Python
    notions: int  # of each field
    entities: int  # words of the documents that are classified as notions
    problems: int  # of each notion
    instructed: int  # prompts with verifiable instructions, in turns of three forms
    two_turn: int
    distracted: int
    incapable: int
    colonies: int
    generations: int
    offspring: int  # of each colony in a generation
    turns: int = 3  # of a dialogue (SPEC 5.3)
    samples: int = 2  # answers to a preference prompt, of each model that answers
    preference_share: float = 0.5
    """Of the prompts; the others become dialogues. No prompt becomes both."""

    def __post_init__(self) -> None:
        for name, most in (("preference_share", 1), ("materials", len(MATERIALS))):
            if getattr(self, name) > most:
                raise ValueError(f"counts {name!r}: {getattr(self, name)} is above {most}")


# topics, keywords, turns and colonies are the report's (SPEC 5.1, 5.3, 5.7), example counts are
# those of NVIDIA's published examples; what neither states is ours
RECIPES = {
    "demo": Recipe(
        macro_topics=2, subtopics=2, questions=2, refinements=1, materials=1, documents=2, closed=2,
        fields=1, notions=2, entities=4, problems=1, instructed=6, two_turn=3, distracted=2,
        incapable=2, colonies=2, generations=2, offspring=2,
    ),
    "prompts": Recipe(*[0] * 18),
    "report": Recipe(
        macro_topics=120, subtopics=24, questions=10, refinements=5, materials=5, documents=20_000,
        closed=3, fields=80, notions=50, entities=20_000, problems=3, instructed=40_000,
        two_turn=40_000, distracted=5_000, incapable=5_000, colonies=20, generations=20,
        offspring=2_500, samples=4,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class SynthesizeConfig(EngineConfig):
    """Prompts, dialogues, code and preferences from models: rows for align.py, a report.

    A model is a folder (a run's, or a Hugging Face one), which runs in this process, or a name that
    an OpenAI-compatible --endpoint serves. The same command goes on where it was stopped."""

    model: Path = Path()  # Writes the prompts, plays both sides of dialogues, judges
    endpoint: str = ""  # URL of a server, say vLLM, NIM, `generate.py serve`; key: OPENAI_API_KEY
    answerers: tuple[str, ...] = ()  # Who answers preference prompts; default: the model
    reward: str = ""  # A reward model: ranks, filters, labels; without one, the model rates
    judge: Literal["reward", "text", "logits"] = "reward"
    """Who ranks answers that nothing can verify: the rewards, or the model in both orders, by what
    it writes or by its probabilities of A and B."""
    out: Path = Path("runs/synthesize")
    recipe: Literal["demo", "prompts", "report"] = "demo"  # prompts: none but those of --prompts
    counts: dict[str, float] = field(default_factory=dict)
    """The recipe, changed: --counts questions 5 turns 1."""
    documents: tuple[Path, ...] = ()
    """Text files for closed questions and keywords; default: Python's documentation."""
    prompts: tuple[Path, ...] = ()
    """Your own: JSON lines with `prompt` or `messages`, perhaps an `answer` (a number) or `tests`
    (Python) by which ground truth judges."""
    evaluations: tuple[Path, ...] = ()
    """JSON lines of benchmarks: prompts that share 13 words with one are dropped."""
    temperature: float = 0.2  # Of everything but dialogues (greedy), answers and code (1)
    top_p: float = 0.7
    max_tokens: int = 1024
    longest: int = 4000  # Characters of an answer; longer ones are dropped
    min_helpfulness: float = 3.0  # Mean of a dialogue's answers; as NVIDIA's examples have it
    min_chosen: float = 0.0  # Reward of a chosen answer that no ground truth judged
    min_gap: float = 0.0  # Between chosen and rejected: rewards, or the other judges' margins
    near: float = 0.7  # Similarity (Jaccard) from which a prompt repeats another
    concurrency: int = 16  # Requests under way at the endpoint
    retries: int = 12
    """Of a request that the endpoint could not answer, each after a longer pause: a minute in all,
    as quotas are counted by the minute."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("concurrency", 1, 4096), ("retries", 0, 100), ("temperature", 0, 10), ("near", 0.1, 1),
            ("top_p", 1e-6, 1), ("max_tokens", 1, 1 << 20), ("longest", 1, 1 << 30),
        ):  # fmt: skip
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name}={value}: must be in {low:g}..{high:g}")
        known = {f.name for f in fields(Recipe)}
        if wrong := sorted(set(self.counts) - known):
            raise ValueError(f"counts {wrong[0]!r}: not one of {', '.join(sorted(known))}")
        if min(self.counts.values(), default=0) < 0:
            raise ValueError(f"counts {self.counts}: none below 0")
        self.amounts()

    def amounts(self) -> Recipe:
        whole = {k: v if k == "preference_share" else int(v) for k, v in self.counts.items()}
        return replace(RECIPES[self.recipe], **whole)


# ---- the synthetic data pipeline: who answers, and what is kept ----------------------------------

Record = dict[str, Any]
Want = Literal["text", "verdict", "rewards"]
Asked = list[tuple[Messages, dict[str, Any]]]  # and how to sample


@dataclass(frozen=True)
class Request:
    messages: Messages
    template: str = ""
    parents: tuple[str, ...] = ()
    sample: int = 0  # its number among equal requests


Paired = list[tuple[Any, Request]]  # with what each belongs to


class Reply(NamedTuple):
    text: str
    finish_reason: str = "stop"  # or length, too long, no answer, refused: why
    tokens: tuple[int, int] = (0, 0)  # of the prompt, of the answer
    scores: dict[str, float] = {}  # a reward model's attributes, or log-probabilities of A and B


@dataclass(frozen=True)
class Question:
    """A prompt: what is said up to a user's turn; a topic or a task as well."""

    kind: str
    messages: tuple[dict[str, str], ...]
    parents: tuple[str, ...] = ()
    topic: str = ""
    truth: dict[str, Any] = field(default_factory=dict)
    """By what a program judges: `answer`, `tests`, or `instructions` and their `scope`."""
    document: str = ""
    """That is asked about, and part of the prompt."""

    @property
    def text(self) -> str:
        """What the user says, but for the document, with which all questions on it are alike."""
        said = "\n".join(m["content"] for m in self.messages if m["role"] != "assistant")
        return said.replace(self.document, "") if self.document else said

    def grown(self, role: str, text: str, *parents: str) -> "Question":
        messages = (*self.messages, {"role": role, "content": text})
        return replace(self, messages=messages, parents=(*self.parents, *parents))

    def shorter(self, n: int) -> "Question":
        """Without its last n messages, each of which came from a record."""
        cut = slice(0, -n if n else None)
        return replace(self, messages=self.messages[cut], parents=self.parents[cut])

    def request(self, sample: int = 0) -> Request:
        return Request([*self.messages], "", self.parents[-1:], sample)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def prompt(kind: str, text: str, *parents: str, **more: Any) -> Question:
    return Question(kind, (user(text),), parents, **more)


class Local:
    """A model in this process."""

    def __init__(self, cfg: EngineConfig, rates: bool) -> None:
        self.engine, self.name = load_engine(cfg), identity(cfg.model)
        if cfg.quantize != "none":
            self.name += f" {cfg.quantize}"
        if rates != bool(self.engine.cfg.n_attributes):
            kinds = ("a language model", "a reward model")
            raise ValueError(f"{cfg.model} is {kinds[not rates]}, not {kinds[rates]}")

    def answers(self, asked: Asked, want: Want) -> Iterator[Reply]:
        """In their order; a window of them is what a kill can lose."""
        window = 16 * len(self.engine.slots)
        for i in range(0, len(asked), window):
            for rows in [self.submit(*one, want) for one in asked[i : i + window]]:
                if not rows:
                    yield Reply("", "too long")
                    continue
                done, scores = [*self.engine.finished(rows)], {}
                if want == "rewards":
                    last = done[0].scores[-len(ATTRIBUTES) :]
                    scores = dict(zip(ATTRIBUTES, last, strict=True))
                elif want == "verdict":
                    scores = {x: sum(one.logprobs) for x, one in zip("AB", done, strict=True)}
                reason = "stop" if scores else done[0].finish_reason
                tokens = (done[0].n_prompt, len(done[0].ids))
                yield Reply(done[0].text.strip(), reason, tokens, scores)

    def submit(self, chat: Messages, how: dict[str, Any], want: Want) -> list[Row]:
        """What the engine computes for an answer; nothing if that has no room in its context."""
        engine, tokenizer = self.engine, self.engine.tokenizer
        ids = (
            render_reward(chat, tokenizer) if want == "rewards" else render_chat(chat, tokenizer)[0]
        )
        letters = [[*tokenizer.encode(x)] for x in "AB"]
        room = {"text": 1, "rewards": 0, "verdict": max(map(len, letters))}[want]
        if len(ids) + room > engine.context:
            return []
        if want == "verdict":
            return [engine.submit_pair(ids.tolist(), letter) for letter in letters]
        how = dict(max_tokens=0) if want == "rewards" else how
        return engine.submit(ids, SamplingParams(stop_ids=chat_stops(tokenizer), **how))


class Endpoint:
    """A model behind an OpenAI-compatible server. The openai package repeats what failed (429, 5xx,
    a lost connection) after growing pauses, or after the one that the server asks for."""

    def __init__(self, cfg: SynthesizeConfig, name: str) -> None:
        try:
            import openai
        except ImportError as e:
            raise ValueError("--endpoint needs `pip install -e '.[endpoint]'`") from e
        self.name, self.url, self.concurrency = name, cfg.endpoint, cfg.concurrency
        how = dict(max_retries=cfg.retries, timeout=openai.Timeout(3600, connect=30))
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.client = openai.OpenAI(base_url=cfg.endpoint, api_key=key, **how)

    def answers(self, asked: Asked, want: Want) -> Iterator[Reply]:
        """In their order, at most `concurrency` under way and as many waiting behind a slow one: so
        much a kill can lose."""
        pool, under_way = ThreadPoolExecutor(self.concurrency), deque()
        try:
            for one in asked:
                if len(under_way) == 2 * self.concurrency:
                    yield under_way.popleft().result()
                under_way.append(pool.submit(self.ask, *one, want))
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, messages: Messages, how: dict[str, Any], want: Want) -> Reply:
        import openai

        if want == "verdict":
            how = how | dict(max_tokens=1, logprobs=True, top_logprobs=20)
        try:
            done = self.client.chat.completions.create(model=self.name, messages=messages, **how)
            choices = getattr(done, "choices", None)
            if choices is None:
                raise ValueError(f"no chat completion: {str(done)[:200]}")
        except (openai.OpenAIError, ValueError) as e:
            if getattr(e, "status_code", 0) in (400, 413, 422):  # its own fault, now and ever
                return Reply("", sound(f"refused: {e}"))
            what = f"{self.url}: {self.name}: {e}"
            raise ValueError(f"{what}: the same command goes on from here") from e
        if not choices:
            return Reply("", "no answer")
        used, said = done.usage, getattr(choices[0].message, "content", None)
        tokens = (used.prompt_tokens or 0, used.completion_tokens or 0) if used else (0, 0)
        text = sound(said).strip() if isinstance(said, str) else ""
        scores = {} if want == "text" else self.scores(choices[0], want)
        return Reply(text, choices[0].finish_reason or "stop", tokens, scores)

    def scores(self, choice: Any, want: Want) -> dict[str, float]:
        """Attributes, which NVIDIA's endpoints give as if they were log-probabilities, or A and B,
        if one is among the likeliest; the other one is then below them."""
        if choice.logprobs is None:
            rule = "of the attributes" if want == "rewards" else "(another --judge needs none)"
            raise ValueError(f"{self.url}: {self.name} gives no log-probabilities {rule}")
        listed = choice.logprobs.content or []
        if want == "rewards":
            return {one.token: one.logprob for one in listed if one.token in ATTRIBUTES}
        tops = [(top.token.strip(), top.logprob) for one in listed[:1] for top in one.top_logprobs]
        found = {letter: [lp for t, lp in tops if t == letter] for letter in "AB"}
        least = [min((lp for _, lp in tops), default=0.0)]
        return {x: max(lps or least) for x, lps in found.items()} if any(found.values()) else {}


def sound(text: str) -> str:
    """Half of a surrogate pair is nothing that a file can hold."""
    return text.encode(errors="replace").decode()


def identity(folder: Path) -> str:
    """A model's name in the records: other weights have another one. A run's checksums are those of
    its newest checkpoint; of a Hugging Face folder, each file's size and pieces all over it."""
    digest, steps = hashlib.sha256(), step_folders(folder / "checkpoints")
    for file in [steps[-1] / "state.json"] if steps else sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as f:
            for i in range(16):
                f.seek(size * i // 16)
                digest.update(f.read(1 << 16))
    return f"{folder.resolve().name}@{digest.hexdigest()[:12]}"


def fresh(*parts: Any) -> str:
    """The hash of what a record depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


Backend = Local | Endpoint
# what of a record stays in memory, where there may be millions: not what was asked
KEPT = ("id", "stage", "model", "text", "finish_reason", "tokens", "scores")


class Pipeline:
    """The models, and the records of what they were asked: one file a stage, appended to in the
    order of the requests, so that a killed run, started again, leaves the same bytes."""

    def __init__(self, cfg: SynthesizeConfig) -> None:
        self.cfg, self.counts, self.dropped = cfg, Counter(), []
        items = ((Path(where).name, text) for where, text in read_evaluations(cfg.evaluations))
        self.benchmarks = Decontaminator(items)
        self.backends: dict[str, Backend] = {}
        self.model = self.backend(str(cfg.model))
        self.answerers = [*map(self.backend, cfg.answerers)] or [self.model]
        self.reward = self.backend(cfg.reward, rates=True) if cfg.reward else None
        self.leads = int(os.environ.get("RANK", 0)) == 0
        self.folder = cfg.out / "records"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seconds: Counter[str] = Counter()
        self.known = {file.stem: self.read(file) for file in sorted(self.folder.glob("*.jsonl"))}
        self.used: dict[str, Record] = {}
        if world_size() > 1:
            dist.barrier()  # everyone has read before anyone writes

    def backend(self, name: str, rates: bool = False) -> Backend:
        if (key := f"{name} {rates}") not in self.backends:
            if Path(name).is_dir() and name != ".":
                made = Local(replace(self.cfg, model=Path(name)), rates)
            elif self.cfg.endpoint and name != ".":
                if world_size() > 1:
                    raise ValueError("an endpoint is asked by one process: start it with python")
                made = Endpoint(self.cfg, name)
            else:
                rule = "a model is a folder, or a name that --endpoint serves"
                raise ValueError(f"model {name!r}, endpoint {self.cfg.endpoint!r}: {rule}")
            self.backends[key] = made
        return self.backends[key]

    def read(self, file: Path) -> dict[str, Record]:
        """A stage's records; a last line that a kill cut short is taken away."""
        records, whole = {}, 0
        for number, line in enumerate(file.open("rb"), 1):
            if not line.endswith(b"\n"):
                if self.leads:
                    os.truncate(file, whole)
                break
            whole += len(line)
            try:
                record = json.loads(line)
                records[record["id"]] = {name: record[name] for name in KEPT}
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f"{file}:{number}: no record ({e}): take the line out") from e
        return records

    def ask(
        self, stage: str, requests: list[Request], by: Backend | None = None, want: Want = "text",
        **sampling: Any,
    ) -> list[Record]:  # fmt: skip
        """Each request's record: known, or made now."""
        begun, backend = time.monotonic(), by or self.model
        base = {name: getattr(self.cfg, name) for name in ("temperature", "top_p", "max_tokens")}
        sampling = base | sampling if want == "text" else {}
        known, todo, ids = self.known.setdefault(stage, {}), {}, []
        for request in requests:
            asked = (stage, request.messages, request.sample, want)
            template = fresh(TEMPLATES.get(request.template, ""))
            ids.append(fresh(*asked, template, backend.name, sampling, self.cfg.seed))
            if ids[-1] not in known:
                todo.setdefault(ids[-1], request)
        if todo:
            work = [(r.messages, dict(sampling, seed=int(k[:7], 16))) for k, r in todo.items()]
            bar = tqdm(total=len(todo), desc=stage, disable=not log.isEnabledFor(20), leave=False)
            path = self.folder / f"{stage}.jsonl" if self.leads else Path(os.devnull)
            replies = backend.answers(work, want)
            with path.open("ab") as f, bar:
                for (key, request), reply in zip(todo.items(), replies, strict=True):
                    record = dict(
                        id=key, stage=stage, template=request.template, model=backend.name,
                        sampling=sampling, seed=self.cfg.seed, sample=request.sample,
                        parents=request.parents, messages=request.messages, **reply._asdict(),
                    )  # fmt: skip
                    f.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                    f.flush()
                    known[key] = {name: record[name] for name in KEPT}
                    bar.update()
                if self.leads:
                    os.fsync(f.fileno())
        self.seconds[stage] += time.monotonic() - begun
        records = [known[key] for key in ids]
        self.used |= {record["id"]: record for record in records}
        return records

    def fill(self, template: str, parents: tuple[str, ...] = (), **inputs: Any) -> Request:
        return Request([user(TEMPLATES[template].format(**inputs))], template, parents)

    def lists(self, stage: str, n: int, inputs: list[dict[str, Any]]) -> list[list[Question]]:
        """Of each input n items: the answer is read as a list, rewritten by the model if it is
        none, and asked for again, twice at most, for what is missing."""
        found: list[dict[str, Question]] = [{} for _ in inputs]
        for attempt in range(3 if n else 0):
            short, requests = [i for i, items in enumerate(found) if len(items) < n], []
            for i in short:
                request = self.fill(stage, n=n - len(found[i]), **inputs[i])
                if found[i]:
                    others = "".join(f"\n- {q.text}" for q in found[i].values())
                    request.messages[0]["content"] += f"\nNone of these again:{others}"
                requests.append(replace(request, sample=attempt))
            records = self.ask(stage, requests)
            no_list = [a for a in records if a["text"] and a["finish_reason"] == "stop"]
            no_list = [a for a in no_list if not parse_list(a["text"])]
            mend = [self.fill("list", (a["id"],), text=a["text"]) for a in no_list]
            mended = zip(no_list, self.ask("list", mend, temperature=0.0), strict=True)
            instead = {a["id"]: b for a, b in mended}
            for i, a in zip(short, records, strict=True):
                a = instead.get(a["id"], a)
                items = parse_list(a["text"])
                for text in items if a["finish_reason"] == "stop" else items[:-1]:  # a cut one
                    found[i].setdefault(normalise(text), prompt(stage, text, a["id"]))
        self.counts[f"{stage}: lists too short"] += sum(len(items) < n for items in found)
        return [[*items.values()][:n] for items in found]

    def answers(
        self, stage: str, asked: Paired, by: Backend | None = None, **sampling: Any
    ) -> list[tuple[Any, Record]]:
        """What each request belongs to, with its answer; dropped are those that did not end by
        themselves, say nothing or are over-long."""
        good = []
        records = self.ask(stage, [request for _, request in asked], by, **sampling)
        for (what, _), a in zip(asked, records, strict=True):
            text, reason = a["text"], a["finish_reason"].partition(":")[0]
            if reason == "length":
                reason = "unfinished"
            elif reason == "stop" and not text:
                reason = "empty"
            elif reason == "stop" and len(text) > self.cfg.longest:
                reason = "over-long"
            elif reason == "stop" and MARKER.search(text):
                reason = "has a marker"
            if reason != "stop":
                evidence = f"{a['finish_reason']}, {len(text)} characters"
                self.drop(reason, stage, text, evidence, (a["id"],))
            else:
                good.append((what, a))
        return good

    def drop(self, reason: str, stage: str, text: Any, evidence: Any, parents: Any = ()) -> None:
        self.counts[f"{stage}: {reason}"] += 1
        row = dict(reason=reason, stage=stage, evidence=evidence, text=text, parents=parents)
        self.dropped.append(row)


# ---- the synthetic data pipeline: prompts --------------------------------------------------------


def history(messages: Iterable[dict[str, str]]) -> str:
    return "\n".join(f"<<{m['role'].upper()}>>\n{m['content']}" for m in messages)


def derived(
    p: Pipeline, stage: str, n: int, items: list[Question], kind: str = "", **more: Any
) -> list[Question]:
    """n new items from each item."""
    inputs = [{"topic": q.text, "text": q.text, "parents": q.parents, **more} for q in items]
    made, kind = zip(items, p.lists(stage, n, inputs), strict=True), kind or stage
    return [replace(x, kind=kind, topic=q.topic or q.text) for q, news in made for x in news]


def once(items: Iterable[Question]) -> list[Question]:
    """One of each text."""
    return [*{normalise(q.text): q for q in items}.values()]


def plain_questions(p: Pipeline, r: Recipe, about: list[Question]) -> list[Question]:
    """Open questions and writing tasks, as they are and refined."""
    asked, tasks = derived(p, "questions", r.questions, about, "open question"), []
    for material in MATERIALS[: r.materials]:
        tasks += derived(p, "writing", 1, about, material=material)
    asked += derived(p, "refine_question", r.refinements, asked, "open question")
    return [*asked, *tasks, *derived(p, "refine_writing", r.refinements, tasks, "writing")]


def documents_of(p: Pipeline, n: int) -> list[str]:
    """The beginnings of documents, 2,000 characters at most, cut at a line's end if there is one;
    none comes twice or is in a benchmark."""
    paths, found = [*p.cfg.documents], []
    given = read_documents(paths, "text") if paths else embedded_english()
    for text in itertools.islice((d for d in given if isinstance(d, ValueError) or d.strip()), n):
        if isinstance(text, ValueError):
            raise text
        cut = text.rfind("\n", 200, 2000)
        text = text[: 2000 if cut < 0 else cut].strip() if len(text) > 2000 else text
        found.append(prompt("document", text))
    return [q.text for q in hygiene(p, "documents", found)]


def closed_questions(p: Pipeline, r: Recipe, documents: list[str]) -> list[Question]:
    """About a document, which is joined in by hand-made forms."""
    rng, questions = random.Random(f"{p.cfg.seed}/joins"), []
    lists = p.lists("closed", r.closed, [{"document": text} for text in documents])
    for document, items in zip(documents, lists, strict=True):
        for q in items:
            text = rng.choice(JOINS).format(document=document, text=q.text)
            questions.append(prompt("closed question", text, *q.parents, document=document))
    return questions


def approved(
    p: Pipeline, stage: str, asked: Paired, max_tokens: int
) -> list[tuple[Any, Record, bool]]:
    """What each request belongs to, the answer, and whether it begins with Yes, however it ends."""
    records = p.ask(stage, [one for _, one in asked], temperature=0.0, max_tokens=max_tokens)
    yes = re.compile(r"\W*yes\b", re.IGNORECASE)
    pairs = zip(asked, records, strict=True)
    return [(what, a, bool(yes.match(a["text"]))) for (what, _), a in pairs]


def notions(p: Pipeline, r: Recipe, documents: list[str], about: str) -> list[Question]:
    """Keywords of mathematics or Python: fields, what is within them, and the documents' words that
    the model takes for one."""
    inputs = [{"level": level} for level in LEVELS] if about == "math" else [{}]
    fields_ = once(q for items in p.lists(f"{about}_topics", r.fields, inputs) for q in items)
    # what may be a notion: long words that return
    words = Counter(w.lower() for text in documents for w in re.findall(r"[^\W\d_]{6,}", text))
    names = sorted(words, key=lambda w: (-words[w], w))[: r.entities]
    asked = [(name, p.fill(f"{about}_entity", entity=name)) for name in names]
    judged = approved(p, f"{about}_entity", asked, 64)
    found = [prompt("notion", name, a["id"]) for name, a, yes in judged if yes]
    return once([*fields_, *derived(p, f"{about}_subtopics", r.notions, fields_), *found])


def problems(p: Pipeline, r: Recipe, documents: list[str]) -> list[Question]:
    """Mathematics in two grades, Python in three, keywords in turns."""
    questions = []
    for about, grades in (
        ("math", ("math_problems", "math_problems_easy")),
        ("python", ("python_easy", "python_medium", "python_hard")),
    ):
        words = notions(p, r, documents, about)
        for k, grade in enumerate(grades):
            questions += derived(p, grade, r.problems, words[k :: len(grades)], about)
    return questions


def instructed(p: Pipeline, n: int, source: list[Question]) -> list[Question]:
    """Verifiable instructions in three forms: for one answer, for every answer of a conversation,
    and for a second answer that revises the first (SPEC 5.2)."""
    rng, out, revised = random.Random(f"{p.cfg.seed}/instructions"), [], []
    for i in range(n if source else 0):
        q, scope = rng.choice(source), ("single", "conversation", "revision")[i % 3]
        drawn = draw_instructions(rng, rng.choice((1, 1, 2)), q.text)
        text = " ".join(one.text for one in drawn)
        truth = {"instructions": [one.to_json() for one in drawn], "scope": scope}
        new = replace(q, kind=f"instructions, {scope}", truth=truth)
        if scope == "revision":
            revised.append(((new, text), q.request()))
        else:
            text = f"In each of your answers: {text}" if scope == "conversation" else text
            out.append(replace(new, messages=(user(f"{q.text}\n{text}"),)))
    for (q, text), a in p.answers("first_answers", revised):
        again = f"Write your answer again. {text}"
        out.append(q.grown("assistant", a["text"], a["id"]).grown("user", again))
    return out


def distracted(p: Pipeline, n: int, about: list[Question]) -> list[Question]:
    """Instructions to keep to a subject, a conversation, and a message that leads away from it."""
    asked = []
    for q in derived(p, "rules", 1, about[:n], "distracted"):
        rules = {"role": "system", "content": q.text}
        first = user(f"I have a question about {q.topic}. Where do I begin?")
        asked.append(replace(q, messages=(rules, first)))
    answered = answer_each(p, "on_topic", asked)
    return users_turn(p, "distractor", answered, styles=("distractor",))


def answer_each(p: Pipeline, stage: str, chats: list[Question], **sampling: Any) -> list[Question]:
    said = p.answers(stage, [(q, q.request()) for q in chats], **sampling)
    return [q.grown("assistant", a["text"], a["id"]) for q, a in said]


def users_turn(
    p: Pipeline, stage: str, chats: list[Question], first: int = 0, styles: tuple[str, ...] = USERS
) -> list[Question]:
    """Each chat with one more message of the user, whom the model plays, greedily in a dialogue
    (SPEC 5.3), in one style or another from the first one on."""
    asked = []
    for i, q in enumerate(chats, first):
        rules, turns = q.messages[0]["content"], q.messages[q.messages[0]["role"] == "system" :]
        how = dict(history=history(turns), rules=rules)
        asked.append((q, p.fill(styles[i % len(styles)], q.parents[-1:], **how)))
    said = p.answers(stage, asked, temperature=0.0 if styles == USERS else 1.0)
    return [q.grown("user", text, a["id"]) for q, a in said if (text := clean(a["text"]))]


PLEASANTRIES = re.compile(
    r"^\W*(thanks?( you)?( (so|very) much)?( for [^.!?\n]*)?|hi( there)?|hello( there)?|hey|sure|"
    r"great|of course|certainly|absolutely|i('d| would) be (happy|glad) to[^.!?\n]*|"
    r"that('s| is) (great|helpful|very helpful|interesting)[^.!?\n]*)\s*([.!,:?]+\s*|[-–—]+\s+|$)",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """A played user's message without its role, what the assistant would say then, quotes around
    it, greetings and thanks."""
    text = re.sub(r"^\W*user[\s*]*[:>][\s*:>]*", "", text.strip(), flags=re.IGNORECASE)
    text = text.partition("<<ASSISTANT>>")[0].strip()
    if quoted := re.fullmatch(r"[\"“]([^\"“”]*)[\"”]", text):
        text = quoted[1].strip()
    while (shorter := PLEASANTRIES.sub("", text, count=1)) != text:
        text = shorter
    return text[:1].upper() + text[1:]


def converse(p: Pipeline, stage: str, chats: list[Question], turns: int) -> list[Question]:
    """`turns` answers to each chat, greedily, and between them a user in one of three styles, both
    played by the model (SPEC 5.3)."""
    for turn in range(turns):
        if turn:
            chats = users_turn(p, f"{stage}_user", chats, first=turn)
        chats = answer_each(p, f"{stage}_assistant", chats, temperature=0.0)
    return chats


def own_prompts(cfg: SynthesizeConfig) -> list[Question]:
    """Those of --prompts, and a few that ground truth can judge."""
    given = [one for path in cfg.prompts for one in numbered_lines(path)]
    if cfg.recipe != "prompts":
        given = [("built in", json.dumps(row).encode()) for row in TRUTHS] + given
    questions = []
    for where, line in given:
        try:
            row = json_object(line)
            chat = plain(row["messages"]) if "messages" in row else [user(need(row, "prompt", str))]
            check_messages(chat)
            if chat[-1]["role"] != "user":
                raise ValueError("the last message is not the user's")
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e
        truth = {k: str(row[k]) for k in ("answer", "tests") if row.get(k) is not None}
        questions.append(Question("given", (*chat,), truth=truth))
    return questions


def all_prompts(p: Pipeline, r: Recipe) -> list[Question]:
    """What people gave comes first: a mistake in it shows before anything is asked."""
    own, documents = own_prompts(p.cfg), documents_of(p, r.documents)
    macro = [replace(q, topic=q.text) for q in p.lists("macro_topics", r.macro_topics, [{}])[0]]
    about = once([*macro, *derived(p, "subtopics", r.subtopics, macro)])
    both = plain_questions(p, r, about)
    begun = [replace(q, kind="two turns") for q in both if q.kind == "open question"]
    begun = converse(p, "two_turn", begun[::-1][: r.two_turn], 1)
    return [
        *own, *both, *closed_questions(p, r, documents), *problems(p, r, documents),
        *instructed(p, r.instructed, both), *distracted(p, r.distracted, about),
        *users_turn(p, "two_turn_user", begun),
        *derived(p, "incapable", 1, about[::-1][: r.incapable]),
    ]  # fmt: skip


def hygiene(
    p: Pipeline, stage: str, questions: list[Question], new_from: int = 0
) -> list[Question]:
    """Those, from the given one on, that repeat none before them and are in no benchmark."""
    good, twins = [], near_duplicates([q.text for q in questions], p.cfg.near)
    for q, twin in [*zip(questions, twins, strict=True)][new_from:]:
        reason = evidence = ""
        if twin is not None:
            reason = "duplicate" if twin[1] == 1 else "near-duplicate"
            evidence = f"{twin[1]:.3f}: {questions[twin[0]].text}"
        elif marker := MARKER.search(q.text):
            reason, evidence = "has a marker", marker[0]
        elif evidence := p.benchmarks.evidence(q.text) or "":
            reason = "contaminated"
        if reason:
            p.drop(reason, stage, q.text, evidence, q.parents)
        else:
            good.append(q)
    return good


def clean_prompts(p: Pipeline, questions: list[Question]) -> list[Question]:
    """Kind by kind, for a prompt may return in another one, say with an instruction, and document
    by document, for what is asked of one may be asked of another."""
    groups: dict[tuple[str, str], list[Question]] = {}
    for q in questions:
        groups.setdefault((q.kind, q.document), []).append(q)
    return [q for group in groups.values() for q in hygiene(p, "prompts", group)]


# ---- the synthetic data pipeline: dialogues, judges, preferences, code ---------------------------

Rating = list[float] | None  # ATTRIBUTES; None: there is none
# "helpfulness: 3.5", but not the scale in "helpfulness (0-4): 3"
RATED = re.compile(
    rf"(?i)\b({'|'.join(ATTRIBUTES)})\b(?:\W*\(.*?\))?[^\w\n]*([0-4](?:\.\d+)?)(?![\d-])"
)


def rate(p: Pipeline, stage: str, chats: list[Question]) -> list[Rating]:
    """The attributes of each chat's last answer: the reward model's, or what the model writes."""
    if p.reward:
        found = [
            a["scores"] for a in p.ask(stage, [q.request() for q in chats], p.reward, "rewards")
        ]
    else:
        asked = [p.fill("rate", q.parents[-1:], history=history(q.messages)) for q in chats]
        said = p.ask(stage, asked, temperature=0.0, max_tokens=64)
        found = [{k.lower(): float(x) for k, x in RATED.findall(a["text"])} for a in said]
    whole = [{*ATTRIBUTES} <= {*x} for x in found]
    return [
        [x[name] for name in ATTRIBUTES] if ok else None for x, ok in zip(found, whole, strict=True)
    ]


def holds(q: Question, n: int) -> bool | None:
    """Ground truth about the answer after n messages, or about every answer from there on; None:
    nothing is known."""
    truth, answers = q.truth, [m["content"] for m in q.messages[n::2]]
    if "answer" in truth:
        return same_number(answers[0], truth["answer"])
    if "tests" in truth:
        code = extract_code(answers[0])
        return code is not None and run_python(f"{code}\n{truth['tests']}\n").ok
    if "instructions" in truth:
        asked = [Instruction.from_json(one) for one in truth["instructions"]]
        answers = answers if truth["scope"] == "conversation" else answers[:1]
        return all(one.met(text, q.messages[n - 1]["content"]) for one in asked for text in answers)
    return None


def dialogues(p: Pipeline, questions: list[Question], turns: int) -> list[Record]:
    """Conversations of some turns; kept are those that obey their truth and whose answers are rated
    helpful on average."""
    chats = converse(p, "dialogue", questions, turns) if turns else []
    rows, steps = [], [q.shorter(2 * k) for q in chats for k in reversed(range(turns))]
    ratings = iter(rate(p, "dialogue_ratings", steps))
    for q in chats:
        rated = [next(ratings) for _ in range(turns)]
        mean = [sum(x) / turns for x in zip(*rated, strict=True)] if all(rated) else None
        if holds(q, len(q.messages) + 1 - 2 * turns) is False:
            p.drop("false", "dialogue", q.messages, q.truth, q.parents)
        elif mean is None:
            p.drop("not rated", "dialogue", q.messages, rated, q.parents)
        elif mean[0] < p.cfg.min_helpfulness:
            p.drop("not helpful", "dialogue", q.messages, rated, q.parents)
        else:
            rows.append(row_of(q, scores=mean))
    return rows


def row_of(q: Question, **more: Any) -> Record:
    """As align.py reads it, then what it comes from."""
    origin = dict(kind=q.kind, topic=q.topic, parents=q.parents)
    return {"messages": [*q.messages], **more, **origin}


def verdict_of(text: str) -> float | None:
    """1: A is better, -1: B, 0: as good; None: no verdict, or several."""
    found = {*re.findall(r"\[\[([ABC])\]\]", text)}
    return {"A": 1.0, "B": -1.0, "C": 0.0}[found.pop()] if len(found) == 1 else None


def compare(p: Pipeline, pairs: list[tuple[Question, str, str]]) -> list[float]:
    """How much better the first answer is, by the model that sees them in both orders: what it says
    counts if both orders agree, its log-odds of A are averaged. So swapping the answers negates
    the result, bit by bit."""
    logits, c = p.cfg.judge == "logits", p.counts
    asked = [
        p.fill("verdict" if logits else "judge", history=history(q.messages), a=x, b=y)
        for q, a, b in pairs
        for x, y in ((a, b), (b, a))
    ]
    if logits:
        scores = [a["scores"] for a in p.ask("judge", asked, want="verdict")]
        said = [x["A"] - x["B"] if x else None for x in scores]
    else:
        said = [verdict_of(a["text"]) for a in p.ask("judge", asked, temperature=0.0)]
    out = []
    for ab, ba in zip(said[::2], said[1::2], strict=True):
        c["judge: pairs"] += 1
        if ab is None or ba is None:
            c["judge: no verdict"] += 1
            out.append(0.0)
            continue
        agree = np.sign(ab) == -np.sign(ba)
        c["judge: both orders agree"] += int(agree)
        c["judge: first wins"] += (ab > 0) + (ba > 0)
        c["judge: decided"] += (ab != 0) + (ba != 0)
        out.append((ab - ba) / 2 if logits else ab if agree else 0.0)
    return out


class Answers(NamedTuple):
    """A prompt's, with the judge's scores (None: it has none) and the ratings."""

    question: Question
    texts: list[str]
    parents: list[str]
    scores: list[float | None]
    ratings: list[Rating]


def reward_of(rating: Rating) -> float | None:
    return None if rating is None else float(aggregate(rating))


def judged(p: Pipeline, questions: list[Question], samples: int) -> list[Answers]:
    """Several answers to each prompt from every model that answers, with scores by the judge,
    ground truth aside, and ratings for rewards and labels."""
    sets: list[tuple[Question, dict[str, str]]] = [(q, {}) for q in questions]  # text → record
    for backend in dict.fromkeys(p.answerers):
        asked = [(texts, q.request(k)) for q, texts in sets for k in range(samples)]
        for texts, a in p.answers("responses", asked, backend, temperature=1.0, top_p=1.0):
            if (twin := texts.setdefault(a["text"], a["id"])) != a["id"]:
                p.drop("repeated", "responses", a["text"], twin, (a["id"],))
    chats = [q.grown("assistant", t, s) for q, texts in sets for t, s in texts.items()]
    ratings = iter(rate(p, "response_ratings", chats))
    pairs = [(q, a, b) for q, texts in sets for a, b in itertools.combinations(texts, 2)]
    margins = iter(compare(p, pairs) if p.cfg.judge != "reward" else [])
    out = []
    for q, texts in sets:
        rated = [next(ratings) for _ in texts]
        if p.cfg.judge == "reward":
            scores = [reward_of(x) for x in rated]
        else:  # the mean margin over the other answers
            scores = [0.0] * len(texts)
            for i, j in itertools.combinations(range(len(texts)), 2):
                margin = next(margins) / (len(texts) - 1)
                scores[i], scores[j] = scores[i] + margin, scores[j] - margin
        out.append(Answers(q, [*texts], [*texts.values()], scores, rated))
    return out


def choose(p: Pipeline, a: Answers) -> tuple[int, int, bool] | str:
    """The numbers of chosen and rejected and whether it is ground truth that says so, or the reason
    why there are none."""
    if len(a.texts) < 2:
        return "fewer than two answers"
    n = len(a.question.messages)
    truth = [holds(a.question.grown("assistant", text), n) for text in a.texts]
    scored = [x is not None for x in a.scores]
    if truth[0] is None:
        found = best_and_worst(a.texts, a.scores, scored, p.cfg.min_gap)
        reward = reward_of(a.ratings[found[0]]) if found else None
        if reward is not None and reward < p.cfg.min_chosen:
            return "chosen is not good enough"
        return (*found, False) if found else "tie" if sum(scored) > 1 else "not rated"
    # of the right ones the best by the judge, of the wrong ones the worst
    order = sorted(range(len(scored)), key=lambda i: (scored[i], a.scores[i] or 0.0))
    right, wrong = [i for i in order if truth[i]], [i for i in order if not truth[i]]
    for i, j in itertools.product(right, wrong):
        if scored[i] and scored[j]:
            p.counts["judge: pairs with a truth"] += 1
            p.counts["judge: agrees with the truth"] += a.scores[i] > a.scores[j]
    if not right or not wrong:
        return "all right" if right else "all wrong"
    return right[-1], wrong[0], True


def preference_row(p: Pipeline, a: Answers) -> Record | None:
    """With rewards where they say the same as the choice."""
    if isinstance(found := choose(p, a), str):
        p.drop(found, "preference", a.texts, a.scores, (*a.question.parents, *a.parents))
        return None
    best, worst, truth = found
    row = dict(chosen=a.texts[best], rejected=a.texts[worst])
    row["judge"] = "truth" if truth else p.cfg.judge
    high, low = reward_of(a.ratings[best]), reward_of(a.ratings[worst])
    if high is not None and low is not None and high > low:
        row |= dict(chosen_reward=high, rejected_reward=low)
    else:
        p.counts["preference: no rewards, or they contradict the choice"] += 1
    return row_of(replace(a.question, parents=(*a.question.parents, *a.parents)), **row)


def genetic(p: Pipeline, r: Recipe) -> list[Record]:
    """Genetic-Instruct (SPEC 5.7): colonies of programming tasks, new ones by crossover (few-shot)
    or by one of five evolutions; who has a solution that compiles and passes the judge lives on.
    The colonies are merged after every generation."""
    population, rows = [prompt("code", text, topic="Python") for text in CODE_SEEDS], []
    for generation in range(r.generations):
        crossed, evolved = [], []
        for colony in range(r.colonies):
            rng = random.Random(f"{p.cfg.seed}/colony {colony}/{generation}")
            for _ in range(r.offspring):
                if rng.random() < 0.5:
                    some = rng.sample(population, min(3, len(population)))
                    tasks = "\n".join(f"- {q.text}" for q in some)
                    parents = tuple(s for q in some for s in q.parents)
                    crossed.append({"tasks": tasks, "parents": parents})
                else:
                    q, how = rng.choice(population), rng.choice(EVOLUTIONS)
                    evolved.append((q, p.fill("evolve", q.parents, task=q.text, how=how)))
        made = [(q.text, *q.parents) for items in p.lists("crossover", 1, crossed) for q in items]
        made += [(a["text"], a["id"]) for _, a in p.answers("evolve", evolved, temperature=1.0)]
        born = [prompt("code", *one, topic="Python") for one in made]
        new = solved(p, hygiene(p, "code", [*population, *born], len(population)))
        rows += [row_of(chat) for chat in new]
        population += [chat.shorter(1) for chat in new]
    return rows


def solved(p: Pipeline, tasks: list[Question]) -> list[Question]:
    """The tasks with a solution that compiles and is judged right."""
    asked = [(q, p.fill("solve", q.parents, task=q.text)) for q in tasks]
    to_judge, fit = [], []
    for q, a in p.answers("solve", asked):
        code = extract_code(a["text"])
        if code is None or not compiles(code):
            p.drop("does not compile", "code", a["text"], q.text, (a["id"],))
        else:
            to_judge.append(((q, a), p.fill("fitness", (a["id"],), task=q.text, code=code)))
    for (q, a), verdict, yes in approved(p, "fitness", to_judge, 128):
        if yes:
            fit.append(q.grown("assistant", a["text"], a["id"]))
        else:
            p.drop("not fit", "code", a["text"], verdict["text"], (a["id"], verdict["id"]))
    return fit


# ---- the synthetic data pipeline: files ----------------------------------------------------------


def nemo(name: str, row: Record) -> Record:
    """A row of a file in the shape that NeMo's has: preferences and labels with the template as
    text."""
    system, turns = "", row["messages"]
    if turns[0]["role"] == "system":
        system, turns = turns[0]["content"], turns[1:]
    if "sft" in name:
        said = [{"from": ROLES[m["role"]], "value": m["content"], "label": None} for m in turns]
        return {"system": system, "mask": "User", "conversations": said, "type": None}
    said = (f"<extra_id_1>{ROLES[m['role']]}\n{m['content']}\n" for m in turns)
    text = f"<extra_id_0>System\n{system}\n{''.join(said)}"
    if name == "reward":
        label = [float(min(4, max(0, round(x)))) for x in row["label"]]
        return {"text": f"{text}<extra_id_2>", "label": [float(IGNORE)] * 4 + label}
    out = {"prompt": text + TO_ANSWER}
    out |= {f"{side}_response": f"{row[side]}\n<extra_id_1>" for side in ("chosen", "rejected")}
    return out | {key: row[key] for key in ("chosen_reward", "rejected_reward") if key in row}


def put(path: Path, lines: Iterable[str]) -> dict[str, Any]:
    """A file, whole or not there; how many lines it has, and its hash."""
    rows, digest, new = 0, hashlib.sha256(), path.with_suffix(".tmp")
    with new.open("wb") as f:
        for line in lines:
            f.write(whole := line.encode() + b"\n")
            digest.update(whole)
            rows += 1
    new.rename(path)
    return dict(rows=rows, sha256=digest.hexdigest())


def synthesize(cfg: SynthesizeConfig) -> Path:
    """All stages; the folder with the rows, the manifest and the report."""
    begun = time.monotonic()
    p, r = Pipeline(cfg), cfg.amounts()
    questions = clean_prompts(p, all_prompts(p, r))
    random.Random(f"{cfg.seed}/split").shuffle(questions)
    n = round(len(questions) * r.preference_share)
    sets = judged(p, questions[:n], r.samples)
    rated = [
        row_of(a.question.grown("assistant", text, parent), label=rating)
        for a in sets
        for text, parent, rating in zip(a.texts, a.parents, a.ratings, strict=True)
        if rating
    ]
    pairs = [row for a in sets if (row := preference_row(p, a))]
    files = {
        "sft": dialogues(p, questions[n:], r.turns), "code_sft": genetic(p, r), "preference": pairs,
        "rpo": [row for row in pairs if "chosen_reward" in row], "reward": rated,
        "dropped": p.dropped,
    }  # fmt: skip
    if p.leads:
        written, dump = {}, partial(json.dumps, ensure_ascii=False)
        for name, rows in files.items():
            written[name] = put(cfg.out / f"{name}.jsonl", map(dump, rows))
            if name != "dropped":
                shaped = (dump(nemo(name, row)) for row in rows)
                written[f"nemo_{name}"] = put(cfg.out / f"nemo_{name}.jsonl", shaped)
        write_manifest(p, written)
        drawn = draw_histograms(cfg.out / "histograms.png", files, questions)
        write_report(p, questions, written, drawn, time.monotonic() - begun)
    return cfg.out


def tokens_of(p: Pipeline) -> dict[str, dict[str, int]]:
    """Of each stage what this run used, made now or before."""
    stages: dict[str, dict[str, int]] = {}
    for record in p.used.values():
        stage = stages.setdefault(record["stage"], dict(records=0, prompt_tokens=0, new_tokens=0))
        for key, n in zip(stage, (1, *record["tokens"]), strict=True):
            stage[key] += n
    return stages


def write_manifest(p: Pipeline, written: dict[str, Record]) -> None:
    """Nothing in it depends on when, where or how fast it was made: models by their identities,
    files by their contents."""
    elsewhere = {"out", "endpoint", "concurrency", "retries", "slots", "chunk", "compile", "mesh"}
    given = ("documents", "prompts", "evaluations")
    names = dict(model=p.model.name, answerers=[one.name for one in p.answerers])
    names["reward"] = p.reward.name if p.reward else ""
    read = {key: [f"{f.name} {digest_of(f)}" for f in getattr(p.cfg, key)] for key in given}
    config = {k: v for k, v in asdict(p.cfg).items() if k not in elsewhere}
    manifest = {
        "config": config | names | read,
        "recipe": asdict(p.cfg.amounts()),
        "stages": tokens_of(p),
        "counts": dict(sorted(p.counts.items())),
        "files": written,
    }
    put(p.cfg.out / "manifest.json", [json.dumps(manifest, indent=2)])


def digest_of(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def table(head: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> list[str]:
    lines = (head, ["---"] * len(head), *rows)
    return ["", *(f"| {' | '.join(map(str, row))} |" for row in lines)]


def share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({part / whole:.1%})" if whole else "")


def write_report(
    p: Pipeline, questions: list[Question], written: dict[str, Record], drawn: bool, seconds: float
) -> None:
    stages, c = tokens_of(p), p.counts
    calls = sum(stage["records"] for stage in stages.values())
    mended = stages.get("list", {}).get("records", 0)
    reasons = Counter((row["stage"], row["reason"]) for row in p.dropped)
    spent = [(s, *n.values(), f"{p.seconds[s]:.1f}") for s, n in stages.items()]
    agree = share(c["judge: both orders agree"], c["judge: pairs"])
    first = share(c["judge: first wins"], c["judge: decided"])
    right = share(c["judge: agrees with the truth"], c["judge: pairs with a truth"])
    lines = [
        f"# {calls} answers, {seconds:.0f} s", "",
        f"Spent on lists that had to be rewritten: {share(mended, calls)}.",
        *table(("file", "rows"), [(f"{name}.jsonl", one["rows"]) for name, one in written.items()]),
        *table(("prompts", "kept"), sorted(Counter(q.kind for q in questions).items())),
        *table(("dropped at", "why", "rows"), [(*key, n) for key, n in sorted(reasons.items())]),
        *table(("stage", "answers", "prompt tokens", "new tokens", "seconds"), spent), "",
        f"Judge: {p.cfg.judge}. Both orders agree: {agree}; the first answer wins: {first}; no "
        f"verdict: {c['judge: no verdict']}; agrees with ground truth: {right}.", "",
        *["![lengths and topics](histograms.png)"] * drawn,
    ]  # fmt: skip
    put(p.cfg.out / "report.md", lines)
    log.info("\n".join(lines))


def draw_histograms(path: Path, files: dict[str, list[Record]], questions: list[Question]) -> bool:
    """Lengths of what was written, and the prompts of each topic; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no histograms: pip install -e '.[report]'")
        return False
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    said, pairs = [m for row in files["sft"] for m in row["messages"]], files["preference"]
    lengths = {
        "prompts": [len(q.text) for q in questions],
        "answers": [len(m["content"]) for m in said if m["role"] == "assistant"],
        "chosen": [len(row["chosen"]) for row in pairs],
        "rejected": [len(row["rejected"]) for row in pairs],
    }
    if drawn := {name: x for name, x in lengths.items() if x}:
        left.hist([*drawn.values()], bins=20, label=[*drawn])
        left.legend(frameon=False)
    left.set(xlabel="characters", ylabel="texts")
    found = Counter(q.topic or q.kind for q in questions).most_common(20)[::-1]
    names = [name[:30].replace("$", r"\$") for name, _ in found]  # dollars are no formula
    right.barh(range(len(found)), [n for _, n in found], tick_label=names)
    right.set(xlabel="prompts of a topic")
    figure.savefig(path, dpi=120)
    return True


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

    def submit(row: dict[str, Any]) -> list[Row]:
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


def submit_to_score(engine: Engine, row: dict[str, Any]) -> list[Row]:
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


# the report's Table 3: lm-eval's task and the shots. BBH by chain of thought, which its level (85)
# suggests; HumanEval runs what the model wrote, and lm-eval asks for your consent to that
BASE_TASKS = {
    "arc_challenge": 25, "winogrande": 5, "hellaswag": 10, "mmlu": 5, "bbh_cot_fewshot": 3,
    "humaneval": 0,
}  # fmt: skip


@dataclass(frozen=True)
class EvaluateConfig(EngineConfig):
    """lm-evaluation-harness on this engine (extra `eval`). Its tasks fetch their data; --jsonl is
    for your own, without a network."""

    tasks: tuple[str, ...] = ()
    """lm-eval's names; default: the report's Table 3, each with its number of shots."""
    jsonl: tuple[Path, ...] = ()
    """Rows of `question`, `choices` and `answer` (its number), or of `question` and `answer`."""
    shots: int | None = None
    """Examples before each question; default: the report's, else the task's own."""
    limit: int | None = None  # Questions of each task
    out: Path | None = None  # A JSON file for all results


def local_task(path: Path) -> dict[str, Any]:
    """A file of questions as an lm-eval task: by choice where there are choices, else written."""
    row = json.loads(path.open(encoding="utf-8").readline())
    task = {
        "task": path.stem, "dataset_path": "json", "test_split": "test", "fewshot_split": "train",
        "dataset_kwargs": {"data_files": {"train": str(path), "test": str(path)}},
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
    }  # fmt: skip
    if "choices" in row:
        metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
        kind = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
    else:
        metrics = [{"metric": "exact_match"}]
        kind = {"output_type": "generate_until", "generation_kwargs": {"until": ["\n"]}}
    return task | kind | {"metric_list": metrics}


def harness(engine: Engine) -> Any:
    """The engine as lm-eval's language model."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as e:
        raise ValueError("evaluation needs lm-eval: pip install -e '.[eval]'") from e

    class Harness(TemplateLM):
        eot_token_id = engine.tokenizer.special("</s>")

        def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
            return engine.tokenizer.encode(string).tolist()

        def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
            # a context that is too long loses its beginning
            pairs = [(c[len(x) - engine.context :], x) for _, c, x in requests]
            return [(sum(done.logprobs), is_greedy(done)) for done in engine.score(pairs)]

        def loglikelihood_rolling(self, requests: list, **kwargs: Any) -> list[float]:
            out = []
            for request in requests:
                ids = self.tok_encode(request.args[0])
                windows = get_rolling_token_windows(ids, self.eot_token_id, engine.context - 1, 1)
                pairs = map(make_disjoint_window, windows)
                out.append(sum(sum(done.logprobs) for done in engine.score(pairs)))
            return out

        def generate_until(self, requests: list, **kwargs: Any) -> list[str]:
            rows = []
            for request in requests:
                text, how = request.args
                until = how.get("until") or ()
                params = SamplingParams(
                    max_tokens=how.get("max_gen_toks", 256),
                    temperature=how.get("temperature", 1.0) if how.get("do_sample") else 0.0,
                    top_p=how.get("top_p", 1.0),
                    stop=(until,) if isinstance(until, str) else tuple(until),
                )
                room = max(1, engine.context - params.max_tokens)
                rows += engine.submit(self.tok_encode(text)[-room:], params)
            return [done.text for done in engine.finished(rows)]

    return Harness()


def evaluate(cfg: EvaluateConfig) -> None:
    engine = load_engine(cfg)
    lm, results = harness(engine), {}
    import lm_eval

    names = cfg.tasks or (() if cfg.jsonl else tuple(BASE_TASKS))
    tasks = [(name, BASE_TASKS.get(name)) for name in names]
    for task, shots in tasks + [(local_task(path), 0) for path in cfg.jsonl]:
        shots = shots if cfg.shots is None else cfg.shots
        how = dict(num_fewshot=shots, limit=cfg.limit, bootstrap_iters=0)
        found = lm_eval.simple_evaluate(lm, tasks=[task], **how)
        log.info(lm_eval.utils.make_table(found))
        results |= found["results"]
    if cfg.out:
        with json_lines(cfg.out, engine) as write:
            write(results)


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "sample": (SampleConfig, sample_command),
    "chat": (ChatConfig, chat),
    "score": (ScoreConfig, score),
    "serve": (ServeConfig, serve),
    "evaluate": (EvaluateConfig, evaluate),
    "synthesize": (SynthesizeConfig, synthesize),
}


def main() -> None:
    """The log goes to stderr, from the first process alone: stdout is for answers."""
    log.handlers = [logging.StreamHandler()]
    log.setLevel(logging.ERROR if int(os.environ.get("RANK", 0)) else logging.INFO)
    log.propagate = False
    try:
        configs = {name: config for name, (config, _) in COMMANDS.items()}
        cfg = tyro.extras.subcommand_cli_from_dict(configs, description=__doc__)
        dict(COMMANDS.values())[type(cfg)](cfg)
    except (ValueError, OSError) as e:
        sys.exit(f"generate.py: error: {e}")
    except KeyboardInterrupt:
        os._exit(130)  # without waiting for what an endpoint has still to answer
    if dist.is_initialized():
        shut_down()


if __name__ == "__main__":
    main()
