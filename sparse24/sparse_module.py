"""SparseModule: what sparse layers share: their state, its two forms, moves, copies and loading.

Canonical form: `values` and `meta`, two parameters; what is saved, loaded, trained and moved (docs/format.md).
Packed form: one uint8 buffer, the same numbers in the order of the kernels of the device that the layer is on.
Exactly one of them is resident.
"""

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparse24 import ops
from sparse24.rounding import LEVELS, Rounded, of_columns, quantize_by, quantize_groups, quantize_rows
from sparse24.support import (
    FLOAT_TYPES,
    INT4,
    ONE_SCALE,
    autocast_dtype,
    check_finite,
    check_float,
    check_group_size,
    check_pattern,
    check_x_rounding,
    check_x_scale,
    checked_scales,
    device_problem,
)
from sparse24.weight import READ_ONLY, SparseWeight, TracedWeight

_SCALES = ("scales", "x_scale", "y_scale")
_PACKED = "a packed {} has no {}: call unpack() first, or use state_dict() and load_state_dict()"


class SparseModule(nn.Module):
    """State and life of a layer with a sparse weight; SparseLinear and SparseConv2d say its shapes and kernels.

    values, meta: the canonical form. Unpacked layers only.
    bias:         [outputs], `dtype`, or None.
    scales:       [outputs] float32, one per output of an integer weight, or [groups, outputs], where group_size columns
                  share one; else None. Stays float32 through .half().
    x_scale:      [] float32, where x_rounding is "tensor": x is rounded to int8 by it. Else None.
    y_scale:      [] float32, where int8_y: y is int8, rounded by it (chaining.py). Else None.
    packed:       one uint8 tensor in the order of the kernels of its device. Packed layers only.
    """

    values: nn.Parameter
    meta: nn.Parameter
    bias: nn.Parameter | None
    scales: Tensor | None
    x_scale: Tensor | None
    y_scale: Tensor | None
    packed: Tensor | None

    def _create(
        self,
        bias: bool,
        pattern: str,
        activation: str,
        weight_dtype: torch.dtype | None,
        weight_only: bool,
        x_rounding: str,
        int8_y: bool,
        group_size: int | None,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Check and keep what is common, and make the tensors, empty. The sizes of the subclass are set already."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        weight_dtype = dtype if weight_dtype is None else weight_dtype
        if activation not in ops.ACTIVATIONS:
            raise RuntimeError(f"activation must be one of {', '.join(ops.ACTIVATIONS)}; got {activation!r}")
        check_float(dtype)
        if weight_dtype not in (dtype, torch.int8, INT4):
            raise RuntimeError(f"weight_dtype must be torch.int8, torch.int4 or dtype ({dtype}); got {weight_dtype}")
        check_pattern(pattern, weight_dtype, weight_only)
        integer = weight_dtype in LEVELS
        self._check_group_size(group_size, integer)
        if weight_only and not integer:
            raise RuntimeError(f"weight_only is for a weight_dtype of torch.int8 or torch.int4; got {weight_dtype}")
        check_x_rounding(x_rounding, integer and not weight_only)
        if int8_y and x_rounding != "tensor":
            raise RuntimeError("int8_y is for x_rounding 'tensor'")
        self.pattern = pattern
        self.activation = activation
        self.dtype = dtype
        self.weight_dtype = weight_dtype
        self.weight_only = weight_only
        self.x_rounding = x_rounding
        self.int8_y = int8_y
        self.group_size = group_size
        self._frozen = False  # pack() was called: hold the packed form wherever the device has one

        shapes = self._shapes()
        values = torch.empty(shapes["values"], dtype=_storage(weight_dtype), device=device)
        self.values = nn.Parameter(values, requires_grad=not integer)
        meta = torch.empty(shapes["meta"], dtype=torch.uint8, device=device)
        self.meta = nn.Parameter(meta, requires_grad=False)
        outputs = shapes["bias"]
        bias_vector = nn.Parameter(torch.empty(outputs, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", bias_vector)
        scales = torch.empty(shapes["scales"], dtype=torch.float32, device=device) if integer else None
        self.register_buffer("scales", scales)
        for name, given in (("x_scale", x_rounding == "tensor"), ("y_scale", int8_y)):
            self.register_buffer(name, torch.empty((), dtype=torch.float32, device=device) if given else None)
        self.register_buffer("packed", None, persistent=False)
        if not values.is_meta:
            self.reset_parameters()

    # ---- what a subclass says

    def _weight_shape(self) -> tuple[int, ...]:
        """Of the dense weight, outputs first."""
        raise NotImplementedError

    def _rows(self) -> tuple[int, ...]:
        """The shape of the rows of the matrix that the pattern cuts into groups, outputs first."""
        raise NotImplementedError

    def _features(self) -> int:
        """The columns of that matrix."""
        raise NotImplementedError

    def _as_matrix(self, weight: Tensor) -> Tensor:
        """That matrix of a dense weight."""
        raise NotImplementedError

    def _from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of _as_matrix."""
        raise NotImplementedError

    def _new_dense(self) -> nn.Module:
        """A dense layer of the same sizes on the CPU, freshly initialised."""
        raise NotImplementedError

    def _pack(self, values: Tensor, meta: Tensor) -> Tensor:
        raise NotImplementedError

    def _unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _why_canonical(self, device: torch.device) -> str:
        """Why the weight stays in canonical form and runs dense on a device; "" where it is packed."""
        raise NotImplementedError

    def _check_group_size(self, group_size: int | None, integer: bool) -> None:
        """Raises RuntimeError where columns of the weight cannot share scales so."""
        check_group_size(group_size, integer)

    def _device_problem(self, device: torch.device) -> str:
        return device_problem(device, self.weight_dtype)

    # ---- the weight

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        # Values of a group: two elements; of int4 two nibbles, or in pair 4:8 four.
        pair = self.pattern == "pair 4:8"
        groups = -(-self._features() // (8 if pair else 4))
        bytes_or_elements = 1 if self.weight_dtype is INT4 and not pair else 2
        rows, outputs = self._rows(), self._weight_shape()[:1]
        shapes = {"values": (*rows, bytes_or_elements * groups), "meta": (*rows, -(-groups // 2)), "bias": outputs}
        sharing = () if self.group_size is None else (max(1, -(-self._features() // self.group_size)),)
        return shapes | {"scales": (*sharing, *outputs), "x_scale": (), "y_scale": ()}

    def reset_parameters(self) -> None:
        """Start afresh: weight and bias as of a new dense layer, pruned by magnitude (and rounded), other scales 1."""
        dense = self._new_dense()
        matrix = self._as_matrix(dense.get_parameter("weight").detach())
        matrix = torch.where(ops.prune_mask(matrix, self.pattern), matrix, 0)
        state = self._state_of(self._from_matrix(matrix))
        if self.bias is not None:
            state["bias"] = dense.get_parameter("bias").detach()
        self.load_state_dict(state)

    def _take(
        self, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None, x_scale: Tensor | float | None = None
    ) -> None:
        """Take over the weight, which fits the pattern, and the bias of a dense layer; a layer on the meta device.

        scales, x_scale: by which weight and x are rounded; by default that of each output's largest weight, and 1.
        """
        state = self._state_of(weight.detach().cpu(), scales, 1 if x_scale is None else x_scale)
        state = {name: tensor.to(weight.device) for name, tensor in state.items()}
        if bias is not None:
            state["bias"] = bias.detach().clone()
        self.load_state_dict(state, assign=True)
        if self.bias is not None and bias is not None:
            self.bias.requires_grad_(bias.requires_grad)

    def _state_of(
        self, weight: Tensor, scales: Tensor | None = None, x_scale: Tensor | float = 1.0
    ) -> dict[str, Tensor]:
        """values, meta and scales of a dense weight on the CPU. Raises RuntimeError where it does not fit."""
        state = {}
        if self.weight_dtype in LEVELS:
            rows, levels, size = weight.float().flatten(1), LEVELS[self.weight_dtype], self.group_size
            if scales is not None:
                scale = checked_scales(scales, self._shapes()["scales"])
                check_finite(torch.where(rows.isfinite().all(1, keepdim=True), scale, torch.nan), self.weight_dtype)
                q = quantize_by(rows, scale if size is None else of_columns(scale, rows.shape[1], size), levels)
            else:
                q, scale = quantize_rows(rows, levels) if size is None else quantize_groups(rows, size, levels)
            check_finite(scale, self.weight_dtype)
            weight, state["scales"] = q.to(torch.int8).view(weight.shape), self._as_scales(scale)
        if self.y_scale is not None:
            state["y_scale"] = torch.ones(())
        if self.x_rounding == "tensor":
            state["x_scale"] = torch.as_tensor(x_scale, dtype=torch.float32).detach().cpu().clone()
            check_x_scale(state["x_scale"])
        matrix = self._as_matrix(weight).contiguous()
        values, meta = ops.compress(ops.pack_int4(matrix) if self.weight_dtype is INT4 else matrix, self.pattern)
        shapes = self._shapes()
        return state | {"values": values.view(shapes["values"]), "meta": meta.view(shapes["meta"])}

    def _dense_weight(self) -> Tensor:
        """W decompressed: `dtype`, differentiable in float values; or float32 and scaled, of an integer layer."""
        weight = self._whole_weight()
        return weight if self.scales is None else weight * self._scales_of(weight)

    def _rounded_weight(self) -> Rounded:
        """W of an integer layer, decompressed."""
        q = self._whole_weight()
        scales = self._scales_of(q)
        if self.group_size is None or self.scales is None:
            return Rounded(q, scales, q * scales)
        return Rounded(q, self.scales.T, q * scales, self.group_size)

    def _scales_of(self, weight: Tensor) -> Tensor:
        """`scales`, so that they broadcast against the weight."""
        assert self.scales is not None
        if self.group_size is None:
            return self.scales.view(-1, *[1] * (weight.dim() - 1))
        return of_columns(self.scales.T, self._features(), self.group_size).view(weight.shape)

    def _as_scales(self, scale: Tensor) -> Tensor:
        """`scales` of what quantize_rows or quantize_groups gives."""
        return scale.squeeze(-1) if self.group_size is None else scale.T.contiguous()

    def _whole_weight(self) -> Tensor:
        """W decompressed, without its scales."""
        values, meta = self._canonical()
        by_torch = self._device_problem(values.device)
        decompress = _decompress_by_torch if by_torch else ops.decompress
        rows = (values.flatten(0, -2), meta.flatten(0, -2))
        matrix = decompress(*rows, in_features=self._features(), pattern=self.pattern)
        if self.weight_dtype is INT4 and not by_torch:
            matrix = ops.unpack_int4(matrix)[:, : self._features()]
        return self._from_matrix(matrix)

    def _detached_weight(self) -> Tensor:
        return self._dense_weight().detach().to(self.dtype)

    # ---- the two forms

    def pack(self) -> Self:
        """Freeze: values and meta give way to the packed form, which runs sparse. Returns self.

        Moves repack it for where the layer comes. Where nothing sparse can run (float32 on CUDA, a device without
        kernels, a driver too old) the canonical form stays, frozen, and runs dense until the next move.
        """
        self._frozen = True
        self._settle()
        return self

    def unpack(self) -> Self:
        """The exact inverse of pack(): values (trainable if float) and meta are parameters again. Returns self."""
        self._thaw()
        self._frozen = False
        self.values.requires_grad_(self.weight_dtype not in LEVELS)
        return self

    @torch.no_grad()
    def quantize(
        self,
        dtype: torch.dtype = torch.int8,
        *,
        weight_only: bool = False,
        x_scale: Tensor | float | None = None,
        group_size: int | None = None,
    ) -> Self:
        """Round a float weight to int8, or to int4 if weight_only, per output, in place (quantize_rows). Returns self.

        weight_only: x will be multiplied as it is. x_scale: by which x will be rounded, not each token by its own.
        group_size: so many columns share a scale, not all of an output (quantize_groups).
        Raises RuntimeError, and changes nothing, where an output's weights are not finite, or for int4 without
        weight_only, whose pairs of columns this weight does not keep.
        """
        if dtype is INT4 and not weight_only:
            raise RuntimeError(
                f"dtype must be torch.int8 for a layer that is {self.pattern}: int4 keeps pairs of columns. "
                "Prune the dense model to 'pair 4:8', quantize(dtype=torch.int4), then convert()"
            )
        if dtype not in LEVELS:
            raise RuntimeError(f"dtype must be torch.int8 or torch.int4; got {dtype}")
        if self.scales is not None:
            return self
        self._check_group_size(group_size, True)
        check_x_rounding("token" if x_scale is None else "tensor", not weight_only)
        given = None if x_scale is None else torch.as_tensor(x_scale, dtype=torch.float32, device=self.device)
        if given is not None and not given.is_meta:
            check_x_scale(given)
        values = self._canonical()[0].detach()
        rows = values.float().flatten(1)
        if group_size is None:
            q, scale = quantize_rows(rows, LEVELS[dtype])
        else:  # half of the columns are there
            q, scale = quantize_groups(rows, group_size // 2, LEVELS[dtype])
        if not scale.is_meta:
            check_finite(scale, dtype)
        self._thaw()
        self.weight_dtype, self.weight_only, self.group_size = dtype, weight_only, group_size
        whole = q.to(torch.int8).view(-1, values.shape[-1])
        stored = (ops.pack_int4(whole) if dtype is INT4 else whole).view(self._shapes()["values"])
        self._parameters["values"] = nn.Parameter(stored, requires_grad=False)
        self.scales = self._as_scales(scale)
        self.x_scale, self.x_rounding = given, "token" if given is None else "tensor"
        self._settle()
        return self

    def _settle(self) -> None:
        """Bring a frozen layer into its resident form."""
        values, meta = self._parameters.get("values"), self._parameters.get("meta")
        if not self._frozen or values is None or meta is None:
            return
        if self._why_canonical(values.device):
            self._buffers["packed"] = None
            values.requires_grad_(False)
        else:
            self._buffers["packed"] = self._pack(values.detach(), meta.detach())
            del self._parameters["values"], self._parameters["meta"]

    def _thaw(self) -> None:
        """Bring any layer into canonical form."""
        if self.packed is not None:
            self._parameters = self._canonical_parameters()
            self._buffers["packed"] = None

    def _canonical_parameters(self) -> dict[str, nn.Parameter | None]:
        """The parameters of a packed layer in canonical form, in the order of a new one, which optimisers count in."""
        values, meta = self._canonical()
        frozen = {"values": nn.Parameter(values, requires_grad=False), "meta": nn.Parameter(meta, requires_grad=False)}
        return {**frozen, **self._parameters}

    def _canonical(self) -> tuple[Tensor, Tensor]:
        if self.packed is None:
            return self.values, self.meta
        return self._unpack(self.packed)

    # ---- what others see

    @property
    def weight(self) -> Tensor:
        """The dense weight, `dtype`: metadata is free, reading data decompresses, writing raises."""
        if torch.compiler.is_compiling():
            return self._detached_weight().as_subclass(TracedWeight)
        return SparseWeight(self)

    @property
    def device(self) -> torch.device:
        return (self.values if self.packed is None else self.packed).device

    def _describe(self) -> str:
        """What extra_repr says after the sizes."""
        weight = "" if self.weight_dtype is self.dtype else f", weight_dtype={self.weight_dtype}"
        weight += ", weight_only=True" if self.weight_only else ""
        weight += "" if self.group_size is None else f", group_size={self.group_size}"
        weight += ", x_rounding=tensor" if self.x_rounding == "tensor" else ""
        weight += ", int8_y=True" if self.int8_y else ""
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return f"pattern={self.pattern}, dtype={self.dtype}{weight}{activation}, packed={self.packed is not None}"

    def _wants_gradient(self, x: Tensor) -> bool:
        bias = self._parameters["bias"]
        return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))

    def _rounded_x(self, x: Tensor) -> Tensor:
        """x in int8: as another layer hands it on, or rounded by x_scale."""
        if x.dtype is torch.int8 or self.x_scale is None:
            return x
        cast = autocast_dtype(x.device.type)
        return ops.quantize(x if cast is None else x.to(cast), self.x_scale)

    def _y_dtype(self, x: Tensor) -> torch.dtype:
        if self.int8_y:
            return torch.int8
        cast = autocast_dtype(x.device.type)
        return cast or (self.dtype if x.dtype is torch.int8 else x.dtype)

    def _dense_y(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """The float32 y of a dense product, finished: activated, and in `dtype` of _y_dtype()."""
        y = ops.ACTIVATIONS[self.activation](y)
        if self.y_scale is None:
            return y.to(dtype)
        if y.requires_grad:
            raise RuntimeError("a layer that hands on int8 has no gradient: call it under torch.no_grad()")
        return quantize_by(y, self.y_scale).to(torch.int8)

    def _check_dtype(self, x: Tensor) -> None:
        if x.dtype is torch.int8 and self.x_rounding == "tensor":
            return
        if x.dtype is not self.dtype and autocast_dtype(x.device.type) is None:
            raise RuntimeError(f"x must be {self.dtype}, the dtype of this layer, outside autocast; got {x.dtype}")

    def __getattr__(self, name: str) -> Any:
        if name in ("values", "meta") and self.packed is not None:
            raise AttributeError(_PACKED.format(type(self).__name__, name))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(READ_ONLY)
        if name in ("values", "meta") and self._buffers.get("packed") is not None:
            raise AttributeError(_PACKED.format(type(self).__name__, name))
        super().__setattr__(name, value)

    # ---- dtype and device moves, copies, pickles

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        check_float(probe.dtype)
        scales = [id(self._buffers[name]) for name in _SCALES]

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            keeps_dtype = id(tensor) in scales or not tensor.dtype.is_floating_point
            return tensor.to(moved.device) if keeps_dtype and moved.dtype is not tensor.dtype else moved

        if probe.dtype is self.dtype and probe.device == self.device:  # share_memory(), .to(where it is): bytes suffice
            super()._apply(move, recurse)  # type: ignore[no-untyped-call]
            return self
        self._thaw()
        try:
            super()._apply(move, recurse)  # type: ignore[no-untyped-call]
            self._set_dtype(probe.dtype)
        finally:
            self._settle()
        return self

    def _set_dtype(self, dtype: torch.dtype) -> None:
        if self.weight_dtype not in LEVELS:
            self.weight_dtype = dtype
        self.dtype = dtype

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.packed is not None:
            state["_parameters"] = self._canonical_parameters()
            state["_buffers"] = {**self._buffers, "packed": None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        tensors = {name: t for name, t in [*self._parameters.items(), *self._buffers.items()] if t is not None}
        problems = list(self._problems(tensors, self.dtype))
        if problems:
            raise RuntimeError(f"this pickled {type(self).__name__} is damaged: " + "; ".join(problems))
        self._settle()

    # ---- state_dict

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.packed is not None:
            values, meta = self._canonical()
            destination[prefix + "values"] = values
            destination[prefix + "meta"] = meta
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        assign = local_metadata.get("assign_to_params_buffers", False)
        names = ["values", "meta"]
        names += ["bias"] if self.bias is not None else []
        names += [name for name in _SCALES if self._buffers[name] is not None]
        if strict:
            missing_keys += [prefix + name for name in names if prefix + name not in state_dict]
            known = {prefix + name for name in names}
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]
        incoming = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}

        dtype = self.dtype
        if assign:  # the state's float type replaces the layer's, as it does in nn.Module
            source = incoming.get("values" if self.scales is None else "bias")
            dtype = source.dtype if isinstance(source, Tensor) and source.dtype in FLOAT_TYPES else dtype
        problems = list(self._problems(incoming, dtype))
        if not assign and self.device.type == "meta" and incoming:
            problems.append("the layer is on the meta device; load with assign=True, or call to_empty() first")
        elif not assign and any(t.is_meta for t in incoming.values() if isinstance(t, Tensor)):
            problems.append("the state is on the meta device and has no data")
        error_msgs += [prefix + problem for problem in problems]
        if not problems:
            self._accept(incoming, dtype, assign)

    def _problems(self, incoming: dict[str, Any], dtype: torch.dtype) -> Iterator[str]:
        """What is wrong with these canonical tensors as the state of this layer, with `dtype` as its float type."""
        dtypes = {
            "values": dtype if self.scales is None else _storage(self.weight_dtype),
            "meta": torch.uint8,
            "bias": dtype,
            "scales": torch.float32,
            "x_scale": torch.float32,
            "y_scale": torch.float32,
        }
        sound = True
        for name, tensor in incoming.items():
            shape = self._shapes()[name]
            if not isinstance(tensor, Tensor):
                yield f"{name} must be a Tensor; got {type(tensor).__name__}"
            elif tensor.shape != shape or tensor.dtype is not dtypes[name]:
                yield f"{name} must be {list(shape)} {dtypes[name]}; got {list(tensor.shape)} {tensor.dtype}"
            elif name == "scales" and not tensor.is_meta and not tensor.isfinite().all():
                place = tensor.isfinite().logical_not().nonzero()[0].tolist()
                group = "" if len(place) == 1 else f" of group {place[0]}"
                yield f"scales must be finite; got {tensor[tuple(place)].item()} in row {place[-1]}{group}"
            elif name in ("x_scale", "y_scale") and not tensor.is_meta and not 0 < tensor.item() < float("inf"):
                yield ONE_SCALE.format(name, tensor.item())
            else:
                continue
            sound = False
        parts = ["values", "meta"] + [name for name in _SCALES if self._buffers[name] is not None]
        absent = [name for name in parts if name not in incoming]
        if 0 < len(absent) < len(parts):
            yield f"{', '.join(parts)} belong together; {' and '.join(absent)} did not come"
        elif sound and "values" in incoming and not incoming["values"].is_meta and not incoming["meta"].is_meta:
            values, meta = (_whole(incoming[name]).cpu().flatten(0, -2) for name in ("values", "meta"))
            try:
                ops.validate(values, meta, in_features=self._features(), pattern=self.pattern)
            except RuntimeError as error:
                yield f"{'values' if str(error).startswith('values') else 'meta'}: {error}"

    @torch.no_grad()
    def _accept(self, incoming: dict[str, Tensor], dtype: torch.dtype, assign: bool) -> None:
        """Take checked tensors over: copied into what there is, or put in its place if assigned or absent (packed)."""
        device = self.device
        self._set_dtype(dtype)
        for name, tensor in incoming.items():
            if name in _SCALES:
                store: dict[str, Any] = self._buffers
            else:
                store = self._parameters
            current = store.get(name)
            if current is not None and not assign:
                current.copy_(tensor)
                continue
            tensor = tensor if assign else tensor.to(device)
            if name not in _SCALES:
                trainable = current is not None and current.requires_grad
                same = isinstance(tensor, nn.Parameter)
                tensor = tensor.requires_grad_(trainable) if same else nn.Parameter(tensor.detach(), trainable)
            store[name] = tensor
        if "values" in incoming:
            self._settle()


def _decompress_by_torch(values: Tensor, meta: Tensor, *, in_features: int, pattern: str) -> Tensor:
    """ops.decompress, by nothing but operators of torch."""
    columns = ops.columns_of(meta, in_features=in_features, pattern=pattern)
    if values.dtype is torch.uint8:
        values = ops.unpack_int4(values)
    padded = values.new_zeros((values.shape[0], 2 * values.shape[1]))
    return padded.scatter(1, columns, values)[:, :in_features]


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, detached; all of it where FSDP has sharded it."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def _storage(weight_dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if weight_dtype is INT4 else weight_dtype
