"""RewardBench: both conventions of its averages, from the rows that `generate.py score` writes."""

import json

import pytest

from recipes import rewardbench


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
