"""Log-probabilities on one CUDA device: FlexAttention over shared prompts, and the tiled head.

The parity tests of tests/learn on CUDA, against float64 on the CPU. Needs neither Ray nor vLLM:
`python -m pytest tests/gpu/test_logps_gpu.py -m gpu --noconftest`.
"""

import math

import numpy as np
import pytest
import torch

from dpo_ray.learn import attention, flex, head
from dpo_ray.learn.batched import lay_out, score_groups
from dpo_ray.learn.layout import Group, share
from dpo_ray.learn.logps import Path, completion_logps
from dpo_ray.learn.losses import Term
from dpo_ray.learn.objective import Objective, PairRows, pair_losses
from dpo_ray.learn.policy import _decoder_layers
from dpo_ray.learn.probe import choose_path

from ..learn import same_weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = "cuda"
NAMES = ["qwen2", "gemma2"]
GROUPS = same_weights.pair_groups(8)
SHARED, SEPARATE = Path(True, True), Path(False, True)
DTYPES = pytest.mark.parametrize(("dtype", "nats"), [(torch.float32, 2e-3), (torch.bfloat16, 0.1)], ids=str)


@pytest.fixture(autouse=True)
def float32_is_float32():
    """No TF32: matrix products and FlexAttention's kernels both follow this setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def masks():
    """Returns how many block masks FlexAttention has had built, and how often one was asked for, since the test began."""
    flex.block_mask.cache_clear()

    def count() -> tuple[int, int]:
        info = flex.block_mask.cache_info()
        return info.misses, info.hits + info.misses

    return count


@pytest.fixture(scope="module")
def exact() -> dict[str, np.ndarray]:
    """float64 on the CPU, each completion in a row of its own, by the models' own attention."""
    return {name: scores(same_weights.build(name, torch.float64, SEPARATE), GROUPS, SEPARATE) for name in NAMES}


def scores(model, groups, path: Path, max_batch_tokens: int = 1024) -> np.ndarray:
    scored = score_groups(model, groups, path, max_batch_tokens=max_batch_tokens, pad_token_id=0)
    return np.array([completion.logps for group in scored for completion in group])


