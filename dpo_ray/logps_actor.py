"""The actor that computes log-probabilities over blocks of a Ray Dataset, with the function that training uses."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from dpo_ray.engines.policies import PolicyRef, local_path
from dpo_ray.errors import StageError
from dpo_ray.logps_cache import Entry, completion_key, read_cache, write_cache

COMPUTED = "_computed"


class How(NamedTuple):
    """How log-probabilities are computed."""

    dtype: str
    share_prompt: Literal["auto", "always", "never"]
    max_batch_tokens: int
    per_token: bool = False
    cache: str | None = None
    """Directory of values computed before (see logps_cache)."""


class LogpsActor:
    """Holds one policy in a Ray Data actor. It is loaded for the first value that is not in the cache."""

    def __init__(self, policy: PolicyRef, how: How, columns: dict[str, str], use_gpu: bool, cpus: float) -> None:
        self.policy, self.how, self.columns, self.use_gpu, self.cpus = policy, how, columns, use_gpu, cpus
        self.known = read_cache(how.cache) if how.cache else {}
        self.scorer: _Scorer | None = None
        self.probed: Any = None

    def __call__(self, table: pa.Table) -> pa.Table:
        prompts = table["prompt_token_ids"].to_pylist()
        sides = {source: list(zip(prompts, table[source].to_pylist(), strict=True)) for source in self.columns}
        keys = {source: [completion_key(*pair) for pair in pairs] for source, pairs in sides.items()}
        wanted = {key: pair for source in sides for key, pair in zip(keys[source], sides[source], strict=True)}
        missing = {key: pair for key, pair in wanted.items() if not self._knows(key)}
        computed = self._compute(missing)
        known = {key: self.known[key] for key in wanted.keys() - computed.keys()} | computed
        if self.how.cache:
            write_cache(self.how.cache, computed)
            self.known |= computed
        for source, target in self.columns.items():
            entries = [known[key] for key in keys[source]]
            for row, entry in zip(table.column(0).to_pylist(), entries, strict=True):
                check_logps(source, row, entry.logps)
            table = table.append_column(target, pa.array([e.logps for e in entries], pa.float32()))
            tokens = [e.token_logps if self.how.per_token else None for e in entries]
            table = table.append_column(per_token_name(target), pa.array(tokens, pa.list_(pa.float32())))
        counts = [sum(own in missing for own in row) for row in zip(*keys.values(), strict=True)]
        return table.append_column(COMPUTED, pa.array(counts, pa.int64()))

    def _knows(self, key: bytes) -> bool:
        return key in self.known and not (self.how.per_token and self.known[key].token_logps is None)

    def _compute(self, missing: dict[bytes, tuple[list[int], list[int]]]) -> dict[bytes, Entry]:
        """Score completions, every prompt once for all of its completions where the model allows it."""
        from dpo_ray.learn.batched import score_groups
        from dpo_ray.learn.layout import Group
        from dpo_ray.learn.probe import path_for

        by_prompt: dict[tuple[int, ...], list[bytes]] = {}
        for key, (prompt, _) in sorted(missing.items()):
            by_prompt.setdefault(tuple(prompt), []).append(key)
        groups = [Group(prompt, [missing[key][1] for key in keys]) for prompt, keys in by_prompt.items()]
        if not groups:
            return {}
        if self.scorer is None:
            self.scorer = _load_scorer(self.policy, self.how, self.use_gpu, self.cpus)
        model, pad = self.scorer
        self.probed = path_for(model, groups, self.probed, pad_token_id=pad, share_prompt=self.how.share_prompt)
        budget = self.how.max_batch_tokens
        scored = score_groups(model, groups, self.probed.path, max_batch_tokens=budget, pad_token_id=pad)
        return {
            key: Entry(one.logps, one.token_logps if self.how.per_token else None)
            for keys, own in zip(by_prompt.values(), scored, strict=True)
            for key, one in zip(keys, own, strict=True)
        }


class _Scorer(NamedTuple):
    model: Any
    pad_token_id: int


def _load_scorer(policy: PolicyRef, how: How, use_gpu: bool, cpus: float) -> _Scorer:
    import torch

    from dpo_ray.learn.matmul import float32_matmul_fast_path
    from dpo_ray.learn.policy import load_policy
    from dpo_ray.learn.tokens import load_tokenizer, pad_token_id

    torch.set_num_threads(max(1, math.ceil(cpus)))
    float32_matmul_fast_path()
    path = local_path(policy)
    where: dict[str, Any] = {"revision": policy.revision, "trust_remote_code": policy.trust_remote_code}
    model: Any = load_policy(path, dtype=getattr(torch, how.dtype), **where)
    model.to("cuda" if use_gpu else "cpu")
    return _Scorer(model, pad_token_id(load_tokenizer(path, **where)))


def per_token_name(column: str) -> str:
    return column.replace("logps", "token_logps")


def check_logps(column: str, row: str, value: float) -> None:
    """Raise where a value is no log-probability."""
    if not (math.isfinite(value) and value <= 0.0):
        raise StageError(f"reference: {column} of {row} has the log-probability {value}; expected a finite value <= 0")
