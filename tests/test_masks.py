"""masks: transposable masks against brute force; check_masks on models, state and files."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier
from torch.sparse._semi_structured_conversions import _sparse_semi_structured_tile

import sparse24
from sparse24 import check_masks, library
from sparse24.masks import Columns, bad_groups, transposable_mask
from sparse24.ops import force_cpu_isa

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def brute_force(sizes: Tensor, exactly_two: bool) -> float:
    """The largest sum of |scores| of one tile, over every 0/1 matrix of its shape."""
    rows, columns = sizes.shape
    best = 0.0
    for bits in itertools.product((0, 1), repeat=rows * columns):
        mask = torch.tensor(bits).view(rows, columns)
        sums = torch.cat([mask.sum(0), mask.sum(1)])
        if (sums == 2).all() if exactly_two else (sums <= 2).all():
            best = max(best, float((sizes.abs().double() * mask).sum()))
    return best


@pytest.mark.parametrize("seed", range(3))
def test_a_tile_is_the_exact_optimum(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(4, 4, generator=generator)
    if seed == 2:  # ties
        sizes = torch.randint(-2, 3, (4, 4), generator=generator).float()
    mask = transposable_mask(sizes)
    assert (mask.sum(0) == 2).all() and (mask.sum(1) == 2).all()
    assert float((sizes.abs().double() * mask).sum()) == brute_force(sizes, exactly_two=True)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (2, 3), (3, 3), (3, 4), (4, 3)], ids=str)
def test_a_tile_at_the_edge_is_the_exact_optimum(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        sizes = torch.randn(shape, generator=generator)
        mask = transposable_mask(sizes)
        assert (mask.sum(0) <= 2).all() and (mask.sum(1) <= 2).all()
        kept = float((sizes.abs().double() * mask).sum())
        assert kept == pytest.approx(brute_force(sizes, exactly_two=False), rel=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile_of_a_matrix_is_one_problem(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(3, 22, 37, generator=generator).to(dtype)
    mask = transposable_mask(scores)
    for batch, top, left in itertools.product(range(3), range(0, 22, 4), range(0, 37, 4)):
        tile = slice(top, top + 4), slice(left, left + 4)
        assert torch.equal(mask[batch][tile], transposable_mask(scores[batch][tile])), (batch, top, left)
    for one in mask:
        assert bad_groups(one, "2:4") == 0 and bad_groups(one.T, "2:4") == 0
    assert (mask[:, :20, :36].sum((1, 2)) == 20 * 36 // 2).all()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("shape", [(4, 4), (8, 28), (4, 32), (12, 36), (64, 100)], ids=str)
def test_the_kernels_choose_as_the_definition_does(shape: tuple[int, int], isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ties = torch.randint(-3, 4, shape, generator=generator).float()
    special = torch.randn(shape, generator=generator)
    special[torch.rand(shape, generator=generator) < 0.1] = torch.nan
    special[torch.rand(shape, generator=generator) < 0.1] = -torch.inf
    tiny = torch.randn(shape, generator=generator) * 1e-42  # subnormal
    with force_cpu_isa(isa):
        for scores in (
            ties,
            special,
            tiny,
            special.nan_to_num(1, 2, 3),
            special.bfloat16(),
            ties.half(),
            ties.t().contiguous().t(),
        ):
            assert torch.equal(transposable_mask(scores), transposable_mask(scores.double()))


def test_the_kernels_want_whole_tiles() -> None:
    for scores in (torch.ones(4, 6), torch.ones(6, 4), torch.ones(4, 4, dtype=torch.half), torch.ones(4)):
        with pytest.raises(RuntimeError, match="scores must be float32"):
            library.ops.transposable_tiles(scores)


def test_the_greedy_tile_of_torch_keeps_less() -> None:
    """Where it keeps eight of sixteen. It may run into a corner with seven, which now and then outweigh any eight."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(4)).double()
    greedy = _sparse_semi_structured_tile(weight.abs().clone())
    mask = transposable_mask(weight)
    assert not bad_groups(mask, "2:4") and not bad_groups(mask.t(), "2:4")

    def by_tile(kept: Tensor) -> Tensor:
        return kept.view(16, 4, 24, 4).sum((1, 3))

    ours, theirs, count = by_tile(weight.abs() * mask), by_tile(greedy), by_tile((greedy != 0).double())
    assert (by_tile(mask.double()) == 8).all() and set(count.unique().tolist()) == {7.0, 8.0}
    assert (ours >= theirs - 1e-12)[count == 8].all()
    assert (ours > theirs + 1e-3).double().mean() > 0.4 and ours.sum() > 1.01 * theirs.sum()


