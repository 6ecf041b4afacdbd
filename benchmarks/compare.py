"""What became slower: ``python benchmarks/compare.py OLD.json NEW.json`` (or two folders of them).

Ours is compared through its rivals where there are any: they ran in the same rounds, so a machine
that was slower that day cancels out. Per round the logarithm of own time over a rival's is taken;
the change is the difference of the medians of old and new, the median over the rivals. What counts
as noise is three standard errors of that difference, estimated from the spread over the rounds, and
5 % by which two processes differ. Still: measure old and new on a machine in the same state. What
has no rival in common has its own time alone, and the machine's load in it.

Folders may hold those of several devices: suites are compared with themselves on the same device.
What is missing, skipped or failed in the new results is named. Exit status 1 where anything became
slower than noise or failed, 2 where nothing can be compared.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Two runs of the same code on two shared cores: 1.6 to 5.5 % apart, whatever their rounds.
PROCESSES = 0.05
STANDARD_ERRORS = 3.0
ALONE = ""  # the rival of what has none
# Of a median, against a mean's; and of the median absolute deviation, against a deviation.
MEDIAN_ERROR, MAD_TO_DEVIATION = 1.2533, 1.4826
VERSIONS = ("torch", "triton", "threads", "python")
Document = Mapping[str, Any]


class Change(NamedTuple):
    """How ours moved in one benchmark; both numbers are fractions of its time."""

    name: str
    change: float  # positive: slower
    noise: float
    rivals: int  # through how many it was compared

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
        return {ALONE: [math.log(t) for t in own]}
    return {
        name: [math.log(t / u) for t, u in zip(own, entry["times_s"][name], strict=True)]
        for name in rivals
    }


def change_of(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Change | None:
    """Compare two entries of one benchmark; None where they have no rival in common."""
    before, after = _series(old), _series(new)
    changes, errors = [], []
    common = before.keys() & after.keys()
    for rival in common:
        (old_median, old_error), (new_median, new_error) = (
            _median_and_error(series[rival]) for series in (before, after)
        )
        changes.append(new_median - old_median)
        errors.append(math.hypot(old_error, new_error))
    if not changes:
        return None
    # The rivals share our times, so that their errors do not average out.
    noise = math.hypot(STANDARD_ERRORS * statistics.median(errors), PROCESSES)
    change = math.expm1(statistics.median(changes))
    return Change(name, change, noise, len(common - {ALONE}))


def compare(old: Document, new: Document) -> tuple[list[Change], dict[str, str]]:
    """Return the changes of what both documents timed; and what only the old one did: why."""
    after = {entry["name"]: entry for entry in new["benchmarks"]}
    changes, lost = [], {}
    for before in old["benchmarks"]:
        name = before["name"]
        if not before.get("times_s"):
            continue
        now = after.get(name, {"skipped": "not in the new results"})
        if now.get("failed") or not now.get("times_s"):
            reasons = (f"{key}: {now[key]}" for key in ("failed", "skipped") if now.get(key))
            lost[name] = next(reasons, "has no times")
        elif (change := change_of(name, before, now)) is None:
            lost[name] = "has no rival in common"
        else:
            changes.append(change)
    return changes, lost


def _documents(path: Path) -> dict[tuple[str, str], Document]:
    """Return a file, or every file below a folder, by suite and device."""
    paths = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    documents = [json.loads(p.read_text("utf-8")) for p in paths]
    return {(d["suite"], d["machine"]["device"]): d for d in documents}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the changes; return 1 where something became slower than noise."""
    parser = argparse.ArgumentParser(description="What became slower between two results.")
    parser.add_argument("old", type=Path, help="a JSON file of benchmarks/results, or a folder")
    parser.add_argument("new", type=Path, help="the same suite or suites, measured later")
    arguments = parser.parse_args(argv)
    n_compared, bad = 0, []
    try:
        old, new = _documents(arguments.old), _documents(arguments.new)
        common = [key for key in old if key in new]
        for text in sorted({text for key in common for text in _versions(old[key], new[key])}):
            print(text)
        for key in common:
            changes, lost = compare(old[key], new[key])
            for change in changes:
                label = f"{key[0]} {change.name}"
                alone = "" if change.rivals else ", no rival: the machine's load is in it"
                noise = f"{change.noise:.1%}" if change.noise < math.inf else "unknown"
                figures = f"{change.verdict:7} {change.change:+7.1%}  (noise {noise})"
                print(f"{figures}  {label}{alone}")
                bad += [label] * (change.verdict == "SLOWER")
            for name, reason in lost.items():
                failed = reason.startswith("failed")
                print(f"{'FAILED' if failed else 'lost':7} {key[0]} {name}: {reason}")
                bad += [f"{key[0]} {name}"] * failed
            n_compared += len(changes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"error: not two results of the benchmarks: {error!r}", file=sys.stderr)
        return 2
    if absent := sorted(suite for suite, device in old.keys() - new.keys()):
        print("lost    not measured again:", ", ".join(absent))
    if not n_compared and not bad:
        print("error: the two have no timed benchmark of one device in common", file=sys.stderr)
        return 2
    print(f"{n_compared} compared, {len(bad)} slower than noise or failed", *bad, sep="\n  ")
    return 1 if bad else 0


def _versions(old: Document, new: Document) -> list[str]:
    return [
        f"{key} was {was}, is {now}"
        for key in VERSIONS
        if (was := old["machine"].get(key)) != (now := new["machine"].get(key))
    ]


if __name__ == "__main__":
    sys.exit(main())
