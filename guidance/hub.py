"""Heads and adapters on the hub: ``user/name`` in place of a folder, and a folder published under such a name.

Only safetensors and JSON are fetched, and nothing that was fetched is run.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from guidance.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: What is published of a folder; not train.yaml, which names folders of the machine it was trained on.
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


def fetch(
    repo_id: str, files: Sequence[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Download files of a repository into the hub's cache, or find them there.

    Args:
        repo_id: ``user/name``.
        files: Their names; no other file of the repository is fetched.
        revision: Branch, tag or commit; None for the main branch.
        local_files_only: Never reach for the hub; take what the cache has.

    Returns:
        The folder of the snapshot, with those of the files that the repository has.

    Raises:
        UserError: If the repository cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            repo_id, revision=revision, allow_patterns=list(files), local_files_only=local_files_only
        )
    except Exception as error:  # the hub's client, its transport and its cache each raise their own
        which = f"'{repo_id}'" + (f" at revision '{revision}'" if revision else "")
        fixed = "check its name, or give a folder"
        raise _explain(f"a folder or a reachable hub repository, got {which}", error, fixed) from error
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
        repo_id: ``user/name``; made if there is no such repository.
        private: Whether a new repository is seen by its owner alone.
        revision: Branch to push to, made if it is new; None for the main branch.
        commit_message: None for a plain one.
        token: Of the hub; None takes the one of ``hf auth login`` or ``HF_TOKEN``.

    Returns:
        Address of the repository.

    Raises:
        UserError: If the folder holds no model, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    path = Path(folder)
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise UserError(
            f"Expected the folder of a head or an adapter, got '{folder}' without config.json and safetensors; "
            "train one, or save one with save_pretrained."
        )
    api = HfApi(token=_token(repo_id, token))
    with tempfile.TemporaryDirectory() as temporary:
        staged = _stage(path, repo_id, Path(temporary))
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id,
                folder_path=staged,
                revision=revision,
                commit_message=commit_message or f"Upload {path.name}",
                allow_patterns=list(PUBLISHED),
            )
        except Exception as error:  # as in fetch
            fixed = "check name, token and connection"
            raise _explain(f"to publish '{folder}' as '{repo_id}'", error, fixed) from error
    return str(url)


def _token(repo_id: str, token: str | None) -> str:
    """The token to publish with, before any file is copied."""
    from huggingface_hub import constants, get_token

    if not _HUB_ID.fullmatch(repo_id):
        raise UserError(f"Expected a hub id as user/name, got '{repo_id}'; write for example 'me/my-head'.")
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"Expected to reach the hub to publish '{repo_id}', but HF_HUB_OFFLINE is set; unset it."
        )
    found = token or get_token()
    if not found:
        raise UserError(
            f"Expected a token of the hub to publish '{repo_id}', found none; run 'hf auth login', or set HF_TOKEN."
        )
    return found


def _stage(folder: Path, repo_id: str, into: Path) -> Path:
    """Copy what is published; the card's code loads by the name on the hub, not by the folder's."""
    for pattern in PUBLISHED:
        for file in folder.glob(pattern):
            shutil.copyfile(file, into / file.name)
    card = into / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        card.write_text(_LOADS.sub(rf'\1("{repo_id}")', text), encoding="utf-8")
    return into


def _explain(expected: str, error: Exception, fixed: str) -> Exception:
    """One sentence about an error of the hub's client; the disk's own errors are told by the scripts."""
    if isinstance(error, OSError) and error.errno in _DISK:
        return error
    reason = (str(error).strip().splitlines() or [""])[0][:150].rstrip(". ")
    kind = type(error).__name__
    return UserError(f"Expected {expected}, but it failed ({kind}: {reason}); {fixed}.")
