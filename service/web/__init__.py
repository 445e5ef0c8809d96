"""What a worker serves over HTTP: the probes, the metrics, the page. Read-only; `site` puts it together."""
