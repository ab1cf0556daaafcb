"""B-trees, changed: inserting (dm-btree.c).

The way down is shadowed node by node, and a node that is full gets room before it is entered: its parent has room already.
After each step the tree is whole, so a reader that comes in while this one waits finds every key.

Room is made by moving entries to a neighbour that has room, else by splitting the node in two. Where the new key comes
behind all others of the node, which is how a disk is filled, as much as possible goes to the left, so that the nodes of
a tree that is filled in order are full.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final, TypeVar

from nbdmap.errors import CorruptMetadata
from nbdmap.persist.blocks import Block
from nbdmap.persist.lookup import MAX_DEPTH, MAX_KEY, Values, pack_u64
from nbdmap.persist.node import (
    FIRST,
    INTERNAL,
    LEAF,
    NODE,
    children,
    count,
    format_node,
    insert_at,
    is_leaf,
    move_left,
    move_right,
    overwrite,
    room,
    value_size,
)
from nbdmap.persist.transaction import Transaction

V = TypeVar("V")
WORTH: Final = 8
"""Free entries that a neighbour must have to be given some."""


def position(node: Block, key: int) -> int:
    """The last entry whose key is not above `key`; -1 if there is none."""
    return bisect_right(node.words, key, FIRST, FIRST + count(node)) - 1 - FIRST


def new_leaf(tx: Transaction, size: int) -> Block:
    """An empty tree. Raises OutOfSpace."""
    leaf = tx.allocate(NODE)
    format_node(leaf, LEAF, size)
    return leaf


async def shadow_node(tx: Transaction, kind: Values[V], number: int) -> Block:
    """The node, to be changed in place until the next wait; all that it points to is counted if it had to be copied."""
    node, shared = await tx.shadow(number, NODE)
    if is_leaf(node):
        kind.check(node)
    if shared:
        if is_leaf(node):
            kind.inc(kind.of(node, 0, count(node)))
        else:
            for child in children(node):
                tx.inc(child)
    return node


async def shadow_child(tx: Transaction, kind: Values[V], parent: Block, place: int) -> Block:
    """As `shadow_node`, for the child `place` of a shadowed node, which is made to point to it."""
    word = FIRST + room(parent) + place
    child = await shadow_node(tx, kind, parent.words[word])
    if parent.words[word] != child.number:
        tx.store.touch(parent)
        parent.words[word] = child.number
    return child


async def insert(tx: Transaction, kind: Values[V], root: int, key: int, value: V) -> tuple[int, bool]:
    """Gives `key` a value: the tree's new root, and whether the key is new. An old value that differs is told to `kind.dec`."""
    root, _, added = await insert_some(tx, kind, root, [(key, value)], 0)
    return root, added == 1


async def insert_some(
    tx: Transaction, kind: Values[V], root: int, items: Sequence[tuple[int, V]], first: int
) -> tuple[int, int, int]:
    """Gives keys values, one at least: `items[first]`, and those behind it that belong to the same leaf; their keys ascend.

    Returns the tree's new root, the item behind the last that was done, and how many keys are new.
    """
    key, beyond = items[first][0], MAX_KEY + 1
    top = node = await shadow_node(tx, kind, root)
    if count(node) == room(node) and not _replaces(node, key):
        _split_root(tx, node)
    for _ in range(MAX_DEPTH):
        tx.store.touch(node)
        if is_leaf(node):
            return top.number, *_put_some(kind, node, items, first, beyond)
        place = position(node, key)
        if place < 0:
            place, node.words[FIRST] = 0, key
        child = await shadow_child(tx, kind, node, place)
        if count(child) == room(child) and not _replaces(child, key):
            await _make_room(tx, kind, node, place, child, key)
            place = max(position(node, key), 0)
            child = await shadow_child(tx, kind, node, place)
        if place + 1 < count(node):
            beyond = node.words[FIRST + place + 1]
        node = child
    raise CorruptMetadata(f"metadata block {node.number}: a b-tree is deeper than {MAX_DEPTH} nodes")


def _put_some(kind: Values[V], leaf: Block, items: Sequence[tuple[int, V]], first: int, beyond: int) -> tuple[int, int]:
    """Puts items into a leaf with room for one, up to key `beyond`: the item behind the last, and how many keys are new."""
    added = 0
    for number in range(first, len(items)):
        key, value = items[number]
        if number > first and (key >= beyond or count(leaf) == room(leaf)):
            return number, added
        added += _put(kind, leaf, key, value)
    return len(items), added


def _replaces(node: Block, key: int) -> bool:
    """Whether a full node needs no room, being a leaf that has the key."""
    if not is_leaf(node):
        return False
    place = position(node, key)
    return place >= 0 and node.words[FIRST + place] == key


def _put(kind: Values[V], leaf: Block, key: int, value: V) -> bool:
    place = position(leaf, key)
    packed = kind.pack(value)
    if place >= 0 and leaf.words[FIRST + place] == key:
        old = kind.of(leaf, place, place + 1)
        if old != [value]:
            overwrite(leaf, place, packed)
            kind.dec(old)
        return False
    insert_at(leaf, place + 1, key, packed)
    return True


def _split_root(tx: Transaction, root: Block) -> None:
    """Puts the entries of a full root into two new nodes, which become its only children."""
    flags = LEAF if is_leaf(root) else INTERNAL
    size, entries = value_size(root), count(root)
    left, right = tx.allocate(NODE), tx.allocate(NODE)
    for node in (left, right):
        format_node(node, flags, size)
    tx.store.touch(root)
    move_left(left, root, entries // 2)
    move_left(right, root, entries - entries // 2)
    format_node(root, INTERNAL, 8)
    for place, node in enumerate((left, right)):
        insert_at(root, place, node.words[FIRST], pack_u64(node.number))


async def _make_room(tx: Transaction, kind: Values[V], parent: Block, place: int, node: Block, key: int) -> None:
    """Makes room in or beside a full child of a shadowed parent that has room itself."""
    at = position(node, key)
    least = room(node) // 3
    for beside in (place - 1, place + 1):
        if 0 <= beside < count(parent) and await _has_room(tx, parent, beside):
            sibling = await shadow_child(tx, kind, parent, beside)
            tx.store.touch(node)
            tx.store.touch(parent)
            free = room(sibling) - count(sibling)
            appended = at == count(node) - 1 if beside < place else at < 0
            moved = min(free, count(node) - least) if appended else (free + 1) // 2
            if beside < place:
                move_left(sibling, node, moved)
                parent.words[FIRST + place] = node.words[FIRST]
            else:
                move_right(node, sibling, moved)
                parent.words[FIRST + beside] = sibling.words[FIRST]
            return
    right = tx.allocate(NODE)
    tx.store.touch(node)
    tx.store.touch(parent)
    format_node(right, LEAF if is_leaf(node) else INTERNAL, value_size(node))
    kept = count(node) - least if at == count(node) - 1 else least if at < 0 else count(node) // 2
    move_right(node, right, count(node) - kept)
    insert_at(parent, place + 1, right.words[FIRST], pack_u64(right.number))


async def _has_room(tx: Transaction, parent: Block, place: int) -> bool:
    """Whether a child of `parent` can take entries of its neighbour. One that is shared is left as it is."""
    number = parent.words[FIRST + room(parent) + place]
    if tx.space.count(number) != 1:
        return False
    node = await tx.store.read(number, NODE)
    return room(node) - count(node) >= WORTH
