import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.spec.errors import SpecError
from jaxllm.spec.model import ModelConfig, RopeScaling

# Parameter counts as published for the checkpoints on Hugging Face (huggyllama/llama-*, meta-llama/Llama-*). For
# llama-1-33b and llama-3.2-3b only 32.5B (arXiv:2302.13971, Table 2) and 3.21B (model card) are printed; their counts
# are added up by hand from the shapes that their config.json gives.
PUBLISHED = {
    "llama-1-7b": 6738415616,
    "llama-1-13b": 13015864320,
    "llama-1-33b": 32528943616,
    "llama-1-65b": 65285660672,
    "llama-2-7b": 6738415616,
    "llama-2-13b": 13015864320,
    "llama-2-70b": 68976648192,
    "llama-3-8b": 8030261248,
    "llama-3-70b": 70553706496,
    "llama-3.1-8b": 8030261248,
    "llama-3.1-70b": 70553706496,
    "llama-3.1-405b": 405853388800,
    "llama-3.2-1b": 1235814400,
    "llama-3.2-3b": 3212749824,
    "gpt2": 124439808,  # openai-community/gpt2
}

# Layers, width, heads and parameters in billions, of Table 1 of Narayanan et al. 2021 and Table 3 of Korthikanti et al.
# 2022, which has the layers and widths of the last two from Table 1.
MEGATRON = {
    "megatron-1.7b": (24, 2304, 24, 1.7),
    "megatron-3.6b": (30, 3072, 32, 3.6),
    "megatron-7.5b": (36, 4096, 32, 7.5),
    "megatron-18.4b": (40, 6144, 48, 18.4),
    "megatron-39.1b": (48, 8192, 64, 39.1),
    "megatron-76.1b": (60, 10240, 80, 76.1),
    "megatron-145.6b": (80, 12288, 96, 145.6),
    "megatron-310.1b": (96, 16384, 128, 310.1),
    "megatron-529.6b": (105, 20480, 128, 529.6),
    "megatron-1008b": (128, 25600, 160, 1008.0),
    "megatron-22b": (48, 6144, 64, 22.1),
    "megatron-175b": (96, 12288, 96, 174.6),
    "megatron-530b": (105, 20480, 128, 529.6),
    "megatron-1t": (128, 25600, 160, 1008.0),
}
TINY = {"llama-tiny", "gpt-tiny"}

LLAMA_1_33B = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 6656, "initializer_range": 0.02, "intermediate_size": 17920, "max_position_embeddings": 2048,
    "max_sequence_length": 2048, "model_type": "llama", "num_attention_heads": 52, "num_hidden_layers": 60,
    "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.28.0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA_2_70B = {
    "_name_or_path": "meta-llama/Llama-2-70b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 8192, "initializer_range": 0.02,
    "intermediate_size": 28672, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 64,
    "num_hidden_layers": 80, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.32.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
LLAMA_3_2_3B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 128, "hidden_act": "silu", "hidden_size": 3072,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 24, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
# The form that transformers 5 writes: rope_parameters for rope_theta and rope_scaling, dtype for torch_dtype.
LLAMA_3_1_405B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "dtype": "bfloat16", "eos_token_id": 128001, "head_dim": 128, "hidden_act": "silu", "hidden_size": 16384,
    "initializer_range": 0.02, "intermediate_size": 53248, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 128, "num_hidden_layers": 126, "num_key_value_heads": 8,
    "pad_token_id": None, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_parameters": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                        "original_max_position_embeddings": 8192, "rope_theta": 500000.0, "rope_type": "llama3"},
    "tie_word_embeddings": False, "transformers_version": "5.0.0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip


GPT_2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
}  # fmt: skip


def load(tmp_path, config, name="config.json"):
    path = tmp_path / name
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return ModelConfig.load(str(path))


def refused(tmp_path, config, *says):
    with pytest.raises(SpecError) as error:
        load(tmp_path, config)
    for words in says:
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def figures(model):
    return {key: value for key, value in dataclasses.asdict(model).items() if key not in ("name", "source")}


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(name, count):
    model = ModelConfig.load(name)
    assert model.parameters == count
    assert sum(model.parameter_table().values()) == count


def test_every_published_size_and_nothing_else_is_a_preset():
    assert set(ModelConfig.presets()) == {*PUBLISHED, *MEGATRON, *TINY, "gpt3-175b"}
    assert all(model.name == name and model.source for name, model in ModelConfig.presets().items())


