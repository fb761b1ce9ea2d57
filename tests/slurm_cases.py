"""A Slurm of one node, on the loopback alone, for the tests that need one: Debian's slurm-wlm and munge."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SECONDS = 300
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={controller}
SlurmdPort={node}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# Those of two jobs that ask for 8 each, and for a GPU, which is none here.
CPUS = 16
GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"


@dataclass(frozen=True)
class Slurm:
    def call(self, *command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    def queue(self) -> list[str]:
        """Ids of the jobs that wait or run, each part of an array by itself."""
        return self.call("squeue", "-h", "-r", "-o", "%i").split()

    def wait(self, until: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not until():
            assert time.monotonic() < end, self.call("squeue")
            time.sleep(0.1)


@contextlib.contextmanager
def one_node(folder: Path) -> Iterator[Slurm]:
    """Start one, and stop it; skip where it is not installed."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=paths()) is None]
    if missing or os.getuid():
        pytest.skip(f"needs root and Debian's slurm-wlm and munge (no {', '.join(missing)})")
    (folder / "key").write_bytes(secrets.token_bytes(1024))
    (folder / "key").chmod(0o600)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    config = folder / "slurm.conf"
    controller, node = free_ports(2)
    names = {"host": socket.gethostname().partition(".")[0], "cpus": CPUS, "user": "root"}
    config.write_text(CONFIG.format(folder=folder, controller=controller, node=node, **names))
    (folder / "gres.conf").write_text(GPUS)
    munge = [f"--{name}={folder}/munge.{end}" for name, end in (("socket", "socket"), ("pid-file", "pid"))]
    munge += [f"--seed-file={folder}/munge.seed", f"--key-file={folder}/key", "--foreground"]
    os.environ["SLURM_CONF"] = str(config)
    slurm = Slurm()
    with contextlib.ExitStack() as services:
        services.callback(os.environ.pop, "SLURM_CONF")
        for command in (["munged", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
            log = services.enter_context((folder / f"{command[0]}.out").open("w"))
            program = shutil.which(command[0], path=paths())
            assert program is not None
            process = subprocess.Popen(
                [program, *command[1:]], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
            services.callback(process.wait)
            services.callback(process.terminate)
            if command[0] == "munged":
                slurm.wait((folder / "munge.socket").exists)
        slurm.wait(lambda: is_idle(slurm))
        services.callback(lambda: slurm.call("scancel", "--user", "root"))
        yield slurm


def is_idle(slurm: Slurm) -> bool:
    with contextlib.suppress(subprocess.CalledProcessError):  # it is not up yet
        return "idle" in slurm.call("sinfo", "-h", "-o", "%t")
    return False


def paths() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as open_ones:
        found = []
        for _ in range(number):
            one = open_ones.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            found.append(one.getsockname()[1])
    return found
