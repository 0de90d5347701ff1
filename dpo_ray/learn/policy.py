"""Load a policy and spread it over a device mesh. `policy_files` checks and names one, `export` writes it back.

In: a directory or hub id in Hugging Face layout. Out: a causal language model without dropout, whole or sharded.
`sharded_load` loads one that no process could hold whole.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

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
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        attn_implementation=attention_of(config),
        use_safetensors=True,
        output_loading_info=True,
    )
    model, info = loaded
    check_complete(path, [*info["missing_keys"], *info["mismatched_keys"]])
    disable_dropout(model)
    return model.eval()


def attention_of(config: PreTrainedConfig) -> str | None:
    """Return the attention to load a model with; None leaves it to transformers."""
    # transformers' sdpa drops attention soft-capping (Gemma 2) without a word; eager applies it.
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def check_complete(path: str, broken: Iterable[Any]) -> None:
    """Check that every weight of the model came from its files.

    Raises:
        ConfigError: naming one that is missing or of another shape than the config says; it would be random.
    """
    if names := sorted(map(str, broken)):
        raise ConfigError(f"policy {path} lacks {len(names)} weights of its config's model, such as {names[0]}")


def disable_dropout(model: PreTrainedModel) -> None:
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
    cpu_offload: bool = False,
) -> PreTrainedModel:
    """Shard a float32 model with FSDP2, in place: a unit per decoder layer, the rest in the root.

    Weights and optimizer state stay float32; layers compute in `compute_dtype`. Gradients are reduced in float32 and
    SUMMED over ranks, so the caller divides by the global number of pairs once. The model moves to the mesh's devices,
    but for one on the meta device.

    Args:
        mesh: 1-D, sharded over all ranks, or 2-D (`meshes.policy_mesh`): copies along the first dimension, shards along
            the second.
        cpu_offload: keep shards, gradients and optimizer state in the node's memory; computing stays on the device.

    Raises:
        ConfigError: FSDP2 cannot wrap the model.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == torch.float32 else compute_dtype, reduce_dtype=torch.float32
    )
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy()
    layers = _decoder_layers(model, activation_checkpointing)
    _check_wrappable(model, layers)
    for unit in (*layers, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload)
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
        raise ConfigError(
            f"{type(model).__name__} has no list of decoder layers (transformers names {sorted(names)}) that FSDP2 could "
            "shard; use a policy whose model class has them"
        )
    return layers


def _check_wrappable(model: PreTrainedModel, layers: list[nn.Module]) -> None:
    """FSDP2 shards whole tensors of floats, each in one unit. It would say so late, or not at all."""
    units: dict[nn.Parameter, set[int]] = {}
    for i, layer in enumerate(layers):
        for parameter in layer.parameters():
            units.setdefault(parameter, set()).add(i)
    inside = {id(module) for layer in layers for module in layer.modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module.named_parameters(recurse=False):
            shared = len(units.get(parameter, ())) > 1 or (parameter in units and id(module) not in inside)
            if parameter.ndim == 0 or not parameter.is_floating_point() or shared:
                reason = "is shared between layers" if shared else f"has shape {tuple(parameter.shape)} of {parameter.dtype}"
                raise ConfigError(
                    f"{type(model).__name__} cannot be sharded: its weight {f'{name}.{own}'.lstrip('.')} {reason}, and FSDP2 "
                    "takes floating-point tensors of one layer or of none; use another policy"
                )
