"""Reading a command's configuration: defaults in the class, then a YAML file, then `key=value` words.

Here live the rules (unknown keys, all faults together, nearest names) and the leaves that several commands share. Each
command's own settings stand at the top of its file in `pipelines/`; library classes never see a config.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import unquote

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from simda.errors import ConfigError

CONFIG_RULES = ConfigDict(extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True)

Config = TypeVar("Config")

PRESET = "preset"
PAPER_KERNEL = 3


def start_directory() -> Path:
    """Where relative paths start: the current directory.

    A job that was submitted to a Ray cluster runs in a copy of the uploaded files that vanishes with the cluster. There
    it is the checkout that this package is installed from, so that a path means the same under `ray job submit` on
    one's own machine as without it; a package that is not installed from a checkout leaves the copy.
    """
    if "job_submission_id" not in os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", ""):
        return Path.cwd()
    origin = json.loads(distribution("simda").read_text("direct_url.json") or "{}")
    is_checkout = origin.get("dir_info", {}).get("editable") and origin["url"].startswith("file://")
    return Path(unquote(origin["url"].removeprefix("file://"))) if is_checkout else Path.cwd()


def absolute_uri(uri: str) -> str:
    """A local path made absolute, so that it means the same in every worker; other URIs as they are."""
    return uri if "://" in uri or not uri else str(start_directory() / Path(uri).expanduser())


EMBEDDED_MODELS = ("sprites", "sprites_upscaler")
"""Names of the base models that come with the package; a directory of the same name is written as ./NAME."""
EMBEDDED_ADAPTERS = ("sprites",)
"""Names of the adapters that come with the package, each for the base model of its name."""


def absolute_model(name: str) -> str:
    """As `absolute_uri` for a directory; other names of models as they are."""
    path = absolute_uri(name)
    return path if name not in EMBEDDED_MODELS and Path(path).is_dir() else name


def absolute_adapter(name: str) -> str:
    """As `absolute_uri`; embedded ones as they are, and OWNER/NAME too where there is no such directory."""
    if name in EMBEDDED_ADAPTERS:
        return name
    path = absolute_uri(name)
    return name if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(path).exists() else path


Uri = Annotated[str, AfterValidator(absolute_uri)]
"""A setting that names a file or directory, local or s3://."""
ModelName = Annotated[str, AfterValidator(absolute_model)]
"""A setting that names a base model: an embedded one, a diffusers directory or a name on the hub."""
AdapterUri = Annotated[
    str | None, BeforeValidator(lambda uri: None if uri in (None, "none") else absolute_adapter(str(uri)))
]
"""A setting that names the `adapter` directory that `train` wrote, local or s3://, an embedded adapter, or one on the
hub, as OWNER/NAME; `none` is the base model alone."""
MAX_COUNT = 100_000
"""Of frames, pixels of a side, and steps."""
MAX_STEPS = 1000
"""Of sampling: timesteps of Stable Diffusion's noise schedule."""
MAX_GUIDANCE = 1000
"""Far above what any model is good for; what is larger overflows."""
SchedulerName = Literal["ddim", "ddpm", "dpm++", "unipc", "euler", "lcm"]
"""A setting that names a sampler, see `generation/schedulers.py`."""
ExtraFile = Literal["lossless", "gif", "frames", "latents"]
"""A setting that names what is written beside an mp4, see `data/video_files.py`."""


Role = Annotated[str, Field(min_length=1)]
"""A setting that names the kind of machine that work runs on: a custom resource of the cluster, see `cluster/`."""
ROLE_SHARE = 0.001
"""What a worker takes of the one unit that a machine offers of its role: no machine ever runs out of it."""


def on_role(role: str | None) -> dict[str, float]:
    """The custom resources, for Ray, of work that must run on machines of a role; nothing for none."""
    return {role: ROLE_SHARE} if role else {}


