"""Pairs of images and the queues of raters: which pairs, in which order, with which image on the left.

A queue is a function of the study's seed and the rater's name: nothing is stored, and a rater who returns, on another
machine or after a restart, finds the same queue.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from eval.preference.config import Plan
from guidance.utils.errors import UserError

Kind = Literal["pair", "repeat", "check"]

Key = tuple[str, str, int]  # arm, prompt id, seed of an image

_GAP = 5  # trials between a pair and its repeat, at least


@dataclasses.dataclass(frozen=True)
class Item:
    """A pair of images of one prompt and one noise.

    Attributes:
        prompt_id, prompt, category, seed: As in a record.
        first, second: Arms; the second is the one expected to be better (guided, or of the higher scale).
    """

    prompt_id: str
    prompt: str
    category: str
    seed: int
    first: str
    second: str

    @property
    def keys(self) -> tuple[Key, Key]:
        """Keys of the first and the second arm's image."""
        return (self.first, self.prompt_id, self.seed), (self.second, self.prompt_id, self.seed)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A position in a rater's queue.

    Attributes:
        index: Position.
        kind: "pair", its "repeat", or "check": the item's first image beside a damaged copy of it.
        item: Index of the item.
        swapped: Whether the second arm's image (or the damaged copy) is on the left.
    """

    index: int
    kind: Kind
    item: int
    swapped: bool


def ask_pairs(arms: Sequence[str], compare: str) -> list[tuple[str, str]]:
    """List the pairs of arms to compare.

    Args:
        arms: The baseline first, the others by scale; for "adjacent" all of them by scale.
        compare: "baseline" (each with the first), "adjacent" (each with the next), "all".

    >>> ask_pairs(["a", "b", "c"], "adjacent")
    [('a', 'b'), ('b', 'c')]
    """
    if len(arms) < 2:
        got = f"'{arms[0]}' alone" if arms else "none"
        raise UserError(f"Expected two or more arms to compare, got {got}; sample a guided arm, or name two folders.")
    if compare == "baseline":
        return [(arms[0], arm) for arm in arms[1:]]
    return list(itertools.pairwise(arms) if compare == "adjacent" else itertools.combinations(arms, 2))


def queue(n_items: int, plan: Plan, rater: str) -> list[Trial]:
    """Make the queue of a rater.

    Half of the pairs are swapped, at random; the side of a repeat and of a check is drawn independently.
    """
    digest = hashlib.sha256(f"{plan.seed}\0{rater}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    n = min(plan.per_rater or n_items, n_items)
    order = np.random.default_rng(plan.seed).permutation(n_items)
    n_shared = round(plan.shared * n)
    individual = rng.permutation(order[n_shared:])[: n - n_shared]
    chosen = rng.permutation(np.concatenate([order[:n_shared], individual]))
    swapped = rng.permutation(np.arange(n) % 2 == rng.integers(2))
    placed: list[tuple[float, Kind, int, bool]] = [
        (float(i), "pair", int(item), bool(side)) for i, (item, side) in enumerate(zip(chosen, swapped, strict=True))
    ]
    for i in rng.permutation(max(0, n - _GAP))[: round(plan.repeats * n)]:
        place = float(rng.uniform(i + _GAP, n))
        placed.append((place, "repeat", int(chosen[i]), bool(rng.integers(2))))
    for item in rng.permutation(n_items)[: round(plan.checks * n)]:
        placed.append((float(rng.uniform(0, n)), "check", int(item), bool(rng.integers(2))))
    ordered = sorted(placed, key=lambda entry: entry[0])
    return [Trial(index, kind, item, side) for index, (_, kind, item, side) in enumerate(ordered)]
