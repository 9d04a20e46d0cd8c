"""Choose the guidance scale: the arm with the best metric within limits, from the summary of eval.images.

    python -m eval.recommend runs/sweeps/NAME                                    # the best truth (or CLIP score)
    python -m eval.recommend runs/sweeps/NAME metric=clip_score 'limit=[fd<=1.2x, object>=-0.02, clipping<=0.01]'

A limit is KEY<=NUMBER or KEY>=NUMBER, of the difference from the baseline; with an x after the number, of the ratio to
it: fd<=1.5x allows a Frechet distance one and a half times the baseline's.
"""

from __future__ import annotations

import csv
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guidance.utils.config import option, parse_config
from guidance.utils.errors import UserError, friendly_errors, nearest
from guidance.utils.io import read_json

PREFERRED = ("truth", "clip_score")
PLAIN_CFG = "plain CFG"
_LIMIT = re.compile(r"\s*([\w.-]+)\s*(<=|>=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*(x?)\s*", re.I)


@dataclasses.dataclass(frozen=True)
class Limit:
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
        sign = "<=" if self.at_most else ">="
        of = "x the baseline's" if self.ratio else " from the baseline's"
        return f"{self.key} {sign} {self.bound:g}{of}"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An arm within or beyond the limits.

    Attributes:
        arm: Its name.
        gain: Difference from the baseline in the metric; larger is better.
        difference, interval: The same as measured, with its 95% interval over prompts.
        broken: Limits that it breaks.
    """

    arm: str
    gain: float
    difference: float
    interval: tuple[float, float]
    broken: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The chosen arm.

    Attributes:
        metric: Title of the metric that was optimised.
        baseline: Arm with which all are compared.
        best: The best guided arm within the limits; None if there is none.
        rival: The best arm of plain CFG within the limits; None if there is none.
        versus: Paired difference of best less rival with its interval; None if it is not known.
        beats_cfg: Best is better than rival, by the interval of their paired difference if it is known; None if one of
            them is missing.
        tried: Number of guided arms.
        text: The same in sentences.
    """

    metric: str
    baseline: str
    best: Candidate | None
    rival: Candidate | None
    versus: tuple[float, tuple[float, float]] | None
    beats_cfg: bool | None
    tried: int
    text: str


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
    chosen = _metric(summary, metric)
    checks = [Limit.read(text) for text in limits]
    for check in checks:
        _require_key(summary, check.key)
    found = [_candidate(summary, chosen, arm["name"], checks) for arm in _arms(summary)]
    plain = {arm["name"] for arm in _arms(summary) if arm["series"] == PLAIN_CFG}
    guided = [c for c in found if c.arm not in plain]
    if not guided:
        raise UserError("Expected guided arms to choose from, got none; sweep over scales other than 0.")
    best, rival = _best(guided), _best([c for c in found if c.arm in plain])
    sign = 1 if chosen["better"] == "higher" else -1
    versus = _versus(rows, chosen["key"], best, rival)
    beats = None
    if best is not None and rival is not None:
        low, high = (0.0, 0.0) if versus is None else versus[1]
        beats = best.gain > rival.gain if versus is None else (low if sign > 0 else -high) > 0
    result = Recommendation(chosen["title"], summary["baseline"], best, rival, versus, beats, len(guided), "")
    return dataclasses.replace(result, text=" ".join(_sentences(result, guided, checks, bool(plain))))


def _metric(summary: Mapping[str, Any], key: str | None) -> Mapping[str, Any]:
    known = {m["key"]: m for m in summary["image_metrics"] if m["better"]}
    if key is None:
        key = next((name for name in PREFERRED if name in known), next(iter(known), ""))
    if key not in known:
        raise UserError(f"Expected a metric with a better direction, got '{key}'.{nearest(key, known)}")
    return known[key]


def _require_key(summary: Mapping[str, Any], key: str) -> None:
    known = [m["key"] for m in (*summary["image_metrics"], *summary["set_metrics"])]
    if key not in known:
        raise UserError(f"Expected a limit on a metric that was measured, got '{key}'.{nearest(key, known)}")


