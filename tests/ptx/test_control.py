"""Divergence, loops, calls, barriers, the watchdog, and the order of warps and blocks."""

import time

import numpy as np
import pytest
from machine import Source, kinds, load, store

LANES = np.arange(32)
ORDERS = [{"order": "forward"}, {"order": "reverse"}] + [{"order": "random", "seed": seed} for seed in range(4)]


# ---- divergence ------------------------------------------------------------------------------------------------------

NEST = """mov.u32 %r10, 1;
{loops}
{store}"""


def test_five_nested_loops_of_divergent_counts():
    """Trip counts, and whether the innermost body breaks, depend on the lane; against the same loops in Python."""
    begin, end = [], []
    for depth in range(5):
        begin.append(
            f"""mov.u32 %r{20 + depth}, 0;
shr.u32 %r{30 + depth}, %r0, {depth};
and.b32 %r{30 + depth}, %r{30 + depth}, 3;
L{depth}:
setp.ge.u32 %p1, %r{20 + depth}, %r{30 + depth};
@%p1 bra E{depth};
mad.lo.u32 %r10, %r10, 5, %r{20 + depth};"""
        )
        end.insert(0, f"add.u32 %r{20 + depth}, %r{20 + depth}, 1;\nbra L{depth};\nE{depth}:")
    inner = """and.b32 %r40, %r10, 7;
setp.eq.u32 %p2, %r40, 3;
@%p2 bra E3;
add.u32 %r10, %r10, 1;"""
    source = Source(NEST.format(loops="\n".join([*begin, inner, *end]), store=store("%r10")))

    def model(thread):
        value, counts = 1, [thread >> depth & 3 for depth in range(5)]

        def loop(depth):
            nonlocal value
            for i in range(counts[depth]):
                value = (value * 5 + i) & 0xFFFFFFFF
                if depth < 4:
                    if loop(depth + 1) and depth == 3:  # the branch leaves the fourth loop
                        return False
                else:
                    if value & 7 == 3:
                        return True
                    value = (value + 1) & 0xFFFFFFFF
            return False

        loop(0)
        return value

    for options in ORDERS:
        out = np.zeros(256, np.uint32)
        source.launch(1, 256, out, **options).raise_for_errors()
        np.testing.assert_array_equal(out, [model(thread) for thread in range(256)])


def test_divergence_is_counted_and_ends_where_the_paths_meet():
    out = np.zeros(32, np.uint32)
    source = Source(
        f"""setp.lt.u32 %p1, %r2, 5;
@%p1 bra LOW; //split
mov.u32 %r10, 1;
bra MEET; //uniform
LOW:
mov.u32 %r10, 2;
MEET:
add.u32 %r10, %r10, 10; //meet
{store("%r10")}"""
    )
    report = source.launch(1, 32, out)
    np.testing.assert_array_equal(out, np.where(LANES < 5, 12, 11))
    assert report.counters.divergent_branches == 1
    assert report.counters.opcodes["add.u32"] == 1  # the lanes execute it together
    assert report.counters.opcodes["bra"] == 2
    assert report.counters.opcodes["mov.u32"] == 4 + 2


def test_indexed_branches():
    out = np.zeros(32, np.uint32)
    source = Source(
        f"""rem.u32 %r10, %r2, 3;
T: .branchtargets A, B, C;
brx.idx %r10, T;
A:
mov.u32 %r11, 100;
bra END;
B:
mov.u32 %r11, 200;
bra END;
C:
mov.u32 %r11, 300;
END:
{store("%r11")}"""
    )
    source.launch(1, 32, out).raise_for_errors()
    np.testing.assert_array_equal(out, (LANES % 3 + 1) * 100)


def test_an_index_beyond_the_list_of_labels_is_found():
    out = np.zeros(32, np.uint32)
    source = Source(
        f"""T: .branchtargets A, B;
brx.idx %r2, T; //jump
A:
B:
mov.u32 %r11, 1;
{store("%r11")}"""
    )
    (error,) = source.launch(1, 32, out).errors
    assert (error.kind, error.line, error.lane, error.count) == ("illegal", source.line("jump"), 2, 30)
    np.testing.assert_array_equal(out, LANES < 2)


