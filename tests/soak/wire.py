"""HTTP as bytes on a socket: what is sent may be wrong, and a client may leave or dawdle at any moment."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

Json = object


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back until the server closed; status 0 if it was nothing."""

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)  # names in lower case
    body: bytes = b""

    def json(self) -> Json:
        """Raises ValueError."""
        return json.loads(self.body)


GONE = Reply()  # nobody waited for the rest, or the connection broke


def post(path: str, body: object, *, key: str = "", headers: Mapping[str, str] | None = None) -> bytes:
    """A request whose body is JSON, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
    return head("POST", path, key=key, headers=sent) + data


def head(method: str, path: str, *, key: str = "", headers: Mapping[str, str] | None = None) -> bytes:
    """All that comes before a body."""
    sent = {"Host": "127.0.0.1", "Connection": "close"}
    if key:
        sent["Authorization"] = f"Bearer {key}"
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in {**sent, **(headers or {})}.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogatepass")


async def exchange(
    port: int, raw: bytes, *, timeout_s: float = 600.0, leave_after_s: float | None = None, end: bool = False
) -> Reply:
    """Sends bytes over a connection of their own and reads until the server closes it.

    leave_after_s: when the client hangs up   end: it has shown that nothing more comes
    Raises TimeoutError.
    """
    writer = None
    try:
        async with asyncio.timeout(timeout_s if leave_after_s is None else leave_after_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 26)
            writer.write(raw)
            await _drain(writer)
            if end:
                writer.write_eof()
            return read(await reader.read())
    except TimeoutError:
        if leave_after_s is None:
            raise
        return GONE
    except OSError:
        return GONE
    finally:
        if writer is not None:
            writer.transport.abort()


async def _drain(writer: asyncio.StreamWriter) -> None:
    """A server may answer and close before it has read all: its answer still counts."""
    try:
        await writer.drain()
    except ConnectionError:
        return


def read(raw: bytes) -> Reply:
    """The first reply in what a server has sent that is final; its body without the framing."""
    top, _, body = raw.partition(b"\r\n\r\n")
    while top.startswith(b"HTTP/1.1 100"):
        top, _, body = body.partition(b"\r\n\r\n")
    first, *rest = top.decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) < 2 or not parts[1].isdigit():
        return GONE
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
    if headers.get("transfer-encoding", "") == "chunked":
        body = _joined(body)
    return Reply(int(parts[1]), headers, body[: int(headers.get("content-length", len(body)))])


def _joined(chunks: bytes) -> bytes:
    body = []
    while chunks:
        size, _, chunks = chunks.partition(b"\r\n")
        count = int(size or b"0", 16)
        body.append(chunks[:count])
        chunks = chunks[count + 2 :]
        if not count:
            break
    return b"".join(body)


def events(body: bytes) -> list[str]:
    """The data of server-sent events."""
    return [line.removeprefix("data: ") for line in body.decode().split("\n") if line.startswith("data: ")]
