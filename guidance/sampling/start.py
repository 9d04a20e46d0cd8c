"""Starting points of sampling: noise, an image (SDEdit), or an image with a mask to repaint.

A start is data; its ``begin`` returns the first latents, the remaining timesteps and the hooks of the sampling loop.
Results equal those of diffusers' img2img and inpainting pipelines *given latents*; given pixels, these sample the VAE's
posterior with the sample's generator, whereas :func:`encode_images` takes its mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from guidance.data.encoding import encode_pixels
from guidance.models.types import Pipeline
from guidance.utils.errors import UserError
from guidance.utils.images import fit_image, to_float

#: PIL images or uint8 arrays: RGB, (h, w, 3); masks: grey or bool, (h, w), where white (above half) is repainted.
Pictures = Sequence[Image.Image | NDArray[Any]] | NDArray[Any]


class Trajectory:
    """The first latents and remaining timesteps of a run, and hooks of the sampling loop, here without effect."""

    def __init__(self, x: Float[Tensor, "b c y x"], timesteps: Tensor) -> None:
        self.x, self.timesteps = x, timesteps

    def model_input(self, x_in: Float[Tensor, "pb c y x"]) -> Float[Tensor, "pb c2 y x"]:
        """Return the denoiser's input, from the scaled latents of all guidance parts."""
        return x_in

    def after_step(self, x: Float[Tensor, "b c y x"], step: int) -> Float[Tensor, "b c y x"]:
        """Return the latents to continue with after step ``step`` of this run."""
        return x


@runtime_checkable
class Start(Protocol):
    """Starting point of sampling; None in :func:`guidance.sampling.loop.sample_latents` is :class:`FromNoise`."""

    def begin(self, pipe: Pipeline, noise: Float[Tensor, "b c y x"], num_steps: int) -> Trajectory:
        """Prepare a run from unit Gaussian noise; the timesteps of the scheduler are set."""

    def at(self, index: slice | Tensor) -> Start:
        """Select some of the samples."""


class FromNoise:
    """Start from pure noise."""

    def begin(self, pipe: Pipeline, noise: Float[Tensor, "b c y x"], num_steps: int) -> Trajectory:
        _check_channels(pipe, noise.shape[1], masked=False)
        return Trajectory(noise * pipe.scheduler.init_noise_sigma, pipe.scheduler.timesteps)

    def at(self, index: slice | Tensor) -> FromNoise:
        return self


@dataclasses.dataclass(frozen=True, eq=False)
class FromImage:
    """Start from an image's latents, noised part of the way: ``x_t = alpha_t x0 + sigma_t eps``.

    Attributes:
        latents: Clean scaled latents, (b, c, y, x), or (1, c, y, x) for all samples; see :func:`encode_images`.
        strength: Fraction of the steps to take: 0 returns the latents, 1 starts from the noisiest timestep.

    Reference:
        C. Meng et al., "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations", 2022.
    """

    latents: Float[Tensor, "b c y x"]
    strength: float = 0.8

    def __post_init__(self) -> None:
        _check_strength(self.strength)

    def begin(self, pipe: Pipeline, noise: Float[Tensor, "b c y x"], num_steps: int) -> Trajectory:
        _check_channels(pipe, noise.shape[1], masked=False)
        known = _like_noise(self.latents, noise, "latents")
        timesteps = _cut_timesteps(pipe.scheduler, self.strength, num_steps)
        return Trajectory(_noised(pipe.scheduler, known, noise, timesteps), timesteps)

    def at(self, index: slice | Tensor) -> FromImage:
        return dataclasses.replace(self, latents=_at(self.latents, index))


