"""recipes/online.py and rollouts.py: what is learnt from marked answers, the same on every mesh and
after a kill; the weights that answer are those that are trained."""

import dataclasses
import json
import math
import os
import random
import signal
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import align
import data
import generate
import parallel
from model import SHAPES, Nemotron, init_weights
from parallel import MeshConfig, save_hf
from recipes import demo, online, rollouts
from recipes.online import OnlineConfig, advantages, kl_estimate, leave_one_out, policy_loss

TINY = dataclasses.replace(
    SHAPES["nano"], dim=32, n_layers=4, head_dim=8, ffn_dim=64, vocab_size=284, seq_len=64,
    init_std=0.1,
)  # fmt: skip


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


# ---- what is learnt ------------------------------------------------------------------------------


def test_the_baseline_is_the_mean_of_the_others_that_came_to_an_end_or_an_answers_own_reward():
    rewards = torch.tensor([[1.0, 2, 6, 11], [1, 2, 6, 11], [1, 2, 6, 11]])
    finished = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0]]).bool()
    want = torch.tensor([[19 / 3, 6, 14 / 3, 3], [6, 3.5, 1, 3.5], [6, 6, 6, 6]])
    assert torch.allclose(leave_one_out(rewards, finished), want)


@pytest.mark.parametrize("algorithm", ["rloo", "grpo", "rs"])
def test_advantages_know_neither_a_prompts_level_nor_the_order_of_its_answers(algorithm):
    rewards, finished = drawn(7, 5), drawn(7, 5, seed=1) > -1
    none = torch.zeros_like(rewards)
    got = advantages(algorithm, rewards, finished, none)
    shifted = advantages(algorithm, rewards + drawn(7, 1, seed=2), finished, none)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(3))
    permuted = advantages(algorithm, rewards[:, order], finished[:, order], none)
    assert torch.allclose(shifted, got) and torch.allclose(permuted, got[:, order])
    equal = advantages(algorithm, torch.full((2, 5), 3.7).double(), torch.ones(2, 5), none[:2])
    if algorithm == "rs":
        assert (got.argmax(1) == rewards.argmax(1)).all() and (got.sum(1) == 1).all()
        assert equal.tolist() == [[1, 0, 0, 0, 0]] * 2
    else:
        assert equal.abs().max() < 1e-12
    if algorithm == "grpo":
        assert torch.allclose(advantages("grpo", 9 * rewards, finished, none), got, atol=1e-3)
    penalised = advantages(algorithm, rewards, finished, 0.25 + none)
    assert torch.allclose(got - penalised, none + (0.25 if algorithm == "rloo" else 0))


def test_the_clipped_ratio_has_reinforces_gradient_at_the_old_policy_and_none_beyond_the_clip():
    old, advantage = drawn(9), torch.tensor([2.0, -3, 0.5] * 3).double()
    log_probs = (old + torch.tensor([0] * 3 + [0.1] * 3 + [1.0] * 3)).requires_grad_()
    plain, clipped = (
        torch.autograd.grad(policy_loss(log_probs, old, advantage, clip).sum(), log_probs)[0]
        for clip in (None, 0.2)
    )
    assert torch.equal(plain, -advantage) and torch.allclose(clipped[:3], -advantage[:3])
    assert torch.allclose(clipped[3:6], -advantage[3:6] * math.exp(0.1))
    # far above the old policy: no further up, but all the way back
    assert clipped[6] == clipped[8] == 0
    assert clipped[7] == pytest.approx(3 * math.e)


def test_the_kl_estimate_is_zero_at_the_reference_and_positive_elsewhere():
    x = torch.linspace(-5, 5, 101).double().requires_grad_()
    loss = kl_estimate(x, torch.zeros_like(x))
    assert abs(loss[50]) < 1e-12 and (loss[:50] > 0).all() and (loss[51:] > 0).all()
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert torch.allclose(grad, 1 - (-x).exp())


