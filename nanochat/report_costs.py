"""The sections of a report that tell what the run took and where it came from.

Each is a list of blocks, empty without data.
"""

from typing import Any

import tomli_w

from nanochat import formats
from nanochat.document import Block, Code, Facts, Paragraph, Table
from nanochat.machine import source_size
from nanochat.records import RunRecord
from nanochat.spec import STAGES

MAX_EVENTS = 200
NO_LOCK = "no lock knows it"


def money(record: RunRecord) -> list[Block]:
    """Time and dollars per stage, and what restarts have cost."""
    rows = []
    total_s = 0.0
    for name in record.spec.stages:
        stage = record.stages[name]
        seconds = stage.seconds
        total_s += seconds or 0.0
        lost = f"{stage.repeated_steps:,}" if stage.repeated_steps else "-"
        lost_usd = formats.usd(record.usd(stage.repeated_s)) if stage.repeated_steps else "-"
        cost = formats.usd(record.usd(seconds))
        state = "writing" if name == "report" and stage.state != "done" else stage.state
        rows.append([name, state, formats.duration(seconds), cost, lost, lost_usd])
    if record.used_s is not None:
        rest_s = max(0.0, record.used_s - total_s)
        rest = [formats.duration(rest_s), formats.usd(record.usd(rest_s)), "-", "-"]
        rows.append(["starting, stopping, killed work", "", *rest])
        whole = [formats.duration(record.used_s), formats.usd(record.spent_usd), "-", "-"]
        rows.append(["whole run", "", *whole])
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


def plan_against_actual(record: RunRecord) -> list[Block]:
    """What the plan promised and what was measured."""
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
    for other in record.plan.get("other_stages", []):
        name = other["stage"]
        if name in record.spec.stages:
            seconds = record.stages[name].seconds
            usd = other["hours"] * record.usd_per_hour
            rows.append(
                [
                    name,
                    "",
                    "",
                    pair(other["hours"], _hours(seconds), formats.hours),
                    pair(usd, record.usd(seconds), formats.usd),
                    *[""] * 3,
                ]
            )
    if not rows:
        return []
    rows.sort(key=lambda row: STAGES.index(row[0]))
    hours = pair(record.plan.get("hours"), _hours(record.used_s), formats.hours)
    usd = pair(record.plan.get("usd"), record.spent_usd, formats.usd)
    rows.append(["whole run", "", "", hours, usd, "", "", ""])
    headers = ["Stage", "Steps", "Tokens", "Time", "Cost", "Tokens/s", "MFU", "Memory"]
    blocks: list[Block] = [
        Paragraph(
            f"Planned for {record.plan.get('offer', record.spec.offer)} → measured; once where "
            "both are the same."
        ),
        Table(headers, rows),
    ]
    if record.resolved:
        changes = [
            [
                formats.utc(r.get("time")),
                str(r.get("what")),
                ", ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                    for k, v in r.items()
                    if k not in ("time", "what") and v is not None and not isinstance(v, dict)
                ),
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


def events(record: RunRecord) -> list[Block]:
    """Restarts, roll-backs, warnings, in order."""
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


def provenance(record: RunRecord) -> list[Block]:
    """Machines, versions, source, data: what one needs to make the run again."""
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
            ("Image", ", ".join(f"{k} {v}" for k, v in (machine.get("image") or {}).items())),
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
    facts += [(f"sha256 of {name}", value or NO_LOCK) for name, value in shown]
    if len(hashes) > len(shown):
        facts.append(("sha256 of the others", "in stages/data_fetch.json"))
    published = data.get("published_sha256") or {}
    facts += [(f"sha256 of {path}", value or NO_LOCK) for path, value in published.items()]
    return facts


def spec(record: RunRecord) -> list[Block]:
    """What was asked for, as TOML."""
    tree = record.spec.model_dump(mode="json", exclude_none=True)
    if "webhook_url" in tree["runtime"]:  # such an address is a password
        tree["runtime"]["webhook_url"] = "(set)"
    return [Code(tomli_w.dumps(tree).strip())]


def all_facts(record: RunRecord) -> list[Block]:
    """Every number that a stage has written into its outcome."""
    blocks: list[Block] = []
    for name, stage in record.stages.items():
        flat = [(k, v) for k, v in stage.facts.items() if not isinstance(v, dict | list)]
        if flat:
            blocks += [Paragraph(name), Facts([(k, str(v)) for k, v in flat])]
    return blocks
