"""The configuration file: what it may say, and how it is told what it may not."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
import yaml

from cluster.config import Config, ConfigError, load, parse
from cluster.config.schema import ParallelSection

ROOT = Path(__file__).parents[4]


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "shoal.yaml"
    path.write_text("")
    assert load(path) == load(None) == Config()


def test_an_empty_section_is_its_defaults() -> None:
    assert parse({"model": None, "cluster": {}}) == Config()


def test_values_are_read(tmp_path: Path) -> None:
    path = tmp_path / "shoal.yaml"
    path.write_text(
        "model: {path: /models/x, name: x}\n"
        "parallel: {tensor: 3}\n"
        "inference: {dtype: float32, temperature: 1, max_model_len: 4096}\n"
        "security: {api_key: {alice: secret-one}, cors_origin: [https://example.com]}\n"
    )
    config = load(path)
    assert config.model.name == "x"
    assert config.parallel == ParallelSection(tensor=3)
    assert config.inference.temperature == 1.0
    assert config.inference.max_model_len == 4096
    assert config.security.api_key == {"alice": "secret-one"}
    assert config.security.cors_origin == ("https://example.com",)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"paralel": {}}, "paralel: unknown key; the nearest known key is parallel"),
        ({"parallel": {"tensr": 2}}, "parallel.tensr: unknown key; the nearest known key is parallel.tensor"),
        ({"max_batch_size": 1}, "max_batch_size: unknown key; the nearest known key is inference.max_batch_size"),
        ({"inference": {"api_key": "x"}}, "inference.api_key: unknown key; the nearest known key is security.api_key"),
        ({"zzzz": 1}, "zzzz: unknown key"),
        ({"parallel": "fast"}, "parallel: must be an object, or 'auto'"),
        ({"parallel": {"tensor": 0}}, "parallel.tensor: must be 'auto', or greater than or equal to 1"),
        ({"parallel": {"tensor": "2"}}, "parallel.tensor: must be 'auto', or a valid integer"),
        ({"inference": {"dtype": "fp8"}}, "inference.dtype: must be 'auto', or 'bfloat16', 'float16' or 'float32'"),
        ({"inference": {"temperature": float("nan")}}, "inference.temperature: must be a finite number"),
        ({"cluster": {"engines": True}}, "cluster.engines: must be a valid integer"),
        ({"cluster": {"port": 70000}}, "cluster.port: must be less than or equal to 65535"),
        ({"security": {"cors_origin": [1]}}, "security.cors_origin.0: must be a valid string"),
        (["model"], "must be a mapping of sections, not a list"),
    ],
)
def test_mistakes_are_named_by_their_path(document: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(document, where="shoal.yaml")
    assert str(error.value) == f"shoal.yaml: {message}"


def test_every_mistake_is_told() -> None:
    with pytest.raises(ConfigError) as error:
        parse({"model": {"nam": "x"}, "cluster": {"engines": 0}})
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "not YAML: line 1, column 9"),
        (b"model: \xff", "not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "shoal.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^/nowhere/shoal\.yaml: No such file or directory$"):
        load(Path("/nowhere/shoal.yaml"))


def test_options_go_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "shoal.yaml"
    path.write_text("cluster: {port: 1, engines: 2}\nparallel: auto\n")
    config = load(path, {("cluster", "port"): 9, ("parallel", "tensor"): 3})
    assert (config.cluster.port, config.cluster.engines) == (9, 2)
    assert config.parallel == ParallelSection(tensor=3)


def test_an_option_cannot_hide_a_broken_section() -> None:
    with pytest.raises(ConfigError, match="cluster must be a mapping of keys, not text"):
        parse({"cluster": "x"}, {("cluster", "port"): 9})


def test_the_readme_shows_every_key() -> None:
    text = (ROOT / "cluster" / "README.md").read_text()
    block = text.split("```yaml\n", 1)[1].split("```", 1)[0]
    document = yaml.safe_load(block)
    assert parse(document) != Config()
    shown = {(section, key) for section, keys in document.items() for key in keys} | {("cluster", "address")}
    assert shown == {(section, key) for section, keys in dataclasses.asdict(Config()).items() for key in keys}


def test_only_one_module_touches_the_environment() -> None:
    for path in sorted((ROOT / "cluster").rglob("*.py")):
        if path.name == "environment.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr not in {"environ", "getenv", "putenv"}, f"{path.relative_to(ROOT)}:{node.lineno}"
