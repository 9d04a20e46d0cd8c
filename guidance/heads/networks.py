"""Networks of heads: convolutional (the report's), linear, attention, multi-scale; optionally conditioned on time.

All of them read features of any spatial size, from one tap or joined from several.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from guidance.heads.config import HeadConfig
from guidance.heads.folder import SavedModel
from guidance.heads.hub import head_card
from guidance.heads.tasks import get_task
from guidance.schedule import NoiseSchedule, timestep_bins
from guidance.taps.hooks import split_taps, tap_channels
from guidance.utils.errors import UserError, nearest


class TimeFilm(nn.Module):
    """Sinusoidal embedding of the timestep, mapped to one (scale, shift) per modulated layer (FiLM).

    The last layers start at zero, so a new head ignores the timestep.

    Reference:
        Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018.
    """

    def __init__(self, channels: Sequence[int], num_train_timesteps: int, width: int = 128) -> None:
        super().__init__()
        self.steps_to_1000 = 1000 / num_train_timesteps
        frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.embed = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.layers = nn.ModuleList(nn.Linear(width, 2 * c) for c in channels)
        for layer in self.layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Float[Tensor, " b"]) -> list[tuple[Tensor, Tensor]]:
        """Return (scale, shift) of shape (b, c) for each modulated layer."""
        angles = t[:, None] * self.steps_to_1000 * self.frequencies
        embedding = self.embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        return [tuple(layer(embedding).chunk(2, dim=1)) for layer in self.layers]


def _modulate(x: Tensor, film: tuple[Tensor, Tensor] | None) -> Tensor:
    """Scale and shift the channels of x, (b, c, ...); None changes nothing."""
    if film is None:
        return x
    shape = "b c -> b c" + " 1" * (x.ndim - 2)
    return x * (1 + rearrange(film[0], shape)) + rearrange(film[1], shape)


class Head(SavedModel):
    """Base of all heads: standardise the features, call :meth:`outputs`, divide by the temperature.

    Computes in float32 (float64 after ``.double()``) whatever the dtype of the features; an enclosing autocast lowers
    the precision in training only.

    Args:
        config: Description; ``in_channels``, ``outputs``, ``hidden``, ``time_conditioned`` shape the network.
    """

    noun = "head"
    weights_file = "head.safetensors"
    config_class = HeadConfig
    required_keys = frozenset({"kind", "in_channels"})
    training_command = "accelerate launch train/head.py"

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("feature_mean", torch.zeros(config.in_channels))
        self.register_buffer("feature_std", torch.ones(config.in_channels))
        self.standardized = get_task(config.task).standardized
        if self.standardized:
            self.register_buffer("output_mean", torch.zeros(config.outputs))
            self.register_buffer("output_std", torch.ones(config.outputs))

    @classmethod
    def build(cls, config: HeadConfig) -> Head:
        """Build the network that the config names, see :func:`build_head`."""
        return build_head(config)

    def card(self, name: str) -> str:
        """See :func:`guidance.heads.hub.head_card`."""
        return head_card(self, name)

    def _build_film(self, channels: Sequence[int]) -> None:
        config = self.config
        self.film = TimeFilm(channels, config.num_train_timesteps) if config.time_conditioned else None
        self._num_films = len(channels)

    def films(self, t: Float[Tensor, " b"]) -> list[tuple[Tensor, Tensor] | None]:
        """Return the modulation of each modulated layer, all None for a head that ignores the timestep."""
        return [None] * self._num_films if self.film is None else list(self.film(t))

    def outputs(self, h: Float[Tensor, "b c y x"], t: Float[Tensor, " b"]) -> Float[Tensor, "b outputs"]:
        """Run the network on standardised features; for subclasses."""
        raise NotImplementedError

    def forward(self, h: Float[Tensor, "b c y x"], t: Float[Tensor, " b"] | float) -> Float[Tensor, "b outputs"]:
        """Predict from features.

        Args:
            h: Features of the tap, any spatial size, any dtype and memory layout.
            t: Timesteps 0..num_train_timesteps - 1, a number or shape (b,).

        Returns:
            Logits, already divided by the temperature of their timestep; target units for regression.

        Raises:
            UserError: If the features have another number of channels.
        """
        if h.ndim != 4 or h.shape[1] != self.config.in_channels:
            raise UserError(
                f"Expected features of shape (b, {self.config.in_channels}, y, x), got {tuple(h.shape)}; "
                f"the head was trained on '{self.config.tap}' of {self.config.base_model or 'another model'}."
            )
        dtype = self.feature_mean.dtype
        t = torch.as_tensor(t, device=h.device).to(dtype).expand(len(h))
        mean, std = (rearrange(x, "c -> 1 c 1 1") for x in (self.feature_mean, self.feature_std))
        lower = self.training and torch.is_autocast_enabled(h.device.type)
        with torch.autocast(h.device.type, enabled=lower):
            # channels-last features can crash the backward of torch's CPU kernels
            out = self.outputs((h.to(dtype).contiguous() - mean) / std, t).to(dtype)
        if self.standardized:
            return out * self.output_std + self.output_mean
        return out / self.temperature(t)[:, None] if self.config.temperature else out

    def temperature(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return the temperature of each timestep's bin; 1 for an uncalibrated head."""
        if not self.config.temperature:
            return torch.ones_like(t)
        return t.new_tensor(self.config.temperature)[timestep_bins(t, self.config.num_train_timesteps)]


