"""What became slower: ``python benchmarks/compare.py OLD.json NEW.json`` (or two folders of them);
and ``python benchmarks/compare.py RESULTS`` whether results keep the bounds that are stated here.

Ours is compared through its rivals where there are any: they ran in the same rounds, so a machine
that was slower that day cancels out. Per round the logarithm of own time over a rival's is taken;
the change is the difference of the medians of old and new, the median over the rivals. What counts
as noise is three standard errors of that difference, estimated from the spread over the rounds, and
5 % by which two processes differ. What has no rival has its own time alone, and the machine's load
in it.

Suites are compared with themselves on the same processor. Exit status 1 where anything became
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
Document = Mapping[str, Any]


class Bound(NamedTuple):
    """What a figure must be, on the kinds of processor for which that is stated."""

    suite: str
    name: str  # of its benchmarks; * is any text
    figure: str
    rival: str = "*"  # where the figure has one for each
    least: float = 0.0
    most: float = math.inf
    isas: tuple[str, ...] = ("AVX2",)  # or a newer CPU held to it

    def values(self, entry: Mapping[str, Any]) -> dict[str, float]:
        """Return the figure for each rival; where ours stands beside them, relative to it."""
        found = entry.get(self.figure, {})
        if not isinstance(found, Mapping):
            return {self.figure: found}
        own = found.get("fasttrain", 1.0)
        rivals = (key for key in found if key != "fasttrain" and fnmatchcase(key, self.rival))
        return {rival: found[rival] / own for rival in rivals}


AVX2, AMX = ("AVX2",), ("AVX-512+AMX",)
BOUNDS = (
    Bound("busy", "alone", "speedup", least=1 / 1.03, isas=AVX2 + AMX),
    Bound("busy", "beside*", "share_of_best", least=0.85, isas=AVX2 + AMX),
    Bound("chars", "time_to_the_loss_of_nanogpt*", "speedup", least=8.0),
    Bound("chars", "time_to_the_loss_of_nanogpt*", "speedup", least=6.0, isas=AMX),
    Bound("checkpoint", "stall_of_a_save", "speedup", "plain copy", least=1 / 1.2),
    Bound("checkpoint", "stall_of_a_save", "slowdown", most=1.1),
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
    # With AMX what was reached on 2026-11-23; the goals are 3, 5 and 2
    Bound("trainers", "*gpt2-chars*", "speedup", "nanoGPT", least=2.4, isas=AMX),
    Bound("trainers", "*llama-256*", "speedup", "nanoGPT", least=1.4),
    Bound("trainers", "*llama-256*", "speedup", "nanoGPT", least=3.3, isas=AMX),
    Bound("trainers", "*llama-256*", "speedup", "[!n]*", least=1.25),
    Bound("trainers", "*llama-256*", "speedup", "[!n]*", least=1.65, isas=AMX),
    Bound("trainers", "trainers*", "speedup", least=1.0, isas=AVX2 + AMX),
)


class Change(NamedTuple):
    """How ours moved in one benchmark; both numbers are fractions of its time."""

    change: float  # positive: slower
    noise: float

    @property
    def verdict(self) -> str:
        slower = "SLOWER" if self.change > 0 else "faster"
        return slower if abs(self.change) > self.noise else "same"


def _median_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and its standard error; infinite where one round says nothing of it."""
    median = statistics.median(values)
    if len(values) < 2:
        return median, math.inf
    deviation = MAD_TO_DEVIATION * statistics.median(abs(v - median) for v in values)
    return median, MEDIAN_ERROR * deviation / math.sqrt(len(values))


def _series(entry: Document) -> dict[str, list[float]]:
    """Return for each rival the log of own time over its time, by round; alone: of own time."""
    (ours, own), *others = entry["times_s"].items()
    # Not ours in another form, and what ran in every round.
    rivals = {k: v for k, v in others if not k.startswith(ours) and len(v) == len(own)}
    rivals = rivals or {"its own time alone": [1.0] * len(own)}
    return {
        name: [math.log(t / u) for t, u in zip(own, theirs, strict=True)]
        for name, theirs in rivals.items()
    }


