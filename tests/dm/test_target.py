"""nbdmap.dm.target: what a target is that overrides nothing."""

import pytest

from nbdmap.block.device import Limits
from nbdmap.block.io import READ, Io
from nbdmap.dm.args import Args
from nbdmap.dm.target import Opened, Spec, Target, merge_limits
from nbdmap.errors import InvalidArgument
from tests.support.disks import FakeDisk, FakeOpener


class Plain(Target):
    type_name = "plain"
    version = (1, 0, 0)


async def test_a_table_opens_each_device_once() -> None:
    first, second = FakeDisk("7:0"), FakeDisk("7:1")
    opened = Opened(FakeOpener(first, second), True)
    specs = [Spec(0, 512, opened, lambda: None), Spec(512, 512, opened, lambda: None)]
    assert specs[0].read_only
    assert await specs[0].open("7:0") is first
    assert await specs[1].open("7:1") is second
    assert await specs[1].open("disk7:0") is first
    assert (first.openers, second.openers) == (1, 1)
    await opened.release()
    assert (first.openers, second.openers) == (0, 0)


async def test_the_defaults() -> None:
    target = Plain(Spec(512, 1024, Opened(FakeOpener(), False), lambda: None))
    assert (target.begin, target.length, target.end) == (512, 1024, 1536)
    assert target.limits() == merge_limits([])
    assert target.table() == target.status() == ""
    assert target.devices() == []
    assert await target.extents(512, 1024) == [(1024, 0)]
    with pytest.raises(InvalidArgument, match="plain takes no messages"):
        await target.message(Args(["hello"]))
    with pytest.raises(NotImplementedError):
        await target.submit(Io(READ, 0), 0)
    with pytest.raises(NotImplementedError):
        await Plain.construct(Spec(0, 512, Opened(FakeOpener(), False), lambda: None), Args([]))
    for step in (target.presuspend(True), target.postsuspend(), target.preresume(), target.resume(), target.close()):
        await step


def test_merged_limits() -> None:
    able = Limits(512, discard=True, zero=True, fast_zero=True, cache=True, io_min=4096, io_opt=8192)
    plain = Limits(4096, sparse=True, rotational=True, io_min=512)
    assert merge_limits([able]) is able
    assert merge_limits([able, plain]) == Limits(4096, sparse=True, rotational=True, io_min=4096, io_opt=8192)
    assert merge_limits([]) == Limits(discard=True, zero=True, fast_zero=True, cache=True)
