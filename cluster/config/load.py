"""Reads the configuration file. Whatever is wrong with it is said in the words of the file: key by key."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pydantic
import yaml

from cluster.config.schema import Config

__all__ = ["ConfigError", "load", "parse"]

Key = tuple[str, ...]


class ConfigError(ValueError):
    """The configuration cannot be used; the message names every key at fault."""


def load(path: Path | None, overrides: Mapping[Key, object] | None = None) -> Config:
    """The file at `path` (or nothing) with `overrides` put over it. Raises ConfigError."""
    document: object = {}
    where = "options"
    if path is not None:
        where = str(path)
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: not UTF-8 text") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not YAML: {_yaml_problem(error)}") from None
    return parse(document, overrides or {}, where=where)


def parse(document: object, overrides: Mapping[Key, object] | None = None, *, where: str = "configuration") -> Config:
    """`document` as YAML gave it. Raises ConfigError."""
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ConfigError(f"{where}: must be a mapping of sections, not {_kind(document)}")
    # An empty section ("model:" and nothing under it) is the section's defaults.
    merged = {str(name): {} if value is None else value for name, value in document.items()}
    for key, value in (overrides or {}).items():
        _put(merged, key, value, where)
    try:
        # By way of JSON because strict mode takes mappings for dataclasses and lists for tuples only there.
        return _adapter().validate_json(json.dumps(merged, default=str), strict=True)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in _problems(error, merged))) from None


@cache
def _adapter() -> pydantic.TypeAdapter[Config]:
    return pydantic.TypeAdapter(Config)


def _put(document: dict[str, Any], key: Key, value: object, where: str) -> None:
    *sections, last = key
    node = document
    for section in sections:
        child = node.get(section)
        if child is None or child == "auto":
            child = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{where}: {section} must be a mapping of keys, not {_kind(child)}")
        node[section] = dict(child)
        node = node[section]
    node[last] = value


def _problems(error: pydantic.ValidationError, document: dict[str, Any]) -> list[str]:
    messages: dict[Key, list[str]] = {}
    for item in error.errors(include_url=False):
        path = _path_in(document, item["loc"])
        if item["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
            text = _unknown(path)
        else:
            text = item["msg"][0].lower() + item["msg"][1:]
        if text not in messages.setdefault(path, []):
            messages[path].append(text)
    # A union reports every member's complaint: keep the one that goes deepest into the file.
    deepest = {
        path: texts
        for path, texts in messages.items()
        if not any(other != path and other[: len(path)] == path for other in messages)
    }
    return [_sentence(path, texts) for path, texts in deepest.items()]


def _sentence(path: Key, texts: list[str]) -> str:
    shoulds = [text.removeprefix("input should be ") for text in texts if text.startswith("input should be ")]
    text = "must be " + ", or ".join(shoulds) if len(shoulds) == len(texts) else "; ".join(texts)
    return f"{'.'.join(path) or 'the file'}: {text}"


def _unknown(path: Key) -> str:
    nearest = _nearest(path)
    return "unknown key" + (f"; the nearest known key is {'.'.join(nearest)}" if nearest else "")


def _path_in(document: dict[str, Any], loc: tuple[int | str, ...]) -> Key:
    """The part of a pydantic location that is a path in the file; names of union members are not."""
    path: list[str] = []
    node: Any = document
    for part in loc:
        known: object = range(len(node)) if isinstance(node, list) else node
        if isinstance(known, dict | range) and part in known:
            node = node[part]
            path.append(str(part))
    return tuple(path)


def _nearest(path: Key) -> Key | None:
    """The known key most like `path`: first among its siblings, then by its own name anywhere."""
    known = list(_known_keys(Config))
    siblings = {key[-1]: key for key in known if key[:-1] == path[:-1]}
    anywhere = {key[-1]: key for key in known}
    for candidates in (siblings, anywhere):
        match = difflib.get_close_matches(path[-1], candidates, n=1, cutoff=0.6)
        if match:
            return candidates[match[0]]
    return None


def _known_keys(section: type, prefix: Key = ()) -> Iterator[Key]:
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        yield (*prefix, field.name)
        for member in (hints[field.name], *getattr(hints[field.name], "__args__", ())):
            if dataclasses.is_dataclass(member) and isinstance(member, type):
                yield from _known_keys(member, (*prefix, field.name))


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error).splitlines()[0]


def _kind(value: object) -> str:
    return {str: "text", list: "a list", bool: "a truth value"}.get(type(value), f"{value!r}")
