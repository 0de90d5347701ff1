"""Train low-rank adapters (LoRA) instead of the policy's own weights, and put them into those at the end.

In: a model as `policy.load_policy` builds it. Out: the same model, its own weights frozen, with PEFT's layers around the
adapted ones. W x becomes W x + scale B A x with scale = alpha / r (arXiv:2106.09685); B starts at 0, so the first step is
taken from the policy itself, and a reference without adapters is its reference.

Shapes: A (r, inputs), B (outputs, r).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_ray.errors import ConfigError
from dpo_ray.learn.meshes import device_of

NAME = "default"
"""PEFT's own name for the only adapter of a model."""


class Lora(NamedTuple):
    """What to adapt, and how much."""

    r: int
    """Rank of A and B."""
    alpha: float
    """The adapter's output is scaled by alpha / r."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of modules as PEFT matches them, or every linear layer but the head."""


def add_adapters(model: PreTrainedModel, lora: Lora) -> None:
    """Freeze the model and put adapters around its target modules, float32 and without memory; `start_adapters` fills them.

    Call it before `policy.shard`. The head and the embeddings stay as they are: log-probabilities are computed from the
    head's weight itself.

    Raises:
        ConfigError: PEFT is not installed, finds no such module, or would adapt the head, the embeddings or fused experts.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError as error:
        raise ConfigError(
            f"train.lora needs the package peft ({error}); install it with `pip install 'dpo-ray[lora]'`"
        ) from error
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if lora.target_modules == "all-linear":  # by PEFT's own reading it would take fused experts as well
        targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m not in ends]
    else:
        targets = list(lora.target_modules)
    alpha: Any = lora.alpha  # PEFT says int, and divides it
    try:
        inject_adapter_in_model(
            LoraConfig(r=lora.r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM"), model, low_cpu_mem_usage=True
        )
    except ValueError as error:
        raise ConfigError(f"train.lora of {type(model).__name__}: {error}") from error
    for name, layer in adapted(model).items():
        if layer.base_layer in ends:
            raise ConfigError(f"train.lora would adapt {name}, and the head and the embeddings stay as they are; name others")
        if not isinstance(layer.base_layer, nn.Linear | Conv1D):
            raise ConfigError(
                f"train.lora would adapt {name}, a {type(layer.base_layer).__name__} and no linear layer; name others"
            )
        for part in (layer.lora_A[NAME], layer.lora_B[NAME]):
            part.weight = nn.Parameter(torch.empty_like(part.weight, dtype=torch.float32, device="meta"))


def adapted(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's layers by the names of the modules that they stand for."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return {name.replace("_checkpoint_wrapped_module.", ""): layer for name, layer in layers.items()}


@contextmanager
def plain_modules(model: nn.Module) -> Iterator[None]:
    """Within, the model has the modules, and the names of weights, that it has without adapters."""
    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer) for name, layer in layers]
    for parent, name, layer in places:
        setattr(parent, name, layer.base_layer)
    try:
        yield
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)


def start_adapters(model: nn.Module, *, seed: int) -> None:
    """Draw every A uniformly from +-1 / sqrt(inputs), as PEFT does, and set every B to 0: the same on any number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted(model).values():
        a, b = layer.lora_A[NAME], layer.lora_B[NAME]
        bound = 1 / math.sqrt(a.weight.shape[1])
        drawn = torch.empty(a.weight.shape).uniform_(-bound, bound, generator=generator)
        for part, value in ((a, drawn), (b, torch.zeros(b.weight.shape))):
            part.weight = _like(part.weight, value, layer.base_layer.weight.device)


def _like(parameter: nn.Parameter, value: torch.Tensor, device: torch.device) -> nn.Parameter:
    """A parameter with this value, sharded as the one it replaces."""
    if not isinstance(parameter, DTensor):
        return nn.Parameter(value.to(device))
    mesh, placements = parameter.device_mesh, parameter.placements
    # Every rank has the value: nothing is sent.
    part = distribute_tensor(value.to(device_of(mesh)), mesh, placements, src_data_rank=None).to_local().to(device)
    return nn.Parameter(DTensor.from_local(part, mesh, placements, run_check=False, shape=value.shape, stride=value.stride()))


def merged(weight: torch.Tensor, layer: Any) -> torch.Tensor:
    """Return W + scale B A in float32, for the whole weight of an adapted module; every rank calls it."""
    change = _gathered(layer.lora_B[NAME].weight) @ _gathered(layer.lora_A[NAME].weight) * layer.scaling[NAME]
    return weight.float() + (change.T if layer.fan_in_fan_out else change)


def export_adapters(model: PreTrainedModel, directory: str | Path, *, source: str) -> None:
    """Write the adapters as PEFT's `PeftModel.from_pretrained` loads them onto `source`; every rank calls it, rank 0 writes."""
    weights = {
        f"base_model.model.{name}.{part}.weight": _gathered(getattr(layer, part)[NAME].weight).cpu().contiguous()
        for name, layer in adapted(model).items()
        for part in ("lora_A", "lora_B")
    }
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(directory).mkdir(parents=True, exist_ok=True)
        config: Any = model.peft_config
        config[NAME].base_model_name_or_path = source
        config[NAME].inference_mode = True
        config[NAME].save_pretrained(str(directory))
        save_file(weights, Path(directory) / "adapter_model.safetensors", metadata={"format": "pt"})


def _gathered(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.detach()
    return weight.to(device_of(weight.device_mesh)).full_tensor() if isinstance(weight, DTensor) else weight
