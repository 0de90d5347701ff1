"""Where a run's data comes from: prompts to sample on, or preferences that exist already; and what is held out."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from dpo_ray.config.block import Block
from dpo_ray.config.resources import DataResources

DATASETS = "datasets:"
SplitBy = Literal["conversation", "prompt"]


class Source(Block):
    """Files, or a data set of the `datasets` library."""

    block: ClassVar[str] = "source"
    """Name of the block in the configuration, for messages."""

    source: str
    """A .jsonl, .parquet or .csv file or glob (also .gz but for parquet), or `datasets:<hub id or path>`."""
    subset: str | None = None
    """Configuration name of a `datasets:` source."""
    data_dir: str | None = None
    """Directory inside a `datasets:` source that holds the data, e.g. harmless-base."""
    source_split: str = "train"
    """Split of a `datasets:` source."""
    revision: str | None = None
    """Commit or tag of a `datasets:` hub source."""

    @model_validator(mode="after")
    def options_of_a_data_set_need_one(self) -> Source:
        ignored = self.changed("subset", "data_dir", "source_split", "revision")
        if ignored and not self.source.startswith(DATASETS):
            raise ValueError(
                f"{', '.join(ignored)} would be ignored: source {self.source!r} is no `{DATASETS}` source; take them out, "
                "or name the data set"
            )
        return self


class Prompts(Source):
    """Where prompts come from, and which of them are held out."""

    block: ClassVar[str] = "prompts"
    source: str
    """A .jsonl, .parquet or .csv file or glob (also .gz but for parquet), `datasets:<hub id or path>`, or `quickstart`."""
    prompt_column: str = "prompt"
    """Column with the prompt: chat messages (list of {role, content}) or plain text (one user turn)."""
    system_prompt: str | None = None
    """Put before every prompt that does not start with a system turn."""
    tools_column: str | None = None
    """Column with tool definitions for the chat template (a list, or its JSON)."""
    meta_columns: tuple[str, ...] | None = None
    """Columns kept in `meta` for the scorer; None keeps every other column."""
    num_prompts: int | None = Field(default=None, ge=1)
    """Read at most this many rows of the source."""
    eval_prompts: int = Field(default=256, ge=1)
    """Prompts held out for evaluation: about this many, chosen by hash, the same in every round."""
    split_by: SplitBy = "conversation"
    """What the hash of the split is taken of: system prompt and first user turn, or the whole prompt."""
    max_dropped: float = Field(default=0.05, ge=0, le=1)
    """The stage fails when more than this share of the source's rows is unusable. Duplicates do not count."""
    resources: DataResources = DataResources(rows_per_part=4096)


class PreferenceSource(Source):
    """What both formats of preferences share."""

    block: ClassVar[str] = "preferences"
    system_prompt: str | None = None
    """Put before every prompt that does not start with a system turn."""
    label_source: str = "human"
    """Who preferred; recorded with every pair."""
    num_pairs: int | None = Field(default=None, ge=1)
    """Read at most this many rows of the source."""
    eval_pairs: int = Field(default=256, ge=1)
    """Pairs held out for evaluation: about this many, chosen by hash, the same in every round."""
    split_by: SplitBy = "conversation"
    """What the hash of the split is taken of: system prompt and first user turn, or the whole prompt."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """A pair with a longer prompt is quarantined; a prompt is never cut."""
    max_tokens: int = Field(default=2048, ge=2)
    """Limit of prompt and completion together."""
    too_long: Literal["drop", "cut"] = "drop"
    """A pair with a longer completion is quarantined; or its completion is cut, and then has no end token."""
    chat_template_kwargs: dict[str, object] = Field(default_factory=dict)
    """Passed to the chat template, e.g. {enable_thinking: false}."""
    max_dropped: float = Field(default=0.05, ge=0, le=1)
    """A stage fails when more than this share of its rows is unusable. Duplicates in the source do not count."""
    resources: DataResources = DataResources(rows_per_part=256)


class ExplicitPreferences(PreferenceSource):
    """Columns with prompt, chosen and rejected: TRL's standard and conversational formats with an explicit prompt."""

    kind: Literal["explicit"]
    prompt_column: str = "prompt"
    """Column with the prompt: chat messages (list of {role, content}) or plain text (one user turn)."""
    chosen_column: str = "chosen"
    """Column with the preferred completion: text, one assistant message, or the prompt's messages and then that one."""
    rejected_column: str = "rejected"
    """Column with the other completion."""
    tools_column: str | None = None
    """Column with tool definitions for the chat template (a list, or its JSON)."""


class TranscriptPreferences(PreferenceSource):
    """Anthropic's HH-RLHF: `chosen` and `rejected` are whole transcripts that differ in their last assistant turn."""

    kind: Literal["hh_rlhf"]


Preferences = Annotated[ExplicitPreferences | TranscriptPreferences, Field(discriminator="kind")]


class Conversations(Source):
    """Chats whose assistant turns are what the policy learns to say."""

    block: ClassVar[str] = "conversations"
    source: str
    """A .jsonl, .parquet or .csv file or glob (also .gz but for parquet), `datasets:<hub id or path>`, or `quickstart`."""
    messages_column: str = "messages"
    """Column with the chat: a list of {role, content} that ends with an assistant's turn, or its JSON."""
    system_prompt: str | None = None
    """Put before every chat that does not start with a system turn."""
    tools_column: str | None = None
    """Column with tool definitions for the chat template (a list, or its JSON)."""
    num_conversations: int | None = Field(default=None, ge=1)
    """Read at most this many rows of the source."""
    eval_conversations: int = Field(default=256, ge=1)
    """Conversations held out for evaluation: about this many, chosen by hash."""
    split_by: SplitBy = "conversation"
    """What the hash of the split is taken of: system prompt and first user turn, or the whole conversation."""
    max_tokens: int = Field(default=2048, ge=2)
    """A conversation with more tokens is quarantined, never cut."""
    chat_template_kwargs: dict[str, object] = Field(default_factory=dict)
    """Passed to the chat template, e.g. {enable_thinking: false}."""
    max_dropped: float = Field(default=0.05, ge=0, le=1)
    """A stage fails when more than this share of its rows is unusable. Duplicates in the source do not count."""
    resources: DataResources = DataResources(rows_per_part=256)
