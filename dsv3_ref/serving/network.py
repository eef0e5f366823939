"""Who may reach a server: the address that it listens on, the Host header, and API keys."""

import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets
import socket
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING

from dsv3_ref.config import UserError
from dsv3_ref.serving.protocol import error_body

if TYPE_CHECKING:  # optional dependencies
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

CACHE_SALT = "dsv3.cache_salt"  # the entry of an ASGI scope with the salt of the client's API key
OPEN_PATHS = ("/", "/health")  # that need no API key
HostRule = Callable[[str], bool]

# ── Addresses ──


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket; raise a `UserError` if the address cannot be used.

    Call it before anything slow, so that the user learns of the error at once.
    """
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port must be from 0 to 65535, not {port}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as e:  # a name that is not valid in DNS
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"--host {host} --port {port} cannot be used: {reason}") from None


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable from this machine only; of names, only localhost."""
    if host == "localhost":
        return True
    return is_ip_address(host) and ip_address(host).is_loopback


def is_ip_address(host: str) -> bool:
    """Return whether a host is an IP address rather than a name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


# ── The Host header ──


def host_rule(listener: socket.socket, allowed_hosts: Sequence[str] = ()) -> HostRule:
    """Return a function that tells whether a request may carry a Host header.

    A page from elsewhere whose name is made to resolve to this machine (DNS rebinding) sends its
    own name. So only these hosts are allowed: localhost and loopback addresses; if the server is
    reachable from the network, this machine's name and any IP address; and `allowed_hosts`.
    """
    is_local = is_loopback(listener.getsockname()[0])
    names = {"localhost", *(name.lower().rstrip(".") for name in allowed_hosts)}
    if not is_local:
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    def is_allowed(header: str) -> bool:
        host = host_of(header)
        if host in names:
            return True
        return is_loopback(host) if is_local else is_ip_address(host)

    return is_allowed


def host_of(header: str) -> str:
    """Return the host of a Host header, without its port and the brackets of an IPv6 address.

    Returns "" if the header is not a host with an optional port.
    """
    text = header.strip().lower()
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        is_valid = bool(bracket) and (not port or port[0] == ":")
        port = port[1:]
    else:
        host, _, port = text.partition(":")
        is_valid = True
    is_valid &= not port or port.isdecimal()
    return host.rstrip(".") if is_valid else ""


OriginRule = Callable[[str, str], bool]


def origin_rule(allowed_hosts: Sequence[str] = ()) -> OriginRule:
    """Return a function that tells whether a page of an origin may use a server at a host.

    Only the server's own pages may, and those of `allowed_hosts`, behind a reverse proxy that
    changes the Host header: a browser sends a user's password to a server for foreign pages, too.
    """
    names = {name.lower().rstrip(".") for name in allowed_hosts}

    def is_allowed(origin: str, host: str) -> bool:
        scheme, _, place = origin.lower().partition("://")
        is_own = place == host.strip().lower() or host_of(place) in names
        return scheme in ("http", "https") and is_own

    return is_allowed


# ── API keys ──


class ApiKeys:
    """The keys of clients, and a salt for each that keeps their prefix caches apart.

    is_password: a browser asks its user for the key, with any user name (HTTP's Basic scheme).
    """

    def __init__(self, keys: Sequence[str], is_password: bool = False):
        self.is_password = is_password
        self.challenge = b'Basic realm="dsv3"' if is_password else b"Bearer"
        self.secret = secrets.token_bytes(32)  # of this process: a salt reveals nothing of its key
        self.digests = [self.digest(key.encode()) for key in keys]

    def digest(self, key: bytes) -> bytes:
        """Return a digest of a key, equally long for all keys."""
        return hmac.digest(self.secret, key, hashlib.sha256)

    def salt(self, authorization: bytes) -> bytes | None:
        """Return the cache salt of an Authorization header; None if its key is not valid.

        Without keys every client is valid, and all share one salt.
        """
        if not self.digests:
            return b""
        scheme, _, key = authorization.partition(b" ")
        if self.is_password:
            key = password_of(key.strip())
        digest = self.digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        is_scheme = scheme.lower() == (b"basic" if self.is_password else b"bearer")
        return digest if any(matches) and is_scheme else None


def password_of(credentials: bytes) -> bytes:
    """Return the password of a user name and a password in base64; b"" if they are malformed."""
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


# ── In front of an app ──


def guard_app(
    app: "ASGIApp", is_allowed: HostRule, keys: ApiKeys, open_paths: Sequence[str] = OPEN_PATHS,
    is_own_page: OriginRule | None = None,
) -> "ASGIApp":  # fmt: skip
    """Return an ASGI app that refuses requests with a foreign Host header or without a valid key.

    The client's cache salt is passed on in the scope. open_paths: need no key. is_own_page: refuses
    requests of foreign pages, which an app may fail to do.
    """

    async def guarded(scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
        if scope["type"] != "http":
            return  # websockets are not served
        headers = dict(scope["headers"])
        if {b"content-length", b"transfer-encoding"} <= set(headers):
            await refuse(send, 400, "a body has one length: leave out Content-Length")
            return  # a proxy may see two requests where this server sees one
        host = headers.get(b"host", b"").decode("latin-1")
        if not is_allowed(host):
            message = f"the host {host[:80]!r} is not allowed: see --allowed-hosts"
            await refuse(send, 403, message)
            return
        origins = [v.decode("latin-1") for k, v in scope["headers"] if k == b"origin"]
        if is_own_page and not all(is_own_page(origin, host) for origin in origins):
            await refuse(send, 403, f"pages of {origins[0][:80]!r} may not use this server")
            return
        salt = keys.salt(headers.get(b"authorization", b""))
        if salt is None and scope["path"] not in open_paths:
            scheme = keys.challenge.decode().partition(" ")[0]
            message = f"this server needs an API key: send it as “Authorization: {scheme} KEY”"
            challenge = [(b"www-authenticate", keys.challenge)]
            await refuse(send, 401, message, "invalid_api_key", challenge)
            return
        scope[CACHE_SALT] = salt or b""
        await app(scope, receive, send)

    return guarded


def limit_requests(
    app: "ASGIApp", paths: re.Pattern[str], max_body_bytes: int, check: Callable[[bytes], None]
) -> "ASGIApp":
    """Return an ASGI app that refuses other paths and bodies, whatever the app itself does.

    A body is complete before the app is called. check: raises a `UserError` for one that the app
    must not see.
    """

    async def limited(scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        if not paths.fullmatch(scope["path"]):
            await refuse(send, 404, f"there is no {scope['path'][:80]!r}")
            return
        body, is_complete = bytearray(), False
        while not is_complete:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > max_body_bytes:
                await refuse(send, 413, f"the body must not exceed {max_body_bytes} bytes")
                return
            is_complete = not message.get("more_body")
        try:
            check(bytes(body))
        except UserError as e:
            await refuse(send, 400, str(e))
            return
        first = [{"type": "http.request", "body": bytes(body), "more_body": False}]
        del body

        async def receive_again() -> "Message":
            return first.pop() if first else await receive()

        await app(scope, receive_again, send)

    return limited


async def refuse(
    send: "Send", status: int, message: str, code: str | None = None,
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:  # fmt: skip
    """Send an error response and close the connection, whose request body is not read."""
    body = json.dumps(error_body(message, status, code=code), ensure_ascii=False).encode()
    fixed = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    start = {"type": "http.response.start", "status": status, "headers": [*fixed, *headers]}
    await send(start)
    await send({"type": "http.response.body", "body": body})
