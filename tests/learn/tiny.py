"""Tiny random policies and pairs for the tests of dpo_ray.learn: no downloads, a few thousand weights each."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dpo_ray.learn.layout import Group
from dpo_ray.learn.objective import PairRows

VOCAB_SIZE = 101
"""Odd and prime, so that no number of ranks divides it."""
PAD, BOS, EOS = 0, 1, 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)
DECODER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # so that attention and logits are far from uniform
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
GEMMA = {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}


def configs() -> dict[str, PreTrainedConfig]:
    """Return one config per architecture that differs in a way that matters to log-probabilities."""
    return {
        "qwen2": Qwen2Config(**DECODER, tie_word_embeddings=True, attention_dropout=0.1),
        "llama": LlamaConfig(**DECODER, tie_word_embeddings=False),
        # Learned positions, dropout everywhere.
        "gpt2": GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
            bos_token_id=BOS, eos_token_id=EOS,
        ),
        # Sliding windows shorter than the sequences; soft-capping low enough to bite.
        "gemma2": Gemma2Config(**GEMMA, attn_logit_softcapping=1.0, final_logit_softcapping=2.0),
        "gemma3": Gemma3TextConfig(**GEMMA),
    }  # fmt: skip


def more_configs() -> dict[str, PreTrainedConfig]:
    """Return one config for each further way to attend, to place tokens, or to make logits."""
    ids = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "initializer_range": 0.2}
    small = {**ids, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return {
        "qwen3": Qwen3Config(**DECODER, head_dim=8),
        "mistral": MistralConfig(**DECODER, sliding_window=4),
        "mixtral": MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2),
        "qwen3_moe": Qwen3MoeConfig(**DECODER, **experts, num_experts=4),
        "gpt_neox": GPTNeoXConfig(**small, intermediate_size=48, max_position_embeddings=64),
        # A head with a bias; rotary embeddings on a part of each head.
        "phi": PhiConfig(**{**DECODER, "num_key_value_heads": 4}),
        # Logits scaled behind the head.
        "cohere": CohereConfig(**DECODER, logit_scale=0.25),
        "granite": GraniteConfig(**DECODER, logits_scaling=3.0),
        # Learned positions with an offset.
        "opt": OPTConfig(
            **{k: v for k, v in small.items() if k != "initializer_range"}, init_std=0.2, ffn_dim=48,
            word_embed_proj_dim=32, max_position_embeddings=64,
        ),
        # Windows that stand in the mask alone: every sequence of the tests is within them.
        "llama4": Llama4TextConfig(
            **DECODER, head_dim=8, num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=LLAMA4_CHUNK,
            no_rope_layers=[1, 0], interleave_moe_layer_step=1,
        ),
        # What the shared layout cannot give: ALiBi, attention sinks, a state that runs on.
        "bloom": BloomConfig(**ids, hidden_size=32, n_layer=2, n_head=4),
        "gpt_oss": GptOssConfig(**DECODER, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
        "mamba2": Mamba2Config(**small, num_heads=8, head_dim=8, state_size=8, n_groups=1),
        "qwen3_next": Qwen3NextConfig(
            **{**DECODER, "num_hidden_layers": 4}, **experts, num_experts=4, shared_expert_intermediate_size=16,
            linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        ),
    }  # fmt: skip


LLAMA4_CHUNK = 40
NOT_SHARED = {"bloom", "gpt_oss", "mamba2", "qwen3_next"}


def build_model(name: str, seed: int = 0) -> PreTrainedModel:
    """Return a random float32 model in eval mode."""
    config = (configs() | more_configs())[name]
    config.dtype = torch.float32
    torch.manual_seed(seed)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word tokenizer of 101 words: <pad> <bos> <eos> user assistant system w6 ... w100."""
    words = ["<pad>", "<bos>", "<eos>", "user", "assistant", "system"]
    vocabulary = {word: i for i, word in enumerate(words + [f"w{i}" for i in range(len(words), VOCAB_SIZE)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
    )


def save_policy(directory: Path, name: str = "qwen2", dtype: torch.dtype = torch.float32) -> str:
    """Write a complete policy directory and return its path."""
    build_model(name).to(dtype).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return str(directory)


def build_pairs(num_pairs: int, seed: int = 0) -> PairRows:
    """Return pairs of random ids: prompts of 2-6 tokens, completions of 1-9, reference sums near those of `qwen2`."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(3, VOCAB_SIZE, rng.integers(low, high + 1)).tolist()

    prompts, chosen, rejected = zip(*[(ids(2, 6), ids(1, 9), ids(1, 9)) for _ in range(num_pairs)], strict=True)
    ref_chosen = [-5.0 * len(completion) + float(rng.normal()) for completion in chosen]
    ref_rejected = [-5.0 * len(completion) + float(rng.normal()) for completion in rejected]
    return PairRows([f"pair-{i}" for i in range(num_pairs)], prompts, chosen, rejected, ref_chosen, ref_rejected)


def take(pairs: PairRows, rows: list[int]) -> PairRows:
    """Return some rows, in that order."""
    return PairRows(*(column and [column[row] for row in rows] for column in pairs))


def pair_lengths(pairs: PairRows) -> np.ndarray:
    """Return the (pairs, 3) tokens of prompt, chosen and rejected."""
    columns = (pairs.prompt_token_ids, pairs.chosen_token_ids, pairs.rejected_token_ids)
    return np.array([[len(ids) for ids in row] for row in zip(*columns, strict=True)])


def pair_groups(pairs: PairRows) -> list[Group]:
    """Return each pair as a prompt with its two completions."""
    columns = (pairs.prompt_token_ids, pairs.chosen_token_ids, pairs.rejected_token_ids)
    return [Group(prompt, sides) for prompt, *sides in zip(*columns, strict=True)]


def naive_logps(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> float:
    """Return the sum of log-probabilities from one full, unpadded forward, in a loop over tokens, in float64."""
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double()
    total = 0.0
    for i, token in enumerate(completion):
        position = len(prompt) + i
        total += torch.log_softmax(logits_TV[position - 1], dim=-1)[token].item()
    return total
