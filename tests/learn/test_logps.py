import math

import pytest
import torch
from torch.nn import functional

from dpo_ray.learn import logps
from dpo_ray.learn.logps import completion_logps, float32_matmul_fast_path
from dpo_ray.learn.policy import load_policy
from dpo_ray.learn.tokens import collate

from . import tiny

PAIRS = tiny.build_pairs(7, seed=1)
PROMPTS, COMPLETIONS = PAIRS.prompt_token_ids, PAIRS.chosen_token_ids
ARCHITECTURES = sorted(tiny.configs())


def score(model, prompts, completions) -> torch.Tensor:
    with torch.no_grad():
        return completion_logps(model, *collate(prompts, completions, tiny.PAD))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_completion_logps_equal_a_naive_float64_forward(policies, name):
    """Each sequence alone, full logits, float64, a Python loop. Largest relative error measured: 2e-7."""
    model64 = load_policy(policies[name], dtype=torch.float64)
    expected = [tiny.naive_logps(model64, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    got = score(load_policy(policies[name], dtype=torch.float32), PROMPTS, COMPLETIONS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_completion_logps_do_not_depend_on_padding_or_batch(policies, name):
    """Alone, in a batch, in reversed order, with 20 more columns of padding. Largest relative error measured: 3e-7."""
    model = load_policy(policies[name], dtype=torch.float32)
    in_batch = score(model, PROMPTS, COMPLETIONS)
    alone = torch.cat([score(model, [p], [c]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    torch.testing.assert_close(in_batch, alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(score(model, PROMPTS[::-1], COMPLETIONS[::-1]).flip(0), alone, rtol=1e-5, atol=0)
    ids_ST, mask_ST = collate(PROMPTS, COMPLETIONS, tiny.PAD)
    with torch.no_grad():
        wider = completion_logps(model, functional.pad(ids_ST, (0, 20), value=7), functional.pad(mask_ST, (0, 20)))
    torch.testing.assert_close(wider, alone, rtol=1e-5, atol=0)


def test_completion_logps_of_a_uniform_model_is_minus_n_log_v():
    """With a zero head every token has probability 1 / 101; three completion tokens have -3 ln 101 = -13.845."""
    model = tiny.build_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    got = score(model, [[5, 6], [5]], [[7, 8, 9], [10]])
    torch.testing.assert_close(got, torch.tensor([-3.0, -1.0]) * math.log(101))


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2"])
def test_completion_logps_attention_is_causal_without_a_mask(policies, name, monkeypatch):
    calls = []
    attention = functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        calls.append((kwargs.get("attn_mask"), kwargs["is_causal"]))
        return attention(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    score(load_policy(policies[name], dtype=torch.float32), PROMPTS, COMPLETIONS)
    assert calls == [(None, True)] * 2


def test_completion_logps_run_the_head_from_the_earliest_predicting_position_only():
    """Prompts of 3 and 4 of T = 6: the first completion token stands at 3, predicted at 2, so 6 - 2 = 4 positions."""
    model, shapes = tiny.build_model("qwen2"), []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    score(model, [[5, 6, 7], [5, 6, 7, 8]], [[9, 10], [11, 12]])
    assert shapes == [(2, 4, 32)]


def test_completion_logps_in_tiles_have_the_same_values_and_gradients(monkeypatch):
    def values_and_gradient(tile: int):
        monkeypatch.setattr(logps, "ROW_TILE", tile)
        model = tiny.build_model("llama")
        values = completion_logps(model, *collate(PROMPTS, COMPLETIONS, tiny.PAD))
        values.sum().backward()
        return values.detach(), model.lm_head.weight.grad

    for got, want in zip(values_and_gradient(3), values_and_gradient(10**6), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_completion_logps_are_float32_for_a_bfloat16_model():
    """bfloat16 logits, float32 log-softmax: as computed from the model's own logits to float32 rounding."""
    model = tiny.build_model("llama").bfloat16()
    got = score(model, PROMPTS[:1], COMPLETIONS[:1])
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(tiny.naive_logps(model, PROMPTS[0], COMPLETIONS[0]), rel=1e-6)


def test_completion_logps_without_a_prompt_raises():
    with pytest.raises(ValueError, match="position 0"):
        completion_logps(tiny.build_model("llama"), torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3).bool())


@pytest.mark.parametrize("max_error", [1e-5, 0.0])
def test_float32_matmul_fast_path_is_taken_only_if_the_probe_is_exact(monkeypatch, max_error):
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(logps, "MAX_FAST_PATH_ERROR", max_error)
    try:
        taken = float32_matmul_fast_path()
        assert torch.get_float32_matmul_precision() == ("medium" if taken else before)
        assert not (taken and max_error == 0.0)
    finally:
        torch.set_float32_matmul_precision(before)
