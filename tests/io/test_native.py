"""The compiled pool: found, refused, forced; built strictly, and under sanitizers."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import xxhash

from packcast.errors import UsageError
from packcast.io import native
from packcast.io.native import NativePool
from packcast.io.pool import pool_kind
from packcast.io.schedule import IN_MEMORY, Span
from packcast.io.threads import ThreadPool
from packcast.io.work import FailureKind, Task
from packcast.packed.plan import BLOCK
from tests.helpers.forge import REPOSITORY
from tests.helpers.native import SOURCE, built, compiler
from tests.helpers.waiting import Waiter
from tests.io.conftest import use_native
from tests.io.pools import NBYTES, Bench, Opened, no_thread_left, random_bytes
from tests.io.sinks import digests_of

HERE = Path(__file__).parent
needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C compiler")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pool as it is now, compiled, in use."""
    monkeypatch.setenv("PACKCAST_POOL", "native")
    return use_native(monkeypatch)


@pytest.mark.parametrize("choice", [None, "auto", "native", "python"])
def test_the_native_pool_is_used_where_it_is_there_unless_python_is_asked_for(
    library: Path, monkeypatch: pytest.MonkeyPatch, choice: str | None
) -> None:
    monkeypatch.delenv("PACKCAST_POOL")
    if choice is not None:
        monkeypatch.setenv("PACKCAST_POOL", choice)
    expected = "python" if choice == "python" else "native"
    assert pool_kind() == expected
    running = Bench(BLOCK).start(Task.WRITE)
    assert isinstance(running, NativePool if expected == "native" else ThreadPool)
    assert running.close(20)


def test_without_a_compiled_pool_python_does_it_and_native_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "installed", lambda: "it was not compiled")
    monkeypatch.delenv("PACKCAST_POOL", raising=False)
    assert pool_kind() == "python"
    running = Bench(BLOCK).start(Task.WRITE)
    assert isinstance(running, ThreadPool)
    assert running.close(20)
    monkeypatch.setenv("PACKCAST_POOL", "native")
    with pytest.raises(UsageError, match="no native pool: it was not compiled") as caught:
        pool_kind()
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError):
        Bench(BLOCK).start(Task.WRITE)


def test_another_word_for_a_pool_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKCAST_POOL", "threads")
    with pytest.raises(UsageError, match="PACKCAST_POOL is 'threads'") as caught:
        pool_kind()
    assert "native, python or auto" in str(caught.value.hint)


def test_why_there_is_no_pool_is_said_and_never_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    find = native.installed.__wrapped__
    assert find() == "it was not compiled when packcast was installed"
    name = f"_pool{sysconfig.get_config_var('EXT_SUFFIX')}"
    (tmp_path / name).write_bytes(b"\x7fELF of another world")
    assert name in str(find())


@needs_compiler
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("return POOL_ABI", "return POOL_ABI + 1", "built for another version of packcast"),
        ("packcast_pool_totals", "packcast_pool_sums", "has no totals"),
    ],
)
def test_a_library_of_another_version_is_refused(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    (tmp_path / "other.c").write_text(SOURCE.read_text().replace(old, new))
    command = [str(compiler()), "-shared", "-fPIC", "-pthread", str(tmp_path / "other.c")]
    subprocess.run([*command, "-o", str(tmp_path / "other.so")], check=True)
    with pytest.raises(OSError, match=says):
        native.open_library(tmp_path / "other.so")


# -- the hash function ---------------------------------------------------------------------------


def candidates() -> list[tuple[ctypes.CDLL, str]]:
    return [each for each in native._hash_candidates() if hasattr(*each)]


def test_each_library_that_exports_the_hash_function_will_do(
    library: Path, monkeypatch: pytest.MonkeyPatch, opened: Opened, tmp_path: Path
) -> None:
    found = candidates()
    if not found:
        pytest.skip("neither the xxhash package nor the system exports XXH3_128bits")
    data = random_bytes()
    fd = opened(tmp_path / "f", data)
    addresses = set()
    for candidate in found:
        monkeypatch.setattr(native, "_hash_candidates", lambda candidate=candidate: [candidate])
        opened_library = native.open_library(library)
        addresses.add(opened_library.hash_address)
        monkeypatch.setattr(native, "installed", lambda it=opened_library: it)
        bench = Bench(NBYTES, (Span(0, 0, 0, NBYTES),), [fd])
        assert bench.do(Task.READ) is None
        assert bytes(bench.digests) == digests_of(data)
    assert len(addresses) == len(found)
    assert 0 not in addresses


def test_the_one_for_this_processor_comes_first() -> None:
    names = [name for _, name in native._hash_candidates()]
    assert names[:2] == ["XXH3_128bits_dispatch", "XXH3_128bits"] or names == ["XXH3_128bits"]
    if names[0].endswith("dispatch") and len(candidates()) > 1:
        first, name = candidates()[0]
        assert native._hash_address() == ctypes.cast(getattr(first, name), ctypes.c_void_p).value


@needs_compiler
def test_a_function_of_that_name_that_computes_something_else_is_not_used(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong.c").write_text(
        "typedef struct { unsigned long long low, high; } hash128;\n"
        "hash128 XXH3_128bits(const void *data, unsigned long n)\n"
        "{ hash128 hash = {n, (unsigned long)data}; return hash; }\n"
    )
    command = [str(compiler()), "-shared", "-fPIC", str(tmp_path / "wrong.c")]
    subprocess.run([*command, "-o", str(tmp_path / "wrong.so")], check=True)
    wrong = (ctypes.CDLL(str(tmp_path / "wrong.so")), "XXH3_128bits")
    right = candidates()
    monkeypatch.setattr(native, "_hash_candidates", lambda: [wrong, *right])
    if right:
        there = ctypes.cast(getattr(*right[0]), ctypes.c_void_p).value
        assert native._hash_address() == there
    monkeypatch.setattr(native, "_hash_candidates", lambda: [wrong])
    with pytest.raises(OSError, match="no library exports XXH3_128bits"):
        native.open_library(library)


@pytest.mark.parametrize("nbytes", [1, 16, 17, 240, 241, BLOCK - 1, BLOCK])
def test_digests_are_those_of_the_package_at_every_length(library: Path, nbytes: int) -> None:
    data = random_bytes(3, nbytes)
    literal = bytearray(data)
    there = ctypes.addressof(ctypes.c_char.from_buffer(literal))
    bench = Bench(nbytes, (Span(IN_MEMORY, there, 0, nbytes),))
    assert bench.do(Task.READ) is None
    assert bytes(bench.digests) == xxhash.xxh3_128_digest(data)


# -- its threads ---------------------------------------------------------------------------------


def test_signals_are_for_the_interpreters_threads(library: Path) -> None:
    before = set(os.listdir("/proc/self/task"))
    running = Bench(NBYTES).start(Task.WRITE, threads=3)
    mine = set(os.listdir("/proc/self/task")) - before
    assert len(mine) == 3
    for task in mine:
        status = Path(f"/proc/self/task/{task}/status").read_text()
        blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM):
            assert blocked >> (number - 1) & 1
    assert running.close(20)


