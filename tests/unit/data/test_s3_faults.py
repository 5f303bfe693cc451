"""S3 that is busy, that drops connections and cuts answers off: nothing is lost, and nothing comes back in part."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from simda.data import uris
from simda.data.uris import exists, read_bytes, write_bytes
from tests.s3_faults import FaultyProxy


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """One try a request, and short pauses, so that it is this package that repeats."""
    monkeypatch.setattr(uris, "S3_ATTEMPTS", 1)
    monkeypatch.setattr(uris, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(uris, "LONGEST_PAUSE_S", 0.05)


@pytest.fixture
def faulty(
    request: pytest.FixtureRequest,
    s3_server: str,
    s3_bucket: str,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[FaultyProxy, str]]:
    proxy = FaultyProxy(s3_server, seed=1, rate=request.param)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy, s3_bucket
    proxy.close()


@pytest.mark.parametrize("faulty", [0.4], indirect=True)
def test_what_is_written_through_faults_is_read_back_whole(faulty: tuple[FaultyProxy, str]) -> None:
    proxy, bucket = faulty
    files = {f"{bucket}/{n}": np.random.default_rng(n).bytes(1 + 40_000 * n) for n in range(12)}
    for uri, data in files.items():
        write_bytes(uri, data)
    assert {uri: read_bytes(uri) for uri in files} == files
    assert not exists(f"{bucket}/absent")
    assert all(proxy.num_faults.values()), proxy.num_faults
