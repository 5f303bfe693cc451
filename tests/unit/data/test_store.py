from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simda.data.schema import FAILURES, GENERATED, LATENTS, METRICS, TEXT_EMBEDDINGS, build_table
from simda.data.store import OutputStore
from simda.data.tensors import read_tensor, tensor_columns
from simda.data.uris import exists, read_bytes, write_bytes
from simda.errors import ConfigError, InputError, ModelMismatchError, StorageError

from .test_schema import PROVENANCE, latents_row

RUN_KEY = {"command": "cache_latents", "model": {"path": "tiny", "size": 64}, "fps": 8}


@pytest.fixture(params=["local", "file", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output that does not exist yet."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_bucket')}/runs/my run"
    return f"{'file://' if request.param == 'file' else ''}{tmp_path}/runs/one"


def latents_table(ids: list[str], provenance: dict[str, Any] = PROVENANCE) -> pa.Table:
    return build_table(LATENTS, [latents_row(clip_id) for clip_id in ids], provenance)


def failures_table(*rows: tuple[str, int]) -> pa.Table:
    columns = [
        {"id": row_id, "stage": "encode_clips", "error_type": "VideoError", "message": f"try {n}", "attempt": n}
        for row_id, n in rows
    ]
    return build_table(FAILURES, columns, {})


def test_claim_start_and_go_on(uri: str) -> None:
    store = OutputStore(uri)
    assert store.claim(RUN_KEY, "fps: 8\n") is False
    assert store.claim(RUN_KEY, "fps: 8\nworkers: 4\n") is True
    assert read_bytes(f"{uri}/config.yaml") == b"fps: 8\nworkers: 4\n"
    assert store.run_key() == RUN_KEY


def test_another_run_is_refused_field_by_field(uri: str) -> None:
    store = OutputStore(uri)
    store.claim(RUN_KEY, "fps: 8\n")
    other = {"command": "cache_latents", "model": {"path": "big", "size": 64}, "fps": 4}
    with pytest.raises(ConfigError) as fault:
        store.claim(other, "fps: 4\n")
    assert 'fps: 8 -> 4\n  model.path: "tiny" -> "big"\nGive another output' in str(fault.value)
    assert read_bytes(f"{uri}/config.yaml") == b"fps: 8\n"


def test_a_directory_of_something_else_is_refused(uri: str) -> None:
    write_bytes(f"{uri}/thesis.docx", b"years of work")
    store = OutputStore(uri)
    with pytest.raises(ConfigError, match=r"not a run's \(thesis\.docx\); give an empty or new directory"):
        store.claim(RUN_KEY, "")
    with pytest.raises(ConfigError, match="is a file"):
        OutputStore(f"{uri}/thesis.docx").claim(RUN_KEY, "")


def test_check_claim_writes_nothing(uri: str) -> None:
    assert OutputStore(uri).check_claim(RUN_KEY) is False
    assert not exists(uri)


def test_shards_round_trip(uri: str) -> None:
    store = OutputStore(uri)
    assert store.ids(LATENTS) == set()
    assert store.read_table(LATENTS).num_rows == 0
    latents = np.random.default_rng(0).normal(size=(4, 16, 8, 8)).astype(np.float16)
    rows = [latents_row("b"), latents_row("a", **tensor_columns("latents", latents))]
    [name] = store.write_shard(LATENTS, build_table(LATENTS, rows, PROVENANCE))
    store.write_shard(LATENTS, latents_table(["c"]))
    assert store.shard_names(LATENTS) == sorted({name, *store.shard_names(LATENTS)})
    assert store.ids(LATENTS) == {"a", "b", "c"}
    table = store.read_table(LATENTS)
    assert table["clip_id"].to_pylist() == ["a", "b", "c"]
    np.testing.assert_array_equal(read_tensor(table.to_pylist()[0], "latents"), latents)
    assert store.read_table(LATENTS, ["fps", "caption"]).column_names == ["fps", "caption"]
    assert store.provenance(LATENTS) == PROVENANCE


def test_the_same_rows_are_one_file_and_one_row(uri: str) -> None:
    store = OutputStore(uri)
    first = store.write_shard(LATENTS, latents_table(["a", "b"]))
    assert store.write_shard(LATENTS, latents_table(["b", "a"])) == first
    store.write_shard(LATENTS, latents_table(["b", "c"]))
    assert len(store.shard_names(LATENTS)) == 2
    assert store.read_table(LATENTS, ["clip_id"])["clip_id"].to_pylist() == ["a", "b", "c"]


def test_tables_lie_apart(uri: str) -> None:
    store = OutputStore(uri)
    store.write_shard(LATENTS, latents_table(["a"]))
    embeds = tensor_columns("prompt_embeds", np.zeros((77, 8), dtype=np.float16))
    row = {"caption_id": "x", "caption": "", **embeds}
    store.write_shard(TEXT_EMBEDDINGS, build_table(TEXT_EMBEDDINGS, [row], PROVENANCE))
    store.write_shard(FAILURES, failures_table(("b", 1)))
    assert [len(store.ids(kind)) for kind in (LATENTS, TEXT_EMBEDDINGS, FAILURES)] == [1, 1, 1]
    assert {
        name.split("/")[0] for kind in (LATENTS, TEXT_EMBEDDINGS, FAILURES) for name in store.shard_names(kind)
    } == {
        "data",
        "text_embeddings",
        "failures",
    }


def test_what_is_left_to_do(uri: str) -> None:
    store = OutputStore(uri)
    plan = pa.table({"clip_id": ["a", "b", "c", "d"], "start_s": [0.0, 1.0, 2.0, 3.0]})
    assert store.without_written(LATENTS, plan).num_rows == 4
    store.write_shard(LATENTS, latents_table(["a", "d"]))
    assert store.without_written(LATENTS, plan)["clip_id"].to_pylist() == ["b", "c"]


def test_a_later_success_or_attempt_supersedes_a_failure(uri: str) -> None:
    store = OutputStore(uri)
    store.write_shard(FAILURES, failures_table(("a", 1), ("b", 1), ("c", 1)))
    store.write_shard(FAILURES, failures_table(("b", 2)))
    store.write_shard(LATENTS, latents_table(["a"]))
    standing = store.failures(LATENTS)
    assert standing.select(["id", "attempt"]).to_pylist() == [{"id": "b", "attempt": 2}, {"id": "c", "attempt": 1}]
    assert store.clear_failures().num_rows == 3
    assert store.failures(LATENTS).num_rows == 0
    assert store.shard_names(FAILURES) == []


def test_metrics_have_several_rows_for_an_id(uri: str) -> None:
    store = OutputStore(uri)
    rows = [{"id": "all", "metric": m, "value": 1.0, "protocol": p} for m in ("fvd", "clip") for p in ("a", "b")]
    store.write_shard(METRICS, build_table(METRICS, rows, {}))
    store.write_shard(METRICS, build_table(METRICS, rows[:2], {}))
    assert store.read_table(METRICS).num_rows == 4


def test_the_manifest_comes_and_goes(uri: str) -> None:
    store = OutputStore(uri)
    store.claim(RUN_KEY, "")
    assert store.read_manifest() is None
    store.write_manifest({"num_rows": 3})
    assert store.read_manifest() == {"complete": True, "num_rows": 3}
    store.invalidate_manifest()
    store.invalidate_manifest()
    assert store.read_manifest() is None


def test_put_file(uri: str, tmp_path: Path) -> None:
    (tmp_path / "local.mp4").write_bytes(b"video")
    store = OutputStore(uri)
    assert store.put_file("videos/a.mp4", str(tmp_path / "local.mp4")) == "videos/a.mp4"
    assert read_bytes(store.uri_of("videos/a.mp4")) == b"video"
    assert store.uri_of("s3://other/x.mp4") == "s3://other/x.mp4"


def test_files_of_different_models_do_not_mix(uri: str) -> None:
    store = OutputStore(uri)
    store.write_shard(LATENTS, latents_table(["a"]))
    store.write_shard(LATENTS, latents_table(["b"], {**PROVENANCE, "libraries": {"torch": "3"}}))
    assert store.provenance(LATENTS)["vae"]["hash"] == "aa"
    store.write_shard(LATENTS, latents_table(["c"], {**PROVENANCE, "vae": {"hash": "bb"}}))
    with pytest.raises(ModelMismatchError, match=r"vae\.hash"):
        store.provenance(LATENTS)


def test_a_missing_table_is_told(uri: str) -> None:
    with pytest.raises(InputError, match="no generated table in"):
        OutputStore(uri).provenance(GENERATED)
    with pytest.raises(InputError, match="has no column colour; it has clip_id"):
        OutputStore(uri).read_table(LATENTS, ["colour"])


def test_unfinished_files_count_as_not_written(tmp_path: Path) -> None:
    store = OutputStore(str(tmp_path))
    [name] = store.write_shard(LATENTS, latents_table(["a"]))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / "data" / "latents-cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data" / "latents-empty.parquet").write_bytes(b"")
    (tmp_path / "data" / ".tmp-1.parquet").write_bytes(whole)
    (tmp_path / "data" / "_latents.parquet").write_bytes(whole)
    assert store.ids(LATENTS) == {"a"}
    assert store.read_table(LATENTS).num_rows == 1
    with pytest.raises(InputError, match="not a whole Parquet file"):
        store.open_shard(LATENTS, "data/latents-cut.parquet")


def test_latents_are_cut_into_row_groups(tmp_path: Path) -> None:
    store = OutputStore(str(tmp_path))
    [name] = store.write_shard(LATENTS, latents_table([f"{i:03d}" for i in range(70)]))
    shard = store.open_shard(LATENTS, name)
    assert [shard.metadata.row_group(i).num_rows for i in range(shard.num_row_groups)] == [32, 32, 6]
    column = shard.metadata.row_group(0).column(LATENTS.columns.get_field_index("latents"))
    assert (column.compression, column.has_dictionary_page) == ("UNCOMPRESSED", False)
    assert pq.read_table(tmp_path / "data").num_rows == 70


def test_large_rows_make_small_row_groups_and_no_file_of_more_than_256_mb(tmp_path: Path) -> None:
    store = OutputStore(str(tmp_path))
    one = tensor_columns("latents", np.zeros((4, 32, 200, 400), dtype=np.float16))  # 20.48 MB
    large = build_table(LATENTS, [latents_row(f"{i:02d}", **one) for i in range(20)], PROVENANCE)
    names = store.write_shard(LATENTS, large)
    assert store.write_shard(LATENTS, large) == names
    assert len(names) == len(store.shard_names(LATENTS)) == 2
    assert all((tmp_path / name).stat().st_size <= 256e6 for name in names)
    assert store.open_shard(LATENTS, names[0]).num_row_groups == 10
    assert store.read_table(LATENTS, ["clip_id"])["clip_id"].to_pylist() == [f"{i:02d}" for i in range(20)]
    small = tensor_columns("latents", np.zeros((4, 16, 64, 64), dtype=np.float32))  # 1.05 MB
    [name] = store.write_shard(LATENTS, build_table(LATENTS, [latents_row(str(i), **small) for i in range(40)], {}))
    assert store.open_shard(LATENTS, name).metadata.row_group(0).num_rows == 15


def start_writer(uri: str, worker: str, num_shards: int) -> subprocess.Popen[str]:
    """A process that writes shards of three rows, `{worker}-{shard}-{0..2}`, telling each one it has finished."""
    code = textwrap.dedent("""
        import sys
        import numpy as np
        from simda.data.schema import LATENTS, build_table
        from simda.data.store import OutputStore
        from simda.data.tensors import tensor_columns

        store, worker = OutputStore(sys.argv[1]), sys.argv[2]
        base = dict(video_uri="v", start_s=0.0, end_s=1.0, fps=8.0, num_frames=8, height_px=8, width_px=8, caption="c",
                    decoder="pyav", **tensor_columns("latents", np.zeros((4, 8, 64, 64), dtype=np.float16)))
        for shard in range(int(sys.argv[3])):
            rows = [{"clip_id": f"{worker}-{shard}-{i}", **base} for i in range(3)]
            store.write_shard(LATENTS, build_table(LATENTS, rows, {"vae": "x"}))
            print(shard, flush=True)
    """)
    return subprocess.Popen(
        [sys.executable, "-c", code, uri, worker, str(num_shards)], stdout=subprocess.PIPE, text=True
    )


def test_killed_writers_leave_whole_shards_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for round_number in range(3):
        writer = start_writer(str(tmp_path), f"w{round_number}", 10**6)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(float(rng.uniform(0.02, 0.2)))
        writer.send_signal(signal.SIGKILL)
        told = writer.stdout.read().split()
        writer.wait()
        ids = OutputStore(str(tmp_path)).ids(LATENTS)
        promised = {f"w{round_number}-{shard}-{i}" for shard in ["0", *told] for i in range(3)}
        assert promised <= ids
    # Every file is whole: none was left out with a warning, and each holds its three rows.
    store = OutputStore(str(tmp_path))
    sizes = [store.open_shard(LATENTS, name).metadata.num_rows for name in store.shard_names(LATENTS)]
    assert set(sizes) == {3}
    assert len(store.ids(LATENTS)) == 3 * len(sizes)


def test_writers_side_by_side(tmp_path: Path) -> None:
    # Two of the three do the same work at the same time.
    writers = [start_writer(str(tmp_path), worker, 8) for worker in ("a", "a", "b")]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    store = OutputStore(str(tmp_path))
    assert store.ids(LATENTS) == {f"{w}-{shard}-{i}" for w in "ab" for shard in range(8) for i in range(3)}
    assert len(store.shard_names(LATENTS)) == 16
    assert [name for name in os.listdir(tmp_path / "data") if name.startswith(".")] == []


def test_abandoned_temporary_files_go_when_a_run_goes_on(tmp_path: Path) -> None:
    store = OutputStore(str(tmp_path))
    (tmp_path / ".tmp-0").write_bytes(b"")
    assert store.claim(RUN_KEY, "") is False
    (tmp_path / "data").mkdir()
    for name, age_s in ((".tmp-old.parquet", 7200), (".tmp-new.parquet", 0)):
        (tmp_path / "data" / name).write_bytes(b"")
        os.utime(tmp_path / "data" / name, (time.time() - age_s,) * 2)
    assert store.claim(RUN_KEY, "") is True
    assert os.listdir(tmp_path / "data") == [".tmp-new.parquet"]


def test_where_outputs_can_be() -> None:
    for uri, reason in (("gs://b/x", "gs:// is not known"), ("", "empty path"), ("s3://", "names no bucket")):
        with pytest.raises(InputError, match=reason):
            OutputStore(uri)


def test_a_bucket_that_is_not_there(s3_bucket: str) -> None:
    with pytest.raises((InputError, StorageError), match=r"(?i)bucket|cannot be reached"):
        OutputStore("s3://no-such-bucket-here/run").claim(RUN_KEY, "")
