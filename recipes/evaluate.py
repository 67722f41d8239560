"""Evaluate a model with lm-evaluation-harness, or a reward model on RewardBench, on the engine and
in this process.

python -m recipes.evaluate runs/base --tasks mmlu hellaswag
python -m recipes.evaluate runs/nano --jsonl questions.jsonl
python -m recipes.evaluate runs/reward --rewardbench rewardbench2.parquet
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import tyro

from data import read_records, write_whole
from generate import Engine, EngineConfig, SamplingParams, is_greedy, load_engine, run_command
from recipes import rewardbench

log = logging.getLogger("nemotron4")

# The tasks of the report's Table 3 and their shots; BBH with a chain of thought, as its level (85)
# suggests. HumanEval runs code that the model wrote, for which lm-eval asks your consent.
BASE_TASKS = {
    "arc_challenge": 25, "winogrande": 5, "hellaswag": 10, "mmlu": 5, "bbh_cot_fewshot": 3,
    "humaneval": 0,
}  # fmt: skip


@dataclass(frozen=True)
class EvaluateConfig(EngineConfig):
    """Evaluate with lm-evaluation-harness (extra `eval`). Its tasks download their data; --jsonl
    takes your own, without a network."""

    tasks: tuple[str, ...] = ()
    """lm-eval's task names; default: the report's Table 3, each with its number of shots."""
    jsonl: tuple[Path, ...] = ()
    """JSON lines of `question` and `answer`: a text, or the number of one of `choices`."""
    rewardbench: tuple[Path, ...] = ()
    """Published files of RewardBench 1 or 2, JSON lines or parquet, for a reward model."""
    shots: int | None = None
    """Examples before each question; default: the report's number, else the task's own."""
    limit: int | None = None  # Largest number of questions of each task; default: all
    max_tokens: int | None = None  # Largest number of new tokens; default: the task's own
    out: Path | None = None  # JSON file for all results; default: none

    def __post_init__(self) -> None:
        for name, least in (("shots", 0), ("limit", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")


# ---- your own questions --------------------------------------------------------------------------


def read_question(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a line of questions; ValueError if they are no question."""
    question, answer, choices = map(row.get, ("question", "answer", "choices"))
    if not isinstance(question, str) or not question.strip() or answer is None:
        raise ValueError(f"{where}: give each line a `question`, an `answer`, perhaps `choices`")
    number = isinstance(answer, int | float) and not isinstance(answer, bool)
    said = answer if number or isinstance(answer, str) else f"a {type(answer).__name__}"
    if choices is None:
        if said is not answer:
            raise ValueError(f"{where}: the answer is {said}: give a text to write")
        return {"question": question, "answer": str(answer)}
    texts = choices if isinstance(choices, list) else [None]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{where}: `choices` are no list of texts")
    if not number or answer not in range(len(texts)):
        raise ValueError(f"{where}: answer {said!r} of {len(texts)} choices: count from 0")
    return {"question": question, "answer": int(answer), "choices": texts}


