import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.learn.tokens import (
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
