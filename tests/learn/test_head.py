import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_ray.learn import head
from dpo_ray.learn.head import Head, token_logps

from . import tiny

POSITIONS, HIDDEN, VOCABULARY = 11, 6, 23


def inputs(dtype, *, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype, requires_grad=True)
    vector = torch.randn(VOCABULARY, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, vector, torch.randint(0, VOCABULARY, (POSITIONS,))


def plain(hidden, weight, bias, targets, scale, softcap):
    logits = hidden @ weight.T * scale if bias is None else (hidden @ weight.T + bias) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("keep_bytes", [0, 10**9], ids=["computed_again", "kept"])
@pytest.mark.parametrize("tile_rows", [1, 4, 1000])
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.25, None), (True, 2.0, 3.0)])
def test_token_logps_in_tiles_equal_plain_autograd(monkeypatch, keep_bytes, tile_rows, bias, scale, softcap):
    monkeypatch.setattr(head, "KEEP_BYTES", keep_bytes)
    monkeypatch.setattr(head, "tile_rows", lambda num_tokens, device: tile_rows)
    hidden, weight, vector, targets = inputs(torch.float64, bias=bias)
    got = token_logps(hidden, targets, Head(weight, vector, scale, softcap))
    want = plain(hidden, weight, vector, targets, scale, softcap)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    direction, leaves = torch.randn(POSITIONS, dtype=torch.float64), [x for x in (hidden, weight, vector) if x is not None]
    for a, b in zip(torch.autograd.grad(got, leaves, direction), torch.autograd.grad(want, leaves, direction), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_token_logps_with_a_frozen_head_gives_hidden_states_their_gradient_alone():
    hidden, weight, _, targets = inputs(torch.float64, bias=False)
    frozen = weight.detach()
    (got,) = torch.autograd.grad(token_logps(hidden, targets, Head(frozen, None, 1.0, None)).sum(), [hidden])
    (want,) = torch.autograd.grad(plain(hidden, frozen, None, targets, 1.0, None).sum(), [hidden])
    torch.testing.assert_close(got, want)


def test_token_logps_of_bfloat16_are_a_float32_softmax_of_bfloat16_logits():
    hidden, weight, _, targets = inputs(torch.bfloat16, bias=False)
    got = token_logps(hidden, targets, Head(weight, None, 1.0, None))
    assert got.dtype == torch.float32
    want = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got.sum().backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)


def test_token_logps_of_no_positions_are_none():
    hidden, weight, _, targets = inputs(torch.float32, bias=False)
    assert token_logps(hidden[:0], targets[:0], Head(weight, None, 1.0, None)).shape == (0,)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes, in bytes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]
        self.size = max([self.size, *(t.numel() * t.element_size() for t in made)])
        return out


def test_token_logps_make_no_tensor_of_positions_times_vocabulary():
    """2,048 positions x 65,536 tokens are 512 MiB of float32 logits; a tile has 32 MiB."""
    hidden = torch.randn(2048, 8, requires_grad=True)
    weight = torch.randn(65_536, 8, requires_grad=True)
    with Largest() as largest:
        token_logps(hidden, torch.zeros(2048, dtype=torch.int64), Head(weight, None, 1.0, None)).sum().backward()
    assert largest.size <= head.TILE_BYTES["cpu"]


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "phi", "gpt2"])
def test_head_of_a_model_gives_its_own_logits(name):
    model = tiny.build_model(name)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(head.tile_logits(hidden, head.head_of(model)), model(input_ids=ids).logits[0])


def test_head_of_a_model_without_a_linear_head_is_refused():
    model = tiny.build_model("llama")
    model.set_output_embeddings(torch.nn.Identity())
    with pytest.raises(NotImplementedError, match="Identity"):
        head.head_of(model)
