"""Synthesis against a local endpoint whose answers are good, malformed, slow, cut off, hostile or refused."""

import asyncio
import json
import re
import shutil
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nvembed.train.data.source import DatasetSource
from nvembed.train.data.synthesize import Settings, read_example, read_json, synthesize
from nvembed.train.data.writers import Answer, Answers, Endpoint, LocalModel
from tests import preloaded
from tests.conftest import ROOT
from tests.triplets import prepare


KINDS = ("short-long", "long-short", "short-short")
EXAMPLE = {"user_query": "q {n}", "positive_document": "p {n}", "hard_negative_document": "n {n}"}


def completion(content, finish="stop"):
    return {
        "id": "1", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content}}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }  # fmt: skip


@pytest.fixture
def endpoint():
    """A server; `endpoint.respond(prompt, n)` gives the n-th request's (status, body, seconds to wait)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = request["messages"][0]["content"]
            with lock:
                server.prompts.append(prompt)
                number = len(server.prompts)
            status, body, wait = server.respond(prompt, number)
            time.sleep(wait)
            is_html = isinstance(body, str)
            data = body.encode() if is_html else json.dumps(body).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if is_html else "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status == 429:
                    self.send_header("Retry-After", "0.01")
                self.end_headers()
                self.wfile.write(data)
            except BrokenPipeError:  # the client gave up
                pass

        def log_message(self, *args):
            pass

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.prompts, server.respond = [], good
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def good(prompt, number):
    """Twenty new tasks, or an example for the task in the prompt."""
    if "JSON list" in prompt:
        return 200, completion(json.dumps([f"Given {number}-{i}, find" for i in range(20)])), 0
    task = re.search(r"task: (.*)\n", prompt)[1]
    return 200, completion(json.dumps({name: f"{value[0]} {task}" for name, value in EXAMPLE.items()})), 0


def run(endpoint, folder, tasks=6, settings=(), **options):
    counts = Counter()
    writer = Endpoint(endpoint.url, "m", counts, **({"timeout": 5.0} | options))
    return synthesize(writer, folder, Settings(tasks, KINDS, **dict(settings)), counts, prices=(1.0, 2.0))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_good_answers_become_triplets_that_training_reads(endpoint, tmp_path):
    report = run(endpoint, tmp_path / "out", tasks=7)
    written = rows(tmp_path / "out" / "train.jsonl")
    assert Counter(row["dataset"] for row in written) == {
        "synthetic-short-long": 3, "synthetic-long-short": 2, "synthetic-short-short": 2,
    }  # fmt: skip
    for row in written:
        assert row["query"] == f"q {row['instruction']}"
        assert (row["positive"][0], row["negatives"][0][0]) == ("p", "n")
    assert report["counts"] == {"HTTP 200": 10, "answers asked for": 10, "right answers": 10, "triplets": 7}
    assert report["tokens"] == {"in": 100, "out": 50}
    assert report["dollars"] == pytest.approx((100 + 2 * 50) / 1e6, abs=1e-4)
    triplets = prepare([DatasetSource(str(tmp_path / "out"))], 7, instruction=None)
    assert triplets["instruction"][:] == [row["instruction"] for row in written]
    examples = [prompt for prompt in endpoint.prompts if "JSON object" in prompt]
    assert len({re.sub("Given .*? find", "", prompt) for prompt in examples}) > 4, "the prompts vary"
    assert not any("{" in prompt.split("JSON")[0] for prompt in examples), "everything is filled in"


WRONG = {
    "not JSON alone": completion("Here you are: " + json.dumps(EXAMPLE)),
    "not exactly user_query, positive_document, hard_negative_document": completion(json.dumps({"user_query": "q"})),
    "cut off at max_tokens": completion('{"user_query": "q', finish="length"),
    "empty answer": completion(None),
    "ended by content_filter": completion("no", finish="content_filter"),
    "user_query is empty or no text": completion(json.dumps(EXAMPLE | {"user_query": ["q"]})),
    "two of the texts are the same": completion(json.dumps(EXAMPLE | {"positive_document": "Q {n}!"})),
    "positive_document holds half a character or a NUL": completion(json.dumps(EXAMPLE | {"positive_document": "\0"})),
    "a key is there twice": completion('{"user_query": "a", "user_query": "b"}'),
}


def test_every_kind_of_wrong_answer_is_counted_and_asked_again(endpoint, tmp_path):
    wrong = list(WRONG.values())
    seen = Counter()

    def respond(prompt, number):
        if "JSON list" in prompt:
            return good(prompt, number)
        seen[prompt] += 1
        place = list(seen).index(prompt)
        if seen[prompt] == 1 and place < len(wrong):
            return 200, wrong[place], 0
        return good(prompt, number)

    endpoint.respond = respond
    report = run(endpoint, tmp_path / "out", tasks=12, settings={"concurrency": 1})
    assert report["counts"]["triplets"] == 12
    for reason in WRONG:
        assert report["counts"][f"wrong answer: {reason}"] == 1, reason
    assert rows(tmp_path / "out" / "rejected.jsonl") == []


def test_answers_of_the_wrong_types_are_counted_and_do_not_stop_the_next_run(endpoint, tmp_path):
    odd = [completion(7), completion(["x"]), completion("\ud800"), completion("x") | {"usage": None}]
    odd.append(completion("x") | {"usage": {"prompt_tokens": None}})
    odd.append(completion("x"))
    odd[-1]["choices"][0]["message"] = None

    def respond(prompt, number):
        return good(prompt, number) if "JSON list" in prompt else (200, odd[number % len(odd)], 0)

    endpoint.respond = respond
    report = run(endpoint, tmp_path / "out", tasks=6, settings={"concurrency": 1})
    assert report["counts"]["set aside"] == 6
    assert report["counts"]["wrong answer: another thing than text"] >= 2
    endpoint.respond = good
    assert run(endpoint, tmp_path / "out", tasks=6, settings={"seed": 1})["counts"]["triplets"] == 6


def test_another_setting_asks_again_and_so_does_a_run_after_time_outs(endpoint, tmp_path):
    endpoint.respond = lambda prompt, number: (*good(prompt, number)[:2], 1.0 if "JSON object" in prompt else 0)
    slow = {"timeout": 0.2, "retries": 0, "settings": {"attempts": 1}, "tasks": 3}
    assert run(endpoint, tmp_path / "out", **slow)["counts"]["set aside"] == 3
    endpoint.respond = good
    report = run(endpoint, tmp_path / "out", **(slow | {"timeout": 5.0}))
    assert report["counts"]["triplets"] == report["counts"]["answers asked for"] == 3
    report = run(endpoint, tmp_path / "out", **(slow | {"timeout": 5.0, "temperature": 0.5}))
    assert report["counts"]["answers asked for"] == 6


def test_a_refused_prompt_is_set_aside_and_an_endpoint_that_refuses_all_is_named(endpoint, tmp_path):
    refusal = (400, {"error": {"message": "filtered"}}, 0)
    endpoint.respond = lambda prompt, number: refusal if number == 5 else good(prompt, number)
    report = run(endpoint, tmp_path / "out", settings={"concurrency": 1})
    assert report["counts"]["wrong answer: refused (400)"] == 1
    assert report["counts"]["triplets"] == 6
    endpoint.respond = lambda prompt, number: refusal
    with pytest.raises(ConnectionError, match="refuses every prompt .400.: .*filtered"):
        run(endpoint, tmp_path / "other", settings={"attempts": 9})


def test_a_model_that_only_answers_wrongly_is_not_paid_for_every_task(endpoint, tmp_path):
    endpoint.respond = lambda prompt, number: (
        good(prompt, number) if "JSON list" in prompt else (200, completion("Sure! Here it is:"), 0)
    )
    words = "50 answers of m in a row were wrong, the last because: not JSON alone; see .*answers.jsonl"
    with pytest.raises(ValueError, match=words):
        run(endpoint, tmp_path / "out", tasks=40)
    assert 50 < len(rows(tmp_path / "out" / "answers.jsonl")) < 80, "those on their way are kept"
    endpoint.respond = good
    assert run(endpoint, tmp_path / "out", tasks=40, settings={"attempts": 9})["counts"]["triplets"] == 40


def test_what_gets_no_right_answer_is_set_aside_with_its_reasons(endpoint, tmp_path):
    endpoint.respond = lambda prompt, number: (
        good(prompt, number) if "JSON list" in prompt else (200, completion("__import__('os').system('true')"), 0)
    )
    report = run(endpoint, tmp_path / "out", tasks=3, settings={"attempts": 2})
    assert report["counts"]["wrong answer: not JSON alone"] == 6
    assert report["counts"]["set aside"] == 3
    rejected = rows(tmp_path / "out" / "rejected.jsonl")
    assert [row["reasons"] for row in rejected] == [["not JSON alone"] * 2] * 3
    assert (tmp_path / "out" / "train.jsonl").read_text() == ""


def test_a_model_without_new_ideas_stops_and_repeated_queries_are_dropped(endpoint, tmp_path):
    def respond(prompt, number):
        same = json.dumps(EXAMPLE)
        return 200, completion('["Find it", "find it."]' if "JSON list" in prompt else f"```json\n{same}\n```"), 0

    endpoint.respond = respond
    report = run(endpoint, tmp_path / "out", tasks=30)
    assert report["counts"]["tasks lacking"] == 27
    assert report["counts"]["triplets"] == 1
    assert report["counts"]["repeated queries"] == 2


def test_rate_limits_and_server_errors_are_waited_for(endpoint, tmp_path):
    endpoint.respond = lambda prompt, number: (
        (429, {"error": {"message": "slow down"}}, 0) if number % 3 == 1 else good(prompt, number)
    )
    report = run(endpoint, tmp_path / "out", settings={"concurrency": 2})
    assert report["counts"]["triplets"] == 6
    assert report["counts"]["HTTP 429"] >= 3
    assert report["counts"]["answers asked for"] == 9, "a refused request is no answer"


@pytest.mark.parametrize("is_busy", [False, True])
def test_requests_keep_to_the_rate_asked_for(endpoint, tmp_path, is_busy):
    times = []

    def respond(prompt, number):
        times.append(time.monotonic())
        return (429, {"error": {"message": "slow down"}}, 0) if is_busy and number % 2 else good(prompt, number)

    endpoint.respond = respond
    run(endpoint, tmp_path / "out", requests_per_minute=600)
    assert len(times) > 5
    assert min(times[5:]) - times[0] > 0.4, "a machine may be slower than the rate, and never faster"


def test_slow_answers_time_out(endpoint, tmp_path):
    endpoint.respond = lambda prompt, number: (*good(prompt, number)[:2], 1.0 if "JSON object" in prompt else 0)
    report = run(endpoint, tmp_path / "out", tasks=3, timeout=0.2, retries=0, settings={"attempts": 1})
    assert report["counts"]["timed out"] == report["counts"]["wrong answer: timed out"] == 3


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (429, {"error": {"message": "slow down"}}, "still limits requests after 1 tries \\(429\\).*slow down"),
        (401, {"error": {"message": "bad key"}}, "answered 401 for 'm'.*bad key"),
        (404, {"error": {"message": "no such model"}}, "answered 404 for 'm'"),
        (200, "<html>welcome</html>", "does not answer as an OpenAI-compatible endpoint: '<html>welcome"),
        (200, {"hello": 1}, "does not answer as an OpenAI-compatible endpoint"),
    ],
)
def test_endpoints_that_refuse_or_are_none_are_named(endpoint, tmp_path, status, body, error):
    endpoint.respond = lambda prompt, number: (status, body, 0)
    with pytest.raises(ConnectionError, match=error):
        run(endpoint, tmp_path / "out", retries=1)


def test_an_endpoint_that_is_down_is_named_and_loses_nothing(endpoint, tmp_path):
    counts = Counter()
    with pytest.raises(ConnectionError, match="127.0.0.1:9/v1 cannot be reached: .*; is it running"):
        writer = Endpoint("http://127.0.0.1:9/v1", "m", counts, retries=0)
        synthesize(writer, tmp_path / "out", Settings(3, KINDS), counts)

    def respond(prompt, number):
        return good(prompt, number) if number <= 5 else (500, {"error": {"message": "broken"}}, 0)

    endpoint.respond = respond
    with pytest.raises(ConnectionError, match="answered 500"):
        run(endpoint, tmp_path / "out", retries=0, settings={"concurrency": 1})
    asked = list(endpoint.prompts[:5])
    endpoint.prompts.clear()
    endpoint.respond = lambda prompt, number: good(prompt, number + 100)
    report = run(endpoint, tmp_path / "out")
    assert report["counts"]["answers kept from before"] == 5
    assert len(endpoint.prompts) == report["counts"]["answers asked for"] == 4
    assert not set(asked) & set(endpoint.prompts)


@pytest.mark.slow
def test_a_killed_run_repeats_no_answer(endpoint, tmp_path):
    endpoint.respond = lambda prompt, number: (*good(prompt, number)[:2], 0.02)
    folder = tmp_path / "out"
    command = [ROOT / "train/data/synthesize.py", "--endpoint", endpoint.url, "--model", "m"]
    command += ["--tasks", "60", "--output_dir", folder, "--concurrency", "1"]
    process = preloaded.start(*command)
    deadline = time.monotonic() + 60
    while len(endpoint.prompts) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    kept = len(rows(folder / "answers.jsonl"))
    assert 15 <= kept <= 25
    assert not (folder / "train.jsonl").exists()
    with (folder / "answers.jsonl").open("ab") as file:
        file.write(b'{"key": "cut off')
    before = Counter(endpoint.prompts[:kept])
    endpoint.prompts.clear()
    done = preloaded.run(*command)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["counts"]["answers kept from before"] == kept
    assert report["counts"]["triplets"] == 60
    assert not before & Counter(endpoint.prompts)


def test_answers_that_are_none_are_named(tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"key": "a", "text": "x", "finish": "stop"}\n{"what": 1}\n')
    with pytest.raises(ValueError, match="answers.jsonl:2 is not an answer"):
        Answers(tmp_path / "answers.jsonl")


def test_json_is_read_strictly():
    assert read_json(Answer(' ```json\n{"a": [1]}\n``` ', "stop")) == {"a": [1]}
    for text in ('{"a": NaN}', "{'a': 1}", '{"a": 1} done', "[" * 100_000):
        with pytest.raises(ValueError, match="not JSON alone"):
            read_json(Answer(text, "stop"))
    with pytest.raises(ValueError, match="a key is there twice"):
        read_example(Answer('{"user_query": "a", "user_query": "b"}', "stop"))


def test_a_local_model_answers(decoder_dir, tmp_path):
    with pytest.raises(ValueError, match="has no chat template"):
        LocalModel(str(decoder_dir))
    folder = tmp_path / "chat"
    shutil.copytree(decoder_dir, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}\n")
    model = LocalModel(str(folder), max_tokens=8)
    first, again, other = (asyncio.run(model.answer("Count the words", seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert first.finish == "length" and first.tokens_out == 8
    assert first.text and not first.text.startswith("Count the words"), "the answer alone"
    report = synthesize(model, tmp_path / "out", Settings(3, KINDS, attempts=1), Counter())
    assert report["counts"]["wrong answer: cut off at max_tokens"] > 0
    assert report["counts"]["tasks lacking"] == 3
