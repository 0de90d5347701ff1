import hashlib
import json

import pytest

from dpo_ray.config import Generate, RunConfig
from dpo_ray.engines.policies import PolicyRef
from dpo_ray.engines.render import render
from dpo_ray.engines.requests import Sample
from dpo_ray.errors import StageError
from dpo_ray.flow.parts import split_into_parts
from dpo_ray.learn.tokens import load_tokenizer
from dpo_ray.schemas import completion_id, sample_seed
from dpo_ray.stages import generate

from ..artifacts import commit_policy, commit_tables, context, kept, quarantined
from ..learn import tiny
from ..test_config import minimal
from . import rows

pytestmark = pytest.mark.usefixtures("local_ray")
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{% for t in tools %}{{ t['name'] + ' ' }}{% endfor %}{% endif %}"
    "{% if shout %}w99 {% endif %}"
    "{% for m in messages %}{% if m['content'] == 'w13' %}{{ raise_exception('unlucky') }}{% endif %}"
    "{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}assistant"
)


class FakeEngine:
    """Stands for the engines: every sample is made of the hash of its prompt and its seed, so results are exact."""

    count = 1
    poison = None
    """Token that crashes the engine."""

    def use(self, policy):
        self.policy = policy

    def render(self, rows, template_kwargs, max_tokens):
        return render(self.policy, rows, template_kwargs, max_tokens)

    def generate(self, requests, sampling, max_crashes):
        samples = [[fake_sample(r.prompt_token_ids, r.seed + k) for k in range(r.n)] for r in requests]
        return [None if self.poison in r.prompt_token_ids else s for r, s in zip(requests, samples, strict=True)]


def fake_sample(prompt_token_ids, seed):
    digest = hashlib.sha256(json.dumps([prompt_token_ids, seed]).encode()).digest()
    reason = "length" if digest[0] % 2 else "stop"
    # Text and ids do not encode to each other: a stage that tokenised the text again would be found out.
    return Sample([6 + b % 90 for b in digest[:5]], f"<{digest.hex()[:8]}>", reason, -float(digest[1]))


@pytest.fixture(scope="module")
def templated(tmp_path_factory, policy):
    """The tiny policy's tokenizer with a template that shows tools and an option, and refuses the word w13."""
    directory = tmp_path_factory.mktemp("templated")
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return PolicyRef(str(directory), "identity-of-the-policy")


def run(tmp_path, policy, prompts, round_=0, engine=None, **fields):
    block = {"num_completions": 3, "max_prompt_tokens": 12, "max_dropped": 1.0, "resources": {"rows_per_part": 4}} | fields
    config = RunConfig.model_validate(minimal() | {"seed": 5, "generate": block})
    inputs = {
        "prompts": commit_tables(tmp_path / "prompts", [rows.prompts(prompts)], prefix="train-"),
        "policy": commit_policy(tmp_path / "policy", policy.path, policy.identity),
    }
    slices = lambda artifact, config, round_: split_into_parts(artifact, 4, prefix="train-")
    stage = generate.stage(config, round_, "policy", slices)
    output = stage.run(context(tmp_path / "out", inputs, engine=engine or FakeEngine()))
    return output, kept(tmp_path / "out", output)


PROMPTS = [rows.prompt_row(f"w{20 + i} w{30 + i}") for i in range(6)]


def test_generate_applies_the_template_once_and_keeps_what_the_engine_sampled(tmp_path, templated):
    output, got = run(tmp_path, templated, PROMPTS)
    tokenizer = load_tokenizer(templated.path)
    assert [r["prompt_id"] for r in got] == [p["prompt_id"] for p in PROMPTS]
    for row, prompt in zip(got, PROMPTS, strict=True):
        ids = tokenizer.apply_chat_template(prompt["prompt"], add_generation_prompt=True, return_dict=False)
        assert row["prompt_token_ids"] == ids
        assert ids.count(tiny.BOS) == 1
        seed = sample_seed(5, 0, prompt["prompt_id"])
        for k, c in enumerate(row["completions"]):
            wanted = fake_sample(ids, seed + k)
            assert (c["token_ids"], c["text"], c["finish_reason"]) == (wanted.token_ids, wanted.text, wanted.finish_reason)
            assert c["sampler_logps_sum"] == wanted.logps_sum
            assert c["seed"] == seed + k
            assert c["completion_id"] == completion_id(prompt["prompt_id"], 0, templated.identity, k)
            assert c["policy"] == templated.identity
            assert c["drop_reason"] is None
    completions = [c for row in got for c in row["completions"]]
    assert len({c["completion_id"] for c in completions}) == len({c["seed"] for c in completions}) == 18
    cut = sum(c["finish_reason"] == "length" for c in completions)
    assert 0 < cut < 18
    assert output.metrics == {"completions": 18, "tokens": 90, "cut_by_length": cut}


