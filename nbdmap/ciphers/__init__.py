"""Sector ciphers: what dm-crypt and LUKS encrypt sectors with, byte for byte.

    spec = CipherSpec.parse("aes-xts-plain64")
    cipher = SectorCipher(spec, key, sector_size=512)
    cipher.encrypt(sector, plaintext, ciphertext)

`spec` is the grammar and needs no library; `cipher` is the cipher itself (and loads numpy); `blocks` are the block ciphers,
`modes` chain blocks, `ivs` number sectors. Follows dm-reference b.2 and b.3; the vectors of b.6 are its tests.
"""
