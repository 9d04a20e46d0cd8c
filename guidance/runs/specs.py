"""Guides by name and options, as command lines, YAML files and records describe them.

Each kind of guide is a dataclass of plain options; :func:`read_guide` reads them.  Nothing heavy is imported before
:meth:`GuideSpec.build`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from guidance.guides.phases import FRESH, KEPT, OFF, step_phases
from guidance.utils.config import load_config, option
from guidance.utils.errors import UserError, nearest
from guidance.utils.io import read_json

_MID_BLOCK_COST = 1.19  # of a step with a gradient from the mid-block, in unguided steps


@dataclasses.dataclass
class GuideSpec:
    """Options that all guides share; the scale multiplies that of the arm."""

    method: ClassVar[str]

    guidance_scale: float = option(1.0, "factor of the arm's scale; negative pushes away")
    start: float | None = option(None, "fraction of the steps where guidance begins; null: the guide's own")
    stop: float | None = option(None, "fraction of the steps where guidance ends; null: the guide's own")
    every: int = option(1, "take a gradient every so many steps")

    def build(self, scale: float) -> Any:
        """Build the guide at a scale; heavy parts are loaded once and shared."""
        raise NotImplementedError

    def describe(self, guide: Any) -> dict[str, Any]:
        """Describe the guide for a record: method, name, strength, and these options."""
        options = dataclasses.asdict(self)
        for name in ("guidance_scale", "start", "stop"):  # the guide's strength has their final values
            del options[name]
        return {"method": self.method, "name": guide.name, **dataclasses.asdict(guide.strength), **options}

    def explain(self, num_steps: int) -> str:
        """Describe tap, active steps, cost, and in a second line the options, without loading a model."""
        interval = {"start": 0.0, "stop": 1.0} | self.trained | self.interval()
        phases = step_phases(interval["start"], interval["stop"], self.every, num_steps)
        options = [f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self)]
        when = f"pushes in {num_steps - phases.count(OFF)} of {num_steps} steps"
        if KEPT in phases:
            when += f", with a new direction in {phases.count(FRESH)}"
        cost = f"a guided step costs {self.price}"
        if self.step_cost is not None:
            average = 1 + (self.step_cost - 1) * phases.count(FRESH) / num_steps
            cost += f", steps on average {average:.2f}"
        return f"{self.method}: tap {self.where}; {when}; {cost}\n    {', '.join(options)}"

    @property
    def price(self) -> str:
        """Cost of a step with a gradient, in words."""
        return "what its gradient takes (not counted)"

    @property
    def step_cost(self) -> float | None:
        """Cost of a step with a gradient in unguided steps; None if unknown."""
        return None

    @property
    def folder(self) -> str:
        """Folder of the guide's trained part; "" without one."""
        return ""

    @functools.cached_property
    def trained(self) -> dict[str, Any]:
        """Config of the trained part; empty if it is not on this disk."""
        file = Path(self.folder) / "config.json"
        return read_json(file) if self.folder and file.is_file() else {}

    @property
    def where(self) -> str:
        """Tap of the guide and its purpose, in words."""
        return "as the guide says"

    def interval(self) -> dict[str, Any]:
        """Return ``start`` and ``stop`` where they are given, as arguments of the guide; else the guide's own hold."""
        return {k: v for k in ("start", "stop") if (v := getattr(self, k)) is not None}


class HeadSpec(GuideSpec):
    """Base class of guides by a head, whose folder is the option ``head``."""

    head: str

    @property
    def folder(self) -> str:
        return self.head

    @property
    def where(self) -> str:
        if not self.trained:
            return f"as its head says (no '{self.folder}' on this disk)"
        head = self.trained
        return f"{head['tap']} of {head['base_model'] or 'its model'}, for {head['target']} (task {head['task']})"

    @property
    def step_cost(self) -> float | None:
        return None if "up_blocks" in self.trained.get("tap", "") else _MID_BLOCK_COST

    @property
    def price(self) -> str:
        if self.step_cost is None:
            return f"more than the {_MID_BLOCK_COST:.2f} unguided ones of a guide on the mid-block"
        return f"about {self.step_cost:.2f} unguided ones (counted, Stable Diffusion at 512 px with CFG)"


