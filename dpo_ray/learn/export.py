"""Write a trained policy as a directory that transformers and vLLM load as is.

In: a model, sharded or not, and the directory or hub id it was loaded from. Out: safetensors in the source's dtype; the
source's config, generation config, tokenizer and chat template, byte for byte but for the config's dtype.
Ranks take turns as writers: each weight is gathered once and kept by the rank whose file it goes into.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    GroupWeightRename,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from dpo_ray.learn.adapters import adapted, merged, plain_modules
from dpo_ray.learn.meshes import device_of
from dpo_ray.learn.policy_files import BESIDE_WEIGHTS, WEIGHTS_INDEX

FILE_BYTES = 5 * 10**9
"""Largest file of weights, but for a single weight that is larger; what a writer holds in memory."""


def export_policy(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    source: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = FILE_BYTES,
) -> list[str]:
    """Write the policy to `directory`; every rank calls it, writes some of the files and returns their names.

    Adapters are put into the weights. Ranks may give directories of their own: their files, put together, are the policy.

    Args:
        source: local directory or hub id that the model was loaded from.
        dtype: of the weights on disk; None for the source's own.
        max_file_bytes: of one file of weights.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    dtype = dtype or _as_dtype(config.dtype)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    layers = {f"{name}.weight": layer for name, layer in adapted(model).items()}
    with plain_modules(model):
        state = _kept_weights(model)
    files = _split(_groups(model, list(state)), state, dtype, max_file_bytes)
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    written, places = [], {}
    for first in range(0, len(files), ranks):
        own: dict[str, torch.Tensor] = {}
        for writer, file in enumerate(files[first : first + ranks]):
            for group in file:
                whole = {name: _whole(state[name], dtype, layers.get(name), keep=writer == rank) for name in group}
                if writer == rank:
                    own |= revert_weight_conversion(model, whole)
        if own:
            name = names[first + rank]
            save_file({n: t.contiguous() for n, t in own.items()}, directory / name, metadata={"format": "pt"})
            written.append(name)
            places |= {n: (name, t.numel(), t.nbytes) for n, t in own.items()}
    all_places = _merged(places)
    if rank == 0:
        written += _write_rest(directory, source, revision, dtype, names, all_places)
    if dist.is_initialized():
        dist.barrier()
    return written


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """Return a config's dtype, which may be absent (then float32) or a name."""
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32


def _kept_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What is written of the model's state, as it is held: shards."""
    # A tied head is kept once: vLLM refuses the duplicate, and after a cast it is no longer the same memory.
    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    return {name: value for name, value in model.state_dict().items() if name not in left_out}


def _groups(model: PreTrainedModel, names: Sequence[str]) -> list[list[str]]:
    """Group the weights that only together give stored ones, in the way that transformers converts them back."""
    conversions: Any = getattr(model, "_weight_conversions", None)
    if conversions is None:
        made = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in made if not isinstance(c, PrefixChange)]
    if any(isinstance(c, GroupWeightRename) for c in conversions):  # what it does to one weight depends on others
        return [list(names)]
    back = [c.reverse_transform() for c in conversions[::-1]]
    renamings = [c for c in back if isinstance(c, WeightRenaming)]
    converters = [c for c in back if isinstance(c, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name in names:
        stored, pattern = rename_source_key(name, renamings, converters, reverse=True)
        groups.setdefault(stored if pattern else f"{name} alone", []).append(name)
    return list(groups.values())


def _split(
    groups: list[list[str]], state: dict[str, torch.Tensor], dtype: torch.dtype, max_bytes: int
) -> list[list[list[str]]]:
    """Fill files with groups of weights, one after the other."""
    files: list[list[list[str]]] = []
    left = 0
    for group in groups:
        size = sum(state[n].numel() * (dtype if state[n].is_floating_point() else state[n].dtype).itemsize for n in group)
        if not files or size > left:
            files.append([])
            left = max_bytes
        files[-1].append(group)
        left -= size
    return files


def _whole(tensor: torch.Tensor, dtype: torch.dtype, layer: Any, *, keep: bool) -> torch.Tensor:
    """Gather a weight from its shards, in the dtype it is written in. Where it is not kept, it is empty."""
    tensor = tensor.detach()
    if tensor.is_floating_point() and layer is None:
        tensor = tensor.to(dtype)  # before gathering: fewer bytes to send
    if isinstance(tensor, DTensor):
        tensor = tensor.to(device_of(tensor.device_mesh)).full_tensor()
    if layer is not None:
        tensor = merged(tensor, layer).to(dtype)
    return tensor.cpu() if keep else tensor.new_empty(0)


def _merged(own: dict[str, Any]) -> dict[str, Any]:
    """Every rank's entries."""
    if not dist.is_initialized():
        return own
    parts: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {name: value for part in parts for name, value in part.items()}


def _write_rest(
    directory: Path, source: str, revision: str | None, dtype: torch.dtype, names: list[str], places: dict[str, Any]
) -> list[str]:
    """Write the index of several files and what the source has beside its weights; remove an earlier export's weights."""
    for stale in {*directory.glob("model*.safetensors"), *directory.glob(WEIGHTS_INDEX)}:
        if stale.name not in names:
            stale.unlink()
    written = _copy_source(directory, source, revision, dtype)
    if len(names) > 1:
        _, parameters, sizes = zip(*places.values(), strict=True)
        metadata = {"total_parameters": sum(parameters), "total_size": sum(sizes)}
        index = {"metadata": metadata, "weight_map": {name: places[name][0] for name in sorted(places)}}
        (directory / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
        written.append(WEIGHTS_INDEX)
    return written


def _copy_source(directory: Path, source: str, revision: str | None, dtype: torch.dtype) -> list[str]:
    """Put everything but the weights as it is in the source."""
    origin = Path(source)
    if not origin.is_dir():
        origin = Path(snapshot_download(source, revision=revision, allow_patterns=["config.json", *BESIDE_WEIGHTS]))
    written = []
    for pattern in BESIDE_WEIGHTS:
        for file in origin.glob(pattern):
            target = directory / file.relative_to(origin)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            written.append(target.relative_to(directory).as_posix())
    config = json.loads((origin / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return [*written, "config.json"]
