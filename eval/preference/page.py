"""The web page of a study: an ASGI application around `eval.preference.desk`, and the server that runs it.

It uses Starlette and uvicorn (extra ``ui``); docs/preference.md says why not Gradio.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import importlib.util
import ipaddress
import json
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eval.preference.config import QUESTIONS
from eval.preference.desk import Desk, NotShown
from guidance.utils.errors import UserError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response


TEMPLATES = Path(__file__).parent / "templates"

_MAX_BODY = 4096

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}

Endpoint = Callable[["Request"], Awaitable["Response"]]


def require_ui() -> None:
    """Require the optional packages.

    Raises:
        UserError: If one is missing.
    """
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise UserError(f"Expected {names} to be installed; run: pip install 'midblock-guidance[ui]'.")


def build_app(desk: Desk, *, token: str | None = None, hosts: Sequence[str] = ("*",)) -> Starlette:
    """Build the application.

    Args:
        desk: Answers the requests.
        token: Required of every request as a cookie, or once as ``?token=``; None requires none.
        hosts: Accepted host names; "*" for any.  On loopback this keeps other pages of the browser out.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import Response
    from starlette.routing import Route

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    questions = {key: QUESTIONS[key] for key in desk.study.options.questions}
    page = environment.get_template("preference_page.html.j2").render(questions=questions)
    files = {
        "/": (page, "text/html"),
        "/page.css": (_read("preference_page.css"), "text/css"),
        "/page.js": (_read("preference_page.js"), "text/javascript"),
    }

    def guarded(endpoint: Endpoint) -> Endpoint:
        @functools.wraps(endpoint)
        async def answer(request: Request) -> Response:
            if token is not None and request.query_params.get("token") is not None:
                return _admit(request, token)
            if token is not None and not _equal(request.cookies.get(_cookie(token), ""), token):
                return Response("Open the page by the address with the token that its server printed.", 403)
            response = await endpoint(request)
            response.headers.update(_HEADERS)
            return response

        return answer

    async def static(request: Request) -> Response:
        text, kind = files[request.url.path]
        return Response(text, media_type=kind)

    routes = [Route(path, guarded(static)) for path in files]
    routes.append(Route("/image/{name}.png", guarded(functools.partial(_image, desk))))
    for name in _CALLS:
        routes.append(Route(f"/api/{name}", guarded(functools.partial(_call, desk, name)), methods=["POST"]))
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))])


def bind(host: str, port: int) -> socket.socket:
    """Bind the address of a server; port 0 takes a free one.

    Raises:
        UserError: If it is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)  # from now on a browser waits and is not refused
    except (OSError, OverflowError) as error:
        listener.close()
        message = f"Expected a free address, got {host}:{port} ({error}); choose another: port=0 takes a free one."
        raise UserError(message) from error
    return listener


def run_server(app: Starlette, listener: socket.socket) -> None:
    """Serve until Ctrl-C or a termination signal."""
    import uvicorn

    # uvicorn raises the signal again when done; its default action would end the process without releasing the claim
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    uvicorn.Server(config).run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Tell whether an address is reachable from this machine only.

    >>> is_loopback("localhost"), is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _image(desk: Desk, request: Request) -> Response:
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import Response

    data = await run_in_threadpool(desk.image, request.path_params["name"])
    return Response("not there", 404) if data is None else Response(data, media_type="image/png")


_CALLS: dict[str, Callable[[Desk, dict[str, Any]], dict[str, Any]]] = {
    "join": lambda desk, body: desk.join(body.get("rater")),
    "state": lambda desk, body: desk.state(body.get("rater")),
    "vote": lambda desk, body: desk.vote(*(body.get(key) for key in ("rater", "trial", "answers", "seconds"))),
    "undo": lambda desk, body: desk.undo(body.get("rater"), body.get("trial")),
}


async def _call(desk: Desk, name: str, request: Request) -> Response:
    """Answer in JSON; errors become sentences for the rater."""
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse

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
        return JSONResponse(await run_in_threadpool(_CALLS[name], desk, body))
    except NotShown as error:
        return JSONResponse({"error": str(error)}, 409)
    except ValueError as error:  # UserError, or no JSON
        return JSONResponse({"error": str(error)}, 400)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        text = f"Your vote was NOT stored ({reason}). Tell whoever runs this study, then try again."
        return JSONResponse({"error": text}, 507)


def _admit(request: Request, token: str) -> Response:
    """Move the token from the address, which browsers show and store, into a cookie."""
    from starlette.responses import RedirectResponse, Response

    if not _equal(request.query_params["token"], token):
        return Response("That token is not the one of this study.", 403)
    response = RedirectResponse("/", 303, headers=_HEADERS)
    response.set_cookie(_cookie(token), token, max_age=30 * 86400, httponly=True, samesite="strict")
    return response


def _cookie(token: str) -> str:
    """Name the cookie after the study: cookies do not distinguish the ports of a machine."""
    return f"preference-{hashlib.sha256(token.encode()).hexdigest()[:8]}"


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def _read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