HEADS: dict[str, type[Head]] = {}


def register_head(kind: str) -> Callable[[type[Head]], type[Head]]:
    """Enter a network in :data:`HEADS`; ``kind=KIND`` then trains it."""

    def enter(cls: type[Head]) -> type[Head]:
        HEADS[kind] = cls
        return cls

    return enter


def find_network(kind: str) -> type[Head]:
    """Return the class of a kind of head.

    Raises:
        UserError: If there is none.
    """
    if kind not in HEADS:
        raise UserError(f"Expected a known kind of head, got '{kind}'.{nearest(kind, HEADS)}")
    return HEADS[kind]


@register_head("conv")
class ConvHead(Head):
    """The report's head; with ``time_conditioned=False`` and ``hidden=256`` it is the report's bit for bit.

    Conv C->256 3x3, ReLU, max pool 2, conv 256->128 3x3, ReLU, average pool to 2x2, linear 512->64, ReLU,
    linear 64->10.
    Time conditioning modulates the output of each convolution (:class:`TimeFilm`).

    Reference:
        J. Whitaker, "Mid-U Guidance: Fast Classifier Guidance for Latent Diffusion Models", 2023.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        width = config.hidden
        self.layers = nn.Sequential(
            nn.Conv2d(config.in_channels, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d((2, 2)),
            nn.Flatten(),
            nn.Linear(4 * (width // 2), 64),
            nn.ReLU(),
            nn.Linear(64, config.outputs),
        )
        self._build_film((width, width // 2))

    def outputs(self, h: Float[Tensor, "b c y x"], t: Float[Tensor, " b"]) -> Float[Tensor, "b outputs"]:
        """Predict from standardised features; a map one pixel wide is not pooled any further."""
        films = iter(self.films(t))
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d) and min(h.shape[-2:]) < 2:
                continue
            h = layer(h)
            if isinstance(layer, nn.Conv2d):
                h = _modulate(h, next(films))
        return h


@register_head("linear")
class LinearHead(Head):
    """Global average pool and one linear layer: the cheapest probe of a tap."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.in_channels, config.outputs)
        self._build_film((config.in_channels,))

    def outputs(self, h: Float[Tensor, "b c y x"], t: Float[Tensor, " b"]) -> Float[Tensor, "b outputs"]:
        """Predict from standardised features."""
        return self.linear(_modulate(h.mean((2, 3)), self.films(t)[0]))


