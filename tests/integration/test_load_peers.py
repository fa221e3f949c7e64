"""The comparisons' own machinery, on work too small to say anything about speed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers

from loadtest.peers import serve_proxy, transformers_generate
from loadtest.peers.child import child
from loadtest.peers.group_stream import GroupStream
from loadtest.peers.process_tree import MemorySampler, ProcessTree
from tests.checkpoints import tiny_llama


@contextmanager
def _fake_server() -> Iterator[str]:
    command = [sys.executable, "-m", "tests.unit.loadtest.fake_server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().split()[0]
        process.stdin.close()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
        eos_token_id=list(range(1000)),  # a generate that minded it would stop at once
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_transformers_and_a_server_do_the_same_work(tiny_model: Path) -> None:
    with _fake_server() as address:
        findings = transformers_generate.measure(address, tiny_model, rounds=1)
    assert [figure.goal for figure in findings.figures] == [1.2, 1.0, 1.5]
    assert all(len(figure.ours) == len(figure.peers) == 1 for figure in findings.figures)
    assert findings.facts["model"] == "fake in float32"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with _fake_server() as address, pytest.raises(ValueError, match="holds no model"):
        transformers_generate.measure(address, tmp_path, rounds=1)


async def test_the_synthetic_group_answers() -> None:
    with child("loadtest.peers.synthetic_group") as address:
        stream = GroupStream(address)
        await stream.open()
        assert 0 < await stream.ttft_s([1, 2, 3]) < 5
        assert 0 < await stream.ttft_s([1, 2, 3]) < 5
        await stream.close()


def test_a_child_that_never_serves_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="before it served"), child("loadtest.peers.ports"):
        pass


def test_memory_counts_a_tree_even_when_its_root_is_gone() -> None:
    grandchild = "import sys; x = bytearray(64 << 20); print('up', flush=True); sys.stdin.read()"
    script = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {grandchild!r}]); sys.stdin.readline()"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    tree = ProcessTree(process)
    assert len(tree.alive()) == 2
    process.kill()
    process.wait()
    (orphan,) = tree.alive()
    with MemorySampler(tree) as sampler:
        sampler.sample()
    assert sampler.peak.num_processes == 1
    assert sampler.peak.pss_bytes >= 64 << 20
    assert sampler.peak.rss_bytes >= sampler.peak.pss_bytes
    process.stdin.close()
    process.stdout.close()
    orphan.wait(10)
    assert tree.alive() == []


def test_the_front_door_and_serves_proxy_stream_the_same(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, max_position_embeddings=512)
    findings = serve_proxy.measure(folder, num_streams=2, num_tokens=8, rounds=1)
    tokens, messages, added = findings.figures
    assert len(tokens.ours) == len(tokens.peers) == 1
    assert messages.peers == tokens.peers, "Serve sends a message a token"
    assert messages.ours[0] <= tokens.ours[0]
    assert added.unit == "ms"


def test_a_comparison_that_is_terminated_ends_what_it_started() -> None:
    script = (
        "import argparse, time; from loadtest.peers.child import child; from loadtest.peers.comparison import begin\n"
        "begin(argparse.ArgumentParser())\n"
        "with child('loadtest.peers.synthetic_group'): print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        tree = ProcessTree(process)
        assert len(tree.alive()) == 2
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
        assert tree.alive() == []
