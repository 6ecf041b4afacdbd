"""Keeping secrets out of what a run writes and prints. Standard library only."""

import os
import re

__all__ = ["redact"]

_SECRET_NAME = re.compile(r"(?i)(token|secret|passw|api_?key|access_?key|private_?key|credential)")
# What stands before the @ of a URL (of which a path keeps one slash), and what a URL passes under
# a telling name.
_USER_INFO = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*:/{1,2})[^/\s@\"'\\]+@")
_PARAMETER = re.compile(
    r"(?i)([?&;#](?:[\w.-]*(?:token|secret|passw|key|credential|signature|auth)[\w.-]*|sig)=)"
    r"[^&;#\s\"'\\]+"  # a backslash escapes the quote that ends a string of TOML or JSON
)
_SHORTEST = 8  # characters of a variable's value: shorter ones are words that occur anywhere
_HIDDEN = "***"


def redact(text: str) -> str:
    """Return ``text`` without secrets: each is replaced by ``***``.

    Secrets are the user and password of a URL, its parameters named like a token, key or
    signature, and the values of environment variables with such names.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _SECRET_NAME.search(name):
            text = text.replace(value, _HIDDEN)
    return _PARAMETER.sub(rf"\1{_HIDDEN}", _USER_INFO.sub(rf"\1{_HIDDEN}@", text))
