"""The sections of a report that tell what was learned: lists of blocks, empty without data."""

from collections.abc import Iterable
from typing import Any

from nanochat import formats, plots
from nanochat.document import Block, Code, Paragraph, Table
from nanochat.records import (
    COLUMNS,
    CORE_PART,
    RunRecord,
    Score,
    StageRecord,
    first_answers,
    score_rows,
    trained_stages,
)

SAMPLES_PER_PROMPT = 5
SAMPLE_CHARS = 400
ANSWERS_PER_TASK = 3


def scores(record: RunRecord, drawn: dict[str, plots.Plot]) -> list[Block]:
    """Every metric per stage, as table and bars."""
    rows = []
    core = []
    for label, task, by_stage in score_rows(record):
        some = next(iter(by_stage.values()))
        cells = [str(by_stage[s]) if s in by_stage else "-" for s in COLUMNS]
        chance = "-" if some.chance is None else f"{some.chance:.2f}"
        if task.startswith(CORE_PART):
            name = label.removeprefix(CORE_PART)
            core.append([name, str(some), chance, _centred(some), f"{some.n:,}"])
        else:
            rows.append([label, *cells, chance, f"{some.n:,}"])
    if not rows:
        return []
    blocks: list[Block] = [
        Table(["Metric", *COLUMNS.values(), "Chance", "Examples"], rows),
        Paragraph(
            "Held-out examples, scored with the weights at the end of each stage; ± is one "
            "standard error, chance is the score of guessing."
        ),
    ]
    blocks += _plots(drawn, ["scores"])
    if core:
        blocks += [
            Paragraph(
                "The tasks of CORE. Centred: 0 is guessing, 1 is all right; CORE is their mean."
            ),
            Table(["Task", "Accuracy", "Chance", "Centred", "Examples"], core),
        ]
    return blocks


def _centred(score: Score) -> str:
    if score.chance is None:
        return "-"
    return f"{(score.value - score.chance) / (1 - score.chance):.3f}"


def training(record: RunRecord, drawn: dict[str, plots.Plot]) -> list[Block]:
    """How the training of each stage went, as table and curves."""
    stages = trained_stages(record)
    if not stages:
        return []
    headers = ["", *(COLUMNS[s.name] for s in stages)]

    def row(label: str, cell: Any) -> list[str]:
        return [label, *(cell(s) for s in stages)]

    rows = [
        row("Steps", lambda s: formats.whole(s.num_steps)),
        row("Tokens", lambda s: formats.count(s.last("num_tokens"))),
        row("Epochs", lambda s: formats.fixed(s.last("epochs") or s.last("epoch"), 2)),
        row("Loss at the end", _loss_at_end),
        row("val_bpb first", lambda s: formats.fixed(s.first_val_bpb, 4)),
        row("val_bpb best", lambda s: formats.fixed(s.best_val_bpb, 4)),
        row("val_bpb last", lambda s: formats.fixed(s.last_val_bpb, 4)),
        row("Reward of rollouts at the end", lambda s: formats.fixed(_mean_end(s, "reward"), 3)),
        row("Held-out reward first", lambda s: formats.fixed(s.facts.get("reward_first"), 3)),
        row("Held-out reward last", lambda s: formats.fixed(s.facts.get("reward_last"), 3)),
        row("Tokens per second", lambda s: formats.whole(s.median("tokens_per_s"))),
        row("MFU", lambda s: formats.percent(s.median("mfu"))),
        row("Peak memory", lambda s: formats.gib(s.peak_memory_gib)),
        row("Waiting for data", lambda s: formats.seconds(s.facts.get("loader_wait_s"))),
        row("Held by checkpoints", lambda s: formats.seconds(s.facts.get("checkpoint_stall_s"))),
        row("Bytes of a checkpoint", lambda s: formats.num_bytes(s.facts.get("checkpoint_bytes"))),
    ]
    blocks: list[Block] = [Table(headers, [r for r in rows if any(c != "-" for c in r[1:])])]
    order = ["loss", "val_bpb", *(c.name for c in plots.CURVES if c.name != "loss")]
    return blocks + _plots(drawn, order)


