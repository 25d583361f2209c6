"""What Kubernetes is given: held against the types of its API, and what the pods do, done by processes here."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from kubeflow_trainer_api.models import IoK8sApiCoreV1ConfigMap, JobsetV1alpha2JobSet
from ruamel.yaml import YAML

from keepwarm.launch.batch.jobs import cancel, requeue
from keepwarm.launch.batch.logs import log_file
from keepwarm.launch.cli.cluster import cluster
from keepwarm.launch.errors import ClusterError
from keepwarm.launch.kubernetes import LONGEST, object_name, render
from keepwarm.trainer.errors import OutputError, SpecError
from keepwarm.trainer.job.files import load_job, save_job
from keepwarm.trainer.job.spec import JobSpec
from tests.support.runs.run_contents import steps_of

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "ci" / "tiny.yaml"
ASKED = ("cluster.kubernetes={image: registry/keepwarm:1, claim: shared, mount: /shared}", "output=/shared/runs/a run")
TWO = ("parallel.data=2", "cluster.ranks_per_node=1")
FULL = (
    "output=/shared/runs/full", "name=Two Words!", "parallel.data=4", "cluster.ranks_per_node=2",
    "cluster.kubernetes={image: registry/keepwarm:1, claim: shared, mount: /shared, namespace: lab, spares: 1,"
    " gpus_per_node: 2, cpus_per_node: 16, memory: 900Gi, service_account: trainer, python: /venv/bin/python,"
    " node_selector: {cloud/pool: h200}}",
)  # fmt: skip
DEADLINE = 280.0


def job(*overrides: str) -> JobSpec:
    return load_job(TINY, overrides)


def parsed(text: str) -> list[dict[str, Any]]:
    return list(YAML(typ="safe").load_all(text))


@pytest.mark.parametrize("overrides", [(*ASKED, *TWO), FULL], ids=["plain", "full"])
def test_kubernetes_manifests_match_the_api_types(overrides: Sequence[str]) -> None:
    config, jobset = parsed(render(job(*overrides)))
    for document, kind in ((config, IoK8sApiCoreV1ConfigMap), (jobset, JobsetV1alpha2JobSet)):
        known = kind.from_dict(document)
        assert known is not None
        # What the API does not know would be lost on the way.
        assert known.to_dict() == document
        misspelt = document | {"metdata": {}}
        assert kind.from_dict(misspelt).to_dict() != misspelt  # type: ignore[union-attr]
    assert json.loads(config["data"]["run.json"]) == json.loads(job(*overrides).model_dump_json())


def test_kubernetes_jobset_has_a_pod_for_each_node_and_spare() -> None:
    _, jobset = parsed(render(job(*FULL)))
    assert (jobset["metadata"]["name"], jobset["metadata"]["namespace"]) == ("two-words", "lab")
    (nodes,) = jobset["spec"]["replicatedJobs"]
    inside = nodes["template"]["spec"]
    assert (inside["completions"], inside["parallelism"]) == (3, 3)
    (container,) = inside["template"]["spec"]["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "16", "memory": "900Gi"},
        "limits": {"nvidia.com/gpu": "2"},
    }
    assert "exec /venv/bin/python -P -m keepwarm.launch.node /shared/runs/full --slots=2" in container["command"][2]


@pytest.mark.parametrize(
    ("text", "name"), [("Two Words!", "two-words"), ("7b", "run-7b"), ("x" * 90, "x" * LONGEST), ("---", "run")]
)
def test_kubernetes_object_names_are_dns_labels(text: str, name: str) -> None:
    assert object_name(text) == name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "cluster.kubernetes: is missing"),
        ((ASKED[0], "output=runs/here"), "must lie below cluster.kubernetes.mount = /shared"),
        (("cluster.kubernetes={image: one}",), "claim"),
    ],
)
def test_kubernetes_missing_option_is_named(overrides: Sequence[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        render(job(*overrides))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "add --dry-run and pipe the output to kubectl apply -f -"),
        (["--dry-run", "--force"], "--force is not possible with Kubernetes"),
        (["--dry-run", "--chain", "2"], "--chain: keepwarm submits no chains to Kubernetes"),
        (["--dry-run", "--sweep", "seed=[1, 2]"], "--sweep: keepwarm submits no arrays to Kubernetes"),
        (["--dry-run", "--sweep", "data.sources.en=[/on/the/volume, /too]"], "--sweep: keepwarm submits no arrays to"),
    ],
)
def test_kubernetes_submit_unsupported_option_is_refused_in_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ClusterError, match=re.escape(message)):
        submit_to_kubernetes(*options)
    assert capsys.readouterr() == ("", "")


def submit_to_kubernetes(*options: str) -> None:
    cluster(["submit", str(TINY), *ASKED, "--backend", "kubernetes", *options], standalone_mode=False)


def test_kubernetes_dry_run_prints_only_the_manifests(capsys: pytest.CaptureFixture[str]) -> None:
    submit_to_kubernetes("--dry-run")
    assert capsys.readouterr() == (render(job(*ASKED)), "")


def test_kubernetes_cancel_names_the_kubectl_command(tmp_path: Path) -> None:
    save_job(job(*FULL), tmp_path / "run.json")
    for action, command in ((cancel, "delete"), (requeue, "delete")):
        with pytest.raises(ClusterError, match=f"if it runs on Kubernetes: kubectl {command} jobset two-words -n lab"):
            action(tmp_path, now=False)
    with pytest.raises(OutputError, match=r"kubectl logs -l jobset\.sigs\.k8s\.io/jobset-name=two-words -n lab"):
        log_file(tmp_path, None)


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.timeout(600)
def test_kubernetes_pod_command_trains(tmp_path: Path) -> None:
    """Each pod a process of its own, the volume and the ConfigMap two folders; started twice, it is done."""
    run, config = tmp_path / "shared" / "run", tmp_path / "config"
    asked = f"{{image: one, claim: two, mount: {tmp_path}, python: {Path(sys.executable).name}}}"
    text, jobset = parsed(render(job(*TWO, f"output={run}", f"cluster.kubernetes={asked}", "log.tensorboard=false")))
    config.mkdir()
    (config / "run.json").write_text(text["data"]["run.json"])
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    command = [word.replace("/etc/keepwarm", str(config)) for word in pod["containers"][0]["command"]]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with contextlib.ExitStack() as stack:
        pods = [
            stack.enter_context(
                subprocess.Popen(
                    command, cwd=ROOT, env=os.environ | {"PATH": path, "NODE": f"pod-{index}", "HOST": "127.0.0.1"}
                )
            )
            for index in range(2)
        ]
        for one in pods:
            stack.callback(one.kill)
        assert [one.wait(DEADLINE) for one in pods] == [0, 0]
    assert [line["step"] for line in steps_of(run) if "loss" in line] == list(range(1, 21))
    assert sorted(path.name for path in run.glob(".run.json*")) == []
