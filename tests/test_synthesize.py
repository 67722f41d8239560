"""The pipeline that makes alignment data, before a scripted teacher behind OpenAI's interface."""

import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import SERVER

import align
import data
import generate
from model import SHAPES, Nemotron, init_weights
from parallel import MeshConfig, save_hf
from recipes import backends, records, report, verify
from recipes import synthesize as pipeline
from recipes.backends import Reply
from recipes.iterate import IterateConfig, score_of
from recipes.records import Pipeline, prompt
from recipes.rows import ranked_row
from recipes.synthesize import Candidate, SynthesizeConfig, choose, load_library, synthesize

ROOT = Path(pipeline.__file__).parents[1]
LIBRARY = load_library()
TEMPLATES = LIBRARY["templates"]
WORDS = [w for w in re.findall(r"[a-z]{4,9}", data.REWARD_SYSTEM + next(data.embedded_english()))]
WORDS = sorted({*WORDS})


def form_of(template):
    """A pattern that finds what was filled into a template."""

    def group(found):
        name = found[0].strip("\\{}")
        return rf"(?P<{name}>\d+)" if name == "n" else f"(?P<{name}>.*?)"

    pattern = re.sub(r"\\\{\w+\\\}", group, re.escape(template))
    return re.compile(pattern + r"(\nNone of these again:.*)?$", re.DOTALL)


FORMS = {name: form_of(text) for name, text in TEMPLATES.items()}
LISTS = [name for name, text in TEMPLATES.items() if text.endswith(LIBRARY["list_ending"])]


class Teacher(ThreadingHTTPServer):
    """Answers each of the pipeline's prompts, a function of the request alone, with what models
    do wrong: lists in many shapes, too short or none, endless answers, wrong ones, biased verdicts,
    busy signals."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, delay=0.0, busy=0.05):
        super().__init__(("127.0.0.1", 0), Handler)
        self.delay, self.busy, self.calls, self.refused = delay, busy, Counter(), set()
        self.lock, self.under_way, self.most = threading.Lock(), 0, 0
        self.odd = {"PLEASE REFUSE": (400, {"error": {"message": "refused"}})}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def reply(self, body):
        text = body["messages"][-1]["content"]
        rng = random.Random(json.dumps(body, sort_keys=True))
        for name, form in FORMS.items():
            if found := form.match(text):
                with self.lock:
                    self.calls[name] += 1
                return self.write(name, found, rng)
        with self.lock:
            self.calls["chat"] += 1
        if "answer again" in text:
            return "no commas here, said again", "stop"
        if "7 crates" in text:
            return rng.choice(("7 crates hold 84 jars.", "I think it is 74.")), "stop"
        if "double(x)" in text:
            op = rng.choice(("x * 2", "x ** 2"))
            return f"```python\ndef double(x):\n    return {op}\n```", "stop"
        return some_words(rng, 12), "length" if rng.random() < 0.1 else "stop"

    def write(self, name, found, rng):
        if name in LISTS:
            n = int(found["n"]) - (rng.random() < 0.2)
            items = [some_words(rng, 9) + "?" for _ in range(n)]
            shape = rng.randrange(4)
            if shape == 0:
                return "Sure! Here they are:\n\n" + "\n".join(
                    f"{i}. {x}" for i, x in enumerate(items, 1)
                ), "stop"
            if shape == 1:
                return "\n".join(f"- **{x}**" for x in items), "stop"
            if shape == 2:
                return "```json\n" + json.dumps(items) + "\n```", "stop"
            return "\n\n".join(f"{i}) {x}" for i, x in enumerate(items, 1)), "stop"
        if name == "list":
            return found["text"], "stop"
        if name.startswith("user"):
            return f"User: Thank you for that! {some_words(rng, 7)}?", "stop"
        if name.endswith(("entity", "fitness")):
            return ("Yes, it is." if rng.random() < 0.7 else "No."), "stop"
        if name == "solve":
            return rng.choice(("```python\nprint(1)\n```", "```python\nprint(1\n```")), "stop"
        if name == "rate":
            low = len(found["history"]) % 4 == 0
            return "\n".join(
                f"{a}: {1 if low else 4 - i % 2}" for i, a in enumerate(data.ATTRIBUTES)
            ), "stop"
        if name == "judge":  # prefers the longer one, or, now and then, the first
            if (len(found["a"]) + len(found["b"])) % 5 == 0:
                return "[[A]]", "stop"
            return ("[[A]]" if len(found["a"]) > len(found["b"]) else "[[B]]"), "stop"
        return some_words(rng, 12), "stop"


def some_words(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(n)).capitalize()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        teacher, key = self.server, hashlib.sha256(raw).hexdigest()
        with teacher.lock:
            teacher.under_way += 1
            teacher.most = max(teacher.most, teacher.under_way)
            busy = int(key, 16) % 1000 < 1000 * teacher.busy and key not in teacher.refused
            teacher.refused.add(key)
        time.sleep(teacher.delay * (int(key, 16) % 7))
        try:
            body = json.loads(raw)
            for words, (status, answer) in teacher.odd.items():
                if words in raw.decode():
                    return self.answer(status, answer)
            if busy:
                return self.answer(429 if int(key, 16) % 2 else 503, {"error": {"message": "busy"}})
            text, reason = teacher.reply(body)
            choice = {
                "index": 0,
                "finish_reason": reason,
                "message": {"role": "assistant", "content": text},
            }
            used = {"prompt_tokens": len(raw), "completion_tokens": len(text), "total_tokens": 0}
            self.answer(
                200,
                {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": [choice],
                    "usage": used,
                },
            )
        finally:
            with teacher.lock:
                teacher.under_way -= 1

    def answer(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status in (429, 503):
            self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(scope="module")
def teacher():
    server = Teacher()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def nano(tmp_path_factory, corpus):
    """A language model of nano's shape and a reward model, untrained, as folders."""
    folders, tokenizer = [], data.TokenData(corpus).tokenizer()
    for n, name in ((0, "nano"), (5, "judge")):
        folders.append(tmp_path_factory.mktemp(name))
        cfg = replace(SHAPES["nano"], vocab_size=512, seq_len=2048, n_attributes=n)
        model = Nemotron(cfg)
        init_weights(model, n)
        save_hf(model, folders[-1])
        tokenizer.save(folders[-1])
    return folders


