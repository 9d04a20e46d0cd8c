"""Networks that grade images, by name: from images to features, class probabilities or embeddings shared with texts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

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
from guidance.testbed.judges import Judges, load_judges
from guidance.testbed.models import IMAGE_SIZE
from guidance.testbed.scenes import ATTRIBUTES
from guidance.utils.errors import UserError, first_line, nearest
from guidance.utils.images import fit_image, to_float, to_rgb

Images = Sequence[Image.Image | UInt8[np.ndarray, "h w 3"]]
Batch = Callable[[list[Image.Image]], Float[Tensor, "b d"]]


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A frozen network that maps an image to a vector of features."""

    name: str  # as requested: "judge", "vision:facebook/dinov2-small"
    label: str  # short form for names of metrics: "judge" gives "FD-judge"
    fingerprint: str  # of weights and preprocessing: the key of caches
    weights_fingerprint: str  # of the weights, as in records of guides: if equal, a guide graded its own work
    features: Batch  # maps a batch of RGB images to features
    batch_size: int = 64  # images at once; results depend on it by rounding only

    @classmethod
    def of(
        cls, network: nn.Module, preprocess: Mapping[str, Any], name: str, features: Batch, label: str = "", **more: Any
    ) -> Self:
        """Build one from its network; its label is by default the last part of the hub id or path in the name."""
        label = label or (name.partition(":")[2] or name).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
        weights = fingerprint(network)
        digest = hashlib.sha256(f"{type(network).__name__} {weights}".encode())
        digest.update(json.dumps(dict(preprocess), sort_keys=True, default=str).encode())
        for key, buffer in sorted(network.named_buffers()):  # batch norm keeps running statistics there
            digest.update(f"{key}{tuple(buffer.shape)}".encode() + buffer.cpu().double().numpy().tobytes())
        return cls(name, label, digest.hexdigest()[:16], weights, features, **more)

    def embed(self, images: Images) -> Float[np.ndarray, "n d"]:
        """Return the features of images (PIL, or uint8 arrays), float32; refuse those the network does not take."""
        return self._over(images, self.features)

    def _over(self, images: Images, function: Batch) -> Float[np.ndarray, "n d"]:
        parts = []
        for start in range(0, len(images), self.batch_size):
            batch = [_rgb(image) for image in images[start : start + self.batch_size]]
            with torch.no_grad():
                parts.append(function(batch).float().cpu().numpy())
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class TextExtractor(Extractor):
    """An extractor into a space shared with texts: unit vectors, whose cosines tell how well image and text agree."""

    clip: Clip = dataclasses.field(kw_only=True)

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Return unit vectors of texts, float32; long texts are truncated, see :meth:`truncated`."""
        return self.clip.embed_texts(texts).float().cpu().numpy()

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """Tell for each text whether only its beginning is read."""
        return self.clip.truncated(texts)


@dataclasses.dataclass(frozen=True)
class ClassExtractor(Extractor):
    """An extractor that is also a classifier, for the inception score."""

    class_probabilities: Batch = dataclasses.field(kw_only=True)

    def probabilities(self, images: Images) -> Float[np.ndarray, "n classes"]:
        """Return the probability of every class, float32; arguments and errors as for :meth:`embed`."""
        return self._over(images, self.class_probabilities)


@dataclasses.dataclass(frozen=True)
class Formula:
    """Numbers computed from the pixels of single images; cached like a network's features."""

    name: str
    version: int  # to be raised when the formula changes
    function: Callable[[UInt8[np.ndarray, "h w 3"]], Sequence[float]]

    @property
    def fingerprint(self) -> str:
        """The key of caches."""
        return f"{self.name}-{self.version}"

    def embed(self, images: Images) -> Float[np.ndarray, "n d"]:
        """Return the numbers of images, float32."""
        return np.array([self.function(np.asarray(_rgb(image))) for image in images], np.float32)


def _rgb(image: Image.Image | UInt8[np.ndarray, "h w 3"]) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    assert image.dtype == np.uint8, "expected 0..255: networks would scale floats twice"
    return Image.fromarray(image)


