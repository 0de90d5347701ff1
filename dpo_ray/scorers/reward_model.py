"""Score with a Hugging Face sequence-classification model of one label, in token-budget batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dpo_ray.errors import ConfigError


class RewardModel:
    """Holds one reward model and its tokenizer."""

    def __init__(self, path: str, *, revision: str | None, trust_remote_code: bool, dtype: str, use_gpu: bool) -> None:
        where = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.tokenizer = AutoTokenizer.from_pretrained(path, **where)
        model = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, **where
        )
        if model.config.num_labels != 1:
            raise ConfigError(f"score.model {path}: it has {model.config.num_labels} labels; a reward model has one")
        if not self.tokenizer.chat_template:
            raise ConfigError(f"score.model {path}: its tokenizer has no chat template, so a conversation cannot be rendered")
        self.config = model.config.get_text_config()
        self.pad_token_id = self.config.pad_token_id
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.model = model.to(self.device).eval()

    @torch.inference_mode()
    def score(
        self, conversations: Sequence[list[dict[str, str]]], *, max_tokens: int, max_batch_tokens: int
    ) -> list[float | None]:
        """Score of each conversation, in order; None where it is longer than `max_tokens`."""
        rendered = [self._token_ids(c) for c in conversations]
        scores: list[float | None] = [None] * len(rendered)
        fitting = sorted((i for i, ids in enumerate(rendered) if len(ids) <= max_tokens), key=lambda i: len(rendered[i]))
        while fitting:
            batch: list[int] = []
            for i in fitting:  # shortest first, so the newest is the longest of its batch
                if batch and len(rendered[i]) * (len(batch) + 1) > max_batch_tokens:
                    break
                batch.append(i)
            fitting = fitting[len(batch) :]
            for i, value in zip(batch, self._scores([rendered[i] for i in batch]), strict=True):
                scores[i] = value
        return scores

    def _scores(self, token_ids: Sequence[list[int]]) -> list[float]:
        """One forward. The model scores at the last token that is not its own padding token, so it is padded with that."""
        pad = self.pad_token_id
        if pad is None:  # then it means the last token, whatever it is: pad with one that no conversation ends with
            pad = min(set(range(len(token_ids) + 1)) - {ids[-1] for ids in token_ids})
            self.config.pad_token_id = pad
        length = max(map(len, token_ids))
        padded = torch.tensor([ids + [pad] * (length - len(ids)) for ids in token_ids], device=self.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in token_ids], device=self.device)
        return self.model(input_ids=padded, attention_mask=mask).logits[:, 0].float().tolist()

    def _token_ids(self, conversation: list[dict[str, str]]) -> list[int]:
        return self.tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
