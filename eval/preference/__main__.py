"""Ask people which of two images they prefer, blind, and analyse their votes.

    python -m eval.preference serve runs/samples/NAME                   # a page for raters on this machine
    python -m eval.preference serve runs/samples/NAME host=0.0.0.0      # for others; prints an address with a token
    python -m eval.preference report runs/samples/NAME                  # preference.html, summary.json
    python -m eval.preference export runs/samples/NAME                  # votes.csv, votes.jsonl
    python -m eval.preference merge runs/samples/NAME other/votes.jsonl # votes of another machine
    python -m eval.preference simulate runs/samples/NAME studies=1000   # simulated raters; coverage of the intervals

A study lives in RUN/preference/NAME.  Options, also after 'serve --help': key=value.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.preference.config import (
    FolderConfig,
    MergeConfig,
    ReportConfig,
    ServeConfig,
    SimulateConfig,
    StudyConfig,
    StudyOptions,
)
from guidance.utils.config import list_words, parse_config
from guidance.utils.errors import UserError, friendly_errors, nearest

if TYPE_CHECKING:
    from eval.preference.study import Study


def serve(config: ServeConfig) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: If the run has no pairs, the study was made with other options, another server runs it, or the
            address is not available.
    """
    from eval.preference.desk import Desk
    from eval.preference.page import bind, build_app, is_loopback, require_ui, run_server
    from eval.preference.study import find_images, read_secret
    from eval.preference.votes import VoteStore
    from guidance.runs.claims import Claims

    require_ui()
    study = _open(config)
    with Claims(study.folder / ".server") as claims:
        if not claims.take_from_dead("server"):
            holder = claims.holder("server")
            raise UserError(f"Expected no other server of '{study.folder}', but {holder} is one; stop it.")
        listener = bind(config.host, config.port)
        secret = read_secret(study.folder)
        desk = Desk(study, find_images(config.folders, study), VoteStore(study.folder), secret)
        local = is_loopback(config.host)
        token = desk.token() if config.token or not local else None
        hosts = ["localhost", "127.0.0.1", "::1", "[::1]", config.host] if local else ["*"]
        print(_describe(study, desk.store.count()))
        name = platform.node() if config.host in ("0.0.0.0", "::") else config.host
        name = f"[{name}]" if ":" in name else name
        query = f"?token={token}" if token else ""
        print(f"Open http://{name}:{listener.getsockname()[1]}/{query}   (Ctrl-C stops)", flush=True)
        run_server(build_app(desk, token=token, hosts=hosts), listener)


def report(config: ReportConfig) -> None:
    """Write the report of a study."""
    from eval.preference.analysis import analyse
    from eval.preference.report import headline, write_preference
    from eval.preference.study import find_images, load_study, study_folder

    study = load_study(study_folder(config.folders, config.study))
    evaluation = Path(config.evaluation or Path(config.folders[0]) / "eval")
    if config.evaluation and not (evaluation / "rows.parquet").is_file():
        raise UserError(f"Expected the results of eval.images in '{evaluation}', found none; check the path.")
    files = find_images(config.folders, study)
    results = analyse(study, evaluation, attention=config.attention, files=files)
    path = write_preference(results, study.folder, evaluation / "report.html" if config.join else None)
    print(f"{results['votes_cast']} votes by {len(results['raters'])} raters, {results['votes_counted']} counted.")
    for question in results["questions"].values():
        print(f"\n{question['text']}", *map(headline, question["rates"]), sep="\n")
    print(f"\nreport: {path}")


def export(config: FolderConfig) -> None:
    """Write every line of a study's votes to one file, for ``merge``, and the current votes to a table."""
    import pandas

    from eval.preference.study import load_study, study_folder
    from eval.preference.votes import current_votes, read_lines, write_lines
    from guidance.utils.io import atomic_path

    folder = load_study(study_folder(config.folders, config.study)).folder
    lines = read_lines(folder)
    write_lines(folder / "votes.jsonl", lines)
    rows = []
    for vote in current_votes(lines):
        fields = {k: v for k, v in dataclasses.asdict(vote).items() if k != "answers"}
        for question, choice in (vote.answers or {}).items():
            answer = {"question": question, "choice": choice, "preferred": vote.preferred(question)}
            rows.append(fields | answer)
    with atomic_path(folder / "votes.csv") as temporary:
        pandas.DataFrame(rows).to_csv(temporary, index=False)
    print(f"{len(rows)} answers: {folder / 'votes.csv'}, {folder / 'votes.jsonl'}")


