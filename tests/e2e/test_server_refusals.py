"""What the server refuses and how it says so, and clients that leave; no model computes here."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import elastic_cache
import httpx
import pytest
from elastic_cache.errors import NonFiniteLogitsError
from elastic_cache.models.weights import Model
from elastic_cache.server import ServerOptions, create_app
from elastic_cache.server.log import JsonFormatter
from elastic_cache.service import QueueFullError, ServiceClosedError
from fake_service import TEXT as ANSWER
from fake_service import FakeService
from serving import CHAT, MESSAGES, TEXT, chunks, raw_request, running, wait_until

MAX_BODY, MAX_PROMPT = 20_000, 60


class Live:
    """A running server with a fake service, and the lines of its log."""

    def __init__(
        self,
        http: httpx.Client,
        url: str,
        service: FakeService,
        model: Model,
        log: list[dict[str, Any]],
    ) -> None:
        self.http, self.url, self.service, self.model, self.log = http, url, service, model, log

    def post(self, path: str = CHAT, **body: Any) -> httpx.Response:
        return self.http.post(path, json={"messages": MESSAGES, **body})

    def logged(self, response: httpx.Response) -> list[dict[str, Any]]:
        """The lines of a request, the last of which is written after the answer has been sent."""
        request_id = response.headers["x-request-id"]

        def lines() -> list[dict[str, Any]]:
            return [line for line in self.log if line["id"] == request_id]

        wait_until(lambda: any(line["message"] == "request" for line in lines()))
        return lines()


@pytest.fixture(scope="module")
def model() -> Model:
    return elastic_cache.load("tiny").model


@pytest.fixture
def log() -> Iterator[list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []
    formatter, logger = JsonFormatter(), logging.getLogger("elastic_cache.server")

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(formatter.format(record)))

    handler, level = Keep(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[tuple[str, FakeService]]:
    service = FakeService(model.tokenizer)
    options = ServerOptions(max_body=MAX_BODY, max_prompt=MAX_PROMPT)
    with running(create_app(service, model, options)) as url:
        yield url, service


@pytest.fixture
def live(
    server: tuple[str, FakeService], model: Model, log: list[dict[str, Any]]
) -> Iterator[Live]:
    url, service = server
    service.reset()
    with httpx.Client(base_url=url, timeout=20) as http:
        yield Live(http, url, service, model, log)


def refused(
    response: httpx.Response, status: int, *words: str, param: str | None = None, code: Any = ...
) -> None:
    """The response is an error in OpenAI's form that has all the words in its sentence."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    for word in words:
        assert word in error["message"]
    assert "\n" not in error["message"] and "Traceback" not in error["message"]
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    by_status = "server_error" if status >= 500 else "invalid_request_error"
    assert error["type"] == kinds.get(status, by_status)
    assert error["param"] == param
    assert code is ... or error["code"] == code


UNSUPPORTED = [
    dict(n=2),
    dict(n=True),
    dict(tools=[{"type": "function", "function": {"name": "f"}}]),
    dict(tool_choice="auto"),
    dict(parallel_tool_calls=True),
    dict(functions=[{"name": "f"}]),
    dict(function_call="auto"),
    dict(response_format={"type": "json_object"}),
    dict(logprobs=True),
    dict(top_logprobs=2),
    dict(logit_bias={"5": 1}),
    dict(stop=["\n"]),
    dict(stop="x"),
    dict(top_p=0.9),
    dict(frequency_penalty=0.5),
    dict(presence_penalty=-1),
    dict(modalities=["text", "audio"]),
    dict(audio={"voice": "x", "format": "wav"}),
    dict(store=True),
    dict(prediction={"type": "content", "content": "x"}),
    dict(reasoning_effort="high"),
    dict(verbosity="low"),
    dict(web_search_options={}),
]


@pytest.mark.parametrize("fields", UNSUPPORTED, ids=lambda fields: next(iter(fields)))
def test_what_cannot_be_honoured_is_refused(live: Live, fields: dict[str, Any]) -> None:
    (name,) = fields
    refused(live.post(**fields), 400, name, param=name, code="unsupported_parameter")
    assert live.service.tickets == []


@pytest.mark.parametrize(
    "fields",
    [dict(best_of=2), dict(echo=True), dict(suffix="x"), dict(logprobs=3), dict(n=3)],
    ids=lambda fields: next(iter(fields)),
)
def test_what_text_completions_cannot_honour(live: Live, fields: dict[str, Any]) -> None:
    (name,) = fields
    response = live.http.post(TEXT, json={"prompt": "Hi", **fields})
    refused(response, 400, name, param=name, code="unsupported_parameter")


