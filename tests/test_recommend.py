"""Choosing a scale from hand-made summaries: limits are kept, plain CFG is the rival, and luck is not hidden."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from eval.recommend import Limit, main, recommend
from guidance.utils.errors import UserError

BETTER = {"truth": "higher", "object": "higher", "blur": "lower", "move": ""}


def make_summary(arms: dict[str, dict[str, float]], plain: tuple[str, ...] = ()) -> dict:
    """Arms with a value of each metric; the interval of a difference is 0.1 to each side."""
    base = arms["unguided"]
    deltas = [
        {
            "metric": key,
            "arm": arm,
            "p_holm": 0.01,
            "paired": {
                "mean_a": base[key],
                "mean_b": values[key],
                "mean_diff": values[key] - base[key],
                "interval": [values[key] - base[key] - 0.1, values[key] - base[key] + 0.1],
            },
        }
        for arm, values in arms.items()
        for key in BETTER
        if arm != "unguided" and key in values
    ]
    series = {arm: "baseline" if arm == "unguided" else "plain CFG" if arm in plain else "guided by x" for arm in arms}
    return {
        "baseline": "unguided",
        "arms": [{"name": arm, "series": series[arm]} for arm in arms],
        "image_metrics": [{"key": k, "title": k, "better": b} for k, b in BETTER.items()],
        "set_metrics": [{"key": "fd", "title": "FD-judge", "better": "lower"}],
        "deltas": deltas,
        "set_values": [{"metric": "fd", "arm": arm, "value": values["fd"]} for arm, values in arms.items()],
    }


def values(truth: float, fd: float = 10.0, object: float = 0.9, blur: float = 1.0) -> dict[str, float]:
    return {"truth": truth, "fd": fd, "object": object, "blur": blur, "move": 0.0}


ARMS = {
    "unguided": values(0.0),
    "scale=1": values(0.5, fd=12, object=0.89),
    "scale=2": values(1.0, fd=14, object=0.85),
    "scale=3": values(2.0, fd=30, object=0.5),
    "cfg_scale=6": values(0.3, fd=11),
    "cfg_scale=9": values(0.8, fd=20),
}
PLAIN = ("cfg_scale=6", "cfg_scale=9")


def test_the_best_within_the_limits() -> None:
    summary = make_summary(ARMS, PLAIN)
    for limits, best, rival in (
        ([], "scale=3", "cfg_scale=9"),
        (["fd<=1.5x"], "scale=2", "cfg_scale=6"),
        (["fd<=2x"], "scale=2", "cfg_scale=9"),
        (["fd<=2.5"], "scale=1", "cfg_scale=6"),
        (["fd<=1.5x", "object>=-0.02"], "scale=1", "cfg_scale=6"),
        (["fd>=0.5x"], "scale=3", "cfg_scale=9"),
    ):
        found = recommend(summary, limits=limits)
        assert found.best is not None and found.best.arm == best and not found.best.broken
        assert found.rival is not None and found.rival.arm == rival
        assert found.metric == "truth" and found.beats_cfg and found.tried == 3
    found = recommend(summary)
    assert found.best is not None and found.best.interval == (0.9, 1.1)
    assert "'scale=2', +1 [+0.9, +1.1] against 'unguided'" in found.text and "fd <= 1.5x the baseline's" in found.text
    assert "chosen among 3 cells" in found.text and "'scale=2' beats the best plain CFG" in found.text
    assert "not tested" in found.text


def test_lower_can_be_better() -> None:
    arms = {"unguided": values(0, blur=1.0), "scale=1": values(0, blur=0.4), "scale=-1": values(0, blur=3.0)}
    found = recommend(make_summary(arms), metric="blur")
    assert found.best is not None and found.best.arm == "scale=1"
    assert found.best.gain == pytest.approx(0.6) and found.best.difference == pytest.approx(-0.6)
    assert found.beats_cfg is None and "No cell of plain CFG was sampled" in found.text


def test_it_says_when_nothing_is_won() -> None:
    far = recommend(make_summary(ARMS, PLAIN), limits=["fd<=1.01x"])
    assert far.best is None and far.beats_cfg is None
    assert "No guided cell is within fd <= 1.01x" in far.text and "'scale=3', breaks" in far.text
    for truth in (-0.5, 0.05):  # worse; within noise
        found = recommend(make_summary({"unguided": values(0), "scale=1": values(truth)}))
        assert found.best is not None and "no improvement that these prompts can show" in found.text
    beaten = recommend(make_summary({**ARMS, "cfg_scale=6": values(1.4)}, PLAIN))
    assert beaten.beats_cfg is False and "No guided cell beats the best plain CFG" in beaten.text
    no_rival = recommend(make_summary(ARMS, PLAIN), limits=["fd<=1.5x", "fd>=1.15x"])
    assert no_rival.rival is None and "No cell of plain CFG is within" in no_rival.text


def make_rows(differences: list[float]) -> list[dict]:
    """Rows as CSV gives them: text; the guided arm's truth is the rival's and a difference."""
    rows = []
    for i, difference in enumerate(differences):
        for arm, value in (("scale=2", i + difference), ("cfg_scale=6", float(i))):
            rows.append({"arm": arm, "prompt_id": f"p{i}", "seed": "0", "truth": str(value)})
    return rows


def test_plain_cfg_is_beaten_in_pairs_or_not_at_all() -> None:
    summary = make_summary(ARMS, PLAIN)
    clear = recommend(summary, rows=make_rows([0.5, 0.6, 0.7, 0.55, 0.65]))
    assert clear.versus is not None and clear.versus[0] == pytest.approx(0.6) and clear.beats_cfg
    assert "+0.6 [" in clear.text and "paired" in clear.text
    unclear = recommend(summary, rows=make_rows([2.0, -1.5, 0.8, -0.6, 1.0]))
    assert unclear.versus is not None and unclear.versus[0] > 0 and unclear.beats_cfg is False
    assert "No guided cell beats" in unclear.text
    one = recommend(summary, rows=make_rows([1.0]))
    assert one.versus is None and one.beats_cfg
    gaps = [row | {"truth": ""} if row["prompt_id"] == "p0" else row for row in make_rows([9.0, 0.5, 0.6, 0.7])]
    found = recommend(summary, rows=gaps)
    assert found.versus is not None and found.versus[0] == pytest.approx(0.6)


def test_what_was_not_measured_is_not_within() -> None:
    summary = make_summary(ARMS, PLAIN)
    next(v for v in summary["set_values"] if v["arm"] == "scale=2")["value"] = None
    found = recommend(summary)
    assert found.best is not None and found.best.arm == "scale=1"
    zero = make_summary({name: {**v, "fd": 0.0} for name, v in ARMS.items()}, PLAIN)
    with pytest.raises(UserError, match="fd above 0"):
        recommend(zero)
    assert not Limit.read("fd<=1x").allows(math.nan, 1.0)


@pytest.mark.parametrize(
    "options",
    [{"limits": [text]} for text in ("fd<1", "fd<=1.5y", "<=1", "fd<=1.2.3", "objekt>=0")]
    + [{"metric": "truht"}, {"metric": "move"}],  # move has no better direction
)
def test_limits_and_metrics_that_are_not_there_are_refused(options) -> None:
    with pytest.raises(UserError):
        recommend(make_summary(ARMS, PLAIN), **options)


def test_guided_arms_are_needed() -> None:
    with pytest.raises(UserError, match="guided arms to choose from"):
        recommend(make_summary({k: v for k, v in ARMS.items() if k in ("unguided", *PLAIN)}, PLAIN))


def test_from_the_command_line(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run" / "eval"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(make_summary(ARMS, PLAIN)))
    (folder / "rows.csv").write_text("arm,prompt_id,seed,truth\nscale=2,p0,0,1\n")
    assert main([str(tmp_path / "run"), "limit=[fd<=1.5x, object>=-0.02]"]) == 0
    assert "'scale=1'" in capsys.readouterr().out
