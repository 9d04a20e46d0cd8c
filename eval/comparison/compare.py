"""Compare arms by their metrics, with uncertainty over prompts; caveats and the table of rows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from eval.comparison.arms import Arms
from eval.comparison.image_metrics import Measured
from eval.comparison.results import ArmSummary, Breakdown, Caveat, Delta, ImageMetric
from eval.stats.paired import PairedDifference, holm, paired_difference
from guidance.runs.records import Record
from guidance.utils.errors import UserError

Rows = Bool[np.ndarray, " n"]

_MIN_PROMPTS = 5  # of a part of the prompts that gets an interval


def units(arms: Arms) -> list[str]:
    """Return the statistical unit of each row: its prompt, or its seed where all images share one prompt."""
    prompts = [row.prompt_id for row in arms.rows]
    return prompts if len(set(prompts)) > 1 else [f"{row.prompt_id} {row.seed}" for row in arms.rows]


def deltas(measured: Sequence[Measured], arms: Arms) -> list[Delta]:
    """Compare every arm with the baseline in every metric; Holm over the arms of a metric.

    Images without a value in either arm are left out on both sides, and counted.

    Raises:
        UserError: If fewer than two prompts have a value.
    """
    unit = np.array(units(arms), dtype=object)
    found = []
    for m in measured:
        of_metric = []
        for name in arms.names[1:]:
            both = _both(m, arms, name)
            if (count := len(set(unit[both]))) < 2:
                raise UserError(
                    f"Expected {m.metric.title} to have a value for two or more prompts in '{name}', got {count}; "
                    "leave the metric out, or compare more images."
                )
            of_metric.append((name, _difference(m, arms, name, both, unit), int((~both).sum())))
        adjusted = holm([d.wilcoxon_p for _, d, _ in of_metric]).tolist()
        found += [Delta(m.metric.key, name, d, p, n) for (name, d, n), p in zip(of_metric, adjusted, strict=True)]
    return found


def breakdowns(measured: Sequence[Measured], arms: Arms) -> list[Breakdown]:
    """Compute differences by category and by challenge, where prompts have more than one of them."""
    unit, found = np.array(units(arms), dtype=object), []
    for by in ("category", "challenge"):
        classes = np.array([getattr(row, by) for row in arms.rows], dtype=object)
        names = sorted({name for name in classes if name})
        for m, arm, name in itertools.product(measured, arms.names[1:], names if len(names) > 1 else []):
            part = _both(m, arms, arm) & (classes == name)
            if len(set(unit[part])) >= _MIN_PROMPTS:
                d = _difference(m, arms, arm, part, unit)
                found.append(Breakdown(by, name, m.metric.key, arm, d.n_prompts, d.mean_diff, d.interval))
    return found


def _both(m: Measured, arms: Arms, arm: str) -> Rows:
    """Mark the rows with a value in the baseline and in an arm."""
    return np.isfinite(m.values[arms.baseline]) & np.isfinite(m.values[arm])


def _difference(m: Measured, arms: Arms, arm: str, rows: Rows, unit: np.ndarray) -> PairedDifference:
    return paired_difference(m.values[arms.baseline][rows], m.values[arm][rows], unit[rows].tolist())


def summarise_arms(arms: Arms) -> list[ArmSummary]:
    """Summarise each arm, as far as it is recorded."""
    summaries = []
    for name, images in arms.images.items():
        summary = ArmSummary(name, len(images), "baseline" if name == arms.baseline else name)
        if records := [image.record for image in images if image.record is not None]:
            r, seconds = records[0], float(np.median([record.seconds for record in records]))
            known: dict[str, Any] = {
                "method": _method(r),
                "scale": r.scale,
                "cfg_scale": r.cfg_scale,
                "seconds": seconds,
                "happened": _happened(records),
            }
            series = summary.series if name == arms.baseline else _series(r)
            summary = dataclasses.replace(summary, series=series, **known)
        summaries.append(summary)
    return summaries


def _happened(records: Sequence[Record]) -> str:
    """Tell what happened to an arm's images: medians over them, and all steps that were skipped."""
    steps, gradients, pushes = (
        int(np.median([getattr(r, name) for r in records])) for name in ("steps", "gradients", "pushes")
    )
    if not steps:  # records of earlier versions do not say
        return ""
    skipped = sum(r.nan_skipped for r in records)
    guided = f", {gradients} gradients, {pushes} pushes" if records[0].guides else ""
    return f"{steps} steps{guided}" + (f"; {skipped} guided steps skipped (gradient not finite)" if skipped else "")


def _series(r: Record) -> str:
    """Name what an arm shares with arms of other strengths."""
    parts = [f"guided by {' + '.join(str(g.get('name', g['method'])) for g in r.guides)}"] if r.guides else []
    parts += [f"steered by {r.steering['guide']}"] if r.steering else []
    return ", ".join(parts) or "plain CFG"


def _method(r: Record) -> str:
    guides = " + ".join(f"{g.get('name', g['method'])} x {g['guidance_scale']:g}" for g in r.guides)
    steering = f"{r.steering['particles']} particles, lam {r.steering['lam']:g}" if r.steering else ""
    parts = [guides or "no guidance", steering, f"CFG {r.cfg_scale:g}", f"{r.scheduler}, {r.num_steps} steps"]
    return ", ".join(part for part in parts if part)


