"""Load a policy straight into its shards: a process holds its own part and never the whole model.

In: a directory or hub id in Hugging Face layout, and a device mesh. Out: what `policy.load_policy` and `policy.shard`
would give. The model is built without memory, sharded, and each rank reads its slices of the safetensors files.
Where stored and held weights do not match one to one, rank 0 alone loads the whole model and hands its weights out.
The loading itself is transformers' own (`core_model_loading`): its renamings and fused experts are the same here.
"""

import copy
import logging
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, core_model_loading, initialization, modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping

from dpo_ray.errors import ConfigError, DpoRayError
from dpo_ray.learn.adapters import Lora, add_adapters, plain_modules, start_adapters
from dpo_ray.learn.meshes import device_of
from dpo_ray.learn.policy import attention_of, check_complete, disable_dropout, load_policy, shard

logger = logging.getLogger(__name__)


def load_sharded_policy(
    path: str,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    activation_checkpointing: bool = False,
    cpu_offload: bool = False,
    lora: Lora | None = None,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return the policy with float32 weights, sharded as by `policy.shard`; every rank of the mesh calls it.

    The files must lie where each rank can read them.

    Args:
        cpu_offload: as in `policy.shard`; while it loads, a rank's part is on its device.
        lora: train adapters instead; the policy's frozen weights are then held in `compute_dtype` if they are stored so.
        seed: of the adapters.

    Raises:
        ConfigError: on every rank, as `policy.load_policy` and `policy.shard` do.
    """
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = _empty_model(path, held_dtype=compute_dtype if lora else torch.float32, **where)
    files = _weight_files(path, model, revision)
    conversions = get_model_conversion_mapping(model)
    whole_reason = _why_whole(model, files, copy.deepcopy(conversions), _shard_ranks(mesh))
    whole = None
    if whole_reason:
        if dist.get_rank() == 0:
            logger.warning("%s: rank 0 loads all of %s and hands it out: %s", type(model).__name__, path, whole_reason)
        whole = _load_on_rank_0(path, where)
        _untie(model, _from_rank_0(whole and [name for name, _ in whole.named_parameters()]))
        model._weight_conversions = _from_rank_0(whole and getattr(whole, "_weight_conversions", None))
    if lora:
        add_adapters(model, lora)
    shard(
        model,
        mesh,
        compute_dtype=compute_dtype,
        activation_checkpointing=activation_checkpointing,
        cpu_offload=cpu_offload,
    )
    device = device_of(mesh)
    with plain_modules(model):
        if whole_reason:
            _hand_out(model, whole, device)
        else:
            _read_slices(model, path, files, conversions, device)
        _initialize_buffers(model, device)
    start_adapters(model, seed=seed)
    if cpu_offload:
        _move_to_node_memory(model)
    return model


def _empty_model(path: str, *, held_dtype: torch.dtype, revision: str | None, trust_remote_code: bool) -> PreTrainedModel:
    """The model on the meta device, in eval mode and without dropout; float32, or `held_dtype` if it is stored so."""
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    if getattr(config.get_text_config(), "quantization_config", None) or getattr(config, "quantization_config", None):
        raise ConfigError(f"policy {path} is stored quantized, and training needs its weights; save it dequantized first")
    dtype = held_dtype if config.dtype == held_dtype else torch.float32
    how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attention := attention_of(config):
        how["attn_implementation"] = attention
    if trust_remote_code and revision and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        how["code_revision"] = revision
    with torch.device("meta"), initialization.meta_device_safe_creation_ops():
        model = AutoModelForCausalLM.from_config(config, **how)
    disable_dropout(model)
    return model.eval()


def _weight_files(path: str, model: PreTrainedModel, revision: str | None) -> list[str]:
    files: Any
    files, _ = modeling_utils._get_resolved_checkpoint_files(
        path,
        variant=None,
        gguf_file=None,
        use_safetensors=True,
        user_agent=None,
        is_remote_code=model.is_remote_code(),
        transformers_explicit_filename=getattr(model.config, "transformers_weights", None),
        download_kwargs={"revision": revision},
    )
    return files


def _shard_ranks(mesh: DeviceMesh) -> int:
    """Ranks that a weight is spread over: the last dimension of the mesh."""
    return mesh.size(mesh.ndim - 1)


def _why_whole(model: PreTrainedModel, files: list[str], conversions: list[Any], ranks: int) -> str | None:
    """Why slices of the files are not slices of the model's weights; None if they are."""
    stored = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            stored.update(opened.keys())
    held = model.state_dict()
    renamings = [c for c in conversions if isinstance(c, core_model_loading.WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, core_model_loading.WeightConverter)]
    names = set()
    for key in sorted(stored):
        name, pattern = core_model_loading.rename_source_key(key, renamings, converters, model.base_model_prefix, held)
        names.add(name if name in held else key)
        if pattern is None:
            continue
        (converter,) = [c for c in converters if pattern in c.source_patterns]
        if not _keeps_rows(converter.operations):
            return f"{name} is made from stored weights by {converter.operations}"
        if name in held and not _every_rank_has_rows(held[name].shape[0], ranks):
            return f"{name} has {held[name].shape[0]} rows for {ranks} ranks"
    for target, source in model.all_tied_weights_keys.items():
        if {target, source} <= names:
            return f"{target} and {source} are both stored, although they are one weight"
    return None


def _keeps_rows(operations: list[Any]) -> bool:
    """Whether a rank that reads its rows of the result, and no others, gets them right: experts that are stacked."""
    stack, *rest = operations
    stacks = isinstance(stack, core_model_loading.MergeModulelist) and stack.dim == 0
    return stacks and all(isinstance(op, core_model_loading.Concatenate) and op.dim > 0 for op in rest)


def _every_rank_has_rows(rows: int, ranks: int) -> bool:
    return (ranks - 1) * -(-rows // ranks) < rows


def _read_slices(model: PreTrainedModel, path: str, files: list[str], conversions: list[Any], device: torch.device) -> None:
    config = modeling_utils.LoadStateDictConfig(
        pretrained_model_name_or_path=path,
        device_map={"": device},
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),
        weight_mapping=conversions,
        use_safetensors=True,
    )
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        slices = {key: file.get_slice(key) for file in opened for key in file.keys()}  # noqa: SIM118 (no mapping)
        info, _ = core_model_loading.convert_and_load_state_dict_in_model(model, slices, config)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    broken = [*info.missing_keys, *(f"{name} of shape {tuple(got)}" for name, got, _ in info.mismatched_keys)]
    broken += info.conversion_errors
    check_complete(path, sorted({name for names in _from_all(broken) for name in names}))


def _load_on_rank_0(path: str, where: dict[str, Any]) -> PreTrainedModel | None:
    """The whole model on rank 0, in its memory; None elsewhere. What it raises is raised on every rank."""
    whole, error = None, None
    if dist.get_rank() == 0:
        try:
            whole = load_policy(path, dtype=torch.float32, **where)
        except (DpoRayError, OSError, ValueError) as raised:
            error = raised
    if error := _from_rank_0(error):
        raise error
    return whole


def _untie(model: PreTrainedModel, names: list[str]) -> None:
    """Give each of `names` a parameter of its own: stored weights can differ although the config ties them."""
    own = {name for name, _ in model.named_parameters()}
    for name in set(names) - own:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(torch.empty_like(model.get_parameter(name))))
        model.all_tied_weights_keys.pop(name, None)


