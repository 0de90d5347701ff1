"""What prompts and preferences share; reading whole sources is tested in test_prompts.py and test_preferences.py."""

import pytest

from dpo_ray import schemas
from dpo_ray.errors import StageError
from dpo_ray.intake import GROUP, Target, eval_groups, split_group


def target(num_eval: int, rows: str = "prompts") -> Target:
    return Target(
        "prompts", rows, "data.jsonl", "prompt_id", schemas.PROMPTS.append(GROUP), schemas.PROMPTS, num_eval, 0.0, len
    )


def test_eval_groups_takes_the_smallest_until_enough():
    assert eval_groups(["b", "a", "a", "d", "c", "d", "d"], target(3)) == {"a", "b"}
    assert eval_groups(["b", "a", "a", "d", "c", "d", "d"], target(2)) == {"a"}


@pytest.mark.parametrize("groups", [["a"], ["a", "a", "a", "b"], ["a", "b", "c"]])
@pytest.mark.parametrize("rows", ["prompts", "pairs"])
def test_eval_groups_of_more_than_half_raise(groups, rows):
    with pytest.raises(StageError, match=f"more than half .*lower prompts.eval_{rows}"):
        eval_groups(groups, target(2, rows))


def test_split_group_by_conversation_is_the_opening_alone():
    user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "s"}
    longer = [user, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert split_group([user], "1", "conversation") == split_group(longer, "2", "conversation")
    assert split_group([user], "1", "conversation") != split_group([system, user], "1", "conversation")
    assert split_group([user], "1", "prompt") != split_group([user], "2", "prompt")
