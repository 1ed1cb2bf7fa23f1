"""One typed configuration: defaults < file (TOML) < environment (``TOKENBUS_ENGINE_MAX_RUNNING=64``) < flags."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

import msgspec
from msgspec import Meta

from protocol import topics
from protocol.plan import AttentionName, DtypeName, ExecutionName, WeightsName, WorkerConfig
from protocol.transport import BrokerAddress
from scheduler.core.policies import PolicyName
from scheduler.core.speculation import Speculation
from scheduler.quotas import Quota
from scheduler.tools import FormatName

ENV_PREFIX = "TOKENBUS_"
EMBEDDED = "embedded"
OFF = "off"
_MOST_TIERS = 8

#: It becomes part of a Content-Security-Policy, so nothing but a host, a port and a plain path may be in it.
_WEBSOCKET_URL = re.compile(r"wss?://[A-Za-z0-9.-]+(:\d{1,5})?(/[A-Za-z0-9._~/-]*)?")

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
RequestsPerSecond = Annotated[float, Meta(ge=1e-5, le=1e6)]
TokensPerMinute = Annotated[int, Meta(ge=1, le=10**9)]


class ConfigError(Exception):
    """A setting that can't be used; the text names it and what it must be."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Common to all sections: a misspelt setting is an error."""


class ModelConfig(Section, frozen=True):
    """What is served. ``alias`` is its name in topics; ``path`` a directory of safetensors, or the demo model's name.

    ``weights``: how linear layers hold theirs on the CPU, beside activations in float32; ``plain``: as torch does.
    ``execution``: ``eager`` launches a step's kernels one by one, ``graphs`` replays those of decodes as a whole, on CUDA alone;
    ``auto`` does that where the model allows it.
    ``adapters``: LoRA adapters as PEFT saves them, directories by name, for requests of model ``alias:name``; ``max_adapters``
    of them are in memory, and in a step, at once.
    ``tool_parser``: the format of tool calls; absent: the one that the chat template shows.
    """

    alias: str = "smollm2"
    path: str = "smollm2"
    dtype: DtypeName = "auto"
    weights: WeightsName = "auto"
    device: str = "auto"
    attention: AttentionName = "auto"
    execution: ExecutionName = "auto"
    threads: Count | None = None
    max_model_len: Count | None = None
    adapters: dict[str, str] = {}
    max_adapters: Count = 8
    tool_parser: FormatName | None = None


class EngineConfig(Section, frozen=True):
    """Sizes of a step and of the KV cache; ``num_blocks`` absent: as many as ``kv_memory_mb`` MiB hold.

    A worker that takes longer than ``step_timeout_s`` over a step is killed; over ``stalled_after_s``, the service isn't
    ready. A request is given up after ``attempts`` failing steps, the last of them with it alone.

    With ``itl_target_ms`` prompts are cut so that a step takes about that long at most while somebody decodes.

    ``policy``: ``fair`` is ours; the others are what it is compared with. ``prefix_cache``: prompts of a tenant that begin
    alike are computed once; ``shared_prefixes`` are system messages that are computed once for all tenants.

    ``speculation``: ``off``, ``ngram``, or the directory of a draft model. At most ``max_draft`` tokens are guessed at a time,
    and none in steps of ``cheap_tokens`` or more, where another token costs its full price.
    """

    max_running: Count = 64
    max_batch_tokens: Count = 256
    itl_target_ms: Count | None = None
    block_size: Count = 16
    num_blocks: Count | None = None
    kv_memory_mb: Count = 1024
    step_timeout_s: Seconds = 60.0
    stalled_after_s: Seconds = 10.0
    heartbeat_s: Seconds = 5.0
    attempts: Count = 3
    policy: PolicyName = "fair"
    prefix_cache: bool = True
    shared_prefixes: list[Annotated[str, Meta(min_length=1)]] = []
    speculation: Annotated[str, Meta(min_length=1)] = OFF
    max_draft: Count = 7
    cheap_tokens: Count = 16


class BrokerConfig(Section, frozen=True):
    """``url``: ``embedded``, ``mqtt://host:1883`` or ``mqtts://host:8883``. Passwords and keys come from files only.

    ``data_dir`` keeps the embedded broker's database, and our name on any broker.
    ``ca_file``: whom to trust instead of the system's authorities; ``cert_file``, ``key_file``: our own certificate.
    """

    url: str = EMBEDDED
    port: Port = 0
    data_dir: str | None = None
    username: str | None = None
    password_file: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    session_expiry_s: Count = 7 * 24 * 3600


class JournalConfig(Section, frozen=True):
    """What was accepted, on disk. ``path`` absent: in the data directory; ``off``: nothing outlives the process.

    ``url``: instead of a file, the PostgreSQL that replicas share (``postgresql://user@host/database``); the password comes
    from a file, or from libpq's environment. What a replica holds is taken over when nothing is heard of it for ``lease_s``.

    Results are kept for ``retention_s`` after delivery, less when the file would grow over ``max_mb``.
    """

    path: str | None = None
    url: str | None = None
    password_file: str | None = None
    lease_s: Seconds = 5.0
    retention_s: Count = 3600
    max_mb: Count = 2048


