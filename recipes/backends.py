"""Backends of the synthetic data pipeline: a model in this process, or one that OpenAI-compatible
servers have."""

import hashlib
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from data import ATTRIBUTES, Messages, render_chat, render_reward
from generate import EngineConfig, SamplingParams, Sequence, attributes_of, chat_stops, load_engine
from parallel import step_folders, world_size

log = logging.getLogger("nemotron4")

Sampling = dict[str, Any]
Work = list[tuple[Messages, Sampling]]
RESTS = 30.0  # seconds that a server which failed is left alone, while there are others


class Reply(NamedTuple):
    """Holds what a backend answers."""

    text: str
    finish_reason: str = "stop"  # or length, too long, no answer, refused: why
    tokens: tuple[int, int] = (0, 0)  # of the prompt, of the answer
    scores: dict[str, float] = {}  # a reward model's attributes


# ---- backends ------------------------------------------------------------------------------------


class Local:
    """Answers with a model in this process: a language model writes, a reward model rates."""

    def __init__(self, cfg: EngineConfig, rates: bool) -> None:
        self.engine = load_engine(cfg)
        self.rates = rates
        self.name = identity(cfg.model)
        if cfg.quantize != "none":
            self.name += f" {cfg.quantize}"
        if rates != bool(self.engine.cfg.n_attributes):
            kinds = ("a language model", "a reward model")
            raise ValueError(f"{cfg.model} is {kinds[not rates]}, not {kinds[rates]}")

    def answers(self, work: Work) -> Iterator[Reply]:
        """Yield replies in the order of the work. A kill loses at most one window of them."""
        window = 16 * len(self.engine.slots)
        for start in range(0, len(work), window):
            running = [self.submit(*one) for one in work[start : start + window]]
            yield from map(self.reply, running)

    def submit(self, messages: Messages, sampling: Sampling) -> list[Sequence]:
        """Queue a conversation, unless it leaves no room for an answer in the context."""
        tokenizer = self.engine.tokenizer
        if self.rates:
            ids = render_reward(messages, tokenizer)
            sampling = dict(max_tokens=0)
        else:
            ids, _ = render_chat(messages, tokenizer)
        if len(ids) + (not self.rates) > self.engine.context:
            return []
        return self.engine.submit(ids, SamplingParams(stop_ids=chat_stops(tokenizer), **sampling))

    def reply(self, sequences: list[Sequence]) -> Reply:
        """Wait for the answer of the engine."""
        if not sequences:
            return Reply("", "too long")
        (done,) = self.engine.finished(sequences)
        tokens = (done.n_prompt, len(done.ids))
        if self.rates:
            return Reply("", "stop", tokens, attributes_of(done.scores))
        return Reply(done.text.strip(), done.finish_reason, tokens)


@dataclass(eq=False)
class Server:
    """Holds the connection to a server, and how it does."""

    url: str
    client: Any
    limit: str = "max_tokens"  # the name under which it wants the limit
    under_way: int = 0  # requests
    rests_until: float = 0.0


