"""Targets that read text: tables with messages, the YAML configuration, and lines of the admin RPC."""

import asyncio
import json
import re
from collections.abc import Coroutine, Sequence
from typing import Any, Final, cast

from nbdmap.block.device import Device
from nbdmap.block.io import DISCARD, READ, Continued, Io, Pending
from nbdmap.block.memory import MemoryDisk
from nbdmap.control.config import BadConfig, parse
from nbdmap.control.events import Events
from nbdmap.control.exports import Exports
from nbdmap.control.mapper import Mapper
from nbdmap.control.rpc import INTERNAL_ERROR, Methods, _Connection
from nbdmap.control.verbs import Verbs
from nbdmap.dm.args import Args, split_words
from nbdmap.dm.table import Table, parse_table
from nbdmap.errors import NbdmapError, NotFound
from nbdmap.targets import TARGETS
from tests.fuzz.mutate import Pieces
from tests.support.disks import FakeOpener

PATH_OF_NOTHING: Final = "/no/such/directory"
NUMBERS: Final = [b"0", b"1", b"8", b"16", b"100", b"1024", b"2048", b"4096", b"36028797018963967", b"18014398509481984"]
TURNS: Final = 12
"""Of the loop, that a verb has to end in: nothing here waits for anything outside."""
MOST_LINES: Final = 16


async def finish(work: Coroutine[Any, Any, object]) -> bool:
    """Runs a coroutine for some turns of the loop; cancels one that still waits then, and tells so by False."""
    try:
        yielded = work.send(None)
    except StopIteration:
        return True
    task = asyncio.ensure_future(Continued(cast("Pending", work), yielded))
    for _ in range(TURNS):
        await asyncio.sleep(0)
        if task.done():
            task.result()
            return True
    task.cancel()
    await asyncio.wait((task,), timeout=1)
    assert task.cancelled(), "it ends when it is cancelled"
    return False


# --- tables ----------------------------------------------------------------------------------------------------------------


def _line(*words: str) -> Pieces:
    return [word.encode() for word in words] + [b"\n"]


class Tables:
    """A table and messages to its targets: the words up to the first `message`, and what stands behind each of those."""

    name = "table"
    words: Sequence[bytes] = [
        *NUMBERS, *(name.encode() for name in TARGETS), b"7:0", b"7:1", b"disk7:0", b"/dev/mapper/x", b"\n", b"message",
        b"\\ ", b"#", b"2", b"3", b"drop_writes", b"seed", b"enable", b"nbd://h/x",
    ]  # fmt: skip
    seeds: Sequence[Pieces] = [
        _line("0", "1024", "linear", "7:0", "0"), [*_line("0", "1024", "zero"), b"message", b"0 hello"],
        _line("0", "512", "linear", "7:0", "0") + _line("512", "512", "linear", "7:1", "8"),
        _line("0", "1024", "striped", "2", "16", "7:0", "0", "7:1", "0"),
        _line("0", "96", "striped", "3", "8", "7:0", "0", "7:1", "0", "7:0", "512") + _line("96", "8", "error"),
        [*_line("0", "64", "error", "7:1", "8"), *_line("64", "64", "zero"), b"message", b"70 a b\\ c"],
        _line("0", "64", "crypt", "aes-cbc-essiv:sha256", "babe" * 8, "0", "7:0", "0", "1", "allow_discards"),
        _line("0", "64", "crypt", "aes-xts-plain64", ":64:logon:home", "8", "7:0", "0", "1", "sector_size:4096"),
        [*_line("0", "64", "crypt", "aes", "00" * 16, "0", "7:0", "0"), b"message", b"0 key set", b"11" * 16],
        _line("0", "64", "delay", "7:0", "0", "1", "7:1", "0", "0", "7:0", "8", "1"),
        _line("0", "64", "flakey", "7:0", "0", "0", "1", "8", "drop_writes", "corrupt_bio_byte", "1", "r", "2", "0", "seed", "1"),
        _line("0", "64", "flakey", "7:0", "0", "0", "1", "4", "random_read_corrupt", "9", "random_write_corrupt", "9"),
        [*_line("0", "64", "dust", "7:0", "0", "512"), b"message", b"0 addbadblock 3 1", b"message", b"0 enable"],
        [*_line("0", "64", "switch", "2", "8", "0", "7:0", "0", "7:1", "0"), b"message", b"0 set_region_mappings 0:1 :0 R2,5"],
        [*_line("0", "64", "log-writes", "7:0", "7:1"), b"message", b"0 mark here"],
        _line("0", "64", "unstriped", "2", "16", "1", "7:0", "8") + _line("64", "64", "ebs", "7:1", "8", "1", "8"),
        _line("0", "64", "multipath", "0", "1", "alua", "2", "1", "round-robin", "0", "1", "1", "7:0", "5",
              "service-time", "0", "2", "2", "7:0", "1", "2", "7:1", "3", "0"),
        _line("0", "64", "multipath", "4", "queue_mode", "bio", "pg_init_retries", "3", "0", "1", "1",
              "historical-service-time", "2", "972", "0", "2", "1", "7:1", "1", "7:0", "1"),
        _line("#", "comment") + _line("0", "8", "zero"), _line("0", "1024", "linear", r"disk\7:0", "0"),
    ]  # fmt: skip

    def __init__(self) -> None:
        self._disks = [MemoryDisk(f"disk7:{n}", f"7:{n}", 2048 * 512) for n in range(2)]
        self._opener = FakeOpener(*self._disks)

    def join(self, pieces: Pieces) -> bytes:
        return b" ".join(pieces)

    async def run(self, data: bytes) -> object:
        text, *messages = data.decode(errors="replace").split("message")
        try:
            table = await self._build(text)
        except NbdmapError as error:
            self._check_openers()
            return re.sub("[0-9]+|'.*'", "", error.message)[:40]
        try:
            return await self._use(table, messages)
        finally:
            await table.close()
            self._check_openers()

    def _build(self, text: str) -> Coroutine[Any, Any, Table]:
        return Table.build(parse_table(text), TARGETS, self._opener, False, lambda: None)

    def _check_openers(self) -> None:
        assert [disk.openers for disk in self._disks] == [0, 0]

    async def _use(self, table: Table, messages: list[str]) -> object:
        lines = table.table_lines()
        said = "\n".join(f"{one.start_sectors} {one.length_sectors} {one.type_name} {one.params}" for one in lines)
        again = await self._build(said)
        assert again.table_lines() == lines
        await again.close()
        for one in table.status_lines():
            assert one.params.isprintable()
        outcome = [one.type_name for one in lines[:4]]
        for words in map(split_words, messages[:4]):
            try:
                sector = int(words[0]) if words and re.fullmatch("[0-9]{1,19}", words[0]) else 0
                await table.target_at_sector(sector).message(Args(words[1:]))
            except NbdmapError as error:
                outcome.append(re.sub("[0-9]+|'.*'", "", error.message)[:20])
        block = table.limits.logical_block
        reading = Io(READ, block, memoryview(bytearray(block)))
        for io, offset in ((reading, table.size - block), (Io(DISCARD, table.size), 0)):
            try:
                if not await finish(table.submit(io, offset)):
                    outcome.append("held back")
            except NbdmapError as error:
                outcome.append(str(error.errno))
        extents = await table.extents(0, min(table.size, 1 << 40))
        assert all(length > 0 for length, _ in extents)
        return tuple(outcome)