@pytest.mark.slow
def test_trl_computes_the_same_grpo_loss_and_gradient():
    trainer = pytest.importorskip("trl").GRPOTrainer
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    old, reference = drawn(3, 4), drawn(3, 4, seed=1)
    advantage = drawn(3, seed=2)
    log_probs = (old + 0.3 * drawn(3, 4, seed=3)).requires_grad_()
    fake = mock.MagicMock(
        beta=0.04, loss_type="bnpo", importance_sampling_level="token", epsilon_low=0.2,
        epsilon_high=0.2, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1,
    )  # fmt: skip
    fake.accelerator.gather = lambda x: x
    fake.args = types.SimpleNamespace(delta=None, use_bias_correction_kl=False)
    entropies = torch.zeros(3, 4)
    fake._get_per_token_logps_and_entropies.return_value = (log_probs, entropies, None)
    ids = torch.zeros(3, 4, dtype=torch.long)
    inputs = dict(
        prompt_ids=ids, prompt_mask=mask, completion_ids=ids, completion_mask=mask,
        advantages=advantage, old_per_token_logps=old, ref_per_token_logps=reference,
    )  # fmt: skip
    want = trainer._compute_loss(fake, mock.MagicMock(), inputs)
    (grad,) = torch.autograd.grad(want, log_probs)

    objective = online.policy_objective(OnlineConfig(algorithm="grpo", kl=0.04, clip_ratio=0.2))
    batch = {
        "targets": torch.where(mask > 0, 5, data.IGNORE), "labels": advantage[:, None, None],
        "documents": torch.zeros(3, 4, dtype=torch.long), "old": old, "reference": reference,
    }  # fmt: skip
    total, sums = objective.measure(log_probs, batch)
    (ours,) = torch.autograd.grad(total / mask.sum(), log_probs)
    assert (total / mask.sum()).item() == pytest.approx(want.item(), rel=1e-6)
    assert torch.allclose(ours, grad, rtol=1e-6, atol=1e-12) and sums["trained_tokens"] == 8
    outside = ((log_probs - old).exp() - 1) * advantage.sign()[:, None] > 0.2
    assert sums["clipped"] == (outside & (mask > 0)).sum()


# ---- a run ---------------------------------------------------------------------------------------


