"""Compare arms by their metrics, with uncertainty over prompts; caveats and the table of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from eval.comparison.arms import ArmImage, Arms
from eval.comparison.image_metrics import Measured
from eval.comparison.results import ArmSummary, Breakdown, Caveat, Delta
from eval.stats.paired import holm, paired_difference
from guidance.runs.records import Record
from guidance.utils.errors import UserError

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
        base, of_metric = m.values[arms.baseline], []
        for name in arms.names[1:]:
            both = np.isfinite(base) & np.isfinite(m.values[name])
            if len(set(unit[both])) < 2:
                raise UserError(
                    f"Expected {m.metric.title} to have a value for two or more prompts in '{name}', got "
                    f"{len(set(unit[both]))}; leave the metric out, or compare more images."
                )
            d = paired_difference(base[both], m.values[name][both], unit[both].tolist())
            of_metric.append(Delta(m.metric.key, name, d, d.wilcoxon_p, int((~both).sum())))
        adjusted = holm([d.paired.wilcoxon_p for d in of_metric])
        found += [dataclasses.replace(d, p_holm=float(p)) for d, p in zip(of_metric, adjusted, strict=True)]
    return found


def breakdowns(measured: Sequence[Measured], arms: Arms) -> list[Breakdown]:
    """Compute differences by category and by challenge, where prompts have more than one of them."""
    unit, found = np.array(units(arms), dtype=object), []
    for by in ("category", "challenge"):
        classes = np.array([getattr(row, by) for row in arms.rows], dtype=object)
        names = sorted({name for name in classes if name})
        if len(names) < 2:
            continue
        for m in measured:
            base = m.values[arms.baseline]
            for arm in arms.names[1:]:
                has = np.isfinite(base) & np.isfinite(m.values[arm])
                for name in names:
                    part = has & (classes == name)
                    if len(set(unit[part])) < _MIN_PROMPTS:
                        continue
                    d = paired_difference(base[part], m.values[arm][part], unit[part].tolist())
                    found.append(Breakdown(by, name, m.metric.key, arm, d.n_prompts, d.mean_diff, d.interval))
    return found


def summarise_arms(arms: Arms) -> list[ArmSummary]:
    """Summarise each arm, as far as it is recorded."""
    return [_summary(name, images, name == arms.baseline) for name, images in arms.images.items()]


def _summary(name: str, images: Sequence[ArmImage], baseline: bool) -> ArmSummary:
    records = [image.record for image in images if image.record is not None]
    if not records:
        return ArmSummary(name, len(images), "baseline" if baseline else name)
    r = records[0]
    return ArmSummary(
        name=name,
        n=len(images),
        series="baseline" if baseline else _series(r),
        method=_method(r),
        scale=r.scale,
        cfg_scale=r.cfg_scale,
        seconds=float(np.median([record.seconds for record in records])),
    )


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
        for i, image in enumerate(images):
            r, first = image.record, arms.rows[i]
            values = {m.metric.key: _plain(m.values[name][i]) for m in measured}
            rows.append(
                {
                    "arm": name,
                    "prompt_id": image.prompt_id,
                    "prompt": image.prompt or first.prompt,
                    "category": image.category or first.category,
                    "challenge": image.challenge or first.challenge,
                    "seed": image.seed,
                    "scale": r.scale if r else None,
                    "cfg_scale": r.cfg_scale if r else None,
                    "seconds": r.seconds if r else None,
                    "image": str(image.file),
                    "sha256": image.digest,
                    **values,
                }
            )
    return rows


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


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
    return [
        *_pairing_caveats(arms),
        *_prompt_caveats(arms, truncated),
        *_metric_caveats(arms, measured, widths, reference_size),
        *_drift_caveats(found),
    ]


def _pairing_caveats(arms: Arms) -> Iterator[Caveat]:
    if not arms.audited:
        yield Caveat(
            "unpaired",
            "Images are paired by name only: nothing is recorded of noise, model, scheduler and steps, so that what "
            "differs between the arms rests on your word.",
        )
    for reason, pairs in arms.excluded.items():
        shown = "; ".join(pairs[:3]) + (" ..." if len(pairs) > 3 else "")
        yield Caveat("excluded", f"{len(pairs)} pairs were left out in all arms: {reason} ({shown}).")
    if arms.converted:
        kinds = ", ".join(f"{n} images of {what}" for what, n in arms.converted.items())
        yield Caveat("converted", f"Not all images are 8-bit RGB of one size, and were converted: {kinds}.")


def _prompt_caveats(arms: Arms, truncated: Sequence[str]) -> Iterator[Caveat]:
    if cut := {r.prompt_id for r in arms.rows if r.record and r.record.truncated}:
        text = f"{len(cut)} prompts are longer than the model reads; their images follow the beginning only."
        yield Caveat("truncated", text)
    if truncated:
        text = f"{len(truncated)} prompts are longer than the evaluating CLIP reads; it scores the beginning only."
        yield Caveat("truncated", text)
    empty = sum(not row.prompt for row in arms.rows)
    if 0 < empty < len(arms.rows):
        yield Caveat("excluded", f"{empty} images have no prompt, and no CLIP score.")
    prompts = len({row.prompt_id for row in arms.rows})
    if prompts == 1:
        text = "All images share one prompt: intervals are over seeds, and say nothing about other prompts."
        yield Caveat("prompts", text)
    elif prompts < 20:
        yield Caveat("prompts", f"Only {prompts} prompts: bootstrap intervals of so few are too narrow.")


def _metric_caveats(
    arms: Arms, measured: Sequence[Measured], widths: Mapping[str, int], reference_size: int | None
) -> Iterator[Caveat]:
    for metric in (m.metric for m in measured if m.metric.circular):
        guided = ", ".join(f"'{name}'" for name in metric.circular)
        yield Caveat(
            "circular",
            f"{metric.title} is measured by the network that guided {guided}: it grades its own work. Take another "
            "evaluator.",
        )
    least = min(len(arms.rows), reference_size or len(arms.rows))
    for title, width in widths.items():
        if least < 2 * width:
            yield Caveat(
                "biased",
                f"{title} of {least} images with {width} features is biased upwards: compare it among the arms only, "
                f"never with figures from elsewhere, or take {2 * width} images or more.",
            )


def _drift_caveats(found: Sequence[Delta]) -> Iterator[Caveat]:
    """Warn of saturation or clipping that rises, or diversity that falls, significantly and by half an sd or 5%."""
    for d in found:
        p, (low, high) = d.paired, d.paired.interval
        if d.metric in ("saturation", "clipping") and low > 0 and not p.effect_size <= 0.5:
            rise = f"rises from {p.mean_a:.3f} to {p.mean_b:.3f}"
            yield Caveat("saturation", f"{d.metric.capitalize()} of '{d.arm}' {rise}: look at the images.")
        if d.metric == "diversity" and high < 0 and p.mean_b < 0.95 * p.mean_a:
            fall = f"diversity falls from {p.mean_a:.3f} to {p.mean_b:.3f}"
            yield Caveat("diversity", f"Images of one prompt are more alike in '{d.arm}': {fall}.")
