"""Files of requests that are answered while nobody waits: /v1/files and /v1/batches."""