@dataclasses.dataclass
class MidBlockSpec(HeadSpec):
    """A head on mid-block features: rating, class, number, or real against generated."""

    method: ClassVar[str] = "midblock"

    head: str = option("runs/heads/testbed-aesthetic", "folder of the head")
    objective: str | None = option(
        None, "expected, at_least, class, regression, binary; null: by the head's task (of ratings: expected)"
    )
    target: str | None = option(None, "label or threshold of the objective, where it needs one")
    normalize: str | None = option("cfg", "cfg: portable scale; null: raw gradient")
    space: Literal["eps", "x"] = option("eps", "what is shifted: the prediction or the latents")
    committee: list[str] = option([], "folders of further heads of the same target, of other seeds")
    pessimism: float = option(0.0, "standard deviations of the committee to subtract from its mean")

    @functools.cached_property
    def loaded(self) -> Any:
        """The loaded heads."""
        from guidance.heads.networks import load_head

        return [load_head(folder) for folder in (self.head, *self.committee)]

    def build(self, scale: float) -> Any:
        from guidance.guides.midblock import MidBlockGuide

        names = ("objective", "target", "normalize", "space", "pessimism", "every")
        options: dict[str, Any] = {k: getattr(self, k) for k in names}
        return MidBlockGuide(self.loaded, scale, **self.interval(), **options)

    def describe(self, guide: Any) -> dict[str, Any]:
        first, *others = guide.describe()["networks"]
        return super().describe(guide) | {"head_fingerprint": first, "committee_fingerprints": others}


@dataclasses.dataclass
class ClipSpec(GuideSpec):
    """CLIP on the decoded prediction of x0."""

    method: ClassVar[str] = "clip"

    clip: str = option("testbed", "CLIP or SigLIP: testbed, a folder or a hub id; not the one that judges")
    texts: list[str] = option([], "texts to approach; empty: each image's own prompt")
    images: list[str] = option([], "image files to approach")
    weights: list[float] = option([], "one weight per text and image; negative pushes away; empty: all 1")
    distance: Literal["spherical", "cosine"] = option("spherical", "distance of embeddings")
    through: Literal["x0", "unet"] = option("x0", "stop the gradient at the prediction of x0, or carry it on")
    cutouts: int = option(0, "random crops per image; 0 shows the whole image")
    decoder: str | None = option(None, "folder or hub id of an AutoencoderTiny; null: the model's VAE")
    normalize: str | None = option("cfg", "cfg: portable scale; null: raw gradient")
    seed: int = option(0, "seed of the cutouts")

    @property
    def price(self) -> str:
        unet = " and the UNet" if self.through == "unet" else ""
        return f"an unguided one, the decoder and CLIP, and backward through them{unet}"

    @property
    def where(self) -> str:
        return "the prediction of x0" + (", through the UNet" if self.through == "unet" else "")

    @functools.cached_property
    def _parts(self) -> tuple[Any, Any]:
        from guidance.models.clip import load_clip

        if self.decoder is None:
            return load_clip(self.clip), None
        from diffusers import AutoencoderTiny

        return load_clip(self.clip), AutoencoderTiny.from_pretrained(self.decoder, use_safetensors=True)

    def build(self, scale: float) -> Any:
        from guidance.guides.clip import ClipGuide

        clip, decoder = self._parts
        names = ("distance", "through", "cutouts", "seed", "normalize", "every")
        options: dict[str, Any] = {k: getattr(self, k) for k in names}
        targets: dict[str, Any] = {"texts": self.texts or None, "images": _open(self.images) or None}
        targets |= {"weights": self.weights or None}
        return ClipGuide(clip, scale, decoder=decoder, **self.interval(), **options, **targets)

    def describe(self, guide: Any) -> dict[str, Any]:
        return super().describe(guide) | {"clip_fingerprint": self._parts[0].fingerprint}


