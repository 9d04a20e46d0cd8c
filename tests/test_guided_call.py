"""How far one guided denoiser call goes: the files it visits, and the moves between them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from conftest import ROOT, make_head

from guidance.apply import apply_guidance
from guidance.guides import MidBlockGuide

PACKAGE = str(ROOT / "guidance")

#: Files that one guided call may visit, and moves from a function of one file to one of another.
FILES, MOVES = 8, 40


class Visits:
    """Functions of the library in the order in which they are called, without the type checks of the tests."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            self.calls.append((code.co_filename[len(PACKAGE) + 1 :], code.co_qualname))

    @property
    def files(self) -> list[str]:
        return sorted({file for file, _ in self.calls})

    @property
    def moves(self) -> int:
        return sum(a != b for (a, _), (b, _) in zip(self.calls, self.calls[1:], strict=False))


def visits_of_a_call(pipe: Any, guide: Any, number: int) -> Visits:
    """Return what the guided call of this number does, in a run of an unmodified pipeline with CFG."""
    visits, calls = Visits(), 0

    def profiled(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            sys.setprofile(visits if calls == number else None)
            try:
                return forward(*args, **kwargs)
            finally:
                sys.setprofile(None)

        return call

    with apply_guidance(pipe, [guide]):
        pipe.unet.forward = profiled(pipe.unet.forward)
        pipe("a red balloon", num_inference_steps=4, guidance_scale=3.0, output_type="latent")
    return visits


def test_a_guided_call_visits_few_files_and_moves_little(tiny_pipe: Any) -> None:
    guide = MidBlockGuide(make_head(tiny_pipe, temperature=[1.5] * 10), 1.0, start=0, stop=1)
    visits = visits_of_a_call(tiny_pipe, guide, 3)
    print(f"{len(visits.files)} files, {visits.moves} moves: {', '.join(visits.files)}")
    assert "apply/guided.py" in visits.files and "heads/networks.py" in visits.files
    assert len(visits.files) <= FILES and visits.moves <= MOVES


def test_the_first_call_also_checks_the_gradient(tiny_pipe: Any) -> None:
    guide = MidBlockGuide(make_head(tiny_pipe), 1.0, start=0, stop=1)
    assert "apply/check.py" in visits_of_a_call(tiny_pipe, guide, 1).files


if __name__ == "__main__":  # prints the walk through one guided call of the testbed, function by function
    from guidance import build_head, load_pipeline
    from guidance.heads import HeadConfig

    testbed = load_pipeline("testbed")
    prediction = testbed.scheduler.config.prediction_type
    head = build_head(HeadConfig("conv", testbed.unet.config.block_out_channels[-1], prediction_type=prediction))
    found = visits_of_a_call(testbed, MidBlockGuide(head, 1.0, start=0, stop=1), 3)
    print("\n".join(f"{file:25}{function}" for file, function in found.calls))
    print(f"{len(found.files)} files, {found.moves} moves")
