"""The run spec: what the user asked for, and nothing that can be derived from it.

* A TOML file with one section per stage; the presence of a section switches its stage on.
* Overrides are `section.field=value` with a TOML literal as value; they cannot create a section.
* Every field's docstring is its help text; the unit stands in the name.
* Any mistake is one `SpecError` that names the place, the value, what is allowed and the nearest
  known spelling. No torch here, also indirectly.
"""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from nanochat.spec_errors import explain, section_of, unknown

STAGES = (
    "data_fetch",
    "tok_train",
    "base_train",
    "mid_train",
    "chat_sft",
    "chat_rl",
    "evaluate",
    "report",
)
TRAIN_STAGES = ("base_train", "mid_train", "chat_sft")
LENGTHS = ("num_steps", "tokens_per_param", "num_epochs", "horizon")
"""How long a training stage is: it has one of these."""
GENERATED_TASKS = ("arithmetic", "copying", "identity", "kinds", "spelling")
"""Tasks whose examples the kit makes itself."""
PUBLISHED_TASKS = (
    "arc_challenge",
    "arc_easy",
    "core",
    "gsm8k",
    "humaneval",
    "mmlu",
    "mmlu_aux",
    "smoltalk",
)
"""Tasks whose examples are files that `fetch` brings."""
WEIGHT_STAGES = ("base_train", "mid_train", "chat_sft", "chat_rl")
RL_TASKS = ("arithmetic", "copying", "gsm8k", "identity", "spelling")
"""Tasks whose written answers can be marked, with examples to train on."""
CHATCORE_TASKS = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling")
"""ChatCORE is the mean of their centred accuracies."""
MACHINE_FIELDS = ("offer", "stop_grace_s", "budget", "checkpoint", "runtime", "slurm")
"""Where a run works, for how long and what it keeps, but not what it learns: a resume, perhaps on
another machine, may change these."""


def _one_of(known: tuple[str, ...], kind: str) -> AfterValidator:
    def check(name: str) -> str:
        if name not in known:
            raise ValueError(unknown(name, list(known), kind))
        return name

    return AfterValidator(check)


class SpecError(ValueError):
    """The spec, the data or the arguments are wrong; the message names the field and the fix."""


class Section(BaseModel):
    """A frozen part of the spec that knows no other keys than its own."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",
    )


Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0)]
TaskName = Annotated[str, _one_of(GENERATED_TASKS + PUBLISHED_TASKS, "task")]


class Budget(Section):
    """What the whole run may take, over all restarts; the first bound that is reached ends it."""

    max_usd: Rate | None = None
    """Most dollars that the run may cost, over all restarts."""
    max_hours: Rate | None = None
    """Most hours that the run may take, over all restarts."""
    usd_per_hour: Annotated[float, Field(ge=0.0)] | None = None
    """Price of the machine in dollars per hour; unset: the price list of `plan`."""
    checkpoint_every_s: Annotated[float, Field(gt=0.0)] = 3600.0
    """Seconds of wall clock between two checkpoints."""


class CheckpointPolicy(Section):
    """Which checkpoints stay on the volume."""

    keep_last: Positive = 2
    """How many of the newest checkpoints of a stage are kept."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss too."""
    keep_every_h: Rate | None = None
    """Keep one checkpoint per this many hours as well."""
    free_floor_gib: Annotated[float, Field(ge=0.0)] = 1.0
    """Free space in GiB that a save never goes below."""
    asynchronous: bool = True
    """Write in the background; the loop is held only for the copy to host memory."""
    thin_old: bool = False
    """Drop the optimizer state of kept checkpoints that are not the newest."""


class Model(Section):
    """Size and shape of the transformer."""

    depth: Annotated[int, Field(ge=1, le=256)]
    """Number of layers; the width is aspect_ratio times this."""
    aspect_ratio: Annotated[int, Field(ge=8, le=512, multiple_of=2)] = 64
    """Width per layer: n_embd = aspect_ratio * depth."""
    head_dim: Annotated[int, Field(ge=16, le=256, multiple_of=2)] = 128
    """Width of a head; where it does not divide the width, the nearest that does is taken."""
    num_kv_heads: Positive | None = None
    """Key and value heads of grouped-query attention; unset: as many as query heads."""
    seq_len: Annotated[int, Field(ge=8, le=1_048_576)] = 2048
    """Tokens of context."""
    vocab_size: Annotated[int, Field(ge=16, le=1_048_576)] = 65536
    """Entries of the vocabulary, special tokens included."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability of dropping an activation in training; for runs that pass the data many times."""


