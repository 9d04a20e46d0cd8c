"""Embed images and texts with a CLIP or SigLIP, for guidance and evaluation alike."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from guidance.utils.errors import UserError, first_line, nearest
from guidance.utils.images import to_rgb

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Clip:
    """A frozen CLIP or SigLIP that maps images and texts to unit vectors of one space; see :func:`load_clip`.

    Attributes:
        model: The transformers model.
        tokenizer: Its tokenizer.
        preprocess: Resize, crop and normalisation of images.
        name: Name it was loaded by.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, preprocess: Preprocess, name: str
    ) -> None:
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
        """Height and width of the network's input, in pixels."""
        return self.preprocess.size

    @functools.cached_property
    def logit_scale(self) -> float:
        """Factor from cosines to logits, ``exp(logit_scale)``: about 100 for CLIP; the inverse temperature."""
        return float(self.model.logit_scale.detach().double().exp())

    @functools.cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the weights, to show in reports that the guiding network did not grade."""
        return fingerprint(self.model)

    def to(self, device: torch.device | str) -> Clip:
        """Move to a device, in place."""
        self.model.to(device)
        return self

    def embed_images(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Embed images, differentiably: resize, crop the centre, normalise, vision tower, unit length.

        Args:
            x: RGB in -1..1, float, any size.  Values outside (decoders overshoot) are not clipped, which keeps their
                gradient.

        Returns:
            Unit vectors, float32 (float64 from a float64 model).
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
            batch_size: Images per forward.

        Returns:
            Unit vectors as of :meth:`embed_images`, on CLIP's device.
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
        """Embed texts; those longer than ``max_tokens`` are cut, see :meth:`truncated`.

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
    """Normalise the result of ``get_*_features``: a tensor in transformers 4, an object in 5."""
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
        dtype: None is float32, which guidance needs; half precision suits grading many images.
        revision: Branch, tag or commit on the hub.
        local_files_only: Do not access the hub.

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
            f"be loaded: {first_line(error)[:200]}{nearest(str(name), [TESTBED])}"
        ) from error
    _check_model(model, tokenizer, str(name))
    preprocess = Preprocess.from_config(config, int(model.config.vision_config.image_size))
    model.to(default_device() if device is None else device, dtype or torch.float32)
    return Clip(model, tokenizer, preprocess, str(name))


def _check_folder(folder: Path) -> None:
    """Refuse an incomplete folder, for which transformers gives long errors or an empty tokenizer."""
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"Expected safetensors in '{folder}', found pickled weights only, which can run code when they are read; "
            "convert them with save_pretrained(..., safe_serialization=True) where you trust them."
        )
    for missing, names in {
        "config.json": ["config.json"],
        "model.safetensors": ["*.safetensors"],
        "preprocessor_config.json": ["preprocessor_config.json", "processor_config.json"],
        "tokenizer": ["tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt"],
    }.items():
        if not any(True for name in names for _ in folder.glob(name)):
            raise UserError(
                f"Expected a CLIP in transformers format in '{folder}', found no {missing} there; save the model, its "
                "image processor and its tokenizer into one folder, or write 'testbed' for the embedded one."
            )


def _check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
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
    """Preprocessing of images for CLIP, by the model's ``preprocessor_config.json``.

    Attributes:
        size: Side of the square input, in pixels.
        short_side: Resize the shorter side to this, keep the aspect ratio, then crop the centre (CLIP); None resizes
            the full image to the square (SigLIP).
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
        """Read the configuration of an image processor, of transformers 5 or older, for an input size."""
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
        """Return height and width between resize and crop."""
        if self.short_side is None:
            return self.size, self.size
        short = min(height, width)
        return int(self.short_side * height / short), int(self.short_side * width / short)

    def fit(self, x: Float[Tensor, "... h w"]) -> Float[Tensor, "... size size"]:
        """Resize and crop to the input square."""
        return self.crop(resize(x, *self.resized(*x.shape[-2:]), self.mode))

    def crop(self, x: Float[Tensor, "... h w"]) -> Float[Tensor, "... size size"]:
        """Crop the centre to the input square."""
        top, left = (x.shape[-2] - self.size) // 2, (x.shape[-1] - self.size) // 2
        return x[..., top : top + self.size, left : left + self.size]

    def normalize(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Normalise pixels in -1..1: ``((x + 1) / 2 - mean) / std``."""
        mean, std = (rearrange(x.new_tensor(values), "c -> c 1 1") for values in (self.mean, self.std))
        return ((x + 1) / 2 - mean) / std


def _sides(size: Any) -> set[Any]:
    """Return the sides in a processor's ``size`` or ``crop_size``; the first CLIPs have plain numbers."""
    return {size.get("height"), size.get("width")} if isinstance(size, Mapping) else {size}


def resize(x: Float[Tensor, "... h w"], height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Resize with antialiasing, as ``F.interpolate(..., antialias=True)`` and Pillow do.

    ``Y = R_h X R_w^T``: the filter is separable, so two products with fixed matrices suffice.  Unlike the
    built-in kernel its gradient is deterministic on CUDA, and it runs on every device and in float64.

    Args:
        x: Images, any range; values may overshoot the range at edges.
        height, width: New size in pixels.  A side of this size is left unchanged, bit for bit.
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
    """Return the resize of one axis as a matrix: column ``i`` is the resized ``i``-th unit vector."""
    # an inference tensor in the cache would break later backward passes
    with torch.inference_mode(False), torch.no_grad():
        basis = rearrange(torch.eye(old, dtype=torch.float64), "i x -> 1 i 1 x")
        columns = F.interpolate(basis, size=(1, new), mode=mode, antialias=True, align_corners=False)
        return rearrange(columns, "1 i 1 x -> x i").float().contiguous()
