"""SparseLinear: one test or more for each clause of its state contract, and its forward against float64."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_linear
from torch import Tensor, nn

from sparse24 import ops
from sparse24.nn import SparseLinear
from sparse24.rounding import fake_quantize, quantize_rows

KINDS: dict[str, dict] = {
    "f32": {},
    "f16": {"dtype": torch.float16},
    "bf16": {"dtype": torch.bfloat16},
    "1:2": {"pattern": "1:2"},
    "i8": {"weight_dtype": torch.int8},
    "i8-bf16": {"weight_dtype": torch.int8, "dtype": torch.bfloat16},
    "no-bias": {"bias": False},
}
FORMS = ["packed", "unpacked"]
K, N = 19, 7  # a tail of three columns, an odd number of groups, an odd number of rows

every_kind = pytest.mark.parametrize("kind", KINDS)
every_form = pytest.mark.parametrize("form", FORMS)


def make(kind: str = "f32", form: str = "unpacked", seed: int = 0, **arguments) -> SparseLinear:
    torch.manual_seed(seed)
    layer = SparseLinear(K, N, **{**KINDS[kind], **arguments})
    return layer.pack() if form == "packed" else layer


def tokens(layer: SparseLinear, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, layer.in_features, generator=torch.Generator().manual_seed(seed)).to(layer.dtype)


def dense_weight(layer: SparseLinear) -> Tensor:
    """What the layer multiplies by, in float64, from its saved state alone."""
    state = layer.state_dict()
    weight = ops.decompress(state["values"], state["meta"], in_features=layer.in_features, pattern=layer.pattern)
    return weight.double() * (state["scales"].double()[:, None] if "scales" in state else 1)


def rounded(layer: SparseLinear, x: Tensor) -> Tensor:
    """x as the layer multiplies it: an int8 layer rounds each row."""
    if layer.weight_dtype is not torch.int8:
        return x.double()
    q, scale = quantize_rows(x.float())
    return q.double() * scale.double()


def assert_same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for key in left:
        assert left[key].dtype is right[key].dtype
        assert torch.equal(left[key], right[key]), key


# ---- Making a layer


@every_kind
def test_new_layer_is_legal_and_starts_like_linear(kind: str) -> None:
    layer = make(kind)
    groups = 5
    assert layer.values.shape == (N, 2 * groups) and layer.values.dtype is layer.weight_dtype
    assert layer.meta.shape == (N, 3) and layer.meta.dtype is torch.uint8
    assert not layer.meta.requires_grad and layer.values.requires_grad == layer.weight_dtype.is_floating_point
    assert (layer.scales is not None) == (layer.weight_dtype is torch.int8)
    torch.manual_seed(0)
    dense = nn.Linear(K, N, dtype=layer.dtype, bias=layer.bias is not None)
    mask = ops.prune_mask(dense.weight.detach(), layer.pattern)
    expected = torch.where(mask, dense.weight, 0).detach().double()
    if layer.scales is not None:
        q, scale = quantize_rows(expected.float())
        expected = q.double() * scale.double()
    assert torch.equal(dense_weight(layer), expected)
    if layer.bias is not None:
        assert torch.equal(layer.bias, dense.bias)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@every_form
@pytest.mark.parametrize("weight_dtype", [None, torch.int8])
@pytest.mark.parametrize("in_features,out_features", [(0, 3), (3, 0), (1, 1)])
def test_sizes_of_nothing_and_one(in_features: int, out_features: int, weight_dtype: torch.dtype, form: str) -> None:
    layer = SparseLinear(in_features, out_features, weight_dtype=weight_dtype)
    x = tokens(layer, 2)
    y = (layer.pack() if form == "packed" else layer)(x)
    assert_linear(y.detach(), rounded(layer, x), dense_weight(layer), layer.bias)


@pytest.mark.parametrize("in_features", [1, 2, 3, 4, 5, 8, 31, 64])
@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_from_dense_holds_the_weight_bit_by_bit(in_features: int, pattern: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(in_features, 5, dtype=dtype).eval()
    with torch.no_grad():
        dense.weight.copy_(torch.where(ops.prune_mask(dense.weight, pattern), dense.weight, 0))
    dense.bias.requires_grad_(False)
    layer = SparseLinear.from_dense(dense, pattern=pattern, activation="relu")
    assert torch.equal(layer.weight.detach(), dense.weight)
    assert torch.equal(layer.pack().weight.detach(), dense.weight)
    assert torch.equal(layer.bias, dense.bias) and layer.bias.data_ptr() != dense.bias.data_ptr()
    assert (layer.training, layer.bias.requires_grad, layer.activation, layer.dtype) == (False, False, "relu", dtype)


def test_from_dense_never_drops_a_value() -> None:
    dense = nn.Linear(8, 3)
    nn.init.zeros_(dense.weight)
    dense.weight.data[2, 4:7] = torch.tensor([1.0, float("nan"), -2.0])
    with pytest.raises(RuntimeError, match=r"row 2, group 1.*\[1, nan, -2, 0\]"):
        SparseLinear.from_dense(dense)


BAD_ARGUMENTS = {
    "pair": ({"pattern": "pair 4:8"}, r"pattern must be '2:4' or '1:2' for a float32 weight; 'pair 4:8' is for int4"),
    "pattern": ({"pattern": "4:2"}, r"pattern must be '2:4' or '1:2'; got '4:2'"),
    "activation": ({"activation": "tanh"}, r"activation must be one of none, relu,.*; got 'tanh'"),
    "dtype": ({"dtype": torch.float64}, r"dtype must be float32, float16 or bfloat16; got torch.float64"),
    "weight_dtype": (
        {"weight_dtype": torch.float16},
        r"weight_dtype must be torch.int8, torch.int4 or dtype \(torch.float32\)",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_argument(name: str) -> None:
    arguments, message = BAD_ARGUMENTS[name]
    with pytest.raises(RuntimeError, match=message):
        SparseLinear(8, 8, **arguments)


# ---- Forward


@every_form
@every_kind
@pytest.mark.parametrize("activation", list(ops.ACTIVATIONS))
def test_forward_is_within_the_bound_of_float64(kind: str, form: str, activation: str) -> None:
    layer = make(kind, form, activation=activation)
    x = tokens(layer, 2, 5)
    # Unpacked float layers round to the output type before their activation as well.
    roundings = 2 if form == "unpacked" and layer.scales is None and activation != "none" else 1
    with torch.no_grad():
        assert_linear(layer(x), rounded(layer, x), dense_weight(layer), layer.bias, activation, roundings)


@every_form
@pytest.mark.parametrize("kind", ["f32", "i8"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 4)], ids=str)
def test_leading_dimensions(kind: str, form: str, shape: tuple[int, ...]) -> None:
    layer = make(kind, form)
    x = tokens(layer, *shape)
    with torch.no_grad():
        y = layer(x)
    assert y.shape == (*shape, N)
    if y.numel():
        assert_linear(y, rounded(layer, x), dense_weight(layer), layer.bias)


@every_form
def test_row_stride_and_offset(form: str) -> None:
    layer = make("f32", form)
    x = tokens(layer, 4, 3)
    wide = torch.full((4, 3, K + 6), float("nan"))
    wide[..., 1 : K + 1] = x
    with torch.no_grad():
        assert_linear(layer(wide[..., 1 : K + 1]), x, dense_weight(layer), layer.bias)
        assert_linear(layer(x.transpose(0, 1)), x.transpose(0, 1), dense_weight(layer), layer.bias)


@every_form
def test_x_must_match_the_weight(form: str) -> None:
    layer = make("f32", form)
    with pytest.raises(RuntimeError, match=r"x must be \[\.\.\., 19\] to match weight \[7, 19\]; got \[8, 197, 18\]"):
        layer(torch.zeros(8, 197, 18))
    with pytest.raises(RuntimeError, match=r"x must be \[\.\.\., 19\] .*got \[\]"):
        layer(torch.tensor(1.0))


@every_form
@every_kind
def test_x_must_have_the_dtype_of_the_layer(kind: str, form: str) -> None:
    layer = make(kind, form)
    other = torch.float16 if layer.dtype is not torch.float16 else torch.float32
    with pytest.raises(RuntimeError, match=rf"x must be {layer.dtype}, the dtype of this layer.*got {other}"):
        layer(tokens(layer, 2).to(other))


@every_form
@every_kind
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_casts_x(kind: str, form: str, x_dtype: torch.dtype) -> None:
    layer = make(kind, form)
    x = tokens(layer, 3).to(x_dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    weight, bias, seen = dense_weight(layer), layer.bias, rounded(layer, x.bfloat16())
    if layer.scales is None and form == "unpacked":  # F.linear casts all three; a packed weight keeps its precision
        weight, bias = weight.bfloat16(), None if bias is None else bias.bfloat16()
    assert_linear(y, seen, weight, bias)


@every_form
@every_kind
def test_forward_does_not_touch_the_module(kind: str, form: str) -> None:
    layer = make(kind, form)
    tensors = {**layer._parameters, **layer._buffers}
    before = dict(vars(layer)), {name: (id(t), None if t is None else t._version) for name, t in tensors.items()}
    layer(tokens(layer, 3))
    tensors = {**layer._parameters, **layer._buffers}
    after = dict(vars(layer)), {name: (id(t), None if t is None else t._version) for name, t in tensors.items()}
    assert before == after


# ---- The two forms


@every_kind
def test_exactly_one_form_is_resident(kind: str) -> None:
    layer = make(kind)
    names = [name for name, _ in layer.named_parameters()]
    state = copy.deepcopy(layer.state_dict())
    assert layer.packed is None

    assert layer.pack() is layer
    assert [name for name, _ in layer.named_parameters()] == (["bias"] if "bias" in names else [])
    assert type(layer.packed) is Tensor and layer.packed.dtype is torch.uint8 and not layer.packed.requires_grad
    assert "packed" not in layer.state_dict() and "packed" in dict(layer.named_buffers())
    for name in ("values", "meta"):
        assert not hasattr(layer, name)
        with pytest.raises(AttributeError, match=rf"a packed SparseLinear has no {name}: call unpack\(\)"):
            getattr(layer, name)
        with pytest.raises(AttributeError, match=rf"a packed SparseLinear has no {name}: call unpack\(\)"):
            setattr(layer, name, nn.Parameter(torch.zeros(1)))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        layer.nonsense  # noqa: B018

    assert layer.unpack() is layer
    assert layer.packed is None
    assert [name for name, _ in layer.named_parameters()] == names
    assert layer.values.requires_grad == layer.weight_dtype.is_floating_point
    assert_same_state(layer.state_dict(), state)


def test_packing_twice_and_unpacking_twice_change_nothing() -> None:
    layer = make("f32", "packed")
    packed = layer.packed
    assert layer.pack().packed is packed
    values = layer.unpack().values
    assert layer.unpack().values is values


def test_a_device_without_sparse_kernels_keeps_the_canonical_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """What float32 does on CUDA, acted out on the CPU; test_device_nn.py has more."""
    layer = make("f32")
    x = tokens(layer, 3)
    with monkeypatch.context() as patch:
        patch.setattr(SparseLinear, "_why_canonical", lambda self, device: "because")
        layer.pack()
        assert layer.packed is None and not layer.values.requires_grad
        assert_linear(layer(x).detach(), x, dense_weight(layer), layer.bias)
        layer.bfloat16().float()
        assert layer.packed is None
    layer.half()  # any move settles a frozen layer into the form of where it is
    assert layer.packed is not None


# ---- state_dict


@every_kind
def test_state_dict_is_canonical_in_both_forms(kind: str) -> None:
    layer = make(kind)
    keys = ["values", "meta"] + ["bias"] * (layer.bias is not None) + ["scales"] * (layer.scales is not None)
    unpacked = copy.deepcopy(layer.state_dict())
    packed = layer.pack().state_dict()
    assert list(unpacked) == keys
    assert_same_state(packed, unpacked)
    assert all(type(t) is Tensor for t in packed.values())
    assert list(nn.Sequential(layer).state_dict()) == ["0." + key for key in keys]


@every_kind
@every_form
@pytest.mark.parametrize("source", FORMS)
def test_strict_load(kind: str, form: str, source: str) -> None:
    model, other = nn.Sequential(make(kind, form)), nn.Sequential(make(kind, source, seed=5))
    identities = {name: id(p) for name, p in model.named_parameters()}
    assert str(model.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert_same_state(model.state_dict(), other.state_dict())
    assert (model[0].packed is not None) == (form == "packed")
    assert {name: id(p) for name, p in model.named_parameters()} == identities  # an optimiser still holds them
    x = tokens(model[0], 3)
    assert torch.equal(model[0].pack()(x), other[0].pack()(x))


@every_kind
@every_form
def test_assign_takes_the_tensors_and_their_float_type(kind: str, form: str) -> None:
    source = make(kind, seed=5).half()
    state = source.state_dict()
    layer = make(kind, form)
    layer.load_state_dict(state, assign=True)
    takes_half = layer.scales is None or layer.bias is not None
    assert layer.dtype is (torch.float16 if takes_half else KINDS[kind].get("dtype", torch.float32))
    assert layer.weight_dtype is (torch.int8 if layer.scales is not None else layer.dtype)
    assert_same_state(layer.state_dict(), state)
    if form == "unpacked":
        assert layer.values.data_ptr() == state["values"].data_ptr()
        assert layer.values.requires_grad == layer.weight_dtype.is_floating_point
    assert torch.equal(layer.pack()(tokens(layer, 3)), source.pack()(tokens(layer, 3)))


@every_kind
def test_meta_device(kind: str) -> None:
    source = make(kind)
    layer = make(kind, device="meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    assert layer(torch.empty(3, K, dtype=layer.dtype, device="meta")).shape == (3, N)
    layer.pack()
    assert layer.packed.is_meta and all(t.is_meta for t in layer.state_dict().values())
    assert layer(torch.empty(3, K, dtype=layer.dtype, device="meta")).shape == (3, N)

    with pytest.raises(RuntimeError, match="on the meta device; load with assign=True, or call to_empty"):
        layer.load_state_dict(source.state_dict())
    assigned = copy.deepcopy(layer)
    assigned.load_state_dict(source.state_dict(), assign=True)
    emptied = layer.to_empty(device="cpu")  # any bytes: not validated, and never read out of bounds
    assert emptied(tokens(source, 3)).shape == (3, N)
    emptied.load_state_dict(source.state_dict())
    expected = source.pack()(tokens(source, 3))
    for loaded in (assigned, emptied):
        assert loaded.packed is not None
        assert torch.equal(loaded(tokens(source, 3)), expected)


def test_skip_init_and_default_device() -> None:
    layer = nn.utils.skip_init(SparseLinear, 8, 4)
    assert layer.values.device.type == "cpu"
    with torch.device("meta"):
        assert SparseLinear(8, 4).values.is_meta


@every_kind
@every_form
def test_weights_only_file(kind: str, form: str) -> None:
    layer = make(kind, form)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = make(kind, seed=5)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(fresh.state_dict(), layer.state_dict())


@every_kind
@every_form
def test_safetensors_round_trip(kind: str, form: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layer = make(kind, form)
    fresh = make(kind, device="meta")
    fresh.load_state_dict(safetensors.load(safetensors.save(layer.state_dict())), assign=True)
    assert_same_state(fresh.state_dict(), layer.state_dict())


def test_load_hooks_run() -> None:
    layer, other = make("f32", "packed"), make("f32", seed=5)
    layer.register_load_state_dict_pre_hook(lambda module, state, *_: state.update(values=2 * state["values"]))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.state_dict()["values"], 2 * other.values)


# ---- Bad state: each is refused by name, and the layer stays as it was

Change = Callable[[dict[str, Tensor]], object]


def _set(key: str, place: tuple[int, ...], value: float) -> Change:
    def change(state: dict[str, Tensor]) -> None:
        state[key] = state[key].clone()
        state[key][place] = value

    return change


BAD_STATES: dict[str, tuple[str, Change, str]] = {
    "values-dtype": ("f32", lambda s: s.update(values=s["values"].double()), r"0\.values must be \[7, 10\] torch.flo"),
    "values-int8": ("f32", lambda s: s.update(values=s["values"].to(torch.int8)), r"0\.values must be .*got .*int8"),
    "values-float": (
        "i8",
        lambda s: s.update(values=s["values"].float()),
        r"0\.values must be \[7, 10\] torch.int8; g",
    ),
    "values-shape": ("f32", lambda s: s.update(values=s["values"][:, :8]), r"0\.values must be .*got \[7, 8\]"),
    "values-truncated": ("f32", lambda s: s.update(values=s["values"][:6]), r"0\.values must be .*got \[6, 10\]"),
    "values-flat": ("f32", lambda s: s.update(values=s["values"].flatten()), r"0\.values must be .*got \[70\]"),
    "values-list": ("f32", lambda s: s.update(values=[1.0]), r"0\.values must be a Tensor; got list"),
    "meta-dtype": ("f32", lambda s: s.update(meta=s["meta"].int()), r"0\.meta must be \[7, 3\] torch.uint8; .*int32"),
    "meta-shape": ("f32", lambda s: s.update(meta=s["meta"][:, :2]), r"0\.meta must be \[7, 3\] .*got \[7, 2\]"),
    "meta-zero-code": ("f32", _set("meta", (4, 1), 0x40), r"0\.meta: .*row 4, group 2"),
    "meta-order": ("i8", _set("meta", (1, 0), 0x14), r"0\.meta: .*row 1, group 1"),
    "meta-not-1:2": ("1:2", _set("meta", (0, 0), 0x44), r"0\.meta: .*row 0, group 0"),
    "meta-unused-half": ("f32", _set("meta", (6, 2), 0x44), r"0\.meta: .*row 6"),
    "beyond-k": (
        "bf16",
        lambda s: (_set("meta", (2, 2), 0xE)(s), _set("values", (2, 9), 1)(s)),
        r"0\.values: values are corrupt.*row 2",
    ),
    "bias-shape": ("f32", lambda s: s.update(bias=s["bias"][:6]), r"0\.bias must be \[7\] torch.float32; got \[6\]"),
    "bias-dtype": ("f32", lambda s: s.update(bias=s["bias"].half()), r"0\.bias must be \[7\] torch.float32; .*float16"),
    "scales-nan": ("i8", _set("scales", (3,), float("nan")), r"0\.scales must be finite; got nan in row 3"),
    "scales-inf": ("i8", _set("scales", (6,), float("inf")), r"0\.scales must be finite; got inf in row 6"),
    "scales-dtype": ("i8", lambda s: s.update(scales=s["scales"].half()), r"0\.scales must be \[7\] torch.float32; g"),
    "scales-shape": ("i8", lambda s: s.update(scales=s["scales"][:, None]), r"0\.scales must be \[7\].*got \[7, 1\]"),
    "missing-meta": ("f32", lambda s: s.pop("meta"), r'Missing key.*"0\.meta"'),
    "missing-scales": ("i8", lambda s: s.pop("scales"), r'Missing key.*"0\.scales"'),
    "unexpected-scales": ("f32", lambda s: s.update(scales=torch.ones(N)), r'Unexpected key.*"0\.scales"'),
    "dense": ("f32", lambda s: s.update(weight=s.pop("values")), r'Missing.*"0\.values"(?s:.*)Unexpected.*"0\.weight"'),
}


@every_form
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_state_is_refused_and_changes_nothing(name: str, form: str, assign: bool) -> None:
    kind, change, message = BAD_STATES[name]
    layer = make(kind, form)
    before, x = copy.deepcopy(layer.state_dict()), tokens(layer, 3)
    y = layer(x)
    state = make(kind, seed=5).state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(layer).load_state_dict({"0." + key: value for key, value in state.items()}, assign=assign)
    if name != "unexpected-scales":  # as in nn.Module, an unexpected key does not stop the others
        assert_same_state(layer.state_dict(), before)
        assert (layer.packed is not None) == (form == "packed") and torch.equal(layer(x), y)


@every_form
def test_state_without_data_is_refused_unless_assigned(form: str) -> None:
    layer = make("f32", form)
    before = copy.deepcopy(layer.state_dict())
    state = {key: tensor.to("meta") for key, tensor in before.items()}
    with pytest.raises(RuntimeError, match="the state is on the meta device and has no data"):
        layer.load_state_dict(state)
    assert_same_state(layer.state_dict(), before)
    layer.load_state_dict(state, assign=True)
    assert layer.device.type == "meta"


@every_form
def test_not_strict_loads_what_is_there_but_never_half_a_weight(form: str) -> None:
    layer, other = make("f32", form), make("f32", seed=5)
    before = copy.deepcopy(layer.state_dict())
    result = layer.load_state_dict({"bias": other.bias, "foreign": torch.ones(1)}, strict=False)
    assert result.missing_keys == ["values", "meta"] and result.unexpected_keys == ["foreign"]
    assert torch.equal(layer.bias, other.bias) and torch.equal(layer.state_dict()["values"], before["values"])
    with pytest.raises(RuntimeError, match="values, meta belong together; meta did not come"):
        layer.load_state_dict({"values": other.values}, strict=False)
    assert torch.equal(layer.state_dict()["values"], before["values"])


# ---- dtype and device moves


@every_form
@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtype_moves_change_floats_and_never_the_scales(kind: str, form: str, dtype: torch.dtype) -> None:
    layer = make(kind, form)
    before = copy.deepcopy(layer.state_dict())
    assert layer.to(dtype) is layer
    after = layer.state_dict()
    assert layer.dtype is dtype and (layer.packed is not None) == (form == "packed")
    for key, tensor in before.items():
        kept = key in ("meta", "scales") or tensor.dtype is torch.int8
        assert torch.equal(after[key], tensor if kept else tensor.to(dtype)), key
    x = tokens(layer, 3)
    y = layer(x)
    assert y.dtype is dtype
    assert_linear(y.detach(), rounded(layer, x), dense_weight(layer), layer.bias)


@every_kind
@every_form
def test_widening_and_back_is_exact(kind: str, form: str) -> None:
    layer = make(kind, form).bfloat16()
    state = copy.deepcopy(layer.state_dict())
    assert_same_state(layer.float().bfloat16().state_dict(), state)


@every_form
def test_float64_is_refused_by_name(form: str) -> None:
    layer = make("f32", form)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="dtype must be float32, float16 or bfloat16; got torch.float64"):
        layer.double()
    assert_same_state(layer.state_dict(), before)
    assert (layer.packed is not None) == (form == "packed")


@every_kind
def test_type_leaves_integers_alone(kind: str) -> None:
    layer = make(kind, "packed")
    before = copy.deepcopy(layer.state_dict())
    layer.type(torch.float16)  # nn.Module.type casts every tensor, integers too
    after = layer.state_dict()
    assert layer.dtype is torch.float16
    assert torch.equal(after["meta"], before["meta"]) and after["values"].dtype is layer.weight_dtype


@every_form
def test_shared_memory_holds_the_resident_form(form: str) -> None:
    layer = make("i8", form).share_memory()
    assert all(t.is_shared() for t in [*layer.parameters(), *layer.buffers()])
    assert (layer.packed is not None) == (form == "packed")


def test_a_move_that_fails_leaves_the_layer_as_it_was() -> None:
    layer = make("f32", "packed")
    x = tokens(layer, 3)
    y = layer(x)

    def fail_on_meta(tensor: Tensor) -> Tensor:
        if tensor.dtype is torch.uint8:
            raise MemoryError
        return tensor.half() if tensor.numel() == 0 else tensor

    with pytest.raises(MemoryError):
        layer._apply(fail_on_meta)
    assert layer.packed is not None and torch.equal(layer(x), y)


# ---- Copies and pickles


@every_form
@every_kind
def test_copies_and_pickles_are_equal_and_independent(kind: str, form: str) -> None:
    layer = make(kind, form).eval()
    x = tokens(layer, 3)
    file = io.BytesIO()
    torch.save(nn.Sequential(layer), file)
    file.seek(0)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)[0]]
    for twin in twins:
        assert (twin.packed is not None) == (form == "packed") and not twin.training
        assert_same_state(twin.state_dict(), layer.state_dict())
        assert torch.equal(twin(x), layer(x))
        twin.load_state_dict(make(kind, seed=5).state_dict())
        assert not torch.equal(twin(x), layer(x))


def test_a_pickle_stores_the_canonical_form() -> None:
    state = make("f32", "packed").__getstate__()
    assert state["_buffers"]["packed"] is None and list(state["_parameters"]) == ["values", "meta", "bias"]


def test_a_damaged_pickle_is_refused() -> None:
    layer = make("f32")
    layer.meta[3, 0] = 0
    with pytest.raises(RuntimeError, match="this pickled SparseLinear is damaged: meta: .*row 3, group 0"):
        pickle.loads(pickle.dumps(layer))
    layer = make("i8")
    layer.scales[2] = float("inf")
    with pytest.raises(RuntimeError, match="damaged: scales must be finite; got inf in row 2"):
        pickle.loads(pickle.dumps(layer))


# ---- weight


@every_form
@every_kind
def test_weight_knows_itself_without_decompressing(kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(kind, form)
    expected = dense_weight(layer).to(layer.dtype)
    calls = []
    decompress = ops.decompress
    monkeypatch.setattr(ops, "decompress", lambda *a, **k: calls.append(1) or decompress(*a, **k))
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device) == ((N, K), layer.dtype, torch.device("cpu"))
    assert weight.numel() == N * K and not weight.requires_grad and weight.dim() == 2
    assert torch.overrides.has_torch_function((weight,))
    assert not calls
    assert torch.equal(weight.detach(), expected) and calls == [1]
    assert type(weight.detach()) is Tensor
    assert torch.equal(weight.T @ weight, expected.T @ expected)
    assert torch.equal(torch.as_tensor(weight.float().numpy()), expected.float())
    assert weight.tolist() == expected.tolist() and weight[1, 2] == expected[1, 2]
    assert torch.equal(copy.deepcopy(weight), expected)
    assert torch.equal(pickle.loads(pickle.dumps(weight)), expected)
    x = tokens(layer, 3)
    assert torch.equal(F.linear(x, weight), F.linear(x, expected))


WRITES: dict[str, Callable[[SparseLinear], object]] = {
    "normal_": lambda layer: layer.weight.normal_(),
    "data": lambda layer: layer.weight.data.zero_(),
    "item": lambda layer: layer.weight.__setitem__((0, 0), 1.0),
    "init": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "out": lambda layer: torch.add(torch.ones(N, K), 1, out=layer.weight),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(N, K)),
}


@every_form
@pytest.mark.parametrize("name", WRITES)
def test_writing_into_weight_raises(name: str, form: str) -> None:
    layer = make("f32", form)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="weight is read-only"):
        WRITES[name](layer)
    assert_same_state(layer.state_dict(), before)


@every_form
@pytest.mark.parametrize("value", [torch.zeros(N, K), nn.Parameter(torch.zeros(N, K)), None], ids=repr)
def test_assigning_weight_raises(value: object, form: str) -> None:
    with pytest.raises(AttributeError, match="weight is read-only"):
        make("f32", form).weight = value


# ---- Gradients


@every_form
@pytest.mark.parametrize("kind", ["f32", "1:2", "i8"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradients_reach_x_and_bias(kind: str, form: str, activation: str) -> None:
    layer = make(kind, form, activation=activation)
    x = tokens(layer, 2, 5).requires_grad_()
    grad = torch.randn(2, 5, N)
    layer(x).backward(grad)
    # int8 rounds x, and lets the gradient pass straight: the reference is at the rounded x.
    x64 = rounded(layer, x.detach()).requires_grad_()
    bias64 = layer.bias.detach().double().requires_grad_()
    weight = dense_weight(layer)
    product = F.linear(x64, weight, bias64)
    (F.gelu(product) if activation == "gelu" else product).backward(grad.double())
    scale = grad.abs().double() @ weight.abs()
    # A product of N terms whose factors carry the error of K: (N + K) 2^-23, and 2^-19 for the slope of gelu.
    relative = (N + K) * 2**-23 + (2**-19 if activation == "gelu" else 0)
    assert ((x.grad - x64.grad).abs() <= relative * scale).all()
    assert ((layer.bias.grad - bias64.grad).abs() <= relative * grad.abs().sum((0, 1))).all()


@pytest.mark.parametrize("kind", ["f32", "1:2"])
def test_values_train_and_the_pattern_stays(kind: str) -> None:
    layer = make(kind)
    pattern = dense_weight(layer) != 0
    x, target = tokens(layer, 64), torch.randn(64, N)
    weight64 = dense_weight(layer).requires_grad_()
    layer(x).backward(target)
    F.linear(x.double(), weight64, layer.bias.detach().double()).backward(target.double())
    dense_grad = ops.decompress(layer.values.grad, layer.meta, in_features=K, pattern=layer.pattern)
    bound = 2**-17 * (target.T.abs().double() @ x.abs().double())
    assert ((dense_grad - weight64.grad).abs() <= bound)[pattern].all()
    assert (dense_grad[~pattern] == 0).all()

    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert ((dense_weight(layer) != 0) == pattern).all()
    with torch.no_grad():
        y = layer(x)
        assert_linear(layer.pack()(x), x, dense_weight(layer), layer.bias)
        assert_linear(y, x, dense_weight(layer), layer.bias)


def test_a_packed_layer_offers_an_optimiser_its_bias_alone() -> None:
    layer = make("f32", "packed")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    weight = dense_weight(layer)
    layer(tokens(layer, 3)).sum().backward()
    optimizer.step()
    assert [p.shape for p in optimizer.param_groups[0]["params"]] == [(N,)]
    assert torch.equal(dense_weight(layer), weight)


def test_fsdp_shards_trains_and_loads_an_unpacked_layer() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer, plain = make("f32"), make("f32")
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        x = tokens(plain, 3)
        layer(x).sum().backward()
        plain(x).sum().backward()
        assert type(layer.values).__name__ == "DTensor"
        assert torch.equal(layer.values.grad.full_tensor(), plain.values.grad)
        for model in (layer, plain):
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        state = copy.deepcopy(layer.state_dict())
        assert_same_state({key: t.full_tensor() for key, t in state.items()}, plain.state_dict())
        with torch.no_grad():
            layer.values.zero_()
        layer.load_state_dict(state)
        assert torch.equal(layer(x), plain(x))
    finally:
        dist.destroy_process_group()


# ---- int8


@pytest.mark.parametrize("form", FORMS)
def test_quantize_in_place_uses_the_rule_of_the_dense_weight(form: str) -> None:
    layer = make("f32", form)
    q, scale = quantize_rows(dense_weight(layer).float())
    assert layer.quantize() is layer
    assert layer.weight_dtype is torch.int8 and layer.dtype is torch.float32
    assert (layer.packed is not None) == (form == "packed")
    state = layer.state_dict()
    dense = ops.decompress(state["values"], state["meta"], in_features=K)
    assert torch.equal(dense, q.to(torch.int8)) and torch.equal(state["scales"], scale.squeeze(1))
    assert_same_state(layer.quantize().state_dict(), state)
    x = tokens(layer, 3)
    assert_linear(layer(x).detach(), rounded(layer, x), dense_weight(layer), layer.bias)


def test_quantize_refuses_what_is_not_finite() -> None:
    layer = make("f32", "packed")
    state = layer.state_dict()
    state["values"][4, 1] = float("inf")
    layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="a weight must be finite to become int8; row 4 is not"):
        layer.quantize()
    assert layer.weight_dtype is torch.float32
    assert_same_state(layer.state_dict(), state)


def test_rounding_rule() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [127.0, 0.5, -1.5], [-254.0, 5.0, 3.0], [1.0, float("inf"), 2.0]])
    q, scale = quantize_rows(x)
    assert q[:3].tolist() == [[0, 0, 0], [127, 0, -2], [-127, 2, 2]]  # ties go to the even neighbour
    assert scale[:3, 0].tolist() == [1, 1, 2]
    assert fake_quantize(x)[3].isnan().all()
    assert fake_quantize(torch.tensor([float("nan"), 1.0])).isnan().all()


@every_form
def test_int8_row_that_is_not_finite_gives_nan(form: str) -> None:
    layer = make("i8", form)
    x = tokens(layer, 3)
    x[1, 4] = float("inf")
    x[2, 4] = float("nan")
    y = layer(x)
    assert y[1:].isnan().all() and y[0].isfinite().all()


def test_repr_says_what_the_layer_is() -> None:
    text = repr(make("i8-bf16", "packed", activation="gelu"))
    expected = "in_features=19, out_features=7, bias=True, pattern=2:4, dtype=torch.bfloat16"
    assert text == f"SparseLinear({expected}, weight_dtype=torch.int8, activation=gelu, packed=True)"
