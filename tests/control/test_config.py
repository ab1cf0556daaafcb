"""The configuration: every mistake with file, line, column, key and reason, and all of a file at once."""

import os
from pathlib import Path

import pytest

from nbdmap.control.config import DEFAULT_LISTEN, BadConfig, Config, from_command_line, load, parse
from nbdmap.control.exports import ExportSettings
from nbdmap.control.schema import FileEntry, MemoryEntry, NbdEntry
from nbdmap.errors import NotFound
from nbdmap.targets import TARGETS
from nbdmap.units import GIB, MIB

ROOT = Path(__file__).resolve().parents[2]


def read(text: str) -> Config:
    return parse(text.encode(), "/etc/c.yaml", TARGETS)


def problems(text: str) -> list[str]:
    with pytest.raises(BadConfig) as caught:
        read(text)
    return [line.removeprefix("/etc/c.yaml:") for line in caught.value.problems]


KNOWN_TARGETS = f"known: {', '.join(TARGETS)}"

MISTAKES = [
    # YAML
    ("disks: [", "2:1: while parsing a flow node, did not find expected node content"),
    ("a: b: c", "1:5: mapping values are not allowed in this context"),
    ("a:\n\t- x", "2:1: while scanning for the next token, found character that cannot start any token"),
    ("a: *b", "1:4: *b is not defined before, or stands inside itself"),
    ("a: &b [*b]", "1:8: *b is not defined before, or stands inside itself"),
    ("disks: {}\n---\ndevices: {}", "2:1: a second document: only one is read"),
    ("disks: {a: !!python/object x}", "1:12: the tag 'tag:yaml.org,2002:python/object' is not understood"),
    ("? [a]\n: b", "1:3: a key is one word"),
    ("disks:\n  a\x01: 1", "2:4: character 0x1: control characters are not allowed"),
    ("disks:\n  a: {memory: 1M}\n  b: {memory: 1M}\n  a: {memory: 1M}", "4:3: disks.a: duplicate key (first at line 2)"),
    ("- disks", "1:1: should be a mapping: listen, disks, devices, ..."),
    ("[" * 40 + "]" * 40, "1:34: more than 32 levels"),
    # the whole
    ("disk: {}", "1:1: disk: unknown key (did you mean 'disks'?)"),
    ("x-y: {}", "1:1: x-y: unknown key (known: listen, admin, tls, keyring, disks, devices, multipath, busy_poll, on_event)"),
    ("on_event: []", "1:1: on_event: should be a program with its arguments as a list, or a command for the shell as text"),
    ("on_event: {a: b}", "1:1: on_event: should be a program with its arguments as a list, or a command for the shell as text"),
    ("multipath: {polling_interval: 5}",
     "1:31: multipath.polling_interval: '5' is not a duration (examples: 200ms, 5s, 2min, 0)"),
    ("multipath: {interval: 5s}", "1:13: multipath.interval: unknown key (did you mean 'polling_interval'?)"),
    ("disks: {far: {nbd: 'nbd://h', timeout: soon}}",
     "1:40: disks.far.timeout: 'soon' is not a duration (examples: 200ms, 5s, 2min, 0)"),
    ("disks: 5", "1:8: disks: should be a mapping"),
    ("devices: [a]", "1:1: devices: should be a mapping"),
    # listen and tls
    ("listen: 5", "1:9: listen: should be a list"),
    ("listen: [5]", "1:10: listen.0: should be an NBD URI, such as nbd://127.0.0.1:10809"),
    ("listen: http://x", "1:9: listen: 'http://x': scheme 'http' is not one of nbd, nbds, nbd+unix, nbds+unix"),
    ("listen: [nbd://h, nbd://h/e]", "1:19: listen.1: 'nbd://h/e': an export ('e') has no place in a URI to listen on"),
    ("listen:\n- nbds://h", "2:3: listen.0: 'nbds://h' needs the key tls with its certificates"),
    ("tls: {require: true}", "1:1: tls: the key certificates is missing"),
    ("tls: {certificates: /x, verify-peer: on}", "1:25: tls.verify-peer: unknown key (did you mean 'verify_peer'?)"),
    ("tls: {certificates: /x, require: 1}", "1:34: tls.require: should be true or false"),
    # keyring
    ("keyring: {home: k}", "1:11: keyring.home: key 'home' is not '<type>:<description>'"),
    ("keyring: {'logon:': k}", "1:11: keyring.logon:: key 'logon:' is not '<type>:<description>'"),
    ("keyring: {'other:home': k}", "1:11: keyring.other:home: key 'other:home': unknown type 'other' (possible: user, logon)"),
    ("keyring: {logon:home: [k]}", "1:11: keyring.logon:home: should be text (put it in quotes)"),
    ("keyring: {logon:home: ''}", "1:23: keyring.logon:home: should be the path of a file"),
    # disks
    ("disks:\n  a:", "2:5: disks.a: should be a mapping with one of the keys file, memory, nbd"),
    ("disks: {a: {size: 1M}}", "1:9: disks.a: should be a mapping with one of the keys file, memory, nbd"),
    ("disks: {a: {memory: 5}}", "1:21: disks.a.memory: a size of 5 bytes is not a multiple of 512, or 0"),
    ("disks: {a: {memory: 0}}", "1:21: disks.a.memory: a size of 0 bytes is not a multiple of 512, or 0"),
    ("disks: {a: {memory: 1XB}}",
     "1:21: disks.a.memory: '1XB' is not a size (examples: 4096, 2048s, 64MiB, 1GiB, 10T)"),
    ("disks: {a: {memory: [1]}}", "1:13: disks.a.memory: should be a size, such as 64MiB"),
    ("disks: {a: {memory: 1M, direct: on}}", "1:25: disks.a.direct: belongs to file disks, not to memory"),
    ("disks: {a: {file: x, memory: 1M}}", "1:22: disks.a.memory: does not go together with file"),
    ("disks: {a: {file: x, raed_only: on}}", "1:22: disks.a.raed_only: unknown key (did you mean 'read_only'?)"),
    ("disks: {a: {file: ''}}", "1:19: disks.a.file: should be the path of a file"),
    ("disks: {a: {file: on}}", "1:19: disks.a.file: should be text (put it in quotes)"),
    ("disks: {a: {file: x, create: true}}", "1:9: disks.a: create needs a size"),
    ("disks: {a: {file: x, size: 1M, create: true, read_only: true}}",
     "1:9: disks.a: create and read_only do not go together"),
    ("disks: {a: {memory: 1M, number: 8}}", "1:33: disks.a.number: 8 is not a device number, such as \"8:0\""),
    ("disks: {a: {memory: 1M, number: 254:0}}",
     "1:33: disks.a.number: the major number 254 is that of mapped devices"),
    ("disks: {8:0: {memory: 1M}}",
     "1:9: disks.8:0: '8:0' would be a device number; say 'number: 8:0' of a disk with another name"),
    ("disks: {a/b: {memory: 1M}}", "1:9: disks.a/b: 'a/b' cannot be the name of a device"),
    ("disks: {a: {memory: 1M, number: 8:0}, b: {memory: 1M, number: 8:0}}",
     "1:63: disks.b.number: the device number '8:0' is that of a, too"),
    ("disks: {far: {nbd: 'http://x'}}",
     "1:20: disks.far.nbd: 'http://x': scheme 'http' is not one of nbd, nbds, nbd+unix, nbds+unix"),
    # devices
    ("devices:\n  a:", "2:5: devices.a: should be a mapping"),
    ("devices: {a/b: {}}", "1:11: devices.a/b: 'a/b' cannot be the name of a device"),
    ("devices: {a: {tabel: x}}", "1:15: devices.a.tabel: unknown key (did you mean 'table'?)"),
    ("devices: {a: {table: [x]}}",
     "1:15: devices.a.table: should be the text of a table; after 'table: |' each line stands as it is"),
    ("devices: {a: {table: ''}}", "1:22: devices.a.table: the table has no targets"),
    ("devices: {a: {table: 0 8}}",
     "1:22: devices.a.table: line 1: '0 8' is not '<start> <length> <target> [<arguments>]'"),
    ("devices:\n  a:\n    table: |\n      0 8 zero\n\n      9 8 zero\n",
     "6:7: devices.a.table: start 9 leaves a gap, 8 was expected"),
    ("devices:\n  a:\n    table: |-\n      # two\n      0 8 zreo\n",
     "5:7: devices.a.table: unknown target type 'zreo' (did you mean 'zero'?)"),
    ("devices:\n  a:\n    table: |\n      0 x zero\n", "4:7: devices.a.table: length: 'x' is not a decimal number"),
    ("devices: {a: {table: 0 8 quux}}",
     f"1:22: devices.a.table: line 1: unknown target type 'quux' ({KNOWN_TARGETS})"),
    ("devices: {a: {table: \"0 8 zero\\n8 8 x-x-x\"}}",
     f"1:22: devices.a.table: line 2: unknown target type 'x-x-x' ({KNOWN_TARGETS})"),
    ("devices: {a: {minor: -1}}", "1:22: devices.a.minor: should be greater than or equal to 0"),
    ("devices: {a: {minor: 1048576}}", "1:22: devices.a.minor: should be less than 1048576"),
    ("devices: {a: {minor: '1'}}", "1:22: devices.a.minor: should be a whole number"),
    ("devices: {a: {read_only: no way}}", "1:26: devices.a.read_only: should be true or false"),
    ("devices: {a: {messages: go}}", "1:25: devices.a.messages: should be a list"),
    ("devices: {a: {messages: [go, ' ']}}", "1:30: devices.a.messages.1: an empty message"),
    ("devices: {a: {export: 5}}", "1:23: devices.a.export: should be true, false or a mapping"),
    ("devices: {a: {export: }}", "1:23: devices.a.export: should be true, false or a mapping"),
    ("devices: {a: {export: {nmae: x}}}", "1:24: devices.a.export.nmae: unknown key (did you mean 'name'?)"),
    ("devices: {a: {export: {max_connections: x}}}",
     "1:41: devices.a.export.max_connections: should be a whole number"),
    ("devices: {a: {}, b: {export: {name: a}}}", "1:22: devices.b.export: the export name 'a' is that of a, too"),
    ("devices: {a: {uuid: x}, b: {uuid: x}}", "1:35: devices.b.uuid: the uuid 'x' is that of a, too"),
    ("devices: {a: {minor: 3}, b: {minor: 3}}", "1:37: devices.b.minor: the minor number 3 is that of a, too"),
    ("disks: {a: {memory: 1M}}\ndevices: {a: {}}", "1:9: disks.a: a device has this name, too"),
    ("devices: {a: {table: 0 8 linear a 0}}",
     "1:22: devices.a.table: the table would make a stand on itself: a on a"),
    ("devices:\n  x: {table: 0 8 linear b 0}\n  b: {table: 0 8 linear /dev/mapper/c 0}\n"
     "  c: {minor: 7, table: 0 8 striped 1 8 d 0}\n  d: {table: 0 8 linear b 0}",
     "3:14: devices.b.table: the table would make b stand on itself: b on c on d on b"),
    ("devices:\n  b: {minor: 7, table: 0 8 linear c 0}\n  c: {table: 0 8 linear 254:7 0}\n",
     "2:24: devices.b.table: the table would make b stand on itself: b on c on b"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "problem"), MISTAKES, ids=[f"{text[:40]!r}" for text, _ in MISTAKES])
