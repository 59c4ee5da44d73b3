"""A program in a pseudo-terminal, as a user drives it."""

import fcntl
import os
import pty
import signal
import struct
import sys
import termios
import time
from contextlib import suppress

from tests.common import ROOT


class Terminal:
    """Python with these arguments, in a pseudo-terminal; `home` is its HOME.

    `see` waits for words and returns what was printed up to them.
    """

    def __init__(self, home, *arguments, env=None, columns=80):
        environment = {
            "TERM": "xterm-256color",
            "HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": str(columns),
        } | (env or {})
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            command = [sys.executable, *arguments]
            os.execve(sys.executable, command, {**os.environ, **environment})
        size = struct.pack("4H", 24, columns, 0, 0)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, size)
        os.set_blocking(self.fd, False)
        self.all = self.unseen = b""

    def type(self, text, seconds=20):
        text = text.encode() if isinstance(text, str) else text
        end = time.monotonic() + seconds
        while text:
            with suppress(BlockingIOError):  # the program has not read what was typed
                text = text[os.write(self.fd, text[:1000]) :]
            lives = self.read()
            assert lives and time.monotonic() < end, f"{text[:99]!r} was not read"

    def see(self, words, seconds=20):
        end = time.monotonic() + seconds
        while words.encode() not in self.unseen:
            lives = self.read()
            if not lives or time.monotonic() > end:
                break
        seen, found, rest = self.unseen.partition(words.encode())
        assert found, f"{words!r} is not in {self.unseen[-2000:]!r}"
        self.unseen = rest
        return (seen + found).decode(errors="replace")

    def read(self):
        """Read what was printed; False when the program has ended."""
        try:
            new = os.read(self.fd, 65536)
        except BlockingIOError:
            new = b""
            time.sleep(0.02)
        except OSError:
            return False
        self.all, self.unseen = self.all + new, self.unseen + new
        return True

    def ask(self, message, words):
        self.type(message + "\n")
        return self.see(words)

    def end(self, seconds=20):
        """The exit status."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = None
                return os.waitstatus_to_exitcode(status)
            if not self.read():
                time.sleep(0.02)
        raise AssertionError(f"the program goes on: {self.all[-500:]!r}")

    def kill(self):
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)
