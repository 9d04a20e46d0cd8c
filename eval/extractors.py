"""Networks that grade images, by name: images to features, to class probabilities, or to a space shared with texts.

* ``judge``, ``judge-clip``: the testbed's judges, which guide nothing (64x64 images only);
* ``testbed-clip``: the testbed's guiding CLIP; where it has guided, its own grade is circular;
* ``clip:NAME`` and ``vision:NAME``: a hub id or a folder of transformers, safetensors only;
* ``inception``: the network of the published FID, through torch-fidelity;
* any ``nn.Module``, through `extractor_from_module`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor, nn

from eval.extractor_base import ClassExtractor, Extractor, TextExtractor, network_key
from guidance.clip import Clip, load_clip
from guidance.cutouts import Preprocess
from guidance.encoding import fit_image, to_float
from guidance.errors import UserError, nearest
from guidance.pipelines import default_device, fingerprint


def load_extractor(
    name: str | nn.Module | Extractor, *, device: torch.device | str | None = None, batch_size: int = 64
) -> Extractor:
    """Load a network that grades, frozen, in eval mode and float32.

    Args:
        name: A key of `EXTRACTORS`, with ``:NAME`` where it takes one.  A module with an attribute ``image_size`` is
            taken with pixels in 0..1; for other conventions call `extractor_from_module`.
        device: None picks CUDA, then MPS, then the CPU.
        batch_size: Images at once.

    Returns:
        The extractor: a `TextExtractor` or `ClassExtractor` where the network has texts or classes.

    Raises:
        UserError: If there is no such network, or it cannot be used here.
    """
    if batch_size < 1:
        raise UserError(f"Expected a batch size from 1, got {batch_size}.")
    if isinstance(name, Extractor):
        return dataclasses.replace(name, batch_size=batch_size)
    chosen = torch.device(default_device() if device is None else device)
    if isinstance(name, nn.Module):
        size = getattr(name, "image_size", None)
        if not isinstance(size, int):
            raise UserError(
                f"Expected a module with an attribute image_size, got {type(name).__name__} without; call "
                "extractor_from_module(module, name=..., size=...), which also takes mean and std."
            )
        found = extractor_from_module(name, name=type(name).__name__, size=size, device=chosen)
        return dataclasses.replace(found, batch_size=batch_size)
    kind, colon, argument = name.partition(":")
    if kind not in EXTRACTORS or bool(argument) != (kind in _NAMED) or bool(colon) != bool(argument):
        known = [f"{k}:NAME" if k in _NAMED else k for k in EXTRACTORS]
        raise UserError(f"Expected the name of a network that grades, got '{name}'.{nearest(name, known)}")
    return dataclasses.replace(EXTRACTORS[kind](argument, chosen), batch_size=batch_size)


def extractor_from_module(
    module: nn.Module,
    *,
    name: str,
    size: int,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    value_range: tuple[float, float] = (0.0, 1.0),
    device: torch.device | str | None = None,
    batch_size: int = 64,
) -> Extractor:
    """Grade with any network: RGB float (b, 3, size, size) to (b, d).

    Args:
        module: Is put into eval mode and frozen, and moved to the device.
        name: For metrics and caches.  Caches tell modules by name, text form, weights and preprocessing: take
            another name after a change of ``forward`` alone.
        size: Side of the square; the shorter side of an image is resized to it (bicubic, in 8 bits) and the centre cut.
        mean, std: Per channel; subtracted and divided by after scaling to ``value_range``.
        value_range: What black and white become first: (0, 1), (-1, 1), (0, 255).
        device: None picks CUDA, then MPS, then the CPU.
        batch_size: Images at once.

    Raises:
        UserError: If a number makes no sense; when it is used, if the module returns anything but (b, d).
    """
    low, high = value_range
    if size < 1 or batch_size < 1 or len(mean) != 3 or len(std) != 3 or not all(std) or high <= low:
        raise UserError(
            "Expected size and batch_size from 1, three means, three deviations other than 0 and a range (low, high), "
            f"got size={size}, batch_size={batch_size}, mean={mean}, std={std}, value_range={value_range}."
        )
    scaled_mean, scaled_std = ([(m - low) / (high - low) for m in mean], [s / (high - low) for s in std])
    preprocess = Preprocess(size, size, tuple(scaled_mean), tuple(scaled_std))
    target = torch.device(default_device() if device is None else device)
    module.eval().requires_grad_(False).to(target)

    def features(images: list[Image.Image]) -> Tensor:
        x = to_float(np.stack([fit_image(image, size) for image in images]), target)
        out = module(preprocess.normalize(x))
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(images):
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UserError(f"Expected features (b, d) from '{name}', got {got}; flatten or pool its output.")
        return out

    described = {**dataclasses.asdict(preprocess), "name": name, "module": repr(module)}
    return Extractor(name, name, network_key(module, described), fingerprint(module), features, batch_size)


def _label(name: str) -> str:
    """The last part of a hub id or path."""
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def _testbed_array(images: list[Image.Image]) -> UInt8[np.ndarray, "n 64 64 3"]:
    from guidance.testbed.models import IMAGE_SIZE

    for image in images:
        if image.size != (IMAGE_SIZE, IMAGE_SIZE):
            raise UserError(
                f"Expected {IMAGE_SIZE}x{IMAGE_SIZE} images, which is all the testbed's judges know, got "
                f"{image.width}x{image.height}; choose a clip: or vision: network for other images."
            )
    return np.stack([np.asarray(image) for image in images])


def _judge(argument: str, device: torch.device) -> ClassExtractor:
    """The testbed's judge classifier: 128 features, and probabilities of the 8 objects (of its object head)."""
    from guidance.testbed.judges import load_judges
    from guidance.testbed.models import IMAGE_SIZE

    classifier = load_judges(device=device).classifier
    return ClassExtractor(
        "judge",
        "judge",
        network_key(classifier, {"size": IMAGE_SIZE, "range": (-1, 1)}),
        fingerprint(classifier),
        lambda images: classifier.features(to_float(_testbed_array(images), device)),
        class_probabilities=lambda images: classifier(to_float(_testbed_array(images), device))[
            "object"
        ].softmax(-1),
    )


