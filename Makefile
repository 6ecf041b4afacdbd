.PHONY: check test bench

check:
	ruff check . && ruff format --check .
	mypy

test:
	pytest

bench: # in one process: a second one would disturb the times
	pytest benchmarks/ --benchmark-only -n 0
