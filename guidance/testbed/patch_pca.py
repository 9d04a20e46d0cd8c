"""The testbed's latent space: a whitened principal component analysis of 4x4 RGB patches, as an AutoencoderKL.

Four components of 4x4 patches give 29.9 dB by a linear decoder, and a linear encoder needs no training.  The encoder
of a stock AutoencoderKL is set to that map by hand (:func:`set_encoder`); only the decoder is trained.  Tried before:
8x autoencoders trained from scratch (two collapsed, one stayed at 24 dB after 20,000 images, below the 26.2 dB of an 8x
patch PCA) and 4x ones for 75 seconds (22 dB at best); a 4x one was never trained for long.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from guidance.utils.io import atomic_path

PATCH = 4


@dataclasses.dataclass
class PatchPCA:
    """Whitened PCA of patches: ``z = weight * patch + bias``, unit variance per latent channel.

    Attributes:
        weight: Rows of the linear map, (4, 3, 4, 4), a stride-4 convolution of images in -1..1.
        bias: (4,).
    """

    weight: Float[Tensor, "k 3 4 4"]
    bias: Float[Tensor, " k"]

    @classmethod
    def fit(cls, images: NDArray[np.uint8], components: int = 4) -> PatchPCA:
        """Fit to uint8 images (n, h, w, 3)."""
        x = torch.from_numpy(np.array(images)).double() / 127.5 - 1
        patches = rearrange(x, "n (y a) (x b) c -> (n y x) (c a b)", a=PATCH, b=PATCH)
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))
        top = vectors.flip(1)[:, :components].T
        top = top * torch.sign(top.sum(1, keepdim=True))  # sign convention, so that fits are reproducible
        rows = top / values.flip(0)[:components, None].sqrt()
        weight = rearrange(rows, "k (c a b) -> k c a b", a=PATCH, b=PATCH)
        return cls(weight.float(), -(rows @ mean).float())

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k h/4 w/4"]:
        """Return latents of images in -1..1."""
        return F.conv2d(images, self.weight.to(images), self.bias.to(images), stride=PATCH)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        with atomic_path(path) as temporary:
            save_file({"weight": self.weight.contiguous(), "bias": self.bias}, temporary)

    @classmethod
    def load(cls, path: Path) -> PatchPCA:
        """Read a file of :meth:`save`."""
        return cls(**load_file(path))


# How a signal z passes GroupNorm and SiLU unchanged: its group holds (+e z, -e z) beside constants +1, -1 in pairs.
# The mean is 0 and the variance constant up to e^2 z^2, so the norm is a constant factor; the affine part makes it
# +-GAIN z + LEVEL, where SiLU is all but linear, and the difference of the two is z again.
_SMALL, _GAIN, _LEVEL = 1e-3, 0.5, 14.0


@torch.no_grad()
def set_encoder(vae: AutoencoderKL, pca: PatchPCA) -> None:
    """Set the encoder of a 4x AutoencoderKL to the linear map of a PCA (within 1%), with a tiny posterior variance.

    Args:
        vae: Three levels, 4 norm groups, no mid-block attention (``build_vae``).
        pca: The map; its 4 components become the latent channels.
    """
    encoder = vae.encoder
    for module in encoder.modules():  # residual branches off
        if type(module).__name__ == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    blocks = encoder.down_blocks
    space_to_depth, project = (b.downsamplers[0].conv for b in blocks[:2])
    widen, last = blocks[1].resnets[0].conv_shortcut, blocks[2].resnets[0].conv_shortcut
    for layer in (encoder.conv_in, space_to_depth, widen, project, last, encoder.conv_out, vae.quant_conv):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for c in range(3):
        encoder.conv_in.weight[c, c, 1, 1] = 1
        for a in range(2):
            for b in range(2):
                deep = 4 * c + 2 * a + b
                space_to_depth.weight[deep, c, a, b] = 1
                widen.weight[deep, deep, 0, 0] = 1
                for k in range(len(pca.bias)):
                    project.weight[k, deep, :2, :2] = pca.weight[k, c, a::2, b::2]
    project.bias[: len(pca.bias)] = pca.bias
    last.bias.copy_(torch.tensor([1.0, -1.0]).repeat(len(last.bias) // 2))
    group = encoder.conv_norm_out.num_channels // encoder.conv_norm_out.num_groups
    for k in range(len(pca.bias)):
        for sign, channel in ((1, group * k), (-1, group * k + 1)):
            last.weight[channel, k] = sign * _SMALL
            last.bias[channel] = 0
            encoder.conv_out.weight[k, channel, 1, 1] = sign * 0.5 / _GAIN
    norm = encoder.conv_norm_out
    nn.init.constant_(norm.weight, _GAIN / _SMALL * (1 - 2 / group) ** 0.5)
    nn.init.constant_(norm.bias, _LEVEL)
    for i in range(2 * len(pca.bias)):
        vae.quant_conv.weight[i, i] = 1
    vae.quant_conv.bias[len(pca.bias) :] = -8.0  # log-variance: the posterior is all but deterministic


@torch.no_grad()
def set_decoder(vae: AutoencoderKL, pca: PatchPCA) -> None:
    """Start the decoder as a bilinear enlargement of each patch's mean colour; training adds what is missing.

    Channels 0..2 carry RGB from the first convolution to the last; all others keep their random initialisation.

    Args:
        vae: As for :func:`set_encoder`.
        pca: The map whose latents are decoded.
    """
    decoder = vae.decoder
    components = len(pca.bias)
    inverse = torch.linalg.pinv(rearrange(pca.weight, "k c a b -> k (c a b)").double())
    colour = rearrange(inverse, "(c p) k -> c p k", c=3).mean(1).float()
    nn.init.zeros_(vae.post_quant_conv.weight)
    nn.init.zeros_(vae.post_quant_conv.bias)
    for k in range(components):
        vae.post_quant_conv.weight[k, k] = 1
    tent = torch.tensor([0.25, 0.5, 0.25])
    for layer, kernel in ((decoder.conv_in, None), *((b.upsamplers[0].conv, tent) for b in decoder.up_blocks[:-1])):
        layer.weight[:3] = 0
        layer.bias[:3] = 0
        if kernel is None:
            layer.weight[:3, :, 1, 1] = colour
            layer.bias[:3] = -colour @ pca.bias
        else:
            for c in range(3):
                layer.weight[c, c] = torch.outer(kernel, kernel)
    middle, last = (block.resnets[0].conv_shortcut for block in decoder.up_blocks[1:])
    for shortcut, rows in ((middle, 3), (last, 12)):
        shortcut.weight[:rows] = 0
        shortcut.bias[:rows] = 0
    decoder.conv_out.weight[:, :12] = 0
    decoder.conv_norm_out.bias[:12] = 3.0
    pair = torch.tensor([1.0, -1.0])
    for c in range(3):  # groups of four at the end: (+0.3 s, -0.3 s, 1, -1)
        middle.weight[c, c] = 1
        last.weight[4 * c : 4 * c + 2, c, 0, 0] = 0.3 * pair
        last.bias[4 * c + 2 : 4 * c + 4] = pair
        decoder.conv_out.weight[c, 4 * c : 4 * c + 2, 1, 1] = 1.07 * pair  # 1 / (2 * 0.3 * 1.43 * SiLU'(3))
