"""Read features at taps and take gradients there.  The only code of the library that touches hooks.

A tap (default: the output of the UNet's mid-block) allows three things:

* :func:`capture` reads features while a model runs unchanged;
* :func:`encode_features` stops the forward at the tap: the blocks after it never run;
* :func:`forward_with_gradient` runs **one** forward in which the features are scored at the tap, the gradient with
  respect to the model's input is taken right there, the graph is dropped, and the rest runs without a graph.

A tap is the name of a module, or several joined by "+" ("down_blocks.2+mid_block": see
:func:`guidance.taps.hooks.join_maps`).  Features are maps (b, c, y, x), of transformers too.  Supported are all
UNets; DiT, PixArt and SD3, whose tokens are laid out on the patch grid of the input; Flux, whose grid is read from the
position ids.  Tokens that are not patches (text, attention inside a UNet's block) are refused.

    python -m guidance.taps MODEL     # lists the taps of a model, see guidance/taps/table.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from guidance.taps.lockstep import as_batch, as_parts, plain
from guidance.utils.errors import UserError, nearest

MID_BLOCK = "mid_block"

#: Joins the names of modules that are read together: "down_blocks.2+mid_block".
JOIN = "+"

#: Rows and columns of a transformer's patches.
Grid = tuple[int, int]

#: Taps that are not modules: the prediction of x0, with the gradient taken at x0 or through the denoiser.
X0, X0_THROUGH_UNET = "x0", "x0/unet"

#: ``f(model output, x, through) -> x0`` of the conditional part, see :func:`forward_with_gradient`.
PredictX0 = Callable[[Any, Tensor, bool], Tensor]

#: ``f(features by tap) -> (d score / d features by tap, anything to return with it)``, for
#: :func:`forward_with_gradient`.
FeatureGradient = Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], Any]]

#: ``f(output, patch grid) -> output to continue with, or None to keep it``.
Hook = Callable[[Any, Grid], Any]


# ---- names and outputs of taps --------------------------------------------------------------------------------------
def split_taps(tap: str) -> list[str]:
    """Return the modules of a tap, in the order in which their channels are joined.

    >>> split_taps("down_blocks.2+mid_block")
    ['down_blocks.2', 'mid_block']
    """
    names = tap.split(JOIN)
    if not all(names) or len(set(names)) < len(names):
        raise UserError(
            f"Expected names of modules joined by '{JOIN}', each once, got '{tap}'; write for example "
            f"'down_blocks.2{JOIN}mid_block'."
        )
    return names


def resolve_tap(model: nn.Module, tap: str = MID_BLOCK) -> nn.Module:
    """Find the module of a tap.

    Args:
        model: Denoiser, for example ``pipe.unet``.
        tap: Dotted name as in ``model.named_modules()``, for example "mid_block" or "up_blocks.0".
    """
    try:
        module = model.get_submodule(tap)
    except AttributeError:
        module = None
    if module is None or module is model:
        names = [n for n, _ in model.named_modules() if n and n.count(".") < 2]
        raise UserError(f"Expected a tap that {type(model).__name__} has, got '{tap}'.{nearest(tap, names)}")
    return module


def tap_channels(model: nn.Module, tap: str = MID_BLOCK) -> list[int | None]:
    """Return the channels of each module of a tap, None where its attributes do not tell."""
    found: list[int | None] = []
    for name in split_taps(tap):
        module = resolve_tap(model, name)
        last = module.resnets[-1] if isinstance(getattr(module, "resnets", None), nn.ModuleList) else module
        channels = getattr(last, "out_channels", None)
        stack = name.rpartition(".")[0]
        if stack and "." not in stack and isinstance(model.get_submodule(stack), nn.ModuleList):
            channels = channels or getattr(model, "inner_dim", None)  # a block of a transformer
        found.append(channels if isinstance(channels, int) else None)
    return found


def patch_grid(embedding: nn.Module, given: Tensor) -> Grid:
    """Return the patch grid of a forward, from the input of a transformer's position embedding.

    Args:
        embedding: ``model.pos_embed``.
        given: The model's input (b, c, y, x), as in DiT and SD3, where the grid is that of its patches; or position
            ids (n, 3) of text and image, as in Flux, whose input is packed to tokens: columns 1 and 2 count rows
            and columns of the patches (a text's are 0).

    Returns:
        Rows and columns; (0, 0) where neither fits.
    """
    if given.ndim == 4:
        patch = getattr(embedding, "patch_size", 1)
        return given.shape[2] // patch, given.shape[3] // patch
    if given.ndim == 2 and given.shape[1] == 3:
        rows, columns = (given[:, 1:].float().amax(0) + 1).long().tolist()
        return rows, columns
    return 0, 0


def read_output(output: Any, grid: Grid = (0, 0)) -> Tensor:
    """Return the features in a module's output.

    Args:
        output: A tensor, or a tuple: the first counts for maps, the last on the grid for tokens (SD3 and Flux return
            text tokens before those of the image).
        grid: Rows and columns of the patches; (0, 0) for models without patches.

    Returns:
        Maps (b, c, y, x); other tensors than maps and tokens are returned unchanged.

    Raises:
        UserError: If tokens do not lie on the grid.
    """
    parts = output if isinstance(output, tuple | list) else (output,)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if not tensors:
        raise UserError(
            f"Expected a module that puts out a tensor, got a {type(output).__name__}; tap a block instead."
        )
    if tensors[0].ndim != 3:
        return tensors[0]
    rows, columns = grid
    fitting = [part for part in tensors if part.ndim == 3 and part.shape[1] == rows * columns]
    if not fitting:
        found = " and ".join(str(part.shape[1]) for part in tensors if part.ndim == 3)
        patches = f" ({rows} x {columns})" if rows else ""
        raise UserError(
            f"Expected a tap that puts out a map, or a token for each patch of the model's input{patches}, got "
            f"{found} tokens; tap a whole block, such as 'mid_block' or 'transformer_blocks.0'."
        )
    return rearrange(fitting[-1], "b (y x) d -> b d y x", y=rows)


def join_maps(maps: Sequence[Tensor]) -> Tensor:
    """Join the features of several taps: averaged to the smallest size among them, channels one after another.

    Linear, so a gradient at the joined map reaches each tap as that of its averages.

    >>> join_maps([torch.ones(1, 3, 8, 8), torch.ones(1, 5, 4, 4)]).shape
    torch.Size([1, 8, 4, 4])
    """
    if len(maps) == 1:
        return maps[0]
    if any(h.ndim != 4 for h in maps):
        raise UserError("Expected maps (b, c, y, x) at each of several taps, got others; tap blocks only.")
    size = min(h.shape[2] for h in maps), min(h.shape[3] for h in maps)
    averaged = [h if h.shape[2:] == size else F.adaptive_avg_pool2d(h, size) for h in maps]
    return torch.cat(averaged, dim=1)


def join_by_tap(taps: Sequence[str], maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the features of each tap, joined where it names several modules, from those of single modules."""
    return {tap: join_maps([maps[name] for name in split_taps(tap)]) for tap in taps}


# ---- reading ---------------------------------------------------------------------------------------------------------
class _Stop(BaseException):
    """Leave a forward early from a hook; never seen outside of this module."""


class _PatchGrid:
    """Patch grid of a running forward, read where a transformer embeds positions, before all blocks."""

    def __init__(self) -> None:
        self.grid: Grid = (0, 0)

    def read(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.grid = patch_grid(module, args[0])

    def call(self, hook: Hook, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return hook(output, self.grid)


@contextmanager
def _hooks(model: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Register forward hooks by tap name and remove them however the block is left."""
    patches, embedding, handles = _PatchGrid(), getattr(model, "pos_embed", None), []
    try:
        if isinstance(embedding, nn.Module):
            handles.append(embedding.register_forward_pre_hook(patches.read))
        for tap, hook in hooks.items():
            handles.append(resolve_tap(model, tap).register_forward_hook(functools.partial(patches.call, hook)))
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
        seen: Callback, which must return None; :func:`guidance.taps.hooks.read_output` reads the output.
    """
    with _hooks(model, {tap: functools.partial(seen, tap) for tap in taps}):
        yield


def prediction_of(output: Any) -> Tensor:
    """Return the prediction in a denoiser's output: the first entry of a tuple, else its ``sample``."""
    return output[0] if isinstance(output, tuple) else output.sample


@contextmanager
def capture(
    model: nn.Module, taps: Sequence[str] = (MID_BLOCK,), *, first: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Read features while the model runs unchanged; where a tap is, it runs uncompiled.

    Args:
        model: Denoiser.
        taps: Taps to read.
        first: Keep the features of the first forward, not of the latest.

    Yields:
        A dict that holds the latest features of every tap (detached copies) after each forward.

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
    inside: nn.Module = getattr(model, "_orig_mod", model)

    def seen(name: str, output: Any, grid: Grid) -> None:
        h = plain(read_output(output, grid)).detach().clone()  # FreeU writes into the maps that later blocks are given
        for tap, maps in unfinished.items():
            if name in split_taps(tap) and not (first and tap in store):
                maps[name] = h
            if len(maps) == len(split_taps(tap)):
                store.update(join_by_tap([tap], maps))
                maps.clear()

    called = nullcontext() if inside is model else replaced(model, "forward", inside.forward)
    with called, uncompiled(inside, taps), watch(inside, _modules(taps), seen):
        yield store


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Temporarily override an instance attribute."""
    previous = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        vars(owner).pop(name, None)
        if previous is not None:
            setattr(owner, name, previous)


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
    if text is not None:
        kwargs["encoder_hidden_states"] = text
    t = torch.as_tensor(t, device=x.device).expand(len(x))  # transformers take no single number
    return read_until(lambda: model(x, timestep=t, **kwargs), model, [tap])[tap].contiguous()


@torch.no_grad()
def read_until(forward: Callable[[], Any], model: nn.Module, taps: Sequence[str]) -> dict[str, Tensor]:
    """Run a forward until all taps have run, and return their features.

    Args:
        forward: Calls ``model`` once.
        model: Denoiser that owns the taps.
        taps: Names of modules, several joined by "+".

    Raises:
        UserError: If a tap does not run.
    """
    found: dict[str, Tensor] = {}
    names = _modules(taps)

    def hook_for(name: str) -> Hook:
        def hook(output: Any, grid: Grid) -> None:
            found[name] = read_output(output, grid).detach().clone()  # later blocks may write into it (FreeU)
            if len(found) == len(names):
                raise _Stop

        return hook

    with _hooks(model, {name: hook_for(name) for name in names}):
        try:
            forward()
        except _Stop:
            return join_by_tap(taps, found)
    raise UserError(f"Expected the tap '{taps[0]}' to run in a forward of {type(model).__name__}, but it did not.")


def find_detached(
    forward: Callable[[Tensor], Any],
    model: nn.Module,
    x: Tensor,
    taps: Sequence[str],
    *,
    swaps_weights: bool = False,
) -> list[str]:
    """Return the modules before the taps whose outputs carry no gradient although their inputs do, innermost first.

    Args:
        forward: ``forward(x)`` calls ``model`` once.
        model, taps: See :func:`read_until`.
        x: Model input.
        swaps_weights: See :func:`forward_with_gradient`.
    """
    found: list[str] = []

    def look(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.requires_grad]
        outputs = [v for v in (output if isinstance(output, tuple) else (output,)) if isinstance(v, Tensor)]
        if given and outputs and not any(v.requires_grad for v in outputs):
            found.append(name)

    handles = [
        module.register_forward_hook(functools.partial(look, name), with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    try:
        forward_with_gradient(forward, model, x, taps, [lambda h: (h, None)], whole=False, swaps_weights=swaps_weights)
    finally:
        for handle in handles:
            handle.remove()
    return found


class PulledBack(NamedTuple):
    """A gradient at the tap, pulled back to the input.

    Attributes:
        gradient: With respect to the model's input, float32 or float64, of its shape.
        at_taps: With respect to the features, by tap.
        notes: What the feature gradient returned beside it.
    """

    gradient: Float[Tensor, "b ..."]
    at_taps: dict[str, Tensor]
    notes: Any


def forward_with_gradient(
    forward: Callable[[Tensor], Any],
    model: nn.Module,
    x: Float[Tensor, "b ..."],
    taps: Sequence[str],
    feature_gradients: Sequence[FeatureGradient],
    predict_x0: PredictX0 | None = None,
    *,
    whole: bool = True,
    swaps_weights: bool = False,
) -> tuple[Any, list[PulledBack]]:
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
        swaps_weights: Whether layers have other weights during their forward than after it (layerwise casting, group
            offloading); the graph then keeps those of the forward.

    Returns:
        The forward's output, and one gradient per feature gradient.

    Raises:
        UserError: Under ``torch.inference_mode``, where no gradient can be taken, or if no gradient reaches the taps.
    """
    if torch.is_inference_mode_enabled():
        raise UserError(
            "Expected gradients to be possible, but torch.inference_mode is on; use torch.no_grad() around the "
            "sampling call instead (diffusers pipelines do so themselves)."
        )
    tapped = _Tapped(x.detach().clone().requires_grad_(True), taps, feature_gradients, whole)
    needs_graph = bool(tapped.modules) or X0_THROUGH_UNET in taps
    kept = _saved_as_aliases() if swaps_weights else nullcontext()
    hooks = {name: functools.partial(tapped.hook, name) for name in tapped.modules}
    with kept, _hooks(model, hooks), torch.set_grad_enabled(needs_graph):
        try:
            output = forward(tapped.leaf)
        except _Stop:
            return None, tapped.found
        if tapped.virtual and predict_x0 is not None and len(tapped.live) == len(tapped.modules):
            with torch.enable_grad():
                tapped.finish({tap: predict_x0(output, tapped.leaf, tap == X0_THROUGH_UNET) for tap in tapped.virtual})
    if not tapped.found:
        raise UserError(f"Expected the taps {', '.join(taps)} to run in one forward of {type(model).__name__}.")
    return output, tapped.found


class _Tapped:
    """State of one :func:`forward_with_gradient`: features with their graph, until the gradients are taken."""

    def __init__(self, leaf: Tensor, taps: Sequence[str], targets: Sequence[FeatureGradient], whole: bool) -> None:
        self.leaf, self.targets, self.whole = leaf, targets, whole
        self.virtual = [tap for tap in (X0, X0_THROUGH_UNET) if tap in taps]
        self.real = [tap for tap in dict.fromkeys(taps) if tap not in self.virtual]
        self.modules = _modules(self.real)
        self.live: dict[str, Tensor] = {}
        self.complete = False
        self.found: list[PulledBack] = []

    def hook(self, name: str, output: Any, grid: Grid) -> Any:
        """Keep a tapped module's output; after the last one take the gradients and go on without a graph."""
        if self.complete:  # gradient checkpointing runs the block a second time
            return None
        h = read_output(output, grid)
        self.live[name] = (h if type(h) is Tensor else plain(h)).clone()  # later blocks may write into it (FreeU)
        self.complete = len(self.live) == len(self.modules)
        if not self.complete or X0_THROUGH_UNET in self.virtual:
            return None
        if not self.virtual:
            self.finish({})
            if not self.whole:
                raise _Stop
        torch.set_grad_enabled(False)  # for the rest of this forward; the enclosing context restores it
        return detached(output)

    def finish(self, x0: dict[str, Tensor]) -> None:
        """Take the gradients, and free the graph."""
        with torch.enable_grad(), _saved_as_aliases():  # else a checkpointed block would save them as its own
            features = join_by_tap(self.real, self.live) | x0
            if X0 not in features and not any(h.requires_grad for h in features.values()):
                raise UserError(
                    f"Expected features at {', '.join(features)} that depend on the latents, but they carry no "
                    "gradient: a module before the tap runs under torch.no_grad() (gradient checkpointing with "
                    "use_reentrant=True does) or detaches its output."
                )
            store = {tap: h.detach().contiguous() for tap, h in features.items()}
            for i, target in enumerate(self.targets):
                at_taps, notes = target(store)
                retain = i < len(self.targets) - 1
                self.found.append(PulledBack(pull_back(features, at_taps, self.leaf, retain=retain), at_taps, notes))
        self.live.clear()


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


def _saved_as_aliases() -> AbstractContextManager[None]:
    """Save tensors for the backward pass as what they are now, whatever hooks do to the originals meanwhile."""
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, torch.Tensor.detach)


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


def detached(output: Any) -> Any:
    """Detach a module's output from its graph, in the same structure."""
    if isinstance(output, tuple | list):
        return type(output)(detached(part) for part in output)
    return output.detach() if isinstance(output, Tensor) else output


def pull_back(live: dict[str, Tensor], wanted: dict[str, Tensor], leaf: Tensor, *, retain: bool) -> Tensor:
    """Return ``sum_tap J_tap^T wanted_tap``; half precision is scaled to unit size meanwhile, so nothing underflows."""
    taps = [tap for tap in wanted if live[tap].requires_grad]
    precise = torch.float64 if leaf.dtype == torch.float64 else torch.float32
    if not taps:
        return torch.zeros_like(leaf, dtype=precise)
    scale: Tensor | float = 1.0
    if leaf.dtype in (torch.float16, torch.bfloat16):
        peak = torch.stack([wanted[t].detach().flatten(1).abs().amax(1) for t in taps]).amax(0)
        scale = torch.where(peak > 0, peak, 1.0).to(precise)
    outs = [live[t] for t in taps]
    vectors = [(wanted[t] / _as_rows(scale, wanted[t])).to(live[t].dtype) for t in taps]
    try:
        (g,) = torch.autograd.grad(outs, leaf, vectors, retain_graph=retain)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise UserError(
            "Expected gradient checkpointing that allows gradients of inputs, got use_reentrant=True; call the "
            "denoiser's enable_gradient_checkpointing() without a function of your own, or use use_reentrant=False."
        ) from error
    return g.to(precise) * _as_rows(scale, g)


def _as_rows(scale: Tensor | float, x: Tensor) -> Tensor | float:
    return scale.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(scale, Tensor) else scale