class Data(Section):
    """Where the text for the tokenizer and base training comes from."""

    source: Literal["embedded", "fineweb_edu", "text"] = "embedded"
    """embedded: the Python standard library's own text; fineweb_edu: web shards; text: one file."""
    num_shards: Positive = 240
    """Training shards of fineweb_edu to use (the last shard of the set is validation)."""
    path: str | None = None
    """The text file of source = "text"."""
    val_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05
    """Share of the embedded files or of the text file that is held out for validation."""
    packing: Literal["continuous", "documents"] = "continuous"
    """continuous: documents run on across rows; documents: attention stays within a document."""
    cache: bool = False
    """Tokenize once to a memory-mapped file; documents are then permuted globally."""
    tokenizer: Literal["bpe", "char"] = "bpe"
    """Byte-pair encoding, or one token per character (the d64 experiment)."""
    unknown_char: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Character that stands in for characters outside the char vocabulary; unset: an error."""

    @model_validator(mode="after")
    def _text_needs_a_path(self) -> "Data":
        if self.source == "text" and self.path is None:
            raise ValueError('source = "text" needs data.path, the text file to train on')
        return self


class Runtime(Section):
    """How the stages run on the machine; nothing here changes what is learned."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes CUDA, then MPS, then the CPU."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the matrix products; auto is bf16 on CUDA and fp32 elsewhere."""
    compile: bool = True
    """Use torch.compile."""
    deterministic: bool = False
    """Only deterministic kernels on CUDA; the CPU is deterministic at a fixed thread count."""
    num_threads: Positive | None = None
    """Threads of each rank on a CPU; unset: the cores divided by the ranks."""
    num_ranks: Positive | None = None
    """Processes of a training stage over all nodes; unset: one per GPU, one on a CPU."""
    sharding: Literal["auto", "replicated", "fsdp"] = "auto"
    """replicated: whole model per rank; fsdp: sharded with FSDP2; auto: as the plan says."""
    hang_s: Rate | None = None
    """Seconds without a step after which a stage counts as hung; unset: derived from the steps."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often a crashed or hung stage is continued before the node counts as unfit."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    tensorboard_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Serve TensorBoard on this port while the run goes on; unset: do not."""
    tensorboard_host: str = "127.0.0.1"
    """Address that it listens on. It asks for no password: reach it through an ssh tunnel."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Send metrics to Weights & Biases; offline files are pushed later by `sync`."""
    webhook_url: str | None = None
    """Address that gets a JSON POST at start, stage ends, budget marks and failures."""


SlurmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:=,@/+-]*$")]
ClusterPath = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/$+=@-]*$")]


class Slurm(Section):
    """The job that `launch --to slurm` submits; what is unset is the cluster's default."""

    account: SlurmName | None = None
    """Account that the job is charged to."""
    partition: SlurmName | None = None
    """Partition to queue in."""
    qos: SlurmName | None = None
    """Quality of service."""
    gres: SlurmName | None = None
    """Generic resources of a node; unset: gpu:N as the offer says, nothing on a CPU."""
    cpus_per_task: Positive | None = None
    """Cores of a node; unset: 8 per GPU, the cluster's default on a CPU."""
    memory_gib: Positive | None = None
    """Memory of a node in GiB; unset: all of a GPU node, the cluster's default on a CPU."""
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")] = "12:00:00"
    """Wall time of one job as sbatch takes it: minutes, H:MM:SS or D-HH:MM:SS."""
    signal_s: Annotated[int, Field(ge=30, le=3600)] = 150
    """Seconds before the wall time at which SLURM asks for the stop; longer than stop_grace_s."""
    requeue: bool = True
    """Requeue the job itself; false, where the cluster forbids it: each job submits the next."""
    max_jobs: Annotated[int, Field(ge=1, le=1000)] = 20
    """Jobs, requeues included, after which a chain ends whatever remains to be done."""
    nodes: Positive = 1
    """Nodes of the job; the ranks of a training stage are spread evenly over them."""
    scratch: ClusterPath | None = None
    """Folder that every node sees, for data, runs, logs and caches; $USER stands for the user."""
    sif: ClusterPath | None = None
    """The image as a SIF; unset: nanochat.sif in `scratch`."""
    module: SlurmName | None = None
    """Module to load first; unset: apptainer from PATH or its module, then singularity likewise."""
    ssh: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._@-]*$")] | None = None
    """Login node to submit on, as ssh takes it; unset: this machine."""


