"""Amortised guidance against the gradients that taught it, at equal drift from the unguided image."""

from __future__ import annotations

import dataclasses

import numpy as np

from eval.stats.tables import with_interval
from eval.studies.common import StudyBench, StudyConfig, guided_arms, pixel_rms, resampled
from guidance.guides.amortised import AmortisedGuide
from guidance.guides.midblock import MidBlockGuide
from guidance.runs.arms import Arm
from guidance.utils.config import option
from guidance.utils.errors import UserError

_FACTORS = (0.75, 1.0, 1.3)


@dataclasses.dataclass
class Config(StudyConfig):
    """Options of the study."""

    head: str = option("runs/heads/testbed-aesthetic", "the teacher's head")
    adapter: str = option("runs/adapters/testbed-aesthetic", "the adapter distilled from it")
    scale: float = option(2.4, "scale of the teacher")
    samplers: list[str] = option(["ddim-15", "ddim-25", "ddim-50", "dpm++-25", "euler-25"], "SCHEDULER-STEPS")
    cfg_scale: float = option(4.0, "weight of classifier-free guidance")


def run(bench: StudyBench, config: Config) -> list[dict[str, str]]:
    """Sample with the teacher at one scale, and with the adapter at three around it.

    The adapter's gain at the teacher's drift is interpolated between its three scales.

    Returns:
        One row per sampler and arm.
    """
    teachers = guided_arms("gradient", MidBlockGuide(head=config.head), [config.scale])
    adapter = AmortisedGuide(adapter=config.adapter)
    students = guided_arms("amortised", adapter, [factor * config.scale for factor in _FACTORS])
    rows = []
    for sampler in config.samplers:
        scheduler, _, steps = sampler.rpartition("-")
        if not (scheduler and steps.isdecimal()):
            raise UserError(f"Expected samplers as SCHEDULER-STEPS, got '{sampler}'; for example ddim-25.")
        options = {"scheduler": scheduler, "num_steps": int(steps), "cfg_scale": config.cfg_scale}
        arms = [Arm("unguided"), *teachers, *students]
        sampled = bench.sample(f"amortised/{sampler}", bench.captions(), arms, **options)
        base, teacher = sampled["unguided"], sampled[teachers[0].name]
        gains = np.stack([sampled[arm.name].truth - base.truth for arm in students])
        drifts = np.stack([pixel_rms(base.images, sampled[arm.name].images) for arm in students])
        wanted = pixel_rms(base.images, teacher.images)
        ratio = equal_drift_ratio(gains, drifts, teacher.truth - base.truth, wanted)
        rows += [
            {
                "sampler": sampler,
                "arm": name,
                "truth, sd [95%]": s.truth_change(base),
                "drift, grey levels": s.drift(base),
                "object / colour / time agree": bench.agreement(s),
                "gain at equal drift, % of gradient's [95%]": ratio if name == students[1].name else "",
                "time": s.slowdown(base),
            }
            for name, s in sampled.items()
        ]
    return rows


def equal_drift_ratio(gains: np.ndarray, drifts: np.ndarray, gain: np.ndarray, wanted: np.ndarray) -> str:
    """Interpolate the gain at the teacher's mean drift, in percent of the teacher's, with a bootstrap interval.

    ``gains`` and ``drifts`` (scales, images) are the student's, ``gain`` and ``wanted`` (images,) the teacher's.

    >>> gains = np.outer([0.5, 1.0, 1.5], np.ones(4))
    >>> equal_drift_ratio(gains, 10 * gains, np.ones(4), np.full(4, 8.0))
    '80 [80, 80]'
    """

    def ratio(rows: np.ndarray) -> float:
        x, y = drifts[:, rows].mean(1), gains[:, rows].mean(1)
        order = np.argsort(x)
        return 100 * float(np.interp(wanted[rows].mean(), x[order], y[order]) / gain[rows].mean())

    low, high = np.quantile([ratio(rows) for rows in resampled(len(gain))], [0.025, 0.975])
    outside = not drifts.mean(1).min() <= wanted.mean() <= drifts.mean(1).max()
    note = " (drift outside the student's range)" if outside else ""
    return with_interval(ratio(np.arange(len(gain))), (float(low), float(high)), ".0f") + note
