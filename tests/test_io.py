"""save and load: round trips through one file, and every way such a file can be wrong."""

import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparse24.conversion import convert
from sparse24.io import load, save
from sparse24.nn import SparseLinear
from sparse24.pruning import prune
from sparse24.quantization import quantize

safetensors = pytest.importorskip("safetensors.torch")


class Net(nn.Module):
    """Sparse and dense layers, an embedding tied to the head, a buffer, and a layer used under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.body = nn.Sequential(nn.Linear(12, 21), nn.GELU(), nn.Linear(21, 12, bias=False), nn.BatchNorm1d(12))
        self.again = self.body[0]
        self.head = nn.Linear(12, 11)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(self.body(x) + self.again(x)[:, :12])


IDS = torch.arange(8)


def sparse_net(int8: bool = False, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net().eval()
    prune(model)
    convert(model)
    if int8:
        quantize(model)
    return model


def assert_same(left: nn.Module, right: nn.Module) -> None:
    left_state, right_state = left.state_dict(), right.state_dict()
    assert list(left_state) == list(right_state)
    for key, tensor in left_state.items():
        assert tensor.dtype is right_state[key].dtype and torch.equal(tensor, right_state[key]), key
    assert torch.equal(left.eval()(IDS), right.eval()(IDS))


@pytest.mark.parametrize("int8", [False, True], ids=["f32", "i8"])
@pytest.mark.parametrize("target", ["dense", "meta", "sparse"])
def test_round_trip(target: str, int8: bool, tmp_path: Path) -> None:
    model = sparse_net(int8)
    save(model, tmp_path / "model.safetensors")
    torch.manual_seed(5)
    with torch.device("meta" if target == "meta" else "cpu"):
        fresh = sparse_net(seed=5) if target == "sparse" else Net()
    fresh.train().body.eval()
    identity = fresh.embedding.weight
    assert load(tmp_path / "model.safetensors", fresh) is fresh
    assert fresh.training and not fresh.body[0].training
    assert_same(fresh, model)
    assert isinstance(fresh.body[0], SparseLinear) and fresh.body[0].packed is not None
    assert fresh.again is fresh.body[0] and fresh.head.weight is fresh.embedding.weight
    assert (fresh.embedding.weight is identity) == (target != "meta")
    assert fresh.embedding.weight.requires_grad and not any(t.is_meta for t in fresh.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_round_trip_of_half_types_activation_pattern_and_unpacked_layers(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        SparseLinear(9, 8, pattern="1:2", activation="gelu_tanh", dtype=dtype),
        SparseLinear(8, 7, bias=False, weight_dtype=torch.int8, dtype=dtype).pack(),
    )
    save(model, tmp_path / "model.safetensors")
    fresh = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 7, bias=False))
    load(tmp_path / "model.safetensors", fresh)
    assert [str(layer) for layer in fresh] == [str(copy.deepcopy(layer).pack()) for layer in model]
    for left, right in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(left, right)


def test_the_file_is_plain_safetensors_with_a_documented_header(tmp_path: Path) -> None:
    save(sparse_net(int8=True), tmp_path / "model.safetensors")
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["sparse24"])
        keys = set(file.keys())
    assert header["format_version"] == 1
    config = dict(in_features=12, out_features=21, bias=True, pattern="2:4", activation="none", dtype="float32")
    config |= {"kind": "linear", "weight_only": False, "x_rounding": "token", "int8_y": False, "group_size": None}
    assert header["layers"]["body.0"] == header["layers"]["again"] == {**config, "weight_dtype": "int8"}
    assert header["aliases"] == {"again.bias": "body.0.bias", "again.scales": "body.0.scales"} | {
        "head.weight": "embedding.weight"
    }
    assert {"body.0.values", "body.0.meta", "body.0.scales", "body.0.bias", "body.3.running_mean"} <= keys
    assert "head.weight" not in keys


def test_views_of_a_larger_tensor_are_stored_alone(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)})
    whole = torch.randn(8, 6)
    model["a"].weight, model["b"].weight = nn.Parameter(whole[:4]), nn.Parameter(whole[4:])
    model["a"].bias = nn.Parameter(whole[:4, 1])
    save(model, tmp_path / "model.safetensors")
    fresh = load(tmp_path / "model.safetensors", nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)}))
    for key, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], tensor)


# ---- Writing: all or nothing


def test_save_replaces_the_file_at_once_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    model = sparse_net()
    save(model, path)
    before = path.read_bytes()

    def full_disk(tensors: dict, filename: os.PathLike, metadata: dict) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save(sparse_net(seed=5), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.safetensors"]
    with path.open("rb") as reader:  # whoever reads the old file goes on reading the old file
        save(sparse_net(seed=5), path)
        assert reader.read() == before
    assert path.read_bytes() != before and os.listdir(tmp_path) == ["model.safetensors"]


def test_save_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="must be tensors with data; 0.weight is not"):
        save(nn.Sequential(nn.Linear(4, 4, device="meta")), tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="a lone SparseLinear"):
        save(SparseLinear(4, 4), tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == []


def test_without_safetensors_the_error_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: save(Net(), tmp_path / "f"), lambda: load(tmp_path / "f", Net())):
        with pytest.raises(ImportError, match=r"pip install 'sparse24\[io\]'"):
            call()


# ---- Reading: a clear error, and the model as it was


def _edit(path: Path, change) -> None:
    """Rewrite the file after change(tensors, header)."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["sparse24"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors, header)
    safetensors.save_file(tensors, path, metadata={"sparse24": json.dumps(header)})


