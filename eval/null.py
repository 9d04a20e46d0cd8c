"""Error rates of the statistics: thousands of simulated comparisons, without and with an effect.

    python -m eval.null                                       # the whole table, minutes on one core
    python -m eval.null parts=[paired] method=bca resamples=1999   # the bootstrap: ten times the time
    python -m eval.null parts=[paired] prompts=[50,500]       # other sizes
    python -m eval.null parts=[permutation] statistics=[fd]   # fd and fd_to_real: minutes, a decomposition a swap
    python -m eval.null unit=image                            # wrong on purpose: seeds as if they were independent

Simulated values have the structure of real ones: effects of prompt and noise, which a pair shares, and an effect of
each method on each prompt, common to its seeds (half of a delta's variance).  Without a difference, 5% of 2000
comparisons may be called different, 4 to 6% by chance; of 400 permutation tests 2.8 to 7.2%.  With a planted effect,
which varies between prompts, 95% of the intervals contain its mean, 93 to 97% by chance.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from eval.metrics.feature_sets import unit_rows
from eval.metrics.frechet import frechet_distance, moments
from eval.metrics.kernels import cubic_kernel, rbf_kernel
from eval.stats.paired import PairedDifference, holm, paired_difference
from eval.stats.permutation import PermutationResult, mmd_permutation_test, permutation_test
from eval.stats.tables import markdown
from guidance.utils.config import option, parse_config
from guidance.utils.errors import UserError, friendly_errors, nearest

#: Distributions of values: normal; deltas with a long right tail (the median moves, the mean does not); the same with
#: the arms of a random half of the prompts swapped, a symmetric heavy tail; right or wrong (0/1).
KINDS = ("normal", "skewed", "swapped", "agreement")
SCALES = 5  # in the family that Holm's method corrects, all against one baseline
#: Permutation tests of sets of features.
TESTS = ("kid", "kid_to_real", "cmmd", "fd", "fd_to_real")
#: Lowest and highest acceptable share, percent.
BARS = {"false positives": (4.0, 6.0), "family": (0.0, 6.0), "coverage": (93.0, 97.0), "permutation": (2.8, 7.2)}


@dataclasses.dataclass
class NullConfig:
    """Options of the simulation."""

    parts: list[str] = option(["paired", "holm", "permutation"], "what is tested")
    comparisons: int = option(2000, "simulated comparisons a cell; of the permutation test a fifth")
    kinds: list[str] = option(list(KINDS), "values of images: normal, skewed, swapped, agreement")
    prompts: list[int] = option([20, 100, 200], "prompts of a comparison")
    seeds: int = option(4, "images a prompt")
    unit: Literal["prompt", "image"] = option(
        "prompt", "prompt: seeds belong together; image: each by itself, which is wrong"
    )
    effect: float = option(0.2, "planted mean effect; prompts are 1 apart, agreement is a share")
    method: Literal["t", "bca"] = option("t", "interval of a paired difference, as in eval.stats.paired")
    resamples: int = option(9999, "of method=bca")
    statistics: list[str] = option(["kid", "kid_to_real", "cmmd"], "permutation: also fd, fd_to_real")
    sets: int = option(40, "permutation: prompts of a comparison")
    width: int = option(8, "permutation: features an image")
    permutations: int = option(199, "permutation: random swaps of a test")
    seed: int = option(0, "of the simulation")

    def __post_init__(self) -> None:
        known = {"parts": PARTS, "kinds": KINDS, "statistics": TESTS}
        for key, choices in known.items():
            if unknown := [value for value in getattr(self, key) if value not in choices]:
                raise UserError(f"Expected known {key}, got {unknown[0]!r}.{nearest(unknown[0], choices)}")
        if min(self.comparisons, self.seeds, self.resamples) < 1 or not 0 <= self.effect <= 0.25:
            raise UserError(
                "Expected comparisons, seeds and resamples from 1 and an effect in 0..0.25, got "
                f"{self.comparisons}, {self.seeds}, {self.resamples} and {self.effect}."
            )


def simulate_values(
    rng: np.random.Generator, kind: str, prompts: int, seeds: int, effect: float = 0.0, arms: int = 2
) -> Float[np.ndarray, "arms n"]:
    """Simulate values of a baseline (the first arm) and other methods, prompt by prompt.

    The expected value of every other method is higher by ``effect``; without one, arms are exchangeable ("skewed": only
    their means are equal).
    """
    shared = rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, seeds))
    whims, noise = rng.normal(size=(arms, prompts, 1)), rng.normal(size=(arms, prompts, seeds))
    if kind in ("skewed", "swapped"):
        whims = np.sqrt(2) * (rng.exponential(size=whims.shape) - 1)  # of the delta, of which it is all
        whims[0] = 0
    values = shared + whims + noise
    if kind == "swapped":
        swap = rng.random(prompts) < 0.5
        values[:, swap] = values[::-1, swap]
    strength = effect * rng.uniform(0, 2, size=(prompts, 1))
    if kind == "agreement":  # a share of the wrong images, which are half of all, is put right
        right = values > 0
        right[1:] |= rng.random(right[1:].shape) < 2 * strength
        values = right.astype(np.float64)
    else:
        values[1:] += strength
    return values.reshape(arms, prompts * seeds)


def compare(config: NullConfig, kind: str, prompts: int, effect: float) -> Iterator[PairedDifference]:
    """Yield the statistics of simulated comparisons of two methods."""
    rng = np.random.default_rng([config.seed, KINDS.index(kind), prompts, effect > 0])
    options: dict[str, Any] = {"method": config.method, "resamples": config.resamples}
    for i in _bar(config.comparisons, f"{kind}, {prompts} prompts, effect {effect:g}"):
        a, b = simulate_values(rng, kind, prompts, config.seeds, effect)
        yield paired_difference(a, b, _units(config, prompts), **options, seed=i)


def check_paired(config: NullConfig) -> list[dict[str, str]]:
    """Count false positives of the paired statistics, and intervals that contain a planted effect."""
    rows = []
    for kind, prompts in itertools.product(config.kinds, config.prompts):
        found, planted = (list(compare(config, kind, prompts, effect)) for effect in (0.0, config.effect))
        wrong = [not r.interval[0] <= 0 <= r.interval[1] for r in found]
        medians = {
            "Wilcoxon": [r.wilcoxon_p < 0.05 for r in found],
            "wins without 1/2": [not r.share_interval[0] <= 0.5 <= r.share_interval[1] for r in found],
        }
        row = {"values": kind, "prompts": str(prompts), "interval without 0": _share(wrong, "false positives")}
        for column, hits in medians.items():
            row[column] = "-" if kind == "skewed" else _share(hits, "false positives")
        inside = [r.interval[0] <= config.effect <= r.interval[1] for r in planted]
        rows.append(row | {"effect in the interval": _share(inside, "coverage")})
    return rows


def check_holm(config: NullConfig) -> list[dict[str, str]]:
    """Count sweeps without an effect in which some scale is significant after Holm's correction."""
    rows, prompts = [], max(config.prompts)
    for kind in [kind for kind in config.kinds if kind in ("normal", "agreement")]:  # all arms can be swapped
        rng = np.random.default_rng([config.seed, KINDS.index(kind), prompts])
        adjusted, raw = [], []
        for _ in _bar(config.comparisons, f"{kind}, Holm"):
            a, *others = simulate_values(rng, kind, prompts, config.seeds, arms=1 + SCALES)
            p = [paired_difference(a, b, _units(config, prompts)).wilcoxon_p for b in others]
            adjusted.append(bool((holm(p) < 0.05).any()))
            raw.append(min(p) < 0.05)
        row = {"values": kind, "prompts": str(prompts)}
        row[f"any of {SCALES} scales, Holm"] = _share(adjusted, "family")
        rows.append(row | {"uncorrected": f"{100 * np.mean(raw):.1f}%"})
    return rows


