"""lm-evaluation-harness on the engine.

python -m recipes.evaluate runs/nano --jsonl questions.jsonl
"""

import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from generate import (
    Engine,
    EngineConfig,
    SamplingParams,
    is_greedy,
    json_lines,
    load_engine,
    run_command,
)

log = logging.getLogger("nemotron4")


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


if __name__ == "__main__":
    run_command("recipes.evaluate", partial(tyro.cli, EvaluateConfig), evaluate)
