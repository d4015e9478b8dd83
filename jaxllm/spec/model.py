"""ModelConfig: what is trained, a decoder of the Llama or of the GPT family.

Symbols: L layers, D d_model, F d_ff, N heads, K kv_heads, H head_dim, V vocab, P max_sequence.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxllm.spec.errors import SpecError, nearest

LIMIT = 10**9  # no dim of a model is as large; keeps typing errors and memory figures sane

# What makes a block of each family another one; the arithmetic is in jaxllm/model.
FAMILIES = {
    "llama": "RMSNorm, rotary positions, grouped-query attention, gated SiLU feed-forward, no biases",
    "gpt": "LayerNorm, learned positions, GELU feed-forward, biases",
}


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
            check_positive("rope scaling", name, getattr(self, name))
        check_count("rope scaling", "original_sequence", self.original_sequence)
        if self.factor < 1:
            raise SpecError(f"rope scaling: factor={self.factor} shortens the context; it must be 1 or more.")
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise SpecError(
                f"rope scaling: low_frequency_factor={self.low_frequency_factor} must be below "
                f"high_frequency_factor={self.high_frequency_factor}; Llama 3 uses 1 and 4."
            )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: embedding, equal blocks, a norm and a head. `family` says what the blocks are made of, see FAMILIES.

    Rotary positions are a Llama's; a GPT learns max_sequence positions, and each of its heads has its own keys and
    values.
    """

    name: str
    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # the head is the transposed embedding
    norm_epsilon: float
    max_sequence: int  # tokens
    source: str  # where the figures come from
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    note: str = ""  # what the source asks for and a step does not do
    family: str = "llama"

    def __post_init__(self) -> None:
        where = f"model {self.name!r}"
        if self.family not in FAMILIES:
            raise SpecError(f"{where}: family={self.family!r} is unknown; {nearest(str(self.family), FAMILIES)}")
        for name in ("layers", "d_model", "d_ff", "heads", "kv_heads", "head_dim", "vocab", "max_sequence"):
            check_count(where, name, getattr(self, name))
        check_positive(where, "norm_epsilon", self.norm_epsilon)
        if not isinstance(self.tied, bool):
            raise SpecError(f"{where}: tied={self.tied!r} is neither true nor false.")
        if self.family == "gpt":
            self._check_gpt(where)
        else:
            self._check_llama(where)

    def _check_llama(self, where: str) -> None:
        check_positive(where, "rope_theta", self.rope_theta)
        if self.heads % self.kv_heads:
            raise SpecError(
                f"{where}: {self.heads} query heads are no multiple of {self.kv_heads} key/value heads; "
                f"every key/value head serves the same number of query heads."
            )
        if self.head_dim % 2:
            raise SpecError(f"{where}: head_dim={self.head_dim} is odd, and rotary positions turn pairs; make it even.")

    def _check_gpt(self, where: str) -> None:
        if self.rope_theta is not None or self.rope_scaling is not None:
            raise SpecError(f"{where}: rotary positions are not a GPT's, which learns its positions; leave them out.")
        if self.kv_heads != self.heads:
            raise SpecError(
                f"{where}: kv_heads={self.kv_heads} is not heads={self.heads}; each head of a GPT has keys and values "
                "of its own."
            )

    @classmethod
    def load(cls, text: str | os.PathLike[str]) -> ModelConfig:
        """A preset by its name, or the `config.json` at a path (or in a folder). Raises SpecError on anything else."""
        from jaxllm.spec.hugging_face import read_config  # both make a ModelConfig

        text = os.fspath(text)
        known = cls.presets()
        if text in known:
            return known[text]
        if os.path.isdir(text):
            path = Path(text) / "config.json"
            if not path.is_file():
                raise SpecError(f"model: the folder {text!r} holds no config.json.")
            return read_config(path)
        if os.path.isfile(text):
            return read_config(Path(text))
        if "/" in text or text.endswith(".json"):
            raise SpecError(f"model: there is no file {text!r}; give a config.json, or a name such as llama-3-8b.")
        near = nearest(text.lower(), known)
        # Without a near name it lists all of them, and dozens would drown the sentence.
        hint = "jaxllm models lists what is known." if near.startswith("known:") else near
        raise SpecError(f"model: unknown name {text!r}; {hint}")

    @staticmethod
    def presets() -> dict[str, ModelConfig]:
        """Every known model by its name, family by family."""
        from jaxllm.spec.presets import PRESETS

        return dict(PRESETS)

    def parameter_table(self) -> dict[str, int]:
        """Number of parameters of each array, all layers together; `head` is left out when it is tied."""
        table = {"embed": self.vocab * self.d_model}
        if self.family == "gpt":
            table["positions"] = self.max_sequence * self.d_model
        table |= {name: self.layers * count for name, count in self._block_table().items()}
        table["final_norm"] = self.d_model
        if self.family == "gpt":
            table["final_norm_bias"] = self.d_model
        if not self.tied:
            table["head"] = self.d_model * self.vocab
        return table

    def _block_table(self) -> dict[str, int]:
        """Number of parameters of each array of one block."""
        D, F, N, K = self.d_model, self.d_ff, self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.family == "gpt":
            return {
                "attention_norm": D, "attention_norm_bias": D, "q": D * N, "q_bias": N, "k": D * K, "k_bias": K,
                "v": D * K, "v_bias": K, "o": N * D, "o_bias": D, "mlp_norm": D, "mlp_norm_bias": D, "up": D * F,
                "up_bias": F, "down": F * D, "down_bias": D,
            }  # fmt: skip
        return {
            "attention_norm": D, "q": D * N, "k": D * K, "v": D * K, "o": N * D, "mlp_norm": D, "gate": D * F,
            "up": D * F, "down": F * D,
        }  # fmt: skip

    @property
    def parameters(self) -> int:
        """All of them, the embedding and the head once where they are tied.

        Llama  L(2DNH + 2DKH + 3DF + 2D) + VD (twice if not tied) + D
        GPT    L(4DNH + 2DF + 3NH + F + 6D) + (V + P)D (V twice if not tied) + 2D: Narayanan et al. 2021, equation 2,
               and the last LayerNorm
        """
        return sum(self.parameter_table().values())

    def describe(self) -> list[tuple[str, str, str]]:
        """Rows (figure, value with unit, source) for a table."""
        rows = [
            ("family", f"{self.family}: {FAMILIES[self.family]}"),
            ("layers L", f"{self.layers:,}"),
            ("model width D", f"{self.d_model:,}"),
            ("feed-forward width F", f"{self.d_ff:,}"),
            ("query heads N", f"{self.heads:,}"),
            ("key/value heads K", f"{self.kv_heads:,}"),
            ("head size H", f"{self.head_dim:,}"),
            ("vocabulary V", f"{self.vocab:,}"),
            ("tied embeddings", "yes" if self.tied else "no"),
            ("norm epsilon", f"{self.norm_epsilon:g}"),
            ("context", f"{self.max_sequence:,} tokens"),
        ]
        if self.rope_theta is not None:
            rows[-2:-2] = [
                ("rotary base", f"{self.rope_theta:,.10g}"),
                ("rotary scaling", _scaling_text(self.rope_scaling)),
            ]
        if self.note:
            rows.append(("note", self.note))
        described = [(figure, value, self.source) for figure, value in rows]
        counted = "computed from the figures above"
        described.append(("parameters", f"{self.parameters:,}", counted))
        parts = self.parameter_table().items()
        return described + [(f"parameters of {name}", f"{count:,}", counted) for name, count in parts]

    def to_json(self) -> dict[str, Any]:
        """The figures, the parameter count and its parts, as JSON takes them."""
        data = asdict(self)
        name = data.pop("name")
        if self.family == "gpt":
            del data["rope_theta"], data["rope_scaling"]
        return {"name": name, "parameters": self.parameters, **data, "parameter_table": self.parameter_table()}


def _scaling_text(scaling: RopeScaling | None) -> str:
    if scaling is None:
        return "none"
    return (
        f"factor {scaling.factor:g} beyond {scaling.original_sequence:,} tokens, low frequencies below "
        f"{scaling.low_frequency_factor:g}, high above {scaling.high_frequency_factor:g} turns"
    )


def check_count(where: str, name: str, value: Any) -> None:
    """Raises SpecError for what is no whole number from 1 to LIMIT."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < LIMIT:
        raise SpecError(f"{where}: {name}={value!r} is not a whole number from 1 to below 10^9.")


def check_positive(where: str, name: str, value: Any) -> None:
    """Raises SpecError for what is no positive number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
        raise SpecError(f"{where}: {name}={value!r} is not a positive number of reasonable size.")
