"""Tiny random pipelines of diffusers' own classes: latents of 8 by 8, a few channels, no hub."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from guidance.models.pipelines import freeze
from guidance.testbed import models

WIDTH = 32  # of text states
LATENTS = 8


def ready(pipe: Any) -> Any:
    """Freeze a pipeline and keep it quiet."""
    freeze(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_parts(pipe: Any, kind: type, **parts: Any) -> Any:
    """A pipeline of another class from one's parts, some of them replaced."""
    off = {"requires_safety_checker": False, "add_watermarker": False}
    known = inspect.signature(kind).parameters
    return ready(kind(**{name: part for name, part in (pipe.components | off | parts).items() if name in known}))


def vae(channels: int = 4) -> AutoencoderKL:
    """One pixel a latent, times two."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=2 * LATENTS,
        shift_factor=0.1 if channels == 16 else None,
    )


def unet(in_channels: int = 4, *, cross: int = WIDTH, **options: Any) -> UNet2DConditionModel:
    """The topology of Stable Diffusion in small."""
    return UNet2DConditionModel(
        sample_size=LATENTS,
        in_channels=in_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    )


def _text(kind: type, tokenizer: PreTrainedTokenizerBase) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip


def build_sd(**parts: Any) -> StableDiffusionPipeline:
    """StableDiffusionPipeline; parts replace its own."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    own = {
        "vae": vae(),
        "text_encoder": _text(CLIPTextModel, tokenizer),
        "tokenizer": tokenizer,
        "unet": unet(),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return ready(StableDiffusionPipeline(**own | parts, requires_safety_checker=False))


def build_tokenizer() -> PreTrainedTokenizerBase:
    """The testbed's kind."""
    return models.build_tokenizer(["a red balloon over the sea", "a white tower in the hills at noon"])


def build_sdxl(in_channels: int = 4) -> StableDiffusionXLPipeline:
    """Two text encoders, added conditions."""
    torch.manual_seed(1)
    tokenizer = build_tokenizer()
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": WIDTH + 6 * 4,
    }
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=_text(CLIPTextModel, tokenizer),
        text_encoder_2=_text(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(in_channels, cross=2 * WIDTH, **added),
        scheduler=EulerDiscreteScheduler.from_config(scheduler().config),
        add_watermarker=False,
    )
    return ready(pipe)


def build_controlnet(of: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet whose residuals are not zero, as they are before training."""
    torch.manual_seed(2)
    net = ControlNetModel.from_unet(of, conditioning_embedding_out_channels=(8, 8))  # one halving, as the VAE
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.3)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.3)
    return net


def build_dit(num_layers: int = 3) -> DiTPipeline:
    """Class labels, learned variances; 1000 is no class."""
    torch.manual_seed(3)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=num_layers,
        sample_size=LATENTS,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return ready(DiTPipeline(transformer=transformer, vae=vae(), scheduler=scheduler()))


def build_ddpm() -> DDPMPipeline:
    """Pixels, no text."""
    torch.manual_seed(4)
    net = UNet2DModel(
        sample_size=LATENTS,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return ready(DDPMPipeline(unet=net, scheduler=DDPMScheduler(clip_sample=False)))


def build_sd3() -> StableDiffusion3Pipeline:
    """A flow-matching transformer; text states are to be given as embeddings."""
    torch.manual_seed(5)
    transformer = SD3Transformer2DModel(
        sample_size=LATENTS,
        patch_size=2,
        in_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        out_channels=16,
        pos_embed_max_size=LATENTS,
    )
    absent = dict.fromkeys(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ready(StableDiffusion3Pipeline(transformer=transformer, vae=vae(16), scheduler=flow, **absent))
