"""Every I/O of a client's session goes wrong in every way, over linear, striped, crypt and the targets of faults."""

import asyncio
from collections.abc import Callable
from typing import ClassVar

import pytest

from nbdmap.block.io import Io
from nbdmap.errors import NbdmapError, Unsupported
from tests.crash.plants import AcknowledgeFlushEarly, AcknowledgeWriteEarly, Broken, HideFlushErrors, HideWriteErrors, NoLatch
from tests.crash.stacks import Crypted, Delayed, Faults, Linear, LinearFiles, Striped, StripedFiles
from tests.faults.harness import KINDS, Run

SEEDS = (1, 2)


class Unlogged(Faults):
    """Without log-writes, which passes requests on when its log fails, as the kernel's does."""

    tables: ClassVar = {name: table.replace("log", "7:0") for name, table in Faults.tables.items() if name != "log"}


STACKS = {kind.name: kind for kind in (Linear, Striped, LinearFiles, StripedFiles, Crypted, Delayed, Unlogged)}


def cases() -> list[tuple[str, str]]:
    return [(stack, kind) for stack in STACKS for kind in KINDS if STACKS[stack].files or not KINDS[kind].files]


@pytest.mark.parametrize(("stack", "kind"), cases())
def test_every_site(stack: str, kind: str, record_property: Callable[[str, object], None]) -> None:
    runs = 0
    for seed in SEEDS:
        for at_once in (False, True):
            for sticky in (False, True):
                site = 0
                while True:
                    one = Run(STACKS[stack](), KINDS[kind], site, sticky, seed, at_once)
                    try:
                        hit = one.go()
                    except AssertionError as error:
                        how = "sticky" if sticky else "once"
                        when = "all at once" if at_once else "one by one"
                        raise AssertionError(f"{stack}, {kind} at site {site}, {how}, {when}, seed {seed}: {error}") from error
                    if not hit:
                        break
                    runs += 1
                    site += 1
    record_property("runs", runs)
    print(f"faults {stack} {kind}: {runs} runs")
    assert runs >= 8


class WrongErrno(Broken):
    """Any failure becomes EINVAL."""

    async def submit(self, io: Io, offset: int) -> None:
        try:
            await self.below.submit(io, offset)
        except NbdmapError as error:
            raise Unsupported(error.message) from error


class FailForGood(Broken):
    """After a failure everything fails."""

    failure: NbdmapError | None = None

    async def submit(self, io: Io, offset: int) -> None:
        if self.failure:
            raise self.failure
        try:
            await self.below.submit(io, offset)
        except NbdmapError as error:
            self.failure = error
            raise


class Hang(Broken):
    """A failure is never told."""

    async def submit(self, io: Io, offset: int) -> None:
        try:
            await self.below.submit(io, offset)
        except NbdmapError:
            await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (HideWriteErrors, "eio"),
        (HideFlushErrors, "flush-eio"),
        (AcknowledgeWriteEarly, "never"),
        (AcknowledgeFlushEarly, "stall"),
        (WrongErrno, "enospc"),
        (FailForGood, "eio"),
        (Hang, "eio"),
    ],
)
def test_a_broken_stack_is_found_out(layer: type[Broken], kind: str) -> None:
    found = 0
    for site in range(12):
        scenario = Linear()
        scenario.below = layer
        try:
            Run(scenario, KINDS[kind], site, False, 1, False).go()
        except AssertionError:
            found += 1
    assert found


def test_a_file_that_forgets_its_failed_sync_is_found_out() -> None:
    scenario = LinearFiles()
    scenario.file_type = NoLatch
    with pytest.raises(AssertionError, match="a flush succeeds after one that failed"):
        Run(scenario, KINDS["flush-eio"], 0, False, 1, False).go()
