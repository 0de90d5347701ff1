from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray._private.label_utils import validate_label_selector

from dpo_ray.cli import load_config
from dpo_ray.config import (
    ActorResources,
    DataResources,
    EngineResources,
    Generate,
    PreferenceRun,
    RunConfig,
    SftRun,
    TrainResources,
    run_class,
)
from dpo_ray.errors import ConfigError

PIPELINES = sorted((Path(__file__).parents[1] / "pipelines").glob("*.yaml"))


def minimal() -> dict[str, Any]:
    return {
        "name": "run",
        "root": "/data",
        "policy": "some/policy",
        "prompts_per_round": 8,
        "prompts": {"source": "prompts.jsonl"},
        "score": {"kind": "function", "function": "package:score"},
        "train": {"beta": 0.1, "learning_rate": 1e-5},
    }


def changed(path: str, value: Any) -> dict[str, Any]:
    tree = minimal()
    *blocks, last = path.split(".")
    inner = tree
    for block in blocks:
        inner = inner.setdefault(block, {})
    inner[last] = value
    return tree


def without(path: str) -> dict[str, Any]:
    tree = minimal()
    *blocks, last = path.split(".")
    inner = tree
    for block in blocks:
        inner = inner[block]
    del inner[last]
    return tree


def locations(error: ValidationError) -> list[str]:
    return [".".join(str(part) for part in e["loc"]) for e in error.errors()]


def test_pipelines_hold_some_yaml():
    assert PIPELINES


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: p.stem)
def test_pipeline_yaml_validates(path):
    assert load_config(str(path)).policy


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: p.stem)
def test_resolved_config_written_and_read_again_is_equal(path, tmp_path):
    config = load_config(str(path))
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert load_config(str(tmp_path / "resolved.yaml")) == config


@pytest.mark.parametrize(
    "path",
    [
        "name",
        "root",
        "policy",
        "prompts_per_round",
        "prompts",
        "prompts.source",
        "score",
        "train",
        "train.beta",
        "train.learning_rate",
    ],
)
def test_config_without_what_decides_the_result_is_refused(path):
    with pytest.raises(ValidationError) as error:
        RunConfig.model_validate(without(path))
    assert locations(error.value) == [path]
    assert error.value.errors()[0]["type"] == "missing"


@pytest.mark.parametrize(
    "path", ["bta", "train.bta", "generate.sampling.temprature", "generate.resources.gpu", "pair.resources.gpus"]
)
def test_config_unknown_key_is_refused_with_its_place(path):
    with pytest.raises(ValidationError) as error:
        RunConfig.model_validate(changed(path, 1))
    assert locations(error.value) == [path]
    assert error.value.errors()[0]["type"] == "extra_forbidden"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("root", "runs/here"),
        ("root", "./runs"),
        ("name", "a/b"),
        ("name", "../up"),
        ("name", ""),
        ("rounds", 0),
        ("prompts_per_round", 0),
        ("train.beta", 0),
        ("train.beta", -0.1),
        ("train.beta", float("inf")),
        ("train.learning_rate", float("nan")),
        ("train.learning_rate", 0),
        ("train.warmup_ratio", 1.0),
        ("train.warmup_steps", -1),
        ("train.logging_steps", 0),
        ("train.report_to", "tensorboardx"),
        ("train.optimizer", "sgd"),
        ("train.loss", "hnge"),
        ("train.loss", []),
        ("train.ld_alpha", 1.0),
        ("train.dtype", "float16"),
        ("generate.num_completions", 1),
        ("generate.sampling.temperature", 0),
        ("generate.sampling.top_p", 1.5),
        ("generate.resources.actors", 0),
        ("generate.resources.actors", [4, 2]),
        ("pair.method", "best"),
        ("pair.min_gap", -1),
        ("score.kind", "oracle"),
    ],
)
def test_config_value_out_of_range_is_refused_with_its_place(path, value):
    with pytest.raises(ValidationError) as error:
        RunConfig.model_validate(changed(path, value))
    assert locations(error.value)[0].startswith(path.rpartition(".")[0])


@pytest.mark.parametrize(
    ("root", "directory"),
    [
        ("/data/", "/data/run"),
        ("s3://bucket/prefix/", "s3://bucket/prefix/run"),
        ("gs://bucket", "gs://bucket/run"),
        ("~/runs", str(Path.home() / "runs/run")),
    ],
)
def test_config_root_absolute_or_uri_gives_the_run_its_directory(root, directory):
    assert RunConfig.model_validate(changed("root", root)).directory == directory


