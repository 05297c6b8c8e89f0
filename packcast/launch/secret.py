"""The secret of a launch, and signed keys in a launcher's store.

A launcher's store has no authentication: any process that reaches it reads and writes every key.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from packcast.errors import RendezvousError, UsageError
from packcast.launch.launchers import MPI_JOB_VARIABLE, Launch
from packcast.settings import SAFE_TOKEN_NBYTES, check_token, named

_NBYTES = 32
_FILE = "launch-secret"
_TOKEN_FILE = "token"

OPEN_LAUNCH = (
    "this launch has no token: anyone who can reach its network can join or stop it;"
    " set the same PACKCAST_TOKEN on every host"
)


class Keys(Protocol):
    """The used part of a store."""

    def check(self, keys: list[str], /) -> bool: ...

    def get(self, key: str, /) -> bytes: ...

    def set(self, key: str, value: str, /) -> None: ...


class SignedKeys:
    """Keys of one launch: values that others have set are ignored.

    With a secret the values are signed, and the names of keys depend on it, so that a stranger
    does not know which keys to overwrite. Without one every value is accepted. `context`
    distinguishes this launch, and this transfer of it, from others with the same secret.
    """

    def __init__(self, keys: Keys, secret: bytes | None, context: str) -> None:
        self._keys = keys
        self._secret = secret
        self._context = context

    @property
    def is_signed(self) -> bool:
        return self._secret is not None

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys have a value of this launch."""
        return all(self._value(key) is not None for key in keys)

    def get(self, key: str, /) -> bytes:
        """The value of a key that `check` has found."""
        value = self._value(key)
        if value is None:
            raise RendezvousError(f"key {key!r} has disappeared from the launcher's store")
        return value

    def set(self, key: str, value: str, /) -> None:
        signed = value if self._secret is None else self._signed(key, value.encode())
        self._keys.set(self._name(key), signed)

    def is_foreign(self, key: str) -> bool:
        """Whether it has a value that is not of this launch, as with another token."""
        return self._keys.check([self._name(key)]) and self._value(key) is None

    def announce(self, rank: int) -> None:
        """Record, unsigned, that this rank has come: only for a hint in messages."""
        self._keys.set(f"here/{rank}", "")

    def is_announced(self, rank: int) -> bool:
        """Whether that is recorded of the rank; anybody may have done so."""
        return self._keys.check([f"here/{rank}"])

    def _value(self, key: str) -> bytes | None:
        name = self._name(key)
        if not self._keys.check([name]):
            return None
        try:
            found = self._keys.get(name)
        except RuntimeError:  # deleted since
            return None
        if self._secret is None:
            return found
        _, _, value = found.partition(b" ")
        expected = self._signed(key, value).encode()
        return value if hmac.compare_digest(found, expected) else None

    def _name(self, key: str) -> str:
        return key if self._secret is None else self._mac("name", key, b"")

    def _signed(self, key: str, value: bytes) -> str:
        return f"{self._mac('value', key, value)} {value.decode(errors='replace')}"

    def _mac(self, what: str, key: str, value: bytes) -> str:
        assert self._secret is not None
        # Unambiguous: no part before the value has a zero byte.
        text = b"\0".join(part.encode() for part in ("packcast store", what, self._context, key))
        return hmac.new(self._secret, text + b"\0" + value, hashlib.sha256).hexdigest()


def launch_context(launch: Launch, environ: Mapping[str, str], call: int) -> str:
    """A text that is equal on all ranks of a launch, and differs between launches."""
    names: tuple[str, ...] = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    if launch.kind == "slurm":
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID")
    elif launch.kind == "mpirun":
        names = (MPI_JOB_VARIABLE, "MASTER_PORT")
    values = [environ.get(name, "") for name in names]
    return " ".join(map(repr, (launch.kind, launch.world_size, *values, call)))


