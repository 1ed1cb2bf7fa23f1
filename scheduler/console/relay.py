"""MQTT over WebSockets for the page, to a broker that speaks plain MQTT only (MQTT 5.0, section 6).

The embedded broker takes anyone on the machine. A WebSocket listener of its own would let in any web page that is open in a
browser there, for browsers ask nobody before they connect; here the console has checked where the page is from.
"""

import asyncio
from collections.abc import Callable

from aiohttp import WSMsgType, web

from protocol.transport import BrokerAddress

_SUBPROTOCOL = "mqtt"
_CHUNK_BYTES = 64 * 1024
_CONNECT_S = 5.0
#: Between two looks at whether it is still allowed.
_CHECK_S = 1.0
#: How long a page may take to say goodbye.
_CLOSE_S = 1.0


async def relay(request: web.Request, broker: BrokerAddress, allowed: Callable[[], bool]) -> web.StreamResponse:
    """Carry bytes both ways until either side ends, or it isn't allowed any more.

    Raises HTTPBadRequest for what isn't MQTT over WebSockets, HTTPBadGateway.
    """
    page = web.WebSocketResponse(protocols=[_SUBPROTOCOL], timeout=_CLOSE_S, compress=False)
    if page.can_prepare(request).protocol != _SUBPROTOCOL:
        raise web.HTTPBadRequest(text="this address speaks MQTT over WebSockets")
    try:
        async with asyncio.timeout(_CONNECT_S):
            reader, writer = await asyncio.open_connection(broker.host, broker.port)
    except (OSError, TimeoutError):
        raise web.HTTPBadGateway(text="the broker can't be reached") from None
    try:
        await page.prepare(request)
        ways = {
            asyncio.create_task(_to_broker(page, writer), name="console to broker"),
            asyncio.create_task(_to_page(reader, page), name="broker to console"),
        }
        try:
            while not any(way.done() for way in ways) and allowed():
                await asyncio.wait(ways, timeout=_CHECK_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            await page.close()
    finally:
        writer.close()
    return page


async def _to_broker(page: web.WebSocketResponse, writer: asyncio.StreamWriter) -> None:
    async for message in page:
        if message.type is not WSMsgType.BINARY:  # MQTT-6.0.0-1
            return
        writer.write(message.data)
        await writer.drain()


async def _to_page(reader: asyncio.StreamReader, page: web.WebSocketResponse) -> None:
    while data := await reader.read(_CHUNK_BYTES):
        await page.send_bytes(data)
