"""A small round as a command of its own, watched from outside by what it commits, and held against an undisturbed one.

Its engine is transformers in float32, which draws each sample from its own seed, and its workers compute in float32 on one
thread: the same rows, in parts or steps of whatever attempt, give the same bytes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dpo_ray import train_state
from dpo_ray.flow.artifact import Manifest

from ..runs.command import sampled_round, write_jsonl
from ..runs.conftest import ROOT, Cluster
from ..waiting import wait_until

PROMPTS, PART, NUM_COMPLETIONS = 64, 8, 2
BATCH, EPOCHS, CHECKPOINT_STEPS = 8, 40, 20
STAGES = ("generate", "score", "pair", "reference", "train")
SCORER = "def score(rows):\n    return [float(sum(map(ord, row['completion']))) for row in rows]\n"
LIMIT_S = 240.0
"""For any one stage, or for coming back from any one fault."""


def config(directory: Path, policy: str, *, workers: int | tuple[int, int] = 2, engines: int = 1) -> dict[str, Any]:
    """The round, with whatever it names in `directory`; half a minute on two cores, a third of it in training."""
    write_jsonl(directory / "prompts.jsonl", [{"prompt": f"w10 w{11 + i % 80} w{12 + i // 2}"} for i in range(PROMPTS + 16)])
    (directory / "scorers.py").write_text(SCORER)
    tree = sampled_round(directory, policy)
    tree |= {"name": "run", "prompts_per_round": PROMPTS}
    tree["prompts"]["eval_prompts"] = 8
    tree["generate"] |= {"num_completions": NUM_COMPLETIONS, "sampling": {"max_new_tokens": 32}}
    tree["generate"]["resources"] = {"rows_per_part": PART, "actors": engines, "parts_in_flight": 1, "cpus": 1}
    tree["score"]["resources"] |= {"rows_per_part": PART}
    tree["reference"] = {"resources": {"rows_per_part": PART, "cpus": 1}}
    tree["train"] |= {"epochs": EPOCHS, "global_batch_size": BATCH, "checkpoint_steps": CHECKPOINT_STEPS, "logging_steps": 2}
    tree["train"] |= {"resources": {"workers": list(workers) if isinstance(workers, tuple) else workers, "cpus": 1}}
    return tree


ONE_A_NODE = 1.5
"""CPUs of an engine or worker, of the two that a node has."""


def spread_out(directory: Path, policy: str, *, workers: int | tuple[int, int] = 2) -> dict[str, Any]:
    """The round with its two engines, and its workers, on different nodes."""
    tree = config(directory, policy, engines=2, workers=workers)
    tree["generate"]["resources"]["cpus"] = tree["train"]["resources"]["cpus"] = ONE_A_NODE
    return tree


class Running:
    """A command on a run, which goes on while the test looks at what it has committed."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path, log: Path) -> None:
        self.process, self.directory, self.log = process, directory, log

    def parts(self, stage: str) -> dict[str, str]:
        """Names of the parts that the stage has committed, with the record of each, which names the files of its attempt."""
        records = {record.stem: record.read_text() for record in (self.directory / stage / "_parts").glob("*.json")}
        return {name: text for name, text in records.items() if text.endswith("}")}  # the others are being written

    def steps(self) -> int:
        """Steps of training that are logged."""
        log = self.directory / "train/metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def stage(self) -> str:
        """The stage that runs, or will run first."""
        return next((stage for stage in STAGES if not self.committed(stage)), STAGES[-1])

    def saved(self) -> list[train_state.Record]:
        """Committed checkpoints, newest first."""
        attempts = sorted((self.directory / "train/state").glob("attempt-*"))
        return [record for a in attempts for _, record in train_state.committed(str(a)) if record]

    def trains(self) -> None:
        """Wait until it is half way from one checkpoint to another."""
        self.wait_for(lambda: len(self.saved()) >= 2 and self.steps() >= self.saved()[0].step + CHECKPOINT_STEPS // 2)

    def committed(self, stage: str) -> bool:
        return (self.directory / stage / "_manifest.json").exists()

    def wait_for(self, what: Callable[[], bool], timeout_s: float = LIMIT_S) -> float:
        """Wait while the command runs; the seconds that it took.

        Raises:
            AssertionError: the command ended first, or `timeout_s` did.
        """
        began = time.monotonic()

        def there() -> bool:
            if what():
                return True
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.tail()}"
            return False

        try:
            wait_until(there, timeout_s)
        except TimeoutError as error:
            raise AssertionError(f"{error}: {self.tail()}") from error
        return time.monotonic() - began

    def ends(self, timeout_s: float = LIMIT_S) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still runs after {timeout_s:g} s: {self.tail()}") from error

    def completes(self) -> None:
        assert self.ends() == 0, self.tail()

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


@contextmanager
def running(
    cluster: Cluster, directory: Path, tree: Mapping[str, Any], *, on: Sequence[str] = (), until: str = "train"
) -> Iterator[Running]:
    """`full_round.py` on the tree's run below `directory`/root, killed when the block is left."""
    file, log = directory / "run.yaml", directory / f"{len([*directory.glob('*.log')])}.log"
    file.write_text(yaml.safe_dump({**tree, "root": str(directory / "root")}))
    command = [*on, sys.executable, "pipelines/full_round.py", str(file), "--until", until]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=cluster.env, stdout=out, stderr=out, start_new_session=True)
        try:
            yield Running(process, directory / f"root/{tree['name']}/round_00", log)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def hashes(directory: Path) -> dict[str, str]:
    """Identity of what each stage has committed: of a table its bytes in order, of the policy its weights."""
    return {stage: manifest(directory, stage).output_hash for stage in STAGES}


def manifest(directory: Path, stage: str) -> Manifest:
    return Manifest.model_validate_json((directory / stage / "_manifest.json").read_bytes())


def assert_every_pair_was_seen_once_an_epoch(directory: Path, undisturbed: Path) -> None:
    """Also where the number of workers was another, which rounds sums in another order."""
    steps, wanted = ([json.loads(line) for line in (d / "train/metrics.jsonl").open()] for d in (directory, undisturbed))
    assert [s["step"] for s in steps] == list(range(1, len(wanted) + 1))
    assert [s["num_tokens"] for s in steps] == [s["num_tokens"] for s in wanted], "each step has the pairs that it should"
    assert manifest(directory, "train").rows_in == manifest(undisturbed, "train").rows_in