def load_extractor(name: str, *, device: torch.device | str | None = None, batch_size: int = 64) -> Extractor:
    """Load a network that grades, frozen, in eval mode and float32.

    Args:
        name: A key of `EXTRACTORS`, with ``:NAME`` where it takes one.  For other networks call
            `extractor_from_module`.
        device: None picks CUDA, then MPS, then the CPU.
        batch_size: Images at once.

    Returns:
        The extractor: a `TextExtractor` or `ClassExtractor` where the network has texts or classes.

    Raises:
        UserError: If there is no such network, or it cannot be used here.
    """
    if batch_size < 1:
        raise UserError(f"Expected a batch size from 1, got {batch_size}.")
    chosen = torch.device(default_device() if device is None else device)
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
    """Grade with any network that maps RGB float (b, 3, size, size) to (b, d).

    Args:
        module: Is put into eval mode, frozen, and moved to the device.
        name: For metrics and caches.  Caches identify modules by name, repr, weights and preprocessing: choose
            another name after a change of ``forward`` alone.
        size: Side of the square; an image's shorter side is resized to it (bicubic, in 8 bits) and the centre cropped.
        mean, std: Per channel; subtracted and divided by after scaling to ``value_range``.
        value_range: Values of black and white before that: (0, 1), (-1, 1), (0, 255).
        device: None picks CUDA, then MPS, then the CPU.
        batch_size: Images at once.
    """
    low, high = value_range
    scaled_mean, scaled_std = ([(m - low) / (high - low) for m in mean], [s / (high - low) for s in std])
    preprocess = Preprocess(size, size, tuple(scaled_mean), tuple(scaled_std))
    target = torch.device(default_device() if device is None else device)
    module.eval().requires_grad_(False).to(target)

    def features(images: list[Image.Image]) -> Tensor:
        x = to_float(np.stack([fit_image(image, size) for image in images]), target)
        out = module(preprocess.normalize(x))
        assert out.ndim == 2, f"expected features (b, d) from '{name}', got {tuple(out.shape)}; flatten or pool them"
        return out

    described = {**dataclasses.asdict(preprocess), "name": name, "module": repr(module)}
    return Extractor.of(module, described, name, features, label=name, batch_size=batch_size)


def _testbed_array(images: list[Image.Image]) -> UInt8[np.ndarray, "n 64 64 3"]:
    for image in images:
        if image.size != (IMAGE_SIZE, IMAGE_SIZE):
            raise UserError(
                f"Expected {IMAGE_SIZE}x{IMAGE_SIZE} images for the testbed's judges, got "
                f"{image.width}x{image.height}; choose a clip: or vision: network for other images."
            )
    return np.stack([np.asarray(image) for image in images])


def _judge(argument: str, device: torch.device) -> ClassExtractor:
    """Load the testbed's judge classifier: 128 features, and probabilities of the 8 objects."""
    classifier = load_judges(device=device).classifier
    return ClassExtractor.of(
        classifier,
        {"size": IMAGE_SIZE, "range": (-1, 1)},
        "judge",
        lambda images: classifier.features(to_float(_testbed_array(images), device)),
        class_probabilities=lambda images: classifier(to_float(_testbed_array(images), device))["object"].softmax(-1),
    )


def _judge_clip(argument: str, device: torch.device) -> TextExtractor:
    """Load the testbed's judge CLIP."""
    judges = load_judges(device=device)
    half = (0.5, 0.5, 0.5)
    clip = Clip(judges.clip, judges.tokenizer, Preprocess(IMAGE_SIZE, IMAGE_SIZE, half, half), "judge-clip")
    return _of_clip(clip, "judge-clip", lambda images: clip.embed_pil(_testbed_array(images)))


def _of_clip(clip: Clip, name: str, features: Batch | None = None) -> TextExtractor:
    features = features or (lambda images: clip.embed_pil(images, batch_size=len(images)))
    return TextExtractor.of(clip.model, dataclasses.asdict(clip.preprocess), name, features, clip=clip)


def _vision(argument: str, device: torch.device) -> Extractor:
    """Load a vision encoder with its own image processor: pooled output, else the first token (CLS)."""
    model, processor, pooler = _load_vision(argument)
    model = model.eval().requires_grad_(False).to(device, torch.float32)

    def features(images: list[Image.Image]) -> Float[Tensor, "b d"]:
        pixels = torch.as_tensor(np.stack(processor(images=images)["pixel_values"])).to(device, torch.float32)
        output = model(pixel_values=pixels)
        pooled = output.get("pooler_output") if pooler else None
        return rearrange(output.last_hidden_state[:, 0] if pooled is None else pooled, "b ... -> b (...)")

    described = {**processor.to_dict(), "processor": type(processor).__name__}
    return Extractor.of(model, described, f"vision:{argument}", features)


