"""shfl, vote, match, redux, activemask and elect against plain models of what the PTX ISA says."""

import numpy as np
import pytest
from machine import Source, kinds, load, store

LANES = np.arange(32)
FULL = 0xFFFFFFFF


def run(body, *arrays, block=32, pointers=None, **options):
    report = Source(body, pointers or len(arrays)).launch(1, block, *arrays, **options)
    report.raise_for_errors()
    return report


def shuffle(mode, a, b, c):
    """PTX ISA, shfl.sync, Semantics; lane by lane."""
    values, predicates = np.empty(32, np.uint32), np.empty(32, np.uint32)
    for lane in range(32):
        offset, clamp, segment = int(b[lane]) & 31, int(c[lane]) & 31, int(c[lane]) >> 8 & 31
        low = lane & segment
        high = low | clamp & ~segment
        source = {"up": lane - offset, "down": lane + offset, "bfly": lane ^ offset, "idx": low | offset & ~segment}[
            mode
        ]
        inside = source >= high if mode == "up" else source <= high
        values[lane] = a[source if inside else lane]
        predicates[lane] = inside
    return values, predicates


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles_of_random_arguments(mode):
    source = Source(
        f"""{load("%r10", "%rd0")}
{load("%r11", "%rd1")}
{load("%r12", "%rd2")}
shfl.sync.{mode}.b32 %r13|%p1, %r10, %r11, %r12, -1;
selp.u32 %r14, 1, 0, %p1;
{store("%r13", "%rd3")}
{store("%r14", "%rd4")}""",
        5,
    )
    rng = np.random.default_rng(1)
    for trial in range(200):
        a = rng.integers(0, 2**32, 32, dtype=np.uint32)
        if trial % 2:  # what compilers emit: the same for all lanes
            width = 1 << rng.integers(0, 6)
            b = np.full(32, rng.integers(0, 32), np.uint32)
            c = np.full(32, (32 - width) << 8 | (0 if mode == "up" else 31), np.uint32)
        else:
            b, c = rng.integers(0, 2**32, (2, 32), dtype=np.uint32)
        values, predicates = np.zeros((2, 32), np.uint32)
        source.launch(1, 32, a, b, c, values, predicates).raise_for_errors()
        expected_values, expected_predicates = shuffle(mode, a, b, c)
        np.testing.assert_array_equal(values, expected_values)
        np.testing.assert_array_equal(predicates, expected_predicates)


def test_shuffle_in_place_reads_before_it_writes():
    out = np.zeros(32, np.uint32)
    run(f"shfl.sync.idx.b32 %r2, %r2, 5, 31, -1;\n{store('%r2')}", out)
    np.testing.assert_array_equal(out, np.full(32, 5))


def test_halves_shuffle_apart_in_one_instruction():
    """cooperative_groups::tiled_partition: each half names itself."""
    out = np.zeros(32, np.uint32)
    run(
        f"""setp.lt.u32 %p1, %r2, 16;
selp.b32 %r10, 0xffff, 0xffff0000, %p1;
shfl.sync.down.b32 %r11, %r2, 3, 0x101f, %r10;
{store("%r11")}""",
        out,
    )
    np.testing.assert_array_equal(out, shuffle("down", LANES, np.full(32, 3), np.full(32, 0x101F))[0])


# The upper lanes come to the shuffle with the lower ones; or from behind it, where they have to be waited for.
MEETINGS = {
    "together": """@%p1 bra LOW;
mov.u32 %r11, %r2;
bra MEET;
LOW:
add.u32 %r11, %r2, 100;
MEET:
shfl.sync.bfly.b32 %r12, %r11, 16, 31, -1;""",
    "one after the other": """@!%p1 bra LATE;
add.u32 %r11, %r2, 100;
MEET:
shfl.sync.bfly.b32 %r12, %r11, 16, 31, -1;
bra END;
LATE:
mov.u32 %r11, %r2;
bra MEET;
END:""",
}


@pytest.mark.parametrize("way", MEETINGS)
def test_lanes_that_part_meet_at_a_shuffle(way):
    out = np.zeros(32, np.uint32)
    report = run(f"setp.lt.u32 %p1, %r2, 16;\n{MEETINGS[way]}\n{store('%r12')}", out)
    np.testing.assert_array_equal(out, np.where(LANES < 16, LANES + 16, LANES - 16 + 100))
    counters = report.counters
    assert counters.opcodes["shfl.sync.bfly.b32"] == 1  # it is executed once, by all
    assert sum(counters.opcodes.values()) == counters.instructions


