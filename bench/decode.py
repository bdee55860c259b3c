"""Writing tokens on a CPU against Hugging Face transformers' generate, on the same weights.

Ours: the engine that `chat` and `serve` use. Peer: NanoChatForCausalLM.generate, greedy, with its
KV cache, on the same weights, in float32 as ours. Each in a process of its own with the same number
of threads; they take turns (A B A B).

    python bench/decode.py [--depth 6] [--threads 2] [--turns 5]        prints JSON

- tokens_per_s: new tokens of all rows over the time between the first and the last of them, so that
  the prompt does not count. first_token_s: a prompt of 1,000 tokens to its first new token.
- memory_bound: what reading every weight once per token, and nothing else, would take. The speed of
  the memory is that of a sum over 512 MiB, or of a product of a matrix of that size with a vector
  where that is faster, by the same threads in the same run; the share of it counts the weights and
  the keys and values that decoding reads, and can exceed 1 where the processor's cache holds some.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from nanochat.engine import Engine
from nanochat.gpt import GPT, hf_state_dict
from nanochat.scaling import GPTConfig

SHORT_PROMPT, NEW_TOKENS, LONG_PROMPT = 16, 96, 1000
BATCHES = (1, 16)
STREAM_FLOATS = 1 << 27
"""512 MiB: far more than any cache holds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--turns", type=int, default=5, help="turns that count, after one")
    args = parser.parse_args()
    print(json.dumps(compare(args), indent=2))


def make_config(args: argparse.Namespace) -> GPTConfig:
    """The shape of the kit's model of this depth: width 64 * depth, heads of 128."""
    width = 64 * args.depth
    heads = max(1, width // 128)
    return GPTConfig(
        n_layer=args.depth,
        n_head=heads,
        n_kv_head=heads,
        n_embd=width,
        seq_len=2048,
        vocab_size=args.vocab_size,
    )


def make_model(config: GPTConfig) -> GPT:
    """Random weights, none of them zero, the same in every process."""
    model = GPT(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


def prompts(config: GPTConfig, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size - 64, (batch, length), generator=generator)


# -----------------------------------------------------------------------------
# The two sides. Each gives seconds until the first new token, and until the last.


class NoStops:
    """The engine's view of a tokenizer whose special tokens the model never writes."""

    bos_id = -1

    def special_id(self, name: str) -> int:
        return -1


class Ours:
    def __init__(self, config: GPTConfig) -> None:
        model = make_model(config)
        self.engines = {n: Engine(model, NoStops(), max_batch=n) for n in BATCHES}  # type: ignore[arg-type]

    def write(self, ids: Tensor, new_tokens: int) -> tuple[float, float, list[list[int]]]:
        from nanochat.engine import Request

        engine = self.engines[len(ids)]
        started_s = time.perf_counter()
        requests = [Request(prompt=tuple(row), max_tokens=new_tokens) for row in ids.tolist()]
        generations = [engine.submit(request) for request in requests]
        while not all(g.ids for g in generations):
            engine.step()
        first_s = time.perf_counter() - started_s
        already = sum(len(g.ids) for g in generations) - len(generations)
        while any(g.finish_reason is None for g in generations):
            engine.step()
        last_s = time.perf_counter() - started_s
        # rows that joined early have written while the others joined: they count for nothing
        share = 1 - already / max(1, len(ids) * (new_tokens - 1))
        return first_s, first_s + (last_s - first_s) / share, [g.ids for g in generations]


class Peer:
    def __init__(self, config: GPTConfig) -> None:
        from transformers import NanoChatConfig, NanoChatForCausalLM

        self.model = NanoChatForCausalLM(
            NanoChatConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.n_embd,
                intermediate_size=4 * config.n_embd,
                num_hidden_layers=config.n_layer,
                num_attention_heads=config.n_head,
                num_key_value_heads=config.n_kv_head,
                max_position_embeddings=config.seq_len,
                eos_token_id=None,
            )
        ).eval()
        self.model.load_state_dict(hf_state_dict(make_model(config)))
        self.model.generation_config.eos_token_id = None

    def write(self, ids: Tensor, new_tokens: int) -> tuple[float, float, list[list[int]]]:
        times: list[float] = []

        class Clock:
            """A logits processor sees every token, of all rows at once."""

            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                times.append(time.perf_counter())
                return scores

        started_s = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                logits_processor=[Clock()],
            )
        return times[0] - started_s, times[-1] - started_s, out[:, ids.size(1) :].tolist()


