"""Write report.md, report.html and the plots of a run, from its files alone.

Works on half a run, offline, and on another machine; what the run has not written is left out.
"""

import time
from typing import Any

from nanochat import formats, plots, report_costs, report_results
from nanochat.document import Block, Document, Facts, Paragraph, Section, to_html, to_markdown
from nanochat.records import RunRecord, StageRecord, read_run, trained_stages
from nanochat.rundir import RunDir, atomic_write_text
from nanochat.stage import run_stage

STAGE = "report"


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
        Section("Scores", report_results.scores(record, drawn)),
        Section("Training", report_results.training(record, drawn)),
        Section("Samples", report_results.samples(record)),
        Section("Answers", report_results.answers(record)),
        Section("Tokenizer", report_results.tokenizer(record)),
        Section("Time and money", report_costs.money(record)),
        Section("Plan against actual", report_costs.plan_against_actual(record)),
        Section("Events", report_costs.events(record)),
        Section("Machine and provenance", report_costs.provenance(record)),
        Section("Spec", report_costs.spec(record), is_detail=True),
        Section("Everything the stages reported", report_costs.all_facts(record), is_detail=True),
    ]
    return Document(
        title=f"nanochat run {record.spec.name}",
        subtitle=_subtitle(record),
        notice=_notice(record),
        sections=[section for section in sections if section.blocks],
    )


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


if __name__ == "__main__":
    run_stage(STAGE, main)
