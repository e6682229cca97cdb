"""Hugging Face tokenizers: loads any ``tokenizer.json``; trains byte-level BPE and WordPiece.

Text is text: where a corpus spells a special token (``</s>``), it is encoded as the characters it is, so that no
document can end itself or carry a mask. The file is kept as it was read: identities outlive changes in how the
library writes it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from pydantic import Field
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megalm.api import Settings, SpecialTokens, Tokenizer, TokenizerError, UsageError, begins_word
from megalm_plugins.tokenizers.fast_bpe import FastBPE, fast_bpe
from megalm_plugins.tokenizers.segments import cut_at_segments

_FILE = "tokenizer.json"
_NOT_IN_IDS = ("truncation", "padding", "decoder", "post_processor")
"""Sections that do not decide the ids of a text without added special tokens."""
_ROLES = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
    "eos": ("</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|end_of_text|>", "<|eos|>"),
    "bos": ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
    "unk": ("[UNK]", "<unk>", "<|unk|>"),
}
"""Common names of the special tokens, the first found counts. RoBERTa's <s> and </s> serve as cls and sep too."""
_BPE_SPECIAL = ("<pad>", "<eos>", "<bos>", "<cls>", "<sep>", "<mask>")
_WORDPIECE_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[EOS]", "[BOS]")
_CONTINUES = "##"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for one


class HFConfig(Settings):
    """How a tokenizer is trained."""

    vocab_size: int = Field(default=8000, ge=8, le=1 << 24)
    """Entries, special tokens and the alphabet included."""
    model: Literal["bpe", "wordpiece"] = "bpe"
    """``bpe``: GPT-2's byte-level BPE, lossless. ``wordpiece``: BERT's."""
    min_frequency: int = Field(default=2, ge=1)
    """A pair seen less often is not merged."""
    lowercase: bool = True
    """WordPiece only: lower case, and accents stripped."""


