"""A training step on one GPU against upstream nanochat (commits of October and November 2025).

Ours: the step of `trainer.fit` (GPT with its chunked loss, compiled, bf16 autocast, clipped, Muon
and AdamW). Peer: the step of upstream's `scripts/base_train.py` with upstream's own model and
optimizers, from a checkout that `--peer` names. Same shape, rows, tokens per step and targets. Each
has a process of its own; they take turns (A B A B), and the memory that one takes for activations
is given back before the other's turn. With it stands the plan's forecast for the same step.

    python bench/gpu_step.py --peer PATH [--depth 20] [--rows 32]        prints JSON

`--profile` adds a table of the kernels of one step to standard error. Exits 1 where our attention
ran in no flash kernel (FlashAttention's or cuDNN's).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
FLASH_KERNELS = ("flash", "fmha", "cudnn_generated", "sdpa_sm")
"""Parts of the names of the kernels of FlashAttention 2 and 3, and of cuDNN's attention."""
Step = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--peer", type=Path, help="a checkout of karpathy/nanochat")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=65_536)
    parser.add_argument("--rows", type=int, default=32, help="rows of a forward pass")
    parser.add_argument("--tokens", type=int, default=524_288, help="tokens of a step")
    parser.add_argument("--turns", type=int, default=2, help="turns of each side")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a turn")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--worker", choices=("ours", "peer"))
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    report = compare(args)
    print(json.dumps(report, indent=2))
    if not report["ours"]["flash_kernels"]:
        sys.exit("our attention ran in no flash kernel")


# -----------------------------------------------------------------------------
# The turns


