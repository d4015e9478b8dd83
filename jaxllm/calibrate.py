"""calibrate: measures the devices that are here, and writes what was found as a machine file.

Products over a grid of shapes, what goes through memory, collectives over all devices, and what a kernel, a collective and a
step take at least. Each is timed inside of one program that repeats it, each round on what the round before gave, so that
nothing is left out and no launch from Python counts. Then whole steps of small models on one device: they tell how fast what is
no product goes, as the measured steps of the known machines do, and how far the time of a step is off. The figures are those
of theory/rates.py, fitted by the formulas with which the time of a step is reckoned.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.spec.errors import SpecError
from jaxllm.spec.figures import MEASURED, WIDEST, Curve
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Machine, folder
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.theory.rates import REFERENCE, Rates, tiling
from jaxllm.theory.symbols import Symbols
from jaxllm.theory.matmul import product
from jaxllm.theory.time import of_symbols

Say = Callable[[str], None]

SECONDS = 0.05  # that a measurement takes, as often as it repeats
TOGETHER = 8  # rounds in a turn of a loop: a card asks its host after each turn whether there is another
TRIES = 3  # of which the shortest counts: all else is somebody else's work
# Rows, inner dim, columns: all of them together. Of a CPU the smaller ones, which take as long there.
SIZES = (128, 512, 2048, 8192)
FEW = (64, 256, 1024)
# Width of the model, sequences and tokens of the steps. Of a CPU smaller ones.
STEPS = tuple((width, *batch) for width in (1024, 2048, 4096) for batch in ((8, 1024), (1, 2048), (4, 256)))
FEW_STEPS = tuple((width, *batch) for width in (128, 256, 512) for batch in ((8, 128), (1, 256)))
FEWEST = 3  # of these, from which something can be told
LEAST_SHARE = 1e-3  # of memory's bandwidth
MEMORY = 2**28  # bytes of an array that goes through memory; of a CPU a quarter
SENT = 2**26  # bytes of a collective
_TARGETS = {"cpu": "cpu", "tpu": "tpu"}  # by jax's platform; all others are gpu


@dataclass(frozen=True)
class Found:
    """What was measured: seconds of products by shape, rates in bytes/s and FLOP/s, least times in seconds.

    products  of rows, inner dim and columns of a few sizes, all of them together; between: of shapes halfway between these
    steps     of a small model by its width, sequences and tokens
    sent  bytes/s of a ring over all devices, None for one device
    """

    kind: str
    platform: str
    devices: int
    dtype: str
    products: dict[tuple[int, int, int], float]
    between: dict[tuple[int, int, int], float]
    steps: dict[tuple[int, int, int], float]
    memory: float
    kernel: float
    step: float
    sent: float | None
    collective: float | None
    bytes: int | None  # of a device's memory


def measure(say: Say) -> Found:
    """Measures the devices of jax, which must have been started. Takes a minute."""
    import jax
    import jax.numpy as jnp

    here = jax.devices()
    platform = here[0].platform
    cpu = platform == "cpu"
    dtype = "f32" if cpu else "bf16"
    kind = {"f32": jnp.float32, "bf16": jnp.bfloat16}[dtype]
    sizes = FEW if cpu else SIZES

    def multiplied(shape: tuple[int, ...]) -> float:
        rows, inner, columns = shape
        say(f"products: {rows} x {inner} by {inner} x {columns}")
        a, b = jnp.ones((rows, inner), kind), jnp.full((inner, columns), 1e-3, kind)
        # One element goes on to the next round, so that no round can be left out or moved out of the loop.
        return _each(lambda x: x.at[0, 0].set((x @ b)[0, 0]), a)

    products = {shape: multiplied(shape) for shape in cube(sizes)}
    between = {shape: multiplied(shape) for shape in cube(halfway(sizes))}
    say("memory")
    array = jnp.ones((MEMORY // (4 if cpu else 1)) // 4, jnp.float32)
    through = _each(lambda x: x * 1.0001 + 1e-3, array, 1)  # several would become one pass
    say("kernels and steps")
    tiny = jnp.ones((8, 128), jnp.float32)
    kernel = _each(lambda x: jnp.sin(jax.lax.optimization_barrier(x)), tiny)
    step = _call(jax.jit(lambda x: x + 1), tiny)
    steps = {}
    for shape in FEW_STEPS if cpu else STEPS:
        width, sequences, tokens = shape
        say(f"steps: width {width}, {sequences} x {tokens} tokens")
        model, workload = nouns(shape, dtype)
        try:
            steps[shape] = step_seconds(model, Layout(), workload, here[0])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            say("which has no room here, and is left out")
    if len(steps) < FEWEST:
        raise SpecError(f"calibrate: {here[0].device_kind} has room for {len(steps)} of the steps, and {FEWEST} tell something; end what else runs on it.")
    sent = collective = None
    if len(here) > 1:
        say(f"collectives over {len(here)} devices")
        large, small = (_all_reduce(here, size) for size in (SENT, 64))
        collective = small
        sent = 2 * (len(here) - 1) / len(here) * SENT / max(large - small, 1e-9)
    stats = here[0].memory_stats() or {}
    return Found(
        here[0].device_kind, platform, len(here), dtype, products, between, steps, 2 * array.nbytes / through, kernel, step, sent,
        collective, stats.get("bytes_limit"),
    )  # fmt: skip


def cube(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """All rows, inner dims and columns of these sizes."""
    return list(itertools.product(sizes, repeat=3))


def halfway(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes between these, which are none of them."""
    return tuple(round(math.sqrt(a * b)) for a, b in itertools.pairwise(sizes))


