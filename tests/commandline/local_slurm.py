"""A Slurm cluster of two nodes on this machine, all on the loopback, as root and with Debian's slurm-wlm and munge."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from processes import free_port

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
NODES = ("n1", "n2")


def what_is_missing() -> str | None:
    """Why no cluster can be started here, in a line; None where one can."""
    if os.geteuid() != 0:
        return "a Slurm cluster on this machine needs root"
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge" if missing else None


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin"


class LocalSlurm:
    """A cluster of its own folder, ports and munge; nothing else on the machine is touched.

    Attributes:
        environment: what Slurm's programs and the jobs need to be in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        conf = folder / "slurm.conf"
        self.environment = os.environ | {"SLURM_CONF": str(conf), "PATH": _path()}
        self._daemons: list[subprocess.Popen[bytes]] = []
        conf.write_text(self._conf())
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "state").mkdir()

    def _conf(self) -> str:
        folder, host, cores = self.folder, socket.gethostname().partition(".")[0], os.cpu_count()
        settings = {
            "ClusterName": "local",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": free_port(),
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",  # a requeued job starts after it
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool-%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd-%n.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "ReturnToService": 2,
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "PropagateResourceLimits": "NONE",
            "KillWait": 10,
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        for node in NODES:
            (folder / f"spool-{node}").mkdir()
            lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={cores} RealMemory=1000")
        return "\n".join([*lines, f"PartitionName=main Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP", ""])

    def start(self) -> None:
        """Start munge and the daemons, and wait until both nodes are idle."""
        folder = self.folder
        files = [
            f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")
        ]
        self._run_beside("munged", "--foreground", "--force", *files)
        self._until(lambda: (folder / "munge.socket").exists(), "munge")
        self._run_beside("slurmctld", "-D")
        self._until(lambda: self.call("scontrol", "ping", check=False).endswith("is UP"), "the controller")
        for node in NODES:
            self._run_beside("slurmd", "-D", "-N", node)
        self._until(lambda: self.call("sinfo", "--noheader", "--states=idle", "--format=%D") == str(len(NODES)), "two idle nodes")

    def _run_beside(self, *command: str) -> None:
        log = (self.folder / f"{len(self._daemons)}-{command[0]}.log").open("wb")
        self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT))

    def _until(self, there: Callable[[], bool], what: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < end, f"no {what} within {seconds} s; see {self.folder}"
            time.sleep(0.2)

    def stop(self) -> None:
        """End the jobs and what was started here."""
        self.call("scancel", "--user=root", check=False)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def call(self, *command: str, check: bool = True, **variables: str) -> str:
        """Run one of Slurm's programs; what it printed."""
        environment = self.environment | variables
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """A job's, as `RUNNING`."""
        return self._field(job, "JobState")

    def number(self, task: str) -> str:
        """The job's number that a task of an array has, once it has begun."""
        self.wait_for(task, "RUNNING")
        return self._field(task, "JobId")

    def _field(self, job: str, name: str) -> str:
        fields = self.call("scontrol", "show", "job", job).split()
        return next(field for field in fields if field.startswith(f"{name}=")).partition("=")[2]

    def wait_for(self, job: str, *states: str, seconds: float = 180) -> str:
        """Its state, once it is one of these."""
        self._until(lambda: self.state(job) in states, f"job {job} in {states}, it is {self.state(job)}", seconds)
        return self.state(job)

    def wait_for_line(self, file: Path, line: str, count: int = 1, seconds: float = 180) -> None:
        """Return when a job has printed a line so many times."""
        self._until(lambda: file.exists() and file.read_text().count(line) >= count, f"{line!r} in {file}", seconds)