def _bad_code(tensors: dict[str, Tensor], header: dict) -> None:
    tensors["body.2.meta"][3, 1] = 0


def _config(**changes):
    return lambda tensors, header: header["layers"]["body.2"].update(changes)


BAD_FILES = {
    "version": (lambda t, h: h.update(format_version=2), "has format version 2; this sparse24 reads 1"),
    "no-version": (lambda t, h: h.pop("format_version"), "damaged sparse24 header: KeyError.*format_version"),
    "no-field": (lambda t, h: h["layers"]["body.0"].pop("pattern"), "damaged sparse24 header: KeyError.*pattern"),
    "alias": (lambda t, h: h["aliases"].update({"head.weight": "nowhere"}), "damaged sparse24 header: .*nowhere"),
    "layers-list": (lambda t, h: h.update(layers=[1]), "damaged sparse24 header"),
    "no-such-layer": (
        lambda t, h: h["layers"].update({"body.9": h["layers"]["body.0"]}),
        r"layer body.9: .*has no attribute `9`",
    ),
    "not-linear": (
        lambda t, h: h["layers"].update({"body.1": h["layers"]["body.0"]}),
        "layer body.1: it is GELU in the model and linear in the file",
    ),
    "shape": (_config(in_features=20), r"layer body.2: .* is \(21, 12, False\) in the model and \(20, 12, False\)"),
    "bias": (_config(bias=True), r"layer body.2: .*\(21, 12, False\) in the model and \(21, 12, True\) in the file"),
    "pattern": (_config(pattern="pair 4:8"), "layer body.2: pattern must be '2:4' or '1:2'"),
    "stricter-pattern": (_config(pattern="1:2"), r"layer body.2: body\.2\.meta: .*one of each half"),
    "activation": (_config(activation="tanh"), "layer body.2: activation must be one of none, .*; got 'tanh'"),
    "dtype": (_config(dtype="Tensor"), "layer body.2: 'Tensor' is not a dtype"),
    "weight-dtype": (_config(weight_dtype="int8"), r"layer body.2: .*body\.2\.values must be .*torch.int8; got"),
    "meta-code": (_bad_code, r"layer body.2: body\.2\.meta: .*row 3, group 2"),
    "values-dtype": (
        lambda t, h: t.update({"body.2.values": t["body.2.values"].double()}),
        r"layer body.2: body\.2\.values must be \[12, 12\] torch.float32; got \[12, 12\] torch.float64",
    ),
    "missing-values": (lambda t, h: t.pop("body.2.values"), r"layer body.2: .*body\.2\.values is missing"),
    "foreign-in-layer": (lambda t, h: t.update({"body.2.x": torch.ones(1)}), r"body\.2\.x is not of this layer"),
    "missing-dense": (lambda t, h: t.pop("head.bias"), "head.bias is in the model and not in the file"),
    "extra-dense": (lambda t, h: t.update(extra=torch.ones(1)), "extra is in the file and not in the model"),
    "dense-shape": (
        lambda t, h: t.update({"head.bias": torch.ones(12)}),
        r"head.bias is \[11\] torch.float32 in the model and \[12\] torch.float32 in the file",
    ),
    "dense-dtype": (
        lambda t, h: t.update({"head.bias": t["head.bias"].half()}),
        r"head.bias is \[11\] torch.float32 in the model and \[11\] torch.float16 in the file",
    ),
}


def _assert_refused(path: Path, message: str, error: type[Exception] = RuntimeError) -> None:
    torch.manual_seed(7)
    fresh = Net()
    modules, state = list(fresh.modules()), copy.deepcopy(fresh.state_dict())
    with pytest.raises(error, match=message):
        load(path, fresh)
    assert all(left is right for left, right in zip(fresh.modules(), modules, strict=True))
    for key, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_and_the_model_is_untouched(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(sparse_net(), path)
    change, message = BAD_FILES[name]
    _edit(path, change)
    _assert_refused(path, message)


@pytest.mark.parametrize("size", [0, 4, 100, -1], ids=["empty", "no-length", "in-header", "last-byte-lost"])
def test_truncated_file_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(sparse_net(), path)
    path.write_bytes(path.read_bytes()[:size])
    _assert_refused(path, r"model\.safetensors is not a whole safetensors file")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.save_file({"head.bias": torch.ones(11)}, path)
    _assert_refused(path, "a safetensors file, but not one of sparse24.save")
    safetensors.save_file({"head.bias": torch.ones(11)}, path, metadata={"sparse24": "{"})
    _assert_refused(path, "has a damaged sparse24 header: JSONDecodeError")
    path.write_bytes(os.urandom(2000))
    _assert_refused(path, "is not a whole safetensors file")
    _assert_refused(tmp_path / "absent", "absent", FileNotFoundError)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    save(nn.Sequential(nn.Linear(4, 4), SparseLinear(4, 4)), tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError) as caught:
        load(tmp_path / "model.safetensors", nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and "0.bias" in lines[1] and "0.weight" in lines[2] and "layer 1" in lines[3]


def test_a_buffer_that_no_file_holds_cannot_stay_on_meta(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8))
        model.register_buffer("positions", torch.arange(8), persistent=False)
        return model

    model = build()
    prune(model)
    convert(model)
    save(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        fresh = build()
    with pytest.raises(RuntimeError, match="positions is a buffer on the meta device that no file has"):
        load(tmp_path / "model.safetensors", fresh)
    assert fresh[0].weight.is_meta
