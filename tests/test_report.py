"""The HTML report: what it says, what hostile text does to it, how large it is, and what a browser makes of it."""

from __future__ import annotations

import dataclasses
import html
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from eval.comparison.report.grids import thumbnail
from eval.comparison.report.page import render, write_report
from eval.comparison.report.plots import curves
from eval.comparison.report.text import focus_arm, headline, improved, primary_metric, verdict
from eval.comparison.results import ArmSummary, Breakdown, Caveat, Comparison, Delta, ImageMetric, SetMetric, SetValue
from eval.stats.paired import holm, paired_difference
from guidance.utils.errors import UserError

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</style></svg><b>&amp;$x_1$",
    "{{ 7*7 }} \ud800\x07",
]
CLIP = ImageMetric("clip_score", "CLIP score (judge CLIP)", "higher", "judge-clip", note="100 cos(image, text).")
SHARPNESS = ImageMetric("blur", "Blur", "lower", note="Lower is sharper.")
MOVED = ImageMetric("moved", "LPIPS to the baseline", "", note="How far an arm moves.")
FD = SetMetric("fd", "FD-judge", "lower", "Frechet distance to 2000 references.")
SETS = [
    FD,
    SetMetric("cmmd", "CMMD", "lower"),
    SetMetric("precision", "Precision", "higher"),
    SetMetric("recall", "Recall", "higher"),
]
GUIDED = [ArmSummary(f"aesthetic-{s:g}", 0, "guided by aesthetic", "mid-block", s, 3.0, 0.3) for s in (4, 1, 2)]
PLAIN = [ArmSummary(f"cfg-{s:g}", 0, "plain CFG", "", 0.0, s, 0.15) for s in (1.5, 5, 7.5)]


def picture(path: Path, size: int, rng: np.random.Generator) -> None:
    """Write a PNG of blocks with noise, about as hard to compress as a photograph."""
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-20, 20, smooth.shape)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)


