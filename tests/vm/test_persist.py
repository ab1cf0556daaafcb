"""Metadata that Linux has made, larger than what the thin tests have: the checker finds nothing, and both sides go on with it.

The data device is a zero target, so only the metadata is real: leaves by the dozen, counts above 2, a data device that grew.
"""

import random
import subprocess
from pathlib import Path

from nbdmap.block.memory import MemoryDisk
from tests.persist.pool import Pool, check, thin_check
from tests.persist.test_tools import mappings_of
from tests.support.disks import read, write
from tests.vm.harness import Kernel

METADATA = 8 << 20
VOLUME_SECTORS = 1 << 23
SETUP = "modprobe dm-thin-pool; modprobe dm-zero; mkdir -p /dev/mapper"


def pool(sectors: int) -> str:
    return f"0 {sectors} thin-pool /dev/vdb /dev/mapper/data 128 0 1 skip_block_zeroing"


def first_job(rng: random.Random) -> str:
    lines = [
        SETUP,
        "dmsetup create data --table '0 8388608 zero'",
        f"dmsetup create pool --table '{pool(4194304)}'",
    ]

    def volume(number: int, message: str) -> None:
        lines.append(f"dmsetup message pool 0 '{message}'")
        lines.append(f"dmsetup create v{number} --table '0 {VOLUME_SECTORS} thin /dev/mapper/pool {number}'")

    for number in (0, 1):
        volume(number, f"create_thin {number}")
    lines.append("dd if=/dev/zero of=/dev/mapper/v0 bs=64k count=3000 oflag=direct 2>/dev/null")
    for number in range(10, 18):
        lines.append("dmsetup suspend v0")
        volume(number, f"create_snap {number} 0")
        lines.append("dmsetup resume v0")
        for _ in range(6):
            target, seek = rng.choice((0, 1, number)), rng.randrange(60000)
            lines.append(f"dd if=/dev/zero of=/dev/mapper/v{target} bs=64k count={rng.randrange(1, 40)} seek={seek % 5000} "
                         "oflag=direct conv=notrunc 2>/dev/null")  # fmt: skip
        lines.append(f"blkdiscard -o {rng.randrange(2000) << 16} -l {rng.randrange(1, 400) << 16} /dev/mapper/v{number}")
    lines += ["sync", f"dmsetup reload pool --table '{pool(8388608)}'", "dmsetup suspend pool", "dmsetup resume pool"]
    lines += ["dmsetup remove v12; dmsetup message pool 0 'delete 12'", "dmsetup status pool"]
    lines += ["for v in $(ls /dev/mapper | grep ^v); do dmsetup remove $v; done", "dmsetup remove pool && dmsetup remove data"]
    return "\n".join(lines)


def second_job() -> str:
    lines = [SETUP, "dmsetup create data --table '0 8388608 zero'", f"dmsetup create pool --table '{pool(8388608)}'"]
    for number in (0, 10, 100):
        lines.append(f"dmsetup create v{number} --table '0 {VOLUME_SECTORS} thin /dev/mapper/pool {number}'")
        lines.append(f"dd if=/dev/zero of=/dev/mapper/v{number} bs=64k count=300 seek=900 oflag=direct conv=notrunc 2>/dev/null")
        lines.append(f"blkdiscard -o {100 << 16} -l {700 << 16} /dev/mapper/v{number}; sync")
    lines += ["section status; dmsetup status | sort"]
    lines += ["for v in $(ls /dev/mapper | grep ^v); do dmsetup remove $v; done", "dmsetup remove pool && dmsetup remove data"]
    return "\n".join(lines)


def dumped(path: Path) -> dict[int, dict[int, int]]:
    return mappings_of(subprocess.run(["thin_dump", path], capture_output=True, text=True, check=True).stdout)


async def sound(path: Path, directory: Path) -> Pool:
    """The pool in an image; neither checker finds anything."""
    image = path.read_bytes()  # noqa: ASYNC240
    disk = MemoryDisk("metadata", "7:0", METADATA)
    await write(disk, 0, image)
    found = await check(disk)
    assert not found.errors, found.errors.words
    assert not found.leaks, found.leaks.words
    status, words = thin_check(image, directory)
    assert status == 0, words
    one = await Pool.open(disk)
    one.model = dumped(path)
    assert await one.contents() == one.model
    return one


async def test_linux_and_the_library_take_turns(kernel: Kernel, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(METADATA)
    rng = random.Random(1)
    result = kernel.run(first_job(rng), [image])
    assert result.status == 0, result
    one = await sound(image, tmp_path)
    assert sum(map(len, one.model.values())) > 20000
    assert one.data.nr_blocks == 65536
    for _ in range(3000):
        await one.provision(rng.choice(list(one.model)), rng.randrange(60000))
    await one.create_snap(100, 13)
    for number in (14, 15):
        await one.delete(number)
    await one.discard(10, 500, 2500)
    await one.commit()
    image.write_bytes(await read(one.store.device, 0, METADATA))
    one = await sound(image, tmp_path)
    result = kernel.run(second_job(), [image])
    assert result.status == 0, result
    status = result.sections()["status"]
    assert " rw no_discard_passdown" in status, status
    one = await sound(image, tmp_path)
    assert f"{one.data.nr_blocks - one.data.nr_free}/65536 -" in status, status