def _loss_at_end(stage: StageRecord) -> str:
    """Of a likelihood; what chat_rl descends on is none."""
    is_rl = any("reward" in line for line in stage.steps)
    return "-" if is_rl else formats.fixed(_mean_end(stage, "loss"), 4)


def _plots(drawn: dict[str, plots.Plot], names: Iterable[str]) -> list[Block]:
    return [drawn[name] for name in names if name in drawn]


def _mean_end(stage: StageRecord, key: str) -> float | None:
    """Mean of the last twenty values: a single step is noise."""
    values = [r[key] for r in stage.steps if r.get(key) is not None][-20:]
    return sum(values) / len(values) if values else None


def samples(record: RunRecord) -> list[Block]:
    """What the model writes after fixed prompts, at several steps."""
    blocks: list[Block] = []
    for stage in record.stages.values():
        by_prompt: dict[str, dict[int, str]] = {}
        for line in stage.samples:
            by_prompt.setdefault(line["sample"], {})[line["step"]] = line["text"]
        for prompt, texts in by_prompt.items():
            steps = _spread(sorted(texts), SAMPLES_PER_PROMPT)
            lines = [f"step {s:>6,}  {_one_line(texts[s])}" for s in steps]
            blocks.append(Code("\n".join(lines), caption=f"{stage.name}, after “{prompt}”"))
    if blocks:
        blocks.insert(
            0,
            Paragraph(
                "What the model writes after a prompt, most likely token first, at several steps "
                "of the training. ⏎ is a line break."
            ),
        )
    return blocks


def answers(record: RunRecord) -> list[Block]:
    """The first questions of each task, with what each stage's weights answered."""
    rows = []
    found = first_answers(record, ANSWERS_PER_TASK)
    stages = [s for s in COLUMNS if any(s in by_stage for by_stage in found.values())]
    for (task, _), by_stage in found.items():
        prompt = next(iter(by_stage.values())).get("prompt", "")
        cells = [_answer(by_stage.get(stage)) for stage in stages]
        rows.append([task, _one_line(str(prompt)), *cells])
    if not rows:
        return []
    headers = ["Task", "Question", *(COLUMNS[s] for s in stages)]
    return [
        Paragraph(
            f"The first {ANSWERS_PER_TASK} held-out examples of each task, answered with the most "
            "likely token at each place. All of them stand in the run's folder evaluations."
        ),
        Table(headers, rows, left=range(len(headers))),
    ]


def _answer(line: dict[str, Any] | None) -> str:
    if line is None:
        return "-"
    mark = "right" if line.get("correct") else "wrong"
    return f"{mark}: {_one_line(str(line.get('completion', '')))}"


def _spread(steps: list[int], count: int) -> list[int]:
    """At most `count` of the steps: the first, the last, and evenly between."""
    if len(steps) <= count:
        return steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def _one_line(text: str) -> str:
    shown = text[:SAMPLE_CHARS] + ("…" if len(text) > SAMPLE_CHARS else "")
    return "".join(c if c.isprintable() else "�" for c in shown.replace("\n", "⏎"))


def tokenizer(record: RunRecord) -> list[Block]:
    """How the trained vocabulary compresses, beside published ones."""
    rows = record.stages["tok_train"].facts.get("compression") or []
    if not rows:
        return []
    names = list(dict.fromkeys(r["tokenizer"] for r in rows))
    kinds = {r["text"]: r["bytes"] for r in rows}
    cell = {(r["text"], r["tokenizer"]): r["bytes_per_token"] for r in rows}
    table = [
        [kind, f"{size:,}", *(formats.fixed(cell.get((kind, name)), 2) for name in names)]
        for kind, size in kinds.items()
    ]
    facts = record.stages["tok_train"].facts
    text = f"{facts.get('vocab_size', 0):,} tokens; bytes of text per token, more is denser."
    return [Paragraph(text), Table(["Text", "Bytes", *names], table)]
