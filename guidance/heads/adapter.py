"""Adapters: small networks that predict the direction of mid-u guidance, so that sampling needs no backward pass.

An adapter's config names the model it was trained on and the sum of heads that was its teacher.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from guidance.heads.folder import SavedModel
from guidance.heads.hub import adapter_card
from guidance.heads.networks import TimeFilm
from guidance.models.denoiser import latent_channels
from guidance.schedule import NoiseSchedule
from guidance.utils.errors import UserError

FORMAT_VERSION = 1

_LIMIT = 10.0  # of standardised inputs: near pure noise an eps model's x0 is a hundred times too large


@dataclasses.dataclass
class AdapterConfig:
    """An adapter's network, and what it was trained on.

    Attributes:
        channels: Channels of the latents.
        width, depth: Channels and number of the residual blocks.
        patch: The blocks run on squares of this side in pixels of the latents.
        base_model, base_fingerprint: The diffusion model: its name, and
            :func:`guidance.models.denoiser.fingerprint` of its weights.
        prediction_type, num_train_timesteps: Its parameterisation and number of timesteps.
        timesteps: Lowest and highest timestep trained on, inclusive.
        start, stop: Fractions of the sampling steps in which the teacher guides.
        teacher: One dict per head: folder, fingerprint, objective, target and scale.
        metrics: Held-out cosine between predicted and true direction: "cosine", and "bins" by timestep.
        format_version: Version of this format.
    """

    channels: int = 4
    width: int = 16
    depth: int = 2
    patch: int = 1  # in files without the key
    base_model: str = ""
    base_fingerprint: str = ""
    prediction_type: str = "epsilon"
    num_train_timesteps: int = 1000
    timesteps: list[int] = dataclasses.field(default_factory=lambda: [0, 999])
    start: float = 0.0
    stop: float = 1.0
    teacher: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("channels", "width", "depth", "patch"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"Expected {name} of at least 1, got {getattr(self, name)}; width 16, depth 2, patch 2 is usual."
                )
        if not 0 <= self.start < self.stop <= 1:
            raise UserError(f"Expected 0 <= start < stop <= 1, got start={self.start}, stop={self.stop}.")


class AdapterBlock(nn.Module):
    """Residual block ``x + conv(silu(h + W mean(h)))`` with ``h = conv(silu(film(x)))``.

    Through the mean over all positions one block sees the whole picture, whatever its size.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.everywhere = nn.Linear(width, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "b w y x"], film: tuple[Tensor, Tensor]) -> Float[Tensor, "b w y x"]:
        """Return the block's output; ``film`` is (scale, shift), each (b, w)."""
        scale, shift = (rearrange(v, "b w -> b w 1 1") for v in film)
        h = self.conv1(F.silu(x * (1 + scale) + shift))
        h = h + rearrange(self.everywhere(h.mean((2, 3))), "b w -> b w 1 1")
        return x + self.conv2(F.silu(h))


