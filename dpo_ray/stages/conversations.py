"""Read the source of chats once into CONVERSATIONS: train rows in a fixed permutation, eval rows held out.

Files `train-*` and `eval-*`. Unusable rows and duplicates lie in quarantine/ with their reasons.
"""

from __future__ import annotations

import functools

from dpo_ray.config import SftRun
from dpo_ray.conversations import read_conversations, source_fingerprint
from dpo_ray.flow.artifact import Artifact
from dpo_ray.flow.part_commits import Part
from dpo_ray.flow.parts import split_into_parts
from dpo_ray.flow.stage import Needs, Stage
from dpo_ray.intake_files import take_in_files

VERSION = 1
ROWS_PER_FILE = 4096
# What is decided later, by the tokenisation, or is only a limit.
LATER = {"resources", "max_dropped", "max_tokens", "chat_template_kwargs"}


def stage(config: SftRun) -> Stage:
    block = config.conversations
    return Stage(
        name="conversations",
        round=None,
        version=VERSION,
        config={"seed": config.seed, **block.model_dump(mode="json", exclude=LATER)},
        inputs={},
        external=lambda: source_fingerprint(block),
        needs=Needs(1, block.resources.cpus, 0.0, "reader", node_labels=block.resources.node_labels),
        resources=block.resources.model_dump(mode="json"),
        run=lambda context: take_in_files(
            functools.partial(read_conversations, block, config.seed),
            context.directory,
            rows_per_file=ROWS_PER_FILE,
            resources=block.resources,
        ),
    )


def parts(conversations: Artifact, config: SftRun, *, held_out: bool) -> list[Part]:
    """The parts of the conversations to train on, or of those that are held out."""
    prefix = "eval-" if held_out else "train-"
    return split_into_parts(conversations, config.conversations.resources.rows_per_part, prefix=prefix)
