"""CLIP guidance (Crowson 2021): the gradient of CLIP's similarity between the decoded x0 prediction and targets."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from guidance.guides.base import ScoringGuide, network_option, register_guide, scale_option
from guidance.utils.config import option
from guidance.utils.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from guidance.models.clip import Clip
    from guidance.models.types import Pipeline

#: ``through`` -> tap: the gradient stops at the x0 prediction, or continues through the denoiser to its input.
TAPS = {"x0": "x0", "unet": "x0/unet"}

#: Smallest cutout of records that do not name it.
MIN_SIZE = 0.5


def spherical_distance(u: Float[Tensor, "... d"], v: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
    """Squared angle between unit vectors, halved: ``2 asin(|u - v| / 2)^2 = arccos(u . v)^2 / 2``.

    Computed as ``2 atan2(|u - v|, |u + v|)^2``, which is equal for unit vectors and has a finite gradient also where
    they are equal or opposite.

    Returns:
        0 for equal, ``pi^2 / 2`` for opposite vectors.

    Reference:
        K. Crowson, "CLIP guided diffusion", 2021 (``spherical_dist_loss``); W. Kahan, 2006, for the stable angle.

    >>> import torch
    >>> u, v = torch.eye(2)
    >>> round(spherical_distance(u, v).item(), 4), round(math.pi**2 / 8, 4)
    (1.2337, 1.2337)
    """
    return 2 * (u - v).norm(dim=-1).atan2((u + v).norm(dim=-1)).square()


def _minus_spherical(clip: Clip, u: Tensor, v: Tensor) -> Tensor:
    return -spherical_distance(u, v)


def _scaled_cosine(clip: Clip, u: Tensor, v: Tensor) -> Tensor:
    return clip.logit_scale * (u * v).sum(-1)


#: ``distance`` -> ``f(clip, image embeddings, target embeddings)``, larger is closer.
SIMILARITIES: dict[str, Callable[[Clip, Tensor, Tensor], Tensor]] = {
    "spherical": _minus_spherical,
    "cosine": _scaled_cosine,
}


@register_guide("clip")
@dataclasses.dataclass(eq=False)
class ClipGuide(ScoringGuide):
    """Push samples towards texts or images as CLIP sees them: the baseline of mid-block guidance.

    With ``u_j`` the embedding of cutout ``j`` of the decoded x0 prediction and ``v_k`` that of target ``k``::

        score(x0) = mean_j sum_k w_k sim(u_j, v_k)
        sim(u, v) = -2 asin(|u - v| / 2)^2         (distance="spherical")
                  = exp(logit_scale) u . v         (distance="cosine")

    The decoder and CLIP run in float32 whatever the pipeline's precision.

    Attributes:
        clip: See :func:`guidance.models.clip.load_clip`; do not grade with the same network.
        guidance_scale: Strength; a negative one pushes away.
        texts: One or more texts, the same for all samples.  None, without ``images``: each sample's own prompt
            (our sampling loop knows it; elsewhere ``apply_guidance(pipe, guides, prompts=...)``).
        images: One or more images as targets, besides the texts.
        weights: One weight per target, texts first; a negative one pushes away.  None: 1 each.
        distance: "spherical" or "cosine".
        through: "x0" stops the gradient at the x0 prediction (MPGD), which is cheaper; "unet" carries it through the
            UNet, which is exact.
        cutouts: Random cutouts per image and step; 0 shows CLIP the whole image.
        min_size: Smallest cutout, as a fraction of the image's shorter side.
        decoder: Decodes latents instead of ``pipe.vae``, for example an ``AutoencoderTiny``.
        seed: Seed of the cutouts, which depend on it and on the timestep, not on the batch.
        normalize, start, stop, every, space: See :class:`~guidance.guides.base.Guide`.

    Raises:
        UserError: If targets are empty, weights do not fit them, or a choice is unknown.

    Reference:
        K. Crowson, "CLIP guided diffusion", 2021; Y. He et al., "Manifold Preserving Guided Diffusion", ICLR 2024.
    """

    clip: Any = network_option("testbed", "CLIP or SigLIP: testbed, a folder or a hub id; not the one that judges")
    guidance_scale: float = scale_option()
    _: dataclasses.KW_ONLY
    texts: Any = option(
        None, "texts to approach; without texts and images each image's own prompt", kind=list[str] | None
    )
    images: Any = option(None, "image files to approach", kind=list[str] | None)
    weights: Any = option(
        None, "one weight per text and image; negative pushes away; null: all 1", kind=list[float] | None
    )
    distance: Literal["spherical", "cosine"] = option("spherical", "distance of embeddings")
    through: Literal["x0", "unet"] = option("x0", "stop the gradient at the prediction of x0, or carry it on")
    cutouts: int = option(0, "random crops per image; 0 shows the whole image")
    min_size: float = option(MIN_SIZE, "smallest crop, as a fraction of the shorter side")
    decoder: Any = network_option(
        None, "folder or hub id of an AutoencoderTiny; null: the model's VAE", kind=str | None
    )
    seed: int = option(0, "seed of the cutouts")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, choices in (("through", self.through, TAPS), ("distance", self.distance, SIMILARITIES)):
            if value not in choices:
                raise UserError(f"Expected a known value of {name}, got {value!r}.{nearest(value, choices)}")
        if self.cutouts < 0 or not 0 < self.min_size <= 1 or self.seed < 0:
            raise UserError(
                f"Expected cutouts >= 0, 0 < min_size <= 1 and seed >= 0, got {self.cutouts}, {self.min_size} and "
                f"{self.seed}."
            )
        self.factors  # noqa: B018
        if not isinstance(self.clip, str):
            self.load()

    @property
    def tap(self) -> str:
        return TAPS[self.through]

    def load(self) -> None:
        """Load CLIP, and embed the targets."""
        self.targets  # noqa: B018

    @functools.cached_property
    def embedder(self) -> Clip:
        """The CLIP, loaded."""
        from guidance.models.clip import load_clip

        clip = load_clip(self.clip) if isinstance(self.clip, str) else self.clip
        if str(clip.dtype) not in ("torch.float32", "torch.float64"):
            raise UserError(
                f"Expected a CLIP in float32, got {clip.dtype}, whose gradients underflow; use load_clip(dtype=None)."
            )
        return clip

    @property
    def where(self) -> str:
        return "the prediction of x0" + (", through the UNet" if self.through == "unet" else "")

    @property
    def price(self) -> str:
        unet = " and the UNet" if self.through == "unet" else ""
        return f"an unguided one, the decoder and CLIP, and backward through them{unet}"

    # ---- targets ----------------------------------------------------------------------------------------------
    @functools.cached_property
    def targets(self) -> Float[Tensor, "k d"] | None:
        """Embeddings of the fixed targets, texts first; None if every sample's own prompt is its target."""
        from guidance.utils.images import open_images

        texts = _listed(self.texts, str)
        parts = [self._embed_texts(texts)] if texts else []
        parts += [self.embedder.embed_pil(images)] if (images := open_images(self.images)) else []
        return _concatenated(parts) if parts else None

    @functools.cached_property
    def factors(self) -> list[float]:
        """One finite weight per target; a sample's own prompt is one target."""
        texts, images = _listed(self.texts, str), self.images
        pictures = 0 if images is None else len(images) if isinstance(images, list | tuple) else 1
        if images is not None and not pictures:
            raise UserError("Expected one or more targets, got none; leave them out for each sample's own prompt.")
        return _weights(self.weights, (len(texts) + pictures) or 1)

    @functools.cached_property
    def _known_texts(self) -> dict[str, Tensor]:
        """Embeddings of the texts so far."""
        return {}

    def _embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Embed texts, each once."""
        if not all(text.strip() for text in texts):
            raise UserError("Expected texts to guide towards, got an empty one; give every target some words.")
        new = [text for text in dict.fromkeys(texts) if text not in self._known_texts]
        if new:
            if cut_off := sum(self.embedder.truncated(new)):
                warnings.warn(
                    f"CLIP reads the first {self.embedder.max_tokens} tokens only; {cut_off} of {len(new)} texts are "
                    "longer and guide by their beginning.",
                    stacklevel=3,
                )
            self._known_texts.update(zip(new, self.embedder.embed_texts(new), strict=True))
        return _concatenated([self._known_texts[text].to(self.embedder.device)[None] for text in texts])

    # ---- the protocol -----------------------------------------------------------------------------------------
    @property
    def needs_prompts(self) -> bool:
        return self.targets is None

    def networks(self) -> list[str]:
        return [self.embedder.fingerprint]

    def describe(self) -> dict[str, Any]:
        """Describe the guide for a record; no targets are written as an empty list, the default ``min_size`` not."""
        described = super().describe()
        described |= {name: described[name] or [] for name in ("texts", "images", "weights")}
        if self.min_size == MIN_SIZE:
            del described["min_size"]
        return described

    def fingerprints(self) -> dict[str, Any]:
        return {"clip_fingerprint": self.embedder.fingerprint}

    def prepare(self, pipe: Pipeline) -> None:
        """Check that the pipeline's latents can be decoded; freeze the decoder, and move it and CLIP to the device.

        A decoder in half precision is copied to float32 once; others are used as they are.
        """
        from guidance.models.denoiser import device_of, is_offloaded

        self.load()
        source: Any = self._given_decoder if self.decoder is not None else getattr(pipe, "vae", None)
        _check_decoder(source, pipe)
        if self._prepared.get("source") is not source:
            half = str(source.dtype) not in ("torch.float32", "torch.float64")
            self._prepared.update(source=source, decoder=copy.deepcopy(source).float() if half else source)
        decoder = self._prepared["decoder"].eval().requires_grad_(False)
        if not is_offloaded(decoder):
            decoder.to(device_of(pipe))
        self.embedder.to(device_of(pipe))

    @functools.cached_property
    def _prepared(self) -> dict[str, Any]:
        """The decoder of the last pipeline, and the module that it was made from."""
        return {}

    @functools.cached_property
    def _given_decoder(self) -> Any:
        """The decoder that the option names."""
        if not isinstance(self.decoder, str):
            return self.decoder
        from diffusers import AutoencoderTiny

        return AutoencoderTiny.from_pretrained(self.decoder, use_safetensors=True)

    def score(
        self, x0: Float[Tensor, "b c y x"], t: Float[Tensor, " b"], prompts: Sequence[str] = ()
    ) -> Float[Tensor, " b"]:
        """Score the similarity of predicted clean latents, as the denoiser scales them, to the targets."""
        import torch

        fixed = self.targets
        targets = self._embed_texts(prompts)[:, None] if fixed is None else fixed.to(self.embedder.device)[None]
        with torch.autocast(x0.device.type, enabled=False):
            u = self._embed(self._decode(x0), t)
            similarity = SIMILARITIES[self.distance](self.embedder, u[:, :, None], targets)
            return (similarity * similarity.new_tensor(self.factors)).sum(-1).mean(0)

    def _decode(self, x0: Float[Tensor, "b c y x"]) -> Float[Tensor, "b 3 h w"]:
        """Decode latents to images in -1..1, unclipped."""
        decoder = self._prepared["decoder"]
        z = x0.to(decoder.dtype) / decoder.config.scaling_factor + (decoder.config.get("shift_factor") or 0.0)
        return decoder.decode(z, return_dict=False)[0]

    def _embed(self, images: Float[Tensor, "b 3 h w"], t: Float[Tensor, " b"]) -> Float[Tensor, "n b d"]:
        """Embed every cutout of every image, or the whole images."""
        import numpy as np
        import torch

        clip = self.embedder
        if self.cutouts == 0:
            return clip.embed_images(images)[None]
        if not (t == t[0]).all():  # samples at several timesteps: each gets the cutouts of its own
            return torch.cat([self._embed(x[None], s[None]) for x, s in zip(images, t, strict=True)], 1)
        state = np.random.SeedSequence([self.seed, round(1000 * float(t[0]))]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> 1))
        views = cutouts(images, self.cutouts, generator, self.min_size, size=clip.image_size, mode=clip.preprocess.mode)
        return clip.embed_images(views.flatten(0, 1)).unflatten(0, views.shape[:2])


def _listed(value: Any, kind: type) -> list[Any]:
    """Return one or several targets as a list, and None as an empty one."""
    if value is None:
        return []
    values = [value] if isinstance(value, kind) else list(value)
    if not values:
        raise UserError("Expected one or more targets, got none; leave them out for each sample's own prompt.")
    return values


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat(list(parts))


def _weights(weights: Any, number: int) -> list[float]:
    """Return one finite weight per target."""
    if weights is None:
        return [1.0] * number
    values = list(weights) if isinstance(weights, list | tuple) else [weights]
    numbers = all(isinstance(w, int | float) and math.isfinite(w) for w in values)
    if len(values) != number or not numbers or not any(values):
        raise UserError(
            f"Expected {number} finite weights, one per target and not all 0, got {values}; texts come before images."
        )
    return [float(w) for w in values]


def _check_decoder(decoder: Any, pipe: Pipeline) -> None:
    if decoder is None or not hasattr(decoder, "decode"):
        raise UserError(
            f"Expected a pipeline with a VAE, got {type(pipe).__name__} without one; pass ClipGuide(decoder=...)."
        )
    from guidance.models.denoiser import denoiser_of

    config, channels = decoder.config, denoiser_of(pipe).config.out_channels
    latent = config.get("latent_channels")
    if latent is None or channels not in (latent, 2 * latent):  # twice: with learned variances
        raise UserError(
            f"Expected a decoder of the denoiser's {channels} latent channels, got {type(decoder).__name__} with "
            f"{latent}; choose the decoder of this model family."
        )
    if config.get("latents_mean") is not None or config.get("scaling_factor") is None:
        raise UserError(
            f"Expected latents that one scaling_factor maps to {type(decoder).__name__}, got per-channel statistics "
            "or none; pass ClipGuide(decoder=...)."
        )


def cutouts(
    x: Float[Tensor, "b c h w"],
    n: int,
    generator: torch.Generator,
    min_size: float = 0.5,
    *,
    size: int,
    noise: float = 0.02,
    mode: str = "bicubic",
) -> Float[Tensor, "n b c size size"]:
    """Cut ``n`` random squares out of every image and resize them to CLIP's size; differentiable.

    A gradient that agrees over many crops changes what CLIP sees, not the pixels of an adversarial pattern.  The side
    of a square is ``s (m + (1 - m) u)`` with ``s`` the shorter side, ``m = min_size`` and ``u`` uniform in 0..1; its
    place is uniform.

    All images of a batch get the same squares and noise: what a sample sees depends on the generator alone, not on the
    rest of the batch.

    Args:
        x: Images, any range.
        n: Cutouts per image.
        generator: CPU generator of all random numbers.
        min_size: Smallest side as a fraction of the shorter side, above 0 up to 1.
        size: Height and width of the result in pixels.
        noise: Standard deviation of Gaussian noise, in the images' units.
        mode: See :func:`resize`.

    Returns:
        The cutouts, first axis the cutout, in the dtype and on the device of ``x``.

    Reference:
        K. Crowson, "CLIP guided diffusion" (notebooks and repository), 2021: ``MakeCutouts``.
    """
    import torch

    from guidance.models.clip import resize

    height, width = x.shape[-2:]
    short = min(height, width)
    cuts = []
    for u, v, w, _ in torch.rand(n, 4, generator=generator).tolist():
        side = max(1, round(short * (min_size + (1 - min_size) * u)))
        top, left = int(v * (height - side + 1)), int(w * (width - side + 1))
        cuts.append(resize(x[..., top : top + side, left : left + side], size, size, mode))
    out = torch.stack(cuts)
    if noise == 0:
        return out
    return out + noise * torch.randn(n, 1, *out.shape[2:], generator=generator).to(out)