class DataFetch(Section):
    """Bring what the later stages read to this machine."""


class TokTrain(Section):
    """Train the tokenizer."""

    max_chars: Positive = 2_000_000_000
    """Characters of training text to read at most."""
    doc_cap_chars: Positive = 10_000
    """Characters of one document to read at most."""


class TrainStage(Section):
    """What all training stages share."""

    num_steps: Positive | None = None
    """Optimizer steps."""
    total_batch_size: Positive = 524_288
    """Tokens per optimizer step over all ranks; a multiple of model.seq_len."""
    device_batch_size: Positive | Literal["auto"] = "auto"
    """Rows per rank and forward pass; auto: the largest that fits."""
    embedding_lr: Rate = 0.2
    """AdamW learning rate of the token embedding at width 768."""
    unembedding_lr: Rate = 0.004
    """AdamW learning rate of the output head at width 768."""
    matrix_lr: Rate = 0.02
    """Muon learning rate of the matrices."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay of the matrices in the blocks; not of embedding and head."""
    grad_clip: Rate = 1.0
    """Largest norm of the gradient; inf switches clipping off."""
    warmup_ratio: Fraction = 0.0
    """Share of the horizon over which the learning rate rises from zero."""
    warmdown_ratio: Fraction = 0.2
    """Share of the horizon over which the learning rate falls at the end."""
    final_lr_frac: Fraction = 0.0
    """The learning rate at the end, as a share of its constant value."""
    eval_every_steps: Positive = 250
    """Steps between two looks at the validation loss (also at step 0 and at the end)."""
    eval_tokens: Positive = 10_485_760
    """Validation tokens of one look; the whole validation split where it is smaller."""
    log_every_steps: Positive = 1
    """Steps between two lines in metrics.jsonl."""
    early_stop_patience: Positive | None = None
    """Validation looks without a new best after which the stage ends; unset: never."""
    spike_nats: Rate = 2.0
    """Losses that stay this far above their running mean roll back to the last good checkpoint."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 3
    """Roll-backs within 200 steps after which the training counts as failed."""


class BaseTrain(TrainStage):
    """Train the base model on text. Give one of num_steps, tokens_per_param and horizon."""

    tokens_per_param: Rate | None = None
    """Training tokens per parameter; 20 is compute-optimal (Hoffmann et al. 2022)."""
    horizon: Literal["budget"] | None = None
    """budget: train until the budget ends; the learning rate has reached its end by then."""
    sample_every_steps: Positive = 2000
    """Steps between two sets of sample texts."""

    @model_validator(mode="after")
    def _one_horizon(self) -> "BaseTrain":
        given = [k for k in ("num_steps", "tokens_per_param", "horizon") if getattr(self, k)]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of num_steps, tokens_per_param and horizon = "
                f'"budget"; given: {", ".join(given) or "none"}'
            )
        return self


class ChatStage(TrainStage):
    """A training stage on conversations."""

    num_epochs: Positive | None = None
    """Passes over the mixture; give this or num_steps."""
    mixture: dict[TaskName, Positive]
    """Number of conversations of each task."""

    @model_validator(mode="after")
    def _one_horizon(self) -> "ChatStage":
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give exactly one of num_steps and num_epochs")
        return self


class MidTrain(ChatStage):
    """Teach the base model the form of a conversation."""


class ChatSft(ChatStage):
    """Finetune on conversations; the loss is taken on the assistant's tokens only."""

    matrix_lr: Rate = 0.01
    """Muon learning rate of the matrices."""


class ChatRl(Section):
    """Reinforcement learning on a task whose answers can be checked (simplified GRPO)."""

    task: Annotated[str, _one_of(RL_TASKS, "task to reward")] = "gsm8k"
    """The task whose reward is maximised: arithmetic, copying, gsm8k, identity or spelling."""
    num_steps: Positive
    """Optimizer steps."""
    prompts_per_step: Positive = 16
    """Prompts of one step over all ranks, which share them evenly."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 16
    """Rollouts of one prompt; the advantage is the reward minus their mean."""
    max_tokens: Positive = 256
    """Tokens of a rollout at most."""
    temperature: Rate = 1.0
    """Sampling temperature of the rollouts; at 1 they are on-policy."""
    device_batch_size: Positive | Literal["auto"] = "auto"
    """Rollouts per rank and forward pass of the training; auto: as many as 16,384 tokens hold."""
    matrix_lr: Rate = 0.001
    """Muon learning rate of the matrices."""
    embedding_lr: Rate = 0.01
    """AdamW learning rate of the token embedding at width 768."""
    unembedding_lr: Rate = 0.0002
    """AdamW learning rate of the output head at width 768."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay of the matrices in the blocks; not of embedding and head."""
    grad_clip: Rate = 1.0
    """Largest norm of the gradient; inf switches clipping off."""
    eval_every_steps: Positive = 60
    """Steps between two looks at the held-out reward (also at step 0 and at the end)."""
    eval_examples: Positive = 128
    """Held-out examples of one look, answered greedily; all there are where these are fewer."""


