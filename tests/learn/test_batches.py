import numpy as np
import pytest

from dpo_ray.learn.batches import plan_epoch

OPTIONS = {"global_batch_size": 8, "world_size": 2, "max_batch_tokens": 200, "seed": 0, "epoch": 0}


def lengths_of(num_pairs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 40, (num_pairs, 3))


def rows_of(step) -> list[int]:
    return [row for micro_batches in step for rows in micro_batches for row in rows]


@pytest.mark.parametrize("num_pairs", [1, 2, 7, 31, 97])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("max_batch_tokens", [1, 130, 10**6])
@pytest.mark.parametrize("share_prompt", [True, False])
def test_plan_epoch_invariants(num_pairs, world_size, max_batch_tokens, share_prompt):
    lengths = lengths_of(num_pairs)
    how = {"world_size": world_size, "max_batch_tokens": max_batch_tokens, "share_prompt": share_prompt}
    plan = plan_epoch(lengths, **OPTIONS | how)
    assert sorted(row for step in plan for row in rows_of(step)) == list(range(num_pairs))
    sizes = [len(rows_of(step)) for step in plan]
    assert sizes == [8] * (num_pairs // 8) + ([num_pairs % 8] if num_pairs % 8 else [])
    for step in plan:
        assert len(step) == world_size
        assert len({len(micro_batches) for micro_batches in step}) == 1
        # At least one rank has no empty micro-batch: none runs for nothing on all of them.
        assert any(all(micro_batches) for micro_batches in step)
        for rows in (rows for micro_batches in step for rows in micro_batches if len(rows) > 1):
            padded = 2 * len(rows) * (lengths[rows, 0] + lengths[rows, 1:].max(1)).max()
            assert (lengths[rows].sum() if share_prompt else padded) <= max_batch_tokens


def test_plan_epoch_global_batches_do_not_depend_on_the_number_of_ranks():
    plans = [plan_epoch(lengths_of(31), **{**OPTIONS, "world_size": w, "max_batch_tokens": 60 * w}) for w in (1, 2, 3)]
    batches = [[sorted(rows_of(step)) for step in plan] for plan in plans]
    assert batches[0] == batches[1] == batches[2]


def test_plan_epoch_is_deterministic_and_new_in_each_epoch_and_seed():
    plan = plan_epoch(lengths_of(31), **OPTIONS)
    assert plan == plan_epoch(lengths_of(31), **OPTIONS)
    assert plan != plan_epoch(lengths_of(31), **{**OPTIONS, "epoch": 1})
    assert plan != plan_epoch(lengths_of(31), **{**OPTIONS, "seed": 1})


def test_plan_epoch_by_hand():
    """Tokens of prompt + chosen + rejected 11, 10, 6, 8, 3, budget 18. Largest first, to the rank with fewer tokens: 0 to
    rank 0 (11), 1 to rank 1 (10), 3 to rank 1 (18), 2 to rank 0 (17), 4 to rank 0 (20). Rank 0: 11 + 6 fit, 3 more do not.
    """
    lengths = np.array([[2, 5, 4], [4, 3, 3], [1, 1, 4], [4, 2, 2], [1, 1, 1]])
    plan = plan_epoch(lengths, **{**OPTIONS, "max_batch_tokens": 18})
    assert plan == [[[[0, 2], [4]], [[1, 3], []]]]


def test_plan_epoch_in_separate_rows_by_hand():
    """Longest sequences 9, 5, 4, 4, 2, budget 20. 0 to rank 0, 1 to rank 1, 2 to rank 1, 3 to rank 0 (a tie), 4 to rank 1.
    Rank 0: 2 * 2 * 9 > 20, so [0], [3]. Rank 1: 2 * 2 * 5 = 20 fits, three do not: [1, 2], [4]."""
    lengths = np.array([[2, 7, 4], [2, 3, 3], [1, 1, 3], [2, 2, 2], [1, 1, 1]])
    plan = plan_epoch(lengths, **{**OPTIONS, "max_batch_tokens": 20, "share_prompt": False})
    assert plan == [[[[0], [3]], [[1, 2], [4]]]]


def test_plan_epoch_gives_an_over_long_pair_its_own_micro_batch():
    how = {**OPTIONS, "world_size": 1, "max_batch_tokens": 12}
    plan = plan_epoch(np.array([[50, 2, 2], [2, 2, 2], [2, 2, 2]]), **how)
    assert plan == [[[[0], [1, 2]]]]


def test_plan_epoch_with_fewer_pairs_than_ranks_has_empty_micro_batches():
    assert plan_epoch(np.array([[1, 2, 2]]), **{**OPTIONS, "world_size": 3}) == [[[[0]], [[]], [[]]]]


def test_plan_epoch_balances_tokens_over_ranks():
    lengths = lengths_of(64)
    (step,) = plan_epoch(lengths, **{**OPTIONS, "global_batch_size": 64, "world_size": 4})
    tokens = [lengths[rows_of([micro_batches])].sum() for micro_batches in step]
    assert max(tokens) - min(tokens) <= lengths.sum(1).max()


def test_plan_epoch_of_nothing_is_empty():
    assert plan_epoch(np.zeros((0, 3), np.int64), **OPTIONS) == []


@pytest.mark.parametrize("change", [{"global_batch_size": 0}, {"world_size": 0}, {"max_batch_tokens": 0}])
def test_plan_epoch_refuses_counts_below_one(change):
    with pytest.raises(ValueError, match="at least 1"):
        plan_epoch(lengths_of(3), **{**OPTIONS, **change})


def test_plan_epoch_refuses_lengths_of_another_shape():
    with pytest.raises(ValueError, match=r"\(pairs, 3\)"):
        plan_epoch(np.ones((3, 2)), **OPTIONS)
