"""A campaign of random faults over several hosts, and a section for loadtest/RESULTS.md.

    python -m tests.integration.measure_chaos --faults 100 --out /tmp/chaos

Makes hosts on this machine (network namespaces; needs root), a Ray cluster on them, and serves a checkpoint of random
weights, shaped as DeepSeek V3, over four DP groups that share their experts (`inference.deterministic`). Ray's head and
what controls the engine are on the first host, ranks on the others, front doors on two. Streams are open all the while,
and each answer is compared with the undisturbed one. Processes are hit by the cluster's own `Admin.Inject`, hosts from
outside. Ends with 0 where nothing was lost, repeated, skipped or different.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.chaos.campaign import Campaign, run, works
from cluster.chaos.injector import AdminInjector, Injectors
from cluster.chaos.report import as_html, as_json, as_lines
from cluster.chaos.schedule import Plan
from cluster.chaos.verdict import Verdict
from loadtest.peers.comparison import Figure, Findings, begin, deliver, progress
from tests.checkpoints import tiny_deepseek
from tests.hosts import Hosts, make_hosts, obstacle
from tests.hosts.faults import HostFaults
from tests.hosts.ray_cluster import ray_cluster, serving_on
from tests.priority import as_others, go_first

_KEY = "key-of-the-campaign"
_PORT, _HTTP_PORT = 19000, 18000
_RANKS_PER_HOST = 2
_STEP_TIMEOUT_S = 3.0
_CONFIG = f"""
parallel: {{data: 4, redundant_experts: 4}}
inference: {{deterministic: true, dtype: float32, max_model_len: 1024, step_timeout_s: {_STEP_TIMEOUT_S}}}
resources: {{cache_size: 16MiB, cpu_threads: 1}}
security: {{api_key: {{ops: {_KEY}}}, administrators: [ops]}}
chaos: {{enabled: true}}
cluster: {{front_doors: 2, host: 0.0.0.0, port: {_PORT}, http_port: {_HTTP_PORT}, network: {{interface: eth0}}}}
"""
_WEIGHTS = {
    ("kill", "rank"): 30.0,
    ("freeze", "rank"): 10.0,
    ("kill", "front-door"): 12.0,
    ("freeze", "front-door"): 3.0,
    ("kill", "leader"): 8.0,
    ("freeze", "leader"): 2.0,
    ("kill", "controller"): 4.0,
    ("freeze", "controller"): 1.0,
    ("kill", "roster"): 4.0,
    ("freeze", "roster"): 1.0,
    ("kill", "host"): 8.0,
    ("cut", "host"): 6.0,
    ("freeze", "host"): 4.0,
    ("mute", "host"): 3.0,
    ("part", "host"): 3.0,
}
_LASTING_S = {"freeze": 6.0, "kill host": 5.0, "cut": 7.0, "mute": 7.0, "part": 7.0}
_LIMITS_S = {
    "kill rank": 3.0,
    "kill rank (two at once)": 3.0,
    "freeze rank": _STEP_TIMEOUT_S + 3.0,
    "freeze rank (two at once)": _STEP_TIMEOUT_S + 3.0,
    "kill leader": 0.0,
    "kill front-door": 2.0,
    **{f"{kind} host": 8.0 for kind in ("kill", "cut", "freeze", "mute", "part")},
}


@contextmanager
def _serving(options: argparse.Namespace) -> Iterator[Hosts]:
    """Of two hosts, both have ranks; of more, the first has none."""
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        model = tiny_deepseek(Path(folder) / "tiny", max_position_embeddings=1024)
        on_head = _RANKS_PER_HOST if options.hosts == 2 else 0
        with (
            make_hosts(options.hosts, shared=[model], default_route=False) as hosts,
            ray_cluster(*hosts, num_cpus=_RANKS_PER_HOST, on_head=on_head),
            serving_on(hosts[0], model, _CONFIG) as server,
        ):
            try:
                yield hosts
            finally:
                if options.logs:
                    _keep_logs(hosts, server.output, options.logs)


def _keep_logs(hosts: Hosts, output: str, folder: Path) -> None:
    """What ranks, leaders and front doors wrote, by host."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "serve").write_text(output)
    for host in hosts:
        for path in host.outside("/tmp/ray").glob("session_2*/logs/*"):
            if path.is_file() and path.stat().st_size:
                (folder / f"{host.name}-{path.name}").write_bytes(path.read_bytes())


