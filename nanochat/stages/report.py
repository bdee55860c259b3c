"""Write report.md, report.html and the plots of a run, from its files alone.

Works on half a run, offline, and on another machine; what the run has not written is left out.
"""

import time
from collections.abc import Iterable
from typing import Any

import tomli_w

from nanochat import formats, plots
from nanochat.document import (
    Block,
    Code,
    Document,
    Facts,
    Paragraph,
    Section,
    Table,
    to_html,
    to_markdown,
)
from nanochat.machine import source_size
from nanochat.records import (
    COLUMNS,
    RunRecord,
    StageRecord,
    answers,
    read_run,
    score_rows,
    trained_stages,
)
from nanochat.rundir import RunDir, atomic_write_text
from nanochat.stage import run_stage

STAGE = "report"
SAMPLES_PER_PROMPT = 5
SAMPLE_CHARS = 400
ANSWERS_PER_TASK = 3
MAX_EVENTS = 200


def main(run: RunDir) -> dict[str, Any]:
    """Write the report; facts: its files. Raises RunDirError where `run` is no run directory."""
    plots.use_writable_cache(run.report_dir)
    record = read_run(run)
    drawn = plots.draw(record, run.report_dir)
    document = make_document(record, {plot.name: plot for plot in drawn})
    atomic_write_text(run.path / "report.md", to_markdown(document, run.report_dir.name))
    atomic_write_text(run.path / "report.html", to_html(document))
    return {"files": ["report.md", "report.html"], "plots": [plot.name for plot in drawn]}


def make_document(record: RunRecord, drawn: dict[str, plots.Plot]) -> Document:
    """The whole report as data; sections without content are left out."""
    sections = [
        Section("Summary", _summary(record)),
        Section("Scores", _scores(record, drawn)),
        Section("Training", _training(record, drawn)),
        Section("Samples", _samples(record)),
        Section("Answers", _answers(record)),
        Section("Tokenizer", _tokenizer(record)),
        Section("Time and money", _money(record)),
        Section("Plan against actual", _plan_against_actual(record)),
        Section("Events", _events(record)),
        Section("Machine and provenance", _provenance(record)),
        Section("Spec", _spec(record), is_detail=True),
        Section("Everything the stages reported", _all_facts(record), is_detail=True),
    ]
    return Document(
        title=f"nanochat run {record.spec.name}",
        subtitle=_subtitle(record),
        notice=_notice(record),
        sections=[section for section in sections if section.blocks],
    )


# -- head


def _subtitle(record: RunRecord) -> str:
    parts = [f"Written {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"]
    if record.machines:
        machine = record.machines[-1]
        gpus = machine.get("gpus") or []
        hardware = f"{len(gpus)} x {gpus[0]['name']}" if gpus else machine.get("cpu")
        parts.append(f"{machine.get('host')}, {hardware}")
    return " · ".join(parts)


def _notice(record: RunRecord) -> str:
    if record.is_complete:
        return ""
    states = [f"{s} {record.stages[s].state}" for s in record.spec.stages if s != STAGE]
    return f"This run is not finished: {', '.join(states)}."


def _summary(record: RunRecord) -> list[Block]:
    base = record.stages["base_train"]
    tokens = sum(s.last("num_tokens") or 0 for s in trained_stages(record))
    headline = [
        ("Parameters", formats.count(record.n_params)),
        ("Tokens trained on", formats.count(tokens)),
    ]
    if (best := base.best_val_bpb) is not None:
        headline.append(("Base val_bpb", f"{best:.3f}"))
    if record.used_s is not None:
        headline.append(("Time", formats.duration(record.used_s)))
    if record.spent_usd is not None:
        headline.append(("Spent", formats.usd(record.spent_usd)))
    blocks: list[Block] = [Facts(headline, is_headline=True)]
    if text := _learned(base):
        blocks.append(Paragraph(text))
    if record.is_complete:
        blocks.append(Paragraph(f"Talk to the model: nanochat chat {record.path}"))
    return blocks


def _learned(base: StageRecord) -> str:
    """What the base stage learned, in a sentence or two."""
    first, best = base.first_val_bpb, base.best_val_bpb
    if first is None or best is None or len(base.vals) < 2:
        return ""
    text = (
        f"On held-out text the base model went from {first:.3f} to {best:.3f} bits per byte "
        f"({100 * (best / first - 1):+.1f} %)."
    )
    if bigram := base.facts.get("bigram_bpb"):
        side = "below" if best < bigram else "above"
        text += f" That is {side} the {bigram:.3f} of a bigram model on the same text."
    return text


# -- what it can do


