"""Serve a model over HTTP with the routes of OpenAI's API, on one process or under torchrun.

    python -m recipes.serve runs/nano --port 8000
    torchrun --nproc_per_node 4 -m recipes.serve runs/big --mesh.tp 4

At / is a page to chat with it, chat.html.

The engine runs in a thread of its own (`generate.Driver`). An `ActiveRequest` submits its prompts
and receives what the engine reports; a `ResponseWriter` a sample puts that into OpenAI's format.
"""

import asyncio
import json
import logging
import os
import secrets
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from data import Tokenizer, render_reward
from generate import (
    Completion,
    Driver,
    Engine,
    EngineConfig,
    SamplingParams,
    attributes_of,
    chat_stops,
    check_ranges,
    load_engine,
    run_command,
)
from recipes.rows import steered

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
    from pydantic import BaseModel, Field, ValidationError, model_validator
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError as e:
    raise SystemExit("recipes.serve needs FastAPI and uvicorn: pip install -e '.[serve]'") from e

log = logging.getLogger("nemotron4")
Json = dict[str, Any]


@dataclass(frozen=True)
class ServeConfig(EngineConfig):
    """Serve OpenAI's chats, completions and models under /v1, and NVIDIA's /v1/health."""

    host: str = "127.0.0.1"  # Address to listen on; 0.0.0.0: all networks of this machine
    port: int = 8000  # Port to listen on
    api_key: str = ""  # Bearer token that clients must send; empty: none
    max_queue: int = 256  # Samples that wait beyond the slots; more are answered with a 429
    max_body: int = 4 << 20  # Largest size of a request, in bytes
    model_name: str = ""  # Name of the model for clients; default: its folder's name
    origin: str = ""  # Address of another server, whose chat page may use this one; empty: none

    def __post_init__(self) -> None:
        check_ranges(self, {"port": (0, 65_535), "max_queue": (0, 1 << 31)})


# ---- requests ------------------------------------------------------------------------------------


class RequestError(Exception):
    """Ends a request with an HTTP status and OpenAI's error object; fields: param, code."""

    def __init__(self, status: int, message: str, **fields: str):
        types = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        error = {"message": message[:1000], "type": types.get(status, "invalid_request_error")}
        self.body = {"error": error | {"param": None, "code": None} | fields}
        self.status = status
        self.headers = {"retry-after": "1"} if status == 429 else None


FAIL_FAST = Field(fail_fast=True)  # no million errors for a list of a million wrong items
# many clients send such fields although they ask for nothing; other values are not supported
NEUTRAL = Field(0, ge=0, le=0)
Ids = Annotated[list[int], FAIL_FAST]


class SamplingRequest(BaseModel, extra="forbid", strict=True):
    """Has the fields of both routes. SamplingParams checks the ranges that are not checked here."""

    model: str
    n: int = Field(1, le=128)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = Field(default_factory=lambda: secrets.randbits(62), gt=-(1 << 63), lt=1 << 63)
    stop: str | Annotated[list[str], Field(fail_fast=True, max_length=64)] = []
    stream: bool = False
    stream_options: dict = {}
    user: str = ""
    frequency_penalty: float = NEUTRAL
    presence_penalty: float = NEUTRAL

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}

    def params(self, **others) -> SamplingParams:
        given = self.model_dump(include=set(SamplingParams.__dataclass_fields__))
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return SamplingParams(**given | {"stop": stop} | others)


class TextRequest(SamplingRequest):  # of /v1/completions
    prompt: str | Ids | Annotated[list[str | Ids], FAIL_FAST]
    max_tokens: int = 16
    echo: bool = False
    logprobs: int | None = None

    def sampling(self, engine: Engine) -> SamplingParams:
        if engine.cfg.n_attributes:
            raise RequestError(400, "a reward model scores chats: use /v1/chat/completions")
        # lm-eval drops max_tokens of the echoed log-probabilities: there must be as many new ones
        scored = self.echo and self.logprobs is not None
        return self.params(stop_ids=() if scored else None)

    def prompts(self, engine: Engine):
        one = isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt


