"""Ask people which of two images they prefer, blind; and say what their votes show.

    python -m eval.preference serve runs/samples/NAME                   # a page for raters on this machine
    python -m eval.preference serve runs/samples/NAME host=0.0.0.0      # for others; prints an address with a token
    python -m eval.preference report runs/samples/NAME                  # preference.html, summary.json
    python -m eval.preference export runs/samples/NAME                  # votes.csv, votes.jsonl
    python -m eval.preference merge runs/samples/NAME other/votes.jsonl # votes of another machine
    python -m eval.preference simulate runs/samples/NAME studies=1000   # simulated raters; coverage of the intervals

A study lies in RUN/preference/NAME.  Options, also after 'serve --help': key=value.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from guidance.utils.config import list_words, option, parse_config
from guidance.utils.errors import UserError, friendly_errors, nearest


@dataclasses.dataclass
class FolderConfig:
    """Options of every command."""

    folders: list[str] = option([], "run with records, or plain folders; words without '=' are added")
    study: str = option("main", "name of the study; a run may have several")


@dataclasses.dataclass
class StudyConfig(FolderConfig):
    """Options that make a study; they hold from its first start on."""

    compare: Literal["baseline", "adjacent", "all"] = option(
        "baseline", "which pairs of arms: each with the baseline, each with the next scale, all"
    )
    baseline: str | None = option(None, "arm the others are compared with; null: unguided, or the first")
    arms: list[str] = option([], "arms to compare, besides the baseline; empty: all")
    vary: list[str] = option([], "record fields in which pairs differ on purpose: scheduler, num_steps, ...")
    prompts: str | None = option(None, "table with file_name and prompt, for plain folders")
    exclude: bool = option(False, "leave out, and count, pairs with a missing or broken image")
    questions: list[str] = option(["looks"], "looks: which looks better; fits: which fits the prompt better")
    per_rater: int | None = option(100, "pairs a rater is asked; null: all")
    shared: float = option(0.2, "share of them that every rater is asked, so that raters can be compared")
    repeats: float = option(0.05, "pairs asked twice, per pair")
    checks: float = option(0.05, "attention checks, per pair")
    detect: float = option(0.55, "preference rate that the study is to tell from a half")
    power: float = option(0.8, "probability that it does")
    seed: int = option(0, "of queues and sides")


@dataclasses.dataclass
class ServeConfig(StudyConfig):
    """Options of ``serve``."""

    host: str = option("127.0.0.1", "address to listen on; any but this machine's own asks for a token")
    port: int = option(7860, "port; 0 takes a free one")
    token: bool = option(False, "ask for a token on this machine's own address, too")


@dataclasses.dataclass
class ReportConfig(FolderConfig):
    """Options of ``report``."""

    evaluation: str | None = option(None, "folder of eval.images' results; null: RUN/eval")
    attention: float = option(
        0.7, "raters who pass fewer of their attention checks are not counted; 0: all are"
    )
    join: bool = option(True, "put the section into the report.html of the evaluation, too")


@dataclasses.dataclass
class MergeConfig(FolderConfig):
    """Options of ``merge``."""

    files: list[str] = option([], "files of votes, or folders of such files; words after the first are added")


@dataclasses.dataclass
class SimulateConfig(StudyConfig):
    """Options of ``simulate``."""

    study: str = option("simulated", "name of the study; one with people's votes is refused")
    raters: int = option(8, "simulated raters")
    noise: float = option(1.0, "scale of their logistic noise, in units of the truth score")
    tie: float = option(0.3, "differences they call a tie, in the same unit")
    position: float = option(0.0, "what the left image has over the right one, in the same unit")
    random_raters: float = option(0.0, "share of raters who answer at random")
    skip: float = option(0.01, "share of pairs skipped")
    studies: int = option(0, "simulated studies for the coverage of the intervals; 1000 takes half a minute")


def serve(config: ServeConfig) -> None:
    """Open the page until Ctrl-C.

    Raises:
        UserError: If the run has no pairs, the study is another one's, another server is at work on it, or the address
            cannot be had.
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
            raise UserError(
                f"Expected to be the only server of '{study.folder}', but {claims.holder('server')} is one; "
                "stop it, or send raters there."
            )
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


def report(config: ReportConfig) -> Path:
    """Write the report of a study; returns its path."""
    from eval.preference.analysis import analyse
    from eval.preference.report import headline, write_preference
    from eval.preference.study import find_images, load_study, study_folder

    folder = study_folder(config.folders, config.study)
    study = load_study(folder)
    evaluation = Path(config.evaluation or Path(config.folders[0]) / "eval")
    if config.evaluation and not (evaluation / "rows.parquet").is_file():
        raise UserError(f"Expected the results of eval.images in '{evaluation}', found none; check the path.")
    files = find_images(config.folders, study)
    found = analyse(study, folder, evaluation, attention=config.attention, files=files)
    path = write_preference(found, folder, evaluation / "report.html" if config.join else None)
    print(f"{found['votes_cast']} votes by {len(found['raters'])} raters, {found['votes_counted']} counted.")
    for told in found["questions"].values():
        print(f"\n{told['text']}")
        for rate in told["rates"]:
            print(headline(rate))
    print(f"\nreport: {path}")
    return path


