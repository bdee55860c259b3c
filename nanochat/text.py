"""From new tokens to what a reader sees: whole characters, without special tokens and tool calls.

A character of several bytes may be spread over tokens, and a prefix of it is no text yet; bytes
that can never become text appear as U+FFFD.
"""

import codecs
from collections.abc import Iterable

from nanochat.tokenizer import TokenizerLike

HIDDEN_SPANS = {"python_start": "python_end", "output_start": "output_end"}
OTHER_SPECIALS = ("bos", "user_start", "user_end", "assistant_start", "assistant_end")


class TextStream:
    """Text of a growing row of tokens. Feed them one by one; each gives the text it completes."""

    def __init__(self, tokenizer: TokenizerLike) -> None:
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        special = tokenizer.special_id
        self._opens = {special(start): special(end) for start, end in HIDDEN_SPANS.items()}
        self._ignored = {special(name) for name in OTHER_SPECIALS} | set(self._opens.values())
        self._hidden_until: int | None = None

    def feed(self, token: int) -> str:
        """The text that is complete with this token; empty while there is none."""
        if self._hidden_until is not None:
            if token == self._hidden_until:
                self._hidden_until = None
            return ""
        if token in self._opens:
            self._hidden_until = self._opens[token]
            return ""
        if token in self._ignored:
            return ""
        return self._decoder.decode(self.tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """What an incomplete last character leaves."""
        return self._decoder.decode(b"", final=True)


def visible_text(tokenizer: TokenizerLike, ids: Iterable[int]) -> str:
    """What a reader sees of a whole reply."""
    stream = TextStream(tokenizer)
    return "".join([stream.feed(token) for token in ids]) + stream.finish()
