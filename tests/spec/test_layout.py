import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.spec import activations
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
@given(st.lists(st.tuples(st.sampled_from(["data", "zero", "remat", "save", "sequence", "attention", "x"]), st.text(max_size=4)), max_size=4))
def test_nearly_right_text_raises_nothing_but_spec_error(items):
    try:
        Layout.parse(",".join(f"{key}={value}" for key, value in items))
    except SpecError:
        pass


@pytest.mark.parametrize(
    ("text", "saved"),
    [
        ("remat=none", set(activations.NAMES)),
        ("remat=selective", set(activations.NAMES) - {"scores"}),
        ("remat=full", set()),
        ("remat=full,save=qkv+mlp", {"q", "k", "v", "gate", "up"}),
        ("remat=full,save=scores+residual", {"scores", "residual"}),
        ("attention=blockwise", set(activations.NAMES) - {"scores"} | {"lse"}),
        ("remat=selective,attention=blockwise", set(activations.NAMES) - {"scores"} | {"lse"}),
        ("remat=full,attention=blockwise,save=attention+k", {"attention", "lse", "k"}),
        ("remat=full,attention=blockwise,save=qkv", {"q", "k", "v"}),
    ],
)
def test_what_is_saved_by_name(text, saved):
    assert Layout.parse(text).saved == saved
    assert Layout.parse(str(Layout.parse(text))) == Layout.parse(text)


def test_sequence_is_written_as_it_is_typed():
    assert str(Layout.parse("sequence=true,tensor=2")) == "tensor=2,sequence=true"
    assert Layout.parse("tensor=2,sequence=false") == Layout(tensor=2)


def test_defaults_are_plain():
    assert Layout.parse("data=1") == Layout()
    assert str(Layout()) == "data=1"
    assert (Layout().zero, Layout().remat, Layout().microbatches, Layout().devices) == (0, "none", 1, 1)


def test_devices_are_the_product_of_the_degrees_outermost_first():
    layout = Layout.parse("tensor=4, replica=2 ,data=8,zero=3,remat=full,microbatches=5")
    assert layout.degrees == {"pipe": 1, "replica": 2, "data": 8, "context": 1, "tensor": 4}
    assert list(layout.degrees) == ["pipe", "replica", "data", "context", "tensor"]
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
        ("remat=full,save=qkv+mlq", "nothing named 'mlq'; known: qkv, mlp, q, k, v, scores"),
        ("remat=full,save=+", "a name is missing beside a +"),
        ("remat=full,save=scores+scores", "names scores twice; name each once"),
        ("remat=full,save=up+mlp", "names up twice"),
        ("data=8,offload=input+q+qkv", "names q twice"),
        ("data=8 zero=1", "has two values; put a comma between them"),
        ("save=qkv", "adds to what remat=full saves, and remat is none"),
        ("tensor=2,sequence=yes", "neither true nor false"),
        ("data=8,sequence=true", "tensor is 1"),
        ("context=2,attention=blockwise,exchange=rign", "did you mean 'ring'?"),
        ("exchange=ulysses", "context is 1"),
        ("context=4", "context=4 passes keys and values round a ring"),
        ("context=2,attention=cudnn", "attention=cudnn takes all of it at once"),
        ("context=2,pipe=2,attention=blockwise", "with pipe=2 the stages do different work"),
        ("context=0", "context=0"),
        ("attention=blokwise", "did you mean 'blockwise'?"),
        ("attention=blockwise,remat=full,save=qkv+scores", "save=qkv+scores: with attention=blockwise the scores are never there"),
        ("attention=blockwise,remat=full,save=lse", "nothing named 'lse'"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_value(text, says):
    with pytest.raises(SpecError) as error:
        Layout.parse(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [{"data": True}, {"data": 2.0}, {"zero": True}, {"tensor": "2"}, {"remat": None}, {"save": 1}, {"sequence": 1}, {"attention": None}, {"context": True}, {"exchange": None}])
def test_values_are_checked_where_a_layout_is_made(wrong):
    with pytest.raises(SpecError):
        Layout(**wrong)
