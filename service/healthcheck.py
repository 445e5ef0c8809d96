"""`python -m service.healthcheck`: asks this container's own service for `/livez`; exit 0 if it is alive.

A program, since the image has no curl, and one that knows from the settings where the service listens.
"""

import ipaddress
import sys
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from service.settings import Settings

#: Seconds for an answer; the image's HEALTHCHECK allows ten for all.
_TIMEOUT = 5


def main() -> int:
    """0 if it answers, or is told to serve nothing; 1 if it does not answer."""
    settings = Settings()
    if settings.http_port == "off":
        return 0
    url = f"http://{_host_to_ask(settings.http_host)}:{settings.http_port}/livez"
    try:
        # Never by a proxy of the environment, which knows nothing of this loopback.
        with build_opener(ProxyHandler({})).open(url, timeout=_TIMEOUT) as answer:
            print(answer.read(100).decode(errors="replace").strip())
            return 0
    except (URLError, OSError) as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1


def _host_to_ask(host: str) -> str:
    """Where to reach a server that listens on `host`; in brackets if IPv6."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host  # a name
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return str(address) if address.version == 4 else f"[{address}]"


if __name__ == "__main__":
    sys.exit(main())
