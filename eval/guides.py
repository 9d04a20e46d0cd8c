"""Measure guides on the testbed: one table per study, all paired on the same prompts, seeds and noise.

python -m eval.guides classes            # a class head on the empty prompt, over all classes
python -m eval.guides clip               # a CLIP-embedding head, and CLIP on images, beside conditioning
python -m eval.guides discriminator      # Frechet distance, precision and recall with a discriminator
python -m eval.guides steering           # particles: best-of-N, Feynman-Kac, with and without gradients
python -m eval.guides amortised          # an adapter against the gradients that taught it
python -m eval.guides two_guides         # rating and class at once
python -m eval.guides overoptimisation   # truth against the head's own score as the scale grows; committees
python -m eval.guides cfg_variants       # variants of classifier-free guidance as partners of mid-u guidance
python -m eval.guides edits              # starting from an image (SDEdit) or a mask, on the testbed's edit pairs
python -m eval.guides STUDY --help       # options of a study

Choose settings with split=validation and report split=test.  A study that was killed resumes.  Several processes share
the sampling: OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m eval.guides STUDY
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from guidance.utils.config import parse_config
from guidance.utils.errors import UserError, friendly_errors, nearest

#: Modules of :mod:`eval.studies`, each with a ``Config`` and ``run(bench, config) -> rows``.
STUDIES = (
    "classes",
    "clip",
    "discriminator",
    "steering",
    "amortised",
    "two_guides",
    "overoptimisation",
    "cfg_variants",
    "edits",
)


def measure(study: str, config: Any) -> str | None:
    """Run a study.

    Args:
        study: One of :data:`STUDIES`.
        config: Its ``Config``.

    Returns:
        The table, which is also written to ``output/SPLIT/STUDY.md`` with its rows in ``STUDY.json`` (steering towards
        classes adds the head's name); None in all but the main one of several processes.

    Raises:
        UserError: If a head is missing or does not fit, or an option is out of range.
    """
    from eval.stats.tables import markdown
    from eval.studies.common import StudyBench
    from guidance.utils.io import atomic_path, check_writable, write_json

    bench = StudyBench(config)
    check_writable(bench.folder)
    rows = importlib.import_module(f"eval.studies.{study}").run(bench, config)
    if not bench.state.is_main_process:
        return None
    table, name = markdown(rows), config.table_name(study)
    write_json(bench.folder / f"{name}.json", {"config": dataclasses.asdict(config), "rows": rows})
    with atomic_path(bench.folder / f"{name}.md") as temporary:
        temporary.write_text(table + "\n", encoding="utf-8")
    return table


@friendly_errors("eval.guides")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: the name of a study, then its options."""
    study, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if study in ("", "-h", "--help"):
        print(__doc__)
        return 0
    if study not in STUDIES:
        raise UserError(f"Expected the name of a study, got '{study}'.{nearest(study, STUDIES)}")
    module = importlib.import_module(f"eval.studies.{study}")
    config = parse_config(
        module.Config, rest[:-1], prog=f"eval.guides {study}", description=module.__doc__ or ""
    )
    from guidance.utils.processes import join_processes, leave_processes

    table = measure(study, config)
    if table is not None:
        print(f"\n{table}")
    leave_processes(join_processes())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
