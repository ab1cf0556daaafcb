"""A client that costs next to nothing: `python -m bench.pump SOCKET EXPORT read|write|first BLOCK DEPTH SECONDS`.

fio and libnbd spend more on a 4 KiB request than the servers do, so beside them a fast server mostly waits. This one has made
its requests beforehand, counts replies by their size and never looks into them: what it measures is the server. A server that
answers anything but success in simple replies is found out by the first wrong length or magic. Prints the requests done.
`first` writes once into each 64 KiB of the export, in random order, and ends when it has done so or the time is over.
"""

import random
import socket
import struct
import sys
import time
from collections.abc import Sequence
from typing import Final

from bench.processes import Failed
from nbdmap.nbd.constants import (
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    GREETING,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    Cmd,
    Opt,
    Rep,
)

PREPARED: Final = 4096
"""Different requests; then the first comes again."""
SEED: Final = 1
CLUSTER: Final = 64 << 10


def exactly(sock: socket.socket, count: int) -> bytes:
    """The next `count` bytes."""
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise Failed("the server closed the connection")
        data += more
    return data


def connect(path: str, export: str) -> tuple[socket.socket, int]:
    """A connection in transmission with simple replies, and the size of the export."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    exactly(sock, GREETING.size)
    name = export.encode()
    choice = struct.pack(f">I{len(name)}sH", len(name), name, 0)
    flags = struct.pack(">I", FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)
    sock.sendall(flags + OPTION.pack(OPTION_MAGIC, Opt.GO, len(choice)) + choice)
    size = 0
    while True:
        _, _, kind, length = OPTION_REPLY.unpack(exactly(sock, OPTION_REPLY.size))
        text = exactly(sock, length)
        if kind == Rep.ACK:
            return sock, size
        if kind != Rep.INFO:
            raise Failed(f"GO was answered with {kind:#x}")
        if text[:2] == b"\0\0":
            size = int.from_bytes(text[2:10], "big")


def prepare(size: int, way: str, block: int) -> list[bytes]:
    """Random requests of one kind all over the export."""
    rng = random.Random(SEED)
    command = Cmd.READ if way == "read" else Cmd.WRITE
    payload = b"" if way == "read" else rng.randbytes(block)
    if way == "first":
        offsets = rng.sample(range(0, size, CLUSTER), size // CLUSTER)
    else:
        offsets = [rng.randrange(size // block) * block for _ in range(PREPARED)]
    return [REQUEST.pack(REQUEST_MAGIC, 0, command, at, offset, block) + payload for at, offset in enumerate(offsets)]


def pump(sock: socket.socket, requests: Sequence[bytes], reply: int, depth: int, seconds: float, *, again: bool) -> int:
    """Keeps `depth` requests in flight and returns how many were answered. `again`: those that were made are sent over and
    over; else it ends when each was sent once."""
    buffer = bytearray(depth * reply)
    free, place, received, done = depth, 0, 0, 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        if place + free > len(requests):
            if not again:
                break
            place = 0
        sock.sendall(b"".join(requests[place : place + free]))
        place += free
        free = 0
        while not free:
            count = sock.recv_into(buffer)
            if not count:
                raise Failed("the server closed the connection")
            if not received and count >= SIMPLE_REPLY.size:
                magic, error, _ = SIMPLE_REPLY.unpack_from(buffer)
                if magic != SIMPLE_REPLY_MAGIC or error:
                    raise Failed(f"a reply begins with {magic:#x}, error {error}")
            free, received = divmod(received + count, reply)
        done += free
    flying = (depth - free) * reply - received
    while flying > 0:  # a server that is left with unread replies may take that ill
        flying -= sock.recv_into(buffer) or flying
    return done


def main(arguments: Sequence[str]) -> int:
    """One run."""
    path, export, way, block, depth, seconds = arguments
    sock, size = connect(path, export)
    requests = prepare(size, way, int(block))
    reply = SIMPLE_REPLY.size + (int(block) if way == "read" else 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    begun = time.perf_counter()
    done = pump(sock, requests, reply, int(depth), float(seconds), again=way != "first")
    print(done, done / (time.perf_counter() - begun))
    sock.sendall(REQUEST.pack(REQUEST_MAGIC, 0, Cmd.DISC, 0, 0, 0))
    sock.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