class HFTokenizer(Tokenizer):
    """Whatever a ``tokenizer.json`` describes. Special tokens are recognised by their common names."""

    Config = HFConfig
    libraries = ("tokenizers", "gigatoken")

    def __init__(self, text: str, source: str) -> None:
        """``text`` is the contents of a tokenizer.json; ``source`` names it in messages."""
        try:
            self._content = json.loads(text)
            self._hf = tokenizers.Tokenizer.from_str(text)
            self._hf.no_padding()
            self._hf.no_truncation()
            self._hf.encode_special_tokens = True
            tokens = self._hf.get_added_tokens_decoder()
            self._size = max(_largest_id(self._content["model"], self._hf), max(tokens, default=-1)) + 1
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{source}: not a tokenizer.json that can be used: {error}") from None
        if not self._size:
            raise TokenizerError(f"{source}: a tokenizer with an empty vocabulary")
        self._text = text
        added = {token.content: index for index, token in tokens.items()}
        self._special = SpecialTokens(
            **{role: next((added[n] for n in names if n in added), None) for role, names in _ROLES.items()}
        )

    @classmethod
    def train(cls, texts: Iterable[str], cfg: Any) -> HFTokenizer:
        try:
            trained = _train_bpe(texts, cfg) if cfg.model == "bpe" else _train_wordpiece(texts, cfg)
        except UsageError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"hf: cannot train: {error}") from error
        return cls(trained.to_str(), "the trained tokenizer")

    @classmethod
    def load(cls, path: Path) -> HFTokenizer:
        file = path / _FILE if path.is_dir() else path
        try:
            text = file.read_bytes().decode("utf-8")
        except OSError as error:
            raise TokenizerError(f"{file}: cannot be read: {error.strerror}; expected a tokenizer.json") from None
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{file}: not UTF-8 text at offset {error.start}; expected a tokenizer.json") from None
        return cls(text, str(file))

    def save(self, folder: Path) -> None:
        (folder / _FILE).write_bytes(self._text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._encode(self._hf.encode_batch_fast, list(texts))]

    def encode_segments(self, documents: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        found = self._encode(self._hf.encode_batch, ["".join(segments) for segments in documents])
        return [
            cut_at_segments(text.ids, list(accumulate((start for start, _ in text.offsets), max)), segments)
            for text, segments in zip(found, documents, strict=True)
        ]

    def encode_documents(self, documents: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        if self._byte_lengths is None:
            return super().encode_documents(documents)
        texts = ["".join(document) for document in documents]
        ids = self._fast.encode(texts) if self._fast is not None and texts else None
        if ids is None:
            ids = [np.array(found, dtype=np.int64) for found in self.encode_batch(texts)]
        joined = np.concatenate([*ids, np.zeros(0, dtype=ids[0].dtype if ids else np.int64)])
        counts = np.array([len(found) for found in ids], dtype=np.int64)
        if all(len(document) == 1 for document in documents):
            return joined, counts
        sizes = self._byte_lengths[joined]
        # Every token must stand for its own bytes, or places in the text cannot be told from their sum.
        if not np.array_equal(_sums(sizes, counts), [_bytes(text) for text in texts]):
            return super().encode_documents(documents)
        ends = np.cumsum(sizes, dtype=np.int64)
        places = np.cumsum([_bytes(segment) for document in documents for segment in document])
        return joined, np.diff(np.searchsorted(ends - sizes, places, side="left"), prepend=0)

    @cached_property
    def _fast(self) -> FastBPE | None:
        """The fast engine, where it serves. Found when it is needed first: that takes a while."""
        special = [token["content"] for token in self._content.get("added_tokens") or ()]
        return fast_bpe(self._content, special, self.encode_batch)

    @cached_property
    def _byte_lengths(self) -> np.ndarray | None:
        """Bytes of text that each id stands for, (vocabulary,) int32, where the tokenizer is byte-level BPE that takes
        the text as it is; else None."""
        content = self._content
        split = content.get("pre_tokenizer") or {}
        steps = split.get("pretokenizers", [split])
        plain = {"type": "ByteLevel", "add_prefix_space": False}
        whole = all(
            plain.items() <= step.items() or (step.get("type") == "Split" and step.get("behavior") != "Removed")
            for step in steps
        )
        added = [token for token in content.get("added_tokens") or () if not token.get("special")]
        if content["model"].get("type") != "BPE" or content.get("normalizer") is not None or not whole or added:
            return None
        if not any(step.get("type") == "ByteLevel" for step in steps):
            return None
        vocab = content["model"]["vocab"]
        lengths = np.zeros(self._size, dtype=np.int32)
        lengths[list(vocab.values())] = list(map(len, vocab))  # a character a byte
        return lengths

    def _encode(self, encode: Callable[..., list[Any]], texts: list[str]) -> list[Any]:
        try:
            return encode(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(
                f"hf: cannot encode the text: {error}; use a tokenizer that has a token for what it does not know"
            ) from error

    def word_starts(self) -> np.ndarray:
        model = self._content["model"]
        continues = model.get("continuing_subword_prefix") or _CONTINUES
        marked = model.get("type") == "WordPiece"
        bytewise = _byte_characters() if self._byte_lengths is not None else {}

        def begins(index: int) -> bool:
            token = self._hf.id_to_token(index) or ""
            if marked:
                return not token.startswith(continues)
            if token and all(character in bytewise for character in token):
                byte = bytewise[token[0]]  # those that go on with a character go on with the word
                return begins_word(chr(byte)) if byte < 0x80 else byte >= 0xC0 and begins_word(self.decode([index]))
            return token.startswith(_SPACE) or begins_word(self.decode([index]))

        return np.array([begins(index) for index in range(self._size)])

    def decode(self, ids: Sequence[int]) -> str:
        hidden = set(self._special.ids()) - {self._special.unk}
        return str(self._hf.decode([int(i) for i in ids if i not in hidden], skip_special_tokens=False))

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def special(self) -> SpecialTokens:
        return self._special

    @property
    def identity(self) -> str:
        return self._identity

    @cached_property
    def _identity(self) -> str:
        decides = {key: value for key, value in self._content.items() if key not in _NOT_IN_IDS}
        vocab = self._content["model"].get("vocab")
        if isinstance(vocab, dict):
            # Python compares strings of one byte a character several times as fast, and UTF-8 has the same order.
            items = sorted(vocab.items(), key=lambda item: item[0].encode("utf-8", "surrogatepass").decode("latin-1"))
            decides["model"] = {**self._content["model"], "vocab": dict(items)}
        canonical = json.dumps(decides, sort_keys=True, separators=(",", ":")).encode("ascii")
        return hashlib.sha256(b"hf 1\0" + canonical).hexdigest()

    @property
    def lossless(self) -> bool:
        """True of byte-level BPE as it is trained here, with nothing that normalises: GPT-2's, for one."""
        content = self._content
        plain = {"type": "ByteLevel", "add_prefix_space": False}
        vocabulary = content["model"].get("vocab", {})
        return (
            content["model"].get("type") == "BPE"
            and content.get("normalizer") is None
            and plain.items() <= (content.get("pre_tokenizer") or {}).items()
            and (content.get("decoder") or {}).get("type") == "ByteLevel"
            and all(token.get("special") for token in content.get("added_tokens") or ())
            and all(character in vocabulary for character in pre_tokenizers.ByteLevel.alphabet())
        )

    def hf_json(self) -> str | None:
        return self._text

    def token(self, index: int) -> str:
        return self._hf.id_to_token(index) or f"<unused {index}>"


def _largest_id(model: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> int:
    """Of the model's own tokens, -1 where there are none. To ask the library takes a copy of the vocabulary."""
    vocab = model.get("vocab")
    if isinstance(vocab, dict) and model.get("type") in ("BPE", "WordPiece", "WordLevel"):
        return max(vocab.values(), default=-1)
    return max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums of runs of values, of so many each: int64 (runs,)."""
    found = np.zeros(len(counts), dtype=np.int64)
    some = np.flatnonzero(counts)
    if len(some):
        found[some] = np.add.reduceat(values, (np.cumsum(counts) - counts)[some], dtype=np.int64)
    return found


def _byte_characters() -> dict[str, int]:
    """What byte-level BPE writes for each byte: itself where it can be seen, else a character from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


def _train_bpe(texts: Iterable[str], cfg: HFConfig) -> tokenizers.Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _check_room(cfg, len(alphabet) + len(_BPE_SPECIAL), "256 bytes")
    result = tokenizers.Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocab_size,
        min_frequency=cfg.min_frequency,
        special_tokens=list(_BPE_SPECIAL),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    result.train_from_iterator(_required(texts), trainer)
    return result


def _train_wordpiece(texts: Iterable[str], cfg: HFConfig) -> tokenizers.Tokenizer:
    """The library numbers the alphabet in the order of a hash map, and merges ties by number: two runs differ. Listing
    the alphabet as special tokens first, in order, makes it repeatable; the result is built from the vocabulary
    alone."""
    normalizer = normalizers.BertNormalizer(lowercase=cfg.lowercase)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as spool:
        splitter = pre_tokenizers.BertPreTokenizer()
        characters: set[str] = set()
        tails: set[str] = set()
        for text in _required(texts):
            words = [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
            characters.update(*words)
            tails.update(*(word[1:] for word in words))
            spool.write(" ".join(words) + "\n")
        alphabet = sorted(characters) + [_CONTINUES + character for character in sorted(tails)]
        _check_room(cfg, len(alphabet) + len(_WORDPIECE_SPECIAL), f"the {len(characters)} characters of the text")
        spool.seek(0)
        learner = _wordpiece({"[UNK]": 0}, normalizer)
        trainer = trainers.WordPieceTrainer(
            vocab_size=cfg.vocab_size,
            min_frequency=cfg.min_frequency,
            special_tokens=[*_WORDPIECE_SPECIAL, *alphabet],
            continuing_subword_prefix=_CONTINUES,
            show_progress=False,
        )
        learner.train_from_iterator(spool, trainer)
    result = _wordpiece(learner.get_vocab(), normalizer)
    result.add_special_tokens(list(_WORDPIECE_SPECIAL))
    return result


def _wordpiece(vocab: dict[str, int], normalizer: Any) -> tokenizers.Tokenizer:
    result = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", continuing_subword_prefix=_CONTINUES))
    result.normalizer = normalizer
    result.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    result.decoder = decoders.WordPiece(prefix=_CONTINUES)
    return result


def _check_room(cfg: HFConfig, least: int, what: str) -> None:
    if cfg.vocab_size < least:
        raise TokenizerError(f"hf: vocab_size {cfg.vocab_size} is too small: special tokens and {what} take {least}")


def _required(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = False
        yield text
    if empty:
        raise TokenizerError(
            "hf: no text to learn from; train it with: megalm data train-tokenizer hf INPUT..., "
            "or load hf:tokenizer.json"
        )