def _scores(record: RunRecord, drawn: dict[str, plots.Plot]) -> list[Block]:
    rows = []
    for label, _, scores in score_rows(record):
        some = next(iter(scores.values()))
        cells = [str(scores[s]) if s in scores else "-" for s in COLUMNS]
        chance = "-" if some.chance is None else f"{some.chance:.2f}"
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
    return blocks + _plots(drawn, ["scores"])


def _training(record: RunRecord, drawn: dict[str, plots.Plot]) -> list[Block]:
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
        row("Loss at the end", lambda s: formats.fixed(_mean_end(s, "loss"), 4)),
        row("val_bpb first", lambda s: formats.fixed(s.first_val_bpb, 4)),
        row("val_bpb best", lambda s: formats.fixed(s.best_val_bpb, 4)),
        row("val_bpb last", lambda s: formats.fixed(s.last_val_bpb, 4)),
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


def _plots(drawn: dict[str, plots.Plot], names: Iterable[str]) -> list[Block]:
    return [drawn[name] for name in names if name in drawn]


def _mean_end(stage: StageRecord, key: str) -> float | None:
    """Mean of the last twenty values: a single step is noise."""
    values = [r[key] for r in stage.steps if r.get(key) is not None][-20:]
    return sum(values) / len(values) if values else None


def _samples(record: RunRecord) -> list[Block]:
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


def _answers(record: RunRecord) -> list[Block]:
    rows = []
    found = answers(record, ANSWERS_PER_TASK)
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


def _tokenizer(record: RunRecord) -> list[Block]:
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


# -- what it cost


def _money(record: RunRecord) -> list[Block]:
    rows = []
    total_s = 0.0
    for name in record.spec.stages:
        stage = record.stages[name]
        seconds = stage.seconds
        total_s += seconds or 0.0
        lost = f"{stage.repeated_steps:,}" if stage.repeated_steps else "-"
        lost_usd = formats.usd(record.usd(stage.repeated_s)) if stage.repeated_steps else "-"
        cost = formats.usd(record.usd(seconds))
        state = "writing" if name == STAGE else stage.state
        rows.append([name, state, formats.duration(seconds), cost, lost, lost_usd])
    if record.used_s is not None:
        rest_s = max(0.0, record.used_s - total_s)
        rest = [formats.duration(rest_s), formats.usd(record.usd(rest_s)), "-", "-"]
        rows.append(["starting, stopping, killed work", "", *rest])
        rows.append(
            [
                "whole run",
                "",
                formats.duration(record.used_s),
                formats.usd(record.spent_usd),
                "-",
                "-",
            ]
        )
    headers = ["Stage", "State", "Time", "Cost", "Steps done again", "Lost to restarts"]
    facts = [("Price", f"{formats.usd(record.usd_per_hour)} per hour{_price_source(record)}")]
    budget = record.spec.budget
    if budget.max_usd is not None:
        facts.append(
            ("Budget", f"{formats.usd(record.spent_usd)} of {formats.usd(budget.max_usd)}")
        )
    if budget.max_hours is not None:
        used_h = formats.fixed(_hours(record.used_s), 2)
        facts.append(("Hours", f"{used_h} of {budget.max_hours:g}"))
    facts.append(("Starts", formats.whole(record.num_starts)))
    return [Table(headers, rows, left=(0, 1)), Facts(facts)]


def _price_source(record: RunRecord) -> str:
    sources = list(dict.fromkeys(r["source"] for r in record.ledger if r.get("source")))
    return f" ({', '.join(sources)})" if sources else ""


def _plan_against_actual(record: RunRecord) -> list[Block]:
    pair = formats.pair
    rows = []
    for name, stage in record.stages.items():
        plan = stage.plan
        if not plan or name not in record.spec.stages:
            continue
        planned_gib = (plan.get("memory_gib") or {}).get("total")
        cost = record.usd(stage.seconds)
        speed, mfu = stage.median("tokens_per_s"), stage.median("mfu")
        rows.append(
            [
                name,
                pair(plan.get("num_steps"), stage.num_steps, formats.whole),
                pair(plan.get("num_tokens"), stage.last("num_tokens"), formats.count),
                pair(plan.get("hours"), _hours(stage.seconds), formats.hours),
                pair(plan.get("usd"), cost, formats.usd),
                pair(plan.get("tokens_per_s"), speed, formats.whole),
                pair(plan.get("mfu"), mfu, formats.percent),
                pair(planned_gib, stage.peak_memory_gib, formats.gib),
            ]
        )
    if not rows:
        return []
    time_cell = pair(record.plan.get("hours"), _hours(record.used_s), formats.hours)
    money = pair(record.plan.get("usd"), record.spent_usd, formats.usd)
    rows.append(["whole run", "", "", time_cell, money, "", "", ""])
    headers = ["Stage", "Steps", "Tokens", "Time", "Cost", "Tokens/s", "MFU", "Memory"]
    blocks: list[Block] = [
        Paragraph(f"Planned for {record.plan.get('offer', record.spec.offer)} → measured."),
        Table(headers, rows),
    ]
    if record.resolved:
        changes = [
            [
                formats.utc(r.get("time")),
                str(r.get("what")),
                ", ".join(f"{k} {v}" for k, v in r.items() if k not in ("time", "what")),
            ]
            for r in record.resolved[:MAX_EVENTS]
        ]
        blocks += [
            Paragraph("What changed after the plan was made:"),
            Table(["Time", "What", "Facts"], changes, left=(0, 1, 2)),
        ]
    return blocks


