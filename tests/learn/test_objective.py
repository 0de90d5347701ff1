"""From rows to losses, against plain forwards a completion; what each loss computes from there is tested in losses/."""

import numpy as np
import pytest
import torch

from dpo_ray.errors import ConfigError
from dpo_ray.learn.layout import share
from dpo_ray.learn.logps import token_logps
from dpo_ray.learn.losses import LOSSES, WHOLE_BATCH, Term
from dpo_ray.learn.objective import Objective, pair_losses

from . import tiny, training

PAIRS = tiny.build_pairs(6, seed=4)
BETA = 0.3
OPTIONS = {"robust": {"label_smoothing": 0.1}, "exo_pair": {"label_smoothing": 0.01}}


@pytest.fixture
def model(policies):
    return training.build(policies["qwen2"], None)


def run(model, pairs, objective):
    with torch.no_grad():
        return pair_losses(model, pairs, objective, training.PATH, mean_chosen_tokens=1.0, pad_token_id=tiny.PAD, device="cpu")


def distributions(model, prompt, completion):
    """Log-probabilities (tokens, V) of one unpadded forward, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def tokens_of(model, prompt, completion):
    return distributions(model, prompt, completion)[range(len(completion)), completion]


def with_token_references(pairs, seed=0):
    rng = np.random.default_rng(seed)
    sides = [[-rng.exponential(4.0, len(c)) for c in side] for side in (pairs.chosen_token_ids, pairs.rejected_token_ids)]
    sums = [[float(np.sum(v)) for v in side] for side in sides]
    return pairs._replace(
        ref_chosen_logps=sums[0], ref_rejected_logps=sums[1], ref_chosen_token_logps=sides[0], ref_rejected_token_logps=sides[1]
    )


def test_pair_losses_desensitise_policy_and_reference_beyond_the_shared_length(model):
    """LD-DPO by hand: tokens beyond the shorter completion count for a quarter."""
    pairs, alpha = with_token_references(PAIRS), 0.25
    result = run(model, pairs, Objective([Term("sigmoid")], BETA, ld_alpha=alpha))
    for i, prompt in enumerate(pairs.prompt_token_ids):
        shared = min(len(pairs.chosen_token_ids[i]), len(pairs.rejected_token_ids[i]))
        ratios = []
        for ids, ref in zip(pairs[2:4], pairs[8:10], strict=True):
            ratio = tokens_of(model, prompt, ids[i]).numpy() - ref[i]
            ratios.append(ratio[:shared].sum() + alpha * ratio[shared:].sum())
        assert result.losses[i].item() == pytest.approx(np.log1p(np.exp(-BETA * (ratios[0] - ratios[1]))), rel=1e-5)
        plain = tokens_of(model, prompt, pairs.chosen_token_ids[i]).sum().item()
        assert result.chosen_logps[i].item() == pytest.approx(plain, rel=1e-5), "metrics report plain sums"


def test_pair_losses_weigh_each_pair_by_how_likely_the_policy_samples_it(model):
    """WPO by hand: the mean over tokens of log p(y) - log sum_v p(v)^2, for both completions."""
    plain = run(model, PAIRS, Objective([Term("sigmoid")], BETA)).losses
    weighed = run(model, PAIRS, Objective([Term("sigmoid")], BETA, wpo=True)).losses
    for i, prompt in enumerate(PAIRS.prompt_token_ids):
        aligned = 0.0
        for side in PAIRS[2:4]:
            p = distributions(model, prompt, side[i])
            aligned += (p[range(len(side[i])), side[i]] - (2 * p).logsumexp(-1)).mean().item()
        assert (weighed[i] / plain[i]).item() == pytest.approx(np.exp(aligned), rel=1e-4)


def test_token_overlaps_are_the_same_from_the_tiled_and_from_the_models_own_head(model):
    batch = share(tiny.pair_groups(PAIRS))
    with torch.no_grad():
        both = [token_logps(model, batch, training.PATH._replace(tiled_head=t), overlaps=True).overlaps for t in (True, False)]
    torch.testing.assert_close(*both)


def test_pair_losses_with_a_score_margin_take_the_scores_of_the_rows(model):
    scored = PAIRS._replace(chosen_score=[1.0] * 6, rejected_score=[0.25] * 6)
    term = Term("sigmoid", options={"score_margin": 2.0})
    margins = run(model, PAIRS, Objective([Term("sigmoid")], BETA)).losses.expm1().log().neg().double()
    expected = (margins - 2.0 * 0.75).neg().exp().log1p()
    torch.testing.assert_close(run(model, scored, Objective([term], BETA)).losses.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_of_every_loss_do_not_depend_on_micro_batches(model, name):
    """Global batches of 4 and 2 pairs, in one micro-batch or in several; losses that sort the batch refuse that."""
    term = Term(name, options=OPTIONS.get(name, {"token_mean": "global"} if name == "sft" else {}))
    objective = Objective([term, Term("sigmoid", 0.5)], BETA)
    whole = training.plan(PAIRS, 1, training.ONE_MICRO_BATCH, batch_size=4)
    cut = training.plan(PAIRS, 1, 22, batch_size=4)
    assert max(len(step[0]) for step in cut) > 1
    want = training.gradients(model, PAIRS, whole, objective=objective)
    if name in WHOLE_BATCH:
        with pytest.raises(ConfigError, match="sorts the whole global batch"):
            training.gradients(model, PAIRS, cut, objective=objective)
        return
    got = training.gradients(model, PAIRS, cut, objective=objective)
    assert [training.relative_error(g, w) < 1e-5 for g, w in zip(got, want, strict=True)] == [True, True]


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_reference_free_losses_need_no_reference(model, name):
    without = PAIRS._replace(ref_chosen_logps=None, ref_rejected_logps=None)
    means = [tokens_of(model, p, c).mean().item() for p, c in zip(PAIRS.prompt_token_ids, PAIRS.chosen_token_ids, strict=True)]
    optimizer, objective = training.build_adamw(model), Objective([Term(name)], BETA)
    (metrics,) = training.train(model, optimizer, without, [[[[0, 1, 2]]]], objective=objective)
    assert np.isfinite(metrics["loss"])
    assert metrics["rewards/chosen"] == pytest.approx(BETA * np.mean(means[:3]), rel=1e-5)


def test_sft_of_the_global_token_mean_is_the_mean_over_the_chosen_tokens_of_the_batch(model):
    """In one step over two micro-batches: the sum of all chosen tokens' losses divided by their number."""
    objective = Objective([Term("sft", options={"token_mean": "global"})], BETA)
    total = [tokens_of(model, p, c) for p, c in zip(PAIRS.prompt_token_ids, PAIRS.chosen_token_ids, strict=True)]
    (metrics,) = training.train(model, training.build_adamw(model), PAIRS, [[[[0, 1], [2, 3, 4, 5]]]], objective=objective)
    assert metrics["loss"] == pytest.approx(-torch.cat(total).mean().item(), rel=1e-5)
