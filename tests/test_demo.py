"""recipes/demo.py, tasks.py and iterate.py: the program marks rightly, all stages run in order, and
rounds go on where they were stopped."""

import dataclasses
import json
import random
import re
from pathlib import Path
from unittest import mock

import pytest

import data
from recipes import demo, iterate, tasks
from recipes.synthesize import SynthesizeConfig

# ---- the demo's tasks ----------------------------------------------------------------------------


def drawn(n, seed=0, **how):
    rng = random.Random(seed)
    return [tasks.draw_task(rng, call=i % 2 == 0, **how) for i in range(n)]


def test_a_tasks_answer_is_right_by_hand():
    results = {"sort": "0347", "first": "7", "last": "3", "largest": "7", "smallest": "0"}
    assert {name: tasks.Task(name, "7403").result for name in tasks.OPERATIONS} == results
    task = tasks.Task("sort", "209", ("mark", "words", "sure", "brackets"))
    assert task.answer == "Sure: (zero two nine)!"
    assert task.prompt == "Sort 209 upwards. End with ! In words. Begin with Sure: In brackets."
    assert tasks.Task("sort", "209", call=True).prompt == "sort(209)"


def test_the_best_answer_is_the_ideal_one_and_every_fault_costs():
    rng = random.Random(1)
    for task in drawn(400):
        ideal = task.labels(task.answer)
        assert task.right(task.answer) and all(task.met(task.answer))
        assert ideal == [4, 4, 4, 2 + len(task.instructions), 1]
        for text in (task.flawed(rng), task.flawed(rng), "", " \n", task.prompt, "\x00é 7" * 50):
            labels = task.labels(text)
            assert all(type(x) is int and 0 <= x <= 4 for x in labels) and len(labels) == 5
            assert task.reward(text) < task.reward(task.answer)


def test_marks_follow_what_is_wrong():
    task = tasks.Task("sort", "312", ("words", "mark"))
    graded = {
        "one two three!": (True, [True, True]),
        "one two three": (True, [True, False]),
        "123!": (True, [False, True]),
        "one three two!": (False, [True, True]),
        "Well, let me see. one two three!": (True, [True, True]),
        "3": (False, [False, False]),
    }
    for text, (right, met) in graded.items():
        assert (task.right(text), task.met(text)) == (right, met), text
    rewards = {text: task.reward(text) for text in graded}
    assert max(rewards, key=rewards.get) == "one two three!"
    assert min(rewards, key=rewards.get) == "3"
    assert task.labels("one three two!")[1] == 1 and task.labels("one two four!")[1] == 2


def test_no_held_out_task_is_trained_on():
    asked = [{(t.operation, t.digits) for t in drawn(3000, held_out=h)} for h in (False, True)]
    assert not asked[0] & asked[1] and len(asked[1]) > 1000
    rng = random.Random(0)
    for text in (tasks.draw_text(rng) for _ in range(1000)):
        calls = re.findall(r"(\w+)\((\d+)\)", text)
        assert not any(tasks.Task(*call).held_out for call in calls)


def test_the_demos_rows_are_what_the_stages_read(tmp_path, corpus):
    rng = random.Random(2)
    scored = []
    for task in drawn(20):
        texts = [task.answer, task.flawed(rng), task.flawed(rng)]
        scored += [tasks.scored_row(task, text) for text in texts]
    file = demo.write_rows(tmp_path / "rows.jsonl", scored)
    tokenizer = data.TokenData(corpus).tokenizer()
    for read in (data.sft_rows, data.reward_rows):
        assert len(read(file, tokenizer, 4096)[0]) == len(scored)


