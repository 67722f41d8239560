"""Evaluate a model with lm-evaluation-harness, on the engine and in this process.

python -m recipes.evaluate runs/base --tasks mmlu hellaswag
python -m recipes.evaluate runs/nano --jsonl questions.jsonl
"""

import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from data import read_jsonl, write_whole
from generate import Engine, EngineConfig, SamplingParams, is_greedy, load_engine, run_command

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
    """Files with lines of `question`, `choices` and `answer` (the number of the right choice), or
    of `question` and `answer` (a text to write)."""
    shots: int | None = None
    """Examples before each question; default: the report's number, else the task's own."""
    limit: int | None = None  # Largest number of questions of each task; default: all
    out: Path | None = None  # JSON file for all results; default: none


def local_task(path: Path) -> dict[str, Any]:
    """Describe a file of questions as an lm-eval task: multiple choice if its first line has
    choices, else an answer in one line that must match exactly."""
    where, first = next(read_jsonl(path), (path, {}))
    if "question" not in first or "answer" not in first:
        raise ValueError(f"{where}: give each line a `question`, an `answer`, perhaps `choices`")
    task = {
        "task": path.stem, "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "dataset_path": "json", "test_split": "test", "fewshot_split": "train",
        "dataset_kwargs": {"data_files": {"train": str(path), "test": str(path)}},
    }  # fmt: skip
    if "choices" in first:
        task |= {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
        return task | {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    task |= {"output_type": "generate_until", "generation_kwargs": {"until": ["\n"]}}
    return task | {"metric_list": [{"metric": "exact_match"}]}


class EngineMethods:
    """Has the methods that lm-eval calls; `language_model` adds the fields and lm-eval's class."""

    engine: Engine
    eot_token_id: int

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        return self.engine.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        """Score (texts, context, continuation); a context that is too long loses its beginning."""
        room = self.engine.context
        pairs = [(context[len(text) - room :], text) for _, context, text in requests]
        return [(sum(done.logprobs), is_greedy(done)) for done in self.engine.score(pairs)]

    def loglikelihood_rolling(self, requests: list, **kwargs: Any) -> list[float]:
        """Score whole texts in windows of the engine's context."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            size = self.engine.context - 1
            windows = get_rolling_token_windows(ids, self.eot_token_id, size, context_len=1)
            scored = self.engine.score(map(make_disjoint_window, windows))
            totals.append(sum(sum(done.logprobs) for done in scored))
        return totals

    def generate_until(self, requests: list, **kwargs: Any) -> list[str]:
        """Write a text for each request, up to one of its stop texts."""
        sequences = []
        for request in requests:
            text, options = request.args
            until = options.get("until") or ()
            params = SamplingParams(
                max_tokens=options.get("max_gen_toks", 256),
                temperature=options.get("temperature", 1.0) if options.get("do_sample") else 0.0,
                top_p=options.get("top_p", 1.0),
                stop=(until,) if isinstance(until, str) else tuple(until),
            )
            room = max(1, self.engine.context - params.max_tokens)
            sequences += self.engine.submit(self.tok_encode(text)[-room:], params)
        return [done.text for done in self.engine.finished(sequences)]


def language_model(engine: Engine) -> Any:
    """Return the engine as a language model of lm-eval."""
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as e:
        raise ValueError("evaluation needs lm-eval: pip install -e '.[eval]'") from e
    fields = {"engine": engine, "eot_token_id": engine.tokenizer.special("</s>")}
    return type("EngineModel", (EngineMethods, TemplateLM), fields)()


def evaluate(cfg: EvaluateConfig) -> None:
    """Run the tasks one after the other; log a table for each and write all results to a file."""
    engine = load_engine(cfg)
    model = language_model(engine)
    import lm_eval

    names = cfg.tasks or (() if cfg.jsonl else tuple(BASE_TASKS))
    tasks = [(name, BASE_TASKS.get(name)) for name in names]
    tasks += [(local_task(path), 0) for path in cfg.jsonl]
    results = {}
    for task, shots in tasks:
        shots = shots if cfg.shots is None else cfg.shots
        options = {"num_fewshot": shots, "limit": cfg.limit, "bootstrap_iters": 0}
        found = lm_eval.simple_evaluate(model, tasks=[task], **options)
        log.info(lm_eval.utils.make_table(found))
        results |= found["results"]
    if cfg.out and engine.leads:
        write_whole(cfg.out, json.dumps(results, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_command("recipes.evaluate", partial(tyro.cli, EvaluateConfig), evaluate)
