"""The routes of the endpoint, from the body of a request to the pieces of its reply."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from slothcore.inference.engine import Request as EngineRequest
from slothcore.models.sampling import Sampling
from slothcore.serve.answers import Answer, AnswerStream
from slothcore.serve.choices import Choice
from slothcore.serve.engine_thread import EngineThread
from slothcore.serve.errors import ApiError, wrong
from slothcore.serve.guard import Guard
from slothcore.serve.models import ServedModel, find_model
from slothcore.serve.replies import ChatReply, CompletionReply, Reply
from slothcore.serve.requests import Asked, read_chat, read_completion

LARGEST_BODY = 32 * 2**20
# Characters whose tokens take milliseconds to find: too long for other clients to wait.
LONG_TEXT = 10_000
Result = TypeVar("Result")


class Endpoint:
    """Answers requests with the engine's help.

    Attributes:
        app: what a server runs.
    """

    def __init__(
        self,
        engine: EngineThread,
        models: Sequence[ServedModel],
        *,
        capacity: int,
        defaults: Sampling,
        api_key: str | None = None,
        checks_host: bool = True,
    ) -> None:
        """
        Args:
            models: the base first.
            capacity: most tokens of a prompt with its answer.
            defaults: how clients' silence about sampling is read.
            api_key: what clients have to show; None: nothing.
            checks_host: whether only those are answered who ask for this machine by a name of its own.
        """
        self._engine, self._capacity, self._defaults = engine, capacity, defaults
        self._models = {model.name: model for model in models}
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._show_model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {
            ApiError: lambda _, error: error.response(),
            HTTPException: _http_error,
            ClientDisconnect: lambda *_: Response(status_code=499),
            Exception: lambda *_: ApiError(500, "the server made a mistake; its own output says which").response(),
        }
        starlette = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        self.app: ASGIApp = Guard(starlette, api_key=api_key, checks_host=checks_host)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._engine.start()
        try:
            yield
        finally:
            await self._engine.stop()

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _list_models(self, _: Request) -> Response:
        data = [model.as_json(self._capacity) for model in self._models.values()]
        return JSONResponse({"object": "list", "data": data})

    async def _show_model(self, request: Request) -> Response:
        return JSONResponse(find_model(self._models, request.path_params["name"]).as_json(self._capacity))

    async def _chat(self, request: Request) -> Response:
        asked = read_chat(await _body(request), self._defaults)
        model = find_model(self._models, asked.model)
        prompt = await _checked(run_in_threadpool(model.conversation_ids, asked), param="messages")
        reply = ChatReply(asked.model, asked.tells_usage)
        return await self._reply(request, asked, model, [prompt], reply, param="messages")

    async def _complete(self, request: Request) -> Response:
        asked = read_completion(await _body(request), self._defaults)
        model = find_model(self._models, asked.model)
        if sum(len(prompt) for prompt in asked.prompts if isinstance(prompt, str)) > LONG_TEXT:
            prompts = await run_in_threadpool(lambda: [model.prompt_ids(prompt) for prompt in asked.prompts])
        else:
            prompts = [model.prompt_ids(prompt) for prompt in asked.prompts]
        echoed = [model.prompt_text(prompt) if asked.echoes else "" for prompt in asked.prompts]
        reply = CompletionReply(asked.model, asked.tells_usage, [text for text in echoed for _ in range(asked.choices)])
        return await self._reply(request, asked, model, prompts, reply, param="prompt")

    async def _reply(
        self,
        request: Request,
        asked: Asked,
        model: ServedModel,
        prompts: Sequence[list[int]],
        reply: Reply,
        *,
        param: str,
    ) -> Response:
        """Continue prompts, and reply in the form of `reply`, at once or in pieces."""
        endings = model.endings(asked)
        requests = [
            EngineRequest(
                prompt_ids=prompt,
                max_new_tokens=self._room(asked, prompt, param),
                sampling=asked.sampling,
                eos_ids=endings.eos_ids,
                seed=asked.seed_of(index),
                logprobs=asked.logprobs,
                adapter=model.adapter,
            )
            for prompt in prompts
            for index in range(asked.choices)
        ]
        ticket = await _checked(self._engine.submit(requests), param=param)
        texts = None if asked.logprobs is None else model.token_texts
        answer = Answer(
            self._engine,
            ticket,
            [
                Choice(index, model.tokenizer, endings, texts, behind=request.prompt_ids if asked.goes_on else ())
                for index, request in enumerate(requests)
            ],
            prompt_tokens=sum(map(len, prompts)),
        )
        if asked.streams:
            return AnswerStream(answer, reply, tells_usage=asked.tells_usage)
        try:
            pieces = await _while_connected(request, answer.whole())
        finally:
            answer.close()
        return JSONResponse(reply.whole(pieces, answer.usage))

    def _room(self, asked: Asked, prompt: Sequence[int], param: str) -> int:
        """How many tokens may be added. Raises: ApiError for an empty prompt, or one that leaves too little room."""
        if not prompt:
            raise wrong("the prompt has no token; give it some text", param=param)
        room = self._capacity - len(prompt)
        wanted = asked.max_new_tokens
        if room < (wanted or 1):
            more = "an answer" if wanted is None else f"the {wanted} tokens that max_tokens asks for"
            raise wrong(
                f"this model takes {self._capacity} tokens in all, and the prompt has {len(prompt)}, which leaves no "
                f"room for {more}; make the prompt shorter" + (", or lower max_tokens" if wanted else ""),
                param=param,
                code="context_length_exceeded",
            )
        return wanted or room


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object that a request holds. Raises: ApiError if there is none."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A web page may send anything else to any server without being asked for leave.
    if kind != "application/json":
        raise ApiError(415, f"the body must be JSON, with Content-Type: application/json; it was sent as {kind!r}")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise ApiError(413, f"the body has more than {LARGEST_BODY} bytes")
    try:
        # Left to itself, json takes the bytes of half a character for one.
        text = body.decode(json.detect_encoding(body))
        values = json.loads(text)
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode()  # half a character, as \ud800 writes it, is no text
    except (ValueError, RecursionError) as error:
        raise wrong(f"the body is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise wrong(f"the body must be a JSON object, got {type(values).__name__}")
    return values


async def _checked(work: Coroutine[Any, Any, Result], *, param: str) -> Result:
    """What the work gives; a ValueError of it is the client's."""
    try:
        return await work
    except ValueError as error:
        raise wrong(str(error), param=param) from error


async def _while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What the work gives; it is cancelled when the client hangs up. Raises: ClientDisconnect then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or another method, in the protocol's form."""
    assert isinstance(error, HTTPException)
    told = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    message = told.get(error.status_code, error.detail)
    return ApiError(
        error.status_code, f"{message}; see /v1/models, /v1/chat/completions and /v1/completions"
    ).response()
