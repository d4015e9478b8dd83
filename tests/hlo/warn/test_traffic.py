"""Warnings about collectives: each on a program that triggers it, and not on the same one put right."""

import jax
import pytest

from tests.hlo.warn import programs as p
from tests.hlo.warn.programs import MIB, TARGETS, findings, from_text, is_marked


@pytest.mark.parametrize("target", TARGETS)
def test_all_reduce_then_slice(target):
    (found,) = findings(p.sliced_sum, target, False, "all-reduce-then-slice")
    assert found.bytes == 32 * MIB * 7 // 8  # of an all-reduce's 2 x 7/8, what a reduce-scatter does not send
    assert is_marked(found) and "psum_scatter" in found.advice and "f32[4096,2048]" in found.message
    assert not findings(p.sliced_sum, target, True, "all-reduce-then-slice")


def test_xla_cpu_leaves_what_the_others_make_a_reduce_scatter():
    assert len(findings(p.sliced_by_jit, "cpu", False, "all-reduce-then-slice")) == 1
    assert not findings(p.sliced_by_jit, "gpu", False, "all-reduce-then-slice")
    assert not findings(p.sliced_by_jit, "tpu", False, "all-reduce-then-slice")


@pytest.mark.parametrize("target", TARGETS)
def test_reduction_in_loop(target):
    (found,) = findings(p.summed_layers, target, False, "reduction-in-loop")
    assert found.bytes == 3 * 3 * 4 * MIB  # 3 layers of 4 MiB, in 3 of the 4 microbatches for nothing
    assert is_marked(found) and "pcast" in found.advice and "4 turns" in found.message
    assert not findings(p.summed_layers, target, True, "reduction-in-loop")


@pytest.mark.parametrize("target", TARGETS)
def test_a_scatter_in_a_loop(target):
    (found,) = findings(p.summed_pieces, target, False, "reduction-in-loop")
    assert found.bytes == 3 * 3 * 4 * MIB
    if target != "cpu":  # where it is an all-reduce and a slice
        assert "of reduce-scatter" in found.message and "8 times as large" in found.advice
    assert not findings(p.summed_pieces, target, True, "reduction-in-loop")


def test_gpu_and_tpu_move_a_reduction_out_of_the_loop_that_adds_it_up():
    assert len(findings(p.summed_flat, "cpu", False, "reduction-in-loop")) == 1
    assert not findings(p.summed_flat, "gpu", False, "reduction-in-loop")
    assert not findings(p.summed_flat, "tpu", False, "reduction-in-loop")


@pytest.mark.parametrize("target", TARGETS)
def test_a_sum_that_is_read_in_the_loop_is_none(target):
    assert not findings(p.residual_stream, target, False, "reduction-in-loop")


@pytest.mark.parametrize("target", TARGETS)
def test_a_maximum_in_a_loop_is_none(target):
    assert not findings(p.largest_summed, target, False, "reduction-in-loop")


@pytest.mark.parametrize("target", TARGETS)
def test_gather_before_matmul(target):
    (found,) = findings(p.gathered_columns, target, False, "gather-before-matmul")
    size = 4096 * 8192 * (2 if target == "tpu" else 4)  # XLA:TPU multiplies, and gathers, in bf16
    assert found.bytes == size * 3 // 4
    assert f"{2 * 2048 * 4096 * 8192 / 1e9:.0f} GFLOP" in found.message
    assert is_marked(found) and "with_sharding_constraint" in found.advice
    assert not findings(p.gathered_columns, target, True, "gather-before-matmul")


@pytest.mark.parametrize("target", TARGETS)
def test_gather_before_matmul_in_a_loop(target):
    (found,) = findings(p.gathered_in_scan, target, False, "gather-before-matmul")
    assert found.bytes == 4 * 2048 * 2048 * (2 if target == "tpu" else 4) * 3 // 4
    assert is_marked(found)
    assert not findings(p.gathered_in_scan, target, True, "gather-before-matmul")


@pytest.mark.parametrize("target", TARGETS)
def test_weights_gathered_for_rows_of_their_own_are_none(target):
    assert not findings(p.fsdp, target, False, "gather-before-matmul")


@pytest.mark.parametrize("target", TARGETS)
def test_f32_traffic(target):
    (found,) = findings(p.scattered_in_f32, target, False, "f32-traffic")
    assert found.bytes == 2048 * 4096 * 2
    assert is_marked(found) and "was bf16 directly before" in found.message
    assert not findings(p.scattered_in_f32, target, True, "f32-traffic")


@pytest.mark.parametrize("target", TARGETS)
def test_f32_traffic_of_a_permute(target):
    found = findings(p.moved_in_f32, target, False, "f32-traffic")
    # XLA:GPU moves the cast to the other side
    assert [finding.bytes for finding in found] == ([] if target == "gpu" else [2048 * 4096 * 2])
    assert not findings(p.moved_in_f32, target, True, "f32-traffic")


@pytest.mark.parametrize("target", TARGETS)
def test_f32_traffic_of_a_sum(target):
    found = findings(p.summed_in_f32, target, False, "f32-traffic")
    # XLA:TPU takes bf16 and gives f32
    assert [finding.bytes for finding in found] == ([] if target == "tpu" else [2048 * 4096 * 2])
    # fixed, XLA:CPU sends f32 still: its own doing
    assert not findings(p.summed_in_f32, target, True, "f32-traffic")


@pytest.mark.parametrize("target", TARGETS)
def test_f32_traffic_of_a_gather(target):
    found = findings(p.gathered_in_f32, target, False, "f32-traffic")
    # XLA:GPU and XLA:TPU cast first by themselves
    assert [finding.bytes for finding in found] == ([4096 * 2048 * 2] if target == "cpu" else [])
    assert all(is_marked(finding) and "is cast to bf16 directly after" in finding.message for finding in found)
    assert not findings(p.gathered_in_f32, target, True, "f32-traffic")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "program, kind",
    [
        (p.sliced_sum, "all-reduce-then-slice"),
        (p.summed_layers, "reduction-in-loop"),
        (p.gathered_in_scan, "gather-before-matmul"),
        (p.scattered_in_f32, "f32-traffic"),
    ],
)
def test_a_text_shows_the_same(program, kind, target):
    found = from_text(program, target, kind)
    if kind == "gather-before-matmul" and jax.__version_info__ >= (0, 11):  # the text does not show shardings any more
        assert not found
    else:
        assert found == findings(program, target, False, kind)
