"""What every network that grades images looks like to its callers; `eval.extractors` loads them by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from guidance.clip import Clip
from guidance.encoding import to_rgb
from guidance.errors import UserError
from guidance.pipelines import fingerprint

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
