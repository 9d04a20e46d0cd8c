"""Train the testbed, network by network, in one working folder.

Order: ``data`` -> ``vae``, ``clip`` -> ``unet``; ``judge_classifier`` and ``judge_clip`` need only the data.
A finished step writes ``done-NAME.json`` and is skipped from then on; a killed one resumes from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float, Int, UInt8
from numpy.lib.format import open_memmap
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPTokenizer

from guidance.testbed import models
from guidance.testbed.patch_pca import PatchPCA, set_decoder, set_encoder
from guidance.testbed.render import object_area, render_scenes
from guidance.testbed.scenes import ATTRIBUTES, sample_scene, scenes
from guidance.training.loop import batch_indices, fit, world
from guidance.training.recipes import TestbedRecipe
from guidance.utils.errors import UserError
from guidance.utils.images import to_float
from guidance.utils.io import atomic_path, read_json, write_json

#: Steps of the training, each with what is added to the seed of its weights, batches and noise.
STEPS = {"data": 0, "vae": 1, "clip": 2, "judge_classifier": 4, "judge_clip": 3, "unet": 5}

_CAPTION_DROPOUT = 0.1
_LATENT_NOISE = 0.05  # on the latents the decoder is trained on: sampled ones are not exact
_CHUNK = 500


def _render_chunk(args: tuple[str, int, int]) -> np.ndarray:
    split, start, seed = args
    return render_scenes(scenes(split, _CHUNK, start=start, seed=seed))


class Recipe:
    """Settings and data shared by the training steps; everything resumes from what is in the working folder."""

    def __init__(self, config: TestbedRecipe) -> None:
        self.config, self.work, self.device = config, Path(config.work), config.device

    def run(self, step: str) -> dict[str, Any]:
        """Run one step, or return its record if it is finished."""
        if step not in STEPS:
            raise UserError(f"Expected a training step out of {', '.join(STEPS)}, got '{step}'.")
        done = self.work / f"done-{step}.json"
        if done.exists():
            return read_json(done)
        torch.manual_seed(self.config.seed + STEPS[step])
        record: dict[str, Any] = getattr(self, step)()
        if world()[0] == 0:
            write_json(done, record)
        return record

    # ---- data -------------------------------------------------------------------------------------------------
    def data(self) -> dict[str, Any]:
        """Render the training scenes once into ``images.npy`` (uint8, n x 64 x 64 x 3)."""
        size, n = models.IMAGE_SIZE, self.config.num_scenes
        with atomic_path(self.work / "images.npy") as temporary:
            out = open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(n, size, size, 3))
            jobs = [("train", i, self.config.seed) for i in range(0, n, _CHUNK)]
            with ProcessPoolExecutor(self.config.workers) as pool, tqdm(total=n, desc="render scenes") as bar:
                for (_, start, _), chunk in zip(jobs, pool.map(_render_chunk, jobs), strict=True):
                    out[start : start + _CHUNK] = chunk
                    bar.update(_CHUNK)
            out.flush()
        tokenizer = models.build_tokenizer(sorted(set(self.captions)))
        tokenizer.save_pretrained(self.work / "tokenizer")
        return {"scenes": n, "captions": len(set(self.captions)), "vocabulary": len(tokenizer)}

    @cached_property
    def scenes(self) -> list:  # attributes only
        return [sample_scene("train", i, self.config.seed) for i in range(self.config.num_scenes)]

    @cached_property
    def captions(self) -> list[str]:
        return [s.caption for s in self.scenes]

    @cached_property
    def images(self) -> np.ndarray:  # memory-mapped
        return np.load(self.work / "images.npy", mmap_mode="r")

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:  # trained by the data step
        return CLIPTokenizer.from_pretrained(self.work / "tokenizer")

    @cached_property
    def unique(self) -> tuple[Int[Tensor, "u n"], np.ndarray]:
        """(token ids of the different captions, index of each scene's caption); the last row is the empty one."""
        texts = sorted(set(self.captions))
        where = {t: i for i, t in enumerate(texts)}
        tokens = self.tokenizer(
            [*texts, ""], padding="max_length", truncation=True, max_length=models.MAX_TOKENS, return_tensors="pt"
        )
        return tokens.input_ids, np.array([where[c] for c in self.captions])

    def pixels(self, index: np.ndarray) -> Float[Tensor, "b 3 h w"]:
        """Images of these indices, floats in -1..1."""
        return to_float(self.images[np.sort(index)][np.argsort(np.argsort(index))], self.device)

    def _fit(
        self, name: str, model: nn.Module, loss: Callable[[np.ndarray, torch.Generator], Tensor]
    ) -> dict[str, Any]:
        """Train a network by its loss on a batch of images, given by their indices, and save it."""
        stage, seed, (rank, size) = getattr(self.config, name), self.config.seed + STEPS[name], world()

        def batch_loss(step: int, g: torch.Generator) -> Tensor:
            return loss(batch_indices(self.config.num_scenes, stage.batch_size, step, seed)[rank::size], g)

        result = fit(name, model, batch_loss, stage, self.work, seed=seed, device=self.device)
        if rank == 0:
            with atomic_path(self.work / f"{name}-final.safetensors") as temporary:
                save_model(model, str(temporary))
        hardware = (
            torch.cuda.get_device_name() if self.device == "cuda" else f"{size * torch.get_num_threads()} CPU threads"
        )
        return result | {"hardware": hardware, "stage": dataclasses.asdict(stage)}

    def load(self, name: str, model: nn.Module) -> nn.Module:
        """Load a finished network into ``model`` and freeze it."""
        load_model(model, str(self.work / f"{name}-final.safetensors"))
        return model.to(self.device).eval().requires_grad_(False)

    # ---- networks ---------------------------------------------------------------------------------------------
    def vae(self) -> dict[str, Any]:
        """Set the encoder to the patch PCA and train the decoder."""
        vae = models.build_vae().to(self.device)
        set_encoder(vae, self.pca)
        set_decoder(vae, self.pca)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)

        def loss(index: np.ndarray, g: torch.Generator) -> Tensor:
            x = self.pixels(index)
            z = self.pca.encode(x)
            z = z + _LATENT_NOISE * torch.randn(z.shape, generator=g, device=z.device)
            return reconstruction_loss(vae.decode(z).sample, x)

        return self._fit("vae", vae, loss)

    def build_clip(self, name: str) -> CLIPModel:
        """An untrained CLIP of this name for this tokenizer."""
        return models.build_clip(len(self.tokenizer), self.tokenizer.eos_token_id, judge=name == "judge_clip")

    def build_unet(self) -> UNet2DConditionModel:
        """An untrained denoiser of the configured widths."""
        first, second, third = self.config.unet_channels
        return models.build_unet((first, second, third))

    def _train_clip(self, name: str) -> dict[str, Any]:
        """Train the guiding CLIP, whose text tower is the pipeline's, or the judge: other architecture, other seed."""
        model, (ids, which) = self.build_clip(name).to(self.device), self.unique

        def loss(index: np.ndarray, g: torch.Generator) -> Tensor:
            return clip_loss(model, jitter(self.pixels(index), g), ids[which[index]].to(self.device))

        return self._fit(name, model, loss)

    clip = partialmethod(_train_clip, "clip")
    judge_clip = partialmethod(_train_clip, "judge_clip")

    def judge_classifier(self) -> dict[str, Any]:
        """Train the judge classifier of the captioned attributes."""
        model = models.JudgeClassifier().to(self.device)
        labels = {
            name: torch.tensor([classes.index(getattr(s, name)) for s in self.scenes], device=self.device)
            for name, classes in ATTRIBUTES.items()
        }

        def loss(index: np.ndarray, g: torch.Generator) -> Tensor:
            logits = model(jitter(self.pixels(index), g))
            return torch.stack([F.cross_entropy(logits[n], labels[n][index]) for n in labels]).mean()

        return self._fit("judge_classifier", model, loss)

    def unet(self) -> dict[str, Any]:
        """Cache latents and text states, then train the denoiser."""
        latents, (text, which) = self.latents(), self.text_states()
        unet = self.build_unet().to(self.device)
        start = self.work / "unet-start.safetensors"  # see export.adopt
        earlier = {"continued_from": read_json(start.with_suffix(".json"))} if start.exists() else {}
        if earlier:
            load_model(unet, str(start))
        scheduler, areas = models.build_scheduler(), self.object_areas()
        run: Any = torch.compile(unet, dynamic=False) if self.config.compile else unet

        def loss(index: np.ndarray, g: torch.Generator) -> Tensor:
            captions = which[index]
            drop = torch.rand(len(index), generator=g, device=self.device) < _CAPTION_DROPOUT
            captions = torch.where(drop.cpu(), len(text) - 1, torch.from_numpy(captions))
            states = text[captions].to(self.device).float()
            emphasis = self.config.emphasis / 255 * areas[index].to(self.device).float()
            x0 = latents[index].to(self.device).float()
            return denoising_loss(run, scheduler, x0, states, g, emphasis=emphasis)

        return self._fit("unet", unet, loss) | earlier

    @cached_property
    def pca(self) -> PatchPCA:
        """The linear encoder, fitted to 5,000 training images once."""
        path = self.work / "pca.safetensors"
        if not path.exists():
            PatchPCA.fit(self.images[:5000]).save(path)
        return PatchPCA.load(path)

    def _cached(self, name: str, compute: Callable[[], np.ndarray]) -> Tensor:
        path = self.work / name
        if not path.exists():
            with atomic_path(path) as temporary:
                np.save(temporary, compute())
        return torch.from_numpy(np.load(path))

    @torch.no_grad()
    def latents(self) -> Float[Tensor, "n 4 16 16"]:
        """Latents of all training images, fp16."""

        def compute() -> np.ndarray:
            starts = tqdm(range(0, self.config.num_scenes, _CHUNK), desc="encode")
            parts = [self.pca.encode(self.pixels(np.arange(i, i + _CHUNK))).cpu() for i in starts]
            return torch.cat(parts).half().numpy()

        return self._cached("latents.npy", compute)

    def object_areas(self) -> UInt8[Tensor, "n 16 16"]:
        """:func:`object_area` of all training scenes in steps of 1/255."""

        def compute() -> np.ndarray:
            areas = [object_area(s) for s in tqdm(self.scenes, desc="object areas")]
            return (np.stack(areas) * 255 + 0.5).astype(np.uint8)

        return self._cached("areas.npy", compute)

    @torch.no_grad()
    def text_states(self) -> tuple[Float[Tensor, "u n d"], np.ndarray]:
        """Text-encoder states of the different captions (the last row: empty prompt), index of each scene's."""
        clip: CLIPModel = self.load("clip", self.build_clip("clip"))
        ids, which = self.unique
        states = [clip.text_model(input_ids=part.to(self.device))[0].cpu() for part in ids.split(256)]
        return torch.cat(states), which