@dataclasses.dataclass(frozen=True, eq=False)
class FromMask:
    """Repaint where the mask is 1 and keep the latents where it is 0.

    With an ordinary denoiser, the known part, noised to the new level, is restored after each step::

        x <- (1 - m) (alpha_t x0 + sigma_t eps) + m x        (alpha = 1, sigma = 0 after the last step)

    with the ``eps`` from which the sample started.  An inpainting denoiser (9 input channels) sees ``[x, m, masked]``
    instead, and nothing is restored.

    Attributes:
        latents: Clean scaled latents, (b, c, y, x) or (1, c, y, x).
        mask: 1 where to repaint, (b, 1, y, x) or (1, 1, y, x), in 0..1, at the latents' size; see :func:`encode_masks`.
        strength: Fraction of the steps to take; 1 starts from pure noise, 0 returns the latents.
        masked_latents: Latents of the image with the masked part in grey, for inpainting denoisers only.

    Reference:
        A. Lugmayr et al., "RePaint: Inpainting using Denoising Diffusion Probabilistic Models", 2022, equation 8.
    """

    latents: Float[Tensor, "b c y x"]
    mask: Float[Tensor, "b 1 y x"]
    strength: float = 1.0
    masked_latents: Float[Tensor, "b c y x"] | None = None

    def __post_init__(self) -> None:
        _check_strength(self.strength)
        if not bool(self.mask.clamp(0, 1).eq(self.mask).all()):
            raise UserError(
                f"Expected a mask in 0..1, got {float(self.mask.min()):g}..{float(self.mask.max()):g}; "
                "1 is repainted, 0 is kept."
            )

    @classmethod
    def from_images(cls, pipe: Pipeline, images: Pictures, masks: Pictures, strength: float = 1.0) -> FromMask:
        """Encode images and masks (white is repainted), one mask per image."""
        if len(images) != len(masks):
            raise UserError(f"Expected one mask per image, got {len(images)} images and {len(masks)} masks.")
        x, m = _pixels(pipe, images), _mask_pixels(pipe, masks)
        masked = _encode(pipe, x * (m < 0.5)) if _is_inpainting(pipe) else None
        return cls(_encode(pipe, x), _shrink(pipe, m), strength, masked)

    def begin(self, pipe: Pipeline, noise: Float[Tensor, "b c y x"], num_steps: int) -> Trajectory:
        _check_channels(pipe, noise.shape[1], masked=True)
        known = _like_noise(self.latents, noise, "latents")
        mask = _like_noise(self.mask, noise[:, :1], "mask")
        timesteps = _cut_timesteps(pipe.scheduler, self.strength, num_steps)
        if self.strength < 1:
            x = _noised(pipe.scheduler, known, noise, timesteps)
        else:  # as in diffusers: img2img at strength 1 keeps a trace of the image, inpainting none
            x = noise * pipe.scheduler.init_noise_sigma
        if not _is_inpainting(pipe):
            return _RestoredTrajectory(x, timesteps, pipe.scheduler, known, mask, noise)
        if self.masked_latents is None:
            raise UserError("Expected masked_latents for an inpainting denoiser, got none; use FromMask.from_images.")
        return _MaskedTrajectory(x, timesteps, mask, _like_noise(self.masked_latents, noise, "masked_latents"))

    def at(self, index: slice | Tensor) -> FromMask:
        masked = None if self.masked_latents is None else _at(self.masked_latents, index)
        latents, mask = _at(self.latents, index), _at(self.mask, index)
        return dataclasses.replace(self, latents=latents, mask=mask, masked_latents=masked)


class _RestoredTrajectory(Trajectory):
    """Inpainting with an ordinary denoiser."""

    def __init__(
        self, x: Tensor, timesteps: Tensor, scheduler: Any, known: Tensor, mask: Tensor, noise: Tensor
    ) -> None:
        super().__init__(x, timesteps)
        self.scheduler, self.known, self.mask, self.noise = scheduler, known, mask, noise

    def after_step(self, x: Tensor, step: int) -> Tensor:
        known = _noised(self.scheduler, self.known, self.noise, self.timesteps[step + 1 :])
        return (1 - self.mask) * known + self.mask * x


