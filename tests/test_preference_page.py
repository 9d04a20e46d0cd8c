"""The page of `eval.preference` in a real browser, and its server from outside: killed, restarted, attacked."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_preference import write_run

from eval.preference import __main__ as preference
from eval.preference.votes import current_votes, read_lines

ROOT = Path(__file__).parent.parent
MISSING = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (extra ui)")
OPTIONS = ("per_rater=null", "repeats=0.1", "checks=0.1")
N = 24  # pairs; with 2 repeats and 2 attention checks a queue of 28


class Server:
    """A `serve` process."""

    def __init__(self, run: Path, *options: str, port: int = 0) -> None:
        words = [sys.executable, "-m", "eval.preference", "serve", str(run), f"port={port}", *options]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        printed = ""
        for line in self.process.stdout:
            printed += line
            if found := re.search(r"(http://\S+:(\d+)/)(\S*)", line):
                self.root, self.port, self.query = found[1], int(found[2]), found[3]
                return
        raise AssertionError(f"no address in: {printed}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, how)
            self.process.communicate(timeout=20)

    def call(self, body: object, **headers: str) -> tuple[int, dict[str, Any]]:
        headers = {"Content-Type": "application/json"} | headers
        status, text, _ = self.fetch("answer", json.dumps(body).encode(), headers)
        return status, json.loads(text)

    def fetch(self, path: str, data: bytes | None = None, headers: Any = ()) -> tuple[int, bytes, Any]:
        request = urllib.request.Request(self.root + path, data, dict(headers))
        opener = urllib.request.build_opener(NoRedirect)
        try:
            with opener.open(request, timeout=20) as response:
                return response.status, response.read(), response.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    reason = "playwright is not installed (extra dev)"
    driver = pytest.importorskip("playwright.sync_api", reason=reason, exc_type=ImportError)
    names = [os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))]
    for name in filter(None, names):  # one that is there may still be a stub that asks for a snap
        if subprocess.run([name, "--version"], capture_output=True).returncode == 0:
            with driver.sync_playwright() as playwright:
                arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
                browser = playwright.chromium.launch(executable_path=name, args=arguments)
                yield browser
                browser.close()
            return
    pytest.skip("no Chromium that runs: apt-get install chromium, or set CHROMIUM to its binary")


class Rater:
    """A rater in a browser of his own, who notes what he answered."""

    def __init__(self, browser: Any, server: Server, name: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: self.problems.append(dialog.message))
        self.name, self.chosen = name, list[str]()
        self.page.goto(server.root)
        self.page.fill("#name", name)
        self.page.click("#join .primary")
        self.ready()

    def ready(self, answered: int | None = None) -> None:
        """Wait until the pair after so many answers is shown."""
        number = len(self.chosen) if answered is None else answered
        self.page.wait_for_function(
            "n => document.querySelector('#progress').textContent.startsWith(`${n} of`) "
            "&& !document.querySelector('#skip').disabled",
            arg=number + 1,
        )

    def press(self, key: str) -> None:
        names = {"ArrowLeft": "left", "ArrowRight": "right", "ArrowDown": "tie", "t": "tie", "s": "skip"}
        self.chosen.append(names[key])
        self.page.keyboard.press(key)

    def click(self, choice: str) -> None:
        self.chosen.append(choice)
        self.page.click("#skip" if choice == "skip" else f"[data-choice={choice}]")


def answers(run: Path, rater: str) -> list[str]:
    """What is stored of a rater, in the order of the queue."""
    votes = sorted(
        (v for v in current_votes(read_lines(run / "preference/main")) if v.rater == rater), key=lambda v: v.trial
    )
    return [(v.answers or {})["looks"] for v in votes]


def test_raters_vote_reload_and_survive_a_kill(tmp_path: Path, chromium: Any) -> None:
    run = write_run(tmp_path / "r", n=N)
    server = Server(run, *OPTIONS)
    try:
        ann = Rater(chromium, server, "Ann <b>")
        bob = Rater(chromium, server, "bob", viewport={"width": 390, "height": 844}, has_touch=True)
        carol = threading.Thread(target=vote_by_program, args=(server, "carol", 15))
        carol.start()
        for i in range(10):
            ann.press(("ArrowLeft", "ArrowRight", "ArrowDown", "t", "s")[i % 5])
            bob.click(("right", "left", "tie")[i % 3])
            ann.ready()
            bob.ready()
        carol.join()
        ann.page.reload()
        ann.ready()
        ann.page.keyboard.press("u")
        ann.ready(answered=9)
        ann.chosen.pop()
        ann.press("ArrowLeft")
        ann.ready()

        server.stop(signal.SIGKILL)
        assert answers(run, "bob") == bob.chosen and answers(run, ann.name) == ann.chosen
        ann.press("ArrowRight")
        ann.page.wait_for_selector("#notice:has-text('No connection')")
        server = Server(run, *OPTIONS, port=server.port)
        ann.ready()
        assert ann.page.is_hidden("#notice")
        for i in range(10):
            ann.click(("left", "right", "tie", "skip")[i % 4])
            ann.ready()
        bob.press("ArrowLeft")
        bob.ready()

        assert not ann.problems and not bob.problems
        assert answers(run, ann.name) == ann.chosen and len(ann.chosen) == 21
        assert answers(run, "bob") == bob.chosen and len(bob.chosen) == 11
        assert answers(run, "carol") == ["tie"] * 15
        check_report(run, [*ann.chosen, *bob.chosen, *["tie"] * 15])
    finally:
        server.stop()


def check_report(run: Path, chosen: list[str]) -> None:
    """The report counts exactly the votes that were cast: all but skipped pairs, repeats and checks."""
    preference.main(["report", str(run), "attention=0"])
    summary = json.loads((run / "preference/main/summary.json").read_text())
    cast = current_votes(read_lines(run / "preference/main"))
    assert Counter(c for v in cast for c in (v.answers or {}).values()) == Counter(chosen)
    counted = [v for v in cast if v.kind == "pair" and (v.answers or {})["looks"] != "skip"]
    (rate,) = summary["questions"]["looks"]["rates"]
    assert summary["answers_cast"] == len(chosen) and summary["votes_counted"] == len(counted)
    assert rate["wins"] == sum(v.preferred("looks") == 1 for v in counted)
    assert rate["ties"] == sum(v.preferred("looks") == 0.5 for v in counted)
    assert rate["losses"] == sum(v.preferred("looks") == 0 for v in counted)
    page = (run / "preference/main/preference.html").read_text()
    assert "Ann &lt;b&gt;" in page and f"{len(counted)} votes were cast" in page


def vote_by_program(server: Server, rater: str, n: int) -> None:
    _, state = server.call({"rater": rater})
    for _ in range(n):
        said = {"rater": rater, "trial": state["trial"]["id"], "answers": {"looks": "tie"}, "seconds": 1}
        status, state = server.call(said)
        assert status == 200


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    run = write_run(tmp_path_factory.mktemp("shared") / "r", n=4)
    server = Server(run, "repeats=0", "checks=0", "questions=[looks, fits]", "token=true")
    yield server, run
    server.stop()


def test_two_questions_zoom_and_narrow_screens(shared: tuple[Server, Path], chromium: Any) -> None:
    server, run = shared
    for width, height in ((360, 640), (390, 844), (844, 390), (1280, 800)):
        context = chromium.new_context(viewport={"width": width, "height": height}, has_touch=width < 900)
        page = context.new_page()
        requests: list[str] = []
        page.on("request", lambda request, requests=requests: requests.append(request.url))
        page.goto(server.root + server.query)
        assert "token" not in page.url
        page.fill("#name", f"rater {width}")
        page.click("#join .primary")
        for number in (1, 2):
            page.wait_for_selector(f"#progress:has-text('{number} of 4')")
            page.wait_for_selector("#pair:not(.loading)")
            wide, left, prompt = page.evaluate(
                "[document.documentElement.scrollWidth, document.querySelector('#left').getBoundingClientRect().width,"
                " document.querySelector('#prompt').textContent]"
            )
            assert wide == width and left >= 100 and prompt
            page.keyboard.press("z")
            page.wait_for_selector("#zoomed img")
            page.keyboard.press("Escape")
            page.click("[data-zoom=right]")
            assert page.is_visible("#zoomed")
            page.click("#zoomed")
            assert page.is_hidden("#zoomed")
            page.keyboard.press("ArrowLeft")  # the first question
            assert page.text_content("#progress") == f"{number} of 4"
            page.click("[data-question=fits] [data-choice=tie]")
        page.wait_for_selector("#progress:has-text('3 of 4')")
        assert all(url.startswith((server.root, "data:")) for url in requests)
        page.close()
        context.close()
    votes = [v for v in read_lines(run / "preference/main") if v.rater == "rater 360"]
    assert [v.answers for v in votes] == [{"looks": "left", "fits": "tie"}] * 2


def test_the_end_and_hostile_prompts(shared: tuple[Server, Path], chromium: Any) -> None:
    page = chromium.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    page.goto(shared[0].root + shared[0].query)
    page.click("#join .primary")
    prompts = set()
    for number in range(1, 5):
        page.wait_for_selector(f"#progress:has-text('{number} of 4')")
        page.wait_for_selector("#pair:not(.loading)")
        prompts.add(page.text_content("#prompt"))
        page.keyboard.press("s")
    page.wait_for_selector("#finished:has-text('Thank you')")
    page.keyboard.press("u")
    page.wait_for_selector("#progress:has-text('4 of 4')")
    assert "<script>alert(1)</script>" in prompts and not dialogs
    page.close()


def test_a_vote_that_is_not_stored_is_not_shown_as_stored(shared: tuple[Server, Path], chromium: Any) -> None:
    server, run = shared
    page = chromium.new_page()
    page.goto(server.root + server.query)
    page.fill("#name", "unlucky")
    page.click("#join .primary")
    page.wait_for_selector("#progress:has-text('1 of 4')")
    page.wait_for_selector("#pair:not(.loading)")
    pid, limit = server.process.pid, resource.RLIMIT_FSIZE
    resource.prlimit(pid, limit, (1, resource.RLIM_INFINITY))  # no file may grow beyond a byte
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#notice:has-text('NOT stored')")
    assert page.text_content("#progress") == "1 of 4" and not [
        v for v in read_lines(run / "preference/main") if v.rater == "unlucky"
    ]
    resource.prlimit(pid, limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#progress:has-text('2 of 4')")
    (vote,) = [v for v in read_lines(run / "preference/main") if v.rater == "unlucky"]
    assert vote.answers == {"looks": "right", "fits": "right"}
    page.close()


def test_who_is_let_in_and_what_is_served(shared: tuple[Server, Path]) -> None:
    server, run = shared
    assert server.query.startswith("?token=") and len(server.query) > 30
    assert server.fetch("")[0] == 403 and server.fetch("page.js")[0] == 403
    assert server.fetch("", headers={"Cookie": "preference-00000000=wrong"})[0] == 403
    assert server.fetch("?token=wrong")[0] == 403 and server.fetch("?token=%C3%BC")[0] == 403
    status, _, headers = server.fetch(server.query)
    cookie = headers["Set-Cookie"].partition(";")[0]
    assert status == 303
    assert "HttpOnly" in headers["Set-Cookie"] and "SameSite=strict" in headers["Set-Cookie"]
    inside = {"Cookie": cookie}
    status, page, headers = server.fetch("", headers=inside)
    assert status == 200 and cookie.encode() not in page
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert headers["Cache-Control"] == "no-store"
    assert not re.search(rb"https?://", page + server.fetch("page.js", headers=inside)[1])
    # a page of another name that the browser resolves to this machine, a form of another page, too much
    assert server.fetch("", headers=inside | {"Host": "evil.example"})[0] == 400
    assert server.fetch("answer", b"rater=eve", inside)[0] == 415
    assert server.call({"rater": "x" * 5000}, **inside)[0] == 413
    assert server.call(["eve"], **inside)[0] == 400 and server.call({"answers": {}}, **inside)[0] == 400
    secret = (run / "preference/main/secret").read_bytes()
    paths = ["records.jsonl", "image/records.jsonl", "image/..%2f..%2frecords.jsonl", "image/%2e%2e/secret.png"]
    paths += ["../preference/main/secret", "page.py", f"image/{'0' * 32}.png", "image/images/unguided/0.png"]
    for path in paths:
        status, body, _ = server.fetch(path, headers=inside)
        assert status == 404 and secret not in body and b"unguided" not in body, path
    status, state = server.call({"rater": "eve"}, **inside)
    assert status == 200
    forged = {"rater": "mallory", "trial": state["trial"]["id"], "answers": {"looks": "left", "fits": "left"}}
    assert server.call(forged, **inside)[0] == 409
    status, image, headers = server.fetch(state["trial"]["left"], headers=inside)
    assert status == 200 and image.startswith(b"\x89PNG")
    assert not {k.lower() for k in headers} & {"etag", "last-modified"}


def test_a_second_server_is_refused(shared: tuple[Server, Path]) -> None:
    server, run = shared
    words = ["serve", str(run), "port=0", "repeats=0", "checks=0", "questions=[looks, fits]"]
    command = [sys.executable, "-m", "eval.preference", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2 and f"process {server.process.pid} on" in done.stderr
    assert server.fetch("")[0] == 403
