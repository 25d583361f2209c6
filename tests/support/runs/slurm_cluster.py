"""A real SLURM cluster on one machine, for tests: every node has its own network, host name, processes, /tmp, /dev/shm.

Each node, and the login node that the controller runs on, is one `unshare` process that the kernel kills with this one,
and with it everything inside the node: names, addresses and mounts exist in these namespaces alone. So clusters do not
meet, and nothing is left behind however the tests end. Needs root, and Debian's packages slurmctld, slurmd,
slurm-client, munge and iproute2; with accounting also slurmdbd, mariadb-server-core and mariadb-client-core.
"""

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

ROOT = Path(__file__).parents[3]
SMALL_DISK_MIB = 24
DEADLINE = 120.0
"""Seconds that anything waited for may take on a busy machine."""
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey", "ip", "nsenter", "unshare")
_ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db")
_LOGIN = "login"
_ADDRESS = "10.77.0"
_PR_SET_PDEATHSIG = 1


def missing(*, accounting: bool = False) -> str | None:
    """Why there can be no cluster here, if so."""
    needed = (*_PROGRAMS, *_ACCOUNTING) if accounting else _PROGRAMS
    absent = [name for name in needed if shutil.which(name) is None]
    if absent:
        return f"SLURM is not installed ({', '.join(absent)}): .ci/run installs it"
    if os.geteuid() != 0:
        return "a SLURM cluster in namespaces needs root"
    probe = [
        "unshare",
        "--net",
        "--uts",
        "--ipc",
        "--mount",
        "--pid",
        "--fork",
        "ip",
        "link",
        "add",
        "br0",
        "type",
        "bridge",
    ]
    made = subprocess.run(probe, capture_output=True, text=True, check=False, timeout=60)
    return f"namespaces or bridges are not permitted here: {made.stderr.strip()}" if made.returncode else None


