"""The command line: `python -m scheduler.simulator [NAME ...] [--step-time F,P,D,C]`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from scheduler.simulator.comparisons import COMPARISONS, Comparison
from scheduler.simulator.step_time import StepTime


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scheduler.simulator", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMPARISONS)}; all without any")
    parser.add_argument(
        "--step-time",
        type=_step_time,
        default=StepTime(),
        metavar="F,P,D,C",
        help="seconds of a step: fixed, for a token of prefill, for a decoding sequence, "
        "for a million pairs of a token and one that it attends to",
    )
    parser.add_argument("--json", type=Path, help="write the tables here")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in COMPARISONS]
    if unknown:
        parser.error(f"no comparison is named {unknown[0]!r}; there are {', '.join(COMPARISONS)}")
    tables = {}
    for name in options.names or COMPARISONS:
        began_s = time.perf_counter()
        comparison = COMPARISONS[name](options.step_time)
        tables[name] = asdict(comparison)
        sys.stdout.write(table(comparison))
        sys.stdout.write(f"simulated in {time.perf_counter() - began_s:.1f} s\n\n")
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(tables))


def table(comparison: Comparison) -> str:
    """As text, a row for each policy."""
    cells = [("", *comparison.columns)]
    cells += [
        (row.policy, *(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in row.values))
        for row in comparison.rows
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([comparison.title, *lines, ""])


def _step_time(text: str) -> StepTime:
    parts = [float(part) for part in text.split(",")]
    if len(parts) != 4 or not all(0.0 <= part < float("inf") for part in parts) or not any(parts):
        raise ValueError(text)
    fixed_s, prefill_token_s, decode_sequence_s, context_s = parts
    return StepTime(
        fixed_s=fixed_s,
        prefill_token_s=prefill_token_s,
        decode_sequence_s=decode_sequence_s,
        context_s=context_s,
    )


if __name__ == "__main__":
    main()
