"""A run's REFERENCED table with the column names of TRL 1.16, and how TRL trains on it.

    make round
    python examples/export_for_trl.py --output trl.parquet
    python examples/export_for_trl.py --reference ROOT/NAME/round_00/reference --output trl.parquet --train POLICY

Writes one parquet file with pair_id, prompt_ids, chosen_ids, rejected_ids, ref_chosen_logps and ref_rejected_logps. The ids
are those that the engine sampled; text would be tokenised anew, to other ids than the reference values belong to.
"""

import argparse
import os
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.errors import ConfigError
from dpo_ray.flow.artifact import read_artifact, read_table
from dpo_ray.schemas import REFERENCED

TRL_NAMES = {
    "pair_id": "pair_id",
    "prompt_token_ids": "prompt_ids",
    "chosen_token_ids": "chosen_ids",
    "rejected_token_ids": "rejected_ids",
    "ref_chosen_logps": "ref_chosen_logps",
    "ref_rejected_logps": "ref_rejected_logps",
}
TRL_SCHEMA = pa.schema([REFERENCED.field(ours).with_name(trl) for ours, trl in TRL_NAMES.items()])


def export(reference: str, output: str) -> int:
    """Write what the stage in the directory or URI `reference` has committed to the file `output`; return the pairs written.

    Raises:
        ConfigError: nothing is committed there.
    """
    artifact = read_artifact(reference)
    if artifact is None:
        raise ConfigError(
            f"{reference} holds no committed reference stage, expected the directory <root>/<name>/round_<number>/reference of "
            "a run; `make round` makes one, but a run whose loss needs no reference has none"
        )
    with pq.ParquetWriter(output, TRL_SCHEMA) as writer:
        for part in artifact.tables():
            table = read_table(artifact.uri(part), columns=TRL_NAMES)
            writer.write_table(table.select(list(TRL_NAMES)).rename_columns(list(TRL_NAMES.values())).cast(TRL_SCHEMA))
    return artifact.manifest.rows_out


def trl_trainer(policy: str, dataset: Any, args: Any) -> Any:
    """Return a DPOTrainer that takes the exported columns as they are.

    TRL 1.16 always tokenises text and computes the reference itself, so both steps are taken out. `args` is a DPOConfig with
    precompute_ref_log_probs=True, so that ours are read, max_length=None, so that nothing is cut, and the dtype that the run
    had as train.dtype. The values are plain sums: not for ld_alpha.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    class TokenIdTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    return TokenIdTrainer(policy, args=args, train_dataset=dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", default="~/dpo-ray/quickstart/round_00/reference", help="directory or URI of the stage")
    parser.add_argument("--output", default="trl.parquet", help="file to write")
    parser.add_argument("--train", metavar="POLICY", help="also take ten steps with TRL from this directory or hub id")
    parser.add_argument("--bf16", action="store_true", help="of --train; for a run with `train.dtype: bfloat16`")
    args = parser.parse_args()
    reference = args.reference if "://" in args.reference else os.path.abspath(os.path.expanduser(args.reference))
    try:
        print(f"{export(reference, args.output)} pairs in {args.output}")
    except ConfigError as error:
        parser.error(str(error))
    if args.train:
        import datasets
        from trl.trainer.dpo_config import DPOConfig

        ours = {"precompute_ref_log_probs": True, "max_length": None, "bf16": args.bf16}
        config = DPOConfig(output_dir="trl-trained", max_steps=10, logging_steps=1, report_to="none", **ours)
        trl_trainer(args.train, datasets.Dataset.from_parquet(args.output), config).train()


if __name__ == "__main__":
    main()
