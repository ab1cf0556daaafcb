"""A tree of trees: id -> key -> value, such as thin's device -> virtual block -> data block (the levels of dm-btree).

The values of the top tree are the roots of the trees below. A tree can be shared by several ids, and a top tree with all that
is below by several owners. The top is always shadowed before a tree below it: so the owners of a tree's root are
counted right by the time the root itself is shadowed.
"""

from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from nbdmap.errors import CorruptMetadata
from nbdmap.persist.blocks import Block, BlockStore
from nbdmap.persist.btree import Btree
from nbdmap.persist.insert import insert, position, shadow_child, shadow_node
from nbdmap.persist.lookup import Stale, Tree, Values, cached_leaf, find_leaf, pack_u64, unpack_int
from nbdmap.persist.node import FIRST, is_leaf, overwrite
from nbdmap.persist.remove import destroy, remove_from_leaf
from nbdmap.persist.transaction import Transaction

T = TypeVar("T")
V = TypeVar("V")


class Trees(Generic[V]):
    """Two levels of trees, to be read; `root` is the top tree's."""

    def __init__(self, store: BlockStore, kind: Values[V], root: int) -> None:
        self.store = store
        self.values = kind
        self._top: Tree[int] = Tree(store, Values(8, pack_u64, unpack_int), root)

    @property
    def root(self) -> int:
        """The root of the top tree."""
        return self._top.root

    async def lookup(self, identity: int, key: int) -> V | None:
        """The value of a key in the tree of `identity`; None without a value or such a tree."""
        while True:
            try:
                root = await self._top.try_lookup(identity)
                if root is None:
                    return None
                leaf = cached_leaf(self.store, root, key) or (await find_leaf(self.store, root, key))[0]
                return self.values.find(leaf, key)
            except Stale:
                continue

    def surely_lacks(self, identity: int, key: int) -> bool:
        """Whether it is known without reading that the tree of `identity` has no such key."""
        top = cached_leaf(self.store, self._top.root, identity)
        root = self._top.values.find(top, identity) if top is not None else None
        leaf = cached_leaf(self.store, root, key) if root is not None else None
        return leaf is not None and self.values.find(leaf, key) is None

    async def tree(self, identity: int) -> Tree[V] | None:
        """The tree of `identity` as it is now, to be read while nothing is changed; None if there is none."""
        root = await self._top.lookup(identity)
        return None if root is None else Tree(self.store, self.values, root)

    def roots(self) -> AsyncIterator[tuple[int, int]]:
        """Each id with the root of its tree, in order."""
        return self._top.items()


class _Planted(Btree[V], Generic[V]):
    """A tree whose root is kept in the entry `place` of a shadowed leaf of the top tree."""

    def __init__(self, tx: Transaction, kind: Values[V], root: int, leaf: Block, place: int) -> None:
        super().__init__(tx, kind, root)
        self._leaf = leaf
        self._place = place

    def set_root(self, root: int) -> None:
        if root != self.root:
            self.root = root
            self.tx.store.touch(self._leaf)
            overwrite(self._leaf, self._place, pack_u64(root))


class Forest(Trees[V], Generic[V]):
    """Two levels of trees that can be changed. `root` changes with them."""

    def __init__(self, tx: Transaction, kind: Values[V], root: int) -> None:
        super().__init__(tx.store, kind, root)
        self.tx = tx
        self._roots: Values[int] = Values(8, pack_u64, unpack_int, inc=self._inc_roots)

    @classmethod
    def create(cls, tx: Transaction, kind: Values[V]) -> "Forest[V]":
        """No trees yet. Raises OutOfSpace."""
        return cls(tx, kind, Btree.create(tx, Values(8, pack_u64, unpack_int)).root)

    async def add(self, identity: int) -> None:
        """An empty tree for `identity`, which has none."""
        await self.tx.change(self._add(identity, None))

    async def share(self, identity: int, origin: int) -> None:
        """`identity`, which has no tree, gets that of `origin`, which has one: until one of them is changed it is the same."""
        await self.tx.change(self._add(identity, origin))

    async def remove(self, identity: int) -> None:
        """Removes `identity`, and its tree unless it is shared. What has no owner left is told to `values.dec`."""
        await self.tx.change(self._remove(identity))

    async def change(self, identity: int, work: Callable[[Btree[V]], Coroutine[Any, Any, T]]) -> T:
        """Runs `work` on the tree of `identity`, as one change; in it, the tree's `..._part` methods are to be used.

        Raises CorruptMetadata when there is no such tree.
        """
        return await self.tx.change(self._change(identity, work))

    async def insert(self, identity: int, key: int, value: V) -> bool:
        """Gives a key of the tree of `identity` a value; True if it had none."""
        return await self.change(identity, lambda tree: tree.insert_part(key, value))

    async def remove_range(self, identity: int, first: int, end: int) -> int:
        """Removes the keys from `first` up to `end` of the tree of `identity`; how many there were. A leaf is a change."""
        removed = 0
        while (tree := await self.tree(identity)) is not None:
            entry = await tree.next(first)
            if entry is None or entry[0] >= end:
                break
            first = entry[0]
            removed += await self.change(identity, lambda tree, at=first: tree.remove_part(at, end))  # type: ignore[misc]
        return removed

    async def destroy(self) -> None:
        """Gives up the whole forest: one owner less for its top, and so on for what has no owner left."""
        await self.tx.change(self._destroy())

    def _inc_roots(self, roots: Sequence[int]) -> None:
        for root in roots:
            self.tx.inc(root)

    async def _add(self, identity: int, origin: int | None) -> None:
        if origin is None:
            root = Btree.create(self.tx, self.values).root
        else:
            _, _, root = await self._slot(origin)
            self.tx.inc(root)
        self._top.root, _ = await insert(self.tx, self._roots, self.root, identity, root)

    async def _remove(self, identity: int) -> None:
        _, _, root = await self._slot(identity)
        self._top.root, _ = await remove_from_leaf(self.tx, self._roots, self.root, identity, identity + 1)
        await destroy(self.tx, self.values, root)

    async def _change(self, identity: int, work: Callable[[Btree[V]], Coroutine[Any, Any, T]]) -> T:
        leaf, place, root = await self._slot(identity)
        return await work(_Planted(self.tx, self.values, root, leaf, place))

    async def _slot(self, identity: int) -> tuple[Block, int, int]:
        """The leaf and place of an id, shadowed with the way to it, and the root that is there."""
        node = top = await shadow_node(self.tx, self._roots, self.root)
        self._top.root = top.number
        while not is_leaf(node):
            node = await shadow_child(self.tx, self._roots, node, max(position(node, identity), 0))
        place = position(node, identity)
        if place < 0 or node.words[FIRST + place] != identity:
            raise CorruptMetadata(f"metadata block {node.number}: no tree for {identity}, which must have one")
        return node, place, self._roots.of(node, place, place + 1)[0]

    async def _destroy(self) -> None:
        if self.tx.space.count(self.root) > 1:
            self.tx.dec(self.root)
            return
        roots = [root async for _, root in self.roots()]
        await destroy(self.tx, self._roots, self.root)
        for root in roots:
            await destroy(self.tx, self.values, root)
