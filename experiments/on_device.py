"""What do the devices that are here hold, and how fast are they, beside the closed form and their own compiler?

    python experiments/on_device.py [--mesh MESH] [--sizes N] [--limit-seconds S] [--out DIR]

Each size of a ladder runs in a process of its own, so that its peak of memory is its own: a Llama with a batch that by
closed form fills a part of the device, up to all that is usable. Measured are the peak of memory and the time of a
step; beside them stand the compiler's peak, the closed form's, and how many lines of both ledgers are equal. Before
that a small model takes three steps, which are held against the unsharded reference. The machine file is found by the
name of the device. With --mesh cpu:8 it all runs on emulated devices, which have neither peak nor speed of their own.

FLOPs are those of the matmuls, attention over the whole square. Model FLOPs utilization (MFU) counts forward and
backward pass, hardware FLOPs utilization (HFU) what is computed again as well; both over the dense peak of the dtype.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import common
from jaxllm.spec.errors import SpecError, TargetError
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Machine, Mesh
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload

if TYPE_CHECKING:
    from jaxllm.report import Comparison

SCHEMA = 1
SEQUENCE = 2048
WARM, STEPS, STEPS_SECONDS = 2, 10, 10.0  # steps that do not count; as many count, or as fit in the seconds, 3 at least
LIMIT_SECONDS = 450.0
LEAST_SECONDS = 20.0  # less than that is no time to start another process
AGAIN = (0.85, 0.7)  # shares of the capacity that are tried when the size that fills it runs out of memory
MOST = 1024  # sequences on a device
# A step should not take longer, at a quarter of the peak: batches that are larger say no more.
STEP_SECONDS, LIKELY_MFU = 8.0, 0.25


def small(name: str, layers: int, width: int, feed_forward: int) -> ModelConfig:
    """A Llama of the width and depth of a GPT-2, with Llama 2's vocabulary."""
    heads, source = width // 64, "made for this experiment; not a published model"
    return ModelConfig(name, layers, width, feed_forward, heads, heads, 64, 32000, False, 1e-5, 4096, source, 1e4)


_LADDER = ("llama-3.2-1b", "llama-3.2-3b", "llama-2-7b", "llama-3-8b", "llama-2-13b", "llama-1-33b", "llama-2-70b")
MODELS = {
    model.name: model
    for model in (
        ModelConfig.load("llama-tiny"),
        small("llama-134m", 12, 768, 2048),
        small("llama-374m", 24, 1024, 2816),
        *map(ModelConfig.load, _LADDER),
    )
}

# What jax calls a TPU -> its machine file; as libtpu tells them. GPUs are found by [compiler] description.
TPUS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}

COLUMNS = {
    "size": "size",
    "predicted_gb": "closed form GB",
    "compiled_gb": "compiled",
    "measured_gb": "measured",
    "off": "compiled off",
    "step_s": "step s",
    "tflops": "TFLOP/s",
    "mfu": "MFU",
    "hfu": "HFU",
    "equal": "lines",
    "outcome": "outcome",
}


@dataclass(frozen=True)
class Size:
    """One rung of the ladder. The batch is global."""

    model: str
    layout: str
    batch: int
    sequence: int
    precision: str

    @property
    def nouns(self) -> tuple[ModelConfig, Layout, Workload]:
        return MODELS[self.model], Layout.parse(self.layout), Workload(self.batch, self.sequence, self.precision)

    def __str__(self) -> str:
        return f"{self.model} {self.layout} {self.batch}x{self.sequence}"


# ---------------------------------------------------------------- which devices


def found_mesh(device: Mapping[str, Any]) -> Mesh:
    """The mesh of all devices that a probe found. Raises SpecError where there is no accelerator, or an unknown one."""
    kind, count = device["kind"], device["count"]
    if device["platform"] == "cpu":
        raise SpecError("jax finds no accelerator here, only the cpu; --mesh cpu:8 measures emulated devices instead.")
    name = machine_of(kind)
    if name is None:
        known = ", ".join(sorted({*descriptions(), *TPUS}))
        raise SpecError(
            f"there is no machine file for a {kind!r}, only for {known}; write one (docs/targets.md) and give it, as "
            f"in --mesh my.toml:{count}."
        )
    machine = Machine.read(name)
    if machine.target == "tpu":
        return Machine.load(f"{name}:{tpu_shape(machine, count, device['extent'])}")
    return Machine.load(f"{name}:{count}")


