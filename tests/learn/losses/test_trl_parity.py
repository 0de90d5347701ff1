"""Our losses against TRL 1.16's own code: value and gradient on one micro-batch, in float64.

`DPOTrainer._compute_loss` runs as it is, on a bare object with the attributes that it reads; its models return our
per-token log-probabilities. The reference goes through TRL's code too, so that LD-DPO is compared on both sides.

Two places of TRL cannot run in float64, and are compared in float32 instead: alpha_divergence (its table of bounds has no
float64) and ORPO's odds ratio (it casts to float32).
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpo_ray.learn.losses import LOSSES, Term, implicit_rewards, needs_mean_chosen_tokens, total_loss, wpo_weights
from tests.learn.losses.batch import TokenBatch, pair_logps, token_batch

dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="parity needs trl, see the dev extra")

BETA = 0.3
EXACT = {"rtol": 1e-10, "atol": 1e-15}
OPTIONS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "robust": {"label_smoothing": 0.1},
    "hinge": {},
    "ipo": {},
    "sigmoid_norm": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "discopop": {"discopop_tau": 0.05},
    "nca_pair": {},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "aot": {"label_smoothing": 0.2},
    "aot_unpaired": {"label_smoothing": 0.2},
    "sft": {"token_mean": "global"},
}
"""Every loss that TRL's DPOTrainer has, with options that matter."""
DIFFERENCES = ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop")
"""Losses to which TRL allows an f-divergence and which it changes."""


@pytest.fixture(autouse=True)
def float64_constants():
    """TRL makes a tensor of label_smoothing in the default dtype, which has to be as exact as the rest."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trl_step(batch: TokenBatch, names: list[str], **changed: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """TRL's loss of one micro-batch and the metrics that it logs."""
    same = lambda value: value
    policy = SimpleNamespace(
        log_probs=batch.logps_ST,
        log_sum_sq_probs=batch.log_sum_sq_probs_ST,
        entropy=torch.zeros_like(batch.logps_ST),
        mean_logits=torch.zeros_like(batch.logps_ST),
        is_top1=batch.mask_ST.bool(),
    )
    attributes: dict[str, Any] = {
        "model": SimpleNamespace(
            training=False, is_gradient_checkpointing=False, _modules={}
        ),  # accelerate looks for PEFT there
        "ref_model": lambda **_: SimpleNamespace(log_probs=batch.ref_logps_ST),
        "accelerator": SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        "args": SimpleNamespace(discopop_tau=changed.pop("discopop_tau", None), gradient_checkpointing_kwargs=None),
        "_metrics": {"eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": None,
        "label_smoothing": 0.0,
        "use_weighting": False,
        "loss_types": names,
        "loss_weights": [1.0] * len(names),
        "beta": BETA,
    }
    trainer = SimpleNamespace(**attributes | changed)
    num_rows, num_positions = batch.mask_ST.shape
    prompt_S1 = torch.zeros(num_rows, 1, dtype=torch.int64)
    inputs = {
        "input_ids": torch.ones(num_rows, num_positions + 1, dtype=torch.int64),
        "attention_mask": torch.ones(num_rows, num_positions + 1, dtype=torch.int64),
        "completion_mask": torch.cat([prompt_S1, batch.mask_ST], dim=1),
    }
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, lambda **_: policy, inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["eval"].items()}


def our_step(batch: TokenBatch, terms: list[Term], *, ld_alpha: float | None = None, wpo: bool = False) -> torch.Tensor:
    """Our loss of one micro-batch that is the whole global batch."""
    logps = pair_logps(batch, ld_alpha=ld_alpha)
    weights = None
    if wpo:
        aligned_ST = (batch.logps_ST - batch.log_sum_sq_probs_ST) * batch.mask_ST
        weights = wpo_weights(*(aligned_ST.sum(dim=1) / batch.mask_ST.sum(dim=1)).chunk(2))
    mean_chosen_tokens = logps.chosen_tokens.double().mean().item() if needs_mean_chosen_tokens(terms) else None
    losses = total_loss(terms, logps, beta=BETA, mean_chosen_tokens=mean_chosen_tokens, pair_weights=weights)
    assert losses.shape == logps.chosen_logps.shape
    return losses.sum() / len(losses)


def for_trl(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "token_mean"}


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, batch: TokenBatch, **tolerance: float) -> None:
    """Values, and gradients on every token of a completion; some gradient is not zero."""
    torch.testing.assert_close(ours, theirs, **tolerance)
    on_completions = batch.mask_ST.bool()
    (our_gradient_ST,) = torch.autograd.grad(ours, batch.logps_ST)
    (their_gradient_ST,) = torch.autograd.grad(theirs, batch.logps_ST)
    torch.testing.assert_close(our_gradient_ST[on_completions], their_gradient_ST[on_completions], **tolerance)
    assert our_gradient_ST[on_completions].abs().max() > 1e-3


def test_every_loss_of_trl_is_compared():
    assert set(OPTIONS) | {"simpo", "orpo"} == set(LOSSES)


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_equals_trl(name):
    batch, options = token_batch(), OPTIONS[name]
    theirs, _ = trl_step(batch, [name], **for_trl(options))
    assert_same(our_step(batch, [Term(name, 1.0, options)]), theirs, batch, **EXACT)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence"])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_f_divergence_equals_trl(name, divergence):
    batch, options = token_batch(), OPTIONS[name] | {"f_divergence_type": divergence}
    assert_same(our_step(batch, [Term(name, 1.0, options)]), trl_step(batch, [name], **options)[0], batch, **EXACT)