class Endpoint:
    """Asks a model that one or several OpenAI-compatible servers have, the least busy one first.

    The openai package repeats what failed (429, 5xx, a lost connection) after growing pauses, or
    after the one that the server asks for. With several servers it does so briefly: then the
    request goes to another one, and the server that failed rests for a while."""

    def __init__(self, cfg: Any, name: str, rates: bool) -> None:
        """Connect to the servers of a SynthesizeConfig, with the key in OPENAI_API_KEY."""
        try:
            import openai
        except ImportError as e:
            raise ValueError("--endpoint needs `pip install -e '.[endpoint]'`") from e
        self.openai = openai
        self.cfg = cfg
        self.name = name
        self.rates = rates
        self.lock = threading.Lock()
        self.servers = []
        how = dict(api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=cfg.retries)
        how |= dict(timeout=openai.Timeout(3600, connect=30))
        for url in dict.fromkeys(cfg.endpoint):
            if not re.match(r"https?://[^/\s]", url):
                rule = "a URL such as http://localhost:8000/v1 is wanted"
                raise ValueError(f"endpoint {url!r}: {rule}")
            self.servers.append(Server(url, openai.OpenAI(base_url=url, **how)))

    def answers(self, work: Work) -> Iterator[Reply]:
        """Yield replies in the order of the work.

        At most `concurrency` requests are under way, and as many done ones wait behind a slow one.
        If the process is killed, at most 2 x concurrency answers are lost."""
        pool = ThreadPoolExecutor(self.cfg.concurrency)
        under_way = deque()
        try:
            for one in work:
                if len(under_way) == 2 * self.cfg.concurrency:
                    yield under_way.popleft().result()
                under_way.append(pool.submit(self.ask, *one))
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, messages: Messages, sampling: Sampling) -> Reply:
        """Return the answer of the first server that gives one."""
        untried = [*self.servers]
        reply = None
        while not reply:
            with self.least_busy(untried) as server:
                try:
                    done = self.complete(server, messages, sampling, untried)
                except (self.openai.OpenAIError, ValueError) as e:
                    harmless = [message | {"content": "Hello"} for message in messages]
                    reply = self.failed(server, e, harmless, sampling, untried)
                else:
                    reply = self.reply(server, done)
        return reply

    def failed(
        self, server: Server, e: Exception, hello: Messages, sampling: Sampling, untried: list
    ) -> Reply | None:
        """Return a reply if it is what was said that was refused, as it would be again, or None if
        another server is to be asked; any other failure ends the run."""
        why = drop_surrogates(f"{e} {e.__cause__ or ''}").strip()
        rule = "the same command goes on from here"
        if getattr(e, "status_code", 0) in (400, 403, 413, 422):
            if self.takes(server, hello, sampling):
                return Reply("", f"refused: {why}")
            rule = f"a request that only says Hello is refused too: mend its form, then {rule}"
        elif untried:
            self.rest(server, why)
            return None
        raise ValueError(f"{server.url}: {self.name}: {why}: {rule}") from e

    @contextmanager
    def least_busy(self, untried: list[Server]) -> Iterator[Server]:
        """Take from the servers the one with the fewest requests; those that rest come last."""
        with self.lock:
            now = time.monotonic()
            server = min(untried, key=lambda one: (one.rests_until > now, one.under_way))
            untried.remove(server)
            server.under_way += 1
        try:
            yield server
        finally:
            with self.lock:
                server.under_way -= 1

    def rest(self, server: Server, why: str) -> None:
        """Let others have a server's requests for a while, and say so when it begins."""
        with self.lock:
            now = time.monotonic()
            if server.rests_until <= now:
                rule = f"others get its requests for {RESTS:.0f} s"
                log.warning(f"{server.url}: {self.name}: {why}: {rule}")
            server.rests_until = now + RESTS

    def reply(self, server: Server, done: Any) -> Reply:
        """Read a chat completion."""
        if not done.choices:
            return Reply("", "no answer")
        choice = done.choices[0]
        said = getattr(choice.message, "content", None)
        text = drop_surrogates(said).strip() if isinstance(said, str) else ""
        used = done.usage
        tokens = (used.prompt_tokens or 0, used.completion_tokens or 0) if used else (0, 0)
        scores = {}
        if self.rates:  # NVIDIA's endpoints give attributes as if they were tokens
            if choice.logprobs is None:
                what = "gives no log-probabilities of attributes"
                raise ValueError(f"{server.url}: {self.name} {what}")
            listed = choice.logprobs.content or []
            scores = {one.token: one.logprob for one in listed if one.token in ATTRIBUTES}
        return Reply(text, choice.finish_reason or "stop", tokens, scores)

    def complete(
        self, server: Server, messages: Messages, sampling: Sampling, others: list[Server]
    ) -> Any:
        """Send a request, with the token limit under the name that the server asks for. While there
        are others it is repeated twice at most."""
        named = {server.limit if key == "max_tokens" else key: sampling[key] for key in sampling}
        client = server.client
        if others:
            client = client.with_options(max_retries=min(2, self.cfg.retries))
        try:
            done = client.chat.completions.create(model=self.name, messages=messages, **named)
        except self.openai.APIStatusError as e:
            wanted = "max_completion_tokens"
            if wanted in named or wanted not in str(e) or "max_tokens" not in named:
                raise
            server.limit = wanted
            return self.complete(server, messages, sampling, others)
        if getattr(done, "choices", None) is None:
            raise ValueError(f"no chat completion: {str(done)[:200]}")
        return done

    def takes(self, server: Server, hello: Messages, sampling: Sampling) -> bool:
        """Tell whether the server answers a harmless request of the same form, so that what it
        refused was what was said. One that refuses the form (a parameter, the roles, a quota that
        is spent) refuses this one too."""
        try:
            self.complete(server, hello, sampling, [])
        except (self.openai.OpenAIError, ValueError):
            return False
        return True


Backend = Local | Endpoint


def drop_surrogates(text: str) -> str:
    """Replace halves of surrogate pairs, which no file can hold."""
    return text.encode(errors="replace").decode()


def identity(folder: Path) -> str:
    """Name a model by its weights, so that other weights have another name.

    A model is known by the size of each file of its weights, those of a Hugging Face folder, of
    NVIDIA's form or of a run's newest checkpoint, and by pieces from all over them."""
    digest = hashlib.sha256()
    nemo = str(folder).startswith("nemo:")
    folder = Path(str(folder).removeprefix("nemo:"))
    steps = step_folders(folder / "checkpoints")
    weights = steps[-1].rglob("*.distcp") if steps else folder.glob("*.safetensors")
    for path in sorted(filter(Path.is_file, folder.rglob("*")) if nemo else weights):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(16):
                file.seek(size * i // 16)
                digest.update(file.read(1 << 16))
    return f"{folder.resolve().name}@{digest.hexdigest()[:12]}"


def load_backend(cfg: Any, name: str, rates: bool) -> Backend:
    """Load the model of a folder, or connect to one at the endpoint."""
    if name.startswith("nemo:") or (Path(name) / "config.json").exists():
        return Local(replace(cfg, model=Path(name)), rates)
    if not cfg.endpoint:
        rule = "a model is a folder with a config.json, nemo:FOLDER, or what --endpoint serves"
        raise ValueError(f"model {name!r}, no endpoint: {rule}")
    if world_size() > 1:
        raise ValueError("an endpoint is asked by one process: start it with python")
    return Endpoint(cfg, name, rates)