def vowels(row, text):
    """A verifier: how many a answer has, and a little for the row's own number."""
    return text.count("a") + text.count("e") + row["number"] / 100


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face folder with a tokenizer, and prompts."""
    root = tmp_path_factory.mktemp("base")
    model = Nemotron(TINY)
    init_weights(model, 3)
    save_hf(model, root)
    data.train_bpe(["one two three four five six seven"] * 50, 284).save(root)
    rows = [{"prompt": f"say {i}", "number": i} for i in range(20)]
    for name, part in (("prompts", rows), ("held_out", rows[:2])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


def config(base, out, algorithm="grpo", axes=None, **changes):
    options = dict(
        algorithm=algorithm, init=f"hf:{base}", data=Path(base) / "prompts.jsonl", out=Path(out),
        seq_len=64, batch=16, samples=4, updates=2, steps=4, epochs=9.0, max_tokens=10, lr=3e-3,
        eps=1e-6, verifier="test_online:vowels", mesh=MeshConfig(dtype="fp32", **(axes or {})),
        save_every=2, eval_every=1000, kl=0.1,
    )  # fmt: skip
    return OnlineConfig(**options | changes)


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def run(base, out, *how, **changes):
    online.online("test", config(base, out, *how, **changes))
    return metrics(out)


TIMES = {"tokens_per_s", "memory_gib", "eval_seconds", "mfu"}


def same(a, b, tolerance=0.0):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x.keys() - TIMES:
            assert x[key] == pytest.approx(y[key], rel=tolerance, abs=tolerance), key


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run of two rounds, from its first step to its last."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(base, out, val=Path(base) / "held_out.jsonl")


def test_a_run_logs_its_rounds_and_draws_them_and_keeps_the_last_answers(base, whole):
    out, rows = whole
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for first, second in zip(rows[::2], rows[1::2], strict=True):  # of one round
        assert all(first[name] == second[name] for name in ("reward", "kl", "length"))
    assert rows[0]["kl"] == rows[0]["clipped"] == 0 and rows[2]["kl"] != 0 != rows[1]["clipped"]
    assert rows[0]["entropy"] == pytest.approx(math.log(284), rel=0.1)
    assert {"val_reward", "val_verified"} <= rows[0].keys() and rows[3]["val_reward"] >= 0
    assert (out / "online.png").read_bytes()[:4] == b"\x89PNG"
    (file,) = (out / "rollouts").iterdir()
    answers = rollouts.read_answers(out, 1)
    assert file.name == "round_000001.jsonl" and len(answers) == 32
    prompts = [json.loads(line) for line in (base / "prompts.jsonl").read_text().splitlines()]
    order = align.row_order(20, 0, 8, 8)
    for i, answer in enumerate(answers):
        assert answer.scores["reward"] == vowels(prompts[order[i // 4]], answer.text)
        assert len(answer.policy) == len(answer.ids) and answer.place == i // 4
        assert not any(answer.policy[: answer.n_prompt - 1]) and answer.policy[-1] == 0
    assert np.mean([a.scores["reward"] for a in answers]) == pytest.approx(rows[3]["reward"])


@pytest.mark.parametrize(
    "steps", [3, pytest.param(2, marks=pytest.mark.slow)]
)  # within a round, and between two
def test_a_run_that_was_stopped_goes_on_bit_by_bit_as_if_it_had_not_been(
    base, whole, tmp_path, steps
):
    how = dict(val=Path(base) / "held_out.jsonl")
    run(base, tmp_path / "run", steps=steps, **how)
    got, want = run(base, tmp_path / "run", **how), [dict(row) for row in whole[1]]
    for rows in (got, want):  # the last step of a start validates
        for row in rows:
            [row.pop(key) for key in list(row) if key.startswith("val_")]
            row.pop("eval_seconds", None)
    same(got, want)


def killed(base, out, where, after):
    """A run that is killed in the call number `after` of a function."""
    owner, name = {
        "rollout": (generate.Engine, "step"), "step": (torch.optim.AdamW, "step"),
        "save": (parallel.Checkpoints, "seal"),
    }[where]  # fmt: skip
    original, calls = getattr(owner, name), []

    def kill(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, kill):
        return run(base, out)


@pytest.mark.slow
@pytest.mark.parametrize("where, after", [("rollout", 15), ("step", 4), ("save", 1)])
def test_a_run_that_is_killed_goes_on_with_the_same_curve(base, on_ranks, tmp_path, where, after):
    want = on_ranks(1, run, str(base), str(tmp_path / "whole"))[0]
    with pytest.raises(AssertionError, match="died"):
        on_ranks(1, killed, str(base), str(tmp_path / "run"), where, after)
    assert not metrics(tmp_path / "run") or len(metrics(tmp_path / "run")) < 4
    same(on_ranks(1, run, str(base), str(tmp_path / "run"))[0], want)


def test_one_step_a_round_looks_at_its_answers_once_less_and_windows_are_cut_to_the_same_end(
    base, tmp_path
):
    how = dict(updates=1, steps=3, save_every=3, seq_len=200)
    looks = mock.Mock(side_effect=online.token_log_probs)
    with mock.patch.object(online, "token_log_probs", looks):
        got = run(base, tmp_path / "once", **how)
        once = looks.call_count
        with (
            mock.patch.object(OnlineConfig, "learns_at_once", False),
            mock.patch.object(online, "cut", lambda cfg, batches: batches),
            mock.patch.object(rollouts, "cut", lambda cfg, batches: batches),
        ):
            want = run(base, tmp_path / "twice", **how)
    assert (once, looks.call_count - once) == (3, 6)
    same(got, want, 1e-5)
    assert got[0]["kl"] == pytest.approx(0, abs=1e-5) and got[2]["kl"] > 1e-4
    assert got[0]["entropy"] > 1


def test_no_token_is_cut_and_no_more_than_needed_is_kept(base):
    cfg = config(base, "unused", seq_len=200)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(TINY, seq_len=200))
    for fullest, end in ((3, 64), (64, 64), (65, 128), (195, 200), (0, 64)):
        documents = np.full((2, 200), -1)
        documents[1, :fullest] = 0
        arrays = dict.fromkeys(("tokens", "targets", "positions"), np.arange(400).reshape(2, 200))
        batch = dict(documents=documents, rows=np.zeros((2, 1), int), count=3) | arrays
        (got,) = rollouts.cut(cfg, [batch])
        assert np.array_equal(got["tokens"], batch["tokens"][:, :end]) and got["count"] == 3
        assert (got["documents"] >= 0).sum() == fullest and got["rows"] is batch["rows"]
    staged = dataclasses.replace(cfg, mesh=MeshConfig(pp=2))
    assert rollouts.cut(staged, [batch])[0] is batch  # a pipeline's windows have one length


def one_round(base, out, algorithm, axes, changes):
    """Three steps on the answers of one round, which are the same on every mesh."""
    how = dict(updates=3, steps=3, save_every=3, beta=0.2, sft_weight=0.01, seq_len=96) | changes
    return run(base, out, algorithm, axes, **how)


MESHES = {
    "packed": (1, {}, {}),
    "dp2": (2, {}, {"micro_batch": 2}),
    "tp2": (2, {"tp": 2}, {}),
    "pp2 vp2": (2, {"pp": 2, "vp": 2}, {}),
    "dp2 tp2 pp2": (8, {"tp": 2, "pp": 2}, {}),
}
ALGORITHMS = ("rloo", "grpo", "rs", "dpo", "rpo")


CELLS = [("packed", algorithm) for algorithm in ALGORITHMS]
CELLS += [("dp2", "grpo"), ("dp2", "dpo"), ("tp2", "grpo"), ("pp2 vp2", "rpo")]
CELLS += [("pp2 vp2", "grpo"), ("dp2 tp2 pp2", "grpo")]


@pytest.mark.slow
@pytest.mark.parametrize("mesh, algorithm", CELLS)
def test_a_round_teaches_the_same_on_every_mesh_and_however_it_is_packed(
    base, on_ranks, tmp_path, mesh, algorithm
):
    n, axes, changes = MESHES[mesh]
    want = one_round(base, tmp_path / "alone", algorithm, {}, {"packed": False})
    if n == 1:
        got = one_round(base, tmp_path / "run", algorithm, axes, changes)
    else:
        args = (str(base), str(tmp_path / "run"), algorithm, axes, changes)
        got = on_ranks(n, one_round, *args)[0]
    same(got, want, 2e-5)


def answers_on_a_mesh(base, axes, lora):
    """The whole weights on a rank, and the answers that its job's engine gives."""
    cfg = MeshConfig(dtype="fp32", **axes)
    model = dataclasses.replace(TINY, lora_rank=lora)
    runner = parallel.Runner(model, cfg, parallel.init_mesh(cfg), 1, 0)
    runner.load_weights(base)
    if lora:
        torch.manual_seed(0)
        for name, p in runner.params().items():
            if "lora_" in name:
                torch.nn.init.constant_(p, 0.05)
    tokenizer = data.load_tokenizer(base)
    sampler = rollouts.Sampler(runner, tokenizer, 4, 7, vowels, None)
    prompts = rollouts.read_prompts(Path(base) / "prompts.jsonl", tokenizer, 64, False)
    answers = sampler.ask(prompts, "label", generate.SamplingParams(6, n=2))
    weights = rollouts.whole_weights(runner)
    return {name: p.numpy() for name, p in weights.items()}, [a.text for a in answers]


