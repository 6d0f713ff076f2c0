"""Serving over HTTP: OpenAI's and Anthropic's APIs before one engine (the `serve` extra)."""

__all__: list[str] = []
