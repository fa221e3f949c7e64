"""What travels with a sequence so that any front door can go on with its request, and the way back from it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict

from cluster.front_door.call import Call
from cluster.front_door.output import ChoiceOutput
from cluster.front_door.stops import StopScanner
from cluster.front_door.text import TextCodec
from cluster.front_door.validate import Prepared
from protos.shoal.v1 import session_pb2

__all__ = ["body_digest", "empty_output", "held_record", "note_history", "origin_of", "restored"]

_NOT_THE_BODY = ("request_id", "idempotency_key", "held", "tenant", "client", "timeout_s", "traceparent", "door")


def body_digest(call: Call) -> str:
    """Equal for two calls that ask for the same."""
    body = {name: value for name, value in asdict(call).items() if name not in _NOT_THE_BODY}
    return hashlib.blake2b(json.dumps(body, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def origin_of(call: Call, prepared: Prepared, index: int, *, digest: str, opened_unix_ns: int) -> session_pb2.Origin:
    """For choice `index` of a call that came in here."""
    return session_pb2.Origin(
        client=call.client,
        index=index,
        n=prepared.n,
        stop=prepared.stop,
        include_stop=prepared.include_stop,
        skip_special_tokens=prepared.skip_special_tokens,
        continues_text=call.messages is None,
        body_digest=digest,
        opened_unix_ns=opened_unix_ns,
    )


def empty_output(
    submit: session_pb2.Submit, codec: TextCodec, prompt_token_ids: tuple[int, ...] | None = None
) -> ChoiceOutput:
    """For a sequence that has said nothing yet. `prompt_token_ids` are the submit's, where they are at hand."""
    origin = submit.origin
    stops = StopScanner(tuple(origin.stop), include_in_output=origin.include_stop) if origin.stop else None
    return ChoiceOutput(
        origin.index,
        text=codec.detokenizer(origin.skip_special_tokens, continues=origin.continues_text),
        stops=stops,
        min_tokens=submit.sampling.min_tokens,
        include_stop=origin.include_stop,
        prompt_token_ids=tuple(submit.prompt_token_ids) if prompt_token_ids is None else prompt_token_ids,
    )


def note_history(submit: session_pb2.Submit, output: ChoiceOutput) -> None:
    """Before a submit is sent: what came of the choice so far goes with it."""
    origin = submit.origin
    origin.attempt += 1
    del submit.output_token_ids[:]
    if not output.token_ids:
        return
    submit.output_token_ids.extend(output.token_ids)
    submit.sampling.ClearField("prompt_logprobs")
    del origin.output_logprobs[:], origin.prompt_logprobs[:]
    output.add_history(origin)


def restored(record: session_pb2.SequenceRecord, codec: TextCodec) -> tuple[session_pb2.Submit, ChoiceOutput]:
    """A submit to be sent again and all output so far, as the front door had them that began the choice."""
    submit = session_pb2.Submit()
    submit.CopyFrom(record.submit)
    output = empty_output(submit, codec)
    output.accept(_whole(record))
    del submit.output_token_ids[:]
    submit.ClearField("timeout_s")
    return submit, output


def held_record(submit: session_pb2.Submit, token_ids: Sequence[int]) -> session_pb2.SequenceRecord:
    """As if a group had known a choice of which a client holds these tokens. How likely they were is not known."""
    logprobs = []
    if submit.sampling.HasField("logprobs"):
        logprobs = [session_pb2.Logprobs(token_id=token_id, logprob=math.nan) for token_id in token_ids]
    return session_pb2.SequenceRecord(
        submit=submit, output=session_pb2.SequenceOutput(token_ids=token_ids, logprobs=logprobs)
    )


def _whole(record: session_pb2.SequenceRecord) -> session_pb2.SequenceOutput:
    """What was replayed and what followed, as one output from the first token on."""
    submit, output = record.submit, record.output
    whole = session_pb2.SequenceOutput()
    whole.CopyFrom(output)
    whole.position = 0
    del whole.token_ids[:]
    whole.token_ids.extend((*submit.output_token_ids, *output.token_ids))
    if submit.origin.output_logprobs:
        del whole.logprobs[:]
        whole.logprobs.extend((*submit.origin.output_logprobs, *output.logprobs))
    if submit.origin.prompt_logprobs:
        del whole.prompt_logprobs[:]
        whole.prompt_logprobs.extend(submit.origin.prompt_logprobs)
    if submit.origin.HasField("num_cached_tokens"):
        whole.num_cached_tokens = submit.origin.num_cached_tokens
    return whole
