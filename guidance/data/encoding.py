"""Encode images and captions to features: VAE latents -> noise at t -> the encoder half of the denoiser."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from guidance.models.conditions import encode_prompts
from guidance.models.types import Denoiser, Pipeline
from guidance.schedule import NoiseSchedule
from guidance.taps.hooks import MID_BLOCK, encode_features, tap_channels
from guidance.utils.errors import UserError
from guidance.utils.images import fit_image, to_float

#: (index of the example in its split, index of the noise draw): with seed and split they determine the noise.
NoiseKey = tuple[int, int]


class FeatureEncoder:
    """Compute the features a head sees, for a fixed pipeline, tap and noise.

    The noise level and the noise of an example depend on (seed, split, example, draw) alone: not on batch
    size, order or number of processes.

    Args:
        pipe: Pipeline with ``vae``, ``unet``, ``scheduler`` and ``encode_prompt``.
        tap: Module to read, or several joined by "+".
        noise: "random" draws t uniformly from ``timesteps``; "none" reads clean latents at t = 0.
        caption: "caption" gives the model each image's caption, "empty" the empty prompt.
        timesteps: Lowest and highest t, inclusive; None for all of the schedule.
        seed: Seed of the noise.
        split: Name of the split, part of the seed.

    Raises:
        UserError: If the tap does not exist, the range is empty, or the model has no unet and text encoder.
    """

    def __init__(
        self,
        pipe: Pipeline,
        *,
        tap: str = MID_BLOCK,
        noise: Literal["random", "none"] = "random",
        caption: Literal["caption", "empty"] = "caption",
        timesteps: tuple[int, int] | None = None,
        seed: int = 0,
        split: str = "train",
    ) -> None:
        if getattr(pipe, "unet", None) is None or not hasattr(pipe, "encode_prompt"):
            raise UserError(
                f"Expected a pipeline with a unet and a text encoder, got {type(pipe).__name__}; read the features of "
                "other denoisers by guidance.encode_features, and train on those."
            )
        self.tap_channels = _known_channels(pipe.unet, tap)
        self.pipe, self.tap, self.noise, self.caption = pipe, tap, noise, caption
        self.schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
        last = 0 if noise == "none" else self.schedule.num_train_timesteps - 1
        self.timesteps = (0, last) if noise == "none" or timesteps is None else timesteps
        if not 0 <= self.timesteps[0] <= self.timesteps[1] <= last:
            raise UserError(f"Expected timesteps with 0 <= low <= high <= {last}, got {[*self.timesteps]}.")
        self.seed, self.split = seed, split
        self.image_size = int(pipe.unet.config.sample_size * pipe.vae_scale_factor)

    def latents(self, images: Sequence[Image.Image]) -> Float[Tensor, "b c y x"]:
        """Encode images to scaled latents: the mean of the VAE's posterior, float32."""
        pixels = np.stack([fit_image(image, self.image_size) for image in images])
        return encode_pixels(self.pipe.vae, to_float(pixels), torch.float32)

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> dict[str, Any]:
        """Encode captions, or as many empty prompts; see :func:`guidance.models.conditions.encode_prompts`."""
        prompts = ["" if self.caption == "empty" else text for text in captions]
        return encode_prompts(self.pipe, prompts, classifier_free=False)

    def draw_noise(self, keys: Sequence[NoiseKey], shape: Sequence[int]) -> tuple[Tensor, Float[Tensor, "b c y x"]]:
        """Draw a timestep, int64 (b,), and the noise of each example, float32, on the CPU."""
        salt = zlib.crc32(self.split.encode())
        low, high = self.timesteps
        t, eps = [], []
        for example, draw in keys:
            state = np.random.SeedSequence([self.seed, salt, example, draw]).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(state >> 1))
            t.append(torch.randint(low, high + 1, (), generator=generator))
            eps.append(torch.randn(*shape, generator=generator))
        return torch.stack(t), torch.stack(eps)

    def encode(
        self, x0: Float[Tensor, "b c y x"], text: Mapping[str, Any], keys: Sequence[NoiseKey]
    ) -> tuple[Float[Tensor, "b c2 y2 x2"], Float[Tensor, " b"]]:
        """Noise latents and read the tap.

        Args:
            x0: Clean latents.
            text: Result of :meth:`text` for the captions.
            keys: Noise key of each example.

        Returns:
            Features in the model's dtype, and timesteps (float32), both on the model's device.
        """
        unet = self.pipe.unet
        if self.noise == "none":
            t, x = torch.zeros(len(x0), device=x0.device), x0
        else:
            t, eps = (value.to(x0.device) for value in self.draw_noise(keys, x0.shape[1:]))
            x = self.schedule.add_noise(x0, eps, t)
        return encode_features(unet, x.to(unet.dtype), t, tap=self.tap, **text), t.float()


def _known_channels(unet: Denoiser, tap: str) -> list[int]:
    """Return the channels of each of several taps, which heads need; of a single tap none."""
    found = tap_channels(unet, tap)
    if len(found) == 1:
        return []
    known = [channels for channels in found if channels is not None]
    if len(known) < len(found):
        raise UserError(
            f"Expected several taps to be blocks, whose channels are known, got '{tap}'; see 'python -m guidance.taps'."
        )
    return known


@torch.no_grad()
def encode_pixels(
    vae: nn.Module, x: Float[Tensor, "b 3 h w"], dtype: torch.dtype | None = None
) -> Float[Tensor, "b c y x"]:
    """Encode images to scaled latents: the mean of the VAE's posterior, no random number drawn.

    Args:
        vae: Autoencoder; it determines device and precision.
        x: Images in -1..1, of any device and precision.
        dtype: Precision of the scaling and of the result; None for the VAE's.

    Returns:
        Latents times ``scaling_factor``, (b, c, y, x), on the VAE's device.
    """
    mean = vae.encode(x.to(vae.device, vae.dtype)).latent_dist.mode().to(dtype or vae.dtype)
    return (mean - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
