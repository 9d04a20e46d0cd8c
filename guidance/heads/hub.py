"""Heads and adapters on the hub: ``user/name`` in place of a folder, publishing a folder, and model cards.

Only safetensors and JSON are fetched, and nothing that was fetched is run.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidance.heads.tasks import TASKS
from guidance.utils.errors import UserError

if TYPE_CHECKING:
    from guidance.heads.adapter import Adapter
    from guidance.heads.networks import Head


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

#: Files of a folder that are published; not train.yaml, which names folders of the machine it was trained on.
PUBLISHED = ("*.safetensors", "config.json", "metrics.json", "metrics.png", "README.md")

_LOADS = re.compile(r'(load_(?:head|adapter))\("[^"\n]*"\)')

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Tell whether a name means a repository of the hub: ``user/name``, with no folder of either name here.

    >>> is_hub_id("somebody/aesthetic-head"), is_hub_id("/tmp/head"), is_hub_id("a/b/c")
    (True, False, False)
    """
    path = Path(name)
    return bool(_HUB_ID.fullmatch(os.fspath(name))) and not path.exists() and not path.parent.is_dir()


def fetch(repo_id: str, files: Sequence[str], *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """Download files of a repository into the hub's cache, or find them there.

    Args:
        repo_id: ``user/name``.
        files: Their names; no other file of the repository is fetched.
        revision: Branch, tag or commit; None for the main branch.
        local_files_only: Take what the cache has, without any connection.

    Returns:
        Folder of the snapshot, with those of the files that the repository has.

    Raises:
        UserError: If the repository cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            repo_id, revision=revision, allow_patterns=list(files), local_files_only=local_files_only
        )
    except Exception as error:  # the hub's client, its transport and its cache each raise their own
        which = f"'{repo_id}'" + (f" at revision '{revision}'" if revision else "")
        expected = f"a folder or a reachable hub repository, got {which}"
        raise _explain(expected, error, "check its name, or give a folder") from error
    return Path(str(found))


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Publish the folder of a trained head or adapter: weights, config, measurements and model card.

    The published card loads the model by ``repo_id``.  ``train.yaml`` and all other files stay where they are.

    Args:
        folder: As ``train/head.py`` or ``train/amortise.py`` write it, or ``save_pretrained``.
        repo_id: ``user/name``; created if there is no such repository.
        private: Make a new repository visible to its owner alone.
        revision: Branch to push to, created if it is new; None for the main branch.
        commit_message: None for ``Upload NAME``.
        token: Access token; None takes that of ``hf auth login`` or ``HF_TOKEN``.

    Returns:
        Address of the repository.

    Raises:
        UserError: If the folder holds no model, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    path, token = Path(folder), token or get_token()
    files = [file for pattern in PUBLISHED for file in path.glob(pattern)]
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise UserError(
            f"Expected the folder of a head or an adapter, got '{folder}' without config.json and safetensors; "
            "train one, or save one with save_pretrained."
        )
    if not _HUB_ID.fullmatch(repo_id):
        raise UserError(f"Expected a hub id as user/name, got '{repo_id}'; write for example 'me/my-head'.")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"Expected the hub, to publish '{repo_id}', but HF_HUB_OFFLINE is set; unset it.")
    if not token:
        raise UserError(
            f"Expected a token of the hub to publish '{repo_id}', found none; run 'hf auth login', or set HF_TOKEN."
        )
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.create_commit(
            repo_id,
            [CommitOperationAdd(file.name, _published(file, repo_id)) for file in files],
            commit_message=commit_message or f"Upload {path.name}",
            revision=revision,
        )
    except Exception as error:  # as in fetch
        raise _explain(f"to publish '{folder}' as '{repo_id}'", error, "check name, token and connection") from error
    return str(url)


def _published(file: Path, repo_id: str) -> Path | bytes:
    """The content to publish; a card's code loads the model by the name on the hub, not by the folder's."""
    if file.name != "README.md":
        return file
    return _LOADS.sub(rf'\1("{repo_id}")', file.read_text(encoding="utf-8")).encode()


def _explain(expected: str, error: Exception, advice: str) -> Exception:
    """Put an error of the hub's client in one sentence; errors of the disk stay, for :func:`friendly_errors`."""
    if isinstance(error, OSError) and error.errno in _DISK:
        return error
    reason = (str(error).strip().splitlines() or [""])[0][:150].rstrip(". ")
    return UserError(f"Expected {expected}, but it failed ({type(error).__name__}: {reason}); {advice}.")


LIBRARY = "midblock-guidance"


def head_card(head: Head, name: str, *, facts: Sequence[str] = (), measured: str | None = None) -> str:
    """Return the model card of a head as Markdown.

    Args:
        head: Its config says what it is and how well it does.
        name: Folder or hub id that the card's code loads.
        facts: Further facts, a line each, for example of its training.
        measured: Text of its measurements; None for a table of the config's.
    """
    config = head.config
    low, high = config.timesteps
    lines = [
        f"outputs: {', '.join(config.labels) or config.outputs}",
        f"features: noise {config.noise}, timesteps {low} to {high}, prompt: {config.caption}",
        f"{'told' if config.time_conditioned else 'not told'} the timestep; {_parameters(head)} parameters",
        f"guides in the fractions {config.start} to {config.stop} of the sampling steps",
        *facts,
    ]
    what = f"A {config.kind} head that reads `{config.target}` ({config.task}) off `{config.tap}` of {_base(config)}."
    return _card(config, name, config.target, what, TASKS[config.task].guide(config, name), lines, measured)


def adapter_card(adapter: Adapter, name: str, *, facts: Sequence[str] = (), measured: str | None = None) -> str:
    """Return the model card of an adapter as Markdown; arguments as for :func:`head_card`."""
    config = adapter.config
    terms = [f"{term.get('guidance_scale', 1):g} x `{term['predicts']}` ({term['head']})" for term in config.teacher]
    lines = [
        f"teacher: {' + '.join(terms) or 'not recorded'}; guides in the fractions {config.start} to {config.stop} of "
        "the steps",
        f"{_parameters(adapter)} parameters, width {config.width}, depth {config.depth}, patch {config.patch}",
        *facts,
    ]
    what = f"An adapter that predicts the directions of mid-u guidance without a backward pass, for {_base(config)}."
    return _card(config, name, "directions", what, f'AmortisedGuide(load_adapter("{name}"))', lines, measured)


def _base(config: Any) -> str:
    """The diffusion model it was trained on."""
    weights = f"weights {config.base_fingerprint or 'not recorded'}, {config.prediction_type}"
    return f"`{config.base_model or 'another model'}` ({weights})"


def _card(
    config: Any, name: str, target: str, what: str, guide: str, facts: Sequence[str], measured: str | None
) -> str:
    code = [
        f'pipe = load_pipeline("{config.base_model}")',
        f"with apply_guidance(pipe, [{guide}]):",
        '    image = pipe("a prompt").images[0]',
    ]
    called = sorted(set(re.findall(r"(\w+)\(", "\n".join(code))) - {"pipe"})
    parts = [
        f"---\n{_front_matter(config, name, target)}\n---",
        f"# {Path(name).name}",
        what,
        "\n".join(["```python", f"from guidance import {', '.join(called)}", "", *code, "```"]),
        "\n".join(f"- {fact}" for fact in facts),
        _metrics_table(config.metrics) if measured is None else measured,
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: Any, name: str, target: str) -> str:
    """The hub's YAML: library, base model (if the hub has it) and headline metrics."""
    from huggingface_hub import EvalResult, ModelCardData

    held_out: dict[str, Any] = {"dataset_type": "held-out", "dataset_name": "rows held out from training"}
    results = [
        EvalResult(task_type="other", task_name=f"predict {target}", metric_type=key, metric_value=value, **held_out)
        for key, value in numbers(config.metrics).items()
    ]
    known: dict[str, Any] = {"base_model": config.base_model} if is_hub_id(config.base_model) else {}
    known |= {"model_name": Path(name).name, "eval_results": results} if results else {}
    tags = ["guidance", "classifier-guidance", "diffusion"]
    return ModelCardData(library_name=LIBRARY, tags=tags, **known).to_yaml().strip()


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
        return "Not measured."
    return "\n".join(["Measured on rows held out from training.", "", "| metric | value |", "| --- | ---: |", *rows])


def _parameters(model: Any) -> str:
    return f"{sum(p.numel() for p in model.parameters()):,}"
