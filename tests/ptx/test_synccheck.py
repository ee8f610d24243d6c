"""synccheck: for each finding a kernel that has exactly that bug, and its twin without it, which is silent."""

import numpy as np
import pytest
from machine import Source, kinds, store

SHARED = ".shared .align 16 .b8 data[1024];"


def findings(body, block=64, grid=1, **options):
    source = Source(body, declarations=SHARED)
    out = np.zeros(1024, np.uint32)
    report = source.launch(grid, block, out, **options)
    return source, report, out


def only(body, **options):
    source, report, out = findings(body, **options)
    (error,) = report.errors
    return source, error, out


def silent(body, **options):
    _, report, out = findings(body, **options)
    assert not report.errors, report.errors
    return out


ORDERS = ["forward", "reverse", "random"]


# ---- barriers of the block -------------------------------------------------------------------------------------------


def test_barrier_under_a_guard_that_differs_within_the_warp():
    body = "setp.lt.u32 %p1, {what}, 16;\n@%p1 bar.sync 0; //bar\nmov.u32 %r10, 1;\n" + store("%r10")
    for order in ORDERS:
        source, error, out = only(body.format(what="%r2"), block=32, order=order)
        assert (error.kind, error.line, error.lane) == ("divergent_barrier", source.line("bar"), 16)
        assert "0x0000ffff" in error.message
        assert out[:32].all()  # the run goes on to its end
    silent(body.format(what="%r1"), block=32)


def test_barrier_in_a_divergent_branch():
    body = """setp.lt.u32 %p1, {what}, 16;
@!%p1 bra OTHER;
bar.sync 0; //one
bra END;
OTHER:
bar.sync 0; //other
END:
mov.u32 %r10, 1;
""" + store("%r10")
    for order in ORDERS:
        source, report, out = findings(body.format(what="%r2"), block=64, order=order)
        assert kinds(report) == {"divergent_barrier"}
        assert report.errors[0].line == source.line("one")
        assert str(source.line("other")) in report.errors[0].message
        assert out[:64].all()
    # PTX counts arrivals at a barrier by its number: whole warps may come to it at different instructions.
    silent(body.format(what="%r3"), block=64)


def test_warps_at_different_barriers():
    body = """setp.eq.u32 %p1, %r3, 1;
@%p1 bra OTHER;
bar.sync 0; //zero
bra END;
OTHER:
bar.sync {other}; //other
END:"""
    for order in ORDERS:
        source, error, _ = only(body.format(other=1), order=order)
        assert (error.kind, error.line) == ("divergent_barrier", source.line("zero"))
        assert f"line {source.line('other')}" in error.message and "barrier 1" in error.message
        # A device hangs here, whether or not synccheck is on.
        _, error, _ = only(body.format(other=1), order=order, checks={"memory"})
        assert error.kind == "deadlock"
    silent(body.format(other=0))


def test_warp_that_exits_before_a_barrier():
    body = """setp.eq.u32 %p1, %r3, 1;
{early}
bar.sync 0; //bar
{late}
mov.u32 %r10, 1;
""" + store("%r10")
    for order in ORDERS:
        source, error, out = only(body.format(early="@%p1 exit;", late=""), block=96, order=order)
        assert (error.kind, error.line) == ("exited_lane", source.line("bar"))
        assert "warp 1" in error.message
        np.testing.assert_array_equal(out[:96:32], [1, 0, 1])
    silent(body.format(early="", late="@%p1 exit;"), block=96)
    # Without .aligned, who has exited is not waited for.
    silent(body.replace("bar.sync", "barrier.sync").format(early="@%p1 exit;", late=""), block=96)


def test_lanes_that_exit_before_a_barrier():
    """`if (i >= n) return;` before __syncthreads()."""
    body = "setp.ge.u32 %p1, %r0, 40;\n{early}\nbar.sync 0; //bar\n{late}\nmov.u32 %r10, 1;\n" + store("%r10")
    for order in ORDERS:
        source, error, out = only(body.format(early="@%p1 ret;", late=""), order=order)
        assert (error.kind, error.line, error.warp, error.lane) == ("exited_lane", source.line("bar"), 1, 8)
        np.testing.assert_array_equal(out[:64], np.arange(64) < 40)
    silent(body.format(early="", late="@%p1 ret;"))
    silent(body.format(early="", late=""), block=40)  # who never was has not exited


def test_lanes_that_exit_while_others_wait():
    body = """setp.lt.u32 %p1, %r2, 16;
@%p1 bra WAIT;
bra LEAVE;
WAIT:
bar.sync 0; //bar
mov.u32 %r10, 1;
{store}
exit;
LEAVE:
"""
    source, error, out = only(body.format(store=store("%r10")), block=32)
    assert (error.kind, error.line) == ("exited_lane", source.line("bar"))
    np.testing.assert_array_equal(out[:32], np.arange(32) < 16)
    # Without .aligned the lanes may go apart, and who exits is not waited for.
    body = body.replace("bar.sync", "barrier.sync").format(store=store("%r10"))
    for order in ORDERS:
        out = silent(body, block=64, order=order)
        np.testing.assert_array_equal(out[:64], np.arange(64) % 32 < 16)


