"""Metrics with one value a set of images.  To add one, append its record to `SET_METRICS`.

Every metric has a value for each arm, values on disjoint blocks, and a permutation test against the baseline.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from eval.comparison.results import Better, SetMetric, SetValue
from eval.features.extractors import ClassExtractor, Extractor
from eval.features.reference import Reference
from eval.features.store import What
from eval.metrics.feature_sets import unit_rows
from eval.metrics.frechet import frechet_distance, moments
from eval.metrics.inception_score import inception_score
from eval.metrics.kernels import Kernel, cmmd, cubic_kernel, mmd_squared, rbf_kernel
from eval.metrics.precision_recall import covered, radii
from eval.stats.paired import holm, prompt_numbers
from eval.stats.permutation import MIN_PROMPTS, mmd_permutation_test, permutation_test

if TYPE_CHECKING:
    from eval.comparison.bench import ImageBench

BLOCKS = 3

NEIGHBOURS = 3  # of precision and recall

#: Widest features whose Frechet distance is tested: two eigenproblems a permutation, 10 ms at 128, 200 ms at 512.
WIDEST_TEST = 256

#: Most images whose recall is tested: all distances between two arms are held, 64 MB at 2,000.
MOST_TESTED = 2000

Rows = Float[np.ndarray, "n d"]
Prompts = Sequence[str]
Test = Callable[[Rows, Rows, Prompts, int], float]


class SetData(NamedTuple):
    """Inputs of a set metric: features of each arm, the baseline first, and of the reference where it needs one."""

    rows: Mapping[str, Rows]
    reference: Reference | None = None

    @property
    def real(self) -> Rows:
        """Features of the reference's images."""
        assert self.reference is not None and self.reference.features is not None
        return self.reference.features


class SetStatistic(NamedTuple):
    """A set metric, ready to be computed.

    Attributes:
        rows: Arm -> rows it is computed from, the baseline first.
        value: Of the rows of an arm.
        test: p-value of baseline rows, an arm's rows, prompts and a number of permutations, where there is a faster way
            than to compute `value` for every swap.
        tested: False where a test would take too long.
        width: Number of features, for a metric that is biased below ``n = 2 width``.
    """

    rows: Mapping[str, Rows]
    value: Callable[[Rows], float]
    test: Test | None = None
    tested: bool = True
    width: int | None = None


@dataclasses.dataclass(frozen=True)
class SetMeasure:
    """Everything that `eval.images` and its report know of a metric with one value a set.

    Attributes:
        key: Name in tables: "fd".
        title: Name for people, formatted with the network's ``label``: "FD-{label}".
        better: Which way is better.
        note: One sentence of definition, formatted with the name of the ``reference`` and the ``width`` of features.
        network: Picks the network whose features are compared; None where the metric does not apply.
        statistic: Prepares the computation.
        what: "embed" for features, "probabilities" for those of classes.
        needs: What must be known of the reference: its "images", only their "moments", or "" for nothing.
        min_images: Fewest images of an arm.
        published: Title on features of the published Inception, if it has one of its own.
        distance: The report plots image metrics against the first distance there is.
        tradeoff: Key of another set metric that the report plots against this one.
    """

    key: str
    title: str
    better: Better
    note: str
    network: Callable[[ImageBench], Extractor | None]
    statistic: Callable[[SetData], SetStatistic]
    what: What = "embed"
    needs: Literal["images", "moments", ""] = "images"
    min_images: int = 2
    published: str = ""
    distance: bool = False
    tradeoff: str = ""


class MeasuredSet(NamedTuple):
    """A set metric, its values for all arms, and the `SetStatistic.width` of its features."""

    metric: SetMetric
    values: list[SetValue]
    width: int | None


