"""Where a solve may start: the last solutions of a layer's samples, by the samples' own ids, or a
Solution."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from convlayer.conic.program import Program
from convlayer.solution import Solution

BYTES = 512_000_000  # kept at most; the samples that were not seen for longest go first


class Starts:
    """Points (x, s, y) of a cone program by sample id, on the host. Safe for several threads;
    neither copied nor pickled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: dict[Hashable, int] = {}  # in the order in which they were last seen
        self._bank: Tensor | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def clear(self) -> None:
        with self._lock:
            self._slots, self._bank = {}, None

    def get(
        self, ids: Sequence[Hashable], widths: tuple[int, int, int]
    ) -> tuple[Tensor, ...] | None:
        """x (B, n), s (B, m), y (B, m), NaN for samples that are new; None if all are."""
        with self._lock:
            if self._bank is None or self._bank.shape[1] != sum(widths):
                return None
            slots = torch.tensor([self._slots.get(key, -1) for key in ids])
            if not bool((slots >= 0).any()):
                return None
            found = self._bank.index_select(0, slots.clamp(min=0))
        found[slots < 0] = torch.nan
        return found.split(widths, 1)

    def put(
        self, ids: Sequence[Hashable], point: tuple[Tensor, Tensor, Tensor], good: Tensor
    ) -> None:
        """Keep the rows that are `good` (B,)."""
        rows = torch.cat([part.detach().cpu() for part in point], 1)
        with self._lock:
            if self._bank is None or self._bank.shape[1] != rows.shape[1]:
                self._slots, self._bank = {}, rows.new_empty(0, rows.shape[1])
            most = max(1, BYTES // max(1, 8 * rows.shape[1]))
            kept, slots = [], []
            for row in torch.nonzero(good).flatten().tolist():
                slot = self._slots.pop(ids[row], None)
                if slot is None:
                    slot = (
                        len(self._slots)
                        if len(self._slots) < most
                        else self._slots.pop(next(iter(self._slots)))
                    )
                self._slots[ids[row]] = slot
                kept.append(row)
                slots.append(slot)
            needed = max(slots, default=-1) + 1
            if needed > len(self._bank):
                grown = rows.new_empty(min(most, max(needed, 2 * len(self._bank))), rows.shape[1])
                grown[: len(self._bank)] = self._bank
                self._bank = grown
            self._bank[torch.tensor(slots, dtype=torch.int64)] = rows[
                torch.tensor(kept, dtype=torch.int64)
            ]

    def __copy__(self) -> Starts:
        return Starts()

    def __deepcopy__(self, memo: dict) -> Starts:
        return Starts()

    def __reduce__(self):
        return Starts, ()


def samples_of(
    ids: Tensor | Sequence[Hashable] | None, batch: tuple[int, ...]
) -> list[Hashable] | None:
    """One name for each row. ValueError: there are more or fewer."""
    if ids is None:
        return None
    keys = ids.flatten().tolist() if isinstance(ids, Tensor) else list(ids)
    if len(keys) != math.prod(batch):
        raise ValueError(
            f"`ids` names {len(keys)} samples; the batch {batch} has {math.prod(batch)}: one for each row."
        )
    return keys


def start_of(warm_start: Any, batch: tuple[int, ...], program: Program) -> tuple[Tensor, ...]:
    """The point of a Solution. TypeError, ValueError: it is none, or of another problem or
    batch."""
    if not isinstance(warm_start, Solution):
        raise TypeError(
            f"warm_start must be a Solution that this layer returned; got {type(warm_start).__name__}."
        )
    if tuple(warm_start.status.shape) != batch:
        raise ValueError(
            f"warm_start has batch shape {tuple(warm_start.status.shape)}; the parameters have {batch}."
        )
    if warm_start.iterate is None:
        raise ValueError(
            "warm_start comes from a specialised path, which has no iterate of the cone program to start from."
        )
    if (warm_start.iterate[0].shape[1], warm_start.iterate[2].shape[1]) != (program.n, program.m):
        raise ValueError(
            "warm_start is the solution of another problem; pass one that this layer returned."
        )
    return tuple(part.nan_to_num(0.0) for part in warm_start.iterate)
