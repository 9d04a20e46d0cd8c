"""The judges of the testbed: networks that grade generated images and guide none.

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
from guidance.testbed.truth import check_images
from guidance.utils.errors import UserError
from guidance.utils.images import to_float
from guidance.utils.io import read_json

WEIGHTS = Path(__file__).parent / "weights"


@dataclasses.dataclass
class Judges:
    """The judge networks, frozen, with numpy in and numpy out.

    Images are uint8 ``(n, 64, 64, 3)``.  Batches are made inside; results do not depend on their size beyond
    the rounding of float32.
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
        if isinstance(texts, str) or not texts:
            raise UserError(f"Expected a list of one or more captions, got {texts!r}.")
        ids = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).input_ids
        return self._batched(
            ids, lambda part: _unit(self.clip.get_text_features(input_ids=part.to(self.device)))
        )

    def agreement(
        self, images: UInt8[np.ndarray, "n 64 64 3"], captions: Sequence[str]
    ) -> dict[str, Bool[np.ndarray, " n"]]:
        """Return, for each attribute, whether the classifier sees in each image what its caption says.

        Raises:
            UserError: If there is not one caption an image, or a caption is not of the world's grammar.
        """
        if len(captions) != len(images):
            raise UserError(f"Expected one caption an image, got {len(captions)} for {len(images)} images.")
        said = [parse_caption(caption) for caption in captions]
        seen = self.classify(images)
        return {
            name: seen[name]
            == np.array([classes.index(attributes[name]) for attributes in said], dtype=np.int64)
            for name, classes in ATTRIBUTES.items()
        }

    def _over(self, images: Any, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        array = check_images(images)
        if array.shape[1:3] != (IMAGE_SIZE, IMAGE_SIZE):
            raise UserError(
                f"Expected {IMAGE_SIZE}x{IMAGE_SIZE} images, which is all the judges know, got "
                f"{array.shape[1]}x{array.shape[2]}; judge images of the testbed pipeline only."
            )
        return self._batched(array, lambda part: function(to_float(np.ascontiguousarray(part), self.device)))

    @torch.no_grad()
    def _batched(self, items: Any, function: Callable[[Any], Tensor]) -> np.ndarray:
        if not len(items):
            raise UserError("Expected at least one image, got none.")
        starts = range(0, len(items), self.batch_size)
        return torch.cat([function(items[i : i + self.batch_size]).cpu() for i in starts]).numpy()


def _unit(output: Any) -> Tensor:
    """Normalise what `CLIPModel.get_*_features` returns: a tensor in transformers 4, an object in 5."""
    embedding = output if isinstance(output, Tensor) else output.pooler_output
    return nn.functional.normalize(embedding.float(), dim=-1)


def load_judges(
    folder: str | os.PathLike[str] | None = None, *, device: torch.device | str = "cpu", batch_size: int = 128
) -> Judges:
    """Load the judges.

    Args:
        folder: Where ``judge_classifier``, ``judge_clip`` and ``tokenizer`` lie; None for the shipped ones.
        device: Where they run, in float32 (the files may be fp16).
        batch_size: Images at once.

    Raises:
        UserError: If a part is missing.
    """
    root = Path(folder) if folder is not None else WEIGHTS
    needed = (
        "judge_classifier/model.safetensors",
        "judge_clip/model.safetensors",
        "tokenizer/tokenizer_config.json",
    )
    for name in needed:
        if not (root / name).is_file():
            raise UserError(
                f"Expected the judges' file '{name}' in '{root}', found none; name a folder with trained "
                "testbed weights (train/testbed.py makes one)."
            )
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
    try:
        classifier.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"Expected the weights of a judge classifier of width {width} in '{folder}', got others; check "
            "its config.json."
        ) from error
    return classifier
