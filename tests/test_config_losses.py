import inspect
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from dpo_ray.config import Train
from dpo_ray.config.losses import KINDS
from dpo_ray.learn.losses import LOSSES, WHOLE_BATCH, Term, needs_reference, needs_scores

REQUIRED = {"robust": {"label_smoothing": 0.1}}


def train(loss: Any = "sigmoid", **fields: Any) -> Train:
    return Train.model_validate({"beta": 0.1, "learning_rate": 1e-5, "loss": loss} | fields)


def block(name: str) -> dict[str, Any]:
    return {"kind": name} | REQUIRED.get(name, {})


def terms(config: Train) -> list[Term]:
    return [Term(*fields) for fields in config.terms()]


def preference_beside(name: str) -> list[dict[str, Any]]:
    """The loss, beside one that uses beta where it does not."""
    return [block(name), {"kind": "sigmoid"}] if name == "sft" else [block(name)]


def test_loss_is_sigmoid_by_default():
    assert Train(beta=0.1, learning_rate=1e-5).loss == train("sigmoid").loss
    assert [term.name for term in terms(Train(beta=0.1, learning_rate=1e-5))] == ["sigmoid"]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("hinge", [("hinge", 1.0)]),
        ({"kind": "hinge", "weight": 0.5}, [("hinge", 0.5)]),
        (["hinge"], [("hinge", 1.0)]),
        (["sigmoid", {"kind": "sft", "weight": 0.2}], [("sigmoid", 1.0), ("sft", 0.2)]),
    ],
)
def test_loss_is_a_name_a_block_or_a_list_of_them(loss, expected):
    assert [term[:2] for term in terms(train(loss))] == expected


def test_config_has_every_loss_and_each_option_once():
    """A block's fields are the keyword arguments of the function of its name."""
    assert [kind.name() for kind in KINDS] == list(LOSSES)
    for kind in KINDS:
        names = set(inspect.signature(LOSSES[kind.name()]).parameters) - {"logps", "beta", "mean_chosen_tokens"}
        assert set(kind.model_fields) - {"kind", "weight"} - {"token_mean"} == names, kind


@pytest.mark.parametrize("name", list(LOSSES))
def test_config_says_of_a_loss_what_learn_says(name):
    config = train(preference_beside(name))
    term = terms(config)[0]
    assert config.loss[0].needs_reference == needs_reference([term])
    assert config.loss[0].sorts_global_batch == (name in WHOLE_BATCH)
    assert config.loss[0].needs_scores == needs_scores([term])


def test_needs_of_a_run_are_those_of_any_loss():
    assert train(["simpo", "sigmoid"]).needs_reference
    assert not train(["orpo", "sft"]).needs_reference
    assert train({"kind": "sigmoid", "score_margin": 0.1}).needs_scores
    assert not train("sigmoid").needs_scores


@pytest.mark.parametrize("name", list(LOSSES))
def test_written_config_read_again_is_equal(name):
    config = train(preference_beside(name))
    assert Train.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(
    ("loss", "option"),
    [
        ({"kind": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ({"kind": "ipo", "length_margin": 0.1}, "length_margin"),
        ({"kind": "nca_pair", "f_divergence_type": "forward_kl"}, "f_divergence_type"),
        ({"kind": "sigmoid", "simpo_gamma": 0.5}, "simpo_gamma"),
        ({"kind": "sft", "discopop_tau": 0.05}, "discopop_tau"),
        ({"kind": "sigmoid", "beta": 0.1}, "beta"),
    ],
)
def test_option_that_a_loss_ignores_is_refused_with_those_it_has(loss, option):
    with pytest.raises(ValidationError) as error:
        train(loss)
    (only,) = error.value.errors()
    assert only["loc"] == ("loss", 0, loss["kind"])
    assert f"loss `{loss['kind']}` has no option {option}, which would be ignored; its options are weight" in only["msg"]


def test_refused_option_names_the_losses_that_have_it():
    with pytest.raises(ValidationError, match="simpo_gamma is an option of simpo"):
        train({"kind": "hinge", "simpo_gamma": 0.5})


@pytest.mark.parametrize(
    "loss",
    [
        [],
        "hnge",
        3,
        {"label_smoothing": 0.1},
        {"kind": "robust"},
        {"kind": "robust", "label_smoothing": 0},
        {"kind": "robust", "label_smoothing": 0.5},
        {"kind": "sigmoid", "label_smoothing": 0.5},
        {"kind": "exo_pair", "label_smoothing": 0},
        {"kind": "sigmoid", "weight": 0},
        {"kind": "sigmoid", "weight": float("inf")},
        {"kind": "discopop", "discopop_tau": 0},
        {"kind": "sft", "token_mean": "batch"},
    ],
)
def test_loss_out_of_range_is_refused_at_its_place(loss):
    with pytest.raises(ValidationError) as error:
        train([loss, "sigmoid"] if loss else loss)
    assert [e["loc"][0] for e in error.value.errors()] == ["loss"]


def test_alpha_divergence_and_its_coefficient_come_together():
    alpha = {"kind": "sigmoid", "f_divergence_type": "alpha_divergence"}
    assert terms(train(alpha | {"f_alpha_divergence_coef": 0.5}))[0].options["f_alpha_divergence_coef"] == 0.5
    with pytest.raises(ValidationError, match="needs f_alpha_divergence_coef"):
        train(alpha)
    with pytest.raises(ValidationError, match="f_alpha_divergence_coef would be ignored"):
        train({"kind": "sigmoid", "f_alpha_divergence_coef": 0.5})


@pytest.mark.parametrize(
    ("loss", "fields", "message"),
    [
        ("sft", {}, "beta would be ignored: loss sft"),
        ("aot", {"resources": {"workers": 2}}, "aot sorts the whole global batch"),
        ("aot", {"resources": {"workers": [1, 2]}}, "aot sorts the whole global batch"),
        (["sigmoid", "aot_unpaired"], {"wpo": True}, "wpo weighs the loss of each pair, and aot_unpaired has none"),
        (["sigmoid", "sft"], {"wpo": True}, "wpo weighs the loss of each pair, and sft has none"),
        (["sigmoid", "simpo"], {"ld_alpha": 0.5}, "ld_alpha scales log-ratios to the reference, and simpo"),
    ],
)
def test_combination_without_a_meaning_is_refused(loss, fields, message):
    with pytest.raises(ValidationError, match=message):
        train(loss, **fields)


def test_combinations_with_a_meaning_are_taken():
    assert train(["sigmoid", "sft"], ld_alpha=0.0).ld_alpha == 0.0
    assert train("simpo", wpo=True).wpo
    assert train("aot", resources={"workers": 1}).resources.workers == 1
