"""Random operations on several volumes of a pool, against a model in memory; thin_check whenever something was committed."""

import random
from pathlib import Path

import pytest

from nbdmap.block.io import FUA
from tests.support.disks import read, write
from tests.support.thin import ThinSite, contents, discard, flush, site


class Model:
    """What each volume has, by device name."""

    def __init__(self, made: ThinSite, seed: int) -> None:
        self.made = made
        self.rng = random.Random(seed)
        self.bytes: dict[str, bytearray] = {}
        self.numbers: dict[str, int] = {}
        self.next = 0

    async def step(self) -> None:
        rng, made = self.rng, self.made
        kind = rng.random()
        if not self.bytes or (kind < 0.03 and len(self.bytes) < 6):
            name = f"v{self.next}"
            device = await made.new(name, self.next, blocks=8)
            self.bytes[name], self.numbers[name] = bytearray(device.size), self.next
            self.next += 1
            return
        name = rng.choice(list(self.bytes))
        device, model = made.devices[name], self.bytes[name]
        start, end = sorted(rng.choice((0, 512, 4096, 65536)) * rng.randrange(1 << 20) % (device.size + 512) for _ in range(2))
        start, end = start // 512 * 512, min(max(end // 512 * 512, start // 512 * 512 + 512), device.size)
        start = min(start, end - 512)
        if kind < 0.5:
            data = rng.randbytes(end - start)
            await write(device, start, data, rng.choice((0, 0, 0, FUA)))
            model[start:end] = data
        elif kind < 0.65:
            await discard(device, start, end - start)
            low, high = -(-start // made.block) * made.block, end // made.block * made.block
            model[low : max(low, high)] = bytes(max(0, high - low))
        elif kind < 0.75:
            found = await read(device, start, end - start)
            assert found == model[start:end] or made.pool.features.skip_block_zeroing
        elif kind < 0.8:
            await flush(device)
        elif kind < 0.86 and len(self.bytes) < 6:
            other = f"v{self.next}"
            await made.snap(other, self.next, name, self.numbers[name], blocks=8)
            self.bytes[other], self.numbers[other] = bytearray(model), self.next
            self.next += 1
        elif kind < 0.88:
            await made.remove(name)
            await made.message(f"delete {self.numbers.pop(name)}")
            del self.bytes[name]
        elif kind < 0.92:
            await made.remove(name)
            await made.thin(name, self.numbers[name], blocks=8)
        elif kind < 0.94:
            held = (await made.status()).split()[3]
            await made.message("reserve_metadata_snap" if held == "-" else "release_metadata_snap")
        elif kind < 0.96:
            await made.devices["pool"].suspend()
            await made.devices["pool"].resume()

    async def check(self) -> None:
        for name, model in self.bytes.items():
            assert await contents(self.made.devices[name]) == model, name
            mapped = (await self.made.status(name)).split()
            extents = await self.made.devices[name].extents(0, len(model))
            assert sum(length for length, flags in extents if not flags) == int(mapped[0]) * 512


@pytest.mark.parametrize("features", ["", "skip_block_zeroing", "no_discard_passdown", "error_if_no_space"])
@pytest.mark.parametrize("seed", range(4))
async def test_against_a_model(tmp_path: Path, features: str, seed: int) -> None:
    async with site(tmp_path, features, data_blocks=80, metadata_blocks=256, holes=seed % 2 == 1) as made:
        model = Model(made, seed)
        for number in range(250):
            await model.step()
            if number % 50 == 49:
                if "skip" not in features:
                    await model.check()
                await made.status()
                made.check()
    assert not made.meta.openers
    assert not made.data.openers


