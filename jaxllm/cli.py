"""The command line: reads the four nouns, checks all that can be checked, and only then imports JAX.

Results go to standard output, progress and notes to standard error. Every error is one sentence.
Exit codes: 0 agreement and it fits; 1 something differs; 2 bad input; 3 the target cannot be used here;
4 it does not fit; 130 interrupted. 70 is an error of jaxllm's own.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxllm.options import count, number, progress
from jaxllm.report.units import one_line
from jaxllm.spec.errors import DoesNotFit, SpecError, TargetError

if TYPE_CHECKING:
    from pathlib import Path

    from jaxllm.report import Comparison, Setup

INTERRUPTED = 130
DUMP = "jaxllm-"  # what the folder of a compilation begins with, and the number of the process then

Work = Callable[[], int]

app = typer.Typer(
    name="jaxllm",
    help="Closed forms of sharded training beside what XLA really compiles, line by line.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def run() -> None:
    """The `jaxllm` command: main, and what an interrupt does."""
    signal.signal(signal.SIGINT, _interrupt)
    code = main()
    # All is said. What libraries complain of while they are taken down is nobody's business.
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.exit(code)


def _interrupt(*_: object) -> None:
    """Ends at once. An exception could be lost in a callback of JAX's, or wait until a compiler returns."""
    for dump in glob.glob(os.path.join(tempfile.gettempdir(), f"{DUMP}{os.getpid()}-*")):
        shutil.rmtree(dump, ignore_errors=True)
    os._exit(_fail("interrupted", INTERRUPTED))


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        _check_once(arguments)
        if not arguments:
            raise SpecError("name a command: check, train, inspect, schedule, days, shapes, models or meshes; jaxllm --help tells more.")
        # Commands only parse and return the work to do. It is done here, out of typer's reach, which has its own
        # ideas about interrupts, broken pipes and exit codes.
        work = app(args=arguments, prog_name="jaxllm", standalone_mode=False, obj=arguments)
        code = work() if callable(work) else int(work or 0)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except SpecError as error:
        return _fail(str(error), 2)
    except TargetError as error:
        return _fail(str(error), 3)
    except DoesNotFit as error:
        return _fail(str(error), 4)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader has gone, as `head` does. Python flushes standard output once more at exit: to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports a program that a closed pipe ended
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own errors of usage, whichever click it brings
            return _fail(_usage(error), 2)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return _fail("the result cannot be written: the disk is full; make room or write elsewhere.", 2)
        if os.environ.get("JAXLLM_TRACEBACK"):
            raise
        return _fail(
            f"this is an error of jaxllm itself, {type(error).__name__}: {one_line(error)}; "
            "JAXLLM_TRACEBACK=1 shows where.",
            70,
        )


def _check_once(arguments: list[str]) -> None:
    """No option of ours is meant to be given twice, and the last would win. Raises SpecError."""
    names = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise SpecError(f"{twice} is given twice; keep one of them.")


def _fail(sentence: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"jaxllm: {one_line(sentence)}", file=sys.stderr)
    return code


