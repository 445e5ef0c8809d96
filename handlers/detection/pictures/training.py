"""How a training went."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from handlers.detection.job import Measured
from handlers.detection.pictures.figure import DPI, new_figure, save


def training_curve(measurements: Sequence[Measured], path: Path) -> None:
    """Write a PNG: loss, average precision on the validation images (if any) and learning rate over the iterations.

    Drawn are the values `loss`, `learning_rate`, `map` and `map_50` of `measurements`, as far as they are there and
    finite; the loss as it is, and smoothed.
    """
    series = {name: _series(measurements, name) for name in ("loss", "learning_rate", "map", "map_50")}
    measured = [name for name in ("map", "map_50") if len(series[name][0])]
    heights = [3, 2, 1] if measured else [3, 1]
    figure, _ = new_figure(9 * DPI, (2 + 1.1 * sum(heights)) * DPI, layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])

    loss_panel, rate_panel = panels[0], panels[-1]
    iterations, loss = series["loss"]
    marker = "o" if len(loss) == 1 else ""
    loss_panel.plot(iterations, loss, marker=marker, color="#9ecae1", linewidth=0.8, label="loss")
    if len(loss) > 1:
        loss_panel.plot(iterations, _smoothed(loss), color="#08519c", linewidth=1.8, label="loss, smoothed")
    if len(loss):
        # The first iterations are often ten times as high as the rest.
        if 0 < 3 * loss.min() < loss.max():
            loss_panel.set_yscale("log")
            loss_panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            loss_panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            loss_panel.yaxis.set_minor_formatter(NullFormatter())
        loss_panel.legend(loc="upper right")
    loss_panel.set_ylabel("training loss")

    if measured:
        names = {"map": ("mAP", "#006d2c", "o"), "map_50": ("mAP@.5", "#74c476", "s")}
        for name in measured:
            label, colour, marker = names[name]
            iterations, values = series[name]
            last = f"{label}, last {values[-1]:.3f}"
            panels[1].plot(iterations, values, marker=marker, markersize=5, color=colour, linewidth=1.4, label=last)
        panels[1].set_ylim(0, 1.02)
        panels[1].set_ylabel("validation")
        panels[1].legend(loc="lower right")

    iterations, rate = series["learning_rate"]
    rate_panel.plot(iterations, rate, marker="o" if len(rate) == 1 else "", color="#a63603", linewidth=1.4)
    rate_panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rate_panel.set_ylim(bottom=0)
    rate_panel.set_ylabel("learning rate")
    rate_panel.set_xlabel("iteration")
    rate_panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len({m.iteration for m in measurements}) < 2:
        middle = measurements[0].iteration if measurements else 0
        rate_panel.set_xlim(middle - 1, middle + 1)
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.align_ylabels()
    save(figure, path)


def _series(measurements: Sequence[Measured], name: str) -> tuple[Any, Any]:
    points = sorted((m.iteration, m.values[name]) for m in measurements if name in m.values)
    return np.array([point[0] for point in points]), np.array([point[1] for point in points], np.float64)


def _smoothed(values: Any) -> Any:
    """Mean over a window of a twentieth of the values around each, of what there is of it at the ends."""
    window = np.ones(max(len(values) // 20, 3) // 2 * 2 + 1)[: len(values)]
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
