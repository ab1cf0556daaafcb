"""Commands beyond the transcripts: export, stats, --json, --retry, events, and how failures end."""

import json
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from nbdmap.cli.errors import NoServer
from nbdmap.cli.main import run
from nbdmap.cli.rpc_client import Connection, Refused, Server
from nbdmap.cli.session import Surroundings
from tests.cli.replay import Answer, World, world


@pytest.fixture
def made(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as one:
        yield one


class Scripted:
    """A server that answers what it is told to, and remembers what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, Mapping[str, Any]]] = []

    def call(self, method: str, params: Mapping[str, Any]) -> Any:
        self.asked.append((method, params))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def events(self) -> Iterator[Mapping[str, str]]:
        yield from self.answers

    def close(self) -> None:
        pass


def command(server: Server, *arguments: str, given: str = "", sleeps: list[float] | None = None) -> Answer:
    stdout, stderr = StringIO(), StringIO()
    around = Surroundings(
        StringIO(given), stdout, stderr, {}, "/here", lambda words: None, (sleeps if sleeps is not None else []).append
    )
    status = run(arguments, lambda path: server, around)
    return Answer(stdout.getvalue(), stderr.getvalue(), status)


# --- failures --------------------------------------------------------------------------------------------------------------


def test_a_refused_table_says_where_and_why(made: World) -> None:
    answer = made.dmsetup(["create", "st3", "--table", "0 64 striped 2 0 7:0 0 7:1 0"])
    assert answer.status == 1
    assert answer.stderr == (
        "device-mapper: reload ioctl on st3 (254:0) failed: Invalid argument: line 1: striped: chunk size: "
        "0 is not in the range 1 to 4294967295\n"
    )


def test_usage_is_status_2_and_one_line(made: World) -> None:
    for line in ("frob", "", "ls -q", "ls x", "create", "suspend", "info -c -o nosuch", "ls --tree -o nosuch", "deps -o nosuch"):
        answer = made.dmsetup(line.split())
        assert (answer.status, answer.stdout, answer.stderr.count("\n")) == (2, "", 1), line
        assert answer.stderr.endswith("(see `nbdmap --help`)\n")


def test_no_server_is_one_line_that_names_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "no.sock"
    stderr = StringIO()
    around = Surroundings(StringIO(), StringIO(), stderr, {"NBDMAP_SOCKET": str(path)}, "/")
    assert run(["ls"], Connection, around) == 1
    assert stderr.getvalue() == (
        f"No server answers at {path} (No such file or directory); start one with `nbdmap serve`, or name its socket with "
        "--socket or $NBDMAP_SOCKET\n"
    )
    with pytest.raises(NoServer):
        Connection("x" * 200).call("info", {})


def test_what_a_server_says_beyond_a_verbs_failure_is_told_as_it_is() -> None:
    server = Scripted(Refused("internal error: ValueError"))
    assert command(server, "suspend", "a").stderr == "internal error: ValueError\n"


# --- what is sent ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "method", "params"),
    [
        (["create", "a", "--table", "0 8 zero # why"], "create", {"name": "a", "table": "0 8 zero ", "directory": "/here"}),
        (["create", "a", "-n", "-r", "-u", "U", "-j254", "-m7", "--noexport"], "create",
         {"name": "a", "uuid": "U", "minor": 7, "read_only": True, "export": False, "directory": "/here"}),
        (["create", "a"], "create", {"name": "a", "table": "0 16 zero\n", "directory": "/here"}),
        (["load", "/dev/mapper/a"], "load", {"name": "a", "table": "0 16 zero\n", "directory": "/here"}),
        (["load", "-u", "U", "-r"], "load", {"uuid": "U", "table": "0 16 zero\n", "read_only": True, "directory": "/here"}),
        (["remove", "--deferred", "a"], "remove", {"name": "a", "deferred": True}),
        (["suspend", "--noflush", "-j254", "-m3"], "suspend", {"name": "254:3", "noflush": True}),
        (["message", "p", "0", "create_thin", "1"], "message", {"name": "p", "sector": 0, "message": "create_thin 1"}),
        (["wait", "a"], "wait", {"name": "a", "event": 0}),
        (["wait", "-u", "U", "7"], "wait", {"uuid": "U", "event": 7}),
        (["rename", "a", "with\\x20space"], "rename", {"name": "a", "new_name": "with space"}),
        (["export", "a", "--export-name", "disk", "-r", "--max-connections", "2", "--description", "d"], "export",
         {"name": "a", "export_name": "disk", "read_only": True, "max_connections": 2, "description": "d"}),
        (["unexport", "a"], "unexport", {"name": "a"}),
        (["table", "--inactive", "a"], "table", {"name": "a", "inactive": True}),
    ],
)  # fmt: skip
def test_what_the_server_is_asked(line: list[str], method: str, params: dict[str, Any]) -> None:
    server = Scripted([] if method == "table" else "" if method == "message" else {})
    assert command(server, *line, given="0 16 zero\n").status == 0
    assert server.asked == [(method, params)]


def test_remove_tries_again_while_the_device_is_open() -> None:
    sleeps: list[float] = []
    busy = Refused("a is open (1 times)", 16)
    server = Scripted(busy, busy, {"removed": True})
    assert command(server, "remove", "--retry", "a", sleeps=sleeps).status == 0
    assert sleeps == [0.2, 0.2]
    server = Scripted(*[busy] * 25)
    answer = command(server, "remove", "--retry", "a", sleeps=[])
    assert answer.stderr == "device-mapper: remove ioctl on a  failed: Device or resource busy: a is open (1 times)\n"
    server = Scripted(Refused("no device 'a'", 6))
    assert command(server, "remove", "--retry", "a", sleeps=[]).status == 1


# --- beyond dmsetup --------------------------------------------------------------------------------------------------------


def test_exports(made: World) -> None:
    made.dmsetup(["create", "a", "--table", "0 8 linear 7:0 0"])
    made.dmsetup(["create", "b", "--noexport", "--table", "0 8 zero"])
    assert made.dmsetup(["export", "b", "--export-name", "a"]).stderr == "the export name 'a' is in use by a\n"
    assert made.dmsetup(["export", "b", "--export-name", "disk"]).status == 0
    infos = json.loads(made.dmsetup(["info", "--json"]).stdout)
    assert [one["export"] for one in infos] == ["a", "disk"]
    made.dmsetup(["unexport", "a", "b"])
    assert [one["export"] for one in json.loads(made.dmsetup(["ls", "--json"]).stdout)] == [None, None]
    found = yaml.safe_load(made.dmsetup(["dump-config"]).stdout)
    assert found == json.loads(made.dmsetup(["dump-config", "--json"]).stdout)
    assert found["devices"]["a"]["table"] == "0 8 linear 7:0 0\n"
    assert found["devices"]["b"]["export"] is False


def test_json_of_the_reading_verbs(made: World) -> None:
    made.dmsetup(["create", "a", "--table", "0 8 linear 7:0 0"])
    made.dmsetup(["create", "b", "--table", "0 8 zero"])
    for line in ("info", "ls", "table", "status", "deps", "stats", "targets", "info a b", "status a", "deps b a"):
        found = json.loads(made.dmsetup([*line.split(), "--json"]).stdout)
        assert isinstance(found, list)
        if " " in line:
            assert [one["name"] for one in found] == line.split()[1:]
    assert json.loads(made.dmsetup(["table", "a", "--json"]).stdout)[0]["lines"][0]["params"] == "7:0 0"
    assert json.loads(made.dmsetup(["version", "--json"]).stdout)["driver"] == "4.48.0"
    assert json.loads(made.dmsetup(["target-version", "zero", "--json"]).stdout)["name"] == "zero"
    assert set(json.loads(made.dmsetup(["dump-config", "--json"]).stdout)) == {"disks", "devices"}
    assert made.dmsetup(["info", "nosuch", "--json"]) == Answer("", "Device does not exist.\n", 1)


def test_stats_are_columns(made: World) -> None:
    assert made.dmsetup(["stats"]).stdout == "No devices found\n"
    made.dmsetup(["create", "a", "--table", "0 8 zero"])
    made.mapper.devices["a"].requests[0] = 12
    answer = made.dmsetup(["stats", "-o", "name,reads,errors"])
    assert answer.stdout == "Name             Reads  Errors\na                    12      0\n"
    assert made.dmsetup(["stats", "a", "--noheadings", "-o", "reads"]).stdout == "12\n"


def test_events_until_the_server_goes() -> None:
    event = {"TIMESTAMP": "1.0", "ACTION": "add", "DEVPATH": "/block/dm-0"}
    assert command(Scripted(event), "events").stdout == "UEVENT[1.0] add@/block/dm-0\nACTION=add\nDEVPATH=/block/dm-0\n\n"
    assert command(Scripted(event, event), "events", "--json").stdout == (json.dumps(event) + "\n") * 2


def test_selection_of_devices_to_change(made: World) -> None:
    for name in ("a1", "a2", "b1"):
        made.dmsetup(["create", name, "--table", "0 8 zero"])
    assert made.dmsetup(["table", "-S", "name=~^a"]).stdout == "a1: 0 8 zero \na2: 0 8 zero \n"
    made.dmsetup(["remove", "-S", "name=~1$"])
    assert made.dmsetup(["ls"]).stdout == "a2\t(254:1)\n"
    assert made.dmsetup(["remove", "-S", "name=none"]).status == 0
    assert made.dmsetup(["suspend", "-S", "bad"]).status == 2


def test_help_goes_where_it_is_read(made: World) -> None:
    assert made.dmsetup(["info", "-c", "-o", "help"]).stdout == ""
    assert "blkdevname" in made.dmsetup(["info", "-c", "-o", "help"]).stderr
    assert "regular expression" in made.dmsetup(["info", "-c", "-S", "help"]).stderr
    assert "remove_all" in made.dmsetup(["help"]).stderr
    assert "Mapped Device Name Fields" in made.dmsetup(["help", "-c"]).stderr


def test_a_table_file_that_is_not_there_and_one_that_is(made: World) -> None:
    file = made.directory / "table"
    assert made.dmsetup(["create", "a", str(file)]).stderr == f"Couldn't open '{file}' for reading.\n"
    file.write_text("# mine\n0 8 zero\n")
    assert made.dmsetup(["create", "a", str(file)]).status == 0
    assert made.dmsetup(["load", "a", str(file), "more"]).status == 2


def test_relative_paths_start_where_the_caller_is(made: World) -> None:
    (made.directory / "disk.img").write_bytes(bytes(8192))
    assert made.dmsetup(["create", "a", "--table", "0 16 linear disk.img 0"]).status == 0
    assert made.dmsetup(["deps", "a"]).stdout == "1 dependencies\t: (240, 0)\n"
    assert made.dmsetup(["deps", "-o", "blkdevname", "a"]).stdout == "1 dependencies\t: (disk.img)\n"


def test_the_locale_of_the_tree() -> None:
    def utf(**environment: str) -> bool:
        return Surroundings(StringIO(), StringIO(), StringIO(), environment, "/").utf

    assert not utf()
    assert not utf(LANG="C", LC_CTYPE="C.UTF-8")  # Python's own doing
    assert utf(LANG="C.UTF-8")
    assert utf(LANG="de_DE.utf8")
    assert not utf(LANG="de_DE.UTF-8", LC_ALL="C")
    assert not utf(LANG="de_DE.ISO-8859-1")
