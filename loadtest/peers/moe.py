"""A mixture of experts through the gRPC door against transformers' `generate`, turn by turn in one run.

    python -m loadtest.peers.moe

The model has DeepSeek-V3's form in small: 0.7 billion random parameters, made once by `python -m
workers.weights.random_checkpoint`. How the comparison is run is in `transformers_generate`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from loadtest.peers.comparison import begin, deliver, progress
from loadtest.peers.server import DEFAULT_MODEL, serving
from loadtest.peers.transformers_generate import TASKS, measure

__all__ = ["CHECKPOINTS", "MOE_TASKS", "random_model"]

CHECKPOINTS = Path.home() / ".cache/shoal/figures"
_FLOORS = (1.5, 1.2, 2.5)
MOE_TASKS = tuple(replace(task, floor=floor) for task, floor in zip(TASKS, _FLOORS, strict=True))


def random_model(shape: str, *options: str) -> Path:
    """A checkpoint of random weights, made unless it is there. Raises CalledProcessError where that fails."""
    folder = CHECKPOINTS / shape
    if not (folder / "config.json").exists():
        progress(f"making {folder}")
        unfinished = folder.with_name(f"{shape}.part")
        command = [
            sys.executable,
            "-m",
            "workers.weights.random_checkpoint",
            str(unfinished),
            "--shape",
            shape,
            *options,
        ]
        subprocess.run(command, check=True)  # noqa: S603
        unfinished.rename(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", help="a running server of the same folder; by default one is started")
    parser.add_argument("--model-path", type=Path, help="another model; by default the one of random weights")
    parser.add_argument("--rounds", type=int, default=3)
    options = begin(parser)
    folder = options.model_path or random_model("v3-0.7b", "--tokenizer-from", str(DEFAULT_MODEL))
    with ExitStack() as stack:
        address = options.address
        if not address:
            address = stack.enter_context(serving("--model-path", str(folder))).address
        findings = measure(address, folder, options.rounds, MOE_TASKS)
    title = "A mixture of experts in DeepSeek-V3's form, 0.7 B parameters, served through the gRPC door"
    deliver(replace(findings, title=title), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