def _hand_out(model: PreTrainedModel, whole: PreTrainedModel | None, device: torch.device) -> None:
    """Set every weight and stored buffer to rank 0's, one at a time."""
    for parameter, own in _names(model).items():
        assert isinstance(parameter, DTensor)
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if whole is not None:
            full.copy_(whole.get_parameter(_plain(own[0])).detach())
        mesh, placements = parameter.device_mesh, parameter.placements
        local = distribute_tensor(full, mesh, placements).to_local().clone()
        sharded = DTensor.from_local(local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())
        value = nn.Parameter(sharded, requires_grad=parameter.requires_grad)
        for name in own:
            _set(model, name, value)
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    for name, buffer in list(model.named_buffers()):
        if name not in computed:
            value = torch.empty_like(buffer, device=device)
            if whole is not None:
                value.copy_(whole.get_buffer(_plain(name)))
            dist.broadcast(value, src=0)
            _set(model, name, value)


def _move_to_node_memory(model: PreTrainedModel) -> None:
    """Move the weights, not the buffers: to shards that are made there, `DTensor.from_local` gives the mesh's device."""
    for parameter, own in _names(model).items():
        value = nn.Parameter(parameter.detach().cpu(), requires_grad=parameter.requires_grad)
        for name in own:
            _set(model, name, value)


def _names(model: PreTrainedModel) -> dict[nn.Parameter, list[str]]:
    """Every weight with its names: a tied one has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _plain(name: str) -> str:
    """A weight's name without what activation checkpointing adds."""
    return name.replace("_checkpoint_wrapped_module.", "")


def _set(model: PreTrainedModel, name: str, value: torch.Tensor) -> None:
    value._is_hf_initialized = True  # transformers draws what lacks this mark anew
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


def _initialize_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no file holds, such as rotary frequencies, and put all of them on the device."""
    no_weights: Any = set()
    model._move_missing_keys_from_meta_to_device(no_weights, {"": device}, None, None)
    model._initialize_missing_keys(is_quantized=False)
    for name, buffer in list(model.named_buffers()):
        if buffer.device != device:
            _set(model, name, buffer.to(device))


def _from_rank_0(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _from_all(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
