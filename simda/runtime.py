"""How a command runs: its command line, its Ray session, its progress lines and metrics, its exit code.

Every file in `pipelines/` ends in `sys.exit(run_command(...))`. Beside the Ray Train worker, this is the only place of
the library that imports Ray.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import psutil

from simda.config import Config, absolute_uri, config_to_yaml, describe_settings, load_config
from simda.cost import cost_of, read_prices
from simda.data.run_lock import release_all
from simda.errors import ConfigError, MachineError, SimdaError, StorageError
from simda.telemetry import WAIT_BOUNDARIES_S, Metric, StageTelemetry

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_TOO_MANY_FAILURES = 0, 1, 2, 3
FLAGS = ("--config", "--print-config", "--dry-run", "--prices", "--help")
FLAGS_WITH_PATH = ("--config", "--prices")
PROGRESS_EVERY_S = 5.0
RAY_STARTS = 3
"""How often a private Ray is started at most where the machine is too busy for it."""

Row = TypeVar("Row")


@dataclass(frozen=True)
class CommandLine:
    """What stood on the command line, split but not yet validated."""

    config_path: str | None
    overrides: tuple[str, ...]
    print_config: bool
    dry_run: bool
    help: bool
    prices: str | None = None


def run_command(
    config_class: type[Config],
    run: Callable[[Config], dict[str, Any]],
    dry_run: Callable[[Config], dict[str, Any]],
    argv: list[str] | None = None,
) -> int:
    """Read the configuration, run the command, print its JSON summary as the last line of stdout.

    Args:
        run: does the work and returns the summary; its `num_failed`, `num_rows` and `max_failure_rate` decide between
            exit codes 0 and 3.
        dry_run: validates and estimates without writing; returns what it found.

    Returns:
        0 done, 1 failed, 2 bad configuration, input or usage, 3 finished with too many failed rows.
    """
    if not wants_json_logs():
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "diffusers", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    started = time.monotonic()
    try:
        line = parse_command_line(sys.argv[1:] if argv is None else argv)
        if line.help:
            print(_usage(config_class, run))
            return EXIT_DONE
        config = load_config(config_class, line.config_path, line.overrides)
        if line.print_config:
            print(config_to_yaml(config), end="")
            return EXIT_DONE
        prices = read_prices(absolute_uri(line.prices)) if line.prices else None
        summary = dry_run(config) if line.dry_run else run(config)
        if prices:
            summary |= {"cost": cost_of(summary, prices)}
    except SimdaError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED if isinstance(error, StorageError | MachineError) else EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return EXIT_FAILED
    except Exception as error:
        reason = _reason_in(error)
        if reason is None:
            traceback.print_exc()
        else:
            print(f"error: {reason}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        release_all()
    summary = {**summary, "wall_s": round(time.monotonic() - started, 1)}
    print(json.dumps(summary), flush=True)
    too_many = has_too_many_failures(summary)
    if too_many:
        print(
            f"error: {summary['num_failed']} of {summary['num_rows']} rows failed, more than "
            f"max_failure_rate={summary['max_failure_rate']}; see {summary.get('failures', 'the failures table')}",
            file=sys.stderr,
        )
    return EXIT_TOO_MANY_FAILURES if too_many else EXIT_DONE


def has_too_many_failures(summary: Mapping[str, Any]) -> bool:
    """Whether a summary tells of more failed rows than its `max_failure_rate` allows."""
    return summary.get("num_failed", 0) > summary.get("max_failure_rate", 1.0) * max(1, summary.get("num_rows", 1))


def parse_command_line(argv: list[str]) -> CommandLine:
    """Split flags from `key=value` words.

    Raises:
        ConfigError: an unknown flag, one without its path, or prices without a dry run.
    """
    paths: dict[str, str] = {}
    words, switches = [], set()
    rest = iter(argv)
    for word in rest:
        flag, separator, value = word.partition("=")
        if not word.startswith("-"):
            words.append(word)
        elif flag in FLAGS_WITH_PATH:
            paths[flag] = value if separator else next(rest, "")
            if not paths[flag]:
                raise ConfigError(f"{flag} needs the path of a YAML file")
        elif word in FLAGS or word == "-h":
            switches.add("--help" if word == "-h" else word)
        else:
            raise ConfigError(f"unknown flag {word}; flags are {', '.join(FLAGS)}; all else is key=value")
    if "--prices" in paths and "--dry-run" not in switches:
        raise ConfigError("--prices is for estimates; give --dry-run too")
    return CommandLine(
        paths.get("--config"),
        tuple(words),
        "--print-config" in switches,
        "--dry-run" in switches,
        "--help" in switches,
        paths.get("--prices"),
    )


@contextmanager
def ray_session(*roles: str | None) -> Iterator[None]:
    """Connect to the job's cluster (`RAY_ADDRESS`), or start a private Ray on this machine and stop it afterwards.

    The private one listens on the loopback interface only and has twice as many logical CPUs as cores, so that small
    readers and writers never starve behind the workers that do the heavy work.

    Args:
        roles: kinds of machines that the command's work will ask for; None is any.

    Raises:
        ConfigError: a role, and no cluster that could have it.
    """
    asked = sorted({role for role in roles if role})
    if asked and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"role={asked[0]}: one machine has no roles; leave it out, or run on a cluster (see cluster/README.md)"
        )
    # Ray's Parquet reader V2 starts 32 processes per execution, and Ray reports usage unless told not to.
    os.environ.setdefault("RAY_DATA_USE_DATASOURCE_V2", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if asked:
        # Beside the work that waits, Ray Data asks for machines of its own accord, by CPUs and GPUs alone: the cluster
        # would start machines of every role. By a threshold that is never reached it only waits.
        os.environ.setdefault("RAY_DATA_CLUSTER_AUTOSCALER", "V2")
        os.environ.setdefault("RAY_DATA_CLUSTER_SCALING_UP_UTIL_THRESHOLD", "inf")
    import ray

    if ray.is_initialized():
        _configure_ray_data()
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level="ERROR", log_to_driver=False)
        with _shut_down_after():
            absent = [role for role in asked if role not in ray.cluster_resources()]
            if absent:
                print(f"waiting for the cluster to start {', '.join(absent)}", file=sys.stderr, flush=True)
            yield
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # glibc asks for huge pages: a training step of the embedded model takes 20 page faults instead of 9,000.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    with tempfile.TemporaryDirectory(prefix="simda-ray-", ignore_cleanup_errors=True) as folder:
        _start_private_ray(folder)
        with _shut_down_after():
            yield


def _start_private_ray(folder: str) -> None:
    """Start Ray on this machine, and again where it did not get up within the 30 seconds that Ray has fixed for that.

    Raises:
        MachineError: nor the last time.
    """
    import ray

    for start in range(1, RAY_STARTS + 1):
        others = set(psutil.Process().children(recursive=True))
        try:
            ray.init(
                address="local",
                num_cpus=max(4, 2 * len(os.sched_getaffinity(0))),
                object_store_memory=512 * 2**20,
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=False,
                _temp_dir=folder,
            )
            return
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            tell(f"Ray did not start within its 30 s on this busy machine (start {start} of {RAY_STARTS})")
        # What Ray had started by then it leaves to the end of this process.
        for process in set(psutil.Process().children(recursive=True)) - others:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    raise MachineError("Ray could not be started: this machine is too busy; end other programs, then run this again")


@contextmanager
def _shut_down_after() -> Iterator[None]:
    import ray

    _configure_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def with_progress(
    rows: Iterable[Row], noun: str, total: int | None, is_failure: Callable[[Row], bool], stage: str | None = None
) -> Iterator[Row]:
    """Pass rows through, print every few seconds: done/total, rate, time left, failures so far; count for Prometheus.

    Args:
        total: number of rows, or None if it is not known beforehand.
        stage: that the rows come from, for the metrics; by default `noun`.
    """
    started = last = time.monotonic()
    failed = 0
    telemetry = StageTelemetry(stage or noun, total, record_metric)
    try:
        for done, row in enumerate(rows, start=1):
            row_failed = is_failure(row)
            failed += row_failed
            telemetry.add(row, row_failed)
            yield row
            now = time.monotonic()
            if now - last >= PROGRESS_EVERY_S or done == total:
                last, rate = now, done / (now - started)
                left = f"/{total}  {rate:.1f}/s  {(total - done) / rate:.0f} s left" if total else f"  {rate:.1f}/s"
                tell(f"{noun} {done}{left}  {failed} failed", stage=stage or noun, num_done=done, num_failed=failed)
                telemetry.tell_progress()
    finally:
        telemetry.end()


def tell(message: str, **fields: Any) -> None:
    """Print a line for people; where logs are for machines, a record with these fields."""
    if wants_json_logs() and is_connected():
        logging.getLogger("simda").info(message, extra=fields)
    else:
        print(message, file=sys.stderr, flush=True)


def wants_json_logs() -> bool:
    """Whether logs are structured: by Ray's own variable, which its workers follow too, and which names the job."""
    return os.environ.get("RAY_LOGGING_CONFIG_ENCODING") == "JSON"


