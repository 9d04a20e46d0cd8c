"""Protocols for a diffusers pipeline, its denoiser and its configuration: what the library needs of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from guidance.schedule import Scheduler


@runtime_checkable
class Pipeline(Protocol):
    """A diffusers pipeline, or anything of its shape: a scheduler, and a ``unet`` or a ``transformer``.

    Other parts (``vae``, ``tokenizer``, ``text_encoder``, ...) are accessed where a function needs them.
    """

    scheduler: Scheduler

    if TYPE_CHECKING:  # at run time a pipeline need not define these

        def __getattr__(self, name: str) -> Any: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@runtime_checkable
class Denoiser(Protocol):
    """A UNet or transformer of diffusers: ``f(sample, timestep, **conditions)``, with its configuration."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Predict eps, v, x0 or a velocity, by the scheduler's ``prediction_type``."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@runtime_checkable
class ModelConfig(Protocol):
    """A configuration of diffusers: a mapping whose keys are attributes too."""

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or a default for a key that is missing."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
