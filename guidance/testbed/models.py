"""Build the networks of the testbed pipeline, untrained: every size in one place.

All are stock diffusers and transformers classes, so the trained folder loads with
``StableDiffusionPipeline.from_pretrained``; only the judge classifier is our own module.
"""

from __future__ import annotations

import itertools
from collections import Counter

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from einops import rearrange
from jaxtyping import Float
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from guidance.testbed.scenes import ATTRIBUTES

IMAGE_SIZE = 64

MAX_TOKENS = 24

START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """Train CLIP's byte-pair tokenizer on the world's captions; unknown words fall back to letters.

    Ties go to the alphabetically first pair: the trainer of ``tokenizers`` breaks them differently in each process,
    which would give the same texts other token ids.
    """
    rules = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[]).backend_tokenizer
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789.,'-!?")
    counts: Counter[str] = Counter()
    for text in [*texts, *letters]:
        counts.update(w for w, _ in rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(text)))
    words = {word: (*word[:-1], f"{word[-1]}</w>") for word in counts}
    tokens = [START, END, *sorted(ByteLevel.alphabet()), *sorted({parts[-1] for parts in words.values()})]
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        words = {word: _merge(parts, merges[-1]) for word, parts in words.items()}
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, *map("".join, merges)]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def _merge(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Join every occurrence of a pair.

    >>> _merge(("a", "b", "a", "b", "c</w>"), ("a", "b"))
    ('ab', 'ab', 'c</w>')
    """
    merged: list[str] = []
    i = 0
    while i < len(parts):
        found = parts[i : i + 2] == pair
        merged.append("".join(pair) if found else parts[i])
        i += 1 + found
    return tuple(merged)


def build_clip(vocab_size: int, eos_token_id: int, *, judge: bool = False) -> CLIPModel:
    """Build the guiding CLIP, or the judge CLIP: other patches, widths and depths (and, in training, another seed)."""
    width, layers, patch = (96, 2, 4) if judge else (128, 3, 8)
    text = _transformer(width, layers) | {
        "vocab_size": vocab_size,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": 0,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
    }
    vision_width = 64 if judge else 128
    vision = _transformer(vision_width, layers + 1) | {"image_size": IMAGE_SIZE, "patch_size": patch}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def build_text_encoder(clip: CLIPModel) -> CLIPTextModel:
    """Build the pipeline's text encoder from the text tower of a CLIP, with the same weights."""
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(clip.text_model.state_dict())
    return encoder


def _transformer(width: int, layers: int) -> dict[str, int]:
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4, "num_hidden_layers": layers}


def build_vae() -> AutoencoderKL:
    """Build a 4x autoencoder with 4 latent channels: 64x64 images become 16x16 latents of unit variance."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    with torch.no_grad():  # initially almost linear, which trains several times faster
        for module in vae.modules():
            if type(module).__name__ == "ResnetBlock2D":
                module.conv2.weight.mul_(0.02)
    return vae


def build_unet(channels: tuple[int, int, int] = (32, 64, 128)) -> UNet2DConditionModel:
    """Build a UNet of three levels, 16x16 to 4x4; cross-attention in down, mid and up blocks as in Stable Diffusion."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    """Build Stable Diffusion's noise schedule with v-prediction (Salimans and Ho 2022)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,  # unused by trailing spacing; StableDiffusionPipeline requires it
        clip_sample=False,
        set_alpha_to_one=False,
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class JudgeClassifier(nn.Module):
    """A small residual network that reads a scene's captioned attributes; never used for guidance.

    Its pooled 128-d features (:meth:`features`) are the testbed's features for Frechet distances.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        w = width
        self.trunk = nn.Sequential(
            nn.Conv2d(3, w, 4, stride=2, padding=1),
            _Residual(w),
            nn.Conv2d(w, 2 * w, 4, stride=2, padding=1),
            _Residual(2 * w),
            nn.Conv2d(2 * w, 4 * w, 4, stride=2, padding=1),
            _Residual(4 * w),
            nn.GroupNorm(8, 4 * w),
            nn.SiLU(),
        )
        self.attention = nn.Conv2d(4 * w, 4, 1)
        self.project = nn.Linear(16 * w, 128)
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(c)) for name, c in ATTRIBUTES.items()})

    def features(self, images: Float[Tensor, "b 3 64 64"]) -> Float[Tensor, "b 128"]:
        """Return pooled features of RGB images in -1..1."""
        h = self.trunk(images)
        weights = rearrange(self.attention(h), "b k y x -> b k (y x)").softmax(-1)
        pooled = torch.einsum("bkn,bcn->bkc", weights, rearrange(h, "b c y x -> b c (y x)"))
        return nn.functional.silu(self.project(rearrange(pooled, "b k c -> b (k c)")))

    def forward(self, images: Float[Tensor, "b 3 64 64"]) -> dict[str, Tensor]:
        """Return logits per attribute, ``{name: (b, classes)}``, of RGB images in -1..1."""
        f = self.features(images)
        return {name: head(f) for name, head in self.heads.items()}