FUNCTIONS = """
.func (.reg .u32 %result) twice(.reg .u32 %x)
{
add.u32 %result, %x, %x;
ret;
}
.func (.reg .u32 %result) collatz(.reg .u32 %x)
{
.reg .pred %q<4>;
.reg .b32 %t<8>;
mov.u32 %result, 0;
AGAIN:
setp.le.u32 %q1, %x, 1;
@%q1 ret;
and.b32 %t1, %x, 1;
setp.eq.u32 %q2, %t1, 0;
@%q2 bra EVEN;
mad.lo.u32 %x, %x, 3, 1;
bra NEXT;
EVEN:
shr.u32 %x, %x, 1;
NEXT:
add.u32 %result, %result, 1;
bra AGAIN;
}
.func (.reg .u32 %result) both(.reg .u32 %x)
{
.reg .b32 %t<8>;
call (%t1), collatz, (%x);
call (%t2), twice, (%t1);
add.u32 %result, %t2, 1;
ret;
}
"""


def test_calls_from_different_places_at_once():
    """Odd lanes call collatz through `both`, even ones directly: they meet in it and return to where each came from."""

    def collatz(x):
        steps = 0
        while x > 1:
            x, steps = (3 * x + 1 if x % 2 else x // 2), steps + 1
        return steps

    source = Source(
        f"""and.b32 %r10, %r2, 1;
setp.eq.u32 %p1, %r10, 0;
add.u32 %r12, %r0, 1;
@%p1 bra DIRECT;
call (%r11), both, (%r12);
bra END;
DIRECT:
call (%r11), collatz, (%r12);
END:
{store("%r11")}""",
        functions=FUNCTIONS,
    )
    for options in ORDERS:
        out = np.zeros(96, np.uint32)
        source.launch(1, 96, out, **options).raise_for_errors()
        expected = [collatz(t + 1) if t % 2 == 0 else 2 * collatz(t + 1) + 1 for t in range(96)]
        np.testing.assert_array_equal(out, expected)


def test_lanes_from_different_calls_return_together_to_different_places():
    """The first lanes are so long in the function that the others have their turn and meet them there; all come to its
    end at once."""
    function = """
.func (.reg .u32 %result) count(.reg .u32 %x)
{
.reg .pred %q<4>;
.reg .b32 %t<8>;
mov.u32 %t1, %x;
mov.u32 %result, 0;
AGAIN:
add.u32 %result, %result, 3;
sub.u32 %t1, %t1, 1;
setp.ne.u32 %q1, %t1, 0;
@%q1 bra AGAIN;
ret; //return
}"""
    source = Source(
        f"""setp.ge.u32 %p1, %r2, 16;
@%p1 bra OTHER;
call (%r11), count, (700);
add.u32 %r11, %r11, 1;
bra END;
OTHER:
call (%r11), count, (10);
add.u32 %r11, %r11, 2;
END:
{store("%r11")}""",
        functions=function,
    )
    out = np.zeros(32, np.uint32)
    report = source.launch(1, 32, out)
    report.raise_for_errors()
    np.testing.assert_array_equal(out, np.where(LANES < 16, 2101, 32))
    assert report.counters.opcodes["ret"] == 2  # the function's, by all of them, and the kernel's


def test_a_guarded_call_is_made_by_its_lanes_only():
    out = np.zeros(32, np.uint32)
    source = Source(
        f"""setp.lt.u32 %p1, %r2, 7;
mov.u32 %r11, 5;
@%p1 call (%r11), twice, (%r2);
{store("%r11")}""",
        functions=FUNCTIONS,
    )
    source.launch(1, 32, out).raise_for_errors()
    np.testing.assert_array_equal(out, np.where(LANES < 7, 2 * LANES, 5))


def test_lanes_that_exit_leave_the_others_alone():
    out = np.zeros(100, np.uint32)
    source = Source(
        f"""and.b32 %r10, %r0, 3;
setp.eq.u32 %p1, %r10, 1;
@%p1 exit;
setp.eq.u32 %p1, %r10, 2;
@%p1 ret;
add.u32 %r11, %r0, 1;
{store("%r11")}"""
    )
    source.launch(1, 100, out).raise_for_errors()
    threads = np.arange(100)
    np.testing.assert_array_equal(out, np.where((threads % 4 == 1) | (threads % 4 == 2), 0, threads + 1))


# ---- waiting for each other ------------------------------------------------------------------------------------------

# Each lane adds to a plain counter under a lock. SPIN_FIRST: the loop that waits lies below the critical section, so
# that the holder, further on, has to get its turn; else the critical section lies below the loop.
SPIN_FIRST = """
SPIN:
atom.global.acquire.gpu.cas.b32 %r10, [%rd0], 0, 1;
setp.ne.u32 %p1, %r10, 0;
@%p1 bra SPIN;
{critical}
bra END;
END:"""
SPIN_LAST = """
bra SPIN;
HOLD:
{critical}
bra END;
SPIN:
atom.global.acquire.gpu.cas.b32 %r10, [%rd0], 0, 1;
setp.eq.u32 %p1, %r10, 0;
@%p1 bra HOLD;
bra SPIN;
END:"""
CRITICAL = """ld.global.relaxed.gpu.u32 %r11, [%rd0+4];
add.u32 %r11, %r11, 1;
st.global.relaxed.gpu.u32 [%rd0+4], %r11;
atom.global.release.gpu.exch.b32 %r12, [%rd0], 0;"""


@pytest.mark.parametrize("body", [SPIN_FIRST, SPIN_LAST], ids=["spin first", "spin last"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_lock_between_lanes_warps_and_blocks(body, threads):
    source = Source(body.format(critical=CRITICAL))
    for options in ORDERS[:3]:
        memory = np.zeros(2, np.uint32)
        source.launch(3, 64, memory, threads=threads, budget=50_000_000, **options).raise_for_errors()
        assert memory.tolist() == [0, 3 * 64]


@pytest.mark.parametrize("leave", ["exit", "bra END"])
def test_a_lane_that_exits_is_not_waited_for(leave):
    """Lanes 0 to 15 vote with lane 31, which exits before or meanwhile; lanes 16 to 30 wait for what comes after."""
    source = Source(
        f"""setp.lt.u32 %p1, %r2, 16;
@%p1 bra VOTE;
setp.eq.u32 %p1, %r2, 31;
@%p1 {leave};
WAIT:
ld.volatile.global.u32 %r10, [%rd0];
setp.eq.u32 %p2, %r10, 0;
@%p2 bra WAIT;
bra END;
VOTE:
vote.sync.ballot.b32 %r11, 1, 0x8000ffff;
st.volatile.global.u32 [%rd0], %r11;
END:"""
    )
    flag = np.zeros(1, np.uint32)
    source.launch(1, 32, flag, budget=1_000_000, checks={"sync"}).raise_for_errors()
    assert flag[0] == 0xFFFF


@pytest.mark.parametrize("waiter", ["lower", "upper"])
def test_a_lane_waits_for_another_of_its_warp(waiter):
    """Lane 0 waits in a loop for lane 31's flag; the loop stands before, or after, what sets it."""
    wait = """WAIT:
ld.volatile.global.u32 %r10, [%rd0];
setp.eq.u32 %p2, %r10, 0;
@%p2 bra WAIT;
bra END;"""
    release = """RELEASE:
st.volatile.global.u32 [%rd0], 5;
bra END;"""
    parts = [wait, release] if waiter == "lower" else [release, wait]
    source = Source(f"setp.eq.u32 %p1, %r2, 31;\n@%p1 bra RELEASE;\nbra WAIT;\n{parts[0]}\n{parts[1]}\nEND:")
    flag = np.zeros(1, np.uint32)
    source.launch(1, 32, flag, budget=1_000_000, checks={"sync"}).raise_for_errors()
    assert flag[0] == 5


def test_a_spinning_warp_lets_the_others_run():
    """Every warp waits for the next one's flag in shared memory; only the last sets it unasked."""
    source = Source(
        """mov.u32 %r20, flags;
shl.b32 %r21, %r3, 2;
add.u32 %r20, %r20, %r21;
setp.eq.u32 %p1, %r3, 7;
@%p1 bra SET;
WAIT:
ld.volatile.shared.u32 %r10, [%r20+4];
setp.ne.u32 %p2, %r10, 77;
@%p2 bra WAIT;
SET:
st.volatile.shared.u32 [%r20], 77;
"""
        + store("%r3"),
        declarations=".shared .align 4 .b32 flags[8];",
    )
    for options in ORDERS:
        out = np.full(256, 99, np.uint32)
        source.launch(1, 256, out, checks={"sync"}, budget=10_000_000, **options).raise_for_errors()
        np.testing.assert_array_equal(out, np.arange(256) // 32)


CHAIN = """setp.ne.u32 %p1, %r0, 0;
@%p1 bra WAITED;
WAIT:
ld.acquire.gpu.global.u32 %r10, [%rd0];
setp.ne.u32 %p2, %r10, %r1;
@%p2 bra WAIT;
WAITED:
bar.sync 0;
{work}
bar.sync 0;
@%p1 bra END;
add.u32 %r11, %r1, 1;
fence.acq_rel.gpu;
st.release.gpu.global.u32 [%rd0], %r11;
END:"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_blocks_that_wait_for_each_other_in_a_chain(options, threads):
    """A split-K semaphore: block b adds after block b-1 has, whatever the order in which they are begun."""
    work = f"{load('%r12', '%rd1')}\nmad.lo.u32 %r12, %r12, 3, %r1;\n{store('%r12', '%rd1')}"
    source = Source(CHAIN.format(work=work), 2)
    semaphore, values = np.zeros(1, np.uint32), np.arange(64, dtype=np.uint32)
    source.launch(20, 64, semaphore, values, threads=threads, **options).raise_for_errors()
    expected = np.arange(64, dtype=np.uint32)
    for block in range(20):
        expected = expected * np.uint32(3) + np.uint32(block)
    np.testing.assert_array_equal(values, expected)


def test_a_barrier_of_the_whole_grid():
    """All of 60 blocks have to be under way at once, with one thread to run them."""
    blocks = 60
    source = Source(
        f"""setp.ne.u32 %p1, %r0, 0;
@%p1 bra JOIN;
atom.global.add.release.gpu.u32 %r10, [%rd0], 1;
WAIT:
ld.acquire.gpu.global.u32 %r10, [%rd0];
setp.lt.u32 %p2, %r10, {blocks};
@%p2 bra WAIT;
JOIN:
bar.sync 0;
mov.u32 %r11, 1;
@%p1 bra END;
{store("%r11", "%rd1", "%r1")}
END:""",
        2,
    )
    count, out = np.zeros(1, np.uint32), np.zeros(blocks, np.uint32)
    begin = time.perf_counter()
    source.launch(blocks, 32, count, out, threads=1).raise_for_errors()
    assert time.perf_counter() - begin < 20
    assert out.all()


# ---- barriers --------------------------------------------------------------------------------------------------------


def test_barriers_order_the_warps_of_a_block():
    """A sum over shared memory that goes wrong where any warp runs ahead."""
    source = Source(
        f"""mov.u32 %r20, data;
shl.b32 %r21, %r0, 2;
add.u32 %r22, %r20, %r21;
st.shared.u32 [%r22], %r0;
mov.u32 %r23, 128;
STEP:
bar.sync 0;
setp.ge.u32 %p1, %r0, %r23;
@%p1 bra SKIP;
shl.b32 %r24, %r23, 2;
add.u32 %r24, %r24, %r22;
ld.shared.u32 %r25, [%r24];
ld.shared.u32 %r26, [%r22];
add.u32 %r26, %r26, %r25;
st.shared.u32 [%r22], %r26;
SKIP:
shr.u32 %r23, %r23, 1;
setp.ne.u32 %p2, %r23, 0;
@%p2 bra STEP;
bar.sync 0;
ld.shared.u32 %r27, [%r20];
{store("%r27")}""",
        declarations=".shared .align 4 .b32 data[256];",
    )
    for options in ORDERS:
        out = np.zeros(256, np.uint32)
        report = source.launch(1, 256, out, **options)
        report.raise_for_errors()
        np.testing.assert_array_equal(out, np.full(256, 255 * 128))
        assert report.counters.barriers == 9


@pytest.mark.parametrize("barrier", ["bar", "barrier.cta", "barrier"])
@pytest.mark.parametrize("warps", [1, 3])
def test_reductions_at_barriers(barrier, warps):
    threads = 32 * warps - 5
    source = Source(
        f"""{load("%r10", "%rd0")}
setp.ne.u32 %p1, %r10, 0;
{barrier}.red.popc.u32 %r11, 1, %p1;
{barrier}.red.and.pred %p2, 2, !%p1;
{barrier}.red.or.pred %p3, %r12, {32 * warps}, %p1;
selp.u32 %r13, 256, 0, %p2;
selp.u32 %r14, 512, 0, %p3;
add.u32 %r11, %r11, %r13;
add.u32 %r11, %r11, %r14;
{store("%r11", "%rd1")}""",
        2,
        declarations="",
    )
    rng = np.random.default_rng(1)
    for values in (np.zeros(threads), np.ones(threads), rng.integers(0, 2, threads), np.arange(threads) == threads - 1):
        for options in ORDERS[:3]:
            values, out = np.asarray(values, np.uint32), np.zeros(threads, np.uint32)
            source.launch(1, threads, values, out, **options).raise_for_errors()
            expected = int(values.sum()) + 256 * (not values.any()) + 512 * bool(values.any())
            np.testing.assert_array_equal(out, np.full(threads, expected))


PIPE = """mov.u32 %r20, ring;
mov.u32 %r10, 0;
mov.u32 %r12, 0;
setp.ge.u32 %p1, %r3, 2;
shl.b32 %r21, %r0, 2;
@%p1 bra CONSUME;
add.u32 %r20, %r20, %r21;
PRODUCE:
{wait_empty}
mad.lo.u32 %r11, %r10, 100, %r0;
st.shared.u32 [%r20], %r11;
{signal_full}
add.u32 %r10, %r10, 1;
setp.lt.u32 %p2, %r10, 10;
@%p2 bra PRODUCE;
bra END;
CONSUME:
sub.u32 %r21, %r21, 256;
add.u32 %r20, %r20, %r21;
NEXT:
{signal_empty}
{wait_full}
ld.shared.u32 %r11, [%r20];
mad.lo.u32 %r12, %r12, 3, %r11;
add.u32 %r10, %r10, 1;
setp.lt.u32 %p2, %r10, 10;
@%p2 bra NEXT;
sub.u32 %r13, %r0, 64;
"""
NAMED = {
    "wait_empty": "bar.sync 2, 128;",
    "signal_full": "bar.arrive 1, 128;",
    "signal_empty": "bar.arrive 2, 128;",
    "wait_full": "bar.sync 1, 128;",
}


@pytest.mark.parametrize("barrier", ["bar", "barrier", "barrier.cta"])
def test_producers_and_consumers_at_named_barriers(barrier):
    signals = {name: text.replace("bar.", barrier + ".") for name, text in NAMED.items()}
    source = Source(
        PIPE.format(**signals) + store("%r12", index="%r13") + "\nEND:", declarations=".shared .align 4 .b32 ring[64];"
    )
    expected = np.zeros(64, np.uint32)
    for step in range(10):
        expected = expected * np.uint32(3) + np.uint32(step * 100) + np.arange(64, dtype=np.uint32)
    for options in ORDERS:
        out = np.zeros(64, np.uint32)
        source.launch(1, 128, out, **options).raise_for_errors()  # racecheck included
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "before, after, wait, found",
    [
        ("st.shared.u32 [%r20], %r0;", "", "bar.sync 1, 64;", set()),
        ("st.shared.u32 [%r20], %r0;", "", "bar.arrive 1, 64;", {"race_shared"}),  # who does not wait is not ordered
        ("", "st.shared.u32 [%r20], %r0;", "bar.sync 1, 64;", {"race_shared"}),  # nor is what follows an arrival
    ],
    ids=["clean", "reader does not wait", "writer is late"],
)
def test_arrivals_order_what_was_before_them_for_those_who_wait(before, after, wait, found):
    source = Source(
        f"""mov.u32 %r20, data;
shl.b32 %r21, %r2, 2;
add.u32 %r20, %r20, %r21;
setp.eq.u32 %p1, %r3, 1;
@%p1 bra READ;
{before}
bar.arrive 1, 64;
{after}
bra END;
READ:
{wait}
ld.shared.u32 %r10, [%r20];
END:""",
        declarations=".shared .align 4 .b32 data[32];",
    )
    for options in ORDERS:
        assert kinds(source.launch(1, 64, np.zeros(1, np.uint32), checks={"race", "sync"}, **options)) == found


def test_order_is_handed_on_by_a_third_warp():
    """Warp 0 writes, meets warp 1, which then meets warp 2: what warp 0 wrote is there for warp 2 as well."""
    body = """mov.u32 %r20, word;
setp.eq.u32 %p0, %r0, 0;
setp.eq.u32 %p1, %r3, 1;
setp.eq.u32 %p2, %r3, 2;
@%p0 st.shared.u32 [%r20], 9;
@%p1 bra MIDDLE;
@%p2 bra LAST;
bar.sync 1, 64;
bra END;
MIDDLE:
bar.sync 1, 64;
{between}
bra END;
LAST:
bar.sync 2, 64;
END:
@%p2 ld.shared.u32 %r10, [%r20];
"""
    declarations = ".shared .align 4 .b32 word;"
    for options in ORDERS:
        source = Source(body.format(between="bar.sync 2, 64;"), declarations=declarations)
        source.launch(1, 96, np.zeros(1, np.uint32), **options).raise_for_errors()
        # The other way round: warp 1 meets warp 2 first.
        apart = body.replace("bar.sync 1, 64;\n{between}", "bar.sync 2, 64;\nbar.sync 1, 64;")
        report = Source(apart, declarations=declarations).launch(
            1, 96, np.zeros(1, np.uint32), checks={"race"}, **options
        )
        assert kinds(report) == {"race_shared"}


def test_lanes_of_a_warp_may_come_to_a_barrier_one_by_one():
    """barrier.sync without .aligned at two places; the memory of the early lanes is there for the late ones."""
    source = Source(
        f"""mov.u32 %r20, data;
shl.b32 %r21, %r0, 2;
add.u32 %r22, %r20, %r21;
st.shared.u32 [%r22], %r0;
and.b32 %r10, %r0, 1;
setp.eq.u32 %p1, %r10, 0;
@%p1 bra EVEN;
barrier.sync 0;
bra END;
EVEN:
barrier.sync 0;
END:
xor.b32 %r21, %r21, 4;
add.u32 %r22, %r20, %r21;
ld.shared.u32 %r11, [%r22];
{store("%r11")}""",
        declarations=".shared .align 4 .b32 data[96];",
    )
    for options in ORDERS:
        out = np.zeros(96, np.uint32)
        report = source.launch(1, 96, out, **options)
        report.raise_for_errors()
        np.testing.assert_array_equal(out, np.arange(96) ^ 1)
        assert report.counters.barriers == 1


def test_barriers_of_part_of_a_warp_order_its_lanes():
    body = """mov.u32 %r20, data;
shl.b32 %r21, %r2, 2;
add.u32 %r22, %r20, %r21;
setp.lt.u32 %p1, %r2, 16;
st.shared.u32 [%r22], %r2;
@!%p1 bra END;
{barrier}
xor.b32 %r21, %r21, 32;
add.u32 %r22, %r20, %r21;
ld.shared.u32 %r11, [%r22];
"""
    body += store("%r11") + "\nEND:"
    found = {}
    for barrier in ("bar.warp.sync 0xffff;", "bar.warp.sync 0xff;", ""):
        source = Source(body.format(barrier=barrier), declarations=".shared .align 4 .b32 data[32];")
        out = np.zeros(32, np.uint32)
        found[barrier] = kinds(source.launch(1, 32, out))
        np.testing.assert_array_equal(out, np.where(LANES < 16, LANES ^ 8, 0))
    assert found == {
        "bar.warp.sync 0xffff;": set(),
        "bar.warp.sync 0xff;": {"race_warp", "wrong_mask"},
        "": {"race_warp"},
    }


@pytest.mark.parametrize("first, second, found", [("0xffff", "0xffff00", set()), ("0xff", "0xffff00", {"race_warp"})])
def test_order_is_handed_on_within_a_warp(first, second, found):
    """Lane 0 writes and meets lane 8, which then meets lane 16, which reads."""
    source = Source(
        f"""mov.u32 %r20, word;
setp.eq.u32 %p1, %r2, 0;
@%p1 st.shared.u32 [%r20], 9;
shl.b32 %r21, 1, %r2;
and.b32 %r22, %r21, {first};
setp.ne.u32 %p2, %r22, 0;
@%p2 bar.warp.sync {first};
and.b32 %r22, %r21, {second};
setp.ne.u32 %p2, %r22, 0;
@%p2 bar.warp.sync {second};
setp.eq.u32 %p1, %r2, 16;
@%p1 ld.shared.u32 %r11, [%r20];""",
        declarations=".shared .align 4 .b32 word;",
    )
    assert kinds(source.launch(1, 32, np.zeros(1, np.uint32))) == found


# ---- orders ----------------------------------------------------------------------------------------------------------


def order_of(source, count, block=32, **options):
    """The order in which the threads 0 of each warp came to an atomic counter, by warp."""
    counter, out = np.zeros(1, np.uint32), np.zeros(count, np.uint32)
    source.launch(count if block == 32 else 1, block, counter, out, threads=1, **options).raise_for_errors()
    return np.argsort(out).tolist()


def ticket(index):
    return Source(
        f"""setp.ne.u32 %p1, %r2, 0;
@%p1 bra END;
atom.global.add.u32 %r10, [%rd0], 1;
{store("%r10", "%rd1", index)}
END:""",
        2,
    )


@pytest.mark.parametrize("index, shape", [("%r1", {}), ("%r3", {"block": 32 * 20})], ids=["blocks", "warps"])
def test_orders_of_blocks_and_warps(index, shape):
    source = ticket(index)
    forward = list(range(20))
    assert order_of(source, 20, order="forward", **shape) == forward
    assert order_of(source, 20, order="reverse", **shape) == forward[::-1]
    orders = [order_of(source, 20, order="random", seed=seed, **shape) for seed in range(6)]
    assert all(sorted(order) == forward for order in orders)
    assert len({tuple(order) for order in orders}) >= 5 and forward not in orders
    assert orders[3] == order_of(source, 20, order="random", seed=3, **shape)


def test_threads_share_out_all_blocks():
    out = np.zeros(1000, np.uint32)
    source = Source(
        f"""setp.ne.u32 %p1, %r0, 0;
@%p1 bra END;
atom.global.add.u32 %r10, [%rd0], %r1;
add.u32 %r11, %r1, 1;
{store("%r11", "%rd1", "%r1")}
END:""",
        2,
    )
    for threads in (1, 2, 7):
        total, out = np.zeros(1, np.uint32), np.zeros(1000, np.uint32)
        report = source.launch((10, 25, 4), 64, total, out, threads=threads)
        np.testing.assert_array_equal(out[:10], np.arange(1, 11))  # %ctaid.x alone: 100 blocks write each
        assert total[0] == sum(range(10)) * 100
        assert report.counters.opcodes["atom.global.add.u32"] == 1000


def test_coordinates_of_threads_and_blocks():
    names = [f"{name}.{axis}" for name in ("%tid", "%ntid", "%ctaid", "%nctaid") for axis in "xyz"]
    names += [
        "%laneid",
        "%warpid",
        "%nwarpid",
        "%lanemask_eq",
        "%lanemask_le",
        "%lanemask_lt",
        "%lanemask_ge",
        "%lanemask_gt",
    ]
    grid, block = (3, 2, 2), (5, 3, 4)
    body = f"""mov.u32 %r10, %ntid.x;
mov.u32 %r11, %tid.y;
mov.u32 %r12, %tid.z;
mov.u32 %r13, %ntid.y;
mad.lo.u32 %r14, %r12, %r13, %r11;
mad.lo.u32 %r14, %r14, %r10, %r0;
mov.u32 %r15, %ctaid.z;
mov.u32 %r16, %ctaid.y;
mad.lo.u32 %r15, %r15, {grid[1]}, %r16;
mad.lo.u32 %r15, %r15, {grid[0]}, %r1;
mad.lo.u32 %r14, %r15, 60, %r14;
mul.lo.u32 %r14, %r14, {len(names)};
"""
    for name in names:
        body += f"mov.u32 %r17, {name};\n{store('%r17', index='%r14')}\nadd.u32 %r14, %r14, 1;\n"
    out = np.zeros((12, 60, len(names)), np.uint32)
    Source(body).launch(grid, block, out).raise_for_errors()
    expected = np.zeros_like(out)
    for b in range(12):
        for t in range(60):
            lane = t % 32
            full, bit = 0xFFFFFFFF, 1 << lane
            expected[b, t] = [
                *(t % 5, t // 5 % 3, t // 15, *block, b % 3, b // 3 % 2, b // 6, *grid),
                *(lane, t // 32, 2, bit, (2 * bit - 1) & full, bit - 1, ~(bit - 1) & full, ~(2 * bit - 1) & full),
            ]
    np.testing.assert_array_equal(out, expected)


# ---- the watchdog, traps ---------------------------------------------------------------------------------------------


def test_the_watchdog_stops_an_endless_loop():
    source = Source("LOOP:\nadd.u32 %r10, %r10, 1;\nbra LOOP; //loop")
    begin = time.perf_counter()
    report = source.launch(1000, 64, np.zeros(1, np.uint32), budget=1_000_000, threads=2)
    assert time.perf_counter() - begin < 5  # the blocks after it are not begun
    assert kinds(report) == {"budget"}
    lines = [source.line("loop"), source.line("loop") - 1]
    assert all(error.line in lines and "1000000" in error.message for error in report.errors)


def test_the_default_budget_is_not_endless():
    begin = time.perf_counter()
    source = Source("LOOP:\nbra LOOP;")
    assert kinds(source.launch(1, 1024, np.zeros(1, np.uint32), checks="none", counters=False)) == {"budget"}
    assert time.perf_counter() - begin < 20


def test_a_budget_that_suffices_is_not_used_up():
    source = Source("mov.u32 %r10, 0;\nLOOP:\nadd.u32 %r10, %r10, 1;\nsetp.lt.u32 %p1, %r10, 1000;\n@%p1 bra LOOP;")
    assert not source.launch(1, 32, np.zeros(1, np.uint32), budget=3100).errors
    assert kinds(source.launch(1, 32, np.zeros(1, np.uint32), budget=2900)) == {"budget"}
    # It is a block's own, not the launch's.
    assert not source.launch(50, 32, np.zeros(1, np.uint32), budget=3100).errors


def test_a_trap_stops_the_launch():
    source = Source(
        f"""setp.eq.u32 %p1, %r1, 3;
setp.eq.u32 %p2, %r0, 37;
@!%p1 bra GO;
@!%p2 bra GO;
trap; //trap
GO:
mov.u32 %r10, 1;
{store("%r10", index="%r1")}"""
    )
    out = np.zeros(8, np.uint32)
    (error,) = source.launch(8, 64, out, threads=1).errors
    assert (error.kind, error.line, error.warp, error.lane) == ("trap", source.line("trap"), 1, 5)
    assert tuple(error.block) == (3, 0, 0)
    assert out[:3].all() and not out[4:].any()  # nothing is begun after it
