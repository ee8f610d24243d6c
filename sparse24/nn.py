"""SparseLinear: nn.Linear with a 2:4 weight, or an int4 one in pair 4:8."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse24 import ops
from sparse24.rounding import LEVELS, linear, round_x
from sparse24.sparse_module import SparseModule
from sparse24.support import FLOAT32_ON_CUDA, INT4, WANTS_GRADIENT, autocast_dtype


class SparseLinear(SparseModule):
    """y = activation(x @ W^T + bias), W [out_features, in_features] with at most two nonzeros in any four columns.

    x:      [..., in_features] of the layer's `dtype`; any under autocast, which casts it. y: [..., out_features].
    values: [out_features, 2 * ceil(in_features / 4)], `dtype`, or int8 where weight_dtype is; for int4 uint8
            [out_features, 2 * ceil(in_features / 8)], in 2:4 [out_features, ceil(in_features / 4)]. Unpacked only.
    meta:   [out_features, ceil(G / 2)] uint8 for G groups in a row, two 2-bit column codes a group. Unpacked only.
    bias:   [out_features], `dtype`, or None.
    scales: [out_features] float32, one per row of an integer weight, or [groups, out_features], where group_size
            columns share one (the last group may have fewer); else None. Stays float32 through .half().
    x_scale: [] float32 where x_rounding is "tensor", else None. Stays float32 as well; y_scale, where int8_y, too.
    packed: one uint8 tensor in the order of the kernels of its device. Packed layers only.

    pattern: "2:4", or the stricter "1:2"; of an int4 weight "pair 4:8", or with weight_only any. activation: "none",
    "relu", "gelu" (erf), "gelu_tanh", "silu".
    weight_dtype: None for `dtype`, or torch.int8 or torch.int4; then x is rounded to int8 per token as well
    (quantize_rows), unless weight_only. dtype: float32, float16 or bfloat16.
    x_rounding: "token", or "tensor": all x by x_scale, what is beyond 127 times it cut off, NaN as 0; an int8 x is
    taken as rounded so. int8_y: y is int8, rounded by y_scale. group_size: None, or a multiple of 64.

    A new layer starts as nn.Linear does, pruned by magnitude, in canonical form: `values` can be trained, the pattern
    is fixed, and the product runs dense. `pack()` makes it sparse and fast; gradients then reach x and bias only. On
    CUDA float32, int4, weight_only and group_size stay dense, and so does what autocast would have in another dtype
    than the weight's; report() tells.
    state_dict() and load_state_dict() speak the canonical form in both; of a packed layer it is a copy. Loading checks
    everything: state that is incomplete, of another dtype or shape, not finite in scales or illegal in meta is refused,
    and the layer stays as it was. Float dtypes must agree, save under assign=True, where the layer takes the state's.

    Raises RuntimeError for arguments, input and state that do not fit.
    Accuracy: see ops.linear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: str = "2:4",
        activation: str = "none",
        weight_dtype: torch.dtype | None = None,
        weight_only: bool = False,
        x_rounding: str = "token",
        int8_y: bool = False,
        group_size: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        rounding = (weight_dtype, weight_only, x_rounding, int8_y, group_size)
        self._create(bias, pattern, activation, *rounding, device, dtype)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        *,
        pattern: str = "2:4",
        activation: str = "none",
        weight_dtype: torch.dtype | None = None,
        weight_only: bool = False,
        scales: Tensor | None = None,
        x_scale: Tensor | float | None = None,
        group_size: int | None = None,
    ) -> Self:
        """An unpacked SparseLinear with the weight of `linear`, copied (and rounded); its dtype, device and mode.

        scales: by which an integer weight is rounded, [out_features], or [groups, out_features] with a group_size; by
        default that of the largest weight that shares it.
        x_scale: by which x is rounded; by default each token by its own.
        Raises RuntimeError naming row, group and values where the weight does not fit the pattern; nothing is dropped.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            pattern=pattern,
            activation=activation,
            weight_dtype=weight_dtype,
            weight_only=weight_only,
            x_rounding="token" if x_scale is None else "tensor",
            group_size=group_size,
            device="meta",
            dtype=linear.weight.dtype,
        )
        layer._take(linear.weight, linear.bias, scales, x_scale)
        return layer.train(linear.training)

    # ---- the weight

    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def _rows(self) -> tuple[int, ...]:
        return (self.out_features,)

    def _features(self) -> int:
        return self.in_features

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return weight

    def _from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix

    def _new_dense(self) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device="cpu", dtype=self.dtype)

    def _pack(self, values: Tensor, meta: Tensor) -> Tensor:
        size = self.group_size
        return ops.pack(values, meta, in_features=self.in_features, pattern=self.pattern, group_size=size)

    def _unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        return ops.unpack(
            packed,
            out_features=self.out_features,
            in_features=self.in_features,
            dtype=self.weight_dtype,
            pattern=self.pattern,
            group_size=self.group_size,
        )

    def _why_canonical(self, device: torch.device) -> str:
        unsupported = self._unsupported() if device.type == "cuda" else ""
        return self._device_problem(device) or unsupported

    def _unsupported(self) -> str:
        """Why a GPU's kernels do not multiply by this weight, or ""."""
        if self.weight_dtype is torch.float32:
            return FLOAT32_ON_CUDA
        if self.weight_dtype is INT4:
            return "int4 has no sparse kernel on CUDA"
        if self.weight_only:
            return "weight_only has no sparse kernel on CUDA"
        return "" if self.group_size is None else "scales of groups have no sparse kernel on CUDA"

    # ---- forward

    def forward(self, x: Tensor) -> Tensor:
        packed = self._buffers["packed"]  # not self.packed: nn.Module finds that only after a failed lookup
        if packed is None or ((packed.is_cuda or ops.emulating) and self._why_dense(x)):
            return self._dense_forward(x)
        if x.dtype is not self.dtype:
            self._check_dtype(x)
        x_scale = self._buffers["x_scale"]
        if x_scale is not None:
            return self._static_forward(x, packed, x_scale)
        return ops.linear(  # the short way, with fewer operands than _static_forward to go through at each call
            x,
            packed,
            self._parameters["bias"],
            self._buffers["scales"],
            out_features=self.out_features,
            in_features=self.in_features,
            dtype=self.weight_dtype,
            pattern=self.pattern,
            group_size=self.group_size,
            activation=self.activation,
            weight_only=self.weight_only,
        )

    def _static_forward(self, x: Tensor, packed: Tensor, x_scale: Tensor) -> Tensor:
        if self._wants_gradient(x):
            return self._dense_forward(x)
        return ops.linear(
            self._rounded_x(x),
            packed,
            self._parameters["bias"],
            self._buffers["scales"],
            out_features=self.out_features,
            in_features=self.in_features,
            dtype=self.weight_dtype,
            group_size=self.group_size,
            activation=self.activation,
            x_scales=x_scale,
            y_scale=self._buffers["y_scale"],
            out_dtype=self._y_dtype(x),
        )

    def _why_dense(self, x: Tensor) -> str:
        """Why forward(x) multiplies by the decompressed weight; "" where it runs a sparse kernel."""
        packed = self._buffers["packed"]
        if packed is None:
            return self._why_canonical(self.device) or "unpacked; call pack()"
        if self.x_rounding == "tensor" and self._wants_gradient(x):
            return WANTS_GRADIENT
        # What is traced while some thread emulates is traced for that, and torch.compile traces it anew afterwards.
        if packed.is_meta or not (packed.is_cuda or torch.compiler.is_compiling() or ops.emulated_arch()):
            return ""
        if reason := self._unsupported():
            return reason
        cast = None if self.weight_dtype in LEVELS else autocast_dtype(x.device.type)
        return "" if cast in (None, self.dtype) else f"autocast casts x to {cast}, the weight is {self.dtype}"

    def _dense_forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"x must be [..., {self.in_features}] to match weight [{self.out_features}, {self.in_features}]; "
                f"got {list(x.shape)}"
            )
        self._check_dtype(x)
        if self.scales is None:
            return ops.ACTIVATIONS[self.activation](F.linear(x, self._dense_weight(), self.bias))
        dtype, cast = self._y_dtype(x), autocast_dtype(x.device.type)
        if cast is None:
            return self._dense_integer(x, dtype)
        with torch.autocast(x.device.type, enabled=False):
            return self._dense_integer(x if x.dtype is torch.int8 else x.to(cast), dtype)

    def _dense_integer(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.weight_only:
            bias = None if self.bias is None else self.bias.float()
            y = F.linear(x.float(), self._dense_weight(), bias)
        else:
            y = linear(round_x(x, self.x_scale), self._rounded_weight(), self.bias)
        return self._dense_y(y, dtype)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self._describe()}"
