"""SparseLinear: nn.Linear with a 2:4 weight. Its state, its two forms, its forward.

Canonical form: `values` and `meta`, two parameters; what is saved, loaded, trained and moved (docs/format.md).
Packed form: one uint8 buffer, the same numbers in the order of the kernels of the device that the layer is on.
Exactly one of them is resident.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse24 import ops
from sparse24.rounding import fake_quantize, quantize_rows
from sparse24.weight import READ_ONLY, SparseWeight, TracedWeight

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_PACKED = "a packed SparseLinear has no {}: call unpack() first, or use state_dict() and load_state_dict()"
FLOAT32_ON_CUDA = "float32 has no sparse kernel on CUDA; half() or bfloat16() makes the layer sparse there"


class SparseLinear(nn.Module):
    """y = activation(x @ W^T + bias), W [out_features, in_features] with at most two nonzeros in any four columns.

    x:      [..., in_features] of the layer's `dtype`; any under autocast, which casts it. y: [..., out_features].
    values: [out_features, 2 * ceil(in_features / 4)], `dtype`, or int8 where weight_dtype is. Unpacked layers only.
    meta:   [out_features, ceil(ceil(in_features / 4) / 2)] uint8, two 2-bit column codes a group. Unpacked only.
    bias:   [out_features], `dtype`, or None.
    scales: [out_features] float32, one per row of an int8 weight, else None. Stays float32 through .half().
    packed: one uint8 tensor in the order of the kernels of its device. Packed layers only.

    pattern: "2:4", or the stricter "1:2". activation: "none", "relu", "gelu" (erf), "gelu_tanh", "silu".
    weight_dtype: None for `dtype`, or torch.int8; then x is rounded to int8 per token as well (quantize_rows).
    dtype: float32, float16 or bfloat16.

    A new layer starts as nn.Linear does, pruned by magnitude, in canonical form: `values` can be trained, the pattern
    is fixed, and the product runs dense. `pack()` makes it sparse and fast; gradients then reach x and bias only. On
    CUDA float32 stays dense, and so does what autocast would have in another dtype than the weight's; report() tells.
    state_dict() and load_state_dict() speak the canonical form in both; of a packed layer it is a copy. Loading checks
    everything: state that is incomplete, of another dtype or shape, not finite in scales or illegal in meta is refused,
    and the layer stays as it was. Float dtypes must agree, save under assign=True, where the layer takes the state's.

    Raises RuntimeError for arguments, input and state that do not fit.
    Accuracy: see ops.linear.
    """

    values: nn.Parameter
    meta: nn.Parameter
    bias: nn.Parameter | None
    scales: Tensor | None
    packed: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: str = "2:4",
        activation: str = "none",
        weight_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        weight_dtype = dtype if weight_dtype is None else weight_dtype
        check_pattern(pattern)
        if activation not in ops.ACTIVATIONS:
            raise RuntimeError(f"activation must be one of {', '.join(ops.ACTIVATIONS)}; got {activation!r}")
        _check_float(dtype)
        if weight_dtype not in (dtype, torch.int8):
            raise RuntimeError(f"weight_dtype must be torch.int8, or dtype ({dtype}); got {weight_dtype}")

        self.in_features = in_features
        self.out_features = out_features
        self.pattern = pattern
        self.activation = activation
        self.dtype = dtype
        self.weight_dtype = weight_dtype
        self._frozen = False  # pack() was called: hold the packed form wherever the device has one

        shapes = self._shapes()
        integer = weight_dtype is torch.int8
        values = torch.empty(shapes["values"], dtype=weight_dtype, device=device)
        self.values = nn.Parameter(values, requires_grad=not integer)
        meta = torch.empty(shapes["meta"], dtype=torch.uint8, device=device)
        self.meta = nn.Parameter(meta, requires_grad=False)
        bias_vector = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", bias_vector)
        scales = torch.empty(out_features, dtype=torch.float32, device=device) if integer else None
        self.register_buffer("scales", scales)
        self.register_buffer("packed", None, persistent=False)
        if not values.is_meta:
            self.reset_parameters()

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, pattern: str = "2:4", activation: str = "none") -> Self:
        """An unpacked SparseLinear with the weight of `linear`, copied; its dtype, device and mode.

        Raises RuntimeError naming row, group and values where the weight does not fit the pattern; nothing is dropped.
        """
        weight, bias = linear.weight.detach(), linear.bias
        values, meta = ops.compress(weight.cpu(), pattern)
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias is not None,
            pattern=pattern,
            activation=activation,
            device="meta",
            dtype=weight.dtype,
        )
        state = {"values": values.to(weight.device), "meta": meta.to(weight.device)}
        if bias is not None:
            state["bias"] = bias.detach().clone()
        layer.load_state_dict(state, assign=True)
        if layer.bias is not None:
            layer.bias.requires_grad_(bias.requires_grad)
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Start afresh: the initial weight and bias of nn.Linear, pruned by magnitude (and rounded to int8)."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="cpu", dtype=self.dtype)
        values, meta = ops.prune_compress(dense.weight.detach(), self.pattern)
        state = {"values": values, "meta": meta}
        if self.scales is not None:
            q, scale = quantize_rows(values.float())
            state |= {"values": q.to(torch.int8), "scales": scale.squeeze(-1)}
        if self.bias is not None:
            state["bias"] = dense.bias.detach()
        self.load_state_dict(state)

    # ---- the two forms

    def pack(self) -> Self:
        """Freeze: values and meta give way to the packed form, which runs sparse. Returns self.

        Moves repack it for where the layer comes. Where nothing sparse can run (why_dense: float32 on CUDA, a device
        without kernels, a driver too old) the canonical form stays, frozen, and runs dense until the next move.
        """
        self._frozen = True
        self._settle()
        return self

    def unpack(self) -> Self:
        """The exact inverse of pack(): values (trainable if float) and meta are parameters again. Returns self."""
        self._thaw()
        self._frozen = False
        self.values.requires_grad_(self.weight_dtype.is_floating_point)
        return self

    def quantize(self) -> Self:
        """Round a float weight to int8 per output channel, in place (quantize_rows). Returns self.

        Raises RuntimeError, and changes nothing, where a row of the weight is not finite.
        """
        if self.scales is not None:
            return self
        q, scale = quantize_rows(self._canonical()[0].detach().float())
        if not scale.is_meta and not scale.isfinite().all():
            row = int(scale.isfinite().logical_not().nonzero()[0, 0])
            raise RuntimeError(f"a weight must be finite to become int8; row {row} is not")
        self._thaw()
        self._parameters["values"] = nn.Parameter(q.to(torch.int8), requires_grad=False)
        self.scales = scale.squeeze(-1)
        self.weight_dtype = torch.int8
        self._settle()
        return self

    def _settle(self) -> None:
        """Bring a frozen layer into its resident form."""
        values, meta = self._parameters.get("values"), self._parameters.get("meta")
        if not self._frozen or values is None or meta is None:
            return
        if why_dense(values.device, self.weight_dtype):
            self._buffers["packed"] = None
            values.requires_grad_(False)
        else:
            self._buffers["packed"] = ops.pack(values.detach(), meta.detach(), in_features=self.in_features)
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
        return ops.unpack(
            self.packed, out_features=self.out_features, in_features=self.in_features, dtype=self.weight_dtype
        )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        groups = -(-self.in_features // 4)
        n = self.out_features
        return {"values": (n, 2 * groups), "meta": (n, -(-groups // 2)), "bias": (n,), "scales": (n,)}

    # ---- forward

    def forward(self, x: Tensor) -> Tensor:
        packed = self._buffers["packed"]  # not self.packed: nn.Module finds that only after a failed lookup
        if packed is None or ((packed.is_cuda or ops.emulating) and self._why_dense(x)):
            return self._dense_forward(x)
        if x.dtype is not self.dtype:
            self._check_dtype(x)
        return ops.linear(
            x,
            packed,
            self._parameters["bias"],
            self._buffers["scales"],
            out_features=self.out_features,
            in_features=self.in_features,
            dtype=self.weight_dtype,
            activation=self.activation,
        )

    def _why_dense(self, x: Tensor) -> str:
        """Why forward(x) multiplies by the decompressed weight; "" where it runs a sparse kernel."""
        packed = self._buffers["packed"]
        if packed is None:
            return why_dense(self.device, self.weight_dtype) or "unpacked; call pack()"
        if self.weight_dtype is torch.int8 or packed.is_meta:
            return ""
        # What is traced while some thread emulates is traced for that, and torch.compile traces it anew afterwards.
        if not (packed.is_cuda or torch.compiler.is_compiling() or ops.emulated_arch()):
            return ""
        if self.weight_dtype is torch.float32:
            return FLOAT32_ON_CUDA
        cast = _autocast_dtype(x.device.type)
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
        cast = _autocast_dtype(x.device.type)
        if cast is None:
            return self._dense_int8(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._dense_int8(x.to(cast))

    def _dense_int8(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        y = F.linear(fake_quantize(x.float()), self._dense_weight(), bias)
        return ops.ACTIVATIONS[self.activation](y).to(x.dtype)

    def _check_dtype(self, x: Tensor) -> None:
        if x.dtype is not self.dtype and _autocast_dtype(x.device.type) is None:
            raise RuntimeError(f"x must be {self.dtype}, the dtype of this layer, outside autocast; got {x.dtype}")

    def _dense_weight(self) -> Tensor:
        """W decompressed: `dtype`, differentiable in float values; or float32 and scaled, of an int8 layer."""
        values, meta = self._canonical()
        decompress = _decompress_by_torch if device_problem(values.device, self.weight_dtype) else ops.decompress
        weight = decompress(values, meta, in_features=self.in_features, pattern=self.pattern)
        return weight if self.scales is None else weight * self.scales[:, None]

    def _detached_weight(self) -> Tensor:
        return self._dense_weight().detach().to(self.dtype)

    # ---- what others see

    @property
    def weight(self) -> Tensor:
        """W [out_features, in_features], `dtype`: metadata is free, reading data decompresses, writing raises."""
        if torch.compiler.is_compiling():
            return self._detached_weight().as_subclass(TracedWeight)
        return SparseWeight(self)

    @property
    def device(self) -> torch.device:
        return (self.values if self.packed is None else self.packed).device

    def extra_repr(self) -> str:
        weight = "" if self.weight_dtype is self.dtype else f", weight_dtype={self.weight_dtype}"
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, dtype={self.dtype}{weight}{activation}, packed={self.packed is not None}"
        )

    def __getattr__(self, name: str) -> Any:
        if name in ("values", "meta") and self.packed is not None:
            raise AttributeError(_PACKED.format(name))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(READ_ONLY)
        if name in ("values", "meta") and self._buffers.get("packed") is not None:
            raise AttributeError(_PACKED.format(name))
        super().__setattr__(name, value)

    # ---- dtype and device moves, copies, pickles

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        _check_float(probe.dtype)
        scales = self.scales

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            keeps_dtype = tensor is scales or not tensor.dtype.is_floating_point
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
        if self.weight_dtype is not torch.int8:
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
            raise RuntimeError("this pickled SparseLinear is damaged: " + "; ".join(problems))
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
        names += ["scales"] if self.scales is not None else []
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
            "values": dtype if self.scales is None else torch.int8,
            "meta": torch.uint8,
            "bias": dtype,
            "scales": torch.float32,
        }
        sound = True
        for name, tensor in incoming.items():
            shape = self._shapes()[name]
            if not isinstance(tensor, Tensor):
                yield f"{name} must be a Tensor; got {type(tensor).__name__}"
            elif tensor.shape != shape or tensor.dtype is not dtypes[name]:
                yield f"{name} must be {list(shape)} {dtypes[name]}; got {list(tensor.shape)} {tensor.dtype}"
            elif name == "scales" and not tensor.is_meta and not tensor.isfinite().all():
                row = int(tensor.isfinite().logical_not().nonzero()[0])
                yield f"scales must be finite; got {tensor[row].item()} in row {row}"
            else:
                continue
            sound = False
        parts = ["values", "meta"] + (["scales"] if self.scales is not None else [])
        absent = [name for name in parts if name not in incoming]
        if 0 < len(absent) < len(parts):
            yield f"{', '.join(parts)} belong together; {' and '.join(absent)} did not come"
        elif sound and "values" in incoming and not incoming["values"].is_meta and not incoming["meta"].is_meta:
            values, meta = (_whole(incoming[name]).cpu().contiguous() for name in ("values", "meta"))
            try:
                ops.validate(values, meta, in_features=self.in_features, pattern=self.pattern)
            except RuntimeError as error:
                yield f"{'values' if str(error).startswith('values') else 'meta'}: {error}"

    @torch.no_grad()
    def _accept(self, incoming: dict[str, Tensor], dtype: torch.dtype, assign: bool) -> None:
        """Take checked tensors over: copied into what there is, or put in its place if assigned or absent (packed)."""
        device = self.device
        self._set_dtype(dtype)
        for name, tensor in incoming.items():
            if name == "scales":
                store: dict[str, Any] = self._buffers
            else:
                store = self._parameters
            current = store.get(name)
            if current is not None and not assign:
                current.copy_(tensor)
                continue
            tensor = tensor if assign else tensor.to(device)
            if name != "scales":
                trainable = current is not None and current.requires_grad
                same = isinstance(tensor, nn.Parameter)
                tensor = tensor.requires_grad_(trainable) if same else nn.Parameter(tensor.detach(), trainable)
            store[name] = tensor
        if "values" in incoming:
            self._settle()


def why_dense(device: torch.device, weight_dtype: torch.dtype) -> str:
    """Why a weight of this element type stays in canonical form and runs dense on a device; "" where it is packed."""
    unsupported = FLOAT32_ON_CUDA if device.type == "cuda" and weight_dtype is torch.float32 else ""
    return device_problem(device, weight_dtype) or unsupported


def device_problem(device: torch.device, weight_dtype: torch.dtype) -> str:
    """Why none of our kernels can run on a device, or ""; the first to meet a reason is warned."""
    return "" if device.type in ("cpu", "meta") else _accelerator_problem(device, weight_dtype)


def _accelerator_problem(device: torch.device, weight_dtype: torch.dtype) -> str:
    if device.type != "cuda":
        problem = f"there are no kernels for {device.type}"
    else:
        problem = ops.device_problem(device, weight_dtype)
    if problem and _warned.setdefault((device, problem), token := object()) is token:  # once, in any number of threads
        warnings.warn(f"sparse24 runs dense on {device}: {problem}", stacklevel=2)
    return problem


# What torch.compiler.assume_constant_result does, which would import torch._dynamo: seconds at every import of ours.
_accelerator_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


_warned: dict[tuple[torch.device, str], object] = {}


def _decompress_by_torch(values: Tensor, meta: Tensor, *, in_features: int, pattern: str) -> Tensor:
    """ops.decompress, by nothing but operators of torch."""
    columns = ops.columns_of(meta, in_features=in_features, pattern=pattern)
    padded = values.new_zeros((values.shape[0], 2 * values.shape[1]))
    return padded.scatter(1, columns, values)[:, :in_features]


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, detached; all of it where FSDP has sharded it."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def check_pattern(pattern: str) -> None:
    """Raises RuntimeError unless a SparseLinear can run the pattern."""
    if pattern == "pair 4:8":
        raise RuntimeError("pattern must be '2:4' or '1:2'; 'pair 4:8' is for int4 weights, which have no kernel yet")
    if pattern not in ("2:4", "1:2"):
        raise RuntimeError(f"pattern must be '2:4' or '1:2'; got {pattern!r}")


def _autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast makes of x on such a device, or None where it is off."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _check_float(dtype: torch.dtype) -> None:
    if dtype not in FLOAT_TYPES:
        raise RuntimeError(f"dtype must be float32, float16 or bfloat16; got {dtype}")
