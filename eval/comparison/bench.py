"""The networks of one evaluation, and what they make of its images: from arms to a comparison."""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from eval.comparison import image_metrics as metrics
from eval.comparison import set_metrics as sets
from eval.comparison.arms import Arms
from eval.comparison.compare import breakdowns, caveats, deltas, summarise_arms, table_rows
from eval.comparison.results import Comparison, SetMetric, SetValue
from eval.features.extractors import ClassExtractor, Extractor, TextExtractor, load_extractor
from eval.features.reference import Reference, fill_reference, load_reference
from eval.features.store import What, features_of
from guidance.data.edits import load_edit_pairs
from guidance.runs.records import Record, toolkit_version
from guidance.testbed.judges import load_judges
from guidance.utils.errors import UserError

AUTO = "auto"

DEFAULT_CLIP = "clip:openai/clip-vit-base-patch16"  # of the diffusers guide "Evaluating diffusion models"

TESTBED_REFERENCE, TESTBED_SIZE = "testbed:test", 2000


class ImageBench:
    """Grade the images of arms.

    Args:
        arms: See :func:`eval.comparison.arms.load_arms`.
        state: This process and the others, which share the embedding.
        clip: Network with texts, see :func:`eval.features.extractors.load_extractor`; None leaves out what needs one.
            "auto" is the judge CLIP for images of the testbed, else :data:`DEFAULT_CLIP`.
        features: Network of set metrics; None leaves them out.  "auto": the judge classifier, else the CLIP.
        reference: Real images, see :func:`eval.features.reference.load_reference`; None leaves out what needs them.
            "auto": test scenes for images of the testbed, else None.
        reference_size: Images of it; None for all (of the testbed 2,000).
        edits: Edit pairs for directional similarity; None leaves it out.
        rating: Folder of a head whose score of the finished images is shown; None leaves it out.
        permutations: Of each permutation test.
        cache: Folder of cached features.
        batch_size: Images at once.
        progress: Show bars.

    Raises:
        UserError: If there is no such network, or it cannot be used so.
    """

    def __init__(
        self,
        arms: Arms,
        state: PartialState,
        *,
        clip: str | None = AUTO,
        features: str | None = AUTO,
        reference: str | None = AUTO,
        reference_size: int | None = None,
        edits: str | None = None,
        rating: str | None = None,
        permutations: int = 199,
        cache: str | os.PathLike[str] = "runs/eval/cache",
        batch_size: int = 64,
        progress: bool = True,
    ) -> None:
        self.arms, self.state, self.edits, self.permutations = arms, state, edits, permutations
        self.cache, self.progress, self.reference_size = Path(cache), progress, reference_size
        self.testbed = metrics.is_testbed(arms)
        device = state.device if state.num_processes > 1 else None

        def load(name: str | None) -> Extractor | None:
            return None if name is None else load_extractor(name, device=device, batch_size=batch_size)

        chosen = load(("judge-clip" if self.testbed else DEFAULT_CLIP) if clip == AUTO else clip)
        if chosen is not None and not isinstance(chosen, TextExtractor):
            raise UserError(
                f"Expected clip to be a network with texts, judge-clip or clip:NAME, got '{clip}'."
            )
        self.clip: TextExtractor | None = chosen
        self.reference = (TESTBED_REFERENCE if self.testbed else None) if reference == AUTO else reference
        self.extractor = (
            (load("judge") if self.testbed else self.clip) if features == AUTO else load(features)
        )
        self.classes = self.extractor if isinstance(self.extractor, ClassExtractor) else None
        self.readings = metrics.judge_readings(load_judges()) if self.testbed else None
        self.rating = None if rating is None else self._load_rating(rating, batch_size)
        self._read: dict[tuple[str, str], Mapping[str, np.ndarray]] = {}

    def _load_rating(self, folder: str, batch_size: int) -> Extractor:
        from eval.features.extractors import rating_extractor
        from guidance.heads import load_head
        from guidance.models.pipelines import load_pipeline

        head = load_head(folder)
        pipe = load_pipeline(head.config.base_model)
        return rating_extractor(pipe, head, batch_size=batch_size)

    def fill(self) -> None:
        """Compute the features that are not cached yet, each process its share; returns when all of them are."""
        shared = {"process_index": self.state.process_index, "num_processes": self.state.num_processes}
        for extractor, what in self._needed():
            self._features(extractor, what, **shared)
        for extractor in self._compared():
            bar, size = self._bar(extractor), self._reference_size()
            fill_reference(str(self.reference), extractor, n=size, cache=self.cache, progress=bar, **shared)
        self.state.wait_for_everyone()

    def _needed(self) -> list[tuple[Extractor, What]]:
        networks = [metrics.PIXELS, *([metrics.TRUTH, self.readings] if self.testbed else []), self.clip]
        networks += [self.rating, *([self.extractor] if self.reference else [])]
        needed: list[tuple[Extractor, What]] = [(e, "embed") for e in networks if e is not None]
        return needed + ([(self.classes, "probabilities")] if self.classes is not None else [])

    def read(self, extractor: Extractor, what: What = "embed") -> Mapping[str, np.ndarray]:
        """Arm -> features of its images."""
        key = extractor.fingerprint, what
        if key not in self._read:
            n, rows = len(self.arms.rows), self._features(extractor, what)
            self._read[key] = {name: rows[i * n : (i + 1) * n] for i, name in enumerate(self.arms.names)}
        return self._read[key]

    def _features(self, extractor: Extractor, what: What, **shared: Any) -> np.ndarray:
        images = [image for rows in self.arms.images.values() for image in rows]
        digests = [image.digest for image in images]
        if extractor is self.rating:  # it sees the prompt as well
            digests = [hashlib.sha256(f"{i.digest} {i.prompt}".encode()).hexdigest() for i in images]
        bar = extractor.name if self.progress and shared else None
        return features_of(
            lambda i: images[i].open(), digests, extractor, self.cache, what=what, progress=bar, **shared
        )

    def compare(self, title: str, command: str, options: Mapping[str, Any]) -> Comparison:
        """Measure everything.

        Args:
            title: Of the report.
            command: That makes it again.
            options: Shown beside it.
        """
        measured = self._measure()
        found = deltas(measured, self.arms)
        set_metrics, set_values, widths, size = self._measure_sets()
        notes = caveats(
            self.arms, measured, found, widths=widths, reference_size=size, truncated=self._truncated()
        )
        return Comparison(
            title=title,
            command=command,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            provenance=self._provenance() | {"options": dict(options)},
            baseline=self.arms.baseline,
            arms=summarise_arms(self.arms),
            n_prompts=len({row.prompt_id for row in self.arms.rows}),
            n_pairs=len(self.arms.rows),
            image_metrics=[m.metric for m in measured],
            deltas=found,
            set_metrics=set_metrics,
            set_values=set_values,
            breakdowns=breakdowns(measured, self.arms),
            caveats=notes,
            rows=table_rows(measured, self.arms),
        )

    def _measure(self) -> list[metrics.Measured]:
        measured = []
        if self.readings is not None:
            measured += metrics.testbed_metrics(self.arms, self.read, self.readings)
        if self.clip is not None:
            guided = _guided_by(self.arms, self.clip.weights_fingerprint)
            measured += metrics.clip_metrics(self.arms, self.read, self.clip, guided)
            if self.edits:
                count = (
                    len({row.prompt_id for row in self.arms.rows})
                    if self.edits.startswith("testbed")
                    else None
                )
                pairs = {pair.id: pair for pair in load_edit_pairs(self.edits, count)}
                measured += metrics.edit_metrics(self.arms, self.read, self.clip, pairs)
        if self.rating is not None:
            guided = _guided_by(self.arms, self.rating.weights_fingerprint)
            measured.append(metrics.rating_metric(self.read, self.rating, guided))
        return measured + metrics.pixel_metrics(self.read)

    def _measure_sets(self) -> tuple[list[SetMetric], list[SetValue], dict[str, int], int | None]:
        n, found, widths, size = self.permutations, list[sets.SetStatistic](), dict[str, int](), None
        if self.reference and self.extractor is not None:
            rows, label, real = self.read(self.extractor), self.extractor.label, self._real(self.extractor)
            inception, size = self.extractor.name == "inception", real.n or None
            fd, kd = ("FID", "KID") if inception else (f"FD-{label}", f"KD-{label}")
            widths[fd] = len(real.mu)
            found.append(sets.frechet_statistic(rows, real.mu, real.sigma, fd, real.name, n))
            if real.features is not None and len(self.arms.rows) > sets.NEIGHBOURS:
                found.append(sets.kernel_statistic(rows, real.features, kd, real.name, n))
                found.append(sets.precision_statistic(rows, real.features, label, real.name, n))
                found.append(sets.recall_statistic(rows, real.features, label, real.name, n))
        if self.reference and self.clip is not None and (real := self._real(self.clip)).features is not None:
            title = f"CMMD-{self.clip.label}"
            found.append(sets.cmmd_statistic(self.read(self.clip), real.features, title, real.name, n))
        if self.classes is not None:
            rows = self.read(self.classes, "probabilities")
            found.append(sets.inception_statistic(rows, self.classes.label, n))
        prompts, seeds = [row.prompt_id for row in self.arms.rows], [row.seed for row in self.arms.rows]
        values = [value for statistic in found for value in sets.set_values(statistic, prompts, seeds)]
        return [statistic.metric for statistic in found], values, widths, size

    def _compared(self) -> list[Extractor]:
        """Networks in whose features there is a reference."""
        return [e for e in (self.extractor, self.clip) if e is not None] if self.reference else []

    def _real(self, extractor: Extractor) -> Reference:
        return load_reference(str(self.reference), extractor, n=self._reference_size(), cache=self.cache)

    def _reference_size(self) -> int | None:
        testbed = str(self.reference).startswith("testbed:")
        return self.reference_size or (TESTBED_SIZE if testbed else None)

    def _bar(self, extractor: Extractor) -> str | None:
        return f"reference, {extractor.name}" if self.progress else None

    def _truncated(self) -> list[str]:
        prompts = list(dict.fromkeys(row.prompt for row in self.arms.rows if row.prompt))
        if self.clip is None or not prompts:
            return []
        return [p for p, cut in zip(prompts, self.clip.truncated(prompts), strict=True) if cut]

    def _provenance(self) -> dict[str, Any]:
        records = [i.record for images in self.arms.images.values() for i in images if i.record]
        return {
            "toolkit": toolkit_version(),
            "torch": torch.__version__,
            "models": {r.model: r.model_fingerprint for r in records},
            "sampled by version": sorted({r.version for r in records}),
            "pairing": "audited by records" if self.arms.audited else "by file name, not audited",
            "graders": {e.name: e.fingerprint for e in (self.clip, self.extractor) if e is not None},
            "reference": self.reference or "none",
        }


def _weights(record: Record) -> Iterator[Any]:
    """Fingerprints of the networks that pushed, steered or modulated."""
    modulate = (record.cfg or {}).get("modulate")  # earlier records have its name alone
    for guide in (*record.guides, record.steering or {}, modulate if isinstance(modulate, Mapping) else {}):
        yield from (guide.get("clip_fingerprint"), guide.get("head_fingerprint"))
        for name in ("committee_fingerprints", "teacher_fingerprints", "networks"):
            yield from guide.get(name, ())


def _guided_by(arms: Arms, fingerprint: str) -> Sequence[str]:
    """Arms that the network of these weights had guided."""
    return [
        name
        for name, images in arms.images.items()
        if any(fingerprint in _weights(image.record) for image in images if image.record)
    ]
