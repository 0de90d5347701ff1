"""What a worker reads of its pairs, what is refused, and how little of the table lies on its heap."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_ray import node_copy
from dpo_ray.config import Train
from dpo_ray.errors import ConfigError, StageError
from dpo_ray.flow.artifact import write_table
from dpo_ray.node_copy import BLOCK_ROWS
from dpo_ray.pair_table import PairTable, columns_of
from dpo_ray.schemas import REFERENCED

from .artifacts import commit_tables
from .learn import tiny
from .stages import rows

PAIRS = tiny.build_pairs(10, seed=1)
BLOCK = {"beta": 0.1, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(node_copy, "CACHE", tmp_path / "cache")


def referenced() -> list[dict]:
    columns = zip(PAIRS.pair_id, PAIRS.prompt_token_ids, PAIRS.chosen_token_ids, PAIRS.rejected_token_ids, strict=True)
    made = [rows.pair_row(*row) for row in columns]
    return [
        row | {"ref_chosen_logps": -float(i), "ref_rejected_logps": -float(i) / 2, "reference_id": "r"}
        for i, row in enumerate(made)
    ]


def open_pairs(directory, made: list[dict], cuts=(), **train) -> PairTable:
    whole = pa.Table.from_pylist(made, REFERENCED)
    edges = [0, *cuts, len(made)]
    tables = [whole.slice(a, b - a) for a, b in pairwise(edges)]
    artifact = commit_tables(directory / "pairs", tables)
    uris = [artifact.uri(f) for f in artifact.tables()]
    return PairTable(uris, columns_of(Train.model_validate(BLOCK | train)), artifact.manifest.output_hash)


def test_pair_table_fetches_rows_by_index_over_all_files(tmp_path):
    table = open_pairs(tmp_path, referenced(), cuts=(3, 9))
    assert len(table) == 10
    got = table.fetch([9, 0, 4, 4])
    for field in ("pair_id", "prompt_token_ids", "chosen_token_ids", "rejected_token_ids"):
        assert getattr(got, field) == [getattr(PAIRS, field)[i] for i in (9, 0, 4, 4)]
    assert got.ref_chosen_logps == [-9.0, -0.0, -4.0, -4.0]
    assert got.ref_chosen_token_logps is None


def test_pair_table_fetches_rows_of_every_block(tmp_path):
    made = [referenced()[i % 10] | {"pair_id": f"pair-{i}"} for i in range(2 * BLOCK_ROWS + 3)]
    table = open_pairs(tmp_path, made, cuts=(700,))
    asked = [2 * BLOCK_ROWS + 2, BLOCK_ROWS, BLOCK_ROWS - 1, 0, 2 * BLOCK_ROWS, 699, 700]
    got = table.fetch(asked)
    assert got.pair_id == [f"pair-{i}" for i in asked]
    assert got.chosen_token_ids == [made[i]["chosen_token_ids"] for i in asked]


def test_pair_table_fetches_the_reference_per_token_where_the_loss_needs_it(tmp_path):
    made = referenced()
    for row in made:
        for side in ("chosen", "rejected"):
            row[f"ref_{side}_token_logps"] = [-0.5 * i for i in range(len(row[f"{side}_token_ids"]))]
    got = open_pairs(tmp_path, made, ld_alpha=0.5).fetch([7, 2])
    assert got.ref_chosen_token_logps == [made[i]["ref_chosen_token_logps"] for i in (7, 2)]
    assert got.ref_rejected_token_logps == [made[i]["ref_rejected_token_logps"] for i in (7, 2)]


def test_pair_table_lengths_are_those_of_prompt_and_completion(tmp_path):
    assert open_pairs(tmp_path, referenced(), cuts=(3,)).lengths.tolist() == tiny.pair_lengths(PAIRS).tolist()


def test_pair_table_longest_is_the_pair_with_the_longest_sequence(tmp_path):
    """Not the one of most tokens, whose sequences may all lie inside a window."""
    made = referenced()
    made[2] |= {"prompt_token_ids": [5] * 10, "chosen_token_ids": [6] * 30, "rejected_token_ids": [7]}
    made[6] |= {"prompt_token_ids": [5] * 9, "chosen_token_ids": [6] * 30, "rejected_token_ids": [7] * 30}
    group = open_pairs(tmp_path, made, cuts=(4,)).longest()
    assert (group.prompt, group.completions) == ([5] * 10, [[6] * 30, [7]])


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 0.25])
def test_pair_table_refuses_a_reference_that_is_no_log_probability(tmp_path, value):
    made = [referenced()[i % 10] | {"pair_id": f"pair-{i}"} for i in range(BLOCK_ROWS + 10)]
    for i in (BLOCK_ROWS + 3, BLOCK_ROWS + 5):  # not in the first block
        made[i]["ref_rejected_logps"] = value
    bad = (
        rf"2 of {BLOCK_ROWS + 10} pairs have no usable ref_rejected_logps; the first is pair pair-{BLOCK_ROWS + 3} with {value}"
    )
    with pytest.raises(StageError, match=bad):
        open_pairs(tmp_path, made)
    assert len(open_pairs(tmp_path, made, loss="simpo")) == BLOCK_ROWS + 10


def test_pair_table_refuses_pairs_without_what_the_loss_needs(tmp_path):
    with pytest.raises(
        StageError, match="10 of 10 pairs have no usable ref_chosen_token_logps; the first is pair pair-0 with None"
    ):
        open_pairs(tmp_path, referenced(), ld_alpha=0.5)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_pair_table_check_budget_names_the_longest_pair_and_its_tokens(tmp_path, share_prompt):
    made = referenced()
    made[6] |= {"prompt_token_ids": [5] * 30, "chosen_token_ids": [6] * 20, "rejected_token_ids": [7] * 4}
    table, tokens = open_pairs(tmp_path, made), 54 if share_prompt else 100
    table.check_budget(tokens, share_prompt=share_prompt)
    with pytest.raises(ConfigError) as error:
        table.check_budget(tokens - 1, share_prompt=share_prompt)
    for part in (f"max_batch_tokens={tokens - 1}", "pair-6", f"{tokens} tokens", "prompt 30, chosen 20, rejected 4", "1 of 10"):
        assert part in str(error.value)


MEASURED = """
import json, pathlib, re, sys
import pyarrow as pa
from dpo_ray import node_copy, pair_table
from dpo_ray.learn import batches, objective
def anonymous():
    return 1024 * int(re.search(r"Anonymous: *([0-9]+) kB", pathlib.Path("/proc/self/smaps_rollup").read_text())[1])