def table_rows(measured: Sequence[Measured], arms: Arms) -> list[dict[str, Any]]:
    """Return one dict an image, see :class:`eval.comparison.results.Comparison`."""
    rows = []
    for name, images in arms.images.items():
        for i, (image, first) in enumerate(zip(images, arms.rows, strict=True)):
            row: dict[str, Any] = {"arm": name, "prompt_id": image.prompt_id}
            row |= {k: getattr(image, k) or getattr(first, k) for k in ("prompt", "category", "challenge")}
            row |= {"seed": image.seed}
            row |= {k: getattr(image.record, k, None) for k in ("scale", "cfg_scale", "seconds")}
            row |= {"image": str(image.file), "sha256": image.digest}
            values = {m.metric.key: float(m.values[name][i]) for m in measured}
            rows.append(row | {key: value if math.isfinite(value) else None for key, value in values.items()})
    return rows


def caveats(
    arms: Arms,
    measured: Sequence[Measured],
    found: Sequence[Delta],
    *,
    widths: Mapping[str, int],
    reference_size: int | None,
    truncated: Sequence[str] = (),
) -> list[Caveat]:
    """List what a reader must know before believing the numbers.

    Args:
        arms: The arms.
        measured: Image metrics and values.
        found: Their :func:`deltas`.
        widths: Title of a biased set metric -> width of its features.
        reference_size: Images of the reference set; None without one.
        truncated: Prompts of which the evaluating CLIP reads only the beginning.
    """
    metrics = [m.metric for m in measured]
    return [
        Caveat(kind, text)
        for kind, text in (
            *_pairing_caveats(arms),
            *_prompt_caveats(arms, truncated),
            *_metric_caveats(arms, metrics, widths, reference_size),
            *_drift_caveats(found),
        )
    ]


def _pairing_caveats(arms: Arms) -> Iterator[tuple[str, str]]:
    if not arms.audited:
        yield (
            "unpaired",
            "Images are paired by name only: nothing is recorded of noise, model, scheduler and steps, so that what "
            "differs between the arms rests on your word.",
        )
    for reason, pairs in arms.excluded.items():
        shown = "; ".join(pairs[:3]) + (" ..." if len(pairs) > 3 else "")
        yield "excluded", f"{len(pairs)} pairs were left out in all arms: {reason} ({shown})."
    for name, images in arms.images.items():
        skipped = [i.record.nan_skipped for i in images if i.record and i.record.nan_skipped]
        if skipped:
            yield (
                "skipped",
                f"'{name}': {sum(skipped)} guided steps of {len(skipped)} images were skipped, since their gradient "
                "was not finite; run the model in bfloat16 or float32.",
            )
    if arms.converted:
        kinds = ", ".join(f"{n} images of {what}" for what, n in arms.converted.items())
        yield "converted", f"Not all images are 8-bit RGB of one size, and were converted: {kinds}."


def _prompt_caveats(arms: Arms, truncated: Sequence[str]) -> Iterator[tuple[str, str]]:
    if cut := {r.prompt_id for r in arms.rows if r.record and r.record.truncated}:
        yield (
            "truncated",
            f"{len(cut)} prompts are longer than the model reads; their images follow the beginning only.",
        )
    if n := len(truncated):
        yield "truncated", f"{n} prompts are longer than the evaluating CLIP reads; it scores the beginning only."
    if 0 < (empty := sum(not row.prompt for row in arms.rows)) < len(arms.rows):
        yield "excluded", f"{empty} images have no prompt, and no CLIP score."
    if (prompts := len({row.prompt_id for row in arms.rows})) == 1:
        yield "prompts", "All images share one prompt: intervals are over seeds, and say nothing about other prompts."
    elif prompts < 20:
        yield "prompts", f"Only {prompts} prompts: bootstrap intervals of so few are too narrow."


def _metric_caveats(
    arms: Arms, metrics: Sequence[ImageMetric], widths: Mapping[str, int], reference_size: int | None
) -> Iterator[tuple[str, str]]:
    for metric in metrics:
        if guided := ", ".join(f"'{name}'" for name in metric.circular):
            text = f"{metric.title} is measured by the network that guided {guided}: it grades its own work."
            yield "circular", f"{text} Take another evaluator."
    least = min(len(arms.rows), reference_size or len(arms.rows))
    for title, width in widths.items():
        if least < 2 * width:
            yield (
                "biased",
                f"{title} of {least} images with {width} features is biased upwards: compare it among the arms only, "
                f"never with figures from elsewhere, or take {2 * width} images or more.",
            )


def _drift_caveats(found: Sequence[Delta]) -> Iterator[tuple[str, str]]:
    """Warn of saturation or clipping that rises, or diversity that falls, significantly and by half an sd or 5%."""
    for d in found:
        p, (low, high) = d.paired, d.paired.interval
        change = f"from {p.mean_a:.3f} to {p.mean_b:.3f}"
        if d.metric in ("saturation", "clipping") and low > 0 and not p.effect_size <= 0.5:
            yield "saturation", f"{d.metric.capitalize()} of '{d.arm}' rises {change}: look at the images."
        if d.metric == "diversity" and high < 0 and p.mean_b < 0.95 * p.mean_a:
            yield "diversity", f"Images of one prompt are more alike in '{d.arm}': diversity falls {change}."
