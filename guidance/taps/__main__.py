"""List the taps of a model: ``python -m guidance.taps MODEL``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from guidance.utils.errors import friendly_errors

PROG = "python -m guidance.taps"


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``python -m guidance.taps``."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=(
            "List the taps of a model: what heads can read, the shape of the features, and the share of a full "
            "forward's FLOPs that it takes to get there (guidance adds the backward of that part)."
        ),
        epilog=f"example:\n  {PROG} random:sdxl --depth 2\n  a head on two of them: tap=down_blocks.2+mid_block",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="testbed, a folder, a hub id, or random:NAME")
    parser.add_argument("--latent-size", type=int, metavar="N", help="side of the latents (default: the model's)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="samples (default: 1)")
    parser.add_argument("--depth", type=int, default=1, metavar="N", help="blocks inside blocks (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    from guidance.taps.table import build_shape, format_table, list_taps

    with friendly_errors(PROG):
        table = list_taps(build_shape(args.model), args.latent_size, args.batch_size, args.depth)
    print(json.dumps(dataclasses.asdict(table), indent=2) if args.json else format_table(table))


if __name__ == "__main__":
    main()