class ChatRequest(SamplingRequest):  # of /v1/chat/completions
    messages: Annotated[list[dict[str, str | None]], FAIL_FAST]  # data.check_messages knows more
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    attributes: str = ""  # helpfulness=4,verbosity=1: of a model that recipes.steerlm has trained

    def sampling(self, engine: Engine) -> SamplingParams:
        if engine.cfg.n_attributes:
            return SamplingParams(n=self.n, max_tokens=0)
        if self.top_logprobs and not self.logprobs:
            raise RequestError(400, "top_logprobs: only with logprobs: true", param="top_logprobs")
        limits = {engine.context, self.max_tokens, self.max_completion_tokens} - {None}
        return self.params(
            max_tokens=min(limits),
            logprobs=self.top_logprobs if self.logprobs else None,
            stop_ids=chat_stops(engine.tokenizer),
        )

    def prompts(self, engine: Engine):
        """Return the conversation in the model's template, up to the turn to answer or to score."""
        system = {"role": "system"}  # OpenAI's newer name of it is developer
        messages = [m | system if m.get("role") == "developer" else m for m in self.messages]
        if engine.cfg.n_attributes:
            return [render_reward(messages, engine.tokenizer)]
        ids = steered(messages, self.attributes, engine.tokenizer)
        if messages[-1]["role"] != "user":
            raise RequestError(400, "messages: the last one must be the user's", param="messages")
        return [ids]


# ---- responses -----------------------------------------------------------------------------------


class ResponseWriter:
    """Writes one sample in OpenAI's format, at once or piece by piece."""

    def __init__(self, tokenizer: Tokenizer, chat: bool = False):
        self.tokenizer = tokenizer
        self.chat = chat
        self.n_characters = 0  # written so far
        self.n_tokens = 0
        self.anchor = tokenizer.encode("a")[-1:]

    def write(self, out: Completion, n_characters: int, n_tokens: int, reason: str) -> Json:
        """Return the choice with what is new, to these numbers: `out` may have more meanwhile."""
        text = out.text[self.n_characters : n_characters]
        new = slice(self.n_tokens, n_tokens)
        scored = list(zip(out.ids[new], out.logprobs[new], out.tops[new], strict=True))
        role = {} if self.n_characters or self.n_tokens else {"role": "assistant"}
        self.n_characters = n_characters
        self.n_tokens = n_tokens
        choice = {"finish_reason": reason or None}
        if not self.chat:
            return choice | {"text": text, "logprobs": self.text_logprobs(scored)}
        entries = [self.chat_entry(*token) for token in scored]
        if out.scores:  # in the form in which NVIDIA's service returns a reward model's attributes
            named = attributes_of(out.scores).items()
            entries = [{"token": name, "logprob": score} for name, score in named]
        choice["logprobs"] = {"content": entries} if entries else None
        return choice | {"message": role | {"content": text}}

    def spell(self, token: int) -> str:
        """Return a token's text after another one: some tokenizers drop a text's first space."""
        anchor = self.tokenizer.decode(self.anchor)
        return self.tokenizer.decode([*self.anchor, token]).removeprefix(anchor)

    def chat_entry(self, token: int, log_prob: float, top: tuple = ()) -> Json:
        """Return a token of a chat; `top` has the likeliest tokens and their log-probabilities."""
        text = self.spell(token)
        known = None if "\ufffd" in text else [*text.encode()]  # None: a part of a character
        entry = {"token": text, "logprob": log_prob, "bytes": known}
        return entry | {"top_logprobs": [self.chat_entry(*pair) for pair in top]}

    def text_logprobs(self, scored) -> Json | None:
        """Return a completion's lists for the (token, log-probability, likeliest tokens) given."""
        rows = []
        for token, log_prob, top in scored:
            ranked = [(token, log_prob), *reversed(top)]  # of those spelt alike, the last counts
            likeliest = {self.spell(other): value for other, value in ranked}
            rows.append((self.spell(token), log_prob, None if log_prob is None else likeliest))
        names = ("tokens", "token_logprobs", "top_logprobs")
        return dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else None


