"""A model's chat template: messages in, the prompt's text out.

The template is code that came with the model and is fed with what clients send, so it runs in Jinja's immutable
sandbox. The environment is set up as in transformers (`utils/chat_template_utils.py`), which defines what templates
may rely on: `trim_blocks`, `lstrip_blocks`, loop controls, a `tojson` that escapes no HTML, `raise_exception`,
`strftime_now` and the `generation` tag.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.front_door.call import Message
from cluster.front_door.special_tokens import named_special_tokens, read_json_object, read_tokenizer_config

__all__ = ["RESERVED_NAMES", "ChatTemplate"]

# What `render` takes itself; a client may set any other variable of the template.
RESERVED_NAMES = frozenset({"self", "messages", "add_generation_prompt"})
_DEFAULT = "default"


class ChatTemplate:
    """A compiled template, or none: then every `render` says so."""

    def __init__(
        self,
        source: str | None,
        special_tokens: Mapping[str, str] | None = None,
        *,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens` are variables of the template, such as `bos_token`. ValueError for a broken template."""
        self._special_tokens = dict(special_tokens or {})
        self._template: jinja2.Template | None = None
        if source is not None:
            try:
                self._template = _environment(now).from_string(source)
            except jinja2.TemplateError as error:
                raise ValueError(f"the model's chat template cannot be compiled: {error}") from error

    @classmethod
    def from_folder(cls, folder: Path | str) -> ChatTemplate:
        """Reads chat_template.jinja, chat_template.json or tokenizer_config.json, in this order."""
        path = Path(folder)
        config = read_tokenizer_config(path)
        return cls(_read_source(path, config), named_special_tokens(config))

    @property
    def exists(self) -> bool:
        """Whether the model has a template."""
        return self._template is not None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **kwargs: object) -> str:
        """The prompt's text, special tokens included. Raises ValueError for what the template does not take."""
        if self._template is None:
            raise ValueError("this model has no chat template; send a text or token ids instead")
        variables = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **kwargs,
            "messages": [_as_dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(variables)
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # A template calls what it likes on what it is given; whatever it stumbles over, the messages do not fit.
            raise ValueError(f"the model's chat template does not accept these messages: {error}") from error
        except RecursionError:
            raise ValueError("the model's chat template does not accept these messages: they nest too deeply") from None


def _as_dict(message: Message) -> dict[str, object]:
    fields: dict[str, object] = {"role": message.role, "content": message.content}
    if message.name:
        fields["name"] = message.name
    return fields


def _read_source(folder: Path, config: Mapping[str, object]) -> str | None:
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    found = read_json_object(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if found is None or isinstance(found, str):
        return found
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError("tokenizer_config.json: chat_template must be a string or a list of named templates")
    named = {entry.get("name"): entry.get("template") for entry in found}
    source = named.get(_DEFAULT)
    if not isinstance(source, str):
        raise ValueError(f"tokenizer_config.json: chat_template has no template named {_DEFAULT!r}")
    return source


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    environment.globals["namespace"] = _Namespace
    return environment


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without underscored names: those are a known way out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may store `self`, as in Jinja's own
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what to train on; here it prints its body."""

    tags = {"generation"}  # noqa: RUF012, the base class's own form

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)