def export(config: FolderConfig) -> Path:
    """Write all votes of a study as one file of lines, for ``merge``, and those that hold as a table."""
    import pandas

    from eval.preference.study import load_study, study_folder
    from eval.preference.votes import read_lines, standing, write_lines
    from guidance.utils.io import atomic_path

    folder = study_folder(config.folders, config.study)
    load_study(folder)
    lines = read_lines(folder)
    write_lines(folder / "votes.jsonl", lines)
    rows = []
    for vote in standing(lines):
        told = {k: v for k, v in dataclasses.asdict(vote).items() if k != "answers"}
        for question, choice in (vote.answers or {}).items():
            rows.append(
                told | {"question": question, "choice": choice, "preferred": vote.preferred(question)}
            )
    with atomic_path(folder / "votes.csv") as temporary:
        pandas.DataFrame(rows).to_csv(temporary, index=False)
    print(f"{len(rows)} answers: {folder / 'votes.csv'}, {folder / 'votes.jsonl'}")
    return folder / "votes.csv"


def merge(config: MergeConfig) -> int:
    """Add the votes of other machines to a study; returns how many lines were new."""
    from eval.preference import votes as preference_votes
    from eval.preference.study import load_study, study_folder

    folder = study_folder(config.folders[:1], config.study)
    files = [*config.folders[1:], *config.files]
    if not files:
        raise UserError("Expected files of votes to merge, got none; name them after the run.")
    added = preference_votes.merge(folder, files, load_study(folder).id)
    print(f"{added} new votes in {folder}")
    return added


def simulate(config: SimulateConfig) -> None:
    """Let simulated raters vote through the store, and check how often the intervals cover the true rate."""
    from eval.preference.models import read_evaluation
    from eval.preference.simulate import (
        Crowd,
        coverage_table,
        image_qualities,
        quality_differences,
        simulate_votes,
        true_rate,
    )
    from eval.preference.study import find_images
    from eval.preference.votes import VoteStore

    names = [field.name for field in dataclasses.fields(Crowd)]
    crowd = Crowd(**{name: getattr(config, name) for name in names})
    study = _open(config)
    store = VoteStore(study.folder)
    if store.has_people():
        raise UserError(
            f"Expected a study without people's votes, but '{study.folder}' has some; name another: study=NAME."
        )
    rows, _ = read_evaluation(Path(config.folders[0]) / "eval")
    what, quality = image_qualities(study, find_images(config.folders, study), rows, config.seed)
    stored = simulate_votes(study, store, quality, crowd, config.seed)
    print(f"{stored} answers by {crowd.raters} simulated raters who follow {what}, in {study.folder}")
    for first, second in study.comparisons:
        differences = quality_differences(study, quality, first, second)
        print(f"true rate of '{second}' over '{first}': {100 * true_rate(differences, crowd):.1f}%")
    if config.studies:
        differences = quality_differences(study, quality, *study.comparisons[-1])
        print(f"\n{coverage_table(differences, crowd, studies=config.studies, seed=config.seed)}")


def _open(config: StudyConfig) -> Any:
    """Make the study of the options, or go on with it."""
    from eval.preference.stats import votes_needed
    from eval.preference.study import StudyOptions, open_study, study_folder

    names = ("compare", "questions", "seed", "per_rater", "shared", "repeats", "checks")
    chosen: dict[str, Any] = {name: getattr(config, name) for name in names}
    options = StudyOptions(**chosen, target=votes_needed(config.detect, config.power))
    loading = {name: getattr(config, name) for name in ("baseline", "vary", "prompts", "exclude")}
    folder = study_folder(config.folders, config.study)
    return open_study(folder, config.folders, options, only=config.arms, **loading)


def _describe(study: Any, votes: int) -> str:
    """What is asked and how many votes it takes, in a few lines."""
    o, pairs = study.options, len(study.comparisons)
    total = o.target * pairs
    each = min(o.per_rater or len(study.items), len(study.items))
    return (
        f"{len(study.items)} pairs of images, {pairs} pairs of arms: "
        f"{'; '.join(f'{b} against {a}' for a, b in study.comparisons)}\n"
        f"{o.target} independent votes a pair of arms show the preference rate that was asked for (detect=, power=), "
        f"{total} in all: {-(-total // each)} raters of {each} pairs. Ties, and several votes a prompt, make it more.\n"
        f"{votes} votes so far, in {study.folder}"
    )


_COMMANDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "serve": (ServeConfig, serve),
    "report": (ReportConfig, report),
    "export": (FolderConfig, export),
    "merge": (MergeConfig, merge),
    "simulate": (SimulateConfig, simulate),
}


@friendly_errors("eval.preference")
def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this script."""
    command, *words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command not in _COMMANDS:
        raise UserError(f"Expected a command first, got '{command}'.{nearest(command, _COMMANDS)}")
    kind, run = _COMMANDS[command]
    prog = f"python -m eval.preference {command}"
    run(
        parse_config(
            kind, list_words(words, "folders"), prog=prog, description=(run.__doc__ or "").splitlines()[0]
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
