"""One program, three compilers: where do XLA:CPU, XLA:GPU and XLA:TPU differ, and by which rule?

The same step of llama-tiny, same layout, batch and precision, is compiled for eight emulated devices, eight H100s and
eight TPU v5e. What the partitioner decides is laid side by side line by line: what is held, computed and sent. Then
what each backend makes of it: bytes of the collectives that it emits, and how often it starts one; padding, and the
peak. Each difference stands with the rule that accounts for it, or with the words "no rule" and what was found in the
optimized module.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import common
from jaxllm import Layout, Machine, ModelConfig, Workload, predict
from jaxllm.spec.ledger import DTYPE_BYTES

if TYPE_CHECKING:
    from jaxllm.spec.ledger import Ledger, Line

MODEL, LAYOUT, PRECISION, BATCH, SEQUENCE = "llama-tiny", "data=4,tensor=2,zero=3,remat=full", "bf16-f32", 4, 128
MESHES = {"cpu": "cpu:8", "gpu": "h100:8", "tpu": "v5e:2x4"}

NUMBERS = {"line": "line", "partitioned": "partitioned", "cpu": "XLA:CPU", "gpu": "XLA:GPU", "tpu": "XLA:TPU"}
REASONS = {"line": "line", "reason": "why"}
TITLES = {
    "bytes": "Memory of one device, in bytes",
    "FLOPs": "Computed by one device in a step, in FLOPs",
    "payload": "Collectives of one device in a step, payload in bytes",
    "times": "How often each runs in a step",
    "emitted": "What the backend emits of each collective, in bytes",
    "starts": "How often the backend starts one in a step",
    "peak": "The peak, in bytes",
}
NO_RULE = "no rule: "

Key = tuple[str, tuple[str, ...], str, str, str]  # kind, axes, phase, and dtypes in and out, of a collective


@dataclasses.dataclass(frozen=True)
class Emitted:
    """The collectives of one key in an optimized module, over a step."""

    payload: int = 0  # bytes
    starts: int = 0  # executions of the instructions that carry them
    arrays: int = 0  # at most in one instruction
    operands: frozenset[str] = frozenset()  # what makes them, by opcode


@dataclasses.dataclass(frozen=True)
class Author:
    """What one compiler has to say of the step."""

    ledger: Ledger
    emitted: Mapping[Key, Emitted]
    on_chip: int  # bytes of temporaries that lie in no HBM


# ---------------------------------------------------------------- compiling and reading


def authors(targets: Iterable[str] = tuple(MESHES)) -> dict[str, Author]:
    """Each compiler's word. Raises what `build` and `compile` raise."""
    from jaxllm.targets import start

    for target in targets:  # all of them before the first compile: jax starts once
        start.prepare(target, 8)
    found = {}
    for target in targets:
        common.progress(f"compiling {MODEL} for {MESHES[target]}, {LAYOUT}, {PRECISION}")
        with start.quiet():
            found[target] = author(target)
    return found


def author(target: str) -> Author:
    from jaxllm import build, compile, measure
    from jaxllm.hlo import Dump
    from jaxllm.hlo.graph import read_module
    from jaxllm.hlo.memory import Buffers
    from jaxllm.hlo.protos import read

    work = Workload(BATCH, SEQUENCE, PRECISION)
    built = build(ModelConfig.load(MODEL), Layout.parse(LAYOUT), Machine.load(MESHES[target]), work)
    compiled = compile(built)
    proto = read(Dump.find(compiled.dump.name, target, devices=built.mesh.size).optimized)
    module = read_module(proto.hlo_module)
    return Author(measure(compiled), emitted(module, built.axes), Buffers(proto.buffer_assignment, module).on_chip)


def emitted(module: Any, axes: dict[str, int]) -> dict[Key, Emitted]:
    """The collectives of an optimized module. One that XLA:TPU spreads over several fusions counts once."""
    from jaxllm.hlo.collectives import kind_of, parts_of
    from jaxllm.hlo.loops import executions

    runs = executions(module)
    found: dict[Key, Emitted] = defaultdict(Emitted)
    chains = set()
    for computation, instruction in module.instructions():
        if not kind_of(instruction):
            continue
        out = instruction.shape.leaves[-1].dtype
        operands = frozenset(operand.opcode for operand in computation.operands(instruction))
        attributes = {pair.key: pair.value for pair in instruction.proto.frontend_attributes.map}
        for context in runs.of(computation):
            chain = (attributes.get("chain_id"), context.trips)
            if chain[0] is not None and chain in chains:
                continue
            chains.add(chain)
            payloads: dict[Key, list[int]] = defaultdict(list)
            for part in parts_of(module, computation, instruction, context, axes):
                payloads[part.kind, part.axes, part.phase, part.dtype, out].append(part.payload)
            for key, mine in payloads.items():
                old = found[key]
                found[key] = Emitted(
                    payload=old.payload + sum(mine) * context.count,
                    starts=old.starts + context.count,
                    arrays=max(old.arrays, len(mine)),
                    operands=old.operands | operands,
                )
    return dict(found)


