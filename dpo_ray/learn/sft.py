"""Supervised fine-tuning steps: what the loop of `steps` minimises when its rows are conversations.

In: a policy, an optimizer, a plan and a way to get conversations. Out: metrics of every step.

Shapes: B conversations, K completion tokens of a batch, N of them an assistant's.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_ray.learn.batched import lay_out
from dpo_ray.learn.batches import Step
from dpo_ray.learn.layout import Batch, Group, TokenIds, keep
from dpo_ray.learn.logps import Path, completion_sums, token_logps
from dpo_ray.learn.steps import Goal, Losses, take_steps

MEANS = ("loss",)


class ConversationRows(NamedTuple):
    """Rows of the TURNS table, one entry per row in every column."""

    turns_id: Sequence[str]
    prompt_token_ids: Sequence[TokenIds]
    """Up to where the first of the row's assistant turns begins."""
    completion_token_ids: Sequence[TokenIds]
    """From there to the end of the last one, with what others say in between."""
    assistant_positions: Sequence[TokenIds]
    """Positions in the completion that an assistant's turn has, ascending."""


NO_CONVERSATION = ConversationRows(["none"], [[0]], [[0]], [[0]])


def sft_steps(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    fetch: Callable[[list[int]], ConversationRows],
    plan: Sequence[Step],
    path: Path,
    lengths: np.ndarray,
    num_targets: np.ndarray,
    *,
    mean_over: Literal["tokens", "turns"] = "tokens",
    learning_rate_for: Callable[[int], float],
    max_grad_norm: float,
    pad_token_id: int,
    device: torch.device | str,
    start_step: int = 0,
    read_after: Callable[[int], bool] = lambda steps: True,
) -> Iterator[list[dict[str, float]]]:
    """`steps.take_steps` over conversations: the loss is the mean -log p of assistant tokens, in nats.

    Args:
        optimizer, fetch, plan, learning_rate_for, max_grad_norm, start_step, read_after: as `take_steps` has them.
        path: what `probe.choose_path` found for the model.
        lengths: (rows, 2) tokens of prompt and completion of every row.
        num_targets: (rows,) assistant tokens of every row.
        mean_over: `tokens`, the mean over all assistant tokens of the global batch, as TRL's SFTTrainer has it; or
            `turns`, the mean over its rows of each row's mean, so that a long answer counts as much as a short one.

    Raises:
        ConfigError, NonFiniteLossError: as `take_steps` raises them.
    """

    def forward(rows: ConversationRows, batch: list[int], first: bool) -> Losses:
        laid = lay_out_turns(rows, path, pad_token_id).to(device)
        sums = completion_sums(token_logps(model, laid, path).logps, laid.lengths)
        divisor = float(num_targets[batch].mean()) if mean_over == "tokens" else laid.lengths.to(sums)
        losses = -sums / divisor
        return Losses(losses, losses.detach().sum(dtype=torch.float64)[None])

    yield from take_steps(
        model,
        optimizer,
        fetch,
        plan,
        Goal(forward, MEANS, NO_CONVERSATION, "rows"),
        lengths,
        learning_rate_for=learning_rate_for,
        max_grad_norm=max_grad_norm,
        device=device,
        start_step=start_step,
        read_after=read_after,
    )


def lay_out_turns(rows: ConversationRows, path: Path, pad_token_id: int) -> Batch:
    """Make a batch whose only targets are assistant tokens: no other position reaches the head."""
    groups = [Group(p, [c]) for p, c in zip(rows.prompt_token_ids, rows.completion_token_ids, strict=True)]
    return keep(lay_out(groups, path, pad_token_id), rows.assistant_positions)
