"""Rows of the tables between stages, with what a test does not care about filled in."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from dpo_ray.schemas import COMPLETIONS, PREFERENCES, PROMPTS, SCORED, prompt_id


def prompt_row(text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"prompt_id": prompt_id(messages), "prompt": messages, "split": "train", "tools": None, "meta": None} | fields


def completion(key: str, score: float | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "completion_id": key,
        "text": f"text of {key}",
        "token_ids": [sum(key.encode()) % 50, *key.encode()],
        "finish_reason": "stop",
        "seed": 0,
        "sampler_logps_sum": None,
        "policy": "policy",
        "drop_reason": None,
        "score": score,
    } | fields


def scored_row(text: str, completions: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    return prompt_row(text, round=0, prompt_token_ids=[1, 2], completions=completions) | fields


def pair_row(key: str, prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], **fields: Any) -> dict[str, Any]:
    return {
        "pair_id": key,
        "prompt_id": f"prompt of {key}",
        "round": 0,
        "prompt": [{"role": "user", "content": key}],
        "prompt_token_ids": prompt,
        "chosen": "c",
        "rejected": "r",
        "chosen_token_ids": chosen,
        "rejected_token_ids": rejected,
        "chosen_score": 1.0,
        "rejected_score": 0.0,
        "label_source": "score",
        "chosen_sampler_logps": None,
        "rejected_sampler_logps": None,
        "sampler_id": None,
    } | fields


def prompts(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, PROMPTS)


def completions(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, COMPLETIONS)


def scored(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, SCORED)


def preferences(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, PREFERENCES)
