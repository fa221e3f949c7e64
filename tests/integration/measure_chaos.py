"""A campaign of random faults against a tiny mixture of experts on four ranks, and a section for loadtest/RESULTS.md.

    python -m tests.integration.measure_chaos --faults 100 --out /tmp/chaos

Serves a checkpoint of random weights, shaped as DeepSeek V3, over four DP groups that share their experts
(`inference.deterministic`), runs `shoal chaos` against it with every answer compared to the undisturbed one, and
prints what it showed. Ends with its status: 0 where nothing was lost, repeated, skipped or different.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.checkpoints import tiny_deepseek
from tests.integration.served import run_shoal, serving

_KEY = "key-of-the-campaign"
_CONFIG = f"""
parallel: {{data: 4, redundant_experts: 4}}
inference: {{deterministic: true, max_model_len: 1024, step_timeout_s: 3.0}}
security: {{api_key: {{ops: {_KEY}}}, administrators: [ops]}}
chaos: {{enabled: true}}
cluster: {{front_doors: 2}}
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--roles", default="rank=6,leader,front-door=2,controller,roster")
    parser.add_argument("--kinds", default="kill=8,freeze")
    parser.add_argument("--double", type=float, default=0.1)
    parser.add_argument("--streams", type=int, default=6)
    parser.add_argument("--timeout-s", type=float, default=6 * 3600.0)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "chaos")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        model = tiny_deepseek(Path(folder) / "tiny", max_position_embeddings=1024)
        with serving(model, config=_CONFIG) as served:
            began_s = time.monotonic()
            command = ["chaos", "--address", f"127.0.0.1:{served.port}", "--api-key", _KEY, "--verify"]
            for name in ("faults", "seed", "roles", "kinds", "double", "streams", "out"):
                command += [f"--{name}", str(getattr(options, name))]
            done = run_shoal(*command, "--tokens", "200", "--requests", "8", timeout_s=options.timeout_s)
            took_s = time.monotonic() - began_s
            if done.returncode:
                sys.stderr.write(done.stderr + served.output[-8000:])
    sys.stdout.write(
        f"{options.faults} faults in {took_s:.0f} s, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}\n"
    )
    sys.stdout.write("".join(f"- {line}\n" for line in done.stdout.splitlines()))
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
