"""`nbdmap thin`: a pool's metadata checked, written out and in, listed and compared, as thin-provisioning-tools do.

    nbdmap thin check meta.img; nbdmap thin dump meta.img > pool.xml; nbdmap thin restore -i pool.xml -o new.img
    nbdmap thin ls -m meta.img          # of a live pool, after the message reserve_metadata_snap

XML and columns are those of thin-provisioning-tools 0.9. The metadata must not be in use, but with -m. Exit status: 0; 1 for
metadata that is wrong and for what cannot be; 2 for a wrong command line.
"""

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

from nbdmap.block.file import FileDisk
from nbdmap.cli.thin_arguments import add_arguments
from nbdmap.errors import InvalidArgument, NbdmapError, from_os_error
from nbdmap.persist.lookup import MAX_KEY
from nbdmap.targets.thin.check import check
from nbdmap.targets.thin.metadata import Details
from nbdmap.targets.thin.offline import Offline, Restored, Run, compare, restore

Arguments = argparse.Namespace


def main(arguments: Sequence[str]) -> int:
    """`nbdmap thin ARGUMENTS`; the exit status."""
    parser = argparse.ArgumentParser("nbdmap thin")
    add_arguments(parser)
    try:
        args = parser.parse_args(arguments)
    except SystemExit as stop:  # help, or a usage error that argparse has printed
        return stop.code if isinstance(stop.code, int) else 2
    try:
        status = asyncio.run(COMMANDS[args.thin_command](args))
    except NbdmapError as error:
        print(f"nbdmap thin {args.thin_command}: {error.message}", file=sys.stderr)
        return 1
    return int(status)


async def _disk(path: str, read_only: bool = True) -> FileDisk:
    return await FileDisk.open(path, name=path, number="0:0", read_only=read_only)


async def _check(args: Arguments) -> int:
    disk = await _disk(args.metadata)
    try:
        found = await check(disk)
    finally:
        await disk.close()
    for word in [*found.errors.words, *found.leaks.words]:
        print(word, file=sys.stderr)
    if found.superblock is not None and found.superblock.needs_check:
        print("needs_check is set")
    return 1 if found.errors or found.leaks else 0


def _head(name: str, pool: Offline, **more: int) -> str:
    superblock = pool.superblock
    fields = {"uuid": "", "time": superblock.time, "transaction": superblock.transaction_id, **more}
    words = " ".join(f'{key}="{value}"' for key, value in fields.items())
    return f"<{name} {words}>"


async def _dump(args: Arguments) -> int:
    disk = await _disk(args.metadata)
    try:
        pool = await Offline.open(disk, snapshot=args.metadata_snap)
        superblock = pool.superblock
        sizes = {"data_block_size": superblock.block_size_sectors, "nr_data_blocks": pool.nr_data}
        print(_head("superblock", pool, flags=superblock.flags, version=superblock.version, **sizes))
        for number, details in await pool.volumes():
            print(
                f'  <device dev_id="{number}" mapped_blocks="{details.mapped}" transaction="{details.transaction_id}" '
                f'creation_time="{details.created}" snap_time="{details.snapshotted}">'
            )
            async for run in pool.runs(number):
                print(_mapping(run))
            print("  </device>")
        print("</superblock>")
    finally:
        await disk.close()
    return 0


def _mapping(run: Run) -> str:
    if run.length == 1:
        return f'    <single_mapping origin_block="{run.begin}" data_block="{run.data}" time="{run.time}"/>'
    return f'    <range_mapping origin_begin="{run.begin}" data_begin="{run.data}" length="{run.length}" time="{run.time}"/>'


async def _restore(args: Arguments) -> int:
    dump = read_xml(_file(args.input))
    disk = await _disk(args.output, read_only=False)
    try:
        await restore(disk, dump)
    finally:
        await disk.close()
    return 0


def _file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise from_os_error(error, path) from None


def read_xml(text: bytes) -> Restored:
    """What thin_dump's XML says. Raises InvalidArgument."""
    try:
        root = ElementTree.fromstring(text)
    except (ValueError, LookupError, ElementTree.ParseError) as error:  # the first two of strange encodings
        raise InvalidArgument(f"the XML: {error}") from None
    if root.tag != "superblock":
        raise InvalidArgument(f"<{root.tag}> is not a <superblock>")
    fields = ("time", "transaction", "flags", "data_block_size", "nr_data_blocks")
    said = {name: _number(root, name, 0 if name == "flags" else None) for name in fields}
    return Restored(said, [_volume(one) for one in root])


def _number(element: ElementTree.Element, name: str, default: int | None = None) -> int:
    word = element.get(name, "" if default is None else str(default))
    if not (word.isascii() and word.isdigit() and int(word) <= MAX_KEY):
        raise InvalidArgument(f"<{element.tag}>: {name} is {word!r}, not a number")
    return int(word)


