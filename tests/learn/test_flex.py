"""The path for CUDA, as far as a CPU can show it: masks, lengths, caches; kernels as torch's own unfused computation of them.

FlexAttention refuses gradients on CPUs for want of a fused kernel. Here it is compiled for `aot_eager`, which has none on
any device, so that the backward of the same graph runs too.
"""

import functools
import logging

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.attention import flex_attention as torch_flex
from transformers import Gemma2Config, Gemma2ForCausalLM

from dpo_ray.learn import attention, flex
from dpo_ray.learn.layout import Group, share
from dpo_ray.learn.logps import Path, completion_logps
from dpo_ray.learn.probe import choose_path

from . import tiny

CPU = torch.device("cpu")
CACHES = flex.block_mask, flex.kernel, flex._passes_trial


def random_groups(seed: int, num_groups: int, longest: int) -> list[Group]:
    draw = np.random.default_rng(seed)
    sizes = [draw.integers(1, longest, 1 + draw.integers(1, 4)) for _ in range(num_groups)]
    prompts_and_completions = [[draw.integers(3, tiny.VOCAB_SIZE, size) for size in group] for group in sizes]
    return [Group(prompt, completions) for prompt, *completions in prompts_and_completions]


def lines_of(groups: list[Group]) -> tuple[flex.Lines, int]:
    batch = share(groups)
    assert batch.attention is not None
    return attention.lines(batch.attention), batch.input_ids_ST.shape[1]


def forget() -> None:
    for cached in CACHES:
        cached.cache_clear()


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(flex, "DEVICE", "cpu")
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    forget()
    yield
    forget()


@pytest.mark.parametrize("window", [None, 1, 3, 70, 200])
@pytest.mark.parametrize(("num_groups", "longest"), [(1, 4), (3, 40), (6, 300), (40, 20)])
@pytest.mark.parametrize("behind", [0, 50])
def test_block_mask_is_the_mask_of_the_grouped_attention(num_groups, longest, window, behind):
    """Token by token that of `attention._bias`, and block by block what torch finds by looking at all tokens."""
    groups = random_groups(num_groups, num_groups, longest)
    lines, num_tokens = lines_of(groups)
    num_tokens += behind
    mask = flex.block_mask(lines, num_tokens, window, CPU)
    sizes = [(len(g.prompt), tuple(len(c) for c in g.completions)) for g in groups]
    own = [attention._bias(*size, window, torch.float32, CPU).exp() for size in sizes]
    wanted = torch.block_diag(*own, torch.eye(behind)).bool()
    seen = torch_flex.create_mask(mask.mask_mod, 1, 1, num_tokens, num_tokens, device="cpu")
    assert torch.equal(seen[0, 0], wanted)
    by_looking = torch_flex.create_block_mask(mask.mask_mod, 1, 1, num_tokens, num_tokens, device="cpu")
    assert mask.shape == by_looking.shape
    for part in ("kv", "full_kv", "q", "full_q"):
        counts, indices = getattr(mask, f"{part}_num_blocks"), getattr(mask, f"{part}_indices")
        assert torch.equal(counts, getattr(by_looking, f"{part}_num_blocks"))
        assert torch.equal(indices, getattr(by_looking, f"{part}_indices"))
        assert (counts.dtype, indices.dtype) == (torch.int32, torch.int32)


def test_block_mask_has_whole_blocks_and_skips_what_nobody_sees():
    """Prompt of 256, completions of 128: 4 blocks a group; 4 on the diagonal are partial, 5 below it whole, the rest unseen."""
    lines, num_tokens = lines_of([Group([1] * 256, [[1] * 128, [1] * 128])] * 2)
    mask = flex.block_mask(lines, num_tokens, None, CPU)
    assert mask.full_kv_num_blocks is not None
    assert mask.kv_num_blocks.flatten().tolist() == [1] * 8
    assert mask.full_kv_num_blocks.flatten().tolist() == [0, 1, 2, 2] * 2


@pytest.mark.parametrize(
    ("heads", "softcap", "window"), [((4, 4), None, None), ((6, 2), None, 30), ((4, 2), 2.0, None), ((4, 2), 2.0, 30)]
)
def test_flex_attention_is_the_grouped_attention(monkeypatch, on_cpu, heads, softcap, window):
    """Output and gradients in float32; heads of 24 and 16 numbers; 493 tokens."""
    batch = share(random_groups(5, 5, 90))
    tokens = batch.input_ids_ST.shape[1]
    torch.manual_seed(0)
    shapes = [(heads[0], 24), (heads[1], 24), (heads[1], 16)]
    q, k, v = (torch.randn(1, count, tokens, size, requires_grad=True) for count, size in shapes)
    direction = torch.randn(1, tokens, heads[0], 16)

    def attend():
        how = {"scaling": 0.3, "softcap": softcap, "sliding_window": window}
        out, _ = attention.shared_prompt_attention(torch.nn.Module(), q, k, v, batch.attention, **how)
        return out, *torch.autograd.grad(out, (q, k, v), direction)

    got = attend()
    assert flex.block_mask.cache_info().misses == 1
    monkeypatch.setattr(flex, "DEVICE", "cuda")
    want = attend()
    assert flex.block_mask.cache_info().hits + flex.block_mask.cache_info().misses == 1
    assert got[0].is_contiguous()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_flex_attention_is_compiled_once_for_all_lengths_and_windows(on_cpu):
    """Once without gradients and once for inference mode, whose tensors are of another kind; 32 to 1,737 tokens."""
    before = counters["stats"]["unique_graphs"]
    for inference in (False, True):
        for seed, longest, window in [(1, 100, None), (2, 5, None), (3, 90, 50), (4, 200, 50)]:
            lines, tokens = lines_of(random_groups(seed, 4, longest))
            with torch.no_grad(), torch.inference_mode(inference):
                q, k = torch.randn(1, 4, tokens, 16), torch.randn(1, 2, tokens, 16)
                flex.attend(q, k, k, lines, 0.25, None, window)
    assert counters["stats"]["unique_graphs"] == before + 2


