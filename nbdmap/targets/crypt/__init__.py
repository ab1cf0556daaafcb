"""crypt: a device whose sectors are encrypted on their way down (Documentation device-mapper/crypt, dm-reference b).

`parameters` is the table line, `keys` where keys come from, `target` the target; the ciphers are those of nbdmap.ciphers.
"""
