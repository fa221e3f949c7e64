"""The OpenAI-compatible door as a client sees it: `/v1/completions`, streamed."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx

from loadtest.client import DoorError, ModelFacts
from loadtest.record import Clock, Recorder, RequestRecord
from loadtest.workload import Work

__all__ = ["EventReader", "HttpDoor", "completion_body"]


def completion_body(work: Work, model: str) -> dict[str, Any]:
    """The work as a request body; `return_token_ids` lets tokens be counted rather than guessed from text."""
    return {
        "model": model,
        "prompt": work.prompt,
        "max_tokens": work.num_output_tokens,
        "temperature": work.temperature,
        "ignore_eos": work.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }


class EventReader:
    """Reads server-sent events into a record.

    This wire carries no positions: a token that was lost or repeated shows as a count that differs from the usage.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._num_reported: int | None = None
        self._done = False
        self._error = ""

    def line(self, line: str) -> None:
        """Takes one line of the stream."""
        name, _, data = line.partition(":")
        if name != "data":
            return
        if data.strip() == "[DONE]":
            self._done = True
            return
        event = json.loads(data)
        if "error" in event:
            self._error = f"error event: {event['error'].get('message', event['error'])}"
            return
        for choice in event.get("choices", ()):
            self._recorder.tokens(len(choice.get("token_ids") or ()), position=self._recorder.num_tokens)
            if choice.get("finish_reason"):
                self._recorder.finish_reason()
        if event.get("usage"):
            self._num_reported = event["usage"]["completion_tokens"]

    @property
    def fault(self) -> str:
        """What was wrong with the stream once it has ended; empty where it was whole."""
        if self._error:
            return self._error
        if not self._done:
            return "the stream ended without [DONE]"
        if self._num_reported is None:
            return "the stream carried no usage"
        if self._num_reported != self._recorder.num_tokens:
            return f"{self._recorder.num_tokens} token ids came where usage says {self._num_reported}"
        return ""


class HttpDoor:
    """A pool of connections to a server's HTTP port. Close it with `aclose`."""

    name = "http"

    def __init__(
        self,
        url: str,
        *,
        model: str = "",
        api_key: str = "",
        timeout_s: float = 300.0,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._url = url
        self._model = model
        self._clock = clock
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def model(self) -> ModelFacts:
        try:
            response = await self._client.get("/v1/models")
            response.raise_for_status()
            listed = [ModelFacts(model["id"], model.get("max_model_len", 0)) for model in response.json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise DoorError(f"HTTP server at {self._url}: {error or type(error).__name__}") from error
        for model in listed:
            if self._model in ("", model.name):
                self._model = model.name
                return model
        raise DoorError(f"HTTP server at {self._url} does not serve {self._model or 'any model'}")

    async def generate(self, work: Work, intended_s: float) -> RequestRecord:
        body = completion_body(work, self._model)
        recorder = Recorder(self.name, work, intended_s, self._clock)
        reader = EventReader(recorder)
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                    return recorder.close(f"HTTP {response.status_code}: {response.text[:200]}")
                async for line in response.aiter_lines():
                    reader.line(line)
        except (httpx.HTTPError, ValueError) as error:
            return recorder.close(f"{type(error).__name__}: {error}")
        return recorder.close(reader.fault)
