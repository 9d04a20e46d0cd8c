"""Objectives: what a guide climbs, as a function of a head's outputs.

Each maps outputs (b, outputs) to one log-probability or reward per sample, (b,); larger is better.  Which of them suit
a head, its task says (:attr:`guidance.heads.tasks.Task.objectives`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from guidance.heads.config import HeadConfig
from guidance.heads.tasks import TASKS
from guidance.utils.errors import UserError, nearest

Target = str | int | float | None

Objective = Callable[[Float[Tensor, "b outputs"]], Float[Tensor, " b"]]

#: Bound of the discriminator's probability, without which its log-odds explode (Kim et al. 2023, see `binary`).
CLIP_PROBABILITY = 1e-5


def expected_value(config: HeadConfig, target: Target) -> Objective:
    """Mean label, ``E[rating] = sum_k k p_k``, in units of the labels."""
    _refuse_target("expected", target)
    values = _numeric_labels(config, "expected")

    def objective(outputs: Float[Tensor, "b outputs"]) -> Float[Tensor, " b"]:
        return outputs.softmax(dim=1) @ outputs.new_tensor(values)

    return objective


def at_least(config: HeadConfig, target: Target) -> Objective:
    """Log-probability of a label of at least ``target``: ``log sum_{k >= target} p_k``."""
    values = _numeric_labels(config, "at_least")
    try:
        threshold = float(target)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        threshold = math.nan
    if not min(values) < threshold <= max(values):
        raise UserError(
            f"Expected a target above {min(values):g} and up to {max(values):g} for the objective "
            f"'at_least', got {target!r}; for example target={max(values):g}."
        )
    reached = [value >= threshold for value in values]

    def objective(outputs: Float[Tensor, "b outputs"]) -> Float[Tensor, " b"]:
        mask = torch.tensor(reached, device=outputs.device)
        return outputs[:, mask].logsumexp(dim=1) - outputs.logsumexp(dim=1)

    return objective


def label_probability(config: HeadConfig, target: Target) -> Objective:
    """Log-probability of one label, ``log p(target)``."""
    index = label_index(config, target)
    return lambda outputs: outputs.log_softmax(dim=1)[:, index]


def regression(config: HeadConfig, target: Target) -> Objective:
    """Predicted number; ``target`` chooses among several outputs."""
    index = 0 if target is None and config.outputs == 1 else label_index(config, target)
    return lambda outputs: outputs[:, index]


def binary(config: HeadConfig, target: Target) -> Objective:
    """Log-odds ``log d / (1 - d)`` of ``d = sigmoid(output)``, with d clipped to 1e-5 .. 1 - 1e-5.

    Reference:
        Kim et al., "Refining Generative Process with Discriminator Guidance in Score-based Diffusion
        Models", ICML 2023.
    """
    _refuse_target("binary", target)
    # clipping d is clipping its log-odds, which are the output
    bound = math.log((1 - CLIP_PROBABILITY) / CLIP_PROBABILITY)
    return lambda outputs: outputs[:, 0].clamp(-bound, bound)


OBJECTIVES: dict[str, Callable[[HeadConfig, Target], Objective]] = {
    "expected": expected_value,
    "at_least": at_least,
    "class": label_probability,
    "regression": regression,
    "binary": binary,
}


def build_objective(config: HeadConfig, name: str | None = None, target: Target = None) -> Objective:
    """Build the objective of a head.

    Args:
        config: The head's config.
        name: A key of :data:`OBJECTIVES`; None takes the first that suits the head's task: the expected
            rating, the class (``target`` is then required), the number, or the log-odds.
        target: Label (by name or index) or threshold, where the objective needs one.

    Returns:
        ``f(outputs (b, outputs)) -> (b,)``, differentiable.

    Raises:
        UserError: If the objective is unknown, does not suit the head, or its target is missing or unknown.

    >>> objective = build_objective(HeadConfig("conv", in_channels=8))
    >>> objective(torch.zeros(1, 10))  # all ten ratings equally likely
    tensor([5.5000])
    """
    suitable = TASKS[config.task].objectives
    if name is None:
        if not suitable:
            raise UserError(
                f"Expected an objective for a head of task '{config.task}', got none; an embedding has a score "
                "only beside a target: use guidance.guides.embedding.EmbeddingGuide."
            )
        name = suitable[0]
    if name not in OBJECTIVES:
        raise UserError(f"Expected a known objective, got '{name}'.{nearest(name, OBJECTIVES)}")
    if name not in suitable:
        tasks = " or ".join(task for task in TASKS if name in TASKS[task].objectives)
        raise UserError(
            f"Expected a head of task {tasks} for the objective '{name}', got '{config.task}'; leave the objective "
            "out to take the head's default."
        )
    return OBJECTIVES[name](config, target)


def label_index(config: HeadConfig, target: Target) -> int:
    """Return the index of the output that ``target`` names: a label, or an index if labels are not numbers."""
    name = f"{target:g}" if isinstance(target, float) else str(target)
    if name in config.labels:
        return config.labels.index(name)
    numeric = all(_is_number(label) for label in config.labels) and bool(config.labels)
    is_index = isinstance(target, int) and not isinstance(target, bool) and 0 <= target < config.outputs
    if is_index and not numeric:
        return int(name)
    raise UserError(
        f"Expected a target among the labels of the head for '{config.target}', got {target!r}."
        f"{nearest(name, config.labels)}"
    )


def _numeric_labels(config: HeadConfig, objective: str) -> list[float]:
    if not config.labels or not all(_is_number(label) for label in config.labels):
        raise UserError(
            f"Expected numeric labels for the objective '{objective}', got "
            f"{', '.join(config.labels) or 'none'}; use objective='class' with a target."
        )
    return [float(label) for label in config.labels]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _refuse_target(objective: str, target: Target) -> None:
    if target is not None:
        raise UserError(f"Expected no target for the objective '{objective}', got {target!r}; leave it out.")