def test_barrier_that_nobody_completes():
    body = "setp.eq.u32 %p1, %r3, 1;\n@%p1 bra END;\nbar.sync 1, {count}; //bar\nEND:"
    for order in ORDERS:
        source, error, _ = only(body.format(count=64), order=order)
        assert (error.kind, error.line) == ("deadlock", source.line("bar"))
        assert "64 threads" in error.message
    silent(body.format(count=32))


def test_lanes_asleep_while_others_of_the_warp_wait_for_them():
    body = """setp.lt.u32 %p1, %r2, 16;
@%p1 bra SLEEP;
vote.sync.ballot.b32 %r10, 1, {mask}; //vote
barrier.sync 0;
bra END;
SLEEP:
barrier.sync 0;
END:"""
    source, error, _ = only(body.format(mask="-1"), block=32)
    assert (error.kind, error.line) == ("divergent_instruction", source.line("vote"))
    silent(body.format(mask="0xffff0000"), block=32)


def test_lanes_of_a_warp_at_different_barriers():
    body = """setp.lt.u32 %p1, %r2, 16;
@%p1 bra ONE;
barrier.sync 0; //zero
bra END;
ONE:
barrier.sync {one}; //one
END:"""
    source, error, _ = only(body.format(one=1), block=32)
    assert error.kind == "divergent_barrier"
    assert {error.line} <= {source.line("zero"), source.line("one")}
    silent(body.format(one=0), block=32)


@pytest.mark.parametrize(
    "barrier, clean, part",
    [
        ("bar.sync 1, 33;", "bar.sync 1, 32;", "multiple of 32"),
        ("bar.sync 1, 96;", "bar.sync 1, 64;", "the block has 64"),
        ("bar.sync 16;", "bar.sync 15;", "0 to 15"),
        ("bar.arrive 1, 0;", "bar.arrive 1, 64;", "not 0"),
        ("bar.sync %r2;", "bar.sync %r1;", "lanes of one warp"),
    ],
)
def test_operands_of_barriers(barrier, clean, part):
    body = "{barrier} //bar\nmov.u32 %r10, 1;\n" + store("%r10")
    for checks in ("all", "none"):
        source, report, out = findings(body.format(barrier=barrier), checks=checks)
        assert kinds(report) == {"illegal"} and report.errors[0].line == source.line("bar")
        assert part in report.errors[0].message
    silent(body.format(barrier=clean))


def test_warps_that_disagree_about_a_barrier():
    body = """setp.eq.u32 %p1, %r3, 1;
selp.u32 %r10, {counts}, %p1;
bar.sync 1, %r10; //bar"""
    _, report, _ = findings(body.format(counts="64, 96"), block=96, order="forward")
    assert "illegal" in kinds(report)
    assert "64" in report.errors[0].message and "96" in report.errors[0].message
    silent(body.format(counts="96, 96"), block=96)


def test_barriers_of_different_kinds_at_once():
    body = """setp.eq.u32 %p1, %r3, 1;
@%p1 bra OTHER;
bar.red.popc.u32 %r10, 0, %p1; //red
bra END;
OTHER:
{other}
END:"""
    _, error, _ = only(body.format(other="bar.sync 0;"))
    assert error.kind == "illegal"
    silent(body.format(other="bar.red.popc.u32 %r10, 0, %p1;"))


# ---- lanes of a warp -------------------------------------------------------------------------------------------------

SYNC = {
    "shfl": "shfl.sync.idx.b32 %r10, %r2, 0, 31, {mask};",
    "vote": "vote.sync.any.pred %p3, %p1, {mask};",
    "ballot": "vote.sync.ballot.b32 %r10, %p1, {mask};",
    "match": "match.any.sync.b32 %r10, %r2, {mask};",
    "redux": "redux.sync.add.u32 %r10, %r2, {mask};",
    "elect": "elect.sync %r10|%p3, {mask};",
    "bar.warp": "bar.warp.sync {mask};",
}


@pytest.mark.parametrize("name", SYNC)
def test_full_mask_in_a_divergent_branch(name):
    body = "setp.lt.u32 %p1, %r2, 16;\n@!%p1 bra END;\n{sync} //sync\nEND:\nbar.warp.sync -1;"
    source, error, _ = only(body.format(sync=SYNC[name].format(mask="-1")), block=32)
    kind = "divergent_barrier" if name == "bar.warp" else "divergent_instruction"
    assert (error.kind, error.line) == (kind, source.line("sync"))
    assert "0xffff0000" in error.message
    silent(body.format(sync=SYNC[name].format(mask="0xffff")), block=32)


@pytest.mark.parametrize("name", SYNC)
def test_mask_that_leaves_the_executing_lane_out(name):
    body = "{sync} //sync"
    source, error, _ = only(body.format(sync=SYNC[name].format(mask="0xffff")), block=32)
    assert (error.kind, error.line, error.lane) == ("wrong_mask", source.line("sync"), 16)
    silent(body.format(sync=SYNC[name].format(mask="-1")), block=32)


