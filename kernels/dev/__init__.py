"""Tools for those who work on the kernels: not part of the distribution."""