def build(
    folder: Path,
    *,
    arms: Sequence[ArmSummary] = (*GUIDED, *PLAIN),
    metrics: Sequence[ImageMetric] = (CLIP, SHARPNESS, MOVED),
    sets: Sequence[SetMetric] = SETS,
    prompts: Sequence[str] = tuple(f"a photo of scene {i}" for i in range(24)),
    seeds: int = 2,
    size: int = 0,
    effect: float = 1.0,
    parts: bool = True,
) -> Comparison:
    """A comparison of made-up values; with `size`, each row has an image of that many pixels a side."""
    rng = np.random.default_rng(0)
    n = len(prompts) * seeds
    base = ArmSummary("unguided", n, "baseline", "", None, 3.0, 0.15)
    every = [base, *(dataclasses.replace(arm, n=n) for arm in arms)]
    rows: list[dict[str, Any]] = []
    noise = {metric.key: rng.normal(size=n) for metric in metrics}
    for a, arm in enumerate(every):
        strength = effect * ((arm.scale or 0) / 4 + ((arm.cfg_scale or 3) - 3) / 9)
        for i in range(n):
            path = folder / f"{a}" / f"{i}.png"
            if size:
                path.parent.mkdir(exist_ok=True)
                picture(path, size, rng)
            prompt = prompts[i // seeds]
            row = {"arm": arm.name, "prompt_id": f"p{i // seeds}", "prompt": prompt, "seed": i % seeds}
            row |= {"category": ("Animals", "Food & Beverage")[i // seeds % 2], "challenge": "", "image": str(path)}
            moving = {m.key: {"higher": 1, "lower": -1, "": 1}[m.better] for m in metrics}
            values = {
                key: 25 + float(noise[key][i]) + sign * strength + (0.4 * float(rng.normal()) if a else 0.0)
                for key, sign in moving.items()
            }
            rows.append(row | {"scale": arm.scale, "cfg_scale": arm.cfg_scale, "seconds": arm.seconds} | values)
    return Comparison(
        title="Aesthetic guidance on the testbed",
        command="python -m eval.images --run runs/a --baseline unguided",
        created="2026-11-21T12:00:00Z",
        provenance={
            "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
            "model": "testbed",
            "seeds": [0, 1],
            "empty": {},
        },
        baseline="unguided",
        arms=every,
        n_prompts=len(prompts),
        n_pairs=n,
        image_metrics=list(metrics),
        deltas=deltas(rows, every, metrics),
        set_metrics=list(sets),
        set_values=set_values(every, sets),
        breakdowns=breakdowns(every, metrics) if parts else [],
        caveats=[Caveat("biased", "FD is biased upwards at 48 images; compare arms only.")],
        rows=rows,
    )


def deltas(rows: Any, arms: Sequence[ArmSummary], metrics: Sequence[ImageMetric]) -> list[Delta]:
    found = []
    for metric in metrics:
        value = {arm.name: np.array([r[metric.key] for r in rows if r["arm"] == arm.name]) for arm in arms}
        prompts = [r["prompt_id"] for r in rows if r["arm"] == arms[0].name]
        pairs = [paired_difference(value[arms[0].name], value[a.name], prompts, resamples=200) for a in arms[1:]]
        adjusted = holm([p.wilcoxon_p for p in pairs]).tolist()
        found += [Delta(metric.key, a.name, p, q) for a, p, q in zip(arms[1:], pairs, adjusted, strict=True)]
    return found


def set_values(arms: Sequence[ArmSummary], sets: Sequence[SetMetric]) -> list[SetValue]:
    found = []
    for k, metric in enumerate(sets):
        first = 12.0 if metric.better == "lower" else 0.7
        for arm in arms:
            move = (0.3 * (arm.scale or 0) ** 1.5 + 0.5 * abs((arm.cfg_scale or 3) - 3)) * (1 + k) / 4
            value = first * (1 + move / 10) if metric.better == "lower" else first - move / 30
            rest: dict[str, Any] = {"difference": value - first, "p": 0.01, "p_holm": 0.03}
            blocks = (value * 1.1, value * 1.2, value * 1.15)
            found.append(SetValue(metric.key, arm.name, value, blocks, **({} if arm is arms[0] else rest)))
    return found


def breakdowns(arms: Sequence[ArmSummary], metrics: Sequence[ImageMetric]) -> list[Breakdown]:
    rng = np.random.default_rng(1)
    return [
        Breakdown(by, part, metric.key, arm.name, 12, float(d), (float(d) - 0.4, float(d) + 0.5))
        for by, values in {"category": ("Animals", "Food & Beverage"), "challenge": ("Basic", "Counting", "")}.items()
        for metric in metrics
        for arm in arms[1:]
        for part, d in zip(values, rng.normal(size=len(values)), strict=True)
    ]


class Page(HTMLParser):
    """What is in a page: its text, its tags with attributes, and the cells of its tables."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.results: list[list[str]] = []
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        self.open.append(tag)
        if tag == "tr":
            self.results.append([])
        elif tag in ("td", "th"):
            self.results[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.results[-1][-1] += f" {data.strip()}" if data.strip() else ""

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def images(self) -> list[dict[str, str]]:
        return [attrs for tag, attrs in self.tags if tag == "img"]

    def row(self, arm: str) -> list[str]:
        return next([cell.strip() for cell in row] for row in self.results if row and row[0].strip().startswith(arm))


def loads(source: str) -> list[str]:
    """Whatever a browser would fetch: attributes and CSS that name something outside the page."""
    named = [v for _, attrs in Page(source).tags for k, v in attrs.items() if k in ("src", "href", "srcset", "data")]
    named += re.findall(r"url\(\s*['\"]?([^)'\"]*)", source) + re.findall(r"@import[^;]*", source)
    return [value for value in named if not value.startswith(("data:image/", "#"))]


def well_formed(source: str) -> None:
    for svg in re.findall(r"<svg .*?</svg>", source, flags=re.S):
        ElementTree.fromstring(svg)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, str]:
    comparison = build(tmp_path_factory.mktemp("images"), size=64)
    return comparison, render(comparison)


def test_the_report_says_what_was_found(full: tuple[Comparison, str]) -> None:
    comparison, source = full
    page = Page(source)
    assert comparison.caveats[0].text in page.text and comparison.command in page.text
    delta = comparison.delta("clip_score", "aesthetic-4")
    assert delta is not None
    cell = page.row("aesthetic-4")[1]
    assert f"{delta.paired.mean_b:.2f}" in cell and f"▲ {delta.paired.mean_diff:+.2f} [" in cell
    assert f"{100 * delta.paired.share_improved:.0f}% [" in cell and "p < 0.001" in cell
    assert page.row("unguided")[1] == f"{comparison.mean('clip_score', 'unguided'):.2f}"
    assert "2.00 ×" in source
    order = [source.index(part) for part in ('class="headline"', 'id="caveats"', 'id="results"', 'id="tradeoffs"')]
    rest = ("differences", "images", "cost", "definitions", "provenance")
    order += [source.index(f'<section id="{part}"') for part in rest]
    assert order == sorted(order)
    for metric in (*comparison.image_metrics, *comparison.set_metrics):
        assert metric.title in page.text and metric.note in page.text
    assert "Best" in page.text and "extremes, not typical" in page.text and "drawn at random (seed 0)" in page.text


def test_elements_have_names_and_ids_of_their_own(full: tuple[Comparison, str]) -> None:
    page = Page(full[1])
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    plots = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(plots) > 10 and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in plots)
    assert len(page.images()) == 3 * 6 * 7 and all(attrs["alt"] for attrs in page.images())
    well_formed(full[1])
    assert full[1].count("<style") == 1  # matplotlib's would hold for the whole page
    assert set(re.findall(r"var\((--\w+)\)", full[1])) <= set(re.findall(r"(--\w+):", full[1]))
    drawn = {c for svg in re.findall(r"<svg .*?</svg>", full[1], flags=re.S) for c in re.findall(r"\w+: #\w{6}", svg)}
    assert len(drawn) > 6 and all(f'[style*="{colour}"]' in full[1] for colour in drawn)  # each has a dark form


def test_the_same_comparison_gives_the_same_bytes(full: tuple[Comparison, str], tmp_path: Path) -> None:
    path = write_report(full[0], tmp_path / "new folder" / "report.html")
    assert path.read_text(encoding="utf-8") == full[1]
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_nothing_is_loaded(full: tuple[Comparison, str]) -> None:
    assert loads(full[1]) == []
    assert loads('<img src="http://a/b"><style>@import "x"; a { b: url(c) }</style>') != []
    assert "default-src 'none'" in full[1]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    arms = [dataclasses.replace(GUIDED[0], name=text, series=text, method=text) for text in HOSTILE]
    metric = dataclasses.replace(CLIP, title=HOSTILE[1], note=HOSTILE[0], evaluator=HOSTILE[2])
    comparison = build(tmp_path, arms=arms, metrics=[metric], sets=[FD], prompts=HOSTILE, size=8)
    comparison.rows[0]["image"] = f"{tmp_path}/{HOSTILE[1]}.png"
    provenance = {HOSTILE[0]: HOSTILE, "nested": {"deep": {HOSTILE[1]: HOSTILE[2]}}}
    comparison = dataclasses.replace(
        comparison,
        title=HOSTILE[0],
        command=HOSTILE[1],
        provenance=provenance,
        caveats=[Caveat(HOSTILE[0], HOSTILE[2])],
        breakdowns=[dataclasses.replace(b, value=HOSTILE[2], by=HOSTILE[0]) for b in comparison.breakdowns],
    )
    source = write_report(comparison, tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert not [k for _, attrs in page.tags for k in attrs if k.startswith("on")]
    assert loads(source) == [] and "49" not in Page(source).row("unguided")[0]
    well_formed(source)
    for text in HOSTILE[:3]:
        assert any(text in attrs["alt"] for attrs in page.images())
        assert text in page.text
    assert source.count("</style>") == 1 and source.count("</svg>") == source.count("<svg ")


def test_the_headline_is_honest(tmp_path: Path) -> None:
    clear = build(tmp_path)
    sentence, selection, rival, cost = headline(clear)
    assert sentence.startswith("“aesthetic-4” is better than “unguided” in CLIP score (judge CLIP): +")
    assert "of 24 prompts" in sentence and "[+" in sentence and "best change of 3 arms" in selection
    assert "plain CFG" in rival and "cfg-7.5" in rival and "2.00 times" in cost
    none = build(tmp_path, arms=GUIDED[:1], effect=0.0)
    assert "“aesthetic-4” is not shown to differ from “unguided”" in headline(none)[0]
    worse = build(tmp_path, arms=GUIDED[:1], effect=-1.0)
    assert "is worse than" in headline(worse)[0]
    unsure = [dataclasses.replace(d, p_holm=0.06) for d in clear.deltas]
    assert "is not shown to differ from" in headline(dataclasses.replace(clear, deltas=unsure))[0]
    assert "Nothing is compared" in headline(dataclasses.replace(clear, deltas=[]))[0]


def test_a_circular_metric_gives_no_headline(tmp_path: Path) -> None:
    circular = dataclasses.replace(CLIP, circular=("aesthetic-4",))
    one = build(tmp_path, metrics=[circular])
    assert "circular" in headline(one)[1] and "circular" in Page(render(one)).row("aesthetic-4")[1]
    chosen = primary_metric(build(tmp_path, metrics=[circular, MOVED, SHARPNESS]))
    assert chosen is not None and chosen.key == "blur"


def test_lower_is_better_is_turned_round(tmp_path: Path) -> None:
    delta = build(tmp_path, metrics=[SHARPNESS], arms=GUIDED[:1]).delta("blur", "aesthetic-4")
    assert delta is not None and delta.paired.mean_diff < 0 and verdict(delta, "lower") == "better"
    assert verdict(delta, "higher") == "worse" and verdict(delta, "") == "different"
    share, (low, high) = improved(delta, "lower")
    assert low < share < 1.0000001 and share == 1 - delta.paired.share_improved and high > low


def test_curves_pass_through_the_baseline_in_the_order_of_what_they_sweep(tmp_path: Path) -> None:
    arms = [*GUIDED, dataclasses.replace(GUIDED[0], name="negative", scale=-1.0), *PLAIN[::-1]]
    found = {series: [arm.name for arm in arms] for series, arms in curves(build(tmp_path, arms=arms)).items()}
    assert found["guided by aesthetic"] == ["negative", "unguided", "aesthetic-1", "aesthetic-2", "aesthetic-4"]
    assert found["plain CFG"] == ["cfg-1.5", "unguided", "cfg-5", "cfg-7.5"]


def test_rows_are_chosen_as_the_report_says(tmp_path: Path) -> None:
    comparison = build(tmp_path, arms=GUIDED, sets=[], metrics=[CLIP, SHARPNESS], parts=False)
    focus = focus_arm(comparison)
    assert focus is not None and focus.name == "aesthetic-4"
    source = render(comparison, sort_by="blur", arm="aesthetic-1", rows=3)
    assert "3 of 48 pairs, chosen by the change of Blur from the baseline to “aesthetic-1”" in source
    value = {(r["arm"], r["prompt"], r["seed"]): r["blur"] for r in comparison.rows}
    pairs = {(r["prompt"], r["seed"]) for r in comparison.rows}
    order = sorted(pairs, key=lambda key: value[("aesthetic-1", *key)] - value[("unguided", *key)])
    captions = re.findall(r'<bdi class="prompt">(.*?)</bdi> <span class="seed">seed (\d)', source)
    shown = [(prompt, int(seed)) for prompt, seed in captions]
    assert shown[:3] == order[:3] and shown[3:6] == order[:-4:-1]
    with pytest.raises(UserError, match="Did you mean 'blur'"):
        render(comparison, sort_by="blurr")
    with pytest.raises(UserError, match="aesthetic-1"):
        render(comparison, arm="unguided")


def test_a_broken_image_is_a_placeholder_with_its_name(tmp_path: Path) -> None:
    comparison = build(
        tmp_path, arms=GUIDED[:1], sets=[], metrics=[CLIP], prompts=["a", "b"], seeds=1, size=32, parts=False
    )
    (tmp_path / "0" / "0.png").write_bytes((tmp_path / "0" / "0.png").read_bytes()[:400])
    (tmp_path / "0" / "1.png").unlink()
    comparison.rows[3]["image"] = None
    page = Page(render(comparison))
    assert "not readable: 0.png" in page.text and "not readable: 1.png" in page.text and "no image" in page.text
    assert {attrs["alt"] for attrs in page.images()} == {"aesthetic-4, seed 0: a"}


def test_missing_values_are_dashes(tmp_path: Path) -> None:
    nan = float("nan")
    comparison = build(tmp_path, arms=GUIDED[:2], sets=[FD, SETS[1]], metrics=[CLIP, MOVED])
    empty = dataclasses.replace(
        comparison.deltas[0].paired, effect_size=nan, effect_interval=(nan, nan), interval=(nan, nan), mean_b=nan
    )
    comparison.deltas[0] = dataclasses.replace(comparison.deltas[0], paired=empty, p_holm=nan, excluded=5)
    comparison.set_values[1] = SetValue("fd", "aesthetic-4", nan, (), None, None, None)
    comparison.arms[1] = dataclasses.replace(comparison.arms[1], seconds=None, scale=None)
    for row in comparison.rows[::3]:
        row["clip_score"] = None
    source = render(comparison)
    cells = Page(source).row("aesthetic-4")
    assert cells[1].startswith("— ") and "5 images excluded" in cells[1] and "p —" in cells[1]
    assert cells[3] == "—" and cells[5] == "—"
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", re.sub(r"base64,[^\"]*", "", source))


@pytest.mark.parametrize("arms", [0, 1, 11])
def test_few_and_many_arms_and_nothing_but_them(tmp_path: Path, arms: int) -> None:
    many = [dataclasses.replace(GUIDED[0], name=f"arm {i}", scale=i + 1.0, series=f"s{i}") for i in range(arms)]
    comparison = build(tmp_path, arms=many, sets=[], metrics=[CLIP], parts=False)
    page = Page(
        render(dataclasses.replace(comparison, caveats=[], provenance={}, rows=comparison.rows[:5] if arms else []))
    )
    assert "Trade-off" not in page.text and "Caveats" not in page.text and "By category" not in page.text
    assert all(page.row(arm.name) for arm in comparison.arms)


def test_the_file_stays_small(tmp_path: Path) -> None:
    prompts = [f"a photo of scene {i}" for i in range(500)]
    comparison = build(tmp_path, arms=GUIDED, prompts=prompts, seeds=1, parts=False)
    for size in (64, 512):  # as many images as are shown, under the names of all
        for i in range(10):
            picture(tmp_path / f"{size}-{i}.png", size, np.random.default_rng(i))
        for i, row in enumerate(comparison.rows):
            row["image"] = str(tmp_path / f"{size}-{i % 10}.png")
        source = render(comparison)
        assert len(Page(source).images()) == 3 * 6 * 4
        assert len(source.encode()) < 5_000_000
        assert "6 of 500 pairs" in source


def test_thumbnails_keep_to_their_limit(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.fromarray(noise[:64, :64]).save(tmp_path / "small.png")
    assert max(len(thumbnail(tmp_path / "large.png", limit)[0]) - limit for limit in (40_000, 10_000)) <= 0
    assert thumbnail(tmp_path / "small.png", 40_000)[1] and not thumbnail(tmp_path / "large.png", 40_000)[1]
    (tmp_path / "text.png").write_text("no image")
    assert [thumbnail(tmp_path / name, 9)[0] for name in ("text.png", "none.png", "", "a\0b")] == [""] * 4


# The report in a frame of a given width.  `srcdoc` shares the origin, so that the page around it may measure.
WRAPPER = """<!doctype html><body style="margin:0">
<iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe><output></output><script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  const images = [...page.images];
  document.querySelector("output").textContent = [
    page.documentElement.scrollWidth, images.length, images.filter((i) => i.complete && i.naturalWidth > 0).length,
    page.querySelectorAll("svg.plot").length, getComputedStyle(page.querySelector("h1")).fontWeight,
  ].join(" ");
}});
</script>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    names = [os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))]
    for name in filter(None, names):  # one that is there may still be a stub that asks for a snap
        if subprocess.run([name, "--version"], capture_output=True).returncode == 0:
            return name
    pytest.skip("no Chromium that runs: apt-get install chromium, or set CHROMIUM to its binary")


@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it(full: tuple[Comparison, str], width: int, tmp_path: Path, chromium: str) -> None:
    file = tmp_path / "frame.html"
    file.write_text(WRAPPER.format(width=width, page=html.escape(full[1])), encoding="utf-8")
    command = [
        chromium,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += [f"--window-size={max(width, 600)},900", "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    measured = re.search(r"<output>([\d ]+)</output>", dom)
    assert measured, dom[-500:]
    scroll_width, images, decoded, plots, weight = map(int, measured.group(1).split())
    assert scroll_width == width
    assert images == decoded == len(Page(full[1]).images())
    assert plots == full[1].count("<svg ") and weight > 400