def check_permutation(config: NullConfig) -> list[dict[str, str]]:
    """Count false positives of the permutation tests."""
    rows = []
    for name in config.statistics:
        p = permutation_p_values(config, name, -(-config.comparisons // 5))
        share = _share(list(p <= 0.05), "permutation")
        rows.append({"set metric": name, "prompts": str(config.sets), "p <= 5%": share})
    return rows


PARTS = {"paired": check_paired, "holm": check_holm, "permutation": check_permutation}


def simulate_features(
    rng: np.random.Generator, prompts: int, seeds: int, width: int
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n d"]]:
    """Simulate features of two methods without a difference, ``(prompts * seeds, width)``, prompt by prompt."""
    prompt = rng.normal(size=(prompts, 1, width))
    noise = rng.normal(size=(prompts, seeds, width))
    whims = rng.normal(size=(2, prompts, 1, width))
    values = prompt + noise + whims + rng.normal(size=(2, prompts, seeds, width))
    a, b = values.reshape(2, prompts * seeds, width)
    return a, b


def permutation_p_values(config: NullConfig, statistic: str, comparisons: int) -> Float[np.ndarray, " comparisons"]:
    """Return the p-values of simulated comparisons of two methods without a difference."""
    rng, units = np.random.default_rng(config.seed), _units(config, config.sets)
    p = np.empty(comparisons)
    for i in _bar(comparisons, statistic):
        a, b = simulate_features(rng, config.sets, config.seeds, config.width)
        real = simulate_features(rng, config.sets, config.seeds, config.width)[0]
        p[i] = _test(statistic, a, b, real, units, permutations=config.permutations, seed=i).p
    return p


def _test(
    statistic: str, a: np.ndarray, b: np.ndarray, real: np.ndarray, prompts: Sequence[int], **options: Any
) -> PermutationResult:
    """Test one of `TESTS`: a distance of two methods, or the difference of their distances to real features."""
    to_real = statistic.endswith("_to_real")
    if statistic == "cmmd":
        return mmd_permutation_test(unit_rows(a), unit_rows(b), prompts, rbf_kernel, **options)
    if statistic.startswith("kid"):
        reference = real if to_real else None
        return mmd_permutation_test(a, b, prompts, cubic_kernel, reference=reference, **options)
    rows = np.concatenate([a, b])

    def distance(i: np.ndarray, j: np.ndarray) -> float:
        x, y = moments(rows[i]), moments(rows[j])
        if to_real:
            return frechet_distance(*moments(real), *x) - frechet_distance(*moments(real), *y)
        return frechet_distance(*x, *y)

    return permutation_test(prompts, distance, two_sided=to_real, **options)


def _units(config: NullConfig, prompts: int) -> list[int]:
    if config.unit == "image":
        return list(range(prompts * config.seeds))
    return np.repeat(np.arange(prompts), config.seeds).tolist()


def _share(hits: Sequence[bool], bar: str) -> str:
    """Format a share in percent, with a mark if it is outside the bar."""
    low, high = BARS[bar]
    percent = 100 * sum(hits) / len(hits)
    return f"{percent:.1f}%" + ("" if low <= percent <= high else " !")


def _bar(number: int, name: str) -> Iterable[int]:
    return tqdm(range(number), desc=name, leave=False, disable=None)  # shown on terminals


@friendly_errors("eval.null")
def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this script."""
    config = parse_config(NullConfig, argv, prog="python -m eval.null", description=__doc__ or "")
    for part in config.parts:
        if rows := PARTS[part](config):
            print(f"\n{markdown(rows)}", flush=True)
    bars = "; ".join(f"{name} {low:g} to {high:g}%" for name, (low, high) in BARS.items())
    print(f"\nWith ! out of the bar: {bars}.\n-: asks for the median, which moved.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
