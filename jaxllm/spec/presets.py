"""The models that are known by name, each with the source of its figures.

Symbols: L layers, D d_model, F d_ff, N heads, K kv_heads, H head_dim.
"""

from __future__ import annotations

from jaxllm.spec.model import ModelConfig, RopeScaling

_LLAMA_1 = "arXiv:2302.13971, Table 2; feed-forward width, context and norm epsilon: the checkpoints' config.json"
_LLAMA_2 = "arXiv:2307.09288, Table 1 and section 2.2; widths: the checkpoints' config.json"
_LLAMA_3 = "arXiv:2407.21783, Table 3; vocabulary, context and rotary scaling: the checkpoints' config.json"
_LLAMA_3_2 = "config.json of meta-llama/Llama-3.2-1B and Llama-3.2-3B on Hugging Face"
_GPT_2 = "config.json of openai-community/gpt2 on Hugging Face"
_GPT_3 = (
    "arXiv:2005.14165, Table 2.1 and section 2.1; vocabulary: GPT-2's 50,257, padded to 51,200 as in arXiv:2104.04473, "
    "section 5; norm epsilon: GPT-2's"
)
_NARAYANAN = "arXiv:2104.04473, Table 1; vocabulary and context: section 5; norm epsilon: GPT-2's"
_KORTHIKANTI = "arXiv:2205.05198, Table 3; vocabulary and context: section 6; norm epsilon: GPT-2's"
_TESTS = "made for tests; not a published model"

_SCALING_3_1 = RopeScaling(8.0, 1.0, 4.0, 8192)
_SCALING_3_2 = RopeScaling(32.0, 1.0, 4.0, 8192)

# What a release shares: vocab, tied, norm epsilon, context, source, rotary base and scaling.
_LLAMAS: dict[str, tuple[int, bool, float, int, str, float, RopeScaling | None]] = {
    "llama-1": (32000, False, 1e-6, 2048, _LLAMA_1, 1e4, None),
    "llama-2": (32000, False, 1e-5, 4096, _LLAMA_2, 1e4, None),
    "llama-3": (128256, False, 1e-5, 8192, _LLAMA_3, 5e5, None),
    "llama-3.1": (128256, False, 1e-5, 131072, _LLAMA_3, 5e5, _SCALING_3_1),
    "llama-3.2": (128256, True, 1e-5, 131072, _LLAMA_3_2, 5e5, _SCALING_3_2),
}

# release, size: L, D, F, N, K, H
_LLAMA_SIZES: dict[tuple[str, str], tuple[int, int, int, int, int, int]] = {
    ("llama-1", "7b"): (32, 4096, 11008, 32, 32, 128),
    ("llama-1", "13b"): (40, 5120, 13824, 40, 40, 128),
    ("llama-1", "33b"): (60, 6656, 17920, 52, 52, 128),
    ("llama-1", "65b"): (80, 8192, 22016, 64, 64, 128),
    ("llama-2", "7b"): (32, 4096, 11008, 32, 32, 128),
    ("llama-2", "13b"): (40, 5120, 13824, 40, 40, 128),
    ("llama-2", "70b"): (80, 8192, 28672, 64, 8, 128),
    ("llama-3", "8b"): (32, 4096, 14336, 32, 8, 128),
    ("llama-3", "70b"): (80, 8192, 28672, 64, 8, 128),
    ("llama-3.1", "8b"): (32, 4096, 14336, 32, 8, 128),
    ("llama-3.1", "70b"): (80, 8192, 28672, 64, 8, 128),
    ("llama-3.1", "405b"): (126, 16384, 53248, 128, 8, 128),
    ("llama-3.2", "1b"): (16, 2048, 8192, 32, 8, 64),
    ("llama-3.2", "3b"): (28, 3072, 8192, 24, 8, 128),
}

# size: L, D, N. The vocabulary of Megatron's models is 51,200, their context 2,048.
_NARAYANAN_SIZES: dict[str, tuple[int, int, int]] = {
    "1.7b": (24, 2304, 24),
    "3.6b": (30, 3072, 32),
    "7.5b": (36, 4096, 32),
    "18.4b": (40, 6144, 48),
    "39.1b": (48, 8192, 64),
    "76.1b": (60, 10240, 80),
    "145.6b": (80, 12288, 96),
    "310.1b": (96, 16384, 128),
    "529.6b": (105, 20480, 128),
    "1008b": (128, 25600, 160),
}
_KORTHIKANTI_SIZES: dict[str, tuple[int, int, int]] = {
    "22b": (48, 6144, 64),
    "175b": (96, 12288, 96),
    "530b": (105, 20480, 128),
    "1t": (128, 25600, 160),
}

# What GPT-2's config.json asks for and a step does not do, in the words of jaxllm/spec/hugging_face.py.
DROPOUT = (
    "dropout of {} is not built: a step has none. It changes no shape, matmul or collective; its masks are not counted"
)


def _gpt(
    name: str, layers: int, d_model: int, heads: int, source: str, *, vocab: int, context: int, note: str = ""
) -> ModelConfig:
    """A GPT as they all are: a feed-forward of 4 D, heads that together are as wide as the model, tied embeddings."""
    return ModelConfig(
        name=name,
        layers=layers,
        d_model=d_model,
        d_ff=4 * d_model,
        heads=heads,
        kv_heads=heads,
        head_dim=d_model // heads,
        vocab=vocab,
        tied=True,
        norm_epsilon=1e-5,
        max_sequence=context,
        source=source,
        note=note,
        family="gpt",
    )


def _megatron(size: str, figures: tuple[int, int, int], source: str) -> ModelConfig:
    return _gpt(f"megatron-{size}", *figures, source, vocab=51200, context=2048)


# Small enough to run on emulated devices, and divisible by 16 everywhere but the 8 kv heads.
_LLAMA_TINY = ModelConfig(
    name="llama-tiny",
    layers=16,
    d_model=128,
    d_ff=512,
    heads=16,
    kv_heads=8,
    head_dim=8,
    vocab=512,
    tied=False,
    rope_theta=1e4,
    norm_epsilon=1e-5,
    max_sequence=4096,
    source=_TESTS,
)

_MODELS = (
    _LLAMA_TINY,
    *(
        ModelConfig(f"{release}-{size}", *figures, *_LLAMAS[release])
        for (release, size), figures in _LLAMA_SIZES.items()
    ),
    _gpt("gpt-tiny", 16, 128, 16, _TESTS, vocab=512, context=4096),
    _gpt("gpt2", 12, 768, 12, _GPT_2, vocab=50257, context=1024, note=DROPOUT.format(0.1)),
    _gpt("gpt3-175b", 96, 12288, 96, _GPT_3, vocab=51200, context=2048),
    *(_megatron(size, figures, _NARAYANAN) for size, figures in _NARAYANAN_SIZES.items()),
    *(_megatron(size, figures, _KORTHIKANTI) for size, figures in _KORTHIKANTI_SIZES.items()),
)

PRESETS = {model.name: model for model in _MODELS}
