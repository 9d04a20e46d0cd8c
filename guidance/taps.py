"""Taps: where features are read.  The only code of the library that touches hooks.

Three things can be done at a tap (default: the output of the UNet's mid-block):

* :func:`capture` reads features while a model runs as it always does;
* :func:`encode_features` stops the forward at the tap: the blocks after it never run;
* :func:`forward_with_gradient` runs **one** forward in which the features are scored at the tap, the gradient with
  respect to the model's input is taken right there, the graph is dropped, and the rest runs without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from guidance.errors import UserError, nearest
from guidance.lockstep import plain

MID_BLOCK = "mid_block"

#: Taps that are no module: the prediction of x0, its gradient carried through the denoiser or not.
X0, X0_THROUGH_UNET = "x0", "x0/unet"

#: ``f(model output, x, through) -> x0`` of the conditional part, see :func:`forward_with_gradient`.
PredictX0 = Callable[[Any, Tensor, bool], Tensor]

#: ``f(features by tap) -> d score / d features by tap``, for :func:`forward_with_gradient`.
FeatureGradient = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class _Stop(BaseException):
    """Raised by a hook to leave a forward early; never seen outside of this module."""


def resolve_tap(model: nn.Module, tap: str = MID_BLOCK) -> nn.Module:
    """Find the module whose output is read.

    Args:
        model: Denoiser, for example ``pipe.unet``.
        tap: Dotted name as in ``model.named_modules()``, for example "mid_block" or "up_blocks.0".

    Raises:
        UserError: If the model has no such module.
    """
    try:
        module = model.get_submodule(tap)
    except AttributeError:
        module = None
    if module is None or module is model:
        names = [n for n, _ in model.named_modules() if n and n.count(".") < 2]
        raise UserError(f"Expected a tap that {type(model).__name__} has, got '{tap}'.{nearest(tap, names)}")
    return module


@contextmanager
def _hooks(model: nn.Module, hooks: dict[str, Callable[[nn.Module, Any, Any], Any]]) -> Iterator[None]:
    """Register forward hooks by tap name and remove them however the block is left."""
    handles = []
    try:
        for tap, hook in hooks.items():
            handles.append(resolve_tap(model, tap).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _features(output: Any) -> Tensor:
    """The feature tensor of a block's output: blocks return a tensor or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


def prediction_of(output: Any) -> Tensor:
    """The prediction in a denoiser's output: of a tuple the first entry, else its ``sample``."""
    return output[0] if isinstance(output, tuple) else output.sample


