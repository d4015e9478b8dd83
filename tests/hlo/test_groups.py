"""Groups of devices in XLA's three forms, and the mesh axes they stand for."""

from itertools import combinations, product
from types import SimpleNamespace

import pytest

from jaxllm.hlo.groups import UNKNOWN, axes_of, axes_of_pairs, groups_of
from jaxllm.hlo.protos import classes

AXES = (("replica", 2), ("data", 3), ("tensor", 4))


def instruction(**fields):
    return SimpleNamespace(proto=classes()["HloInstructionProto"](**fields))


def device(replica, data, tensor):
    return (replica * 3 + data) * 4 + tensor


def groups_over(chosen):
    """Groups by hand: devices that agree in every axis that is not chosen."""
    groups = {}
    for place in product(range(2), range(3), range(4)):
        kept = tuple(value for (name, _), value in zip(AXES, place, strict=True) if name not in chosen)
        groups.setdefault(kept, []).append(device(*place))
    return tuple(tuple(group) for group in groups.values())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_subset_of_axes_is_told_from_every_other(count):
    for chosen in combinations(("replica", "data", "tensor"), count):
        assert axes_of(groups_over(chosen), AXES) == chosen


def test_groups_that_no_axes_give_are_unknown():
    neighbours = tuple((2 * i, 2 * i + 1) for i in range(12))  # half of the tensor axis
    assert axes_of(neighbours, AXES) == UNKNOWN
    assert axes_of(((0, 99),), AXES) == UNKNOWN


def test_axes_of_degree_one_are_never_named():
    assert axes_of(((0, 1), (2, 3)), (("replica", 1), ("data", 2), ("tensor", 2))) == ("tensor",)


def test_literal_groups():
    groups = [{"replica_ids": [0, 1]}, {"replica_ids": [2, 3]}]
    assert groups_of(instruction(replica_groups=groups), 4) == ((0, 1), (2, 3))
    assert groups_of(instruction(collective_device_list={"replica_groups": groups}), 4) == ((0, 1), (2, 3))


def test_no_groups_is_one_group_of_all():
    assert groups_of(instruction(), 4) == ((0, 1, 2, 3),)


def test_iota_groups_in_both_fields():
    # [4,2]<=[2,2,2]T(1,0,2): ids 0..7 as [2,2,2], first two dims exchanged, read in rows of two
    iota = {
        "num_replica_groups": 4,
        "num_devices_per_group": 2,
        "iota_reshape_dims": [2, 2, 2],
        "iota_transpose_perm": [1, 0, 2],
    }
    wanted = ((0, 1), (4, 5), (2, 3), (6, 7))
    assert groups_of(instruction(iota_collective_device_list=iota), 8) == wanted
    assert groups_of(instruction(collective_device_list={"iota_replica_group_list": iota}), 8) == wanted


def mesh_form(axes, sizes, **mesh):
    return instruction(
        mesh_axes_replica_group_list={
            "mesh": {"axes": [{"name": f"axis_{i}", "size": size} for i, size in enumerate(sizes)], **mesh},
            "axes": axes,
        }
    )


def test_mesh_groups():
    over_second = mesh_form([{"mesh_axis_index": 1}], (2, 3))
    assert groups_of(over_second, 6) == ((0, 1, 2), (3, 4, 5))
    over_first = mesh_form([{"mesh_axis_index": 0}], (2, 3))
    assert groups_of(over_first, 6) == ((0, 3), (1, 4), (2, 5))


def test_mesh_groups_over_a_part_of_an_axis():
    # an axis of 8 split as 2 x 2 x 2; the middle part varies: ids apart by 2
    middle = mesh_form([{"mesh_axis_index": 0, "sub_axis_info": {"pre_size": 2, "size": 2}}], (8,))
    assert groups_of(middle, 8) == ((0, 2), (1, 3), (4, 6), (5, 7))


def test_mesh_groups_in_another_order_of_devices():
    assert groups_of(mesh_form([{"mesh_axis_index": 1}], (2, 2), device_ids=[0, 2, 1, 3]), 4) == ((0, 2), (1, 3))
    transform = {"reshape_dims": [2, 2], "transpose_perm": [1, 0]}
    turned = mesh_form([{"mesh_axis_index": 1}], (2, 2), iota_transform=transform)
    assert groups_of(turned, 4) == ((0, 2), (1, 3))


def test_axes_of_a_permute():
    ring = [(device(0, i, 0), device(0, (i + 1) % 3, 0)) for i in range(3)]
    assert axes_of_pairs(ring, AXES) == ("data",)
    assert axes_of_pairs([(device(0, 0, 0), device(1, 0, 3))], AXES) == ("replica", "tensor")
    assert axes_of_pairs([(5, 5)], AXES) == ()
    assert axes_of_pairs([(0, 24)], AXES) == UNKNOWN
