"""Resolve tap names to modules and read their outputs as feature maps (b, c, y, x), whatever the denoiser.

UNet blocks return maps, alone or as the first entry of a tuple.  Transformer blocks return tokens (b, n, d), one per
patch, alone (DiT, PixArt) or after the text tokens (SD3, Flux); they are laid out on the patch grid of the model's
input, a view through which gradients pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from guidance.utils.errors import UserError, nearest

MID_BLOCK = "mid_block"

#: Joins the names of modules that are read together: "down_blocks.2+mid_block".
JOIN = "+"

#: Rows and columns of a transformer's patches.
Grid = tuple[int, int]


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
    (g,) = torch.autograd.grad(outs, leaf, vectors, retain_graph=retain)
    return g.to(precise) * _as_rows(scale, g)


def _as_rows(scale: Tensor | float, x: Tensor) -> Tensor | float:
    return scale.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(scale, Tensor) else scale
