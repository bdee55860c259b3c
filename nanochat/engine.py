"""Generation: many requests in one batch, each joining and leaving between two steps.

- Continuous batching: requests in flight occupy the first rows of one preallocated KV cache. A
  step brings a waiting prompt a bounded number of tokens further (so that those already writing
  are not held up), then writes one token for every row.
- Requests with equal prompts that wait behind each other share one prefill.
- The calculator: between <|python_start|> and <|python_end|> the model writes an expression; its
  value is put into the text as if the model had written it.
- A request under its seed gives the same tokens whatever else is in the batch, up to the rounding
  of matrix products of another shape.

An engine belongs to one thread, and keeps the weights that the model has when it is made.
"""

import itertools
import random
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from nanochat.calculator import calculate
from nanochat.gpt import GPT
from nanochat.inference import Inference
from nanochat.kvcache import KVCache
from nanochat.loss import softcap
from nanochat.sampling import Sampling, sample
from nanochat.spec import SpecError
from nanochat.tokenizer import TokenizerLike

GREEDY = Sampling()
FinishReason = Literal["stop", "length", "cancelled"]
PREFILL_TOKENS_PER_STEP = {"cpu": 512, "cuda": 4096, "mps": 1024}
"""Prompt tokens that one step takes in, so that answers being written are held up only shortly."""

COMPILED_LENGTH = 256
"""Tokens of the cache that the shortest compiled step attends to; the next ones double it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue."""

    prompt: tuple[int, ...]
    max_tokens: int
    """New tokens at most, those of the calculator included."""
    sampling: Sampling = GREEDY


@dataclass(eq=False)
class Generation:
    """A request in flight or finished; `ids` grows as the engine steps."""

    request: Request
    ids: list[int] = field(default_factory=list)
    """New tokens; the one that ended the generation is not among them."""
    forced: list[bool] = field(default_factory=list)
    """Per new token: whether the calculator put it there instead of the model."""
    finish_reason: FinishReason | None = None
    """None while in flight."""
    end_id: int | None = None
    """The token that ended it; None unless it ended with one."""
    _coming: deque[int] = field(default_factory=deque)
    _expression: list[int] | None = None

    def __post_init__(self) -> None:
        self._rng = random.Random(self.request.sampling.seed)


