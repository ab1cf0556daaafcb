import errno

import pytest

from nbdmap import errors
from nbdmap.errors import IoFailed, NbdmapError, from_os_error

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, NbdmapError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_failure_has_a_message_and_a_known_errno(kind: type[NbdmapError]) -> None:
    error = kind("disk sda is gone")
    assert error.message == str(error) == "disk sda is gone"
    assert error.errno in errno.errorcode


def test_io_failed_keeps_the_errno_it_is_given() -> None:
    assert IoFailed("x").errno == errno.EIO
    assert IoFailed("x", errno.ENOSPC).errno == errno.ENOSPC
    assert IoFailed.errno == errno.EIO


def test_an_os_error_is_translated_with_what_was_done() -> None:
    error = from_os_error(OSError(errno.ENOSPC, "No space left on device"), "write of /srv/a.img at byte 4096")
    assert error.message == "write of /srv/a.img at byte 4096: No space left on device"
    assert error.errno == errno.ENOSPC


def test_an_os_error_without_errno_is_eio() -> None:
    error = from_os_error(OSError("strange"), "read")
    assert (error.message, error.errno) == ("read: strange", errno.EIO)
