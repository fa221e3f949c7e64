"""The files for `ray up`: what Ray itself finds wrong with them, and what must be in each."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

FOLDER = Path(__file__).parents[4] / "cluster/deploy/ray"
FILES = ("local", "aws", "gcp", "azure")


def read(name: str) -> dict[str, Any]:
    document = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_it(name: str) -> None:
    config = prepare_config(read(name))
    validate_config(config)
    if name != "local":
        assert {"head", "cpu", "gpu"} == set(config["available_node_types"])


def test_ray_would_find_a_fault() -> None:
    broken = {**read("aws"), "head_node_typ": "head"}
    with pytest.raises(Exception, match="head_node_typ"):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("name", FILES)
def test_no_node_starts_without_the_token(name: str) -> None:
    config = read(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["file_mounts"]["~/.shoal/node.env"] == "cluster/deploy/ray/node.env"
    starts = [c for key in ("head", "worker") for c in config[f"{key}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    for start in starts:
        assert ". ~/.shoal/node.env;" in start.partition("ray start")[0]
        assert "--node-ip-address=$(node_address)" in start
    assert "--include-dashboard=false" in starts[0]
    assert config["head_start_ray_commands"][-1].endswith(". ~/.shoal/node.env; keep_gcs"), "once the head runs"
    assert "\nexport RAY_AUTH_MODE=token\n" in (FOLDER / "node.env").read_text()


@pytest.mark.parametrize("name", ["aws", "gcp", "azure"])
def test_what_was_not_run_says_so(name: str) -> None:
    assert "Not run:" in (FOLDER / f"{name}.yaml").read_text().splitlines()[0]


def in_shell(command: str, **variables: str) -> str:
    """After node.env, in an environment of `variables` alone."""
    done = subprocess.run(
        ["bash", "-euc", f". {FOLDER}/node.env; {command}"],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "RAY_HEAD_IP": "", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_interface_is_said_once() -> None:
    show = "echo $GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME $(node_address)"
    assert in_shell(show, SHOAL_INTERFACE="lo") == "lo lo 127.0.0.1"
    assert in_shell("echo ${GLOO_SOCKET_IFNAME-none} $(node_address)", RAY_HEAD_IP="127.0.0.9") == "none 127.0.0.1"


def test_the_path_leads_to_shoal() -> None:
    assert in_shell("echo $PATH", SHOAL_VENV="/srv/shoal/.venv").startswith("/srv/shoal/.venv/bin:")


def test_the_head_keeps_what_it_knows() -> None:
    show = "echo ${RAY_gcs_storage-none} ${RAY_gcs_storage_path-none}"
    assert in_shell(show, HOME="/home/me") == "rocksdb /home/me/.shoal/gcs"
    assert in_shell(show, RAY_gcs_storage_path="/disk") == "rocksdb /disk"
    assert in_shell(show, RAY_REDIS_ADDRESS="10.0.0.1:6379") == "none none", "in Redis"
