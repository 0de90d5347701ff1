import json

import pytest

from dpo_ray.config import ExplicitPreferences
from dpo_ray.ingest import Comparison
from dpo_ray.ingest.explicit import comparison

USER = {"role": "user", "content": "The sky is"}
YES, NO = ({"role": "assistant", "content": text} for text in (" blue.", " green."))
WANTED = Comparison([USER], " blue.", " green.")


def compare(prompt, chosen, rejected, **fields):
    config = ExplicitPreferences(kind="explicit", source="x.jsonl", **fields)
    return comparison({"prompt": prompt, "chosen": chosen, "rejected": rejected}, config)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("The sky is", " blue.", " green."),  # TRL's standard format
        ([USER], [YES], [NO]),  # TRL's conversational format
        ([USER], " blue.", [NO]),
        ("The sky is", [USER, YES], [USER, NO]),  # ultrafeedback_binarized
        (json.dumps([USER]), json.dumps([YES]), json.dumps([USER, NO])),  # messages in a CSV
    ],
)
def test_comparison_of_every_format_is_the_same_and_unstripped(prompt, chosen, rejected):
    assert compare(prompt, chosen, rejected) == WANTED


def test_comparison_with_a_system_prompt_of_the_configuration_leaves_it_to_the_reader():
    """Rows that repeat the prompt repeat it without the system turn that is added later."""
    assert compare("The sky is", [USER, YES], [USER, NO], system_prompt="Be brief.") == WANTED


def test_comparison_of_answers_that_begin_alike_keeps_their_beginning():
    found = compare("Is it?", "I think so.", "I think not.")
    assert (found.chosen, found.rejected) == ("I think so.", "I think not.")


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (None, "null_completion"),
        ([], "empty_completion"),
        ([{"role": "assistant", "content": None}], "null_completion"),
        ([USER], "wrong_roles"),
        ([YES, NO], "different_prompts"),
        ([{"role": "user", "content": "The sea is"}, YES], "different_prompts"),
        ([USER, YES, USER], "wrong_roles"),
        ([USER, YES, USER, NO], "different_prompts"),
        (["text"], "not_messages"),
        (3, "not_messages"),
        ([{**YES, "tool_calls": ["x"]}], "unsupported_message_fields"),
        ([{"role": "assistant", "content": ["part"]}], "content_not_text"),
        ('[{"role": "assistant", "content": "cut', "malformed_json"),
    ],
)
def test_comparison_that_cannot_be_used_says_why(chosen, reason):
    assert compare([USER], chosen, [NO]) == reason
    assert compare([USER], [YES], chosen) == reason


@pytest.mark.parametrize(("prompt", "reason"), [(None, "null_prompt"), ("", "empty_prompt"), ([YES], "wrong_roles")])
def test_comparison_with_a_bad_prompt_says_why(prompt, reason):
    assert compare(prompt, " blue.", " green.") == reason
