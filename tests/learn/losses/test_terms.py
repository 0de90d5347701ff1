import pytest
import torch

from dpo_ray.errors import ConfigError
from dpo_ray.learn.losses import (
    LOSSES,
    WHOLE_BATCH,
    PairLogps,
    Term,
    check_whole_batch,
    needs_mean_chosen_tokens,
    needs_reference,
    needs_scores,
    total_loss,
)
from dpo_ray.learn.losses.pairwise import ipo, sigmoid
from dpo_ray.learn.losses.reference_free import sft
from tests.learn.losses.batch import pair_logps, token_batch, two_pairs

BETA = 0.5
OPTIONS = {"robust": {"label_smoothing": 0.1}, "exo_pair": {"label_smoothing": 0.001}, "sft": {"token_mean": "global"}}
PARTS = (slice(0, 1), slice(1, 3), slice(3, 5))


def rows(logps: PairLogps, part: slice) -> PairLogps:
    return PairLogps(*(None if column is None else column[part] for column in logps))


def test_total_loss_is_the_weighted_sum_of_its_terms():
    terms = [Term("sigmoid", 0.5), Term("ipo", 2.0), Term("sft", 0.1)]
    expected = 0.5 * sigmoid(two_pairs(), beta=BETA) + 2 * ipo(two_pairs(), beta=BETA) + 0.1 * sft(two_pairs())
    torch.testing.assert_close(total_loss(terms, two_pairs(), beta=BETA), expected, rtol=1e-12, atol=0)


def test_total_loss_hands_each_term_its_options():
    terms = [Term("sigmoid", 1.0, {"score_margin": 0.4, "label_smoothing": 0.1})]
    expected = sigmoid(two_pairs(), beta=BETA, score_margin=0.4, label_smoothing=0.1)
    torch.testing.assert_close(total_loss(terms, two_pairs(), beta=BETA), expected, rtol=0, atol=0)


def test_total_loss_multiplies_by_the_weights_of_pairs():
    weights = torch.tensor([0.5, 0.0], dtype=torch.float64)
    losses = total_loss([Term("sigmoid")], two_pairs(), beta=BETA, pair_weights=weights)
    torch.testing.assert_close(losses, sigmoid(two_pairs(), beta=BETA) * weights, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - WHOLE_BATCH))
def test_sum_over_micro_batches_does_not_depend_on_the_cut(name):
    """Value and gradient of the sum over pairs divided by the global number of pairs, for one part and for three."""
    batch, terms = token_batch(), [Term(name, 0.7, OPTIONS.get(name, {}))]
    logps = pair_logps(batch)
    mean_chosen_tokens = logps.chosen_tokens.double().mean().item()
    total = lambda part: total_loss(terms, rows(logps, part), beta=BETA, mean_chosen_tokens=mean_chosen_tokens).sum()
    whole = total(slice(None)) / 5
    cut = torch.stack([total(part) for part in PARTS]).sum() / 5
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=0)
    whole_gradient, cut_gradient = (torch.autograd.grad(loss, batch.logps_ST, retain_graph=True)[0] for loss in (whole, cut))
    torch.testing.assert_close(cut_gradient, whole_gradient, rtol=1e-12, atol=1e-15)


def test_sft_global_mean_is_over_the_tokens_of_all_micro_batches():
    logps = pair_logps(token_batch())
    tokens = logps.chosen_tokens.sum().item()
    losses = [
        total_loss([Term("sft", 1.0, {"token_mean": "global"})], rows(logps, part), beta=BETA, mean_chosen_tokens=tokens / 5)
        for part in PARTS
    ]
    torch.testing.assert_close(torch.cat(losses).sum() / 5, -logps.chosen_logps.sum() / tokens, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_needs_reference_is_what_the_loss_reads(name):
    """Without reference, exactly the losses that say so can be computed."""
    terms = [Term(name, 1.0, OPTIONS.get(name, {}))]
    logps = two_pairs(ref_chosen_logps=None, ref_rejected_logps=None)
    if needs_reference(terms):
        with pytest.raises(AssertionError, match="reference"):
            total_loss(terms, logps, beta=BETA, mean_chosen_tokens=3.5)
    else:
        assert total_loss(terms, logps, beta=BETA, mean_chosen_tokens=3.5).isfinite().all()


def test_needs_of_a_sum_are_those_of_any_term():
    assert needs_reference([Term("sft"), Term("sigmoid")])
    assert not needs_reference([Term("sft"), Term("simpo")])
    assert needs_scores([Term("sft"), Term("sigmoid", 1.0, {"score_margin": 0.1})])
    assert not needs_scores([Term("sigmoid", 1.0, {"score_margin": 0.0})])
    assert needs_mean_chosen_tokens([Term("sigmoid"), Term("sft", 1.0, {"token_mean": "global"})])
    assert not needs_mean_chosen_tokens([Term("sft", 1.0, {"token_mean": "completion"})])


@pytest.mark.parametrize("name", sorted(WHOLE_BATCH))
@pytest.mark.parametrize(("world_size", "micro_batches"), [(2, 1), (1, 2)])
def test_sorting_loss_on_a_cut_batch_is_refused(name, world_size, micro_batches):
    terms = [Term("sigmoid"), Term(name)]
    with pytest.raises(ConfigError, match=f"{name} sorts the whole global batch.*{world_size} workers.*{micro_batches} micro"):
        check_whole_batch(terms, world_size=world_size, micro_batches=micro_batches)


def test_whole_batch_check_passes_one_micro_batch_and_losses_of_pairs():
    check_whole_batch([Term("aot")], world_size=1, micro_batches=1)
    check_whole_batch([Term("sigmoid"), Term("sft")], world_size=8, micro_batches=4)
