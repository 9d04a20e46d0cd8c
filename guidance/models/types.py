"""What the library needs of a diffusers pipeline and of its denoiser, as protocols."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable


@runtime_checkable
class Pipeline(Protocol):
    """A diffusers pipeline, or anything of its shape: a scheduler, and a ``unet`` or a ``transformer``.

    Other parts (``vae``, ``tokenizer``, ``text_encoder``, ...) are asked for where a function needs them.
    """

    scheduler: Any

    if TYPE_CHECKING:  # at run time a pipeline need not define it

        def __getattr__(self, name: str) -> Any: ...


@runtime_checkable
class Denoiser(Protocol):
    """A UNet or transformer of diffusers: ``f(sample, timestep, **conditions)``, with its configuration."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Predict eps, v, x0 or a velocity, by the scheduler's ``prediction_type``."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
