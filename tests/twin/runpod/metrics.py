"""What a run has logged, as a reader of metrics.jsonl takes it."""

import json


def losses(lines: str) -> list[tuple[str, int, float]]:
    """(stage, step, loss), of every step the last line."""
    last: dict[tuple[str, int], float] = {}
    for line in lines.splitlines():
        record = json.loads(line)
        if "loss" in record:
            last[record["stage"], record["step"]] = record["loss"]
    return sorted((stage, step, loss) for (stage, step), loss in last.items())
