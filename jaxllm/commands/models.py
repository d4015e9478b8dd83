"""models: what is known of models."""

from __future__ import annotations

from jaxllm.commands.listing import describe, print_known


def run(text: str | None, as_json: bool) -> int:
    from jaxllm.spec.model import ModelConfig

    if text is not None:
        describe(text, ModelConfig.load(text), as_json)
        return 0
    known = ModelConfig.presets()
    heads = ("model", "parameters", "L", "D", "F", "N", "K", "H", "V", "max T")
    rows = [
        (name, m.parameters, m.layers, m.d_model, m.d_ff, m.heads, m.kv_heads, m.head_dim, m.vocab, m.max_sequence)
        for name, m in known.items()
    ]
    print_known(known, heads, rows, as_json)
    return 0
