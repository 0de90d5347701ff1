"""From a conversation to rows of token ids whose targets are what the assistant says.

In: chat messages. Out: rows of prompt and completion, with the positions of assistant tokens.
Invariant: every assistant turn stands behind exactly the tokens that a sampled one would: the chat template renders the
messages before it as a prompt. Turns share a row where the template continues the tokens of the turn before; where it
renders earlier turns in another way (without their reasoning, say), a turn has a row of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dpo_ray.learn.tokens import render_prompt, tokenize_completion


class Turns(NamedTuple):
    """A prompt, and the assistant turns behind it with what others say in between."""

    prompt: list[int]
    completion: list[int]
    assistant_positions: list[int]
    """In the completion; the token that ends a turn is among them."""


def turn_rows(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    end_id: int,
    *,
    tools: list[dict[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Turns]:
    """Tokenise every assistant turn.

    Args:
        end_id: the token that ends a turn, as `tokens.turn_end_id` finds it.

    Raises:
        ConfigError: the template starts the prompt with two BOS tokens.
        ValueError: the template refuses the messages before a turn, or a turn holds a token that begins or ends one.
    """
    rows: list[Turns] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:i], tools=tools, chat_template_kwargs=chat_template_kwargs)
        turn = tokenize_completion(tokenizer, message["content"], end_id)
        before = [*rows[-1].prompt, *rows[-1].completion] if rows else None
        if before is None or prompt[: len(before)] != before:
            rows.append(Turns(prompt, turn, list(range(len(turn)))))
            continue
        last = rows[-1]
        completion = [*last.completion, *prompt[len(before) :]]
        own = range(len(completion), len(completion) + len(turn))
        rows[-1] = Turns(last.prompt, [*completion, *turn], [*last.assistant_positions, *own])
    return rows
