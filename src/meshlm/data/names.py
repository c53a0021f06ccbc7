"""Names of files that need not be UTF-8: as JSON holds them, and as a terminal shows them.

Python gives a byte that is not UTF-8 as a lone surrogate (PEP 383), which neither JSON nor a
terminal can hold.
"""

import re

_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")


def to_json_name(name: str) -> str:
    r"""`name` with each byte that is not UTF-8 written as \xHH; `from_json_name` undoes it.

    A backslash that would look like such a byte is written as \x5c. Other names stay as they are.
    """
    escaped = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", name)
    return "".join(
        f"\\x{ord(c) - 0xDC00:02x}" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in escaped
    )


def from_json_name(name: str) -> str:
    """The name, as `os` takes it, that `to_json_name` made `name` of."""
    as_bytes = b"".join(
        bytes.fromhex(part) if i % 2 else part.encode()
        for i, part in enumerate(_ESCAPE.split(name))
    )
    return as_bytes.decode(errors="surrogateescape")


def printable(name: str) -> str:
    """`name` in one line of what a terminal can show."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in to_json_name(name))
