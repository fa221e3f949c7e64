"""The process environment. Nothing else of ours reads or writes it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = [
    "cache_folder",
    "has_ray_token",
    "hurry_name_lookups",
    "otlp_endpoint",
    "ray_auth_mode",
    "ray_token",
    "ray_uses_token",
    "set_variables",
    "variable",
]


def cache_folder() -> Path:
    """Where models are kept: SHOAL_MODELS_DIR, or the user's cache."""
    models_dir = os.environ.get("SHOAL_MODELS_DIR")
    if models_dir:
        return Path(models_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shoal" / "models"


def variable(name: str) -> str | None:
    """One that the configuration names."""
    return os.environ.get(name) or None


def otlp_endpoint() -> str | None:
    """OpenTelemetry's own variables, the traces' one first."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def ray_auth_mode() -> str | None:
    """What the user chose for Ray, if anything."""
    return os.environ.get("RAY_AUTH_MODE")


def has_ray_token() -> bool:
    """Whether Ray will find a token: in its variables, or where `ray get-auth-token` keeps it."""
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return True
    return (Path.home() / ".ray" / "auth_token").is_file()


def ray_token() -> str | None:
    """The token that Ray would find here, in Ray's own order. Raises OSError for a file that cannot be read."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(path) if path else Path.home() / ".ray" / "auth_token"
    return (file.read_text(encoding="utf-8").strip() or None) if path or file.is_file() else None


def ray_uses_token() -> bool:
    """Whether the Ray that this process would speak to demands a token; Ray asks for one as soon as it finds one."""
    mode = ray_auth_mode()
    return mode == "token" if mode else has_ray_token()


def hurry_name_lookups() -> None:
    """Of processes that are started from now on: torch asks for the name of every host that it connects to, twice 5 s
    each where no name server answers. Whoever has set the resolver's options keeps them."""
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


def set_variables(values: Mapping[str, str]) -> None:
    """Sets what libraries read when they are imported, or what child processes inherit."""
    os.environ.update(values)
