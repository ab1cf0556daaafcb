"""Every I/O of a pool's disks goes wrong in every way: the modes, errnos and promises of reference h.6."""

import contextlib
from collections.abc import Callable

import pytest

from nbdmap.block.io import Io
from nbdmap.errors import NbdmapError
from nbdmap.targets.thin import provision
from nbdmap.targets.thin.modes import Mode
from nbdmap.targets.thin.pool import Pool
from nbdmap.targets.thin.volume import Volume
from tests.crash.clock import run
from tests.faults.harness import KINDS
from tests.faults.pool import DATA, META, made, sites


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return run(made())


@pytest.mark.parametrize("disk", [META, DATA], ids=["metadata", "data"])
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not kind.files])
def test_every_io(images: list[bytes], kind: str, disk: int, record_property: Callable[[str, object], None]) -> None:
    runs = sum(len(sites(images, kind, disk, sticky=sticky)) for sticky in (False, True))
    record_property("runs", runs)
    print(f"faults of a pool's {'metadata' if disk == META else 'data'} disk, {kind}: {runs} runs")
    assert runs >= 8


def keeps_what_it_lost(self: Volume, details: object) -> None:
    """Mappings that were not committed stay."""


async def no_abort(self: Pool, error: Exception, mode: Mode = Mode.READ_ONLY) -> None:
    """A failed commit changes no mode."""


async def no_needs_check(self: Pool) -> None:
    """The flag is not written."""


async def any_flush(volume: Volume) -> None:
    """A flush does not look at what was lost."""
    if volume.changed or volume.committing:
        await volume.pool.commit()


async def commit_quietly(self: Pool) -> None:
    """A commit that fails is acknowledged."""
    with contextlib.suppress(NbdmapError):
        await commit(self)


async def never_fails(self: Pool, error: Exception, mode: Mode = Mode.READ_ONLY) -> None:
    """Metadata that cannot be read again is a reason to be read-only only."""
    await abort(self, error, mode)
    self.mode = min(self.mode, Mode.READ_ONLY)


async def no_flush(self: Pool) -> None:
    """A data device whose flush fails is not noticed."""
    with contextlib.suppress(NbdmapError):
        await flush_data(self)


async def fill_quietly(pool: Pool, io: Io, place: int, inside: int, source: provision.Source | None) -> None:
    """A new block whose write failed is mapped."""
    with contextlib.suppress(NbdmapError):
        await fill(pool, io, place, inside, source)


commit, abort, flush_data, fill = Pool.commit, Pool.abort, Pool.flush_data, provision._fill
PLANTS = {
    "keeps what it lost": (Volume, "rolled_back", keeps_what_it_lost, META, "eio"),
    "no abort": (Pool, "abort", no_abort, META, "flush-eio"),
    "no needs_check": (Pool, "write_needs_check", no_needs_check, META, "eio"),
    "any flush": (provision, "flush", any_flush, META, "eio"),
    "commit quietly": (Pool, "commit", commit_quietly, META, "flush-eio"),
    "never fails": (Pool, "abort", never_fails, META, "eio"),
    "no flush": (Pool, "flush_data", no_flush, DATA, "flush-eio"),
    "fill quietly": (provision, "_fill", fill_quietly, DATA, "eio"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found_out(images: list[bytes], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken, disk, kind = PLANTS[name]
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(AssertionError) as caught:
        _ = [sites(images, kind, disk, sticky=sticky) for sticky in (False, True)]
    print(f"{name}: {caught.value}")
