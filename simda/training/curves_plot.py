"""The curves of a run as one picture, `OUTPUT/curves.png`."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

PLOT_FILE = "curves.png"
PANELS = {
    "loss": ("loss", "validation_loss"),
    "loss by quarter of the noise schedule": tuple(
        f"loss/{quarter}" for quarter in ("cleanest", "cleaner", "noisier", "noisiest")
    ),
    "norm of the gradient": ("grad_norm",),
    "learning rate": ("learning_rate",),
}


def plot_curves(rows: list[dict[str, Any]]) -> bytes:
    """A PNG with a panel for each kind of number.

    Args:
        rows: the lines of `metrics.jsonl`, oldest first.
    """
    figure = Figure(figsize=(12, 8), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        _draw_panel(axes, title, names, rows)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def _draw_panel(axes: Axes, title: str, names: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 50 else None)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if len(axes.lines) > 1:
        axes.legend()
