"""Options that the sampling scripts share: what to sample, the guide by a head, the model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from guidance.guides.midblock import MidBlockGuide
from guidance.utils.config import option

if TYPE_CHECKING:
    from guidance.models.types import Pipeline
    from guidance.runs.run import Job


@dataclasses.dataclass
class SamplingOptions:
    """Options of a sampling script; those with ``identity=False`` may differ when a folder is continued."""

    prompts: Any = option("testbed", "a named set (testbed, parti, coco, ...), a file, or a list of texts")
    num_prompts: int | None = option(8, "prompts to take from a set or file; null for all")
    category: Any = option(None, "category or challenge of the prompts, or a list of them; null for all")
    edits: str | None = option(None, "edit pairs (testbed:test, a file) instead of prompts: images to change")
    seeds_per_prompt: int = option(1, "images per prompt and arm; draw j of prompt i has seed + 1000 i + j")
    seed: int = option(0, "first seed, and choice of the prompts")
    objective: str | None = option(None, "expected, at_least, class, regression, binary; null: the head's")
    target: str | None = option(None, "label or threshold of the objective, where it needs one")
    normalize: Literal["cfg"] | None = option("cfg", "cfg: portable scale; null: raw gradient")
    every: int = option(1, "take a gradient every so many steps")
    space: Literal["eps", "x"] = option("eps", "what is shifted: the prediction or the latents")
    model: str = option("testbed", "diffusers pipeline: testbed, a folder or a hub id")
    revision: str | None = option(None, "branch, tag or commit of the model on the hub")
    device: str | None = option(None, "cpu, cuda, mps; null picks the best one")
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "precision of the model")
    grid_rows: int = option(12, "prompts in the grid", identity=False)
    output: str | None = option(None, "folder; null: under runs/, named by the other options", identity=False)
    fresh: bool = option(False, "move an existing output folder aside", identity=False)

    def read_jobs(self) -> list[Job]:
        """List the images to sample."""
        from guidance.runs.run import read_jobs

        subset = {"category": self.category, "edits": self.edits}
        return read_jobs(self.prompts, self.num_prompts, self.seeds_per_prompt, self.seed, **subset)

    def head_guide(self, **others: Any) -> MidBlockGuide:
        """Return the guide by a head, with other options than those here; nothing is loaded."""
        names = ("objective", "target", "normalize", "every", "space")
        return MidBlockGuide(**{name: getattr(self, name) for name in names}, **others)

    def load_pipeline(self) -> Pipeline:
        """Load the model, in each of several processes on its device."""
        from guidance.models.pipelines import load_on
        from guidance.utils.processes import join_processes

        return load_on(join_processes(), self.model, revision=self.revision, device=self.device, dtype=self.dtype)
