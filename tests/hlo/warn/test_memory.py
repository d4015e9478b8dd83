"""Warnings about memory: each on a program that triggers it, and not on the same one put right."""

import jax
import pytest

from tests.hlo.warn import programs as p
from tests.hlo.warn.programs import MIB, TARGETS, findings, is_marked


# XLA:TPU does so as well, but only with a program that it takes a minute to compile.
@pytest.mark.parametrize("target", ["gpu"])
def test_xla_rematerialization(target):
    (found,) = findings(p.short_of_memory, target, False, "xla-rematerialization")
    assert found.bytes > MIB and "FLOP" in found.message and is_marked(found) and "jax.checkpoint" in found.advice
    assert not findings(p.short_of_memory, target, True, "xla-rematerialization")


def test_xla_cpu_rematerializes_nothing():
    assert not findings(p.short_of_memory, "cpu", False, "xla-rematerialization")


@pytest.mark.parametrize("target", TARGETS)
def test_donate(target):
    (found,) = findings(p.update, target, False, "donate")
    assert found.bytes == 2 * 1024 * 4096 * 4
    assert is_marked(found) and "donate_argnames=('p', 'm')" in found.advice
    assert not findings(p.update, target, True, "donate")


@pytest.mark.parametrize("target", TARGETS)
def test_gathered_weights_among_the_residuals(target):
    (found,) = findings(p.kept_weights, target, False, "heavy-residuals")
    assert found.bytes == 4 * 2048 * 2048 * (2 if target == "tpu" else 4)
    assert is_marked(found) and "as it was gathered" in found.message and "save_any_names_but_these" in found.advice
    assert not findings(p.kept_weights, target, True, "heavy-residuals")


@pytest.mark.parametrize("target", TARGETS)
def test_gathered_weights_kept_one_by_one(target):
    (found,) = findings(p.kept_weights_one_by_one, target, False, "heavy-residuals")
    # the gradient of the input is wanted of the second and the third layer only
    assert found.bytes == 2 * 4096 * 4096 * (2 if target == "tpu" else 4) and is_marked(found)
    assert not findings(p.kept_weights_one_by_one, target, True, "heavy-residuals")


@pytest.mark.parametrize("target", TARGETS)
def test_softmax_in_f32_among_the_residuals(target):
    (found,) = findings(p.kept_softmax, target, False, "heavy-residuals")
    assert found.bytes == 4 * 2 * 8 * 256 * 256 * 4
    assert is_marked(found) and "softmax in f32" in found.message
    assert not findings(p.kept_softmax, target, True, "heavy-residuals")


@pytest.mark.parametrize("target", TARGETS)
def test_conditional_copies(target):
    (found,) = findings(p.cache_in_branch, target, False, "conditional-copies")
    assert found.bytes == 2 * 64 * 32 * MIB  # in the branch and behind it, at each of 64 turns
    assert is_marked(found) and "64 times a step" in found.message
    assert not findings(p.cache_in_branch, target, True, "conditional-copies")


def test_what_nobody_reads_beside_the_conditional_is_not_copied():
    found = findings(p.cache_in_branch_alone, "gpu", False, "conditional-copies")
    assert [finding.bytes for finding in found] == ([2 * 64 * 32 * MIB] if jax.__version_info__ < (0, 11) else [])
    assert not findings(p.cache_in_branch_alone, "cpu", False, "conditional-copies")
    assert not findings(p.cache_in_branch_alone, "tpu", False, "conditional-copies")


def test_tpu_padding():
    (found,) = findings(p.odd_dims, "tpu", False, "tpu-padding")
    # argument and result: 1030 and 300 lie innermost, in tiles of 8 x 128
    assert found.bytes == 2 * 4 * 260 * (304 * 1152 - 300 * 1030)
    assert is_marked(found) and "f32[300,1030,260]" in found.message and "13 %" in found.message
    assert not findings(p.odd_dims, "tpu", True, "tpu-padding")


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_nothing_is_padded_elsewhere(target):
    assert not findings(p.odd_dims, target, False, "tpu-padding")
