"""The jobs of a run as scripts name them: prompts of a set, a file or a list, or edits of images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from guidance.edit_pairs import EditPair, load_edit_pairs
from guidance.errors import UserError
from guidance.prompts import Prompt, load_prompts
from guidance.run import list_jobs
from guidance.start import ImageStart
from guidance.units import Job


def read_jobs(
    prompts: str | Sequence[str],
    num_prompts: int | None,
    seeds_per_prompt: int,
    seed: int,
    *,
    category: str | Sequence[str] | None = None,
    edits: str | None = None,
) -> list[Job]:
    """List what is to be sampled.

    Args:
        prompts: See :func:`guidance.prompts.load_prompts`; not used with ``edits``.
        num_prompts: How many of a set, of a file or of the edits; a list is taken whole.
        seeds_per_prompt, seed: See :func:`guidance.run.list_jobs`; the seed also chooses the prompts.
        category: Categories to take prompts of.
        edits: Edit pairs, see :func:`guidance.edit_pairs.load_edit_pairs`: their images are changed towards the edited
            captions (SDEdit).

    Raises:
        UserError: If there are no such prompts or edits, or an edit has no image.
    """
    if edits is None:
        count = num_prompts if isinstance(prompts, str) else None
        return list_jobs(load_prompts(prompts, count, seed, category=category), seeds_per_prompt, seed)
    pairs = load_edit_pairs(edits, num_prompts, seed)
    starts = {pair.id: _start(pair) for pair in pairs}
    jobs = list_jobs([Prompt(pair.id, pair.edited_caption) for pair in pairs], seeds_per_prompt, seed)
    return [Job(job.prompt, job.seed, starts[job.prompt.id]) for job in jobs]


def _start(pair: EditPair) -> ImageStart:
    image = pair.image
    if image is None:
        raise UserError(
            f"Expected edits with the images they start from, got '{pair.id}' without; name others."
        )
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:16]
    return ImageStart(lambda: image, digest)