def gradient(model, path: Path) -> torch.Tensor:
    """Of a sum of completions with different weights, by all parameters, in float64."""
    batch = lay_out(GROUPS, path, 0).to(DEVICE)
    weights = torch.linspace(-1, 1, 2 * len(GROUPS), device=DEVICE)
    (completion_logps(model, batch, path) * weights).sum().backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def assert_same_gradient(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert ((got - want).norm() / want.norm()).item() < tolerance


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", [SHARED, SEPARATE, Path(False, False)], ids=str)
@DTYPES
def test_completion_logps_on_gpu_are_those_of_float64_on_cpu(exact, masks, name, path, dtype, nats):
    got = scores(same_weights.build(name, dtype, path, DEVICE), GROUPS, path)
    print(f"\n{name} {dtype} {path}: {np.abs(got - exact[name]).max():.2g} nats at the worst")
    assert np.abs(got - exact[name]).max() < nats
    assert (masks()[0] > 0) == path.share_prompt, "prompts are shared by FlexAttention, and it alone makes masks"


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_shared_prompts_on_gpu_are_those_of_separate_rows(masks, name):
    got = gradient(same_weights.build(name, torch.float32, SHARED, DEVICE), SHARED)
    assert masks()[0] > 0
    assert_same_gradient(got, gradient(same_weights.build(name, torch.float32, SEPARATE, DEVICE), SEPARATE), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_flex_attention_on_gpu_is_attention_group_by_group(monkeypatch, masks, name):
    model = same_weights.build(name, torch.float32, SHARED, DEVICE)
    got, got_gradient = scores(model, GROUPS, SHARED), gradient(model, SHARED)
    asked = masks()[1]
    assert asked > 0
    monkeypatch.setattr(flex, "DEVICE", "none")
    model.zero_grad()
    np.testing.assert_allclose(got, scores(model, GROUPS, SHARED), rtol=0, atol=1e-3)
    assert_same_gradient(got_gradient, gradient(model, SHARED), 1e-4)
    assert masks()[1] == asked


@pytest.mark.parametrize("size", [16, 24, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_flex_attention_passes_its_trial_on_gpu(size, dtype, softcap):
    """For the head sizes of today's models, seven query heads a key head. A failure here is a slower model, not a wrong one."""
    device = torch.device(DEVICE, torch.cuda.current_device())
    error = flex._trial_error(flex.Kind(device, dtype, (14, 2), (size, size), size**-0.5, softcap, backward=True))
    print(f"\nhead size {size}, {dtype}, softcap {softcap}: {error:.2g}")
    assert error < (1e-4 if dtype == torch.float32 else flex.MAX_TRIAL_ERROR)


@pytest.mark.parametrize("name", NAMES)
def test_completion_logps_on_gpu_depend_on_the_pair_alone(name):
    """Alone, packed with others up to other budgets, in another order, beside other completions."""
    model = same_weights.build(name, torch.float32, SHARED, DEVICE)
    alone = scores(model, [Group(g.prompt, [c]) for g in GROUPS for c in g.completions], SHARED, max_batch_tokens=1)
    for max_batch_tokens in (1, 700, 100_000):
        np.testing.assert_allclose(scores(model, GROUPS, SHARED, max_batch_tokens), alone, rtol=0, atol=1e-3)
    turned = [Group(g.prompt, g.completions[::-1]) for g in GROUPS[::-1]]
    np.testing.assert_allclose(scores(model, turned, SHARED)[::-1], alone, rtol=0, atol=1e-3)
    crowd = [Group(g.prompt, [*g.completions, [7] * 300]) for g in GROUPS]
    np.testing.assert_allclose(scores(model, crowd, SHARED).reshape(-1, 3)[:, :2].flatten(), alone, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_on_gpu_changes_nothing_and_builds_no_mask(masks, name):
    """One mask for each window of the model (gemma2 has a layer with and one without), none for the recomputation."""
    model = same_weights.build(name, torch.float32, SHARED, DEVICE)
    want = gradient(model, SHARED)
    built, asked = masks()
    assert (built, asked) == ({"qwen2": 1, "gemma2": 2}[name], 4)
    model.zero_grad()
    _decoder_layers(model, activation_checkpointing=True)
    assert_same_gradient(gradient(model, SHARED), want, 1e-5)
    assert masks() == (built, 3 * asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_on_gpu_start_at_ln_2(dtype):
    """Reference values computed without gradients, in other batches, by the same weights."""
    model = same_weights.build("qwen2", torch.bfloat16, SEPARATE, DEVICE).to(dtype)
    path = choose_path(model, max(GROUPS, key=lambda g: len(g.prompt)), pad_token_id=0)
    assert path == SHARED
    chosen, rejected = scores(model, GROUPS, path, max_batch_tokens=700).reshape(-1, 2).T
    columns = [list(column) for column in zip(*((g.prompt, *g.completions) for g in GROUPS), strict=True)]
    ids = [f"pair-{i}" for i in range(len(GROUPS))]
    rows = PairRows(ids, *columns, ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    objective = Objective([Term("sigmoid")], 0.1)
    result = pair_losses(model, rows, objective, path, mean_chosen_tokens=100.0, pad_token_id=0, device=DEVICE)
    worst = (result.losses - math.log(2)).abs().max().item()
    assert worst < {torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]


def test_own_forward_on_gpu_without_groups_is_causal_in_each_row():
    """What the hf engine and exports run, after the attention was set: no `attention`, several rows, no FlexAttention."""
    ids = torch.randint(3, same_weights.VOCAB_SIZE, (3, 300), generator=torch.Generator().manual_seed(0))
    shared = same_weights.build("qwen2", torch.float32, SHARED, DEVICE)
    own = same_weights.build("qwen2", torch.float32, SEPARATE, DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(shared(ids.to(DEVICE)).logits, own(ids.to(DEVICE)).logits, rtol=1e-4, atol=1e-4)


def test_lines_on_gpu_are_read_back_once():
    """The root of a model sharded by FSDP moves `attention` to its device; waiting for it in each layer is slow."""
    batch = share(GROUPS)
    assert batch.attention is not None
    moved = batch.attention.to(DEVICE)
    assert attention.lines(moved) == attention.lines(batch.attention)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert attention.lines(moved) == attention.lines(batch.attention)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_of_the_head_on_gpu_does_not_grow_with_tokens_times_vocabulary():
    """Forward and backward; the logits of 16,384 tokens would take 8 GiB in float32."""
    vocabulary, size = 131_072, 64
    weight = torch.randn(vocabulary, size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    def peak(tokens: int) -> int:
        hidden = torch.randn(tokens, size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(vocabulary, (tokens,), device=DEVICE)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logps = head.token_logps(hidden, targets, head.Head(weight, None, 1.0, None))
        torch.autograd.grad(logps.sum(), (hidden, weight))
        return torch.cuda.max_memory_allocated() - before

    few, many = peak(1024), peak(16_384)
    print(f"\npeak of the head: {few / 2**20:.0f} MiB for 1,024 tokens, {many / 2**20:.0f} MiB for 16,384")
    assert many < 6 * head.TILE_BYTES["cuda"]  # float32 twice, bf16 three times, the weights' gradient
    assert many - few < 64 * 2**20
