"""meshes: what is known of machines."""

from __future__ import annotations

import json

from jaxllm.commands.listing import describe, print_known


def run(text: str | None, as_json: bool) -> int:
    from jaxllm.report.units import human
    from jaxllm.spec.machine import Machine

    if text is not None:
        # a machine's figures do not depend on its size: `h100:16` is taken as well and adds the size
        if ":" not in text:
            describe(text, Machine.read(text), as_json)
            return 0
        mesh = Machine.load(text)
        if as_json:
            print(json.dumps(mesh.to_json() | {"machine": mesh.machine.to_json()}, indent=2))
        else:
            describe(text, mesh, as_json)
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
    print_known(known, heads, rows, as_json)
    return 0
