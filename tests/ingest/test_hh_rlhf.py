"""Transcripts by hand; the real ones are in test_preferences.py."""

import pytest

from dpo_ray.ingest.hh_rlhf import comparison

SHARED = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is\n\ntwo lines?"


def pair(chosen, rejected):
    return comparison({"chosen": chosen, "rejected": rejected})


def test_comparison_of_several_turns_shares_all_but_the_last():
    found = pair(f"{SHARED}\n\nAssistant: A line.\n\nAnd one more.", f"{SHARED}\n\nAssistant:  No. ")
    assert found.prompt == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What is\n\ntwo lines?"},
    ]
    assert (found.chosen, found.rejected) == ("A line.\n\nAnd one more.", "No.")


def test_comparison_of_answers_that_begin_alike_keeps_their_beginning():
    """What a prompt guessed from the common prefix would swallow."""
    found = pair(f"{SHARED}\n\nAssistant: I think so.", f"{SHARED}\n\nAssistant: I think not.")
    assert (found.chosen, found.rejected) == ("I think so.", "I think not.")


def test_comparison_of_an_answer_that_begins_as_the_other_ends():
    found = pair(f"{SHARED}\n\nAssistant: Yes", f"{SHARED}\n\nAssistant: Yes, of course")
    assert (found.chosen, found.rejected) == ("Yes", "Yes, of course")


GOOD = f"{SHARED}\n\nAssistant: Yes"


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ("\n\nHuman: Hey\n\nAssistant: Yes", "different_prompts"),
        ("\n\nHuman: Hi\n\nAssistant: Hello", "different_prompts"),  # fewer turns
        (SHARED, "wrong_roles"),  # ends with the human
        ("\n\nAssistant: Yes\n\nHuman: Hi", "wrong_roles"),
        ("\n\nHuman: Hi\n\nHuman: Hey\n\nAssistant: Yes\n\nAssistant: Yes", "wrong_roles"),
        ("Hi there", "no_transcript"),
        ("Preamble\n\nHuman: Hi\n\nAssistant: Yes", "no_transcript"),
        ("", "no_transcript"),
        (None, "null_transcript"),
        (["a"], "not_text"),
    ],
)
def test_comparison_that_cannot_be_used_says_why(chosen, reason):
    assert pair(chosen, GOOD) == reason
    assert pair(GOOD, chosen) == reason


def test_comparison_with_an_empty_turn_before_the_last_says_so():
    before = "\n\nHuman: \n\nAssistant: Yes?\n\nHuman: Hi\n\nAssistant:"
    assert pair(f"{before} a", f"{before} b") == "empty_message"
