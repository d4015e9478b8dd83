"""The command line: reads the four nouns, checks all that can be checked, and only then imports JAX.

Results go to standard output, progress and notes to standard error. Every error is one sentence.
Exit codes: 0 agreement and it fits; 1 something differs; 2 bad input; 3 the target cannot be used here;
4 it does not fit; 130 interrupted, 143 terminated. 70 is an error of jaxllm's own.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer

from jaxllm.report.units import one_line
from jaxllm.spec.errors import DoesNotFit, SpecError, TargetError
from jaxllm.spec.optimizers import OPTIMIZERS
from jaxllm.spec.workload import PRECISIONS

INTERRUPTED = 130
DUMP = "jaxllm-"  # what the folder of a compilation begins with, and the number of the process then

Work = Callable[[], int]

# What several commands are given.
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A preset, or the path of a config.json.")]
Tokens = Annotated[str | None, typer.Option(metavar="T", help="Tokens per sequence. Default: the model's, up to 4,096.")]
GradientDtype = Annotated[str | None, typer.Option(metavar="f32|bf16", help="Gradients are reduced in it. Default: the precision's.")]
OptimizerName = Annotated[str, typer.Option(metavar="NAME", help=f"One of {', '.join(OPTIMIZERS)}.")]
Degrees = Annotated[str, typer.Option(metavar="LAYOUT", help="Degrees and choices, as data=4,tensor=2,zero=3.")]
PrecisionName = Annotated[str, typer.Option(metavar="P", help=f"One of {', '.join(PRECISIONS)}.")]
PrecisionOfTarget = Annotated[str | None, typer.Option(metavar="P", help=f"One of {', '.join(PRECISIONS)}. Default: f32 on cpu, else bf16-f32.")]
MeshText = Annotated[str, typer.Option(metavar="MESH", help="machine:size, as a100-80:64, h100:2048x8, v5p:4x4x4.")]

app = typer.Typer(
    name="jaxllm",
    help="Closed forms of sharded training beside what XLA really compiles, line by line.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def run() -> None:
    """The `jaxllm` command: main, and what an interrupt does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    code = main()
    # All is said. What libraries complain of while they are taken down is nobody's business.
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.exit(code)


def _interrupt(number: int, _: object) -> None:
    """Ends at once. An exception could be lost in a callback of JAX's, or wait until a compiler returns."""
    code = _fail("interrupted" if number == signal.SIGINT else "terminated", 128 + number)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a compiler complains of what is taken from under it
    dumps = glob.glob(os.path.join(tempfile.gettempdir(), f"{DUMP}{os.getpid()}-*"))
    for dump in dumps:
        # A compiler that still writes would fill the folder again, or make it anew where there is none: but not over a file.
        with contextlib.suppress(OSError):
            os.rename(dump, f"{dump}.gone")
            open(dump, "w").close()  # noqa: SIM115
            shutil.rmtree(f"{dump}.gone", ignore_errors=True)
    for dump in dumps:
        with contextlib.suppress(OSError):
            os.unlink(dump)
    os._exit(code)


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        _check_once(arguments)
        if not arguments:
            raise SpecError("name a command: check, plan, time, train, inspect, schedule, days, shapes, calibrate, models or meshes; jaxllm --help tells more.")
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


def _work(command: str, *arguments: Any, **options: Any) -> Work:
    """What a command does, whose module is imported when it is done."""
    return lambda: import_module(command).run(*arguments, **options)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def check(
    model: Model,
    mesh: Annotated[str, typer.Option(metavar="MESH", help="machine:size, as cpu:8, h100:2048x8, v5p:4x4x4.")],
    layout: Degrees,
    batch: Annotated[
        str | None, typer.Option(metavar="B|max", help="Sequences per step. Default: one per device and microbatch.")
    ] = None,
    seq: Annotated[
        str | None, typer.Option(metavar="T|max", help="Tokens per sequence. Default: the model's, up to 4,096.")
    ] = None,
    precision: PrecisionOfTarget = None,
    optimizer: OptimizerName = "adamw",
    gradient_dtype: GradientDtype = None,
    target: Annotated[
        str | None, typer.Option(metavar="cpu|gpu|tpu|local", help="The compiler. Default: the machine's.")
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="Run three steps against the unsharded reference.")] = False,
    explain: Annotated[str | None, typer.Option(metavar="LINE", help="Take one line apart, as residuals.")] = None,
    by: Annotated[
        str | None, typer.Option(metavar="layer|module", help="What each part of the model holds, computes and sends.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="What is not comparable counts as a difference.")] = False,
    as_json: Json = False,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw it, as .png, .svg or .pdf.")] = None,
    bundle: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write all that a report of a disagreement needs into a new folder.")
    ] = None,
) -> Work:
    """Compare the closed form of a training step with what the compiler makes of it."""
    return _work(
        "jaxllm.commands.check", model, mesh, layout, batch=batch, seq=seq, precision=precision, optimizer=optimizer,
        gradient_dtype=gradient_dtype, target=target, run_it=run, explain=explain, by=by, strict=strict,
        as_json=as_json, plot=plot, bundle=bundle,
    )  # fmt: skip