@pytest.mark.parametrize("name", SYNC)
def test_empty_mask(name):
    source, report, _ = findings(f"{SYNC[name].format(mask='0')} //sync", block=32)
    assert kinds(report) == {"wrong_mask"}
    assert "empty" in report.errors[0].message and report.errors[0].line == source.line("sync")


@pytest.mark.parametrize("name", SYNC)
def test_lanes_that_disagree_about_the_mask(name):
    body = "setp.lt.u32 %p2, %r2, 8;\nselp.b32 %r11, {masks}, %p2;\n{sync} //sync"
    sync = SYNC[name].format(mask="%r11").replace("%r2, 0, 31", "%r2, %r2, 31")
    source, report, _ = findings(body.format(masks="-1, 0xfffffff0", sync=sync), block=32)
    assert kinds(report) == {"wrong_mask"}
    assert report.errors[0].line == source.line("sync")
    silent(body.format(masks="0xff, 0xffffff00", sync=sync), block=32)


@pytest.mark.parametrize("name", SYNC)
def test_mask_that_names_lanes_that_have_exited(name):
    """bar.warp.sync and elect.sync wait for all lanes of the mask, the others for those that have not exited (ISA)."""
    body = "setp.lt.u32 %p1, %r2, 4;\n{exit}\n{sync} //sync"
    sync = SYNC[name].format(mask="-1").replace("%r2, 0, 31", "%r2, 9, 31")
    source, report, _ = findings(body.format(exit="@%p1 exit;", sync=sync), block=32)
    if name in ("bar.warp", "elect"):
        (error,) = report.errors
        assert (error.kind, error.line, error.lane) == ("exited_lane", source.line("sync"), 0)
    else:
        assert not report.errors
    silent(body.format(exit="", sync=sync), block=32)


def test_shuffle_from_a_lane_that_has_exited():
    body = "setp.lt.u32 %p1, %r2, 4;\n@%p1 exit;\nshfl.sync.idx.b32 %r10, %r2, {lane}, 31, -1; //shuffle"
    source, error, _ = only(body.format(lane=3), block=32)
    assert (error.kind, error.line, error.lane) == ("exited_lane", source.line("shuffle"), 4)
    silent(body.format(lane=4), block=32)


def test_sync_under_a_guard_that_its_mask_does_not_know_of():
    """A guard is a branch around the instruction: who is skipped does not come."""
    body = """setp.lt.u32 %p1, %r2, 16;
@%p1 vote.sync.ballot.b32 %r10, 1, {mask}; //sync
bar.warp.sync -1;
mov.u32 %r11, 1;
""" + store("%r11")
    source, error, out = only(body.format(mask="-1"), block=32)
    assert (error.kind, error.line) == ("divergent_instruction", source.line("sync"))
    assert out[:32].all()
    silent(body.format(mask="0xffff"), block=32)


# ---- what the whole warp has to execute ------------------------------------------------------------------------------

LDMATRIX = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r10}}, [%r20]; //matrix"


def test_aligned_instruction_in_a_divergent_branch():
    body = (
        "mov.u32 %r20, data;\nsetp.lt.u32 %p1, {what}, 16;\n@!%p1 bra END;\n" + LDMATRIX + "\nEND:\nbar.warp.sync -1;"
    )
    source, error, _ = only(body.format(what="%r2"), block=32, checks={"sync"})
    assert (error.kind, error.line) == ("divergent_instruction", source.line("matrix"))
    silent(body.format(what="%r1"), block=32, checks={"sync"})


def test_aligned_instruction_under_a_guard():
    body = "mov.u32 %r20, data;\nsetp.lt.u32 %p1, {what}, 16;\n@%p1 " + LDMATRIX
    source, error, _ = only(body.format(what="%r2"), block=32, checks={"sync"})
    assert (error.kind, error.line) == ("divergent_instruction", source.line("matrix"))
    silent(body.format(what="%r1"), block=32, checks={"sync"})


def test_aligned_instruction_of_a_warp_with_exited_lanes():
    body = "mov.u32 %r20, data;\nsetp.eq.u32 %p1, %r2, 7;\n{}\n" + LDMATRIX
    source, error, _ = only(body.format("@%p1 exit;"), block=32, checks={"sync"})
    assert (error.kind, error.line, error.lane) == ("exited_lane", source.line("matrix"), 7)
    silent(body.format(""), block=32, checks={"sync"})
    # Nor can a warp that has not got 32 threads.
    source, error, _ = only(body.format(""), block=48, checks={"sync"})
    assert (error.kind, error.warp, error.lane) == ("exited_lane", 1, 16)


def test_checks_that_are_off_say_nothing():
    body = "setp.lt.u32 %p1, %r2, 16;\n@%p1 bar.sync 0;\nvote.sync.any.pred %p2, %p1, 0xff;"
    assert len(findings(body, block=32)[1].errors) == 2
    for checks in ("none", {"memory", "race"}):
        silent(body, block=32, checks=checks)
