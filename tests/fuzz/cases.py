"""Requests that a seed and a number name: a valid one, then some edits of its tree, its bytes and its headers."""

from dataclasses import dataclass
from random import Random

from tests.fuzz.bodies import BODIES, LOOKUPS, NO_RESPONSE, RESPONSES
from tests.fuzz.trees import TEXTS, Node, Pairs, edit, grow, write
from tests.soak.wire import head

FEW_TOKENS = 2
MOST_TOKENS = 2**15  # larger counts are refused, smaller ones would be answered in full
COUNTS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
LEAVE_S = 20.0

CONTENT_TYPES = (
    *(
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=utf-16",
    ),
    *(
        "application/json;",
        "APPLICATION/JSON",
        "application/vnd.api+json",
        "",
        "json",
        "application/json, text/html",
        "\u00e9",
    ),
)
FRAMINGS = (
    *("0", "1", "-1", "+5", "5, 5", "abc", "1" * 30, "9007199254740993", "0x10", " ", "1e3"),
    *("short", "long", "twice", "both", "chunked", "bad chunks"),
)
HOSTILE_HEADERS = (
    *(("x-request-id", text) for text in ("", "a" * 129, "ok-id_1", "\u00ff", "a b", "<script>", "%0d%0a")),
    *(
        ("Authorization", text)
        for text in ("", "Bearer", "Bearer  ", "Basic Og==", "Bearer \u00ff", "Bearer " + "k" * 4000)
    ),
    *(("x-api-key", text) for text in ("", "\u20ac", "nobody", "k" * 4000)),
    *(("Host", text) for text in ("evil.example", "", "127.0.0.1:99999", "[::1", "localhost@evil.example")),
    *(("Origin", text) for text in ("http://evil.example", "null")),
    *(("Accept", text) for text in ("text/event-stream", "image/png", "*/*;q=0")),
    *(("Expect", "100-continue"), ("Upgrade", "websocket"), ("Connection", "keep-alive, Upgrade")),
    *(("Content-Encoding", text) for text in ("gzip", "br", "identity")),
    *(
        ("Range", "bytes=0-1"),
        ("X-Forwarded-For", "1.2.3.4"),
        ("X-Forwarded-Host", "evil.example"),
        ("X-HTTP-Method-Override", "PUT"),
    ),
    *(("Cookie", "a=b; " * 500), ("Accept-Encoding", "gzip"), ("If-None-Match", "*"), ("TE", "trailers")),
)
METHODS = ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "POST", "TRACE", "CONNECT", "post", "X" * 50)
PATHS = (
    *(
        "/",
        "//",
        "/v1",
        "/v1/",
        "/v1/models/",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/v1/models/%00",
        "/v1/models/%ff%fe",
    ),
    *("/v1/models/" + "a" * 4000, "/health/", "//health", "/v1//completions", "/v1/completions/", "/V1/COMPLETIONS"),
    *(
        "/v1/./completions",
        "/v1/x/../completions",
        "/%76%31/completions",
        "/v1/completions?x=1&x=2#f",
        "/docs",
        "/openapi.json",
    ),
    *(NO_RESPONSE, f"{NO_RESPONSE}/cancel", f"{NO_RESPONSE}/input_items?limit=x", "/v1/responses/%00/input_items"),
    *("http://evil.example/health", "*", "/\u00e9", "/health?" + "q" * 9000, "/v1/models/\u0661"),
)
ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp037", "utf-7")


