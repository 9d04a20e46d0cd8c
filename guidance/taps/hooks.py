"""Read features at taps and take gradients there.  The only code of the library that touches hooks.

A tap (default: the output of the UNet's mid-block) allows three things:

* :func:`capture` reads features while a model runs unchanged;
* :func:`encode_features` stops the forward at the tap: the blocks after it never run;
* :func:`forward_with_gradient` runs **one** forward in which the features are scored at the tap, the gradient with
  respect to the model's input is taken right there, the graph is dropped, and the rest runs without a graph.

A tap is the name of a module, or several joined by "+" ("down_blocks.2+mid_block": see
:func:`guidance.taps.features.join_maps`).  Features are maps (b, c, y, x), of transformers too.  Supported are all
UNets; DiT, PixArt and SD3, whose tokens are laid out on the patch grid of the input; Flux, whose grid is read from the
position ids.  Tokens that are not patches (text, attention inside a UNet's block) are refused.

    python -m guidance.taps MODEL     # lists the taps of a model, see guidance/taps/table.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from guidance.taps.features import (
    MID_BLOCK,
    Grid,
    detached,
    join_by_tap,
    patch_grid,
    pull_back,
    read_output,
    resolve_tap,
    split_taps,
)
from guidance.taps.lockstep import as_batch, as_parts, plain
from guidance.utils.errors import UserError

#: Taps that are not modules: the prediction of x0, with the gradient taken at x0 or through the denoiser.
X0, X0_THROUGH_UNET = "x0", "x0/unet"

#: ``f(model output, x, through) -> x0`` of the conditional part, see :func:`forward_with_gradient`.
PredictX0 = Callable[[Any, Tensor, bool], Tensor]

#: ``f(features by tap) -> d score / d features by tap``, for :func:`forward_with_gradient`.
FeatureGradient = Callable[[dict[str, Tensor]], dict[str, Tensor]]

#: ``f(output, patch grid) -> output to continue with, or None to keep it``.
Hook = Callable[[Any, Grid], Any]


class _Stop(BaseException):
    """Leave a forward early from a hook; never seen outside of this module."""


@contextmanager
def _hooks(model: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Register forward hooks by tap name and remove them however the block is left."""
    handles = []
    grid: Grid = (0, 0)

    def read_grid(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal grid
        grid = patch_grid(module, args[0])

    def call(hook: Hook, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return hook(output, grid)

    try:
        embedding = getattr(model, "pos_embed", None)
        if isinstance(embedding, nn.Module):  # a transformer: it runs before all blocks
            handles.append(embedding.register_forward_pre_hook(read_grid))
        for tap, hook in hooks.items():
            handles.append(resolve_tap(model, tap).register_forward_hook(functools.partial(call, hook)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch(model: nn.Module, taps: Sequence[str], seen: Callable[[str, Any, Grid], None]) -> Iterator[None]:
    """Call ``seen(tap, output, patch grid)`` whenever a tapped module has run; the forward is unchanged.

    Args:
        model: Denoiser.
        taps: Names of single modules.
        seen: Callback, which must return None; :func:`guidance.taps.features.read_output` reads the output.
    """
    with _hooks(model, {tap: functools.partial(seen, tap) for tap in taps}):
        yield


def prediction_of(output: Any) -> Tensor:
    """Return the prediction in a denoiser's output: the first entry of a tuple, else its ``sample``."""
    return output[0] if isinstance(output, tuple) else output.sample


@contextmanager
def capture(model: nn.Module, taps: Sequence[str] = (MID_BLOCK,)) -> Iterator[dict[str, Tensor]]:
    """Read features while the model runs unchanged.

    Args:
        model: Denoiser.
        taps: Taps to read.

    Yields:
        A dict that holds the latest features of every tap (detached) after each forward.

    Example:
        >>> from torch import nn, zeros
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> with capture(net, ["0"]) as features:
        ...     _ = net(zeros(2, 3))
        >>> features["0"].shape
        torch.Size([2, 4])
    """
    store: dict[str, Tensor] = {}
    unfinished: dict[str, dict[str, Tensor]] = {tap: {} for tap in taps}

    def seen(name: str, output: Any, grid: Grid) -> None:
        h = read_output(output, grid).detach()
        for tap, maps in unfinished.items():
            if name in split_taps(tap):
                maps[name] = h
            if len(maps) == len(split_taps(tap)):
                store.update(join_by_tap([tap], maps))
                maps.clear()

    with watch(model, _modules(taps), seen):
        yield store


def _modules(taps: Sequence[str]) -> list[str]:
    """Return the single modules that taps name, each once."""
    return list(dict.fromkeys(name for tap in taps for name in split_taps(tap)))


@torch.no_grad()
def encode_features(
    model: nn.Module,
    x: Float[Tensor, "b ..."],
    t: Tensor | float,
    text: Float[Tensor, "b n d"] | None = None,
    *,
    tap: str = MID_BLOCK,
    **kwargs: Any,
) -> Float[Tensor, "b c2 y2 x2"]:
    """Run the denoiser up to the tap and return its features; the blocks after the tap never run.

    About a third of a full forward for Stable Diffusion (32.5% of its FLOPs at 512 px).

    Args:
        model: Denoiser with the call ``model(x, timestep=t, encoder_hidden_states=...)``.
        x: Noisy latents as the model expects them (after ``scale_model_input``); for Flux packed, (b, n, c).
        t: Timestep(s) as the model expects them, a number or shape (b,).
        text: Text-encoder states, None for models without text.
        tap: Name of the module to read, or several joined by "+".
        **kwargs: Passed on to the model: ``added_cond_kwargs`` (SDXL), ``class_labels`` (DiT),
            ``pooled_projections`` (SD3, Flux), ``img_ids`` and ``txt_ids`` (Flux).

    Returns:
        Features, contiguous, in the model's dtype.
    """
    found: dict[str, Tensor] = {}
    names = _modules([tap])

    def hook_for(name: str) -> Hook:
        def hook(output: Any, grid: Grid) -> None:
            found[name] = read_output(output, grid).detach()
            if len(found) == len(names):
                raise _Stop

        return hook

    if text is not None:
        kwargs["encoder_hidden_states"] = text
    t = torch.as_tensor(t, device=x.device).expand(len(x))  # transformers take no single number
    with _hooks(model, {name: hook_for(name) for name in names}):
        try:
            model(x, timestep=t, **kwargs)
        except _Stop:
            return join_by_tap([tap], found)[tap].contiguous()
    raise UserError(f"Expected the tap '{tap}' to run in a forward of {type(model).__name__}, but it did not.")


def forward_with_gradient(
    forward: Callable[[Tensor], Any],
    model: nn.Module,
    x: Float[Tensor, "b ..."],
    taps: Sequence[str],
    feature_gradients: Sequence[FeatureGradient],
    predict_x0: PredictX0 | None = None,
    *,
    whole: bool = True,
) -> tuple[Any, list[Float[Tensor, "b ..."]]]:
    """Run one forward and take gradients with respect to its input at the last tap.

    ``feature_gradients[i]`` maps features to ``d score_i / d features``; the gradient of each ``score_i`` with
    respect to ``x`` is pulled back through the encoder half only.  The graph is freed at the tap and the rest of
    the model runs without one, on the same numbers as an ordinary forward.

    Args:
        forward: ``forward(x) -> model output``; must call ``model`` exactly once.
        model: Denoiser that owns the taps; its parameters should not require gradients (saves memory).
        x: Model input; any dtype.
        taps: Names of the tapped modules, several joined by "+"; :data:`X0` and :data:`X0_THROUGH_UNET` mean the
            prediction of x0, and then gradients are taken after the forward, the latter's through the whole model.
        feature_gradients: One or more pull-back targets; see :data:`FeatureGradient`.  Features are given as
            detached, contiguous leaves (GroupNorm's CPU backward can crash on channels-last features).
        predict_x0: ``f(output, x, through) -> x0``, for the x0 taps; not ``through``: with eps held fixed.
        whole: False stops at the last tap, unless x0 is among them; the output is None then.

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
    virtual = [tap for tap in (X0, X0_THROUGH_UNET) if tap in taps]
    real = [tap for tap in dict.fromkeys(taps) if tap not in virtual]
    modules = _modules(real)
    complete = False

    def finish(others: dict[str, Tensor]) -> None:
        with torch.enable_grad(), _saved_as_they_are():
            features = join_by_tap(real, live) | others
            store = {tap: h.detach().contiguous() for tap, h in features.items()}
            for i, target in enumerate(feature_gradients):
                last = i == len(feature_gradients) - 1
                gradients.append(pull_back(features, target(store), leaf, retain=not last))
        live.clear()

    def hook_for(name: str) -> Hook:
        def hook(output: Any, grid: Grid) -> Any:
            nonlocal complete
            if complete:  # gradient checkpointing runs the block a second time
                return None
            live[name] = plain(read_output(output, grid))
            complete = len(live) == len(modules)
            if not complete or X0_THROUGH_UNET in taps:
                return None
            if not virtual:
                finish({})
                if not whole:
                    raise _Stop
            torch.set_grad_enabled(False)  # for the rest of this forward; the enclosing context restores it
            return detached(output)

        return hook

    needs_graph = bool(modules) or X0_THROUGH_UNET in taps
    with _hooks(model, {name: hook_for(name) for name in modules}), torch.set_grad_enabled(needs_graph):
        try:
            output = forward(leaf)
        except _Stop:
            return None, gradients
        if virtual and predict_x0 is not None and len(live) == len(modules):
            with torch.enable_grad():
                others = {tap: predict_x0(output, leaf, tap == X0_THROUGH_UNET) for tap in virtual}
            finish(others)
    if not gradients:
        raise UserError(f"Expected the taps {', '.join(taps)} to run in one forward of {type(model).__name__}.")
    return output, gradients


@contextmanager
def whole_blocks(model: nn.Module) -> Iterator[None]:
    """Let a UNet's blocks run parts in step (:mod:`guidance.taps.lockstep`) as one batch where no graph is needed."""
    number: list[int] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        joined = None if torch.is_grad_enabled() else as_batch(args, kwargs)
        number.append(joined[2] if joined else 0)
        return joined[:2] if joined else None

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        parts = number.pop()
        return as_parts(output, parts) if parts else None

    named = (getattr(model, name, None) for name in ("down_blocks", "mid_block", "up_blocks"))
    blocks = [b for x in named if x is not None for b in (x if isinstance(x, nn.ModuleList) else [x])]
    handles = [b.register_forward_pre_hook(before, with_kwargs=True) for b in blocks]
    handles += [b.register_forward_hook(after) for b in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _saved_as_they_are() -> AbstractContextManager[None]:
    """Save tensors for this backward pass unchanged, even inside the hook of a checkpointed block."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


@contextmanager
def uncompiled(denoiser: nn.Module, taps: Iterable[str]) -> Iterator[None]:
    """Run the denoiser itself, whose forward is replaced, and every module that contains a tap without compilation.

    Hooks are registered anew in every step: compiled, such modules would be traced again each time (44 graphs and 40 s
    for 12 steps of a tiny DiT), and PyTorch does not guarantee that a graph sees later hooks.  Blocks beside and below
    the taps stay compiled, as by ``pipe.unet.compile_repeated_blocks()``.
    """
    paths = [name.split(".") for tap in taps for name in split_taps(tap)]
    names = {"", *(".".join(path[:n]) for path in paths for n in range(1, len(path) + 1))}
    modules = [m for name, m in denoiser.named_modules() if name in names and m._compiled_call_impl is not None]
    compiled = [m._compiled_call_impl for m in modules]
    try:
        for module in modules:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in zip(modules, compiled, strict=True):
            module._compiled_call_impl = call


def runs_compiled(denoiser: nn.Module) -> bool:
    """Tell whether any module of a denoiser is compiled in place."""
    return any(module._compiled_call_impl is not None for module in denoiser.modules())
