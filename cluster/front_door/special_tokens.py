"""The special tokens that a model folder names, and the ids that end its output.

Shared by the tokenizer, which must know which tokens are not text, and the chat template, which prints them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

__all__ = ["named_special_tokens", "read_eos_token_ids", "read_json_object", "read_tokenizer_config"]


def read_json_object(path: Path) -> dict[str, object]:
    """The object in a JSON file, empty if there is no such file; ValueError names a file that is no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} must hold a JSON object, not {type(value).__name__}")
    return value


def read_tokenizer_config(folder: Path) -> dict[str, object]:
    """tokenizer_config.json over special_tokens_map.json, which older folders keep beside it."""
    return {
        **read_json_object(folder / "special_tokens_map.json"),
        **read_json_object(folder / "tokenizer_config.json"),
    }


def named_special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """Names such as `bos_token` to their text; a token is given as a string or as an object with `content`."""
    named: dict[str, str] = {}
    for key, value in config.items():
        if not key.endswith("_token"):
            continue
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and content:
            named[key] = content
    return named


def read_eos_token_ids(folder: Path) -> frozenset[int]:
    """`eos_token_id` of generation_config.json, or else of config.json; empty where neither says."""
    for name in ("generation_config.json", "config.json"):
        value = read_json_object(folder / name).get("eos_token_id")
        if value is None or value == []:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ValueError(f"{name}: eos_token_id must be a token id or a list of them, not {value!r}")
        return frozenset(ids)
    return frozenset()
