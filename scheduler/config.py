"""One typed configuration: defaults < file (TOML) < environment (``TOKENBUS_ENGINE_MAX_RUNNING=64``) < flags."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from protocol import topics
from protocol.plan import AttentionName, DtypeName, WorkerConfig

ENV_PREFIX = "TOKENBUS_"
EMBEDDED = "embedded"

Count = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=0, le=65535)]


class ConfigError(Exception):
    """A setting that can't be used; the text names it and what it must be."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Common to all sections: a misspelt setting is an error."""


class ModelConfig(Section, frozen=True):
    """What is served. ``alias`` is its name in topics; ``path`` a directory of safetensors, or the demo model's name."""

    alias: str = "smollm2"
    path: str = "smollm2"
    dtype: DtypeName = "auto"
    device: str = "auto"
    attention: AttentionName = "auto"
    threads: Count | None = None
    max_model_len: Count | None = None


class EngineConfig(Section, frozen=True):
    """Sizes of a step and of the KV cache; ``num_blocks`` absent: as many as ``kv_memory_mb`` MiB hold."""

    max_running: Count = 64
    max_batch_tokens: Count = 256
    block_size: Count = 16
    num_blocks: Count | None = None
    kv_memory_mb: Count = 1024


class BrokerConfig(Section, frozen=True):
    """``url``: ``embedded``, ``mqtt://host:1883`` or ``mqtts://host:8883``. The password is read from a file only."""

    url: str = EMBEDDED
    port: Port = 0
    data_dir: str | None = None
    username: str | None = None
    password_file: str | None = None
    ca_file: str | None = None
    session_expiry_s: Count = 7 * 24 * 3600


class ServiceConfig(Section, frozen=True):
    """``replica`` names this process; chunks are coalesced over ``flush_ms``; bigger requests are refused."""

    replica: str = "main"
    flush_ms: Annotated[int, Meta(ge=1, le=1000)] = 30
    max_payload_bytes: Annotated[int, Meta(ge=1024)] = 1 << 20
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class MetricsConfig(Section, frozen=True):
    """Where /metrics is served; port 0 takes a free one."""

    host: str = "127.0.0.1"
    port: Port = 9464


class Config(Section, frozen=True):
    """Everything that can be set, by section."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    broker: BrokerConfig = BrokerConfig()
    service: ServiceConfig = ServiceConfig()
    metrics: MetricsConfig = MetricsConfig()

    def worker(self) -> WorkerConfig:
        """What the worker process is told."""
        model, engine = self.model, self.engine
        return WorkerConfig(
            model=model.path,
            dtype=model.dtype,
            device=model.device,
            attention=model.attention,
            threads=model.threads,
            block_size=engine.block_size,
            num_blocks=engine.num_blocks,
            kv_memory_mb=engine.kv_memory_mb,
            max_running=engine.max_running,
            max_batch_tokens=engine.max_batch_tokens,
            max_model_len=model.max_model_len,
        )


def load(
    file: Path | None = None, environ: Mapping[str, str] | None = None, flags: Mapping[str, str] | None = None
) -> Config:
    """Merge the sources; ``flags`` are ``{"engine.max_running": "32"}``. Raises ConfigError."""
    merged: dict[str, dict[str, Any]] = {}
    for section, values in _read(file).items():
        if not isinstance(values, dict):
            raise ConfigError(f"{section}: must be a section")
        merged.setdefault(section, {}).update(values)
    for name, value in (environ or {}).items():
        if name.startswith(ENV_PREFIX):
            section, _, key = name.removeprefix(ENV_PREFIX).lower().partition("_")
            merged.setdefault(section, {})[key] = value
    for path, value in (flags or {}).items():
        section, _, key = path.partition(".")
        merged.setdefault(section, {})[key] = value
    try:
        config = msgspec.convert(merged, Config, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from None
    _check(config)
    return config


def _read(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from None


def _check(config: Config) -> None:
    """What no single field can say."""
    for field, name in (("model.alias", config.model.alias), ("service.replica", config.service.replica)):
        if not topics.is_name(name):
            raise ConfigError(f"{field}: must be {topics.NAME_RULE}")
    if config.engine.max_batch_tokens < config.engine.max_running:
        raise ConfigError("engine.max_batch_tokens: must be at least engine.max_running, so that no decode is left out")
