"""Tokenizer: training and encoding against the published rustbpe, tokenizers and tiktoken.

* Text: documentation packages of Debian 12, markup stripped, cut into documents of at most
  10,000 characters, equal ones dropped, shuffled: 200 MB to train on, 16 MB held out. Built once.
* The peers live in their own virtual environment, since the published rustbpe has our module's
  name. Every measurement is a process of its own; ours and the peers' alternate, A B A B.
* Prints one JSON document: every run, and the ratios of the peers' median to ours. Merges and
  ids of ours and the peers are compared by their sha256; a difference ends the run.

    python bench/tokenizer.py [--peer VENV] [--cache DIR] [--rounds 2] [--only train,encode]
        [--vocab 32768,65536] [--threads 1,2] [--without tokenizers]
"""

import argparse
import base64
import gzip
import hashlib
import html
import json
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = """
linux-doc-6.1 rust-doc openjdk-17-doc python3.11-doc cppreference-doc-en-html
debian-handbook postgresql-doc-15 perl-doc python-django-doc python-scipy-doc llvm-14-doc
erlang-doc libboost1.74-doc sqlite3-doc git-doc vim-doc manpages manpages-dev manpages-de
manpages-fr manpages-ja manpages-ru manpages-zh dict-foldoc bible-kjv-text
developers-reference debian-reference-zh-cn debian-reference-ja
"""
PEERS = ("rustbpe==0.1.0", "tokenizers==0.23.3", "tiktoken==0.14.0", "numpy")
TRAIN_BYTES = 200_000_000
HELD_OUT_BYTES = 16_000_000
MAX_PER_PACKAGE = 40_000_000
DOC_CHARS = 10_000
ENCODE_VOCAB = 32_768
ENCODE_PASSES = 3
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
HIDDEN = re.compile(r"(?is)<(script|style|head|nav)\b.*?</\1\s*>|<!--.*?-->")
BLOCK = re.compile(r"(?i)</?(p|div|li|tr|h[1-6]|pre|br|dt|dd|table|section)\b[^>]*>")
TAG = re.compile(r"<[^>]*>")


# -- the text --------------------------------------------------------------------------------


def text_of(path: Path) -> str | None:
    """Text of a file of a package; None if it holds no text."""
    if path.suffix in (".js", ".css", ".svg", ".map", ".json", ".index", ".png", ".woff2"):
        return None
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data, path = gzip.decompress(data), path.with_suffix("")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    if path.suffix in (".html", ".htm", ".xhtml"):
        text = html.unescape(TAG.sub("", BLOCK.sub("\n", HIDDEN.sub("", text))))
        text = re.sub(r"\n\s*\n+", "\n\n", text).strip()
    elif re.fullmatch(r"\.\d\w*", path.suffix):  # a manual page: drop the troff requests
        text = re.sub(r"(?m)^[.']\S*\s?", "", text)
    return text if len(text) > 200 else None


def documents(cache: Path) -> Iterator[str]:
    """Documents of all packages, downloaded with apt and unpacked into the cache."""
    for package in PACKAGES.split():
        folder = cache / "packages" / package
        done = folder / "unpacked"
        if not done.exists():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True, stdout=2)
            for archive in folder.glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", archive, folder / "root"], check=True)
                archive.unlink()
            done.touch()
        size = 0
        for path in sorted((folder / "root").rglob("*")):
            text = text_of(path) if path.is_file() and not path.is_symlink() else None
            if text is None:
                continue
            for start in range(0, len(text), DOC_CHARS):
                yield text[start : start + DOC_CHARS]
            size += len(text)
            if size > MAX_PER_PACKAGE:
                break
        print(f"{package}: {size / 1e6:.1f} M characters", file=sys.stderr)


def build_text(cache: Path) -> None:
    """Write train.txt and held_out.txt: shuffled documents separated by zero bytes."""
    if (cache / "held_out.txt").is_file():
        return
    shuffled = sorted(set(documents(cache)))
    random.Random(0).shuffle(shuffled)
    for name, wanted in (("train.txt", TRAIN_BYTES), ("held_out.txt", HELD_OUT_BYTES)):
        taken: list[bytes] = []
        size = 0
        while size < wanted:
            if not shuffled:
                sys.exit(f"the packages hold too little text for {name}: {size} of {wanted} bytes")
            taken.append(shuffled.pop().encode())
            size += len(taken[-1])
        (cache / name).write_bytes(b"\0".join(taken))