def test_a_mistake_is_told_with_its_place_and_key(text: str, problem: str) -> None:
    assert problems(text) == [problem]


def test_all_mistakes_of_a_file_are_told_in_the_order_of_its_lines() -> None:
    text = "devices:\n  a: {tabel: x}\n  b: {minor: x}\ndisks:\n  c: {}\nlisten: 5\n"
    assert [line.split(": ")[1] for line in problems(text)] == ["devices.a.tabel", "devices.b.minor", "disks.c", "listen"]


def test_what_is_not_utf8_is_told_with_its_place() -> None:
    with pytest.raises(BadConfig, match=r"^c.yaml:2:3: byte 0xff is not UTF-8$"):
        parse(b"a: 1\nb:\xff", "c.yaml", TARGETS)


def test_aliases_are_counted_written_out() -> None:
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
    )
    assert problems(bomb) == ["6:5: more than 500000 values, with aliases written out"]


def test_deep_nesting_and_long_files_are_refused() -> None:
    assert problems("- " * 1_000_000 + "x") == ["1:67: more than 32 levels"]
    assert problems("#" * (8 * MIB + 1)) == ["1:1: the file has 8388609 bytes, at most 8388608 are read"]


def test_an_alias_means_what_it_stands_for() -> None:
    config = read("devices:\n  a: {table: &t 0 8 zero, export: &e {description: x}}\n  b: {table: *t, export: *e}")
    assert config.devices["a"].table == config.devices["b"].table
    assert config.devices["b"].settings() == ExportSettings(description="x")