def test_the_demos_data_is_a_function_of_its_seed():
    assert drawn(50, seed=3) == drawn(50, seed=3) != drawn(50, seed=4)
    texts = [[tasks.draw_text(random.Random(s)) for _ in range(3)] for s in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_rows_are_made_once_and_not_at_all_where_they_are_there(tmp_path):
    made = []
    for _ in range(2):
        rows = ({"row": made.append(i)} for i in range(3))
        file = demo.write_rows(tmp_path / "folder" / "rows.jsonl", rows)
    assert made == [0, 1, 2] and len(file.read_text().splitlines()) == 3
    assert [*file.parent.iterdir()] == [file]


# ---- the tour and the rounds ---------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_runs_all_stages_and_writes_its_table(tmp_path):
    demo.demo(demo.DemoConfig(tmp_path / "demo", scale=0.01))
    lines = (tmp_path / "demo" / "table.md").read_text().splitlines()
    stages = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    models = ["base", "code_sft", "general_sft", "dpo", "rpo_1", "rpo_2", "rpo_3"]
    assert stages == ["stage", "---", *models]
    for name, init in (("code_sft", "base"), ("rpo_2", "rpo_1"), ("reward", "general_sft")):
        cfg = json.loads((tmp_path / "demo" / name / "config.json").read_text())
        assert cfg["init"].endswith(f"demo/{init}")


def leave_no_row(cfg):
    """In synthesize's place: every pair of answers is a tie."""
    cfg.out.mkdir(parents=True)
    for name in ("sft", "rpo"):
        (cfg.out / f"{name}.jsonl").touch()
    (cfg.out / "manifest.json").write_text('{"counts": {"preference: tie": 40}}')
    return cfg.out


@pytest.mark.parametrize("scale, advice", [(0.01, "; raise --scale"), (1.0, "")])
def test_a_judge_of_fewer_rows_need_tell_less_apart_and_no_pair_at_all_is_answered_with_advice(
    tmp_path, monkeypatch, scale, advice
):
    made = mock.Mock(side_effect=leave_no_row)
    monkeypatch.setattr(demo, "synthesize", made)
    with pytest.raises(ValueError, match=f"rpo.jsonl: no row: 40 x preference: tie{advice}$"):
        demo.preferences(demo.DemoConfig(tmp_path, scale=scale), "dpo", "general_sft")
    assert made.call_args.args[0].min_gap == pytest.approx(demo.OWN_ANSWERS.min_gap * scale)


def test_a_round_of_a_small_demo_without_a_row_names_the_scale(tmp_path, monkeypatch):
    toys = demo.DemoConfig(tmp_path / "demo", scale=0.01)
    loop = dataclasses.replace(iterate.weak_to_strong(), out=tmp_path / "loop", demo=toys)
    monkeypatch.setattr(iterate, "synthesize", leave_no_row)
    with pytest.raises(ValueError, match="sft.jsonl: no row: .*; raise --demo.scale$"):
        iterate.round_data(loop, 1, 0, lambda k, stage: (), Path("weak"), Path("base"))


def test_the_demo_under_torchrun_is_refused_before_it_makes_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        demo.demo(demo.DemoConfig(tmp_path / "demo"))
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("scale", [0, -1, 1.5, float("nan")])
def test_a_scale_that_is_no_share_is_refused(scale):
    with pytest.raises(ValueError, match="scale"):
        demo.DemoConfig(scale=scale)


def test_a_run_that_was_stopped_early_ends_the_tour(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    for steps in (2, 3):
        (tmp_path / "config.json").write_text(json.dumps({"steps": steps}))
        if steps == 2:
            assert demo.finished_run(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="stopped at step 2 of 3: start the same again"):
        demo.finished_run(tmp_path)


def test_without_the_demo_a_loop_asks_its_own_prompts_and_marks_nothing_unless_told():
    own = SynthesizeConfig(prompts=(Path("mine.jsonl"),))
    given = iterate.IterateConfig(bases=("base",), data=own)
    cfg, prompts, score = iterate.start(given)
    assert cfg == given and prompts(1, "sft") == own.prompts and score(Path("any")) == {}


def test_each_rounds_tasks_are_new(tmp_path):
    toys = demo.DemoConfig(tmp_path / "demo", scale=0.01)
    loop = dataclasses.replace(iterate.weak_to_strong(), out=tmp_path / "loop", demo=toys)
    texts = [iterate.demo_prompts(loop, k, "dpo")[0].read_text() for k in (1, 2)]
    assert texts[0] != texts[1] and all(text.count("\n") == 40 for text in texts)


def test_each_stage_of_each_round_draws_its_own_prompts_beside_those_that_are_given(
    tmp_path, monkeypatch
):
    own = SynthesizeConfig(prompts=(Path("mine.jsonl"),), counts={"turns": 2})
    loop = iterate.IterateConfig(bases=("base",), data=own, out=tmp_path)
    asked = []
    monkeypatch.setattr(iterate, "synthesize", lambda cfg: asked.append(cfg) or cfg.out)
    monkeypatch.setattr(iterate, "with_rows", lambda made, name, advice: made)
    prompts = iterate.start(loop)[1]
    for k in (1, 2):
        for i in range(3):
            iterate.round_data(loop, k, i, prompts, Path("generator"), Path("policy"))
    assert len({cfg.seed for cfg in asked}) == len({cfg.out for cfg in asked}) == 6
    assert {cfg.prompts for cfg in asked} == {own.prompts}
    assert [cfg.counts["preference_share"] for cfg in asked] == [0, 1, 1] * 2


def write_answers(cfg):
    """In synthesize's place, as what so small a model writes never ends: rows of the right kind."""
    cfg.out.mkdir(parents=True, exist_ok=True)
    prompts = [json.loads(line)["prompt"] for line in cfg.prompts[0].read_text().splitlines()]
    said = [{"messages": [{"role": "user", "content": text}]} for text in prompts]
    pair = dict(chosen="7", rejected="8", chosen_reward=1.0, rejected_reward=0.0)
    chats = [{"messages": [*r["messages"], {"role": "assistant", "content": "7"}]} for r in said]
    pairs = [row | pair for row in said]
    for name, rows in (("sft", chats), ("preference", pairs), ("rpo", pairs)):
        (cfg.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return cfg.out


@pytest.mark.slow
def test_rounds_go_on_where_they_were_stopped_and_leave_their_lineage(tmp_path):
    toys = demo.DemoConfig(tmp_path / "demo", scale=0.004)
    loop = dataclasses.replace(iterate.weak_to_strong(), out=tmp_path / "loop", demo=toys)
    with mock.patch.object(iterate, "synthesize", side_effect=write_answers) as made:
        iterate.iterate(dataclasses.replace(loop, rounds=1))
        first = (tmp_path / "loop" / "lineage.json").read_text()
        sealed = [*tmp_path.rglob("state.json"), *(tmp_path / "loop").rglob("metrics.jsonl")]
        before = {file: file.read_bytes() for file in sealed}
        iterate.iterate(loop)
    assert len(before) > 10 and all(file.read_bytes() == text for file, text in before.items())
    asked = [call.args[0] for call in made.call_args_list]
    assert asked[:3] == asked[3:6] and len(asked) == 9
    lineage = json.loads((tmp_path / "loop" / "lineage.json").read_text())
    assert lineage[:3] == json.loads(first) and len(lineage) == 6
    assert [Path(row["generator"]).name for row in lineage] == ["weak"] * 3 + ["rpo"] * 3
    assert lineage[3]["generator"] == lineage[2]["run"]
    assert [Path(row["init"]).name for row in lineage] == ["base", "sft", "dpo"] * 2
    for cfg, row in zip(asked[3:], lineage, strict=True):  # who wrote, who answered
        assert str(cfg.model) == row["generator"]
        assert cfg.answerers == (() if row["stage"] == "sft" else (row["init"],))
    table = (tmp_path / "loop" / "table.md").read_text().splitlines()
    assert len(table) == 2 + 1 + 6 and "true reward" in table[0]
    with pytest.raises(ValueError, match="bases"):
        iterate.IterateConfig()
    with pytest.raises(ValueError, match="rounds=0"):
        dataclasses.replace(loop, rounds=0)
