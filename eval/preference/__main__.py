"""Ask people which of two images they prefer, blind, and analyse their votes.

    python -m eval.preference serve runs/samples/NAME                   # a page for raters on this machine
    python -m eval.preference serve runs/samples/NAME host=0.0.0.0      # for others; prints an address with a token
    python -m eval.preference report runs/samples/NAME                  # preference.html, summary.json
    python -m eval.preference export runs/samples/NAME                  # votes.csv, votes.jsonl
    python -m eval.preference merge runs/samples/NAME other/votes.jsonl # votes of another machine
    python -m eval.preference simulate runs/samples/NAME studies=1000   # simulated raters; coverage of the intervals

A study lives in RUN/preference/NAME.  Options, also after 'serve --help': key=value.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

from eval.preference.config import FolderConfig, MergeConfig, ReportConfig, ServeConfig, SimulateConfig
from guidance.utils.config import list_words, parse_config
from guidance.utils.errors import UserError, friendly_errors, nearest

# command -> its options, and the function, which is not imported before it is called
_COMMANDS: dict[str, tuple[type, str]] = {
    "serve": (ServeConfig, "eval.preference.server:serve"),
    "report": (ReportConfig, "eval.preference.report:report"),
    "export": (FolderConfig, "eval.preference.analysis:export"),
    "merge": (MergeConfig, "eval.preference.study:merge"),
    "simulate": (SimulateConfig, "eval.preference.simulate:simulate"),
}


@friendly_errors("eval.preference")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    command, *words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command not in _COMMANDS:
        raise UserError(f"Expected a command first, got '{command}'.{nearest(command, _COMMANDS)}")
    kind, function = _COMMANDS[command]
    prog = f"python -m eval.preference {command}"
    config: Any = parse_config(kind, list_words(words, "folders"), prog=prog, description=str(kind.__doc__))
    pkgutil.resolve_name(function)(config)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
