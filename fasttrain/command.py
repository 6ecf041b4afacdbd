"""What all commands share: exit statuses, and output without secrets. Standard library only."""

import argparse
import base64
import contextlib
import errno
import functools
import importlib.util
import json
import math
import os
import re
import select
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec
from urllib.parse import quote, unquote

from fasttrain.config import UserError
from fasttrain.printing import say

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: can be resumed
EXIT_INTERRUPTED, EXIT_NOT_READ = 130, 141  # as shells show an end by SIGINT, and by SIGPIPE
# How often an OpenMP thread that waits looks again before it sleeps; GCC's own 300,000 keep the
# core from other processes. base.toml in bf16 on two cores of a Xeon with AMX (torch 2.13), medians
# of six rounds: alone 43.1k tokens/s with GCC's and 42.1k with this; beside two busy processes
# 15.2k with this, 16.3k in one thread, 16.5k without spinning, which alone costs a quarter. A run
# stops spinning while others use its cores: `fasttrain.device.CoreWatch`.
SPINS = "10000"
_OUT_OF_MEMORY = (
    "lower train.micro_batch (with train.tokens_per_step set the loss stays the same), let "
    'train.micro_batch="auto" choose it, or set train.activation_checkpointing=full'
)
# Errors of the system of which the name of a file or folder is the cause.
_OF_NAMES = {
    *(errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENXIO, errno.EILSEQ),
}
# Errors of a disk, and their remedies.
DISK_REMEDIES = {
    errno.ENOSPC: "free some space on this disk",
    errno.EDQUOT: "raise the disk quota or free some space",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EIO: "check the disk",
}
P = ParamSpec("P")


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Print what a command raises, without secrets, and return its exit status.

    A `UserError` is one line and status 2, and so are a name that the system refuses and a full
    disk; Ctrl-C is one and 130, any other exception a traceback and status 1. If the reader of its
    output has gone, as after ``| head``, it ends silently.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        _open_closed_streams()
        with contextlib.suppress(AttributeError):  # a replaced stdout may lack it
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported
            os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors on a CPU
        try:
            status = main(*args, **kwargs)
            sys.stdout.flush()
            return status
        except UserError as error:
            return _refused(error)
        except KeyboardInterrupt as error:
            tell(f"\ninterrupted{error}")
            return EXIT_INTERRUPTED
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads(out := sys.stdout.fileno()):
                os.dup2(os.open(os.devnull, os.O_WRONLY), out)
                return EXIT_NOT_READ
            if isinstance(error, OSError) and error.filename and error.errno in _OF_NAMES:
                named = os.fsdecode(error.filename)
                return _refused(UserError(f"{named}: {error.strerror}; name another place"))
            if isinstance(error, OSError) and (remedy := DISK_REMEDIES.get(error.errno or 0)):
                named = f"{os.fsdecode(error.filename)}: " if error.filename else ""
                return _refused(UserError(f"{named}{error.strerror}; {remedy}"))
            rank = os.environ.get("RANK")
            shown = traceback.format_exc().rstrip("\n")
            if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
                shown = f"error: {error}\n{_OUT_OF_MEMORY}"
            record(shown)
            tell(f"rank {rank}: {shown}" if rank else shown)
            return EXIT_FAILED

    return run


def _open_closed_streams() -> None:
    """Lead standard streams that were closed, as by ``>&-``, to the null device.

    Else the next files that are opened would have their numbers, and receive what C code prints.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        mode = "w" if number else "r"
        setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _refused(error: UserError) -> int:
    if not record(f"error: {error}") or os.environ.get("RANK") == "0":
        tell(f"error: {error}")
    return EXIT_BAD_INPUT


def _nobody_reads(file: int) -> bool:
    poll = select.poll()
    poll.register(file, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def record(text: str) -> bool:
    """Have torchrun's summary of a failed job show this; return whether it will."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            # torchrun may end this rank meanwhile, and itself fails on a file that is half written.
            with open(f"{file}.part", "w", encoding="utf-8") as part:
                json.dump({"message": redact(text), "timestamp": int(time.time())}, part)
            os.replace(f"{file}.part", file)
            return True
    return False


