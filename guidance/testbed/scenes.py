"""Define the testbed world: scenes, their captions and their splits.

A scene is drawn from a seed.  Its *caption* names object, colour, terrain, time of day and sometimes place
and a second object; its *hidden* factors (haze, defocus, exposure, saturation, tilt) are in no caption, as in
real photographs, so that images of one caption differ widely in quality.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from guidance.utils.errors import UserError, nearest

TIMES = ("dawn", "noon", "dusk", "night")

TERRAINS = ("hills", "sea", "desert", "snow", "mountains")

OBJECTS = ("house", "tree", "boat", "balloon", "tent", "tower", "kite", "car")

COLOURS = ("red", "yellow", "green", "blue", "purple", "white")

PLACES = ("", "left", "right")

FLYING = ("balloon", "kite")

SPLITS = ("train", "validation", "test")

#: Captioned attributes and their classes: the judge classifier's heads and the class-head targets.
ATTRIBUTES: dict[str, tuple[str, ...]] = {"object": OBJECTS, "colour": COLOURS, "time": TIMES, "terrain": TERRAINS}

#: Hidden factors as (low, high): haze 0..1 opacity at the horizon, defocus in pixels (Gaussian sigma),
#: exposure in stops (EV), saturation as a factor on chroma, tilt in degrees.
HIDDEN: dict[str, tuple[float, float]] = {
    "haze": (0.0, 0.65),
    "defocus": (0.0, 1.3),
    "exposure": (-0.7, 0.55),
    "saturation": (0.4, 1.25),
    "tilt": (-7.0, 7.0),
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """One scene of the world.

    Attributes:
        seed: Seed of everything that is not in the caption: layout, sizes and, unless overridden, hidden factors.
        time, terrain, object, colour: The captioned attributes, see :data:`ATTRIBUTES`.
        place: "" (anywhere), "left" or "right".
        second_object, second_colour: A smaller second object, or "" for none.
        haze, defocus, exposure, saturation, tilt: The hidden factors, see :data:`HIDDEN` for units and
            ranges.
    """

    seed: int
    time: str
    terrain: str
    object: str
    colour: str
    place: str = ""
    second_object: str = ""
    second_colour: str = ""
    haze: float = 0.0
    defocus: float = 0.0
    exposure: float = 0.0
    saturation: float = 1.0
    tilt: float = 0.0

    @property
    def caption(self) -> str:
        """The caption, for example ``a red balloon over the sea at dusk``."""
        words = f"a {self.colour} {self.object}"
        if self.second_object:
            words += f" and a {self.second_colour} {self.second_object}"
        if self.place:
            words += f" on the {self.place}"
        return f"{words} {_preposition(self.object, self.terrain)} the {self.terrain} at {self.time}"

    @property
    def split(self) -> str:
        """The split of the scene, determined by its combination of the four attributes, never by its seed."""
        return combination_split(self.time, self.terrain, self.object, self.colour)


def _preposition(obj: str, terrain: str) -> str:
    if obj in FLYING:
        return "over"
    if terrain == "sea":
        return "on" if obj == "boat" else "by"
    return "in"


_CAPTION = re.compile(
    rf"a (?P<colour>{'|'.join(COLOURS)}) (?P<object>{'|'.join(OBJECTS)})"
    rf"(?: and a (?P<second_colour>{'|'.join(COLOURS)}) (?P<second_object>{'|'.join(OBJECTS)}))?"
    r"(?: on the (?P<place>left|right))? (?P<preposition>in|on|by|over)"
    rf" the (?P<terrain>{'|'.join(TERRAINS)}) at (?P<time>{'|'.join(TIMES)})"
)


def parse_caption(caption: str) -> dict[str, str]:
    """Parse the attributes of a caption: the inverse of :attr:`Scene.caption`.

    Args:
        caption: A caption of the world's grammar; letter case and spare spaces do not matter.

    Returns:
        ``object`` (the one named first), ``colour``, ``time``, ``terrain``, and ``place``, ``second_object``,
        ``second_colour``, which are "" where the caption does not name them.

    Raises:
        UserError: If the caption is not of the grammar.

    >>> parse_caption("a red balloon over the sea at dusk")["terrain"]
    'sea'
    """
    found = _CAPTION.fullmatch(" ".join(str(caption).lower().split()))
    if found:
        attributes = {name: value or "" for name, value in found.groupdict().items()}
        if attributes.pop("preposition") == _preposition(attributes["object"], attributes["terrain"]):
            return attributes
    raise UserError(
        "Expected a caption of the testbed's world such as 'a red balloon over the sea at dusk', got "
        f"{caption!r}; write 'a COLOUR OBJECT in the TERRAIN at TIME' with its words: "
        f"{', '.join((*COLOURS, *OBJECTS, *TERRAINS, *TIMES))}."
    )


def combination_split(time: str, terrain: str, obj: str, colour: str) -> str:
    """Return the split of a combination: 80% train, 8% validation, 12% test, by a fixed hash.

    Whole combinations are held out, so a test caption was never seen in training with any seed.
    """
    digest = hashlib.sha256(f"{time}/{terrain}/{obj}/{colour}".encode()).digest()
    u = int.from_bytes(digest[:4], "big") / 2**32
    return "train" if u < 0.80 else "validation" if u < 0.88 else "test"


@functools.cache
def combinations(split: str) -> tuple[tuple[str, str, str, str], ...]:
    """List the (time, terrain, object, colour) combinations of a split."""
    if split not in SPLITS:
        raise UserError(f"Expected the name of a split, got {split!r}.{nearest(str(split), SPLITS)}")
    return tuple(
        (t, g, o, c)
        for t in TIMES
        for g in TERRAINS
        for o in OBJECTS
        for c in COLOURS
        if combination_split(t, g, o, c) == split
    )


def sample_scene(split: str, index: int, seed: int = 0) -> Scene:
    """Draw scene ``index`` of a split; the same arguments always give the same scene.

    Hidden factors are independent of the caption and drawn from the ranges of :data:`HIDDEN`; haze and
    defocus lean to small values (a square law), the others are uniform.
    """
    choices = combinations(split)
    salt = SPLITS.index(split)
    rng = np.random.default_rng([seed, salt, index])
    time, terrain, obj, colour = choices[rng.integers(len(choices))]
    place = PLACES[rng.integers(3)] if rng.random() < 0.5 else ""
    second = second_colour = ""
    if rng.random() < 0.15:
        second = str(rng.choice([o for o in OBJECTS if o != obj]))
        second_colour = str(rng.choice(COLOURS))
    # scene seeds of different splits never collide: the split is part of the seed itself
    scene_seed = (seed * 10_000_019 + index) * 3 + salt
    return Scene(scene_seed, time, terrain, obj, colour, place, second, second_colour, **_hidden(rng))


def _hidden(rng: np.random.Generator) -> dict[str, float]:
    u = {name: rng.random() for name in HIDDEN}
    u["haze"], u["defocus"] = u["haze"] ** 2, u["defocus"] ** 2
    return {name: round(low + (high - low) * float(u[name]), 4) for name, (low, high) in HIDDEN.items()}


def scenes(split: str, n: int, *, start: int = 0, seed: int = 0) -> Iterator[Scene]:
    """Yield scenes ``start .. start + n - 1`` of a split."""
    for index in range(start, start + n):
        yield sample_scene(split, index, seed)


def prompts(split: str, n: int, *, seed: int = 0) -> list[str]:
    """Return the first ``n`` *different* captions of a split, in a seeded order."""
    found: dict[str, None] = {}
    for index in range(200 * n):
        found[sample_scene(split, index, seed + 1).caption] = None
        if len(found) == n:
            return list(found)
    raise UserError(f"Expected at most {len(found)} prompts of the {split} split, got {n}; ask for fewer.")


def edit_scene(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    """Change one captioned attribute, keep seed and hidden factors; return (instruction, edited scene)."""
    kind = str(rng.choice(["time", "colour", "object", "terrain"]))
    options = [v for v in ATTRIBUTES[kind] if v != getattr(scene, kind) and v != scene.second_object]
    value = str(rng.choice(options))
    instruction = {
        "time": f"make it {value}",
        "colour": f"make the {scene.object} {value}",
        "object": f"turn the {scene.object} into a {value}",
        "terrain": f"move it to the {value}",
    }[kind]
    change: dict[str, Any] = {kind: value}
    return instruction, dataclasses.replace(scene, **change)
