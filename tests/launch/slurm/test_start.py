"""What a start of a batch job continues from, by what is in the run folder."""

from pathlib import Path

import pytest

from keepwarm.ft.format import publication
from keepwarm.launch.slurm.allocation import Allocation
from keepwarm.launch.slurm.job import next_step
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.job.run_folder import RunFolder

JOB = Path(__file__).parents[3] / "configs" / "ci" / "slurm.yaml"


@pytest.mark.parametrize(("saved", "hint"), [(True, True), (True, False), (False, False)])
def test_start_resumes_from_a_checkpoint_even_if_a_full_disk_had_no_room_for_the_name_of_the_newest(
    tmp_path: Path, saved: bool, hint: bool
) -> None:
    run = RunFolder(tmp_path)
    run.metrics_file.write_text('{"step": 12}\n')
    if saved:
        written = run.checkpoints / "tmp-1-10-agents"
        written.mkdir(parents=True)
        identity = publication.Identity(run="r", epoch=1, step=10, layout="l")
        publication.write_manifest(written, identity, ranks=0, meta={})
        publication.publish(written, publication.folder(run.checkpoints, 10))
        if not hint:
            (run.checkpoints / publication.LATEST).unlink()
    here = Allocation(tmp_path, load_job(JOB, [f"output={tmp_path}"]), ["a", "b", "c"])
    command = next_step(here, ["a", "b", "c"], resume=False, begun=True, restarts=1)
    assert ("--resume" in command) == saved
    assert run.metrics_file.exists() == saved
