"""OpenAI's routes over the engine.

python -m recipes.serve runs/nano --port 8000
"""

import asyncio
import hmac
import json
import logging
import secrets
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import tyro

from data import Tokenizer, render_chat, render_reward
from generate import (
    Completion,
    Driver,
    Engine,
    EngineConfig,
    SamplingParams,
    TextStream,
    attributes_of,
    chat_stops,
    load_engine,
    run_command,
)

log = logging.getLogger("nemotron4")


# ---- the server ----------------------------------------------------------------------------------

# The fields of a request, and those of OpenAI's that must ask for nothing
FIELDS = dict(
    model=str, n=int, max_tokens=int, temperature=float, top_p=float, top_k=int, min_p=float,
    repetition_penalty=float, seed=int, stop=object, stream=bool, stream_options=dict, user=str,
)  # fmt: skip
CHAT = dict(messages=object, max_completion_tokens=int, logprobs=bool, top_logprobs=int)
TEXT = dict(prompt=object, echo=bool, logprobs=int, best_of=int)
NEUTRAL = (
    "frequency_penalty", "presence_penalty", "logit_bias", "metadata", "tools", "functions",
    "suffix", "tool_choice", "function_call", "service_tier", "store", "parallel_tool_calls",
    "response_format",
)  # fmt: skip
NOTHING = (0, "", [], {}, "none", "auto", {"type": "text"})
Body = dict[str, Any]


@dataclass(frozen=True)
class ServeConfig(EngineConfig):
    """Serve OpenAI's /v1/chat/completions, /v1/completions and /v1/models, NVIDIA's
    /v1/health/live and /v1/health/ready, and /metrics for Prometheus."""

    host: str = "127.0.0.1"  # 0.0.0.0: all networks of this machine
    port: int = 8000
    api_key: str = ""  # What clients must send as their bearer token; empty: none is asked for
    max_queue: int = 256
    """Samples that may wait beyond the slots; who comes later is to try again (429)."""
    max_body: int = 4 << 20  # Bytes of a request
    model_name: str = ""  # What clients call the model; default: its folder's name


class RequestError(Exception):
    """Ends a request with an OpenAI error object."""

    def __init__(self, status: int, message: str, **more: str) -> None:
        kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        error = {"message": message[:1000], "type": kind.get(status, "invalid_request_error")}
        self.body = {"error": error | {"param": None, "code": None} | more}
        self.status, self.headers = status, {"retry-after": "1"} if status == 429 else {}


