"""Policies whose weights are bfloat16 numbers, and pairs long enough for rounding to show.

float64, float32 and bfloat16 then compute the same function, so that only their arithmetic differs. Weights have the scale
that transformers initialises them with; rounding in bfloat16 grows with it, in a model's own forward just as in ours.
"""

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedConfig, PreTrainedModel, Qwen2Config

from dpo_ray.learn import attention
from dpo_ray.learn.layout import Group
from dpo_ray.learn.logps import Path

VOCAB_SIZE = 512


def config_of(name: str) -> PreTrainedConfig:
    size = {"vocab_size": VOCAB_SIZE, "intermediate_size": 256, "num_hidden_layers": 4, "initializer_range": 0.02}
    if name == "qwen2":  # seven query heads a key head, as in Qwen2-0.5B
        return Qwen2Config(**size, hidden_size=112, num_attention_heads=7, num_key_value_heads=1, tie_word_embeddings=True)
    # Windows in every other layer, caps, and heads of a size that is no power of 2.
    config = Gemma2Config(
        **size, hidden_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=24, query_pre_attn_scalar=24,
        sliding_window=60, attn_logit_softcapping=5.0, final_logit_softcapping=10.0,
    )  # fmt: skip
    config._attn_implementation = "eager"  # transformers' sdpa leaves the cap out
    return config


def build(name: str, dtype: torch.dtype, path: Path, device: str = "cpu") -> PreTrainedModel:
    config = config_of(name)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = model.eval().bfloat16().to(device=device, dtype=dtype)
    if path.share_prompt:
        model.set_attn_implementation(attention.NAME)
    return model


def pair_groups(num_pairs: int, seed: int = 0) -> list[Group]:
    """Return prompts of 5-60 random tokens, each with two completions of 20-200."""
    draw = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return draw.integers(3, VOCAB_SIZE, draw.integers(low, high + 1))

    return [Group(ids(5, 60), [ids(20, 200), ids(20, 200)]) for _ in range(num_pairs)]
