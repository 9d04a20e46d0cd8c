"""Methods whose cost is compared: guided steps of this toolkit, and rivals by their published formulas."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from eval.cost.meters import counted
from guidance.apply import apply_guidance
from guidance.guides import MidBlockGuide
from guidance.guides.base import Guide, ScoringGuide
from guidance.guides.registry import read_guide
from guidance.models.denoiser import denoiser_of, latent_channels
from guidance.models.inputs import build_inputs
from guidance.models.types import Pipeline
from guidance.taps import capture, encode_features, watch
from guidance.taps.hooks import read_output
from guidance.utils.errors import UserError

NUM_STEPS = 25  # of the run whose steps are timed

RANDOM_CLIP = "random"  # random weights in the shape of OpenAI's ViT-B/32


@dataclasses.dataclass(frozen=True)
class Method:
    """The kinds of denoiser steps that a run takes under a method.

    Attributes:
        phases: (one step, its share of a run), in order; there are several where a guide has an interval or ``every``.
        context: Entered around the steps.
        gradient: Whether activations are kept for a backward pass.
    """

    phases: tuple[tuple[Callable[[], Any], float], ...]
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    gradient: bool = False

    def measure(self, meter: Callable[[Callable[[], Any]], Any]) -> list[Any]:
        """Apply a meter to a step of each phase; a guided run's own check of its first gradient is not counted."""
        with self.context():
            if self.context is not contextlib.nullcontext:
                for step, _ in self.phases:
                    step()
            return [meter(step) for step, _ in self.phases]

    def average(self, meter: Callable[[Callable[[], Any]], float]) -> float:
        """Average a meter over the steps of a run."""
        values = self.measure(meter)
        return sum(value * share for value, (_, share) in zip(values, self.phases, strict=True))


