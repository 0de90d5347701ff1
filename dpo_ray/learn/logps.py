"""Log-probabilities of completions: the one definition, used by the reference stage and by training.

In: a causal language model and a batch padded on the right. Out: one sum in nats per sequence.
Invariant: a sequence's value depends neither on padding nor on the other sequences of its batch, up to rounding.

Shapes: S sequences, T tokens, K kept positions (the last ones), V vocabulary.
"""

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

ROW_TILE = 1024
"""Positions whose logits exist in float32 at one time."""
IGNORED = -100
MAX_FAST_PATH_ERROR = 1e-5


def completion_logps(model: PreTrainedModel, input_ids_ST: torch.Tensor, completion_mask_ST: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each completion given its prompt: (S,) float32, sums in nats.

    No attention mask is passed: padding stands on the right, where a causal model's completion tokens do not see it,
    and without a mask attention runs its fast causal kernel. The head runs only from the batch's earliest predicting
    position on. The log-softmax is float32 whatever the model computes in.

    Args:
        input_ids_ST: int64, padded on the right; on the model's device.
        completion_mask_ST: bool, True on the tokens to sum over.

    Raises:
        ValueError: a completion starts at position 0, where nothing predicts it.
    """
    logits_SKV, targets_SK = predictions(model, input_ids_ST, completion_mask_ST)
    return per_token_logps(logits_SKV.flatten(0, 1), targets_SK.flatten()).view_as(targets_SK).sum(1)


def predictions(
    model: PreTrainedModel, input_ids_ST: torch.Tensor, completion_mask_ST: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits (S, K, V) of the kept positions and the token that each predicts, IGNORED outside completions."""
    num_tokens = input_ids_ST.shape[1]
    num_before = int((completion_mask_ST.any(0).cumsum(0) == 0).sum())
    if num_before == 0:
        raise ValueError("a completion starts at position 0; expected at least one prompt token before it")
    num_kept = min(num_tokens - num_before + 1, num_tokens)
    # The model's own forward, not its parts: the root's FSDP hooks, logit scaling and soft-capping belong to it.
    logits_SKV = model(input_ids=input_ids_ST, logits_to_keep=num_kept, use_cache=False).logits
    # Position t predicts token t + 1; the last one predicts nothing that we have.
    targets_ST = input_ids_ST.masked_fill(~completion_mask_ST, IGNORED)
    targets_SK = functional.pad(targets_ST[:, num_tokens - num_kept + 1 :], (0, 1), value=IGNORED)
    return logits_SKV, targets_SK


def per_token_logps(logits_RV: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return float32 log-probabilities of `targets` (R,), 0 where ignored, without a float32 copy of all logits."""
    tiles = []
    for logits_tile, target_tile in zip(logits_RV.split(ROW_TILE), targets.split(ROW_TILE), strict=True):
        if torch.is_grad_enabled() and logits_RV.requires_grad:
            # Backward computes the tile's float32 softmax again instead of keeping it.
            tiles.append(checkpoint(_tile_logps, logits_tile, target_tile, use_reentrant=False))
        else:
            tiles.append(_tile_logps(logits_tile, target_tile))
    return torch.cat(tiles)


def _tile_logps(logits_RV: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -functional.cross_entropy(logits_RV.float(), targets, reduction="none", ignore_index=IGNORED)


def float32_matmul_fast_path() -> bool:
    """Let this process use oneDNN for float32 matrix products where a probe shows that it loses no precision.

    On AVX-512 that is about twice as fast and still float32. On CPUs with AMX the same setting rounds to bfloat16, on
    GPUs to TF32 or less: there it is left alone. Returns whether it was switched on, for the whole process.
    """
    if torch.cuda.is_available():
        return False
    before = torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 1024, generator=generator) for _ in range(2))
    exact = left.double() @ right.double().T
    torch.set_float32_matmul_precision("medium")
    error = ((left @ right.T).double() - exact).norm() / exact.norm()
    if error < MAX_FAST_PATH_ERROR:
        return True
    torch.set_float32_matmul_precision(before)
    return False