def local_task(path: Path, shots: int = 0) -> dict[str, Any]:
    """Describe a file of questions as an lm-eval task: multiple choice if its lines have choices,
    else an answer in one line that must match exactly."""
    rows = [read_question(where, row) for where, row in read_records(path)]
    if not rows:
        raise ValueError(f"{path}: give each line a `question`, an `answer`; there is no line")
    closed = sum("choices" in row for row in rows)
    if closed not in (0, len(rows)):
        raise ValueError(f"{path}: {closed} of {len(rows)} lines have `choices`: all or none")
    if shots >= len(rows):
        raise ValueError(f"{path}: {len(rows)} lines: too few for {shots} examples before each")

    def splits(**kwargs: Any) -> Any:
        import datasets

        return {"test": datasets.Dataset.from_list(rows)}

    # names of columns, not templates, which would read "7" and "[1]" as numbers and lists; and the
    # split of the test, so that a question is none of its own examples
    task = {
        "task": path.stem, "doc_to_text": "question", "doc_to_target": "answer",
        "custom_dataset": splits, "test_split": "test", "fewshot_split": "test",
    }  # fmt: skip
    if closed:
        task |= {"output_type": "multiple_choice", "doc_to_choice": "choices"}
        return task | {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    task |= {"output_type": "generate_until", "generation_kwargs": {"until": ["\n"]}}
    return task | {"metric_list": [{"metric": "exact_match"}]}


# ---- the engine as lm-eval's model ---------------------------------------------------------------


class EngineMethods:
    """Has the methods that lm-eval calls; `language_model` adds the fields and lm-eval's class.

    Tokens are counted and cut as lm-eval's own Hugging Face model does, but for what ends that: a
    continuation of no token of its own, and one that is longer than the context."""

    engine: Engine
    eot_token_id: int

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        return self.engine.tokenizer.encode(string).tolist()

    def windows(self, context: list[int], text: list[int]) -> list[tuple[list[int], list[int]]]:
        """Return the (context, continuation) pairs that score a text: a context that is too long
        loses its beginning, and a text that is longer than the engine's is cut into windows."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        size = self.engine.context  # and one more token, which is not read
        if len(text) <= size:
            return [(context[len(text) - size - 1 :], text)]
        return [*map(make_disjoint_window, get_rolling_token_windows(text, context[-1], size, 1))]

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        """Score (texts, context, continuation): log-probability, and whether each token is the
        likeliest."""
        work = []
        for (before, after), context, text in requests:
            if not text:  # a token spans context and continuation: spell the latter by itself
                text = self.tok_encode(before[len(before.rstrip()) :] + after)
            if before and not text:
                raise ValueError(f"nothing to score: an empty continuation of {before[-40:]!r}")
            work.append(self.windows(context or [self.eot_token_id], text))
        scored = iter(self.engine.score(chain.from_iterable(work)))
        results = []
        for pairs in work:
            done = [next(scored) for _ in pairs]
            total = sum(sum(window.logprobs) for window in done)
            results.append((total, all(map(is_greedy, done))))
        return results

    def loglikelihood_rolling(self, requests: list, **kwargs: Any) -> list[float]:
        """Score whole texts, each token once."""
        texts = [request.args[0] for request in requests]
        work = [(("", text), [self.eot_token_id], self.tok_encode(text)) for text in texts]
        return [total for total, _ in self._loglikelihood_tokens(work)]

    def generate_until(self, requests: list, **kwargs: Any) -> list[str]:
        """Write a text for each request, up to one of its stop texts; a prompt loses its beginning
        where the context does not hold it beside the new tokens."""
        sequences = []
        for request in requests:
            text, options = request.args
            params = sampling(options, min(256, self.engine.context // 2))
            room = self.engine.context - params.max_tokens
            if room < 1:
                given = f"{params.max_tokens} new tokens, a context of {self.engine.context}"
                raise ValueError(f"{given}: no room for a question, set --max-tokens lower")
            ids = self.tok_encode(text)[-room:]
            sequences += self.engine.submit(ids or [self.eot_token_id], params)
        return [done.text for done in self.engine.finished(sequences)]


def sampling(options: dict[str, Any], max_tokens: int) -> SamplingParams:
    """Read a task's generation_kwargs in lm-eval's spellings; the default is greedy."""
    spellings = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    lengths = [options[name] for name in spellings if options.get(name) is not None]
    until = options.get("until") or ()
    return SamplingParams(
        max_tokens=int([*lengths, max_tokens][0]),
        temperature=0.0 if options.get("do_sample") is False else options.get("temperature", 0.0),
        top_p=options.get("top_p", 1.0),
        stop=(until,) if isinstance(until, str) else tuple(until),
    )


def language_model(engine: Engine) -> Any:
    """Return the engine as a language model of lm-eval."""
    if engine.cfg.n_attributes:
        raise ValueError("a reward model has no likelihoods: give a language model")
    from lm_eval.api.model import TemplateLM

    fields = {"engine": engine, "eot_token_id": engine.tokenizer.special("</s>")}
    return type("EngineModel", (EngineMethods, TemplateLM), fields)()


# ---- the command ---------------------------------------------------------------------------------


def evaluate_rewards(cfg: EvaluateConfig) -> None:
    """Score the files of RewardBench one after the other; log a table for each."""
    if cfg.tasks or cfg.jsonl:
        raise ValueError("rewardbench is for reward models, tasks and jsonl for language models")
    engine = load_engine(cfg)
    if not engine.cfg.n_attributes:
        raise ValueError("a language model gives no rewards: give a reward model")
    results = {}
    for path in cfg.rewardbench:
        rows = list(rewardbench.score_rows(engine, str(path), cfg.limit))
        rewardbench.say(rewardbench.table_of(rows))
        results[path.name] = [row._asdict() for row in rows]
        if cfg.out and engine.leads:
            write_whole(cfg.out, json.dumps(results) + "\n")


def evaluate(cfg: EvaluateConfig) -> None:
    """Run the tasks one after the other; log a table for each and write all results to a file."""
    if cfg.rewardbench:
        return evaluate_rewards(cfg)
    try:
        import lm_eval.tasks
    except ImportError as e:
        raise ValueError("evaluation needs lm-eval: pip install -e '.[eval]'") from e
    tasks = [(local_task(path, cfg.shots or 0), 0) for path in cfg.jsonl]
    names = cfg.tasks or (() if cfg.jsonl else tuple(BASE_TASKS))
    # listing lm-eval's own tasks takes ten seconds
    manager = lm_eval.tasks.TaskManager(include_defaults=bool(names))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(f"{', '.join(map(repr, unknown))}: none of lm-eval's tasks")
    tasks = [*((name, BASE_TASKS.get(name)) for name in names), *tasks]
    twice = Counter([*names, *(path.stem for path in cfg.jsonl)]).most_common(1)[0]
    if twice[1] > 1:
        raise ValueError(f"{twice[1]} tasks have the name {twice[0]!r}: rename the file")
    engine = load_engine(cfg)
    model = language_model(engine)
    how = dict(limit=cfg.limit, bootstrap_iters=0, task_manager=manager)
    how["gen_kwargs"] = {"max_gen_toks": cfg.max_tokens} if cfg.max_tokens else None
    results = {}
    for task, shots in tasks:
        shots = shots if cfg.shots is None else cfg.shots
        found = lm_eval.simple_evaluate(model, tasks=[task], num_fewshot=shots, **how)
        log.info(lm_eval.utils.make_table(found))
        results |= found["results"]
        if cfg.out and engine.leads:
            write_whole(cfg.out, json.dumps(results, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    parse = partial(tyro.cli, EvaluateConfig, prog="python -m recipes.evaluate")
    run_command("recipes.evaluate", parse, evaluate)
