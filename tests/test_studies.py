"""studies: the pieces of the studies on small data: readers, ways, intervals, tables; models against their packages."""

import copy
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse24
from benchmarks import measure
from sparse24.quantization import fake_quantization
from sparse24.sparse_module import SparseModule
from studies import fashion, jobs, quantised, quantised_fashion, trained


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
    table = (fashion if study == "fashion" else trained).markdown(found)
    assert table in (measure.ROOT / "docs" / "training.md").read_text()
    assert (measure.RESULTS / f"study-{study}.png").stat().st_size < 300_000


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


@pytest.mark.parametrize("model", fashion.MODELS)
def test_every_format_is_measured_after_training_and_trained(
    model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion, "EPOCHS", 6)
    monkeypatch.setattr(fashion, "BATCH", 32)
    measured: list[set[str]] = []
    accuracy = fashion.Data.accuracy

    def look(data: fashion.Data, one: torch.nn.Module) -> float:
        measured.append({module._describe() for module in one.modules() if isinstance(module, SparseModule)})
        return accuracy(data, one)

    monkeypatch.setattr(fashion.Data, "accuracy", look)
    threads = torch.get_num_threads()
    found = quantised_fashion.job(folder, model, 0)
    torch.set_num_threads(threads)
    assert {base: [*formats] for base, formats in found.items()} == {
        base: [quantised.FLOAT, *formats] for base, formats in quantised.BASES.items()
    }
    places = iter(measured)
    for base, formats in found.items():
        assert formats[quantised.FLOAT][quantised.POST] > 30  # of ten classes
        for name in formats:
            for _ in formats[name]:  # what is measured runs on the kernels of its format
                kinds = next(places)
                sparse = base == "2:4" or (base == "pair 4:8" and name != quantised.FLOAT)
                assert bool(kinds) is sparse
                for kind in kinds:
                    assert f"pattern={base}" in kind and "packed=True" in kind
                    assert (f"weight_dtype=torch.{name[:4]}" in kind) is (name != quantised.FLOAT)
                    assert ("x_rounding=tensor" in kind) is ("percentile" in name or "max" in name)
    assert not list(places)


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
