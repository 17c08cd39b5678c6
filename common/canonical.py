"""One spelling for every value that is hashed or signed.

Canonical bytes are JSON in ASCII with sorted keys and no white space, so that equal values have equal bytes on every
machine. Floats are spelled as Python's shortest round-trip decimal; NaN and infinities have no spelling.
"""

import hashlib
import json
from collections.abc import Mapping


def canonical_bytes(value: Mapping[str, object]) -> bytes:
    """Return the one spelling of `value`.

    Args:
        value: A tree of str, int, float, bool, None, lists and string-keyed mappings.

    Raises:
        ValueError: A float in it is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sha256(data: bytes | memoryview) -> str:
    """Return the SHA-256 of `data` as `sha256:` and 64 hexadecimal digits (FIPS 180-4)."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