def test_values_that_ask_for_nothing_pass(live: Live) -> None:
    neutral = dict(
        n=1, tools=[], tool_choice="none", functions=[], response_format={"type": "text"},
        logprobs=False, top_logprobs=0, logit_bias={}, stop=None, top_p=1.0, frequency_penalty=0.0,
        presence_penalty=0, modalities=["text"], store=False, user="me", metadata={"a": "b"},
        service_tier="auto", seed=None, audio=None, temperature=0,
    )  # fmt: skip
    answer = live.post(**neutral)
    assert answer.json()["choices"][0]["message"]["content"] == ANSWER
    # The answer's message can be sent back as it came.
    again = [*MESSAGES, answer.json()["choices"][0]["message"], {"role": "user", "content": "So?"}]
    assert live.post(messages=again).status_code == 400, "too long for this server's prompts"
    assert live.post(messages=again[1:]).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (dict(wndow=3), "wndow", ["no field wndow", "did you mean window?"]),
        (dict(max_token=3), "max_token", ["did you mean max_tokens?"]),
        (dict(xyzzy=1), "xyzzy", ["no field xyzzy", "docs/serving.md"]),
        (dict(messages=[]), "messages", ["messages"]),
        (dict(messages="Hi"), "messages", ["messages must be a valid list, got 'Hi'"]),
        (dict(messages=[{"role": "user"}]), "messages[0].content", ["is missing"]),
        (dict(messages=[{"role": "tool", "content": "x"}]), "messages[0].role", ["'tool'"]),
        (dict(messages=[{"role": "user", "content": None}]), "messages[0].content", ["None"]),
        (
            dict(messages=[{"role": "user", "content": "x", "nme": "y"}]),
            "messages[0].nme",
            ["did you mean name?"],
        ),
        (
            dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            "messages[0].content",
            ["text only", "'image_url'"],
        ),
        (
            dict(messages=[{"role": "user", "content": [{"type": "text", "text": 3}]}]),
            "messages[0].content",
            ["parts of type and text"],
        ),
        (dict(max_tokens="5"), "max_tokens", ["must be a valid integer, got '5'"]),
        (dict(max_tokens=-1), "max_tokens", ["greater than or equal to 0, got -1"]),
        (dict(max_tokens=4, gen_length=5), "gen_length", ["mean the same"]),
        (dict(policy="fast"), "policy", ["policy must be one of none", "'fast'"]),
        (dict(window=0), "window", ["window must be greater than or equal to 1, got 0"]),
        (dict(window=5000), "window", ["window must be at most 4096, got 5000"]),
        (dict(threshold=1.5), "threshold", ["threshold", "1.5"]),
        (dict(temperature=-1), "temperature", ["temperature", "-1"]),
        (dict(tokens_per_step=2, factor=1.0), "tokens_per_step", ["different commit rules"]),
        (dict(steps=3), "steps", ["steps", "prefix or dual"]),
        (dict(policy="rolling", num_rows=8), "num_rows", ["at least the window"]),
        (dict(seed=2**64), "seed", ["seed"]),
        (dict(deadline=-1), "deadline", ["deadline", "-1"]),
        (dict(max_steps=0), "max_steps", ["max_steps", "got 0"]),
        (dict(priority=1.5), "priority", ["priority", "1.5"]),
        (dict(stream_steps=True), "stream_steps", ["needs stream"]),
        (dict(stream_options={"include_usage": True}), "stream_options", ["needs stream"]),
        (dict(stream=True, stream_options={"x": 1}), "stream_options.x", ["no field"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_wrong_fields(live: Live, fields: dict[str, Any], param: str, words: list[str]) -> None:
    response = live.post(**fields)
    refused(response, 400, *words, param=param)
    assert live.service.tickets == []
    assert [line["outcome"] for line in live.logged(response)] == ["invalid"]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (["a", "b"], ["one prompt a request"]),
        ([[1, 2], [3]], ["one prompt a request"]),
        ([], ["a string or a list of token ids"]),
        ([1, True], ["a string or a list of token ids"]),
        (7, ["a string or a list of token ids, got 7"]),
        ("", ["the prompt is empty"]),
        ("fill <|mdm_mask|> in", ["the mask token as text"]),
        ([10**6], ["between 0 and 767, got 1000000"]),
        ([10**30], ["whole numbers"]),
        ([-1], ["between 0 and 767, got -1"]),
    ],
    ids=str,
)
def test_wrong_prompts(live: Live, prompt: Any, words: list[str]) -> None:
    response = live.http.post(TEXT, json={"prompt": prompt})
    refused(response, 400, *words, param=response.json()["error"]["param"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", ["must be JSON", "at character 1"]),
        (b"", ["must be a JSON object"]),
        (b"[1]", ["must be a JSON object"]),
        (b"\xff\xfe{", ["must be JSON"]),
        (b"[" * 15_000, ["must be JSON"]),
        (b'{"prompt": "a", "seed": ' + b"9" * 6000 + b"}", ["must be JSON"]),
    ],
    ids=["open", "empty", "list", "bytes", "deep", "digits"],
)
def test_malformed_bodies(live: Live, body: bytes, words: list[str]) -> None:
    headers = {"content-type": "application/json"}
    refused(live.http.post(TEXT, content=body, headers=headers), 400, *words)


