"""Networks that grade images, by name: images to features, to class probabilities, or to a space shared with texts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from guidance.data.encoding import FeatureEncoder
from guidance.guides import MidBlockGuide
from guidance.heads import Head
from guidance.models.clip import Clip, Preprocess, load_clip
from guidance.models.denoiser import fingerprint
from guidance.models.pipelines import default_device
from guidance.models.types import Pipeline
from guidance.utils.errors import UserError, nearest
from guidance.utils.images import fit_image, to_float, to_rgb

Images = Sequence[Image.Image | UInt8[np.ndarray, "h w 3"]]

Batch = Callable[[list[Image.Image]], Float[Tensor, "b d"]]

_TEXTS = 256


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A frozen network that makes a vector of features of an image.

    Attributes:
        name: What it was asked for by: "judge", "vision:facebook/dinov2-small".
        label: Short, for names of metrics: "judge" gives "FD-judge".
        fingerprint: Of the weights and of what is done to images before: the key of caches.
        weights_fingerprint: Of the weights, as in records of the guides: equal means that a guide graded itself.
        features: Of a batch of RGB images.
        batch_size: Images at once; results depend on it by rounding only.
    """

    name: str
    label: str
    fingerprint: str
    weights_fingerprint: str
    features: Batch
    batch_size: int = 64

    def embed(self, images: Images) -> Float[np.ndarray, "n d"]:
        """Return the features of images, float32.

        Args:
            images: PIL images or uint8 arrays (h, w, 3).

        Raises:
            UserError: If there is none, one is of another kind, or the network takes no such images.
        """
        return self._over(images, self.features)

    def _over(self, images: Images, function: Batch) -> Float[np.ndarray, "n d"]:
        if isinstance(images, Image.Image) or not len(images):
            raise UserError("Expected a list of one or more images; put a single image in a list.")
        parts = []
        for start in range(0, len(images), self.batch_size):
            batch = [_rgb(image) for image in images[start : start + self.batch_size]]
            with torch.no_grad():
                parts.append(function(batch).float().cpu().numpy())
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class TextExtractor(Extractor):
    """An extractor of a space shared with texts: unit vectors, whose cosines say how well image and text fit.

    Attributes:
        clip: The adapter.
    """

    clip: Clip = dataclasses.field(kw_only=True)

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Return unit vectors of texts, float32; long ones are cut, see :meth:`truncated`."""
        return self.clip.embed_texts(texts, batch_size=_TEXTS).float().cpu().numpy()

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """Tell for each text whether only its beginning is read."""
        return self.clip.truncated(texts)


@dataclasses.dataclass(frozen=True)
class ClassExtractor(Extractor):
    """An extractor that is a classifier, for the inception score.

    Attributes:
        class_probabilities: Of a batch of RGB images.
    """

    class_probabilities: Batch = dataclasses.field(kw_only=True)

    def probabilities(self, images: Images) -> Float[np.ndarray, "n classes"]:
        """Return the probability of every class, float32; arguments and errors as of :meth:`embed`."""
        return self._over(images, self.class_probabilities)


def _rgb(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise UserError(
            f"Expected PIL images or uint8 arrays (h, w, 3), got {array.dtype} of shape {array.shape}; round floats to "
            "0..255 first, networks would scale them twice."
        )
    return Image.fromarray(array)


def network_key(network: nn.Module, preprocess: Mapping[str, Any]) -> str:
    """Identify weights, buffers (running statistics of batch norm are no parameters) and preprocessing."""
    digest = hashlib.sha256(f"{type(network).__name__} {fingerprint(network)}".encode())
    digest.update(json.dumps(dict(preprocess), sort_keys=True, default=str).encode())
    for name, buffer in sorted(network.named_buffers()):
        digest.update(f"{name}{tuple(buffer.shape)}".encode() + buffer.cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


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

PROMPT = "prompt"  # in an image's info: what the denoiser is told of it


def rating_extractor(pipe: Pipeline, head: Head, *, batch_size: int = 64) -> Extractor:
    """Rate finished images by a head: encoded, shown to the denoiser at t = 0, read at the head's tap.

    The head's own default objective is its score: the expected rating, or what the head has instead.

    Args:
        pipe: The model that the head was trained on.
        head: See :func:`guidance.heads.networks.load_head`.
        batch_size: Images at once.

    Returns:
        An extractor of one number an image.  Heads that know captions read them from ``image.info["prompt"]``.

    Raises:
        UserError: If the head does not fit the model.
    """
    guide = MidBlockGuide(head)
    guide.prepare(pipe)
    encoder = FeatureEncoder(pipe, tap=head.config.tap, noise="none", caption=head.config.caption)

    @torch.no_grad()
    def features(images: Sequence[Image.Image]) -> Float[Tensor, "b 1"]:
        x0 = encoder.latents(images)
        text = encoder.text([str(image.info.get(PROMPT, "")) for image in images])
        h, t = encoder.encode(x0, text, [(k, 0) for k in range(len(x0))])
        return guide.score(h.float(), t)[:, None]

    weights = fingerprint(head)
    key = f"{weights}-{fingerprint(pipe.unet)}"
    return Extractor(f"head: {head.config.target}", "head", key, weights, features, batch_size)
