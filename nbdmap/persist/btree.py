"""A b-tree of one level that can be changed: `Tree` (lookup.py) with insert.py and remove.py."""

from collections.abc import Sequence
from typing import Generic, TypeVar

from nbdmap.persist.insert import insert, insert_some, new_leaf
from nbdmap.persist.lookup import MAX_KEY, Tree, Values
from nbdmap.persist.remove import destroy, remove_from_leaf
from nbdmap.persist.transaction import Transaction

V = TypeVar("V")


class Btree(Tree[V], Generic[V]):
    """The tree with root `root`, which changes with the tree: its owner stores it when all changes are made."""

    def __init__(self, tx: Transaction, kind: Values[V], root: int) -> None:
        super().__init__(tx.store, kind, root)
        self.tx = tx

    @classmethod
    def create(cls, tx: Transaction, kind: Values[V]) -> "Btree[V]":
        """A new, empty tree. Raises OutOfSpace."""
        return cls(tx, kind, new_leaf(tx, kind.size).number)

    def set_root(self, root: int) -> None:
        """The tree's root has moved."""
        self.root = root

    async def insert(self, key: int, value: V) -> bool:
        """Gives `key` a value; True if it had none. `values.dec` is told of an old one that differs."""
        return await self.tx.change(self.insert_part(key, value))

    async def insert_part(self, key: int, value: V) -> bool:
        """As `insert`, for use inside of a change."""
        root, new = await insert(self.tx, self.values, self.root, key, value)
        self.set_root(root)
        return new

    async def insert_all_part(self, items: Sequence[tuple[int, V]]) -> int:
        """Gives many keys, which ascend, values; how many had none. For use inside of a change."""
        added = place = 0
        while place < len(items):
            root, place, new = await insert_some(self.tx, self.values, self.root, items, place)
            self.set_root(root)
            added += new
        return added

    async def remove(self, key: int) -> bool:
        """Removes `key`; False if it has no value. `values.dec` is told of the value."""
        return await self.lookup(key) is not None and await self.tx.change(self.remove_part(key, key + 1)) == 1

    async def remove_range(self, first: int, end: int = MAX_KEY + 1) -> int:
        """Removes the keys from `first` up to, not with, `end`; how many there were. A leaf at a time is a change of its own."""
        removed = 0
        while (entry := await self.next(first)) is not None and entry[0] < end:
            first = entry[0]
            removed += await self.tx.change(self.remove_part(first, end))
        return removed

    async def remove_part(self, first: int, end: int) -> int:
        """Removes the keys from `first` up to `end` of one leaf, for use inside of a change."""
        root, removed = await remove_from_leaf(self.tx, self.values, self.root, first, end)
        self.set_root(root)
        return removed

    async def destroy(self) -> None:
        """Gives up the tree: one owner less for its root, and so on for what has no owner left."""
        await self.tx.change(destroy(self.tx, self.values, self.root))
