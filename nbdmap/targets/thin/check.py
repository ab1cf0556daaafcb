"""The offline check of a pool's metadata: what thin_check looks for, and reference counts and sizes to the last one.

Live metadata changes while it is read: check a device that no pool has open.
"""

import numpy as np

from nbdmap.block.device import Device
from nbdmap.errors import NbdmapError
from nbdmap.persist.blocks import BlockStore
from nbdmap.persist.check import Check, count_references
from nbdmap.persist.lookup import Tree
from nbdmap.persist.node import NODE, U64Array, children, count, is_leaf, values
from nbdmap.targets.thin.metadata import DETAILS, HELD, TIME_BITS
from nbdmap.targets.thin.superblock import ROOT, Superblock


class ThinCheck(Check):
    """A check whose `superblock` is None when there was none to begin with."""

    superblock: Superblock | None = None


async def check(device: Device) -> ThinCheck:
    """Checks the metadata on `device`. What is wrong is in `errors`, blocks that nobody has in `leaks`."""
    store = BlockStore(device)
    found = ThinCheck(store)
    try:
        found.superblock = superblock = Superblock.read(await store.read_raw(0))
    except NbdmapError as error:
        found.errors.add(error.message)
        return found
    data: list[U64Array] = []
    found.own(0)
    await _trees(found, superblock, data)
    if superblock.held_root:
        await _held(found, superblock.held_root, data)
    data_map = await found.data_map(superblock.data_map[:ROOT])
    metadata_map = await found.metadata_map(superblock.metadata_map[:ROOT])
    if data_map and not found.errors:
        await found.compare(data_map, *count_references(data))
    if metadata_map and not found.errors:
        await found.compare_metadata(metadata_map)
    if not found.errors:
        await _sizes(found, superblock)
    return found


async def _held(found: ThinCheck, number: int, data: list[U64Array]) -> None:
    """The metadata snapshot: a copy of a superblock, with trees of its own."""
    found.own(number)
    try:
        copy = Superblock.read(bytes((await found.store.read(number, HELD)).data), number)
    except NbdmapError as error:
        found.errors.add(f"the metadata snapshot: {error}")
        return
    await _trees(found, copy, data)


async def _trees(found: ThinCheck, superblock: Superblock, data: list[U64Array]) -> None:
    roots: list[int] = []
    await found.tree(
        "volumes", superblock.mapping_root, 8, lambda leaf: roots.extend(np.frombuffer(values(leaf), np.uint64).tolist())
    )
    shift = np.uint64(TIME_BITS)
    for root in roots:
        await found.tree("mappings", root, 8, lambda leaf: data.append(np.frombuffer(values(leaf), np.uint64) >> shift))
    await found.tree("details", superblock.details_root, DETAILS.size)


async def _sizes(found: ThinCheck, superblock: Superblock) -> None:
    """Each volume has details, and as many mappings as they say."""
    known: dict[int, int] = {}
    details = {number: one async for number, one in Tree(found.store, DETAILS, superblock.details_root).items()}
    node_of: list[int] = [superblock.mapping_root]
    roots: dict[int, int] = {}
    while node_of:
        node = await found.store.read(node_of.pop(), NODE)
        if is_leaf(node):
            first = node.words[4 : 4 + count(node)].tolist()
            roots.update(zip(first, np.frombuffer(values(node), np.uint64).tolist(), strict=True))
        else:
            node_of += children(node)
    for number in sorted(details.keys() | roots.keys()):
        if number not in roots or number not in details:
            found.errors.add(f"volume {number} has {'no mappings' if number not in roots else 'no details'}")
            continue
        mapped = await _mapped(found.store, roots[number], known)
        if mapped != details[number].mapped:
            found.errors.add(f"volume {number} has {mapped} mappings, its details say {details[number].mapped}")


async def _mapped(store: BlockStore, root: int, known: dict[int, int]) -> int:
    """The entries of a tree; `known` has those of the nodes that were met, which are often shared."""
    ways = [root]
    while ways:
        number = ways[-1]
        node = await store.read(number, NODE)
        if is_leaf(node):
            known[number] = count(node)
        else:
            below = children(node)
            missing = [child for child in below if child not in known]
            if missing:
                ways += missing
                continue
            known[number] = sum(known[child] for child in below)
        ways.pop()
    return known[root]
