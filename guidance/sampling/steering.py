"""Steering without gradients: the particles of a prompt are weighted by a guide's score, and the better ones copied.

Every forward pass yields a score, so ``n`` particles cost as much as ``n`` samples.  Feynman-Kac steering multiplies
potentials ``G_t`` along each path whose product at the end is ``exp(lam r)``, whatever they are on the way; the
weighted particles then represent ``p(x) exp(lam r(x))``.  With ``r`` the scores so far, oldest first::

    diff:  G_t = exp(lam (r_t - r_prev)),  r_prev = 0 at first
    max:   G_t = exp(lam max(r_1 .. r_t))
    sum:   G_t = exp(lam (r_1 + .. + r_t))
    last:  G   = exp(lam r_last) / (product of all earlier G of this path)

The scores belong to the latents from which a step *starts*, so paths are weighted one step late: copies share the noise
of one step, and ``r`` is the score of the last latents that the denoiser sees within the guide's range of steps.

Reference: R. Singhal et al., "A General Framework for Inference-time Scaling and Steering of Diffusion Models", 2025.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from guidance.apply.observers import StepScorer
from guidance.apply.values import StepRecord
from guidance.guides.base import Guide, ScoringGuide
from guidance.models.types import Pipeline
from guidance.sampling.loop import Callback, check_resampling, sample_latents, takes_eta, using_scheduler
from guidance.sampling.start import Start
from guidance.utils.errors import UserError

POTENTIALS = ("diff", "max", "sum")

SELECT = ("best", "draw", "all")


def effective_sample_size(log_weights: Float[Tensor, "*g n"]) -> Float[Tensor, "*g"]:
    """Compute ``(sum w)^2 / sum w^2``: n for equal weights, 1 if a single particle has all the weight.

    >>> effective_sample_size(torch.zeros(4)).item()
    4.0
    """
    return (2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)).exp()


def systematic(weights: Float[Tensor, "g n"], u: Float[Tensor, " g"]) -> Int[Tensor, "g n"]:
    """Resample systematically: particle i is copied ``n w_i`` times, rounded up or down without bias.

    Args:
        weights: Normalised weights.
        u: One uniform number in [0, 1) per group.

    Returns:
        Ancestor of each new particle, ascending.
    """
    n = weights.shape[-1]
    points = (u[:, None] + torch.arange(n)) / n
    edges = weights.cumsum(-1)
    return torch.searchsorted(edges / edges[:, -1:], points, right=True).clamp(max=n - 1)


def particle_seeds(seed: int, particles: int) -> list[int]:
    """Return the seeds of a sample's particles: the sample's own, and others derived from it."""
    return [int(seed), *(_derived_seed(seed, 1, k) for k in range(1, particles))]


def _derived_seed(seed: int, *salt: int) -> int:
    """Derive a number in 0 .. 2^63 - 1 from a seed and its purpose."""
    return int(np.random.SeedSequence([int(seed) % 2**64, *salt]).generate_state(1, np.uint64)[0] >> 1)


class Population:
    """Weights of particles in groups, on the CPU in float64: Feynman-Kac steering without a network.

    Args:
        seeds: One seed per group, for its resampling.
        particles: Particles per group.
        lam: Inverse temperature per unit of the score; negative steers away.
        potential: "diff", "max" or "sum", see the module's documentation.
        threshold: Resample a group when its effective sample size is below this fraction of its particles.
    """

    def __init__(
        self, seeds: Sequence[int], particles: int, lam: float, potential: str = "diff", threshold: float = 0.5
    ) -> None:
        self.seeds, self.lam, self.potential, self.threshold = list(seeds), lam, potential, threshold
        self.log_weights = torch.zeros(len(seeds), particles, dtype=torch.float64)
        self._spent = torch.zeros_like(self.log_weights)  # log of the product of a path's potentials so far
        self._running = torch.full_like(self._spent, -torch.inf if potential == "max" else 0.0)

    def weigh(self, scores: Float[Tensor, "g n"], *, last: bool = False) -> None:
        """Multiply by the potential of new scores; a score that is not finite gets no weight.

        Args:
            scores: Score of each particle, larger is better.
            last: Whether these are the target scores: the product of the path becomes ``exp(lam score)``.
        """
        r, finite = scores.double(), scores.isfinite()
        running = torch.maximum(self._running, r) if self.potential == "max" else self._running + r
        exact = last or self.potential == "diff"  # the product of "diff" is exact at every step
        log_g = self.lam * r - self._spent if exact else self.lam * running
        self._running = torch.where(finite, running, self._running)
        self._spent = self._spent + torch.where(finite, log_g, 0.0)
        self.log_weights = self.log_weights + torch.where(finite, log_g, -torch.inf)
        degenerate = self.log_weights.isneginf().all(1, keepdim=True)
        self.log_weights = torch.where(degenerate, 0.0, self.log_weights)

    @property
    def weights(self) -> Float[Tensor, "g n"]:
        """Normalised weights since the group's last resampling."""
        return self.log_weights.softmax(-1)

    def resample(self, step: int) -> Int[Tensor, "g n"]:
        """Copy the better particles of each group whose weights have become uneven.

        Returns:
            Ancestor of each particle within its group; the particle itself in groups that are not resampled.
        """
        groups, n = self.log_weights.shape
        uneven = (effective_sample_size(self.log_weights) < self.threshold * n - 1e-9)[:, None]
        u = torch.tensor([_derived_seed(s, 2, step) / 2**63 for s in self.seeds], dtype=torch.float64)
        unchanged = torch.arange(n).expand(groups, n)
        ancestors = torch.where(uneven, systematic(self.weights, u.clamp(max=1 - 1e-12)), unchanged)
        self.log_weights = torch.where(uneven, 0.0, self.log_weights)
        self._spent, self._running = (v.gather(1, ancestors) for v in (self._spent, self._running))
        return ancestors


