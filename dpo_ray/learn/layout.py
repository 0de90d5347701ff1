"""How completions and their prompts lie in a batch: each prompt once, or each completion in a row of its own.

In: prompts with one or more completions each, as token ids. Out: a `Batch`, on the CPU.
Invariants: ids are placed exactly as given; a token sees its own prompt and the tokens of its own completion before it,
nothing else; its position is that of prompt + completion alone.

`share` packs everything into one row without padding: [prompt | completion | completion | prompt | ...]. Positions start
again after the prompt, and `attention` (see `attention.py`) keeps completions blind to each other. `separate` is for
architectures in which that is not exact: prompt and completion in a row, padded on the right.

Shapes: S rows, T tokens of a row, C completions, K completion tokens of the batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

TokenIds = Sequence[int] | np.ndarray


class Group(NamedTuple):
    """A prompt and its completions, such as chosen and rejected."""

    prompt: TokenIds
    completions: Sequence[TokenIds]


class Batch(NamedTuple):
    """Token ids for one forward, and which of its positions predict which tokens."""

    input_ids_ST: torch.Tensor
    """int64."""
    position_ids_ST: torch.Tensor | None
    """int64; None where they count from 0 in each row."""
    attention: torch.Tensor | None
    """(1, 1, C, 4) int64, one line a completion: start of its prompt, length of the prompt, start, length. None where a
    row is one sequence."""
    kept: torch.Tensor
    """(K,) int64, into the flattened rows: the position before each target, completion after completion."""
    targets: torch.Tensor
    """(K,) int64, the completion tokens, or those of them that `keep` chose."""
    lengths: torch.Tensor
    """(C,) int64, completion tokens of each completion that are in `targets`; they sum to K."""

    def to(self, device: torch.device | str) -> "Batch":
        """Move every tensor; the host keeps the numbers of `attention`, which `lines` gives without waiting for the device.

        It moves too, since the root of an FSDP model would else move it, and hand on a tensor that `lines` does not know.
        """
        moved = {f: v.to(device, non_blocking=True) for f, v in self._asdict().items() if v is not None}
        if self.attention is not None:
            _lines_of[moved["attention"]] = lines(self.attention)
        return self._replace(**moved)


_lines_of = WeakIdKeyDictionary()


def lines(attention: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    """Return a batch's `attention` as numbers of the host; one that `Batch.to` has moved is not read back."""
    if attention not in _lines_of:
        _lines_of[attention] = tuple(map(tuple, attention[0, 0].tolist()))
    return _lines_of[attention]


def share(groups: Sequence[Group]) -> Batch:
    """Pack groups into one row, each prompt once.

    Raises:
        ValueError: an empty prompt or completion; the first completion token is predicted from the prompt's last.
    """
    ids, positions, kept, targets, lines = [], [], [], [], []
    at = 0
    for group in groups:
        prompt, completions = _arrays(group)
        start, size = at, len(prompt)
        ids.append(prompt)
        positions.append(np.arange(size))
        at += size
        for completion in completions:
            n = len(completion)
            ids.append(completion)
            positions.append(np.arange(size, size + n))
            kept += [np.array([start + size - 1]), np.arange(at, at + n - 1)]
            targets.append(completion)
            lines.append((start, size, at, n))
            at += n
    attention = np.array(lines, np.int64).reshape(1, 1, -1, 4)
    return Batch(
        _row(ids),
        _row(positions),
        torch.from_numpy(attention),
        _flat(kept),
        _flat(targets),
        _lengths(line[3] for line in lines),
    )


def separate(groups: Sequence[Group], pad_token_id: int) -> Batch:
    """Give each completion a row of its own behind its prompt, padded on the right.

    Raises:
        ValueError: an empty prompt or completion.
    """
    rows = [(prompt, c) for prompt, completions in map(_arrays, groups) for c in completions]
    width = max((len(prompt) + len(c) for prompt, c in rows), default=0)
    input_ids = np.full((len(rows), width), pad_token_id, np.int64)
    kept = []
    for row, (prompt, completion) in enumerate(rows):
        size = len(prompt)
        input_ids[row, :size] = prompt
        input_ids[row, size : size + len(completion)] = completion
        kept.append(row * width + size - 1 + np.arange(len(completion)))
    targets = [completion for _, completion in rows]
    return Batch(torch.from_numpy(input_ids), None, None, _flat(kept), _flat(targets), _lengths(map(len, targets)))


def keep(batch: Batch, positions: Sequence[TokenIds]) -> Batch:
    """Take as targets only some positions of each completion, counted from its start; what stands in the rows stays.

    Raises:
        ValueError: a completion without any, or a position outside of it.
    """
    lengths = batch.lengths.tolist()
    chosen = [np.asarray(own, np.int64) for own in positions]
    for own, length in zip(chosen, lengths, strict=True):
        if not len(own) or own.min() < 0 or own.max() >= length:
            raise ValueError(f"positions {own.tolist()} of a completion of {length} tokens; expected at least one, all inside")
    starts = np.cumsum([0, *lengths[:-1]])
    taken = _flat([start + own for start, own in zip(starts, chosen, strict=True)])
    return batch._replace(kept=batch.kept[taken], targets=batch.targets[taken], lengths=_lengths(map(len, chosen)))


def _arrays(group: Group) -> tuple[np.ndarray, list[np.ndarray]]:
    prompt, *completions = (np.asarray(ids, np.int64) for ids in (group.prompt, *group.completions))
    if not len(prompt) or not all(map(len, completions)):
        sizes = ", ".join(str(len(c)) for c in completions)
        raise ValueError(f"a prompt of {len(prompt)} tokens with completions of {sizes}; each needs at least 1")
    return prompt, completions


def _flat(pieces: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *pieces]))


def _row(pieces: list[np.ndarray]) -> torch.Tensor:
    return _flat(pieces)[None]


def _lengths(lengths) -> torch.Tensor:
    return torch.tensor(list(lengths), dtype=torch.int64)
