"""The configuration: parsed once, resolved by functions that return new values."""

from __future__ import annotations

from cluster.config.load import ConfigError, load, parse
from cluster.config.schema import Config

__all__ = ["Config", "ConfigError", "load", "parse"]
