"""Tasks: what a head predicts.  One class each holds targets, loss, measures and the objectives guides may climb.

A new task is a subclass of :class:`Task` under ``@register_task``; ``task=NAME`` then trains, measures and guides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from guidance.heads.measures import (
    Statistic,
    auc_and_skill,
    macro_auc,
    mean_auc,
    mean_of,
    rank_correlation,
    rank_measures,
    skill_above_chance,
)
from guidance.utils.errors import UserError, nearest

if TYPE_CHECKING:
    from guidance.heads.config import HeadConfig

Outputs = Float[Tensor, "n outputs"]
Columns = Mapping[str, Float[Tensor, " n"]]
Scalar = Float[Tensor, ""]


@runtime_checkable
class LossWeights(Protocol):
    """The options of :class:`guidance.training.recipes.HeadRecipe` that losses read."""

    batch_size: int
    label_smoothing: float
    expected_weight: float
    contrastive_weight: float


class Task:
    """Targets, loss, measures and objectives of one kind of prediction.

    Attributes:
        name: Value of the option ``task``.
        objectives: Keys of :data:`guidance.heads.objectives.OBJECTIVES` that suit the outputs, the default first.
        headlines: Measures that the head's config and card report, in this order.
        labelled: Each output has a label.
        standardized: The network predicts standardised targets; the head returns target units.
        rated: Targets are ratings in 1..10.
        ranked: The score is a number that further columns can be ranked against (the option ``compare``).
        clip_target: Targets are CLIP embeddings of the images: a target ``clip:NAME``.
        generated: Rows of generated images stand beside the real ones, and the target tells them apart.
    """

    name: ClassVar[str]
    objectives: ClassVar[tuple[str, ...]] = ()
    headlines: ClassVar[tuple[str, ...]] = ("skill",)
    labelled: ClassVar[bool] = False
    standardized: ClassVar[bool] = False
    rated: ClassVar[bool] = False
    ranked: ClassVar[bool] = False
    clip_target: ClassVar[bool] = False
    generated: ClassVar[bool] = False

    def labels(self, values: NDArray[Any], column: str) -> list[str]:
        """Name the outputs, given the training column; [] for a head without labels."""
        return []

    def encode(self, values: NDArray[Any], labels: list[str], column: str = "target") -> Tensor:
        """Turn a target column of n values into what :meth:`loss` takes, n rows.

        Args:
            values: The column.
            labels: Result of :meth:`labels`.
            column: Name of the column, for messages.

        Raises:
            UserError: If a value is missing, out of range, or of an unknown class.
        """
        raise NotImplementedError

    def num_outputs(self, labels: list[str], target: Tensor) -> int:
        """Number of outputs of the network for encoded training targets."""
        return len(labels) or 1

    def scale(self, target: Tensor) -> float:
        """Standard deviation of the training targets, by which :meth:`loss` divides errors; 1 where it has none."""
        return 1.0

    def loss(self, outputs: Outputs, target: Tensor, weights: LossWeights, scale: float = 1.0) -> Scalar:
        """Training loss, the mean over rows."""
        raise NotImplementedError

    def logits(self, outputs: Outputs) -> Float[Tensor, "n classes"] | None:
        """Class logits, to be calibrated by temperatures; None if the outputs are no classes."""
        return None

    def class_index(self, target: Tensor) -> Int[Tensor, " n"]:
        """The class that counts as right, of encoded targets; for tasks with :meth:`logits`."""
        return target

    def by_row(self, outputs: Outputs, target: Tensor) -> tuple[Tensor, Tensor]:
        """Prepare all rows to be measured in any subset; returns the first arguments of :meth:`measure`."""
        logits = self.logits(outputs)
        return outputs if logits is None else logits, target

    def measure(self, outputs: Tensor, target: Tensor, compare: Columns) -> dict[str, float]:
        """Measure rows of :meth:`by_row`; ``compare`` are columns to rank the score against.

        The measure ``skill`` is required: the lower end of a 95% interval, scaled so that chance is 0.
        """
        raise NotImplementedError

    def statistics(self, outputs: Tensor, target: Tensor) -> dict[str, Statistic]:
        """Those of the measures that get an interval over images, as functions of sums over rows."""
        return {}

    def guide(self, config: HeadConfig, name: str) -> str:
        """Python code of a guide with the head that ``name`` loads, for the model card."""
        return f'MidBlockGuide(load_head("{name}"))'


TASKS: dict[str, Task] = {}


def register_task(cls: type[Task]) -> type[Task]:
    """Enter a task in :data:`TASKS` under its name."""
    TASKS[cls.name] = cls()
    return cls


def get_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        UserError: If there is none.
    """
    if name not in TASKS:
        raise UserError(f"Expected a known head task, got '{name}'.{nearest(name, TASKS)}")
    return TASKS[name]


