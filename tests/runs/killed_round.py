"""pipelines/full_round.py, with kills on the way: killed_round.py KILLS LOG arguments...

KILLS is a list `STAGE POINT SIGNAL VICTIM,...`; each is carried out once, and then a line of LOG (JSON).
STAGE is a key such as round_00/train. POINT is `start` (the stage is announced; another process than the driver gets the
signal as soon as it exists), `middle` (some rows of the stage are done, not all) or `commit` (its output is written, its
manifest is not). VICTIM is `driver` (this process; SIGINT goes to its whole process group, as from a terminal), or a part
of the title of a Ray worker process, e.g. EngineActor. Where there is no such process, nothing is killed or logged.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dpo_ray.flow import runner
from dpo_ray.flow.progress import Progress
from pipelines import full_round
from tests.processes import titled


class Kill(NamedTuple):
    stage: str
    point: str
    signal: str
    victim: str


# A shell without job control starts what it puts in the background with SIGINT ignored, and it stays so down to here.
signal.signal(signal.SIGINT, signal.default_int_handler)
WANTED = [Kill(*kill.split()) for kill in sys.argv[1].split(",") if kill.strip()]
LOG = Path(sys.argv[2])
sys.argv = [full_round.__file__, *sys.argv[3:]]
carrying_out = threading.Lock()


def reach(stage: str, point: str) -> None:
    """The run is at this point: carry out the kills that were asked for here."""
    for kill in [k for k in WANTED if (k.stage, k.point) == (stage, point)]:
        carry_out(kill)


def carry_out(kill: Kill) -> None:
    with carrying_out:
        pids = [os.getpid()] if kill.victim == "driver" else [process.pid for process in titled(kill.victim)]
        if kill not in WANTED or not pids:
            return
        WANTED.remove(kill)
        with LOG.open("a") as log:
            log.write(json.dumps([*kill]) + "\n")
    number = signal.Signals[kill.signal]
    if kill.victim == "driver" and number == signal.SIGINT:
        os.killpg(os.getpgrp(), number)
    else:
        os.kill(pids[0], number)


class Watch(threading.Thread):
    """Carries out a kill at the start of the running stage, once the process that it is for exists."""

    def __init__(self, kill: Kill) -> None:
        super().__init__(daemon=True)
        self.kill, self.over = kill, threading.Event()
        self.start()

    def run(self) -> None:
        while self.kill in WANTED and not self.over.wait(0.02):
            carry_out(self.kill)


started, updated, written = Progress.stage_started, Progress.update, runner.write_manifest
watches: list[Watch] = []


def stage_started(self, key):
    started(self, key)
    reach(key, "start")
    watches.extend(Watch(k) for k in WANTED if (k.stage, k.point) == (key, "start"))


def update(self, done, total, counters):
    updated(self, done, total, counters)
    if 0 < done < total:
        reach(self.key, "middle")


def write_manifest(directory, manifest):
    while watches:
        watches.pop().over.set()
    reach(manifest.stage if manifest.round is None else f"round_{manifest.round:02d}/{manifest.stage}", "commit")
    return written(directory, manifest)


Progress.stage_started, Progress.update, runner.write_manifest = stage_started, update, write_manifest
sys.exit(full_round.main())
