# SPDX-License-Identifier: Apache-2.0
"""Checks a file for Kubeflow Trainer, whose resources Kubernetes' own schemas do not know.

    python launch/k8s/_lint_trainjob.py launch/k8s/trainjob.yaml

Trainer's resources against trainjob.schema.json, which says what it covers; the jobs inside a
TrainingRuntime, and everything else in the file, strictly against Kubernetes' schemas. Not checked:
the rest of JobSet, and what only a cluster knows, such as admission rules.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

SCHEMA = Path(__file__).with_name("trainjob.schema.json")
GROUP = "trainer.kubeflow.org/"


def mistakes(resource: dict[str, Any]) -> Iterator[str]:
    """Yields what is wrong with one resource."""
    if not str(resource.get("apiVersion", "")).startswith(GROUP):
        yield from mistakes_of_kubernetes(resource)
        return
    checker = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    for error in checker.iter_errors(resource):
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
    if resource["kind"] == "TrainingRuntime":
        for job in resource["spec"]["template"]["spec"]["replicatedJobs"]:
            metadata = {**job["template"].get("metadata", {}), "name": job["name"]}
            as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata}
            yield from mistakes_of_kubernetes({**job["template"], **as_job})


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