def descriptions() -> dict[str, str]:
    """What the compiler calls a GPU -> its machine file."""
    machines = (Machine.read(name) for name in Machine.names())
    return {m.compiler["description"]: m.name for m in machines if m.target == "gpu" and "description" in m.compiler}


def machine_of(kind: str) -> str | None:
    """The machine file of a device by jax's name for it, which may say less than the file's, never more or other."""
    if kind in TPUS:
        return TPUS[kind]
    known = descriptions()
    longer = [name for description, name in known.items() if description.startswith(f"{kind} ")]
    return known.get(kind) or (longer[0] if len(longer) == 1 else None)


def tpu_shape(machine: Machine, count: int, extent: Sequence[int]) -> str:
    """The slice with so many devices; of several the one whose sides are those of the devices' coordinates."""
    chips = count // machine.devices_per_chip
    shapes = [shape for shape in machine.value("torus.slices") if math.prod(shape) == chips]
    if not shapes or chips * machine.devices_per_chip != count:
        raise SpecError(f"{count} devices are no slice of {machine.name}; name it, as in --mesh {machine.name}:2x2.")
    sides = sorted(extent)
    same = [shape for shape in shapes if sorted(shape) == sides[-len(shape) :]]
    return "x".join(map(str, (same or shapes)[0]))


def check_here(mesh: Mesh, device: Mapping[str, Any]) -> None:
    """Raises SpecError when a mesh that was asked for is not what is here."""
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(device["platform"], device["platform"])
    if platform != mesh.target:
        raise SpecError(
            f"--mesh {mesh} is a {mesh.target} machine and jax finds {device['count']} x {device['kind']!r}; leave "
            "--mesh out to use what is here, or emulate devices with --mesh cpu:8."
        )
    if device["count"] < mesh.devices:
        raise SpecError(f"--mesh {mesh} has {mesh.devices} devices and {device['count']} are here; take a smaller one.")


# ---------------------------------------------------------------- which sizes


