"""Wires everything together: broker, worker, journal, transport, ingress, egress, loop, metrics; start, drain and stop."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from protocol import replies, topics
from protocol.errors import ServiceError
from protocol.transport import BrokerAddress, Transport
from scheduler.admission import Admission
from scheduler.chat import Chat, preload
from scheduler.config import EMBEDDED, Config
from scheduler.console.activity import Activity
from scheduler.console.server import PREFIX, console_for
from scheduler.fleet import Fleet
from scheduler.http import HttpServer, tls_context
from scheduler.journal.entry import Entry, Journal
from scheduler.journal.postgres import PostgresJournal
from scheduler.kinds import run_of
from scheduler.loop import Engine
from scheduler.metrics.fairness import FairnessCollector
from scheduler.metrics.series import Metrics
from scheduler.mqtt.delivery import Delivery
from scheduler.mqtt.egress import Egress
from scheduler.mqtt.ingress import Ingress, Reader
from scheduler.mqtt.watch import BrokerWatch
from scheduler.outlook import Outlook
from scheduler.parts import (
    bounds_of,
    broker_for,
    chat_for,
    data_dir_of,
    engine_for,
    journal_for,
    share_prefixes,
    transport_for,
)
from scheduler.recovery import Recovery
from scheduler.tracing import tracing
from scheduler.turns import Turns

logger = logging.getLogger(__name__)

#: How long the last messages may take to reach the broker when the service stops.
_GOODBYE_S = 5.0


class Service:
    """A running service: where its broker, metrics and console are, and its parts."""

    def __init__(
        self,
        config: Config,
        *,
        broker_url: str,
        metrics_url: str,
        console_url: str | None,
        engine: Engine,
        metrics: Metrics,
        transport: Transport,
        journal: Journal,
        admission: Admission,
        delivery: Delivery,
        egress: Egress,
        ingress: Ingress,
        recovery: Recovery,
        fleet: Fleet | None,
    ) -> None:
        self.config = config
        self.broker_url = broker_url
        self.metrics_url = metrics_url
        self.console_url = console_url
        self.engine = engine
        self.metrics = metrics
        self.transport = transport
        self.journal = journal
        self.admission = admission
        self.delivery = delivery
        self.egress = egress
        self.ingress = ingress
        self.recovery = recovery
        self.fleet = fleet

    @property
    def unanswered(self) -> int:
        """Accepted requests whose terminal message the broker doesn't have."""
        return len(self.egress) + len(self.delivery)

    async def drain(self) -> None:
        """Take nothing new up and let what runs finish, for as long as the configuration allows."""
        self.ingress.drain()
        if self.fleet is not None:
            self.fleet.retire()
        logger.info("draining", extra={"running": len(self.egress)})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.service.drain_s):
                await self.publish_status(replies.Status("draining"))
                await self.egress.wait_empty()
                await self.delivery.wait_empty()

    def reload(self, config: Config) -> None:
        """Take over the tenants and limits of another configuration, for what is accepted and admitted from now on."""
        new = self.config.reloaded(config)
        for setting in new.differences(config):
            logger.warning("%s was changed: that needs a restart", setting)
        self.config = new
        self.admission.rebound(bounds_of(new))
        self.engine.batcher.queue.reweigh(new.weights())
        self.metrics.take_tenants(new.tiers())
        logger.info("tenants and limits were reloaded", extra={"tenants": len(new.tenants)})

    async def publish_status(self, status: replies.Status) -> None:
        topic = topics.status(self.config.service.replica)
        await self.transport.publish(topic, replies.encode(status), retain=True)

    async def say_goodbye(self) -> None:
        """What was accepted stays in the journal; without one, it is told that it is lost."""
        if not self.journal.durable:
            self.egress.fail_all(ServiceError("unavailable", "the service is stopping; send the request again"))
        await self.delivery.close(_GOODBYE_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                await self.publish_status(replies.Status("offline"))

    def ready(self) -> dict[str, bool]:
        """What must hold for new requests to be taken up at once."""
        stalled = self.engine.worker_owes_since_s > self.config.engine.stalled_after_s
        return {
            "worker": self.engine.worker_up and not stalled,
            "broker": self.transport.connected,
            "journal": not self.journal.full,
            "accepting": self.ingress.accepting,
        }


class Health:
    """What the health checks tell; nothing is ready before the service is there."""

    def __init__(self) -> None:
        self.service: Service | None = None

    def live(self) -> dict[str, bool]:
        """That the event loop answers is all there is to say: a loop of ours that fails ends the process."""
        return {"loop": True}

    def ready(self) -> dict[str, bool]:
        return {"started": False} if self.service is None else self.service.ready()


@contextlib.asynccontextmanager
async def running(config: Config) -> AsyncIterator[Service]:
    """``async with running(config) as service``: everything is up inside the block and down after it.

    Raises ConfigError, WorkerRefused, WorkerDied, JournalError, BrokerNotFound, BrokerFailed, TransportError or OSError
    when it can't start, and JournalError when it can't go on.
    """
    data_dir = data_dir_of(config)
    engine = engine_for(config)
    async with contextlib.AsyncExitStack() as stack:
        # It takes the longest, so it comes first and everything else meanwhile.
        await engine.launch()
        stack.push_async_exit(engine)
        broker_url = await broker_for(config, data_dir, stack)
        service = await _start(config, engine, data_dir, broker_url, stack)
        stack.push_async_callback(service.say_goodbye)
        async with _looping(service):
            yield service


async def _start(
    config: Config, engine: Engine, data_dir: Path, broker_url: str, stack: contextlib.AsyncExitStack
) -> Service:
    """Everything around an engine that gets ready; the journal before the transport, for whose file it is, its session it is."""
    metrics = Metrics(config.tiers(), config.metrics.tenants)
    health = Health()
    console = console_for(config, health.ready)
    http = HttpServer(
        config.metrics.host,
        config.metrics.port,
        registry=metrics.registry,
        live=health.live,
        ready=health.ready,
        tls=tls_context(config.metrics),
        console=console,
    )
    await stack.enter_async_context(http)
    await asyncio.gather(engine.get_ready(), asyncio.to_thread(preload))
    chat = await chat_for(engine.info.model_path, config.model.tool_parser)
    share_prefixes(config.engine.shared_prefixes, chat, engine)
    journal = await stack.enter_async_context(journal_for(config, data_dir))
    transport = await stack.enter_async_context(transport_for(config, data_dir, broker_url))
    spans = await stack.enter_async_context(tracing(config.tracing, config.service.replica, engine.now))
    # Replies outlive the loops: should one of those fail for good, what has ended still reaches its tenant.
    tasks = await stack.enter_async_context(asyncio.TaskGroup())
    admission = Admission(bounds_of(config), engine.now)
    delivery = Delivery(transport, journal, tasks, metrics)
    outlook = Outlook(config.engine.max_running, engine.batcher.queue.weight)
    activity = Activity(engine, config.model.alias)
    flush_s = config.service.flush_ms / 1000
    egress = Egress(delivery, journal, engine, chat, admission, outlook, metrics, activity, spans, flush_s)
    reader = Reader(chat, engine.info, model=config.model.alias, max_payload_bytes=config.service.max_payload_bytes)
    watch = BrokerWatch(metrics.broker_dropped)
    turns, load = _turns(journal, engine, chat, config.engine.max_running)
    ingress = Ingress(transport, reader, journal, admission, outlook, egress, delivery, watch, metrics, turns)
    recovery = Recovery(journal, engine, admission, delivery, egress, config.model.alias, config.engine.attempts)
    fleet = None
    if isinstance(journal, PostgresJournal):
        fleet = Fleet(journal, turns, load, engine.batcher.queue, admission, egress, recovery)
        await fleet.join()
    service = Service(
        config,
        broker_url=broker_url,
        metrics_url=f"{http.url}/metrics",
        console_url=None if console is None else f"{http.url}{PREFIX}/",
        engine=engine,
        metrics=metrics,
        transport=transport,
        journal=journal,
        admission=admission,
        delivery=delivery,
        egress=egress,
        ingress=ingress,
        recovery=recovery,
        fleet=fleet,
    )
    health.service = service
    if console is not None:
        console.open(activity, BrokerAddress.parse(broker_url) if config.broker.url == EMBEDDED else None)
    _watch(metrics, service)
    return service


def _watch(metrics: Metrics, service: Service) -> None:
    """Gauges that are read when somebody asks."""
    engine, transport = service.engine, service.transport
    batcher = engine.batcher
    for gauge, read in (
        (metrics.worker_up, lambda: engine.worker_up),
        (metrics.running, lambda: len(batcher.running)),
        (metrics.waiting, lambda: batcher.num_waiting),
        (metrics.oldest_waiting, lambda: service.egress.oldest_waiting_s),
        (metrics.kv_usage, lambda: 1 - batcher.pool.num_free / batcher.pool.num_blocks),
        (metrics.kv_blocks_free, lambda: batcher.pool.num_free),
        (metrics.kv_blocks, lambda: batcher.pool.num_blocks),
        (metrics.outstanding, lambda: len(service.egress)),
        (metrics.undelivered, lambda: len(service.delivery)),
        (metrics.unacknowledged.labels("broker"), lambda: transport.unacknowledged),
        (metrics.unacknowledged.labels("service"), lambda: transport.unacknowledged_incoming),
        (metrics.journal_lag, lambda: service.journal.lag),
        (metrics.journal_rows, lambda: service.journal.rows),
        (metrics.replicas, lambda: service.ingress.turns.replicas),
        (metrics.draining, lambda: service.ingress.draining),
    ):
        gauge.set_function(read)
    info = engine.info
    layout = (info.block_size, info.num_blocks, info.kv_dtype, service.config.engine.prefix_cache)
    metrics.cache_config.labels(*layout).set(1)
    kv_tokens = info.num_blocks * info.block_size
    collector = FairnessCollector(batcher.queue, metrics.labels, longest_prompt=info.max_model_len, kv_tokens=kv_tokens)
    metrics.registry.register(collector)


@contextlib.asynccontextmanager
async def _looping(service: Service) -> AsyncIterator[None]:
    """The loops run inside the block; one that fails ends the block with its exception."""
    loops = [
        ("loop", service.engine.run()),
        ("egress", service.egress.run()),
        ("flush", service.egress.flush_regularly()),
        ("deadlines", service.egress.expire_overdue()),
        ("ingress", _take_in(service)),
    ]
    if service.fleet is not None:
        loops += [("exchange", service.fleet.exchange_regularly()), ("takeover", service.fleet.take_over_regularly())]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work, name=name) for name, work in loops]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def _take_in(service: Service) -> None:
    """First what an earlier process left, then what comes."""
    await service.recovery.run()
    model = service.config.model.alias
    online = replies.Status("online", model, service.engine.info.max_model_len, service.config.engine.max_running)
    await service.publish_status(online)
    logger.info("serving %s at %s, metrics at %s", model, service.broker_url, service.metrics_url)
    if service.console_url is not None:
        logger.info("console at %s", service.console_url)
    await service.ingress.run()


def _turns(journal: Journal, engine: Engine, chat: Chat, max_running: int) -> tuple[Turns, Callable[[], float]]:
    """A replica's place among others, and what it tells of its load. Who shares no journal is alone."""

    def load() -> float:
        return len(engine.batcher) / max_running

    def cached(entry: Entry) -> float:
        _, families = run_of(entry, chat, engine.info, engine.now())
        return sum(engine.batcher.pool.cached_len(first) for first, *_ in families) / len(entry.prompt)

    number = journal.number if isinstance(journal, PostgresJournal) else 0
    return Turns(number, load, cached), load
