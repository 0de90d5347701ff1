"""Load a policy and spread it over a device mesh. `policy_files` checks and names one, `export` writes it back.

In: a directory or hub id in Hugging Face layout. Out: a causal language model without dropout, sharded.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo_ray.errors import ConfigError
from dpo_ray.learn.export import export_policy as export_policy
from dpo_ray.learn.logps import attach
from dpo_ray.learn.policy_files import check_policy_directory as check_policy_directory
from dpo_ray.learn.policy_files import policy_identity as policy_identity


def load_policy(
    path: str, *, dtype: torch.dtype, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model on the CPU, in eval mode and with every dropout at 0.

    Load float32 to train (`shard` casts for compute) and the compute dtype to score.

    Raises:
        ConfigError: weights are missing or of another shape than the config says; they would be random.
    """
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    # transformers' sdpa drops attention soft-capping (Gemma 2) without a word; eager applies it.
    attention = "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        attn_implementation=attention,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, info = loaded
    if broken := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise ConfigError(f"policy {path} lacks {len(broken)} weights of its config's model, such as {broken[0]}")
    _disable_dropout(model)
    return model.eval()


def _disable_dropout(model: PreTrainedModel) -> None:
    """Zero every dropout, as modules and as configured numbers (which attention reads at call time)."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(module, name, 0.0)


def shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    activation_checkpointing: bool = False,
) -> PreTrainedModel:
    """Shard a float32 model over a 1-D mesh with FSDP2, in place: a unit per decoder layer, the rest in the root.

    Weights and optimizer state stay float32; layers compute in `compute_dtype`. Gradients are reduced in float32 and
    SUMMED over ranks, so the caller divides by the global number of pairs once. The model moves to the mesh's devices.

    Raises:
        ConfigError: no decoder layers found.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == torch.float32 else compute_dtype, reduce_dtype=torch.float32
    )
    for layer in _decoder_layers(model, activation_checkpointing):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    attach(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # A plain sum: gloo lacks the scaled sum that a divide factor would otherwise be turned into.
            module.set_force_sum_reduction_for_comms(True)
    return model


def _decoder_layers(model: PreTrainedModel, activation_checkpointing: bool) -> list[nn.Module]:
    """Return the model's decoder layers, replaced by checkpointed ones if asked."""
    names = model._no_split_modules or ()
    layers = []
    for module in list(model.modules()):
        if not isinstance(module, nn.ModuleList):
            continue
        for i, child in enumerate(module):
            if type(child).__name__ in names:
                if activation_checkpointing:
                    module[i] = checkpoint_wrapper(child)
                layers.append(module[i])
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no list of decoder layers ({sorted(names)}) to shard")
    return layers