def config(teacher, out, **more):
    more.setdefault("min_helpfulness", 2.0)
    how = dict(endpoint=(teacher.url,)) | more
    return SynthesizeConfig(model=Path("teacher"), out=out, **how)


class Says:
    """A backend that says what a test wants: a function of the last message."""

    name, rates = "says", False

    def __init__(self, reply):
        self.reply = reply

    def answers(self, work):
        for messages, _ in work:
            said = self.reply(messages[-1]["content"])
            yield said if isinstance(said, Reply) else Reply(said)


def said_by(reply, teacher, out, **more):
    p = Pipeline(config(teacher, out, **more))
    p.model = Says(reply)
    p.answerers = [p.model]
    return p


def question(text, **more):
    return prompt("given", text, **more)


def contents(folder):
    files = [*sorted(folder.glob("*.jsonl")), *sorted(folder.glob("records/*.jsonl"))]
    return {str(f.relative_to(folder)): f.read_bytes() for f in [*files, folder / "manifest.json"]}


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def made(teacher, tmp_path_factory):
    """The demo recipe, uninterrupted."""
    return synthesize(config(teacher, tmp_path_factory.mktemp("made")))


def test_every_stage_runs_and_every_file_loads_in_align(made, corpus):
    stages = {f.stem for f in made.glob("records/*.jsonl")}
    assert stages >= {
        "macro_topics", "subtopics", "questions", "refine_question", "writing", "refine_writing",
        "closed", "math_topics", "math_subtopics", "math_entity", "math_problems",
        "python_topics", "python_subtopics", "python_entity", "python_easy", "first_answers",
        "two_turn_assistant", "two_turn_user", "rules", "on_topic", "distractor", "incapable",
        "dialogue_assistant", "dialogue_user", "responses", "response_ratings", "dialogue_ratings",
        "solve", "fitness",
    }  # fmt: skip
    tokenizer = data.TokenData(corpus).tokenizer()
    manifest = json.loads((made / "manifest.json").read_text())
    for name, info in manifest["files"].items():
        content = (made / f"{name}.jsonl").read_bytes()
        assert hashlib.sha256(content).hexdigest() == info["sha256"]
        if name == "dropped":
            continue
        assert info["rows"], name
        path, n = made / f"{name}.jsonl", 1 << 16
        if "sft" in name:
            read, _ = data.sft_rows(path, tokenizer, n)
        elif "reward" in name:
            read, _ = data.reward_rows(path, tokenizer, n)
        elif name == "ranked":
            read = rows(made, name)  # the next test trains on them
        else:
            read, _ = data.preference_rows(path, tokenizer, n, rewards="rpo" in name)
        assert len(read) == info["rows"]
    report = (made / "report.md").read_text()
    assert "unfinished" in report and (made / "histograms.png").stat().st_size > 1000


def test_all_rated_answers_of_a_prompt_are_a_row_with_the_pairs_ends(made):
    rated = {}
    for row in rows(made, "reward"):
        *asked, answer = row["messages"]
        reward = float(data.aggregate(row["label"]))
        rated.setdefault(json.dumps(asked), {})[answer["content"]] = reward
    ranked = {json.dumps(row["messages"]): row for row in rows(made, "ranked")}
    for pair in rows(made, "rpo"):
        asked = json.dumps(pair["messages"])
        ends = [pair["rejected_reward"], pair["chosen_reward"]]
        rewards = sorted(rated[asked].values())
        assert (asked in ranked) == (ends == [rewards[0], rewards[-1]])
        if asked in ranked:
            row = ranked.pop(asked)
            assert dict(zip(row["responses"], row["rewards"], strict=True)) == rated[asked]
            assert row["parents"] == pair["parents"] and "chosen" not in row
    assert not ranked


def test_a_rerun_asks_nothing_and_changes_nothing(made, teacher):
    before, calls = contents(made), sum(teacher.calls.values())
    synthesize(config(teacher, made))
    assert contents(made) == before and sum(teacher.calls.values()) == calls


@pytest.mark.parametrize("concurrency", [pytest.param(1, marks=pytest.mark.slow), 32])
def test_the_output_does_not_depend_on_concurrency(made, teacher, tmp_path, concurrency):
    out = synthesize(config(teacher, tmp_path / "other", concurrency=concurrency))
    assert contents(out) == contents(made)


def run_killed(cfg):
    synthesize(cfg)


@pytest.mark.slow
def test_ten_kills_leave_the_same_bytes(made, tmp_path):
    slow, rng = Teacher(delay=0.004), random.Random(0)
    cfg, kills, grown = config(slow, tmp_path / "killed"), 0, set()
    while kills < 10:
        child = SERVER.Process(target=run_killed, args=(cfg,))
        child.start()
        size = sum(f.stat().st_size for f in cfg.out.glob("records/*.jsonl"))
        while child.is_alive() and sum(
            f.stat().st_size for f in cfg.out.glob("records/*.jsonl")
        ) < size + rng.randrange(1, 9000):
            time.sleep(0.001)
        child.kill()
        child.join()
        kills += 1
        grown.add(sum(f.stat().st_size for f in cfg.out.glob("records/*.jsonl")))
        if kills % 3 == 0:  # a line that a kill cut in two
            file = rng.choice([*cfg.out.glob("records/*.jsonl")])
            file.write_bytes(file.read_bytes()[: -rng.randrange(1, 40)])
    assert len(grown) > 5
    synthesize(cfg)
    assert contents(cfg.out) == contents(made)
    slow.shutdown()
    slow.server_close()


def test_no_prompt_comes_twice_and_few_calls_mend_lists(made):
    """The peers' topic list doubled itself, and half of their calls reformatted lists."""
    records = [json.loads(line) for f in made.glob("records/*.jsonl") for line in f.open()]
    assert len({r["id"] for r in records}) == len(records)
    assert sum(r["stage"] == "list" for r in records) < 0.02 * len(records)
    given = [r["messages"] for f in ("sft", "preference") for r in rows(made, f)]
    firsts = [next(m["content"] for m in chat if m["role"] == "user") for chat in given]
    assert len({*firsts}) >= len(firsts) - 6  # instructions may return to a question
    words = [r for r in records if r["stage"] in ("python_easy", "python_medium", "python_hard")]
    topics = [re.search("about '(.*?)'", r["messages"][0]["content"])[1] for r in words]
    asked = {(r["template"], t) for r, t in zip(words, topics, strict=True)}
    assert len({t for _, t in asked}) == len(asked)  # each notion in one grade


