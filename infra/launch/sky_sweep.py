"""A sweep: one run per value of a field, and one budget for all of them.

Each run has a name, and so a run directory, of its own, and an equal share of `budget.max_usd`;
shares cannot be lent, so that no order of starts or recoveries spends more than the whole.
"""

import itertools
import json
import re
import tomllib
from collections.abc import Sequence

from nanochat.spec import RunSpec, SpecError

MAX_RUNS = 32
"""More is a mistake in the command rather than a small sweep."""


def points(spec: RunSpec, axes: Sequence[str]) -> list[tuple[str, ...]]:
    """Overrides of each run of a sweep. Raises SpecError.

    axes: `section.field=A,B,…` each, with TOML literals; several give every combination.
    """
    if spec.budget.max_usd is None:
        raise SpecError("a sweep needs budget.max_usd: what all its runs may cost together")
    combinations = list(itertools.product(*(_axis(axis) for axis in axes)))
    if len(combinations) > MAX_RUNS:
        raise SpecError(f"this sweep has {len(combinations)} runs, more than {MAX_RUNS}")
    share_usd = spec.budget.max_usd / len(combinations)
    found = []
    for values in combinations:
        told = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", literal) for _, literal in values)
        found.append(
            (
                f'name="{spec.name}-{told}"',
                f"budget.max_usd={share_usd:.6f}",
                *(f"{field}={literal}" for field, literal in values),
            )
        )
    if len({point[0] for point in found}) < len(found):
        raise SpecError("two runs of this sweep would have the same values")
    return found


def _axis(axis: str) -> list[tuple[str, str]]:
    """(field, value as TOML) of each value."""
    field, _, values = axis.partition("=")
    try:
        listed = tomllib.loads(f"x = [{values}]")["x"]
    except tomllib.TOMLDecodeError:
        listed = []
    if not listed or any(isinstance(v, dict | list) for v in listed):
        raise SpecError(f"--sweep {axis!r}: section.field=A,B with TOML literals, e.g. seed=1,2,3")
    return [(field, json.dumps(value)) for value in listed]
