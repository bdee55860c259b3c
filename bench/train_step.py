"""A training step on a CPU against Hugging Face transformers' model of the same architecture.

Ours: GPT with its chunked loss, Muon and AdamW. Peer: NanoChatForCausalLM and torch.optim.AdamW,
same shape, rows, threads and float32. Each runs in a process of its own, for its peak memory, and
they take turns (A B A B). A third turn replays only the matrix products of our own step, in their
shapes and on the same kernels: that is the time that no training step of this model can beat.
The peer runs twice: as it comes, and with the float32 kernels that `distributed` chooses for ours.

    nice -n 10 python bench/train_step.py [--eager] [--rows 16] [--threads 2]        prints JSON

Figures are medians and minima over --steps turns; on a machine that others use too, compare the
minima, or the CPU seconds with --threads 1. `--compile-cache` times the first step, cold and warm.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.distributed import choose_float32_kernels
from nanochat.gpt import GPT
from nanochat.loss import chunk_rows
from nanochat.optim import NEWTON_SCHULZ_STEPS, build_optimizer
from nanochat.scaling import GPTConfig

ROOT = Path(__file__).resolve().parent.parent
Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--rows", type=int, default=16, help="rows per step, of seq-len tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=5, help="turns that count, after two that do not"
    )
    parser.add_argument("--eager", action="store_true", help="no torch.compile on either side")
    parser.add_argument("--compile-cache", action="store_true", help="time first steps instead")
    parser.add_argument("--worker", choices=("ours", "peer", "peer_same_kernels"))
    args = parser.parse_args()
    if args.worker:
        work(args)
    elif args.compile_cache:
        print(json.dumps(first_steps(), indent=2))
    else:
        print(json.dumps(compare(args), indent=2))


# -----------------------------------------------------------------------------
# The turns


class Worker:
    """One side in a process of its own, that acts when told."""

    def __init__(self, side: str, cache: Path | None = None) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if cache is not None:
            env["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--worker", side]
        self._process = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"the process of one side ended with {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.communicate()


def compare(args: argparse.Namespace) -> dict[str, Any]:
    tokens = args.rows * args.seq_len
    report: dict[str, Any] = {
        "model": f"d{args.depth}, sequence {args.seq_len}, vocabulary {args.vocab_size}",
        "tokens_per_step": tokens,
        "threads": args.threads,
        "mode": "eager" if args.eager else "compiled",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "load_at_start": round(os.getloadavg()[0], 1),
    }
    for peer in ("peer", "peer_same_kernels"):
        ours_side, peer_side = Worker("ours"), Worker(peer)
        turns: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": [], "gemm": []}
        for turn in range(args.steps + 2):
            answers = {
                "ours": ours_side.ask("step"),
                "peer": peer_side.ask("step"),
                "gemm": ours_side.ask("gemm"),
            }
            if turn >= 2:
                for name, answer in answers.items():
                    turns[name].append(answer)
        memory = {"ours": ours_side.ask("memory"), "peer": peer_side.ask("memory")}
        ours_side.close()
        peer_side.close()
        report["against_" + peer] = _ratios(turns, memory, tokens)
    return report


def _ratios(turns: dict[str, list[dict[str, Any]]], memory: Any, tokens: int) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for clock in ("wall_s", "cpu_s"):
        for name, pick in (("median", statistics.median), ("min", min)):
            s = {side: pick([t[clock] for t in ts]) for side, ts in turns.items()}
            facts[f"{name}_{clock}"] = {
                **{side: round(x, 3) for side, x in s.items()},
                "ours_tokens_per_s": round(tokens / s["ours"]),
                "speed_to_peer": round(s["peer"] / s["ours"], 2),
                "share_of_gemm_speed": round(s["gemm"] / s["ours"], 3),
            }
    facts["gemm_parts_s"] = min((t["parts"] for t in turns["gemm"]), key=lambda p: sum(p.values()))
    facts["peak_memory_gib"] = {side: m["peak_gib"] for side, m in memory.items()}
    facts["memory_to_peer"] = round(memory["ours"]["peak_gib"] / memory["peer"]["peak_gib"], 2)
    return facts


def first_steps() -> dict[str, Any]:
    """Seconds of the first step with an empty compile cache, and with the one it left."""
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            worker = Worker("ours", cache=Path(folder))
            facts[name] = worker.ask("step")
            worker.close()
    facts["warm_to_cold"] = round(facts["warm"]["wall_s"] / facts["cold"]["wall_s"], 3)
    facts["warm_to_cold_cpu"] = round(facts["warm"]["cpu_s"] / facts["cold"]["cpu_s"], 3)
    return facts


# -----------------------------------------------------------------------------
# One side


def work(args: argparse.Namespace) -> None:
    """Answer `step`, `gemm` and `memory` on standard input until it ends."""
    torch.set_num_threads(args.threads)
    if args.worker != "peer":
        choose_float32_kernels("cpu")
    config = GPTConfig(
        n_layer=args.depth,
        n_head=args.depth // 2,
        n_kv_head=args.depth // 2,
        n_embd=64 * args.depth,
        seq_len=args.seq_len,
        vocab_size=args.vocab_size,
    )
    generator = torch.Generator().manual_seed(0)
    shape = (args.rows, args.seq_len + 1)
    batch = torch.randint(0, args.vocab_size, shape, generator=generator)
    step = (ours if args.worker == "ours" else peer)(config, batch, not args.eager)
    acts = {"step": lambda: timed(step), "gemm": lambda: gemm_only(config, args), "memory": memory}
    for line in sys.stdin:
        print(json.dumps(acts[line.strip()]()), flush=True)


def ours(config: GPTConfig, batch: Tensor, compiled: bool) -> Step:
    model = GPT(config)
    model.init_weights(seed=0)
    optimizer = build_optimizer(
        model,
        embedding_lr=0.2,
        unembedding_lr=0.004,
        matrix_lr=0.02,
        weight_decay=0.0,
        n_embd=config.n_embd,
    )
    train_model = torch.compile(model, fullgraph=True) if compiled else model
    idx, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def step() -> None:
        train_model(idx, targets).backward()
        optimizer.step()

    return step


def peer(config: GPTConfig, batch: Tensor, compiled: bool) -> Step:
    from transformers import NanoChatConfig, NanoChatForCausalLM

    model = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=4 * config.n_embd,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            max_position_embeddings=config.seq_len,
            use_cache=False,
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_model = torch.compile(model) if compiled else model
    # transformers shifts the labels itself; the same number of positions goes through the model.
    idx = batch[:, :-1].contiguous()

    def step() -> None:
        train_model(input_ids=idx, labels=idx).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(act: Step) -> dict[str, float]:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    act()
    return {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s}


def memory() -> dict[str, float]:
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    return {"peak_gib": round(peak_gib, 2)}


# -----------------------------------------------------------------------------
# Only the matrix products


def gemm_only(config: GPTConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the step's products. One of each shape is timed and counted as often as it occurs,
    so that the replay needs little memory."""
    parts: dict[str, float] = {}
    cpu_s = 0.0
    for name, count, product in products(config, args.rows, args.seq_len):
        product()
        once = timed(product)
        parts[name] = parts.get(name, 0.0) + count * once["wall_s"]
        cpu_s += count * once["cpu_s"]
    parts = {name: round(s, 3) for name, s in parts.items()}
    return {"wall_s": sum(parts.values()), "cpu_s": cpu_s, "parts": parts}