def test_config_several_rounds_without_reference_is_refused():
    with pytest.raises(ValidationError, match="reference"):
        RunConfig.model_validate(minimal() | {"rounds": 2})


@pytest.mark.parametrize("reference", ["initial", "previous", "/models/anchor", {"policy": "previous", "max_batch_tokens": 64}])
def test_config_several_rounds_with_reference_keep_it(reference):
    config = RunConfig.model_validate(minimal() | {"rounds": 2, "reference": reference})
    assert config.reference.policy == (reference if isinstance(reference, str) else reference["policy"])


@pytest.mark.parametrize(
    ("gpus", "tensor_parallel", "valid"),
    [
        (0, 1, True),
        (0, 2, True),
        (0.5, 1, True),
        (1, 1, True),
        (2, 2, True),
        (8, 8, True),
        (2, 1, False),
        (2, 4, False),
        (1, 2, False),
        (0.5, 2, False),
    ],
)
def test_engine_resources_give_one_gpu_to_each_shard(gpus, tensor_parallel, valid):
    if valid:
        EngineResources(gpus=gpus, tensor_parallel=tensor_parallel)
    else:
        with pytest.raises(ValidationError, match="tensor_parallel"):
            EngineResources(gpus=gpus, tensor_parallel=tensor_parallel)


@pytest.mark.parametrize(("actors", "low", "high"), [(3, 3, 3), ((1, 8), 1, 8)])
def test_actor_resources_count_or_range_give_both_bounds(actors, low, high):
    resources = ActorResources(actors=actors)
    assert (resources.min_actors, resources.max_actors) == (low, high)


@pytest.mark.parametrize(
    ("global_batch_size", "workers", "valid"), [(64, 2, True), (6, 3, True), (64, 3, False), (1, 2, False)]
)
def test_config_global_batch_must_divide_over_workers(global_batch_size, workers, valid):
    tree = minimal()
    tree["train"] |= {"global_batch_size": global_batch_size, "resources": {"workers": workers}}
    if valid:
        assert RunConfig.model_validate(tree).train.resources.workers == workers
    else:
        with pytest.raises(ValidationError, match="global_batch_size"):
            RunConfig.model_validate(tree)


@pytest.mark.parametrize(("workers", "low", "high"), [(3, 3, 3), ([1, 8], 1, 8), ([2, 2], 2, 2)])
def test_train_resources_count_or_range_give_both_bounds(workers, low, high):
    resources = TrainResources.model_validate({"workers": workers})
    assert (resources.min_workers, resources.max_workers) == (low, high)


@pytest.mark.parametrize("workers", [0, [0, 2], [3, 2]])
def test_train_resources_refuse_what_is_no_range(workers):
    with pytest.raises(ValidationError, match=r"\[min, max\] with 1 <= min <= max"):
        TrainResources.model_validate({"workers": workers})


@pytest.mark.parametrize(("global_batch_size", "valid"), [(8, True), (9, True), (7, False)])
def test_config_elastic_workers_need_a_pair_each_and_no_multiple(global_batch_size, valid):
    """A global batch of 9 on 2 to 8 workers: the plan spreads it over any number."""
    tree = minimal()
    tree["train"] |= {"global_batch_size": global_batch_size, "resources": {"workers": [2, 8]}}
    if valid:
        RunConfig.model_validate(tree)
    else:
        with pytest.raises(ValidationError, match=r"global_batch_size=7 cannot be cut into workers=\[2, 8\]"):
            RunConfig.model_validate(tree)


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_generate_penalty_that_the_hf_engine_lacks_is_refused(penalty):
    Generate.model_validate({"engine": "vllm", "sampling": {penalty: 0.5}})
    with pytest.raises(ValidationError, match=penalty):
        Generate.model_validate({"engine": "hf", "sampling": {penalty: 0.5}})


@pytest.mark.parametrize("field", ["tensor_parallel", "context_parallel"])
def test_train_parallelism_that_is_not_there_is_refused_with_what_to_do(field):
    with pytest.raises(ValidationError, match=rf"{field} is not supported.*use more workers") as error:
        RunConfig.model_validate(changed(f"train.resources.{field}", 1))
    assert locations(error.value) == ["train.resources"]