def nouns(shape: tuple[int, int, int], dtype: str) -> tuple[ModelConfig, Workload]:
    """A model of two layers of the first of these, and sequences and tokens of a step."""
    width, sequences, tokens = shape
    model = replace(
        ModelConfig.load("llama-tiny"), layers=2, d_model=width, d_ff=3 * width, heads=width // 64, kv_heads=width // 64, head_dim=64
    )
    return model, Workload(sequences, tokens, {"f32": "f32", "bf16": "bf16-f32"}[dtype])


def step_seconds(model: ModelConfig, layout: Layout, workload: Workload, device: Any) -> float:
    """Seconds of a training step on one device, the shortest of several."""
    import jax

    from jaxllm.program import build

    built = build(model, layout, workload, [device])
    parameters = built.init_parameters(0)
    state = parameters, built.init_optimizer(parameters)
    batch = jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape, np.int32), leaf.sharding), built.arguments[2])
    step = built.lower().compile()
    found = []
    for _ in range(1 + 2 * TRIES):
        start = time.perf_counter()
        *state, _ = jax.block_until_ready(step(*state, batch))
        found.append(time.perf_counter() - start)
    return min(found[1:])


def _each(round_: Callable[[Any], Any], x: Any, together: int = TOGETHER) -> float:
    """Seconds of a round, of as many in one program as take SECONDS, so many in a turn of its loop."""
    import jax

    several = lambda _, x: functools.reduce(lambda x, _: round_(x), range(together), x)  # noqa: E731
    rounds = jax.jit(lambda x, times: jax.lax.fori_loop(0, times, several, x))
    times = 1
    while True:
        seconds = _call(rounds, x, times)
        if seconds > SECONDS or times >= 2**20:
            return seconds / times / together
        times *= max(2, min(64, math.ceil(1.5 * SECONDS / max(seconds, 1e-6))))


