"""What a front door knows of the model it serves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from cluster.front_door.call import SamplingOptions

__all__ = ["ModelCard"]

# What generation_config.json may set, where neither the client nor the configuration does.
_GENERATION_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """A served model; `defaults` are the sampling values that a client's unset ones take.

    `vocab_size` is the width of the model's embedding and output, which can be larger than its tokenizer's vocabulary.
    """

    name: str
    max_model_len: int
    vocab_size: int
    aliases: tuple[str, ...] = ()
    dtype: str = ""
    architecture: str = ""
    created_unix_s: int = 0
    defaults: SamplingOptions = field(default_factory=SamplingOptions)

    def answers_to(self, name: str) -> bool:
        """Whether a client that asks for `name` means this model; the empty name means the only one."""
        return not name or name == self.name or name in self.aliases

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        *,
        name: str,
        aliases: tuple[str, ...] = (),
        max_model_len: int | None = None,
        dtype: str = "",
        defaults: SamplingOptions | None = None,
        created_unix_s: int | None = None,
    ) -> ModelCard:
        """Reads config.json and generation_config.json of a Hugging Face folder.

        `max_model_len` is what the engine serves, by default the model's own; `defaults` go before
        generation_config.json. Raises ValueError naming the file and the key.
        """
        path = Path(folder)
        config = _read_object(path / "config.json")
        architectures = config.get("architectures")
        created = (path / "config.json").stat().st_mtime if created_unix_s is None else created_unix_s
        return cls(
            name=name,
            aliases=aliases,
            max_model_len=max_model_len or _positive_int(config, "max_position_embeddings"),
            vocab_size=_positive_int(config, "vocab_size"),
            dtype=dtype or str(config.get("torch_dtype") or config.get("dtype") or ""),
            architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "",
            created_unix_s=int(created),
            defaults=_merge(defaults or SamplingOptions(), _generation_defaults(path)),
        )


def _generation_defaults(folder: Path) -> SamplingOptions:
    path = folder / "generation_config.json"
    if not path.exists():
        return SamplingOptions()
    config = _read_object(path)
    known: dict[str, float] = {}
    for key in _GENERATION_KEYS:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{path.name}: {key} must be a number, not {value!r}")
        known[key] = value
    top_k = known.pop("top_k", None)
    return SamplingOptions(
        temperature=known.get("temperature"),
        top_p=known.get("top_p"),
        top_k=None if top_k is None else int(top_k),
        min_p=known.get("min_p"),
        repetition_penalty=known.get("repetition_penalty"),
    )


def _merge(first: SamplingOptions, second: SamplingOptions) -> SamplingOptions:
    """`first`, with its unset values taken from `second`."""
    unset = SamplingOptions()
    changes = {
        entry.name: getattr(second, entry.name)
        for entry in fields(SamplingOptions)
        if getattr(first, entry.name) == getattr(unset, entry.name)
    }
    return replace(first, **changes)


def _read_object(path: Path) -> Mapping[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing from the model's folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} must hold an object, not {type(value).__name__}")
    return value


def _positive_int(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key} must be a positive whole number, not {value!r}")
    return value
