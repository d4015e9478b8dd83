from dataclasses import replace

import pytest

from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.validate import default_batch, default_sequence, validate
from jaxllm.spec.workload import Workload

GPT2 = ModelConfig.load("gpt2")
LLAMA = ModelConfig.load("llama-3-8b")  # 32 query heads, 8 key/value heads, d_ff 14,336, 8,192 tokens


def refused(match, layout, devices, *, model=LLAMA, batch=None, sequence=4096):
    with pytest.raises(SpecError, match=match) as caught:
        validate(model, layout, devices, Workload(batch or default_batch(layout), sequence))
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".") and ";" in sentence


def test_what_goes_together():
    for layout in (Layout(data=8), Layout(tensor=8), Layout(replica=2, data=2, tensor=2, zero=3, microbatches=4)):
        validate(LLAMA, layout, 8, Workload(default_batch(layout), 8192))
    # more devices than key/value heads repeat them: 16 is a multiple of 8
    validate(LLAMA, Layout(tensor=16), 16, Workload(1, 4096))
    validate(LLAMA, Layout(tensor=4), 4, Workload(1, 4096))


def test_degrees_multiply_to_the_size_of_the_mesh():
    refused(
        r"needs 8 devices \(replica 1 x data 4 x tensor 2\), but the mesh has 16; data=8 would",
        Layout(data=4, tensor=2),
        16,
    )
    refused("take a mesh of 6", Layout(data=2, tensor=3), 8)


def test_tensor_divides_query_heads_and_feed_forward():
    refused("tensor=3 does not divide the 32 query heads of llama-3-8b; tensor=1 or 2 or 4", Layout(tensor=3), 3)
    refused("32 query heads", Layout(tensor=64), 64)
    odd = replace(LLAMA, d_ff=14_340)
    refused("tensor=8 does not divide the 14,340 feed-forward columns", Layout(tensor=8), 8, model=odd)


def test_tensor_divides_the_key_value_heads_or_is_a_multiple_of_them():
    model = replace(LLAMA, heads=24, kv_heads=8, d_ff=24 * 512)
    refused("tensor=6 neither divides the 8 key/value heads .* tensor=2 or 4 or 8", Layout(tensor=6), 6, model=model)
    for tensor in (2, 8, 24):
        validate(model, Layout(tensor=tensor), tensor, Workload(1, 128))


def test_batch_and_sequence():
    refused("batch 12 leaves no whole number", Layout(data=8), 8, batch=12)
    refused("sequence 16,777,217 is longer than the 16,777,216 tokens whose", Layout(data=8), 8, sequence=2**24 + 1)
    refused("sequence 1,025 is longer than the 1,024 tokens that gpt2 takes", Layout(data=8), 8, sequence=1025, model=GPT2)
    validate(LLAMA, Layout(), 1, Workload(1, 131_072))  # rotary positions have no end


def test_devices_that_share_out_a_sequence():
    ring = Layout(context=4, attention="blockwise")
    refused("context=4, in a ring of two parts each: 20 tokens do not divide into the 8 parts .* --seq 16 would", ring, 4, sequence=20)
    both = Layout(context=2, tensor=8, sequence=True, attention="blockwise")
    refused("context=2, in a ring .* and tensor=8 with sequence=true: .* 16 parts .* --seq 32 would do", both, 16, sequence=40)
    refused("context=3 does not divide the 32 query heads", Layout(context=3, exchange="ulysses"), 3, sequence=9)
    refused("does not divide the 2 key/value heads of each of tensor=4", Layout(tensor=4, context=4, exchange="ulysses"), 16)
    validate(LLAMA, ring, 4, Workload(1, 24))
    assert default_sequence(LLAMA, replace(ring, context=3)) == 4092


def test_defaults():
    assert default_batch(Layout(replica=2, data=4, tensor=8, microbatches=3)) == 24
    names = ("llama-tiny", "llama-1-7b", "llama-3-8b", "llama-3.1-405b")
    assert [default_sequence(ModelConfig.load(name)) for name in names] == [128, 2048, 4096, 4096]
