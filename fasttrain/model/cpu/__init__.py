"""Attention and blocks in C++ for a CPU."""
