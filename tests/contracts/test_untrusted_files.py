"""Nothing that a stranger can hand in is unpickled: models are safetensors, tables Parquet, settings plain YAML."""

from __future__ import annotations

import ast
import io
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from simda.errors import SimdaError
from simda.models.adapter_state import check_adapter
from simda.models.base_models import load_autoencoder, load_text_parts, load_unet

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("simda", "pipelines", "cluster") for path in (ROOT / folder).rglob("*.py"))
# What runs code that a file brings along, by the name that is called.
UNSAFE = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "dill.load",
    "joblib.load", "marshal.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec",
    "pandas.read_pickle", "pd.read_pickle", "os.system",
}  # fmt: skip
# The one place that unpickles: what the decoder's own process, which has no input but a video, answers by pipe.
ALLOWED = {("simda/data/decoder_process.py", "pickle.loads")}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    return [
        (ast.unparse(node.func), node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_unpickled(path):
    name = str(path.relative_to(ROOT))
    for called, node in calls(path):
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in UNSAFE or (name, called) in ALLOWED, f"{name}:{node.lineno} calls {called}"
        if called == "torch.load":
            assert settings.get("weights_only") == "True", f"{name}:{node.lineno}: torch.load that unpickles"
        if called in ("np.load", "numpy.load"):
            assert settings.get("allow_pickle", "False") == "False", f"{name}:{node.lineno}: np.load that unpickles"
        assert settings.get("trust_remote_code", "False") == "False", f"{name}:{node.lineno}: foreign code"
        assert settings.get("use_safetensors", "True") == "True", f"{name}:{node.lineno}: pickled weights"


class Grabs:
    """Its pickle touches a file as it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.pt", "pytorch_model.bin"])
def test_a_pickle_in_the_place_of_an_adapter_is_refused_and_not_run(tmp_path, name):
    folder, touched = tmp_path / "adapter", tmp_path / "touched"
    folder.mkdir()
    torch.save({"weight": Grabs(touched)}, folder / name)
    with pytest.raises(SimdaError):
        check_adapter(str(folder), "base")
    assert not touched.exists()
    # The guard would notice: the same file, unpickled.
    torch.load(io.BytesIO((folder / name).read_bytes()), weights_only=False)
    assert touched.exists()


@pytest.mark.parametrize(
    ("part", "name", "load"),
    [
        ("vae", "diffusion_pytorch_model", load_autoencoder),
        ("unet", "diffusion_pytorch_model", load_unet),
        ("text_encoder", "pytorch_model", load_text_parts),
    ],
)
def test_pickled_weights_of_a_base_model_are_refused_and_not_run(tmp_path, part, name, load):
    base, touched = tmp_path / "base", tmp_path / "touched"
    shutil.copytree(ROOT / "simda" / "sprites" / "weights" / "base", base)
    for file in (base / part).glob("*.safetensors"):
        file.unlink()
    torch.save({"weight": Grabs(touched)}, base / part / f"{name}.bin")
    with pytest.raises(SimdaError, match="safetensors"):
        load(str(base))
    assert not touched.exists()


def test_safetensors_of_somebody_else_is_refused_by_name(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "adapter.safetensors")
    with pytest.raises(SimdaError, match="adapter"):
        check_adapter(str(tmp_path), "base")
