"""An engine that samples from the model that was trained, chats with it and scores by it.

Many requests share a batch. Each has a row of the key-value cache; a row is refilled as soon as its
request is finished, and a prefix that another row has already computed is copied. The answer to a
request depends on its own seed and positions, never on the other requests of the batch.

    python generate.py sample runs/nano --prompts "import os" "def main" --max-tokens 64
    python generate.py chat path/to/a/Nemotron/folder
    python generate.py score path/to/a/reward/model --file conversations.jsonl
"""
# Shapes in comments: N rows  T tokens  S keys  D dim  K key-value heads  E head_dim  V vocab_size,
# as in model.py

import hashlib
import itertools
import json
import logging
import math
import operator
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that spin longer starve a busy machine

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module
from tqdm import tqdm

from data import (
    ATTRIBUTES,
    Tokenizer,
    aggregate,
    embedded_english,
    load_tokenizer,
    read_preference,
    read_records,
    render_chat,
    render_reward,
)
from model import ModelConfig, Nemotron, RewardHead, at_least_fp32, check_ranges
from parallel import (
    DTYPES,
    MeshConfig,
    fp32_logits,
    from_rank_0,
    init_mesh,
    on_meta,
    open_weights,
    own_region,
    parsed,
    read_config,
    set_up_logging,
    shut_down,
    tp_plan,
    world_size,
)

log = logging.getLogger("nemotron4")


# ---- the model, built for inference --------------------------------------------------------------


