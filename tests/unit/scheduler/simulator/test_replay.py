"""The command that plays a trace on recorded steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scheduler.simulator.replay import main
from scheduler.simulator.step_time import Features, StepTime

TRUE = StepTime(fixed_s=0.01, prefill_token_s=0.001, decode_sequence_s=0.002, context_s=0.0)


def test_a_trace_takes_what_the_recorded_steps_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for step in range(60):
        prefill, decodes, pairs = step % 7 * 40, step % 5, step % 11 / 100
        features: Features = (1.0, prefill, decodes, pairs)
        lines.append(json.dumps([step, features, TRUE.seconds_of(features)]))
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "group.jsonl").write_text("\n".join(lines))
    trace = tmp_path / "trace.jsonl"
    arrivals = ({"at_s": at_s, "prompt_tokens": 100, "output_tokens": 4} for at_s in (1.0, 2.0))
    trace.write_text("\n".join(map(json.dumps, arrivals)))
    output = tmp_path / "out.json"
    settings = json.dumps({"num_blocks": 100, "prefix_cache": False})
    main([str(trace), "--steps", str(tmp_path / "steps"), "--settings", settings, "--json", str(output)])
    found = json.loads(output.read_text())
    assert found["ttft_s"] == pytest.approx([0.11, 0.11], rel=1e-3)
    assert found["e2e_s"] == pytest.approx([0.146, 0.146], rel=1e-3)
    assert (found["num_output_tokens"], found["num_steps"]) == (8, 8)
    assert found["duration_s"] == pytest.approx(1.146, rel=1e-3)
    assert found["fit_error"] < 1e-3
    assert "TTFT p50 0.110 s" in capsys.readouterr().out
