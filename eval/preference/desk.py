"""Answers to the page, without HTTP: the next pair of a rater, votes, undo, images.

Images and pairs have ids that are keyed hashes of rater, trial and side: they reveal neither arm nor file, differ for
each showing, stay valid after a restart, and cannot be guessed by someone who was not shown the pair.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import hmac
import io
import secrets
import threading
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.preference.pairs import Key, Trial, queue
from eval.preference.study import Study
from eval.preference.votes import CHOICES, VoteStore
from guidance.runs.records import encode_png
from guidance.utils.errors import UserError
from guidance.utils.images import to_rgb

_MAX_NAME = 60

_CACHED_IMAGES = 32

_BLOCKS = 12  # blocks per side of a damaged copy


class NotShown(UserError):
    """A vote, or an undo, for a pair that this rater was not shown."""


class Desk:
    """A study as its raters see it; thread-safe.

    Args:
        study: What is asked.
        files: Image -> file, see :func:`eval.preference.study.find_images`.
        store: Store of the votes.
        secret: Key of the ids.
    """

    def __init__(self, study: Study, files: Mapping[Key, Path], store: VoteStore, secret: bytes) -> None:
        self.study, self.files, self.store, self._secret = study, files, store, secret
        self._served: dict[str, tuple[Key, bool]] = {}
        self._broken: set[Key] = set()  # files that exist, but have changed
        self._lock = threading.Lock()
        self._queue = functools.lru_cache(256)(functools.partial(queue, len(study.items), study.options))
        self._png = functools.lru_cache(_CACHED_IMAGES)(self._encode)

    def token(self) -> str:
        """Return the token that admits others; the same after a restart."""
        return self._keyed("token")

    def join(self, name: object) -> dict[str, Any]:
        """Admit a rater; without a name under an anonymous id."""
        return self.state(f"anonymous-{secrets.token_hex(4)}" if name in (None, "") else name)

    def state(self, rater: object) -> dict[str, Any]:
        """Return what the page shows a rater now.

        Raises:
            UserError: If the rater's name is invalid.
        """
        name = _check_name(rater)
        votes, trials = self.store.votes_of(name), self._queue(name)
        waiting = [trial for trial in trials if trial.index not in votes]
        lost = [trial for trial in waiting if not self._is_available(trial)]
        ready = [trial for trial in waiting if trial not in lost]
        last = max(votes.values(), key=lambda vote: vote.time, default=None)
        return {
            "rater": name,
            "done": len(votes),
            "total": len(trials) - len(lost),
            "lost": len(lost),
            "last": None if last is None else self._trial_id(name, last.trial),
            "trial": self._show(name, ready[0]) if ready else None,
            "next": self._urls(name, ready[1]) if len(ready) > 1 else None,
        }

    def vote(self, rater: object, trial_id: object, answers: object, seconds: object) -> dict[str, Any]:
        """Store a vote and return the next state; a retry of a stored vote is not stored again.

        Raises:
            NotShown: If this rater has not been shown that pair.
            UserError: If the answers are invalid.
            OSError: If the vote could not be stored.
        """
        asked = self.study.options.questions
        if (
            not isinstance(answers, dict)
            or set(answers) != set(asked)
            or not all(choice in CHOICES for choice in answers.values())
        ):
            raise UserError(
                f"Expected {', '.join(CHOICES)} for each of the questions {', '.join(asked)}, got {answers!r}."
            )
        known = isinstance(seconds, int | float) and 0 <= seconds < 86400
        choices = {question: str(answers[question]) for question in asked}
        return self._store(rater, trial_id, choices, round(float(seconds), 2) if known else None)  # type: ignore[arg-type]

    def undo(self, rater: object, trial_id: object) -> dict[str, Any]:
        """Take back a vote and show its pair again; a retry changes nothing."""
        return self._store(rater, trial_id, None, None)

    def image(self, image_id: str) -> bytes | None:
        """Return the PNG of an id; None if the id was not given out or its file is gone."""
        with self._lock:
            served = self._served.get(image_id)
        if served is None:
            return None
        try:
            return self._png(*served)
        except (OSError, ValueError, SyntaxError) as error:
            # errors with an errno may be transient, unlike those of a decoder, which have none
            if getattr(error, "errno", None) in (None, errno.EACCES):
                self._broken.add(served[0])
            return None

    def _store(
        self, rater: object, trial_id: object, answers: dict[str, str] | None, seconds: float | None
    ) -> dict[str, Any]:
        name = _check_name(rater)
        self.store.append(self.study.vote(name, self._find(name, trial_id), answers, seconds=seconds))
        return self.state(name)

    def _show(self, rater: str, trial: Trial) -> dict[str, Any]:
        prompt = self.study.items[trial.item].prompt
        return {"id": self._trial_id(rater, trial.index), "prompt": prompt, **self._urls(rater, trial)}

    def _urls(self, rater: str, trial: Trial) -> dict[str, str]:
        first, second = self._sides(trial)
        sides = (second, first) if trial.swapped else (first, second)
        urls = {}
        for name, image in zip(("left", "right"), sides, strict=True):
            image_id = self._keyed("image", rater, trial.index, name)
            with self._lock:
                self._served[image_id] = image
            urls[name] = f"image/{image_id}.png"
        return urls

    def _sides(self, trial: Trial) -> tuple[tuple[Key, bool], tuple[Key, bool]]:
        """Return the first and the second image of a trial, and whether each is shown damaged."""
        first, second = self.study.items[trial.item].keys
        check = trial.kind == "check"
        return (first, False), (first if check else second, check)

    def _is_available(self, trial: Trial) -> bool:
        """Tell whether both images have files, which are not opened."""
        return all(key not in self._broken and self.files[key].is_file() for key, _ in self._sides(trial))

    def _encode(self, key: Key, damaged: bool) -> bytes:
        """Read an image and encode only its pixels, without anything else of the file."""
        data = self.files[key].read_bytes()
        if not hashlib.sha256(data).hexdigest().startswith(self.study.digests[key]):
            raise ValueError("not the image that the study was made of")
        with Image.open(io.BytesIO(data)) as opened:
            pixels = np.asarray(to_rgb(opened))
        return encode_png(_damage(pixels) if damaged else pixels)

    def _find(self, rater: str, trial_id: object) -> Trial:
        for trial in self._queue(rater):
            if isinstance(trial_id, str) and hmac.compare_digest(
                self._trial_id(rater, trial.index).encode(), trial_id.encode()
            ):
                return trial
        raise NotShown("Expected a vote on a pair that you were shown, got another; reload the page.")

    def _trial_id(self, rater: str, index: int) -> str:
        return self._keyed("trial", rater, index)

    def _keyed(self, *parts: object) -> str:
        text = "\0".join(map(str, (self.study.id, *parts)))
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()[:32]


def _check_name(name: object) -> str:
    text = " ".join(unicodedata.normalize("NFC", name).split()) if isinstance(name, str) else ""
    if not text or len(text) > _MAX_NAME or not text.isprintable():
        raise UserError(f"Expected a name of 1 to {_MAX_NAME} letters, got {name!r:.80}; choose another one.")
    return text


def _damage(pixels: np.ndarray) -> np.ndarray:
    """Reduce an image to coarse blocks with noise, which no attentive rater prefers."""
    h, w = pixels.shape[:2]
    small = Image.fromarray(pixels).resize((_BLOCKS, _BLOCKS), Image.Resampling.BOX)
    coarse = np.asarray(small.resize((w, h), Image.Resampling.NEAREST), np.int16)
    noise = np.random.default_rng(0).integers(-90, 91, (h, w, 1), dtype=np.int16)
    return (coarse + noise).clip(0, 255).astype(np.uint8)
