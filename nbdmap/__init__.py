"""nbdmap: the device mapper in user space, served over NBD."""