def _load_vision(name: str) -> tuple[Any, Any, bool]:
    """Load an encoder and its processor, and tell whether the weights include those of its pooler."""
    import transformers

    # the processor uses Pillow, whether or not torchvision is installed: a cache outlives an installation
    newer = int(transformers.__version__.split(".")[0]) >= 5
    on_pillow: dict[str, Any] = {"backend": "pil"} if newer else {"use_fast": False}
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **on_pillow)
        model, info = transformers.AutoModel.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            "Expected a folder or a reachable hub id of a vision encoder with safetensors and an image processor, but "
            f"'{name}' could not be loaded: {first_line(error)[:200]}"
        ) from error
    if getattr(model, "main_input_name", "") != "pixel_values" or hasattr(model, "get_image_features"):
        raise UserError(
            f"Expected a vision encoder in '{name}', got a {type(model).__name__}; write clip:{name} for a CLIP or "
            "SigLIP."
        )
    missing = {key for key in info["missing_keys"] if not key.endswith("mask_token")}
    untrained_pooler = {key for key in missing if "pooler" in key}  # initialised at random: useless
    if missing - untrained_pooler:
        raise UserError(
            f"Expected all weights of a {type(model).__name__} in '{name}', but {len(missing)} are missing, such as "
            f"'{min(missing)}'; choose a folder that the model itself was saved into."
        )
    return model, processor, not untrained_pooler


def _inception(argument: str, device: torch.device) -> ClassExtractor:
    """Load the Inception of the published FID (2048 features) and inception score ("logits_unbiased", 1008 classes).

    torch-fidelity itself downloads and unpickles the weights at the first use.  Tested on torch-fidelity 0.3.0 with
    random weights only, never on the published ones.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(
            f"Expected torch-fidelity for the real Inception, but it cannot be imported ({error}); pip install "
            "torchvision torch-fidelity, or choose another network."
        ) from error
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).eval().to(device)

    def outputs(images: list[Image.Image], which: int) -> Tensor:
        # the network resizes images itself, so they come in their own size; a batch needs one size
        batches = [images] if len({image.size for image in images}) == 1 else [[image] for image in images]
        arrays = [np.stack([np.asarray(image) for image in batch]) for batch in batches]
        tensors = [rearrange(torch.from_numpy(a), "b h w c -> b c h w").contiguous() for a in arrays]
        return torch.cat([network(x.to(device))[which] for x in tensors])

    return ClassExtractor.of(
        network,
        {"resize": "inside torch-fidelity"},
        "inception",
        lambda images: outputs(images, 0),
        class_probabilities=lambda images: outputs(images, 1).softmax(-1),
    )


EXTRACTORS: dict[str, Callable[[str, torch.device], Extractor]] = {
    "judge": _judge,
    "judge-clip": _judge_clip,
    "testbed-clip": lambda _, device: _of_clip(load_clip(device=device), "testbed-clip"),
    "clip": lambda name, device: _of_clip(load_clip(name, device=device), f"clip:{name}"),
    "vision": _vision,
    "inception": _inception,
}

_NAMED = ("clip", "vision")  # followed by a hub id or a folder
PROMPT = "prompt"  # key of an image's info that holds its prompt


def judge_readings(judges: Judges) -> Extractor:
    """Read the class of each attribute that the testbed's judge classifier sees, in the order of ``ATTRIBUTES``."""

    def features(images: list[Image.Image]) -> Float[Tensor, "b attributes"]:
        seen = judges.classify(np.stack([np.asarray(image) for image in images]))
        return torch.tensor(np.stack([seen[name] for name in ATTRIBUTES], 1), dtype=torch.float32)

    weights = fingerprint(judges.classifier)
    return Extractor("judge classifier", "judge-readings", weights, weights, features)


def rating_extractor(pipe: Pipeline, head: Head, *, batch_size: int = 64) -> Extractor:
    """Rate finished images by a head: encode them, run the denoiser at t = 0, and read the head's tap.

    The score is the head's default objective: the expected rating, or what the head has instead.

    Args:
        pipe: The model that the head was trained on.

    Returns:
        An extractor of one number an image.  Heads that use captions read them from ``image.info["prompt"]``.
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
