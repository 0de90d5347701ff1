import math

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from dpo_ray.learn import speed
from dpo_ray.learn.speed import Flops, StepTokens

from . import tiny

LENGTHS = np.array([[10, 4, 6], [3, 1, 1], [5, 5, 2]])
STEP = [[[0], [1]], [[2], []]]  # two ranks; the second has no second micro-batch


def test_step_tokens_of_shared_prompts_by_hand():
    """Prompts 18, chosen 10, rejected 9: posed 2 * 18 + 19, computed 18 + 19."""
    assert speed.step_tokens(STEP, LENGTHS, share_prompt=True) == StepTokens(55, 37, 0, 19)


def test_step_tokens_of_separate_rows_count_padding_by_hand():
    """Rows of the first batch are 14 and 16 wide, then 4 and 4, then 10 and 7: padding 2 + 0 + 3."""
    assert speed.step_tokens(STEP, LENGTHS, share_prompt=False) == StepTokens(55, 55, 5, 19)


def test_step_tokens_of_separate_rows_pad_to_the_longest_of_a_micro_batch():
    """Pairs 0 and 1 in one batch: four rows of 16, for 14 + 16 + 4 + 4 tokens."""
    assert speed.step_tokens([[[0, 1]]], LENGTHS, share_prompt=False).padding == 4 * 16 - 38


def test_interval_metrics_by_hand():
    """Two steps in 2 s. FLOPs: (37 + 5) tokens of body at 100 and (19 + 2) of head at 10 are 4,410."""
    steps = [STEP, [[[1]], [[]]]]
    first, second = speed.interval_metrics(steps, LENGTHS, 2.0, Flops(100, 10), 44_100.0, share_prompt=True)
    shared = {"step_time_s": 1.0, "tokens_per_s": (55 + 8) / 2, "mfu": 0.05, "padding": 0.0}
    assert first == pytest.approx({**shared, "tokens_saved": 18 / 55})
    assert second == pytest.approx({**shared, "tokens_saved": 3 / 8})


def test_interval_metrics_of_separate_rows_save_nothing_and_show_padding():
    (metrics,) = speed.interval_metrics([STEP], LENGTHS, 1.0, Flops(100, 10), 1e6, share_prompt=False)
    assert metrics["tokens_saved"] == 0
    assert metrics["padding"] == 5 / 60


def matrices(model: nn.Module, *, without: tuple[str, ...]) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if not any(w in name for w in without))


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2"])
def test_token_flops_are_six_per_weight_of_body_and_of_head(name):
    """Tied, untied, and learned positions, which are looked up."""
    model = tiny.build_model(name)
    flops = speed.token_flops(model)
    assert flops.body == 6 * matrices(model, without=("embed", "wte", "wpe", "lm_head"))
    assert flops.head == 6 * tiny.VOCAB_SIZE * 32


def test_token_flops_count_the_experts_that_a_token_meets():
    """Two of four."""
    model = tiny.build_model("mixtral")
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert experts > 0
    assert speed.token_flops(model).body == 6 * (matrices(model, without=("embed", "lm_head")) - experts // 2)


def test_token_flops_of_a_linear_layer_are_what_torch_counts():
    """torch.utils.flop_counter counts matrix products; a body of them alone has no attention scores to differ by."""
    from torch.utils.flop_counter import FlopCounterMode

    layer, tokens = nn.Linear(32, 48, bias=False), torch.randn(7, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(tokens).sum().backward()
    assert counter.get_total_flops() == 6 * layer.weight.numel() * 7


def test_matmul_peak_is_a_speed_that_a_product_reaches():
    peak = speed.matmul_peak(torch.device("cpu"), torch.float32)
    assert math.isfinite(peak)
    assert peak > 1e8


def test_peak_memory_on_a_cpu_holds_what_is_freed_again():
    before = psutil.Process().memory_info().rss / speed.GIB
    held = torch.ones(2**26)  # 0.25 GiB
    del held
    assert before + 0.2 < speed.peak_memory_gib(torch.device("cpu")) < before + 4
