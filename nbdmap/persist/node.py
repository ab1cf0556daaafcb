"""A b-tree node in its block: where things are, and the moves that do not look beyond one or two nodes (reference g.3).

    u32 checksum, u32 flags (1 internal, 2 leaf), u64 number, u32 entries, u32 capacity, u32 value size, u32 0,
    capacity x u64 key, capacity x value

Invariants: keys ascend strictly; internal nodes have values of 8 bytes, the numbers of their children, and key i is not above
the lowest key of child i. A node that is not the root of a tree is at least a third full.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from nbdmap.persist.blocks import BLOCK, Block, BlockType

INTERNAL: Final = 1
LEAF: Final = 2
HEADER: Final = 32
FIRST: Final = HEADER // 8
"""The word of the first key."""
_LOW: Final = 0xFFFFFFFF

U64Array = npt.NDArray[np.uint64]


def capacity(value_size: int) -> int:
    """Entries that a node has place for, a multiple of 3.

    >>> capacity(8), capacity(24), capacity(16), capacity(4)
    (252, 126, 168, 336)
    """
    return (BLOCK - HEADER) // (8 + value_size) // 3 * 3


def count(node: Block) -> int:
    """Its entries."""
    return node.words[2] & _LOW


def room(node: Block) -> int:
    """The entries that it has place for."""
    return node.words[2] >> 32


def is_leaf(node: Block) -> bool:
    """Whether its values are the tree's, not children."""
    return node.words[0] >> 32 == LEAF


def value_size(node: Block) -> int:
    """The size of a value, bytes."""
    return node.words[3] & _LOW


def set_count(node: Block, entries: int) -> None:
    """Says how many entries it has."""
    node.words[2] = node.words[2] >> 32 << 32 | entries


def format_node(node: Block, flags: int, size: int) -> None:
    """Makes it an empty node for values of `size` bytes."""
    node.words[0] = flags << 32
    node.words[2] = capacity(size) << 32
    node.words[3] = size


def keys(node: Block) -> U64Array:
    """Its keys; the array shares the node's bytes."""
    return np.frombuffer(node.data, np.uint64, count(node), HEADER)


def values(node: Block) -> memoryview:
    """The bytes of all its values; they are the node's own."""
    start = HEADER + 8 * room(node)
    return node.data[start : start + value_size(node) * count(node)]


def children(node: Block) -> list[int]:
    """The children of an internal node."""
    start = FIRST + room(node)
    return node.words[start : start + count(node)].tolist()


def _check(data: memoryview) -> str:
    """What is wrong with a node that was read."""
    words = data.cast("Q")
    flags, entries, most, size = words[0] >> 32, words[2] & _LOW, words[2] >> 32, words[3] & _LOW
    if flags not in (INTERNAL, LEAF):
        return f"flags {flags} are neither those of an internal node nor of a leaf"
    if entries > most or HEADER + most * (8 + size) > BLOCK:
        return f"{entries} of {most} entries with values of {size} bytes do not fit"
    if flags == INTERNAL and (size != 8 or not entries):
        return f"an internal node has {entries} values of {size} bytes"
    found = np.frombuffer(data, np.uint64, entries, HEADER)
    if not (found[1:] > found[:-1]).all():
        return "keys do not ascend"
    return ""


NODE: Final = BlockType("b-tree node", 121107, _check)


def insert_at(node: Block, place: int, key: int, value: bytes) -> None:
    """Puts an entry before entry `place`; the node is not full."""
    words, data = node.words, node.data
    entries, most = words[2] & _LOW, words[2] >> 32
    size = len(value)
    at = HEADER + 8 * most + size * place
    if place < entries:
        words[FIRST + place + 1 : FIRST + entries + 1] = words[FIRST + place : FIRST + entries]
        end = at + size * (entries - place)
        data[at + size : end + size] = data[at:end]
    words[FIRST + place] = key
    data[at : at + size] = value
    words[2] += 1


def overwrite(node: Block, place: int, value: bytes) -> None:
    """Gives entry `place` another value."""
    at = HEADER + 8 * room(node) + len(value) * place
    node.data[at : at + len(value)] = value


def delete(node: Block, first: int, end: int) -> None:
    """Takes entries `first` to `end` away."""
    words, data, entries, size = node.words, node.data, count(node), value_size(node)
    words[FIRST + first : FIRST + entries - end + first] = words[FIRST + end : FIRST + entries]
    start = HEADER + 8 * room(node)
    data[start + size * first : start + size * (entries - end + first)] = data[start + size * end : start + size * entries]
    set_count(node, entries - end + first)


def _transfer(source: Block, first: int, target: Block, place: int, entries: int) -> None:
    """Copies entries into a place that is free."""
    target.words[FIRST + place : FIRST + place + entries] = source.words[FIRST + first : FIRST + first + entries]
    size = value_size(source)
    start, to = HEADER + 8 * room(source) + size * first, HEADER + 8 * room(target) + size * place
    target.data[to : to + size * entries] = source.data[start : start + size * entries]


def move_left(left: Block, right: Block, entries: int) -> None:
    """Moves the first `entries` of `right` to the end of `left`, which has place for them."""
    _transfer(right, 0, left, count(left), entries)
    set_count(left, count(left) + entries)
    delete(right, 0, entries)


def move_right(left: Block, right: Block, entries: int) -> None:
    """Moves the last `entries` of `left` to the front of `right`, which has place for them."""
    had, kept = count(right), count(left) - entries
    words, data, size = right.words, right.data, value_size(right)
    words[FIRST + entries : FIRST + entries + had] = words[FIRST : FIRST + had]
    start = HEADER + 8 * room(right)
    data[start + size * entries : start + size * (entries + had)] = data[start : start + size * had]
    _transfer(left, kept, right, 0, entries)
    set_count(right, had + entries)
    set_count(left, kept)
