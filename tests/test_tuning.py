"""sparse24.tune(): what it measures is kept, used, resumed and refused where it is not of this machine."""

import json
import warnings

import pytest
import torch

from sparse24 import nn as sparse_nn
from sparse24 import ops, tuning

_ops = torch.ops.sparse24


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch):
    monkeypatch.setattr(tuning, "_SECONDS", 0.0)
    yield
    _ops.set_tuned_kernels("")


def choice(layer, tokens):
    key = tuning._key(layer, tokens)
    return _ops.cpu_choice(*key[:6])


@pytest.fixture
def layer():
    return sparse_nn.SparseLinear(64, 48).pack()


def test_measured_kernels_run_and_say_so(layer, tmp_path):
    report = tuning.tune([layer], tokens=(1, 5), path=tmp_path / "tuned.json")
    assert [row.tokens for row in report.rows] == [1, 5]
    for row in report.rows:
        kernels, reason = choice(layer, row.tokens)
        assert kernels == row.kernels
        assert reason == f"tuned: measured {row.gain:.2f}x of dense on {row.date}"


def test_tokens_of_example_inputs(layer, tmp_path):
    model = torch.nn.Sequential(layer)
    report = tuning.tune(model, torch.randn(2, 3, 64), path=tmp_path / "tuned.json")
    assert [row.tokens for row in report.rows] == [6]


def test_interrupted_call_goes_on_where_it_was(layer, tmp_path, monkeypatch):
    file, measure, calls = tmp_path / "deep" / "tuned.json", tuning._measure, []

    def interrupted(layer, key):
        calls.append(key[3])
        if key[3] == 5 and calls.count(5) == 1:
            raise KeyboardInterrupt
        return measure(layer, key)

    monkeypatch.setattr(tuning, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuning.tune([layer], tokens=(1, 5), path=file)
    tuning.tune([layer], tokens=(1, 5), path=file)
    assert calls == [1, 5, 5]
    assert [path.name for path in file.parent.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize("damage", ["not json", "{}", '{"format": 3, "cpu": "", "version": ""}', "[]"])
def test_damaged_file_is_ignored_with_one_warning(layer, tmp_path, damage):
    file = tmp_path / "tuned.json"
    file.write_text(damage)
    with pytest.warns(UserWarning, match="tuned.json is ignored") as caught:
        assert not tuning.load_tuned(file)
    assert len(caught) == 1


def test_file_of_another_cpu_is_ignored(layer, tmp_path):
    file = tmp_path / "tuned.json"
    tuning.tune([layer], tokens=(1,), path=file)
    content = json.loads(file.read_text())
    content["cpu"] = "another"
    file.write_text(json.dumps(content))
    before = choice(layer, 1)
    with pytest.warns(UserWarning, match="tuned.json is ignored"):
        assert not tuning.load_tuned(file)
    assert before != choice(layer, 1)


def test_missing_file_is_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tuning.load_tuned(tmp_path / "none.json")


def test_default_path_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.default_path().parent == tmp_path / "sparse24"


def test_measured_on_one_thread_is_not_for_two(layer, tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        tuning.tune([layer], tokens=(1,), path=tmp_path / "tuned.json")
        assert choice(layer, 1)[1].startswith("tuned")
        torch.set_num_threads(2)
        assert not choice(layer, 1)[1].startswith("tuned")
    finally:
        torch.set_num_threads(threads)


def test_measured_with_one_isa_is_not_for_another(layer, tmp_path):
    tuning.tune([layer], tokens=(1,), path=tmp_path / "tuned.json")
    if ops.cpu_isa() != "portable":
        with ops.force_cpu_isa("portable"):
            assert not choice(layer, 1)[1].startswith("tuned")
