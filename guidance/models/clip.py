"""The one CLIP adapter: guidance and evaluation see images and texts through the same object."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from guidance.models.denoiser import fingerprint
from guidance.models.pipelines import TESTBED, TESTBED_FOLDER, default_device
from guidance.utils.errors import UserError, nearest
from guidance.utils.images import to_rgb


class Clip:
    """A frozen CLIP or SigLIP: images and texts to unit vectors of one space; see :func:`load_clip`.

    Attributes:
        model: The transformers model.
        tokenizer: Its tokenizer.
        preprocess: What an image goes through first.
        name: What it was loaded from.
    """

    def __init__(self, model: Any, tokenizer: Any, preprocess: Preprocess, name: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.preprocess, self.name = tokenizer, preprocess, name
        self.max_tokens = int(model.config.text_config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def image_size(self) -> int:
        """Height and width of the images the network takes."""
        return self.preprocess.size

    @functools.cached_property
    def logit_scale(self) -> float:
        """Factor from cosines to logits, ``exp(logit_scale)``: about 100 for CLIP; the inverse temperature."""
        return float(self.model.logit_scale.detach().double().exp())

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the weights, so that a report can show that the guiding network did not grade."""
        return fingerprint(self.model)

    def to(self, device: torch.device | str) -> Clip:
        """Move to a device, in place."""
        self.model.to(device)
        return self

    def embed_images(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Embed images, differentiably: resize, crop the centre, normalise, vision tower, unit length.

        Args:
            x: RGB in -1..1, float, any size.  Values outside (decoders overshoot) pass unclipped, so that their
                gradient lives.

        Returns:
            Unit vectors, float32 (float64 from a float64 model).

        Raises:
            UserError: If the images have another shape or dtype.
        """
        if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
            raise UserError(
                f"Expected RGB images (b, 3, h, w), float in -1..1, got {tuple(x.shape)} of {x.dtype}; give PIL "
                "images and uint8 arrays to embed_pil."
            )
        x = x.to(self.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
        pixels = self.preprocess.normalize(self.preprocess.fit(x)).to(self.dtype)
        return _unit(self.model.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def embed_pil(
        self, images: Sequence[Image.Image | NDArray[np.uint8]] | NDArray[np.uint8], *, batch_size: int = 32
    ) -> Float[Tensor, "b d"]:
        """Embed finished images; resized by Pillow in 8 bits, as the model's own image processor does.

        Args:
            images: PIL images of any mode and size, or uint8 arrays (h, w, 3).
            batch_size: Images at once.

        Returns:
            Unit vectors as :meth:`embed_images` gives, on CLIP's device.
        """
        if isinstance(images, Image.Image) or not len(images):
            raise UserError("Expected a list of one or more images; put a single image in a list.")
        parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
        return torch.cat(
            [self.embed_images(torch.stack(list(map(self._pixels, part))).to(self.device)) for part in parts]
        )

    def _pixels(self, image: Image.Image | NDArray[np.uint8]) -> Float[Tensor, "3 size size"]:
        rgb = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))
        height, width = self.preprocess.resized(rgb.height, rgb.width)
        if (width, height) != rgb.size:
            rgb = rgb.resize((width, height), Image.Resampling[self.preprocess.mode.upper()])
        pixels = torch.from_numpy(np.array(rgb, dtype=np.float32)) / 127.5 - 1
        return self.preprocess.crop(rearrange(pixels, "h w c -> c h w"))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Float[Tensor, "b d"]:
        """Embed texts; longer ones than ``max_tokens`` are cut, see :meth:`truncated`.

        Returns:
            Unit vectors, float32 (float64 from a float64 model), on CLIP's device.
        """
        texts = _texts(texts)
        parts = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
        return torch.cat([self._embed_texts(part) for part in parts])

    def _embed_texts(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        if self.model.config.model_type.startswith("siglip"):  # trained to attend to its padding
            return _unit(self.model.get_text_features(input_ids=tokens.input_ids))
        masks = {"attention_mask": tokens.attention_mask} if "attention_mask" in tokens else {}
        return _unit(self.model.get_text_features(input_ids=tokens.input_ids, **masks))

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """Tell for each text whether CLIP reads only its beginning."""
        ids = self.tokenizer(_texts(texts), verbose=False).input_ids
        return [len(tokens) > self.max_tokens for tokens in ids]


def _texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"Expected a list of one or more texts, got {texts!r}; put a single text in a list.")
    return list(texts)


def _unit(output: Any) -> Tensor:
    """Normalise what ``get_*_features`` returns: a tensor in transformers 4, an object in 5."""
    embedding = output if isinstance(output, Tensor) else output.pooler_output
    embedding = embedding if embedding.dtype == torch.float64 else embedding.float()
    return torch.nn.functional.normalize(embedding, dim=-1)


def load_clip(
    name: str | os.PathLike[str] = TESTBED,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    local_files_only: bool | None = None,
) -> Clip:
    """Load a CLIP or SigLIP, frozen and in eval mode.

    Args:
        name: "testbed" (embedded), a folder in transformers format, or a hub id such as
            "laion/CLIP-ViT-B-32-laion2B-s34B-b79K".
        device: None picks CUDA, then MPS, then the CPU.
        dtype: None is float32, which guidance needs; half precision is for grading many images.
        revision: Branch, tag or commit on the hub.
        local_files_only: Never reach for the hub.

    Returns:
        The adapter.  Weights are read from safetensors only, and no code of a downloaded folder is run.

    Raises:
        UserError: If there is no such model, it has no safetensors, or is no CLIP.
    """
    source = str(TESTBED_FOLDER / "clip" if name == TESTBED else name)
    if os.path.isdir(source):
        _check_folder(Path(source))
    given = {"revision": revision, "local_files_only": local_files_only}
    options = {key: value for key, value in given.items() if value is not None}
    from transformers import AutoModel, AutoTokenizer, ImageProcessingMixin

    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
        model = AutoModel.from_pretrained(source, use_safetensors=True, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"Expected 'testbed', a folder or a reachable hub id of a CLIP with safetensors, but '{name}' could not "
            f"be loaded: {str(error).strip().splitlines()[0][:200]}{nearest(str(name), [TESTBED])}"
        ) from error
    _check_model(model, tokenizer, str(name))
    preprocess = Preprocess.from_config(config, int(model.config.vision_config.image_size))
    model.to(default_device() if device is None else device, dtype or torch.float32)
    return Clip(model, tokenizer, preprocess, str(name))


def _check_folder(folder: Path) -> None:
    """Refuse a folder before the hub's libraries do so in many words, or take an empty tokenizer for one."""
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"Expected safetensors in '{folder}', found pickled weights only, which can run code when they are read; "
            "convert them with save_pretrained(..., safe_serialization=True) where you trust them."
        )
    for what, names in {
        "config.json": ["config.json"],
        "model.safetensors": ["*.safetensors"],
        "preprocessor_config.json": ["preprocessor_config.json", "processor_config.json"],
        "tokenizer": ["tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt"],
    }.items():
        if not any(True for name in names for _ in folder.glob(name)):
            raise UserError(
                f"Expected a CLIP in transformers format in '{folder}', found no {what} there; save the model, its "
                "image processor and its tokenizer into one folder, or write 'testbed' for the embedded one."
            )