def measure_sets(bench: ImageBench, permutations: int) -> list[MeasuredSet]:
    """Compute every metric of `SET_METRICS` that applies to the images of a bench."""
    prompts, seeds = [row.prompt_id for row in bench.arms.rows], [row.seed for row in bench.arms.rows]
    measured = []
    for measure in SET_METRICS:
        network = measure.network(bench)
        if network is None or (measure.needs and not bench.reference) or len(prompts) < measure.min_images:
            continue
        reference = bench.read_reference(network) if measure.needs else None
        if measure.needs == "images" and (reference is None or reference.features is None):
            continue
        statistic = measure.statistic(data := SetData(bench.read(network, measure.what), reference))
        title = measure.published if measure.published and network.name == "inception" else measure.title
        width = next(iter(data.rows.values())).shape[1]
        note = measure.note.format(reference=reference.name if reference else "", width=width)
        metric = SetMetric(measure.key, title.format(label=network.label), measure.better, note)
        values = set_values(measure.key, statistic, prompts, seeds, permutations)
        measured.append(MeasuredSet(metric, values, statistic.width))
    return measured


def set_values(
    key: str, statistic: SetStatistic, prompts: Prompts, seeds: Sequence[int], permutations: int
) -> list[SetValue]:
    """Compute a set metric of every arm, on all rows and on blocks, and test it against the first arm's.

    Args:
        key: Of the metric.
        statistic: Its computation, with the rows of each arm, the baseline's first.
        prompts, seeds: Of each row.
        permutations: Of each test.
    """
    (_, base), *others = statistic.rows.items()
    tests: dict[str, float] = {}
    if statistic.tested and len(set(prompts)) >= MIN_PROMPTS:
        test = statistic.test or functools.partial(_value_test, statistic.value)
        tests = {name: test(base, x, prompts, permutations) for name, x in others}
    adjusted = dict(zip(tests, holm(list(tests.values())).tolist(), strict=True))
    blocks = list_blocks(prompts, seeds)
    values: list[SetValue] = []
    for name, x in statistic.rows.items():
        value, parts = statistic.value(x), tuple(statistic.value(x[rows]) for rows in blocks)
        difference = value - values[0].value if values else None
        values.append(SetValue(key, name, value, parts, difference, tests.get(name), adjusted.get(name)))
    return values


def list_blocks(prompts: Prompts, seeds: Sequence[int]) -> list[Int[np.ndarray, " rows"]]:
    """List the rows of three disjoint blocks: of seeds if every prompt has three or more, else of prompts; none if few.

    >>> [rows.tolist() for rows in list_blocks(["a", "a", "a", "b", "b", "b"] * 2, range(12))]
    [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    """
    number = prompt_numbers(prompts)
    counts = np.bincount(number)
    if counts.min() >= BLOCKS:
        order = np.lexsort((np.asarray(seeds), number))
        first = np.cumsum(counts) - counts
        number[order] = np.arange(len(number)) - np.repeat(first, counts)  # rank among the seeds of the prompt
    rows = [np.flatnonzero(number % BLOCKS == block) for block in range(BLOCKS)]
    return rows if min(map(len, rows)) > NEIGHBOURS else []


def _index_test(value: Callable[[Int[np.ndarray, " n"]], float], prompts: Prompts, permutations: int) -> float:
    """Test the difference of a value of rows given by number, 0..n-1 of the baseline and n..2n-1 of the other arm."""
    return permutation_test(prompts, lambda a, b: value(b) - value(a), two_sided=True, permutations=permutations).p


def _value_test(value: Callable[[Rows], float], a: Rows, b: Rows, prompts: Prompts, permutations: int) -> float:
    both = np.concatenate([a, b])
    return _index_test(lambda i: value(both[i]), prompts, permutations)


def _mmd_test(real: Rows, kernel: Kernel) -> Test:
    return lambda a, b, prompts, permutations: (
        mmd_permutation_test(a, b, prompts, kernel, reference=real, permutations=permutations).p
    )


def _doubles(x: Rows) -> Float[Tensor, "n d"]:
    return torch.as_tensor(x).double()


def frechet_statistic(data: SetData) -> SetStatistic:
    """Prepare the Frechet distance to a reference."""
    assert data.reference is not None
    mu, sigma = data.reference.mu, data.reference.sigma
    return SetStatistic(
        data.rows, lambda x: frechet_distance(mu, sigma, *moments(x)), tested=len(mu) <= WIDEST_TEST, width=len(mu)
    )


def kernel_statistic(data: SetData) -> SetStatistic:
    """Prepare the kernel distance (KID's estimator on all rows at once), times 1000."""
    real, test = _doubles(data.real), _mmd_test(data.real, cubic_kernel)
    return SetStatistic(data.rows, lambda x: 1000 * mmd_squared(real, _doubles(x), cubic_kernel).unbiased, test)


