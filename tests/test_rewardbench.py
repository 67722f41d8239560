"""RewardBench: both conventions of its averages, from the rows that `generate.py score` writes, and
RewardBench 2, against results worked out by hand."""

import ast
import dataclasses
import importlib.util
import json
import math
import random
import types
from pathlib import Path

import numpy as np
import pytest

import data
from model import SHAPES, Nemotron, init_weights
from parallel import save_hf
from recipes import evaluate, rewardbench
from recipes.rewardbench import Scored


def lines_of(wins):
    return {name: value.strip() for name, value in rewardbench.accuracies(wins).items()}


def test_averages_are_both_conventions():
    counts = {subset: n for sizes in rewardbench.SECTIONS.values() for subset, n in sizes.items()}
    assert sum(counts.values()) == 2985 - 447 + 984 and len(counts) == 23
    wins = {subset: [True] * 4 for subset in counts} | {"math-prm": [False] * 4}
    wins |= {"anthropic_helpful": [True, False]}
    lines = lines_of(wins)
    # math-prm weighs as much as the code subsets together: half of Reasoning
    assert lines["Reasoning"] == "50.0%" and lines["Chat"] == "100.0%"
    assert lines["mean of 4 sections"] == "87.5%"
    assert lines["with other sets at half"] == f"{(3.5 + 0.25) / 4.5:.1%}"
    assert lines["all rows"] == f"{(22 * 4 + 1) / 94:.1%} of 94"


def test_a_subset_of_no_section_is_averaged_alone():
    assert lines_of({"mine": [True, False, False]}) == {
        "mine": "33.3% of 3",
        "all rows": "33.3% of 3",
    }


def test_scored_rows_of_a_file_are_counted_and_a_tie_is_a_loss(tmp_path, monkeypatch):
    rewards = {"hep-go": [(1, 0), (0, 1)], "shp": [(1, 1), (2, 1)]}
    rows = []
    for subset, pairs in rewards.items():
        for chosen, rejected in pairs:
            scores = {"chosen_scores": {"reward": chosen}, "rejected_scores": {"reward": rejected}}
            rows.append({"subset": subset} | scores)
    file = tmp_path / "scores.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    monkeypatch.setattr(rewardbench.log, "info", said.append)
    rewardbench.rewardbench(rewardbench.RewardBenchConfig(str(file)))
    wins = {"hep-go": [True, False], "shp": [False, True]}
    for name, value in rewardbench.accuracies(wins).items():
        assert f"{name:28} {value}" in said[0].splitlines()


def test_rows_without_two_rewards_and_an_empty_file_are_named(tmp_path):
    file = tmp_path / "scores.jsonl"
    good = {"chosen_scores": {"reward": 1}, "rejected_scores": {"reward": 0}, "subset": None}
    bad = [{}, {"chosen_scores": 1}, {"chosen_scores": [1]}, {"rejected_scores": {"reward": "1"}}]
    for row in bad:
        file.write_text(f"{json.dumps(good)}\n{json.dumps(good | row if row else row)}\n")
        with pytest.raises(ValueError, match="scores.jsonl:2: no rewards of both answers"):
            rewardbench.rewardbench(rewardbench.RewardBenchConfig(str(file)))
    file.write_text(json.dumps(good | {"chosen_scores": {"reward": float("nan")}}))
    with pytest.raises(ValueError, match="scores.jsonl:1: a reward is no number"):
        rewardbench.rewardbench(rewardbench.RewardBenchConfig(str(file)))
    file.write_text("\n")
    with pytest.raises(ValueError, match="scores.jsonl: no rows"):
        rewardbench.rewardbench(rewardbench.RewardBenchConfig(str(file)))


def test_one_section_is_no_plural():
    assert "mean of 1 section" in lines_of({"hep-go": [True]})


