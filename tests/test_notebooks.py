"""The notebooks of docs/notebooks run as notebooks, and show what they say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "notebooks"


def execute(name: str, facts: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, int]:
    """Run a notebook in an empty folder on one thread; return ``facts`` at its end, and how many pictures it shows."""
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    settings |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython")}
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({facts}))"))
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": os.fspath(folder)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return json.loads(outputs[-1]["text"]), sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_quick_start_improves_images(tmp_path: Path, monkeypatch) -> None:
    interval, pictures = execute("quickstart", "change.effect_interval", tmp_path, monkeypatch)
    assert interval[0] > 0 and pictures == 2


def test_a_head_on_own_data_learns_brightness_and_guides_it(tmp_path: Path, monkeypatch) -> None:
    facts = "[head.config.metrics['spearman'], *brightness.values()]"
    (correlation, *brightness), pictures = execute("own_head", facts, tmp_path, monkeypatch)
    assert correlation > 0.5 and brightness == sorted(brightness) and pictures == 3


def test_stable_diffusion_is_guided_in_its_own_call(tmp_path: Path, monkeypatch) -> None:
    facts = "{s: [float(sum(r.scores.values())) for r in steps] for s, steps in records.items()}"
    scores, pictures = execute("stable_diffusion", facts, tmp_path, monkeypatch)
    assert len(scores["2.0"]) >= 8 and scores["0.0"] == [] and pictures == 2
    assert scores["2.0"][-1] > scores["-2.0"][-1]


def test_every_notebook_is_executed() -> None:
    assert {file.stem for file in FOLDER.glob("*.py")} == {"quickstart", "own_head", "stable_diffusion"}
