"""Starts a script on every device of this machine.

Does what torchrun does for a static group, but reports an error in one line.

    python -m mindspeed_mm.tools.launch --nproc_per_node 8 --name train SCRIPT ARG...

The ranks end with this process, however it ends. It forwards a signal to them once. A second Ctrl-C kills
them.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from mindspeed_mm.errors import LaunchError, MindSpeedMMError
from mindspeed_mm.files import open_append
from mindspeed_mm.processes import LAUNCHER, STOP_SIGNALS, STORE, exit_by_signal
from mindspeed_mm.tools.elapsed import elapsed_line
from mindspeed_mm.tools.screen import Screen

_LISTEN = 1024  # backlog: number of ranks that may connect before rank 0 accepts
_REPORT = 3.0  # seconds from the first failure until the other ranks are stopped
_KILL = 6.0  # seconds from the first failure until they are killed


def main(argv: Sequence[str]) -> None:
    """Run the command, and exit with the exit code of the run (docs/reference/exit_codes.md)."""
    options = _parse(argv)
    try:
        code = Launcher(options).run()
    except MindSpeedMMError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(1) from None
    if code == 128 + signal.SIGINT:
        exit_by_signal(signal.SIGINT)
    raise SystemExit(code)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mindspeed_mm.tools.launch", allow_abbrev=False)
    for name, default in (("nproc_per_node", 1), ("nnodes", 1), ("node_rank", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--master_addr", default="localhost")
    parser.add_argument("--master_port", type=int, default=0, help="0: any free port, on one node")
    parser.add_argument("--log_dir", default="logs")
    parser.add_argument("--name", default="run", help="prefix of the log file's name")
    parser.add_argument("--check", default="", help="flags for one process that checks the job first")
    parser.add_argument(
        "--show_check", action="store_true", help="show the output of the check on screen and in the log"
    )
    parser.add_argument("--rank_flags", default="", help="additional flags for the ranks")
    parser.add_argument(
        "--report_batch", type=int, default=0, help="global batch size for the final line; 0: no line"
    )
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser.parse_args(argv)


class Launcher:
    """A run on this machine: checks the job, starts the ranks, and writes to the screen and the log."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.world: int = options.nproc_per_node * options.nnodes
        stamp = f"{datetime.now():%Y%m%d_%H%M%S}"
        self.log_path = Path(options.log_dir) / f"{options.name}_{stamp}_node{options.node_rank}.log"
        self._log: BinaryIO | None = None
        self._signals: list[int] = []
        self._ranks: dict[int, subprocess.Popen[bytes]] = {}
        self._lines: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._clear = ""

    def run(self) -> int:
        """Check the job, start the ranks, wait for them, and return the exit code. Raises LaunchError."""
        if not 0 <= self.options.master_port < 1 << 16:
            raise LaunchError(
                f"got {self.options.master_port}", where="MASTER_PORT", expected="a port from 0 to 65535"
            )
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # respect nohup
                signal.signal(number, self._on_signal)
        with suppress(OSError):
            os.environ.setdefault("MINDSPEED_MM_TERMINAL", os.ttyname(2))
            self._clear = "\r\x1b[K" if os.environ["MINDSPEED_MM_TERMINAL"] and sys.stdout.isatty() else ""
        try:
            if self.options.check and (code := self._check()):
                return code
            store = self._listen()
            self._open_log()
            self._write(f"log: {self.log_path}")
            code = self._attend(store)
        finally:
            if self._log is not None:
                self._log.close()
                with suppress(OSError):
                    self.log_path.chmod(0o440)
        if code == 0 and self.options.report_batch:
            last = self.options.node_rank == self.options.nnodes - 1  # only the last rank logs the times
            line = elapsed_line(self.log_path, self.options.report_batch, expected=last)
            if line:
                self._print(line)
        return code

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signals.append(number)

    # Checking the job once

    def _check(self) -> int:
        options = self.options
        if options.show_check:
            self._open_log()
        command = [sys.executable, "-u", options.script, *options.arguments, *options.check.split()]
        process = subprocess.Popen(
            command,
            env={**os.environ, LAUNCHER: str(os.getpid())},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout is not None
        reader = threading.Thread(target=self._read, args=(0, process.stdout), daemon=True)
        reader.start()
        passed = 0
        while process.poll() is None or reader.is_alive():
            self._drain_check(options.show_check)
            for number in self._signals[passed:]:
                passed += 1
                _send(process, signal.SIGKILL if self._signals[:passed].count(signal.SIGINT) > 1 else number)
        self._drain_check(options.show_check)
        _kill_group(process)
        if self._signals:
            return 128 + self._signals[0]
        return process.returncode if process.returncode >= 0 else 1

    def _drain_check(self, show: bool) -> None:
        with suppress(queue.Empty):
            while True:
                _, line = self._lines.get(timeout=0.1)
                if show:
                    self._write(line)

    # Rendezvous

    def _listen(self) -> socket.socket | None:
        """Open the socket on which rank 0 serves the rendezvous.

        On a single node it listens on loopback, which no other machine can reach.
        """
        options = self.options
        if options.node_rank:
            return None
        try:
            if options.nnodes == 1:
                return socket.create_server(("127.0.0.1", options.master_port), backlog=_LISTEN)
            if socket.has_dualstack_ipv6():
                return socket.create_server(
                    ("", options.master_port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_LISTEN
                )
            return socket.create_server(("", options.master_port), backlog=_LISTEN)
        except OSError as error:
            local = ", or unset it: a single node uses a free port"
            raise LaunchError(
                (error.strerror or str(error)).lower(),
                where=f"MASTER_PORT={options.master_port}",
                fix=f"choose another{local if options.nnodes == 1 else ', the same on all nodes'}",
            ) from None

    def _environment(self, local_rank: int, address: str, port: int, store: int | None) -> dict[str, str]:
        options = self.options
        found = {
            "RANK": options.node_rank * options.nproc_per_node + local_rank,
            "LOCAL_RANK": local_rank,
            "GROUP_RANK": options.node_rank,
            "WORLD_SIZE": self.world,
            "LOCAL_WORLD_SIZE": options.nproc_per_node,
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
            LAUNCHER: os.getpid(),
            STORE: "" if store is None else store,
        }
        kept = dict(os.environ)
        kept.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        if options.nproc_per_node > 1:
            kept.setdefault("OMP_NUM_THREADS", "1")
        return {**kept, **{name: str(value) for name, value in found.items()}}

    def _start(self, store: socket.socket | None) -> list[threading.Thread]:
        options = self.options
        local = options.nnodes == 1
        address = "127.0.0.1" if local else options.master_addr
        port = store.getsockname()[1] if store is not None else options.master_port
        command = [sys.executable, "-u", options.script, *options.arguments, *options.rank_flags.split()]
        readers = []
        for local_rank in range(options.nproc_per_node):
            socket_of_rank = store.fileno() if store is not None and local_rank == 0 else None
            process = subprocess.Popen(
                command,
                env=self._environment(local_rank, address, port, socket_of_rank),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[] if socket_of_rank is None else [socket_of_rank],
                # So that Ctrl-C reaches only this process, which forwards it once.
                start_new_session=True,
            )
            rank = options.node_rank * options.nproc_per_node + local_rank
            self._ranks[rank] = process
            assert process.stdout is not None
            readers.append(threading.Thread(target=self._read, args=(rank, process.stdout), daemon=True))
            readers[-1].start()
        if store is not None:
            store.close()
        return readers

    def _read(self, rank: int, pipe: BinaryIO) -> None:
        for line in pipe:
            self._lines.put((rank, line.decode("utf-8", "replace").rstrip("\n")))

    # Waiting for the ranks

    def _attend(self, store: socket.socket | None) -> int:
        screen = Screen(self._print, str(self.log_path))
        readers = self._start(store)
        running = set(self._ranks)
        passed, since, ended_by_us = 0, 0.0, False
        while running:
            self._drain(screen, 0.1)
            for number in self._signals[passed:]:
                passed += 1
                if self._signals[:passed].count(signal.SIGINT) > 1:
                    self._end(running, signal.SIGKILL)
                    return 128 + signal.SIGINT
                if passed == 1:
                    screen.stopping, since = True, time.monotonic()
                    self._end(running, number)
            for rank in sorted(running):
                code = self._ranks[rank].poll()
                if code is not None:
                    running.discard(rank)
                    _kill_group(self._ranks[rank])  # kills its data workers
                    self._drain(screen, 0.0)
                    number = _stop_signal(code)
                    if number and not self._signals and (screen.failure is None or screen.failure.weak):
                        self._signals.append(number)  # sent to this rank only, which informs the others
                        screen.stopping = True
                    if not (ended_by_us and code < 0) and not (screen.stopping and code == -self._signals[0]):
                        screen.ended(rank, code)
            screen.tick()
            if screen.failed_at is not None:
                late = time.monotonic() - screen.failed_at
                if late > _REPORT and not ended_by_us:
                    ended_by_us = True
                    self._end(running, signal.SIGTERM)
                if late > _KILL:
                    self._end(running, signal.SIGKILL)
            elif since and time.monotonic() - since > _shutdown_limit():
                self._print(
                    f"still running {_shutdown_limit():.0f} s after the signal; killed. See {self.log_path}"
                )
                self._end(running, signal.SIGKILL)
                return 1
        for reader in readers:
            reader.join(2)
        self._drain(screen, 0.0)
        screen.tick(final=True)
        if screen.failure is not None:
            return 1
        if screen.stopping and any(process.returncode for process in self._ranks.values()):
            if not screen.logged_stop:
                self._print(f"stopped by {signal.Signals(self._signals[0]).name}")
            return 128 + self._signals[0]
        return 0

    def _drain(self, screen: Screen, wait: float) -> None:
        with suppress(queue.Empty):
            while True:
                rank, line = self._lines.get(timeout=wait) if wait else self._lines.get_nowait()
                if self._log is not None:
                    self._log.write(line.encode() + b"\n")
                screen.line(rank, line)
                wait = 0.0

    def _end(self, running: set[int], number: int) -> None:
        for rank in running:
            if number == signal.SIGKILL:
                _kill_group(self._ranks[rank])
            else:
                _send(self._ranks[rank], number)

    # Screen and log

    def _open_log(self) -> None:
        if self._log is None:
            try:
                self.log_path.parent.mkdir(parents=True, exist_ok=True)
                self._log = open_append(self.log_path, buffering=0)
            except OSError as error:
                raise LaunchError(
                    str(error.strerror), where=f"LOG_DIR={self.options.log_dir}", fix="choose another"
                ) from None

    def _write(self, line: str) -> None:
        """Write a line of this process to the screen and, if it is open, to the log."""
        self._print(line)
        if self._log is not None:
            self._log.write(line.encode() + b"\n")

    def _print(self, line: str) -> None:
        with suppress(OSError, ValueError):  # if the terminal or pager is closed, the log has every line
            sys.stdout.write(f"{self._clear}{line}\n")
            sys.stdout.flush()


def _stop_signal(code: int) -> int:
    """Return the stop signal that an exit code reports, or that killed the process; 0 if there is none."""
    return next((number for number in STOP_SIGNALS if code in (128 + number, -number)), 0)


def _shutdown_limit() -> float:
    """Return the number of seconds that a stopped run may take to end."""
    try:
        return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600"))
    except ValueError:
        return 600.0


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(number)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and every process that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
