"""Discriminator guidance: does it bring samples closer to the data, by Frechet distance, precision and recall?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from eval.metrics.frechet import frechet_distance, moments
from eval.metrics.precision_recall import precision_recall
from eval.studies.common import Sampled, StudyBench, StudyConfig
from guidance.data.prompts import Prompt
from guidance.guides.midblock import MidBlockGuide
from guidance.runs.arms import guide_arms
from guidance.runs.run import list_jobs
from guidance.sampling import decode_latents
from guidance.sampling.start import encode_images
from guidance.testbed.render import render_scenes
from guidance.testbed.scenes import scenes
from guidance.utils.config import option

_REBUILT = "to scenes through the VAE"
_STRIDE = 100_000  # between the scenes of the reference and of each block, which are thus disjoint


@dataclasses.dataclass
class Config(StudyConfig):
    """Options of the study; num_images per block and arm are compared with as many rendered scenes."""

    head: str = option("runs/heads/testbed-discriminator", "discriminator head")
    scales: list[float] = option([1.0], "weights of its log-odds' gradient (Kim et al. 2023: 1 to 2)")
    start: float | None = option(None, "fraction of the steps where guidance begins; null: the head's default")
    stop: float | None = option(None, "fraction of the steps where guidance ends; null: the head's default")
    cfg_scales: list[float] = option([1.0, 2.0], "weights of classifier-free guidance")
    blocks: int = option(3, "disjoint blocks of captions and noises")


def run(bench: StudyBench, config: Config) -> list[dict[str, str]]:
    """Sample captions of scenes at each CFG weight, unguided and with the discriminator's raw gradient.

    Returns:
        One row per CFG weight and scale: the Frechet distance on judge features of each block, and their mean, to
        the scenes and to the same scenes through the VAE and back, the best that latents can do.  Two last rows
        measure the scenes of the first block's captions themselves.
    """
    split, n = config.split, config.num_images
    rebuilt = bench.judges.features(_through_vae(bench, bench.pictures))
    references = moments(bench.real), moments(rebuilt)
    rows = []
    for cfg in config.cfg_scales:
        spec = MidBlockGuide(start=config.start, stop=config.stop, head=config.head, objective="binary", normalize=None)
        found: dict[str, list[tuple[list[float], Sampled]]] = {}
        for block in range(config.blocks):
            captions = [s.caption for s in scenes(split, n, start=_STRIDE * (block + 1))]
            prompts = [Prompt(f"scene{block}-{i:05d}", text) for i, text in enumerate(captions)]
            jobs = list_jobs(prompts, 1, config.seed + 1000 * _STRIDE * block)
            arms = guide_arms([spec], config.scales)
            for name, s in bench.sample(f"discriminator/cfg{cfg:g}", jobs, arms, cfg_scale=cfg).items():
                features = bench.judges.features(s.images)
                block_values = [*_distances(features, references), *precision_recall(bench.real, features)]
                found.setdefault(name, []).append((block_values, s))
        base = found["unguided"]
        for name, measured in found.items():
            values, unguided = (np.array([v for v, _ in blocks]).T for blocks in (measured, base))
            changes = 100 * (values[:2] / unguided[:2] - 1)
            rows.append(
                {
                    "CFG": f"{cfg:g}",
                    "arm": name,
                    "FD-judge": _blocks(values[0], ".1f"),
                    "change": _blocks(changes[0], "+.0f", "%"),
                    _REBUILT: _blocks(values[1], ".1f"),
                    f"change {_REBUILT}": _blocks(changes[1], "+.0f", "%"),
                    "precision / recall": f"{values[2].mean():.2f} / {values[3].mean():.2f}",
                    "object / colour / time agree": bench.agreement(measured[0][1]),
                    "time": measured[0][1].slowdown(base[0][1]),
                }
            )
    others = render_scenes(scenes(split, n, start=_STRIDE))
    floors = {"other scenes": others, "other scenes through the VAE": _through_vae(bench, others)}
    for name, images in floors.items():
        fds = _distances(bench.judges.features(images), references)
        row = {"arm": name, "FD-judge": f"{fds[0]:.1f}", _REBUILT: f"{fds[1]:.1f}"}
        rows.append(dict.fromkeys(rows[0], "") | row)
    return rows


def _distances(features: Float[np.ndarray, "n d"], references: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    fitted = moments(features)
    return [frechet_distance(*reference, *fitted) for reference in references]


def _through_vae(bench: StudyBench, images: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n h w 3"]:
    """Encode and decode images."""
    parts = np.split(images, range(bench.config.batch_size, len(images), bench.config.batch_size))
    return np.concatenate([decode_latents(bench.pipe, encode_images(bench.pipe, part)) for part in parts])


def _blocks(values: np.ndarray, spec: str, unit: str = "") -> str:
    """Format the mean, and the value of each block."""
    return f"{values.mean():{spec}}{unit} ({', '.join(f'{v:{spec}}' for v in values)})"
