"""Build published architectures with seeded random weights.

Classes, shapes, code paths, speed, memory and FLOPs are those of the real model; nothing is downloaded.  A parameter
has its own generator, seeded by the names of part and parameter, so that its values depend neither on what was built
before nor on device or precision.
"""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from guidance.models.presets import Preset, find_preset
from guidance.models.types import Pipeline

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, T5TokenizerFast


def build_denoiser(
    name: str, *, seed: int = 0, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Build only the UNet or transformer of a published model, frozen, in eval mode.

    Args:
        name: Key of :data:`guidance.models.presets.PRESETS`, with ``-tiny`` for the small variant.
        seed: Seed of the weights.
        device: "meta" costs neither time nor memory: shapes without values.
        dtype: Precision of the weights; half precision holds the rounded float32 values.

    >>> denoiser = build_denoiser("sd-1.5", device="meta")
    >>> sum(p.numel() for p in denoiser.parameters())
    859520964
    """
    preset = find_preset(name)
    return _build(preset, preset.denoiser, seed, torch.device(device), dtype)


def build_pipeline(
    name: str, *, seed: int = 0, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **given: Any
) -> Pipeline:
    """Build a published pipeline with random weights, frozen, in eval mode.

    Args:
        name: Key of :data:`guidance.models.presets.PRESETS`, with ``-tiny`` for the small variant.
        seed: Seed of the weights.
        device, dtype: Device and precision of the weights.
        **given: Parts and options of the pipeline class to take instead of the preset's; None leaves a part out.
    """
    import diffusers

    preset = find_preset(name)
    names = [part for part in preset.parts if part not in given]
    parts = {part: _build(preset, part, seed, torch.device(device), dtype) for part in names}
    return getattr(diffusers, preset.pipeline)(**parts, **(preset.options | given))


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
    # the buffers; diffusers' own method warns of every cast
    nn.Module.to(network, device=device, dtype=dtype)
    return network.eval().requires_grad_(False)


class _Unfilled(TorchFunctionMode):
    """Build networks whose parameters take no memory and whose buffers are real.

    accelerate moves each parameter to the meta device once it is created; this mode skips its random initialisation,
    which takes most of the time.
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
    """Fill every parameter: norms 1 and 0, biases 0, all else normal with variance 1 / fan-in.

    Layers then keep the variance of their inputs, so that activations stay of order one, in half precision too.
    """
    if hasattr(network, "tie_weights"):
        network.tie_weights()  # T5's embeddings; the meta device untied them
    filled: dict[int, nn.Parameter] = {}  # by identity of the empty parameter: tied parameters stay tied
    draws = []
    for prefix, module in network.named_modules():
        for name, empty in list(module.named_parameters(prefix, recurse=False)):
            if id(empty) not in filled:
                values = torch.empty(empty.shape, dtype=dtype, device=device)
                filled[id(empty)] = nn.Parameter(values, requires_grad=False)
                draws.append((values, name, seed))
            setattr(module, name.rpartition(".")[2], filled[id(empty)])
    if device.type != "meta":
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # the order does not matter
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


def _clip_tokenizer(vocab_size: int, **options: Any) -> CLIPTokenizer:
    """Build CLIP's tokenizer without merges: letters, start and end have their published ids."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    vocab = {token: i for i, token in enumerate(tokens)}
    vocab |= {"<|startoftext|>": vocab_size - 2, "<|endoftext|>": vocab_size - 1}
    return CLIPTokenizer(vocab=vocab, merges=[], **options)


def _t5_tokenizer(**options: Any) -> T5TokenizerFast:
    """Build T5's tokenizer with letters only."""
    from transformers import T5TokenizerFast

    letters = ["\u2581", *map(chr, range(ord("!"), ord("~") + 1))]  # the first stands for a space
    vocab = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")] + [(letter, -1.0) for letter in letters]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, **options)