WHOLE = """
listen: [nbd://127.0.0.1:0, "nbd+unix:///?socket=run/nbd.sock"]
admin: admin.sock
tls: {certificates: pki, require: true, verify_peer: true}
disks:
  sda: {file: a.img, size: 1GiB, create: true, number: "8:0"}
  sdb: {file: /b.img, direct: true, read_only: true, number: 8:16}
  ram0: {memory: 64MiB, limit: 1M}
  far: {nbd: "nbds://h/e?tls-certificates=pki"}
devices:
  top: {table: 0 8 linear joined 0, minor: 3, read_only: true, messages: [a b], export: false}
  joined:
    uuid: 017
    table: |
      0 8 linear sda 0
      8 8 linear /dev/mapper/bottom 0
    export: {name: n, description: 5, read_only: true, max_connections: 2}
  bottom: {table: 0 8 zero, export: true}
  empty: {}
"""


def test_the_whole_of_a_file() -> None:
    config = read(WHOLE)
    assert [str(uri) for uri in config.listen] == ["nbd://127.0.0.1:0", "nbd+unix:///?socket=/etc/run/nbd.sock"]
    assert config.admin == "/etc/admin.sock"
    assert config.tls is not None
    assert config.tls.model_dump() == {"certificates": "/etc/pki", "require": True, "verify_peer": True}
    far = config.disks["far"]
    assert isinstance(far, NbdEntry)
    assert str(far.nbd) == "nbds://h/e?tls-certificates=/etc/pki"
    sda, sdb, ram0 = (config.disks[name] for name in ("sda", "sdb", "ram0"))
    assert isinstance(sda, FileEntry)
    assert (sda.file, sda.size, sda.create, sda.number) == ("/etc/a.img", GIB, True, "8:0")
    assert isinstance(sdb, FileEntry)
    assert (sdb.file, sdb.size, sdb.create, sdb.number, sdb.direct) == ("/b.img", None, False, "8:16", True)
    assert isinstance(ram0, MemoryEntry)
    assert (ram0.memory, ram0.limit) == (64 * MIB, MIB)
    top, joined = config.devices["top"], config.devices["joined"]
    assert (top.minor, top.read_only, top.messages, top.settings()) == (3, True, ("a b",), None)
    assert joined.uuid == "017"
    assert joined.settings() == ExportSettings("n", "5", True, 2)
    assert joined.table is not None
    assert [line.type_name for line in joined.table.lines] == ["linear", "linear"]
    assert config.devices["bottom"].settings() == config.devices["empty"].settings() == ExportSettings()
    assert config.devices["empty"].table is None
    order = config.bottom_up
    assert order.index("bottom") < order.index("joined") < order.index("top")
    assert config.directory == "/etc"


