import pytest

from dpo_ray.learn.tokens import turn_end_id
from dpo_ray.learn.turns import Turns, turn_rows

from . import tiny

USER, ASSISTANT = 3, 4
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


def chat(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture
def tokenizer():
    """Ends every turn with <eos>, so that later prompts go on where a turn ended; wN has id N."""
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def rows(tokenizer, messages, **options):
    return turn_rows(tokenizer, messages, turn_end_id(tokenizer), **options)


def test_turn_rows_of_one_answer_are_its_prompt_and_its_tokens_with_the_end(tokenizer):
    (row,) = rows(tokenizer, chat("w10 w11", "w20 w21"))
    assert row == Turns([tiny.BOS, USER, 10, 11, tiny.EOS, ASSISTANT], [20, 21, tiny.EOS], [0, 1, 2])


def test_turn_rows_share_a_row_where_the_template_goes_on_from_the_turn_before(tokenizer):
    """Only what the assistant says is a target: not the user's second turn, nor the roles."""
    (row,) = rows(tokenizer, chat("w10", "w20 w21", "w11", "w22"))
    assert row.completion == [20, 21, tiny.EOS, USER, 11, tiny.EOS, ASSISTANT, 22, tiny.EOS]
    assert [row.completion[i] for i in row.assistant_positions] == [20, 21, tiny.EOS, 22, tiny.EOS]


def test_turn_rows_are_the_tokens_that_the_template_renders(tokenizer):
    messages = chat("w10", "w20 w21", "w11", "w22", "w12", "w23 w24")
    (row,) = rows(tokenizer, messages)
    assert [*row.prompt, *row.completion] == tokenizer.apply_chat_template(messages, return_dict=False)


def test_turn_rows_of_a_template_that_changes_earlier_turns_have_each_their_own_context(tokenizer):
    """As templates do that leave out earlier reasoning: a turn is trained where sampling would find it."""
    shown = "m['content'].split('w99 ')[-1] if not loop.last else m['content']"
    tokenizer.chat_template = CHATML.replace("m['content'] +", f"({shown}) +")
    first, second = rows(tokenizer, chat("w10", "w50 w99 w20", "w11", "w51 w99 w21"))
    assert first.completion == [50, 99, 20, tiny.EOS]
    assert second.prompt == [tiny.BOS, USER, 10, tiny.EOS, ASSISTANT, 20, tiny.EOS, USER, 11, tiny.EOS, ASSISTANT]
    assert second.completion == [51, 99, 21, tiny.EOS]


def test_turn_rows_of_a_template_without_end_tokens_have_each_a_row():
    """Sampling ends a turn with a token that this template does not put behind it."""
    first, second = rows(tiny.build_tokenizer(), chat("w10", "w20", "w11", "w21"))
    assert first == Turns([tiny.BOS, USER, 10, ASSISTANT], [20, tiny.EOS], [0, 1])
    assert second == Turns([tiny.BOS, USER, 10, ASSISTANT, 20, USER, 11, ASSISTANT], [21, tiny.EOS], [0, 1])


def test_turn_rows_pass_tools_and_template_options_on(tokenizer):
    tokenizer.chat_template = "{% if tools %}{{ tools[0]['name'] + ' ' + mood + ' ' }}{% endif %}" + CHATML.replace(
        "{{ bos_token }}", ""
    )
    (row,) = rows(tokenizer, chat("w10", "w20"), tools=[{"name": "w30"}], chat_template_kwargs={"mood": "w31"})
    assert row.prompt[:2] == [30, 31]


@pytest.mark.parametrize("content", ["w20 <eos> w21", "w20 <bos>"])
def test_turn_rows_refuse_a_turn_that_holds_a_token_which_begins_or_ends_one(tokenizer, content):
    with pytest.raises(ValueError, match="begins or ends a turn"):
        rows(tokenizer, chat("w10", content))
