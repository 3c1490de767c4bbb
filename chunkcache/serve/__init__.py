"""An OpenAI-compatible server, in which many users share one model and the KV of their chunks (extra `server`)."""
