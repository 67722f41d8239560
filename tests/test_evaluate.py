"""lm-evaluation-harness on the engine: its likelihoods and texts are the model's own."""

import dataclasses
import functools
import json
import logging
import random
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from generate import EngineConfig, load_engine
from model import SHAPES, Nemotron, init_weights
from parallel import load_hf, save_hf
from recipes.evaluate import EvaluateConfig, evaluate, language_model, local_task, sampling

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


@pytest.fixture(scope="module", autouse=True)
def one_list_of_tasks():
    """lm-eval reads 14,000 files for each."""
    import lm_eval.tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.tasks, "TaskManager", functools.cache(lm_eval.tasks.TaskManager))
        yield


def log_probs(model, ids):
    """Oracle: of each token but the first, by one forward pass in float64."""
    with torch.no_grad():
        out = model.double()(torch.tensor([ids])).log_softmax(-1)[0]
    return [out[i, token].item() for i, token in enumerate(ids[1:])]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
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


# ---- the boundary of context and continuation, as lm-eval's own Hugging Face model has it --------


def requests_of(*arguments):
    """What lm-eval asks for each of the arguments."""
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def ours(folder):
    return language_model(load_engine(EngineConfig(folder)))


@pytest.fixture(scope="module")
def theirs(folder):
    """lm-eval's own model on the same exported folder."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # a line for each pair that is cut
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>", pad_token="<pad>"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # its cache of logits gives 3 of the 500 pairs numbers that depend on the other pairs
    return HFLM(model, tokenizer=tokenizer, batch_size=16, device="cpu", logits_cache=False)


def pieces_of(rng, n):
    """n random texts that continue another: cut within words, at blanks, before and behind."""
    words = "import return self value The_module _ of\n\n é 日 . ():".replace("_", " ").split(" ")
    for _ in range(n):
        text = " ".join(rng.choices(words, k=rng.choice((2, 4, 8, 30, 36, 40, 120))))
        cut = rng.choice((0, rng.randrange(len(text)), len(text) - rng.randrange(1, 4)))
        yield text[:cut], text[cut:]


def test_likelihoods_and_greedy_flags_are_those_of_lm_evals_hugging_face_model(ours, theirs):
    """Over 500 random pairs; one that its model ends on is scored as the continuation alone."""
    assert theirs.max_length == TINY.seq_len == ours.engine.context
    kinds, pairs = Counter(), []
    for context, continuation in pieces_of(random.Random(0), 900):
        if not continuation.strip() or len(pairs) == 500:
            continue
        ids, more = ([3], ours.tok_encode(continuation))
        if context.strip():
            ids, more = theirs._encode_pair(context, continuation)
        kinds["cut"] += len(ids) + len(more) > 97
        kinds["exactly full"] += len(ids) + len(more) == 97
        if context and not context.strip() or not 0 < len(more) <= 96:
            kinds["theirs ends"] += 1
        else:
            pairs.append((context, continuation))
    assert len(pairs) == 500 and kinds["cut"] > 50 and kinds["theirs ends"] > 20, kinds
    want = theirs.loglikelihood(requests_of(*pairs), disable_tqdm=True)
    got = ours.loglikelihood(requests_of(*pairs), disable_tqdm=True)
    assert [flag for _, flag in got] == [flag for _, flag in want]
    assert [total for total, _ in got] == pytest.approx([total for total, _ in want], abs=2e-3)


def test_a_continuation_within_a_token_of_the_context_is_scored_by_its_own_tokens(folder, ours):
    assert ours._encode_pair("retu", "rn")[1] == []  # "return" is one token
    ((total, greedy),) = ours.loglikelihood(requests_of(("retu", "rn")), disable_tqdm=True)
    context, rest = ours.tok_encode("retu"), ours.tok_encode("rn")
    want = sum(log_probs(load_hf(folder), context + rest)[-len(rest) :])
    assert total == pytest.approx(want, abs=1e-3) and total < -0.1 and not greedy
    with pytest.raises(ValueError, match="an empty continuation of 'value'"):
        ours.loglikelihood(requests_of(("value", "")), disable_tqdm=True)


def test_a_continuation_longer_than_the_context_is_scored_once_a_token(folder, ours, theirs):
    """In the windows of a whole text's likelihood; lm-eval's model ends on a longer one."""
    oracle = load_hf(folder)
    context = ours.tok_encode("import")
    for n in (95, 96, 97, 192, 193, 300):
        ids = ours.tok_encode("The module has a list of values. " * 60)[:n]
        text = ours.engine.tokenizer.decode(ids)
        assert ours.tok_encode(text) == ids
        ((total, _),) = ours._loglikelihood_tokens([(("import", text), context, ids)])
        want, done, whole = 0.0, 0, [context[-1], *ids]
        if n < 96:
            whole = [*context, *ids][-97:]
        while done < n:  # windows of 96 new tokens, the last one filled up with what is before it
            end = min(done + 96, n)
            last = end + len(whole) - n
            window = whole[max(0, last - 97) : last]
            want += sum(log_probs(oracle, window)[done - end :])
            done = end
        assert total == pytest.approx(want, abs=1e-3), n
        rolling = [model.loglikelihood_rolling(requests_of((text,))) for model in (ours, theirs)]
        assert rolling[0] == pytest.approx(rolling[1], abs=2e-3), n


def test_a_prompt_keeps_as_many_tokens_as_leave_room_for_the_new_ones(ours, monkeypatch):
    long = "The module has a list of values. " * 30
    asked = []
    monkeypatch.setattr(ours.engine, "submit", lambda *args: asked.append(args) or [])
    for options in ({"max_gen_toks": 90}, {"max_new_tokens": 90}, {}):
        ours.generate_until(requests_of((long, options)))
    assert [len(ids) for ids, _ in asked] == [6, 6, 48]
    assert all(ours.tok_encode(long)[-len(ids) :] == ids for ids, _ in asked)
    assert [params.max_tokens for _, params in asked] == [90, 90, 48]
    with pytest.raises(ValueError, match="96 new tokens, a context of 96: .* set --max-tokens"):
        ours.generate_until(requests_of((long, {"max_gen_toks": 96})))


def test_a_task_is_sampled_as_lm_eval_reads_its_options():
    from lm_eval.models.utils import normalize_gen_kwargs

    for given in ({}, {"do_sample": True}, {"do_sample": False}):
        for heat in ({}, {"temperature": 0.7}, {"temperature": 0.0}):
            want = normalize_gen_kwargs(given | heat).get("temperature", 0.0)
            assert sampling(given | heat, 9).temperature == want


# ---- your own questions --------------------------------------------------------------------------

LINE = {"question": "Which?", "choices": ["one", "two"], "answer": 1}
BAD_LINES = [
    ({"prompt": "x"}, "bad.jsonl:2: give each line a `question`"),
    (LINE | {"question": None}, "bad.jsonl:2: give each line a `question`"),
    (LINE | {"question": 7}, "bad.jsonl:2: give each line a `question`"),
    (LINE | {"answer": 2}, "bad.jsonl:2: answer 2 of 2 choices: count from 0"),
    (LINE | {"answer": -1}, "bad.jsonl:2: answer -1"),
    (LINE | {"answer": "1"}, "bad.jsonl:2: answer '1'"),
    (LINE | {"answer": True}, "bad.jsonl:2: answer 'a bool'"),
    (LINE | {"answer": [1]}, "bad.jsonl:2: answer 'a list'"),
    (LINE | {"choices": "one"}, "bad.jsonl:2: `choices` are no list of texts"),
    (LINE | {"choices": [1, 2]}, "bad.jsonl:2: `choices` are no list of texts"),
    (LINE | {"choices": ["one", " "]}, "bad.jsonl:2: `choices` are no list of texts"),
    (LINE | {"choices": None}, "1 of 2 lines have `choices`: all or none"),
    ({"question": "Why?", "answer": {}}, "bad.jsonl:2: the answer is a dict"),
]


@pytest.mark.parametrize("row, message", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_line_that_is_no_question_is_named_with_its_rule(row, message, tmp_path):
    with pytest.raises(ValueError) as error:
        local_task(write_lines(tmp_path / "bad.jsonl", [LINE, row]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_line_that_is_nested_too_deep_is_named(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"question": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(ValueError, match=r"deep.jsonl:1: .*(?<!\n)\Z"):
        local_task(path)


def scores(methods, tasks, **options):
    """lm-eval's results for a model that has these methods."""
    import lm_eval.tasks
    from lm_eval.api.model import LM

    model = type("Model", (methods, LM), {"loglikelihood_rolling": None})()
    options |= dict(bootstrap_iters=0, task_manager=lm_eval.tasks.TaskManager())
    found = lm_eval.simple_evaluate(model, tasks=tasks, **options)
    return found["results"]


