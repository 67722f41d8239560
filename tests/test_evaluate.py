"""lm-evaluation-harness on the engine: its likelihoods and texts are the model's own."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

import data
from model import SHAPES, Nemotron, init_weights
from parallel import load_hf, save_hf
from recipes.evaluate import EvaluateConfig, evaluate, language_model, local_task

TINY = dataclasses.replace(
    SHAPES["nano"], dim=64, n_layers=4, head_dim=16, ffn_dim=128, vocab_size=512, seq_len=96,
    init_std=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    """A Hugging Face folder with a tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    model = Nemotron(TINY)
    init_weights(model, seed=3)
    save_hf(model, path)
    data.TokenData(corpus).tokenizer().save(path)
    return path


def log_probs(model, ids):
    """Oracle: of each token but the first, by one forward pass in float64."""
    with torch.no_grad():
        out = model.double()(torch.tensor([ids])).log_softmax(-1)[0]
    return [out[i, token].item() for i, token in enumerate(ids[1:])]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lm_eval_gets_the_engines_likelihoods_and_texts(folder, tmp_path):
    rng = random.Random(0)
    words = ["import", "return", "class", "The module", "values"]
    rows = [
        {
            "question": f"{rng.choice(words)} {i}:",
            "choices": rng.sample(words, 3),
            "answer": rng.randrange(3),
        }
        for i in range(12)
    ]
    choice = write_lines(tmp_path / "choice.jsonl", rows)
    texts = [{"question": row["question"], "answer": "x"} for row in rows]
    written = write_lines(tmp_path / "written.jsonl", texts)
    out = tmp_path / "results.json"
    evaluate(EvaluateConfig(folder, jsonl=(choice, written), out=out))
    results = json.loads(out.read_text())
    tokenizer, model, right = data.load_tokenizer(folder), load_hf(folder), 0
    for row in rows:
        scores = []
        for text in row["choices"]:
            ids = tokenizer.encode(f"{row['question']} {text}").tolist()
            n = len(tokenizer.encode(row["question"]))
            scores.append(sum(log_probs(model, ids)[n - 1 :]))
        right += int(np.argmax(scores)) == row["answer"]
    assert results["choice"]["acc,none"] == pytest.approx(right / 12)
    assert results["written"]["exact_match,none"] == 0


def test_a_text_longer_than_the_context_is_scored_once_a_token(folder):
    from lm_eval.api.instance import Instance

    from generate import EngineConfig, load_engine

    engine = load_engine(EngineConfig(folder, context=32))
    model = language_model(engine)
    text = "The module has a list of values. " * 8
    ids = [model.eot_token_id, *model.tok_encode(text)]
    assert len(ids) > 3 * 32
    (total,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    # windows of 31 new tokens, the last one filled up with what is before it
    oracle, want, done = load_hf(folder), 0.0, 0
    while done < len(ids) - 1:
        new = min(31, len(ids) - 1 - done)
        end = done + new + 1
        window = ids[max(0, end - 32) : end]
        want += sum(log_probs(oracle, window)[-new:])
        done += new
    assert total == pytest.approx(want, abs=1e-3)


def test_a_file_without_questions_is_refused_with_its_name(tmp_path):
    bad = write_lines(tmp_path / "bad.jsonl", [{"prompt": "x"}])
    with pytest.raises(ValueError, match="bad.jsonl:1: give each line a `question`"):
        local_task(bad)
    empty = write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="empty.jsonl: give each line a `question`"):
        local_task(empty)
