"""The persistent-data library: transactional metadata in blocks of 4 KiB (Documentation device-mapper/persistent-data).

What thin builds on, from the bottom up (on disk everything is the kernel's, reference section g):

    store = BlockStore(device, cache=16384)             blocks.py       a bounded cache of checksummed blocks
    await store.read_raw(0)                             the superblock's bytes: they, and their checksum, are the caller's
    tx = Transaction(store, MetadataMap.create(store.nr_blocks))        a new metadata device; block 0 is taken
    tx = Transaction(store, await MetadataMap.open(store, root))        root: the 32 bytes of the superblock
    data = DataMap.create(tx, nr_blocks)                data_map.py     reference counts of the blocks of another device
    data = await DataMap.open(tx, root)
    tree = Btree.create(tx, DETAILS)                    btree.py        DETAILS = Values(size, pack, unpack[, inc, dec])
    tree = Btree(tx, DETAILS, root)
    forest = Forest(tx, MAPPINGS, root)                 forest.py       two levels: id -> tree of key -> value
    await tx.commit(superblock)                         transaction.py  superblock() -> the 4096 sealed bytes of block 0

Which calls wait. Calls that may have to read a block are `async`; with the block in the cache they end at once, so they
are run eagerly. What never reads is a plain def. Async: `Btree.lookup, insert, remove, remove_range, next, lowest, highest,
leaves, destroy`; all of `Forest`; `DataMap.count, new_block, open`; `MetadataMap.open`; `Transaction.shadow, commit`. Plain:
`Btree.create`, `Transaction.allocate, inc, dec`, `MetadataMap.count, inc, dec, new_block`, `DataMap.inc, dec, inc_all,
dec_all` (remembered, written by the commit), `nr_free`, `extend`, `BlockStore.get`.

Who may call when. Changes are made by one coroutine at a time: the caller holds a lock of its own around each change and
each commit. Look-ups may run at any time beside them; they see each key as it was or as it will be.

When something fails. A change that fails half-way (an I/O error, CorruptMetadata, OutOfSpace) leaves the transaction
`broken`: every later change and commit raises IoFailed. The caller aborts: it drops store, transaction, maps and trees and
opens all of it again from the superblock on the disk. Nothing that was committed is ever overwritten before the commit
after the one that freed it, so that is the state of the last commit. Writing the superblock is the only moment of
which a failure leaves both possible.

Space. `new_block` takes the first block, at or after a rotating cursor, that is free both now and in the last commit.
`nr_free` is the kernel's: free in the last commit, less what was allocated since; what is freed counts from the commit on.
Counts of metadata blocks are kept whole in memory (4 bytes a block, 16 MiB at most); of data blocks only the index is, 16
bytes for 16320 blocks.
"""
