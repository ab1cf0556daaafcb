"""nbdmap.server.systemd: which descriptors are taken, and what the service manager hears."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdmap.server import systemd
from nbdmap.server.systemd import notify, take_descriptors


@pytest.fixture
def two_sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The first of two neighbouring descriptors of sockets that are inheritable, as systemd leaves them."""
    first, second = socket.socketpair()
    base = 400 + os.getpid() % 100  # beyond what the tests have open; the processes of xdist have tables of their own
    for one, descriptor in ((first, base), (second, base + 1)):
        os.dup2(one.fileno(), descriptor, inheritable=True)
        one.close()
    monkeypatch.setattr(systemd, "FIRST_DESCRIPTOR", base)
    yield base
    os.close(base)
    os.close(base + 1)


def environment(**values: str) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "OTHER": "kept", **values}


def test_the_sockets_are_taken_and_not_handed_on(two_sockets: int) -> None:
    variables = environment()
    assert take_descriptors(variables) == [two_sockets, two_sockets + 1]
    assert variables == {"OTHER": "kept"}
    assert not os.get_inheritable(two_sockets)
    assert not os.get_inheritable(two_sockets + 1)
    assert take_descriptors(variables) == []  # once


@pytest.mark.parametrize(
    "values",
    [{"LISTEN_PID": "1"}, {"LISTEN_PID": ""}, {"LISTEN_FDS": ""}, {"LISTEN_FDS": "-1"}, {"LISTEN_FDS": "²"}, {"LISTEN_FDS": "0"}],
)
def test_what_is_meant_for_another_process_or_no_number_is_left_alone(two_sockets: int, values: dict[str, str]) -> None:
    variables = environment(**values)
    assert take_descriptors(variables) == []
    assert variables == {"OTHER": "kept"}
    assert os.get_inheritable(two_sockets)


def test_a_descriptor_that_is_not_open_is_the_last(two_sockets: int) -> None:
    """A wild number costs nothing, and whoever listens can say which descriptor is missing."""
    assert take_descriptors(environment(LISTEN_FDS="999999999999")) == [two_sockets, two_sockets + 1, two_sockets + 2]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as listening:
        listening.bind(str(tmp_path / "notify"))
        yield listening


def test_the_manager_hears_the_state(manager: socket.socket) -> None:
    notify({"NOTIFY_SOCKET": manager.getsockname()}, "READY=1\nSTATUS=ä")
    assert manager.recv(100) == "READY=1\nSTATUS=ä".encode()


def test_an_abstract_socket_begins_with_an_at_sign() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as listening:
        listening.bind("")  # the kernel chooses a name
        name = listening.getsockname()
        assert isinstance(name, bytes)
        notify({"NOTIFY_SOCKET": "@" + name[1:].decode()}, "STOPPING=1")
        assert listening.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("path", ["", "relative", "vsock:2:1234", "/nobody/is/there", "/" + "x" * 200])
def test_a_manager_that_does_not_listen_is_no_failure(path: str) -> None:
    notify({"NOTIFY_SOCKET": path}, "READY=1")
    notify({}, "READY=1")


def test_a_manager_that_does_not_read_is_not_waited_for(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "NOTIFY_SECONDS", 0.001)
    for _ in range(2000):
        notify({"NOTIFY_SOCKET": manager.getsockname()}, "x" * 1000)
        if _queue_is_full(manager):
            break
    else:
        pytest.fail("the queue of a socket that nobody reads never fills")
    notify({"NOTIFY_SOCKET": manager.getsockname()}, "READY=1")


def _queue_is_full(manager: socket.socket) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(manager.getsockname())
            probe.send(b"x")
        except BlockingIOError:
            return True
    return False