def test_lora_dropout_is_refused():
    with pytest.raises(ValidationError, match="a policy with dropout differs from its reference"):
        RunConfig.model_validate(changed("train.lora", {"r": 4, "alpha": 8, "dropout": 0.1}))
    lora = RunConfig.model_validate(changed("train.lora", {"r": 4, "alpha": 8, "target_modules": ["q_proj"]})).train.lora
    assert lora is not None
    assert lora.target_modules == ("q_proj",)


def test_train_offload_without_a_gpu_is_refused():
    with pytest.raises(ValidationError, match="cpu_offload=true would be ignored"):
        RunConfig.model_validate(changed("train.resources.cpu_offload", True))
    assert RunConfig.model_validate(changed("train.resources", {"gpus": 1, "cpu_offload": True})).train.resources.cpu_offload


def test_config_reads_nothing_from_the_environment(monkeypatch):
    before = RunConfig.model_validate(minimal())
    for name in ("NAME", "POLICY", "ROOT", "SEED", "ROUNDS", "PROMPTS", "TRAIN", "TRAIN_BETA", "TRAIN__BETA", "train.beta"):
        monkeypatch.setenv(name, "7")
        monkeypatch.setenv(f"DPO_RAY_{name}", "7")
    assert RunConfig.model_validate(minimal()) == before


@pytest.mark.parametrize("path", ["policy", "train.beta"])
def test_config_missing_field_is_not_filled_from_the_environment(path, monkeypatch):
    for name in (path, path.upper(), path.upper().replace(".", "_"), path.upper().replace(".", "__")):
        monkeypatch.setenv(name, "0.7")
    with pytest.raises(ValidationError):
        RunConfig.model_validate(without(path))


@pytest.mark.parametrize(
    ("fields", "num_steps", "warmup"),
    [
        ({}, 25, 3),
        ({"warmup_ratio": 0.5}, 7, 4),
        ({"warmup_ratio": 0.0}, 7, 0),
        ({"warmup_steps": 5}, 7, 5),
        ({"warmup_steps": 0}, 7, 0),
    ],
)
def test_train_warmup_is_a_share_rounded_up_or_a_number_of_steps(fields, num_steps, warmup):
    tree = minimal()
    train = RunConfig.model_validate(tree | {"train": tree["train"] | fields}).train
    assert train.num_warmup_steps(num_steps) == warmup


def test_train_warmup_given_twice_is_refused():
    tree = minimal()
    tree["train"] |= {"warmup_ratio": 0.1, "warmup_steps": 5}
    with pytest.raises(ValidationError, match=r"warmup_ratio=0.1 and warmup_steps=5 both say"):
        RunConfig.model_validate(tree)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_bnb_8bit"])
def test_train_8bit_optimizer_is_refused_with_the_reason(optimizer):
    with pytest.raises(ValidationError, match="has not been shown to step on them; use adamw"):
        RunConfig.model_validate(changed("train.optimizer", optimizer))


@pytest.mark.parametrize(("given", "kept"), [("wandb", ("wandb",)), (["mlflow", "wandb"], ("mlflow", "wandb")), ([], ())])
def test_train_report_to_is_a_name_or_a_list(given, kept):
    assert RunConfig.model_validate(changed("train.report_to", given)).train.report_to == kept


def test_config_is_frozen():
    config = RunConfig.model_validate(minimal())
    with pytest.raises(ValidationError):
        config.train.beta = 0.5  # type: ignore[misc]


# A run on existing preferences


def minimal_preferences() -> dict[str, Any]:
    return {
        "name": "run",
        "root": "/data",
        "policy": "some/policy",
        "preferences": {"kind": "explicit", "source": "pairs.jsonl"},
        "train": {"beta": 0.1, "learning_rate": 1e-5},
    }


def test_preference_run_is_chosen_by_its_block():
    assert run_class(minimal_preferences()) is PreferenceRun
    assert run_class(minimal()) is RunConfig
    assert PreferenceRun.model_validate(minimal_preferences()).pairs_per_round is None


@pytest.mark.parametrize("block", ["prompts", "prompts_per_round", "generate", "score", "pair"])
def test_preference_run_refuses_what_would_sample_or_score(block):
    with pytest.raises(ValidationError, match=f"{block} would be ignored"):
        PreferenceRun.model_validate(minimal_preferences() | {block: {}})


def test_preference_run_of_several_rounds_needs_pairs_per_round():
    tree = minimal_preferences() | {"rounds": 2, "reference": "initial"}
    with pytest.raises(ValidationError, match="pairs_per_round"):
        PreferenceRun.model_validate(tree)
    assert PreferenceRun.model_validate(tree | {"pairs_per_round": 4}).rounds == 2


