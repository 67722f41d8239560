"""Measurements, run by hand: each figure beside what a user would use instead, interleaved.

python tests/bench.py tokenize
python tests/bench.py generate [125M | 40M]
"""

import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import generate
import model
import parallel


def tokenize(vocab_size: int = 16_384, rounds: int = 5) -> None:
    """MB/s of `prepare`'s encoder and of tokenizers.encode_batch: one pattern, text, all cores."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [*data.embedded_code(), *data.embedded_english()]
    docs = [(text, len(text.encode())) for text in texts]
    megabytes = sum(n for _, n in docs) / 1e6
    ours = data.train_bpe(texts, vocab_size)
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = data.hf_pre_tokenizer()
    start = dict(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    specials = list(data.SPECIALS)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, **start)
    theirs.train_from_iterator(texts, trainer)
    workers, rates = data.PrepareConfig.workers, ([], [])
    for _ in range(rounds):
        begun = time.perf_counter()
        n_ours = sum(len(ids) for _, ids in data.encode_all(docs, ours.encode, workers))
        middle = time.perf_counter()
        n_theirs = sum(len(e.ids) for e in theirs.encode_batch(texts, add_special_tokens=False))
        rates[0].append(megabytes / (middle - begun))
        rates[1].append(megabytes / (time.perf_counter() - middle))
    ratios = [a / b for a, b in zip(*rates, strict=True)]
    for name, r in (("ours", rates[0]), ("tokenizers", rates[1]), ("ratio", ratios)):
        print(f"{name:12} median {statistics.median(r):6.1f}  min {min(r):6.1f}  max {max(r):6.1f}")
    print(f"{megabytes:.1f} MB, {workers} threads, {n_ours:,} and {n_theirs:,} tokens")


# the shapes of the decode and prefill figures
DECODE_SHAPES = {
    "40M": model.ModelConfig(512, 8, 8, 8, 64, 2048, vocab_size=16_384, seq_len=1024),
    "125M": model.SHAPES["small"],
}


def best(work, rounds: int) -> float:
    """Seconds of the fastest of some calls: a ceiling."""
    work()
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def ceilings(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """(bytes/s of reading, FLOP/s of a matrix product) that this machine reaches."""
    x = torch.randn(1 << 28, device=device).to(dtype)
    read = x.numel() * x.element_size() / best(lambda: x.sum().item(), 5)
    a = torch.randn(2048, 2048, device=device).to(dtype)
    return read, 2 * 2048**3 / best(lambda: (a @ a)[0, 0].item(), 5)


def drain(engine: generate.Engine, batch: int, prompt: int, new: int) -> tuple[float, float]:
    """Seconds of the prefill and of one decode step of the whole batch."""
    params = generate.SamplingParams(max_tokens=new, temperature=0, stop_ids=())
    rng = torch.Generator().manual_seed(0)
    engine.computed[:] = 0
    for _ in range(batch):
        ids = torch.randint(7, engine.cfg.vocab_size, (prompt,), generator=rng)
        engine.submit(ids.tolist(), params)
    begun = time.perf_counter()
    while engine.waiting or engine.decoding < engine.active:
        engine.step()
    prefill, steps = time.perf_counter() - begun, engine.steps
    while engine.busy:
        engine.step()
    return prefill, (time.perf_counter() - begun - prefill) / (engine.steps - steps)


def decode(shape: str = "125M", rounds: int = 3, prompt: int = 64, new: int = 25) -> None:
    """Prefill and decode, ours and transformers' generate, a batch of 1 and of 32, in turns."""
    from transformers import NemotronForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg, results = DECODE_SHAPES[shape], []
    with tempfile.TemporaryDirectory() as folder:
        parallel.save_hf(model.Nemotron(cfg), folder)
        weights = (
            sum(model.count_params(cfg)) - cfg.vocab_size * cfg.dim
        )  # a step reads all but embed
        matmul = weights * 2  # FLOPs of a token, attention left out
        for name in ("fp32", "bf16"):
            dtype = parallel.DTYPES[name]
            read, flops = ceilings(dtype, device)
            limits = f"reads {read / 1e9:.1f} GB/s, multiplies {flops / 1e12:.2f} TFLOP/s"
            print(f"{shape} {name}: this machine {limits}")
            ours = generate.Engine(parallel.load_hf(folder, dtype).to(device), slots=32)
            peer = NemotronForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
            for batch in (1, 32):
                results.append(compare(ours, peer, batch, rounds, prompt, new))
                row = results[-1] | {"shape": shape, "dtype": name, "batch": batch}
                results[-1] = row
                read_share = row["decode"] / batch * weights * dtype.itemsize / read
                compute_share = row["prefill"] * matmul / flops
                row |= {"share_of_bandwidth": read_share, "share_of_flops": compute_share}
                print(
                    f"  batch {batch:2}: decode {row['decode']:7.1f} tokens/s, transformers "
                    f"{row['their_decode']:7.1f}, ratio {row['decode_ratio']:.2f} "
                    f"({row['decode_ratio_min']:.2f} to {row['decode_ratio_max']:.2f}); reads "
                    f"{read_share:.0%} of the bandwidth; prefill {row['prefill']:7.0f} tokens/s, "
                    f"transformers {row['their_prefill']:7.0f}, ratio {row['prefill_ratio']:.2f}; "
                    f"{compute_share:.0%} of the products' rate"
                )
    print(json.dumps(results))


def compare(ours, peer, batch: int, rounds: int, prompt: int, new: int) -> dict[str, float]:
    """Median tokens/s of each, and of the ratios of the pairs."""
    ids = torch.randint(7, ours.cfg.vocab_size, (batch, prompt), device=peer.device)
    how = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    figures: dict[str, list[float]] = {
        "decode": [],
        "prefill": [],
        "their_decode": [],
        "their_prefill": [],
    }
    for _ in range(rounds + 1):  # the first warms up
        prefill, step = drain(ours, batch, prompt, new)
        begun = time.perf_counter()
        peer.generate(ids, max_new_tokens=1, **how)
        middle = time.perf_counter()
        peer.generate(ids, max_new_tokens=new, **how)
        their_step = (time.perf_counter() - middle - (middle - begun)) / (new - 1)
        figures["decode"].append(batch / step)
        figures["their_decode"].append(batch / their_step)
        figures["prefill"].append(batch * prompt / prefill)
        figures["their_prefill"].append(batch * prompt / (middle - begun))
    figures = {key: values[1:] for key, values in figures.items()}
    out = {key: statistics.median(values) for key, values in figures.items()}
    for kind in ("decode", "prefill"):
        ratios = [a / b for a, b in zip(figures[kind], figures[f"their_{kind}"], strict=True)]
        out |= {f"{kind}_ratio": statistics.median(ratios), f"{kind}_ratio_min": min(ratios)}
        out[f"{kind}_ratio_max"] = max(ratios)
    return out


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    {"tokenize": tokenize, "generate": decode}[sys.argv[1]](*sys.argv[2:])
