"""Deformable convolution of channel-last maps, version 4: weighted samples at places that the input chooses.

Source of the mathematics: Xiong et al., "Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for
Vision Applications" (DCNv4), arXiv 2401.06197, without softmax and without projections, as HRVMamba (arXiv 2410.03174)
has it.
"""

from torch import Tensor

from . import torch_dcnv4
from .backend import demanded_backend
from .checks import check_dimensions, check_tensors
from .flops import dcnv4_shapes
from .reference import dcnv4_reference
from .registration import register_operator

_OP = "dcnv4"


def _fake(value: Tensor, offset_mask: Tensor, *_: object) -> Tensor:
    return value.new_empty(*offset_mask.shape[:3], value.shape[3])


_deform = register_operator(
    _OP,
    "Tensor value, Tensor offset_mask, int groups, int kernel_size, int stride, int padding, int dilation,"
    " float offset_scale, bool remove_center",
    ("y",),
    torch_dcnv4,
    _fake,
    dcnv4_shapes,
)


def output_side(side: int, kernel_size: int, stride: int, padding: int, dilation: int) -> int:
    """Cells that a convolution makes of `side` cells."""
    return (side + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1


def dcnv4(
    value: Tensor,
    offset_mask: Tensor,
    groups: int,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """``y[b, i, j, g] = sum_p w_p * bilinear(value[b, :, :, g], at the place of point p)``.

    Point p of a kernel of K x K points is the one in column ``p // K`` and row ``p % K``: columns are the outer loop.
    It lies where that tap of a convolution would, both its distance to the middle of the kernel and an offset of its
    own scaled by `offset_scale`. With N points, the 3 N numbers of a group at an output cell are ``dx_0, dy_0, dx_1,
    dy_1, ...`` in cells and then the weights ``w_0, w_1, ...`` of any sign, which need not add up to anything. Cells
    outside of the map are 0, and a point one cell or more outside of it counts nothing. Sums are computed in float32
    (float64 for float64 `value`), whatever autocast says. Only the inputs are kept for the backward pass.

    Args:
        value: (B, H, W, D), channels last, any floating dtype.
        offset_mask: (B, H', W', M) for the H' x W' cells that a convolution of these options would make; group g has
            the numbers from ``3 N g`` on, and what comes behind the last group is ignored.
        groups: G, a divisor of D; each group of D / G channels has points of its own.
        kernel_size: K, rows and columns of points.
        stride, padding, dilation: as of a convolution, alike for rows and columns.
        offset_scale: of the distances to the middle of the kernel.
        remove_center: leave out the middle point of an odd kernel; those behind it close up.

    Returns:
        (B, H', W', D) in the dtype of `value`.

    Raises:
        TypeError: a tensor is complex or not floating-point.
        ValueError: a shape or device does not fit, `groups` does not divide D, an option is out of range, or there is
            no middle point to be left out; VISION_SSM_BACKEND names no backend.
        RuntimeError: VISION_SSM_BACKEND asks for a backend that cannot run here.
    """
    check_tensors(_OP, dict(value=value, offset_mask=offset_mask), {})
    check_dimensions(_OP, "value", value, "(B, H, W, D)")
    check_dimensions(_OP, "offset_mask", offset_mask, "(B, H', W', M)")
    for name, number, least in (
        ("groups", groups, 1),
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if number < least:
            raise ValueError(f"{_OP}: {name} must be at least {least}, got {number}")
    batch, height, width, dim = value.shape
    if dim % groups:
        raise ValueError(f"{_OP}: groups must divide the {dim} channels of value, got {groups}")
    if remove_center and (kernel_size % 2 == 0 or kernel_size == 1):
        raise ValueError(f"{_OP}: remove_center needs an odd kernel_size of at least 3, got {kernel_size}")
    rows, columns = (output_side(side, kernel_size, stride, padding, dilation) for side in (height, width))
    if rows < 1 or columns < 1:
        raise ValueError(
            f"{_OP}: a kernel of {kernel_size} x {kernel_size} with dilation {dilation} does not fit into a map of"
            f" {height} x {width} with padding {padding}"
        )
    if tuple(offset_mask.shape[:3]) != (batch, rows, columns):
        raise ValueError(
            f"{_OP}: offset_mask has shape {tuple(offset_mask.shape)}, expected (B, H', W', M) ="
            f" {(batch, rows, columns)} and M"
        )
    needed = 3 * groups * (kernel_size**2 - remove_center)
    if offset_mask.shape[3] < needed:
        raise ValueError(
            f"{_OP}: offset_mask has {offset_mask.shape[3]} numbers per cell, expected at least {needed}: 2 offsets and"
            f" a weight for each of {kernel_size**2 - remove_center} points of each of {groups} groups"
        )

    options = (groups, kernel_size, stride, padding, dilation, float(offset_scale), bool(remove_center))
    if demanded_backend() == "reference":
        return dcnv4_reference(value, offset_mask, *options)
    return _deform(value, offset_mask, *options)
