"""What work will cost: seconds of work, on machines of a kind, by a price table that its user keeps.

Prices are nobody's business but the user's: `cluster/prices.yaml` holds examples to be replaced. How many seconds there
are is estimated where the work is known, in the commands; here they become machine-hours and money.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from simda.config import CONFIG_RULES, Workers
from simda.data.uris import read_text
from simda.errors import ConfigError

ANY_ROLE = "any"
"""The price of work that asks for no kind of machine."""


@checked_dataclass(frozen=True, config=CONFIG_RULES)
class MachinePrice:
    """What a kind of machine costs, and how many workers it takes."""

    per_hour: float = Field(ge=0)
    """Price of a machine for an hour."""
    cpus: float = Field(gt=0)
    """Logical CPUs that it offers to Ray."""
    gpus: float = Field(default=0, ge=0)
    """GPUs that it offers."""


@checked_dataclass(frozen=True, config=CONFIG_RULES)
class PriceTable:
    """A file such as `cluster/prices.yaml`."""

    currency: str
    """Of all prices, such as USD."""
    machines: dict[str, MachinePrice] = Field(min_length=1)
    """By role, as in `cluster/`; `any` for work without a role."""


@dataclass(frozen=True)
class Cost:
    """An estimate."""

    num_machines: int
    """That all workers need at once."""
    machine_hours: float
    """Of all machines together, each from the start of the work to its end."""
    price: float
    """In the table's currency."""
    currency: str
    role: str
    """Of the machines."""

    def figures(self) -> dict[str, Any]:
        """As a part of a summary."""
        return {
            "num_machines": self.num_machines,
            "machine_hours": round(self.machine_hours, 2),
            "price": round(self.price, 2),
            "currency": self.currency,
            "role": self.role,
        }


def read_prices(uri: str) -> PriceTable:
    """The price table in a YAML file.

    Raises:
        ConfigError: it cannot be read, or is not a price table; all faults together.
    """
    try:
        return TypeAdapter(PriceTable).validate_python(yaml.safe_load(read_text(uri)))
    except yaml.YAMLError as error:
        raise ConfigError(f"prices={uri} cannot be read: {error}; give a file such as cluster/prices.yaml") from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError(f"prices={uri} is no price table:\n  " + "\n  ".join(faults)) from None


def estimate_cost(prices: PriceTable, workers: Workers, wall_s: float) -> Cost:
    """What workers cost that are busy for a while, on machines of their role.

    Args:
        wall_s: seconds from the start of the workers to their end.

    Raises:
        ConfigError: the table has no such machine, or one worker is more than a machine takes.
    """
    name = workers.role or ANY_ROLE
    machine = prices.machines.get(name)
    if machine is None:
        raise ConfigError(f"the price table has no machine {name}; it has {', '.join(prices.machines)}")
    num_machines = math.ceil(workers.num_workers / workers_on(machine, workers, name))
    hours = num_machines * wall_s / 3600
    return Cost(num_machines, hours, hours * machine.per_hour, prices.currency, name)


def workers_on(machine: MachinePrice, workers: Workers, name: str) -> int:
    """How many of the workers one machine takes.

    Raises:
        ConfigError: not even one.
    """
    asked: Mapping[str, tuple[float, float]] = {
        "CPU": (machine.cpus, workers.cpus_per_worker),
        "GPU": (machine.gpus, workers.gpus_per_worker),
    }
    for kind, (there, each) in asked.items():
        if each > there:
            raise ConfigError(f"a worker asks for {each:g} {kind}s, more than the {there:g} of a machine {name}")
    return int(min(there / each for there, each in asked.values() if each))


def time_left(
    num_left: int, taken_s: Sequence[float], expected_s: float | None, num_workers: int, setting: str
) -> dict[str, Any]:
    """How long workers need for the rows that are left, and what tells so: parts of a dry run's summary.

    Args:
        taken_s: seconds of a worker for each of the run's rows that are done; they tell best.
        expected_s: what a row is expected to take where none is done yet, if the user says so.
        setting: by which.
    """
    if not num_left:
        return {"seconds_left": 0, "estimated_from": "nothing is left"}
    if taken_s:
        each, source = sum(taken_s) / len(taken_s), f"the {len(taken_s)} rows of this output"
    elif expected_s is not None:
        each, source = expected_s, setting
    else:
        return {"seconds_left": None, "estimated_from": no_estimate(setting)}
    return {"seconds_left": round(each * num_left / min(num_workers, num_left)), "estimated_from": source}


def training_time_left(clips_left: int, rates: Sequence[float], expected_clips_per_s: float | None) -> dict[str, Any]:
    """How long all workers together train on the clips that are left, and what tells so, as `time_left`.

    Args:
        rates: clips per second that the run had so far, of which the latest tells best.
        expected_clips_per_s: the same where there is none yet, if the user says so.
    """
    rate = rates[-1] if rates else expected_clips_per_s
    if rate is None:
        return {"seconds_left": None, "estimated_from": no_estimate("expected_clips_per_s")}
    source = "the latest line of metrics.jsonl" if rates else "expected_clips_per_s"
    return {"seconds_left": round(clips_left / rate), "estimated_from": source}


def no_estimate(setting: str) -> str:
    """Why there is none, and what to do about it; a setting of the command would make one."""
    return f"nothing: no part of this run is done yet, and {setting} is not set"


def cost_of(summary: Mapping[str, Any], prices: PriceTable) -> dict[str, Any] | None:
    """What the work in the summary of a dry run costs, by its `seconds_left` and `workers`; None where it has not both.

    Of a chain of steps, the sum; steps that have no estimate are named, as the sum is without them.

    Raises:
        ConfigError: as `estimate_cost`.
    """
    if "steps" in summary:
        costs = [cost_of(step.get("summary") or {}, prices) for step in summary["steps"]]
        known = [cost for cost in costs if cost is not None]
        return {
            # Nothing known is not nothing to pay.
            **{
                name: round(sum(cost[name] for cost in known), 2) if known else None
                for name in ("machine_hours", "price")
            },
            "currency": prices.currency,
            "steps": costs,
            "without_estimate": [
                step["pipeline"] for step, cost in zip(summary["steps"], costs, strict=True) if cost is None
            ],
        }
    if summary.get("seconds_left") is None or "workers" not in summary:
        return None
    return estimate_cost(prices, Workers(**summary["workers"]), summary["seconds_left"]).figures()
