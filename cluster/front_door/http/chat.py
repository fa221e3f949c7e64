"""/v1/chat/completions: how its choices look."""

from __future__ import annotations

from cluster.front_door.call import Chunk
from cluster.front_door.http.gather import finish_name, stop_reason
from cluster.front_door.http.logprobs import Spelling, chat_logprobs, prompt_logprobs
from cluster.front_door.http.schema import ChatBody
from cluster.front_door.http.style import ids_to_json, quoted
from cluster.front_door.text import TextCodec

__all__ = ["ChatStyle"]


class ChatStyle:
    """A `Style`."""

    kind = "chat.completion"
    event_kind = "chat.completion.chunk"

    def __init__(self, body: ChatBody, codec: TextCodec) -> None:
        self._body = body
        self._spelling = Spelling(codec, as_ids=bool(body.return_tokens_as_token_ids))
        self._is_plain = not body.logprobs

    def whole(self, at: int, chunk: Chunk) -> dict[str, object]:
        message: dict[str, object] = {"role": "assistant", "content": chunk.text, "refusal": None}
        return self._choice(chunk, "message", message, first=True)

    def part(self, at: int, chunk: Chunk, *, first: bool) -> list[dict[str, object]]:
        delta: dict[str, object] = {"content": chunk.text} if chunk.text or chunk.finish is None else {}
        choice = self._choice(chunk, "delta", delta, first=first)
        if not first:
            return [choice]
        role: dict[str, object] = {
            "index": chunk.index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return [role, choice]

    def plain(self, at: int, chunk: Chunk) -> str | None:
        if not self._is_plain or chunk.finish is not None:
            return None
        text = quoted(chunk.text)
        ids = f',"token_ids":{ids_to_json(chunk.token_ids)}' if self._body.return_token_ids else ""
        return f'{{"index":{chunk.index},"delta":{{"content":{text}}},"logprobs":null,"finish_reason":null{ids}}}'

    def extras(self, chunk: Chunk) -> dict[str, object]:
        extras: dict[str, object] = {}
        if self._body.return_token_ids:
            extras["prompt_token_ids"] = list(chunk.prompt_token_ids)
        if self._body.prompt_logprobs is not None:
            extras["prompt_logprobs"] = prompt_logprobs(self._spelling, chunk.prompt_logprobs)
        return extras

    def _choice(self, chunk: Chunk, key: str, value: dict[str, object], *, first: bool) -> dict[str, object]:
        choice: dict[str, object] = {
            "index": chunk.index,
            key: value,
            "logprobs": chat_logprobs(self._spelling, chunk.logprobs) if self._body.logprobs else None,
            "finish_reason": finish_name(chunk.finish),
        }
        if key == "message" or chunk.finish is not None:
            choice["stop_reason"] = stop_reason(chunk)
        if self._body.return_token_ids:
            choice["token_ids"] = list(chunk.token_ids)
            if first:
                choice["prompt_token_ids"] = list(chunk.prompt_token_ids)
        return choice