class Worker:
    """One side in a process of its own, that acts when told."""

    def __init__(self, side: str, peer: Path | None) -> None:
        path = ROOT if side == "ours" else peer
        inherited = os.environ.get("PYTHONPATH", "")
        env = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{inherited}"}
        env.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        # -P: without the folder of this script in sys.path, so that `nanochat` is the side's own
        command = [sys.executable, "-P", "-W", "ignore", __file__, *sys.argv[1:], "--worker", side]
        self._process = subprocess.Popen(
            command, cwd=path, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def tell(self, what: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"the process of one side ended with {self._process.wait()}")
        return json.loads(answer)

    def ask(self, what: str) -> Any:
        self.tell(what)
        return self.hear()

    def close(self) -> None:
        self._process.communicate()


def compare(args: argparse.Namespace) -> dict[str, Any]:
    sides = ["ours", "peer"] if args.peer else ["ours"]
    workers = {side: Worker(side, args.peer and args.peer.resolve()) for side in sides}
    facts = workers["ours"].ask("facts")
    for side in sides:
        workers[side].ask("warm_up")
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(args.turns):
        for side in sides:
            turns[side].append(workers[side].ask("turn"))
    kernels = {side: workers[side].ask("kernels") for side in sides}
    for worker in workers.values():
        worker.close()
    report: dict[str, Any] = {"shape": _shape(args), **facts}
    for side in sides:
        s = statistics.median([s for t in turns[side] for s in t["step_s"]])
        speed = args.tokens / s
        report[side] = {
            "step_s": round(s, 4),
            "turn_medians_s": [round(statistics.median(t["step_s"]), 4) for t in turns[side]],
            "tokens_per_s": round(speed),
            "mfu": round(speed * facts["flops_per_token"] / facts["peak_flops"], 4),
            "peak_allocated_gib": max(t["allocated_gib"] for t in turns[side]),
            "peak_reserved_gib": max(t["reserved_gib"] for t in turns[side]),
            "loss": turns[side][-1]["loss"],
            "flash_kernels": kernels[side],
        }
    plan, ours = report["plan"], report["ours"]
    held = ours["peak_reserved_gib"] + facts["context_gib"]
    report["memory_to_plan"] = round(held / plan["memory_gib"]["total"], 3)
    report["speed_to_plan"] = round(ours["tokens_per_s"] / plan["tokens_per_s"], 3)
    if args.peer:
        report["speed_to_peer"] = round(report["peer"]["step_s"] / ours["step_s"], 3)
        peer_memory = report["peer"]["peak_allocated_gib"]
        report["memory_to_peer"] = round(ours["peak_allocated_gib"] / peer_memory, 3)
    else:
        report["peer"] = "absent: no --peer"
    return report


def _shape(args: argparse.Namespace) -> dict[str, int]:
    return {
        "depth": args.depth,
        "seq_len": args.seq_len,
        "vocab_size": args.vocab_size,
        "rows": args.rows,
        "tokens_per_step": args.tokens,
    }


# -----------------------------------------------------------------------------
# One side


def work(args: argparse.Namespace) -> None:
    """Answer `facts`, `warm_up`, `turn` and `kernels` on standard input until it ends."""
    import torch

    answers, sys.stdout = sys.stdout, sys.stderr  # upstream prints
    step = (ours if args.worker == "ours" else peer)(args)
    warm_up_s = 0.0
    for line in sys.stdin:
        match line.strip():
            case "facts":
                answer: Any = facts(args)
            case "warm_up":
                started = time.perf_counter()
                for _ in range(3):
                    step()
                torch.cuda.synchronize()
                warm_up_s = time.perf_counter() - started
                answer = {"warm_up_s": warm_up_s}
                torch.cuda.empty_cache()
            case "turn":
                answer = turn(step, args.steps)
                torch.cuda.empty_cache()
            case "kernels":
                answer = kernels(step, args)
                torch.cuda.empty_cache()
        print(json.dumps(answer), flush=True, file=answers)


def turn(step: Step, num_steps: int) -> dict[str, Any]:
    """One step that takes the memory back, then the timed ones."""
    import torch

    step()
    torch.cuda.reset_peak_memory_stats()
    step_s, loss = [], 0.0
    for _ in range(num_steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        step_s.append(time.perf_counter() - started)
    return {
        "step_s": step_s,
        "loss": loss,
        "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
    }


def kernels(step: Step, args: argparse.Namespace) -> list[str]:
    """Names of the attention kernels; with --profile also a table of where the time goes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        step()
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in seen.events():
        if event.device_type.name == "CUDA":
            spent[event.name][0] += event.device_time_total / 1000
            spent[event.name][1] += 1
    if args.profile:
        total = sum(ms for ms, _ in spent.values())
        rows = sorted(spent.items(), key=lambda item: -item[1][0])[:45]
        print(f"== {args.worker}: {total:.1f} ms on the GPU in one step", file=sys.stderr)
        for name, (ms, count) in rows:
            print(
                f"{ms:9.2f} ms {100 * ms / total:5.1f} % {count:6.0f}x {name[:150]}",
                file=sys.stderr,
            )
    return sorted({n.split("<")[0][:100] for n in spent if any(k in n for k in FLASH_KERNELS)})


def batches(args: argparse.Namespace) -> tuple[Any, Any]:
    """Inputs and targets of one step, pinned: [tokens / seq_len, seq_len] each."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (args.tokens // args.seq_len, args.seq_len + 1)
    rows = torch.randint(0, args.vocab_size, shape, generator=generator)
    return rows[:, :-1].contiguous().pin_memory(), rows[:, 1:].contiguous().pin_memory()


def ours(args: argparse.Namespace) -> Step:
    import torch

    from nanochat import distributed, prepare, trainer
    from nanochat.data import StepBatch
    from nanochat.gpt import GPT
    from nanochat.optim import build_optimizer, muon_momentum
    from nanochat.scaling import StageNumbers, gpt_config

    dist = distributed.init("cuda")
    spec = _spec(args)
    model = GPT(gpt_config(spec.model)).to(dist.device)
    model.init_weights(seed=0)
    settings = spec.base_train
    optimizer = build_optimizer(
        model,
        dist=dist,
        n_embd=model.config.n_embd,
        embedding_lr=settings.embedding_lr,
        unembedding_lr=settings.unembedding_lr,
        matrix_lr=settings.matrix_lr,
        weight_decay=settings.weight_decay,
    )
    train_model = torch.compile(model)
    inputs, targets = batches(args)
    batch = StepBatch(
        inputs=inputs,
        targets=targets,
        doc_ids=None,
        num_targets=targets.numel(),
        num_tokens=targets.numel(),
        padding=0.0,
        epoch=0.0,
        documents=[],
        cursor={},
    )
    numbers = _numbers(args, spec)
    assert isinstance(numbers, StageNumbers)
    done = 0

    def step() -> float:
        nonlocal done
        loss, _ = trainer._forward_backward(
            train_model,
            optimizer,
            batch,
            numbers,
            settings.grad_clip,
            dist,
            lambda: prepare.autocast(dist.device, torch.bfloat16),
        )
        optimizer.set_lr_scale(1.0)
        optimizer.set_momentum(muon_momentum(done))
        optimizer.update()
        done += 1
        return loss

    return step


def peer(args: argparse.Namespace) -> Step:
    """Upstream's step, with its default settings of base_train.py."""
    import torch

    from nanochat.gpt import GPT, GPTConfig  # upstream's, by PYTHONPATH

    torch.set_float32_matmul_precision("high")
    torch.manual_seed(42)
    width = 64 * args.depth
    heads = max(1, (width + 127) // 128)
    config = GPTConfig(
        sequence_len=args.seq_len,
        vocab_size=args.vocab_size,
        n_layer=args.depth,
        n_head=heads,
        n_kv_head=heads,
        n_embd=width,
    )
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cuda")
    model.init_weights()
    optimizers = model.setup_optimizers()
    compiled = torch.compile(model, dynamic=False)
    inputs, targets = batches(args)
    accum = len(inputs) // args.rows
    done = 0

    def step() -> float:
        nonlocal done
        losses = []
        for x, y in zip(inputs.split(args.rows), targets.split(args.rows), strict=True):
            x, y = x.cuda(non_blocking=True), y.cuda(non_blocking=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = compiled(x, y)
            losses.append(loss.detach())
            (loss / accum).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        share = min(done / 300, 1)
        for group in optimizers[1].param_groups:
            group["momentum"] = (1 - share) * 0.85 + share * 0.95
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        done += 1
        return float(torch.stack(losses).mean())

    return step


# -----------------------------------------------------------------------------
# What the plan says


def _spec(args: argparse.Namespace) -> Any:
    from nanochat.spec import RunSpec

    return RunSpec.model_validate(
        {
            "name": "gpu_step",
            "offer": "1xH100-SXM",
            "budget": {"max_hours": 1.0},
            "model": {
                "depth": args.depth,
                "seq_len": args.seq_len,
                "vocab_size": args.vocab_size,
            },
            "base_train": {
                "num_steps": 100,
                "total_batch_size": args.tokens,
                "device_batch_size": args.rows,
            },
        }
    )


def _numbers(args: argparse.Namespace, spec: Any) -> Any:
    from nanochat.scaling import resolve_stage

    return resolve_stage(spec, "base_train", 1, args.rows)


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions, and the forecast of infra's planner for this step."""
    import torch

    from infra.hardware import parse_offer
    from infra.layout import make_layout
    from infra.memory import CONTEXT_BYTES, step_memory
    from infra.throughput import step_time
    from nanochat.machine import machine_facts
    from nanochat.scaling import flops_per_token, gpt_config

    card = torch.cuda.get_device_name()
    offer = parse_offer("1xH200" if "H200" in card else "1xH100-SXM")
    spec = _spec(args)
    config, layout = gpt_config(spec.model), make_layout(spec, offer)
    step_s = step_time(
        config, layout, offer, args.rows, args.tokens // (args.rows * args.seq_len)
    ).total_s
    speed = args.tokens / step_s
    git = machine_facts()["git"]
    return {
        "card": card,
        "driver": machine_facts()["gpus"][0]["driver"],
        "torch": torch.__version__,
        "commit": (git or {}).get("commit") or os.environ.get("NANOCHAT_COMMIT"),
        "flops_per_token": flops_per_token(config),
        "peak_flops": offer.peak_flops,
        "context_gib": round(CONTEXT_BYTES[False] / GIB, 2),
        "plan": {
            "offer": offer.name,
            "tokens_per_s": round(speed),
            "mfu": round(speed * flops_per_token(config) / offer.peak_flops, 4),
            "memory_gib": step_memory(config, layout, args.rows, offer).to_json(),
        },
    }


if __name__ == "__main__":
    main()
