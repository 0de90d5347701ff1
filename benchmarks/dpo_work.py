"""What every arm of `dpo.py` works on: random Qwen2 models and pairs of token ids, made once and kept on disk.

Pairs are HH-RLHF's where $DPO_RAY_TEST_DATA has them, tokenised with a BPE trained on that text, else lognormal lengths
with random ids. The same seed gives the same pairs, in the same order, to all arms.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PAD, EOS, USER, ASSISTANT = range(4)
SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>"]
MAX_LENGTH = 1024
HH = "hh-rlhf/harmless-base-test.jsonl.gz"
PROFILES = {"hh": 2.15, "long": 0.42}
"""Prompt tokens / completion tokens where lengths are drawn."""
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "150m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "370m": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
}
"""Of `Qwen2Config`; 1b has 1.0 billion weights with a vocabulary of 151,936, and 370m half of its layers."""


class Pair(NamedTuple):
    """Token ids of one comparison, and the reference's log-probabilities (nats) where they are known."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    ref_chosen: float = 0.0
    ref_rejected: float = 0.0

    @property
    def tokens(self) -> int:
        """Of prompt + chosen and of prompt + rejected: the work as posed, whatever an arm computes."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def model_directory(root: Path, shape: str, vocabulary: int) -> Path:
    """Return a saved random Qwen2 with tied embeddings, made if it is not there."""
    directory = root / f"qwen2-{shape}-v{vocabulary}"
    if not (directory / "done").exists():
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(
            **SHAPES[shape],
            vocab_size=vocabulary,
            max_position_embeddings=2 * MAX_LENGTH,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(directory)
        (directory / "done").touch()
    return directory


def pairs_file(root: Path, profile: str, vocabulary: int, count: int) -> Path:
    """Return a file with pairs, made if it is not there; its name says whether they are HH-RLHF's or drawn."""
    source = Path(os.environ.get("DPO_RAY_TEST_DATA", "/nowhere")) / HH
    real = profile == "hh" and source.exists()
    file = root / f"{profile}-{'real' if real else 'drawn'}-v{vocabulary}-{count}.json"
    if not file.exists():
        pairs = _hh(source, vocabulary) if real else _drawn(PROFILES[profile], vocabulary, count)
        file.write_text(json.dumps([pairs[i % len(pairs)] for i in range(count)]))
    return file


def read_pairs(file: Path) -> list[Pair]:
    return [Pair(*columns) for columns in json.loads(file.read_text())]


def describe(pairs: list[Pair]) -> str:
    """Mean lengths of some pairs, in words."""
    p, c, r = np.mean([[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in pairs], axis=0)
    return f"{len(pairs)} pairs of {p:.0f} prompt + {c:.0f} chosen / {r:.0f} rejected tokens on average"


def memory_pairs(vocabulary: int) -> list[Pair]:
    """Two pairs of a few tokens, which allocate the optimizer's state, then two with 256 tokens in each sequence."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(len(SPECIAL), vocabulary, n).tolist()
    return [Pair(draw(p), draw(c), draw(c)) for p, c in ((2, 2), (2, 2), (96, 160), (96, 160))]


def equal_pairs(vocabulary: int, tokens: int, count: int) -> list[Pair]:
    """Pairs whose prompt and completions all have `tokens` random ids."""
    ids = np.random.default_rng(0).integers(len(SPECIAL), vocabulary, (count, 3, tokens))
    return [Pair(*pair) for pair in ids.tolist()]


def _drawn(ratio: float, vocabulary: int, count: int) -> list[Pair]:
    """Lognormal lengths with a mean of 300 tokens of prompt and completion, their quotient `ratio`."""
    rng = np.random.default_rng(1)
    prompt = 300 * ratio / (1 + ratio)
    sigma = 0.5
    mu = np.log([prompt, 300 - prompt, 300 - prompt]) - sigma**2 / 2
    ids = lambda n: rng.integers(len(SPECIAL), vocabulary, n).tolist()
    pairs = []
    for _ in range(count):
        p, c, r = np.exp(rng.normal(mu, sigma)).astype(int).clip(4, MAX_LENGTH // 2)
        pairs.append(Pair(ids(p), [*ids(c - 1), EOS], [*ids(r - 1), EOS]))
    return pairs


def _hh(source: Path, vocabulary: int) -> list[Pair]:
    """HH-RLHF's comparisons of at most `MAX_LENGTH` tokens, shuffled; a BPE of up to `vocabulary` tokens is trained on them."""
    from dpo_ray.ingest import Comparison
    from dpo_ray.ingest.hh_rlhf import comparison

    with gzip.open(source, "rt") as lines:
        rows = [comparison(json.loads(line)) for line in lines]
    kept = [row for row in rows if isinstance(row, Comparison) and row.chosen and row.rejected]
    texts = [text for row in kept for text in (*(m["content"] for m in row.prompt), row.chosen, row.rejected)]
    tokenizer = _bpe(texts, vocabulary)
    encode = lambda text: tokenizer.encode(text).ids
    pairs = []
    for row in kept:
        prompt = []
        for message in row.prompt:
            prompt += [USER if message["role"] == "user" else ASSISTANT, *encode(message["content"]), EOS]
        pair = Pair([*prompt, ASSISTANT], [*encode(row.chosen), EOS], [*encode(row.rejected), EOS])
        if len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= MAX_LENGTH:
            pairs.append(pair)
    return [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]


def _bpe(texts: list[str], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
