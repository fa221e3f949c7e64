"""Small tokenizers of every kind that is served, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog did not mind at all.",
    "Ein Wal ist kein Fisch; 中文字符和日本語のテキスト, 한국어도 있다.",
    "naïve café — “quotes” … 👩‍👩‍👧 🏳️‍🌈 🇩🇪 😀😃😄 emoji again 😀",
    "def f(x):\n    return x ** 2\t# tabs   and   spaces\n\n\n",
]
SPECIAL = ["<s>", "</s>", "<|im_end|>"]


@cache
def byte_level() -> Tokenizer:
    """Byte-level BPE as GPT-2, Llama 3, Qwen and DeepSeek have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("an added one", special=False)])
    return tokenizer


@cache
def byte_fallback(strip: bool = True) -> Tokenizer:
    """SentencePiece BPE with byte fallback, as Llama 2 and Mistral have it; without `strip`, as Gemma."""
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzTE.,中文é"]
    vocab = {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "T"), ("▁T", "h"), ("o", "w"), ("▁", "▁")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if strip else steps)
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decode, decoders.Strip(" ", 1, 0)] if strip else decode)
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    """Unigram behind a Metaspace decoder, as T5 has it: the first token of a text is decoded in its own way."""
    letters = [(letter, -5.0 - at / 100) for at, letter in enumerate("▁abcdefghijklmnopqrstuvwxyzTE.,中文é😀")]
    words = [("▁the", -2.0), ("▁dog", -2.5), ("▁▁", -3.0)]
    tokenizer = Tokenizer(models.Unigram([("<unk>", -20.0), *letters, *words], unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@cache
def word_piece() -> Tokenizer:
    """Words and their continuations, as BERT has them."""
    vocab = ["[UNK]", "the", "dog", "##s", "##é", "中", "文", ".", ",", "n", "##'t", "'", "😀"]
    tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+|(?=[.,])"), "removed")
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


KINDS = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "byte fallback, unstripped": lambda: byte_fallback(strip=False),
    "metaspace": metaspace,
    "word piece": word_piece,
}


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id: int | None = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def write_folder(
    folder: Path, tokenizer: Tokenizer, *, config: Mapping[str, object] | None = None, **files: object
) -> Path:
    """A model folder's text side; `generation_config={...}` becomes generation_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
