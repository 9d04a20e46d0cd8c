"""An evaluation of arms: loads the networks that grade, computes and caches features, and measures every metric."""

from __future__ import annotations

import datetime
import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from jaxtyping import Float
from PIL import Image

from eval.comparison.arms import Arms
from eval.comparison.compare import breakdowns, caveats, deltas, summarise_arms, table_rows
from eval.comparison.image_metrics import IMAGE_METRICS, measure_images
from eval.comparison.results import Comparison
from eval.comparison.set_metrics import SET_METRICS, measure_sets
from eval.features.extractors import Extractor, TextExtractor, judge_readings, load_extractor, rating_extractor
from eval.features.reference import Reference, fill_reference, load_reference
from eval.features.store import Embedder, What, features_of
from eval.stats.paired import prompt_numbers
from guidance.data.edits import load_edit_pairs
from guidance.heads import load_head
from guidance.models.pipelines import load_pipeline
from guidance.runs.records import Record, toolkit_version
from guidance.testbed.judges import load_judges
from guidance.testbed.models import IMAGE_SIZE
from guidance.testbed.scenes import parse_caption
from guidance.utils.errors import UserError

if TYPE_CHECKING:
    from eval.images import EvalImagesConfig

AUTO = "auto"

DEFAULT_CLIP = "clip:openai/clip-vit-base-patch16"  # of the diffusers guide "Evaluating diffusion models"

TESTBED_REFERENCE, TESTBED_SIZE = "testbed:test", 2000


