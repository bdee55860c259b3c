"""Data loader: tokens per second, share of tokens trained on, time to seek, and the loop's wait.

    python bench/loader.py [--peer PATH_TO_A_CHECKOUT_OF_KARPATHY_NANOCHAT] [--megabytes 64]

Text: the Python sources of the packages installed here, cut into documents whose lengths follow the
law assumed for web text (lognormal, median 2,200 characters or about 600 tokens, sigma 1). Both
loaders read the same parquet shards with the same merges, each through its own tokenizer path, in
processes of their own that take turns (ours, peer, ours, peer); every process makes one whole pass.
Prints JSON; `ratio` is the median of ours over the median of the peer.
"""

import argparse
import itertools
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BATCH_TOKENS = 16_384
VOCAB_SIZE = 32_768
SEQ_LENS = (512, 1024, 2048)
ROWS_PER_GROUP = 1024
MEDIAN_CHARS = 2_200

CLUSTER_TOKENS_PER_S = 1_200_000
"""d20 on 8xH100, all ranks together."""
CLUSTER_RANKS = 8
CLUSTER_BATCH_TOKENS = 524_288
CLUSTER_SEQ_LEN = 2048
PACED_STEPS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, help="checkout of karpathy/nanochat")
    parser.add_argument("--megabytes", type=int, default=64, help="text to read")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each loader")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="tokenizer threads")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seq-len", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CHILDREN[args.child](args)))
        return
    with tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        print(json.dumps(compare(args), indent=2))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    facts = prepare(args.work, args.megabytes << 20)
    peer = peer_absent(args.peer)
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "text": facts,
        "peer": peer or f"karpathy/nanochat at {args.peer}",
        "seq_len": {},
    }
    for seq_len in SEQ_LENS:
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": [], "ours_cached": []}
        for _ in range(args.repeats):
            for name in runs:
                if name != "peer" or peer is None:
                    runs[name].append(child(args, name, seq_len))
        results["seq_len"][seq_len] = {
            name: {key: median(run[key] for run in of_name) for key in of_name[0]}
            for name, of_name in runs.items()
            if of_name
        }
        if peer is None:
            row = results["seq_len"][seq_len]
            row["ratio"] = {
                key: row["ours"][key] / row["peer"][key]
                for key in ("tokens_per_s", "trained_fraction", "seek_s")
            }
    worker = child(args, "one_worker", CLUSTER_SEQ_LEN)
    per_rank = CLUSTER_TOKENS_PER_S / worker["tokens_per_cpu_s"]
    results["one_worker"] = {**worker, "cores_per_rank_at_cluster_speed": per_rank}
    results["paced"] = {
        "what": f"rank 0 of {CLUSTER_RANKS} at {CLUSTER_TOKENS_PER_S} tokens/s in all, "
        f"{PACED_STEPS} steps of {CLUSTER_BATCH_TOKENS} tokens; every rank tokenizes all of it",
        **child(args, "paced", CLUSTER_SEQ_LEN),
    }
    results["paced_cached"] = child(args, "paced_cached", CLUSTER_SEQ_LEN)
    return results


def median(values: Iterator[Any]) -> Any:
    every = list(values)
    return all(every) if isinstance(every[0], bool) else statistics.median(every)


def peer_absent(path: Path | None) -> str | None:
    """Why there is no peer, or None."""
    if path is None:
        return "absent: not given (--peer PATH)"
    if not (path / "nanochat" / "dataloader.py").is_file():
        return f"absent: {path} is no checkout of karpathy/nanochat"
    return None


