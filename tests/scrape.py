"""What a Prometheus server sees of a running service."""

import json
import urllib.request
from dataclasses import dataclass
from urllib.error import HTTPError

from prometheus_client.parser import text_string_to_metric_families

from tests.helpers import Service, wait_for


def address(service: Service) -> str:
    """Where a service that was started with `http_port=0` listens."""

    def port() -> int | None:
        lines = [json.loads(line) for line in service.log.read_text().splitlines()]
        return next((line["port"] for line in lines if line["event"] == "http served"), None)

    return f"http://127.0.0.1:{wait_for(port)}"


def get(url: str) -> tuple[int, str]:
    """Status and body of an answer, which comes within ten seconds: a scrape has no more."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


@dataclass(frozen=True)
class Samples:
    """One scrape."""

    text: str
    values: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of all samples of that name which have these labels; of none, 0."""
        wanted = set(labels.items())
        return sum(value for (found, has), value in self.values.items() if found == f"dltask_{name}" and wanted <= has)

    def has(self, name: str) -> bool:
        """Whether there is any sample of that name."""
        return any(found == f"dltask_{name}" for found, _ in self.values)


def parsed(text: str) -> Samples:
    """The samples in a text of Prometheus."""
    families = text_string_to_metric_families(text)
    return Samples(text, {(one.name, frozenset(one.labels.items())): one.value for f in families for one in f.samples})


def scrape(url: str) -> Samples:
    """Scrape the service at `url`."""
    status, text = get(f"{url}/metrics")
    assert status == 200
    return parsed(text)
