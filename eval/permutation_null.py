"""False positives of the permutation test: how many comparisons of equal methods it calls different at 5%.

    python -m eval.permutation_null                             # 400 comparisons, kernel distance between the sets
    python -m eval.permutation_null statistic=kid_to_real       # also: cmmd, fd, fd_to_real
    python -m eval.permutation_null swap=image                  # wrong on purpose: every image swapped by itself

Simulated features have what real ones have: an effect of the prompt, noise shared by the pair, and a whim of each
method on each prompt, in which the seeds of a prompt agree.  Right is 5%; of 400 comparisons 2.8 to 7.2%.
Half a minute on one core for kernels, some minutes for fd, which decomposes covariances for every swap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from eval.feature_sets import unit_rows
from eval.frechet import frechet_distance, moments
from eval.kernels import cubic_kernel, rbf_kernel
from eval.paired import wilson
from eval.permutation import PermutationResult, mmd_permutation_test, permutation_test
from guidance.config import friendly_errors, option, parse_config
from guidance.errors import UserError, nearest


@dataclasses.dataclass
class NullConfig:
    """What is simulated."""

    comparisons: int = option(400, "simulated comparisons without a difference")
    statistic: str = option("kid", "kid, kid_to_real, cmmd, fd or fd_to_real")
    prompts: int = option(40, "prompts of a comparison")
    seeds: int = option(4, "images a prompt")
    width: int = option(8, "features an image")
    swap: str = option("prompt", "prompt: all seeds together; image: each by itself, which is wrong")
    permutations: int = option(199, "random swaps of a test")
    seed: int = option(0, "of the simulation")


def _frechet(x: np.ndarray, y: np.ndarray) -> float:
    return frechet_distance(*moments(x), *moments(y))


Test = Callable[..., PermutationResult]  # a, b, real features, prompts and the options of the test
TESTS: dict[str, Test] = {
    "kid": lambda a, b, real, prompts, **o: mmd_permutation_test(a, b, prompts, cubic_kernel, **o),
    "kid_to_real": lambda a, b, real, prompts, **o: mmd_permutation_test(
        a, b, prompts, cubic_kernel, reference=real, **o
    ),
    "cmmd": lambda a, b, real, prompts, **o: mmd_permutation_test(
        unit_rows(a), unit_rows(b), prompts, rbf_kernel, **o
    ),
    "fd": lambda a, b, real, prompts, **o: permutation_test(a, b, prompts, _frechet, **o),
    "fd_to_real": lambda a, b, real, prompts, **o: permutation_test(
        a, b, prompts, lambda x, y: _frechet(real, x) - _frechet(real, y), two_sided=True, **o
    ),
}


def simulate(
    rng: np.random.Generator, prompts: int, seeds: int, width: int
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n d"]]:
    """Return the features of two methods that do not differ, ``(prompts * seeds, width)``, prompt by prompt."""
    prompt = rng.normal(size=(prompts, 1, width))
    noise = rng.normal(size=(prompts, seeds, width))
    whims = rng.normal(size=(2, prompts, 1, width))
    own = rng.normal(size=(2, prompts, seeds, width))
    a, b = (prompt + noise + whims + own).reshape(2, prompts * seeds, width)
    return a, b


def null_p_values(config: NullConfig) -> Float[np.ndarray, " comparisons"]:
    """Return the p-value of each comparison.

    Raises:
        UserError: If the statistic or the unit of swaps is unknown, or the test refuses the sizes.
    """
    for key, choices in (("statistic", list(TESTS)), ("swap", ["prompt", "image"])):
        value = getattr(config, key)
        if value not in choices:
            raise UserError(f"Expected a known {key}, got {value!r}.{nearest(value, choices)}")
    rng = np.random.default_rng(config.seed)
    n = config.prompts * config.seeds
    unit = np.repeat(np.arange(config.prompts), config.seeds) if config.swap == "prompt" else np.arange(n)
    p = np.empty(config.comparisons)
    for i in range(config.comparisons):
        a, b = simulate(rng, config.prompts, config.seeds, config.width)
        real = simulate(rng, config.prompts, config.seeds, config.width)[0]
        options = {"permutations": config.permutations, "seed": i}
        p[i] = TESTS[config.statistic](a, b, real, unit, **options).p
    return p


@friendly_errors("eval.permutation_null")
def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this script."""
    config = parse_config(NullConfig, argv, prog="eval.permutation_null", description=__doc__ or "")
    p = null_p_values(config)
    k, n = int((p <= 0.05).sum()), len(p)
    low, high = wilson(k, n)
    print(f"{config.statistic}, swapped by {config.swap}: {k} of {n} comparisons without a difference")
    print(f"called different at 5%: {100 * k / n:.1f}% [{100 * low:.1f}, {100 * high:.1f}]")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