@contextmanager
def capture(model: nn.Module, taps: Sequence[str] = (MID_BLOCK,)) -> Iterator[dict[str, Tensor]]:
    """Read features while the model runs unchanged.

    Args:
        model: Denoiser.
        taps: Names of the modules to read.

    Yields:
        A dict that holds, after each forward, the latest output of every tap (detached).

    Example:
        >>> from torch import nn, zeros
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> with capture(net, ["0"]) as features:
        ...     _ = net(zeros(2, 3))
        >>> features["0"].shape
        torch.Size([2, 4])
    """
    store: dict[str, Tensor] = {}

    def hook_for(tap: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            store[tap] = _features(output).detach()

        return hook

    with _hooks(model, {tap: hook_for(tap) for tap in taps}):
        yield store


@torch.no_grad()
def encode_features(
    model: nn.Module,
    x: Float[Tensor, "b c y x"],
    t: Tensor | float,
    text: Float[Tensor, "b n d"] | None = None,
    *,
    tap: str = MID_BLOCK,
    **kwargs: Any,
) -> Float[Tensor, "b c2 y2 x2"]:
    """Run the denoiser up to the tap and return its features; the blocks after the tap never run.

    About a third of a full forward for Stable Diffusion (32.5% of its FLOPs at 512 px).

    Args:
        model: Denoiser with the call ``model(x, t, encoder_hidden_states=...)``.
        x: Noisy latents as the model expects them (after ``scale_model_input``).
        t: Timestep(s), a number or shape (b,).
        text: Text-encoder states, None for models without text.
        tap: Name of the module to read.
        **kwargs: Passed on to the model, for example ``added_cond_kwargs``.

    Returns:
        Features, contiguous, in the model's dtype.
    """
    found: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        found.append(_features(output).detach().contiguous())
        raise _Stop

    if text is not None:
        kwargs["encoder_hidden_states"] = text
    with _hooks(model, {tap: hook}):
        try:
            model(x, t, **kwargs)
        except _Stop:
            return found[0]
    raise UserError(
        f"Expected the tap '{tap}' to run in a forward of {type(model).__name__}, but it did not."
    )


def forward_with_gradient(
    forward: Callable[[Tensor], Any],
    model: nn.Module,
    x: Float[Tensor, "b c y x"],
    taps: Sequence[str],
    feature_gradients: Sequence[FeatureGradient],
    predict_x0: PredictX0 | None = None,
) -> tuple[Any, list[Float[Tensor, "b c y x"]]]:
    """Run one forward and take gradients with respect to its input at the last tap.

    ``feature_gradients[i]`` maps features to ``d score_i / d features``; the gradient of each ``score_i`` with
    respect to ``x`` is pulled back through the encoder half only.  The graph is freed at the tap and the rest of
    the model runs without one, on the same numbers as an ordinary forward.

    Args:
        forward: ``forward(x) -> model output``; must call ``model`` exactly once.
        model: Denoiser that owns the taps; its parameters should not require gradients (saves memory).
        x: Model input; any dtype.
        taps: Names of the tapped modules; :data:`X0` and :data:`X0_THROUGH_UNET` mean the prediction of x0, and
            then gradients are taken after the forward, the latter's through the whole model.
        feature_gradients: One or more pull-back targets; see :data:`FeatureGradient`.  Features are given as
            detached, contiguous leaves (GroupNorm's CPU backward can crash on channels-last features).
        predict_x0: ``f(output, x, through) -> x0``, for the x0 taps; not ``through``: with eps held fixed.

    Returns:
        The forward's output, and one gradient (float32 or float64, shape of ``x``) per feature gradient.

    Raises:
        UserError: Under ``torch.inference_mode``, where no gradient can be taken.
    """
    if torch.is_inference_mode_enabled():
        raise UserError(
            "Expected gradients to be possible, but torch.inference_mode is on; use torch.no_grad() around the "
            "sampling call instead (diffusers pipelines do so themselves)."
        )
    leaf = x.detach().clone().requires_grad_(True)
    live: dict[str, Tensor] = {}
    gradients: list[Tensor] = []
    modules = [tap for tap in dict.fromkeys(taps) if tap not in (X0, X0_THROUGH_UNET)]
    at_the_end = len(modules) < len(set(taps))

    def finish() -> None:
        store = {tap: h.detach().contiguous() for tap, h in live.items()}
        for i, target in enumerate(feature_gradients):
            wanted = target(store)
            last = i == len(feature_gradients) - 1
            gradients.append(_pull_back(live, wanted, leaf, retain=not last))
        live.clear()

    def hook_for(tap: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            h = _features(output)
            live[tap] = plain(h)
            if len(live) < len(modules) or X0_THROUGH_UNET in taps:
                return None
            if not at_the_end:
                finish()
            torch.set_grad_enabled(False)  # for the rest of this forward; the enclosing context restores it
            return (h.detach(), *output[1:]) if isinstance(output, tuple) else h.detach()

        return hook

    needs_graph = bool(modules) or X0_THROUGH_UNET in taps
    with _hooks(model, {tap: hook_for(tap) for tap in modules}), torch.set_grad_enabled(needs_graph):
        output = forward(leaf)
        if at_the_end and predict_x0 is not None and len(live) == len(modules):
            with torch.enable_grad():
                virtual = [tap for tap in (X0, X0_THROUGH_UNET) if tap in taps]
                live |= {tap: predict_x0(output, leaf, tap == X0_THROUGH_UNET) for tap in virtual}
            finish()
    if not gradients:
        raise UserError(
            f"Expected the taps {', '.join(taps)} to run in one forward of {type(model).__name__}."
        )
    return output, gradients


def _pull_back(live: dict[str, Tensor], wanted: dict[str, Tensor], leaf: Tensor, *, retain: bool) -> Tensor:
    """``sum_tap J_tap^T wanted_tap``; half precision is scaled to unit size on the way, so nothing underflows."""
    taps = [tap for tap in wanted if live[tap].requires_grad]
    precise = torch.float64 if leaf.dtype == torch.float64 else torch.float32
    if not taps:
        return torch.zeros_like(leaf, dtype=precise)
    scale: Tensor | float = 1.0
    if leaf.dtype in (torch.float16, torch.bfloat16):
        peak = torch.stack([wanted[t].detach().flatten(1).abs().amax(1) for t in taps]).amax(0)
        scale = torch.where(peak > 0, peak, 1.0).to(precise)
    outs = [live[t] for t in taps]
    vectors = [(wanted[t] / _like(scale, wanted[t])).to(live[t].dtype) for t in taps]
    (g,) = torch.autograd.grad(outs, leaf, vectors, retain_graph=retain)
    return g.to(precise) * _like(scale, g)


def _like(scale: Tensor | float, x: Tensor) -> Tensor | float:
    return scale.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(scale, Tensor) else scale
