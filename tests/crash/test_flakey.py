"""A flakey device with drop_writes that goes down while clients work: the oracle says what may be on the disk afterwards.

To the clients all is well; for the disk the moment at which it goes down is that of a power cut, but for one thing: what the
disk was asked before is done. So the disk must hold what the oracle allows at that moment, with and without a cut of the
disk's own power on top, and nothing of what was asked later.
"""

import asyncio
import random

import pytest

from nbdmap.targets.flakey import Flakey
from tests.crash.clock import run
from tests.crash.cut import SHORT, Cut
from tests.crash.disks import RecordingDisk, Weather
from tests.crash.explore import wrong_sectors
from tests.crash.log import WriteLog
from tests.crash.oracle import Client
from tests.crash.stacks import Linear
from tests.support.disks import mapped, read

SECTORS = 32
UP_S = 9


async def written(log: WriteLog, images: list[bytes], seed: int, features: str) -> tuple[Client, int, bytes]:
    """Clients write at random to a device that goes down after UP_S: what they were told, the moment, and what is on the disk
    in the end. The run lasts twice as long."""
    rng = random.Random(seed)
    disk = RecordingDisk(0, images[0], log, Weather(seed))
    device = await mapped("shaky", f"0 {SECTORS} flakey 7:0 0 {UP_S} 100000 {features}", disk)
    client = Client("shaky", device, log, images[0], discard_zeroes=False)
    down = 0

    async def note() -> None:
        nonlocal down
        await asyncio.sleep(UP_S)
        down = log.mark("down")

    async with asyncio.TaskGroup() as group:
        group.create_task(note())
        for number in range(3):
            group.create_task(work(client, random.Random(rng.random() + number)))
    assert down
    assert log.now > down + 20, "nothing happened while it was down"
    return client, down, await read(disk, 0, disk.size)


async def work(client: Client, rng: random.Random) -> None:
    """One writer; reads are left out: what was dropped is not seen by them."""
    loop = asyncio.get_running_loop()
    while loop.time() < 2 * UP_S:
        count = rng.choice((1, 2, 5))
        sector = rng.randrange(SECTORS - count + 1)
        match rng.randrange(8):
            case 0 | 1:
                await client.flush()
            case 2:
                await client.discard(sector, count)
            case _:
                await client.write(sector, count, fua=rng.random() < 0.2)
        await asyncio.sleep(rng.random())


@pytest.mark.parametrize("seed", range(12))
def test_it_loses_what_was_asked_while_it_was_down_and_nothing_else(seed: int) -> None:
    log = WriteLog()
    images = Linear().first_images(random.Random(seed))[:1]
    images = [images[0][: SECTORS * 512]]
    client, down, left = run(written(log, images, seed, "1 drop_writes"))
    assert all(change.good for change in client.changes)
    late = [change for change in client.changes if change.asked > down]
    assert len(late) > 10
    allowed = client.allowed(down)
    assert not wrong_sectors("shaky", left, allowed)
    assert not any(entry.submitted > down for entry in log.entries), "something came through"
    assert wrong_sectors("shaky", left, client.allowed(log.now)), "the oracle does not see that anything was lost"
    cut = Cut(log, images, down)
    states = 0
    for state in cut.states(random.Random(seed), SHORT):
        states += 1
        assert not wrong_sectors("shaky", cut.images(log, state)[0], allowed)
    assert states > 5


def test_what_comes_through_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flakey that drops only every other write is caught."""
    whole = Flakey._submit_down
    count = 0

    def half(self: Flakey, io: object, offset: int) -> object:
        nonlocal count
        count += 1
        if count % 2:
            return whole(self, io, offset)  # type: ignore[arg-type]
        return self._device.submit(io, offset)  # type: ignore[arg-type]

    monkeypatch.setattr(Flakey, "_submit_down", half)
    with pytest.raises(AssertionError):
        test_it_loses_what_was_asked_while_it_was_down_and_nothing_else(3)


def test_errors_promise_nothing() -> None:
    """Without features everything fails while it is down, which the clients are told."""
    log = WriteLog()
    images = [random.Random(1).randbytes(SECTORS * 512)]
    client, down, left = run(written(log, images, 1, ""))
    late = [change for change in client.changes if change.asked > down]
    assert late
    assert not any(change.good for change in late)
    assert client.failures > len(late)
    assert not wrong_sectors("shaky", left, client.allowed(log.now))