def products(c: GPTConfig, n_rows: int, n_tokens: int) -> Iterator[tuple[str, int, Step]]:
    """(part of the step, times per step, one product). Forward x @ w.T, then g @ w and g.T @ x."""
    n, width, kv = n_rows * n_tokens, c.n_embd, c.n_kv_head * c.head_dim
    for out, into in (
        (width + 2 * kv, width),
        (width, width),
        (4 * width, width),
        (width, 4 * width),
    ):
        for product in _three(torch.randn(n, into), torch.randn(out, into), torch.randn(n, out)):
            yield "blocks", c.n_layer, product

    rows = min(n, chunk_rows(c.vocab_size, 4, "cpu"))
    features, head = torch.randn(rows, width), torch.randn(c.vocab_size, width)
    for product in _three(features, head, torch.randn(rows, c.vocab_size)):
        yield "head", n // rows, product

    # Causal attention needs half of each: queries against half of the keys. Seven products: two
    # forward, and five backward, which makes the scores a second time.
    query = torch.randn(n_rows * c.n_head, n_tokens, c.head_dim)
    key, scores = query[:, : n_tokens // 2], torch.randn(len(query), n_tokens, n_tokens // 2)
    yield "attention", 3 * c.n_layer, lambda: query @ key.mT
    yield "attention", 2 * c.n_layer, lambda: scores @ key
    yield "attention", 2 * c.n_layer, lambda: scores.mT @ query

    layers, steps = c.n_layer, NEWTON_SCHULZ_STEPS
    for count, wide in ((4 * layers, width), (2 * layers, 4 * width)):
        stack, gram = torch.randn(count, width, wide), torch.randn(count, width, width)
        yield "newton_schulz", steps, lambda s=stack: s @ s.mT
        yield "newton_schulz", steps, lambda g=gram: g @ g
        yield "newton_schulz", steps, lambda g=gram, s=stack: g @ s


def _three(x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Step, Step, Step]:
    y, grad_x, grad_weight = gradient.clone(), torch.empty_like(x), torch.empty_like(weight)
    return (
        lambda: torch.mm(x, weight.T, out=y),
        lambda: torch.mm(gradient, weight, out=grad_x),
        lambda: torch.mm(gradient.T, x, out=grad_weight),
    )


if __name__ == "__main__":
    main()
