"""PNG plots: speed over an axis against the rivals and the roofline, and time against the visible pairs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from .case import OURS
from .run import Row

COLOURS = {OURS: "#d1495b"}
REST = ("#30638e", "#edae49", "#00798c", "#8d6a9f", "#7f7f7f")


def available() -> str | None:
    """None if matplotlib is here, else why there are no plots."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed; pip install 'fastattn[bench]'"
    return None


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One picture per axis and one of the ratios; returns their paths. Rows without a time are not drawn."""
    import matplotlib

    matplotlib.use("Agg")
    timed = [row for row in rows if row.seconds is not None]
    paths = [_axis(timed, axis, folder) for axis in dict.fromkeys(row.axis for row in timed if row.axis)]
    against = [row for row in timed if not row.axis and row.contender != OURS and row.ratio]
    return [*paths, _ratios(against, folder)] if against else paths


def _axis(rows: Sequence[Row], axis: str, folder: Path) -> Path:
    """Upper: GFLOP/s and the roofline, per dtype. Lower: time per FLOP over the best; flat means cost grows as work."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row.axis == axis]
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure, axes = plt.subplots(2, len(dtypes), figsize=(5.5 * len(dtypes), 6.4), squeeze=False, height_ratios=(2, 1))
    for column, dtype in enumerate(dtypes):
        upper, lower = axes[0][column], axes[1][column]
        here = [row for row in rows if row.dtype == dtype]
        for i, name in enumerate(dict.fromkeys(row.contender for row in here)):
            mine = sorted((row for row in here if row.contender == name), key=lambda row: row.x)
            xs, colour = [row.x for row in mine], COLOURS.get(name, REST[i % len(REST)])
            upper.plot(xs, [row.rate for row in mine], "o-", color=colour, label=name)
            cost = [1 / row.rate for row in mine if row.rate]
            if axis == "threads":
                lower.plot(xs, [(mine[0].seconds or 0) / (row.seconds or 1) for row in mine], "o-", color=colour)
            else:
                lower.plot(xs, [c / min(cost) for c in cost], "o-", color=colour)
        roof = [(row.x, row.attainable) for row in sorted(here, key=lambda r: r.x) if row.contender == OURS]
        if all(peak for _, peak in roof):
            upper.plot([x for x, _ in roof], [peak for _, peak in roof], "--", color="black", label="attainable")
        for ax in (upper, lower):
            ax.set_xscale("log", base=2)
            ax.grid(alpha=0.3)
        upper.set_title(f"attention forward, {dtype}")
        upper.set_ylabel("GFLOP/s (visible pairs)")
        upper.set_ylim(bottom=0)
        upper.legend()
        lower.set_ylabel("speed over one thread" if axis == "threads" else "time per FLOP\n(best = 1)")
        if axis == "threads":
            lower.set_ylim(bottom=0)
        else:
            lower.set_yscale("log")
        lower.set_xlabel(axis)
    return _save(figure, folder / f"attention_over_{axis}.png")


def _ratios(rows: Sequence[Row], folder: Path) -> Path:
    """Bars: how many times slower each rival is, one group per line of the table."""
    import matplotlib.pyplot as plt

    labels = [f"{row.room} {row.row} {row.label} {row.dtype}: {row.contender}" for row in rows]
    figure, ax = plt.subplots(figsize=(9, 1.2 + 0.19 * len(rows)))
    ratios = [row.ratio or 0.0 for row in rows]
    colours = [REST[0] if r >= 1 else COLOURS[OURS] for r in ratios]
    ax.barh(labels, [r - 1 for r in ratios], left=1, color=colours, height=0.7)
    ax.axvline(1, color="black", linewidth=1)
    ax.set_xscale("log")
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.tick_params(axis="y", labelsize=6)
    ax.set_xlabel("time of the rival / time of fastattn (right of the line fastattn is faster)")
    ax.grid(axis="x", alpha=0.3)
    return _save(figure, folder / "ratios.png")


def _save(figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path