def test_other_content_types_are_refused(live: Live) -> None:
    """A page of somebody else's can make a browser send text, but not JSON, without asking."""
    body = json.dumps({"prompt": "Hi"})
    response = live.http.post(TEXT, content=body, headers={"content-type": "text/plain"})
    refused(response, 400, "application/json")


def test_wrong_paths_and_methods(live: Live) -> None:
    refused(live.http.get("/v1/embeddings"), 404, "there is nothing at /v1/embeddings")
    response = live.http.get(CHAT)
    refused(response, 405, CHAT, "GET")
    assert response.headers["allow"] == "POST"
    refused(live.http.get("/v1/models/gpt-4"), 404, "'gpt-4'", "'tiny'", param="model")
    refused(live.post(model="gpt-4"), 404, "'gpt-4'", param="model", code="model_not_found")
    assert live.post(model="tiny").status_code == 200


# limits


def test_long_prompts(live: Live) -> None:
    words = ["at most 60 tokens long", "got 61"]
    response = live.http.post(TEXT, json={"prompt": [5] * (MAX_PROMPT + 1)})
    refused(response, 400, *words, code="context_length_exceeded")
    assert live.http.post(TEXT, json={"prompt": [5] * MAX_PROMPT}).status_code == 200
    response = live.http.post(TEXT, json={"prompt": [5], "max_tokens": 4096})
    refused(response, 400, "4097 tokens", "at most 4096", code="context_length_exceeded")


def test_long_bodies(live: Live) -> None:
    body = json.dumps({"prompt": [5], "user": "x" * MAX_BODY}).encode()
    headers = {"content-type": "application/json"}
    refused(live.http.post(TEXT, content=body, headers=headers), 413, f"at most {MAX_BODY} bytes")

    def in_parts() -> Iterator[bytes]:
        yield from (body[i : i + 1000] for i in range(0, len(body), 1000))

    response = live.http.post(TEXT, content=in_parts(), headers=headers)
    assert "content-length" not in response.request.headers
    refused(response, 413, f"at most {MAX_BODY} bytes", code="body_too_large")
    assert live.service.tickets == []
    assert live.post().status_code == 200, "the server goes on"


def test_full_queue_and_closed_service(live: Live) -> None:
    live.service.refusal = QueueFullError("full")
    response = live.post()
    refused(response, 429, "too many requests are waiting", code="queue_full")
    assert int(response.headers["retry-after"]) >= 1
    assert live.logged(response)[0]["outcome"] == "rejected"
    live.service.refusal = ServiceClosedError("closed")
    response = live.post(stream=True)
    refused(response, 503, "shutting down")
    assert "retry-after" in response.headers
    # A request that waited when the service was closed.
    live.service.refusal, live.service.failure = None, ServiceClosedError("closed")
    refused(live.post(stream=True), 503, "shutting down")


