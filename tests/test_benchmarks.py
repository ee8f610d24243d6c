"""The benchmarks measure what they say: right numbers first, fair turns, nothing lost, README from the JSON alone."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor

import sparse24
from benchmarks import measure
from benchmarks.cpu import __main__ as command
from benchmarks.cpu import ceilings, cell, encoders, linear, results, rivals, summary
from benchmarks.cpu.cell import Cell, Refused
from benchmarks.cpu.checks import Wrong
from benchmarks.cpu.conv import Conv
from benchmarks.measure import Spread
from sparse24 import ops

# ---- Timing ----------------------------------------------------------------------------------------------------------


def test_spread_is_median_and_percentiles():
    assert Spread.of(range(11, 0, -1)) == Spread(median=6, p20=3, p80=9, samples=11)


def test_ratio_is_taken_within_rounds():
    assert measure.ratio([2.0, 20.0, 6.0], [1.0, 5.0, 2.0]) == Spread(median=3, p20=2.4, p80=3.6, samples=3)


class Clock:
    """Calls of known cost, and the order in which they came."""

    def __init__(self, **costs: float | list[float]) -> None:
        self.now, self.order = 0.0, ""
        self.costs = {name: itertools.cycle(cost if isinstance(cost, list) else [cost]) for name, cost in costs.items()}
        self.calls: dict[str, Callable[[], object]] = {name: lambda name=name: self.call(name) for name in costs}

    def call(self, name: str) -> None:
        self.order += name
        self.now += next(self.costs[name])

    def read(self) -> float:
        return self.now


def test_in_every_round_all_have_one_turn_and_its_first_call_is_left_out():
    clock = Clock(a=[100, 1, 2, 9], b=[100, 5, 5, 7, 100, 20, 30, 40])
    turns = measure.turns(clock.calls, range(2), 4, clock=clock.read)
    rounds = clock.order[:8], clock.order[8:]
    assert all(one in ("aaaabbbb", "bbbbaaaa") for one in rounds)
    assert measure.medians(turns) == {"a": [2, 2], "b": [5, 30]}


def test_a_turn_of_one_call_is_timed_and_the_order_is_shuffled():
    clock = Clock(a=1, b=2)
    turns = measure.turns(clock.calls, range(20), 1, clock=clock.read)
    assert measure.medians(turns) == {"a": [1] * 20, "b": [2] * 20}
    rounds = [clock.order[i : i + 2] for i in range(0, 40, 2)]
    assert {*rounds} == {"ab", "ba"}


@pytest.mark.parametrize(
    "costs, rounds, calls",
    [
        ({"a": 1e-4, "b": 1e-3}, 7, {"a": 107 * 7 + 2, "b": 10 * 7 + 2}),  # turns of 0.15 s / 7 / 2
        ({"a": 0.02, "b": 0.03}, 3, {"a": 2 + 3, "b": 2 + 3}),  # three rounds fit, with turns of one call
        ({"a": 1.0, "b": 2.0}, 3, {"a": 3, "b": 3}),  # the first round showed that they are slow, and counts
        ({"a": 1.0, "b": 30.0}, 1, {"a": 1, "b": 1}),
    ],
    ids=["fast", "fitting", "slow", "very slow"],
)
def test_rounds_and_turns_follow_the_budget(costs, rounds, calls, monkeypatch):
    clock = Clock(**costs)
    monkeypatch.setattr(measure.time, "perf_counter", clock.read)
    monkeypatch.setattr(measure.turns, "__defaults__", (clock.read, None))
    found = measure.within(clock.calls, 0.1501)
    assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys(costs, rounds)
    assert {name: seconds[0] for name, seconds in found.items()} == pytest.approx(costs)
    assert {name: clock.order.count(name) for name in costs} == calls


def test_a_long_call_that_was_made_already_is_the_first_of_three(monkeypatch):
    clock = Clock(a=1.0, b=0.05)
    monkeypatch.setattr(measure.time, "perf_counter", clock.read)
    monkeypatch.setattr(measure.turns, "__defaults__", (clock.read, None))
    found = measure.within(clock.calls, 0.12, first_s={"a": 0.9, "b": 0.05})
    assert found["a"] == pytest.approx([0.9, 1, 1]) and found["b"] == pytest.approx([0.05] * 3)
    assert clock.order.count("a") == 2 and clock.order.count("b") == 4  # a short one may have set things up


# ---- One cell, end to end --------------------------------------------------------------------------------------------

LIMITS = {"float32": 100.0, "bfloat16": 200.0, "int8": 400.0, "memory": 20.0}


def measured(folder: Path, *arguments: str) -> dict[str, Any]:
    """What `python -m benchmarks.cpu` writes of one small shape."""
    chosen = ["--only", "linear", "--shapes", "64x48", "--seconds", "0.002", "--results", str(folder), *arguments]
    assert command.main(chosen) == 0
    (path,) = results.committed("linear", folder)
    return json.loads(path.read_text())


def test_a_cell_is_checked_timed_written_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ceilings, "measured", lambda threads: LIMITS)
    before = torch.get_num_threads()
    found = measured(
        tmp_path, "--tokens", "1", "64", "--threads", "1", "--dtypes", "float32", "int8", "--caches", "hot"
    )
    assert torch.get_num_threads() == before
    assert [(row["dtype"], row["M"]) for row in found["rows"]] == [(d, m) for d in ("float32", "int8") for m in (1, 64)]
    row = found["rows"][0]
    assert {"F.linear", "oneDNN prepacked", "onnxruntime", "sparse24"} == row["seconds"].keys()
    assert row["weight_bytes"] == 48 * 64 * (2 + 0.125)
    assert row["best"] == min({*row["seconds"]} - {"sparse24"}, key=lambda name: row["seconds"][name][0])
    assert found["about"]["cpu"] == measure.cpu() and found["about"]["versions"]["torch"] == torch.__version__
    pictures = sorted(path.name.split("-")[1] for path in tmp_path.glob("cpu-*.png"))
    assert pictures == ["linear", "roofline"]
    assert "geometric mean" in capsys.readouterr().out


def test_cold_weights_exceed_the_last_level_cache(monkeypatch):
    monkeypatch.setattr(linear, "last_level_cache", lambda: 20_000)
    family = linear.Linear(shapes=[(64, 48)])
    family.prepare({"K": 64, "N": 48, "dtype": "float32", "cache": "cold", "M": 1, "threads": 1})
    copies = {name: len(layers) for (name, _), layers in family.made.items()}
    assert copies["sparse24"] == -(-60_000 // 6528) and copies["F.linear"] == copies["onnxruntime"] == 5
    assert all(len({*map(id, layers)}) == len(layers) for layers in family.made.values())


# ---- Wrong layers ----------------------------------------------------------------------------------------------------


def one_ulp(y: Tensor) -> Tensor:
    """The last number of y moved by its last bit."""
    y = y.clone()
    y[-1, -1] = torch.nextafter(y[-1, -1], y.new_tensor(torch.inf))
    return y


def one_percent(y: Tensor) -> Tensor:
    """The largest number of the last row of y moved by a hundredth."""
    y = y.clone()
    y[-1, y[-1].abs().argmax()] *= 1.01
    return y


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("dtype, bug", [("float32", one_percent), ("bfloat16", one_percent), ("int8", one_ulp)])
def test_a_wrong_sparse_layer_is_refused(dtype, bug, tokens, monkeypatch):
    place = {"K": 384, "N": 48, "dtype": dtype, "cache": "hot", "M": tokens, "threads": 1}
    linear.Linear().prepare(place)
    right = ops.linear
    monkeypatch.setattr(ops, "linear", lambda *args, **kwargs: bug(right(*args, **kwargs)))
    with pytest.raises(Wrong, match="sparse24"):
        linear.Linear().prepare(place)


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize(
    "dtype, rival",
    [("float32", "F.linear"), ("float32", "onnxruntime"), ("int8", "quantize_dynamic"), ("int8", "onnx")],
)
def test_a_wrong_rival_is_refused(dtype, rival, tokens, monkeypatch):
    maker = {"F.linear": "plain", "onnxruntime": "onnx_float32", "quantize_dynamic": "dynamic_int8_layer"}
    name = maker.get(rival, "onnx_int8")
    right = getattr(rivals, name)
    monkeypatch.setattr(rivals, name, lambda weight, *rest: right(weight.roll(1, 0), *rest))
    place = {"K": 384, "N": 48, "dtype": dtype, "cache": "hot", "M": tokens, "threads": 1}
    with pytest.raises(Wrong, match=rival):
        linear.Linear().prepare(place)


def encoder_cell(dtype: str, monkeypatch: pytest.MonkeyPatch) -> Cell:
    monkeypatch.setitem(encoders.MODELS, "small", lambda: encoders.encoder(64, 2))
    return encoders.Encoders().prepare({"model": "small", "dtype": dtype, "batch": 1, "threads": 1})


@pytest.mark.parametrize("dtype, bug", [("float32", one_percent), ("bfloat16", one_percent), ("int8", one_ulp)])
def test_a_wrong_layer_inside_an_encoder_is_refused(dtype, bug, monkeypatch):
    good = encoder_cell(dtype, monkeypatch)
    assert good.facts == {"layers": 48} and len(good.calls) == 4 - (dtype == "bfloat16")
    right, calls = ops.linear, itertools.count()

    def wrong_once(*args: Any, **kwargs: Any) -> Tensor:
        y = right(*args, **kwargs)
        return bug(y.flatten(0, -2)).view(y.shape) if next(calls) == 30 else y

    monkeypatch.setattr(ops, "linear", wrong_once)
    with pytest.raises(Wrong, match="SparseLinear"):
        encoder_cell(dtype, monkeypatch)


def test_another_model_from_the_exporter_is_refused(monkeypatch):
    export = rivals.onnx_export
    monkeypatch.setattr(rivals, "onnx_export", lambda model, x: export(model[:11], x))
    with pytest.raises(Wrong, match="onnxruntime"):
        encoder_cell("float32", monkeypatch)


@pytest.mark.skipif(not hasattr(sparse24, "SparseConv2d"), reason="this sparse24 has no SparseConv2d")
@pytest.mark.parametrize("dtype, bug", [("float32", one_percent), ("bfloat16", one_percent), ("int8", one_ulp)])
def test_a_wrong_convolution_is_refused(dtype, bug, monkeypatch):
    place = {"network": "MobileNetV2 1x1", "layer": "960-160 1x1 @7", "dtype": dtype, "threads": 1}
    assert {"sparse24", "sparse24 contiguous"} < Conv().prepare(place).calls.keys()
    right = ops.conv2d
    monkeypatch.setattr(
        ops, "conv2d", lambda *args, **kwargs: bug(right(*args, **kwargs).flatten(0, 2)).view(1, 160, 7, 7)
    )
    with pytest.raises(Wrong, match="sparse24"):
        Conv().prepare(place)


def test_encoders_differ_by_rounding_alone(monkeypatch):
    outputs = {name: call() for name, call in encoder_cell("float32", monkeypatch).calls.items()}
    for y in outputs.values():
        torch.testing.assert_close(torch.as_tensor(y), outputs["dense"], atol=1e-4, rtol=0)  # values reach 5


def test_the_onnx_model_is_what_onnxruntime_makes(tmp_path):
    dense, bias = torch.randn(16, 32), torch.randn(16)
    (tmp_path / "float32.onnx").write_bytes(rivals.onnx_float32(dense, bias))
    quantize_dynamic(tmp_path / "float32.onnx", tmp_path / "int8.onnx", per_channel=True)
    theirs = onnx.load(tmp_path / "int8.onnx")
    ours = onnx.load_from_string(rivals.onnx_int8(dense.to(torch.int8), torch.ones(16), bias))
    assert sorted(node.op_type for node in ours.graph.node) == sorted(node.op_type for node in theirs.graph.node)


# ---- Refused, interrupted, resumed -----------------------------------------------------------------------------------


class Few:
    """A family of three cells; the second can be made to refuse or to be interrupted."""

    name = "linear"
    budget_s = 0.001
    least_rounds = 1

    def __init__(self, trouble: BaseException | None = None) -> None:
        self.trouble, self.prepared = trouble, []

    def places(self) -> list[dict[str, Any]]:
        cells = [{"K": 8, "N": 8, "dtype": "float32", "cache": "hot", "M": m, "threads": 1} for m in (1, 8, 64)]
        return cells

    def prepare(self, place: dict[str, Any]) -> Cell:
        self.prepared.append(place["M"])
        if self.trouble is not None and place["M"] == 8:
            raise self.trouble
        return Cell({"sparse24": lambda: None, "F.linear": lambda: None}, {"weight_bytes": 10})


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(results, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(ceilings, "measured", lambda threads: LIMITS)
    return tmp_path / "kept" / "benchmark-linear.jsonl"


def run(few: Few, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(command, "families", lambda options: [few])
    return command.main(arguments)


def test_a_refused_cell_is_skipped_with_its_reason(kept, monkeypatch, capsys):
    assert run(Few(Refused("no kernel for this")), monkeypatch) == 0
    assert "skipped: 1 cells of float32: no kernel for this" in capsys.readouterr().out
    (path,) = results.committed("linear", kept.parent.parent)
    rows = json.loads(path.read_text())["rows"]
    assert [row.get("refused") for row in rows] == [None, "no kernel for this", None]


def test_an_interrupted_run_goes_on_where_it_stopped(kept, monkeypatch):
    assert run(Few(KeyboardInterrupt()), monkeypatch) == 130
    assert len(kept.read_text().splitlines()) == 2 and not results.committed("linear", kept.parent.parent)
    second = Few()
    assert run(second, monkeypatch, "--resume") == 0
    assert second.prepared == [8, 64] and not kept.exists()
    (path,) = results.committed("linear", kept.parent.parent)
    assert [row["M"] for row in json.loads(path.read_text())["rows"]] == [1, 8, 64]


def test_a_run_starts_anew_unless_it_is_to_go_on(kept, monkeypatch):
    run(Few(KeyboardInterrupt()), monkeypatch)
    second = Few()
    assert run(second, monkeypatch) == 0
    assert second.prepared == [1, 8, 64]


def test_rows_of_another_commit_are_not_gone_on_with(kept, monkeypatch):
    run(Few(KeyboardInterrupt()), monkeypatch)
    monkeypatch.setattr(measure, "commit", lambda: "another")
    with pytest.raises(SystemExit, match="without --resume"):
        run(Few(), monkeypatch, "--resume")


def test_a_refusing_operator_does_not_stop_the_others(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("values must be something else\nwhere it was raised")

    monkeypatch.setattr(ops, "pack", refuse)
    place = {"K": 64, "N": 48, "dtype": "float32", "cache": "hot", "M": 1, "threads": torch.get_num_threads()}
    assert cell.run(linear.Linear(), place) == place | {"refused": "values must be something else"}


# ---- What the results say --------------------------------------------------------------------------------------------


def linear_row(tokens: int, ours: float, **rivals: float) -> dict[str, Any]:
    place = {"K": 8, "N": 8, "dtype": "float32", "cache": "hot", "M": tokens, "threads": 1}
    seconds = {"sparse24": [ours] * 3} | {name: [second] * 3 for name, second in rivals.items()}
    best = min(rivals, key=rivals.__getitem__)
    return place | {"seconds": seconds, "best": best, "ratio": [rivals[best] / ours] * 3, "weight_bytes": 100}


ROWS = [linear_row(1, 1.0, mkldnn=4.0, onnxruntime=2.0), linear_row(1, 2.0, mkldnn=1.0, onnxruntime=3.0)]


def test_means_are_geometric_over_all_rivals_and_over_those_of_the_floor():
    (found,) = summary.means("linear", ROWS)
    assert (found["regime"], found["cells"], found["losses"]) == ("M = 1", 2, 1)
    assert found["mean"] == 1.0 and found["against torch"] == pytest.approx(2**0.5, abs=1e-3)
    assert found["range"] == [0.5, 2.0]
    (loss,) = summary.losses(ROWS)
    assert loss == "K 8, N 8, dtype float32, cache hot, M 1, threads 1: 0.50 (0.50 to 0.50) of mkldnn"


def test_the_limit_is_that_of_memory_or_of_the_ports():
    row = {"K": 100, "N": 50, "M": 2, "dtype": "float32", "weight_bytes": 8800}
    assert ceilings.intensity(row) == 20_000 / 10_000
    assert ceilings.of(row, LIMITS) == 40  # 2 operations a byte of 20 GB/s
    assert ceilings.of(row | {"weight_bytes": 0}, LIMITS) == 150  # 1.5 x 100
    assert ceilings.of(row | {"weight_bytes": 0, "dtype": "int4"}, LIMITS | {"memory": 1e9}) == 600


RESULT = {
    "about": {
        "cpu": "AMD EPYC (family 25, model 17)",
        "kernels": "avx512",
        "date": "2026-01-31 10:00 UTC",
        "commit": "abc1234",
        "versions": {"sparse24": "0.1.0", "torch": "2.13.0"},
    },
    "rows": [
        {"model": "ViT-B", "dtype": dtype, "batch": 1, "threads": 2, "best": best, "ratio": ratio}
        | {"seconds": {"sparse24": [ours] * 3, best: [dense] * 3, "dense": [0.2] * 3}}
        for dtype, best, ratio, ours, dense in [
            ("float32", "oneDNN prepacked", [1.5, 1.4, 1.6], 0.1, 0.15),
            ("int8", "quantize_dynamic x86", [0.9, 0.85, 0.95], 0.05, 0.045),
        ]
    ],
}
TABLE = """\
| encoder | batch | threads | float32, ms | gain | int8, ms | gain | dense float32 → 2:4 int8 |
| --- | --: | --: | --: | --: | --: | --: | --: |
| ViT-B | 1 | 2 | 150.0 → 100.0 | 1.50x (1.40–1.60) | 45.0 → 50.0 | 0.90x (0.85–0.95) loss | 4.0x |"""


def test_markdown_comes_from_the_json_alone():
    table, _, notes = summary.markdown(RESULT).partition("\n\n")
    assert table == TABLE
    assert notes.splitlines()[-1] == (
        "* AMD EPYC (family 25, model 17), avx512 kernels, 2026-01-31, commit abc1234. sparse24 0.1.0, torch 2.13.0."
    )


FAMILIES = {"linear": linear.Linear, "conv": Conv, "encoders": encoders.Encoders}


@pytest.mark.parametrize("name", FAMILIES)
def test_committed_results_are_whole_and_say_what_their_rows_say(name):
    committed = results.committed(name)
    assert committed
    for path in committed:
        found = json.loads(path.read_text())
        assert path == results.path_of(name, found["about"]["cpu"])
        places = FAMILIES[name]().places()
        assert len(places) == len(found["rows"])
        assert all(place.items() <= row.items() for place, row in zip(places, found["rows"], strict=True))
        assert summary.means(name, found["rows"]) == found["means"]
        pictures = [path.with_suffix(".png")]
        if name == "linear":
            assert summary.of_port_limit(found["rows"], found["ceilings"]) == found["of port limit"]
            pictures.append(path.with_name(path.name.replace("linear", "roofline")).with_suffix(".png"))
        assert all(0 < picture.stat().st_size < 300_000 for picture in pictures)


def test_the_documents_have_the_committed_tables(capsys):
    command.main(["--markdown"])
    tables = capsys.readouterr().out.split("<!-- end of ")
    assert len(tables) == 1 + len(results.committed("encoders")) + len(results.committed("linear"))
    documents = (measure.ROOT / "README.md").read_text() + (measure.ROOT / "docs" / "cpu.md").read_text()
    for table in tables[:-1]:
        assert table[table.index("<!-- ") :] in documents
