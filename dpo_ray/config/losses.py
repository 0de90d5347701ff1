"""The losses a policy can be trained with: one block a loss, with the options that this loss uses and no other.

In YAML, under train:

    loss: sigmoid                                    # short for {kind: sigmoid}
    loss: {kind: robust, label_smoothing: 0.1}
    loss: [{kind: sigmoid}, {kind: sft, weight: 0.2}]  # a weighted sum

Fields other than `kind` and `weight` are keyword arguments of the function of that name in dpo_ray/learn/losses, where its
formula and paper are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from dpo_ray.config.block import Block


class LossBlock(Block):
    """One loss of a sum; a field it does not have is an error, not a no-op."""

    needs_reference: ClassVar[bool] = True
    uses_beta: ClassVar[bool] = True
    sorts_global_batch: ClassVar[bool] = False
    """The loss is right only over the whole global batch: one worker, one micro-batch a step."""

    weight: float = Field(default=1.0, gt=0)
    """Factor of this loss in the sum."""

    @model_validator(mode="before")
    @classmethod
    def options_belong_to_this_loss(cls, tree: Any) -> Any:
        unknown = [name for name in tree if name not in cls.model_fields] if isinstance(tree, dict) else []
        if unknown:
            own = ", ".join(n for n in cls.model_fields if n != "kind")
            elsewhere = [f"{option} is an option of {', '.join(kinds)}" for option in unknown if (kinds := _kinds_with(option))]
            raise ValueError(
                f"loss `{cls.name()}` has no option {', '.join(unknown)}, which would be ignored; its options are {own}"
                + "".join(f"; {place}" for place in elsewhere)
            )
        return tree

    @classmethod
    def name(cls) -> str:
        return cls.model_fields["kind"].default

    @property
    def needs_scores(self) -> bool:
        return bool(getattr(self, "score_margin", 0.0))

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the loss's function."""
        return self.model_dump(exclude={"kind", "weight"})


