from __future__ import annotations

import subprocess
import sys
import time

import pytest

from crosspool.bench.server_use import ServerWatch
from crosspool.core.errors import ConfigError

pytestmark = pytest.mark.integration

MIB = 2**20
CHILD = """
import subprocess, sys, time
code = "b = bytearray(b'x' * (64 << 20)); input()"
child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
print(flush=True)
input()
b = bytearray(b"x" * (96 << 20))
begin = time.process_time()
while time.process_time() < begin + 0.3:
    pass
print(flush=True)
input()
del b
child.communicate(b"\\n")
print(flush=True)
input()
"""


def test_a_tree_of_processes_its_peak_and_its_time() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def go() -> None:
            process.stdin.write(b"\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            process.stdout.readline()  # type: ignore[union-attr]

        process.stdout.readline()
        with ServerWatch(process.pid) as watch:
            go()
            time.sleep(1.2)
            go()
        use = watch.use()
        process.stdin.close()
    assert use.cpu_seconds is not None and use.cpu_seconds >= 0.28
    assert use.rss.begin and use.rss.peak and use.rss.end
    assert use.rss.peak >= 160 * MIB
    assert use.rss.end < use.rss.peak - 90 * MIB
    assert use.pss.peak is not None and use.pss.peak <= use.rss.peak


def test_a_server_that_ends() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with ServerWatch(process.pid) as watch:
        process.communicate(b"\n")
    use = watch.use()
    assert use.rss.begin is not None
    assert (use.rss.end, use.pss.end, use.cpu_seconds) == (None, None, None)


def test_no_such_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for pid in (process.pid, -1):
        with pytest.raises(ConfigError, match="there is no process"):
            ServerWatch(pid)
