"""The files in `cluster/`: accepted by Ray, of one mind about roles, images and versions, and closed to strangers.

What judges them: files for `ray up` go through Ray's own defaults and schema; a RayCluster goes through the code with
which Ray's autoscaler reads it from Kubernetes, and its shape is held to `kuberay_schema.yaml`. Nothing here has talked
to a cloud.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from simda.cost import read_prices

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
PINS = dict(
    line.split("==") for line in (CLUSTER / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCHEMAS = yaml.safe_load(Path(__file__).with_name("kuberay_schema.yaml").read_text())
IMAGE = f"YOUR_REGISTRY/simda:{PROJECT['version']}-ray{PINS['ray']}"

WORKER_ROLES = ("cpu-decode", "gpu-encode", "gpu-train", "gpu-generate")
CLOUDS, KUBERNETES = ("aws", "gcp"), ("kuberay_cluster", "kuberay_job")
UP_FILES = (*CLOUDS, "on_premises")
COMMAND_FILES = [CLUSTER / f"{name}.yaml" for name in (*UP_FILES, *KUBERNETES, "prices")]
COMMAND_FILES += [CLUSTER / name for name in ("Dockerfile", "fake_cluster.py")]


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def cluster_spec(name: str) -> dict[str, Any]:
    spec = load(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def autoscaled(spec: dict[str, Any]) -> dict[str, Any]:
    """Node types as Ray's autoscaler reads them from a RayCluster."""
    resource = {"metadata": {"name": "simda", "namespace": "default"}, "spec": copy.deepcopy(spec)}
    return _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]


# Accepted by those who read them


@pytest.mark.parametrize("name", UP_FILES)
def test_ray_accepts_the_files_for_ray_up(name):
    validate_config(prepare_config(load(name)))
    misspelt = load(name)
    misspelt["idle_timeout_minute"] = misspelt.pop("idle_timeout_minutes")
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config(prepare_config(misspelt))


@pytest.mark.parametrize("name", CLOUDS)
def test_what_rays_schema_leaves_open_is_set(name):
    config = load(name)
    assert {"region", "availability_zone"} <= config["provider"].keys()
    size = {"aws": "InstanceType", "gcp": "machineType"}[name]
    account = {"aws": "IamInstanceProfile", "gcp": "serviceAccounts"}[name]
    for role, node in config["available_node_types"].items():
        assert {size, account} <= node["node_config"].keys(), role
        assert node.get("min_workers", 0) <= node.get("max_workers", 0) <= config["max_workers"], role
        assert node["resources"].get("GPU", 0) > 0 if role.startswith("gpu-") else "GPU" not in node["resources"], role
    # Ray's defaults would install another Ray, from a nightly wheel.
    assert "pip install" not in json.dumps(prepare_config(load(name)))