@dataclasses.dataclass
class SteeringResult:
    """Latents, scores and ancestry of a steered run: g (prompt, seed) groups of n particles, s steps.

    Attributes:
        latents: (g, c, y, x); with ``select="all"`` (g n, c, y, x), group by group.
        chosen: The particle of each group in ``latents``, (g,); None with ``select="all"``.
        scores: Each final particle's score at the last step of the guide's range, (g, n).
        weights: Normalised weights of the final particles, (g, n).
        score_history: Scores at each step, before its resampling, (s, g, n).
        ess: Effective sample size at each step, before its resampling, (s, g).
        ancestors: The particle that each one continues after a step, (s, g, n); itself without resampling.
    """

    latents: Float[Tensor, "m c y x"]
    chosen: Int[Tensor, " g"] | None
    scores: Float[Tensor, "g n"]
    weights: Float[Tensor, "g n"]
    score_history: Float[Tensor, "s g n"]
    ess: Float[Tensor, "s g"]
    ancestors: Int[Tensor, "s g n"]

    def lineage(self) -> Int[Tensor, "s_plus_1 g n"]:
        """Return in row i the place of each final particle's path during step i; the last row is 0 .. n - 1."""
        places = [torch.arange(self.ancestors.shape[2]).expand(self.ancestors.shape[1:])]
        for ancestors in self.ancestors.flip(0):
            places.append(ancestors.gather(1, places[-1]))
        return torch.stack(places[::-1])


def steer_latents(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guide: ScoringGuide,
    *,
    particles: int = 4,
    potential: str = "diff",
    lam: float = 1.0,
    resample_every: int = 1,
    threshold: float = 0.5,
    eta: float | None = None,
    select: str = "best",
    scheduler: str | None = None,
    start: Start | None = None,
    guide_prompts: Sequence[str] | None = None,
    callback: Callback | None = None,
    **options: Any,
) -> SteeringResult:
    """Sample with Feynman-Kac steering towards a guide's score; no gradient is taken.

    Args:
        pipe, prompts, seeds, scheduler, start, guide_prompts: See :func:`guidance.sampling.loop.sample_latents`.
        guide: Scores the particles, in its own range of steps; its scale is not used.
        particles: Particles per prompt, in one batch; the first has the sample's own seed.
        potential: "diff", "max" or "sum"; the last two steer harder on the way, at the cost of uneven final weights.
        lam: Inverse temperature per unit of the score; 0 does not steer, negative steers away.
        resample_every: Weigh (and perhaps resample) every so many steps, and always at the guide's last.
        threshold: Resample a group when its effective sample size is below this fraction; 1 nearly always does.
        eta: DDIM's noise; None is 1 for schedulers that take it; other schedulers must draw noise themselves.
        select: "best" (highest final score), "draw" (one by weight: a draw from the target), "all".
        callback: As in :func:`~guidance.sampling.loop.sample_latents`, for all particles, after resampling.
        **options: Others of :func:`~guidance.sampling.loop.sample_latents`; ``guides=`` also guides the particles by
            gradients.

    Raises:
        UserError: If the sampler is deterministic or remembers earlier steps, or an argument is out of range.
    """
    _check(particles, potential, lam, resample_every, threshold, select)
    if not 0 < len(prompts) == len(seeds):
        raise UserError(f"Expected one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds.")
    with using_scheduler(pipe, scheduler):
        eta = float(takes_eta(pipe.scheduler)) if eta is None else eta
        if particles > 1 and threshold > 0:
            check_copies(pipe, options.get("guides", ()), eta)
        guide.prepare(pipe)
    index = torch.arange(len(seeds)).repeat_interleave(particles)
    guide_prompts = [(guide_prompts or prompts)[i] for i in index]
    scorer = StepScorer(guide, guide_prompts)
    watch = _Steering(scorer, Population(seeds, particles, lam, potential, threshold), resample_every, callback)
    options |= {"start": None if start is None else start.at(index), "scheduler": scheduler, "eta": eta}
    options |= {"guide_prompts": guide_prompts, "observe": [*options.get("observe", ()), scorer]}
    copies = [s for seed in seeds for s in particle_seeds(seed, particles)]
    x = sample_latents(pipe, [prompts[i] for i in index], copies, callback=watch, **options)
    return watch.result(x, select)