def child(args: argparse.Namespace, name: str, seq_len: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    env = dict(os.environ, NANOCHAT_HOME=str(args.work), NANOCHAT_BASE_DIR=str(args.work))
    env["PYTHONPATH"] = str(args.peer if name == "peer" else ROOT)
    command = [sys.executable, __file__, "--child", name, "--work", str(args.work)]
    command += ["--seq-len", str(seq_len), "--threads", str(args.threads)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


# -- what both read


def prepare(work: Path, max_bytes: int) -> dict[str, Any]:
    """Shards in the peer's folder (the last is its validation split) and two tokenizer files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sys.path.insert(0, str(ROOT))
    from nanochat.tokenizer import Tokenizer

    texts = list(documents(max_bytes))
    folder = work / "base_data_climbmix"
    folder.mkdir()
    for i in range(4):
        table = pa.table({"text": texts[i::4]})
        pq.write_table(table, folder / f"shard_{i:05d}.parquet", row_group_size=ROWS_PER_GROUP)
    pq.write_table(pa.table({"text": texts[:10]}), folder / "shard_00004.parquet")
    tokenizer = Tokenizer.train_parquet([shards(work)[0]], VOCAB_SIZE)
    tokenizer.save(work / "tokenizer")
    with open(work / "tokenizer.pkl", "wb") as f:
        pickle.dump(tokenizer.tiktoken, f)
    return {
        "megabytes": round(sum(len(t.encode()) for t in texts) / 1e6, 1),
        "documents": len(texts),
        "vocab_size": VOCAB_SIZE,
    }


def documents(max_bytes: int) -> Iterator[str]:
    """Pieces of the installed packages' Python files; a random order mixes the packages."""
    import sysconfig

    import numpy as np

    random = np.random.RandomState(0)
    paths = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    random.shuffle(paths)
    room = max_bytes
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="ignore")
        while text and room > 0:
            length = int(MEDIAN_CHARS * np.exp(random.standard_normal()))
            yield text[:length]
            room -= length
            text = text[length:]


def shards(work: Path) -> list[Path]:
    return sorted((work / "base_data_climbmix").glob("*.parquet"))[:-1]


# -- ours


def source_of(args: argparse.Namespace, cached: bool) -> Any:
    from nanochat.corpus import DataFile
    from nanochat.sources import ParquetSource, TokenCacheSource
    from nanochat.tokencache import open_token_cache
    from nanochat.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.work / "tokenizer")
    files = [DataFile(path, path.stat().st_size, None) for path in shards(args.work)]
    if not cached:
        return ParquetSource(files, tokenizer, seed=1)
    cache = open_token_cache(files, tokenizer, num_threads=args.threads)
    return TokenCacheSource(cache, tokenizer.bos_id, seed=1)


def ours(args: argparse.Namespace, cached: bool = False) -> dict[str, Any]:
    """One pass, then a seek into the middle of it."""
    import torch

    from nanochat.data import Loader

    options: dict[str, Any] = {
        "seq_len": args.seq_len,
        "rows_per_step": BATCH_TOKENS // args.seq_len,
        "num_workers": args.threads,
    }
    source = source_of(args, cached)
    start = time.perf_counter()
    batches = []
    with Loader(source, **options) as loader:
        for batch in loader:
            if batch.epoch >= 1:
                break
            batches.append(batch)
            if len(batches) == 1:
                first_batch_s = time.perf_counter() - start
    pass_s = time.perf_counter() - start - first_batch_s
    trained = sum(batch.num_targets for batch in batches)
    documents = [document for batch in batches for document in batch.documents]
    assert len(set(documents)) == len(documents), "a document was seen twice"

    half = len(batches) // 2
    source = source_of(args, cached)
    start = time.perf_counter()
    with Loader(source, **options, cursor=batches[half].cursor) as loader:
        resumed = next(loader)
        seek_s = time.perf_counter() - start
    return {
        "tokens_per_s": (trained - BATCH_TOKENS) / pass_s,
        "trained_fraction": trained / tokens_before(source, batches[-1].cursor),
        "first_batch_s": first_batch_s,
        "seek_s": seek_s,
        "seek_is_exact": torch.equal(resumed.inputs, batches[half + 1].inputs),
    }


def tokens_before(source: Any, cursor: dict[str, Any]) -> int:
    """Tokens that the source gives before a place in its first epoch, counted anew."""
    document = cursor["document"]
    ranges = itertools.pairwise([*range(0, document, 64), document])
    whole = sum(len(t) for a, b in ranges for t in source.fetch(0, a, b).tokens)
    return whole + int(cursor["offset"])


