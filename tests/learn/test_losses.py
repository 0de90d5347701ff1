import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from dpo_ray.learn.losses import sigmoid_loss

# beta 0.5. Pair 0: rewards 0.5 * (-10 + 12) = 1 and 0.5 * (-20 + 18) = -1, margin 2. Pair 1: policy == reference.
BETA = 0.5
CHOSEN, REJECTED = torch.tensor([-10.0, -7.0]), torch.tensor([-20.0, -9.0])
REF_CHOSEN, REF_REJECTED = torch.tensor([-12.0, -7.0]), torch.tensor([-18.0, -9.0])


def test_sigmoid_loss_matches_hand_numbers():
    """-log sigmoid(2) = ln(1 + e^-2) = 0.126928; at margin 0 the loss is ln 2."""
    result = sigmoid_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, beta=BETA)
    torch.testing.assert_close(result.losses, torch.tensor([0.126928, math.log(2)]), rtol=1e-5, atol=0)
    assert result.chosen_rewards.tolist() == [1.0, 0.0]
    assert result.rejected_rewards.tolist() == [-1.0, 0.0]


def test_sigmoid_loss_swapped_pair_negates_margin():
    """ln(1 + e^2) = 2.126928."""
    result = sigmoid_loss(REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN, beta=BETA)
    assert (result.chosen_rewards - result.rejected_rewards).tolist() == [-2.0, 0.0]
    torch.testing.assert_close(result.losses, torch.tensor([2.126928, math.log(2)]), rtol=1e-5, atol=0)


def test_sigmoid_loss_gradient_raises_chosen_and_lowers_rejected():
    """d loss / d chosen = -beta * sigmoid(-margin): -0.5 * 0.119203 and -0.5 * 0.5; the opposite for rejected."""
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    sigmoid_loss(chosen, rejected, REF_CHOSEN, REF_REJECTED, beta=BETA).losses.sum().backward()
    expected = torch.tensor([-0.0596015, -0.25])
    torch.testing.assert_close(chosen.grad, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(rejected.grad, -expected, rtol=1e-5, atol=0)


def test_sigmoid_loss_one_nat_on_reference_moves_margin_by_beta():
    """Margin 2 - 0.5 = 1.5, loss ln(1 + e^-1.5) = 0.201413."""
    result = sigmoid_loss(CHOSEN, REJECTED, REF_CHOSEN + 1, REF_REJECTED, beta=BETA)
    assert result.losses[0].item() == pytest.approx(0.201413, rel=1e-5)


def test_sigmoid_loss_rewards_are_detached():
    result = sigmoid_loss(CHOSEN.clone().requires_grad_(), REJECTED, REF_CHOSEN, REF_REJECTED, beta=BETA)
    assert result.losses.requires_grad
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


def test_sigmoid_loss_equals_trl():
    """TRL's own `_compute_loss` on the same numbers, with a model that returns our sums as one token each."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    logps_S1 = torch.cat([CHOSEN, REJECTED])[:, None]
    zeros_S1 = torch.zeros_like(logps_S1)
    outputs = SimpleNamespace(log_probs=logps_S1, entropy=zeros_S1, mean_logits=zeros_S1, is_top1=zeros_S1.bool())
    same = lambda value: value
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=BETA,
        use_weighting=False,
    )
    inputs = {
        "input_ids": torch.ones(4, 2, dtype=torch.int64),
        "attention_mask": torch.ones(4, 2, dtype=torch.int64),
        "completion_mask": torch.tensor([[0, 1]] * 4),
        "ref_chosen_logps": REF_CHOSEN,
        "ref_rejected_logps": REF_REJECTED,
    }
    trl_loss = dpo_trainer.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    ours = sigmoid_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, beta=BETA)
    torch.testing.assert_close(ours.losses.mean(), trl_loss, rtol=1e-6, atol=0)
    assert trainer._metrics["eval"]["rewards/margins"] == [(ours.chosen_rewards - ours.rejected_rewards).mean().item()]
