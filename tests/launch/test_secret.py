"""The secret of a launch, and what a stranger's word in its store is worth."""

from __future__ import annotations

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from packcast.errors import RendezvousError, UsageError
from packcast.launch.find_sender import await_address, publish_failure, settle_sender
from packcast.launch.launchers import Launch
from packcast.launch.secret import (
    SignedKeys,
    launch_context,
    launch_secret,
    secret_folders,
    user_secret,
)

HERE = Launch("torchrun", 0, 2, 0, 2, is_one_host=True)
APART = replace(HERE, is_one_host=False)


class Public:
    """A store that whoever reaches it may write."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def check(self, keys: list[str], /) -> bool:
        return all(key in self.held for key in keys)

    def get(self, key: str, /) -> bytes:
        return self.held[key]

    def set(self, key: str, value: str, /) -> None:
        self.held[key] = value.encode()


def test_ranks_with_one_secret_read_each_other_and_strangers_are_not_there() -> None:
    store = Public()
    one, other = (SignedKeys(store, b"secret", "launch") for _ in range(2))
    stranger = SignedKeys(store, b"guessed", "launch")
    one.set("role/0", "send é")
    assert other.check(["role/0"])
    assert other.get("role/0") == "send é".encode()
    stranger.set("role/1", "recv")
    store.set("role/1", "recv")
    assert not other.check(["role/1"])
    with pytest.raises(RendezvousError, match="has disappeared"):
        other.get("role/1")


def test_names_tell_a_stranger_nothing_and_what_is_spoilt_does_not_count() -> None:
    store = Public()
    keys = SignedKeys(store, b"secret", "launch")
    keys.set("address", "here")
    keys.set("failure", "no")
    assert not {"address", "failure"} & set(store.held)
    for spoil in (lambda value: b"", lambda value: value + b"x", lambda value: b"here"):
        first = store.held[keys._name("address")]
        store.held[keys._name("address")] = spoil(first)
        assert keys.is_foreign("address")
        assert not keys.check(["address"])
        store.held[keys._name("address")] = first
    # Nor does what was signed for another key, another transfer or another launch.
    store.held[keys._name("address")] = store.held[keys._name("failure")]
    assert not keys.check(["address"])
    later = SignedKeys(store, b"secret", "the next launch")
    store.held[later._name("failure")] = store.held[keys._name("failure")]
    assert not later.check(["failure"])


def test_no_stranger_ends_or_redirects_a_launch_by_a_key() -> None:
    store = Public()
    keys = SignedKeys(store, b"secret", "launch")
    store.set("failure", '{"code": 5, "message": "it is over", "hint": null}')
    store.set("role/0", "recv")
    store.set("address", '{"hosts": ["203.0.113.1"], "port": 1, "beside_store": false}')
    assert settle_sender(keys, HERE, "send", 1.0) == 0
    with pytest.raises(RendezvousError, match="published no address"):
        await_address(keys, 0.1)


def test_without_a_secret_nonsense_is_passed_over_as_well() -> None:
    store = Public()
    store.set("failure", "[1]")
    store.set("address", "{")
    keys = SignedKeys(store, None, "launch")
    with pytest.raises(RendezvousError, match="published no address"):
        await_address(keys, 0.1)
    publish_failure(keys, UsageError("no"))
    with pytest.raises(UsageError, match="no"):
        await_address(keys, 0.1)


def test_the_users_secret_is_made_once_however_many_ranks_come(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def come(_: int) -> bytes:
        together.wait()
        return user_secret([tmp_path / "state" / "packcast"])

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(come, range(8)))
    assert len(found) == 1
    assert len(found.pop()) == 32
    (file,) = (tmp_path / "state" / "packcast").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("spoil", ["open file", "open folder", "linked", "cut", "not a folder"])
def test_a_secret_that_others_may_know_is_not_used_but_another_folder_is(
    tmp_path: Path, spoil: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    known = user_secret([first])
    file = first / "launch-secret"
    if spoil == "open file":
        file.chmod(0o644)
    elif spoil == "open folder":
        first.chmod(0o777)
    elif spoil == "linked":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif spoil == "cut":
        os.truncate(file, 8)
    else:
        first.rename(tmp_path / "elsewhere")
        first.write_text("")
    assert user_secret([first, second]) not in (known, known[:8])
    with pytest.raises(RendezvousError, match=f"only this user can read: {first}: "):
        user_secret([first])


def test_a_launch_on_one_host_has_a_secret_of_its_own(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    first, again, other = (
        launch_secret(HERE, environ, None, launch_context(HERE, environ | {"MASTER_PORT": port}, 0))
        for port in ("1", "1", "2")
    )
    assert first
    assert first == again != other
    next_call = launch_secret(HERE, environ, None, launch_context(HERE, environ, 1))
    assert next_call not in (first, other)
    assert secret_folders(environ)[0] == tmp_path / "packcast"


def test_the_token_is_the_secret_where_there_is_one() -> None:
    for launch in (HERE, APART, replace(APART, kind="slurm")):
        assert launch_secret(launch, {}, b"the token", "context") == b"the token"


def test_on_several_hosts_slurm_needs_a_token_and_others_are_open_without_one() -> None:
    assert launch_secret(APART, {}, None, "context") is None
    assert launch_secret(replace(APART, kind="mpirun"), {}, None, "context") is None
    with pytest.raises(UsageError, match="needs a token") as caught:
        launch_secret(replace(APART, kind="slurm"), {}, None, "context")
    assert caught.value.hint is not None
    assert "export PACKCAST_TOKEN=" in caught.value.hint


def test_launches_of_mpirun_are_told_apart() -> None:
    launch = replace(HERE, kind="mpirun")
    one, other = (launch_context(launch, {"PMIX_NAMESPACE": name}, 0) for name in ("a@1", "a@2"))
    assert one != other
    by_port = {launch_context(launch, {"MASTER_PORT": port}, 0) for port in ("4000", "4001")}
    assert len(by_port) == 2
