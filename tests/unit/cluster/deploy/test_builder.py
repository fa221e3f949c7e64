"""What the applications for other people's deployments refuse before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.app.builder import doors, engine
from cluster.config import ConfigError
from cluster.config.environment import ray_token
from cluster.security import derived_secret

KEY = "security: {api_key: a-key-for-tests}"


def written(folder: Path, text: str) -> str:
    path = folder / "shoal.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (KEY, r"cluster\.address must be auto"),
        (f"{KEY}\ncluster: {{address: auto, port: 0}}", r"cluster\.port and cluster\.http_port must be given"),
        ("cluster: {address: auto, host: 0.0.0.0}", "security.api_key"),
    ],
)
def test_a_configuration_that_cannot_be_deployed_so(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        doors({"config": written(tmp_path, text)})


def test_arguments_are_checked(tmp_path: Path) -> None:
    path = written(tmp_path, f"{KEY}\ncluster: {{address: auto}}")
    with pytest.raises(ConfigError, match="args: must have config, not config, engine"):
        doors({"config": path, "engine": "engine-0"})
    with pytest.raises(ConfigError, match="args: must have config, engine, not config"):
        engine({"config": path})
    with pytest.raises(ConfigError, match="engine-7 is none of engine-0"):
        engine({"config": path, "engine": "engine-7"})


def test_applications_apart_come_to_one_secret() -> None:
    assert derived_secret("token") == derived_secret("token")
    assert derived_secret("token") != derived_secret("another")
    assert "token" not in derived_secret("token")


def test_the_token_is_found_where_ray_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert ray_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("at home\n")
    assert ray_token() == "at home"
    (tmp_path / "elsewhere").write_text("elsewhere")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "elsewhere"))
    assert ray_token() == "elsewhere"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "said")
    assert ray_token() == "said"
