"""Heads and adapters on the hub: ``user/name`` in place of a folder, publishing a folder, and model cards.

Only safetensors and JSON are fetched, and nothing that was fetched is run.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidance.heads.tasks import TASKS
from guidance.utils.errors import UserError, first_line

if TYPE_CHECKING:
    from guidance.heads.adapter import Adapter
    from guidance.heads.networks import Head

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

#: Files of a folder that are published; not train.yaml, which names folders of the machine it was trained on.
PUBLISHED = ("*.safetensors", "config.json", "metrics.json", "metrics.png", "README.md")

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Tell whether a name means a repository of the hub: ``user/name``, with no folder of either name here.

    >>> is_hub_id("somebody/aesthetic-head"), is_hub_id("/tmp/head"), is_hub_id("a/b/c")
    (True, False, False)
    """
    return bool(_HUB_ID.fullmatch(os.fspath(name))) and not Path(name).exists() and not Path(name).parent.is_dir()


@contextmanager
def _explained(expected: str, advice: str) -> Iterator[None]:
    """Put errors of the hub's client in one sentence; those of the disk stay, for :func:`friendly_errors`."""
    try:
        yield
    except Exception as error:  # the hub's client, its transport and its cache each raise their own
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        reason = f"{type(error).__name__}: {first_line(error)[:150].rstrip('. ')}"
        raise UserError(f"Expected {expected}, but it failed ({reason}); {advice}.") from error


def fetch(repo_id: str, files: Sequence[str], **options: Any) -> Path:
    """Return the folder of the hub's cache with those of the files that a repository has; no other file is fetched."""
    from huggingface_hub import snapshot_download

    revision = f" at revision '{options['revision']}'" if options.get("revision") else ""
    expected = f"a folder or a reachable hub repository, got '{repo_id}'{revision}"
    with _explained(expected, "check its name, or give a folder"):
        return Path(snapshot_download(repo_id, allow_patterns=list(files), **options))


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Publish :data:`PUBLISHED` of a folder, with a card that loads the model by ``repo_id``; return the address.

    Args:
        folder: As ``train/head.py`` or ``train/amortise.py`` write it, or ``save_pretrained``.
        repo_id: ``user/name``; created if there is no such repository.
        private: Make a new repository visible to its owner alone.
        revision: Branch to push to, created if it is new; None for the main branch.
        commit_message: None for ``Upload NAME``.
        token: Access token; None takes that of ``hf auth login`` or ``HF_TOKEN``.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    path, token = Path(folder), token or get_token()
    files: dict[str, Path | bytes] = {
        file.name: file for name in PUBLISHED for file in path.glob(name) if file.is_file()
    }
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
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
    if isinstance(card := files.get("README.md"), Path):
        text = re.sub(r'(load_(?:head|adapter))\("[^"\n]*"\)', rf'\1("{repo_id}")', card.read_text(encoding="utf-8"))
        files["README.md"] = text.encode()
    api, message = HfApi(token=token), commit_message or f"Upload {path.name}"
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    with _explained(f"to publish '{folder}' as '{repo_id}'", "check name, token and connection"):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return str(url)


def head_card(head: Head, name: str, *, facts: Sequence[str] = (), measured: str | None = None) -> str:
    """Return the model card of a head as Markdown.

    Args:
        head: Its config says what it is and how well it does.
        name: Folder or hub id that the card's code loads.
        facts: Further facts, a line each, for example of its training.
        measured: Text of its measurements; None for a table of the config's.
    """
    config = head.config
    return _card(head, name, config.target, TASKS[config.task].guide(config, name), facts, measured)


def adapter_card(adapter: Adapter, name: str, *, facts: Sequence[str] = (), measured: str | None = None) -> str:
    """Return the model card of an adapter as Markdown; arguments as for :func:`head_card`."""
    return _card(adapter, name, "directions", f'AmortisedGuide(load_adapter("{name}"))', facts, measured)


def _card(model: Head | Adapter, name: str, target: str, guide: str, facts: Sequence[str], measured: str | None) -> str:
    """Fill in the template, with the hub's YAML: library, base model (if the hub has it) and headline metrics."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    config, title = model.config, Path(name).name
    measures = {k: v for k, v in config.metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    metrics = {key: value for key, value in measures.items() if math.isfinite(value)}
    held_out: dict[str, Any] = {"dataset_type": "held-out", "dataset_name": "rows held out from training"}
    results = [
        EvalResult(task_type="other", task_name=f"predict {target}", metric_type=key, metric_value=value, **held_out)
        for key, value in metrics.items()
    ]
    data = ModelCardData(
        library_name="midblock-guidance",
        tags=["guidance", "classifier-guidance", "diffusion"],
        base_model=config.base_model if is_hub_id(config.base_model) else None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    template = str(Path(__file__).with_name("card.md.j2"))
    shown: dict[str, Any] = {"model": model, "guide": guide, "facts": facts, "metrics": metrics, "measured": measured}
    shown |= {"title": title, "parameters": f"{sum(p.numel() for p in model.parameters()):,}"}
    imports = sorted({"apply_guidance", "load_pipeline", *re.findall(r"(\w+)\(", guide)})
    return f"{str(ModelCard.from_template(data, template, imports=imports, **shown)).rstrip()}\n"
