"""The documentation site builds offline, without a warning, from README, docs/, notebooks and docstrings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocstrings_handlers.python")
pytest.importorskip("material")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


def test_readme_docs_notebooks_and_packages_have_pages(site: Path) -> None:
    pages = {str(page.relative_to(site)) for page in site.rglob("*.html")}
    expected = {f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")} | {"index.html", "changelog.html"}
    expected |= {f"notebooks/{page.stem}.html" for page in (ROOT / "docs" / "notebooks").glob("*.py")}
    packages = ("heads", "guides", "apply", "sampling", "taps", "models", "data", "runs")
    assert expected | {f"api/guidance.{package}.html" for package in packages} <= pages
    assert "<table>" in (site / "results.html").read_text() and "demo-grid.png" in (site / "index.html").read_text()


def test_api_pages_show_signatures_and_no_markup_of_other_tools(site: Path) -> None:
    guides = (site / "api" / "guidance.guides.html").read_text()
    assert 'id="guidance.guides.midblock.MidBlockGuide"' in guides
    for page in (site / "api").glob("*.html"):
        assert not re.search(r":(func|class|meth|mod|data):", page.read_text()), page.name


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    loaded = r'<(?:script|img)[^>]+src="https?:|<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="https?:'
    assert [page.name for page in site.rglob("*.html") if re.search(loaded, page.read_text())] == []
