"""The judges of the testbed: networks that grade generated images and never guide.

* the *judge classifier* reads object, colour, time and terrain, and gives 128-d features for Frechet
  distances;
* the *judge CLIP* embeds images and captions in one space; its architecture and its seed differ from those of
  the CLIP whose text tower conditions the pipeline.

Folder layout: ``judge_classifier/`` (config.json, model.safetensors), ``judge_clip/`` (transformers) and
``tokenizer/``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from guidance.testbed.models import IMAGE_SIZE, MAX_TOKENS, JudgeClassifier
from guidance.testbed.scenes import ATTRIBUTES, parse_caption
from guidance.utils.errors import UserError
from guidance.utils.images import to_float
from guidance.utils.io import read_json

WEIGHTS = Path(__file__).parent / "weights"


@dataclasses.dataclass
class Judges:
    """The judge networks, frozen, with numpy in and numpy out.

    Images are uint8 ``(n, 64, 64, 3)``, at least one.  Results depend on the batch size only by float32 rounding.
    """

    classifier: JudgeClassifier
    clip: CLIPModel
    tokenizer: CLIPTokenizer
    device: torch.device | str = "cpu"
    batch_size: int = 128

    def classify(self, images: UInt8[np.ndarray, "n 64 64 3"]) -> dict[str, Int[np.ndarray, " n"]]:
        """Return the most probable class of each attribute, as indices into ``ATTRIBUTES[name]``."""

        def indices(x: Tensor) -> Tensor:
            logits = self.classifier(x)
            return torch.stack([logits[name].argmax(-1) for name in ATTRIBUTES], 1)

        return dict(zip(ATTRIBUTES, self._over(images, indices).T, strict=True))

    def features(self, images: UInt8[np.ndarray, "n 64 64 3"]) -> Float[np.ndarray, "n 128"]:
        """Return the classifier's pooled features, float32, for Frechet distances ("FD-judge")."""
        return self._over(images, self.classifier.features)

    def clip_embed_images(self, images: UInt8[np.ndarray, "n 64 64 3"]) -> Float[np.ndarray, "n d"]:
        """Return unit-length judge-CLIP embeddings of images, float32."""
        return self._over(images, lambda x: _unit(self.clip.get_image_features(pixel_values=x)))

    def clip_embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Return unit-length judge-CLIP embeddings of texts, float32; longer ones than 24 tokens are cut."""
        ids = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).input_ids
        return self._batched(ids, lambda part: _unit(self.clip.get_text_features(input_ids=part.to(self.device))))

    def agreement(
        self, images: UInt8[np.ndarray, "n 64 64 3"], captions: Sequence[str]
    ) -> dict[str, Bool[np.ndarray, " n"]]:
        """Return, for each attribute, whether the classifier sees in each image what its caption says."""
        assert len(captions) == len(images)
        said = [parse_caption(caption) for caption in captions]
        seen = self.classify(images)
        return {
            name: seen[name] == np.array([classes.index(attributes[name]) for attributes in said], dtype=np.int64)
            for name, classes in ATTRIBUTES.items()
        }

    def _over(self, images: UInt8[np.ndarray, "n 64 64 3"], function: Callable[[Tensor], Tensor]) -> np.ndarray:
        assert images.dtype == np.uint8 and images.shape[1:] == (IMAGE_SIZE, IMAGE_SIZE, 3)
        return self._batched(images, lambda part: function(to_float(np.ascontiguousarray(part), self.device)))

    @torch.no_grad()
    def _batched(self, items: np.ndarray | Tensor, function: Callable[[Any], Tensor]) -> np.ndarray:
        starts = range(0, len(items), self.batch_size)
        return torch.cat([function(items[i : i + self.batch_size]).cpu() for i in starts]).numpy()


def _unit(output: Any) -> Tensor:
    """Normalise the result of `CLIPModel.get_*_features`: a tensor in transformers 4, an object in 5."""
    embedding = output if isinstance(output, Tensor) else output.pooler_output
    return nn.functional.normalize(embedding.float(), dim=-1)


def load_judges(
    folder: str | os.PathLike[str] | None = None, *, device: torch.device | str = "cpu", batch_size: int = 128
) -> Judges:
    """Load the judges.

    Args:
        folder: Folder of ``judge_classifier``, ``judge_clip`` and ``tokenizer``; None for the shipped one.
        device: Device of the networks, which run in float32 (the files may be fp16).
        batch_size: Images per forward.
    """
    root = Path(folder) if folder is not None else WEIGHTS
    if not (root / "judge_classifier" / "model.safetensors").is_file():
        raise UserError(f"Expected trained testbed weights in '{root}', found none; train.testbed writes some.")
    clip = CLIPModel.from_pretrained(root / "judge_clip", local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(root / "tokenizer", local_files_only=True)
    classifier = load_classifier(root / "judge_classifier")
    for model in (classifier, clip):
        model.float().to(device).eval().requires_grad_(False)
    return Judges(classifier, clip, tokenizer, device, batch_size)


def load_classifier(folder: str | os.PathLike[str]) -> JudgeClassifier:
    """Load a judge classifier: ``model.safetensors`` and ``config.json`` (``{"width": 32}``, the default)."""
    config = Path(folder) / "config.json"
    width = read_json(config).get("width", 32) if config.is_file() else 32
    classifier = JudgeClassifier(width)
    tensors = {name: tensor.float() for name, tensor in load_file(Path(folder) / "model.safetensors").items()}
    classifier.load_state_dict(tensors)
    return classifier
