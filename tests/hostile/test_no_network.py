"""Nothing speaks to the network unless a name of a hub was given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import socket, sys

class CalledError(BaseException):
    pass

def called(*args, **kwargs):
    raise CalledError("the network was asked for: " + repr(args)[:200])

for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, called)
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, called)
try:
    socket.create_connection(("example.org", 80))
except CalledError:
    print("guarded", flush=True)

from krdistill.cli import main

def call(*args):
    try:
        main(list(args))
    except SystemExit as stop:
        assert not stop.code, (args, stop.code)

small = ["--data.n_max", "40", "--data.imbalance_factor", "10", "--train.epochs", "1", "--baselines", "none"]
call("list")
call("inspect", "digits")
call("run", "digits-lt", *small, "--teacher.model", "resnet8w8", "--student.model", "resnet8w8", "--out", "run")
call("show", "run")
call("report", "run")
call("run", "digits-lt", *small, "--teacher.run", "run", "--student.model", "resnet8w8", "--out", "second")
call("bank", "build", "run", "--folder", "banks", "--views", "1")
call("export", "run")
call("rerun", "run")
print("done")
"""


def test_no_command_without_a_hub_name_asks_the_network(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.startswith("guarded") and done.stdout.rstrip().endswith("done")
