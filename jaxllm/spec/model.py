"""ModelConfig: what is trained. Presets of the Llama family, and Hugging Face's `config.json` of that family.

Symbols: L layers, D d_model, F d_ff, N heads, K kv_heads, H head_dim, V vocab.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxllm.spec.errors import SpecError, nearest

LIMIT = 10**9  # no dim of a model is as large; keeps typing errors and memory figures sane


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's rescaling of rotary frequencies, by wavelength (Llama 3.1 `apply_scaling`, `rope_type` "llama3").

    A wavelength above original_sequence / low_frequency_factor is stretched by `factor`; one below
    original_sequence / high_frequency_factor is kept; those between are interpolated.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_sequence: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_frequency_factor", "high_frequency_factor"):
            _check_positive("rope scaling", name, getattr(self, name))
        _check_count("rope scaling", "original_sequence", self.original_sequence)
        if self.factor < 1:
            raise SpecError(f"rope scaling: factor={self.factor} shortens the context; it must be 1 or more.")
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise SpecError(
                f"rope scaling: low_frequency_factor={self.low_frequency_factor} must be below "
                f"high_frequency_factor={self.high_frequency_factor}; Llama 3 uses 1 and 4."
            )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family: RMSNorm, rotary positions, grouped-query attention, gated SiLU feed-forward."""

    name: str
    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # the head is the transposed embedding
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_epsilon: float
    max_sequence: int  # tokens
    source: str  # where the figures come from

    def __post_init__(self) -> None:
        where = f"model {self.name!r}"
        for name in ("layers", "d_model", "d_ff", "heads", "kv_heads", "head_dim", "vocab", "max_sequence"):
            _check_count(where, name, getattr(self, name))
        for name in ("rope_theta", "norm_epsilon"):
            _check_positive(where, name, getattr(self, name))
        if not isinstance(self.tied, bool):
            raise SpecError(f"{where}: tied={self.tied!r} is neither true nor false.")
        if self.heads % self.kv_heads:
            raise SpecError(
                f"{where}: {self.heads} query heads are no multiple of {self.kv_heads} key/value heads; "
                f"every key/value head serves the same number of query heads."
            )
        if self.head_dim % 2:
            raise SpecError(f"{where}: head_dim={self.head_dim} is odd, and rotary positions turn pairs; make it even.")

    @classmethod
    def load(cls, text: str | os.PathLike[str]) -> ModelConfig:
        """A preset by its name, or the `config.json` at a path (or in a folder). Raises SpecError on anything else."""
        text = os.fspath(text)
        known = cls.presets()
        if text in known:
            return known[text]
        if os.path.isdir(text):
            path = Path(text) / "config.json"
            if not path.is_file():
                raise SpecError(f"model: the folder {text!r} holds no config.json.")
            return _read_config(path)
        if os.path.isfile(text):
            return _read_config(Path(text))
        if "/" in text or text.endswith(".json"):
            raise SpecError(f"model: there is no file {text!r}; give a config.json, or a name such as llama-3-8b.")
        raise SpecError(f"model: unknown name {text!r}; {nearest(text.lower(), known)}")

    @staticmethod
    def presets() -> dict[str, ModelConfig]:
        """Every known model by its name, oldest family first."""
        return dict(_PRESETS)

    def parameter_table(self) -> dict[str, int]:
        """Number of parameters of each array, all layers together; `head` is left out when it is tied."""
        per_layer = {
            "attention_norm": self.d_model,
            "q": self.d_model * self.heads * self.head_dim,
            "k": self.d_model * self.kv_heads * self.head_dim,
            "v": self.d_model * self.kv_heads * self.head_dim,
            "o": self.heads * self.head_dim * self.d_model,
            "mlp_norm": self.d_model,
            "gate": self.d_model * self.d_ff,
            "up": self.d_model * self.d_ff,
            "down": self.d_ff * self.d_model,
        }
        table = {"embed": self.vocab * self.d_model}
        table |= {name: self.layers * count for name, count in per_layer.items()}
        table["final_norm"] = self.d_model
        if not self.tied:
            table["head"] = self.d_model * self.vocab
        return table

    @property
    def parameters(self) -> int:
        """L(2DNH + 2DKH + 3DF + 2D) + VD (twice if not tied) + D."""
        return sum(self.parameter_table().values())

    def describe(self) -> list[tuple[str, str, str]]:
        """Rows (figure, value with unit, source) for a table."""
        rows = [
            ("layers L", f"{self.layers:,}"),
            ("model width D", f"{self.d_model:,}"),
            ("feed-forward width F", f"{self.d_ff:,}"),
            ("query heads N", f"{self.heads:,}"),
            ("key/value heads K", f"{self.kv_heads:,}"),
            ("head size H", f"{self.head_dim:,}"),
            ("vocabulary V", f"{self.vocab:,}"),
            ("tied embeddings", "yes" if self.tied else "no"),
            ("rotary base", f"{self.rope_theta:,.10g}"),
            ("rotary scaling", _scaling_text(self.rope_scaling)),
            ("norm epsilon", f"{self.norm_epsilon:g}"),
            ("context", f"{self.max_sequence:,} tokens"),
        ]
        described = [(figure, value, self.source) for figure, value in rows]
        counted = "computed from the figures above"
        described.append(("parameters", f"{self.parameters:,}", counted))
        parts = self.parameter_table().items()
        return described + [(f"parameters of {name}", f"{count:,}", counted) for name, count in parts]

    def to_json(self) -> dict[str, Any]:
        """The figures, the parameter count and its parts, as JSON takes them."""
        data = asdict(self)
        name = data.pop("name")
        return {"name": name, "parameters": self.parameters, **data, "parameter_table": self.parameter_table()}


