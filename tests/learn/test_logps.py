import itertools
import math

import pytest
import torch

from dpo_ray.learn import attention, head
from dpo_ray.learn.batched import lay_out
from dpo_ray.learn.layout import Group
from dpo_ray.learn.logps import Path, completion_logps, logits_in_tiles, token_logps
from dpo_ray.learn.policy import load_policy

from . import tiny

GROUPS = tiny.pair_groups(tiny.build_pairs(7, seed=1))
ARCHITECTURES = sorted(tiny.configs())
PATHS = [Path(*choice) for choice in itertools.product([True, False], repeat=2)]


def load(policies, name: str, path: Path, dtype=torch.float32):
    model = load_policy(policies[name], dtype=dtype)
    if path.share_prompt:
        model.set_attn_implementation(attention.NAME)
    return model


def score(model, groups, path: Path) -> torch.Tensor:
    with torch.no_grad():
        return completion_logps(model, lay_out(groups, path, tiny.PAD), path)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_completion_logps_equal_a_naive_float64_forward(policies, name, path):
    """Each sequence alone, full logits, float64, a Python loop. Largest relative error measured: 5e-7."""
    model64 = load_policy(policies[name], dtype=torch.float64)
    wanted = [tiny.naive_logps(model64, g.prompt, c) for g in GROUPS for c in g.completions]
    got = score(load(policies, name, path), GROUPS, path)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.tensor(wanted, dtype=torch.float64), rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("share_prompt", [True, False])
def test_completion_logps_depend_on_the_pair_alone(policies, name, share_prompt):
    """Alone, among others, in another order, beside other completions of its prompt, beside a long one that makes padding."""
    path = Path(share_prompt, tiled_head=True)
    model = load(policies, name, path)
    alone = torch.cat([score(model, [Group(g.prompt, [c])], path) for g in GROUPS for c in g.completions])
    torch.testing.assert_close(score(model, GROUPS, path), alone, rtol=1e-5, atol=0)
    turned = [Group(g.prompt, g.completions[::-1]) for g in GROUPS[::-1]]
    torch.testing.assert_close(score(model, turned, path).flip(0), alone, rtol=1e-5, atol=0)
    crowd = [Group(g.prompt, [*g.completions, [7] * 30]) for g in GROUPS]
    torch.testing.assert_close(score(model, crowd, path).view(-1, 3)[:, :2].flatten(), alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_completion_logps_have_the_gradients_of_separate_rows(policies, name):
    """Shared and tiled against the model's own padded forward. Largest relative error measured: 2e-6."""

    def gradient(path):
        model = load(policies, name, path)
        weights = torch.linspace(-1, 1, 2 * len(GROUPS))
        (completion_logps(model, lay_out(GROUPS, path, tiny.PAD), path) * weights).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    want = gradient(Path(False, False))
    assert ((gradient(Path(True, True)) - want).norm() / want.norm()).item() < 1e-5


def test_completion_logps_of_a_uniform_model_is_minus_n_log_v():
    """With a zero head every token has probability 1 / 101; three completion tokens have -3 ln 101 = -13.845."""
    model = tiny.build_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    got = score(model, [Group([5, 6], [[7, 8, 9]]), Group([5], [[10]])], Path(False, True))
    torch.testing.assert_close(got, torch.tensor([-3.0, -1.0]) * math.log(101))


def test_token_logps_stand_completion_after_completion(policies):
    path = Path(True, True)
    model = load(policies, "llama", path)
    batch = lay_out(GROUPS, path, tiny.PAD)
    with torch.no_grad():
        tokens = token_logps(model, batch, path).logps
    sums = [one.sum() for one in tokens.split(batch.lengths.tolist())]
    torch.testing.assert_close(torch.stack(sums), score(model, GROUPS, path))


def test_head_runs_on_the_positions_that_predict_completions_only(policies, monkeypatch):
    sizes = []
    tile_logits = head.tile_logits
    monkeypatch.setattr(head, "tile_logits", lambda hidden, own: sizes.append(len(hidden)) or tile_logits(hidden, own))
    score(load(policies, "qwen2", Path(True, True)), GROUPS, Path(True, True))
    assert sum(sizes) == sum(len(c) for g in GROUPS for c in g.completions)


def test_completion_logps_are_float32_for_a_bfloat16_model(policies):
    """bfloat16 logits, float32 log-softmax: as computed from the model's own logits to float32 rounding."""
    model = tiny.build_model("llama").bfloat16()
    got = score(model, [Group(GROUPS[0].prompt, GROUPS[0].completions[:1])], Path(False, True))
    assert got.dtype == torch.float32
    wanted = tiny.naive_logps(model, GROUPS[0].prompt, GROUPS[0].completions[0])
    assert got.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_logits_in_tiles_are_those_behind_the_log_probabilities(policies, path):
    model = load(policies, "gemma2", path)
    batch = lay_out(GROUPS, path, tiny.PAD)
    with torch.no_grad():
        logits = torch.cat(list(logits_in_tiles(model, batch, path, rows=3)))
        tokens = token_logps(model, batch, path).logps
    torch.testing.assert_close(logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0], tokens)