def test_nothing_is_said_of_what_is_left_out() -> None:
    for text in ("", "# nothing\n", "disks:\ndevices:\n", "listen: null"):
        config = read(text)
        assert [str(uri) for uri in config.listen] == [str(uri) for uri in from_command_line({}, TARGETS).listen]
        assert (config.admin, config.tls, config.disks, config.devices) == (None, None, {}, {})
    assert DEFAULT_LISTEN == "nbd://127.0.0.1:10809"


def test_paths_events_and_timeouts() -> None:
    config = read(
        "multipath: {polling_interval: 1.5s}\non_event: [/bin/x, 2]\n"
        "disks: {far: {nbd: 'nbd://h', timeout: 200ms}, near: {nbd: 'nbd://n'}}"
    )
    assert config.multipath.polling_interval == 1.5
    assert config.on_event == ("/bin/x", "2")
    far, near = config.disks["far"], config.disks["near"]
    assert isinstance(far, NbdEntry)
    assert isinstance(near, NbdEntry)
    assert (far.reconnect().deadline_s, far.reconnect().silence_s) == (0.2, 0.2)
    assert (near.reconnect().deadline_s, near.reconnect().silence_s) == (10, None)
    assert read("").multipath.polling_interval == 5
    assert (read("").busy_poll_s, read("busy_poll: 0").busy_poll_s) == (100e-6, 0)
    assert read("busy_poll: 50us").busy_poll_s == pytest.approx(50e-6)
    assert read("").on_event is None
    assert read("on_event: echo $DM_NAME").on_event == ("/bin/sh", "-c", "echo $DM_NAME")


