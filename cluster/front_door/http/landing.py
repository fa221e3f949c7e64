"""The page at `/`: what this server answers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["landing_page"]

_ENDPOINTS = (
    ("GET", "/v1/models", "the models served"),
    ("POST", "/v1/chat/completions", "chat, streamed or whole"),
    ("POST", "/v1/completions", "text completion, streamed or whole"),
    ("POST", "/tokenize", "text or messages to token ids"),
    ("POST", "/detokenize", "token ids to text"),
    ("GET", "/healthz", "whether this process lives"),
    ("GET", "/readyz", "whether a request would be answered"),
    ("GET", "/metrics", "Prometheus metrics"),
)


def landing_page(models: Sequence[str]) -> str:
    rows = "".join(f"<tr><td>{method}<td><code>{path}</code><td>{meaning}" for method, path, meaning in _ENDPOINTS)
    served = ", ".join(f"<code>{escape(model)}</code>" for model in models)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Shoal</title>'
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:44rem;margin:3rem auto;padding:0 1rem}"
        "td{padding:.1rem 1rem .1rem 0}</style>"
        f"<h1>Shoal</h1><p>Serving {served}. Point an OpenAI client at <code>/v1</code>.</p>"
        f"<table>{rows}</table></html>\n"
    )
