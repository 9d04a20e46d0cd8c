"""Steering against best-of-N at equal network calls, alone and with gradients."""

from __future__ import annotations

import dataclasses

from eval.studies.common import Bench, StudyConfig, agreement, truth_change
from guidance.arms import Arm, Steering, midblock_arms
from guidance.guides import MidBlockGuide
from guidance.options import option


@dataclasses.dataclass
class Config(StudyConfig):
    """What is measured."""

    head: str = option("runs/heads/testbed-aesthetic", "rating head")
    particles: int = option(4, "particles an image")
    lams: list[float] = option([2.0], "inverse temperatures of Feynman-Kac steering, per rating point")
    scale: float = option(2.4, "guidance scale of the arms with gradients")
    cfg_scale: float = option(4.0, "weight of classifier-free guidance")


def run(bench: Bench, config: Config) -> list[dict[str, str]]:
    """Select among particles by a rating head, by gradients, and by both.

    Returns:
        One row per arm; truth against plain sampling and against best-of-N.
    """
    head, particles = config.head, config.particles
    network = bench.head(head)
    potential = MidBlockGuide(network)
    best = Steering(potential, particles, lam=0.0, threshold=0.0)
    arms = [
        Arm("unguided"),
        Arm(f"best of {particles}", head=head, steering=best),
        Arm(f"best of {particles}, eta 0", head=head, steering=dataclasses.replace(best, eta=0.0)),
    ]
    steered = [Steering(potential, particles, lam=lam) for lam in config.lams]
    arms += [Arm(f"steered, lam {s.lam:g}", head=head, steering=s) for s in steered]
    gradients = dataclasses.replace(
        midblock_arms(network, [config.scale], head_path=head)[1], name="gradients"
    )
    arms += [gradients, dataclasses.replace(gradients, name=f"gradients, best of {particles}", steering=best)]
    arms += [
        dataclasses.replace(gradients, name=f"gradients, steered, lam {s.lam:g}", steering=s) for s in steered
    ]
    sampled = bench.sample(f"steering-{particles}", bench.captions(), arms, cfg_scale=config.cfg_scale)
    plain, best_of = sampled["unguided"], sampled[f"best of {particles}"]
    return [
        {
            "arm": arm.name,
            "truth, sd against unguided [95%]": truth_change(plain, sampled[arm.name]),
            f"against best of {particles}": truth_change(best_of, sampled[arm.name]),
            "object / colour / time agree": agreement(bench, sampled[arm.name]),
            "denoiser calls an image": f"{particles if arm.steering else 1}x",
            "time": f"{sampled[arm.name].seconds / plain.seconds:.2f}x",
        }
        for arm in arms
    ]
