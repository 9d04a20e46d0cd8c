"""Published architectures with seeded random weights: for what depends on shapes, not on values.

The classes, shapes, code paths, speed, memory and FLOPs are those of the real model, and so is the exactness of
gradients; no network is needed.  Every weight is drawn by a generator of its own, seeded by the names of part and
parameter, so that it depends neither on what was built before nor on the device or the precision asked for.
"""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from guidance.models.presets import Preset, find_preset


def build_denoiser(
    name: str,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Build only the UNet or transformer of a published model, frozen, in eval mode.

    Args:
        name: Key of :data:`guidance.models.presets.PRESETS`, with ``-tiny`` for the small variant.
        seed: Of the weights.
        device: "meta" costs neither time nor memory: shapes without values.
        dtype: Of the weights; half precision holds the rounded float32 values.

    Raises:
        UserError: If the name is unknown.

    >>> denoiser = build_denoiser("sd-1.5", device="meta")
    >>> sum(p.numel() for p in denoiser.parameters())
    859520964
    """
    preset = find_preset(name)
    return _build(preset, preset.denoiser, seed, torch.device(device), dtype)


def build_pipeline(
    name: str,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **given: Any,
) -> Any:
    """Build a published pipeline with random weights, frozen, in eval mode.

    Args:
        name: Key of :data:`guidance.models.presets.PRESETS`, with ``-tiny`` for the small variant.
        seed: Of the weights.
        device, dtype: Of the weights.
        **given: Parts and options of the pipeline class to take instead of the preset's; None leaves a part out.

    Raises:
        UserError: If the name is unknown.
    """
    import diffusers

    preset = find_preset(name)
    own = {
        part: _build(preset, part, seed, torch.device(device), dtype)
        for part in preset.parts
        if part not in given
    }
    return getattr(diffusers, preset.pipeline)(**own, **(preset.options | given))


def _build(preset: Preset, part: str, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Build one part: a network on the device, or a scheduler or tokenizer."""
    import diffusers
    import transformers

    name, config = preset.parts[part]
    if name == "CLIPTokenizer":
        text_encoder = preset.parts[part.replace("tokenizer", "text_encoder")]
        return _clip_tokenizer(vocab_size=text_encoder[1]["vocab_size"], **config)
    if name == "T5TokenizerFast":
        return _t5_tokenizer(**config)
    if name.endswith("Scheduler"):
        return getattr(diffusers, name)(**config)
    with _Unfilled():
        if hasattr(diffusers, name):
            network = getattr(diffusers, name)(**config)
        else:
            cls = getattr(transformers, name)
            network = cls(cls.config_class(**config))
    _fill(network, f"{seed}.{part}", device, dtype)
    nn.Module.to(
        network, device=device, dtype=dtype
    )  # the buffers; diffusers' own method warns of every cast
    return network.eval().requires_grad_(False)


class _Unfilled(TorchFunctionMode):
    """Build networks whose parameters take no memory and whose buffers are real.

    accelerate moves each parameter to the meta device once it is made; filling it before with random numbers, which
    takes most of the time, is left out here.
    """

    def __enter__(self) -> _Unfilled:
        from accelerate import init_empty_weights

        self._empty = init_empty_weights(include_buffers=False)
        self._empty.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._empty.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.uniform_, Tensor.normal_):
            return args[0]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _fill(network: nn.Module, seed: str, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter its values: norms 1 and 0, biases 0, all else normal with variance 1 / fan-in.

    Layers then keep the variance of what they are given, so that activations stay of order one, in half precision too.
    """
    if hasattr(network, "tie_weights"):
        network.tie_weights()  # T5's embeddings; moving parameters to the meta device has parted them
    made: dict[int, nn.Parameter] = {}  # by the identity of the empty one: tied parameters stay tied
    draws = []
    for prefix, module in network.named_modules():
        for name, empty in list(module.named_parameters(prefix, recurse=False)):
            if id(empty) not in made:
                values = torch.empty(empty.shape, dtype=dtype, device=device)
                made[id(empty)] = nn.Parameter(values, requires_grad=False)
                draws.append((values, name, seed))
            setattr(module, name.rpartition(".")[2], made[id(empty)])
    if device.type != "meta":
        with ThreadPoolExecutor(
            torch.get_num_threads()
        ) as pool:  # a generator each: the order does not matter
            list(pool.map(_draw, *zip(*draws, strict=True)))


@torch.no_grad()
def _draw(values: Tensor, name: str, seed: str) -> None:
    if values.ndim < 2:
        values.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    digest = hashlib.sha256(f"{seed}.{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    std = math.sqrt(values.shape[0] / values.numel())
    if values.dtype == torch.float32 and values.device.type == "cpu":
        values.normal_(std=std, generator=generator)
    else:  # the same numbers everywhere
        values.copy_(torch.empty(values.shape, dtype=torch.float32).normal_(std=std, generator=generator))


def _clip_tokenizer(vocab_size: int, **options: Any) -> Any:
    """CLIP's tokenizer without merges: letters have their published ids, and so do start and end."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    vocab = {token: i for i, token in enumerate(tokens)}
    vocab |= {"<|startoftext|>": vocab_size - 2, "<|endoftext|>": vocab_size - 1}
    return CLIPTokenizer(vocab=vocab, merges=[], **options)


def _t5_tokenizer(**options: Any) -> Any:
    """T5's tokenizer with letters only."""
    from transformers import T5TokenizerFast

    letters = ["\u2581", *map(chr, range(ord("!"), ord("~") + 1))]  # the first stands for a space
    vocab = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")] + [(letter, -1.0) for letter in letters]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, **options)
