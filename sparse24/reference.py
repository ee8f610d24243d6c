"""The 2:4 format in plain Python: slow, meant to be read, and the oracle of every fast path.

The functions have the names, arguments and results of the package's own (docs/format.md has the same in words). They
run on CPU tensors, and only through comparisons, indexing and one addition, so that every bit of what comes out can be
followed back.

A row is cut into groups of four *units*: a unit is one column, or for pair 4:8 two adjacent columns. Columns past
in_features are +0. Of each group two units stay, i0 < i1, and the group's code is the nibble i0 | i1 << 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Which units of a group compete, and how many of them stay.
CONTESTS: dict[str, list[tuple[list[int], int]]] = {
    "2:4": [([0, 1, 2, 3], 2)],
    "1:2": [([0, 1], 1), ([2, 3], 1)],
    "pair 4:8": [([0, 1, 2, 3], 2)],
}
UNIT_COLUMNS = {"2:4": 1, "1:2": 1, "pair 4:8": 2}


def prune_mask(weight: Tensor, pattern: str = "2:4") -> Tensor:
    """Which entries magnitude pruning keeps: bool [N, K].

    weight: [N, K] float32, float16, bfloat16 or int8; or uint8 [N, K / 2] of packed int4.
    The largest units win: |x|, for pairs |a| + |b| in float32. Of equals the lower index wins. NaN is larger than any
    number and equal to any NaN.
    """
    columns = _columns(weight)
    units = _units(columns, pattern)
    mask = torch.zeros(units.shape, dtype=torch.bool)
    for n, row in enumerate(_magnitudes(units)):
        for g, sizes in enumerate(row):
            mask[n, g, _largest(sizes, pattern)] = True
    return mask.flatten(1)[:, : columns.shape[1]]


def compress(weight: Tensor, pattern: str = "2:4") -> tuple[Tensor, Tensor]:
    """values, meta of a weight that fits `pattern`.

    Nonzero units stay; a free slot takes the lowest unused unit, with what is stored there (+0 or -0.0).
    Returns values [N, 2 * ceil(K / 4)] (pair 4:8: [N, 4 * ceil(K / 8)]) of weight's dtype (int4: packed), and meta
    uint8 [N, ceil(groups / 2)].
    Raises RuntimeError naming the first group that has too many nonzero units. Nonzero: x != 0 or NaN.
    """
    columns = _columns(weight)
    units = _units(columns, pattern)
    nonzero = (units != 0).any(dim=-1)  # NaN != 0, -0.0 == 0
    for n, row in enumerate(nonzero.tolist()):
        for g, group in enumerate(row):
            if any(sum(group[u] for u in contest) > count for contest, count in CONTESTS[pattern]):
                raise RuntimeError(f"weight does not fit {pattern}: row {n}, group {g} is {units[n, g].tolist()}")
    kept = [[_largest([(0, float(x)) for x in group], pattern) for group in row] for row in nonzero.tolist()]
    return _encoded(weight, units, kept)


def prune_compress(weight: Tensor, pattern: str = "2:4") -> tuple[Tensor, Tensor]:
    """compress(torch.where(prune_mask(weight), weight, 0))."""
    columns = _columns(weight)
    pruned = torch.where(prune_mask(weight, pattern), columns, torch.zeros((), dtype=columns.dtype))
    return compress(pack_int4(pruned) if weight.dtype == torch.uint8 else pruned, pattern)


def decompress(
    values: Tensor, meta: Tensor, *, in_features: int, dtype: torch.dtype | None = None, pattern: str = "2:4"
) -> Tensor:
    """The dense weight [N, in_features] (int4: uint8 [N, ceil(in_features / 2)]); raises where validate() does."""
    validate(values, meta, in_features=in_features, dtype=dtype, pattern=pattern)
    unit = UNIT_COLUMNS[pattern]
    slots = _columns(values)
    slots = slots.reshape(slots.shape[0], slots.shape[1] // (2 * unit), 2, unit)
    dense = slots.new_zeros(slots.shape[0], slots.shape[1], 4, unit)
    for n, row in enumerate(_codes(meta, slots.shape[1])):
        for g, code in enumerate(row):
            dense[n, g, code & 3] = slots[n, g, 0]
            dense[n, g, code >> 2] = slots[n, g, 1]
    columns = dense.flatten(1)[:, :in_features]
    return pack_int4(columns) if values.dtype == torch.uint8 else columns.contiguous()


def validate(
    values: Tensor, meta: Tensor, *, in_features: int, dtype: torch.dtype | None = None, pattern: str = "2:4"
) -> None:
    """Raises RuntimeError naming the first row and group that is not legal.

    Legal: shapes as compress() makes them; codes with i0 < i1 (1:2: i0 < 2 <= i1); the bits of every entry past
    in_features are zero; the unused half of a row's last byte is 0.
    """
    if dtype not in (None, values.dtype) and (str(dtype), values.dtype) != ("torch.int4", torch.uint8):
        raise RuntimeError(f"values must hold {dtype}; got {values.dtype}")
    unit = UNIT_COLUMNS[pattern]
    groups = -(-in_features // (4 * unit))
    slots = _columns(values)
    shapes = (slots.shape[0], groups * 2 * unit), (slots.shape[0], -(-groups // 2))
    if (tuple(slots.shape), tuple(meta.shape)) != shapes:
        raise RuntimeError(f"values and meta must be {shapes}; got {tuple(slots.shape)} and {tuple(meta.shape)}")
    stored = _bits(slots).reshape(slots.shape[0], groups, 2, unit).tolist()
    for n, codes in enumerate(_codes(meta, 2 * meta.shape[1])):
        for g, code in enumerate(codes[:groups]):
            kept = [code & 3, code >> 2]
            if pattern == "1:2" and not kept[0] < 2 <= kept[1] or not kept[0] < kept[1]:
                raise RuntimeError(f"row {n}, group {g} has the illegal code {code}")
            for slot, u in enumerate(kept):
                for c in range(unit):
                    if (4 * g + u) * unit + c >= in_features and stored[n][g][slot][c] != 0:
                        raise RuntimeError(f"row {n}, group {g} holds something beyond in_features")
        if any(codes[groups:]):
            raise RuntimeError(f"row {n}, group {groups} does not exist, yet has the code {codes[groups]}")


def pack_int4(columns: Tensor) -> Tensor:
    """int8 [N, K] of -8 to 7 to uint8 [N, ceil(K / 2)]: two's complement, the even column in the low half of a byte."""
    even, odd = columns[:, 0::2], columns[:, 1::2]
    odd = torch.cat([odd, odd.new_zeros(odd.shape[0], even.shape[1] - odd.shape[1])], dim=1)
    return (even & 15 | (odd & 15) << 4).view(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [N, B] to int8 [N, 2 * B] of -8 to 7; the inverse of pack_int4 for even K."""
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).to(torch.int8)
    return torch.where(halves < 8, halves, halves - 16)


def to_cutlass(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """values, meta in the order that torch.sparse._semi_structured_conversions and CUTLASS keep them in.

    values: float16 or bfloat16 in 2:4 (N % 32 == 0, K % 32 == 0), int8 in 2:4 (N % 16 == 0, K % 64 == 0), or float32 in
    1:2 (N % 32 == 0, K % 16 == 0).
    Returns values themselves, and the codes in int16 words (int8: int32), permuted. A float32 group is two nibbles
    there: its hardware counts in 16-bit halves, so keeping the first float is (0, 1) and the second is (2, 3).
    Source: CUTLASS host_reorder.h (reorder_meta) and layout::ColumnMajorInterleaved<2>.
    """
    nibbles = torch.stack([meta & 15, meta >> 4], dim=-1).flatten(1).long()
    if values.dtype == torch.float32:
        second = torch.stack([nibbles & 3, (nibbles >> 2) - 2], dim=-1).flatten(1)
        nibbles = torch.where(second == 1, 0b1110, 0b0100)
    word_dtype, per_word = (torch.int32, 8) if values.dtype == torch.int8 else (torch.int16, 4)
    nibbles = nibbles.view(nibbles.shape[0], -1, per_word)
    words = (nibbles << 4 * torch.arange(per_word)).sum(dim=-1)
    reordered = torch.empty(words.numel(), dtype=word_dtype)
    reordered[_cutlass_offsets(words.shape[0], words.shape[1], per_word)] = words.flatten().to(word_dtype)
    return values, reordered.view(words.shape)


def from_cutlass(values: Tensor, reordered: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of to_cutlass: values, meta as compress() gives them where every group has two nonzeros."""
    per_word = 8 if values.dtype == torch.int8 else 4
    words = reordered.flatten()[_cutlass_offsets(reordered.shape[0], reordered.shape[1], per_word)]
    nibbles = (words.view(reordered.shape).unsqueeze(-1) >> 4 * torch.arange(per_word)).flatten(1) & 15
    if values.dtype == torch.float32:
        second = torch.where(nibbles == 0b1110, 1, 0)
        nibbles = second[:, 0::2] | (second[:, 1::2] + 2) << 2
    return values, (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)


def _cutlass_offsets(rows: int, columns: int, per_word: int) -> Tensor:
    """Where each word of a [rows, columns] matrix of codes goes in CUTLASS's order, in row order."""
    group, interweave = (32, 4) if per_word == 4 else (16, 2)
    offsets = []
    for row in range(rows):
        for column in range(columns):
            # Rows of a group of 32 (16) are dealt to 8 places, 4 (2) rows in each.
            r, c = row // group * group + row % 8 * interweave + row % group // 8, column
            # Every 2 x 2 square is transposed.
            r, c = r - r % 2 + c % 2, c - c % 2 + r % 2
            # Two columns lie interleaved, column pair after column pair.
            offsets.append(c // 2 * (2 * rows) + 2 * r + c % 2)
    return torch.tensor(offsets, dtype=torch.long)


def _columns(tensor: Tensor) -> Tensor:
    """[N, K]: the tensor itself, or int8 for packed int4."""
    return unpack_int4(tensor) if tensor.dtype == torch.uint8 else tensor


def _units(columns: Tensor, pattern: str) -> Tensor:
    """[N, groups, 4, columns of a unit], columns past K as +0."""
    unit = UNIT_COLUMNS[pattern]
    groups = -(-columns.shape[1] // (4 * unit))
    padded = columns.new_zeros(columns.shape[0], groups * 4 * unit)
    padded[:, : columns.shape[1]] = columns
    return padded.view(columns.shape[0], groups, 4, unit)


def _magnitudes(units: Tensor) -> list[list[list[tuple[int, float]]]]:
    """[N][groups][4] of what units are compared by: (1, 0) for NaN, else (0, magnitude)."""
    sizes = units.float().abs()  # exact for every type; int8's -128 is 128
    total = sizes[..., 0] + sizes[..., 1] if units.shape[-1] == 2 else sizes[..., 0]
    return [[[(1, 0.0) if x != x else (0, x) for x in group] for group in row] for row in total.tolist()]


def _largest(sizes: list[tuple[int, float]], pattern: str) -> list[int]:
    """The units that stay, in order. `sorted` keeps the order of equals, so the lower index wins."""
    kept: list[int] = []
    for contest, count in CONTESTS[pattern]:
        kept += sorted(contest, key=lambda u: sizes[u], reverse=True)[:count]
    return sorted(kept)


def _encoded(weight: Tensor, units: Tensor, kept: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    rows, groups, _, unit = units.shape
    values = units.new_empty(rows, groups, 2, unit)
    meta = torch.zeros(rows, -(-groups // 2), dtype=torch.uint8)
    for n in range(rows):
        for g, (i0, i1) in enumerate(kept[n]):
            values[n, g, 0], values[n, g, 1] = units[n, g, i0], units[n, g, i1]
            meta[n, g // 2] |= (i0 | i1 << 2) << 4 * (g % 2)
    flat = values.flatten(1)
    return (pack_int4(flat) if weight.dtype == torch.uint8 else flat), meta


def _codes(meta: Tensor, groups: int) -> list[list[int]]:
    """[N][groups] codes, the earlier group of a byte in its low half."""
    halves: list[list[int]] = torch.stack([meta & 15, meta >> 4], dim=-1).flatten(1)[:, :groups].tolist()
    return halves


def _bits(columns: Tensor) -> Tensor:
    """The same bits as integers."""
    return columns.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[columns.element_size()])
