"""Which rows form which batch: plans made of row indices, before any row is read. No torch.

A plan is a sequence of steps; a step gives each rank a list of micro-batches; a micro-batch is a list of row indices, and
an empty one is a forward and backward that counts nothing.
Invariants: every row exactly once an epoch; every rank has as many micro-batches in a step as every other, since FSDP's
collectives hang otherwise; which rows form a step depends on seed and epoch, never on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

MicroBatch = list[int]
Step = list[list[MicroBatch]]
"""step[rank][i] is the i-th micro-batch of a rank."""
WORTH = 0.95
"""Padded rows are cut into one more micro-batch where the busiest rank then has at most this share of its tokens."""


class Plan(Sequence[Step]):
    """Every step of every epoch, cut when it is asked for: what is held is the order of one epoch, 8 bytes a row."""

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        epochs: int,
        global_batch_size: int,
        world_size: int,
        max_batch_tokens: int,
        seed: int,
        share_prompt: bool = True,
    ) -> None:
        """The same arguments give the same plan.

        Args:
            lengths: (rows, 1 + C) integers, tokens of a row's prompt and of its C completions, such as chosen and
                rejected; may lie in a memory map.
            global_batch_size: rows of one step over all ranks; only the last step of an epoch may have fewer.
            world_size: number of ranks.
            max_batch_tokens: tokens of a micro-batch as the model sees them. With shared prompts these are the
                `row_tokens` of its rows; else each sequence is padded to the longest.
            seed: order of the rows, new in each epoch.
            share_prompt: the layout of the batches, as `probe.choose_path` found it.

        Raises:
            ValueError: lengths of another shape, a count below 1, or a row over the budget.
        """
        if lengths.ndim != 2 or lengths.shape[1] < 2:
            raise ValueError(f"lengths has shape {lengths.shape}; expected (rows, 1 + completions)")
        if min(epochs, global_batch_size, world_size, max_batch_tokens) < 1:
            raise ValueError(f"counts must be at least 1: {epochs=}, {global_batch_size=}, {world_size=}, {max_batch_tokens=}")
        tokens = row_tokens(lengths, share_prompt=share_prompt)
        if tokens.max(initial=0) > max_batch_tokens:
            row = int(tokens.argmax())
            raise ValueError(f"row {row} has {tokens[row]} tokens, more than {max_batch_tokens=}; raise it, or drop the row")
        self.lengths, self.epochs, self.seed = lengths, epochs, seed
        self.global_batch_size, self.world_size = global_batch_size, world_size
        self.max_batch_tokens, self.share_prompt = max_batch_tokens, share_prompt
        self.steps_per_epoch = -(-len(lengths) // global_batch_size)
        # The loop asks for a step several times in a row, and for the epochs in order.
        self._order, self._cut = lru_cache(maxsize=1)(self._order), lru_cache(maxsize=1)(self._cut)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs

    def __getitem__(self, step):
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(len(self)))]
        if not -len(self) <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        return self._cut(step % len(self))

    def rows_before(self, step: int) -> int:
        """Rows of all steps before `step`."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        return epoch * len(self.lengths) + min(inside * self.global_batch_size, len(self.lengths))

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))

    def _cut(self, step: int) -> Step:
        epoch, inside = divmod(step, self.steps_per_epoch)
        start = inside * self.global_batch_size
        rows = self._order(epoch)[start : start + self.global_batch_size]
        tokens = row_tokens(self.lengths[rows], share_prompt=self.share_prompt).tolist()
        cut = _cut_packed if self.share_prompt else _cut_padded
        return cut(dict(zip(rows.tolist(), tokens, strict=True)), self.world_size, self.max_batch_tokens)


def row_tokens(lengths: np.ndarray, *, share_prompt: bool) -> np.ndarray:
    """(rows,) int64 tokens of each row alone in a batch: prompt + completions, or each behind a prompt, padded."""
    prompt, completions = lengths[:, 0].astype(np.int64), lengths[:, 1:]
    if share_prompt:
        return prompt + completions.sum(axis=1)
    return completions.shape[1] * (prompt + completions.max(axis=1))