class ActiveRequest(Response):
    """Answers a request with the samples that the engine's thread reports, whole or as events."""

    def __init__(self, state: "ServerState", asked: TextRequest | ChatRequest):
        """Take a parsed request; ValueError if the model cannot answer it."""
        super().__init__()
        self.state = state
        self.asked = asked
        self.params = asked.sampling(state.engine)
        self.prompts = [state.engine.encode(prompt) for prompt in asked.prompts(state.engine)]
        if self.params.max_tokens and state.engine.context in map(len, self.prompts):
            rule = "a prompt fills the context, without room for an answer: shorten it"
            raise RequestError(400, rule, code="context_length_exceeded")
        self.n_samples = self.params.n * len(self.prompts)
        self.inbox = asyncio.Queue()
        self.done = []  # the whole samples
        self.chat = isinstance(asked, ChatRequest)
        kind = "chat.completion" + ".chunk" * asked.stream if self.chat else "text_completion"
        number = f"cmpl-{secrets.token_hex(12)}"
        self.head = dict(id=number, object=kind, model=state.name, created=int(time.time()))

    async def __call__(self, scope, receive, send):
        """Answer; and when that ends, in whatever way, cancel the samples that are not done."""
        self.request = Request(scope, receive)
        self.loop = asyncio.get_running_loop()
        driver = self.state.driver
        numbers = []
        try:
            for i, prompt in enumerate(self.prompts):
                report = partial(self.report, i * self.params.n)
                numbers.append(driver.submit(prompt, self.params, report))
            if self.asked.stream:
                answer = StreamingResponse(self.events(), media_type="text/event-stream")
            else:
                choices = sorted([c async for c in self.choices()], key=lambda c: c["index"])
                answer = JSONResponse(self.head | {"choices": choices, "usage": self.usage()})
            await answer(scope, receive, send)
        except asyncio.CancelledError:
            pass  # the server stops
        finally:
            self.state.n_samples -= self.n_samples
            for number in numbers:
                driver.cancel(number)

    def report(self, first: int, out: Completion, _: str):
        """Tell the server's thread, from the engine's, how far a prompt's samples have come."""
        if out.finish_reason or self.asked.stream:
            piece = (first + out.index, out, len(out.text), len(out.logprobs), out.finish_reason)
            with suppress(RuntimeError):  # the loop is closed: the server was forced to quit
                self.loop.call_soon_threadsafe(self.inbox.put_nowait, piece)

    async def choices(self):
        """Yield choices until all samples are done, the engine fails or the client hangs up."""
        tokenizer = self.state.engine.tokenizer
        writers = [ResponseWriter(tokenizer, self.chat) for _ in range(self.n_samples)]
        while len(self.done) < self.n_samples and not await self.request.is_disconnected():
            self.state.check_engine()
            with suppress(TimeoutError):
                index, out, *end = await asyncio.wait_for(self.inbox.get(), timeout=1)
                choice = writers[index].write(out, *end)
                if choice["finish_reason"]:
                    self.done.append(out)
                yield {"index": index} | choice

    def usage(self):
        n_prompt = sum(map(len, self.prompts))
        echoed = n_prompt * self.params.n * self.params.echo
        n_new = sum(len(out.ids) for out in self.done) - echoed
        cached = {"cached_tokens": sum(out.cached for out in self.done if out.index == 0)}
        counts = dict(prompt_tokens=n_prompt, completion_tokens=n_new, prompt_tokens_details=cached)
        return counts | {"total_tokens": n_prompt + n_new}

    async def events(self):
        """Yield server-sent events: the pieces of all samples, the usage if asked for, [DONE]."""
        try:
            async for choice in self.choices():
                if self.chat:
                    choice["delta"] = choice.pop("message")
                yield f"data: {json.dumps(self.head | {'choices': [choice]})}\n\n"
        except RequestError as e:
            yield f"data: {json.dumps(e.body)}\n\n"
            return
        if self.asked.stream_options.get("include_usage"):
            usage = {"choices": [], "usage": self.usage()}
            yield f"data: {json.dumps(self.head | usage)}\n\n"
        yield "data: [DONE]\n\n"


# ---- the server ----------------------------------------------------------------------------------


