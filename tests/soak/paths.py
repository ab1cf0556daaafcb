"""`python -m tests.soak.paths SECONDS [--seed N]`: multipath over two nbdkit servers of one file, which are killed in turn.

fio writes, reads and verifies every block over four connections, while one server after the other is killed with SIGKILL, is
dead for a while, and comes back; now and then both are dead at once and everything has to wait. At the end fio must have seen no
error and no wrong byte, every failure must have been told by an event, and both paths must be in use again.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.support.clients import environment, wait_until
from tests.support.programs import need
from tests.support.server import Admin, Server, private_directory, serving

SIZE: Final = 64 << 20
NUMBERS: Final = ("8:0", "8:16")
CONFIG: Final = """
multipath: {polling_interval: 200ms}
on_event: 'test -z "$DM_ACTION" || echo "$DM_SEQNUM $DM_ACTION $DM_PATH $DM_NR_VALID_PATHS" >> told'
disks:
  a: {nbd: "nbd+unix:///?socket=a.nbd", number: "8:0"}
  b: {nbd: "nbd+unix:///?socket=b.nbd", number: "8:16"}
devices:
  mp: {uuid: mpath-1, table: 0 131072 multipath 1 queue_if_no_path 0 1 1 SELECTOR}
"""
SELECTORS: Final = (
    "round-robin 0 2 1 a 1 b 1", "queue-length 0 2 1 a 1 b 1", "service-time 0 2 2 a 1 1 b 1 4",
    "historical-service-time 0 2 1 a 1 b 1",
)  # fmt: skip


class Storage:
    """One nbdkit, to be killed and started."""

    def __init__(self, directory: Path, name: str) -> None:
        self._socket = directory / f"{name}.nbd"
        self._command = [need("nbdkit", "nbdkit"), "-f", "-U", str(self._socket), "file", str(directory / "image")]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it listens."""
        self._socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self._socket.exists)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The one that runs."""
        assert self._process is not None
        return self._process

    def kill(self) -> None:
        """What a crash is."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@dataclass
class Result:
    """What happened."""

    kills: int = 0
    both: int = 0
    waited: int = 0    # requests that were seen waiting while both were dead
    ios: int = 0
    events: list[str] = field(default_factory=list)
    status: str = ""


@contextmanager
def load(server: Server, directory: Path, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """fio, for so long; at the end of the block it must have ended well."""
    words = (
        "--name=v", "--ioengine=nbd", f"--uri={server.uri('mp')}", "--iodepth=16", "--numjobs=4", "--group_reporting=1",
        "--thread", "--rw=randrw", "--bs=4k", "--size=8m", "--offset_increment=16m", "--fsync=64", "--verify=crc32c",
        "--verify_state_save=0", "--do_verify=1", "--verify_fatal=1", "--verify_backlog=512", "--time_based",
        f"--runtime={max(1, round(seconds))}", "--output-format=json", f"--output={directory / 'fio.json'}",
    )  # fmt: skip
    with (directory / "fio.log").open("wb") as log:
        fio = subprocess.Popen([need("fio", "fio"), *words], env=environment(), stdout=log, stderr=log)
        try:
            yield fio
            status = fio.wait(seconds + 60)
            assert status == 0, f"fio: status {status}: {(directory / 'fio.log').read_text()[-2000:]}"
        finally:
            fio.kill()
            fio.wait()


def status_of(admin: Admin) -> list[str]:
    """The words of the status line."""
    params: str = admin.call("status", name="mp")[0]["lines"][0]["params"]
    return params.split()


def states(admin: Admin) -> list[str]:
    """A or F, of each path."""
    words = status_of(admin)
    return [words[words.index(number) + 1] for number in NUMBERS]


def torment(storages: list[Storage], admin: Admin, rng: random.Random, result: Result, on: Callable[[], bool]) -> None:
    """Kills one server after the other, every fourth time both, until `on` says no. Ends with both there."""
    turn = 0
    while on():
        turn += 1
        both = turn % 4 == 0
        dead = [0, 1] if both else [turn % 2]
        for number in dead:
            storages[number].kill()
            result.kills += 1
        wait_until(lambda dead=dead: all(states(admin)[number] == "F" for number in dead))  # type: ignore[misc]
        if both:
            result.both += 1
            wait_until(lambda: int(status_of(admin)[1]) > 0)
            result.waited += int(status_of(admin)[1])
        time.sleep(rng.uniform(0.1, 1.5))
        for number in dead:
            storages[number].start()
        wait_until(lambda: states(admin) == ["A", "A"])
        time.sleep(rng.uniform(0.1, 1.0))


def paths(seconds: float, seed: int, selector: str = SELECTORS[0]) -> Result:
    """Everything, for about so many seconds. AssertionError when something was lost or not told."""
    rng, result = random.Random(seed), Result()
    with private_directory() as directory, ExitStack() as stack:
        with (directory / "image").open("wb") as image:
            image.truncate(SIZE)
        storages = [Storage(directory, name) for name in "ab"]
        for storage in storages:
            stack.callback(storage.kill)
        storages[0].start()  # the other one is not there yet: the device comes up all the same
        server = stack.enter_context(serving(CONFIG.replace("SELECTOR", selector), directory=directory))
        admin = stack.enter_context(Admin(server))
        assert states(admin) == ["A", "F"]
        storages[1].start()
        wait_until(lambda: states(admin) == ["A", "A"])
        with load(server, directory, seconds) as fio:
            end = time.monotonic() + seconds - 2
            torment(storages, admin, rng, result, lambda: time.monotonic() < end and fio.poll() is None)
        report: Any = json.loads((directory / "fio.json").read_text()[(directory / "fio.json").read_text().index("{") :])
        (job,) = report["jobs"]
        assert job["error"] == 0, job
        result.ios = job["read"]["total_ios"] + job["write"]["total_ios"]
        result.status = " ".join(status_of(admin))
        told = directory / "told"
        number = sum(int(result.status.split()[result.status.split().index(path) + 2]) for path in NUMBERS)
        wait_until(lambda: len(told.read_text().splitlines()) == 2 * number)
        result.events = sorted(told.read_text().splitlines(), key=lambda line: int(line.split()[0]))
    check_events(result)
    return result


def check_events(result: Result) -> None:
    """Each path fails and comes back in turn, the numbers go on by one, and the count of valid paths is right."""
    valid = {"8:0": True, "8:16": True}
    for number, line in enumerate(result.events):
        sequence, action, path, left = line.split()
        assert int(sequence) == number + 1, result.events
        assert valid[path] is (action == "PATH_FAILED"), result.events
        valid[path] = action == "PATH_REINSTATED"
        assert int(left) == sum(valid.values()), result.events
    assert all(valid.values())


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.paths", description=__doc__, allow_abbrev=False)
    parser.add_argument("seconds", type=float, nargs="?", default=60.0, help="for each selector")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    words = parser.parse_args()
    print(f"seed {words.seed}, {words.seconds:g} s for each selector", flush=True)
    for selector in SELECTORS:
        result = paths(words.seconds, words.seed, selector)
        print(
            f"{selector.split()[0]}: {result.kills} servers killed, {result.both} times both ({result.waited} requests were seen "
            f"waiting), {len(result.events)} events, {result.ios:,} requests without an error; {result.status}", flush=True,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