@dataclass(slots=True)
class Case:
    """A request, and how it came about."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]
    told: list[str]
    framed: bool = True  # the head says rightly where the body ends, and is HTTP
    leave_after_s: float = LEAVE_S
    number: int = -1

    def raw(self, key: str) -> bytes:
        return head(self.method, self.path, key=key, headers=self.headers) + self.body


def build(seed: int, number: int, keep: frozenset[int] | None = None) -> Case:
    """The same for the same arguments. keep: only these edits, to find the smallest request that does it"""
    rng = Random(f"{seed}/{number}")
    num_tree, num_wire = rng.choice((0, 1, 1, 1, 2, 2, 3, 5)), rng.choice((0, 0, 0, 1, 1, 2))
    lookup, gently = rng.random() < 0.04, rng.random() < 0.3
    path, body = (rng.choice(LOOKUPS), None) if lookup else rng.choice(BODIES)
    tree, told = grow(body), []
    for i in range(num_tree if not lookup else 0):
        if keep is None or i in keep:
            tree = edit(tree, Random(f"{seed}/{number}/{i}"), gently=gently)
            told.append(f"tree edit {i}")
    patient = _bound_answer(tree, rng, "max_output_tokens" if path == RESPONSES else "max_tokens")
    text = "" if lookup else write(tree, ascii_only=rng.random() < 0.5)
    data = text.encode("utf-8", "surrogatepass")
    headers = {"Content-Type": "application/json", "Content-Length": str(len(data))}
    case = Case("GET" if lookup else "POST", path, data, headers if data else {}, told, number=number)
    case.leave_after_s = LEAVE_S if patient else 0.3
    for i in range(100, 100 + num_wire + lookup):
        if keep is None or i in keep:
            _edit_wire(case, Random(f"{seed}/{number}/{i}"), i)
    return case


def edits_of(seed: int, number: int) -> list[int]:
    """What `build` may be told to keep."""
    return [*range(5), *range(100, 103)]


def _bound_answer(tree: Node, rng: Random, name: str) -> bool:
    """Keeps answers short, since they are not the point -> False: it may be long, and the client will leave."""
    if not isinstance(tree, Pairs):
        return True
    tree.items = [(k, FEW_TOKENS if k in COUNTS and _is_long(v) else v) for k, v in tree.items]
    if any(k in COUNTS and isinstance(v, int) for k, v in tree.items):
        return True
    if rng.random() < 0.9:
        tree.items.append((name, FEW_TOKENS))
        return True
    return False


def _is_long(value: Node) -> bool:
    return isinstance(value, int) and FEW_TOKENS < value < MOST_TOKENS


def _edit_wire(case: Case, rng: Random, index: int) -> None:
    kind = rng.randrange(12)
    if kind < 5 and case.body:
        _edit_bytes(case, rng, index)
    elif kind < 6 and case.body:
        _edit_framing(case, rng, index)
    elif kind < 7 and case.body:
        case.headers["Content-Type"] = rng.choice(CONTENT_TYPES)
        case.told.append(f"{index}: content type {case.headers['Content-Type']!r}")
    elif kind < 10:
        name, value = rng.choice(HOSTILE_HEADERS)
        case.headers[name] = value
        case.framed = case.framed and name != "Host" and value.isascii() and len(value) < 60000
        case.told.append(f"{index}: header {name}: {value[:60]!r}")
    elif kind < 11:
        case.method = rng.choice(METHODS)
        case.framed = False
        case.told.append(f"{index}: method {case.method}")
    else:
        case.path = rng.choice((*PATHS, case.path + rng.choice(("/", "%00", "?a=%ff", "%2e%2e"))))
        case.framed = False
        case.told.append(f"{index}: path {case.path[:60]!r}")


def _edit_bytes(case: Case, rng: Random, index: int) -> None:
    body, at = bytearray(case.body), rng.randrange(len(case.body))
    kind = rng.choice(("cut", "flip", "insert", "drop", "repeat", "encode", "tail"))
    if kind == "cut":
        body = body[:at]
    elif kind == "flip":
        for _ in range(rng.choice((1, 1, 4, 30))):
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    elif kind == "insert":
        body[at:at] = rng.choice(
            (b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc0\x80", b"\\u", b"\r\n\r\n", b"/*")
        )
    elif kind == "drop":
        del body[at : at + rng.choice((1, 2, 10, 100))]
    elif kind == "repeat":
        body[at:at] = body[at : at + 20] * rng.choice((1, 2, 100))
    elif kind == "encode":
        body = bytearray(case.body.decode("utf-8", "replace").encode(rng.choice(ENCODINGS), "replace"))
    else:
        body += rng.choice(
            (b"}", b"]", b"\0", b'{"a": 1}', b"\n\n", rng.choice(TEXTS).encode("utf-8", "surrogatepass"))
        )
    case.body = bytes(body)
    case.headers["Content-Length"] = str(len(body))
    case.told.append(f"{index}: bytes {kind} at {at}")


def _edit_framing(case: Case, rng: Random, index: int) -> None:
    """The head lies about the body: an answer is welcome, a closed connection will do."""
    kind, size = rng.choice(FRAMINGS), len(case.body)
    case.framed, case.leave_after_s = False, 0.5
    case.told.append(f"{index}: framing {kind}")
    if kind in ("short", "long"):
        case.headers["Content-Length"] = str(size // 2 if kind == "short" else size + 100)
    elif kind == "twice":
        case.headers["content-length"] = str(size + 1)
    elif kind in ("both", "chunked", "bad chunks"):
        case.headers["Transfer-Encoding"] = "chunked"
        if kind != "both":
            case.headers.pop("Content-Length", None)
        length = b"%x" % size if kind != "bad chunks" else rng.choice((b"-1", b"zz", b"f" * 20, b"", b"0x5"))
        case.body = length + b"\r\n" + case.body + b"\r\n0\r\n\r\n"
    else:
        case.headers["Content-Length"] = kind
