"""What became slower, and whether figures keep the bounds that are stated here.

``compare.py OLD NEW`` compares two files of results, or two folders; ``compare.py RESULTS`` holds
one against `BOUNDS`. What counts as noise: docs/benchmarks.md. Exit status 1 where anything became
slower than noise, failed or breaks a bound, 2 where there is nothing to compare.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

# Two runs of the same code on two shared cores: 1.6 to 5.5 % apart, whatever their rounds.
PROCESSES = 0.05
STANDARD_ERRORS = 3.0
# Of a median, against a mean's; and of the median absolute deviation, against a deviation.
MEDIAN_ERROR, MAD_TO_DEVIATION = 1.2533, 1.4826
RESULTS = Path(__file__).parent / "results"
OURS = "fasttrain"
Entries = Mapping[tuple[str, str, str, str], Mapping[str, Any]]
# Device and vectors. A newer processor that is held to AVX2 counts as one with AVX2.
ANY, AVX2, AMX = "*, AVX*", "*, AVX2", "*, AVX-512+AMX"


class Bound(NamedTuple):
    """What a figure must be, on the kinds of processor for which that is stated."""

    suite: str
    name: str  # of its benchmarks; * is any text
    figure: str
    rival: str = "*"  # where the figure has one for each
    least: float = 0.0
    most: float = math.inf
    kind: str = AVX2

    def values(self, entry: Mapping[str, Any]) -> dict[str, float]:
        """Return the figure for each rival; where ours stands beside them, relative to it."""
        if "failed" in entry:
            return {"failed": math.nan}
        found = entry.get(self.figure, {})
        if not isinstance(found, Mapping):
            return {self.figure: found}
        own = found.get(OURS, 1.0)
        return {k: v / own for k, v in found.items() if k != OURS and fnmatchcase(k, self.rival)}


BOUNDS = (
    Bound("busy", "alone", "speedup", least=1 / 1.03, kind=ANY),
    Bound("busy", "beside*", "share_of_best", least=0.85, kind=ANY),
    Bound("chars", "time_to_the_loss_of_nanogpt*", "speedup", least=8.0),
    Bound("chars", "time_to_the_loss_of_nanogpt*", "speedup", least=6.0, kind=AMX),
    Bound("checkpoint", "stall_of_a_save", "speedup", "plain copy", least=1 / 1.2),
    Bound("data", "random_windows", "speedup", "DataLoader", least=1.0),
    Bound("linear_cross_entropy", "peak_memory", "peak_bytes", "torch", least=8.0),
    Bound("prepare", "prepare*12*", "speedup", "encode_batch", least=2.0),
    Bound("prepare", "prepare*48*", "speedup", "encode_batch", least=4.0),
    Bound("prepare", "prepare", "speedup", "encode_batch", least=4.0),  # of before, 48 MB
    Bound("run-*", "*", "data_wait_ms", most=1.0),
    Bound("run-base", "base.toml", "wall_s", most=300.0),
    Bound("run-speedrun", "speedrun.toml", "wall_s", most=240.0),
    Bound("run-speedrun", "speedrun.toml", "val_bpb", most=1.30),
    Bound("startup", "first_step", "first_step_s", most=8.0),
    Bound("trainers", "*gpt2-chars*", "speedup", "nanoGPT", least=1.6),
    Bound("trainers", "*gpt2-chars*", "speedup", "nanoGPT", least=3.0, kind=AMX),
    Bound("trainers", "*llama-256*", "speedup", "nanoGPT", least=1.4),
    Bound("trainers", "*llama-256*", "speedup", "nanoGPT", least=4.2, kind=AMX),  # goal: 5
    Bound("trainers", "*llama-256*", "speedup", "[!n]*", least=1.25),
    Bound("trainers", "*llama-256*", "speedup", "[!n]*", least=2.0, kind=AMX),
    Bound("trainers", "trainers*", "speedup", least=1.0, kind=ANY),
)


class Change(NamedTuple):
    """How ours moved in one benchmark, as a fraction of its time (positive: slower)."""

    change: float
    noise: float
    verdict: str


def _logs(entry: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return for each rival the log of own time over its time: median over rounds and its error."""
    (ours, own), *others = entry["times_s"].items()
    # Not ours in another form, and what ran in every round.
    rivals = {k: v for k, v in others if not k.startswith(ours) and len(v) == len(own)}
    found = {}
    for name, theirs in (rivals or {"its own time alone": [1.0] * len(own)}).items():
        logs = [math.log(t / u) for t, u in zip(own, theirs, strict=True)]
        median = statistics.median(logs)
        deviation = MAD_TO_DEVIATION * statistics.median(abs(v - median) for v in logs)
        error = MEDIAN_ERROR * deviation / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
        found[name] = (median, error)
    return found


