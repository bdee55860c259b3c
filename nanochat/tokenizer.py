"""Text to token ids and back: byte pair encoding, and one token per character.

* Both tokenizers end in the same nine special tokens, which ordinary text never produces.
* A tokenizer is one file, `tokenizer.json`; its fingerprint keys everything made with it.
* BPE is trained and applied by `rustbpe` (this repository's crate). `Tokenizer.tiktoken` is the
  same vocabulary as a `tiktoken.Encoding`, the reference: equal ids for every text, and slower
  in every case measured (docs/decisions.md), so nothing chooses at run time.
"""

import collections
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import tiktoken

from nanochat.rundir import atomic_write_text
from nanochat.spec import SpecError

try:
    from rustbpe import Tokenizer as RustTokenizer
except ImportError as e:
    raise ImportError("the extension module rustbpe is not built: run `make setup`") from e

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
"""In the order of their ids, which are the last of the vocabulary."""

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""nanochat's: GPT-4's with digits in groups of at most two, which suits small vocabularies."""

FILE_NAME = "tokenizer.json"
FORMAT_VERSION = 1
NUM_BYTES = 256
UNUSED = "\ufffd".encode()
"""What an id decodes to that stands for nothing."""
NUM_CHARS = 15
"""Distinct characters of the d64 experiment's text; with the special tokens, padded to 32."""

Progress = Callable[[str, int, int | None], None]
"""Called about ten times a second with phase ("count", "merge"), done, total if known."""


class TokenizerLike(Protocol):
    """What the rest of the product knows of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special and unused ones included."""

    @property
    def bos_id(self) -> int:
        """Id of `<|bos|>`."""

    @property
    def fingerprint(self) -> str:
        """sha256 of all that determines the ids, as hexadecimal."""

    def special_id(self, name: str) -> int:
        """Id of a special token, named with or without its `<|` and `|>`."""

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: special tokens written in it are text."""

    def encode_batch(
        self, texts: Sequence[str], num_threads: int = 1, prepend_bos: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, int32, and where each starts, int64 of n + 1."""

    def count_tokens(self, text: str) -> int:
        """Number of ids of a text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some ids; bytes that are no UTF-8 become U+FFFD."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of some ids. ValueError for an id outside the vocabulary."""

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each token, int32 of vocab_size; 0 for special and unused ids."""

    @property
    def description(self) -> dict[str, Any]:
        """All that determines the ids, as JSON: what `save` writes."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer as one file, atomically; the folder is made if need be."""


