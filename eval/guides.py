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

from guidance.utils.config import parse_config
from guidance.utils.errors import UserError, friendly_errors, nearest

#: Modules of :mod:`eval.studies`, each with a ``Config`` and ``run(bench, config) -> rows``.
STUDIES = ["classes", "clip", "discriminator", "steering", "amortised"]
STUDIES += ["two_guides", "overoptimisation", "cfg_variants", "edits"]


@friendly_errors("eval.guides")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: the name of a study, then its options.

    The table is printed, and written to ``output/SPLIT/STUDY.md`` with its rows in ``STUDY.json`` (steering towards
    classes adds the head's name), by the main one of several processes.
    """
    study, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if study in ("", "-h", "--help"):
        print(__doc__)
        return 0
    if study not in STUDIES:
        raise UserError(f"Expected the name of a study, got '{study}'.{nearest(study, STUDIES)}")
    module = importlib.import_module(f"eval.studies.{study}")
    description = module.__doc__ or ""
    config = parse_config(module.Config, rest[:-1], prog=f"eval.guides {study}", description=description)

    from eval.stats.tables import markdown
    from eval.studies.common import StudyBench
    from guidance.utils.io import atomic_path, check_writable, write_json
    from guidance.utils.processes import leave_processes

    bench = StudyBench(config)
    check_writable(bench.folder)
    rows = module.run(bench, config)
    if bench.state.is_main_process:
        table, name = markdown(rows), config.table_name(study)
        write_json(bench.folder / f"{name}.json", {"config": dataclasses.asdict(config), "rows": rows})
        with atomic_path(bench.folder / f"{name}.md") as temporary:
            temporary.write_text(table + "\n", encoding="utf-8")
        print(f"\n{table}")
    leave_processes(bench.state)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
