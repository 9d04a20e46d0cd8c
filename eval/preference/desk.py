"""What the page asks for and answers with: the next pair of a rater, votes, undo, images; knows nothing of HTTP.

Images and pairs go by ids that are keyed hashes of rater, trial and side: they tell nothing of arm or file, differ for
each showing, are valid after a restart, and cannot be made up by who has not been shown the pair.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import hmac
import io
import secrets
import sys
import threading
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.preference.pairs import Item, Trial, queue
from eval.preference.study import QUESTIONS, Key, Study
from eval.preference.votes import CHOICES, Vote, VoteStore
from guidance.runs.records import encode_png
from guidance.utils.errors import UserError
from guidance.utils.images import to_rgb

_LONGEST_NAME = 60

_KEPT = 32  # encoded images in memory

_BLOCKS = 12  # of a damaged copy, a side


class NotShown(UserError):
    """A vote, or an undo, for a pair that this rater was never shown."""


class Desk:
    """The study as its raters see it; may be called from many threads.

    Args:
        study: What is asked.
        files: Image -> file, see :func:`eval.preference.study.find_images`.
        store: Of the votes.
        secret: Of the ids.
    """

    def __init__(self, study: Study, files: Mapping[Key, Path], store: VoteStore, secret: bytes) -> None:
        self.study, self.files, self.store, self._secret = study, files, store, secret
        self._id = study.id
        self._served: dict[str, tuple[Key, bool]] = {}
        self._broken: set[Key] = set()  # files that are there, but not as they were
        self._told: set[Key] = set()
        self._lock = threading.Lock()
        self._queue = functools.lru_cache(256)(functools.partial(queue, len(study.items), study.plan))
        self._png = functools.lru_cache(_KEPT)(self._encode)

    def token(self) -> str:
        """What lets others in; the same after a restart."""
        return self._keyed("token")

    def join(self, name: object) -> dict[str, Any]:
        """Let a rater in; without a name under an anonymous id."""
        return self.state(f"anonymous-{secrets.token_hex(4)}" if name in (None, "") else name)

    def state(self, rater: object) -> dict[str, Any]:
        """What the page shows a rater now.

        Raises:
            UserError: If the rater's name cannot be used.
        """
        name = _check_name(rater)
        votes, trials = self.store.votes_of(name), self._queue(name)
        waiting = [trial for trial in trials if trial.index not in votes]
        lost = [trial for trial in waiting if not self._is_there(trial)]
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
        """Store a vote and return what comes next; a vote that is there already (a retry) is not stored twice.

        Raises:
            NotShown: If this rater has not been shown that pair.
            UserError: If the answers are not answers.
            OSError: If the vote could not be stored.
        """
        name = _check_name(rater)
        trial = self._find(name, trial_id)
        item = self.study.items[trial.item]
        given = self._check_answers(answers)
        self.store.append_once(self._vote(name, trial, item, given, seconds))
        return self.state(name)

    def undo(self, rater: object, trial_id: object) -> dict[str, Any]:
        """Take back a vote and show its pair again; one that was undone already (a retry) is left alone."""
        name = _check_name(rater)
        trial = self._find(name, trial_id)
        self.store.append_once(self._vote(name, trial, self.study.items[trial.item], None, None))
        return self.state(name)

    def image(self, image_id: str) -> bytes | None:
        """The PNG of an id; None if no such id was given out, or its file is gone by now."""
        with self._lock:
            found = self._served.get(image_id)
        if found is None:
            return None
        try:
            return self._png(*found)
        except (OSError, ValueError, SyntaxError) as error:
            # what has an errno may be better at the next try; a decoder's complaint has none
            if getattr(error, "errno", None) in (None, errno.EACCES):
                self._broken.add(found[0])
            self._tell(found[0])
            return None

    def _vote(
        self, rater: str, trial: Trial, item: Item, answers: dict[str, str] | None, seconds: object
    ) -> Vote:
        known = isinstance(seconds, int | float) and 0 <= seconds < 86400
        return Vote(
            id="",
            time=0.0,
            study=self._id,
            rater=rater,
            trial=trial.index,
            kind=trial.kind,
            prompt_id=item.prompt_id,
            seed=item.seed,
            first=item.first,
            second=item.second,
            swapped=trial.swapped,
            answers=answers,
            seconds=round(float(seconds), 2) if known else None,  # type: ignore[arg-type]
        )

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
        """The first and the second image of a trial, and whether they are shown damaged."""
        item = self.study.items[trial.item]
        first = (item.first, item.prompt_id, item.seed)
        if trial.kind == "check":
            return (first, False), (first, True)
        return (first, False), ((item.second, item.prompt_id, item.seed), False)

    def _is_there(self, trial: Trial) -> bool:
        """Whether both images have files; what is in them shows when they are opened."""
        for key, _ in self._sides(trial):
            if key in self._broken or not self.files[key].is_file():
                self._tell(key)
                return False
        return True

    def _tell(self, key: Key) -> None:
        """Say once that an image is gone."""
        with self._lock:
            if key in self._told:
                return
            self._told.add(key)
        arm, prompt_id, seed = key
        print(
            f"The image of '{arm}' for '{prompt_id}', seed {seed}, is gone or was changed: its pairs are not asked.",
            file=sys.stderr,
            flush=True,
        )

    def _encode(self, key: Key, damaged: bool) -> bytes:
        """Read an image and encode its pixels anew: nothing else of the file is passed on."""
        data = self.files[key].read_bytes()
        if not hashlib.sha256(data).hexdigest().startswith(self.study.digests[key]):
            raise ValueError("another image than the study was made of")
        with Image.open(io.BytesIO(data)) as opened:
            pixels = np.asarray(to_rgb(opened))
        return encode_png(_damage(pixels) if damaged else pixels)

    def _find(self, rater: str, trial_id: object) -> Trial:
        for trial in self._queue(rater):
            if isinstance(trial_id, str) and hmac.compare_digest(
                self._trial_id(rater, trial.index).encode(), trial_id.encode()
            ):
                return trial
        raise NotShown("Expected a vote on a pair that was shown to you, got another; load the page again.")

    def _check_answers(self, answers: object) -> dict[str, str]:
        asked = self.study.options.questions
        if (
            not isinstance(answers, dict)
            or set(answers) != set(asked)
            or not all(choice in CHOICES for choice in answers.values())
        ):
            raise UserError(
                f"Expected {', '.join(CHOICES)} for each of the questions {', '.join(asked)}, got {answers!r}."
            )
        return {question: str(answers[question]) for question in asked}

    def _trial_id(self, rater: str, index: int) -> str:
        return self._keyed("trial", rater, index)

    def _keyed(self, *parts: object) -> str:
        text = "\0".join(map(str, (self._id, *parts)))
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()[:32]


def question_texts(study: Study) -> dict[str, str]:
    """The study's questions as the page asks them."""
    return {key: QUESTIONS[key] for key in study.options.questions}


def _check_name(name: object) -> str:
    text = " ".join(unicodedata.normalize("NFC", name).split()) if isinstance(name, str) else ""
    if not text or len(text) > _LONGEST_NAME or not text.isprintable():
        raise UserError(
            f"Expected a name of 1 to {_LONGEST_NAME} letters, got {name!r:.80}; choose another one."
        )
    return text


def _damage(pixels: np.ndarray) -> np.ndarray:
    """Coarse blocks with noise: what an attentive rater never prefers."""
    h, w = pixels.shape[:2]
    small = Image.fromarray(pixels).resize((_BLOCKS, _BLOCKS), Image.Resampling.BOX)
    coarse = np.asarray(small.resize((w, h), Image.Resampling.NEAREST), np.int16)
    noise = np.random.default_rng(0).integers(-90, 91, (h, w, 1), dtype=np.int16)
    return (coarse + noise).clip(0, 255).astype(np.uint8)
