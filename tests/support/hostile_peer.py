"""Ranks of a local launch that are attacked: a hostile peer sends pickles to their ports and into their store."""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from open_sockets import listeners

from pipelines.driver.train.launch import run_rank
from pipelines.formats.run_folder import RunFolder, write_json


class Exploit:
    """An object whose pickle creates a file when the pickle is loaded."""

    def __init__(self, executed: Path) -> None:
        self.executed = executed

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.executed,)


def rank_with_attacked_ports(run_dir: str) -> None:
    """Run a rank while each of its listening ports repeatedly receives a pickle and random bytes."""
    run, rank = RunFolder(Path(run_dir)), int(os.environ["RANK"])
    threading.Thread(target=attack_ports, args=(run, rank), daemon=True).start()
    run_rank(run_dir)


def attack_ports(run: RunFolder, rank: int) -> None:
    sent: dict[str, int] = {}
    while True:
        for listener in listeners([os.getpid()]):
            for data in (payload(run), os.urandom(256), b"\xff" * 64):
                with suppress(OSError), socket.create_connection((listener.address, listener.port), 1) as peer:
                    peer.sendall(data)
                    sent[listener.address] = sent.get(listener.address, 0) + 1
        write_json(run.path / "attacks" / str(rank), sent)
        time.sleep(0.2)


def rank_with_attacked_store(run_dir: str) -> None:
    """Run a rank whose rendezvous store already contains pickles when the rank starts."""
    run, store = RunFolder(Path(run_dir)), Path(os.environ["LAKESIGHT_STORE"])
    with store.open("ab") as file:
        file.write(payload(run))
    write_json(run.path / "attacks" / os.environ["RANK"], {"mode": store.parent.stat().st_mode & 0o777})
    run_rank(run_dir)


def payload(run: RunFolder) -> bytes:
    return pickle.dumps(Exploit(run.path / "executed"))
