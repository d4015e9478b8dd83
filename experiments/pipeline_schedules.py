"""What does each pipeline schedule idle and keep, counted, simulated and compiled?

    python experiments/pipeline_schedules.py [--quick] [--out DIR]

All schedules that have a name, on 8 stages and with 8 to 64 microbatches. The idle share of a step is simulated with
equal times of F, B and W, and held against the closed form where one is known; again with a W of half the time and
a result that travels; and with neighbours that wait for each other at every tick, as those of one program do. Then the
step is compiled by XLA:CPU for eight emulated devices: the loop must run as often as the table has ticks, and the
buffers must be as many bytes as were counted, like every other line of the ledger. Exits with 1 when one of them is not.
--quick compiles the first microbatch count of two schedules.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import common
from jaxllm.schedules import Schedule, default_chunks, make, names
from jaxllm.schedules.closed_forms import CLOSED_FORMS, closed_bubble
from jaxllm.schedules.counts import slots, traffic, transfers
from jaxllm.schedules.simulation import bubble_of, simulate
from jaxllm.schedules.times import Times

MODEL, STAGES = "llama-tiny", 8  # of 16 layers: two on a stage, and one in a chunk where there are two
SEQUENCE = 128
MICROBATCHES = (8, 16, 32, 64)
QUICK = ("1f1b", "zb-v")
EQUAL = Times()
# As the profiles of Qi et al. 2023, 2401.10241, table 9: there W takes 0.50 to 0.74 of F, and a result 0.02 to 0.04.
LIKE_MEASURED = Times(f=1.0, b=1.0, w=0.5, comm=0.05)
BUFFERS = ("stash", "weight_stash", "inbox")
# From so many microbatches on, every schedule that can be is full.
FULL = 2 * STAGES

FORMS = {"schedule": "schedule", "formula": "idle time by closed form", "when": "which holds for"}


def layout(name: str, microbatches: int) -> str:
    return f"pipe={STAGES},microbatches={microbatches},schedule={name}"


def table_of(name: str, microbatches: int) -> Schedule:
    return make(name, STAGES, microbatches, default_chunks(name))


def counted(name: str, microbatches: int) -> dict[str, Any]:
    """What the table alone says: bubbles as shares of a step's span, ticks, buffers, and what is sent beside 1F1B."""
    schedule = table_of(name, microbatches)
    given = slots(schedule)
    return {
        "schedule": name,
        "chunks": schedule.chunks,
        "stages": STAGES,
        "microbatches": microbatches,
        "bubble_closed": rounded(closed_bubble(schedule, EQUAL)),
        "bubble": rounded(simulate(schedule, EQUAL).bubble),
        "bubble_like_measured": rounded(simulate(schedule, LIKE_MEASURED).bubble),
        "bubble_in_step": rounded(in_step(schedule, EQUAL)),
        "sent": round(traffic(transfers(schedule), STAGES, microbatches), 3),
        "stash_slots": given.stash,
        "weight_slots": given.weights,
        "inbox_slots": given.inputs,
        "ticks": schedule.ticks,
    }


def in_step(schedule: Schedule, times: Times) -> float:
    """The idle share of a step as the compiled loop has it: at each tick a stage sends to both neighbours, whatever it
    did, and goes on when it has what both sent. A weight step sends nothing, and comes after the sending."""
    lasts, count = times.of_kinds(schedule), schedule.stages
    closed = schedule.placement == "ring" and schedule.chunks > 1
    ready = [0.0] * count
    spans = [(math.inf, 0.0)] * count
    for row in schedule.table:
        begun, sent, done = ready, [], []
        for start, cell in zip(begun, row, strict=True):
            time = 0.0 if cell is None else lasts[cell.kind]
            sent.append(start if cell is not None and cell.kind == "W" else start + time)
            done.append(start + time)
        spans = [
            (first, last) if cell is None else (min(first, start), end)
            for (first, last), cell, start, end in zip(spans, row, begun, done, strict=True)
        ]
        around = [[s - 1, s + 1] for s in range(count)]
        ready = [
            max(done[s], *(sent[n % count] for n in near if closed or 0 <= n < count)) for s, near in enumerate(around)
        ]
    return bubble_of(max(last - first for first, last in spans), schedule.microbatches, times)


def rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 9)


def cell(name: str, microbatches: int) -> dict[str, Any]:
    """A row of the table: what is counted, and what XLA:CPU made of the step."""
    found = common.checked(
        MODEL, f"cpu:{STAGES}", layout(name, microbatches), sequence=SEQUENCE, precision="f32"
    )
    memory = {row.name: row for row in found.section("memory")}
    (ticks,) = found.section("pipeline")
    held = {}
    for buffer in BUFFERS:
        row = memory.get(buffer)
        held[buffer], held[f"{buffer}_compiled"] = (row.predicted, row.compiled) if row else (0, 0)
    return counted(name, microbatches) | {"ticks_compiled": ticks.compiled} | held | common.lines_equal(found)


def wrong(row: common.Row) -> list[str]:
    """What does not agree in a row, in words."""
    pairs = [("bubble", "bubble_closed")] if row["bubble_closed"] is not None else []
    pairs += [(name, f"{name}_compiled") for name in ("ticks", *BUFFERS)] + [("lines", "equal")]
    place = f"{row['schedule']}, {row['microbatches']} microbatches"
    return [f"{place}: {a} {row[a]} and {b} {row[b]}" for a, b in pairs if row[a] != row[b]]


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    for name in QUICK if quick else names():
        for microbatches in MICROBATCHES[:1] if quick else MICROBATCHES:
            common.progress(f"compiling {layout(name, microbatches)}")
            yield cell(name, microbatches)


def by_schedule(table: Sequence[common.Row], key: str, percent: bool = False) -> list[dict[str, Any]]:
    """A row for each schedule, with a column of `key` for each number of microbatches."""
    found: dict[str, dict[str, Any]] = {}
    for row in table:
        value = row[key]
        if percent and value is not None:
            value = f"{100 * value:.2f} %"
        found.setdefault(row["schedule"], {"schedule": row["schedule"]})[str(row["microbatches"])] = value
    return list(found.values())


def forms(table: Sequence[common.Row]) -> list[dict[str, Any]]:
    """The closed forms of the schedules in the table."""
    return [
        {"schedule": name, "formula": CLOSED_FORMS[name].formula, "when": CLOSED_FORMS[name].when}
        for name in dict.fromkeys(row["schedule"] for row in table)
        if name in CLOSED_FORMS
    ]


def growing(table: Sequence[common.Row], key: str) -> dict[str, list[str]]:
    """The schedules by what the bytes of a buffer do from FULL microbatches on: `linear`, `flat`, or `else`."""
    found: dict[str, list[str]] = {"linear": [], "flat": [], "else": []}
    for name in dict.fromkeys(row["schedule"] for row in table):
        mine = [row for row in table if row["schedule"] == name and row["microbatches"] >= FULL]
        each = {row[key] / row["microbatches"] for row in mine}
        kind = "flat" if len({row[key] for row in mine}) == 1 else "linear" if len(each) == 1 else "else"
        found[kind].append(name)
    return found


# Colour, marker, its size and line of each: several lie on each other.
LOOKS = {
    "circular": ("#b3261e", "s", 10, "-"),
    "gpipe": (common.SECOND, "o", 5, "--"),
    "1f1b": (common.FIRST, "s", 10, "-"),
    "zb-h1": ("#3a7d44", "^", 7, "--"),
    "zb-v": ("#7b4fa3", "D", 4, ":"),
    "interleaved": (common.THIRD, "o", 7, "-"),
    "zb-h2": ("#7bb662", "v", 8, "-"),
    "dualpipev": ("#c58bd6", "P", 7, "--"),
}