def test_plain_words_that_are_no_words_elsewhere() -> None:
    config = read("devices:\n  on: {uuid: 12, table: 0 8 zero}\n  1e3: {uuid: 1e3}\n  0x10: {uuid: '0x10'}\n  null: {}")
    assert list(config.devices) == ["on", "1e3", "0x10", "null"]
    assert [device.uuid for device in config.devices.values()] == ["12", "1e3", "0x10", ""]


def test_a_word_that_is_only_perhaps_a_device_makes_no_loop() -> None:
    """A mirror's log type is "disk", and so may a device be called."""
    types = [*TARGETS, "mirror"]
    text = "devices: {disk: {table: 0 8 mirror core 1 64 2 sda 0 sdb 0}, core: {table: 0 8 mirror disk 2 disk 64 1 a 0}}"
    assert set(parse(text.encode(), "c", types).bottom_up) == {"disk", "core"}


def test_everything_is_read_only_on_demand() -> None:
    config = read(WHOLE).read_only()
    assert all(disk.read_only for disk in config.disks.values())
    assert all(device.read_only for device in config.devices.values())
    sda = config.disks["sda"]
    assert isinstance(sda, FileEntry)
    assert not sda.create


def test_tables_of_the_command_line() -> None:
    config = from_command_line({"a": "0 8 linear b 0\n8 8 zero", "b": "0 8 zero"}, TARGETS)
    assert config.bottom_up == ("b", "a")
    assert config.directory == os.getcwd()
    with pytest.raises(BadConfig) as caught:
        from_command_line({"a": "0 8 zero\n9 8 zero", "b/": "0 8 zero"}, TARGETS)
    assert caught.value.problems == [
        "--device a: line 2: start 9 leaves a gap, 8 was expected",
        "--device b/: 'b/' cannot be the name of a device",
    ]


def test_tables_beside_a_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("devices: {a: {table: 0 8 zero}}")
    assert list(load(str(file), TARGETS, {"b": "0 8 linear a 0"}).devices) == ["a", "b"]
    with pytest.raises(BadConfig, match=f"^--device a: {file} has a device of this name$"):
        load(str(file), TARGETS, {"a": "0 8 zero"})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nope\.yaml: no such file$"):
        load(str(tmp_path / "nope.yaml"), TARGETS)
    with pytest.raises(Exception, match="Is a directory"):
        load(str(tmp_path), TARGETS)


def examples() -> list[Path]:
    return [ROOT / "nbdmap" / "demo.yaml", *sorted((ROOT / "config").glob("*.yaml"))]


@pytest.mark.parametrize("file", examples(), ids=lambda path: path.name)
def test_the_examples_are_right(file: Path) -> None:
    assert load(str(file), TARGETS).devices


def documented() -> list[str]:
    """The YAML blocks of the documents."""
    texts = [(ROOT / "docs" / name).read_text() for name in ("configuration.md", "multipath.md", "events.md")]
    return [block.split("```")[0] for text in texts for block in text.split("```yaml\n")[1:]]


@pytest.mark.parametrize("number", range(len(documented())))
def test_the_document_is_right(number: int) -> None:
    read(documented()[number])


def test_two_thousand_devices_are_read_in_a_moment() -> None:
    text = "disks: {d: {memory: 1M}}\ndevices:\n" + "".join(
        f"  v{n}:\n    uuid: u{n}\n    table: |\n      0 8 linear d 0\n      8 8 linear d 8\n" for n in range(2000)
    )
    assert len(read(text).devices) == 2000
