"""One of two ranks that loads models of transformers, cut by DeepSpeed AutoTP, and runs sequences through them.

    python -m tests.integration.autotp_process SETTINGS.json RANK PORT FOLDER[=DTYPE]...

The first rank leaves each sequence's logits in its model's folder; each rank prints, as JSON, what it was refused
with or what it holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import random
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from tests.unit.workers.model.stepping import sequences
from tests.unit.workers.ranks import Sequence_, step_of
from workers.assemble import assemble
from workers.autotp import load
from workers.parallel.collectives import Collectives
from workers.parallel.groups import Groups
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings

HOST = "127.0.0.1"
LOGITS = "logits.safetensors"
NUM_SEQUENCES = 4


def _own_bytes() -> int:
    """Memory of this process that no file backs."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and is still kept for later
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def run_all(settings: EngineSettings, rank: int, tensor: Collectives) -> list[Sequence_]:
    """Every sequence to its end, in steps of any mixture that are the same on both ranks."""
    memory = {}
    read = load._read

    def after_reading(*arguments: Any) -> Any:
        before_bytes = _own_bytes()
        model = read(*arguments)
        memory["read_bytes"] = _own_bytes() - before_bytes
        return model

    before_bytes = _own_bytes()
    with mock.patch.object(load, "_read", after_reading):
        runner = assemble(settings, settings.plan.place(rank), tensor)
    memory["loaded_bytes"] = _own_bytes() - before_bytes
    found = sequences(NUM_SEQUENCES, seed=11)
    rng = random.Random(12)
    while open_sequences := [s for s in found if s.num_computed < len(s.token_ids)]:
        chosen = rng.sample(open_sequences, rng.randint(1, len(open_sequences)))
        counts = [min(rng.choice((1, 1, 5, 11)), len(s.token_ids) - s.num_computed) for s in chosen]
        logits = runner.forward(step_of([(s, count, count) for s, count in zip(chosen, counts, strict=True)]))
        assert (logits is None) == (rank > 0)
        for sequence, count in zip(chosen, counts, strict=True):
            sequence.num_computed += count
            if logits is not None:
                sequence.logits.append(logits[:count])
                logits = logits[count:]
    print(json.dumps(dataclasses.asdict(runner.report) | memory))
    return found


def main(settings_path: str, rank: int, port: int, folders: list[str]) -> None:
    torch.set_num_threads(1)
    values: dict[str, Any] = json.loads(Path(settings_path).read_text())
    settings = EngineSettings(**{**values, "plan": ParallelPlan(**values["plan"])})
    groups = Groups.join(settings, rank, generation=1, store=(HOST, port), hosts={0: HOST, 1: HOST})
    for asked in folders:
        folder, _, dtype = asked.partition("=")
        try:
            changed = dataclasses.replace(settings, model_path=folder, dtype=dtype or settings.dtype)
            found = run_all(changed, rank, groups.tensor)
        except ValueError as error:
            print(json.dumps({"refused": str(error)}))
            continue
        if rank == 0:
            logits = {str(number): torch.cat(sequence.logits) for number, sequence in enumerate(found)}
            save_file(logits, Path(folder) / LOGITS)
    groups.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