def measure(options: argparse.Namespace) -> tuple[Verdict, str]:
    """And how the client stood beside the rest of the machine. Prints as it goes."""
    with _serving(options) as hosts:
        faults = HostFaults(hosts, list(hosts)[1:], hosts[0], num_cpus=_RANKS_PER_HOST)
        campaign = Campaign(
            addresses=[f"{host.address}:{_PORT}" for host in hosts],
            api_key=_KEY,
            plan=Plan(weights=_weights(options), lasting_s=_LASTING_S, double=options.double, overlap=options.overlap),
            num_faults=options.faults,
            seed=options.seed,
            num_streams=options.streams,
            works=works(8, 200, options.seed),
            gap_s=(0.5, 2.0),
            limits_s=_LIMITS_S,
        )
        priority = go_first()
        try:
            verdict = asyncio.run(
                run(campaign, progress, injector=lambda doors: Injectors(AdminInjector(doors), faults))
            )
            return verdict, priority
        finally:
            as_others()
            faults.close()


def _weights(options: argparse.Namespace) -> dict[tuple[str, str], float]:
    """All, or those asked for."""
    if not options.only:
        return _WEIGHTS
    asked = [tuple(fault.split()) for fault in options.only.split(",")]
    return {(kind, role): _WEIGHTS[kind, role] for kind, role in asked}


def findings(verdict: Verdict, options: argparse.Namespace, took_s: float, priority: str) -> Findings:
    counts = {
        "requests lost": verdict.num_lost,
        "streams with a repeated token": verdict.num_repeated,
        "streams with a skipped token": verdict.num_skipped,
        "streams that differ from the undisturbed ones": verdict.num_differing or 0,
    }
    figures = [
        Figure(what=what, unit="of all", ours=(float(count),), goal=0.0, goal_is_most=True)
        for what, count in counts.items()
    ]
    for label, pauses in verdict.pauses_by_fault.items():
        limit_s = verdict.limits_s.get(label)
        what = f"pause after {label}, p99"
        figures.append(Figure(what=what, unit="s", ours=(pauses.p99_s,), goal=limit_s, goal_is_most=True))
    facts = {
        "model": f"tiny, in DeepSeek-V3's form, four DP groups that share experts, on {options.hosts} hosts",
        "campaign": f"{len(verdict.hits)} faults of seed {options.seed} in {took_s:.0f} s, "
        f"{options.streams} streams; load of the machine {os.getloadavg()[0]:.0f}",
        "the client": priority,
        **{line.partition(": ")[0]: line.partition(": ")[2] for line in as_lines(verdict)},
    }
    return Findings(title="Faults at random under load: what clients saw", peer="", figures=tuple(figures), facts=facts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hosts", type=int, default=4, choices=(2, 3, 4))
    parser.add_argument("--only", default="", help='such as "kill rank,cut host"; default: all of them')
    parser.add_argument("--double", type=float, default=0.1, help="the share of faults that hit two at once")
    parser.add_argument("--overlap", type=float, default=0.3, help="the share whose end the next does not wait for")
    parser.add_argument("--streams", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "chaos", help="OUT.html, OUT.json")
    parser.add_argument("--logs", type=Path, help="a folder for the logs of `shoal serve` and of every host")
    options = begin(parser)
    if why := obstacle():
        parser.error(why)
    began_s = time.monotonic()
    verdict, priority = measure(options)
    options.out.with_suffix(".json").write_text(as_json(verdict))
    options.out.with_suffix(".html").write_text(as_html(verdict))
    deliver(findings(verdict, options, time.monotonic() - began_s, priority), options)
    return 0 if verdict.clean else 1


if __name__ == "__main__":
    sys.exit(main())
