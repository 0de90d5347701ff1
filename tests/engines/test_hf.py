"""The fallback engine on a tiny random model, in this process."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_ray.engines.hf import HfEngine
from dpo_ray.engines.policies import PolicyRef
from dpo_ray.engines.requests import EngineSettings, Request
from dpo_ray.learn.policy_files import policy_identity

from ..learn import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = EngineSettings(
    kind="hf",
    dtype="float32",
    max_model_len=40,
    engine_args={},
    tensor_parallel=1,
    gpus=0.0,
    cpus=1.0,
    parts_in_flight=1,
    closed=False,
)
SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "max_new_tokens": 6,
    "stop": (),
    "stop_token_ids": (),
    "logps": False,
}
REQUESTS = [Request([1, 10 + i, 20 + i, 30 + i], seed=1000 * i, n=2) for i in range(3)]


@pytest.fixture(scope="module")
def engine(policy):
    return HfEngine(SETTINGS, policy)


def sample(engine, requests=REQUESTS, **sampling):
    return engine.generate(requests, SAMPLING | sampling)


def test_hf_same_seed_gives_the_same_samples(engine):
    assert sample(engine) == sample(engine)


def test_hf_samples_do_not_depend_on_the_batch_around_them(engine):
    together = sample(engine)
    assert sample(engine, REQUESTS[::-1]) == together[::-1]
    assert sample(engine, REQUESTS[1:2]) == together[1:2]
    fewer = [r._replace(n=1) for r in REQUESTS]
    assert [samples[:1] for samples in together] == sample(engine, fewer)


def test_hf_sample_k_is_that_of_the_seed_plus_k(engine):
    (two,) = sample(engine, REQUESTS[:1])
    (shifted,) = sample(engine, [REQUESTS[0]._replace(seed=REQUESTS[0].seed + 1, n=1)])
    assert shifted[0] == two[1]


def test_hf_samples_of_other_seeds_differ(engine):
    got = sample(engine, [REQUESTS[0]._replace(n=6)])[0]
    assert len({tuple(s.token_ids) for s in got}) == 6


@pytest.mark.parametrize(("max_new_tokens", "prompt_length", "wanted"), [(5, 4, 5), (200, 30, 10)])
def test_hf_completion_that_reaches_the_limit_has_no_end_token(engine, max_new_tokens, prompt_length, wanted):
    """The limit is max_new_tokens, or what the engine's max_model_len of 40 leaves."""
    got = sample(engine, [Request([10] * prompt_length, 0, 3)], max_new_tokens=max_new_tokens)[0]
    cut = [s for s in got if s.finish_reason == "length"]
    assert cut
    assert all(len(s.token_ids) == wanted and tiny.EOS not in s.token_ids for s in cut)


def test_hf_end_token_stops_and_is_kept_in_the_ids_alone(engine):
    """One of 101 tokens ends; 10 samples of up to 36 tokens hold some."""
    got = sample(engine, [Request([1, 50], 7, 10)], max_new_tokens=36)[0]
    stopped = [s for s in got if s.finish_reason == "stop"]
    assert stopped
    for s in stopped:
        assert s.token_ids.count(tiny.EOS) == 1
        assert s.token_ids[-1] == tiny.EOS
        assert "<eos>" not in s.text
    assert all(tiny.EOS not in s.token_ids for s in got if s.finish_reason == "length")


def test_hf_stop_token_id_of_the_sampling_ends_too(engine):
    (free,) = sample(engine, REQUESTS[:1])[0][:1]
    stop = free.token_ids[4]
    (got,) = sample(engine, REQUESTS[:1], stop_token_ids=(stop,))[0][:1]
    assert got.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert got.finish_reason == "stop"


@pytest.fixture(scope="module")
def bytes_policy(tmp_path_factory):
    """A policy that writes single bytes: transformers' stop strings need a tokenizer that can spell any text."""
    directory = tmp_path_factory.mktemp("bytes")
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template="x")
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = {**tiny.DECODER, "vocab_size": len(vocabulary), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(directory)
    return PolicyRef(str(directory), policy_identity(directory))


def test_hf_stop_string_ends_the_completion_and_is_not_in_its_text(bytes_policy):
    engine = HfEngine(SETTINGS, bytes_policy)
    request = [Request([40, 50, 60], 3, 1)]
    ((free,),) = sample(engine, request, max_new_tokens=30)
    stop = next(c for c in free.text[8:] if c.isascii() and c.isprintable())
    ((got,),) = sample(engine, request, max_new_tokens=30, stop=(stop,))
    assert got.text == free.text[: free.text.index(stop)]
    assert got.finish_reason == "stop"
    assert got.token_ids == free.token_ids[: len(got.token_ids)]
    assert len(got.token_ids) < len(free.token_ids) == 30


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.5, "top_k": 5}, {"temperature": 2.0, "top_p": 0.8, "min_p": 0.01}])
def test_hf_logps_are_those_of_the_unscaled_distribution(engine, sampling):
    """Against one plain forward in float64, a loop over tokens; measured error below 2e-6 nats."""
    model = tiny.build_model("llama")
    (got,) = sample(engine, REQUESTS[1:2], logps=True, **sampling)
    for s in got:
        assert s.logps_sum == pytest.approx(tiny.naive_logps(model, REQUESTS[1].prompt_token_ids, s.token_ids), abs=1e-4)


def test_hf_logps_not_asked_for_are_none(engine):
    assert {s.logps_sum for s in sample(engine, REQUESTS[:1])[0]} == {None}


def test_hf_low_temperature_and_top_k_narrow_the_samples(engine):
    greedy = sample(engine, [REQUESTS[0]._replace(n=4)], top_k=1)[0]
    assert len({tuple(s.token_ids) for s in greedy}) == 1
