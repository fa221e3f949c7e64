"""A desk that answers with a given text, token by token, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.front_door.call import Call, Chunk, Message, Usage
from cluster.front_door.chat_template import ChatTemplate
from cluster.front_door.errors import InvalidRequest
from cluster.front_door.limits import Limits
from cluster.front_door.model_card import ModelCard
from cluster.front_door.quotas import Standing
from cluster.front_door.tokenizer import Tokenizer
from cluster.front_door.validate import Prepared, check_model, check_token_ids, fit, resolve
from scheduler.plan import FinishReason, TokenLogprobs
from tests.unit.cluster.tiny_tokenizers import byte_level

__all__ = ["REPLY", "FakeDesk"]

REPLY = "Blub, naïve 中文 🐟!"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass
class FakeDesk:
    """Choice i answers with `reply` and i exclamation marks behind it."""

    reply: str = REPLY
    card: ModelCard = field(
        default_factory=lambda: ModelCard(
            name="tiny", aliases=("alias",), max_model_len=256, vocab_size=512, created_unix_s=1_700_000_000
        )
    )
    codec: Tokenizer = field(default_factory=lambda: Tokenizer(byte_level()))
    limits: Limits = field(default_factory=Limits)
    is_ready: bool = True
    calls: list[Call] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)  # ids of calls whose reader left before the end
    fail_with: Exception | None = None
    fail_at: int = 0  # how many tokens of choice 0 come before the failure
    hang_at: int | None = None  # likewise before nothing more comes
    hanging: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def models(self) -> tuple[ModelCard, ...]:
        return (self.card,)

    def ready(self) -> bool:
        return self.is_ready

    def standings(self, tenant: str) -> dict[str, Standing]:
        return {}

    async def open(self, call: Call) -> AsyncGenerator[Chunk, None]:
        self.calls.append(call)
        resolved = resolve(call, self.card, self.limits)
        prepared = fit(resolved, await self._prompt(call), self.card, field="prompt")
        ended = False
        try:
            async for chunk in self._chunks(prepared):
                ended = chunk.usage is not None
                yield chunk
        finally:
            if not ended:
                self.closed.append(call.request_id)
                self.left.set()

    async def tokenize(
        self,
        *,
        model: str = "",
        text: str | None = None,
        messages: Sequence[Message] | None = None,
        add_special_tokens: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[int]:
        check_model(model, self.card)
        if messages is None:
            return self.codec.encode(text or "", add_special_tokens)
        try:
            rendered = ChatTemplate(TEMPLATE).render(
                messages, add_generation_prompt=add_generation_prompt, **(chat_template_kwargs or {})
            )
        except ValueError as error:
            raise InvalidRequest(str(error), field="messages") from None
        return self.codec.encode(rendered, False)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool = False) -> str:
        check_model(model, self.card)
        check_token_ids(token_ids, self.card.vocab_size, "token_ids")
        return self.codec.decode(token_ids, skip_special_tokens)

    async def _prompt(self, call: Call) -> list[int]:
        if call.token_ids is not None:
            return list(call.token_ids)
        return await self.tokenize(
            text=call.text, messages=call.messages, add_generation_prompt=call.add_generation_prompt
        )

    async def _chunks(self, prepared: Prepared) -> AsyncGenerator[Chunk, None]:
        outputs = [self.codec.encode(self.reply + "!" * i)[: prepared.sampling.max_tokens] for i in range(prepared.n)]
        texts = [self.codec.detokenizer(prepared.skip_special_tokens) for _ in outputs]
        usage = Usage(len(prepared.prompt_token_ids), sum(map(len, outputs)), 2)
        for position in range(max(map(len, outputs))):
            await self._trouble(position)
            for index, output in enumerate(outputs):
                if position >= len(output):
                    continue
                last = position == len(output) - 1
                token_id = output[position]
                yield Chunk(
                    index=index,
                    position=position,
                    token_ids=(token_id,),
                    text=texts[index].push(token_id) + (texts[index].finish() if last else ""),
                    logprobs=_logprobs((token_id,), prepared.sampling.logprobs),
                    finish=self._finish(output, prepared) if last else None,
                    usage=usage if last and index == prepared.n - 1 else None,
                    prompt_token_ids=() if position else prepared.prompt_token_ids,
                    prompt_logprobs=() if position else self._prompt_logprobs(prepared),
                )

    async def _trouble(self, position: int) -> None:
        if self.hang_at == position:
            self.hanging.set()
            await asyncio.get_running_loop().create_future()
        if self.fail_with is not None and self.fail_at == position:
            raise self.fail_with

    def _finish(self, output: list[int], prepared: Prepared) -> FinishReason:
        return FinishReason.LENGTH if len(output) == prepared.sampling.max_tokens else FinishReason.STOP

    def _prompt_logprobs(self, prepared: Prepared) -> tuple[TokenLogprobs | None, ...]:
        if prepared.sampling.prompt_logprobs is None:
            return ()
        return (None, *_logprobs(prepared.prompt_token_ids[1:], prepared.sampling.prompt_logprobs))


def _logprobs(token_ids: Sequence[int], num_top: int | None) -> tuple[TokenLogprobs, ...]:
    """Every token has rank 3 and log-probability -0.5; the ones before it in the vocabulary are likelier."""
    if num_top is None:
        return ()
    return tuple(
        TokenLogprobs(i, -0.5, 3, tuple((i - 1 - at, -0.125 * (at + 1)) for at in range(num_top))) for i in token_ids
    )
