"""A conversation with a model: what was said, how it is turned into a prompt, and the reply."""

import json
import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from nanochat.engine import Engine, Request
from nanochat.load import Loaded
from nanochat.sampling import Sampling
from nanochat.spec import SpecError
from nanochat.text import TextStream
from nanochat.tokenizer import TokenizerLike, render_for_completion

Message = dict[str, str]


@dataclass
class Settings:
    """How replies are written."""

    temperature: float = 0.6
    top_k: int | None = 50
    max_tokens: int = 256
    seed: int | None = None
    """None: another one for every reply."""


@dataclass
class Reply:
    """A reply in the making: iterate for its pieces of text; the facts are there at the end."""

    prompt_tokens: int
    pieces: Generator[str, None, None] = field(init=False)
    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None

    def __iter__(self) -> Iterator[str]:
        return self.pieces


@dataclass
class Session:
    """One conversation. `say` adds a question and its reply to `messages`."""

    loaded: Loaded
    engine: Engine
    settings: Settings = field(default_factory=Settings)
    messages: list[Message] = field(default_factory=list)

    def say(self, text: str) -> Reply:
        """Ask; the reply joins the conversation when it has been iterated to its end, or as far as
        it was when the iteration was given up. Raises SpecError for a question that does not fit.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._prompt(messages)
        seed = random.randrange(2**31) if self.settings.seed is None else self.settings.seed
        request = Request(
            prompt=tuple(prompt),
            max_tokens=self.settings.max_tokens,
            sampling=Sampling(
                temperature=self.settings.temperature, top_k=self.settings.top_k, seed=seed
            ),
        )
        reply = Reply(prompt_tokens=len(prompt))
        reply.pieces = self._write(request, reply, messages)
        return reply

    def _write(
        self, request: Request, reply: Reply, messages: list[Message]
    ) -> Generator[str, None, None]:
        generation = self.engine.submit(request)
        stream = TextStream(self.loaded.tokenizer)
        try:
            while generation.finish_reason is None:
                self.engine.step()
                new = generation.ids[reply.num_tokens :]
                reply.num_tokens += len(new)
                piece = "".join([stream.feed(token) for token in new])
                if generation.finish_reason is not None:
                    piece += stream.finish()
                reply.text += piece
                if piece:
                    yield piece
        finally:
            self.engine.cancel(generation)
            reply.finish_reason = generation.finish_reason
            self.messages = [*messages, {"role": "assistant", "content": reply.text}]

    def _prompt(self, messages: list[Message]) -> list[int]:
        """Tokens of the conversation, without its oldest exchanges where they do not fit.

        The base model knows no conversations: it is given the question alone, as text to continue.
        """
        tokenizer = self.loaded.tokenizer
        room = self.engine.max_seq_len - min(self.settings.max_tokens, self.engine.max_seq_len // 2)
        if self.loaded.stage == "base_train":
            prompt = [tokenizer.bos_id, *tokenizer.encode(messages[-1]["content"])]
            return _check_fits(prompt, room)
        return fit_conversation(tokenizer, messages, room)

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages = []

    def save(self, path: Path) -> None:
        """Write the conversation as JSON. Raises SpecError where the file cannot be written."""
        try:
            path.write_text(json.dumps({"messages": self.messages}, indent=2) + "\n", "utf-8")
        except OSError as e:
            raise SpecError(f"{path} cannot be written: {e}") from None

    def load(self, path: Path) -> None:
        """Go on with a saved conversation. Raises SpecError where the file holds none."""
        try:
            document = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as e:
            raise SpecError(f"{path} cannot be read: {e}") from None
        messages = document.get("messages") if isinstance(document, dict) else None
        if not _is_conversation(messages):
            raise SpecError(
                f'{path} holds no conversation: {{"messages": [{{"role": "user", "content": …}}, '
                '{"role": "assistant", "content": …}, …]} is expected'
            )
        self.messages = messages


def fit_conversation(tokenizer: TokenizerLike, messages: list[Message], room: int) -> list[int]:
    """The prompt for the next reply, at most `room` tokens: the oldest exchanges are left out
    first. Raises SpecError where the last question alone is longer."""
    while True:
        prompt = render_for_completion(tokenizer, {"messages": messages})
        if len(prompt) <= room or len(messages) < 3:
            return _check_fits(prompt, room)
        messages = messages[2:]


def _check_fits(prompt: list[int], room: int) -> list[int]:
    if len(prompt) > room:
        raise SpecError(
            f"the question has {len(prompt)} tokens, but the model's context has room for {room} "
            "beside an answer; ask something shorter"
        )
    return prompt


def _is_conversation(messages: Any) -> TypeGuard[list[Message]]:
    """User and assistant in turns, beginning with the user and ending with the assistant."""
    return (
        isinstance(messages, list)
        and len(messages) % 2 == 0
        and all(
            isinstance(m, dict)
            and m.get("role") == ("user", "assistant")[i % 2]
            and isinstance(m.get("content"), str)
            for i, m in enumerate(messages)
        )
    )