@dataclass(frozen=True, config=CONFIG_RULES)
class Workers:
    """A pool of worker processes, each with its share of the cluster."""

    num_workers: int = Field(default=2, ge=1)
    """Processes that work in parallel."""
    cpus_per_worker: float = Field(default=0.5, gt=0)
    """Logical CPUs that Ray sets aside for each; fractions let readers and writers run beside them on a laptop."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs that Ray sets aside for each; 0 runs the model on the CPU."""
    threads_per_worker: int = Field(default=1, ge=1)
    """Threads of each worker's tensor library; more than one seldom helps when the workers fill the cores."""
    role: Role | None = None
    """Kind of machine that they run on, such as `gpu-train`, on a cluster that has roles; by default any."""

    @property
    def device(self) -> str:
        """Where a worker's models run."""
        return "cuda" if self.gpus_per_worker else "cpu"

    @property
    def ray_options(self) -> dict[str, Any]:
        """What each of them asks Ray for."""
        return {
            "num_cpus": self.cpus_per_worker,
            "num_gpus": self.gpus_per_worker or None,
            "resources": on_role(self.role),
        }


@dataclass(frozen=True, config=CONFIG_RULES)
class Adapter:
    """Which adapters are inserted, and how wide; the defaults are the paper's, but for `temporal_kernel`."""

    spatial_reduction: int = Field(default=4, ge=1)
    """Width over bottleneck of the attention and FFN adapters; more makes them smaller."""
    temporal_reduction: int = Field(default=2, ge=1)
    """Channels over bottleneck of the temporal adapters; more makes them smaller."""
    keys_values: Literal["paper", "released", "off", "full", "sparse_causal"] = "paper"
    """What Latent-Shift Attention attends to: the current and the shifted frame (paper), two shifted ones (as the
    authors' code has it), or the current frame alone (off); to compare with, all frames (full), or the first and the
    former one (sparse_causal)."""
    attention: bool = True
    """Whether self-attention has adapters."""
    ffn: bool = True
    """Whether feed-forward layers have adapters."""
    temporal: bool = True
    """Whether there are temporal adapters."""
    frame_positions: bool = False
    """Whether temporal adapters also see each frame's place in the clip; ours, not the paper's, without parameters."""
    temporal_kernel: int | None = Field(default=None, ge=3)
    """Frames that a temporal adapter's convolution spans, odd; the paper's is 3. None reaches from every frame of
    num_frames to every other, and is stretched with clips of another length; ours, it learns motion sooner."""
    stretch_from: int | None = Field(default=None, ge=2)
    """Frames of the clips for which a `temporal_kernel` that is given is meant: it is stretched with clips of another
    length, so that longer ones than were trained on keep their course. None spans as many frames of any clip."""

    @model_validator(mode="after")
    def _some_are_trained_and_no_setting_is_ignored(self) -> Self:
        if not (self.attention or self.ffn or self.temporal):
            raise ValueError("attention, ffn and temporal are all false, so nothing would be trained; leave one in")
        if self.temporal_kernel is not None and self.temporal_kernel % 2 == 0:
            raise ValueError(f"temporal_kernel={self.temporal_kernel}; it is odd")
        if self.temporal_kernel is None and self.stretch_from is not None:
            raise ValueError(f"stretch_from={self.stretch_from} has no effect without temporal_kernel; give both")
        idle = [] if self.temporal else ["temporal_reduction", "temporal_kernel", "frame_positions", "stretch_from"]
        idle += [] if self.attention or self.ffn else ["spatial_reduction"]
        # preset=paper names its kernel, and temporal adapters may be left out of it.
        plain = {name: {getattr(type(self)(), name)} for name in idle} | {"temporal_kernel": {None, PAPER_KERNEL}}
        set_idly = [name for name in idle if getattr(self, name) not in plain[name]]
        if set_idly:
            raise ValueError(f"{', '.join(set_idly)}: no effect without the adapters they are of; leave them out")
        return self

    def for_clips(self, num_frames: int) -> dict[str, Any]:
        """The arguments of `AdapterConfig` for adapters that are trained on clips of so many frames."""
        settings = dataclasses.asdict(self)
        if self.temporal_kernel is None:
            spans = self.temporal and num_frames > 1
            settings["temporal_kernel"] = 2 * num_frames - 1 if spans else PAPER_KERNEL
            settings["stretch_from"] = num_frames if spans else None
        return settings


