"""Measurements, run by hand: each figure beside what a user would use instead, interleaved.

python tests/bench.py all                          what this machine can measure
python tests/bench.py tokenize                     MB/s against `tokenizers`
python tests/bench.py curate --megabytes 12        MB/s and memory of curation's stages
python tests/bench.py generate 40M                 prefill and decode against transformers
python tests/bench.py train 40M                    a training step against transformers' Nemotron
python tests/bench.py where 40M                    what the time of our training step goes to
python tests/bench.py dpo 40M                      a DPO step against TRL's trainer
python tests/bench.py online 40M                   a round of GRPO against TRL's trainer
python tests/bench.py growth --out growth.png      cost of a token against length, batch, ...
python tests/bench.py scale                        start, step, save, load on 4 to 6,144 ranks
python tests/bench.py slice 340b --device cuda     true blocks: MFU; head and loss by themselves
python tests/bench.py attention --device cuda      kernels against each other and float64

A table, and a last line of JSON. Contenders are processes of their own (so that peak memory is
their own) that take steps in turns; ratios are of steps next to each other.
"""

import argparse
import gc
import json
import logging
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import resource
import socket
import statistics
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cache
from itertools import count, cycle, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, planner_helpers
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import align
import data
import generate
import model
import parallel
import train
from recipes import curate, online

SHAPES = {
    "nano": replace(model.SHAPES["nano"], seq_len=128),  # tries the harness out, measures nothing
    "40M": model.ModelConfig(512, 8, 8, 8, 64, 2048, vocab_size=16_384, seq_len=1024),
    "125M": model.SHAPES["small"],
    "1B": model.ModelConfig(2048, 16, 16, 8, 128, 8192, vocab_size=32_768, seq_len=4096),
    "15b": model.SHAPES["nemotron4-15b"],
    "340b": model.SHAPES["nemotron4-340b"],
}
Result = dict[str, Any]


# ---- what this machine can do --------------------------------------------------------------------


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: str, rounds: int = 5) -> list[float]:
    """Of some calls, after a first that warms up."""
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        work()
        sync(device)
        times.append(time.perf_counter() - begun)
    return times[1:]


def product_rate(dtype: torch.dtype, device: str, n: int = 0) -> float:
    """FLOP/s of a square matrix product, the best of some; of a large one unless a small one says
    that nobody would wait for it."""
    if not n and not pays(dtype, device):
        n = 256
    n = n or (8192 if device == "cuda" else 2048)
    a = torch.randn(n, n, device=device).to(dtype)
    rounds = 5 if n > 1000 else 25  # a product of a millisecond is easily disturbed
    return 2 * n**3 / min(seconds_of(lambda: a @ a, device, rounds))


@cache
def pays(dtype: torch.dtype, device: str) -> bool:
    """Check that a dtype's products are not many times slower than those of fp32, as those of bf16
    are on a CPU without instructions for them."""
    if device == "cuda" or dtype == torch.float32:
        return True
    rates = [product_rate(kind, device, 256) for kind in (torch.float32, dtype)]
    print(f"a product in {dtype} has {rates[1] / rates[0]:.4f} of the rate of fp32", flush=True)
    return rates[1] > rates[0] / 4


def dtypes_of(device: str) -> list[str]:
    """Name the dtypes worth a measurement: bf16, on a CPU fp32 too, and that alone without the
    instructions."""
    if device == "cuda":
        return ["bf16"]
    return [name for name in ("bf16", "fp32") if pays(parallel.DTYPES[name], device)]


def read_rate(dtype: torch.dtype, device: str) -> float:
    """Bytes/s of summing a tensor, the best of some."""
    x = torch.randn(1 << 28, device=device).to(dtype)
    return x.numel() * x.element_size() / min(seconds_of(lambda: x.sum(), device))


def machine(device: str) -> Result:
    """Hardware and versions, for the table's foot."""
    import transformers

    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((s.split(": ")[1] for s in lines if s.startswith("model name")), cpu)
    out = {"device": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__}
    out |= {
        "isa": torch.backends.cpu.get_cpu_capability(),
        "transformers": transformers.__version__,
    }
    return out | ({"device": torch.cuda.get_device_name()} if device == "cuda" else {})


# ---- contenders: processes that take steps in turns ----------------------------------------------

Turn = Callable[[], None]  # a contender calls it before each of its steps


def peak_gib(device: str) -> float:
    """Peak memory of this process: the device's, or the resident set."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(s.split()[1]) for s in lines if s.startswith("VmHWM")) / 2**20


def contender(pipe: Any, name: str, how: Result, rank: int, world: int, store: str) -> None:
    """A process: one of CONTENDERS, which never returns, told when to take a step."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(how.pop("threads"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    begun, before = None, peak_gib(device)

    def turn() -> None:
        nonlocal begun
        sync(device)
        if begun is not None:
            seconds, cpu = time.perf_counter() - begun[0], time.process_time() - begun[1]
            pipe.send({"seconds": seconds, "cpu": cpu, "gib": peak_gib(device), "before": before})
        pipe.recv()
        begun = time.perf_counter(), time.process_time()

    try:
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:
            sys.stdout = nothing
            CONTENDERS[name](turn, Path(folder), **how)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent has what it wants
    except BaseException as e:
        pipe.send(f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}")
        os._exit(1)


def in_turns(runs: dict[str, tuple[str, Result, int]], rounds: int) -> dict[str, list[Result]]:
    """Label → (contender, its arguments, processes), to label → steps, everyone's n-th beside the
    others' n-th; two steps warm up. Who fails is named and left out."""
    spawn, pipes, folder = multiprocessing.get_context("spawn"), {}, tempfile.TemporaryDirectory()
    for i, (label, (name, how, world)) in enumerate(runs.items()):
        pipes[label] = []
        for rank in range(world):
            ours, theirs = spawn.Pipe()
            how_run = {"threads": torch.get_num_threads()} | how
            args = (theirs, name, how_run, rank, world, f"{folder.name}/{i}")
            spawn.Process(target=contender, args=args, daemon=True).start()
            theirs.close()
            pipes[label].append(ours)
    steps: dict[str, list[Result]] = {label: [] for label in runs}
    for _, label in product(range(rounds + 2), runs):
        try:
            for pipe in pipes.get(label, []):
                pipe.send("go")
            told = [pipe.recv() for pipe in pipes.get(label, [])]
        except (EOFError, OSError):
            told = ["its process died"]
        if wrong := [t for t in told if isinstance(t, str)]:
            print(f"  {label} did not run: {wrong[0]}", flush=True)
            del pipes[label], steps[label]
        elif told:
            step = {key: sum(t[key] for t in told) for key in ("cpu", "gib", "before")}
            steps[label].append(step | {"seconds": max(t["seconds"] for t in told)})
    for pipe in (p for some in pipes.values() for p in some):
        pipe.close()
    return {label: some[2:] for label, some in steps.items()}


NEVER = dict(steps=1 << 30, save_every=1 << 30, eval_every=1 << 30)


def ours_train(
    turn: Turn, folder: Path, cfg: model.ModelConfig, mesh: parallel.MeshConfig, batch: int
) -> None:
    """train.fit itself, on random tokens: it asks for a batch where a step begins."""
    share = batch // mesh.dp(parallel.world_size())
    run = train.PretrainConfig(
        model=cfg, mesh=mesh, batch=batch, micro_batch=share, out=folder, **NEVER
    )
    runner = parallel.Runner(cfg, mesh, parallel.init_mesh(mesh), share, 0)
    ids = torch.randint(7, cfg.vocab_size, (share, cfg.seq_len + 1))
    rows = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "count": share * cfg.seq_len}

    def batches(step: int) -> list[parallel.Batch]:
        turn()
        return [rows]

    train.fit(run, runner, batches, train.lm_loss, lambda step: {}, str)


