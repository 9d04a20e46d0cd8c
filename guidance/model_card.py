"""Model cards of heads and adapters: what it is, what it was trained on, how to use it, how well it does.

The front matter is the hub's (``huggingface_hub.ModelCardData``), so that base model and metrics show on its pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidance.hub import is_hub_id

if TYPE_CHECKING:
    from guidance.adapter import Adapter
    from guidance.head_networks import Head

LIBRARY = "midblock-guidance"
NOT_MEASURED = "Not measured."


def head_card(head: Head, name: str, *, facts: Sequence[str] = (), measured: str | None = None) -> str:
    """Return the model card of a head as Markdown.

    Args:
        head: Its config says what it is and how well it does.
        name: Folder or hub id that the card's code loads.
        facts: Further facts, a line each, for example of its training.
        measured: Text of its measurements; None for a table of the config's.
    """
    config = head.config
    told = "told" if config.time_conditioned else "not told"
    low, high = config.timesteps
    lines = [
        f"outputs: {', '.join(config.labels) or config.outputs}",
        f"features: noise {config.noise}, timesteps {low} to {high}, prompt: {config.caption}",
        f"{told} the timestep; {_parameters(head)} parameters",
        f"guides in the fractions {config.start} to {config.stop} of the sampling steps",
        *facts,
    ]
    what = (
        f"A {config.kind} head that reads `{config.target}` ({config.task}) off `{config.tap}` of "
        f"{_base(config)}."
    )
    return _card(config, name, config.target, what, _head_usage(config, name), lines, measured)


def adapter_card(
    adapter: Adapter, name: str, *, facts: Sequence[str] = (), measured: str | None = None
) -> str:
    """Return the model card of an adapter as Markdown; arguments as :func:`head_card` takes them."""
    config = adapter.config
    terms = [
        f"{term.get('guidance_scale', 1):g} x `{term['predicts']}` ({term['head']})"
        for term in config.teacher
    ]
    lines = [
        f"teacher: {' + '.join(terms) or 'not recorded'}; guides in the fractions {config.start} to {config.stop} of "
        "the steps",
        f"{_parameters(adapter)} parameters, width {config.width}, depth {config.depth}, patch {config.patch}",
        *facts,
    ]
    what = f"An adapter that predicts the directions of mid-u guidance without a backward pass, for {_base(config)}."
    usage = [
        "from guidance import AmortisedGuide, apply_guidance, load_adapter, load_pipeline",
        "",
        *_sampling(config, f'AmortisedGuide(load_adapter("{name}"))'),
    ]
    return _card(config, name, "directions", what, usage, lines, measured)


def _base(config: Any) -> str:
    """The diffusion model it was trained on."""
    weights = f"weights {config.base_fingerprint or 'not recorded'}, {config.prediction_type}"
    return f"`{config.base_model or 'another model'}` ({weights})"


def _head_usage(config: Any, name: str) -> list[str]:
    """The lines of code that guide with a head."""
    if config.task != "embedding":
        imports = ["from guidance import MidBlockGuide, apply_guidance, load_head, load_pipeline"]
        options = ""
        if config.task == "class":
            options = f', target="{config.labels[0]}"'
        elif config.task == "binary":  # the published form: the raw gradient of the log-odds
            options = ", normalize=None"
        return [*imports, "", *_sampling(config, f'MidBlockGuide(load_head("{name}"){options})')]
    imports = ["from guidance import EmbeddingGuide, apply_guidance, load_clip, load_head, load_pipeline"]
    guide = f'EmbeddingGuide(load_head("{name}"), load_clip("{config.clip}"), texts=["a prompt"])'
    return [*imports, "", *_sampling(config, guide)]


def _sampling(config: Any, guide: str) -> list[str]:
    return [
        f'pipe = load_pipeline("{config.base_model}")',
        f"with apply_guidance(pipe, [{guide}]):",
        '    image = pipe("a prompt").images[0]',
    ]


def _card(
    config: Any,
    name: str,
    target: str,
    what: str,
    usage: Sequence[str],
    facts: Sequence[str],
    measured: str | None,
) -> str:
    """Put the parts together."""
    text = measured if measured is not None else _metrics_table(config.metrics)
    parts = [
        f"---\n{_front_matter(config, name, target)}\n---",
        f"# {Path(name).name}",
        what,
        "\n".join(["```python", *usage, "```"]),
        "\n".join(f"- {fact}" for fact in facts),
        text,
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: Any, name: str, target: str) -> str:
    """The hub's YAML: library, base model (if the hub has it) and headline metrics."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="other",
            task_name=f"predict {target}",
            dataset_type="held-out",
            dataset_name="rows held out from training",
            metric_type=key,
            metric_value=value,
        )
        for key, value in numbers(config.metrics).items()
    ]
    given = {"base_model": config.base_model} if is_hub_id(config.base_model) else {}
    given |= {"model_name": Path(name).name, "eval_results": results} if results else {}
    tags = ["guidance", "classifier-guidance", "diffusion"]
    return ModelCardData(library_name=LIBRARY, tags=tags, **given).to_yaml().strip()


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The entries of a config's metrics that are finite numbers.

    >>> numbers({"auc": 0.5, "rows": 3, "bins": [], "ece": None, "nll": float("nan")})
    {'auc': 0.5, 'rows': 3}
    """
    plain = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {key: value for key, value in plain.items() if math.isfinite(value)}


def _metrics_table(metrics: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {f'{v:.3f}' if isinstance(v, float) else v} |" for key, v in numbers(metrics).items()]
    if not rows:
        return NOT_MEASURED
    return "\n".join(
        ["Measured on rows held out from training.", "", "| metric | value |", "| --- | ---: |", *rows]
    )


def _parameters(model: Any) -> str:
    return f"{sum(p.numel() for p in model.parameters()):,}"
