"""The names that files may have on the wire: relative, printable, the same on every file system.

On NTFS, exFAT or a network share some names that Linux allows are another file (`a:b` a hidden
stream of `a`, `x.` the file `x`), a device (`CON`), or invalid. Sender and receivers refuse them
everywhere. (`dev/null` is an ordinary file, since names are relative.) Pure functions over strings.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator

MAX_COMPONENT_NBYTES = 255
MAX_DEPTH = 8

_NOT_EVERYWHERE = frozenset('<>:"|?*')
_DEVICES = frozenset(
    {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}
    | {f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789\u00b9\u00b2\u00b3"}
)


def name_fault(name: str) -> str | None:
    """Why a logical name is not allowed, as the end of a sentence; None if it is."""
    if not name:
        return "is empty"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    components = name.split("/", MAX_DEPTH)
    if not components[0]:
        return "is not relative"
    if len(components) > MAX_DEPTH:
        return f"is more than {MAX_DEPTH} levels deep"
    return next(filter(None, map(_component_fault, components)), None)


def _component_fault(component: str) -> str | None:
    if not component:
        return "has an empty part"
    if component in (".", ".."):
        return f"has a part {component!r}"
    if component[0] in ".-":
        return f"has a part that begins with {component[0]!r}"
    if "\\" in component:
        return "has a backslash"
    if not component.isprintable():
        return "has a character that cannot be printed"
    if not unicodedata.is_normalized("NFC", component):
        return "is not in Unicode's composed form (NFC)"
    odd = next((char for char in component if char in _NOT_EVERYWHERE), None)
    if odd:
        return f"has the character {odd!r}, which some file systems do not take"
    if component[-1] in ". ":
        return f"has a part that ends in {component[-1]!r}, which some file systems drop"
    if component.partition(".")[0].rstrip(" ").upper() in _DEVICES:
        return f"has a part {component!r}, which is a device on some systems"
    if len(component.encode()) > MAX_COMPONENT_NBYTES:
        return f"has a part of more than {MAX_COMPONENT_NBYTES} bytes"
    return None


def clash_of(names: Iterable[str]) -> tuple[str, str] | None:
    """The first two names that cannot both exist on every file system, or None."""
    return next(clashes_of(names), None)


def clashes_of(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each name that cannot exist beside an earlier one, as (earlier, name), in their order.

    Two names clash when they differ in case only, or when one would be a directory of the other.
    Later names are not compared with a name that clashes.
    """
    files: dict[str, str] = {}
    folders: dict[str, str] = {}  # each with the first name in it
    for name in names:
        folded = _folded(name)
        above = [folded[:at] for at, char in enumerate(folded) if char == "/"]
        earlier = files.get(folded) or folders.get(folded)
        earlier = earlier or next((files[folder] for folder in above if folder in files), None)
        if earlier is not None:
            yield earlier, name
            continue
        files[folded] = name
        for folder in above:
            folders.setdefault(folder, name)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())
