import torch

from dpo_ray.learn.losses import implicit_rewards
from tests.learn.losses.batch import swapped, two_pairs


def test_implicit_rewards_are_beta_times_the_log_ratios():
    rewards = implicit_rewards(two_pairs(), beta=0.5)
    assert rewards.chosen.tolist() == [1.0, 0.0]
    assert rewards.rejected.tolist() == [-1.0, 0.0]


def test_implicit_rewards_without_reference_are_beta_times_averages():
    rewards = implicit_rewards(two_pairs(ref_chosen_logps=None, ref_rejected_logps=None), beta=2.0)
    assert rewards.chosen.tolist() == [-5.0, -4.0]
    assert rewards.rejected.tolist() == [-20.0, -3.6]


def test_implicit_rewards_of_swapped_pairs_negate_the_margin():
    rewards, other = implicit_rewards(two_pairs(), beta=0.5), implicit_rewards(swapped(two_pairs()), beta=0.5)
    assert (rewards.chosen - rewards.rejected).tolist() == [2.0, 0.0]
    assert (other.chosen - other.rejected).tolist() == [-2.0, 0.0]


def test_implicit_rewards_are_detached():
    rewards = implicit_rewards(two_pairs(chosen_logps=torch.ones(2, requires_grad=True)), beta=0.5)
    assert not rewards.chosen.requires_grad
