"""CLIP guidance from the empty prompt: how much of what conditioning on the caption gives does guiding by it give?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from eval.metrics.clip import clip_score
from eval.stats.paired import mean_interval
from eval.stats.tables import with_interval
from eval.studies.common import StudyBench, StudyConfig, guided_arms
from guidance.guides.base import Guide
from guidance.guides.clip import ClipGuide
from guidance.guides.embedding import EmbeddingGuide
from guidance.runs.arms import Arm
from guidance.utils.config import option


@dataclasses.dataclass
class Config(StudyConfig):
    """Options of the study."""

    head: str = option("runs/heads/testbed-clip", "CLIP-embedding head")
    scales: list[float] = option([0.5], "scales of the head")
    every: list[int] = option([1, 2], "steps from one gradient of the head to the next")
    image_scales: list[float] = option([0.5], "scales of CLIP on decoded images; [] leaves it out")


def run(bench: StudyBench, config: Config) -> list[dict[str, str]]:
    """Guide empty-prompt samples by captions, and set them beside conditional sampling.

    Returns:
        One row per method: judge CLIP score, and the share of the gain that conditioning (CFG 1 and 4) gives.
    """
    guides: list[tuple[str, Guide, Sequence[float]]] = [
        *(
            (
                "CLIP head" if k == 1 else f"CLIP head, every {k}",
                EmbeddingGuide(head=config.head, every=k),
                config.scales,
            )
            for k in config.every
        ),
        ("CLIP on images, x0", ClipGuide(through="x0"), config.image_scales),
        ("CLIP on images, UNet", ClipGuide(through="unet"), config.image_scales),
    ]
    guided = [arm for name, spec, scales in guides for arm in guided_arms(name, spec, scales)]
    arms = [dataclasses.replace(arm, conditioning="") for arm in (Arm("unguided"), *guided)]
    jobs = bench.captions()
    sampled = bench.sample("clip", jobs, [*arms, Arm("caption")], cfg_scale=1.0)
    sampled |= bench.sample("clip", jobs, [Arm("caption, CFG 4")], cfg_scale=4.0)
    texts = bench.judges.clip_embed_texts([job.prompt.text for job in jobs])
    scores = {name: clip_score(bench.judges.clip_embed_images(s.images), texts) for name, s in sampled.items()}
    gains = {name: (score - scores["unguided"]).mean() for name, score in scores.items()}
    return [
        {
            "arm": name,
            "judge CLIP score [95%]": with_interval(scores[name].mean(), mean_interval(scores[name]), ".1f"),
            "of caption's gain": f"{100 * gains[name] / gains['caption']:.0f}%",
            "of CFG 4's": f"{100 * gains[name] / gains['caption, CFG 4']:.0f}%",
            "object / colour / time agree": bench.agreement(s),
            "time": s.slowdown(sampled["unguided"]),
            "against CFG 4": s.slowdown(sampled["caption, CFG 4"]),
        }
        for name, s in sampled.items()
    ]
