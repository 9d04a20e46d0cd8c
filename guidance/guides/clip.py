"""CLIP guidance (Crowson 2021): the gradient of CLIP's similarity between the decoded x0 prediction and targets."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from guidance.guides.base import Strength, own_prompts
from guidance.models.clip import Clip, resize
from guidance.models.denoiser import denoiser_of, device_of, is_offloaded
from guidance.models.types import Pipeline
from guidance.utils.errors import UserError, nearest

#: ``through`` -> tap: the gradient stops at the x0 prediction, or continues through the denoiser to its input.
TAPS = {"x0": "x0", "unet": "x0/unet"}


def spherical_distance(u: Float[Tensor, "... d"], v: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
    """Squared angle between unit vectors, halved: ``2 asin(|u - v| / 2)^2 = arccos(u . v)^2 / 2``.

    Computed as ``2 atan2(|u - v|, |u + v|)^2``, which is equal for unit vectors and has a finite gradient also where
    they are equal or opposite.

    Returns:
        0 for equal, ``pi^2 / 2`` for opposite vectors.

    Reference:
        K. Crowson, "CLIP guided diffusion", 2021 (``spherical_dist_loss``); W. Kahan, 2006, for the stable angle.

    >>> u, v = torch.eye(2)
    >>> round(spherical_distance(u, v).item(), 4), round(math.pi**2 / 8, 4)
    (1.2337, 1.2337)
    """
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)).square()


def _minus_spherical(clip: Clip, u: Tensor, v: Tensor) -> Tensor:
    return -spherical_distance(u, v)


def _scaled_cosine(clip: Clip, u: Tensor, v: Tensor) -> Tensor:
    return clip.logit_scale * (u * v).sum(-1)


#: ``distance`` -> ``f(clip, image embeddings, target embeddings)``, larger is closer.
SIMILARITIES: dict[str, Callable[[Clip, Tensor, Tensor], Tensor]] = {
    "spherical": _minus_spherical,
    "cosine": _scaled_cosine,
}


class ClipGuide:
    """Push samples towards texts or images as CLIP sees them: the baseline of mid-block guidance.

    With ``u_j`` the embedding of cutout ``j`` of the decoded x0 prediction and ``v_k`` that of target ``k``::

        score(x0) = mean_j sum_k w_k sim(u_j, v_k)
        sim(u, v) = -2 asin(|u - v| / 2)^2         (distance="spherical")
                  = exp(logit_scale) u . v         (distance="cosine")

    The decoder and CLIP run in float32 whatever the pipeline's precision.

    Args:
        clip: See :func:`guidance.models.clip.load_clip`; do not grade with the same network.
        guidance_scale: Strength; a negative one pushes away.
        texts: One or more texts, the same for all samples.  None, without ``images``: each sample's own prompt
            (in our sampling loop only).
        images: One or more images as targets, besides the texts.
        weights: One weight per target, texts first; a negative one pushes away.  None: 1 each.
        distance: "spherical" or "cosine".
        through: "x0" stops the gradient at the x0 prediction (MPGD), which is cheaper; "unet" carries it through the
            UNet, which is exact.
        cutouts: Random cutouts per image and step; 0 shows CLIP the whole image.
        min_size: Smallest cutout, as a fraction of the image's shorter side.
        decoder: Decodes latents instead of ``pipe.vae``, for example an ``AutoencoderTiny``.
        seed: Seed of the cutouts, which depend on it and on the timestep, not on the batch.
        normalize, start, stop, every: See :class:`~guidance.guides.base.Strength`.

    Raises:
        UserError: If targets are empty, weights do not fit them, or a choice is unknown.

    Reference:
        K. Crowson, "CLIP guided diffusion", 2021; Y. He et al., "Manifold Preserving Guided Diffusion", ICLR 2024.
    """

    name = "clip"

    def __init__(
        self,
        clip: Clip,
        guidance_scale: float = 1.0,
        *,
        texts: str | Sequence[str] | None = None,
        images: Image.Image | Sequence[Image.Image] | None = None,
        weights: float | Sequence[float] | None = None,
        distance: str = "spherical",
        through: str = "x0",
        cutouts: int = 0,
        min_size: float = 0.5,
        decoder: Any = None,
        seed: int = 0,
        normalize: str | None = "cfg",
        start: float = 0.0,
        stop: float = 1.0,
        every: int = 1,
    ) -> None:
        if clip.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"Expected a CLIP in float32, got {clip.dtype}, whose gradients underflow; use load_clip(dtype=None)."
            )
        for name, value, choices in (("through", through, TAPS), ("distance", distance, SIMILARITIES)):
            if value not in choices:
                raise UserError(f"Expected a known value of {name}, got {value!r}.{nearest(value, choices)}")
        if cutouts < 0 or not 0 < min_size <= 1 or seed < 0:
            raise UserError(
                f"Expected cutouts >= 0, 0 < min_size <= 1 and seed >= 0, got {cutouts}, {min_size} and {seed}."
            )
        self.clip, self.tap = clip, TAPS[through]
        self.strength = Strength(guidance_scale, normalize, start, stop, every)
        self.similarity = functools.partial(SIMILARITIES[distance], clip)
        self.cutouts, self.min_size, self.seed = cutouts, min_size, seed
        self.decoder = decoder
        self._source: Any = None  # the module that _decoder was made from
        self._decoder: Any = None
        self._text_cache: dict[str, Tensor] = {}
        self.targets = self._embed_targets(_as_list(texts, str), _as_list(images, Image.Image))
        self.weights = _weights(weights, None if self.targets is None else len(self.targets))

    # ---- targets ----------------------------------------------------------------------------------------------
    def _embed_targets(self, texts: list[str], images: list[Image.Image]) -> Float[Tensor, "k d"] | None:
        """Embed the fixed targets, texts first; None if every sample's own prompt is its target."""
        parts = [self._embed_texts(texts)] if texts else []
        parts += [self.clip.embed_pil(images)] if images else []
        return torch.cat(parts) if parts else None

    def _embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Embed texts, each once."""
        if not all(text.strip() for text in texts):
            raise UserError("Expected texts to guide towards, got an empty one; give every target some words.")
        new = [text for text in dict.fromkeys(texts) if text not in self._text_cache]
        if new:
            cut_off = sum(self.clip.truncated(new))
            if cut_off:
                warnings.warn(
                    f"CLIP reads the first {self.clip.max_tokens} tokens only; {cut_off} of {len(new)} texts are "
                    "longer and guide by their beginning.",
                    stacklevel=3,
                )
            self._text_cache.update(zip(new, self.clip.embed_texts(new), strict=True))
        return torch.stack([self._text_cache[text].to(self.clip.device) for text in texts])

    def _targets_of(self, batch: int) -> Float[Tensor, "b k d"] | Float[Tensor, "1 k d"]:
        if self.targets is not None:
            return self.targets.to(self.clip.device)[None]
        return self._embed_texts(own_prompts(batch))[:, None]

    # ---- the protocol -----------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        """Describe the guide as a scorer, see :func:`~guidance.guides.base.describe_scorer`."""
        return {"networks": [self.clip.fingerprint]}

    def prepare(self, pipe: Pipeline) -> None:
        """Check that the pipeline's latents can be decoded; freeze the decoder, and move it and CLIP to the device.

        A decoder in half precision is copied to float32 once; others are used as they are.
        """
        source: Any = self.decoder if self.decoder is not None else getattr(pipe, "vae", None)
        _check_decoder(source, pipe)
        if source is not self._source:
            half = source.dtype not in (torch.float32, torch.float64)
            self._decoder = copy.deepcopy(source).float() if half else source
            self._source = source
        self._decoder.eval().requires_grad_(False)
        if not is_offloaded(self._decoder):
            self._decoder.to(device_of(pipe))
        self.clip.to(device_of(pipe))

    def score(self, x0: Float[Tensor, "b c y x"], t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Score the similarity of predicted clean latents, as the denoiser scales them, to the targets."""
        targets = self._targets_of(len(x0))
        with torch.autocast(x0.device.type, enabled=False):
            u = self._embed(self._decode(x0), t)
            similarity = self.similarity(rearrange(u, "n b d -> n b 1 d"), targets)
            weighted = similarity * similarity.new_tensor(self.weights)
        return weighted.sum(-1).mean(0)

    def _decode(self, x0: Float[Tensor, "b c y x"]) -> Float[Tensor, "b 3 h w"]:
        """Decode latents to images in -1..1, unclipped."""
        config = self._decoder.config
        z = x0.to(self._decoder.dtype) / config.scaling_factor + (config.get("shift_factor") or 0.0)
        return self._decoder.decode(z, return_dict=False)[0]

    def _embed(self, images: Float[Tensor, "b 3 h w"], t: Float[Tensor, " b"]) -> Float[Tensor, "n b d"]:
        """Embed every cutout of every image, or the whole images."""
        if self.cutouts == 0:
            return self.clip.embed_images(images)[None]
        if not (t == t[0]).all():  # samples at several timesteps: each gets the cutouts of its own
            return torch.cat([self._embed(x[None], s[None]) for x, s in zip(images, t, strict=True)], 1)
        state = np.random.SeedSequence([self.seed, round(1000 * float(t[0]))]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> 1))
        size, mode = self.clip.image_size, self.clip.preprocess.mode
        views = cutouts(images, self.cutouts, generator, self.min_size, size=size, mode=mode)
        u = self.clip.embed_images(rearrange(views, "n b c h w -> (n b) c h w"))
        return rearrange(u, "(n b) d -> n b d", n=self.cutouts)


def _as_list(value: Any, kind: type) -> list[Any]:
    """Return one or several targets as a list, and None as an empty one."""
    if value is None:
        return []
    values = [value] if isinstance(value, kind) else list(value)
    if not values:
        raise UserError("Expected one or more targets, got none; leave them out for each sample's own prompt.")
    return values


def _weights(weights: float | Sequence[float] | None, targets: int | None) -> list[float]:
    """Return one finite weight per target; a sample's own prompt is one target."""
    number = 1 if targets is None else targets
    if weights is None:
        return [1.0] * number
    values = [float(w) for w in ([weights] if isinstance(weights, int | float) else weights)]
    if len(values) != number or not all(map(math.isfinite, values)) or not any(values):
        raise UserError(
            f"Expected {number} finite weights, one per target and not all 0, got {values}; texts come before images."
        )
    return values


def _check_decoder(decoder: Any, pipe: Pipeline) -> None:
    if decoder is None or not hasattr(decoder, "decode"):
        raise UserError(
            f"Expected a pipeline with a VAE, got {type(pipe).__name__} without one; pass ClipGuide(decoder=...)."
        )
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