@pytest.mark.parametrize(
    ("family", "context", "theta", "epsilon", "factor"),
    [
        ("llama-1-", 2048, 1e4, 1e-6, None),
        ("llama-2-", 4096, 1e4, 1e-5, None),
        ("llama-3-", 8192, 5e5, 1e-5, None),
        ("llama-3.1-", 131072, 5e5, 1e-5, 8),
        ("llama-3.2-", 131072, 5e5, 1e-5, 32),
    ],
)
def test_what_a_family_shares(family, context, theta, epsilon, factor):
    models = [model for name, model in ModelConfig.presets().items() if name.startswith(family)]
    assert models
    for model in models:
        assert (model.max_sequence, model.rope_theta, model.norm_epsilon) == (context, theta, epsilon)
        assert model.tied == (family == "llama-3.2-")
        assert model.heads * model.head_dim == model.d_model
        if factor is None:
            assert model.rope_scaling is None
        else:
            assert model.rope_scaling == RopeScaling(factor, 1, 4, 8192)


@pytest.mark.parametrize(("name", "figures"), MEGATRON.items())
def test_the_papers_tables_and_their_counts(name, figures):
    model = ModelConfig.load(name)
    layers, width, heads, billions = figures
    assert (model.layers, model.d_model, model.heads) == (layers, width, heads)
    assert (model.vocab, model.max_sequence) == (51200, 2048)
    assert round(model.parameters / 1e9, 1) == billions
    # Narayanan et al. 2021, equation 2: 12 l h^2 (1 + 13/(12 h) + (V + s)/(12 l h)). It leaves out the last LayerNorm.
    equation_2 = 12 * layers * width**2 + 13 * layers * width + (51200 + 2048) * width
    assert model.parameters == equation_2 + 2 * width


def test_gpt3_is_counted_with_its_padded_vocabulary():
    model = ModelConfig.load("gpt3-175b")
    # 174,604,259,328 with GPT-2's 50,257 entries, as added up from the shapes
    assert model.parameters == 174604259328 + (51200 - 50257) * 12288
    assert dataclasses.replace(model, vocab=50257).parameters == 174604259328
    twin = ModelConfig.load("megatron-175b")
    assert figures(twin) == figures(model)


def test_every_gpt_has_the_shape_that_all_of_them_have():
    models = [model for model in ModelConfig.presets().values() if model.family == "gpt"]
    assert len(models) == 2 + len(MEGATRON) + 1
    for model in models:
        assert model.heads * model.head_dim == model.d_model and model.kv_heads == model.heads
        assert model.d_ff == 4 * model.d_model and model.tied
        assert model.rope_theta is None and model.rope_scaling is None
        assert not [figure for figure, _, _ in model.describe() if "rotary" in figure]
        assert not {"rope_theta", "rope_scaling"} & set(model.to_json())


def test_the_tiny_gpt_divides_by_sixteen():
    tiny = ModelConfig.load("gpt-tiny")
    assert all(figure % 16 == 0 for figure in (tiny.layers, tiny.heads, tiny.d_model, tiny.d_ff, tiny.vocab))
    assert (tiny.head_dim, tiny.max_sequence) == (8, 4096)


def test_the_parameter_table_of_a_gpt_counts_each_array():
    assert ModelConfig.load("gpt2").parameter_table() == {
        "embed": 50257 * 768, "positions": 1024 * 768, "attention_norm": 12 * 768, "attention_norm_bias": 12 * 768,
        "q": 12 * 768 * 768, "q_bias": 12 * 768, "k": 12 * 768 * 768, "k_bias": 12 * 768, "v": 12 * 768 * 768,
        "v_bias": 12 * 768, "o": 12 * 768 * 768, "o_bias": 12 * 768, "mlp_norm": 12 * 768, "mlp_norm_bias": 12 * 768,
        "up": 12 * 768 * 3072, "up_bias": 12 * 3072, "down": 12 * 3072 * 768, "down_bias": 12 * 768,
        "final_norm": 768, "final_norm_bias": 768,
    }  # fmt: skip
    untied = dataclasses.replace(ModelConfig.load("gpt-tiny"), tied=False)
    assert untied.parameter_table()["head"] == 128 * 512


def test_the_tiny_model_divides_by_sixteen_and_groups_its_queries():
    tiny = ModelConfig.load("llama-tiny")
    assert tiny.layers >= 16 and tiny.kv_heads == 8 and tiny.heads > tiny.kv_heads and not tiny.tied
    assert tiny.heads * tiny.head_dim == tiny.d_model
    assert all(figure % 16 == 0 for figure in (tiny.layers, tiny.heads, tiny.d_model, tiny.d_ff, tiny.vocab))
    assert tiny.max_sequence >= 4096


