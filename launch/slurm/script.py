"""Render the sbatch script of a run and its srun commands. Pure: the same job gives the same text."""

import shlex
import sys
from pathlib import Path

import jinja2

from keepwarm.launch.batch_system import Array
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.cluster import SlurmSpec
from keepwarm.trainer.job.run_folder import RUN_FILE, RunFolder
from keepwarm.trainer.job.spec import JobSpec

SCRIPT = "job.sbatch"
"""Name of the rendered script in the run folder."""
LOG = "slurm-%j.log"
ALLOCATION_VACANCY_TIMEOUT_S = 10.0
"""Maximum time for which a slot may stay vacant inside an allocation."""
WATCHER = "keepwarm-watcher"
"""Name of the job step of the watchers."""
OWN_STEPS = ("batch", "extern", WATCHER)
"""Names of the job steps in which no ranks run and no node is checked."""
CODE = "code"
"""Folder inside the run folder that holds the copy of the code."""


def render(job: JobSpec, folder: Path, *, array: Array | None = None, python: str = sys.executable) -> str:
    """Return the whole script. Inside the allocation, `keepwarm.launch.slurm.job` decides what to start where.

    Raises:
        SpecError: keys of `cluster.slurm` that another version accepted do not fit together.
    """
    if (found := job.cluster.slurm.conflict()) is not None:
        raise SpecError(f"cluster.slurm.{found[0]}: {found[1]}")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(SCRIPT).render(
        name=" ".join(job.name.split()),
        nodes=job.layout.nodes,
        ranks_per_node=job.layout.ranks_per_node,
        spares=job.cluster.slurm.spares,
        options=options(job, folder, array),
        environment=environment_lines(job.cluster.slurm, python),
        code=shlex.quote(str(folder / CODE)) if job.cluster.slurm.copy_code else None,
        setup=job.cluster.slurm.setup,
        command=shlex.join([interpreter(job.cluster.slurm, python), "-P", "-m", "keepwarm.launch.slurm.job"])
        + f" {shlex.quote(str(folder))}"
        + ('/"$SLURM_ARRAY_TASK_ID"' if array is not None else ""),
    )


def options(job: JobSpec, folder: Path, array: Array | None = None) -> list[str]:
    """Return the script's sbatch options, quoted as sbatch reads them."""
    slurm = job.cluster.slurm
    logs = str(folder).replace("%", "%%") + ("" if array is None else "/%a")
    asked = {
        "job-name": job_name(job),
        "nodes": str(job.layout.nodes + slurm.spares),
        "ntasks-per-node": str(job.layout.ranks_per_node),
        "cpus-per-task": str(cpus_per_rank(job)),
        "gpus-per-node": slurm.gpus_per_node,
        "gres": ",".join(slurm.gres) or None,
        "mem": slurm.mem,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "reservation": slurm.reservation,
        "time": slurm.time,
        "begin": slurm.begin,
        "dependency": slurm.dependency,
        "constraint": slurm.constraint,
        "nodelist": ",".join(slurm.nodelist) or None,
        "exclude": ",".join(slurm.exclude) or None,
        "mail-type": None if slurm.mail is None else ",".join(slurm.mail.type),
        "mail-user": None if slurm.mail is None else slurm.mail.user,
        "output": f"{logs}/logs/{LOG}",
        "array": None if array is None else _array(array),
        "open-mode": "append",
        # What happens to be set where the job is submitted must not change it.
        "export": ",".join(slurm.export) or "NONE",
        # To the ranks only: a signal that ends the batch shell would end the ranks before they have saved.
        "signal": f"USR1@{slurm.save_before_limit}",
    }
    named = [f"--{key}={shlex.quote(str(value))}" for key, value in asked.items() if value is not None]
    # Losing a node must not end the job: the other nodes hold its state.
    return [*named, "--no-kill", "--requeue", *slurm.extra]


def job_name(job: JobSpec) -> str:
    """Return the name of the job in SLURM."""
    return job.cluster.slurm.job_name or "-".join(job.name.split())


def environment_lines(slurm: SlurmSpec, python: str) -> list[str]:
    """Return the shell lines that set up what the ranks need; the job starts with what a login sets."""
    lines = [f"module load {shlex.join(slurm.modules)}"] if slurm.modules else []
    if slurm.conda is not None and not slurm.conda.startswith("/"):
        lines += ['eval "$(conda shell.bash hook)"', f"conda activate {shlex.quote(slurm.conda)}"]
    else:
        root = slurm.conda or slurm.venv
        kind = "CONDA_PREFIX" if slurm.conda else "VIRTUAL_ENV"
        lines += [f"export {kind}={shlex.quote(root)}"] if root else []
        lines.append(f"export PATH={shlex.quote(str(Path(interpreter(slurm, python)).parent))}:$PATH")
    if slurm.interface is not None:
        name = shlex.quote(slurm.interface)
        lines.append(f"export GLOO_SOCKET_IFNAME={name} NCCL_SOCKET_IFNAME={name}")
    if slurm.scratch is not None:
        lines.append(f'export TMPDIR="{slurm.scratch}"')
    return lines


