"""What a real sbatch makes of the keys of `cluster.slurm`, and of a site file."""

import json
import re
import sys
from pathlib import Path

import pytest

from keepwarm.launch.slurm.script import render
from keepwarm.trainer.job.files import load_job
from tests.support.runs.slurm_cluster import DEADLINE, SlurmCluster
from tests.trainer.job.test_failure_domains import LISTS

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "ci" / "tiny.yaml")
SLURM = str(ROOT / "configs" / "ci" / "slurm.yaml")
SMALL = ("stages.0.tokens=1024", "log.tensorboard=false", "evaluation.samples=2")

TWO = ("parallel.pipeline=2", "cluster.ranks_per_node=1")

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ACCEPTED = [
    *(f"time={value}" for value in ("10", "10:30", "1:00:00", "1-2", "1-2:30", "1-2:30:10", "UNLIMITED", "0")),
    *(f"mem={value}" for value in ("0", "100", "1G", "1GB", "900M")),
    *(f"begin={value}" for value in ("16:00", "now", "now+1hour", "now+60", "'now + 2days'", "tomorrow", "noon")),
    *(
        f"begin={value}"
        for value in ("2030-01-20", "2030-01-20T12:34", "2030-01-20T12:34:56", "'01/20/30'", "'4:05 PM'")
    ),
    *(f"exclude={value}" for value in ("node3", "node[1-3]", "'node1,node[2,3]'", "[node1, 'node[2-3]']")),
    *(f"nodelist={value}" for value in ("'node3,node1'", "node[3,1]")),
    *(f"dependency={value}" for value in ("singleton", "'singleton,singleton'")),
    *(f"mail={value}" for value in ("{user: ann@lab.org}", "{type: 'begin,time_limit_80'}", "{type: [ALL]}")),
    "job_name=a name of its own",
    "export=[HOME, LANG]",
    """extra=["--comment='two words'", -H, '-m block', '--nice=5']""",
]


def test_sbatch_accepts_what_the_keys_accept(cluster: SlurmCluster, folder: Path) -> None:
    refused = {}
    for number, key in enumerate(ACCEPTED):
        script = folder / f"{number}.sbatch"
        nodes = TWO if key.startswith("nodelist") else ()
        script.write_text(render(load_job(Path(TINY), [*nodes, f"cluster.slurm.{key}", f"output={folder}"]), folder))
        done = cluster.login("sbatch", "--test-only", str(script))
        if done.returncode or "to start at" not in done.stderr:
            refused[key] = done.stderr
    assert refused == {}


def test_hostlists_are_expanded_as_scontrol_does(cluster: SlurmCluster) -> None:
    shown = {text: cluster.login("scontrol", "show", "hostnames", text).stdout.split() for text in LISTS}
    # scontrol prints a name as often as it is listed.
    assert {text: list(dict.fromkeys(names)) for text, names in shown.items()} == LISTS