class _Vocabulary:
    """The special tokens, the fingerprint and the file, alike for all tokenizers.

    `description` is the rest of what determines the ids, as JSON.
    """

    def __init__(self, vocab_size: int, description: dict[str, Any]) -> None:
        self.vocab_size = vocab_size
        first = vocab_size - len(SPECIAL_TOKENS)
        self._special_ids = {name: first + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._description = {
            "format_version": FORMAT_VERSION,
            **description,
            "vocab_size": vocab_size,
            "special_tokens": list(SPECIAL_TOKENS),
        }

    @property
    def bos_id(self) -> int:
        return self._special_ids["<|bos|>"]

    def special_id(self, name: str) -> int:
        bracketed = name if name.startswith("<|") else f"<|{name}|>"
        if bracketed not in self._special_ids:
            raise ValueError(f"{name!r} is no special token; they are {', '.join(SPECIAL_TOKENS)}")
        return self._special_ids[bracketed]

    @functools.cached_property
    def fingerprint(self) -> str:
        canonical = json.dumps(self._description, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def description(self) -> dict[str, Any]:
        return self._description

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / FILE_NAME, json.dumps(self._description) + "\n")


class Tokenizer(_Vocabulary):
    """Byte pair encoding: 256 bytes, the merges, unused ids if the text had too few pairs, and
    the special tokens."""

    def __init__(
        self, merges: Sequence[tuple[int, int]], vocab_size: int, pattern: str = SPLIT_PATTERN
    ) -> None:
        _check_vocab_size(vocab_size)
        num_ordinary = vocab_size - len(SPECIAL_TOKENS)
        if NUM_BYTES + len(merges) > num_ordinary:
            raise ValueError(f"{len(merges)} merges are too many for vocab_size = {vocab_size}")
        pairs = [list(pair) for pair in merges]
        super().__init__(vocab_size, {"kind": "bpe", "pattern": pattern, "merges": pairs})
        self._pattern = pattern
        self._bpe = RustTokenizer.from_merges(merges, pattern)
        tokens = [token for token, _ in self._bpe.get_mergeable_ranks()]
        unused = [UNUSED] * (num_ordinary - len(tokens))
        self._bytes_of = [*tokens, *unused, *(name.encode() for name in SPECIAL_TOKENS)]

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        pattern: str = SPLIT_PATTERN,
        num_threads: int | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Learn merges from texts. `vocab_size` counts the special tokens and is kept even when
        the texts have too few pairs; `num_threads` None: all processors."""
        _check_vocab_size(vocab_size)
        bpe = RustTokenizer()
        bpe.train_from_iterator(
            texts,
            vocab_size - len(SPECIAL_TOKENS),
            pattern=pattern,
            num_threads=num_threads,
            progress=progress,
        )
        return cls(bpe.get_merges(), vocab_size, pattern)

    @classmethod
    def train_parquet(
        cls,
        paths: Sequence[Path],
        vocab_size: int,
        *,
        max_chars: int | None = None,
        doc_cap_chars: int | None = None,
        pattern: str = SPLIT_PATTERN,
        num_threads: int | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Learn merges from the column `text` of parquet files (each row a document) and from
        text files (each a document), in the order given, reading at most `doc_cap_chars` of a
        document and `max_chars` in all."""
        _check_vocab_size(vocab_size)
        bpe = RustTokenizer()
        bpe.train_from_files(
            paths,
            vocab_size - len(SPECIAL_TOKENS),
            pattern=pattern,
            max_chars=max_chars,
            doc_cap_chars=doc_cap_chars,
            num_threads=num_threads,
            progress=progress,
        )
        return cls(bpe.get_merges(), vocab_size, pattern)

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Self:
        """From what `save` wrote."""
        merges = [(left, right) for left, right in description["merges"]]
        return cls(merges, description["vocab_size"], description["pattern"])

    @functools.cached_property
    def tiktoken(self) -> tiktoken.Encoding:
        """The same vocabulary in the reference encoder."""
        return tiktoken.Encoding(
            self.fingerprint,
            pat_str=self._pattern,
            mergeable_ranks=dict(self._bpe.get_mergeable_ranks()),
            special_tokens=self._special_ids,
        )

    def encode(self, text: str) -> list[int]:
        return self._bpe.encode(text)

    def encode_batch(
        self, texts: Sequence[str], num_threads: int = 1, prepend_bos: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        prefix = self.bos_id if prepend_bos else None
        return self._bpe.encode_batch(texts, num_threads=num_threads, prefix=prefix)

    def count_tokens(self, text: str) -> int:
        return self._bpe.count_tokens(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._bytes_of[_check_id(i, self.vocab_size)] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, i in self._bpe.get_mergeable_ranks():
            lengths[i] = len(token)
        return lengths


class CharTokenizer(_Vocabulary):
    """One id per character of an alphabet, in code point order from 0; unused ids; the special
    tokens. A character outside the alphabet is an error, or becomes `unknown` if that is given.
    """

    def __init__(self, alphabet: str, vocab_size: int, unknown: str | None = None) -> None:
        symbols = sorted(set(alphabet))
        if len(symbols) > vocab_size - len(SPECIAL_TOKENS):
            raise SpecError(
                f"{len(symbols)} characters and {len(SPECIAL_TOKENS)} special tokens do not fit "
                f"into model.vocab_size = {vocab_size}"
            )
        if unknown is not None and unknown not in symbols:
            raise SpecError(f"data.unknown_char {unknown!r} is not in the alphabet {symbols}")
        description = {"kind": "char", "alphabet": "".join(symbols), "unknown": unknown}
        super().__init__(vocab_size, description)
        self._symbols = symbols
        self._unknown = unknown
        self._code_points = np.array([ord(c) for c in symbols], dtype=np.uint32)
        unused = [UNUSED.decode()] * (vocab_size - len(SPECIAL_TOKENS) - len(symbols))
        self._text_of = [*symbols, *unused, *SPECIAL_TOKENS]

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int = 32,
        *,
        unknown: str | None = None,
        max_chars: int = NUM_CHARS,
    ) -> Self:
        """The characters of the texts, at most `max_chars` different ones. With more: SpecError
        that counts them; with `unknown`, the most frequent ones and `unknown`."""
        counts: collections.Counter[str] = collections.Counter()
        for text in texts:
            counts.update(text)
        if not counts:
            raise SpecError("the text for the char tokenizer is empty")
        ranked = sorted(counts, key=lambda c: (-counts[c], c))
        if unknown is None:
            if len(ranked) > max_chars:
                raise SpecError(
                    f"the text has {len(ranked)} different characters, {max_chars} are allowed. "
                    f"The others: {_show({c: counts[c] for c in ranked[max_chars:]})}. "
                    "Raise model.vocab_size, clean the text, or set data.unknown_char to one that "
                    "replaces them"
                )
            return cls("".join(ranked), vocab_size)
        others = [c for c in ranked if c != unknown]
        return cls("".join([unknown, *others[: max_chars - 1]]), vocab_size, unknown)

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Self:
        """From what `save` wrote."""
        return cls(description["alphabet"], description["vocab_size"], description["unknown"])

    def lacks(self, characters: Iterable[str]) -> list[str]:
        """The characters that are refused, in code point order; none where `unknown` is given."""
        return [] if self._unknown is not None else sorted(set(characters) - set(self._symbols))

    def _ids(self, text: str) -> np.ndarray:
        """Ids of a text, int32. SpecError that counts and shows the unknown characters."""
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = np.searchsorted(self._code_points, code_points)
        ids[ids == len(self._symbols)] = 0
        known = self._code_points[ids] == code_points
        if not known.all():
            if self._unknown is None:
                strange = collections.Counter(c for c in text if c not in self._symbols)
                raise SpecError(
                    f"{strange.total()} characters are not in the char vocabulary "
                    f"{''.join(self._symbols)!r}: {_show(strange)}. A run whose spec has "
                    'data.unknown_char="?" reads all of them as that character'
                )
            ids[~known] = self._symbols.index(self._unknown)
        return ids.astype(np.int32)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._ids(text).tolist()
        return ids

    def encode_batch(
        self, texts: Sequence[str], num_threads: int = 1, prepend_bos: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        bos = [np.array([self.bos_id], dtype=np.int32)] if prepend_bos else []
        parts = [bos + [self._ids(text)] for text in texts]
        lengths = [sum(len(part) for part in two) for two in parts]
        offsets = np.array([0, *itertools.accumulate(lengths)], dtype=np.int64)
        flat = [part for two in parts for part in two]
        return np.concatenate(flat or [np.empty(0, dtype=np.int32)]), offsets

    def count_tokens(self, text: str) -> int:
        return len(self._ids(text))

    def decode(self, ids: Iterable[int]) -> str:
        return "".join([self._text_of[_check_id(i, self.vocab_size)] for i in ids])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(ids).encode()

    def token_bytes(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        lengths[: len(self._symbols)] = [len(c.encode()) for c in self._symbols]
        return lengths


def load_tokenizer(folder: Path) -> TokenizerLike:
    """The tokenizer that `save` wrote to a folder. ValueError if the file is not such a one."""
    path = folder / FILE_NAME
    description = json.loads(path.read_text(encoding="utf-8"))
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format {description.get('format_version')}, not 1")
    kinds: dict[str, type[Tokenizer] | type[CharTokenizer]]
    kinds = {"bpe": Tokenizer, "char": CharTokenizer}
    if description.get("kind") not in kinds:
        raise ValueError(f"{path} is of kind {description.get('kind')!r}, not bpe or char")
    if description.get("special_tokens") != list(SPECIAL_TOKENS):
        raise ValueError(f"{path} has other special tokens: {description.get('special_tokens')}")
    return kinds[description["kind"]].from_description(description)


def render_conversation(
    tokenizer: TokenizerLike, conversation: dict[str, Any], max_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """Ids of a conversation and, for each, 1 if the assistant must produce it, else 0.

    Messages alternate between user and assistant, beginning with the user; a system message
    before them is put in front of the first user's text. An assistant's content may be parts of
    type text, python (a call of the tool) and python_output (its answer, not trained on). Both
    lists are cut to `max_tokens` where that is given. ValueError names the message that breaks a
    rule.
    """
    ids = [tokenizer.bos_id]
    mask = [0]

    def add(new_ids: list[int], produced: int) -> None:
        ids.extend(new_ids)
        mask.extend([produced] * len(new_ids))

    def add_enclosed(name: str, new_ids: list[int], produced: int) -> None:
        add([tokenizer.special_id(f"{name}_start")], produced)
        add(new_ids, produced)
        add([tokenizer.special_id(f"{name}_end")], produced)

    for message in _alternating(conversation):
        if message["role"] == "user":
            add_enclosed("user", tokenizer.encode(message["content"]), produced=0)
            continue
        add([tokenizer.special_id("assistant_start")], produced=0)
        for part in _parts(message["content"]):
            part_ids = tokenizer.encode(part["text"])
            match part["type"]:
                case "text":
                    add(part_ids, produced=1)
                case "python":
                    add_enclosed("python", part_ids, produced=1)
                case "python_output":
                    add_enclosed("output", part_ids, produced=0)
                case other:
                    raise ValueError(f"a part of type {other!r} is not text, python, python_output")
        add([tokenizer.special_id("assistant_end")], produced=1)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer: TokenizerLike, conversation: dict[str, Any]) -> list[int]:
    """Ids of a conversation up to where the assistant speaks; a last message of the assistant
    is left out."""
    messages = conversation["messages"]
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    ids, _ = render_conversation(tokenizer, {"messages": messages})
    return [*ids, tokenizer.special_id("assistant_start")]


def _alternating(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages with the system's put into the first user's. ValueError unless user and
    assistant take turns."""
    messages = list(conversation["messages"])
    if messages and messages[0]["role"] == "system":
        if len(messages) < 2 or messages[1]["role"] != "user":
            raise ValueError("message 0 is the system's and must be followed by the user's")
        both = messages[0]["content"] + "\n\n" + messages[1]["content"]
        messages = [{**messages[1], "content": both}, *messages[2:]]
    if not messages:
        raise ValueError("the conversation has no messages")
    for i, message in enumerate(messages):
        expected = "user" if i % 2 == 0 else "assistant"
        if message["role"] != expected:
            raise ValueError(f"message {i} is the {message['role']}'s, expected the {expected}'s")
        if expected == "user" and not isinstance(message["content"], str):
            raise ValueError(f"message {i} is the user's, its content must be text")
    return messages


def _parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _check_vocab_size(vocab_size: int) -> None:
    smallest = NUM_BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise SpecError(
            f"model.vocab_size = {vocab_size} is too small: {NUM_BYTES} bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens need {smallest}"
        )


def _check_id(token: int, vocab_size: int) -> int:
    if not 0 <= token < vocab_size:
        raise ValueError(f"{token} is no token id: there are {vocab_size}")
    return token


def _show(counts: Mapping[str, int], most: int = 20) -> str:
    """The most frequent characters with code point and count."""
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    shown = ", ".join(f"{c!r} (U+{ord(c):04X}) {counts[c]} times" for c in ranked[:most])
    return shown + (f" and {len(ranked) - most} more" if len(ranked) > most else "")
