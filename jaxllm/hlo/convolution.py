"""FLOPs of a convolution, as XLA's own cost analysis counts them (openxla/xla, xla/service/hlo_cost_analysis.cc)."""

from __future__ import annotations

from functools import cache
from math import gcd

from jaxllm.hlo.graph import Instruction


def convolution_flops(
    instruction: Instruction, image: tuple[int, ...], kernel: tuple[int, ...], result: tuple[int, ...]
) -> int:
    """FLOPs of a convolution, forward, given the dims of its three arrays and the instruction's labels and window."""
    numbers, window = instruction.proto.convolution_dimension_numbers, instruction.proto.window.dimensions
    positions = 1
    for index, place in enumerate(window):
        positions *= _meetings(
            kernel[numbers.kernel_spatial_dimensions[index]],
            result[numbers.output_spatial_dimensions[index]],
            image[numbers.input_spatial_dimensions[index]],
            place.stride or 1,
            place.padding_low,
            place.window_dilation or 1,
            place.base_dilation or 1,
        )
    batch = image[numbers.input_batch_dimension] // max(1, instruction.proto.batch_group_count)
    inputs = image[numbers.input_feature_dimension] // max(1, instruction.proto.feature_group_count)
    return 2 * batch * inputs * kernel[numbers.kernel_output_feature_dimension] * positions


@cache
def _meetings(kernel: int, result: int, image: int, stride: int, low: int, spread: int, dilation: int) -> int:
    """How many pairs of a kernel's and an output's position along one dim meet an element of the image.

    Output o and kernel k meet place o x stride - low + k x spread of an image whose elements lie `dilation` apart.
    """
    step = dilation // gcd(stride, dilation)
    total = 0
    for k in range(kernel):
        offset = k * spread - low
        # o must satisfy 0 <= o x stride + offset <= (image - 1) x dilation, and be a multiple of the dilation there
        first = max(0, -(offset // stride))
        last = min(result - 1, ((image - 1) * dilation - offset) // stride)
        if dilation == 1:
            total += max(0, last - first + 1)
            continue
        start = next((o for o in range(first, first + step) if (o * stride + offset) % dilation == 0), None)
        if start is not None:
            total += max(0, (last - start) // step + 1)
    return total