@pytest.mark.parametrize("coef", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_alpha_divergence_equals_trl_in_float32(name, coef):
    torch.set_default_dtype(torch.float32)
    batch = token_batch(dtype=torch.float32)
    options = OPTIONS[name] | {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": coef}
    theirs, _ = trl_step(batch, [name], **options)
    assert_same(our_step(batch, [Term(name, 1.0, options)]), theirs, batch, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", OPTIONS)
def test_length_desensitising_equals_trl(name):
    batch, options = token_batch(), OPTIONS[name]
    theirs, _ = trl_step(batch, [name], ld_alpha=0.4, **for_trl(options))
    assert_same(our_step(batch, [Term(name, 1.0, options)], ld_alpha=0.4), theirs, batch, **EXACT)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("aot", "aot_unpaired", "sft", "hinge")])
def test_wpo_equals_trl(name):
    batch, options = token_batch(), OPTIONS[name]
    theirs, _ = trl_step(batch, [name], use_weighting=True, **options)
    assert_same(our_step(batch, [Term(name, 1.0, options)], wpo=True), theirs, batch, **EXACT)


def test_wpo_on_hinge_equals_trl_in_value():
    """TRL multiplies in place what relu's backward needs: it has a value and no gradient."""
    batch = token_batch()
    with torch.no_grad():
        theirs, _ = trl_step(batch, ["hinge"], use_weighting=True)
        ours = our_step(batch, [Term("hinge")], wpo=True)
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_weighted_sum_equals_trl():
    """The mixture of MPO as TRL's documentation has it."""
    batch = token_batch()
    theirs, _ = trl_step(batch, ["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    terms = [Term("sigmoid", 0.8), Term("bco_pair", 0.2), Term("sft", 1.0, {"token_mean": "global"})]
    assert_same(our_step(batch, terms), theirs, batch, **EXACT)


@pytest.mark.parametrize("pair", range(5))
def test_label_smoothing_of_sigmoid_equals_trl_where_trl_has_it(pair):
    """TRL's `sigmoid` ignores label_smoothing, but its `aot` has it, and sorting one pair changes nothing."""
    batch, options = token_batch(slice(pair, pair + 1)), {"label_smoothing": 0.2}
    theirs, _ = trl_step(batch, ["aot"], **options)
    assert_same(our_step(batch, [Term("sigmoid", 1.0, options)]), theirs, batch, **EXACT)


def test_implicit_rewards_equal_trl():
    batch = token_batch()
    _, metrics = trl_step(batch, ["sigmoid"])
    rewards = implicit_rewards(pair_logps(batch), beta=BETA)
    assert rewards.chosen.mean().item() == pytest.approx(metrics["rewards/chosen"], rel=1e-10)
    assert rewards.rejected.mean().item() == pytest.approx(metrics["rewards/rejected"], rel=1e-10)


def test_simpo_equals_trl():
    """CPOTrainer.cpo_loss takes averages per token and returns a value for each pair."""
    cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    batch = token_batch()
    logps = pair_logps(batch)._replace(ref_chosen_logps=None, ref_rejected_logps=None)
    means = (batch.logps_ST.sum(dim=1) / batch.mask_ST.sum(dim=1)).chunk(2)
    trainer = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=BETA, label_smoothing=0.0, accelerator=SimpleNamespace(device="cpu")
    )
    theirs, chosen_rewards, rejected_rewards = cpo_trainer.CPOTrainer.cpo_loss(trainer, *means)
    ours = LOSSES["simpo"](logps, beta=BETA, simpo_gamma=0.7)
    torch.testing.assert_close(ours, theirs, **EXACT)
    assert_same(ours.sum(), theirs.sum(), batch, **EXACT)
    rewards = implicit_rewards(logps, beta=BETA)
    torch.testing.assert_close(rewards.chosen, chosen_rewards, **EXACT)
    torch.testing.assert_close(rewards.rejected, rejected_rewards, **EXACT)


def test_orpo_equals_trl_in_float32():
    """ORPOTrainer subtracts its `losses` from the NLL: the term that is minimised is their negative."""
    orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    batch = token_batch(dtype=torch.float32)
    logps = pair_logps(batch)._replace(ref_chosen_logps=None, ref_rejected_logps=None)
    means = (batch.logps_ST.sum(dim=1) / batch.mask_ST.sum(dim=1)).chunk(2)
    trainer = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    losses, chosen_rewards, rejected_rewards, _, _ = orpo_trainer.ORPOTrainer.odds_ratio_loss(trainer, *means)
    ours = LOSSES["orpo"](logps, beta=BETA)
    torch.testing.assert_close(ours, -losses, rtol=1e-6, atol=0)
    assert_same(ours.sum(), -losses.sum(), batch, rtol=1e-5, atol=1e-7)
    rewards = implicit_rewards(logps, beta=BETA)
    torch.testing.assert_close(rewards.chosen, chosen_rewards, rtol=1e-6, atol=0)
    torch.testing.assert_close(rewards.rejected, rejected_rewards, rtol=1e-6, atol=0)
