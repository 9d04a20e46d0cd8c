"""The page of a study: what raters see, votes, images, and the web server (Starlette and uvicorn, extra ``ui``).

Images and pairs have ids that are keyed hashes of rater, trial and side: they reveal neither arm nor file, differ for
each showing, stay valid after a restart, and cannot be guessed by someone who was not shown the pair.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import hmac
import io
import ipaddress
import json
import platform
import secrets
import signal
import socket
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from eval.preference.config import QUESTIONS, ServeConfig
from eval.preference.study import Key, Study, Trial, find_images, open_study, queue
from eval.preference.votes import CHOICES, VoteStore, count_votes, current_votes, read_lines
from guidance.runs.claims import Claims
from guidance.runs.records import encode_png
from guidance.utils.errors import UserError
from guidance.utils.images import to_rgb
from guidance.utils.io import atomic_path

_TEMPLATES = Path(__file__).parent / "templates"
_MAX_NAME, _MAX_BODY = 60, 4096
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def serve(config: ServeConfig) -> None:
    """Print the address of the page and serve it until Ctrl-C or a termination signal."""
    study = open_study(config)
    with Claims(study.folder / ".server") as claims:
        if not claims.take_from_dead("server"):
            holder = claims.holder("server")
            raise UserError(f"Expected no other server of '{study.folder}', but {holder} is one; stop it.")
        try:  # from now on a browser waits and is not refused
            family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
            dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
            listener = socket.create_server((config.host, config.port), family=family, dualstack_ipv6=dual)
        except (OSError, OverflowError) as error:
            where = f"{config.host}:{config.port} ({error})"
            raise UserError(f"Expected a free address, got {where}; choose another, or port=0.") from error
        address, port = listener.getsockname()[:2]
        local = ipaddress.ip_address(address).is_loopback
        desk = Desk(study, find_images(config.folders, study))
        token = desk.keyed("token") if config.token or not local else None  # the same after a restart
        name = platform.node() if address in ("0.0.0.0", "::") else config.host
        query = f"?token={token}" if token else ""
        target, pairs, compared = study.options.target, len(study.items), study.comparisons
        total, each = target * len(compared), min(study.options.per_rater or pairs, pairs)
        print(
            f"{pairs} pairs of images, {len(compared)} pairs of arms: "
            f"{'; '.join(f'{second} against {first}' for first, second in compared)}\n"
            f"{target} independent votes per pair of arms show the preference rate of interest (detect=, power=), "
            f"{total} in all: {-(-total // each)} raters of {each} pairs. Ties, and several votes per prompt, raise "
            f"it.\n{count_votes(current_votes(read_lines(study.folder)))} votes so far, in {study.folder}"
        )
        print(f"Open http://{f'[{name}]' if ':' in name else name}:{port}/{query}   (Ctrl-C stops)", flush=True)
        # on loopback this keeps other pages of the browser out
        hosts = ["localhost", "127.0.0.1", "::1", "[::1]", config.host] if local else ["*"]
        # uvicorn raises the signal again when done; its default action would end the process without releasing claims
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        app = build_app(desk, token, hosts)
        settings = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
        uvicorn.Server(settings).run(sockets=[listener])


class NotShown(UserError):
    """A vote, or an undo, for a pair that this rater was not shown."""


class Desk:
    """A study as its raters see it, without HTTP; thread-safe."""

    def __init__(self, study: Study, files: Mapping[Key, Path]) -> None:
        self.study, self.files, self.store = study, files, VoteStore(study.folder)
        secret = study.folder / "secret"  # key of the ids and the token
        if not secret.exists():
            with atomic_path(secret) as temporary:
                temporary.touch(0o600)
                temporary.write_bytes(secrets.token_bytes(32))
        self._secret = secret.read_bytes()
        self._served: dict[str, tuple[Key, bool]] = {}  # id of an image that was given out -> image, damaged or not
        self._broken: set[Key] = set()  # files that exist, but have changed
        self._queue = functools.lru_cache(256)(functools.partial(queue, len(study.items), study.options))
        self._png = functools.lru_cache(32)(self._encode)

    def state(self, rater: object) -> dict[str, Any]:
        """Return what the page shows a rater now; one without a name gets an anonymous id."""
        name = _check_name(f"anonymous-{secrets.token_hex(4)}" if rater in (None, "") else rater)
        votes = self.store.votes_of(name)
        waiting = [trial for trial in self._queue(name) if trial.index not in votes]
        ready = [trial for trial in waiting if all(self._is_there(key) for key, _ in self._images(trial))]
        shown, following, *_ = [*(self._show(name, trial) for trial in ready[:2]), None, None]
        return {
            "rater": name,
            "done": len(votes),
            "total": len(votes) + len(ready),
            "lost": len(waiting) - len(ready),
            "last": self.keyed("trial", name, [*votes][-1]) if votes else None,
            "trial": shown,
            "next": following,
        }

    def vote(self, rater: object, trial_id: object, answers: object, seconds: object = None) -> dict[str, Any]:
        """Store a vote, or with ``answers`` None its undoing, and return the next state; a retry changes nothing."""
        name, asked = _check_name(rater), self.study.options.questions
        valid = isinstance(answers, dict) and {*answers} == {*asked} and all(c in CHOICES for c in answers.values())
        if not (answers is None or valid):
            choices, questions = ", ".join(CHOICES), ", ".join(asked)
            raise UserError(f"Expected {choices} for each of the questions {questions}, got {answers!r}.")
        trial = next((t for t in self._queue(name) if self.keyed("trial", name, t.index) == trial_id), None)
        if trial is None:
            raise NotShown("Expected a vote on a pair that you were shown, got another; reload the page.")
        known = isinstance(seconds, int | float) and 0 <= seconds < 86400
        took = round(float(seconds), 2) if known else None  # type: ignore[arg-type]
        self.store.append(self.study.vote(name, trial, answers, seconds=took))  # type: ignore[arg-type]
        return self.state(name)

    def image(self, image_id: str) -> bytes | None:
        """Return the PNG of an id; None if the id was not given out or its file is gone."""
        if image_id not in self._served:
            return None
        key, damaged = self._served[image_id]
        try:
            return self._png(key, damaged)
        except (OSError, ValueError, SyntaxError) as error:
            # errors with an errno may be transient, unlike those of a decoder, which have none
            if getattr(error, "errno", None) in (None, errno.EACCES):
                self._broken.add(key)
            return None

    def _show(self, rater: str, trial: Trial) -> dict[str, Any]:
        shown = {"id": self.keyed("trial", rater, trial.index), "prompt": self.study.items[trial.item].prompt}
        for side, image in zip(("left", "right"), self._images(trial), strict=True):
            image_id = self.keyed("image", rater, trial.index, side)
            self._served[image_id] = image
            shown[side] = f"image/{image_id}.png"
        return shown

    def _images(self, trial: Trial) -> list[tuple[Key, bool]]:
        """Return the left and the right image of a trial, and whether each is shown damaged."""
        first, second = self.study.items[trial.item].keys
        images = [(first, False), (first, True) if trial.kind == "check" else (second, False)]
        return images[::-1] if trial.swapped else images

    def _is_there(self, key: Key) -> bool:
        return key not in self._broken and self.files[key].is_file()

    def _encode(self, key: Key, damaged: bool) -> bytes:
        """Read an image and encode only its pixels, without anything else of the file."""
        data = self.files[key].read_bytes()
        if not hashlib.sha256(data).hexdigest().startswith(self.study.images[key][0]):
            raise ValueError("not the image that the study was made of")
        with Image.open(io.BytesIO(data)) as opened:
            pixels = np.asarray(to_rgb(opened))
        return encode_png(_damage(pixels) if damaged else pixels)

    def keyed(self, *parts: object) -> str:
        """Derive an id, or the token that admits others, from the study's secret."""
        text = "\0".join(map(str, (self.study.id, *parts)))
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()[:32]