def change_of(old: Document, new: Document) -> Change | None:
    """Compare two entries of one benchmark; None where they have no rival in common."""
    before, after = _series(old), _series(new)
    changes, errors = [], []
    for rival in before.keys() & after.keys():
        (was, error), (now, new_error) = map(_median_and_error, (before[rival], after[rival]))
        changes.append(now - was)
        errors.append(math.hypot(error, new_error))
    if not changes:
        return None
    # The rivals share our times, so that their errors do not average out.
    noise = math.hypot(STANDARD_ERRORS * statistics.median(errors), PROCESSES)
    return Change(math.expm1(statistics.median(changes)), noise)


def _entries(path: Path) -> dict[tuple[str, str, str, str], Document]:
    """Return all entries of a file or a folder, by suite, processor and name."""
    paths = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    return {
        (d["suite"], d["machine"]["device"], d["machine"].get("isa", ""), entry["name"]): entry
        for d in (json.loads(p.read_text("utf-8")) for p in paths)
        for entry in d["benchmarks"]
    }


def print_bounds(entries: Mapping[tuple[str, str, str, str], Document]) -> int:
    """Print which bounds the figures keep; return 1 where one does not, 2 where none has one."""
    kept: list[bool] = []
    for (key, entry), bound in product(entries.items(), BOUNDS):
        suite, device, isa, name = key
        if fnmatchcase(suite, bound.suite) and isa in bound.isas and fnmatchcase(name, bound.name):
            values = {"failed": math.nan} if "failed" in entry else bound.values(entry)
            for rival, value in values.items():
                kept.append(bound.least <= value <= bound.most)
                wanted = f">= {bound.least:.3g}" if bound.least else f"<= {bound.most:.3g}"
                verdict = f"{'keeps' if kept[-1] else 'BREAKS':6} {value:<8.3g} {wanted:8}"
                print(verdict, f"{device}, {isa}  {suite} {name} {rival}")
    if not kept:
        print("error: no figure in these has a bound for its kind of processor", file=sys.stderr)
        return 2
    print(f"{len(kept)} figures with a bound, {kept.count(False)} break it")
    return 0 if all(kept) else 1


def print_changes(old: Mapping[Any, Document], new: Mapping[Any, Document]) -> int:
    """Print what moved between two results; return 1 where it is bad, 2 where nothing is common."""
    n_compared, bad = 0, []
    for key, before in old.items():
        if not before.get("times_s"):
            continue
        now = new.get(key, {"skipped": "not in the new results"})
        label, why = (
            f"{key[0]} {key[-1]}",
            next((k for k in ("failed", "skipped") if now.get(k)), ""),
        )
        change = change_of(before, now) if not why and now.get("times_s") else None
        if change:
            n_compared += 1
            verdict = change.verdict
            print(f"{verdict:7} {change.change:+7.1%}  (noise {change.noise:.1%})  {label}")
        else:
            verdict = "FAILED" if why == "failed" else "lost"
            print(f"{verdict:7} {label}:", f"{why}: {now[why]}" if why else "no time in common")
        bad += [label] * (verdict in ("FAILED", "SLOWER"))
    if not n_compared and not bad:
        print("error: the two have no timed benchmark of one processor in common", file=sys.stderr)
        return 2
    print(f"{n_compared} compared, {len(bad)} slower than noise or failed", *bad, sep="\n  ")
    return 1 if bad else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Print the changes, or the bounds; return 1 where one is bad."""
    parser = argparse.ArgumentParser(
        description="What became slower between two results; of one alone, whether it keeps the "
        "bounds that are stated for its kind of processor."
    )
    parser.add_argument(
        "old", type=Path, nargs="?", default=RESULTS,
        help="a JSON file of benchmarks/results, or a folder; by default all that are there",
    )  # fmt: skip
    parser.add_argument("new", type=Path, nargs="?", help="the same suites, measured later")
    arguments = parser.parse_args(argv)
    try:
        old = _entries(arguments.old)
        if arguments.new is None:
            return print_bounds(old)
        return print_changes(old, _entries(arguments.new))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"error: not results of the benchmarks: {error!r}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