def token_of(
    given: str | bytes | None,
    environ: Mapping[str, str],
    warn: Callable[[str], None] | None,
    name: str = "token",
) -> bytes | None:
    """The token that was given by this name, else that of PACKCAST_TOKEN, else None."""
    if given is None:
        name, given = "PACKCAST_TOKEN", os.fsencode(environ.get("PACKCAST_TOKEN", "")) or None
    if given is None:
        return None
    token = named(name, check_token, given.encode() if isinstance(given, str) else given)
    if len(token) < SAFE_TOKEN_NBYTES and warn is not None:
        warn(
            f"{name}: a token of fewer than {SAFE_TOKEN_NBYTES} bytes can be guessed;"
            " `openssl rand -hex 16` makes a better one"
        )
    return token


def launch_secret(
    launch: Launch, environ: Mapping[str, str], token: bytes | None, context: str
) -> bytes | None:
    """The secret that all ranks of a launch share: the token, if there is one.

    On one host it is derived from a file that only this user can read. On several hosts it is None
    under torchrun and mpirun; under Slurm UsageError is raised, since `srun` passes a token on.
    """
    if token is not None:
        return token
    if launch.is_one_host:
        text = b"packcast launch\0" + context.encode()
        return hmac.digest(user_secret(secret_folders(environ)), text, "sha256").hex().encode()
    if launch.kind == "slurm":
        raise UsageError(
            "a Slurm step on several hosts needs a token, or anyone on the network could join it",
            hint="export PACKCAST_TOKEN=$(openssl rand -hex 16)   # before srun, which hands it on",
        )
    return None


def secret_folders(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """The folders for a user's secret, the first choice first."""
    state = environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "packcast", _temporary_folder()  # where home may not be written


def local_folder() -> Path:
    """A folder of this user on this host, for a while. Raises OSError where it is not private."""
    folder = _temporary_folder()
    _make_private(folder)
    return folder


def _temporary_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"packcast-{os.geteuid()}"


def user_secret(folders: Sequence[Path]) -> bytes:
    """This user's secret on this host, made at the first call."""
    return _kept(folders, _FILE, secrets.token_bytes(_NBYTES))[0]


def user_token(folders: Sequence[Path]) -> tuple[bytes, Path]:
    """The same as text, for `--token-file`; and its file."""
    return _kept(folders, _TOKEN_FILE, secrets.token_hex(_NBYTES // 2).encode())


def _kept(folders: Sequence[Path], name: str, new: bytes) -> tuple[bytes, Path]:
    """The secret in the first usable folder; `new` if there was none."""
    reasons = []
    for folder in folders:
        try:
            return _secret_in(folder, name, new), folder / name
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
    raise RendezvousError(
        f"cannot create a file that only this user can read: {'; '.join(reasons)}",
        hint="set the same PACKCAST_TOKEN for all ranks",
    )


def _secret_in(folder: Path, name: str, new: bytes) -> bytes:
    _make_private(folder)
    path = folder / name
    if not path.exists():
        fd, made = tempfile.mkstemp(dir=folder)  # which nobody else can read
        try:
            with open(fd, "wb") as file:
                file.write(new)
            os.link(made, path)  # complete, or not there; the first rank to come decides
        except FileExistsError:
            pass
        finally:
            os.unlink(made)
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        _check_private(os.fstat(file.fileno()), stat.S_IFREG, forbidden=0o077)
        secret = file.read(_NBYTES)
    if len(secret) != _NBYTES:
        raise OSError(f"{name} is cut off")
    return secret


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(os.stat(folder, follow_symlinks=False), stat.S_IFDIR, forbidden=0o022)


def _check_private(found: os.stat_result, kind: int, *, forbidden: int) -> None:
    if stat.S_IFMT(found.st_mode) != kind or found.st_uid != os.geteuid():
        raise OSError("it belongs to another user")
    if found.st_mode & forbidden:
        raise OSError("others may read or write it")