class _Categorical(Task):
    """Base of the tasks whose outputs are classes: cross entropy, calibration, accuracy."""

    def logits(self, outputs: Outputs) -> Float[Tensor, "n classes"]:
        """The outputs themselves."""
        return outputs

    def loss(self, outputs: Outputs, target: Tensor, weights: LossWeights, scale: float = 1.0) -> Scalar:
        """Cross entropy."""
        return F.cross_entropy(self.logits(outputs), target, label_smoothing=weights.label_smoothing)

    def measure(self, outputs: Tensor, target: Tensor, compare: Columns) -> dict[str, float]:
        """Accuracy, chance (the share of the most frequent class), calibration error and likelihood."""
        from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

        index, classes = self.class_index(target), outputs.shape[1]
        return {
            "accuracy": float(MulticlassAccuracy(classes, average="micro")(outputs, index)),
            "chance": float(index.bincount(minlength=classes).max()) / len(outputs),
            "ece": float(MulticlassCalibrationError(classes, n_bins=15)(outputs.softmax(1), index)),
            "nll": float(F.cross_entropy(outputs, target)),
        }

    def statistics(self, outputs: Tensor, target: Tensor) -> dict[str, Statistic]:
        """Of accuracy and likelihood."""
        right = outputs.argmax(1) == self.class_index(target)
        nll = F.cross_entropy(outputs, target, reduction="none")
        return {"accuracy": mean_of(right, is_share=True), "nll": mean_of(nll)}


@register_task
class Rating(_Categorical):
    """Ten classes, the ratings 1..10; targets are probabilities, the score is the expected rating."""

    name = "rating"
    objectives = ("expected", "at_least", "class")
    headlines = ("accuracy", "chance", "ece", "spearman", "spearman_truth", "skill")
    labelled = rated = ranked = True

    def labels(self, values: NDArray[Any], column: str) -> list[str]:
        """Return "1" ... "10"."""
        return [str(k) for k in range(1, 11)]

    def encode(self, values: NDArray[Any], labels: list[str], column: str = "target") -> Tensor:
        """Return class probabilities, (n, 10): a fraction is shared between its two neighbours."""
        y = _numbers(values, self.name, column)
        _refuse(~((y >= 1) & (y <= len(labels))), values, f"ratings from 1 to {len(labels)}", column)
        low = y.floor().clamp(max=len(labels) - 1)
        share = (y - low)[:, None]
        lower, upper = (F.one_hot((low + i).long() - 1, len(labels)) for i in (0, 1))
        return ((1 - share) * lower + share * upper).float()

    def scale(self, target: Tensor) -> float:
        """Standard deviation of the ratings."""
        y = target.double()
        return max(float((y @ torch.arange(1, y.shape[1] + 1, dtype=y.dtype)).std()), 1e-6)

    def loss(self, outputs: Outputs, target: Tensor, weights: LossWeights, scale: float = 1.0) -> Scalar:
        """Cross entropy plus ``expected_weight ((E[rating] - rating) / scale)^2``."""
        loss = super().loss(outputs, target, weights)
        if weights.expected_weight:
            ratings = torch.arange(1, outputs.shape[1] + 1, device=outputs.device, dtype=outputs.dtype)
            error = (outputs.softmax(1) - target) @ ratings
            loss = loss + weights.expected_weight * (error / scale).square().mean()
        return loss

    def class_index(self, target: Tensor) -> Int[Tensor, " n"]:
        """The nearest rating."""
        return _expected_rating(target.clamp(min=1e-30).log()).round().long() - 1

    def measure(self, outputs: Tensor, target: Tensor, compare: Columns) -> dict[str, float]:
        """As for classes, and the rank correlation of the expected rating."""
        score, wanted = _expected_rating(outputs), target @ torch.arange(1.0, outputs.shape[1] + 1)
        return super().measure(outputs, target, compare) | rank_measures(score, wanted, compare)

    def statistics(self, outputs: Tensor, target: Tensor) -> dict[str, Statistic]:
        """As for classes, and the rank correlation."""
        score, wanted = _expected_rating(outputs), target @ torch.arange(1.0, outputs.shape[1] + 1)
        correlation = rank_correlation(score.numpy(), wanted.numpy())
        return super().statistics(outputs, target) | {"spearman": correlation}