def minimal_sft() -> dict[str, Any]:
    return {
        "name": "run",
        "root": "/data",
        "policy": "some/policy",
        "conversations": {"source": "chats.jsonl"},
        "train": {"learning_rate": 1e-5, "dtype": "float32"},
    }


def test_sft_run_is_chosen_by_its_block_and_needs_no_beta():
    assert run_class(minimal_sft()) is SftRun
    assert SftRun.model_validate(minimal_sft()).train.mean_over == "tokens"


@pytest.mark.parametrize("block", ["prompts", "preferences", "generate", "score", "pair", "reference", "rounds"])
def test_sft_run_refuses_what_belongs_to_rounds(block):
    with pytest.raises(ValidationError, match=f"{block} would be ignored"):
        SftRun.model_validate(minimal_sft() | {block: {}})


@pytest.mark.parametrize("option", ["beta", "loss", "wpo"])
def test_sft_run_refuses_options_of_preference_losses(option):
    tree = minimal_sft()
    with pytest.raises(ValidationError, match=option):
        SftRun.model_validate(tree | {"train": tree["train"] | {option: 1}})


# Options that another one leaves without effect


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"prompts": {"source": "a.jsonl", "subset": "main"}}, "subset"),
        ({"prompts": {"source": "a.jsonl", "source_split": "test"}}, "source_split"),
        ({"prompts": {"source": "quickstart", "revision": "v1"}}, "revision"),
        ({"policy": "quickstart", "policy_revision": "v1"}, "policy_revision"),
        ({"policy": "/models/mine", "policy_revision": "v1"}, "policy_revision"),
        ({"reference": {"policy": "initial", "revision": "v1"}}, "revision"),
        ({"reference": {"policy": "/models/anchor", "revision": "v1"}}, "revision"),
        ({"generate": {"engine": "hf", "deterministic": True}}, "deterministic"),
        ({"generate": {"engine": "hf", "engine_args": {"max_num_seqs": 8}}}, "engine_args"),
        ({"generate": {"engine": "hf", "resources": {"tensor_parallel": 2}}}, "tensor_parallel"),
        ({"pair": {"min_gap": 0.5, "drop_ties": False}}, "drop_ties"),
    ],
)
def test_config_option_that_another_disables_is_refused(fields, option):
    with pytest.raises(ValidationError, match=f"{option}.* would be ignored"):
        RunConfig.model_validate(minimal() | fields)


@pytest.mark.parametrize("option", ["cache", "per_token"])
def test_config_reference_option_without_a_reference_is_refused(option):
    fields = {"train": minimal()["train"] | {"loss": "simpo"}, "reference": {option: option == "per_token"}}
    with pytest.raises(ValidationError, match=f"{option} would be ignored"):
        RunConfig.model_validate(minimal() | fields)
    assert RunConfig.model_validate(minimal() | fields | {"train": minimal()["train"]}).reference.changed(option)


# Reference values taken over from the engine


def reusing(reference: Any = (), generate: Any = (), train: Any = (), **fields: Any) -> dict[str, Any]:
    tree = minimal() | fields
    tree["train"] = tree["train"] | dict(train)
    return tree | {"reference": {"reuse": "sampler"} | dict(reference), "generate": {"sampler_logps": True} | dict(generate)}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reference": {"policy": "initial"}},
        {"reference": {"policy": "previous"}, "rounds": 3},
        {"generate": {"engine_args": {"logprobs_mode": "raw_logprobs", "max_num_seqs": 8}}},
        {"generate": {"engine": "hf", "sampling": {"temperature": 0.5}}},
        {"train": {"loss": ["simpo", "sigmoid"]}},
    ],
)
def test_config_reuse_of_sampler_values_is_taken_where_the_reference_samples(fields):
    assert RunConfig.model_validate(reusing(**fields)).reference.reuse == "sampler"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generate": {"sampler_logps": False}}, "needs generate.sampler_logps: true"),
        ({"generate": {"engine_args": {"logprobs_mode": "processed_logprobs"}}}, "logprobs_mode 'processed_logprobs'"),
        ({"generate": {"engine_args": {"quantization": "fp8"}}}, "quantization 'fp8'"),
        ({"reference": {"per_token": True}}, "per_token asks for each token's"),
        ({"train": {"ld_alpha": 0.5}}, "train.ld_alpha needs each token's"),
        ({"train": {"loss": "simpo"}}, "reference.reuse would be ignored"),
        ({"reference": {"policy": "/models/anchor"}}, "'/models/anchor' does not sample"),
        ({"reference": {"policy": "org/anchor"}}, "'org/anchor' does not sample"),
        ({"reference": {"policy": "initial"}, "rounds": 2}, "`initial` and rounds=2"),
    ],
)
def test_config_reuse_of_sampler_values_is_refused_where_they_are_of_something_else(fields, message):
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(reusing(**fields))
    reference = dict(fields.get("reference", ())) | {"reuse": "none"}
    assert RunConfig.model_validate(reusing(**fields | {"reference": reference})).reference.reuse == "none"


