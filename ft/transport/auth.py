"""The job's secret, and the proof that both ends of a connection know it.

Each side sends a `Hello` with a fresh nonce, then a `Proof`: HMAC-SHA256, keyed with the secret, over the side's
direction and both `Hello` frames as sent, the connecting side's first. A proof is thus bound to both parties, their
roles, slots, run and epoch, and is worthless in any other connection, direction or job. The keys of the frames that
follow (`keepwarm.ft.transport.session`) are derived from the same.
"""

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from keepwarm.files import atomic_create
from keepwarm.ft.errors import AuthenticationFailed
from keepwarm.ft.protocol.messages import Hello, Proof, encode
from keepwarm.ft.transport.session import SessionKeys

SECRET = "secret"
"""File in the run folder. A run restarted from scratch gets a new secret and with it a new identity."""

NONCE_BYTES = 32
_SECRET_BYTES = 32
_SECRET_LIMIT = 4096
_PURPOSE = b"keepwarm agent 2"
_SESSION = b"keepwarm session 2"


def create_secret(path: Path) -> bytes:
    """Write a fresh secret to a new 0600 file unless one exists. Return the secret in the file."""
    atomic_create(path, secrets.token_hex(_SECRET_BYTES).encode())
    return load_secret(path)


def load_secret(path: Path) -> bytes:
    """Read the job's secret. Raise `AuthenticationFailed` if other users could read or replace it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise AuthenticationFailed(f"{path}: the job's secret cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise AuthenticationFailed(f"{path}: the job's secret must be a regular file owned by the user of the job")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise AuthenticationFailed(f"{path}: others can read the job's secret (mode {mode:04o}): chmod 600 {path}")
        secret = file.read(_SECRET_LIMIT)
    if len(secret) < _SECRET_BYTES:
        raise AuthenticationFailed(f"{path}: {len(secret)} bytes are too few for a secret, at least {_SECRET_BYTES}")
    return secret


def run_identity(secret: bytes) -> str:
    """Return the name of a run among agents. It reveals nothing about the secret."""
    return hashlib.sha256(b"keepwarm run " + secret).hexdigest()[:16]


def nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def proof(secret: bytes, mine: Hello, theirs: Hello, *, dialled: bool) -> Proof:
    """Return the proof of the side that sent `mine`. `dialled` is True on the side that opened the connection."""
    return Proof(mac=_derived(secret, _PURPOSE, mine, theirs, _side(dialled), dialled=dialled))


def session_keys(secret: bytes, mine: Hello, theirs: Hello, *, dialled: bool) -> SessionKeys:
    """Return the keys of the connection that these two `Hello` opened, for the side that sent `mine`."""
    sending, receiving = (
        _derived(secret, _SESSION, mine, theirs, side, dialled=dialled) for side in (_side(dialled), _side(not dialled))
    )
    return SessionKeys(sending=sending, receiving=receiving)


def _side(dialled: bool) -> bytes:
    return b"dialled" if dialled else b"answered"


def _derived(secret: bytes, purpose: bytes, mine: Hello, theirs: Hello, side: bytes, *, dialled: bool) -> bytes:
    """Return HMAC-SHA256 of a purpose, a side and both `Hello` frames, the connecting side's first."""
    first, second = (encode(mine), encode(theirs)) if dialled else (encode(theirs), encode(mine))
    text = b"".join(len(part).to_bytes(4, "big") + part for part in (purpose, side, first, second))
    return hmac.digest(secret, text, "sha256")


def check_hello(mine: Hello, theirs: Hello, roles: frozenset[str]) -> None:
    """Raise `AuthenticationFailed` if the other side does not belong here, before computing anything secret."""
    if theirs.run != mine.run:
        raise AuthenticationFailed(f"it belongs to run {theirs.run!r}, not {mine.run!r}")
    if theirs.role not in roles:
        raise AuthenticationFailed(f"role {theirs.role!r} is not served here")
    if theirs.nonce == mine.nonce:
        raise AuthenticationFailed("it sent our own nonce back")
    if theirs.role == mine.role and theirs.slot == mine.slot:
        raise AuthenticationFailed(f"it claims to be {mine.role} {mine.slot}, which is here")


def check_proof(secret: bytes, mine: Hello, theirs: Hello, shown: Proof, *, dialled: bool) -> None:
    """Raise `AuthenticationFailed` unless `shown` is the proof expected from the sender of `theirs`. Constant time."""
    if not hmac.compare_digest(shown.mac, proof(secret, theirs, mine, dialled=not dialled).mac):
        raise AuthenticationFailed("it does not know the job's secret")