def best_of_n(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guide: ScoringGuide,
    *,
    eta: float = 0.0,
    **options: Any,
) -> SteeringResult:
    """Sample ``particles`` times per prompt and keep the best score; any scheduler will do.

    This is :func:`steer_latents`, whose other arguments it takes, without resampling.
    """
    return steer_latents(pipe, prompts, seeds, guide, eta=eta, threshold=0.0, lam=0.0, **options)


class _Steering:
    """Sampler callback that weighs the particles after each step and continues with the copies."""

    def __init__(self, scorer: StepScorer, population: Population, every: int, callback: Any) -> None:
        self.scorer, self.population, self.every, self.callback = scorer, population, every, callback
        self.scores = torch.full(population.log_weights.shape, torch.nan)
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, step: int, x: Tensor, record: StepRecord | None) -> Tensor:
        scores, index, used, total = self.scorer.scores, self.scorer.step, self.scorer.used, self.scorer.total
        assert scores is not None
        groups, n = self.scores.shape
        scores, ancestors = scores.reshape(groups, n), torch.arange(n).expand(groups, n)
        self.scores = scores if index in used else self.scores
        weighed = index in used and ((index + 1) % self.every == 0 or index == used[-1])
        if weighed:
            self.population.weigh(scores, last=index == used[-1])
        self.rows.append((scores, effective_sample_size(self.population.log_weights), ancestors))
        if weighed and index < total - 1:  # copies of finished latents would stay identical
            ancestors = self.population.resample(index)
            self.scores = self.scores.gather(1, ancestors)
            self.rows[-1] = (*self.rows[-1][:2], ancestors)
            x = x[(torch.arange(groups)[:, None] * n + ancestors).flatten().to(x.device)]
        other = None if self.callback is None else self.callback(step, x, record)
        return x if other is None else other

    def result(self, x: Tensor, select: str) -> SteeringResult:
        """Return the selected latents and the history of the run."""
        history, ess, ancestors = map(torch.stack, zip(*self.rows, strict=True))
        weights, n, chosen = self.population.weights, self.scores.shape[1], None
        if select == "best":
            chosen = torch.where(self.scores.isfinite(), self.scores, -torch.inf).argmax(1)
        elif select == "draw":
            u = torch.tensor([_derived_seed(s, 3) / 2**63 for s in self.population.seeds], dtype=torch.float64)
            chosen = torch.searchsorted(weights.cumsum(1), u[:, None], right=True)[:, 0].clamp(max=n - 1)
        latents = x if chosen is None else x[(torch.arange(len(chosen)) * n + chosen).to(x.device)]
        return SteeringResult(latents, chosen, self.scores, weights, history, ess, ancestors)


def check_copies(pipe: Pipeline, guides: Sequence[Guide], eta: float) -> None:
    """Refuse a sampler that is deterministic, or that remembers earlier steps as guides with ``every`` do."""
    check_resampling(pipe, eta)
    if rare := [g.name for g in guides if g.every > 1]:
        raise UserError(f"Expected guides with every=1, got more for {rare[0]}; every copy needs its own gradient.")


def _check(particles: int, potential: str, lam: float, every: int, threshold: float, select: str) -> None:
    for name, value, valid, wanted in (
        ("particles", particles, particles >= 1, "at least 1"),
        ("potential", potential, potential in POTENTIALS, f"one of {', '.join(POTENTIALS)}"),
        ("lam", lam, math.isfinite(lam), "finite; 0 does not steer"),
        ("resample_every", every, every >= 1, "at least 1"),
        ("threshold", threshold, 0 <= threshold <= 1, "in 0..1; 0 never resamples"),
        ("select", select, select in SELECT, f"one of {', '.join(SELECT)}"),
    ):
        if not valid:
            raise UserError(f"Expected {name} to be {wanted}, got {value!r}.")
