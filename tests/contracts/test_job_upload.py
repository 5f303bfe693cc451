"""What `ray job submit --working-dir .` sends to a cluster, by Ray's own packing: all of the code, and little else."""

from __future__ import annotations

import zipfile
from pathlib import Path

from ray._private import ray_constants
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[2]


def uploaded(folder: Path, archive: Path, honour_gitignore: bool = True) -> dict[str, int]:
    """Names and sizes of what `ray job submit --working-dir FOLDER` would send, by Ray's own packing."""
    excludes = ray_constants.get_runtime_env_default_excludes()
    create_package(str(folder), archive, include_gitignore=honour_gitignore, excludes=excludes)
    with zipfile.ZipFile(archive) as package:
        return {entry.filename: entry.file_size for entry in package.infolist()}


def test_a_job_uploads_little_and_all_that_workers_need(tmp_path):
    sent = uploaded(ROOT, tmp_path / "package.zip")
    largest = sorted(sent, key=sent.__getitem__)[-5:]
    assert (tmp_path / "package.zip").stat().st_size < 20 * 2**20, largest
    wanted = [path for path in (ROOT / "simda").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    wanted += [*(ROOT / "pipelines").glob("*.py"), *(ROOT / "pipelines" / "configs").iterdir()]
    assert {str(path.relative_to(ROOT)) for path in wanted} <= sent.keys()
    # Its metadata would hide the installed package's, which tells where relative paths start.
    assert not [name for name in sent if ".egg-info" in name or name.startswith((".git/", ".venv", "out", "tests"))]


def test_what_a_used_checkout_gathers_stays_behind(tmp_path):
    checkout = tmp_path / "checkout"
    kept = (
        "pipelines/train.py",
        "pipelines/configs/train.yaml",
        "simda/data/store.py",
        "simda/sprites/weights/base/unet/diffusion_pytorch_model.safetensors",
    )
    left = (
        ".git/objects/pack/pack-1.pack",
        ".venv/lib/python3.11/site-packages/torch/lib/libtorch.so",
        "out/demo/train/adapter/adapter.safetensors",
        "simda.egg-info/PKG-INFO",
        "simda/__pycache__/config.cpython-311.pyc",
        "videos/one.mp4",
        "my_model/unet/diffusion_pytorch_model.safetensors",
        "latents/data/latents-1.parquet",
        "tests/conftest.py",
    )
    for name in (*kept, *left):
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (checkout / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    sent = uploaded(checkout, tmp_path / "package.zip", honour_gitignore=False)
    assert {name for name in sent if name in (*kept, *left)} == set(kept)