def test_chosen_and_rejected_are_never_a_tie(made):
    for row in rows(made, "rpo"):
        assert row["chosen"] != row["rejected"]
        assert row["chosen_reward"] > row["rejected_reward"]
    assert any(row["reason"] == "tie" for row in rows(made, "dropped"))


def test_ground_truth_decides_where_there_is_one(made, teacher, tmp_path):
    """A number, and unit tests that are run."""
    prompts = tmp_path / "own.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in LIBRARY["truths"]))
    how = dict(recipe="prompts", prompts=(prompts,), counts=dict(samples=8, preference_share=1))
    out = synthesize(config(teacher, tmp_path / "out", **how))
    found = {row["messages"][0]["content"]: row for row in rows(out, "preference")}
    jars = found["A crate holds 12 jars. How many jars are in 7 crates?"]
    assert "84" in jars["chosen"] and "74" in jars["rejected"] and jars["judge"] == "truth"
    double = next(row for text, row in found.items() if "double" in text)
    assert "x * 2" in double["chosen"] and "x ** 2" in double["rejected"]


def test_every_dropped_row_says_why_and_by_what_evidence(teacher, tmp_path):
    shared = "the quick brown fox jumps over the lazy dog and then runs away home"
    own = [f"Explain why {shared}.", f"Explain why {shared}!", "Say <extra_id_1> twice.",
           "PLEASE REFUSE this one.", "What is the capital of France today?"]  # fmt: skip
    bench = f"Once {shared} for good."
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in own))
    (tmp_path / "bench.jsonl").write_text(json.dumps({"question": bench}) + "\n")
    cfg = config(
        teacher, tmp_path / "out", recipe="prompts", prompts=(tmp_path / "own.jsonl",),
        evaluations=(tmp_path / "bench.jsonl",), counts=dict(preference_share=1),
    )  # fmt: skip
    synthesize(cfg)
    found = {row["reason"]: row for row in rows(cfg.out, "dropped")}
    assert "bench.jsonl:1" in found["contaminated"]["evidence"]
    assert own[0] in found["duplicate"]["evidence"]
    assert found["has a marker"]["evidence"] == "<extra_id_1>"
    assert found["refused"]["evidence"].startswith("refused")


def test_evaluation_texts_too_short_to_be_found_are_counted_in_manifest_and_report(
    teacher, tmp_path
):
    prompts, bench = tmp_path / "own.jsonl", tmp_path / "bench.jsonl"
    prompts.write_text('{"prompt": "What is the capital of France today?"}\n')
    bench.write_text('{"question": "Is it so?", "answers": ["Yes", "No, four words long"]}\n')
    how = dict(recipe="prompts", prompts=(prompts,), evaluations=(bench,))
    out = synthesize(config(teacher, tmp_path / "out", **how))
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert counts["evaluation texts too short to find"] == 2  # three words, one word
    assert "| evaluation texts too short to find | 2 |" in (out / "report.md").read_text()


def test_a_busy_endpoint_is_asked_again_and_never_by_more_than_allowed(tmp_path):
    busy = Teacher(delay=0.001, busy=0.5)
    synthesize(config(busy, tmp_path / "out", concurrency=3))
    assert busy.most <= 3 and len(busy.refused) > 100
    busy.shutdown()
    busy.server_close()


def test_a_dead_endpoint_keeps_what_was_there(made, teacher, tmp_path):
    dying = Teacher()
    cfg = config(dying, tmp_path / "out", retries=0)
    threading.Timer(0.7, dying.shutdown).start()
    dying.busy = 0
    threading.Timer(0.7, dying.server_close).start()
    dying.delay = 0.003
    with pytest.raises(ValueError, match="the same command goes on from here"):
        synthesize(cfg)
    assert any(cfg.out.glob("records/*.jsonl"))
    assert contents(synthesize(replace(cfg, endpoint=(teacher.url,), retries=6))) == contents(made)


def test_endpoints_share_the_work_and_one_that_dies_leaves_its_requests_to_the_others(
    teacher, tmp_path, caplog
):
    """The records are those of one endpoint: nothing depends on who answered."""
    teachers = [Teacher(busy=busy) for busy in (0.0, 0.3, 0.0)]
    dying = teachers[2]
    answer = dying.reply

    def answer_some(body):
        if sum(dying.calls.values()) == 20:
            dying.server_close()
            raise ConnectionAbortedError  # this request, too, is lost
        return answer(body)

    dying.reply = answer_some
    dying.handle_error = lambda *_: None
    urls = tuple(teacher.url for teacher in teachers)
    data.log.addHandler(caplog.handler)
    asked = [question(f"Hello {i}") for i in range(200)]
    for folder, endpoints in (("one", (teacher.url,)), ("many", urls)):
        Pipeline(config(dying, tmp_path / folder, endpoint=endpoints)).answers("stage", asked)
    data.log.removeHandler(caplog.handler)
    one, many = ((tmp_path / f / "records/stage.jsonl").read_bytes() for f in ("one", "many"))
    assert one == many
    calls = [sum(teacher.calls.values()) for teacher in teachers]
    assert calls[2] == 20 and min(calls[:2]) > 40
    named = [record.getMessage() for record in caplog.records if "others get" in record.message]
    assert urls[2] in named[0] and urls[0] not in "".join(named)
    for teacher in teachers:
        teacher.shutdown()
        teacher.server_close()


def test_when_every_endpoint_fails_the_run_ends_with_the_reason_of_the_last(tmp_path):
    gone = Teacher()
    gone.shutdown()
    gone.server_close()
    urls = (gone.url, gone.url.replace("/v1", "/v2"))
    p = Pipeline(replace(config(gone, tmp_path, retries=0), endpoint=urls))
    with pytest.raises(ValueError, match="Connection refused: the same command goes on"):
        p.answers("stage", [question("Hello")])


