"""XLA's protos, read with the descriptors of the fields that we use and nothing else.

The field numbers are XLA's own (openxla/xla: xla/service/hlo.proto and xla/xla_data.proto, as in jaxlib 0.10 to 0.12).
A field that is not named here is skipped by the parser. There is no generated code: the table below is turned into
message classes of the protobuf package, whose parser is in C, when the first file is read.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from jaxllm.spec.errors import TargetError

# message: "number name type" of each field, `*` after the type when it is repeated; a type may be another message.
_MESSAGES = {
    "HloProto": "1 hlo_module HloModuleProto; 3 buffer_assignment BufferAssignmentProto",
    "HloModuleProto": (
        "1 name string; 6 entry_computation_id int64; 3 computations HloComputationProto*; "
        "7 schedule HloScheduleProto; 8 input_output_alias HloInputOutputAliasProto; "
        "14 spmd_parameters_shardings OpSharding*; 15 device_assignment DeviceAssignmentProto; 17 stack_frame_index StackFrameIndexProto; "
        "19 frontend_attributes FrontendAttributes"
    ),
    # A map field is, on the wire, a repeated message of key and value.
    "HloScheduleProto": "1 sequences ScheduleEntry*",
    "ScheduleEntry": "1 key int64; 2 value InstructionSequence",
    "InstructionSequence": "1 instruction_ids int64*",
    "DeviceAssignmentProto": "1 replica_count int32; 2 computation_count int32",
    "HloInputOutputAliasProto": "1 entries AliasEntryProto*",
    "AliasEntryProto": "1 output_shape_index int64*; 2 parameter_number int64; 3 parameter_shape_index int64*",
    "StackFrameIndexProto": (
        "1 file_names string*; 2 function_names string*; 3 file_locations FileLocation*; 4 stack_frames StackFrame*"
    ),
    "FileLocation": "1 file_name_id int32; 2 function_name_id int32; 3 line int32",
    "StackFrame": "1 file_location_id int32; 2 parent_frame_id int32",
    "HloComputationProto": "1 name string; 2 instructions HloInstructionProto*; 5 id int64; 6 root_id int64",
    "HloInstructionProto": (
        "1 name string; 2 opcode string; 3 shape ShapeProto; 7 metadata OpMetadata; 8 literal LiteralProto; "
        "9 parameter_number int64; 11 fusion_kind string; 13 tuple_index int64; 14 dimensions int64*; "
        "15 window Window; 16 convolution_dimension_numbers ConvolutionDimensionNumbers; 50 feature_group_count int64; "
        "58 batch_group_count int64; 26 channel_id int64; 28 custom_call_target string; "
        "30 dot_dimension_numbers DotDimensionNumbers;"
        "17 slice_dimensions SliceDimensions*; 63 comparison_direction string; 35 id int64; 36 operand_ids int64*; 38 called_computation_ids int64*; "
        "40 sharding OpSharding; 43 backend_config bytes; 49 replica_groups ReplicaGroup*; 52 source_target_pairs SourceTarget*; "
        "56 constrain_layout bool; 68 frontend_attributes FrontendAttributes; "
        "87 collective_device_list CollectiveDeviceListProto; "
        "90 ragged_dot_dimension_numbers RaggedDotDimensionNumbers; "
        "92 iota_collective_device_list IotaReplicaGroupListProto; "
        "93 mesh_axes_replica_group_list MeshAxesReplicaGroupListProto"
    ),
    "OpMetadata": "2 op_name string; 3 source_file string; 4 source_line int32; 15 stack_frame_id int32",
    "OpSharding": (
        "1 type int32; 3 tile_assignment_dimensions int64*; 4 tile_assignment_devices int64*; "
        "5 tuple_shardings OpSharding*; 6 replicate_on_last_tile_dim bool; 8 last_tile_dims int32*; "
        "9 iota_reshape_dims int64*; 10 iota_transpose_perm int32*; 14 named_sharding NamedShardingProto"
    ),
    "NamedShardingProto": "2 mesh MeshProto; 3 dim_shardings DimShardingProto*",
    "DimShardingProto": "1 axes AxisRefProto*",
    "FrontendAttributes": "1 map FrontendAttribute*",
    "FrontendAttribute": "1 key string; 2 value string",
    "ShapeProto": "2 element_type int32; 3 dimensions int64*; 4 tuple_shapes ShapeProto*; 5 layout LayoutProto",
    "LayoutProto": (
        "1 minor_to_major int64*; 6 tiles TileProto*; 7 element_size_in_bits int64; 8 memory_space int64; "
        "16 tail_padding_alignment_in_elements int64"
    ),
    "TileProto": "1 dimensions int64*",
    "SliceDimensions": "1 start int64; 2 limit int64; 3 stride int64",
    "LiteralProto": "1 shape ShapeProto; 2 preds bool*; 4 s32s int32*; 5 s64s int64*; 6 u32s uint32*; 7 u64s uint64*",
    "Window": "1 dimensions WindowDimension*",
    "WindowDimension": (
        "1 size int64; 2 stride int64; 3 padding_low int64; 4 padding_high int64; 5 window_dilation int64; "
        "6 base_dilation int64"
    ),
    "ConvolutionDimensionNumbers": (
        "3 kernel_input_feature_dimension int64; 4 kernel_output_feature_dimension int64; "
        "6 kernel_spatial_dimensions int64*; 7 input_batch_dimension int64; 8 input_feature_dimension int64; "
        "9 output_batch_dimension int64; 10 output_feature_dimension int64; 11 input_spatial_dimensions int64*; "
        "12 output_spatial_dimensions int64*"
    ),
    "DotDimensionNumbers": (
        "1 lhs_contracting_dimensions int64*; 2 rhs_contracting_dimensions int64*; 3 lhs_batch_dimensions int64*"
    ),
    "RaggedDotDimensionNumbers": (
        "1 dot_dimension_numbers DotDimensionNumbers; 2 lhs_ragged_dimensions int64*; 3 rhs_group_dimensions int64*"
    ),
    "ReplicaGroup": "1 replica_ids int64*",
    "SourceTarget": "1 source int64; 2 target int64",
    "CollectiveDeviceListProto": "1 replica_groups ReplicaGroup*; 2 iota_replica_group_list IotaReplicaGroupListProto",
    "IotaReplicaGroupListProto": (
        "1 num_replica_groups int64; 2 num_devices_per_group int64; 3 iota_reshape_dims int64*; "
        "4 iota_transpose_perm int32*"
    ),
    "MeshAxesReplicaGroupListProto": "1 mesh MeshProto; 2 axes AxisRefProto*",
    "MeshProto": "1 axes MeshAxis*; 2 device_ids int64*; 3 iota_transform IotaTransform",
    "MeshAxis": "1 name string; 2 size int64",
    "IotaTransform": "1 reshape_dims int64*; 2 transpose_perm int64*",
    "AxisRefProto": "1 mesh_axis_index int64; 2 sub_axis_info SubAxis",
    "SubAxis": "1 pre_size int64; 2 size int64",
    "BufferAssignmentProto": (
        "1 logical_buffers LogicalBufferProto*; 3 buffer_allocations BufferAllocationProto*; "
        "4 heap_simulator_traces HeapSimulatorTrace*"
    ),
    "LogicalBufferProto": "1 id int64; 2 size int64; 3 defined_at Location; 4 color int64",
    "Location": "4 instruction_id int64; 3 shape_index int64*",
    "BufferAllocationProto": (
        "1 index int64; 2 size int64; 3 is_thread_local bool; 11 is_tuple bool; 5 is_entry_computation_parameter bool; "
        "12 is_constant bool; 6 parameter_number int64; 10 parameter_shape_index int64*; 7 maybe_live_out bool; "
        "8 color int64; 9 assigned Assigned*"
    ),
    "Assigned": "1 logical_buffer_id int64; 2 offset int64; 3 size int64",
    "HeapSimulatorTrace": "1 events Event*; 3 buffer_allocation_index int64",
    "Event": "1 kind int32; 2 buffer_id int64; 4 instruction_name string; 5 share_with_canonical_id int64",
}  # fmt: skip

_PACKAGE = "jaxllm_xla"  # not `xla`: another package of the process may register the real one


@cache
def classes() -> dict[str, type]:
    """Message name -> class, built once."""
    field_types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="jaxllm/xla.proto", package=_PACKAGE, syntax="proto3")
    for message, fields in _MESSAGES.items():
        descriptor = file.message_type.add(name=message)
        for text in fields.split(";"):
            number, name, kind = text.split()
            repeated = kind.endswith("*")
            kind = kind.rstrip("*")
            field = descriptor.field.add(name=name, number=int(number))
            field.label = field_types.LABEL_REPEATED if repeated else field_types.LABEL_OPTIONAL
            if kind in _MESSAGES:
                field.type = field_types.TYPE_MESSAGE
                field.type_name = f".{_PACKAGE}.{kind}"
            else:
                field.type = getattr(field_types, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


def parse(data: bytes) -> Any:
    """An HloProto from its wire form. Raises google.protobuf.message.DecodeError when the bytes are not one."""
    return classes()["HloProto"].FromString(data)


def read(path: Path) -> Any:
    """The HloProto in the file `path`. Raises TargetError when the file does not hold one."""
    try:
        return parse(path.read_bytes())
    except (OSError, DecodeError) as error:
        message = f"{path.name} is not an HloProto that can be read ({error}); compile the program again."
        raise TargetError(message) from error