@dataclasses.dataclass
class EmbeddingSpec(HeadSpec):
    """A head that predicts the CLIP image embedding: CLIP guidance without decoding."""

    method: ClassVar[str] = "embedding"

    head: str = option("runs/heads/testbed-clip", "folder of the head")
    clip: str = option("testbed", "the CLIP that the head was trained on: testbed, a folder or a hub id")
    texts: list[str] = option([], "texts to approach; empty: each image's own prompt")
    images: list[str] = option([], "image files to approach")
    normalize: str | None = option("cfg", "cfg: portable scale; null: raw gradient")

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The loaded head and its CLIP."""
        from guidance.heads.networks import load_head
        from guidance.models.clip import load_clip

        return load_head(self.head), load_clip(self.clip)

    def build(self, scale: float) -> Any:
        from guidance.guides.embedding import EmbeddingGuide

        options: dict[str, Any] = {"texts": self.texts or None, "images": _open(self.images) or None}
        options |= {"normalize": self.normalize, "every": self.every}
        head, clip = self.loaded
        return EmbeddingGuide(head, clip, scale, **self.interval(), **options)

    def describe(self, guide: Any) -> dict[str, Any]:
        return super().describe(guide) | {"clip_fingerprint": self.loaded[1].fingerprint}


@dataclasses.dataclass
class AmortisedSpec(GuideSpec):
    """An adapter that predicts the shift of a head, or of several, without a gradient."""

    method: ClassVar[str] = "amortised"

    adapter: str = option("runs/adapters/testbed-aesthetic", "folder of the adapter")

    @property
    def folder(self) -> str:
        return self.adapter

    @property
    def price(self) -> str:
        return "about 1.00 unguided ones (it is predicted: no backward pass)"

    @property
    def where(self) -> str:
        return "none (reads latents and prediction)"

    @functools.cached_property
    def _adapter(self) -> Any:
        from guidance.heads.adapter import load_adapter

        return load_adapter(self.adapter)

    def build(self, scale: float) -> Any:
        from guidance.guides.amortised import AmortisedGuide

        return AmortisedGuide(self._adapter, scale, every=self.every, **self.interval())

    def describe(self, guide: Any) -> dict[str, Any]:
        from guidance.models.denoiser import fingerprint

        teachers = [part["fingerprint"] for part in self._adapter.config.teacher if "fingerprint" in part]
        fingerprints = {"adapter_fingerprint": fingerprint(self._adapter), "teacher_fingerprints": teachers}
        return super().describe(guide) | fingerprints


#: Guides by name.
GUIDES: dict[str, type[GuideSpec]] = {s.method: s for s in (MidBlockSpec, EmbeddingSpec, ClipSpec, AmortisedSpec)}


def _open(files: Sequence[str]) -> list[Any]:
    from PIL import Image

    from guidance.utils.images import to_rgb

    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise UserError(f"Expected an image file at '{missing[0]}', found none; check the path.")
    return [to_rgb(Image.open(file)) for file in files]


CONFIGS = Path("configs/guides")


def read_guide(text: str) -> GuideSpec:
    """Read a guide from ``NAME``, ``NAME:key=value,key=value`` or a YAML file with the line ``guide: NAME``.

    A name that is not a method is looked up as ``configs/guides/NAME.yaml``; options after the colon override it.

    Raises:
        UserError: If there is no such guide or option; the message suggests the nearest name.

    >>> read_guide("midblock:head=my/head,target=7").target
    '7'
    """
    name, _, options = text.partition(":")
    words, file = split_options(options), Path(name)
    if name not in GUIDES and not name.endswith((".yaml", ".yml")):
        file = CONFIGS / f"{name}.yaml"
    if name not in GUIDES:
        if not file.is_file():
            known = list(dict.fromkeys([*GUIDES, *sorted(f.stem for f in CONFIGS.glob("*.yaml"))]))
            raise UserError(f"Expected the name of a guide or a file, got '{name}'.{nearest(name, known)}")
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
        name = given.pop("guide", "") if isinstance(given, dict) else ""
        if name not in GUIDES:
            hint = nearest(str(name), GUIDES)
            raise UserError(f"Expected a line 'guide: NAME' in '{file}', got '{name}'.{hint}")
        words = [*(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in given.items()), *words]
    return load_config(GUIDES[name], None, words)


def split_options(text: str) -> list[str]:
    """Split ``key=value,key=[a,b]`` at the commas that begin a new key.

    >>> split_options("texts=[a boat, the sea],weights=[1,-0.5]")
    ['texts=[a boat, the sea]', 'weights=[1,-0.5]']
    """
    words: list[str] = []
    for piece in filter(None, text.split(",")):
        open_list = words and words[-1].count("[") > words[-1].count("]")
        if open_list:
            words[-1] += f",{piece}"
        else:
            words.append(piece)
    return words


def explain(specs: Sequence[GuideSpec], num_steps: int) -> str:
    """Describe guides for ``--explain``, one per line."""
    return "\n".join(spec.explain(num_steps) for spec in specs) or "no guide: unguided sampling"
