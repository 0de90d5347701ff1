import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from dpo_ray.ingest.hh_rlhf import comparison
from dpo_ray.learn.batches import Plan, Step, row_tokens

OPTIONS = {"epochs": 1, "global_batch_size": 8, "world_size": 2, "max_batch_tokens": 240, "seed": 0}


def lengths_of(num_pairs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 40, (num_pairs, 3))


def plan_of(lengths: np.ndarray, **options) -> list[Step]:
    return list(Plan(lengths, **{**OPTIONS, **options}))


def rows_of(step: Step) -> list[int]:
    return [row for micro_batches in step for rows in micro_batches for row in rows]


def seen_tokens(lengths: np.ndarray, rows: list[int], share_prompt: bool) -> int:
    """Tokens of a micro-batch as the model sees them, by the definition of the layouts."""
    if not rows:
        return 0
    if share_prompt:
        return int(lengths[rows].sum())
    return int(2 * len(rows) * (lengths[rows, 0] + lengths[rows, 1:].max(1)).max())


@pytest.mark.parametrize("num_pairs", [1, 2, 7, 31, 97])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("max_batch_tokens", [156, 240, 10**6])  # the first holds the longest pair and no more
@pytest.mark.parametrize("share_prompt", [True, False])
def test_plan_invariants(num_pairs, world_size, max_batch_tokens, share_prompt):
    lengths = lengths_of(num_pairs)
    how = {"world_size": world_size, "max_batch_tokens": max_batch_tokens, "share_prompt": share_prompt}
    plan = plan_of(lengths, **how)
    assert sorted(row for step in plan for row in rows_of(step)) == list(range(num_pairs))
    sizes = [len(rows_of(step)) for step in plan]
    assert sizes == [8] * (num_pairs // 8) + ([num_pairs % 8] if num_pairs % 8 else [])
    for step in plan:
        assert len(step) == world_size
        assert len({len(micro_batches) for micro_batches in step}) == 1
        # At least one rank has no empty micro-batch: none runs for nothing on all of them.
        assert any(all(micro_batches) for micro_batches in step)
        assert all(seen_tokens(lengths, rows, share_prompt) <= max_batch_tokens for ranks in step for rows in ranks)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_plan_of_one_rank_whose_batch_fits_is_one_micro_batch(share_prompt):
    """A loss that sorts the global batch needs it."""
    assert [
        len(step[0]) for step in plan_of(lengths_of(31), world_size=1, max_batch_tokens=10**4, share_prompt=share_prompt)
    ] == [1] * 4


def test_plan_global_batches_do_not_depend_on_the_number_of_ranks():
    plans = [plan_of(lengths_of(31), world_size=w, max_batch_tokens=160 * w) for w in (1, 2, 3)]
    batches = [[sorted(rows_of(step)) for step in plan] for plan in plans]
    assert batches[0] == batches[1] == batches[2]


def test_plan_is_deterministic_and_new_in_each_epoch_and_seed():
    plan = plan_of(lengths_of(31), epochs=2)
    assert plan == plan_of(lengths_of(31), epochs=2)
    assert plan[:4] == plan_of(lengths_of(31))
    for other in (plan[4:], plan_of(lengths_of(31), seed=1)):
        assert other != plan[:4]
        assert sorted(row for step in other for row in rows_of(step)) == list(range(31))


def test_plan_cuts_any_step_alone_in_any_order():
    """As a resumed run asks for it: from the middle on."""
    lengths = lengths_of(31)
    whole = plan_of(lengths, epochs=3)
    plan = Plan(lengths, **{**OPTIONS, "epochs": 3})
    assert len(plan) == len(whole) == 12
    assert [plan[i] for i in (11, 0, 5, 4, 5, -1)] == [whole[i] for i in (11, 0, 5, 4, 5, -1)]
    assert plan[3:9:2] == whole[3:9:2]
    with pytest.raises(IndexError):
        plan[12]


def test_plan_rows_before_a_step_are_those_of_the_steps_before():
    plan = Plan(lengths_of(31), **{**OPTIONS, "epochs": 2})
    assert [plan.rows_before(i) for i in range(9)] == [0, 8, 16, 24, 31, 39, 47, 55, 62]


def test_plan_by_hand():
    """Tokens of prompt + chosen + rejected 11, 10, 6, 8, 3, budget 18. Largest first, to the rank with fewer tokens: 0 to
    rank 0 (11), 1 to rank 1 (10), 3 to rank 1 (18), 2 to rank 0 (17), 4 to rank 0 (20). Rank 0 needs two micro-batches,
    filled in the same way: 11 and 6 + 3. Rank 1 would fit into one; it gets two of 10 and 8.
    """
    lengths = np.array([[2, 5, 4], [4, 3, 3], [1, 1, 4], [4, 2, 2], [1, 1, 1]])
    assert plan_of(lengths, max_batch_tokens=18) == [[[[0], [2, 4]], [[1], [3]]]]


def test_plan_in_separate_rows_by_hand():
    """Two rows of 9, 5, 4, 4, 2 tokens a pair: 18, 10, 8, 8, 4, budget 20. Sorted, [0] [1, 2] [3, 4] of 18, 20 and 16 fit, so
    there are two micro-batches a rank and four places: with a limit of 18 these are [0] [1] [2, 3] [4] of 18, 10, 16, 4.
    Largest first: [0] to rank 0, [2, 3] to rank 1, [1] to rank 1 (26), [4] to rank 0 (22).
    Three a rank would be no better: [0] is the limit.
    """
    lengths = np.array([[2, 7, 4], [2, 3, 3], [1, 1, 3], [2, 2, 2], [1, 1, 1]])
    assert plan_of(lengths, max_batch_tokens=20, share_prompt=False) == [[[[0], [4]], [[2, 3], [1]]]]


def test_plan_in_separate_rows_takes_one_more_micro_batch_where_that_saves_padding():
    """Pairs of 20 and 2 tokens: 2 * 20 beside 6 * 2 in one micro-batch a rank, and 20 + 6 beside 20 + 6 in two."""
    lengths = np.array([[1, 9, 9], [1, 9, 9], *[[0, 1, 1]] * 6])
    (step,) = plan_of(lengths, max_batch_tokens=1000, share_prompt=False)
    assert [[seen_tokens(lengths, rows, False) for rows in ranks] for ranks in step] == [[20, 6], [20, 6]]


@pytest.mark.parametrize(("share_prompt", "tokens"), [(True, 54), (False, 104)])
def test_plan_refuses_a_pair_over_the_budget(share_prompt, tokens):
    lengths = np.array([[2, 2, 2], [50, 2, 2]])
    assert row_tokens(lengths, share_prompt=share_prompt)[1] == tokens
    assert len(plan_of(lengths, max_batch_tokens=tokens, share_prompt=share_prompt)) == 1
    with pytest.raises(ValueError, match=f"row 1 has {tokens} tokens"):
        plan_of(lengths, max_batch_tokens=tokens - 1, share_prompt=share_prompt)


def test_plan_with_fewer_pairs_than_ranks_has_empty_micro_batches():
    assert plan_of(np.array([[1, 2, 2]]), world_size=3) == [[[[0]], [[]], [[]]]]
    assert plan_of(np.array([[1, 2, 2]]), world_size=3, share_prompt=False) == [[[[0]], [[]], [[]]]]


@pytest.fixture(scope="module")
def hh_lengths() -> np.ndarray:
    """Lengths of real pairs, at about four bytes a token, and one for the end of a completion."""
    if "DPO_RAY_TEST_DATA" not in os.environ:
        pytest.skip("DPO_RAY_TEST_DATA names no directory with hh-rlhf/ (see tests/README.md)")
    with gzip.open(Path(os.environ["DPO_RAY_TEST_DATA"]) / "hh-rlhf/harmless-base-test.jsonl.gz", "rt") as lines:
        found = [comparison(json.loads(line)) for line in lines]
    texts = [
        ("".join(m["content"] for m in pair.prompt), pair.chosen, pair.rejected) for pair in found if not isinstance(pair, str)
    ]
    return np.array([[1 + len(text.encode()) // 4 for text in pair] for pair in texts])


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("global_batch_size", [64, 128, 256])
@pytest.mark.parametrize("share_prompt", [True, False])
def test_plan_of_real_pairs_keeps_every_rank_busy(hh_lengths, global_batch_size, world_size, share_prompt):
    """Whole global batches: the few pairs of an uneven tail cannot be cut evenly over 8 ranks by anyone."""
    how = {"global_batch_size": global_batch_size, "world_size": world_size, "max_batch_tokens": 8192}
    plan = plan_of(hh_lengths, **how, share_prompt=share_prompt)[: len(hh_lengths) // global_batch_size]
    busiest, together = [], []
    for step in plan:
        seen = np.array([[seen_tokens(hh_lengths, rows, share_prompt) for rows in micro_batches] for micro_batches in step])
        busiest.append(seen.sum(1).max() / seen.sum(1).mean())
        together.append(seen.max(0).sum() / seen.sum(1).mean())
    assert np.mean(busiest) <= 1.05
    if share_prompt:  # ranks meet in every micro-batch, and do not wait there either
        assert np.mean(together) <= 1.05


def test_plan_of_nothing_is_empty():
    assert plan_of(np.zeros((0, 3), np.int64)) == []


@pytest.mark.parametrize("change", [{"global_batch_size": 0}, {"world_size": 0}, {"max_batch_tokens": 0}, {"epochs": 0}])
def test_plan_refuses_counts_below_one(change):
    with pytest.raises(ValueError, match="at least 1"):
        plan_of(lengths_of(3), **change)


def test_plan_refuses_lengths_of_another_shape():
    with pytest.raises(ValueError, match=r"\(rows, 1 \+ completions\)"):
        plan_of(np.ones((3, 1)))