class LimitsConfig(Section, frozen=True):
    """``outstanding``: accepted requests that haven't ended, in all, and the ``prompt_tokens`` they may hold in memory.

    The others are the limits of each tenant whose own section doesn't say otherwise; absent: none.
    """

    outstanding: Count = 10_000
    prompt_tokens: Count = 4_000_000
    outstanding_per_tenant: Count = 1000
    requests_per_s: RequestsPerSecond | None = None
    tokens_per_min: TokensPerMinute | None = None
    max_context: Count | None = None


class TenantConfig(Section, frozen=True):
    """One tenant, in the file's section ``[tenants.NAME]``: a tenant of weight 2 gets twice the service of one of weight 1.

    Its limits, where absent, are those of ``[limits]``. ``tier``: with which others its latencies are measured.
    """

    weight: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    outstanding: Count | None = None
    requests_per_s: RequestsPerSecond | None = None
    tokens_per_min: TokensPerMinute | None = None
    max_context: Count | None = None
    tier: str = "default"


class ServiceConfig(Section, frozen=True):
    """``replica`` names this process; chunks are coalesced over ``flush_ms``; bigger requests are refused; a stop waits for
    what runs for up to ``drain_s``."""

    replica: str = "main"
    flush_ms: Annotated[int, Meta(ge=1, le=1000)] = 30
    max_payload_bytes: Annotated[int, Meta(ge=1024)] = 1 << 20
    drain_s: Annotated[float, Meta(ge=0)] = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class MetricsConfig(Section, frozen=True):
    """Where /metrics and the health checks are served, over TLS with a certificate; port 0 takes a free one.

    The first ``tenants`` that the file names have series of their own, all others share those of ``other``.
    """

    host: str = "127.0.0.1"
    port: Port = 9464
    tenants: Annotated[int, Meta(ge=0, le=1000)] = 100
    cert_file: str | None = None
    key_file: str | None = None


class ConsoleConfig(Section, frozen=True):
    """The page beside /metrics: over loopback it is open, from elsewhere it is there only with a password, from a file.

    ``broker_websocket_url``: where browsers find a broker of yours, as ``wss://host:8084/mqtt``; the embedded one needs none.
    """

    password_file: str | None = None
    broker_websocket_url: str | None = None


class TracingConfig(Section, frozen=True):
    """Where the spans of each request are sent, for instance ``http://localhost:4318/v1/traces`` (OTLP over HTTP); absent: none
    are made. Needs ``tokenbus[tracing]``.
    """

    endpoint: str | None = None


class Config(Section, frozen=True):
    """Everything that can be set, by section."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    broker: BrokerConfig = BrokerConfig()
    journal: JournalConfig = JournalConfig()
    limits: LimitsConfig = LimitsConfig()
    service: ServiceConfig = ServiceConfig()
    metrics: MetricsConfig = MetricsConfig()
    console: ConsoleConfig = ConsoleConfig()
    tracing: TracingConfig = TracingConfig()
    tenants: dict[str, TenantConfig] = {}

    def quota(self, tenant: str) -> Quota:
        """The limits that hold for a tenant."""
        limits, own = self.limits, self.tenants.get(tenant, TenantConfig())
        return Quota(
            outstanding=own.outstanding or limits.outstanding_per_tenant,
            requests_per_s=own.requests_per_s or limits.requests_per_s,
            tokens_per_min=own.tokens_per_min or limits.tokens_per_min,
            max_context=own.max_context or limits.max_context,
        )

    def weights(self) -> dict[str, float]:
        """The weights of the tenants that are named."""
        return {name: tenant.weight for name, tenant in self.tenants.items()}

    def tiers(self) -> dict[str, str]:
        """The tiers of the tenants that are named."""
        return {name: tenant.tier for name, tenant in self.tenants.items()}

    def speculation(self) -> Speculation | None:
        """How far the engine may speculate."""
        engine = self.engine
        return None if engine.speculation == OFF else Speculation(engine.max_draft, engine.cheap_tokens)

    def reloaded(self, new: "Config") -> "Config":
        """This one with what may change while the service runs: tenants and limits."""
        return msgspec.structs.replace(self, tenants=new.tenants, limits=new.limits)

    def differences(self, other: "Config") -> list[str]:
        """The settings outside the tenants table that differ, as ``section.key``."""
        return [
            f"{section}.{key}"
            for section in self.__struct_fields__
            if section != "tenants"
            for key in getattr(self, section).__struct_fields__
            if getattr(getattr(self, section), key) != getattr(getattr(other, section), key)
        ]

    def worker(self) -> WorkerConfig:
        """What the worker process is told."""
        model, engine = self.model, self.engine
        return WorkerConfig(
            model=model.path,
            dtype=model.dtype,
            weights=model.weights,
            device=model.device,
            attention=model.attention,
            execution=model.execution,
            threads=model.threads,
            block_size=engine.block_size,
            num_blocks=engine.num_blocks,
            kv_memory_mb=engine.kv_memory_mb,
            max_running=engine.max_running,
            max_batch_tokens=engine.max_batch_tokens,
            max_model_len=model.max_model_len,
            speculation=None if engine.speculation == OFF else engine.speculation,
            adapters=model.adapters,
            max_adapters=model.max_adapters if model.adapters else 0,
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


def read_password(file: Path) -> str:
    """What the file holds, without the white space around it. Raises ConfigError."""
    try:
        password = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"password file {file}: {getattr(error, 'strerror', None) or 'must be UTF-8'}") from None
    if not password:
        raise ConfigError(f"password file {file}: is empty")
    return password


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