def _scaling_text(scaling: RopeScaling | None) -> str:
    if scaling is None:
        return "none"
    return (
        f"factor {scaling.factor:g} beyond {scaling.original_sequence:,} tokens, low frequencies below "
        f"{scaling.low_frequency_factor:g}, high above {scaling.high_frequency_factor:g} turns"
    )


def _check_count(where: str, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < LIMIT:
        raise SpecError(f"{where}: {name}={value!r} is not a whole number from 1 to below 10^9.")


def _check_positive(where: str, name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
        raise SpecError(f"{where}: {name}={value!r} is not a positive number of reasonable size.")


# ---------------------------------------------------------------- presets

_LLAMA_1 = "arXiv:2302.13971, Table 2; feed-forward width, context and norm epsilon: the checkpoints' config.json"
_LLAMA_2 = "arXiv:2307.09288, Table 1 and section 2.2; widths: the checkpoints' config.json"
_LLAMA_3 = "arXiv:2407.21783, Table 3; vocabulary, context and rotary scaling: the checkpoints' config.json"
_LLAMA_3_2 = "config.json of meta-llama/Llama-3.2-1B and Llama-3.2-3B on Hugging Face"
_SCALING_3_1 = RopeScaling(8.0, 1.0, 4.0, 8192)
_SCALING_3_2 = RopeScaling(32.0, 1.0, 4.0, 8192)

# What a family shares: vocab, tied, rotary base and scaling, norm epsilon, context, source.
_FAMILIES: dict[str, tuple[int, bool, float, RopeScaling | None, float, int, str]] = {
    "llama-1": (32000, False, 1e4, None, 1e-6, 2048, _LLAMA_1),
    "llama-2": (32000, False, 1e4, None, 1e-5, 4096, _LLAMA_2),
    "llama-3": (128256, False, 5e5, None, 1e-5, 8192, _LLAMA_3),
    "llama-3.1": (128256, False, 5e5, _SCALING_3_1, 1e-5, 131072, _LLAMA_3),
    "llama-3.2": (128256, True, 5e5, _SCALING_3_2, 1e-5, 131072, _LLAMA_3_2),
}

# family, size: L, D, F, N, K, H
_SIZES: dict[tuple[str, str], tuple[int, int, int, int, int, int]] = {
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

# Not a published model: small enough to run on emulated devices, and divisible by 16 everywhere but the 8 kv heads.
_TINY = ModelConfig(
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
    rope_scaling=None,
    norm_epsilon=1e-5,
    max_sequence=4096,
    source="made for tests; not a published model",
)

_PRESETS = {"llama-tiny": _TINY} | {
    f"{family}-{size}": ModelConfig(f"{family}-{size}", *_SIZES[family, size], *_FAMILIES[family])
    for family, size in _SIZES
}

# ---------------------------------------------------------------- Hugging Face's config.json

# Keys that give a figure of ours; `head_dim` and the rotary keys are read apart.
_REQUIRED = {
    "num_hidden_layers": "layers",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_attention_heads": "heads",
    "vocab_size": "vocab",
    "max_position_embeddings": "max_sequence",
}
# The defaults are those of Hugging Face's LlamaConfig.
_OPTIONAL = {"num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
             "tie_word_embeddings"}  # fmt: skip

# Keys that are fine with these values only: any other would be another model, or another program.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"], ["LLaMAForCausalLM"], None),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "pretraining_tp": (1,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "chunk_size_feed_forward": (0,),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "layer_types": (None,),
    "quantization_config": (None,),
}

# Keys that change neither shapes nor arithmetic of a training step: tokens, storage, generation, provenance.
_HARMLESS = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "_commit_hash", "bos_token_id", "eos_token_id", "pad_token_id",
    "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "decoder_start_token_id", "tokenizer_class",
    "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range", "max_sequence_length",
    "is_decoder", "prefix", "task_specific_params", "finetuning_task", "problem_type", "id2label", "label2id",
    "num_labels",
    "return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    "torchscript", "tf_legacy_loss", "use_bfloat16", "gradient_checkpointing", "unsloth_version", "unsloth_fixed",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "num_return_sequences",
})  # fmt: skip

