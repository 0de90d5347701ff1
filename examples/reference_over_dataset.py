"""Reference log-probabilities over a Ray Dataset of your own: no run directory, no stages, any columns beside it.

    python examples/reference_over_dataset.py --output /tmp/referenced
    python examples/reference_over_dataset.py --policy Qwen/Qwen3-0.6B --pairs 's3://bucket/pairs/' --actors 8 --gpus 1 \
        --output s3://bucket/referenced

The pairs are parquet with prompt, chosen and rejected as text, or with prompt_token_ids, chosen_token_ids and
rejected_token_ids, which are taken as they are. Both come back with ref_chosen_logps and ref_rejected_logps, sums in nats.
On a cluster, submit it as a job; every node needs dpo_ray, and sees the policy.
"""

import argparse
import tempfile

import pyarrow as pa
import ray.data

from dpo_ray.config import ActorResources
from dpo_ray.engines.policies import PolicyRef, model_identity
from dpo_ray.learn.tokens import load_tokenizer, render_prompt, tokenize_completion, turn_end_id
from dpo_ray.quickstart.policy import build_policy
from dpo_ray.stages.reference import How, add_logps

PAIRS = [
    {"id": 0, "prompt": "What is the film The Iron Market like?", "chosen": "I loved it.", "rejected": "I hated the cast."},
    {"id": 1, "prompt": "Describe the cafe The Lost Tower.", "chosen": "The dessert was great.", "rejected": "It was awful."},
]
COLUMNS = {"chosen_token_ids": "ref_chosen_logps", "rejected_token_ids": "ref_rejected_logps"}


def with_reference(pairs: ray.data.Dataset, policy: str, how: How, resources: ActorResources) -> ray.data.Dataset:
    """Add the log-probabilities of chosen and rejected under `policy` (a directory or hub id) to rows of any columns."""
    own = list(pairs.columns() or [])
    if "prompt_token_ids" not in own:
        pairs = pairs.map_batches(lambda table: tokenize(table, policy), batch_size=None, batch_format="pyarrow")
        own += ["prompt_token_ids", *COLUMNS]
    # A row's value depends on its own tokens alone. Blocks are scored one by one, in batches of how.max_batch_tokens.
    scored = add_logps(pairs, PolicyRef(policy, model_identity(policy, None)), how, COLUMNS, resources)
    return scored.select_columns([*own, *COLUMNS.values()])


def tokenize(table: pa.Table, policy: str) -> pa.Table:
    """Add the token ids of a block of text; a row that the chat template refuses raises ValueError."""
    tokenizer = load_tokenizer(policy)
    end = turn_end_id(tokenizer)
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": text}]) for text in table["prompt"].to_pylist()]
    table = table.append_column("prompt_token_ids", pa.array(prompts, pa.list_(pa.int32())))
    for side in ("chosen", "rejected"):
        ids = [tokenize_completion(tokenizer, text, end) for text in table[side].to_pylist()]
        table = table.append_column(f"{side}_token_ids", pa.array(ids, pa.list_(pa.int32())))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="directory or hub id; default: a small one, built on the spot")
    parser.add_argument("--pairs", help="parquet file, directory or URI; default: two pairs")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the policy's computations")
    parser.add_argument("--max-batch-tokens", type=int, default=8192, help="of one forward")
    parser.add_argument("--actors", type=int, default=1, help="copies of the policy")
    parser.add_argument("--gpus", type=float, default=0.0, help="of one actor")
    parser.add_argument("--output", default="referenced", help="new directory or URI for parquet")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.policy is None:
            args.policy = f"{scratch}/policy"
            build_policy(args.policy, seed=0, num_steps=30, progress=print)
        pairs = ray.data.read_parquet(args.pairs) if args.pairs else ray.data.from_items(PAIRS)
        how = How(dtype=args.dtype, share_prompt="auto", max_batch_tokens=args.max_batch_tokens)
        resources = ActorResources(actors=args.actors, gpus=args.gpus)
        with_reference(pairs, args.policy, how, resources).write_parquet(args.output, mode=ray.data.SaveMode.ERROR)
    for row in ray.data.read_parquet(args.output).take(5):
        print({name: value for name, value in row.items() if not name.endswith("token_ids")})


if __name__ == "__main__":
    main()
