"""From chat messages, and completions written outside, to token ids.

In: messages or text. Out: ids.
Invariant: sampled text never comes here; its ids travel from the engine to the batch (`layout`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_ray.errors import ConfigError


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local directory or hub id.

    Raises:
        ConfigError: it has no chat template.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {path} has no chat template, so prompts cannot be rendered; use an instruction-tuned "
            "policy, or put the template it was tuned with beside its tokenizer as chat_template.jinja"
        )
    return tokenizer


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the ids of a prompt up to where the assistant's turn begins.

    Raises:
        ConfigError: the template starts the prompt with two BOS tokens.
        ValueError: the template refuses these messages, or they leave no tokens or a BOS token after the first.
    """
    try:
        # Tokenises without adding special tokens: the template has written all that belong to the prompt.
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=cast(list[dict | Callable] | None, tools),
            add_generation_prompt=True,
            return_dict=False,
            **(chat_template_kwargs or {}),
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from error
    ids = cast(list[int], rendered)
    if not ids:
        raise ValueError("the chat template renders these messages to no tokens")
    _check_bos(ids, tokenizer)
    return ids


def turn_end_id(tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None) -> int:
    """Return the token that ends an assistant's turn: what the template writes behind it, else the tokenizer's end token.

    The two differ where a base model's tokenizer got a chat template; an engine that samples meets the former.

    Raises:
        ConfigError: neither exists.
    """
    mark = "dpo-ray"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **(chat_template_kwargs or {})))
    behind = tokenizer.encode(text.rpartition(mark)[2].lstrip(), add_special_tokens=False)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    if behind and behind[0] in special:
        return behind[0]
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"neither the chat template nor the tokenizer {tokenizer.name_or_path} has a token that ends an assistant's "
            "turn; set its eos_token"
        )
    return cast(int, tokenizer.eos_token_id)


def tokenize_completion(tokenizer: PreTrainedTokenizerBase, text: str, end_id: int) -> list[int]:
    """Return the ids of a completion written outside, with one end token behind it.

    The prompt's ids stay as `render_prompt` gives them, so the boundary lies where sampling would begin.

    Raises:
        ValueError: the text itself contains the end token, or a BOS token.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if end_id in ids or (tokenizer.bos_token_id is not None and tokenizer.bos_token_id in ids):
        raise ValueError("the text contains a token that begins or ends a turn")
    return [*ids, end_id]


def _check_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    bos = tokenizer.bos_token_id
    if bos is None or bos not in ids[1:]:
        return
    if ids[:2] == [bos, bos]:
        raise ConfigError(
            f"the chat template starts the prompt with two BOS tokens ({tokenizer.bos_token}); remove one from it"
        )
    # Some tokenizers have one token for BOS and EOS; a template may well write that one between turns.
    if bos != tokenizer.eos_token_id:
        raise ValueError(f"BOS token {tokenizer.bos_token} at position {ids.index(bos, 1)}; expected at most one, in front")


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with: the padding token's, else the end token's.

    Which one does not matter to results: padding stands right of every token that counts, and is masked by position.

    Raises:
        ConfigError: the tokenizer has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return cast(int, token_id)
    raise ConfigError(f"tokenizer {tokenizer.name_or_path} has neither a padding nor an end token; set its pad_token")
