"""Assemble the trained networks into one folder in diffusers format, fp16 safetensors, with a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file, save_model
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from guidance.testbed import models
from guidance.testbed.judges import load_classifier
from guidance.training.testbed import STEPS, Recipe, describe
from guidance.utils.errors import UserError
from guidance.utils.io import atomic_dir, atomic_path, read_json, write_json

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [guidance, testbed, synthetic]
---
# The testbed pipeline

A small latent diffusion model of a closed world of captioned 64x64 landscapes (`guidance/testbed/scenes.py`), made
for studying guidance: captions, hidden quality factors and a truth score are known exactly. Ordinary diffusers
format: `StableDiffusionPipeline.from_pretrained("guidance/testbed/weights")`. It draws nothing but its world.

| part | class | parameters | for |
|---|---|---|---|
{parts}

`judge_clip` and `judge_classifier` are trained apart (other architectures and seeds) and never used for guidance.

## Training
{scenes:,} scenes of the train split ({captions:,} different captions), seed {seed}; made by `python -m train.testbed`.
Whole combinations of time, terrain, object and colour are held out for validation and test.

| network | steps | samples | batch | minutes | hardware |
|---|---|---|---|---|---|
{training}

{notes}

## Measured quality
{quality}
"""


#: Parts of the pipeline, and what they are for.
USES = {
    "unet": "denoiser, v-prediction",
    "vae": "4x autoencoder, 4 latent channels",
    "text_encoder": "the text tower of `clip`",
    "clip": "guiding CLIP",
    "judge_clip": "judge: CLIP score",
    "judge_classifier": "judge: attributes, Frechet features",
}


@torch.no_grad()
def export(recipe: Recipe, folder: Path, notes: str = "") -> Path:
    """Write the pipeline, both CLIPs and the judge classifier in diffusers format; replaces ``folder`` as a whole.

    Raises:
        UserError: If a step of the recipe is not finished.
    """
    records = describe(recipe.work)
    missing = [step for step in STEPS if step not in records]
    if missing:
        raise UserError(f"Expected all training steps to be done, {', '.join(missing)} are not; run them first.")
    recipe.device = "cpu"
    clip, judge_clip = (recipe.load(n, recipe.build_clip(n)) for n in ("clip", "judge_clip"))
    vae = recipe.load("vae", models.build_vae())
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size=64, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=models.build_text_encoder(clip),
        tokenizer=recipe.tokenizer,
        unet=recipe.load("unet", recipe.build_unet()),
        scheduler=models.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    classifier = recipe.load("judge_classifier", models.JudgeClassifier())
    with atomic_dir(folder) as temporary:
        pipe.to(dtype=torch.float16).save_pretrained(temporary, safe_serialization=True)
        for name, model in (("clip", clip), ("judge_clip", judge_clip)):
            model.half().save_pretrained(temporary / name, safe_serialization=True)
            processor.save_pretrained(temporary / name)
            recipe.tokenizer.save_pretrained(temporary / name)
        for name in ("text_encoder", "clip", "judge_clip"):  # stored in half precision; transformers loads as it says
            file = temporary / name / "config.json"
            file.write_text(file.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
        (temporary / "judge_classifier").mkdir()
        halves = {k: t.half().contiguous() for k, t in classifier.state_dict().items()}
        save_file(halves, temporary / "judge_classifier" / "model.safetensors")
        (temporary / "judge_classifier" / "config.json").write_text(json.dumps({"width": 32}) + "\n")
        parts = {"unet": pipe.unet, "vae": vae, "text_encoder": pipe.text_encoder, "clip": clip}
        parts |= {"judge_clip": judge_clip, "judge_classifier": classifier}
        sizes = {
            name: {"class": type(part).__name__, "parameters": sum(p.numel() for p in part.parameters())}
            for name, part in parts.items()
        }
        card = {"records": records, "seed": recipe.config.seed, "parts": sizes, "notes": notes}
        (temporary / "training.json").write_text(json.dumps(card, indent=1) + "\n")
        (temporary / "README.md").write_text(render_card(card, "Not measured yet."))
    return folder


def adopt(recipe: Recipe, folder: Path) -> None:
    """Start a working folder from a pipeline of :func:`export`: only the denoiser is trained, from its weights there.

    The data step must be finished, with the scenes of the exported pipeline (same seed).
    """
    work, records = recipe.work, read_json(folder / "training.json")["records"]
    if (work / "unet-start.json").exists():
        return
    CLIPTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(work / "tokenizer")
    networks: dict[str, nn.Module] = {
        "clip": CLIPModel.from_pretrained(folder / "clip"),
        "judge_clip": CLIPModel.from_pretrained(folder / "judge_clip"),
        "judge_classifier": load_classifier(folder / "judge_classifier"),
        "vae": AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
    }
    for name, model in networks.items():
        target = work / ("unet-start.safetensors" if name == "unet" else f"{name}-final.safetensors")
        with atomic_path(target) as temporary:
            save_model(model.float(), str(temporary))
        if name != "unet":
            write_json(work / f"done-{name}.json", records[name])
    write_json(work / "unet-start.json", records["unet"])


def render_card(card: dict[str, Any], quality: str) -> str:
    """Write the model card from ``training.json`` and a Markdown table of measured quality."""
    parts = [f"| {n} | {p['class']} | {p['parameters']:,} | {USES[n]} |" for n, p in card["parts"].items()]
    rows = [(n, r) for n, r in card["records"].items() if "stage" in r]
    earlier = card["records"]["unet"].get("continued_from")
    while earlier:
        rows.append(("unet, before", earlier))
        earlier = earlier.get("continued_from")
    training = [
        f"| {n} | {r['steps']:,} | {r['samples']:,} | {r['stage']['batch_size']} "
        f"| {r['seconds'] / 60:.0f} | {r['hardware']} |"
        for n, r in rows
    ]
    tables = {"parts": "\n".join(parts), "training": "\n".join(training), "quality": quality}
    return CARD.format(**card["records"]["data"], seed=card["seed"], notes=card["notes"], **tables)
