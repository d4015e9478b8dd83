"""calibrate: measures the devices that are here, and writes what was found as a machine file.

Products over a grid of shapes, what goes through memory, collectives over all devices, and what a kernel, a collective and a
step take at least. Each is timed inside of one program that repeats it, each round on what the round before gave, so that
nothing is left out and no launch from Python counts. The figures are those of theory/rates.py, fitted by the formulas with
which the time of a step is reckoned.
"""

from __future__ import annotations

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
from jaxllm.spec.figures import MEASURED
from jaxllm.spec.machine import Machine, folder
from jaxllm.theory.rates import REFERENCE, Rates, tiling
from jaxllm.theory.time import product

Say = Callable[[str], None]

SECONDS = 0.05  # that a measurement takes, as often as it repeats
TRIES = 3  # of which the shortest counts: all else is somebody else's work
# Rows, inner dim, columns. Of a CPU the smaller ones, which take as long there.
SIZES = (128, 512, 2048, 8192)
FEW = (64, 256, 1024)
MEMORY = 2**28  # bytes of an array that goes through memory; of a CPU a quarter
SENT = 2**26  # bytes of a collective
_TARGETS = {"cpu": "cpu", "tpu": "tpu"}  # by jax's platform; all others are gpu


@dataclass(frozen=True)
class Found:
    """What was measured: seconds of products by shape, rates in bytes/s and FLOP/s, least times in seconds.

    sent  bytes/s of a ring over all devices, None for one device
    """

    kind: str
    platform: str
    devices: int
    dtype: str
    products: dict[tuple[int, int, int], float]
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
    products = {}
    for rows in sizes:
        for inner in sizes:
            for columns in sizes:
                say(f"products: {rows} x {inner} by {inner} x {columns}")
                a, b = jnp.ones((rows, inner), kind), jnp.full((inner, columns), 1e-3, kind)
                # One element goes on to the next round, so that no round can be left out or moved out of the loop.
                products[rows, inner, columns] = _each(lambda x, b=b: x.at[0, 0].set((x @ b)[0, 0]), a)
    say("memory")
    array = jnp.ones((MEMORY // (4 if cpu else 1)) // 4, jnp.float32)
    through = _each(lambda x: x * 1.0001 + 1e-3, array)
    say("kernels and steps")
    tiny = jnp.ones((8, 128), jnp.float32)
    kernel = _each(lambda x: jnp.sin(jax.lax.optimization_barrier(x)), tiny)
    step = _call(jax.jit(lambda x: x + 1), tiny)
    sent = collective = None
    if len(here) > 1:
        say(f"collectives over {len(here)} devices")
        large, small = (_all_reduce(here, size) for size in (SENT, 64))
        collective = small
        sent = 2 * (len(here) - 1) / len(here) * SENT / max(large - small, 1e-9)
    stats = here[0].memory_stats() or {}
    return Found(
        here[0].device_kind, platform, len(here), dtype, products, 2 * array.nbytes / through, kernel, step, sent, collective,
        stats.get("bytes_limit"),
    )  # fmt: skip


def _each(round_: Callable[[Any], Any], x: Any) -> float:
    """Seconds of a round, of as many in one program as take SECONDS."""
    import jax

    rounds = jax.jit(lambda x, times: jax.lax.fori_loop(0, times, lambda _, x: round_(x), x))
    times = 1
    while True:
        seconds = _call(rounds, x, times)
        if seconds > SECONDS or times >= 2**20:
            return seconds / times
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
    off: float  # a product's share that four of five are off by


def fit(found: Found, machine: Machine | None) -> Figures:
    """The figures under which the products are nearest to what was measured."""
    best = max(2 * math.prod(shape) / seconds for shape, seconds in found.products.items())
    peak = float(machine.peak_flops[found.dtype]) if machine else best
    bandwidth = float(machine.bandwidth) if machine else found.memory
    memory = min(1.0, found.memory / bandwidth)
    rates = replace(_plain(machine, peak, bandwidth * memory), kernel=found.kernel)
    size = {"f32": 4, "bf16": 2}[found.dtype]

    def off(matmul: float) -> np.ndarray:
        reached = replace(rates, matmul=matmul)
        return np.array([np.log(product(reached, *shape, size) / seconds) for shape, seconds in found.products.items()])

    # The share of the largest quarter of the shapes, which nothing else limits; the others tell how far the formula is off.
    large = np.argsort([math.prod(shape) for shape in found.products])[-max(1, len(found.products) // 4) :]
    shares = np.linspace(0.01, 1, 400)
    matmul = float(min(shares, key=lambda share: np.median(np.abs(off(share)[large]))))
    link = machine.value("links.inside_node") if machine and machine.target == "gpu" else None
    inside = min(1.0, found.sent / (link or found.sent)) if found.sent else 1.0
    return Figures(
        peak, bandwidth, link or found.sent, matmul, memory, inside, found.kernel, float(np.quantile(np.abs(off(matmul)), 0.8))
    )


def machine_file(found: Found, name: str | None) -> str:
    """The TOML of the machine that was measured: the known one of that name with other efficiencies, or a new one.

    Raises SpecError for a TPU that is not known, whose torus no measurement tells.
    """
    machine = Machine.read(name) if name else None
    if machine is not None and machine.target != _TARGETS.get(found.platform, "gpu"):
        raise SpecError(
            f"calibrate: {name} is a {machine.target}, and {found.kind} is here; leave --machine out, or name what is here."
        )
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
    """The text of a machine's file without what was measured of it."""
    path = folder() / f"{name}.toml" if name in Machine.names() else Path(name)
    text = path.read_text(encoding="utf-8")
    return re.sub(rf"(?m)^(#[^\n]*\n)?\[({'|'.join(MEASURED)})\]\n([^\[#]*\n?)*?(?=^\[|^#|\Z)", "", text)


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
    program = "a compiled program launches its kernels itself"
    # A ring of n takes 2 (n - 1) hops: launch and hops share out evenly what the smallest all-reduce takes.
    hop = found.collective / (2 * found.devices - 1) if found.collective else None
    tables = {
        "efficiency": (
            _figure("matmul", figures.matmul, "", here), _figure("memory", figures.memory, "", here),
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
            _figure("least", max(known.value("interval.least"), min(1.0, figures.off)), "", f"{here}, or as {REFERENCE}"),
            _figure("tensor", known.value("interval.tensor"), "", f"as {REFERENCE}"),
        ),
    }  # fmt: skip
    return "\n".join(f"[{name}]\n" + "\n".join(entries) + "\n" for name, entries in tables.items())


def _figure(name: str, value: float | int, unit: str, source: str) -> str:
    number = value if isinstance(value, int) else float(f"{value:.4g}")
    return f"{name} = {{ value = {number}, " + (f'unit = "{unit}", ' if unit else "") + f'source = "{source}" }}'


def _source(found: Found) -> str:
    return f"measured by jaxllm calibrate on {found.devices} x {found.kind}"


def _plain(machine: Machine | None, peak: float, memory: float) -> Rates:
    """Rates with nothing but a peak and memory, and the machine's way to cut a product."""
    zeros = dict.fromkeys(
        ("host", "inside", "between", "link", "collective", "hop", "far_hop", "kernel", "block", "issue", "step", "least", "tensor"),
        0.0,
    )
    return Rates(peak=peak, narrow=peak, matmul=1.0, memory=memory, node=1, torus=(), measured=True, **tiling(machine), **zeros)
