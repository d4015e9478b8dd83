"""experiments/fit_a100.py: the machine's file has what was fitted, and the fit is where the rows are nearest."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import common, fit_a100, published
from jaxllm import Machine

MACHINE = Machine.read("a100-80")
TABLE = {row["figure"]: row for row in common.read_csv(common.COMMITTED / "fit_a100.csv")}


def test_the_machine_has_what_was_fitted():
    assert TABLE.keys() == {*fit_a100.PRIORS, *fit_a100.FIXED, "interval.least", "interval.tensor"}
    for name, row in TABLE.items():
        assert MACHINE.value(name) == pytest.approx(row["fitted"], rel=0.005), name  # files state three digits


def test_no_constant_would_be_better_elsewhere():
    """The loss, which the script minimises, at the figures of the file and a little beside each."""
    steps = published.steps(calibration=True)
    rows, rates = fit_a100.Rows.of(steps), steps[0].rates

    def loss(figures: dict[str, float]) -> float:
        seconds, _, _ = rows.time(fit_a100.with_figures(rates, figures, MACHINE))
        off = np.log(seconds / rows.seconds) * rows.weights / fit_a100.WIDTH
        known = [(np.log(figures[name] / prior) / sure) ** 2 for name, (prior, sure, _) in fit_a100.PRIORS.items()]
        return float(np.sum(np.log1p(off**2)) + sum(known))

    figures = {name: MACHINE.value(name) for name in (*fit_a100.PRIORS, *fit_a100.FIXED)}
    least = loss(figures)
    for name in fit_a100.PRIORS:
        for factor in (0.9, 1.1):
            assert loss(figures | {name: factor * figures[name]}) > least - 0.02, (name, factor)


def test_many_steps_at_once_take_what_each_takes():
    all_ = published.steps(calibration=True)
    steps = [step for step in all_ if step.layout.pipe > 1][::9] + all_[::40]
    rows = fit_a100.Rows.of(steps)
    seconds, _, _ = rows.time(steps[0].rates)
    np.testing.assert_allclose(seconds, [float(step.time().seconds) for step in steps], rtol=1e-9)
