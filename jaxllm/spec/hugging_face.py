"""Hugging Face's `config.json`, read by allow-list: an unknown key is an error, as a figure ignored is another model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.spec.errors import SpecError, nearest
from jaxllm.spec.model import ModelConfig, RopeScaling, check_count, check_positive
from jaxllm.spec.presets import DROPOUT

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

# Keys that are fine with these values only: any other would be another model, or another program.
_ONLY: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "chunk_size_feed_forward": (0,),
    "quantization_config": (None,),
}


@dataclass(frozen=True)
class _Format:
    """What a config.json of one model_type may hold, beside what is harmless in all of them.

    title     what a sentence calls the model
    required  keys that give a figure of ours
    optional  keys that `figures` reads; left out, they are what Hugging Face's own class has
    only      keys that are fine with these values only
    harmless  keys that change neither shapes nor arithmetic of a training step
    figures   (where, config, the required figures) -> the other figures of a ModelConfig
    """

    title: str
    required: dict[str, str]
    optional: frozenset[str]
    only: dict[str, tuple[Any, ...]]
    harmless: frozenset[str]
    figures: Callable[[str, dict[str, Any], dict[str, int]], dict[str, Any]]


def read_config(path: Path) -> ModelConfig:
    """The model that a `config.json` gives. Raises SpecError for what cannot be read, is not known or does not fit."""
    where = f"config {str(path)!r}"
    config = _parse(path, where)
    # What makes it another model comes first: its many foreign keys say less.
    kind = config.get("model_type")
    known = _FORMATS.get(kind) if isinstance(kind, str) else None
    if known is None:
        types = " or ".join(map(repr, _FORMATS))
        titles = " nor ".join(f"a {known.title}" for known in _FORMATS.values())
        raise SpecError(f"{where}: model_type={kind!r} is neither {titles}; give a config of model_type {types}.")
    only = _ONLY | known.only
    for key, value in config.items():
        if key in only:
            _check_only(where, key, value, only[key])
        elif key not in known.required and key not in known.optional and key not in known.harmless:
            names = [*known.required, *known.optional, *only, *known.harmless]
            raise SpecError(f"{where}: the key {key!r} is not supported; {_hint(key, names)}")
    missing = [key for key in known.required if config.get(key) is None]
    if missing:
        every = ", ".join(known.required)
        raise SpecError(f"{where}: {', '.join(missing)} missing; a {known.title} config gives all of {every}.")
    for key in known.required:
        check_count(where, key, config[key])
    figures = {ours: config[theirs] for theirs, ours in known.required.items()}
    figures |= known.figures(where, config, figures)
    try:
        return ModelConfig(name=_model_name(path, config), source=str(path), **figures)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


# ---------------------------------------------------------------- the two formats


def _llama(where: str, config: dict[str, Any], figures: dict[str, int]) -> dict[str, Any]:
    """What is left of a Llama: heads of keys and values, head size, tied or not, epsilon, rotary positions."""
    for key in ("num_key_value_heads", "head_dim"):
        if config.get(key) is not None:
            check_count(where, key, config[key])
    tied = _flag(where, config, "tie_word_embeddings", default=False)
    epsilon = config.get("rms_norm_eps", 1e-6)
    check_positive(where, "rms_norm_eps", epsilon)
    theta, scaling = _read_rope(where, config)
    head_dim = config.get("head_dim")
    if head_dim is None:
        if figures["d_model"] % figures["heads"]:
            raise SpecError(
                f"{where}: hidden_size={figures['d_model']} is no multiple of num_attention_heads={figures['heads']}; "
                f"give head_dim."
            )
        head_dim = figures["d_model"] // figures["heads"]
    kv_heads = config.get("num_key_value_heads")
    return {
        "kv_heads": figures["heads"] if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "tied": tied,
        "rope_theta": float(theta),
        "rope_scaling": scaling,
        "norm_epsilon": float(epsilon),
    }


def _gpt2(where: str, config: dict[str, Any], figures: dict[str, int]) -> dict[str, Any]:
    """What is left of a GPT-2: feed-forward width, head size, tied or not, epsilon, and dropout, which is not built."""
    if config.get("n_inner") is not None:
        check_count(where, "n_inner", config["n_inner"])
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    check_positive(where, "layer_norm_epsilon", epsilon)
    if figures["d_model"] % figures["heads"]:
        raise SpecError(f"{where}: n_embd={figures['d_model']} is no multiple of n_head={figures['heads']}.")
    if config.get("n_ctx", figures["max_sequence"]) != figures["max_sequence"]:
        raise SpecError(
            f"{where}: n_ctx={json.dumps(config['n_ctx'])} is not n_positions={figures['max_sequence']}; both are the "
            "number of positions: keep one of them."
        )
    return {
        "kv_heads": figures["heads"],
        "head_dim": figures["d_model"] // figures["heads"],
        "d_ff": 4 * figures["d_model"] if config.get("n_inner") is None else config["n_inner"],
        "tied": _flag(where, config, "tie_word_embeddings", default=True),
        "norm_epsilon": float(epsilon),
        "note": _dropout(where, config),
        "family": "gpt",
    }


def _dropout(where: str, config: dict[str, Any]) -> str:
    """What is to be said of the dropout that a config asks for; nothing where it asks for none.

    A step has no dropout. Shapes, matmuls and collectives are those of the model; its losses are those of training
    without dropout, and that must not go unsaid. Left out, the rates are 0.1 (Hugging Face's GPT2Config).
    """
    rates = {key: config.get(key, 0.1) for key in _RATES}
    for key, rate in rates.items():
        if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 <= rate < 1:
            raise SpecError(f"{where}: {key}={json.dumps(rate)} is not a rate of dropout from 0 to below 1.")
    if not any(rates.values()):
        return ""
    told = list(dict.fromkeys(f"{rate:g}" for rate in rates.values()))
    return DROPOUT.format(told[0] if len(told) == 1 else ", ".join(f"{key} {rate:g}" for key, rate in rates.items()))


_RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")

_FORMATS = {
    "llama": _Format(
        title="Llama",
        required={
            "num_hidden_layers": "layers",
            "hidden_size": "d_model",
            "intermediate_size": "d_ff",
            "num_attention_heads": "heads",
            "vocab_size": "vocab",
            "max_position_embeddings": "max_sequence",
        },
        optional=frozenset({
            "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
            "tie_word_embeddings",
        }),
        only={
            "model_type": ("llama",),
            "architectures": (["LlamaForCausalLM"], ["LLaMAForCausalLM"], None),
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "attention_dropout": (0,),
            "pretraining_tp": (1,),
            "partial_rotary_factor": (1, None),
            "sliding_window": (None,),
            "layer_types": (None,),
        },
        harmless=_HARMLESS,
        figures=_llama,
    ),
    "gpt2": _Format(
        title="GPT-2",
        required={
            "n_layer": "layers",
            "n_embd": "d_model",
            "n_head": "heads",
            "n_positions": "max_sequence",
            "vocab_size": "vocab",
        },
        optional=frozenset({"n_inner", "n_ctx", "layer_norm_epsilon", "tie_word_embeddings", *_RATES}),
        only={
            "model_type": ("gpt2",),
            "architectures": (["GPT2LMHeadModel"], None),
            "activation_function": ("gelu_new",),  # the tanh form; "gelu" is another function
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
        },
        # The summary is a head of classifiers, which a language model lacks.
        harmless=_HARMLESS | {
            "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
            "summary_use_proj",
        },
        figures=_gpt2,
    ),
}  # fmt: skip

_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
}  # fmt: skip


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
        check_positive(where, "rope_theta", theta)
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
        check_positive(where_rope, key, rope[key])
    try:
        scaling = RopeScaling(*(float(rope[key]) for key in keys[:3]), rope[keys[3]])
    except SpecError as error:
        raise SpecError(f"{where_rope}: {error}") from None
    return theta, scaling


# ---------------------------------------------------------------- the text


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


def _flag(where: str, config: dict[str, Any], key: str, *, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise SpecError(f"{where}: {key}={value!r} is neither true nor false.")
    return value


def _check_only(where: str, key: str, value: Any, choices: tuple[Any, ...]) -> None:
    # == alone would take false for 0 and 1.0 for true: a bool must meet a bool
    if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in choices):
        allowed = " or ".join(json.dumps(choice) for choice in choices)
        raise SpecError(f"{where}: {key}={json.dumps(value)} is not supported; it has to be {allowed}.")


def _hint(key: str, known: Iterable[str]) -> str:
    hint = nearest(key, known)
    # without a near name `nearest` lists all, and dozens of names would drown the sentence
    return "remove it only if it does not change the model." if hint.startswith("known:") else hint


def _model_name(path: Path, config: dict[str, Any]) -> str:
    """The tail of `_name_or_path`, else the folder's name for a `config.json`, else the file's stem."""
    given = config.get("_name_or_path")
    if isinstance(given, str) and given.rstrip("/"):
        return given.rstrip("/").rsplit("/", 1)[-1]
    return path.resolve().parent.name if path.name == "config.json" else path.stem