_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
}  # fmt: skip


def _read_config(path: Path) -> ModelConfig:
    """Reads a `config.json` of the Llama family by allow-list: an unknown key is an error, never ignored."""
    where = f"config {str(path)!r}"
    config = _parse(path, where)
    # What makes it another model comes first: its many foreign keys say less.
    if config.get("model_type") != "llama":
        raise SpecError(
            f"{where}: model_type={config.get('model_type')!r} is not of the Llama family; give a config of model_type "
            "'llama'."
        )
    for key, value in config.items():
        if key in _ONLY:
            _check_only(where, key, value)
        elif key not in _REQUIRED and key not in _OPTIONAL and key not in _HARMLESS:
            known = [*_REQUIRED, *_OPTIONAL, *_ONLY, *_HARMLESS]
            raise SpecError(f"{where}: the key {key!r} is not supported; {_hint(key, known)}")
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise SpecError(f"{where}: {', '.join(missing)} missing; a Llama config gives all of {', '.join(_REQUIRED)}.")

    for key in (*_REQUIRED, "num_key_value_heads", "head_dim"):
        if config.get(key) is not None:
            _check_count(where, key, config[key])
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise SpecError(f"{where}: tie_word_embeddings={tied!r} is neither true nor false.")
    epsilon = config.get("rms_norm_eps", 1e-6)
    _check_positive(where, "rms_norm_eps", epsilon)
    theta, scaling = _read_rope(where, config)

    figures = {ours: config[theirs] for theirs, ours in _REQUIRED.items()}
    head_dim = config.get("head_dim")
    if head_dim is None:
        if figures["d_model"] % figures["heads"]:
            raise SpecError(
                f"{where}: hidden_size={figures['d_model']} is no multiple of num_attention_heads={figures['heads']}; "
                f"give head_dim."
            )
        head_dim = figures["d_model"] // figures["heads"]
    kv_heads = config.get("num_key_value_heads")
    try:
        return ModelConfig(
            name=_model_name(path, config),
            kv_heads=figures["heads"] if kv_heads is None else kv_heads,
            head_dim=head_dim,
            tied=tied,
            rope_theta=float(theta),
            rope_scaling=scaling,
            norm_epsilon=float(epsilon),
            source=str(path),
            **figures,
        )
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _parse(path: Path, where: str) -> dict[str, Any]:
    def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise SpecError(f"{where}: the key {key!r} is given twice; keep one of them.")
            found[key] = value
        return found

    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except SpecError:
        raise
    except OSError as error:
        raise SpecError(f"{where} cannot be read: {error.strerror}.") from None
    except json.JSONDecodeError as error:
        raise SpecError(
            f"{where} is not valid JSON ({error.msg} at line {error.lineno}); it may be cut short: fetch it again."
        ) from None
    except (ValueError, RecursionError):  # not UTF-8, a number of thousands of digits, thousands of brackets
        raise SpecError(f"{where} is not a JSON text that can be read; fetch it again.") from None
    if not isinstance(config, dict):
        raise SpecError(f"{where} holds a JSON {type(config).__name__}, not an object of keys and values.")
    return config


