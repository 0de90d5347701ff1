"""TRL 1.16's DPOTrainer as the arms of `dpo.py`: tuned, and as shipped.

Tuned: no gradient checkpointing, reference values precomputed, oneDNN float32 (or bf16), no logging within the run. Both get
token ids, the batches of the other arms in their order, a constant learning rate, and fused AdamW (TRL's default).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from dpo_work import EOS, PAD, SPECIAL, Pair

if TYPE_CHECKING:
    from dpo_arms import Job, Logps, Score


def train(job: Job, tick: Callable[[float], None], tuned: bool, bf16: bool) -> None:
    """`DPOTrainer.train()`; `tick` is called at the end of each of its steps."""
    from transformers import TrainerCallback

    class Ticks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tick(torch.stack(trainer.losses).mean().item())
            trainer.losses.clear()

    trainer = _trainer(job, tuned, bf16, [Ticks()])
    trainer.train()


def reference(job: Job, bf16: bool) -> Score:
    """`DPOTrainer._precompute_ref_logps` alone, in batches like those of the other padded arms."""
    trainer = _trainer(job, True, bf16, [])

    def score(pairs: Sequence[Pair]) -> Logps:
        dataset = trainer.precompute(_dataset(pairs, columns=3), trainer.args.per_device_train_batch_size)
        return [list(both) for both in zip(dataset["ref_chosen_logps"], dataset["ref_rejected_logps"], strict=True)]

    return score


def _trainer(job: Job, tuned: bool, bf16: bool, callbacks: list[Any]) -> Any:
    import datasets
    import dpo_arms
    import transformers
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class TokenIds(DPOTrainer):
        """Takes token ids and their reference values as they are, and keeps the loss of every forward."""

        losses: list[torch.Tensor]

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # has the columns that TRL would add

        def precompute(self, dataset: Any, batch_size: int) -> Any:
            return super()._precompute_ref_logps(dataset, "train", batch_size)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(loss.detach())
            return loss

    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()  # pyright: ignore
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL)}, SPECIAL[PAD]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=SPECIAL[PAD], eos_token=SPECIAL[EOS])
    tuning: dict[str, Any] = {
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
        "bf16": bf16,
        "logging_steps": 1000,
    }
    forward_pairs = min(job.batch_pairs, dpo_arms.MICRO_PAIRS)
    args: Any = DPOConfig(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        per_device_train_batch_size=forward_pairs,
        gradient_accumulation_steps=job.batch_pairs // forward_pairs,
        max_steps=len(job.batches),
        learning_rate=dpo_arms.LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=dpo_arms.MAX_NORM,
        beta=dpo_arms.BETA,
        max_length=None,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=job.device == "cpu",
        **(tuning if tuned else {}),
    )
    trainer = TokenIds(
        dpo_arms.load(job, fast=tuned),
        args=args,
        train_dataset=_dataset(job.pairs),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.losses = []
    return trainer


def _dataset(pairs: Sequence[Pair], columns: int = 5) -> Any:
    from datasets import Dataset

    names = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
    return Dataset.from_dict(dict(zip(names[:columns], map(list, zip(*pairs, strict=True)), strict=False)))
