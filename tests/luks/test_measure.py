"""How hard a KDF is made: with a clock that is told how fast the machine is."""

import pytest

from nbdmap.errors import InvalidArgument
from nbdmap.luks import measure
from nbdmap.luks.kdf import Argon2, Kdf, Pbkdf2
from nbdmap.luks.measure import Cost, choose_kdf, pbkdf2_iterations


class Machine:
    """Derives nothing; its clock goes on by what the KDF would take."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, pbkdf2_ms: float = 0.001, argon2_ms: float = 0.001, memory_mib: int = 8192
    ) -> None:
        self.now = 0.0
        self.pbkdf2_ms, self.argon2_ms = pbkdf2_ms, argon2_ms
        monkeypatch.setattr(Pbkdf2, "derive", lambda kdf, passphrase, length: self._derive(kdf, length))
        monkeypatch.setattr(Argon2, "derive", lambda kdf, passphrase, length: self._derive(kdf, length))
        monkeypatch.setattr(measure, "_half_of_memory_kib", lambda: memory_mib * 512)
        monkeypatch.setattr("os.cpu_count", lambda: 3)

    def _derive(self, kdf: Kdf, length: int) -> bytearray:
        self.now += self.cost_ms(kdf) / 1000
        return bytearray(length)

    def cost_ms(self, kdf: Kdf) -> float:
        return kdf.iterations * self.pbkdf2_ms if isinstance(kdf, Pbkdf2) else kdf.time * kdf.memory_kib * self.argon2_ms

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize("speed", [1e-6, 1e-4, 1e-3, 0.5])
@pytest.mark.parametrize("time_ms", [125, 2000])
def test_pbkdf2_takes_its_time(monkeypatch: pytest.MonkeyPatch, speed: float, time_ms: int) -> None:
    machine = Machine(monkeypatch, pbkdf2_ms=speed)
    kdf = choose_kdf(Cost("pbkdf2", "sha256", time_ms), 64, machine.clock)
    assert isinstance(kdf, Pbkdf2)
    assert kdf.iterations == 1000 or machine.cost_ms(kdf) == pytest.approx(time_ms, rel=0.01)
    assert pbkdf2_iterations("sha256", 64, time_ms, machine.clock) == pytest.approx(kdf.iterations, abs=2)


@pytest.mark.parametrize("kind", ["argon2i", "argon2id"])
@pytest.mark.parametrize("speed", [1e-6, 1e-4, 1e-3, 0.1])
def test_argon2_takes_its_time(monkeypatch: pytest.MonkeyPatch, kind: str, speed: float) -> None:
    machine = Machine(monkeypatch, argon2_ms=speed)
    kdf = choose_kdf(Cost(kind, "sha256", 2000), 64, machine.clock)
    assert isinstance(kdf, Argon2)
    assert (kdf.kind, kdf.lanes, len(kdf.salt)) == (kind, 3, 32)
    assert machine.cost_ms(kdf) == pytest.approx(2000, rel=0.01)
    assert kdf.time == 4 or kdf.memory_kib == 1 << 20, "first as much memory as may be, then more passes"
    assert kdf.salt != choose_kdf(Cost(kind, "sha256", 2000, iterations=4, memory_kib=64), 64).salt


def test_memory_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, argon2_ms=1e-5, memory_mib=256)
    kdf = choose_kdf(Cost("argon2id", "sha256"), 64, machine.clock)
    assert isinstance(kdf, Argon2)
    assert kdf.memory_kib == 128 << 10, "half of the machine's"
    kdf = choose_kdf(Cost("argon2id", "sha256", memory_kib=4096, lanes=4), 64, machine.clock)
    assert isinstance(kdf, Argon2)
    assert (kdf.memory_kib, kdf.lanes) == (4096, 4)
    slow = Machine(monkeypatch, argon2_ms=1000)
    kdf = choose_kdf(Cost("argon2id", "sha256"), 64, slow.clock)
    assert isinstance(kdf, Argon2)
    assert (kdf.time, kdf.memory_kib) == (4, 32), "never less than this"


def test_forced() -> None:
    assert isinstance(kdf := choose_kdf(Cost("pbkdf2", "sha512", iterations=1234), 64), Pbkdf2)
    assert (kdf.hash, kdf.iterations) == ("sha512", 1234)


@pytest.mark.parametrize(
    ("cost", "said"),
    [
        (Cost("scrypt", "sha256"), "no KDF 'scrypt'"),
        (Cost("pbkdf2", "sha0"), "the hash 'sha0'"),
        (Cost("pbkdf2", "sha256", memory_kib=64), "neither memory nor threads"),
        (Cost("pbkdf2", "sha256", lanes=1), "neither memory nor threads"),
        (Cost("pbkdf2", "sha256", iterations=999), "range 1000 to"),
        (Cost("argon2id", "sha256", iterations=3), "range 4 to"),
        (Cost("argon2id", "sha256", memory_kib=31), "the memory"),
        (Cost("argon2id", "sha256", memory_kib=1 << 30), "the memory"),
        (Cost("argon2id", "sha256", lanes=5), "range 1 to 4"),
        (Cost("argon2id", "sha256", time_ms=0), "the time"),
    ],
)
def test_what_cannot_be(cost: Cost, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        choose_kdf(cost, 64)
