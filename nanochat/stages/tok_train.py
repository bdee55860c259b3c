"""Train the tokenizer, and measure how it compresses several kinds of text.

An alphabet has the characters of training and validation text, and has to have those of the
generated tasks that later stages read: what it lacks would else end them after paid training.

The table stands beside GPT-2's and GPT-4's tokenizers where their vocabularies have been fetched
(data/tokenizers/{gpt2,cl100k_base}.tiktoken).
"""

import inspect
import json
import textwrap
import time
from collections.abc import Callable
from typing import Any

import tiktoken
from tiktoken.load import load_tiktoken_bpe

from nanochat.corpus import iter_texts, locate
from nanochat.rundir import RunDir
from nanochat.spec import GENERATED_TASKS, RunSpec, SpecError
from nanochat.stage import run_stage
from nanochat.tasks import Split, make_task
from nanochat.tokenizer import SPECIAL_TOKENS, CharTokenizer, Tokenizer, TokenizerLike
from nanochat.touches import VOCABULARIES, find

STAGE = "tok_train"
SAMPLE_CHARS = 200_000
TASK_EXAMPLES = 2_000
"""Examples of a task's split that are searched for characters: they use all that the task can."""

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT4_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"""
    r"""\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
PUBLISHED = {"gpt2": GPT2_PATTERN, "cl100k_base": GPT4_PATTERN}

PROSE = """\
The lighthouse keeper wrote down the weather every evening, and every evening he added one line
about the ships that had passed. Most of them he knew by their lamps alone. When the fog came in he
rang the bell by hand, four strokes and a pause, until the last of them had answered."""
NUMBERS = """\
2 + 2 = 4; 17 * 23 = 391; 3.14159 * 2.5 ** 2 = 19.6349. In 2025 the budget grew by 12.5 % to
1,048,576 units, of which 65,536 (6.25 %) were spent by 31 January at 23:59:59."""
OTHER_SCRIPTS = """\
Die Straßenbahn fährt über die Brücke. Où est la bibliothèque ? ¿Cuántos años tienes?
Сегодня хорошая погода. Η θάλασσα είναι ήρεμη.
今天天气很好。吾輩は猫が好きだ。오늘은 날씨가 좋다. 🚀✨"""


def main(run: RunDir) -> dict[str, Any]:
    """Train on the spec's data, save to RUN/tokenizer, return the compression table."""
    spec = run.spec()
    files = locate(spec.data)
    settings = spec.tok_train
    assert settings is not None
    run.write_progress(STAGE, "train")
    started_s = time.monotonic()
    tokenizer: TokenizerLike
    if spec.data.tokenizer == "char":
        alphabet = CharTokenizer.train(
            iter_texts(files.train + files.val),
            spec.model.vocab_size,
            unknown=spec.data.unknown_char,
            max_chars=spec.model.vocab_size - len(SPECIAL_TOKENS),
        )
        check_tasks(spec, alphabet)
        tokenizer = alphabet
    else:
        try:
            tokenizer = Tokenizer.train_parquet(
                [f.path for f in files.train],
                spec.model.vocab_size,
                max_chars=settings.max_chars,
                doc_cap_chars=settings.doc_cap_chars,
            )
        except ValueError as e:  # of a damaged shard, with its name
            raise SpecError(str(e)) from None
    seconds = time.monotonic() - started_s
    if tokenizer.vocab_size > spec.model.vocab_size:
        raise SpecError(
            f"the tokenizer has {tokenizer.vocab_size} entries, more than model.vocab_size = "
            f"{spec.model.vocab_size}"
        )
    tokenizer.save(run.tokenizer_dir)
    run.write_progress(STAGE, "evaluate")
    return {
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "train_s": seconds,
        "compression": compression_table(tokenizer, _samples(files)),
    }


def check_tasks(spec: RunSpec, tokenizer: CharTokenizer) -> None:
    """Raises SpecError where a later stage reads a generated task that has characters which the
    tokenizer refuses; of published tasks the spec itself is refused."""
    stages: dict[str, list[str]] = {}
    for stage, tasks in spec.tasks.items():
        for task in tasks:
            if task in GENERATED_TASKS:
                stages.setdefault(task, []).append(stage)
    lacking = {task: tokenizer.lacks(_task_chars(task, spec.seed)) for task in stages}
    found = [
        f"{task} (read by {', '.join(stages[task])}) has {' '.join(map(repr, characters))}"
        for task, characters in lacking.items()
        if characters
    ]
    if found:
        raise SpecError(
            f"the text lacks characters of the tasks that the run reads later: {'; '.join(found)}. "
            'Start a run with data.unknown_char="?", whose character then stands for them, or with '
            "a text that has them"
        )


def _task_chars(name: str, seed: int) -> set[str]:
    """The characters of a generated task, in questions and replies of both splits."""
    characters: set[str] = set()
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        task = make_task(name, split, seed)
        for index in range(min(TASK_EXAMPLES, task.num_examples)):
            for message in task.example(index).conversation["messages"]:
                content = message["content"]
                parts = [content] if isinstance(content, str) else [p["text"] for p in content]
                characters.update(*parts)
    return characters


def compression_table(
    tokenizer: TokenizerLike, samples: dict[str, str]
) -> list[dict[str, str | int | float]]:
    """One row per kind of text and tokenizer: bytes, tokens, bytes per token."""
    counters: dict[str, Callable[[str], int]] = {"ours": tokenizer.count_tokens}
    for path_in_data, (name, pattern) in zip(VOCABULARIES, PUBLISHED.items(), strict=True):
        if path := find(path_in_data):
            encoding = tiktoken.Encoding(
                name,
                pat_str=pattern,
                mergeable_ranks=load_tiktoken_bpe(str(path)),
                special_tokens={},
            )
            counters[name] = _counter(encoding)
    rows: list[dict[str, str | int | float]] = []
    for kind, text in samples.items():
        num_bytes = len(text.encode())
        for name, count in counters.items():
            try:
                num_tokens = count(text)
            except SpecError:  # a character that a char vocabulary does not have
                continue
            rows.append(
                {
                    "text": kind,
                    "tokenizer": name,
                    "bytes": num_bytes,
                    "tokens": num_tokens,
                    "bytes_per_token": round(num_bytes / max(num_tokens, 1), 3),
                }
            )
    return rows


def _counter(encoding: tiktoken.Encoding) -> Callable[[str], int]:
    return lambda text: len(encoding.encode_ordinary(text))


def _samples(files: Any) -> dict[str, str]:
    """Texts of several kinds; the last two are what the model will read."""
    return {
        "English prose": PROSE,
        "Python code": inspect.getsource(json) + inspect.getsource(textwrap),
        "numbers": NUMBERS,
        "other scripts": OTHER_SCRIPTS,
        "training data": _first_chars(files.train),
        "validation data": _first_chars(files.val),
    }


def _first_chars(files: Any) -> str:
    taken: list[str] = []
    room = SAMPLE_CHARS
    for text in iter_texts(files):
        taken.append(text[:room])
        room -= len(taken[-1])
        if room <= 0:
            break
    return "\n".join(taken)


if __name__ == "__main__":
    run_stage(STAGE, main)