def read(path: Path) -> list[str]:
    """The documents of a file that `build_text` wrote."""
    return path.read_bytes().decode().split("\0")


# -- one measurement, in a process of its own ------------------------------------------------


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Wall and processor seconds and extra resident memory of one training or encoding."""
    work = {"train": train, "encode": encode}[job["task"]]
    return {"job": job, **work(job, read(Path(job["text"])))}


def timed(work: Any) -> tuple[Any, dict[str, float]]:
    """What `work()` returns, and what it took."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before_mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    result = work()
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    peak_mib = int(peak[1]) / 1024 if peak else resource.getrusage(0).ru_maxrss / 1024
    extra_mib = peak_mib - before_mib
    return result, {"wall_s": wall_s, "cpu_s": cpu_s, "extra_mib": extra_mib}


def train(job: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """Train one library's tokenizer on the texts."""
    if job["library"] == "tokenizers":
        return train_tokenizers(job, texts)
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    options = {"num_threads": job["threads"]} if job["library"] == "ours" else {}
    _, took = timed(
        lambda: tokenizer.train_from_iterator(
            iter(texts), vocab_size=job["vocab"], pattern=PATTERN, **options
        )
    )
    ranks = tokenizer.get_mergeable_ranks()
    if save := job.get("save"):
        tokenizer.save(save)
        lines = [base64.b64encode(bytes(t)).decode() + f" {rank}\n" for t, rank in ranks]
        Path(f"{save}.tiktoken").write_text("".join(lines))
    digest = hashlib.sha256()
    for token, rank in ranks:
        digest.update(f"{bytes(token).hex()} {rank}\n".encode())
    return {**took, "size": len(ranks), "sha256": digest.hexdigest()}


def train_tokenizers(job: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """Hugging Face's trainer; its ties are broken otherwise, so its merges are not compared."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    trainer = trainers.BpeTrainer(
        vocab_size=job["vocab"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    _, took = timed(lambda: tokenizer.train_from_iterator(iter(texts), trainer))
    return {**took, "size": tokenizer.get_vocab_size()}


def encode(job: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """Encode the texts several times; the times are those of the median pass."""
    import numpy as np

    threads = job["threads"]
    if job["library"] == "ours":
        import rustbpe

        tokenizer = rustbpe.Tokenizer.load(job["vocab_file"])
        if job["to"] == "numpy":

            def work() -> Any:
                return tokenizer.encode_batch(texts, num_threads=threads)[0]
        else:

            def work() -> Any:
                return [tokenizer.encode(text) for text in texts]
    else:
        import tiktoken

        lines = Path(job["vocab_file"] + ".tiktoken").read_text().splitlines()
        pairs = (line.split() for line in lines)
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        encoding = tiktoken.Encoding(
            "bench", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

        def work() -> Any:
            if threads > 1:
                return encoding.encode_ordinary_batch(texts, num_threads=threads)
            return [encoding.encode_ordinary(text) for text in texts]

    passes = [timed(work) for _ in range(ENCODE_PASSES)]
    ids = passes[0][0]
    flat = ids if isinstance(ids, np.ndarray) else np.array([i for one in ids for i in one])
    took = sorted((took for _, took in passes), key=lambda t: t["wall_s"])[ENCODE_PASSES // 2]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    digest = hashlib.sha256(flat.astype("<i4").tobytes()).hexdigest()
    speed = megabytes / took["wall_s"]
    return {**took, "mb_per_s": speed, "tokens": len(flat), "sha256": digest}


# -- all of them -----------------------------------------------------------------------------


def run(job: dict[str, Any], peer: Path) -> dict[str, Any]:
    """Measure in a new process, of this Python for ours and of the peers' for theirs."""
    python = sys.executable if job["library"] == "ours" else str(peer / "bin" / "python")
    threads = str(job["threads"])
    environment = {
        **os.environ,
        "RAYON_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": str(job["threads"] > 1).lower(),
    }
    command = [python, "-P", __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    print(json.dumps(result), file=sys.stderr)
    return result


def compare(jobs: list[dict[str, Any]], peer: Path, rounds: int) -> dict[str, Any]:
    """Run the jobs in turn, ours first; medians, and what the others need in terms of ours."""
    runs = [run(job, peer) for _ in range(rounds) for job in jobs]
    digests = {one["sha256"] for one in runs if "sha256" in one}
    if len(digests) > 1:
        sys.exit(f"the results differ: {json.dumps(runs)}")

    def median(library: str, field: str) -> float:
        return statistics.median(r[field] for r in runs if r["job"]["library"] == library)

    libraries = [job["library"] for job in jobs]
    fields = [f for f in ("wall_s", "cpu_s", "extra_mib", "mb_per_s") if f in runs[0]]
    ratios = {
        library: {f: round(median(library, f) / median("ours", f), 2) for f in fields}
        for library in libraries[1:]
    }
    medians = {lib: {f: round(median(lib, f), 3) for f in fields} for lib in libraries}
    return {"medians": medians, "peer_over_ours": ratios, "equal": True, "runs": runs}


def train_benchmark(args: argparse.Namespace, vocab: int, threads: int) -> dict[str, Any]:
    """Training on the whole text."""
    job = {"task": "train", "text": str(args.cache / "train.txt"), "vocab": vocab}
    libraries = [x for x in ("ours", "rustbpe", "tokenizers") if x not in args.without]
    jobs = [{**job, "library": library, "threads": threads} for library in libraries]
    return compare(jobs, args.peer, args.rounds)


def encode_benchmark(args: argparse.Namespace, threads: int, to: str) -> dict[str, Any]:
    """Encoding of held-out text: per thread, and on two threads."""
    vocab_file = str(args.cache / f"vocab_{ENCODE_VOCAB}")
    job = {"text": str(args.cache / "held_out.txt"), "vocab_file": vocab_file, "threads": threads}
    if not Path(vocab_file).is_file():
        text = str(args.cache / "train.txt")
        made = {"task": "train", "library": "ours", "text": text, "vocab": ENCODE_VOCAB}
        run({**made, "threads": 2, "save": vocab_file}, args.peer)
    jobs = [{**job, "task": "encode", "library": lib, "to": to} for lib in ("ours", "tiktoken")]
    return compare(jobs, args.peer, args.rounds)


def main() -> None:
    """Parse the command line, measure, print JSON."""
    home = Path.home() / ".cache" / "nanochat" / "bench_tokenizer"
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--cache", type=Path, default=home, help="folder for text and peers")
    parser.add_argument("--peer", type=Path, help="virtual environment of the peers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="train,encode")
    parser.add_argument("--vocab", default="32768,65536")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--without", default="", help="leave a training peer out: tokenizers")
    parser.add_argument("--prepare", action="store_true", help="only make the text and the peers")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(json.loads(args.job))))
        return
    args.cache = args.cache.absolute()
    args.peer = (args.peer or args.cache / "peers").absolute()
    args.cache.mkdir(parents=True, exist_ok=True)
    if not (args.peer / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", args.peer], check=True)
        pip = [args.peer / "bin" / "python", "-m", "pip", "install", "--quiet", *PEERS]
        subprocess.run(pip, check=True, stdout=2)
    build_text(args.cache)
    if args.prepare:
        return
    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "peers": PEERS,
    }
    threads = [int(n) for n in args.threads.split(",")]
    if "train" in args.only:
        for vocab in map(int, args.vocab.split(",")):
            for n in threads:
                result[f"train {vocab}, {n} threads"] = train_benchmark(args, vocab, n)
    if "encode" in args.only:
        result["encode to lists, 1 thread"] = encode_benchmark(args, 1, "lists")
        for n in threads:
            result[f"encode to numpy, {n} threads"] = encode_benchmark(args, n, "numpy")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
