"""SparseConv2d: nn.Conv2d with a 2:4 weight, or an int4 one in pair 4:8."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse24 import ops
from sparse24.rounding import Rounded, conv2d, linear, round_x
from sparse24.sparse_module import SparseModule
from sparse24.support import WANTS_GRADIENT, autocast_dtype

MIN_CHANNELS = 4  # of a group of the convolution: a group of the pattern
AXES = ("channels", "patch")
# Groups of columns would be groups of input channels at each kernel position, which no kernel sums apart.
GROUPS_OF_LINEAR = "scales of groups are for linear layers and patch convolutions"


def as_matrix(weight: Tensor, axis: str) -> Tensor:
    """A conv weight [O, C, R, S] as the matrix whose rows the pattern cuts into groups.

    axis: "channels", [O * R * S, C], or "patch", [O, C * R * S].
    """
    return weight.flatten(1) if axis == "patch" else weight.permute(0, 2, 3, 1).flatten(0, 2)


def from_matrix(matrix: Tensor, shape: tuple[int, ...], axis: str) -> Tensor:
    """The inverse of as_matrix for a weight of this shape."""
    out_channels, channels, height, width = shape
    if axis == "patch":
        return matrix.view(shape)
    return matrix.view(out_channels, height, width, channels).permute(0, 3, 1, 2)


def axis_of(conv: nn.Conv2d) -> tuple[str, str]:
    """The axis along which a convolution is pruned, and "" or the reason why it has to stay dense."""
    if conv.in_channels // conv.groups >= MIN_CHANNELS:
        return "channels", ""
    if _is_patch(conv):
        return "patch", ""
    return "channels", f"it has {conv.in_channels // conv.groups} input channels a group; a group of 2:4 is four"


def _is_patch(conv: Any) -> bool:
    """Whether each input pixel meets the kernel exactly once, at no padding."""
    no_padding = conv.padding == "valid" or tuple(_pair(conv.padding) if conv.padding != "same" else (1,)) == (0, 0)
    return bool(conv.kernel_size == conv.stride and no_padding and conv.dilation == (1, 1) and conv.groups == 1)


def split_padding(conv: nn.Conv2d) -> tuple[tuple[int, int], list[int]]:
    """What a product pads, by zeros and equally, and what has to be around x before: left, right, top, bottom."""
    around: list[int] = conv._reversed_padding_repeated_twice
    even = around[0] == around[1] and around[2] == around[3]
    return ((around[2], around[0]), []) if even and conv.padding_mode == "zeros" else ((0, 0), around)


def pad(x: Tensor, outer: list[int], mode: str) -> Tensor:
    """x with `outer` of split_padding around it."""
    return F.pad(x, outer, "constant" if mode == "zeros" else mode) if outer else x


def patches_of(x: Tensor, kernel_size: tuple[int, ...]) -> Tensor:
    """[B, C, H, W] cut into [B, H // R, W // S, C * R * S]."""
    (r, s), (height, width) = kernel_size, x.shape[2:]
    rows, columns = height // r, width // s
    if rows == 0 or columns == 0:
        raise RuntimeError(f"x must be at least as large as the kernel, {[r, s]}; got {list(x.shape)}")
    cut = x[:, :, : rows * r, : columns * s]
    return cut.reshape(-1, x.shape[1], rows, r, columns, s).permute(0, 2, 4, 1, 3, 5).flatten(3)


def integer_conv2d(
    x: Tensor, weight: Rounded, bias: Tensor | None, axis: str, x_scale: Tensor | None, **geometry: Any
) -> Tensor:
    """What the integer kernels make of x [B, C, H, W], float32: rounded by x_scale, or by image (patch: by patch)."""
    if axis == "patch":
        patches = patches_of(x, weight.q.shape[2:])
        flat = Rounded(weight.q.flatten(1), weight.scale.flatten(1), weight.value.flatten(1), weight.group_size)
        return linear(round_x(patches, x_scale), flat, bias).permute(0, 3, 1, 2)
    flat = round_x(x.flatten(1), x_scale)
    images = Rounded(flat.q.view(x.shape), flat.scale.view(-1, 1, 1, 1), flat.value.view(x.shape))
    return conv2d(images, weight, bias, **geometry)


class SparseConv2d(SparseModule):
    """y = activation(conv2d(x, W) + bias), W [out_channels, in_channels / groups, R, S], in 2:4.

    x:      [B, in_channels, H, W] or [in_channels, H, W] of the layer's `dtype`; any under autocast, which casts it.
            Channels last is fastest; contiguous x is read as it is, and y comes in the order of x.
    axis:   "channels": of four adjacent input channels of a group, at each kernel position, two may stay.
            "patch": of four adjacent columns of W as [out_channels, C * R * S]; for kernels that meet each pixel once
            (kernel = stride, no padding): the product is a linear one over patches.
    values: [out_channels, R, S, 2 * G], G = ceil(in_channels / groups / 4); patch: [out_channels, 2 * G],
            G = ceil(C * R * S / 4). `dtype`, or int8; int4 uint8 with G of eight columns (in 2:4: G, of four).
            Unpacked layers only.
    meta:   the same with ceil(G / 2) uint8, two 2-bit column codes a group. Unpacked layers only.
    scales: [out_channels] float32, one per output channel of an integer weight, or of axis "patch" [groups,
            out_channels], where group_size columns share one; else None.

    stride, padding ("same" and "valid" too), dilation, groups, padding_mode: as nn.Conv2d.
    weight_dtype: None for `dtype`, or torch.int8 or torch.int4 (pattern "pair 4:8", or with weight_only any); then each
    image of x (patch: each patch) is rounded to int8 by one scale as well, unless weight_only; by x_scale where
    x_rounding is "tensor".
    Everything else is as for SparseLinear: training of `values`, pack(), state, errors. There are kernels for the CPU
    alone: elsewhere, and within emulate(), the layer runs dense, and report() says so.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        pattern: str = "2:4",
        activation: str = "none",
        weight_dtype: torch.dtype | None = None,
        weight_only: bool = False,
        x_rounding: str = "token",
        int8_y: bool = False,
        group_size: int | None = None,
        axis: str = "channels",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.stride = _pair(stride)
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.dilation = _pair(dilation)
        self.groups = groups
        self.padding_mode = padding_mode
        self.axis = axis
        if axis not in AXES:
            raise RuntimeError(f"axis must be 'channels' or 'patch'; got {axis!r}")
        try:
            dense = self._dense_layer(bias, "meta", torch.float32)  # nn.Conv2d knows its own rules
        except ValueError as error:
            raise RuntimeError(str(error)) from error
        if axis == "patch" and not _is_patch(dense):
            raise RuntimeError("axis 'patch' needs stride = kernel_size, no padding, dilation 1 and groups 1")
        if axis == "channels" and in_channels // groups < MIN_CHANNELS:
            raise RuntimeError(f"in_channels / groups must be at least 4; got {in_channels} / {groups}")
        self._inner_padding, self._outer_padding = split_padding(dense)
        rounding = (weight_dtype, weight_only, x_rounding, int8_y, group_size)
        self._create(bias, pattern, activation, *rounding, device, dtype)

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        *,
        pattern: str = "2:4",
        activation: str = "none",
        weight_dtype: torch.dtype | None = None,
        weight_only: bool = False,
        scales: Tensor | None = None,
        x_scale: Tensor | float | None = None,
        group_size: int | None = None,
        axis: str | None = None,
    ) -> Self:
        """An unpacked SparseConv2d with the weight of `conv`, copied (and rounded); its dtype, device and mode.

        scales: by which an integer weight is rounded, [out_channels], or [groups, out_channels] with a group_size; by
        default that of the largest weight that shares it.
        x_scale: by which x is rounded; by default each image (patch) by its own.
        axis: by default "channels", and "patch" for a patch convolution of fewer than four channels.
        Raises RuntimeError naming row, group and values where the weight does not fit the pattern; nothing is dropped.
        """
        axis_by_default, reason = axis_of(conv)
        if axis is None and reason:
            raise RuntimeError(f"the convolution has to stay dense: {reason}")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            pattern=pattern,
            activation=activation,
            weight_dtype=weight_dtype,
            weight_only=weight_only,
            x_rounding="token" if x_scale is None else "tensor",
            group_size=group_size,
            axis=axis or axis_by_default,
            device="meta",
            dtype=conv.weight.dtype,
        )
        layer._take(conv.weight, conv.bias, scales, x_scale)
        return layer.train(conv.training)

    # ---- the weight

    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _rows(self) -> tuple[int, ...]:
        return (self.out_channels,) if self.axis == "patch" else (self.out_channels, *self.kernel_size)

    def _features(self) -> int:
        _, channels, height, width = self._weight_shape()
        return channels * height * width if self.axis == "patch" else channels

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return as_matrix(weight, self.axis)

    def _from_matrix(self, matrix: Tensor) -> Tensor:
        return from_matrix(matrix, self._weight_shape(), self.axis)

    def _new_dense(self) -> nn.Module:
        return self._dense_layer(self.bias is not None, "cpu", self.dtype)

    def _dense_layer(self, bias: bool, device: str, dtype: torch.dtype) -> nn.Conv2d:
        geometry: Any = {name: getattr(self, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        options: Any = {"groups": self.groups, "bias": bias, "device": device, "dtype": dtype}
        return nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, **geometry, **options)

    def _pack(self, values: Tensor, meta: Tensor) -> Tensor:
        if self.axis == "patch":
            size = self.group_size
            return ops.pack(values, meta, in_features=self._features(), pattern=self.pattern, group_size=size)
        sizes = {"in_channels": self.in_channels, "groups": self.groups}
        return ops.conv2d_pack(values, meta, **sizes, pattern=self.pattern)

    def _unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        if self.axis == "patch":
            return ops.unpack(
                packed,
                out_features=self.out_channels,
                in_features=self._features(),
                dtype=self.weight_dtype,
                pattern=self.pattern,
                group_size=self.group_size,
            )
        return ops.conv2d_unpack(
            packed,
            out_channels=self.out_channels,
            in_channels=self.in_channels,
            kernel_size=self.kernel_size,
            groups=self.groups,
            dtype=self.weight_dtype,
            pattern=self.pattern,
        )

    def _check_group_size(self, group_size: int | None, integer: bool) -> None:
        super()._check_group_size(group_size, integer)
        if group_size is not None and self.axis != "patch":
            raise RuntimeError(f"{GROUPS_OF_LINEAR}; got group_size {group_size} for axis {self.axis!r}")

    def _why_canonical(self, device: torch.device) -> str:
        no_kernel = "" if device.type in ("cpu", "meta") else f"there is no sparse convolution on {device.type}"
        return self._device_problem(device) or no_kernel

    # ---- forward

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise RuntimeError(
                f"x must be [B, {self.in_channels}, H, W] or [{self.in_channels}, H, W] to match weight "
                f"{list(self._weight_shape())}; got {list(x.shape)}"
            )
        if x.dtype is not self.dtype:
            self._check_dtype(x)
        images = x if x.dim() == 4 else x.unsqueeze(0)
        if self._outer_padding:
            images = pad(images, self._outer_padding, self.padding_mode).contiguous(memory_format=_order(images))
        no_gradient = self._buffers["x_scale"] is not None and self._wants_gradient(x)
        if self._buffers["packed"] is None or no_gradient or (ops.emulating and self._why_dense(x)):
            y = self._dense_forward(images).contiguous(memory_format=_order(images))
        elif self.axis == "patch":
            y = self._patch_forward(images)
        else:
            y = self._sparse_forward(images)
        return y if x.dim() == 4 else y.squeeze(0)

    def _sparse_forward(self, x: Tensor) -> Tensor:
        packed, x_scale = self._buffers["packed"], self._buffers["x_scale"]
        assert packed is not None
        return ops.conv2d(
            self._rounded_x(x),
            packed,
            self._parameters["bias"],
            self._buffers["scales"],
            out_channels=self.out_channels,
            in_channels=self.in_channels,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self._inner_padding,
            dilation=self.dilation,
            groups=self.groups,
            dtype=self.weight_dtype,
            pattern=self.pattern,
            activation=self.activation,
            weight_only=self.weight_only,
            x_scales=x_scale,
            y_scale=self._buffers["y_scale"],
            out_dtype=None if x_scale is None else self._y_dtype(x),
        )

    def _patch_forward(self, images: Tensor) -> Tensor:
        packed, x_scale = self._buffers["packed"], self._buffers["x_scale"]
        assert packed is not None
        y = ops.linear(
            patches_of(self._rounded_x(images), self.kernel_size),
            packed,
            self._parameters["bias"],
            self._buffers["scales"],
            out_features=self.out_channels,
            in_features=self._features(),
            dtype=self.weight_dtype,
            pattern=self.pattern,
            group_size=self.group_size,
            activation=self.activation,
            weight_only=self.weight_only,
            x_scales=x_scale,
            y_scale=self._buffers["y_scale"],
            out_dtype=None if x_scale is None else self._y_dtype(images),
        ).permute(0, 3, 1, 2)
        return y.contiguous(memory_format=_order(images))

    def _why_dense(self, x: Tensor) -> str:
        """Why forward(x) convolves with the decompressed weight; "" where it runs a sparse kernel."""
        packed = self._buffers["packed"]
        if packed is None:
            return self._why_canonical(self.device) or "unpacked; call pack()"
        if self.x_rounding == "tensor" and self._wants_gradient(x):
            return WANTS_GRADIENT
        # What is traced while some thread emulates is traced for that, and torch.compile traces it anew afterwards.
        if not packed.is_meta and (torch.compiler.is_compiling() or ops.emulated_arch()):
            return "there is no sparse convolution on a GPU yet"
        return ""

    def _is_one_product(self, x: Tensor) -> bool:
        """Whether x as it lies is a matrix of pixels, and y its product: csrc/cpu/conv/conv.h, as_linear()."""
        pixels = self.kernel_size == self.stride == (1, 1) and self._inner_padding == (0, 0) and self.groups == 1
        rounded = self.scales is not None and not self.weight_only
        return pixels and not rounded and _order(x if x.dim() == 4 else x.unsqueeze(0)) is torch.channels_last

    def _dense_forward(self, x: Tensor) -> Tensor:
        geometry: Any = (self.stride, self._inner_padding, self.dilation, self.groups)
        if self.scales is None:
            return ops.ACTIVATIONS[self.activation](F.conv2d(x, self._dense_weight(), self.bias, *geometry))
        dtype, cast = self._y_dtype(x), autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            x = x if cast is None or x.dtype is torch.int8 else x.to(cast)
            if self.weight_only:
                bias = None if self.bias is None else self.bias.float()
                y = F.conv2d(x.float(), self._dense_weight(), bias, *geometry)
            else:
                names = ("stride", "padding", "dilation", "groups")
                options = dict(zip(names, geometry, strict=True))
                y = integer_conv2d(x, self._rounded_weight(), self.bias, self.axis, self.x_scale, **options)
            return self._dense_y(y, dtype)

    def extra_repr(self) -> str:
        options = {"padding": ((0, 0), "valid"), "dilation": ((1, 1),), "groups": (1,), "padding_mode": ("zeros",)}
        given = "".join(
            f", {name}={getattr(self, name)}" for name, usual in options.items() if getattr(self, name) not in usual
        )
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}{given}"
        return f"{sizes}, bias={self.bias is not None}, axis={self.axis}, {self._describe()}"


def _order(x: Tensor) -> torch.memory_format:
    """How y lies in memory: as x does."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)