def await_that(condition: Callable[[], bool], what: str, deadline: float = DEADLINE) -> None:
    """Until the condition holds; fails, saying what was waited for, when the deadline passes."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"waited {deadline:g} s for {what}"
        time.sleep(0.1)


@dataclass
class SlurmCluster:
    """Nodes node0, node1... and a login node. They share `root`, the checkout and Python; `root/small` is a disk of
    `SMALL_DISK_MIB` that only they see.
    """

    root: Path
    nodes: int = 4
    cpus: int = 4
    gpus: int = 0
    options: str = ""
    """More lines for slurm.conf."""
    files: dict[str, str] = field(default_factory=dict)
    """More files beside it."""
    accounting: bool = False
    """Whether the login node also runs MariaDB and slurmdbd, which sacct asks."""
    machines: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    site: subprocess.Popen[bytes] | None = None
    """Keeps the mounts that all machines see."""

    def up(self) -> None:
        """Start everything; returns when every node is idle."""
        for name in (
            "state",
            "spool",
            "log",
            "run",
            "etc",
            "shared",
            "small",
            *(f"tmp/{name}" for name in self._names),
        ):
            (self.root / name).mkdir(parents=True)
        self._configure()
        self._mount_disk()
        self._boot_machine(_LOGIN, self._login_script())
        self._network()
        for name in self._names[1:]:
            self.boot(name)
        await_that(self._all_idle, "all nodes to become idle")

    def down(self) -> None:
        """Kill every node. What they wrote stays in `root`."""
        for name in list(self.machines):
            self.crash(name)
        for process in self.started:
            process.wait()
        if self.site is not None:
            self.site.kill()
            self.site.communicate()

    def seen(self, path: Path) -> Path:
        """Where this process sees a path of the machines below `root/small`."""
        assert self.site is not None
        return Path(f"/proc/{self.site.pid}/root{path}")

    def stopped(self) -> list[str]:
        """Nodes that do not run."""
        return [name for name in self._names if name not in self.machines]

    def boot(self, name: str) -> None:
        """Start a node that does not run."""
        self._boot_machine(name, self._node_script(name))
        self._cable(name)

    def crash(self, name: str) -> None:
        """A power loss: everything on the node is killed at once."""
        machine = self.machines.pop(name)
        for pid in _children(machine.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        machine.kill()
        machine.wait()

    def processes(self, name: str) -> list[str]:
        """The command lines of all processes of a node that belong to no daemon."""
        listed = self.on(name, "ps", "-ww", "-eo", "pid,args", "--no-headers").stdout.splitlines()
        own = ("slurmd", "slurmctld", "munged", "machine-init", "ps -ww")
        return [line.strip() for line in listed if not any(word in line for word in own)]

    def on(
        self, name: str, *command: str, timeout: float = DEADLINE, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node, or on the login node."""
        return subprocess.run(
            [*self._enter(name, cwd), *command],
            capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL,
            env=self._environment | environment,
        )  # fmt: skip

    def login(self, *command: str, timeout: float = DEADLINE, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node."""
        return self.on(_LOGIN, *command, timeout=timeout, cwd=None, **environment)

    def start(self, *command: str, output: Path) -> subprocess.Popen[bytes]:
        """Start a command on the login node; it ends with the cluster."""
        return self.start_on(_LOGIN, *command, output=output)

    def start_on(self, name: str, *command: str, output: Path) -> subprocess.Popen[bytes]:
        """Start a command on a node; it ends with the cluster."""
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*self._enter(name), *command],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=self._environment,
            )  # fmt: skip
        self.started.append(process)
        return process

    def keepwarm(self, *arguments: str, timeout: float = DEADLINE) -> subprocess.CompletedProcess[str]:
        """Run the command `keepwarm` on the login node."""
        return self.login(sys.executable, "-P", "-m", "keepwarm", *arguments, timeout=timeout)

    def python(self, name: str, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a Python module on a node."""
        return self.on(name, sys.executable, "-P", "-m", module, *arguments)

    def job_state(self, job: str) -> str:
        """As squeue names it, for example RUNNING; a job keeps its last state for five minutes."""
        return self.login("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").stdout.strip()

    def await_end(self, job: str, deadline: float = 280.0) -> str:
        """The state that the job ended with."""
        going = ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED", "SUSPENDED", "")
        await_that(lambda: self.job_state(job) not in going, f"job {job} to end", deadline)
        return self.job_state(job)

    def await_idle(self, deadline: float = DEADLINE) -> None:
        """Until no job holds any node, and nothing but daemons runs on them."""
        await_that(self._all_idle, "all nodes to become idle", deadline)
        for name in self._names[1:]:
            await_that(functools.partial(self._is_bare, name), f"the processes of {name} to end", deadline)

    def _is_bare(self, name: str) -> bool:
        return not self.processes(name)

    @property
    def _names(self) -> list[str]:
        return [_LOGIN, *(f"node{i}" for i in range(self.nodes))]

    @property
    def _environment(self) -> dict[str, str]:
        scripts = str(Path(sysconfig.get_path("scripts")))
        path = os.pathsep.join([scripts, os.environ["PATH"], "/usr/sbin", "/sbin"])
        foreign = ("SLURM_", "SBATCH_", "PMI", "OMPI_", "KEEPWARM_", "XDG_RUNTIME_DIR")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        own = {"PATH": path, "SLURM_CONF": str(self.root / "etc/slurm.conf"), "OMP_NUM_THREADS": "1"}
        return kept | own | {"KEEPWARM_SITE": ""}

    def _enter(self, name: str, cwd: Path | None = None) -> list[str]:
        (init,) = _children(self.machines[name].pid)
        place = f"--wdns={cwd or self.root / 'shared'}"
        return ["nsenter", f"--target={init}", "--net", "--uts", "--ipc", "--mount", "--pid", place]

    def _mount_disk(self) -> None:
        disk = quote(f"{self.root}/small")
        mount = f"mount -t tmpfs -o size={SMALL_DISK_MIB}m tmpfs {disk} && echo mounted && exec sleep infinity"
        self.site = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", mount],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
        assert self.site.stdout is not None
        assert self.site.stdout.readline() == b"mounted\n"

    def _boot_machine(self, name: str, script: str) -> None:
        assert name not in self.machines, f"{name} runs already"
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self.machines[name] = subprocess.Popen(
                [
                    *("nsenter", f"--target={self.site.pid if self.site else os.getpid()}", "--mount"),
                    "unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
                    "bash", "-c", f"set -e\n{self._common_script(name)}\n{script}", "machine-init",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment, start_new_session=True,
                preexec_fn=_die_with_parent,
            )  # fmt: skip
        await_that(lambda: bool(_children(self.machines[name].pid)), f"{name} to boot")

    def _common_script(self, name: str) -> str:
        """A /tmp, /dev/shm and host name of its own; what the nodes share is put back where it was."""
        own = self.root / "tmp" / name
        shared = [path for path in (self.root, ROOT, Path(sys.prefix), Path(sys.base_prefix)) if _below(path, "/tmp")]
        lines = [f"hostname {name}", f"mount --bind {quote(f'{self.root}/etc/hosts')} /etc/hosts", "ip link set lo up"]
        for path in shared:
            at = quote(str(own / path.relative_to("/tmp")))
            lines += [f"mkdir -p {at}", f"mount --rbind {quote(str(path))} {at}"]
        lines += [f"chmod 1777 {quote(str(own))}", f"mount --rbind {quote(str(own))} /tmp"]
        lines += ["mount -t tmpfs -o size=2g tmpfs /dev/shm"]
        return "\n".join(lines)

    def _login_script(self) -> str:
        munge = f"{self.root}/run/munge"
        accounting = []
        if self.accounting:
            database, config = f"{self.root}/database", f"{self.root}/etc/slurmdbd.conf"
            answers = lambda port: f"until (: </dev/tcp/127.0.0.1/{port}) 2>/dev/null; do sleep 0.05; done"  # noqa: E731
            accounting = [
                f"mariadb-install-db --no-defaults --user=root --datadir={database} --skip-test-db >/dev/null",
                f"mariadbd --no-defaults --user=root --datadir={database} --socket={self.root}/run/database "
                "--bind-address=127.0.0.1 --skip-grant-tables &",
                answers(3306),
                f"install -m 600 {config}.open {config}",
                "slurmdbd -D &",
                answers(6819),
            ]
        return "\n".join(
            (
                "ip link add br0 type bridge",
                f"ip addr add {_ADDRESS}.254/24 dev br0",
                "ip link set br0 up",
                f"munged --foreground --force --key-file={self.root}/etc/munge.key --socket={munge} "
                f"--pid-file={munge}.pid --log-file={self.root}/log/munged.log --seed-file={munge}.seed &",
                f"until [ -S {munge} ]; do sleep 0.05; done",
                *accounting,
                "slurmctld -D &",
                "wait  # and reap the orphans of this machine",
            )
        )

    def _node_script(self, name: str) -> str:
        return (
            f"until ip link show eth0 up 2>/dev/null | grep -q eth0; do sleep 0.05; done\nslurmd -D -N {name} &\nwait"
        )

    def _network(self) -> None:
        found = lambda: self.login("ip", "link", "show", "br0", "up").stdout != ""  # noqa: E731
        await_that(found, "the network of the login node")

    def _cable(self, name: str) -> None:
        """A pair of network devices between the bridge and the node; it goes when one of the two does."""
        index = int(name.removeprefix("node"))
        (init,) = _children(self.machines[name].pid)
        (login,) = _children(self.machines[_LOGIN].pid)
        inside = ["nsenter", f"--target={login}", "--net"]
        subprocess.run([*inside, "ip", "link", "delete", f"ve{index}"], capture_output=True, check=False, timeout=60)
        for command in (
            [*inside, "ip", "link", "add", f"ve{index}", "type", "veth", "peer", "name", "eth0", "netns", str(init)],
            [*inside, "ip", "link", "set", f"ve{index}", "master", "br0", "up"],
            ["nsenter", f"--target={init}", "--net", "ip", "addr", "add", f"{_ADDRESS}.{10 + index}/24", "dev", "eth0"],
            ["nsenter", f"--target={init}", "--net", "ip", "link", "set", "eth0", "up"],
        ):
            subprocess.run(command, check=True, timeout=60)

    def _all_idle(self) -> bool:
        listed = self.login("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%T").stdout.split()
        return listed == ["idle"] * self.nodes

    def _configure(self) -> None:
        etc = self.root / "etc"
        subprocess.run(["mungekey", "--create", f"--keyfile={etc}/munge.key"], check=True, timeout=60)
        (etc / "munge.key").chmod(0o600)
        gres = f"Gres=gpu:{self.gpus}" if self.gpus else ""
        hosts = ["127.0.0.1 localhost", f"{_ADDRESS}.254 {_LOGIN}"]
        nodes = []
        for index in range(self.nodes):
            address = f"{_ADDRESS}.{10 + index}"
            hosts.append(f"{address} node{index}")
            nodes.append(
                f"NodeName=node{index} NodeAddr={address} CPUs={self.cpus} RealMemory=16000 {gres} State=UNKNOWN"
            )
        if self.gpus:
            for index in range(self.gpus):
                (etc / f"gpu{index}").touch()
            (etc / "gres.conf").write_text(f"Name=gpu File={etc}/gpu[0-{self.gpus - 1}]\n")
            nodes.insert(0, "GresTypes=gpu")
        (etc / "hosts").write_text("\n".join(hosts) + "\n")
        names = f"node[0-{self.nodes - 1}]"
        conf = _CONF.format(root=self.root, login=_LOGIN, address=_ADDRESS, nodes="\n".join(nodes), names=names)
        if self.accounting:
            kept = "\n".join(
                (
                    "AccountingStorageType=accounting_storage/slurmdbd",
                    f"AccountingStorageHost={_LOGIN}",
                    f"AccountingStoragePass={self.root}/run/munge",
                )
            )
            conf = conf.replace("AccountingStorageType=accounting_storage/none", kept)
            (etc / "slurmdbd.conf.open").write_text(_DATABASE_CONF.format(root=self.root, login=_LOGIN))
        (etc / "slurm.conf").write_text(conf + self.options + "\n")
        for name, text in self.files.items():
            (etc / name).write_text(text)


# Daemons are in their own namespaces: every cluster may use the same ports. cred_expire also sets how long a requeued
# job is held back (two minutes by default). Without cgroups, as namespaces here have none of their own.
_CONF = """\
ClusterName=tests
SlurmctldHost={login}({address}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/run/munge,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PropagateResourceLimits=NONE
MpiDefault=none
SwitchType=switch/none
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
KillWait=20
WaitTime=0
MinJobAge=300
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=10
CompleteWait=0
EpilogMsgTime=0
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
OverTimeLimit=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PriorityType=priority/basic
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=batch Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime=0
PartitionName=high  Nodes={names} MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
"""

_DATABASE_CONF = """\
AuthType=auth/munge
AuthInfo=socket={root}/run/munge
DbdHost={login}
SlurmUser=root
LogFile={root}/log/slurmdbd.log
PidFile={root}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=root
StorageLoc=accounts
"""


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _below(path: Path, folder: str) -> bool:
    return path.resolve().is_relative_to(folder)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def losses(metrics: Path) -> list[str]:
    """The lines of a metrics file without what differs between equal runs."""
    import json

    records = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    return [json.dumps({key: value for key, value in record.items() if key != "step_time_s"}) for record in records]


def show(files: Sequence[Path]) -> str:
    """The ends of log files, for the message of a failed assertion."""
    return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files if file.is_file())
