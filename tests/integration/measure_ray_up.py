"""From `ray up` on two hosts to the first token at a third: `python -m tests.integration.measure_ray_up`.

The hosts are network namespaces of this machine (needs root, sshd and rsync); the model is tiny, of random weights.
Each round begins with hosts on which nothing runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from loadtest.peers.comparison import Figure, Findings, begin, deliver, progress
from tests.checkpoints import tiny_deepseek
from tests.hosts import obstacle
from tests.hosts.ray_cluster import serving_on
from tests.hosts.ray_up import API_KEY, config, hosts_for_ray_up, ray_up

_STEPS = ("`ray up` has returned", "`shoal serve` is ready", "the first token")


def measure(num_hosts: int) -> list[float]:
    """Seconds from the beginning of `ray up` to each of the steps."""
    with tempfile.TemporaryDirectory(prefix="ray-up-") as folder:
        model = tiny_deepseek(Path(folder) / "tiny")
        with hosts_for_ray_up(num_hosts, model, Path(folder)) as hosts:
            *nodes, operator = hosts
            began_s = time.monotonic()
            ray_up(operator, nodes)
            found = [time.monotonic() - began_s]
            text = config(data=num_hosts, threads=len(os.sched_getaffinity(0)))
            with serving_on(nodes[0], model, text) as server:
                found.append(time.monotonic() - began_s)
                door = next(line.split()[-1] for line in server.output.splitlines() if line.strip().startswith("gRPC"))
                asked_s = time.monotonic() - began_s
                asked = operator.run(sys.executable, "-m", "tests.hosts.ask", door, API_KEY, "A shoal is", "8")
                found.append(asked_s + json.loads(asked.stdout)["first_s"])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = begin(parser)
    if why := obstacle():
        parser.error(why)
    rounds = []
    for number in range(1, options.rounds + 1):
        rounds.append(measure(options.hosts))
        progress(f"round {number} of {options.rounds}: {', '.join(f'{seconds:.1f} s' for seconds in rounds[-1])}")
    figures = tuple(
        Figure(what=f"from `ray up` until {step}", unit="s", ours=tuple(found[index] for found in rounds))
        for index, step in enumerate(_STEPS)
    )
    facts = {
        "hosts": f"{options.hosts} for Ray and one for the operator: network namespaces of one machine",
        "model": "tiny, in DeepSeek-V3's form: what is measured is Ray and our start, not loading",
    }
    deliver(Findings(title="`ray up` to the first token", peer="", figures=figures, facts=facts), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