def forward_backward(
    turn: Turn, folder: Path, cfg: model.ModelConfig, mesh: parallel.MeshConfig, batch: int
) -> None:
    """Runner.step alone: for a slice whose optimizer does not fit."""
    runner = parallel.Runner(cfg, mesh, parallel.init_mesh(mesh), batch, 0)
    ids = torch.randint(7, cfg.vocab_size, (batch, cfg.seq_len + 1))
    rows = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "count": batch * cfg.seq_len}
    while True:
        turn()
        runner.step([rows], train.lm_loss)
        for p in runner.params().values():
            p.grad = None


def their_model(cfg: model.ModelConfig) -> Any:
    from transformers import NemotronConfig, NemotronForCausalLM

    how = dict(attn_implementation="sdpa")
    return NemotronForCausalLM._from_config(NemotronConfig(**model.hf_config(cfg)), **how)


def their_train(
    turn: Turn, folder: Path, cfg: model.ModelConfig, mesh: parallel.MeshConfig, batch: int
) -> None:
    """transformers' Nemotron, torch's AdamW and clipping: the loop that its users write."""
    device, run = "cuda" if torch.cuda.is_available() else "cpu", train.PretrainConfig(model=cfg)
    peer = their_model(cfg).to(device).train()
    stepped = torch.compile(peer) if mesh.compile else peer
    how = dict(lr=run.lr, betas=run.betas, eps=run.eps, weight_decay=run.weight_decay)
    optimizer = torch.optim.AdamW(peer.parameters(), **how)
    ids = torch.randint(7, cfg.vocab_size, (batch, cfg.seq_len))
    while True:
        turn()
        rows = ids.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=mesh.dtype == "bf16"):
            loss = stepped(rows, labels=rows).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), run.clip)
        optimizer.step()
        optimizer.zero_grad()
        float(loss), float(norm)  # both are logged


# ---- training ------------------------------------------------------------------------------------


def ratio(a: list[Result], b: list[Result]) -> Result:
    """How many times faster a is than b, pair by pair."""
    pairs = [y["seconds"] / x["seconds"] for x, y in zip(a, b, strict=True)]
    return {"ratio": statistics.median(pairs), "ratio_min": min(pairs), "ratio_max": max(pairs)}


def table_of(
    steps: dict[str, list[Result]], tokens: float, flops: float, rates: dict[str, float], what: str
) -> list[Result]:
    """Print each contender, then ours against each of theirs. Labels: "ours bf16", "PEER bf16"."""
    rows = []
    for label, some in steps.items():
        seconds = [s["seconds"] for s in some]
        middle, gib, before = statistics.median(seconds), some[-1]["gib"], some[-1]["before"]
        row = {"what": what, "contender": label, "tokens_per_s": tokens / middle, "gib": gib}
        row |= {"min": tokens / max(seconds), "max": tokens / min(seconds), "gib_before": before}
        row["share_of_products"] = tokens * flops / middle / rates[label.split()[1]]
        row["mfu"] = (
            tokens * flops / middle / peak_of("cuda" if torch.cuda.is_available() else "cpu")
        )
        rows.append(row)
        print(
            f"  {label:18} {row['tokens_per_s']:9.0f} tokens/s ({row['min']:.0f} to "
            f"{row['max']:.0f}), {row['share_of_products']:4.0%} of the products' rate, peak "
            f"{gib:.2f} GiB ({before:.2f} before the model)"
        )
    for mine in (s for s in steps if s.startswith("ours")):
        for peer in (s for s in steps if not s.startswith("ours")):
            row = {"what": what, "contender": mine, "against": peer}
            row |= ratio(steps[mine], steps[peer])
            row["memory"] = steps[mine][-1]["gib"] / steps[peer][-1]["gib"]
            rows.append(row)
            spread = f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
            print(f"  {mine} / {peer}: {row['ratio']:.2f} {spread}, memory {row['memory']:.2f}")
    return rows


def rates_of(device: str) -> dict[str, float]:
    rates = {name: product_rate(dtype, device) for name, dtype in parallel.DTYPES.items()}
    text = ", ".join(f"{name} {rate / 1e12:.4f}" for name, rate in rates.items())
    print(f"large square matrix products: {text} TFLOP/s", flush=True)
    return rates


