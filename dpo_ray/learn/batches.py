"""Which rows form which batch: plans made of row indices, before any row is read. No torch.

An epoch is a list of steps; a step gives each rank a list of micro-batches; a micro-batch is a list of row indices, and
an empty one is a forward and backward that counts nothing.
Invariants: every row exactly once an epoch; every rank has as many micro-batches in a step as every other, since FSDP's
collectives hang otherwise; which rows form a step depends on seed and epoch, never on the number of ranks.
"""

import numpy as np

MicroBatch = list[int]
Step = list[list[MicroBatch]]
"""step[rank][i] is the i-th micro-batch of a rank."""


def plan_epoch(
    lengths: np.ndarray,
    *,
    global_batch_size: int,
    world_size: int,
    max_batch_tokens: int,
    seed: int,
    epoch: int,
    share_prompt: bool = True,
) -> list[Step]:
    """Plan one epoch; the same arguments give the same plan.

    Args:
        lengths: (pairs, 3) tokens of prompt, chosen and rejected.
        global_batch_size: pairs of one step over all ranks; only the last step may have fewer.
        world_size: number of ranks.
        max_batch_tokens: tokens of a micro-batch as the model sees them; a pair over it goes alone. With shared prompts
            these are prompt + chosen + rejected of each pair; else each sequence padded to the longest.
        seed, epoch: order of the rows, new in each epoch.
        share_prompt: the layout of the batches, as `probe.choose_path` found it.

    Raises:
        ValueError: lengths of another shape, or a count below 1.
    """
    lengths = np.asarray(lengths)
    if lengths.ndim != 2 or lengths.shape[1] != 3:
        raise ValueError(f"lengths has shape {lengths.shape}; expected (pairs, 3)")
    if min(global_batch_size, world_size, max_batch_tokens) < 1:
        raise ValueError(f"counts must be at least 1: {global_batch_size=}, {world_size=}, {max_batch_tokens=}")
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    batches = [order[start : start + global_batch_size] for start in range(0, len(order), global_batch_size)]
    prompt, longest = lengths[:, 0], lengths[:, 1:].max(axis=1, initial=0)
    size = lengths.sum(axis=1) if share_prompt else 2 * (prompt + longest)
    return [_plan_step(batch, size, world_size, max_batch_tokens, padded=not share_prompt) for batch in batches]


def _plan_step(batch: np.ndarray, sizes: np.ndarray, world_size: int, max_batch_tokens: int, *, padded: bool) -> Step:
    """Spread the rows of a global batch over ranks and micro-batches."""
    size = {int(row): int(sizes[row]) for row in batch}
    step = [_micro_batches(rows, size, max_batch_tokens, padded=padded) for rows in _spread(size, world_size)]
    num_micro_batches = max(len(micro_batches) for micro_batches in step)
    return [micro_batches + [[] for _ in range(num_micro_batches - len(micro_batches))] for micro_batches in step]


def _spread(size: dict[int, int], world_size: int) -> list[list[int]]:
    """Give each row, longest first, to the rank with the fewest tokens so far."""
    rows_of_rank: list[list[int]] = [[] for _ in range(world_size)]
    tokens_of_rank = [0] * world_size
    for row in _longest_first(list(size), size):
        rank = tokens_of_rank.index(min(tokens_of_rank))
        rows_of_rank[rank].append(row)
        tokens_of_rank[rank] += size[row]
    return rows_of_rank


def _micro_batches(rows: list[int], size: dict[int, int], max_batch_tokens: int, *, padded: bool) -> list[MicroBatch]:
    """Cut rows, longest first so that little of a padded batch is padding, where their tokens exceed the budget."""
    micro_batches: list[MicroBatch] = []
    for row in _longest_first(rows, size):
        current = micro_batches[-1] if micro_batches else []
        tokens = (len(current) + 1) * size[current[0]] if current and padded else sum(size[r] for r in [*current, row])
        if current and tokens <= max_batch_tokens:
            current.append(row)
        else:
            micro_batches.append([row])
    return micro_batches


def _longest_first(rows: list[int], size: dict[int, int]) -> list[int]:
    return sorted(rows, key=lambda row: (-size[row], row))
