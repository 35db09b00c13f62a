"""Sockets that processes listen on, read from /proc (Linux only), and ports on which nothing listens."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

LISTEN = {"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"}
"""State of a listening socket in the tables of /proc/net. A UDP socket without a peer is in state 07."""


class Listener(NamedTuple):
    """A socket that a process listens on."""

    command: str
    address: str
    port: int

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.address).is_loopback


def free_port() -> int:
    """Return a port of the loopback device on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def descendants(pid: int, without: str = "\0") -> list[int]:
    """List a process and its descendants.

    A process whose command line contains the text `without` is left out, and so are all of its descendants.
    """
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has ended in the meantime
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        if without not in command(process := todo.pop()):
            found.append(process)
            todo += children.get(process, [])
    return found


def command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    return ""


def listeners(pids: Iterable[int]) -> set[Listener]:
    """List the sockets that these processes listen on."""
    bound = dict(_bound_sockets())
    found = set()
    for pid in pids:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    inode = str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]")
                    if inode in bound:
                        found.add(Listener(command(pid), *bound[inode]))
    return found


def _bound_sockets() -> Iterable[tuple[str, tuple[str, int]]]:
    """Yield the inode, address and port of every listening socket of this machine."""
    for table, state in LISTEN.items():
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state:
                address, port = fields[1].split(":")
                yield fields[9], (_parse_address(address), int(port, 16))


def _parse_address(text: str) -> str:
    """Parse an address of /proc/net: 32-bit words whose bytes are in reverse order."""
    raw = bytes.fromhex(text)
    ordered = b"".join(raw[start : start + 4][::-1] for start in range(0, len(raw), 4))
    address = ipaddress.ip_address(ordered)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