@register_task
class Classes(_Categorical):
    """The classes found in the data; targets are their indices."""

    name = "class"
    objectives = ("class", "expected", "at_least")
    headlines = ("accuracy", "chance", "auc", "ece", "skill")
    labelled = True

    def labels(self, values: NDArray[Any], column: str) -> list[str]:
        """Return the sorted classes of a column, numbers by value."""
        labels = [str(value) for value in np.unique(values)]
        if len(labels) < 2:
            raise UserError(f"Expected at least two classes in '{column}', got {labels}; choose another target.")
        return labels

    def encode(self, values: NDArray[Any], labels: list[str], column: str = "target") -> Tensor:
        """Return class indices, (n,)."""
        index = {label: i for i, label in enumerate(labels)}
        names = [str(value) for value in values]
        unknown = sorted({name for name in names if name not in index})
        if unknown:
            raise UserError(
                f"Expected classes of '{column}' that occur in the training split, got '{unknown[0]}' too; "
                "add training examples of it or leave it out."
            )
        return torch.tensor([index[name] for name in names])

    def measure(self, outputs: Tensor, target: Tensor, compare: Columns) -> dict[str, float]:
        """The mean AUC over the classes that occur, each against the rest; skill from the accuracy."""
        found = super().measure(outputs, target, compare) | {"auc": macro_auc(outputs, target)}
        return found | {"skill": skill_above_chance(found["accuracy"], len(outputs), found["chance"])}

    def statistics(self, outputs: Tensor, target: Tensor) -> dict[str, Statistic]:
        """With the AUC."""
        auc = _auc_statistic(outputs, target, target.unique().tolist())
        return super().statistics(outputs, target) | auc

    def guide(self, config: HeadConfig, name: str) -> str:
        """Towards the first class."""
        return f'MidBlockGuide(load_head("{name}"), target="{config.labels[0]}")'


@register_task
class Binary(_Categorical):
    """Real (1) against generated (0) images; the output ``z`` is the log-odds of a real one."""

    name = "binary"
    objectives = ("binary",)
    headlines = ("accuracy", "chance", "auc", "ece", "skill")
    generated = True

    def encode(self, values: NDArray[Any], labels: list[str], column: str = "target") -> Tensor:
        """Return 0 or 1, (n,)."""
        y = _numbers(values, self.name, column)
        if set(y.unique().tolist()) != {0.0, 1.0}:
            found = ", ".join(f"{value:g}" for value in y.unique().tolist()[:5])
            raise UserError(f"Expected both 0 and 1, and nothing else, in '{column}' for task=binary, got {found}.")
        return y.long()

    def logits(self, outputs: Float[Tensor, "n 1"]) -> Float[Tensor, "n 2"]:
        """Write log-odds ``z`` as the logits (0, z) of two classes, for ``softmax((0, z))_1 = sigmoid(z)``.

        >>> Binary().logits(torch.zeros(1, 1)).softmax(1)
        tensor([[0.5000, 0.5000]])
        """
        return torch.cat([torch.zeros_like(outputs), outputs], dim=1)

    def measure(self, outputs: Tensor, target: Tensor, compare: Columns) -> dict[str, float]:
        """With the AUC; skill is the lower end of the interval of 2 AUC - 1."""
        ranking = auc_and_skill(outputs[:, 1] - outputs[:, 0], target)
        return super().measure(outputs, target, compare) | ranking

    def statistics(self, outputs: Tensor, target: Tensor) -> dict[str, Statistic]:
        """With the AUC."""
        return super().statistics(outputs, target) | _auc_statistic(outputs, target, [1])

    def guide(self, config: HeadConfig, name: str) -> str:
        """The published form: the raw gradient of the log-odds."""
        return f'MidBlockGuide(load_head("{name}"), normalize=None)'