class Engine:
    """Generates with a model. See the module text."""

    def __init__(
        self,
        model: GPT,
        tokenizer: TokenizerLike,
        *,
        max_batch: int = 16,
        max_seq_len: int | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        keep_weights: bool = True,
    ) -> None:
        """max_batch: requests in flight at most. max_seq_len: tokens of prompt and answer together
        at most (the model's seq_len). dtype: of the matrix products (the weights' own). compile,
        keep_weights: see Inference."""
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.max_seq_len = min(max_seq_len or model.config.seq_len, model.config.seq_len)
        dtype = dtype or model.lm_head.weight.dtype
        self.device = model.lm_head.weight.device
        self.prefill_tokens_per_step = PREFILL_TOKENS_PER_STEP[self.device.type]
        self._compiled = compile
        self._forward = Inference(model, dtype, compile=compile, keep_weights=keep_weights)
        self._cache = KVCache(
            model.config, max_batch, self.max_seq_len, device=self.device, dtype=dtype
        )
        self._active: list[Generation] = []
        self._waiting: deque[Generation] = deque()
        self._joining: Generation | None = None
        self._stop_ids = {tokenizer.bos_id, tokenizer.special_id("assistant_end")}
        self._tool_ids = {
            name: tokenizer.special_id(name)
            for name in ("python_start", "python_end", "output_start", "output_end")
        }

    # -------------------------------------------------------------------------
    # One request, or a closed batch

    def stream(
        self, prompt: Sequence[int], *, max_tokens: int, sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """New tokens of one prompt as they come. Ending the iteration cancels the request."""
        generation = self.submit(
            Request(prompt=tuple(prompt), max_tokens=max_tokens, sampling=sampling)
        )
        num_seen = 0
        try:
            while generation.finish_reason is None or num_seen < len(generation.ids):
                if num_seen == len(generation.ids):
                    self.step()
                    continue
                yield generation.ids[num_seen]
                num_seen += 1
        finally:
            self.cancel(generation)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """New tokens of every prompt, in the order of the prompts.

        seeds: one per prompt; by default its place in the list.
        """
        seeds = range(len(prompts)) if seeds is None else seeds
        requests = [
            Request(
                prompt=tuple(prompt),
                max_tokens=max_tokens,
                sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return [generation.ids for generation in self.complete(requests)]

    def complete(self, requests: Sequence[Request]) -> list[Generation]:
        """Generations of all requests, finished, in their order."""
        generations = [self.submit(request) for request in requests]
        while any(g.finish_reason is None for g in generations):
            self.step()
        return generations

    @torch.inference_mode()
    def next_logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits of the token behind every prompt, [len(prompts), vocab_size] float32."""
        longest = max(len(prompt) for prompt in prompts)
        rows = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        return softcap(self._forward(torch.tensor(rows, device=self.device), last))

    @torch.inference_mode()
    def continuations(
        self, rows: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """How likely the ends of some rows are: tokens from starts[i] on, given all before them.

        Per row (log-probability of each of these tokens, whether it is the most likely one),
        float32 and bool [len(rows[i]) - starts[i]] on the CPU. What all rows have in common at
        their beginning is computed once. A row has at most max_seq_len tokens and starts[i] >= 1.
        """
        shared = min(num_common(rows), min(starts) - 1)
        wanted = [range(start - 1, len(row) - 1) for row, start in zip(rows, starts, strict=True)]
        longest = max(map(len, wanted))
        positions = [
            [place - shared for place in (*places, *[places[-1]] * (longest - len(places)))]
            for places in wanted
        ]
        suffixes = [row[shared:] for row in rows]
        width = max(map(len, suffixes))
        padded = [[*suffix, *[0] * (width - len(suffix))] for suffix in suffixes]
        cache = self._shared_prefix(rows[0][:shared], len(rows), shared + width)
        places_wanted = torch.tensor(positions, device=self.device)
        logits = softcap(
            self._forward(torch.tensor(padded, device=self.device), places_wanted, cache)
        )
        found = []
        for row, places, row_logits in zip(rows, wanted, logits, strict=True):
            targets = torch.tensor([row[place + 1] for place in places], device=self.device)
            scores = row_logits[: len(places)].log_softmax(dim=-1)
            likely = scores.gather(-1, targets[:, None])[:, 0]
            found.append((likely.cpu(), (scores.argmax(dim=-1) == targets).cpu()))
        return found

    def _shared_prefix(self, prefix: Sequence[int], n_rows: int, max_len: int) -> KVCache | None:
        """A cache whose rows all hold the prefix; None where there is none."""
        if not prefix:
            return None
        config, dtype = self._forward.config, self._forward.dtype
        cache = KVCache(config, n_rows, max_len, device=self.device, dtype=dtype)
        idx = torch.tensor([list(prefix)], device=self.device)
        last = torch.tensor([len(prefix) - 1], device=self.device)
        self._forward(idx, last, cache.rows(0, 1))
        for row in range(1, n_rows):
            cache.copy_row(source=0, to=row)
        return cache

    # -------------------------------------------------------------------------
    # Continuous batching

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that is empty or too long to be answered."""
        if not request.prompt:
            raise ValueError("an empty prompt: begin it with the bos token")
        if len(request.prompt) >= self.max_seq_len:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens leaves no room for an answer in the "
                f"{self.max_seq_len} tokens of context"
            )
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens = {request.max_tokens}; at least 1")

    def submit(self, request: Request) -> Generation:
        """Queue a request; it joins when a row is free. Raises ValueError as `check`."""
        self.check(request)
        generation = Generation(request)
        self._waiting.append(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """Take a request out, whether it waits or writes; a finished one stays as it is."""
        if generation.finish_reason is not None:
            return
        generation.finish_reason = "cancelled"
        if generation in self._active:
            self._leave(self._active.index(generation))
        elif generation is self._joining:
            self._cache.set_length(len(self._active), 0)
            self._joining = None
        else:
            self._waiting.remove(generation)

    @property
    def num_active(self) -> int:
        """Requests that occupy a row of the cache."""
        return len(self._active) + (self._joining is not None)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """Bring every request in flight one token further; returns those that got on or ended."""
        return self._decode() + self._admit()

    def _decode(self) -> list[Generation]:
        """One token for every active row."""
        if not self._active:
            return []
        writing = list(self._active)
        tokens = [g.ids[-1] for g in writing]
        if self._compiled:
            logits = self._decode_compiled(tokens)
        else:
            with one_token_kernels(self.device):
                logits = self._run([[token] for token in tokens], self._cache.rows(0, len(tokens)))
        self._advance(writing, logits)
        return writing

    def _decode_compiled(self, tokens: list[int]) -> Tensor:
        """As `_run` for one token per row, with all rows of the cache and a length that seldom
        changes, since every shape is compiled anew."""
        idx = torch.zeros(self.max_batch, dtype=torch.int64)
        idx[: len(tokens)] = torch.tensor(tokens)
        cache = self._cache
        length = COMPILED_LENGTH
        while length <= int(cache.lengths.max()):
            length *= 2
        logits = self._forward.decode_rows(
            idx.to(self.device),
            cache.lengths.to(self.device),
            [k[:, :, :length] for k in cache.keys],
            [v[:, :, :length] for v in cache.values],
        )
        cache.rows(0, len(tokens)).finish(1)
        return logits[: len(tokens)]

    def _admit(self) -> list[Generation]:
        """Take in prompt tokens, up to the bound per step; the first token of complete prompts."""
        joined: list[Generation] = []
        budget = self.prefill_tokens_per_step
        while budget > 0 and self._next_to_join() is not None:
            generation = self._joining
            assert generation is not None
            prompt = generation.request.prompt
            row = self._cache.rows(len(self._active), len(self._active) + 1)
            num_done = int(row.lengths[0])
            chunk = prompt[num_done : num_done + budget]
            logits = self._run([chunk], row)
            budget -= len(chunk)
            if num_done + len(chunk) == len(prompt):
                joined += self._join(generation, logits)
        return joined

    def _next_to_join(self) -> Generation | None:
        """The request whose prompt is being taken in; the next waiting one where a row is free."""
        if self._joining is None and self._waiting and len(self._active) < self.max_batch:
            self._joining = self._waiting.popleft()
        return self._joining

    def _join(self, generation: Generation, logits: Tensor) -> list[Generation]:
        """Make the joining request active, and with it those behind it that ask the same."""
        source = len(self._active)
        self._joining = None
        joined = [generation]
        while (
            self._waiting
            and self._waiting[0].request.prompt == generation.request.prompt
            and source + len(joined) < self.max_batch
        ):
            self._cache.copy_row(source=source, to=source + len(joined))
            joined.append(self._waiting.popleft())
        self._active += joined
        self._advance(joined, logits.expand(len(joined), -1))
        return joined

    def _run(self, tokens: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """Feed tokens [B][T] to the rows of a cache; logits behind the last one, [B, V]."""
        idx = torch.tensor(tokens, device=self.device)
        last = torch.full((len(tokens),), idx.size(1) - 1, device=self.device)
        return self._forward(idx, last, cache)

    def _advance(self, generations: list[Generation], logits: Tensor) -> None:
        """Give every generation its next token, and free the rows of those that end with it."""
        settings = [g.request.sampling for g in generations]
        ids = sample(logits, settings, [g._rng.random() for g in generations])
        for generation, token in zip(generations, ids, strict=True):
            self._accept(generation, token)
        for generation in generations:
            if generation.finish_reason is not None:
                self._leave(self._active.index(generation))

    def _accept(self, generation: Generation, token: int) -> None:
        """Append the model's token, or the one that the calculator wants here."""
        is_forced = bool(generation._coming)
        if is_forced:
            token = generation._coming.popleft()
        elif token in self._stop_ids:
            generation.finish_reason, generation.end_id = "stop", token
            return
        generation.ids.append(token)
        generation.forced.append(is_forced)
        self._follow_calculator(generation, token)
        num_tokens = len(generation.ids)
        room = self.max_seq_len - len(generation.request.prompt)
        if num_tokens >= min(generation.request.max_tokens, room):
            generation.finish_reason = "length"

    def _follow_calculator(self, generation: Generation, token: int) -> None:
        """Collect an expression; at its end, line up its value."""
        if token == self._tool_ids["python_start"]:
            generation._expression = []
        elif generation._expression is None:
            return
        elif token == self._tool_ids["python_end"]:
            value = calculate(self.tokenizer.decode(generation._expression))
            generation._expression = None
            if value is not None:
                generation._coming.extend(self._calculator_output(value))
        else:
            generation._expression.append(token)

    def _calculator_output(self, value: str) -> list[int]:
        """The tokens of a value; none where the vocabulary of characters has no such digits."""
        try:
            ids = self.tokenizer.encode(value)
        except SpecError:
            return []
        return [self._tool_ids["output_start"], *ids, self._tool_ids["output_end"]]

    def _leave(self, row: int) -> None:
        """Free a row; the last active one takes its place, and the joining one that one's."""
        last = len(self._active) - 1
        if row != last:
            self._cache.copy_row(source=last, to=row)
            self._active[row] = self._active[last]
        self._active.pop()
        if self._joining is not None:
            self._cache.copy_row(source=last + 1, to=last)
            self._cache.set_length(last + 1, 0)
        else:
            self._cache.set_length(last, 0)


@contextmanager
def one_token_kernels(device: torch.device) -> Iterator[None]:
    """On a CPU, the default kernels for torch's own float32 products, whatever is set for training.

    Where "medium" is (distributed.choose_float32_kernels), oneDNN prepares attention's products
    for their shape, which is another one with every token: 1.2 instead of 0.3 ms a layer.
    """
    precision = torch.get_float32_matmul_precision()
    if device.type != "cpu" or precision == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def num_common(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows have in common at their beginning."""
    together = zip(*rows, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, together))