# ---------------------------------------------------------------- rows


def row(
    figure: str, line: str, partitioned: int | None, values: Mapping[str, Any], closed_form: int | None = None
) -> dict[str, Any]:
    """A figure of a line by all compilers; where they differ, rule and reason are filled in by the caller."""
    same = len({*values.values(), partitioned} - {None}) <= 1
    return {
        "figure": figure,
        "line": line,
        "closed_form": closed_form,
        "partitioned": partitioned,
        **values,
        "same": "yes" if same else "no",
        "rule": "",
        "rule_bytes": None,
        "reason": "",
    }


def rows(found: Mapping[str, Author]) -> Iterator[dict[str, Any]]:
    """All figures: of the partitioned program, then what the backends made of it."""
    yield from partitioned_rows(found)
    yield from emitted_rows(found)
    yield from start_rows(found)
    yield from peak_rows(found)


def closed_form() -> Ledger:
    return predict(ModelConfig.load(MODEL), Layout.parse(LAYOUT), Workload(BATCH, SEQUENCE, PRECISION))


def by_key(ledger: Ledger) -> dict[tuple, Line]:
    from jaxllm.spec.ledger import merge

    return {line.key: line for line in merge(ledger.lines)}


def partitioned_rows(found: Mapping[str, Author]) -> Iterator[dict[str, Any]]:
    own, theirs = by_key(closed_form()), {target: by_key(one.ledger) for target, one in found.items()}
    figures = {
        "memory": {"bytes": "value"},
        "flops": {"FLOPs": "value"},
        "collectives": {"payload": "value", "times": "count"},
    }
    for key in dict.fromkeys(key for lines in (own, *theirs.values()) for key in lines):
        lines = {target: mine.get(key) for target, mine in theirs.items()}
        label = next(line for line in (own.get(key), *lines.values()) if line).label
        for figure, attribute in figures[key[0]].items():
            values = {target: getattr(line, attribute, 0) for target, line in lines.items()}
            mine = getattr(own.get(key), attribute, 0)
            if any((mine, *values.values())):
                once = next(iter(values.values())) if len(set(values.values())) == 1 else None
                yield explained(row(figure, label, once, values, mine), lines)


def emitted_rows(found: Mapping[str, Author]) -> Iterator[dict[str, Any]]:
    """The payload of each collective in the optimized modules, and of those that no line has."""
    theirs = {target: by_key(one.ledger) for target, one in found.items()}
    for key in dict.fromkeys(key for lines in theirs.values() for key in lines if key[0] == "collectives"):
        lines = {target: mine.get(key) for target, mine in theirs.items()}
        some = next(line for line in lines.values() if line)
        values = {target: line.emitted if line else 0 for target, line in lines.items()}
        result = explained(row("emitted", some.label, some.value, values), lines)
        for target, value in values.items():
            if value < some.value:
                result["reason"] = joined(result["reason"], why_fewer(some, value, target, found[target]))
        yield result
    for target, one in found.items():
        for key, what in beyond(one).items():
            values = {other: what.payload * (other == target) for other in found}
            yield row("emitted", label_of(key), 0, values) | {"reason": NO_RULE + why_beyond(key, what)}


def start_rows(found: Mapping[str, Author]) -> Iterator[dict[str, Any]]:
    """How often instructions start, by kind, axes and phase: a promoted dtype cannot be told from a true one.

    An instruction that carries arrays of two phases counts for both.
    """
    written: dict[tuple, int] = defaultdict(int)
    for line in next(iter(found.values())).ledger.section("collectives"):
        written[line.name, line.axes, line.phase] += line.count
    for group in dict.fromkeys((*written, *(key[:3] for one in found.values() for key in one.emitted))):
        mine = {t: {key: what for key, what in one.emitted.items() if key[:3] == group} for t, one in found.items()}
        values = {target: sum(what.starts for what in keys.values()) for target, keys in mine.items()}
        result = row("starts", label_of((*group, "", "")), written[group], values)
        reasons = [
            why_starts(group, target, found[target], keys)
            for target, keys in mine.items()
            if values[target] != written[group]
        ]
        yield result | {"reason": NO_RULE + joined(*reasons) if reasons else ""}


