"""Compare the arms of a run folder on the testbed, where truth is known: one row per arm against the baseline."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from eval.clip_score import clip_score
from eval.frechet import frechet_distance, moments
from eval.paired import PairedDifference, paired_difference
from guidance.errors import UserError
from guidance.records import UNGUIDED, Record, RecordStore, audit_pairs
from guidance.testbed.judges import Judges
from guidance.testbed.truth import truth_score


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """What an arm's images are like, against the baseline's of the same prompts and noise.

    Attributes:
        arm: Name of the arm.
        n: Images.
        truth_mean: Mean truth score (testbed units: sd 1 over training scenes).
        truth: Paired comparison with the baseline; None for the baseline itself.
        agreement: Attribute -> share of images in which the judge classifier sees what the caption says.
        clip: Mean judge CLIP score, 100 cos.
        frechet: Frechet distance of judge features to test scenes (biased upwards at small n).
        seconds: Median seconds per image.
    """

    arm: str
    n: int
    truth_mean: float
    truth: PairedDifference | None
    agreement: dict[str, float]
    clip: float
    frechet: float
    seconds: float


def load_images(folder: str | os.PathLike[str], records: Sequence[Record]) -> UInt8[np.ndarray, "n h w 3"]:
    """Read the images of records, uint8 RGB."""
    return np.stack([np.asarray(Image.open(Path(folder) / r.image).convert("RGB")) for r in records])


def compare_arms(
    folder: str | os.PathLike[str],
    judges: Judges,
    reference: tuple[np.ndarray, np.ndarray],
    baseline: str = UNGUIDED,
    vary: Sequence[str] = (),
) -> list[ArmResult]:
    """Audit the pairing of a run folder and measure each arm; the baseline comes first.

    Args:
        folder: What ``sample/guided.py`` wrote.
        judges: See :func:`guidance.testbed.judges.load_judges`.
        reference: Mean and covariance of the judge features of real scenes, see :func:`eval.frechet.moments`.
        baseline: Arm the others are compared with.
        vary: Record fields in which arms may differ on purpose, for example "cfg_scale".

    Raises:
        UserError: If the arms are not paired, or the baseline is missing.
    """
    records = RecordStore(folder).load()
    names = list(dict.fromkeys(r.arm for r in records))
    if baseline not in names:
        raise UserError(f"Expected an arm '{baseline}' in '{folder}', found {', '.join(names) or 'none'}.")
    audit_pairs(records, baseline, vary=vary)
    by_arm = {
        n: sorted((r for r in records if r.arm == n), key=lambda r: (r.prompt_id, r.seed)) for n in names
    }
    base = truth_score(load_images(folder, by_arm[baseline]))
    return [
        _measure(folder, by_arm[name], judges, reference, None if name == baseline else base)
        for name in sorted(names, key=lambda n: (n != baseline, by_arm[n][0].scale))
    ]


def _measure(
    folder: str | os.PathLike[str],
    records: list[Record],
    judges: Judges,
    real: tuple[np.ndarray, np.ndarray],
    base: np.ndarray | None,
) -> ArmResult:
    images, prompts = load_images(folder, records), [r.prompt for r in records]
    truth = truth_score(images)
    texts = judges.clip_embed_texts(prompts)
    return ArmResult(
        arm=records[0].arm,
        n=len(records),
        truth_mean=float(truth.mean()),
        truth=None if base is None else paired_difference(base, truth, [r.prompt_id for r in records]),
        agreement={k: float(v.mean()) for k, v in judges.agreement(images, prompts).items()},
        clip=float(np.mean(clip_score(judges.clip_embed_images(images), texts))),
        frechet=frechet_distance(*real, *moments(judges.features(images))),
        seconds=float(np.median([r.seconds for r in records])),
    )


def markdown_table(results: Sequence[ArmResult]) -> str:
    """Write results as a Markdown table; the first row is the baseline."""
    base = results[0]
    lines = [
        "| arm | truth | change in sd [95%] | prompts improved [95%] | object / colour / time agree | "
        "judge CLIP score | FD-judge | s per image |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        change = share = "-"
        if r.truth is not None:
            low, high = r.truth.effect_interval
            change = f"{r.truth.effect_size:+.2f} [{low:+.2f}, {high:+.2f}]"
            low, high = r.truth.share_interval
            share = f"{100 * r.truth.share_improved:.0f}% [{100 * low:.0f}, {100 * high:.0f}]"
        agree = " / ".join(f"{100 * r.agreement[k]:.1f}" for k in ("object", "colour", "time"))
        cost = f"{r.seconds:.3f}" + ("" if r is base else f" ({r.seconds / base.seconds:.2f}x)")
        lines.append(
            f"| {r.arm} | {r.truth_mean:+.2f} | {change} | {share} | {agree} "
            f"| {r.clip:.1f} | {r.frechet:.1f} | {cost} |"
        )
    return "\n".join(lines)


def as_dict(results: Sequence[ArmResult]) -> list[dict[str, Any]]:
    """Plain data for ``write_json``."""
    return [dataclasses.asdict(r) for r in results]
