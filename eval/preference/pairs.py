"""Which pairs a rater is shown, in which order, and which image lies on the left.

All of it is a function of the study's seed and the rater's name: nothing has to be kept, and a rater who comes back,
on another machine or after a restart, finds the queue as it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from guidance.utils.errors import UserError

Kind = Literal["pair", "repeat", "check"]

_GAP = 5  # trials between a pair and its repeat, at least


@dataclasses.dataclass(frozen=True)
class Item:
    """A pair of images of one prompt and one noise.

    Attributes:
        prompt_id, prompt, category, seed: As in a record.
        first, second: Arms; the second is the one that is hoped to be better (guided, or of the higher scale).
    """

    prompt_id: str
    prompt: str
    category: str
    seed: int
    first: str
    second: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """How queues are made.

    Attributes:
        seed: Of everything that is drawn.
        per_rater: Pairs a rater is asked; None: all.
        shared: Share of them that every rater is asked, so that raters can be compared.
        repeats: Pairs asked again, per pair; they show how well a rater agrees with himself.
        checks: Attention checks, per pair: an image beside a damaged copy of it.
    """

    seed: int = 0
    per_rater: int | None = 100
    shared: float = 0.2
    repeats: float = 0.05
    checks: float = 0.05

    def __post_init__(self) -> None:
        for name in ("shared", "repeats", "checks"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"Expected {name} as a share in 0..1, got {getattr(self, name)}.")
        if self.per_rater is not None and self.per_rater < 1:
            raise UserError(f"Expected per_rater of at least 1, got {self.per_rater}; null asks every pair.")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One question of a rater's queue.

    Attributes:
        index: Place in the queue.
        kind: "check": the item's first image beside a damaged copy.
        item: Index of the item.
        swapped: Whether the second arm's image (or the damaged copy) lies on the left.
    """

    index: int
    kind: Kind
    item: int
    swapped: bool


def ask_pairs(arms: Sequence[str], compare: str) -> list[tuple[str, str]]:
    """List the pairs of arms that are compared.

    Args:
        arms: The baseline first, the others by scale; for "adjacent" all of them by scale.
        compare: "baseline" (each with the first), "adjacent" (each with the next), "all".

    >>> ask_pairs(["a", "b", "c"], "adjacent")
    [('a', 'b'), ('b', 'c')]
    """
    if len(arms) < 2:
        got = f"'{arms[0]}' alone" if arms else "none"
        raise UserError(
            f"Expected two or more arms to compare, got {got}; sample a guided arm, or name two folders."
        )
    if compare == "baseline":
        return [(arms[0], arm) for arm in arms[1:]]
    if compare == "adjacent":
        return list(itertools.pairwise(arms))
    return [(a, b) for i, a in enumerate(arms) for b in arms[i + 1 :]]


def queue(n_items: int, plan: Plan, rater: str) -> list[Trial]:
    """Make the queue of a rater.

    Sides are drawn at random, half of the pairs each way; a repeat's and a check's side is drawn for itself.
    """
    digest = hashlib.sha256(f"{plan.seed}\0{rater}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    n = min(plan.per_rater or n_items, n_items)
    everybody = np.random.default_rng(plan.seed).permutation(n_items)
    n_shared = round(plan.shared * n)
    own = rng.permutation(everybody[n_shared:])[: n - n_shared]
    chosen = rng.permutation(np.concatenate([everybody[:n_shared], own]))
    swapped = rng.permutation(np.arange(n) % 2 == rng.integers(2))
    placed: list[tuple[float, Kind, int, bool]] = [
        (float(i), "pair", int(item), bool(side))
        for i, (item, side) in enumerate(zip(chosen, swapped, strict=True))
    ]
    for i in rng.permutation(max(0, n - _GAP))[: round(plan.repeats * n)]:
        place = float(rng.uniform(i + _GAP, n))
        placed.append((place, "repeat", int(chosen[i]), bool(rng.integers(2))))
    for item in rng.permutation(n_items)[: round(plan.checks * n)]:
        placed.append((float(rng.uniform(0, n)), "check", int(item), bool(rng.integers(2))))
    ordered = sorted(placed, key=lambda entry: entry[0])
    return [Trial(index, kind, item, side) for index, (_, kind, item, side) in enumerate(ordered)]