def _call(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of a call, the shortest of TRIES."""
    import jax

    jax.block_until_ready(function(*arguments))
    found = []
    for _ in range(TRIES):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        found.append(time.perf_counter() - start)
    return min(found)


def _all_reduce(devices: Sequence[Any], size: int) -> float:
    """Seconds of an all-reduce of `size` bytes over all devices."""
    import jax
    import jax.numpy as jnp

    mesh = jax.make_mesh((len(devices),), ("all",), devices=devices, axis_types=(jax.sharding.AxisType.Explicit,))
    whole = jax.device_put(jnp.ones(size // 4, jnp.float32), jax.sharding.NamedSharding(mesh, jax.P()))

    def round_(x: Any) -> Any:
        # The mean of what is alike everywhere is itself, round after round.
        mean = lambda x: jax.lax.psum(x / len(devices), "all")  # noqa: E731
        return jax.shard_map(mean, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)(x)

    with jax.set_mesh(mesh):
        return _each(round_, whole)


# ---------------------------------------------------------------- the machine


@dataclass(frozen=True)
class Figures:
    """What is written: of a machine that is known its own peaks and shares of them, else the best that was measured."""

    peak: float
    bandwidth: float
    link: float | None
    matmul: float
    memory: float
    inside: float
    kernel: float
    curve: Curve
    off: float  # what four of five products between those of the curve, and four of five steps, are off by, as a logarithm


def fit(found: Found, machine: Machine | None) -> Figures:
    """The figures under which products and steps are nearest to what was measured."""
    best = max(2 * math.prod(shape) / seconds for shape, seconds in found.products.items())
    peak = float(machine.peak_flops[found.dtype]) if machine else best
    bandwidth = float(machine.bandwidth) if machine else found.memory
    rates = replace(_plain(machine, peak, min(bandwidth, found.memory)), kernel=found.kernel, step=found.step)
    size = {"f32": 4, "bf16": 2}[found.dtype]

    def off(reached: Rates, products: dict[tuple[int, int, int], float]) -> np.ndarray:
        return np.array([np.log(product(reached, *shape, size) / seconds) for shape, seconds in products.items()])

    # The share of the largest quarter of the shapes, which nothing else limits; the curve has the others.
    large = sorted(found.products, key=math.prod)[-max(1, len(found.products) // 4) :]
    limited = {shape: found.products[shape] for shape in large}
    shares = np.linspace(0.01, 1, 400)
    matmul = float(min(shares, key=lambda share: np.median(np.abs(off(replace(rates, matmul=share), limited)))))
    rates = replace(rates, matmul=matmul, curve=_curve(found, peak))
    of_products = off(rates, found.between)
    memory, of_steps = _of_steps(found, rates, bandwidth)
    link = machine.value("links.inside_node") if machine and machine.target == "gpu" else None
    inside = min(1.0, found.sent / (link or found.sent)) if found.sent else 1.0
    return Figures(
        peak, bandwidth, link or found.sent, matmul, memory, inside, found.kernel, rates.curve,
        max(map(_four_of_five, (of_products, of_steps))),
    )  # fmt: skip


def _four_of_five(off: np.ndarray) -> float:
    """What at least four of five are not further off by, one more of the same kind included (Vovk et al. 2005, Algorithmic
    Learning in a Random World, conformal prediction): of few ones the largest."""
    return float(np.sort(np.abs(off))[min(len(off), math.ceil(0.8 * (len(off) + 1))) - 1])


def _of_steps(found: Found, rates: Rates, bandwidth: float) -> tuple[float, np.ndarray]:
    """The share of memory's bandwidth at which what is no product goes through it in the steps, and by how much each step is
    off, as a logarithm, with the share of the others."""
    shares = np.geomspace(LEAST_SHARE, 1, 25)
    off = np.array([
        [math.log(of_symbols(s, replace(rates, memory=bandwidth * share)).seconds / seconds) for share in shares]
        for s, seconds in ((_symbols(shape, found.dtype), seconds) for shape, seconds in found.steps.items())
    ])  # fmt: skip

    def best(rows: np.ndarray) -> float:
        """The logarithm of the share at which the median is not off: the larger the share, the shorter are the steps."""
        return float(np.interp(0, -np.median(rows, axis=0), np.log(shares)))

    left_out = [np.interp(best(np.delete(off, one, axis=0)), np.log(shares), off[one]) for one in range(len(off))]
    return math.exp(best(off)), np.array(left_out)


def _symbols(shape: tuple[int, int, int], dtype: str) -> Symbols:
    model, workload = nouns(shape, dtype)
    return Symbols.of(model, Layout(), workload)


def _curve(found: Found, peak: float) -> Curve:
    """Shares of the peak by shape; of one that is said to be more than the peak, the peak."""
    sizes = sorted({rows for rows, _, _ in found.products})
    share = lambda *shape: float(f"{min(1.0, 2 * math.prod(shape) / found.products[shape] / peak):.4g}")  # noqa: E731
    return Curve(
        found.dtype, tuple(sizes), tuple(tuple(tuple(share(a, b, c) for c in sizes) for b in sizes) for a in sizes)
    )


def machine_file(found: Found, name: str | None) -> str:
    """The TOML of the machine that was measured: the known one of that name with other efficiencies, or a new one.

    Raises SpecError for a TPU that is not known, whose torus no measurement tells.
    """
    machine = Machine.read(name) if name else None
    if machine is None and found.platform == "tpu":
        raise SpecError(
            f"calibrate: {found.kind!r} is no TPU that is known, and a file needs its torus; give one with --machine."
        )
    base = _known(name) if name else _new(found)
    return base.rstrip("\n") + "\n\n" + _measured(found, fit(found, machine))


def read_back(text: str) -> Machine:
    """The machine that a text describes: what is written has to be what can be read."""
    with tempfile.TemporaryDirectory() as where:
        path = Path(where) / "machine.toml"
        path.write_text(text, encoding="utf-8")
        return Machine.read(path)


def _known(name: str) -> str:
    """The text of a machine's file without what was measured of it, and what is said above each table of that."""
    path = folder() / f"{name}.toml" if name in Machine.names() else Path(name)
    kept: list[str] = []
    said: list[str] = []  # above the next table
    measured = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if head := re.match(r"\[\s*([a-z]+)\s*[\].]", line):
            measured = head[1] in (*MEASURED, "curve")
        elif line.startswith("#") or not line.strip():
            said.append(line)
            continue
        kept += [] if measured else [*said, line]
        said = []
    return "\n".join(kept)


def check(name: str, platform: str) -> None:
    """Raises SpecError where a machine cannot be what is here, or its file cannot be written anew: before a minute is spent."""
    machine = Machine.read(name)
    if machine.target != _TARGETS.get(platform, "gpu"):
        raise SpecError(f"calibrate: {name} is a {machine.target}, and the devices here are {platform}; leave --machine out, or name what is here.")
    read_back(_known(name))


def _new(found: Found) -> str:
    """A machine of which nothing is known but what was measured."""
    best, here = max(2 * math.prod(shape) / seconds for shape, seconds in found.products.items()), _source(found)
    gpu = found.platform != "cpu"
    lines = [f'description = "{found.kind}, as it was measured"', f'target = "{"gpu" if gpu else "cpu"}"', "", "[memory]"]
    if found.bytes:
        lines += [
            _figure("total", found.bytes, "B", here), _figure("usable_fraction", 1, "", "what jax may use is the total"),
            _figure("reserve", 0, "B", "what jax may use is the total"),
        ]  # fmt: skip
    lines += [_figure("bandwidth", round(found.memory), "B/s", here)]
    lines += ["", "[peak]", _figure(found.dtype, round(best), "FLOP/s", here)]
    lines += ["", "[node]", _figure("devices", found.devices, "", here)]
    if found.sent:
        lines += ["", "[links]", _figure("inside_node", round(found.sent), "B/s", here)]
    absent = {name: "not measured" for name in ("peak.bf16", "peak.f32") if name != f"peak.{found.dtype}"}
    if not found.bytes:
        absent |= dict.fromkeys(("memory.total", "memory.usable_fraction", "memory.reserve"), "the host's, which is shared")
    if gpu:
        absent |= {"compiler": "what XLA has to know of it is not in a measurement", "links.between_nodes": "one node was measured"}
        absent |= {} if found.sent else {"links.inside_node": "one device was measured"}
    return "\n".join([*lines, "", "[absent]", *(f'{name} = "{why}"' for name, why in absent.items())])


def _measured(found: Found, figures: Figures) -> str:
    """The tables of what was measured."""
    here, known = _source(found), Machine.read(REFERENCE)
    one = f"as {REFERENCE}: one node does not tell"
    alone = f"as {REFERENCE}: one device does not tell"
    steps = f"fitted by jaxllm calibrate on {len(found.steps)} steps of small models on one {found.kind}"
    program = "a compiled program launches its kernels itself"
    # A ring of n takes 2 (n - 1) hops: launch and hops share out evenly what the smallest all-reduce takes.
    hop = found.collective / (2 * found.devices - 1) if found.collective else None
    tables = {
        "efficiency": (
            _figure("matmul", figures.matmul, "", here), _figure("memory", figures.memory, "", steps),
            _figure("inside_node", figures.inside, "", here) if found.sent else
            _figure("inside_node", known.value("efficiency.inside_node"), "", alone),
            _figure("between_nodes", known.value("efficiency.between_nodes"), "", one),
        ),
        "latency": (
            _figure("collective", (hop or known.value("latency.collective")) * 1e6, "us", here if hop else alone),
            _figure("hop", (hop or known.value("latency.hop")) * 1e6, "us", here if hop else alone),
            _figure("far_hop", known.value("latency.far_hop") * 1e6, "us", one),
            _figure("kernel", found.kernel * 1e6, "us", here),
            _figure("block", 0.001, "us", program), _figure("issue", 0.001, "us", program),
            _figure("step", found.step * 1e6, "us", here),
        ),
        "interval": (
            _figure("least", max(known.value("interval.least"), min(WIDEST, figures.off)), "", f"{here}, or as {REFERENCE}"),
            _figure("tensor", known.value("interval.tensor"), "", f"as {REFERENCE}"),
        ),
    }  # fmt: skip
    return "\n".join([f"[{name}]\n" + "\n".join(entries) + "\n" for name, entries in tables.items()] + [_of_curve(figures.curve, here)])


def _of_curve(curve: Curve, source: str) -> str:
    """The table of a curve, a line for each row of shares, with blanks before it so that no line begins as a table does."""
    planes = ("    [\n" + "".join(f"        {list(row)},\n" for row in plane) + "    ],\n" for plane in curve.shares)
    return (
        "# Shares of the peak by rows, inner dim and columns, innermost last.\n[curve.matmul]\n"
        f'dtype = "{curve.dtype}"\nsizes = {list(curve.sizes)}\nsource = "{source}"\nvalue = [\n{"".join(planes)}]\n'
    )


def _figure(name: str, value: float | int, unit: str, source: str) -> str:
    number = value if isinstance(value, int) else float(f"{value:.4g}")
    return f"{name} = {{ value = {number}, " + (f'unit = "{unit}", ' if unit else "") + f'source = "{source}" }}'


def _source(found: Found) -> str:
    return f"measured by jaxllm calibrate on {found.devices} x {found.kind}"


def _plain(machine: Machine | None, peak: float, memory: float) -> Rates:
    """Rates with nothing but a peak and memory, and the machine's way to cut a product."""
    zeros = dict.fromkeys(("host", "collective", "hop", "far_hop", "kernel", "block", "issue", "step", "least", "tensor"), 0.0)
    links = dict.fromkeys(("inside", "between", "link"), math.inf)  # one device sends nothing
    return Rates(
        peak=peak, narrow=peak, matmul=1.0, memory=memory, node=1, torus=(), measured=True, **tiling(machine), **links, **zeros
    )  # fmt: skip
