"""The course of a training: a CSV that a resumed run continues, and a plot."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

#: Column of the CSV, and what Trainer calls it.
COLUMNS = {
    "step": "step",
    "epoch": "epoch",
    "loss": "loss",
    "learning_rate": "learning_rate",
    "gradient_norm": "grad_norm",
    "held_out_loss": "eval_loss",
    "expected_acceptance": "eval_expected_acceptance",
}


class History(TrainerCallback):
    """Writes ``losses.csv``, and ``losses.png`` where matplotlib is installed.

    Args:
        folder: where they go.
        loss: the loss's name, for the plot.
    """

    def __init__(self, folder: Path, loss: str):
        self._path, self._plot, self._loss = folder / "losses.csv", folder / "losses.png", loss

    def begin(self, step: int) -> None:
        """Starts the file; rows that a resumed run will write again are dropped."""
        rows = [row for row in self.rows() if int(row["step"]) <= step] if step else []
        fresh = self._path.with_suffix(".csv.new")
        with fresh.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        fresh.replace(self._path)

    def rows(self) -> list[dict[str, str]]:
        """What is in the file; a row that a kill cut short is left out."""
        if not self._path.is_file():
            return []
        with self._path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row.values() and row["step"].isdigit()]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        values = {**(logs or {}), "step": state.global_step}
        # Trainer's last words, on run time, are of no step.
        if not state.is_world_process_zero or not values.keys() & {"loss", "eval_loss"}:
            return
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerow([_show(values.get(name)) for name in COLUMNS.values()])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.plot()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.plot()

    def plot(self) -> None:
        """Draws loss and expected acceptance over the steps; does nothing without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, column, label in (
            (left, "loss", "training"),
            (left, "held_out_loss", "held out"),
            (right, "expected_acceptance", "held out"),
        ):
            points = [(int(row["step"]), float(row[column])) for row in self.rows() if row[column]]
            axes.plot(*zip(*points, strict=True) if points else ([], []), label=label, marker=".")
        left.set(xlabel="step", ylabel=self._loss)
        right.set(xlabel="step", ylabel="expected acceptance Σ min(p, q)", ylim=(0, 1))
        left.legend()
        fresh = self._plot.with_suffix(".new.png")
        figure.savefig(fresh, dpi=120)
        fresh.replace(self._plot)


def _show(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
