"""nbdmap: the device mapper in user space, served over NBD."""

__version__ = "0.1.0"
