"""The repository keeps its shape: import direction, file names and sizes, nothing of one machine in it.

Every rule is a function that lists what breaks it, and is shown a file that does.
"""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train", "sample", "eval")
CODE = ("guidance", *SCRIPTS)

# Written in pieces, so that this file passes its own test.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:" + "|".join(["wor" + "k", "roo" + "t", "op" + "t/(?:pypi|wheels)"]) + ")/")
REGISTRY = re.compile(
    "|".join(["pythonhoste" + "d", r"pypi\.or" + "g/simple", "index[-_]ur" + "l", "find[-_]link" + "s"]), re.I
)


def python_files(root: Path, *folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (root / folder).rglob("*.py"))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imported_modules(file: Path, root: Path, nodes: Iterator[ast.AST] | None = None) -> set[str]:
    """Return the dotted names a file imports, relative imports resolved."""
    package = file.relative_to(root).parent.parts
    found = set()
    for node in nodes or ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            found |= {module} if node.module else set(names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)}
    return found


def dependency_names(pyproject: Path) -> set[str]:
    """Return the import names of the dependencies: of the distribution itself, and what it installs."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    found = re.compile(r"[A-Za-z0-9._-]+")
    distributions = {normal(m.group()) for r in requirements if (m := found.match(r))}
    names = {name.replace("-", "_") for name in distributions} | {"torchvision", "huggingface_hub", "PIL"}
    for module, owners in importlib.metadata.packages_distributions().items():
        if any(normal(owner) in distributions for owner in owners):
            names.add(module)
    return names


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def hijackers(root: Path, taken: set[str]) -> list[str]:
    """`accelerate launch train/head.py` puts train/ first on sys.path: no datasets.py may lie there."""
    wrong = []
    for folder in SCRIPTS:
        for entry in sorted((root / folder).glob("*")):
            is_module = entry.suffix == ".py" or (entry.is_dir() and any(entry.glob("*.py")))
            if is_module and entry.stem != "__init__" and entry.stem in taken:
                wrong.append(str(entry.relative_to(root)))
    return wrong


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from outside_functions(child)


def eager_torchvision(root: Path) -> list[str]:
    wrong = []
    for file in python_files(root, *CODE, "tests"):
        modules = imported_modules(file, root, outside_functions(parse(file)))
        if "torchvision" in {top(module) for module in modules}:
            wrong.append(str(file.relative_to(root)))
    return wrong


def top(module: str) -> str:
    return module.split(".")[0]


def pickle_uses(root: Path) -> list[str]:
    """Unpickling a downloaded file runs its code: weights are safetensors, the rest JSON and npy."""
    wrong = []
    for file in python_files(root, *CODE):
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.Call):
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                used = ast.unparse(node.func) == "torch.load" or keywords.get("allow_pickle") == "True"
            elif isinstance(node, ast.ImportFrom):
                used = node.module == "torch" and any(alias.name == "load" for alias in node.names)
            else:
                used = False
            if used:
                wrong.append(f"{file.relative_to(root)}:{getattr(node, 'lineno', 0)}")
        modules = {top(module) for module in imported_modules(file, root)}
        if modules & {"pickle", "cPickle", "dill", "joblib", "shelve"}:
            wrong.append(f"{file.relative_to(root)} imports a pickle module")
    return wrong


def text_files(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the text files that are, or would be, committed."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if listed.returncode == 0:
        files = [root / name for name in listed.stdout.split("\0") if name]
    else:  # an unpacked archive, without git
        skipped = {".git", ".venv", "venv", "runs", "wandb", "build", "__pycache__"}
        skipped |= {".pytest_cache", ".ruff_cache", ".mypy_cache"}
        files = [p for p in root.rglob("*") if not skipped & set(p.relative_to(root).parts)]
    for file in files:
        if file.is_file() and file.suffix not in {".safetensors", ".png", ".npy", ".npz", ".parquet"}:
            content = file.read_bytes()
            if b"\0" not in content:
                yield file, content.decode("utf-8", errors="replace")


def machine_traces(root: Path) -> list[str]:
    """Paths of one machine anywhere; package indices anywhere but in prose, which may advise a public one."""
    wrong = []
    for file, text in text_files(root):
        for number, line in enumerate(text.splitlines(), start=1):
            if MACHINE_PATH.search(line) or (file.suffix != ".md" and REGISTRY.search(line)):
                wrong.append(f"{file.relative_to(root)}:{number}: {line.strip()[:80]}")
    return wrong


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Check the direction of imports by the contracts in pyproject.toml."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    command += ["--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_imports_run_one_way() -> None:
    run = lint_imports(ROOT)
    assert run.returncode == 0, run.stdout


#: Wrong imports, and what lint-imports says of them.
WRONG_IMPORTS = [
    (
        "guidance/taps/hooks.py",
        "from guidance.guides.base import Guide",
        "guidance.taps.hooks -> guidance.guides.base",
    ),
    (
        "guidance/utils/io.py",
        "def f():\n    import guidance.runs.records",
        "guidance.utils.io -> guidance.runs.records",
    ),
    ("guidance/heads/config.py", "from train.head import main", "guidance.heads.config -> train.head"),
    ("train/head.py", "from sample import guided", "train.head -> sample.guided"),
    ("eval/stats/paired.py", "from eval.comparison import arms", "eval.stats.paired -> eval.comparison.arms"),
    ("guidance/taps/lockstep.py", "from guidance.taps import hooks", "No cycles are allowed in guidance.taps"),
]


def test_upward_imports_are_seen(tmp_path: Path) -> None:
    for folder in CODE:
        ignored = shutil.ignore_patterns("weights", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, line, _ in WRONG_IMPORTS:
        (tmp_path / file).write_text(f"{(tmp_path / file).read_text()}\n{line}\n")
    run = lint_imports(tmp_path)
    assert run.returncode == 1 and [said for _, _, said in WRONG_IMPORTS if said not in run.stdout] == [], run.stdout


@pytest.mark.parametrize("folder", ["guidance", "eval"])
def test_a_folder_can_be_overlooked(folder: str) -> None:
    entries = {f.relative_to(ROOT / folder).parts[0] for f in python_files(ROOT, folder)}
    assert len(entries | ({"py.typed"} if folder == "guidance" else set())) <= 14


def test_no_script_hijacks_a_module() -> None:
    taken = set(sys.stdlib_module_names) | dependency_names(ROOT / "pyproject.toml") | set(CODE)
    assert hijackers(ROOT, taken) == []


def test_torchvision_stays_optional() -> None:
    assert eager_torchvision(ROOT) == []


def test_nothing_is_unpickled() -> None:
    assert pickle_uses(ROOT) == []


def test_nothing_of_one_machine_is_committed() -> None:
    assert machine_traces(ROOT) == []


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for folder in (*CODE, "tests"):
        (tmp_path / folder).mkdir()
    return tmp_path


def test_a_hijacker_is_seen(tree: Path) -> None:
    for name in ("datasets.py", "PIL.py", "statistics.py", "head.py", "__init__.py"):
        (tree / "train" / name).write_text("")
    (tree / "eval" / "torch").mkdir()
    (tree / "eval" / "torch" / "a.py").write_text("")
    taken = set(sys.stdlib_module_names) | dependency_names(ROOT / "pyproject.toml")
    assert {"torch", "accelerate", "omegaconf", "yaml", "PIL", "wandb"} <= taken and "head" not in taken
    wrong = ["train/PIL.py", "train/datasets.py", "train/statistics.py", "eval/torch"]
    assert hijackers(tree, taken) == wrong


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("import torchvision", True),
        ("try:\n    from torchvision.io import read_image\nexcept ImportError:\n    pass", True),
        ("def f():\n    import torchvision", False),
    ],
)
def test_an_eager_torchvision_is_seen(tree: Path, code: str, wrong: bool) -> None:
    (tree / "guidance" / "a.py").write_text(code)
    assert bool(eager_torchvision(tree)) is wrong


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("import torch\ntorch.load('x')", True),
        ("from torch import load", True),
        ("import pickle", True),
        ("np.load('x', allow_pickle=True)", True),
        ("np.load('x', allow_pickle=False)\nsafetensors.torch.load_file('x')\njson.load(f)", False),
    ],
)
def test_a_pickle_is_seen(tree: Path, code: str, wrong: bool) -> None:
    (tree / "train" / "a.py").write_text(code)
    assert bool(pickle_uses(tree)) is wrong


@pytest.mark.parametrize(
    ("name", "line", "wrong"),
    [
        ("a.yaml", "path: /wor" + "k/data", True),
        ("README.md", "see `/roo" + "t/x`", True),
        ("Makefile", "pip install --extra-index-ur" + "l x", True),
        ("a.toml", "url = 'https://files.pythonhoste" + "d.org'", True),
        ("README.md", "pip install --index-ur" + "l https://example.org", False),
        ("README.md", "https://example.org/wor" + "k/x and runs/wor" + "k/y", False),
    ],
)
def test_a_trace_of_a_machine_is_seen(tree: Path, name: str, line: str, wrong: bool) -> None:
    (tree / name).write_text(line)
    assert bool(machine_traces(tree)) is wrong