def _check_only(where: str, key: str, value: Any) -> None:
    # == alone would take false for 0 and 1.0 for true: a bool must meet a bool
    if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in _ONLY[key]):
        allowed = " or ".join(json.dumps(choice) for choice in _ONLY[key])
        raise SpecError(f"{where}: {key}={json.dumps(value)} is not supported; it has to be {allowed}.")


def _hint(key: str, known: Iterable[str]) -> str:
    hint = nearest(key, known)
    # without a near name `nearest` lists all, and dozens of names would drown the sentence
    return "remove it only if it does not change the model." if hint.startswith("known:") else hint


def _read_rope(where: str, config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling from the old keys (rope_theta, rope_scaling) or the new one (rope_parameters)."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if old is not None and new is not None and old != new:
        raise SpecError(f"{where}: rope_scaling and rope_parameters disagree; keep one of them.")
    label, rope = ("rope_scaling", old) if new is None else ("rope_parameters", new)
    rope = {} if rope is None else rope
    if not isinstance(rope, dict):
        raise SpecError(f"{where}: {label}={json.dumps(rope)} is not an object of keys and values.")
    where_rope = f"{where}, {label}"
    for key in rope:
        if key not in _ROPE_KEYS:
            raise SpecError(f"{where_rope}: the key {key!r} is not supported; {nearest(key, _ROPE_KEYS)}")

    thetas = [figures["rope_theta"] for figures in (config, rope) if figures.get("rope_theta") is not None]
    for theta in thetas:
        _check_positive(where, "rope_theta", theta)
    if len(set(thetas)) > 1:
        raise SpecError(f"{where}: rope_theta is given as {thetas[0]} and as {thetas[1]}; keep one of them.")
    theta = thetas[0] if thetas else 10000.0

    kinds = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise SpecError(f"{where_rope}: rope_type={kinds[0]!r} and type={kinds[1]!r} disagree; keep one of them.")
    if rope.keys() - {"rope_theta"} and not kinds:
        raise SpecError(f"{where_rope}: rope_type is missing; it is 'llama3' or 'default'.")
    kind = kinds[0] if kinds else "default"
    if kind == "default":
        extra = sorted(rope.keys() - {"rope_theta", "rope_type", "type"})
        if extra:
            raise SpecError(f"{where_rope}: {extra[0]!r} has no meaning for rope_type 'default'; remove it.")
        return theta, None
    if kind != "llama3":
        raise SpecError(f"{where_rope}: rope_type={kind!r} is not supported; it has to be 'llama3' or 'default'.")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [key for key in keys if rope.get(key) is None]
    if missing:
        raise SpecError(f"{where_rope}: {', '.join(missing)} missing; rope_type 'llama3' takes {', '.join(keys)}.")
    for key in keys[:3]:
        _check_positive(where_rope, key, rope[key])
    try:
        scaling = RopeScaling(*(float(rope[key]) for key in keys[:3]), rope[keys[3]])
    except SpecError as error:
        raise SpecError(f"{where_rope}: {error}") from None
    return theta, scaling


def _model_name(path: Path, config: dict[str, Any]) -> str:
    """The tail of `_name_or_path`, else the folder's name for a `config.json`, else the file's stem."""
    given = config.get("_name_or_path")
    if isinstance(given, str) and given.rstrip("/"):
        return given.rstrip("/").rsplit("/", 1)[-1]
    return path.resolve().parent.name if path.name == "config.json" else path.stem
