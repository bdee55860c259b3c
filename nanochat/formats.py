"""Numbers as text with their units, for reports; an absent number is a dash."""

import time
from collections.abc import Callable
from typing import Any


def whole(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def fixed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def gib(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f} GiB"


def usd(value: float | None) -> str:
    """Dollars and cents; a fraction of a cent is said to be one."""
    if value is None:
        return "-"
    return "< $0.01" if 0 < value < 0.005 else f"${value:,.2f}"


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f} s"


def hours(value: float | None) -> str:
    return duration(None if value is None else 3600 * value)


def num_bytes(value: float | None) -> str:
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.2f} GiB"


def count(value: float | None) -> str:
    """1,234, 1.23 M, 1.23 B."""
    if value is None:
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02} min" if hours else f"{m} min {s:02} s"


def utc(unix_s: float | None) -> str:
    if unix_s is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(unix_s))


def pair(planned: float | None, actual: float | None, form: Callable[[Any], str]) -> str:
    """planned → actual, each in the given form; once where both look the same."""
    before, after = form(planned), form(actual)
    return after if before == after else f"{before} → {after}"