def _check_model(model: Any, tokenizer: Any, name: str) -> None:
    towers = all(hasattr(model, f"get_{kind}_features") for kind in ("image", "text"))
    if not towers or not hasattr(model.config.vision_config, "image_size"):
        raise UserError(
            f"Expected a CLIP or SigLIP of fixed image size, got a {type(model).__name__} in '{name}'; choose a model "
            "with get_image_features and get_text_features."
        )
    vocabulary = model.config.text_config.vocab_size
    if not vocabulary / 2 <= len(tokenizer):  # transformers makes an empty tokenizer where files are missing
        raise UserError(
            f"Expected the tokenizer of '{name}' to have about {vocabulary} tokens, got {len(tokenizer)}; save the "
            "model's own tokenizer beside its weights."
        )


_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as image processors write them


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """What happens to an image before CLIP's first layer, as the model's ``preprocessor_config.json`` says.

    Attributes:
        size: Side of the square the network takes, in pixels.
        short_side: Resize the shorter side to this and keep the aspect, then crop the centre (CLIP); None squeezes
            the whole image into the square (SigLIP).
        mean, std: Per channel, for pixels in 0..1.
        mode: "bicubic" or "bilinear".
    """

    size: int
    short_side: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "bicubic"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], size: int) -> Preprocess:
        """Read an image processor's configuration, of transformers 5 or older, for a network of this input size.

        Raises:
            UserError: If the processor does anything else than resize, crop and normalise to this size.
        """
        wanted, crop = config.get("size", size), config.get("crop_size", size)
        short = wanted.get("shortest_edge") if isinstance(wanted, Mapping) else wanted
        given = _sides(wanted) if short is None else _sides(crop)
        mode = _RESAMPLE.get(config.get("resample", 3))
        known = {"image_mean", "image_std"} <= config.keys() and config.get("do_normalize", True)
        in_unit = abs(config.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-4
        if given != {size} or (short or size) < size or mode is None or not known or not in_unit:
            keys = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
            got = {key: config[key] for key in keys if key in config}
            raise UserError(
                f"Expected an image processor that makes normalised {size}x{size} images by bilinear or bicubic "
                f"resizing, got {got}; choose a CLIP or SigLIP of fixed "
                "image size and keep its own preprocessor_config.json."
            )
        return cls(size, short, tuple(config["image_mean"]), tuple(config["image_std"]), mode)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize and before the crop."""
        if self.short_side is None:
            return self.size, self.size
        short = min(height, width)
        return int(self.short_side * height / short), int(self.short_side * width / short)

    def fit(self, x: Float[Tensor, "... h w"]) -> Float[Tensor, "... size size"]:
        """Resize and crop to the network's square."""
        return self.crop(resize(x, *self.resized(*x.shape[-2:]), self.mode))

    def crop(self, x: Float[Tensor, "... h w"]) -> Float[Tensor, "... size size"]:
        """Cut the network's square out of the centre."""
        top, left = (x.shape[-2] - self.size) // 2, (x.shape[-1] - self.size) // 2
        return x[..., top : top + self.size, left : left + self.size]

    def normalize(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """From pixels in -1..1 to the network's units: ``((x + 1) / 2 - mean) / std``."""
        mean, std = (rearrange(x.new_tensor(values), "c -> c 1 1") for values in (self.mean, self.std))
        return ((x + 1) / 2 - mean) / std


def _sides(size: Any) -> set[Any]:
    """The sides a processor's ``size`` or ``crop_size`` names; the first CLIPs have plain numbers."""
    return {size.get("height"), size.get("width")} if isinstance(size, Mapping) else {size}


def resize(x: Float[Tensor, "... h w"], height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Resize with antialiasing, as ``F.interpolate(..., antialias=True)`` and Pillow do.

    ``Y = R_h X R_w^T``: the filter is separable, so two products with fixed matrices are the whole resize.  Unlike the
    built-in kernel its gradient is deterministic on CUDA, and it runs on every device and in float64.

    Args:
        x: Images, any range; values may overshoot the range at edges.
        height, width: New size in pixels.  A side that has it already is left alone, bit for bit.
        mode: "bicubic" or "bilinear".

    Returns:
        Shape (..., height, width), dtype of ``x``.

    >>> resize(torch.ones(1, 3, 8, 6), 4, 4).shape
    torch.Size([1, 3, 4, 4])
    """
    if x.shape[-1] != width:
        x = x @ _matrix(x.shape[-1], width, mode).to(x).mT
    if x.shape[-2] != height:
        x = _matrix(x.shape[-2], height, mode).to(x) @ x
    return x


@functools.lru_cache(maxsize=64)
def _matrix(old: int, new: int, mode: str) -> Float[Tensor, "new old"]:
    """The resize of one axis as a matrix: column ``i`` is the resized ``i``-th unit vector."""
    # an inference tensor in the cache would spoil later backward passes
    with torch.inference_mode(False), torch.no_grad():
        basis = rearrange(torch.eye(old, dtype=torch.float64), "i x -> 1 i 1 x")
        columns = F.interpolate(basis, size=(1, new), mode=mode, antialias=True, align_corners=False)
        return rearrange(columns, "1 i 1 x -> x i").float().contiguous()