class ImageBench:
    """Grade the images of arms.

    Args:
        arms: See :func:`eval.comparison.arms.load_arms`.
        config: Networks, reference and options.  "auto" stands for the judges and test scenes on images of the testbed,
            else for :data:`DEFAULT_CLIP` and no reference.
        state: This process and the others, which share the embedding.
        progress: Show progress bars.

    Raises:
        UserError: If there is no such network, or it cannot be used so.
    """

    testbed: bool  # all images and captions are of the testbed's world, so that its truth and judges apply
    clip: TextExtractor | None
    features: Extractor | None  # of set metrics
    readings: Extractor | None  # of the judge classifier, on the testbed
    rating: Extractor | None = None  # by a head
    reference: str | None
    edits: str | None

    def __init__(self, arms: Arms, config: EvalImagesConfig, state: PartialState, *, progress: bool = True) -> None:
        self.arms, self.config, self.state, self.progress = arms, config, state, progress
        self.testbed, self.edits = is_testbed(arms), config.edits
        default = TESTBED_REFERENCE if self.testbed else None
        self.reference = default if config.reference == AUTO else config.reference
        clip = self._load(("judge-clip" if self.testbed else DEFAULT_CLIP) if config.clip == AUTO else config.clip)
        if clip is not None and not isinstance(clip, TextExtractor):
            raise UserError(f"Expected clip to be a network with texts, judge-clip or clip:NAME, got '{config.clip}'.")
        self.clip = self.features = clip
        if config.features != AUTO or self.testbed:
            self.features = self._load("judge" if config.features == AUTO else config.features)
        self.readings = judge_readings(load_judges()) if self.testbed else None
        if config.rating is not None:
            head = load_head(config.rating)
            self.rating = rating_extractor(load_pipeline(head.config.base_model), head, batch_size=config.batch_size)
        self._read: dict[tuple[str, str], Mapping[str, Float[np.ndarray, "n d"]]] = {}
        self._references: dict[str, Reference] = {}

    def _load(self, name: str | None) -> Extractor | None:
        device = self.state.device if self.state.num_processes > 1 else None
        return None if name is None else load_extractor(name, device=device, batch_size=self.config.batch_size)

    def fill(self) -> None:
        """Compute the features that are not cached yet, each process its share; returns when all are there."""
        shared = {"process_index": self.state.process_index, "num_processes": self.state.num_processes}
        graders: list[tuple[Embedder | None, What]] = [(m.grader(self), "embed") for m in IMAGE_METRICS]
        networks = [(m.network(self), m) for m in SET_METRICS if self.reference or not m.needs]
        graders += [(network, m.what) for network, m in networks]
        needed = {(grader.fingerprint, what): grader for grader, what in graders if grader is not None}
        for (_, what), grader in needed.items():
            self._features(grader, what, **shared)
        references = {network.fingerprint: network for network, m in networks if network is not None and m.needs}
        for network in references.values():
            bar = f"reference, {network.name}" if self.progress else None
            fill_reference(str(self.reference), network, progress=bar, **self._reference_options, **shared)
        self.state.wait_for_everyone()

    def read(self, grader: Embedder, what: What = "embed") -> Mapping[str, Float[np.ndarray, "n d"]]:
        """Return arm -> features of its images."""
        key = grader.fingerprint, what
        if key not in self._read:
            parts = np.split(self._features(grader, what), len(self.arms.names))
            self._read[key] = dict(zip(self.arms.names, parts, strict=True))
        return self._read[key]

    def _features(self, grader: Embedder, what: What, **shared: int) -> Float[np.ndarray, "n d"]:
        images = [image for rows in self.arms.images.values() for image in rows]
        digests = [image.digest for image in images]
        if grader is self.rating:  # it sees the prompt as well
            digests = [hashlib.sha256(f"{i.digest} {i.prompt}".encode()).hexdigest() for i in images]
        bar = grader.name if self.progress and shared else None
        return features_of(
            lambda i: images[i].open(), digests, grader, self.config.cache, what=what, progress=bar, **shared
        )

    def read_reference(self, network: Extractor) -> Reference:
        """Return the reference set in the features of a network."""
        if (key := network.fingerprint) not in self._references:
            self._references[key] = load_reference(str(self.reference), network, **self._reference_options)
        return self._references[key]

    @property
    def _reference_options(self) -> dict[str, Any]:
        default = TESTBED_SIZE if str(self.reference).startswith("testbed:") else None
        return {"n": self.config.reference_size or default, "cache": self.config.cache}

    @functools.cached_property
    def edit_embeddings(self) -> tuple[Float[np.ndarray, "n d"], ...]:
        """CLIP embeddings of the source image, its caption and the edited caption, for each row of an arm.

        Raises:
            UserError: If a prompt has no edit, or an edit no source image.
        """
        assert self.edits is not None and self.clip is not None
        ids = list(dict.fromkeys(row.prompt_id for row in self.arms.rows))
        known = load_edit_pairs(self.edits, len(ids) if self.edits.startswith("testbed") else None)
        pairs = {pair.id: pair for pair in known if pair.image is not None}
        if lacking := [i for i in ids if i not in pairs]:
            raise UserError(
                f"Expected an edit with a source image for every prompt, got none for '{lacking[0]}' and "
                f"{len(lacking) - 1} more; name the edits that the images were made from."
            )
        chosen = [pairs[i] for i in ids]
        found = (
            self.clip.embed([pair.image for pair in chosen if pair.image is not None]),
            self.clip.embed_texts([pair.caption for pair in chosen]),
            self.clip.embed_texts([pair.edited_caption for pair in chosen]),
        )
        order = prompt_numbers([row.prompt_id for row in self.arms.rows])
        return tuple(x[order] for x in found)

    def guided_by(self, network: Extractor) -> tuple[str, ...]:
        """List the arms that a network had guided."""
        return tuple(
            name
            for name, images in self.arms.images.items()
            if any(network.weights_fingerprint in _weights(image.record) for image in images if image.record)
        )

    def compare(self, title: str, command: str, options: Mapping[str, Any]) -> Comparison:
        """Measure everything; the report shows the command that makes it again, and options beside it."""
        measured, sets = measure_images(self), measure_sets(self, self.config.permutations)
        found = deltas(measured, self.arms)
        notes = caveats(
            self.arms,
            measured,
            found,
            widths={s.metric.title: s.width for s in sets if s.width is not None},
            reference_size=self.read_reference(self.features).n if self.reference and self.features else None,
            truncated=self._truncated(),
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
            set_metrics=[s.metric for s in sets],
            set_values=[value for s in sets for value in s.values],
            breakdowns=breakdowns(measured, self.arms),
            caveats=notes,
            rows=table_rows(measured, self.arms),
        )

    def _truncated(self) -> list[str]:
        prompts = list(dict.fromkeys(row.prompt for row in self.arms.rows if row.prompt))
        cut = self.clip.truncated(prompts) if self.clip and prompts else []
        return list(itertools.compress(prompts, cut))

    def _provenance(self) -> dict[str, Any]:
        records = [i.record for images in self.arms.images.values() for i in images if i.record]
        return {
            "toolkit": toolkit_version(),
            "torch": torch.__version__,
            "models": {r.model: r.model_fingerprint for r in records},
            "sampled by version": sorted({r.version for r in records}),
            "pairing": "audited by records" if self.arms.audited else "by file name, not audited",
            "graders": {e.name: e.fingerprint for e in (self.clip, self.features) if e is not None},
            "reference": self.reference or "none",
        }


def is_testbed(arms: Arms) -> bool:
    """Tell whether all images and captions are of the testbed's world, so that its truth and judges apply."""
    try:
        for row in arms.rows:
            parse_caption(row.prompt)
    except UserError:
        return False
    with Image.open(arms.rows[0].file) as image:
        return image.size == (IMAGE_SIZE, IMAGE_SIZE) and not arms.converted


def _weights(record: Record) -> Iterator[str | None]:
    """Yield the fingerprints of the networks that pushed, steered or modulated."""
    modulate = (record.cfg or {}).get("modulate")  # earlier records have its name alone
    for guide in (*record.guides, record.steering or {}, modulate if isinstance(modulate, Mapping) else {}):
        yield from (guide.get("clip_fingerprint"), guide.get("head_fingerprint"))
        for name in ("committee_fingerprints", "teacher_fingerprints", "networks"):
            yield from guide.get(name, ())
