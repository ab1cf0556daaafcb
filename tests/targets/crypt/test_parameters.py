"""nbdmap.targets.crypt.parameters: the optional words."""

import pytest

from nbdmap.dm.args import Args
from nbdmap.errors import InvalidArgument
from nbdmap.targets.crypt.parameters import parse_options


def test_they_are_printed_in_the_kernels_order() -> None:
    words = "iv_large_sectors sector_size:2048 no_write_workqueue no_read_workqueue submit_from_crypt_cpus high_priority"
    options = parse_options(Args(["8", *words.split(), "same_cpu_crypt", "allow_discards"]), 4096)
    assert options.words() == " 8 allow_discards " + " ".join(
        ("same_cpu_crypt", "high_priority", "submit_from_crypt_cpus", "no_read_workqueue", "no_write_workqueue")
    ) + " sector_size:2048 iv_large_sectors"
    assert (options.sector_size, options.large_sectors, options.allow_discards) == (2048, True, True)


@pytest.mark.parametrize("words", [[], ["0"], ["1", "sector_size:512"]])
def test_nothing_is_printed_for_what_is_so_anyway(words: list[str]) -> None:
    assert parse_options(Args(words), 512).words() == ""


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["1"], "1 announced, 0 given"),
        (["10", *["x"] * 10], "10 is not in the range 0 to 9"),
        (["1", "nonsense"], "unknown option 'nonsense'"),
        (["1", "sector_size"], "unknown option 'sector_size'"),
        (["1", "sector_size:"], "sector_size: '' is not a decimal number"),
        (["1", "sector_size:1000"], "sector_size: 1000 is not a power of two"),
        (["1", "sector_size:8192"], "sector_size: 8192 is not in the range 512 to 4096"),
        (["1", "sector_size:1024"], "length 1 is not a multiple of sector_size 1024"),
        (["1", "integrity:28:none"], "integrity metadata is not supported"),
    ],
)
def test_refused(words: list[str], complaint: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_options(Args(words), 512)
    assert complaint in caught.value.message