def _cut_packed(size: dict[int, int], world_size: int, max_batch_tokens: int) -> Step:
    """Rows without padding: each, longest first, to the rank with the fewest tokens, and there to the lightest micro-batch.

    A longest-first assignment never gets heavier from one more bin, so ranks that need fewer micro-batches than the
    others fit into as many as these, and have lighter ones instead of empty ones.
    """
    ranks = _spread(_longest_first(size), size, world_size)
    num_micro_batches = max(_bins_needed(rows, size, max_batch_tokens) for rows in ranks)
    step = [_spread(rows, size, num_micro_batches) for rows in ranks]
    # Ranks wait for each other in every micro-batch, so the heavy ones go together.
    return [sorted(bins, key=lambda rows: -_tokens(rows, size)) for bins in step]


def _bins_needed(rows: list[int], size: dict[int, int], max_batch_tokens: int) -> int:
    """Smallest number of bins of at most `max_batch_tokens`, as `_spread` fills them."""
    bins = max(1, -(-_tokens(rows, size) // max_batch_tokens))
    while max(_tokens(b, size) for b in _spread(rows, size, bins)) > max_batch_tokens:
        bins += 1
    return bins


def _spread(rows: list[int], size: dict[int, int], num_bins: int) -> list[list[int]]:
    """Give each row in turn to the bin with the fewest tokens so far."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens = [0] * num_bins
    for row in rows:
        lightest = tokens.index(min(tokens))
        bins[lightest].append(row)
        tokens[lightest] += size[row]
    return bins


def _cut_padded(size: dict[int, int], world_size: int, max_batch_tokens: int) -> Step:
    """Rows padded to the longest of their micro-batch: cut where they lie sorted, so that little is padding.

    One rank alone gets as few micro-batches as there can be, which a loss that sorts the global batch relies on.
    """
    rows = _longest_first(size)
    num_micro_batches = -(-len(_runs(rows, size, max_batch_tokens)) // world_size)
    step = _padded_step(rows, size, world_size, num_micro_batches, max_batch_tokens)
    while world_size > 1:
        num_micro_batches += 1
        finer = _padded_step(rows, size, world_size, num_micro_batches, max_batch_tokens)
        if _busiest(finer, size) > WORTH * _busiest(step, size):
            break
        step = finer
    return step


def _padded_step(rows: list[int], size: dict[int, int], world_size: int, num_micro_batches: int, max_tokens: int) -> Step:
    """Runs of sorted rows, the largest of them as small as possible, each to the rank with the fewest tokens and room.

    Where there are fewer runs than places, the largest that can be halved are: that takes padding away, and balances better.
    """
    low = size[rows[0]]
    while low < max_tokens:  # the smallest limit that needs no more runs than there are places for
        middle = (low + max_tokens) // 2
        if len(_runs(rows, size, middle)) <= world_size * num_micro_batches:
            max_tokens = middle
        else:
            low = middle + 1
    runs = _runs(rows, size, max_tokens)
    while len(runs) < world_size * num_micro_batches and any(len(run) > 1 for run in runs):
        run = max((run for run in runs if len(run) > 1), key=lambda run: _padded(run, size))
        runs[runs.index(run)], half = run[: len(run) // 2], run[len(run) // 2 :]
        runs.append(half)
    step: Step = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for run in sorted(runs, key=lambda run: -_padded(run, size)):
        rank = min((r for r in range(world_size) if len(step[r]) < num_micro_batches), key=lambda r: tokens[r])
        step[rank].append(run)
        tokens[rank] += _padded(run, size)
    longest = max(map(len, step))
    return [micro_batches + [[] for _ in range(longest - len(micro_batches))] for micro_batches in step]


def _runs(rows: list[int], size: dict[int, int], max_tokens: int) -> list[MicroBatch]:
    """Cut sorted rows wherever their padded tokens would exceed `max_tokens`."""
    runs: list[MicroBatch] = []
    for row in rows:
        if runs and (len(runs[-1]) + 1) * size[runs[-1][0]] <= max_tokens:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def _busiest(step: Step, size: dict[int, int]) -> int:
    return max(sum(_padded(run, size) for run in micro_batches) for micro_batches in step)


def _padded(run: MicroBatch, size: dict[int, int]) -> int:
    return len(run) * size[run[0]] if run else 0


def _tokens(rows: list[int], size: dict[int, int]) -> int:
    return sum(size[row] for row in rows)


def _longest_first(size: dict[int, int]) -> list[int]:
    return sorted(size, key=lambda row: (-size[row], row))