def build_app(desk: Desk, token: str | None = None, hosts: Sequence[str] = ("*",)) -> Starlette:
    """Build the web application; a token is required of every request as a cookie, or once as ``?token=``."""
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    questions = {key: QUESTIONS[key] for key in desk.study.options.questions}
    html = environment.get_template("preference_page.html.j2").render(questions=questions)
    # named after the study: cookies do not distinguish the ports of a machine
    cookie = f"preference-{hashlib.sha256((token or '').encode()).hexdigest()[:8]}"

    async def guard(request: Request, proceed: RequestResponseEndpoint) -> Response:
        given = request.query_params.get("token", request.cookies.get(cookie, ""))
        if token is not None and not hmac.compare_digest(given.encode("utf-8", "replace"), token.encode()):
            response = Response("Open the page by the address with the token that its server printed.", 403)
        elif (
            token is not None and "token" in request.query_params
        ):  # move it out of the address, which browsers show and store
            response = RedirectResponse("/", 303)
            response.set_cookie(cookie, token, max_age=30 * 86400, httponly=True, samesite="strict")
        else:
            response = await proceed(request)
        response.headers.update(_HEADERS)
        return response

    def image(request: Request) -> Response:
        data = desk.image(request.path_params["name"])
        return Response("not there", 404) if data is None else Response(data, media_type="image/png")

    async def answer(request: Request) -> Response:
        """Answer in JSON; errors become sentences for the rater."""
        # a form of another page cannot post this type
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return JSONResponse({"error": "Expected JSON."}, 415)
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > _MAX_BODY:
                return JSONResponse({"error": f"Expected at most {_MAX_BODY} bytes."}, 413)
        try:
            body = json.loads(data)
            if not isinstance(body, dict):
                raise UserError("Expected a JSON object.")
            given = [body.get(key) for key in ("rater", "trial", "answers", "seconds")]
            call = (desk.vote, *given) if "answers" in body else (desk.state, given[0])
            return JSONResponse(await run_in_threadpool(*call))
        except ValueError as error:  # UserError, or no JSON
            return JSONResponse({"error": str(error)}, 409 if isinstance(error, NotShown) else 400)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            text = f"Your vote was NOT stored ({reason}). Tell whoever runs this study, then try again."
            return JSONResponse({"error": text}, 507)

    routes = [
        Route("/", lambda request: HTMLResponse(html)),
        Route("/page.css", lambda request: FileResponse(_TEMPLATES / "preference_page.css")),
        Route("/page.js", lambda request: FileResponse(_TEMPLATES / "preference_page.js")),
        Route("/image/{name}.png", image),
        Route("/answer", answer, methods=["POST"]),
    ]
    middleware = [Middleware(TrustedHostMiddleware, hosts), Middleware(BaseHTTPMiddleware, guard)]
    return Starlette(routes=routes, middleware=middleware)


def _check_name(name: object) -> str:
    text = " ".join(unicodedata.normalize("NFC", name).split()) if isinstance(name, str) else ""
    if not text or len(text) > _MAX_NAME or not text.isprintable():
        raise UserError(f"Expected a name of 1 to {_MAX_NAME} letters, got {name!r:.80}; choose another one.")
    return text


def _damage(pixels: np.ndarray) -> np.ndarray:
    """Reduce an image to coarse blocks with noise, which no attentive rater prefers."""
    h, w = pixels.shape[:2]
    small = Image.fromarray(pixels).resize((12, 12), Image.Resampling.BOX)
    coarse = np.asarray(small.resize((w, h), Image.Resampling.NEAREST), np.int16)
    noise = np.random.default_rng(0).integers(-90, 91, (h, w, 1), dtype=np.int16)
    return (coarse + noise).clip(0, 255).astype(np.uint8)
