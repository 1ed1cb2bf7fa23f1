"""Wires everything together: broker, worker, transport, ingress, egress, loop, metrics; start and stop."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from platformdirs import user_state_path
from prometheus_client import start_http_server

from protocol import replies, topics
from protocol.errors import ServiceError
from protocol.transport import BrokerAddress, Transport, Will
from scheduler.config import EMBEDDED, Config
from scheduler.loop import Engine
from scheduler.metrics import Metrics
from scheduler.mqtt.broker import EmbeddedBroker
from scheduler.mqtt.egress import Egress
from scheduler.mqtt.ingress import SUBSCRIPTIONS, Ingress
from scheduler.text import Text

logger = logging.getLogger(__name__)

#: How long the last messages may take to reach the broker when the service stops.
_GOODBYE_S = 5.0


class Service:
    """A running service: where its broker and metrics are, and its engine."""

    def __init__(self, config: Config, broker_url: str, metrics_url: str, engine: Engine, metrics: Metrics) -> None:
        self.config = config
        self.broker_url = broker_url
        self.metrics_url = metrics_url
        self.engine = engine
        self.metrics = metrics


@contextlib.asynccontextmanager
async def running(config: Config) -> AsyncIterator[Service]:
    """``async with running(config) as service``: everything is up inside the block and down after it.

    Raises WorkerRefused, WorkerDied, BrokerNotFound, BrokerFailed or TransportError when it can't start.
    """
    metrics = Metrics()
    async with contextlib.AsyncExitStack() as stack:
        broker_url = await _broker(config, stack)
        engine = await stack.enter_async_context(Engine(config.worker()))
        text = await asyncio.to_thread(Text, engine.info.model_path)
        metrics_url = _serve_metrics(config, metrics, stack)
        transport = await stack.enter_async_context(_transport(config, broker_url))
        # Replies outlive the loops: should one of those fail for good, every request still gets its terminal message.
        deliveries = await stack.enter_async_context(asyncio.TaskGroup())
        egress = Egress(transport, engine, metrics, deliveries, config.service.flush_ms / 1000)
        ingress = Ingress(
            transport,
            text,
            engine,
            egress,
            model=config.model.alias,
            max_payload_bytes=config.service.max_payload_bytes,
        )
        metrics.worker_up.set_function(lambda: engine.worker_up)
        stack.push_async_callback(_say_goodbye, config, transport, egress)
        async with _looping(engine, egress, ingress):
            online = replies.Status("online", config.model.alias, engine.info.max_model_len, config.engine.max_running)
            await _publish_status(config, transport, online)
            logger.info("serving %s at %s, metrics at %s", config.model.alias, broker_url, metrics_url)
            yield Service(config, broker_url, metrics_url, engine, metrics)


@contextlib.asynccontextmanager
async def _looping(engine: Engine, egress: Egress, ingress: Ingress) -> AsyncIterator[None]:
    """The four loops run inside the block; one that fails ends the block with its exception."""
    loops = (
        ("loop", engine.run()),
        ("egress", egress.run()),
        ("flush", egress.flush_regularly()),
        ("ingress", ingress.run()),
    )
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work, name=name) for name, work in loops]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def _say_goodbye(config: Config, transport: Transport, egress: Egress) -> None:
    await egress.close(ServiceError("unavailable", "the service is stopping; send the request again"), _GOODBYE_S)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_GOODBYE_S):
            await _publish_status(config, transport, replies.Status("offline"))


async def _broker(config: Config, stack: contextlib.AsyncExitStack) -> str:
    if config.broker.url != EMBEDDED:
        return config.broker.url
    if config.broker.data_dir is not None:
        data_dir = Path(config.broker.data_dir)
    else:
        data_dir = user_state_path("tokenbus") / config.service.replica
    data_dir.mkdir(parents=True, exist_ok=True)
    broker = await stack.enter_async_context(EmbeddedBroker(data_dir=data_dir, port=config.broker.port))
    return broker.url


def _serve_metrics(config: Config, metrics: Metrics, stack: contextlib.AsyncExitStack) -> str:
    host = config.metrics.host
    server, thread = start_http_server(config.metrics.port, host, metrics.registry)
    stack.callback(thread.join)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    return f"http://{host}:{server.server_port}/metrics"


def _transport(config: Config, broker_url: str) -> Transport:
    broker, replica = config.broker, config.service.replica
    password = None if broker.password_file is None else Path(broker.password_file).read_text().strip()
    address = BrokerAddress.parse(broker_url, username=broker.username, password=password, ca_file=broker.ca_file)
    offline = Will(topics.status(replica), replies.encode(replies.Status("offline")), retain=True)
    return Transport(
        address,
        identifier=f"tokenbus-service-{replica}",
        subscriptions=SUBSCRIPTIONS,
        will=offline,
        session_expiry_s=broker.session_expiry_s,
    )


async def _publish_status(config: Config, transport: Transport, status: replies.Status) -> None:
    await transport.publish(topics.status(config.service.replica), replies.encode(status), retain=True)