@app.command()
def train(
    context: typer.Context,
    model: Model,
    mesh: Annotated[str, typer.Option(metavar="MESH", help="machine:size, as cpu:8; of other machines the devices here.")],
    layout: Annotated[str, typer.Option(metavar="LAYOUT", help="Degrees and choices, as data=2,tensor=4,zero=3.")],
    text: Annotated[str | None, typer.Option(metavar="FILE", help="What to train on. Its last tenth is held out.")] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="A new folder for metrics.csv and checkpoints. Default: runs/MODEL-1, or the next.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FILE|bytes", help="A tokenizer.json. Default: bytes, for small vocabularies.")
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="N", help="Steps in all. Default: 200.")] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="B", help="Sequences per step. Default: 8, or the next number that divides.")
    ] = None,
    seq: Tokens = None,
    optimizer: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"One of {', '.join(OPTIMIZERS)}. Default: adamw.")
    ] = None,
    lr: Annotated[
        str | None, typer.Option(metavar="X", help="The highest learning rate. Default: the optimizer's; 0.0003 for adamw.")
    ] = None,
    warmup: Annotated[
        str | None, typer.Option(metavar="N", help="Steps until it is reached; 0: it is constant. Default: 20.")
    ] = None,
    seed: Annotated[str | None, typer.Option(metavar="S", help="Of parameters and batches. Default: 0.")] = None,
    precision: PrecisionOfTarget = None,
    gradient_dtype: GradientDtype = None,
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
    return _work(
        "jaxllm.train.command", context.obj, model, mesh, layout, out, text=text, tokenizer=tokenizer, steps=steps, batch=batch,
        seq=seq, optimizer=optimizer, lr=lr, warmup=warmup, seed=seed, precision=precision, gradient_dtype=gradient_dtype, eval_every=eval_every,
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
    as_json: Json = False,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw the memory over the schedule, as .png, .svg or .pdf.")
    ] = None,
    trace: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the schedule as a trace for ui.perfetto.dev, as .json.")
    ] = None,
) -> Work:
    """Report FLOPs, bytes, collectives, memory and warnings of any compiled XLA program."""
    return _work(
        "jaxllm.commands.inspect", file, machine=machine, mesh=mesh, against=against, as_json=as_json, plot=plot, trace=trace
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
    as_json: Json = False,
    png: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw it over time, as .png, .svg or .pdf.")
    ] = None,
    trace: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write it as a trace for ui.perfetto.dev, as .json.")
    ] = None,
) -> Work:
    """Draw a pipeline schedule, or check a table of one's own: its bubble, what it keeps, what it sends."""
    return _work(
        "jaxllm.commands.schedule", name, stages, microbatches, virtual=virtual, times=times, as_json=as_json, png=png, trace=trace
    )