def test_flex_attention_compiles_for_a_second_scale_and_cap(on_cpu):
    """Torch makes numbers symbolic when they change, which FlexAttention cannot compile."""
    lines, tokens = lines_of(random_groups(1, 4, 60))
    q, k = torch.randn(1, 4, tokens, 16), torch.randn(1, 2, tokens, 16)
    outputs = [flex.attend(q, k, k, lines, scale, cap, None) for scale, cap in [(0.25, None), (0.5, 2.0), (0.5, 3.0)]]
    assert len({out.sum().item() for out in outputs}) == 3


def gemma2():
    """Windows of 30 in every other layer and none in the rest, soft-capping, two query heads a key head."""
    size = {
        "hidden_size": 64,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 4,
        "max_position_embeddings": 512,
    }
    config = Gemma2Config(**{**tiny.GEMMA, **size, "sliding_window": 30, "attn_logit_softcapping": 1.0})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return Gemma2ForCausalLM(config).eval()


def test_mask_is_built_once_a_batch_for_all_layers_and_their_recomputation(monkeypatch, on_cpu):
    """Two windows, four layers, activation checkpointing whose forward the trial runs in: two masks, the same gradients."""
    batch = share(random_groups(3, 3, 60))

    def gradient(checkpointed):
        model = gemma2()
        model.set_attn_implementation(attention.NAME)
        if checkpointed:
            for i, layer in enumerate(model.model.layers):
                model.model.layers[i] = checkpoint_wrapper(layer)
        completion_logps(model, batch, Path(True, True)).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    got = gradient(checkpointed=True)
    assert flex.block_mask.cache_info().misses == 2
    assert flex.block_mask.cache_info().hits == 4 * 2 - 2
    monkeypatch.setattr(flex, "DEVICE", "cuda")
    want = gradient(checkpointed=False)
    assert ((got - want).norm() / want.norm()).item() < 1e-5
    assert flex.block_mask.cache_info().hits == 4 * 2 - 2


def test_mask_of_scoring_serves_training(on_cpu):
    """Built in inference mode, found by the contents of `attention`, used where gradients are recorded."""
    batch = share(random_groups(3, 3, 60))
    model = gemma2()
    model.set_attn_implementation(attention.NAME)
    with torch.inference_mode():
        scored = completion_logps(model, batch, Path(True, True)).clone()
    assert batch.attention is not None
    again = completion_logps(model, batch._replace(attention=batch.attention.clone()), Path(True, True))
    again.sum().backward()
    assert flex.block_mask.cache_info().misses == 2
    torch.testing.assert_close(again.detach(), scored)


@pytest.mark.parametrize("failure", ["compile", "wrong"])
def test_attention_runs_group_by_group_where_the_trial_fails(monkeypatch, on_cpu, caplog, failure):
    """The kernel does not compile, or computes something else: prompts are shared all the same, exactly."""

    def no_compiler(*args, **kwargs):
        raise RuntimeError("cannot find a C compiler")

    if failure == "compile":
        monkeypatch.setattr(torch, "compile", no_compiler)
    else:
        monkeypatch.setattr(flex, "kernel", lambda scale, softcap: lambda q, k, v, mask: torch.zeros_like(q) * q)
    group = random_groups(2, 1, 60)[0]
    with caplog.at_level(logging.WARNING):
        assert choose_path(gemma2(), group, pad_token_id=tiny.PAD) == Path(share_prompt=True, tiled_head=True)
    assert flex.block_mask.cache_info().misses == 0


def test_runs_only_where_the_kernels_do(monkeypatch, on_cpu):
    def runs(size, dtype, value_size=None):
        q, v = (torch.zeros(1, 2, 10, n, dtype=dtype) for n in (size, value_size or size))
        return flex.runs(q, q, v, 0.25, None)

    assert runs(16, torch.bfloat16)
    assert not runs(8, torch.float32)
    assert not runs(16, torch.float32, value_size=8)
    assert not runs(16, torch.float64)
    monkeypatch.setattr(flex, "DEVICE", "cuda")
    assert not runs(16, torch.bfloat16)
