"""A model behind a port, until it is told to stop."""

import socket
from collections.abc import Callable, Sequence

import uvicorn

from slothcore.inference.engine import Adapters, Engine
from slothcore.models.decoder import Decoder
from slothcore.serve.app import Endpoint
from slothcore.serve.engine_thread import EngineThread
from slothcore.serve.models import ServedModel
from slothcore.serve.port import Port
from slothcore.serve.requests import model_defaults
from slothcore.serve.warm_up import warm_up

# Answers under way may go on for so long when the server is told to stop.
SECONDS_TO_END = 5


class Server:
    """Answers requests over one engine."""

    def __init__(
        self,
        model: Decoder,
        models: Sequence[ServedModel],
        port: Port,
        *,
        adapters: Adapters | None = None,
        api_key: str | None = None,
        max_rows: int = 128,
        capacity: int | None = None,
        cache_tokens: int | None = None,
    ) -> None:
        """Nobody is answered before `run`.

        Args:
            model: what computes.
            models: the names that clients ask for, the base first.
            port: where; closed when `run` returns.
            adapters: what the adapters of `models` mean.
            api_key: what clients have to show; None: nothing.
            max_rows, capacity, cache_tokens: of the engine.
        Raises: ValueError for options that do not fit.
        """
        self._port, self._engine = (
            port,
            Engine(model, max_rows=max_rows, capacity=capacity, cache_tokens=cache_tokens, adapters=adapters),
        )
        self._adapters, self._defaults = [each.adapter for each in models], model_defaults(model)
        self._thread = EngineThread(self._engine, model.device, on_failure=self.stop)
        endpoint = Endpoint(
            self._thread,
            models,
            capacity=self._engine.capacity,
            defaults=self._defaults,
            api_key=api_key,
            # A web page can turn its own name to this machine; then it is same-origin, but asks for that name.
            checks_host=port.is_loopback and api_key is None,
        )
        config = uvicorn.Config(
            endpoint.app,
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=SECONDS_TO_END,
            proxy_headers=False,
            server_header=False,
        )
        self._server = _Uvicorn(config)

    def warm_up(self) -> None:
        """Do before `run` what the first client would wait for; see `slothcore.serve.warm_up`."""
        warm_up(self._engine, self._adapters, self._defaults)

    def run(self, ready: Callable[[], None] | None = None) -> None:
        """Serve until a signal or `stop`.

        Args:
            ready: called once requests are answered.
        Raises: RuntimeError if the engine has failed.
        """
        self._server.ready = ready
        try:
            self._server.run(sockets=[self._port.socket])
        finally:
            self._port.close()
            self._engine.close()
        if self._thread.failure is not None:
            raise RuntimeError("the engine has failed") from self._thread.failure

    def stop(self) -> None:
        """Let `run` return once the answers under way are complete, or a few seconds later."""
        self._server.should_exit = True


class _Uvicorn(uvicorn.Server):
    """Says when it has begun."""

    ready: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.ready is not None:
            self.ready()
