"""`python -m guidance.taps`: shapes and shares of FLOPs, against published ones and against forwards that do stop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from guidance.models.inputs import build_inputs
from guidance.models.random_weights import build_denoiser
from guidance.taps import encode_features
from guidance.taps.__main__ import main
from guidance.taps.table import build_shape, format_table, list_taps
from guidance.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TINY = ["sdxl-tiny", "imagenet-64-tiny", "dit-xl-2-256-tiny", "sd3-medium-tiny", "flux-dev-tiny"]


@pytest.mark.parametrize(
    ("name", "share", "flops", "shape"),
    [
        ("sd-1.5", 0.325, 803e9, (1, 1280, 8, 8)),
        ("sd-2.1-base", 0.326, 804e9, (1, 1280, 8, 8)),
        ("sd-2.1", 0.337, 2149e9, (1, 1280, 12, 12)),
        ("sdxl", 0.434, 6761e9, (1, 1280, 32, 32)),
    ],
)
def test_real_unets_without_their_weights(name: str, share: float, flops: float, shape: tuple) -> None:
    """The shares that the design notes give for one forward, counted there on real tensors."""
    table = list_taps(build_shape(f"random:{name}"))
    (row,) = [row for row in table.taps if row.tap == table.default == "mid_block"]
    assert row.shape == shape and row.share == pytest.approx(share, abs=6e-4)
    assert table.flops == pytest.approx(flops, rel=1e-3)
    assert [row.share for row in table.taps] == sorted(row.share for row in table.taps)
    assert table.taps[-1].parameters <= table.parameters


@pytest.mark.parametrize("name", TINY)
def test_a_row_is_what_a_forward_that_stops_there_takes(name: str) -> None:
    """encode_features runs no block after the tap: its FLOPs (the CPU's own attention is not counted) and shape."""
    shapes = build_denoiser(name, device="meta")
    table = list_taps(shapes, 16, batch_size=2, depth=2)
    model = build_denoiser(name)
    assert len(table.taps) > 3
    for row in table.taps[:: max(1, len(table.taps) // 5)]:
        with FlopCounterMode(display=False) as counter:
            encode(shapes, row.tap)
        assert counter.get_total_flops() == row.flops == pytest.approx(row.share * table.flops)
        assert encode(model, row.tap).shape == row.shape


def encode(model: torch.nn.Module, tap: str) -> torch.Tensor:
    x, inputs = build_inputs(model, 16, 2)
    return encode_features(model, x, inputs.pop("timestep"), tap=tap, **inputs)


def test_parameters_are_those_read_on_the_way() -> None:
    model = build_denoiser("sd-1.5-tiny", device="meta")
    rows = {row.tap: row.parameters for row in list_taps(model, depth=2).taps}
    parts = [model.conv_in, model.time_embedding, *model.down_blocks, model.mid_block]
    assert rows["mid_block"] == sum(p.numel() for part in parts for p in part.parameters())
    assert {"down_blocks.0.resnets.0", "down_blocks.0.attentions.0", "up_blocks.1"} <= rows.keys()
    assert not {"conv_in", "time_embedding", "down_blocks.0.resnets.0.conv1"} & rows.keys()


def test_size_and_batch() -> None:
    model = build_denoiser("sd-1.5-tiny", device="meta")
    one, four = list_taps(model, 32), list_taps(model, 32, batch_size=4)
    assert four.flops == 4 * one.flops and four.taps[0].shape[0] == 4
    assert [row.share for row in one.taps] == pytest.approx([row.share for row in four.taps])
    assert list_taps(model, 64).taps[-1].shape[2:] == (64, 64)
    with torch.device("meta"):
        pixart = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
            sample_size=8, patch_size=2, cross_attention_dim=16, caption_channels=12,
            use_additional_conditions=False,
        )  # fmt: skip
    table = list_taps(pixart, 12)
    shapes = {row.tap: row.shape for row in table.taps}
    assert shapes["transformer_blocks.1"] == (1, 16, 6, 6) and table.default is None
    assert f"within half of the FLOPs is '{table.halfway()}'" in format_table(table)


def test_the_command(capsys: pytest.CaptureFixture, tiny_folder) -> None:
    """By module name, as a user calls it; a folder is listed from its configuration alone."""
    command = [sys.executable, "-m", "guidance.taps", "testbed", "--json"]
    told = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout)
    assert told["default"] == "mid_block" and told["taps"][3]["shape"] == [1, 128, 4, 4]
    main([str(tiny_folder), "--latent-size", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("UNet2DConditionModel, input 1x4x8x8: ")
    (row,) = [line.split() for line in lines if line.endswith("default")]
    model = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    h = encode_features(model, torch.zeros(1, 4, 8, 8), 0, torch.zeros(1, 77, model.config.cross_attention_dim))
    assert row[:2] == ["mid_block", "x".join(map(str, h.shape))]
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "random:sdxl --depth 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["random:sdxxl-tiny"], "Did you mean 'sdxl"),
        (["tesbed"], "Did you mean 'testbed'"),
        (["random:sd-1.5-tiny", "--depth", "0"], "depth of at least 1, got 0"),
        (["random:dit-xl-2-256-tiny", "--latent-size", "9"], "a multiple of 2"),
        (["random:flux-dev-tiny", "--latent-size", "9"], "a multiple of 2"),
        (["random:sd3-medium-tiny", "--latent-size", "4096"], "at most"),
        (["."], "found no model_index.json"),
        (["no.safetensors"], "does not exist"),
    ],
)
def test_bad_input_gets_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1


def test_models_that_cannot_be_listed_get_a_sentence() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL()
        unet = UNet2DConditionModel(
            block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
            addition_embed_type="text",
        )  # fmt: skip
    with pytest.raises(UserError, match="got AutoencoderKL; those known are UNet2DCond"):
        list_taps(vae)
    with pytest.raises(UserError, match="addition_embed_type=text"):
        list_taps(unet)