def _arms(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [arm for arm in summary["arms"] if arm["name"] != summary["baseline"] and arm["series"] != "baseline"]


def _candidate(summary: Mapping[str, Any], metric: Mapping[str, Any], arm: str, limits: Sequence[Limit]) -> Candidate:
    delta = _delta(summary, metric["key"], arm)
    assert delta is not None
    paired = delta["paired"]
    gain = paired["mean_diff"] if metric["better"] == "higher" else -paired["mean_diff"]
    broken = tuple(str(limit) for limit in limits if not limit.allows(*_values(summary, limit.key, arm)))
    ends = tuple(float("nan") if end is None else end for end in paired["interval"])
    return Candidate(arm, gain, paired["mean_diff"], (ends[0], ends[1]), broken)


def _values(summary: Mapping[str, Any], key: str, arm: str) -> tuple[float, float]:
    """Return the baseline's value of a metric, and an arm's; NaN where it was not measured."""
    delta = _delta(summary, key, arm)
    if delta is not None:
        return delta["paired"]["mean_a"], delta["paired"]["mean_b"]
    values = {v["arm"]: v["value"] for v in summary["set_values"] if v["metric"] == key}
    base, value = (values.get(name) for name in (summary["baseline"], arm))
    return float("nan") if base is None else base, float("nan") if value is None else value


def _delta(summary: Mapping[str, Any], key: str, arm: str) -> Mapping[str, Any] | None:
    return next((d for d in summary["deltas"] if (d["metric"], d["arm"]) == (key, arm)), None)


def _best(candidates: Sequence[Candidate]) -> Candidate | None:
    return max((c for c in candidates if not c.broken), key=lambda c: c.gain, default=None)


def _versus(
    rows: Sequence[Mapping[str, Any]] | None, key: str, best: Candidate | None, rival: Candidate | None
) -> tuple[float, tuple[float, float]] | None:
    """Return the paired difference of two arms over prompts."""
    if rows is None or best is None or rival is None:
        return None
    values: dict[str, dict[tuple[str, str], float]] = {best.arm: {}, rival.arm: {}}
    for row in rows:
        if row["arm"] in values and row.get(key) not in (None, ""):
            values[row["arm"]][row["prompt_id"], str(row["seed"])] = float(row[key])
    pairs = [pair for pair in values[rival.arm] if pair in values[best.arm]]
    if len({prompt for prompt, _ in pairs}) < 2:
        return None
    import numpy as np

    from eval.stats.paired import paired_difference

    a, b = (np.array([values[arm][pair] for pair in pairs]) for arm in (rival.arm, best.arm))
    found = paired_difference(a, b, [prompt for prompt, _ in pairs])
    return found.mean_diff, found.interval


def _sentences(
    found: Recommendation, guided: Sequence[Candidate], limits: Sequence[Limit], has_plain: bool
) -> list[str]:
    within = f" within {' and '.join(map(str, limits))}" if limits else ""
    if found.best is None:
        least = max(guided, key=lambda c: c.gain)
        return [f"No guided cell is{within}: the best, '{least.arm}', breaks {' and '.join(least.broken)}."]
    best = found.best
    lines = [
        f"Best {found.metric}{within}: '{best.arm}', {best.difference:+.3g} {_ends(best.interval)} against "
        f"'{found.baseline}', paired by prompt."
    ]
    if not (best.interval[0] > 0 or best.interval[1] < 0) or best.gain <= 0:
        lines.append("That is no improvement that these prompts can show.")
    if found.rival is None:
        lines.append(
            f"No cell of plain CFG is{within}." if has_plain else "No cell of plain CFG was sampled (cfg_matched=true)."
        )
    else:
        how = (
            "by its mean, not tested"
            if found.versus is None
            else f"{found.versus[0]:+.3g} {_ends(found.versus[1])}, paired"
        )
        verdict = f"'{best.arm}' beats" if found.beats_cfg else "No guided cell beats"
        lines.append(f"{verdict} the best plain CFG within the same limits, '{found.rival.arm}' ({how}).")
    if found.tried > 1:
        chosen = f"It was chosen among {found.tried} cells on these very prompts, which flatters it"
        lines.append(f"{chosen}: confirm it with another seed.")
    return lines


def _ends(interval: Sequence[float]) -> str:
    return f"[{interval[0]:+.3g}, {interval[1]:+.3g}]"


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
