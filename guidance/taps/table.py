"""List the taps of a model, with the shape of their features and the cost of reaching them.

    python -m guidance.taps random:sdxl                    # seconds and no weights: shapes alone
    python -m guidance.taps testbed --depth 2 --json
    python -m guidance.taps my/model --latent-size 96      # a folder or a hub id: only its configuration is read

Nothing is computed: the denoiser runs on torch's meta device, where tensors have shapes and no values, while the
floating-point operations of its matrix products and convolutions are counted.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from guidance.models.checks import check_file, explained, parts_of, preset_of_file
from guidance.models.inputs import build_inputs
from guidance.models.pipelines import DENOISER, source_of
from guidance.models.presets import PRESETS, RANDOM, TINY
from guidance.models.random_weights import build_denoiser
from guidance.taps.hooks import MID_BLOCK, Grid, read_output, watch
from guidance.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class TapRow:
    """A tap and its cost.

    Attributes:
        tap: Name of the module.
        shape: Shape of its features, (b, c, y, x).
        flops: Floating-point operations of a forward that stops after it (a multiplication and an addition are two).
        share: The same as a fraction of a full forward.
        parameters: Number of parameters that such a forward reads.
    """

    tap: str
    shape: tuple[int, ...]
    flops: int
    share: float
    parameters: int


@dataclasses.dataclass(frozen=True)
class TapTable:
    """The taps of a denoiser in the order in which they run, and the cost of a full forward.

    Attributes:
        denoiser: Name of its class.
        input_shape: Shape of the latents, (b, c, y, x); for Flux packed, (b, n, c).
        flops, parameters: Totals of a full forward.
        taps: The rows.
        default: The default tap of heads, None for a model without a mid-block.
    """

    denoiser: str
    input_shape: tuple[int, ...]
    flops: int
    parameters: int
    taps: list[TapRow]
    default: str | None

    def halfway(self) -> str | None:
        """Return the last tap within half of the FLOPs."""
        return next((row.tap for row in reversed(self.taps) if row.share <= 0.5), None)


def list_taps(model: nn.Module, latent_size: int | None = None, batch_size: int = 1, depth: int = 1) -> TapTable:
    """Run a denoiser once and list the blocks that can be tapped.

    Args:
        model: A denoiser on the meta device, see :func:`build_shape`: elsewhere some attention is not counted.
        latent_size: Height and width of the latents; None for the model's own.
        batch_size: Samples.
        depth: How deep to look for blocks: 1 lists "down_blocks.0", 2 also "down_blocks.0.resnets.1".  Single
            layers, such as a convolution, can be tapped but are not listed.
    """
    for name, value in (("latent-size", latent_size), ("batch-size", batch_size), ("depth", depth)):
        if value is not None and value < 1:
            raise UserError(f"Expected a {name} of at least 1, got {value}.")
    x, inputs = build_inputs(model, latent_size, batch_size)
    assert x.device.type == "meta", "build the denoiser by build_shape(name)"
    modules = dict(model.named_modules())
    sizes = {n: sum(p.numel() for p in m.parameters(recurse=False)) for n, m in modules.items()}
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    read: dict[str, int] = {}
    counter = FlopCounterMode(display=False)

    def seen(tap: str, output: Any, grid: Grid) -> None:
        read[tap] = sizes[tap]
        shape = _map_shape(output, grid) if _is_block(modules[tap]) and _level(tap) <= depth else None
        if shape is not None:
            found[tap] = shape, counter.get_total_flops(), sum(read.values())

    with torch.no_grad(), counter, watch(model, [name for name in modules if name], seen):
        model(x, **inputs)
    flops = counter.get_total_flops()
    rows = [TapRow(tap, shape, count, count / flops, n) for tap, (shape, count, n) in found.items()]
    default = MID_BLOCK if MID_BLOCK in found else None
    return TapTable(type(model).__name__, tuple(x.shape), flops, sum(sizes.values()), rows, default)


def _level(name: str) -> int:
    """Return the depth of a module, without the numbers in lists of blocks."""
    return sum(not part.isdigit() for part in name.split("."))


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _map_shape(output: Any, grid: Grid) -> tuple[int, ...] | None:
    """Return the shape of a module's features, None where they cannot be tapped."""
    try:
        features = read_output(output, grid)
    except UserError:
        return None
    return tuple(features.shape) if features.ndim == 4 else None


# ---- the model --------------------------------------------------------------------------------------------------
def build_shape(name: str) -> nn.Module:
    """Build the denoiser of a model on the meta device, from its configuration alone.

    Args:
        name: "testbed", a folder, a hub id, a single file of weights, or the name of a published model, with or
            without "random:" before it.
    """
    preset = name.removeprefix(RANDOM)
    if name.startswith(RANDOM) or preset.removesuffix(TINY) in PRESETS:
        return build_denoiser(preset, device="meta")
    if Path(name).suffix == ".safetensors":
        check_file(Path(name))
        return build_denoiser(preset_of_file(Path(name)), device="meta")
    return _from_config(name)


def _from_config(name: str) -> nn.Module:
    import diffusers

    source = source_of(name)
    with explained(name, torch.device("meta"), torch.float32):
        parts = parts_of(diffusers.DiffusionPipeline.load_config(source))
        part = next((part for part in DENOISER if part in parts), None)
        cls: Any = getattr(diffusers, parts[part][1], None) if part else None
        is_model = isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)
        if not is_model:
            raise UserError(f"Expected a pipeline with a unet or transformer of diffusers, got '{name}' without.")
        config = cls.load_config(source, subfolder=part)
        with torch.device("meta"):
            return cls.from_config(config).eval()


# ---- the command ------------------------------------------------------------------------------------------------
def format_table(table: TapTable) -> str:
    """Format the table as text, shapes as b x c x y x x."""
    head = f"{table.denoiser}, input {'x'.join(map(str, table.input_shape))}: {_count(table.flops)} FLOPs a forward"
    lines = [f"{head}, {_count(table.parameters)} parameters", ""]
    width = max([len(row.tap) for row in table.taps], default=3)
    lines.append(f"{'tap':{width}}  {'features':>17}  {'FLOPs up to it':>14}  {'parameters':>10}")
    for row in table.taps:
        shape, note = "x".join(map(str, row.shape)), "  default" if row.tap == table.default else ""
        lines.append(f"{row.tap:{width}}  {shape:>17}  {row.share:>14.1%}  {_count(row.parameters):>10}{note}")
    if table.default is None and table.halfway():
        lines += ["", f"No mid-block: name a tap; the last within half of the FLOPs is '{table.halfway()}'."]
    return "\n".join(lines)


def _count(n: float) -> str:
    for unit in ("", " k", " M", " G", " T"):
        if n < 1000:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g} P"