class Evaluate(Section):
    """Score the weights of every training stage."""

    tasks: tuple[TaskName, ...] = Field(strict=False)
    """Names of the tasks."""
    max_examples: Positive = 500
    """Held-out examples per task at most."""
    max_tokens: Positive = 64
    """Tokens of a generated answer at most."""
    batch_size: Positive = 32
    """Examples answered at a time."""


class Report(Section):
    """Write report.md, report.html and the plots."""


class RunSpec(Section):
    """One run: what was asked for."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Name of the run and of its directory."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Seed of everything that is random."""
    offer: str = "cpu"
    """The machine that the plan is made for: N x GPU type, or cpu; `plan --on ?` lists them."""
    stop_grace_s: Rate = 8.0
    """Seconds from a stop signal to the end of the process; Docker kills after 10."""
    budget: Budget = Budget()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    model: Model
    data: Data = Data()
    runtime: Runtime = Runtime()
    slurm: Slurm = Slurm()
    data_fetch: DataFetch | None = None
    tok_train: TokTrain | None = None
    base_train: BaseTrain | None = None
    mid_train: MidTrain | None = None
    chat_sft: ChatSft | None = None
    chat_rl: ChatRl | None = None
    evaluate: Evaluate | None = None
    report: Report | None = None

    def __hash__(self) -> int:
        """By little: equal specs have equal hashes, mixtures have none."""
        return hash((self.name, self.offer, self.model))

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that are switched on, in run order."""
        return tuple(s for s in STAGES if getattr(self, s) is not None)

    @property
    def tasks(self) -> dict[str, tuple[str, ...]]:
        """Stage -> names of the tasks that it reads, in run order."""
        found: dict[str, tuple[str, ...]] = {}
        for name, stage in (("mid_train", self.mid_train), ("chat_sft", self.chat_sft)):
            if stage is not None:
                found[name] = tuple(stage.mixture)
        if self.chat_rl is not None:
            found["chat_rl"] = (self.chat_rl.task,)
        if self.evaluate is not None:
            found["evaluate"] = self.evaluate.tasks
        return found

    def scored_stages(self, task: str) -> tuple[str, ...]:
        """Stages whose weights are scored on a task.

        CORE asks for no conversation and is for the base model; published chat tasks are for
        weights that know the form of one; generated tasks cost little and are for all.
        """
        trained = tuple(stage for stage in WEIGHT_STAGES if getattr(self, stage) is not None)
        if task == "core":
            return trained[:1]
        if task in PUBLISHED_TASKS and len(trained) > 1:
            return tuple(stage for stage in trained if stage != "base_train")
        return trained

    @model_validator(mode="after")
    def _stages_fit_together(self) -> "RunSpec":
        for name in TRAIN_STAGES:
            stage = getattr(self, name)
            if stage is not None and stage.total_batch_size % self.model.seq_len:
                raise ValueError(
                    f"{name}.total_batch_size = {stage.total_batch_size} is no multiple of "
                    f"model.seq_len = {self.model.seq_len}"
                )
        unbounded = self.budget.max_hours is None and self.budget.max_usd is None
        if self.base_train and self.base_train.horizon == "budget" and unbounded:
            raise ValueError(
                'base_train.horizon = "budget" needs budget.max_hours or budget.max_usd'
            )
        if self.data.tokenizer == "char" and self.data.unknown_char is None:
            for name, tasks in self.tasks.items():
                if published := [task for task in tasks if task in PUBLISHED_TASKS]:
                    raise ValueError(
                        f'{name} reads {", ".join(published)}: with data.tokenizer = "char" '
                        'published tasks need data.unknown_char="?", whose character then '
                        "stands for those that the text lacks"
                    )
        return self


def load_spec(config: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> RunSpec:
    """Read a TOML file, apply `section.field=value` overrides, validate.

    Raises SpecError with one message for whatever is wrong.
    """
    path = Path(config)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(_missing_file(path)) from None
    except (OSError, UnicodeDecodeError) as e:
        raise SpecError(f"{path}: cannot be read: {e}") from None
    except tomllib.TOMLDecodeError as e:
        raise SpecError(f"{path}: not valid TOML: {e}") from None
    given = {override.partition("=")[0].strip() for override in overrides}
    for override in overrides:
        _apply_override(tree, override, path, given)
    try:
        return RunSpec.model_validate(tree)
    except ValidationError as e:
        raise SpecError(explain(e, str(path), RunSpec)) from None


def spec_from_json(text: str, where: str = "spec.json") -> RunSpec:
    """Read a spec that `RunSpec.model_dump_json` wrote. Raises SpecError."""
    try:
        return RunSpec.model_validate_json(text)
    except ValidationError as e:
        raise SpecError(explain(e, where, RunSpec)) from None


def differing_fields(a: RunSpec, b: RunSpec) -> list[str]:
    """Dotted names of the fields in which two specs differ, with both values."""

    def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict) or not tree:
            return {prefix: tree}
        out: dict[str, Any] = {}
        for key, value in tree.items():
            out |= flatten(value, f"{prefix}.{key}" if prefix else key)
        return out

    x, y = flatten(a.model_dump(mode="json")), flatten(b.model_dump(mode="json"))
    names = [n for n in {**x, **y} if x.get(n) != y.get(n)]
    return [f"{n}: {json.dumps(x.get(n))} -> {json.dumps(y.get(n))}" for n in names]


def describe_fields() -> list[tuple[str, str, str]]:
    """(dotted name, default as TOML or "required", help) of every field, in spec order."""
    rows: list[tuple[str, str, str]] = []

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            section = section_of(field.annotation)
            if section is not None:
                rows.append((f"[{prefix}{name}]", "", (section.__doc__ or "").strip()))
                walk(section, f"{prefix}{name}.")
                continue
            default = "required" if field.is_required() else json.dumps(field.default)
            default = "unset" if default == "null" else default
            rows.append((prefix + name, default, field.description or ""))

    walk(RunSpec, "")
    return rows


def _missing_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    known = sorted(p.name for p in folder.glob("*.toml"))
    message = f"{path}: no such file"
    if near := difflib.get_close_matches(path.name, known, n=1):
        message += f"; did you mean {folder / near[0]}?"
    elif known:
        message += f"; {folder} has {', '.join(known)}"
    return message


def _apply_override(tree: dict[str, Any], override: str, path: Path, given: set[str]) -> None:
    """Set one `section.field=value` in the tree of the TOML file. Raises SpecError.

    given: the names of all overrides. Of fields of which a stage has one, a new one replaces the
    file's; two overrides for one stage are left to be refused.
    """
    name, equals, literal = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise SpecError(f"override {override!r}: expected section.field=value")
    try:
        value = tomllib.loads(f"value = {literal}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        raise SpecError(
            f"override {override!r}: {literal!r} is no TOML literal; "
            f"""text needs quotes, in a shell: '{name}="{literal}"'"""
        ) from None
    section = tree
    for depth, key in enumerate(keys[:-1]):
        dotted = ".".join(keys[: depth + 1])
        if key not in section:
            known = [k for k, v in section.items() if isinstance(v, dict)]
            if depth == 0 and key not in RunSpec.model_fields:
                raise SpecError(f"override {override!r}: {unknown(key, known, 'section')}")
            raise SpecError(
                f"override {override!r}: {path} has no section [{dotted}], and an override cannot "
                f"create one (a section switches its stage on); sections there: {', '.join(known)}"
            )
        if not isinstance(section[key], dict):
            raise SpecError(f"override {override!r}: {dotted} is a value, not a section")
        section = section[key]
    leaf = RunSpec.model_fields.get(keys[0]) if len(keys) == 1 else None
    if leaf is not None and section_of(leaf.annotation) is not None:
        raise SpecError(f"override {override!r}: {name} is a section; give {name}.FIELD=value")
    section[keys[-1]] = value
    if keys[-1] in LENGTHS:
        for other in LENGTHS:
            if other != keys[-1] and ".".join((*keys[:-1], other)) not in given:
                section.pop(other, None)