def serve_side(side: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Answer (batch, prompt length, new tokens) until told None."""
    torch.set_num_threads(args.threads)
    config = make_config(args)
    made = Ours(config) if side == "ours" else Peer(config)
    while (asked := pipe.recv()) is not None:
        batch, length, new_tokens = asked
        pipe.send(made.write(prompts(config, batch, length), new_tokens))


def memory_speed(args: argparse.Namespace, pipe: Connection) -> None:
    """Bytes per second that the threads read, each time it is asked."""
    torch.set_num_threads(args.threads)
    matrix = torch.ones(STREAM_FLOATS // 4096, 4096)
    vector = torch.ones(4096)
    while pipe.recv() is not None:
        ways = (lambda: torch.mv(matrix, vector), matrix.sum)
        best_s = min(_timed(way) for way in ways for _ in range(3))
        pipe.send(matrix.numel() * 4 / best_s)


def _timed(work: Callable[[], Tensor]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


# -----------------------------------------------------------------------------
# The turns


def compare(args: argparse.Namespace) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for side in ("ours", "peer", "memory"):
        pipes[side], theirs = spawn.Pipe()
        target = (memory_speed, (args, theirs)) if side == "memory" else None
        target = target or (serve_side, (side, args, theirs))
        spawn.Process(target=target[0], args=target[1], daemon=True).start()

    def ask(side: str, what: Any) -> Any:
        pipes[side].send(what)
        return pipes[side].recv()

    config = make_config(args)
    speeds: list[float] = []
    rates: dict[str, list[float]] = {}
    first: dict[str, list[float]] = {"ours": [], "peer": []}
    agree = {batch: 0.0 for batch in BATCHES}
    for turn in range(args.turns + 1):
        for batch in BATCHES:
            written = {}
            for side in ("ours", "peer"):
                first_s, last_s, ids = ask(side, (batch, SHORT_PROMPT, NEW_TOKENS))
                written[side] = ids
                if turn:
                    rate = batch * (NEW_TOKENS - 1) / (last_s - first_s)
                    rates.setdefault(f"{side}_{batch}", []).append(rate)
            pairs = zip(sum(written["ours"], []), sum(written["peer"], []), strict=True)
            agree[batch] = sum(a == b for a, b in pairs) / (batch * NEW_TOKENS)
        for side in ("ours", "peer"):
            first_s, _, _ = ask(side, (1, LONG_PROMPT, 2))
            if turn:
                first[side].append(first_s)
        if turn:
            speeds.append(ask("memory", True))
    for pipe in pipes.values():
        pipe.send(None)

    def median(values: list[float]) -> float:
        return statistics.median(values)

    weights = sum(p.numel() for p in GPT(config).parameters()) - config.vocab_size * config.n_embd
    context = SHORT_PROMPT + NEW_TOKENS / 2
    bytes_per_token = 4 * (weights + 2 * config.n_layer * context * config.n_embd)
    bound = [speed / bytes_per_token for speed in speeds]
    shares = [got / most for got, most in zip(rates["ours_1"], bound, strict=True)]
    return {
        "model": f"d{args.depth}, vocabulary {args.vocab_size}, float32, random weights",
        "threads": args.threads,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "load_at_start": round(os.getloadavg()[0], 1),
        "tokens_per_s": {name: round(median(values), 1) for name, values in sorted(rates.items())},
        "ratio": {
            f"batch_{n}": round(
                median(
                    [a / b for a, b in zip(rates[f"ours_{n}"], rates[f"peer_{n}"], strict=True)]
                ),
                2,
            )
            for n in BATCHES
        },
        "same_tokens": {f"batch_{n}": round(share, 3) for n, share in agree.items()},
        "first_token_s": {side: round(median(values), 3) for side, values in first.items()},
        "first_token_ratio": round(median(first["peer"]) / median(first["ours"]), 2),
        "memory_bound": {
            "gb_per_s": round(median(speeds) / 1e9, 1),
            "tokens_per_s": round(median(bound), 1),
            "share_at_batch_1": round(median(shares), 3),
        },
    }


if __name__ == "__main__":
    main()