def _usage(error: Any) -> str:
    message = one_line(error.format_message()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "jaxllm"
    return f"{message}; {command} --help lists what there is."


def _version(asked: bool) -> None:
    if asked:
        from jaxllm import __version__

        typer.echo(f"jaxllm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A preset, or the path of a config.json.")],
    mesh: Annotated[str, typer.Option(metavar="MESH", help="machine:size, as cpu:8, h100:2048x8, v5p:4x4x4.")],
    layout: Annotated[str, typer.Option(metavar="LAYOUT", help="Degrees and choices, as data=4,tensor=2,zero=3.")],
    batch: Annotated[
        str | None, typer.Option(metavar="B|max", help="Sequences per step. Default: one per device and microbatch.")
    ] = None,
    seq: Annotated[
        str | None, typer.Option(metavar="T|max", help="Tokens per sequence. Default: the model's, up to 4,096.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="P", help="f32, bf16-f32 or bf16-master. Default: f32 on cpu, else bf16-f32.")
    ] = None,
    optimizer: Annotated[str, typer.Option(metavar="O", help="adamw.")] = "adamw",
    gradient_dtype: Annotated[
        str | None, typer.Option(metavar="f32|bf16", help="Gradients are reduced in it. Default: the precision's.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="cpu|gpu|tpu|local", help="The compiler. Default: the machine's.")
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="Run three steps against the unsharded reference.")] = False,
    explain: Annotated[str | None, typer.Option(metavar="LINE", help="Take one line apart, as residuals.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="What is not comparable counts as a difference.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw it, as .png, .svg or .pdf.")] = None,
    bundle: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write all that a report of a disagreement needs into a new folder.")
    ] = None,
) -> Work:
    """Compare the closed form of a training step with what the compiler makes of it."""
    return partial(
        _check, model, mesh, layout, batch=batch, seq=seq, precision=precision, optimizer=optimizer,
        gradient_dtype=gradient_dtype, target=target, run=run, explain=explain, strict=strict, as_json=as_json,
        plot=plot, bundle=bundle,
    )  # fmt: skip


@app.command()
def train(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A preset, or the path of a config.json.")],
    mesh: Annotated[str, typer.Option(metavar="MESH", help="machine:size, as cpu:8; of other machines the devices here.")],
    layout: Annotated[str, typer.Option(metavar="LAYOUT", help="Degrees and choices, as data=2,tensor=4,zero=3.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="A new folder for metrics.csv and checkpoints.")],
    text: Annotated[str | None, typer.Option(metavar="FILE", help="What to train on. Its last tenth is held out.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FILE|bytes", help="A tokenizer.json. Default: bytes, for small vocabularies.")
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="N", help="Steps in all. Default: 200.")] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="B", help="Sequences per step. Default: 8, or the next number that divides.")
    ] = None,
    seq: Annotated[
        str | None, typer.Option(metavar="T", help="Tokens per sequence. Default: the model's, up to 4,096.")
    ] = None,
    lr: Annotated[str | None, typer.Option(metavar="X", help="The highest learning rate of AdamW. Default: 0.0003.")] = None,
    warmup: Annotated[
        str | None, typer.Option(metavar="N", help="Steps until it is reached; 0: it is constant. Default: 20.")
    ] = None,
    seed: Annotated[str | None, typer.Option(metavar="S", help="Of parameters and batches. Default: 0.")] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="P", help="f32, bf16-f32 or bf16-master. Default: f32 on cpu, else bf16-f32.")
    ] = None,
    gradient_dtype: Annotated[
        str | None, typer.Option(metavar="f32|bf16", help="Gradients are reduced in it. Default: the precision's.")
    ] = None,
    eval_every: Annotated[
        str | None, typer.Option(metavar="N", help="Steps between evaluations of the held-out text. Default: 50.")
    ] = None,
    save_every: Annotated[str | None, typer.Option(metavar="N", help="Steps between checkpoints. Default: 50.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, on any mesh and layout.")] = False,
    target: Annotated[
        str | None, typer.Option(metavar="cpu|local", help="Emulated devices or those here. Default: by the mesh.")
    ] = None,
    processes: Annotated[
        str | None, typer.Option(metavar="N", help="Processes that share the mesh. Default: 1.")
    ] = None,
    process: Annotated[str | None, typer.Option(metavar="I", help="Which of them this is, from 0; on a cluster.")] = None,
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where process 0 listens; on a cluster.")
    ] = None,
) -> Work:
    """Train on a text, on emulated devices or those that are here, with checkpoints that any layout takes up."""
    return partial(
        _train, context.obj, model, mesh, layout, out, text=text, tokenizer=tokenizer, steps=steps, batch=batch,
        seq=seq, lr=lr, warmup=warmup, seed=seed, precision=precision, gradient_dtype=gradient_dtype, eval_every=eval_every,
        save_every=save_every, resume=resume, target=target, processes=processes, process=process,
        coordinator=coordinator,
    )  # fmt: skip


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="HLO text, an HloProto or an HloModuleProto of a dump.")],
    machine: Annotated[
        str | None, typer.Option(metavar="M", help="A machine, as h100: the least time of each operation, and its memory.")
    ] = None,
    mesh: Annotated[
        str | None, typer.Option(metavar="AXES", help="Mesh axes, outermost first, as data=4,tensor=2. Default: recovered.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="FILE", help="A second program: print what changes from the first to it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw the memory over the schedule, as .png, .svg or .pdf.")
    ] = None,
    trace: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the schedule as a trace for ui.perfetto.dev, as .json.")
    ] = None,
) -> Work:
    """Report FLOPs, bytes, collectives, memory and warnings of any compiled XLA program."""
    return partial(
        _inspect, file, machine=machine, mesh=mesh, against=against, as_json=as_json, plot=plot, trace=trace
    )


