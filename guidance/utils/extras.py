"""Optional dependencies: which extra brings a package, and the sentence for one that is not installed."""

from __future__ import annotations

#: Extra -> the packages that it brings, by the names they are imported under.
EXTRAS = {
    "train": ("datasets", "matplotlib", "omegaconf", "pandas", "pyarrow", "scipy", "torchmetrics", "yaml"),
    "eval": ("jinja2", "markupsafe"),
    "track": ("tensorboard", "wandb"),
    "ui": ("starlette", "uvicorn"),
}


def explain_missing(error: ModuleNotFoundError) -> str | None:
    """Name the command that installs a missing optional package; None if the package is not one of :data:`EXTRAS`.

    >>> explain_missing(ModuleNotFoundError("No module named 'datasets'", name="datasets"))
    "Expected the package 'datasets', which is not installed; run: pip install 'midblock-guidance[train]'."
    """
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return (
                f"Expected the package '{package}', which is not installed; run: "
                f"pip install 'midblock-guidance[{extra}]'."
            )
    return None
