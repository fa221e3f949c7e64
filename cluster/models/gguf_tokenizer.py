"""Rebuilds tokenizer.json and its companions from what a GGUF keeps of a byte-level BPE."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cluster.models.gguf_weights import Fields

__all__ = ["generation_config", "tokenizer", "tokenizer_config"]

_CONTROL = 3  # gguf.TokenType.CONTROL
_USER_DEFINED = 4


def tokenizer(fields: Fields) -> Tokenizer:
    """Raises ValueError for a vocabulary that is not SmolLM2's kind."""
    kind, pre = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if (kind, pre) != ("gpt2", "smollm"):
        raise ValueError(f"cannot rebuild a tokenizer of kind {kind!r} with pre-tokenizer {pre!r}")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    built = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # The GGUF only names the pre-tokenizer: single digits first, then GPT-2's pattern.
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL]
    built.add_special_tokens(special)
    built.add_tokens([token for token, type_ in zip(tokens, types, strict=True) if type_ == _USER_DEFINED])
    return built


def tokenizer_config(fields: Fields) -> dict[str, object]:
    """tokenizer_config.json, the chat template with it."""
    tokens = fields["tokenizer.ggml.tokens"]

    def token(role: str) -> str:
        return str(tokens[fields[f"tokenizer.ggml.{role}_token_id"]])

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "add_bos_token": fields["tokenizer.ggml.add_bos_token"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


def generation_config(fields: Fields) -> dict[str, object]:
    """generation_config.json."""
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }
