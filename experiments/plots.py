"""Line plots: the one place that draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Line:
    """One line of a panel; marker, style and colour as matplotlib names them."""

    label: str
    x: Sequence[float | str]
    y: Sequence[float]
    marker: str = "o"
    style: str = "-"
    color: str | None = None


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    x_label: str
    y_label: str
    lines: Sequence[Line]
    title: str = ""
    log_x: bool = False


def save_plot(file: Path, panels: Sequence[Sequence[Panel]], title: str = "") -> None:
    """Writes rows of panels as one picture; every panel's lines are explained in it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, columns = len(panels), len(panels[0])
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns + 1.5, 3.6 * rows), squeeze=False,
                                layout="constrained")
    for row, across in zip(axes, panels, strict=True):
        for axis, panel in zip(row, across, strict=True):
            for line in panel.lines:
                axis.plot(line.x, line.y, marker=line.marker, linestyle=line.style, color=line.color, label=line.label)
            axis.set(xlabel=panel.x_label, ylabel=panel.y_label, title=panel.title)
            if panel.log_x:
                axis.set_xscale("log", base=2)
                axis.xaxis.set_major_formatter("{x:g}")
            if panel.lines:
                axis.legend(fontsize="small")
    figure.suptitle(title)
    beside = file.with_name(f".{file.name}")  # no half of a picture is ever there
    figure.savefig(beside, dpi=110)
    plt.close(figure)
    beside.rename(file)