def check_system() -> None:
    """Refuse Windows, which lacks the file locks, reads and signals that runs and datasets need."""
    if importlib.util.find_spec("fcntl") is None:
        others = "fasttrain.Trainer and fasttrain_kernels work here too"
        raise UserError(f"this command needs Linux or macOS (on Windows: WSL); {others}")


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: by its affinity and by its control groups.

    A quota of 1.5 cores, as by ``docker run --cpus 1.5``, counts as two.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = float(cores or 1)
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            files = ["cpu.cfs_quota_us", "cpu.cfs_period_us"] if controllers else ["cpu.max"]
            groups = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            for group in (groups / path[1:], *(groups / path[1:]).parents):
                with contextlib.suppress(OSError, ValueError):  # "max" or -1: no limit
                    text = " ".join((group / name).read_text() for name in files)
                    used, period = map(int, text.split())
                    quota = min(quota, used / period if used > 0 else quota)
    return max(1, math.ceil(quota))


def make_parser(name: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """Return the parser of a command's arguments; its usage names the script or the module."""
    by_script = Path(sys.argv[0]).stem == "fasttrain"
    prog = f"fasttrain {name}" if by_script else f"python -m fasttrain.{name}"
    return argparse.ArgumentParser(prog=prog, description=description, **options)


def tell(text: str) -> None:
    """Print text to standard error, without secrets and control characters."""
    say(redact(text), stream=sys.stderr)


# A variable's name is split at what is no letter and where the case changes: none of these words is
# in TOKENIZER_DIR, KEYBOARD or XAUTHORITY.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_TELLING = re.compile(
    r"(?i)(?:\w*(?:passwd|password|passphrase|secret|token|credential)|(?:ssh)?pass|pwd|pin|auth"
    r"|authorization|bearer|cookie|jwt|(?:api|access|private)?key)s?"
)
# The last word of a name says that its value is a path, or with the first one a count of tokens.
_OF_PATHS = re.compile(r"(?i)\w*(?:path|file|dir|folder|directory)s?|sock")
_OF_COUNTS = re.compile(
    r"(?i)tokens|number|count|limit|budget|size|length|len|rate|timeout|ttl|age|seconds|days|bits"
)
_COUNTING = re.compile(r"(?i)n|num|max|min")
_SHORTEST = 8  # characters of a secret: shorter ones are words that occur anywhere
_LONGEST_WORD = 11  # of letters in one case: such as interactive, certificate
_WINDOWS_PATH = re.compile(r"[A-Za-z]:\\[\w .\\-]*")
_NUMBER = re.compile(r"[-+]?[\d_,. ]*\d(?:[eE][-+]?\d+)?[kKMGTB%]*")
# What stands before the last @ of a URL's host (of which a path keeps one slash), and what a URL
# passes under a telling name; the same of a URL that another URL holds. And what HTTP is told.
_NAME = (
    r"(?:[\w.-]*(?:token|secret|passw|pwd|key|credential|signature|auth|jwt)[\w.-]*|sig|pass"
    r"|(?:\w+[_-])?code)"
)
_LETTER = "%(?:[46][1-9A-F]|[57][0-9A])"  # that a URL has no need to escape
_IN_URLS = (
    # A password with slashes or quotes, but none that ends a string; no port is one.
    re.compile(
        r"(?i)\b([a-z][a-z0-9+.-]*:/{1,2})[^/\s:@\[\"'\\]*:(?!\d+/)"
        r"(?:[^\s\"'\\]|\\\S|[\"'](?![\s,;:)\]}]|$))+(@)"
    ),
    re.compile(r"(?<![:\w/])(//)[^/\s:@]*:[^/\s@\"'\\]+(@)"),
    re.compile(r"(?i)\b([a-z][a-z0-9+.-]*:/{1,2})[^/\s\"'\\]+(@)"),
    re.compile(r"(?i)(%3A(?:%2F){2})(?:(?!%2F)[^\s\"'&;#@\\])+?(%40|@)"),
    # A backslash escapes the quote that ends a string of TOML or JSON.
    re.compile(rf"(?i)([?&;#][\w.-]*{_LETTER}[\w.%-]*=)[^&;#\s\"'\\]+()"),
    re.compile(rf"(?i)([?&;#]{_NAME}=)[^&;#\s\"'\\]+()"),
    re.compile(rf"(?i)((?:%3F|%26){_NAME}%3D)(?:(?!%26)[^&;#\s\"'\\])+()"),
    re.compile(
        r"(?i)(\b(?:authorization|(?:x-)?(?:api|auth|access)-(?:key|token))"
        r"\\?[\"']?\s*[:=]\s*\\?[\"']?(?:(?:basic|bearer|token)\s+)?)"
        r"(?!\*{3})[\w+/=.~-]{8,}()"
    ),
)
_PASSWORD = re.compile(r"[A-Za-z][\w+.-]*://[^/\s:@]*:([^/\s@]+)@")  # in a URL of a variable
_HIDDEN = "***"


