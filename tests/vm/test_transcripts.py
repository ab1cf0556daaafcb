"""The transcripts of tests/golden/dmsetup: their format, and that the kernel still answers what is written there."""

import pytest

from tests.vm.harness import Kernel
from tests.vm.transcripts import differences, parse, read_all, record_all, render

QUICK = ("misc.txt", "table-status.txt", "kernel/escapes.txt")


@pytest.mark.parametrize("name", read_all())
def test_what_is_read_is_written_again(name: str) -> None:
    text = read_all()[name]
    assert render(*parse(text)) == text


def test_the_kernel_answers_the_same(kernel: Kernel) -> None:
    files = {name: text for name, text in read_all().items() if name in QUICK}
    assert len(files) == len(QUICK)
    assert differences(files, record_all(kernel, files)) == ""


def test_a_line_that_is_none() -> None:
    with pytest.raises(ValueError, match="line 2"):
        parse("$ dmsetup ls\nNo devices found\n")
