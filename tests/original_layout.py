"""A Stable Diffusion pipeline in one file, named as in the original repository: what ``from_single_file`` reads.

Written from the two layouts of names, four levels and two layers a block.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_checkpoint(pipe: Any) -> dict[str, Tensor]:
    """All weights of a pipeline under their original names."""
    text = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in pipe.text_encoder.state_dict().items()}
    parts = {
        "model.diffusion_model.": {_unet(k): v for k, v in pipe.unet.state_dict().items()},
        "first_stage_model.": {
            _vae(k): v[:, :, None, None] if _is_attention_matrix(k) else v for k, v in pipe.vae.state_dict().items()
        },
        "cond_stage_model.transformer.": text,
    }
    return {prefix + k: v.contiguous() for prefix, named in parts.items() for k, v in named.items()}


def _is_attention_matrix(name: str) -> bool:
    return ".attentions." in name and name.endswith(".weight") and "group_norm" not in name


def _unet(name: str) -> str:
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    found = re.match(
        r"(down|mid|up)_blocks?(?:\.(\d))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name
    )
    assert found, name
    side, i, kind, j, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        layer, _, end = rest.rpartition(".")
        rest = f"{_RESNET[layer]}.{end}"
    if side == "mid":
        return f"middle_block.{2 * j if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * (i + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}.{rest}"
    where = f"input_blocks.{3 * i + j + 1}" if side == "down" else f"output_blocks.{3 * i + j}"
    return f"{where}.{0 if kind == 'resnets' else 1}.{rest}"


def _vae(name: str) -> str:
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    found = re.match(r"(.*)mid_block\.attentions\.0\.(.*)\.(\w+)", name)
    return f"{found[1]}mid.attn_1.{_VAE_ATTENTION[found[2]]}.{found[3]}" if found else name