@pytest.mark.parametrize(
    "change, what",
    [
        (dict(counts={"question": 3}), "counts 'question'"),
        (dict(counts={"questions": -1}), "-1 is not in 0"),
        (dict(counts={"preference_share": 1.5}), "1.5 is not in 0..1"),
        (dict(counts={"materials": 11}), "11 is not in 0..10"),
        (dict(counts={"turns": float("inf")}), "inf is not in 0"),
        (dict(counts={"turns": float("nan")}), "nan is not in 0"),
        (dict(concurrency=0), "concurrency=0"),
        (dict(min_gap=float("nan")), "min_gap=nan"),
        (dict(min_chosen=float("inf")), "min_chosen=inf"),
        (dict(min_helpfulness=float("nan")), "min_helpfulness=nan"),
        (dict(model=Path("nowhere"), endpoint=()), "a model is a folder"),
        (dict(prompts=(Path("missing.jsonl"),)), "missing.jsonl"),
        (dict(documents=(Path("missing.txt"),)), "missing.txt"),
    ],
)
def test_what_cannot_be_done_is_said(teacher, tmp_path, change, what):
    with pytest.raises((ValueError, OSError), match=what):
        synthesize(replace(config(teacher, tmp_path), **change))


@pytest.mark.parametrize("line, what", [
    ('{"promt": "Hello"}', "no text in field 'prompt'"), ("{", "not JSON"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "has role 'assistant'"),
])  # fmt: skip
def test_a_bad_prompt_is_named_by_file_and_line_before_anything_is_asked(
    teacher, tmp_path, line, what
):
    (tmp_path / "own.jsonl").write_text(f'{{"prompt": "Hello"}}\n{line}\n')
    calls = sum(teacher.calls.values())
    with pytest.raises(ValueError, match=rf"own\.jsonl:2: .*{what}"):
        synthesize(config(teacher, tmp_path / "out", prompts=(tmp_path / "own.jsonl",)))
    assert sum(teacher.calls.values()) == calls


def local(nano, out, **more):
    how = dict(recipe="prompts", counts=dict(turns=1, samples=2), max_tokens=8, min_helpfulness=-9)
    prompts = out.with_suffix(".jsonl")
    prompts.write_text("".join(json.dumps({"prompt": f"{w}, then?"}) + "\n" for w in WORDS[:12]))
    return SynthesizeConfig(
        model=nano[0], reward=str(nano[1]), out=out, prompts=(prompts,), **how | more
    )


def test_a_model_in_this_process_gives_the_same_whatever_its_batch(nano, tmp_path):
    one, many = (synthesize(local(nano, tmp_path / f"{n}", slots=n)) for n in (1, 32))
    assert len(rows(one, "reward")) + len(rows(one, "dropped")) > 12
    for name in ("sft", "preference", "rpo", "dropped"):
        texts = [[{k: v for k, v in r.items() if k not in ("scores", "evidence", "label")}
                  for r in rows(out, name)] for out in (one, many)]  # fmt: skip
        for a, b in zip(*texts, strict=True):
            for side in ("chosen_reward", "rejected_reward"):
                assert a.pop(side, 0) == pytest.approx(b.pop(side, 0), abs=1e-4)
            assert a == b


def test_two_processes_give_what_one_gives_and_the_first_writes_it(nano, tmp_path, on_ranks):
    cfg = local(nano, tmp_path / "one", judge="text")
    one, two = synthesize(cfg), replace(cfg, out=tmp_path / "two", mesh=generate.Layout(tp=2))
    file = two.out / "records" / "responses.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes((one / "records" / file.name).read_bytes()[:-40])  # a kill cut its last line
    on_ranks(2, synthesize, two)
    for f in one.glob("records/*.jsonl"):
        lines = [[json.loads(x) for x in g.open("rb")] for g in (f, two.out / "records" / f.name)]
        for a, b in zip(*lines, strict=True):
            assert (a["id"], a["text"]) == (b["id"], b["text"]), f.stem


def test_a_teacher_at_an_endpoint_and_models_in_this_process_work_together(teacher, nano, tmp_path):
    """The teacher writes; it and a nano model answer; a reward model rates."""
    both = dict(answerers=("teacher", str(nano[0])), reward=str(nano[1]), max_tokens=40)
    out = synthesize(config(teacher, tmp_path / "out", min_helpfulness=-99.0, **both))
    lines = (out / "records" / "responses.jsonl").read_text().splitlines()
    models = Counter(json.loads(line)["model"] for line in lines)
    assert models["teacher"] == models[backends.identity(nano[0])] > 20
    rated = rows(out, "reward")
    assert len({tuple(row["label"]) for row in rated}) == len({*map(str, rated)}) > 20
    assert len(rows(out, "preference")) >= len(rows(out, "rpo")) > 5
    assert {row["judge"] for row in rows(out, "preference")} <= {"reward", "truth"}


def candidates(*texts):
    return [Candidate(question("Which one?").with_message("assistant", x, "id")) for x in texts]


def margins(p, *texts):
    found = candidates(*texts)
    pipeline.compare(p, [found])
    return [one.margins for one in found]


def test_a_margin_is_negated_when_the_answers_are_swapped(teacher, tmp_path):
    p = Pipeline(config(teacher, tmp_path / "out", judge="text"))
    seen = set()
    for i in range(1, 30):
        (one,), (other,) = margins(p, WORDS[i], WORDS[-i])
        assert margins(p, WORDS[-i], WORDS[i]) == [[other], [one]] == [[-one], [one]]
        seen.add(one)
    assert seen == {-1, 0, 1}


def test_verdicts_count_when_both_orders_agree(teacher, tmp_path):
    p = Pipeline(config(teacher, tmp_path, judge="text"))
    # the teacher prefers the longer, and the first where the lengths sum to a multiple of five
    assert margins(p, "longer text", "text") == margins(p, "text", "longer text") == [[0], [0]]
    assert margins(p, "longer", "text!") == margins(p, "text!", "longer")[::-1] == [[1], [-1]]
    assert p.counts["judge: both orders agree"] == 4 and p.counts["judge: verdicts"] == 8
    assert margins(p, "longer", "text!", "longer!") == [[1, -1], [-1, -1], [1, 1]]
    for text in ("[[A]] or [[B]]", "A", ""):
        assert math.isnan(pipeline.verdict_of(text))
    assert [pipeline.verdict_of(f"[[{x}]] of the two [[{x}]]") for x in "ABC"] == [1, -1, 0]


