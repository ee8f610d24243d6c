"""studies: the pieces of the studies on small data: readers, ways, intervals, tables; models against their packages."""

import copy
import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse24
from benchmarks import measure
from sparse24 import ops
from sparse24.quantization import fake_quantization
from sparse24.sparse_module import SparseModule
from studies import fashion, jobs, plots, quantised, quantised_fashion, quantised_speed, quantised_trained, trained
from studies.__main__ import STUDIES


def write(folder: Path, part: str, images: np.ndarray, labels: np.ndarray) -> None:
    header = np.array([0x00000803, len(images), 28, 28], ">i4").tobytes()
    (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    header = np.array([0x00000801, len(labels)], ">i4").tobytes()
    (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set whose classes are told apart by where a bright square is."""
    random = np.random.default_rng(0)
    for part, count in (("train", 320), ("t10k", 1000)):
        labels = random.integers(0, 10, count).astype(np.uint8)
        images = random.integers(0, 40, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[8 * row : 8 * row + 6, 7 * column : 7 * column + 6] = 255
        write(tmp_path, part, images, labels)
    return tmp_path


def test_images_and_labels_are_read(folder: Path) -> None:
    x, y = fashion.read(folder, "t10k")
    assert x.shape == (1000, 1, 28, 28) and y.shape == (1000,) and y.dtype == torch.int64
    row, column = divmod(int(y[7]), 4)
    bright = x[7, 0] == (1 - 0.2860) / 0.3530
    assert bright[8 * row : 8 * row + 6, 7 * column : 7 * column + 6].all() and bright.sum() == 36


def test_missing_data_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(fashion.Missing, match="apt-get install dataset-fashion-mnist"):
        fashion.read(tmp_path, "train")


@pytest.mark.parametrize("model", fashion.MODELS)
def test_every_way_trains_and_converts(model: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "EPOCHS", 4)
    monkeypatch.setattr(fashion, "BATCH", 32)
    threads = torch.get_num_threads()
    found = fashion.job(folder, model, 0)
    torch.set_num_threads(threads)
    assert len(found) == 9 and found["dense"] > 30  # of ten classes
    assert found == fashion.job(folder, model, 0)  # the seed decides
    torch.set_num_threads(threads)


def test_ways_are_what_they_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "EPOCHS", 1)
    monkeypatch.setattr(fashion, "BATCH", 32)
    data = fashion.Data(folder)
    torch.manual_seed(0)
    dense, start = fashion.Vit(), fashion.Vit()
    verdicts = {}
    for name, model in fashion.ways(dense, start, data, 0):
        verdicts[name] = {row.verdict for row in sparse24.check_masks(model).rows}
    assert verdicts.pop("dense") == verdicts.pop("dense, trained again") == {"dense"}
    assert all("runs sparse" in found for found in verdicts.values())


def test_parts_are_kept_and_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "CACHE", tmp_path)
    calls: list[int] = []

    def job(number: int) -> dict[str, int]:
        if number == 2 and len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(number)
        return {"found": number}

    assert jobs.kept("a/1", job, 1) == {"found": 1}
    with pytest.raises(KeyboardInterrupt):
        jobs.kept("a/2", job, 2)
    assert [jobs.kept(f"a/{i}", job, i) for i in (1, 1)] == [{"found": 1}] * 2 and calls == [1]
    calls.append(0)
    assert jobs.kept("a/2", job, 2) == {"found": 2} and len(list(tmp_path.iterdir())) == 2


def test_parts_run_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = os.environ | {"PYTHONPATH": str(measure.ROOT)}
    script = (
        "from pathlib import Path; import os, sys; from studies import jobs\n"
        "jobs.CACHE = Path(sys.argv[1])\n"
        "if __name__ == '__main__':\n"
        "    done = dict(jobs.side_by_side({str(i): (pow, 2, i) for i in range(4)}, 'powers'))\n"
        "    assert done == {str(i): 2 ** i for i in range(4)}, done\n"
    )
    (tmp_path / "run.py").write_text(script)
    subprocess.run([sys.executable, tmp_path / "run.py", tmp_path / "kept"], check=True, env=environment)


def test_the_interval_is_student_s() -> None:
    # Of 1, 2, 3, 4, 5: deviation sqrt(2.5), t(4) = 2.776.
    mean, half = fashion.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * (2.5 / 5) ** 0.5)


def test_a_mosaic_keeps_one_colour_of_each_pixel() -> None:
    image = torch.rand(2, 3, 8, 8) + 1
    mosaic = trained.mosaic_of(image)
    assert ((mosaic != 0).sum(1) == 1).all() and (mosaic[mosaic != 0] == image[mosaic != 0]).all()
    assert [(mosaic[:, c] != 0).float().mean().item() for c in range(3)] == [0.25, 0.5, 0.25]


def bilinear(mosaic: Tensor) -> Tensor:
    """Each colour of a pixel as the mean of its neighbours that have it."""
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).expand(3, 1, 3, 3)
    seen = (mosaic != 0).float()
    sums, weights = (torch.nn.functional.conv2d(one, kernel, padding=1, groups=3) for one in (mosaic, seen))
    return torch.where(mosaic != 0, mosaic, sums / weights.clamp(min=1e-6))


@torch.no_grad()
def test_demosaicnet_is_the_trained_network() -> None:
    model = trained.demosaicnet()
    quality = trained.demosaic_quality(model)
    interpolated = trained.demosaic_quality(lambda mosaic: bilinear(mosaic)[..., 32:-32, 32:-32])  # type: ignore[arg-type]
    assert quality[0] == pytest.approx(38.6, abs=1.0)  # astronaut
    assert all(one > other + 3 for one, other in zip(quality, interpolated, strict=True))


@pytest.mark.parametrize("study", ["fashion", "trained"])
def test_the_document_has_the_committed_table(study: str) -> None:
    found = json.loads((measure.RESULTS / f"study-{study}.json").read_text())["results"]
    assert STUDIES[study].markdown(found) in (measure.ROOT / "docs" / "training.md").read_text()
    assert (measure.RESULTS / f"study-{study}.png").stat().st_size < 300_000


@pytest.mark.parametrize("study", [name for name in STUDIES if name.startswith("quantised-")])
def test_the_place_of_a_table_has_the_committed_one(study: str) -> None:
    """Each study of quantisation has a marked place: the table and the plot of committed results, or nothing."""
    text = (measure.ROOT / "docs" / "quantisation.md").read_text()
    assert text.count(f"<!-- study-{study} -->\n") == 1
    place = text.split(f"<!-- study-{study} -->\n")[1].lstrip("\n")
    path = measure.RESULTS / f"study-{study}.json"
    if path.exists():
        assert place.startswith(STUDIES[study].markdown(json.loads(path.read_text())["results"]) + "\n\n![")
        assert f"](../benchmarks/results/study-{study}.png)" in place.split("\n\n")[1]
        assert path.with_suffix(".png").stat().st_size < 300_000
    else:
        assert not place.startswith(("|", "!["))


# ---- Quantised -------------------------------------------------------------------------------------------------------


def rounded_layers(model: torch.nn.Module) -> set[str]:
    return {name for name, one in model.named_modules() if fake_quantization(one) is not None}


@pytest.mark.parametrize("model", fashion.MODELS)
def test_the_same_layers_are_rounded_dense_and_sparse(model: str) -> None:
    torch.manual_seed(0)
    dense, skip = fashion.MODELS[model](), sparse24.paper_skips()
    x = [torch.randn(4, 1, 28, 28)]
    wanted = None
    for base, formats in quantised.BASES.items():
        pruned = copy.deepcopy(dense)
        if base != quantised.DENSE:
            report = sparse24.prune(pruned, base, skip=skip)
            wanted = {row.name for row in report.rows if row.outcome == "pruned"}
        for name in formats:
            one = quantised.quantised(pruned, name, skip, x)
            of_dense = quantised.quantised(dense, name, skip, x)
            assert rounded_layers(one) == rounded_layers(of_dense) and rounded_layers(one)
            assert wanted is None or rounded_layers(one) == wanted
            assert not rounded_layers(pruned)
            left = {n for n, p in of_dense.named_parameters() if "parametrizations" in n}
            assert {n.split(".parametrizations")[0] for n in left} == rounded_layers(of_dense)


def formats_of(model: torch.nn.Module) -> set[str]:
    """The pattern and format of each sparse layer, in the words of the studies' rows."""
    kinds = set()
    for layer in model.modules():
        if isinstance(layer, SparseModule):
            assert layer.packed is not None
            dtype = str(layer.weight_dtype).removeprefix("torch.")
            x = {"": "", "token": " by token", "tensor": " by tensor"}[
                layer.x_rounding if layer.scales is not None else ""
            ]
            kinds.add(f"{layer.pattern}, {dtype}{x}")
    return kinds


def expected(base: str, name: str) -> set[str]:
    if base == quantised.DENSE or (base, name) == ("pair 4:8", quantised.FLOAT):
        return set()
    return {f"{base}, {name.split(', ')[0].replace('max', 'tensor').replace('percentile', 'tensor')}"}


@pytest.mark.parametrize("model", fashion.MODELS)
def test_every_format_is_measured_after_training_and_trained(
    model: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion, "EPOCHS", 6)
    monkeypatch.setattr(fashion, "BATCH", 32)
    measured: list[set[str]] = []
    accuracy = fashion.Data.accuracy

    def look(data: fashion.Data, one: torch.nn.Module) -> float:
        measured.append(formats_of(one))
        return accuracy(data, one)

    monkeypatch.setattr(fashion.Data, "accuracy", look)
    threads = torch.get_num_threads()
    found = quantised_fashion.job(folder, model, 0)
    torch.set_num_threads(threads)
    rows = [(base, name) for base, formats in quantised.BASES.items() for name in (quantised.FLOAT, *formats)]
    assert [(base, name) for base, formats in found.items() for name in formats] == rows
    assert all(formats[quantised.FLOAT][quantised.POST] > 30 for formats in found.values())  # of ten classes
    stages = (quantised.POST, quantised.TRAINED)
    assert measured == [expected(*row) for row in rows for _ in stages]  # on the kernels of its format

    seeds = {model: [found, found]}
    assert len(quantised_fashion.markdown(seeds).splitlines()) == 2 + len(rows)
    plots.draw(plots.rounded, seeds, tmp_path / "plot.png")


def test_learnt_scales_move_with_their_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "BATCH", 32)
    data = fashion.Data(folder)
    torch.manual_seed(0)
    dense = fashion.cnn()
    one = quantised.quantised(dense, "int4 by token, scales learnt", sparse24.paper_skips(), [])
    scales = {name: p.detach().clone() for name, p in one.named_parameters() if name.endswith("scales")}
    data.train(one, 0, **quantised_fashion.SHORT)
    assert len(scales) == 4
    for name, parameter in one.named_parameters():
        if name in scales:
            moved = ((parameter - scales[name]).abs() / scales[name].mean()).max()
            assert 0 < moved < 5 * 2e-4 * fashion.SCALE_PACE  # 5 steps


def test_what_is_rounded_is_distilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = trained.MODELS[trained.MOSAIC]
    monkeypatch.setattr(trained, "SIDE", 96)
    monkeypatch.setattr(trained, "PATCH", 16)
    monkeypatch.setattr(study, "recipe", replace(study.recipe, steps=2))
    monkeypatch.setattr(quantised_trained, "STEPS", 2)
    measured: list[set[str]] = []
    quality = study.quality

    def look(one: torch.nn.Module) -> list[float]:
        measured.append(formats_of(one))
        return quality(one)

    monkeypatch.setattr(study, "quality", look)
    threads = torch.get_num_threads()
    found = {base: quantised_trained.job(trained.MOSAIC, base) for base in quantised.BASES}
    torch.set_num_threads(threads)
    wanted = []
    for base, formats in found.items():
        assert [*formats] == quantised_trained.formats(base)
        for name, stages in formats.items():
            assert len(stages) == (1 if (base, name) == (quantised.DENSE, quantised.FLOAT) else 2)
            selects = set() if base == quantised.DENSE else {"2:4, float32"}  # pack_mosaic, 2:4 by what it does
            wanted += [expected(base, name) | selects] * len(stages)
            if len(stages) == 2:
                assert stages[quantised.POST] != stages[quantised.TRAINED]
    assert measured == wanted
    assert [*found[quantised.DENSE]] == [*quantised_trained.FORMATS]
    means = [sum(stages[quantised.POST]) for stages in found[quantised.DENSE].values()]
    assert means[0] > max(means[1:4]) and min(means[1:4]) > means[4]  # float, int8, int4
    models = {trained.MOSAIC: found}
    assert len(quantised_trained.markdown(models).splitlines()) == 2 + 5 + 4 + 2
    plots.draw(plots.rounded_photographs, models, tmp_path / "plot.png")


def test_bytes_by_format_are_what_compress_makes() -> None:
    weight = torch.randn(64, 64)
    for kind, pattern in ((quantised.FLOAT, "2:4"), ("int8", "2:4"), ("int4", "pair 4:8")):
        pruned = torch.where(sparse24.prune_mask(weight, pattern), weight, 0)
        whole = (pruned.sign() * 5).to(torch.int8)
        stored = {quantised.FLOAT: pruned, "int8": whole, "int4": ops.pack_int4(whole)}[kind]
        taken = sum(tensor.nbytes for tensor in sparse24.compress(stored, pattern))
        assert weight.nbytes / taken == quantised_speed.NOMINAL[kind]


@pytest.mark.parametrize("model", fashion.MODELS)
def test_latency_and_bytes_of_each_row(model: str, tmp_path: Path) -> None:
    subject = quantised_speed.MODELS[model]
    torch.manual_seed(0)
    dense, x = subject.load().eval(), subject.input()
    contenders = dict(quantised_speed.contenders(dense, subject.skip, x))
    for way, one in contenders.items():
        base, name = way.split(", ", 1)
        assert formats_of(one) == expected(base, name)
    with torch.no_grad():
        chained = contenders[f"2:4, {quantised_speed.CHAINED}"](x)
        assert torch.equal(chained, contenders["2:4, int8 by percentile"](x))
    found = quantised_speed.of(subject, 0.2)
    assert [*found] == [*contenders]
    products = [m.weight for m in dense.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    weights = products[1:]  # all but the first layer is pruned
    row = found["dense, float32"]
    assert row["weights"] == sum(weight.nbytes for weight in weights)
    assert row["resident"] == sum(tensor.nbytes for tensor in [*dense.parameters(), *dense.buffers()])
    scales = 4 * sum(len(weight) for weight in weights)  # bytes of one for each output
    for way, one in found.items():
        smaller = row["weights"] / one["weights"]
        assert quantised_speed.nominal(way) / 2 < smaller <= quantised_speed.nominal(way)
        if one is not row:
            assert row["resident"] - one["resident"] == row["weights"] - one["weights"]
        if "by" in way:
            assert one["weights"] >= row["weights"] / quantised_speed.nominal(way) + scales
        assert 0 < one["latency_ms"]["p20"] <= one["latency_ms"]["median"] and one["gain"]["median"] > 0
    by_token, by_percentile = (found[f"2:4, int8 by {how}"]["weights"] for how in ("token", "percentile"))
    assert by_percentile == by_token + 4 * len(weights)  # and one for each layer
    models = {model: found}
    assert len(quantised_speed.markdown(models).splitlines()) == 3 + len(found)
    plots.draw(plots.latencies, models, tmp_path / "plot.png")
