"""Build the quickstart's policy: a tokenizer and a small Qwen2 model, taught to write reviews of mixed sentiment.

In: a seed. Out: a directory that transformers and vLLM load as is (config, safetensors weights, generation config,
tokenizer with chat template). Training takes a fixed number of steps, never a time limit.
Invariant: the same `policy_key` means the same policy; on one machine the files are byte-identical.
The directory appears complete or not at all.
"""

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from itertools import repeat
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

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
NUM_STEPS = 800
BATCH_SIZE = 16
MAX_LEARNING_RATE = 4e-3
WARMUP_STEPS = 30
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
NUM_SHARDS = 2
"""Parts of a batch that run at once, in a thread each. Splitting every operation over two threads instead gains a
third where this gains a half, and becomes ten times slower when another process takes a core."""
BATCHES_PER_BUCKET = 8
"""Examples are sorted by length within this many batches, so that little of a batch is padding."""


def policy_key(seed: int) -> str:
    """Return a short hash of everything that decides the policy: the seed, our source and the library versions."""
    sources = [Path(module).read_bytes() for module in (__file__, reviews.__file__)]
    decisive = {
        "seed": seed,
        "sources": [hashlib.sha256(source).hexdigest() for source in sources],
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def build_policy(
    directory: str | Path,
    seed: int,
    *,
    num_steps: int = NUM_STEPS,
    num_threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Train the policy and save it to `directory`, replacing what is there.

    `num_threads` bounds the cores used (default: all; more than two gain nothing) and does not change the result.
    `progress` is called with a line of text now and then. The caller's random state, torch thread count and matmul
    precision are left as they were.
    """
    directory = Path(directory).absolute()
    report = progress or (lambda _: None)
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        with _torch_settings(seed):
            tokenizer = _build_tokenizer(seed)
            model = _build_model(tokenizer)
            num_threads = num_threads or os.cpu_count() or 1
            _fine_tune(model, tokenizer, seed, num_steps=num_steps, num_threads=num_threads, report=report)
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
        _set_fastest_exact_matmul()
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)


def _set_fastest_exact_matmul() -> None:
    """Let torch use oneDNN for float32 matmuls (twice as fast on AVX-512) where that loses no precision."""
    left, right = torch.rand(256, 256), torch.rand(256, 256)
    exact = left.double() @ right.double()
    torch.set_float32_matmul_precision("medium")
    error = ((left @ right).double() - exact).abs().max() / exact.abs().max()
    if error > 1e-5:
        torch.set_float32_matmul_precision("highest")


def _examples(num: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield `num` prompts and reviews of them."""
    rng = random.Random(f"reviews-{seed}")
    for request in reviews.requests(num, seed):
        yield request.text, reviews.write_review(request, rng)


def _build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary from examples; any text round-trips."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [f"system\nuser\n{prompt}\nassistant\n{review}" for prompt, review in _examples(TOKENIZER_REVIEWS, seed)]
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
    num_threads: int,
    report: Callable[[str], None],
) -> None:
    """Teach `model` to answer prompts with reviews; every example is seen once."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=MAX_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, num_steps))
    model.train()
    # Plain attention: with torch's blocked CPU kernel a step on sequences this short takes twice as long.
    with (
        ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        sdpa_kernel(SDPBackend.MATH),
    ):
        for step, batch in enumerate(_batches(tokenizer, seed, num_steps), 1):
            shards = [batch[shard::NUM_SHARDS] for shard in range(NUM_SHARDS)]
            num_targets = sum(len(ids) - num_prompt for ids, num_prompt in batch)
            results = pool.map(_loss_and_gradients, repeat(model), shards, repeat(num_targets))
            losses, gradients = zip(*results, strict=True)
            for parameter, *parts in zip(parameters, *gradients, strict=True):
                parameter.grad = sum(parts[1:], parts[0])
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            if step % 50 == 0 or step == num_steps:
                report(f"quickstart policy: step {step} of {num_steps}, loss {sum(losses):.3f}")
    model.eval()


def _learning_rate_factor(step: int, num_steps: int) -> float:
    """Rise over the warmup, then fall linearly to a twentieth."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * (1 - 0.95 * step / num_steps)


def _batches(tokenizer: PreTrainedTokenizerFast, seed: int, num_steps: int) -> Iterator[list[tuple[list[int], int]]]:
    """Yield `num_steps` batches of (token ids, number of prompt tokens), each of examples of similar length."""
    examples = []
    for prompt, review in _examples(num_steps * BATCH_SIZE, seed):
        messages = [{"role": "user", "content": prompt}]
        opening = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        prompt_ids = tokenizer.encode(opening, add_special_tokens=False)
        review_ids = tokenizer.encode(review + END, add_special_tokens=False)
        examples.append((prompt_ids + review_ids, len(prompt_ids)))
    rng = random.Random(f"batches-{seed}")
    bucket_size = BATCH_SIZE * BATCHES_PER_BUCKET
    for start in range(0, len(examples), bucket_size):
        bucket = sorted(examples[start : start + bucket_size], key=lambda example: len(example[0]))
        batches = [bucket[i : i + BATCH_SIZE] for i in range(0, len(bucket), BATCH_SIZE)]
        yield from rng.sample(batches, len(batches))


def _loss_and_gradients(
    model: Qwen2ForCausalLM, shard: list[tuple[list[int], int]], num_targets: int
) -> tuple[float, tuple[torch.Tensor, ...]]:
    """Return a shard's part of the batch's mean loss, and of its gradient for each parameter."""
    loss = _completion_loss(model, shard) / num_targets
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def _completion_loss(model: Qwen2ForCausalLM, shard: list[tuple[list[int], int]]) -> torch.Tensor:
    """Return the summed cross entropy of the shard's completion tokens, the end token included."""
    longest = max(len(ids) for ids, _ in shard)
    input_ids = torch.zeros(len(shard), longest, dtype=torch.long)
    is_target = torch.zeros(len(shard), longest, dtype=torch.bool)
    for row, (ids, num_prompt) in enumerate(shard):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        is_target[row, num_prompt : len(ids)] = True
    # Padding stands on the right, where causal attention hides it: no mask is needed. Only the states that predict a
    # completion token pass through the head.
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][is_target[:, 1:]])
    return functional.cross_entropy(logits, input_ids[:, 1:][is_target[:, 1:]], reduction="sum")
