"""Where the configuration comes from: defaults < file (TOML) < environment (``TOKENBUS_ENGINE_MAX_RUNNING=64``) < flags."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from protocol import topics
from protocol.transport import BrokerAddress
from scheduler.config import EMBEDDED, OFF, BrokerConfig, Config, ConfigError, JournalConfig, ModelConfig, TracingConfig

ENV_PREFIX = "TOKENBUS_"
_MOST_TIERS = 8

#: It becomes part of a Content-Security-Policy, so nothing but a host, a port and a plain path may be in it.
_WEBSOCKET_URL = re.compile(r"wss?://[A-Za-z0-9.-]+(:\d{1,5})?(/[A-Za-z0-9._~/-]*)?")


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
    adapters = ((f"model.adapters.{name}", name) for name in config.model.adapters)
    tenants = ((f"tenants.{name}", name) for name in config.tenants)
    tiers = ((f"tenants.{name}.tier", tier) for name, tier in config.tiers().items())
    alias, replica = ("model.alias", config.model.alias), ("service.replica", config.service.replica)
    for field, name in (alias, replica, *adapters, *tenants, *tiers):
        if not topics.is_name(name):
            raise ConfigError(f"{field}: must be {topics.NAME_RULE}")
    if len(set(config.tiers().values())) > _MOST_TIERS:
        raise ConfigError(f"tenants: must be of at most {_MOST_TIERS} tiers, each of which has histograms of its own")
    _check_tensor_parallel(config.model)
    _check_broker(config.broker)
    _check_journal(config.journal)
    _check_tracing(config.tracing)
    if config.engine.max_batch_tokens < config.engine.max_running:
        raise ConfigError("engine.max_batch_tokens: must be at least engine.max_running, so that no decode is left out")
    if config.engine.speculation != OFF and config.engine.max_draft >= config.engine.block_size:
        raise ConfigError("engine.max_draft: must be less than engine.block_size")
    if (config.metrics.cert_file is None) != (config.metrics.key_file is None):
        raise ConfigError("metrics.cert_file, metrics.key_file: must be given together or not at all")
    url = config.console.broker_websocket_url
    if url is not None and not _WEBSOCKET_URL.fullmatch(url):
        raise ConfigError(
            "console.broker_websocket_url: must look like wss://host:8084/mqtt, without a user or password"
        )


def _check_tensor_parallel(model: ModelConfig) -> None:
    if model.tensor_parallel == 1:
        return
    if model.adapters:
        raise ConfigError("model.adapters: must be empty with model.tensor_parallel")
    if ":" in model.device:
        raise ConfigError("model.device: must be of no number with model.tensor_parallel, which takes the first ones")


def _check_tracing(tracing: TracingConfig) -> None:
    if tracing.endpoint is None:
        return
    try:
        url = urlsplit(tracing.endpoint)
    except ValueError as error:
        raise ConfigError(f"tracing.endpoint: {error}") from None
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError("tracing.endpoint: must look like http://localhost:4318/v1/traces")
    if "@" in url.netloc:
        raise ConfigError("tracing.endpoint: must hold no credentials; OTEL_EXPORTER_OTLP_HEADERS may")


def _check_broker(broker: BrokerConfig) -> None:
    url = "mqtt://localhost" if broker.url == EMBEDDED else broker.url
    try:
        BrokerAddress.parse(url, ca_file=broker.ca_file, cert_file=broker.cert_file, key_file=broker.key_file)
    except ValueError as error:
        raise ConfigError(f"broker.url: {error}") from None


def _check_journal(journal: JournalConfig) -> None:
    """A password in the URL would be seen wherever the settings are."""
    if journal.url is None:
        return
    if journal.path is not None:
        raise ConfigError("journal.path, journal.url: only one of them may be given")
    try:
        url = urlsplit(journal.url)
        password = url.password or "password" in parse_qs(url.query)
    except ValueError:
        raise ConfigError("journal.url: must look like postgresql://user@host/database") from None
    if url.scheme not in ("postgresql", "postgres"):
        raise ConfigError("journal.url: must look like postgresql://user@host/database")
    if password:
        raise ConfigError("journal.url: must hold no password, which journal.password_file or PGPASSWORD may give")
