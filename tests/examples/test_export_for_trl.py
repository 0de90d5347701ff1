import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.schemas import REFERENCED
from examples import export_for_trl

from ..artifacts import commit_tables
from ..learn import tiny
from ..stages import rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def referenced():
    """Pairs whose reference is the policy itself, valued by a plain forward; two parts of them."""
    made, model = tiny.build_pairs(8, seed=7), tiny.build_model("llama")
    table = []
    for key, *ids in zip(*made[:4], strict=True):
        prompt, chosen, rejected = map(list, ids)
        values = {"chosen": tiny.naive_logps(model, prompt, chosen), "rejected": tiny.naive_logps(model, prompt, rejected)}
        row = rows.pair_row(key, prompt, chosen, rejected)
        table.append(row | {f"ref_{side}_logps": value for side, value in values.items()} | {"reference_id": "llama"})
    return table


def commit(directory, table):
    parts = [pa.Table.from_pylist(some, REFERENCED) for some in (table[:5], table[5:])]
    commit_tables(directory, parts)
    # A torn attempt, which no manifest lists.
    pq.write_table(parts[0], directory / "part-00002.parquet")
    return str(directory)


def test_export_has_every_committed_pair_by_trl_names(referenced, tmp_path):
    output = str(tmp_path / "trl.parquet")
    assert export_for_trl.export(commit(tmp_path / "reference", referenced), output) == 8
    got = {row["pair_id"]: row for row in pq.read_table(output).to_pylist()}
    assert len(got) == 8
    for row in referenced:
        own = got[row["pair_id"]]
        assert own["prompt_ids"] == row["prompt_token_ids"]
        assert own["chosen_ids"] == row["chosen_token_ids"]
        assert own["rejected_ids"] == row["rejected_token_ids"]
        assert own["ref_chosen_logps"] == pytest.approx(row["ref_chosen_logps"], rel=1e-6)
        assert own["ref_rejected_logps"] == pytest.approx(row["ref_rejected_logps"], rel=1e-6)


def test_export_trains_in_trl_from_ln_2(referenced, policy, tmp_path):
    """The first loss is that of a policy that is its reference: TRL saw our ids and our values, and cut neither.

    Shifted values of chosen shift TRL's margin by beta times as much, so they are what it reads, not values of its own.
    """
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl.trainer.dpo_config", reason="the export is for trl, see the dev extra")
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "trained"),
        precompute_ref_log_probs=True,
        max_length=None,
        bf16=False,
        beta=0.5,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        max_steps=2,
        logging_steps=1,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )

    def losses(name, shift):
        table = [row | {"ref_chosen_logps": row["ref_chosen_logps"] + shift} for row in referenced]
        export_for_trl.export(commit(tmp_path / name, table), str(tmp_path / f"{name}.parquet"))
        dataset = datasets.Dataset.from_parquet(str(tmp_path / f"{name}.parquet"), cache_dir=str(tmp_path / "cache"))
        trainer = export_for_trl.trl_trainer(policy.path, dataset, args)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    first, second = losses("same", 0.0)
    assert first == pytest.approx(math.log(2), abs=1e-4)
    assert second < first
    assert losses("shifted", -2.0)[0] == pytest.approx(math.log1p(math.exp(-1.0)), abs=1e-4)


def test_export_of_nothing_committed_says_what_is_expected(tmp_path):
    with pytest.raises(ConfigError, match=r"round_00/reference holds no committed reference stage"):
        export_for_trl.export(str(tmp_path / "round_00/reference"), str(tmp_path / "trl.parquet"))
    assert not (tmp_path / "trl.parquet").exists()