def merge(config: MergeConfig) -> None:
    """Add the votes of other machines to a study."""
    from eval.preference.study import load_study, study_folder
    from eval.preference.votes import merge_votes

    folder = study_folder(config.folders[:1], config.study)
    files = [*config.folders[1:], *config.files]
    if not files:
        raise UserError("Expected files of votes to merge, got none; name them after the run.")
    print(f"{merge_votes(folder, files, load_study(folder).id)} new votes in {folder}")


def simulate(config: SimulateConfig) -> None:
    """Let simulated raters vote, and check how often the intervals cover the true rate."""
    from eval.preference.models import read_evaluation
    from eval.preference.simulate import coverage_table, image_qualities, quality_difference, simulate_votes, true_rate
    from eval.preference.votes import VoteStore

    study = _open(config)
    store = VoteStore(study.folder)
    if store.has_people():
        raise UserError(f"Expected a study without people's votes, got '{study.folder}'; name another: study=.")
    rows, _ = read_evaluation(Path(config.folders[0]) / "eval")
    source, quality = image_qualities(study, rows, config.seed)
    stored = simulate_votes(study, store, quality, config, config.seed)
    print(f"{stored} answers by {config.raters} simulated raters who follow {source}, in {study.folder}")
    for first, second in study.comparisons:
        asked = [item for item in study.items if (item.first, item.second) == (first, second)]
        differences = [quality_difference(quality, item) for item in asked]
        print(f"true rate of '{second}' over '{first}': {100 * true_rate(differences, config):.1f}%")
    if config.studies:
        print(f"\n{coverage_table(differences, config, studies=config.studies, seed=config.seed)}")


def _open(config: StudyConfig) -> Study:
    """Make the study of the options, or continue it."""
    from eval.preference.stats import votes_needed
    from eval.preference.study import open_study, study_folder

    target = votes_needed(config.detect, config.power)
    names = [field.name for field in dataclasses.fields(StudyOptions) if field.name != "target"]
    options = StudyOptions(**{name: getattr(config, name) for name in names}, target=target)
    loading = {name: getattr(config, name) for name in ("baseline", "vary", "prompts", "exclude")}
    folder = study_folder(config.folders, config.study)
    return open_study(folder, config.folders, options, only=config.arms, **loading)


def _describe(study: Study, votes: int) -> str:
    """Describe in a few lines what is asked and how many votes it takes."""
    target, comparisons, pairs = study.options.target, study.comparisons, len(study.items)
    total = target * len(comparisons)
    each = min(study.options.per_rater or pairs, pairs)
    return (
        f"{pairs} pairs of images, {len(comparisons)} pairs of arms: "
        f"{'; '.join(f'{second} against {first}' for first, second in comparisons)}\n"
        f"{target} independent votes per pair of arms show the preference rate of interest (detect=, power=), "
        f"{total} in all: {-(-total // each)} raters of {each} pairs. Ties, and several votes per prompt, raise it.\n"
        f"{votes} votes so far, in {study.folder}"
    )


_COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "serve": (ServeConfig, serve),
    "report": (ReportConfig, report),
    "export": (FolderConfig, export),
    "merge": (MergeConfig, merge),
    "simulate": (SimulateConfig, simulate),
}


@friendly_errors("eval.preference")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    command, *words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command not in _COMMANDS:
        raise UserError(f"Expected a command first, got '{command}'.{nearest(command, _COMMANDS)}")
    kind, run = _COMMANDS[command]
    description = (run.__doc__ or "").splitlines()[0]
    words = list_words(words, "folders")
    run(parse_config(kind, words, prog=f"python -m eval.preference {command}", description=description))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