def interpreter(slurm: SlurmSpec, python: str) -> str:
    """Return the Python of a job: that of its environment, else the one that submits."""
    root = slurm.conda or slurm.venv
    if root is None:
        return python
    return f"{root}/bin/python" if root.startswith("/") else "python"


def _array(array: Array) -> str:
    return f"0-{array.members - 1}" + ("" if array.max_parallel is None else f"%{array.max_parallel}")


def cpus_per_rank(job: JobSpec) -> int:
    return job.cluster.slurm.cpus_per_rank or job.numerics.threads_per_rank


def rank_step(
    job: JobSpec, folder: Path, nodes: list[str], *, resume: bool, spec: str = RUN_FILE, python: str = sys.executable
) -> list[str]:
    """Return the srun command that starts one task per rank, numbered along the nodes in SLURM's order; `spec` names
    the run's spec in its folder.
    """
    logs = str(RunFolder(folder).logs).replace("%", "%%")
    return [
        "srun",
        f"--nodes={job.layout.nodes}",
        f"--ntasks={job.layout.world_size}",
        f"--ntasks-per-node={job.layout.ranks_per_node}",
        f"--cpus-per-task={cpus_per_rank(job)}",
        f"--nodelist={','.join(nodes)}",
        "--distribution=block",
        # A step that ended with a dead node holds its resources for minutes; only one step runs at a time.
        "--overlap",
        # No --no-kill: when a node dies, SLURM must end the step on the other nodes, which would wait for it.
        "--kill-on-bad-exit=1",
        "--open-mode=append",
        f"--output={logs}/rank_%5t.log",
        *in_container(job.cluster.slurm, folder, python),
        *("-P", "-m", "keepwarm.trainer", str(folder / spec)),
        *(["--resume"] if resume else []),
    ]


def node_step(
    job: JobSpec, folder: Path, nodes: list[str], *, resume: bool, spec: str = RUN_FILE, python: str = sys.executable
) -> list[str]:
    """Return the srun command that starts one supervisor per node, spares included; each starts its slot's ranks."""
    logs = str(RunFolder(folder).logs).replace("%", "%%")
    return [
        "srun",
        f"--nodes={len(nodes)}",
        f"--ntasks={len(nodes)}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={job.layout.ranks_per_node * cpus_per_rank(job)}",
        f"--nodelist={','.join(nodes)}",
        "--overlap",
        # The other nodes continue when a node dies or its supervisor gives up.
        "--no-kill",
        "--kill-on-bad-exit=0",
        "--open-mode=append",
        f"--output={logs}/node_%N.log",
        *in_container(job.cluster.slurm, folder, python),
        # A node that comes back later cannot join the step: without a spare, the job is requeued.
        *("-P", "-m", "keepwarm.launch.slurm.node", str(folder), f"--vacancy-timeout={ALLOCATION_VACANCY_TIMEOUT_S:g}"),
        *([] if spec == RUN_FILE else [f"--spec={spec}"]),
        *(["--resume"] if resume else []),
    ]


def watch_step(job: JobSpec, folder: Path, nodes: list[str], address: str, python: str = sys.executable) -> list[str]:
    """Return the srun command that starts one watcher per node, outside containers, as the batch script runs."""
    return [
        "srun",
        f"--job-name={WATCHER}",
        f"--nodes={len(nodes)}",
        f"--ntasks={len(nodes)}",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        f"--nodelist={','.join(nodes)}",
        "--overlap",
        # Also where steps do not overlap in these, the ranks get all of them.
        "--gres=none",
        "--mem=0",
        "--no-kill",
        "--kill-on-bad-exit=0",
        # They write to the batch script's log, and not through this srun, which dies with the batch script.
        "--output=none",
        *(python, "-P", "-m", "keepwarm.launch.slurm.watcher", str(folder), address, job.cluster.slurm.launcher),
    ]


def in_container(slurm: SlurmSpec, folder: Path, python: str) -> list[str]:
    """Return srun's container options, if the job names an image, followed by the interpreter."""
    if (container := slurm.container) is None:
        return [python]
    mounts = [f"{folder}:{folder}", *container.mounts]
    if container.runtime == "pyxis":
        return [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}", container.python]
    gpus = ["--nv"] if slurm.gpus else []
    return ["apptainer", "exec", *gpus, "--bind", ",".join(mounts), container.image, container.python]