@app.command()
def schedule(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="1f1b, interleaved, zb-v, ..., or a table as .csv.")],
    stages: Annotated[str, typer.Option(metavar="P", help="Stages of the pipeline.")],
    microbatches: Annotated[str, typer.Option(metavar="M", help="Microbatches of a step.")],
    virtual: Annotated[
        str | None, typer.Option(metavar="V", help="Chunks of the model on each stage. Default: the schedule's least.")
    ] = None,
    times: Annotated[
        str | None,
        typer.Option(metavar="TIMES", help="Of a microbatch on a stage, as f=1,b=1,w=1,comm=0.05. Default: 1, comm 0."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    png: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw it over time, as .png, .svg or .pdf.")
    ] = None,
    trace: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write it as a trace for ui.perfetto.dev, as .json.")
    ] = None,
) -> Work:
    """Draw a pipeline schedule, or check a table of one's own: its bubble, what it keeps, what it sends."""
    return partial(
        _schedule, name, stages, microbatches, virtual=virtual, times=times, as_json=as_json, png=png, trace=trace
    )


@app.command()
def days(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A preset, or the path of a config.json.")],
    tokens: Annotated[str, typer.Option(metavar="T", help="Tokens to train on, as 2e12.")],
    mesh: Annotated[str, typer.Option(metavar="MESH", help="machine:size, as a100-80:1024.")],
    mfu: Annotated[str, typer.Option(metavar="U", help="Share of the peak that is reached, as 0.45.")],
    remat: Annotated[str, typer.Option(metavar="none|full", help="full: the rate counts recomputation too.")] = "none",
    seq: Annotated[
        str | None, typer.Option(metavar="T", help="Tokens per sequence. Default: the model's, up to 4,096.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> Work:
    """Days of training by the rules of thumb, and from the exact count of FLOPs."""
    return partial(_days, model, tokens, mesh, mfu, remat=remat, seq=seq, as_json=as_json)


@app.command()
def shapes(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A preset, or the path of a config.json.")],
    batch: Annotated[str, typer.Option(metavar="B", help="Sequences.")] = "1",
    seq: Annotated[
        str | None, typer.Option(metavar="T", help="Tokens per sequence. Default: the model's, up to 4,096.")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="D", help="bf16, f32, f16 or f8e4m3fn.")] = "bf16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> Work:
    """Walk through a forward pass: weights and activations of each module, and the cache of keys and values."""
    return partial(_shapes, model, batch, seq, dtype, as_json)


@app.command()
def models(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A preset, or a config.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> Work:
    """List the models that are known, or every figure of one."""
    return partial(_models, model, as_json)


@app.command()
def meshes(
    machine: Annotated[str | None, typer.Argument(metavar="[MACHINE]", help="A name, or a TOML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> Work:
    """List the machines that are known, or every figure of one."""
    return partial(_meshes, machine, as_json)


def _train(*arguments: Any, **options: Any) -> int:
    from jaxllm.train.command import run

    return run(*arguments, **options)


def _check(
    model_text: str,
    mesh_text: str,
    layout_text: str,
    *,
    batch: str | None,
    seq: str | None,
    precision: str | None,
    optimizer: str,
    gradient_dtype: str | None,
    target: str | None,
    run: bool,
    explain: str | None,
    strict: bool,
    as_json: bool,
    plot: str | None,
    bundle: str | None,
) -> int:
    from jaxllm.spec.layout import Layout
    from jaxllm.spec.machine import Machine
    from jaxllm.spec.model import ModelConfig
    from jaxllm.spec.validate import default_batch, default_sequence, validate
    from jaxllm.spec.workload import Workload

    model = ModelConfig.load(model_text)
    mesh = Machine.load(mesh_text)
    layout = Layout.parse(layout_text)
    target = _target(target, mesh, run)
    batch_size, sequence = (
        count(option, value, None, word="max") for option, value in (("--batch", batch), ("--seq", seq))
    )
    for option, value in (("--precision", precision), ("--gradient-dtype", gradient_dtype)):
        if value is not None and not value.strip():
            raise SpecError(f"{option} is blank; leave it out for the default, or name one as in jaxllm check --help.")
    precision = precision or ("f32" if target == "cpu" else "bf16-f32")
    if explain is not None:
        from jaxllm.report.explain import check_name

        check_name(explain)
    path = _plot_path(plot)
    parcel = _bundle_path(bundle)

    # All that can be wrong is found before the long work; `max` is at least the default.
    least = Workload(
        batch=batch_size if isinstance(batch_size, int) else default_batch(layout),
        sequence=sequence if isinstance(sequence, int) else default_sequence(model),
        precision=precision,
        optimizer=optimizer,
        gradient_dtype=gradient_dtype or "",
    )
    validate(model, layout, mesh.devices, least)
    from jaxllm import check as pipeline

    def resolved(factor: float = 1.0) -> Workload:
        return pipeline.resolve(
            model, layout, mesh, batch_size, sequence, precision, optimizer, gradient_dtype or "", factor=factor
        )

    workload = resolved()
    with progress() as say:
        say("starting JAX")
        from jaxllm.targets import start

        start.prepare(target, mesh.devices)  # some of it is read when JAX is imported
        with start.quiet():
            options: dict[str, Any] = {"target": target, "run": run, "progress": say, "bundle": parcel}
            if "max" in (batch_size, sequence):
                workload, comparison = pipeline.check_largest(model, layout, mesh, resolved, **options)
            else:
                comparison = pipeline.check(model, layout, mesh, workload, **options)

    from jaxllm.report import Setup, exit_code
    from jaxllm.report.document import versions

    setup = Setup(model, layout, mesh, workload, target, versions(target))
    _show(comparison, setup, explain=explain, as_json=as_json)
    if path is not None:
        from jaxllm.report.plot import save_plot

        save_plot(comparison, setup, path)
        print(f"jaxllm: wrote {path}", file=sys.stderr)
    if parcel is not None:
        from jaxllm.bundle import save_comparison

        save_comparison(parcel, comparison, setup)
        print(f"jaxllm: wrote {parcel}", file=sys.stderr)
    return exit_code(comparison, strict=strict)


def _show(comparison: Comparison, setup: Setup, *, explain: str | None, as_json: bool) -> None:
    from jaxllm.report import explain as explaining

    if as_json:
        from jaxllm.report.document import document

        result = document(comparison, setup)
        if explain is not None:
            result["explain"] = explaining.explanation(comparison, setup, explain)
        print(json.dumps(result, indent=2))
        return
    from jaxllm.report.table import console, print_comparison

    out = console()
    if explain is not None:
        explaining.find(comparison, explain)  # an unknown line is told before the table, not under it
    print_comparison(comparison, setup, out)
    if explain is not None:
        explaining.print_explanation(comparison, setup, explain, out)


def _inspect(
    file: str,
    *,
    machine: str | None,
    mesh: str | None,
    against: str | None,
    as_json: bool,
    plot: str | None,
    trace: str | None,
) -> int:
    from jaxllm.inspection import inspect_file
    from jaxllm.spec.axes import parse_axes
    from jaxllm.spec.machine import Machine

    known = None if machine is None else Machine.read(machine)
    axes = None if mesh is None else parse_axes("--mesh", mesh)
    if against is not None and (plot is not None or trace is not None):
        raise SpecError("--plot and --trace draw one program; leave --against out, or them.")
    picture = _plot_path(plot)
    from jaxllm.report.files import output_path

    timetable = None if trace is None else output_path("--trace", trace, (".json",), "a trace")
    with progress() as say:
        say(f"reading {file}")
        report = inspect_file(file, mesh=axes, machine=known)
        if against is not None:
            say(f"reading {against}")
            other = inspect_file(against, mesh=axes, machine=known)
    if against is not None:
        return _show_difference(report, other, as_json)
    # before the table, whose reader may have enough of it early
    if picture is not None:
        from jaxllm.report.inspection_plot import save_timeline

        save_timeline(report, picture)
        print(f"jaxllm: wrote {picture}", file=sys.stderr)
    if timetable is not None:
        from jaxllm.report.trace import save_trace

        save_trace(report, timetable)
        print(f"jaxllm: wrote {timetable}", file=sys.stderr)
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        from jaxllm.report.inspection_table import print_report
        from jaxllm.report.table import console

        print_report(report, console())
    return 0


def _show_difference(before: Any, after: Any, as_json: bool) -> int:
    """1 when something changed, as `diff` has it."""
    from jaxllm.report.difference import difference, print_difference
    from jaxllm.report.table import console

    found = difference(before, after)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print_difference(found, console())
    return int(found.changed)


def _schedule(
    name: str,
    stages: str,
    microbatches: str,
    *,
    virtual: str | None,
    times: str | None,
    as_json: bool,
    png: str | None,
    trace: str | None,
) -> int:
    from jaxllm.report.files import output_path
    from jaxllm.schedules.files import load
    from jaxllm.schedules.simulation import simulate
    from jaxllm.schedules.times import Times

    counts = count("--stages", stages, None, least=2), count("--microbatches", microbatches, None)
    given = Times() if times is None else Times.parse(times)
    picture = None if png is None else output_path("--png", png, (".png", ".svg", ".pdf"), "a picture")
    timetable = None if trace is None else output_path("--trace", trace, (".json",), "a trace")
    simulation = simulate(load(name, *counts, count("--virtual", virtual, None)), given)
    if picture is not None:
        from jaxllm.report.schedule_plot import save_picture

        save_picture(simulation, picture)
        print(f"jaxllm: wrote {picture}", file=sys.stderr)
    if timetable is not None:
        from jaxllm.report.schedule_trace import save_trace

        save_trace(simulation, timetable)
        print(f"jaxllm: wrote {timetable}", file=sys.stderr)
    from jaxllm.report.schedule import document, print_schedule

    if as_json:
        print(json.dumps(document(simulation)))
    else:
        from jaxllm.report.table import console

        print_schedule(simulation, console())
    return 0


def _days(model_text: str, tokens: str, mesh_text: str, mfu: str, *, remat: str, seq: str | None, as_json: bool) -> int:
    from jaxllm.report.days import Plan, document, print_days
    from jaxllm.spec.machine import Machine
    from jaxllm.spec.model import ModelConfig
    from jaxllm.spec.validate import default_sequence
    from jaxllm.theory.training import counts

    model = ModelConfig.load(model_text)
    wanted = number("--tokens", tokens, most=1e18, example="2e12")
    mesh = Machine.load(mesh_text)
    used = number("--mfu", mfu, most=1, example="0.45")
    if remat not in ("none", "full"):
        raise SpecError(f"--remat {remat!r} is neither none nor full; leave it out for none.")
    sequence = count("--seq", seq, default_sequence(model))
    plan = Plan(model, mesh, wanted, sequence, remat, _rate(mesh.machine), used)
    found = counts(model, sequence, remat)
    if as_json:
        print(json.dumps(document(plan, found), indent=2))
    else:
        from jaxllm.report.table import console

        print_days(plan, found, console())
    return 0


def _shapes(model_text: str, batch: str, seq: str | None, dtype: str, as_json: bool) -> int:
    from jaxllm.report.shapes import DTYPES, Prefill, document, print_shapes
    from jaxllm.spec.errors import nearest
    from jaxllm.spec.model import ModelConfig
    from jaxllm.spec.validate import default_sequence

    model = ModelConfig.load(model_text)
    sizes = count("--batch", batch, None), count("--seq", seq, default_sequence(model))
    if dtype not in DTYPES:
        raise SpecError(f"--dtype {dtype!r} is unknown; {nearest(dtype, DTYPES)}")
    prefill = Prefill(model, *sizes, dtype)
    if as_json:
        print(json.dumps(document(prefill), indent=2))
    else:
        from jaxllm.report.table import console

        print_shapes(prefill, console())
    return 0


def _rate(machine: Any) -> tuple[str, int]:
    """The dtype that a machine trains in, and its peak in FLOP/s. Raises SpecError where no peak is stated."""
    peak = machine.peak_flops
    dtype = next((dtype for dtype in ("bf16", "f16") if dtype in peak), None)
    if dtype is None:
        raise SpecError(f"--mesh {machine.name}: its file states no peak rate; take a machine that does, as h100:8.")
    return dtype, peak[dtype]


def _models(text: str | None, as_json: bool) -> int:
    from jaxllm.spec.model import ModelConfig

    if text is not None:
        _describe(text, ModelConfig.load(text), as_json)
        return 0
    known = ModelConfig.presets()
    heads = ("model", "parameters", "L", "D", "F", "N", "K", "H", "V", "max T")
    rows = [
        (name, m.parameters, m.layers, m.d_model, m.d_ff, m.heads, m.kv_heads, m.head_dim, m.vocab, m.max_sequence)
        for name, m in known.items()
    ]
    _list(known, heads, rows, as_json)
    return 0


def _meshes(text: str | None, as_json: bool) -> int:
    from jaxllm.report.units import human
    from jaxllm.spec.machine import Machine

    if text is not None:
        # a machine's figures do not depend on its size: `h100:16` is taken as well and adds the size
        if ":" not in text:
            _describe(text, Machine.read(text), as_json)
            return 0
        mesh = Machine.load(text)
        if as_json:
            print(json.dumps(mesh.to_json() | {"machine": mesh.machine.to_json()}, indent=2))
        else:
            _describe(text, mesh, as_json)
        return 0
    known = {name: Machine.read(name) for name in Machine.names()}
    heads = ("machine", "target", "memory", "usable", "bf16", "node", "description")
    rows = [
        (
            name,
            m.target,
            human(m.memory_bytes),
            human(m.capacity),
            human(m.peak_flops.get("bf16"), "FLOP/s"),
            m.node_size,
            m.description,
        )
        for name, m in known.items()
    ]
    _list(known, heads, rows, as_json)
    return 0


def _list(known: dict[str, Any], heads: tuple[str, ...], rows: list[tuple[Any, ...]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: noun.to_json() for name, noun in known.items()}, indent=2))
        return
    from jaxllm.report.table import console, print_listing

    print_listing(console(), heads, rows)


def _describe(name: str, noun: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(noun.to_json(), indent=2))
        return
    from jaxllm.report.table import console, print_figures

    print_figures(console(), name, noun.describe())


def _target(text: str | None, mesh: Any, run: bool) -> str:
    """The compiler to ask. Raises SpecError where machine, size, target and --run do not go together."""
    from jaxllm import targets

    target = mesh.machine.target if text is None else text
    targets.validate(target, mesh)
    if run and target not in ("cpu", "local"):
        raise SpecError(
            f"--run needs devices that are here and --target {target} only compiles; use --target cpu or local."
        )
    return target


def _bundle_path(text: str | None) -> Path | None:
    if text is None:
        return None
    from jaxllm.bundle import check_folder

    return check_folder(text)


def _plot_path(text: str | None) -> Path | None:
    if text is None:
        return None
    from jaxllm.report.plot import check_path

    return check_path(text)


if __name__ == "__main__":
    run()
