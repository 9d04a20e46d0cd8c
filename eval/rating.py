"""What a mid-block head thinks of finished images: its score of their features without noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from eval.extractor_base import Extractor
from guidance.encoding import FeatureEncoder
from guidance.guides import MidBlockGuide
from guidance.heads import Head
from guidance.pipelines import fingerprint

PROMPT = "prompt"  # in an image's info: what the denoiser is told of it


def rating_extractor(pipe: Any, head: Head, *, batch_size: int = 64) -> Extractor:
    """Rate finished images by a head: encoded, shown to the denoiser at t = 0, read at the head's tap.

    The head's own default objective is its score: the expected rating, or what the head has instead.

    Args:
        pipe: The model that the head was trained on.
        head: See :func:`guidance.heads.load_head`.
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