def at_length(shape: str, device: str) -> tuple[model.ModelConfig, int]:
    """The shape at a length that fits, and the sequences of a step."""
    length, tokens = (4096, 1 << 15) if device == "cuda" else (512, 2048)
    cfg = replace(SHAPES[shape], seq_len=min(SHAPES[shape].seq_len, length))
    return cfg, max(1, tokens // cfg.seq_len)


def training(shape: str, o: argparse.Namespace) -> list[Result]:
    """Tokens/s of a whole step: forward, backward, clipping, AdamW, logging."""
    (cfg, batch), runs = at_length(shape, o.device), {}
    how = {"cfg": cfg, "batch": batch}
    for dtype, compiled in product(
        dtypes_of(o.device), ("", " compiled")[: 1 + (o.device == "cuda")]
    ):
        mesh = {"mesh": parallel.MeshConfig(dtype=dtype, compile=bool(compiled))}
        runs[f"ours {dtype}{compiled}"] = ("ours_train", how | mesh, 1)
        runs[f"transformers {dtype}{compiled}"] = ("their_train", how | mesh, 1)
    print(f"train {shape}: {batch} x {cfg.seq_len} tokens a step, {o.rounds} rounds", flush=True)
    rates, flops = rates_of(o.device), model.flops_per_token(cfg)
    steps = in_turns(runs, o.rounds)
    return table_of(steps, batch * cfg.seq_len, flops, rates, f"train {shape}")


KINDS = {
    "matrix products": r"aten::(mm|bmm|addmm)$|mkldnn|gemm|nvjet|cutlass",
    "attention": r"attention|_attn|flash|fmha",
    "optimizer and clipping": r"adam|Optimizer|vector_norm|foreach",
    "copies and casts": r"copy|aten::cat|fill_|Memcpy|Memset",
}


class Enough(Exception):
    """Ends a contender that runs in this process."""


def where(shape: str, o: argparse.Namespace) -> list[Result]:
    """Each operator's own share of a training step's time, by kind of work."""
    (cfg, batch), out = at_length(shape, o.device), []
    clock = "self_device_time_total" if o.device == "cuda" else "self_cpu_time_total"
    for dtype in dtypes_of(o.device):
        profiler, turns = torch.profiler.profile(), count()

        def turn(profiler: Any = profiler, turns: Any = turns) -> None:
            n = next(turns) - 3  # three steps warm up
            if n == 0:
                profiler.start()
            if n == o.rounds:
                profiler.stop()
                raise Enough

        with tempfile.TemporaryDirectory() as folder, suppress(Enough):
            ours_train(turn, Path(folder), cfg, parallel.MeshConfig(dtype=dtype), batch)
        seconds = dict.fromkeys([*KINDS, "the rest"], 0.0)
        for event in profiler.key_averages():
            kinds = (kind for kind, named in KINDS.items() if re.search(named, event.key))
            seconds[next(kinds, "the rest")] += getattr(event, clock) / 1e6 / o.rounds
        for kind, some in seconds.items():
            row = {"what": f"where {shape} {dtype}", "kind": kind, "seconds": some}
            out.append(row | {"share": some / sum(seconds.values())})
            print(f"  {dtype} {kind:24} {some * 1e3:9.1f} ms {out[-1]['share']:5.0%}")
    return out


def peak_of(device: str) -> float:
    """FLOP/s of the data sheet; nan where there is none."""
    return train.peak_flops(torch.device(device)) or float("nan")


# ---- preference optimisation ---------------------------------------------------------------------

PAIRS, WINDOW = 8, 512


def write_pairs(folder: Path) -> tuple[Path, Path]:
    """(rows, tokenizer): pairs of answers cut from Python's documentation, always the same."""
    texts = [text for _, text in zip(range(60), data.embedded_english(), strict=False)]
    text, rng = "\n".join(texts), random.Random(0)

    def words(most: int) -> str:
        at = rng.randrange(len(text) - most)
        return text[at : at + rng.randint(80, most)]

    rows = []
    for _ in range(PAIRS):
        asked = {"role": "user", "content": words(200)}
        answers = [[asked, {"role": "assistant", "content": words(400)}] for _ in range(2)]
        rows.append(dict(zip(("chosen", "rejected"), answers, strict=True)))
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file, folder / data.train_bpe(texts, 1000).save(folder)


def ours_dpo(turn: Turn, folder: Path, cfg: model.ModelConfig, mesh: parallel.MeshConfig) -> None:
    """align.align itself, told when to begin a step."""
    file, tokenizer = write_pairs(folder)
    how = dict(tokenizer=str(tokenizer), seq_len=WINDOW, batch=PAIRS, epochs=1 << 30, beta=0.1)
    never = {k: v for k, v in NEVER.items() if k != "steps"}
    run = align.PreferenceConfig(
        model=cfg, mesh=mesh, data=file, out=folder / "run", lr=1e-6, **how, **never
    )

    def fit(cfg: Any, runner: Any, batches: Any, *rest: Any) -> None:
        train.fit(cfg, runner, lambda step: (turn(), batches(step))[1], *rest)

    with patch("align.fit", fit):
        align.align("dpo", run)


def their_dpo(turn: Turn, folder: Path, cfg: model.ModelConfig, mesh: parallel.MeshConfig) -> None:
    """TRL's DPOTrainer on the same token ids, reference log-probabilities computed beforehand."""
    import datasets
    import tokenizers
    import transformers
    import trl

    file, tokenizer = write_pairs(folder)
    found, _ = data.preference_rows(file, data.load_tokenizer(tokenizer), WINDOW)
    rows = []
    for row in found:
        starts = [int(trained.argmax()) for trained in row.trained]
        ids = [part[at:].tolist() for part, at in zip(row.ids, starts, strict=True)]
        prompt = row.ids[0][: starts[0]].tolist()
        rows.append({"prompt_ids": prompt, "chosen_ids": ids[0], "rejected_ids": ids[1]})

    class Ready(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset  # it is token ids already

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turn()

    how = dict(beta=0.1, learning_rate=1e-6, lr_scheduler_type="constant", max_grad_norm=1.0)
    how |= dict(per_device_train_batch_size=PAIRS, precompute_ref_log_probs=True, max_length=None)
    how |= dict(bf16=mesh.dtype == "bf16", gradient_checkpointing=False, report_to="none")
    how |= dict(save_strategy="no", logging_steps=1, disable_tqdm=True, max_steps=1 << 30)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    trainer = Ready(
        their_model(cfg).train(),
        args=trl.DPOConfig(str(folder), use_cpu=not torch.cuda.is_available(), **how),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<pad>"
        ),
        callbacks=[Turns()],
    )
    trainer.train()


def preference(shape: str, o: argparse.Namespace) -> list[Result]:
    """A DPO step of the same pairs, both from files to the updated weights."""
    cfg, runs = replace(SHAPES[shape], seq_len=WINDOW), {}
    with tempfile.TemporaryDirectory() as folder:
        file, tokenizer = write_pairs(Path(folder))
        rows, _ = data.preference_rows(file, data.load_tokenizer(tokenizer), WINDOW)
    tokens = sum(row.length for row in rows)
    for dtype in dtypes_of(o.device):
        how = {"cfg": cfg, "mesh": parallel.MeshConfig(dtype=dtype)}
        runs |= {f"ours {dtype}": ("ours_dpo", how, 1), f"trl {dtype}": ("their_dpo", how, 1)}
    print(f"DPO {shape}: {PAIRS} pairs of {tokens} tokens a step, {o.rounds} rounds", flush=True)
    row = replace(cfg, seq_len=tokens // (2 * PAIRS))
    rates, flops = rates_of(o.device), model.flops_per_token(row)
    return table_of(in_turns(runs, o.rounds), tokens, flops, rates, f"dpo {shape}")


# ---- online alignment ----------------------------------------------------------------------------

ASKED, ANSWERS, LONGEST = 8, 8, 64  # prompts of a round, answers to each, tokens of an answer


def write_policy(folder: Path, cfg: model.ModelConfig, stop: float) -> None:
    """A policy's Hugging Face folder, with prompts. After each token an answer ends with a
    probability of about `stop`: by a part of the state that is always there and that only the
    stop token reads."""
    tokenizer = data.train_bpe(["0123456789"] * 50, 263)
    policy = model.Nemotron(cfg)
    model.init_weights(policy, 0)
    always = torch.randn(cfg.dim, generator=torch.Generator().manual_seed(0))
    policy.norm.bias.data.copy_(always)
    others = [i for i in range(cfg.vocab_size) if i != tokenizer.special("<extra_id_1>")]
    head = policy.head.weight.data
    head -= torch.outer(head @ always, always) / always.square().sum()
    logit = math.log(max(stop, 1e-9) * len(others) / (1 - stop))
    head[tokenizer.special("<extra_id_1>")] = logit * always / always.square().sum()
    parallel.save_hf(policy, folder)
    tokenizer.save(folder)
    rows = [{"prompt": f"{i:04d}"} for i in range(512)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def digits(row: Result, text: str) -> float:
    """The reward of an answer: how many digits it has."""
    return float(len(re.findall(r"\d", text)))


def ours_online(turn: Turn, folder: Path, policy: Path) -> None:
    """recipes.online itself, told when to begin a round of one step."""
    batch, never = ASKED * ANSWERS, {k: v for k, v in NEVER.items() if k != "steps"}
    run = online.OnlineConfig(
        algorithm="grpo", kl=0.04, init=f"hf:{policy}", data=policy / "prompts.jsonl", lr=1e-6,
        out=folder / "run", seq_len=256, micro_batch=8, batch=batch, samples=ANSWERS,
        max_tokens=LONGEST, slots=batch, verifier="bench:digits", epochs=1e5,
        mesh=parallel.MeshConfig(dtype="fp32"), **never,
    )  # fmt: skip

    def fit(cfg: Any, runner: Any, batches: Any, *rest: Any) -> None:
        train.fit(cfg, runner, lambda step: (turn(), batches(step))[1], *rest)

    sys.path.insert(0, str(Path(__file__).parent))  # for the verifier's name
    with patch("recipes.online.fit", fit):
        online.online("own", run)


def their_online(turn: Turn, folder: Path, policy: Path) -> None:
    """TRL's GRPOTrainer from the same folder, with the same prompts as tokens, reward and loss."""
    import datasets
    import transformers
    import trl

    ours = data.load_tokenizer(policy)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(policy / "tokenizer.json"), pad_token="<pad>", eos_token="<extra_id_1>"
    )
    prompts = []
    for _, row in data.read_records(policy / "prompts.jsonl"):
        ids, _ = data.render_chat(data.messages_of(row["prompt"], "user"), ours)
        prompts.append({"prompt": ours.decode(ids)})
        assert words(prompts[-1]["prompt"])["input_ids"] == ids.tolist()

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turn()

    how = dict(per_device_train_batch_size=ASKED * ANSWERS, num_generations=ANSWERS, beta=0.04)
    how |= dict(max_completion_length=LONGEST, loss_type="bnpo", temperature=1.0, bf16=False)
    how |= dict(learning_rate=1e-6, lr_scheduler_type="constant", max_grad_norm=1.0)
    how |= dict(gradient_checkpointing=False, report_to="none", save_strategy="no")
    how |= dict(logging_steps=1, disable_tqdm=True, max_steps=1 << 30)
    trainer = trl.GRPOTrainer(
        transformers.NemotronForCausalLM.from_pretrained(policy, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [digits({}, text) for text in completions],
        args=trl.GRPOConfig(str(folder / "out"), use_cpu=not torch.cuda.is_available(), **how),
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=words,
        callbacks=[Turns()],
    )
    trainer.train()


def rounds_online(shape: str, o: argparse.Namespace) -> list[Result]:
    """A round, from prompts to the updated weights: answers that all have LONGEST tokens, and ones
    that end by chance, expected to have a quarter of that. Counted are the answers' tokens."""
    cfg, rows = replace(SHAPES[shape], vocab_size=263, seq_len=256), []
    for stop in (0.0, 4 / LONGEST):
        with tempfile.TemporaryDirectory() as policy:
            write_policy(Path(policy), cfg, stop)
            how = {"policy": Path(policy)}
            runs = {"ours fp32": ("ours_online", how, 1), "trl fp32": ("their_online", how, 1)}
            mean = sum((1 - stop) ** i for i in range(LONGEST))
            print(f"online {shape}: {ASKED} x {ANSWERS} answers of {mean:.0f} tokens", flush=True)
            found = in_turns(runs, o.rounds)
        rates, flops = rates_of(o.device), model.flops_per_token(replace(cfg, seq_len=LONGEST))
        what = f"online {shape}, {mean:.0f} tokens"
        rows += table_of(found, ASKED * ANSWERS * mean, flops, rates, what)
    return rows


# ---- growth --------------------------------------------------------------------------------------

SMALL = model.ModelConfig(256, 4, 4, 4, 64, 1024, vocab_size=2048, seq_len=256)


def growth(shape: str, o: argparse.Namespace) -> list[Result]:
    """CPU time of a token, against what should not matter to it or only as its FLOPs grow."""
    big = o.rounds > 1  # a single round tries the harness out
    panels = {
        "sequence length": {T: (T, max(1, 2048 // T), 4, 1) for T in (128, 256, 512, 1024, 2048)},
        "batch": {B: (256, B, 4, 1) for B in (1, 2, 4, 8, 16)},
        "layers": {L: (256, 4, L, 1) for L in (2, 4, 8, 16)},
        "ranks": {n: (256, 8, 4, n) for n in (1, 2, 4)},
    }
    mesh, rows = parallel.MeshConfig(dtype="fp32"), []
    for panel, points in panels.items():
        runs = {}
        for x, (T, B, L, ranks) in list(points.items())[: None if big else 2]:
            cfg = replace(SMALL, seq_len=T, n_layers=L)
            how = {"cfg": cfg, "mesh": mesh, "batch": B, "threads": 1}
            runs[str(x)] = ("ours_train", how, ranks)
        steps = in_turns(runs, o.rounds)
        for label, some in steps.items():
            T, B, L, _ = points[int(label)]
            cost = statistics.median(s["cpu"] for s in some) / (T * B)
            flops = model.flops_per_token(replace(SMALL, seq_len=T, n_layers=L))
            row = {"what": f"growth {panel}", "x": int(label), "us_per_token": cost * 1e6}
            row["us_per_mflop"] = cost * 1e12 / flops
            same = [r["us_per_mflop"] for r in rows if r["what"] == row["what"]]
            row["super_linear"] = bool(same) and row["us_per_mflop"] > 1.25 * min(same)
            rows.append(row)
            note = "  MORE THAN ITS FLOPS" if row["super_linear"] else ""
            print(
                f"  {panel} {label:>5}: {cost * 1e6:8.1f} us of CPU a token, "
                f"{row['us_per_mflop']:.3f} us a MFLOP{note}",
                flush=True,
            )
    if o.out:
        draw(rows, o.out)
    return rows


def draw(rows: list[Result], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, panels = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    names = dict.fromkeys(r["what"] for r in rows)
    for panel, name in zip(panels.flat, names, strict=True):
        some = [r for r in rows if r["what"] == name]
        xs, costs = [r["x"] for r in some], [r["us_per_token"] for r in some]
        due = [costs[0] * r["us_per_token"] / r["us_per_mflop"] for r in some]
        panel.plot(xs, costs, "o-", label="measured, median")
        panel.plot(xs, [d * costs[0] / due[0] for d in due], "--", label="as its FLOPs grow")
        panel.set(xlabel=name.removeprefix("growth "), ylim=(0, None), xscale="log")
        panel.set_xticks(xs, [str(x) for x in xs], minor=False)
        panel.set_ylabel("us of CPU time a token")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    fig.savefig(out, dpi=110)
    print(f"wrote {out}")


# ---- slices of the real blocks -------------------------------------------------------------------


def slices(shape: str, o: argparse.Namespace) -> list[Result]:
    """Blocks of the true size through the training path, MFU by the report's formula; then the head
    and the loss by themselves."""
    peak, rates, rows = peak_of(o.device), rates_of(o.device), []
    cfg = replace(SHAPES[shape], vocab_size=1024)  # the head is measured apart
    counts = {"340b": (1, 2), "15b": (2, 4)}.get(shape, (1,))
    ways = list(product(counts, ("", " compiled"), ("ours_train", "forward_backward")))
    for layers, compiled, name in ways:
        part = replace(cfg, n_layers=layers)
        mesh = parallel.MeshConfig(dtype="bf16", compile=bool(compiled))
        label = f"{layers} block(s){compiled}, {name}"
        steps = in_turns({label: (name, {"cfg": part, "mesh": mesh, "batch": 1}, 1)}, o.rounds)
        for some in steps.values():  # none, where it did not fit
            seconds = statistics.median(s["seconds"] for s in some)
            done = cfg.seq_len * model.flops_per_token(part)
            row = {"what": f"slice {shape}", "contender": label, "seconds": seconds}
            row |= {"mfu": done / seconds / peak, "gib": some[-1]["gib"]}
            row["share_of_products"] = done / seconds / rates["bf16"]
            rows.append(row)
            print(
                f"  {label}: {seconds * 1e3:.1f} ms, MFU {row['mfu']:.1%}, "
                f"{row['share_of_products']:.0%} of the products' rate, {row['gib']:.1f} GiB"
            )
    return rows + [head_and_loss(shape, o, peak, rates["bf16"])]


def head_and_loss(shape: str, o: argparse.Namespace, peak: float, rate: float) -> Result:
    """Forward and backward of log-probabilities; the 340B's has an eighth of the words (tp 8)."""
    cfg, tp = SHAPES[shape], 8 if shape == "340b" else 1
    like = dict(dtype=torch.bfloat16, device=o.device)
    h = torch.randn(cfg.seq_len, cfg.dim, **like).requires_grad_()
    weight = (0.01 * torch.randn(cfg.vocab_size // tp, cfg.dim, **like)).requires_grad_()
    targets = torch.randint(len(weight), (cfg.seq_len,), device=o.device)

    def work() -> None:
        h.grad = weight.grad = None
        parallel.TokenLogProbs.apply(h, weight, targets, None).sum().backward()

    seconds = statistics.median(seconds_of(work, o.device, o.rounds))
    done = 6 * cfg.seq_len * weight.numel()
    row = {"what": f"head {shape}", "seconds": seconds, "mfu": done / seconds / peak}
    row["share_of_products"] = done / seconds / rate
    what = f"head and loss, {len(weight):,} words"
    print(f"  {what}: {seconds * 1e3:.1f} ms, {row['share_of_products']:.0%} of the products' rate")
    return row


# ---- attention -----------------------------------------------------------------------------------

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def kernels(starts: torch.Tensor | None, T: int) -> dict[str, Kernel]:
    """Name → attention of (B, T, H, E); starts: boundaries of packed documents. Which of them run
    here, and how wrong they are, is for the table to say."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(backend: Any) -> Kernel:
        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            how = dict(is_causal=True, enable_gqa=True)
            with sdpa_kernel(backend):
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, **how)
            return out.transpose(1, 2)

        return run

    def fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        if starts is None:
            out = flash_attn_func(q, k, v, causal=True)
            return out[0] if isinstance(out, tuple) else out
        how = dict(cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)
        out = flash_attn_varlen_func(*(t.flatten(0, 1) for t in (q, k, v)), **how)
        return (out[0] if isinstance(out, tuple) else out).view_as(q)

    def registered(name: str) -> Kernel:
        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            from torch.nn.attention import activate_flash_attention_impl as activate
            from torch.nn.attention import restore_flash_attention_impl as restore

            activate(name)
            try:
                return sdpa(SDPBackend.FLASH_ATTENTION)(q, k, v)
            finally:
                restore()

        return run

    mine = {"model.attend": lambda q, k, v: model.attend(q, k, v, starts)}
    if starts is not None:
        return mine | {"flash-attn-4": fa4}
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    backends |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
    found = mine | {f"sdpa {name}": sdpa(backend) for name, backend in backends.items()}
    return found | {
        "flash-attn-4": fa4,
        "sdpa FA3": registered("FA3"),
        "sdpa FA4": registered("FA4"),
    }


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """float64, by the definition."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q.double(), k.double()) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshe->bthe", weights, v.double())


def attention(shape: str, o: argparse.Namespace) -> list[Result]:
    """Forward and backward, packed (four documents) and not; the error of the forward."""
    cfg, rows, rates = SHAPES[shape], [], rates_of(o.device)
    dtype = torch.bfloat16 if o.device == "cuda" else torch.float32
    rate = rates["bf16" if o.device == "cuda" else "fp32"]
    tp = 8 if shape == "340b" else 1
    for packed in (False, True) if o.device == "cuda" else (False,):
        for name in kernels(None if not packed else torch.zeros(1), 0):
            row = {"what": f"attention {shape}", "kernel": name, "packed": packed}
            try:
                row |= one_kernel(name, cfg, tp, packed, dtype, o)
            except Exception as e:
                row["failed"] = (str(e).splitlines() or [type(e).__name__])[0][:90]
                print(f"  {name:14} {'packed' if packed else ''}: did not run: {row['failed']}")
            else:
                row["share_of_products"] = row["flops"] / rate
                print(
                    f"  {name:14} {'packed' if packed else '':6} {row['seconds'] * 1e3:8.2f} ms, "
                    f"{row['flops'] / 1e12:6.2f} TFLOP/s, error {row['error']:.1e}"
                )
            rows.append(row)
    return rows


def one_kernel(
    name: str, cfg: model.ModelConfig, tp: int, packed: bool, dtype: torch.dtype, o: Any
) -> Result:
    out, heads = {}, (cfg.n_heads // tp, *[max(1, cfg.n_kv_heads // tp)] * 2)
    for T in (min(512, cfg.seq_len), cfg.seq_len):  # the first is checked, the last is timed
        q, k, v = (torch.randn(1, T, n, cfg.head_dim, dtype=dtype, device=o.device) for n in heads)
        documents = torch.arange(T, device=o.device)[None] * 4 // T
        starts = model.boundaries(documents) if packed else None
        kernel = kernels(starts, T)[name]
        if not out:
            mask = torch.ones(T, T, dtype=torch.bool, device=o.device).tril()
            mask &= (documents[0][:, None] == documents[0]) | (not packed)
            out["error"] = (kernel(q, k, v).double() - exact(q, k, v, mask)).abs().max().item()
    for t in (q, k, v):
        t.requires_grad_()

    def work() -> None:
        q.grad = k.grad = v.grad = None
        kernel(q, k, v).sum().backward()

    out["seconds"] = statistics.median(seconds_of(work, o.device, o.rounds))
    # two products forward, five backward, of half a square or of four small ones
    pairs = cfg.seq_len**2 / 2 / (4 if packed else 1)
    out["flops"] = 7 * 2 * pairs * heads[0] * cfg.head_dim / out["seconds"]
    return out


# ---- decoding ------------------------------------------------------------------------------------


TIMES = 4  # a turn begins with cold caches


def ours_generate(
    turn: Turn, folder: Path, cfg: model.ModelConfig, dtype: torch.dtype, ids: Any, new: int
) -> None:
    """In turns: the first token of every row, then `new` of them, each some TIMES."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        parallel.keep_freed_memory()  # as load_engine does
    engine = generate.Engine(model.Nemotron(cfg).to(device, dtype), slots=len(ids))
    for n in cycle((1, new)):
        turn()
        for _ in range(TIMES):
            engine.computed[:] = 0  # no prefix is known
            how = dict(max_tokens=n, temperature=0, stop_ids=())
            engine.generate(ids.tolist(), generate.SamplingParams(**how))


def their_generate(
    turn: Turn, folder: Path, cfg: model.ModelConfig, dtype: torch.dtype, ids: Any, new: int
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer, ids = their_model(cfg).to(device, dtype).eval(), ids.to(device)
    for n in cycle((1, new)):
        turn()
        for _ in range(TIMES):
            peer.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)


def decode(shape: str, o: argparse.Namespace) -> list[Result]:
    """Prefill and decode, ours and transformers' generate, a batch of 1 and of many."""
    cfg, rows, many, new = SHAPES[shape], [], 64 if o.device == "cuda" else 32, 25
    # a step reads all but the embedding; FLOPs of a token are twice that, attention left out
    weights = sum(model.count_params(cfg)) - cfg.vocab_size * cfg.dim
    for (name, dtype), batch in product(parallel.DTYPES.items(), (1, many)):
        if not pays(dtype, o.device):
            continue
        read, flops = read_rate(dtype, o.device), product_rate(dtype, o.device)
        limits = f"reads {read / 1e9:.1f} GB/s, multiplies {flops / 1e12:.3f} TFLOP/s"
        print(f"generate {shape} {name}, batch {batch}: this machine {limits}", flush=True)
        ids = torch.randint(7, cfg.vocab_size, (batch, o.prompt))
        how = dict(cfg=cfg, dtype=dtype, ids=ids, new=new)
        runs = {who: (f"{who}_generate", how, 1) for who in ("ours", "their")}
        steps = in_turns(runs, 2 * o.rounds)
        if len(steps) < 2:
            continue  # who did not run has been named
        row: Result = {"what": f"generate {shape}", "dtype": name, "batch": batch}
        for kind, tokens in (("prefill", o.prompt), ("decode", new - 1)):
            turns = {who: turns_of(kind, some) for who, some in steps.items()}
            for who, some in turns.items():
                seconds = statistics.median(t["seconds"] for t in some) / TIMES
                row[f"{who}_{kind}"] = batch * tokens / seconds
            row |= {f"{kind}_{k}": v for k, v in ratio(turns["ours"], turns["their"]).items()}
            print(
                f"  {kind} {row[f'ours_{kind}']:7.0f} tokens/s, transformers "
                f"{row[f'their_{kind}']:7.0f}, ratio {row[f'{kind}_ratio']:.2f} "
                f"({row[f'{kind}_ratio_min']:.2f} to {row[f'{kind}_ratio_max']:.2f})"
            )
        row["share_of_bandwidth"] = row["ours_decode"] / batch * weights * dtype.itemsize / read
        row["share_of_products"] = row["ours_prefill"] * weights * 2 / flops
        row["prefill_mfu"] = row["ours_prefill"] * weights * 2 / peak_of(o.device)
        print(
            f"  decode reads {row['share_of_bandwidth']:.0%} of the bandwidth; prefill has "
            f"{row['share_of_products']:.0%} of the products' rate"
        )
        rows.append(row)
    return rows


def turns_of(kind: str, steps: list[Result]) -> list[Result]:
    """Of alternating turns, the first token's, or what the other tokens took beyond it."""
    first, all_tokens = steps[::2], steps[1::2]
    if kind == "prefill":
        return first
    both = zip(first, all_tokens, strict=True)
    return [{"seconds": b["seconds"] - a["seconds"]} for a, b in both]


# ---- tokenising ----------------------------------------------------------------------------------


def tokenize(shape: str, o: argparse.Namespace, vocab_size: int = 16_384) -> list[Result]:
    """MB/s of `prepare`'s encoder and of tokenizers.encode_batch: one pattern, text, all cores."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [*data.embedded_code(), *data.embedded_english()]
    docs = [(text, len(text.encode())) for text in texts]
    megabytes = sum(n for _, n in docs) / 1e6
    ours = data.train_bpe(texts, vocab_size)
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = ours.standard.pre_tokenizer
    start = dict(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    specials = list(data.SPECIALS)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, **start)
    theirs.train_from_iterator(texts, trainer)
    workers, rates = data.PrepareConfig.workers, ([], [])
    for _ in range(o.rounds):
        begun = time.perf_counter()
        n_ours = sum(len(ids) for _, ids in data.encode_all(docs, ours.encode, workers))
        middle = time.perf_counter()
        n_theirs = sum(len(e.ids) for e in theirs.encode_batch(texts, add_special_tokens=False))
        rates[0].append(megabytes / (middle - begun))
        rates[1].append(megabytes / (time.perf_counter() - middle))
    ratios = [a / b for a, b in zip(*rates, strict=True)]
    out = []
    for name, r in (("ours", rates[0]), ("tokenizers", rates[1]), ("ratio", ratios)):
        out.append({"what": "tokenize MB/s", "contender": name, "median": statistics.median(r)})
        out[-1] |= {"min": min(r), "max": max(r)}
        print(f"{name:12} median {statistics.median(r):6.1f}  min {min(r):6.1f}  max {max(r):6.1f}")
    print(f"{megabytes:.1f} MB, {workers} threads, {n_ours:,} and {n_theirs:,} tokens")
    return out


# ---- curation ------------------------------------------------------------------------------------

RECIPE = """
[inputs.prose]
path = "{here}/prose"
[inputs.code]
path = "{here}/code"
[language]
languages = ["en"]
threshold = 0.3
inputs = ["prose"]
[[rules]]
filter = "gopher_repetition"
inputs = ["prose"]
[[rules]]
filter = "gopher_quality"
inputs = ["prose"]
[[rules]]
filter = "c4_quality"
inputs = ["prose"]
filter_no_terminal_punct = false
[[rules]]
filter = "fineweb_quality"
inputs = ["prose"]
[near_duplicates]
[decontaminate]
evaluations = ["{here}/evaluations.jsonl"]
[quality]
judged = "{here}/judged.jsonl"
good_from = 1
"""
LICENCE = re.compile("LICEN|COPYING|copyright")
PROSE = re.compile(r"(\.md|\.rst|\.txt|\.gz|METADATA|LICEN\w+|COPYING|copyright|README)$")


def texts_of_machine(kind: str, n_bytes: float) -> list[tuple[str, str]]:
    """(file, text) of code, or of documentation and licences, in a random order that is always the
    same, but the largest first: what takes most memory is in any part."""
    purelib = sysconfig.get_paths()["purelib"]
    roots = (purelib, sysconfig.get_paths()["stdlib"])
    if kind == "prose":
        roots = (purelib, "/usr/share/doc", "/usr/share/man")
    files = sorted(path for root in map(Path, roots) for path in root.rglob("*") if path.is_file())
    random.Random(0).shuffle(files)
    texts, left = [], n_bytes
    for path in files:
        known = path.suffix == ".py" if kind == "code" else PROSE.search(path.name)
        if known and left > 0 and 200 < path.stat().st_size < 1_000_000:
            with suppress(UnicodeDecodeError, OSError), data.open_bytes(path, data.refuse) as file:
                texts.append((str(path), file.read().decode()))
                left -= len(texts[-1][1])
    if left > 0:
        raise ValueError(f"{kind}: {left / 1e6:.0f} MB too few on this machine: less --megabytes")
    return sorted(texts, key=lambda text: -len(text[1]))[:1] + texts


def write_inputs(folder: Path, kinds: dict[str, list[tuple[str, str]]], n_bytes: float) -> float:
    """Write n_bytes of each kind, labels for the classifier, and some passages as evaluations."""
    size = 0
    for kind, texts in kinds.items():
        (folder / kind).mkdir()
        with ExitStack() as stack:
            paths = [folder / kind / f"{i}.jsonl" for i in range(8)]
            files = [stack.enter_context(path.open("w")) for path in paths]
            left = n_bytes
            for (_, text), file in zip(texts, cycle(files), strict=False):
                if left > 0:
                    file.write(json.dumps({"text": text}) + "\n")
                    left -= len(text)
            size += n_bytes - left
    rows = [
        {"text": text, "score": 0 if LICENCE.search(name) else 1} for name, text in kinds["prose"]
    ]
    data.write_whole(folder / "judged.jsonl", map(json.dumps, rows[:3000]))
    asked = [{"question": " ".join(row["text"].split()[100:140])} for row in rows[:4000:40]]
    data.write_whole(folder / "evaluations.jsonl", map(json.dumps, asked))
    (folder / "recipe.toml").write_text(RECIPE.format(here=folder))
    return size


def alone(work: Callable[[], Any]) -> float:
    """Peak memory in MiB of a process that does this work."""

    def child() -> None:
        work()
        pipe[1].send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    context = multiprocessing.get_context("fork")
    pipe = context.Pipe(duplex=False)
    process = context.Process(target=child)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the process ended with {process.exitcode}")
    return pipe[0].recv()


def curation(folder: Path, found: list[Result]) -> None:
    """Run the recipe, a task at a time, and note each stage's seconds and its worst memory."""
    plain = curate.run_task
    peaks = folder / "peaks"

    def run_task(executor: Any, rank: int, stage: str) -> None:
        plain(executor, rank, stage)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with peaks.open("a") as file:
            file.write(f"{stage} {peak} {time.time()}\n")

    begun = time.time()
    cfg = curate.CurateConfig(folder / "recipe.toml", folder / "out", tasks=4, cores=1)
    with patch.object(curate, "run_task", run_task):
        curate.curate(cfg)
    stages = {}
    for stage, peak, end in map(str.split, peaks.read_text().splitlines()):
        most, _ = stages.get(stage, (0.0, 0.0))
        stages[stage] = max(most, float(peak)), float(end)
    for stage, (peak, end) in stages.items():
        found.append({"stage": stage, "seconds": end - begun, "MiB": peak})
        begun = end


def curated(shape: str, o: argparse.Namespace) -> list[Result]:
    """MB/s of the input and peak memory of curation's stages at 1, 4 and 16 times the input, on one
    core, and of `prepare` with one thread."""
    kinds = {kind: texts_of_machine(kind, 8e6 * o.megabytes) for kind in ("prose", "code")}
    rows = []
    for times in (1, 4, 16):
        with tempfile.TemporaryDirectory() as name:
            folder, found = Path(name), []
            megabytes = write_inputs(folder, kinds, times * o.megabytes * 5e5) / 1e6
            curation(folder, found)
            sources = tuple(f"{kind}={folder / kind}" for kind in kinds)
            tok = data.PrepareConfig(sources, folder / "tok", vocab_size=8192)
            alone(lambda tok=tok: data.prepare(tok))
            how = replace(tok, out=folder / "tokens", tokenizer=str(tok.out), workers=1)
            begun = time.time()
            peak = alone(lambda how=how: data.prepare(how))
            found.append({"stage": "prepare", "seconds": time.time() - begun, "MiB": peak})
            for row in found:
                row |= {"MB": megabytes, "MB/s": megabytes / row["seconds"]}
                print("{MB:6.0f} MB  {stage:14} {MB/s:8.1f} MB/s {MiB:6.0f} MiB".format(**row))
            rows += found
    return rows


# ---- growth with the number of ranks -------------------------------------------------------------

# The 340B's layout, as far as so many ranks allow
FEW = parallel.MeshConfig(tp=2, pp=2, vp=2, recompute="selective")
SOME = replace(FEW, tp=8, pp=8, vp=6)
LAYOUTS = {n: FEW for n in (4, 8, 16, 32)}
LAYOUTS |= {64: SOME, 512: SOME, 6144: replace(SOME, pp=12, vp=8)}
REAL = 32  # ranks, as processes; more are one rank of a process group that only pretends
N_MICRO = {"schedule": 36, "step": 12}  # the report's at 6,144 GPUs; a step's, to be done sooner
# What is measured, and how much of it a run bears. Seconds are of CPU time; the step's are those
# that the report's 8 s leave for so many micro-batches.
BEARABLE = {
    "start: groups, s": 60,
    "start: own stages, s": 60,
    "start: schedules, s": 60,
    "schedule: own actions": None,
    "schedule: all actions": None,
    "step: collectives": None,
    "step: Python, s": 8 * N_MICRO["step"] / N_MICRO["schedule"],
    "open files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "save: items on rank 0": None,
    "save: a rank's plan, s": 10,
    "save: plans to rank 0, MB": 4000,
    "save: rank 0's plan, s": 10,
    "save: its next plan, s": 10,
    "save: rank 0's end, s": 10,
    "load: .metadata, MB": None,
    "load: reading it, s": 5,
    "load: its memory, MB": 1000,
    "load: finding pieces, s": 5,
}


@contextmanager
def timed(found: Result, name: str) -> Iterator[None]:
    """Add the CPU time of this process to found[name]: others run beside it."""
    begun = time.process_time()
    yield
    found[name] = found.get(name, 0.0) + time.process_time() - begun


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_mb() -> float:
    """Return this process's resident memory in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


class Collectives(TorchDispatchMode):
    """Count the collectives, sends and receives that are asked for."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kinds = "gather|scatter|reduce|send|recv|broadcast|all_to_all"
        self.seen += "c10d" in func.namespace and bool(re.search(kinds, func.name()))
        return func(*args, **(kwargs or {}))


def join(rank: int, world: int, port: int) -> None:
    """Let init_mesh start a real job as torchrun would, or join one that only pretends."""
    if world > REAL:
        from torch.testing._internal.distributed import fake_pg

        dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=rank, world_size=world)
        return
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"


def drill(pipe: Any, rank: int, world: int, port: int, folder: Path) -> None:
    """Be a rank from its start to a load, in a process of its own; tell what it took."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    mesh, found, before = LAYOUTS[world], {}, open_files()
    with timed(found, "start: groups, s"):
        join(rank, world, port)
        devices = parallel.init_mesh(mesh)
    narrow = model.ModelConfig(64, mesh.n_stages, 8, 8, 8, 128, vocab_size=256, seq_len=16)
    runner = parallel.Runner(narrow, mesh, devices, 1, 0)
    one_step(found, runner)
    if world <= REAL:
        save_and_load(found, runner, folder)
        found["open files"] = open_files() - before
        parallel.shut_down()
    else:
        with timed(found, "start: own stages, s"):
            cfg = SHAPES["340b"]
            stages = [parallel.build_stage(cfg, s, devices, mesh, []) for s in runner.stages]
        plan_a_save(found, stages, world, folder)
    if rank == 0 or world > REAL:
        pipe.send(found)


def one_step(found: Result, runner: parallel.Runner) -> None:
    """Make the schedules, and take a step of tensors so small that the time is Python's."""
    mesh = runner.cfg
    with timed(found, "start: schedules, s"):
        built = parallel.make_schedule(mesh, runner.pipeline_stages(), N_MICRO["schedule"])
        round_ = max(1, 8 * mesh.pp // mesh.vp)  # as Runner.run divides a validation
        parallel.make_schedule(mesh, runner.pipeline_stages(), round_, train=False)
    actions = built.pipeline_order_with_comms
    found["schedule: own actions"] = len(actions[runner.mesh.get_local_rank("pp")])
    found["schedule: all actions"] = sum(map(len, actions.values()))
    ids = torch.zeros(1, runner.model.seq_len, dtype=torch.long)
    rows = [{"tokens": ids, "targets": ids, "count": ids.numel()}] * N_MICRO["step"]
    pretends = dist.get_world_size() > REAL
    # a rank asks the others whether they know their shapes: here they say yes
    yes = patch("torch.distributed.recv", lambda tensor, **how: tensor.fill_(1))
    with yes if pretends else nullcontext(), timed(found, "step: Python, s"), Collectives() as all_:
        runner.step(rows, train.lm_loss)
        runner.clip_grad_norm(1.0)
    found["step: collectives"] = all_.seen


def save_and_load(found: Result, runner: parallel.Runner, folder: Path) -> None:
    """Save and load a checkpoint with all ranks, and time what DCP does of it on this one."""
    optimizer = train.make_optimizer(train.PretrainConfig(model=runner.model), runner)
    state = train.training_state(runner, optimizer)
    steps = {
        "save: a rank's plan, s": (parallel.Planner, "create_local_plan"),
        "save: rank 0's plan, s": (parallel.Planner, "create_global_plan"),
        "save: rank 0's end, s": (parallel.Writer, "finish"),
        "load: reading it, s": (dcp.FileSystemReader, "read_metadata"),
        "load: finding pieces, s": (parallel, "create_read_items_for_chunk_list"),
    }
    with ExitStack() as stack:
        for name, (owner, method) in steps.items():
            stack.enter_context(patch.object(owner, method, clocked(found, name, owner, method)))
        checkpoints = parallel.Checkpoints(folder, 1, False, runner.cfg)
        checkpoints.save(1, state, {})
        checkpoints.load(state)
    file = folder / "step_000001/part_0000/.metadata"
    items = dcp.FileSystemReader(file.parent).read_metadata().storage_data
    found |= {"load: .metadata, MB": file.stat().st_size / 1e6, "save: items on rank 0": len(items)}


def clocked(found: Result, name: str, owner: Any, method: str) -> Callable[..., Any]:
    """Return the method of that name, its time added to found[name]."""
    work = getattr(owner, method)

    def run(*args: Any, **kwargs: Any) -> Any:
        with timed(found, name):
            return work(*args, **kwargs)

    return run


def abstract_state(stages: list[parallel.Stage]) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds of these stages, on the meta device."""
    params = {}
    for stage in stages:
        params |= dict(stage.model.named_parameters())
    moments = {}
    for p in params.values():
        moments[p] = {"step": torch.zeros(()), "exp_avg": p.detach(), "exp_avg_sq": p.detach()}
    runner: Any = SimpleNamespace(params=lambda: params)
    optimizer: Any = SimpleNamespace(state=moments)
    return train.training_state(runner, optimizer)


def plan_of(state: dict[str, torch.Tensor], first: bool = False) -> Any:
    """Make this rank's save plan with DCP's planner."""
    planner = parallel.Planner(flatten_state_dict=False)
    planner.set_up_planner(state, None, first)
    return planner.create_local_plan()


def plans_of(found: Result, state: dict[str, torch.Tensor]) -> list[Any]:
    """Make the save plans of all ranks of this pipeline rank: the planner is told one place in the
    mesh after the other. Only this rank's own is timed, as equal shapes are computed once."""
    with timed(found, "save: a rank's plan, s"):
        plan_of(state)
    sizes = tuple(next(iter(state.values())).device_mesh.shape)
    plans = []
    for place in product(*map(range, sizes)):

        @cache
        def there(shape: Any, placements: Any, place: Any = place) -> Any:
            return _compute_local_shape_and_global_offset(shape, sizes, place, placements)

        with patch.object(
            planner_helpers,
            "compute_local_shape_and_global_offset",
            lambda shape, mesh, placements, there=there: there(shape, placements),
        ):
            plans.append(plan_of(state, not plans))
    return plans


def plan_a_save(found: Result, stages: list[parallel.Stage], world: int, folder: Path) -> None:
    """Time what rank 0 does of a save, and each rank of a load, with the plans of all ranks of one
    pipeline rank. Other ranks' objects arrive pickled, as they would from a process."""
    state = abstract_state(stages)
    sent = [pickle.dumps(plan) for plan in plans_of(found, state)]
    found["save: plans to rank 0, MB"] = sum(map(len, sent)) / 1e6
    planner = parallel.Planner(flatten_state_dict=False, enable_plan_caching=True)
    part = folder / "part_0000"
    part.mkdir()
    with timed(found, "save: rank 0's plan, s"):
        # our own bytes of a few lines above: unpickling them is a part of rank 0's work
        plans, metadata = planner.create_global_plan([pickle.loads(plan) for plan in sent])
        found["save: items on rank 0"] = sum(len(plan.items) for plan in plans)
        for plan in plans:
            pickle.dumps(plan)
    with timed(found, "save: its next plan, s"):
        planner.create_global_plan([dcp.SavePlan([], usable=False)] * len(sent))
    results = []
    for rank, plan in enumerate(plans):
        where = filesystem._StorageInfo(f"__{rank}_0.distcp", 1 << 30, 1 << 20)
        written = [filesystem.WriteResult(item.index, 1 << 20, where) for item in plan.items]
        results.append(pickle.dumps(written))
    del sent, plans
    with timed(found, "save: rank 0's end, s"):
        # our own bytes, again
        parallel.Writer(part).finish(metadata, [pickle.loads(result) for result in results])
    del metadata, results
    plan_a_load(found, state, folder)


def plan_a_load(found: Result, state: Any, folder: Path) -> None:
    """Time what each rank does of a load before it reads: the index of its own part, and the pieces
    of each tensor."""
    found["load: .metadata, MB"] = (folder / "part_0000/.metadata").stat().st_size / 1e6
    gc.collect()
    before = resident_mb()
    with timed(found, "load: reading it, s"):
        source = parallel.open_checkpoint(folder, {name: p.shape for name, p in state.items()})
    found["load: its memory, MB"] = resident_mb() - before
    with timed(found, "load: finding pieces, s"):
        for name, p in state.items():
            _, index, _ = source[name].args
            begins = [i.start for i in parallel.own_region(p)]
            sizes = [i.stop - i.start for i in parallel.own_region(p)]
            about = index.state_dict_metadata[name]
            chunk = parallel.ChunkStorageMetadata(begins, sizes)
            parallel.create_read_items_for_chunk_list(name, about, [chunk])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_drill(world: int, folder: str) -> Any:
    """Start the processes of a drill; returns the pipe to one of them. Of a job that pretends it is
    the first rank of the second pipeline rank, which is like all but the first and the last."""
    server = multiprocessing.get_context("forkserver")  # torch is imported once
    server.set_forkserver_preload(["parallel", "train", "align", "generate"])
    ranks = range(world) if world <= REAL else [world // LAYOUTS[world].pp]
    port, pipes = free_port(), []
    for rank in ranks:
        ours, theirs = server.Pipe()
        args = (theirs, rank, world, port, Path(folder) / str(world))
        server.Process(target=drill, args=args, daemon=True).start()
        theirs.close()
        pipes.append(ours)
    return pipes[0]


def scale(shape: str, o: argparse.Namespace) -> list[Result]:
    """Print how start-up, a step's Python, a save and a load grow with the ranks."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in LAYOUTS:
            (Path(folder) / str(world)).mkdir()
        pipes = {n: start_drill(n, folder) for n in LAYOUTS if n > REAL}  # one process each
        for world in LAYOUTS:
            pipe = pipes.get(world) or start_drill(world, folder)
            found[world] = pipe.recv()
            print(f"  {world:,} ranks: done", flush=True)
    print_scale(found)
    rows = []
    for world, figures in found.items():
        mesh, how = LAYOUTS[world], "processes" if world <= REAL else "imagined"
        axes = {"tp": mesh.tp, "pp": mesh.pp, "vp": mesh.vp, "dp": mesh.dp(world)}
        rows.append({"what": "scale", "ranks": world, "run": how, **axes, **figures})
    return rows


def exponent(some: dict[int, float], few: int, many: int) -> float:
    """Return x of ranks ** x, by which a figure grows between two numbers of ranks."""
    if not some[few] or not some[many]:
        return 0.0
    return math.log(some[many] / some[few]) / math.log(many / few)


def borne_until(some: dict[int, float], grows: list[float], most: float) -> str:
    """Say up to how many ranks a figure stays under `most`: of processes by their last two numbers,
    in a straight line; else by the faster of two growths. One that follows the layout alone, and
    hardly the ranks, is borne by any number or by none."""
    last = max(some)
    if last <= REAL:
        slope = (some[last] - some[last // 2]) / (last - last // 2)
        ranks = last + (most - some[last]) / slope if slope > 0 else math.inf
    elif max(grows) < 0.3:
        return "any" if some[last] <= most else "none"
    else:
        ranks = last * (most / some[last]) ** (1 / max(grows))
    return f"{ranks:,.0f}" if ranks < 1e6 else "> 1,000,000"


def brief(x: float) -> str:
    """Write a figure in six characters at most."""
    if x >= 1e5:
        return f"{x / 1e3:,.0f}K"
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}" if x >= 0.001 else "0"


def print_scale(found: dict[int, Result]) -> None:
    """Print a line for each figure: its values, its growth, what is bearable, and up to how many
    ranks it stays so."""

    def line(name: str, cells: Iterable[Any], rest: str = "") -> None:
        print(f"{name:26}" + "".join(f"{cell:>8}" for cell in cells) + rest)

    line("ranks", [f"{n:,}" for n in found], "    growth   bearable  up to ranks")
    line("run", ["real" if n <= REAL else "fake" for n in found])
    for axis in ("tp", "pp", "vp"):
        line(axis, [getattr(LAYOUTS[n], axis) for n in found])
    line("dp", [LAYOUTS[n].dp(n) for n in found])
    for name, most in BEARABLE.items():
        some = {n: figures[name] for n, figures in found.items() if name in figures}
        cells = [brief(some[n]) if n in some else "-" for n in found]
        pairs = [(64, 512), (512, 6144)] if max(some) > REAL else [(16, 32)]
        grows = [exponent(some, *pair) for pair in pairs]
        rest = f"{' '.join(f'{x:.1f}' for x in grows):>10}"
        if most is not None:
            rest += f"{brief(most):>11}{borne_until(some, grows, most):>13}"
        line(name, cells, rest)
    for note in (
        "real: processes with gloo and narrow layers; fake: one rank of the 340B, whose others",
        "only pretend, and whose step is of narrow layers. Seconds are of CPU time.",
        "A step has {step} micro-batches, a schedule {schedule}.".format(**N_MICRO),
        "A pipeline rank plans and writes a part of a checkpoint; rank 0 here is the first of one.",
        "Growth: exponents of the ranks, from 64 to 512 (dp alone) and from 512 to 6,144; or from",
        "16 to 32. On the mesh of the save a rank reads the .metadata of its own part alone.",
    ):
        print(note)


# ---- command line --------------------------------------------------------------------------------

CONTENDERS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (
        ours_train, forward_backward, ours_dpo, ours_generate, ours_online,
        their_train, their_dpo, their_generate, their_online,
    )
}  # fmt: skip
WORK: dict[str, Callable[[str, argparse.Namespace], list[Result]]] = {
    "tokenize": tokenize, "curate": curated, "generate": decode, "train": training, "where": where,
    "dpo": preference, "online": rounds_online, "growth": growth, "scale": scale, "slice": slices,
    "attention": attention,
}  # fmt: skip
ALL = {
    "cpu": "tokenize generate:40M generate:125M train:40M train:125M where:40M dpo:40M online:40M "
    "growth scale",
    "cuda": "slice:340b slice:15b attention:340b attention:15b train:125M train:1B where:1B "
    "generate:125M generate:1B dpo:125M",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=[*WORK, "all"])
    parser.add_argument("shape", nargs="?", default="40M", choices=list(SHAPES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64, help="tokens, of generate")
    parser.add_argument("--megabytes", type=float, default=12.0, help="least input of curate")
    parser.add_argument("--out", type=Path, help="PNG of growth")
    o = parser.parse_args()
    logging.disable(logging.WARNING)
    if o.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if o.device == "cpu" and torch.cuda.is_available():
        parser.error(
            "a GPU is visible, which the training path would take: hide it with "
            "CUDA_VISIBLE_DEVICES= or add --device cuda"
        )
    if o.device == "cpu" and o.what in ("slice", "attention") and o.shape not in ("nano", "40M"):
        parser.error(f"{o.what} {o.shape} needs --device cuda (nano tries the harness out)")
    about = machine(o.device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows, jobs = [], ALL[o.device] if o.what == "all" else f"{o.what}:{o.shape}"
    for job in jobs.split():
        what, _, shape = job.partition(":")
        try:
            rows += WORK[what](shape, o)
        except Exception as e:  # of a long run the rest is wanted all the same
            if o.what != "all":
                raise
            print(f"  {job} failed: {type(e).__name__}: {e}")
            rows.append({"what": job, "failed": str(e)})
    # no known peak, no MFU
    print(json.dumps({"machine": about, "rows": rows}).replace("NaN", "null"))


if __name__ == "__main__":
    main()
