import pickle

import pytest
import yaml

from dpo_ray import errors
from dpo_ray.cli import describe, load_config, overrides, parse_arguments
from dpo_ray.config import RunConfig
from dpo_ray.errors import ConfigError

from .test_config import minimal, without


@pytest.fixture
def path(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(minimal()))
    return str(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5e-7", 5e-7),
        ("-2e3", -2000.0),
        ("1.5e-4", 1.5e-4),
        ("0.2", 0.2),
        ("3", 3),
        ("true", True),
        ("null", None),
        ("[1, 8]", [1, 8]),
        ("{enable_thinking: false}", {"enable_thinking": False}),
        ("some/policy", "some/policy"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("model-1e-4", "model-1e-4"),
    ],
)
def test_overrides_value_means_what_it_says(text, value):
    got = overrides(["--a.b", text])["a.b"]
    assert got == value
    assert type(got) is type(value)
    assert overrides([f"--a.b={text}"]) == {"a.b": value}


def test_overrides_dashes_and_later_values_win():
    assert overrides(["--prompts-per-round", "4", "--seed=1", "--seed", "2"]) == {"prompts_per_round": 4, "seed": 2}


@pytest.mark.parametrize("argument", ["--x=a=b", "--x=--y"])
def test_overrides_value_after_the_first_equals_sign_is_kept_whole(argument):
    assert overrides([argument]) == {"x": argument.partition("=")[2]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["train.beta", "0.2"], "train.beta"), (["--train.beta"], "needs a value"), (["-b", "1"], "-b"), (["--"], "--")],
)
def test_overrides_malformed_is_a_config_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        overrides(arguments)


def test_load_config_short_form_of_a_block_keeps_its_other_fields(path):
    with open(path, "a") as file:
        file.write("reference: {policy: previous, max_batch_tokens: 99}\n")
    reference = load_config(path, overrides(["--reference", "initial"])).reference
    assert (reference.policy, reference.max_batch_tokens) == ("initial", 99)


def test_load_config_overrides_go_over_the_yaml(path):
    dotted = overrides(
        [
            "--train.beta",
            "0.3",
            "--train.learning_rate=1e-4",
            "--generate.sampling.stop",
            "[a, b]",
            "--reference",
            "initial",
            "--generate.resources.actors",
            "[1, 2]",
            "--generate.chat_template_kwargs.enable_thinking",
            "false",
        ]
    )
    config = load_config(path, dotted)
    assert (config.train.beta, config.train.learning_rate) == (0.3, 1e-4)
    assert config.generate.sampling.stop == ("a", "b")
    assert config.reference.policy == "initial"
    assert config.generate.resources.actors == (1, 2)
    assert config.generate.chat_template_kwargs == {"enable_thinking": False}
    assert config.policy == "some/policy"


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("train.bta", "train.bta"),
        ("traim.beta", "traim"),
        ("generate.sampling.temprature", "generate.sampling.temprature"),
        ("score.modle", "score.modle"),
    ],
)
def test_load_config_unknown_flag_is_an_error_that_names_it(path, flag, named):
    with pytest.raises(ConfigError, match=f"{named}: unknown"):
        load_config(path, {flag: 1})


@pytest.mark.parametrize(("field", "value"), [("train.beta", -1), ("rounds", "many"), ("root", "relative/path")])
def test_load_config_invalid_value_is_an_error_with_field_and_value(path, field, value):
    with pytest.raises(ConfigError) as error:
        load_config(path, {field: value})
    assert field in str(error.value)
    assert str(value) in str(error.value)


@pytest.mark.parametrize("field", ["policy", "train.beta", "score.function"])
def test_load_config_missing_field_is_named_as_its_flag(tmp_path, field):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(without(field)))
    with pytest.raises(ConfigError) as error:
        load_config(str(tmp_path / "run.yaml"))
    assert f"{field}: missing" in str(error.value)


def test_load_config_names_every_bad_field_at_once(path):
    with pytest.raises(ConfigError) as error:
        load_config(path, {"train.beta": -1, "seed": "x", "pear": 1})
    assert all(name in str(error.value) for name in ("train.beta", "seed", "pear"))


def test_load_config_field_below_a_plain_value_is_an_error(path):
    with pytest.raises(ConfigError, match=r"policy\.name"):
        load_config(path, {"policy.name": "x"})


@pytest.mark.parametrize("text", ["- a\n- b\n", "", "a: [1", "just text"])
def test_load_config_file_that_is_no_mapping_is_a_config_error(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_config(str(tmp_path / "run.yaml"))


def test_load_config_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_config(str(tmp_path / "none.yaml"))


def test_parse_arguments_takes_options_and_overrides_in_any_order(path):
    arguments, config = parse_arguments(
        [path, "--until", "pair", "--train.beta", "0.4", "--redo", "score", "--dry-run", "--redo=round_00/pair", "--seed=-3"]
    )
    assert (arguments.until, arguments.redo, arguments.dry_run) == ("pair", ["score", "round_00/pair"], True)
    assert (config.train.beta, config.seed) == (0.4, -3)


def test_parse_arguments_negative_value_after_a_space_is_that_value(path):
    assert parse_arguments([path, "--generate.sampling.presence_penalty", "-0.5"])[1].generate.sampling.presence_penalty == -0.5


def test_parse_arguments_reads_no_environment(path, monkeypatch):
    before = parse_arguments([path])[1]
    for name in ("NAME", "POLICY", "TRAIN_BETA", "TRAIN__BETA", "SEED"):
        monkeypatch.setenv(name, "7")
    assert parse_arguments([path])[1] == before


def test_describe_lists_every_leaf_of_the_tree_with_its_documentation():
    lines = describe(RunConfig)
    flags = {line.split()[0] for line in lines}
    assert {"--policy", "--train.beta", "--generate.sampling.top_p", "--score.function", "--score.model"} <= flags
    assert "--train" not in flags
    beta = next(line for line in lines if line.split()[0] == "--train.beta")
    assert "pull to the reference" in beta


def test_every_error_survives_pickling_with_its_message():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.DpoRayError)]
    assert len(kinds) > 5
    for kind in kinds:
        back = pickle.loads(pickle.dumps(kind("what, where")))
        assert type(back) is kind
        assert str(back) == "what, where"
