"""Units of a sweep: claimed, sampled, recorded, by any number of processes that share a folder."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from guidance.claims import Claims
from guidance.errors import UserError
from guidance.memory import is_out_of_memory
from guidance.records import Record
from guidance.units import Unit, UnitSampler, list_batches

_POLL = 0.3  # seconds between looks at units that others work on

Made = list[tuple[Record, Any]]


class Divider:
    """Samples units, in parts where memory does not suffice for a whole one.

    Args:
        sampler: Samples a part.
        size: Images at once.
        halve: Halve the size when memory is out; else that is an error.
        say: Is told of a new size: by text for the user, and the size.

    Attributes:
        size: Images at once, now.
    """

    def __init__(
        self, sampler: UnitSampler, size: int, *, halve: bool, say: Callable[[str, int], None]
    ) -> None:
        self.sampler, self.size, self._halve, self._say = sampler, size, halve, say

    def images(self, unit: Unit) -> Made:
        """Sample a unit; nothing is written.

        Raises:
            UserError: If memory does not suffice, and the size is fixed or one image.
        """
        while (made := self._try(unit)) is None:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            tried = min(self.size, len(unit))
            if not self._halve or tried == 1:
                hint = "set batch_size=auto or a smaller one" if tried > 1 else "take a half-precision dtype"
                raise UserError(
                    f"Expected memory for a batch of {tried} in '{unit[0].arm.name}', but it is out; {hint}."
                )
            self.size = tried // 2
            self._say(f"Out of memory with {tried} images at once: going on with {self.size}.", self.size)
        return made

    def _try(self, unit: Unit) -> Made | None:
        """The images, or None if memory is out; no reference to the failed attempt stays."""
        try:
            return [made for part in list_batches(unit, self.size) for made in self.sampler.images(part)]
        except (RuntimeError, MemoryError, UserError) as error:  # a guided step says what to turn
            if not is_out_of_memory(error):
                raise
        return None


def fill_units(
    units: Sequence[Unit], divider: Divider, claims: Claims, *, progress: Callable[[], None] = lambda: None
) -> int:
    """Sample what is missing of units, together with all other processes that do; returns when all units are done.

    Args:
        units: In the order in which to take them.
        divider: Samples them into a :class:`guidance.records.RecordStore`.
        claims: Of this process.
        progress: Called after each unit and while others are waited for.

    Returns:
        The number of images that this process has made.

    Raises:
        UserError: If an image that is there was made in another way, or memory does not suffice.
    """
    sampler, made = divider.sampler, 0
    left = [unit for unit in units if sampler.missing(unit)]  # looks at all before any work
    while left:
        waiting, before = [], made
        for unit in left:
            if not sampler.missing(unit):
                continue
            name = unit_name(unit)
            if not claims.take(name):
                waiting.append(unit)
                continue
            try:
                found = _sample_claimed(unit, divider, claims, name)
                made += found or 0
                waiting += [unit] if found is None else []
            finally:
                claims.release(name)
            progress()
        left = waiting
        if left and made == before:
            time.sleep(_POLL)
            sampler.store.refresh()
            progress()
    return made


def _sample_claimed(unit: Unit, divider: Divider, claims: Claims, name: str) -> int | None:
    """Sample and record what is missing of a unit; None if the claim was lost in the meantime."""
    sampler = divider.sampler
    sampler.store.refresh()  # another may have done it just before it was claimed
    missing = sampler.missing(unit)
    if not missing:
        return 0
    images = divider.images(unit)
    if not claims.holds(name):
        return None
    sampler.write(images, missing)
    return len(missing)


def unit_name(unit: Unit) -> str:
    """What the claim of a unit is called: the same for all processes of a sweep."""
    keys = [" ".join(map(str, task.key)) for task in unit]
    return "unit-" + hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]


def image_keys(units: Sequence[Unit]) -> list[tuple[str, str, int]]:
    """The keys of the records of units."""
    return [task.key for unit in units for task in unit]
