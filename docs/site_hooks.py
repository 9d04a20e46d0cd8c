"""Hooks of mkdocs: pages that stand elsewhere in the repository, and Markdown as GitHub and Sphinx write it.

The home page is README.md, notebooks are the scripts of docs/notebooks, and an API page lists a package's modules.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import griffe
import jupytext
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
#: Pages of the repository's root, and their names on the site.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PACKAGES = ("heads", "guides", "apply", "sampling", "taps", "models", "data", "runs")

_FENCE_WORDS = re.compile(r"^( *```\w+) [^\n`]+$", re.M)
_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.M)
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc|obj):<code>(~?)([\w.]+)</code>")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    root = {name: (ROOT / source).read_text(encoding="utf-8") for source, name in PAGES.items()}
    pages = {name: text.replace("](docs/", "](") for name, text in root.items()}
    for script in sorted((ROOT / "docs" / "notebooks").glob("*.py")):
        pages[f"notebooks/{script.stem}.md"] = notebook_page(script)
    pages["api/guidance.md"] = names_page()
    for package in PACKAGES:
        pages[f"api/guidance.{package}.md"] = f"# guidance.{package}\n\n::: guidance.{package}\n"
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def notebook_page(script: Path) -> str:
    """Render a script in jupytext's percent format as a page: text and code, without outputs."""
    cells = jupytext.read(script, fmt="py:percent").cells
    texts = [c.source if c.cell_type == "markdown" else f"```python\n{c.source}\n```" for c in cells]
    source = f"docs/notebooks/{script.name}"
    note = f"*`{source}`; as a notebook: `jupytext --to ipynb {source}`.*"
    return "\n\n".join([texts[0], note, *texts[1:]]) + "\n"


def names_page() -> str:
    """List what ``from guidance import ...`` offers, with links to the pages of its packages."""
    guidance = importlib.import_module("guidance")
    rows = []
    for name in sorted(guidance.__all__, key=str.lower):
        found = getattr(guidance, name)
        path = f"{found.__module__}.{found.__qualname__}"
        summary = " ".join((found.__doc__ or "").split("\n\n")[0].split())
        rows.append(f"| [`{name}`][{path}] | {summary} |")
    others = ["", "::: guidance.schedule", "", "::: guidance.utils.errors", ""]
    return "\n".join(["# guidance", "", guidance.__doc__, "", "| name | summary |", "|---|---|", *rows, *others])


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Drop what GitHub ignores behind a fence's language, and point links to files that became pages to these."""
    markdown = _FENCE_WORDS.sub(r"\1", markdown)
    markdown = re.sub(r"\]\(notebooks/(\w+)\.py\)", r"](notebooks/\1.md)", markdown)
    for source, name in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({name}").replace(f"]({source}", f"]({name}")
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Turn the roles and literal blocks of reStructuredText in docstrings into links, code and plain colons."""

    def link(match: re.Match[str]) -> str:
        short, path = match.groups()
        shown = path.rsplit(".", 1)[-1] if short else path
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

    return _ROLE.sub(link, html).replace("::</p>", ":</p>")


class Doctests(griffe.Extension):
    """Put examples in docstrings into fenced blocks, where Markdown leaves their brackets alone."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = _DOCTEST.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
