"""Shared fixtures: a random-weight pipeline of the testbed's shape, and offline, single-threaded defaults."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from commands import ROOT
from jaxtyping import install_import_hook

# Shapes, dtypes and protocols in signatures are checked at every call of the library that a test makes; not where
# calls are so many that checking takes most of the time: in tensor operations run in step, and in drawing scenes.
_UNCHECKED = {"taps.lockstep", "testbed.render", "testbed.scenes", "testbed.shapes"}
_MODULES = [
    ".".join(file.relative_to(ROOT / "guidance").with_suffix("").parts) for file in (ROOT / "guidance").rglob("*.py")
]
install_import_hook(
    [f"guidance.{name}" for name in _MODULES if name not in _UNCHECKED and not name.endswith("__init__")],
    "typechecking.check",
)


def build_tiny_pipe():
    """A StableDiffusionPipeline with the testbed's classes, small and random."""
    from diffusers import StableDiffusionPipeline

    from guidance.models.pipelines import freeze
    from guidance.testbed import models
    from guidance.testbed.scenes import scenes

    torch.manual_seed(0)
    tokenizer = models.build_tokenizer([s.caption for s in scenes("train", 200)])
    pipe = StableDiffusionPipeline(
        vae=models.build_vae(),
        text_encoder=models.build_text_encoder(models.build_clip(len(tokenizer), tokenizer.eos_token_id)),
        tokenizer=tokenizer,
        unet=models.build_unet((16, 32, 64)),
        scheduler=models.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    freeze(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_head(pipe, **options):
    """A random rating head that fits a pipeline; options replace entries of its config."""
    from guidance.heads import HeadConfig, build_head

    torch.manual_seed(0)
    fitting = {
        "kind": "conv",
        "in_channels": pipe.unet.config.block_out_channels[-1],
        "prediction_type": pipe.scheduler.config.prediction_type,
    }
    return build_head(HeadConfig(**{**fitting, **options}))


@pytest.fixture(scope="session")
def tiny_pipe():
    return build_tiny_pipe()


@pytest.fixture(scope="session")
def tiny_folder(tiny_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny pipe")
    tiny_pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """Run a module's tests on one torch thread, as the processes they start do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