@pytest.mark.slow
def test_questions_that_look_like_numbers_and_lists_stay_texts_and_are_no_examples_of_theirs(
    tmp_path,
):
    choice, text = [], []
    for i in range(4):
        row = {"question": str(i), "choices": ["[1]", "7"], "answer": i % 2, "note": i or "none"}
        choice.append(row)
        text.append({"question": str(i), "answer": f"[{i}]", "choices": None})
    files = [write_lines(tmp_path / "choice.jsonl", choice)]
    files.append(write_lines(tmp_path / "text.jsonl", text))
    asked = []

    class Recorder:
        def loglikelihood(self, requests):
            asked.extend(request.args for request in requests)
            return [(-1.0 - (request.args[1] == " 7"), False) for request in requests]

        def generate_until(self, requests):
            asked.extend(request.args for request in requests)
            return [f"[{request.doc['question']}]" for request in requests]

    found = scores(Recorder, [local_task(file) for file in files], num_fewshot=3)
    assert found["choice"]["acc,none"] == 0.5 and found["text"]["exact_match,none"] == 1
    assert len(asked) == 12
    for context, _ in asked:
        *examples, question = context.split("\n\n")
        assert sorted([question, *(example[0] for example in examples)]) == [*"0123"]


def test_what_cannot_be_evaluated_is_said_in_a_line_before_the_model_is_loaded(tmp_path):
    for name, value in (("limit", 0), ("limit", -3), ("shots", -1), ("max_tokens", 0)):
        with pytest.raises(ValueError, match=f"{name}={value}: must be at least"):
            EvaluateConfig(tmp_path, **{name: value})
    file = write_lines(tmp_path / "arc_easy.jsonl", [LINE])
    wrong = [
        (dict(tasks=("arc_easy", "nosuchtask")), r"'nosuchtask': none of lm-eval's"),
        (dict(tasks=("arc_easy",), jsonl=(file,)), "2 tasks have the name 'arc_easy'"),
        (dict(jsonl=(file,), shots=1), "arc_easy.jsonl: 1 lines: too few for 1 examples"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            evaluate(EvaluateConfig(tmp_path / "no model", **options))


def test_a_reward_model_is_not_asked_for_likelihoods():
    engine = types.SimpleNamespace(cfg=dataclasses.replace(TINY, n_attributes=5))
    with pytest.raises(ValueError, match="a reward model has no likelihoods"):
        language_model(engine)


def test_a_file_without_questions_is_refused_with_its_name(tmp_path):
    bad = write_lines(tmp_path / "bad.jsonl", [{"prompt": "x"}])
    with pytest.raises(ValueError, match="bad.jsonl:1: give each line a `question`"):
        local_task(bad)
    empty = write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="empty.jsonl: give each line a `question`"):
        local_task(empty)


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[eval\]'"):
        evaluate(EvaluateConfig(Path("no model is read")))