@pytest.mark.parametrize(
    "n, axes, lora",
    [
        pytest.param(2, {"pp": 2}, 0, marks=pytest.mark.slow),
        pytest.param(2, {"tp": 2}, 4, marks=pytest.mark.slow),
        pytest.param(4, {"pp": 2, "vp": 2}, 4, marks=pytest.mark.slow),
        pytest.param(8, {"pp": 2, "tp": 2}, 0, marks=pytest.mark.slow),
    ],
)
def test_every_process_answers_with_the_weights_that_are_trained_on_whatever_mesh(
    base, on_ranks, n, axes, lora
):
    want, texts = answers_on_a_mesh(base, {}, lora)
    for weights, said in on_ranks(n, answers_on_a_mesh, str(base), axes, lora):
        assert said == texts and weights.keys() == want.keys()
        assert all(np.array_equal(weights[name], want[name]) for name in want)
    start = dict(parallel.load_hf(base).named_parameters())
    for name, p in start.items():
        changed = not np.array_equal(p.detach().numpy(), want[name])
        assert changed == (bool(lora) and p.ndim == 2 and "blocks" in name), name


def test_answers_are_the_engines_own_and_their_log_probabilities_the_engines(base, whole):
    answers = rollouts.read_answers(whole[0], 1)[:6]
    engine = generate.load_engine(generate.EngineConfig(whole[0]))
    pairs = [(a.ids[: a.n_prompt], a.ids[a.n_prompt :]) for a in answers]
    theirs = generate.load_engine(generate.EngineConfig(base)).score(pairs)
    for answer, done in zip(answers, theirs, strict=True):
        got = answer.reference[answer.n_prompt - 1 : -1]
        assert got == pytest.approx(done.logprobs, abs=2e-5)
        text = engine.tokenizer.decode(answer.ids[answer.n_prompt :])
        assert answer.text == text.removesuffix("<extra_id_1>").strip()


