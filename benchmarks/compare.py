"""What became slower: ``python benchmarks/compare.py OLD.json NEW.json`` (or two folders of them).

Ours is compared through its rivals where there are any: they ran in the same rounds, so a machine
that was slower that day cancels out. Per round the logarithm of own time over a rival's is taken;
the change is the difference of the medians of old and new, the median over the rivals. What counts
as noise is three standard errors of that difference, estimated from the spread over the rounds, and
at least 2 %. Exit status 1 where anything is slower than that, 2 where nothing can be compared.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LEAST = 0.02  # below, differences are the layout of code and data in memory
STANDARD_ERRORS = 3.0
# Of a median, against a mean's; and of the median absolute deviation, against a deviation.
MEDIAN_ERROR, MAD_TO_DEVIATION = 1.2533, 1.4826
VERSIONS = ("device", "torch", "triton", "threads", "python")


class Change(NamedTuple):
    """How ours moved in one benchmark; both numbers are fractions of its time."""

    name: str
    change: float  # positive: slower
    noise: float

    @property
    def verdict(self) -> str:
        """Say what the change means."""
        if abs(self.change) <= self.noise:
            return "same"
        return "SLOWER" if self.change > 0 else "faster"


def _median_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and its standard error; infinite where one round says nothing of it."""
    median = statistics.median(values)
    if len(values) < 2:
        return median, math.inf
    deviation = MAD_TO_DEVIATION * statistics.median(abs(v - median) for v in values)
    return median, MEDIAN_ERROR * deviation / math.sqrt(len(values))


def _series(entry: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return for each rival the log of own time over its time, by round; alone: of own time."""
    ours, *others = entry["times_s"]
    own = entry["times_s"][ours]
    # Not ours in another form, and what ran in every round.
    rivals = [
        name
        for name in others
        if not name.startswith(ours) and len(entry["times_s"][name]) == len(own)
    ]
    if not rivals:
        return {"": [math.log(t) for t in own]}
    return {
        name: [math.log(t / u) for t, u in zip(own, entry["times_s"][name], strict=True)]
        for name in rivals
    }


def change_of(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Change | None:
    """Compare two entries of one benchmark; None where they have no rival in common."""
    before, after = _series(old), _series(new)
    changes, errors = [], []
    for rival in before.keys() & after.keys():
        (old_median, old_error), (new_median, new_error) = (
            _median_and_error(series[rival]) for series in (before, after)
        )
        changes.append(new_median - old_median)
        errors.append(math.hypot(old_error, new_error))
    if not changes:
        return None
    # The rivals share our times, so that their errors do not average out.
    noise = max(STANDARD_ERRORS * statistics.median(errors), LEAST)
    return Change(name, math.expm1(statistics.median(changes)), noise)


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Return the changes of all benchmarks that both documents timed."""
    before, after = (
        {entry["name"]: entry for entry in document["benchmarks"] if entry.get("times_s")}
        for document in (old, new)
    )
    changes = (change_of(name, before[name], after[name]) for name in before if name in after)
    return [change for change in changes if change is not None]


def _pairs(old: Path, new: Path) -> Iterator[tuple[Path, Path]]:
    if not old.is_dir():
        yield old, new
        return
    for path in sorted(old.glob("*.json")):
        if (new / path.name).exists():
            yield path, new / path.name


def main(argv: Sequence[str] | None = None) -> int:
    """Print the changes; return 1 where something became slower than noise."""
    parser = argparse.ArgumentParser(description="What became slower between two results.")
    parser.add_argument("old", type=Path, help="a JSON file of benchmarks/results, or a folder")
    parser.add_argument("new", type=Path, help="the same suite or suites, measured later")
    arguments = parser.parse_args(argv)
    slower = n_compared = 0
    try:
        for old_path, new_path in _pairs(arguments.old, arguments.new):
            old, new = (json.loads(p.read_text("utf-8")) for p in (old_path, new_path))
            for key in VERSIONS:
                was, now = (document["machine"].get(key) for document in (old, new))
                if was != now:
                    print(f"{old['suite']}: {key} was {was}, is {now}")
            for name, change, noise in (found := compare(old, new)):
                verdict = Change(name, change, noise).verdict
                label = f"{old['suite']} {name}"
                print(f"{verdict:7} {change:+7.1%}  (noise {noise:.1%})  {label}")
                slower += verdict == "SLOWER"
            n_compared += len(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: not two results of the benchmarks: {error!r}", file=sys.stderr)
        return 2
    if not n_compared:
        print("error: the two have no timed benchmark in common", file=sys.stderr)
        return 2
    print(f"{n_compared} compared, {slower} slower than noise")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
