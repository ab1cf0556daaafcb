"""The commands of `nbdmap luks` that write: format, add-key and remove-key."""

import argparse
import os
import uuid

from nbdmap.cli.errors import CommandFailed, UsageError
from nbdmap.cli.luks_secrets import confirmed, key_file, new_key, old_key, unlock
from nbdmap.errors import InvalidArgument, PassphraseRefused
from nbdmap.luks import area, luks1, luks2, volume
from nbdmap.luks.image import FileImage
from nbdmap.luks.keyslot import MAX_KEY
from nbdmap.luks.luks1 import Luks1, Wanted1
from nbdmap.luks.luks2 import Wanted2
from nbdmap.luks.measure import DIGEST_TIME_MS, MIN_ITERATIONS, Cost, choose_kdf, pbkdf2_iterations
from nbdmap.luks.secret import wipe, wiping
from nbdmap.units import SECTOR

LARGE_SECTOR = 4096


def _cost(args: argparse.Namespace, version: int, hash_name: str) -> Cost:
    kind = args.pbkdf or ("pbkdf2" if version == 1 else "argon2id")
    if version == 1 and kind != "pbkdf2":
        raise UsageError("LUKS1 has pbkdf2 only")
    cost = Cost(kind, hash_name, args.iter_time, args.pbkdf_memory, args.pbkdf_parallel, args.pbkdf_force_iterations)
    try:
        cost.check()
    except InvalidArgument as error:
        raise UsageError(error.message) from None
    return cost