def _judge_clip(argument: str, device: torch.device) -> TextExtractor:
    """The testbed's judge CLIP."""
    from guidance.testbed.judges import load_judges
    from guidance.testbed.models import IMAGE_SIZE

    judges = load_judges(device=device)
    half = (0.5, 0.5, 0.5)
    clip = Clip(judges.clip, judges.tokenizer, Preprocess(IMAGE_SIZE, IMAGE_SIZE, half, half), "judge-clip")
    found = _of_clip(clip, "judge-clip", "judge-clip")
    return dataclasses.replace(found, features=lambda images: clip.embed_pil(_testbed_array(images)))


def _of_clip(clip: Clip, name: str, label: str) -> TextExtractor:
    key = network_key(clip.model, dataclasses.asdict(clip.preprocess))
    return TextExtractor(
        name,
        label,
        key,
        clip.fingerprint,
        lambda images: clip.embed_pil(images, batch_size=len(images)),
        clip=clip,
    )


def _vision(argument: str, device: torch.device) -> Extractor:
    """A vision encoder with its own image processor: pooled output, else the first token (CLS)."""
    model, processor, pooled = _load_vision(argument)
    model = model.eval().requires_grad_(False).to(device, torch.float32)

    def features(images: list[Image.Image]) -> Tensor:
        pixels = torch.as_tensor(np.stack(processor(images=images)["pixel_values"])).to(device, torch.float32)
        output = model(pixel_values=pixels)
        found = output.pooler_output if pooled(output) else output.last_hidden_state[:, 0]
        return rearrange(found, "b ... -> b (...)")

    described = {**processor.to_dict(), "processor": type(processor).__name__}
    return Extractor(
        f"vision:{argument}", _label(argument), network_key(model, described), fingerprint(model), features
    )


def _load_vision(name: str) -> tuple[Any, Any, Callable[[Any], bool]]:
    """Load an encoder and its processor, and tell of an output whether its pooled part is worth taking."""
    import transformers

    # the processor on Pillow, whether or not torchvision is installed: a cache outlives an installation
    newer = int(transformers.__version__.split(".")[0]) >= 5
    on_pillow: dict[str, Any] = {"backend": "pil"} if newer else {"use_fast": False}
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            name, trust_remote_code=False, **on_pillow
        )
        model, info = transformers.AutoModel.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"Expected a folder or a reachable hub id of a vision encoder with safetensors and an image processor, but "
            f"'{name}' could not be loaded: {str(error).strip().splitlines()[0][:200]}"
        ) from error
    if getattr(model, "main_input_name", "") != "pixel_values" or hasattr(model, "get_image_features"):
        raise UserError(
            f"Expected a vision encoder in '{name}', got a {type(model).__name__}; write clip:{name} for a CLIP or "
            "SigLIP."
        )
    missing = {key for key in info["missing_keys"] if not key.endswith("mask_token")}
    untrained_pooler = {key for key in missing if "pooler" in key}  # drawn at random: of no use
    if missing - untrained_pooler:
        raise UserError(
            f"Expected all weights of a {type(model).__name__} in '{name}', but {len(missing)} are missing, such as "
            f"'{min(missing)}'; choose a folder that the model itself was saved into."
        )
    return model, processor, lambda output: not untrained_pooler and output.get("pooler_output") is not None


def _inception(argument: str, device: torch.device) -> ClassExtractor:
    """The Inception of the published FID (2048 features) and inception score ("logits_unbiased", 1008 classes).

    Weights are fetched and unpickled by torch-fidelity itself, at the first use.  Run so far on torch-fidelity 0.3.0
    with random weights only, never on the published ones.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(
            f"Expected torch-fidelity for the real Inception, but it cannot be imported ({error}); pip install "
            "torchvision torch-fidelity, or choose another network."
        ) from error
    network = (
        FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).eval().to(device)
    )

    def outputs(images: list[Image.Image], which: int) -> Tensor:
        # it resizes whole images itself, hence images of their own size; a batch needs one size
        batches = [images] if len({image.size for image in images}) == 1 else [[image] for image in images]
        arrays = [np.stack([np.asarray(image) for image in batch]) for batch in batches]
        tensors = [rearrange(torch.from_numpy(a), "b h w c -> b c h w").contiguous() for a in arrays]
        return torch.cat([network(x.to(device))[which] for x in tensors])

    return ClassExtractor(
        "inception",
        "inception",
        network_key(network, {"resize": "inside torch-fidelity"}),
        fingerprint(network),
        lambda images: outputs(images, 0),
        class_probabilities=lambda images: outputs(images, 1).softmax(-1),
    )


EXTRACTORS: dict[str, Callable[[str, torch.device], Extractor]] = {
    "judge": _judge,
    "judge-clip": _judge_clip,
    "testbed-clip": lambda _, device: _of_clip(load_clip(device=device), "testbed-clip", "testbed-clip"),
    "clip": lambda name, device: _of_clip(load_clip(name, device=device), f"clip:{name}", _label(name)),
    "vision": _vision,
    "inception": _inception,
}
_NAMED = ("clip", "vision")  # kinds that are followed by a hub id or a folder
