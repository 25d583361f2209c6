"""Every file in configs/ loads as its own type; data files of jobs need not exist for planning."""

from pathlib import Path

import pytest

from keepwarm.launch.plan.plan import Plan
from keepwarm.trainer.job.files import load_job, load_model
from keepwarm.trainer.job.site.site_file import VARIABLE

CONFIGS = Path(__file__).parents[1] / "configs"
JOBS = sorted([*(CONFIGS / "jobs").rglob("*.yaml"), *(CONFIGS / "ci").rglob("*.yaml")])
CLASSES = sorted((CONFIGS / "transformers").rglob("config.json"))
MODELS = sorted((CONFIGS / "models").rglob("*.yaml"))

SITE = CONFIGS / "site.example.yaml"


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.mark.parametrize("path", JOBS, ids=name_of)
def test_shipped_jobs_can_be_planned(path: Path) -> None:
    if "transformers:" in path.read_text():
        pytest.importorskip("transformers", reason="transformers is not installed: pip install 'keepwarm[hf]'")
    job = load_job(path)
    assert job.name == path.stem
    assert job.output == str(Path.cwd() / "runs" / job.name)
    plan = Plan(job).data()
    assert plan["layout"]["world_size"] == job.layout.world_size
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", MODELS, ids=name_of)
def test_shipped_models_load_by_name(path: Path) -> None:
    assert load_model(path) == load_model(path.stem)


def test_shipped_site_file_gives_each_of_its_values_to_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(SITE))
    sources = load_job(CONFIGS / "ci" / "tiny.yaml").cluster.sources
    assert sources is not None
    assert set(sources.values()) == {str(SITE)}
    assert {"slurm.account", "slurm.gres", "slurm.mail.user", "slurm.modules"} <= set(sources)
    assert SITE.read_text().startswith("# ")


def test_shipped_configs_folder_holds_nothing_else() -> None:
    known = {*JOBS, *MODELS, *CLASSES, *(CONFIGS / "corpora").iterdir(), SITE}
    assert {path for path in CONFIGS.rglob("*") if path.is_file()} == known


def test_shipped_ci_job_has_the_promised_shape() -> None:
    job = load_job(CONFIGS / "ci" / "tiny.yaml")
    plan = Plan(job)
    assert [stage.steps for stage in plan.stages] == [20]
    assert (job.model.heads, job.model.layers) == (4, 4)
    assert 80_000 <= plan.parameters <= 120_000
    assert job.data.tokenizer == "bytes"
    assert all(Path(source).is_file() for source in [*job.data.sources.values(), *job.data.validation.values()])


def test_shipped_demo_runs_in_three_dimensions() -> None:
    job = load_job(CONFIGS / "jobs" / "demo.yaml")
    assert job.layout.shape == (2, 2, 2)
    assert load_job(CONFIGS / "jobs" / "demo.yaml", ["parallel.data=1"]).layout.shape == (1, 2, 2)


def test_shipped_530b_layouts_match_the_paper() -> None:
    for data, ranks in ((8, 2240), (10, 2800), (12, 3360)):
        layout = load_job(CONFIGS / "jobs" / "mt-nlg-530b.yaml", [f"parallel.data={data}"]).layout
        assert layout.world_size == ranks
        assert layout.nodes == ranks // 8
