"""The examples of queue-length.txt, service-time.txt and uevent.txt, as they are written there."""

import re
from pathlib import Path

import pytest

from nbdmap.cli.render import event_text
from nbdmap.control.events import Events
from nbdmap.dm.device import MappedDevice
from nbdmap.dm.table import parse_table
from nbdmap.targets import TARGETS
from tests.support.disks import FakeDisk, FakeOpener, mapped

TWO = (
    "multipath 0 0 1 1 queue-length 0 2 1 8:0 128 8:16 128",
    "multipath 0 0 1 1 service-time 0 2 2 8:0 128 1 8:16 128 4",
    "multipath 0 0 1 1 service-time 0 2 2 8:0 128 2 8:16 128 8",
)
STATUS = (
    "multipath 2 0 0 0 1 1 E 0 2 1 8:0 A 0 0 8:16 A 0 0",
    "multipath 2 0 0 0 1 1 E 0 2 2 8:0 A 0 0 1 8:16 A 0 0 4",
    "multipath 2 0 0 0 1 1 E 0 2 2 8:0 A 0 0 2 8:16 A 0 0 8",
)


@pytest.mark.parametrize(("table", "status"), list(zip(TWO, STATUS, strict=True)))
async def test_tables_and_status_lines(table: str, status: str) -> None:
    device = await mapped("test", f"0 10 {table}", FakeDisk("8:0"), FakeDisk("8:16"))
    assert device.live
    (line,), (state,) = device.live.table_lines(), device.live.status_lines()
    assert f"{line.start_sectors} {line.length_sectors} {line.type_name} {line.params}" == f"0 10 {table} "
    assert f"{state.start_sectors} {state.length_sectors} {state.type_name} {state.params}" == f"0 10 {status} "


SAMPLE = """\
UEVENT[1192521009.711215] change@/block/dm-3
ACTION=change
DEVPATH=/block/dm-3
SUBSYSTEM=block
DM_TARGET=multipath
DM_ACTION=PATH_FAILED
DM_SEQNUM=1
DM_PATH=8:32
DM_NR_VALID_PATHS=0
DM_NAME=mpath2
DM_UUID=mpath-35333333000002328
MINOR=3
MAJOR=254
SEQNUM=1130

UEVENT[1192521132.989927] change@/block/dm-3
ACTION=change
DEVPATH=/block/dm-3
SUBSYSTEM=block
DM_TARGET=multipath
DM_ACTION=PATH_REINSTATED
DM_SEQNUM=2
DM_PATH=8:32
DM_NR_VALID_PATHS=1
DM_NAME=mpath2
DM_UUID=mpath-35333333000002328
MINOR=3
MAJOR=254
SEQNUM=1131

"""
"""uevent.txt's, but for the major number, which it gives as 253."""


async def test_the_sample_of_udevmonitor() -> None:
    times = iter([1192521000.0, 1192521009.711215, 1192521132.989927])
    events = Events(lambda: next(times))
    events._number = 1128
    listener = events.subscribe()
    device = MappedDevice("mpath2", "mpath-35333333000002328", "254:3", TARGETS, events.publish)
    await device.load(parse_table("0 10 multipath 0 0 1 1 round-robin 0 1 1 8:32 1"), FakeOpener(FakeDisk("8:32")), False)
    await device.resume()
    await listener.next()
    await device.message(0, ["fail_path", "8:32"])
    await device.message(0, ["reinstate_path", "8:32"])
    assert event_text(await listener.next()) + event_text(await listener.next()) == SAMPLE


def test_the_examples_are_those_of_the_documents() -> None:
    """Where the documents are at hand."""
    seed = Path("/work/shared/seed")
    if not seed.is_dir():
        pytest.skip("the seed documents are not here")
    text = "".join((seed / name).read_text() for name in ("queue-length.txt", "service-time.txt"))
    assert re.findall(r"^test: 0 10 (multipath .*)$", text, re.MULTILINE) == [
        line for pair in zip(TWO, STATUS, strict=True) for line in pair
    ]
