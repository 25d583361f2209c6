"""What stops a run before it starts."""

from pathlib import Path

import pytest

from keepwarm.launch.errors import PreflightError
from keepwarm.launch.run.preflight import check_disk, check_memory
from keepwarm.trainer.job.files import load_job


def test_check_disk_job_without_room_for_a_checkpoint_is_refused(tmp_path: Path) -> None:
    check_disk(load_job(Path("ci/tiny"), [f"output={tmp_path}/not/yet/there"]))
    with pytest.raises(PreflightError, match=rf"takes \d.* and {tmp_path} has .* free"):
        check_disk(load_job(Path("mt-nlg-530b"), [f"output={tmp_path}/runs/large"]))


def test_check_memory_smaller_layout_that_needs_too_much_is_refused() -> None:
    shrink = ["cluster.elastic=shrink", "checkpoint.every=10", "cluster.ranks_per_node=8"]
    check_memory(load_job(Path("ci/tiny"), ["parallel.data=2", *shrink[:2]]), emulated=True)
    large = load_job(Path("mt-nlg-530b"), shrink)
    with pytest.raises(PreflightError, match=r"parallel\.data = .* raise cluster\.min_data_parallel"):
        check_memory(large, emulated=False)
