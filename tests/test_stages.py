"""The stages of align.py: the same numbers on every mesh, with every micro-batch, packed or not;
the reference is data; what is wrong is refused before a step."""

import dataclasses
import json
import logging
import math
import random
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import NemotronForCausalLM

import align
import data
import generate
import parallel
import train
from model import SHAPES, Nemotron, init_weights
from parallel import MeshConfig, save_hf

TINY = dataclasses.replace(
    SHAPES["nano"], dim=32, n_layers=4, head_dim=8, ffn_dim=64, vocab_size=512, seq_len=256,
    init_std=0.1,
)  # fmt: skip
WORDS = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "four", "five", "six"]


def said(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, n)))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory, corpus):
    """A Hugging Face folder with a tokenizer, and rows for every stage."""
    root, rng = tmp_path_factory.mktemp("base"), random.Random(0)
    model = Nemotron(TINY)
    init_weights(model, 3)
    save_hf(model, root)
    data.TokenData(corpus).tokenizer().save(root)
    user = lambda: {"role": "user", "content": said(rng, 6)}  # noqa: E731
    answer = lambda: {"role": "assistant", "content": said(rng, 8)}  # noqa: E731
    write(root / "sft.jsonl", [{"messages": [user(), answer()]} for _ in range(24)])
    label = lambda: [rng.choice([0, 1, 2, 3, 4, -100]) for _ in range(4)] + [1]  # noqa: E731
    rows = [{"messages": [user(), answer()], "label": label()} for _ in range(24)]
    write(root / "reward.jsonl", rows)
    rows = [
        {
            "messages": [user()], "chosen": said(rng, 6) + " x", "rejected": said(rng, 6),
            "chosen_reward": rng.uniform(1, 4), "rejected_reward": rng.uniform(0, 3),
        }
        for _ in range(24)
    ]  # fmt: skip
    write(root / "pairs.jsonl", rows)
    ranked = [
        {
            "prompt": said(rng, 6), "responses": [said(rng, 6) + f" {k}" for k in range(2 + i % 2)],
            "rewards": [rng.uniform(0, 4) for _ in range(2 + i % 2)],
        }
        for i in range(18)
    ]  # fmt: skip
    write(root / "ranked.jsonl", [*ranked[:9], *rows[:6], *ranked[9:]])
    return root


STAGES = {
    "sft": (align.SftConfig, "sft.jsonl", {}),
    "reward": (align.RewardConfig, "reward.jsonl", {}),
    # lr: at 1e-3, weights that differ by one rounding end 4e-5 apart in val_loss on one process; so
    # 2e-6 (the other stages do at 1e-3), and a tolerance of 1e-5 tells a mesh's fault from rounding
    "bradley_terry": (
        align.RewardConfig,
        "pairs.jsonl",
        {"loss": "scaled", "seq_len": 384, "lr": 5e-4},
    ),
    "dpo": (align.PreferenceConfig, "pairs.jsonl", {"beta": 0.1, "sft_weight": 0.01}),
    "lora": (align.SftConfig, "sft.jsonl", {"lora_rank": 4, "lora_targets": "wq wo up down"}),
    # pairs, and rows of two or three answers
    "rpo": (
        align.PreferenceConfig,
        "ranked.jsonl",
        {"loss": "rpo_bwd", "beta": 0.1, "eta": 2.0, "sft_weight": 0.01, "seq_len": 384},
    ),
}


def stage(base, name, out, axes=None, **changes):
    kind, file, options = STAGES[name]
    options = dict(
        init=f"hf:{base}", data=base / file, val=base / file, seq_len=256, batch=8, lr=1e-3,
        eps=1e-6, warmup=8, out=Path(out), mesh=MeshConfig(dtype="fp32", **(axes or {})),
        eval_every=2,
    ) | options  # fmt: skip
    if "pp" in (axes or {}):
        changes.pop("micro", None)
    return kind(**{**options, **changes})


def run_stage(base, name, out, axes, changes):
    cfg = stage(Path(base), name, out, axes, **changes)
    align.align(name, cfg)
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


