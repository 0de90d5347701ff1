import numpy as np
import pytest
import torch

from dpo_ray.learn import batched
from dpo_ray.learn.batched import score_groups
from dpo_ray.learn.layout import Group
from dpo_ray.learn.logps import Path

from . import same_weights

MANY = [Group([5] * 6, [[7, 8]] * 10), Group([9] * 300, [list(range(10, 90))]), Group([4] * 3, [[6] * n for n in (2, 40, 9)])]
GROUPS = same_weights.pair_groups(6)


def scores(name: str, dtype: torch.dtype, path: Path) -> np.ndarray:
    model = same_weights.build(name, dtype, path)
    scored = score_groups(model, GROUPS, path, max_batch_tokens=1024, pad_token_id=0)
    return np.array([completion.logps for group in scored for completion in group])


@pytest.fixture(scope="module")
def exact() -> dict[str, np.ndarray]:
    """In float64, by the models' own attention."""
    return {name: scores(name, torch.float64, Path(False, True)) for name in ("qwen2", "gemma2")}


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize(("dtype", "nats"), [(torch.float32, 2e-3), (torch.bfloat16, 0.1)], ids=str)
def test_scores_of_long_completions_are_those_of_float64(exact, name, share_prompt, dtype, nats):
    """Completions of 20-200 tokens, down to -1200 nats, the whole way from ids to sums. Measured: 5e-5 and 0.05 nats."""
    got = scores(name, dtype, Path(share_prompt, True))
    assert exact[name].min() < -1000
    assert np.abs(got - exact[name]).max() < nats


@pytest.mark.parametrize("share_prompt", [True, False])
def test_scores_of_many_completions_stay_within_the_budget_and_in_their_order(monkeypatch, share_prompt):
    path, seen = Path(share_prompt, True), []
    lay_out = batched.lay_out
    monkeypatch.setattr(batched, "lay_out", lambda *how: seen.append(lay_out(*how)) or seen[-1])
    model = same_weights.build("qwen2", torch.float32, path)
    whole = score_groups(model, MANY, path, max_batch_tokens=10**6, pad_token_id=0)
    assert len(seen) == 1
    cut = score_groups(model, MANY, path, max_batch_tokens=50, pad_token_id=0)
    sizes = [batch.input_ids_ST.numel() for batch in seen[1:]]
    assert sorted(sizes)[-2] <= 50 < sorted(sizes)[-1] == 380  # the one that exceeds it by itself goes alone
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_allclose([x.logps for x in a], [x.logps for x in b], rtol=1e-5)
