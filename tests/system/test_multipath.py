"""Multipath in a real server: a silent path, a stop while requests wait, a program that a reload brings."""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.soak.paths import SIZE, Storage, states, status_of
from tests.support.clients import environment, run, wait_until
from tests.support.programs import need
from tests.support.server import Admin, Server, private_directory, serving

pytestmark = pytest.mark.system

CONFIG = """
multipath: {{polling_interval: 200ms}}
disks:
  a: {{nbd: "nbd+unix:///?socket=a.nbd", number: "8:0", timeout: {timeout}}}
  b: {{nbd: "nbd+unix:///?socket=b.nbd", number: "8:16", timeout: {timeout}}}
devices:
  mp: {{table: 0 131072 multipath 1 queue_if_no_path 0 1 1 round-robin 0 2 1 a 1 b 1}}
"""


@contextmanager
def two_paths(timeout: str = "10s") -> Iterator[tuple[Path, list[Storage], Server, Admin]]:
    with private_directory() as directory, ExitStack() as stack:
        with (directory / "image").open("wb") as image:
            image.truncate(SIZE)
        storages = [Storage(directory, name) for name in "ab"]
        for storage in storages:
            stack.callback(storage.kill)
            storage.start()
        server = stack.enter_context(serving(CONFIG.format(timeout=timeout), directory=directory))
        admin = stack.enter_context(Admin(server))
        wait_until(lambda: states(admin) == ["A", "A"])
        yield directory, storages, server, admin


def test_a_silent_path_is_left_in_time_and_taken_again() -> None:
    with two_paths("500ms") as (_, storages, server, admin):
        stopped = storages[0].process
        stopped.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        run("qemu-io", "-f", "raw", "-c", "write -P 1 0 64k", "-c", "read -P 1 0 64k", "-c", "flush", server.uri("mp"))
        assert time.monotonic() - began < 5
        wait_until(lambda: states(admin) == ["F", "A"])
        run("qemu-io", "-f", "raw", "-c", "read -P 1 0 64k", server.uri("mp"))
        stopped.send_signal(signal.SIGCONT)
        wait_until(lambda: states(admin) == ["A", "A"])
        run("qemu-io", "-f", "raw", "-c", "read -P 1 0 64k", "-c", "read -P 1 0 64k", server.uri("mp"))


def test_the_server_stops_in_time_while_requests_wait_for_a_path() -> None:
    with two_paths() as (directory, storages, server, admin):
        for storage in storages:
            storage.kill()
        wait_until(lambda: states(admin) == ["F", "F"])
        client = subprocess.Popen(
            [need("qemu-io", "qemu-utils"), "-f", "raw", "-c", "read 0 4k", server.uri("mp")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(), cwd=directory,
        )  # fmt: skip
        wait_until(lambda: int(status_of(admin)[1]) > 0)
        began = time.monotonic()
        server.process.terminate()
        status = server.process.wait(10)
        took = time.monotonic() - began
        out, _ = client.communicate(timeout=20)
        assert took < 4, took
        assert b"failed" in out or b"error" in out, out
        assert status == 0
        server.start()


def test_a_reload_brings_a_program() -> None:
    with two_paths() as (directory, storages, server, admin):
        text = (directory / "c.yaml").read_text()
        (directory / "c.yaml").write_text(text + "on_event: 'echo $DM_ACTION $DM_PATH >> told'\n")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "reloaded" in server.log())
        storages[1].kill()
        wait_until(lambda: (directory / "told").exists() and "PATH_FAILED 8:16\n" in (directory / "told").read_text())
        assert server.verb("status", "mp") == "0 131072 multipath 2 0 0 0 1 1 E 0 2 0 8:0 A 0 8:16 F 1 \n"
        admin.call("message", name="mp", message="fail_path 8:0")
        wait_until(lambda: "PATH_FAILED 8:0\n" in (directory / "told").read_text())
