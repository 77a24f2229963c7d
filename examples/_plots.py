"""What mnist.py prints and draws: accuracies, and the inputs of a sigmoid over time."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

COLORS = ("#D55E00", "#0072B2")  # of Okabe and Ito, for colour-blind readers


class Measurement(NamedTuple):
    """How a network does after some steps of training."""

    step: int
    train_loss: float
    test_accuracy: float
    percentiles: np.ndarray  # [3, units]: 15th, 50th, 85th of the last sigmoids' inputs


def print_table(histories: dict[str, list[Measurement]], epochs: int) -> None:
    print("\n     " + "".join(f"{name:^28}" for name in histories).rstrip())
    print("epoch" + "  train loss  test accuracy " * 2)
    by_step = [{entry.step: entry for entry in history} for history in histories.values()]
    steps_per_epoch = max(by_step[0]) // epochs
    for epoch in range(1, epochs + 1):
        row = [entries[epoch * steps_per_epoch] for entries in by_step]
        cells = (f"{entry.train_loss:12.4f}{entry.test_accuracy:15.3f} " for entry in row)
        print(f"{epoch:5}" + "".join(cells))


def typical_unit(history: list[Measurement]) -> np.ndarray:
    """Returns the percentiles [3, times] of the unit whose median moves as most do."""
    percentiles = np.stack([entry.percentiles for entry in history], axis=1)
    distance = np.abs(np.diff(percentiles[1], axis=0)).sum(axis=0)
    return percentiles[:, :, np.argsort(distance)[distance.size // 2]]


def draw(histories: dict[str, list[Measurement]], path: Path) -> None:
    """Draws the test accuracies and, beside them, the input of a sigmoid over time."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, *panels = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    panels[1].sharey(panels[0])
    panels[1].tick_params(labelleft=False)
    for panel, color, (name, history) in zip(
        panels, COLORS, histories.items(), strict=True
    ):
        steps = [entry.step for entry in history]
        accuracies = [entry.test_accuracy for entry in history]
        left.plot(steps, accuracies, color=color, label=name)
        left.text(
            steps[-1], accuracies[-1], f" {accuracies[-1]:.3f}", color=color, va="center"
        )
        low, median, high = typical_unit(history)
        panel.plot(steps, median, color=color, label="median")
        band = panel.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
        band.set_label("15th to 85th percentile")
        panel.set_title(f"Input of a sigmoid\n{name}")
    left.set(title="Test accuracy\nof the sigmoid network on MNIST", ylim=(0, 1))
    left.set_ylabel("accuracy on 1000 test images")
    panels[0].set_ylabel("typical unit of the last hidden layer")
    for axes in (left, *panels):
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