def parse_body(raw: bytes, chat: bool) -> Body:
    """JSON → the fields that are not null, each of its type. By hand, beyond the syntax: a model of
    pydantic's lists every error of a list of a million."""
    from pydantic_core import from_json

    try:
        body = from_json(raw)
    except ValueError as e:
        raise ValueError(f"invalid JSON: {e}") from e
    if not isinstance(body, dict):
        raise ValueError("a request is a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    known = FIELDS | (CHAT if chat else TEXT)
    for name, value in body.items():
        kind = known.get(name, object)
        if name not in known and name not in NEUTRAL:
            raise ValueError(f"{name:.60}: no field of this route")
        if name in NEUTRAL and value not in NOTHING:
            raise ValueError(f"{name}={value!r:.60}: not possible here; leave it out")
        if kind not in (type(value), object) and (kind, type(value)) != (float, int):
            raise ValueError(f"{name}={value!r:.60}: must be {kind.__name__}")
    return body


def plain_message(message: Any) -> Any:
    """A message as data.py wants it: OpenAI's content may be a list of texts."""
    if not isinstance(message, dict):
        return message
    given = {key for key, value in message.items() if value is not None}
    if unknown := given - {"role", "content", "name", "type"}:  # lm-eval sends a type
        raise ValueError(f"messages: {min(unknown):.60}: no field of a message")
    content = message.get("content")
    if isinstance(content, list):
        with suppress(TypeError, KeyError):  # what is no text, data.py refuses
            content = "".join(part["text"] for part in content)
    return {"role": message.get("role"), "content": content}


def sampling(body: Body, chat: bool, engine: Engine) -> SamplingParams:
    """ValueError where a field's value is not possible."""
    known = SamplingParams.__dataclass_fields__
    given = {"max_tokens": 16, "seed": secrets.randbits(62)}
    given |= {name: value for name, value in body.items() if name in known}
    n, stop = body.get("n", 1), body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise ValueError("stop: a text or a list of texts")
    if n > 128 or len(stop) > 64 or abs(given["seed"]) >= 1 << 63 or body.get("best_of", n) != n:
        raise ValueError("at most n=128, 64 stop texts, a seed of 63 bits; best_of must be n")
    if "stream_options" in body and not body.get("stream"):
        raise ValueError("stream_options: only with stream: true")
    if chat:
        limits = [body[name] for name in ("max_tokens", "max_completion_tokens") if name in body]
        if len(limits) > 1 or ("top_logprobs" in body and not body.get("logprobs")):
            raise ValueError("one max_[completion_]tokens; top_logprobs only with logprobs: true")
        given["max_tokens"] = limits[0] if limits else engine.context
        given["logprobs"] = body.get("top_logprobs", 0) if body.get("logprobs") else None
        given["stop_ids"] = chat_stops(engine.tokenizer)
    elif given.get("echo") and "logprobs" in given:
        # so harnesses score a text, and cut off the max_tokens tokens that they count on
        given["stop_ids"] = ()
    return SamplingParams(**given | {"stop": tuple(stop)})


class ResponseWriter:
    """One sample in OpenAI's words, whole or piece by piece."""

    def __init__(self, tokenizer: Tokenizer, chat: bool, index: int = 0) -> None:
        self.tokenizer, self.chat, self.index = tokenizer, chat, index
        self.characters = self.tokens = 0  # written so far
        self.held, self.offset, self.stream = "", 0, TextStream(tokenizer, ())
        self.anchor = [int(i) for i in tokenizer.encode("a")[-1:]]

    def write(self, out: Completion, characters: int, tokens: int, reason: str) -> dict[str, Any]:
        """What is new, up to so many characters and tokens: the engine may have gone on."""
        text, new = out.text[self.characters : characters], slice(self.tokens, tokens)
        self.characters, self.tokens = characters, tokens
        noted = list(zip(out.ids[new], out.logprobs[new], out.tops[new], strict=True))
        choice: dict[str, Any] = {"index": self.index, "finish_reason": reason or None}
        if not self.chat:
            return choice | {"text": text, "logprobs": self.text_logprobs(noted)}
        content = self.chat_logprobs(noted)
        if out.scores:  # as NVIDIA's reward service: in the text, and as log-probabilities
            pairs = attributes_of(out.scores).items()
            text = ",".join(f"{name}:{x:.9g}" for name, x in pairs)
            blank = {"bytes": None, "top_logprobs": []}
            content = [{"token": name, "logprob": x} | blank for name, x in pairs]
        # the newline that the template has before <extra_id_1> is no part of the answer
        text, self.held = self.held + text, ""
        if text.endswith("\n") and reason in ("", "stop"):
            text, self.held = text[:-1], "\n"
        choice["logprobs"] = {"content": content, "refusal": None} if content else None
        return choice | {"message": {"role": "assistant", "content": text}}

    def spell(self, token: int) -> str:
        """A token's text: behind another, as some tokenizers drop a space at the beginning."""
        behind = len(self.tokenizer.decode(self.anchor))
        return self.tokenizer.decode([*self.anchor, token])[behind:]

    def chat_logprobs(self, noted: list) -> list[dict[str, Any]]:
        def entry(token: int, log_prob: float) -> dict[str, Any]:
            text = self.spell(token)
            whole = None if "\ufffd" in text else list(text.encode())
            return {"token": text, "logprob": log_prob, "bytes": whole}

        return [
            entry(token, log_prob) | {"top_logprobs": [entry(*pair) for pair in top]}
            for token, log_prob, top in noted
        ]

    def text_logprobs(self, noted: list) -> dict[str, Any] | None:
        rows = []
        for token, log_prob, top in noted:
            named: dict[str, float] = {}
            for other, value in [*top, (token, log_prob)]:
                named.setdefault(self.spell(other), value)  # the likeliest of those spelt alike
            text, start = self.spell(token), self.offset
            self.offset += len(self.stream.push(token))
            start = max(start, self.offset - len(text))  # behind what broken bytes held back
            rows.append((text, log_prob, None if log_prob is None else named, start))
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: [row[i] for row in rows] for i, name in enumerate(names)} if rows else None