class ServerState:
    """State that the requests of all clients share."""

    def __init__(self, driver: Driver, cfg: ServeConfig):
        self.engine = driver.engine
        self.driver = driver
        self.cfg = cfg
        self.name = cfg.model_name or cfg.model.resolve().name
        self.n_samples = 0  # of the requests under way

    def check_engine(self):
        if self.driver.failed or not self.driver.thread.is_alive():
            raise RequestError(503, "the engine has failed, or has not begun")
        return {"status": "ok"}

    def check_key(self, request: Request):
        given = request.headers.get("authorization", "").encode()
        wanted = f"Bearer {self.cfg.api_key}".encode()
        if self.cfg.api_key and not secrets.compare_digest(given, wanted):
            raise RequestError(401, "a wrong API key, or none", code="invalid_api_key")

    def parse(self, kind: type, raw: bytes):
        """Return a request that can be submitted; a RequestError says what is wrong with it."""
        try:
            asked = kind.model_validate_json(raw)
            if asked.model != self.name:
                message = f"the model {asked.model!r:.200} does not exist, only {self.name!r}"
                raise RequestError(404, message, param="model", code="model_not_found")
            return ActiveRequest(self, asked)
        except ValidationError as e:
            error = e.errors()[-1]
            where = [*map(str, error["loc"])] or ["body"]
            raise RequestError(400, f"{'.'.join(where)}: {error['msg']}", param=where[0]) from e
        except ValueError as e:
            raise RequestError(400, str(e)) from e

    async def submit(self, request: Request):
        """Read a request and return what answers it, if there is room for its samples."""
        self.check_key(request)
        kind = ChatRequest if request.url.path == "/v1/chat/completions" else TextRequest
        raw = bytearray()
        async for part in request.stream():  # to its end: many clients send all before they listen
            raw += part[: self.cfg.max_body + 1 - len(raw)]
        if len(raw) > self.cfg.max_body:
            raise RequestError(413, f"the request has more than {self.cfg.max_body} bytes")
        # Tokenizing a long text takes a while: do it in another thread.
        active = await asyncio.to_thread(self.parse, kind, raw)
        self.check_engine()
        limit = self.cfg.slots + self.cfg.max_queue
        if self.n_samples + active.n_samples > limit:
            rule = f"{active.n_samples} samples, {self.n_samples} under way: {limit} at a time"
            raise RequestError(429 if active.n_samples <= limit else 400, rule)
        self.n_samples += active.n_samples
        return active


async def answer_error(request: Request, error: Exception):
    """Answer with OpenAI's error object, for unknown routes and bugs of ours as well."""
    headers = getattr(error, "headers", None)
    if not isinstance(error, RequestError):
        what = getattr(error, "detail", "a bug of the server, see its log")
        error = RequestError(
            getattr(error, "status_code", 500), f"{what}: {request.method} {request.url.path}"
        )
    return JSONResponse(error.body, error.status, headers)


def make_app(state: ServerState) -> FastAPI:
    """Return the application. The caller starts the driver's thread and stops it."""
    errors = (RequestError, HTTPException, ClientDisconnect, Exception)
    app = FastAPI(openapi_url=None, exception_handlers=dict.fromkeys(errors, answer_error))
    model = dict(id=state.name, object="model", created=int(time.time()), owned_by="nemotron4")
    model["max_model_len"] = state.engine.context

    # of `origin` a browser lets the chat page ask; the page itself is of this origin
    app.add_middleware(
        CORSMiddleware, allow_origins=[state.cfg.origin], allow_methods="*", allow_headers="*"
    )
    app.add_route("/", lambda _: FileResponse(Path(__file__).with_name("chat.html")))
    for path in ("/v1/chat/completions", "/v1/completions"):
        app.post(path)(state.submit)
    app.get("/v1/health/live")(lambda: {"status": "ok"})
    app.get("/v1/health/ready")(state.check_engine)

    @app.get("/v1/models")
    @app.get(f"/v1/models/{state.name}")
    async def models(request: Request):
        state.check_key(request)
        return {"object": "list", "data": [model]} if request.url.path == "/v1/models" else model

    return app


def bind(cfg: ServeConfig) -> socket.socket:
    """Take the port, before the model is loaded. Until it is, connections are refused."""
    listener = socket.socket(socket.AF_INET6 if ":" in cfg.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((cfg.host, cfg.port))
    except OSError as e:
        raise ValueError(f"{cfg.host} port {cfg.port}: {e}: set another --port") from e
    return listener


def serve(cfg: ServeConfig) -> None:
    """Answer until SIGINT or SIGTERM. The first process serves; the others follow its engine."""
    listener = None if int(os.environ.get("RANK", 0)) else bind(cfg)
    driver = Driver(load_engine(cfg))
    # uvicorn re-raises the signal after shutdown: the other ranks are still to be told to stop
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    if listener is None:
        driver.follow()
        return
    state = ServerState(driver, cfg)
    listener.listen()  # from the next line on, who connects is answered
    log.info(f"http://{cfg.host}:{listener.getsockname()[1]}/v1 serves {state.name}, / a chat page")
    if not cfg.api_key and cfg.host not in ("127.0.0.1", "localhost", "::1"):
        log.warning(f"anybody who reaches {cfg.host} can use this server: set --api-key")
    driver.thread.start()
    config = uvicorn.Config(make_app(state), timeout_graceful_shutdown=5, log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])
    driver.stop()
    if driver.failed:
        raise RuntimeError("the engine failed") from driver.failed
    log.info("stopped")


if __name__ == "__main__":
    parse = partial(tyro.cli, ServeConfig, prog="python -m recipes.serve")
    run_command("recipes.serve", parse, serve)