def test_the_parameter_table_counts_each_array():
    table = ModelConfig.load("llama-tiny").parameter_table()
    assert table == {
        "embed": 512 * 128, "attention_norm": 16 * 128, "q": 16 * 128 * 128, "k": 16 * 128 * 64, "v": 16 * 128 * 64,
        "o": 16 * 128 * 128, "mlp_norm": 16 * 128, "gate": 16 * 128 * 512, "up": 16 * 128 * 512,
        "down": 16 * 512 * 128, "final_norm": 128, "head": 128 * 512,
    }  # fmt: skip
    assert "head" not in ModelConfig.load("llama-3.2-1b").parameter_table()


def test_models_describe_themselves_with_sources_and_as_json():
    model = ModelConfig.load("llama-3.1-8b")
    rows = {figure: (value, source) for figure, value, source in model.describe()}
    assert rows["parameters"][0] == "8,030,261,248"
    assert rows["layers L"] == ("32", model.source)
    assert all(source for _, source in rows.values())
    data = json.loads(json.dumps(model.to_json()))
    assert (data["name"], data["parameters"], data["layers"]) == ("llama-3.1-8b", 8030261248, 32)
    assert data["rope_scaling"]["factor"] == 8
    assert sum(data["parameter_table"].values()) == data["parameters"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("llama-3-8", "did you mean 'llama-3-8b'?"),
        ("Llama-3.1-405B", "did you mean 'llama-3.1-405b'?"),
        ("", "jaxllm models lists what is known"),
        ("no/such/config.json", "there is no file 'no/such/config.json'"),
        ("config.jsn.json", "there is no file"),
    ],
)
def test_an_unknown_model_is_named_with_the_nearest(text, says):
    with pytest.raises(SpecError, match="model: ") as error:
        ModelConfig.load(text)
    assert says in str(error.value)


@settings(deadline=None)
@given(st.text())
def test_arbitrary_names_raise_nothing_but_spec_error(text):
    try:
        assert text in ModelConfig.presets() or ModelConfig.load(text) is None
    except SpecError:
        pass


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"heads": 12}, "12 query heads are no multiple of 8"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"layers": 0}, "layers=0"),
        ({"layers": True}, "layers=True"),
        ({"d_ff": -1}, "d_ff=-1"),
        ({"vocab": 1.5}, "vocab=1.5"),
        ({"vocab": 10**9}, "below 10^9"),
        ({"tied": 1}, "tied=1"),
        ({"norm_epsilon": 0}, "norm_epsilon=0"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
    ],
)
def test_figures_are_checked_where_a_model_is_made(change, says):
    with pytest.raises(SpecError, match=r"^model 'llama-tiny': ") as error:
        dataclasses.replace(ModelConfig.load("llama-tiny"), **change)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"family": "gtp"}, "family='gtp' is unknown; did you mean 'gpt'?"),
        ({"kv_heads": 8}, "kv_heads=8 is not heads=16"),
        ({"rope_theta": 1e4}, "rotary positions are not a GPT's"),
        ({"family": "llama"}, "rope_theta=None"),
        ({"d_ff": 0}, "d_ff=0"),
    ],
)
def test_figures_of_a_gpt_are_checked_where_it_is_made(change, says):
    with pytest.raises(SpecError, match=r"^model 'gpt-tiny': ") as error:
        dataclasses.replace(ModelConfig.load("gpt-tiny"), **change)
    assert says in str(error.value)


@pytest.mark.parametrize("wrong", [(0.5, 1, 4, 8192), (8, 4, 4, 8192), (8, 1, 4, 0), (8, -1, 4, 8192), (8, 1, True, 1)])
def test_rope_scaling_is_checked(wrong):
    with pytest.raises(SpecError, match="rope scaling"):
        RopeScaling(*wrong)


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    ("config", "preset"),
    [
        (LLAMA_1_33B, "llama-1-33b"),
        (LLAMA_2_70B, "llama-2-70b"),
        (LLAMA_3_8B, "llama-3-8b"),
        (LLAMA_3_1_405B, "llama-3.1-405b"),
        (LLAMA_3_2_3B, "llama-3.2-3b"),
        (GPT_2, "gpt2"),
    ],
)
def test_a_published_config_gives_the_preset(tmp_path, config, preset):
    model = load(tmp_path, config)
    assert figures(model) == figures(ModelConfig.load(preset))
    assert model.source == str(tmp_path / "config.json")