class ActiveRequest:
    """A request under way: its samples come in from the engine's thread, its answer goes out."""

    def __init__(
        self,
        desk: "ServerState",
        body: Body,
        chat: bool,
        params: SamplingParams,
        prompts: list[list[int]],
    ) -> None:
        self.desk, self.body, self.chat, self.params = desk, body, chat, params
        kind = "chat.completion" if chat else "text_completion"
        kind += ".chunk" if chat and body.get("stream") else ""
        self.head = {"id": f"{'chat' * chat}cmpl-{secrets.token_hex(12)}", "object": kind}
        self.head |= {"created": int(time.time()), "model": desk.name}
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.done: list[Completion] = []
        n, loop, tokenizer = params.n, asyncio.get_running_loop(), desk.engine.tokenizer
        self.samples = self.left = n * len(prompts)
        choices = [ResponseWriter(tokenizer, chat, i) for i in range(self.samples)]

        def tell(first: int, out: Completion, _: str) -> None:
            if out.finish_reason or body.get("stream"):
                until = len(out.text), len(out.logprobs), out.finish_reason
                with suppress(RuntimeError):  # the loop is closed: the server was made to hurry
                    loop.call_soon_threadsafe(self.arrive, choices[first + out.index], out, *until)

        desk.open += self.samples
        self.prompt_tokens = sum(map(len, prompts))
        self.numbers = [
            desk.driver.submit(p, params, partial(tell, i * n)) for i, p in enumerate(prompts)
        ]

    def arrive(self, choice: ResponseWriter, out: Completion, *until: Any) -> None:
        if reason := until[-1]:
            self.done.append(out)
            self.left -= 1
            self.desk.open -= 1
            self.desk.cancelled += reason == "cancelled"
        self.inbox.put_nowait(choice.write(out, *until))

    async def pieces(self, request: Any) -> AsyncIterator[dict[str, Any]]:
        """Until all samples are done, the engine fails or the client hangs up."""
        while (self.left or not self.inbox.empty()) and not await request.is_disconnected():
            self.desk.check()
            with suppress(TimeoutError):
                yield await asyncio.wait_for(self.inbox.get(), timeout=1)

    def usage(self) -> dict[str, Any]:
        echoed = self.params.echo
        new = sum(len(c.ids) - c.n_prompt * echoed + bool(c.scores) for c in self.done)
        cached = sum(c.cached for c in self.done if c.index == 0)
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": new}
        counts["total_tokens"] = self.prompt_tokens + new
        return counts | {"prompt_tokens_details": {"cached_tokens": cached}}

    async def whole(self, request: Any) -> dict[str, Any]:
        choices = [choice async for choice in self.pieces(request)]  # one of each sample
        choices.sort(key=lambda choice: choice["index"])
        return self.head | {"choices": choices, "usage": self.usage()}

    async def stream(self, request: Any) -> AsyncIterator[str]:
        """Server-sent events: roles, pieces, reasons, perhaps the usage, [DONE]."""
        wants = self.body.get("stream_options", {}).get("include_usage")
        head = self.head | ({"usage": None} if wants else {})
        line = lambda body: f"data: {json.dumps(body)}\n\n"  # noqa: E731
        blank = {"logprobs": None, "finish_reason": None}
        for i in range(self.samples if self.chat else 0):
            first = {"index": i, "delta": {"role": "assistant", "content": ""}}
            yield line(head | {"choices": [first | blank]})
        try:
            async for piece in self.pieces(request):
                if self.chat:
                    piece["delta"] = {"content": piece.pop("message")["content"]}
                yield line(head | {"choices": [piece]})
        except RequestError as e:
            yield line(e.body)
            return
        if wants:
            yield line(head | {"choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"


class ServerState:
    """What the requests of all clients have in common."""

    def __init__(self, engine: Engine, driver: Driver, cfg: ServeConfig) -> None:
        self.engine, self.driver, self.cfg = engine, driver, cfg
        self.name = cfg.model_name or cfg.model.resolve().name
        self.scores = bool(engine.cfg.n_attributes)
        self.most = cfg.slots + cfg.max_queue  # samples at a time
        self.open = self.cancelled = 0
        self.answers: Counter[int] = Counter()  # by status

    def check(self) -> None:
        if self.driver.failed or not self.driver.thread.is_alive():
            raise RequestError(503, "the engine has failed, or has not begun")

    def read(self, raw: bytes, chat: bool) -> tuple[Body, SamplingParams, list[list[int]]]:
        """A request's bytes → what the engine is to do, RequestError if it cannot."""
        try:
            body = parse_body(raw, chat)
            if (name := body.get("model")) != self.name:
                have = f"the model {name!r:.200} does not exist, only {self.name!r}"
                raise RequestError(404, have, param="model", code="model_not_found")
            params, prompts = sampling(body, chat, self.engine), self.prompts(body, chat)
            params = SamplingParams(max_tokens=0) if self.scores else params
            if len(prompts) * params.n > self.most:
                asked = f"{len(prompts)} prompts, {params.n} samples of each"
                raise ValueError(f"{asked}: this server takes {self.most} samples at a time")
            return body, params, [self.engine.encode(prompt) for prompt in prompts]
        except ValueError as e:
            raise RequestError(400, str(e)) from e

    def prompts(self, body: Body, chat: bool) -> list:
        """Texts or ids; ValueError where this model takes no such request."""
        if self.scores and (not chat or body.get("stream") or body.get("n", 1) != 1):
            raise ValueError("a reward model scores chats: /v1/chat/completions, n=1, no stream")
        if chat:
            messages = body.get("messages")
            if isinstance(messages, list):
                messages = [plain_message(message) for message in messages]
            if self.scores:
                return [render_reward(messages, self.engine.tokenizer)]
            ids, _ = render_chat(messages, self.engine.tokenizer)
            if messages[-1]["role"] != "user":
                raise ValueError("messages: the last one, which is answered, must be the user's")
            return [ids]

        def is_one(p: Any) -> bool:
            return isinstance(p, str) or (isinstance(p, list) and {type(i) for i in p} == {int})

        prompts = body.get("prompt")
        prompts = [prompts] if is_one(prompts) else prompts
        if not isinstance(prompts, list) or not prompts or not all(map(is_one, prompts)):
            raise ValueError("prompt: a text, a list of token ids, or a list of these, none empty")
        return prompts

    async def begin(self, request: Any) -> ActiveRequest:
        """Read a request and submit it."""
        raw, chat = bytearray(), "chat" in request.url.path
        async for part in request.stream():
            raw += part
            if len(raw) > self.cfg.max_body:
                raise RequestError(413, f"the request has more than {self.cfg.max_body} bytes")
        # in a thread: to tokenize a long text takes a while
        body, params, prompts = await asyncio.to_thread(self.read, bytes(raw), chat)
        self.check()
        if self.open + len(prompts) * params.n > self.most:
            raise RequestError(
                429, f"{self.open} samples are under way or waiting: try again later"
            )
        request.scope["call"] = ActiveRequest(self, body, chat, params, prompts)
        return request.scope["call"]

    def admit(self, scope: dict) -> None:
        """RequestError without the key, if there is one."""
        given = dict(scope["headers"]).get(b"authorization", b"")
        wanted = b"Bearer " + self.cfg.api_key.encode()
        open_to_all = not self.cfg.api_key or scope["path"].startswith("/v1/health/")
        if not open_to_all and not hmac.compare_digest(given, wanted):
            raise RequestError(401, "a wrong API key, or none", code="invalid_api_key")

    def around(self, app: Callable) -> Callable:
        """ASGI middleware: asks for the key, counts answers, turns errors into OpenAI's, and when a
        request ends, however it does, ends its samples."""
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse

        async def run(scope: dict, receive: Callable, send: Callable) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            begun = False

            async def count(message: dict) -> None:
                nonlocal begun
                if message["type"] == "http.response.start":
                    begun = True
                    self.answers[message["status"]] += 1
                await send(message)

            try:
                self.admit(scope)
                await app(scope, receive, count)
            except (ClientDisconnect, asyncio.CancelledError):
                pass  # the client is gone, or the server stops
            except Exception as e:
                if not isinstance(e, RequestError):
                    log.exception("a request failed")
                    e = RequestError(500, "a bug of the server: its log has more")
                if not begun:
                    await JSONResponse(e.body, e.status, e.headers)(scope, receive, count)
            finally:
                for number in scope["call"].numbers if "call" in scope else ():
                    self.driver.cancel(number)

        return run

    def metrics(self) -> str:
        engine = self.engine
        values = {
            "prompt_tokens_total": engine.prompt_tokens + engine.cached_tokens,
            "cached_prompt_tokens_total": engine.cached_tokens,
            "new_tokens_total": engine.new_tokens,
            "cancelled_samples_total": self.cancelled,
            "running_samples": engine.active,
            "waiting_samples": max(0, self.open - engine.active),
        }
        values |= {f'answers_total{{status="{s}"}}': n for s, n in sorted(self.answers.items())}
        return "".join(f"nemotron4_{name} {value}\n" for name, value in values.items())


def make_app(engine: Engine, driver: Driver, cfg: ServeConfig) -> Any:
    """A FastAPI application; it starts the driver's thread, and stops it in the end."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException

    desk, created = ServerState(engine, driver, cfg), int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        driver.thread.start()
        yield
        await asyncio.to_thread(driver.stop)

    app = FastAPI(title="nemotron4", lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.add_middleware(desk.around)

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    async def answer(request: Request) -> Response:
        call = await desk.begin(request)
        if call.body.get("stream"):
            return StreamingResponse(call.stream(request), media_type="text/event-stream")
        return JSONResponse(await call.whole(request))

    @app.get("/v1/models")
    async def models() -> dict:
        model = {"id": desk.name, "object": "model", "created": created, "owned_by": "nemotron4"}
        return {"object": "list", "data": [model | {"max_model_len": engine.context}]}

    @app.get("/v1/health/live")
    async def live() -> dict:
        return {"status": "live"}

    @app.get("/v1/health/ready")
    async def ready() -> dict:
        desk.check()
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(desk.metrics(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, e: HTTPException) -> None:
        refused = RequestError(e.status_code, f"{e.detail}: {request.method} {request.url.path}")
        refused.headers |= e.headers or {}
        raise refused

    return app


def serve(cfg: ServeConfig) -> None:
    """Answer until SIGINT or SIGTERM. The first process talks, the others follow it."""
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as e:
        raise ValueError("serving needs FastAPI and uvicorn: pip install -e '.[serve]'") from e

    driver = Driver(load_engine(cfg))
    # uvicorn raises what stopped it once more when it is done; those who follow are told to stop
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    if not driver.engine.leads:
        return driver.follow()
    log.info(f"http://{cfg.host}:{cfg.port}/v1 serves {cfg.model_name or cfg.model.resolve().name}")
    if not cfg.api_key and cfg.host not in ("127.0.0.1", "localhost", "::1"):
        log.warning(f"whoever reaches {cfg.host} may use it: set --api-key")
    app, quiet = make_app(driver.engine, driver, cfg), dict(log_level="warning")
    uvicorn.run(app, host=cfg.host, port=cfg.port, timeout_graceful_shutdown=5, **quiet)
    driver.stop()  # again, if uvicorn was made to hurry
    if driver.failed:
        raise RuntimeError("the engine failed") from driver.failed


if __name__ == "__main__":
    run_command("recipes.serve", partial(tyro.cli, ServeConfig), serve)
