from nbdmap.block.unflushed import ENTRY_OVERHEAD, MAX_BATCH, Unflushed
from nbdmap.nbd.constants import CMD_FLAG_FUA, Cmd
from nbdmap.nbd.replies import Request


def wrote(offset: int, data: bytes, flags: int = 0) -> Request:
    return Request(Cmd.WRITE, offset, len(data), memoryview(bytearray(data)), flags)


def places(record: Unflushed) -> list[list[int]]:
    return [[entry.offset for entry in batch] for batch in record.batches()]


def test_copies_and_forgets() -> None:
    record = Unflushed(keep=True)
    write = wrote(0, b"abc")
    record.note(write)
    write.data[:] = b"xyz"
    ((kept,),) = record.batches()
    assert (kept.data, kept.offset, kept.length, kept.command) == (b"abc", 0, 3, Cmd.WRITE)
    assert (record.size, record.dirty) == (3 + ENTRY_OVERHEAD, True)
    mark = record.mark()
    record.note(Request(Cmd.TRIM, 100, 50))
    record.flushed(mark)
    assert places(record) == [[100]]
    assert (record.size, record.dirty) == (ENTRY_OVERHEAD, True)
    record.flushed(record.mark())
    record.flushed(mark)
    assert (places(record), record.size, record.dirty) == ([], 0, False)


def test_durable_writes_count_only_when_something_older_could_undo_them() -> None:
    record = Unflushed(keep=True)
    record.note(wrote(0, b"abc", CMD_FLAG_FUA))
    assert not record.dirty
    record.note(wrote(0, b"abc"))
    record.note(wrote(0, b"def", CMD_FLAG_FUA))
    assert [bytes(entry.data) for batch in record.batches() for entry in batch] == [b"abc", b"def"]


def test_without_keeping() -> None:
    record = Unflushed(keep=False)
    record.note(wrote(0, b"abc"))
    assert (record.dirty, record.size, places(record)) == (True, 0, [])
    record.flushed(record.mark())
    assert not record.dirty


def test_batches_do_not_overlap() -> None:
    record = Unflushed(keep=True)
    for offset, length in [(0, 10), (10, 10), (30, 5), (34, 1), (0, 1), (0, 1), (9, 2)]:
        record.note(wrote(offset, bytes(length)))
    assert places(record) == [[0, 10, 30], [34, 0], [0, 9]]


def test_batches_are_bounded() -> None:
    record = Unflushed(keep=True)
    for index in range(MAX_BATCH + 1):
        record.note(wrote(index * 10, b"x"))
    assert [len(batch) for batch in record.batches()] == [MAX_BATCH, 1]