def _volume(element: ElementTree.Element) -> tuple[int, Details, list[Run]]:
    if element.tag != "device":
        raise InvalidArgument(f"<{element.tag}> is not a <device>")
    runs = []
    for one in element:
        if one.tag == "single_mapping":
            runs.append(Run(_number(one, "origin_block"), _number(one, "data_block"), 1, _number(one, "time")))
        elif one.tag == "range_mapping":
            begin, data = _number(one, "origin_begin"), _number(one, "data_begin")
            runs.append(Run(begin, data, _number(one, "length"), _number(one, "time")))
        else:
            raise InvalidArgument(f"<{one.tag}> is not a mapping")
    names = ("mapped_blocks", "transaction", "creation_time", "snap_time")
    return _number(element, "dev_id"), Details(*(_number(element, name) for name in names)), runs


async def _ls(args: Arguments) -> int:
    columns = args.format.split(",")
    disk = await _disk(args.metadata)
    try:
        pool = await Offline.open(disk, snapshot=args.metadata_snap)
        volumes = await pool.volumes()
        blocks: dict[int, list[Run]] = {}
        owners: Counter[int] = Counter()
        if any("EXCLUSIVE" in column or "SHARED" in column for column in columns):
            for number, _ in volumes:
                blocks[number] = [run async for run in pool.runs(number)]
                owners.update(block for run in blocks[number] for block in range(run.data, run.data + run.length))
    finally:
        await disk.close()
    rows = [] if args.no_headers else [columns]
    for number, details in volumes:
        mine = (block for run in blocks.get(number, ()) for block in range(run.data, run.data + run.length))
        exclusive = sum(owners[block] == 1 for block in mine)
        size = pool.superblock.block_size_sectors
        rows.append([_column(column, number, details, exclusive, size) for column in columns])
    widths = [max((len(row[place]) for row in rows), default=0) for place in range(len(columns))]
    for row in rows:
        print("".join(f"{word:>{width}} " for word, width in zip(row, widths, strict=True)))
    return 0


def _column(name: str, number: int, details: Details, exclusive: int, block_sectors: int) -> str:
    plain = {
        "DEV": number, "TRANSACTION": details.transaction_id, "CREATE_TIME": details.created, "SNAP_TIME": details.snapshotted,
    }  # fmt: skip
    if name in plain:
        return str(plain[name])
    what, _, unit = name.partition("_")
    counts = {"MAPPED": details.mapped, "EXCLUSIVE": exclusive, "SHARED": details.mapped - exclusive}
    if what not in counts or unit not in ("", "BLOCKS", "SECTORS", "BYTES"):
        raise InvalidArgument(f"unknown column {name!r}")
    count = counts[what]
    if unit == "":
        return _size(count * block_sectors * 512)
    return str(count * {"BLOCKS": 1, "SECTORS": block_sectors, "BYTES": block_sectors * 512}[unit])


def _size(size: int) -> str:
    """Bytes in the largest unit that is no fraction."""
    units = ["", "KiB", "MiB", "GiB", "TiB", "PiB"]
    place = 0
    while size and size % 1024 == 0 and place < len(units) - 1:
        size, place = size // 1024, place + 1
    return f"{size}{units[place]}"


async def _delta(args: Arguments) -> int:
    disk = await _disk(args.metadata)
    try:
        pool = await Offline.open(disk, snapshot=args.metadata_snap)
        left = [run async for run in pool.runs(args.thin1)]
        right = [run async for run in pool.runs(args.thin2)]
        found = compare((left, right))
    finally:
        await disk.close()
    nr_data = int.from_bytes(pool.live.data_map[:8], "little")
    more = {"data_block_size": pool.superblock.block_size_sectors, "nr_data_blocks": nr_data}
    if pool.live.held_root:
        more["metadata_snap"] = pool.live.held_root
    print(_head("superblock", pool, **more))
    print(f'  <diff left="{args.thin1}" right="{args.thin2}">')
    for kind, begin, length in found:
        print(f'    <{kind} begin="{begin}" length="{length}"/>')
    print("  </diff>\n</superblock>")
    return 0


async def _rmap(args: Arguments) -> int:
    regions = []
    for text in args.region:
        first, dots, end = text.partition("..")
        if not (dots and first.isdigit() and end.isdigit()):
            raise InvalidArgument(f"region {text!r} is not FIRST..END")
        regions.append((int(first), int(end)))
    disk = await _disk(args.metadata)
    found: list[tuple[int, int, int, int]] = []
    try:
        pool = await Offline.open(disk)
        for number, _ in await pool.volumes():
            async for run in pool.runs(number):
                for first, end in regions or [(0, pool.nr_data)]:
                    low, high = max(first, run.data), min(end, run.data + run.length)
                    if low < high:
                        found.append((low, number, run.begin + low - run.data, high - low))
    finally:
        await disk.close()
    for data, number, begin, length in sorted(found):
        print(f"data {data}..{data + length} -> thin({number}) {begin}..{begin + length}")
    return 0


COMMANDS: Final[dict[str, Callable[[Arguments], Coroutine[Any, Any, int]]]] = {
    "check": _check, "dump": _dump, "restore": _restore, "ls": _ls, "delta": _delta, "rmap": _rmap,
}  # fmt: skip