# --- the configuration -----------------------------------------------------------------------------------------------------

CONFIG: Final = """listen: [ nbd://127.0.0.1:10809 , nbd+unix:///?socket=/run/x.sock ]
admin: /run/admin.sock
tls: { certificates: tls , require: true , verify_peer: false }
disks:
  sda: { file: a.img , size: 1GiB , create: true , number: 8:0 }
  ram: { memory: 64MiB , limit: 1M }
  far: { nbd: nbd://10.0.0.2/export }
devices:
  joined:
    uuid: LVM-x
    minor: 7
    table: |
      0 1024 linear sda 0
      1024 1024 striped 2 8 ram 0 far 0
    messages: [ a b , c ]
    export: { name: x , description: y , read_only: true , max_connections: 3 }
  top: { table: 0 8 linear /dev/mapper/joined 0 , export: false }
"""


def _pieces(text: str) -> Pieces:
    """Words and what stands between them."""
    return [piece.encode() for piece in re.split(r"( +|\n)", text) if piece]


class Yaml:
    """A configuration file."""

    name = "yaml"
    words: Sequence[bytes] = [
        *NUMBERS, *(word for word in sorted(set(_pieces(CONFIG))) if len(word) > 2), b"&a ", b"*a", b"- ", b"? ", b"!!int ",
        b"!x ", b"---\n", b"...", b"<<: ", b"{}", b"[]", b"null", b"yes", b"~", b"0x10", b"1_000", b"  ", b"\n",
        b"\n  ", b"| \n", b">-\n", b"\\n",
        b'"\\0"', b'"\\ud800"', b"%YAML 1.2\n", b"\xef\xbb\xbf", b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    ]  # fmt: skip
    seeds: Sequence[Pieces] = [
        _pieces(CONFIG), *(_pieces(part) for part in re.split(r"(?m)^(?=devices|disks|listen)", CONFIG) if part),
        _pieces("devices: {a: {table: 0 8 linear b 0}, b: {table: 0 8 linear a 0}}\n"),
        _pieces("disks: {a: &x {memory: 1M}, b: *x}\n"),
    ]  # fmt: skip

    def join(self, pieces: Pieces) -> bytes:
        return b"".join(pieces)

    def run(self, data: bytes) -> object:
        try:
            config = parse(data, f"{PATH_OF_NOTHING}/c.yaml", TARGETS)
        except BadConfig as error:
            problems = error.problems
        else:
            assert sorted(config.bottom_up) == sorted(config.devices)
            assert all(uri.port < 65536 for uri in config.listen)
            config.read_only()
            return len(config.devices), len(config.disks), len(config.listen)
        assert problems
        for problem in problems:
            assert re.match(r"/no/such/directory/c\.yaml:\d+:\d+: .", problem), problem
            assert "\n" not in problem, problem
        return tuple(re.sub(r"[0-9]+|'.*'", "", problem)[-24:] for problem in problems[:2])