node_copy.CACHE = pathlib.Path(sys.argv[1])
columns = [*pair_table.ROWS, *pair_table.REFERENCE]
for directory in sys.argv[2:]:
    before = anonymous()
    uris = sorted(map(str, pathlib.Path(directory).iterdir()))
    table = pair_table.PairTable(uris, columns, directory)
    plan = batches.Plan(
        table.lengths, epochs=3, global_batch_size=64, world_size=2, max_batch_tokens=4096, seed=0, share_prompt=True
    )
    tokens = 0
    for i in range(0, len(plan), max(1, len(plan) // 100)):
        for rows in plan[i][0]:
            tokens += sum(map(len, table.fetch(rows).chosen_token_ids))
    print(json.dumps({"rows": len(table), "grown": anonymous() - before, "arrow": pa.default_memory_pool().max_memory(),
                      "copies": sum(f.stat().st_size for f in node_copy.CACHE.rglob("*.arrow")), "tokens": tokens}))
"""


def write_many(directory: Path, num_files: int) -> str:
    """Files of 2,000 rows of 20 + 30 + 30 tokens, and nothing else in the directory."""
    lengths = {"prompt_token_ids": 20, "chosen_token_ids": 30, "rejected_token_ids": 30}
    lists = {c: pa.array([list(range(n))] * 2000, pa.list_(pa.int32())) for c, n in lengths.items()}
    logps = {c: pa.array([-1.0] * 2000, pa.float32()) for c in ("ref_chosen_logps", "ref_rejected_logps")}
    table = pa.table({"pair_id": [f"{i:032x}" for i in range(2000)], **lists, **logps})
    for i in range(num_files):
        write_table(str(directory), f"part-{i:05d}.parquet", table)
    return str(directory)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="anonymous memory is read from Linux's /proc")
def test_pair_table_heap_does_not_grow_with_the_table(tmp_path):
    """Copying, checking, planning three epochs and fetching: 20,000 rows, then 200,000 (83 MB), in one warm process.

    Anonymous memory is the heap; pages of the map are the kernel's to take back. Arrow's own peak covers what it allocated
    and gave back on the way. Of 180,000 rows more, the order of an epoch may lie there: 8 bytes a row.
    """
    tables = [write_many(tmp_path / str(num_files), num_files) for num_files in (1, 10, 100)]
    code = [sys.executable, "-c", MEASURED, str(tmp_path / "cache"), *tables]
    done = subprocess.run(code, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _, small, large = map(json.loads, done.stdout.splitlines())
    assert (small["rows"], large["rows"]) == (20_000, 200_000)
    assert large["tokens"] > 0
    assert large["copies"] - small["copies"] > 60e6
    assert large["grown"] < small["grown"] + 5e6 < 10e6, done.stdout
    assert large["arrow"] < small["arrow"] + 1e6 < 10e6, done.stdout