def _hours(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 3600


def _events(record: RunRecord) -> list[Block]:
    told = [e for e in record.events if e["event"] != "start" or e.get("step")]
    told.sort(key=lambda e: e.get("time_s") or 0.0)
    if not told:
        return [Paragraph("None: no restart, no roll-back, no warning.")]
    rows = [
        [
            formats.utc(e.get("time_s")),
            e["stage"],
            formats.whole(e.get("step")),
            e["event"],
            str(e.get("message", "")),
        ]
        for e in told[-MAX_EVENTS:]
    ]
    headers = ["Time (UTC)", "Stage", "Step", "Event", "Message"]
    blocks: list[Block] = [Table(headers, rows, left=(0, 1, 3, 4))]
    if len(told) > MAX_EVENTS:
        blocks.append(Paragraph(f"The last {MAX_EVENTS} of {len(told)} events."))
    return blocks


# -- where it came from


def _provenance(record: RunRecord) -> list[Block]:
    blocks: list[Block] = []
    for machine in record.machines:
        gpus = machine.get("gpus") or []
        versions = machine.get("versions") or {}
        facts = [
            ("Host", machine.get("host")),
            ("System", machine.get("os")),
            ("Processor", f"{machine.get('cpu')}, {machine.get('cores')} cores"),
            ("Memory", formats.gib(machine.get("memory_gib"))),
            ("GPUs", ", ".join(f"{g['name']} {g['memory_gib']:g} GiB" for g in gpus)),
            ("GPU driver", gpus[0].get("driver") if gpus else ""),
            ("Python", machine.get("python")),
            *((name, version) for name, version in versions.items()),
            ("Image", machine.get("image")),
            ("sha256 of requirements.lock", machine.get("requirements_lock_sha256")),
        ]
        blocks.append(Facts([(name, str(value)) for name, value in facts if value]))
    commits = [
        f"{git['commit']} ({git['branch']}, {git['changed_files']} changed files)"
        for git in record.git_states
    ]
    if commits:
        blocks.append(Facts([("Git commit", commit) for commit in commits]))
    data = record.stages["data_fetch"].facts
    if data:
        blocks.append(Facts([("Data", str(data.get("source"))), *_data_facts(data)]))
    size = source_size()
    blocks.append(
        Facts(
            [
                ("Source files", f"{size.files:,}"),
                ("Source lines", f"{size.lines:,}"),
                ("Source characters", f"{size.characters:,}"),
                ("Source tokens, about", f"{size.characters // 4:,}"),
                ("Locked dependencies", formats.whole(size.dependencies)),
            ]
        )
    )
    return blocks


def _data_facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        (
            f"Data, {split}",
            f"{data[f'{split}_shards']} shards, {formats.num_bytes(data[f'{split}_bytes'])}",
        )
        for split in ("train", "val")
        if f"{split}_shards" in data and f"{split}_bytes" in data
    ]
    hashes = data.get("sha256") or {}
    shown = list(hashes.items())[:4]
    facts += [(f"sha256 of {name}", value) for name, value in shown]
    if len(hashes) > len(shown):
        facts.append(("sha256 of the others", "in stages/data_fetch.json"))
    return facts


def _spec(record: RunRecord) -> list[Block]:
    tree = record.spec.model_dump(mode="json", exclude_none=True)
    if "webhook_url" in tree["runtime"]:  # such an address is a password
        tree["runtime"]["webhook_url"] = "(set)"
    return [Code(tomli_w.dumps(tree).strip())]


def _all_facts(record: RunRecord) -> list[Block]:
    blocks: list[Block] = []
    for name, stage in record.stages.items():
        flat = [(k, v) for k, v in stage.facts.items() if not isinstance(v, dict | list)]
        if flat:
            blocks += [Paragraph(name), Facts([(k, str(v)) for k, v in flat])]
    return blocks


if __name__ == "__main__":
    run_stage(STAGE, main)