VOTES = {
    "all": lambda p: np.full(32, p.all()),
    "any": lambda p: np.full(32, p.any()),
    "uni": lambda p: np.full(32, p.all() or not p.any()),
}


@pytest.mark.parametrize("negated", [False, True])
@pytest.mark.parametrize("mode", VOTES)
def test_votes(mode, negated):
    source = Source(
        f"""{load("%r10", "%rd0")}
setp.ne.u32 %p1, %r10, 0;
vote.sync.{mode}.pred %p2, {"!" if negated else ""}%p1, -1;
selp.u32 %r11, 1, 0, %p2;
{store("%r11", "%rd1")}""",
        2,
    )
    rng = np.random.default_rng(2)
    for values in (np.zeros(32), np.ones(32), LANES == 31, LANES != 0, rng.integers(0, 2, 32)):
        out = np.full(32, 9, np.uint32)
        values = np.asarray(values, np.uint32)
        source.launch(1, 32, values, out).raise_for_errors()
        np.testing.assert_array_equal(out, VOTES[mode]((values == 0) if negated else (values != 0)))


def test_ballot_is_of_the_lanes_that_are_there():
    values = np.random.default_rng(3).integers(0, 2, 32).astype(np.uint32)
    out = np.zeros(32, np.uint32)
    run(
        f"""{load("%r10", "%rd1")}
setp.ne.u32 %p1, %r10, 0;
setp.lt.u32 %p2, %r2, 20;
@!%p2 bra END;
vote.sync.ballot.b32 %r11, %p1, 0xfffff;
{store("%r11")}
END:""",
        out,
        values,
    )
    expected = int((values[:20].astype(np.uint64) << LANES[:20].astype(np.uint64)).sum())
    np.testing.assert_array_equal(out, np.where(LANES < 20, expected, 0))


@pytest.mark.parametrize("bits", [32, 64])
def test_match(bits):
    """Values that differ in their upper half only are different: both halves count."""
    wide = bits == 64
    source = Source(
        f"""mul.wide.u32 %rd30, %r0, 8;
add.s64 %rd31, %rd0, %rd30;
ld.global.u64 %rd10, [%rd31];
mov.b64 {{%r10, %r11}}, %rd10;
match.any.sync.b{bits} %r11, {"%rd10" if wide else "%r10"}, -1;
match.all.sync.b{bits} %r12|%p1, {"%rd10" if wide else "%r10"}, -1;
selp.u32 %r13, 1, 0, %p1;
{store("%r11", "%rd1")}
{store("%r12", "%rd2")}
{store("%r13", "%rd3")}""",
        4,
    )
    rng = np.random.default_rng(4)
    upper = rng.integers(0, 3, 32).astype(np.uint64) << np.uint64(32)
    for values in (rng.integers(0, 4, 32).astype(np.uint64), upper, upper + rng.integers(0, 2, 32).astype(np.uint64)):
        any_, all_, flag = np.zeros((3, 32), np.uint32)
        source.launch(1, 32, values, any_, all_, flag).raise_for_errors()
        seen = values if wide else values & np.uint64(FULL)
        masks = [sum(1 << i for i in range(32) if seen[i] == seen[lane]) for lane in range(32)]
        np.testing.assert_array_equal(any_, masks)
        equal = len(set(seen.tolist())) == 1
        np.testing.assert_array_equal(all_, FULL if equal else 0)
        np.testing.assert_array_equal(flag, equal)


REDUCTIONS = {
    "add.u32": lambda x: np.add.reduce(x, dtype=np.uint32),
    "add.s32": lambda x: np.add.reduce(x, dtype=np.uint32),
    "min.u32": np.min,
    "max.u32": np.max,
    "min.s32": lambda x: np.min(x.view(np.int32)).view(np.uint32),
    "max.s32": lambda x: np.max(x.view(np.int32)).view(np.uint32),
    "and.b32": np.bitwise_and.reduce,
    "or.b32": np.bitwise_or.reduce,
    "xor.b32": np.bitwise_xor.reduce,
}


