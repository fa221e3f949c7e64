"""What the doctor shows: a table for people, JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from cluster.doctor.finding import Finding, Level

__all__ = ["as_json", "render", "summary"]

_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.FAILURE: "red"}


def render(findings: Sequence[Finding]) -> Iterator[Table | Text]:
    """The table, then every fix in full: a narrow terminal must not cut a command."""
    table = Table("check", "where", "", "found", box=None)
    for column in table.columns[:3]:
        column.no_wrap = True
    for finding in findings:
        level = Text(finding.level, style=_STYLES[finding.level])
        table.add_row(finding.check, finding.node, level, Text(finding.text))
    yield table
    for finding in findings:
        if finding.fix:
            where = f" on {finding.node}" if finding.node else ""
            yield Text(f"{finding.level}: {finding.check}{where}: {finding.fix}", style=_STYLES[finding.level])
    yield Text(summary(findings))


def summary(findings: Sequence[Finding]) -> str:
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    return f"{counts[Level.OK]} ok, {counts[Level.WARNING]} warnings, {counts[Level.FAILURE]} failures"


def as_json(findings: Sequence[Finding]) -> str:
    """One object: `healthy`, and the findings in order."""
    healthy = not any(finding.level is Level.FAILURE for finding in findings)
    return json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in findings]}, indent=2)
