"""Takes the figures again and writes them into RESULTS.md, each section with its command, machine and date.

python -m loadtest.figures              every section, one after the other; leave the machine alone meanwhile
python -m loadtest.figures startup      only these sections; `scheduler` is all whose names begin so
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from loadtest.machine import describe_code, describe_machine
from loadtest.peers.comparison import Findings

__all__ = ["SECTIONS", "main", "replace_section", "section"]

RESULTS = Path(__file__).with_name("RESULTS.md")
SECTIONS = {
    "startup": "loadtest.peers.startup",
    "transformers": "loadtest.peers.transformers_generate",
    "moe": "loadtest.peers.moe",
    "ep": "tests.integration.measure_ep",
    "moe-layer": "tests.integration.measure_moe_layer",
    "rollout": "tests.integration.measure_rollout",
    "chaos": "tests.integration.measure_chaos",
    "ray-up": "tests.integration.measure_ray_up",
    "serve-proxy": "loadtest.peers.serve_proxy",
    "latency": "loadtest.peers.latency",
    "scheduler-simulated": "loadtest.peers.scheduler_simulated",
    "scheduler-engine": "loadtest.peers.scheduler_engine",
    "scheduler-trace": "loadtest.peers.scheduler_trace",
}
GROUPS = {"scheduler": ("scheduler-simulated", "scheduler-engine", "scheduler-trace")}


def section(command: str, findings: Findings, *, date: str, machine: str, code: str) -> str:
    """A section's text."""
    return f"{findings.markdown()}\n\n`{command}`, {date}. {machine}. {code}.\n"


def replace_section(text: str, name: str, body: str) -> str:
    """`text` with the marked section changed. Raises ValueError where it has no such section, or several."""
    pattern = re.compile(rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
    changed, count = pattern.subn(lambda match: f"{match[1]}{body}{match[2]}", text)
    if count != 1:
        raise ValueError(f"RESULTS.md has {count} sections named {name}, not one")
    return changed


def _take(module: str) -> tuple[str, Findings]:
    """Runs a comparison as its reader would. Raises CalledProcessError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "findings.json"
        subprocess.run([sys.executable, "-m", module, "--json", str(output)], check=True)  # noqa: S603
        return f"python -m {module}", Findings.from_json(output.read_text(encoding="utf-8"))


def main(
    arguments: Sequence[str] | None = None,
    *,
    results: Path = RESULTS,
    take: Callable[[str], tuple[str, Findings]] = _take,
) -> int:
    """The command; returns its exit status: 1 where a goal was missed, which the section then says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    known = ", ".join([*SECTIONS, *GROUPS])
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {known}; default: all")
    asked = parser.parse_args(arguments).sections or list(SECTIONS)
    chosen = [section for name in asked for section in GROUPS.get(name, (name,))]
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    missed = []
    for name in chosen:
        command, findings = take(SECTIONS[name])
        date = datetime.now(UTC).date().isoformat()
        body = section(command, findings, date=date, machine=describe_machine(), code=describe_code())
        # Written after each section: the next may take minutes, or fail.
        results.write_text(replace_section(results.read_text(encoding="utf-8"), name, body), encoding="utf-8")
        missed += [figure.what for figure in findings.figures if figure.reached is False]
    for what in missed:
        print(f"goal missed: {what}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
