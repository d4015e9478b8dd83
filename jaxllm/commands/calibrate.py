"""calibrate: a machine file of the devices that are here."""

from __future__ import annotations

import sys

from jaxllm.options import progress


def run(out: str | None, machine: str | None) -> int:
    from jaxllm.report.files import output_path
    from jaxllm.spec.machine import Machine

    path = None if out is None else output_path("--out", out, (".toml",), "a machine file")
    if machine is not None:
        Machine.read(machine)
    with progress() as say:
        say("starting JAX")
        from jaxllm.targets import start

        start.prepare("local", 1)
        from jaxllm import calibrate as measuring

        if machine is not None:
            import jax

            measuring.check(machine, jax.devices()[0].platform)
        with start.quiet():
            found = measuring.measure(say)
    text = measuring.machine_file(found, machine)
    measuring.read_back(text)
    if path is None:
        print(text, end="")
    else:
        path.write_text(text, encoding="utf-8")
        print(f"jaxllm: wrote {path}", file=sys.stderr)
    what = "CPUs: no accelerator is here" if found.platform == "cpu" else f"{found.devices} x {found.kind}"
    print(f"jaxllm: measured {what}", file=sys.stderr)
    return 0