class InferenceLinear(nn.Module):
    """Multiplies by a matrix, or by this tensor-parallel rank's share of one. `reduce_group`: the
    processes whose results add up to the product. A float8 matrix has a scale for each row. On a
    CPU an fp32 matrix is laid out once for oneDNN: F.linear makes few rows up to 4 times as slow.
    """

    def __init__(self, weight: Tensor, reduce_group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.weight = weight
        self.scale = None
        self.reduce_group = reduce_group
        fp32_on_cpu = weight.is_cpu and weight.dtype == torch.float32
        if fp32_on_cpu and torch.backends.mkldnn.is_available():
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.is_mkldnn:
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        else:
            y = F.linear(x, self.weight.to(x.dtype))
        if self.scale is not None:
            y = y * self.scale
        if self.reduce_group is not None:
            dist.all_reduce(y, group=self.reduce_group)
        return y

    def quantize(self, tp: dist.ProcessGroup) -> None:
        """Keep the matrix in float8. A row's scale is the whole matrix's times a power of two: so
        one that was read from a float8 folder gets the same numbers again."""
        weight = self.weight.to_dense(torch.float32)
        rows = weight.abs().amax(1, keepdim=True).clamp(min=1e-12)
        largest = rows.max()
        dist.all_reduce(largest, dist.ReduceOp.MAX, tp)
        scale = largest / 448 * (rows / largest).log2().ceil().exp2()  # float8 ends at 448
        self.scale = scale[:, 0].to(self.weight.dtype)
        self.weight = (weight / scale).to(torch.float8_e4m3fn)


class ShardedEmbedding(nn.Module):
    """Looks up the tokens that this tensor-parallel rank holds, and adds what the others find."""

    def __init__(self, weight: Tensor, tp: DeviceMesh) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.group = tp.get_group()
        self.first = tp.get_local_rank() * len(weight)

    def forward(self, ids: Tensor) -> Tensor:
        local = ids - self.first
        held = (local >= 0) & (local < len(self.weight))
        h = F.embedding(local * held, self.weight) * held[..., None]
        dist.all_reduce(h, group=self.group)
        return h


def inference_model(model: Nemotron, parts: dict[str, Tensor], tp: DeviceMesh | None) -> Nemotron:
    """Put a stage's parameters, or a tensor-parallel rank's share of them, cut by parallel.py's
    plan, into a model on meta. Without gradients, plain tensors and an all-reduce do."""
    for path, module in list(model.named_modules()):
        name = f"{path}.weight"
        if isinstance(module, nn.Linear) and not isinstance(module, RewardHead):
            group = tp.get_group() if parts[name].shape[1] < module.in_features else None
            model.set_submodule(path, InferenceLinear(parts.pop(name), group))
        elif isinstance(module, nn.Embedding) and len(parts[name]) < len(module.weight):
            model.embed = ShardedEmbedding(parts[name], tp)
    model.load_state_dict(parts, assign=True)
    return model.requires_grad_(False).eval()


# ---- keys and values -----------------------------------------------------------------------------


class Cache:
    """Keeps the keys and values of all slots, the rows of the batch. A slot stores position p at
    index p; padding tokens are written to one extra index at the end."""

    rows: slice  # that the forward pass under way reads
    n_keys: int  # positions of each that it attends to

    def __init__(self, model: Nemotron, like: Tensor, tp: int, slots: int, context: int) -> None:
        cfg = model.cfg
        # CPUs attend faster in fp32
        dtype = (like if like.is_cuda else at_least_fp32(like)).dtype
        # heads before positions: each reads its own from one stretch of memory
        shape = (len(model.blocks), 2, slots, cfg.n_kv_heads // tp, context + 1, cfg.head_dim)
        # zeros, as a masked position must hold a number: 0 x NaN is NaN
        self.kv = torch.zeros(shape, dtype=dtype, device=like.device)
        self.layers = [int(layer) for layer in model.blocks]
        self.row_index = torch.arange(slots, device=like.device)[:, None]

    def extend(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's k and v (N, T, K, E) at positions (N, T); return all (N, S, K, E)."""
        rows = self.row_index[self.rows]
        kept = self.kv[self.layers.index(layer)]
        kept[:, rows, :, positions] = torch.stack((k, v), dim=2).to(kept.dtype)
        return kept[:, self.rows, :, : self.n_keys].transpose(2, 3).unbind()


# ---- sampling ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingParams:
    """Says how to sample. The filters apply in transformers' order, each to what the one before
    left: repetition penalty, temperature, top_k, top_p, min_p."""

    max_tokens: int = 256  # Longest sample, in tokens
    temperature: float = 1.0  # Divisor of the logits; 0: greedy
    top_p: float = 1.0  # Least probability that the likeliest tokens, which are kept, add up to
    top_k: int = 0  # Number of likeliest tokens that are kept; 0: all
    min_p: float = 0.0  # Least probability of a token that is kept, as a share of the likeliest's
    repetition_penalty: float = 1.0
    """Divisor of a positive logit (factor of a negative one) of each token that occurred before."""
    n: int = 1  # Number of samples of each prompt; they differ in their random stream
    seed: int = 0  # Seed: a sample is a function of (prompt, seed, its number) alone
    stop: tuple[str, ...] = ()  # Texts that end a sample and are not part of it
    stop_ids: tuple[int, ...] | None = None
    """Tokens that end a sample; default: the tokenizer's </s>."""
    logprobs: int | None = None
    """Number of likeliest tokens to give log-probabilities of, before any filter; default: none."""
    echo: bool = False
    """Return of the prompt as part of the result, with its own log-probabilities if asked for."""

    def __post_init__(self) -> None:
        ranges = {
            "max_tokens": (0, 1 << 31), "temperature": (0, 1e4), "top_p": (0, 1),
            "top_k": (0, 1 << 31), "min_p": (0, 1), "repetition_penalty": (0.01, 100),
            "n": (1, 1024), "logprobs": (0, 20),
        }  # fmt: skip
        check_ranges(self, ranges)
        if isinstance(self.stop, str) or "" in self.stop:
            raise ValueError(f"stop={self.stop!r}: must be texts, none of them empty")


def uniform(seed: int, sample: int, position: int) -> float:
    """Return a number in (0, 1) that depends on these three alone."""
    digest = hashlib.blake2b(f"{seed}/{sample}/{position}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**32


def penalize_repeats(logits: Tensor, params: list[SamplingParams], seen: list[list[int]]) -> Tensor:
    """Lower the logits (N, V) of the tokens that each row has seen."""
    logits = logits.clone()
    for row, p, ids in zip(logits, params, seen, strict=True):
        index = torch.tensor(sorted(set(ids)), device=row.device)
        x = row[index]
        row[index] = torch.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty)
    return logits


def keep_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """Set all but the top_k (N, 1) largest logits of each row to -inf; 0 keeps all."""
    k = top_k.long().clamp(max=logits.shape[1])
    largest = logits.topk(int(k.max())).values
    least = largest.gather(1, (k - 1).clamp(min=0))
    return logits.masked_fill((logits < least) & (k > 0), -torch.inf)


def keep_top_p(probs: Tensor, top_p: Tensor) -> Tensor:
    """Set all but the likeliest tokens that together reach top_p (N, 1) to 0; 1 keeps all."""
    vocab_size = probs.shape[1]
    for n in (min(256, vocab_size), vocab_size):  # few tokens nearly always do
        top, index = probs.topk(n)
        total = top.cumsum(1)
        if bool((total[:, -1:] >= top_p).all()):
            break
    top = top.masked_fill(total - top >= top_p.clamp(min=1e-6), 0)  # of 0, keep the likeliest
    kept = torch.zeros_like(probs).scatter_(1, index, top)
    return torch.where(top_p < 1, kept, probs)


def draw(probs: Tensor, uniforms: list[float]) -> Tensor:
    """Invert each row's distribution function, in the vocabulary's order, at its uniform number: so
    neither the batch nor the size of the vocabulary changes a sample."""
    total = probs.double().cumsum(1)
    u = torch.tensor(uniforms, dtype=torch.float64, device=probs.device)[:, None]
    return torch.searchsorted(total, u * total[:, -1:], right=True)[:, 0]


def sample(
    logits: Tensor, params: list[SamplingParams], seen: list[list[int]], uniforms: list[float]
) -> Tensor:
    """Choose a token for each row of logits, fp32 (N, V): ids (N). A row has its own settings, the
    ids before it and a uniform number. A filter that no row asks for is left out."""

    def column(name: str) -> Tensor:
        return logits.new_tensor([getattr(p, name) for p in params])[:, None]

    if any(p.repetition_penalty != 1 for p in params):
        logits = penalize_repeats(logits, params, seen)
    greedy = logits.argmax(1)
    if all(p.temperature == 0 for p in params):
        return greedy
    temperature = column("temperature")
    logits = logits / temperature.clamp(min=1e-6)
    if any(p.top_k for p in params):
        logits = keep_top_k(logits, column("top_k"))
    probs = logits.softmax(1)
    if any(p.top_p < 1 for p in params):
        probs = keep_top_p(probs, column("top_p"))
    if any(p.min_p for p in params):
        least = probs.amax(1, keepdim=True) * column("min_p")
        probs = probs.masked_fill(probs < least, 0)
    return torch.where(temperature[:, 0] > 0, draw(probs, uniforms), greedy)


class TextStream:
    """Turns the token ids that follow a prompt into text as soon as no later one can change it.
    Held back are an unfinished character, the possible beginning of a stop text and, in a chat, a
    line end: before the mark of the next turn it is the template's."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        prompt: Iterable[int] = (),
        stop_ids: tuple[int, ...] = (),
    ) -> None:
        """Take the ids of the prompt, and those that end the sample: in a chat a turn's mark."""
        self.tokenizer = tokenizer
        self.stop = stop
        self.mark = tokenizer.specials.get("<extra_id_1>")
        self.chat = self.mark in stop_ids
        self.stopped = False
        # needed to decode the tokens that follow; a chat's texts are tokenized apart
        self.ids = [] if self.chat else list(prompt)
        self.n_sent = len(tokenizer.decode(self.ids))  # characters of their text
        # the last byte of a character, where it does not belong: it breaks what is not yet certain
        self.stray = tokenizer.encode("\U0010ffff")[-1:]

    def push(self, token: int) -> str:
        """Take a token; return the text that is now certain. A stop text sets `stopped`."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        broken = self.tokenizer.decode([*self.ids, *self.stray])
        certain = os.path.commonprefix([text.rstrip("\ufffd"), broken])
        new = self.cut(certain, final=False)
        if self.n_sent == len(certain) == len(text) and len(self.ids) > 24:
            # forget most, but begin neither within a character nor with a blank that is dropped
            end = self.tokenizer.decode(self.ids[-12:])
            if end.strip() and text.endswith(end):
                self.ids = self.ids[-12:]
                self.n_sent = len(end)
        return new

    def finish(self, last: int | None = None) -> str:
        """Return the rest; `last` is the token that ended the sample, if one did."""
        rest = self.cut(self.tokenizer.decode(self.ids), final=True)
        return rest.removesuffix("\n") if self.chat and last == self.mark else rest

    def cut(self, text: str, final: bool) -> str:
        """Return what is new of a text up to a stop text, or but for its possible beginning."""
        new = "" if self.stopped else text[self.n_sent :]
        places = [new.find(stop) for stop in self.stop if stop in new]
        keep = int(self.chat and new.endswith("\n"))
        for stop in self.stop:
            most = min(len(stop), len(new) + 1)
            keep = max(keep, *(n for n in range(most) if new.endswith(stop[:n])))
        if places:
            self.stopped = True
            new = new[: min(places)]
        elif not final:
            new = new[: len(new) - keep]
        self.n_sent += len(new)
        return new


# ---- requests ------------------------------------------------------------------------------------

Prompt = str | list[int] | np.ndarray
FinishReason = Literal["", "stop", "length", "cancelled"]


@dataclass(eq=False)
class Completion:
    """One sample of one prompt, as far as it has come."""

    index: int  # Its number among the prompt's samples
    n_prompt: int  # Tokens of the prompt
    ids: list[int] = field(default_factory=list)
    """Tokens, without the one that stopped it; after those of the prompt with echo."""
    text: str = ""
    finish_reason: FinishReason = ""
    logprobs: list[float | None] = field(default_factory=list)
    """Log-probability of each of ids, if asked for; None for a first token: nothing predicts it."""
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    """Likeliest tokens in place of each of ids, and their log-probabilities."""
    scores: list[float] = field(default_factory=list)  # A reward model's attributes of the prompt
    cached: int = 0  # Prompt tokens whose keys and values another request had computed


Listener = Callable[[Completion, str], None]


class Prediction(NamedTuple):
    """Holds what the head says of one position."""

    token: int  # the sequence's own or, after its last one, a sample
    logprob: float
    top_ids: list[int]  # the likeliest tokens, as many as a sequence of the batch asks for
    top_logprobs: list[float]


@dataclass(eq=False)
class Sequence:
    """Asks for one completion, in a slot of the engine or waiting for one."""

    ids: list[int]  # of the prompt and of what was sampled
    params: SamplingParams
    out: Completion
    stop_ids: tuple[int, ...]
    stream: TextStream | None
    listener: Listener | None
    score_from: int  # the first position whose log-probability is wanted
    limit: int  # the most tokens of prompt and sample together

    def record(self, found: Prediction) -> None:
        """Keep a token's log-probability, and the likeliest tokens in its place, if asked for."""
        if self.params.logprobs is not None:
            top = list(zip(found.top_ids, found.top_logprobs, strict=True))
            self.out.logprobs.append(found.logprob)
            self.out.tops.append(top[: self.params.logprobs])

    def append(self, found: Prediction) -> None:
        """Take a sampled token, which may end the sequence."""
        if found.token in self.stop_ids:
            self.update("", "stop", found.token)
            return
        self.ids.append(found.token)
        self.out.ids.append(found.token)
        self.record(found)
        text = self.stream.push(found.token) if self.stream else ""
        reason: FinishReason = "length" if len(self.ids) == self.limit else ""
        if self.stream and self.stream.stopped:
            reason = "stop"
        self.update(text, reason)

    def update(self, text: str, reason: FinishReason, last: int | None = None) -> None:
        """Add text to the completion, end it if there is a reason, and call the listener."""
        if reason and self.stream:
            text += self.stream.finish(last)
        self.out.text += text
        self.out.finish_reason = reason
        if self.listener and (text or reason or self.params.logprobs is not None):
            self.listener(self.out, text)


class HeadInput(NamedTuple):
    """Names a state that the head is to read."""

    sequence: Sequence
    state: int  # its number among the states (N T, D) of a forward pass
    token: int | None  # the one that follows in the sequence; None: it is to be sampled


# ---- the engine ----------------------------------------------------------------------------------


class Engine:
    """Runs a continuous batch over one copy of a model, on one process or on tp x pp of them, which
    then all call the same methods with the same arguments.

    Slots are the rows of the batch and of the cache. They are kept in three groups, so that each
    group is a slice of the cache:

        0                        decoding                 active                   len(slots)
        | decode: one token      | prefill: a chunk of    | free: keys of finished |
        | in each step           | the prompt each step   | sequences, to be reused|

    A sequence enters at `active`, moves to the first group when all but its last token are cached,
    and leaves when it is finished; slots are swapped to close the gaps.
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
        """Take a whole Nemotron or, with a mesh, a part of one. Options: see EngineConfig."""
        self.cfg = model.cfg
        self.context = context or self.cfg.seq_len
        if slots < 1 or chunk < 1 or not 1 <= self.context <= self.cfg.seq_len:
            rule = f"slots and chunk at least 1, context in 1..{self.cfg.seq_len} (seq_len)"
            raise ValueError(f"slots={slots}, chunk={chunk}, context={context}: {rule}")
        if mesh is None:
            model = inference_model(on_meta(self.cfg), dict(model.state_dict()), None)
        self.model = model
        self.tokenizer = tokenizer
        self.chunk = chunk
        self.mesh = mesh
        self.tp = mesh["tp"].size() if mesh else 1
        self.pp = mesh["pp"].size() if mesh else 1
        self.stage = mesh["pp"].get_local_rank() if mesh else 0
        self.world = self.tp * self.pp
        self.leads = self.world == 1 or dist.get_rank() == 0
        self.weight = next(m.weight for m in model.modules() if isinstance(m, InferenceLinear))
        self.cache = Cache(model, self.weight, self.tp, slots, self.context)
        self.slots = [None] * slots
        self.decoding = self.active = 0
        # the tokens of each slot's keys, how many of these are computed, and when it became free
        self.tokens = np.full((slots, self.context + 1), -1, np.int32)
        self.computed = np.zeros(slots, np.int64)
        self.freed = np.zeros(slots, np.int64)
        self.waiting = []
        self.interrupted = False
        # prompt_tokens were computed, cached_tokens copied
        self.steps = self.prompt_tokens = self.cached_tokens = self.new_tokens = 0

    # -- requests

    def encode(self, prompt: Prompt, scored: bool = False) -> list[int]:
        """Return a prompt's ids; ValueError if the model cannot take them. The last token of one
        that is scored is not read, so that it needs no place in the context."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("a text needs a tokenizer: Engine(model, tokenizer)")
            prompt = self.tokenizer.encode(prompt)
        try:
            ids = [operator.index(i) for i in prompt]
        except TypeError:
            raise ValueError(f"{prompt!r:.40}: must be a text or a list of token ids") from None
        if not ids:
            raise ValueError("an empty prompt: give at least one token")
        if len(ids) > self.context + scored:
            raise ValueError(f"the prompt has {len(ids)} tokens, the context {self.context}")
        for token in (min(ids), max(ids)):
            if not 0 <= token < self.cfg.vocab_size:
                raise ValueError(f"token {token} is not in 0..{self.cfg.vocab_size - 1}")
        return ids

    def check(self, params: SamplingParams) -> None:
        """Raise ValueError if this model cannot sample so."""
        if self.cfg.n_attributes and params.max_tokens:
            raise ValueError("a reward model does not write, it scores: generate.py score")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop texts need a tokenizer: Engine(model, tokenizer)")
        if params.stop_ids:
            self.encode(params.stop_ids)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        listener: Listener | None = None,
        score_from: int | None = None,
    ) -> list[Sequence]:
        """Queue a prompt; return the sequences of its n samples. listener(completion, new text) is
        called at every step that adds to one, the last time with its finish_reason. score_from: the
        first token of the prompt whose log-probability is wanted (with echo: all)."""
        ids = self.encode(prompt, score_from is not None)
        self.check(params)
        tokenizer = self.tokenizer
        limit = min(len(ids) + params.max_tokens, self.context)
        stop_ids = params.stop_ids
        if stop_ids is None:
            stop_ids = (tokenizer.special("</s>"),) if tokenizer else ()
        if params.echo and params.logprobs is not None:
            score_from = 1
        if score_from is None or self.cfg.n_attributes:
            score_from = len(ids)
        first = min(len(ids), max(1, score_from))
        sequences = []
        for index in range(params.n):
            out = Completion(index, len(ids))
            if params.echo:
                out.ids = list(ids)
                out.text = tokenizer.decode(ids) if tokenizer else ""
                if params.logprobs is not None:
                    out.logprobs = [None]
                    out.tops = [[]]
            stream = TextStream(tokenizer, params.stop, ids, stop_ids) if tokenizer else None
            how = (params, out, stop_ids, stream, listener, first, limit)
            sequences.append(Sequence(list(ids), *how))
        self.waiting.extend(sequences)
        return sequences

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence now; it leaves its slot at the next step."""
        if not sequence.out.finish_reason:
            sequence.update("", "cancelled")

    @property
    def busy(self) -> bool:
        return bool(self.active or self.waiting)

    def generate(
        self, prompts: Iterable[Prompt], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Complete prompts; return completions in their order, a prompt's n samples together."""
        sequences = []
        for prompt in prompts:
            sequences += self.submit(prompt, params or SamplingParams())
        return list(self.finished(sequences))

    def finished(self, sequences: list[Sequence]) -> Iterator[Completion]:
        """Step until all are finished, or an interrupt; yield those that are, in their order."""
        for sequence in sequences:
            while not (sequence.out.finish_reason or self.interrupted):
                self.step()
            if sequence.out.finish_reason:
                yield sequence.out

    def submit_pair(self, context: list[int], continuation: list[int]) -> Sequence:
        """Queue a continuation, for its log-probabilities and the likeliest token in each place."""
        params = SamplingParams(max_tokens=0, logprobs=1, stop_ids=())
        (sequence,) = self.submit([*context, *continuation], params, score_from=len(context))
        return sequence

    def score(self, pairs: Iterable[tuple[list[int], list[int]]]) -> list[Completion]:
        """Score (context, continuation) pairs; see `submit_pair`."""
        return list(self.finished([self.submit_pair(*pair) for pair in pairs]))

    # -- scheduling

    @torch.inference_mode()
    def step(self) -> None:
        """Fill free slots, read a chunk of the prompts, add a token to sequences that decode."""
        self.steps += 1
        self.update_groups()  # some may have been cancelled
        self.fill_slots()
        reading = range(self.decoding, self.active)
        if reading:  # they share a chunk evenly
            longest = max(len(self.slots[i].ids) - self.computed[i] for i in reading)
            self.advance(reading, min(longest, max(1, self.chunk // len(reading))))
        self.update_groups()
        if self.decoding:
            self.advance(range(self.decoding), 1)
        self.update_groups()

    def fill_slots(self) -> None:
        """Give free slots to waiting sequences, each with the longest prefix that a slot has
        computed. A sequence goes on waiting while a slot is computing a longer one."""
        self.waiting = [s for s in self.waiting if not s.out.finish_reason]
        for sequence in self.waiting[: len(self.slots)]:
            if self.active == len(self.slots):
                return
            source, n, longer_soon = self.find_prefix(sequence)
            if longer_soon:
                continue
            self.waiting.remove(sequence)
            slot = self.take_slot(source, n)
            self.slots[slot] = sequence
            self.tokens[slot] = -1
            self.tokens[slot, : len(sequence.ids)] = sequence.ids
            self.cached_tokens += n
            sequence.out.cached = n

    def find_prefix(self, sequence: Sequence) -> tuple[int, int, bool]:
        """Find the slot that has computed the longest prefix of a sequence; return it, the prefix's
        length, and whether a longer one is being computed."""
        # the last token, and those before a token to be scored, are computed in any case
        limit = min(len(sequence.ids), sequence.score_from) - 1
        same = self.tokens[:, :limit] == np.array(sequence.ids[:limit])
        shared = np.logical_and.accumulate(same, axis=1).sum(1)
        computed = np.minimum(shared, self.computed)
        source = int(computed.argmax())
        n = int(computed[source])
        return source, n, shared[self.decoding : self.active].max(initial=0) > n

    def take_slot(self, source: int, n: int) -> int:
        """Make a free slot active, with the prefix of length n that the slot `source` holds: reuse
        the source if it is free and more than half of its keys are shared; otherwise take the least
        recently used slot and copy the prefix into it."""
        slot = self.active
        if source >= slot and 2 * n > self.computed[source]:
            chosen = source
        else:
            chosen = slot + int(self.freed[slot:].argmin())
            self.cache.kv[:, :, chosen, :, :n] = self.cache.kv[:, :, source, :, :n]
        self.computed[chosen] = n
        self.swap(chosen, slot)
        self.active += 1
        return slot

    def update_groups(self) -> None:
        """Free the slots of finished sequences, and move sequences whose prompt is fully cached
        into the decoding group."""
        for slot in reversed(range(self.active)):
            if self.slots[slot].out.finish_reason:
                self.release(slot)
        for slot in range(self.decoding, self.active):
            if len(self.slots[slot].ids) - self.computed[slot] == 1:
                self.swap(slot, self.decoding)
                self.decoding += 1

    def release(self, slot: int) -> None:
        """Free a slot: it becomes the last of its group, then the first of the free ones."""
        ids = self.slots[slot].ids
        self.tokens[slot, : len(ids)] = ids
        self.freed[slot] = self.steps
        if slot < self.decoding:
            self.decoding -= 1
            self.swap(slot, self.decoding)
            slot = self.decoding
        self.active -= 1
        self.swap(slot, self.active)
        self.slots[self.active] = None

    def swap(self, i: int, j: int) -> None:
        """Exchange two slots with all that belongs to them."""
        if i == j:
            return
        n = int(self.computed[[i, j]].max())
        self.cache.kv[:, :, [i, j], :, :n] = self.cache.kv[:, :, [j, i], :, :n]
        for table in (self.tokens, self.computed, self.freed):
            table[[i, j]] = table[[j, i]]
        self.slots[i], self.slots[j] = self.slots[j], self.slots[i]

    # -- computing

    def advance(self, slots: range, T: int) -> None:
        """Compute the next T tokens of these slots, or as many as each has left. The head reads the
        states before tokens that are to be scored, and the last state of each sequence."""
        tokens = np.zeros((len(slots), T), np.int64)
        positions = np.full((len(slots), T), self.context)  # padding
        inputs = []
        for row, slot in enumerate(slots):
            sequence = self.slots[slot]
            start = int(self.computed[slot])
            ids = sequence.ids[start : start + T]
            end = start + len(ids)
            tokens[row, : len(ids)] = ids
            positions[row, : len(ids)] = np.arange(start, end)
            self.computed[slot] = end
            self.prompt_tokens += max(0, min(end, sequence.out.n_prompt) - start)
            following = [*sequence.ids[start + 1 : end + 1], None]
            first = min(sequence.score_from, len(sequence.ids)) - 1 - start
            for t in range(max(0, first), len(ids)):
                inputs.append(HeadInput(sequence, row * T + t, following[t]))
        states = self.forward(tokens, positions, slots)
        if inputs:
            self.read_head(states, inputs)

    def forward(self, tokens: np.ndarray, positions: np.ndarray, slots: range) -> Tensor | None:
        """Compute the states (N T, D) that the head reads; None before the last pipeline stage. The
        rows go through a pipeline in parts, one behind the other, to keep all stages at work."""
        x = torch.from_numpy(tokens).to(self.weight.device)
        group = self.mesh["pp"].get_group() if self.pp > 1 else None
        n = min(self.pp, len(slots))
        first = slots.start
        states = []
        sends = []
        for h, part in zip(x.tensor_split(n), np.array_split(positions, n), strict=True):
            self.cache.rows = slice(first, first + len(h))
            self.cache.n_keys = int(part.max(where=part < self.context, initial=0)) + 1
            first += len(h)
            at = torch.from_numpy(part).to(h.device)
            if self.stage > 0:
                h = x.new_empty((*h.shape, self.cfg.dim), dtype=self.weight.dtype)
                dist.recv(h, group=group, group_src=self.stage - 1)
            states.append(self.model(h, at, None, self.cache, head=False))
            if self.stage < self.pp - 1:
                sends.append(dist.isend(states[-1], group=group, group_dst=self.stage + 1))
        for send in sends:
            send.wait()
        return None if sends else torch.cat(states).flatten(0, 1)

    def share(self, result: Any, source: int) -> Any:
        """Give every process the result that the process `source` has."""
        if self.world == 1:
            return result
        box = [result]
        dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
        return box[0]

    def read_head(self, states: Tensor | None, inputs: list[HeadInput]) -> None:
        """Hand what the last pipeline stage's head says to the sequences, on all processes:
        rewards, log-probabilities of tokens that they have, a sampled token where they end."""
        rates = self.cfg.n_attributes
        results = None
        if states is not None:
            states = states[[x.state for x in inputs]]
            results = self.model.head(states).tolist() if rates else self.predict(states, inputs)
        results = self.share(results, self.world - self.tp)  # the last stage's first process
        for x, result in zip(inputs, results, strict=True):
            if rates:
                x.sequence.out.scores = result
                x.sequence.update("", "length")
            elif x.token is not None:
                x.sequence.record(result)
            elif len(x.sequence.ids) >= x.sequence.limit:
                x.sequence.update("", "length")
            else:
                self.new_tokens += 1
                x.sequence.append(result)

    def predict(self, states: Tensor, inputs: list[HeadInput]) -> list[Prediction]:
        """Run the head on states (n, D), some at a time to bound the logits alive."""
        asked = [x.sequence.params.logprobs for x in inputs]
        exact = any(k is not None for k in asked)
        most = max(k or 0 for k in asked)
        at_once = max(1, (1 << 25) // self.cfg.vocab_size)
        predictions = []
        for start in range(0, len(inputs), at_once):
            logits = self.logits(states[start : start + at_once], exact)
            tokens = self.choose(logits, inputs[start : start + at_once])
            logprobs = logits.log_softmax(1) if exact else logits  # else nobody reads them
            top = logprobs.topk(most)
            columns = (tokens, logprobs.gather(1, tokens[:, None])[:, 0], top.indices, top.values)
            predictions += map(Prediction, *(column.tolist() for column in columns))
        return predictions

    def choose(self, logits: Tensor, inputs: list[HeadInput]) -> Tensor:
        """Return the token after each state: the sequence's own or, after its last, a sample."""
        tokens = torch.tensor([x.token or 0 for x in inputs], device=logits.device)
        ends = [i for i, x in enumerate(inputs) if x.token is None]
        if ends:
            sequences = [inputs[i].sequence for i in ends]
            params = [s.params for s in sequences]
            seen = [s.ids for s in sequences]
            uniforms = [uniform(s.params.seed, s.out.index, len(s.ids)) for s in sequences]
            asked = logits if len(ends) == len(inputs) else logits[ends]
            tokens[ends] = sample(asked, params, seen, uniforms)
        return tokens

    def logits(self, h: Tensor, exact: bool) -> Tensor:
        """Multiply states (n, D) by the head: logits (n, V), at least fp32. exact: never rounded to
        bf16 on the way, which a reported log-probability needs and a sample does not."""
        head = self.model.head
        h = at_least_fp32(h) if exact else h
        logits = at_least_fp32(fp32_logits(h, head.weight) if h.is_cuda else head(h))
        if self.tp == 1:
            return logits
        shares = [torch.empty_like(logits) for _ in range(self.tp)]
        dist.all_gather(shares, logits, group=self.mesh["tp"].get_group())
        return torch.cat(shares, dim=1)

    def quantize(self) -> None:
        """Keep the blocks' matrices in float8; embedding and head stay as they are."""
        for module in self.model.blocks.modules():
            if isinstance(module, InferenceLinear):
                module.quantize(self.mesh["tp"].get_group())
        self.computed[:] = 0  # the cache holds keys of other weights


# ---- from the command line to an engine ----------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Divides one copy of the model over tp x pp processes: tp answers soonest, pp serves most."""

    tp: int = 1  # Tensor parallel processes: each has some of the heads, the MLP and the vocabulary
    pp: int = 1  # Pipeline parallel processes: each has some of the layers
    timeout: int = 1800  # Seconds after which a process that does not answer ends the job


@dataclass(frozen=True)
class EngineConfig:
    """Says which model to run, and how. Common to all commands."""

    model: tyro.conf.Positional[Path]
    """A run's folder (its newest checkpoint, written on any mesh) or a Hugging Face folder."""
    tokenizer: str = ""  # A file or folder; default: the one in the model's folder
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # Dtype; auto: bf16 on a GPU, fp32 on a CPU
    quantize: Literal["none", "float8"] = "none"
    """Format of the blocks' matrices in memory, half as large as bf16; its cost is logged."""
    slots: int = 32  # Rows of the batch
    context: int = 0  # Longest prompt and answer together; default: the model's seq_len
    chunk: int = 512  # Prompt tokens computed between two tokens of the sequences that decode
    compile: bool = False  # Compilation of the blocks by torch.compile
    mesh: Layout = field(default_factory=Layout)


def load_engine(cfg: EngineConfig) -> Engine:
    """Load this process's part of the model, and build an engine around it."""
    model_cfg = replace(read_config(cfg.model), lora_rank=0)  # adapters are merged
    tokenizer = model_tokenizer(cfg, model_cfg)
    layout = cfg.mesh
    world = layout.tp * layout.pp
    if world != world_size():
        start = f"start {world} with torchrun, or set --mesh.tp and --mesh.pp"
        raise ValueError(f"tp={layout.tp} x pp={layout.pp} on {world_size()} processes: {start}")
    mesh_cfg = MeshConfig(**vars(layout), dtype=cfg.dtype)
    mesh_cfg.check(model_cfg, world, batch=layout.pp, micro_batch=1)
    mesh = init_mesh(mesh_cfg)
    model = on_meta(model_cfg, mesh["pp"].get_local_rank(), layout.pp)
    dtypes = dtypes_of(model, DTYPES[mesh_cfg.compute_dtype])
    model = inference_model(model, load_parts(cfg.model, model_cfg, dtypes, mesh), mesh["tp"])
    engine = Engine(model, tokenizer, cfg.slots, cfg.context, cfg.chunk, mesh)
    if cfg.quantize == "float8":
        before = perplexity(engine)
        engine.quantize()
        log.info(f"float8: perplexity {before:.3f} -> {perplexity(engine):.3f}")
    if cfg.compile:  # which lays matrices out by itself
        for module in model.modules():
            if isinstance(module, InferenceLinear):
                module.weight = module.weight.to_dense()
        for block in model.blocks.values():
            block.compile(dynamic=True)
    return engine


def model_tokenizer(cfg: EngineConfig, model: ModelConfig) -> Tokenizer:
    """Open the model's tokenizer; ValueError if it has more tokens than the model."""
    try:
        tokenizer = load_tokenizer(cfg.tokenizer or cfg.model)
    except ValueError as e:
        raise ValueError(f"{e} (--tokenizer chooses one)") from e
    if tokenizer.vocab_size > model.vocab_size:
        both = f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}"
        raise ValueError(f"{both}: set --tokenizer to the one it was trained with")
    return tokenizer


def dtypes_of(model: Nemotron, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype of each parameter, by its name: norms and a reward head compute in fp32."""
    dtypes = {}
    for name, p in model.named_parameters():
        fp32 = p.ndim < 2 or (model.cfg.n_attributes and name.startswith("head."))
        dtypes[name] = torch.float32 if fp32 else dtype
    return dtypes


def load_parts(folder: Path, cfg: ModelConfig, dtypes: dict, mesh: DeviceMesh) -> dict:
    """Return this tensor-parallel rank's parts of the named parameters, as plain tensors."""
    cut = dict(parallelize_module(on_meta(cfg), mesh["tp"], tp_plan()).named_parameters())
    source = open_weights(folder)
    parts = {}
    for name, dtype in dtypes.items():
        part = source[name](own_region(cut[name]))
        parts[name] = part.to(mesh.device_type, dtype, copy=True)  # not a mapped file
    return parts


def perplexity(engine: Engine) -> float:
    """Compute perplexity on 1,024 tokens of Python's documentation; NaN for a reward model."""
    text = "".join(itertools.islice(embedded_english(), 8))
    ids = engine.tokenizer.encode(text)[:1025][: engine.context].tolist()
    (done,) = engine.score([(ids[:1], ids[1:])])
    return math.exp(-np.mean(done.logprobs or math.nan))


class Driver:
    """Runs an engine in its own thread, for callers in others, on any number of processes.

    1. On the first process, callers put commands (submit, cancel, stop) into a queue.
    2. Before each step, the first process empties the queue and broadcasts the commands.
    3. Every process carries them out in the same order, then computes the step with the others.
    4. After a stop command, `follow` returns everywhere.

    The first process starts `thread`, which calls `follow`; the others call `follow` themselves.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.commands = queue.SimpleQueue()
        self.listeners = {}  # of requests that are in the queue, by number
        self.running = {}  # a request's sequences, by its number
        self.numbers = itertools.count()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.failed = None

    def submit(self, ids: list[int], params: SamplingParams, listener: Listener) -> int:
        """Queue a request from any thread; return its number. The engine's thread calls back."""
        self.engine.encode(ids)  # an error is raised here, in the caller's thread
        number = next(self.numbers)
        self.listeners[number] = listener
        self.commands.put(("submit", number, ids, params))
        return number

    def cancel(self, number: int) -> None:
        """Cancel a request from any thread, unless it is finished."""
        self.commands.put(("cancel", number))

    def stop(self) -> None:
        """End the thread, and `follow` on the other processes."""
        self.commands.put(("stop",))
        if self.thread.is_alive():
            self.thread.join()

    def run(self) -> None:
        """Follow in the thread; an error is kept in `failed`, where the server looks for it."""
        try:
            self.follow()
        except BaseException as e:
            self.failed = e
            log.exception("the engine failed")

    def follow(self) -> None:
        """Carry out commands and compute steps until the stop command, on every process."""
        while True:
            for command in self.next_commands():
                match command:
                    case ("submit", number, ids, params):
                        listener = self.listeners.pop(number, None)
                        self.running[number] = self.engine.submit(ids, params, listener)
                    case ("cancel", number):
                        for sequence in self.running.get(number, ()):
                            self.engine.cancel(sequence)
                    case ("stop",):
                        return
            if self.engine.busy:
                self.engine.step()
                for number, sequences in list(self.running.items()):
                    if all(sequence.out.finish_reason for sequence in sequences):
                        del self.running[number]

    def next_commands(self) -> list[tuple]:
        """Return the commands in the first process's queue, on every process. While the engine is
        idle it waits for one, but never so long that the others give up."""
        commands = []
        with suppress(queue.Empty):
            if self.engine.leads and not self.engine.busy:
                commands.append(self.commands.get(timeout=30))
            while self.engine.leads:
                commands.append(self.commands.get_nowait())
        return self.engine.share(commands, 0)


# ---- commands ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleConfig(EngineConfig):
    """Sample from prompts; write JSON lines in the prompts' order."""

    prompts: tuple[str, ...] = ()  # Texts; default: those of --file
    file: str = "-"
    """JSON lines with a `prompt` (text or token ids) or `messages`, or a text a line; -: stdin."""
    out: Path | None = None  # A file for the lines; default: stdout
    sampling: tyro.conf.OmitArgPrefixes[SamplingParams] = field(default_factory=SamplingParams)


def sample_command(cfg: SampleConfig) -> None:
    """Submit all prompts, then write each sample as soon as those before it are written."""
    engine = load_engine(cfg)
    engine.check(cfg.sampling)

    def submit(row: dict) -> list[Sequence]:
        if row.get("messages") is None:
            return engine.submit(row["prompt"], cfg.sampling)
        ids, _ = render_chat(row["messages"], engine.tokenizer)
        return engine.submit(ids, chat_sampling(cfg.sampling, engine.tokenizer))

    rows = [("--prompts", {"prompt": text}) for text in cfg.prompts]
    work = submit_rows(rows or read_rows(cfg.file, text_field="prompt"), submit)

    def lines() -> Iterator[dict]:
        for row, samples in work:
            for done in engine.finished(samples):
                line = {"index": done.index, "text": done.text, "finish_reason": done.finish_reason}
                if cfg.sampling.logprobs is not None:
                    line |= {"ids": done.ids, "logprobs": done.logprobs, "top_logprobs": done.tops}
                yield row | line

    write_lines(cfg.out, engine, lines(), cfg.sampling.n * len(work))
    log.info(f"{engine.prompt_tokens:,} prompt tokens, {engine.new_tokens:,} new ones")


def read_rows(file: str, text_field: str = "") -> list[tuple[str, dict]]:
    """Read a file of JSON lines, or stdin, which all processes share: the first one reads it."""
    return from_rank_0(lambda: list(read_records(file, text_field=text_field)))


def submit_rows(
    rows: Iterable[tuple[str, dict]], submit: Callable[[dict], list[Sequence]]
) -> list[tuple[dict, list[Sequence]]]:
    """Submit each row; return the rows with their sequences. An error says where the row stands."""
    work = []
    for where, row in rows:
        try:
            work.append((row, submit(row)))
        except (ValueError, KeyError) as e:
            rule = f"no field {e}" if isinstance(e, KeyError) else e
            raise ValueError(f"{where}: {rule}") from e
    if not work:
        raise ValueError("no prompt in the file, or no row: it is empty")
    return work


def write_lines(out: Path | None, engine: Engine, lines: Iterable[dict], n: int) -> None:
    """Write n JSON lines to a file, or stdout, as they come; on all processes but the first they
    are only computed. After a first Ctrl-C, only what is done; a second ends the process."""

    def interrupt(*_: object):
        engine.interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, interrupt)
    bar = tqdm(lines, total=n, unit=" lines", disable=not engine.leads)
    with out.open("w", encoding="utf-8") if out and engine.leads else nullcontext(sys.stdout) as f:
        for line in bar:
            if engine.leads:
                f.write(json.dumps(line, ensure_ascii=False) + "\n")
                f.flush()
    if engine.interrupted:
        raise KeyboardInterrupt(f"after {bar.n} of {n} lines")


def chat_stops(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that end an answer: the mark of the next turn, and the end of the text."""
    return tokenizer.special("<extra_id_1>"), tokenizer.special("</s>")


def chat_sampling(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """Add the tokens that end an answer."""
    return replace(params, stop_ids=chat_stops(tokenizer) + (params.stop_ids or ()))


@dataclass(frozen=True)
class ChatConfig(EngineConfig):
    """Talk to the model in the terminal. Ctrl-C ends an answer, an empty line the conversation."""

    system: str = ""  # System turn; the 340B was trained with an empty one
    sampling: tyro.conf.OmitArgPrefixes[SamplingParams] = field(
        # as in NVIDIA's examples for the 340B's API (NeMo-Curator's synthetic data tutorial)
        default_factory=lambda: SamplingParams(max_tokens=1024, temperature=0.2, top_p=0.7)
    )


def chat(cfg: ChatConfig) -> None:
    """Answer the terminal's questions on the first process, and follow it on the others."""
    engine = load_engine(cfg)
    driver = Driver(engine)
    params = chat_sampling(replace(cfg.sampling, n=1, echo=False), engine.tokenizer)
    engine.check(params)
    if not engine.leads:
        driver.follow()
        return
    driver.thread.start()
    messages = [{"role": "system", "content": cfg.system}]
    with suppress(EOFError, KeyboardInterrupt):
        while question := input("\n> "):
            messages.append({"role": "user", "content": question})
            ids = fit_context(messages, engine)
            answer = talk(driver, ids, params) if ids else ""
            if answer:
                messages.append({"role": "assistant", "content": answer})
            else:
                messages.pop()  # a question without an answer is forgotten
    driver.stop()


def fit_context(messages: list[dict[str, str]], engine: Engine) -> list[int]:
    """Remove a conversation's earliest exchanges until an answer fits into the context; return the
    ids of what remains, or none if the last question alone is too long."""
    while True:
        ids, _ = render_chat(messages, engine.tokenizer)
        if len(ids) < engine.context:
            return ids.tolist()
        if len(messages) == 2:
            log.warning(f"{len(ids)} tokens, the context has {engine.context}: shorten it")
            return []
        del messages[1:3]


def talk(driver: Driver, ids: list[int], params: SamplingParams) -> str:
    """Write an answer as it comes; return it."""
    answers = queue.SimpleQueue()

    def show(out: Completion, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        if out.finish_reason:
            answers.put(out.text)

    number = driver.submit(ids, params, show)
    while not driver.failed:
        try:
            return answers.get(timeout=1)
        except queue.Empty:
            continue
        except KeyboardInterrupt:
            driver.cancel(number)
            return answers.get()  # a second Ctrl-C ends the conversation
    return ""


@dataclass(frozen=True)
class ScoreConfig(EngineConfig):
    """Add scores to JSON lines. A language model takes `prompt` and `continuation(s)`; a reward
    model `messages`, or `prompt`, `chosen` and `rejected`, as RewardBench's rows have them."""

    file: str = "-"  # JSON lines; -: stdin
    out: Path | None = None  # A file for the lines; default: stdout


def score(cfg: ScoreConfig) -> None:
    """Submit all rows, then write each with its scores as soon as those before it are written."""
    engine = load_engine(cfg)
    submit = submit_reward if engine.cfg.n_attributes else submit_continuations
    work = submit_rows(read_rows(cfg.file), partial(submit, engine))

    def lines() -> Iterator[dict]:
        """Yield the rows with their scores."""
        for row, sequences in work:
            done = list(engine.finished(sequences))
            if engine.interrupted:
                return
            if not engine.cfg.n_attributes:
                row["logprobs"] = [sum(c.logprobs) for c in done]
                row["n_tokens"] = [len(c.logprobs) for c in done]
                row["greedy"] = [is_greedy(c) for c in done]
            elif len(done) == 1:
                row["scores"] = named_scores(done[0].scores)
            else:
                chosen, rejected = (named_scores(c.scores) for c in done)
                row |= {"chosen_scores": chosen, "rejected_scores": rejected}
            yield row

    write_lines(cfg.out, engine, lines(), len(work))


def submit_continuations(engine: Engine, row: dict) -> list[Sequence]:
    """Submit a row's continuations to a language model."""
    texts = row.get("continuations") or [row["continuation"]]
    if not isinstance(texts, list):
        raise ValueError(f"continuations: must be a list of texts, not {texts!r:.40}")
    context = engine.encode(row["prompt"])
    return [engine.submit_pair(context, engine.encode(text)) for text in texts]


def submit_reward(engine: Engine, row: dict) -> list[Sequence]:
    """Submit a row's conversation to a reward model, or its chosen and its rejected one."""
    chats = [row["messages"]] if row.get("messages") else read_preference(row, False)[0]
    sequences = []
    for messages in chats:
        ids = render_reward(messages, engine.tokenizer)
        sequences += engine.submit(ids, SamplingParams(max_tokens=0))
    return sequences


def is_greedy(done: Completion) -> bool:
    """Check that each scored token was the likeliest."""
    return all(top[0][1] <= lp for top, lp in zip(done.tops, done.logprobs, strict=True))


def attributes_of(scores: list[float]) -> dict[str, float]:
    """Name a reward model's outputs; of NVIDIA's nine, the first four are untrained."""
    names = ATTRIBUTES if len(scores) in (5, 9) else [f"attribute_{i}" for i in range(len(scores))]
    return dict(zip(names, scores[-len(names) :], strict=True))


def named_scores(scores: list[float]) -> dict[str, float]:
    """Return a reward model's attributes by name, and the reward: their weighted sum."""
    return attributes_of(scores) | {"reward": float(aggregate(scores))}


COMMANDS = {
    "sample": (SampleConfig, sample_command),
    "chat": (ChatConfig, chat),
    "score": (ScoreConfig, score),
}


def run_command(name: str, parse: Callable[[], Any], command: Callable[[Any], Any]) -> None:
    """Run a command as a program. The log goes to stderr, a user's error is a line of it."""
    set_up_logging(sys.stderr)
    try:
        command(parsed(parse))
    except (ValueError, OSError) as e:
        sys.exit(f"{name}: error: {e}")
    except KeyboardInterrupt as e:
        log.info(f"{name}: stopped {e}")
        os._exit(130)  # do not wait for requests that an endpoint has still to answer
    if dist.is_initialized():
        shut_down()


def main() -> None:
    configs = {name: config for name, (config, _) in COMMANDS.items()}
    parse = partial(tyro.extras.subcommand_cli_from_dict, configs, description=__doc__)
    run_command("generate.py", parse, lambda cfg: dict(COMMANDS.values())[type(cfg)](cfg))


if __name__ == "__main__":
    main()