class DifferenceLoss(LossBlock):
    """A loss of the difference between chosen and rejected: any f-divergence to the reference has a meaning."""

    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence that keeps the policy near the reference (arXiv:2309.16240)."""
    f_alpha_divergence_coef: float | None = Field(default=None, gt=0)
    """Alpha of alpha_divergence; 1 is reverse_kl."""

    @model_validator(mode="after")
    def coefficient_belongs_to_alpha_divergence(self) -> DifferenceLoss:
        if self.f_divergence_type == "alpha_divergence":
            if self.f_alpha_divergence_coef is None:
                raise ValueError("f_divergence_type `alpha_divergence` needs f_alpha_divergence_coef, e.g. 0.5")
        elif self.f_alpha_divergence_coef is not None:
            raise ValueError(
                f"f_alpha_divergence_coef would be ignored: f_divergence_type is `{self.f_divergence_type}`; take it out, or "
                "use `alpha_divergence`"
            )
        return self


class Sigmoid(DifferenceLoss):
    """DPO (arXiv:2305.18290)."""

    kind: Literal["sigmoid"] = "sigmoid"
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """cDPO: share of the labels that are wrong (https://ericmitchell.ai/cdpo.pdf)."""
    length_margin: float = Field(default=0.0, ge=0)
    """R-DPO: margin in nats for each token that chosen is longer than rejected (arXiv:2403.19159)."""
    score_margin: float = Field(default=0.0, ge=0)
    """ODPO: margin in nats that is asked for, for each unit of the score gap (arXiv:2402.10571). Needs scores."""


class Robust(DifferenceLoss):
    """DPO without the bias of labels flipped at a known rate (arXiv:2403.00409)."""

    kind: Literal["robust"] = "robust"
    label_smoothing: float = Field(gt=0, lt=0.5)
    """Probability that a label is flipped; 0.1 in the paper."""


class Hinge(DifferenceLoss):
    """SLiC's hinge on DPO's margin (arXiv:2305.10425, arXiv:2309.06657)."""

    kind: Literal["hinge"] = "hinge"


class Ipo(DifferenceLoss):
    """IPO, averaged over tokens (arXiv:2310.12036); beta is its tau, of another scale than DPO's."""

    kind: Literal["ipo"] = "ipo"


class SigmoidNorm(DifferenceLoss):
    """DPO on log-ratios per token (arXiv:2411.15124); wants a larger beta than DPO."""

    kind: Literal["sigmoid_norm"] = "sigmoid_norm"


class ExoPair(DifferenceLoss):
    """EXO for pairs (arXiv:2402.00856)."""

    kind: Literal["exo_pair"] = "exo_pair"
    label_smoothing: float = Field(default=1e-3, gt=0, lt=0.5)
    """Probability that the target gives to rejected."""


class Discopop(DifferenceLoss):
    """DiscoPOP (arXiv:2406.08414)."""

    kind: Literal["discopop"] = "discopop"
    discopop_tau: float = Field(default=0.05, gt=0)
    """Margin over which the logistic loss passes into the exponential one."""


class NcaPair(LossBlock):
    """NCA for pairs (arXiv:2402.05369)."""

    kind: Literal["nca_pair"] = "nca_pair"


class BcoPair(LossBlock):
    """BCO for pairs, without its running mean of rewards (arXiv:2404.04656)."""

    kind: Literal["bco_pair"] = "bco_pair"


class SppoHard(LossBlock):
    """SPPO with hard labels (arXiv:2405.00675)."""

    kind: Literal["sppo_hard"] = "sppo_hard"


class ApoZero(LossBlock):
    """APO for chosen completions that beat the policy (arXiv:2408.06266)."""

    kind: Literal["apo_zero"] = "apo_zero"


class ApoDown(LossBlock):
    """APO for a policy that beats the chosen completions (arXiv:2408.06266)."""

    kind: Literal["apo_down"] = "apo_down"


class Aot(LossBlock):
    """AOT on pairs (arXiv:2406.05882); sorts the global batch, so one worker and one micro-batch a step."""

    sorts_global_batch = True
    kind: Literal["aot"] = "aot"
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """As in sigmoid."""


class AotUnpaired(LossBlock):
    """AOT on chosen and rejected as two samples (arXiv:2406.05882); one worker and one micro-batch a step."""

    sorts_global_batch = True
    kind: Literal["aot_unpaired"] = "aot_unpaired"
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """As in sigmoid."""


class Simpo(LossBlock):
    """SimPO (arXiv:2405.14734): no reference."""

    needs_reference = False
    kind: Literal["simpo"] = "simpo"
    simpo_gamma: float = Field(default=0.5, ge=0)
    """Margin in the logit; the paper tunes gamma / beta."""


class Orpo(LossBlock):
    """ORPO's odds-ratio term (arXiv:2403.07691): no reference; beta is its lambda. ORPO is this plus sft."""

    needs_reference = False
    kind: Literal["orpo"] = "orpo"


class Sft(LossBlock):
    """Negative log-likelihood of chosen, beside another loss."""

    needs_reference = False
    uses_beta = False
    kind: Literal["sft"] = "sft"
    token_mean: Literal["completion", "global"] = "completion"
    """Mean over the tokens of each completion, then over pairs; or over all chosen tokens of the global batch."""


Loss = Annotated[
    Sigmoid
    | Robust
    | Hinge
    | Ipo
    | SigmoidNorm
    | ExoPair
    | Discopop
    | NcaPair
    | BcoPair
    | SppoHard
    | ApoZero
    | ApoDown
    | Aot
    | AotUnpaired
    | Simpo
    | Orpo
    | Sft,
    Field(discriminator="kind"),
]
KINDS: tuple[type[LossBlock], ...] = get_args(get_args(Loss)[0])


def loss_list(value: Any) -> Any:
    """A name, a block or a list of either, as a list of blocks."""
    several = value if isinstance(value, list | tuple) else [value]
    if not several:
        raise ValueError("got an empty list; expected a loss, e.g. `sigmoid`")
    return [{"kind": one} if isinstance(one, str) else one for one in several]


def loss_terms(losses: Sequence[LossBlock]) -> tuple[tuple[str, float, dict[str, Any]], ...]:
    """(name, weight, options) of each loss: the fields of `dpo_ray.learn.losses.Term`, which this may not import."""
    return tuple((block.name(), block.weight, block.options()) for block in losses)


def _kinds_with(option: str) -> list[str]:
    return [kind.name() for kind in KINDS if option in kind.model_fields]