# --- the admin RPC ---------------------------------------------------------------------------------------------------------


class Closed(Mapper):
    """A mapper whose tables can name nothing that is outside."""

    async def open(self, reference: str, read_only: bool, directory: str, *, may_be_absent: bool = False) -> Device:
        if self._mapped(reference) is None and reference not in self.disks and not re.fullmatch(r"\d{1,10}:\d{1,10}", reference):
            raise NotFound(f"{reference}: nothing outside is opened here")
        return await super().open(reference, read_only, directory)


class Pipe:
    """A writer that keeps what is written."""

    def __init__(self) -> None:
        self.out = b""

    def write(self, data: bytes) -> None:
        self.out += data

    async def drain(self) -> None:
        pass


def _call(method: str, **params: object) -> Pieces:
    text = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
    return [piece.encode() for piece in re.split(r'([ ,:{}"\[\]])', text) if piece] + [b"\n"]


class Rpc:
    """Lines, as the admin socket reads them, for a server that has one disk, d, and nothing else."""

    name = "rpc"
    _names: Final = (
        "version", "targets", "info", "table", "status", "deps", "stats", "dump_config", "remove_all", "events", "rpc.discover",
        "wait", "suspend", "resume", "load", "clear", "wipe_table", "message", "export", "unexport", "set_uuid", "rename",
        "remove", "create",
    )  # fmt: skip
    words: Sequence[bytes] = [
        *(name.encode() for name in _names), *NUMBERS, b'"a"', b"a", b"b", b"254:0", b"true", b"false", b"null", b"-1", b"1e400",
        b"NaN", b"\\u0000", b"\\ud800", b"name", b"table", b"uuid", b"new_name", b"0 8 zero", b"0 8 linear d 0",
        b"0 8 linear a 0", b"minor", b"read_only", b"force", b"deferred", b"inactive", b"noflush", b"sector", b"message",
        b"@cancel_deferred_remove", b"id", b"params", b"\n",
    ]  # fmt: skip
    seeds: Sequence[Pieces] = [
        *(_call(name) for name in _names),
        *(_call("create", name="a", table="0 8 linear d 0") + _call(name, name="a") + _call("info") for name in _names[2:]),
        _call("create", name="a", table="0 8 zero") + _call("create", name="b", table="0 8 linear a 0", uuid="u", minor=3)
        + _call("remove", name="a", force=True) + _call("remove", name="a", deferred=True) + _call("remove", name="b"),
        _call("create", name="c", table=None, export=False) + _call("set_uuid", name="c", new_uuid="v")
        + _call("load", name="c", table="0 16 linear d 0\n16 8 error", read_only=True) + _call("resume", name="c"),
        _call("create", name="a", table="0 8 zero") + _call("rename", name="a", new_name="b")
        + _call("message", name="b", sector=0, message="hi") + _call("suspend", name="b", noflush=True)
        + _call("resume", name="b") + _call("wait", name="b", event=7)
        + _call("export", name="b", export_name="x", read_only=True, max_connections=1),
    ]  # fmt: skip

    def __init__(self) -> None:
        self._verbs = Verbs(*self._site())
        self._methods = Methods(self._verbs)

    def _site(self) -> tuple[Mapper, Exports]:
        mapper = Closed(TARGETS, Events(lambda: 0.0))
        mapper.disks["d"] = MemoryDisk("d", "1:0", 1 << 20)
        return mapper, Exports(mapper)

    def join(self, pieces: Pieces) -> bytes:
        return b"".join(pieces)

    async def run(self, data: bytes) -> object:
        mapper, self._verbs._exports = self._site()
        self._verbs._mapper = mapper
        pipe = Pipe()
        connection = _Connection(self._methods, cast("Any", None), cast("Any", pipe))
        ended = [await finish(connection._answer(line)) for line in data.split(b"\n")[:MOST_LINES] if line.strip()]
        kinds = []
        for line in pipe.out.splitlines():
            answer = json.loads(line)
            code = answer["error"]["code"] if "error" in answer else f"{answer.get('result')!r}"[:12]
            assert code != INTERNAL_ERROR, answer
            kinds.append(code)
        await mapper.close()
        assert mapper.disks == {}
        return tuple(ended), tuple(kinds)
