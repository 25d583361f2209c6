"""What a real sbatch makes of the keys of `cluster.slurm`."""

from pathlib import Path

import pytest

from keepwarm.launch.slurm.script import render
from keepwarm.trainer.job.files import load_job
from tests.support.runs.slurm_cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "ci" / "tiny.yaml")

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