@pytest.mark.slow
def test_a_reward_model_marks_by_its_attributes_and_the_verifier_looks_on(base, tmp_path):
    torch.manual_seed(0)
    model = Nemotron(dataclasses.replace(TINY, n_attributes=5, seq_len=256))
    init_weights(model, 5)
    save_hf(model, tmp_path / "judge")
    data.load_tokenizer(base).save(tmp_path / "judge")
    rows = run(base, tmp_path / "run", steps=2, reward=tmp_path / "judge")
    answers = rollouts.read_answers(tmp_path / "run", 0)
    engine = generate.load_engine(generate.EngineConfig(tmp_path / "judge"))
    prompts = [json.loads(line) for line in (base / "prompts.jsonl").read_text().splitlines()]
    order = align.row_order(20, 0, 0, 8)
    for answer in answers[::5]:
        row = prompts[order[answer.place]]
        chat = [dict(role="user", content=row["prompt"])]
        chat.append(dict(role="assistant", content=answer.text or "-"))
        ids = data.render_reward(chat, engine.tokenizer)
        (done,) = engine.generate([ids], generate.SamplingParams(max_tokens=0))
        assert answer.scores["verified"] == vowels(row, answer.text)
        want = generate.named_scores(done.scores)
        assert {k: answer.scores[k] for k in want} == pytest.approx(want, abs=1e-4)
    assert {"reward", "verified", *data.ATTRIBUTES} <= rows[0].keys()
    with pytest.raises(ValueError, match="is a language model: name a reward model"):
        run(base, tmp_path / "no", reward=base)


@pytest.mark.slow
def test_rewards_rise(base, tmp_path):
    how = dict(updates=1, steps=30, batch=64, lr=1e-2, kl=0.0, beta=0.1, save_every=30)
    rows = run(base, tmp_path / "run", **how)
    first, last = (np.mean([row["reward"] for row in part]) for part in (rows[:3], rows[-3:]))
    assert last > first + 0.5


# ---- prompts, verifiers and refusals -------------------------------------------------------------


def test_what_an_answer_obeys_of_its_rows_ground_truth_is_one_or_zero():
    short = {
        "kind": "length_constraints:number_words",
        "args": {"relation": "less than", "num_words": 3},
    }
    cases = [
        ({"answer": 42}, "The answer is 42.", 1.0), ({"answer": "42"}, "It comes to 41.", 0.0),
        ({"answer": 42}, "", 0.0), ({"tests": "assert f(2) == 4"}, "no code", 0.0),
        ({"tests": "assert f(2) == 4"}, "```python\ndef f(x):\n    return 2 * x\n```", 1.0),
        ({"instructions": [short]}, "two words", 1.0), ({"instructions": [short]}, "a b c", 0.0),
    ]  # fmt: skip
    for row, text, want in cases:
        assert rollouts.ground_truth(row, text) == want, (row, text)
    with pytest.raises(ValueError, match="instructions"):
        rollouts.ground_truth({"prompt": "x"}, "y")


