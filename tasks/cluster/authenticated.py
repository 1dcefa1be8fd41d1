"""A store whose values are signed, because any process that reaches torch's TCPStore may write to it.

torch elastic unpickles the state of the rendezvous, and the ranks connect to the addresses that they read in the store.
Here every value has an HMAC-SHA256 over its key and its bytes, and a value with another signature is never handed on:
it is as if the key had its last signed value, or did not exist. Only processes that have the job's secret can sign.
A stranger can still delete keys or change counters, which disturbs a job but runs and changes nothing in it.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import Store

logger = logging.getLogger("tlq.ranks")

_SIGNATURE_BYTES = 32
_RETRY_SECONDS = 0.5
_FORGED_SECONDS = 60.0


def new_secret() -> str:
    return secrets.token_hex(32)


def keep_secret(secret: str, file: Path) -> None:
    """Write a secret to a file that only its owner can read, in place of an earlier one."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as made:  # mode 0600
        made.write(secret)
    os.replace(made.name, file)


def read_secret(file: Path) -> str:
    """Raises PermissionError or FileNotFoundError: another user's file, or a job that has ended."""
    return file.read_text()


class AuthenticatedStore(Store):
    """A view of another store that signs what it writes and checks what it reads.

    A torch object that is given this store must not outlive it: torch does not keep the Python object alive.
    """

    def __init__(self, inner: Store, secret: str, prefix: str = "") -> None:
        """``prefix`` begins the name of every key in the other store."""
        super().__init__()
        self._inner: Any = inner  # torch's stubs allow only str where its stores take bytes
        self._secret = bytes.fromhex(secret)
        self._prefix = prefix
        self._last: dict[str, bytes] = {}  # signed values, as last read or written here
        self._forged: set[str] = set()

    def _signed(self, key: str, value: bytes) -> bytes:
        return hmac.digest(self._secret, f"{len(key)} {key} ".encode() + value, "sha256") + value

    def _verified(self, key: str, signed: bytes) -> bytes | None:
        """The value, or None if its signature is not of this job."""
        value = signed[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signed, self._signed(key, value)):
            return None
        self._last[key] = signed
        return value

    def _restore(self, key: str, forged: bytes) -> bool:
        """Replace a forged value by the last signed one; False if this process knows none."""
        if key not in self._forged:  # one line, however often it happens
            self._forged.add(key)
            logger.warning("a process without this job's secret wrote %s to the store; the value is ignored", key)
        if key not in self._last:
            return False
        self._inner.compare_set(key, forged, self._last[key])  # unless another process was faster
        return True

    def set(self, key: str, value: str | bytes) -> None:
        key = self._prefix + key
        signed = self._signed(key, _bytes(value))
        self._last[key] = signed
        self._inner.set(key, signed)

    def get(self, key: str) -> bytes:
        """Wait for the key's value, as long as the other store waits.

        Raises:
            TimeoutError: nobody has replaced a forged value.
        """
        key = self._prefix + key
        deadline = time.monotonic() + _FORGED_SECONDS
        while True:
            signed = self._inner.get(key)
            value = self._verified(key, signed)
            if value is not None:
                return value
            if not self._restore(key, signed):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"a process without this job's secret wrote {key} to the store")
                time.sleep(_RETRY_SECONDS)

    def read(self, key: str) -> bytes | None:
        """The key's value; None if the key does not exist, or if its value is not signed."""
        key = self._prefix + key
        while self._inner.check([key]):
            signed = self._inner.get(key)
            value = self._verified(key, signed)
            if value is not None or not self._restore(key, signed):
                return value
        return None

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Set the key to ``desired`` if it has the value ``expected``, or none and that is empty; the value it has."""
        key = self._prefix + key
        old = self._signed(key, _bytes(expected)) if expected else b""
        new = self._signed(key, _bytes(desired))
        while True:
            signed = self._inner.compare_set(key, old, new)
            value = self._verified(key, signed)
            if value is not None:
                return value
            if not self._restore(key, signed):
                self._inner.compare_set(key, signed, new)  # as if the key did not exist

    def add(self, key: str, amount: int) -> int:
        """Add to a counter. Counters are not signed."""
        return self._inner.add(self._prefix + key, amount)

    def check(self, keys: Sequence[str]) -> bool:
        return self._inner.check([self._prefix + key for key in keys])

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._inner.wait([self._prefix + key for key in keys], *([] if timeout is None else [timeout]))

    def delete_key(self, key: str) -> bool:
        return self._inner.delete_key(self._prefix + key)

    def num_keys(self) -> int:
        return self._inner.num_keys()

    def set_timeout(self, timeout: timedelta) -> None:
        self._inner.set_timeout(timeout)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