class Adapter(SavedModel):
    """Predict the direction that raises the teacher's score from inputs and outputs of a denoiser call.

    ``f(x_t, eps, x0, t) ~ d``, the gradient of ``sum_i s_i log p_i(y | x_t)`` with respect to the model input, scaled
    to RMS 1 per sample.  Fully convolutional; computes in float32 whatever the dtype of its inputs.

    Args:
        config: ``channels``, ``width``, ``depth`` and ``patch`` shape the network.

    Reference:
        Teacher: J. Whitaker, "Mid-U Guidance", 2023.  Folding guidance into a small trained part: Jensen and Sadat,
        "Adapter Guidance Distillation", TMLR 2025 (there of classifier-free guidance).
    """

    noun = "adapter"
    weights_file = "adapter.safetensors"
    config_class = AdapterConfig
    required_keys = frozenset({"channels", "width", "depth"})
    training_command = "python -m train.amortise"

    input_mean: Tensor
    input_std: Tensor

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        width, inputs = config.width, 3 * config.channels
        self.register_buffer("input_mean", torch.zeros(inputs))
        self.register_buffer("input_std", torch.ones(inputs))
        self.first = nn.Conv2d(inputs * config.patch**2, width, 3, padding=1)
        self.blocks = nn.ModuleList(AdapterBlock(width) for _ in range(config.depth))
        self.last = nn.Conv2d(width, config.channels * config.patch**2, 3, padding=1)
        self.film = TimeFilm([width] * config.depth, config.num_train_timesteps)

    def forward(
        self,
        x_t: Float[Tensor, "b c y x"],
        eps: Float[Tensor, "b c y x"],
        x0: Float[Tensor, "b c y x"],
        t: Float[Tensor, " b"] | float,
    ) -> Float[Tensor, "b c y x"]:
        """Predict the direction, float32, of about unit RMS: the guide scales it to exactly that.

        Args:
            x_t: Input of the denoiser (after ``scale_model_input``), any spatial size and dtype.
            eps: Conditional prediction as noise.
            x0: Clean latents that ``eps`` implies.
            t: Timesteps 0..num_train_timesteps - 1, a number or shape (b,).

        Raises:
            UserError: If the latents have another number of channels.
        """
        if x_t.ndim != 4 or x_t.shape[1] != self.config.channels:
            raise UserError(
                f"Expected latents of shape (b, {self.config.channels}, y, x), got {tuple(x_t.shape)}; the "
                f"adapter was trained on {self.config.base_model or 'another model'}."
            )
        mean, std = (rearrange(v, "c -> c 1 1") for v in (self.input_mean, self.input_std))
        with torch.autocast(x_t.device.type, enabled=False):
            inputs = torch.cat([x_t.float(), eps.float(), x0.float()], dim=1).contiguous()
            patch, (y, x) = self.config.patch, x_t.shape[2:]
            inputs = ((inputs - mean) / std).clamp(-_LIMIT, _LIMIT)
            if y % patch or x % patch:  # pad to a multiple of the patch
                inputs = F.pad(inputs, (0, -x % patch, 0, -y % patch), mode="replicate")
            h = self.first(F.pixel_unshuffle(inputs, patch))
            films = self.film(torch.as_tensor(t, device=h.device).float().expand(len(h)))
            for block, film in zip(self.blocks, films, strict=True):
                h = block(h, film)
            return F.pixel_shuffle(self.last(F.silu(h)), patch)[:, :, :y, :x]

    def card(self, name: str) -> str:
        """See :func:`guidance.heads.hub.adapter_card`."""
        return adapter_card(self, name)

    @torch.no_grad()
    def standardize(self, *inputs: Float[Tensor, "b c y x"]) -> None:
        """Set the mean and deviation of each input channel from a sample of ``(x_t, eps, x0)``."""
        values = torch.cat(inputs, dim=1).float()
        self.input_mean.copy_(values.mean((0, 2, 3)))
        self.input_std.copy_(values.std((0, 2, 3)).clamp(min=1e-4))


def direction_loss(
    predicted: Float[Tensor, "b c y x"], wanted: Float[Tensor, "b c y x"], mse_weight: float = 0.1
) -> Float[Tensor, ""]:
    """Mean of ``1 - cos(predicted, wanted) + w |predicted - wanted|^2 / n`` over the samples with a direction.

    >>> direction_loss(torch.ones(2, 1, 1, 2), torch.tensor([[[[1.0, -1.0]]], [[[0.0, 0.0]]]]), mse_weight=0.5)
    tensor(2.)
    """
    predicted, wanted = predicted.flatten(1), wanted.flatten(1)
    has_direction = wanted.any(1)
    loss = 1 - F.cosine_similarity(predicted, wanted) + mse_weight * (predicted - wanted).square().mean(1)
    return (loss * has_direction).sum() / has_direction.sum().clamp(min=1)


def build_adapter(config: AdapterConfig, seed: int = 0) -> Adapter:
    """Build an untrained adapter; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Adapter(config)


def save_adapter(adapter: Adapter, folder: str | os.PathLike[str], card: str = "", **texts: str) -> None:
    """Save an adapter as a folder that :func:`load_adapter` reads; see :meth:`SavedModel.save_pretrained`."""
    adapter.save_pretrained(folder, card=card or None, **texts)


def load_adapter(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Adapter:
    """Load an adapter from a folder or the hub, frozen and in eval mode; see :meth:`SavedModel.from_pretrained`."""
    return Adapter.from_pretrained(path, device, revision=revision, local_files_only=local_files_only)


def check_adapter_fits(
    adapter: Adapter, unet: nn.Module, schedule: NoiseSchedule, fingerprint: str | None = None
) -> None:
    """Check that an adapter can guide this model.

    Args:
        adapter: The adapter.
        unet: The denoiser it is to guide.
        schedule: The denoiser's noise schedule.
        fingerprint: :func:`guidance.models.denoiser.fingerprint` of the denoiser; one that differs from the adapter's
            only warns, as for heads.

    Raises:
        UserError: If latent channels, prediction type or number of timesteps differ.
    """
    schedule.require_timesteps("an adapter")
    channels, wanted = latent_channels(unet), adapter.config.channels
    if channels != wanted:
        raise UserError(f"Expected latents of {wanted} channels, got {channels}{adapter.advise_training()}")
    adapter.check_base(schedule, fingerprint, gives="directions")