def test_the_demos_verifier_is_its_program(tmp_path):
    cfg = demo.DemoConfig(tmp_path, scale=0.01)
    rows = [json.loads(x) for x in demo.write_tasks(cfg, "a", 40).read_text().splitlines()]
    tasks, rng = demo.draw_tasks(cfg, "a", 40, 0.25), random.Random(0)
    for row, task in zip(rows, tasks, strict=True):
        assert row["prompt"] == task.prompt
        for text in (task.answer, task.flawed(rng), ""):
            assert demo.mark(row, text) == task.reward(text)


def test_the_demo_brings_its_model_tasks_and_verifier_and_marks_before_and_after(
    tmp_path, monkeypatch
):
    toys = demo.DemoConfig(tmp_path / "demo", scale=0.01)
    cfg = dataclasses.replace(online.toys(), demo=toys, out=tmp_path / "run")
    monkeypatch.setattr(online, "tuned_start", lambda demo: demo.out / "general_sft")
    named = online.with_demo(cfg)
    assert named.init == str(tmp_path / "demo" / "general_sft")
    trained, held_out = (path.read_text().splitlines() for path in (named.data, named.val))
    assert len(trained) == len(held_out) == 40 and not {*trained} & {*held_out}
    row = json.loads(trained[0])
    best = rollouts.verifier_of(cfg.verifier)(row, demo.Task(**row["task"]).answer)
    assert best == demo.Task(**row["task"]).reward(demo.Task(**row["task"]).answer)
    monkeypatch.setattr(
        online, "marks", lambda demo, model, judge: {"true reward": len(model.name)}
    )
    (tmp_path / "run").mkdir()
    online.compare(named)
    table = (tmp_path / "run" / "table.md").read_text()
    assert "| before | 11 |" in table and "| after | 3 |" in table and "rloo" in table


@pytest.mark.parametrize(
    "change, words",
    [
        ({"batch": 6}, "batch=6, samples=4: batch must be a multiple"),
        ({"samples": 1}, "samples=1"),
        ({"save_every": 3}, "save_every=3, updates=2"), ({"updates": 0}, "updates=0"),
        ({"shorten": True}, "shorten"), ({"kl": -1.0}, "kl=-1"), ({"beta": 0.0}, "beta=0"),
        ({"clip_ratio": -0.1}, "clip_ratio"), ({"temperature": -1.0}, "temperature"),
        ({"verifier": "nowhere:f"}, "verifier=nowhere:f"),
        ({"verifier": "test_online:nothing"}, "name a function as MODULE:NAME"),
        ({"seq_len": 9}, "no prompt left, 20 were too long"), ({"init": ""}, "--init"),
    ],
)  # fmt: skip
def test_an_impossible_run_is_refused(base, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        run(base, tmp_path / "run", **change)


def level(row, text):
    return 1.0


def test_a_round_without_a_difference_ends_a_run_on_pairs_with_advice(base, tmp_path):
    with pytest.raises(ValueError, match="round 0: no pair: the answers to each prompt are alike"):
        run(base, tmp_path / "run", "dpo", verifier="test_online:level")


def test_a_bad_prompt_is_named_or_left_out(base, tmp_path):
    file, tokenizer = tmp_path / "prompts.jsonl", data.load_tokenizer(base)
    chat = [{"role": "user", "content": "a"}]
    rows = [{"prompt": "a"}, {"messages": chat}, {"prompt": chat}]
    rows.append({"messages": [*chat, {"role": "assistant", "content": "b"}]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="prompts.jsonl:4: the last message is not the user's"):
        rollouts.read_prompts(file, tokenizer, 64, skip_bad=False)
    prompts = rollouts.read_prompts(file, tokenizer, 64, skip_bad=True)
    assert len(prompts) == 3 and len({tuple(prompt.ids) for prompt in prompts}) == 1


def test_a_run_that_was_stopped_within_a_round_whose_answers_are_gone_says_so(tmp_path):
    with pytest.raises(ValueError, match="round_000003.jsonl is missing"):
        rollouts.read_answers(tmp_path, 3)