TRACED = f"""
import sys
from pathlib import Path
from packcast.io import native
from packcast.io.work import Task
from tests.io.pools import Bench
class Traced:
    def __init__(self, functions): self.functions = functions
    def __getattr__(self, name):
        print(name.removeprefix("packcast_pool_"), flush=True)
        return getattr(self.functions, name)
library = native.open_library(Path("{built()}"))
traced = native.Library(Traced(library.functions), library.hash_address)
native.installed = lambda: traced
pool = Bench(1000).start(Task.WRITE)
"""


@needs_compiler
@pytest.mark.parametrize(
    ("program", "calls"),
    [
        ("del pool", ["start", "stop", "join", "free"]),
        # Where a daemon thread may still be waiting in the pool.
        ("sys.exit()", ["start", "stop", "join"]),
        # A fork has none of its threads.
        (
            "import os\nif not os.fork():\n    del pool\n    os._exit(0)\nos.wait()\ndel pool",
            ["start", "stop", "join", "free"],
        ),
    ],
    ids=["dropped", "at exit", "forked"],
)
def test_a_pool_is_freed_once_and_only_where_nobody_may_be_waiting_in_it(
    program: str, calls: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRACED + program], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.stdout.split() == calls, done.stderr


@needs_compiler
def test_many_threads_may_close_a_pool_at_once(library: Path) -> None:
    with no_thread_left():
        for _ in range(20):
            running = Bench(NBYTES).start(Task.WRITE, threads=4)
            closing = [Waiter(partial(running.close, 20)) for _ in range(6)]
            assert all(each.result() for each in closing)


def test_the_two_pools_number_tasks_failures_and_flags_alike() -> None:
    text = SOURCE.read_text()
    for name, value in (
        *((f"TASK_{task.name}", task) for task in Task),
        *((f"KIND_{kind.name}", kind) for kind in FailureKind),
        ("FLAG_TOLERANT", native._TOLERANT),
        ("FLAG_WRITEBACK", native._WRITEBACK),
        ("POOL_ABI", native._ABI),
        ("IN_MEMORY", IN_MEMORY),
    ):
        assert f"{name} = {int(value)}" in text, name


# -- building it ---------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("optimised", ["-O0", "-O2", "-O3"])
def test_it_is_c11_without_a_warning(optimised: str) -> None:
    assert built("-Wpedantic", "-Wshadow", optimised)


@pytest.mark.parametrize(
    ("flags", "rounds"),
    [
        (("-fsanitize=address,undefined", "-fno-sanitize-recover=all"), 2),
        (("-fsanitize=thread",), 1),
    ],
    ids=["address", "thread"],
)
def test_pools_of_every_task_are_right_under_a_sanitizer(
    tmp_path: Path, flags: tuple[str, ...], rounds: int
) -> None:
    """Whole ones, failing ones, stopped ones; with pauses."""
    program = built("-g", "-DPACKCAST_JITTER_NS=50000", *flags, program=HERE / "pool_driver.c")
    if program is None:
        pytest.skip(f"this machine cannot build with {flags[0]}")
    command: list[str | Path] = [program, tmp_path, str(rounds)]
    # A random layout of memory may not leave ThreadSanitizer the room it wants.
    if setarch := shutil.which("setarch"):
        command = [setarch, "-R", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout == f"{rounds} rounds were right\n", done.stderr[:3000]
    assert done.returncode == 0
