"""The grouped attention against one dense softmax over the whole row, with a mask made token by token."""

from types import SimpleNamespace

import pytest
import torch

from dpo_ray.learn import attention
from dpo_ray.learn.layout import Group, share

GROUPS = [Group([1] * 5, [[1] * 4, [1] * 6, [1]]), Group([1], [[1] * 3]), Group([1] * 3, [[1], [1] * 2])]
BATCH = share(GROUPS)
HEADS, KEY_HEADS, SIZE = 4, 2, 8
MODULE = SimpleNamespace()


def seen(batch, window):
    """True where token q sees token k, from the definition: same prompt, not another completion, not later, not too far."""
    places = []
    for number, (start, prompt, at, length) in enumerate(batch.attention[0, 0].tolist()):
        places += [(start, None, p) for p in range(prompt) if number == 0 or batch.attention[0, 0, number - 1, 0] != start]
        places += [(start, at, prompt + i) for i in range(length)]
    return torch.tensor(
        [
            [
                own == other and branch in (None, mine) and 0 <= here - there < (window or 1000)
                for other, branch, there in places
            ]
            for own, mine, here in places
        ]
    )


def dense(query, key, value, mask, scaling, softcap):
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("max_dense", [0, 512], ids=["blocks", "at_once"])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_shared_prompt_attention_is_dense_attention_under_the_mask(monkeypatch, max_dense, window, softcap):
    monkeypatch.setattr(attention, "MAX_DENSE", max_dense)
    torch.manual_seed(0)
    tokens = BATCH.input_ids_ST.shape[1]
    q = torch.randn(1, HEADS, tokens, SIZE, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, KEY_HEADS, tokens, SIZE, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got, _ = attention.shared_prompt_attention(
        MODULE, q, k, v, BATCH.attention, scaling=0.3, softcap=softcap, sliding_window=window
    )
    want = dense(q, k, v, seen(BATCH, window), 0.3, softcap)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), direction), torch.autograd.grad(want, (q, k, v), direction), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_shared_prompt_attention_without_groups_is_causal_in_each_row():
    torch.manual_seed(0)
    q = torch.randn(2, HEADS, 7, SIZE, dtype=torch.float64)
    k, v = (torch.randn(2, KEY_HEADS, 7, SIZE, dtype=torch.float64) for _ in range(2))
    got, _ = attention.shared_prompt_attention(MODULE, q, k, v, None, scaling=0.3)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(got, dense(q, k, v, causal, 0.3, None), rtol=1e-10, atol=1e-12)


def test_shared_prompt_attention_refuses_what_it_does_not_compute():
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(NotImplementedError, match="s_aux"):
        attention.shared_prompt_attention(MODULE, q, q, q, None, s_aux=torch.zeros(1))