def test_old_and_new_rotary_keys_say_the_same(tmp_path):
    old = dict(LLAMA_3_2_3B)
    new = {key: value for key, value in old.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    new |= {"rope_parameters": old["rope_scaling"] | {"rope_theta": 5e5}, "dtype": "bfloat16"}
    oldest = old | {"rope_scaling": {k: v for k, v in old["rope_scaling"].items() if k != "rope_type"}}
    oldest["rope_scaling"]["type"] = "llama3"
    assert figures(load(tmp_path, new)) == figures(load(tmp_path, old)) == figures(load(tmp_path, oldest))


@pytest.mark.parametrize(
    "rope", [None, {"rope_type": "default"}, {"type": "default"}, {"rope_type": "default", "rope_theta": 5e5}]
)
def test_default_rotary_positions_have_no_scaling(tmp_path, rope):
    for key in ("rope_scaling", "rope_parameters"):
        model = load(tmp_path, {k: v for k, v in LLAMA_3_8B.items() if k != "rope_scaling"} | {key: rope})
        assert (model.rope_scaling, model.rope_theta) == (None, 5e5)


def test_defaults_are_those_of_the_format(tmp_path):
    needed = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "vocab_size", "max_position_embeddings")  # fmt: skip
    model = load(tmp_path, {key: LLAMA_1_33B[key] for key in needed})
    assert (model.kv_heads, model.head_dim, model.tied) == (52, 128, False)
    assert (model.rope_theta, model.rope_scaling, model.norm_epsilon) == (1e4, None, 1e-6)
    explicit = load(tmp_path, LLAMA_1_33B | {"head_dim": None, "num_key_value_heads": None, "rope_parameters": None})
    assert figures(explicit) == figures(model)


def test_defaults_of_a_gpt_are_those_of_the_format(tmp_path):
    needed = ("model_type", "n_layer", "n_embd", "n_head", "n_positions", "vocab_size")
    model = load(tmp_path, {key: GPT_2[key] for key in needed})
    assert figures(model) == figures(ModelConfig.load("gpt2"))
    other = load(tmp_path, GPT_2 | {"n_inner": 2048, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-6})
    assert (other.d_ff, other.tied, other.norm_epsilon) == (2048, False, 1e-6)


@pytest.mark.parametrize(
    ("rates", "says"),
    [
        ({}, "dropout of 0.1 is not built"),
        ({"attn_pdrop": 0.0}, "dropout of resid_pdrop 0.1, embd_pdrop 0.1, attn_pdrop 0 is not built"),
        ({"attn_pdrop": 0, "resid_pdrop": 0.0, "embd_pdrop": 0}, ""),
    ],
)
def test_dropout_is_never_left_out_in_silence(tmp_path, rates, says):
    model = load(tmp_path, GPT_2 | rates)
    assert model.note.startswith(says) and bool(model.note) == bool(says)
    assert [value for figure, value, _ in model.describe() if figure == "note"] == ([model.note] if says else [])
    assert model.to_json()["note"] == model.note


def test_head_dim_need_not_divide_the_width(tmp_path):
    config = LLAMA_3_8B | {"hidden_size": 5120, "num_attention_heads": 32, "head_dim": 128}
    assert load(tmp_path, config).parameter_table()["q"] == 32 * 5120 * 4096
    refused(tmp_path, {k: v for k, v in config.items() if k != "head_dim"} | {"hidden_size": 5000}, "give head_dim")


