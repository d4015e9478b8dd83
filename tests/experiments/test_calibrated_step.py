"""The steps are those of the closed form, what is committed is what is said, and off is off."""

from experiments import calibrated_step as experiment
from experiments import common
from jaxllm import Machine, predict
from jaxllm.spec.validate import validate

TABLE = common.read_csv(common.COMMITTED / "calibrated_step.csv")


def test_every_step_is_one_that_there_can_be_on_a_device_and_none_is_of_those_that_calibration_takes():
    from jaxllm import calibrate

    seen = [calibrate.nouns(shape, "f32") for shape in (*calibrate.FEW_STEPS, *calibrate.STEPS)]
    for step in experiment.STEPS:
        for dtype, scale, target in (("f32", 1, "cpu"), ("bf16", 8, "gpu")):
            model, layout, workload = step.nouns(dtype, scale)
            validate(model, layout, 1, workload)
            assert predict(model, layout, workload, target=target).peak < 40e9  # of an accelerator that is not small
            assert (model, workload) not in seen


def test_what_is_committed_has_every_step_and_is_what_is_claimed():
    assert [row["step"] for row in TABLE] == [step.name for step in experiment.STEPS]
    assert not experiment.wrong(TABLE)
    assert "10 steps: " in experiment.summary(TABLE)
    far = [{**row, "measured": 3 * row["measured"]} for row in TABLE]
    assert experiment.wrong(far) and all("(not)" in row["interval"] for row in experiment.shown(far))


def test_a_row_is_what_time_says_of_the_step():
    mesh = Machine.load("a100-80:1")
    row = experiment.row("any", mesh, experiment.STEPS[0].nouns("bf16", 8), 0.5)
    assert row["low"] < row["predicted"] < row["high"] and row["measured"] == 500
    assert experiment.off({"predicted": 1.5, "measured": 1.0}) == 0.5


def test_the_curve_is_never_as_far_off_products_between_the_measured_ones():
    tiles, curve = common.read_csv(common.COMMITTED / "calibrated_products.csv")
    assert tiles["rule"] == "the rule of tiles alone" and curve["rule"] == "the curve"
    assert int(curve["worst"].rstrip(" %")) < int(tiles["worst"].rstrip(" %"))
