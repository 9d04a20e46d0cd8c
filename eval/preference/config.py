"""Options of a preference study and of its commands; the first line of a command's class describes it in its help."""

from __future__ import annotations

import dataclasses
from typing import Literal

from guidance.utils.config import option
from guidance.utils.errors import UserError

QUESTIONS = {"looks": "Which image looks better?", "fits": "Which image fits the prompt better?"}


@dataclasses.dataclass
class Plan:
    """Choice of the pairs of images that are asked, and of the raters' queues."""

    compare: Literal["baseline", "adjacent", "all"] = option(
        "baseline", "pairs of arms: each with the baseline, each with the next scale, or all"
    )
    questions: list[str] = option(["looks"], "looks: which looks better; fits: which fits the prompt better")
    seed: int = option(0, "seed of queues and sides")
    per_rater: int | None = option(100, "pairs per rater; null: all")
    shared: float = option(0.2, "share of them that every rater is asked, so that raters can be compared")
    repeats: float = option(0.05, "pairs asked twice, per pair; they measure a rater's consistency")
    checks: float = option(0.05, "attention checks, per pair: an image beside a damaged copy of it")
    target: int = option(0, "votes to collect for each pair of arms; 0: as many as detect= and power= need")

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("shared", "repeats", "checks")}
        if not all(0 <= share <= 1 for share in shares.values()):
            raise UserError(f"Expected shares in 0..1, got {shares}.")
        if self.target < 0 or (self.per_rater is not None and self.per_rater < 1):
            got = f"{self.per_rater} and {self.target}"
            raise UserError(f"Expected per_rater from 1 (null asks every pair) and target from 0, got {got}.")
        if sorted(self.questions) not in (["looks"], ["fits"], ["fits", "looks"]):
            raise UserError(f"Expected one or both of {', '.join(QUESTIONS)} as questions, got {self.questions}.")


@dataclasses.dataclass
class FolderConfig:
    """Write every line of a study's votes to one file, for 'merge', and the current votes to a table."""

    folders: list[str] = option([], "run with records, or plain folders; words without '=' are added")
    study: str = option("main", "name of the study; a run may have several")


@dataclasses.dataclass
class MergeConfig(FolderConfig):
    """Add the votes of other machines to a study."""

    files: list[str] = option([], "files of votes, or folders of such files; words after the first are added")


@dataclasses.dataclass
class ReportConfig(FolderConfig):
    """Write the report of a study."""

    evaluation: str | None = option(None, "folder of eval.images' results; null: RUN/eval")
    attention: float = option(0.7, "share of attention checks that a rater must pass to be counted; 0: all raters are")
    join: bool = option(True, "insert the section into the report.html of the evaluation, too")


@dataclasses.dataclass
class StudyConfig(Plan, FolderConfig):
    """Options that define a study; they are fixed at its first start."""

    baseline: str | None = option(None, "arm the others are compared with; null: unguided, or the first")
    arms: list[str] = option([], "arms to compare, besides the baseline; empty: all")
    vary: list[str] = option([], "record fields in which pairs differ on purpose: scheduler, num_steps, ...")
    prompts: str | None = option(None, "table with file_name and prompt, for plain folders")
    exclude: bool = option(False, "leave out, and count, pairs with a missing or broken image")
    detect: float = option(0.55, "preference rate that the study should distinguish from one half")
    power: float = option(0.8, "probability that it does")


@dataclasses.dataclass
class ServeConfig(StudyConfig):
    """Serve the page until Ctrl-C."""

    host: str = option("127.0.0.1", "address to listen on; any but this machine's own requires a token")
    port: int = option(7860, "port; 0 takes a free one")
    token: bool = option(False, "require a token on this machine's own address, too")


@dataclasses.dataclass
class SimulateConfig(StudyConfig):
    """Let simulated raters vote, and check how often the intervals cover the true rate."""

    study: str = option("simulated", "name of the study; one with people's votes is refused")
    studies: int = option(0, "simulated studies for the coverage of the intervals; 1000 takes half a minute")
    raters: int = option(8, "simulated raters")
    noise: float = option(1.0, "scale of their logistic noise, in units of the quality")
    tie: float = option(0.3, "half-width of the band of utilities that is a tie, in the same unit")
    position: float = option(0.0, "utility of the left position, in the same unit")
    random_raters: float = option(0.0, "share of raters who answer at random")
    skip: float = option(0.01, "share of pairs skipped")

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = 0 <= self.random_raters <= 1 and 0 <= self.skip < 1
        if not (self.raters >= 1 and self.noise > 0 and self.tie >= 0 and shares):
            raise UserError(
                "Expected raters from 1, noise above 0, tie from 0, random_raters in 0..1, skip in [0, 1), got "
                f"{self.raters}, {self.noise}, {self.tie}, {self.random_raters} and {self.skip}."
            )

    @property
    def careless(self) -> int:
        """Number of raters who answer at random; they come first."""
        return round(self.random_raters * self.raters)