def test_magnitude_is_the_choice_of_torch_s_sparsifier() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Sequential(nn.Linear(64, 24)), nn.Sequential(nn.Linear(64, 24))
    theirs.load_state_dict(ours.state_dict())
    sparse24.prune(ours)
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(theirs, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    assert torch.equal(ours[0].weight, theirs[0].weight)


def test_what_is_not_finite_stays() -> None:
    scores = torch.full((4, 4), 1e38)
    scores[1, 2], scores[3, 0] = torch.inf, -torch.inf
    scores[0, 1] = scores[0, 2] = torch.nan
    mask = transposable_mask(scores)
    assert mask[1, 2] and mask[3, 0] and mask[0, 1] and mask[0, 2]
    scores[0, 3] = torch.inf
    assert not transposable_mask(scores)[0, 3]  # two NaN rank above it


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (2, 0, 4)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    assert transposable_mask(torch.empty(shape)).shape == shape


def test_bad_groups_counts_as_compress_does() -> None:
    matrix = torch.zeros(3, 10)
    matrix[0, :3] = torch.tensor([1.0, torch.nan, -0.0])
    assert bad_groups(matrix, "2:4") == 0 and bad_groups(matrix, "1:2") == 1 and bad_groups(matrix, "pair 4:8") == 0
    matrix[0, 2] = 5
    matrix[2, 8:] = 1
    assert bad_groups(matrix, "2:4") == 1 and bad_groups(matrix, "1:2") == 2
    matrix[1, [0, 2, 4]] = 1
    assert bad_groups(matrix, "pair 4:8") == 1


@pytest.mark.parametrize(
    "layer", [nn.Linear(10, 6), nn.Conv2d(8, 6, (2, 3), groups=2), nn.Conv2d(3, 8, 2, stride=2)], ids=str
)
def test_columns_and_back(layer: nn.Linear | nn.Conv2d) -> None:
    columns = Columns(layer)
    assert torch.equal(columns.back(columns.of(layer.weight)), layer.weight)


# ---- On models -------------------------------------------------------------------------------------------------------


def test_prune_transposable() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(12, 9), nn.Conv2d(3, 8, 2, stride=2))
    rows = sparse24.prune(model, transposable=True).rows
    assert [row.outcome for row in rows] == ["pruned"] * 3 and "transposable" in rows[0].detail
    conv, linear, patch = model[0].weight, model[2].weight, model[3].weight
    for weight in (*conv.permute(2, 3, 0, 1).flatten(0, 1), linear, patch.flatten(1)):
        assert bad_groups(weight, "2:4") == 0 and bad_groups(weight.T, "2:4") == 0
    assert {row.outcome for row in sparse24.convert(model).rows} == {"converted"}


def test_every_axis_is_told_apart() -> None:
    torch.manual_seed(0)
    linear = torch.randn(16, 32)
    conv = torch.randn(8, 4, 3, 3)
    both = torch.where(transposable_mask(linear), linear, 0)
    along_rows = torch.where(sparse24.prune_mask(linear), linear, 0)
    across_positions = torch.where(sparse24.prune_mask(conv.flatten(1)).view_as(conv), conv, 0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    sparse24.prune(model)
    state = {
        "both.weight": both,
        "rows.weight": along_rows,
        "columns.weight": along_rows.T,
        "pairs.weight": torch.where(sparse24.prune_mask(linear, "pair 4:8"), linear, 0),
        "dense.weight": linear,
        "bias": linear[0],
        "channels.weight": model[0].weight.detach(),
        "flattened.weight": across_positions,
    }
    rows = {row.name: row for row in check_masks(state).rows}
    assert "bias" not in rows
    assert rows["both"].verdict == "runs sparse, its transpose as well"
    assert rows["rows"].verdict == "runs sparse" and rows["rows"].along == "in_features: 2:4"
    assert rows["columns"].verdict.startswith("cannot run: sparse along out_features")
    assert rows["pairs"].along == "in_features: pair 4:8" and rows["pairs"].zeros == "50.0 %"
    assert rows["dense"].verdict == "dense" and rows["dense"].along == ""
    assert rows["channels"].verdict == "runs sparse"
    bad = bad_groups(across_positions.permute(0, 2, 3, 1).flatten(0, 2), "2:4")
    assert bad > 0 and rows["flattened"].verdict == (
        f"cannot run: sparse along C*R*S; along channels {bad} of 72 groups keep too many"
    )


@pytest.mark.parametrize("form", ["pruned", "converted", "state", "safetensors", "torch.save"])
def test_a_model_and_its_files_say_the_same(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4), nn.LayerNorm(4))
    sparse24.prune(model, skip="2")
    source: object = model
    if form == "converted":
        sparse24.convert(model)
    elif form == "state":
        source = model.state_dict()
    elif form == "safetensors":
        source = tmp_path / "model.safetensors"
        safetensors.torch.save_file(model.state_dict(), source)
    elif form == "torch.save":
        source = tmp_path / "model.pt"
        torch.save(model.state_dict(), source)
    rows = {row.name: row.verdict for row in check_masks(source).rows}  # type: ignore[arg-type]
    assert rows == {"0": "runs sparse", "2": "dense"}


def test_compressed_weights_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4), nn.Conv2d(3, 8, 2, 2))
    sparse24.prune(model, skip="1")
    patch = check_masks(model).rows[-1]
    assert patch.verdict == "runs as a patch convolution, if its stride is its kernel"
    sparse24.convert(model)
    assert [row.name for row in check_masks(model.state_dict()).rows] == ["1"]


def test_a_source_of_another_kind_is_refused() -> None:
    with pytest.raises(RuntimeError, match="source must be a model, a state_dict or a file; got list"):
        check_masks([1])  # type: ignore[arg-type]
