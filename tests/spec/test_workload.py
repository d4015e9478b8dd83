import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.workload import PRECISIONS, Workload

small = st.integers(1, 64)


@settings(deadline=None)
@given(small, small, small, small)
def test_sequences_per_device_times_all_parts_is_the_batch(each, replica, data, microbatches):
    layout = Layout(replica=replica, data=data, microbatches=microbatches, tensor=3)
    workload = Workload(batch=each * replica * data * microbatches, sequence=8)
    assert workload.sequences_per_device(layout) == each


@settings(deadline=None)
@given(st.integers(1, 10**6), small, small)
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(batch, data, microbatches):
    layout = Layout(data=data, microbatches=microbatches)
    workload = Workload(batch=batch, sequence=8)
    if batch % (data * microbatches) == 0:
        assert workload.sequences_per_device(layout) * data * microbatches == batch
        return
    with pytest.raises(SpecError) as error:
        workload.sequences_per_device(layout)
    assert f"batch {batch} " in str(error.value)
    offered = int(str(error.value).rsplit("; ", 1)[1].split()[0])
    assert Workload(batch=offered, sequence=8).sequences_per_device(layout) >= 1


@pytest.mark.parametrize(
    ("precision", "held"),
    [
        ("f32", ("f32", "f32", "f32", False)),
        ("bf16-f32", ("f32", "bf16", "f32", False)),
        ("bf16-master", ("bf16", "bf16", "bf16", True)),
    ],
)
def test_precisions_hold_what_their_names_say(precision, held):
    dtypes = Workload(batch=1, sequence=1, precision=precision).dtypes
    assert (dtypes.parameters, dtypes.compute, dtypes.gradients, dtypes.master) == held
    assert str(dtypes) == precision


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("gradients", ["f32", "bf16"])
def test_the_dtype_of_gradients_is_a_field_of_its_own(precision, gradients):
    if (precision, gradients) == ("f16-master", "bf16"):
        with pytest.raises(SpecError, match="need no scaled loss"):
            Workload(batch=1, sequence=1, precision=precision, gradient_dtype=gradients)
        return
    base = Workload(batch=1, sequence=1, precision=precision).dtypes
    dtypes = Workload(batch=1, sequence=1, precision=precision, gradient_dtype=gradients).dtypes
    assert dtypes.gradients == gradients
    assert (dtypes.parameters, dtypes.compute, dtypes.master) == (base.parameters, base.compute, base.master)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"precision": "f16"}, "has no loss scaling"),
        ({"batch": 0}, "batch=0"),
        ({"batch": -1}, "batch=-1"),
        ({"batch": True}, "batch=True"),
        ({"batch": 2.0}, "batch=2.0"),
        ({"sequence": 0}, "sequence=0"),
        ({"sequence": "8"}, "sequence=8"),
        ({"precision": "bf16-mastr"}, "did you mean 'bf16-master'?"),
        ({"optimizer": "adamw2"}, "did you mean 'adamw'?"),
        ({"optimizer": "rmsprop"}, "known: ada"),
        ({"gradient_dtype": "f16"}, "choose f32 or bf16"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_value(wrong, says):
    with pytest.raises(SpecError) as error:
        Workload(**({"batch": 1, "sequence": 1} | wrong))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
