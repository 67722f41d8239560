"""align.py: the losses and metrics against alignment_vectors.json, their identities, and what must
not change them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_data import random_rows
from torch.distributed.device_mesh import init_device_mesh

import align
import data
from align import (
    attribute_sums,
    bradley_terry_loss,
    dpo_loss,
    ipo_loss,
    last_scores,
    means,
    pair_sums,
    response_sums,
    reward_loss,
    rpo_k_loss,
    rpo_loss,
    sft_loss,
)
from data import IGNORE, pack
from model import ModelConfig, Nemotron
from parallel import TokenLogProbs

VECTORS = json.loads((Path(__file__).parent / "alignment_vectors.json").read_text())
TOLERANCE = {torch.float64: (1e-10, 1e-12), torch.float32: (2e-5, 1e-6)}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
FORMS = ("bwd", "fwd", "sq")


def close(got, want):
    got = torch.as_tensor(got)
    dtype = got.dtype if got.dtype in TOLERANCE else torch.float64
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(got.to(dtype), torch.tensor(want, dtype=dtype), rtol=rtol, atol=atol)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def leaves(*values, dtype=torch.float64):
    return [torch.tensor(value, dtype=dtype, requires_grad=True) for value in values]


def grid(*limits, n=41, dtype=torch.float64):
    """All pairs (a, b) of a grid, flat."""
    lines = [torch.linspace(-limit, limit, n, dtype=dtype) for limit in limits]
    return [x.flatten() for x in torch.meshgrid(*lines, indexing="ij")]


def entropy(p):
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))


def preference_margin(log_probs, reference, beta):
    """a of summed log-probabilities (N, 2)."""
    log_ratio = log_probs - reference
    return beta * (log_ratio[:, 0] - log_ratio[:, 1])


def attribute_values(sums):
    return means(sums, "labels")


def pair_values(sums):
    return means(sums, "pairs")


def margin_of(inputs, dtype):
    """(pc, pr) as leaves, a, and b where there are rewards."""
    pc, pr = leaves(inputs["pc"], inputs["pr"], dtype=dtype)
    reference = torch.tensor([[inputs["rc"], inputs["rr"]]], dtype=dtype)
    a = preference_margin(torch.stack([pc, pr])[None], reference, inputs["beta"])
    gap = inputs.get("eta", 1.0) * (inputs.get("r_chosen", 0.0) - inputs.get("r_rejected", 0.0))
    return pc, pr, a, torch.tensor([gap], dtype=dtype)


# ---- the vectors ---------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("case", VECTORS["dpo"], ids=lambda c: c["name"])
def test_dpo_equals_the_vectors_in_value_and_gradient(case, dtype):
    want = case["expected"]
    pc, pr, a, _ = margin_of(case["inputs"], dtype)
    loss = dpo_loss(a)
    close(a, [want["a"]])
    close(loss, [want["loss"]])
    dpc, dpr = torch.autograd.grad(loss.sum(), (pc, pr))
    close(dpc, want["dL_dpc"])
    close(dpr, want["dL_dpr"])
    x = {k: torch.tensor(case["inputs"][k], dtype=dtype) for k in ("pc", "pr", "rc", "rr")}
    policy, reference = torch.stack([x["pc"], x["pr"]]), torch.stack([x["rc"], x["rr"]])
    sums = pair_sums(policy[None], reference[None], torch.ones(1, 2), case["inputs"]["beta"])
    got = pair_values(sums)
    close(got["beta_reward_chosen"], want["reward_chosen"])
    close(got["beta_reward_rejected"], want["reward_rejected"])
    close(got["beta_margin"], want["margin"])
    assert got["accuracy"] == want["correct"]


# from the study's own table; those of the file are tested above
@DTYPES
@pytest.mark.parametrize("a, want", [(1000.0, 0.0), (-1000.0, 1000.0), (0.0, math.log(2))])
def test_dpo_is_finite_and_right_far_out(a, want, dtype):
    (a,) = leaves(a, dtype=dtype)
    close(dpo_loss(a), want)
    close(torch.autograd.grad(dpo_loss(a), a)[0], -1 / (1 + math.exp(min(a.item(), 700))))


def test_dpo_keeps_its_digits_where_torchs_softplus_turns_linear():
    a = torch.linspace(-30, 30, 601).double()
    want = [math.log1p(math.exp(-abs(x))) + max(-x, 0.0) for x in a.tolist()]
    torch.testing.assert_close(dpo_loss(a), f64(want), rtol=1e-14, atol=0)


def test_dpo_divides_by_the_valid_pairs_alone():
    inputs, want = VECTORS["dpo_batch"]["inputs"], VECTORS["dpo_batch"]["expected"]
    pairs = f64([inputs[k] for k in ("pc", "pr", "rc", "rr")]).T
    there = torch.tensor(inputs["valid"]).bool()
    policy, reference = pairs[there].split(2, dim=1)
    loss = dpo_loss(preference_margin(policy, reference, inputs["beta"]))
    close(loss, want["per_pair"])
    close(loss.sum() / len(loss), want["mean_valid"])
    sums = pair_sums(policy, reference, torch.ones(5, 2), inputs["beta"])
    close(pair_values(sums)["accuracy"], want["accuracy_valid"])
    # an absent pair leaves response_sums as no row at all, so it cannot be counted as ln 2
    batch = {
        k: torch.as_tensor(v) for k, v in pack(random_rows(3, "preference"), 64, False).items()
    }
    batch["rows"][1] = -1
    sums = response_sums(batch["targets"] != IGNORE, batch)
    assert sums.shape == (2, 2) and dpo_loss(preference_margin(sums, sums, 0.1)).shape == (2,)


@DTYPES
@pytest.mark.parametrize("case", VECTORS["dpo_label_smoothing"], ids=lambda c: c["inputs"]["eps"])
def test_smoothed_dpo_equals_the_vectors(case, dtype):
    (a,) = leaves(case["inputs"]["a"], dtype=dtype)
    loss = dpo_loss(a, case["inputs"]["eps"])
    close(loss, case["expected"]["cdpo"])
    close(torch.autograd.grad(loss, a)[0], case["expected"]["grad"])


@DTYPES
@pytest.mark.parametrize("case", VECTORS["ipo"], ids=lambda c: c["name"])
def test_ipo_equals_the_vectors(case, dtype):
    inputs = case["inputs"]
    _, _, a, _ = margin_of(inputs | {"beta": 1.0}, dtype)
    close(ipo_loss(a, inputs["beta"]), [case["expected"]["ipo_sum"]])
    # TRL's form: each log-ratio divided by its length first
    lengths = torch.tensor([[inputs["len_chosen"], inputs["len_rejected"]]], dtype=dtype)
    policy, reference = (
        torch.tensor([[inputs[c], inputs[r]]], dtype=dtype) / lengths
        for c, r in (("pc", "pr"), ("rc", "rr"))
    )
    delta = preference_margin(policy, reference, 1.0)
    close(ipo_loss(delta, inputs["beta"]), [case["expected"]["ipo_avg_trl"]])


@DTYPES
@pytest.mark.parametrize("case", VECTORS["rpo"], ids=lambda c: c["name"])
def test_rpo_equals_the_vectors_in_value_and_gradient(case, dtype):
    want = case["expected"]
    pc, pr, a, b = margin_of(case["inputs"], dtype)
    close(a, [want["a"]])
    close(b, [want["b"]])
    for form, name in zip(FORMS, ("rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"), strict=True):
        loss = rpo_loss(a, b, form)
        close(loss, [want[name]])
        dpc, dpr = torch.autograd.grad(loss.sum(), (pc, pr), retain_graph=True)
        close(dpc, want[f"grad_{form}_dpc"])
        close(dpr, -want[f"grad_{form}_dpc"])
    close(dpo_loss(a), [want["dpo"]])
    close(torch.sigmoid(-b), [want["cdpo_equiv_eps"]])
    close(dpo_loss(a, torch.sigmoid(-b)) - entropy(torch.sigmoid(b)), [want["cdpo_minus_entropy"]])


@DTYPES
@pytest.mark.parametrize(
    "a, b, want",
    [
        (0.0, 1.0, 0.1109440717), (0.0, 0.0, 0.0), (3.0, 3.0, 0.0), (0.75, 3.0, 0.2315754399),
        (9.0, 3.0, 0.2360912897), (0.75, -3.0, 0.9104366301), (0.75, 1.5, 0.0486385853),
        (0.089625, 1.07, 0.1040353665), (1.5, 60.0, 0.2014132780), (1000.0, 3.0, 47.2350082065),
        (-1000.0, 3.0, 952.3832618513),
    ],
)  # fmt: skip
def test_rpo_equals_the_studys_table_which_prints_ten_digits(a, b, want, dtype):
    (a,), b = leaves(a, dtype=dtype), torch.tensor(b, dtype=dtype)
    loss = rpo_loss(a, b)
    assert abs(loss.item() - want) <= 6e-11 + TOLERANCE[dtype][0] * want + TOLERANCE[dtype][1]
    assert torch.isfinite(torch.autograd.grad(loss, a)[0])


def test_rpo_of_a_batch_is_the_mean_over_its_pairs():
    cases = VECTORS["rpo"]
    both = [margin_of(case["inputs"], torch.float64)[2:] for case in cases]
    losses = torch.cat([rpo_loss(a, b) for a, b in both])
    close(losses, [case["expected"]["rpo_bwd_kl"] for case in cases])
    # the vector's fourth pair is not in the file; the study gives it as (0.75, -3)
    four = [(0.0, 1.0), (0.75, 3.0), (9.0, 3.0), (0.75, -3.0)]
    losses = [rpo_loss(*f64(pair)) for pair in four]
    close(sum(losses) / 4, VECTORS["rpo_batch"]["expected"]["mean_bwd"])


def sft_vector(dtype):
    """logits that predict a next token (2, 4, V), all next tokens, those trained."""
    inputs = VECTORS["sft_mask"]["inputs"]
    logits = torch.tensor(inputs["logits"], dtype=dtype)[:, :-1].contiguous().requires_grad_()
    labels = torch.tensor(inputs["labels_unshifted"])[:, 1:].contiguous()
    return logits, torch.tensor(inputs["input_ids"])[:, 1:].contiguous(), labels


@DTYPES
def test_sft_equals_the_vectors_from_logits_to_gradient(dtype):
    want = VECTORS["sft_mask"]["expected"]
    logits, following, labels = sft_vector(dtype)
    unit = torch.eye(4, dtype=dtype)  # so that the head's input is its logits
    close(TokenLogProbs.apply(logits, unit, following, None), want["per_token_logp"])
    assert (labels != IGNORE).int().tolist() == want["shifted_loss_mask"]
    log_probs = TokenLogProbs.apply(logits, unit, labels, None)
    total, count = sft_loss(log_probs, labels)
    assert count == sum(want["token_counts"])
    close(total / count, want["sft_token_mean"])
    grad = torch.autograd.grad(total / count, logits)[0]
    close(F.pad(grad, (0, 0, 0, 1)), want["grad_logits_token_mean"])

    # the two rows as two segments of one packed window
    flat = {"rows": torch.tensor([[0, 1]]), "ends": torch.zeros(1, 2, 1, dtype=torch.long)}
    flat["documents"] = torch.tensor([[0] * 4 + [1] * 4])
    sums = response_sums(log_probs.reshape(1, 8), flat)[:, 0]
    counts = response_sums((labels != IGNORE).reshape(1, 8), flat)[:, 0]
    for got, key in ((sums, "sum"), (sums / counts, "mean")):
        close(got.to(dtype), want[f"sequence_logp_{key}"])
    close((-sums.sum() / 2).to(dtype), want["sft_mean_of_sequence_sums"])
    close((-sums / counts).mean().to(dtype), want["sft_mean_of_sequence_means"])


def test_sums_and_counts_make_micro_batches_and_packs_weigh_every_token_and_pair_alike():
    vector = VECTORS["grad_accum_normalisation"]
    nll = leaves(*vector["inputs"]["microbatch_token_nll"])
    parts = [sft_loss(-x, torch.zeros(len(x), dtype=torch.long)) for x in nll]
    loss = sum(total for total, _ in parts) / sum(count for _, count in parts)
    close(loss, vector["expected"]["token_weighted"])
    for grad in torch.autograd.grad(loss, nll):
        close(grad, [vector["expected"]["weights_per_token_correct"]] * len(grad))
    vector = VECTORS["grad_accum_dpo_packed"]
    packs = [f64(x) for x in vector["inputs"]["pair_losses"]]
    losses = [dpo_loss(-torch.log(torch.expm1(x))) for x in packs]  # the a of each loss
    mean = sum(x.sum() for x in losses) / sum(len(x) for x in losses)
    close(mean, vector["expected"]["mean_over_pairs"])


def split_vocabulary(dtype):
    """A rank's share of the vector: its log-probability, gradient, and as a test of the shift
    the log-probability with 1000 added to every logit."""
    inputs = VECTORS["vocab_parallel_logprob"]["inputs"]
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    V, n = len(inputs["logits"]), mesh.size()
    here = slice(mesh.get_local_rank() * V // n, (mesh.get_local_rank() + 1) * V // n)
    h = torch.tensor([inputs["logits"]] * 2, dtype=dtype, requires_grad=True)
    targets = torch.tensor([inputs["target"], IGNORE])
    log_probs = TokenLogProbs.apply(h, torch.eye(V, dtype=dtype)[here], targets, mesh)
    grad = torch.autograd.grad(log_probs.sum(), h)[0]
    torch.distributed.all_reduce(grad)  # of h each rank has its part
    shifted = TokenLogProbs.apply(h + 1000, torch.eye(V, dtype=dtype)[here], targets, mesh)
    return log_probs.tolist(), grad.tolist(), shifted.tolist()


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_vocabulary_may_be_split_over_any_number_of_ranks(on_ranks, n):
    want = VECTORS["vocab_parallel_logprob"]["expected"]
    for log_probs, grad, shifted in on_ranks(n, split_vocabulary, torch.float64):
        close(log_probs, [want["logprob"], 0.0])
        close(shifted, [want["logprob"], 0.0])
        close(grad, [want["grad_logprob_wrt_logits"], [0.0] * 8])


@pytest.mark.parametrize("case", VECTORS["reward_aggregation"]["cases"], ids=lambda c: c["name"])
def test_aggregated_rewards_equal_the_vectors(case):
    group, want = VECTORS["reward_aggregation"], case["expected"]
    assert list(data.ATTRIBUTES) == group["order"]
    assert list(data.NINE_ATTRIBUTES) == group["nine_attribute_order"]
    assert list(data.REWARD_WEIGHTS) == group["weights_340b"]
    five = [case["inputs"]["attributes"][name] for name in data.ATTRIBUTES]
    nine = f64([7.0, -7.0, 7.0, 7.0, *five])
    for attributes in (five, nine):
        close(align.aggregate(attributes), want["reward_340b_weights"])
        weights = group["weights_llama3_70b"]
        close(align.aggregate(attributes, weights), want["reward_llama3_70b_weights"])
        close(align.aggregate(attributes, [0.2] * 5), want["mean_of_five"])
    close(align.aggregate(nine, group["nine_attribute_weights_340b"]), want["reward_340b_weights"])


@DTYPES
def test_the_reward_loss_equals_the_vectors_and_forgets_no_mask(dtype):
    inputs, want = VECTORS["regression_rm"]["inputs"], VECTORS["regression_rm"]["expected"]
    (pred,), label = leaves(inputs["pred"], dtype=dtype), torch.tensor(inputs["label"], dtype=dtype)
    total, count = reward_loss(pred, label)
    assert count == want["n_valid"]
    close(total / count, want["mse_over_valid_entries"])
    close(torch.autograd.grad(total / count, pred)[0], want["grad_pred"])
    rows = [reward_loss(p, y) for p, y in zip(pred, label, strict=True)]
    close(torch.stack([t / n for t, n in rows]), want["per_sample_mean"])
    got = attribute_values(attribute_sums(pred, label))
    each = torch.tensor([got[f"mse/{name}"] for name in data.ATTRIBUTES])
    close(each, want["per_attribute_mse"])


@DTYPES
@pytest.mark.parametrize("case", VECTORS["bradley_terry"], ids=lambda c: c["name"])
def test_bradley_terry_equals_the_vectors(case, dtype):
    want, inputs = case["expected"], case["inputs"]
    chosen, rejected = leaves(inputs["chosen"], inputs["rejected"], dtype=dtype)
    strength = torch.tensor(inputs["margin"], dtype=dtype)
    loss = bradley_terry_loss(chosen - rejected)
    close(loss, want["bt"])
    close(torch.autograd.grad(loss, chosen)[0], want["grad_bt"])
    close(bradley_terry_loss(chosen - rejected, shift=strength), want["margin_bt"])
    close(bradley_terry_loss(chosen - rejected, factor=strength), want["scaled_bt"])
    assert (chosen > rejected) == want["correct"]


def test_the_chat_template_equals_the_vectors():
    tokenizer = data.train_bpe(["System User Assistant Hello. Be brief. " * 9], 270)
    x = VECTORS["chat_template_nemotron4"]["inputs"]
    want = VECTORS["chat_template_nemotron4"]["expected"]
    chat = [{"role": role.lower(), "content": text} for role, text in x["messages"]]
    system = {"role": "system", "content": x["system"]}
    ids, trained = data.render_chat([system, *chat], tokenizer)
    assert tokenizer.decode(ids) == want["text"]
    of_segments = [len_of(text, tokenizer) for text, _ in want["segments"]]
    flags = [bool(flag) for _, flag in want["segments"]]
    assert trained.tolist() == np.repeat(flags, of_segments).tolist()
    prompt, _ = data.render_chat([system, *chat[:3]], tokenizer)
    assert tokenizer.decode(prompt) == want["generation_prompt"]
    assert tokenizer.decode(data.render_chat(chat[:1], tokenizer)[0]) == want["empty_system"]
    judged = tokenizer.decode(data.render_reward(chat[:2], tokenizer))
    assert judged == want["reward_text_single_turn"]
    assert tokenizer.decode(ids[-1:]) == want["stop_string"]


def len_of(text, tokenizer):
    """Tokens of a segment: a marker is one, what follows it is encoded apart, heads by line."""
    markers = data.MARKER.findall(text)
    rest = data.MARKER.split(text)[-1]
    return len(markers) + len(tokenizer.encode(rest))


def test_dpo_drains_the_chosen_response_rpo_stops_and_the_sft_term_holds_it_up():
    phi = f64([[1.0, 0.9], [0.9, 1.0], [1.0, -1.0]])  # chosen, rejected, other
    cases = {case["name"]: case for case in VECTORS["behaviour_toy"]["cases"]}
    runs = ["dpo_2000", "rpo_2000", "dpo_sft_0p1_2000", "rpo_sft_0p1_2000"]
    theta, seen = torch.zeros(4, 2).double().requires_grad_(), {}
    target = f64([cases[name]["inputs"]["b"] for name in runs])
    for step in range(2001):
        log_probs = (theta @ phi.T).log_softmax(-1)  # (4 runs, 3 responses)
        a = preference_margin(log_probs[:, :2], torch.full((4, 2), -math.log(3)).double(), 1.0)
        now = torch.cat([theta, a[:, None], log_probs], dim=1).detach()
        if step in (200, 2000):
            seen |= {"dpo_200": now[0]} if step == 200 else dict(zip(runs, now, strict=True))
        loss = dpo_loss(a[::2]).sum() + rpo_loss(a[1::2], target[1::2]).sum()
        loss = loss - 0.1 * log_probs[2:, 0].sum()
        with torch.no_grad():
            theta -= torch.autograd.grad(loss, theta)[0]
    for name, case in cases.items():
        want, got = case["expected"], seen[name]
        close(got[:2], want["theta"])
        close(got[2:5], [want["a"], want["logp_chosen"], want["logp_rejected"]])
        close(got[3] + math.log(3), want["chosen_change"])
    assert seen["dpo_2000"][3] < -30 and seen["rpo_2000"][2] < 2  # drained; stopped at b
    assert seen["rpo_sft_0p1_2000"][3] > -math.log(3)  # held up


# ---- identities ----------------------------------------------------------------------------------


def test_rpo_is_smoothed_dpo_less_an_entropy():
    a, b = grid(12, 12)
    want = dpo_loss(a, torch.sigmoid(-b)) - entropy(torch.sigmoid(b))
    assert torch.allclose(rpo_loss(a, b), want, atol=1e-12)


def test_rpo_is_zero_when_the_policy_gap_equals_the_reward_gap_and_positive_elsewhere():
    a, b = grid(20, 20)
    for form in FORMS:
        loss = rpo_loss(a, b, form)
        assert (loss[a == b] == 0).all()
        assert (loss > -1e-15).all() and (loss[(a - b).abs() > 0.1] > 0).all()


def test_rpos_gradient_is_the_difference_of_the_two_probabilities():
    a, b = (x.requires_grad_() for x in grid(30, 30))
    (grad,) = torch.autograd.grad(rpo_loss(a, b).sum(), a)
    assert torch.allclose(grad, torch.sigmoid(a) - torch.sigmoid(b), atol=1e-14)
    assert (grad[a == b].abs() < 1e-15).all() and (grad.abs() <= 1).all()
    assert (grad[(a > b) & (b < 20)] > 0).all()  # overshooting costs
    (grad,) = torch.autograd.grad(rpo_loss(a, b, "fwd").sum(), a)
    assert torch.allclose(grad, torch.sigmoid(a) * torch.sigmoid(-a) * (a - b), atol=1e-14)
    (grad,) = torch.autograd.grad(rpo_loss(a, b, "sq").sum(), a)
    assert torch.allclose(grad, 2 * (a - b))


def test_swapping_chosen_and_rejected_with_their_rewards_changes_no_rpo_loss():
    a, b = grid(12, 12)
    for form in FORMS:
        assert torch.allclose(rpo_loss(a, b, form), rpo_loss(-a, -b, form), atol=1e-15)


def test_an_endless_reward_gap_makes_rpo_dpo():
    a, _ = grid(20, 1)
    for b in (60.0, 500.0):
        assert torch.allclose(rpo_loss(a, torch.full_like(a, b)), dpo_loss(a), atol=1e-15)


def test_overshooting_costs_linearly_where_dpo_goes_to_zero():
    b = f64(3.0)
    (a,) = leaves(200.0)
    (slope,) = torch.autograd.grad(rpo_loss(a, b), a)
    assert torch.allclose(slope, torch.sigmoid(-b)) and dpo_loss(a) < 1e-80
    far = rpo_loss(a, b) - (torch.sigmoid(-b) * a - entropy(torch.sigmoid(b)))
    assert far.abs() < 1e-10


def test_two_responses_of_the_k_form_are_rpo_and_a_common_reward_changes_nothing():
    g = torch.Generator().manual_seed(0)
    a, b, shift = (3 * torch.randn(50, n, generator=g).double() for n in (2, 2, 1))
    pair = rpo_loss(a[:, 0] - a[:, 1], b[:, 0] - b[:, 1])
    assert torch.allclose(rpo_k_loss(a, b), pair, atol=1e-14)
    a, b = (3 * torch.randn(50, 5, generator=g).double() for _ in range(2))
    assert torch.allclose(rpo_k_loss(a, b + shift), rpo_k_loss(a, b), atol=1e-13)
    assert torch.allclose(rpo_k_loss(a + shift, b), rpo_k_loss(a, b), atol=1e-13)
    assert (rpo_k_loss(a, a + shift).abs() < 1e-13).all() and (rpo_k_loss(a, b) > 0).all()
    order = torch.randperm(5, generator=g)
    assert torch.allclose(rpo_k_loss(a[:, order], b[:, order]), rpo_k_loss(a, b))
    a.requires_grad_()
    (grad,) = torch.autograd.grad(rpo_k_loss(a, b).sum(), a)
    assert torch.allclose(grad, a.softmax(-1) - b.softmax(-1))


def test_an_absent_response_changes_no_k_form_and_equal_rewards_leave_the_reference_alone():
    g = torch.Generator().manual_seed(1)
    a, b = (3 * torch.randn(20, 4, generator=g).double() for _ in range(2))
    b[:, 3] = -math.inf
    a.requires_grad_()
    losses = rpo_k_loss(a, b), rpo_k_loss(a[:, :3], b[:, :3])
    assert torch.allclose(*losses, rtol=1e-14)
    (grad,) = torch.autograd.grad(losses[0].sum(), a)
    assert (grad[:, 3] == 0).all() and (grad[:, :3] != 0).all()
    none = torch.zeros(3, 4).double().requires_grad_()
    loss = rpo_k_loss(none, torch.full((3, 4), 2.5).double())
    (grad,) = torch.autograd.grad(loss.sum(), none)
    assert (loss == 0).all() and (grad.abs() < 1e-16).all()


def test_the_forward_form_is_the_exact_optimization_loss_of_trl():
    a, b = grid(12, 12)
    eps = torch.sigmoid(-b)
    want = torch.sigmoid(a) * (F.logsigmoid(a) - torch.log1p(-eps))
    want += torch.sigmoid(-a) * (F.logsigmoid(-a) - torch.log(eps))
    assert torch.allclose(rpo_loss(a, b, "fwd"), want, atol=1e-12)


def test_before_the_first_step_the_losses_are_known():
    b = torch.linspace(-5, 5, 21).double()
    policy = torch.randn(21, 2, generator=torch.Generator().manual_seed(0)).double()
    a = preference_margin(policy, policy.clone(), 0.3).requires_grad_()
    assert (a == 0).all()
    ln2 = torch.full_like(a, math.log(2))
    assert torch.allclose(dpo_loss(a), ln2)
    assert torch.allclose(rpo_loss(a, b), ln2 - entropy(torch.sigmoid(b)))
    assert torch.allclose(torch.autograd.grad(dpo_loss(a).sum(), a)[0], torch.full_like(a, -0.5))
    (grad,) = torch.autograd.grad(rpo_loss(a, b).sum(), a)
    assert torch.allclose(grad, 0.5 - torch.sigmoid(b))


@pytest.mark.parametrize("form", FORMS)
def test_no_margin_makes_a_loss_or_its_gradient_infinite(form):
    for dtype in TOLERANCE:
        a, b = (x.requires_grad_() for x in grid(1e4, 1e4, dtype=dtype))
        loss = rpo_loss(a, b, form)
        grads = torch.autograd.grad(loss.sum() + dpo_loss(a).sum(), (a, b))
        assert all(torch.isfinite(x).all() for x in (loss, *grads))


def test_dpo_gradient_pushes_chosen_up_and_rejected_down():
    policy, reference = torch.randn(2, 9, 2, generator=torch.Generator().manual_seed(0)).double()
    loss = dpo_loss(preference_margin(policy.requires_grad_(), reference, 0.1)).sum()
    (grad,) = torch.autograd.grad(loss, policy)
    assert (grad[:, 0] < 0).all() and (grad[:, 1] > 0).all()


def test_the_mask_of_the_reward_loss_holds_whatever_stands_behind_it():
    pred = torch.full((4, 5), float("nan")).double()
    label = torch.full((4, 5), float(IGNORE)).double()
    pred[1, 2], label[1, 2] = 3.0, 1.0
    pred.requires_grad_()
    total, count = reward_loss(pred, label)
    assert (total, count) == (4.0, 1)
    (grad,) = torch.autograd.grad(total, pred)
    assert grad[1, 2] == 4.0 and grad.abs().sum() == 4.0
    assert reward_loss(pred[:1], label[:1])[1] == 0
    # nine attributes and five: the last five are meant, either way round
    g = torch.Generator().manual_seed(0)
    nine, five = torch.randn(3, 9, generator=g), torch.randn(3, 5, generator=g)
    want = (nine[:, 4:] - five).square().sum(), 15
    assert reward_loss(nine, five) == want == reward_loss(five, nine)


def test_wrong_shapes_and_words_are_refused():
    for shapes in (((3, 5), (1, 5)), ((3, 5), (3, 1)), ((3, 4), (3, 4)), ((5,), (3, 5))):
        with pytest.raises(ValueError, match="the same but for the last"):
            reward_loss(*(torch.zeros(s) for s in shapes))
    with pytest.raises(ValueError, match="form='reverse'"):
        rpo_loss(torch.zeros(1), torch.zeros(1), "reverse")


# ---- what must not change a loss -----------------------------------------------------------------

CFG = ModelConfig(32, 2, 4, 2, 8, 64, vocab_size=100, seq_len=64, init_std=0.2)
BETA = 0.7


@pytest.fixture(scope="module")
def models():
    """A policy, a reference, and a reward model, fp64."""
    torch.manual_seed(0)
    policy = Nemotron(CFG).double()
    reference = Nemotron(CFG).double()
    for p in reference.parameters():
        p.data += 0.05 * torch.randn_like(p)
    reward = Nemotron(ModelConfig(**{**vars(CFG), "n_attributes": 5})).double()
    return policy, reference.requires_grad_(False), reward


def multiple_of(k):
    return lambda n: -(-n // k) * k


def tensors(rows, **how):
    return {key: torch.as_tensor(value) for key, value in pack(rows, **how).items()}


def run(model, batch):
    return model(batch["tokens"], batch["positions"], batch["documents"], targets=batch["targets"])


def preference_step(models, windows, split=None):
    """Loss and gradient of RPO with an SFT term over all windows, `split` of them at a time, and
    the metrics."""
    policy, reference, _ = models
    policy.zero_grad()
    starts = range(0, len(windows["rows"]), split or len(windows["rows"]))
    batches = [{k: v[i : i + starts.step] for k, v in windows.items()} for i in starts]
    pairs = (windows["rows"] >= 0).sum()
    total, moments = 0.0, {}
    for batch in batches:
        log_probs, tokens = run(policy, batch), response_sums(batch["targets"] != IGNORE, batch)
        logp = response_sums(log_probs, batch)
        ref = response_sums(run(reference, batch), batch)
        rewards = batch["rewards"][batch["rows"] >= 0].double()
        b = rewards[:, 0] - rewards[:, 1]
        loss = rpo_loss(preference_margin(logp, ref, BETA), b).sum() - 0.01 * logp[:, 0].sum()
        (loss / pairs).backward()
        total += loss.item() / pairs.item()
        for key, value in pair_sums(logp, ref, tokens, BETA, b).items():
            moments[key] = moments.get(key, 0) + value
    grad = torch.cat([p.grad.flatten() for p in policy.parameters()])
    return total, grad, pair_values(moments)


def same_step(x, y):
    assert abs(x[0] - y[0]) < 1e-11 * abs(x[0])
    assert torch.allclose(x[1], y[1], rtol=1e-9, atol=1e-12) and x[1].abs().sum() > 0
    assert x[2].keys() == y[2].keys() and x[2] == pytest.approx(y[2], rel=1e-9)


@pytest.fixture(scope="module")
def pairs():
    return random_rows(12, "preference", seed=3, longest=12)


@pytest.fixture(scope="module")
def one_by_one(models, pairs):
    return preference_step(models, tensors(pairs, window=24, packed=False), 1)


@pytest.mark.parametrize("split", [1, 2, 5, None])
@pytest.mark.parametrize("window", [24, 64])
def test_packing_and_micro_batches_do_not_change_a_preference_step(
    models, pairs, one_by_one, window, split
):
    packed = tensors(pairs, window=window)
    assert len(packed["rows"]) < len(pairs)
    same_step(preference_step(models, packed, split), one_by_one)


def test_the_order_of_pairs_and_windows_without_a_pair_do_not_change_a_step(
    models, pairs, one_by_one
):
    order = np.random.default_rng(0).permutation(len(pairs))
    same_step(preference_step(models, tensors([pairs[i] for i in order], window=40)), one_by_one)
    empty = tensors(pairs, window=40, pad=multiple_of(16))
    assert (empty["rows"] < 0).all(1).sum() > 8
    same_step(preference_step(models, empty, 3), one_by_one)  # some micro-batches have no pair


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_step(models, pairs, one_by_one, side):
    batch = tensors(pairs, window=24, packed=False)
    fill = {"tokens": 9, "targets": IGNORE, "positions": 0, "documents": -1}
    for key, value in fill.items():
        width = (7, 0) if side == "left" else (0, 7)
        batch[key] = F.pad(batch[key], width, value=value)
    same_step(preference_step(models, batch), one_by_one)


def test_a_policy_that_is_its_reference_has_no_margin_whatever_the_packing(models, pairs):
    sums = []
    for how in (dict(window=64), dict(window=64), dict(window=24, packed=False)):
        batch = tensors(pairs, **how)
        order = batch["rows"][batch["rows"] >= 0].argsort()
        sums.append(response_sums(run(models[0], batch), batch).detach()[order])
    assert (preference_margin(sums[0], sums[1], 1.0) == 0).all()
    assert preference_margin(sums[0], sums[2], 1.0).abs().max() < 1e-12


def test_a_change_in_one_row_leaves_the_others_in_its_window_bit_equal(models, pairs):
    batch = tensors(pairs[:3], window=64)
    assert len(batch["rows"]) == 1
    before = response_sums(run(models[0], batch), batch)
    batch["tokens"][0, :5] = 11  # of the first pair's chosen
    after = response_sums(run(models[0], batch), batch)
    changed = (before != after).any(1)
    assert changed.tolist() == [True, False, False] and before[0, 1] == after[0, 1]


def test_swapping_the_sides_of_every_pair_changes_no_rpo_loss(models, pairs):
    swapped = [data.Example(r.ids[::-1], r.trained[::-1], r.values[::-1], "") for r in pairs]
    losses = []
    for rows in (pairs, swapped):
        batch = tensors(rows, window=64)
        logp, ref = (response_sums(run(m, batch), batch) for m in models[:2])
        rewards = batch["rewards"][batch["rows"] >= 0].double()
        b = rewards[:, 0] - rewards[:, 1]
        losses.append(rpo_loss(preference_margin(logp, ref, BETA), b).sum().item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) and losses[0] > 0


def test_packed_conversations_train_as_one_by_one(models):
    rows, policy = random_rows(9, seed=5), models[0]
    results = []
    for how in (dict(packed=False), dict(), dict(pad=multiple_of(8))):
        batch = tensors(rows, window=64, **how)
        policy.zero_grad()
        total, count = sft_loss(run(policy, batch), batch["targets"])
        total.backward()
        results.append((total.item(), count.item(), policy.embed.weight.grad.clone()))
    n = sum(row.trained[0][1:].sum() for row in rows)
    for total, count, grad in results:
        assert count == n and total == pytest.approx(results[0][0], rel=1e-12)
        assert torch.allclose(grad, results[0][2], rtol=1e-9, atol=1e-12)


def test_the_first_token_of_a_response_is_counted_and_none_after_its_end():
    ids = np.array([8, 9, 10, 11, 12], np.int32)
    trained = np.array([False, False, True, True, False])
    batch = tensors([data.Example((ids,), (trained,), None, "")], window=8)
    assert batch["targets"].tolist() == [[IGNORE, 10, 11] + [IGNORE] * 5]
    log_probs = torch.where(batch["targets"] != IGNORE, -batch["targets"].double(), 0)
    assert response_sums(log_probs, batch).tolist() == [[-21.0]]


def test_padding_belongs_to_no_response():
    rows = random_rows(12, "preference")
    batch = tensors(rows, window=64, pad=multiple_of(9))
    lengths = response_sums(torch.ones(batch["tokens"].shape), batch).tolist()
    numbers = batch["rows"][batch["rows"] >= 0].tolist()
    assert lengths == [list(map(len, rows[i].ids)) for i in numbers]


def test_a_reward_score_depends_on_neither_batch_nor_padding_nor_packing(models):
    rows, model = random_rows(11, "reward", seed=2), models[2]
    alone = torch.cat(
        [last_scores(run(model, b), b) for b in (tensors([r], window=40) for r in rows)]
    )
    for how in (
        dict(window=64, packed=False),
        dict(window=64),
        dict(window=90, pad=multiple_of(4)),
    ):
        batch = tensors(rows, **how)
        scores, numbers = last_scores(run(model, batch), batch), batch["rows"][batch["rows"] >= 0]
        assert scores.shape == (11, 1, 5) and torch.equal(numbers.sort()[0], torch.arange(11))
        assert torch.allclose(scores, alone[numbers], rtol=1e-10, atol=1e-12)
        total, count = reward_loss(scores[:, 0], batch["labels"][batch["rows"] >= 0].double())
        assert count == 55 and total > 0


def test_both_sides_of_a_judged_pair_are_read_at_their_own_ends(models, pairs):
    batch = tensors(pairs, window=64)
    scores = last_scores(run(models[2], batch), batch)
    assert scores.shape == (12, 2, 5)
    numbers = batch["rows"][batch["rows"] >= 0].tolist()
    for i, got in zip(numbers, scores, strict=True):
        for k in (0, 1):
            want = models[2](torch.as_tensor(pairs[i].ids[k])[None].long())[0, -1]
            assert torch.allclose(got[k], want, rtol=1e-10, atol=1e-12)


# ---- metrics -------------------------------------------------------------------------------------


def test_pair_metrics_are_what_numpy_says_whatever_the_split():
    g = torch.Generator().manual_seed(1)
    policy, ref = (40 * torch.randn(60, 2, generator=g).double() - 200 for _ in range(2))
    tokens = torch.randint(1, 90, (60, 2), generator=g)
    b = torch.randn(60, generator=g).double()
    whole = pair_sums(policy, ref, tokens, 0.05, b)
    parts = zip(*(x.split(17) for x in (policy, ref, tokens)), b.split(17), strict=True)
    added = {}
    for p, r, t, gap in parts:
        for key, value in pair_sums(p, r, t, 0.05, gap).items():
            added[key] = added.get(key, 0) + value
    got = pair_values(added)
    assert got == pytest.approx(pair_values(whole), rel=1e-12)
    ratio = (policy - ref).numpy()
    a, b = 0.05 * (ratio[:, 0] - ratio[:, 1]), b.numpy()
    want = {
        "pairs": 60,
        "accuracy": (a > 0).mean(),
        "beta_margin": a.mean(),
        "beta_reward_chosen": 0.05 * ratio[:, 0].mean(),
        "beta_reward_rejected": 0.05 * ratio[:, 1].mean(),
        "drift_chosen": ratio[:, 0].mean(),
        "drift_rejected": ratio[:, 1].mean(),
        "tokens_chosen": tokens[:, 0].double().mean().item(),
        "tokens_rejected": tokens[:, 1].double().mean().item(),
        "overshoot": (a > b).mean(),
        "gap_error": np.abs(a - b).mean(),
        "reward_gap": b.mean(),
    }
    assert got == pytest.approx(want, rel=1e-9)
    without = pair_values(pair_sums(policy, ref, tokens, 0.05))
    assert without == {k: got[k] for k in without} and "overshoot" not in without
    assert json.dumps(got)  # plain numbers


def test_metrics_of_nothing_are_no_numbers():
    none = torch.zeros(0, 2)
    assert pair_values(pair_sums(none, none, none, 0.1, torch.zeros(0))) == {}
    assert attribute_values(attribute_sums(torch.zeros(0, 5), torch.zeros(0, 5))) == {}
    same = torch.full((7, 2), -123.4)
    got = pair_values(pair_sums(same, same, torch.full((7, 2), 9), 0.1, torch.full((7,), 0.3)))
    assert got["accuracy"] == got["beta_margin"] == 0 and got["pairs"] == 7


def test_metrics_carry_no_gradient():
    policy = torch.randn(3, 2, requires_grad=True)
    sums = pair_sums(policy, torch.randn(3, 2), torch.ones(3, 2), 0.1, torch.ones(3))
    pred = torch.randn(3, 5, requires_grad=True)
    sums |= attribute_sums(pred, torch.randn(3, 5))
    assert not any(value.requires_grad for value in sums.values())


def test_attribute_metrics_leave_out_what_is_not_labelled():
    g = torch.Generator().manual_seed(0)
    pred, label = torch.randn(40, 9, generator=g).double(), torch.randn(40, 9, generator=g).double()
    label[torch.rand(40, 9, generator=g) < 0.3] = IGNORE
    label[:, 0] = IGNORE
    whole = attribute_sums(pred, label)
    halves = [attribute_sums(p, y) for p, y in zip(pred.split(13), label.split(13), strict=True)]
    got = attribute_values({key: sum(h[key] for h in halves) for key in whole})
    assert got == pytest.approx(attribute_values(whole), rel=1e-12)
    assert "mse/quality" not in got and len(got) == 3 * 8
    for i, name in enumerate(data.NINE_ATTRIBUTES):
        seen = label[:, i] != IGNORE
        if not seen.any():
            continue
        p, y = pred[seen, i].numpy(), label[seen, i].numpy()
        assert got[f"mse/{name}"] == pytest.approx(((p - y) ** 2).mean())
        assert got[f"mae/{name}"] == pytest.approx(np.abs(p - y).mean())