def load_config(config_class: type[Config], config_path: str | None, overrides: Sequence[str]) -> Config:
    """Build a configuration from its defaults, a YAML file and `dotted.key=value` words, in this order.

    A class may name sets of values in `PRESETS`. `preset=NAME` gives them all at once: as a word in its place among
    the words, so over those of the file; in a file under the other values that the file has.

    Raises:
        ConfigError: the file is missing or not YAML, a word is not `key=value`, or any setting is unknown, missing or
            out of range; all such faults are reported together.
    """
    settings = _read_yaml(config_path) if config_path else {}
    presets = presets_of(config_class)
    if presets and PRESET in settings:
        settings = _layered(_preset(presets, settings.pop(PRESET)), settings)
    for word in overrides:
        _apply_override(settings, word)
        if presets and PRESET in settings:
            settings = _layered(settings, _preset(presets, settings.pop(PRESET)))
    try:
        return TypeAdapter(config_class).validate_python(settings)
    except ValidationError as error:
        known = list(setting_names(config_class))
        source = f" in {config_path}" if config_path else ""
        faults = [_describe_fault(fault, known) for fault in error.errors()]
        raise ConfigError(f"{len(faults)} bad setting(s){source}:\n  " + "\n  ".join(faults)) from None


def presets_of(config_class: type) -> dict[str, dict[str, Any]]:
    """Nested values by the name of their preset; empty for a class without any."""
    return getattr(config_class, "PRESETS", {})


def config_to_yaml(config: Any) -> str:
    """The whole resolved configuration as YAML, in the order of the class."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


def config_to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested plain dictionaries."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def setting_names(config_class: type, prefix: str = "") -> Iterator[str]:
    """Every dotted name that may be set, depth first."""
    for field in dataclasses.fields(config_class):
        name, kind = prefix + field.name, _nested_class(config_class, field.name)
        if kind:
            yield from setting_names(kind, name + ".")
        else:
            yield name


def describe_settings(config_class: type, prefix: str = "") -> Iterator[str]:
    """A line for each preset and setting: its name, default and docstring (for `--help`)."""
    for preset, values in presets_of(config_class).items():
        yield f"  {PRESET}={preset}\n      {yaml.safe_dump(values, default_flow_style=True, width=10_000).strip()}"
    for name, info in config_class.__pydantic_fields__.items():  # type: ignore[attr-defined]
        kind = _nested_class(config_class, name)
        if kind:
            yield from describe_settings(kind, f"{prefix}{name}.")
            continue
        default = "required" if info.is_required() else info.get_default(call_default_factory=True)
        yield f"  {prefix}{name}={default}\n      {' '.join((info.description or '').split())}"


def _nested_class(config_class: type, name: str) -> type | None:
    kind = config_class.__pydantic_fields__[name].annotation  # type: ignore[attr-defined]
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def _preset(presets: dict[str, dict[str, Any]], name: Any) -> dict[str, Any]:
    if name not in presets:
        raise ConfigError(f"{PRESET}={name}: unknown; known are {', '.join(presets)}")
    return presets[name]


def _layered(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Both, `upper`'s values where both have one."""
    both = {**lower, **upper}
    for name, value in upper.items():
        if isinstance(value, dict) and isinstance(lower.get(name), dict):
            both[name] = _layered(lower[name], value)
    return both


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; give the path of a YAML file") from None
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {error}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {path}: expected `key: value` lines, found {type(settings).__name__}")
    return settings


def _apply_override(settings: dict[str, Any], word: str) -> None:
    name, separator, text = word.partition("=")
    if not separator or not name:
        raise ConfigError(f"{word!r} is not a setting; write key=value, such as num_frames=8")
    *parents, leaf = name.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"{word!r}: {parent} is a single value and has no part {leaf}")
    # Scalars stay text until their field's type is known: a prompt_id of 007 is not 7, and 1e-4 is a number.
    structured = text.startswith(("[", "{")) or text == "null"
    try:
        settings[leaf] = yaml.safe_load(text) if structured else text
    except yaml.YAMLError as error:
        raise ConfigError(f"{word!r}: the value is neither plain text nor YAML: {error}") from None


def _describe_fault(fault: Any, known: list[str]) -> str:
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known settings: {', '.join(known)}"
        return f"{name}: unknown setting; {hint}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{name}: required; write {name}=VALUE or set it in the --config file"
    return f"{name}={fault['input']}: {fault['msg']}"
