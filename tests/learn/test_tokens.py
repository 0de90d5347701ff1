import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dpo_ray.errors import ConfigError
from dpo_ray.learn.tokens import (
    collate,
    load_tokenizer,
    pad_token_id,
    render_prompt,
    tokenize_completion,
    turn_end_id,
)

from . import tiny

USER, ASSISTANT = 3, 4


def test_render_prompt_ends_where_the_answer_begins():
    """Template: <bos>, then "role content" per turn, then "assistant"; wN has id N."""
    messages = [{"role": "user", "content": "w10 w11"}]
    assert render_prompt(tiny.build_tokenizer(), messages) == [tiny.BOS, USER, 10, 11, ASSISTANT]


def test_render_prompt_without_bos_token_adds_none():
    tokenizer = tiny.build_tokenizer()
    tokenizer.bos_token = None
    assert render_prompt(tokenizer, [{"role": "user", "content": "w10"}]) == [USER, 10, ASSISTANT]


def test_render_prompt_with_two_bos_in_front_is_a_config_error():
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(ConfigError, match="two BOS"):
        render_prompt(tokenizer, [{"role": "user", "content": "w10"}])


def test_render_prompt_with_bos_inside_a_message_raises():
    with pytest.raises(ValueError, match="position 3"):
        render_prompt(tiny.build_tokenizer(), [{"role": "user", "content": "w10 <bos>"}])


def test_render_prompt_where_bos_is_also_the_end_token_allows_it_between_turns():
    tokenizer = tiny.build_tokenizer()
    tokenizer.eos_token = "<bos>"
    assert render_prompt(tokenizer, [{"role": "user", "content": "w10 <bos>"}]) == [1, USER, 10, 1, ASSISTANT]


def test_render_prompt_refused_by_the_template_raises_its_reason():
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(ValueError, match="no system turn"):
        render_prompt(tokenizer, [{"role": "system", "content": "w10"}])


def test_render_prompt_to_nothing_raises():
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(ValueError, match="no tokens"):
        render_prompt(tokenizer, [{"role": "user", "content": "w10"}])


def test_render_prompt_passes_tools_and_template_arguments():
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = "{{ tools[0]['name'] }} {{ word }}"
    messages = [{"role": "user", "content": "w10"}]
    assert render_prompt(tokenizer, messages, tools=[{"name": "w20"}], chat_template_kwargs={"word": "w21"}) == [20, 21]


def test_load_tokenizer_without_chat_template_is_a_config_error(tmp_path):
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no chat template.*chat_template\.jinja"):
        load_tokenizer(str(tmp_path))


def test_load_tokenizer_renders_as_saved(policies):
    messages = [{"role": "user", "content": "w10"}]
    assert render_prompt(load_tokenizer(policies["llama"]), messages) == [tiny.BOS, USER, 10, ASSISTANT]


def test_pad_token_id_falls_back_to_the_end_token():
    tokenizer = tiny.build_tokenizer()
    assert pad_token_id(tokenizer) == tiny.PAD
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tiny.EOS
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither"):
        pad_token_id(tokenizer)


def test_collate_pads_right_and_masks_completions_only():
    batch = collate([[5, 6], [7]], [[8, 9], [10]], pad_token_id=0)
    assert batch.input_ids_ST.tolist() == [[5, 6, 8, 9], [7, 10, 0, 0]]
    assert batch.completion_mask_ST.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert (batch.input_ids_ST.dtype, batch.completion_mask_ST.dtype) == (torch.int64, torch.bool)


def test_collate_masks_by_position_not_by_id():
    """An end token inside the completion counts although padding uses the same id."""
    batch = collate([[5], [5]], [[2], [6, 2]], pad_token_id=2)
    assert batch.completion_mask_ST.tolist() == [[False, True, False], [False, True, True]]


def test_collate_keeps_ids_that_text_would_not_give_back():
    """The tokenizer merges a + b, so [a, b] decodes to "ab", which encodes to [ab]."""
    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    sampled = [0, 1]
    assert tokenizer.encode("".join(tokenizer.convert_ids_to_tokens(sampled))) == [2]
    assert collate([[2]], [sampled], pad_token_id=0).input_ids_ST.tolist() == [[2, 0, 1]]


def test_collate_takes_arrow_and_numpy_vectors():
    batch = collate([np.array([5, 6], np.int32)], [np.array([7], np.uint16)], pad_token_id=0)
    assert batch.input_ids_ST.tolist() == [[5, 6, 7]]


@pytest.mark.parametrize(("prompt", "completion"), [([], [5]), ([5], [])])
def test_collate_refuses_an_empty_side(prompt, completion):
    with pytest.raises(ValueError, match="sequence 1"):
        collate([[5], prompt], [[6], completion], pad_token_id=0)


# Completions written outside


QWEN_LIKE = (
    "{% for m in messages %}{{ 'user ' if m['role'] == 'user' else 'assistant ' }}{{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def test_turn_end_is_what_the_template_writes_behind_an_answer():
    tokenizer = tiny.build_tokenizer()
    tokenizer.eos_token = "<pad>"  # as a base model's: its end of text is no end of turn
    tokenizer.add_special_tokens({"additional_special_tokens": ["<eos>"]})
    tokenizer.chat_template = QWEN_LIKE
    assert turn_end_id(tokenizer) == tiny.EOS


def test_turn_end_of_a_template_without_one_is_the_tokenizers():
    assert turn_end_id(tiny.build_tokenizer()) == tiny.EOS


def test_turn_end_of_neither_is_a_config_error():
    tokenizer = tiny.build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="eos_token"):
        turn_end_id(tokenizer)


def test_tokenize_completion_puts_one_end_behind_it():
    assert tokenize_completion(tiny.build_tokenizer(), "w7 w8", tiny.EOS) == [7, 8, tiny.EOS]


@pytest.mark.parametrize("text", ["w7 <eos> w8", "w7 <eos>", "<bos> w7"])
def test_tokenize_completion_that_holds_a_turn_of_its_own_raises(text):
    with pytest.raises(ValueError, match="begins or ends a turn"):
        tokenize_completion(tiny.build_tokenizer(), text, tiny.EOS)
