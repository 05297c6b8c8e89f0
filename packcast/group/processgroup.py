"""The torch process group: made over a given store and interface, taken down within a bound.

Knows nothing of launchers or of the control channel; errors of peers are that channel's business.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
import threading
from datetime import timedelta
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packcast.errors import RendezvousError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import Store

_SIOCGIFCONF = 0x8912
_IFREQ = struct.Struct("16s H 2x 4s 16x")  # name, address family, port, IPv4 address
_MAX_INTERFACES = 1024


def interface_of(address: str) -> str | None:
    """The name of the network interface that has this local address, as gloo and NCCL want it."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if isinstance(ip, IPv6Address):
        return _ipv6_interfaces().get(ip.packed)
    # All of 127.0.0.0/8 is this host, though only one address of it is on an interface.
    packed = socket.inet_aton("127.0.0.1") if ip.is_loopback else ip.packed
    return _ipv4_interfaces().get(packed)


def open_process_group(
    backend: Literal["nccl", "gloo"],
    *,
    rank: int,
    world_size: int,
    store: Store,
    device: torch.device,
    timeout_s: float,
    interface: str | None,
) -> dist.ProcessGroup:
    """Make the default process group; all ranks call this with the same store, and it waits.

    gloo and NCCL talk over `interface` unless the environment names one. `timeout_s` is a
    backstop: whoever watches the ranks must be faster. Raises RendezvousError where the ranks do
    not connect.
    """
    import torch.distributed as dist

    assert not dist.is_initialized(), "a default process group is there, and is not ours"
    _use_interface(interface)
    # A lost peer is the control channel's to tell. NCCL's own watchdog would abort this process
    # with a C++ stack, in the middle of its clean-up.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    try:
        dist.init_process_group(
            backend,
            rank=rank,
            world_size=world_size,
            store=store,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if backend == "nccl" else None,
        )
    except RuntimeError as error:  # torch's DistError and its kin
        reason = str(error).splitlines()[0]
        where = f" over {interface}" if interface else ""
        raise RendezvousError(
            f"the {backend} process group could not be made{where}: {reason}",
            hint=f"{_INTERFACE_VARIABLES[backend]} chooses another network interface",
        ) from error
    group = dist.group.WORLD
    assert group is not None
    return group


def begin_close(group: dist.ProcessGroup, device: torch.device) -> threading.Event:
    """Take the group down in the background: NCCL's takes half a second, and can hang.

    Every collective must have ended, and every rank should call this. The event comes when it is
    done; if it does not, a thread is stuck, and the process must leave by `os._exit`.
    """
    import torch
    import torch.distributed as dist

    done = threading.Event()

    def destroy() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.destroy_process_group(group)
        finally:
            done.set()

    threading.Thread(target=destroy, name="packcast-destroy", daemon=True).start()
    return done


_INTERFACE_VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}


def _use_interface(interface: str | None) -> None:
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        # NCCL takes a name for a prefix (eth1 for eth10 too) unless it is told otherwise.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def _ipv4_interfaces() -> dict[bytes, str]:
    """Every IPv4 address of this host, secondary ones too, and its interface's name."""
    names = array.array("B", bytes(_MAX_INTERFACES * _IFREQ.size))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("iL", len(names), names.buffer_info()[0])
        nbytes, _ = struct.unpack("iL", fcntl.ioctl(probe, _SIOCGIFCONF, request))
    entries = _IFREQ.iter_unpack(names[: nbytes // _IFREQ.size * _IFREQ.size])
    return {packed: name.rstrip(b"\0").decode() for name, _, packed in entries}


def _ipv6_interfaces() -> dict[bytes, str]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return {}  # a kernel without IPv6
    return {bytes.fromhex(line.split()[0]): line.split()[5] for line in lines}