NOT_NUMBERS = {"tokens_per_s", "mfu", "memory_gib", "eval_seconds"}


def same(a, b, tolerance=1e-5):
    assert len(a) == len(b) == 3
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x.keys() - NOT_NUMBERS:
            if x[key] is None:
                assert y[key] is None, key
            else:
                assert x[key] == pytest.approx(y[key], rel=tolerance, abs=tolerance), key


@pytest.fixture(scope="session")
def alone(base, on_ranks, tmp_path_factory):
    """Each stage on one process, a window at a time, unpacked."""
    out = tmp_path_factory.mktemp("alone")
    return {
        name: on_ranks(1, run_stage, str(base), name, str(out / name), {}, {"packed": False})[0]
        for name in STAGES
    }


MESHES = {
    "packed": (1, {}, {}),
    "packed, micro 2": (1, {}, {"micro_batch": 2}),
    "micro 4": (1, {}, {"micro_batch": 4, "packed": False}),
    "dp2": (2, {}, {"micro_batch": 2}),
    "tp2": (2, {"tp": 2}, {}),
    "pp2 vp2": (2, {"pp": 2, "vp": 2}, {}),
    "dp2 tp2 pp2": (8, {"tp": 2, "pp": 2}, {"packed": False}),
}


def slow_or_not(mesh, name):
    """Each stage packed and each mesh of up to two processes with DPO are quick enough."""
    quick = mesh == "packed" or (name == "dpo" and MESHES[mesh][0] <= 2)
    return pytest.param(mesh, name, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize("mesh, name", [slow_or_not(m, name) for m in MESHES for name in STAGES])
def test_a_stage_is_the_same_on_every_mesh_and_however_it_is_packed(
    base, alone, on_ranks, tmp_path, name, mesh
):
    n, axes, changes = MESHES[mesh]
    got = on_ranks(n, run_stage, str(base), name, str(tmp_path / "run"), axes, changes)[0]
    same(got, alone[name])


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_entropy_and_top1_are_those_of_all_trained_tokens(base, tmp_path, name):
    cfg = stage(base, name, tmp_path / "run", batch=24, steps=1)
    align.align(name, cfg)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    cfg = align.with_model(cfg)
    model = parallel.load_hf(base)
    entropies, right = [], []
    for example in align.read_rows_of(cfg, cfg.data, data.load_tokenizer(base)):
        for ids, trained in zip(example.ids, example.trained, strict=True):
            logits = model(torch.tensor(ids)[None].long())[0].double()[:-1][trained[1:]]
            entropies += torch.distributions.Categorical(logits=logits).entropy().tolist()
            right += (logits.argmax(-1).numpy() == ids[1:][trained[1:]]).tolist()
    assert row["trained_tokens"] == len(right)
    assert row["entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
    assert row["top1"] == pytest.approx(np.mean(right)) and row["top1"] < 1


def test_a_row_of_ranked_answers_is_a_pair_of_the_best_and_the_worst_or_for_rpo_all_of_them(
    base, tmp_path
):
    pairs = [json.loads(line) for line in (base / "pairs.jsonl").read_text().splitlines()[:8]]
    ranked = []
    for i, row in enumerate(pairs):
        answers = [(row["chosen"], 3.5), (row["rejected"], i / 4), ("in between", 2.0)]
        row |= {"chosen_reward": 3.5, "rejected_reward": i / 4}
        random.Random(i).shuffle(answers)
        texts, rewards = zip(*answers, strict=True)
        prompt = row["messages"][0]["content"]
        ranked.append({"prompt": prompt, "responses": texts, "rewards": rewards})
    files = [write(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((pairs, ranked))]
    for loss, n in (("dpo", 2), ("rpo_sq", 2), ("rpo_bwd", 3)):
        cfg = align.with_model(stage(base, "rpo", "unused", loss=loss, seq_len=384, eta=1.0))
        want, got = (align.read_rows_of(cfg, file, data.load_tokenizer(base)) for file in files)
        assert {len(row.ids) for row in got} == {n}
        for a, b in zip(want, got, strict=True):
            assert all(map(np.array_equal, a.ids, b.ids)) and (a.values == b.values[:2]).all()
        assert n == 2 or {row.values[2] for row in got} == {2.0}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rewards": [1.0]}, "2 responses, 1 rewards: two or more, and as many"),
        ({"rewards": [1.0, None]}, r"rewards\[1\] is None, not a finite number"),
        ({"rewards": None}, "no list in field 'rewards'"),
        ({"responses": ["a"], "rewards": [1]}, "1 responses, 1 rewards: two or more"),
        ({"responses": ["a", ""]}, "empty response"), ({"prompt": None}, "messages"),
    ],
)  # fmt: skip
def test_ranked_answers_without_a_reward_each_are_refused_by_their_line(
    base, tmp_path, change, words
):
    row = {"prompt": "one", "responses": ["two", "three"], "rewards": [1.0, 2]}
    file = write(tmp_path / "rows.jsonl", [row, row | change])
    cfg = align.with_model(stage(base, "rpo", "unused"))
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: .*{words}"):
        align.read_rows_of(cfg, file, data.load_tokenizer(base))


def test_each_row_is_seen_once_an_epoch_and_its_tokens_are_what_is_counted(base, tmp_path):
    seen = []
    original = align.RowSet.batches

    def batches(self, cfg, runner, numbers):
        seen.append(list(numbers))
        return original(self, cfg, runner, numbers)

    cfg = stage(base, "sft", tmp_path / "run", val=None, batch=7, epochs=2.0)
    with mock.patch.object(align.RowSet, "batches", batches):
        align.align("sft", cfg)
    assert sorted(sum(seen, [])) == sorted([*range(24)] * 2) and len(seen) == 7
    rows = align.read_rows_of(align.with_model(cfg), cfg.data, align.tokenizer_of(cfg))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tokens"] == 2 * sum(row.length for row in rows)


def test_windows_without_a_row_are_counted_and_many_are_warned_of(base, tmp_path, caplog):
    with caplog.at_level("INFO", "nemotron4"):
        align.align("sft", stage(base, "sft", tmp_path / "a", val=None, steps=1, micro_batch=8))
    (said,) = [r for r in caplog.records if "hold rows" in r.message]
    held = re.match(r"a step has 8 windows, of which (\d) hold rows: raise --batch", said.message)
    assert 0 < int(held[1]) < 4 and said.levelname == "WARNING"
    caplog.clear()
    align.align("sft", stage(base, "sft", tmp_path / "b", val=None, steps=1))
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert not [message for message in warnings if "hold rows" in message]


@pytest.mark.parametrize(
    "dp, axes, computed",
    [
        (8, {"pp": 12, "vp": 8}, 32),  # four for each process: fewer than there are stages
        (64, {"pp": 12, "vp": 8}, 64),
        (1, {"pp": 12, "vp": 8}, 28),
        (1, {"pp": 4, "vp": 2}, 28),
        (1, {"pp": 10, "vp": 2}, 28),
        (8, {"pp": 12}, 96),  # plain 1F1B needs one for each stage
        (8, {}, 32),
    ],
)
def test_a_mesh_computes_no_more_windows_than_its_schedule_needs(dp, axes, computed):
    cfg = align.SftConfig(data=Path("x"), init="x", micro_batch=1, mesh=MeshConfig(**axes))
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, seq_len=64))
    assert align.count_windows(cfg, dp, 28) == computed


