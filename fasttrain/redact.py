"""Text without secrets: what `redact` replaces, and what it leaves. Standard library only."""

import base64
import functools
import json
import os
import re
from collections.abc import Iterator
from urllib.parse import quote, unquote

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