def make(args: argparse.Namespace) -> int:
    """format: a new header with one key slot; everything that can be refused is, before anything is written."""
    version = 1 if args.type == "luks1" else 2
    cost = _cost(args, version, args.hash)
    bits = args.key_size or (512 if "-xts-" in args.cipher else 256)
    if bits % 8 or not 0 < bits // 8 <= MAX_KEY:
        raise UsageError(f"--key-size {bits}: should be a multiple of 8 up to {8 * MAX_KEY}")
    if version == 1 and (args.label or args.subsystem or args.sector_size not in (None, SECTOR) or args.keyslot_cipher):
        raise UsageError("LUKS1 has no label, subsystem, sector size, or cipher of the key slot")
    area.check(args.cipher, bits // 8)
    area_bits = args.keyslot_key_size or bits
    area.check(args.keyslot_cipher or args.cipher, area_bits // 8)
    where = args.header or args.image
    detached = args.header is not None
    with (
        FileImage(where, write=True, create=detached, alone=True) as image,
        wiping(_volume_key(args, bits // 8)) as key,
    ):
        data_size = _size(args.image) if detached else image.size
        header = _header(args, version, image, data_size, key)
        volume.data_size(header.segment(), args.image, data_size, detached=detached)
        if not args.batch_mode and not confirmed(f"This will overwrite data on {where} irrevocably."):
            raise CommandFailed("Operation aborted.")
        with wiping(new_key(args.key_file, args.keyfile_size, args.keyfile_offset, where)) as passphrase:
            kdf = choose_kdf(cost, area_bits // 8)
            header.erase()
            if isinstance(header, Luks1):
                header.add_key(key, passphrase, kdf, args.key_slot or 0)
            else:
                chosen = luks2.AreaChoice(args.hash, args.keyslot_cipher or args.cipher, area_bits // 8)
                header.add_key(key, passphrase, kdf, args.key_slot or 0, chosen)
    return 0


def _size(path: str) -> int:
    with FileImage(path) as data:
        return data.size


def _header(args: argparse.Namespace, version: int, image: FileImage, data_size: int, key: bytearray) -> volume.Header:
    """What is to be, not yet written."""
    iterations = MIN_ITERATIONS
    if not args.pbkdf_force_iterations:
        iterations = pbkdf2_iterations(args.hash, luks1.DIGEST_SIZE, DIGEST_TIME_MS)
    try:
        name = str(uuid.UUID(args.uuid)) if args.uuid else str(uuid.uuid4())
    except ValueError:
        raise UsageError(f"--uuid {args.uuid}: is not a uuid") from None
    offset = None if args.offset is None else args.offset * SECTOR
    detached = args.header is not None
    if version == 1:
        return luks1.create(image, Wanted1(args.cipher, len(key), args.hash, name, iterations, offset, detached), key)
    sector_size = args.sector_size or (SECTOR if data_size % LARGE_SECTOR or (offset or 0) % LARGE_SECTOR else LARGE_SECTOR)
    wanted = Wanted2(
        args.cipher, sector_size, args.hash, name, args.label, args.subsystem, iterations, args.luks2_metadata_size,
        args.luks2_keyslots_size, offset, detached,
    )  # fmt: skip
    return luks2.create(image, wanted, key)


def _volume_key(args: argparse.Namespace, size: int) -> bytearray:
    """A random one, or that of --volume-key-file."""
    if args.volume_key_file is None:
        return bytearray(os.urandom(size))
    key = key_file(args.volume_key_file)
    if len(key) != size:
        wipe(key)
        raise InvalidArgument(f"{args.volume_key_file} should have the {size} bytes of the volume key")
    return key


def add_key(args: argparse.Namespace) -> int:
    """Another passphrase for the same volume key."""
    with FileImage(args.header or args.image, write=True) as image:
        header = volume.read(image)
        cost = _cost(args, header.version, header.hash if isinstance(header, Luks1) else args.hash)
        with wiping(_known_key(args, header)) as key:
            size, offset = args.new_keyfile_size, args.new_keyfile_offset
            with wiping(new_key(args.new_key_file, size, offset, image.name, "new ")) as passphrase:
                kdf = choose_kdf(cost, len(key))
                if isinstance(header, Luks1):
                    header.add_key(key, passphrase, kdf, args.key_slot)
                else:
                    header.add_key(key, passphrase, kdf, args.key_slot, luks2.AreaChoice(args.hash))
    return 0


def _known_key(args: argparse.Namespace, header: volume.Header) -> bytearray:
    """The volume key, by an old passphrase or from its file. Raises PassphraseRefused."""
    if args.volume_key_file is None:
        return unlock(args, header, None, "any existing passphrase").key
    key = key_file(args.volume_key_file)
    if not header.is_key(key):
        wipe(key)
        raise PassphraseRefused(f"{args.volume_key_file} is not the volume key of {header.image.name}")
    return key


def remove_key(args: argparse.Namespace) -> int:
    """Destroys the key slot of a passphrase, or one that is named if another passphrase is known."""
    with FileImage(args.header or args.image, write=True) as image:
        header = volume.read(image)
        if args.key_slot is None:
            slot = _slot_to_remove(args, header)
        else:
            slot = args.key_slot
            header.check_slot(slot)
            if not args.batch_mode:
                _prove_another(args, header, slot)
        if len(header.slots) == 1 and not args.batch_mode and not confirmed(
            "This is the last key slot. Without it the data is lost for ever."
        ):  # fmt: skip
            raise CommandFailed("Operation aborted.")
        header.remove_key(slot)
    return 0


def _slot_to_remove(args: argparse.Namespace, header: volume.Header) -> int:
    if args.old_key_file is not None:
        passphrase = key_file(args.old_key_file, args.keyfile_size, args.keyfile_offset)
    else:
        passphrase = old_key(args, "the passphrase to be removed")
    with wiping(passphrase):
        unlocked = header.unlock(passphrase)
    wipe(unlocked.key)
    return unlocked.slot


def _prove_another(args: argparse.Namespace, header: volume.Header, slot: int) -> None:
    """So that nobody locks himself out by a mistake; of the last slot it is its own. Raises PassphraseRefused."""
    with wiping(old_key(args, "any remaining passphrase")) as passphrase:
        unlocked = header.unlock(passphrase, without=slot if len(header.slots) > 1 else None)
        wipe(unlocked.key)


