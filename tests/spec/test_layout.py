import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import REMAT, Layout

degrees = st.integers(1, 10**9 - 1)
layouts = st.builds(
    Layout,
    replica=degrees,
    data=degrees,
    tensor=degrees,
    zero=st.integers(0, 3),
    remat=st.sampled_from(REMAT),
    microbatches=degrees,
)


@settings(deadline=None)
@given(layouts)
def test_parsing_the_printed_layout_gives_it_back(layout):
    assert Layout.parse(str(layout)) == layout


@settings(deadline=None)
@given(st.text())
def test_arbitrary_text_raises_nothing_but_spec_error(text):
    try:
        Layout.parse(text)
    except SpecError as error:
        assert str(error).startswith("layout: ")


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["data", "zero", "remat", "x"]), st.text(max_size=4)), max_size=4))
def test_nearly_right_text_raises_nothing_but_spec_error(items):
    try:
        Layout.parse(",".join(f"{key}={value}" for key, value in items))
    except SpecError:
        pass


def test_defaults_are_plain():
    assert Layout.parse("data=1") == Layout()
    assert str(Layout()) == "data=1"
    assert (Layout().zero, Layout().remat, Layout().microbatches, Layout().devices) == (0, "none", 1, 1)


def test_devices_are_the_product_of_the_degrees_outermost_first():
    layout = Layout.parse("tensor=4, replica=2 ,data=8,zero=3,remat=full,microbatches=5")
    assert layout.degrees == {"pipe": 1, "replica": 2, "data": 8, "tensor": 4}
    assert list(layout.degrees) == ["pipe", "replica", "data", "tensor"]
    assert layout.devices == 64
    assert str(layout) == "replica=2,data=8,tensor=4,zero=3,remat=full,microbatches=5"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data", "key=value"),
        ("data=", "key=value"),
        ("data=2,,tensor=2", "key=value"),
        ("tensr=2", "did you mean 'tensor'?"),
        ("data=2,data=2", "given twice"),
        ("data=0", "data=0"),
        ("data=-2", "data=-2"),
        ("data=2.0", "data=2.0"),
        ("data=1e3", "data=1e3"),
        ("data=٣", "data=٣"),  # a digit that int() would read
        ("data=1000000000", "below 10^9"),
        ("zero=4", "choose 0, 1, 2 or 3"),
        ("remat=ful", "did you mean 'full'?"),
        ("microbatches=0", "microbatches=0"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_value(text, says):
    with pytest.raises(SpecError) as error:
        Layout.parse(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [{"data": True}, {"data": 2.0}, {"zero": True}, {"tensor": "2"}, {"remat": None}])
def test_values_are_checked_where_a_layout_is_made(wrong):
    with pytest.raises(SpecError):
        Layout(**wrong)