def redact(text: str) -> str:
    """Return ``text`` without secrets: each is replaced by ``***``; done again, nothing changes.

    Secrets are the user and password of a URL, its parameters named like a token, key or
    signature, what a header of HTTP authorizes, and the values of environment variables with such
    names and the passwords in the URLs of others, however TOML, JSON, Python, a URL, base64 or hex
    writes them, also line by line. A path that exists, the value of a name that says that it is a
    path or a count, and a common word are no secrets.
    """
    values = set[str]()
    for name, value in os.environ.items():
        if _is_telling(name) and _is_secret(value) and not _is_plain(name, value):
            values.add(value)
        for password in _PASSWORD.findall(value) if "@" in value else ():
            values |= set(filter(_is_secret, (password, unquote(password))))
    pattern = _pattern(frozenset(values))
    while True:
        before = text
        text = pattern.sub(_HIDDEN, text)
        for in_urls in _IN_URLS:
            text = in_urls.sub(rf"\1{_HIDDEN}\2", text)
        if text == before:  # else what was put together around a *** may be a secret in turn
            return text


@functools.cache
def _is_telling(name: str) -> bool:
    return any(_TELLING.fullmatch(word) for word in _WORD.findall(name))


def _is_plain(name: str, value: str) -> bool:
    """Return whether the words of a name say that such a value is a path or a count."""
    words = _WORD.findall(name)
    first, last = words[0], words[-1]
    if _OF_PATHS.fullmatch(last):
        return True
    counts = _COUNTING.fullmatch(first) or _OF_COUNTS.fullmatch(last)
    return bool(counts and _NUMBER.fullmatch(value))


def _is_secret(value: str) -> bool:
    word = value.replace("-", "").replace("_", "")
    common = word.isalpha() and (word.islower() or word.isupper() or word.istitle())
    return (
        len(value) >= _SHORTEST
        and not (common and len(value) <= _LONGEST_WORD)
        and not (_WINDOWS_PATH.fullmatch(value) or os.path.exists(value))
    )


@functools.lru_cache(maxsize=4)
def _pattern(values: frozenset[str]) -> re.Pattern[str]:
    """Return what matches each of the secrets, and each line of one that is long enough."""
    lines = {line for v in values for line in v.splitlines() if _is_secret(line)}
    texts = values | lines
    forms = texts | {form for text in texts for form in _encoded(text)}
    longest_first = sorted(forms, key=lambda v: (-len(v), v))
    return re.compile("|".join(map(_spelled, longest_first)) or r"(?!)")


def _encoded(text: str) -> Iterator[str]:
    """Yield how hex and base64 write a text: what does not depend on what is beside it."""
    content = text.encode(errors="surrogateescape")
    yield content.hex()
    yield content.hex().upper()
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for n_before in range(3):
            whole = encode(bytes(n_before) + content).decode().rstrip("=")
            end = (n_before + len(content)) * 8 // 6
            middle = whole[-(-n_before * 8 // 6) : end]
            if len(middle) >= _SHORTEST:
                yield middle


def _spelled(text: str) -> str:
    """Return what matches a text in all its spellings; of digits alone, the whole number."""
    spelled = "".join(map(_escaped, text))
    return rf"(?<!\d){spelled}(?!\d)" if text.isdecimal() else spelled


@functools.cache
def _escaped(c: str) -> str:
    """Return what matches a character as it is and escaped, also what was escaped twice."""
    if c.isascii() and (c.isalnum() or c in "_.~-"):
        return re.escape(c)
    code, url = ord(c), quote(c, safe="", errors="surrogatepass")
    written = {c, f"\\{c}", json.dumps(c)[1:-1], c.encode("unicode_escape").decode(), url}
    written |= {f"\\x{code:02x}", f"\\u{code:04x}", f"\\U{code:08x}"}
    forms = {re.sub(r"(\\\\)+", r"\\\\+", re.escape(form)) for form in written}
    forms |= {"\n": {r"\r\n", r"\\+r\\+n"}, " ": {r"\+"}}.get(c, set())
    return f"(?i:{'|'.join(sorted(forms, key=len, reverse=True))})"
