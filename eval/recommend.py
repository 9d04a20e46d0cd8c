"""Choose the guidance scale: the arm with the best metric within limits, from the summary of eval.images.

    python -m eval.recommend runs/sweeps/NAME                                    # the best truth (or CLIP score)
    python -m eval.recommend runs/sweeps/NAME metric=clip_score 'limit=[fd<=1.2x, object>=-0.02, clipping<=0.01]'

A limit is KEY<=NUMBER or KEY>=NUMBER, of the difference from the baseline; with an x after the number, of the ratio to
it: fd<=1.5x allows a Frechet distance one and a half times the baseline's.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval.stats.tables import with_interval
from guidance.utils.config import option, parse_config
from guidance.utils.errors import UserError, friendly_errors, nearest
from guidance.utils.io import read_json

PREFERRED = ("truth", "clip_score")
PLAIN_CFG = "plain CFG"
_LIMIT = re.compile(r"\s*([\w.-]+)\s*(<=|>=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*(x?)\s*", re.I)


class Limit(NamedTuple):
    """A constraint: ``key`` is at most (or at least) ``bound``, as a difference from the baseline or a ratio to it."""

    key: str
    at_most: bool
    bound: float
    ratio: bool

    @classmethod
    def read(cls, text: str) -> Limit:
        """Parse ``fd<=1.5x`` or ``object>=-0.02``.

        >>> Limit.read("fd<=1.5x")
        Limit(key='fd', at_most=True, bound=1.5, ratio=True)
        """
        found = _LIMIT.fullmatch(text)
        if found is None:
            raise UserError(f"Expected a limit such as fd<=1.5x or object>=-0.02, got '{text}'.")
        key, sign, number, x = found.groups()
        return cls(key, sign == "<=", float(number), bool(x))

    def allows(self, baseline: float, value: float) -> bool:
        """Tell whether a value is within the limit; one that is not finite never is."""
        if self.ratio and baseline <= 0:
            raise UserError(f"Expected {self.key} above 0 for a limit with x, got {baseline:g}; give a difference.")
        moved = value / baseline if self.ratio else value - baseline
        return moved <= self.bound if self.at_most else moved >= self.bound

    def __str__(self) -> str:
        of = "x the baseline's" if self.ratio else " from the baseline's"
        return f"{self.key} {'<=' if self.at_most else '>='} {self.bound:g}{of}"


class Candidate(NamedTuple):
    """An arm, its difference from the baseline with the 95% interval over prompts, and the limits that it breaks."""

    arm: str
    gain: float  # the difference, positive where the metric is better
    difference: float
    interval: tuple[float, float]
    broken: list[str]


class Recommendation(NamedTuple):
    """The best guided arm, and the best one of plain CFG, within the limits; None where there is none."""

    metric: str
    best: Candidate | None
    rival: Candidate | None
    versus: tuple[float, tuple[float, float]] | None  # best less rival, paired, with its interval, where it is known
    tried: int  # number of guided arms
    beats_cfg: bool | None  # by that interval, else by the gains; None without best or rival
    text: str  # the same in sentences


def recommend(
    summary: Mapping[str, Any],
    *,
    metric: str | None = None,
    limits: Sequence[str] = ("fd<=1.5x",),
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> Recommendation:
    """Name the guided arm with the best metric within limits, and say whether plain CFG does as well.

    Args:
        summary: Content of ``summary.json``.
        metric: Key of an image metric with a better direction; None takes the first available of `PREFERRED`.
        limits: See :meth:`Limit.read`; keys of image metrics or of set metrics.
        rows: Content of ``rows.csv``, for the paired difference from plain CFG; None compares the two means only.

    Raises:
        UserError: If there is no such metric, or nothing to choose from.
    """
    directed = {m["key"]: m for m in summary["image_metrics"] if m["better"]}
    if metric is None:
        metric = next((name for name in PREFERRED if name in directed), next(iter(directed), ""))
    if metric not in directed:
        raise UserError(f"Expected a metric with a better direction, got '{metric}'.{nearest(metric, directed)}")
    checks = [Limit.read(text) for text in limits]
    known = [m["key"] for m in (*summary["image_metrics"], *summary["set_metrics"])]
    for check in checks:
        if check.key not in known:
            hint = nearest(check.key, known)
            raise UserError(f"Expected a limit on a metric that was measured, got '{check.key}'.{hint}")
    sign = 1 if directed[metric]["better"] == "higher" else -1
    guided: list[Candidate] = []
    plain: list[Candidate] = []
    for arm in summary["arms"]:
        if arm["name"] != summary["baseline"] and arm["series"] != "baseline":
            side = plain if arm["series"] == PLAIN_CFG else guided
            side.append(_candidate(summary, metric, sign, arm["name"], checks))
    if not guided:
        raise UserError("Expected guided arms to choose from, got none; sweep over scales other than 0.")
    best, rival = (max((c for c in x if not c.broken), key=lambda c: c.gain, default=None) for x in (guided, plain))
    versus = beats = None
    if best is not None and rival is not None:
        versus = _versus(rows or (), metric, best.arm, rival.arm)
        beats = best.gain > rival.gain if versus is None else min(sign * end for end in versus[1]) > 0
    found = Recommendation(directed[metric]["title"], best, rival, versus, len(guided), beats, "")
    within = f" within {' and '.join(map(str, checks))}" if checks else ""
    if best is None:
        least = max(guided, key=lambda c: c.gain)
        text = f"No guided cell is{within}: the best, '{least.arm}', breaks {' and '.join(least.broken)}."
    else:
        text = " ".join(_sentences(found, best, within, summary["baseline"], bool(plain)))
    return found._replace(text=text)


def _candidate(summary: Mapping[str, Any], metric: str, sign: int, arm: str, limits: Sequence[Limit]) -> Candidate:
    paired = {d["metric"]: d["paired"] for d in summary["deltas"] if d["arm"] == arm}
    sets = {(v["metric"], v["arm"]): v["value"] for v in summary["set_values"]}

    def values(key: str) -> Iterator[float]:
        """Yield the baseline's value of a metric and the arm's; NaN where it was not measured."""
        for name, side in ((summary["baseline"], "mean_a"), (arm, "mean_b")):
            value = paired[key][side] if key in paired else sets.get((key, name))
            yield math.nan if value is None else value

    broken = [str(limit) for limit in limits if not limit.allows(*values(limit.key))]
    difference = paired[metric]["mean_diff"]
    low, high = (math.nan if end is None else end for end in paired[metric]["interval"])
    return Candidate(arm, sign * difference, difference, (low, high), broken)


def _versus(
    rows: Sequence[Mapping[str, Any]], key: str, best: str, rival: str
) -> tuple[float, tuple[float, float]] | None:
    """Return the paired difference of two arms over prompts; None if too few have both."""
    values: dict[str, dict[tuple[str, str], float]] = {best: {}, rival: {}}
    for row in rows:
        if row["arm"] in values and row.get(key) not in (None, ""):
            values[row["arm"]][row["prompt_id"], str(row["seed"])] = float(row[key])
    pairs = [pair for pair in values[rival] if pair in values[best]]
    if len({prompt for prompt, _ in pairs}) < 2:
        return None
    import numpy as np

    from eval.stats.paired import paired_difference

    a, b = (np.array([values[arm][pair] for pair in pairs]) for arm in (rival, best))
    found = paired_difference(a, b, [prompt for prompt, _ in pairs])
    return found.mean_diff, found.interval


def _sentences(found: Recommendation, best: Candidate, within: str, baseline: str, has_plain: bool) -> Iterator[str]:
    moved = with_interval(best.difference, best.interval, "+.3g")
    yield f"Best {found.metric}{within}: '{best.arm}', {moved} against '{baseline}', paired by prompt."
    if not (best.interval[0] > 0 or best.interval[1] < 0) or best.gain <= 0:
        yield "That is no improvement that these prompts can show."
    if found.rival is not None:
        how = "by its mean, not tested" if found.versus is None else f"{with_interval(*found.versus, '+.3g')}, paired"
        verdict = f"'{best.arm}' beats" if found.beats_cfg else "No guided cell beats"
        yield f"{verdict} the best plain CFG within the same limits, '{found.rival.arm}' ({how})."
    else:
        yield f"No cell of plain CFG {f'is{within}' if has_plain else 'was sampled (cfg_matched=true)'}."
    if found.tried > 1:
        chosen = f"It was chosen among {found.tried} cells on these very prompts, which flatters it"
        yield f"{chosen}: confirm it with another seed."


@dataclasses.dataclass
class RecommendConfig:
    """Options of this script."""

    folder: str = option(dataclasses.MISSING, "folder of a run that eval.images has evaluated; a word without '='")
    metric: str | None = option(None, "image metric to be best in; null: truth, else the CLIP score")
    limit: list[str] = option(["fd<=1.5x"], "limits that must be kept; [] for none")


@friendly_errors("eval.recommend")
def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this script."""
    words = [
        word if word.startswith("-") or re.match(r"\w+=", word) else f"folder={word}"
        for word in (sys.argv[1:] if argv is None else argv)
    ]
    config = parse_config(RecommendConfig, words, prog="python -m eval.recommend", description=__doc__ or "")
    folder = Path(config.folder)
    folder = folder if (folder / "summary.json").is_file() else folder / "eval"
    summary = read_json(folder / "summary.json")
    with open(folder / "rows.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    print(recommend(summary, metric=config.metric, limits=config.limit, rows=rows).text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
