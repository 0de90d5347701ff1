import pytest
import torch
from transformers import AutoModelForSequenceClassification

from dpo_ray.errors import ConfigError
from dpo_ray.scorers.reward_model import RewardModel

from ..learn import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
ENDS_WITH_EOS = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}{{ eos_token }}"


def conversation(num_words, first=6):
    words = " ".join(f"w{first + i}" for i in range(num_words))
    return [{"role": "user", "content": "w6 w7"}, {"role": "assistant", "content": words}]


CONVERSATIONS = [conversation(n, first) for n, first in [(3, 10), (20, 20), (1, 30), (7, 40), (7, 50)]]


def load(path, dtype="float32"):
    return RewardModel(path, revision=None, trust_remote_code=False, dtype=dtype, use_gpu=False)


def score(model, conversations, max_tokens=60, max_batch_tokens=10**6):
    return model.score(conversations, max_tokens=max_tokens, max_batch_tokens=max_batch_tokens)


def plain_scores(path, model, conversations):
    """The head on the last token of each conversation alone: what the model was trained to give."""
    reference = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    scores = []
    with torch.no_grad():
        for c in conversations:
            ids = torch.tensor([model.tokenizer.apply_chat_template(c, tokenize=True, return_dict=False)])
            hidden_TH = reference.model(input_ids=ids).last_hidden_state[0]
            scores.append(reference.score(hidden_TH[-1]).item())
    return scores


@pytest.mark.parametrize("max_batch_tokens", [1, 40, 10**6])
def test_reward_model_batched_gives_the_scores_of_one_by_one(make_reward_model, max_batch_tokens):
    model = load(make_reward_model())
    got = score(model, CONVERSATIONS, max_batch_tokens=max_batch_tokens)
    assert got == pytest.approx([score(model, [c])[0] for c in CONVERSATIONS], rel=1e-5)
    assert len({round(s, 4) for s in got}) == len(CONVERSATIONS)  # the scores do differ


@pytest.mark.parametrize(
    "pads",
    [
        {},
        {"template": ENDS_WITH_EOS},
        {"tokenizer_pad": None, "model_pad": None},
        {"tokenizer_pad": None, "model_pad": None, "template": ENDS_WITH_EOS},
        {"tokenizer_pad": None},
        {"model_pad": None},
        {"model_pad": 3},  # the word `user`: the tokenizer pads with another token than the model skips
    ],
    ids=str,
)
def test_reward_model_scores_at_the_last_token_whatever_the_padding_token_is(make_reward_model, pads):
    path = make_reward_model(**pads)
    model = load(path)
    assert score(model, CONVERSATIONS) == pytest.approx(plain_scores(path, model, CONVERSATIONS), rel=1e-4)


def test_reward_model_too_long_conversation_has_no_score_and_does_not_disturb_the_others(make_reward_model):
    model = load(make_reward_model())
    lengths = [len(model.tokenizer.apply_chat_template(c, tokenize=True, return_dict=False)) for c in CONVERSATIONS]
    limit = sorted(lengths)[-2]
    got = score(model, CONVERSATIONS, max_tokens=limit)
    assert [s is None for s in got] == [n > limit for n in lengths] == [False, True, False, False, False]
    assert got[3] == pytest.approx(score(model, [CONVERSATIONS[3]])[0], rel=1e-5)
    assert score(model, CONVERSATIONS, max_tokens=1) == [None] * 5


def test_reward_model_of_nothing_gives_nothing(make_reward_model):
    assert score(load(make_reward_model()), []) == []


@pytest.mark.parametrize("num_labels", [2, 5])
def test_reward_model_of_several_labels_is_a_config_error(make_reward_model, num_labels):
    with pytest.raises(ConfigError, match=f"{num_labels} labels"):
        load(make_reward_model(num_labels=num_labels))


def test_reward_model_without_chat_template_is_a_config_error(make_reward_model, tmp_path):
    path = make_reward_model()
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = None
    (tmp_path / "fresh").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "fresh" / name).write_bytes((tmp_path.__class__(path) / name).read_bytes())
    tokenizer.save_pretrained(tmp_path / "fresh")
    with pytest.raises(ConfigError, match="chat template"):
        load(str(tmp_path / "fresh"))
