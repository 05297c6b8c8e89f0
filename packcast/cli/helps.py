"""Long help texts, and defaults as the user would type them."""

from __future__ import annotations

from packcast.settings import (
    DEFAULT_HEARTBEAT_TIMEOUT_S,
    DEFAULT_JOIN_TIMEOUT_S,
    DEFAULT_STAGING,
    DEFAULT_STALL_TIMEOUT_S,
    MAX_FITTING_SIZE,
    MIN_FITTING_SIZE,
)
from packcast.units import format_exact_size

BUFFER_SIZE = (
    f"{format_exact_size(MIN_FITTING_SIZE)} to {format_exact_size(MAX_FITTING_SIZE)},"
    " by the checkpoint's size"
)
STAGING = format_exact_size(DEFAULT_STAGING)
JOIN_TIMEOUT = f"{DEFAULT_JOIN_TIMEOUT_S / 60:g}min"
HEARTBEAT_TIMEOUT = f"{DEFAULT_HEARTBEAT_TIMEOUT_S:g}s"
STALL_TIMEOUT = f"{DEFAULT_STALL_TIMEOUT_S / 60:g}min"

EVERY_OPTION = "Every option also reads PACKCAST_<NAME>, as in PACKCAST_BUFFER_SIZE=64MiB."
# One line per paragraph: typer wraps to the terminal, but keeps line breaks.
SEND_HELP = """Send a checkpoint to every worker.

In a single launch (torchrun, Slurm, mpirun, --nproc) every rank runs this command: \
the lowest rank sends; the others write to --out, compare with --verify, \
or, with neither, verify the bytes and drop them."""
RECV_HELP = """Receive a checkpoint: write it, compare it with a local one, or drop it.

Without a launcher, HOST:PORT is where `packcast send --workers N` listens. \
It may be started before the sender."""
SEND_EXAMPLES = f"""Example, three ranks on this machine: \
packcast send CKPT --out '/local/copy-{{rank}}' --nproc 3

Example, two other hosts: packcast send CKPT --workers 2 --listen node1:29400

{EVERY_OPTION}"""
RECV_EXAMPLES = f"""Example: packcast recv node1:29400 --out /local/model

{EVERY_OPTION}"""

VERIFY_HELP = """Compare copies with each other or with a manifest, without a transfer.

Every byte is read. All files and tensors that differ, are missing or extra are listed; then the \
exit code is 6. A single DIR is compared with its manifest, --against or the one beside it."""
VERIFY_EXAMPLES = f"""Example: packcast verify /shared/model /local/model

Example: packcast verify /shared/model --manifest /shared/model.xxh128

{EVERY_OPTION}"""

DOCTOR_EXAMPLES = f"""Example: packcast doctor /local --reach node1:29400

{EVERY_OPTION}"""

BENCH_HELP = """Measure how fast weights go from one rank to the others, beside what the hardware \
can do.

Every rank runs this command: with torchrun, Slurm, mpirun or --nproc; without any of them it \
starts a rank for each GPU of this machine, or two on its CPUs. Without CKPT random weights are \
made and removed again. The table goes to standard output.

Lists are written 16MiB,64MiB; ranges 16MiB..1GiB:x4 (each four times the last) or \
16MiB..64MiB:+16MiB (in steps). All combinations are measured, as far as they go together, and \
what `send` takes where nothing is said."""
BENCH_EXAMPLES = f"""Example, a first look at this machine: packcast bench

Example, which buffers for this checkpoint to disk: \
packcast bench CKPT --sink write --write-dir /local --buffer-size 4MiB..256MiB:x4 \
--num-buffers 2,4,8

Example, four GPUs, weights on the device: \
torchrun --no-python --nproc-per-node 4 packcast bench --shape dense,moe,tiny \
--source resident --sink land

Exit code 5 where --min-bandwidth was not reached, 6 where bytes were wrong.

{EVERY_OPTION}"""