def is_connected() -> bool:
    """Whether this process is part of a Ray by now; does not import it to find out."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def record_metric(metric: Metric, value: float, labels: Mapping[str, str]) -> None:
    """Hand a value to the Ray that this process is connected to, for Prometheus; nowhere without one."""
    if not is_connected():
        return
    instrument, labels = _instrument(metric), {**_job_labels(), **labels}
    if metric.kind == "counter":
        # Ray refuses to add nothing.
        if value > 0:
            instrument.inc(value, tags=labels)
    elif metric.kind == "gauge":
        instrument.set(value, tags=labels)
    else:
        instrument.observe(value, tags=labels)


@cache
def _instrument(metric: Metric) -> Any:
    from ray.util import metrics

    labels = ("command", "job", "stage", *metric.labels)
    if metric.kind == "histogram":
        return metrics.Histogram(metric.name, metric.description, WAIT_BOUNDARIES_S, labels)
    return {"counter": metrics.Counter, "gauge": metrics.Gauge}[metric.kind](metric.name, metric.description, labels)


@cache
def _job_labels() -> dict[str, str]:
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("metadata", {})
    return {"command": Path(sys.argv[0]).stem, "job": submitted.get("job_submission_id", "local")}


def library_versions() -> dict[str, str]:
    """Versions of what decides the content of tables, for their provenance."""
    return {name: version(name) for name in ("simda", "torch", "diffusers", "transformers", "av", "decord")}


def _reason_in(error: BaseException | None) -> SimdaError | None:
    """What the storage or the machine said, if that is why work in another process ended; Ray wraps it.

    Between processes an exception loses its cause: of what a stage of Ray Data raises, only Ray's text still tells.
    """
    kinds = {f"{kind.__module__}.{kind.__name__}": kind for kind in (StorageError, MachineError)}
    while error is not None:
        if isinstance(error, StorageError | MachineError):
            return error
        if told := re.search(rf"^({'|'.join(kinds)}): (.+)$", str(error), re.MULTILINE):
            return kinds[told[1]](told[2])
        error = getattr(error, "cause", None) or error.__cause__
    return None


def _configure_ray_data() -> None:
    # Not just `ray`: when it is imported, ray.data sets its log level anew.
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.use_datasource_v2 = False
    # With reservation on, two small operators on few CPUs run one after the other.
    context.op_resource_reservation_enabled = False
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = 1800


def _usage(config_class: type, run: Callable[..., Any]) -> str:
    script = os.path.relpath(sys.argv[0])
    return "\n".join(
        [
            f"usage: python {script} [--config FILE] [--print-config] [--dry-run [--prices FILE]] [key=value ...]",
            "",
            (sys.modules[run.__module__].__doc__ or "").strip(),
            "",
            "settings (with their defaults):",
            *describe_settings(config_class),
        ]
    )
