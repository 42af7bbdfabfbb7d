"""Answering over HTTP (report §3.4): an OpenAI-compatible server around the engine, and a chat page.

    client --> Gate (keys, limits, draining) --> route (body to prompt) --> Service (engine's thread)
           <-- events or JSON <-- Reader (reasoning, content, calls) <-- deltas

Needs `pip install 'fathom[serve]'`; docs/serving.md says what clients can do.
"""

from __future__ import annotations

from fathom.errors import ServingError

try:
    from fathom.serving.app import Application, build
    from fathom.serving.run import serve
    from fathom.serving.settings import Settings
except ModuleNotFoundError as missing:
    if missing.name not in ("fastapi", "uvicorn", "prometheus_client"):
        raise
    raise ServingError(
        f"serving needs {missing.name}; run: pip install 'fathom[serve]'"
    ) from missing

__all__ = ["Application", "Settings", "build", "serve"]
