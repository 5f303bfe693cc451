"""What watches a cluster: metrics at a real endpoint, the dashboard that names them, logs that name rows."""

from __future__ import annotations

import json
import logging
import re
import time
import urllib.request
from pathlib import Path

import pytest
from ray._common.formatters import JSONFormatter

from simda.stages.failures import attempt_row
from simda.telemetry import METRICS, Effort

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana_dashboard.json"


def exported_name(metric) -> set[str]:
    """By which names Ray's endpoint shows a metric."""
    ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
    return {f"ray_{metric.name}{end}" for end in ends}


def test_the_dashboard_draws_every_metric_and_no_other():
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries = [variable["query"] for variable in dashboard["templating"]["list"]]
    named = {name for text in (*expressions, *queries) for name in re.findall(r"\bray_\w+", text)}
    known = {name: metric for metric in METRICS for name in exported_name(metric)}
    assert named <= known.keys()
    assert {known[name] for name in named} == set(METRICS)
    for expression in expressions:
        assert expression.count("(") == expression.count(")")
        for name, labels in re.findall(r"(ray_\w+)\{([^}]*)\}", expression):
            used = set(re.findall(r"(\w+)=", labels))
            assert used <= {"command", "job", "stage", *known[name].labels}, expression


def scrape(address: str) -> dict[str, float]:
    """What Prometheus would read: samples by name and labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = [line.rpartition(" ") for line in lines if line.startswith("ray_simda_")]
    return {sample: float(value) for sample, _, value in pairs}


@pytest.mark.ray
def test_counters_of_a_stage_are_at_rays_metrics_endpoint(local_ray):
    import ray

    from simda.runtime import with_progress

    told = [{"filter": "", **Effort(time.time(), "cpu", device_s=0.5, num_bytes=1000).columns()} for _ in range(3)]
    told += [{"filter": "black"}, {"filter": "", "bad": True}]
    assert len(list(with_progress(iter(told), "rows", 5, lambda row: "bad" in row, "contract_stage"))) == 5

    (node,) = ray.nodes()
    address = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"

    def found(name: str, *labels: str) -> float:
        wanted = ('stage="contract_stage"', *labels)
        return sum(v for k, v in samples.items() if k.split("{")[0] == name and all(label in k for label in wanted))

    give_up = time.monotonic() + 60
    samples: dict[str, float] = {}
    while not found("ray_simda_bytes_total"):
        assert time.monotonic() < give_up, "the metrics never reached the endpoint"
        time.sleep(0.2)
        samples = scrape(address)
    assert found("ray_simda_rows_total", 'outcome="done"') == 3
    assert found("ray_simda_rows_total", 'outcome="filtered"') == 1
    assert found("ray_simda_rows_total", 'outcome="failed"') == 1
    assert found("ray_simda_bytes_total") == 3000
    assert found("ray_simda_device_seconds_total", 'device="cpu"') == 1.5
    assert found("ray_simda_queue_wait_seconds_count") == 3
    assert found("ray_simda_rows_left") == 0
    assert any('job="local"' in sample and 'command="' in sample for sample in samples)


def test_a_failed_rows_log_record_carries_stage_row_and_attempt(caplog):
    def fail() -> None:
        raise ValueError("no frames")

    with caplog.at_level(logging.WARNING):
        attempt_row("clip-7", "encode_clips", 2, fail)
    # Ray's formatter, which workers use with RAY_LOGGING_CONFIG_ENCODING=JSON; Ray adds the job and the node.
    record = json.loads(JSONFormatter().format(caplog.records[-1]))
    assert {k: record[k] for k in ("stage", "row_id", "attempt", "error_type")} == {
        "stage": "encode_clips", "row_id": "clip-7", "attempt": 2, "error_type": "ValueError",
    }  # fmt: skip
    assert "no frames" in record["message"]
