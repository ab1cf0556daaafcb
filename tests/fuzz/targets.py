"""The targets, by name, and what one core of a long run does."""

import logging
from collections.abc import Callable, Mapping
from typing import Final

from tests.fuzz.cipher_target import Ciphers
from tests.fuzz.engine import Found, Target, on_loop
from tests.fuzz.luks_targets import Headers1, Headers2
from tests.fuzz.text_targets import Rpc, Tables, Yaml
from tests.fuzz.thin_target import Metadatas, Xml
from tests.fuzz.wire_targets import Client, Handshake, Requests

SLICE_SECONDS: Final = 20.0

TARGETS: Final[Mapping[str, Callable[[], Target]]] = {
    made.name: made for made in (Handshake, Requests, Client, Tables, Ciphers, Yaml, Rpc, Headers1, Headers2, Metadatas, Xml)
}


def work(names: list[str], seed: int, seconds: float) -> list[Found]:
    """Fuzzes these targets in turn."""
    logging.disable(logging.CRITICAL)
    rounds = max(1, round(seconds / SLICE_SECONDS / len(names)))
    each = seconds / rounds / len(names)
    return [on_loop(TARGETS[name], seed * 1000 + turn, seconds=each) for turn in range(rounds) for name in names]
