"""One typed configuration; `sources` says where it comes from."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from protocol.plan import AttentionName, DtypeName, ExecutionName, KVDtypeName, WeightsName, WorkerConfig
from protocol.request import MAX_CHOICES
from scheduler.core.policies import PolicyName
from scheduler.core.speculation import Speculation
from scheduler.quotas import Quota
from scheduler.tools import FormatName

EMBEDDED = "embedded"
OFF = "off"

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

    ``weights``: how linear layers hold theirs on the CPU, beside activations in float32 (that int8 rounds to 8 bits, too);
    ``plain``: as torch does.
    ``execution``: ``eager`` launches a step's kernels one by one, ``graphs`` replays those of decodes as a whole, on CUDA alone;
    ``auto`` does that where the model allows it.
    ``adapters``: LoRA adapters as PEFT saves them, directories by name, for requests of model ``alias:name``; ``max_adapters``
    of them are in memory, and in a step, at once.
    ``tool_parser``: the format of tool calls; absent: the one that the chat template shows.
    ``tensor_parallel``: processes that share the model and ``threads``, each on a GPU of its own, where there are any.
    """

    alias: str = "smollm2"
    path: str = "smollm2"
    dtype: DtypeName = "auto"
    weights: WeightsName = "auto"
    device: str = "auto"
    attention: AttentionName = "auto"
    execution: ExecutionName = "auto"
    threads: Count | None = None
    tensor_parallel: Count = 1
    max_model_len: Count | None = None
    adapters: dict[str, str] = {}
    max_adapters: Count = 8
    tool_parser: FormatName | None = None


class EngineConfig(Section, frozen=True):
    """Sizes of a step and of the KV cache; ``num_blocks`` absent: as many as ``kv_memory_mb`` MiB hold, of each of
    ``model.tensor_parallel`` processes.

    ``kv_dtype``: what keys and values are held as; ``auto``: as the model's activations are. On the CPU ``float16`` takes half
    the memory, and half the time to read it.

    A worker that takes longer than ``step_timeout_s`` over a step is killed; over ``stalled_after_s``, the service isn't
    ready. A request is given up after ``attempts`` failing steps, the last of them with it alone.

    With ``itl_target_ms`` prompts are cut so that a step takes about that long at most while somebody decodes.

    ``policy``: ``fair`` is ours; the others are what it is compared with. ``prefix_cache``: prompts of a tenant that begin
    alike are computed once; ``shared_prefixes`` are system messages that are computed once for all tenants.

    ``speculation``: ``off``, ``ngram``, or the directory of a draft model. At most ``max_draft`` tokens are guessed at a time,
    and none in steps of ``cheap_tokens`` or more, where another token costs its full price.

    ``batch_invariant``: a token's numbers never depend, in any bit, on who shares its step; a model of which that can't be proven
    at the start is refused. On the CPU in float32 most are so anyway, at no cost.
    """

    max_running: Count = 64
    max_batch_tokens: Count = 256
    itl_target_ms: Count | None = None
    block_size: Count = 16
    num_blocks: Count | None = None
    kv_memory_mb: Count = 1024
    kv_dtype: KVDtypeName = "auto"
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
    batch_invariant: bool = False


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
    ``choices``: how many answers one request may ask for.

    The others are the limits of each tenant whose own section doesn't say otherwise; absent: none.
    """

    outstanding: Count = 10_000
    prompt_tokens: Count = 4_000_000
    choices: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 16
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
            tensor_parallel=model.tensor_parallel,
            block_size=engine.block_size,
            num_blocks=engine.num_blocks,
            kv_memory_mb=engine.kv_memory_mb,
            kv_dtype=engine.kv_dtype,
            max_running=engine.max_running,
            max_batch_tokens=engine.max_batch_tokens,
            max_model_len=model.max_model_len,
            speculation=None if engine.speculation == OFF else engine.speculation,
            adapters=model.adapters,
            max_adapters=model.max_adapters if model.adapters else 0,
            batch_invariant=engine.batch_invariant,
        )


def read_password(file: Path) -> str:
    """What the file holds, without the white space around it. Raises ConfigError."""
    try:
        password = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"password file {file}: {getattr(error, 'strerror', None) or 'must be UTF-8'}") from None
    if not password:
        raise ConfigError(f"password file {file}: is empty")
    return password
