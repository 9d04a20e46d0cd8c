"""Results of a comparison as plain data, from which report, ``summary.json``, tables and W&B logs are written."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from eval.stats.paired import PairedDifference

Better = Literal["higher", "lower", ""]  # "": neither; the metric only shows how far an arm has moved


@dataclasses.dataclass(frozen=True)
class ArmSummary:
    """One arm of a comparison.

    Attributes:
        name: As in records, or the folder's name.
        n: Number of images.
        series: Arms of one series form a curve: "guided by aesthetic", "plain CFG".  The baseline's is "baseline", and
            every curve passes through it.
        method: Guidance, scheduler and steps in a phrase; "" where nothing is recorded.
        scale, cfg_scale: Guidance scale and weight of classifier-free guidance; None where nothing is recorded.
        seconds: Median seconds per image; None where nothing is recorded.
        happened: Solver steps, gradients and pushes of an image, and what was skipped, in words; "" where unknown.
    """

    name: str
    n: int
    series: str
    method: str = ""
    scale: float | None = None
    cfg_scale: float | None = None
    seconds: float | None = None
    happened: str = ""


@dataclasses.dataclass(frozen=True)
class ImageMetric:
    """A metric with a value an image (or a prompt, for diversity).

    Attributes:
        key: Column of the rows: "clip_score".
        title: Name for people: "CLIP score (judge CLIP)".
        better: Which way is better.
        evaluator: The network that measures it; "" for formulas.
        circular: Arms that the evaluator itself had guided.
        note: One sentence of definition, with range and unit.
    """

    key: str
    title: str
    better: Better
    evaluator: str = ""
    circular: tuple[str, ...] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Delta:
    """A metric of an arm against the baseline, paired, over prompts.

    Attributes:
        metric: :attr:`ImageMetric.key`.
        p_holm: ``paired.wilcoxon_p`` adjusted by Holm over the arms of this metric.
        excluded: Images left out on both sides because the metric has no value there.
    """

    metric: str
    arm: str
    paired: PairedDifference
    p_holm: float
    excluded: int = 0


@dataclasses.dataclass(frozen=True)
class SetMetric:
    """A metric with one value a set of images, such as "fd"; its title is "FID" only with the real Inception."""

    key: str
    title: str
    better: Better
    note: str = ""


@dataclasses.dataclass(frozen=True)
class SetValue:
    """A set metric of one arm, the baseline included.

    Attributes:
        metric: :attr:`SetMetric.key`.
        value: On all images of the arm.
        blocks: On disjoint blocks of prompts (or seeds); each is biased by its size, so compare them among arms only.
        difference: ``value`` less the baseline's; None for the baseline.
        p: From a two-sided permutation test of the difference, labels swapped within prompts; None for the baseline,
            and where no test was run.
        p_holm: ``p`` adjusted by Holm over the arms.
    """

    metric: str
    arm: str
    value: float
    blocks: tuple[float, ...] = ()
    difference: float | None = None
    p: float | None = None
    p_holm: float | None = None


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """A metric of an arm against the baseline on a part of the prompts.

    Attributes:
        by, value: "category" or "challenge", and what that column says.
        difference, interval: Mean paired difference and its 95% interval, not adjusted for the number of parts.
    """

    by: str
    value: str
    metric: str
    arm: str
    n_prompts: int
    difference: float
    interval: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Caveat:
    """Something a reader must know before believing a number.

    Attributes:
        kind: "circular", "biased", "truncated", "saturation", "diversity", "unpaired", "excluded", "skipped" ...
        text: One sentence, with what to do about it.
    """

    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One or more arms on the same prompts and noises; see `eval.comparison.bench.ImageBench.compare`.

    Attributes:
        command: Command line that reproduces it.
        created: ISO 8601, UTC.
        provenance: Versions, models, evaluators with their fingerprints, reference and options.
        baseline: Name of the arm with which the others are compared.
        arms: The baseline first.
        n_prompts, n_pairs: Prompts and images in every arm.
        image_metrics, deltas: Image metrics; a delta for each of them and each arm but the baseline.
        set_metrics, set_values: Set metrics; a value for each of them and each arm.
        breakdowns: By category and challenge, where prompts have them.
        rows: One dict an image: arm, prompt_id, prompt, category, challenge, seed, scale, cfg_scale, image (path of the
            file), seconds, and a column for each image metric (None where it has no value).
    """

    title: str
    command: str
    created: str
    provenance: dict[str, Any]
    baseline: str
    arms: list[ArmSummary]
    n_prompts: int
    n_pairs: int
    image_metrics: list[ImageMetric]
    deltas: list[Delta]
    set_metrics: list[SetMetric]
    set_values: list[SetValue]
    breakdowns: list[Breakdown]
    caveats: list[Caveat]
    rows: list[dict[str, Any]]

    def delta(self, metric: str, arm: str) -> Delta | None:
        """Return the delta of a metric and an arm, or None."""
        return next((d for d in self.deltas if (d.metric, d.arm) == (metric, arm)), None)

    def set_value(self, metric: str, arm: str) -> SetValue | None:
        """Return the value of a set metric for an arm, or None."""
        return next((s for s in self.set_values if (s.metric, s.arm) == (metric, arm)), None)

    def mean(self, metric: str, arm: str) -> float | None:
        """Return the mean of an image metric or the value of a set metric for any arm; None if not measured."""
        if (found := self.set_value(metric, arm)) is not None:
            return found.value
        for d in self.deltas:
            if d.metric == metric and arm in (d.arm, self.baseline):
                return d.paired.mean_a if arm == self.baseline else d.paired.mean_b
        return None