def peak_rows(found: Mapping[str, Author]) -> Iterator[dict[str, Any]]:
    on_chip = {target: one.on_chip for target, one in found.items()}
    peak = row("peak", "in HBM", None, {target: one.ledger.peak for target, one in found.items()}, closed_form().peak)
    yield peak | {"reason": NO_RULE + "what lives for a moment is up to each compiler's schedule and fusions"}
    chip = ", ".join(name(target) for target, size in on_chip.items() if size)
    yield row("peak", "on chip", None, on_chip) | {"reason": f"{NO_RULE}{chip} keeps temporaries in memory of the chip"}


# ---------------------------------------------------------------- reasons


def name(target: str) -> str:
    return f"XLA:{target.upper()}"


def joined(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)


def explained(result: dict[str, Any], lines: Mapping[str, Line | None]) -> dict[str, Any]:
    """A row with the rules of the lines that differ from the partitioned program, or from each other."""
    for target, line in lines.items():
        for rule in line.rules if line and result["same"] == "no" and result["figure"] in ("bytes", "emitted") else ():
            result["rule"] = rule.name
            result["rule_bytes"] = (result["rule_bytes"] or 0) + rule.bytes
            why = f"{rule.name}, {rule.bytes:,} bytes on {name(target)}: {rule.why}"
            result["reason"] = joined(result["reason"], why)
    return result


def label_of(key: Key) -> str:
    kind, axes, phase, dtype, out = key
    return "/".join(filter(None, (kind, "+".join(axes), phase or "?", dtype if dtype == out else f"{dtype}>{out}")))


def beyond(one: Author) -> dict[Key, Emitted]:
    """What is emitted under a key that no line of the ledger has, and that no rule put beside one."""
    lines = {(line.name, line.axes, line.phase, line.dtype) for line in one.ledger.section("collectives")}
    promoted = {
        (line.name, line.axes, line.phase, "f32")
        for line in one.ledger.section("collectives")
        if any(rule.name == "cpu-f32-promotion" for rule in line.rules)
    }
    return {key: what for key, what in one.emitted.items() if key[:4] not in lines | promoted}


def stands_for(key: Key, what: Emitted) -> str:
    """The collective that an emitted all-reduce takes the place of, by how it is made; "" when nothing tells."""
    if key[0] == "all-reduce" and what.operands == {"dynamic-update-slice"}:
        return "all-gather"
    return "reduce-scatter" if key[0] == "all-reduce" and key[3] != key[4] else ""


def why_beyond(key: Key, what: Emitted) -> str:
    count = what.payload // DTYPE_BYTES[key[3]]
    made = {
        "all-gather": "each device writes its slice into a buffer of zeros, and all buffers are added: a gather",
        "reduce-scatter": f"{key[3]} goes in and {key[4]} comes out, and a slice of it is kept: a reduce-scatter",
        "": "nothing in the module tells what it stands for",
    }
    return f"{made[stands_for(key, what)]}, of {count:,} elements{of_weights(count)}"


def why_fewer(line: Line, value: int, target: str, one: Author) -> str:
    """Where the bytes are that a backend does not emit under the line's own kind."""
    count = (line.value - value) // DTYPE_BYTES[line.dtype]
    elsewhere = [
        label_of(key)
        for key, what in beyond(one).items()
        if stands_for(key, what) == line.name and what.payload // DTYPE_BYTES[key[3]] == count
    ]
    found = f"those of {' or '.join(elsewhere)}" if elsewhere else "not found again"
    return f"{NO_RULE}{count:,} elements fewer on {name(target)}{of_weights(count)}: {found}"


def of_weights(count: int) -> str:
    """The norms, when it is so many elements: of all layers, or with the last one."""
    table = ModelConfig.load(MODEL).parameter_table()
    layers = table["attention_norm"] + table["mlp_norm"]
    return {layers: ", the norms of the layers", layers + table["final_norm"]: ", all norms"}.get(count, "")


