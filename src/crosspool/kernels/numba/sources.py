"""Which files a compiled function is made of: its own, and what that imports, however far away.

Numba itself sees edits only in the file that it compiles. The answer is what the machine code is kept under,
so that an edit compiles again what it can change, and nothing else.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
COMPILED = (
    "kernels/choice_fields.py",
    "kernels/numba/",
    "workers/resident/",
    "core/pick.py",
    "core/token_record.py",
)
"""What compiled code is made of, below the package."""

_IMPORT = re.compile(r"^from crosspool\.([\w.]+) import (\([^)]*\)|[^\n]*)", re.MULTILINE)


@cache
def digest_of(file: Path) -> bytes:
    """Of the contents of a file and of everything compiled that it imports."""
    digest = hashlib.sha256()
    for source in sorted(_closure(file)):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.digest()


def _closure(file: Path) -> set[Path]:
    found, new = set(), {file}
    while new:
        source = new.pop()
        if source.is_file() and source not in found:
            found.add(source)
            new |= _imported(source)
    return found


@cache
def _imported(file: Path) -> frozenset[Path]:
    """Files with compiled code that this one imports."""
    found = set()
    for module, names in _IMPORT.findall(file.read_text()):
        path = module.replace(".", "/")
        found |= {f"{path}.py", *(f"{path}/{name}.py" for name in re.findall(r"\w+", names))}
    return frozenset(PACKAGE / name for name in found if name.startswith(COMPILED))