def test_api_key(model: Model) -> None:
    service = FakeService(model.tokenizer)
    options = ServerOptions(api_key="clé-1")
    with running(create_app(service, model, options)) as url, httpx.Client(base_url=url) as http:
        for given in ({}, {"authorization": "Bearer cl"}, {"authorization": b"Basic cl\xc3\xa9-1"}):
            response = http.post(CHAT, json={"messages": MESSAGES}, headers=given)
            refused(response, 401, "Authorization: Bearer", code="invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert http.get("/v1/models").status_code == 401
        right = {"authorization": "Bearer clé-1".encode()}
        assert http.get("/v1/models", headers=right).status_code == 200
        for path in ("/", "/health", "/metrics"):
            assert http.get(path).status_code == 200
        assert "clé" not in repr(options)


# failures


def test_failures_of_one_request(live: Live) -> None:
    live.service.failure = NonFiniteLogitsError("the model produced logits that are not finite")
    refused(live.post(), 500, "not finite", code="generation_failed")
    live.service.failure = ValueError("num_rows must be smaller")
    refused(live.post(), 400, "num_rows must be smaller", param="num_rows")


def test_unforeseen_failures_are_logged_and_not_told(live: Live) -> None:
    live.service.fails_at = 1
    response = live.post()
    refused(response, 500, response.headers["x-request-id"], code="internal_error")
    assert "secret" not in response.text
    failure, request = live.logged(response)
    assert "secret of the machine" in failure["traceback"]
    assert (request["outcome"], request["status"]) == ("failed", 500)
    live.service.refusal = RuntimeError("secret of submit")
    response = live.post()
    refused(response, 500, response.headers["x-request-id"], code="internal_error")
    assert "secret of submit" in live.logged(response)[0]["traceback"]


def test_a_stream_that_fails_ends_with_the_error(live: Live) -> None:
    live.service.fails_at = 1
    response = live.post(stream=True)
    assert response.status_code == 200 and "[DONE]" not in response.text
    last = response.text.strip().split("\n\n")[-1].removeprefix("data: ")
    assert json.loads(last)["error"]["code"] == "internal_error"
    assert live.logged(response)[-1]["outcome"] == "failed"


# clients that leave


def head(body: bytes, path: str = CHAT) -> str:
    return (
        f"POST {path} HTTP/1.1\nHost: x\nContent-Type: application/json\n"
        f"Content-Length: {len(body)}\n"
    )


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(live: Live, stream: bool) -> None:
    live.service.holds_at = 1
    body = json.dumps({"messages": MESSAGES, "stream": stream}).encode()
    connection = raw_request(live.url, head(body), body=body)
    if stream:
        assert b"200 OK" in connection.recv(1000)
    wait_until(lambda: live.service.tickets)
    (ticket,) = live.service.tickets
    assert not ticket.is_cancelled.is_set()
    connection.close()
    assert ticket.is_cancelled.wait(5)
    ended = ("cancelled", 200 if stream else 499)
    wait_until(lambda: ended in [(line["outcome"], line["status"]) for line in live.log])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_the_queue(live: Live, stream: bool) -> None:
    live.service.starts.clear()
    body = json.dumps({"messages": MESSAGES, "stream": stream}).encode()
    connection = raw_request(live.url, head(body), body=body)
    wait_until(lambda: live.service.tickets)
    connection.close()
    assert live.service.tickets[0].is_cancelled.wait(5)


def test_encoding_does_not_hold_up_others(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end = threading.Event(), threading.Event()
    encode = live.model.tokenizer.encode

    def slowly(text: str) -> list[int]:
        begun.set()
        assert may_end.wait(20)
        return encode(text)

    monkeypatch.setattr(live.model.tokenizer, "encode", slowly)
    thread = threading.Thread(target=live.post)
    thread.start()
    assert begun.wait(20)
    try:
        assert httpx.get(live.url + "/health", timeout=10).status_code == 200
    finally:
        may_end.set()
        thread.join()


# the rest


def test_options_of_the_service_and_roles(live: Live) -> None:
    messages = [{"role": "developer", "content": "Count."}, *MESSAGES]
    live.post(messages=messages, priority=3, deadline=2.5, max_steps=4)
    (ticket,) = live.service.tickets
    asked = {name: ticket.settings[name] for name in ("priority", "deadline", "max_steps")}
    assert asked == dict(priority=3, deadline=2.5, max_steps=4)
    system = [{"role": "system", "content": "Count."}, *MESSAGES]
    tokenizer = live.model.tokenizer
    assert ticket.prompt.tolist() == tokenizer.encode(tokenizer.render_chat(system))


def test_usage_in_a_stream_only_if_asked(live: Live) -> None:
    assert not any("usage" in chunk for chunk in chunks(live.post(stream=True)))
    *_, last = chunks(live.post(stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 5
    *_, last = chunks(live.post(stream=True, max_steps=2))
    assert last["choices"][0]["finish_reason"] == "length"


def test_a_model_without_tokenizer_is_refused(model: Model) -> None:
    bare = dataclasses.replace(model, tokenizer=None)
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        create_app(FakeService(model.tokenizer), bare, ServerOptions())


def test_infinite_defaults_can_be_read(model: Model) -> None:
    options = ServerOptions(defaults={"gamma": float("inf")})
    app = create_app(FakeService(model.tokenizer), model, options)
    with running(app) as url:
        facts = httpx.get(url + "/v1/models").json()["data"][0]["elastic_cache"]
    assert facts["defaults"]["gamma"] == "inf"
