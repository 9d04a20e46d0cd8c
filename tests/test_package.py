"""The wheel: the library alone, installed into an environment with its hard dependencies only, guides a pipeline."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from guidance.utils.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

GUIDE = """
import sys
import torch
from guidance import HeadConfig, MidBlockGuide, __version__, apply_guidance, build_head, load_pipeline

def draw(pipe, *guides):
    with apply_guidance(pipe, guides):
        generator = torch.Generator().manual_seed(0)
        return pipe("a red boat", num_inference_steps=2, generator=generator, output_type="np").images

for name in ("random:sd-2.1-base-tiny", "testbed"):
    pipe = load_pipeline(name, device="cpu")
    head = build_head(HeadConfig("conv", in_channels=pipe.unet.config.block_out_channels[-1], hidden=8,
                                 prediction_type=pipe.scheduler.config.prediction_type))
    assert (draw(pipe) != draw(pipe, MidBlockGuide(head, guidance_scale=5.0))).any()
print(__version__, sorted({m.partition(".")[0] for m in sys.modules} & {"datasets", "pandas", "wandb", "omegaconf"}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel with spaces")
    tree = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("guidance", "train", "sample", "eval"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(tree)]
    run = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory) -> Path:
    """An environment that holds the wheel and what it requires, linked from this environment, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib*/python*/site-packages"))
    for name in requirements("midblock-guidance") - {"midblock-guidance"}:
        link(importlib.metadata.distribution(name), site)
    command = ["install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "-q", *command], check=True, capture_output=True)
    return folder / "bin" / "python"


def requirements(name: str, extra: str = "") -> set[str]:
    """A distribution and all that it requires, without extras."""
    found, waiting = set(), [name]
    while waiting:
        name = normal(waiting.pop())
        if name not in found:
            try:
                listed = importlib.metadata.distribution(name).requires or []
            except importlib.metadata.PackageNotFoundError:  # of another platform
                continue
            found.add(name)
            waiting += [re.split(r"[^\w.-]", r)[0] for r in listed if "extra ==" not in r]
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def link(distribution: importlib.metadata.Distribution, site: Path) -> None:
    for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
        source = Path(str(distribution.locate_file(top)))
        if source.exists() and not (site / top).exists():
            (site / top).symlink_to(source)


def run(python: Path, code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(python), "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_holds_the_library_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"guidance"}
    assert {"guidance/py.typed", "guidance/testbed/weights/unet/config.json"} <= set(names)


def test_hard_dependencies_suffice_to_guide_a_pipeline(python: Path, tmp_path: Path) -> None:
    ran = run(python, GUIDE, tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split() == [importlib.import_module("guidance").__version__, "[]"]


def test_a_missing_extra_is_named(python: Path, tmp_path: Path) -> None:
    code = "from guidance.testbed.data import load_testbed"
    assert "No module named 'datasets'" in run(python, code, tmp_path).stderr
    code = f"from guidance.utils.errors import friendly_errors\nwith friendly_errors('program'):\n    {code}"
    ran = run(python, code, tmp_path)
    assert ran.returncode == 2 and "pip install 'midblock-guidance[train]'" in ran.stderr


def test_extras_are_said_once_and_the_same() -> None:
    for extra, packages in EXTRAS.items():
        listed = " ".join(PROJECT["optional-dependencies"][extra]).replace("pyyaml", "yaml")
        assert [p for p in packages if p not in listed and p != "markupsafe"] == []
    assert len(PROJECT["dependencies"]) <= 10