def test_pleasantries_are_taken_out_of_what_a_played_user_says():
    for said, left in {
        "Thank you for the explanation! What about cats?": "What about cats?",
        "User: Sure, I'd be happy to. Great! why?": "Why?",
        "Hello there, thanks so much! ": "",
        "Great Britain is where?": "Great Britain is where?",
        "Surely not.": "Surely not.",
        '"And then?"': "And then?",
        'Define "entropy"': 'Define "entropy"',
        "Hi-fi systems: which?": "Hi-fi systems: which?",
        "**User:** Great - why (x+1)?": "Why (x+1)?",
        "<<USER>>\nWhy?\n<<ASSISTANT>>\nBecause.": "Why?",
    }.items():
        assert records.clean(said) == left


def test_a_record_is_another_one_for_another_model_seed_or_sampling(teacher, tmp_path):
    seen = set()
    for change in ({}, {"seed": 1}, {"temperature": 0.5}, {"model": Path("other")}):
        p = Pipeline(config(teacher, tmp_path / str(len(seen)), **change) if "model" not in change
                     else replace(config(teacher, tmp_path / "m"), **change))  # fmt: skip
        seen.add(p.ask("stage", [question("Hello")])[0]["id"])
    assert len(seen) == 4


def test_an_odd_answer_is_dropped_and_counted_and_what_is_no_answer_ends_the_run(tmp_path):
    """The run goes on after what it would meet again: what a server refuses, or leaves empty."""
    odd = Teacher(busy=0)

    def says(content, **more):
        choice = {"index": 0, "finish_reason": "stop", "message": {"content": content}, **more}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": None}}

    odd.odd |= {
        "none": (200, {"choices": []}), "null": says(None), "half": says("a \ud83d b"),
        "parts": says([{"type": "text", "text": "x"}]), "long": (413, {"error": "too long"}),
        "filtered": says("", finish_reason="content_filter"),
        "shape": (422, {"error": "shape \ud83d"}),
    }  # fmt: skip
    p = Pipeline(config(odd, tmp_path / "out", retries=0))
    asked = [question(name) for name in odd.odd]
    (chat,) = filter(None, p.answers("stage", asked))
    (answer,) = [
        record for record in p.used.values() if record["finish_reason"] == "stop" and record["text"]
    ]
    assert (chat.text, chat.answer, answer["tokens"]) == ("half", "a ? b", (3, 0))
    reasons = Counter(row["reason"] for row in p.dropped)
    assert reasons == {"no answer": 1, "empty": 2, "refused": 3, "content_filter": 1}
    assert any("413" in row["evidence"] for row in p.dropped)
    again = Pipeline(p.cfg)
    again.answers("stage", asked)
    assert again.used.keys() == p.used.keys() and len(again.used) == len(asked)
    assert again.counts == p.counts and again.model.servers != p.model.servers
    for status, body in ((200, {"detail": "no such route"}), (200, "<html>"), (401, {})):
        odd.odd["again"] = status, body
        with pytest.raises(ValueError, match=rf"{odd.url}: teacher.*goes on from here"):
            p.ask("stage", [question("again")])
    rated = backends.load_backend(p.cfg, "teacher", rates=True)
    with pytest.raises(ValueError, match="gives no log-probabilities of attributes"):
        p.ask("stage", [question("rated")], rated)
    odd.shutdown()
    odd.server_close()


def test_what_does_not_fit_in_the_context_is_dropped_and_counted(nano, tmp_path):
    p = Pipeline(local(nano, tmp_path / "one"))
    long = question(" ".join(WORDS * 30))
    answered = long.with_message("assistant", "x")
    for backend, chat in ((p.model, long), (p.reward, answered)):
        (record,) = p.ask("stage", [chat], backend)
        assert (record["finish_reason"], record["scores"]) == ("too long", {})
    assert p.answers("text", [long]) == [None]
    assert p.counts["text: too long"] == 1
    pairs = [Candidate(long.with_message("assistant", text, "id")) for text in "ab"]
    pipeline.compare(p, [pairs])
    assert [one.margins for one in pairs] == [[0], [0]]
    with pytest.raises(ValueError, match="is a language model, not a reward model"):
        Pipeline(replace(local(nano, tmp_path / "two"), reward=str(nano[0])))


def test_a_list_that_was_cut_loses_its_last_item_and_is_topped_up(teacher, tmp_path):
    def reply(text):
        if "None of these again" in text:
            return "1. three\n2. four"
        return Reply("1. one\n2. two\n3. thr", "length")

    p = said_by(reply, teacher, tmp_path)
    items = pipeline.derive(p, "macro_topics", [pipeline.ROOT], 4)
    assert [i.text for i in items] == ["one", "two", "three", "four"]
    p = said_by(lambda text: Reply("", "refused: Error code: 400"), teacher, tmp_path / "b")
    assert pipeline.derive(p, "macro_topics", [pipeline.ROOT], 4) == []
    assert p.counts["macro_topics: lists too short"] == 1 and not p.known["list"]


def test_an_answer_that_is_no_list_is_rewritten_by_the_model(teacher, tmp_path):
    def reply(text):
        return "1. one\n2. two" if text.endswith("one and two") else "one and two"

    p = said_by(reply, teacher, tmp_path)
    items = pipeline.derive(p, "macro_topics", [pipeline.ROOT], 2)
    assert [i.text for i in items] == ["one", "two"] and len(p.known["list"]) == 1


def test_documents_are_cut_and_each_question_about_one_is_kept(teacher, tmp_path):
    """Two prompts with the same document are not near-duplicates of each other."""
    document = " ".join(WORDS[:50] * 20)
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in [document, document, "short"]))
    p = Pipeline(config(teacher, tmp_path / "out", documents=(file,), counts=dict(documents=9)))
    found = pipeline.documents_of(p)
    texts = [one.text for one in found]
    assert [len(text) for text in texts] == [2000, 5] and p.counts["documents: duplicate"] == 1
    prompts = pipeline.closed_questions(p, found)
    assert len(pipeline.clean_prompts(p, prompts)) == len(prompts) == 4
    assert all(texts[0] in q.messages[0]["content"] for q in prompts[:2])
    assert len(pipeline.clean_prompts(p, [*prompts, prompts[0]])) == 4


