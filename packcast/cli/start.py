"""The start of a command that moves data: as the parent of ranks, or as a rank.

Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from itertools import takewhile
from pathlib import Path

import typer

from packcast.cli import parsing as given
from packcast.cli.options import variable_of
from packcast.cli.outcome import Outcome
from packcast.cli.terminal import say
from packcast.errors import PackcastError
from packcast.io.sinks.partial import partials_of, remove_if_unused
from packcast.io.sinks.target import check_replaceable, locate
from packcast.launch import validation
from packcast.launch.devices import host_name
from packcast.launch.exit import ProcessExit, die_with_parent, watch_signals
from packcast.launch.handover import received
from packcast.launch.nproc import run_nproc
from packcast.settings import Settings, fill_in

_BY_ADDRESS = ("workers", "listen", "address")  # options that choose the ranks
_PLAIN = [
    (re.compile(pattern), words)
    for pattern, words in (
        (r"Invalid value for '([^']+)': ", r"\1: "),
        (r"No such (option|command):? '?([^' ]+?)'?(?= |\.|$)", r"there is no \1 \2"),
        (r" \(Possible options: (.*)\)", r"; near names are \1"),
        (r"\. Did you mean '?([^']*)'?\?", r"; a near name is \1"),
        (r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", r"unexpected argument: \1"),
        (r"Missing argument '?(\[?[A-Z].*?\]?)'?$", r"\1 is missing"),
    )
]
_OPTION = re.compile(r"'?(--[a-z][a-z-]*)'?")
# Kubernetes sets PACKCAST_PORT=tcp://10.0.0.1:80 in every pod if a service is called packcast.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://.*")


def begin(context: typer.Context, command: str, *, json: str | None, verbose: bool) -> Outcome:
    """Set what the report of a usage error needs: -v and --json."""
    outcome = context.obj
    assert isinstance(outcome, Outcome)
    outcome.command, outcome.verbose = command, verbose
    if command in ("send", "recv", "bench"):
        by_address = any(context.params.get(name) for name in _BY_ADDRESS)
        outcome.launch = validation.launch_of(os.environ, by_address=by_address)
    outcome.json = given.json_target(json)
    return outcome


def forget_service_links(environ: MutableMapping[str, str]) -> None:
    """Remove PACKCAST_PORT if Kubernetes has set it for a service called packcast."""
    name = variable_of("--port")
    if _SERVICE_LINK.fullmatch(environ.get(name, "")):
        del environ[name]


def name_variables(error: PackcastError, argv: Sequence[str], environ: Mapping[str, str]) -> None:
    """Add to each option in the error's message the environment variable that it was read from."""
    typed = {word.partition("=")[0] for word in takewhile(lambda word: word != "--", argv)}

    def with_variable(found: re.Match[str]) -> str:
        variable = variable_of(found[1])
        if found[1] in typed or not environ.get(variable):
            return found[0]
        return f"{found[0]} (from {variable})"

    error.message = _OPTION.sub(with_variable, error.message)


def plain_words(message: str) -> str:
    """The option parser's message in plain words."""
    for pattern, words in _PLAIN:
        message = pattern.sub(words, message)
    return validation.plain_words(message)


def typed_options(context: typer.Context) -> set[str]:
    """The parameters that were given on the command line itself."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def start_ranks(outcome: Outcome, nproc: int) -> int:
    """Start `nproc` ranks that run the same command; returns the exit code of the launch."""
    _check_targets(outcome.settings, nproc)
    os.environ.pop("PACKCAST_NPROC", None)  # or every rank would start ranks of its own
    argv = given.without_nproc(outcome.argv)

    def look_after(patient: bool) -> None:
        _clear_leftovers(outcome.settings, nproc, remove=patient)

    return run_nproc(argv, nproc, say=say, look_after=look_after)


def _check_targets(settings: Settings | None, nproc: int) -> None:
    """Find a copy that is there already before the ranks spend seconds on importing torch."""
    if settings is not None and not settings.force and not settings.in_place:
        for target in _targets_of(settings, range(1, nproc)):
            check_replaceable(locate(Path(target), "0" * 32), (), force=False)


def _targets_of(settings: Settings | None, ranks: Iterable[int]) -> list[str]:
    if settings is None or settings.sink != "write" or settings.target is None:
        return []
    target, host = settings.target, host_name()
    return sorted({fill_in(target, rank=rank, local_rank=rank, host=host) for rank in ranks})


def _clear_leftovers(settings: Settings | None, nproc: int, *, remove: bool) -> None:
    """Remove, or only name, the partial directories of ranks that were killed."""
    for target in _targets_of(settings, range(nproc)):
        for partial in partials_of(os.path.realpath(target)):
            if partial.state == "unknown":
                continue
            if remove and partial.state == "unused" and remove_if_unused(partial):
                say(f"{partial}: removed")
            else:
                folder = os.path.dirname(partial.path)
                say(f"{partial}: `packcast clean --yes {folder}` removes it")


def warner(outcome: Outcome, *, quiet: bool) -> Callable[[str], None]:
    """A function that prints a warning on one rank of each host."""

    def warn(text: str) -> None:
        if not quiet and outcome.launch.local_rank == 0 and outcome.launch.kind != "nproc":
            say(f"packcast: warning: {text}")

    return warn


def be_a_rank(outcome: Outcome) -> ProcessExit:
    """Take signals, and die with the launcher. Before torch, whose threads must inherit the mask.

    A failure from here on ends the process at once, through the exit handler: tearing down a broken
    process group can hang.
    """
    exit_handler = ProcessExit(outcome.failed, say=say)
    handover = received()
    watch_signals(exit_handler, patient=handover is not None)
    if outcome.launch.kind in ("nproc", "torchrun"):
        die_with_parent(handover.launcher_pid if handover is not None else None)
    if not outcome.verbose:
        # Otherwise torch's threads report a lost peer in thirty lines of C++ before we do in one.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return exit_handler