@register_task
class Regression(Task):
    """A number, in the units of its column."""

    name = "regression"
    objectives = ("regression",)
    headlines = ("spearman", "spearman_truth", "mae", "skill")
    standardized = ranked = True

    def encode(self, values: NDArray[Any], labels: list[str], column: str = "target") -> Tensor:
        """Return numbers, (n, 1)."""
        y = _numbers(values, self.name, column)
        _refuse(~y.isfinite(), values, "finite numbers", column)
        return y.float()[:, None]

    def scale(self, target: Tensor) -> float:
        """Standard deviation of the numbers."""
        return max(float(target.double().std()), 1e-6)

    def loss(self, outputs: Outputs, target: Tensor, weights: LossWeights, scale: float = 1.0) -> Scalar:
        """Squared error in standard deviations."""
        return F.mse_loss(outputs / scale, target / scale)

    def measure(self, outputs: Tensor, target: Tensor, compare: Columns) -> dict[str, float]:
        """Mean absolute error, rank correlation."""
        mae = float((outputs[:, 0] - target[:, 0]).abs().mean())
        return {"mae": mae} | rank_measures(outputs[:, 0], target[:, 0], compare)

    def statistics(self, outputs: Tensor, target: Tensor) -> dict[str, Statistic]:
        """Of both."""
        score, wanted = outputs[:, 0], target[:, 0]
        correlation = rank_correlation(score.numpy(), wanted.numpy())
        return {"mae": mean_of((score - wanted).abs()), "spearman": correlation}


