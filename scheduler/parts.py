"""The parts of a service as its configuration wants them. Raises ConfigError for what only trying shows."""

import asyncio
import contextlib
import secrets
from pathlib import Path

from platformdirs import user_state_path

from protocol import replies, topics
from protocol.errors import BadRequest
from protocol.transport import BrokerAddress, Transport, Will
from scheduler.admission import Bounds
from scheduler.chat import Chat
from scheduler.config import EMBEDDED, OFF, Config, ConfigError, read_password
from scheduler.core import policies
from scheduler.journal.entry import Journal
from scheduler.journal.memory import MemoryJournal
from scheduler.journal.postgres import PostgresJournal
from scheduler.journal.sqlite import SqliteJournal
from scheduler.loop import Engine, Patience
from scheduler.mqtt.broker import EmbeddedBroker
from scheduler.mqtt.ingress import SUBSCRIPTIONS
from scheduler.mqtt.watch import BrokerWatch
from scheduler.tools import FormatName


def bounds_of(config: Config) -> Bounds:
    limits = config.limits
    return Bounds(limits.outstanding, limits.prompt_tokens, limits.choices, config.quota)


def patience_of(config: Config) -> Patience:
    engine = config.engine
    return Patience(engine.step_timeout_s, engine.heartbeat_s, engine.attempts)


def data_dir_of(config: Config) -> Path:
    """Where what outlives this process is kept."""
    if config.broker.data_dir is not None:
        data_dir = Path(config.broker.data_dir)
    else:
        data_dir = user_state_path("tokenbus") / config.service.replica
    data_dir.mkdir(parents=True, exist_ok=True)
    return data_dir


def engine_for(config: Config) -> Engine:
    target_ms = config.engine.itl_target_ms
    return Engine(
        config.worker(),
        patience_of(config),
        policies.create(config.engine.policy, config.weights()),
        prefix_cache=config.engine.prefix_cache,
        speculation=config.speculation(),
        itl_target_s=None if target_ms is None else target_ms / 1000,
    )


async def broker_for(config: Config, data_dir: Path, stack: contextlib.AsyncExitStack) -> str:
    if config.broker.url != EMBEDDED:
        return config.broker.url
    broker = await stack.enter_async_context(EmbeddedBroker(data_dir=data_dir, port=config.broker.port))
    return broker.url


async def chat_for(path: str, tool_parser: FormatName | None) -> Chat:
    try:
        return await asyncio.to_thread(Chat, path, tool_parser)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: no tokenizer that we can use: {error}") from None


def share_prefixes(systems: list[str], chat: Chat, engine: Engine) -> None:
    try:
        for system in systems:
            engine.batcher.pool.share(chat.system_tokens(system))
    except BadRequest as error:
        raise ConfigError(f"engine.shared_prefixes: {error}") from None


def journal_for(config: Config, data_dir: Path) -> contextlib.AbstractAsyncContextManager[Journal]:
    journal = config.journal
    if journal.url is not None:
        return PostgresJournal(
            journal.url,
            replica=config.service.replica,
            password=_password(journal.password_file),
            lease_s=journal.lease_s,
            retention_s=journal.retention_s,
        )
    if journal.path == OFF:
        return MemoryJournal()
    path = data_dir / "journal.sqlite3" if journal.path is None else Path(journal.path)
    return SqliteJournal(path, retention_s=journal.retention_s, max_bytes=journal.max_mb * 2**20)


def _password(file: str | None) -> str | None:
    return None if file is None else read_password(Path(file))


def transport_for(config: Config, data_dir: Path, broker_url: str) -> Transport:
    broker, replica = config.broker, config.service.replica
    address = BrokerAddress.parse(
        broker_url,
        username=broker.username,
        password=_password(broker.password_file),
        ca_file=broker.ca_file,
        cert_file=broker.cert_file,
        key_file=broker.key_file,
    )
    offline = Will(topics.status(replica), replies.encode(replies.Status("offline")), retain=True)
    return Transport(
        address,
        identifier=_identifier(data_dir, replica),
        subscriptions=(*SUBSCRIPTIONS, BrokerWatch.SUBSCRIPTION),
        will=offline,
        session_expiry_s=_session_expiry_s(config),
    )


def _session_expiry_s(config: Config) -> int:
    """Replicas share a journal: what others did while we were away must not come to us once it is forgotten there."""
    expiry_s = config.broker.session_expiry_s
    return expiry_s if config.journal.url is None else min(expiry_s, config.journal.retention_s)


def _identifier(data_dir: Path, replica: str) -> str:
    """Our name on the broker, made once and kept: whoever else connects under it takes our session and its queue.

    The broker's ACL says nothing of such names, so a tenant must not be able to guess it.
    """
    file = data_dir / "session"
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(secrets.token_hex(16))
    return f"tokenbus-service-{replica}-{file.read_text()}"
