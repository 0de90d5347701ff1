"""Write a trained policy as a directory that transformers and vLLM load as is.

In: a model, sharded or not, and the directory or hub id it was loaded from. Out: safetensors in the source's dtype; the
source's config, generation config, tokenizer and chat template, byte for byte but for the config's dtype.
"""

import json
import shutil
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from dpo_ray.learn.policy_files import BESIDE_WEIGHTS


def export_policy(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    source: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the policy to `directory`; every rank calls it, rank 0 gathers all weights on its CPU and writes.

    Args:
        source: local directory or hub id that the model was loaded from.
        dtype: of the weights on disk; None for the source's own.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not dist.is_initialized() or dist.get_rank() == 0:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        dtype = dtype or _as_dtype(config.dtype)
        # A tied head is kept once: vLLM refuses the duplicate, and after the cast it is no longer the same memory.
        kept = {name: cast(torch.Tensor, t) for name, t in state.items() if name not in model.all_tied_weights_keys}
        _save_weights(model, directory, {n: t.to(dtype) if t.is_floating_point() else t for n, t in kept.items()})
        _copy_source(Path(directory), source, revision, dtype)
    if dist.is_initialized():
        dist.barrier()


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """Return a config's dtype, which may be absent (then float32) or a name."""
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32


def _save_weights(model: PreTrainedModel, directory: str | Path, state: dict[str, torch.Tensor]) -> None:
    generation_config, dtype = model.generation_config, model.config.dtype
    try:
        # save_pretrained refuses what many hub models ship as generation config; the source's file is copied instead.
        model.generation_config = GenerationConfig()
        model.save_pretrained(directory, state_dict=state)
    finally:
        model.generation_config, model.config.dtype = generation_config, dtype


def _copy_source(directory: Path, source: str, revision: str | None, dtype: torch.dtype) -> None:
    """Put everything but the weights as it is in the source."""
    origin = Path(source)
    if not origin.is_dir():
        origin = Path(snapshot_download(source, revision=revision, allow_patterns=["config.json", *BESIDE_WEIGHTS]))
    (directory / "generation_config.json").unlink(missing_ok=True)
    for pattern in BESIDE_WEIGHTS:
        for file in origin.glob(pattern):
            target = directory / file.relative_to(origin)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    config = json.loads((origin / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
