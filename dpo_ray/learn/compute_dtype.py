"""What a sharded model computes in, and a way to have it compute in float32 for a while.

FSDP2 fixes the dtype that it gathers weights in at the first forward; torch has no call to change it later, so that what
it keeps from then on is thrown away here (its `_fully_shard` of torch 2.13). Its weights themselves are not touched.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy


def compute_dtype_of(model: Any) -> torch.dtype:
    """Return the dtype in which a model's layers compute."""
    if isinstance(model, FSDPModule):
        return model._get_fsdp_state()._mp_policy.param_dtype or model.dtype
    return model.dtype


@contextlib.contextmanager
def sharded_in_float32(model: nn.Module) -> Iterator[None]:
    """Within, a model that `policy.shard` has sharded gathers its weights in float32 and computes in it."""
    policies = {module: module._get_fsdp_state()._mp_policy for module in model.modules() if isinstance(module, FSDPModule)}
    try:
        for module in policies:
            _set_policy(module, MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32))
        yield
    finally:
        if isinstance(model, FSDPModule):
            model.reset_iter_state()
        for module, policy in policies.items():
            _set_policy(module, policy)


def _set_policy(module: FSDPModule, policy: MixedPrecisionPolicy) -> None:
    module.reshard()
    state = module._get_fsdp_state()
    state._mp_policy = policy
    for group in state._fsdp_param_groups:
        group.mp_policy = policy
        for parameter in group.fsdp_params:
            parameter.mp_policy = policy
            parameter.all_gather_outputs = []
            vars(parameter).pop("_unsharded_param", None)
        group._init_mp_dtypes()