def precision_statistic(data: SetData) -> SetStatistic:
    """Prepare the share of generated images within the manifold of real ones."""
    real = _doubles(data.real)
    radius = radii(real, NEIGHBOURS)
    inside = {arm: covered(_doubles(x), real, radius).double()[:, None].numpy() for arm, x in data.rows.items()}
    return SetStatistic(inside, lambda x: float(x.mean()))


def recall_statistic(data: SetData) -> SetStatistic:
    """Prepare the share of real images within the manifold of generated ones."""
    real = _doubles(data.real)

    def value(x: Rows) -> float:
        centres = _doubles(x)
        return float(covered(real, centres, radii(centres, NEIGHBOURS)).double().mean())

    def test(a: Rows, b: Rows, prompts: Prompts, permutations: int) -> float:
        both = _doubles(np.concatenate([a, b]))
        among, across = torch.cdist(both, both).float(), torch.cdist(both, real).float()

        def recall(rows: Int[np.ndarray, " n"]) -> float:
            i = torch.as_tensor(rows)
            radius = among[i].index_select(1, i).topk(NEIGHBOURS + 1, dim=1, largest=False).values[:, -1:]
            return float((across[i] <= radius).any(0).double().mean())

        return _index_test(recall, prompts, permutations)

    testable = all(len(x) <= MOST_TESTED for x in data.rows.values())
    return SetStatistic(data.rows, value, test, tested=testable)


def cmmd_statistic(data: SetData) -> SetStatistic:
    """Prepare CMMD of embeddings of a CLIP, in the published (biased) form."""
    unit = {arm: unit_rows(x).numpy() for arm, x in data.rows.items()}
    test = _mmd_test(unit_rows(data.real).numpy(), rbf_kernel)
    return SetStatistic(unit, lambda x: cmmd(data.real, x).biased, test)


def inception_statistic(data: SetData) -> SetStatistic:
    """Prepare the inception score of class probabilities, in one split."""
    return SetStatistic(data.rows, lambda x: inception_score(x, splits=1).mean)


#: In the order of tables and plots.
SET_METRICS = [
    SetMeasure(
        "fd",
        "FD-{label}",
        "lower",
        "Frechet distance of {width} features to {reference}; biased upwards at small n.",
        network=lambda bench: bench.features,
        statistic=frechet_statistic,
        needs="moments",
        published="FID",
        distance=True,
    ),
    SetMeasure(
        "kd",
        "KD-{label}",
        "lower",
        "1000 times the unbiased MMD with kernel (x.y/d + 1)^3 to {reference}; 0 for equal distributions.",
        network=lambda bench: bench.features,
        statistic=kernel_statistic,
        min_images=NEIGHBOURS + 1,
        published="KID",
        distance=True,
    ),
    SetMeasure(
        "precision",
        "precision ({label})",
        "higher",
        f"Share of images within the manifold of {{reference}} (k = {NEIGHBOURS}): how many look real.",
        network=lambda bench: bench.features,
        statistic=precision_statistic,
        min_images=NEIGHBOURS + 1,
    ),
    SetMeasure(
        "recall",
        "recall ({label})",
        "higher",
        f"Share of {{reference}} within the manifold of the images (k = {NEIGHBOURS}): how much of it is reached.",
        network=lambda bench: bench.features,
        statistic=recall_statistic,
        min_images=NEIGHBOURS + 1,
        tradeoff="precision",
    ),
    SetMeasure(
        "cmmd",
        "CMMD-{label}",
        "lower",
        "1000 times the squared MMD of CLIP embeddings under a Gaussian kernel (sigma 10) to {reference}.",
        network=lambda bench: bench.clip,
        statistic=cmmd_statistic,
        distance=True,
    ),
    SetMeasure(
        "inception_score",
        "inception score ({label})",
        "higher",
        "exp of the mean KL of class probabilities from their mean, in one split: sharp and varied classes.",
        network=lambda bench: bench.features if isinstance(bench.features, ClassExtractor) else None,
        statistic=inception_statistic,
        what="probabilities",
        needs="",
        tradeoff="fd",
    ),
]
