"""`shoal chaos` against `shoal serve`: what dies under load costs nobody a token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import tiny_llama
from tests.integration.served import Served, run_shoal, serving

pytestmark = pytest.mark.timeout(240)

KEY = "key-of-the-operator"
CONFIG = f"""
inference: {{deterministic: true, max_model_len: 2048}}
security: {{api_key: {{ops: {KEY}, alice: key-of-alice}}, administrators: [ops]}}
chaos: {{enabled: true}}
cluster: {{engines: 2, front_doors: 2}}
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = tiny_llama(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=2048)
    with serving(model, config=CONFIG) as server:
        yield server


def test_nothing_is_lost_whoever_dies(served: Served, tmp_path: Path) -> None:
    out = tmp_path / "chaos"
    options = ["--roles", "rank,front-door=3,controller,leader", "--faults", "4", "--seed", "4", "--gap-s", "0.5"]
    options += ["--streams", "4", "--tokens", "250", "--requests", "4", "--verify", "--out", str(out)]
    done = run_shoal("chaos", "--address", f"127.0.0.1:{served.port}", "--api-key", KEY, *options, timeout_s=180)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(out.with_suffix(".json").read_text())
    assert told["clean"]
    assert (told["num_lost"], told["num_repeated"], told["num_skipped"], told["num_differing"]) == (0, 0, 0, 0)
    assert told["num_finished"] == told["num_started"] > 4
    assert len(told["hits"]) == 4
    assert "nothing lost" in out.with_suffix(".html").read_text()


def test_only_administrators_may_do_harm(served: Served) -> None:
    for key, says in (("key-of-alice", "security.administrators"), ("wrong-key", "not known")):
        done = run_shoal("chaos", "--address", f"127.0.0.1:{served.port}", "--api-key", key, "--requests", "1")
        assert done.returncode != 0
        assert says in done.stderr