def test_preference_run_refuses_sampler_values():
    with pytest.raises(ValidationError, match="nobody sampled existing preferences"):
        PreferenceRun.model_validate(minimal_preferences() | {"reference": {"reuse": "sampler"}})


def test_config_revisions_of_hub_names_are_taken():
    config = RunConfig.model_validate(
        minimal()
        | {
            "policy_revision": "v1",
            "reference": {"policy": "org/anchor", "revision": "v2"},
            "prompts": {"source": "datasets:org/data", "revision": "v3", "source_split": "test", "subset": "main"},
        }
    )
    assert (config.policy_revision, config.reference.revision, config.prompts.revision) == ("v1", "v2", "v3")


# Labels of nodes


@pytest.mark.parametrize(
    "labels", [{}, {"pool": "train"}, {"dpo.dev/pool": "in(a, b-1)", "market": "!spot", "x": "!in(a,b)"}], ids=str
)
def test_node_labels_that_ray_can_select_are_taken_by_every_kind_of_resources(labels):
    for kind in (DataResources, ActorResources, EngineResources, TrainResources):
        assert kind(node_labels=labels).node_labels == {key: value.replace(", ", ",") for key, value in labels.items()}
    assert validate_label_selector(labels) is None


@pytest.mark.parametrize(
    "labels",
    [
        {"pool": ""},
        {"pool": "two words"},
        {"pool": "in()"},
        {"pool": "-x"},
        {"po ol": "x"},
        {"a/b/c": "x"},
        {"": "x"},
        {"x": "!!y"},
    ],
    ids=str,
)
def test_node_labels_that_ray_cannot_select_are_refused(labels):
    for kind in (DataResources, TrainResources):
        with pytest.raises(ValidationError, match="expected a Kubernetes label"):
            kind(node_labels=labels)


def test_node_labels_of_evaluate_would_be_ignored_and_are_refused():
    with pytest.raises(ValidationError, match="set theirs"):
        RunConfig.model_validate(changed("evaluate.resources.node_labels", {"pool": "x"}))
    assert PreferenceRun.model_validate(minimal_preferences() | {"evaluate": {"resources": {"node_labels": {"pool": "x"}}}})


# What must not be written down


@pytest.mark.parametrize(
    ("field", "uri"),
    [
        ("root", "s3://KEY:hunter2@bucket/runs"),
        ("root", "s3://bucket/runs?access_key=KEY&secret_key=hunter2"),
        ("prompts.source", "https://user:hunter2@host/prompts.jsonl"),
        ("prompts.source", "https://host/prompts.jsonl?X-Amz-Signature=hunter2"),
        ("prompts.source", "az://container/p.jsonl?sas_token=hunter2"),
    ],
)
def test_uri_that_holds_credentials_is_refused_without_repeating_them(field, uri, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changed(field, uri)))
    with pytest.raises(ConfigError, match=f"{field}: a URI holds credentials") as error:
        load_config(str(tmp_path / "run.yaml"))
    assert "hunter2" not in str(error.value)
    assert "KEY" not in str(error.value)


@pytest.mark.parametrize(
    "uri", ["s3://bucket/runs?region=eu-west-1&endpoint_override=host:9000", "gs://bucket/a@b/tokens", "/a@b:c"]
)
def test_uri_without_credentials_is_taken(uri):
    assert RunConfig.model_validate(changed("root", uri)).root == uri


@pytest.mark.parametrize("name", ["hf_token", "load_format", "trust_remote_code", "model", "revision"])
def test_engine_args_that_decide_what_is_loaded_and_how_are_refused(name):
    with pytest.raises(ValidationError, match=f"{name} is no engine argument here"):
        RunConfig.model_validate(changed("generate.engine_args", {name: "x", "max_num_seqs": 8}))
