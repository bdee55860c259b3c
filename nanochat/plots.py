"""Plots of a run: one panel per stage, as PNG for report.md and as SVG for report.html.

The SVG has no background, takes its text and grid colours from the page (so it follows the page's
dark and light theme), and keeps text as text. Long runs are drawn as means over bins of steps.
"""

import io
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from nanochat.records import (
    COLUMNS,
    CORE_PART,
    RunRecord,
    StageRecord,
    score_rows,
    trained_stages,
)

COLOURS = {
    "base_train": "#3b82c4",
    "mid_train": "#d97a2b",
    "chat_sft": "#3a9d63",
    "chat_rl": "#a05fc0",
}
TEXT, GRID, WARN = "#1f2328", "#d0d7de", "#cf4444"
MAX_POINTS = 600
SMOOTH_FROM = 40
"""Points from which a curve also gets its running mean."""
STYLE: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "nanochat",
}

Series = list[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """A drawn figure: `name`.png lies in the report folder."""

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Curve:
    """What a panel shows of a stage: values of step lines against steps."""

    name: str
    title: str
    caption: str
    unit: str
    value: Callable[[dict[str, Any]], float | None]
    is_noisy: bool = False
    """Also draw the mean of the neighbouring steps."""
    is_log: bool = False
    from_zero: bool = False


def _key(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda line: line.get(name)


def _loader_wait_percent(line: dict[str, Any]) -> float | None:
    wait_s, step_s = line.get("loader_wait_s"), line.get("step_s")
    return None if wait_s is None or not step_s else 100 * wait_s / step_s


def _mfu_percent(line: dict[str, Any]) -> float | None:
    return None if line.get("mfu") is None else 100 * line["mfu"]


def _loss(line: dict[str, Any]) -> float | None:
    """Of a likelihood; what chat_rl descends on is none."""
    return None if "reward" in line else line.get("loss")


CURVES = (
    Curve(
        "loss",
        "Training loss",
        "Each step, and the mean around it. Dotted lines are restarts, red ones roll-backs.",
        "nats per target",
        _loss,
        is_noisy=True,
    ),
    Curve(
        "learning_rate",
        "Learning rate",
        "Of the matrices (Muon); the embeddings' rates have the same shape.",
        "learning rate",
        _key("lr"),
        from_zero=True,
    ),
    Curve(
        "grad_norm",
        "Gradient norm",
        "Before clipping; logarithmic unless it is 0 somewhere.",
        "norm",
        _key("grad_norm"),
        is_noisy=True,
        is_log=True,
    ),
    Curve(
        "reward",
        "Reward",
        "Mean reward of the rollouts.",
        "reward",
        _key("reward"),
        is_noisy=True,
        from_zero=True,
    ),
    Curve(
        "val_reward",
        "Held-out reward",
        "Share of held-out examples that are answered right, most likely token first.",
        "reward",
        _key("val_reward"),
        from_zero=True,
    ),
    Curve(
        "tokens_per_s",
        "Speed",
        "Tokens per second over all ranks.",
        "tokens/s",
        _key("tokens_per_s"),
        is_noisy=True,
        from_zero=True,
    ),
    Curve(
        "mfu",
        "Model FLOP utilisation",
        "Useful FLOPs against the peak of the hardware; recomputation does not count.",
        "percent",
        _mfu_percent,
        is_noisy=True,
        from_zero=True,
    ),
    Curve(
        "gpu_util",
        "GPU utilisation",
        "Mean of the run's GPUs on the first node; below 80 % something else sets the speed.",
        "percent",
        _key("gpu_util"),
        is_noisy=True,
        from_zero=True,
    ),
    Curve(
        "gpu_power",
        "GPU power",
        "Sum of the run's GPUs on the first node.",
        "watts",
        _key("gpu_power_w"),
        from_zero=True,
    ),
    Curve(
        "gpu_memory",
        "GPU memory",
        "Largest of the run's GPUs on the first node.",
        "GiB",
        _key("gpu_memory_gib"),
        from_zero=True,
    ),
    Curve(
        "memory",
        "Memory of the process",
        "Resident memory of rank 0.",
        "GiB",
        _key("host_memory_gib"),
        from_zero=True,
    ),
    Curve(
        "loader_wait",
        "Waiting for data",
        "Share of each step that the loop waits for the loader.",
        "percent",
        _loader_wait_percent,
        is_noisy=True,
        from_zero=True,
    ),
)


def draw(record: RunRecord, folder: Path) -> list[Plot]:
    """Draw every plot that the run has data for; writes the PNG files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    stages = trained_stages(record)
    plots: list[Plot] = []
    with rc_context(STYLE):
        for curve in CURVES:
            panels = [(s, _series(s.steps, curve.value)) for s in stages]
            panels = [(s, series) for s, series in panels if series]
            if panels:
                plots.append(_curve_plot(curve, panels, record, folder))
            if curve.name == "loss" and (looked := [s for s in stages if s.vals]):
                plots.append(_val_plot(looked, folder))
        if record.scores:
            plots.append(_score_plot(record, folder))
    return plots


def use_writable_cache(folder: Path) -> None:
    """Give matplotlib a cache in `folder` where the home directory cannot be written (a read-only
    container); it ends the process otherwise. To be called before the first figure is drawn."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    nearest = next(p for p in (cache, *cache.parents) if p.exists())
    if not os.access(nearest, os.W_OK):
        os.environ.setdefault("MPLCONFIGDIR", str(folder / ".matplotlib"))


def _curve_plot(
    curve: Curve, panels: list[tuple[StageRecord, Series]], record: RunRecord, folder: Path
) -> Plot:
    figure, axes = _panels(len(panels))
    for ax, (stage, series) in zip(axes, panels, strict=True):
        colour = COLOURS[stage.name]
        xs, ys = zip(*_binned(series), strict=True)
        is_long = len(xs) >= SMOOTH_FROM and curve.is_noisy
        marker = "" if len(xs) > 1 else "o"
        ax.plot(xs, ys, color=colour, linewidth=1.2, alpha=0.35 if is_long else 1.0, marker=marker)
        if is_long:
            ax.plot(xs, _neighbour_mean(ys), color=colour, linewidth=1.8)
        if max(ys) >= 1000:
            ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if curve.is_log and min(ys) > 0:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            ax.yaxis.set_minor_locator(NullLocator())
        elif curve.from_zero:
            ax.set_ylim(0, 1.08 * max(ys) or 1.0)
        if curve.name == "loss":
            _mark_events(ax, record, stage.name)
        _label(ax, stage.name)
    axes[0].set_ylabel(curve.unit)
    return _save(figure, folder, curve.name, curve.title, curve.caption)


def _val_plot(stages: list[StageRecord], folder: Path) -> Plot:
    """Validation bits per byte, with the bar that a bigram model sets and the best look."""
    figure, axes = _panels(len(stages))
    for ax, stage in zip(axes, stages, strict=True):
        series = _series(stage.vals, _key("val_bpb"))
        if not series:
            continue
        xs, ys = zip(*series, strict=True)
        marker = "o" if len(xs) < SMOOTH_FROM else ""
        ax.plot(xs, ys, color=COLOURS[stage.name], linewidth=1.6, marker=marker, markersize=3.5)
        best = min(range(len(ys)), key=ys.__getitem__)
        ax.annotate(
            f"{ys[best]:.3f}",
            (xs[best], ys[best]),
            xytext=(-4, 7),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
        bigram = stage.facts.get("bigram_bpb")
        if bigram:
            ax.axhline(bigram, color=WARN, linewidth=1.2, linestyle="--")
            ax.annotate(
                f"bigram {bigram:.3f}",
                (xs[-1], bigram),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=WARN,
            )
        ax.margins(y=0.12)
        _label(ax, stage.name)
    axes[0].set_ylabel("bits per byte")
    caption = (
        "On held-out text (base) and held-out conversations (later stages); the number is the "
        "best. A bigram model knows which token follows which, and nothing of the text before."
    )
    return _save(figure, folder, "val_bpb", "Validation loss", caption)


def _score_plot(record: RunRecord, folder: Path) -> Plot:
    """Bars per task, one per stage, with standard errors and the score of guessing."""
    rows = [row for row in score_rows(record) if not row[1].startswith(CORE_PART)]
    bars = [[(s, by[s]) for s in COLUMNS if s in by] for _, _, by in rows]
    height = 0.17 * sum(len(b) for b in bars) + 0.14 * len(rows)
    figure = Figure(figsize=(8.4, height + 0.75))
    ax = figure.subplots()
    y, ticks = 0.0, []
    for (label, _, by), row in zip(rows, bars, strict=True):
        ticks.append((y + (len(row) - 1) / 2, label))
        chance = next((s.chance for s in by.values() if s.chance is not None), None)
        if chance:
            ax.plot([chance] * 2, [y - 0.6, y + len(row) - 0.4], color=WARN, zorder=4)
        for stage, score in row:
            ax.barh(
                y,
                score.value,
                height=0.84,
                color=COLOURS[stage],
                xerr=score.stderr,
                error_kw={"elinewidth": 1, "ecolor": TEXT},
            )
            y += 1
        y += 0.8
    ax.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    ax.set_ylim(y - 0.8, -0.9)
    ax.set_xlim(min(0.0, *(s.value for _, _, by in rows for s in by.values())), 1.0)
    ax.grid(visible=False, axis="y")
    ax.set_axisbelow(True)
    ax.tick_params(length=0)
    shown = [s for s in COLUMNS if any(s in by for _, _, by in rows)]
    handles = [Patch(color=COLOURS[s], label=COLUMNS[s]) for s in shown]
    figure.legend(handles=handles, loc="upper center", ncols=len(shown))
    caption = "Whiskers are one standard error; red marks the score of guessing, where it is not 0."
    top = 1 - 0.3 / (height + 0.75)
    return _save(figure, folder, "scores", "Scores on held-out examples", caption, top)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    widths = {1: 8.4, 2: 4.2, 3: 2.8, 4: 2.1}
    figure = Figure(figsize=(widths[count] * count, 2.6))
    axes = figure.subplots(1, count, squeeze=False)
    return figure, list(axes[0])


def _label(ax: Axes, stage: str) -> None:
    ax.set_title(stage, loc="left", color=COLOURS[stage])
    ax.set_xlabel("step")
    ax.tick_params(length=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    left, right = ax.get_xlim()
    if right - left < 1:  # of one point, which has no room for whole numbers
        ax.set_xlim(left - 1, right + 1)


def _mark_events(ax: Axes, record: RunRecord, stage: str) -> None:
    for event in record.events:
        if event["stage"] != stage or not event.get("step"):
            continue
        if event["event"] == "rollback":
            ax.axvline(event["step"], color=WARN, linewidth=1.0)
        elif event["event"] == "start":
            ax.axvline(event["step"], color=TEXT, linewidth=0.9, linestyle=":")


def _series(
    lines: Iterable[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]
) -> Series:
    found = ((line["step"], value(line)) for line in lines)
    return [(x, y) for x, y in found if y is not None and math.isfinite(y)]


def _binned(series: Series) -> Series:
    """At most MAX_POINTS points: means over runs of neighbours."""
    if len(series) <= MAX_POINTS:
        return series
    size = math.ceil(len(series) / MAX_POINTS)
    bins = [series[i : i + size] for i in range(0, len(series), size)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]


def _neighbour_mean(ys: Sequence[float]) -> list[float]:
    """Mean of up to a twentieth of the curve around each point, as far to the left as to the
    right: it neither lags nor bends at the ends."""
    most = max(2, len(ys) // 40)
    reach = [min(most, i, len(ys) - 1 - i) for i in range(len(ys))]
    windows = [ys[i - r : i + r + 1] for i, r in enumerate(reach)]
    return [sum(w) / len(w) for w in windows]


def _save(
    figure: Figure, folder: Path, name: str, title: str, caption: str, top: float = 1.0
) -> Plot:
    """Write the PNG and return the SVG; the axes fill the figure up to `top` (0 to 1)."""
    figure.tight_layout(rect=(0, 0, 1, top))
    figure.savefig(folder / f"{name}.png", dpi=130, facecolor="white")
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :].replace(TEXT, "currentColor").replace(GRID, "var(--line)")
    return Plot(name, title, caption, svg)