class CostBench:
    """A pipeline with random inputs and guides; heavy parts are built on first use.

    Args:
        pipe: Pipeline with a denoiser and a scheduler; methods that decode need its VAE, too.
        batch: Images per step.
        side: Side of the latents; None: the model's default.
        clip: CLIP model of CLIP guidance: "random", or a name for :func:`guidance.models.clip.load_clip`.
    """

    def __init__(self, pipe: Pipeline, batch: int, side: int | None, clip: str) -> None:
        self.pipe, self.denoiser = pipe, denoiser_of(pipe)
        self.batch, self.side, self._clip = batch, side, clip
        if type(pipe.scheduler).__name__ == "PNDMScheduler":  # calls the model twice for one of its steps
            from diffusers import DDIMScheduler

            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler.set_timesteps(NUM_STEPS)
        blocks = getattr(self.denoiser, "transformer_blocks", None)
        self.tap = "mid_block" if blocks is None else f"transformer_blocks.{len(blocks) // 2}"
        self._inputs: dict[int, tuple[Tensor, dict[str, Any]]] = {}

    # ---- a step -----------------------------------------------------------------------------------------------
    def inputs(self, parts: int) -> tuple[Tensor, dict[str, Any]]:
        """Return random latents and conditions of a batch of guidance parts, the same at every call."""
        if parts not in self._inputs:
            x, conditions = build_inputs(self.denoiser, self.side, parts * self.batch)
            conditions.pop("timestep")
            generator = torch.Generator().manual_seed(0)
            self._inputs[parts] = _randomise(x, generator), _randomise(conditions, generator)
        return self._inputs[parts]

    def forward(self, index: int, parts: int, x: Tensor | None = None) -> Tensor:
        """Predict at a step of the schedule, for other latents if given."""
        latents, conditions = self.inputs(parts)
        x = latents if x is None else x
        t = self.pipe.scheduler.timesteps[index].to(x.device)
        return self.denoiser(x, timestep=t.expand(len(x)), **conditions, return_dict=False)[0]

    def step(self, index: int = 3, parts: int = 2) -> None:
        """Take a step as a pipeline does."""
        with torch.no_grad():
            self.forward(index, parts)

    # ---- guides -----------------------------------------------------------------------------------------------
    @functools.cached_property
    def _base(self) -> dict[str, Any]:
        return {"prediction_type": self.pipe.scheduler.config.get("prediction_type", "flow_prediction")}

    @functools.cached_property
    def features(self) -> Tensor:
        """Mid-block features of one guidance part."""
        x, conditions = self.inputs(1)
        return encode_features(self.denoiser, x, 500, tap=self.tap, **conditions)

    @functools.cached_property
    def head(self) -> Any:
        """A random head of the report's architecture."""
        from guidance.heads import HeadConfig, build_head

        channels = self.features.shape[1]
        config = HeadConfig("conv", channels, time_conditioned=False, tap=self.tap, **self._base)
        return build_head(config).to(self.denoiser.device)

    def mid_u(self, **options: Any) -> ScoringGuide:
        """Build mid-block guidance with that head."""
        return MidBlockGuide(self.head, 1.0, **({"start": 0.0, "stop": 1.0} | options))

    def amortised(self) -> Any:
        """Build a guide by a random adapter of the shape that train/amortise.py trains."""
        from guidance.guides.amortised import AmortisedGuide
        from guidance.heads.adapter import AdapterConfig, build_adapter

        adapter = build_adapter(AdapterConfig(latent_channels(self.denoiser), patch=2, **self._base))
        return AmortisedGuide(adapter.to(self.denoiser.device), 1.0)

    @functools.cached_property
    def clip(self) -> Any:
        """The CLIP model of CLIP guidance."""
        from guidance.models.clip import Clip, Preprocess, load_clip

        if self._clip != RANDOM_CLIP:
            return load_clip(self._clip, device=self.denoiser.device)
        from transformers import CLIPConfig, CLIPModel

        size = CLIPConfig().vision_config.image_size
        preprocess = Preprocess(size, size, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
        return Clip(CLIPModel(CLIPConfig()), None, preprocess, RANDOM_CLIP).to(self.denoiser.device)

    def clip_guide(self, *, through: Literal["x0", "unet"], tiny: bool) -> ScoringGuide:
        """Build CLIP guidance towards a grey image, decoded by the VAE or a random decoder of TAESD's shape."""
        from diffusers import AutoencoderTiny

        from guidance.guides.clip import ClipGuide

        if not tiny and getattr(self.pipe, "vae", None) is None:
            raise UserError("Expected a pipeline with a VAE to decode for CLIP, got none; omit that method.")
        config = {"latent_channels": latent_channels(self.denoiser)}
        decoder = AutoencoderTiny(**config).to(self.denoiser.device) if tiny else None
        image = Image.new("RGB", (64, 64), "grey")
        return ClipGuide(self.clip, 1.0, images=image, through=through, decoder=decoder)

    def guided(self, guides: Sequence[Guide], parts: int = 2) -> Method:
        """Return steps under guides, each kind weighted by its share of a run of :data:`NUM_STEPS`."""
        phases = tuple((functools.partial(self.step, i, parts), share) for i, share in list_phases(guides))
        watched = [_counted(guide) if isinstance(guide, ScoringGuide) else guide for guide in guides]
        gradient = any(isinstance(guide, ScoringGuide) for guide in guides)
        return Method(phases, functools.partial(apply_guidance, self.pipe, watched, parts=parts), gradient)

    # ---- rivals -----------------------------------------------------------------------------------------------
    def _full_graph_step(self, parts: int) -> Tensor:
        """Predict with the graph of the whole denoiser and shift by the gradient of the head's score."""
        outputs: list[Tensor] = []
        x = self.inputs(parts)[0].detach().clone().requires_grad_(True)
        t = torch.full((len(x),), 500.0, device=x.device)
        keep = lambda name, output, grid: outputs.append(read_output(output, grid))  # noqa: E731
        with watch(self.denoiser, [self.tap], keep), torch.enable_grad():
            output = self.forward(3, parts, x)
            score = self.mid_u().score(outputs[0].float(), t).sum()
            (g,) = torch.autograd.grad(score, x)
        return output.detach()[:, : g.shape[1]] - g[:, : output.shape[1]]

    def full_graph(self) -> None:
        """Run the conditional part with the graph of the whole denoiser, the unconditional one without."""
        with torch.no_grad():
            self.forward(3, 1)
        self._full_graph_step(1)

    def both_parts(self) -> None:
        """Run both parts in one batch with the graph of the whole denoiser."""
        self._full_graph_step(2)

    def second_forward(self) -> None:
        """Take an unguided step, then another forward for the gradient, as the report's descendants do."""
        self.step()
        self._full_graph_step(1)

    def head_alone(self) -> None:
        """Compute the head's score and its gradient with respect to the features."""
        h = self.features.detach().float().requires_grad_(True)
        t = torch.full((len(h),), 500.0, device=h.device)
        torch.autograd.grad(self.mid_u().score(h, t).sum(), h)

    def capture_full(self) -> None:
        """Read features from a whole forward."""
        with capture(self.denoiser, [self.tap]), torch.no_grad():
            self.forward(3, 1)

    def capture_encoder(self) -> None:
        """Read features from a forward that stops at the tap."""
        x, conditions = self.inputs(1)
        encode_features(self.denoiser, x, self.pipe.scheduler.timesteps[3], tap=self.tap, **conditions)

    def networks(self) -> list[nn.Module]:
        """List the networks built so far, whose weights are not activations."""
        built = vars(self)
        parts = [self.denoiser, getattr(self.pipe, "vae", None), built.get("head")]
        parts += [self.clip.model] if "clip" in built else []
        return [part for part in parts if part is not None]


def _counted(guide: ScoringGuide) -> ScoringGuide:
    """Return the guide with a score that :func:`eval.cost.meters.count_saved` sees."""

    guide.load()
    other = copy.copy(guide)

    def score(*arguments: Any) -> Tensor:
        with counted():
            return type(guide).score(other, *arguments)

    vars(other)["score"] = score
    return other


def list_phases(guides: Sequence[Guide], num_steps: int = NUM_STEPS) -> list[tuple[int, float]]:
    """Find the kinds of steps of a run: (a step of that kind, its share).

    A guide is off, takes a gradient, or uses the last one again.

    >>> from guidance.guides import ClipGuide
    >>> list_phases([ClipGuide(start=0.5, every=2)], 8)
    [(0, 0.5), (4, 0.25), (5, 0.25)]
    """
    phases = [guide.phases(num_steps) for guide in guides]
    kinds = [tuple(p[i] for p in phases) for i in range(num_steps)]
    return [(kinds.index(kind), n / num_steps) for kind, n in Counter(kinds).items()]


def _randomise(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, dict):
        return {name: _randomise(v, generator) for name, v in value.items()}
    if not value.is_floating_point():
        return value
    return torch.randn(value.shape, generator=generator).to(value.device, value.dtype)


def _simple(run: Callable[[], None], *, gradient: bool = False) -> Method:
    return Method(((run, 1.0),), gradient=gradient)


def _fast(bench: CostBench) -> Method:
    spec = read_guide("fast")
    return bench.guided([bench.mid_u(start=spec.start, stop=spec.stop, every=spec.every)])


Builder = Callable[[CostBench], Method]

#: Name -> (baseline it is compared with, builder).
METHODS: dict[str, tuple[str | None, Builder]] = {
    "unguided": (None, lambda b: _simple(b.step)),
    "mid-u": ("unguided", lambda b: b.guided([b.mid_u()])),
    "mid-u, every 2": ("unguided", lambda b: b.guided([b.mid_u(every=2)])),
    "mid-u, fast": ("unguided", _fast),
    "amortised": ("unguided", lambda b: b.guided([b.amortised()])),
    "the head alone": ("unguided", lambda b: _simple(b.head_alone)),
    "full graph": ("unguided", lambda b: _simple(b.full_graph, gradient=True)),
    "full graph, both parts": ("unguided", lambda b: _simple(b.both_parts, gradient=True)),
    "second forward": ("unguided", lambda b: _simple(b.second_forward, gradient=True)),
    "unguided, no CFG": (None, lambda b: _simple(functools.partial(b.step, parts=1))),
    "mid-u, no CFG": ("unguided, no CFG", lambda b: b.guided([b.mid_u()], 1)),
    "capture, full": (None, lambda b: _simple(b.capture_full)),
    "capture, encoder": ("capture, full", lambda b: _simple(b.capture_encoder)),
    "CLIP through x0, tiny decoder": ("unguided", lambda b: b.guided([b.clip_guide(through="x0", tiny=True)])),
    "CLIP through x0, VAE": ("unguided", lambda b: b.guided([b.clip_guide(through="x0", tiny=False)])),
    "CLIP through UNet, VAE": ("unguided", lambda b: b.guided([b.clip_guide(through="unet", tiny=False)])),
}


def guide_method(text: str) -> tuple[str, Builder]:
    """Return the entry of a guide written as for ``--guide``, at the scale it names."""
    guide = read_guide(text)
    return "unguided", lambda bench: bench.guided([guide])
