"""What a run takes beside its training steps: boot, data, tokenizer, evaluation, checkpoints.

Each rate stands here once, with where it comes from; none decides whether a run is possible,
but together they are a tenth of the bill.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

from infra.hardware import GIB, Offer, cores_here
from infra.memory import Layout
from infra.throughput import decode_s, forward_s
from nanochat.scaling import GPTConfig, checkpoint_bytes, mixture_tokens
from nanochat.spec import TRAIN_STAGES, Data, RunSpec, TrainStage
from nanochat.touches import package_lock, published_paths, source_facts

BOOT_S = 600.0
"""Rented machine until our code runs: cold boot and image pull, 6 to 10 minutes (union.ai)."""
FETCH_BYTES_PER_S = 50e6
SMALL_FILE_BYTES = 5e6
"""A task's file whose size data.lock.json does not know."""
SHARD_CHARS = 250e6
"""Characters of a shard of karpathy/fineweb-edu-100b-shuffle."""
EMBEDDED_CHARS = 6.0e6
"""Training text of the embedded corpus on Python 3.11."""
TOKENIZER_CHARS_PER_S = 10e6
"""Splitting and counting on one core; merging is a tenth of that (docs/benchmarks.md)."""
COMPILE_S = {False: 90.0, True: 60.0}
"""Cold torch.compile of a training stage. Keys: whether it is a CPU."""
START_S = 12.0
"""Imports, process group, loading of a stage."""
REPORT_S = 20.0
ROLLOUTS_AT_ONCE = 64
"""chat_rl.MOST_AT_ONCE: replies that a rank writes at a time."""
PROMPT_TOKENS = 128
CORE_TASKS, CORE_TOKENS = 22, 800
"""CORE: ten solved examples in front of most questions, read once, and every choice."""
CHOICE_TASKS = ("arc_easy", "arc_challenge", "kinds", "mmlu")
"""Answered by the first token behind the prompt."""
VOLUME_BYTES_PER_S = {False: 0.3e9, True: 0.5e9}
"""Writing of a checkpoint: network volume, local disk. Keys: whether it is a CPU."""
COPY_BYTES_PER_S = {False: 10e9, True: 3e9}
"""Copy to host memory while the loop is held; shared out over the ranks."""

LESS_SPACE = "checkpoint.keep_last=1 or checkpoint.thin_old=true need less"
RENDERED_BYTES_PER_TOKEN = 4
"""Of the conversations that a chat stage keeps in RUN/conversations while it trains."""

CHARS_PER_TOKEN = (
    (16, 1.0),
    (256, 1.0),
    (512, 1.9),
    (2048, 2.9),
    (4096, 3.4),
    (8192, 3.8),
    (32768, 4.5),
    (65536, 4.8),
)
"""(vocabulary, characters per token) of byte-pair encoding on web text."""


@dataclass(frozen=True)
class OtherStage:
    """A stage or a phase of the run that takes no optimizer step."""

    stage: str
    hours: float
    why: str


def chars_per_token(data: Data, vocab_size: int) -> float:
    """Interpolated in the logarithm of the vocabulary; 1 for a char tokenizer."""
    if data.tokenizer == "char":
        return 1.0
    x = math.log(max(vocab_size, CHARS_PER_TOKEN[0][0]))
    for (low, a), (high, b) in zip(CHARS_PER_TOKEN, CHARS_PER_TOKEN[1:], strict=False):
        if vocab_size <= high:
            share = (x - math.log(low)) / (math.log(high) - math.log(low))
            return a + share * (b - a)
    return CHARS_PER_TOKEN[-1][1]


def data_tokens(spec: RunSpec) -> float | None:
    """Training tokens of one pass over the base data; None where the text is not here."""
    data = spec.data
    per_token = chars_per_token(data, spec.model.vocab_size)
    if data.source == "embedded":
        return EMBEDDED_CHARS / per_token
    if data.source == "fineweb_edu":
        return data.num_shards * SHARD_CHARS / per_token
    try:
        chars = Path(data.path or "").stat().st_size
    except OSError:
        return None
    return (1 - data.val_fraction) * chars / per_token


