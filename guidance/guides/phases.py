"""Schedule of a guide: the steps in which it takes a gradient, reuses its last direction, or is off."""

from __future__ import annotations

#: A guide that is off, takes a gradient, or reuses the direction of the last one.
OFF, FRESH, KEPT = "off", "fresh", "kept"


def step_phases(start: float, stop: float, every: int, num_steps: int, first: int = 0) -> list[str]:
    """Return the phase of each step ``first .. num_steps - 1``.

    Args:
        start, stop: Fractions of the steps where the guide is active: ``start <= step / num_steps < stop``.
        every: The guide takes a gradient in its first step and in each step whose number is a multiple of this.
        num_steps: Steps from pure noise.
        first: First step of the run; above 0 if it starts from an image that is noised part of the way.

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