def test_a_model_is_named_by_its_origin_its_folder_or_its_file(tmp_path):
    assert load(tmp_path, LLAMA_2_70B).name == "Llama-2-70b-hf"
    folder = tmp_path / "my-llama"
    folder.mkdir()
    assert load(folder, LLAMA_3_8B).name == "my-llama"
    assert ModelConfig.load(folder).name == "my-llama"
    assert load(tmp_path, LLAMA_3_8B, "eight.json").name == "eight"


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(SpecError, match="holds no config.json"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "mistral"}, "model_type='mistral' is neither a Llama nor a GPT-2; give a config of model_type "),
        ({"model_type": ["llama"]}, "model_type=['llama'] is neither"),
        ({"model_type": None}, "model_type=None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
        ({"attention_bias": True}, "attention_bias=true is not supported; it has to be false"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"attention_bias": 0}, "attention_bias=0"),
        ({"hidden_act": "gelu"}, 'it has to be "silu"'),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"pretraining_tp": True}, "pretraining_tp=true"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"num_local_experts": 8}, "'num_local_experts' is not supported"),
        ({"hiden_size": 4096}, "did you mean 'hidden_size'?"),
        ({"hidden_size": None}, "hidden_size missing"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"hidden_size": "4096"}, "hidden_size='4096'"),
        ({"hidden_size": -4096}, "hidden_size=-4096"),
        ({"hidden_size": 4096.0}, "hidden_size=4096.0"),
        ({"hidden_size": 10**500}, "below 10^9"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"num_key_value_heads": 5}, "32 query heads are no multiple of 5"),
        ({"head_dim": 127}, "head_dim=127 is odd"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
        ({"rope_theta": -1}, "rope_theta=-1"),
        ({"rope_theta": 10**400}, "rope_theta="),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is given as 10000.0 and as 500000.0"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_type='linear' is not supported"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "rope_type=['llama3'] is not supported"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_type is missing"),
        ({"rope_scaling": {"rope_type": "default", "factor": 8.0}}, "'factor' has no meaning"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor, high_freq_factor"),
        ({"rope_scaling": {"rope_type": "llama3", "type": "yarn"}}, "disagree"),
        ({"rope_scaling": {"rope_type": "llama3", "beta_fast": 32}}, "'beta_fast' is not supported"),
        ({"rope_scaling": LLAMA_3_2_3B["rope_scaling"] | {"factor": "32"}}, "factor='32'"),
        ({"rope_scaling": LLAMA_3_2_3B["rope_scaling"] | {"low_freq_factor": 4.0}}, "must be below"),
        ({"rope_scaling": LLAMA_3_2_3B["rope_scaling"], "rope_parameters": {"rope_type": "default"}}, "disagree"),
        ({"rope_scaling": 8.0}, "rope_scaling=8.0 is not an object"),
    ],
)  # fmt: skip
def test_what_is_neither_supported_nor_harmless_is_refused(tmp_path, change, says):
    refused(tmp_path, LLAMA_3_8B | change, says, "config")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["GPT2ForSequenceClassification"]}, "architectures="),
        ({"activation_function": "gelu"}, 'activation_function="gelu" is not supported; it has to be "gelu_new"'),
        ({"scale_attn_weights": False}, "scale_attn_weights=false is not supported; it has to be true"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=true"),
        ({"add_cross_attention": True}, "add_cross_attention=true"),
        ({"n_ctx": 2048}, "n_ctx=2048 is not n_positions=1024"),
        ({"n_ctx": None}, "n_ctx=null is not n_positions=1024"),
        ({"n_head": 7}, "n_embd=768 is no multiple of n_head=7"),
        ({"n_inner": 0}, "n_inner=0"),
        ({"n_embd": None}, "n_embd missing; a GPT-2 config gives all of n_layer"),
        ({"n_layer": 12.0}, "n_layer=12.0"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon=0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 is neither true nor false"),
        ({"attn_pdrop": 1}, "attn_pdrop=1 is not a rate of dropout from 0 to below 1"),
        ({"resid_pdrop": "0.1"}, 'resid_pdrop="0.1" is not a rate'),
        ({"embd_pdrop": True}, "embd_pdrop=true is not a rate"),
        ({"hidden_size": 768}, "'hidden_size' is not supported"),
        ({"n_postions": 1024}, "did you mean 'n_positions'?"),
    ],
)  # fmt: skip
def test_what_is_not_a_plain_gpt_is_refused(tmp_path, change, says):
    refused(tmp_path, GPT_2 | change, says, "config")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (json.dumps(LLAMA_3_8B)[:300], "may be cut short"),
        ("", "may be cut short"),
        ("[1, 2]", "holds a JSON list"),
        ('{"hidden_size": 1, "hidden_size": 2}', "'hidden_size' is given twice"),
        ("[" * 100000, "not"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "not"),
    ],
)
def test_what_is_not_a_json_object_is_refused(tmp_path, text, says):
    refused(tmp_path, text, says)


def test_what_is_not_text_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(SpecError, match="not a JSON text"):
        ModelConfig.load(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@pytest.mark.parametrize("config", [LLAMA_3_2_3B, GPT_2], ids=["llama", "gpt"])
@settings(deadline=None)
@given(st.data())
def test_wrong_values_raise_nothing_but_spec_error(tmp_path_factory, config, data):
    change = data.draw(st.dictionaries(st.sampled_from(sorted(config)), values, min_size=1, max_size=2))
    path = tmp_path_factory.getbasetemp() / "wrong-values.json"
    path.write_text(json.dumps(config | change))
    try:
        assert ModelConfig.load(path).parameters > 0
    except SpecError as error:
        assert "\n" not in str(error)
