"""`shoal chaos`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.console import Console

from cluster.chaos.campaign import Campaign, ChaosError, run
from cluster.chaos.report import as_html, as_json, as_lines
from cluster.cli.failure import fail

__all__ = ["harm"]


def harm(campaign: Campaign, out: Path | None) -> None:
    """Prints what the campaign showed and writes it to `out`.html and .json. Ends with 1 where it is not clean."""
    console = Console(stderr=True, highlight=False)
    try:
        verdict = asyncio.run(run(campaign, lambda line: console.print(line, soft_wrap=True, markup=False)))
    except ChaosError as error:
        fail(error)
    for line in as_lines(verdict):
        print(line)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(as_json(verdict))
        out.with_suffix(".html").write_text(as_html(verdict))
    raise SystemExit(0 if verdict.clean else 1)
