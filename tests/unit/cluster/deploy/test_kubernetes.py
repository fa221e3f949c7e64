"""The Kubernetes manifest and the container files, as far as they can be checked without an engine."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.app.names import APP, app_name
from cluster.config import parse

DEPLOY = Path(__file__).parents[4] / "cluster/deploy"
MANIFEST = DEPLOY / "kubernetes/shoal.yaml"


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    """By kind; there is one of each."""
    found = [document for document in yaml.safe_load_all(MANIFEST.read_text()) if document]
    assert all({"apiVersion", "kind", "metadata"} <= document.keys() for document in found)
    assert all(document["metadata"]["name"].startswith("shoal") for document in found)
    return {document["kind"]: document for document in found}


@pytest.fixture(scope="module")
def ray_cluster(objects: dict[str, Any]) -> dict[str, Any]:
    cluster = objects["RayService"]["spec"]["rayClusterConfig"]
    assert isinstance(cluster, dict)
    return cluster


def containers(ray_cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [ray_cluster["headGroupSpec"], *ray_cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_serve_takes_its_part_and_finds_the_application(objects: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own way with pydantic
        from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(objects["RayService"]["spec"]["serveConfigV2"]))
    assert [application.name for application in schema.applications] == [APP, app_name("engine-0")]
    for application in schema.applications:
        module, _, name = str(application.import_path).partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        assert Path(str(application.args["config"])).name in objects["ConfigMap"]["data"]
    assert schema.applications[1].args["engine"] == "engine-0"
    assert schema.proxy_location == "Disabled"


def test_the_configuration_is_one_that_shoal_reads(objects: dict[str, Any]) -> None:
    config = parse(yaml.safe_load(objects["ConfigMap"]["data"]["shoal.yaml"]))
    assert config.cluster.address == "auto"
    assert config.cluster.host == "0.0.0.0"
    ports = {port["port"] for port in objects["Service"]["spec"]["ports"]}
    assert ports == {config.cluster.port, config.cluster.http_port}


def test_ray_demands_a_token_and_is_the_tested_version(ray_cluster: dict[str, Any]) -> None:
    assert ray_cluster["authOptions"] == {"mode": "token"}
    constraints = (DEPLOY.parents[1] / "constraints.txt").read_text()
    (version,) = re.findall(r"^ray==(.+)$", constraints, re.MULTILINE)
    assert ray_cluster["rayVersion"] == version


def test_every_pod_has_what_ranks_need(objects: dict[str, Any], ray_cluster: dict[str, Any]) -> None:
    groups = [ray_cluster["headGroupSpec"], *ray_cluster["workerGroupSpecs"]]
    for group in groups:
        spec = group["template"]["spec"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        (container,) = spec["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.keys() == volumes
        assert {"/dev/shm", "/models", "/etc/shoal"} == set(mounts.values())
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "Go reads a map of strings"
    for group in ray_cluster["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    claims = {
        v["persistentVolumeClaim"]["claimName"]
        for v in groups[0]["template"]["spec"]["volumes"]
        if "claimName" in str(v)
    }
    assert claims == {objects["PersistentVolumeClaim"]["metadata"]["name"]}


def test_no_secret_is_written_down(ray_cluster: dict[str, Any]) -> None:
    for container in containers(ray_cluster):
        for variable in container["env"]:
            assert not re.search("TOKEN|KEY|SECRET", variable["name"]) or "secretKeyRef" in variable["valueFrom"]


def test_strangers_reach_the_doors_alone(objects: dict[str, Any]) -> None:
    own, doors = objects["NetworkPolicy"]["spec"]["ingress"]
    assert own["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "shoal"}
    assert {port["port"] for port in doors["ports"]} == {9000, 8000}


def test_the_compose_file() -> None:
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    service = document["services"]["shoal"]
    folder = (DEPLOY / service["build"]["context"]).resolve()
    assert (folder / service["build"]["dockerfile"]).is_file()
    assert (folder / "pyproject.toml").is_file()
    content = document["configs"]["shoal"]["content"]
    config = parse(yaml.safe_load(re.sub(r"\$\{SHOAL_API_KEY[^}]*\}", "a-key-for-tests", content)))
    assert config.security.api_key == "a-key-for-tests"
    assert {port.rpartition(":")[2] for port in service["ports"]} == {
        str(config.cluster.port),
        str(config.cluster.http_port),
    }
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    grace_s = int(service["stop_grace_period"].removesuffix("s"))
    assert grace_s > config.cluster.drain_timeout_s


def test_the_container_file() -> None:
    """One instruction a line once continued lines are joined; what it copies and calls exists."""
    text = (DEPLOY / "Containerfile").read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    words = [line.split() for line in lines]
    known = {
        "ARG",
        "FROM",
        "ENV",
        "RUN",
        "WORKDIR",
        "USER",
        "COPY",
        "EXPOSE",
        "VOLUME",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }
    assert {word[0] for word in words} <= known
    order = [word[0] for word in words]
    assert order.index("FROM") < order.index("RUN") < order.index("USER") < order.index("COPY")
    assert [word[1] for word in words if word[0] == "USER"] == ["shoal"], "nothing runs as root in the end"
    assert (DEPLOY.parents[1] / "install.sh").is_file()
    assert any("RAY_AUTH_MODE=token" in line for line in lines)


@pytest.mark.parametrize("path", [MANIFEST, DEPLOY / "compose.yaml", DEPLOY / "Containerfile"])
def test_what_was_not_run_says_so(path: Path) -> None:
    assert re.search(r"Not (run|built):", "\n".join(path.read_text().splitlines()[:3]))
