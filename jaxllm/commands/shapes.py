"""shapes: a forward pass, module by module."""

from __future__ import annotations

import json

from jaxllm.options import count
from jaxllm.spec.errors import SpecError


def run(model_text: str, batch: str, seq: str | None, dtype: str, as_json: bool) -> int:
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