def submitted(cluster: SlurmCluster, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-P", "-m", "keepwarm", "submit", TINY, *SMALL, *arguments]
    done = cluster.login(*command, timeout=DEADLINE, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_job_takes_defaults_of_the_site_and_no_environment_of_the_shell(cluster: SlurmCluster, folder: Path) -> None:
    run, seen, site = folder / "run", folder / "seen", folder / "site.yaml"
    site.write_text(
        f"""cluster:
  slurm:
    partition: high
    mem: 100M
    interface: eth0
    export: [GIVEN]
    setup: ['env > {seen}', 'type module || true', 'umask 027']
"""
    )
    shell = {"KEEPWARM_SITE": str(site), "GIVEN": "to the job", "STRAY": "of the shell", "GLOO_SOCKET_IFNAME": "none"}
    shell |= {"SBATCH_EXPORT": "ALL", "SBATCH_ARRAY_INX": "0-3", "SBATCH_OUTPUT": "/dev/null", "SBATCH_GPUS": "9"}
    job = submitted(cluster, *TWO, f"output={run}", "cluster.slurm.mem=200M", **shell)
    assert cluster.login("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%P %m").stdout.split() == [
        "high",
        "200M",
    ]
    log = run / "logs" / f"slurm-{job}.log"
    assert cluster.await_end(job) == "COMPLETED", log.read_text()
    shared = [run / "metrics.jsonl", log, *run.glob("checkpoints/iter_*/*")]
    assert len(shared) > 3
    assert {path.name: path.stat().st_mode & 0o040 for path in shared} == {path.name: 0o040 for path in shared}
    variables = dict(line.partition("=")[::2] for line in seen.read_text().splitlines())
    assert variables["GIVEN"] == "to the job"
    assert "STRAY" not in variables
    assert variables["GLOO_SOCKET_IFNAME"] == "eth0"
    assert variables["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    sources = json.loads((run / "run.json").read_text())["cluster"]["sources"]
    assert sources["slurm.partition"] == str(site)
    assert sources["slurm.mem"] == "job"


def test_submit_gives_ranks_the_cpus_of_their_node_unless_the_job_says_how_many(
    cluster: SlurmCluster, folder: Path
) -> None:
    two = ("parallel.data=2", "cluster.ranks_per_node=2", f"output={folder / 'run'}")
    said = cluster.keepwarm("submit", TINY, *SMALL, *two, "--dry-run")
    taken = "cluster.slurm.cpus_per_rank = 2: 4 CPUs of a node of partition batch, with 2 ranks on each"
    assert taken in said.stderr
    assert "#SBATCH --cpus-per-task=2\n" in said.stdout
    own = cluster.keepwarm("submit", TINY, *SMALL, *two, "cluster.slurm.cpus_per_rank=1", "--dry-run")
    assert "cpus_per_rank" not in own.stderr
    assert "#SBATCH --cpus-per-task=1\n" in own.stdout
    job = submitted(cluster, *two, "cluster.slurm.extra=[--hold]")
    assert re.search(r"\bNumCPUs=4\b", cluster.login("scontrol", "show", "job", job).stdout)
    shown = cluster.keepwarm("plan", str(folder / "run" / "run.json")).stdout
    assert taken.replace(" = 2: ", " 2 ") in " ".join(shown.split())
    cluster.login("scancel", job)


@pytest.mark.parametrize(
    ("domains", "remark"),
    [
        ("topology", "cluster.slurm.failure_domains = topology: SLURM knows no switches here"),
        ("{a: 'node[0-1]', b: node3}", "cluster.slurm.failure_domains: no domain has node2: such a node"),
        ("{a: 'node[0-1]', b: 'node[2-3]'}", ""),
    ],
    ids=["topology", "some", "all"],
)
def test_submit_says_which_nodes_are_in_no_failure_domain(
    cluster: SlurmCluster, folder: Path, domains: str, remark: str
) -> None:
    asked = (f"cluster.slurm.failure_domains={domains}", f"output={folder / 'run'}")
    said = cluster.keepwarm("submit", SLURM, "--dry-run", *asked)
    assert said.returncode == 0, said.stderr
    assert (remark in said.stderr) if remark else ("failure_domains" not in said.stderr)


def test_site_init_proposes_a_file_that_is_valid_and_names_the_partitions(cluster: SlurmCluster, folder: Path) -> None:
    file = folder / "new" / "site.yaml"
    made = cluster.keepwarm("site", "init", "-o", str(file))
    assert made.returncode == 0, made.stderr
    text = file.read_text()
    assert "cluster tests:" in text
    assert "#   batch*: 4 nodes of 4 CPUs, 16 GiB, no GPUs; time limit infinite" in text
    assert "#   high: 4 nodes of 4 CPUs" in text
    shown = cluster.login(sys.executable, "-P", "-m", "keepwarm", "site", "show", "--json", KEEPWARM_SITE=str(file))
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "partition:" in line)
    assert json.loads(shown.stdout)["defaults"] == [
        {"key": "cluster.slurm.partition", "value": "batch", "source": f"{file}:{line}"}
    ]
    again = cluster.keepwarm("site", "init", "-o", str(file))
    assert again.returncode == 2
    assert again.stderr == f"keepwarm: {file}: the file exists; --force replaces it\n"
