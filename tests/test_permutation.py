"""permute: the search against its published cases and brute force; networks that must compute what they did."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse24
from sparse24 import ops
from sparse24.channel_spaces import Walk
from sparse24.permutation import kept_magnitude, permute, search

ALL_ISAS = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
ISAS = ALL_ISAS[: ALL_ISAS.index(ops.cpu_isa()) + 1]

# "Accelerating Sparse Deep Neural Networks" (arXiv 2104.08378), Fig. 6
FIGURE_6 = torch.tensor(
    [
        [1.3, 1.9, 0.2, 1.2, 4.2, 3.5, 7.2, 0.6],
        [0.4, 1.1, 1.5, 6.9, 0.8, 6.7, 5.4, 8.8],
        [0.2, 1.3, 8.0, 0.8, 4.2, 1.3, 5.6, 9.7],
        [1.5, 0.6, 1.3, 0.5, 8.8, 4.2, 8.9, 8.9],
    ],
    dtype=torch.float64,
)

# ---- The search ------------------------------------------------------------------------------------------------------


def test_figure_6() -> None:
    order = search(FIGURE_6)
    assert sorted(order.tolist()) == list(range(8))
    assert kept_magnitude(FIGURE_6) == pytest.approx(83.7)
    assert kept_magnitude(FIGURE_6[:, order]) == pytest.approx(102.9)
    assert kept_magnitude(FIGURE_6[:, [4, 6, 0, 3, 2, 7, 1, 5]]) == pytest.approx(102.9)


@pytest.mark.parametrize("seed", range(4))
def test_two_groups_are_the_optimum_of_all_orders(seed: int) -> None:
    scores = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    every = [
        kept_magnitude(scores[:, [*four, *(set(range(8)) - set(four))]]) for four in itertools.combinations(range(8), 4)
    ]
    assert kept_magnitude(scores[:, search(scores)]) == pytest.approx(max(every))


def test_efficacy_on_a_random_matrix_is_at_least_the_published_one() -> None:
    """64 x 128, uniform: 36.6 % of the way from the default to the largest half of each row (NVIDIA apex, README)."""
    for seed in range(3):
        scores = torch.rand(64, 128, generator=torch.Generator().manual_seed(seed))
        default, most = kept_magnitude(scores), float(scores.double().topk(64, 1).values.sum())
        found = kept_magnitude(scores[:, search(scores)])
        assert (found - default) / (most - default) > 0.40


@pytest.mark.parametrize("columns", [1, 3, 4, 5, 6, 9, 11, 22])
def test_any_number_of_columns(columns: int) -> None:
    scores = torch.randn(6, columns, generator=torch.Generator().manual_seed(columns))
    order = search(scores)
    assert sorted(order.tolist()) == list(range(columns))
    assert kept_magnitude(scores[:, order]) >= kept_magnitude(scores)
    assert torch.equal(order, search(scores))


def test_what_is_not_finite_is_left_out() -> None:
    scores = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    broken = scores.clone()
    broken[1, 3], broken[2, 7], broken[4, 9] = torch.nan, torch.inf, -torch.inf
    zeros = torch.where(broken.isfinite(), broken, 0)
    assert torch.equal(search(broken), search(zeros))


def test_escapes_keep_no_less() -> None:
    scores = torch.rand(8, 32, generator=torch.Generator().manual_seed(0))
    kept = [kept_magnitude(scores[:, search(scores, escapes=count)]) for count in (0, 30)]
    assert kept[1] > kept[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 33, 700])
def test_every_split_of_eight_columns(isa: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    sizes = torch.rand(19, rows, generator=generator)
    eights = torch.stack([torch.randperm(19, generator=generator)[:8] for _ in range(5)])
    with ops.force_cpu_isa(isa):
        kept = torch.ops.sparse24.kept_by_splits(sizes, eights)
    for eight, found in zip(eights, kept, strict=True):
        for split, rest in enumerate(itertools.combinations(range(1, 8), 3)):
            first = [0, *rest]
            halves = [eight[first], eight[sorted(set(range(8)) - set(first))]]
            expected = sum(float(sizes[half].double().topk(2, 0).values.sum()) for half in halves)
            assert float(found[split]) == pytest.approx(expected, rel=(rows + 2) * 2**-24)


def test_columns_that_are_not_there_are_refused() -> None:
    sizes = torch.rand(9, 4)
    for bad, message in (
        (torch.arange(2, 10)[None], "eights must name columns of sizes, 0 to 8; got 9"),
        (torch.arange(-1, 7)[None], "got -1"),
        (torch.arange(7)[None], r"eights must be a contiguous int64 \[P, 8\]; got \[1, 7\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.sparse24.kept_by_splits(sizes, bad)
    with pytest.raises(RuntimeError, match="sizes must be a contiguous float32"):
        torch.ops.sparse24.kept_by_splits(sizes.double(), torch.arange(8)[None])


# ---- Networks --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class ViT(nn.Module):
    """Patches, class token, positions, attention, a gated MLP with a layer scale, and a head on the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        self.attention, self.norm = Attention(16, 2), nn.LayerNorm(16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.scale, self.head = nn.Parameter(torch.rand(16)), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.attention(torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions)
        y = self.norm(x)
        x = x + self.scale * self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.norm(x)[:, 0])