def validation_tokens(spec: RunSpec, stage: TrainStage) -> float:
    """Tokens of one look at the validation loss: no more than the validation split has."""
    tokens = data_tokens(spec)
    if tokens is None or spec.data.source == "fineweb_edu":
        return stage.eval_tokens
    return min(stage.eval_tokens, tokens * spec.data.val_fraction / (1 - spec.data.val_fraction))


def fetch_bytes(spec: RunSpec) -> float:
    """Bytes that the network brings for the stages that are switched on."""
    return _bytes_of(published_paths(spec))


@functools.lru_cache(maxsize=64)
def _bytes_of(paths: tuple[str, ...]) -> float:
    total = 0.0
    for path in paths:
        source, _, name = path.partition("/")
        known = package_lock().get(source)
        if known is not None:
            size = known.get("files", {}).get(name, {}).get("size")
            total += size or known.get("about_bytes_per_file") or SMALL_FILE_BYTES
    return total


def data_bytes(spec: RunSpec, *, missing_only: bool, is_cached: bool = False) -> float:
    """Bytes that a run puts on its volume beside the checkpoints: files that are fetched, the token
    cache, and the conversations of the larger chat stage.

    missing_only: without the files that this machine has already. is_cached: the token cache of
    this run is made; another spec's does not tell.
    """
    facts = source_facts(spec)
    fetched = sum(source.missing_bytes if missing_only else source.bytes for source in facts)
    cached = 0.0
    if spec.data.cache and not is_cached:
        tokens = (data_tokens(spec) or 0.0) / (1 - spec.data.val_fraction)
        cached = tokens * (2 if spec.model.vocab_size <= 2**16 else 4)
    chats = [stage.mixture for stage in (spec.mid_train, spec.chat_sft) if stage is not None]
    rendered = RENDERED_BYTES_PER_TOKEN * max(map(mixture_tokens, chats), default=0)
    return fetched + cached + rendered


def other_stages(spec: RunSpec, c: GPTConfig, layout: Layout, offer: Offer) -> list[OtherStage]:
    """Everything of the run that is no training stage, in run order."""
    found = []

    def add(stage: str, seconds: float, why: str) -> None:
        found.append(OtherStage(stage, seconds / 3600, why))

    if not offer.cpu and offer.usd_per_hour > 0:
        add("boot", BOOT_S, "boot and image pull, billed by most providers")
    if spec.data_fetch is not None:
        gb = fetch_bytes(spec) / 1e9
        add("data_fetch", 5.0 + gb * 1e9 / FETCH_BYTES_PER_S, f"{gb:.1f} GB at 50 MB/s")
    if spec.tok_train is not None:
        chars = min(spec.tok_train.max_chars, _corpus_chars(spec))
        cores = cores_here() if offer.cpu else 16
        seconds = 5.0 + chars / TOKENIZER_CHARS_PER_S / min(cores, 8)
        add("tok_train", seconds, f"{chars / 1e6:.0f} M characters")
    if spec.chat_rl is not None:
        add("chat_rl", chat_rl_s(spec, c, layout, offer), f"{spec.chat_rl.num_steps} steps")
    if spec.evaluate is not None:
        add("evaluate", evaluate_s(spec, c, layout, offer), f"{len(spec.evaluate.tasks)} tasks")
    if spec.report is not None:
        add("report", REPORT_S, "plots")
    return found


def _corpus_chars(spec: RunSpec) -> float:
    tokens = data_tokens(spec)
    return (
        math.inf if tokens is None else tokens * chars_per_token(spec.data, spec.model.vocab_size)
    )


def evaluate_s(spec: RunSpec, c: GPTConfig, layout: Layout, offer: Offer) -> float:
    """Prompts of every task read and answered with the weights of every training stage."""
    settings = spec.evaluate
    if settings is None:
        return 0.0
    prompt_tokens = batches = 0.0
    for task in settings.tasks:
        examples = len(spec.scored_stages(task)) * settings.max_examples
        if task == "core":
            prompt_tokens += CORE_TASKS * examples * CORE_TOKENS
            continue
        prompt_tokens += examples * PROMPT_TOKENS
        if task not in CHOICE_TASKS:
            batches += math.ceil(examples / settings.batch_size / layout.world_size)
    prompts_s = forward_s(c, layout, offer, prompt_tokens)
    return START_S + prompts_s + batches * settings.max_tokens * decode_s(c, offer)


