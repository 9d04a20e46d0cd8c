"""Mid-block CLIP guidance: a head predicts the CLIP embedding of the final image, without running VAE or CLIP."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from guidance.guides.base import network_option, register_guide, scale_option
from guidance.guides.midblock import HeadGuide
from guidance.utils.config import option
from guidance.utils.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from guidance.heads.networks import Head
    from guidance.models.clip import Clip


@register_guide("embedding")
@dataclasses.dataclass(eq=False)
class EmbeddingGuide(HeadGuide):
    """Push samples towards texts or images in CLIP's embedding space, as a head predicts it from the mid-block.

    With ``e = head(h, t)``, the predicted embedding of the final image, and unit targets ``y_k``::

        score = logit_scale * mean_k cos(e, y_k)

    This is the mid-block form of GLIDE's noised CLIP: the head replaces an image tower trained on noised images, and
    the gradient passes only through the encoder half of the UNet.

    Attributes:
        head: A trained head of task "embedding", or its folder.
        clip: The CLIP whose embeddings it predicts, see :func:`guidance.models.clip.load_clip`; it embeds the targets.
        guidance_scale: Strength; a negative one pushes away.  With ``normalize="cfg"`` (default) the unit is the
            difference that classifier-free guidance extrapolates.
        texts, images: One or more texts and (PIL) images, targets of every sample; without any, each sample's own
            prompt (our sampling loop knows it; elsewhere ``apply_guidance(pipe, guides, prompts=...)``).
        normalize, start, stop, every, space: See :class:`~guidance.guides.base.Guide`.

    Raises:
        UserError: If the head has another task or was trained with another CLIP.

    Reference:
        Nichol et al., "GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion
        Models", ICML 2022, section 2.4.
    """

    head: Any = network_option("runs/heads/testbed-clip", "folder of the head")
    clip: Any = network_option("testbed", "the CLIP that the head was trained on: testbed, a folder or a hub id")
    guidance_scale: float = scale_option()
    _: dataclasses.KW_ONLY
    texts: Any = option(
        None, "texts to approach; without texts and images each image's own prompt", kind=list[str] | None
    )
    images: Any = option(None, "image files to approach", kind=list[str] | None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_loaded:
            self.load()

    @property
    def name(self) -> str:
        return f"embedding:{self.heads[0].config.clip}"

    def load(self) -> None:
        """Load head and CLIP, and embed the targets."""
        _check_clip(self.heads[0], self.embedder)
        self.target  # noqa: B018

    @functools.cached_property
    def embedder(self) -> Clip:
        """The CLIP, loaded."""
        from guidance.models.clip import load_clip

        return load_clip(self.clip) if isinstance(self.clip, str) else self.clip

    @functools.cached_property
    def target(self) -> Float[Tensor, "1 d"] | None:
        """Mean of the targets' unit vectors, whose product is the mean cosine; None without a target."""
        from guidance.utils.images import open_images

        texts = [self.texts] if isinstance(self.texts, str) else self.texts
        embeddings = [self.embedder.embed_texts(texts)] if texts else []
        embeddings += [self.embedder.embed_pil(images)] if (images := open_images(self.images)) else []
        if not embeddings:
            return None
        return sum(e.sum(0, keepdim=True) for e in embeddings) / sum(map(len, embeddings))

    @functools.cached_property
    def _of_prompts(self) -> dict[tuple[str, ...], Tensor]:
        """Embeddings of the last prompts."""
        return {}

    @property
    def needs_prompts(self) -> bool:
        return self.target is None

    def networks(self) -> list[str]:
        return [*super().networks(), self.embedder.fingerprint]

    def describe(self) -> dict[str, Any]:
        """Describe the guide for a record; no targets are written as an empty list."""
        described = super().describe()
        return described | {name: described[name] or [] for name in ("texts", "images")}

    def fingerprints(self) -> dict[str, Any]:
        return {"clip_fingerprint": self.embedder.fingerprint}

    def score(
        self, h: Float[Tensor, "b c y x"], t: Float[Tensor, " b"], prompts: tuple[str, ...] = ()
    ) -> Float[Tensor, " b"]:
        """Return ``logit_scale * cos``, in about -100..100."""
        predicted = self.heads[0](h, t)
        predicted = predicted / predicted.norm(dim=1, keepdim=True).clamp(min=1e-12)
        target = self._embed_prompts(prompts) if self.target is None else self.target
        return self.embedder.logit_scale * (predicted * target.to(predicted)).sum(dim=1)

    def _embed_prompts(self, prompts: tuple[str, ...]) -> Float[Tensor, "b d"]:
        """Embed each sample's own prompt."""
        if prompts not in self._of_prompts:
            self._of_prompts.clear()
            self._of_prompts[prompts] = self.embedder.embed_texts(prompts)
        return self._of_prompts[prompts]


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