def describe(work: Path) -> dict[str, Any]:
    """Collect the records of all finished steps."""
    return {p.stem.removeprefix("done-"): json.loads(p.read_text()) for p in sorted(work.glob("done-*.json"))}


def reconstruction_loss(y: Float[Tensor, "b 3 h w"], x: Float[Tensor, "b 3 h w"]) -> Tensor:
    """L1 + L2 + L1 of image gradients, which keeps edges."""
    error = y - x
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def jitter(x: Float[Tensor, "b 3 h w"], g: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """Mild augmentation for classifiers and CLIPs: shifts up to 3 pixels, noise, and blur of half of the images."""
    dx, dy = (int(torch.randint(-3, 4, (), generator=g, device=g.device)) for _ in range(2))
    x = F.pad(x, (3, 3, 3, 3), mode="replicate")[..., 3 + dy : 67 + dy, 3 + dx : 67 + dx]
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix = torch.rand(len(x), 1, 1, 1, generator=g, device=x.device).mul(2).sub(1).clamp(min=0)
    noise = 0.06 * torch.rand(len(x), 1, 1, 1, generator=g, device=x.device)
    return x + mix * (soft - x) + noise * torch.randn(x.shape, generator=g, device=x.device)


def clip_loss(clip: CLIPModel, x: Float[Tensor, "b 3 h w"], ids: Int[Tensor, "b n"]) -> Tensor:
    """Symmetric contrastive loss (Radford et al. 2021); equal captions in a batch are all positives."""
    out = clip(input_ids=ids, pixel_values=x)
    same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(-1, keepdim=True)
    logits = out.logits_per_image
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def denoising_loss(
    unet: Callable[..., Any],
    scheduler: DDIMScheduler,
    x0: Float[Tensor, "b c h w"],
    text: Float[Tensor, "b n d"],
    g: torch.Generator,
    snr_cap: float = 5.0,
    emphasis: Float[Tensor, "b h w"] | None = None,
) -> Tensor:
    """v-prediction loss weighted by 1 / (1 + SNR / cap), stratified timesteps.

    The weight is that of P2 (Choi et al. 2022) carried over to v: it takes weight from the nearly clean
    timesteps, where v is mostly noise nobody can predict, and leaves the noisy ones, where content is decided.
    ``emphasis`` adds to the weight of places (1 counts a place twice), in full where abar > 1/4 and not at all in
    pure noise, where the place is still unknown.
    """
    b, device = len(x0), x0.device
    u = (torch.arange(b, device=device) + torch.rand(b, generator=g, device=device)) / b
    t = (u * len(scheduler.alphas_cumprod)).long()
    noise = torch.randn(x0.shape, generator=g, device=device)
    x_t = scheduler.add_noise(x0, noise, t)
    v = scheduler.get_velocity(x0, noise, t)
    abar = scheduler.alphas_cumprod.to(device)[t]
    weight = (1 / (1 + abar / (1 - abar) / snr_cap))[:, None, None]
    if emphasis is not None:
        weight = weight * (1 + emphasis * (4 * abar).clamp(max=1)[:, None, None])
    prediction = unet(x_t, t, text, return_dict=False)[0]
    error = (prediction.float() - v).square().mean(1)
    return (weight * error).sum() / weight.expand_as(error).sum()
