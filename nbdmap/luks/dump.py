"""What a header says, for people: the text of `cryptsetup luksDump`, word for word, which scripts read."""

from collections.abc import Iterator

from nbdmap.luks.kdf import MAX_SALT, U32, Pbkdf2
from nbdmap.luks.keyslot import IGNORED, PREFERRED, KeySlot
from nbdmap.luks.luks1 import ENABLED, Luks1
from nbdmap.luks.luks2 import Luks2
from nbdmap.luks.metadata import Node
from nbdmap.luks.volume import Header

_ROW = 16
"""Bytes of a salt on one line."""


def dump(header: Header) -> str:
    """The whole text."""
    lines = _luks1(header) if isinstance(header, Luks1) else _luks2(header)
    return "".join(f"{_harmless(line)}\n" for line in lines)


def _harmless(line: str) -> str:
    """With what is no printable character, but for tabs, as an escape: a header's texts are anybody's."""
    return "".join(one if one.isprintable() or one == "\t" else repr(one)[1:-1] for one in line)


def _hex(what: str, data: bytes, indent: str) -> Iterator[str]:
    """`what` and the bytes in rows, all but the first of which begin with `indent`."""
    for start in range(0, len(data), _ROW):
        yield (indent if start else what) + "".join(f"{byte:02x} " for byte in data[start : start + _ROW])


def _luks1(header: Luks1) -> Iterator[str]:
    fields = header.header
    name, _, mode = header.encryption.partition("-")
    yield f"LUKS header information for {header.image.name}"
    yield ""
    yield "Version:       \t1"
    yield f"Cipher name:   \t{name}"
    yield f"Cipher mode:   \t{mode}"
    yield f"Hash spec:     \t{header.hash}"
    yield f"Payload offset:\t{fields.payload_sectors}"
    yield f"MK bits:       \t{fields.key_size * 8}"
    yield "MK digest:     \t" + "".join(f"{byte:02x} " for byte in fields.digest)
    yield from _hex("MK salt:       \t", fields.digest_salt, "               \t")
    yield f"MK iterations: \t{fields.digest_iterations}"
    yield f"UUID:          \t{header.uuid}"
    yield ""
    for number, entry in enumerate(header.entries):
        yield f"Key Slot {number}: {'ENABLED' if entry.active == ENABLED else 'DISABLED'}"
        if entry.active == ENABLED:
            yield f"\tIterations:         \t{entry.iterations}"
            yield from _hex("\tSalt:               \t", entry.salt, "\t                      \t")
            yield f"\tKey material offset:\t{entry.start_sectors}"
            yield f"\tAF stripes:            \t{entry.stripes}"


def _luks2(header: Luks2) -> Iterator[str]:
    content = header.metadata
    yield "LUKS header information"
    yield "Version:       \t2"
    yield f"Epoch:         \t{header.header.seqid}"
    yield f"Metadata area: \t{header.header.size} [bytes]"
    yield f"Keyslots area: \t{content.keyslots_size} [bytes]"
    yield f"UUID:          \t{header.uuid or '(no UUID)'}"
    yield f"Label:         \t{header.label or '(no label)'}"
    yield f"Subsystem:     \t{header.subsystem or '(no subsystem)'}"
    yield "Flags:       \t" + ("".join(f"{flag} " for flag in content.flags) or "(no flags)")
    if content.requirements:
        yield "Requirements:\t" + "".join(f"{name} " for name in content.requirements)
    yield ""
    yield "Data segments:"
    for number, node in content.segments.items():
        yield from _segment(number, node)
    yield "Keyslots:"
    for number in content.keyslots:
        yield from _keyslot(header, number)
    yield "Tokens:"
    for number, node in content.tokens.items():
        yield f"  {number}: {node.text('type')}"
        if node.text("type") == "luks2-keyring":
            yield f"\tKey description: {node.text('key_description')}"
        for name in node.names("keyslots"):
            yield f"\tKeyslot:    {name}"
    yield "Digests:"
    for number, node in content.digests.items():
        yield f"  {number}: {node.text('type')}"
        if node.text("type") == "pbkdf2":
            yield f"\tHash:       {node.text('hash')}"
            yield f"\tIterations: {node.number('iterations', 1, U32)}"
            for what in ("salt", "digest"):
                yield from _hex(f"\t{what.title() + ':':<12}", node.binary(what, MAX_SALT), "\t            ")


def _segment(number: int, node: Node) -> Iterator[str]:
    size = node.plain.get("size")
    yield f"  {number}: {node.text('type')}"
    yield f"\toffset: {node.long('offset')} [bytes]"
    yield "\tlength: " + ("(whole device)" if size == "dynamic" else f"{size} [bytes]")
    if node.text("type") == "crypt":
        yield f"\tcipher: {node.text('encryption')}"
        yield f"\tsector: {node.plain.get('sector_size')} [bytes]"
    if "integrity" in node.plain:
        yield f"\tintegrity: {node.node('integrity').text('type')}"
    if flags := node.names("flags"):
        yield f"\tflags : {', '.join(flags)}"
    yield ""


def _keyslot(header: Luks2, number: int) -> Iterator[str]:
    content = header.metadata
    digests = [one for one, node in content.digests.items() if str(number) in node.names("keyslots")]
    bound = any(content.digests[one].names("segments") for one in digests)
    yield f"  {number}: {content.keyslots[number].text('type')}" + ("" if bound or not digests else " (unbound)")
    slot = content.slots.get(number)
    if slot is None:
        yield f"\t({content.unusable[number]})"
    else:
        yield from _slot(slot)
    start, end = content.area(number)
    yield f"\tArea offset:{start} [bytes]"
    yield f"\tArea length:{end - start} [bytes]"
    for one in digests:
        yield f"\tDigest ID:  {one}"


def _slot(slot: KeySlot) -> Iterator[str]:
    yield f"\tKey:        {slot.key_size * 8} bits"
    yield "\tPriority:   " + ("ignored" if slot.priority == IGNORED else "preferred" if slot.priority == PREFERRED else "normal")
    yield f"\tCipher:     {slot.encryption}"
    yield f"\tCipher key: {slot.area_key_size * 8} bits"
    if isinstance(slot.kdf, Pbkdf2):
        yield "\tPBKDF:      pbkdf2"
        yield f"\tHash:       {slot.kdf.hash}"
        yield f"\tIterations: {slot.kdf.iterations}"
    else:
        yield f"\tPBKDF:      {slot.kdf.kind}"
        yield f"\tTime cost:  {slot.kdf.time}"
        yield f"\tMemory:     {slot.kdf.memory_kib}"
        yield f"\tThreads:    {slot.kdf.lanes}"
    yield from _hex("\tSalt:       ", slot.kdf.salt, "\t            ")
    yield f"\tAF stripes: {slot.stripes}"
    yield f"\tAF hash:    {slot.af_hash}"
