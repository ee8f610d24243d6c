"""The kernels for few tokens: exact on integers at every edge, within bounds on reals, silent, and frugal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bounds import assert_linear
from emulated import ACTIVATIONS, NUMBERS, Epilogue, LinearArguments, module, pack
from oracles import ORDERS
from torch import Tensor

from sparse24.ptx import Buffer, Report

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "s8": torch.int8}
TILES = [(16, 8), (32, 8), (32, 16), (64, 16)]  # features x tokens
CODES = torch.tensor([(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)])
COLUMNS = [1, 3, 4, 12, 20, 31, 32, 33, 63, 64, 65, 127, 129, 200, 1031]
FEATURES = [1, 15, 16, 17, 63, 64, 65, 130]


kinds = pytest.mark.parametrize("kind", DTYPES)
tiles = pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile[0]}x{tile[1]}")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Of torch: on matrices as small as these its threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Product:
    """x [tokens, k] and a 2:4 W [n, k], of small integers or of normal reals. Around the rows of x there is NaN.

    stride: elements between rows of x, k unless it is said. offset: elements of memory before x. codes: which pairs
    stay, [n, groups] of 0 to 5.
    """

    def __init__(
        self,
        kind: str,
        tokens: int,
        n: int,
        k: int,
        stride: int | None = None,
        offset: int = 0,
        codes: Tensor | None = None,
        real: bool = False,
    ) -> None:
        self.kind, self.tokens, self.n, self.k = kind, tokens, n, k
        dtype = DTYPES[kind]
        random = torch.Generator().manual_seed(n * 10007 + k * 101 + tokens)

        def entries(*shape: int) -> Tensor:
            if real:
                return torch.randn(shape, generator=random).to(dtype)
            return torch.tensor([-4, -3, -2, -1, 1, 2, 3, 4])[torch.randint(8, shape, generator=random)].to(dtype)

        groups = -(-k // 4)
        if codes is None:
            codes = torch.randint(6, (n, groups), generator=random)
        places = CODES[codes].view(n, 2 * groups)
        columns = places + 4 * torch.arange(groups).repeat_interleave(2)
        values = torch.where(columns < k, entries(n, 2 * groups), torch.zeros((), dtype=dtype))
        self.weight = torch.zeros(n, 4 * groups, dtype=dtype).scatter(1, columns, values)[:, :k]
        self.packed, self.row_blocks, self.column_blocks = pack(values, places)

        self.stride = k if stride is None else stride
        last = (tokens - 1) * self.stride
        self.first = offset - min(0, last)
        self.memory = torch.full((self.first + max(0, last) + k,), 99 if kind == "s8" else float("nan"), dtype=dtype)
        rows = self.first + self.stride * torch.arange(tokens)[:, None] + torch.arange(k)
        self.memory[rows] = entries(tokens, k)
        self.x = self.memory[rows]
        self.exact = self.x.double() @ self.weight.double().T

    def run(
        self,
        tile: tuple[int, int],
        *,
        y_dtype: torch.dtype = torch.float32,
        splits: int = 1,
        edits: tuple[tuple[str, str], ...] = (),
        activation: str = "none",
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        scales: Tensor | None = None,
        x_scales: Tensor | None = None,
        y_scale: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Report]:
        """y [tokens, n], or with splits their sums [splits, tokens, n]. Memory beside y must stay as it is."""
        buffers: list[Buffer] = []

        def address(tensor: Tensor | None, offset: int = 0) -> int:
            if tensor is None:
                return 0
            buffers.append(Buffer(tensor.view(torch.uint8)))
            return buffers[-1].address + offset * tensor.itemsize

        def number(tensor: Tensor | None) -> int:
            return 0 if tensor is None else NUMBERS.index(tensor.dtype)

        margin, y_stride = 8, self.n + 3
        memory = torch.empty(margin + self.tokens * y_stride, dtype=y_dtype)
        memory.fill_(float("nan") if y_dtype.is_floating_point else 77)
        y = memory[margin:].view(self.tokens, y_stride)[:, : self.n]
        sum_dtype = torch.int32 if self.kind == "s8" else torch.float32
        partial = torch.full((splits, self.tokens, self.n), 77).to(sum_dtype)
        epilogue = Epilogue(
            y=address(memory, margin),
            bias=address(bias),
            residual=address(residual),
            scales=address(scales),
            x_scales=address(x_scales),
            y_scale=address(y_scale),
            y_stride=y_stride,
            residual_stride=self.n,
            y_type=NUMBERS.index(y_dtype),
            bias_type=number(bias),
            residual_type=number(residual),
            activation=ACTIVATIONS.index(activation),
            x_scale_step=int(x_scales is not None and len(x_scales) > 1),
            out_features=self.n,
            tokens=self.tokens,
        )
        arguments = LinearArguments(
            packed=address(self.packed),
            x=address(self.memory, self.first),
            x_stride=self.stride * self.memory.itemsize,
            partial=address(partial) if splits > 1 else 0,
            in_features=self.k,
            row_blocks=self.row_blocks,
            column_blocks=self.column_blocks,
            split_blocks=-(-self.column_blocks // splits),
            epilogue=epilogue,
        )
        name, grid = f"linear_few_{self.kind}_{tile[0]}x{tile[1]}", (-(-self.n // tile[0]), 1, splits)
        report = module("linear_few", *edits).launch(name, grid, 256, [bytes(arguments)], **options)
        for buffer in buffers:
            buffer.free()
        assert report.ok, f"{report}"
        result = (y if splits == 1 else partial).clone()
        y.fill_(memory[0])
        assert torch.equal(memory.view(torch.uint8), memory[:1].expand_as(memory).contiguous().view(torch.uint8)), (
            "something beside y was written"
        )
        return result, report

    def check(self, tile: tuple[int, int], **how: Any) -> Report:
        """Runs on integers; the result must be exact."""
        y, report = self.run(tile, **how)
        wrong = (y.double() != self.exact).nonzero()
        assert not len(wrong), f"{len(wrong)} wrong of {y.numel()}, the first at [token, feature] {wrong[0].tolist()}"
        return report

    def check_splits(self, tile: tuple[int, int], splits: int, **how: Any) -> None:
        """Runs on integers; each split's sums must be the product over its own columns."""
        columns = -(-self.column_blocks // splits) * (128 // self.x.itemsize)
        sums, _ = self.run(tile, splits=splits, **how)
        for split in range(splits):
            part = slice(split * columns, (split + 1) * columns)
            exact = self.x[:, part].double() @ self.weight[:, part].double().T
            assert torch.equal(sums[split].double(), exact), f"wrong in split {split}"


# ---- Right -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", COLUMNS)
@tiles
@kinds
def test_shapes(kind: str, tile: tuple[int, int], k: int) -> None:
    """Each N, all numbers of tokens in turn, rows of x that begin anywhere."""
    for i, n in enumerate(FEATURES if kind != "bf16" else FEATURES[::3]):
        turn = i + COLUMNS.index(k)
        tokens = tile[1] - turn % tile[1]
        Product(kind, tokens, n, k, stride=k + turn % 5, offset=turn % 9).check(tile)


@pytest.mark.parametrize("tokens", range(1, 17))
@kinds
def test_tokens(kind: str, tokens: int) -> None:
    for tile in TILES:
        if tokens <= tile[1]:
            Product(kind, tokens, 70, 520).check(tile)


@kinds
def test_rows_of_x_anywhere(kind: str) -> None:
    """Every alignment of the first row and of the stride; rows that overlap, are the same, or go backwards."""
    elements = 16 // DTYPES[kind].itemsize
    for offset in range(elements + 1):
        Product(kind, 3, 20, 200, stride=208, offset=offset).check((16, 8))
    for stride in (*range(200, 201 + elements), 7, 1, 0, -200, -203, -208):
        Product(kind, 5, 20, 200, stride=stride).check((16, 8))
        Product(kind, 13, 20, 200, stride=stride, offset=2).check((32, 16))


@kinds
def test_codes_in_every_lane(kind: str) -> None:
    """All six pairs in each group of a block, one after the other, alone and beside the others."""
    rows, groups = torch.arange(64)[:, None], torch.arange(128)[None]
    for code in range(6):
        for codes in (torch.full((64, 128), code), (rows + groups + code) % 6, (rows // 2 + 5 * groups + code) % 6):
            for tile in TILES:
                Product(kind, tile[1], 64, 512, codes=codes).check(tile)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_not_a_number_stays_where_it_is(kind: str) -> None:
    """In its token, and in the features that keep its column."""
    product = Product(kind, 6, 70, 70)
    product.memory[product.first + 2 * 70 + 69] = float("nan")
    for tile in TILES:
        y, _ = product.run(tile)
        wrong = product.exact.clone()
        wrong[2, product.weight[:, 69] != 0] = float("nan")
        torch.testing.assert_close(y.double(), wrong, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_reals(kind: str, activation: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(5)
    for tile, tokens, n, k in ((16, 8), 7, 37, 1000), ((64, 16), 16, 130, 331):
        product = Product(kind, tokens, n, k, real=True)
        product.weight, bias = product.weight.float(), torch.randn(n, generator=random).to(DTYPES[kind])
        y, _ = product.run(tile, y_dtype=dtype, activation=activation, bias=bias)
        assert_linear(y, product.x, product.weight, bias, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("per_token", [False, True], ids=["tensor", "token"])
def test_int8_scaled(per_token: bool, dtype: torch.dtype) -> None:
    """Scales are powers of two and residuals integers: exact but for the one rounding of y."""
    for tile, tokens, n, k in ((32, 8), 8, 37, 500), ((64, 16), 9, 130, 331):
        product = Product("s8", tokens, n, k)
        scales = 2.0 ** -(torch.arange(n) % 4)
        x_scales = 2.0 ** -(torch.arange(tokens if per_token else 1) % 3)
        residual = (torch.arange(tokens * n).view(tokens, n) % 11 - 5).to(torch.bfloat16)
        y, _ = product.run(tile, y_dtype=dtype, scales=scales, x_scales=x_scales, residual=residual, activation="relu")
        exact = product.exact * x_scales.double()[:, None] * scales.double() + residual.double()
        assert torch.equal(y, exact.relu().to(dtype))


def test_int8_to_integers() -> None:
    product = Product("s8", 11, 130, 331)
    product.check((32, 16), y_dtype=torch.int32)
    ones = torch.ones(130)
    y, _ = product.run((64, 16), y_dtype=torch.int8, scales=ones, x_scales=ones[:1], y_scale=torch.tensor([0.5]))
    assert torch.equal(y.double(), (product.exact * 2).clamp(-127, 127))


@tiles
@kinds
def test_splits(kind: str, tile: tuple[int, int]) -> None:
    """Each split's sums are the product over its own columns, also where a split has none."""
    product = Product(kind, tile[1] - 1, 70, 1500)
    for splits in 2, 3, product.column_blocks, product.column_blocks + 2:
        product.check_splits(tile, splits)


# ---- Silent, the same in every order, and frugal ---------------------------------------------------------------------


@tiles
@kinds
def test_orders(kind: str, tile: tuple[int, int]) -> None:
    """Sums of reals depend on their order: it is fixed."""
    for stride, splits in itertools.product((1024, 1025, 1026), (1, 2)):
        product = Product(kind, tile[1] - 3, 70, 1024, stride=stride, real=kind != "s8")
        results = [product.run(tile, splits=splits, order=order, seed=seed)[0] for order, seed in ORDERS]
        for result in results[1:]:
            assert torch.equal(result, results[0])


@tiles
@kinds
def test_counters(kind: str, tile: tuple[int, int]) -> None:
    """W is read once, in whole sectors, and shared memory never waits for a bank."""
    product = Product(kind, tile[1], 128, 2048)
    report = product.check(tile)
    weight = [i for i in report.counters.per_instruction if "no_allocate" in i.opcode]
    assert sum(i.bytes for i in weight) == len(product.packed)
    assert sum(i.global_sectors for i in weight) == len(product.packed) // 32
    x = [i for i in report.counters.per_instruction if i.opcode.startswith("cp.async") and i.bytes]
    assert sum(i.global_sectors for i in x) == 128 // tile[0] * product.memory.nbytes // 32
    assert report.counters.shared_waves == report.counters.shared_ideal
    blocks = product.row_blocks * product.column_blocks
    assert report.counters.mma == blocks * 2 * tile[1] // 8


# ---- Planted bugs ----------------------------------------------------------------------------------------------------

BUGS = [  # how it is found, what it is, the right text and the wrong one
    ("wrong of", "selector", "mma_sp_f16<STEP>(d", "mma_sp_f16<0>(d"),
    ("wrong of", "lanes of the metadata", "packed::VALUE_BYTES + lane * 4", "packed::VALUE_BYTES + (lane ^ 1) * 4"),
    ("async_in_flight", "copies not waited for", "cp_async_wait<DEPTH - 1>", "cp_async_wait<DEPTH>"),
    ("race_warp", "slot read at once", "__syncwarp();  // all lanes' copies have come", ""),
    ("race_warp", "slot written at once", "__syncwarp();  // all lanes have read the slot", ""),
    ("race_shared", "sums over a ring in use", "__syncthreads();  // the rings are done with", ""),
    ("race_shared", "sums not waited for", "__syncthreads();  // all sums are there", ""),
    ("wrong of", "last warp left out", "other < WARPS;", "other < WARPS - 1;"),
    ("wrong of|out_of_bounds", "columns past the end, 16 bytes", "present = columns > 0", "present = columns > -8"),
    ("wrong of|out_of_bounds", "a column too many", "max(columns, 0)", "max(columns + 1, 0)"),
    ("wrong of", "a column too few", "max(columns, 0)", "max(columns - 1, 0)"),
    ("out_of_bounds", "tokens past the end", "token < tokens ? available : 0", "available"),
    ("out_of_bounds", "tokens past the end, 16 bytes", " && first_token + token < tokens", ""),
    ("out_of_bounds", "W past its end", "if (more) ask_weight", "ask_weight"),
    ("wrong of", "strips in one place", "values + strip * BLOCK_BYTES", "values"),
    ("wrong of", "x of the warp before", "from += WARPS * SLOT_BYTES", "from += (WARPS - 1) * SLOT_BYTES"),
    ("misaligned", "half a piece is taken for aligned", "whole % 16 == 0", "whole % 8 == 0"),
    ("misaligned", "half a word is taken for aligned", "x_stride)) % 4 == 0", "x_stride)) % 2 == 0"),
    ("wrong in split", "splits backwards", "begin = blockIdx.z *", "begin = (gridDim.z - 1 - blockIdx.z) *"),
    (
        "wrong in split",
        "no end of a split",
        "arguments.split_blocks, arguments.column_blocks)",
        "1000, arguments.column_blocks)",
    ),
    ("conflicts", "sums not swizzled", "index ^ (index / (2 * ROWS) % 4 * 8)", "index"),
]
ONLY_F16 = [("SPARSE24_FEW_TILES(bf16, BF16Weight, 3)", ""), ("SPARSE24_FEW_TILES(s8, I8Weight, 2)", "")]


def find(*edits: tuple[str, str]) -> None:
    """Raises AssertionError for what is wrong with the f16 kernels with these edits."""
    shapes = [
        (5, 2200, 2208, (16, 8)),
        (13, 1500, 1502, (64, 16)),
        (11, 1031, 1031, (32, 16)),
        (7, 1032, 1036, (32, 8)),
    ]
    for tokens, k, stride, tile in shapes:
        product = Product("f16", tokens, 70, k, stride=stride)
        for order, seed in ORDERS:
            report = product.check(tile, edits=edits, order=order, seed=seed)
        assert report.counters.shared_waves == report.counters.shared_ideal, "conflicts"
        product.check_splits(tile, 3, edits=edits)


@pytest.mark.parametrize(
    ("how", "right", "wrong"), [bug[:1] + bug[2:] for bug in BUGS], ids=[bug[1].replace(" ", "-") for bug in BUGS]
)
def test_bug_is_found(how: str, right: str, wrong: str) -> None:
    with pytest.raises(AssertionError, match=how):
        find(*ONLY_F16, (right, wrong))


def test_no_bug_is_found() -> None:
    find(*ONLY_F16)
