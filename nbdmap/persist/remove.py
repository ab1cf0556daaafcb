"""B-trees, changed: removing (dm-btree-remove.c).

The way down is shadowed; entries go from one leaf; then, from the bottom up, each node that is less than a third full takes
entries from a neighbour, or becomes one with it. After each step the tree is whole for readers. A root that has a single
child gives way to it.
"""

from typing import TypeVar

from nbdmap.persist.blocks import Block
from nbdmap.persist.insert import position, shadow_child, shadow_node
from nbdmap.persist.lookup import AHEAD, Values
from nbdmap.persist.node import FIRST, NODE, children, count, delete, is_leaf, move_left, move_right, room
from nbdmap.persist.transaction import Transaction

V = TypeVar("V")


async def remove_from_leaf(tx: Transaction, kind: Values[V], root: int, first: int, end: int) -> tuple[int, int]:
    """Removes the entries with keys from `first` up to `end` of the leaf that has the place of `first`, and tells `kind.dec`.

    Returns the tree's new root, and how many there were.
    """
    node = top = await shadow_node(tx, kind, root)
    spine: list[tuple[Block, int]] = []
    while not is_leaf(node):
        place = max(position(node, first), 0)
        child = await shadow_child(tx, kind, node, place)
        spine.append((node, place))
        node = child
    begin = position(node, first - 1) + 1 if first else 0
    stop = position(node, end - 1) + 1
    if begin >= stop:
        return top.number, 0
    tx.store.touch(node)
    gone = kind.of(node, begin, stop)
    delete(node, begin, stop)
    kind.dec(gone)
    while spine and count(node) < room(node) // 3:
        parent, place = spine.pop()
        await _fill(tx, kind, parent, place, node)
        node = parent
    given_up: list[int] = []
    while not is_leaf(top) and count(top) == 1:
        given_up.append(top.number)
        top = await tx.store.read(children(top)[0], NODE)
    for number in given_up:  # not before the last wait: readers still begin there
        tx.dec(number)
    return top.number, len(gone)


async def _fill(tx: Transaction, kind: Values[V], parent: Block, place: int, node: Block) -> None:
    """Gives a child that has too few entries some of its neighbour's, or makes one node of the two."""
    if count(parent) < 2:
        return
    at = place - 1 if place else 0
    sibling = await shadow_child(tx, kind, parent, at if place else 1)
    left, right = (sibling, node) if place else (node, sibling)
    for block in (parent, left, right):
        tx.store.touch(block)
    total = count(left) + count(right)
    if total < 2 * (room(left) // 3 + 1):
        move_left(left, right, count(right))
        delete(parent, at + 1, at + 2)
        tx.dec(right.number)
        return
    moved = total // 2 - count(left)
    if moved > 0:
        move_left(left, right, moved)
    else:
        move_right(left, right, -moved)
    parent.words[FIRST + at + 1] = right.words[FIRST]


async def destroy(tx: Transaction, kind: Values[V], root: int) -> None:
    """Takes one owner from a tree. Nodes without owners go, and what they point to loses one in turn."""
    pending = [root]
    while pending:
        number = pending.pop()
        await tx.make_room()
        if tx.space.count(number) > 1:
            tx.dec(number)
            continue
        node = await tx.store.read(number, NODE)
        if is_leaf(node):
            kind.check(node)
            kind.dec(kind.of(node, 0, count(node)))
        else:
            below = children(node)
            pending += reversed(below)
        tx.dec(number)
        if pending and tx.store.get(pending[-1]) is None:
            alone = [one for one in pending[-AHEAD:] if tx.space.count(one) == 1]
            await tx.store.read_ahead(alone, NODE)
