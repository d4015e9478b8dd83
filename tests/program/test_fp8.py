"""Products in 8 bits: every line equal, the run equal to the reference where rounding leaves no choice, refusals."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxllm import ModelConfig, predict
from jaxllm.check import check
from jaxllm.program import fp8
from jaxllm.program import run as runs
from jaxllm.program.reference import in_8_bits, reference_steps
from jaxllm.program.run import TOLERANCE, _reference, run
from jaxllm.spec import workload as workloads
from jaxllm.spec.errors import SpecError
from jaxllm.spec.fp8 import HISTORY
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Machine
from jaxllm.spec.workload import Workload
from tests.program.test_gpt import SMALL as GPT
from tests.program.test_run import LEARNING_RATES, MODEL, built_for, compiled_for

CELLS = [
    ("cpu:8", "data=4,tensor=2,zero=1,microbatches=2"), ("cpu:8", "replica=2,data=4,zero=3,remat=full"),
    ("h100:8", "data=4,tensor=2,zero=2,sequence=true,microbatches=2"), ("h100:8", "data=8,offload=optimizer"),
    ("v5e:2x4", "data=4,tensor=2,zero=1,remat=selective"),
]  # fmt: skip
CONVERTED, NO_RATE = "emitted: matmuls of 0 FLOPs multiply in 8 bits", "precision fp8: no source has a rate of "
NOTES = {"cpu": (CONVERTED,), "h100": (), "v5e": (NO_RATE,), "rtx4090": (), "a100-80": (CONVERTED, NO_RATE)}


def different(found) -> list[str]:
    return [row.label for row in found.rows if row.status != "equal"]


def notes_are_told(found, machine) -> bool:
    notes = [note for note in found.notes if "8 bits" in note]
    return len(notes) == len(NOTES[machine]) and all(map(str.startswith, notes, NOTES[machine]))


@pytest.mark.parametrize(("mesh", "text"), CELLS)
def test_every_line_is_equal(mesh, text):
    machine = Machine.load(mesh)
    found = check(MODEL, Layout.parse(text), machine, Workload(8, 8, "fp8"))
    assert different(found) == [] and not found.unexplained
    assert any(row.label == "matmul/backward/fp8" for row in found.rows)
    # So small a model has products that no card multiplies in 8 bits.
    assert machine.target == "gpu" or notes_are_told(found, machine.machine.name), found.notes


def test_every_line_of_a_gpt_is_equal():
    found = check(GPT, Layout.parse("data=4,tensor=2,zero=2"), Machine.load("cpu:8"), Workload(8, 8, "fp8"))
    assert different(found) == [] and not found.unexplained


@pytest.mark.parametrize("machine", ["h100", "rtx4090", "a100-80"])
def test_a_card_multiplies_in_8_bits_or_a_note_says_not(machine):
    """Kernels of 8 bits want 16 elements a row at least."""
    model = replace(MODEL, d_model=64, d_ff=128, head_dim=16)
    found = check(model, Layout.parse("data=2"), Machine.load(f"{machine}:2"), Workload(2, 32, "fp8"))
    assert different(found) == [] and not found.unexplained
    assert notes_are_told(found, machine), found.notes


def test_bytes_and_flops():
    model = ModelConfig.load("llama-tiny")
    layout, each = Layout.parse("data=2,tensor=4"), {}
    for precision in ("bf16-f32", "fp8"):
        each[precision] = predict(replace(model, kv_heads=4), layout, Workload(2, 64, precision))
    wide, narrow = each.values()
    tensors = model.layers * 7 * 3
    assert narrow.line("optimizer").value - wide.line("optimizer").value == 4 * HISTORY * tensors
    for name in ("parameters", "gradients", "residuals", "batch"):
        assert narrow.line(name) == wide.line(name)
    for phase in ("forward", "backward"):
        parts = [narrow.line("matmul", phase=phase, dtype=dtype).value for dtype in ("", "fp8")]
        assert sum(parts) == wide.line("matmul", phase=phase).value
    # All but scores, attention and head.
    weights = model.layers * (2 * model.d_model * (model.heads + 4) * model.head_dim + 3 * model.d_model * model.d_ff)
    assert narrow.line("matmul", phase="forward", dtype="fp8").value == 2 * 64 * weights // 4
    sent = narrow.line("all-reduce", phase="update", axes=("data", "tensor"))
    assert sent.value == 4 * tensors and wide.total("collectives") + 4 * tensors == narrow.total("collectives")


# ---------------------------------------------------------------- the run


def test_the_run_is_near_the_reference():
    layout = Layout.parse("data=2,tensor=2,zero=1,microbatches=2")
    found = check(MODEL, layout, Machine.load("cpu:4"), Workload(8, 8, "fp8"), run=True)
    assert found.run.agrees and found.run.tolerance == TOLERANCE["fp8"], found.run.errors
    assert {name for name in found.run.errors if name.startswith("amax")} == {"amax/input", "amax/kernel", "amax/gradient"}


def test_gradients_that_are_too_large_as_a_whole_disagree(monkeypatch):
    """Elements are so far off by rounding that 1.3 times a gradient passes for it."""
    monkeypatch.setattr(runs, "MANY", 100)
    built = built_for("data=2,microbatches=2", MODEL, "fp8")
    compiled = compiled_for(built)

    def wrong(parameters, state, batch):
        before = jax.tree.map(np.asarray, optax.tree.get(state, "mu"))  # the step takes its place
        parameters, state, metric = compiled(parameters, state, batch)
        larger = jax.tree.map(lambda after, mu: after + 0.3 * (after - 0.9 * mu), optax.tree.get(state, "mu"), before)
        return parameters, optax.tree.set(state, mu=larger), metric

    right, off = run(built, compiled, steps=1), run(built, wrong, steps=1)
    assert right.agrees and max(right.sizes.values()) < right.size_tolerance == runs.SIZES["fp8"], right.sizes
    assert not off.agrees and off.max_relative_error < off.tolerance
    gradients = [size for name, size in off.sizes.items() if name.startswith("gradient/") and size]
    assert len(gradients) > 1 and min(gradients) > runs.SIZES["fp8"], off.sizes


EXACT = "fp8 in f32"


@pytest.fixture
def exact(monkeypatch):
    """A precision of f32 throughout but for the products, so that nothing but the order of a sum changes what is rounded."""
    monkeypatch.setitem(workloads.PRECISIONS, EXACT, replace(workloads.PRECISIONS["fp8"], name=EXACT, compute="f32"))


@functools.cache
def settled(model) -> int:
    """The first seed of a run in which no element is so near the middle between two numbers of 8 bits that an error of an f32
    would round it to the other one."""
    dtypes = ("float32",) * (11 if model.tied else 12)
    for seed in range(200):
        known = _reference(model, 8, 8, dtypes, "adamw", LEARNING_RATES["adamw"], 3, seed, True, "float32")
        rng = np.random.default_rng(seed)
        if all(_unmoved(model, known, rng) for _ in range(3)):
            return seed
    raise AssertionError("all seeds have elements that an f32 may round either way")


def _unmoved(model, known, rng) -> bool:
    """Whether gradients stay where they are when the parameters move by a part in a million."""
    moved = jax.tree.map(lambda x: (x * (1 + 1e-6 * rng.uniform(-1, 1, x.shape))).astype(np.float32), known.start)
    steps = reference_steps(
        model, moved, known.batches, learning_rates=[LEARNING_RATES["adamw"]] * 3, slots=known.slots, amaxes=known.amaxes
    )
    for (_, found, *_), (_, expected, *_) in zip(steps, known.steps, strict=True):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            if np.max(np.abs(a - b)) > 3e-5 * np.max(np.abs(b)):
                return False
    return True


LAYOUTS = [
    "data=1,microbatches=4",
    "replica=2,data=2,tensor=2,zero=2,microbatches=2",
    "replica=2,data=2,tensor=2,zero=3,remat=full,microbatches=2",
    "data=2,tensor=2,zero=1,sequence=true,remat=selective",
    "data=2,context=2,tensor=2,zero=1,attention=blockwise",
    "data=2,context=2,zero=3,exchange=ulysses",
    "data=4,zero=2,remat=jax",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_run_equals_the_reference_where_an_f32_decides_nothing(layout, exact):
    built = built_for(layout, MODEL, EXACT)
    result = run(built, compiled_for(built), seed=settled(MODEL))
    assert result.max_relative_error < 1e-5, result.errors


# What is wrong, and the errors that must show it.
def amaxes_of_one_tensor_rank():
    def largest(x, axes):
        names = fp8.mesh.present(axes)
        if x.ndim != 3 or "tensor" not in names:
            return lax.pmax(x, names) if names else x
        first = lax.axis_index("tensor") == 0
        return lax.pmax(jnp.where(first, x, 0), names)

    return fp8.mesh, "largest", largest


def scaled_by_the_last_step_alone():
    return fp8, "entered", lambda amaxes, new: jnp.broadcast_to(new[..., None], amaxes.shape)


def scales_of_gradients_in_the_place_of_those_of_kernels():
    right = fp8.scales
    return fp8, "scales", lambda amaxes: right(amaxes)[..., jnp.array([0, 2, 1])]


def gradients_in_the_format_of_inputs():
    return fp8, "_TYPES", fp8._TYPES | {"gradient": jnp.float8_e4m3fn}


def nothing_beyond_the_largest_number():
    return fp8, "quantized", lambda x, scale, tensor: (x.astype(jnp.float32) * scale).astype(fp8._TYPES[tensor])


MUTATIONS = [
    (amaxes_of_one_tensor_rank, ("amax/kernel", "amax/gradient")),
    (scaled_by_the_last_step_alone, ("amax/input", "gradient_norm/2")),
    (scales_of_gradients_in_the_place_of_those_of_kernels, ("loss/1", "change/layers.q")),
    (gradients_in_the_format_of_inputs, ("change/layers.q",)),
    (nothing_beyond_the_largest_number, ("change/layers.q",)),
]


@pytest.mark.parametrize(("mutation", "shown"), MUTATIONS, ids=[row[0].__name__ for row in MUTATIONS])
def test_a_mutation_disagrees(mutation, shown, exact, monkeypatch):
    layout = "data=2,tensor=2,zero=2,microbatches=2"
    built = built_for(layout, MODEL, EXACT)
    monkeypatch.setattr(*mutation())
    mutant = compiled_for(built_for(layout, MODEL, EXACT))
    result = run(built, mutant, seed=settled(MODEL))
    for name in shown:
        assert not result.errors[name] < 1e-4, (name, result.errors)


def test_amaxes_that_are_not_reduced_are_a_line_that_differs(monkeypatch):
    right = fp8.mesh.largest
    alike = lambda x: right(x[:1, :1, :1], fp8.AXES) + jnp.zeros(x.shape)  # noqa: E731
    monkeypatch.setattr(fp8.mesh, "largest", lambda x, axes: alike(x) if x.shape == (2, 7, 3) else right(x, axes))
    found = check(MODEL, Layout.parse("data=4"), Machine.load("cpu:4"), Workload(8, 8, "fp8"))
    assert different(found) == ["all-reduce/data/update/f32"]


# ---------------------------------------------------------------- scales and amaxes


def test_scales_follow_the_largest_amax_of_the_history():
    amaxes = np.zeros((1, 1, 3, 4), np.float32)
    assert np.array_equal(fp8.scales(amaxes)[0, 0], [1, 1, 1])
    amaxes[0, 0] = [[1, 2, 0, 0], [0, 0, 0, 7], [4, 0, 1, 0]]
    assert np.array_equal(fp8.scales(amaxes)[0, 0], [224, 64, 14336])


def test_an_amax_that_is_not_finite_is_not_entered():
    amaxes = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4)
    after = fp8.entered(amaxes, jnp.float32([[[5, np.inf, np.nan]]]))
    assert np.array_equal(after[0, 0], [[5, 0, 1, 2], [0, 4, 5, 6], [0, 8, 9, 10]])


def test_what_is_beyond_the_largest_number_becomes_it():
    x = jnp.float32([1000, -1000, 1, 0.1])
    assert fp8.quantized(x, jnp.float32(1), "input").astype(float).tolist() == [448, -448, 1, 0.1015625]
    assert fp8.quantized(x * 100, jnp.float32(1), "gradient").astype(float).tolist()[:2] == [57344, -57344]


def test_the_reference_without_amaxes_rounds_nothing():
    known = _reference(MODEL, 8, 8, ("float32",) * 12, "adamw", 0.05, 1, 0, True, "float32")
    plain, _, _ = in_8_bits(MODEL, known.start, known.batches[0], None)
    rounded, _, found = in_8_bits(MODEL, known.start, known.batches[0], known.amaxes)
    assert 1e-5 < abs(plain - rounded) / plain < 0.1
    assert found.shape == (2, 7, 3) and np.all(found > 0)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("layout", "reason"),
    [("pipe=2,microbatches=2", "with pipe=2 is not built"), ("tensor=4", "each of the 2 key/value heads")],
)
def test_refused_with_the_reason(layout, reason):
    with pytest.raises(SpecError, match=reason) as refused:
        predict(MODEL, Layout.parse(layout), Workload(8, 8, "fp8"))
    assert "use --precision bf16-f32" in str(refused.value)