def draw(table: Sequence[common.Row], path: Path) -> None:
    """Left the compiled bytes of the stash, in the middle with what B keeps for W, right the bubble; by microbatches."""
    figure = common.figure(11, 4.8)
    kinds = growing(table, "stash_compiled")
    figure.suptitle(
        f"Compiled stash bytes against microbatches: linear for {listed(kinds['linear'])}, flat for {listed(kinds['flat'])}",
        x=0.01, ha="left", weight="bold", fontsize=10,
    )  # fmt: skip
    panels = figure.subplots(1, 3)
    known = dict.fromkeys(row["schedule"] for row in table)
    for name in sorted(known, key=lambda name: list(LOOKS).index(name) if name in LOOKS else len(LOOKS)):
        mine = [row for row in table if row["schedule"] == name]
        both = [row["stash_compiled"] + row["weight_stash_compiled"] for row in mine]
        colour, marker, size, line = LOOKS.get(name, (common.INK, "x", 5, "-"))
        for axes, values in zip(
            panels,
            ([row["stash_compiled"] / 1e6 for row in mine], [count / 1e6 for count in both], [100 * row["bubble"] for row in mine]),
            strict=True,
        ):
            axes.plot(
                [row["microbatches"] for row in mine], values, color=colour, marker=marker, ls=line, lw=1.5, ms=size,
                mfc="none", label=name if axes is panels[0] else None,
            )  # fmt: skip
    closed = [row for row in table if row["bubble_closed"] is not None]
    panels[2].plot(
        [row["microbatches"] for row in closed], [100 * row["bubble_closed"] for row in closed], ".", ms=4,
        color=common.INK, zorder=3, label="closed form",
    )  # fmt: skip
    top = max(row["stash_compiled"] + row["weight_stash_compiled"] for row in table) / 1e6
    for axes, title in zip(
        panels,
        ("stash of one device, MB", "stash and what B keeps for W, MB", "idle share of a step, %, f = b = w"),
        strict=True,
    ):
        axes.set_xticks(MICROBATCHES, MICROBATCHES)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set(xlabel="microbatches", xlim=(0, None), ylim=(0, None if axes is panels[2] else 1.05 * top))
    figure.legend(frameon=False, loc="outside lower center", ncols=9)
    common.save_png(figure, path)


def listed(found: Sequence[str]) -> str:
    """`a, b and c`; of none `none`."""
    return " and ".join(filter(None, (", ".join(found[:-1]), *found[-1:]))) or "none"


def add_quick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}, {MICROBATCHES[0]} microbatches")


# What is shown of each number of microbatches, and whether as per cent.
SHOWN = {
    "bubble": ("idle share of a step, simulated with f = b = w", True),
    "bubble_closed": ("the same by closed form, blank where none is known to hold", True),
    "bubble_like_measured": ("simulated with f = 1, b = 1, w = 0.5, comm = 0.05", True),
    "bubble_in_step": ("with f = b = w, if neighbours wait for each other at every tick", True),
    "ticks_compiled": ("turns of the compiled loop over ticks", False),
    "stash_compiled": ("compiled stash of one device, bytes", False),
    "weight_stash_compiled": ("compiled buffers for what B keeps for W, bytes", False),
    "inbox_compiled": ("compiled buffers for what waits for its cell, bytes", False),
}


def show_by_schedule(table: Sequence[common.Row], key: str) -> None:
    """One of SHOWN, a row for each schedule and a column for each number of microbatches."""
    title, percent = SHOWN[key]
    print(title)
    counts = dict.fromkeys(str(row["microbatches"]) for row in table)
    titles = {"schedule": "schedule"} | {count: f"m = {count}" for count in counts}
    common.show(by_schedule(table, key, percent), titles)


def verdict(table: Sequence[common.Row]) -> str:
    """How many lines are equal, in how many programs."""
    equal, lines = (sum(row[key] for row in table) for key in ("equal", "lines"))
    return f"{equal:,} of {lines:,} lines are equal in {len(table)} programs"


def main() -> int:
    options = common.options(__doc__, add_quick)
    table = list(rows(options.quick))
    for key in SHOWN:
        show_by_schedule(table, key)
        print()
    print(verdict(table))
    common.write_csv(table, options.out / "pipeline_schedules.csv")
    draw(table, options.out / "pipeline_schedules.png")
    problems = [problem for row in table for problem in wrong(row)]
    for problem in problems:
        print(f"pipeline_schedules: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
