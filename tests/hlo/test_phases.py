"""Phases read from op_names as JAX writes them."""

import pytest

from jaxllm.hlo.phases import join, phase_of


@pytest.mark.parametrize(
    ("op_name", "phase"),
    [
        ("jit(step)/shard_map/while/body/closed_call/forward/while/body/closed_call/dot_general", "forward"),
        ("while/body/eval_jaxpr/forward/jvp()/psum_invariant", "forward"),
        ("while/body/eval_jaxpr/backward/while/body/transpose(jvp())/dot_general", "backward"),
        ("while/body/eval_jaxpr/backward/while/body/jvp()/dot_general", "recompute"),
        ("while/body/eval_jaxpr/backward/while/body/jvp()/transpose", "recompute"),  # the instruction transpose
        ("while/body/backward/while/body/closed_call/all_gather", "backward"),
        ("jit(step)/update/reduce_sum", "update"),
        ("autodiff/jvp()/while/body/checkpoint/dot_general", "forward"),
        ("autodiff/transpose(jvp())/while/body/checkpoint/rematted_computation/dot_general", "recompute"),
        ("autodiff/transpose(jvp())/while/body/checkpoint/transpose(jvp())/dot_general", "backward"),
        ("autodiff/dot_general", "forward"),
        ("jit(step)/transpose", ""),
        ("jit(forwarded)/dot_general", ""),
        ("jit(update)/jit(main)/dot_general", ""),  # a function, not a scope
        ("transpose(jvp(forward))/dot_general", "forward"),
        ("", ""),
    ],
)
def test_phase(op_name, phase):
    assert phase_of(op_name) == phase


def test_names_in_a_called_function_are_relative_to_the_call():
    assert phase_of(join("jit(step)/backward/jvp()/jit(f)", "dot_general")) == "recompute"
    assert join("jit(step)/backward", "jit(step)/backward/add") == "jit(step)/backward/add"
