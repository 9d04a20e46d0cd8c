"""In which steps of a run a guide takes a gradient, uses its last direction again, or rests."""

from __future__ import annotations

#: A guide that rests, takes a gradient, or pushes in the direction of the last one.
OFF, FRESH, KEPT = "off", "fresh", "kept"


def step_phases(start: float, stop: float, every: int, num_steps: int, first: int = 0) -> list[str]:
    """Phase of each step ``first .. num_steps - 1``.

    Args:
        start, stop: Fractions of the steps where the guide pushes: ``start <= step / num_steps < stop``.
        every: It takes a gradient in its first step, and in each whose number is a multiple.
        num_steps: Steps from pure noise.
        first: The step that the run starts at; later than 0 with an image that is noised part of the way.

    >>> step_phases(0.5, 1.0, 2, 8)
    ['off', 'off', 'off', 'off', 'fresh', 'kept', 'fresh', 'kept']
    """
    phases: list[str] = []
    for i in range(first, num_steps):
        if not start <= i / num_steps < stop:
            phases.append(OFF)
        else:
            phases.append(FRESH if i % every == 0 or FRESH not in phases else KEPT)
    return phases