def test_what_is_not_rated_is_neither_chosen_nor_rejected(teacher, tmp_path):
    p = Pipeline(config(teacher, tmp_path))
    good, bad = [4.0] * 5, [1.0] * 5

    def answers(*ratings, margins=None, truth=None):
        found = candidates(*[f"it is {i}" for i in range(len(ratings))])
        for i, one in enumerate(found):
            one.rating, one.truth = ratings[i], truth and truth[i]
            one.margins = [margins[i]] if margins else []
        return found

    def chosen(*ratings, **more):
        found = answers(*ratings, **more)
        pair = choose(p, found)
        return pair if isinstance(pair, str) else tuple(found.index(one) for one in pair)

    assert chosen(None, bad, good) == (2, 1)
    assert chosen(None, good) == "not rated"
    assert chosen(good, good) == "tie"
    assert chosen(good) == "fewer than two answers"
    assert chosen(bad, None, good, truth=[True, False, False]) == (0, 1)
    assert p.counts["judge: pairs with a truth"] == 1  # of those that are rated
    assert chosen(good, bad, truth=[False, False]) == "all wrong"
    # rewards are ratings, whoever chose, where they say the same
    asked = question("How many?")
    found = answers(good, bad, margins=[1.0, -1.0])
    assert pipeline.preference_row(p, asked, found)["chosen_reward"] == found[0].reward
    for first in (bad, None):
        found = answers(first, good, margins=[1.0, -1.0])
        row = pipeline.preference_row(p, asked, found)
        assert row["chosen"] == "it is 0" and "chosen_reward" not in row
    assert pipeline.preference_row(p, asked, answers(None, good)) is None
    assert p.dropped[-1]["reason"] == "not rated"


