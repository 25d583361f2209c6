"""Kubernetes batch system: a run is a JobSet whose pods are the run's nodes, each with a supervisor.

keepwarm prints the manifests and leaves the rest to kubectl. The Job replaces a pod that dies; the new pod joins as a
spare node and takes the vacant slot. JobSet: jobset.x-k8s.io/v1alpha2.
"""

import io
import re
import shlex
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import LiteralScalarString

from keepwarm.exit_code import ExitCode
from keepwarm.launch.batch_system import BatchSystem, Request
from keepwarm.launch.errors import ClusterError
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.cluster import KubernetesSpec
from keepwarm.trainer.job.run_folder import METRICS_FILE, RUN_FILE
from keepwarm.trainer.job.spec import JobSpec

LONGEST = 40
"""Maximum length of the JobSet's name: pod names append to it, and a host name has at most 63 characters."""
REPLACED = 1000
"""Number of pods that may die before the Job fails."""
POD_GRACE_S = 120
"""Seconds for a pod to save its state after it is asked to terminate."""
_SPEC = "/etc/keepwarm"


class Kubernetes(BatchSystem):
    """Renders manifests for `kubectl apply -f -`; submits nothing itself."""

    name = "kubernetes"
    title = "Kubernetes"
    Options = KubernetesSpec
    sees_files = False

    def check(self, request: Request, *, dry_run: bool) -> list[str]:
        if not dry_run:
            raise ClusterError(
                "keepwarm does not submit to Kubernetes itself: add --dry-run and pipe the output to kubectl apply -f -"
            )
        if request.mode != "new":
            raise ClusterError(
                f"--{request.mode} is not possible with Kubernetes: the pods continue a run whose folder exists"
            )
        return []

    def render(self, request: Request) -> str:
        return render(request.job)

    def advice(self, job: JobSpec, command: str) -> str | None:
        asked = job.cluster.kubernetes
        name, namespace = object_name(job.name), f" -n {asked.namespace}" if asked and asked.namespace else ""
        return {
            "cancel": f"kubectl delete jobset {name}{namespace}",
            "requeue": f"kubectl delete jobset {name}{namespace}, then apply its manifests again",
            "logs": f"kubectl logs -l jobset.sigs.k8s.io/jobset-name={name}{namespace} --prefix",
        }.get(command)


def render(job: JobSpec) -> str:
    """Return the manifests as one YAML stream for `kubectl apply -f -`.

    They include the resolved job, so the run folder need not be visible from this machine.

    Raises:
        SpecError: a key that Kubernetes needs is missing or invalid; names the key.
    """
    asked = job.cluster.kubernetes
    if asked is None:
        raise SpecError("cluster.kubernetes: is missing; it needs at least image, claim and mount")
    if not Path(job.output).is_relative_to(asked.mount):
        raise SpecError(
            f"output={job.output}: must lie below cluster.kubernetes.mount = {asked.mount}, where the pods see "
            "the volume that they share"
        )
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 1000
    stream = io.StringIO()
    yaml.dump_all(manifests(job, asked), stream)
    return stream.getvalue()


def manifests(job: JobSpec, asked: KubernetesSpec) -> list[dict[str, Any]]:
    """Return the ConfigMap that holds the job, and the JobSet."""
    name = object_name(job.name)
    about = {"name": name, **({"namespace": asked.namespace} if asked.namespace else {})}
    data = {RUN_FILE: LiteralScalarString(job.model_dump_json(indent=2) + "\n")}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": data}
    pods = job.layout.nodes + asked.spares
    return [
        config,
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": dict(about),
            "spec": {
                "failurePolicy": {"maxRestarts": job.cluster.max_restarts},
                "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                "replicatedJobs": [
                    {
                        "name": "node",
                        "replicas": 1,
                        "template": {
                            "spec": {
                                "completionMode": "Indexed",
                                "completions": pods,
                                "parallelism": pods,
                                "backoffLimit": REPLACED,
                                "podFailurePolicy": _failures(),
                                "template": {"spec": _pod(job, asked, name)},
                            }
                        },
                    }
                ],
            },
        },
    ]


def object_name(text: str) -> str:
    """Convert a job's name to a Kubernetes object name, which is a DNS label."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:LONGEST].strip("-")
    return name if name[:1].isalpha() else f"run-{name}".strip("-")


def _failures() -> dict[str, Any]:
    """Return the pod failure policy: bad input and a run that stopped itself are final; disruptions do not count."""
    final = [int(ExitCode.BAD_INPUT), int(ExitCode.TRAINING_STOPPED)]
    return {
        "rules": [
            {"action": "FailJob", "onExitCodes": {"containerName": "node", "operator": "In", "values": final}},
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        ]
    }


def _pod(job: JobSpec, asked: KubernetesSpec, name: str) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    if asked.gpus_per_node is not None:
        limits[asked.gpu_resource] = str(asked.gpus_per_node)
    requests = {
        "cpu": str(asked.cpus_per_node or job.layout.ranks_per_node * job.numerics.threads_per_rank),
        **({"memory": asked.memory} if asked.memory else {}),
    }
    container = {
        "name": "node",
        "image": asked.image,
        "command": ["sh", "-euc", LiteralScalarString(_start(job, asked))],
        "env": [
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        ],
        "resources": {"requests": requests, **({"limits": limits} if limits else {})},
        "volumeMounts": [
            {"name": "shared", "mountPath": asked.mount},
            {"name": "job", "mountPath": _SPEC, "readOnly": True},
            {"name": "memory", "mountPath": "/dev/shm"},
        ],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": POD_GRACE_S,
        **({"serviceAccountName": asked.service_account} if asked.service_account else {}),
        **({"nodeSelector": dict(asked.node_selector)} if asked.node_selector else {}),
        # Two pods on the same machine would be lost together.
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": name}},
            }
        ],
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": asked.claim}},
            {"name": "job", "configMap": {"name": name}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }


def _start(job: JobSpec, asked: KubernetesSpec) -> str:
    """Return the script of each pod. The first pod writes the job to the run folder atomically."""
    folder = shlex.quote(job.output)
    return (
        f"mkdir -p {folder}\n"
        f'cp {_SPEC}/{RUN_FILE} {folder}/.{RUN_FILE}."$NODE"\n'
        f'ln {folder}/.{RUN_FILE}."$NODE" {folder}/{RUN_FILE} 2>/dev/null || true\n'
        f'rm {folder}/.{RUN_FILE}."$NODE"\n'
        "resume=\n"
        f"if [ -e {folder}/{METRICS_FILE} ]; then resume=--resume; fi\n"
        f"exec {shlex.quote(asked.python)} -P -m keepwarm.launch.node {folder} --slots={job.layout.nodes} "
        '--node="$NODE" --host="$HOST" $resume\n'
    )