def ladder(mesh: Mesh) -> list[Size]:
    """The sizes for a mesh, from small to one that fills it. Raises SpecError when not even the smallest model fits."""
    if mesh.capacity is None:
        return [
            Size("llama-tiny", str(split(mesh.devices, remat)), mesh.devices * sequences, tokens, "f32")
            for remat, sequences, tokens in (("none", 1, 32), ("none", 1, 256), ("full", 2, 256))
        ]
    fitting = [name for name in list(MODELS)[1:] if peak(mesh, name, "full", mesh.devices) <= mesh.capacity]
    if not fitting:
        raise SpecError(f"no model of this experiment fits {mesh}, whose devices have {mesh.capacity:,} usable bytes.")
    first, middle, last = fitting[0], fitting[len(fitting) // 2], fitting[-1]
    return [
        filling(mesh, first, "none", 0.25),
        filling(mesh, middle, "none", 0.5),
        filling(mesh, middle, "full", 0.75),
        filling(mesh, last, "full", 1.0),
    ]


def split(devices: int, remat: str) -> Layout:
    """Data parallelism over all devices, everything sliced."""
    return Layout(data=devices, zero=3 if devices > 1 else 0, remat=remat)


def filling(mesh: Mesh, model: str, remat: str, share: float) -> Size:
    """The largest batch that by closed form takes that share of the capacity, and a step of a few seconds."""
    parts, speed = mesh.devices, mesh.machine.peak_flops.get("bf16")

    def over(sequences: int) -> float:
        """Above 1 when a batch is too large."""
        memory = peak(mesh, model, remat, sequences * parts) / (share * mesh.capacity)
        ledger = closed_form(model, remat, sequences * parts, parts)
        seconds = ledger.total("flops") / (speed * LIKELY_MFU) if speed else 0
        return max(memory, seconds / STEP_SECONDS)

    sequences = bisect.bisect_right(range(1, MOST), 1.0, key=over)
    return Size(model, str(split(parts, remat)), max(1, sequences) * parts, SEQUENCE, "bf16-f32")


def closed_form(model: str, remat: str, batch: int, devices: int) -> Any:
    from jaxllm.theory import predict

    return predict(MODELS[model], split(devices, remat), Workload(batch, SEQUENCE, "bf16-f32"))


def peak(mesh: Mesh, model: str, remat: str, batch: int) -> int:
    return int(closed_form(model, remat, batch, mesh.devices).peak)


# ---------------------------------------------------------------- in a process of its own


def answer() -> None:
    """Reads a task from standard input and writes what comes of it to standard output, both JSON."""
    task = json.loads(sys.stdin.read())
    work = {"probe": probe, "agreement": agreement, "size": measured}[task.pop("work")]
    print(json.dumps(work(**task), default=str))


def probe() -> dict[str, Any]:
    """Which devices jax finds."""
    import jax

    here = jax.devices()
    coordinates = [device.coords for device in here if device.platform == "tpu"]
    return {
        "kind": here[0].device_kind,
        "platform": here[0].platform,
        "count": len(here),
        "compute_capability": getattr(here[0], "compute_capability", None),
        "runtime": here[0].client.platform_version,
        "extent": [1 + max(side) - min(side) for side in zip(*coordinates, strict=True)],
    }


def agreement(mesh: str, precision: str) -> dict[str, Any]:
    """Three steps of a small model on the devices, against the reference without any sharding."""
    from jaxllm.check import check
    from jaxllm.targets import start

    here = Machine.load(mesh)
    start.prepare(target_of(here), here.devices)
    import jax

    size = Size("llama-tiny", str(split(here.devices, "none")), here.devices, 32, precision)
    model, layout, workload = size.nouns
    # f32 is multiplied in f32: by default GPUs and TPUs would take a shorter format for it.
    with jax.default_matmul_precision("highest" if precision == "f32" else "default"):
        found = check(model, layout, here, workload, target=target_of(here), run=True)
    error = found.run.max_relative_error
    return {
        **dataclasses.asdict(size),
        "outcome": "agrees" if found.run.agrees else "differs",
        "max_relative_error": error if math.isfinite(error) else None,
        "tolerance": found.run.tolerance,
        "losses": finite(found.run.losses),
        "reference_losses": finite(found.run.reference_losses),
        **common.lines_equal(found),
    }


def measured(mesh: str, size: Mapping[str, Any]) -> dict[str, Any]:
    """One size: both ledgers, the peak of memory and the time of its steps. Out of memory is an outcome."""
    here, own = Machine.load(mesh), Size(**size)
    comparison, built, executable = compared(here, own)
    found = told(own, here, comparison)
    if executable is None:
        return found | {"outcome": "does not fit", "why": comparison.peak.refused}
    try:
        return found | stepped(built, executable)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return found | {"outcome": "out of memory", "why": str(error).strip().splitlines()[0][:300]}


def target_of(mesh: Mesh) -> str:
    return "cpu" if mesh.target == "cpu" else "local"


def compared(mesh: Mesh, size: Size) -> tuple[Comparison, Any, Any]:
    """What `jaxllm check` does, with the executable kept."""
    from jaxllm import build, compare, compile, measure, predict

    model, layout, workload = size.nouns
    built = build(model, layout, mesh, workload, target=target_of(mesh))
    compiled = compile(built)
    comparison = compare(
        predict(model, layout, workload), measure(compiled), capacity=mesh.capacity, refused=compiled.refused
    )
    seconds = {"compile": round(compiled.seconds, 3)}
    return dataclasses.replace(comparison, seconds=seconds), built, compiled.executable


def told(size: Size, mesh: Mesh, comparison: Comparison) -> dict[str, Any]:
    """What is known of a size before it runs."""
    from jaxllm.report import Setup
    from jaxllm.report.document import document, versions

    model, layout, workload = size.nouns
    setup = Setup(model, layout, mesh, workload, target_of(mesh), versions(mesh.target))
    flops = {row.phase: row.predicted for row in comparison.section("flops")}
    return {
        **dataclasses.asdict(size),
        "parameters": model.parameters,
        "peak": {
            "predicted": comparison.peak.predicted,
            "compiled": comparison.peak.compiled,
            "capacity": comparison.peak.capacity,
        },
        "flops": {"model": flops["forward"] + flops["backward"], "recompute": flops.get("recompute", 0)},
        "flops_peak": mesh.machine.peak_flops.get(workload.dtypes.compute),
        **common.lines_equal(comparison),
        "check": document(comparison, setup),
    }


def stepped(built: Any, executable: Any) -> dict[str, Any]:
    """Takes steps from random parameters: seconds of each, losses, and the peak of memory before and after."""
    import jax
    import numpy as np

    parameters = built.init_parameters(0)
    state = built.init_optimizer(parameters)
    rows = built.arguments[2]
    rng = np.random.default_rng(0)
    batch = {
        name: jax.device_put(rng.integers(0, built.model.vocab, leaf.shape, dtype=np.int32), leaf.sharding)
        for name, leaf in rows.items()
    }
    jax.block_until_ready((parameters, state, batch))
    before, seconds, losses = peak_in_use(built), [], []
    while len(seconds) < WARM + 3 or (len(seconds) < WARM + STEPS and sum(seconds[WARM:]) < STEPS_SECONDS):
        begin = time.perf_counter()
        parameters, state, metrics = jax.block_until_ready(executable(parameters, state, batch))
        seconds.append(time.perf_counter() - begin)
        losses.append(float(metrics["loss"]))
    after = peak_in_use(built)
    return {
        "outcome": "measured",
        # Else starting took more than a step, and the peak says nothing of the step.
        "measured_peak": after if after is None or after > before else None,
        "measured_peak_before": before,
        "warm": WARM,
        "step_seconds": [round(second, 6) for second in seconds],
        "losses": finite(losses),
    }


def peak_in_use(built: Any) -> int | None:
    """The most bytes in use on any device so far, by its own allocator; None where there is no such count."""
    stats = [device.memory_stats() or {} for device in built.mesh.devices.flat]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    return max(peaks) if len(peaks) == len(stats) else None


def finite(losses: Sequence[float]) -> list[float | None]:
    """JSON has no NaN."""
    return [float(loss) if math.isfinite(loss) else None for loss in losses]


# ---------------------------------------------------------------- in the process that asks


def ask(mesh: Mesh | None, seconds: float, **task: Any) -> dict[str, Any]:
    """Has a task done by a fresh process. What goes wrong there is an `outcome`, in words."""
    code = "from experiments.on_device import answer; answer()"
    text = json.dumps(task | ({"mesh": mesh.text} if mesh is not None else {}))
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], input=text, capture_output=True, text=True, cwd=common.ROOT,
            env=environment(mesh), timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"outcome": "stopped", "why": f"no answer within {seconds:.0f} s"}
    try:
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        pass
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    # A traceback ends in its error; notes may follow it.
    errors = [line for line in said if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return {"outcome": "failed", "why": (errors or said or [f"exit code {done.returncode}"])[-1][:300]}


def environment(mesh: Mesh | None) -> dict[str, str]:
    """Of a process that uses the mesh, or that only looks which devices there are."""
    own = dict(os.environ)
    # Else memory would be another than the machine file's, or not counted; and jax refuses two names of the fraction.
    for name in ("MEM_FRACTION", "PREALLOCATE", "ALLOCATOR"):
        own.pop(f"XLA_PYTHON_CLIENT_{name}", None)
    if mesh is None:
        return own | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if mesh.target == "gpu":
        own["XLA_CLIENT_MEM_FRACTION"] = str(mesh.machine.usable_fraction)
    return own


def measure_all(mesh: Mesh, sizes: Sequence[Size], seconds: float) -> Iterator[dict[str, Any]]:
    """What has been measured so far, again after each part: `agreement` and `sizes`."""
    end, found = time.perf_counter() + seconds, {"agreement": [], "sizes": []}

    def part(where: str, name: str, told: Mapping[str, Any], **task: Any) -> dict[str, Any]:
        left = end - time.perf_counter()
        if left < LEAST_SECONDS:
            result = {"outcome": "not started", "why": f"the limit of {seconds:.0f} s leaves no time for it"}
        else:
            common.progress(f"{name}, {left:.0f} s left")
            result = ask(mesh, left, **task)
        found[where].append({**told, **result})
        common.progress(f"  {result['outcome']}" + (f": {result['why']}" if result.get("why") else ""))
        return result

    for precision in ("f32",) if mesh.target == "cpu" else ("f32", "bf16-f32"):
        told = {"model": "llama-tiny", "precision": precision}
        name = f"three steps against the reference, {precision}"
        part("agreement", name, told, work="agreement", precision=precision)
        yield found
    rest, again = list(sizes), list(AGAIN)
    while rest:
        size = rest.pop(0)
        own = dataclasses.asdict(size)
        result = part("sizes", str(size), own, work="size", size=own)
        yield found
        if result["outcome"] in ("out of memory", "does not fit") and not rest and again and mesh.capacity:
            smaller = filling(mesh, size.model, Layout.parse(size.layout).remat, again.pop(0))
            rest += [smaller] if smaller.batch < size.batch else []


def record(device: Mapping[str, Any], mesh: Mesh, found: Mapping[str, Any]) -> dict[str, Any]:
    """All that is known, as JSON takes it."""
    from jaxllm.report.document import versions

    fraction = environment(mesh).get("XLA_CLIENT_MEM_FRACTION") if mesh.target == "gpu" else None
    return {
        "schema": SCHEMA,
        "emulated": mesh.target == "cpu",
        "device": dict(device),
        "mesh": mesh.to_json(),
        "versions": {"python": sys.version.split()[0], **versions(mesh.target)},
        "mem_fraction": None if fraction is None else float(fraction),
        **found,
    }


def load(path: Path) -> dict[str, Any]:
    """What an earlier run has written."""
    return json.loads(path.read_text(encoding="utf-8"))


def row(size: Mapping[str, Any]) -> dict[str, Any]:
    """A size as a line of the CSV: bytes, seconds and shares of the peak; what is not known is None."""
    steps = size.get("step_seconds", [])[size.get("warm", 0) :]
    flops, top, peak = size.get("flops", {}), size.get("flops_peak"), size.get("peak", {})
    step = statistics.median(steps) if steps else None
    model = flops["model"] / step if step else None
    hardware = (flops["model"] + flops["recompute"]) / step if step else None
    return {
        **{name: size.get(name) for name in ("model", "parameters", "layout", "batch", "sequence", "precision")},
        "outcome": size["outcome"],
        "predicted_peak": peak.get("predicted"),
        "compiled_peak": peak.get("compiled"),
        "measured_peak": size.get("measured_peak"),
        "capacity": peak.get("capacity"),
        "step_s": None if step is None else round(step, 6),
        "flops_per_second": None if model is None else round(model),
        "mfu": None if model is None or not top else round(model / top, 4),
        "hfu": None if hardware is None or not top else round(hardware / top, 4),
        "equal": size.get("equal"),
        "lines": size.get("lines"),
        "why": size.get("why"),
    }


def shown(table: Sequence[common.Row]) -> list[dict[str, Any]]:
    """The table in GB, TFLOP/s and per cent."""

    def text(value: float | None, form: str, unit: float = 1) -> str | None:
        return None if value is None else format(value / unit, form)

    return [
        {
            "size": f"{line['model']} {line['layout']} {line['batch']}x{line['sequence']}",
            **{f"{name}_gb": text(line[f"{name}_peak"], ".3f", 1e9) for name in ("predicted", "compiled", "measured")},
            "off": common.off(line["compiled_peak"], line["measured_peak"]) if line["measured_peak"] else None,
            "step_s": text(line["step_s"], ".3f"),
            "tflops": text(line["flops_per_second"], ".3g", 1e12),
            "mfu": text(line["mfu"], ".1%"),
            "hfu": text(line["hfu"], ".1%"),
            "equal": f"{line['equal']} of {line['lines']}" if line["lines"] else None,
            "outcome": line["outcome"],
        }
        for line in table
    ]


def sentences(measurement: Mapping[str, Any]) -> list[str]:
    """What the steps of the small model came to, and which lines differ."""
    told = []
    for run in measurement["agreement"]:
        text = f"run   {run['model']}, {run['precision']}: {run['outcome']}"
        if run.get("max_relative_error") is not None:
            relation = "<=" if run["outcome"] == "agrees" else ">"
            text += f", largest relative error {run['max_relative_error']:.1e} {relation} {run['tolerance']:.0e}"
        told.append(text + (f": {run['why']}" if run.get("why") else ""))
    for size in measurement["sizes"]:
        if size.get("why"):
            told.append(f"{size['outcome']}: {size['model']} {size['layout']}: {size['why']}")
        found = size.get("check", {})
        for line in (*found.get("memory", ()), *found.get("flops", ()), *found.get("collectives", ())):
            if line["status"] == "differs":
                told.append(f"differs: {size['model']} {size['layout']}: {label(line)}")
    return told


def label(line: Mapping[str, Any]) -> str:
    """The name of a line in the JSON of a check."""
    parts = (line.get("line") or line["kind"], "+".join(line.get("axes", ())), line.get("phase"), line.get("dtype"))
    return "/".join(part for part in parts if part)


def draw(table: Sequence[common.Row], title: str, path: Path) -> None:
    """Left the peaks of each size by its three authors, right how long a step takes, or its share of the peak."""
    figure = common.figure(10, 1.6 + 0.75 * len(table))
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    memory, speed = figure.subplots(1, 2, sharey=True, width_ratios=(1.6, 1))
    authors = {"predicted": ("closed form", common.PALE), "compiled": ("compiled", common.THIRD),
               "measured": ("measured", common.FIRST)}  # fmt: skip
    for shift, (name, (label, colour)) in zip((-0.26, 0, 0.26), authors.items(), strict=True):
        values = [(line[f"{name}_peak"] or 0) / 1e9 for line in table]
        if any(values):
            memory.barh([place + shift for place in range(len(table))], values, 0.24, color=colour, label=label)
    if capacity := next((line["capacity"] for line in table if line["capacity"]), None):
        memory.axvline(capacity / 1e9, color=common.INK, lw=1, ls=(0, (5, 3)), label="usable")
    names = [f"{line['model']}\n{line['layout']}\n{line['batch']}x{line['sequence']}" for line in table]
    memory.set_yticks(range(len(table)), names)
    memory.set(xlabel="peak of memory of one device, GB", ylim=(len(table) - 0.4, -0.6))
    memory.legend(frameon=False, loc="best")
    known = any(line["mfu"] for line in table)
    bars = [(line["mfu"] or 0) * 100 if known else line["step_s"] or 0 for line in table]
    speed.barh(range(len(table)), bars, 0.5, color=common.SECOND)
    speed.set(xlabel="model FLOPs utilization, % of the dense peak" if known else "median step, seconds")
    common.save_png(figure, path)


def write(out: Path, device: Mapping[str, Any], mesh: Mesh, found: Mapping[str, Any]) -> Path:
    """The JSON, whole or not at all, so that an interrupt leaves what was there."""
    kind = re.sub(r"[^a-z0-9]+", "-", device["kind"].lower()).strip("-")
    path = out / f"on_device_{kind}{f'-x{mesh.devices}' if mesh.devices > 1 else ''}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record(device, mesh, found), indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def add_options(parser: argparse.ArgumentParser) -> None:
    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more, as in --sizes 2")
        return int(text)

    parser.add_argument("--mesh", metavar="MESH", help="machine:size, where the device is not known; or cpu:8")
    parser.add_argument("--sizes", type=whole, metavar="N", help="only the first N sizes of the ladder")
    parser.add_argument(
        "--limit-seconds", type=float, default=LIMIT_SECONDS, metavar="S",
        help=f"no size is started after that, and one under way is stopped; {LIMIT_SECONDS:.0f} by default",
    )  # fmt: skip


def which(text: str | None, seconds: float) -> tuple[dict[str, Any], Mesh]:
    """The devices that are here, and the mesh. Raises SpecError and TargetError."""
    mesh = None if text is None else Machine.load(text)
    if mesh is not None and mesh.target == "cpu":
        return {"kind": "cpu", "platform": "cpu", "count": mesh.devices}, mesh
    common.progress("looking for devices")
    device = ask(None, seconds, work="probe")
    if "kind" not in device:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise TargetError(f"jax does not start here{f' with JAX_PLATFORMS={asked}' if asked else ''}: {device['why']}")
    if mesh is None:
        return device, found_mesh(device)
    check_here(mesh, device)
    return device, mesh


def run(options: argparse.Namespace) -> int:
    device, mesh = which(options.mesh, options.limit_seconds)
    sizes = ladder(mesh)[: options.sizes]
    found: dict[str, Any] = {}
    for found in measure_all(mesh, sizes, options.limit_seconds):
        path = write(options.out, device, mesh, found)
    table = [row(size) for size in found["sizes"]]
    title = f"{mesh.devices} x {device['kind']}"
    if mesh.target == "cpu":
        title += ", emulated: no peak is measured, and the seconds are those of this host"
    print(title)
    common.show(shown(table), COLUMNS)
    print("\n".join(sentences(found)))
    print(f"wrote {path}")
    common.write_csv(table, path.with_suffix(".csv"))
    draw(table, title, path.with_suffix(".png"))
    return 0 if any(line["outcome"] == "measured" for line in table) else 1


def main() -> int:
    options = common.options(__doc__, add_options)
    try:
        return run(options)
    except SpecError as error:
        code, sentence = 2, error
    except TargetError as error:
        code, sentence = 3, error
    except KeyboardInterrupt:
        code, sentence = 130, "interrupted; what was measured until then is written"
    print(f"on_device: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