def one_worker(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of one tokenizer thread and nothing else."""
    from nanochat.sources import TOKENIZE_AT_ONCE

    source = source_of(args, cached=False)
    source.fetch(0, 0, TOKENIZE_AT_ONCE)
    start, cpu_start = time.perf_counter(), time.process_time()
    tokens = 0
    for first in range(TOKENIZE_AT_ONCE, source.num_documents, TOKENIZE_AT_ONCE):
        stop = min(first + TOKENIZE_AT_ONCE, source.num_documents)
        tokens += sum(map(len, source.fetch(0, first, stop).tokens))
    return {
        "tokens_per_s": tokens / (time.perf_counter() - start),
        "tokens_per_cpu_s": tokens / (time.process_time() - cpu_start),
    }


def paced(args: argparse.Namespace, cached: bool = False) -> dict[str, Any]:
    """The loop's wait where a step takes as long as on the cluster; the step itself is a sleep."""
    from nanochat.data import Loader

    step_s = CLUSTER_BATCH_TOKENS / CLUSTER_TOKENS_PER_S
    rows = CLUSTER_BATCH_TOKENS // CLUSTER_SEQ_LEN
    with Loader(
        source_of(args, cached),
        seq_len=CLUSTER_SEQ_LEN,
        rows_per_step=rows,
        world_size=CLUSTER_RANKS,
        num_workers=args.threads,
    ) as loader:
        next(loader)
        first_wait_s, cpu_start, start = loader.wait_s, time.process_time(), time.perf_counter()
        for _ in range(PACED_STEPS):
            time.sleep(step_s)
            next(loader)
        wall_s = time.perf_counter() - start
        return {
            "wait_share": (loader.wait_s - first_wait_s) / wall_s,
            "cores_used": (time.process_time() - cpu_start) / wall_s,
            "first_batch_s": first_wait_s,
        }


# -- the peer


def peer(args: argparse.Namespace) -> dict[str, Any]:
    """The same of upstream's loader (its own code, from PYTHONPATH)."""
    import torch
    from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit

    from nanochat.tokenizer import RustBPETokenizer

    class Counting(RustBPETokenizer):  # type: ignore[misc]  # no types in the peer
        num_tokens = 0

        def encode(self, *a: Any, **k: Any) -> Any:
            ids = super().encode(*a, **k)
            self.num_tokens += sum(map(len, ids))
            return ids

    with open(args.work / "tokenizer.pkl", "rb") as f:
        encoding = pickle.load(f)

    def loader(state: dict[str, Any] | None) -> tuple[Any, Any]:
        tokenizer = Counting(encoding, "<|bos|>")
        return tokenizer, tokenizing_distributed_data_loader_with_state_bos_bestfit(
            tokenizer,
            BATCH_TOKENS // args.seq_len,
            args.seq_len,
            "train",
            tokenizer_threads=args.threads,
            device="cpu",
            resume_state_dict=state,
        )

    start = time.perf_counter()
    tokenizer, stream = loader(None)
    batches = []
    for inputs, _, state in stream:
        if state["epoch"] > 1:
            break
        batches.append((inputs.clone(), state))
        consumed = tokenizer.num_tokens
        if len(batches) == 1:
            first_batch_s = time.perf_counter() - start
    pass_s = time.perf_counter() - start - first_batch_s

    half = len(batches) // 2
    start = time.perf_counter()
    _, stream = loader(batches[half][1])
    resumed = next(stream)[0]
    return {
        "tokens_per_s": (len(batches) - 1) * BATCH_TOKENS / pass_s,
        "trained_fraction": len(batches) * BATCH_TOKENS / consumed,
        "first_batch_s": first_batch_s,
        "seek_s": time.perf_counter() - start,
        "seek_is_exact": torch.equal(resumed, batches[half + 1][0]),
    }


CHILDREN = {
    "ours": ours,
    "ours_cached": lambda args: ours(args, cached=True),
    "one_worker": one_worker,
    "paced": paced,
    "paced_cached": lambda args: paced(args, cached=True),
    "peer": peer,
}

if __name__ == "__main__":
    main()
