"""Estimates: machines, hours and money, against arithmetic done by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from simda.config import Workers
from simda.cost import MachinePrice, PriceTable, cost_of, estimate_cost, read_prices, time_left
from simda.errors import SimdaError

PRICES = PriceTable(
    "EUR",
    {"gpu-train": MachinePrice(per_hour=24.0, cpus=192, gpus=8), "any": MachinePrice(per_hour=0.5, cpus=16)},
)


def test_machines_are_filled_before_another_one_is_paid_for():
    workers = Workers(num_workers=12, cpus_per_worker=4, gpus_per_worker=1, role="gpu-train")
    cost = estimate_cost(PRICES, workers, wall_s=2 * 3600)
    # 12 GPUs are two machines of 8, for 2 hours each.
    assert (cost.num_machines, cost.machine_hours, cost.price, cost.currency) == (2, 4.0, 96.0, "EUR")


def test_the_scarcer_of_cpus_and_gpus_decides():
    workers = Workers(num_workers=8, cpus_per_worker=48, gpus_per_worker=1, role="gpu-train")
    assert estimate_cost(PRICES, workers, 3600).num_machines == 2
    assert estimate_cost(PRICES, Workers(num_workers=33, cpus_per_worker=0.5), 3600).num_machines == 2


def test_what_no_machine_takes_is_refused():
    with pytest.raises(SimdaError, match="asks for 1 GPUs, more than the 0 of a machine any"):
        estimate_cost(PRICES, Workers(gpus_per_worker=1), 1)
    with pytest.raises(SimdaError, match="no machine gpu-encode; it has gpu-train, any"):
        estimate_cost(PRICES, Workers(role="gpu-encode"), 1)


def test_no_estimate_no_cost():
    assert cost_of({"seconds_left": None, "workers": {"num_workers": 2}}, PRICES) is None
    assert cost_of({"num_rows": 3}, PRICES) is None
    assert cost_of({"seconds_left": 7200, "workers": {"num_workers": 2}}, PRICES) == {
        "num_machines": 1, "machine_hours": 2.0, "price": 1.0, "currency": "EUR", "role": "any",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("num_left", "taken_s", "expected_s", "num_workers", "seconds", "source"),
    [
        (10, [2.0, 4.0], 100.0, 2, 15, "the 2 rows of this output"),
        (10, [], 4.0, 2, 20, "seconds_each"),
        # A video is not shared: more workers than videos do not help.
        (1, [], 4.0, 8, 4, "seconds_each"),
        (10, [], None, 2, None, "seconds_each is not set"),
        (0, [], None, 2, 0, "nothing is left"),
    ],
)
def test_the_runs_own_rows_tell_the_time_else_what_the_user_expects(
    num_left, taken_s, expected_s, num_workers, seconds, source
):
    told = time_left(num_left, taken_s, expected_s, num_workers, "seconds_each")
    assert told["seconds_left"] == seconds
    assert source in told["estimated_from"]


def test_a_chain_costs_the_sum_of_its_steps_and_names_those_without_an_estimate():
    def step(pipeline, **summary):
        return {"pipeline": pipeline, "checked": True, "summary": summary}

    workers = {"num_workers": 8, "gpus_per_worker": 1, "role": "gpu-train"}
    steps = [
        step("train", seconds_left=3600, workers=workers),
        step("generate", seconds_left=1800, workers=workers),
        step("upscale", seconds_left=None, workers=workers),
        {"pipeline": "evaluate", "checked": False},
    ]
    cost = cost_of({"num_steps": 4, "steps": steps}, PRICES)
    assert (cost["machine_hours"], cost["price"], cost["currency"]) == (1.5, 36.0, "EUR")
    assert cost["without_estimate"] == ["upscale", "evaluate"]
    assert [one and one["price"] for one in cost["steps"]] == [24.0, 12.0, None, None]
    assert cost_of({"steps": steps[2:]}, PRICES)["price"] is None


def test_faults_of_a_table_are_told_together(tmp_path: Path):
    path = tmp_path / "prices.yaml"
    path.write_text("currency: EUR\nmachines:\n  any: {per_hour: -1, cpus: 16}\n  gpu-train: {per_hour: 3, gpu: 8}\n")
    with pytest.raises(SimdaError) as fault:
        read_prices(str(path))
    assert all(part in str(fault.value) for part in ("any.per_hour", "gpu-train.cpus", "gpu-train.gpu"))
    path.write_text("currency: [")
    with pytest.raises(SimdaError, match=r"prices\.yaml"):
        read_prices(str(path))
    with pytest.raises(SimdaError, match=r"missing\.yaml"):
        read_prices(str(tmp_path / "missing.yaml"))