def test_rpo_trains_on_all_rated_answers_of_a_prompt(teacher, corpus, tmp_path):
    p, made = Pipeline(config(teacher, tmp_path)), []
    for ratings in ([2, 4, 1, 3], [1, None, 3], [4, None, 0, 2]):
        found = candidates(*[f"it is {i}" for i in range(len(ratings))])
        for one, rating in zip(found, ratings, strict=True):
            one.rating = None if rating is None else [float(rating)] * 5
        pair = pipeline.preference_row(p, question("How many?"), found)
        made.append(ranked_row(pair, found))
    assert [len(row["rewards"]) for row in made] == [4, 2, 3]
    found[0].rating = [5.0] * 5  # better than what was chosen
    found[0], found[3] = found[3], found[0]
    assert ranked_row(pair, found) is None and ranked_row(None, found) is None
    file = tmp_path / "ranked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    model = replace(SHAPES["nano"], dim=32, head_dim=8, ffn_dim=64, vocab_size=512)
    how = dict(model=model, data=file, out=tmp_path / "run", batch=3, loss="rpo_bwd", beta=0.1)
    how |= dict(tokenizer=str(corpus), mesh=MeshConfig(dtype="fp32"), seq_len=model.seq_len)
    align.align("rpo", align.PreferenceConfig(**how))
    (step,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    gap = np.mean([data.aggregate([3.0] * 5), data.aggregate([2.0] * 5), data.aggregate([4.0] * 5)])
    assert step["pairs"] == 3 and step["reward_gap"] == pytest.approx(gap)
    # KL to a policy that is its reference, which is uniform over a row's answers
    losses = []
    for row in made:
        target = np.exp(row["rewards"]) / np.exp(row["rewards"]).sum()
        losses.append((target * np.log(target * len(target))).sum())
    assert step["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("scope, kept", [("single", 1), ("conversation", 0), ("revision", 1)])
def test_dialogues_obey_their_instruction_where_it_reaches(teacher, tmp_path, scope, kept):
    """The second answer has a comma. The ratings are 4, 1 and 4: 3 on average."""
    answers = {"Why": "because", "And then": "well, this", "And after": "that"}

    def reply(text):
        if text.startswith("You play"):
            return "And after?" if "well, this" in text else "And then?"
        if text.endswith("name: number."):
            value = 1 if text.count("<<ASSISTANT>>") == 2 else 4
            return "\n".join(f"{a} (0-4): {value}.0" for a in data.ATTRIBUTES)
        return answers[text.rstrip("?")]

    p = said_by(reply, teacher, tmp_path, counts=dict(turns=3))
    no_comma = asdict(verify.Instruction("punctuation:no_comma"))
    q = question("Why?", truth={"instructions": [no_comma], "scope": scope})
    made = pipeline.dialogues(p, [q])
    assert len(made) == kept and p.counts["dialogue: false"] == 1 - kept
    assert [row["scores"] for row in made] == [[3.0] * 5] * kept
    p.cfg = replace(p.cfg, min_helpfulness=3.1)
    assert pipeline.dialogues(p, [q]) == []
    assert p.counts["dialogue: not helpful"] == kept
    p.amounts.turns = 0
    assert pipeline.dialogues(p, [q]) == []


def test_the_manifest_says_nothing_of_the_place(teacher, tmp_path):
    outs = []
    for place in "ab":
        (tmp_path / place).mkdir()
        prompts = tmp_path / place / "own.jsonl"
        prompts.write_text('{"prompt": "What is the capital of France today?"}\n')
        how = dict(recipe="prompts", prompts=(prompts,), evaluations=(prompts,))
        outs.append(synthesize(config(teacher, tmp_path / place / "out", **how)))
    assert contents(outs[0]) == contents(outs[1])


def test_topics_that_look_like_formulas_or_alike_are_drawn(tmp_path):
    names = ("$\\frac{", "from $5 to $10", "x" * 30 + "1", "x" * 30 + "2")
    assert report.draw_histograms(tmp_path / "a.png", {"prompts": []}, Counter(names))
    assert report.draw_histograms(tmp_path / "b.png", {"prompts": [3, 4]}, Counter())


def with_templates(path, text):
    path.write_text(text)
    return SynthesizeConfig(templates=(path,), recipe="report")


def test_a_file_of_templates_replaces_the_keys_that_it_has(teacher, tmp_path):
    """What it does not have, and ids of records of other templates, stay as they are."""
    own = """list_ending = " Answer with a numbered list."
    personas = ["Say what a user says after {history}."]
    [seeds]
    materials = ["ode {}"]
    [lists]
    questions = "Ask {n} things about {topic}, say {{x}}."
    [amounts]
    questions = { report = 3 }
    materials = { report = 1 }
    """
    cfg = with_templates(tmp_path / "own.toml", own)
    library = load_library(cfg.templates)
    templates = library["templates"]
    assert (
        templates["questions"]
        .format(n=2, topic="cats")
        .startswith("Ask 2 things about cats, say {x}. A")
    )
    assert templates["closed"] == LIBRARY["lists"]["closed"] + library["list_ending"]
    assert [name for name in templates if name.startswith("user_")] == ["user_0"]
    assert library["materials"] == ["ode {}"] and library["truths"] == LIBRARY["truths"]
    assert (cfg.amounts().questions, cfg.amounts().subtopics) == (3, 24)
    assert replace(cfg, counts=dict(questions=7.0)).amounts().questions == 7
    out = synthesize(config(teacher, tmp_path / "out", recipe="prompts", templates=cfg.templates))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["config"]["templates"][0].startswith("own.toml ")


@pytest.mark.parametrize("text, what", [
    ("[lists]\nqestions = 'x'", r"lists.*'qestions'.*questions"),
    ("[list]\nquestions = 'x'", r"no key 'list'"),
    ("[lists]\nquestions = 'Ask {n} things.'", r"lists\.questions.*\{topic\}"),
    ("[lists]\nquestions = 'Ask {n} things about {topc} {topic}.'", r"lists\.questions.*\{topc\}"),
    ("[prompts]\nrate = 'Rate {history}: {'", r"prompts\.rate.*\{\{"),
    ("[prompts]\nrate = 5", r"prompts\.rate.*5.*str"),
    ("personas = ['Say something.']", r"personas\[0\].*\{history\}"),
    ("joins = []", r"joins.*list"),
    ("[amounts.questions]\ndemo = 'many'", r"amounts\.questions\.demo.*'many'.*int"),
    ("[amounts.questions]\ndemon = 3", r"amounts\.questions.*'demon'.*demo"),
    ("[seeds]\nmaterials = ['x', 5]", r"seeds\.materials\[1\].*5"),
    ("[seeds]\ntruths = [{promt = 'x'}]", r"seeds\.truths.*'prompt'"),
    ("[seeds]\ntruths = ['x']", r"seeds\.truths.*"),
    ("list_ending = 'Make {k}.'", r"list_ending.*\{k\}"),
    ("x", "line 1|end of document"),
])  # fmt: skip
def test_what_is_wrong_with_a_file_of_templates_is_named(teacher, tmp_path, text, what):
    calls = sum(teacher.calls.values())
    with pytest.raises(ValueError, match=rf"own\.toml.*{what}"):
        synthesize(
            replace(
                with_templates(tmp_path / "own.toml", text),
                model=Path("teacher"),
                endpoint=(teacher.url,),
                out=tmp_path / "out",
                recipe="demo",
            )
        )
    assert sum(teacher.calls.values()) == calls


def test_other_weights_have_another_identity(tmp_path):
    names = set()
    for tail in (b"1", b"2"):  # with the same embedding before them
        (tmp_path / "model.safetensors").write_bytes(bytes(4 << 20) + tail * (4 << 20))
        names.add(backends.identity(tmp_path))
    assert len(names) == 2


def test_a_runs_identity_depends_on_its_tensors_alone(tmp_path):
    part = tmp_path / "checkpoints" / "step_000001" / "part_0000"
    part.mkdir(parents=True)
    names = []
    for tensors, metadata in ((1, 1), (1, 2), (2, 2)):  # DCP's metadata differ from save to save
        (part / "__0_0.distcp").write_bytes(bytes([tensors]) * 100)
        (part / ".metadata").write_bytes(bytes([metadata]) * 100)
        names.append(backends.identity(tmp_path))
    assert names[0] == names[1] != names[2]


def test_the_referee_marks_a_model_by_held_out_prompts_once(nano, tmp_path):
    own = local(nano, tmp_path / "own")
    (tmp_path / "long.jsonl").write_text(
        own.prompts[0].read_text() + json.dumps({"prompt": " ".join(WORDS * 30)}) + "\n"
    )
    how = dict(bases=("base",), data=own, out=tmp_path, held_out=tmp_path / "long.jsonl")
    marks = [score_of(IterateConfig(**how), nano[0]) for _ in range(2)]
    assert marks[0] == marks[1] and [*marks[0]] == ["reward"]
    records = (tmp_path / "marks/records/held_out.jsonl").read_bytes().splitlines()
    assert len(records) == 13 and json.loads(records[-1])["finish_reason"] == "too long"
    with pytest.raises(ValueError, match="name the referee"):
        IterateConfig(**how | dict(data=replace(own, reward="")))


# ---- what an endpoint, a second process, a signal or a damaged file may do -----------------------


def test_a_server_that_refuses_the_form_of_requests_ends_the_run_in_its_own_words(tmp_path):
    """Nothing of it is a record, so the next run asks again."""
    strict = Teacher(busy=0)
    p = Pipeline(config(strict, tmp_path, retries=0))
    asked = [question(f"Hello {i}") for i in range(9)]
    for status in (400, 401, 403, 404, 422):
        strict.odd = {"temperature": (status, {"error": {"message": "no temperature here"}})}
        with pytest.raises(ValueError, match="no temperature here.*goes on from here"):
            p.answers("stage", asked)
        assert not [*tmp_path.glob("records/*.jsonl")]
    strict.odd = {"PLEASE REFUSE": (400, {"error": {"message": "refused"}})}
    asked = [question(f"PLEASE REFUSE {i}") for i in range(40)] + asked
    assert sum(chat is not None for chat in p.answers("stage", asked)) >= 5
    assert p.counts["stage: refused"] == 40  # what is said is refused, however often
    lines = (tmp_path / "records" / "stage.jsonl").read_text().splitlines()
    assert len(lines) == len(asked)
    strict.shutdown()
    strict.server_close()


def test_the_token_limit_has_the_name_that_the_server_asks_for(made, tmp_path):
    newer = Teacher(busy=0)
    newer.odd = {'"max_tokens"': (400, {"error": {"message": "use 'max_completion_tokens'"}})}
    p = Pipeline(config(newer, tmp_path, retries=0, concurrency=1))
    (record,) = p.ask("stage", [question("Hello")])
    assert record["text"] and record["sampling"]["max_tokens"] == 1024
    newer.shutdown()
    newer.server_close()


@pytest.mark.parametrize("url", ["not-a-url", "localhost:8000/v1", "ftp://x/v1", "http://"])
def test_an_endpoint_that_is_no_url_is_refused_before_anything_is_asked(tmp_path, url):
    with pytest.raises(ValueError, match="a URL such as http"):
        Pipeline(SynthesizeConfig(model=Path("x"), endpoint=(url,), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_record_is_named_left_out_and_asked_for_again(teacher, tmp_path, caplog):
    asked = [question(f"Hello {i}") for i in range(60)]
    p = Pipeline(config(teacher, tmp_path))
    before = p.ask("stage", asked)
    file = tmp_path / "records" / "stage.jsonl"
    whole = file.read_bytes().splitlines()
    rng = random.Random(0)
    harm = [
        lambda line: line[: rng.randrange(1, len(line))],
        lambda line: bytes(len(line)),
        lambda line: b"\xff" + line,
        lambda line: b"[" * 100_000,
        lambda line: b"[1]",
        lambda line: json.dumps({**json.loads(line), "text": None}).encode(),
        lambda line: json.dumps({**json.loads(line), "id": [1]}).encode(),
        lambda line: json.dumps({**json.loads(line), "messages": None}).encode(),
    ]
    lines = [rng.choice(harm)(line) if i % 3 == 0 else line for i, line in enumerate(whole)]
    file.write_bytes(b"\n".join(lines) + b"\n")
    data.log.addHandler(caplog.handler)
    calls = sum(teacher.calls.values())
    again = Pipeline(p.cfg)
    assert json.dumps(again.ask("stage", asked)) == json.dumps(before)
    assert sum(teacher.calls.values()) == calls + 20
    named = dict.fromkeys(record.getMessage() for record in caplog.records)
    data.log.removeHandler(caplog.handler)
    assert [re.search(r"stage\.jsonl:(\d+): ", text)[1] for text in named] == [
        str(n) for n in range(1, 61, 3)
    ]


def started(teacher, out, *more):
    command = [sys.executable, "-m", "recipes.synthesize", "--endpoint", teacher.url]
    command += ["--model", "teacher", "--min-helpfulness", "2", "--out", str(out), *more]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def wait_for_more(out, process, before):
    while process.poll() is None and len([*out.glob("records/*.jsonl")]) <= before:
        time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_with_one_folder_are_refused_and_a_signal_ends_one_that_goes_on(
    made, tmp_path
):
    slow = Teacher(delay=0.02)
    for number in (signal.SIGTERM, signal.SIGINT):
        before = len([*tmp_path.glob("records/*.jsonl")])
        first = started(slow, tmp_path)
        wait_for_more(tmp_path, first, before)
        if number == signal.SIGTERM:
            with pytest.raises(ValueError, match=f"process {first.pid} .*writes into it"):
                synthesize(config(slow, tmp_path))
        first.send_signal(number)
        said = first.communicate(timeout=30)[1]
        assert first.returncode == 130
        assert f"stopped by {number.name}: the same command goes on" in said, said[-2000:]
        assert "Traceback" not in said
    slow.delay = 0
    assert contents(synthesize(config(slow, tmp_path))) == contents(made)
    slow.shutdown()
    slow.server_close()


def test_a_program_at_the_edge_of_its_time_limit_keeps_its_verdict(teacher, tmp_path, monkeypatch):
    verdicts = iter([True, False])
    ran = lambda program: verify.Ran(ok := next(verdicts), "ok" if ok else "timeout", "")  # noqa: E731
    monkeypatch.setattr(verify, "run_python", ran)
    cfg = config(teacher, tmp_path)
    assert [pipeline.passes(Pipeline(cfg), "print(1)") for _ in range(3)] == [True] * 3
    assert not pipeline.passes(Pipeline(cfg), "print(2)")


def test_no_row_at_all_is_said_with_its_cause(teacher, tmp_path):
    cfg = config(teacher, tmp_path / "none", recipe="prompts")
    with pytest.raises(ValueError, match="no row: there is no prompt: name files by --prompts"):
        pipeline.main(cfg)
    prompts = tmp_path / "own.jsonl"
    prompts.write_text('{"prompt": "PLEASE REFUSE this"}\n')
    with pytest.raises(ValueError, match=r"no row: 1 x .*refused"):
        pipeline.main(replace(cfg, out=tmp_path / "some", prompts=(prompts,)))


def odd_value(rng, depth):
    """Draw a value that JSON has, as people would not write it."""
    if depth and rng.random() < 0.5:
        some = [odd_value(rng, depth - 1) for _ in range(rng.randrange(3))]
        return some if rng.random() < 0.5 else dict(zip(("role", "content"), some, strict=False))
    return rng.choice(
        ["", "a", "user", "system", None, 0, -1.5, True, [], {}, "\x00", "<extra_id_1>"]
    )


def test_any_row_is_a_prompt_or_an_error_that_names_file_and_line():
    rng = random.Random(0)
    counts = Counter()
    for _ in range(10_000):
        row = {}
        for name in ("prompt", "messages", "answer", "tests"):
            if rng.random() < 0.5:
                row[name] = odd_value(rng, 4)
        if rng.random() < 0.2:
            row["messages"] = [
                {"role": rng.choice(("user", "system")), "content": odd_value(rng, 1)}
            ]
        try:
            assert pipeline.given_prompt("f:1", row).messages[-1]["role"] == "user"
            counts["read"] += 1
        except ValueError as e:
            assert str(e).startswith("f:1: ") and "\n" not in str(e)
            counts["refused"] += 1
    assert min(counts.values()) > 100


@pytest.mark.parametrize("depth", [50, 900, 3000, 100_000])
def test_a_prompt_nested_too_deep_is_named_by_file_and_line(teacher, tmp_path, depth):
    deep = "[" * depth + "]" * depth
    for field in ("prompt", "messages"):
        (tmp_path / "own.jsonl").write_text(f'{{"prompt": "x"}}\n{{"{field}": {deep}}}\n')
        with pytest.raises(ValueError, match=r"own\.jsonl:2: ") as error:
            synthesize(config(teacher, tmp_path / "out", prompts=(tmp_path / "own.jsonl",)))
        assert len(str(error.value)) < 1000
    (tmp_path / "own.toml").write_text(f"personas = {deep}\n")
    with pytest.raises(ValueError, match=r"own\.toml"):
        config(teacher, tmp_path / "out", templates=(tmp_path / "own.toml",))