@register_head("attention")
class AttentionHead(Head):
    """Attention pooling with one learned query per attention head, then a two-layer network."""

    num_heads = 4

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        width = config.hidden
        if width % self.num_heads:
            raise UserError(f"Expected 'hidden' to be a multiple of {self.num_heads}, got {width}.")
        self.embed = nn.Conv2d(config.in_channels, width, 1)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(0.02 * torch.randn(self.num_heads, 1, width // self.num_heads))
        self.key_value = nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.outputs))
        self._build_film((width,))

    def outputs(self, h: Float[Tensor, "b c y x"], t: Float[Tensor, " b"]) -> Float[Tensor, "b outputs"]:
        """Predict from standardised features."""
        tokens = _modulate(self.embed(h), self.films(t)[0])
        tokens = self.norm(rearrange(tokens, "b c y x -> b (y x) c").contiguous())
        split = "b n (two k d) -> two b k n d"
        key, value = rearrange(self.key_value(tokens), split, two=2, k=self.num_heads)
        query = self.query.to(key.dtype).expand(len(h), -1, -1, -1)
        pooled = F.scaled_dot_product_attention(query, key, value)
        return self.mlp(rearrange(pooled, "b k 1 d -> b (k d)"))


@register_head("multiscale")
class MultiScaleHead(Head):
    """Projection of every position, GELU and global average for each tap; a two-layer network on all of them.

    ``out = W2 gelu(W1 [mean_yx gelu(P_k h_k + b_k)]_k)``.  No tap drowns another, whatever their channels; the
    nonlinearity before the average keeps what an average of the features would lose (how much they vary).
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        width, taps = config.hidden, config.channels
        self.embed = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in taps)
        self.mlp = nn.Sequential(nn.Linear(len(taps) * width, width), nn.GELU(), nn.Linear(width, config.outputs))
        self._build_film([width] * len(taps))

    def outputs(self, h: Float[Tensor, "b c y x"], t: Float[Tensor, " b"]) -> Float[Tensor, "b outputs"]:
        """Predict from standardised features."""
        maps = h.split(self.config.channels, dim=1)
        each = zip(self.embed, maps, self.films(t), strict=True)
        pooled = [F.gelu(_modulate(embed(part), film)).mean((2, 3)) for embed, part, film in each]
        return self.mlp(torch.cat(pooled, dim=1))


def build_head(config: HeadConfig) -> Head:
    """Build an untrained head.

    Raises:
        UserError: If ``config.kind`` is unknown; the message lists the choices.
    """
    return find_network(config.kind)(config)


def save_head(head: Head, folder: str | os.PathLike[str]) -> None:
    """Save a head as a folder that :func:`load_head` reads; see :meth:`SavedModel.save_pretrained`."""
    head.save_pretrained(folder)


def load_head(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Head:
    """Load a head from a folder or the hub, frozen and in eval mode; see :meth:`SavedModel.from_pretrained`."""
    return Head.from_pretrained(path, device, revision=revision, local_files_only=local_files_only)


def check_fits(head: Head, unet: nn.Module, schedule: NoiseSchedule, fingerprint: str | None = None) -> None:
    """Check that a head can read this model.

    Args:
        head: The head.
        unet: The denoiser it is to guide.
        schedule: The denoiser's noise schedule.
        fingerprint: :func:`guidance.models.denoiser.fingerprint` of the denoiser; one that differs from the head's
            only warns, since fine-tuned descendants of a model share its features to some extent.

    Raises:
        UserError: If a tap, its channels, prediction type or number of timesteps differ.
    """
    config = head.config
    schedule.require_timesteps("a head")
    found = tap_channels(unet, config.tap)
    for tap, wanted, channels in zip(split_taps(config.tap), config.channels, found, strict=True):
        if channels not in (None, wanted):
            raise UserError(
                f"Expected {wanted} channels at '{tap}', but {type(unet).__name__} has {channels} there"
                f"{head.advise_training()}"
            )
    head.check_base(schedule, fingerprint, gives="scores")
