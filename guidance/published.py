"""Configurations of published models, part by part, as they stand beside the weights (``unet/config.json`` and so on).

What equals the defaults of the class in diffusers or transformers is left out.  ``tests/test_pipelines.py`` holds the
parameter counts against published ones.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

# ---- denoisers ------------------------------------------------------------------------------------------------
UNET_1: Config = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # the number of heads, by an old mistake of names
}
UNET_2: Config = UNET_1 | {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
UNET_XL: Config = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",  # pooled text, and original size, crop and target size
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
DIT_XL_2: Config = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,  # the noise and its variance
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_embeds_ada_norm": 1000,  # classes; one more is "no class"
}
UNET_PIXELS: Config = {  # of the ImageNet-64 consistency models, itself the shape of ADM and EDM
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 3,
    "num_class_embeds": 1000,
    "block_out_channels": (192, 384, 576, 768),
    "attention_head_dim": 64,
    "down_block_types": ("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3),
    "up_block_types": (*("AttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
    "upsample_type": "resnet",
    "downsample_type": "resnet",
}
SD3: Config = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
FLUX: Config = {
    "patch_size": 1,  # the pipeline packs 2x2 latents of 16 channels
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "axes_dims_rope": (16, 56, 56),
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}

# ---- autoencoders, text encoders, schedulers --------------------------------------------------------------------
VAE: Config = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
VAE_16: Config = VAE | {
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP_IDS: Config = {"vocab_size": 49408, "max_position_embeddings": 77}
CLIP_IDS |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # wrong, as published, and known to be
CLIP_L: Config = CLIP_IDS | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
CLIP_H: Config = CLIP_IDS | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # of 24: the last is not read
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
CLIP_G: Config = CLIP_IDS | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
T5_XXL: Config = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
NOISE: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
}
DDIM = ("DDIMScheduler", NOISE | {"clip_sample": False, "set_alpha_to_one": False})
DDIM_LINEAR = ("DDIMScheduler", {"beta_schedule": "linear", "clip_sample": False})
PNDM = ("PNDMScheduler", NOISE | {"skip_prk_steps": True, "set_alpha_to_one": False})
DDIM_COSINE = ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"})  # of ADM's 64 px; clips x0 to pixels
V_PREDICTION = ("DDIMScheduler", DDIM[1] | {"prediction_type": "v_prediction"})

PAD_END = ("CLIPTokenizer", {"pad_token": "<|endoftext|>", "model_max_length": 77})
PAD_ZERO = ("CLIPTokenizer", {"pad_token": "!", "model_max_length": 77})
TEXT_1 = {"text_encoder": ("CLIPTextModel", CLIP_L), "tokenizer": PAD_END}
TEXT_2 = {"text_encoder": ("CLIPTextModel", CLIP_H), "tokenizer": PAD_ZERO}
TEXT_XL = TEXT_1 | {"text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G), "tokenizer_2": PAD_ZERO}
T5_TOKENIZER = ("T5TokenizerFast", {"model_max_length": 512})
UNCHECKED: Config = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