# ---- the package `rewardbench` -------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    """The scoring functions and constants of the package, which pip install --no-deps brings: what
    it depends on does not go with ours, so that it cannot be imported."""
    spec = importlib.util.find_spec("rewardbench")
    folder = Path(spec.origin).parent if spec and "recipes" not in str(spec.origin) else None
    if not folder or not (folder / "constants.py").exists():
        pytest.skip("pip install --no-deps rewardbench")
    names = {"np": np, "math": math, "Dataset": types.SimpleNamespace(from_dict=dict)}
    exec((folder / "constants.py").read_text(), names)
    wanted = {"sample_stats", "process_single_model", "calculate_scores_per_section"}
    body = ast.parse((folder / "utils.py").read_text()).body
    kept = [node for node in body if getattr(node, "name", "") in wanted]
    exec(compile(ast.Module(kept, []), "utils.py", "exec"), names)
    return types.SimpleNamespace(**names)


def test_sections_and_their_means_are_the_packages(published):
    mapping = published.SUBSET_MAPPING
    for section, subsets in mapping.items():
        sizes = {subset: published.EXAMPLE_COUNTS[subset] for subset in subsets}
        assert rewardbench.SECTIONS[section.replace(" ", "-")] == sizes
    rng = random.Random(0)
    for _ in range(50):
        some = rng.sample([*published.EXAMPLE_COUNTS], rng.randrange(1, 24))
        right = {subset: rng.randrange(21) for subset in some}
        shares = {subset: n / 20 for subset, n in right.items()}
        got = lines_of({subset: [True] * n + [False] * (20 - n) for subset, n in right.items()})
        count = published.EXAMPLE_COUNTS
        for section, mean in published.calculate_scores_per_section(count, mapping, shares).items():
            if right.keys() & set(mapping[section]):
                assert float(got[section.replace(" ", "-")][:-1]) == pytest.approx(
                    100 * mean, abs=0.0501
                )


def test_ties_are_scored_as_the_package_scores_them(published):
    rng = np.random.default_rng(0)
    for trial in range(300):
        rows = []
        for i in range(rng.integers(1, 6)):
            for kind, n in (("ref", 1), ("tied", int(rng.integers(2, 5)))):
                scores = 2 * rng.normal(size=n + rng.integers(1, 4))
                if trial % 3 == 1:
                    scores = scores.round()
                if trial % 3 == 2:
                    scores[:n] = scores[0]
                rows.append(Scored("Ties", f"{kind}:{i}", [*scores[:n]], [*scores[n:]]))
        theirs = [
            {"id": row.id, "scores": row.chosen + row.rejected, "num_correct": len(row.chosen)}
            for row in rows
        ]
        want = published.process_single_model(theirs)[1]
        assert rewardbench.ties_score(rows) == pytest.approx(want, abs=1e-12)


# ---- RewardBench 2 -------------------------------------------------------------------------------


def test_the_best_of_four_shares_its_credit_among_those_that_tie():
    for rewards, credit in (
        ([3, 1, 2, 0], 1),
        ([3, 3, 2, 0], 1 / 2),
        ([3, 3, 3, 3], 1 / 4),
        ([2, 3, 1, 0], 0),
    ):
        assert rewardbench.best_of(Scored("Math", "1", rewards[:1], rewards[1:])) == credit


def test_ties_are_scored_by_accuracies_and_margins():
    rows = [
        Scored("Ties", "ref:1", [5.0], [2.0, 1.0]),  # margin 3
        Scored("Ties", "tied:1", [4.0, 3.5, 3.0], [1.0, 0.0]),  # margin 2, spread 1
        Scored("Ties", "ref:2", [1.0], [2.0]),  # wrong, margin -1
        Scored("Ties", "tied:2", [4.0, 1.0], [0.5]),  # margin 0.5, spread 3
        Scored("Ties", "ref:3", [9.0], [8.5]),  # margin 0.5
        Scored("Ties", "tied:3", [4.0, 3.0], [0.0]),  # margin 3, spread 1, but ref's is less
    ]
    margins = math.tanh(2 / 1 - 1) + math.tanh(-1 / 3 - 1) + math.tanh(0.5 / 1 - 1)
    want = 0.3 * 2 / 3 + 0.3 * 1 + 0.2 * 2 / 3 + 0.2 * 1 / 3 + 0.01 * margins / 3
    assert rewardbench.ties_score(rows) == pytest.approx(want, abs=1e-12)
    same = [Scored("Ties", "ref:1", [0.0], [0.0]), Scored("Ties", "tied:1", [0.0, 0.0], [0.0])]
    assert rewardbench.ties_score(same) == 0
    # answers with one reward: right in all, but without a part in the last term
    alike = [Scored("Ties", "ref:1", [2.0], [0.0]), Scored("Ties", "tied:1", [2.0, 2.0], [1.0])]
    assert rewardbench.ties_score(alike) == pytest.approx(1, abs=1e-12)
    both = rewardbench.ties_score([*rows, *(row._replace(id=f"{row.id}9") for row in alike)])
    margins /= 3  # the mean of those that have one
    assert both == pytest.approx(
        0.3 * 3 / 4 + 0.3 + 0.2 * 3 / 4 + 0.2 * 2 / 4 + 0.01 * margins, abs=1e-12
    )
    with pytest.raises(ValueError, match="no two rows with the ids ref:N and tied:N"):
        rewardbench.ties_score(rows[:1])


def test_the_second_average_is_that_of_subsets_however_large_they_are():
    rows = [Scored("Math", str(i), [1.0], [0.0] * 3) for i in range(9)]
    rows += [Scored("Focus", "x", [0.0], [1.0] * 3)]
    table = rewardbench.table_of(rows)
    assert table == {"Math": "100.0%", "Focus": "  0.0%", "mean of 2 subsets": " 50.0%"}


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A Hugging Face folder of a tiny reward model whose tokens are bytes."""
    path = tmp_path_factory.mktemp("reward")
    tiny = dataclasses.replace(
        SHAPES["nano"], dim=32, n_layers=2, head_dim=8, ffn_dim=64, vocab_size=264, seq_len=512,
        init_std=0.2, n_attributes=5,
    )  # fmt: skip
    model = Nemotron(tiny)
    init_weights(model, seed=3)
    save_hf(model, path)
    data.train_bpe([], 263).save(path)
    return path


