"""Measurements, run by hand: each figure beside what a user would use instead, interleaved.

python tests/bench.py tokenize
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import data


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


if __name__ == "__main__":
    {"tokenize": tokenize}[sys.argv[1]]()
