"""Draws docs/images/schedule.png: the learning rate over a training, as the training itself steps it.

.venv/bin/python scripts/schedule_picture.py [--out PNG]
"""

import argparse
from pathlib import Path

import torch
from torch.optim import SGD

from handlers.detection.loop import one_cycle
from handlers.detection.networks import NETWORKS
from handlers.detection.pictures.figure import DPI, new_figure, save
from schemas.params import ParamClass

ITERATIONS = 1000
COLOURS = ("#0072b2", "#d55e00")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "schedule.png")
    out = parser.parse_args().out
    rate = ParamClass().inital_learning_rate
    figure, _ = new_figure(8 * DPI, 3.6 * DPI, layout="constrained")
    axes = figure.subplots()
    peaks = sorted({recipe.peak for recipe in NETWORKS.values()}, reverse=True)
    for peak, colour in zip(peaks, COLOURS, strict=True):
        names = ", ".join(name for name, recipe in NETWORKS.items() if recipe.peak == peak)
        axes.plot(
            [100 * step / ITERATIONS for step in range(ITERATIONS)],
            rates(rate, peak),
            color=colour,
            linewidth=1.8,
            label=f"{names}: peak {rate * peak:g}",
        )
    axes.annotate(
        f"inital_learning_rate {rate:g}",
        (0, rate),
        (24, 0.002),
        arrowprops={"arrowstyle": "->", "color": "#444444"},
        color="#444444",
    )
    axes.set_xlabel("share of max_num_iters, %")
    axes.set_ylabel("learning rate")
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, out)


def rates(rate: float, peak: float) -> list[float]:
    """The learning rate of every iteration."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    schedule = one_cycle(optimizer, rate, peak, ITERATIONS)
    found = []
    for _ in range(ITERATIONS):
        found.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return found


if __name__ == "__main__":
    main()