class Residual(nn.Module):
    """A residual CNN with batch norm, a depthwise convolution, pooling, and a squeeze-and-excitation gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.depthwise = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.slopes, self.last, self.head = nn.PReLU(16), nn.Conv2d(16, 24, 1), nn.Linear(24, 4)
        for buffer in (self.norm.running_mean, self.norm.running_var):
            buffer.uniform_(0.5, 2)
        nn.init.uniform_(self.norm.weight)
        nn.init.uniform_(self.slopes.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.max_pool2d(self.slopes(x + self.second(x)), 2)
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(F.adaptive_avg_pool2d(F.silu(self.last(self.depthwise(x))), 1).flatten(1))


class Concatenated(nn.Module):
    """Two branches side by side, whose order is fixed; and a hidden layer after them, which is not."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 12), nn.Linear(8, 12)
        self.middle, self.last = nn.Linear(24, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.cat([self.left(x), self.right(x)], -1))))


class Flattened(nn.Module):
    """Channels merged with pixels, grouped convolution, a pixel shuffle: none of which may be reordered."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=4)
        self.shuffled, self.head = nn.Conv2d(4, 8, 1), nn.Linear(8 * 8 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shuffled(F.pixel_shuffle(self.grouped(self.first(x)), 2)).flatten(1))


class Tied(nn.Module):
    """An embedding that is the output matrix as well, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.twice = nn.Embedding(11, 16), nn.Linear(16, 16)
        self.up, self.down, self.out = nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 11, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.twice(F.gelu(self.twice(x))) + x
        return self.out(x + self.down(F.gelu(self.up(x))))


NETWORKS = {
    "ViT": (ViT, (2, 3, 16, 16), {"attention.qkv, gate, up and 1 more", "down"}),
    "residual": (Residual, (2, 3, 12, 12), {"second, squeeze, last", "excite", "head"}),
    "concatenated": (Concatenated, (4, 8), {"last"}),
    "flattened": (Flattened, (2, 3, 8, 8), set()),
    "tied": (Tied, None, {"twice, up", "down"}),  # prune leaves a tied weight alone
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_computes_what_it_did(name: str) -> None:
    torch.manual_seed(0)
    make, shape, readers = NETWORKS[name]
    model = make().train()
    x = torch.randint(0, 11, (3, 6)) if shape is None else torch.randn(shape)
    other = x.flip(0) if shape is None else torch.randn(shape)
    before = copy.deepcopy(model)
    rows = permute(model, x).rows
    assert {row.read_by for row in rows} == readers
    assert model.training and all(module.training for module in model.modules())
    model.eval(), before.eval()
    with torch.no_grad():
        for one in (x, other):
            torch.testing.assert_close(model(one), before(one), rtol=1e-5, atol=1e-5)
    changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before.state_dict()[key])]
    assert bool(changed) == bool(readers)
    assert all(float(row.after.rstrip(" %")) > float(row.before.rstrip(" %")) for row in rows)
    kept = []
    for one in (before, model):
        sparse24.prune(one)
        weights = [m.weight for m in one.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        kept.append(sum(float(weight.detach().abs().sum()) for weight in weights))
    assert kept[1] > kept[0] or not readers


def test_a_wrong_rule_is_noticed_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if concatenated branches could be reordered alone."""
    torch.manual_seed(0)
    model = Concatenated()
    before = copy.deepcopy(model.state_dict())

    def wrong(self, node):
        dims = [self.dims[part] for part in node.args[0]]
        return [*dims[0][:-1], self.spaces.new(24)]

    monkeypatch.setattr(Walk, "_cat", wrong)
    with pytest.raises(RuntimeError, match=r"changed the outputs by .* the model is as it was"):
        permute(model, torch.randn(4, 8))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_keywords_and_mappings() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
            y = self.b(F.relu(self.a(x)))
            return {"y": y if scale is None else y * scale}

    torch.manual_seed(0)
    model, x = Two(), torch.randn(3, 6)
    y = model(x)["y"]
    assert [row.read_by for row in permute(model, {"x": x, "scale": torch.tensor(1.0)}).rows] == ["b"]
    torch.testing.assert_close(model(x)["y"], y)


def test_a_pruned_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparse24.prune(model)
    with pytest.raises(RuntimeError, match="model must not be pruned yet"):
        permute(model, torch.randn(2, 8))