@pytest.mark.parametrize("form", REDUCTIONS)
def test_redux_of_two_sets_at_once(form):
    values = np.random.default_rng(5).integers(0, 2**32, 32, dtype=np.uint32)
    if form.startswith("and"):
        values |= 0xFFFF00F0
    out = np.zeros(32, np.uint32)
    run(
        f"""{load("%r10", "%rd1")}
and.b32 %r11, %r2, 1;
setp.eq.u32 %p1, %r11, 0;
selp.b32 %r12, 0x55555555, 0xaaaaaaaa, %p1;
redux.sync.{form} %r13, %r10, %r12;
{store("%r13")}""",
        out,
        values,
    )
    model = REDUCTIONS[form]
    np.testing.assert_array_equal(out, np.where(LANES % 2 == 0, model(values[::2]), model(values[1::2])))


@pytest.mark.parametrize(
    "form", ["min", "max", "min.abs", "max.abs", "min.NaN", "max.NaN", "min.abs.NaN", "max.abs.NaN"]
)
def test_redux_of_floats(form):
    body = f"redux.sync.{form}.f32 %f2, %f1, -1;"
    source = Source("\n".join([load("%f1", kind="f32"), body, store("%f2", "%rd1", kind="f32")]), 2)
    rng = np.random.default_rng(6)
    normal = rng.standard_normal(32).astype(np.float32)
    some_nan = np.where(rng.random(32) < 0.3, np.float32(np.nan), normal)
    zeros = np.where(LANES % 2 == 0, np.float32(-0.0), np.float32(0.0))
    for values in (normal, -np.abs(normal), some_nan, np.full(32, np.nan, np.float32), zeros):
        out = np.zeros(32, np.uint32)
        source.launch(1, 32, values, out).raise_for_errors()
        seen = np.abs(values) if "abs" in form else values
        numbers = seen[~np.isnan(seen)]
        if not len(numbers) or ("NaN" in form and len(numbers) < 32):
            expected = 0x7FFFFFFF
        else:  # +0.0 is above -0.0
            ordered = sorted(numbers, key=lambda x: (x, not np.signbit(x)))
            expected = int(np.float32(ordered[0 if form.startswith("min") else -1]).view(np.uint32))
        assert [hex(x) for x in out] == [hex(expected)] * 32


def test_active_mask_and_election():
    out, leader, chosen = np.zeros((3, 32), np.uint32)
    run(
        f"""activemask.b32 %r10;
setp.ge.u32 %p1, %r2, 9;
@%p1 activemask.b32 %r10;
{store("%r10")}
@!%p1 bra END;
elect.sync %r11|%p2, 0xfffffe00;
selp.u32 %r12, 1, 0, %p2;
{store("%r11", "%rd1")}
{store("%r12", "%rd2")}
END:""",
        out,
        leader,
        chosen,
    )
    np.testing.assert_array_equal(out, np.where(LANES < 9, FULL, FULL << 9 & FULL))
    np.testing.assert_array_equal(leader, np.where(LANES < 9, 0, 9))
    np.testing.assert_array_equal(chosen, LANES == 9)


def test_a_warp_of_few_threads_may_name_all_lanes():
    """Who never was is not waited for; a full mask is what compilers write for any block."""
    out = np.zeros(20, np.uint32)
    run(
        f"""bar.warp.sync -1;
vote.sync.ballot.b32 %r10, 1, -1;
redux.sync.add.u32 %r11, %r10, -1;
{store("%r11")}""",
        out,
        block=20,
    )
    np.testing.assert_array_equal(out, np.full(20, 0xFFFFF * 20 & FULL))


@pytest.mark.parametrize(
    "instruction, word",
    [
        ("shfl.down.b32 %r5, %r2, 1, 31;", "shfl.down.b32"),
        ("vote.all.pred %p1, %p2;", "vote.all.pred"),
        ("shfl.sync.left.b32 %r5, %r2, 1, 31, -1;", "left"),
        ("barrier.cluster.arrive;", "cluster"),
    ],
)
def test_what_is_not_supported_is_named(instruction, word):
    import sparse24.ptx

    with pytest.raises(sparse24.ptx.PtxError, match=word):
        Source(instruction).launch(1, 32, np.zeros(32, np.uint32))


def test_shuffle_from_outside_the_mask_is_found():
    body = """setp.lt.u32 %p1, %r2, 8;
@!%p1 bra END;
shfl.sync.idx.b32 %r10, %r2, {lane}, 31, 0xff; //shuffle
END:"""
    out = np.zeros(32, np.uint32)
    source = Source(body.format(lane=9))
    (error,) = source.launch(1, 32, out).errors
    assert (error.kind, error.line, error.lane, error.count) == ("wrong_mask", source.line("shuffle"), 0, 8)
    assert "lane 9" in error.message
    assert not kinds(Source(body.format(lane=7)).launch(1, 32, out))