def change_of(old: Mapping[str, Any], new: Mapping[str, Any]) -> Change | None:
    """Compare two entries of one benchmark; None where they have no rival in common."""
    before, after = _logs(old), _logs(new) if new.get("times_s") else {}
    common = before.keys() & after.keys()
    if not common:
        return None
    change = math.expm1(statistics.median(after[k][0] - before[k][0] for k in common))
    # The rivals share our times, so that their errors do not average out.
    error = statistics.median(math.hypot(after[k][1], before[k][1]) for k in common)
    noise = math.hypot(STANDARD_ERRORS * error, PROCESSES)
    verdict = "same" if abs(change) <= noise else "SLOWER" if change > 0 else "faster"
    return Change(change, noise, verdict)


def entries_of(path: Path) -> Entries:
    """Return all entries of a file or a folder, by suite, device, kind of CPU and name."""
    paths = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    return {
        (d["suite"], d["machine"]["device"], d["machine"].get("isa", ""), entry["name"]): entry
        for d in (json.loads(p.read_text("utf-8")) for p in paths)
        for entry in d["benchmarks"]
    }


def print_bounds(entries: Entries) -> int:
    """Print which bounds the figures keep; return 1 where one does not, 2 where none has one."""
    kept: list[bool] = []
    for ((suite, device, isa, name), entry), bound in product(entries.items(), BOUNDS):
        found, wanted = (suite, f"{device}, {isa}", name), (bound.suite, bound.kind, bound.name)
        if all(map(fnmatchcase, found, wanted)):
            for rival, value in bound.values(entry).items():
                kept.append(bound.least <= value <= bound.most)
                limit = f">= {bound.least:.3g}" if bound.least else f"<= {bound.most:.3g}"
                verdict = f"{'keeps' if kept[-1] else 'BREAKS':6} {value:<8.3g} {limit:8}"
                print(verdict, f"{device}, {isa}  {suite} {name} {rival}")
    if not kept:
        print("error: no figure in these has a bound for its kind of processor", file=sys.stderr)
        return 2
    print(f"{len(kept)} figures with a bound, {kept.count(False)} break it")
    return 0 if all(kept) else 1


def print_changes(old: Entries, new: Entries) -> int:
    """Print what moved between two results; return 1 where it is bad, 2 where nothing is common."""
    n_compared, bad = 0, []
    for key, before in old.items():
        if not before.get("times_s"):
            continue
        now = new.get(key, {"skipped": "not in the new results"})
        label, verdict = f"{key[0]} {key[-1]}", "FAILED" if "failed" in now else "lost"
        if missing := [f"{why}: {now[why]}" for why in ("failed", "skipped") if why in now]:
            print(f"{verdict:7} {label}: {'; '.join(missing)}")
        elif change := change_of(before, now):
            n_compared, verdict = n_compared + 1, change.verdict
            print(f"{verdict:7} {change.change:+7.1%}  (noise {change.noise:.1%})  {label}")
        else:
            print(f"{verdict:7} {label}: no time in common")
        bad += [label] * (verdict in ("FAILED", "SLOWER"))
    if not n_compared and not bad:
        print("error: the two have no timed benchmark of one processor in common", file=sys.stderr)
        return 2
    print(f"{n_compared} compared, {len(bad)} slower than noise or failed", *bad, sep="\n  ")
    return 1 if bad else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    said = "a JSON file in benchmarks/results, or a folder (default: all files in that folder)"
    parser.add_argument("old", type=Path, nargs="?", default=RESULTS, help=said)
    parser.add_argument("new", type=Path, nargs="?", help="the same suites, measured later")
    arguments = parser.parse_args(argv)
    try:
        old = entries_of(arguments.old)
        if arguments.new is None:
            return print_bounds(old)
        return print_changes(old, entries_of(arguments.new))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"error: not results of the benchmarks: {error!r}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