class _MaskedTrajectory(Trajectory):
    """Inpainting with a denoiser that sees the mask and the masked image."""

    def __init__(self, x: Tensor, timesteps: Tensor, mask: Tensor, masked: Tensor) -> None:
        super().__init__(x, timesteps)
        self.extra = torch.cat([mask, masked], dim=1)

    def model_input(self, x_in: Tensor) -> Tensor:
        return torch.cat([x_in, torch.cat([self.extra] * (len(x_in) // len(self.extra)))], dim=1)


def steps_taken(strength: float, num_steps: int) -> int:
    """Return the number of steps of a start part of the way, rounded down as in diffusers.

    >>> steps_taken(0.5, 25)
    12
    """
    return int(num_steps * strength)


def _cut_timesteps(scheduler: Any, strength: float, num_steps: int) -> Tensor:
    """Return the last :func:`steps_taken` timesteps."""
    steps = steps_taken(strength, num_steps)
    if steps < 1 and strength > 0:
        raise UserError(
            f"Expected strength * num_steps of at least 1, got {strength} * {num_steps}; raise one of them."
        )
    begin = (num_steps - steps) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:] if steps else scheduler.timesteps[:0]


def _noised(scheduler: Any, known: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Noise latents to the first of these timesteps, if there is one."""
    return scheduler.add_noise(known, noise, timesteps[:1].repeat(len(known))) if len(timesteps) else known


def _at(value: Tensor, index: slice | Tensor) -> Tensor:
    return value if len(value) == 1 else value[index]


def _like_noise(value: Tensor, noise: Tensor, what: str) -> Tensor:
    """Expand a value to one per sample, on the device of the noise."""
    if value.shape[1:] != noise.shape[1:] or len(value) not in (1, len(noise)):
        raise UserError(
            f"Expected {what} of shape {tuple(noise.shape)} (or 1 for all samples), got {tuple(value.shape)}; "
            "encode_images and encode_masks make them from pictures."
        )
    return value.to(noise).expand(len(noise), -1, -1, -1)


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise UserError(f"Expected a strength in 0..1, got {strength}; 0 keeps the image, 1 forgets it.")


def _is_inpainting(pipe: Pipeline) -> bool:
    return pipe.unet.config.in_channels == 2 * pipe.vae.config.latent_channels + 1


def _check_channels(pipe: Pipeline, channels: int, *, masked: bool) -> None:
    found = pipe.unet.config.in_channels
    if found != channels and not (masked and _is_inpainting(pipe)):
        raise UserError(
            f"Expected a denoiser of {channels} input channels, got {found}; "
            f"an inpainting one ({2 * channels + 1}) needs start=FromMask(...)."
        )


@dataclasses.dataclass(frozen=True)
class ImageStart:
    """An image to start from, opened when its batch is sampled; see :class:`FromImage`.

    Attributes:
        image: Opens it.
        digest: Identifies its pixels in records.
    """

    image: Callable[[], Image.Image] = dataclasses.field(compare=False)
    digest: str


def begin_with(pipe: Pipeline, starts: Sequence[ImageStart], strength: float) -> FromImage:
    """Open and encode the images of a batch, resized and cropped to the pipeline's size."""
    size = int(pipe.unet.config.sample_size * pipe.vae_scale_factor)
    return FromImage(encode_images(pipe, [fit_image(s.image(), size) for s in starts]), strength)


def encode_images(pipe: Pipeline, images: Pictures) -> Float[Tensor, "b c y x"]:
    """Encode RGB images of the pipeline's size to scaled latents: the mean of the VAE's posterior."""
    return _encode(pipe, _pixels(pipe, images))


def encode_masks(pipe: Pipeline, masks: Pictures) -> Float[Tensor, "b 1 y x"]:
    """Threshold masks at half and shrink them to the latents' size (nearest), as in diffusers; 1 is repainted."""
    return _shrink(pipe, _mask_pixels(pipe, masks))


def _encode(pipe: Pipeline, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c y x"]:
    """Encode images one by one, so that no latent depends on the batch."""
    return torch.cat([encode_pixels(pipe.vae, image[None]) for image in x])


def _pixels(pipe: Pipeline, images: Pictures) -> Float[Tensor, "b 3 h w"]:
    return to_float(np.stack([_array(image, "RGB", pipe) for image in images]))


def _mask_pixels(pipe: Pipeline, masks: Pictures) -> Float[Tensor, "b 1 h w"]:
    pixels = np.stack([_array(mask, "L", pipe) for mask in masks])
    return (torch.from_numpy(pixels)[:, None].float() / 255 >= 0.5).float()


def _shrink(pipe: Pipeline, mask: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 y x"]:
    return F.interpolate(mask, size=(pipe.unet.config.sample_size,) * 2)


def _array(picture: Image.Image | NDArray[Any], mode: str, pipe: Pipeline) -> NDArray[np.uint8]:
    """Return a picture as a uint8 array, after checking its mode, depth and size."""
    what, channels = ("an RGB image", (3,)) if mode == "RGB" else ("a grey mask", ())
    array = np.asarray(picture)
    found = picture.mode if isinstance(picture, Image.Image) else f"shape {array.shape}"
    array = array.astype(np.uint8) * 255 if array.dtype == bool else array
    if array.dtype != np.uint8:
        raise UserError(f"Expected {what} of 8 bits, got {array.dtype}; scale it to 0..255 first.")
    if array.ndim < 2 or array.shape[2:] != channels or found in ("P", "HSV", "LAB", "YCbCr"):
        raise UserError(f"Expected {what}, got {found}; use image.convert('{mode}').")
    size = int(pipe.unet.config.sample_size * pipe.vae_scale_factor)
    if array.shape[:2] != (size, size):
        h, w = array.shape[:2]
        raise UserError(f"Expected {what} of {size}x{size} pixels, got {w}x{h}; resize or crop it first.")
    return array
