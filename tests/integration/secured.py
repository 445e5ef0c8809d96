"""A MongoDB server as an operator would run it: TLS, a key file, users; started by the tests that need one."""

import contextlib
import secrets
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from service.embedded import find_mongod
from tests.helpers import wait_for

ADMIN_PASSWORD = "adm1n/p@ss:w0rd"


@dataclass
class Secured:
    """A one-node replica set that answers over TLS only, and only to users."""

    port: int
    authority: Path
    log: Path

    def uri(self, user: str, password: str, *, source: str = "admin", authority: Path | None = None) -> str:
        """The URI for this user, with the certificate authority that clients are told to trust."""
        options = f"replicaSet=rs0&authSource={source}&tls=true&tlsCAFile={authority or self.authority}"
        return f"mongodb://{quote_plus(user)}:{quote_plus(password)}@127.0.0.1:{self.port}/?{options}"

    @property
    def admin_uri(self) -> str:
        """The URI of the administrator."""
        return self.uri("admin", ADMIN_PASSWORD)


@contextlib.contextmanager
def secured_mongo(folder: Path) -> Iterator[Secured]:
    """Run the server while the context lasts, with an administrator (ADMIN_PASSWORD) and no other user."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    authority = make_authority(folder / "ca")
    certificate = _certificate(folder, authority)
    key = folder / "keyfile"
    key.write_text(secrets.token_hex(64))
    key.chmod(0o600)
    (folder / "data").mkdir()
    command = [str(find_mongod()), "--dbpath", str(folder / "data"), "--port", str(port), "--bind_ip", "127.0.0.1"]
    command += ["--replSet", "rs0", "--keyFile", str(key), "--nounixsocket", "--quiet", "--noscripting"]
    command += ["--tlsMode", "requireTLS", "--tlsCertificateKeyFile", str(certificate), "--tlsCAFile", str(authority)]
    command += ["--tlsAllowConnectionsWithoutCertificates", "--wiredTigerCacheSizeGB", "0.25", "--oplogSize", "64"]
    command += ["--setParameter", "diagnosticDataCollectionEnabled=false"]
    with (
        (folder / "mongod.log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        try:
            _set_up(process, port, authority)
            yield Secured(port, authority, folder / "mongod.log")
        finally:
            process.terminate()
            process.wait(30)


def _set_up(process: "subprocess.Popen[bytes]", port: int, authority: Path) -> None:
    """Make the set, and its first user: until there is one the server lets its own machine do that much."""
    uri = f"mongodb://127.0.0.1:{port}/?directConnection=true&tls=true&tlsCAFile={authority}"
    with MongoClient[dict[str, Any]](uri, serverSelectionTimeoutMS=500) as client:
        config = {"_id": "rs0", "members": [{"_id": 0, "host": f"127.0.0.1:{port}"}]}

        def initiated() -> bool:
            assert process.poll() is None, "mongod has ended"
            try:
                return bool(client.admin.command("replSetInitiate", config)["ok"])
            except PyMongoError:
                return False

        wait_for(initiated, 60)
        wait_for(lambda: client.admin.command("hello")["isWritablePrimary"], 60)
        client.admin.command("createUser", "admin", pwd=ADMIN_PASSWORD, roles=["root"])


def make_authority(path: Path) -> Path:
    """Make a certificate authority, `path`.pem and `path`.key; returns the first."""
    _openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"),
        *("-subj", f"/CN=test authority {path.name}", "-keyout", f"{path}.key", "-out", f"{path}.pem"),
    )
    return path.with_suffix(".pem")


def _certificate(folder: Path, authority: Path) -> Path:
    """A certificate for 127.0.0.1 with its key, in the one file that mongod wants."""
    key, request, signed, extensions = (folder / f"server.{end}" for end in ("key", "csr", "crt", "ext"))
    _openssl(
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=127.0.0.1"),
        *("-keyout", key, "-out", request),
    )
    # The server is its own client, for the members of a set speak to each other.
    extensions.write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    _openssl(
        *("x509", "-req", "-in", request, "-CA", authority, "-CAkey", authority.with_suffix(".key")),
        *("-CAcreateserial", "-days", "2", "-extfile", extensions, "-out", signed),
    )
    whole = folder / "server.pem"
    whole.write_text(signed.read_text() + key.read_text())
    return whole


def _openssl(*arguments: Any) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