@app.command()
def plan(
    model: Model,
    mesh: MeshText,
    batch: Annotated[str, typer.Option(metavar="B", help="Sequences per step.")],
    seq: Tokens = None,
    precision: PrecisionName = "bf16-f32",
    optimizer: OptimizerName = "adamw",
    gradient_dtype: GradientDtype = None,
    fix: Annotated[
        str | None, typer.Option(metavar="CONDITIONS", help="What a layout must have, as tensor=4,zero=1|3,pipe<=8.")
    ] = None,
    objective: Annotated[str, typer.Option(metavar="time|memory|cost", help="What the best has least of.")] = "time",
    price: Annotated[str | None, typer.Option(metavar="X", help="Dollars for an hour of one device.")] = None,
    top: Annotated[str | None, typer.Option(metavar="N", help="How many are listed. Default: 10.")] = None,
    why: Annotated[str | None, typer.Option(metavar="LAYOUT", help="Why this one is out, or slower than the best.")] = None,
    verify: Annotated[str | None, typer.Option(metavar="N", help="Compile the first N, and show what changes.")] = None,
    as_json: Json = False,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw time against memory, as .png, .svg or .pdf.")
    ] = None,
) -> Work:
    """Find the best layouts of a model on a mesh: every one scored, memory and time, and why the others are out."""
    return _work(
        "jaxllm.commands.plan", model, mesh, batch=batch, seq=seq, precision=precision, optimizer=optimizer,
        gradient_dtype=gradient_dtype, fix=fix, objective=objective, price=price, top=top, why=why, verify=verify,
        as_json=as_json, plot=plot,
    )  # fmt: skip


@app.command()
def time(
    model: Model,
    mesh: MeshText,
    layout: Degrees,
    batch: Annotated[
        str | None, typer.Option(metavar="B", help="Sequences per step. Default: one per device and microbatch.")
    ] = None,
    seq: Tokens = None,
    precision: PrecisionName = "bf16-f32",
    optimizer: OptimizerName = "adamw",
    gradient_dtype: GradientDtype = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Compile the step, play the program on the machine, and say where it differs.")
    ] = False,
    trace: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the step as a trace for ui.perfetto.dev, as .json.")
    ] = None,
    as_json: Json = False,
) -> Work:
    """How long one training step takes, where the time goes, and how sure that is."""
    return _work(
        "jaxllm.commands.time", model, mesh, layout, batch=batch, seq=seq, precision=precision, optimizer=optimizer,
        gradient_dtype=gradient_dtype, compiled=compiled, trace=trace, as_json=as_json,
    )  # fmt: skip


@app.command()
def days(
    model: Model,
    tokens: Annotated[str, typer.Option(metavar="N", help="Tokens to train on, as 2e12.")],
    mesh: Annotated[str, typer.Option(metavar="MESH", help="machine:size, as a100-80:1024.")],
    mfu: Annotated[str, typer.Option(metavar="U", help="Share of the peak that is reached, recomputation included, as 0.45.")],
    remat: Annotated[str, typer.Option(metavar="none|selective|full", help="What is computed again.")] = "none",
    seq: Tokens = None,
    as_json: Json = False,
) -> Work:
    """Days of training by the rules of thumb, and from the exact count of FLOPs."""
    return _work("jaxllm.commands.days", model, tokens, mesh, mfu, remat=remat, seq=seq, as_json=as_json)


@app.command()
def shapes(
    model: Model,
    batch: Annotated[str, typer.Option(metavar="B", help="Sequences.")] = "1",
    seq: Tokens = None,
    dtype: Annotated[str, typer.Option(metavar="D", help="bf16, f32, f16 or f8e4m3fn.")] = "bf16",
    as_json: Json = False,
) -> Work:
    """Walk through a forward pass: weights and activations of each module, and the cache of keys and values."""
    return _work("jaxllm.commands.shapes", model, batch, seq, dtype, as_json)


@app.command()
def calibrate(
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Write the machine there, as my.toml. Default: print it.")] = None,
    machine: Annotated[
        str | None, typer.Option(metavar="M", help="What the devices here are, as h100: its own figures stay. Default: unknown.")
    ] = None,
) -> Work:
    """Measure the devices that are here, and write a machine file that --mesh takes."""
    return _work("jaxllm.commands.calibrate", out, machine)


@app.command()
def models(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A preset, or a config.json.")] = None,
    as_json: Json = False,
) -> Work:
    """List the models that are known, or every figure of one."""
    return _work("jaxllm.commands.models", model, as_json)


@app.command()
def meshes(
    machine: Annotated[str | None, typer.Argument(metavar="[MACHINE]", help="A name, or a TOML file.")] = None,
    as_json: Json = False,
) -> Work:
    """List the machines that are known, or every figure of one."""
    return _work("jaxllm.commands.meshes", machine, as_json)


if __name__ == "__main__":
    run()
