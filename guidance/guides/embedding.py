"""Mid-block CLIP guidance: a head predicts the CLIP embedding of the image to be; neither VAE nor CLIP is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from guidance.guides.base import run_prompts
from guidance.guides.midblock import HeadGuide
from guidance.heads.networks import Head
from guidance.utils.errors import UserError

if TYPE_CHECKING:
    from guidance.models.clip import Clip


class EmbeddingGuide(HeadGuide):
    """Push samples towards a text or an image in CLIP's space, as a head sees it in the mid-block.

    With ``e = head(h, t)``, the predicted embedding of the finished image, and unit targets ``y_k``::

        score = logit_scale * mean_k cos(e, y_k)

    This is the mid-block form of GLIDE's noised CLIP: the head takes the place of an image tower trained on noised
    images, and the gradient passes the encoder half of the UNet only.

    Args:
        head: A trained head of task "embedding".
        clip: The CLIP whose embeddings it predicts, see :func:`guidance.models.clip.load_clip`; it embeds the targets.
        guidance_scale: Strength; negative pushes away.  With ``normalize="cfg"`` (default) 1 means: as large as
            the difference that classifier-free guidance works with.
        texts, images: A text or several, and (PIL) images, all of them targets of every sample; both None takes
            each sample's own prompt, which only our own loop tells.
        normalize, every, space: See :class:`~guidance.guides.base.Strength`.
        start, stop: Fractions of the steps; None takes the head's own range, where it tells images apart.

    Raises:
        UserError: If the head is of another task or was trained with another CLIP, or there is no target.

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
        self._own: tuple[tuple[str, ...], Tensor] | None = None  # the prompts embedded last
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
        """With the CLIP; see :func:`~guidance.guides.base.describe_scorer`."""
        return {"networks": [*super().describe()["networks"], self.clip.fingerprint]}

    def score(self, h: Float[Tensor, "b c y x"], t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """``logit_scale * cos``, in about -100..100."""
        predicted = F.normalize(self.head(h, t), dim=1)
        target = self._own_prompts(len(h)) if self.target is None else self.target
        return self.clip.logit_scale * (predicted * target.to(predicted)).sum(dim=1)

    def _own_prompts(self, batch: int) -> Float[Tensor, "b d"]:
        """The embedding of each sample's own prompt."""
        prompts = run_prompts.get()
        if prompts is None or len(prompts) != batch:
            found = "none" if prompts is None else f"{len(prompts)} prompts"
            raise UserError(
                f"Expected the prompts of the {batch} samples, got {found}; pass texts or images to EmbeddingGuide: "
                "only guidance.sample_latents tells a guide the prompts."
            )
        if self._own is None or self._own[0] != prompts:
            self._own = prompts, self.clip.embed_texts(prompts)
        return self._own[1]


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
    """The mean of the targets' unit vectors, whose product is the mean cosine; None where there is no target."""
    texts = [texts] if isinstance(texts, str) else texts
    images = [images] if images is not None and not isinstance(images, Sequence) else images
    found = [] if texts is None else [clip.embed_texts(texts)]
    found += [] if images is None else [clip.embed_pil(images)]
    return torch.cat(found).mean(dim=0, keepdim=True) if found else None
