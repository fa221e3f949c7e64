"""Models that we have no code for over two ranks: cut by DeepSpeed AutoTP, and served by `shoal serve`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from protos.shoal.v1 import inference_pb2
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.integration.autotp_process import HOST, LOGITS, NUM_SEQUENCES
from tests.integration.served import Served, run_shoal, serving
from tests.unit.workers.autotp.cases import CASES, checkpoint_of
from tests.unit.workers.model.stepping import BLOCK_SIZE, TOLERANCE, distance, expected_logits, sequences
from tests.unit.workers.ranks import settings_for
from workers.model.other_config import NOTICE
from workers.parallel.groups import host_store
from workers.parallel.plan import ParallelPlan

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]
# AutoTP leaves olmo2's norms over all heads and gpt-oss's sinks whole, and does not know GPT-2's projections.
CUT = [case for case in CASES if not case.startswith(("olmo2", "gpt_oss", "gpt2"))]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    found = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp("checkpoint")
        found[case] = (folder, checkpoint_of(folder, case))
    return found


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In fp32, and so large that memory shows: most of it in what AutoTP cuts."""
    import transformers

    folder = tmp_path_factory.mktemp("wide")
    sizes = {"vocab_size": 203, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 128}
    write_checkpoint(folder, transformers.MistralConfig(**sizes, **heads, sliding_window=None))
    return folder


@pytest.fixture(scope="module")
def answers(
    checkpoints: dict[str, tuple[Path, Any]], wide: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, Any]]]:
    """What each rank said of each model."""
    settings = settings_for(
        Path(), plan=ParallelPlan(tensor=2), block_size=BLOCK_SIZE, step_timeout_s=30, collectives="gloo"
    )
    path = tmp_path_factory.mktemp("settings") / "settings.json"
    path.write_text(json.dumps(dataclasses.asdict(settings)))
    store = host_store(HOST)
    folders = [*(str(folder) for folder, _ in checkpoints.values()), f"{wide}=bfloat16"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.autotp_process", str(path), str(rank), str(store.port), *folders],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    said = [[json.loads(line) for line in output.splitlines() if line.startswith("{")] for output, _ in outputs]
    return [dict(zip([*checkpoints, "wide"], lines, strict=True)) for lines in said]


def test_a_rank_holds_its_part_alone(answers: list[dict[str, dict[str, Any]]], wide: Path) -> None:
    whole = (wide / "model.safetensors").stat().st_size
    first, second = (answer["wide"] for answer in answers)
    slack = 16 << 20  # what a first pass leaves behind, and malloc's own
    for report in (first, second):
        assert whole * 0.22 < report["weight_bytes"] < whole * 0.3, "half of it, in half the bytes"
        assert report["read_bytes"] < slack, "mapped, not read"
        assert report["loaded_bytes"] < report["weight_bytes"] + slack < whole * 0.5
    assert first["bytes_read"] > whole * 0.99
    angles = 2 * second["weight_bytes"] - second["bytes_read"]  # are no weights, and stay in fp32
    assert 0 <= angles < 4096


@pytest.mark.parametrize("case", CUT)
def test_two_ranks_compute_what_transformers_does(
    case: str, checkpoints: dict[str, tuple[Path, Any]], answers: list[dict[str, dict[str, Any]]]
) -> None:
    folder, model = checkpoints[case]
    reports = [answer[case] for answer in answers]
    assert "refused" not in reports[0], reports[0]
    got = load_file(folder / LOGITS)
    for number, sequence in enumerate(sequences(NUM_SEQUENCES, seed=11)):
        sequence.logits.append(got[str(number)])
        assert distance(sequence, expected_logits(model, sequence)) <= TOLERANCE
    assert "cut by DeepSpeed AutoTP" in reports[0]["kernels"]
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert max(report["weight_bytes"] for report in reports) < whole, "a rank holds a part"
    heads = model.config.num_key_value_heads // 2 if hasattr(model.config, "num_key_value_heads") else 2
    width = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    tokens = reports[0]["num_blocks"] * BLOCK_SIZE
    assert reports[0]["cache_bytes"] == tokens * 2 * heads * width * model.config.num_hidden_layers * 4


@pytest.mark.parametrize("case", [case for case in CASES if case not in CUT])
def test_what_autotp_cannot_cut_is_refused(case: str, answers: list[dict[str, dict[str, Any]]]) -> None:
    for answer in answers:
        assert "parallel.tensor 2: DeepSpeed AutoTP does not cut this" in answer[case]["refused"]


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    import transformers

    folder = tmp_path_factory.mktemp("models") / "neox"
    vocab_size = write_tokenizer(folder).get_vocab_size()
    sizes = CASES[next(case for case in CASES if case.startswith("gpt_neox"))][1]
    config = transformers.GPTNeoXConfig(**(sizes | {"vocab_size": vocab_size, "max_position_embeddings": 512}))
    return folder, write_checkpoint(folder, config)


@pytest.fixture(scope="module")
def served(neox: tuple[Path, Any]) -> Iterator[Served]:
    with serving(neox[0], "--tensor", "2", config="inference: {max_batch_tokens: 16, dtype: float32}") as server:
        yield server


def test_served_greedily_it_says_what_transformers_does(served: Served, neox: tuple[Path, Any]) -> None:
    """Prompts longer than a step, several at once, then one of them again from the prefix cache."""
    texts = ["A shoal is many small fish that move as one", "The quick brown fox", "A shoal is many small fish"]
    streams = [served.stream(text, max_tokens=24) for text in texts]
    got = [[token for chunk in stream for token in chunk.token_ids] for stream in streams]
    got.append(served.tokens(texts[0], max_tokens=24))
    for text, tokens in zip([*texts, texts[0]], got, strict=True):
        answer = served.inference.Tokenize(inference_pb2.TokenizeRequest(text=text), timeout=20)
        prompt = list(answer.token_ids)
        with torch.no_grad():
            whole = neox[1].generate(
                torch.tensor([prompt]),
                max_new_tokens=24,
                min_new_tokens=24,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert tokens == whole[0, len(prompt) :].tolist()


def test_status_and_the_log_say_that_it_is_slower(served: Served) -> None:
    notice = f"a gpt_neox model {NOTICE}"
    assert notice in served.output
    status = served.status()
    assert notice in list(status.warnings)
    assert "transformers" in status.engines[0].kernels
    shown = run_shoal("status", "--address", f"127.0.0.1:{served.port}")
    assert "slower than a native model" in " ".join(shown.stdout.split())