@register_task
class Embedding(Task):
    """The CLIP embedding of the clean image; it has a score only beside a target, see ``EmbeddingGuide``."""

    name = "embedding"
    headlines = ("cosine", "cosine_other", "retrieval", "chance", "skill")
    clip_target = True

    def encode(self, values: NDArray[Any], labels: list[str], column: str = "target") -> Tensor:
        """Return unit vectors, (n, d)."""
        if values.dtype.kind != "f" or values.ndim != 2:
            raise UserError(
                f"Expected vectors in '{column}' for task=embedding, got {values.dtype} of shape {values.shape}; "
                "use a target such as clip:testbed."
            )
        y = torch.from_numpy(values.astype(np.float32))
        bad = ~(y.isfinite().all(1) & (y.norm(dim=1) > 0))
        _refuse(bad, values, "finite vectors other than 0", column)
        return F.normalize(y, dim=1)

    def num_outputs(self, labels: list[str], target: Tensor) -> int:
        """Dimension of the embedding."""
        return target.shape[1]

    def loss(self, outputs: Outputs, target: Tensor, weights: LossWeights, scale: float = 1.0) -> Scalar:
        """See :func:`embedding_loss`; rows of one batch size are contrasted."""
        return embedding_loss(outputs, target, weights.contrastive_weight, chunk=weights.batch_size)

    def by_row(self, outputs: Outputs, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return :func:`compare_embeddings`, stacked, and the chance of a retrieval."""
        found, candidates = compare_embeddings(outputs, target)
        chance = torch.full((len(outputs),), 1 / candidates, dtype=torch.float64)
        return torch.stack(list(found.values()), 1), chance

    def measure(self, outputs: Tensor, target: Tensor, compare: Columns) -> dict[str, float]:
        """Means of :func:`compare_embeddings`; skill from the retrieval."""
        found = {name: float(x.double().mean()) for name, x in zip(_COMPARISONS, outputs.T, strict=True)}
        chance = float(target[0])
        skill = skill_above_chance(found["retrieval"], len(outputs), chance)
        return found | {"chance": chance, "skill": skill}

    def statistics(self, outputs: Tensor, target: Tensor) -> dict[str, Statistic]:
        """Of the same means."""
        columns = zip(_COMPARISONS, outputs.T, strict=True)
        return {name: mean_of(x, is_share=name == "retrieval") for name, x in columns}

    def guide(self, config: HeadConfig, name: str) -> str:
        """Towards a text."""
        return f'EmbeddingGuide(load_head("{name}"), load_clip("{config.clip}"), texts=["a prompt"])'


def _numbers(values: NDArray[Any], task: str, column: str) -> Float[Tensor, " n"]:
    if values.dtype.kind not in "fiu":
        raise UserError(f"Expected numbers in '{column}' for task={task}, got text; use task=class.")
    return torch.from_numpy(values.astype(np.float64))


def _refuse(bad: Bool[Tensor, " n"], values: NDArray[Any], expected: str, column: str) -> None:
    if bad.any():
        row = int(bad.nonzero()[0])
        got = values[row] if values.ndim == 1 else "another"
        raise UserError(
            f"Expected {expected} in '{column}', got {got} in row {row} and {int(bad.sum())} bad rows in all; "
            "correct or remove them."
        )


def _expected_rating(logits: Float[Tensor, "n ratings"]) -> Float[Tensor, " n"]:
    return logits.softmax(1) @ torch.arange(1.0, logits.shape[1] + 1)


def _auc_statistic(logits: Tensor, index: Tensor, classes: list[int]) -> dict[str, Statistic]:
    """The mean AUC of some classes, each against the rest; nothing where only one class occurs."""
    if len(index.unique()) < 2:
        return {}
    p = logits.double().softmax(1).numpy()
    return {"auc": mean_auc([(p[:, k], index.numpy() == k) for k in classes])}


#: Fixed temperature of the contrastive loss: the one CLIP's training starts from.
CONTRASTIVE_TEMPERATURE = 0.07

#: Images a prediction is compared with, its own included.
CANDIDATES = 100

_COMPARISONS = ("cosine", "cosine_other", "retrieval")

_CHUNK = 1024  # rows compared with all images at once


def embedding_loss(
    outputs: Float[Tensor, "b d"],
    target: Float[Tensor, "b d"],
    contrastive_weight: float = 1.0,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """``1 - cos(e_i, y_i)`` plus InfoNCE, ``-log exp(cos(e_i, y_i) / T) / sum_j exp(cos(e_i, y_j) / T)``.

    Rows of one image (several noise draws) share a target: each of them counts as right.

    Args:
        outputs: Predicted embeddings ``e``, of any length.
        target: Unit-length true embeddings ``y``.
        contrastive_weight: Weight of the second term; 0 leaves it out.
        chunk: Number of rows that are contrasted with each other; None for all.  Losses are comparable only for
            equal chunks: among more rows the right one is harder to find.

    Reference:
        van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018; the fixed
        temperature T is the initial one of Radford et al. 2021 (CLIP).
    """
    unit = F.normalize(outputs, dim=1)
    loss = 1 - (unit * target).sum(1).mean()
    if not contrastive_weight:
        return loss
    parts = zip(unit.split(chunk or len(unit)), target.split(chunk or len(unit)), strict=True)
    contrastive = torch.stack([_info_nce(e, y) * len(e) for e, y in parts]).sum() / len(unit)
    return loss + contrastive_weight * contrastive


def _info_nce(unit: Tensor, target: Tensor) -> Tensor:
    _, image = target.unique(dim=0, return_inverse=True)
    same = (image[:, None] == image).to(unit.dtype)
    return F.cross_entropy(unit @ target.T / CONTRASTIVE_TEMPERATURE, same / same.sum(1, keepdim=True))


@torch.no_grad()
def compare_embeddings(
    outputs: Float[Tensor, "n d"], target: Float[Tensor, "n d"]
) -> tuple[dict[str, Float[Tensor, " n"]], int]:
    """Compare predicted embeddings with those of all images.

    Args:
        outputs: Predicted embeddings, of any length.
        target: Unit-length true embeddings; equal ones are one image.

    Returns:
        Per row ``cosine`` with its own image; ``cosine_other``, the mean cosine with all other images (what a
        head that ignores its input reaches); and ``retrieval``, the probability that its own image has the
        highest cosine among :data:`CANDIDATES` images, the others drawn at random from the rest.  Then the
        number of candidates, which is lower where there are fewer images.
    """
    images, image = target.unique(dim=0, return_inverse=True)
    candidates = min(CANDIDATES, len(images))
    parts = []
    for rows in torch.arange(len(outputs)).split(_CHUNK):
        cosines = F.normalize(outputs[rows], dim=1) @ images.T
        cosine = cosines.gather(1, image[rows, None])
        # ties count as lost, or a constant head would find every image
        better = (cosines >= cosine).sum(1) - 1
        other = (cosines.sum(1) - cosine[:, 0]) / max(len(images) - 1, 1)
        first = _first_among(better, len(images) - 1, candidates - 1)
        parts.append(torch.stack([cosine[:, 0], other, first.to(cosine.dtype)]))
    return dict(zip(_COMPARISONS, torch.cat(parts, dim=1), strict=True)), candidates


def _first_among(better: Int[Tensor, " b"], others: int, drawn: int) -> Float[Tensor, " b"]:
    """The probability that none of ``better`` of the ``others`` is among the ``drawn``: hypergeometric.

    >>> _first_among(torch.tensor([0, 1, 6]), others=9, drawn=4)
    tensor([1.0000, 0.5556, 0.0000], dtype=torch.float64)
    """
    left = others - better.double()
    known = torch.tensor([others + 1.0, others - drawn + 1.0], dtype=torch.float64).lgamma()
    kept = (left - drawn + 1).clamp(min=1).lgamma()
    return torch.where(left < drawn, 0.0, ((left + 1).lgamma() - kept - known[0] + known[1]).exp())