def test_published_files_of_both_are_scored_from_parquet_and_from_lines(
    reward_model, tmp_path, monkeypatch
):
    import pyarrow
    import pyarrow.parquet

    more = {"models": ["a"] * 4, "additional_metadata": {"category": None}}
    second = [
        {"id": "1", "prompt": "Hi", "chosen": ["Hello."], "rejected": ["No.", "x", "y"],
         "num_correct": 1, "num_rejected": 3, "total_completions": 4, "subset": "Math", **more},
        {"id": "ref:7", "prompt": "A colour?", "chosen": ["red"], "rejected": ["one", "two"],
         "num_correct": 1, "num_rejected": 2, "total_completions": 3, "subset": "Ties", **more},
        {"id": "tied:7", "prompt": "Colours?", "chosen": ["red", "blue"], "rejected": ["one"],
         "num_correct": 2, "num_rejected": 1, "total_completions": 3, "subset": "Ties", **more},
    ]  # fmt: skip
    first = [{"prompt": "Hi", "chosen": "Hello.", "rejected": "No.", "subset": "hep-go", "id": 1,
              "chosen_model": "a", "rejected_model": "b"}]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(second), tmp_path / "two.parquet")
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in first))
    said = []
    monkeypatch.setattr(rewardbench.log, "info", said.append)
    files = (tmp_path / "two.parquet", tmp_path / "one.jsonl")
    out = tmp_path / "out.json"
    cfg = evaluate.EvaluateConfig(reward_model, rewardbench=files, out=out)
    evaluate.evaluate(cfg)
    found = json.loads(out.read_text())
    assert [[len(row["chosen"]), len(row["rejected"])] for row in found["two.parquet"]] == [
        [1, 3], [1, 2], [2, 1]
    ]  # fmt: skip
    rows = [Scored(**row) for row in found["two.parquet"]]
    assert "Math" in said[0] and f"{rewardbench.ties_score(rows[1:]):6.1%}" in said[0]
    assert rewardbench.REPORT in said[1] and "hep-go" in said[1]
    # the same rewards as those of `generate.py score`, whatever shares the batch
    engine = evaluate.load_engine(evaluate.EngineConfig(reward_model, slots=1))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    sequences = engine.submit(
        data.render_reward(chat, engine.tokenizer), evaluate.SamplingParams(max_tokens=0)
    )
    (done,) = engine.finished(sequences)
    for row in (found["two.parquet"][0], found["one.jsonl"][0]):
        assert row["chosen"][0] == pytest.approx(float(data.aggregate(done.scores)), abs=1e-5)
    for row, rule in (
        ({**first[0], "chosen": []}, "one.jsonl:1: chosen: a text or a list of texts"),
        ({"prompt": "Hi", "chosen": "x"}, "one.jsonl:1: no value in field 'rejected'"),
    ):
        (tmp_path / "one.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match=rule):
            evaluate.evaluate(dataclasses.replace(cfg, rewardbench=files[1:]))
    with pytest.raises(ValueError, match="rewardbench is for reward models"):
        evaluate.evaluate(dataclasses.replace(cfg, tasks=("mmlu",)))
