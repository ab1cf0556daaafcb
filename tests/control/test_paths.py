"""nbdmap.control.paths: the checker, and multipath over servers that come and go, in a whole configuration."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from nbdmap.control.paths import PathChecker
from nbdmap.targets.multipath import Multipath
from tests.support.disks import read, write
from tests.support.fake_nbd import FakeServer
from tests.support.site import Site

TABLE = "0 64 multipath 1 queue_if_no_path 0 1 1 round-robin 0 2 0 a b"
CONFIG = """
disks:
  a: {{nbd: "nbd+unix:///disk?socket=a.nbd", number: "8:0"}}
  b: {{nbd: "nbd+unix:///disk?socket=b.nbd", number: "8:16"}}
devices:
  mp: {{table: {table}}}
"""


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what it waits for sets no event
            await asyncio.sleep(0.01)


def status(site: Site) -> str:
    live = site.mapper.find("mp").live
    assert live
    return live.status_lines()[0].params


async def test_a_configuration_whose_servers_come_and_go(site: Site, tmp_path: Path) -> None:
    """Of two servers one is not there at the start; both die; each comes back."""
    a, b = FakeServer(tmp_path / "a.nbd"), FakeServer(tmp_path / "b.nbd")
    b.data = a.data
    checker = PathChecker(site.mapper, 0.02)
    job = asyncio.ensure_future(checker.run())
    async with a:
        await site.start(CONFIG.format(table=TABLE))
        device = site.mapper.find("mp")
        assert device.size == 64 * 512
        assert status(site) == "2 0 0 0 1 1 E 0 2 0 8:0 A 0 8:16 F 1 "
        await write(device, 0, b"x" * 512)
        async with b:
            await until(lambda: "8:16 A 1" in status(site))
            await a.stop()
            assert await read(device, 0, 512) == b"x" * 512
            assert "8:0 F 1" in status(site)
            await b.stop()
            waiting = asyncio.ensure_future(write(device, 512, b"y" * 512))
            await until(lambda: status(site).startswith("2 1 0 0"))
            await a.start()
            await waiting
            assert a.data[:1024] == b"x" * 512 + b"y" * 512
            await b.start()
            await until(lambda: "F" not in status(site))
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)
        await site.mapper.close()
    assert status_of_nothing(site)


def status_of_nothing(site: Site) -> bool:
    return site.mapper.devices == {} and site.mapper.disks == {}


async def test_a_plain_table_needs_its_server(site: Site) -> None:
    problems = await site.fail(CONFIG.format(table="0 64 linear a 0"))
    assert len(problems) == 1
    assert problems[0].startswith("c.yaml:6:15: devices.mp.table: line 1: linear: a: not there yet: nbd+unix:///disk?socket=")


async def test_no_interval_no_checks(site: Site) -> None:
    await site.start(f"disks: {{a: {{memory: 1M}}, b: {{memory: 1M}}}}\ndevices: {{mp: {{table: {TABLE}}}}}")
    device = site.mapper.find("mp")
    assert device.live
    target = device.live.targets[0]
    assert isinstance(target, Multipath)
    checker = PathChecker(site.mapper, 0)
    job = asyncio.ensure_future(checker.run())
    await asyncio.sleep(0.05)
    assert all(path.probe is None for path in target._paths)
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)
    checker.check(1.0)
    assert all(path.probe is not None and path.asked_at == 1.0 for path in target._paths)
    await asyncio.gather(*(path.probe for path in target._paths if path.probe))
