"""The fallback engine, for machines that vLLM has no wheel for: transformers' own sampling, the same rows.

Each sample is drawn alone, from its own seed, so that it does not depend on the batch around it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from dpo_ray.engines.policies import PolicyRef, local_path
from dpo_ray.engines.requests import EngineSettings, Request, Sample
from dpo_ray.learn.policy import load_policy


class HfEngine:
    """Holds one transformers model; calls run one at a time."""

    def __init__(self, settings: EngineSettings, policy: PolicyRef) -> None:
        self.settings = settings
        self.device = torch.device("cuda" if settings.gpus else "cpu")
        self.turn = threading.Lock()
        self.waiting = 0
        where: dict[str, Any] = {"revision": policy.revision, "trust_remote_code": policy.trust_remote_code}
        path = local_path(policy)
        model: Any = load_policy(path, dtype=getattr(torch, settings.dtype), **where)
        self.model: Any = model.to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(path, **where)
        eos = model.generation_config.eos_token_id
        self.eos = eos if isinstance(eos, list) else [self.tokenizer.eos_token_id if eos is None else eos]

    def load(self) -> int:
        """Number of calls that wait or run."""
        return self.waiting

    def generate(self, requests: Sequence[Request], sampling: Mapping[str, Any]) -> list[list[Sample]]:
        """Sample completions, n of each request, in the order of `requests`."""
        self.waiting += 1
        try:
            with self.turn:
                return [[self._sample(r, k, sampling) for k in range(r.n)] for r in requests]
        finally:
            self.waiting -= 1

    @torch.inference_mode()
    def _sample(self, request: Request, k: int, sampling: Mapping[str, Any]) -> Sample:
        torch.manual_seed(request.seed + k)
        end_ids = [*self.eos, *sampling["stop_token_ids"]]
        config = GenerationConfig(
            do_sample=True,
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            top_k=sampling["top_k"],
            min_p=sampling["min_p"] or None,
            repetition_penalty=sampling["repetition_penalty"],
            max_new_tokens=min(sampling["max_new_tokens"], self.settings.max_model_len - len(request.prompt_token_ids)),
            eos_token_id=end_ids,
            pad_token_id=end_ids[0],
            stop_strings=list(sampling["stop"]) or None,
            return_dict_in_generate=True,
            output_logits=sampling["logps"],
        )
        prompt = torch.tensor([request.prompt_token_ids], device=self.device)
        tokenizer = self.tokenizer if sampling["stop"] else None
        output = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=config, tokenizer=tokenizer
        )
        token_ids = output.sequences[0, prompt.shape[1] :].tolist()
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        stopped = token_ids[-1] in end_ids
        for stop in sampling["stop"]:
            if stop in text:
                text, stopped = text[: text.index(stop)], True
        logps = None
        if sampling["logps"]:
            logits = torch.cat(output.logits).float()
            picked = torch.tensor(token_ids, device=self.device)[:, None]
            logps = logits.log_softmax(-1).gather(1, picked).sum().item()
        return Sample(token_ids, text, "stop" if stopped else "length", logps)
