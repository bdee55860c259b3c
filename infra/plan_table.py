"""A plan as a table that is read in ten seconds: what, how long, how much, what could fail."""

from typing import Any

from nanochat.spec import RunSpec


def render(plan: dict[str, Any], spec: RunSpec) -> str:
    """The document of plan --json as text."""
    lines = [*_head(plan, spec), "", *_stages(plan), "", *_rest(plan)]
    for heading, items in (("Refused", plan["reasons"]), ("Note", plan["warnings"])):
        if heading == "Refused" and plan["verdict"] != "refused":
            continue
        if heading == "Refused":
            items = [r for r in items if r not in plan["warnings"]]
        lines += [f"{heading}: {text}" for text in items]
    for other in plan["alternatives"]:
        lines.append(
            f"Instead: {other['config']}  ({other['why']}; {_hours(other['hours'])}, "
            f"{_usd(other['usd'])})"
        )
    return "\n".join(lines)


def _head(plan: dict[str, Any], spec: RunSpec) -> list[str]:
    model = spec.model
    price = f"at {_usd(plan['usd_per_hour'])}/h, {plan['price_source']}"
    return [
        f"{plan['name']}: {plan['verdict'].upper()} - {_hours(plan['hours'])}, {_usd(plan['usd'])}"
        f" on {plan['offer']} ({price})",
        f"{_count(plan['n_params'])} parameters ({model.depth} layers of "
        f"{model.aspect_ratio * model.depth}, sequence {model.seq_len}, vocabulary "
        f"{model.vocab_size}), {plan['world_size']} ranks, {plan['sharding']}"
        f"{', blocks recomputed' if plan['recompute'] else ''}",
    ]


def _stages(plan: dict[str, Any]) -> list[str]:
    lines = [
        f"{'stage':<12}{'steps':>8}{'batch':>9}{'rows x acc':>12}{'tokens':>9}{'tok/par':>9}"
        f"{'passes':>8}{'tok/s':>9}{'MFU':>6}{'GiB':>12}{'time':>9}{'USD':>9}"
    ]
    for s in plan["stages"]:
        passes = "?" if s["epochs"] is None else f"{s['epochs']:.3g}"
        memory = f"{s['memory_gib']['total']:.1f}/{s['memory_gib']['available']:.1f}"
        lines.append(
            f"{s['stage']:<12}{s['num_steps']:>8}{_count(s['total_batch_size']):>9}"
            f"{s['device_batch_size']:>6} x {s['grad_accum_steps']:<3}{_count(s['num_tokens']):>9}"
            f"{s['tokens_per_param']:>9.3g}{passes:>8}{_count(s['tokens_per_s']):>9}"
            f"{s['mfu']:>6.0%}{memory:>12}{_hours(s['hours']):>9}{s['usd']:>9.2f}"
        )
    for o in plan["other_stages"]:
        usd = o["hours"] * plan["usd_per_hour"]
        lines.append(f"{o['stage']:<12}{o['why']:<73}{_hours(o['hours']):>9}{usd:>9.2f}")
    return lines


def _rest(plan: dict[str, Any]) -> list[str]:
    c = plan["checkpoint_gib"]
    return [
        *map(_source, plan["data"]),
        f"Checkpoints: {c['each']:.3g} GiB each, {c['kept']:.3g} GiB kept at most, "
        f"{c['written']:.3g} GiB written; a stop leaves a {plan['stop']['expect']} "
        f"(a save takes {plan['stop']['save_s']:.0f} s of {plan['stop']['stop_grace_s']:g} s)",
    ]


def _source(facts: dict[str, Any]) -> str:
    """One source of published data: `Data: arc, 6 files, 1.6 MB (to fetch: 6, 1.6 MB), …`."""
    files = "1 file" if facts["files"] == 1 else f"{facts['files']} files"
    line = f"Data: {facts['source']}, {files}, {_bytes(facts['bytes'])}"
    if facts["missing"]:
        line += f" (to fetch: {facts['missing']}, {_bytes(facts['missing_bytes'])})"
    if facts["first_seen"]:
        line += f"; {facts['first_seen']} trusted on first fetch"
    return f"{line}; licence {facts['licence'] or 'not stated by its publisher'}"


def _bytes(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _count(n: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def _hours(hours: float) -> str:
    if hours * 60 < 1:
        return f"{hours * 3600:.0f} s"
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h"


def _usd(usd: float) -> str:
    return f"${usd:,.2f}"
