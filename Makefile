.PHONY: check test quick record-slow bench bench-results report gpu gpu-dry

PYTHON ?= python3
# Also uninstalled, and with whatever the caller has on the path.
gpu gpu-dry report bench-results: export PYTHONPATH := .:kernels$(if $(PYTHONPATH),:$(PYTHONPATH))

check:
	ruff check . && ruff format --check .
	mypy

test:
	pytest

quick: # what to run at each save: one process, a minute
	pytest -m quick

record-slow: # what quick leaves out, measured; kept in tests/slow.txt
	pytest --record-slow

bench:
	pytest benchmarks/ --benchmark-only

bench-results: # longer, with whole runs of base.toml and speedrun.toml, kept in benchmarks/results
	$(PYTHON) -m pytest benchmarks/ --benchmark-only --full --results benchmarks/results
	$(PYTHON) -m benchmarks.report

report: # the parts of the pages that are generated: from benchmarks/results and from code
	$(PYTHON) -m benchmarks.report

gpu: # tests and benchmarks on a GPU within nine minutes; without one, a rehearsal
	$(PYTHON) -m benchmarks.gpu

gpu-dry: # what every config launches on an H100 and moves there, compiled without one; kept
	$(PYTHON) -m benchmarks.gpu_dry --results benchmarks/results
	$(PYTHON) -m benchmarks.report
