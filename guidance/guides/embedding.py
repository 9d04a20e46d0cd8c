"""Mid-block CLIP guidance: a head predicts the CLIP embedding of the final image, without running VAE or CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from guidance.guides.base import own_prompts
from guidance.guides.midblock import HeadGuide
from guidance.heads.networks import Head
from guidance.utils.errors import UserError

if TYPE_CHECKING:
    from guidance.models.clip import Clip


class EmbeddingGuide(HeadGuide):
    """Push samples towards texts or images in CLIP's embedding space, as a head predicts it from the mid-block.

    With ``e = head(h, t)``, the predicted embedding of the final image, and unit targets ``y_k``::

        score = logit_scale * mean_k cos(e, y_k)

    This is the mid-block form of GLIDE's noised CLIP: the head replaces an image tower trained on noised images, and
    the gradient passes only through the encoder half of the UNet.

    Args:
        head: A trained head of task "embedding".
        clip: The CLIP whose embeddings it predicts, see :func:`guidance.models.clip.load_clip`; it embeds the targets.
        guidance_scale: Strength; a negative one pushes away.  With ``normalize="cfg"`` (default) the unit is the
            difference that classifier-free guidance extrapolates.
        texts, images: One or more texts and (PIL) images, targets of every sample; None takes each sample's own
            prompt, which is known only in our sampling loop.
        normalize, every, space: See :class:`~guidance.guides.base.Strength`.
        start, stop: Fractions of the steps; None takes the head's own range, in which it tells images apart.

    Raises:
        UserError: If the head has another task or was trained with another CLIP.

    Reference:
        Nichol et al., "GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion
        Models", ICML 2022, section 2.4.
    """

    def __init__(
        self,
        head: Head,
        clip: Clip,
        guidance_scale: float = 1.0,
        *,
        texts: str | Sequence[str] | None = None,
        images: Any = None,
        normalize: str | None = "cfg",
        start: float | None = None,
        stop: float | None = None,
        every: int = 1,
        space: str = "eps",
    ) -> None:
        _check_clip(head, clip)
        self.clip = clip
        self.target = _embed_targets(clip, texts, images)
        self._last_prompts: tuple[tuple[str, ...], Tensor] | None = None  # and their embeddings
        super().__init__(
            [head],
            f"embedding:{head.config.clip}",
            guidance_scale=guidance_scale,
            normalize=normalize,
            start=start,
            stop=stop,
            every=every,
            space=space,
        )

    def describe(self) -> dict[str, Any]:
        """Describe the guide as a scorer, with its CLIP."""
        return {"networks": [*super().describe()["networks"], self.clip.fingerprint]}

    def score(self, h: Float[Tensor, "b c y x"], t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return ``logit_scale * cos``, in about -100..100."""
        predicted = F.normalize(self.head(h, t), dim=1)
        target = self._embed_prompts(len(h)) if self.target is None else self.target
        return self.clip.logit_scale * (predicted * target.to(predicted)).sum(dim=1)

    def _embed_prompts(self, batch: int) -> Float[Tensor, "b d"]:
        """Embed each sample's own prompt."""
        prompts = own_prompts(batch)
        if self._last_prompts is None or self._last_prompts[0] != prompts:
            self._last_prompts = prompts, self.clip.embed_texts(prompts)
        return self._last_prompts[1]


def _check_clip(head: Head, clip: Clip) -> None:
    config = head.config
    if config.task != "embedding":
        raise UserError(
            f"Expected a head of task 'embedding', got '{config.task}'; use MidBlockGuide for this one, or train one "
            "with --config configs/head/testbed-clip.yaml."
        )
    if clip.fingerprint != config.clip_fingerprint:
        raise UserError(
            f"Expected the CLIP whose embeddings the head predicts, '{config.clip}' ({config.clip_fingerprint}), got "
            f"'{clip.name}' ({clip.fingerprint}); load that one."
        )


def _embed_targets(clip: Clip, texts: str | Sequence[str] | None, images: Any) -> Float[Tensor, "1 d"] | None:
    """Return the mean of the targets' unit vectors, whose product is the mean cosine; None without a target."""
    texts = [texts] if isinstance(texts, str) else texts
    images = [images] if images is not None and not isinstance(images, Sequence) else images
    embeddings = [] if texts is None else [clip.embed_texts(texts)]
    embeddings += [] if images is None else [clip.embed_pil(images)]
    return torch.cat(embeddings).mean(dim=0, keepdim=True) if embeddings else None
