"""Benchmarks: nbdmap beside the established NBD servers on the same file, in one run. See bench/README.md."""
