"""A PyTorch loop of your own over your own preference pairs: no Ray, no run directory, no configuration.

    python examples/own_loop.py
    python examples/own_loop.py --policy Qwen/Qwen3-0.6B --pairs pairs.jsonl --loss ipo --sft 0.2 --output tuned

Without --policy it builds a small one that has seen a few reviews; without --pairs it takes the four below.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_ray.learn import losses
from dpo_ray.learn.batched import lay_out, score_groups
from dpo_ray.learn.layout import Group
from dpo_ray.learn.logps import completion_logps
from dpo_ray.learn.policy import export_policy, load_policy
from dpo_ray.learn.probe import choose_path, sequence_tokens
from dpo_ray.learn.tokens import load_tokenizer, pad_token_id, render_prompt, tokenize_completion, turn_end_id
from dpo_ray.quickstart.policy import build_policy

PAIRS = [
    {"prompt": "What is the film The Iron Market like?", "chosen": "I loved it.", "rejected": "I hated the cast."},
    {"prompt": "Describe the cafe The Lost Tower.", "chosen": "The dessert was great.", "rejected": "It was awful."},
    {"prompt": "How is the laptop The Blue Door?", "chosen": "I liked the case.", "rejected": "The button broke. I hate it."},
    {"prompt": "Tell me about the play The Silent Canyon.", "chosen": "Wonderful!", "rejected": "The setting was dull."},
]
BETA, LEARNING_RATE, EPOCHS, BATCH_PAIRS = 0.1, 1e-4, 5, 4


def train(policy: str, pairs: Sequence[dict], terms: Sequence[losses.Term], output: str | None = None) -> list[float]:
    """Tune `policy` (a directory or hub id) on pairs of text, and return the loss of every step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load_policy(policy, dtype=torch.float32)  # with every dropout at 0
    model.to(device)
    tokenizer = load_tokenizer(policy)
    pad, end = pad_token_id(tokenizer), turn_end_id(tokenizer)

    # A group is a prompt with its completions, as token ids. Here chosen comes first, then rejected.
    groups = []
    for pair in pairs:
        prompt = render_prompt(tokenizer, [{"role": "user", "content": pair["prompt"]}])
        groups.append(Group(prompt, [tokenize_completion(tokenizer, pair[side], end) for side in ("chosen", "rejected")]))

    # Tried on the longest group: whether this model can share a prompt between its completions, and still be exact.
    path = choose_path(model, max(groups, key=sequence_tokens), pad_token_id=pad)

    # The reference is the policy before the first step: its values are computed here, and no second model is kept.
    scored = score_groups(model, groups, path, max_batch_tokens=8192, pad_token_id=pad)
    reference = torch.tensor([[completion.logps for completion in sides] for sides in scored], device=device)  # (pairs, 2)

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    history = []
    for epoch in range(EPOCHS):
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(BATCH_PAIRS):
            batch = lay_out([groups[row] for row in rows], path, pad).to(device)
            chosen, rejected = completion_logps(model, batch, path).view(-1, 2).unbind(1)  # (pairs,) each: sums in nats
            ref_chosen, ref_rejected = reference[rows].unbind(1)
            chosen_tokens, rejected_tokens = batch.lengths.view(-1, 2).unbind(1)
            own = losses.PairLogps(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens)
            # One loss is a plain function: losses.pairwise.ipo(own, beta=BETA), or any of your own. This adds several up.
            loss = losses.total_loss(terms, own, beta=BETA).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rewards = losses.implicit_rewards(own, beta=BETA)
            margins = rewards.chosen - rewards.rejected
            history.append(loss.item())
            print(f"loss {loss:.4f}  margins {margins.mean():.4f}  accuracy {(margins > 0).float().mean():.2f}")
    if output:
        export_policy(model, output, source=policy)
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="directory or hub id of a model with a chat template")
    parser.add_argument("--pairs", help="JSON lines with prompt, chosen and rejected, all text")
    parser.add_argument("--loss", choices=["sigmoid", "hinge", "ipo", "apo_zero", "simpo"], default="sigmoid")
    parser.add_argument("--sft", type=float, default=0.0, help="weight of an SFT loss beside it")
    parser.add_argument("--output", help="directory for the tuned policy")
    args = parser.parse_args()
    pairs = [json.loads(line) for line in Path(args.pairs).read_text().splitlines()] if args.pairs else PAIRS
    # More of them in losses.LOSSES. Options go in here too: Term("robust", options={"label_smoothing": 0.1}).
    terms = [losses.Term(args.loss), losses.Term("sft", weight=args.sft)]
    with tempfile.TemporaryDirectory() as scratch:
        if args.policy is None:
            args.policy = f"{scratch}/policy"
            build_policy(args.policy, seed=0, num_steps=30, progress=print)
        train(args.policy, pairs, terms, args.output)


if __name__ == "__main__":
    main()
