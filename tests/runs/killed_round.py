"""pipelines/full_round.py, killed once at a chosen point: killed_round.py STAGE POINT SIGNAL VICTIM arguments...

STAGE is a key such as round_00/train. POINT is `start` (the stage is announced), `middle` (some of its rows are done, not
all) or `commit` (its output is written, its manifest is not). VICTIM is `driver` (this process; SIGINT goes to its whole
process group, as from a terminal), or a part of the title of a Ray worker process, e.g. EngineActor.
"""

import os
import signal
import sys
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dpo_ray.flow import runner
from dpo_ray.flow.progress import Progress
from pipelines import full_round

STAGE, POINT, SIGNAL, VICTIM = sys.argv[1:5]
sys.argv = [full_round.__file__, *sys.argv[5:]]
killed = False


def kill() -> None:
    """Send the signal, once."""
    global killed
    if killed:
        return
    number = signal.Signals[SIGNAL]
    if VICTIM == "driver":
        killed = True
        os.killpg(os.getpgrp(), number) if number == signal.SIGINT else os.kill(os.getpid(), number)
        return
    victims = [p for p in psutil.Process().children(recursive=True) if VICTIM in " ".join(p.cmdline())]
    if victims:
        killed = True
        victims[0].send_signal(number)


started, updated, written = Progress.stage_started, Progress.update, runner.write_manifest


def stage_started(self, key):
    started(self, key)
    if (key, POINT) == (STAGE, "start"):
        kill()


def update(self, done, total, counters):
    updated(self, done, total, counters)
    at_start = POINT == "start" and VICTIM != "driver"  # the victim itself starts after the stage
    if self.key == STAGE and (at_start or (POINT == "middle" and 0 < done < total)):
        kill()


def write_manifest(directory, manifest):
    key = manifest.stage if manifest.round is None else f"round_{manifest.round:02d}/{manifest.stage}"
    if (key, POINT) == (STAGE, "commit"):
        kill()
    return written(directory, manifest)


Progress.stage_started, Progress.update, runner.write_manifest = stage_started, update, write_manifest
status = full_round.main()
if not killed:
    sys.exit(f"no {VICTIM} was there to kill in {STAGE} at {POINT}")
sys.exit(status)
