"""The rows of CVEs that are about what nbdmap does not have, or about its code rather than its wire. The others stand in
the other files here; README.md says which where."""

import ast
import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from nbdmap.block.device import Device
from nbdmap.control.config import BadConfig, parse
from nbdmap.errors import InvalidArgument
from nbdmap.nbd.constants import Cmd, Opt
from nbdmap.server.listener import Listener
from nbdmap.server.systemd import take_descriptors
from nbdmap.targets import TARGETS
from tests.hostile.wire import CONFIG, MIB, Raw, request
from tests.support.handshake import FakeExports, info
from tests.support.server import REPOSITORY, Server, serving

SOURCES: Final = sorted((REPOSITORY / "nbdmap").rglob("*.py"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(CONFIG) as running:
        yield running


@pytest.mark.parametrize("key", ["allow", "deny", "clients", "authfile"])
def test_cve_2013_6410_no_list_of_addresses_is_believed_in(key: str) -> None:
    """CVE-2013-6410: there are no lists of addresses, and a configuration that has one is refused, not half obeyed."""
    for place in ("{key}: [10.0.0.1]\n", "devices: {{zero: {{table: 0 8 zero, export: {{{key}: [10.0.0.1]}}}}}}\n"):
        with pytest.raises(BadConfig, match=f"{key}: unknown key"):
            parse(place.format(key=key).encode(), "/c.yaml", TARGETS)


def test_cve_2024_45751_secrets_are_not_made_by_random() -> None:
    """CVE-2024-45751: `random` is for the jitter of reconnections and what flakey corrupts, only."""
    users: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            users.setdefault("random", []).extend(str(path.name) for name in names if re.fullmatch(r"random|numpy\.random", name))
    assert users["random"] == ["reconnect.py", "flakey.py"]
    text = (REPOSITORY / "nbdmap/block/reconnect.py").read_text()
    assert re.findall(r"random\.\w+", text) == ["random.random"]


def test_cve_2020_28374_a_client_never_names_a_path(server: Server, tmp_path: Path) -> None:
    """CVE-2020-28374: an export name is looked up among the exports and nowhere else, not even if such a file is there."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 4096)
    paths = (str(secret), f"../../../../..{secret}", "a.img", "./a.img", "/dev/sda", f"nbd+unix:///?socket={server.socket}")
    for name in (*paths, "file", "mem", "254:0"):
        with Raw(server.socket) as client:
            client.greet()
            for number in (Opt.INFO, Opt.GO):
                assert client.ask(number, info(name)) == 2**31 + 6, name


def test_nbdkit_1_44_1_a_zero_of_a_gigabyte_zeroes_all_of_it() -> None:
    """nbdkit 1.44.1: a write-zeroes of 1 GiB is not cut: not one old byte is left."""
    config = "disks: {img: {file: d.img, size: 1GiB, create: true}}\ndevices: {d: {table: 0 2097152 linear img 0}}"
    with serving(config) as big:
        places = [0, 64 * MIB - 512, 64 * MIB, 512 * MIB, 1024 * MIB - 512]
        with Raw(big.socket) as client:
            client.go("d")
            for flags in (0, 2):  # NO_HOLE
                for place in places:
                    client.send(request(Cmd.WRITE, 1, place, 512, payload=b"\xee" * 512))
                    assert client.simple()[0] == 0
                client.send(request(Cmd.WRITE_ZEROES, 1, 0, 1024 * MIB, flags))
                assert client.simple()[0] == 0
                assert all(client.read(place, 512) == bytes(512) for place in places)
                assert client.read(512 * MIB, 32 * MIB) == bytes(32 * MIB)


class NoDevices(FakeExports):
    """Exports that nobody gets to."""

    def open(self, name: str) -> Device:
        raise AssertionError(name)

    async def release(self, device: Device) -> None:
        raise AssertionError(device)


def _kinds() -> Iterator[tuple[int, int]]:
    yield socket.AF_INET, socket.SOCK_DGRAM
    yield socket.AF_UNIX, socket.SOCK_DGRAM
    yield socket.AF_UNIX, socket.SOCK_SEQPACKET
    yield socket.AF_NETLINK, socket.SOCK_RAW


async def test_cve_2025_40080_only_stream_sockets_are_adopted() -> None:
    """CVE-2025-40080: of what systemd passes only TCP and Unix streams are listened on; anything else stops the start."""
    for family, kind in _kinds():
        listener = Listener(NoDevices(), None, False)
        odd = socket.socket(family, kind)
        number = odd.detach()
        with pytest.raises(InvalidArgument, match="neither a TCP nor a Unix stream socket"):
            await listener.adopt([number])
        await listener.close()


def test_cve_2025_40080_descriptors_of_somebody_else_are_not_taken() -> None:
    """CVE-2025-40080: only what is meant for this process, and a number, is taken."""
    for count, pid in (("1", "1"), ("-1", str(os.getpid())), ("x", str(os.getpid())), ("", str(os.getpid())), ("1", "")):
        assert take_descriptors({"LISTEN_FDS": count, "LISTEN_PID": pid}) == []


def test_export_sizes_stay_below_2_63() -> None:
    """CVE-2023-5215 and kin, as a server: no export of 2^63 bytes or more can be made."""
    for sectors in (2**54, 2**55, 2**64 - 1, 2**70):
        with pytest.raises(BadConfig):
            parse(f"devices: {{a: {{table: 0 {sectors} zero}}}}".encode(), "/c.yaml", TARGETS)
    with serving(f"devices: {{a: {{table: 0 {2**54 - 1} zero}}}}") as server, Raw(server.socket) as client:
        client.greet()
        client.send(struct.pack(">QII", 0x49484156454F5054, Opt.EXPORT_NAME, 1) + b"a")
        assert struct.unpack(">QH", client.exactly(10))[0] == 2**63 - 512
        assert client.read(2**63 - 1024) == bytes(512)