@pytest.mark.parametrize(("name", "kind"), zip(KUBERNETES, ("RayCluster", "RayJob"), strict=True))
def test_kubernetes_manifests_have_the_right_shape(name, kind):
    manifest = load(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    assert manifest["metadata"].keys() & {"name", "generateName"}
    jsonschema.Draft202012Validator(SCHEMAS | {"$ref": f"#/$defs/{kind}"}).validate(manifest["spec"])
    for group in cluster_spec(name)["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], group["groupName"]


def test_the_job_brings_the_same_cluster_and_an_entrypoint_that_is_in_the_image():
    assert cluster_spec("kuberay_job") == cluster_spec("kuberay_cluster")
    words = load("kuberay_job")["spec"]["entrypoint"].split()
    assert words[0] == "python"
    assert all((ROOT / word).is_file() for word in words if "/" in word)
    assert "COPY pipelines " in (CLUSTER / "Dockerfile").read_text()


# The same roles everywhere


@pytest.mark.parametrize("name", CLOUDS)
def test_roles_of_clouds_are_resources_that_work_can_ask_for(name):
    config = prepare_config(load(name))
    nodes = config["available_node_types"]
    assert tuple(nodes) == ("head", *WORKER_ROLES)
    assert (config["head_node_type"], nodes["head"]["resources"]) == ("head", {"CPU": 0})
    for role in WORKER_ROLES:
        assert {kind for kind in nodes[role]["resources"] if "-" in kind} == {role}
        assert nodes[role]["resources"][role] == 1


def test_the_plan_asks_for_roles_that_there_are():
    plan = yaml.safe_load((ROOT / "pipelines" / "configs" / "run.yaml").read_text())
    settings = [step.get("settings", {}) for step in plan["steps"]]
    asked = [value for step in settings for name, value in step.items() if name.endswith("role")]
    assert len(asked) > len(settings)
    assert set(asked) == set(WORKER_ROLES)


def test_roles_of_kubernetes_are_those_of_the_clouds():
    nodes = autoscaled(cluster_spec("kuberay_cluster"))
    assert tuple(nodes) == ("headgroup", *WORKER_ROLES)
    assert nodes["headgroup"]["resources"]["CPU"] == 0
    for role in WORKER_ROLES:
        for cloud in CLOUDS:
            there, here = load(cloud)["available_node_types"][role], nodes[role]
            assert here["resources"][role] == 1
            assert here["resources"].get("GPU", 0) == there["resources"].get("GPU", 0), (role, cloud)
            # A pod that asks for all of a machine's cores finds no machine: the kubelet keeps some.
            assert here["resources"]["CPU"] < there["resources"]["CPU"], (role, cloud)
            assert here["max_workers"] == there["max_workers"], (role, cloud)
    for group in cluster_spec("kuberay_cluster")["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert pod["nodeSelector"] == {"simda-role": group["groupName"]}


def start_worker_on_premises(folder: Path, role: str) -> tuple[int, str, str]:
    """Run the start command of a worker with a `ray` that prints its arguments: exit code, arguments, stderr."""
    (folder / "role").write_text(role)
    (folder / "ray").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (folder / "ray").chmod(0o755)
    command = load("on_premises")["worker_start_ray_commands"][-1].replace("/etc/simda", str(folder))
    # The test's own limit of open files may be lower than what a cluster's machine allows.
    command = command.replace("ulimit -n 65536;", "")
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "RAY_HEAD_IP": "10.0.0.1"}
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=environment)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize("role", WORKER_ROLES)
def test_a_machine_on_premises_joins_with_the_role_that_it_was_given(tmp_path, role):
    code, arguments, err = start_worker_on_premises(tmp_path, f"{role}\n")
    assert code == 0, err
    assert "--address=10.0.0.1:6379" in arguments.splitlines()
    resources = next(word for word in arguments.splitlines() if word.startswith("--resources="))
    assert json.loads(resources.partition("=")[2]) == {role: 1}


@pytest.mark.parametrize("role", ["gpu-trian", ""])
def test_a_machine_on_premises_without_a_known_role_does_not_join(tmp_path, role):
    code, arguments, err = start_worker_on_premises(tmp_path, role)
    assert (code, arguments) == (1, "")
    assert f"says '{role}'" in err
    assert all(known in err for known in WORKER_ROLES)


def test_what_can_be_resumed_is_on_spot_and_the_rest_is_not():
    def is_spot(node: dict[str, Any]) -> bool:
        config = node["node_config"]
        return "spot" in json.dumps([config.get("InstanceMarketOptions"), config.get("scheduling")]).lower()

    for name in CLOUDS:
        spot = [role for role, node in load(name)["available_node_types"].items() if is_spot(node)]
        assert spot == ["cpu-decode", "gpu-encode", "gpu-generate"], name


# The pinned versions and one image


def images(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [v for k, v in value.items() if k == "image"] + [i for v in value.values() for i in images(v)]
    return [i for v in value for i in images(v)] if isinstance(value, list) else []


@pytest.mark.parametrize("name", [*UP_FILES, *KUBERNETES])
def test_every_node_has_the_one_image_of_the_pinned_versions(name):
    found = images(load(name))
    assert len(found) == (1 if name in UP_FILES else 1 + len(WORKER_ROLES))
    assert set(found) == {IMAGE}
    assert IMAGE in (CLUSTER / "Dockerfile").read_text().splitlines()[0]


def test_ray_has_one_version():
    assert cluster_spec("kuberay_cluster")["rayVersion"] == PINS["ray"]
    for name in UP_FILES:
        assert any(f"ray.__version__ == '{PINS['ray']}'" in command for command in load(name)["setup_commands"]), name


def test_the_image_takes_every_version_from_the_constraints():
    dockerfile = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    installs = re.findall(r"^RUN pip install (.*)$", dockerfile, flags=re.M)
    assert len(installs) == 2
    assert "grep '^torch==' /opt/simda/constraints.txt" in installs[0]
    assert "--constraint /opt/simda/constraints.txt" in installs[1]
    assert not re.search(r"==\s*\d", dockerfile)
    extras = set(re.findall(r"\b(boto3|google-[\w-]+)", installs[1]))
    assert extras == {"boto3", "google-api-python-client", "google-auth-httplib2"}
    assert extras <= PINS.keys()
    # The Makefile writes the version out, as a machine without CUDA must not ask for anything looser.
    assert re.findall(r"torch==(\S+)", (ROOT / "Makefile").read_text()) == [PINS["torch"]]
    python = re.search(r"^FROM python:(\d+\.\d+)-", dockerfile, flags=re.M)
    assert PROJECT["requires-python"] == f">={python[1]}"


def test_the_image_is_built_from_files_that_are_there_and_let_through():
    allowed = [
        line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    ]
    copied = [
        source
        for line in re.findall(r"^COPY (.*) \S+$", (CLUSTER / "Dockerfile").read_text(), flags=re.M)
        for source in line.split()
    ]
    assert sorted(allowed) == sorted(copied)
    assert all((ROOT / source).exists() for source in copied)


# Commands


def make(*words: str) -> subprocess.CompletedProcess[str]:
    # `make test CLUSTER_FILE=...` would hand its own words down.
    ours = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in ("CLUSTER", "CLUSTER_FILE")}
    command = ["make", "--assume-old=install", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=ours)


@pytest.mark.parametrize("path", COMMAND_FILES, ids=lambda path: path.name)
def test_the_first_line_is_a_command_that_uses_the_file(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert re.search(rf"\bcluster/{path.name}\b", first)
    if path.stem in UP_FILES:
        target, cluster = re.match(r"# make ([\w-]+) CLUSTER=(\w+)", first).groups()
        assert cluster == path.stem
        ended = make("--dry-run", target, f"CLUSTER={cluster}")
        assert ended.returncode == 0, ended.stderr
        assert f"ray up --yes cluster/{path.name}" in ended.stdout


@pytest.mark.parametrize("name", UP_FILES)
def test_no_cluster_starts_from_a_file_with_blanks_in_it(name):
    # No Ray could be found at this VENV, should the command get that far.
    ended = make("cluster-up", f"CLUSTER={name}", "VENV=/nonexistent")
    assert ended.returncode == 2
    assert "YOUR_REGISTRY" in ended.stdout
    assert f"replace these values in cluster/{name}.yaml" in ended.stderr


def test_make_submit_prints_and_runs_the_job_and_refuses_what_is_no_command():
    ended = make("--dry-run", "submit", "JOB=train", "CONFIG=a.yaml", "ARGS=num_steps=3")
    assert ended.stdout.splitlines()[-1] == (
        ".venv/bin/python cluster/submit_job.py --address http://127.0.0.1:8265 -- "
        "python pipelines/train.py --config a.yaml num_steps=3"
    )
    ended = make("submit", "JOB=tarin", "VENV=/nonexistent")
    assert ended.returncode == 2
    assert "JOB=tarin is no command; give one of: make_sprites" in ended.stderr


def test_example_prices_are_marked_as_such_and_are_of_the_machines_of_the_roles():
    text = (CLUSTER / "prices.yaml").read_text()
    assert "EXAMPLES, NOT PRICES" in text
    prices = read_prices(str(CLUSTER / "prices.yaml"))
    assert prices.currency == "EXAMPLE"
    nodes = load("aws")["available_node_types"]
    for role in WORKER_ROLES:
        there = nodes[role]["resources"]
        assert (prices.machines[role].cpus, prices.machines[role].gpus) == (there["CPU"], there.get("GPU", 0)), role


# Closed to strangers


@pytest.mark.parametrize("name", UP_FILES)
def test_dashboard_and_jobs_are_on_loopback(name):
    config = prepare_config(load(name))
    start = config["head_start_ray_commands"][-1]
    assert re.findall(r"--dashboard-host[= ](\S+)", start) == ["127.0.0.1"]
    assert "0.0.0.0" not in json.dumps({key: value for key, value in config.items() if key != "auth"})
    (mode,) = re.findall(r"RAY_AUTH_MODE=(\w+)", json.dumps(config["docker"]))
    # A cloud's firewall closes Ray's other ports; on premises only Ray's own token does.
    assert mode == ("token" if name == "on_premises" else "disabled")


@pytest.mark.parametrize("name", KUBERNETES)
def test_the_dashboard_on_kubernetes_asks_for_a_token(name):
    spec = cluster_spec(name)
    assert spec["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


SECRETS = (
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    r"-----BEGIN [A-Z ]*PRIVATE KEY",
    r"(?i)\b(aws_secret_access_key|aws_access_key_id|secret_key|password|auth_token|token)\s*[:=]\s*['\"]?[\w/+-]{12,}",
    r"\bhf_[A-Za-z0-9]{20,}",
    r"(?i)(service_account|credentials)\S*\.json",
)


@pytest.mark.parametrize(
    "path", sorted(path for path in CLUSTER.iterdir() if path.is_file()), ids=lambda path: path.name
)
def test_no_secret_is_written_down(path):
    text = path.read_text()
    for pattern in SECRETS:
        found = re.search(pattern, text)
        assert not found, f"{path.name}: {found[0]}"


def test_policies_in_the_runbook_name_what_they_allow():
    runbook = (CLUSTER / "README.md").read_text()
    policies = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", runbook, flags=re.S)]
    assert len(policies) == 2
    for policy in policies:
        for statement in policy["Statement"]:
            actions = statement["Action"]
            assert isinstance(actions, list)
            assert all(re.fullmatch(r"[a-z0-9]+:\w+", action) for action in actions), actions