def test_a_stage_without_weights_to_start_from_is_refused_before_a_model_is_built(base):
    with pytest.raises(ValueError, match="--init RUN or --init hf:FOLDER"):
        align.align("sft", stage(base, "sft", "unused", init="", tokenizer=str(base)))


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"weights": 1, "dtype": "fp32"}'])
def test_a_broken_file_of_references_is_named(text, tmp_path):
    (tmp_path / "reference.json").write_text(text)
    with pytest.raises(OSError, match="reference.json is damaged"):
        align.read_reference(tmp_path / "reference.json", "1", "fp32")


def test_lora_trains_adapters_alone_and_is_merged_wherever_its_run_is_read(base, tmp_path):
    out = align.align("lora", stage(base, "lora", tmp_path / "lora", lora_alpha=64.0))
    cfg = parallel.read_config(out)
    runner = parallel.Runner(cfg, MeshConfig(dtype="fp32"), mesh(), 1, 0)
    parallel.Checkpoints(out / "checkpoints", 2, False).load(
        {f"model.{name}": p for name, p in runner.params().items()}
    )
    start = dict(parallel.load_hf(base).named_parameters())
    for name, p in runner.params().items():
        if name in start:
            assert torch.equal(p.full_tensor(), start[name]), name
        else:
            assert "lora_" in name and p.full_tensor().abs().max() > 0
    ids = [5, 9, 17, 33, 100, 7, 300]
    batch = {"tokens": np.array([ids[:-1]]), "targets": np.array([ids[1:]]), "count": 6}
    want = -runner.eval([batch], lambda log_probs, _: log_probs.sum()).item() * 6
    engine = generate.load_engine(generate.EngineConfig(out))
    assert sum(engine.score([(ids[:1], ids[1:])])[0].logprobs) == pytest.approx(-want, rel=1e-5)
    with mock.patch.object(parallel, "shut_down"):
        parallel.export(parallel.ExportConfig(out, tmp_path / "hf", "fp32"))
    theirs = NemotronForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        loss = theirs(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert loss * 6 == pytest.approx(want, rel=1e-5)
    # the next stage starts from the merged weights, here with adapters of its own
    again = stage(base, "sft", tmp_path / "next", init=str(out), steps=1, lora_rank=2)
    align.align("sft", again)
    first = json.loads((tmp_path / "next" / "metrics.jsonl").read_text().splitlines()[0])
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert first["val_loss"] < last["val_loss"] + 0.05
    with pytest.raises(ValueError, match="export"):
        save_hf(Nemotron(cfg), tmp_path / "no")


def mesh():
    return parallel.init_mesh(MeshConfig(dtype="fp32"))


def test_a_stage_that_was_stopped_goes_on_as_if_it_had_not_been(base, alone, tmp_path):
    for steps in (2, 3):
        align.align("rpo", stage(base, "rpo", tmp_path / "run", steps=steps, packed=False))
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for got, want in zip(rows, alone["rpo"], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-6)


def test_reference_log_probs_are_computed_once_and_kept_beside_the_rows(base, tmp_path, caplog):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text((base / "pairs.jsonl").read_text())
    how = dict(data=rows, val=None, steps=1)
    with caplog.at_level("INFO", "nemotron4"):
        align.align("dpo", stage(base, "dpo", tmp_path / "a", **how))
        align.align("rpo", stage(base, "rpo", tmp_path / "b", beta=0.3, lr=1e-5, **how))
    said = [message for message in caplog.messages if "to compute" in message]
    assert "0 known, 24 to compute" in said[0] and "24 known, 0 to compute" in said[1]
    (file,) = tmp_path.glob("*.reference-*.json")
    found = json.loads(file.read_text())
    tokenizer, model = data.load_tokenizer(base), parallel.load_hf(base).double()
    row = data.preference_rows(rows, tokenizer, 256)[0][3]
    for ids, trained, got in zip(row.ids, row.trained, found["log_probs"][row.key], strict=True):
        with torch.no_grad():
            log_probs = model(torch.from_numpy(ids[None].astype(np.int64)))[0].log_softmax(-1)
        want = sum(log_probs[t - 1, ids[t]].item() for t in range(1, len(ids)) if trained[t])
        assert got == pytest.approx(want, abs=1e-4)
    # another model's log-probabilities are refused, and so are wrong ones
    found["weights"] = "0" * 16
    other = write_json(tmp_path / "other.json", found)
    with pytest.raises(ValueError, match="other.json is of the weights 0000000000000000"):
        align.align("dpo", stage(base, "dpo", tmp_path / "c", reference=other, **how))
    found = json.loads(file.read_text())
    found["log_probs"] = {key: [c + 1.0, r] for key, (c, r) in found["log_probs"].items()}
    write_json(file, found)
    with pytest.raises(ValueError, match="before the first step policy and reference differ"):
        align.align("dpo", stage(base, "dpo", tmp_path / "d", **how))


def write_json(path, value):
    path.write_text(json.dumps(value))
    return path


def test_the_self_test_says_what_the_first_loss_must_be(base, tmp_path, caplog):
    with caplog.at_level("INFO", "nemotron4"):
        align.align("dpo", stage(base, "dpo", tmp_path / "dpo", steps=1))
        align.align("rpo", stage(base, "rpo", tmp_path / "rpo", steps=1, data=base / "pairs.jsonl"))
    dpo, rpo = (m for m in caplog.messages if m.startswith("self-test"))
    assert f"loss {np.log(2):.6f}" in dpo
    rows = [json.loads(line) for line in (base / "pairs.jsonl").read_text().splitlines()]
    order = align.row_order(24, 0, 0, 8)
    p = [
        1 / (1 + np.exp(-2 * (rows[i]["chosen_reward"] - rows[i]["rejected_reward"])))
        for i in order
    ]
    want = np.mean([np.log(2) + x * np.log(x) + (1 - x) * np.log(1 - x) for x in p])
    assert float(re.search(r"loss ([\d.]+)", rpo)[1]) == pytest.approx(want, abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("weights_differ", [True, False])
def test_the_weights_fingerprint_is_that_of_the_weights_on_any_mesh(base, on_ranks, weights_differ):
    want = on_ranks(1, fingerprint, str(base), {}, False)
    for n, axes in ((2, {"tp": 2}), (2, {}), (4, {"tp": 2, "pp": 2})):
        got = set(on_ranks(n, fingerprint, str(base), axes, weights_differ))
        assert len(got) == 1 and (got == set(want)) != weights_differ


def fingerprint(folder, axes, changed):
    cfg = MeshConfig(dtype="fp32", **axes)
    runner = parallel.Runner(TINY, cfg, parallel.init_mesh(cfg), 1, 0)
    runner.load_weights(folder)
    if changed:
        for name, p in runner.params().items():
            if name == "blocks.3.mlp.down.weight":
                local, index = parallel.local_part(p)
                with torch.no_grad():
                    local[(index[0] == 5).nonzero()[:, 0], : len(index[1])] *= 1.001
    return align.fingerprint(runner)


def test_a_reward_model_starts_from_a_language_model_and_is_scored_by_the_engine(base, tmp_path):
    how = dict(steps=2, pairs=base / "pairs.jsonl", lr=1e-2)
    out = align.align("reward", stage(base, "reward", tmp_path / "rm", seq_len=320, **how))
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    engine, right = generate.load_engine(generate.EngineConfig(out)), 0
    rows = [json.loads(line) for line in (base / "pairs.jsonl").read_text().splitlines()]
    kept = {row.where for row in data.preference_rows(
        base / "pairs.jsonl", engine.tokenizer, 320, judged=True)[0]}  # fmt: skip
    for number, row in enumerate(rows, 1):
        if f"{base / 'pairs.jsonl'}:{number}" in kept:
            chosen, rejected = score_pair(engine, row)
            right += chosen > rejected
    assert last["pairs_accuracy"] == pytest.approx(right / len(kept))
    assert {f"mse/{name}" for name in data.ATTRIBUTES} <= last.keys()
    assert {"val_loss", "val_mse/helpfulness"} <= last.keys()


def score_pair(engine, row):
    out = []
    for side in ("chosen", "rejected"):
        chat = [*row["messages"], {"role": "assistant", "content": row[side]}]
        done = engine.generate(
            [data.render_reward(chat, engine.tokenizer)], generate.SamplingParams(max_tokens=0)
        )
        out.append(generate.named_scores(done[0].scores)["reward"])
    return out


def test_a_rate_and_a_number_of_steps_given_on_the_command_line_are_those_of_the_run(
    base, tmp_path
):
    data_, init = ("--data", str(base / "sft.jsonl")), ("--init", f"hf:{base}")
    options = ["sft", *data_, *init, "--lr", "1e-3", "--seq-len", "256", "--batch", "8"]
    options += ["--epochs", "2", "--mesh.dtype", "fp32"]
    for steps, want in ((), 6), (("--steps", "2"), 2), (("--steps", "99"), 6):
        out = tmp_path / str(steps[-1:])
        chosen = [*options, *steps, "--out", str(out)]
        align.align(*train.choose_config(chosen, align.PRESETS, ""))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [row["lr"] for row in rows] == [1e-3] * want  # the rate is constant
        assert json.loads((out / "config.json").read_text())["steps"] == want
    falling = train.choose_config([*options, "--min-lr", "1e-4"], align.PRESETS, "")[1]
    rates = [dataclasses.replace(falling, steps=10).schedule().lr(step) for step in range(10)]
    assert rates[0] == 1e-3 and rates == sorted(rates, reverse=True) and rates[-1] < 2e-4


def test_the_presets_are_the_reports_stages():
    for preset in align.PRESETS.values():
        cfg = dataclasses.replace(preset(), steps=10, warmup=0)
        assert {cfg.schedule().lr(step) for step in range(10)} == {cfg.lr}, "constant"
    code, general = align.code_sft(), align.general_sft()
    assert math.ceil(800_000 * code.epochs / code.batch) == 6250 and code.lr == 3e-7
    assert (
        math.ceil(200_000 * general.epochs / general.batch) == 4688 and 1e-7 <= general.lr <= 5e-7
    )
    assert math.ceil(20_324 * align.reward().epochs / align.reward().batch) == 318
    dpo, rpo = align.dpo(), align.rpo_2()
    assert int(160_000 / dpo.batch) == 625 and 3e-8 <= dpo.lr <= 3e-7
    assert 3e-4 <= dpo.beta <= 3e-3 and 1e-5 <= dpo.sft_weight <= 1e-3
    assert (rpo.loss, rpo.lr, rpo.eta, rpo.sft_weight) == ("rpo_bwd", 3e-7, 1.0, 1e-5)
    assert 1e-3 <= rpo.beta <= 1 and rpo.init == "runs/rpo_1"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"label_smoothing": 0.1}, "belongs to dpo"), ({"beta": 0.0}, "beta=0.0"),
        ({"loss": "dpo", "eta": 2.0}, "belongs to the RPO"), ({"epochs": 0.0}, "epochs"),
        ({"seq_len": 8}, "no row left"), ({"tokenizer": "nowhere"}, "nowhere"),
        ({"init": "hf:nowhere"}, "no config.json"), ({"micro_batch": 0}, "micro_batch"),
        ({"val": Path("nowhere.jsonl")}, "nowhere.jsonl"),
        ({"model": dataclasses.replace(align.AlignConfig.model, seq_len=512)}, "--seq-len"),
        ({"model": dataclasses.replace(align.AlignConfig.model, dim=64)}, "model.dim=64 would not"),
    ],
)  # fmt: skip
def test_an_impossible_stage_is_refused(base, tmp_path, change, words):
    with pytest.raises((ValueError, OSError), match=words):
        align.align("rpo", stage(base, "rpo", tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_a_token_that_the_model_has_not_is_refused_before_it_is_built(base, tmp_path):
    tokenizer = data.train_bpe(["some other words, of which more are tokens"] * 9, 290)
    small = dataclasses.replace(TINY, vocab_size=64)
    cfg = stage(base, "sft", tmp_path / "run", init="", model=small, tokenizer=str(tmp_path))
    tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match=r"sft.jsonl has token \d+, the model 64 tokens"):
        align.align("sft", cfg)
    assert not (tmp_path / "run").exists()


def heard_by_pytest_alone(monkeypatch):
    """Let the log go to pytest's handler, once, whatever other tests have left of handlers."""
    monkeypatch.setattr(logging.getLogger("nemotron4"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("nemotron4"), "propagate", True)


def test_weights_of_another_tokenizer_are_warned_of(base, tmp_path, caplog, monkeypatch):
    heard_by_pytest_alone(monkeypatch)
    other = data.train_bpe([path.read_text()[:9000] for path in Path(base).glob("*.jsonl")], 290)
    other.save(tmp_path)
    for tokenizer, words in ((str(tmp_path), "another tokenizer"), ("", "")):
        caplog.clear()
        out = tmp_path / f"run{len(words)}"
        align.align("sft", stage(base, "sft", out, tokenizer=tokenizer, steps=1, warmup=0))
        warned = [r.message for r in caplog.records if r.levelname == "WARNING"]
        assert [word for word in warned if "another tokenizer" in word] == warned
        assert bool(warned) == bool(words)


def test_a_stage_says_its_margins_when_it_is_ready_and_what_comes_next(
    base, tmp_path, caplog, monkeypatch
):
    heard_by_pytest_alone(monkeypatch)
    caplog.set_level("INFO")
    align.align("dpo", stage(base, "dpo", tmp_path / "run", log_every=2, eval_every=100, warmup=24))
    said = [r.message for r in caplog.records]
    assert any("warm-up is as long as the run" in line for line in said)
    steps = [line.split("/")[0] for line in said if "loss" in line and line.startswith("step")]
    assert steps == ["step      1", "step      2", "step      3"]  # the first and last validate
    assert any("accuracy" in line and "beta_margin" in line for line in said)
    assert "eta --" in next(line for line in said if "step      1/3" in line)
    assert said[-1].startswith("finished") and "generate.py sample" in said[-1]


def test_rpo_needs_rewards_and_says_which_line_has_none(base, tmp_path):
    rows = [json.loads(line) for line in (base / "pairs.jsonl").read_text().splitlines()]
    del rows[4]["chosen_reward"]
    path = write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(ValueError, match=r"pairs.jsonl:5.*chosen_reward"):
        align.align("rpo", stage(base, "rpo", tmp_path / "run", data=path))


def test_trl_computes_the_same_dpo_loss_of_the_same_rows_and_models(base, tmp_path):
    trl = pytest.importorskip("trl")
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    other = Nemotron(TINY)
    init_weights(other, 9)
    save_hf(other, tmp_path / "policy")
    policy, reference = (
        NemotronForCausalLM.from_pretrained(path) for path in (tmp_path / "policy", base)
    )
    words = Tokenizer(models.WordLevel({"a": 0, "<e>": 1}, unk_token="a"))
    trainer = trl.DPOTrainer(
        model=policy, ref_model=reference,
        args=trl.DPOConfig(str(tmp_path), beta=0.1, use_cpu=True, bf16=False, report_to=[]),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "a", "rejected": "a"}]),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token="<e>", pad_token="a"
        ),
    )  # fmt: skip
    rows, _ = data.preference_rows(base / "pairs.jsonl", data.load_tokenizer(base), 256)
    rows = rows[:6]
    longest = max(len(ids) for row in rows for ids in row.ids)
    inputs = {
        key: torch.zeros(12, longest, dtype=torch.long)
        for key in ("input_ids", "attention_mask", "completion_mask")
    }
    for side in (0, 1):
        for i, row in enumerate(rows):
            n, at = len(row.ids[side]), side * 6 + i
            inputs["input_ids"][at, :n] = torch.from_numpy(row.ids[side].astype(np.int64))
            inputs["attention_mask"][at, :n] = 1
            inputs["completion_mask"][at, :n] = torch.from_numpy(row.trained[side].astype(np.int64))
    with torch.no_grad():
        want = trainer.compute_loss(trainer.model, inputs).item()
    batch = {k: torch.from_numpy(v) for k, v in data.pack(rows, 256).items()}
    sums = []
    for model in (other, parallel.load_hf(base)):
        with torch.no_grad():
            log_probs = model(
                batch["tokens"], batch["positions"], batch["documents"], targets=batch["targets"]
            )
        sums.append(align.response_sums(log_probs, batch))
    log_ratio = sums[0] - sums[1]
    a = 0.1 * (log_ratio[:, 0] - log_ratio[:, 1])
    assert align.dpo_loss(a).mean().item() == pytest.approx(want, rel=1e-5)
