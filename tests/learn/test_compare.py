import pytest
import torch

from dpo_ray.learn import attention
from dpo_ray.learn.compare import compare_completions
from dpo_ray.learn.logps import Path

from . import tiny


@pytest.fixture(scope="module")
def models():
    made = tiny.build_model("llama", seed=0), tiny.build_model("llama", seed=1)
    for model in made:
        model.set_attn_implementation(attention.NAME)
    return made


def naive_kl(policy, reference, prompt, completion):
    """Position by position, in float64, from one unpadded forward of each."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logps, ref_logps = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (policy, reference))
    places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return sum((logps[t].exp() * (logps[t] - ref_logps[t])).sum().item() for t in places)


@pytest.mark.parametrize("max_batch_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("paths", [[Path(True, True)] * 2, [Path(False, True), Path(True, False)]], ids=["same", "mixed"])
def test_compare_completions_is_one_plain_float64_forward_a_row(models, max_batch_tokens, paths):
    """Whatever stands in the batch beside it. Measured error: 2e-6 of the value."""
    groups = tiny.pair_groups(tiny.build_pairs(12, seed=5))
    compared = compare_completions(*models, groups, paths, max_batch_tokens=max_batch_tokens, pad_token_id=tiny.PAD)
    rows = [
        (found, g.prompt, c) for of, g in zip(compared, groups, strict=True) for found, c in zip(of, g.completions, strict=True)
    ]
    assert len(rows) == 24
    for found, prompt, completion in rows:
        assert found.policy_logps == pytest.approx(tiny.naive_logps(models[0], prompt, completion), rel=1e-5)
        assert found.ref_logps == pytest.approx(tiny.naive_logps(models[1], prompt, completion), rel=1e-5)
        assert found.kl == pytest.approx(naive_kl(*models, prompt, completion), rel=1e-5)


def test_compare_completions_of_a_policy_with_itself_has_no_kl(models):
    groups = tiny.pair_groups(tiny.build_pairs(4))
    (compared, *_) = compare_completions(
        models[0], models[0], groups, [Path(True, True)] * 2, max_batch_tokens=64, pad_token_id=tiny.PAD
    )
    assert [c.kl for c in compared] == [0.0] * 2
    assert all(c.policy_logps == c.ref_logps for c in compared)
