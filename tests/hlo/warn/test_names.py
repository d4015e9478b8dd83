"""Names in remat and offload policies that match nothing."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxllm.hlo.policies import unmatched_names
from tests.hlo.warn.programs import TARGETS, Case, _auto, array, findings

policies = jax.checkpoint_policies
ARGUMENTS = jnp.ones((3, 4, 4)), jnp.ones((2, 4))


def in_scan(policy):
    def loss(w, x):
        def layer(x, w):
            return jnp.sin(checkpoint_name(jnp.sin(x @ w), "saved")), None

        return lax.scan(jax.checkpoint(layer, policy=policy), x, w)[0].sum()

    return loss


def offload(*names):
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    )


@pytest.mark.parametrize(
    "policy, names",
    [
        (policies.save_only_these_names("saved", "saevd"), ["saevd"]),
        (policies.save_any_names_but_these("other"), ["other"]),
        (offload("saved", "b", "a"), ["a", "b"]),
        (policies.save_from_both_policies(policies.dots_saveable, policies.save_only_these_names("both")), ["both"]),
        (policies.save_only_these_names("saved"), []),
        (offload("saved"), []),
        (policies.nothing_saveable, []),
        (lambda prim, *_, **params: prim.name in {"dot_general"}, []),  # somebody's own: these are no such names
        (None, []),
    ],
)
@pytest.mark.parametrize("transform", [lambda loss: loss, jax.grad, lambda loss: jax.jit(jax.value_and_grad(loss))])
def test_names_that_no_checkpoint_name_gives(policy, names, transform):
    found = unmatched_names(transform(in_scan(policy)), ARGUMENTS)
    assert [name for name, _ in found] == names
    assert all(source.startswith("test_names.py:") for _, source in found)


def test_the_line_is_that_of_the_checkpoint():
    def loss(w, x):
        layer = jax.checkpoint(lambda x, w: jnp.sin(x @ w), policy=policies.save_only_these_names("lost"))
        return layer(x, w[0]).sum()

    line = loss.__code__.co_firstlineno + 2
    assert unmatched_names(jax.grad(loss), ARGUMENTS) == (("lost", f"test_names.py:{line}"),)


def test_a_module_of_flax():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return checkpoint_name(self.linear(x), "saved")

    remat = nnx.remat(Layer.__call__, policy=policies.save_only_these_names("saved", "lost"))
    step = nnx.jit(lambda layer, x: nnx.grad(lambda layer: remat(layer, x).sum())(layer))
    (found,) = unmatched_names(step, (Layer(nnx.Rngs(0)), jnp.ones((2, 4))))
    assert found[0] == "lost" and found[1].startswith("test_names.py:")


def offloaded(target: str, fixed: bool) -> Case:
    """A policy whose name is misspelt, so that nothing is saved."""
    mesh = _auto(target)
    names = ("saved",) if fixed else ("saevd",)
    arguments = array(mesh, (3, 64, 64)), array(mesh, (64, 64))
    return Case(jax.grad(in_scan(policies.save_only_these_names(*names))), arguments, mesh)


@pytest.mark.parametrize("target", TARGETS)
def test_unmatched_name(target):
    (found,) = findings(offloaded, target, False, "unmatched-name")
    assert "'saevd'" in found.message and "checkpoint_name(x, 'saevd')" in found.advice
    assert found.source.startswith("test_names.py:")
    assert not findings(offloaded, target, True, "unmatched-name")