def test_generate_keeps_every_column_of_its_prompts(tmp_path, templated):
    prompts = [p | {"meta": json.dumps({"n": i})} for i, p in enumerate(PROMPTS)]
    _, got = run(tmp_path, templated, prompts)
    assert [{k: r[k] for k in prompts[0]} for r in got] == prompts


def test_generate_rounds_have_other_seeds_and_ids(tmp_path, templated):
    _, first = run(tmp_path / "0", templated, PROMPTS[:1])
    _, second = run(tmp_path / "1", templated, PROMPTS[:1], round_=1)
    assert (first[0]["round"], second[0]["round"]) == (0, 1)
    for field in ("seed", "completion_id", "text"):
        assert {c[field] for c in first[0]["completions"]}.isdisjoint(c[field] for c in second[0]["completions"])


class Crashing(FakeEngine):
    poison = 66


def test_generate_prompt_that_crashes_its_engine_is_quarantined_and_the_others_keep_theirs(tmp_path, templated):
    prompts = [*PROMPTS[:2], rows.prompt_row("w66"), *PROMPTS[2:]]
    output, got = run(tmp_path, templated, prompts, engine=Crashing())
    assert (output.rows_in, output.rows_out, output.dropped) == (7, 6, {"engine_crash": 1})
    assert got == run(tmp_path / "without", templated, PROMPTS)[1]
    (lost,) = quarantined(tmp_path / "out", output)
    assert (lost["prompt_id"], lost["drop_reason"]) == (prompts[2]["prompt_id"], "engine_crash")
    with pytest.raises(StageError, match=r"1 of 7 rows dropped \(engine_crash 1\)"):
        run(tmp_path / "strict", templated, prompts, engine=Crashing(), max_dropped=0.1)


def test_generate_prompt_that_is_too_long_or_refused_is_quarantined_by_reason(tmp_path, templated):
    long = rows.prompt_row(" ".join(["w50"] * 10))  # bos, user, 10 words, assistant: 13 tokens, one above the limit
    fits = rows.prompt_row(" ".join(["w50"] * 9))
    refused = rows.prompt_row("w13")
    output, got = run(tmp_path, templated, [*PROMPTS[:2], long, refused, fits])
    assert (output.rows_in, output.rows_out) == (5, 3)
    assert output.dropped == {"prompt_too_long": 1, "template_error": 1}
    assert len(got[-1]["prompt_token_ids"]) == 12
    reasons = {q["prompt"][0]["content"]: q["drop_reason"] for q in quarantined(tmp_path / "out", output)}
    assert reasons[long["prompt"][0]["content"]] == "prompt_too_long"
    assert reasons["w13"].startswith("template_error: ")
    assert "unlucky" in reasons["w13"]


def test_generate_every_prompt_too_long_is_a_stage_error(tmp_path, templated):
    with pytest.raises(StageError, match="prompt_too_long 6"):
        run(tmp_path, templated, PROMPTS, max_prompt_tokens=2)


def test_generate_tools_and_template_options_reach_the_template(tmp_path, templated):
    tools = json.dumps([{"name": "w70"}, {"name": "w71"}])
    prompts = [rows.prompt_row("w20", tools=tools), rows.prompt_row("w21")]
    _, got = run(tmp_path, templated, prompts, chat_template_kwargs={"shout": True})
    words = load_tokenizer(templated.path).convert_ids_to_tokens
    assert words(got[0]["prompt_token_ids"]) == ["<bos>", "w70", "w71", "w99", "user", "w20", "assistant"]
    assert words(got[1]["prompt_token_ids"]) == ["<bos>", "w99", "user", "w21", "assistant"]


class ParametersEngine(FakeEngine):
    """Answers with the sampling parameters that it was given, as text."""

    def generate(self, requests, sampling, max_crashes):
        text = json.dumps({**sampling, "policy": self.policy.identity}, default=list)
        return [[Sample([6], text, "stop", None) for _ in range(r.n)] for r in requests]


def test_generate_engine_gets_every_sampling_parameter_and_the_policy(tmp_path, templated):
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_new_tokens": 3, "stop": ["w9"], "stop_token_ids": [4]}
    _, got = run(tmp_path, templated, PROMPTS[:1], engine=ParametersEngine(), sampling=sampling, sampler_logps=True)
    given = json.loads(got[0]["completions"][0]["text"])
    assert given == {
        **Generate.model_validate({"sampling": sampling}).sampling.model_dump(mode="json"),
        "logps": True,
        "policy": templated.identity,
    }


class FailingEngine(FakeEngine):
    def generate(self, requests, sampling, max_crashes):
        raise StageError("engines died 3 times on one part")


def test_generate_error_of_the_engine_comes_out_as_raised(tmp_path, templated):
    with pytest.raises(StageError, match="engines died 3 times on one part") as error:
        run(tmp_path, templated, PROMPTS, engine=FailingEngine())
    assert str(error.value) == "engines died 3 times on one part"
