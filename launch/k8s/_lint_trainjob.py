# SPDX-License-Identifier: Apache-2.0
"""Checks files for Kubeflow Trainer, whose resources Kubernetes' own schemas do not know.

    python launch/k8s/_lint_trainjob.py launch/k8s/trainjob.yaml launch/k8s/deepspeed.yaml

Trainer's resources, and the JobSets inside, against the models of kubeflow-trainer-api, which
Trainer's own Python client sends; the jobs of a TrainingRuntime, and everything else in a file,
strictly against Kubernetes' schemas. Not checked: what only a cluster knows, as admission rules.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubeflow_trainer_api import models
from pydantic import ValidationError

VERSION = "trainer.kubeflow.org/v1alpha1"
MODELS = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}


def mistakes(resource: dict[str, Any]) -> Iterator[str]:
    """Yields what is wrong with one resource."""
    if not str(resource.get("apiVersion", "")).startswith("trainer.kubeflow.org/"):
        yield from mistakes_of_kubernetes(resource)
        return
    yield from mistakes_of_trainer(resource)
    if resource["kind"] == "TrainingRuntime":
        for job in resource["spec"]["template"]["spec"]["replicatedJobs"]:
            metadata = {**job["template"].get("metadata", {}), "name": job["name"]}
            as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata}
            yield from mistakes_of_kubernetes({**job["template"], **as_job})


def mistakes_of_trainer(resource: dict[str, Any]) -> Iterator[str]:
    """Yields what Trainer's models do not know, or know as another type."""
    kind = resource.get("kind")
    if resource["apiVersion"] != VERSION or kind not in MODELS:
        kinds = " or ".join(MODELS)
        yield f"must be {kinds} of {VERSION}; it is {kind} of {resource['apiVersion']}"
        return
    try:
        known = MODELS[kind].from_dict(resource).to_dict()
    except ValidationError as error:
        for each in error.errors():
            yield f"{'.'.join(map(str, each['loc']))}: {each['msg']}"
        return
    yield from unknown(resource, known, "")


def unknown(given: Any, known: Any, path: str) -> Iterator[str]:
    """Yields the keys that a model left out: it ignores what it does not know."""
    if isinstance(given, dict):
        for key, value in given.items():
            if key not in known:
                yield f"{path}{key}: no such field"
            else:
                yield from unknown(value, known[key], f"{path}{key}.")
    elif isinstance(given, list):
        for index, (value, its) in enumerate(zip(given, known, strict=True)):
            yield from unknown(value, its, f"{path}{index}.")


def mistakes_of_kubernetes(resource: dict[str, Any]) -> Iterator[str]:
    """Yields what Kubernetes' own schema does not accept."""
    version = kubernetes_validate.latest_version()
    try:
        kubernetes_validate.validate(resource, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path))}: {error.message}"


def main(*paths: str) -> int:
    """Returns 1 if anything is wrong."""
    code = 0
    for path in paths:
        for resource in yaml.safe_load_all(Path(path).read_text(encoding="utf-8")):
            for mistake in mistakes(resource):
                sys.stderr.write(f"{path}: {resource.get('kind')}: {mistake}\n")
                code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
