"""The exception tree: every failure names the thing, the place and the reason, and knows its errno.

`errno` is the kernel's number for the same failure, so that `nbdmap` prints what `dmsetup` would and the NBD edge maps it to
one of the eight numbers of that protocol. The translation happens once, at the edge that talks to the client.
"""

import errno as _errno


class NbdmapError(Exception):
    """Base of all declared failures. `message` is one line for a human; `errno` is Linux's number."""

    errno: int = _errno.EIO
    stage: str = ""
    """Of a failed `create`: what dmsetup would have been doing (reload, resume), "" before the device was there."""
    number: str = ""
    """Of a failed `create`: the major:minor that the device would have had."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class IoFailed(NbdmapError):
    """An I/O request failed. The errno is the device's own, EIO unless it said another."""

    def __init__(self, message: str, errno: int = _errno.EIO) -> None:
        super().__init__(message)
        self.errno = errno


class InvalidArgument(NbdmapError):
    """A table, message, verb or configuration says something that cannot be."""

    errno = _errno.EINVAL


class NotFound(NbdmapError):
    """A path, export or key that is named does not exist."""

    errno = _errno.ENOENT


class NoSuchDevice(NbdmapError):
    """No mapped device has this name, uuid or number."""

    errno = _errno.ENXIO


class Busy(NbdmapError):
    """The name is taken or the device is open."""

    errno = _errno.EBUSY


class AccessRefused(NbdmapError):
    """A read-only thing was asked to be writable."""

    errno = _errno.EACCES


class PassphraseRefused(NbdmapError):
    """A passphrase that opens no key slot."""

    errno = _errno.EKEYREJECTED


class NoKey(NbdmapError):
    """There is no key where one is needed."""

    errno = _errno.ENOKEY


class Unsupported(NbdmapError):
    """The device below cannot do this operation."""

    errno = _errno.EOPNOTSUPP


class Exists(NbdmapError):
    """What is to be made is there already."""

    errno = _errno.EEXIST


class NoData(NbdmapError):
    """The metadata has nothing under the number that was named."""

    errno = _errno.ENODATA


class NotPermitted(NbdmapError):
    """The mode that was asked for forbids it."""

    errno = _errno.EPERM


class Requeue(NbdmapError):
    """Not a failure: a request that a target hands back while its device is being held, to run when it is let in again."""

    errno = _errno.EAGAIN


class TooLarge(NbdmapError):
    """A number or a request exceeds its limit."""

    errno = _errno.EOVERFLOW


class ProtocolError(NbdmapError):
    """The NBD peer broke the protocol; the connection cannot go on."""

    errno = _errno.EPROTO


class NotReady(NbdmapError):
    """Something has to be done first."""

    errno = _errno.EAGAIN


class CorruptMetadata(NbdmapError):
    """Data read from a disk breaks an invariant; the message names the block and the invariant."""

    errno = _errno.EILSEQ


class OutOfSpace(NbdmapError):
    """A device or a space map has no free block left."""

    errno = _errno.ENOSPC


def from_os_error(error: OSError, what: str) -> IoFailed:
    """Translates an OSError met while doing `what` ("read of /srv/a.img at 4096") and keeps its errno."""
    return IoFailed(f"{what}: {error.strerror or error}", error.errno or _errno.EIO)
