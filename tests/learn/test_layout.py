import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dpo_ray.learn.layout import Group, keep, separate, share

# A prompt of 2 with completions of 3 and 1; a prompt of 1 with one completion of 2.
GROUPS = [Group([5, 6], [[7, 8, 9], [10]]), Group([11], [[12, 13]])]


def test_share_packs_each_prompt_once_with_positions_that_start_again():
    batch = share(GROUPS)
    assert batch.input_ids_ST.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert batch.position_ids_ST.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 2]]
    # start of the prompt, its length, start of the completion, its length
    assert batch.attention.tolist() == [[[[0, 2, 2, 3], [0, 2, 5, 1], [6, 1, 7, 2]]]]


def test_share_first_token_of_every_completion_is_predicted_from_the_prompts_last():
    batch = share(GROUPS)
    assert batch.kept.tolist() == [1, 2, 3, 1, 6, 7]
    assert batch.targets.tolist() == [7, 8, 9, 10, 12, 13]
    assert batch.lengths.tolist() == [3, 1, 2]


def test_separate_pads_right_and_predicts_completions_only():
    batch = separate(GROUPS, pad_token_id=0)
    assert batch.input_ids_ST.tolist() == [[5, 6, 7, 8, 9], [5, 6, 10, 0, 0], [11, 12, 13, 0, 0]]
    assert batch.kept.tolist() == [1, 2, 3, 6, 10, 11]
    assert batch.targets.tolist() == share(GROUPS).targets.tolist()
    assert batch.lengths.tolist() == [3, 1, 2]
    assert batch.position_ids_ST is None
    assert batch.attention is None


def test_separate_masks_by_position_not_by_id():
    """An end token inside the completion counts although padding uses the same id."""
    batch = separate([Group([5], [[2], [6, 2]])], pad_token_id=2)
    assert batch.targets.tolist() == [2, 6, 2]
    assert batch.kept.tolist() == [0, 3, 4]


@pytest.mark.parametrize("lay_out", [share, lambda groups: separate(groups, 0)])
def test_layout_keeps_ids_that_text_would_not_give_back(lay_out):
    """The tokenizer merges a + b, so [a, b] decodes to "ab", which encodes to [ab]."""
    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    sampled = [0, 1]
    assert tokenizer.encode("".join(tokenizer.convert_ids_to_tokens(sampled))) == [2]
    assert lay_out([Group([2], [sampled])]).input_ids_ST.tolist() == [[2, 0, 1]]


@pytest.mark.parametrize("lay_out", [share, lambda groups: separate(groups, 0)])
def test_layout_takes_arrow_and_numpy_vectors(lay_out):
    batch = lay_out([Group(np.array([5, 6], np.int32), [np.array([7], np.uint16)])])
    assert batch.input_ids_ST.tolist() == [[5, 6, 7]]
    assert batch.input_ids_ST.dtype == torch.int64


@pytest.mark.parametrize("lay_out", [share, lambda groups: separate(groups, 0)])
@pytest.mark.parametrize("group", [Group([], [[5]]), Group([5], [[6], []])])
def test_layout_refuses_an_empty_side(lay_out, group):
    with pytest.raises(ValueError, match="each needs at least 1"):
        lay_out([group])


@pytest.mark.parametrize("lay_out", [share, lambda groups: separate(groups, pad_token_id=0)])
def test_keep_takes_some_completion_tokens_as_targets_and_leaves_the_rows(lay_out):
    groups = [Group([5, 6], [[7, 8, 9], [10, 11]]), Group([12], [[13, 14]])]
    batch = lay_out(groups)
    kept = keep(batch, [[0, 2], [1], [0]])
    assert kept.targets.tolist() == [7, 9, 11, 13]
    assert kept.lengths.tolist() == [2, 1, 1]
    before = batch.input_ids_ST.flatten()[kept.kept].tolist()
    assert before == [6, 8, 10, 12]  # what stands before each of them
    assert torch.equal(kept.input_ids_ST, batch.input_ids_ST)


@pytest.mark.parametrize("positions", [[[0], []], [[0], [2]], [[-1], [0]]])
def test_keep_refuses_completions_without_targets_and_positions_outside(positions):
    with pytest.raises(ValueError, match="expected at least one, all inside"):
        keep(share([Group([5], [[7, 8]]), Group([6], [[9, 10]])]), positions)
