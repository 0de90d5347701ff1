import random

import pytest

from dpo_ray.quickstart import reviews


def test_prompts_same_seed_are_identical_and_distinct():
    prompts = reviews.prompts(4000, seed=0)
    assert prompts == reviews.prompts(4000, seed=0)
    assert len({prompt["messages"][0]["content"] for prompt in prompts}) == 4000


def test_prompts_other_seed_differ():
    assert reviews.prompts(100, seed=0) != reviews.prompts(100, seed=1)


def test_prompts_larger_number_extends_smaller():
    assert reviews.prompts(100, seed=3)[:40] == reviews.prompts(40, seed=3)


def test_prompts_one_user_turn_names_kind_and_title():
    for prompt in reviews.prompts(200, seed=0):
        (message,) = prompt["messages"]
        assert message["role"] == "user"
        assert prompt["meta"]["kind"] in message["content"]
        assert prompt["meta"]["title"] in message["content"]


def test_prompts_more_than_the_grammar_has_is_refused():
    with pytest.raises(ValueError, match="distinct prompts"):
        reviews.prompts(10**6, seed=0)


def test_write_review_names_the_kind_in_its_first_sentence():
    rng = random.Random(0)
    for request in reviews.requests(500, seed=0):
        first = reviews.write_review(request, rng).split(".")[0]
        assert request.kind.name in first or request.title in first


def test_write_review_same_random_state_is_identical():
    request = reviews.requests(1, seed=0)[0]
    assert reviews.write_review(request, random.Random(5)) == reviews.write_review(request, random.Random(5))


def test_write_review_leaves_no_slot_and_the_right_article():
    rng = random.Random(0)
    texts = [reviews.write_review(request, rng) for request in reviews.requests(2000, seed=1)]
    assert len(set(texts)) > 1950
    for text in texts:
        assert "{" not in text
        assert " a a" not in text.lower()
        assert text[-1] in ".!"