def chat_rl_s(spec: RunSpec, c: GPTConfig, layout: Layout, offer: Offer) -> float:
    """Rollouts, then one step on all their tokens; now and then a look at the held-out reward."""
    settings = spec.chat_rl
    if settings is None:
        return 0.0
    rollouts = settings.prompts_per_step * settings.samples_per_prompt
    rounds = math.ceil(rollouts / layout.world_size / ROLLOUTS_AT_ONCE)
    generate_s = rounds * settings.max_tokens * decode_s(c, offer)
    learn_s = 3 * forward_s(c, layout, offer, rollouts * (settings.max_tokens + PROMPT_TOKENS))
    looks = settings.num_steps // settings.eval_every_steps + 2
    look_rounds = math.ceil(settings.eval_examples / layout.world_size / ROLLOUTS_AT_ONCE)
    looks_s = looks * look_rounds * settings.max_tokens * decode_s(c, offer)
    return START_S + settings.num_steps * (generate_s + learn_s) + looks_s


@dataclass(frozen=True)
class CheckpointForecast:
    """Bytes of one checkpoint, of those kept at a time, and of all that are written."""

    each: float
    kept: float
    written: float
    save_s: float
    """From the request to a complete checkpoint."""
    stall_s: float
    """Of these, while the loop is held."""

    def to_json(self) -> dict[str, float]:
        names = ("each", "kept", "written")
        return {name: round(getattr(self, name) / GIB, 3) for name in names}


def num_saves(num_steps: int, hours: float, eval_every_steps: int, every_s: float) -> int:
    """Checkpoints that a stage writes: one before every look behind step 0, and between two looks
    one at the first step that ends more than every_s seconds after the last."""
    step_s = 3600 * hours / num_steps
    apart = math.ceil(every_s / step_s)

    def up_to_look(steps: int) -> int:
        return 1 + (steps - 1) // apart

    whole, rest = divmod(num_steps, eval_every_steps)
    return whole * up_to_look(eval_every_steps) + (up_to_look(rest) if rest else 0)


def forecast_checkpoints(
    spec: RunSpec,
    c: GPTConfig,
    layout: Layout,
    offer: Offer,
    lengths: dict[str, tuple[int, float]],
) -> CheckpointForecast:
    """What the stages write and what pruning leaves of it (checkpoint_dir.steps_to_keep).

    lengths: (steps, hours) of each stage that writes. chat_rl has no validation loss, so no best.
    """
    weights, state = checkpoint_bytes(c)
    each = float(weights + state)
    policy, every_s = spec.checkpoint, spec.budget.checkpoint_every_s
    written = kept = 0.0
    for name, (num_steps, hours) in lengths.items():
        eval_every_steps = getattr(spec, name).eval_every_steps
        copies = num_saves(num_steps, hours, eval_every_steps, every_s)
        last = min(copies, policy.keep_last)
        # with one look alone, the best checkpoint is the newest
        has_best = name in TRAIN_STAGES and num_steps > eval_every_steps
        older = int(policy.keep_best and has_best)
        if policy.keep_every_h is not None:
            older += math.ceil(hours / policy.keep_every_h) + 1
        kept += last * each + min(copies - last, older) * (weights if policy.thin_old else each)
        written += copies * each
    write_s = each / VOLUME_BYTES_PER_S[offer.cpu]
    stall_s = each / layout.world_size / COPY_BYTES_PER_S[offer.cpu]
    if not policy.asynchronous:
        stall_s += write_s
    return CheckpointForecast(each, kept, written, stall_s + write_s, stall_s)


def volume_gib(
    spec: RunSpec, checkpoints: CheckpointForecast, data_bytes: float
) -> tuple[float, str]:
    """(most that a run has on its volume with what has to stay free, of what that is), in GiB."""
    floor_gib = spec.checkpoint.free_floor_gib
    need_gib = (checkpoints.kept + checkpoints.each + data_bytes) / GIB + floor_gib
    of_what = (
        f"{checkpoints.kept / GIB:.1f} of checkpoints, {checkpoints.each / GIB:.1f} for one in the "
        f"making, {data_bytes / GIB:.1f} of data, {floor_gib:g} left free"
    )
    return need_gib, of_what
