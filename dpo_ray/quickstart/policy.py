"""Build the quickstart's policy: a tokenizer and a small Qwen2 model, taught to write reviews of mixed sentiment.

In: a seed. Out: a directory that transformers and vLLM load as is (config, safetensors weights, generation config,
tokenizer with chat template). Training takes a fixed number of steps, never a time limit.
Invariant: the same `policy_key` means the same policy; on one machine the files are byte-identical.
The directory appears complete or not at all.
"""

import hashlib
import inspect
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from dpo_ray.learn import attention, logps, sft, steps, turns
from dpo_ray.learn.batches import Plan
from dpo_ray.learn.matmul import float32_matmul_fast_path
from dpo_ray.learn.optim import build_optimizer, learning_rate_at
from dpo_ray.learn.tokens import pad_token_id, turn_end_id
from dpo_ray.quickstart import reviews

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCAB_SIZE = 2048
TOKENIZER_REVIEWS = 4000
"""Reviews, with their prompts, from which the vocabulary is learnt."""

MODEL = {
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
"""The last two suit a narrow model and texts of 60 tokens: with the library's defaults it learns to copy a title late."""
NUM_STEPS = 640
BATCH_SIZE = 16
MAX_LEARNING_RATE = 4e-3
WARMUP_STEPS = 30
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
MAX_BATCH_TOKENS = 4096
PATH = logps.Path(share_prompt=True, tiled_head=True)
"""What `probe.choose_path` finds for the model; stated, so that the same steps are taken everywhere."""


def policy_key(seed: int, num_steps: int = NUM_STEPS) -> str:
    """Return a short hash of everything that decides the policy: the seed, our sources and the library versions."""
    sources = [Path(inspect.getfile(module)).read_bytes() for module in (sys.modules[__name__], reviews, sft, steps, turns)]
    decisive = {
        "seed": seed,
        "num_steps": num_steps,
        "sources": [hashlib.sha256(source).hexdigest() for source in sources],
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def build_policy(
    directory: str | Path,
    seed: int,
    *,
    num_steps: int = NUM_STEPS,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Train the policy and save it to `directory`, replacing what is there.

    It uses one core: operations this small gain a third from a second one, and become ten times slower when another
    process takes it. The caller's random state, torch thread count and matmul precision are left as they were.

    Args:
        num_steps: 0 leaves the random weights as they are.
        progress: called with a line of text now and then.
    """
    directory = Path(directory).absolute()
    report = progress or (lambda _: None)
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        with _torch_settings(seed):
            tokenizer = _build_tokenizer(seed)
            model = _build_model(tokenizer)
            if num_steps:
                _fine_tune(model, tokenizer, seed, num_steps=num_steps, report=report)
        with _no_progress_bars():
            model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars."""
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


@contextmanager
def _torch_settings(seed: int) -> Iterator[None]:
    """Seed torch, give each operation one thread and the fastest exact matmul; restore all three afterwards."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        float32_matmul_fast_path()
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)


def _build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary from examples; any text round-trips."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    chats = reviews.conversations(TOKENIZER_REVIEWS, seed)
    texts = ["system\n" + "\n".join(f"{turn['role']}\n{turn['content']}" for turn in chat) for chat in chats]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[PAD, START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MODEL["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def _build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    vocab = tokenizer.get_vocab()
    end, pad = vocab[END], vocab[PAD]
    config = Qwen2Config(
        **MODEL, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=end, pad_token_id=pad, dtype="float32"
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, eos_token_id=end, pad_token_id=pad
    )
    return model


def _fine_tune(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    *,
    num_steps: int,
    report: Callable[[str], None],
) -> None:
    """Teach `model` to answer prompts with reviews; every example is seen once."""
    model.set_attn_implementation(attention.NAME)
    rows = _rows(tokenizer, num_steps * BATCH_SIZE, seed)
    lengths = np.array([[len(row.prompt), len(row.completion)] for row in rows])
    num_targets = np.array([len(row.assistant_positions) for row in rows])
    plan = Plan(
        lengths,
        epochs=1,
        global_batch_size=BATCH_SIZE,
        world_size=1,
        max_batch_tokens=MAX_BATCH_TOKENS,
        seed=seed,
        share_prompt=PATH.share_prompt,
    )
    optimizer = build_optimizer(model, learning_rate=MAX_LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.95))
    taken = sft.sft_steps(
        model,
        optimizer,
        lambda batch: sft.ConversationRows([str(i) for i in batch], *zip(*(rows[i] for i in batch), strict=True)),
        plan,
        PATH,
        lengths,
        num_targets,
        learning_rate_for=partial(
            learning_rate_at, num_steps=num_steps, peak=MAX_LEARNING_RATE, warmup_steps=WARMUP_STEPS, schedule="linear"
        ),
        max_grad_norm=MAX_GRAD_NORM,
        pad_token_id=pad_token_id(tokenizer),
        device="cpu",
        read_after=lambda done: done % 50 == 0,
    )
    done = 0
    for metrics in taken:
        done += len(metrics)
        report(f"quickstart policy: step {done} of {num_steps}, loss {metrics[-1]['loss']:.3f}")


def _rows(tokenizer: PreTrainedTokenizerFast, num: int, seed: int) -> list[turns.Turns]:
    end_id = turn_end_id(tokenizer)
    return [row for messages in reviews.conversations(num, seed) for row in turns.turn_rows(tokenizer, messages, end_id)]