def why_starts(group: tuple, target: str, one: Author, mine: Mapping[Key, Emitted]) -> str:
    """Why a backend starts another number of collectives than are written."""
    arrays = max((what.arrays for what in mine.values()), default=0)
    merged = f"{name(target)} puts up to {arrays} arrays in one instruction" if arrays > 1 else ""
    others = [key for key, what in beyond(one).items() if stands_for(key, what) == group[0]]
    instead = [label_of(key) for key in others if key[2] == group[2]] or [label_of(key) for key in others if not key[2]]
    if any(stands_for(key, what) for key, what in mine.items()):
        return joined(f"{name(target)} has them in place of others", merged)
    return joined(merged, f"{name(target)} has {' or '.join(instead)} instead of some" if instead else "")


# ---------------------------------------------------------------- what is shown


def equal(table: Sequence[common.Row]) -> list[common.Row]:
    """The lines of the partitioned program that all three compilers and the closed form have alike."""
    alike = [r for r in table if r["closed_form"] is not None and r["same"] == "yes" and r["cpu"] == r["closed_form"]]
    times = {r["line"]: r["cpu"] for r in alike if r["figure"] == "times"}
    return [dict(r) | {"times": times.get(r["line"])} for r in alike if r["figure"] != "times"]


def differing(table: Sequence[common.Row], figure: str) -> list[common.Row]:
    return [r for r in table if r["figure"] == figure and r["same"] == "no"]


def show(table: Sequence[common.Row]) -> None:
    alike = equal(table)
    print(f"The partitioned program: {len(alike)} lines that all three compilers and the closed form have alike")
    common.show(alike, {"line": "line", "cpu": "bytes or FLOPs", "times": "times"})
    for figure, title in TITLES.items():
        if found := differing(table, figure):
            print(f"\n{title}: where they differ")
            common.show(found, NUMBERS)
            common.show(found, REASONS)


def draw(table: Sequence[common.Row], path: Path) -> None:
    """Left the bytes of each collective, right how often one starts; the partitioned program as marks."""
    starts = [r for r in table if r["figure"] == "starts" and max(r[target] for target in MESHES) > 2]
    labels = [r["line"] for r in starts]
    bytes_ = [total(table, "emitted", label) for label in labels]
    emits, written = (sum(r[column] for r in bytes_) for column in ("cpu", "partitioned"))
    figure = common.figure(9, 0.5 * len(labels) + 1.2)
    figure.suptitle(
        f"One partitioned program: {name('cpu')} emits {emits / written:.1f} times its bytes, {name('gpu')} starts "
        f"{sum(r['gpu'] for r in starts)} collectives for {sum(r['partitioned'] for r in starts)}",
        x=0.01, ha="left", weight="bold", fontsize=10,
    )  # fmt: skip
    left, right = figure.subplots(1, 2, sharey=True)
    draw_bars(left, [{t: value / 1e6 for t, value in r.items()} for r in bytes_], "emitted by one device in a step, MB")
    draw_bars(right, starts, "collective instructions that start in a step")
    left.set_yticks(range(len(labels)), labels)
    left.invert_yaxis()
    right.legend(frameon=False, loc="lower right")
    common.save_png(figure, path)


def total(table: Sequence[common.Row], figure: str, group: str) -> dict[str, int]:
    """The figure over all dtypes of one kind, axes and phase."""
    mine = [r for r in table if r["figure"] == figure and r["line"].rpartition("/")[0] == group]
    return {column: sum(r[column] for r in mine) for column in ("partitioned", *MESHES)}


def draw_bars(axes: Any, table: Sequence[Mapping[str, Any]], label: str) -> None:
    for place, (target, colour) in enumerate(zip(MESHES, (common.SECOND, common.FIRST, common.THIRD), strict=True)):
        ys = [index + (place - 1) * 0.26 for index in range(len(table))]
        axes.barh(ys, [r[target] for r in table], 0.24, color=colour, label=name(target))
    for index, r in enumerate(table):
        told = "the partitioned program" if index == 0 else None
        axes.vlines(r["partitioned"], index - 0.42, index + 0.42, color=common.INK, lw=1.6, label=told)
    axes.set(xlabel=label, xlim=(0, None))
    axes.tick_params(axis="y", length=0)


def main() -> int:
    out = common.options(__doc__).out
    table = list(rows(authors()))
    print(f"{MODEL}, {LAYOUT}, {PRECISION}, batch {BATCH}, sequence {SEQUENCE}: {', '.join(MESHES.values())}\n")
    show(table)
    common.write_csv(table, out / "three_compilers.csv")
    draw(table, out / "three_compilers.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
