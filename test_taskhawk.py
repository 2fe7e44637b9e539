"""The test suite of taskhawk: real queues, real processes, real signals, no sleep that decides.

The classes mirror the rooms of taskhawk.py. SQS and SNS are emulators that the fixtures start;
nothing here needs AWS, credentials, or a network.
"""

import ast
import asyncio
import collections
import concurrent.futures
import contextlib
import contextvars
import copy
import dataclasses
import datetime as dt
import decimal
import errno
import functools
import html
import http.client
import http.server
import importlib
import importlib.metadata
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import pty
import random
import re
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import tokenize
import traceback
import types
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import botocore.exceptions
import botocore.session
import flask
import hypothesis
import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import taskhawk
from taskhawk import Depth, Message, Outgoing, Priority, QueueMessage

PROJECT = (
    Path(__file__).resolve().parent
)  # README.md and the rest lie next to this file
SETTINGS = ("DJANGO_SETTINGS_MODULE", "IS_LAMBDA_APP", "SETTINGS_MODULE")
SETTINGS_PREFIXES = ("AWS_", "TASKHAWK_")
CREDENTIALS = {
    "region_name": "us-east-1",
    "aws_access_key_id": "test",
    "aws_secret_access_key": "test",
}

hypothesis.settings.register_profile(
    "taskhawk", deadline=None
)  # a slow machine is no failure
hypothesis.settings.load_profile("taskhawk")


# --- servers, fixtures and helpers of several rooms -----------------------------------


def project_file(name: str) -> Path:
    """Return the path of one of the project's files, such as README.md."""
    return PROJECT / name


def run_python(
    code_or_args: str | Sequence[str],
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Run code (a string) or arguments (a list) in a new interpreter; env adds to os.environ."""
    args = ["-c", code_or_args] if isinstance(code_or_args, str) else code_or_args
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=python_env(env),
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def python_env(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment in which a new interpreter imports the taskhawk tested here."""
    merged = {**os.environ, **(env or {})}
    if (
        PROJECT / "taskhawk.py"
    ).exists():  # a checkout; an installed wheel is found anyway
        paths = [str(PROJECT), merged.get("PYTHONPATH", "")]
        merged["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return merged


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def answers(port: int) -> bool:
    """Tell whether an HTTP server answers on that port."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    else:
        return True
    finally:
        connection.close()


@contextlib.contextmanager
def server(
    port: int, args: Sequence[str], env: Mapping[str, str], cwd: Path
) -> Iterator[str]:
    """Run a Python HTTP server on that port for the length of the block, and yield its URL."""
    # An emulator is neither configured by the caller's AWS settings nor measured by coverage.
    private = (*SETTINGS_PREFIXES, "COVERAGE_")
    inherited = {
        name: os.environ[name] for name in os.environ if not name.startswith(private)
    }
    log = cwd / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *args],
            cwd=cwd,
            env={**inherited, **env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 60
        while not answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(
                    f"{args} do not answer, exit code {process.poll()}: {log.read_text()}"
                )
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(5)  # a long poll that nobody reads any more delays it
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URL of a ministack server: fast, with long polls, FIFO queues, SNS, Scheduler."""
    port = free_port()
    env = {
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "MINISTACK_HOST": "127.0.0.1",
        "IOT_MTLS_ENABLED": "0",  # would listen on 0.0.0.0:8883
        "SFTP_ENABLED": "0",
    }
    cwd = tmp_path_factory.mktemp("ministack")
    with server(port, ["-m", "ministack"], env, cwd) as url:
        yield url


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URL of a moto server: slow, strict about limits, with partial batch failures."""
    port = free_port()
    args = ["-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with server(port, args, {}, tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture(scope="session")
def sqs_client() -> Iterator[Callable[..., Any]]:
    """Yield a function (endpoint, service="sqs") that returns a botocore client, for set-up."""
    session = botocore.session.Session()
    clients: dict[tuple[str, str], Any] = {}

    def client(endpoint: str, service: str = "sqs") -> Any:
        key = (endpoint, service)
        if key not in clients:
            clients[key] = session.create_client(
                service, endpoint_url=endpoint, **CREDENTIALS
            )
        return clients[key]

    yield client
    for made in clients.values():
        made.close()


@pytest.fixture
def queue_name() -> str:
    """Return a TASKHAWK_QUEUE that no other test uses."""
    return f"T{uuid.uuid4().hex[:8].upper()}"


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test an environment without settings, and take back what it registered and set."""
    for name in list(os.environ):
        if name in SETTINGS or name.startswith(SETTINGS_PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent/aws-config")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent/aws-credentials")
    registry = dict(taskhawk._registry)
    yield
    taskhawk._registry.clear()
    taskhawk._registry.update(registry)
    taskhawk.configure()


AWS_KEYS = {
    "AWS_REGION": "us-east-1",
    "AWS_ACCESS_KEY": "test",
    "AWS_SECRET_KEY": "test",
}
AWS_SETTINGS = {**AWS_KEYS, "AWS_ACCOUNT_ID": "000000000000"}
DENIED = "access denied: the IAM policy of these credentials does not allow {}"


def configure_aws(endpoint: str, queue: str | None = None, **values: Any) -> None:
    """Configure what a server that stands in for AWS needs, and more."""
    endpoints = {"AWS_ENDPOINT_SNS": endpoint, "AWS_ENDPOINT_SQS": endpoint}
    taskhawk.configure(AWS_SETTINGS, **endpoints, TASKHAWK_QUEUE=queue, **values)


#: What ScriptedAws does with a request: JSON, which is XML for SNS; or status, headers and bytes;
#: or None, which is what it does by default; or a function of the request that returns one of them.
AwsAnswer = (
    dict[str, Any]
    | tuple[int, dict[str, str], bytes]
    | Callable[["AwsCall"], Any]
    | None
)
DROPPED: AwsAnswer = (0, {}, b"")  # the connection ends without an answer


@dataclasses.dataclass
class AwsCall:
    """A request that a ScriptedAws got; its attributes are what a test may want to see."""

    server: "ScriptedAws" = dataclasses.field(repr=False)
    action: str
    data: dict[str, Any]
    body: bytes
    path: str
    headers: dict[str, str]
    port: int
    told: AwsAnswer = None

    @property
    def is_sns(self) -> bool:
        """Whether it is a form, as SNS reads it, and its answer XML."""
        return "Action" in self.data

    def forward(self, **changes: Any) -> dict[str, Any]:
        """Have a request to SQS, with these changes, answered as by default."""
        data = {**self.data, **changes}
        if not self.server.behind:
            return self.server.default(self.action, data)
        return json.loads(self.server.pass_on(self, json.dumps(data).encode())[2])


class ScriptedAws(http.server.ThreadingHTTPServer):
    """A server that stands in for AWS: it keeps the requests, and answers them by a script.

    What the script does not say is answered by the emulator behind it; without one, as by queues
    that exist, are empty, and accept everything.
    """

    daemon_threads = True
    block_on_close = False  # idle connections end with the clients
    request_queue_size = 128

    def __init__(self, behind: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), AwsConnection)
        self.url, self.behind = f"http://127.0.0.1:{self.server_port}", behind
        self.calls: list[AwsCall] = []
        self.answers: dict[str, Iterator[AwsAnswer]] = {}
        self.lock = threading.Lock()  # held to keep a call and to take its answer
        self.connected: set[int] = set()  # the clients' ports
        self.changed = threading.Condition()  # of the connections
        self.closing = threading.Event()

    def script(self, action: str, *answers: AwsAnswer) -> None:
        """Give these answers to the next requests of a kind; after them, it answers as before."""
        self.answers[action] = iter(answers)

    def always(self, action: str, answer: AwsAnswer) -> None:
        """Give this answer to all requests of a kind."""
        self.answers[action] = itertools.repeat(answer)

    @property
    def actions(self) -> list[str]:
        """What was asked for, in order."""
        return [call.action for call in self.calls]

    def asked(self, action: str) -> list[dict[str, Any]]:
        """Return the data of each request of a kind."""
        return [call.data for call in self.calls if call.action == action]

    @property
    def batches(self) -> list[int]:
        """How many messages each sending request had."""
        return [
            len(call.data.get("Entries", ()))
            or sum(key.endswith(".Message") for key in call.data)
            or 1
            for call in self.calls
            if call.action.startswith(("SendMessage", "Publish"))
        ]

    def keep(self, call: AwsCall) -> None:
        """Keep a request, with what the script says of it."""
        with self.lock:
            self.calls.append(call)
            call.told = next(self.answers.get(call.action, iter(())), None)

    def reply(self, call: AwsCall) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body: by the script, or by default."""
        answer = call.told(call) if callable(call.told) else call.told
        if answer is None and self.behind:
            return self.pass_on(call, call.body)
        if answer is None:
            answer = self.default(call.action, call.data)
        if isinstance(answer, tuple):
            return answer
        if call.is_sns:
            xml = aws_xml({f"{call.action}Response": {f"{call.action}Result": answer}})
            return 200, {"Content-Type": "text/xml"}, xml.encode()
        return 200, {}, json.dumps(answer).encode()

    def default(self, action: str, data: dict[str, Any]) -> dict[str, Any]:
        """Answer as a service whose queues and topics exist, are empty, and accept everything."""
        if action == "GetQueueUrl":
            return {"QueueUrl": f"{self.url}/000000000000/{data['QueueName']}"}
        if action == "GetQueueAttributes":
            number = "ApproximateNumberOfMessages"
            numbers = (number, f"{number}NotVisible", f"{number}Delayed")
            return {
                "Attributes": {"VisibilityTimeout": "30", **dict.fromkeys(numbers, "0")}
            }
        if action in ("SendMessage", "Publish"):
            return {"MessageId": "m"}
        ids = [entry["Id"] for entry in data.get("Entries", ())]
        ids += [data[key] for key in data if re.fullmatch(r".+\.member\.\d+\.Id", key)]
        done = [{"Id": name, "MessageId": "m"} for name in ids]
        return {"Successful": done, "Failed": []} if done else {}

    def pass_on(self, call: AwsCall, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Have the emulator behind it answer a request that has this body."""
        netloc = urllib.parse.urlsplit(self.behind).netloc
        connection = http.client.HTTPConnection(netloc, timeout=30)
        headers = {
            k: v for k, v in call.headers.items() if k not in ("Host", "Content-Length")
        }
        try:
            connection.request("POST", call.path, body, headers)
            response = connection.getresponse()
            kind = {"Content-Type": response.headers["Content-Type"]}
            return response.status, kind, response.read()
        finally:
            connection.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet: a client that gave up is no failure of the server."""

    @contextlib.contextmanager
    def running(self, queue: str) -> Iterator["ScriptedAws"]:
        """Serve for the length of the block, with taskhawk configured to use it."""
        with self:
            thread = threading.Thread(target=self.serve_forever, args=(0.01,))
            thread.start()
            configure_aws(self.url, queue)
            try:
                yield self
            finally:
                self.closing.set()
                taskhawk.configure()  # closes connections
                self.shutdown()
                thread.join()


class AwsConnection(http.server.BaseHTTPRequestHandler):
    """One connection to a ScriptedAws: JSON for SQS, forms and XML for SNS."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one packet, lest the client wait 40 ms to acknowledge
    server: ScriptedAws

    def setup(self) -> None:
        """Count the connection."""
        super().setup()
        with self.server.changed:
            self.server.connected.add(self.client_address[1])
            self.server.changed.notify_all()

    def finish(self) -> None:
        """Count it no more."""
        super().finish()
        with self.server.changed:
            self.server.connected.discard(self.client_address[1])
            self.server.changed.notify_all()

    def do_POST(self) -> None:
        """Keep the request, then answer."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if target := self.headers["X-Amz-Target"]:
            action, data = target.rpartition(".")[2], json.loads(body)
        else:
            data = dict(urllib.parse.parse_qsl(body.decode()))
            action = data["Action"]
        where = (self.path, dict(self.headers), self.client_address[1])
        call = AwsCall(self.server, action, data, body, *where)
        self.server.keep(call)
        status, headers, answer = self.server.reply(call)
        if not status:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(answer))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


def aws_xml(value: Any) -> str:
    """Return a value of JSON as SNS writes it."""
    if isinstance(value, dict):
        return "".join(
            f"<{name}>{aws_xml(inner)}</{name}>" for name, inner in value.items()
        )
    if isinstance(value, list):
        return "".join(f"<member>{aws_xml(inner)}</member>" for inner in value)
    return json.dumps(value) if isinstance(value, bool) else html.escape(str(value))


def fault(code: str, text: str = "no", status: int = 400) -> AwsAnswer:
    """Refuse a request as a whole, before it has an effect.

    SQS gives a code of its own name in a header; one with a "#" is in the body alone.
    """

    def answer(call: AwsCall) -> AwsAnswer:
        if call.is_sns:
            error = {"Type": "Sender", "Code": code, "Message": text}
            xml = aws_xml({"ErrorResponse": {"Error": error, "RequestId": "r"}})
            return status, {"Content-Type": "text/xml"}, xml.encode()
        headers, kind = {}, code
        if "#" not in code:
            headers = {"x-amzn-query-error": f"{code};Sender"}
            kind = f"com.amazonaws.sqs#{code.rpartition('.')[2]}"
        return status, headers, json.dumps({"__type": kind, "message": text}).encode()

    return answer


def passed(call: AwsCall) -> None:
    """Leave a request to what is done by default."""


def refuse(*wrong: int, code: str = "InternalError", ours: bool = False) -> AwsAnswer:
    """Do what a request to SQS asks, but refuse the entries at these places."""

    def answer(call: AwsCall) -> AwsAnswer:
        entries = call.data["Entries"]
        good = [e for i, e in enumerate(entries) if i not in wrong]
        done = call.forward(Entries=good)["Successful"] if good else []
        no = {"Code": code, "Message": "no", "SenderFault": ours}
        failed = [{"Id": e["Id"], **no} for i, e in enumerate(entries) if i in wrong]
        return {"Successful": done, "Failed": failed}

    return answer


def late(when: threading.Event | float, answer: AwsAnswer = None) -> AwsAnswer:
    """Answer, by default as by default, once an event is set or so many seconds are over."""

    def wait(call: AwsCall) -> AwsAnswer:
        if isinstance(when, threading.Event):
            when.wait(WORKER_PATIENCE_S)
        else:
            time.sleep(when)
        return answer(call) if callable(answer) else answer

    return wait


def brings_messages(*messages: taskhawk.Message) -> dict[str, Any]:
    """Return the answer to a receive that brings these messages."""
    return {
        "Messages": [
            {"MessageId": m.id, "ReceiptHandle": m.id, "Body": json.dumps(m.as_dict())}
            for m in messages
        ]
    }


def make_queue(client: Any, name: str, most: int = 5, **attributes: str) -> str:
    """Make a queue and its dead-letter queue (after so many receives), and return its name."""
    dead = client.create_queue(QueueName=f"{name}-DLQ", Attributes=attributes)[
        "QueueUrl"
    ]
    found = client.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])
    policy = {
        "deadLetterTargetArn": found["Attributes"]["QueueArn"],
        "maxReceiveCount": most,
    }
    redrive = {"RedrivePolicy": json.dumps(policy)}
    client.create_queue(QueueName=name, Attributes={**redrive, **attributes})
    return name


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, now: float = 1_700_000_000) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time."""
        return self.now


VALID = {
    "id": "b1328174-a21c-43d3-b303-964dfcc76efc",
    "metadata": {"priority": "high", "timestamp": 1460868253255, "version": "1.0"},
    "headers": {"request_id": "1234"},
    "task": "tasks.send_email",
    "args": ["email@automatic.com", "Hello!"],
    "kwargs": {"from_email": "spam@example.com"},
}
ABSENT = object()


def edited(path: str, value: object) -> dict[str, Any]:
    """Return the valid message with one value (metadata.version, say) replaced or removed."""
    data = copy.deepcopy(VALID)
    *parents, key = path.split(".")
    parent = data[parents[0]] if parents else data
    if value is ABSENT:
        parent.pop(key, None)
    else:
        parent[key] = value
    return data


def queued(
    priority: taskhawk.Priority = taskhawk.Priority.default,
) -> list[taskhawk.QueueMessage]:
    """Receive what was sent to the queue of a priority."""
    broker = taskhawk._brokers.broker()
    return broker.receive(broker.destination(priority), 10, 0, None, threading.Event())


def run_body(body: Any) -> "taskhawk.Outcome":
    """Process a body as if it had been received."""
    return taskhawk.process(taskhawk.QueueMessage(body, "sqs-id", "receipt"))


def same_json(one: object, other: object) -> bool:
    """Compare exactly: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@pytest.fixture
def memory(isolated):
    """Queue in memory."""
    taskhawk.configure(TASKHAWK_BROKER="sqlite://")


@pytest.fixture
def sync(isolated):
    """Run what is dispatched, here and now."""
    taskhawk.configure(TASKHAWK_SYNC=True)


def plain(value=None):
    """Do nothing."""


PROCESSING_ID = "b1328174-a21c-43d3-b303-964dfcc76efc"
PROCESSING_SECRET = "hunter2-0f6b6d1c"


def processing_body(task: str = "mail.send", **changes: Any) -> str:
    """Return the body of a valid message, with some keys changed."""
    metadata = {"priority": "high", "timestamp": 1460868253255, "version": "1.0"}
    valid = {
        "metadata": metadata,
        "headers": {},
        "task": task,
        "args": [],
        "kwargs": {},
    }
    return json.dumps({"id": PROCESSING_ID, **valid, **changes})


def raising(error: BaseException) -> Callable[..., Any]:
    """Return a task, hook or policy that raises this error."""

    def raises(_attempt: int = 0, **_: Any) -> Any:
        raise error

    return raises


# Bodies that say a secret in vain, and what is wrong with them.
PROCESSING_INVALID = {
    "not JSON": (f"{{{PROCESSING_SECRET}", "message: not JSON at character 1"),
    "empty": ("", "message: not JSON at character 0"),
    "nothing": (None, "message: expected a string of JSON, got null"),
    "too deep": ("[" * 100_000, "message: nested too deeply"),
    "a huge number": ("9" * 5_000, "message: not JSON"),
    "an array": (
        json.dumps([PROCESSING_SECRET]),
        "message: expected an object, got an array",
    ),
    "wrong headers": (
        processing_body(headers=PROCESSING_SECRET),
        "headers: expected an object, got a string",
    ),
    "wrong arguments": (
        processing_body(args=PROCESSING_SECRET),
        "args: expected an array, got a string",
    ),
    "wrong version": (
        processing_body(
            args=[PROCESSING_SECRET], metadata={"version": 2, "timestamp": 1}
        ),
        'metadata.version: expected "1.0", got 2',
    ),
    "unknown task": (
        processing_body("mail.receive", args=[PROCESSING_SECRET]),
        "no task is registered as 'mail.receive': is its module imported?",
    ),
}

NEVER = threading.Event()  # for Broker.receive(): nothing cuts the wait short
ATTRIBUTES = {"request_id": {"DataType": "String", "StringValue": "é1234"}}

UNKNOWN_KEY = "AWS does not know these credentials: check AWS_ACCESS_KEY"


@pytest.fixture
def aws() -> Iterator[ScriptedAws]:
    """Yield a server that accepts everything, with taskhawk configured to use its queue APP."""
    with ScriptedAws().running("app") as server:
        yield server


def numbered(count: int, start: int = 0) -> list[taskhawk.Outgoing]:
    """Return messages whose bodies are numbers."""
    return [taskhawk.Outgoing(str(start + i), {}) for i in range(count)]


def drain(broker: taskhawk.Broker, queue: str, lease_s: float = 60) -> list[str]:
    """Receive and delete until the queue is empty, and return the bodies."""
    bodies = []
    while received := broker.receive(queue, 10, 0, lease_s, NEVER):
        assert broker.delete(queue, [m.receipt_handle for m in received]) == []
        bodies += [message.body for message in received]
    return bodies


@pytest.fixture
def task(isolated):
    """Return a task that is only dispatched."""

    def f(text: object) -> None:
        """Do nothing."""

    return taskhawk.task(name="tests.f")(f)


def make_queues(client: Any, name: str, **attributes: str) -> None:
    """Make the default and the high-priority queue, and the dead-letter queue of each."""
    for suffix in ("", "-HIGH-PRIORITY"):
        make_queue(client, f"TASKHAWK-{name}{suffix}", **attributes)


@pytest.fixture
def scripted(
    ministack: str, sqs_client: Callable[..., Any], queue_name: str
) -> Iterator[ScriptedAws]:
    """Yield a scripted ministack whose queues are made, with taskhawk configured to use it."""
    make_queues(sqs_client(ministack), queue_name)
    with ScriptedAws(ministack).running(queue_name) as server:
        yield server


@pytest.fixture
def sqlite() -> taskhawk.SqliteBroker:
    """Return the embedded broker, in memory, which taskhawk is configured to use."""
    taskhawk.configure(TASKHAWK_BROKER="sqlite://")
    return taskhawk._brokers.broker()


@pytest.fixture(params=["ministack", "moto", "sqlite"])
def broker(
    request: pytest.FixtureRequest, sqs_client: Callable[..., Any], queue_name: str
) -> taskhawk.Broker:
    """Return each of the brokers, with its queues made, which taskhawk is configured to use."""
    if request.param == "sqlite":
        taskhawk.configure(TASKHAWK_BROKER="sqlite://", TASKHAWK_QUEUE=queue_name)
    else:
        endpoint = request.getfixturevalue(request.param)
        make_queues(sqs_client(endpoint), queue_name)
        configure_aws(endpoint, queue_name)
    return taskhawk._brokers.broker()


@pytest.fixture(params=["ministack", "moto"])
def endpoint(request: pytest.FixtureRequest) -> str:
    """Return the URL of each of the emulators."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def mail() -> taskhawk.Task[..., None]:
    """Return a task to dispatch."""

    @taskhawk.task(name="mail.send")
    def send(to: Any = None, text: Any = None) -> None:
        """Do nothing."""

    return send


def receive_all(queue: str | Priority = Priority.default) -> list[QueueMessage]:
    """Receive all that is visible in a queue."""
    broker = taskhawk._brokers.broker()
    name = broker.destination(queue) if isinstance(queue, Priority) else queue
    polls = iter(lambda: broker.receive(name, 10, 0, 60, threading.Event()), [])
    return [message for poll in polls for message in poll]


def received_args(queue: str | Priority = Priority.default) -> list[Any]:
    """Receive all that is visible in a queue, and return the first argument of each message."""
    return [json.loads(message.body)["args"][0] for message in receive_all(queue)]


def service_size(body: str, attributes: Mapping[str, Mapping[str, str]]) -> int:
    """Count as SQS does."""
    parts = itertools.chain.from_iterable(
        (name, value["DataType"], value["StringValue"])
        for name, value in attributes.items()
    )
    return len(body.encode()) + sum(len(part.encode()) for part in parts)


def filler(size: int, **headers: Any) -> str:
    """Return the argument that makes a message of mail.send with exactly so many bytes."""
    empty = Message.new("mail.send", [""], headers=headers).as_dict()
    attributes = {
        n: {"DataType": "String", "StringValue": v} for n, v in headers.items()
    }
    body = json.dumps(empty, separators=(",", ":"))
    return "x" * (size - service_size(body, attributes))


WORKER_QUEUE = "WORKER"  # a queue's name on brokers that need no set-up
WORKER_PATIENCE_S = 20  # the longest wait for what must happen; no result depends on it

WORKER_MODULE = """
import sys
import taskhawk

@taskhawk.task
def wait(number):
    print("started", number, flush=True)
    sys.stdin.readline()
    print("ended", number, flush=True)

@taskhawk.task
def note(number):
    print("noted", number, flush=True)
"""


def worker_noted(name: str) -> Callable[..., Any]:
    """Return a method of WorkerBroker that notes its call."""
    return lambda self, *args: self.noted(name, *args)


class WorkerBroker(taskhawk.Broker):
    """A broker that notes the calls of another, and lets a test stand in their way.

    faults[name] is called instead of the method, with the real call as its first argument.
    """

    max_bytes, max_delay_s = (
        taskhawk.SqliteBroker.max_bytes,
        taskhawk.SqliteBroker.max_delay_s,
    )

    def __init__(self, inner: Any, **faults: Callable[..., Any]) -> None:
        self.inner, self.faults = inner, faults
        self.settings: dict[str, Any] = {}
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def noted(self, name: str, *args: Any) -> Any:
        """Make a call of the other broker, or meet the fault in its way."""
        self.calls.append((name, args))
        real = functools.partial(getattr(self.inner, name), *args)
        return self.faults[name](real, *args) if name in self.faults else real()

    def made(self, name: str) -> list[tuple[Any, ...]]:
        """Return the arguments of each call of that name so far."""
        return [args for called, args in self.calls if called == name]

    destination = worker_noted("destination")
    send = worker_noted("send")
    close = worker_noted("close")
    receive = worker_noted("receive")
    delete = worker_noted("delete")
    change_visibility = worker_noted("change_visibility")
    info = worker_noted("info")
    depth = worker_noted("depth")

    def put(
        self, task: Any, *calls: tuple[Any, ...], queue: str = WORKER_QUEUE
    ) -> None:
        """Queue a run of the task for each tuple of arguments."""
        for start in range(0, len(calls), 10):
            messages = (
                taskhawk.Message.new(task.name, a) for a in calls[start : start + 10]
            )
            entries = [taskhawk.Outgoing(json.dumps(m.as_dict()), {}) for m in messages]
            assert self.inner.send(queue, entries) == []

    def work(self, *queues: str, **options: Any) -> "taskhawk.Ledger":
        """Run a worker on the queues until they are empty, or as the options say; it must end."""
        options = {
            "until_empty": "loop_count" not in options,
            "wait_s": 0.05,
            **options,
        }
        event = options.setdefault("shutdown_event", threading.Event())
        late = threading.Event()
        alarm = threading.Timer(WORKER_PATIENCE_S, lambda: (late.set(), event.set()))
        alarm.start()
        try:
            return taskhawk.Worker(self, queues or [WORKER_QUEUE], **options).run()
        finally:
            alarm.cancel()
            assert not late.is_set(), "the worker did not end"


def worker_first(count: int, fault: Callable[..., Any]) -> Callable[..., Any]:
    """Return a fault that hits the first calls alone."""
    left = iter(range(count))

    def only_first(real: Any, *args: Any) -> Any:
        return real() if next(left, None) is None else fault(real, *args)

    return only_first


def worker_eventually(condition: Callable[[], Any]) -> Any:
    """Wait until the condition holds, and return what it returned; fail if it never does."""
    deadline = time.monotonic() + WORKER_PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)
    return value


@pytest.fixture
def worker_clock() -> Clock:
    """Return the clock of worker_broker."""
    return Clock(1_000_000)


@pytest.fixture
def worker_broker(worker_clock: Clock) -> Iterator[WorkerBroker]:
    """Yield an embedded queue in memory, whose clock stands and whose calls are noted."""
    broker = WorkerBroker(taskhawk.SqliteBroker("sqlite://", clock=worker_clock))
    yield broker
    broker.close()


@contextlib.contextmanager
def worker_process(
    folder: Path, env: dict[str, str], *options: str, module: str = WORKER_MODULE
) -> Iterator[subprocess.Popen[str]]:
    """Run a listener of a module for the length of the block."""
    (folder / "jobs.py").write_text(module)
    process = subprocess.Popen(
        [sys.executable, "-m", "taskhawk", "listen", "jobs", *options],
        cwd=folder,
        env=python_env(env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    alarm = threading.Timer(
        WORKER_PATIENCE_S, process.kill
    )  # ends every wait of the test
    alarm.start()
    with process:
        try:
            yield process
        finally:
            process.kill()
            alarm.cancel()


def command_error(
    capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """Run a command that fails, and return its exit code and its one line."""
    code = taskhawk.main(arguments)
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    return code, errors.removesuffix("\n")


MESSAGE_ID = "[0-9a-f-]{36}"


def body_of(*args: Any) -> str:
    """Return the body of a message for mail.send, registered or not."""
    metadata = {"priority": "default", "timestamp": 1460868253255, "version": "1.0"}
    data = {
        "id": str(uuid.uuid4()),
        "metadata": metadata,
        "headers": {},
        "task": "mail.send",
    }
    return json.dumps({**data, "args": args, "kwargs": {}})


def work_once(broker: taskhawk.Broker, queue: str | None = None) -> "taskhawk.Ledger":
    """Receive once, run what there is, and return what became of it."""
    queues = [queue or broker.destination(Priority.default)]
    return taskhawk.Worker(
        broker, queues, num_messages=10, loop_count=1, wait_s=0
    ).run()


# --- the house ------------------------------------------------------------------------

HOUSE_BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
HOUSE_BLOCKS += (ast.AsyncFor, ast.AsyncWith, ast.TryStar)
HOUSE_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
HOUSE_FILES = ["LICENSE", "README.md", "pyproject.toml"]
HOUSE_FILES += ["schema.json", "taskhawk.py", "test_taskhawk.py"]


def house_source() -> str:
    """Return the text of the module under test: the checkout's, or the installed one's."""
    return Path(taskhawk.__file__).read_text(encoding="utf-8")


def house_banners() -> list[tuple[int, str, int]]:
    """Return number, title and line of each room's banner."""
    found = re.finditer(r"^# --- (\d+)\. (.+?) -+$", house_source(), re.MULTILINE)
    return [(int(m[1]), m[2], house_source().count("\n", 0, m.start())) for m in found]


def house_docstring_lines(node: Any) -> int:
    """Count the lines of a module's, a class's or a function's docstring."""
    if ast.get_docstring(node) is None:
        return 0
    return node.body[0].end_lineno - node.body[0].lineno + 1


def house_nesting(node: ast.AST, level: int = 0) -> int:
    """Return how deep a function's blocks nest; an elif is no deeper than its if."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*HOUSE_FUNCTIONS, ast.ClassDef, ast.Lambda)):
            continue
        elif_ = (
            isinstance(node, ast.If)
            and isinstance(child, ast.If)
            and node.orelse == [child]
        )
        inner = level + (isinstance(child, HOUSE_BLOCKS) and not elif_)
        deepest = max(deepest, house_nesting(child, inner))
    return deepest


@functools.cache
def house_figures() -> dict[str, float]:
    """Measure the module."""
    text = house_source()
    tree, lines = ast.parse(text), text.splitlines()
    nodes = [
        n for n in ast.walk(tree) if isinstance(n, (*HOUSE_FUNCTIONS, ast.ClassDef))
    ]
    functions = [node for node in nodes if isinstance(node, HOUSE_FUNCTIONS)]
    length = {node: node.end_lineno - node.lineno + 1 for node in nodes}
    sizes = sorted(length[node] - house_docstring_lines(node) for node in functions)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [
        t for t in tokens if t.type == tokenize.COMMENT and t.line.lstrip()[:1] == "#"
    ]
    later = [line for number, _, line in house_banners() if number > 12]
    return {
        "a function's median": statistics.median(sizes),
        "a function's 90th percentile": sizes[int(len(sizes) * 0.9)],
        "the longest function": sizes[-1],
        "the deepest nesting": max(map(house_nesting, functions)),
        "the longest class": max(
            length[n] for n in nodes if isinstance(n, ast.ClassDef)
        ),
        "the longest line": max(map(len, lines)),
        "the file": len(lines),
        "rooms 0 to 12": min(later),
        "% docstrings": round(
            100 * sum(map(house_docstring_lines, [tree, *nodes])) / len(lines)
        ),
        "% comments": round(100 * len(comments) / len(lines)),
    }


TOO_LONG = pytest.mark.xfail(reason="the module is still too long", strict=True)


class TestHouse:
    """The module keeps to its plan: what it exports, imports, and how large it may grow."""

    def test_import_costs_nothing(self):
        """Importing reads no environment and imports nothing that a dispatch may never need."""
        code = """if True:
            import os, sys
            class Forbidden:
                def __getattr__(self, name): raise AssertionError(f"os.environ: {name}")
                __getitem__ = __contains__ = __iter__ = __len__ = __getattr__
            heavy = ("argparse", "asyncio", "botocore", "django", "sqlite3")
            kept = os.environ, os.environb, {name: sys.modules.get(name) for name in heavy}
            os.environ = os.environb = Forbidden()
            sys.modules.update(dict.fromkeys(heavy)) # None there: its import fails
            import taskhawk
            os.environ, os.environb, modules = kept
            sys.modules.update(modules)
            print(taskhawk.__name__)"""
        result = run_python(code)
        assert (result.stdout, result.stderr) == ("taskhawk\n", "")

    def test_all_is_sorted(self):
        """`__all__` lists constants, then classes, then functions, each in order, none twice."""
        names = taskhawk.__all__
        assert names == sorted(
            set(names), key=lambda n: (not n.isupper(), n[0].islower(), n)
        )

    def test_all_is_complete(self):
        """`__all__` has exactly the names without underscore that the module defines."""
        defined = set()
        for node in ast.parse(house_source()).body:
            if isinstance(node, (*HOUSE_FUNCTIONS, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = (
                    node.targets if isinstance(node, ast.Assign) else [node.target]
                )
                defined |= {
                    n.id
                    for t in targets
                    for n in ast.walk(t)
                    if isinstance(n, ast.Name)
                }
        assert sorted(n for n in defined if n[0] != "_") == sorted(taskhawk.__all__)
        assert all(hasattr(taskhawk, name) for name in taskhawk.__all__)

    def test_version(self):
        """`__version__` follows the last published one; VERSION is 1.4's name for it."""
        assert taskhawk.__version__ == taskhawk.VERSION
        major, _minor, _patch = map(int, str(taskhawk.VERSION).split("."))
        assert major >= 5
        if Path(taskhawk.__file__).parent != PROJECT:
            assert importlib.metadata.version("taskhawk") == taskhawk.__version__

    def test_schema_json(self):
        """schema.json is the dump of SCHEMA, to the byte."""
        text = project_file("schema.json").read_text(encoding="utf-8")
        assert text == json.dumps(taskhawk.SCHEMA, indent=2) + "\n"

    @pytest.mark.parametrize("args", [["-m", "taskhawk"], [taskhawk.__file__]])
    def test_runnable(self, args, tmp_path):
        """The file is a program, by its module's name or by its path."""
        result = run_python([*args, "schema"], cwd=tmp_path)
        assert (json.loads(result.stdout), result.stderr) == (taskhawk.SCHEMA, "")

    @pytest.mark.parametrize(
        ("figure", "low", "high"),
        [
            ("a function's median", 1, 9),
            ("a function's 90th percentile", 1, 28),
            ("the longest function", 1, 40),
            ("the deepest nesting", 0, 4),
            ("the longest class", 1, 200),
            ("the longest line", 1, 100),
            pytest.param("the file", 1, 3000, marks=TOO_LONG),
            pytest.param("rooms 0 to 12", 1, 2200, marks=TOO_LONG),
            ("% docstrings", 20, 28),
            ("% comments", 5, 8),
        ],
    )
    def test_budget(self, figure, low, high):
        """The module can be read in one sitting."""
        assert low <= house_figures()[figure] <= high

    def test_map_of_rooms(self):
        """The module's docstring lists the rooms as their banners do, in order."""
        listed = re.findall(
            r"^ +(\d+)\. (.+)$", taskhawk.__doc__.partition("\nRooms")[2], re.MULTILINE
        )
        assert listed == [(str(number), title) for number, title, _ in house_banners()]
        assert [int(number) for number, _ in listed] == sorted(
            {int(n) for n, _ in listed}
        )

    def test_invariants(self):
        """Under each banner stand two to six lines that say what the room is to be held to."""
        lines = house_source().splitlines()
        for number, title, line in house_banners():
            below = lines[line + 1 : line + 9]
            said = next(
                i for i, text in enumerate([*below, ""]) if not text.startswith("# ")
            )
            assert 2 <= said <= 6, f"{number}. {title}"

    def test_docstring(self, tmp_path):
        """The module's docstring is one sentence, then a quickstart that runs as it stands."""
        first, _, rest = taskhawk.__doc__.partition("\n\n")
        assert re.fullmatch(r"[A-Z][^.\n]+\.", first)
        code = re.search(r"::\n\n((?: {4}.*\n|\n)+)", rest)[1]
        (tmp_path / "quickstart.py").write_text(textwrap.dedent(code))
        result = run_python(["quickstart.py"], cwd=tmp_path)
        assert (result.stdout, result.stderr) == ("Hello! -> you@example.com\n", "")

    def test_top_level(self):
        """The project has six files at its top level, and dotfiles."""
        if not project_file(".git").exists() or not shutil.which("git"):
            pytest.skip("not a checkout")
        command = ["git", "-c", "safe.directory=*", "-C", str(PROJECT), "ls-files"]
        files = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.split()
        assert {name.split("/")[0] for name in files if name[0] != "."} == set(
            HOUSE_FILES
        )


# === PART I: MEANING ==================================================================


# --- 1. names and limits --------------------------------------------------------------


# --- 2. errors ------------------------------------------------------------------------


class TestErrors:
    """Each failure has a name, and carries what a caller can act on."""

    def test_bases(self):
        """Every error is a TaskhawkError; a message too large or of no task is a wrong message."""
        found = [e for e in vars(taskhawk).values() if inspect.isclass(e) and e.__doc__]
        ours = [
            e for e in found if issubclass(e, Exception) and e.__module__ == "taskhawk"
        ]
        assert {error.__name__: error.__base__.__name__ for error in ours} == {
            "ChildCrashed": "TaskhawkError",
            "ConfigurationError": "TaskhawkError",
            "IgnoreException": "TaskhawkError",
            "LoggingException": "TaskhawkError",
            "MessageTooLarge": "ValidationError",
            "PartialFailure": "TaskhawkError",
            "RetryException": "TaskhawkError",
            "StopRetry": "TaskhawkError",
            "TaskNotFound": "ValidationError",
            "TaskhawkError": "Exception",
            "TimeLimitExceeded": "TaskhawkError",
            "ValidationError": "TaskhawkError",
        }

    def test_partial_failure_of_1_4(self):
        """PartialFailure is made as 1.4 did: the answer of a batch call, and then anything."""
        result = {"Successful": [{"Id": "0"}], "Failed": [{"Id": "1"}, {"Id": "2"}]}
        error = taskhawk.PartialFailure(result, "two are left", 2)
        assert (error.success_count, error.failure_count, error.result) == (
            1,
            2,
            result,
        )
        assert (error.args, error.unsent) == (("two are left", 2), [])

    def test_partial_failure_says_how_many_and_why(self):
        """With nothing else to say, PartialFailure counts the failures and names their codes."""
        failed = [
            {"Code": "Throttled"},
            {"Code": "InternalError"},
            {"Code": "Throttled"},
            {},
        ]
        error = taskhawk.PartialFailure({"Successful": [{}], "Failed": failed})
        assert str(error) == "4 of 5 messages failed: InternalError, Throttled, unknown"

    def test_partial_failure_keeps_the_messages(self):
        """PartialFailure has the unsent messages in order, in a list of its own."""
        message = taskhawk.Message(
            {
                "id": "1",
                "metadata": {"timestamp": 1, "version": "1.0"},
                "headers": {},
                "task": "a.b",
                "args": [],
                "kwargs": {},
            }
        )
        unsent = (message, message)
        error = taskhawk.PartialFailure({"Successful": [], "Failed": []}, unsent=unsent)
        assert error.unsent == [message, message]

    @pytest.mark.parametrize(
        ("args", "kwargs", "delay_seconds", "text"),
        [
            ((), {}, None, ""),
            (("busy",), {}, None, "busy"),
            (("busy", 5), {}, None, "('busy', 5)"),
            ((5,), {}, 5, ""),
            ((0,), {}, 0, ""),
            ((2.5, "busy"), {}, 2.5, "busy"),
            ((True,), {}, None, "True"),
            (("5",), {}, None, "5"),
            ((), {"delay_seconds": 60}, 60, ""),
            (("busy",), {"delay_seconds": 60}, 60, "busy"),
            ((5,), {"delay_seconds": 60}, 60, "5"),
        ],
    )
    def test_retry(self, args, kwargs, delay_seconds, text):
        """RetryException's first argument is the delay if it is a number (4.7), else text (1.4)."""
        error = taskhawk.RetryException(*args, **kwargs)
        assert (error.delay_seconds, str(error)) == (delay_seconds, text)

    @pytest.mark.parametrize("delay_seconds", [-1, -0.5, float("inf"), float("nan")])
    @pytest.mark.parametrize("by_name", [False, True])
    def test_retry_at_an_impossible_time(self, delay_seconds, by_name):
        """RetryException refuses a delay that no queue can hold: the run has failed then."""
        args, kwargs = (
            ((), {"delay_seconds": delay_seconds})
            if by_name
            else ((delay_seconds,), {})
        )
        with pytest.raises(ValueError, match="delay_seconds") as caught:
            taskhawk.RetryException(*args, **kwargs)
        expected = f"delay_seconds: expected 0 or more seconds, got {delay_seconds}"
        assert str(caught.value) == expected

    def test_logging(self):
        """LoggingException has the text for the log, and the `extra` of the record."""
        error = taskhawk.LoggingException("out of stock", {"item": 7})
        assert (str(error), error.extra) == ("out of stock", {"item": 7})
        assert taskhawk.LoggingException("out of stock", extra=None).extra is None

    def test_too_large(self):
        """MessageTooLarge has the limit as a number."""
        error = taskhawk.MessageTooLarge("300 bytes, at most 256", 256)
        assert (str(error), error.limit) == ("300 bytes, at most 256", 256)


# --- 3. settings ----------------------------------------------------------------------

SETTINGS_DEFAULTS = {
    "AWS_ACCESS_KEY": None,
    "AWS_ACCOUNT_ID": None,
    "AWS_CONNECT_TIMEOUT_S": 2,
    "AWS_ENDPOINT_SNS": None,
    "AWS_ENDPOINT_SQS": None,
    "AWS_READ_TIMEOUT_S": 2,
    "AWS_REGION": None,
    "AWS_SECRET_KEY": None,
    "AWS_SESSION_TOKEN": None,
    "IS_LAMBDA_APP": False,
    "TASKHAWK_BROKER": "sqs",
    "TASKHAWK_DEFAULT_HEADERS": None,
    "TASKHAWK_ERROR_HOOK": None,
    "TASKHAWK_HEARTBEAT_HOOK": None,
    "TASKHAWK_MAX_DB_REUSE_LOOPS": 5,
    "TASKHAWK_POST_PROCESS_HOOK": None,
    "TASKHAWK_PRE_PROCESS_HOOK": None,
    "TASKHAWK_QUEUE": None,
    "TASKHAWK_SYNC": False,
    "TASKHAWK_TASK_CLASS": None,
}
SETTINGS_RULES = {  # how an error goes on after "expected"
    "AWS_ACCESS_KEY": "a string, such as 'AKIAIOSFODNN7EXAMPLE'",
    "AWS_ACCOUNT_ID": "an account number, such as '123456789012'",
    "AWS_CONNECT_TIMEOUT_S": "a number of seconds above 0, such as '2'",
    "AWS_ENDPOINT_SNS": "a URL, such as 'http://127.0.0.1:4566'",
    "AWS_ENDPOINT_SQS": "a URL, such as 'http://127.0.0.1:4566'",
    "AWS_READ_TIMEOUT_S": "a number of seconds above 0, such as '2'",
    "AWS_REGION": "the name of a region, such as 'eu-west-1'",
    "AWS_SECRET_KEY": "a string, such as 'wJalrXUtnFEMI/EXAMPLEKEY'",
    "AWS_SESSION_TOKEN": "a string, such as 'AQoDYXdzEJr/EXAMPLETOKEN'",
    "IS_LAMBDA_APP": "true or false, such as 'False'",
    "TASKHAWK_BROKER": "'sqs' or a URL of SQLite, such as 'sqlite:///queue.db'",
    "TASKHAWK_DEFAULT_HEADERS": "a function or its dotted path, such as"
    " 'myapp.hooks.default_headers'",
    "TASKHAWK_ERROR_HOOK": "a function or its dotted path, such as 'myapp.hooks.report_error'",
    "TASKHAWK_HEARTBEAT_HOOK": "a function or its dotted path, such as 'myapp.hooks.touch_file'",
    "TASKHAWK_MAX_DB_REUSE_LOOPS": "a whole number above 0, such as '5'",
    "TASKHAWK_POST_PROCESS_HOOK": "a function or its dotted path, such as 'myapp.hooks.after'",
    "TASKHAWK_PRE_PROCESS_HOOK": "a function or its dotted path, such as 'myapp.hooks.before'",
    "TASKHAWK_QUEUE": "at most 71 letters, digits, hyphens and underscores, such as 'dev-myapp'",
    "TASKHAWK_SYNC": "true or false, such as 'False'",
    "TASKHAWK_TASK_CLASS": "a class or its dotted path, such as 'myapp.tasks.MyTask'",
}
SETTINGS_OF_4_7 = {  # those that have no meaning here
    "TASKHAWK_CONSUMER_BACKEND": "taskhawk.backends.aws.AWSSQSConsumerBackend",
    "TASKHAWK_HEARTBEAT_HOOK_SYNC_CALL_S": "5",
    "TASKHAWK_PUBLISHER_BACKEND": "taskhawk.backends.aws.AWSSNSPublisherBackend",
    "TASKHAWK_PUBLISHER_GCP_BATCH_SETTINGS": "()",
    "GOOGLE_CLOUD_PROJECT": "a-project",
}
SETTINGS_WHERE = (
    "from taskhawk.configure(), the module named by SETTINGS_MODULE, Django's settings"
)
SETTINGS_WHERE += " or the environment"


def settings_hook(**kwargs: Any) -> None:
    """Stand for a hook that is named by its dotted path."""


class SettingsTask(taskhawk.Task):
    """A task class as applications make them, of 1.4's signature."""

    def __init__(self, fn, priority, name):
        """Shout."""
        super().__init__(fn, priority, name.upper())
        self.options_at_start = self.retry


class SettingsOtherTask(taskhawk.Task):
    """Another one."""


@pytest.fixture
def settings_module(tmp_path, monkeypatch):
    """Return a function that writes a module and names it by SETTINGS_MODULE."""

    def write(source: str) -> str:
        name = f"settings_{uuid.uuid4().hex}"
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("SETTINGS_MODULE", name)
        return name

    return write


@pytest.fixture
def settings_aws(aws):
    """Return an AWS that has no queue, and that taskhawk is not configured to use."""
    aws.always("GetQueueUrl", fault("com.amazonaws.sqs#QueueDoesNotExist"))
    taskhawk.configure()
    return aws


def settings_child(cwd: Path, code: str, **env: str) -> list[str]:
    """Run code in a new interpreter, strictly, and return the lines that it printed."""
    result = run_python(["-W", "error", "-c", textwrap.dedent(code)], cwd=cwd, env=env)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def settings_task(headers=None):
    """Take headers."""
    settings_task.headers = headers


class TestSettings:
    """Configuration is read lazily, in one place, and what is wrong with it is said in full."""

    def test_defaults(self):
        """These are all the settings, and what they are if nobody sets them."""
        found = {name: getattr(taskhawk.settings, name) for name in SETTINGS_DEFAULTS}
        assert found == SETTINGS_DEFAULTS

    def test_order_of_sources(self, tmp_path):
        """configure() comes first, then SETTINGS_MODULE, Django, the environment, the default."""
        names = ["TASKHAWK_QUEUE", "AWS_REGION", "AWS_ACCOUNT_ID", "AWS_ENDPOINT_SQS"]
        (tmp_path / "own.py").write_text("TASKHAWK_QUEUE = AWS_REGION = 'module'\n")
        django_names = " = ".join(names[:3])
        (tmp_path / "site_settings.py").write_text(f"{django_names} = 'django'\n")
        env = {
            **dict.fromkeys(names, "http://environment"),
            "TASKHAWK_QUEUE": "environment",
        }
        code = f"""
            import taskhawk
            taskhawk.configure(TASKHAWK_QUEUE="configure")
            for name in {[*names, "AWS_READ_TIMEOUT_S"]}:
                print(getattr(taskhawk.settings, name))
        """
        where = {"SETTINGS_MODULE": "own", "DJANGO_SETTINGS_MODULE": "site_settings"}
        found = settings_child(tmp_path, code, **where, **env)
        assert found == ["configure", "module", "django", "http://environment", "2"]

    @pytest.mark.parametrize(
        "given",
        [
            {"TASKHAWK_QUEUE": "given", "OTHER": 1},
            types.MappingProxyType({"TASKHAWK_QUEUE": "given", 7: 1}),
            types.SimpleNamespace(TASKHAWK_QUEUE="given", other=1),
            type("Config", (), {"TASKHAWK_QUEUE": "given", "OTHER": 1}),
        ],
    )
    def test_configure_with_an_object(self, given):
        """configure() takes any mapping or object, and leaves alone what is not taskhawk's."""
        taskhawk.configure(given)
        assert taskhawk.settings.TASKHAWK_QUEUE == "given"
        assert taskhawk.settings.TASKHAWK_SYNC is False

    def test_configure_with_keywords(self):
        """A keyword of configure() goes before the object, and each call replaces the last."""
        taskhawk.configure(
            {"TASKHAWK_QUEUE": "a", "AWS_REGION": "eu-west-1"}, TASKHAWK_QUEUE="b"
        )
        assert taskhawk.settings.TASKHAWK_QUEUE == "b"
        assert taskhawk.settings.AWS_REGION == "eu-west-1"
        taskhawk.configure(AWS_REGION="eu-west-2")
        assert taskhawk.settings.TASKHAWK_QUEUE is None
        assert taskhawk.settings.AWS_REGION == "eu-west-2"

    def test_flask(self):
        """A Flask application hands over its config."""
        app = flask.Flask("app")
        app.config.from_mapping(
            TASKHAWK_QUEUE="flask", TASKHAWK_SYNC="yes", TASKHAWK_BROKER=None
        )
        taskhawk.configure(app.config)
        assert taskhawk.settings.TASKHAWK_QUEUE == "flask"
        assert taskhawk.settings.TASKHAWK_SYNC is True
        assert taskhawk.settings.TASKHAWK_BROKER == "sqs"

    def test_configure_with_an_unknown_keyword(self):
        """configure() refuses a keyword that is no setting, and changes nothing then."""
        taskhawk.configure(TASKHAWK_QUEUE="before")
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.configure(TASKHAWK_QUEUE="after", TASKHAWK_SINC=True)
        expected = (
            "TASKHAWK_SINC is not a setting of taskhawk; did you mean TASKHAWK_SYNC?"
        )
        assert str(caught.value) == expected
        assert taskhawk.settings.TASKHAWK_QUEUE == "before"
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.configure(colour="red")
        assert str(caught.value) == "colour is not a setting of taskhawk"

    def test_unknown_attribute(self):
        """Reading what is no setting is an AttributeError that names the nearest one."""
        with pytest.raises(AttributeError) as caught:
            taskhawk.settings.AWS_REGIO  # noqa: B018 - reading it is the test
        expected = "AWS_REGIO is not a setting of taskhawk; did you mean AWS_REGION?"
        assert str(caught.value) == expected

    def test_lazy(self, monkeypatch):
        """A setting is read at its first use, and then remembered until configure() is called."""
        monkeypatch.setenv("TASKHAWK_QUEUE", "one")
        assert taskhawk.settings.TASKHAWK_QUEUE == "one"
        monkeypatch.setenv("TASKHAWK_QUEUE", "two")
        assert taskhawk.settings.TASKHAWK_QUEUE == "one"
        taskhawk.configure()
        assert taskhawk.settings.TASKHAWK_QUEUE == "two"

    def test_settings_module(self, settings_module):
        """SETTINGS_MODULE names a module whose globals are settings."""
        settings_module("import json\nTASKHAWK_QUEUE = 'mine'\nDEBUG = True\n")
        assert taskhawk.settings.TASKHAWK_QUEUE == "mine"

    @pytest.mark.parametrize("name", ["no_such_module", "json.no_such_module"])
    def test_settings_module_is_missing(self, monkeypatch, name):
        """A SETTINGS_MODULE that can't be imported is a ConfigurationError that names it."""
        monkeypatch.setenv("SETTINGS_MODULE", name)
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.settings.TASKHAWK_QUEUE  # noqa: B018 - reading it is the test
        assert str(caught.value) == (
            f"the module named by SETTINGS_MODULE {name!r} can't be imported:"
            f" No module named {name!r}"
        )

    def test_settings_module_is_broken(self, settings_module):
        """What a settings module itself fails to import is reported as it is."""
        settings_module("import no_such_dependency")
        with pytest.raises(ModuleNotFoundError) as caught:
            taskhawk.settings.TASKHAWK_QUEUE  # noqa: B018 - reading it is the test
        assert str(caught.value) == "No module named 'no_such_dependency'"

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("AWS_ACCOUNT_ID", "000000000000", "000000000000"),
            ("AWS_ACCOUNT_ID", 123456789012, "123456789012"),
            ("AWS_ACCOUNT_ID", 12345, "000000012345"),
            ("AWS_CONNECT_TIMEOUT_S", 0.5, 0.5),
            ("AWS_CONNECT_TIMEOUT_S", "0.5", 0.5),
            ("AWS_READ_TIMEOUT_S", " 3 ", 3),
            ("AWS_ENDPOINT_SNS", "https://sns.example.com", "https://sns.example.com"),
            ("AWS_ENDPOINT_SQS", "http://127.0.0.1:4566/", "http://127.0.0.1:4566"),
            ("AWS_REGION", "eu-west-1", "eu-west-1"),
            ("TASKHAWK_BROKER", "sqs", "sqs"),
            ("TASKHAWK_BROKER", "sqlite://", "sqlite://"),
            ("TASKHAWK_BROKER", "sqlite:////a/b.db", "sqlite:////a/b.db"),
            ("TASKHAWK_MAX_DB_REUSE_LOOPS", 1, 1),
            ("TASKHAWK_MAX_DB_REUSE_LOOPS", "20", 20),
            ("TASKHAWK_QUEUE", "Dev_my-app-2", "Dev_my-app-2"),
            ("TASKHAWK_QUEUE", "q" * 71, "q" * 71),
            ("TASKHAWK_ERROR_HOOK", settings_hook, settings_hook),
            ("TASKHAWK_HEARTBEAT_HOOK", "json.dumps", json.dumps),
            ("TASKHAWK_PRE_PROCESS_HOOK", "collections.abc.Mapping", Mapping),
            ("TASKHAWK_TASK_CLASS", SettingsTask, SettingsTask),
            ("TASKHAWK_TASK_CLASS", "taskhawk.Task", taskhawk.Task),
            ("TASKHAWK_TASK_CLASS", "taskhawk.task_manager.Task", taskhawk.Task),
        ],
    )
    def test_legal_value(self, name, value, expected):
        """A value that has the meaning of the setting's type is taken for it."""
        taskhawk.configure({name: value})
        assert getattr(taskhawk.settings, name) == expected

    @pytest.mark.parametrize("name", ["IS_LAMBDA_APP", "TASKHAWK_SYNC"])
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ((False, 0, "False", "false", "0", "", " no ", "OFF"), False),
            ((True, 1, "True", "true", "1", " yes ", "ON"), True),
        ],
    )
    def test_flag(self, monkeypatch, name, values, expected):
        """A flag may be a word, and whatever it is set to, it is not left to the next source."""
        for value in values:
            monkeypatch.setenv(name, str(not expected))
            taskhawk.configure({name: value})
            assert getattr(taskhawk.settings, name) is expected
            monkeypatch.setenv(name, str(value))
            taskhawk.configure()
            assert getattr(taskhawk.settings, name) is expected

    @pytest.mark.parametrize("nothing", [None, ""])
    def test_nothing(self, monkeypatch, nothing):
        """None, or an empty text where no flag is wanted, leaves a setting to the next source."""
        monkeypatch.setenv("TASKHAWK_QUEUE", "mine")
        taskhawk.configure(TASKHAWK_QUEUE=nothing, TASKHAWK_ERROR_HOOK=nothing)
        assert taskhawk.settings.TASKHAWK_QUEUE == "mine"
        assert taskhawk.settings.TASKHAWK_ERROR_HOOK is None

    @pytest.mark.parametrize(
        ("name", "value", "got"),
        [
            ("AWS_ACCOUNT_ID", 1.5, "1.5"),
            ("AWS_ACCOUNT_ID", True, "True"),
            ("AWS_ACCOUNT_ID", -1, "-1"),
            ("AWS_CONNECT_TIMEOUT_S", 0, "0"),
            ("AWS_CONNECT_TIMEOUT_S", "soon", "'soon'"),
            ("AWS_CONNECT_TIMEOUT_S", True, "True"),
            ("AWS_CONNECT_TIMEOUT_S", [2], "[2]"),
            ("AWS_READ_TIMEOUT_S", -2, "-2"),
            ("AWS_READ_TIMEOUT_S", float("inf"), "inf"),
            ("AWS_READ_TIMEOUT_S", "nan", "'nan'"),
            ("AWS_ENDPOINT_SNS", 4566, "4566"),
            ("AWS_ENDPOINT_SQS", "127.0.0.1:4566", "'127.0.0.1:4566'"),
            ("AWS_ENDPOINT_SQS", "http://", "'http://'"),
            ("AWS_REGION", 1, "1"),
            ("IS_LAMBDA_APP", "perhaps", "'perhaps'"),
            ("TASKHAWK_SYNC", "fasle", "'fasle'"),
            ("TASKHAWK_BROKER", "redis://127.0.0.1", "'redis://127.0.0.1'"),
            ("TASKHAWK_BROKER", "SQS", "'SQS'"),
            ("TASKHAWK_BROKER", 5, "5"),
            ("TASKHAWK_MAX_DB_REUSE_LOOPS", 0, "0"),
            ("TASKHAWK_MAX_DB_REUSE_LOOPS", "five", "'five'"),
            ("TASKHAWK_MAX_DB_REUSE_LOOPS", 2.5, "2.5"),
            ("TASKHAWK_MAX_DB_REUSE_LOOPS", True, "True"),
            ("TASKHAWK_QUEUE", "my queue", "'my queue'"),
            ("TASKHAWK_QUEUE", "queue\n", "'queue\\n'"),
            ("TASKHAWK_QUEUE", "q" * 72, repr("q" * 72)),
            ("TASKHAWK_QUEUE", 7, "7"),
            ("TASKHAWK_DEFAULT_HEADERS", {"a": "b"}, "{'a': 'b'}"),
            ("TASKHAWK_ERROR_HOOK", "print", "'print'"),
            ("TASKHAWK_HEARTBEAT_HOOK", "os.sep", "'os.sep'"),
            ("TASKHAWK_HEARTBEAT_HOOK", ".hooks.beat", "'.hooks.beat'"),
            (
                "TASKHAWK_POST_PROCESS_HOOK",
                "json.nope",
                "'json.nope' (module 'json' has no attribute 'nope')",
            ),
            (
                "TASKHAWK_PRE_PROCESS_HOOK",
                "no_such_module.hook",
                "'no_such_module.hook' (No module named 'no_such_module')",
            ),
            ("TASKHAWK_TASK_CLASS", 5, "5"),
        ],
    )
    def test_illegal_value(self, name, value, got):
        """An error names the setting, its source, the rule, a legal value, and what came."""
        taskhawk.configure({name: value})
        for _ in range(2):  # it is not remembered as something else
            with pytest.raises(taskhawk.ConfigurationError) as caught:
                getattr(taskhawk.settings, name)
            expected = (
                f"{name} in configure(): expected {SETTINGS_RULES[name]}, got {got}"
            )
            assert str(caught.value) == expected

    @pytest.mark.parametrize("name", SETTINGS_RULES)
    def test_value_of_an_error_is_legal(self, name):
        """The legal value that an error shows is one, if the application has such a hook."""
        value = re.search(r"such as '(.+)'$", SETTINGS_RULES[name])[1]
        taskhawk.configure({name: value})
        if value.startswith("myapp."):
            with pytest.raises(
                taskhawk.ConfigurationError, match=r"\(No module named 'myapp'\)$"
            ):
                getattr(taskhawk.settings, name)
        else:
            read = str(getattr(taskhawk.settings, name)).replace(f"{Path.cwd()}/", "")
            assert read in (value, f"{value}.0")

    def test_illegal_value_of_a_module(self, settings_module):
        """An error of a setting from SETTINGS_MODULE names the module."""
        name = settings_module("TASKHAWK_QUEUE = 5")
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.settings.TASKHAWK_QUEUE  # noqa: B018 - reading it is the test
        rule = SETTINGS_RULES["TASKHAWK_QUEUE"]
        assert (
            str(caught.value)
            == f"TASKHAWK_QUEUE in the module {name}: expected {rule}, got 5"
        )

    def test_illegal_value_of_the_environment(self, monkeypatch):
        """An error of a setting from the environment says so."""
        monkeypatch.setenv("TASKHAWK_SYNC", "maybe")
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.settings.TASKHAWK_SYNC  # noqa: B018 - reading it is the test
        rule = SETTINGS_RULES["TASKHAWK_SYNC"]
        expected = f"TASKHAWK_SYNC in the environment: expected {rule}, got 'maybe'"
        assert str(caught.value) == expected

    @pytest.mark.parametrize(
        "name", ["AWS_ACCESS_KEY", "AWS_SECRET_KEY", "AWS_SESSION_TOKEN"]
    )
    @pytest.mark.parametrize("secret", [b"my-secret-value", ["my-secret-value"]])
    def test_secret(self, name, secret):
        """An error never shows the value of a secret, only its type: not in its traceback either.

        It is so where botocore's arguments are put together, too.
        """
        legal = dict.fromkeys(
            ("AWS_ACCESS_KEY", "AWS_SECRET_KEY", "AWS_SESSION_TOKEN"), "legal"
        )
        taskhawk.configure(
            {**legal, name: secret}, TASKHAWK_QUEUE="q", AWS_REGION="us-east-1"
        )
        invocation = taskhawk.task(settings_task, name="settings.secret").dispatch
        for use in (functools.partial(getattr, taskhawk.settings, name), invocation):
            with pytest.raises(taskhawk.ConfigurationError) as caught:
                use()
            got = type(secret).__name__
            expected = (
                f"{name} in configure(): expected {SETTINGS_RULES[name]}, got {got}"
            )
            assert str(caught.value) == expected
            assert "my-secret-value" not in "".join(
                traceback.format_exception(caught.value)
            )

    def test_unknown_name_in_the_environment(self, monkeypatch, caplog):
        """A name of the environment that only looks like a setting is one warning."""
        monkeypatch.setenv("TASKHAWK_QEUEU", "q")
        monkeypatch.setenv("TASKHAWK_XYZXYZXYZXYZXYZXYZXYZ", "q")
        for name in ("TASKHAWK_QUEUE", "TASKHAWK_SYNC", "AWS_REGION"):
            getattr(taskhawk.settings, name)
        taskhawk.configure()
        assert taskhawk.settings.TASKHAWK_QUEUE is None
        assert [(record.name, record.levelname) for record in caplog.records] == [
            ("taskhawk", "WARNING"),
            ("taskhawk", "WARNING"),
        ]
        what = "in the environment is not a setting of taskhawk"
        assert caplog.messages == [
            f"TASKHAWK_QEUEU {what}; did you mean TASKHAWK_QUEUE?",
            f"TASKHAWK_XYZXYZXYZXYZXYZXYZXYZ {what}",
        ]

    def test_unknown_name_in_a_module(self, settings_module, caplog):
        """So is a name of the settings module."""
        name = settings_module("TASKHAWK_ERROR_HOOKS = TASKHAWK_QUEUE = 'q'")
        assert taskhawk.settings.TASKHAWK_QUEUE == "q"
        assert taskhawk.settings.TASKHAWK_SYNC is False
        what = f"in the module {name} is not a setting of taskhawk"
        (message,) = caplog.messages
        assert (
            message == f"TASKHAWK_ERROR_HOOKS {what}; did you mean TASKHAWK_ERROR_HOOK?"
        )

    @pytest.mark.parametrize("kind", [dict, types.SimpleNamespace])
    def test_unknown_name_in_an_object(self, caplog, kind):
        """So is a name of the object that configure() was given, be it a mapping or not."""
        name = f"TASKHAWK_BROKER_{kind.__name__[:1].upper()}"
        taskhawk.configure(kind(**{name: 1, "DEBUG": True}))
        taskhawk.configure(kind(**{name: 1, "TASKHAWK_QUEUE": "q"}))
        assert taskhawk.settings.TASKHAWK_QUEUE == "q"
        assert caplog.messages == [
            f"{name} in configure() is not a setting of taskhawk; did you mean TASKHAWK_BROKER?"
        ]

    def test_names_of_4_7(self, monkeypatch, caplog, settings_module):
        """What only 4.7 has is known, and ignored without a word."""
        for name, value in SETTINGS_OF_4_7.items():
            monkeypatch.setenv(name, value)
        settings_module("\n".join(f"{name} = 1" for name in SETTINGS_OF_4_7))
        taskhawk.configure(SETTINGS_OF_4_7)
        assert taskhawk.settings.TASKHAWK_QUEUE is None
        assert caplog.messages == []

    def test_credentials_that_are_not_set(self, monkeypatch, settings_aws):
        """Without a key in any source, botocore finds credentials and region its own way."""
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIACHAIN")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "of-the-chain")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
        found = self.credentials_used(settings_aws, AWS_ACCESS_KEY="")
        assert found == ("AKIACHAIN", "eu-central-1", "of-the-chain")

    @pytest.mark.parametrize(
        (
            "sources",
            "key",
            "token",
        ),  # sources: configure(), the module, the environment
        [
            (("key secret token", "", ""), "AKIACONFIGURED", "configured"),
            (("key secret", "", "key secret token"), "AKIACONFIGURED", None),
            (("token", "", "key secret"), "AKIAENVIRONMENT", None),
            (("token", "key secret", "key secret token"), "AKIAMODULE", None),
            (("", "token", "key secret token"), "AKIAENVIRONMENT", "environment"),
        ],
    )
    def test_credentials_are_taken_together(  # noqa: PLR0917 - fixtures
        self, monkeypatch, settings_module, settings_aws, sources, key, token
    ):
        """Key, secret and token come from the one source that has the key, and are never mixed."""
        configured, module, environment = sources
        lines = [
            f"{n} = {value!r}"
            for n, value in self.credentials(module, "module").items()
        ]
        settings_module("\n".join(lines))
        for name, value in self.credentials(environment, "environment").items():
            monkeypatch.setenv(name, value)
        given = {
            "AWS_REGION": "us-west-1",
            **self.credentials(configured, "configured"),
        }
        assert self.credentials_used(settings_aws, **given) == (key, "us-west-1", token)

    @pytest.mark.parametrize(
        ("parts", "here", "missing"),
        [
            ("key", "AWS_ACCESS_KEY", "AWS_SECRET_KEY"),
            ("key token", "AWS_ACCESS_KEY", "AWS_SECRET_KEY"),
            ("secret", "AWS_SECRET_KEY", "AWS_ACCESS_KEY"),
        ],
    )
    def test_credentials_that_are_not_complete(self, monkeypatch, parts, here, missing):
        """A key without its secret is an error, and so is a secret without its key."""
        taskhawk.configure(self.credentials(parts, "configured"), TASKHAWK_QUEUE="q")
        for name, value in self.credentials("key secret", "environment").items():
            monkeypatch.setenv(name, value)
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.task(settings_task, name="settings.incomplete").dispatch()
        assert str(caught.value) == (
            f"{here} is set in configure(), but {missing} is not: expected both or neither"
        )

    @staticmethod
    def credentials(parts: str, source: str) -> dict[str, str]:
        """Return settings for the parts that are named, which tell where they came from."""
        values = {
            "key": f"AKIA{source.upper()}",
            "secret": f"{source} secret",
            "token": source,
        }
        names = {
            "key": "AWS_ACCESS_KEY",
            "secret": "AWS_SECRET_KEY",
            "token": "AWS_SESSION_TOKEN",
        }
        return {names[part]: values[part] for part in parts.split()}

    @staticmethod
    def credentials_used(settings_aws, **given: Any) -> tuple[str, str, str | None]:
        """Return key, region and token of the request that a dispatch makes."""
        taskhawk.configure(
            AWS_ENDPOINT_SQS=settings_aws.url, TASKHAWK_QUEUE="q", **given
        )
        with pytest.raises(
            taskhawk.ConfigurationError, match="there is no such queue here"
        ):
            taskhawk.task(settings_task, name="settings.credentials").dispatch()
        (call,) = settings_aws.calls
        headers = call.headers
        signed = re.search(
            r"Credential=(\w+)/\d+/([\w-]+)/sqs/", headers["Authorization"]
        )
        return signed[1], signed[2], headers.get("X-Amz-Security-Token")

    def test_required(self):
        """Without TASKHAWK_QUEUE, a dispatch to SQS says what to set, how, and where."""
        taskhawk.configure(AWS_REGION="us-east-1")
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.task(settings_task, name="settings.required").dispatch()
        rule = SETTINGS_RULES["TASKHAWK_QUEUE"]
        expected = f"TASKHAWK_QUEUE is not set: expected {rule}, {SETTINGS_WHERE}"
        assert str(caught.value) == expected

    def test_required_by_sns(self):
        """A topic's name needs AWS_ACCOUNT_ID besides."""
        taskhawk.configure(
            IS_LAMBDA_APP=True, AWS_REGION="us-east-1", TASKHAWK_QUEUE="q"
        )
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.task(settings_task, name="settings.required").dispatch()
        rule = SETTINGS_RULES["AWS_ACCOUNT_ID"]
        expected = f"AWS_ACCOUNT_ID is not set: expected {rule}, {SETTINGS_WHERE}"
        assert str(caught.value) == expected
        given = {
            "IS_LAMBDA_APP": True,
            "AWS_REGION": "us-east-1",
            "TASKHAWK_QUEUE": "Q",
        }
        taskhawk.configure(given, AWS_ACCOUNT_ID=1234567890)
        topic = taskhawk._brokers.sender().destination(taskhawk.Priority.low)
        assert topic == "arn:aws:sns:us-east-1:001234567890:taskhawk-q-low-priority"

    def test_required_region(self):
        """Where botocore finds no region either, the error says what to set."""
        taskhawk.configure(TASKHAWK_QUEUE="q")
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.task(settings_task, name="settings.required").dispatch()
        assert str(caught.value) == (
            "TASKHAWK-Q: no AWS region: set AWS_REGION, for example eu-west-1 (NoRegionError)"
        )

    @pytest.mark.parametrize(
        "given", [{"TASKHAWK_SYNC": True}, {"TASKHAWK_BROKER": "sqlite://"}]
    )
    def test_required_by_nothing(self, given):
        """Neither sync mode nor the embedded queue needs any setting of AWS, or a queue's name."""
        taskhawk.configure(given)
        assert taskhawk.task(settings_task, name="settings.free").dispatch()

    @pytest.mark.parametrize("alone", [False, True])
    def test_paths_of_1_4(self, monkeypatch, alone):
        """1.4's own defaults, dotted paths into submodules that are gone, go on working."""
        hooks = "PRE_PROCESS", "POST_PROCESS", "HEARTBEAT"
        given = {f"TASKHAWK_{hook}_HOOK": "taskhawk.conf.noop_hook" for hook in hooks}
        given["TASKHAWK_DEFAULT_HEADERS"] = "taskhawk.conf.default_headers_hook"
        given["TASKHAWK_TASK_CLASS"] = "taskhawk.task_manager.Task"
        taskhawk.configure(given, TASKHAWK_BROKER="sqlite://", TASKHAWK_SYNC=alone)
        task = taskhawk.task(settings_task, name="settings.of_1_4")
        assert type(task) is taskhawk.Task
        task.with_headers(mine="yes").dispatch()
        if not alone:
            broker = taskhawk._brokers.broker()
            queue = broker.destination(taskhawk.Priority.default)
            ledger = taskhawk.Worker(broker, [queue], loop_count=1).run()
            assert str(ledger).startswith("1 received, 1 acked, 0 ")
        assert settings_task.headers == {"mine": "yes"}

    @pytest.mark.parametrize(
        ("hook", "expected"),
        [
            (lambda task: {"from": task.name}, {"from": "settings.headers"}),
            (lambda *, task=None: {"from": task.name}, {"from": "settings.headers"}),
            (lambda **kwargs: {"from": list(kwargs)}, {"from": ["task"]}),
            (
                functools.partial(lambda a, task: {a: task.name}, "b"),
                {"b": "settings.headers"},
            ),
            (lambda: {"from": "1.4", "own": "2"}, {"from": "1.4"}),
            (lambda more=2: {"more": more}, {"more": 2}),
            (lambda: None, {}),
        ],
    )
    def test_default_headers(self, hook, expected):
        """The hook is given the task if it takes `task`, as in the manual, else called as by 1.4.0.

        What `with_headers` says goes before.
        """
        taskhawk.configure(TASKHAWK_SYNC=True, TASKHAWK_DEFAULT_HEADERS=hook)
        task = taskhawk.task(settings_task, name="settings.headers")
        task.with_headers(own="1").dispatch()
        assert settings_task.headers == {**expected, "own": "1"}

    def test_task_class(self):
        """TASKHAWK_TASK_CLASS makes the tasks; a decorator's options are set on what it made."""
        taskhawk.configure(TASKHAWK_TASK_CLASS=f"{__name__}.SettingsTask")
        policy = taskhawk.fixed(5)
        task = taskhawk.task(
            name="settings.shouted", priority=taskhawk.Priority.low, retry=policy
        )(settings_task)
        assert type(task) is SettingsTask
        assert (task.name, task.priority) == ("SETTINGS.SHOUTED", taskhawk.Priority.low)
        assert (task.retry, task.options_at_start) == (policy, None)

    def test_task_class_is_found_by_its_name(self):
        """A task whose class chose another name is called by that name."""
        taskhawk.configure(TASKHAWK_TASK_CLASS=SettingsTask, TASKHAWK_SYNC=True)
        task = taskhawk.task(settings_task, name="settings.renamed")
        settings_task.headers = None
        task.with_headers(a="b").dispatch()
        assert taskhawk.Task.find_by_name("SETTINGS.RENAMED") is task
        assert settings_task.headers == {"a": "b"}

    def test_task_class_is_read_at_decoration_alone(self, monkeypatch):
        """Decorating freezes no setting, not even this one, and trips over no other."""
        monkeypatch.setenv("TASKHAWK_QUEUE", "not legal")
        monkeypatch.setenv("TASKHAWK_TASK_CLASS", f"{__name__}.SettingsTask")
        first = taskhawk.task(settings_task, name="settings.first")
        monkeypatch.setenv("TASKHAWK_TASK_CLASS", f"{__name__}.SettingsOtherTask")
        second = taskhawk.task(settings_task, name="settings.second")
        monkeypatch.setenv("TASKHAWK_QUEUE", "legal")
        assert (type(first), type(second)) == (SettingsTask, SettingsOtherTask)
        assert taskhawk.settings.TASKHAWK_QUEUE == "legal"

    def test_task_class_that_is_none(self):
        """A TASKHAWK_TASK_CLASS that makes no tasks is refused where a task is declared."""
        taskhawk.configure(TASKHAWK_TASK_CLASS="types.MethodType.__call__")
        with pytest.raises(taskhawk.ConfigurationError):
            taskhawk.task(settings_task, name="settings.none")
        taskhawk.configure(TASKHAWK_TASK_CLASS=lambda fn, priority, name: fn)
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.task(settings_task, name="settings.none")
        assert re.fullmatch(
            r"TASKHAWK_TASK_CLASS: expected a subclass of taskhawk\.Task, got <function .+>",
            str(caught.value),
        )

    @pytest.mark.parametrize(
        ("code", "env", "expected"),
        [
            ("", {"DJANGO_SETTINGS_MODULE": "site_settings"}, "site True"),
            ("from django.conf import settings", {}, "environment True"),
            (
                "from django.conf import settings; settings.configure(TASKHAWK_QUEUE='by-hand')",
                {},
                "by-hand True",
            ),
            ("", {}, "environment False"),
        ],
        ids=["named", "imported only", "configured by hand", "not in use"],
    )
    def test_django(self, tmp_path, code, env, expected):
        """Django's settings count where Django is in use, and it is never imported otherwise."""
        (tmp_path / "site_settings.py").write_text("TASKHAWK_QUEUE = 'site'\n")
        code += "\nimport sys, taskhawk\nqueue = taskhawk.settings.TASKHAWK_QUEUE"
        code += "\nprint(queue, 'django' in sys.modules)"
        env = {"TASKHAWK_QUEUE": "environment", **env}
        assert settings_child(tmp_path, code, **env) == [expected]

    def test_django_errors(self, tmp_path):
        """Errors and warnings of Django's settings name them as the source."""
        code = """
            import logging, sys
            from django.conf import settings
            import taskhawk
            logging.basicConfig(stream=sys.stdout, format="%(message)s")
            settings.configure(TASKHAWK_QUEUE=5, TASKHAWK_QUEUEUE="q")
            try:
                taskhawk.settings.TASKHAWK_QUEUE
            except taskhawk.ConfigurationError as error:
                print(error)
        """
        rule = SETTINGS_RULES["TASKHAWK_QUEUE"]
        what = "in Django's settings is not a setting of taskhawk"
        assert settings_child(tmp_path, code) == [
            f"TASKHAWK_QUEUEUE {what}; did you mean TASKHAWK_QUEUE?",
            f"TASKHAWK_QUEUE in Django's settings: expected {rule}, got 5",
        ]

    def test_override_settings(self, tmp_path, settings_aws):
        """Django's override_settings has its effect at once, inside and after the block.

        Clients are made anew where they depend on it; messages in memory outlive it.
        """
        url = settings_aws.url
        code = f"""
            import contextlib
            from django.conf import settings
            from django.test.utils import override_settings
            import taskhawk
            settings.configure(TASKHAWK_QUEUE="one", AWS_REGION="us-east-1", AWS_ACCESS_KEY="k",
                               AWS_SECRET_KEY="s", AWS_ENDPOINT_SQS="{url}/one")
            ran = []
            @taskhawk.task(name="task")
            def task():
                ran.append(1)
            def dispatch():
                print(taskhawk.settings.TASKHAWK_QUEUE)
                with contextlib.suppress(taskhawk.ConfigurationError):
                    task.dispatch()
            dispatch()
            with override_settings(TASKHAWK_QUEUE="two", AWS_ENDPOINT_SQS="{url}/two"):
                dispatch()
            dispatch()
            with override_settings(TASKHAWK_BROKER="sqlite://"):
                with override_settings(DEBUG=True):
                    task.dispatch()
                taskhawk.listen_for_messages(taskhawk.Priority.default, loop_count=1)
            print(ran)
        """
        assert settings_child(tmp_path, code) == ["one", "two", "one", "[1]"]
        paths = [call.path.strip("/") for call in settings_aws.calls]
        assert paths == ["one", "two", "one"]

    #: the start of a script that has a database of Django's in a file, and a task that uses it
    DJANGO_DATABASE = """
        import json, logging, sqlite3, threading
        import django
        from django.conf import settings
        from django.db import connection, transaction
        import taskhawk

        def use(engine="django.db.backends.sqlite3", **more):
            database = {"ENGINE": engine, "NAME": "django.db"}
            settings.configure(DATABASES={"default": database}, TASKHAWK_BROKER="sqlite://", **more)
            django.setup()

        def is_open(raw):
            try:
                return bool(raw.execute("SELECT 1"))
            except sqlite3.ProgrammingError:
                return False

        used = []

        @taskhawk.task(name="query")
        def query():
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
            used.append((connection.connection, threading.current_thread()))
    """

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("", "[5, 2] [False, True]"),
            ("TASKHAWK_MAX_DB_REUSE_LOOPS=3", "[3, 3, 1] [False, False, True]"),
            (
                "TASKHAWK_MAX_DB_REUSE_LOOPS=1",
                "[1, 1, 1, 1, 1, 1, 1] [False" + ", False" * 6 + "]",
            ),
        ],
    )
    def test_django_connections_are_recycled(self, tmp_path, given, expected):
        """A worker closes the connections of its thread after so many tasks, and no others."""
        code = (
            self.DJANGO_DATABASE
            + f"""
        use({given})
        connection.ensure_connection()
        mine = connection.connection
        for _ in range(7):
            query.dispatch()

        def listen():
            taskhawk.listen_for_messages(taskhawk.Priority.default, loop_count=7)
            raws = list(dict.fromkeys(raw for raw, _ in used))
            runs = [raw for raw, _ in used]
            print([runs.count(raw) for raw in raws], [is_open(raw) for raw in raws])
            print({{thread.name for _, thread in used}})
            connection.close()

        worker = threading.Thread(target=listen, name="the worker's")
        worker.start()
        worker.join()
        print(connection.connection is mine, is_open(mine))
        connection.close()
        """
        )
        found = settings_child(tmp_path, code)
        assert found == [expected, '{"the worker\'s"}', "True True"]

    def test_django_connection_in_a_transaction(self, tmp_path):
        """A connection inside its caller's transaction is left alone until the next time."""
        code = (
            self.DJANGO_DATABASE
            + """
        use(TASKHAWK_MAX_DB_REUSE_LOOPS=1)
        body = json.dumps(taskhawk.Message.new("query").as_dict())
        message = taskhawk.QueueMessage(body, "1")
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("CREATE TABLE kept (id INTEGER)")
            raw = connection.connection
            print(taskhawk.process(message).fate.name)
            print(connection.connection is raw, is_open(raw))
        print(connection.introspection.table_names())
        print(taskhawk.process(message).fate.name)
        print(connection.connection, is_open(raw))
        """
        )
        found = settings_child(tmp_path, code)
        assert found == [
            "acknowledge",
            "True True",
            "['kept']",
            "acknowledge",
            "None False",
        ]

    def test_django_connection_that_fails_to_close(self, tmp_path):
        """A database that fails while a connection is closed costs the worker no message."""
        (tmp_path / "failing").mkdir()
        (tmp_path / "failing" / "base.py").write_text(
            "from django.db import OperationalError\n"
            "from django.db.backends.sqlite3 import base\n"
            "class DatabaseWrapper(base.DatabaseWrapper):\n"
            "    def _close(self):\n"
            "        super()._close()\n"
            "        raise OperationalError('the server has gone away')\n"
        )
        code = (
            self.DJANGO_DATABASE
            + """
        use("failing", TASKHAWK_MAX_DB_REUSE_LOOPS=1)
        logging.basicConfig(level=logging.CRITICAL)
        query.dispatch()
        query.dispatch()
        print(taskhawk.listen_for_messages(taskhawk.Priority.default, loop_count=2).acked)
        print(len(used))
        """
        )
        assert settings_child(tmp_path, code) == ["2", "2"]


# --- 4. messages ----------------------------------------------------------------------

TIMESTAMP_RULE = "expected epoch milliseconds or an ISO 8601 date and time"
NOT_FINITE = "Out of range float values are not JSON compliant"


def nested(depth: int) -> list[Any]:
    """Return an array that many deep."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.fixture
def send_email(isolated):
    """Return the task that the valid message is for; its attribute `calls` collects its runs."""
    calls = []

    @taskhawk.task(name="tasks.send_email")
    def send_email(to, subject, from_email=None):
        calls.append((to, subject, from_email))

    send_email.calls = calls
    return send_email


JSON_TEXT = st.text(
    st.characters(exclude_categories=())
)  # with lone surrogates and NUL
JSON_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | JSON_TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(JSON_TEXT, inner),
    max_leaves=8,
)
ISO_8601_LIKE = st.builds(
    "{:04}-{:02}-{:02}{}{}{}".format,
    st.sampled_from([0, 1, 1900, 1969, 1970, 2000, 2023, 2024, 2100, 9999])
    | st.integers(0, 9999),
    st.integers(0, 13),
    st.integers(0, 32),
    st.sampled_from(["", "T", " ", "t", "TT"]),
    st.sampled_from(
        ["", "00:00", "23:59", "24:00", "12:60", "12:30:59", "12:30:60", "1:30"]
    )
    | st.builds("23:59:59{}{}".format, st.sampled_from(".,;"), st.integers(0, 10**10)),
    st.sampled_from(["", "Z", "z", "+05:30", "-0130", "+23:59", "+24:00", "+1", "\n"]),
)
ALMOST = {
    "metadata.timestamp": ISO_8601_LIKE
    | st.datetimes().map(dt.datetime.isoformat)
    | st.integers(-2, 1)
    | st.sampled_from(
        [8_640_000_000_000_000, 8_640_000_000_000_000.5, 8_640_000_000_000_001]
    )
    | st.floats(allow_nan=False),
    "metadata.version": st.sampled_from(["1.0", "1", "1.0 ", 1.0, "2.0"]),
    "metadata.priority": st.sampled_from(
        ["default", "high", "low", "bulk", "High", "", 1]
    ),
    **dict.fromkeys((*VALID, "metadata.unknown", "unknown"), JSON_VALUE),
}


@st.composite
def almost_valid(draw):
    """Draw a message that is valid but for at most two edits, which may be valid too."""
    data = copy.deepcopy(VALID)
    for path in draw(
        st.lists(st.sampled_from(sorted(ALMOST)), max_size=2, unique=True)
    ):
        value = draw(st.just(ABSENT) | ALMOST[path] | JSON_VALUE)
        *parents, key = path.split(".")
        parent = data.get(parents[0]) if parents else data
        if isinstance(parent, dict):
            parent.pop(key, None)
            parent.update({} if value is ABSENT else {key: value})
    return data


class TestMessages:
    """Untrusted bytes stop in room 4, and nothing leaves that it would refuse."""

    def test_wire_format(self, memory, send_email):
        """A dispatched message has 1.4's format, with a new id and the time of the dispatch."""
        before = time.time_ns() // 1_000_000
        call = send_email.with_headers(request_id="1234").with_priority(
            taskhawk.Priority.high
        )
        message_id = call.dispatch(*VALID["args"], **VALID["kwargs"])
        [received] = queued(taskhawk.Priority.high)
        data = json.loads(received.body)
        assert str(uuid.UUID(message_id, version=4)) == message_id
        timestamp = data["metadata"]["timestamp"]
        assert type(timestamp) is int
        assert before <= timestamp <= time.time_ns() // 1_000_000
        metadata = {**VALID["metadata"], "timestamp": timestamp}
        assert same_json(data, {**VALID, "id": message_id, "metadata": metadata})
        assert received.body.isascii()
        assert taskhawk.process(received) == taskhawk.Outcome(taskhawk.Fate.acknowledge)
        assert send_email.calls == [
            ("email@automatic.com", "Hello!", "spam@example.com")
        ]

    def test_properties(self, send_email):
        """A message has the properties and methods of 1.4."""
        message = taskhawk.Message(VALID)
        assert message.id == VALID["id"]
        assert message.metadata == VALID["metadata"]
        assert (message.timestamp, message.version) == (1460868253255, "1.0")
        assert message.priority is taskhawk.Priority.high
        assert message.headers == VALID["headers"]
        assert (message.task, message.task_name) == (send_email, "tasks.send_email")
        assert (message.args, message.kwargs) == (VALID["args"], VALID["kwargs"])
        assert message.as_dict() == dict(message.items()) == VALID
        assert (message.CURRENT_VERSION, list(message.VERSIONS)) == ("1.0", ["1.0"])
        message.call_task(None)
        assert len(send_email.calls) == 1
        message.priority = taskhawk.Priority.low
        assert message.as_dict()["metadata"]["priority"] == "low"

    def test_equality(self):
        """Messages are equal where their contents are, and can't be keys of a dict."""
        assert taskhawk.Message(VALID) == taskhawk.Message(copy.deepcopy(VALID))
        assert taskhawk.Message(VALID) != taskhawk.Message(edited("id", "other"))
        assert taskhawk.Message(VALID) != VALID
        with pytest.raises(TypeError, match=r"^unhashable type: 'Message'$"):
            hash(taskhawk.Message(VALID))

    def test_new(self, memory, send_email):
        """Message.new takes its arguments in 1.4's order, and publish() sends what it made."""
        kwargs, headers = {"from_email": 3}, {"h": 4}
        message = taskhawk.Message.new(
            "tasks.send_email", (1, 2), kwargs, "id", headers
        )
        assert message.as_dict() == {
            "id": "id",
            "metadata": {
                "priority": "default",
                "timestamp": message.timestamp,
                "version": "1.0",
            },
            "headers": {"h": 4},
            "task": "tasks.send_email",
            "args": [1, 2],
            "kwargs": {"from_email": 3},
        }
        assert taskhawk.publish(message) == "id"
        [received] = queued()
        assert json.loads(received.body) == message.as_dict()
        least = taskhawk.Message.new(
            "tasks.send_email", priority=taskhawk.Priority.bulk
        )
        assert (least.args, least.kwargs, least.headers) == ([], {}, {})
        assert least.priority is taskhawk.Priority.bulk
        assert least.id != taskhawk.Message.new("tasks.send_email").id

    def test_unknown_task(self):
        """Neither Message.new nor a run knows a task that is not registered."""
        with pytest.raises(taskhawk.TaskNotFound) as caught:
            taskhawk.Message.new("tasks.nope")
        text = "no task is registered as 'tasks.nope': is its module imported?"
        assert str(caught.value) == text
        outcome = run_body(json.dumps(edited("task", "tasks.nope")))
        assert (outcome.fate, str(outcome.error)) == (taskhawk.Fate.retry, text)
        assert type(outcome.error) is taskhawk.TaskNotFound

    @pytest.mark.parametrize(
        ("path", "value", "sentence"),
        [
            ("id", ABSENT, "id: expected a non-empty string, got nothing"),
            ("id", "", 'id: expected a non-empty string, got ""'),
            ("id", None, "id: expected a non-empty string, got null"),
            ("id", 5, "id: expected a non-empty string, got a number"),
            ("id", 0.5, "id: expected a non-empty string, got a number"),
            ("id", True, "id: expected a non-empty string, got a boolean"),
            ("id", ["x"], "id: expected a non-empty string, got an array"),
            ("id", {"x": 1}, "id: expected a non-empty string, got an object"),
            ("metadata", ABSENT, "metadata: expected an object, got nothing"),
            ("metadata", None, "metadata: expected an object, got null"),
            ("metadata", [], "metadata: expected an object, got an array"),
            ("metadata", "", 'metadata: expected an object, got ""'),
            ("headers", ABSENT, "headers: expected an object, got nothing"),
            ("headers", None, "headers: expected an object, got null"),
            ("headers", [["a", "b"]], "headers: expected an object, got an array"),
            ("task", ABSENT, "task: expected a non-empty string, got nothing"),
            ("task", "", 'task: expected a non-empty string, got ""'),
            ("task", ["os.system"], "task: expected a non-empty string, got an array"),
            ("args", ABSENT, "args: expected an array, got nothing"),
            ("args", "ab", "args: expected an array, got a string"),
            ("args", {"0": 1}, "args: expected an array, got an object"),
            ("kwargs", ABSENT, "kwargs: expected an object, got nothing"),
            ("kwargs", [], "kwargs: expected an object, got an array"),
            (
                "metadata.version",
                ABSENT,
                'metadata.version: expected "1.0", got nothing',
            ),
            ("metadata.version", 2, 'metadata.version: expected "1.0", got 2'),
            ("metadata.version", 1.0, 'metadata.version: expected "1.0", got 1.0'),
            ("metadata.version", "2.0", 'metadata.version: expected "1.0", got "2.0"'),
            ("metadata.version", None, 'metadata.version: expected "1.0", got null'),
            ("metadata.version", False, 'metadata.version: expected "1.0", got false'),
            (
                "metadata.version",
                ["1.0"],
                'metadata.version: expected "1.0", got an array',
            ),
            (
                "metadata.version",
                10**99,
                'metadata.version: expected "1.0", got a huge number',
            ),
            (
                "metadata.version",
                "9" * 99,
                f'metadata.version: expected "1.0", got "{"9" * 40}"',
            ),
            *(
                (
                    "metadata.timestamp",
                    value,
                    f"metadata.timestamp: {TIMESTAMP_RULE}, got {shown}",
                )
                for value, shown in (
                    (ABSENT, "nothing"),
                    (None, "null"),
                    (True, "true"),
                    ([], "an array"),
                    ({}, "an object"),
                    ("", '""'),
                    (-1, "-1"),
                    (-0.5, "-0.5"),
                    (8_640_000_000_000_001, "8640000000000001"),
                    (10**400, "a huge number"),
                    ("yesterday", '"yesterday"'),
                    ("2018-04-05T11:22:33\n", '"2018-04-05T11:22:33\\n"'),
                    ("2023-02-29", '"2023-02-29"'),
                    ("1900-02-29", '"1900-02-29"'),
                    ("0000-01-01", '"0000-01-01"'),
                    ("2018-04-31", '"2018-04-31"'),
                    ("2018-04-05T24:00:00Z", '"2018-04-05T24:00:00Z"'),
                    ("٢٠١٨-04-05", '"\\u0662\\u0660\\u0661\\u0668-04-05"'),
                )
            ),
            *(
                (
                    "metadata.priority",
                    value,
                    f"metadata.priority: expected one of default, high, low, bulk, got {shown}",
                )
                for value, shown in (
                    (None, "null"),
                    (2, "2"),
                    ("urgent", '"urgent"'),
                    ("HIGH", '"HIGH"'),
                    (["high"], "an array"),
                )
            ),
        ],
    )
    def test_says_what_is_wrong(self, send_email, path, value, sentence):
        """An invalid message is refused, by the path of what is wrong, and never run."""
        data = edited(path, value)
        with pytest.raises(taskhawk.ValidationError) as caught:
            taskhawk.Message(data)
        assert str(caught.value) == sentence
        outcome = run_body(json.dumps(data))
        assert (outcome.fate, outcome.delay_s) == (taskhawk.Fate.retry, None)
        assert (type(outcome.error), str(outcome.error)) == (
            taskhawk.ValidationError,
            sentence,
        )
        assert send_email.calls == []

    @pytest.mark.parametrize(
        ("body", "sentence"),
        [
            ("", "message: not JSON at character 0"),
            ("nope", "message: not JSON at character 0"),
            ("{", "message: not JSON at character 1"),
            ('{"password": hunter2}', "message: not JSON at character 13"),
            ('{"a": 1} x', "message: not JSON at character 9"),
            ("{'id': 1}", "message: not JSON at character 1"),
            ('{"id": NaN}', "message: not JSON"),
            ('{"id": -Infinity}', "message: not JSON"),
            ('{"id": 1e999}', "message: not JSON"),
            ("9" * 5000, "message: not JSON"),
            ("[" * 100_000, "message: nested too deeply"),
            ('{"a":' * 100_000, "message: nested too deeply"),
            ("[1]", "message: expected an object, got an array"),
            ("null", "message: expected an object, got null"),
            ("true", "message: expected an object, got a boolean"),
            ("1e3", "message: expected an object, got a number"),
            ('"x"', "message: expected an object, got a string"),
            ("{}", "id: expected a non-empty string, got nothing"),
            (None, "message: expected a string of JSON, got null"),
            (b"{}", "message: expected a string of JSON, got bytes"),
        ],
        ids=repr,
    )
    def test_hostile_body(self, body, sentence):
        """A body that is no message is left to the queue, with an error that does not quote it."""
        outcome = run_body(body)
        assert (outcome.fate, outcome.delay_s) == (taskhawk.Fate.retry, None)
        assert (type(outcome.error), str(outcome.error)) == (
            taskhawk.ValidationError,
            sentence,
        )

    @hypothesis.given(st.text() | st.binary() | JSON_VALUE.map(json.dumps))
    def test_any_body(self, body):
        """Whatever a body is, the outcome is a ValidationError, never another exception."""
        outcome = run_body(body)
        assert outcome.fate is taskhawk.Fate.retry
        assert isinstance(outcome.error, taskhawk.ValidationError)

    @pytest.mark.parametrize(
        ("timestamp", "epoch_ms"),
        [
            (0, 0),
            (1460868253255, 1460868253255),
            (1460868253255.9, 1460868253255),
            (1.5e12, 1500000000000),
            (8_640_000_000_000_000, 8_640_000_000_000_000),
            ("2018-04-05", 1522886400000),
            ("2018-04-05T11:22", 1522927320000),
            ("2018-04-05 11:22:33", 1522927353000),
            ("2018-04-05T11:22:33Z", 1522927353000),
            ("2018-04-05T11:22:33.456Z", 1522927353456),
            ("2018-04-05T11:22:33,4", 1522927353400),
            ("2018-04-05T11:22:33.456789999Z", 1522927353456),
            ("2018-04-05T11:22:33.456+05:30", 1522907553456),
            ("2018-04-05T11:22:33-0130", 1522932753000),
            ("2000-02-29T00:00:00Z", 951782400000),
            ("2024-02-29", 1709164800000),
            ("1969-07-20T20:17:40Z", 0),  # so that what was decoded can be sent again
        ],
    )
    def test_timestamps(self, monkeypatch, timestamp, epoch_ms):
        """A timestamp is milliseconds or ISO 8601 (UTC unless it says so), and becomes an int."""
        with monkeypatch.context() as context:
            context.setenv("TZ", "IST-5:30")  # local time must not matter
            time.tzset()
            message = taskhawk.Message(edited("metadata.timestamp", timestamp))
        time.tzset()
        assert (message.timestamp, type(message.timestamp)) == (epoch_ms, int)
        assert message.as_dict()["metadata"]["timestamp"] == epoch_ms

    def test_lenient(self, send_email):
        """Unknown keys are ignored, the priority may be missing, and header values are any JSON."""
        data = {
            **edited("metadata.priority", ABSENT),
            "headers": {"a": {"b": [None]}},
            "more": [1],
        }
        data["metadata"]["unknown"] = 1
        message = taskhawk.Message(data)
        assert message.priority is taskhawk.Priority.default
        assert message.headers == {"a": {"b": [None]}}
        metadata = {**VALID["metadata"], "priority": "default"}
        assert message.as_dict() == {
            **VALID,
            "headers": {"a": {"b": [None]}},
            "metadata": metadata,
        }
        assert run_body(json.dumps(data)).fate is taskhawk.Fate.acknowledge
        assert len(send_email.calls) == 1

    def test_python_types(self, send_email):
        """A value that is not even JSON is called by its type."""
        with pytest.raises(taskhawk.ValidationError) as caught:
            taskhawk.Message.new("tasks.send_email", msg_id=uuid.UUID(VALID["id"]))
        assert str(caught.value) == "id: expected a non-empty string, got UUID"

    @pytest.mark.parametrize(
        ("value", "error", "reason"),
        [
            ({1}, TypeError, "set is not a JSON type"),
            (b"x", TypeError, "bytes is not a JSON type"),
            ([{"a": object()}], TypeError, "object is not a JSON type"),
            (
                {(1, 2): 3},
                TypeError,
                "keys must be str, int, float, bool or None, not tuple",
            ),
            (float("nan"), taskhawk.ValidationError, NOT_FINITE),
            (-float("inf"), taskhawk.ValidationError, NOT_FINITE),
            (Decimal("NaN"), taskhawk.ValidationError, NOT_FINITE),
            (Decimal("Infinity"), taskhawk.ValidationError, NOT_FINITE),
        ],
        ids=repr,
    )
    def test_not_json(self, memory, send_email, value, error, reason):
        """An argument or header that is not JSON fails at the dispatch, which names it."""
        for path, call in {
            "args[1]": lambda: send_email.dispatch("x", value),
            "kwargs.from_email": lambda: send_email.dispatch(
                "x", "y", from_email=value
            ),
            "headers.h": lambda: send_email.with_headers(h=value).dispatch("x", "y"),
        }.items():
            with pytest.raises(error) as caught:
                call()
            # newer Pythons add the value, which is a float here
            text = re.sub(r"(compliant): -?(nan|inf)$", r"\1", str(caught.value))
            assert text == f"tasks.send_email: {path} is not JSON: {reason}"
            assert type(caught.value) is error
        assert queued() == []

    def test_circular(self, memory, send_email):
        """An argument that contains itself fails at the dispatch."""
        loop = []
        loop.append(loop)
        with pytest.raises(taskhawk.ValidationError) as caught:
            send_email.dispatch("x", loop)
        text = "tasks.send_email: args[1] is not JSON: Circular reference detected"
        assert str(caught.value) == text

    def test_too_deep(self, memory, send_email):
        """What is nested too deeply for JSON is a ValidationError, wherever the limit is."""
        for dispatch in (
            lambda depth: send_email.dispatch("x", nested(depth)),
            lambda depth: send_email.with_headers(h=nested(depth)).dispatch("x", "y"),
        ):
            fits, too_deep = 100, 100_000
            while too_deep - fits > 1:
                depth = (fits + too_deep) // 2
                try:
                    dispatch(depth)
                    fits = depth
                except taskhawk.ValidationError as error:
                    assert str(error).startswith("tasks.send_email: ")  # noqa: PT017
                    too_deep = depth

    def test_decimals(self, memory, send_email):
        """Decimals become numbers: whole ones ints, the others floats."""
        send_email.dispatch(
            Decimal(2), [Decimal("1.10"), Decimal("1E+3")], from_email=Decimal("-0.5")
        )
        [received] = queued()
        data = json.loads(received.body)
        assert same_json(data["args"], [2, [1.1, 1000]])
        assert same_json(data["kwargs"], {"from_email": -0.5})

    def test_round_trip(self):
        """Any JSON call arrives as it was made: arguments, keyword arguments and headers."""
        runs = []

        @taskhawk.task(name="tasks.echo")
        def echo(*, value, headers, metadata, **kwargs):
            runs.append((value, kwargs, headers, metadata.id))

        @taskhawk.task(name="tasks.echo_args")
        def echo_args(first, second, /, headers, **kwargs):
            del kwargs["metadata"]
            runs.append((second, kwargs, headers, first))

        taken = {"value", "headers", "metadata"}
        keywords = st.dictionaries(
            JSON_TEXT.filter(lambda name: name not in taken), JSON_VALUE
        )

        @hypothesis.given(JSON_VALUE, keywords, st.dictionaries(JSON_TEXT, JSON_VALUE))
        def check(value, kwargs, headers):
            taskhawk.configure(TASKHAWK_BROKER="sqlite://")
            runs.clear()
            message_id = echo.with_headers(**headers).dispatch(value=value, **kwargs)
            echo_args.with_headers(**headers).dispatch(message_id, value, **kwargs)
            for received in queued():
                assert taskhawk.process(received).error is None
            assert len(runs) == 2
            for run in runs:
                assert same_json(run, (value, kwargs, headers, message_id))

        check()

    @hypothesis.given(almost_valid() | JSON_VALUE)
    @hypothesis.example(edited("metadata.timestamp", "0000-01-01"))
    @hypothesis.example(edited("metadata.timestamp", "0000-02-29T00:00:00Z"))
    @hypothesis.example(edited("metadata.timestamp", "1970-01-01T00:00+23:59"))
    @hypothesis.settings(max_examples=500)
    def test_schema(self, data):
        """The validator and the JSON Schema agree on every message, valid or nearly so."""
        says_schema = jsonschema.Draft202012Validator(taskhawk.SCHEMA).is_valid(data)
        try:
            message = taskhawk.Message(data)
        except taskhawk.ValidationError:
            assert not says_schema
        else:
            assert says_schema
            assert taskhawk.Message(message.as_dict()) == message

    def test_schema_file(self):
        """schema.json is a valid JSON Schema 2020-12, and the one of the module."""
        jsonschema.Draft202012Validator.check_schema(taskhawk.SCHEMA)
        text = project_file("schema.json").read_text(encoding="utf-8")
        assert json.loads(text) == taskhawk.SCHEMA


# What PyPI's taskhawk 1.4.0 and 4.7.0 sent: the library, how it came to the queue (SNS: with or
# without raw delivery), the case, and the body, verbatim but for line breaks in place of spaces.
RECORDED = r"""
1.4.0 sqs plain
{"id": "d91c68be-a158-4a97-bba6-5c65e3b6be81", "metadata": {"priority": "default", "timestamp":
1795220678277, "version": "1.0"}, "headers": {}, "task": "tasks.send_email", "args":
["example@email.com", "Hello!"], "kwargs": {}}

1.4.0 sqs kwargs
{"id": "05c6bd64-7caa-4527-9085-4cad977461cd", "metadata": {"priority": "default", "timestamp":
1795220678551, "version": "1.0"}, "headers": {}, "task": "tasks.send_email", "args":
["example@email.com"], "kwargs": {"subject": "Hello!", "from_email": "spam@example.com"}}

1.4.0 sqs headers-str
{"id": "75343dbf-6798-4708-8b9c-c2bd9268a829", "metadata": {"priority": "default", "timestamp":
1795220678814, "version": "1.0"}, "headers": {"request_id": "1234", "tenant": "acme"}, "task":
"tasks.notify", "args": ["bob"], "kwargs": {}}

1.4.0 sqs headers-mixed
{"id": "5b660205-7f09-42aa-bc23-a6f750df0ef7", "metadata": {"priority": "default", "timestamp":
1795220679052, "version": "1.0"}, "headers": {"count": 3, "ratio": 0.5, "flag": true, "nothing":
null, "nested": {"a": [1, {"b": null}], "\u00e9": "it's"}, "name": "\u017dlu\u0165ou\u010dk\u00fd
\ud83d\udc0e", "price": 1.5}, "task": "tasks.send_email", "args": ["a@b.c", "mixed"], "kwargs": {}}

1.4.0 sqs high-task
{"id": "457fd27e-130c-4184-bf2a-68d4b87abcc9", "metadata": {"priority": "high", "timestamp":
1795220679331, "version": "1.0"}, "headers": {}, "task": "tasks.send_email_high", "args":
["example@email.com", "Now!"], "kwargs": {}}

1.4.0 sqs values
{"id": "02133125-dc2c-432d-ad2c-14eefbbd92f3", "metadata": {"priority": "default", "timestamp":
1795220679622, "version": "1.0"}, "headers": {}, "task": "tasks.store", "args": [[2, 1.1, 1000,
0.12345678901234568, 100000000000000000000, 1e+22, -0.0, true, null, "\u017dlu\u0165ou\u010dk\u00fd
\ud83d\udc0e \u2028 \"q\" \\ / <&> \n\t\u007f"]], "kwargs": {"extra": {"tuple": [1, [2]], "3":
{"deep": [[], {}]}, "d": {"x": 5}}}}

1.4.0 sns-raw headers-mixed
{"id": "3d23dc0a-218a-46dc-8c33-0c2c94830271", "metadata": {"priority": "default", "timestamp":
1795220679981, "version": "1.0"}, "headers": {"count": 3, "ratio": 0.5, "flag": true, "nothing":
null, "nested": {"a": [1, {"b": null}], "\u00e9": "it's"}, "name": "\u017dlu\u0165ou\u010dk\u00fd
\ud83d\udc0e", "price": 1.5}, "task": "tasks.send_email", "args": ["a@b.c", "mixed"], "kwargs": {}}

1.4.0 sns headers-mixed
{"id": "75cb7313-7b20-4e4b-9793-f474fcf6800d", "metadata": {"priority": "default", "timestamp":
1795220680339, "version": "1.0"}, "headers": {"count": 3, "ratio": 0.5, "flag": true, "nothing":
null, "nested": {"a": [1, {"b": null}], "\u00e9": "it's"}, "name": "\u017dlu\u0165ou\u010dk\u00fd
\ud83d\udc0e", "price": 1.5}, "task": "tasks.send_email", "args": ["a@b.c", "mixed"], "kwargs": {}}

4.7.0 sns-raw plain
{"id": "4acc8aaf-35f4-47a9-bb93-4578d298e522", "metadata": {"timestamp": 1795220680640, "priority":
"default", "version": "1.0"}, "headers": {}, "task": "tasks.send_email", "args":
["example@email.com", "Hello!"], "kwargs": {}}

4.7.0 sns-raw headers-mixed
{"id": "7282171d-71ed-4b74-aeaf-470dfcd76336", "metadata": {"timestamp": 1795220680931, "priority":
"default", "version": "1.0"}, "headers": {"count": 3, "ratio": 0.5, "flag": true, "nothing": null,
"nested": {"a": [1, {"b": null}], "\u00e9": "it's"}, "name": "\u017dlu\u0165ou\u010dk\u00fd
\ud83d\udc0e", "price": 1.5}, "task": "tasks.send_email", "args": ["a@b.c", "mixed"], "kwargs": {}}

4.7.0 sns-raw values
{"id": "f00cf316-a9b0-4d5b-bfa1-2d9a63001c5c", "metadata": {"timestamp": 1795220681240, "priority":
"default", "version": "1.0"}, "headers": {}, "task": "tasks.store", "args": [[2, 1.1, 1000,
0.12345678901234568, 100000000000000000000, 1e+22, -0.0, true, null, "\u017dlu\u0165ou\u010dk\u00fd
\ud83d\udc0e \u2028 \"q\" \\ / <&> \n\t\u007f"]], "kwargs": {"extra": {"tuple": [1, [2]], "3":
{"deep": [[], {}]}, "d": {"x": 5}}}}

4.7.0 sns-raw kwargs-task
{"id": "0c27eb29-4b8e-4d1a-9859-de4023a01abe", "metadata": {"timestamp": 1795220681601, "priority":
"default", "version": "1.0"}, "headers": {"source": "web"}, "task": "tasks.log_event", "args":
["login"], "kwargs": {"user": {"id": 7}, "ok": true}}

4.7.0 sns-raw bulk
{"id": "ab0309e5-11b7-4c6f-a8e4-9a7eedb9e28e", "metadata": {"timestamp": 1795220682009, "priority":
"bulk", "version": "1.0"}, "headers": {"batch": "7"}, "task": "tasks.send_email", "args": ["a@b.c",
"bulk"], "kwargs": {}}

4.7.0 sns headers-str
{"id": "90b8c9b1-0791-4104-8561-53f160f29539", "metadata": {"timestamp": 1795220682426, "priority":
"default", "version": "1.0"}, "headers": {"request_id": "1234", "tenant": "acme"}, "task":
"tasks.notify", "args": ["bob"], "kwargs": {}}
"""
RECORDINGS = {
    first: " ".join(rest)
    for first, *rest in (
        record.splitlines() for record in RECORDED.strip().split("\n\n")
    )
}
RECORDED_ATTRIBUTES = {  # all of them are Strings
    "bulk": {"batch": "7"},
    "headers-mixed": {
        "count": "3",
        "ratio": "0.5",
        "flag": "True",
        "nothing": "None",
        "nested": "{'a': [1, {'b': None}], 'é': \"it's\"}",
        "name": "Žluťoučký 🐎",
        "price": "1.50",
    },
    "headers-str": {"request_id": "1234", "tenant": "acme"},
    "kwargs-task": {"source": "web"},
}
MIXED_HEADERS = {
    "count": 3,
    "ratio": 0.5,
    "flag": True,
    "nothing": None,
    "nested": {"a": [1, {"b": None}], "é": "it's"},
    "name": "Žluťoučký 🐎",
    "price": Decimal("1.50"),
}
VALUES = [
    Decimal(2),
    Decimal("1.10"),
    Decimal("1E+3"),
    Decimal("0.1234567890123456789"),
]
VALUES += [10**20, 1e22, -0.0, True, None, 'Žluťoučký 🐎 \u2028 "q" \\ / <&> \n\t\x7f']
EXTRA = {"tuple": (1, (2,)), 3: {"deep": [[], {}]}, "d": {"x": Decimal("5.0")}}
RECORDED_CALLS = {  # what was dispatched: task, headers, arguments, keyword arguments
    "bulk": ("send_email", {"batch": "7"}, ("a@b.c", "bulk"), {}),
    "headers-mixed": ("send_email", MIXED_HEADERS, ("a@b.c", "mixed"), {}),
    "headers-str": ("notify", {"request_id": "1234", "tenant": "acme"}, ("bob",), {}),
    "high-task": ("send_email_high", {}, ("example@email.com", "Now!"), {}),
    "kwargs": (
        "send_email",
        {},
        ("example@email.com",),
        {"subject": "Hello!", "from_email": "spam@example.com"},
    ),
    "kwargs-task": (
        "log_event",
        {"source": "web"},
        ("login",),
        {"user": {"id": 7}, "ok": True},
    ),
    "plain": ("send_email", {}, ("example@email.com", "Hello!"), {}),
    "values": ("store", {}, (VALUES,), {"extra": EXTRA}),
}


def string_attributes(case: str, kind: str, content: str) -> dict[str, dict[str, str]]:
    """Return a case's message attributes with the keys that a service uses."""
    texts = RECORDED_ATTRIBUTES.get(case, {})
    return {name: {kind: "String", content: text} for name, text in texts.items()}


def plain_json(value: object) -> Any:
    """Return the JSON that 1.4 made of a value."""
    return json.loads(
        json.dumps(value, default=lambda d: int(d) if d == int(d) else float(d))
    )


@pytest.fixture
def recorded_tasks(isolated):
    """Register the tasks of the recordings, and return the list of their runs."""
    runs = []

    def note(**values):
        runs.append(
            {name: value for name, value in values.items() if value is not None}
        )

    @taskhawk.task(name="tasks.send_email")
    def send_email(to, subject, from_email=None):
        note(to=to, subject=subject, from_email=from_email)

    @taskhawk.task(name="tasks.send_email_high", priority=taskhawk.Priority.high)
    def send_email_high(to, subject, from_email=None):
        note(to=to, subject=subject, from_email=from_email)

    @taskhawk.task(name="tasks.log_event")
    def log_event(name, **kwargs):
        note(name=name, **kwargs)

    @taskhawk.task(name="tasks.notify")
    def notify(to: str, metadata: dict, headers: dict):
        note(to=to, metadata=metadata, headers=headers)

    @taskhawk.task(name="tasks.store")
    def store(value, extra=None):
        note(value=value, extra=extra)

    return runs


def expected_run(case: str, body: str, receipt: str | None) -> dict[str, Any]:
    """Return what a case's task is called with."""
    data = json.loads(body)
    metadata = {
        "id": data["id"],
        "priority": taskhawk.Priority[data["metadata"]["priority"]],
        "receipt": receipt,
        "timestamp": data["metadata"]["timestamp"],
        "version": "1.0",
    }
    _, headers, args, kwargs = RECORDED_CALLS[case]
    given = {"metadata": metadata, "headers": plain_json(headers)}
    names = {"headers-str": ["to"], "kwargs-task": ["name"], "values": ["value"]}
    run = dict(zip(names.get(case, ["to", "subject"]), plain_json(args), strict=False))
    return {
        **run,
        **plain_json(kwargs),
        **(given if case in ("headers-str", "kwargs-task") else {}),
    }


@pytest.mark.parametrize("recording", RECORDINGS)
class TestInterop:
    """What PyPI's taskhawk 1.4.0 and 4.7.0 publish, we run; and we publish the same."""

    def test_from_sqs(self, recorded_tasks, recording):
        """A message of theirs runs our task with its arguments, headers and metadata."""
        case, body = recording.split()[-1], RECORDINGS[recording]
        attributes = string_attributes(case, "DataType", "StringValue")
        received = taskhawk.QueueMessage(
            body, "id", "receipt", message_attributes=attributes
        )
        assert taskhawk.process(received) == taskhawk.Outcome(taskhawk.Fate.acknowledge)
        assert recorded_tasks == [expected_run(case, body, "receipt")]
        assert jsonschema.Draft202012Validator(taskhawk.SCHEMA).is_valid(
            json.loads(body)
        )

    def test_from_sns(self, recorded_tasks, recording):
        """A message of theirs runs our task in Lambda too."""
        case, body = recording.split()[-1], RECORDINGS[recording]
        sns = {"Type": "Notification", "MessageId": "sns-id", "Message": body}
        sns["MessageAttributes"] = string_attributes(case, "Type", "Value")
        event = {
            "Records": [{"EventSource": "aws:sns", "EventVersion": "1.0", "Sns": sns}]
        }
        assert taskhawk.process_messages_for_lambda_consumer(event) is None
        assert recorded_tasks == [expected_run(case, body, None)]

    def test_same(self, memory, recorded_tasks, recording):
        """The same call makes the same message here: body, key by key, and attributes."""
        case, body = recording.split()[-1], RECORDINGS[recording]
        name, headers, args, kwargs = RECORDED_CALLS[case]
        theirs = json.loads(body)
        priority = taskhawk.Priority[theirs["metadata"]["priority"]]
        task = taskhawk.Task.find_by_name(f"tasks.{name}")
        invocation = task.with_headers(**headers).with_priority(priority)
        message_id = invocation.dispatch(*args, **kwargs)
        [received] = queued(priority)
        ours = json.loads(received.body)
        assert ours["metadata"]["timestamp"] > theirs["metadata"]["timestamp"] - 10**12
        theirs["id"] = message_id
        theirs["metadata"]["timestamp"] = ours["metadata"]["timestamp"]
        assert same_json(ours, theirs)
        attributes = string_attributes(case, "DataType", "StringValue")
        assert received.message_attributes == attributes


@pytest.mark.parametrize("via", ["sqs", "sns"])
class TestInteropAttributes:
    """Attributes travel over real SQS and SNS as 1.4's did."""

    def test_attributes(self, ministack, sqs_client, queue_name, recorded_tasks, via):
        """Sent to the queue, or to a topic with raw delivery to it, a message arrives the same."""
        queue = f"TASKHAWK-{queue_name}"
        sqs, sns = sqs_client(ministack), sqs_client(ministack, "sns")
        sqs.create_queue(QueueName=queue)
        topic = sns.create_topic(Name=queue.lower())["TopicArn"]
        sns.subscribe(
            TopicArn=topic,
            Protocol="sqs",
            Endpoint=f"arn:aws:sqs:us-east-1:000000000000:{queue}",
            Attributes={"RawMessageDelivery": "true"},
        )
        taskhawk.configure(
            AWS_REGION="us-east-1",
            AWS_ACCOUNT_ID="000000000000",
            AWS_ACCESS_KEY="test",
            AWS_SECRET_KEY="test",
            AWS_ENDPOINT_SQS=ministack,
            AWS_ENDPOINT_SNS=ministack,
            TASKHAWK_QUEUE=queue_name,
            IS_LAMBDA_APP=via == "sns",
        )
        _, headers, args, _ = RECORDED_CALLS["headers-mixed"]
        task = taskhawk.Task.find_by_name("tasks.send_email")
        message_id = task.with_headers(**headers).dispatch(*args)
        [received] = taskhawk._brokers.broker().receive(
            queue, 10, 5, None, threading.Event()
        )
        data = json.loads(received.body)
        assert data["id"] == message_id
        assert same_json(data["headers"], plain_json(headers))
        attributes = received.message_attributes
        texts = {name: value["StringValue"] for name, value in attributes.items()}
        assert texts == RECORDED_ATTRIBUTES["headers-mixed"]
        assert {value["DataType"] for value in attributes.values()} == {"String"}


# --- 5. retry policies ----------------------------------------------------------------


# === PART II: QUEUES ==================================================================


# --- 6. the broker contract -----------------------------------------------------------

STALE = taskhawk.Refusal(0, "ReceiptHandleIsInvalid", "", final=True)


@dataclasses.dataclass
class Queues:
    """A broker, and one of its queues, which has a dead-letter queue after two receives."""

    broker: taskhawk.Broker
    name: str
    refuses_stale: bool
    clock: Clock

    def pass_a_second(self) -> None:
        """Move SQLite's clock; a receive from SQS has to wait."""
        self.clock.now += 1

    def send(self, *bodies: str, delay_s: float = 0) -> None:
        """Send all in one call."""
        entries = [taskhawk.Outgoing(body, ATTRIBUTES, delay_s) for body in bodies]
        assert self.broker.send(self.name, entries) == []

    def receive(
        self, count: int = 10, wait_s: float = 0, lease_s: float | None = None
    ) -> list[taskhawk.QueueMessage]:
        """Receive, by default at once what is visible."""
        return self.broker.receive(self.name, count, wait_s, lease_s, NEVER)

    def receive_all(
        self, count: int, lease_s: float | None = None
    ) -> list[taskhawk.QueueMessage]:
        """Receive until there are so many, waiting for them."""
        deadline = time.monotonic() + 15
        found: list[taskhawk.QueueMessage] = []
        while len(found) < count:
            assert time.monotonic() < deadline
            found += self.receive(10, 5, lease_s)
        return sorted(found, key=lambda message: message.body)

    def stale(self) -> tuple[str, taskhawk.QueueMessage]:
        """Return a receipt that is stale, and its message as it was received again."""
        (first,) = self.receive_all(1)
        assert (
            self.broker.change_visibility(self.name, [(first.receipt_handle, 0)]) == []
        )
        (second,) = self.receive_all(1)
        return first.receipt_handle, second


class TestBrokerContract:
    """What every broker does alike, so that a test on SQLite means something for SQS."""

    @pytest.fixture(params=["ministack", "moto", "file", "memory"])
    def queues(self, request, tmp_path, sqs_client, queue_name):
        """Yield a fresh queue of each broker."""
        kind, name, clock = request.param, f"TASKHAWK-{queue_name}", Clock(time.time())
        if kind in ("ministack", "moto"):
            endpoint = request.getfixturevalue(kind)
            make_queue(sqs_client(endpoint), name, 2)
            configure_aws(endpoint)
            broker = taskhawk.SqsBroker()
        else:
            path = f"/{tmp_path}/queue.db" if kind == "file" else ""
            broker = taskhawk.SqliteBroker(
                f"sqlite://{path}?max_receive_count=2", clock
            )
        with contextlib.closing(broker):
            yield Queues(broker, name, kind != "moto", clock)

    def test_a_message_arrives_whole(self, queues):
        """What is sent is received with its attributes, its time, and the count 1."""
        queues.send("hello é")
        (message,) = queues.receive()
        assert (message.body, message.attempt) == ("hello é", 1)
        value = message.message_attributes["request_id"]
        assert (value["DataType"], value["StringValue"]) == ("String", "é1234")
        assert abs(int(message.attributes["SentTimestamp"]) / 1000 - time.time()) < 60
        assert (message.queue, message.group_id) == (queues.name, None)
        assert message.message_id
        assert message.queue_url
        assert message.hook_kwargs == {
            "queue_name": queues.name,
            "sqs_queue_message": message,
        }

    def test_ten_in_a_call(self, queues):
        """Ten are sent in one call, and a receive takes at most what it asks for, and ten."""
        queues.send(*"abcdefghij")
        queues.send("k")
        few = queues.receive(3)
        assert 1 <= len(few) <= 3
        rest = queues.receive(50)
        assert len(rest) <= 10
        rest += queues.receive_all(11 - len(few) - len(rest))
        assert sorted(message.body for message in few + rest) == list("abcdefghijk")
        assert len({message.message_id for message in few + rest}) == 11

    def test_visibility(self, queues):
        """A message is visible again when its timeout ends, later if extended, sooner if cut."""
        queues.send("extended")
        (extended,) = queues.receive(lease_s=1)
        change = [(extended.receipt_handle, 60)]
        assert queues.broker.change_visibility(queues.name, change) == []
        queues.send("left")
        (left,) = queues.receive(lease_s=1)
        queues.send("cut")
        (cut,) = queues.receive()
        assert (
            queues.broker.change_visibility(queues.name, [(cut.receipt_handle, 1)])
            == []
        )
        assert queues.receive() == []
        queues.pass_a_second()
        again = queues.receive_all(2)
        assert [(message.body, message.attempt) for message in again] == [
            ("cut", 2),
            ("left", 2),
        ]
        for before, after in zip((cut, left), again, strict=True):
            assert before.receipt_handle != after.receipt_handle
            assert before.message_id == after.message_id
            assert (
                before.attributes["SentTimestamp"] == after.attributes["SentTimestamp"]
            )

    def test_delays_and_depth(self, queues):
        """A delayed message is counted as such, and received when its delay is over."""
        queues.send("now", "too")
        queues.send("later", delay_s=1)
        assert queues.broker.depth(queues.name) == taskhawk.Depth(2, 0, 1)
        now = queues.receive_all(2)
        assert [message.body for message in now] == ["now", "too"]
        assert queues.broker.depth(queues.name) == taskhawk.Depth(0, 2, 1)
        queues.pass_a_second()
        (later,) = queues.receive_all(1)
        assert later.body == "later"
        receipts = [message.receipt_handle for message in (*now, later)]
        assert queues.broker.delete(queues.name, receipts) == []
        assert queues.broker.depth(queues.name) == taskhawk.Depth(0, 0, 0)

    def test_stale_receipts(self, queues):
        """A receipt is no good once the message was received again; a delete may say success."""
        queues.send("x")
        stale, again = queues.stale()
        assert (again.attempt, again.receipt_handle != stale) == (2, True)
        if queues.refuses_stale:  # AWS is free to answer either way on a standard queue
            changed = queues.broker.change_visibility(queues.name, [(stale, 0)])
            deleted = queues.broker.delete(queues.name, [stale])
            assert [refusal._replace(text="") for refusal in changed + deleted] == [
                STALE,
                STALE,
            ]
            assert queues.broker.depth(queues.name) == taskhawk.Depth(0, 1, 0)
        assert queues.broker.delete(queues.name, [again.receipt_handle]) == []
        assert queues.broker.depth(queues.name) == taskhawk.Depth(0, 0, 0)

    def test_batch_answers(self, queues):
        """The answer to a batch names the entries that failed by their index."""
        queues.send("a")
        stale, last = queues.stale()
        queues.send("b", "c")
        good = [message.receipt_handle for message in queues.receive_all(2)]
        bad = stale if queues.refuses_stale else "no receipt"
        changes = [(good[0], 60), (bad, 60), (good[1], 60)]
        refusals = queues.broker.change_visibility(queues.name, changes)
        assert [refusal._replace(text="") for refusal in refusals] == [
            STALE._replace(index=1)
        ]
        refusals = queues.broker.delete(queues.name, [*good, bad, last.receipt_handle])
        assert [refusal._replace(text="") for refusal in refusals] == [
            STALE._replace(index=2)
        ]
        assert queues.broker.depth(queues.name) == taskhawk.Depth(0, 0, 0)

    def test_dead_letters(self, queues):
        """After so many receives a message goes, as it was sent, to the dead-letter queue."""
        dead = dataclasses.replace(queues, name=f"{queues.name}-DLQ")
        limits = taskhawk.QueueInfo(30.0, dead.name, 2)
        assert queues.broker.info(queues.name) == limits
        assert queues.broker.info(dead.name) == taskhawk.QueueInfo(30.0, None, None)
        queues.send("poison")
        (second,) = queues.stale()[1:]
        second.change_visibility(VisibilityTimeout=0)
        assert queues.receive() == []
        (found,) = dead.receive_all(1)
        assert (found.body, found.message_id) == ("poison", second.message_id)
        assert found.message_attributes == second.message_attributes
        assert found.attributes["SentTimestamp"] == second.attributes["SentTimestamp"]
        assert queues.broker.depth(queues.name) == taskhawk.Depth(0, 0, 0)

    def test_long_poll(self, queues):
        """A receive that waits ends with the send of a message, in this process too."""
        threading.Timer(0.2, queues.send, ("wake up",)).start()
        start = time.monotonic()
        (message,) = queues.receive(wait_s=15)
        assert message.body == "wake up"
        assert time.monotonic() - start < 5

    def test_message_acts_at_once(self, queues):
        """A message changes its visibility and deletes itself like boto3's; a refusal raises."""
        queues.send("x")
        (message,) = queues.receive()
        message.change_visibility(VisibilityTimeout=0)
        (again,) = queues.receive_all(1)
        assert again.attempt == 2
        again.delete()
        assert queues.broker.depth(queues.name) == taskhawk.Depth(0, 0, 0)
        with pytest.raises(taskhawk.PartialFailure) as caught:
            again.change_visibility(VisibilityTimeout=0)
        assert str(caught.value) == "1 of 1 messages failed: ReceiptHandleIsInvalid"
        assert (caught.value.success_count, caught.value.failure_count) == (0, 1)

    def test_message_of_no_queue(self):
        """A message that no queue has, as in sync mode, is deleted and changed without effect."""
        message = taskhawk.QueueMessage("body", "id", sns_record={"Sns": {}})
        message.delete()
        message.change_visibility(VisibilityTimeout=3)
        assert (message.attempt, message.group_id, message.receipt_handle) == (
            1,
            None,
            None,
        )
        assert (message.attributes, message.message_attributes) == ({}, {})
        assert message.hook_kwargs == {"sns_record": {"Sns": {}}}

    @pytest.mark.parametrize(
        ("queue", "deduplication_id"), [("Q", None), ("Q.fifo", "sqs-id")]
    )
    def test_copy(self, queue, deduplication_id):
        """A copy keeps the group; on FIFO queues its deduplication id is the SQS MessageId."""
        attributes = {"MessageGroupId": "customer 7"}
        message = taskhawk.QueueMessage(
            "body", "sqs-id", "r", attributes=attributes, queue=queue
        )
        expected = taskhawk.Outgoing(
            "body", ATTRIBUTES, 0, "customer 7", deduplication_id
        )
        assert message.copy(ATTRIBUTES) == expected

    def test_size(self):
        """The size is of body, attribute names, types and values, in bytes."""
        binary = {"b": {"DataType": "Binary", "BinaryValue": b"\x00\xff"}}
        assert taskhawk.Outgoing("é", {}).size() == 2
        assert taskhawk.Outgoing("", ATTRIBUTES).size() == len("request_idString") + 6
        assert taskhawk.Outgoing("", binary).size() == len("bBinary") + 2


# --- 7. SQLite ------------------------------------------------------------------------


@contextlib.contextmanager
def python_child(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """Run code in a new interpreter for the length of the block, with pipes to talk to it."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env=python_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


# Hands out the connection that a SqliteBroker makes, which is nobody else's business.
GRAB_CONNECTIONS = """
import sys
connections = []
grab = lambda event, args: event == 'sqlite3.connect/handle' and connections.append(args[0])
sys.addaudithook(grab)
"""


class TestSqlite:
    """The embedded broker, where it is more than the contract: files, processes, crashes."""

    @pytest.fixture
    def path(self, tmp_path):
        """Return the path of a database that is not there yet."""
        return tmp_path / "queue.db"

    @pytest.fixture
    def url(self, path):
        """Return its URL."""
        return f"sqlite:///{path}?max_receive_count=2"

    @pytest.fixture
    def clock(self):
        """Return a clock to be moved."""
        return Clock()

    @pytest.fixture
    def broker(self, url, clock):
        """Yield a broker with that clock."""
        with contextlib.closing(taskhawk.SqliteBroker(url, clock)) as broker:
            yield broker

    def test_every_commit_is_on_the_disk(self, path):
        """The file has a write-ahead log, and each transaction waits for the disk."""
        code = f"""{GRAB_CONNECTIONS}
import taskhawk
broker = taskhawk.SqliteBroker('sqlite:///{path}')
broker.send('Q', [taskhawk.Outgoing('x', {{}})])
for name in 'journal_mode', 'synchronous', 'user_version':
    print(connections[-1].execute(f'PRAGMA {{name}}').fetchone()[0])
"""
        assert run_python(code).stdout.split() == ["wal", "2", "1"]

    def test_memory_is_gone_with_its_broker(self):
        """A broker in memory is its own, and empty each time."""
        for _ in range(2):
            with contextlib.closing(taskhawk.SqliteBroker("sqlite://")) as broker:
                assert broker.send("Q", numbered(1)) == []
                assert broker.depth("Q") == taskhawk.Depth(1, 0, 0)

    def test_queues_need_not_be_made(self, broker):
        """An unknown queue is an empty one, and queues are apart."""
        broker.send("A", numbered(1))
        assert broker.receive("B", 1, 0, None, NEVER) == []
        assert broker.depth("B") == taskhawk.Depth(0, 0, 0)
        assert broker.depth("A") == taskhawk.Depth(1, 0, 0)

    def test_destination(self, url):
        """Queues are named as on SQS; without TASKHAWK_QUEUE they are the default's."""
        names = ["-HIGH-PRIORITY", "-LOW-PRIORITY", "-BULK"]
        for settings, name in (({}, "DEFAULT"), ({"TASKHAWK_QUEUE": "dev-x"}, "DEV-X")):
            taskhawk.configure(TASKHAWK_BROKER=url, **settings)
            found = [
                taskhawk._brokers.broker().destination(p) for p in taskhawk.Priority
            ]
            assert found == [
                f"TASKHAWK-{name}",
                *(f"TASKHAWK-{name}{suffix}" for suffix in names),
            ]

    def test_options(self, path, clock):
        """The URL may set the visibility timeout and the receives before the dead letters."""
        for query, expected in (
            ("", taskhawk.QueueInfo(30.0, "Q-DLQ", 5)),
            (
                "?visibility_timeout_s=1.5&max_receive_count=3",
                taskhawk.QueueInfo(1.5, "Q-DLQ", 3),
            ),
        ):
            with contextlib.closing(
                taskhawk.SqliteBroker(f"sqlite:///{path}{query}", clock)
            ) as b:
                assert b.info("Q") == expected
                assert b.info("Q-DLQ") == expected._replace(
                    dead_letter_queue=None, max_receive_count=None
                )
                b.send("Q", numbered(1))
                assert len(b.receive("Q", 1, 0, None, NEVER)) == 1
                clock.now += expected.visibility_timeout_s - 0.001
                assert b.receive("Q", 1, 0, None, NEVER) == []
                clock.now += 0.001
                assert drain(b, "Q") == ["0"]

    @pytest.mark.parametrize(
        "url",
        [
            "sqlite://host/queue.db",
            "sqlite://queue.db",
            "sqlite:///q.db?visibility_timeout_s=0",
            "sqlite:///q.db?visibility_timeout_s=nan",
            "sqlite:///q.db?visibility_timeout_s",
            "sqlite:///q.db?max_receive_count=2.5",
            "sqlite:///q.db?max_receive_count=0",
            "sqlite:///q.db?timeout=3",
            "sqlite://[q",
            "sqlite:///q.db\n",
        ],
    )
    def test_url_errors(self, url, tmp_path, monkeypatch):
        """A URL that is not understood is refused, with one that would be; no file is made."""
        monkeypatch.chdir(tmp_path)
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.SqliteBroker(url).close()
        assert str(caught.value) == (
            "TASKHAWK_BROKER: expected sqlite:///relative.db or sqlite:////absolute.db, then"
            f" perhaps ?visibility_timeout_s=30&max_receive_count=5, got {url!r}"
        )
        assert list(tmp_path.iterdir()) == []

    def test_paths(self, tmp_path, monkeypatch):
        """Three slashes begin a relative path, four an absolute one; %20 is a space."""
        monkeypatch.chdir(tmp_path)
        taskhawk.SqliteBroker("sqlite:///a b.db").close()
        taskhawk.SqliteBroker(f"sqlite:///{tmp_path}/c.db").close()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a b.db", "c.db"]

    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (lambda path: None, "unable to open database file"),
            (
                lambda path: (
                    path.parent.mkdir(),
                    path.write_text("not a database" * 200),
                ),
                "file is not a database",
            ),
        ],
        ids=["no directory", "no database"],
    )
    def test_unusable_file(self, tmp_path, make, reason):
        """A file that can't be used is refused at once, by name."""
        path = tmp_path / "sub" / "queue.db"
        make(path)
        start = time.monotonic()
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.SqliteBroker(f"sqlite:///{path}")
        assert str(caught.value) == f"TASKHAWK_BROKER: can't open {path}: {reason}"
        assert time.monotonic() - start < 10

    def test_full_disk_while_it_opens(self, path):
        """A file that can't be written is refused at once, by name."""
        code = f"""
import resource, taskhawk
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
try:
    taskhawk.SqliteBroker('sqlite:///{path}')
except taskhawk.ConfigurationError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
"""
        expected = f"TASKHAWK_BROKER: can't open {path}: disk I/O error\n"
        assert run_python(code, timeout=20).stdout == expected

    def test_foreign_version(self, path, url):
        """A database of another version is refused, and left as it is."""
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA user_version = 7")
        before = path.read_bytes()
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.SqliteBroker(url)
        assert str(caught.value) == (
            f"TASKHAWK_BROKER: can't open {path}: expected version 1 of its tables, got 7"
        )
        assert path.read_bytes() == before

    def test_locked_while_it_opens(self, path, url):
        """A file that another process is just making is waited for."""
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        with contextlib.closing(other):
            other.execute("BEGIN IMMEDIATE")
            release = threading.Timer(0.2, other.execute, ("ROLLBACK",))
            release.start()
            with contextlib.closing(taskhawk.SqliteBroker(url)) as broker:
                release.join()
                assert broker.send("Q", numbered(1)) == []

    def test_old_sqlite(self, url, monkeypatch):
        """A SQLite that lacks what we need is refused by its version."""
        monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 29, 1))
        monkeypatch.setattr(sqlite3, "sqlite_version", "3.29.1")
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.SqliteBroker(url)
        assert str(caught.value) == "SQLite 3.29.1 is too old: expected 3.30.0 or newer"

    def test_clock(self, broker, clock):
        """Delays of any length and timeouts are counted on the clock that is passed in."""
        year = 365 * 86_400
        broker.send("Q", [taskhawk.Outgoing("late", {}, 10 * year)])
        clock.now += 10 * year - 0.001
        assert broker.receive("Q", 1, 0, None, NEVER) == []
        assert broker.depth("Q") == taskhawk.Depth(0, 0, 1)
        clock.now += 0.001
        (message,) = broker.receive("Q", 1, 0, 100, NEVER)
        assert int(message.attributes["SentTimestamp"]) == 1_700_000_000_000
        assert broker.change_visibility("Q", [(message.receipt_handle, 5)]) == []
        clock.now += 5
        assert drain(broker, "Q") == ["late"]

    def test_first_come_first_served(self, broker):
        """What became visible first is received first."""
        for number in range(3):
            broker.send("Q", numbered(4, number * 4))
        assert drain(broker, "Q") == [str(number) for number in range(12)]

    def test_redrive(self, broker, clock):
        """A message moves when it would be received once too often, and from there no further."""
        broker.send("Q", numbered(1))
        for attempt in (1, 2):
            (message,) = broker.receive("Q", 1, 0, None, NEVER)
            assert message.attempt == attempt
            clock.now += 30
        assert broker.depth("Q-DLQ") == taskhawk.Depth(0, 0, 0)
        assert broker.receive("Q", 1, 0, None, NEVER) == []
        stale = message.receipt_handle
        for _ in range(4):
            (message,) = broker.receive("Q-DLQ", 1, 0, None, NEVER)
            clock.now += 30
        assert broker.depth("Q-DLQ") == taskhawk.Depth(1, 0, 0)
        assert broker.delete("Q", [stale]) != []
        assert broker.depth("Q-DLQ") == taskhawk.Depth(1, 0, 0)

    def test_receipts(self, broker, clock):
        """A receipt outlives its timeout until the next receive, for a delete only."""
        broker.send("Q", numbered(1))
        (message,) = broker.receive("Q", 1, 0, None, NEVER)
        clock.now += 31
        text = "the message is no longer in flight, or was received again"
        refusal = taskhawk.Refusal(0, "ReceiptHandleIsInvalid", text, final=True)
        assert broker.change_visibility("Q", [(message.receipt_handle, 5)]) == [refusal]
        (again,) = broker.receive("Q", 1, 0, None, NEVER)
        assert broker.delete("Q", [message.receipt_handle]) == [refusal]
        clock.now += 31
        assert broker.delete("Q", [again.receipt_handle]) == []
        assert broker.delete("Q", [again.receipt_handle]) == []  # SQS says the same
        broker.send("Q", numbered(1, 7))  # must not get the id that the receipt names
        assert broker.delete("Q", [again.receipt_handle]) == []
        assert drain(broker, "Q") == ["7"]

    def test_stop(self, broker):
        """A wait is cut short when it is told to stop, and before that takes what is there."""
        stop = threading.Event()
        threading.Timer(0.1, stop.set).start()
        start = time.monotonic()
        assert broker.receive("Q", 1, 20, None, stop) == []
        assert time.monotonic() - start < 5
        broker.send("Q", numbered(1))
        assert len(broker.receive("Q", 1, 20, None, stop)) == 1

    def test_waiting_is_cheap(self, url):
        """An empty queue costs next to no CPU while a receive waits for a message."""
        with contextlib.closing(taskhawk.SqliteBroker(url)) as broker:
            start = time.process_time()
            assert broker.receive("Q", 1, 1, None, NEVER) == []
            assert time.process_time() - start < 0.1

    def test_another_process_wakes_it(self, url):
        """A receive that waits has a message of another process within a second."""
        code = """
import sys, time, taskhawk
broker = taskhawk.SqliteBroker(sys.argv[1])
print('ready', flush=True)
sys.stdin.readline()
broker.send('Q', [taskhawk.Outgoing('x', {})])
print(time.monotonic())
"""
        with (
            contextlib.closing(taskhawk.SqliteBroker(url)) as b,
            python_child(code, url) as child,
        ):
            assert child.stdout.readline() == "ready\n"
            threading.Timer(0.3, lambda: print(file=child.stdin, flush=True)).start()
            assert len(b.receive("Q", 1, 20, None, NEVER)) == 1
            assert time.monotonic() - float(child.stdout.readline()) < 1

    def test_eight_processes_open_a_new_file(self, url):
        """Any number of processes may make the file at the same moment."""
        code = """
import sys, taskhawk
print('ready', flush=True)
sys.stdin.readline()
taskhawk.SqliteBroker(sys.argv[1]).send('Q', [taskhawk.Outgoing(sys.argv[2], {})])
"""
        with contextlib.ExitStack() as stack:
            children = [
                stack.enter_context(python_child(code, url, i)) for i in range(8)
            ]
            assert [child.stdout.readline() for child in children] == ["ready\n"] * 8
            for child in children:
                print(file=child.stdin, flush=True)
            assert [child.wait(60) for child in children] == [0] * 8
        with contextlib.closing(taskhawk.SqliteBroker(url)) as broker:
            assert sorted(drain(broker, "Q")) == list("01234567")

    def test_processes_claim_apart(self, url):
        """Workers that receive at the same time never get the same message, and miss none."""
        code = """
import sys, threading, taskhawk
broker = taskhawk.SqliteBroker(sys.argv[1])
print('ready', flush=True)
sys.stdin.readline()
while received := broker.receive('Q', 3, 0, 600, threading.Event()):
    print(*(message.body for message in received))
    refusals = broker.delete('Q', [message.receipt_handle for message in received])
    assert not refusals, refusals
"""
        with (
            contextlib.closing(taskhawk.SqliteBroker(url)) as broker,
            contextlib.ExitStack() as s,
        ):
            for start in range(0, 300, 10):
                broker.send("Q", numbered(10, start))
            children = [s.enter_context(python_child(code, url)) for _ in range(4)]
            assert [child.stdout.readline() for child in children] == ["ready\n"] * 4
            for child in children:
                print(file=child.stdin, flush=True)
            bodies = [
                body for child in children for body in child.communicate()[0].split()
            ]
            assert [child.returncode for child in children] == [0] * 4
            assert sorted(map(int, bodies)) == list(range(300))
            assert broker.depth("Q") == taskhawk.Depth(0, 0, 0)

    def test_kill_while_sending(self, path, url):
        """A kill -9 loses nothing that was sent, and leaves no part of a batch."""
        code = """
import itertools, sys, taskhawk
broker = taskhawk.SqliteBroker(sys.argv[1])
for start in itertools.count(0, 3):
    broker.send(sys.argv[2], [taskhawk.Outgoing(str(start + i), {}) for i in range(3)])
    print(start + 3, flush=True)
"""
        for lines in (1, 17, 40):
            queue = f"Q{lines}"
            with python_child(code, url, queue) as child:
                sent = [child.stdout.readline() for _ in range(lines)]
                child.kill()
                sent += child.stdout.readlines()
            with contextlib.closing(taskhawk.SqliteBroker(url)) as broker:
                bodies = drain(broker, queue)
            assert bodies == [str(number) for number in range(len(bodies))]
            assert len(bodies) - int(sent[-1]) in (0, 3)
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]

    def test_kill_while_receiving(self, path):
        """A kill -9 loses nothing that was not deleted, and nothing deleted comes back."""
        url = f"sqlite:///{path}?max_receive_count=100"
        code = """
import sys, threading, taskhawk
broker = taskhawk.SqliteBroker(sys.argv[1])
while received := broker.receive('Q', 2, 0, 600, threading.Event()):
    broker.delete('Q', [message.receipt_handle for message in received])
    print(*(message.body for message in received), flush=True)
"""
        with contextlib.closing(taskhawk.SqliteBroker(url)) as broker:
            for start in range(0, 400, 10):
                broker.send("Q", numbered(10, start))
        done: list[str] = []
        for lines in (1, 17, 40):
            with python_child(code, url) as child:
                for _ in range(lines):
                    done += child.stdout.readline().split()
                child.kill()
                done += child.stdout.read().split()
        an_hour_later = taskhawk.SqliteBroker(url, lambda: time.time() + 3600)
        with contextlib.closing(an_hour_later) as broker:
            left = drain(broker, "Q")
        assert len(set(done + left)) == len(done) + len(left)
        missing = 400 - len(done) - len(left)
        assert missing in (0, 2, 4, 6)  # deleted, and killed before it could say so

    def test_errors_are_raised_and_over(self, path):
        """A locked file and a full disk are errors of that call; the next one works."""
        code = f"""{GRAB_CONNECTIONS}
import sqlite3, threading, taskhawk
taskhawk.configure(TASKHAWK_BROKER='sqlite:///{path}')
@taskhawk.task(name='tests.f')
def f(x): pass
def attempt(call):
    try:
        print(bool(call()))
    except sqlite3.OperationalError as error:
        print(error)
broker = taskhawk._brokers.broker()
receive = lambda: broker.receive('TASKHAWK-DEFAULT', 1, 0, 600, threading.Event())
f.dispatch('first')
connections[-1].execute('PRAGMA busy_timeout = 50')
other = sqlite3.connect({str(path)!r}, isolation_level=None)
other.execute('BEGIN IMMEDIATE')
attempt(lambda: f.dispatch('locked'))
attempt(receive)
other.execute('ROLLBACK')
attempt(receive)
pages = connections[-2].execute('PRAGMA page_count').fetchone()[0]
connections[-2].execute(f'PRAGMA max_page_count = {{pages}}')
attempt(lambda: f.dispatch('x' * 1_000_000))
connections[-2].execute('PRAGMA max_page_count = 1000000')
attempt(lambda: f.dispatch('x' * 1_000_000))
print(*broker.depth('TASKHAWK-DEFAULT'))
"""
        result = run_python(code)
        assert result.stdout.splitlines() == [
            "database is locked",
            "database is locked",
            "True",
            "database or disk is full",
            "True",
            "1 1 0",
        ]

    def test_interrupted_while_it_waits(self, path, url):
        """Control-C while the file is locked sends nothing, and leaves no lock behind."""
        code = """
import os, signal, sqlite3, sys, threading, time, taskhawk
broker = taskhawk.SqliteBroker(sys.argv[1])
other = sqlite3.connect(sys.argv[2], isolation_level=None, check_same_thread=False, timeout=1)
other.execute('BEGIN IMMEDIATE')
main = threading.get_ident()
def interrupt():
    before = here = None
    while before is None or here != before:  # until the main thread stands still in SQLite
        time.sleep(0.05)
        frame = sys._current_frames()[main]
        ours = frame.f_code.co_filename == taskhawk.__file__
        before, here = here, (frame.f_code, frame.f_lasti) if ours else object()
    os.kill(os.getpid(), signal.SIGINT)
    other.execute('ROLLBACK')
thread = threading.Thread(target=interrupt)
thread.start()
try:
    broker.send('Q', [taskhawk.Outgoing('interrupted', {})])
except KeyboardInterrupt:
    print('interrupted')
thread.join()
other.execute('BEGIN IMMEDIATE')
other.execute('ROLLBACK')
broker.send('Q', [taskhawk.Outgoing('after', {})])
print(*(m.body for m in broker.receive('Q', 10, 0, None, threading.Event())))
"""
        result = run_python(["-c", code, url, str(path)])
        assert (result.stdout, result.stderr) == ("interrupted\nafter\n", "")


# --- 8. SQS and SNS -------------------------------------------------------------------

NO_QUEUE = "there is no such queue here: make it, or check TASKHAWK_QUEUE, AWS_REGION and the account"


class TestSqs:
    """Every request that is made to SQS, and what becomes of its answer."""

    def test_one_request_per_dispatch(self, aws, task):
        """A dispatch is one request; the first to a queue looks up its URL, the others do not."""
        for text in "abc":
            task.dispatch(text)
        task.with_priority(taskhawk.Priority.high).dispatch("d")
        task.with_priority(taskhawk.Priority.high).dispatch("e")
        once = ["GetQueueUrl", "SendMessage", "SendMessage"]
        assert aws.actions == [*once, "SendMessage", *once]
        names = [request["QueueName"] for request in aws.asked("GetQueueUrl")]
        assert names == ["TASKHAWK-APP", "TASKHAWK-APP-HIGH-PRIORITY"]
        assert aws.calls[1].data["QueueUrl"] == f"{aws.url}/000000000000/{names[0]}"
        assert json.loads(aws.calls[3].data["MessageBody"])["args"] == ["c"]

    def test_one_request_for_ten(self, aws, task):
        """A batch is a request for each ten messages, and for each MiB."""
        with taskhawk.batch():
            for number in range(25):
                task.dispatch(number)
        assert aws.actions == ["GetQueueUrl", *["SendMessageBatch"] * 3]
        assert aws.batches == [10, 10, 5]
        entries = aws.calls[1].data["Entries"]
        assert [entry["Id"] for entry in entries] == list("0123456789")
        task.dispatch_many(["x" * 600_000] * 3)
        assert aws.actions[4:] == ["SendMessage"] * 3

    def test_optional_arguments(self, aws):
        """Delay, attributes, group and deduplication id are sent where there are any."""
        everything = taskhawk.Outgoing("b", ATTRIBUTES, 0.2, "group", "once")
        broker = taskhawk.SqsBroker()
        broker.send("Q", [taskhawk.Outgoing("a", {})])
        broker.send("Q", [taskhawk.Outgoing("a", {}), everything])
        plain, (first, second) = aws.calls[1].data, aws.calls[2].data["Entries"]
        url = f"{aws.url}/000000000000/Q"
        assert plain == {"QueueUrl": url, "MessageBody": "a"}
        assert first == {"Id": "0", "MessageBody": "a"}
        assert second == {
            "Id": "1",
            "MessageBody": "b",
            "MessageAttributes": ATTRIBUTES,
            "DelaySeconds": 1,
            "MessageGroupId": "group",
            "MessageDeduplicationId": "once",
        }
        broker.close()

    def test_fifo(self, ministack, sqs_client, queue_name):
        """On a FIFO queue the group comes with the message, and a known id is not sent again."""
        client, name = sqs_client(ministack), f"{queue_name}.fifo"
        client.create_queue(QueueName=name, Attributes={"FifoQueue": "true"})
        configure_aws(ministack)
        with contextlib.closing(taskhawk.SqsBroker()) as broker:
            broker.send(name, [taskhawk.Outgoing("a", {}, 0, "group", "id")])
            broker.send(
                name,
                [taskhawk.Outgoing("b", {}, 0, "group", i) for i in ("id", "other")],
            )
            received = broker.receive(name, 10, 1, None, NEVER)
            assert [(m.body, m.group_id) for m in received] == [
                ("a", "group"),
                ("b", "group"),
            ]

    @pytest.mark.parametrize(
        ("count", "wait_s", "lease_s", "expected"),
        [
            (1, 0, None, (1, 0, None)),
            (50, 0.2, 1.5, (10, 1, 2)),
            (3, 60, 0, (3, 20, 0)),
        ],
    )
    def test_receive(self, aws, count, wait_s, lease_s, expected):
        """A poll asks for at most ten messages and 20 s, in whole seconds, and for what we read."""
        with contextlib.closing(taskhawk.SqsBroker()) as broker:
            assert broker.receive("Q", count, wait_s, lease_s, NEVER) == []
        data = aws.calls[1].data
        limits = (data["MaxNumberOfMessages"], data["WaitTimeSeconds"])
        assert (*limits, data.get("VisibilityTimeout")) == expected
        names = ["ApproximateReceiveCount", "SentTimestamp", "MessageGroupId"]
        assert data["MessageSystemAttributeNames"] == names
        assert data["MessageAttributeNames"] == ["All"]

    def test_whole_seconds(self, aws):
        """A fraction of a second is rounded up: a retry is never early."""
        with contextlib.closing(taskhawk.SqsBroker()) as broker:
            assert broker.change_visibility("Q", [("r", 0), ("s", 0.1)]) == []
        timeouts = [
            entry["VisibilityTimeout"] for entry in aws.calls[1].data["Entries"]
        ]
        assert timeouts == [0, 1]

    def test_info_is_read_once(self, aws):
        """A queue's attributes are read once; one without a redrive policy has no dead letters."""
        aws.always("GetQueueAttributes", {"Attributes": {"VisibilityTimeout": "45"}})
        with contextlib.closing(taskhawk.SqsBroker()) as broker:
            for _ in range(2):
                assert broker.info("Q") == taskhawk.QueueInfo(45.0, None, None)
        assert aws.actions == ["GetQueueUrl", "GetQueueAttributes"]

    @pytest.mark.parametrize(
        ("call", "action", "attempts"),
        [
            (lambda broker: broker.send("Q", numbered(1)), "SendMessage", 3),
            (
                lambda broker: broker.receive("Q", 1, 0, None, NEVER),
                "ReceiveMessage",
                1,
            ),
            (lambda broker: broker.delete("Q", ["r"]), "DeleteMessageBatch", 1),
            (
                lambda broker: broker.change_visibility("Q", [("r", 1)]),
                "ChangeMessageVisibilityBatch",
                1,
            ),
        ],
        ids=["send", "receive", "delete", "change_visibility"],
    )
    def test_attempts(self, aws, monkeypatch, call, action, attempts):
        """A send is tried three times, all else once, whatever botocore's own settings say."""
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "7")
        monkeypatch.setenv("AWS_RETRY_MODE", "legacy")
        aws.always(action, fault("InternalError", status=500))
        with contextlib.closing(taskhawk.SqsBroker()) as broker:
            with pytest.raises(botocore.exceptions.ClientError) as caught:
                call(broker)
            assert caught.type is not taskhawk.ConfigurationError
        assert aws.actions == ["GetQueueUrl", *[action] * attempts]

    @pytest.mark.parametrize(
        ("call", "action"),
        [
            (lambda broker: broker.send("Q", numbered(5)), "SendMessageBatch"),
            (lambda broker: broker.delete("Q", list("abcde")), "DeleteMessageBatch"),
            (
                lambda broker: broker.change_visibility("Q", [(r, 1) for r in "abcde"]),
                "ChangeMessageVisibilityBatch",
            ),
        ],
        ids=["send", "delete", "change_visibility"],
    )
    def test_partial_failure(self, aws, call, action):
        """An answer of 200 is read entry by entry; what it does not name has failed."""
        wrong = {"SenderFault": True, "Code": "InvalidThing", "Message": "why"}
        failed = [
            {"Id": "3", **wrong},
            {"Id": "1", "SenderFault": False, "Code": "InternalError"},
        ]
        successful = [{"Id": "2", "MessageId": "m"}]
        aws.always(action, {"Successful": successful, "Failed": failed})
        unanswered = ("Unanswered", "the answer does not name this entry", False)
        with contextlib.closing(taskhawk.SqsBroker()) as broker:
            assert call(broker) == [
                taskhawk.Refusal(0, *unanswered),
                taskhawk.Refusal(1, "InternalError", "", final=False),
                taskhawk.Refusal(3, "InvalidThing", "why", final=True),
                taskhawk.Refusal(4, *unanswered),
            ]

    def test_sum_too_long(self, aws):
        """A batch that SQS finds too long is sent one by one, in order; each has its own answer."""
        aws.always(
            "SendMessageBatch", fault("AWS.SimpleQueueService.BatchRequestTooLong")
        )
        aws.script("SendMessage", passed, fault("OverLimit"))
        with contextlib.closing(taskhawk.SqsBroker()) as broker:
            refusals = broker.send("Q", numbered(3))
        sent = [request["MessageBody"] for request in aws.asked("SendMessage")]
        assert sent == ["0", "1", "2"]
        assert [(r.index, r.code, r.final) for r in refusals] == [
            (1, "OverLimit", True)
        ]

    @pytest.mark.parametrize(
        ("answer", "remedy"),
        [
            (fault("AWS.SimpleQueueService.NonExistentQueue"), NO_QUEUE),
            (fault("com.amazonaws.sqs#QueueDoesNotExist"), NO_QUEUE),
            (fault("AccessDenied", status=403), DENIED),
            (fault("AccessDeniedException"), DENIED),
            (fault("InvalidClientTokenId", status=403), UNKNOWN_KEY),
            (fault("InvalidSecurity", status=403), UNKNOWN_KEY),
            (fault("UnrecognizedClientException"), UNKNOWN_KEY),
            (
                fault("SignatureDoesNotMatch", status=403),
                "AWS refuses these credentials: check AWS_SECRET_KEY",
            ),
        ],
    )
    @pytest.mark.parametrize("action", ["GetQueueUrl", "SendMessage"])
    def test_errors_say_what_to_do(self, aws, task, action, answer, remedy):
        """What only a person can mend is one sentence with its remedy, at whatever request."""
        aws.always(action, answer)
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            task.dispatch("secret")
        error = caught.value.__cause__
        assert isinstance(error, botocore.exceptions.ClientError)
        code = error.response["Error"]["Code"].rpartition(".")[2]
        assert str(caught.value) == f"TASKHAWK-APP: {remedy.format(action)} ({code})"

    def test_missing_queue(self, ministack, task, queue_name):
        """A queue that is not there is said to be missing, by publishers and workers."""
        configure_aws(ministack, queue_name)
        text = f"TASKHAWK-{queue_name}: {NO_QUEUE} (NonExistentQueue)"
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            task.dispatch("x")
        assert str(caught.value) == text
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.listen_for_messages(taskhawk.Priority.default, loop_count=1)
        assert str(caught.value) == text

    def test_no_credentials(self, aws, task, queue_name):
        """Without credentials nothing is sent, and the sentence says where they may come from."""
        taskhawk.configure(
            AWS_ENDPOINT_SQS=aws.url, AWS_REGION="us-east-1", TASKHAWK_QUEUE=queue_name
        )
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            task.dispatch("x")
        assert str(caught.value) == (
            f"TASKHAWK-{queue_name}: no AWS credentials: set AWS_ACCESS_KEY and AWS_SECRET_KEY, or"
            " give botocore a profile or role; to try things out without AWS, set TASKHAWK_BROKER"
            " to sqlite:///queue.db (NoCredentialsError)"
        )
        assert aws.calls == []

    def test_no_region(self, task, queue_name):
        """Without a region, the sentence says how to set one."""
        taskhawk.configure(AWS_SETTINGS, AWS_REGION=None, TASKHAWK_QUEUE=queue_name)
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            task.dispatch("x")
        assert str(caught.value) == (
            f"TASKHAWK-{queue_name}: no AWS region: set AWS_REGION, for example eu-west-1"
            " (NoRegionError)"
        )

    @pytest.mark.parametrize("fips", [False, True])
    def test_endpoints(self, monkeypatch, fips):
        """In each partition, with FIPS or without, endpoints are those that botocore resolves."""
        monkeypatch.setenv("AWS_USE_FIPS_ENDPOINT", str(fips))
        plain = botocore.session.Session()
        regions = [
            r
            for p in plain.get_available_partitions()
            for r in plain.get_available_regions("sqs", p)
        ]
        regions += ["us-iso-east-1", "us-isob-east-1", "eusc-de-east-1", "moon-1"]
        for region in {*regions[::7], "us-gov-west-1", "cn-north-1", *regions[-4:]}:
            taskhawk.configure(AWS_SETTINGS, AWS_REGION=region)
            keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
            for name, broker in (
                ("sqs", taskhawk.SqsBroker()),
                ("sns", taskhawk.SnsSender()),
            ):
                theirs = plain.create_client(name, region, **keys).meta
                ours = broker.client("send").meta
                assert (ours.endpoint_url, ours.partition) == (
                    theirs.endpoint_url,
                    theirs.partition,
                )
                assert ours.service_model.metadata == theirs.service_model.metadata

    def test_keys_of_ours(self, aws, task, queue_name):
        """Keys that are set are used, with their token, before any that botocore would find."""
        keys = {
            "AWS_ACCESS_KEY": "OURS",
            "AWS_SECRET_KEY": "s",
            "AWS_SESSION_TOKEN": "token",
        }
        taskhawk.configure(
            **keys,
            AWS_REGION="eu-west-1",
            AWS_ENDPOINT_SQS=aws.url,
            TASKHAWK_QUEUE=queue_name,
        )
        task.dispatch("x")
        headers = aws.calls[-1].headers
        assert "Credential=OURS/" in headers["Authorization"]
        assert "/eu-west-1/sqs/aws4_request" in headers["Authorization"]
        assert headers["X-Amz-Security-Token"] == "token"

    def test_keys_of_botocore(self, aws, task, queue_name, monkeypatch, tmp_path):
        """Without keys of ours, profile, region and endpoint come from botocore's own chain."""
        (tmp_path / "credentials").write_text(
            "[worker]\naws_access_key_id = PROFILE\naws_secret_access_key = s\n"
        )
        (tmp_path / "config").write_text("[profile worker]\nregion = sa-east-1\n")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.setenv("AWS_PROFILE", "worker")
        monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", aws.url)
        taskhawk.configure(TASKHAWK_QUEUE=queue_name)
        task.dispatch("x")
        authorization = aws.calls[-1].headers["Authorization"]
        assert "Credential=PROFILE/" in authorization
        assert "/sa-east-1/sqs/aws4_request" in authorization

    def test_read_timeout(self, aws):
        """An answer that does not come is given up after AWS_READ_TIMEOUT_S; a poll waits on."""
        configure_aws(aws.url, AWS_READ_TIMEOUT_S=0.2)
        released = threading.Event()
        aws.always("DeleteMessageBatch", late(aws.closing))
        aws.always("ReceiveMessage", late(released))
        with contextlib.closing(taskhawk.SqsBroker()) as broker:
            start = time.monotonic()
            with pytest.raises(botocore.exceptions.ReadTimeoutError):
                broker.delete("Q", ["r"])
            assert time.monotonic() - start < 1.9
            threading.Timer(0.6, released.set).start()
            assert broker.receive("Q", 1, 1, None, NEVER) == []
        assert aws.actions == ["GetQueueUrl", "DeleteMessageBatch", "ReceiveMessage"]

    def test_connect_timeout(self):
        """A service that can't be reached is given up after AWS_CONNECT_TIMEOUT_S."""
        with (
            socket.create_server(("127.0.0.1", 0), backlog=0) as deaf,
            contextlib.ExitStack() as s,
        ):
            address = deaf.getsockname()
            for _ in range(
                4
            ):  # fill its backlog: from then on the kernel drops connections
                client = s.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(address)
            taskhawk.configure(
                AWS_SETTINGS,
                AWS_ENDPOINT_SQS=f"http://127.0.0.1:{address[1]}",
                AWS_CONNECT_TIMEOUT_S=0.2,
            )
            broker = s.enter_context(contextlib.closing(taskhawk.SqsBroker()))
            start = time.monotonic()
            with pytest.raises(botocore.exceptions.ConnectTimeoutError):
                broker.receive("Q", 1, 1, None, NEVER)
            assert time.monotonic() - start < 1.9

    @pytest.mark.parametrize("server", ["ministack", "moto"])
    def test_pinned_queue(self, request, server, task, sqs_client, queue_name):
        """A queue that takes less than SQS is told apart by size, limit and largest argument."""
        endpoint, pinned = (
            request.getfixturevalue(server),
            {"MaximumMessageSize": "1024"},
        )
        make_queue(sqs_client(endpoint), f"TASKHAWK-{queue_name}", **pinned)
        configure_aws(endpoint, queue_name)
        with pytest.raises(taskhawk.MessageTooLarge) as caught:
            task.dispatch("x" * 2000)
        message = taskhawk.Message.new("tests.f", ["x" * 2000])
        size = len(json.dumps(message.as_dict(), separators=(",", ":")))
        assert str(caught.value) == (
            f"tests.f: the message has {size} bytes (body and attributes), and the limit is 1024:"
            " the largest argument is args[0] with 2002 bytes"
        )
        assert caught.value.limit == 1024

    def test_queue_of_a_lambda(self, aws, task):
        """A Lambda's role may not look queues up: the URL is made from the event's ARN."""
        arn = "arn:aws:sqs:us-east-1:123456789012:TASKHAWK-X"
        bodies = [
            json.dumps(taskhawk.Message.new("tests.f", [1]).as_dict()),
            "malformed",
        ]
        records = [
            {
                "messageId": f"m{i}",
                "receiptHandle": f"r{i}",
                "body": body,
                "attributes": {"ApproximateReceiveCount": "1"},
                "messageAttributes": {},
                "eventSource": "aws:sqs",
                "eventSourceARN": arn,
            }
            for i, body in enumerate(bodies)
        ]
        with pytest.raises(taskhawk.ValidationError):
            taskhawk.process_messages_for_lambda_consumer({"Records": records})
        (call,) = aws.calls
        assert call.action == "DeleteMessageBatch"
        assert call.data["QueueUrl"] == f"{aws.url}/123456789012/TASKHAWK-X"
        assert call.data["Entries"] == [{"Id": "0", "ReceiptHandle": "r0"}]


NO_TOPIC = "there is no such topic: make it, or check TASKHAWK_QUEUE and AWS_ACCOUNT_ID"


class TestSns:
    """What a Lambda app's publisher sends to topics."""

    @pytest.fixture
    def sns(self, scripted, queue_name):
        """Return the scripted ministack, set up for a Lambda app."""
        configure_aws(scripted.url, queue_name, IS_LAMBDA_APP=True)
        return scripted

    @pytest.fixture
    def received(self, sns, ministack, sqs_client, queue_name):
        """Subscribe a queue to the high-priority topic; return a function that empties it."""
        client, name = (
            sqs_client(ministack, "sns"),
            f"taskhawk-{queue_name.lower()}-high-priority",
        )
        topic = client.create_topic(Name=name)["TopicArn"]
        sqs_client(ministack).create_queue(QueueName=name)
        client.subscribe(
            TopicArn=topic,
            Protocol="sqs",
            Endpoint=f"arn:aws:sqs:us-east-1:000000000000:{name}",
            Attributes={"RawMessageDelivery": "true"},
        )

        def receive():
            with contextlib.closing(taskhawk.SqsBroker()) as broker:
                found = []
                while messages := broker.receive(name, 10, 0, 60, NEVER):
                    found += messages
                return found

        return receive

    def test_publish(self, sns, task, received):
        """A dispatch is one request, and brings body and headers to the subscribed queue."""
        invocation = task.with_priority(taskhawk.Priority.high).with_headers(
            request_id="é1"
        )
        ids = [invocation.dispatch("a"), invocation.dispatch("b")]
        assert sns.actions == ["Publish", "Publish"]
        messages = received()
        assert sorted(json.loads(message.body)["id"] for message in messages) == sorted(
            ids
        )
        for message in messages:
            assert message.message_attributes["request_id"]["StringValue"] == "é1"
            assert json.loads(message.body)["headers"] == {"request_id": "é1"}

    def test_publish_batch(self, sns, task, received):
        """A batch is a request for each ten messages."""
        high = task.with_priority(taskhawk.Priority.high).with_headers(request_id="1")
        with taskhawk.batch():
            ids = [high.dispatch(number) for number in range(12)]
        assert sns.actions == ["PublishBatch", "PublishBatch"]
        messages = received()
        assert sorted(json.loads(message.body)["id"] for message in messages) == sorted(
            ids
        )
        assert {
            m.message_attributes["request_id"]["StringValue"] for m in messages
        } == {"1"}

    def test_partial_failure(self, aws):
        """An answer of 200 to PublishBatch is read entry by entry."""
        failed = [
            {"Id": "0", "Code": "InvalidParameter", "SenderFault": True},
            {"Id": "2", "Code": "Internal", "SenderFault": False},
        ]
        successful = [{"Id": "1", "MessageId": "m"}]
        aws.always("PublishBatch", {"Successful": successful, "Failed": failed})
        with contextlib.closing(taskhawk.SnsSender()) as sender:
            assert sender.send("arn:aws:sns:us-east-1:000000000000:t", numbered(4)) == [
                taskhawk.Refusal(0, "InvalidParameter", "", final=True),
                taskhawk.Refusal(2, "Internal", "", final=False),
                taskhawk.Refusal(
                    3, "Unanswered", "the answer does not name this entry", final=False
                ),
            ]

    @pytest.mark.parametrize(
        ("region", "partition"),
        [
            ("eu-west-1", "aws"),
            ("cn-north-1", "aws-cn"),
            ("us-gov-west-1", "aws-us-gov"),
        ],
    )
    def test_topics(self, region, partition):
        """A topic is named by partition, region, account, queue and priority, without a request."""
        account = {"AWS_ACCOUNT_ID": 12345, "TASKHAWK_QUEUE": "DEV-myApp"}
        taskhawk.configure(AWS_SETTINGS, AWS_REGION=region, **account)
        with contextlib.closing(taskhawk.SnsSender()) as sender:
            names = [sender.destination(priority) for priority in taskhawk.Priority]
        topic = f"arn:{partition}:sns:{region}:000000012345:taskhawk-dev-myapp"
        assert names == [
            topic,
            f"{topic}-high-priority",
            f"{topic}-low-priority",
            f"{topic}-bulk",
        ]

    @pytest.mark.parametrize(
        ("code", "status", "remedy"),
        [
            ("NotFound", 404, NO_TOPIC),
            ("AuthorizationError", 403, DENIED),
            ("InvalidClientTokenId", 403, UNKNOWN_KEY),
        ],
    )
    def test_errors_say_what_to_do(self, sns, task, code, status, remedy):
        """What only a person can mend is one sentence with its remedy."""
        sns.always("Publish", fault(code, "why", status))
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            task.dispatch("x")
        name = f"taskhawk-{taskhawk.settings.TASKHAWK_QUEUE.lower()}"
        topic = f"arn:aws:sns:us-east-1:000000000000:{name}"
        assert str(caught.value) == f"{topic}: {remedy.format('Publish')} ({code})"

    def test_missing_topic(self, ministack, task, queue_name):
        """A topic that is not there is said to be missing."""
        configure_aws(ministack, queue_name, IS_LAMBDA_APP=True)
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            task.dispatch("x")
        topic = f"arn:aws:sns:us-east-1:000000000000:taskhawk-{queue_name.lower()}"
        assert str(caught.value) == f"{topic}: {NO_TOPIC} (NotFound)"

    def test_no_region(self, task, queue_name):
        """Without a region there is no topic's name: the sentence says how to set one."""
        lambda_app = {"IS_LAMBDA_APP": True, "TASKHAWK_QUEUE": queue_name}
        taskhawk.configure(AWS_SETTINGS, AWS_REGION=None, **lambda_app)
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            task.dispatch("x")
        assert str(caught.value) == (
            f"taskhawk-{queue_name.lower()}: no AWS region: set AWS_REGION, for"
            " example eu-west-1 (NoRegionError)"
        )


# --- 9. connections -------------------------------------------------------------------


def forked(
    function: Callable[[], object], how: str = "os.fork"
) -> Callable[[], int | None]:
    """Run a function in a forked child, and return a function that waits for its exit code."""

    def child():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)  # a child that hangs ends with -SIGALRM
        function()

    if how == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        return lambda: process.join(30) or process.exitcode
    pid = os.fork()
    if not pid:
        try:
            child()
            os._exit(0)
        finally:
            os._exit(1)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
class TestProcesses:
    """Threads share one broker, and a forked child has its own."""

    @pytest.fixture
    def queue(self, scripted, queue_name):
        """Return the name of the default queue, which is on the scripted ministack."""
        return f"TASKHAWK-{queue_name}"

    def test_made_once(self, tmp_path):
        """However many threads are the first to need a broker, there is one."""
        for url in ("sqs", f"sqlite:///{tmp_path}/queue.db"):
            taskhawk.configure(AWS_SETTINGS, TASKHAWK_BROKER=url)
            barrier = threading.Barrier(16)

            def first(barrier=barrier):
                barrier.wait(20)
                return taskhawk._brokers.broker()

            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                found = [pool.submit(first) for _ in range(16)]
                assert len({id(future.result()) for future in found}) == 1
            assert taskhawk._brokers.sender() is taskhawk._brokers.broker()

    def test_sender(self, tmp_path):
        """A Lambda app publishes to SNS, but on SQLite to its queues."""
        taskhawk.configure(AWS_SETTINGS, IS_LAMBDA_APP=True)
        assert isinstance(taskhawk._brokers.sender(), taskhawk.SnsSender)
        assert isinstance(taskhawk._brokers.broker(), taskhawk.SqsBroker)
        taskhawk.configure(
            IS_LAMBDA_APP=True, TASKHAWK_BROKER=f"sqlite:///{tmp_path}/queue.db"
        )
        assert isinstance(taskhawk._brokers.sender(), taskhawk.SqliteBroker)

    def test_threads_dispatch(self, scripted, task, queue):
        """Threads share a client: each dispatch is one request, and none is lost or mixed up."""
        task.dispatch(0)
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            ids = list(pool.map(task.dispatch, range(1, 160)))
        assert len(set(ids)) == 159
        assert scripted.actions == ["GetQueueUrl", *["SendMessage"] * 160]
        bodies = drain(taskhawk._brokers.broker(), queue)
        assert sorted(json.loads(body)["args"][0] for body in bodies) == list(
            range(160)
        )

    def test_threads_begin_together(self, aws, task):
        """Threads that are the first to dispatch send each their own message, and no more."""
        barrier = threading.Barrier(8)

        def first(number):
            barrier.wait(20)
            task.dispatch(number)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(first, range(8)))
        sent = [request["MessageBody"] for request in aws.asked("SendMessage")]
        assert sorted(json.loads(body)["args"][0] for body in sent) == list(range(8))
        known = len(aws.calls)
        task.dispatch(8)
        assert aws.actions[known:] == ["SendMessage"]

    def test_threads_dispatch_to_sqlite(self, task, tmp_path):
        """Threads share a connection, and none is lost."""
        taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{tmp_path}/queue.db")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(task.dispatch, range(80)))
        bodies = drain(taskhawk._brokers.broker(), "TASKHAWK-DEFAULT")
        assert sorted(json.loads(body)["args"][0] for body in bodies) == list(range(80))

    def test_configure_closes_connections(self, aws, task):
        """configure() closes the connections to SQS, and the next dispatch makes new ones."""
        task.dispatch(1)
        with aws.changed:
            assert len(aws.connected) == 1
        configure_aws(aws.url, "x")
        with aws.changed:
            assert aws.changed.wait_for(lambda: not aws.connected, timeout=10)
        task.dispatch(2)
        assert aws.actions == ["GetQueueUrl", "SendMessage"] * 2

    @pytest.mark.skipif(
        not Path("/proc/self/fd").exists(), reason="only Linux lists open files"
    )
    def test_configure_closes_files(self, task, tmp_path):
        """configure() closes the database, and the next dispatch opens it anew."""

        def is_open():
            files = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
            return str(tmp_path / "queue.db") in files

        taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{tmp_path}/queue.db")
        assert not is_open()
        for number in (1, 2):
            task.dispatch(number)
            assert is_open()
            taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{tmp_path}/queue.db")
            assert not is_open()
        assert taskhawk._brokers.broker().depth("TASKHAWK-DEFAULT").visible == 2

    @pytest.mark.parametrize("how", ["os.fork", "multiprocessing"])
    def test_fork_on_sqs(self, scripted, task, queue, how):
        """A forked child dispatches over connections of its own while its parent goes on."""
        task.dispatch("parent before")
        ours = {call.port for call in scripted.calls}

        def child():
            for number in range(5):
                task.dispatch(f"child {number}")

        wait = forked(child, how)
        for number in range(5):
            task.dispatch(f"parent {number}")
        assert wait() == 0
        sent = {
            json.loads(call.data["MessageBody"])["args"][0]: call.port
            for call in scripted.calls
            if call.action == "SendMessage"
        }
        assert {
            port for text, port in sent.items() if text.startswith("parent")
        } == ours
        assert not ours & {
            port for text, port in sent.items() if text.startswith("child")
        }
        assert len(drain(taskhawk._brokers.broker(), queue)) == 11

    @pytest.mark.parametrize("how", ["os.fork", "multiprocessing"])
    def test_fork_on_sqlite(self, task, tmp_path, how):
        """What a forked child dispatches is kept, whichever of the two closes the file first."""
        url = f"sqlite:///{tmp_path}/queue.db"
        taskhawk.configure(TASKHAWK_BROKER=url)
        task.dispatch("parent before")
        dispatched, closed = (
            multiprocessing.get_context("fork").Event() for _ in range(2)
        )

        def child():
            task.dispatch("child 1")
            dispatched.set()
            assert closed.wait(20)
            task.dispatch("child 2")

        wait = forked(child, how)
        task.dispatch("parent after")
        assert dispatched.wait(20)
        taskhawk.configure(TASKHAWK_BROKER=url)
        closed.set()
        assert wait() == 0
        bodies = drain(taskhawk._brokers.broker(), "TASKHAWK-DEFAULT")
        texts = sorted(json.loads(body)["args"][0] for body in bodies)
        assert texts == ["child 1", "child 2", "parent after", "parent before"]

    def test_fork_while_threads_dispatch(self, task, tmp_path):
        """A fork in the middle of other threads' transactions harms neither child nor parent."""
        taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{tmp_path}/queue.db")
        stop = threading.Event()

        def dispatch_on():
            count = 0
            while not stop.is_set():
                task.dispatch(count)
                count += 1
            return count

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            dispatching = [pool.submit(dispatch_on) for _ in range(2)]
            waits = [forked(lambda: task.dispatch("child")) for _ in range(8)]
            codes = [wait() for wait in waits]
            stop.set()
            count = sum(future.result() for future in dispatching)
        assert codes == [0] * 8
        assert taskhawk._brokers.broker().depth("TASKHAWK-DEFAULT").visible == count + 8

    def test_fork_while_a_thread_adds_to_its_batch(self, task, tmp_path):
        """A fork waits for what a thread adds, lest a lock stay held in the child for ever."""
        taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{tmp_path}/queue.db")
        adding, forking = threading.Event(), threading.Event()
        os.register_at_fork(before=forking.set)

        def slowly():
            adding.set()
            assert forking.wait(10)
            yield from ()

        def add():
            with taskhawk.batch():
                taskhawk._collect(slowly())

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            added = pool.submit(add)
            assert adding.wait(10)
            assert forked(lambda: task.dispatch("child"))() == 0
            added.result()

    def test_fork_elsewhere(self, task, tmp_path, monkeypatch):
        """A relative path is relative to where it was first used, whatever a task does then."""
        monkeypatch.chdir(tmp_path)
        taskhawk.configure(TASKHAWK_BROKER="sqlite:///queue.db")
        task.dispatch("before")
        (tmp_path / "elsewhere").mkdir()
        os.chdir("elsewhere")
        assert forked(lambda: task.dispatch("child"))() == 0
        task.dispatch("after")
        assert taskhawk._brokers.broker().depth("TASKHAWK-DEFAULT").visible == 3
        assert os.listdir() == []

    def test_odd_directory(self, task, tmp_path, monkeypatch):
        """A directory that no URL can name is no trouble to a relative path."""
        (tmp_path / "odd?").mkdir()
        monkeypatch.chdir(tmp_path / "odd?")
        taskhawk.configure(TASKHAWK_BROKER="sqlite:///queue.db")
        task.dispatch(1)
        assert os.listdir(tmp_path / "odd?") != []

    def test_fork_without_the_file(self, task, tmp_path):
        """Where the file can't be opened again after a fork, that is an error until it can be."""
        taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{tmp_path}/queues/queue.db")
        (tmp_path / "queues").mkdir()
        task.dispatch("before")
        (tmp_path / "queues").rename(tmp_path / "away")
        assert forked(lambda: None)() == 0
        with pytest.raises(
            taskhawk.ConfigurationError, match=r"unable to open database file$"
        ):
            task.dispatch("meanwhile")
        (tmp_path / "away").rename(tmp_path / "queues")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(task.dispatch, "after").result(20)
        assert taskhawk._brokers.broker().depth("TASKHAWK-DEFAULT").visible == 2
        (tmp_path / "queues").rename(tmp_path / "away")
        assert forked(lambda: None)() == 0
        taskhawk._brokers.close()  # there is nothing to close

    def test_fork_with_memory(self, task):
        """Memory is of one process: in a forked child it is refused, and the parent goes on."""
        taskhawk.configure(TASKHAWK_BROKER="sqlite://")
        task.dispatch(1)
        read, write = os.pipe()

        def child():
            try:
                task.dispatch(2)
            except taskhawk.ConfigurationError as error:
                os.write(write, str(error).encode())

        assert forked(child)() == 0
        os.close(write)
        assert os.read(read, 1000).decode() == (
            "sqlite:// is the memory of one process, and this is another: use a file, such as"
            " sqlite:///queue.db"
        )
        os.close(read)
        task.dispatch(3)
        assert taskhawk._brokers.broker().depth("TASKHAWK-DEFAULT") == taskhawk.Depth(
            2, 0, 0
        )


# === PART III: TASKS ==================================================================


# --- 10. tasks ------------------------------------------------------------------------


def place(fn: Any) -> str:
    """Return what errors say of where a function is."""
    code = fn.__code__
    return (
        f"{fn.__module__}.{fn.__qualname__} ({code.co_filename}:{code.co_firstlineno})"
    )


class Shop:
    """Has methods, which are no tasks, and a function, which is one."""

    def method(self):
        """Do nothing."""

    @classmethod
    def class_method(cls):
        """Do nothing."""

    @staticmethod
    def function():
        """Do nothing."""

    def __call__(self):
        """Do nothing."""


class HandMade(taskhawk.Task):
    """A TASKHAWK_TASK_CLASS that overrides what 1.4's manual says it may."""

    runs: list[Any] = []  # noqa: RUF012

    def call(self, message, receipt):
        """Note the run, and go on."""
        self.runs.append((self.name, self.retry, receipt))
        super().call(message, receipt)


A_METHOD = (
    "is a method: expected a function, which a message can call without an object"
)


class TestTasks:
    """Only what was registered, under the name it was registered by, can be run by a message."""

    def test_callable(self):
        """A task is called as its function was, and looks like it."""

        def add(one: int, /, other: int = 1, *, self: int = 0) -> int:
            """Add numbers."""
            return one + other + self

        add.custom = "kept"
        task = taskhawk.task(add)
        assert (task.__name__, task.__doc__, task.__module__) == (
            "add",
            "Add numbers.",
            __name__,
        )
        assert (task.__qualname__, task.__wrapped__) == (add.__qualname__, add)
        assert task.__annotations__ == add.__annotations__
        assert (task.custom, inspect.signature(task)) == (
            "kept",
            inspect.signature(add),
        )
        assert (task(1), task(1, 2), task(1, other=3, self=4)) == (2, 3, 8)

    def test_api_of_1_4(self):
        """A task has 1.4's properties, and can be made by hand."""

        @taskhawk.task(priority=taskhawk.Priority.low, name="mail.send")
        def send(to):
            pass

        assert isinstance(send, taskhawk.Task)
        assert send.task is send
        assert taskhawk.Task.find_by_name("mail.send") is send
        assert (send.name, send.priority) == ("mail.send", taskhawk.Priority.low)
        assert isinstance(send.fn, types.FunctionType)
        assert (str(send), repr(send)) == (
            "Taskhawk task: mail.send",
            "Taskhawk task: mail.send",
        )
        for name in (
            "name",
            "priority",
            "fn",
            "accepts_metadata",
            "accepts_headers",
            "task",
        ):
            with pytest.raises(AttributeError):
                setattr(send, name, None)
        bulk = taskhawk.Priority.bulk
        made = taskhawk.Task(plain, bulk, "made.by.hand")
        assert (made.fn, made.priority, made.name) == (plain, bulk, "made.by.hand")
        with pytest.raises(taskhawk.TaskNotFound) as caught:
            taskhawk.Task.find_by_name("made.by.hand")
        text = "no task is registered as 'made.by.hand': is its module imported?"
        assert str(caught.value) == text

    def test_default_name(self):
        """Without name=, a task is called by its module and function, and has default priority."""
        task = taskhawk.task(plain)
        assert (task.name, task.priority) == (
            f"{__name__}.plain",
            taskhawk.Priority.default,
        )
        assert taskhawk.task(Shop.function).name == f"{__name__}.function"
        high = taskhawk.task(priority=taskhawk.Priority.high)(place)
        assert (high.name, high.priority) == (
            f"{__name__}.place",
            taskhawk.Priority.high,
        )
        bound = functools.partial(plain, 1)
        assert taskhawk.task(name="shop.partial")(bound).name == "shop.partial"

    def test_priorities(self):
        """The four priorities have 1.4's names and values."""
        values = {priority.name: priority.value for priority in taskhawk.Priority}
        assert values == {"default": 1, "high": 2, "low": 3, "bulk": 4}

    def test_function_attributes(self, sync):
        """What another decorator left on the function does not replace what is the task's own."""

        def fetch():
            return "fetched"

        fetch.retry = fetch.dispatch = fetch.call = fetch._name = fetch._fn = (
            "another decorator's"
        )
        task = taskhawk.task(name="shop.fetch")(fetch)
        assert (task.retry, task.name, task()) == (None, "shop.fetch", "fetched")
        assert uuid.UUID(task.dispatch())

    @pytest.mark.parametrize(
        ("fn", "metadata", "headers"),
        [
            (lambda to: None, False, False),
            (lambda to, metadata: None, True, False),
            (lambda *, headers=None: None, False, True),
            (lambda metadata, headers: None, True, True),
            (lambda **kwargs: None, True, True),
            (lambda metadata, headers, /: None, False, False),
            (lambda metadata, /, **kwargs: None, True, True),
        ],
    )
    def test_accepts(self, fn, metadata, headers):
        """A task is given what it has a parameter for, by name or by **kwargs."""
        task = taskhawk.Task(fn, taskhawk.Priority.default, "shop.f")
        assert (task.accepts_metadata, task.accepts_headers) == (metadata, headers)

    def test_call(self):
        """Task.call gives metadata and headers where they are taken, whatever their annotations."""

        @taskhawk.task(name="tasks.send_email")
        def send_email(to, subject, metadata: str, headers: 0, from_email=None):
            runs.append((to, subject, metadata, headers, from_email))

        runs: list[Any] = []
        message = taskhawk.Message(VALID)
        send_email.call(message, "receipt")
        message.call_task(None)
        metadata = {
            "id": VALID["id"],
            "priority": taskhawk.Priority.high,
            "receipt": "receipt",
        }
        metadata |= {"timestamp": 1460868253255, "version": "1.0"}
        args = ("email@automatic.com", "Hello!")
        rest = (VALID["headers"], "spam@example.com")
        assert runs == [
            (*args, metadata, *rest),
            (*args, {**metadata, "receipt": None}, *rest),
        ]

    def test_call_leaves_message(self):
        """A task that empties what it is given does not change the message."""

        @taskhawk.task(name="tasks.send_email")
        def send_email(to, subject, headers, **kwargs):
            headers.clear()
            kwargs.clear()

        message = taskhawk.Message(copy.deepcopy(VALID))
        message.call_task(None)
        assert message.as_dict() == VALID

    def test_keywords(self):
        """A task with **kwargs gets metadata and headers in them, and no message can forge them."""

        @taskhawk.task(name="tasks.send_email")
        def send_email(to, /, subject, **kwargs):
            runs.append(kwargs)

        runs: list[Any] = []
        forged = {"metadata": {"id": "forged"}, "headers": "forged", "to": 1}
        assert run_body(json.dumps(edited("kwargs", forged))).error is None
        [kwargs] = runs
        assert (kwargs["metadata"].id, kwargs["metadata"].receipt) == (
            VALID["id"],
            "receipt",
        )
        assert (kwargs["headers"], kwargs["to"], len(kwargs)) == (
            VALID["headers"],
            1,
            3,
        )

    def test_metadata(self):
        """Metadata is a dict with 1.4's five keys, which are attributes too; the rest only that."""
        message = taskhawk.Message(VALID)
        metadata = taskhawk.Metadata(message, "receipt")
        assert isinstance(metadata, dict)
        assert sorted(metadata) == ["id", "priority", "receipt", "timestamp", "version"]
        assert {name: getattr(metadata, name) for name in metadata} == metadata
        assert (metadata.headers, metadata.attempt) == (VALID["headers"], 1)
        assert (metadata.queue, metadata.lease_lost) == (None, False)
        metadata.extend_visibility_timeout(60)  # of no queue: nothing to do
        with pytest.raises(AttributeError) as caught:
            str(metadata.provider)
        assert str(caught.value) == "metadata has no 'provider'"
        assert copy.copy(metadata) == metadata

    def test_metadata_of_queue(self):
        """Received from a queue, metadata knows its name and attempts, and can hold the message."""
        now = 1_000_000.0
        broker = taskhawk.SqliteBroker("sqlite://", clock=lambda: now)
        broker.send("shop", [taskhawk.Outgoing(json.dumps(VALID), {})])
        seen = []

        @taskhawk.task(name="tasks.send_email")
        def send_email(to, subject, metadata, from_email=None):
            metadata.extend_visibility_timeout(100)
            seen.append(
                (
                    metadata.queue,
                    metadata.attempt,
                    metadata.receipt,
                    metadata.lease_lost,
                )
            )

        for attempt in (1, 2):
            [received] = broker.receive("shop", 1, 0, 30, threading.Event())
            received.lease_lost = attempt == 2
            assert taskhawk.process(received).error is None
            assert seen.pop() == (
                "shop",
                attempt,
                received.receipt_handle,
                attempt == 2,
            )
            now += 99
            assert broker.receive("shop", 1, 0, 30, threading.Event()) == []
            now += 2
        broker.close()

    @pytest.mark.parametrize(
        ("args", "kwargs", "sentence"),
        [
            ((), {}, "tasks.send: missing a required argument: 'one'"),
            ((1,), {}, "tasks.send: missing a required argument: 'three'"),
            ((1, 2, 3), {"three": 3}, "tasks.send: too many positional arguments"),
            (
                (1,),
                {"three": 3, "four": 4},
                "tasks.send: got an unexpected keyword argument 'four'",
            ),
            (
                (1, 2),
                {"two": 2, "three": 3},
                "tasks.send: multiple values for argument 'two'",
            ),
            (
                (1,),
                {"three": 3, "metadata": {}},
                "tasks.send: 'metadata' is given by the worker: leave it out",
            ),
        ],
    )
    def test_binding(self, memory, args, kwargs, sentence):
        """A call that the worker could not make is a TypeError at the dispatch."""

        @taskhawk.task(name="tasks.send")
        def send(one, /, two=2, *, three, metadata):
            pass

        for dispatch in (send.dispatch, send.with_headers(a=1).dispatch):
            with pytest.raises(TypeError) as caught:
                dispatch(*args, **kwargs)
            assert str(caught.value) == sentence
        assert queued() == []
        assert send.dispatch(1, three=3)

    def test_binding_names(self, memory):
        """Parameters may be called self, args or priority, and headers h1, task or self."""

        @taskhawk.task(name="tasks.odd")
        def odd(self, args, priority, headers):
            runs.append((self, args, priority, headers))

        runs: list[Any] = []
        odd.with_headers(self=1, task=2).with_headers(h1=3).dispatch(
            self=4, args=5, priority=6
        )
        [received] = queued()
        assert taskhawk.process(received).error is None
        assert runs == [(4, 5, 6, {"self": 1, "task": 2, "h1": 3})]

    def test_immutable_invocations(self, memory):
        """Each with_… returns a new invocation, and the one it was called on stays as it was."""

        @taskhawk.task(name="tasks.send", priority=taskhawk.Priority.low)
        def send():
            pass

        first = send.with_headers(a=1, b=1)
        others = first.with_headers(b=2), first.with_priority(taskhawk.Priority.high)
        assert (
            others[1].with_priority(taskhawk.Priority.bulk).with_delay(0)
            is not others[1]
        )
        assert all(
            isinstance(other, taskhawk.AsyncInvocation) for other in (first, *others)
        )
        for invocation in (send, first, *others, taskhawk.AsyncInvocation(send)):
            invocation.dispatch()
        low, high = queued(taskhawk.Priority.low), queued(taskhawk.Priority.high)
        sent = [json.loads(received.body) for received in low + high]
        headers = [{}, {"a": 1, "b": 1}, {"a": 1, "b": 2}, {}, {"a": 1, "b": 1}]
        assert [data["headers"] for data in sent] == headers
        assert [data["metadata"]["priority"] for data in sent] == ["low"] * 4 + ["high"]
        assert queued(taskhawk.Priority.bulk) == []

    @pytest.mark.parametrize("priority", list(taskhawk.Priority))
    def test_priority(self, memory, priority):
        """A message goes through the queue of its priority, and says so."""
        task = taskhawk.task(plain, priority=priority)
        task.dispatch()
        other = taskhawk.Priority.default
        task.with_priority(other).dispatch()
        for expected in {priority, other}:
            for received in queued(expected):
                data = json.loads(received.body)
                assert data["metadata"]["priority"] == expected.name
        with pytest.raises(TypeError) as caught:
            task.with_priority("high")
        assert str(caught.value) == "priority: expected a taskhawk.Priority, got 'high'"

    def test_default_headers(self, memory):
        """The default headers are the dispatched message's too; its own come first."""
        task = taskhawk.task(plain)
        defaults = {"request_id": "default", "task": task.name}
        for hook, headers in (
            (
                lambda task: {**defaults, "task": task.name},
                {**defaults, "request_id": "own"},
            ),
            (lambda: None, {"request_id": "own"}),
        ):
            taskhawk.configure(
                TASKHAWK_BROKER="sqlite://", TASKHAWK_DEFAULT_HEADERS=hook
            )
            task.with_headers(request_id="own").dispatch()
            [received] = queued()
            assert json.loads(received.body)["headers"] == headers

    @pytest.mark.parametrize("delay", [90, 90.0, dt.timedelta(minutes=1.5)])
    def test_delay(self, memory, delay):
        """A delay is seconds or a timedelta, and the queue holds the message for so long."""
        task = taskhawk.task(plain)
        task.with_delay(delay).dispatch()
        task.with_delay(3).with_delay(0).dispatch()
        broker = taskhawk._brokers.broker()
        depth = broker.depth(broker.destination(taskhawk.Priority.default))
        assert depth == taskhawk.Depth(visible=1, in_flight=0, delayed=1)

    @pytest.mark.parametrize(
        ("delay", "shown"),
        [
            (-1, "-1"),
            (float("nan"), "nan"),
            (float("inf"), "inf"),
            (dt.timedelta(days=-1), "-86400.0"),
        ],
    )
    def test_wrong_delay(self, delay, shown):
        """A negative or non-finite delay is a ValueError."""
        with pytest.raises(ValueError, match=r"^delay: ") as caught:
            taskhawk.task(plain).with_delay(delay)
        assert str(caught.value) == f"delay: expected 0 or more seconds, got {shown}"

    def test_dispatch_many(self, memory):
        """dispatch_many() dispatches a stream of calls, ten at a time, and counts them."""
        runs = []

        @taskhawk.task(name="tasks.note")
        def note(one, two=None, *, headers):
            runs.append((one, two, headers))

        def calls():
            yield from range(11)
            sent_before.append(len(queued()))
            yield (1, 2)
            yield {"one": 3, "two": 4}
            yield [5]

        sent_before = []
        assert note.dispatch_many([]) == 0
        assert note.with_headers(a=1).dispatch_many(calls()) == 14
        assert note.dispatch_many([7]) == 1
        assert sent_before == [10]
        for received in queued():
            assert taskhawk.process(received).error is None
        expected = [(10, None), (1, 2), (3, 4), ([5], None)]
        assert runs == [*((*call, {"a": 1}) for call in expected), (7, None, {})]

    # --- names ---

    @pytest.mark.parametrize(
        ("args", "name"),
        [
            (["shop.py"], "shop.sell"),
            (["stores/shop.py"], "shop.sell"),
            (["-m", "shop"], "shop.sell"),
            (["-m", "stores.shop"], "stores.shop.sell"),
            (["-m", "stores"], "stores.__main__.sell"),
            (["-c", "exec(open('shop.py').read())"], "__main__.sell"),
        ],
        ids=" ".join,
    )
    def test_main(self, tmp_path, args, name):
        """A script's task has the name that a worker imports it by, and answers to __main__ too."""
        (tmp_path / "stores").mkdir()
        script = textwrap.dedent("""
            import taskhawk

            @taskhawk.task
            def sell():
                pass

            @taskhawk.task(name="shop.buy")
            def buy():
                pass

            if __name__ == "__main__":
                print(sell.name, taskhawk.Task.find_by_name("__main__.sell") is sell)
                print(buy.name, sorted(taskhawk._registry))
        """)
        for path in (
            "shop.py",
            "stores/shop.py",
            "stores/__main__.py",
            "stores/__init__.py",
        ):
            (tmp_path / path).write_text(script if "init" not in path else "")
        result = run_python(args, cwd=tmp_path)
        names = sorted({name, "__main__.sell", "shop.buy"})
        assert (result.stderr, result.stdout) == (
            "",
            f"{name} True\nshop.buy {names}\n",
        )

    def test_main_dispatches(self, tmp_path):
        """What a script dispatches, a worker that imports the script runs; it may import itself."""
        (tmp_path / "shop.py").write_text(
            textwrap.dedent("""
            import taskhawk

            @taskhawk.task
            def sell(what):
                print("sold", what)

            if __name__ == "__main__":
                import shop

                assert shop.sell is taskhawk.Task.find_by_name("shop.sell")
                sell.dispatch("milk")
        """)
        )
        env = {"TASKHAWK_BROKER": "sqlite:///queue.db"}
        result = run_python(["shop.py"], cwd=tmp_path, env=env)
        assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)
        worker = ["-m", "taskhawk", "listen", "shop", "--until-empty"]
        result = run_python(worker, cwd=tmp_path, env=env)
        assert result.stdout.startswith("sold milk\n1 received, 1 acked, ")

    def test_processes(self, tmp_path):
        """A task is pickled as its function would be, and has its name in a spawned process too."""
        (tmp_path / "shop.py").write_text(
            textwrap.dedent("""
            import multiprocessing, pickle, taskhawk
            @taskhawk.task
            def sell(what): return what
            def name(task): return task.name
            if __name__ == "__main__":
                print(pickle.loads(pickle.dumps(sell)) is sell)
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    print(pool.map(sell, ["milk", "bread"]), pool.map(name, [sell]))
            """)
        )
        result = run_python(["shop.py"], cwd=tmp_path)
        assert result.stdout == "True\n['milk', 'bread'] ['shop.sell']\n", result.stderr

    def test_taken_name(self):
        """Another function under a taken name is refused, by a sentence that names both places."""

        def first():
            pass

        def second():
            pass

        task = taskhawk.task(name="shop.sell")(first)
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.task(name="shop.sell")(second)
        assert str(caught.value) == (
            f"shop.sell: the name of {place(second)} is taken by {place(first)}:"
            " rename one, or pass name= to @taskhawk.task"
        )
        assert taskhawk.Task.find_by_name("shop.sell") is task
        assert taskhawk.task(name="shop.sell")(first).fn is first  # registered twice

    def test_taken_by_twin(self, tmp_path, monkeypatch):
        """Two functions of one name in a module are two functions."""
        source = "import taskhawk\n\n@taskhawk.task\ndef sell():\n    pass\n"
        path = tmp_path / "twins.py"
        path.write_text(source + source)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            importlib.import_module("twins")
        assert str(caught.value) == (
            f"twins.sell: the name of twins.sell ({path}:8) is taken by twins.sell ({path}:3):"
            " rename one, or pass name= to @taskhawk.task"
        )

    def test_taken_by_factory(self):
        """Two functions made by one function are two: a message must not reach the other."""

        def make(what):
            @taskhawk.task(name="shop.sell")
            def sell():
                return what

            return sell

        milk = make("milk")
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            make("bread")
        assert str(caught.value) == (
            f"shop.sell: the name of {place(milk.fn)} is taken by {place(milk.fn)}:"
            " rename one, or pass name= to @taskhawk.task"
        )
        assert taskhawk.Task.find_by_name("shop.sell") is milk

    def test_taken_by_callable(self):
        """An object has its name alone to be known by."""
        taskhawk.task(name="shop.call")(functools.partial(plain, 1))
        other = functools.partial(plain, 2)
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.task(name="shop.call")(other)
        first = taskhawk.Task.find_by_name("shop.call").fn
        assert str(caught.value) == (
            f"shop.call: the name of functools.{other!r} is taken by functools.{first!r}:"
            " rename one, or pass name= to @taskhawk.task"
        )
        assert taskhawk.task(name="shop.call")(first).fn is first

    @pytest.mark.parametrize("again", ["reload", "import"])
    @pytest.mark.parametrize("edit", ["", "\n\n\n"])
    def test_reload(self, tmp_path, monkeypatch, again, edit):
        """A module read again replaces its tasks, also where they moved to other lines."""
        source = "import taskhawk\n\n@taskhawk.task\ndef sell():\n    return {}\n"
        path = tmp_path / "reloaded.py"
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "reloaded", raising=False)
        path.write_text(source.format(1))
        module = importlib.import_module("reloaded")
        old = module.sell
        path.write_text(edit + source.format(2))
        if again == "reload":
            module = importlib.reload(module)
        else:
            monkeypatch.delitem(sys.modules, "reloaded")
            module = importlib.import_module("reloaded")
        assert (old(), module.sell()) == (1, 2)
        assert taskhawk.Task.find_by_name("reloaded.sell") is module.sell

    def test_repl(self, tmp_path):
        """In the interactive interpreter, a task can be defined anew."""
        define = "@taskhawk.task\ndef sell(): return {}\n\n"
        typed = f"import taskhawk\n{define.format(1)}{define.format(2)}\n"
        typed += "print(sell.name, taskhawk.Task.find_by_name('__main__.sell')())\n"
        result = subprocess.run(
            [sys.executable, "-i", "-q"],
            input=typed,
            env=python_env(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.stdout == "__main__.sell 2\n", result.stderr

    def test_notebook(self, tmp_path):
        """In a notebook, where each cell is compiled as a file of its own, too."""
        cell = "@taskhawk.task\ndef sell():\n    return {}\n"
        code = "import taskhawk\n" + "".join(
            f"exec(compile({cell.format(n)!r}, '/tmp/ipykernel_1/{n}.py', 'exec'))\n"
            for n in (1, 2)
        )
        result = run_python(code + "print(sell.name, sell())", cwd=tmp_path)
        assert (result.stdout, result.stderr) == ("__main__.sell 2\n", "")

    # --- refusals ---

    @pytest.mark.parametrize(
        ("fn", "sentence"),
        [
            (Shop.method, f"Shop.method {A_METHOD}"),
            (Shop().method, f"Shop.method {A_METHOD}"),
            (Shop.class_method, f"Shop.class_method {A_METHOD}"),
            (
                lambda: None,
                "TestTasks.<lambda> is a lambda: expected a function with a name (def)",
            ),
            (None, "None can't be called: expected a function"),
            ("shop.sell", "'shop.sell' can't be called: expected a function"),
            (classmethod(plain), "plain can't be called: expected a function"),
        ],
    )
    def test_refused(self, fn, sentence):
        """What a message can't call is refused, by a sentence that says what to do."""
        for decorate in (taskhawk.task, taskhawk.task(name="shop.sell")):
            with pytest.raises(taskhawk.ConfigurationError) as caught:
                decorate(fn)
            assert str(caught.value) == sentence
        assert "shop.sell" not in taskhawk._registry

    def test_refused_in_class(self):
        """The decorator in a class body is refused at once."""
        with pytest.raises(taskhawk.ConfigurationError) as caught:

            class Cart:
                @taskhawk.task
                def fill(self):
                    pass

        name = "TestTasks.test_refused_in_class.<locals>.Cart.fill"
        assert str(caught.value) == f"{name} {A_METHOD}"

    @pytest.mark.parametrize("thing", [functools.partial(plain), Shop()])
    def test_refused_nameless(self, thing):
        """What has no name is refused unless it is given one."""
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.task(thing)
        assert (
            str(caught.value) == f"{thing!r} has no name: pass name= to taskhawk.task"
        )
        assert taskhawk.task(name="shop.sell")(thing).fn is thing

    def test_odd_name(self):
        """A name is a string, or no message could carry it."""
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.task(name=5)(place)
        assert str(caught.value) == "place has name=5: expected a string"

    def test_copied(self):
        """A task is copied as itself, also one of a callable that has a name by name= alone."""
        task = taskhawk.task(name="shop.plain")(functools.partial(plain))
        assert str(copy.copy(task)) == str(task)

    def test_refused_task(self):
        """A task is not made a task again."""
        task = taskhawk.task(name="shop.plain")(plain)
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.task(task)
        assert str(caught.value) == "plain is a task already: decorate it once"

    def test_refused_star_args(self):
        """A task function can't have *args."""

        def sell(what, *more):
            pass

        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.task(sell)
        text = "*args can't be a task's parameter: name the arguments, or take a list"
        assert str(caught.value) == f"{__name__}.sell: {text}"
        assert f"{__name__}.sell" not in taskhawk._registry

    def test_refused_builtin(self):
        """What does not tell its parameters can't be checked at a dispatch, and is refused."""
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.task(dict)
        text = "builtins.dict does not tell its parameters: expected a function written in Python"
        assert str(caught.value) == text

    @pytest.mark.parametrize(
        ("args", "options"), [((plain, 5), {}), ((plain,), {"colour": 1})]
    )
    def test_wrong_arguments(self, args, options):
        """Arguments that task() does not have are refused."""
        with pytest.raises(
            TypeError,
            match=r"^task(\.<locals>\.decorate)?\(\) (takes 1|got an unexpected)",
        ):
            taskhawk.task(*args, **options)

    @pytest.mark.parametrize(
        ("option", "value", "sentence"),
        [
            ("priority", "high", "priority='high': expected a taskhawk.Priority"),
            ("priority", 2, "priority=2: expected a taskhawk.Priority"),
            ("retry", 5, "retry=5: expected a function of the attempt"),
            (
                "retry_on",
                [ValueError],
                f"retry_on=[{ValueError!r}]: expected exceptions",
            ),
            (
                "retry_on",
                ("ValueError",),
                "retry_on=('ValueError',): expected exceptions",
            ),
            ("never_retry_on", 5, "never_retry_on=5: expected exceptions"),
        ],
    )
    def test_wrong_options(self, option, value, sentence):
        """Wrong options fail where the task is declared, not when it first fails."""
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.task(name="shop.sell", **{option: value})(plain)
        assert str(caught.value) == f"plain has {sentence}"
        assert "shop.sell" not in taskhawk._registry

    def test_retry_options(self):
        """The retry options are the task's, and decide which errors are run again after."""
        assert taskhawk.task(plain).retry is None
        policy = taskhawk.fixed(1)
        task = taskhawk.task(
            name="shop.sell",
            retry=policy,
            retry_on=(OSError,),
            never_retry_on=(TimeoutError,),
        )(plain)
        assert task.retry is policy
        assert (task.retry_on, task.never_retry_on) == ((OSError,), (TimeoutError,))

    # --- async def ---

    def test_async(self, memory):
        """An async function runs to its end; called by hand, it is what it was."""
        runs = []

        @taskhawk.task(name="shop.sell")
        async def sell(what, metadata):
            await asyncio.sleep(0)
            runs.append((what, metadata.attempt))
            return what

        sell.dispatch("milk")
        [received] = queued()
        assert taskhawk.process(received).fate is taskhawk.Fate.acknowledge
        assert runs == [("milk", 1)]
        assert asyncio.run(
            sell("bread", taskhawk.Metadata(taskhawk.Message(VALID), None))
        )

    def test_async_error(self):
        """An async function that raises has failed."""

        @taskhawk.task(name="tasks.send_email")
        async def send_email(*, to="", **kwargs):
            await asyncio.sleep(0)
            raise ValueError("no milk")

        outcome = run_body(json.dumps(edited("args", [])))
        assert (type(outcome.error), str(outcome.error)) == (ValueError, "no milk")
        assert outcome.error.__context__ is None
        assert outcome.fate is taskhawk.Fate.retry

    @pytest.mark.parametrize("kind", ["wrapped", "object", "partial"])
    def test_async_in_disguise(self, kind):
        """Whatever returns a coroutine is run to its end: none is taken for done unawaited."""
        runs = []

        async def sell(*_args, **_kwargs):
            await asyncio.sleep(0)
            runs.append("milk")

        class Seller:
            async def __call__(self, to, subject, from_email):
                await sell()

        def wrapped(to, subject, from_email):
            return sell()

        thing = {
            "wrapped": wrapped,
            "object": Seller(),
            "partial": functools.partial(wrapped),
        }[kind]
        taskhawk.task(name="tasks.send_email")(thing)
        assert run_body(json.dumps(VALID)).error is None
        assert runs == ["milk"]

    # --- TASKHAWK_TASK_CLASS ---

    def test_task_class(self, memory, monkeypatch):
        """TASKHAWK_TASK_CLASS may override call(), which runs whatever way the message came."""
        monkeypatch.setattr(HandMade, "runs", [])
        policy = taskhawk.fixed(1)
        taskhawk.configure(TASKHAWK_BROKER="sqlite://", TASKHAWK_TASK_CLASS=HandMade)
        task = taskhawk.task(name="shop.sell", retry=policy)(plain)
        assert type(task) is HandMade
        task.dispatch()
        [received] = queued()
        taskhawk.process(received)
        taskhawk.configure(TASKHAWK_SYNC=True)
        task.dispatch()
        receipts = received.receipt_handle, None
        assert HandMade.runs == [("shop.sell", policy, receipt) for receipt in receipts]

    def test_task_class_that_wraps(self):
        """TASKHAWK_TASK_CLASS may have another function run than the one that is decorated."""

        class Timed(taskhawk.Task):
            def __init__(self, fn, priority, name):
                super().__init__(functools.partial(fn), priority, name)

        taskhawk.configure(TASKHAWK_TASK_CLASS=Timed)
        task = taskhawk.task(name="shop.sell")(plain)
        assert taskhawk.Task.find_by_name("shop.sell") is task

    def test_task_class_alone(self, monkeypatch):
        """The class is read at each decoration, and no other setting is read or remembered."""
        monkeypatch.setenv("TASKHAWK_QUEUE", "not a queue!")
        for path, cls in (
            ("taskhawk.task_manager.Task", taskhawk.Task),
            (f"{__name__}.HandMade", HandMade),
            ("taskhawk.Task", taskhawk.Task),
        ):
            monkeypatch.setenv("TASKHAWK_TASK_CLASS", path)
            assert type(taskhawk.task(name="shop.sell")(plain)) is cls
        monkeypatch.setenv("TASKHAWK_QUEUE", "shop")
        assert taskhawk.settings.TASKHAWK_QUEUE == "shop"

    def test_wrong_task_class(self):
        """A class that makes no tasks is refused."""
        taskhawk.configure(TASKHAWK_TASK_CLASS=lambda fn, priority, name: fn)
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.task(plain)
        text = (
            "TASKHAWK_TASK_CLASS: expected a subclass of taskhawk.Task, got <function "
        )
        assert str(caught.value).startswith(text)

    @pytest.mark.slow
    def test_typing(self, tmp_path):
        """A type checker sees a wrong argument of a dispatch, of a call, and of the decorator."""
        shutil.copy(taskhawk.__file__, tmp_path)
        (tmp_path / "shop.py").write_text(
            textwrap.dedent("""\
            import taskhawk

            @taskhawk.task
            def sell(what: str, count: int = 1) -> bool:
                return True

            @taskhawk.task(priority=taskhawk.Priority.high)
            async def buy(what: str) -> None: ...

            a: str = sell.dispatch("milk", count=2)
            b: bool = sell("milk", 2)
            c: str = sell.with_headers(a="1").with_delay(3).dispatch("milk")
            d: str = buy.dispatch("milk")
            sell.dispatch(1)
            sell.dispatch("milk", number=2)
            sell.with_headers(a="1").dispatch()
            sell.with_priority(taskhawk.Priority.low).dispatch("milk", "2")
            buy.dispatch(2)
            e: str = sell("milk")
            taskhawk.task(priority=1)
        """)
        )
        args = [
            "-m",
            "mypy",
            "--strict",
            "--follow-imports=silent",
            "--cache-dir=cache",
            "shop.py",
        ]
        result = run_python(args, cwd=tmp_path, env={"PYTHONPATH": ""})
        errors = re.findall(
            r"^shop\.py:(\d+): error: .*\[([a-z-]+)\]$", result.stdout, re.MULTILINE
        )
        assert errors == [
            ("14", "arg-type"),
            ("15", "call-arg"),
            ("16", "call-arg"),
            ("17", "arg-type"),
            ("18", "arg-type"),
            ("19", "assignment"),
            ("20", "call-overload"),
        ]


class TestRefusals:
    """What can't be a task or a delay."""

    def test_generator(self):
        """A generator function is refused: calling it would run none of it."""
        with pytest.raises(taskhawk.ConfigurationError) as caught:

            @taskhawk.task
            def numbers():
                yield 1

        name = "TestRefusals.test_generator.<locals>.numbers"
        assert str(caught.value) == (
            f"{name} is a generator: expected a function that runs when it is called"
        )

    def test_delay(self):
        """A delay is seconds or a timedelta."""

        @taskhawk.task
        def soon() -> None:
            """Do nothing."""

        with pytest.raises(TypeError) as caught:
            soon.with_delay("5")
        assert str(caught.value) == "delay: expected seconds or a timedelta, got '5'"


# --- 11. publishing -------------------------------------------------------------------

NOTHING_CONFIGURED = {
    "AWS_REGION": "TASKHAWK-X: no AWS region: set AWS_REGION, for example eu-west-1"
    " (NoRegionError)",
    "AWS_ACCESS_KEY": "TASKHAWK-X: no AWS credentials: set AWS_ACCESS_KEY and AWS_SECRET_KEY, or"
    " give botocore a profile or role; to try things out without AWS, set TASKHAWK_BROKER to"
    " sqlite:///queue.db (NoCredentialsError)",
    "TASKHAWK_QUEUE": "TASKHAWK_QUEUE is not set: expected at most 71 letters, digits, hyphens and"
    " underscores, such as 'dev-myapp', from taskhawk.configure(), the module named by"
    " SETTINGS_MODULE, Django's settings or the environment",
}


class TestPublishing:
    """dispatch(): nothing leaves that can't arrive, and what was accepted has an id."""

    def test_id(self, sqlite):
        """Dispatch returns the id that the task then sees in its metadata."""
        seen = []

        @taskhawk.task(name="ids.note")
        def note(metadata):
            seen.append(metadata.id)

        sent = [note.dispatch(), note.with_priority(Priority.high).dispatch()]
        for received in [*receive_all(), *receive_all(Priority.high)]:
            assert taskhawk.process(received).fate is taskhawk.Fate.acknowledge
        assert seen == sent
        assert [str(uuid.UUID(text)) for text in sent] == sent

    def test_publish(self, broker, mail):
        """A message made by hand goes, through publish(), to the queue of its priority."""
        message = Message.new("mail.send", ["a"], {"text": "b"}, "my-id", {"c": "d"})
        message.priority = Priority.high
        assert taskhawk.publish(message) == "my-id"
        (received,) = receive_all(Priority.high)
        assert Message(json.loads(received.body)) == message

    def test_one_request(self, scripted, mail):
        """A dispatch is one request; the first to a queue looks its URL up, and no other does."""
        for _ in range(3):
            mail.dispatch()
        assert scripted.actions == ["GetQueueUrl", *["SendMessage"] * 3]
        for _ in range(2):
            mail.with_priority(Priority.high).dispatch()
        assert scripted.actions[4:] == ["GetQueueUrl", *["SendMessage"] * 2]

    def test_one_request_sns(self, scripted, queue_name, sqs_client, mail):
        """Over SNS, a dispatch is one Publish to the topic of its priority."""
        topic = f"taskhawk-{queue_name.lower()}-low-priority"
        arn = sqs_client(scripted.url, "sns").create_topic(Name=topic)["TopicArn"]
        configure_aws(scripted.url, queue_name, IS_LAMBDA_APP=True)
        scripted.calls.clear()
        for _ in range(2):
            mail.with_priority(Priority.low).with_headers(a="b").dispatch()
        assert scripted.actions == ["Publish"] * 2
        payload = scripted.calls[0].data
        assert payload["TopicArn"] == arn
        assert payload["MessageAttributes.entry.1.Name"] == "a"
        assert json.loads(payload["Message"])["headers"] == {"a": "b"}

    def test_threads(self, scripted, mail):
        """Threads that begin at the same time share one client and one look-up of the URL."""
        together = threading.Barrier(6)

        def send(number: int) -> None:
            together.wait(10)
            mail.dispatch(number)

        # Time for others to look up too, were they allowed to.
        scripted.always("GetQueueUrl", late(0.3))
        threads = [threading.Thread(target=send, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(scripted.actions) == ["GetQueueUrl", *["SendMessage"] * 6]
        assert sorted(received_args()) == list(range(6))

    @pytest.mark.parametrize(
        ("name", "value", "attribute"),
        [
            ("request_id", "1234", "1234"),
            ("number", 5, "5"),
            ("all.of_it-0", "Ümläut 😀\t\r\n\x7f\ud7ff\ue000\ufffd", ...),
            ("AWSx", "a", "a"),
            ("x" * 256, "a", "a"),
            ("x" * 257, "a", None),
            ("", "a", None),
            ("AWS.x", "a", None),
            ("aws.x", "a", None),
            ("Amazon.x", "a", None),
            ("aMAZON.x", "a", None),
            ("taskhawk.error", "a", None),
            (".x", "a", None),
            ("x.", "a", None),
            ("x..y", "a", None),
            ("x y", "a", None),
            ("x\n", "a", None),
            ("ä", "a", None),
            ("empty", "", None),
            ("control", "a\x00", None),
            ("surrogate", "\ud800", None),
            ("not_a_character", "\ufffe", None),
        ],
    )
    def test_attributes(self, sqlite, mail, name, value, attribute):
        """A header is an attribute too, where SQS takes its name and value; the body has it."""
        mail.with_headers(**{name: value}).dispatch()
        (received,) = receive_all()
        assert json.loads(received.body)["headers"] == {name: value}
        text = value if attribute is ... else attribute
        expected = {name: {"DataType": "String", "StringValue": text}} if text else {}
        assert received.message_attributes == expected

    def test_hostile_headers(self, endpoint, sqs_client, queue_name):
        """A message with more than ten headers, some refused by SQS, arrives with all of them."""
        seen = []

        @taskhawk.task(name="headers.note")
        def note(headers):
            seen.append(headers)

        make_queues(sqs_client(endpoint), queue_name)
        configure_aws(endpoint, queue_name)
        sent = {
            "AWS.trace": "1",
            "empty": "",
            "nul": "\0",
            "half": "\ud800",
            "ü": {"any": [1]},
        }
        sent |= {f"header-{number}": f"é{number}" for number in range(12)}
        note.with_headers(**sent).dispatch()
        (received,) = receive_all()
        names = [f"header-{number}" for number in range(10)]
        assert sorted(received.message_attributes) == names
        assert taskhawk.process(received).error is None
        assert seen == [sent]

    def test_body_is_the_truth(self):
        """Where attributes and body differ, the task gets what the body says."""
        seen = []

        @taskhawk.task(name="headers.truth")
        def note(headers):
            seen.append(headers)

        body = json.dumps(Message.new("headers.truth", headers={"a": "body"}).as_dict())
        attributes = {"a": {"DataType": "String", "StringValue": "attribute"}}
        assert (
            taskhawk.process(QueueMessage(body, "m", message_attributes=attributes))[1]
            is None
        )
        assert seen == [{"a": "body"}]

    def test_size_sqs(self, scripted, mail):
        """On SQS, a message of 1 MiB with its attributes is sent, and with one byte more is not."""
        limit = 1_048_576
        text = filler(limit, trace="é", name="n")
        invocation = mail.with_headers(trace="é", name="n")
        invocation.dispatch(text)
        (received,) = receive_all()
        assert service_size(received.body, received.message_attributes) == limit
        scripted.calls.clear()
        with pytest.raises(taskhawk.MessageTooLarge) as raised:
            invocation.dispatch(text + "x")
        assert str(raised.value) == (
            "mail.send: the message has 1048577 bytes (body and attributes), and the limit is"
            f" 1048576: the largest argument is args[0] with {len(text) + 3} bytes"
        )
        assert raised.value.limit == limit
        assert isinstance(raised.value, taskhawk.ValidationError)
        assert scripted.calls == []

    def test_size_sns(self, scripted, queue_name, sqs_client, mail):
        """Over SNS, the limit is 256 KiB."""
        sqs_client(scripted.url, "sns").create_topic(
            Name=f"taskhawk-{queue_name.lower()}"
        )
        configure_aws(scripted.url, queue_name, IS_LAMBDA_APP=True)
        text = filler(262_144, trace="t")
        invocation = mail.with_headers(trace="t")
        invocation.dispatch(text)
        with pytest.raises(taskhawk.MessageTooLarge) as raised:
            invocation.dispatch(text + "x")
        assert str(raised.value) == (
            "mail.send: the message has 262145 bytes (body and attributes), and the limit is"
            f" 262144: the largest argument is args[0] with {len(text) + 3} bytes"
        )

    @pytest.mark.parametrize(
        ("call", "largest"),
        [
            ((["x"], {"text": "é" * 180_000}, {}), "kwargs.text with 1080002 bytes"),
            ((["y" * 500_000, "x" * 600_000], {}, {}), "args[1] with 600002 bytes"),
            (([], {}, {"trace": "x" * 1_048_576}), "headers.trace with 1048578 bytes"),
        ],
    )
    def test_largest(self, sqlite, mail, call, largest):
        """The error names the argument or header that takes most, in bytes as they are sent."""
        args, kwargs, headers = call
        with pytest.raises(taskhawk.MessageTooLarge) as raised:
            mail.with_headers(**headers).dispatch(*args, **kwargs)
        assert str(raised.value).endswith(
            f"and the limit is 1048576: the largest argument is {largest}"
        )
        assert sqlite.depth("TASKHAWK-DEFAULT") == Depth(0, 0, 0)

    def test_too_large_without_arguments(self, sqlite):
        """Where it is the task's name that is too large, the error does not blame an argument."""

        @taskhawk.task(name="n" * 1_048_576)
        def long_name():
            """Do nothing."""

        with pytest.raises(taskhawk.MessageTooLarge) as raised:
            long_name.dispatch()
        assert "the largest argument" not in str(raised.value)
        assert len(str(raised.value)) < 1000

    def test_pinned_queue(self, endpoint, sqs_client, queue_name, mail):
        """A size that only this queue refuses, pinned below the service's limit, says the same."""
        make_queues(sqs_client(endpoint), queue_name, MaximumMessageSize="2048")
        configure_aws(endpoint, queue_name)
        mail.dispatch(filler(2048))
        text = filler(2049)
        with pytest.raises(taskhawk.MessageTooLarge) as raised:
            mail.dispatch(text)
        assert str(raised.value) == (
            "mail.send: the message has 2049 bytes (body and attributes), and the limit is 2048:"
            f" the largest argument is args[0] with {len(text) + 2} bytes"
        )
        assert raised.value.limit == 2048

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (decimal.Decimal(3), "3"),
            (decimal.Decimal("1E+2"), "100"),
            (decimal.Decimal("2.50"), "2.5"),
            (2**64, "18446744073709551616"),
            ((1, [None, True]), "[1,[null,true]]"),
            ("\ud800\0é", '"\\ud800\\u0000\\u00e9"'),
            ({"a": {"b": 1.5}}, '{"a":{"b":1.5}}'),
        ],
    )
    def test_json(self, sqlite, mail, value, expected):
        """What JSON has is sent, Decimals as numbers, and the body is ASCII."""
        mail.dispatch(value)
        (received,) = receive_all()
        assert f'"args":[{expected}]' in received.body
        assert received.body.isascii()

    @pytest.mark.parametrize(
        ("value", "why"),
        [
            ({1, 2}, "set is not a JSON type"),
            ([b"bytes"], "bytes is not a JSON type"),
            ({"deep": [object()]}, "object is not a JSON type"),
            (Priority.high, "Priority is not a JSON type"),
            ({(1, 2): 3}, "keys must be str, int, float, bool or None, not tuple"),
            (math.nan, "Out of range float values are not JSON compliant"),
            ([math.inf], "Out of range float values are not JSON compliant"),
            (-math.inf, "Out of range float values are not JSON compliant"),
            (
                decimal.Decimal("NaN"),
                "Out of range float values are not JSON compliant",
            ),
            (decimal.Decimal("sNaN"), "cannot convert signaling NaN to float"),
            (decimal.Decimal("Infinity"), "Out of range float values"),
        ],
    )
    @pytest.mark.parametrize("where", ["args[1]", "kwargs.text", "headers.trace"])
    def test_not_json(self, sqlite, mail, value, why, where):
        """What is not JSON fails at the caller, naming the argument or header."""
        args = ["fine", value] if where == "args[1]" else ["fine"]
        kwargs = {"text": value} if where == "kwargs.text" else {}
        headers = {"trace": value} if where == "headers.trace" else {}
        number = isinstance(value, float | decimal.Decimal) or value == [math.inf]
        expected = taskhawk.ValidationError if number else TypeError
        with pytest.raises(expected) as raised:
            mail.with_headers(**headers).dispatch(*args, **kwargs)
        assert type(raised.value) is expected
        # Newer Pythons add the value: "…JSON compliant: nan".
        assert str(raised.value).startswith(f"mail.send: {where} is not JSON: {why}")
        assert sqlite.depth("TASKHAWK-DEFAULT") == Depth(0, 0, 0)

    def test_astronomical(self):
        """A Decimal with a huge exponent fails too, instead of being written out for minutes."""
        code = """
import decimal, taskhawk
taskhawk.configure(TASKHAWK_BROKER="sqlite://")
@taskhawk.task(name="mail.send")
def send(amount): pass
try:
    send.dispatch(decimal.Decimal("1E+99999999"))
except taskhawk.ValidationError as error:
    print(str(error).partition("JSON:")[0])
"""
        assert run_python(code, timeout=30).stdout == "mail.send: args[0] is not \n"

    def test_endless(self, sqlite, mail):
        """What contains itself, or is nested too deeply, fails naming the argument."""
        circle: list[Any] = []
        circle.append(circle)
        deep: list[Any] = []
        for _ in range(200_000):
            deep = [deep]
        for value in (circle, deep):
            with pytest.raises(
                taskhawk.ValidationError, match=r"^mail.send: args\[0\] is not JSON: "
            ):
                mail.dispatch(value)
        while deep:  # or its deallocation is what nests too deeply
            deep = deep.pop()

    def test_delay_sqs(self, scripted, mail):
        """A delay of up to 15 minutes is the queue's DelaySeconds, rounded up."""
        delays = (900, timedelta(minutes=15), 0.2, 59.5, 0)
        for delay in delays:
            mail.with_delay(delay).dispatch()
        with taskhawk.batch():
            for delay in delays:
                mail.with_delay(delay).dispatch()
        (in_batch,) = scripted.asked("SendMessageBatch")
        for sent in (scripted.asked("SendMessage"), in_batch["Entries"]):
            assert [entry.get("DelaySeconds") for entry in sent] == [
                900,
                900,
                1,
                60,
                None,
            ]

    @pytest.mark.parametrize("delay", [900.001, 3600, timedelta(days=1)])
    def test_delay_too_long(self, scripted, mail, delay):
        """A longer delay is refused on SQS before anything is sent."""
        seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            mail.with_delay(delay).dispatch()
        assert str(raised.value) == (
            f"mail.send: the queue can hold a message back for at most 900 s, got {seconds:g} s"
        )
        assert scripted.calls == []

    def test_delay_sns(self, scripted, queue_name, sqs_client, mail):
        """SNS delays nothing: any delay is refused, and none is none."""
        sqs_client(scripted.url, "sns").create_topic(
            Name=f"taskhawk-{queue_name.lower()}"
        )
        configure_aws(scripted.url, queue_name, IS_LAMBDA_APP=True)
        mail.with_delay(0).dispatch()
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            mail.with_delay(1).dispatch()
        assert str(raised.value) == (
            "mail.send: the queue can hold a message back for at most 0 s, got 1 s"
        )

    def test_delay_sqlite(self, tmp_path, mail):
        """SQLite holds a message back for any time, to the millisecond."""
        url = f"sqlite:///{tmp_path}/queue.db"
        taskhawk.configure(TASKHAWK_BROKER=url)
        mail.with_delay(timedelta(days=400)).dispatch("late")
        now = time.time()
        assert taskhawk._brokers.broker().depth("TASKHAWK-DEFAULT") == Depth(0, 0, 1)
        assert received_args() == []
        for days, visible in ((399.999, 0), (400.001, 1)):
            later = taskhawk.SqliteBroker(url, clock=lambda: now + days * 86_400)  # noqa: B023
            assert later.depth("TASKHAWK-DEFAULT").visible == visible
            later.close()

    @pytest.mark.parametrize("delay", [-1, math.nan, math.inf, timedelta(seconds=-1)])
    def test_delay_impossible(self, mail, delay):
        """A delay is 0 or more seconds, and finite."""
        seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
        with pytest.raises(
            ValueError, match=f"^delay: expected 0 or more seconds, got {seconds}$"
        ):
            mail.with_delay(delay)

    @pytest.mark.parametrize(
        ("hook", "expected"),
        [
            (lambda: {"a": "hook", "b": 1}, {"a": "mine", "b": 1}),
            (lambda task: {"name": task.name}, {"name": "mail.send", "a": "mine"}),
            (lambda **kwargs: {"keys": list(kwargs)}, {"keys": ["task"], "a": "mine"}),
            (lambda: None, {"a": "mine"}),
            (lambda: {1: "x"}, {"1": "x", "a": "mine"}),
        ],
    )
    def test_default_headers(self, mail, hook, expected):
        """The default headers are asked for at each dispatch, and give way to with_headers()."""
        taskhawk.configure(TASKHAWK_BROKER="sqlite://", TASKHAWK_DEFAULT_HEADERS=hook)
        mail.with_headers(a="mine").dispatch()
        (received,) = receive_all()
        assert json.loads(received.body)["headers"] == expected

    def test_missing_queue(self, endpoint, queue_name, mail):
        """Where the queue does not exist, the error says so, and what to check."""
        configure_aws(endpoint, queue_name)
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            mail.with_priority(Priority.bulk).dispatch()
        assert str(raised.value) == (
            f"TASKHAWK-{queue_name}-BULK: there is no such queue here: make it, or check"
            " TASKHAWK_QUEUE, AWS_REGION and the account (NonExistentQueue)"
        )

    def test_missing_topic(self, scripted, queue_name, mail):
        """Where the topic does not exist, the error says so, and what to check."""
        configure_aws(scripted.url, queue_name, IS_LAMBDA_APP=True)
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            mail.dispatch()
        assert str(raised.value) == (
            f"arn:aws:sns:us-east-1:000000000000:taskhawk-{queue_name.lower()}: there is no such"
            " topic: make it, or check TASKHAWK_QUEUE and AWS_ACCOUNT_ID (NotFound)"
        )

    @pytest.mark.parametrize(
        ("code", "remedy"),
        [
            ("AccessDenied", DENIED),
            ("AccessDeniedException", DENIED),
            ("AuthorizationError", DENIED),
            ("InvalidClientTokenId", UNKNOWN_KEY),
            ("UnrecognizedClientException", UNKNOWN_KEY),
            (
                "SignatureDoesNotMatch",
                "AWS refuses these credentials: check AWS_SECRET_KEY",
            ),
        ],
    )
    def test_denied(self, scripted, queue_name, mail, code, remedy):
        """What a person must mend is a ConfigurationError with one sentence that says how."""
        sns = code == "AuthorizationError"
        configure_aws(scripted.url, queue_name, IS_LAMBDA_APP=sns)
        where = f"TASKHAWK-{queue_name}"
        if sns:
            where = f"arn:aws:sns:us-east-1:000000000000:taskhawk-{queue_name.lower()}"
        scripted.always("SendMessage", fault(code, status=403))
        scripted.always("Publish", fault(code, status=403))
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            mail.dispatch()
        text = remedy.format("Publish" if sns else "SendMessage")
        assert str(raised.value) == f"{where}: {text} ({code})"
        assert raised.value.__cause__.response["Error"]["Code"] == code

    @pytest.mark.parametrize("missing", NOTHING_CONFIGURED)
    def test_nothing_configured(self, mail, missing):
        """A first dispatch without a region, credentials or a queue says which to set."""
        given = {
            "AWS_ACCESS_KEY": "a",
            "AWS_SECRET_KEY": "b",
            "AWS_REGION": "us-east-1",
        }
        given |= {"TASKHAWK_QUEUE": "x", "AWS_ENDPOINT_SQS": "http://127.0.0.1:1"}
        del given[missing]
        if missing == "AWS_ACCESS_KEY":
            del given["AWS_SECRET_KEY"]
        taskhawk.configure(given)
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            mail.dispatch()
        assert str(raised.value) == NOTHING_CONFIGURED[missing]

    def test_other_errors(self, scripted, mail):
        """An error that no person need mend is raised as botocore raises it."""
        scripted.always("SendMessage", fault("InvalidMessageContents", "odd"))
        with pytest.raises(botocore.exceptions.ClientError) as raised:
            mail.dispatch()
        assert raised.value.response["Error"]["Code"] == "InvalidMessageContents"

    @pytest.mark.parametrize(
        "answer",
        [fault("InternalFailure", status=500), DROPPED],
        ids=["fault", "dropped"],
    )
    def test_retried_by_botocore(self, scripted, mail, answer):
        """A send that the service fails at, or cuts short, is made again within one dispatch."""
        scripted.script("SendMessage", answer)
        mail.dispatch("once")
        assert scripted.actions == ["GetQueueUrl", "SendMessage", "SendMessage"]
        assert received_args() == ["once"]


BATCH_TOO_LONG = fault("AWS.SimpleQueueService.BatchRequestTooLong", "too long")


def too_long(most: int) -> AwsAnswer:
    """Refuse a batch of more than so many messages, as SQS does where their sum is too long."""
    return lambda call: (
        BATCH_TOO_LONG(call) if len(call.data["Entries"]) > most else None
    )


def only_to(queue: str, answer: AwsAnswer) -> AwsAnswer:
    """Give an answer to the requests for one queue alone."""
    return lambda call: (
        answer(call) if call.data["QueueUrl"].endswith(f"/{queue}") else None
    )


class TestBatch:
    """batch() and dispatch_many(): fewer requests, and exactly what was not accepted is raised."""

    def test_ten_to_a_call(self, scripted, mail):
        """Dispatches are collected, and leave ten to a request, in order, when the block ends."""
        with taskhawk.batch():
            ids = [mail.dispatch(number) for number in range(25)]
            assert scripted.actions == []
        assert scripted.actions == ["GetQueueUrl", *["SendMessageBatch"] * 3]
        assert scripted.batches == [10, 10, 5]
        messages = [json.loads(message.body) for message in receive_all()]
        assert sorted(message["args"][0] for message in messages) == list(range(25))
        assert sorted(message["id"] for message in messages) == sorted(ids)

    def test_one_or_none(self, scripted, mail):
        """A block with one dispatch is one request, and a block with none is none."""
        with taskhawk.batch():
            pass
        assert scripted.actions == []
        with taskhawk.batch():
            mail.dispatch()
        assert scripted.actions == ["GetQueueUrl", "SendMessage"]

    def test_total_size(self, endpoint, sqs_client, queue_name, mail):
        """Messages of 300 KB leave three to a request, within 1 MiB, which the service checks."""
        make_queues(sqs_client(endpoint), queue_name)
        configure_aws(endpoint, queue_name)
        with taskhawk.batch():
            for number in range(7):
                mail.dispatch(number, "x" * 300_000)
        assert sorted(received_args()) == list(range(7))

    def test_total_size_counted(self, scripted, mail):
        """A request is filled to the last byte of 1 MiB, attributes included, and no further."""
        half, header = 524_288, {"trace": "é"}
        invocation = mail.with_headers(**header)
        with taskhawk.batch():
            for size in (half, half, half, half + 1, half, half):
                invocation.dispatch(filler(size, **header))
        assert scripted.batches == [2, 1, 1, 2]

    def test_priorities_and_tasks(self, scripted, mail):
        """One block takes all tasks and priorities; each queue gets its own requests."""

        @taskhawk.task(name="mail.other", priority=Priority.high)
        def other(number):
            """Do nothing."""

        with taskhawk.batch():
            for number in range(8):
                mail.dispatch(number)
                other.with_headers(n=str(number)).dispatch(number)
        assert scripted.actions == ["GetQueueUrl", "SendMessageBatch"] * 2
        assert scripted.batches == [8, 8]
        assert (
            sorted(received_args())
            == sorted(received_args(Priority.high))
            == list(range(8))
        )

    def test_sns(self, scripted, queue_name, sqs_client, mail):
        """Over SNS, PublishBatch sends ten, and less where the sum would be above 256 KiB."""
        sns, sqs = sqs_client(scripted.url, "sns"), sqs_client(scripted.url)
        arn = sns.create_topic(Name=f"taskhawk-{queue_name.lower()}")["TopicArn"]
        url = sqs.create_queue(QueueName=f"{queue_name}-SNS")["QueueUrl"]
        endpoint = f"arn:aws:sqs:us-east-1:000000000000:{queue_name}-SNS"
        raw = {"RawMessageDelivery": "true"}
        sns.subscribe(TopicArn=arn, Protocol="sqs", Endpoint=endpoint, Attributes=raw)
        configure_aws(scripted.url, queue_name, IS_LAMBDA_APP=True)
        scripted.calls.clear()
        with taskhawk.batch():
            for number in range(12):
                mail.with_headers(n=str(number)).dispatch(number)
            for number in (12, 13):
                mail.dispatch(number, "x" * 250_000)
        assert scripted.actions == ["PublishBatch", "PublishBatch", "Publish"]
        assert scripted.batches == [10, 3, 1]
        polls = iter(
            lambda: sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get(
                "Messages"
            ),
            None,
        )
        numbers = [
            json.loads(message["Body"])["args"][0] for poll in polls for message in poll
        ]
        assert sorted(numbers) == list(range(14))

    def test_sns_fails(self, scripted, queue_name, mail):
        """What SNS refuses as a whole is raised, ready to be published again."""
        configure_aws(scripted.url, queue_name, IS_LAMBDA_APP=True)
        with pytest.raises(taskhawk.PartialFailure) as raised, taskhawk.batch():
            ids = [mail.dispatch(number) for number in range(3)]
        assert [message.id for message in raised.value.unsent] == ids
        assert str(raised.value) == "3 of 3 messages failed: NotFound"

    def test_nested(self, scripted, mail):
        """A block inside another joins it: all is sent when the outer one ends."""
        with taskhawk.batch():
            mail.dispatch(0)
            with taskhawk.batch():
                mail.dispatch(1)
            assert scripted.actions == []
            mail.dispatch(2)
        assert scripted.batches == [3]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_exception(self, scripted, mail, error):
        """An exception inside sends nothing; what is dispatched afterwards is sent at once."""

        def fail() -> None:
            with taskhawk.batch():
                mail.dispatch(0)
                with taskhawk.batch():
                    mail.dispatch(1)
                raise error

        with pytest.raises(error):
            fail()
        assert scripted.actions == []
        mail.dispatch(2)
        assert scripted.batches == [1]
        assert received_args() == [2]

    def test_wrong_dispatch(self, sqlite, mail):
        """What can't be sent raises where it is dispatched, and the block can go on."""
        with taskhawk.batch():
            mail.dispatch(0)
            with pytest.raises(TypeError):
                mail.dispatch({1})
            with pytest.raises(taskhawk.MessageTooLarge):
                mail.dispatch("x" * 1_048_576)
        assert received_args() == [0]

    def test_thread(self, sqlite, mail):
        """A thread started inside has no part in the block: it sends directly."""
        with taskhawk.batch():
            mail.dispatch("block")
            thread = threading.Thread(target=mail.dispatch, args=("thread",))
            thread.start()
            thread.join()
            assert received_args() == ["thread"]
        assert received_args() == ["block"]

    def test_thread_with_context(self, sqlite, mail):
        """A thread that runs in a copy of the context joins the block, but sends after its end."""
        ended = threading.Event()

        def work() -> None:
            mail.dispatch("inside")
            joined.set()
            ended.wait(10)
            with taskhawk.batch():  # of its own, now
                mail.dispatch("after")
                mail.dispatch("after too")
                late.append(received_args())
            mail.dispatch("at last")

        joined, late = threading.Event(), []
        with taskhawk.batch():
            thread = threading.Thread(
                target=contextvars.copy_context().run, args=(work,)
            )
            thread.start()
            assert joined.wait(10)
            assert received_args() == []
        assert received_args() == ["inside"]
        ended.set()
        thread.join()
        assert late == [[]]
        assert received_args() == ["after", "after too", "at last"]

    def test_race(self, sqlite, mail):
        """While a block ends, what threads in its context dispatch is sent, and once."""
        busy = threading.Barrier(5)

        def work(first: int) -> None:
            for number in range(first, first + 100):
                mail.dispatch(number)
                if number == first + 20:
                    busy.wait(10)

        with taskhawk.batch():
            threads = [
                threading.Thread(
                    target=contextvars.copy_context().run, args=(work, first)
                )
                for first in (0, 100, 200, 300)
            ]
            for thread in threads:
                thread.start()
            busy.wait(10)
        for thread in threads:
            thread.join()
        assert sorted(received_args()) == list(range(400))

    def test_asyncio(self, sqlite, mail):
        """Tasks of an event loop join the block they were made in, and send after its end."""

        async def dispatch(number: int, when: asyncio.Event) -> None:
            await when.wait()
            mail.dispatch(number)

        async def main() -> None:
            now, later = asyncio.Event(), asyncio.Event()
            now.set()
            async with asyncio.TaskGroup() as group:
                with taskhawk.batch():
                    await asyncio.gather(
                        *(dispatch(number, now) for number in range(3))
                    )
                    group.create_task(dispatch(3, later))
                    assert received_args() == []
                assert received_args() == [0, 1, 2]
                outside = group.create_task(dispatch(4, now))
                await outside
                assert received_args() == [4]
                later.set()
            assert received_args() == [3]

        asyncio.run(main())

    def test_refused_for_now(self, scripted, mail):
        """What the service refuses by its own fault is sent again, alone, and nobody is told."""
        scripted.script("SendMessageBatch", refuse(1, 3), refuse(1))
        with taskhawk.batch():
            for number in range(4):
                mail.dispatch(number)
        assert scripted.batches == [4, 2, 1]
        assert sorted(received_args()) == [0, 1, 2, 3]

    def test_refused_for_good(self, scripted, mail):
        """What is refused by its own fault is raised at once, and alone: the rest was sent."""
        scripted.script(
            "SendMessageBatch", passed, refuse(1, 9, code="Bad", ours=True), passed
        )
        with pytest.raises(taskhawk.PartialFailure) as raised, taskhawk.batch():
            ids = [mail.dispatch(number) for number in range(25)]
        assert scripted.batches == [10, 10, 5]
        error = raised.value
        assert str(error) == "2 of 25 messages failed: Bad"
        assert (error.success_count, error.failure_count) == (23, 2)
        assert error.result["Failed"] == [
            {"Id": ids[11], "Code": "Bad", "Message": "no"},
            {"Id": ids[19], "Code": "Bad", "Message": "no"},
        ]
        assert error.result["Successful"] == [
            {"Id": sent} for number, sent in enumerate(ids) if number not in (11, 19)
        ]
        assert [message.args for message in error.unsent] == [[11], [19]]

    def test_unsent_as_dispatched(self, scripted, mail):
        """What is unsent is what was dispatched, though the caller has changed it meanwhile."""
        scripted.always(
            "SendMessageBatch",
            refuse(0, 1, 2, code="InvalidMessageContents", ours=True),
        )
        row: dict[str, int] = {}
        calls = (row.update(number=number) or (row,) for number in range(3))
        with pytest.raises(taskhawk.PartialFailure) as raised:
            mail.dispatch_many(calls)
        rows = [message.args for message in raised.value.unsent]
        assert rows == [[{"number": 0}], [{"number": 1}], [{"number": 2}]]

    def test_unsent(self, scripted, mail):
        """After three attempts it is raised too; to publish what is unsent delivers each once."""
        scripted.script("SendMessageBatch", refuse(2, 5), refuse(0, 1), refuse(0, 1))
        high = mail.with_priority(Priority.high)
        calls = [
            (task.with_headers(n=str(n)), n) for n in range(10) for task in (mail, high)
        ]
        with pytest.raises(taskhawk.PartialFailure) as raised, taskhawk.batch():
            [invocation.dispatch(number) for invocation, number in calls]
        assert scripted.batches == [10, 2, 2, 10]
        assert str(raised.value) == "2 of 20 messages failed: InternalError"
        with taskhawk.batch():
            for message in raised.value.unsent:
                taskhawk.publish(message)
        found = {m.message_attributes["n"]["StringValue"]: m for m in receive_all()}
        assert sorted(map(int, found)) == list(range(10))
        assert all(json.loads(m.body)["args"] == [int(n)] for n, m in found.items())

    def test_unsent_keeps(self, scripted, mail):
        """An unsent message keeps its priority and its delay."""
        scripted.always("SendMessageBatch", refuse(0, ours=True))
        with pytest.raises(taskhawk.PartialFailure) as raised, taskhawk.batch():
            [
                mail.with_priority(Priority.high).with_delay(7).dispatch()
                for _ in range(2)
            ]
        taskhawk.publish(raised.value.unsent[0])
        (sent,) = scripted.asked("SendMessage")
        assert sent["DelaySeconds"] == 7
        assert sent["QueueUrl"].endswith("-HIGH-PRIORITY")

    def test_unanswered(self, scripted, mail):
        """A message that the answer does not name is not taken for sent."""

        def silent(call: AwsCall) -> AwsAnswer:
            return {"Successful": call.forward()["Successful"][:1]}

        scripted.script("SendMessageBatch", *[silent] * 3)
        with pytest.raises(taskhawk.PartialFailure) as raised, taskhawk.batch():
            [mail.dispatch(number) for number in range(4)]
        assert scripted.batches == [4, 3, 2]
        assert str(raised.value) == "1 of 4 messages failed: Unanswered"
        assert [message.args for message in raised.value.unsent] == [[3]]

    def test_whole_call_fails(self, scripted, mail, queue_name):
        """Where a request fails, the rest for that queue is unsent; other queues go on."""
        high = mail.with_priority(Priority.high)
        scripted.script(
            "SendMessageBatch",
            passed,
            fault("AccessDenied", status=403),
            only_to(f"TASKHAWK-{queue_name}", fault("AccessDenied", status=403)),
        )
        with pytest.raises(taskhawk.PartialFailure) as raised, taskhawk.batch():
            [mail.dispatch(number) for number in range(25)] + [
                high.dispatch(n) for n in (0, 1)
            ]
        assert str(raised.value) == "15 of 27 messages failed: AccessDenied"
        assert [message.args for message in raised.value.unsent] == [
            [n] for n in range(10, 25)
        ]
        assert raised.value.result["Failed"][0]["Message"] == (
            f"TASKHAWK-{queue_name}: access denied: the IAM policy of these credentials does not"
            " allow SendMessage (AccessDenied)"
        )
        assert sorted(received_args()) == list(range(10))
        assert sorted(received_args(Priority.high)) == [0, 1]

    def test_other_failures(self, scripted, mail):
        """A failure that no sentence explains is told as the service tells it."""
        scripted.always("SendMessageBatch", fault("Odd", "because"))
        with pytest.raises(taskhawk.PartialFailure) as raised, taskhawk.batch():
            ids = [mail.dispatch() for _ in range(2)]
        why = "An error occurred (Odd) when calling the SendMessageBatch operation: because"
        assert raised.value.result == {
            "Successful": [],
            "Failed": [{"Id": sent, "Code": "Odd", "Message": why} for sent in ids],
        }

    def test_second_attempt_fails(self, scripted, mail):
        """Where the second attempt fails as a whole, what the first one sent is not unsent."""
        scripted.script("SendMessageBatch", refuse(1))
        scripted.script("SendMessage", fault("AccessDenied", status=403))
        with pytest.raises(taskhawk.PartialFailure) as raised, taskhawk.batch():
            [mail.dispatch(number) for number in range(3)]
        assert [message.args for message in raised.value.unsent] == [[1]]
        assert str(raised.value) == "1 of 3 messages failed: AccessDenied"
        taskhawk.publish(raised.value.unsent[0])
        assert sorted(received_args()) == [0, 1, 2]

    def test_second_attempt_works(self, scripted, mail):
        """A second attempt that fails as a whole is followed by a third."""
        scripted.script("SendMessageBatch", refuse(1, 2), fault("KmsThrottled"))
        with taskhawk.batch():
            for number in range(4):
                mail.dispatch(number)
        assert sorted(received_args()) == [0, 1, 2, 3]

    def test_sum_too_long(self, scripted, mail):
        """Where the queue finds the sum too long, the messages are sent one by one."""
        scripted.always("SendMessageBatch", too_long(1))
        scripted.script("SendMessage", passed, fault("AccessDenied"), passed, passed)
        with pytest.raises(taskhawk.PartialFailure) as raised, taskhawk.batch():
            [mail.dispatch(number) for number in range(4)]
        assert [message.args for message in raised.value.unsent] == [[1]]
        assert sorted(received_args()) == [0, 2, 3]

    def test_one_too_long(self, scripted, mail):
        """A message that is too long for its queue alone is unsent alone."""

        def pinned(call: AwsCall) -> AwsAnswer:
            entries = call.data.get("Entries", [call.data])
            size = sum(len(entry["MessageBody"]) for entry in entries)
            return BATCH_TOO_LONG(call) if size > 262_144 else None

        scripted.always("SendMessageBatch", pinned)
        scripted.always("SendMessage", pinned)
        with pytest.raises(taskhawk.PartialFailure) as raised, taskhawk.batch():
            [
                mail.dispatch(number, "x" * (300_000 if number == 2 else 100_000))
                for number in range(5)
            ]
        assert [message.args[0] for message in raised.value.unsent] == [2]
        assert sorted(received_args()) == [0, 1, 3, 4]

    def test_pinned_queue(self, ministack, sqs_client, queue_name, mail):
        """In a batch, a message that is too large for its queue is the only one refused."""
        make_queues(sqs_client(ministack), queue_name, MaximumMessageSize="2048")
        configure_aws(ministack, queue_name)
        with pytest.raises(taskhawk.PartialFailure) as raised, taskhawk.batch():
            [mail.dispatch(text) for text in ("small", filler(2049))]
        assert raised.value.result["Failed"][0]["Message"] == (
            "One or more parameters are invalid. Reason: Message must be shorter than 2048 bytes."
        )
        assert received_args() == ["small"]

    def test_missing_queue(self, ministack, queue_name, mail):
        """Where the queue is missing, all is unsent, and each entry says what to check."""
        configure_aws(ministack, queue_name)
        with pytest.raises(taskhawk.PartialFailure) as raised, taskhawk.batch():
            mail.dispatch()
        assert str(raised.value) == "1 of 1 messages failed: NonExistentQueue"
        assert raised.value.result["Failed"][0]["Message"] == (
            f"TASKHAWK-{queue_name}: there is no such queue here: make it, or check"
            " TASKHAWK_QUEUE, AWS_REGION and the account (NonExistentQueue)"
        )

    def test_sync(self):
        """In sync mode, the tasks run when the block ends, in order, and nothing is queued."""
        ran = []

        @taskhawk.task(name="sync.note")
        def note(number):
            ran.append(number)
            if number == 1:
                note.dispatch(10)  # no block is open any more

        taskhawk.configure(TASKHAWK_SYNC=True)
        with taskhawk.batch():
            for number in range(3):
                note.dispatch(number)
            assert ran == []
        assert ran == [0, 1, 10, 2]

    def test_sync_fails(self):
        """In sync mode, a task's exception comes out of the block."""

        @taskhawk.task(name="sync.fail")
        def fail():
            raise ZeroDivisionError

        taskhawk.configure(TASKHAWK_SYNC=True)
        with pytest.raises(ZeroDivisionError), taskhawk.batch():
            fail.dispatch()

    def test_dispatch_many(self, sqlite, mail):
        """A tuple is a call's arguments, a dict its keyword arguments, all else its only one."""
        calls = [(), (1,), ("a", "b"), {}, {"text": "c"}, [1, 2], "text", None, 5]
        assert mail.dispatch_many(calls) == 9
        messages = [json.loads(message.body) for message in receive_all()]
        assert [(message["args"], message["kwargs"]) for message in messages] == [
            ([], {}),
            ([1], {}),
            (["a", "b"], {}),
            ([], {}),
            ([], {"text": "c"}),
            ([[1, 2]], {}),
            (["text"], {}),
            ([None], {}),
            ([5], {}),
        ]
        assert len({message["id"] for message in messages}) == 9

    def test_dispatch_many_options(self, scripted, mail):
        """An invocation's headers, priority and delay are those of each message."""
        invocation = mail.with_priority(Priority.high).with_headers(a="b").with_delay(5)
        assert invocation.dispatch_many(range(12)) == 12
        assert scripted.batches == [10, 2]
        for request in scripted.asked("SendMessageBatch"):
            assert request["QueueUrl"].endswith("-HIGH-PRIORITY")
            for entry in request["Entries"]:
                assert entry["DelaySeconds"] == 5
                assert json.loads(entry["MessageBody"])["headers"] == {"a": "b"}

    def test_dispatch_many_of_none(self, scripted, mail):
        """Of nothing, nothing is sent."""
        assert mail.dispatch_many([]) == 0
        assert scripted.actions == []

    def test_dispatch_many_is_lazy(self, sqlite, mail):
        """No more than ten messages wait in memory: the rest is sent, or not yet read."""

        def numbers() -> Iterator[int]:
            for number in range(95):
                assert sqlite.depth("TASKHAWK-DEFAULT").visible == number // 10 * 10
                yield number

        assert mail.dispatch_many(numbers()) == 95
        assert received_args() == list(range(95))

    @pytest.mark.parametrize("bad", [{1}, ZeroDivisionError])
    def test_dispatch_many_stops(self, sqlite, mail, bad):
        """An iterable that fails, or has what can't be sent, ends it; full tens are sent before."""

        def numbers() -> Iterator[Any]:
            yield from range(13)
            if bad is ZeroDivisionError:
                raise bad
            yield bad
            pytest.fail("read on")

        with pytest.raises(bad if bad is ZeroDivisionError else TypeError):
            mail.dispatch_many(numbers())
        assert received_args() == list(range(10))

    def test_dispatch_many_hook_fails(self, sqlite, mail):
        """A hook that has no headers left is not the end of the calls."""
        hook = iter([{}] * 13).__next__
        taskhawk.configure(
            TASKHAWK_BROKER="sqlite://", TASKHAWK_DEFAULT_HEADERS=lambda **_: hook()
        )
        with pytest.raises(RuntimeError) as caught:
            mail.dispatch_many(range(20))
        assert isinstance(caught.value.__cause__, StopIteration)
        assert received_args() == list(range(10))

    def test_dispatch_many_snapshot(self, sqlite, mail):
        """A call is encoded when it is read: what its object becomes later has no part."""

        def rows() -> Iterator[Any]:
            row = []
            for number in range(3):
                row.append(number)
                yield row

        mail.dispatch_many(rows())
        assert received_args() == [[0], [0, 1], [0, 1, 2]]

    def test_dispatch_many_refused(self, scripted, mail):
        """What is not accepted ends it too, and says exactly what it was."""
        numbers = iter(range(35))
        scripted.script("SendMessageBatch", passed, refuse(4, ours=True))
        with pytest.raises(taskhawk.PartialFailure) as raised:
            mail.dispatch_many(numbers)
        assert [message.args for message in raised.value.unsent] == [[14]]
        assert next(numbers) == 20
        assert sorted(received_args()) == [n for n in range(20) if n != 14]

    def test_dispatch_many_sync(self):
        """In sync mode, each call runs."""
        ran = []

        @taskhawk.task(name="sync.many")
        def note(number):
            ran.append(number)

        taskhawk.configure(TASKHAWK_SYNC=True)
        assert note.dispatch_many(range(12)) == 12
        assert ran == list(range(12))


class TestCapture:
    """capture() collects what would be sent, with arguments as the worker would get them."""

    def test_collects(self):
        """Each dispatch is there, in order, whatever way it takes; nothing has to be configured."""

        @taskhawk.task(name="mail.send")
        def send(to, at=None):
            pytest.fail("ran")

        with taskhawk.capture() as calls:
            invocation = (
                send.with_headers(a="1").with_priority(Priority.high).with_delay(60)
            )
            message_id = invocation.dispatch("x", at=decimal.Decimal("1.5"))
            with taskhawk.batch():
                send.dispatch("y")
            send.dispatch_many(["z"])
        assert calls[0] == taskhawk.Captured(
            "mail.send", ["x"], {"at": 1.5}, {"a": "1"}, Priority.high, 60, message_id
        )
        assert [call.args for call in calls] == [["x"], ["y"], ["z"]]

    def test_refuses(self, mail):
        """What can't be sent raises as it does for real, and is not there."""
        with taskhawk.capture() as calls:
            with pytest.raises(
                TypeError, match=r"mail\.send: too many positional arguments"
            ):
                mail.dispatch(1, 2, 3)
            with pytest.raises(taskhawk.ValidationError):
                mail.dispatch(math.nan)
            with pytest.raises(taskhawk.MessageTooLarge):
                mail.dispatch("x" * 1_048_576)
            with pytest.raises(taskhawk.ConfigurationError):
                mail.with_delay(901).dispatch()
        assert calls == []

    def test_threads(self, mail):
        """What other threads of the process dispatch is there too."""
        with taskhawk.capture() as calls:
            thread = threading.Thread(target=mail.dispatch, args=(1,))
            thread.start()
            thread.join()
        assert [call.args for call in calls] == [[1]]

    def test_ends(self, sqlite, mail):
        """The inner of two has its own; after the end, also by an error, messages are sent."""
        with contextlib.suppress(ZeroDivisionError), taskhawk.capture() as outer:
            with taskhawk.capture() as inner:
                mail.dispatch("inner")
            mail.dispatch("outer")
            raise ZeroDivisionError
        assert ([call.args for call in inner], [call.args for call in outer]) == (
            [["inner"]],
            [["outer"]],
        )
        mail.dispatch("sent")
        assert received_args() == ["sent"]

    def test_sync(self, mail):
        """It goes before sync mode: nothing runs."""
        taskhawk.configure(TASKHAWK_SYNC=True)
        with taskhawk.capture() as calls, taskhawk.batch():
            mail.dispatch("x")
        assert [call.args for call in calls] == [["x"]]


# === PART IV: WORK ====================================================================

Fate, Outcome = taskhawk.Fate, taskhawk.Outcome  # no name of a later part stands above


# --- 12. processing -------------------------------------------------------------------


def processing_run(fn: Callable[..., Any], attempt: int = 1, **options: Any) -> Outcome:
    """Register a function as the task mail.send, and process one message for it."""
    taskhawk._registry.pop("mail.send", None)
    taskhawk.task(name="mail.send", **options)(fn)
    attributes = {"ApproximateReceiveCount": str(attempt)}
    return taskhawk.process(
        QueueMessage(processing_body(), "m1", attributes=attributes, queue="Q")
    )


def nothing() -> None:
    """Be a task that does nothing."""


@contextlib.contextmanager
def processing_log() -> Iterator[io.StringIO]:
    """Yield what a log file would hold at DEBUG, tracebacks included."""
    logger = logging.getLogger("taskhawk")
    handler = logging.StreamHandler(io.StringIO())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield handler.stream
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


# What the log says of a message's end, and the outcome that it stands for.
PROCESSING_ENDS = {
    "is left to the queue": (Fate.retry, None),
    "runs again in 5 s": (Fate.retry, 5),
    "is given up": (Fate.dead_letter, None),
}
PROCESSING_LEFT, PROCESSING_AGAIN, PROCESSING_DEAD = PROCESSING_ENDS
PROCESSING_FIVE = {"retry": taskhawk.fixed(5, 2, jitter=False)}

# What a task raises, its options, and the attempt that it is.
PROCESSING_FAILURES: dict[str, tuple[BaseException, Mapping[str, Any], int, str]] = {
    "an exception": (ValueError("no"), {}, 1, PROCESSING_LEFT),
    "SystemExit": (SystemExit(3), {}, 1, PROCESSING_LEFT),
    "GeneratorExit": (GeneratorExit(), {}, 1, PROCESSING_LEFT),
    "CancelledError": (asyncio.CancelledError(), {}, 1, PROCESSING_LEFT),
    "a group": (ExceptionGroup("two", [KeyError(), OSError()]), {}, 1, PROCESSING_LEFT),
    "its own TaskNotFound": (taskhawk.TaskNotFound("other"), {}, 1, PROCESSING_LEFT),
    "an exception, policy": (ValueError("no"), PROCESSING_FIVE, 2, PROCESSING_AGAIN),
    "SystemExit, policy": (SystemExit(), PROCESSING_FIVE, 1, PROCESSING_AGAIN),
    "retries used up": (ValueError("no"), PROCESSING_FIVE, 3, PROCESSING_DEAD),
    "no retries": (
        ValueError("no"),
        {"retry": taskhawk.linear(1, 1, 0)},
        1,
        PROCESSING_DEAD,
    ),
    "RetryException, used up": (
        taskhawk.RetryException(),
        PROCESSING_FIVE,
        3,
        PROCESSING_DEAD,
    ),
    "StopRetry": (taskhawk.StopRetry("enough"), PROCESSING_FIVE, 1, PROCESSING_DEAD),
    "StopRetry, no policy": (taskhawk.StopRetry("enough"), {}, 1, PROCESSING_DEAD),
    "StopRetry of the policy": (
        ValueError("no"),
        {"retry": raising(taskhawk.StopRetry())},
        1,
        PROCESSING_DEAD,
    ),
    "in never_retry_on": (
        FileNotFoundError("no"),
        {**PROCESSING_FIVE, "never_retry_on": (OSError, ValueError)},
        1,
        PROCESSING_DEAD,
    ),
    "not in never_retry_on": (
        KeyError("no"),
        {**PROCESSING_FIVE, "never_retry_on": (OSError, ValueError)},
        1,
        PROCESSING_AGAIN,
    ),
    "in retry_on": (
        FileNotFoundError("no"),
        {**PROCESSING_FIVE, "retry_on": (OSError,)},
        1,
        PROCESSING_AGAIN,
    ),
    "not in retry_on": (
        ValueError("no"),
        {**PROCESSING_FIVE, "retry_on": (OSError,)},
        1,
        PROCESSING_DEAD,
    ),
    "in both, no policy": (
        FileNotFoundError("no"),
        {"retry_on": (OSError,), "never_retry_on": (FileNotFoundError,)},
        1,
        PROCESSING_DEAD,
    ),
}
PROCESSING_RETRIES: dict[
    str, tuple[BaseException, Mapping[str, Any], float | None, str]
] = {
    "no delay": (taskhawk.RetryException("later"), {}, None, "is left to the queue"),
    "a delay": (
        taskhawk.RetryException(delay_seconds=90),
        {},
        90,
        "runs again in 90 s",
    ),
    "at once": (taskhawk.RetryException(delay_seconds=0), {}, 0, "runs again in 0 s"),
    "4.7's delay": (
        taskhawk.RetryException(7.5, "busy"),
        {},
        7.5,
        "runs again in 7.5 s",
    ),
    "a bool is text": (taskhawk.RetryException(True), {}, None, "is left to the queue"),
    "the policy's delay": (
        taskhawk.RetryException(),
        PROCESSING_FIVE,
        5,
        "runs again in 5 s",
    ),
    "its own before the policy's": (
        taskhawk.RetryException(delay_seconds=1),
        {"retry": taskhawk.fixed(60, 0)},
        1,
        "runs again in 1 s",
    ),
    "whatever the options": (
        taskhawk.RetryException(),
        {"retry_on": (OSError,), "never_retry_on": (taskhawk.RetryException,)},
        None,
        "is left to the queue",
    ),
}

# In an interpreter of its own: the limit of these records is the process's, and goes by a clock.
PROCESSING_CHILD = """
import json, logging, pathlib, sys, time
now = 0.0
time.monotonic = lambda: now
import taskhawk
class Keep(logging.Handler):
    def emit(self, record):
        seen.append([record.levelname, record.getMessage(), record.exc_info])
logging.getLogger("taskhawk").addHandler(Keep())
taskhawk.configure(TASKHAWK_ERROR_HOOK=lambda exception, message: seen.append([
    "hook", type(exception).__name__, message]))
for now, body in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    seen = []
    outcome = taskhawk.process(taskhawk.QueueMessage(body, "m1"))
    print(json.dumps([outcome.fate.name, outcome.delay_s, *seen]))
"""
PROCESSING_DJANGO = """
import sys
import django
from django.conf import settings
settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "app.db"}},
    TASKHAWK_MAX_DB_REUSE_LOOPS=2,
)
django.setup()
from django.db import connection, transaction
import taskhawk

def mail_send():
    connection.ensure_connection()

def is_open_after_a_run():
    outcome = taskhawk.process(taskhawk.QueueMessage(sys.argv[1], "m1"))
    assert outcome == taskhawk.Outcome(taskhawk.Fate.acknowledge), outcome
    return connection.connection is not None

taskhawk.task(name="mail.send")(mail_send)
"""


class TestProcessing:
    """process() decides what becomes of a message, and nothing but KeyboardInterrupt leaves it."""

    def child(self, tmp_path: Path, steps: Sequence[tuple[float, Any]]) -> list[Any]:
        """Process bodies at given times in a new interpreter; return the outcomes and records."""
        (tmp_path / "steps.json").write_text(json.dumps(steps))
        done = run_python(["-c", PROCESSING_CHILD, str(tmp_path / "steps.json")])
        assert (done.stderr, done.returncode) == ("", 0)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def test_returned(self, caplog):
        """A run that returns is done with; the body is in the log at DEBUG alone, as an extra."""
        caplog.set_level(logging.DEBUG, "taskhawk")
        assert processing_run(nothing) == Outcome(Fate.acknowledge)
        assert caplog.record_tuples == [
            ("taskhawk", logging.DEBUG, "Received message"),
            ("taskhawk", logging.DEBUG, f"mail.send {PROCESSING_ID}: done"),
        ]
        assert caplog.records[0].message_body == processing_body()

    def test_ignored(self, caplog):
        """IgnoreException means that there was nothing to do: the message is done with."""
        caplog.set_level(logging.INFO, "taskhawk")
        assert processing_run(raising(taskhawk.IgnoreException())) == Outcome(
            Fate.acknowledge
        )
        assert caplog.record_tuples == [
            ("taskhawk", logging.INFO, f"mail.send {PROCESSING_ID}: ignored")
        ]

    @pytest.mark.parametrize("case", PROCESSING_RETRIES)
    def test_asked_to_be_retried(self, case, caplog):
        """RetryException runs the message again: at its own delay, the policy's or the queue's."""
        error, options, delay_s, then = PROCESSING_RETRIES[case]
        caplog.set_level(logging.INFO, "taskhawk")
        assert processing_run(raising(error), **options) == Outcome(
            Fate.retry, error, delay_s
        )
        text = f"mail.send {PROCESSING_ID}: attempt 1 asked to be retried and {then}"
        assert caplog.record_tuples == [("taskhawk", logging.INFO, text)]
        assert not caplog.records[0].exc_info

    @pytest.mark.parametrize("case", PROCESSING_FAILURES)
    def test_failed(self, case, caplog):
        """A failure is for the policy, the queue or the dead letters; its traceback is logged."""
        error, options, attempt, then = PROCESSING_FAILURES[case]
        caplog.set_level(logging.INFO, "taskhawk")
        fate, delay_s = PROCESSING_ENDS[then]
        assert processing_run(raising(error), attempt, **options) == Outcome(
            fate, error, delay_s
        )
        text = f"mail.send {PROCESSING_ID}: attempt {attempt} failed and {then}"
        assert caplog.record_tuples == [("taskhawk", logging.ERROR, text)]
        assert caplog.records[0].exc_info[1] is error

    def test_coroutine_failed(self):
        """An `async def` task ends as any other: cancelled is failed."""
        error = asyncio.CancelledError()

        async def waits() -> None:
            raise error

        outcome = processing_run(waits, **PROCESSING_FIVE)
        assert (outcome.fate, type(outcome.error), outcome.delay_s) == (
            Fate.retry,
            type(error),
            5,
        )

    def test_keyboard_interrupt(self, caplog):
        """KeyboardInterrupt is the user's, and goes on; the message is neither done nor failed."""
        caplog.set_level(logging.INFO, "taskhawk")
        with pytest.raises(KeyboardInterrupt):
            processing_run(raising(KeyboardInterrupt()))
        assert caplog.records == []

    @pytest.mark.parametrize(
        ("extra", "found"),
        [
            ({"order": 7}, {"order": 7}),
            (
                {
                    "message": 1,
                    "asctime": 2,
                    "name": 3,
                    "args": 4,
                    "levelname": 5,
                    "exc_info": 6,
                },
                {
                    "extra_message": 1,
                    "extra_asctime": 2,
                    "extra_name": 3,
                    "extra_args": 4,
                }
                | {"extra_levelname": 5, "extra_exc_info": 6, "name": "taskhawk"},
            ),
            ({7: "seven", "order": None}, {"7": "seven", "order": None}),
            (None, {}),
            (["order", 7], {}),
        ],
        ids=["fields", "reserved names", "odd names", "none", "no mapping"],
    )
    @pytest.mark.parametrize("options", [{}, PROCESSING_FIVE, {"retry_on": (OSError,)}])
    def test_logging_exception(self, extra, found, options, caplog):
        """LoggingException says what is logged of a failure, and which fields the record has."""
        error = taskhawk.LoggingException("100 % of the mail is lost", extra=extra)
        outcome = processing_run(raising(error), **options)
        assert outcome.error is error
        assert caplog.record_tuples == [
            ("taskhawk", logging.ERROR, "100 % of the mail is lost")
        ]
        assert caplog.records[0].exc_info[1] is error
        assert {name: getattr(caplog.records[0], name) for name in found} == found

    @pytest.mark.parametrize("delay_s", [-1, math.nan, math.inf, -math.inf])
    def test_impossible_delay_of_the_task(self, delay_s):
        """A delay that is negative or not finite is a failed run; a sentence says so."""

        def asks() -> None:
            raise taskhawk.RetryException(delay_seconds=delay_s)

        outcome = processing_run(asks)
        assert (outcome.fate, outcome.delay_s) == (Fate.retry, None)
        assert repr(outcome.error) == repr(
            ValueError(f"delay_seconds: expected 0 or more seconds, got {delay_s}")
        )

    @pytest.mark.parametrize("huge", [10**400, 1e300], ids=["int", "float"])
    def test_huge_delay(self, huge):
        """A delay beyond all floats is a delay: whatever applies it clamps it."""

        def asks() -> None:
            raise taskhawk.RetryException(delay_seconds=huge)

        assert processing_run(asks).fate is Fate.retry
        assert (
            processing_run(raising(KeyError()), retry=lambda _: huge).fate is Fate.retry
        )

    @pytest.mark.parametrize(
        "base", [taskhawk.RetryException, taskhawk.LoggingException]
    )
    def test_exceptions_of_their_own_making(self, base):
        """A subclass whose __init__ does not call ours ends its run as its base does."""

        class Own(base):
            def __init__(self) -> None:
                """Leave the base's out, as 1.4 allowed."""

        error = Own()
        assert processing_run(raising(error)) == Outcome(Fate.retry, error)

    @pytest.mark.parametrize("delay_s", [-1, math.nan, math.inf, "5", True])
    def test_impossible_delay_of_their_own_making(self, delay_s):
        """A delay that is none, from a subclass that does not check it, counts as not given."""

        class Own(taskhawk.RetryException):
            def __init__(self) -> None:
                self.delay_seconds = delay_s

        error = Own()
        assert processing_run(raising(error)) == Outcome(Fate.retry, error)

    @pytest.mark.parametrize(
        "base", [taskhawk.LoggingException, taskhawk.ValidationError]
    )
    def test_exception_without_text(self, base):
        """An exception whose text can't be had is a failed run like any other, of a hook too."""

        class Mute(base):
            def __str__(self) -> str:
                raise ValueError("mute")

        assert processing_run(raising(Mute("x"))).fate is Fate.retry
        taskhawk.configure(TASKHAWK_PRE_PROCESS_HOOK=raising(Mute("x")))
        assert run_body(json.dumps(VALID)).fate is Fate.retry

    @pytest.mark.parametrize("delay_s", [-1, math.nan, math.inf, "5", None, True, (5,)])
    def test_impossible_delay_of_the_policy(self, delay_s, caplog):
        """A policy's delay that is none is a ConfigurationError; the queue's timeout applies."""
        error = KeyError("no")
        outcome = processing_run(raising(error), retry=lambda _attempt: delay_s)
        assert (outcome.fate, outcome.delay_s) == (Fate.retry, None)
        assert repr(outcome.error) == repr(
            taskhawk.ConfigurationError(
                f"mail.send: retry: expected 0 or more seconds, got {delay_s!r}"
            )
        )
        assert outcome.error.__context__ is error
        text = f"mail.send {PROCESSING_ID}: attempt 1 failed and is left to the queue"
        assert caplog.record_tuples == [("taskhawk", logging.ERROR, text)]
        assert "KeyError: 'no'" in caplog.text
        assert "ConfigurationError: mail.send: retry: " in caplog.text

    @pytest.mark.parametrize("broken", [ZeroDivisionError("oh"), SystemExit(3)])
    def test_policy_that_fails(self, broken, caplog):
        """A policy that raises leaves the message to the queue, and both errors are logged."""
        error = KeyError("no")
        outcome = processing_run(raising(error), retry=raising(broken))
        assert outcome == Outcome(Fate.retry, broken)
        assert broken.__context__ is error
        assert [record.levelname for record in caplog.records] == ["ERROR"]

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (
                {"never_retry_on": [ValueError]},
                "never_retry_on=[<class 'ValueError'>]: expected exceptions",
            ),
            ({"retry_on": ("OSError",)}, "retry_on=('OSError',): expected exceptions"),
            ({"retry": 5}, "retry=5: expected a function of the attempt"),
        ],
    )
    def test_impossible_options(self, options, sentence):
        """Options by which no failure can be judged are refused when the task is declared."""
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            processing_run(raising(ValueError()), **options)
        assert str(caught.value) == f"raising.<locals>.raises has {sentence}"

    def test_hooks_around_the_run(self):
        """The hooks run before and after the task, with the queue's name and the message."""
        seen: list[Any] = []
        taskhawk.configure(
            TASKHAWK_PRE_PROCESS_HOOK=lambda **given: seen.append(("before", given)),
            TASKHAWK_POST_PROCESS_HOOK=lambda **given: seen.append(("after", given)),
        )

        def runs() -> None:
            seen.append("run")

        processing_run(runs)
        (before, given), run, after = seen
        assert (before, run, after) == ("before", "run", ("after", given))
        message = given["sqs_queue_message"]
        assert given == {"queue_name": "Q", "sqs_queue_message": message}
        assert (message.body, message.message_id) == (processing_body(), "m1")

    @pytest.mark.parametrize(
        ("end", "hooks"),
        [
            (nothing, ["pre", "post"]),
            (raising(taskhawk.IgnoreException()), ["pre", "post"]),
            (raising(ValueError()), ["pre", "error"]),
            (raising(taskhawk.LoggingException("x")), ["pre", "error"]),
            (raising(taskhawk.StopRetry()), ["pre", "error"]),
            (raising(taskhawk.RetryException()), ["pre"]),
        ],
        ids=[
            "returned",
            "ignored",
            "failed",
            "failed with extra",
            "gave up",
            "asked to retry",
        ],
    )
    def test_which_hooks_run(self, end, hooks):
        """The post hook is for what is done, the error hook for what is logged as an error."""
        seen: list[str] = []
        taskhawk.configure(
            TASKHAWK_PRE_PROCESS_HOOK=lambda **_: seen.append("pre"),
            TASKHAWK_POST_PROCESS_HOOK=lambda **_: seen.append("post"),
            TASKHAWK_ERROR_HOOK=lambda **_: seen.append("error"),
        )
        processing_run(end)
        assert seen == hooks

    def test_error_hook(self):
        """The error hook gets the exception and the decoded message."""
        seen: list[dict[str, Any]] = []
        taskhawk.configure(TASKHAWK_ERROR_HOOK=lambda **given: seen.append(given))
        error = ValueError("no")
        processing_run(raising(error))
        message = taskhawk.Message(json.loads(processing_body()))
        assert seen == [{"exception": error, "message": message}]

    @pytest.mark.parametrize("broken", [OSError("no network"), SystemExit(3)])
    def test_error_hook_that_fails(self, broken, caplog):
        """An error hook's own failure is logged, no more."""
        taskhawk.configure(TASKHAWK_ERROR_HOOK=raising(broken))
        error = ValueError("no")
        assert processing_run(raising(error)) == Outcome(Fate.retry, error)
        assert [
            (r.levelname, r.getMessage(), r.exc_info[1]) for r in caplog.records
        ] == [
            (
                "ERROR",
                f"mail.send {PROCESSING_ID}: attempt 1 failed and is left to the queue",
                error,
            ),
            ("ERROR", "TASKHAWK_ERROR_HOOK failed", broken),
        ]

    @pytest.mark.parametrize(
        "error", [OSError("no"), taskhawk.StopRetry(), SystemExit()]
    )
    def test_pre_hook_that_fails(self, error, caplog):
        """A pre hook that fails leaves the message to the queue, and its task does not run."""
        runs: list[int] = []

        def run() -> None:
            runs.append(1)

        taskhawk.configure(TASKHAWK_PRE_PROCESS_HOOK=raising(error))
        assert processing_run(run, **PROCESSING_FIVE) == Outcome(Fate.retry, error)
        text = "message m1: attempt 1 failed and is left to the queue"
        assert caplog.record_tuples == [("taskhawk", logging.ERROR, text)]
        assert caplog.records[0].exc_info[1] is error
        assert runs == []

    def test_pre_hook_that_asks_for_later(self, caplog):
        """A pre hook may put a message off, as a task may."""
        caplog.set_level(logging.INFO, "taskhawk")
        error = taskhawk.RetryException(delay_seconds=30)
        taskhawk.configure(TASKHAWK_PRE_PROCESS_HOOK=raising(error))
        assert processing_run(nothing) == Outcome(Fate.retry, error, 30)
        text = "message m1: attempt 1 asked to be retried and runs again in 30 s"
        assert caplog.record_tuples == [("taskhawk", logging.INFO, text)]

    @pytest.mark.parametrize("end", [nothing, raising(taskhawk.IgnoreException())])
    @pytest.mark.parametrize("case", PROCESSING_FAILURES)
    def test_post_hook_that_fails(self, case, end, caplog):
        """A post hook that fails has failed the run: it may be the commit."""
        error, options, attempt, then = PROCESSING_FAILURES[case]
        taskhawk.configure(TASKHAWK_POST_PROCESS_HOOK=raising(error))
        fate, delay_s = PROCESSING_ENDS[then]
        assert processing_run(end, attempt, **options) == Outcome(fate, error, delay_s)
        text = f"mail.send {PROCESSING_ID}: attempt {attempt} failed and {then}"
        assert caplog.record_tuples == [("taskhawk", logging.ERROR, text)]

    def test_hook_that_is_not_there(self, caplog):
        """A hook's setting that is wrong is a failed run, with the sentence that says so."""
        taskhawk.configure(
            TASKHAWK_PRE_PROCESS_HOOK="json.missing", TASKHAWK_ERROR_HOOK=5
        )
        outcome = processing_run(nothing)
        assert outcome.fate is Fate.retry
        assert str(outcome.error) == (
            "TASKHAWK_PRE_PROCESS_HOOK in configure(): expected a function or its dotted path, such"
            " as 'myapp.hooks.before', got 'json.missing'"
            " (module 'json' has no attribute 'missing')"
        )
        assert [record.getMessage() for record in caplog.records] == [
            "message m1: attempt 1 failed and is left to the queue",
            "TASKHAWK_ERROR_HOOK failed",
        ]

    def test_invalid_messages_reach_the_pre_hook(self):
        """The pre hook sees malformed messages too, before they are found to be so."""
        seen: list[Any] = []
        taskhawk.configure(
            TASKHAWK_PRE_PROCESS_HOOK=lambda **given: seen.append(
                given["sqs_queue_message"]
            )
        )
        message = QueueMessage("{", "m1", queue="Q")
        outcome = taskhawk.process(message)
        assert seen == [message]
        assert (outcome.fate, type(outcome.error)) == (
            Fate.retry,
            taskhawk.ValidationError,
        )

    def test_invalid_messages(self, tmp_path):
        """What is no message, or for no task here, is left to the queue; the log says why."""
        steps = [
            (100.0 * n, body) for n, (body, _) in enumerate(PROCESSING_INVALID.values())
        ]
        found = self.child(tmp_path, steps)
        assert [(fate, delay_s) for fate, delay_s, *_ in found] == [
            ("retry", None)
        ] * len(steps)
        assert [record for *_, record, _ in found] == [
            ["ERROR", f"message m1 is left to the queue: {wrong}", None]
            for _, wrong in PROCESSING_INVALID.values()
        ]
        errors = {"unknown task": "TaskNotFound"}
        assert [hooked for *_, hooked in found] == [
            ["hook", errors.get(case, "ValidationError"), None]
            for case in PROCESSING_INVALID
        ]

    def test_invalid_messages_are_logged_at_intervals(self, tmp_path):
        """A poisoned queue does not fill the disk: one record of a kind in ten seconds."""
        invalid, unknown = (
            PROCESSING_INVALID[case][0] for case in ("not JSON", "unknown task")
        )
        steps = [
            (5, invalid),
            (5, invalid),
            (5, unknown),
            (14.9, invalid),
            (14.9, unknown),
        ]
        found = self.child(tmp_path, [*steps, (15, invalid), (25, invalid)])
        text = f"message m1 is left to the queue: {PROCESSING_INVALID['not JSON'][1]}"
        missing = (
            f"message m1 is left to the queue: {PROCESSING_INVALID['unknown task'][1]}"
        )
        again = f"{text} (2 more like it since the last record)"
        records = [
            [text for level, text, _ in seen if level == "ERROR"]
            for _, _, *seen in found
        ]
        assert records == [[text], [], [missing], [], [], [again], [text]]

    @given(data=st.data())
    def test_secrets_stay_out_of_the_log(self, data):
        """However a run ends, no log text holds an argument, a header's value or the body."""
        value = data.draw(
            st.recursive(
                st.just(PROCESSING_SECRET),
                lambda inner: (
                    st.lists(inner, min_size=1, max_size=2)
                    | st.dictionaries(st.just("key"), inner, min_size=1)
                ),
                max_leaves=3,
            )
        )
        rows = [*PROCESSING_FAILURES.values(), *PROCESSING_RETRIES.values()]
        lost = taskhawk.LoggingException("lost", {"message": 1})
        wrong = {"retry": lambda _attempt: -1}
        others = [
            (None, {}),
            (taskhawk.IgnoreException(), {}),
            (lost, {}),
            (KeyError(), wrong),
        ]
        error, options = data.draw(st.sampled_from([row[:2] for row in rows] + others))
        failing = data.draw(
            st.sampled_from(["task", "PRE_PROCESS_HOOK", "POST_PROCESS_HOOK"])
        )
        error_hook = data.draw(st.sampled_from([None, raising(OSError())]))

        def runs(given: Any = None, *, named: Any = None, headers: Any = None) -> None:
            assert PROCESSING_SECRET in json.dumps([given, named, headers])
            if error and failing == "task":
                raise error.with_traceback(None)

        taskhawk.configure(TASKHAWK_ERROR_HOOK=error_hook)
        if error and failing != "task":
            taskhawk.configure(
                {f"TASKHAWK_{failing}": raising(error)}, TASKHAWK_ERROR_HOOK=error_hook
            )
        taskhawk._registry.pop("mail.send", None)
        taskhawk.task(name="mail.send", **options)(runs)
        where = data.draw(
            st.sampled_from(
                [
                    {"args": [value]},
                    {"kwargs": {"named": value}},
                    {"headers": {"a": value}},
                ]
            )
        )
        body = data.draw(
            st.sampled_from(
                [
                    processing_body(**where),
                    processing_body(**where),
                    processing_body(**where)[:-1],
                    processing_body("mail.receive", **where),
                    processing_body(**{**where, "args": [value, value]}),
                    processing_body(**{**where, "kwargs": {"unknown": value}}),
                    processing_body(**dict.fromkeys(where, value)),
                    processing_body(**where, metadata=value),
                ]
            )
        )
        with processing_log() as log:
            message = QueueMessage(body, "m1")
            assert isinstance(taskhawk.process(message), Outcome)
        assert PROCESSING_SECRET not in log.getvalue()

    @pytest.mark.parametrize(
        ("policy", "delays"),
        [
            (taskhawk.fixed(7, jitter=False), [7, 7, 7, 7, 7]),
            (taskhawk.linear(5, 10, jitter=False), [5, 15, 25, 35, 45]),
            (taskhawk.linear(5, 10, max_delay_s=30, jitter=False), [5, 15, 25, 30, 30]),
            (taskhawk.exponential(jitter=False), [1, 2, 4, 8, 16]),
            (taskhawk.exponential(0.5, 3, jitter=False), [0.5, 1.5, 4.5, 13.5, 40.5]),
            (taskhawk.exponential(max_delay_s=5, jitter=False), [1, 2, 4, 5, 5]),
        ],
    )
    def test_policies(self, policy, delays):
        """The policies of the box: equal delays, delays that grow by a step, and by a factor."""
        assert [policy(attempt) for attempt in range(1, 6)] == delays

    @pytest.mark.parametrize(
        "policy",
        [taskhawk.fixed(1, 2), taskhawk.linear(1, 1, 2), taskhawk.exponential(1, 2, 2)],
    )
    def test_policies_give_up(self, policy):
        """After max_retries retries a policy raises StopRetry."""
        assert all(policy(attempt) <= 3 for attempt in (1, 2))
        with pytest.raises(taskhawk.StopRetry) as caught:
            policy(3)
        assert str(caught.value) == "all 2 retries are used up"

    @pytest.mark.parametrize(
        ("policy", "attempt", "delay_s"),
        [
            (taskhawk.exponential(jitter=False), 10_000, 3600),
            (taskhawk.exponential(1.5, jitter=False), 10_000, 3600),
            (taskhawk.exponential(1, 1e300, jitter=False), 3, 3600),
            (taskhawk.exponential(0, 2.0, jitter=False), 10_000, 0),
            (taskhawk.exponential(max_delay_s=math.inf, jitter=False), 10_000, 43_200),
            (taskhawk.linear(1, 1e308, jitter=False), 1_000, 3600),
            (taskhawk.fixed(10**400, jitter=False), 1, 43_200),
        ],
    )
    def test_policies_do_not_overflow(self, policy, attempt, delay_s):
        """A delay that grew beyond all floats is the longest, at most the 12 hours of SQS."""
        assert policy(attempt) == delay_s

    @given(
        base_s=st.integers(0, 10**6) | st.floats(0, 1e6),
        growth=st.floats(1, 1e9) | st.integers(1, 10),
        ceiling_s=st.floats(0, 1e6),
        attempt=st.integers(1, 100_000),
        seed=st.integers(
            0, 2**32
        ),  # Hypothesis makes random's numbers the same in each example
    )
    def test_jitter(self, base_s, growth, ceiling_s, attempt, seed):
        """Jitter, on by default, takes from half of a delay to all of it; no ceiling is passed."""
        random.seed(seed)
        makers = [
            lambda **how: taskhawk.fixed(base_s, **how),
            lambda **how: taskhawk.linear(base_s, growth, None, ceiling_s, **how),
            lambda **how: taskhawk.exponential(base_s, growth, None, ceiling_s, **how),
        ]
        for make in makers:
            whole = make(jitter=False)(attempt)
            assert whole / 2 <= make()(attempt) <= whole <= 43_200
            assert make(jitter=False)(attempt + 1) >= whole
        assert whole <= ceiling_s

    def test_jitter_differs(self):
        """What failed together does not come back together."""
        policy = taskhawk.fixed(60)
        assert len({policy(1) for _ in range(20)}) > 1

    @pytest.mark.parametrize(
        ("make", "sentence"),
        [
            (lambda: taskhawk.fixed(-1), "retry policy: expected 0 or more, got -1"),
            (
                lambda: taskhawk.fixed(None),
                "retry policy: expected 0 or more, got None",
            ),
            (lambda: taskhawk.fixed(1, -1), "retry policy: expected 0 or more, got -1"),
            (
                lambda: taskhawk.fixed(1, True),
                "retry policy: expected 0 or more, got True",
            ),
            (
                lambda: taskhawk.linear("1", 1),
                "retry policy: expected 0 or more, got '1'",
            ),
            (
                lambda: taskhawk.linear(1, -2),
                "retry policy: expected 0 or more, got -2",
            ),
            (
                lambda: taskhawk.linear(1, 1, 3, -1),
                "retry policy: expected 0 or more, got -1",
            ),
            (
                lambda: taskhawk.exponential(math.nan),
                "retry policy: expected 0 or more, got nan",
            ),
            (
                lambda: taskhawk.exponential(True),
                "retry policy: expected 0 or more, got True",
            ),
            (
                lambda: taskhawk.exponential(1, math.nan),
                "retry policy: expected 0 or more, got nan",
            ),
            (
                lambda: taskhawk.exponential(1, "2"),
                "retry policy: expected 0 or more, got '2'",
            ),
        ],
    )
    def test_policies_check_their_parameters(self, make, sentence):
        """A policy that makes no sense is refused where it is written."""
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            make()
        assert str(caught.value) == sentence

    def test_django_connections_are_recycled(self, tmp_path):
        """In Django, connections are closed after so many runs, but not within a transaction."""
        code = """
assert [is_open_after_a_run() for _ in range(5)] == [True, False, True, False, True]
with transaction.atomic():
    assert [is_open_after_a_run() for _ in range(3)] == [True, True, True]
assert [is_open_after_a_run() for _ in range(3)] == [True, False, True]
"""
        done = run_python(
            ["-c", PROCESSING_DJANGO + code, processing_body()], cwd=tmp_path
        )
        assert (done.stderr, done.returncode) == ("", 0)

    def test_django_connection_that_cannot_be_closed(self, tmp_path):
        """A connection that the database has closed already does not undo what the run did."""
        code = """
class Gone:
    def __init__(self, real):
        self.real = real
    def __getattr__(self, name):
        return getattr(self.real, name)
    def close(self):
        self.real.close()
        raise OSError("gone")

assert is_open_after_a_run()
connection.connection = Gone(connection.connection)
is_open_after_a_run()
assert [is_open_after_a_run() for _ in range(2)] == [True, False]
"""
        done = run_python(
            ["-c", PROCESSING_DJANGO + code, processing_body()], cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr


class TestSync:
    """TASKHAWK_SYNC runs a dispatched task here and now, the way a worker would."""

    def test_runs(self, sync):
        """The call goes through JSON and back, and dispatch returns the message's id."""
        runs = []

        @taskhawk.task(name="shop.sell", priority=taskhawk.Priority.bulk)
        def sell(what, metadata, headers):
            runs.append((what, metadata, headers))

        value = ({1: Decimal("1.50")}, (2, Decimal(3)))
        message_id = sell.with_headers(when=(4,)).dispatch(value)
        [(what, metadata, headers)] = runs
        assert same_json(what, [{"1": 1.5}, [2, 3]])
        assert headers == metadata.headers == {"when": [4]}
        assert (metadata.id, metadata.priority) == (message_id, taskhawk.Priority.bulk)
        assert (metadata.receipt, metadata.queue, metadata.attempt) == (None, None, 1)
        assert not metadata.lease_lost
        metadata.extend_visibility_timeout(10)  # of no queue: nothing to do

    def test_refuses(self, sync):
        """What could not be dispatched to a queue is refused all the same."""
        task = taskhawk.task(name="shop.sell")(plain)
        with pytest.raises(TypeError) as caught:
            task.dispatch(1, 2)
        assert str(caught.value) == "shop.sell: too many positional arguments"
        with pytest.raises(TypeError) as caught:
            task.dispatch({1})
        text = "shop.sell: args[0] is not JSON: set is not a JSON type"
        assert str(caught.value) == text
        with pytest.raises(taskhawk.ValidationError):
            task.dispatch(float("nan"))

    @pytest.mark.parametrize(
        "error",
        [
            ValueError("no milk"),
            taskhawk.RetryException("later", delay_seconds=5),
            taskhawk.LoggingException("no milk", extra={"shop": 1}),
            taskhawk.StopRetry("never"),
            SystemExit(3),
            KeyboardInterrupt(),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_errors(self, sync, error):
        """The task's exception, whatever it is, comes out of dispatch, and nothing is retried."""
        runs, hooks = [], []
        hook = functools.partial(hooks.append)
        taskhawk.configure(
            TASKHAWK_SYNC=True,
            TASKHAWK_POST_PROCESS_HOOK=lambda **_: hook("post"),
            TASKHAWK_ERROR_HOOK=lambda **_: hook("error"),
        )

        @taskhawk.task(name="shop.sell", retry=taskhawk.fixed(0, max_retries=3))
        def sell():
            runs.append(1)
            raise error

        with pytest.raises(type(error)) as caught:
            sell.dispatch()
        assert caught.value is error
        assert (runs, hooks) == ([1], [])

    @pytest.mark.parametrize("queue", [None, "shop"])
    def test_hooks(self, queue):
        """The hooks run around the task, also where it raises IgnoreException."""
        seen = []

        def hook(queue_name, sqs_queue_message):
            body = json.loads(sqs_queue_message.body)
            seen.append((queue_name, body["task"], sqs_queue_message.receipt_handle))
            sqs_queue_message.change_visibility(VisibilityTimeout=3)  # of no queue
            sqs_queue_message.delete()

        settings = {"TASKHAWK_QUEUE": queue} if queue else {}
        settings |= {
            "TASKHAWK_PRE_PROCESS_HOOK": hook,
            "TASKHAWK_POST_PROCESS_HOOK": hook,
        }
        taskhawk.configure(TASKHAWK_SYNC=True, **settings)

        @taskhawk.task(name="shop.sell")
        def sell():
            seen.append("sold")
            raise taskhawk.IgnoreException

        assert sell.with_priority(taskhawk.Priority.high).dispatch()
        name = "TASKHAWK-SHOP-HIGH-PRIORITY" if queue else "TASKHAWK-SYNC"
        assert seen == [(name, "shop.sell", None), "sold", (name, "shop.sell", None)]

    def test_hooks_of_lambda(self):
        """In a Lambda app, the hooks get an SNS record."""
        seen = []

        def hook(sns_record):
            seen.append(
                (
                    sns_record["Sns"]["MessageId"],
                    json.loads(sns_record["Sns"]["Message"]),
                )
            )

        taskhawk.configure(
            TASKHAWK_SYNC=True, IS_LAMBDA_APP=True, TASKHAWK_PRE_PROCESS_HOOK=hook
        )
        message_id = taskhawk.task(name="shop.sell")(plain).dispatch(5)
        [(sns_id, message)] = seen
        assert sns_id == message["id"] == message_id
        assert message["args"] == [5]

    def test_hook_fails(self):
        """A failing hook comes out of dispatch too: the pre hook's before the task runs."""
        runs = []

        def fail(**_):
            raise OSError("no database")

        @taskhawk.task(name="shop.sell")
        def sell():
            runs.append(1)

        for name, count in (("PRE", 0), ("POST", 1)):
            taskhawk.configure(
                TASKHAWK_SYNC=True, **{f"TASKHAWK_{name}_PROCESS_HOOK": fail}
            )
            with pytest.raises(OSError, match=r"^no database$"):
                sell.dispatch()
            assert len(runs) == count

    def test_no_delay(self, sync):
        """A delay is ignored, however long."""
        runs = []

        @taskhawk.task(name="shop.sell")
        def sell():
            runs.append(1)

        assert sell.with_delay(dt.timedelta(days=30)).dispatch()
        assert runs == [1]

    def test_default_headers(self):
        """The default headers are given as they are without sync mode."""
        seen = []

        @taskhawk.task(name="shop.sell")
        def sell(headers):
            seen.append(headers)

        hook = lambda task: {"request_id": task.name}  # noqa: E731
        taskhawk.configure(TASKHAWK_SYNC=True, TASKHAWK_DEFAULT_HEADERS=hook)
        sell.dispatch()
        assert seen == [{"request_id": "shop.sell"}]

    def test_batch(self, sync):
        """A batch runs its tasks when the block ends, and not at all where the block raises."""
        runs = []

        @taskhawk.task(name="shop.sell")
        def sell(what):
            runs.append(what)

        with taskhawk.batch():
            sell.dispatch("milk")
            sell.dispatch_many(["bread"])
            sell.dispatch("tea")
            before = list(runs)
        assert (before, runs) == ([], ["milk", "bread", "tea"])
        with contextlib.suppress(KeyError), taskhawk.batch():
            sell.dispatch("milk")
            raise KeyError
        assert len(runs) == 3

    def test_async(self, sync):
        """An async task runs to its end, also where the caller's own event loop is running."""
        runs = []
        variable = contextvars.ContextVar("variable")

        @taskhawk.task(name="shop.sell")
        async def sell(what):
            await asyncio.sleep(0)
            runs.append((what, variable.get()))
            if what == "nothing":
                raise LookupError(what)

        async def main():
            variable.set("inside")
            sell.dispatch("bread")
            with pytest.raises(LookupError, match=r"^nothing$"):
                sell.dispatch("nothing")

        variable.set("outside")
        sell.dispatch("milk")
        asyncio.run(main())
        assert runs == [("milk", "outside"), ("bread", "inside"), ("nothing", "inside")]

    def test_needs_nothing(self, tmp_path):
        """Sync mode needs no queue, no region and no credentials, and imports no botocore."""
        code = textwrap.dedent("""
            import sys

            before = set(sys.modules)
            import taskhawk

            @taskhawk.task
            def sell(what):
                print("sold", what)

            sell.dispatch("milk")
            print(sorted({"asyncio", "botocore", "sqlite3"} & (set(sys.modules) - before)))
        """)
        result = run_python(code, cwd=tmp_path, env={"TASKHAWK_SYNC": "true"})
        assert (result.stdout, result.stderr) == ("sold milk\n[]\n", "")


LOGGING_MODULE = """
import asyncio
import contextvars
import logging
import threading
import taskhawk

LOG = logging.getLogger("jobs")

@taskhawk.task(name="jobs.talk")
def talk():
    LOG.info("from the task", extra={"order": 7})
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(LOG.warning, "from its thread"))
    thread.start()
    thread.join()

@taskhawk.task(name="jobs.fail", isolate=True)
def fail():
    LOG.info("from a child")
    raise ValueError("for a reason")

@taskhawk.task(name="jobs.break")
def break_here():
    raise ValueError("for another")

@taskhawk.task(name="jobs.hang")
def hang():
    print("hangs", flush=True)
    threading.Event().wait()

@taskhawk.task(name="jobs.spin", isolate=True)
def spin():
    print("hangs", flush=True)
    sum(range(10**12))

@taskhawk.task(name="jobs.quick")
def quick():
    pass
"""


class TestLogging:
    """Each run is one record with its facts, and records say in which task they were made."""

    @pytest.mark.parametrize(
        ("error", "outcome"),
        [
            (None, "done"),
            (taskhawk.IgnoreException(), "ignored"),
            (taskhawk.RetryException(), "retry"),
            (ValueError("no"), "retry"),
            (taskhawk.LoggingException("no", extra={"outcome": "mine"}), "mine"),
            (taskhawk.StopRetry("enough"), "dead_letter"),
        ],
    )
    def test_outcome(self, memory, caplog, error, outcome):
        """A run leaves one record with its task, id, attempt, outcome and duration_ms."""
        caplog.set_level(logging.DEBUG)

        @taskhawk.task(name="shop.sell")
        def sell():
            if error:
                raise error

        message_id = sell.dispatch()
        [received] = queued()
        taskhawk.process(received)
        [record] = [record for record in caplog.records if hasattr(record, "outcome")]
        assert (record.task, record.id, record.attempt) == ("shop.sell", message_id, 1)
        assert (record.outcome, type(record.duration_ms)) == (outcome, int)

    def test_outcome_of_an_invalid_message(self, caplog):
        """A message that is not valid leaves one record too, which knows no task."""
        taskhawk._last_invalid.clear()
        run_body("{}")
        [record] = [record for record in caplog.records if hasattr(record, "outcome")]
        assert (record.outcome, hasattr(record, "task")) == ("retry", False)

    def test_current_task(self):
        """current_task() is the metadata of the task around it, and None outside."""
        seen = []

        @taskhawk.task(name="shop.inner")
        def inner():
            seen.append(taskhawk.current_task().task)

        @taskhawk.task(name="shop.outer")
        async def outer(metadata):
            await asyncio.to_thread(
                lambda: seen.append(taskhawk.current_task() is metadata)
            )
            inner.dispatch()
            seen.append(taskhawk.current_task().task)

        taskhawk.configure(TASKHAWK_SYNC=True)
        assert taskhawk.current_task() is None
        outer.dispatch()
        assert seen == [True, "shop.inner", "shop.outer"]
        assert taskhawk.current_task() is None

    def test_json_of_anything(self):
        """A record whose `extra` JSON can't hold is an object in a line all the same."""
        circle: list[Any] = [7]
        circle.append(circle)
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        for odd, shown in (
            (math.nan, "nan"),
            ({(1, 2): 3}, "{(1, 2): 3}"),
            (circle, "[7, [...]]"),
            (deep, "list (its text can't be made)"),
            (10**5000, "int (its text can't be made)"),
        ):
            record = logging.makeLogRecord({"msg": "odd", "odd": odd, "order": 7})
            line = json.loads(taskhawk._JsonFormatter().format(record))
            assert (line["message"], line["odd"], line["order"]) == ("odd", shown, 7)
            vars(record)[1, 2] = 3
            sent = json.loads(taskhawk._LineFormatter().format(record))  # by a child
            assert (sent["msg"], sent["created"]) == ("odd", record.created)

    def test_fields_of_its_own(self, memory, caplog):
        """What a record has of its own stays, and the task's id and attempt are added."""
        caplog.handler.addFilter(taskhawk._add_task)

        @taskhawk.task(name="shop.sell")
        def sell():
            logging.getLogger("shop").warning("sold", extra={"task": "mine"})

        message_id = sell.dispatch()
        taskhawk.process(*queued())
        caplog.handler.removeFilter(taskhawk._add_task)
        [record] = [record for record in caplog.records if record.name == "shop"]
        assert (record.task, record.id, record.attempt) == ("mine", message_id, 1)

    def test_json(self, tmp_path):
        """With --log-format json each record is an object in a line, and says in which task."""
        (tmp_path / "jobs.py").write_text(LOGGING_MODULE)
        env = {"TASKHAWK_BROKER": f"sqlite:///{tmp_path}/queue.db"}
        ids = {}
        for name in ("jobs.talk", "jobs.fail", "jobs.break"):
            result = run_python(
                ["-m", "taskhawk", "dispatch", name], cwd=tmp_path, env=env
            )
            ids[name] = result.stdout.strip()
        command = [
            "-m",
            "taskhawk",
            "listen",
            "jobs",
            "--log-format",
            "json",
            "--loop-count",
            "3",
        ]
        result = run_python(command, cwd=tmp_path, env=env)
        lines = [json.loads(line) for line in result.stderr.splitlines()]
        by_text = {line["message"]: line for line in lines}
        for text, name in (
            ("from the task", "jobs.talk"),
            ("from its thread", "jobs.talk"),
            ("from a child", "jobs.fail"),
        ):
            line = by_text[text]
            assert (line["task"], line["id"], line["attempt"]) == (name, ids[name], 1)
            assert line["logger"] == "jobs"
        assert by_text["from the task"]["order"] == 7
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", lines[0]["time"])
        failed = {
            line["task"]: line for line in lines if line.get("outcome") == "retry"
        }
        for name, reason in (
            ("jobs.fail", "for a reason"),
            ("jobs.break", "for another"),
        ):
            assert failed[name]["level"] == "ERROR"
            assert failed[name]["exception"].endswith(f"ValueError: {reason}")
        assert by_text["worker ended: " + result.stdout.strip()]["level"] == "INFO"

    @pytest.mark.parametrize(("job", "retried"), [("hang", 0), ("spin", 1)])
    @pytest.mark.parametrize("concurrency", ["1", "2"])
    def test_grace(self, tmp_path, job, retried, concurrency):
        """A command ends with its grace, flushes, says what became of messages, exits with 1."""
        broker = taskhawk.SqliteBroker(f"sqlite:///{tmp_path}/queue.db")
        call = {"args": [], "kwargs": {}}
        messages = [
            {**VALID, "task": f"jobs.{name}", **call} for name in ("quick", job)
        ]
        entries = [taskhawk.Outgoing(json.dumps(message), {}) for message in messages]
        assert broker.send("TASKHAWK-DEFAULT", entries) == []
        env = {"TASKHAWK_BROKER": f"sqlite:///{tmp_path}/queue.db"}
        options = (
            "--grace",
            "3.1",
            "--num-messages",
            "2",
            "--concurrency",
            concurrency,
        )
        with worker_process(tmp_path, env, *options, module=LOGGING_MODULE) as worker:
            assert worker.stdout.readline() == "hangs\n"
            worker.terminate()
            output = worker.stdout.read()
            assert worker.wait() == 1
        counts = f"2 received, 1 acked, {retried} retried, 0 dead-lettered, 0 released, 0 uncertain"
        assert output == f"{counts}\n"
        visible, in_flight, _ = broker.depth("TASKHAWK-DEFAULT")
        assert (visible, in_flight) == (retried, 1 - retried)
        broker.close()


class TestInterrupts:
    """Control-C is never swallowed."""

    @pytest.mark.parametrize("where", ["policy", "hook"])
    def test_interrupt(self, where):
        """Control-C in a retry policy or an error hook ends the process, as in a task."""

        def interrupt(*_args: Any, **_kwargs: Any) -> Any:
            raise KeyboardInterrupt

        if where == "hook":
            taskhawk.configure(TASKHAWK_ERROR_HOOK=interrupt)

        @taskhawk.task(
            name="interrupted", retry=interrupt if where == "policy" else None
        )
        def fail() -> None:
            raise ValueError

        body = json.dumps(taskhawk.Message.new("interrupted").as_dict())
        with pytest.raises(KeyboardInterrupt):
            taskhawk.process(taskhawk.QueueMessage(body, "m1"))


# --- 13. holdings ---------------------------------------------------------------------


class TestStates:
    """The steps of a message that a worker holds."""

    def test_steps(self):
        """A message makes no step but those that the docstring draws."""
        drawing = re.search(
            r"^ +received -->.*?(?=\n\n)", taskhawk.__doc__, re.DOTALL | re.MULTILINE
        )
        first, *others = textwrap.dedent(drawing[0]).splitlines()
        chain = list(re.finditer(r"\w+", first.split("  ")[0]))
        drawn = {start[0]: {end[0]} for start, end in itertools.pairwise(chain)}
        for line in others:  # an arrow comes from the name above its beginning
            arrow = re.search(r"[|']-+> (\w+)", line)
            (above,) = (
                name[0] for name in chain if name.start() < arrow.start() < name.end()
            )
            drawn[above].add(arrow[1])
        assert drawn == taskhawk._STEPS
        ends = {"acked", "retried", "dead_lettered", "uncertain", "released"}
        assert ends | {"received"} == set(vars(taskhawk.Ledger()))
        message = taskhawk.QueueMessage("", "m1", "r1", queue="Q")
        held = taskhawk._Held(message, 30, 30, 10, 43_190)
        with pytest.raises(
            RuntimeError, match=r"^a message can't go from received to acked$"
        ):
            held.move("acked")

    def test_delay_during_an_extension(self, worker_broker):
        """A delay is sent after the extension that was under way when its run ended: it holds."""
        extending = threading.Event()

        def hang(real: Any, *_args: Any) -> Any:
            extending.set()
            # The next receive is made once the run has ended.
            worker_eventually(lambda: len(worker_broker.made("receive")) > 1)
            return real()

        @taskhawk.task
        def later() -> None:
            assert extending.wait(WORKER_PATIENCE_S)
            raise taskhawk.RetryException(delay_seconds=600)

        worker_broker.faults["change_visibility"] = worker_first(1, hang)
        worker_broker.put(later, ())
        ledger = worker_broker.work(
            loop_count=2, visibility_timeout_s=1, wait_s=0, clock=time.monotonic
        )
        assert ledger == taskhawk.Ledger(received=1, retried=1)
        asked = [s for _, ((_, s),) in worker_broker.made("change_visibility")]
        assert asked == [1, 600]
        assert worker_broker.depth(WORKER_QUEUE) == (0, 1, 0)


# --- 14. the keeper -------------------------------------------------------------------


# --- 15. the worker -------------------------------------------------------------------

WORKER_12_HOURS_S = 43_200


class WorkerDenied(Exception):
    """What botocore raises where IAM does not allow a call, as far as it matters."""

    response = {  # noqa: RUF012
        "Error": {
            "Code": "AccessDenied",
            "Message": "no identity-based policy allows it",
        }
    }


def worker_raise(error: BaseException) -> Callable[..., Any]:
    """Return a fault: the call has no effect and raises."""

    def fault(real: Any, *args: Any) -> Any:
        raise error

    return fault


def worker_refuse(code: str, *, final: bool) -> Callable[..., Any]:
    """Return a fault that refuses the first entry of a batch call and lets the others pass."""

    def fault(real: Any, queue: str, entries: Sequence[Any]) -> list[taskhawk.Refusal]:
        if len(entries) > 1:
            assert real.func(queue, entries[1:]) == []
        return [taskhawk.Refusal(0, code, f"refused by {code}", final)]

    return fault


def worker_logs(
    caplog: pytest.LogCaptureFixture, level: int = logging.WARNING
) -> list[str]:
    """Return the texts that were logged at that level or above."""
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def worker_made(request: pytest.FixtureRequest) -> WorkerBroker:
    """Return the broker of a kind, configured, with the queues of a service."""
    names = ("tmp_path", "queue_name", "sqs_client")
    tmp_path, queue_name, sqs_client = map(request.getfixturevalue, names)
    urls = {
        "memory": "sqlite://",
        "disk": f"sqlite:///{tmp_path}/queue.db",
        "sqs": "sqs",
    }
    settings = worker_configure(request, urls[request.param], queue_name)
    broker = WorkerBroker(taskhawk._brokers.broker())
    broker.settings = settings
    if request.param == "sqs":
        make_queues(sqs_client(request.getfixturevalue("ministack")), queue_name)
    return broker


@pytest.fixture(params=["memory", "disk", "sqs"])
def worker_any(request: pytest.FixtureRequest) -> WorkerBroker:
    """Return the broker that is configured, once of each kind."""
    return worker_made(request)


@pytest.fixture(params=["disk", "sqs"])
def worker_shared(request: pytest.FixtureRequest) -> WorkerBroker:
    """Return the broker that is configured, once of each kind that several processes can use."""
    return worker_made(request)


def worker_configure(
    request: pytest.FixtureRequest, url: str, name: str
) -> dict[str, str]:
    """Configure a broker, and return the settings that this takes."""
    values = {"TASKHAWK_BROKER": url, "TASKHAWK_QUEUE": name}
    if url == "sqs":
        values |= {"AWS_ENDPOINT_SQS": request.getfixturevalue("ministack"), **AWS_KEYS}
    taskhawk.configure(values)
    return values


def worker_job(task_name: str) -> Any:
    """Return a task of WORKER_MODULE, to be dispatched and not run in this process."""

    def job(number: int) -> None:
        raise NotImplementedError

    return taskhawk.task(name=f"jobs.{task_name}")(job)


class TestWorker:
    """Room 11: pollers receive, the calling thread runs, one keeper changes messages."""

    # -- what it is told

    def test_runs(self, worker_any):
        """Each message is run once, acknowledged, and counted in the ledger that is returned."""
        ran = []

        @taskhawk.task
        def note(number: int) -> None:
            ran.append(number)

        for number in range(3):
            note.dispatch(number)
        ledger = taskhawk.listen_for_messages(taskhawk.Priority.default, loop_count=3)
        assert sorted(ran) == [0, 1, 2]
        assert ledger == taskhawk.Ledger(received=3, acked=3)
        assert worker_any.depth(worker_any.destination(taskhawk.Priority.default)) == (
            0,
            0,
            0,
        )

    def test_parameters_of_1_4(self, aws):
        """All five of 1.4's parameters are taken by position and reach SQS as they are."""
        ledger = taskhawk.listen_for_messages(
            taskhawk.Priority.high, 7, 90, 2, threading.Event()
        )
        assert ledger == taskhawk.Ledger()
        queue = "TASKHAWK-APP-HIGH-PRIORITY"
        assert aws.asked("GetQueueUrl") == [{"QueueName": queue}]
        receive = {
            "QueueUrl": f"{aws.url}/000000000000/{queue}",
            "MaxNumberOfMessages": 7,
            "WaitTimeSeconds": 20,
            "VisibilityTimeout": 90,
            "MessageAttributeNames": ["All"],
            "MessageSystemAttributeNames": [
                "ApproximateReceiveCount",
                "SentTimestamp",
                "MessageGroupId",
            ],
        }
        assert aws.asked("ReceiveMessage") == [receive, receive]
        assert aws.asked("GetQueueAttributes") == []  # it was told the timeout

    def test_receives_at_most_ten(self, aws):
        """A num_messages above ten asks for the ten that SQS gives."""
        taskhawk.listen_for_messages(taskhawk.Priority.default, 25, 30, loop_count=1)
        assert [r["MaxNumberOfMessages"] for r in aws.asked("ReceiveMessage")] == [10]

    def test_queue_timeout(self, aws):
        """Without a visibility timeout the queue's own is read once and left to the queue."""
        aws.always("GetQueueAttributes", {"Attributes": {"VisibilityTimeout": "45"}})
        taskhawk.listen_for_messages(taskhawk.Priority.default, loop_count=2)
        assert len(aws.asked("GetQueueAttributes")) == 1
        polls = aws.asked("ReceiveMessage")
        assert ["VisibilityTimeout" in poll for poll in polls] == [False, False]

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"num_messages": 0}, "num_messages: expected 1 or more, got 0"),
            ({"max_tasks": -1}, "max_tasks: expected 1 or more, got -1"),
            (
                {"visibility_timeout_s": 0},
                "visibility_timeout_s: expected 1 to 43200 seconds, got 0",
            ),
            (
                {"visibility_timeout_s": 43_201},
                "visibility_timeout_s: expected 1 to 43200 seconds, got 43201",
            ),
        ],
    )
    def test_wrong_parameters(self, options, sentence):
        """A parameter that can't work is refused before anything is received."""
        taskhawk.configure(TASKHAWK_BROKER="sqlite://")
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            taskhawk.listen_for_messages(taskhawk.Priority.default, **options)
        assert str(raised.value) == sentence

    def test_urgency(self, aws):
        """Of the messages that wait, the one of the highest priority runs first."""
        together, beats, order = threading.Barrier(4), [], []
        urgency = ["high", "default", "low", "bulk"]

        @taskhawk.task
        def note(metadata: Any = None) -> None:
            worker_eventually(
                lambda: len(beats) == 4
            )  # the first waits until all are received
            order.append(metadata.priority.name)

        def receive(call: AwsCall) -> AwsAnswer:
            together.wait(WORKER_PATIENCE_S)
            name = (
                call.data["QueueUrl"]
                .rpartition("-APP")[2]
                .strip("-")
                .partition("-")[0]
                .lower()
            )
            priority = taskhawk.Priority[name or "default"]
            message = taskhawk.Message.new(note.name, priority=priority)
            return brings_messages(message)

        aws.always("ReceiveMessage", receive)
        configure_aws(aws.url, "app", TASKHAWK_HEARTBEAT_HOOK=lambda: beats.append(1))
        every = [taskhawk.Priority[name] for name in ("bulk", "low", "default", "high")]
        ledger = taskhawk.listen_for_messages(every, 1, 30, 1)
        assert order[1:] == [name for name in urgency if name != order[0]]
        assert ledger == taskhawk.Ledger(received=4, acked=4)

    def test_loop_count(self, worker_broker):
        """The loop count is receives of each queue; what they brought is run to its end."""

        @taskhawk.task
        def note() -> None:
            """Do nothing."""

        for queue in ("A", "B"):
            worker_broker.put(note, *[()] * 5, queue=queue)
        ledger = worker_broker.work("A", "B", loop_count=2)
        assert ledger == taskhawk.Ledger(received=4, acked=4)
        asked = collections.Counter(args[0] for args in worker_broker.made("receive"))
        assert asked == {"A": 2, "B": 2}

    def test_stopped_before(self, worker_any):
        """A shutdown event that is set already means that nothing is received."""
        event = threading.Event()
        event.set()
        queue = worker_any.destination(taskhawk.Priority.default)
        assert worker_any.work(queue, shutdown_event=event) == taskhawk.Ledger()
        assert worker_any.made("receive") == []

    def test_stopped_during(self, worker_any):
        """Set while a task runs, the event ends the worker after it; what waits is released."""
        event, queue = (
            threading.Event(),
            worker_any.destination(taskhawk.Priority.default),
        )

        @taskhawk.task
        def stop(number: int) -> None:
            event.set()

        worker_any.put(stop, *[(number,) for number in range(10)], queue=queue)
        ledger = taskhawk.Worker(
            worker_any, [queue], num_messages=10, shutdown_event=event, wait_s=1
        ).run()
        assert ledger.acked == 1
        assert ledger.released == ledger.received - 1 > 0
        assert worker_any.depth(queue) == (9, 0, 0)

    def test_until_empty_waits_for_delayed(self, worker_any):
        """A message that is retried in a moment is waited for before the queue counts as empty."""
        attempts = []

        @taskhawk.task
        def flaky(metadata: Any = None) -> None:
            attempts.append(metadata.attempt)
            if metadata.attempt == 1:
                raise taskhawk.RetryException(delay_seconds=0.1)

        queue = worker_any.destination(taskhawk.Priority.default)
        worker_any.put(flaky, (), queue=queue)
        assert worker_any.work(queue) == taskhawk.Ledger(received=2, acked=1, retried=1)
        assert attempts == [1, 2]

    def test_until_empty_of_all_queues(self, worker_broker):
        """A queue that is empty at first is listened to until the others are empty too."""
        looked = threading.Event()

        @taskhawk.task
        def urgent() -> None:
            """Do nothing."""

        @taskhawk.task
        def slow() -> None:
            assert looked.wait(WORKER_PATIENCE_S)
            worker_broker.put(urgent, (), queue="HIGH")

        def look(real: Any, queue: str) -> taskhawk.Depth:
            found = real()
            if queue == "HIGH" and not any(found):
                looked.set()
            return found

        worker_broker.faults["depth"] = look
        worker_broker.put(slow, (), queue="LOW")
        assert worker_broker.work("HIGH", "LOW") == taskhawk.Ledger(received=2, acked=2)

    def test_until_empty_asks_again(self, worker_broker):
        """A depth that can't be read is no reason to end, nor to fail."""
        worker_broker.faults["depth"] = worker_first(2, worker_raise(OSError("reset")))
        assert worker_broker.work() == taskhawk.Ledger()
        assert len(worker_broker.made("depth")) == 3

    def test_requests(self, worker_any):
        """Busy with ten at a time, a worker makes at most 0.12 receives and deletes a task."""
        queue = worker_any.destination(taskhawk.Priority.default)

        @taskhawk.task
        def quick(number: int) -> None:
            """Do nothing."""

        worker_any.put(quick, *[(number,) for number in range(200)], queue=queue)
        ledger = worker_any.work(queue, num_messages=10)
        assert ledger == taskhawk.Ledger(received=200, acked=200)
        assert len(worker_any.made("receive")) <= 24
        assert len(worker_any.made("delete")) <= 24
        assert worker_any.made("change_visibility") == []

    def test_no_prefetch(self, worker_broker):
        """By default a worker holds the one message that it runs."""
        depths = []

        @taskhawk.task
        def look() -> None:
            depths.append(worker_broker.depth(WORKER_QUEUE).visible)

        worker_broker.put(look, *[()] * 3)
        worker_broker.work()
        assert depths == [2, 1, 0]

    def test_ledger(self, worker_broker, caplog):
        """The ledger is logged at the end, and says in words what became of the messages."""
        caplog.set_level(logging.INFO)

        @taskhawk.task(never_retry_on=(LookupError,))
        def fail(kind: str) -> None:
            raise {"lookup": LookupError, "retry": taskhawk.RetryException}[kind](kind)

        worker_broker.put(fail, ("lookup",), ("retry",))
        ledger = worker_broker.work(loop_count=2)
        words = (
            "2 received, 0 acked, 1 retried, 1 dead-lettered, 0 released, 0 uncertain"
        )
        assert (str(ledger), ledger.balanced) == (words, True)
        assert f"worker ended: {words}" in worker_logs(caplog, logging.INFO)
        assert not taskhawk.Ledger(received=1).balanced

    # -- leases

    def test_lease(self, worker_broker, worker_clock):
        """A message is kept from others while it runs, and so is one that waits behind it."""
        ran, taken = [], []

        @taskhawk.task
        def slow(number: int, metadata: Any = None) -> None:
            if not ran:
                for step in range(
                    1, 5
                ):  # 0.8 s each: more than three visibility timeouts
                    worker_clock.now += 0.8
                    worker_eventually(
                        lambda s=step: len(worker_broker.made("change_visibility")) >= s
                    )
                    taken.extend(
                        worker_broker.inner.receive(
                            WORKER_QUEUE, 10, 0, 1, threading.Event()
                        )
                    )
            ran.append((number, metadata.lease_lost))

        worker_broker.put(slow, (1,), (2,))
        ledger = worker_broker.work(
            visibility_timeout_s=1, num_messages=2, clock=worker_clock
        )
        assert (ran, taken) == ([(1, False), (2, False)], [])
        assert ledger == taskhawk.Ledger(received=2, acked=2)
        assert [
            len(changes) for _, changes in worker_broker.made("change_visibility")
        ] == [2] * 4

    @pytest.mark.slow
    def test_lease_on_sqs(self, ministack, sqs_client, queue_name, request):
        """On SQS, a task runs once that takes longer than three visibility timeouts of 1 s."""
        worker_configure(request, "sqs", queue_name)
        broker = WorkerBroker(taskhawk._brokers.broker())
        queue = make_queue(sqs_client(ministack), f"TASKHAWK-{queue_name}")
        ran, taken = [], []

        @taskhawk.task
        def slow() -> None:
            end = time.monotonic() + 3.3
            while time.monotonic() < end:
                taken.extend(broker.inner.receive(queue, 10, 1, 30, threading.Event()))
            ran.append(1)

        broker.put(slow, (), queue=queue)
        ledger = broker.work(queue, visibility_timeout_s=1, wait_s=0)
        assert (ran, taken, ledger) == ([1], [], taskhawk.Ledger(received=1, acked=1))

    def test_lease_lost(self, worker_broker, caplog):
        """A task sees that another took its message; one that waits is then not started."""
        ran, received = [], []

        def receive(real: Any, *args: Any) -> list[taskhawk.QueueMessage]:
            received.extend(found := real())
            return found

        @taskhawk.task
        def slow(number: int, metadata: Any = None) -> None:
            ran.append((number, metadata.lease_lost))
            changes = [(message.receipt_handle, 0) for message in received]
            assert worker_broker.inner.change_visibility(WORKER_QUEUE, changes) == []
            again = worker_broker.inner.receive(
                WORKER_QUEUE, 10, 0, 60, threading.Event()
            )
            assert len(again) == 2
            worker_eventually(lambda: metadata.lease_lost)

        worker_broker.faults["receive"] = receive
        worker_broker.put(slow, (1,), (2,))
        ledger = worker_broker.work(
            loop_count=1, visibility_timeout_s=1, num_messages=2, clock=time.monotonic
        )
        assert ran == [(1, False)]
        assert ledger == taskhawk.Ledger(received=2, released=1, uncertain=1)
        ids = [message.message_id for message in received]
        why = "the message is no longer in flight, or was received again"
        assert worker_logs(caplog) == [
            *[f"message {message_id} may run twice: {why}" for message_id in ids],
            f"message {ids[0]} may run again: {why}",
        ]

    def test_lease_lost_then_retried(self, worker_broker, worker_clock):
        """After its lease is lost a message is not delayed: the receipt may be another's."""

        @taskhawk.task
        def slow(metadata: Any = None) -> None:
            worker_clock.now += 20
            worker_eventually(lambda: metadata.lease_lost)
            raise taskhawk.RetryException(delay_seconds=5)

        worker_broker.faults["change_visibility"] = worker_refuse(
            "ReceiptHandle", final=True
        )
        worker_broker.put(slow, ())
        ledger = worker_broker.work(loop_count=1, clock=worker_clock)
        assert ledger == taskhawk.Ledger(received=1, retried=1)
        assert len(worker_broker.made("change_visibility")) == 1

    @pytest.mark.parametrize(
        "fault",
        [worker_raise(OSError("reset")), worker_refuse("InternalError", final=False)],
        ids=["call", "entry"],
    )
    def test_lease_fault(self, worker_broker, worker_clock, caplog, fault):
        """An extension that fails for now is tried again before the lease ends."""

        @taskhawk.task
        def slow() -> None:
            for step in (1, 2):
                worker_clock.now += 11
                worker_eventually(
                    lambda s=step: len(worker_broker.made("change_visibility")) >= s
                )

        worker_broker.faults["change_visibility"] = worker_first(1, fault)
        worker_broker.put(slow, ())
        caplog.set_level(logging.INFO)
        beats: list[int] = []
        taskhawk.configure(TASKHAWK_HEARTBEAT_HOOK=lambda: beats.append(1))
        ledger = worker_broker.work(loop_count=1, clock=worker_clock)
        assert ledger == taskhawk.Ledger(received=1, acked=1)
        assert len(beats) == 2  # after the poll, and the round that was completed
        failing, works, _ended = worker_logs(caplog, logging.INFO)
        assert failing.startswith("WORKER: can't extend leases, goes on trying: re")
        assert works == "WORKER: can extend leases again; tries that failed: 1"

    def test_lease_fault_too_long(self, worker_broker, worker_clock, caplog):
        """Where no extension gets through until the lease ends, it is lost."""
        ids = []

        @taskhawk.task
        def slow(metadata: Any = None) -> None:
            worker_clock.now += 31
            worker_eventually(lambda: metadata.lease_lost)

        def note(sqs_queue_message: Any, **_: Any) -> None:
            ids.append(sqs_queue_message.message_id)

        taskhawk.configure(TASKHAWK_PRE_PROCESS_HOOK=note)
        worker_broker.faults["change_visibility"] = worker_raise(OSError("no route"))
        worker_broker.put(slow, ())
        ledger = worker_broker.work(clock=worker_clock, loop_count=1)
        assert ledger == taskhawk.Ledger(received=1, uncertain=1)
        assert worker_logs(caplog) == [
            f"message {ids[0]} may run twice: no route",
            "WORKER: can't extend leases, goes on trying: no route",
            f"message {ids[0]} may run again: its lease had ended",
        ]

    def test_lease_ends_while_waiting(self, worker_broker, worker_clock, caplog):
        """A message whose lease has ended is not started, though an extension is under way yet."""
        ran = []

        @taskhawk.task
        def slow() -> None:
            ran.append(1)
            worker_clock.now += 31
            worker_eventually(lambda: worker_broker.made("change_visibility"))

        def hang(real: Any, *_args: Any) -> Any:
            worker_eventually(lambda: worker_logs(caplog))
            return real()

        worker_broker.faults["change_visibility"] = hang
        worker_broker.put(slow, (), ())
        ledger = worker_broker.work(num_messages=2, clock=worker_clock, loop_count=1)
        assert (ledger, ran) == (
            taskhawk.Ledger(received=2, uncertain=1, released=1),
            [1],
        )
        assert worker_logs(caplog)[0].endswith(
            "may run twice: its lease ended while it waited"
        )

    def test_lease_in_time(self, worker_broker, monkeypatch):
        """A lease is extended after a third of it, whenever the keeper looks about besides."""
        monkeypatch.setattr(taskhawk, "_TICK_S", 10)

        @taskhawk.task
        def slow() -> None:
            worker_eventually(lambda: worker_broker.made("change_visibility"))

        worker_broker.put(slow, ())
        options = {"visibility_timeout_s": 3, "clock": time.monotonic}
        assert worker_broker.work(loop_count=1, **options) == taskhawk.Ledger(
            received=1, acked=1
        )

    def test_keeper_ends(self, worker_broker, worker_clock):
        """A KeyboardInterrupt in the keeper, of a heartbeat hook, ends the worker too."""
        beats: list[int] = []

        def beat() -> None:
            beats.append(1)
            if len(beats) == 2:
                raise KeyboardInterrupt

        @taskhawk.task
        def slow() -> None:
            worker_clock.now += 11
            worker_eventually(lambda: len(beats) == 2)

        taskhawk.configure(TASKHAWK_HEARTBEAT_HOOK=beat)
        worker_broker.put(slow, ())
        with pytest.raises(KeyboardInterrupt):
            worker_broker.work(clock=worker_clock)

    def test_lease_12_hours(self, worker_broker, worker_clock, caplog):
        """A lease is kept for 12 hours, SQS's bound, and never asks for more than is left of them.

        SQS counts from the receive, whose answer comes later, and refuses what goes beyond.
        """
        self._answer_late(worker_broker, worker_clock)
        kept = []

        @taskhawk.task
        def day_long(metadata: Any = None) -> None:
            for step in range(1, 6):
                worker_clock.now += 2 * 3600
                worker_eventually(
                    lambda s=step: (
                        len(worker_broker.made("change_visibility")) >= s
                        or metadata.lease_lost
                    )
                )
                kept.append(not metadata.lease_lost)
            worker_clock.now += 2 * 3600
            worker_eventually(lambda: metadata.lease_lost)

        worker_broker.put(day_long, ())
        ledger = worker_broker.work(
            loop_count=1, clock=worker_clock, visibility_timeout_s=6 * 3600
        )
        assert kept == [True] * 5
        assert ledger == taskhawk.Ledger(received=1, uncertain=1)
        twice, again = worker_logs(caplog)
        assert re.fullmatch(
            "message [-0-9a-f]+ may run twice: it was received 12 hours ago", twice
        )
        assert re.fullmatch(
            "message [-0-9a-f]+ may run again: its lease had ended", again
        )
        assert all(
            s > 0
            for _, changes in worker_broker.made("change_visibility")
            for _, s in changes
        )

    @staticmethod
    def _answer_late(broker: WorkerBroker, clock: Clock) -> None:
        """Have a receive answered after 1.5 s, and 12 hours counted as SQS does: from before."""
        received_at = []

        def receive(real: Any, *args: Any) -> Any:
            received_at.append(clock.now)
            found = real()
            clock.now += 1.5
            return found

        def change(real: Any, queue: str, changes: Sequence[tuple[str, float]]) -> Any:
            beyond = (
                clock.now
                - received_at[0]
                + max(s for _, s in changes)
                - WORKER_12_HOURS_S
            )
            text = "Total VisibilityTimeout for the message is beyond the limit [43200 seconds]."
            if beyond > 0:
                return [taskhawk.Refusal(0, "InvalidParameterValue", text, final=True)]
            return real()

        broker.faults |= {"receive": receive, "change_visibility": change}

    def test_lease_denied(self, worker_broker, worker_clock, caplog):
        """Without ChangeMessageVisibility a worker says so once, and goes on without leases."""

        @taskhawk.task
        def short() -> None:
            """Do nothing."""

        @taskhawk.task
        def long() -> None:
            deleted.append(len(deleted) * 2 + 1)
            worker_clock.now += 11
            # The keeper extends leases first, then deletes what came before us.
            worker_eventually(
                lambda: (
                    sum(len(r) for _, r in worker_broker.made("delete")) >= deleted[-1]
                )
            )

        deleted: list[int] = []
        worker_broker.faults["change_visibility"] = worker_raise(WorkerDenied("denied"))
        for _ in range(3):
            worker_broker.put(short, ())
            worker_broker.put(long, ())
        ledger = worker_broker.work(clock=worker_clock, num_messages=2, loop_count=3)
        assert ledger == taskhawk.Ledger(received=6, acked=6)
        assert worker_logs(caplog) == [
            "ChangeMessageVisibility is denied, long tasks may run twice: denied"
        ]
        assert len(worker_broker.made("change_visibility")) == 1

    def test_timeout_denied(self, worker_broker, caplog):
        """Without GetQueueAttributes, messages are received with an explicit 30 s."""
        worker_broker.faults["info"] = worker_raise(WorkerDenied("denied"))
        assert worker_broker.work("A", loop_count=1) == taskhawk.Ledger()
        assert [args[:4] for args in worker_broker.made("receive")] == [
            ("A", 1, 0.05, 30)
        ]
        assert worker_logs(caplog) == ["A: can't read its attributes: AccessDenied"]

    def test_timeout_unknown_at_first(self, worker_broker, caplog):
        """A fault of GetQueueAttributes is one of the receive's: the queue's timeout stays."""
        worker_broker.faults["info"] = worker_first(1, worker_raise(OSError("reset")))
        assert worker_broker.work("A", loop_count=1) == taskhawk.Ledger()
        assert [args[:4] for args in worker_broker.made("receive")] == [
            ("A", 1, 0.05, None)
        ]
        assert worker_logs(caplog) == [
            "A: can't receive, goes on trying: OSError('reset')"
        ]

    def test_timeout_denied_for_one(self, worker_broker):
        """A queue whose timeout is known keeps it, where another one's can't be read."""

        def info(real: Any, queue: str) -> taskhawk.QueueInfo:
            if queue == "B":
                raise WorkerDenied("denied")
            return real()._replace(visibility_timeout_s=300)

        def receive(real: Any, queue: str, *args: Any) -> Any:
            asked[queue].append(args[2])
            worker_eventually(lambda: asked["B"])
            return real()

        asked: dict[str, list[float | None]] = {"A": [], "B": []}
        worker_broker.faults |= {"info": info, "receive": receive}
        worker_broker.work("A", "B", loop_count=2)
        assert set(asked["A"]) <= {
            None,
            300,
        }  # with a lease of 300 s, 30 s would run it twice
        assert asked["B"] == [30, 30]

    def test_timeout_of_zero(self, worker_broker):
        """A queue whose visibility timeout is 0 gets an explicit one: a lease of 0 s is none."""

        @taskhawk.task
        def note() -> None:
            """Do nothing."""

        worker_broker.faults["info"] = lambda real, queue: real()._replace(
            visibility_timeout_s=0
        )
        worker_broker.put(note, ())
        ledger = worker_broker.work(loop_count=1)
        assert ledger == taskhawk.Ledger(received=1, acked=1)
        assert [args[3] for args in worker_broker.made("receive")] == [30]

    def test_extend_visibility_timeout(self):
        """A message that somebody holds is kept invisible; one that nobody holds is refused."""
        taskhawk.configure(TASKHAWK_BROKER="sqlite://")
        broker = taskhawk._brokers.broker()
        queue = broker.destination(taskhawk.Priority.low)
        broker.send(queue, [taskhawk.Outgoing("{}", {})])
        (message,) = broker.receive(queue, 1, 0, 60, threading.Event())
        receipt = message.receipt_handle
        taskhawk.extend_visibility_timeout(taskhawk.Priority.low, receipt, 0)
        assert broker.depth(queue) == (1, 0, 0)
        with pytest.raises(taskhawk.PartialFailure) as raised:
            taskhawk.extend_visibility_timeout(taskhawk.Priority.low, receipt, 60)
        assert str(raised.value) == "1 of 1 messages failed: ReceiptHandleIsInvalid"

    # -- acknowledgements, delays, dead letters

    @pytest.mark.parametrize(
        "fault",
        [
            worker_raise(OSError("reset")),
            lambda real, *args: (
                (real() and None) or worker_raise(OSError("reset"))(real)
            ),
            worker_refuse("InternalError", final=False),
        ],
        ids=["before its effect", "after its effect", "partly"],
    )
    def test_delete_fault(self, worker_broker, caplog, fault):
        """A delete that fails for now is tried again until it is confirmed."""

        @taskhawk.task
        def note(number: int) -> None:
            """Do nothing."""

        caplog.set_level(logging.INFO)
        worker_broker.faults["delete"] = worker_first(2, fault)
        worker_broker.put(note, *[(number,) for number in range(10)])
        ledger = worker_broker.work(num_messages=10, clock=time.monotonic)
        assert ledger == taskhawk.Ledger(received=10, acked=10)
        assert worker_broker.depth(WORKER_QUEUE) == (0, 0, 0)
        assert len(worker_broker.made("delete")) >= 3
        failing, works, _ended = worker_logs(caplog, logging.INFO)
        assert failing.startswith("WORKER: can't delete, goes on trying: re")
        assert works == "WORKER: can delete again; tries that failed: 2"

    @pytest.mark.parametrize(
        ("fault", "why"),
        [
            (
                worker_refuse("ReceiptHandleIsInvalid", final=True),
                "refused by ReceiptHandleIsInvalid",
            ),
            (worker_raise(WorkerDenied("not allowed")), "not allowed"),
        ],
        ids=["refused", "denied"],
    )
    def test_delete_refused(self, worker_broker, caplog, fault, why):
        """A delete that is refused for good leaves its message uncertain, and says so."""

        @taskhawk.task
        def note() -> None:
            """Do nothing."""

        worker_broker.faults["delete"] = fault
        worker_broker.put(note, ())
        assert worker_broker.work(loop_count=1) == taskhawk.Ledger(
            received=1, uncertain=1
        )
        (text,) = worker_logs(caplog)
        assert re.fullmatch(f"message [-0-9a-f]{{36}} may run again: {why}", text)

    def test_delete_unanswered(self, worker_broker, worker_clock, caplog):
        """A delete that fails until the lease has ended leaves its message uncertain."""

        @taskhawk.task
        def note() -> None:
            """Do nothing."""

        def fail(real: Any, *args: Any) -> Any:
            worker_clock.now += 31
            raise OSError("no route")

        worker_broker.faults |= {"delete": fail, "change_visibility": fail}
        worker_broker.put(note, ())
        ledger = worker_broker.work(clock=worker_clock, loop_count=1)
        assert ledger == taskhawk.Ledger(received=1, uncertain=1)
        assert worker_logs(caplog)[-1].endswith(" may run again: no route")

    def test_acknowledged_while_another_runs(self, worker_broker):
        """An acknowledgement is sent soon, also while a long task keeps the worker busy."""

        @taskhawk.task
        def note(number: int) -> None:
            if number == 2:
                worker_eventually(lambda: worker_broker.made("delete"))

        worker_broker.put(note, (1,), (2,))
        ledger = worker_broker.work(num_messages=2, clock=time.monotonic)
        assert ledger == taskhawk.Ledger(received=2, acked=2)
        assert [len(receipts) for _, receipts in worker_broker.made("delete")] == [1, 1]

    def test_two_queues_are_two_calls(self, worker_broker):
        """A batch call holds messages of one queue alone."""
        together, beats = threading.Barrier(2), []

        def receive(real: Any, *args: Any) -> Any:
            together.wait(WORKER_PATIENCE_S)
            return real()

        @taskhawk.task
        def note() -> None:
            worker_eventually(lambda: len(beats) == 2)  # until both are received

        taskhawk.configure(TASKHAWK_HEARTBEAT_HOOK=lambda: beats.append(1))
        worker_broker.faults["receive"] = receive
        for queue in ("A", "B"):
            worker_broker.put(note, (), queue=queue)
        ledger = worker_broker.work("A", "B", loop_count=1)
        assert ledger == taskhawk.Ledger(received=2, acked=2)
        deleted = [
            (queue, len(receipts)) for queue, receipts in worker_broker.made("delete")
        ]
        assert sorted(deleted) == [("A", 1), ("B", 1)]

    def test_refused_deletes_stop_receives(self, worker_broker):
        """Nothing is received while a full batch of acknowledgements does not get through."""
        received = []

        @taskhawk.task
        def note() -> None:
            received.append(1)

        def fail(real: Any, *args: Any) -> Any:
            if len(worker_broker.made("delete")) < 14:
                raise OSError("reset")
            at_last.append(len(received))
            return real()

        at_last: list[int] = []
        worker_broker.faults["delete"] = fail
        worker_broker.put(note, *[()] * 100)
        ledger = worker_broker.work(clock=time.monotonic)
        assert at_last[0] <= 20
        assert ledger == taskhawk.Ledger(received=100, acked=100)

    def test_hanging_delete_stops_receives(self, worker_broker):
        """Nor is it while a call that would delete them hangs, however quick the tasks are."""
        received: list[int] = []
        many, many_came = threading.Event(), []

        @taskhawk.task
        def note() -> None:
            received.append(1)
            if len(received) == 500:
                many.set()

        def hang(real: Any, *args: Any) -> Any:
            many_came.append(many.wait(1))  # a worker that is too slow passes
            return real()

        worker_broker.faults["delete"] = worker_first(1, hang)
        worker_broker.put(note, *[()] * 600)
        ledger = worker_broker.work(clock=time.monotonic, num_messages=10)
        assert many_came == [False]
        assert ledger == taskhawk.Ledger(received=600, acked=600)
        assert len(worker_broker.made("delete")) <= 72

    def test_delayed(self, worker_broker, worker_clock):
        """A retry makes the same message visible again after the delay, and then it is run."""
        attempts = []

        @taskhawk.task
        def later(metadata: Any = None) -> None:
            attempts.append((metadata.id, metadata.attempt))
            raise taskhawk.RetryException(delay_seconds=7)

        worker_broker.put(later, ())
        for _ in range(2):
            assert worker_broker.work(loop_count=1) == taskhawk.Ledger(
                received=1, retried=1
            )
            assert worker_broker.work(loop_count=1) == taskhawk.Ledger()
            worker_clock.now += 7
        assert [attempt for _, attempt in attempts] == [1, 2]
        assert len({message_id for message_id, _ in attempts}) == 1
        assert [s for _, ((_, s),) in worker_broker.made("change_visibility")] == [7, 7]

    def test_delay_clamped(self, worker_broker, worker_clock, caplog):
        """A delay is cut to what SQS has left of the 12 hours since the receive."""
        self._answer_late(worker_broker, worker_clock)

        @taskhawk.task
        def later() -> None:
            worker_clock.now += 3600
            raise taskhawk.RetryException(delay_seconds=50_000)

        worker_broker.put(later, ())
        ledger = worker_broker.work(
            loop_count=1, clock=worker_clock, visibility_timeout_s=WORKER_12_HOURS_S
        )
        assert ledger == taskhawk.Ledger(received=1, retried=1)
        assert worker_logs(caplog) == []  # it was not refused
        ((_, ((_, asked),)),) = worker_broker.made("change_visibility")
        assert 39_000 < asked < WORKER_12_HOURS_S - 3601

    def test_delay_fault(self, worker_broker, caplog):
        """A delay that fails for now is tried again; one that is refused for good is given up."""

        @taskhawk.task
        def later() -> None:
            raise taskhawk.RetryException(delay_seconds=7)

        fault = worker_first(1, worker_raise(OSError("reset")))
        worker_broker.faults["change_visibility"] = fault
        worker_broker.put(later, ())
        ledger = worker_broker.work(loop_count=1, clock=time.monotonic)
        assert ledger == taskhawk.Ledger(received=1, retried=1)
        assert len(worker_broker.made("change_visibility")) == 2
        worker_broker.faults["change_visibility"] = worker_refuse("Invalid", final=True)
        worker_broker.put(later, ())
        ledger = worker_broker.work(loop_count=1, clock=time.monotonic)
        assert ledger == taskhawk.Ledger(received=1, retried=1)
        failing, text = worker_logs(caplog)
        assert failing == "WORKER: can't set delays, goes on trying: reset"
        assert re.fullmatch(
            "message [-0-9a-f]{36} is visible again when its lease ends: refused by Invalid",
            text,
        )

    def test_left_to_its_timeout(self, worker_broker):
        """A failed run without a policy makes no call: the message reappears by itself."""

        @taskhawk.task
        def fail() -> None:
            raise ValueError("a failed run")

        worker_broker.put(fail, ())
        assert worker_broker.work(loop_count=1) == taskhawk.Ledger(
            received=1, retried=1
        )
        assert {name for name, _ in worker_broker.calls} == {"info", "receive"}
        assert worker_broker.depth(WORKER_QUEUE) == (0, 1, 0)

    def test_dead_lettered(self, worker_any):
        """A run that must not be repeated is copied to the dead-letter queue, then deleted."""

        @taskhawk.task(never_retry_on=(ValueError,))
        def fail() -> None:
            raise ValueError("a failed run")

        queue = worker_any.destination(taskhawk.Priority.default)
        worker_any.put(fail, (), queue=queue)
        ledger = worker_any.work(queue, loop_count=1)
        assert ledger == taskhawk.Ledger(received=1, dead_lettered=1)
        names = [name for name, _ in worker_any.calls]
        assert names.index("send") < names.index("delete")
        (letter,) = worker_any.receive(f"{queue}-DLQ", 1, 0, None, threading.Event())
        record = json.loads(letter.message_attributes["taskhawk.error"]["StringValue"])
        assert (record["type"], record["message"], record["attempt"]) == (
            "ValueError",
            "a failed run",
            1,
        )

    @pytest.mark.parametrize(
        ("faults", "why"),
        [
            (
                {"info": lambda real, q: real()._replace(dead_letter_queue=None)},
                "it has no dead-letter queue",
            ),
            ({"send": worker_raise(WorkerDenied("not allowed"))}, "not allowed"),
            (
                {"send": worker_refuse("InternalError", final=False)},
                "1 of 1 messages failed: InternalError",
            ),
        ],
        ids=["none", "denied", "refused"],
    )
    def test_dead_letter_not_copied(self, worker_broker, caplog, faults, why):
        """Where the copy is not confirmed, nothing is deleted, and the log says why."""

        @taskhawk.task(never_retry_on=(ValueError,))
        def fail() -> None:
            raise ValueError("a failed run")

        worker_broker.put(fail, ())
        worker_broker.faults |= faults
        assert worker_broker.work(loop_count=1) == taskhawk.Ledger(
            received=1, retried=1
        )
        assert worker_broker.made("delete") == []
        assert re.fullmatch(
            f"WORKER: message [-0-9a-f]{{36}} can't be dead-lettered and is left to the queue:"
            f" {why}",
            worker_logs(caplog)[-1],
        )

    # -- faults of the service

    def test_backs_off(self, worker_broker, caplog):
        """Receives that fail are repeated at growing, jittered intervals, and logged twice."""
        caplog.set_level(logging.INFO)
        at: dict[str, list[float]] = collections.defaultdict(list)
        event = threading.Event()

        def receive(real: Any, queue: str, *args: Any) -> Any:
            at[queue].append(time.monotonic())
            if len(at[queue]) < 3:
                raise OSError("no route to host")
            if all(len(times) >= 3 for times in list(at.values())):
                event.set()
            return real()

        worker_broker.faults["receive"] = receive
        queues = ["A", "B", "C", "D"]
        ledger = worker_broker.work(*queues, shutdown_event=event, until_empty=False)
        assert ledger == taskhawk.Ledger()
        firsts = [times[1] - times[0] for times in at.values()]
        assert len(firsts) == 4
        assert min(firsts) >= 0.5
        assert max(firsts) - min(firsts) > 0.001
        assert min(times[2] - times[1] for times in at.values()) >= 1
        assert sorted(worker_logs(caplog, logging.INFO))[:-1] == sorted(
            text
            for queue in queues
            for text in (
                f"{queue}: can't receive, goes on trying: OSError('no route to host')",
                f"{queue}: can receive again; tries that failed: 2",
            )
        )

    def test_stopped_while_backing_off(self, worker_broker):
        """A shutdown does not wait for the end of a pause between receives."""
        event = threading.Event()

        def fail(real: Any, *args: Any) -> Any:
            if len(worker_broker.made("receive")) == 2:
                stopped_at.append(time.monotonic())
                event.set()
            raise OSError("no route to host")

        stopped_at: list[float] = []
        worker_broker.faults["receive"] = fail
        assert worker_broker.work(shutdown_event=event) == taskhawk.Ledger()
        assert time.monotonic() - stopped_at[0] < 0.9  # the pause is 1 s at least

    @pytest.mark.parametrize(
        ("action", "code", "sentence"),
        [
            (
                "GetQueueUrl",
                "com.amazonaws.sqs#QueueDoesNotExist",
                (
                    "TASKHAWK-APP: there is no such queue here: make it, or check TASKHAWK_QUEUE,"
                    " AWS_REGION and the account (QueueDoesNotExist)"
                ),
            ),
            (
                "ReceiveMessage",
                "com.amazon.coral.service#AccessDeniedException",
                (
                    "TASKHAWK-APP: access denied: the IAM policy of these credentials does not"
                    " allow ReceiveMessage (AccessDeniedException)"
                ),
            ),
            (
                "ReceiveMessage",
                "com.amazon.coral.service#UnrecognizedClientException",
                (
                    "TASKHAWK-APP: AWS does not know these credentials: check AWS_ACCESS_KEY"
                    " (UnrecognizedClientException)"
                ),
            ),
            (
                "ReceiveMessage",
                "com.amazon.coral.service#SignatureDoesNotMatch",
                (
                    "TASKHAWK-APP: AWS refuses these credentials: check AWS_SECRET_KEY"
                    " (SignatureDoesNotMatch)"
                ),
            ),
            (
                "ReceiveMessage",
                "com.amazon.coral.service#InvalidSignatureException",
                (
                    "TASKHAWK-APP: AWS refuses these credentials: check AWS_SECRET_KEY"
                    " (InvalidSignatureException)"
                ),
            ),
        ],
    )
    def test_fatal_at_start(self, aws, caplog, action, code, sentence):
        """What only a person can mend ends the worker at its start, with one sentence."""
        aws.script(action, *[fault(code)] * 2)  # of each role's client, at most
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            taskhawk.listen_for_messages(taskhawk.Priority.default, loop_count=1)
        assert str(raised.value) == sentence
        assert worker_logs(caplog) == []

    def test_fatal_for_one_of_two(self, worker_broker):
        """One queue that is missing ends the worker of several; what it holds is released."""
        together, ran, missing = threading.Barrier(2), [], threading.Event()

        @taskhawk.task
        def wait() -> None:
            ran.append(1)
            missing.wait(WORKER_PATIENCE_S)

        def receive(real: Any, queue: str, *args: Any) -> Any:
            together.wait(WORKER_PATIENCE_S)
            if queue == "A":
                return real()
            worker_eventually(lambda: ran)
            missing.set()
            raise taskhawk.ConfigurationError("B: no such")

        worker_broker.faults["receive"] = receive
        worker_broker.put(wait, *[()] * 3, queue="A")
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            worker_broker.work("A", "B", num_messages=3)
        assert str(raised.value) == "B: no such"
        assert worker_broker.depth("A") == (3 - len(ran), 0, 0)

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            (
                {},
                (
                    "TASKHAWK-APP: no AWS region: set AWS_REGION, for example eu-west-1"
                    " (NoRegionError)"
                ),
            ),
            (
                {"AWS_REGION": "eu-west-1"},
                (
                    "TASKHAWK-APP: no AWS credentials: set AWS_ACCESS_KEY and AWS_SECRET_KEY, or"
                    " give botocore a profile or role; to try things out without AWS, set"
                    " TASKHAWK_BROKER to sqlite:///queue.db (NoCredentialsError)"
                ),
            ),
        ],
        ids=["region", "credentials"],
    )
    def test_fatal_without_aws(self, settings, sentence, caplog):
        """A worker without a region or credentials ends with that sentence, and no other."""
        taskhawk.configure(TASKHAWK_QUEUE="app", **settings)
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            taskhawk.listen_for_messages(taskhawk.Priority.default)
        assert str(raised.value) == sentence
        assert worker_logs(caplog) == []

    @pytest.mark.parametrize("code", ["ExpiredToken", "OverLimit"])
    def test_not_fatal_at_start(self, aws, code, caplog):
        """What passes by itself is waited out at the start too."""
        aws.script("ReceiveMessage", fault(f"com.amazonaws.sqs#{code}"))
        ledger = taskhawk.listen_for_messages(taskhawk.Priority.default, 1, 30, 1)
        assert ledger == taskhawk.Ledger()
        (text,) = worker_logs(caplog)
        assert text.startswith("TASKHAWK-APP: can't receive, goes on trying: ")
        assert f"({code})" in text

    def test_not_fatal_later(self, aws, caplog):
        """A queue that was there once, and is missing now, is waited for."""
        missing = fault("com.amazonaws.sqs#QueueDoesNotExist")
        aws.script("ReceiveMessage", passed, missing)
        taskhawk.listen_for_messages(taskhawk.Priority.default, 1, 30, 2)
        assert len(aws.asked("ReceiveMessage")) == 3
        assert len(worker_logs(caplog)) == 1

    # -- hooks

    def test_heartbeat(self, worker_broker, worker_clock):
        """The heartbeat follows each completed poll and each round of leases."""
        beats = []

        @taskhawk.task
        def slow() -> None:
            for beat in (1, 2):
                before = len(beats)
                worker_clock.now += 11
                worker_eventually(lambda n=before: len(beats) > n)
                assert len(worker_broker.made("change_visibility")) == beat

        def pass_the_time() -> None:
            while (
                len(worker_broker.made("receive")) < 2
            ):  # it waits after the one that fails
                worker_clock.now += 0.1
                time.sleep(0.001)

        taskhawk.configure(TASKHAWK_HEARTBEAT_HOOK=lambda: beats.append(1))
        worker_broker.faults["receive"] = worker_first(
            1, worker_raise(OSError("reset"))
        )
        worker_broker.put(slow, ())
        threading.Thread(target=pass_the_time).start()
        worker_broker.work(loop_count=1, clock=worker_clock)
        assert len(beats) == 3  # none for the poll that failed

    def test_grace_of_a_library(self, worker_broker):
        """When the grace is over, a run goes on, for it can't be killed; it is not the worker's."""
        stop, release = threading.Event(), threading.Event()

        @taskhawk.task
        def hang() -> None:
            stop.set()
            release.wait(WORKER_PATIENCE_S)

        worker_broker.put(hang, ())
        worker = taskhawk.Worker(
            worker_broker, [WORKER_QUEUE], shutdown_event=stop, grace_s=0.1, wait_s=0
        )
        thread = threading.Thread(target=worker.run)
        thread.start()
        assert worker._abandoned.wait(WORKER_PATIENCE_S)
        worker_eventually(lambda: worker.clock() > worker._keeper.gives_up_at)
        release.set()
        thread.join()
        assert worker.overdue.is_set()
        assert worker.ledger == taskhawk.Ledger(received=1, acked=1)

    def test_grace_of_what_waits(self, worker_broker):
        """What waits when the keeper gives up is released: the ledger knows what it was."""
        stop, release = threading.Event(), threading.Event()

        @taskhawk.task
        def first() -> None:
            """Do nothing."""

        @taskhawk.task
        def second() -> None:
            assert deleting.wait(WORKER_PATIENCE_S)
            stop.set()

        def hang(real: Any, *_args: Any) -> Any:
            deleting.set()
            assert release.wait(WORKER_PATIENCE_S)
            return real()

        deleting, told = threading.Event(), []

        def note(ledger: taskhawk.Ledger) -> None:
            told.append(str(ledger))
            release.set()

        worker_broker.faults["delete"] = hang
        worker_broker.put(first, ())
        worker_broker.put(second, *[()] * 9)
        worker = taskhawk.Worker(
            worker_broker,
            [WORKER_QUEUE],
            num_messages=10,
            shutdown_event=stop,
            grace_s=0.4,
            wait_s=0,
            on_overdue=note,
        )
        ledger = worker.run()
        assert told == [str(ledger)]
        assert ledger == taskhawk.Ledger(received=10, uncertain=2, released=8)

    @pytest.mark.parametrize("on_overdue", [False, True])
    def test_grace_of_a_delete(self, worker_broker, on_overdue):
        """A delete that is not answered within the grace is uncertain, and waited for no longer."""
        stop, release, told = threading.Event(), threading.Event(), []

        @taskhawk.task
        def last() -> None:
            stop.set()

        def hang(real: Any, *_args: Any) -> Any:
            assert release.wait(WORKER_PATIENCE_S)
            return real()

        def note(ledger: taskhawk.Ledger) -> None:
            told.append(dataclasses.replace(ledger))
            release.set()

        worker_broker.faults["delete"] = (
            hang if on_overdue else worker_raise(OSError("reset"))
        )
        worker_broker.put(last, ())
        worker = taskhawk.Worker(
            worker_broker,
            [WORKER_QUEUE],
            shutdown_event=stop,
            grace_s=0.4,
            wait_s=0,
            on_overdue=note if on_overdue else None,
        )
        assert worker.run() == taskhawk.Ledger(received=1, uncertain=1)
        assert told == [worker.ledger] * on_overdue
        assert (worker.unanswered, worker.overdue.is_set()) == (True, True)

    @pytest.mark.parametrize(
        ("grace_s", "wait_s"), [(None, 20), (25, 20), (10, 6), (2, 1)]
    )
    def test_grace_of_a_poll(self, worker_broker, grace_s, wait_s):
        """A poll ends before the grace does, so that it is waited out."""
        worker = taskhawk.Worker(worker_broker, [WORKER_QUEUE], grace_s=grace_s)
        assert worker.wait_s == wait_s

    def test_no_poll_after_the_lookup(self, worker_broker):
        """No poll begins after the shutdown, though the queue was looked up meanwhile."""
        stop = threading.Event()

        def info(real: Any, *_args: Any) -> Any:
            stop.set()
            return real()

        worker_broker.faults["info"] = info
        assert (
            worker_broker.work(shutdown_event=stop, until_empty=False)
            == taskhawk.Ledger()
        )
        assert worker_broker.made("receive") == []

    def test_worker_in_a_task(self, worker_broker):
        """A task may run a worker itself."""

        @taskhawk.task
        def inner() -> None:
            """Do nothing."""

        @taskhawk.task
        def outer() -> None:
            assert worker_broker.work("INNER") == taskhawk.Ledger(received=1, acked=1)

        worker_broker.put(outer, ())
        worker_broker.put(inner, (), queue="INNER")
        assert worker_broker.work() == taskhawk.Ledger(received=1, acked=1)

    def test_small_grace(self, worker_broker):
        """An idle worker ends within a grace that is shorter than what is kept for flushing."""
        stop = threading.Event()

        def receive(real: Any, *_args: Any) -> Any:
            stop.set()
            return real()

        worker_broker.faults["receive"] = receive
        worker = taskhawk.Worker(
            worker_broker, [WORKER_QUEUE], shutdown_event=stop, grace_s=3
        )
        assert worker.run() == taskhawk.Ledger()
        assert not worker.overdue.is_set()

    def test_no_grace_for_an_end_of_its_own(self, worker_broker):
        """The grace begins when the worker is told to stop, not when it has run its last task."""
        idle = threading.Event()
        overdue = []

        @taskhawk.task
        def slow() -> None:
            idle.wait(WORKER_PATIENCE_S)
            overdue.append(worker.overdue.wait(0.6))

        @taskhawk.task
        def quick() -> None:
            idle.set()

        worker_broker.put(slow, ())
        worker_broker.put(quick, ())
        options = {"concurrency": 2, "max_tasks": 2, "grace_s": 0.1, "num_messages": 2}
        worker = taskhawk.Worker(worker_broker, [WORKER_QUEUE], wait_s=0, **options)
        assert worker.run() == taskhawk.Ledger(received=2, acked=2)
        assert overdue == [False]

    @pytest.mark.parametrize("told", [True, False])
    def test_filter_fails(self, worker_broker, caplog, capsys, monkeypatch, told):
        """A filter of the application that fails on our log records changes nothing but the log."""
        monkeypatch.setattr(logging, "raiseExceptions", told)
        caplog.set_level(logging.DEBUG, "taskhawk")

        @taskhawk.task
        def fine() -> None:
            pass

        @taskhawk.task
        def broken() -> None:
            raise ValueError

        def no_request(record: logging.LogRecord) -> bool:
            raise AttributeError("no request")

        worker_broker.put(fine, ())
        worker_broker.put(broken, ())
        logging.getLogger("taskhawk").addFilter(no_request)
        try:
            ledger = worker_broker.work(loop_count=1, num_messages=2)
        finally:
            logging.getLogger("taskhawk").removeFilter(no_request)
        assert ledger == taskhawk.Ledger(received=2, acked=1, retried=1)
        assert ("AttributeError: no request\n" in capsys.readouterr().err) is told

    def test_log_place(self, caplog):
        """A log record has the place in this file where it was made."""
        taskhawk.configure(TASKHAWK_HEARTBEAT_HOOK=lambda: 1 / 0)
        taskhawk._call_safely("TASKHAWK_HEARTBEAT_HOOK")
        assert [record.funcName for record in caplog.records] == ["_call_safely"]

    def test_heartbeat_fails(self, worker_broker, caplog):
        """A heartbeat hook that fails is logged, no more."""
        taskhawk.configure(TASKHAWK_HEARTBEAT_HOOK=lambda: 1 / 0)
        assert worker_broker.work(loop_count=1) == taskhawk.Ledger()
        assert worker_logs(caplog) == ["TASKHAWK_HEARTBEAT_HOOK failed"]

    def test_liveness_file(self, worker_broker, tmp_path, caplog):
        """A file is touched wherever the heartbeat hook is called; one that can't be is logged."""
        file = tmp_path / "alive"
        worker_broker.work(loop_count=1, liveness_file=str(file))
        os.utime(file, (0, 0))
        worker_broker.work(loop_count=1, liveness_file=str(file))
        assert file.stat().st_mtime > time.time() - 60
        worker_broker.work(loop_count=1, liveness_file=str(tmp_path))
        (text,) = worker_logs(caplog)
        assert text == (
            "can't touch the liveness file: [Errno 21] Is a directory: "
            + repr(str(tmp_path))
        )

    def test_hooks(self, worker_any):
        """Hooks get the queue's name and the message; the error hook the exception."""
        seen = []

        def hook(*, queue_name: str, sqs_queue_message: Any) -> None:
            seen.append((threading.current_thread(), queue_name, sqs_queue_message))

        def on_error(
            *, exception: BaseException, message: taskhawk.Message | None
        ) -> None:
            seen.append((str(exception), message and message.args))

        @taskhawk.task
        def fail(number: int) -> None:
            if number:
                raise ValueError("a failed run")

        taskhawk.configure(
            worker_any.settings,
            TASKHAWK_PRE_PROCESS_HOOK=hook,
            TASKHAWK_POST_PROCESS_HOOK=hook,
            TASKHAWK_ERROR_HOOK=on_error,
        )
        worker_any.inner = taskhawk._brokers.broker()
        queue = worker_any.destination(taskhawk.Priority.default)
        for number in (0, 1):
            worker_any.put(fail, (number,), queue=queue)
            worker_any.work(queue, loop_count=1, wait_s=1)
        (thread, name, message), after, before, error = seen
        assert after == (thread, name, message)
        assert (thread, name, before[1]) == (threading.main_thread(), queue, queue)
        assert json.loads(message.body)["args"] == [0]
        assert message.attributes["ApproximateReceiveCount"] == "1"
        assert error == ("a failed run", [1])

    # -- shutdown and signals

    # -- concurrency

    def test_concurrency(self, worker_any):
        """With concurrency=N, N messages run at once, in threads, and no more are received."""
        together, most = threading.Barrier(3), [0]
        running, lock = [0], threading.Lock()

        @taskhawk.task
        def meet() -> None:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            together.wait(WORKER_PATIENCE_S)
            with lock:
                running[0] -= 1

        for _ in range(9):
            meet.dispatch()
        ledger = taskhawk.listen_for_messages(
            taskhawk.Priority.default, until_empty=True, concurrency=3
        )
        assert (ledger, most) == (taskhawk.Ledger(received=9, acked=9), [3])

    def test_slot_is_free(self, worker_broker):
        """A message is received while another runs, as long as a slot is free."""
        others = threading.Event()

        @taskhawk.task
        def slow() -> None:
            assert others.wait(WORKER_PATIENCE_S)

        @taskhawk.task
        def last() -> None:
            others.set()

        worker_broker.put(slow, ())
        worker_broker.put(last, ())
        ledger = worker_broker.work(concurrency=2)
        assert ledger == taskhawk.Ledger(received=2, acked=2)

    def test_interrupt_in_a_slot(self, worker_broker):
        """A KeyboardInterrupt that a task raises in a slot ends the worker, as it does in none."""
        both = threading.Barrier(2)

        @taskhawk.task
        def interrupt_in_the_other_slot() -> None:
            both.wait(WORKER_PATIENCE_S)
            if threading.current_thread() is not threading.main_thread():
                raise KeyboardInterrupt

        worker_broker.put(interrupt_in_the_other_slot, ())
        worker_broker.put(interrupt_in_the_other_slot, ())
        with pytest.raises(KeyboardInterrupt):
            worker_broker.work(concurrency=2, num_messages=2)
        assert worker_broker.inner.depth(WORKER_QUEUE) == (1, 0, 0)

    @pytest.mark.parametrize("concurrency", [1, 2])
    def test_max_tasks(self, worker_broker, concurrency):
        """A worker ends by itself after max_tasks runs, and receives no more than these."""
        ran = []

        @taskhawk.task
        def note() -> None:
            ran.append(1)

        worker_broker.put(note, *((),) * 10)
        options = {"loop_count": None, "max_tasks": 4, "num_messages": 6}
        ledger = worker_broker.work(concurrency=concurrency, **options)
        assert ledger == taskhawk.Ledger(received=4, acked=4)
        assert (len(ran), worker_broker.inner.depth(WORKER_QUEUE)) == (4, (6, 0, 0))

    def test_released_after_the_last_poll(self, worker_broker):
        """A poll in flight is waited out, what it brings is released too, and nothing before."""
        event, polling, held = threading.Event(), threading.Event(), threading.Event()

        @taskhawk.task
        def stop() -> None:
            event.set()
            held.set()

        def receive(real: Any, queue: str, *args: Any) -> Any:
            if queue == "A":
                assert polling.wait(WORKER_PATIENCE_S)
                return real()
            polling.set()
            assert held.wait(WORKER_PATIENCE_S)
            # Time enough for a keeper that releases too early.
            assert not early.wait(0.5)
            worker_broker.put(stop, (), queue="B")
            return real()

        def change(real: Any, *args: Any) -> Any:
            early.set()
            return real()

        early = threading.Event()
        worker_broker.faults |= {"receive": receive, "change_visibility": change}
        worker_broker.put(stop, (), (), (), queue="A")
        ledger = worker_broker.work(
            "A", "B", num_messages=3, shutdown_event=event, until_empty=False
        )
        assert ledger == taskhawk.Ledger(received=4, acked=1, released=3)
        assert [worker_broker.depth(queue).visible for queue in ("A", "B")] == [2, 1]

    def test_keyboard_interrupt(self, worker_any):
        """A KeyboardInterrupt from a task releases its message, and is raised again."""

        @taskhawk.task
        def interrupt() -> None:
            raise KeyboardInterrupt

        queue = worker_any.destination(taskhawk.Priority.default)
        worker_any.put(interrupt, (), (), queue=queue)
        with pytest.raises(KeyboardInterrupt):
            worker_any.work(queue, num_messages=2, wait_s=1)
        assert worker_any.depth(queue) == (2, 0, 0)

    def test_interrupted_by_the_application(self, worker_broker):
        """An application's handler may raise at any point: the message that runs is released."""

        class Halt(BaseException):
            pass

        def halt(*_: object) -> None:
            raise Halt

        def pre_process(**_: Any) -> None:
            """Do nothing: the interrupt comes outside the task."""

        @taskhawk.task(never_retry_on=(ValueError,))
        def fail() -> None:
            raise ValueError("a failed run")

        def send(real: Any, *args: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            worker_eventually(lambda: False)

        taskhawk.configure(TASKHAWK_PRE_PROCESS_HOOK=pre_process)
        worker_broker.put(fail, ())
        worker_broker.faults["send"] = send
        before = signal.signal(signal.SIGTERM, halt)
        try:
            worker = taskhawk.Worker(
                worker_broker, [WORKER_QUEUE], loop_count=1, wait_s=0.05
            )
            with pytest.raises(Halt):
                worker.run()
        finally:
            signal.signal(signal.SIGTERM, before)
        assert worker.ledger == taskhawk.Ledger(received=1, retried=1)
        assert worker_broker.depth(WORKER_QUEUE) == (1, 0, 0)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signal_in_process(self, worker_broker, number):
        """A signal ends the worker after the task, and Python's own handlers are back then."""
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

        @taskhawk.task
        def kill() -> None:
            during.append(signal.getsignal(number))
            os.kill(os.getpid(), number)

        during: list[Any] = []
        worker_broker.put(kill, (), ())
        ledger = worker_broker.work(until_empty=False)
        assert ledger == taskhawk.Ledger(received=1, acked=1)
        assert during[0] not in before
        assert (
            signal.getsignal(signal.SIGTERM),
            signal.getsignal(signal.SIGINT),
        ) == before

    def test_second_interrupt(self, worker_broker):
        """A second SIGINT waits for no poll; what waited and what ran is released."""
        polling, release, polled = (
            threading.Event(),
            threading.Event(),
            threading.Event(),
        )

        def receive(real: Any, queue: str, *_args: Any) -> Any:
            if queue == "A":
                assert polling.wait(WORKER_PATIENCE_S)
                return real()
            polling.set()
            release.wait(WORKER_PATIENCE_S)
            polled.set()
            return []

        @taskhawk.task
        def interrupt() -> None:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

        worker_broker.faults["receive"] = receive
        worker_broker.put(interrupt, (), (), queue="A")
        with pytest.raises(KeyboardInterrupt):
            worker_broker.work("A", "B", num_messages=2, until_empty=False)
        assert not polled.is_set()
        release.set()
        assert worker_broker.depth("A") == (2, 0, 0)

    def test_handler_of_the_application(self, worker_broker):
        """A handler of the application stays; with a shutdown event it works as in 1.4."""
        event = threading.Event()

        def own(*_: object) -> None:
            event.set()

        @taskhawk.task
        def kill() -> None:
            assert signal.getsignal(signal.SIGTERM) is own
            os.kill(os.getpid(), signal.SIGTERM)

        before = signal.signal(signal.SIGTERM, own)
        try:
            worker_broker.put(kill, (), ())
            ledger = worker_broker.work(shutdown_event=event, until_empty=False)
            assert signal.getsignal(signal.SIGTERM) is own
        finally:
            signal.signal(signal.SIGTERM, before)
        assert ledger == taskhawk.Ledger(received=1, acked=1)

    def test_no_handler_in_a_thread(self, worker_broker):
        """Outside the main thread no handler is installed."""
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        during, ledgers = [], []

        @taskhawk.task
        def look() -> None:
            during.append(
                (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
            )

        worker_broker.put(look, ())
        thread = threading.Thread(target=lambda: ledgers.append(worker_broker.work()))
        thread.start()
        thread.join(WORKER_PATIENCE_S)
        assert (during, ledgers) == ([before], [taskhawk.Ledger(received=1, acked=1)])

    @pytest.mark.skipif(
        sys.platform != "linux", reason="elsewhere a stack may not count"
    )
    def test_thread_that_cannot_start(self, tmp_path):
        """Where one of its threads can't start, no other goes on to receive: the worker ends."""
        code = """if True:
            import resource, threading, taskhawk
            gigabyte = threading.stack_size(1 << 30) or 1 << 30
            resource.setrlimit(resource.RLIMIT_AS, (2 * gigabyte + gigabyte // 2,) * 2)
            try:
                taskhawk.listen_for_messages(taskhawk.Priority)
            except RuntimeError as error:
                print(error, [thread.name for thread in threading.enumerate()])"""
        env = {"TASKHAWK_BROKER": f"sqlite:///{tmp_path}/queue.db"}
        assert (
            run_python(code, env=env).stdout
            == "can't start new thread ['MainThread']\n"
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signal(self, worker_shared, number, tmp_path):
        """A signalled listener ends its task, releases what waits, and exits with 0."""
        queue = worker_shared.destination(taskhawk.Priority.default)
        worker_shared.put(worker_job("wait"), *[(i,) for i in range(3)], queue=queue)
        options = ("--num-messages", "3", "--until-empty")
        with worker_process(tmp_path, worker_shared.settings, *options) as process:
            assert process.stdout.readline().startswith("started ")
            process.send_signal(number)
            output, errors = process.communicate("\n")
        assert process.returncode == 0, errors
        assert re.fullmatch(
            r"ended \d\n3 received, 1 acked, 0 retried, 0 dead-lettered, 2 released,"
            r" 0 uncertain\n",
            output,
        )
        assert worker_shared.depth(queue) == (2, 0, 0)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)]
    )
    @pytest.mark.parametrize("worker_shared", ["disk"], indirect=True)
    def test_second_signal(self, worker_shared, number, code, tmp_path):
        """A second signal ends the listener at once, in the middle of its task."""
        queue = worker_shared.destination(taskhawk.Priority.default)
        worker_shared.put(worker_job("wait"), (1,), queue=queue)
        with worker_process(tmp_path, worker_shared.settings) as process:
            assert process.stdout.readline() == "started 1\n"
            while process.poll() is None:  # two that come together count as one
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
            assert process.stdout.read() == ""
        assert process.returncode == code

    @pytest.mark.slow
    def test_killed(self, worker_shared, tmp_path):
        """A listener killed in the middle of a task and started again loses no message."""
        queue = worker_shared.destination(taskhawk.Priority.default)
        note, wait = worker_job("note"), worker_job("wait")
        for job, number in [(note, 0), (note, 1), (wait, 2), (note, 3)]:
            worker_shared.put(job, (number,), queue=queue)
        options = ("--visibility-timeout", "1", "--num-messages", "2", "--until-empty")
        with worker_process(tmp_path, worker_shared.settings, *options) as process:
            ran = list(iter(process.stdout.readline, "started 2\n"))
            process.kill()
        with worker_process(tmp_path, worker_shared.settings, *options) as process:
            output, errors = process.communicate("\n")
        assert process.returncode == 0, errors
        assert "started 2\nended 2\n" in output
        assert {*ran, *output.splitlines(keepends=True)} >= {
            f"noted {number}\n" for number in (0, 1, 3)
        }
        assert worker_shared.depth(queue) == (0, 0, 0)


class TestDeadLetterCopies:
    """What a worker gives up is copied to the dead letters, which say why it is there."""

    def test_error_attribute(self, broker):
        """One attribute says why, where, when, and at which attempt; the headers stay."""

        @taskhawk.task(name="mail.fail", never_retry_on=(ZeroDivisionError,))
        def fail():
            raise ZeroDivisionError("é" + "\0\ud800")

        fail.with_headers(n="5").dispatch()
        before = int(time.time())
        work_once(broker)
        (letter,) = receive_all(f"{broker.destination(Priority.default)}-DLQ")
        assert sorted(letter.message_attributes) == ["n", "taskhawk.error"]
        attribute = letter.message_attributes["taskhawk.error"]
        assert attribute["DataType"] == "String"
        record = json.loads(attribute["StringValue"])
        assert list(record) == [
            "type",
            "message",
            "traceback",
            "attempt",
            "worker",
            "time",
        ]
        assert record["type"] == "ZeroDivisionError"
        assert record["message"] == "é\0\ud800"
        assert record["traceback"].startswith("Traceback (most recent call last):\n")
        assert record["traceback"].endswith("ZeroDivisionError: é\0\ud800\n")
        assert record["attempt"] == 1
        assert record["worker"] == f"{socket.gethostname()}:{os.getpid()}"
        at = datetime.strptime(record["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        assert before <= at.timestamp() <= time.time()

    def test_error_replaced(self, sqlite):
        """A dead letter that came back by other means, and fails again, has the new error alone."""

        @taskhawk.task(name="mail.send")
        def send(number):
            raise taskhawk.StopRetry("new")

        old = {"taskhawk.error": {"DataType": "String", "StringValue": "old"}}
        sqlite.send("TASKHAWK-DEFAULT", [Outgoing(body_of(1), old)])
        work_once(sqlite)
        (letter,) = receive_all("TASKHAWK-DEFAULT-DLQ")
        (attribute,) = letter.message_attributes.values()
        assert json.loads(attribute["StringValue"])["message"] == "new"

    def test_ten_attributes(self, broker):
        """Of ten header attributes, one gives way to the error: the body has all."""

        @taskhawk.task(name="mail.fail", retry=taskhawk.fixed(1, max_retries=0))
        def fail():
            raise ZeroDivisionError

        headers = {f"h{number}": str(number) for number in range(10)}
        fail.with_headers(**headers).dispatch()
        assert work_once(broker).dead_lettered == 1
        (letter,) = receive_all(f"{broker.destination(Priority.default)}-DLQ")
        assert len(letter.message_attributes) == 10
        assert "taskhawk.error" in letter.message_attributes
        assert json.loads(letter.body)["headers"] == headers

    @pytest.mark.parametrize(
        ("room", "header", "kept"),
        [
            (0, "", []),
            (100, "", []),
            (700, "", ["taskhawk.error"]),
            (0, "h" * 700, ["taskhawk.error"]),
            (0, "h" * 50, ["h"]),
            (1500, "h" * 50, ["h", "taskhawk.error"]),
            (40_000, "h" * 50, ["h", "taskhawk.error"]),
        ],
    )
    def test_near_the_limit(self, sqlite, room, header, kept):
        """Near 1 MiB, traceback and headers give way, then the error, and never the message."""

        @taskhawk.task(name="mail.send")
        def send(text):
            raise taskhawk.StopRetry("why\n" + "é" * 8000 if room == 40_000 else "why")

        headers = {"h": header} if header else {}
        limit = 1_048_576
        send.with_headers(**headers).dispatch(filler(limit - room, **headers))
        assert work_once(sqlite).dead_lettered == 1
        (letter,) = receive_all("TASKHAWK-DEFAULT-DLQ")
        assert service_size(letter.body, letter.message_attributes) <= limit
        assert sorted(letter.message_attributes) == kept
        if "taskhawk.error" in kept:
            text = letter.message_attributes["taskhawk.error"]["StringValue"]
            record = json.loads(text)
            assert (record["type"], record["message"][:3]) == ("StopRetry", "why")
            assert len(text) <= 16_384
            end = "é\n" if room == 40_000 else "StopRetry: why\n"
            assert not record["traceback"] or record["traceback"].endswith(end)

    def test_no_dead_letter_queue(self, ministack, sqs_client, queue_name, caplog):
        """Without a dead-letter queue the message is left to its queue, and the log says so."""

        @taskhawk.task(name="mail.send")
        def send(number):
            raise taskhawk.StopRetry

        queue = f"TASKHAWK-{queue_name}"
        sqs_client(ministack).create_queue(QueueName=queue)
        configure_aws(ministack, queue_name)
        broker = taskhawk._brokers.broker()
        send.dispatch(1)
        assert work_once(broker) == taskhawk.Ledger(received=1, retried=1)
        assert broker.depth(queue) == Depth(0, 1, 0)
        (text,) = [text for text in caplog.messages if "can't be" in text]
        assert re.fullmatch(
            f"{queue}: message {MESSAGE_ID} can't be dead-lettered and is left to the queue:"
            " it has no dead-letter queue",
            text,
        )

    @pytest.mark.parametrize("action", ["SendMessage", "GetQueueAttributes"])
    def test_denied(self, scripted, queue_name, caplog, action):
        """Where the copy is denied, the message is left to its queue, and the log says so."""

        @taskhawk.task(name="mail.send")
        def send(number):
            raise taskhawk.StopRetry

        queue = f"TASKHAWK-{queue_name}"
        send.dispatch(1)
        scripted.always(action, fault("AccessDenied", status=403))
        broker = taskhawk._brokers.broker()
        assert work_once(broker) == taskhawk.Ledger(received=1, retried=1)
        scripted.answers.clear()
        assert broker.depth(queue) == Depth(0, 1, 0)
        (text,) = [text for text in caplog.messages if "can't be" in text]
        assert re.fullmatch(
            f"{queue}: message {MESSAGE_ID} can't be dead-lettered and is left to the queue:"
            rf" {queue}(-DLQ)?: {DENIED.format(action)} \(AccessDenied\)",
            text,
        )

    def test_fifo(self, ministack, sqs_client):
        """On FIFO queues a copy is deduplicated by its own MessageId: the body's id may repeat."""

        @taskhawk.task(name="mail.send")
        def send(number):
            raise taskhawk.StopRetry

        client, name = sqs_client(ministack), f"F{uuid.uuid4().hex[:8]}.fifo"
        fifo = {"FifoQueue": "true"}
        letters = client.create_queue(QueueName=f"letters-{name}", Attributes=fifo)[
            "QueueUrl"
        ]
        arn = f"arn:aws:sqs:us-east-1:000000000000:letters-{name}"
        redrive = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 5})
        url = client.create_queue(
            QueueName=name, Attributes={**fifo, "RedrivePolicy": redrive}
        )
        configure_aws(ministack, "x")
        body = body_of(1)
        ids = [
            client.send_message(
                QueueUrl=url["QueueUrl"],
                MessageBody=body,
                MessageGroupId="group",
                MessageDeduplicationId=f"once-{number}",
            )["MessageId"]
            for number in range(2)
        ]
        assert work_once(taskhawk._brokers.broker(), name).dead_lettered == 2
        found = client.receive_message(
            QueueUrl=letters,
            MaxNumberOfMessages=10,
            MessageSystemAttributeNames=["All"],
        )["Messages"]
        names = ("MessageDeduplicationId", "MessageGroupId")
        assert [
            tuple(message["Attributes"][name] for name in names) for message in found
        ] == [(sent, "group") for sent in ids]


class TestExtendVisibilityTimeout:
    """extend_visibility_timeout(), and the same by a task's metadata."""

    def test_sqs(self, scripted, mail):
        """It sets how long the message stays hidden, from now."""
        mail.with_priority(Priority.high).dispatch()
        (received,) = receive_all(Priority.high)
        taskhawk.extend_visibility_timeout(Priority.high, received.receipt_handle, 600)
        (payload,) = scripted.asked("ChangeMessageVisibilityBatch")
        assert payload["QueueUrl"].endswith("-HIGH-PRIORITY")
        assert payload["Entries"] == [
            {
                "Id": "0",
                "ReceiptHandle": received.receipt_handle,
                "VisibilityTimeout": 600,
            }
        ]

    def test_sqlite(self, tmp_path, mail):
        """SQLite does so too."""
        url = f"sqlite:///{tmp_path}/queue.db"
        taskhawk.configure(TASKHAWK_BROKER=url)
        mail.dispatch()
        (received,) = receive_all()
        taskhawk.extend_visibility_timeout(
            Priority.default, received.receipt_handle, 600
        )
        now = time.time()
        for seconds, expected in ((590, Depth(0, 1, 0)), (610, Depth(1, 0, 0))):
            later = taskhawk.SqliteBroker(url, clock=lambda: now + seconds)  # noqa: B023
            assert later.depth("TASKHAWK-DEFAULT") == expected
            later.close()

    def test_zero(self, broker, mail):
        """With 0, others may have the message at once."""
        mail.dispatch("a")
        (received,) = receive_all()
        assert receive_all() == []
        taskhawk.extend_visibility_timeout(Priority.default, received.receipt_handle, 0)
        assert received_args() == ["a"]

    def test_gone(self, scripted, mail):
        """A message that is not in flight any more is a PartialFailure."""
        mail.dispatch()
        (received,) = receive_all()
        no = refuse(0, code="MessageNotInflight", ours=True)
        scripted.script("ChangeMessageVisibilityBatch", no)
        with pytest.raises(taskhawk.PartialFailure) as raised:
            taskhawk.extend_visibility_timeout(
                Priority.default, received.receipt_handle, 600
            )
        assert str(raised.value) == "1 of 1 messages failed: MessageNotInflight"
        assert raised.value.result["Failed"] == [
            {"Id": "0", "Code": "MessageNotInflight", "Message": "no"}
        ]

    def test_received_again(self, sqlite, mail):
        """On SQLite, a message that was received again is not the first receiver's any more."""
        mail.dispatch()
        (received,) = receive_all()
        taskhawk.extend_visibility_timeout(Priority.default, received.receipt_handle, 0)
        (again,) = receive_all()
        with pytest.raises(taskhawk.PartialFailure) as raised:
            taskhawk.extend_visibility_timeout(
                Priority.default, received.receipt_handle, 0
            )
        assert str(raised.value) == "1 of 1 messages failed: ReceiptHandleIsInvalid"
        taskhawk.extend_visibility_timeout(Priority.default, again.receipt_handle, 0)
        assert len(receive_all()) == 1

    def test_metadata(self, broker):
        """A task changes how long its own message stays hidden, by its metadata."""

        @taskhawk.task(name="mail.again")
        def again(metadata):
            metadata.extend_visibility_timeout(0)

        again.dispatch()
        (received,) = receive_all()
        assert taskhawk.process(received) == (taskhawk.Fate.acknowledge, None, None)
        (seen,) = receive_all()
        assert (seen.message_id, seen.attempt) == (received.message_id, 2)

    def test_metadata_gone(self, scripted):
        """Where the message is lost, the task gets the PartialFailure, and may give up."""

        @taskhawk.task(name="mail.lost")
        def lost(metadata):
            metadata.extend_visibility_timeout(60)

        lost.dispatch()
        (received,) = receive_all()
        scripted.script(
            "ChangeMessageVisibilityBatch",
            refuse(0, code="MessageNotInflight", ours=True),
        )
        outcome = taskhawk.process(received)
        assert outcome.fate is taskhawk.Fate.retry
        assert str(outcome.error) == "1 of 1 messages failed: MessageNotInflight"

    def test_no_queue(self):
        """Where no queue has the message, in sync mode or behind SNS, it does nothing."""
        ran = []

        @taskhawk.task(name="mail.nowhere")
        def nowhere(metadata):
            metadata.extend_visibility_timeout(60)
            ran.append(metadata.receipt)

        taskhawk.configure(TASKHAWK_SYNC=True)
        nowhere.dispatch()
        nowhere.call(Message.new("mail.nowhere"), None)
        body = json.dumps(Message.new("mail.nowhere").as_dict())
        record = {"Sns": {"Message": body, "MessageId": "m", "MessageAttributes": {}}}
        taskhawk.process_messages_for_lambda_consumer({"Records": [record]})
        assert ran == [None, None, None]


class ChaosClock(Clock):
    """A clock that goes on as it is looked at."""

    def __call__(self) -> float:
        """Tell the time."""
        self.now += 0.02
        return self.now


class ChaosBroker(WorkerBroker):
    """A queue that fails at any call in the ways a service can, as its seed says.

    It knows what each receipt stands for, and notes what must not happen.
    """

    def __init__(self, inner: Any, clock: Clock, chance: random.Random) -> None:
        super().__init__(inner)
        self.clock, self.chance = clock, chance
        self.stop = threading.Event()
        self.crashed = False
        self.fault_rate = 0.0
        self.numbers: dict[str, int] = {}  # what each receipt stands for
        self.running: set[str] = set()  # the receipts that run
        self.done: set[int] = set()  # what ran to its end or was ignored
        self.dead: set[int] = set()  # what was copied to the dead-letter queue
        self.wrong: list[str] = []  # what must not happen, and did
        self.lock = (
            threading.Lock()
        )  # held while a fault is drawn: the seed decides in turn

    def noted(self, name: str, *args: Any) -> Any:
        """Meet a fault, or none."""
        real = functools.partial(getattr(self.inner, name), *args)
        if name in ("destination", "info"):
            return real()
        with self.lock:
            faulty = self.chance.random() < self.fault_rate
            fault = self.chance.choice(CHAOS_FAULTS) if faulty else "none"
            keep = self.chance.randrange(10)
        if (
            fault == "crash"
        ):  # from now on nothing reaches the queue, and what it holds times out
            self.crashed = True
        if self.crashed:
            self.stop.set()
            self.clock.now += WORKER_12_HOURS_S
            raise OSError("the worker was killed")
        if fault == "shutdown":
            self.stop.set()
        if fault == "slow":
            self.clock.now += 31  # past the visibility timeout
        if fault == "before":
            raise OSError("the connection was refused")
        answer = self.part(real, name, args, keep) if fault == "part" else real()
        self.note(name, args, answer)
        if fault == "after":
            raise OSError("the answer was lost")
        return answer

    def part(self, real: Any, name: str, args: tuple[Any, ...], keep: int) -> Any:
        """Refuse some entries of a batch call."""
        if name not in ("send", "delete", "change_visibility"):
            return real()
        entries = args[1]
        done = [entry for i, entry in enumerate(entries) if (keep + i) % 3]
        refused = [i for i in range(len(entries)) if not (keep + i) % 3]
        if done:
            assert getattr(self.inner, name)(args[0], done) == []
            self.note(name, (args[0], done), [])
        return [
            taskhawk.Refusal(i, "Chaos", "by chance", final=keep > 6) for i in refused
        ]

    def note(self, name: str, args: tuple[Any, ...], answer: Any) -> None:
        """Note what a call did, and what it must not have done."""
        if name == "receive":
            self.clock.now += (
                0 if answer else 61
            )  # delays pass while nothing is visible
            for received in answer:
                self.numbers[received.receipt_handle] = json.loads(received.body)[
                    "args"
                ][0]
        elif name == "send":
            refused = {refusal.index for refusal in answer}
            entries = [entry for i, entry in enumerate(args[1]) if i not in refused]
            self.dead |= {json.loads(entry.body)["args"][0] for entry in entries}
        elif name == "delete":
            numbers = {self.numbers[receipt] for receipt in args[1]}
            for number in numbers - self.done - self.dead:
                self.wrong.append(f"{number} was deleted and had not run")
        elif name == "change_visibility":
            for receipt, seconds in args[1]:
                if seconds < 30 and receipt in self.running:
                    self.wrong.append(
                        f"{self.numbers[receipt]} was released while it ran"
                    )


CHAOS_FAULTS = ("before", "after", "part", "part", "slow", "shutdown", "crash")


class TestSchedules:
    """Thousands of schedules of faults, and in none of them is a message lost."""

    @pytest.mark.parametrize("block", range(10))
    def test_nothing_is_lost(self, block, monkeypatch):
        """Whatever fails, each message runs or is a dead letter, and the ledgers balance."""
        monkeypatch.setattr(
            taskhawk, "_TICK_S", 0.0005
        )  # the clock goes on as it is looked at
        logging.disable(logging.CRITICAL)
        try:
            for seed in range(block * 200, block * 200 + 200):
                self.run(seed)
        finally:
            logging.disable(logging.NOTSET)

    def run(self, seed: int) -> None:
        """Let workers run into faults, one after another; the last one meets none."""
        chance, clock = random.Random(seed), ChaosClock(1_000_000)
        inner = taskhawk.SqliteBroker("sqlite://?max_receive_count=1000", clock=clock)
        broker = ChaosBroker(inner, clock, chance)

        taskhawk._registry.pop("chaos.job", None)

        @taskhawk.task(name="chaos.job", never_retry_on=(KeyError,))
        def job(number: int, metadata: Any = None) -> None:
            if metadata.receipt in broker.running:
                broker.wrong.append(f"{number} was started twice")
            broker.running.add(metadata.receipt)
            try:
                clock.now += chance.choice((0, 0, 0.1, 11, 31))
                draw = chance.random()
                if draw < 0.1:
                    raise KeyError(number)
                if draw < 0.2:
                    raise taskhawk.RetryException(
                        delay_seconds=chance.choice((0, 5, 60))
                    )
                if draw < 0.3:
                    raise ValueError(number)
                broker.done.add(number)
                if draw < 0.4:
                    raise taskhawk.IgnoreException
            finally:
                broker.running.discard(metadata.receipt)

        broker.put(job, *((number,) for number in range(12)))
        for fault_rate in (0.4, 0.2, 0.1, 0):
            broker.fault_rate, broker.crashed = fault_rate, False
            broker.stop = threading.Event()
            worker = taskhawk.Worker(
                broker,
                [WORKER_QUEUE],
                num_messages=chance.choice((1, 3, 10)),
                concurrency=chance.choice((1, 1, 3)),
                loop_count=None if fault_rate == 0 else chance.randrange(1, 6),
                shutdown_event=broker.stop,
                until_empty=fault_rate == 0,
                clock=clock,
                wait_s=0,
            )
            ledger = worker.run()
            assert ledger.balanced, f"seed {seed}: {ledger}"
            assert broker.wrong == [], f"seed {seed}"
            clock.now += (
                WORKER_12_HOURS_S  # what was left to its timeout is visible again
            )
        dead = inner.depth(f"{WORKER_QUEUE}-DLQ").visible
        assert broker.done | broker.dead == set(range(12)), f"seed {seed}"
        assert (inner.depth(WORKER_QUEUE), bool(dead)) == ((0, 0, 0), bool(broker.dead))
        inner.close()


# --- 16. isolation --------------------------------------------------------------------

ISOLATED_MODULE = """
import asyncio
import ctypes
import logging
import os
import pathlib
import signal
import sys
import threading
import taskhawk

HERE = pathlib.Path(__file__).parent
LOG = logging.getLogger("isolated")
LOOPS = set()
NEVER = taskhawk.fixed(0, max_retries=0)

def note(*words):
    with (HERE / "notes").open("a") as file:
        print(*words, file=file)

def before(sqs_queue_message, **_):
    note("before", os.getpid())

@taskhawk.task(isolate=True)
def pid():
    note(os.getpid(), os.getppid())

@taskhawk.task(time_limit=0.5, retry=NEVER)
def spin():
    sum(range(10**12))

@taskhawk.task(isolate=True, retry=NEVER)
def crash(how):
    {
        "exit": lambda: os._exit(3),
        "segfault": lambda: ctypes.string_at(0),
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "interrupt": lambda: signal.raise_signal(signal.SIGINT),
        "leave": lambda: sys.exit("bye"),
        "stray": lambda: os.write(int(sys.argv[-2]), b"stray\\n"),
    }[how]()

@taskhawk.task(isolate=True, retry=NEVER)
def fork(how):
    if forked := os.fork():
        note(forked)
        {"exit": lambda: os._exit(3), "wait": lambda: os.waitpid(forked, 0)}[how]()
    elif how == "exit":
        signal.alarm(10)
        signal.pause()
    LOG.warning("from %s", forked or "a fork")

@taskhawk.task(isolate=True)
def fail(how):
    raise {
        "retry": taskhawk.RetryException("not yet", delay_seconds=5),
        "ignore": taskhawk.IgnoreException("no need"),
        "log": taskhawk.LoggingException("it failed", extra={"order": 7}),
        "error": KeyError("lost"),
    }[how]

@taskhawk.task(isolate=True)
def log():
    LOG.debug("not this")
    LOG.warning("from %s", "afar", extra={"order": 8, "thing": LOG})

@taskhawk.task(isolate=True)
def log_fate():
    LOG.warning("a record, no answer", extra={"fate": "acknowledge"})

@taskhawk.task(isolate=True)
def linger():
    threading.Thread(target=threading.Event().wait).start()

@taskhawk.task(isolate=True)
async def wait(metadata):
    await asyncio.sleep(0)
    note("waited", metadata.attempt, metadata.queue)

@taskhawk.task(isolate=True, retry=NEVER)
def daemonize():
    os.closerange(3, 256)
    threading.Event().wait()

@taskhawk.task(isolate=True)
async def loop():
    LOOPS.add(asyncio.get_running_loop())
    note("loops", len(LOOPS))

@taskhawk.task(isolate=True)
def look(secret):
    argv = pathlib.Path("/proc/self/cmdline").read_text()
    environ = pathlib.Path("/proc/self/environ").read_text()
    note(secret in argv + environ, taskhawk.settings.AWS_SECRET_KEY == secret)
    note(os.environ.get("PYTHONPATH"), sys.stdin.read() == "")

@taskhawk.task(isolate=True)
def again(metadata):
    metadata.extend_visibility_timeout(0)
    note("again", metadata.attempt)
    raise taskhawk.RetryException

@taskhawk.task(isolate=True)
def hold():
    note(os.getpid())
    sum(range(10**12))

@taskhawk.task
def plain():
    note("plain", os.getpid())
"""


@pytest.fixture
def isolated_jobs(tmp_path, monkeypatch):
    """Return ISOLATED_MODULE, imported, with a queue in a file."""
    (tmp_path / "isolated.py").write_text(ISOLATED_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "isolated", raising=False)
    taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{tmp_path}/queue.db")
    yield importlib.import_module("isolated")
    sys.modules.pop("isolated")


def isolated_notes(module: Any) -> list[str]:
    """Return what the module's tasks noted."""
    return (module.HERE / "notes").read_text().splitlines()


def isolated_work(**options: Any) -> "taskhawk.Ledger":
    """Run a worker until the queue is empty."""
    return taskhawk.listen_for_messages(
        taskhawk.Priority.default,
        **{"until_empty": True, "num_messages": 10, **options},
    )


def is_gone(pid: int) -> bool:
    """Return whether a process has ended, be it reaped or not."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


class TestIsolation:
    """Room 11: a task may have a process of its own, which can be killed and may crash."""

    @pytest.mark.parametrize(("runs", "processes"), [(100, 1), (2, 2), (1, 3)])
    def test_process(self, isolated_jobs, runs, processes):
        """A child of the worker runs one message after another, up to max_tasks_per_child."""
        for _ in range(3):
            isolated_jobs.pid.dispatch()
        assert isolated_work(max_tasks_per_child=runs) == taskhawk.Ledger(
            received=3, acked=3
        )
        notes = [note.split() for note in isolated_notes(isolated_jobs)]
        assert {worker for _, worker in notes} == {str(os.getpid())}
        assert len({child for child, _ in notes}) == processes

    def test_all(self, isolated_jobs):
        """With isolate=True all tasks are isolated, and without it those that say so."""
        for isolate in (False, True):
            isolated_jobs.plain.dispatch()
            isolated_work(isolate=isolate)
        first, second = (note.split()[1] for note in isolated_notes(isolated_jobs))
        assert (first, second == first) == (str(os.getpid()), False)

    def test_slots(self, isolated_jobs):
        """Each slot has a child of its own."""
        for _ in range(20):
            isolated_jobs.pid.dispatch()
        assert isolated_work(concurrency=2) == taskhawk.Ledger(received=20, acked=20)
        assert (
            1 <= len({note.split()[0] for note in isolated_notes(isolated_jobs)}) <= 2
        )

    def test_time_limit(self, isolated_jobs, caplog):
        """A run is killed at its time limit, in whatever code it is."""
        isolated_jobs.spin.dispatch()
        assert isolated_work() == taskhawk.Ledger(received=1, dead_lettered=1)
        [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
        text = "isolated.spin ran longer than its time limit of 0.5 s"
        assert (type(record.exc_info[1]), str(record.exc_info[1])) == (
            taskhawk.TimeLimitExceeded,
            text,
        )

    @pytest.mark.parametrize(
        ("how", "end"),
        [
            ("exit", "exit code 3"),
            ("segfault", "signal 11"),
            ("kill", "signal 9"),
            ("stray", "exit code 0"),  # it wrote to the worker's socket
        ],
    )
    def test_crash(self, isolated_jobs, how, end, caplog):
        """A crash is a failed run with a clear error, and the worker goes on."""
        isolated_jobs.crash.dispatch(how)
        isolated_jobs.pid.dispatch()
        assert isolated_work() == taskhawk.Ledger(received=2, acked=1, dead_lettered=1)
        [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert type(record.exc_info[1]) is taskhawk.ChildCrashed
        assert str(record.exc_info[1]) == f"isolated.crash: its process ended: {end}"

    def test_crash_after_fork(self, isolated_jobs):
        """A child's crash is seen at once, though what its task forked goes on."""
        isolated_jobs.fork.dispatch("exit")
        assert isolated_work() == taskhawk.Ledger(received=1, dead_lettered=1)
        [forked] = map(int, isolated_notes(isolated_jobs))
        assert not is_gone(forked)
        os.kill(forked, signal.SIGKILL)

    def test_fork(self, isolated_jobs, caplog, capfd):
        """What a task forks neither answers nor logs in its name, though it returns as well."""
        isolated_jobs.fork.dispatch("wait")
        assert isolated_work() == taskhawk.Ledger(received=1, acked=1)
        [forked] = isolated_notes(isolated_jobs)
        texts = [r.getMessage() for r in caplog.records if r.name == "isolated"]
        assert texts == [f"from {forked}"]
        assert "from a fork" in capfd.readouterr().err

    def test_chatty_import(self, isolated_jobs):
        """A large message is not in the way of the many log records of an import."""
        lines = ["import logging, taskhawk", "for _ in range(2000):"]
        lines += ["    logging.warning('x' * 300)", "once = taskhawk.fixed(0, 0)"]
        lines += ["@taskhawk.task(time_limit=10, retry=once)", "def chatty(text): pass"]
        (isolated_jobs.HERE / "chatty.py").write_text("\n".join(lines))
        importlib.import_module("chatty").chatty.dispatch("x" * 900_000)
        assert isolated_work() == taskhawk.Ledger(received=1, acked=1)
        sys.modules.pop("chatty")

    def test_signals(self, isolated_jobs):
        """A child ignores the signals that are the worker's to handle; SystemExit is an error."""
        isolated_jobs.crash.dispatch("interrupt")
        isolated_jobs.crash.dispatch("leave")
        assert isolated_work() == taskhawk.Ledger(received=2, acked=1, dead_lettered=1)

    def test_died_while_idle(self, isolated_jobs):
        """A child that died between two messages is replaced, and no run failed."""
        isolated_jobs.pid.dispatch()
        isolated_jobs.pid.dispatch()
        broker = WorkerBroker(taskhawk._brokers.broker())

        def receive(real: Any, *args: Any) -> Any:
            if (isolated_jobs.HERE / "notes").exists():
                child = int(isolated_notes(isolated_jobs)[0].split()[0])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                worker_eventually(lambda: is_gone(child))
            return real()

        broker.faults["receive"] = receive
        assert broker.work("TASKHAWK-DEFAULT") == taskhawk.Ledger(received=2, acked=2)
        assert len({note.split()[0] for note in isolated_notes(isolated_jobs)}) == 2

    @pytest.mark.parametrize(
        ("how", "ledger", "level", "text"),
        [
            (
                "retry",
                {"retried": 1},
                "INFO",
                "asked to be retried and runs again in 5 s",
            ),
            ("ignore", {"acked": 1}, "INFO", "ignored"),
            ("log", {"retried": 1}, "ERROR", "it failed"),
            ("error", {"retried": 1}, "ERROR", "failed and is left to the queue"),
        ],
    )
    def test_errors(self, isolated_jobs, caplog, how, ledger, level, text):  # noqa: PLR0917
        """What a task raises means the same in a child, and its traceback is logged."""
        caplog.set_level(logging.INFO)
        isolated_jobs.fail.dispatch(how)
        done = isolated_work(until_empty=False, loop_count=1)
        assert done == taskhawk.Ledger(received=1, **ledger)
        record = next(r for r in caplog.records if r.getMessage().endswith(text))
        assert record.levelname == level
        assert getattr(record, "order", None) == (7 if how == "log" else None)
        assert ("in fail\n" in (record.exc_text or "")) == (level == "ERROR")

    def test_dead_letter(self, isolated_jobs):
        """The dead letter of an isolated run says what was raised in the child, and where."""
        isolated_jobs.crash.dispatch("kill")
        isolated_work()
        broker = taskhawk._brokers.broker()
        [dead] = broker.receive("TASKHAWK-DEFAULT-DLQ", 10, 0, None, threading.Event())
        error = json.loads(dead.message_attributes["taskhawk.error"]["StringValue"])
        assert (error["type"], error["message"]) == (
            "ChildCrashed",
            "isolated.crash: its process ended: signal 9",
        )

    def test_log(self, isolated_jobs, caplog):
        """A child's log records come out in the worker, with what they carry."""
        isolated_jobs.log.dispatch()
        isolated_work()
        [record] = [r for r in caplog.records if r.name == "isolated"]
        assert (record.getMessage(), record.levelname) == ("from afar", "WARNING")
        assert (record.order, record.thing) == (8, "<Logger isolated (WARNING)>")
        assert record.process != os.getpid()

    def test_filter_fails(self, isolated_jobs, capsys):
        """A filter that fails on a record of the task's changes nothing but the log."""

        def no_request(record: logging.LogRecord) -> bool:
            raise AttributeError("no request")

        logging.getLogger("isolated").addFilter(no_request)
        try:
            isolated_jobs.log.dispatch()
            assert isolated_work() == taskhawk.Ledger(received=1, acked=1)
        finally:
            logging.getLogger("isolated").removeFilter(no_request)
        assert "AttributeError: no request\n" in capsys.readouterr().err

    def test_log_like_an_answer(self, isolated_jobs, caplog):
        """Whatever a log record carries, it is not taken for the end of a run."""
        isolated_jobs.log_fate.dispatch()
        assert isolated_work() == taskhawk.Ledger(received=1, acked=1)
        [record] = [r for r in caplog.records if r.name == "isolated"]
        assert record.fate == "acknowledge"

    @pytest.mark.slow
    def test_lingers(self, isolated_jobs):
        """A child that does not end when it is told to is killed, and its slot goes on."""
        isolated_jobs.linger.dispatch()
        isolated_jobs.pid.dispatch()
        assert isolated_work(max_tasks_per_child=1) == taskhawk.Ledger(
            received=2, acked=2
        )

    def test_log_level(self, isolated_jobs, caplog):
        """The worker's levels say which of them."""
        caplog.set_level("ERROR", "isolated")
        isolated_jobs.log.dispatch()
        isolated_work()
        assert [r for r in caplog.records if r.name == "isolated"] == []

    def test_no_worker(self):
        """A child whose worker died before it could tell ends at once."""
        assert run_python(["-m", "taskhawk", "_child", "0", "1"]).returncode == 1

    def test_closes_everything(self, isolated_jobs, caplog):
        """A task that closes what it did not open, and goes on, is killed: its slot goes on too."""
        isolated_jobs.daemonize.dispatch()
        isolated_jobs.pid.dispatch()
        ledger = isolated_work()
        assert ledger == taskhawk.Ledger(received=2, acked=1, dead_lettered=1)
        text = "ChildCrashed: isolated.daemonize: its process ended: signal 9"
        assert text in caplog.text

    def test_started_too_late(self, isolated_jobs):
        """A child that is started as the grace ends is not waited for, and runs nothing."""
        given_up = threading.Event()
        child = taskhawk._Child(
            taskhawk._start_of_children(everything=True), 1, given_up
        )
        isolated_jobs.pid.dispatch()
        (received,) = queued()
        assert child.takes(received)
        given_up.set()
        assert child.process(received) is None
        assert child._process is None
        assert not (isolated_jobs.HERE / "notes").exists()

    def test_async_loop(self, isolated_jobs):
        """Coroutines of a child share an event loop, as those of a slot do."""
        isolated_jobs.loop.dispatch_many([(), ()])
        assert isolated_work() == taskhawk.Ledger(received=2, acked=2)
        assert isolated_notes(isolated_jobs) == ["loops 1", "loops 1"]

    @pytest.mark.slow
    def test_time_limit_and_imports(self, isolated_jobs):
        """A time limit is the run's alone: a child may take longer to import the task's module."""
        source = (
            "import sys, taskhawk, time; time.sleep(2.5 * ('_child' in sys.argv))\n"
        )
        source += "@taskhawk.task(time_limit=2)\ndef quick(): pass\n"
        (isolated_jobs.HERE / "slow_to_import.py").write_text(source)
        importlib.import_module("slow_to_import").quick.dispatch()
        assert isolated_work() == taskhawk.Ledger(received=1, acked=1)
        sys.modules.pop("slow_to_import")

    def test_async(self, isolated_jobs):
        """A coroutine function can be isolated, and metadata is as in the worker."""
        isolated_jobs.wait.dispatch()
        assert isolated_work().acked == 1
        assert isolated_notes(isolated_jobs) == ["waited 1 TASKHAWK-DEFAULT"]

    def test_settings(self, isolated_jobs, monkeypatch):
        """Settings reach a child through its pipe alone."""
        monkeypatch.setenv("PYTHONPATH", "/some/where")
        url = taskhawk.settings.TASKHAWK_BROKER
        secrets = {"AWS_ACCESS_KEY": "key", "AWS_SECRET_KEY": "a-very-secret-thing"}
        taskhawk.configure(TASKHAWK_BROKER=url, **secrets)
        isolated_jobs.look.dispatch("a-very-secret-thing")
        assert isolated_work().acked == 1
        assert isolated_notes(isolated_jobs) == ["False True", "/some/where True"]

    def test_act_on_the_queue(self, isolated_jobs):
        """A task in a child can change its message on the queue."""
        isolated_jobs.again.dispatch()
        isolated_work(until_empty=False, loop_count=2)
        assert isolated_notes(isolated_jobs) == ["again 1", "again 2"]

    def test_memory(self, isolated_jobs):
        """Tasks can be isolated where the queue is in memory."""
        taskhawk.configure(TASKHAWK_BROKER="sqlite://")
        isolated_jobs.pid.dispatch()
        assert isolated_work().acked == 1

    def test_hooks(self, isolated_jobs):
        """Hooks run in the child, by their dotted paths."""
        url = taskhawk.settings.TASKHAWK_BROKER
        taskhawk.configure(
            TASKHAWK_BROKER=url, TASKHAWK_PRE_PROCESS_HOOK=isolated_jobs.before
        )
        isolated_jobs.pid.dispatch()
        assert isolated_work().acked == 1
        before, after = isolated_notes(isolated_jobs)
        assert before.split()[1] == after.split()[0] != str(os.getpid())

    def test_hook_without_a_path(self, isolated_jobs):
        """A hook that a child can't import is refused before anything is received."""
        hook = functools.partial(print)
        taskhawk.configure(TASKHAWK_BROKER="sqlite://", TASKHAWK_POST_PROCESS_HOOK=hook)
        text = "TASKHAWK_POST_PROCESS_HOOK: where tasks are isolated, expected a function with a"
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            isolated_work()
        assert str(raised.value) == f"{text} dotted path, got {hook!r}"

    def test_main(self, tmp_path):
        """An isolated task of __main__ is refused: a child does not import that."""
        (tmp_path / "script.py").write_text(
            "import taskhawk\n"
            "taskhawk.configure(TASKHAWK_BROKER='sqlite://')\n"
            "@taskhawk.task(isolate=True)\n"
            "def job(): pass\n"
            "taskhawk.listen_for_messages(taskhawk.Priority.default)\n"
        )
        result = run_python(["script.py"], cwd=tmp_path)
        text = "script.job: a task of __main__ can't be isolated: move it to a module"
        assert result.stderr.splitlines()[-1] == f"taskhawk.ConfigurationError: {text}"

    def test_malformed(self, isolated_jobs):
        """What is no valid message of an isolated task never reaches a child."""
        broker = taskhawk._brokers.broker()
        broker.send("TASKHAWK-DEFAULT", [taskhawk.Outgoing("{}", {})])
        ledger = isolated_work(until_empty=False, loop_count=1)
        assert ledger == taskhawk.Ledger(received=1, retried=1)

    def test_broken_module(self, isolated_jobs):
        """Where a child can't import the tasks, each run of it fails, and nothing is lost."""
        (isolated_jobs.HERE / "isolated.py").write_text("1 / 0")
        isolated_jobs.pid.dispatch()
        ledger = isolated_work(until_empty=False, loop_count=1)
        assert ledger == taskhawk.Ledger(received=1, retried=1)

    def test_no_process(self, isolated_jobs, caplog):
        """Where no process can be started, the run has failed, and the worker goes on."""
        isolated_jobs.pid.dispatch()
        import resource

        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        broker = WorkerBroker(taskhawk._brokers.broker())

        def receive(real: Any, *args: Any) -> Any:
            received = real()
            used = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
            free = min(set(range(1000)) - used)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
            return received

        broker.faults["receive"] = receive
        try:
            ledger = broker.work("TASKHAWK-DEFAULT", loop_count=1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert ledger == taskhawk.Ledger(received=1, retried=1)
        assert "Too many open files" in caplog.text

    @pytest.mark.skipif(
        sys.platform != "linux", reason="elsewhere it ends with its message"
    )
    def test_orphan(self, isolated_jobs):
        """On Linux no child outlives a worker that is killed, even if it holds the GIL."""
        isolated_jobs.hold.dispatch()
        url = taskhawk.settings.TASKHAWK_BROKER
        with worker_process(
            isolated_jobs.HERE, {"TASKHAWK_BROKER": url}, "isolated"
        ) as worker:
            pid = worker_eventually(
                (isolated_jobs.HERE / "notes").exists
            ) and worker_eventually(
                lambda: (isolated_jobs.HERE / "notes").read_text().strip()
            )
            worker.kill()
            worker_eventually(lambda: is_gone(int(pid)))

    @pytest.mark.parametrize("concurrency", [1, 2])
    def test_grace(self, isolated_jobs, concurrency):
        """When the grace is over, isolated runs are killed, and their messages visible at once."""
        isolated_jobs.hold.dispatch()
        stop = threading.Event()

        def tell() -> None:
            worker_eventually((isolated_jobs.HERE / "notes").exists)
            stop.set()

        threading.Thread(target=tell).start()
        options = {
            "until_empty": False,
            "shutdown_event": stop,
            "concurrency": concurrency,
        }
        ledger = isolated_work(grace_s=0.1, **options)
        assert ledger == taskhawk.Ledger(received=1, retried=1)
        assert taskhawk._brokers.broker().depth("TASKHAWK-DEFAULT") == (1, 0, 0)

    def test_sync(self, isolated_jobs):
        """Sync mode runs an isolated task where it is."""
        taskhawk.configure(TASKHAWK_SYNC=True)
        isolated_jobs.pid.dispatch()
        assert isolated_notes(isolated_jobs)[0].split()[0] == str(os.getpid())


# --- 17. Lambda -----------------------------------------------------------------------

LAMBDA_ARN = "arn:aws:sqs:us-east-1:123456789012:TASKHAWK-DEV-MYAPP"
LAMBDA_FIFO_ARN = f"{LAMBDA_ARN}.fifo"
LAMBDA_DENIED = f"TASKHAWK-DEV-MYAPP: {DENIED} (AccessDenied)"


def lambda_sqs_record(body: Any, name: str, **attributes: str) -> dict[str, Any]:
    """Return a record of an SQS event, as AWS writes it."""
    return {
        "messageId": name,
        "receiptHandle": f"receipt of {name}",
        "body": body,
        "attributes": {
            "ApproximateReceiveCount": "1",
            "SentTimestamp": "1545082649183",
            "SenderId": "AIDAIENQZJOLO23YVJ4VO",
            "ApproximateFirstReceiveTimestamp": "1545082649185",
            **attributes,
        },
        "messageAttributes": {
            "request_id": {
                "stringValue": "1234",
                "stringListValues": [],
                "binaryListValues": [],
                "dataType": "String",
            }
        },
        "md5OfBody": "e4e68fb7bd0e697a0ae8f1bb342846b3",
        "eventSource": "aws:sqs",
        "eventSourceARN": LAMBDA_ARN,
        "awsRegion": "us-east-1",
    }


def lambda_sns_record(body: Any, name: str) -> dict[str, Any]:
    """Return a record of an SNS event, as AWS writes it."""
    topic = "arn:aws:sns:us-east-1:123456789012:taskhawk-dev-myapp"
    return {
        "EventVersion": "1.0",
        "EventSubscriptionArn": f"{topic}:21be56ed-a058-49f5-8c98-aedd2564c486",
        "EventSource": "aws:sns",
        "Sns": {
            "SignatureVersion": "1",
            "Timestamp": "2019-01-02T12:45:07.000Z",
            "Signature": "tcc6faL2yUC6dgZdmrwh1Y4cGa/ebXEkAi6RibDsvpi+tE/1+82j...65r==",
            "SigningCertUrl": "https://sns.us-east-1.amazonaws.com/SimpleNotificationService.pem",
            "MessageId": name,
            "Message": body,
            "MessageAttributes": {"request_id": {"Type": "String", "Value": "1234"}},
            "Type": "Notification",
            "UnsubscribeUrl": "https://sns.us-east-1.amazonaws.com/?Action=Unsubscribe",
            "TopicArn": topic,
            "Subject": None,
        },
    }


LAMBDA_RECORDS = {"SNS": lambda_sns_record, "SQS": lambda_sqs_record}


def lambda_event(
    *calls: Any, make: Callable[..., Any] = lambda_sqs_record
) -> dict[str, Any]:
    """Return an event with a message for the task lambda.run for each of the arguments."""
    bodies = (processing_body("lambda.run", args=[call]) for call in calls)
    return {"Records": [make(body, f"m{n}") for n, body in enumerate(bodies, 1)]}


@pytest.fixture
def lambda_sqs(aws: ScriptedAws) -> ScriptedAws:
    """Return an SQS that accepts everything, and configure taskhawk as in a Lambda function."""
    taskhawk.configure(AWS_KEYS, AWS_ENDPOINT_SQS=aws.url, IS_LAMBDA_APP=True)
    return aws


def lambda_entries(
    sqs: ScriptedAws, action: str, *keys: str
) -> list[list[tuple[Any, ...]]]:
    """Return what each batch call of this action had in its entries."""
    return [
        [tuple(entry[key] for key in keys) for entry in data["Entries"]]
        for data in sqs.asked(action)
    ]


@pytest.fixture
def lambda_runs() -> list[Any]:
    """Register the task lambda.run, and return the list of what it was called with.

    It raises what LAMBDA_ENDS has under its argument.
    """
    runs: list[Any] = []

    @taskhawk.task(name="lambda.run")
    def run(what: Any) -> None:
        runs.append(what)
        if what in LAMBDA_ENDS:
            raise LAMBDA_ENDS[what]

    return runs


LAMBDA_ENDS: dict[Any, BaseException] = {
    "fail": ValueError("no"),
    "fail too": OSError("nor this"),
    "exit": SystemExit(3),
    "give up": taskhawk.StopRetry("enough"),
    "later": taskhawk.RetryException("later"),
    "in 90.5 s": taskhawk.RetryException(delay_seconds=90.5),
    "at once": taskhawk.RetryException(delay_seconds=0),
    "in a month": taskhawk.RetryException(delay_seconds=2_592_000),
    "ignore": taskhawk.IgnoreException(),
    "fail, and say so": taskhawk.LoggingException("no", {"order": 7}),
}
LAMBDA_FAILURES = ["fail", "exit", "give up", "later", "in 90.5 s", "fail, and say so"]
LAMBDA_BAD = lambda_sqs_record(None, "bad")
LAMBDA_MALFORMED: dict[str, Any] = {
    "null": None,
    "text": "text",
    "empty": {},
    "Sns null": {"Sns": None},
    "Sns empty": {"Sns": {}},
    "Sns of nulls": {"Sns": {"Message": None, "MessageId": None}},
    "Kinesis": {"kinesis": {"data": "e30="}},
    "body null": LAMBDA_BAD,
    "messageAttributes null": {**LAMBDA_BAD, "messageAttributes": None},
    "messageAttributes of numbers": {**LAMBDA_BAD, "messageAttributes": {"a": 1}},
    "messageAttributes an array": {**LAMBDA_BAD, "messageAttributes": ["a"]},
    "attributes null": {**LAMBDA_BAD, "attributes": None},
    "attributes text": {**LAMBDA_BAD, "attributes": "text"},
    "receive count text": lambda_sqs_record(
        None, "bad", ApproximateReceiveCount="many"
    ),
    "ARN text": {**LAMBDA_BAD, "eventSourceARN": "text"},
    "ARN a number": {**LAMBDA_BAD, "eventSourceARN": 5},
}


def lambda_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the texts of the warnings, without botocore's remark on its attempts."""
    texts = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    return [text.replace(" (reached max retries: 0)", "") for text in texts]


class LambdaTime:
    """Lambda's context: its time passes as the tasks say."""

    def __init__(self, remaining_ms: int) -> None:
        self.remaining_ms = remaining_ms

    def get_remaining_time_in_millis(self) -> int:
        """Return the time until Lambda ends the function."""
        return self.remaining_ms


class TestLambda:
    """An event's failures always raise, or are in the answer."""

    @pytest.mark.parametrize("kind", LAMBDA_RECORDS)
    def test_all_succeeded(self, kind, lambda_runs, caplog):
        """Where all succeeded nothing is called: on this endpoint's port nobody listens."""
        endpoint = f"http://127.0.0.1:{free_port()}"
        taskhawk.configure(
            AWS_KEYS, AWS_ENDPOINT_SQS=endpoint, AWS_ENDPOINT_SNS=endpoint
        )
        event = lambda_event(1, "ignore", 2, make=LAMBDA_RECORDS[kind])
        assert taskhawk.process_messages_for_lambda_consumer(event) is None
        assert lambda_runs == [1, "ignore", 2]
        assert caplog.records == []

    def test_all_succeeded_by_the_calls(self, lambda_sqs, lambda_runs):
        """Lambda deletes what succeeded, whatever the kind of answer that it wants."""
        event = lambda_event(1, "ignore")
        assert taskhawk.process_messages_for_lambda_consumer(event) is None
        answer = taskhawk.process_messages_for_lambda_consumer(
            event, partial_batch=True
        )
        assert answer == {"batchItemFailures": []}
        assert lambda_sqs.calls == []

    def test_embedded_broker(self, lambda_runs):
        """A handler can be tried out on a machine whose broker is the embedded one, without AWS."""
        taskhawk.configure(TASKHAWK_BROKER="sqlite://")
        with pytest.raises(ValueError, match=r"^no$"):
            taskhawk.process_messages_for_lambda_consumer(lambda_event(1, "fail"))
        assert lambda_runs == [1, "fail"]

    @pytest.mark.parametrize("kind", LAMBDA_RECORDS)
    @pytest.mark.parametrize("end", LAMBDA_FAILURES)
    def test_one_failed(self, kind, end, lambda_sqs, lambda_runs):
        """One failure raises that very exception, after the others were run."""
        event = lambda_event(1, end, 2, make=LAMBDA_RECORDS[kind])
        with pytest.raises(type(LAMBDA_ENDS[end])) as caught:
            taskhawk.process_messages_for_lambda_consumer(event)
        assert caught.value is LAMBDA_ENDS[end]
        assert lambda_runs == [1, end, 2]

    @pytest.mark.parametrize("kind", LAMBDA_RECORDS)
    def test_several_failed(self, kind, lambda_sqs, lambda_runs):
        """Several failures raise a group of those very exceptions, in the order of the event."""
        event = lambda_event(
            "fail", 1, "give up", "fail too", make=LAMBDA_RECORDS[kind]
        )
        with pytest.raises(ExceptionGroup) as caught:
            taskhawk.process_messages_for_lambda_consumer(event)
        ends = ("fail", "give up", "fail too")
        assert caught.value.exceptions == tuple(LAMBDA_ENDS[end] for end in ends)
        assert str(caught.value) == "several runs failed (3 sub-exceptions)"
        assert lambda_runs == ["fail", 1, "give up", "fail too"]

    def test_several_failed_and_one_wants_to_exit(self, lambda_sqs, lambda_runs):
        """A SystemExit among several failures makes it a BaseExceptionGroup."""
        with pytest.raises(BaseExceptionGroup) as caught:
            taskhawk.process_messages_for_lambda_consumer(lambda_event("fail", "exit"))
        assert caught.value.exceptions == (LAMBDA_ENDS["fail"], LAMBDA_ENDS["exit"])

    def test_partial_batch(self, lambda_sqs, lambda_runs):
        """partial_batch=True answers what failed instead, and leaves the deletes to Lambda."""
        event = lambda_event(1, *LAMBDA_FAILURES, 2)
        answer = taskhawk.process_messages_for_lambda_consumer(
            event, partial_batch=True
        )
        assert answer == {
            "batchItemFailures": [
                {"itemIdentifier": f"m{n}"} for n in (2, 3, 4, 5, 6, 7)
            ]
        }
        assert lambda_runs == [1, *LAMBDA_FAILURES, 2]
        assert lambda_entries(lambda_sqs, "DeleteMessageBatch", "ReceiptHandle") == []

    def test_partial_batch_of_sns(self, lambda_runs):
        """SNS has no partial batches, and would take the answer for success: a failure raises."""
        event = lambda_event("fail", 1, make=lambda_sns_record)
        with pytest.raises(ValueError, match=r"^no$"):
            taskhawk.process_messages_for_lambda_consumer(event, partial_batch=True)
        assert lambda_runs == ["fail", 1]

    def test_succeeded_are_deleted(self, lambda_sqs, lambda_runs):
        """What succeeded is deleted before a failure is raised: ten a call, nothing looked up."""
        event = lambda_event("fail", *range(21), "give up")
        with pytest.raises(ExceptionGroup, match="several runs failed"):
            taskhawk.process_messages_for_lambda_consumer(event)
        assert lambda_sqs.actions == ["DeleteMessageBatch"] * 3
        url = f"{lambda_sqs.url}/123456789012/TASKHAWK-DEV-MYAPP"
        assert {call.data["QueueUrl"] for call in lambda_sqs.calls} == {url}
        deleted = lambda_entries(lambda_sqs, "DeleteMessageBatch", "ReceiptHandle")
        assert [len(entries) for entries in deleted] == [10, 10, 1]
        assert list(itertools.chain(*deleted)) == [
            (f"receipt of m{n}",) for n in range(2, 23)
        ]

    def test_succeeded_are_deleted_from_a_real_queue(
        self, ministack, sqs_client, queue_name, lambda_runs
    ):
        """On a real queue the failed message alone is left, or nothing but the answer is."""
        client = sqs_client(ministack)
        url = client.create_queue(QueueName=f"TASKHAWK-{queue_name}")["QueueUrl"]
        names = [
            "QueueArn",
            "ApproximateNumberOfMessages",
            "ApproximateNumberOfMessagesNotVisible",
        ]

        def attributes() -> list[str]:
            found = client.get_queue_attributes(QueueUrl=url, AttributeNames=names)[
                "Attributes"
            ]
            return [found[name] for name in names]

        sent = lambda_event(1, "fail", 2, "ignore")["Records"]
        for record in sent:
            client.send_message(QueueUrl=url, MessageBody=record["body"])
        received: list[Any] = []
        while len(received) < len(sent):
            received += client.receive_message(
                QueueUrl=url,
                MaxNumberOfMessages=10,
                MessageSystemAttributeNames=["All"],
            ).get("Messages", [])
        keys = {
            "messageId": "MessageId",
            "receiptHandle": "ReceiptHandle",
            "body": "Body",
        }
        event = {
            "Records": [
                {
                    **{theirs: message[ours] for theirs, ours in keys.items()},
                    "attributes": message["Attributes"],
                    "messageAttributes": {},
                    "eventSource": "aws:sqs",
                    "eventSourceARN": attributes()[0],
                }
                for message in received
            ]
        }
        assert attributes()[1:] == ["0", "4"]
        taskhawk.configure(AWS_KEYS, AWS_ENDPOINT_SQS=ministack)
        with pytest.raises(ValueError, match=r"^no$"):
            taskhawk.process_messages_for_lambda_consumer(event)
        assert attributes()[1:] == ["0", "1"]
        assert sorted(map(str, lambda_runs)) == ["1", "2", "fail", "ignore"]
        event["Records"] = [r for r in event["Records"] if '"fail"' in r["body"]]
        event["Records"][0]["body"] = processing_body("lambda.run", args=["at once"])
        answer = taskhawk.process_messages_for_lambda_consumer(
            event, partial_batch=True
        )
        failed = event["Records"][0]["messageId"]
        assert answer == {"batchItemFailures": [{"itemIdentifier": failed}]}
        (again,) = client.receive_message(QueueUrl=url)["Messages"]
        assert again["MessageId"] == failed

    @pytest.mark.parametrize("how", ["denied", "refused"])
    def test_succeeded_cannot_be_deleted(self, how, lambda_sqs, lambda_runs, caplog):
        """Where the delete fails the failure is raised all the same, and a warning says so."""
        if how == "denied":
            answer = fault("AccessDenied", status=403)
            why = LAMBDA_DENIED.format("DeleteMessage")
        else:
            answer = refuse(0, 2, code="ReceiptHandleIsInvalid", ours=True)
            why = "no"
        lambda_sqs.always("DeleteMessageBatch", answer)
        count = 3 if how == "denied" else 2
        with pytest.raises(ValueError, match=r"^no$"):
            taskhawk.process_messages_for_lambda_consumer(lambda_event(1, "fail", 2, 3))
        assert lambda_warnings(caplog) == [
            f"{count} of 3 messages that succeeded may run again: can't delete them: {why}"
        ]

    @pytest.mark.parametrize(
        "action", ["DeleteMessageBatch", "ChangeMessageVisibilityBatch"]
    )
    def test_a_passing_fault_of_the_service(
        self, action, lambda_sqs, lambda_runs, caplog
    ):
        """A call that fails in passing is repeated, as nobody comes after the function to do it."""
        lambda_sqs.script(action, (503, {}, b"{}"))
        calls = (1, "fail") if action == "DeleteMessageBatch" else ("in 90.5 s",)
        with pytest.raises((ValueError, taskhawk.RetryException)):
            taskhawk.process_messages_for_lambda_consumer(lambda_event(*calls))
        assert lambda_sqs.actions == [action, action]
        assert lambda_warnings(caplog) == []

    @pytest.mark.parametrize("partial_batch", [False, True])
    def test_delays(self, partial_batch, lambda_sqs, lambda_runs):
        """A retry's delay is set on the queue first; whole seconds, and nothing is looked up."""
        taskhawk.task(name="lambda.policy", retry=taskhawk.fixed(7, jitter=False))(
            raising(KeyError())
        )
        event = lambda_event("in 90.5 s", 1, "later", "fail", "at once")
        event["Records"].append(
            lambda_sqs_record(processing_body("lambda.policy"), "m6")
        )
        with contextlib.suppress(ExceptionGroup):
            taskhawk.process_messages_for_lambda_consumer(
                event, partial_batch=partial_batch
            )
        action = "ChangeMessageVisibilityBatch"
        changes = lambda_entries(
            lambda_sqs, action, "ReceiptHandle", "VisibilityTimeout"
        )
        assert list(itertools.chain(*changes)) == [
            ("receipt of m1", 91),
            ("receipt of m5", 0),
            ("receipt of m6", 7),
        ]
        others = [name for name in lambda_sqs.actions if name != action]
        assert others == ([] if partial_batch else ["DeleteMessageBatch"])
        assert lambda_sqs.actions[-1] == (others or [action])[-1]

    def test_delay_beyond_12_hours(self, lambda_sqs, lambda_runs):
        """A delay is clamped to what is left of 12 hours since the receive: SQS refuses more."""
        with pytest.raises(taskhawk.RetryException):
            taskhawk.process_messages_for_lambda_consumer(lambda_event("in a month"))
        (((asked_s,),),) = lambda_entries(
            lambda_sqs, "ChangeMessageVisibilityBatch", "VisibilityTimeout"
        )
        longest_s = (
            900 + 300
        )  # Lambda's longest run, after its longest wait for a batch
        assert 40_000 < asked_s <= 43_200 - longest_s

    def test_delays_of_sns(self, lambda_sqs, lambda_runs):
        """Behind SNS a retry has no delay of ours: Lambda has its own."""
        event = lambda_event("in 90.5 s", 1, make=lambda_sns_record)
        with pytest.raises(taskhawk.RetryException) as caught:
            taskhawk.process_messages_for_lambda_consumer(event)
        assert caught.value is LAMBDA_ENDS["in 90.5 s"]
        assert lambda_sqs.calls == []

    def test_delays_are_denied(self, lambda_sqs, lambda_runs, caplog):
        """A role that may not change the visibility costs one warning, and no message."""
        denied = fault("AccessDenied", status=403)
        lambda_sqs.always("ChangeMessageVisibilityBatch", denied)
        why = LAMBDA_DENIED.format("ChangeMessageVisibility")
        event = lambda_event("in 90.5 s", 1, "at once", "in 90.5 s")
        with pytest.raises(ExceptionGroup) as caught:
            taskhawk.process_messages_for_lambda_consumer(event)
        assert len(caught.value.exceptions) == 3
        assert lambda_warnings(caplog) == [
            f"can't change when 3 of 3 failed messages run again: {why}"
        ]
        deleted = lambda_entries(lambda_sqs, "DeleteMessageBatch", "ReceiptHandle")
        assert deleted == [[("receipt of m2",)]]

    def test_one_delay_is_refused(self, lambda_sqs, lambda_runs, caplog):
        """A delay that SQS refuses for one message is still set for the others."""
        gone = refuse(0, code="ReceiptHandleIsInvalid", ours=True)
        lambda_sqs.always("ChangeMessageVisibilityBatch", gone)
        event = lambda_event("in 90.5 s", "at once")
        taskhawk.process_messages_for_lambda_consumer(event, partial_batch=True)
        asked = lambda_entries(
            lambda_sqs, "ChangeMessageVisibilityBatch", "ReceiptHandle"
        )
        assert list(itertools.chain(*asked)) == [("receipt of m1",), ("receipt of m2",)]
        (warning,) = lambda_warnings(caplog)
        assert warning == "can't change when 1 of 2 failed messages run again: no"

    def test_task_changes_its_visibility(self, lambda_sqs):
        """A task may hold its message for longer: by metadata, at once, nothing is looked up."""
        seen: list[Any] = []

        @taskhawk.task(name="lambda.long")
        def long(metadata: taskhawk.Metadata) -> None:
            metadata.extend_visibility_timeout(600)
            seen.append([(call.action, call.data) for call in lambda_sqs.calls])

        record = lambda_sqs_record(processing_body("lambda.long"), "m1")
        taskhawk.process_messages_for_lambda_consumer({"Records": [record]})
        url = f"{lambda_sqs.url}/123456789012/TASKHAWK-DEV-MYAPP"
        entry = {"Id": "0", "ReceiptHandle": "receipt of m1", "VisibilityTimeout": 600}
        call = ("ChangeMessageVisibilityBatch", {"QueueUrl": url, "Entries": [entry]})
        assert seen == [[call]]

    @pytest.mark.parametrize("kind", LAMBDA_RECORDS)
    def test_metadata(self, kind, lambda_sqs):
        """A task is told of its run; behind SNS it has no queue and no receipt."""
        seen: list[taskhawk.Metadata] = []

        @taskhawk.task(name="lambda.told")
        def told(metadata: taskhawk.Metadata) -> None:
            metadata.extend_visibility_timeout(
                0
            )  # does nothing where there is no queue
            seen.append(metadata)

        body = processing_body("lambda.told", headers={"request_id": "1234"})
        record = LAMBDA_RECORDS[kind](body, "m1")
        if kind == "SQS":
            record["attributes"]["ApproximateReceiveCount"] = "3"
        taskhawk.process_messages_for_lambda_consumer({"Records": [record]})
        assert seen == [
            {
                "id": PROCESSING_ID,
                "priority": taskhawk.Priority.high,
                "receipt": "receipt of m1" if kind == "SQS" else None,
                "timestamp": 1460868253255,
                "version": "1.0",
            }
        ]
        (metadata,) = seen
        expected = ("TASKHAWK-DEV-MYAPP", 3) if kind == "SQS" else (None, 1)
        assert (metadata.queue, metadata.attempt) == expected
        assert metadata.headers == {"request_id": "1234"}
        assert metadata.lease_lost is False

    def test_hooks_of_sqs_events(self, lambda_sqs, lambda_runs):
        """For an SQS event the hooks get what they get in a worker, shaped like boto3's message."""
        seen: list[Any] = []
        taskhawk.configure(
            AWS_KEYS,
            AWS_ENDPOINT_SQS=lambda_sqs.url,
            TASKHAWK_PRE_PROCESS_HOOK=lambda **given: seen.append(given),
            TASKHAWK_POST_PROCESS_HOOK="test_lambda_hooks.delete",
        )
        hooks = type(sys)("test_lambda_hooks")
        hooks.delete = lambda sqs_queue_message, **_: sqs_queue_message.delete()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "test_lambda_hooks", hooks)
            taskhawk.process_messages_for_lambda_consumer(lambda_event(1))
        (given,) = seen
        message = given.pop("sqs_queue_message")
        assert given == {"queue_name": "TASKHAWK-DEV-MYAPP"}
        assert message.body == processing_body("lambda.run", args=[1])
        assert (message.message_id, message.receipt_handle) == ("m1", "receipt of m1")
        assert message.attributes == lambda_sqs_record("", "m1")["attributes"]
        attribute = message.message_attributes["request_id"]
        assert (attribute["StringValue"], attribute["DataType"]) == ("1234", "String")
        assert lambda_sqs.actions == ["DeleteMessageBatch"]
        assert lambda_sqs.calls[0].data == {
            "QueueUrl": message.queue_url,
            "Entries": [{"Id": "0", "ReceiptHandle": "receipt of m1"}],
        }

    def test_queue_url_of_aws(self, lambda_runs):
        """Without an endpoint of one's own, the queue's URL is the one that AWS has."""
        urls: list[str] = []

        def look(sqs_queue_message: QueueMessage, **_: Any) -> None:
            urls.append(sqs_queue_message.queue_url)

        taskhawk.configure(AWS_KEYS, TASKHAWK_PRE_PROCESS_HOOK=look)
        taskhawk.process_messages_for_lambda_consumer(lambda_event(1))
        assert urls == [
            "https://sqs.us-east-1.amazonaws.com/123456789012/TASKHAWK-DEV-MYAPP"
        ]

    def test_hooks_of_sns_events(self, lambda_runs):
        """For an SNS event the hooks get the record."""
        seen: list[Any] = []
        taskhawk.configure(
            TASKHAWK_PRE_PROCESS_HOOK=lambda **given: seen.append(given),
            TASKHAWK_POST_PROCESS_HOOK=lambda **given: seen.append(given),
        )
        event = lambda_event(1, make=lambda_sns_record)
        taskhawk.process_messages_for_lambda_consumer(event)
        assert seen == [{"sns_record": event["Records"][0]}] * 2

    @pytest.mark.parametrize("kind", LAMBDA_RECORDS)
    def test_records_of_another_type(self, kind, lambda_sqs, lambda_runs):
        """An event and its records may be any mappings, such as a library's read-only ones."""
        event = lambda_event(1, 2, make=LAMBDA_RECORDS[kind])
        records = [types.MappingProxyType(record) for record in event["Records"]]
        event = types.MappingProxyType({"Records": records})
        taskhawk.process_messages_for_lambda_consumer(event)
        assert lambda_runs == [1, 2]

    @pytest.mark.parametrize("kind", LAMBDA_RECORDS)
    @pytest.mark.parametrize("case", LAMBDA_MALFORMED)
    def test_malformed_records(self, case, kind, lambda_sqs, lambda_runs):
        """A record that is none fails as an invalid message does, and does not stop the others."""
        event = lambda_event(1, 2, make=LAMBDA_RECORDS[kind])
        event["Records"].insert(1, LAMBDA_MALFORMED[case])
        with pytest.raises(taskhawk.ValidationError) as caught:
            taskhawk.process_messages_for_lambda_consumer(event)
        assert str(caught.value) == "message: expected a string of JSON, got null"
        assert lambda_runs == [1, 2]

    @pytest.mark.parametrize("kind", LAMBDA_RECORDS)
    @pytest.mark.parametrize("case", PROCESSING_INVALID)
    def test_invalid_messages(self, case, kind, lambda_sqs, lambda_runs):
        """An invalid message, or one for an unknown task, fails and does not stop the others."""
        body, wrong = PROCESSING_INVALID[case]
        event = lambda_event(1, 2, make=LAMBDA_RECORDS[kind])
        event["Records"].insert(1, LAMBDA_RECORDS[kind](body, "bad"))
        with pytest.raises(taskhawk.ValidationError) as caught:
            taskhawk.process_messages_for_lambda_consumer(event)
        assert str(caught.value) == wrong
        assert lambda_runs == [1, 2]

    @pytest.mark.parametrize(
        "event", [None, [], "text", {}, {"Records": None}, {"Records": {}}]
    )
    def test_malformed_events(self, event):
        """What is no event with records raises, lest its messages be taken for processed."""
        with pytest.raises(taskhawk.ValidationError) as caught:
            taskhawk.process_messages_for_lambda_consumer(event)
        sentence = "Records: expected an array of SNS or SQS records, got none"
        assert str(caught.value) == sentence

    @pytest.mark.parametrize(
        ("partial_batch", "answer"), [(False, None), (True, {"batchItemFailures": []})]
    )
    def test_event_without_records(self, partial_batch, answer):
        """An event of no records is done."""
        event = {"Records": []}
        found = taskhawk.process_messages_for_lambda_consumer(
            event, partial_batch=partial_batch
        )
        assert found == answer

    @pytest.mark.parametrize("kind", LAMBDA_RECORDS)
    def test_time_budget(self, kind, lambda_sqs):
        """With Lambda's context nothing is started in the last tenth of the time that was left."""
        context = LambdaTime(10_000)
        runs: list[int] = []

        @taskhawk.task(name="lambda.run")
        def run(takes_ms: int) -> None:
            runs.append(takes_ms)
            context.remaining_ms -= takes_ms

        event = lambda_event(4_000, 4_900, 101, 1, 1, make=LAMBDA_RECORDS[kind])
        with pytest.raises(ExceptionGroup) as caught:
            taskhawk.process_messages_for_lambda_consumer(event, context=context)
        assert runs == [4_000, 4_900, 101]
        assert [(type(error), str(error)) for error in caught.value.exceptions] == [
            (taskhawk.TaskhawkError, f"message m{n} was not started: no time was left")
            for n in (4, 5)
        ]
        deleted = [[(f"receipt of m{n}",) for n in (1, 2, 3)]] if kind == "SQS" else []
        found = lambda_entries(lambda_sqs, "DeleteMessageBatch", "ReceiptHandle")
        assert found == deleted
        context.remaining_ms = 10_000
        assert taskhawk.process_messages_for_lambda_consumer(
            lambda_event(9_999), context=context, partial_batch=True
        ) == {"batchItemFailures": []}

    def test_time_budget_partial_batch(self, lambda_sqs):
        """What was not started counts as failed."""
        context = LambdaTime(10_000)

        @taskhawk.task(name="lambda.run")
        def run(takes_ms: int) -> None:
            context.remaining_ms -= takes_ms

        answer = taskhawk.process_messages_for_lambda_consumer(
            lambda_event(9_500, 1), context=context, partial_batch=True
        )
        assert answer == {"batchItemFailures": [{"itemIdentifier": "m2"}]}
        assert lambda_sqs.calls == []

    @pytest.mark.parametrize("partial_batch", [False, True])
    @pytest.mark.parametrize("first", ["fail", "in 90.5 s", None])
    def test_fifo_groups(self, first, partial_batch, lambda_sqs, lambda_runs):
        """Nothing of a FIFO group runs after its first failure; the rest counts as failed."""
        event = lambda_event(1, first, 2, 3, 4)
        for record, group in zip(event["Records"], "aabab", strict=True):
            record["attributes"]["MessageGroupId"] = group
            record["eventSourceARN"] = LAMBDA_FIFO_ARN
        if first is None:
            event["Records"][1]["body"] = "{"  # what can't be run is a failure too
        answer, errors = None, ()
        try:
            answer = taskhawk.process_messages_for_lambda_consumer(
                event, partial_batch=partial_batch
            )
        except ExceptionGroup as group:
            errors = group.exceptions
        assert lambda_runs == [1, *filter(None, [first]), 2, 4]
        deleted = lambda_entries(lambda_sqs, "DeleteMessageBatch", "ReceiptHandle")
        if partial_batch:
            failures = [{"itemIdentifier": name} for name in ("m2", "m4")]
            assert (answer, deleted) == ({"batchItemFailures": failures}, [])
        else:
            assert deleted == [[(f"receipt of m{n}",) for n in (1, 3, 5)]]
            text = "message m4 was not started: an earlier one of its group failed"
            assert (len(errors), type(errors[1])) == (2, taskhawk.TaskhawkError)
            assert str(errors[1]) == text

    def test_groups_of_standard_queues(self, lambda_sqs, lambda_runs):
        """On a standard queue a group is for fairness, and a failure does not stop it."""
        event = lambda_event("fail", 1)
        for record in event["Records"]:
            record["attributes"]["MessageGroupId"] = "a"
        with pytest.raises(ValueError, match=r"^no$"):
            taskhawk.process_messages_for_lambda_consumer(event)
        assert lambda_runs == ["fail", 1]

    def test_keyboard_interrupt(self, lambda_sqs, lambda_runs, monkeypatch):
        """KeyboardInterrupt ends the handler: no run follows."""
        monkeypatch.setitem(LAMBDA_ENDS, "interrupt", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            taskhawk.process_messages_for_lambda_consumer(
                lambda_event(1, "interrupt", 2)
            )
        assert lambda_runs == [1, "interrupt"]


# === PART V: STATE ====================================================================


# === PART VI: PEOPLE ==================================================================


# --- 18. dead letters -----------------------------------------------------------------

NOT_DELETED = "copied, but not deleted: "


def fault_after(code: str) -> AwsAnswer:
    """Do what is asked, and answer that it failed: as a lost answer, without its timeout."""
    return lambda call: (call.forward(), fault(code)(call))[1]


def put_dead_letters(broker: taskhawk.Broker, count: int) -> str:
    """Send so many messages to the dead letters, and return the name of that queue."""
    queue = f"{broker.destination(Priority.default)}-DLQ"
    for number in range(count):
        assert broker.send(queue, [Outgoing(body_of(number), {})]) == []
    return queue


class TestDeadLetters:
    """Dead letters go back to their queues without one being lost."""

    def test_requeue(self, broker, mail):
        """They go back to the queue of their priority as they were, without taskhawk.error."""
        header = {"n": {"DataType": "String", "StringValue": "é"}}
        error = {"taskhawk.error": {"DataType": "String", "StringValue": "{}"}}
        message = Message.new("mail.send", ["a"], priority=Priority.high)
        body = json.dumps(message.as_dict())
        queue = broker.destination(Priority.high)
        broker.send(f"{queue}-DLQ", [Outgoing(body, {**error, **header})])
        assert taskhawk.requeue_dead_letter(Priority.high) == 1
        (received,) = receive_all(Priority.high)
        assert received.body == body
        assert {
            n: v["StringValue"] for n, v in received.message_attributes.items()
        } == {"n": "é"}
        assert receive_all(f"{queue}-DLQ") == receive_all() == []
        assert broker.depth(f"{queue}-DLQ") == Depth(0, 0, 0)

    @pytest.mark.parametrize("most", [1, 4, 10, 1000])
    def test_requeue_many(self, broker, mail, caplog, most):
        """Any number is received at once, up to ten, and the progress is logged."""
        caplog.set_level(logging.INFO, "taskhawk")
        put_dead_letters(broker, 12)
        assert taskhawk.requeue_dead_letter(Priority.default, num_messages=most) == 12
        assert sorted(received_args()) == list(range(12))
        queue = broker.destination(Priority.default)
        source = f"{queue}-DLQ"
        assert caplog.messages[0] == f"requeueing about 12 messages from {source}"
        steps = range(most, 12 + most, most) if most < 10 else (10, 12)
        assert caplog.messages[1:] == [
            f"requeued {min(step, 12)} of 12 messages, 0 failed" for step in steps
        ]

    def test_requeue_none(self, sqlite):
        """Where there are none, none are sent back."""
        assert taskhawk.requeue_dead_letter(Priority.default) == 0

    def test_visibility_timeout(self, scripted):
        """The copies are made in the queue's own visibility timeout, or in the one given."""
        for timeout in ({"visibility_timeout": 7}, {}):
            put_dead_letters(taskhawk._brokers.broker(), 1)
            taskhawk.requeue_dead_letter(Priority.default, **timeout)
        polls = scripted.asked("ReceiveMessage")
        assert [poll.get("VisibilityTimeout") for poll in polls] == [7, None]

    def test_in_circles(self, scripted):
        """Messages that fail again and come back are not sent in circles: it ends."""
        put_dead_letters(taskhawk._brokers.broker(), 5)

        def comes_back(call: AwsCall) -> None:
            call.forward(QueueUrl=f"{call.data['QueueUrl']}-DLQ")

        scripted.always("SendMessage", comes_back)
        scripted.always("SendMessageBatch", comes_back)
        assert taskhawk.requeue_dead_letter(Priority.default, num_messages=2) == 5
        queue = taskhawk._brokers.broker().destination(Priority.default)
        assert (
            sorted(received_args())
            == sorted(received_args(f"{queue}-DLQ"))
            == list(range(5))
        )

    def test_in_circles_with_a_worker(self, sqlite):
        """So it ends beside a worker that fails each message once more."""

        @taskhawk.task(name="mail.send")
        def send(number):
            raise taskhawk.StopRetry

        put_dead_letters(sqlite, 20)
        stop = threading.Event()
        worker = taskhawk.Worker(
            sqlite, ["TASKHAWK-DEFAULT"], shutdown_event=stop, wait_s=1
        )
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            assert taskhawk.requeue_dead_letter(Priority.default, num_messages=1) == 20
        finally:
            stop.set()
            thread.join()
        left = received_args() + received_args("TASKHAWK-DEFAULT-DLQ")
        assert sorted(left) == list(range(20))

    @pytest.mark.parametrize(("counted", "moved"), [(9, 4), (2, 2), (0, 1)])
    def test_approximate(self, scripted, counted, moved):
        """SQS counts approximately: an empty receive ends it too, and no messages are one."""
        broker = taskhawk._brokers.broker()
        put_dead_letters(broker, 4)

        def count(call: AwsCall) -> AwsAnswer:
            names = call.data["AttributeNames"]
            if "RedrivePolicy" in names:
                return None
            return {"Attributes": dict.fromkeys(names, str(counted))}

        scripted.always("GetQueueAttributes", count)
        assert taskhawk.requeue_dead_letter(Priority.default) == moved
        assert len(received_args()) == moved

    def test_large(self, scripted):
        """Ten dead letters of 300 KB, which are received at once, are sent three at a time."""
        broker = taskhawk._brokers.broker()
        queue = broker.destination(Priority.default)
        for number in range(10):
            broker.send(f"{queue}-DLQ", [Outgoing(body_of(number, "x" * 300_000), {})])
        scripted.calls.clear()
        assert taskhawk.requeue_dead_letter(Priority.default) == 10
        assert scripted.batches == [3, 3, 3, 1]
        assert sorted(received_args()) == list(range(10))

    def test_binary(self, scripted):
        """An attribute that another publisher made stays what it was, in type and bytes."""
        broker = taskhawk._brokers.broker()
        queue = broker.destination(Priority.default)
        attributes = {
            "b": {"DataType": "Binary.png", "BinaryValue": b"\x89"},
            "n": {"DataType": "Number", "StringValue": "1"},
        }
        broker.send(f"{queue}-DLQ", [Outgoing("not even JSON", attributes)])
        assert taskhawk.requeue_dead_letter(Priority.default) == 1
        (received,) = receive_all()
        assert received.message_attributes == attributes
        assert received.body == "not even JSON"

    @pytest.mark.parametrize(
        ("action", "answers", "counts", "failed"),
        [
            # sending: refused by fault of the message, of the service once, of the service always
            (
                "SendMessageBatch",
                [refuse(1, 2, ours=True)],
                (10, 2),
                ["InternalError"] * 2,
            ),
            ("SendMessageBatch", [refuse(1, 2), passed], (12, 0), []),
            (
                "SendMessageBatch",
                [refuse(1, 2), *[refuse(0, 1)] * 2],
                (10, 2),
                ["InternalError"] * 2,
            ),
            # the call failed, with no effect, or after it, or while it tried again
            ("SendMessageBatch", [fault("Odd")] * 6, (0, 12), ["Odd"] * 12),
            ("SendMessageBatch", [fault_after("Odd")] * 2, (12, 12), ["Odd"] * 12),
            (
                "SendMessageBatch",
                [refuse(1, 2), *[fault("Odd")] * 2],
                (10, 2),
                ["Odd"] * 2,
            ),
            # deleting: refused, or the call failed
            ("DeleteMessageBatch", [refuse(1, 2), passed], (12, 0), []),
            (
                "DeleteMessageBatch",
                [refuse(0, 3), *[refuse(0, 1)] * 2],
                (12, 2),
                [NOT_DELETED + "InternalError"] * 2,
            ),
            (
                "DeleteMessageBatch",
                [fault("Odd")] * 6,
                (12, 12),
                [NOT_DELETED + "Odd"] * 12,
            ),
            (
                "DeleteMessageBatch",
                [fault_after("Odd")] * 3,
                (12, 0),
                [NOT_DELETED + "Odd"] * 10,
            ),
        ],
    )
    def test_faults(self, scripted, action, answers, counts, failed):
        """A dead letter is deleted once its copy is confirmed, or stays; the counts are exact."""
        broker = taskhawk._brokers.broker()
        source = put_dead_letters(broker, 12)
        scripted.script(action, *answers)
        if failed:
            with pytest.raises(taskhawk.PartialFailure) as raised:
                taskhawk.requeue_dead_letter(Priority.default)
            assert [entry["Code"] for entry in raised.value.result["Failed"]] == failed
            assert raised.value.success_count == 12 - len(failed)
            reason = failed[0]
            assert str(raised.value) == f"{len(failed)} of 12 messages failed: {reason}"
        else:
            assert taskhawk.requeue_dead_letter(Priority.default) == 12
        depth = broker.depth(source)
        assert (len(set(received_args())), depth.visible + depth.in_flight) == counts

    def test_failed_entries(self, scripted):
        """What failed is named by its message id, which the service's console shows too."""
        broker = taskhawk._brokers.broker()
        put_dead_letters(broker, 3)
        scripted.script("SendMessageBatch", refuse(1, ours=True))
        with pytest.raises(taskhawk.PartialFailure) as raised:
            taskhawk.requeue_dead_letter(Priority.default)
        ids = {
            entry["Id"] for entries in raised.value.result.values() for entry in entries
        }
        moved = {
            str(uuid.UUID(entry["Id"])) for entry in raised.value.result["Successful"]
        }
        assert (len(ids), len(moved)) == (3, 2)

    @pytest.mark.parametrize(("step", "moved"), [("INSERT", []), ("DELETE", [0, 1])])
    def test_sqlite_faults(self, tmp_path, step, moved):
        """On SQLite, where a transaction fails, nothing is lost either."""
        path = tmp_path / "queue.db"
        taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{path}")
        broker = taskhawk._brokers.broker()
        source = put_dead_letters(broker, 2)
        with contextlib.closing(sqlite3.connect(path)) as db:
            full = "SELECT RAISE(ABORT, 'disk full')"
            db.execute(
                f"CREATE TRIGGER full BEFORE {step} ON message BEGIN {full}; END"
            )
            with pytest.raises(taskhawk.PartialFailure) as raised:
                taskhawk.requeue_dead_letter(Priority.default)
            db.execute("DROP TRIGGER full")
        assert (raised.value.success_count, raised.value.failure_count) == (0, 2)
        assert received_args() == moved
        assert broker.depth(source) == Depth(2, 0, 0)

    def test_receive_fails(self, scripted, queue_name):
        """Where a receive fails midway, what was sent back until then stays so."""
        broker = taskhawk._brokers.broker()
        source = put_dead_letters(broker, 12)
        scripted.script("ReceiveMessage", passed, fault("AccessDenied", status=403))
        with pytest.raises(
            taskhawk.ConfigurationError, match=r"access denied: .* \(AccessDenied\)$"
        ):
            taskhawk.requeue_dead_letter(Priority.default)
        assert len(received_args()) == 10
        assert len(received_args(source)) == 2

    @pytest.mark.parametrize("number", [0, -1])
    def test_num_messages(self, sqlite, number):
        """To receive none at once is refused, as by listen_for_messages."""
        put_dead_letters(sqlite, 1)
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            taskhawk.requeue_dead_letter(Priority.default, num_messages=number)
        assert str(raised.value) == f"num_messages: expected 1 or more, got {number}"

    def test_no_redrive_policy(self, ministack, sqs_client, queue_name):
        """Without a RedrivePolicy, there is nothing to send back, and the error says so."""
        sqs_client(ministack).create_queue(QueueName=f"TASKHAWK-{queue_name}")
        configure_aws(ministack, queue_name)
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            taskhawk.requeue_dead_letter(Priority.default)
        assert str(raised.value) == (
            f"TASKHAWK-{queue_name}: it has no dead-letter queue (no RedrivePolicy)"
        )

    def test_no_queue(self, ministack, sqs_client, queue_name):
        """Where one of the two queues does not exist, the error names that one."""
        client, queue = sqs_client(ministack), f"TASKHAWK-{queue_name}"
        configure_aws(ministack, queue_name)
        for missing in (queue, f"{queue}-DLQ"):
            with pytest.raises(taskhawk.ConfigurationError) as raised:
                taskhawk.requeue_dead_letter(Priority.default)
            assert str(raised.value) == (
                f"{missing}: there is no such queue here: make it, or check TASKHAWK_QUEUE,"
                " AWS_REGION and the account (NonExistentQueue)"
            )
            make_queues(client, queue_name)
            client.delete_queue(
                QueueUrl=client.get_queue_url(QueueName=f"{queue}-DLQ")["QueueUrl"]
            )

    def test_lambda_app(self, scripted, queue_name, caplog):
        """For a Lambda app there is nothing to do, and a warning says so."""
        configure_aws(scripted.url, queue_name, IS_LAMBDA_APP=True)
        assert taskhawk.requeue_dead_letter(Priority.default) == 0
        assert scripted.actions == []
        assert caplog.messages == [
            "requeue_dead_letter: not supported for Lambda apps, whose queues are Lambda's"
        ]

    def test_circle(self, broker, mail):
        """A message whose task gives up goes to the dead letters, comes back, and runs."""
        broken = [True]

        @taskhawk.task(name="mail.circle", never_retry_on=(ZeroDivisionError,))
        def circle(number, headers):
            if broken:
                raise ZeroDivisionError("é" + "\0\ud800")
            ran.append((number, headers))

        ran: list[Any] = []
        circle.with_headers(n="5").dispatch(7)
        assert work_once(broker) == taskhawk.Ledger(received=1, dead_lettered=1)
        queue = broker.destination(Priority.default)
        assert broker.depth(queue) == Depth(0, 0, 0)
        assert broker.depth(f"{queue}-DLQ") == Depth(1, 0, 0)
        broken.clear()
        assert taskhawk.requeue_dead_letter(Priority.default) == 1
        assert work_once(broker) == taskhawk.Ledger(received=1, acked=1)
        assert ran == [(7, {"n": "5"})]


LETTER_ERROR = {
    "type": "ValueError",
    "message": "no amount\nat all",
    "traceback": "Traceback\nValueError: no amount\n",
    "attempt": 3,
    "worker": "host:1",
    "time": "2026-11-21T00:00:00Z",
}


def put_letters(broker: taskhawk.Broker) -> list[str]:
    """Put three letters there: one of a worker, one that the queue moved, one that is invalid."""
    ids = [str(uuid.uuid4()) for _ in range(2)]
    bodies = [
        {**json.loads(body_of(n)), "id": ids[n], "headers": {"n": f"{n}"}}
        for n in (0, 1)
    ]
    bodies[1]["task"] = "other.task"
    error = {
        "taskhawk.error": {
            "DataType": "String",
            "StringValue": json.dumps(LETTER_ERROR),
        }
    }
    odd = {"taskhawk.error": {"DataType": "String", "StringValue": "[]"}}
    queue = f"{broker.destination(Priority.default)}-DLQ"
    broker.send(queue, [Outgoing(json.dumps(bodies[0]), error)])
    broker.send(queue, [Outgoing(json.dumps(bodies[1]), odd)])
    broker.send(queue, [Outgoing("rubbish", {})])
    return ids


@pytest.fixture
def letters(
    broker: taskhawk.Broker, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Any]:
    """Return a function that runs a command on three dead letters, and returns its lines."""
    if isinstance(
        broker, taskhawk.SqliteBroker
    ):  # the memory of a process is no queue of commands
        url = f"sqlite:///{tmp_path}/queue.db"
        taskhawk.configure(
            TASKHAWK_BROKER=url, TASKHAWK_QUEUE=taskhawk.settings.TASKHAWK_QUEUE
        )

    def run(*arguments: str, code: int = 0) -> list[str]:
        assert taskhawk.main(["dead-letters", *arguments]) == code
        return capsys.readouterr().out.splitlines()

    run.ids = put_letters(taskhawk._brokers.broker())
    return run


def letters_left() -> tuple[Depth, Depth]:
    """Return the depths of the default queue and of its dead letters."""
    broker = taskhawk._brokers.broker()
    queue = broker.destination(Priority.default)
    return broker.depth(queue), broker.depth(f"{queue}-DLQ")


class TestDeadLetterCommands:
    """Dead letters are looked at where they are, and leave when they are told to."""

    def test_list(self, letters):
        """Each is a line with its error; they stay, and are visible again at once."""
        lines = sorted(letters("list"), key=lambda line: line.partition("  ")[2])
        ages = [re.sub(r"  \d+ s ago  ", "  AGE  ", line) for line in lines]
        assert ages[1] == f"{letters.ids[0]}  mail.send  AGE  ValueError: no amount"
        assert ages[2] == (
            f"{letters.ids[1]}  other.task  AGE  moved by the queue itself, after too many receives"
        )
        assert re.fullmatch(
            "[-0-9a-f]+  None  AGE  message: not JSON at character 0", ages[0]
        )
        assert letters_left() == (Depth(0, 0, 0), Depth(3, 0, 0))

    @pytest.mark.parametrize(
        ("arguments", "found"),
        [
            (("--task", "mail.*"), [0]),
            (("--task", "mail"), []),
            (("--error", "ValueError: no"), [0]),
            (("--header", "n=1"), [1]),
            (("--header", "tenant=None"), []),
            (("--header", "n=1", "--task", "mail.send"), []),
            (("--older-than", "1h"), []),
            (("--newer-than", "1.5h", "--task", "*.*"), [0, 1]),
            (("--limit", "1", "--task", "*.*"), [None]),
            (("--limit", "0"), []),
            (("--id", "ID", "--id", "nothing"), [0]),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_filters(self, letters, arguments, found):
        """Filters together say which are meant."""
        arguments = [letters.ids[0] if word == "ID" else word for word in arguments]
        shown = [json.loads(line) for line in letters("list", "--json", *arguments)]
        ids = {letter["id"] for letter in shown}
        assert (
            ids == {letters.ids[n] for n in found}
            if None not in found
            else len(ids) == 1
        )

    def test_json(self, letters):
        """For programs, each is an object with all that is known of it."""
        (letter,) = [
            json.loads(line)
            for line in letters("list", "--json", "--task", "mail.send")
        ]
        assert letter.pop("age_s") in range(60)
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", letter.pop("sent"))
        assert re.fullmatch(MESSAGE_ID, letter.pop("message_id"))
        assert letter.pop("receives") >= 1
        assert letter == {
            "id": letters.ids[0],
            "task": "mail.send",
            "headers": {"n": "0"},
            "args": [0],
            "kwargs": {},
            "error": LETTER_ERROR,
            "invalid": None,
        }

    def test_show(self, letters):
        """One is shown with its arguments and its traceback."""
        lines = letters("show", letters.ids[0])
        assert lines[0] == f"id: {letters.ids[0]}"
        expected = {
            "args: [0]",
            "error: ValueError: no amount",
            "error traceback: Traceback",
        }
        assert expected | {"error attempt: 3", "error worker: host:1"} <= set(lines)

    def test_export(self, letters):
        """An exported one has body and attributes as they are."""
        (line,) = letters("export", "--task", "mail.send")
        exported = json.loads(line)
        assert json.loads(exported["body"])["args"] == [0]
        assert exported["attributes"]["taskhawk.error"]["DataType"] == "String"
        assert letters_left()[1] == Depth(3, 0, 0)

    def test_requeue(self, letters):
        """Only those that are meant go back; --dry-run shows which."""
        (line,) = letters("requeue", "--header", "n=1", "--dry-run")
        assert line.startswith(letters.ids[1])
        assert letters_left() == (Depth(0, 0, 0), Depth(3, 0, 0))
        assert letters("requeue", "--header", "n=1") == ["sent back: 1"]
        assert letters_left() == (Depth(1, 0, 0), Depth(2, 0, 0))
        assert letters("requeue", "--task", "nothing") == ["sent back: 0"]
        assert letters("requeue") == ["sent back: 2"]
        assert letters_left() == (Depth(3, 0, 0), Depth(0, 0, 0))

    def test_delete(self, letters, capsys):
        """A delete wants a filter, or --all."""
        assert letters("delete", code=2) == []
        assert len(letters("delete", "--error", "no amount", "--dry-run")) == 1
        assert letters("delete", "--error", "no amount") == ["deleted: 1"]
        assert letters_left()[1] == Depth(2, 0, 0)
        assert letters("delete", "--all") == ["deleted: 2"]
        assert letters_left() == (Depth(0, 0, 0), Depth(0, 0, 0))

    @pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
    def test_wrong_age(self, letters, capsys):
        """An age needs its unit."""
        assert taskhawk.main(["dead-letters", "list", "--older-than", "36"]) == 2
        assert capsys.readouterr().err == (
            "taskhawk: age: expected a number and one of s, m, h, d, such as 36h, got '36'\n"
        )

    @pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
    def test_hostile(self, letters):
        """What a message says does not command the terminal."""
        body = json.dumps({**json.loads(body_of(1)), "task": "\x1b[2Jevil"})
        broker = taskhawk._brokers.broker()
        broker.send(f"{broker.destination(Priority.default)}-DLQ", [Outgoing(body, {})])
        (line,) = letters("list", "--task", "*evil")
        assert "  ?[2Jevil  " in line
        body = json.dumps({**json.loads(body_of(1)), "task": "forged\nline"})
        broker.send(f"{broker.destination(Priority.default)}-DLQ", [Outgoing(body, {})])
        (line,) = letters("list", "--task", "forged*")
        assert "  forged?line  " in line

    @pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
    def test_show_nothing(self, letters, capsys):
        """An id that no dead letter has is an error."""
        assert command_error(
            capsys, "dead-letters", "show", "nothing", "--newer-than", "1s"
        ) == (
            1,
            "taskhawk: show: no such dead letter, among those that fit all filters",
        )

    def test_clock_behind(self):
        """A dead letter of a clock that is ahead of ours is as old as none."""
        sent_ms = {"SentTimestamp": str(round((time.time() + 5) * 1000))}
        received = taskhawk.QueueMessage("", "m1", attributes=sent_ms)
        assert taskhawk._describe(received)["age_s"] == 0

    def test_interrupted(self, letters, caplog):
        """Whatever ends it, what was looked at is visible again, and nothing is lost."""

        def interrupt(messages: Any) -> None:
            raise KeyboardInterrupt

        caplog.set_level(logging.INFO)
        with pytest.raises(KeyboardInterrupt):
            taskhawk._DeadLetters(Priority.default).each(
                "looking", "looked at", interrupt
            )
        assert letters_left() == (Depth(0, 0, 0), Depth(3, 0, 0))
        text = "stopped: up to 10 more messages may be looked at too"
        assert text in [record.getMessage() for record in caplog.records]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_signal(self, number):
        """SIGTERM and the end of a terminal interrupt, as Ctrl-C does; others' handlers stay."""
        before = signal.signal(number, signal.SIG_DFL)
        with pytest.raises(KeyboardInterrupt), taskhawk._interruptible():
            os.kill(os.getpid(), number)
        assert signal.signal(number, signal.SIG_IGN) == signal.SIG_DFL
        with taskhawk._interruptible():
            assert signal.getsignal(number) == signal.SIG_IGN
        signal.signal(number, before)

    def test_memory(self, letters):
        """Bodies are let go of once they were looked at: there may be many."""
        seen = []
        dead = taskhawk._DeadLetters(Priority.default)
        assert dead.each("looking", "looked at", seen.extend) == 3
        assert [message.body for message in seen] == ["", "", ""]

    def test_not_deleted(self, scripted, capsys):
        """What can't be deleted is still there, and the exit code says so."""
        put_letters(taskhawk._brokers.broker())
        scripted.always("DeleteMessageBatch", fault("AccessDenied", status=403))
        assert taskhawk.main(["dead-letters", "delete", "--task", "mail.send"]) == 1
        line = "taskhawk: 1 of 1 messages failed: AccessDenied"
        assert capsys.readouterr().err.splitlines()[-1] == line


# --- 19. infrastructure ---------------------------------------------------------------


class TestStats:
    """How many messages there are, in each state, of each priority."""

    def test_json(self, broker, mail, capsys):
        """As JSON, a queue that is not there is null."""
        mail.dispatch()
        mail.with_delay(60).dispatch()
        broker.send(f"{broker.destination(Priority.high)}-DLQ", [Outgoing("x", {})])
        assert taskhawk.main(["stats", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        empty = {"visible": 0, "in_flight": 0, "delayed": 0, "dead_letters": 0}
        none = empty if isinstance(broker, taskhawk.SqliteBroker) else None
        assert found == {
            "high": empty | {"dead_letters": 1},
            "default": empty | {"visible": 1, "delayed": 1},
            "low": none,
            "bulk": none,
        }

    def test_text(self, sqs_client, ministack, queue_name, capsys):
        """As text, it is a table; a queue without dead letters says so."""
        sqs_client(ministack).create_queue(QueueName=f"TASKHAWK-{queue_name}")
        configure_aws(ministack, queue_name)
        assert taskhawk.main(["stats"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "             visible  in flight  delayed  dead letters",
            "high        no queue or access",
            "default            0          0        0   none/denied",
            "low         no queue or access",
            "bulk        no queue or access",
        ]

    @pytest.mark.parametrize("option", [[], ["--json"]], ids=["text", "json"])
    def test_no_queue(self, ministack, queue_name, capsys, option):
        """Before any queue is made, each is said not to be there."""
        configure_aws(ministack, queue_name)
        assert taskhawk.main(["stats", *option]) == 0
        out = capsys.readouterr().out
        assert out.count("null" if option else "no queue") == len(Priority)

    def test_denied(self, scripted, capsys):
        """What is not allowed is an error, not a queue that is not there."""
        scripted.always("GetQueueAttributes", fault("AccessDenied", status=403))
        assert taskhawk.main(["stats"]) == 2
        assert "does not allow GetQueueAttributes" in capsys.readouterr().err

    def test_denied_for_some(self, scripted, capsys):
        """Where one may look at some of the queues alone, these are counted."""

        def deny_others(call: AwsCall) -> AwsAnswer:
            other = re.search("PRIORITY|BULK", call.data["QueueName"])
            return fault("AccessDenied", status=403)(call) if other else None

        scripted.always("GetQueueUrl", deny_others)
        assert taskhawk.main(["stats", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [name for name, counts in found.items() if counts] == ["default"]

    @pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf"])
    def test_odd_interval(self, sqlite, capsys, interval):
        """An interval is a time."""
        assert command_error(capsys, "stats", "--interval", interval) == (
            2,
            f"taskhawk: --interval: expected a number of seconds above 0, got {interval}",
        )

    def test_bars(self, monkeypatch):
        """In a terminal there are bars, to scale; dead letters are red unless NO_COLOR is set."""
        counts = {"visible": 60, "in_flight": 20, "delayed": 0, "dead_letters": 2}
        small = {"visible": 1, "in_flight": 0, "delayed": 4, "dead_letters": 0}
        depths = {"high": counts, "low": small}
        before = {"high": counts | {"visible": 70}, "low": None}
        lines = list(taskhawk._depth_lines(depths, before, 2, bars=True))
        assert lines[1:] == [
            "high              60         20        0\x1b[31m             2\x1b[0m      -5.0/s  "
            + "█" * 23
            + "▓" * 8,
            "low                1          0        4             0  █░░",
        ]
        monkeypatch.setenv("NO_COLOR", "1")
        assert "\x1b" not in "".join(taskhawk._depth_lines(depths, {}, 0, bars=True))
        assert "█" not in "".join(taskhawk._depth_lines(depths, {}, 0, bars=False))

    def test_no_interval(self):
        """Watched without a pause, there is no trend to tell."""
        depths = {
            "high": {"visible": 1, "in_flight": 0, "delayed": 0, "dead_letters": None}
        }
        once = list(taskhawk._depth_lines(depths, {}, 0, bars=False))
        assert list(taskhawk._depth_lines(depths, depths, 0, bars=False)) == once

    @pytest.mark.slow
    def test_watch(self, tmp_path):
        """Watched in a terminal, it is drawn again and again, with the trend, until Ctrl-C."""
        leader, follower = pty.openpty()
        command = [
            sys.executable,
            "-m",
            "taskhawk",
            "stats",
            "--watch",
            "--interval",
            "0.05",
        ]
        env = python_env({"TASKHAWK_BROKER": f"sqlite:///{tmp_path}/queue.db"})
        with subprocess.Popen(
            command, stdout=follower, env=env, cwd=tmp_path
        ) as process:
            os.close(follower)
            shown = ""
            while shown.count("\x1b[2J") < 3:
                shown += os.read(leader, 10_000).decode()
            process.send_signal(signal.SIGINT)
            process.wait(30)
        os.close(leader)
        assert process.returncode == 0
        assert "+0.0/s" in shown


def configure_account(
    client: Callable[..., Any], endpoint: str, queue: str, **values: Any
) -> str:
    """Configure what an emulator needs for provisioning, and return its account."""
    configure_aws(endpoint, queue)
    account = client(endpoint, "sts").get_caller_identity()["Account"]
    taskhawk.configure(taskhawk.settings.given, AWS_ACCOUNT_ID=account, **values)
    return account


def attributes_of(client: Any, queue: str) -> dict[str, Any]:
    """Return the attributes of a queue."""
    url = client.get_queue_url(QueueName=queue)["QueueUrl"]
    return client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])[
        "Attributes"
    ]


def provision(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Run the command, and return its lines."""
    assert taskhawk.main(["provision", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


class TestProvision:
    """Queues, dead-letter queues and topics: made, mended, or written down for review."""

    def test_queues(self, endpoint, sqs_client, queue_name, capsys):
        """All are made; the second time there is nothing to do."""
        configure_account(sqs_client, endpoint, queue_name)
        names = [
            f"TASKHAWK-{queue_name}{s}"
            for s in ("-HIGH-PRIORITY", "", "-LOW-PRIORITY", "-BULK")
        ]
        each = [f"queue {name}{dlq}: " for name in names for dlq in ("-DLQ", "")]
        assert provision(capsys, "--dry-run") == [
            f"{line}would be made" for line in each
        ]
        assert provision(capsys) == [f"{line}made" for line in each]
        assert provision(capsys) == [f"{line}is as it should be" for line in each]
        client = sqs_client(endpoint)
        for name in names:
            found, dead = (
                attributes_of(client, name),
                attributes_of(client, f"{name}-DLQ"),
            )
            assert found["MessageRetentionPeriod"] == str(4 * 86_400)
            assert dead["MessageRetentionPeriod"] == str(14 * 86_400)
            policy = json.loads(found["RedrivePolicy"])
            assert policy["deadLetterTargetArn"] == dead["QueueArn"]
            assert int(policy["maxReceiveCount"]) == 5
            url = client.get_queue_url(QueueName=name)["QueueUrl"]
            assert client.list_queue_tags(QueueUrl=url)["Tags"] == {
                "taskhawk": queue_name
            }

    def test_mends(self, endpoint, sqs_client, queue_name, capsys):
        """What is too low is raised, and what someone set higher stays."""
        client, name = sqs_client(endpoint), f"TASKHAWK-{queue_name}"
        account = configure_account(sqs_client, endpoint, queue_name)
        client.create_queue(
            QueueName=f"{name}-DLQ", Attributes={"MessageRetentionPeriod": "86400"}
        )
        attributes = {"MessageRetentionPeriod": "864000", "MaximumMessageSize": "65536"}
        client.create_queue(QueueName=name, Attributes=attributes)
        arn = f"arn:aws:sqs:us-east-1:{account}:{name}-DLQ"
        policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 5})
        changes = {
            f"{name}-DLQ": "changed: MessageRetentionPeriod from 86400 to 1209600",
            name: "changed: MaximumMessageSize from 65536 to 1048576,"
            f" RedrivePolicy from none to {policy}",
        }
        only = ("--priority", "default")
        would = [
            f"queue {queue}: would be {change}" for queue, change in changes.items()
        ]
        assert provision(capsys, *only, "--dry-run") == would
        done = [f"queue {queue}: {change}" for queue, change in changes.items()]
        assert provision(capsys, *only) == done
        assert attributes_of(client, name)["MessageRetentionPeriod"] == "864000"
        (_, line) = provision(capsys, *only, "--max-receive-count", "8")
        assert '"maxReceiveCount": 8' in line
        assert provision(capsys, *only)[1] == f"queue {name}: is as it should be"
        policy = json.loads(attributes_of(client, name)["RedrivePolicy"])
        assert (int(policy["maxReceiveCount"]), policy["deadLetterTargetArn"]) == (
            8,
            arn,
        )

    def test_terraform(self, ministack, sqs_client, queue_name, capsys):
        """Terraform's description is, attribute by attribute, what the API was told."""
        configure_aws(ministack, queue_name)
        described = json.loads("\n".join(provision(capsys, "--format", "terraform")))[
            "resource"
        ]
        provision(capsys)
        client, queues = sqs_client(ministack), described["aws_sqs_queue"]
        assert len(queues) == 8
        for queue in queues.values():
            found = attributes_of(client, queue["name"])
            assert (
                int(found["MessageRetentionPeriod"])
                == queue["message_retention_seconds"]
            )
            assert (
                int(found["MaximumMessageSize"])
                == queue["max_message_size"]
                == 1_048_576
            )
            url = client.get_queue_url(QueueName=queue["name"])["QueueUrl"]
            assert client.list_queue_tags(QueueUrl=url)["Tags"] == queue["tags"]
            ours = json.loads(queue.get("redrive_policy", "{}"))
            theirs = json.loads(found.get("RedrivePolicy", "{}"))
            if reference := ours.get("deadLetterTargetArn"):
                label = re.fullmatch(r"\$\{aws_sqs_queue\.(\w+)\.arn\}", reference)[1]
                target = attributes_of(client, queues[label]["name"])
                ours["deadLetterTargetArn"] = target["QueueArn"]
            assert {k: str(v) for k, v in ours.items()} == {
                k: str(v) for k, v in theirs.items()
            }

    def test_iam(self, ministack, queue_name, capsys):
        """The policies allow each role what it needs, on what it needs it for."""
        configure_aws(ministack, queue_name)
        roles = json.loads(
            "\n".join(provision(capsys, "--format=iam", "--priority=default"))
        )
        assert set(roles) == {"publisher", "worker", "lambda", "operator"}
        arn = f"arn:aws:sqs:us-east-1:000000000000:TASKHAWK-{queue_name}"
        assert roles["publisher"] == {
            "Version": "2012-10-17",
            "Statement": [
                {
                    "Effect": "Allow",
                    "Action": ["sqs:SendMessage", "sqs:GetQueueUrl"],
                    "Resource": [arn],
                }
            ],
        }
        queue, dead = roles["worker"]["Statement"]
        assert (queue["Resource"], dead["Resource"]) == ([arn], [f"{arn}-DLQ"])
        assert "sqs:ChangeMessageVisibility" in queue["Action"]
        assert dead["Action"] == ["sqs:SendMessage", "sqs:GetQueueUrl"]

    def test_topics(self, endpoint, sqs_client, queue_name, capsys):
        """A Lambda app has topics, and functions subscribe to them."""
        account = configure_account(
            sqs_client, endpoint, queue_name, IS_LAMBDA_APP=True
        )
        topic = f"taskhawk-{queue_name.lower()}"
        function = f"arn:aws:lambda:us-east-1:{account}:function:app"
        only = ("--priority=default", "--lambda", function)
        lines = [f"topic {topic}: ", f"subscription {topic}: "]
        made = ["made", f"made for {function}"]
        assert provision(capsys, *only, "--dry-run") == [
            f"{line}would be {done}" for line, done in zip(lines, made, strict=True)
        ]
        assert provision(capsys, *only) == [
            f"{a}{b}" for a, b in zip(lines, made, strict=True)
        ]
        assert provision(capsys, *only) == [
            f"{line}is as it should be" for line in lines
        ]
        described = json.loads(
            "\n".join(provision(capsys, *only, "--format=terraform"))
        )
        label = topic.replace("-", "_")
        reference = f"${{aws_sns_topic.{label}.arn}}"
        assert described["resource"]["aws_sns_topic_subscription"][label] == {
            "topic_arn": reference,
            "protocol": "lambda",
            "endpoint": function,
        }
        assert (
            described["resource"]["aws_lambda_permission"][label]["source_arn"]
            == reference
        )
        roles = json.loads("\n".join(provision(capsys, *only, "--format=iam")))
        arn = f"arn:aws:sns:us-east-1:{account}:{topic}"
        (statement,) = roles["publisher"]["Statement"]
        assert (statement["Action"], statement["Resource"]) == (["sns:Publish"], [arn])
        assert list(roles) == ["publisher", "operator"]
        assert taskhawk.main(["check"]) == 0

    def test_denied(self, scripted, capsys):
        """What is not allowed is one sentence."""
        scripted.always("GetQueueAttributes", fault("AccessDenied", status=403))
        assert taskhawk.main(["provision", "--priority=default"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("does not allow GetQueueAttributes (AccessDenied)")

    def test_account(self, ministack, queue_name, capsys):
        """The account has to be known."""
        configure_aws(ministack, queue_name)
        taskhawk.configure(TASKHAWK_QUEUE=queue_name, AWS_REGION="us-east-1")
        assert taskhawk.main(["provision"]) == 2
        assert capsys.readouterr().err.startswith(
            "taskhawk: AWS_ACCOUNT_ID is not set: expected"
        )

    def test_sqlite(self, tmp_path, capsys):
        """On SQLite it makes the file."""
        url = f"sqlite:///{tmp_path}/queue.db"
        taskhawk.configure(TASKHAWK_BROKER=url)
        would = f"would be made, unless it is there: {url}"
        assert provision(capsys, "--dry-run") == [would]
        assert not (tmp_path / "queue.db").exists()
        assert provision(capsys) == [f"ready: {url}"]
        assert (tmp_path / "queue.db").exists()
        text = "taskhawk: --format: expected TASKHAWK_BROKER to be sqs"
        assert command_error(capsys, "provision", "--format", "iam") == (2, text)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            (
                ("--max-receive-count", "0"),
                "--max-receive-count: expected 1 to 1000, got 0",
            ),
            (
                ("--max-receive-count", "1001"),
                "--max-receive-count: expected 1 to 1000, got 1001",
            ),
            (("--lambda", "arn"), "--lambda: expected IS_LAMBDA_APP to be set"),
        ],
    )
    def test_refused(self, ministack, queue_name, capsys, options, text):
        """What SQS would refuse, or nobody would use, is refused before anything is made."""
        configure_aws(ministack, queue_name)
        assert command_error(capsys, "provision", *options) == (2, f"taskhawk: {text}")


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """Run the command, and return its exit code and lines."""
    code = taskhawk.main(["check", *arguments])
    return code, capsys.readouterr().out.splitlines()


def lambda_free_function() -> None:
    """Do nothing."""


class TestCheck:
    """What is wrong is found before it loses messages, with what mends it."""

    def test_fresh_machine(self, capsys):
        """With nothing configured it says what to do first."""
        assert check(capsys) == (
            1,
            [
                (
                    "error: TASKHAWK_QUEUE is not set: no queue can be named; without AWS, try"
                    " TASKHAWK_BROKER=sqlite:///queue.db. Mend it: export TASKHAWK_QUEUE=dev-myapp"
                ),
                "1 found",
            ],
        )

    @pytest.mark.parametrize(
        ("values", "text"),
        [
            (
                {"AWS_REGION": None},
                "no AWS region: set AWS_REGION, for example eu-west-1",
            ),
            (
                {"AWS_ACCESS_KEY": None, "AWS_SECRET_KEY": None},
                "no AWS credentials: set",
            ),
        ],
    )
    def test_aws(self, values, text, ministack, queue_name, capsys):
        """Credentials and the region are looked for."""
        configure_aws(ministack, queue_name)
        given = dict(taskhawk.settings.given) | values
        taskhawk.configure(given)
        code, (line, _) = check(capsys)
        assert code == 1
        assert line.startswith(f"error: TASKHAWK-{queue_name}: {text}")

    def test_good(self, endpoint, sqs_client, queue_name, capsys):
        """What was provisioned has no fault."""
        configure_account(sqs_client, endpoint, queue_name)
        provision(capsys)
        assert check(capsys, "--priority=high", "--priority=default") == (
            0,
            ["nothing is wrong"],
        )
        assert check(capsys, "--json") == (0, ["[]"])

    def test_missing(self, ministack, queue_name, capsys):
        """A queue that is not there is an error: of the tasks' priorities, or the ones named."""
        configure_aws(ministack, queue_name)
        code, lines = check(capsys, "--json", "--priority=bulk")
        assert code == 1
        assert json.loads("\n".join(lines)) == [
            {
                "severity": "error",
                "what": f"TASKHAWK-{queue_name}-BULK: no such queue",
                "why": "dispatch raises",
                "remedy": "python -m taskhawk provision",
            }
        ]

    def test_queue(self, ministack, sqs_client, queue_name, capsys):
        """Redrive, retention and sizes are held against each other and the tasks."""
        taskhawk._registry.clear()
        client, name = sqs_client(ministack), f"TASKHAWK-{queue_name}"
        configure_aws(ministack, queue_name)
        client.create_queue(QueueName=name)
        assert check(capsys)[1][0] == (
            f"error: {name}: it has no dead-letter queue: what fails is retried until it expires."
            " Mend it: python -m taskhawk provision"
        )

        @taskhawk.task(
            name="slow",
            time_limit=60,
            retry=taskhawk.fixed(1, max_retries=2),
            isolate=True,
        )
        def slow() -> None:
            """Do nothing."""

        for suffix, extra in (("-DLQ", {}), ("", {"MaximumMessageSize": "262144"})):
            attributes = {"MessageRetentionPeriod": "86400", **extra}
            if not suffix:
                arn = attributes_of(client, f"{name}-DLQ")["QueueArn"]
                redrive = {"deadLetterTargetArn": arn, "maxReceiveCount": 2}
                attributes["RedrivePolicy"] = json.dumps(redrive)
                url = client.get_queue_url(QueueName=name)["QueueUrl"]
                client.set_queue_attributes(QueueUrl=url, Attributes=attributes)
            else:
                client.create_queue(QueueName=f"{name}{suffix}", Attributes=attributes)
        configure_aws(ministack, queue_name)
        code, lines = check(capsys)
        assert (code, [line.partition(". Mend")[0] for line in lines]) == (
            1,
            [
                (
                    f"warning: {name}: its visibility timeout of 30 s is below slow's limit of 60"
                    " s: after a worker that can't extend it, or in Lambda, the task runs twice at"
                    " once"
                ),
                (
                    f"error: {name}: its maxReceiveCount of 2 is not above slow's 2 retries: the"
                    " queue gives up before the task's policy does"
                ),
                (
                    f"warning: {name}: its maxReceiveCount is 2: a few crashes or releases are"
                    " enough to make a dead letter of a good message"
                ),
                (
                    f"warning: {name}-DLQ: it keeps messages for 86400 s, and {name} for 86400 s:"
                    " the time counts from the first sending: a dead letter may expire at once"
                ),
                (
                    f"warning: {name}: it takes messages of at most 262144 bytes: SQS takes 1 MiB,"
                    " and larger ones are refused at dispatch"
                ),
                "5 found",
            ],
        )

    def test_no_dead_letter_queue(self, ministack, sqs_client, queue_name, capsys):
        """A dead-letter queue that is gone is an error, and the other queues are looked at too."""
        client, name = sqs_client(ministack), f"TASKHAWK-{queue_name}"
        configure_aws(ministack, queue_name)
        provision(capsys, "--priority=default")
        dead = attributes_of(client, f"{name}-DLQ")["QueueArn"]
        policy = json.dumps({"deadLetterTargetArn": dead, "maxReceiveCount": 5})
        low, attributes = f"{name}-LOW-PRIORITY", {"RedrivePolicy": policy}
        client.create_queue(QueueName=low, Attributes=attributes)
        client.delete_queue(
            QueueUrl=client.get_queue_url(QueueName=f"{name}-DLQ")["QueueUrl"]
        )
        configure_aws(ministack, queue_name)
        (line, _) = check(capsys, "--priority=low")[1]
        assert line.endswith(". Mend it: make it, or correct the RedrivePolicy")
        code, lines = check(capsys, "--priority=default", "--priority=bulk")
        assert (code, [line.partition(". Mend")[0] for line in lines]) == (
            1,
            [
                f"error: {name}-DLQ: no such queue: what fails is retried until it expires",
                f"error: {name}-BULK: no such queue: dispatch raises",
                "2 found",
            ],
        )

    def test_kept_for_long(self, ministack, sqs_client, queue_name, capsys):
        """Where provisioning would not mend it, the remedy is another."""
        client, name = sqs_client(ministack), f"TASKHAWK-{queue_name}"
        configure_aws(ministack, queue_name)
        provision(capsys, "--priority=default")
        url = client.get_queue_url(QueueName=name)["QueueUrl"]
        client.set_queue_attributes(
            QueueUrl=url, Attributes={"MessageRetentionPeriod": "1209600"}
        )
        (line, _) = check(capsys, "--priority=default")[1]
        assert line.endswith(
            f". Mend it: set MessageRetentionPeriod of {name} below that of {name}-DLQ:"
            " 1209600 is the most"
        )

    def test_fault(self, scripted, capsys):
        """What can't be looked at is a finding too, and tells where to look for the reason."""
        scripted.always("GetQueueUrl", fault("ExpiredToken", status=403))
        code, lines = check(capsys, "--json", "--priority=default", "--priority=bulk")
        (finding,) = json.loads("\n".join(lines))
        assert (code, finding["severity"]) == (1, "error")
        assert finding["what"].startswith(
            "An error occurred (ExpiredToken) when calling"
        )
        assert finding["remedy"] == (
            "check credentials, AWS_REGION, AWS_ENDPOINT_SQS and the network"
        )

    def test_lambda_app_on_sqlite(self, tmp_path, capsys):
        """A Lambda app that is tried out on SQLite has no topics to look at."""
        taskhawk._registry.clear()
        url = f"sqlite:///{tmp_path}/queue.db?max_receive_count=2"
        taskhawk.configure(TASKHAWK_BROKER=url, IS_LAMBDA_APP=True)
        code, (line, _) = check(capsys)
        assert code == 0
        assert line.startswith("warning: TASKHAWK-DEFAULT: its maxReceiveCount is 2: ")
        assert line.endswith(". Mend it: in TASKHAWK_BROKER, max_receive_count=5")

    def test_odd_setting(self, ministack, queue_name, capsys):
        """A setting that is missing or wrong is a finding."""
        configure_aws(ministack, queue_name)
        taskhawk.configure(dict(taskhawk.settings.given) | {"TASKHAWK_QUEUE": "my app"})
        code, (line, _) = check(capsys)
        assert code == 1
        assert line.startswith(
            "error: TASKHAWK_QUEUE in configure(): expected at most 71 letters"
        )

    def test_topics(self, ministack, queue_name, capsys):
        """A topic must be there, and have a subscriber."""
        configure_aws(ministack, queue_name, IS_LAMBDA_APP=True)
        topic = f"arn:aws:sns:us-east-1:000000000000:taskhawk-{queue_name.lower()}"
        (line, _) = check(capsys)[1]
        assert line.startswith(f"error: {topic}: no such topic: dispatch raises.")
        provision(capsys, "--priority=default")
        (line, _) = check(capsys)[1]
        assert line.startswith(
            f"error: {topic}: nobody subscribes: what is sent is lost."
        )

    @pytest.mark.parametrize("lambda_app", [False, True])
    def test_denied(self, scripted, queue_name, capsys, lambda_app):
        """What is not allowed is an error, with its sentence."""
        configure_aws(scripted.url, queue_name, IS_LAMBDA_APP=lambda_app)
        for action in ("GetQueueAttributes", "ListSubscriptionsByTopic"):
            scripted.always(action, fault("AccessDenied", status=403))
        code, (line, _) = check(capsys)
        assert code == 1
        assert (
            "access denied: the IAM policy of these credentials does not allow" in line
        )

    def test_main(self, sqlite, capsys):
        """A task that is registered under __main__ is found by no worker."""
        taskhawk._registry.clear()
        taskhawk.task(name="__main__.job")(lambda_free_function)
        assert check(capsys) == (
            1,
            [
                (
                    "error: task __main__.job is of __main__: a worker can't find it under that"
                    " name. Mend it: move it to a module"
                ),
                "1 found",
            ],
        )


# --- 20. command line -----------------------------------------------------------------

COMMAND_MODULE = """
import {package} as taskhawk

@taskhawk.task
def add(one, other=2, headers=None, metadata=None):
    print("sum", one + other, headers, metadata.priority.name, flush=True)

@taskhawk.task(priority=taskhawk.Priority.high, name="skip")
def skip():
    raise taskhawk.IgnoreException  # of the very module that runs the worker

@taskhawk.task(name="job.broken", never_retry_on=(ZeroDivisionError,))
def broken():
    1 / 0
"""
COMMANDS = [
    "demo",
    "listen",
    "dispatch",
    "tasks",
    "schema",
    "stats",
    "check",
    "provision",
    "vendor",
]
COMMANDS += [
    "dead-letters",
    *(f"dead-letters {a}" for a in ["list", "show", "requeue", "delete", "export"]),
]


def command_line(folder: Path, way: str) -> tuple[list[str], str]:
    """Return how the command line is called in a way, and by which name tasks import taskhawk."""
    if way == "vendored":
        package = folder / "service" / "vendor"
        package.mkdir(parents=True)
        for parent in (package, package.parent):
            (parent / "__init__.py").touch()
        shutil.copy(taskhawk.__file__, package)
        return ["-m", "service.vendor.taskhawk"], "service.vendor.taskhawk"
    script = Path(sys.executable).with_name("taskhawk")
    if way == "script" and not script.exists():
        pytest.skip("taskhawk is not installed")
    called = {
        "module": ["-m", "taskhawk"],
        "file": [taskhawk.__file__],
        "script": [str(script)],
    }
    return called[way], "taskhawk"


@pytest.fixture
def command_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the current directory of a command that runs in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


class TestCommandLine:
    """Room 15: glue only; 0 done, 1 failed, 2 wrong usage or configuration."""

    def test_shadow(self, tmp_path):
        """The script's help runs nothing that lies in the current directory."""
        (tmp_path / "argparse.py").write_text("raise SystemExit(3)")
        script = "import sys, taskhawk; sys.exit(taskhawk.main(['--version']))"
        result = run_python(["-P", "-c", script], cwd=tmp_path)
        assert (result.returncode, result.stdout) == (0, f"{taskhawk.VERSION}\n")

    @pytest.mark.parametrize(
        ("line", "text"),
        [
            ("import os; os.environ['NOT_SET']", "KeyError('NOT_SET')"),
            ("assert 0", "AssertionError()"),
            ("raise OSError('in two\\nlines')", "in two lines"),
        ],
    )
    def test_module_fails(self, command_folder, capsys, line, text):
        """Whatever a module raises when it is imported is one line, and tells what it was."""
        (command_folder / "failing_jobs.py").write_text(f"{line}\n")
        assert command_error(capsys, "tasks", "failing_jobs") == (
            1,
            f"taskhawk: {text}",
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("way", ["module", "vendored", "file", "script"])
    def test_ways(self, tmp_path, way):
        """However it is called, the command line and the tasks' modules share one registry."""
        command, package = command_line(tmp_path, way)
        (tmp_path / "job.py").write_text(COMMAND_MODULE.format(package=package))
        env = {"TASKHAWK_BROKER": f"sqlite:///{tmp_path}/queue.db"}

        def run(*arguments: str) -> str:
            result = run_python([*command, *arguments], cwd=tmp_path, env=env)
            assert result.returncode == 0, result.stderr
            return result.stdout

        assert (
            run("tasks", "job") == "job.add  default\njob.broken  default\nskip  high\n"
        )
        arguments = ("--args", "[1]", "--kwargs", '{"other": 3}', "--priority", "high")
        assert re.fullmatch(
            "[-0-9a-f]{36}\n",
            run("dispatch", "job.add", *arguments, "--header", "a=b=c"),
        )
        run("dispatch", "skip", "--module", "job")
        output = run(
            "listen", "job", "--loop-count", "1", "--priority=high", "--num-messages=2"
        )
        assert output == (
            "sum 4 {'a': 'b=c'} high\n"
            "2 received, 2 acked, 0 retried, 0 dead-lettered, 0 released, 0 uncertain\n"
        )

    @pytest.mark.slow
    def test_dead_letters(self, tmp_path):
        """A dead letter is sent back to its queue, with its priority, and runs again."""
        (tmp_path / "job.py").write_text(COMMAND_MODULE.format(package="taskhawk"))
        env = {"TASKHAWK_BROKER": f"sqlite:///{tmp_path}/queue.db"}
        ledger = (
            "1 received, 0 acked, 0 retried, 1 dead-lettered, 0 released, 0 uncertain\n"
        )

        def run(*arguments: str) -> str:
            result = run_python(["-m", "taskhawk", *arguments], cwd=tmp_path, env=env)
            assert result.returncode == 0, result.stderr
            return result.stdout

        run("dispatch", "job.broken", "--priority", "low", "--delay", "0.01")
        listen = ("listen", "job", "--loop-count=1", "--priority=low")
        assert run(*listen) == ledger
        requeue = ("dead-letters", "requeue", "--priority")
        assert run(*requeue, "bulk") == "sent back: 0\n"
        assert run(*requeue, "low") == "sent back: 1\n"
        assert run(*listen) == ledger

    @pytest.mark.slow
    def test_demo(self, tmp_path):
        """In under 5 s, whatever is set, the demo shows a run, a retry, a dead letter's return."""
        began = time.monotonic()
        env = {
            "TASKHAWK_SYNC": "true",
            "IS_LAMBDA_APP": "true",
            "TASKHAWK_BROKER": "sqlite:////nonexistent/queue.db",
        }
        result = run_python(["-m", "taskhawk", "demo"], cwd=tmp_path, env=env)
        assert time.monotonic() - began < 5
        assert (result.returncode, result.stderr) == (0, "")
        shown = re.sub(r"[-0-9a-f]{36}", "ID", result.stdout)
        shown = re.sub(r"A queue in \S+queue\.db", "A queue in FILE", shown)
        for line in (
            "A queue in FILE: the real broker, and a real worker.",
            "dispatched     demo.greet    ID",
            "dispatched     demo.connect  ID",
            "dispatched     demo.divide   ID",
            "                             Hello, world!",
            "ran            demo.greet    attempt 1",
            "failed         demo.connect  attempt 1: the network is down; again in 0.5 s",
            "failed         demo.divide   attempt 1: division by zero; again in 0.2 s",
            "dead-lettered  demo.divide   attempt 2: division by zero",
            "ran            demo.connect  attempt 2",
            "requeued       1 message",
            "ran            demo.divide   attempt 1",
            "  5 received, 2 acked, 2 retried, 1 dead-lettered, 0 released, 0 uncertain",
            "  1 received, 1 acked, 0 retried, 0 dead-lettered, 0 released, 0 uncertain",
        ):
            assert line in shown.splitlines()
        assert list(tmp_path.iterdir()) == []

    def test_tasks_of_a_script(self, capsys):
        """A task of a script, which 1.4 named otherwise, is listed once."""

        def job() -> None:
            raise NotImplementedError

        taskhawk._registry.clear()
        job.__module__ = "__main__"
        name = taskhawk.task(job).name
        assert taskhawk.main(["tasks"]) == 0
        assert capsys.readouterr().out == f"{name}  default\n"

    def test_schema(self, capsys):
        """The schema is printed as JSON."""
        assert taskhawk.main(["schema"]) == 0
        assert json.loads(capsys.readouterr().out) == taskhawk.SCHEMA

    @pytest.mark.parametrize("command", COMMANDS)
    def test_help(self, capsys, command):
        """The help of every command shows an example, whole on its line, that can be copied."""
        with pytest.raises(SystemExit) as ended:
            taskhawk.main([*command.split(), "--help"])
        assert ended.value.code == 0
        (example,) = re.findall(
            r"^(?:example: +| +)(python -m .*)$", capsys.readouterr().out, re.MULTILINE
        )
        assert re.search(rf"taskhawk {command}\b", example)

    def test_version(self, capsys):
        """The version is printed."""
        with pytest.raises(SystemExit) as ended:
            taskhawk.main(["--version"])
        assert (ended.value.code, capsys.readouterr().out) == (
            0,
            f"{taskhawk.__version__}\n",
        )

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["nonsense"],
            ["listen", "--nonsense"],
            ["dead-letters"],
            ["listen", "--priority=x"],
        ],
        ids=" ".join,
    )
    def test_wrong_usage(self, capsys, arguments):
        """What the parser does not know is wrong usage."""
        with pytest.raises(SystemExit) as ended:
            taskhawk.main(arguments)
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith("usage: taskhawk")

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (
                "listen",
                (
                    "listen: no task is registered: name the modules that define them, such as"
                    " myapp.tasks"
                ),
            ),
            (
                "listen nowhere.tasks",
                "the module 'nowhere.tasks' can't be imported: No module named 'nowhere'",
            ),
            (
                "tasks nowhere",
                "the module 'nowhere' can't be imported: No module named 'nowhere'",
            ),
            (
                "dispatch nowhere.f",
                "the module 'nowhere' can't be imported: No module named 'nowhere'",
            ),
            ("dispatch f", "no task is registered as 'f': is its module imported?"),
            (
                "dispatch job.missing",
                "no task is registered as 'job.missing': is its module imported?",
            ),
            (
                "dispatch job.add --args [1",
                "--args: expected an array of JSON, got '[1'",
            ),
            (
                "dispatch job.add --args [NaN]",
                "--args: expected an array of JSON, got '[NaN]'",
            ),
            (
                "dispatch job.add --args {}",
                "--args: expected an array of JSON, got '{}'",
            ),
            (
                "dispatch job.add --kwargs []",
                "--kwargs: expected an object of JSON, got '[]'",
            ),
            ("dispatch job.add --header a", "--header: expected K=V, got 'a'"),
            ("dispatch job.add", "job.add: missing a required argument: 'one'"),
            (
                "dispatch job.add --args [1] --delay -1",
                "delay: expected 0 or more seconds, got -1.0",
            ),
            (
                "dispatch job.add --args [1] --delay nan",
                "delay: expected 0 or more seconds, got nan",
            ),
            ("listen job --num-messages 0", "num_messages: expected 1 or more, got 0"),
            (
                "listen job --visibility-timeout 0.5",
                "visibility_timeout_s: expected 1 to 43200 seconds, got 0.5",
            ),
        ],
    )
    def test_wrong_arguments(
        self, capsys, command_folder, monkeypatch, arguments, sentence
    ):
        """What can't work is said in one line, and the exit code is 2."""
        taskhawk._registry.clear()
        (command_folder / "job.py").write_text(
            COMMAND_MODULE.format(package="taskhawk")
        )
        monkeypatch.setenv("TASKHAWK_BROKER", "sqlite:///queue.db")
        assert command_error(capsys, *arguments.split()) == (2, f"taskhawk: {sentence}")

    @pytest.mark.parametrize(
        ("name", "value", "sentence"),
        [
            (
                "TASKHAWK_BROKER",
                "redis://",
                (
                    "TASKHAWK_BROKER in the environment: expected 'sqs' or a URL of SQLite, such as"
                    " 'sqlite:///queue.db', got 'redis://'"
                ),
            ),
            (
                "SETTINGS_MODULE",
                "nowhere",
                (
                    "the module named by SETTINGS_MODULE 'nowhere' can't be imported: No module"
                    " named 'nowhere'"
                ),
            ),
            (
                "DJANGO_SETTINGS_MODULE",
                "nowhere",
                (
                    "the module named by DJANGO_SETTINGS_MODULE 'nowhere' can't be imported: No"
                    " module named 'nowhere'"
                ),
            ),
        ],
    )
    def test_wrong_configuration(self, tmp_path, name, value, sentence):
        """Wrong configuration is said in one line, and the exit code is 2."""
        (tmp_path / "job.py").write_text(COMMAND_MODULE.format(package="taskhawk"))
        result = run_python(
            ["-m", "taskhawk", "dispatch", "job.broken"],
            cwd=tmp_path,
            env={name: value},
        )
        assert (result.returncode, result.stderr) == (2, f"taskhawk: {sentence}\n")

    @pytest.mark.parametrize(
        "command", ["listen job", "dispatch job.add", "dead-letters requeue"]
    )
    @pytest.mark.parametrize("url", ["sqlite://", "sqlite://?max_receive_count=3"])
    def test_memory(self, capsys, command_folder, monkeypatch, command, url):
        """A queue in the memory of a process that ends is refused."""
        (command_folder / "job.py").write_text(
            COMMAND_MODULE.format(package="taskhawk")
        )
        monkeypatch.setenv("TASKHAWK_BROKER", url)
        name = " ".join(command.split()[: 2 if "dead" in command else 1])
        assert command_error(capsys, *command.split()) == (
            2,
            (
                f"taskhawk: {name}: sqlite:// is the memory of one process: use a file, such as"
                " sqlite:///queue.db"
            ),
        )

    @pytest.mark.parametrize(
        "command",
        ["listen memory_job --until-empty", "dispatch memory_job.add --args [1]"],
    )
    def test_memory_of_a_module(self, capsys, command_folder, command):
        """So is one that the tasks' module configures."""
        (command_folder / "memory_job.py").write_text(
            COMMAND_MODULE.format(package="taskhawk")
            + "taskhawk.configure(TASKHAWK_BROKER='sqlite://')\n"
        )
        assert command_error(capsys, *command.split()) == (
            2,
            (
                f"taskhawk: {command.split()[0]}: sqlite:// is the memory of one process: use a"
                " file, such as sqlite:///queue.db"
            ),
        )

    def test_failed(self, capsys, command_folder, aws):
        """What the service refuses is said in one line, and the exit code is 1."""
        policy = json.dumps({"deadLetterTargetArn": "arn:aws:sqs:us-east-1:1:letters"})
        letter = {"MessageId": "m", "ReceiptHandle": "r", "Body": "{}"}
        attributes = aws.default("GetQueueAttributes", {})["Attributes"]
        attributes |= {"RedrivePolicy": policy, "ApproximateNumberOfMessages": "1"}
        aws.always("GetQueueAttributes", {"Attributes": attributes})
        aws.always("ReceiveMessage", {"Messages": [letter]})
        aws.always("SendMessage", fault("com.amazonaws.sqs#KmsDisabled"))
        assert command_error(capsys, "dead-letters", "requeue") == (
            1,
            "taskhawk: 1 of 1 messages failed: KmsDisabled",
        )
        (command_folder / "job.py").write_text(
            COMMAND_MODULE.format(package="taskhawk")
        )
        code, line = command_error(capsys, "dispatch", "job.broken")
        assert code == 1
        assert line.startswith("taskhawk: ")
        assert "KmsDisabled" in line

    def test_unreachable(self, tmp_path):
        """A service that can't be reached is said in one line, and the exit code is 1."""
        url = f"http://127.0.0.1:{free_port()}"
        env = {
            "AWS_ENDPOINT_SQS": url,
            "AWS_REGION": "us-east-1",
            "TASKHAWK_QUEUE": "app",
        }
        env |= {"AWS_ACCESS_KEY": "test", "AWS_SECRET_KEY": "test"}
        (tmp_path / "job.py").write_text(COMMAND_MODULE.format(package="taskhawk"))
        result = run_python(
            ["-m", "taskhawk", "dispatch", "job.broken"], cwd=tmp_path, env=env
        )
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith("taskhawk: ")
        assert url in result.stderr
        assert result.stderr.count("\n") == 1

    def test_disk_full(self, capsys, command_folder):
        """An error of the system is one line too."""
        (command_folder / "job.py").write_text(
            f"raise OSError({errno.ENOSPC}, 'No space left on device')"
        )
        assert command_error(capsys, "tasks", "job") == (
            1,
            f"taskhawk: [Errno {errno.ENOSPC}] No space left on device",
        )

    def test_uncertain(self, capsys, command_folder, aws):
        """A worker that does not know whether a message was deleted exits with 1."""

        def receive(call: AwsCall) -> AwsAnswer:
            return brings_messages(taskhawk.Message.new("job.add", [1]))

        aws.always("ReceiveMessage", receive)
        gone = refuse(0, code="ReceiptHandleIsInvalid", ours=True)
        aws.always("DeleteMessageBatch", gone)
        (command_folder / "job.py").write_text(
            COMMAND_MODULE.format(package="taskhawk")
        )
        options = ("--loop-count", "1", "--visibility-timeout", "30")
        assert taskhawk.main(["listen", "job", *options]) == 1
        assert capsys.readouterr().out == (
            "sum 3 {} default\n"
            "1 received, 0 acked, 0 retried, 0 dead-lettered, 0 released, 1 uncertain\n"
        )

    def test_interrupted(self, command_folder):
        """A KeyboardInterrupt ends a command without a traceback."""
        (command_folder / "job.py").write_text("raise KeyboardInterrupt")
        assert taskhawk.main(["tasks", "job"]) == 130

    @pytest.mark.slow
    def test_django(self, tmp_path):
        """Where DJANGO_SETTINGS_MODULE is set, Django is set up before modules are imported."""
        for name, text in {
            "site_settings.py": "INSTALLED_APPS = ['shop']\nUSE_TZ = True\nSECRET_KEY = 'x'\n"
            f"TASKHAWK_BROKER = 'sqlite:///{tmp_path}/queue.db'\n",
            "shop/__init__.py": "",
            "shop/models.py": "from django.db import models\nclass Sale(models.Model):\n"
            "    id = models.BigAutoField(primary_key=True)\n",
            "shop/tasks.py": "import taskhawk\nfrom shop.models import Sale\n"
            "@taskhawk.task\ndef sell():\n    print('sold', Sale._meta.label)\n",
        }.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        env = {"DJANGO_SETTINGS_MODULE": "site_settings"}
        for arguments, output in [
            (["dispatch", "shop.tasks.sell"], "[-0-9a-f]{36}\n"),
            (
                ["listen", "shop.tasks", "--until-empty"],
                "sold shop.Sale\n1 received, 1 acked,.*\n",
            ),
        ]:
            result = run_python(["-m", "taskhawk", *arguments], cwd=tmp_path, env=env)
            assert result.returncode == 0, result.stderr
            assert re.fullmatch(output, result.stdout)


# --- 23. vendoring --------------------------------------------------------------------

# Where a part's copy ends, and the classes of the last part it has: a sample that is quick.
VENDOR_CUTS = {"publisher": "PART IV:", "service": "PART V:", "production": "PART VI:"}
VENDOR_CLASSES = {
    "publisher": ["TestTasks", "TestPublishing", "TestBatch", "TestCapture"],
    "service": ["TestProcessing", "TestSync"],
    "production": ["TestStates"],
}
VENDOR_TASKS = """
import os
from service.vendor import taskhawk

@taskhawk.task
def plain(word):
    print(word, flush=True)

@taskhawk.task(isolate=True)
def isolated(word, worker):
    print(word, os.getpid() != worker, flush=True)
"""
VENDOR_PROGRAM = """
import os
from service.vendor.taskhawk import *
from service.vendor import taskhawk
import jobs

assert {name for name in vars(taskhawk) if name in taskhawk.__all__} <= {*globals()}
jobs.plain.dispatch("ran")
jobs.isolated.dispatch("ran apart:", os.getpid())
print(SqliteBroker("sqlite:///queue.db").depth("TASKHAWK-DEFAULT").visible, "dispatched")
"""
VENDOR_WORKER = "print(listen_for_messages(Priority.default, until_empty=True))"
VENDOR_LEDGER = (
    "2 received, 2 acked, 0 retried, 0 dead-lettered, 0 released, 0 uncertain\n"
)
VENDOR_CONFTEST = """
def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if item.originalname not in {unfit!r}]
"""


def vendor(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    """Run the command with --json, and return its exit code and its report."""
    code = taskhawk.main(["vendor", "--json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


def vendor_package(folder: Path) -> Path:
    """Make the package service.vendor, and return where its taskhawk.py will be."""
    package = folder / "service" / "vendor"
    package.mkdir(parents=True)
    for parent in (package, package.parent):
        (parent / "__init__.py").touch()
    return package / "taskhawk.py"


def vendor_cut(text: str, part: str) -> str:
    """Return the module or its test suite up to the end of a part."""
    return text.partition(f"\n# === {VENDOR_CUTS[part]}")[0].rstrip() + "\n"


def vendor_uses(node: ast.AST) -> Iterator[str]:
    """Yield the names that a piece of source uses, also in programs that it embeds."""
    for child in ast.walk(node):
        if isinstance(child, ast.Name):
            yield child.id
        elif isinstance(child, ast.arg | ast.keyword):
            yield child.arg or "**"
        elif isinstance(child, ast.Attribute):
            yield ast.unparse(child)
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            programs = re.sub(r"^taskhawk$|-m taskhawk\b", "taskhawk.main", child.value)
            yield from re.findall(r"\btaskhawk\.\w+", programs)


def vendor_definitions(text: str) -> dict[str, set[str]]:
    """Return what each name of a file uses; of a test class, each method's name."""
    uses = collections.defaultdict(set)
    nodes = ast.parse(text).body
    for node in nodes:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            nodes += [each for each in node.body if isinstance(each, HOUSE_FUNCTIONS)]
        elif isinstance(node, (*HOUSE_FUNCTIONS, ast.ClassDef)):
            uses[node.name].update(vendor_uses(node))
        else:
            for name in ast.walk(node):
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    uses[name.id].update(vendor_uses(node))
    return uses


def vendor_unfit(module: str, tests: str, part: str) -> set[str]:
    """Return the tests of a cut suite that use what was cut off, or a helper that does."""
    kept = vendor_definitions(vendor_cut(tests, part))
    gone = {*vendor_definitions(module)} - {
        *vendor_definitions(vendor_cut(module, part))
    }
    unfit = {f"taskhawk.{name}" for name in gone}
    unfit |= {*vendor_definitions(tests)} - {*kept}
    if "process" in gone:
        unfit.add("TASKHAWK_SYNC")  # is part IV's, though it is set in part I
    while more := {name for name, uses in kept.items() if uses & unfit} - unfit:
        unfit |= more
    return {name for name in unfit if name.startswith("test_")}


VENDOR_EDITS = {  # what a hand did to a copy, and what the check names
    "a line in a room": (
        "\nVERSION = ",
        "\nOTHER = 1\nVERSION = ",
        ["names and limits"],
    ),
    "a word in the docstring": ("Quickstart", "Start", ["docstring"]),
    "a part's names": ('    "Broker",\n', "", ["PART II: QUEUES"]),
    "a room's title": (" errors ---", " faults ---", ["errors", "faults"]),
    "a room twice": (
        "# --- 2. errors",
        "# --- 1. errors -\nraise\n# --- 2. errors",
        ["errors"],
    ),
    "a line above": ("# taskhawk ", "import this\n# taskhawk ", None),
    "a line below the header": ('"""Run', 'import this\n"""Run', ["docstring"]),
    "a hash": (r"# \w{16} errors", "# 0123456789abcdef errors", ["errors"]),
    "a room's number": (" 2. errors", " 22. errors", []),
    "blank lines": ("\n\n\n# --- 2", "\n# --- 2", []),
    "line ends": ("\n", "\r\n", []),
}


class TestVendoring:
    """A copy of the file says what it is, whether it was changed, and what to audit again."""

    def test_whole(self, tmp_path, capsys):
        """A copy has all the text below a header; it can write and check further copies."""
        path = vendor_package(tmp_path)
        code, report = vendor(capsys, path)
        banners = re.findall(r"(?m)^# (?:===|--- \d+\.) (.+?) [-=]+$", house_source())
        assert (code, report) == (
            0,
            {
                "path": str(path),
                "version": taskhawk.VERSION,
                "part": "whole",
                "modified": [],
                "audit": ["docstring", *banners],
                "gone": [],
            },
        )
        text = path.read_text()
        assert text.endswith("\n" + house_source())
        assert re.findall(r"(?m)^# [0-9a-f]{16} (.+)$", text) == report["audit"]
        assert len(os.listdir(path.parent)) == 2  # with __init__.py
        copy = ["-m", "service.vendor.taskhawk", "vendor"]
        for arguments in ([path], ["--check", path], [tmp_path / "other.py"]):
            result = run_python([*copy, *map(str, arguments)], cwd=tmp_path)
            assert (result.returncode, result.stderr) == (0, "")
        assert path.read_text() == (tmp_path / "other.py").read_text() == text

    @pytest.mark.parametrize("edit", VENDOR_EDITS)
    def test_changed_by_hand(self, edit, tmp_path, capsys):
        """A check names the sections that are not as they were written, and exits with 1."""
        old, new, modified = VENDOR_EDITS[edit]
        path = tmp_path / "taskhawk.py"
        vendor(capsys, path, "--part", "service")
        count = 0 if edit == "line ends" else 1
        edited = re.sub(old, new, path.read_text(), count=count).encode()
        path.write_bytes(edited)
        if modified is None:
            code, error = command_error(capsys, "vendor", "--check", str(path))
            wrong = "does not begin with the header of a vendored copy"
            fix = "Fix: name another path, or move that file away"
            assert (code, error) == (2, f"taskhawk: vendor: {path} {wrong}. {fix}")
            return
        code, report = vendor(capsys, "--check", path)
        assert (code, report["modified"]) == (int(bool(modified)), modified)
        if modified:
            code, error = command_error(capsys, "vendor", str(path))
            changed = f"{path} was changed by hand: {', '.join(modified)}"
            fix = "Fix: restore it, or move it away"
            assert (code, error) == (2, f"taskhawk: vendor: {changed}. {fix}")
            assert path.read_bytes() == edited

    def test_moved_room(self, tmp_path, capsys):
        """Rooms in another order are a change too."""
        path = tmp_path / "taskhawk.py"
        vendor(capsys, path)
        rooms = re.split(r"(?m)^(?=# ---)", path.read_text())
        path.write_text("".join([*rooms[:2], rooms[3], rooms[2], *rooms[4:]]))
        code, report = vendor(capsys, "--check", path)
        assert (code, report["modified"]) == (1, ["the order of the rooms"])

    def test_upgrade(self, tmp_path, capsys):
        """A copy of an older version says what it was, and what has changed since."""
        (tmp_path / "old").mkdir()
        text = house_source().replace("# --- 2. errors -", "# --- 2. old faults -")
        text = text.replace(f'_version__ = "{taskhawk.VERSION}', '_version__ = "4.9.9')
        (tmp_path / "old" / "taskhawk.py").write_text(text)
        path = tmp_path / "taskhawk.py"
        program = [str(tmp_path / "old" / "taskhawk.py"), "vendor", str(path)]
        result = run_python([*program, "--part", "production"], cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        assert taskhawk.main(["vendor", "--check", str(path)]) == 0
        report = [
            f"to audit for {taskhawk.VERSION}: names and limits",
            f"to audit for {taskhawk.VERSION}: errors",
            f"gone in {taskhawk.VERSION}: old faults",
        ]
        first = f"{path}: taskhawk 4.9.9, part: production, unmodified"
        assert capsys.readouterr().out.splitlines() == [first, *report]
        assert taskhawk.main(["vendor", str(path), "--part", "production"]) == 0
        first = f"{path}: taskhawk {taskhawk.VERSION}, part: production, unmodified"
        assert capsys.readouterr().out.splitlines() == [first, *report]
        path.write_text(path.read_text().replace("Base of all errors", "Base"))
        assert taskhawk.main(["vendor", "--check", str(path)]) == 1
        first = first.replace("unmodified", "changed by hand")
        changed = [first, "changed by hand: errors"]
        assert capsys.readouterr().out.splitlines() == changed

    def test_no_folder(self, tmp_path, capsys):
        """A folder that is missing is not made: it would have to be a package."""
        path = tmp_path / "vendor" / "taskhawk.py"
        expected = (
            f"taskhawk: vendor: {path.parent} is not a folder. Fix: make it first"
        )
        assert command_error(capsys, "vendor", str(path)) == (2, expected)

    def test_changed_source(self, tmp_path, capsys):
        """A copy that was changed by hand checks itself, but writes no further copies."""
        path = vendor_package(tmp_path)
        vendor(capsys, path)
        path.write_text(
            path.read_text().replace("\nVERSION = ", "\nOTHER = VERSION = ")
        )
        copy = ["-m", "service.vendor.taskhawk", "vendor"]
        result = run_python([*copy, "--check", str(path)], cwd=tmp_path)
        assert (result.returncode, result.stderr) == (1, "")
        assert "\nchanged by hand: names and limits\n" in result.stdout
        result = run_python([*copy, "other.py"], cwd=tmp_path)
        changed = (
            "the copy that runs this command was changed by hand: names and limits"
        )
        fix = "Fix: restore it, or move it away"
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"taskhawk: vendor: {changed}. {fix}\n"
        assert not (tmp_path / "other.py").exists()

    def test_full_disk(self, tmp_path, capsys):
        """A copy that can't be written leaves the old one as it was, and nothing beside it."""
        path = tmp_path / "vendored.py"
        vendor(capsys, path, "--part", "publisher")
        before = path.read_bytes()
        code = f"""if True:
            import resource, sys, taskhawk
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
            sys.exit(taskhawk.main(["vendor", {str(path)!r}]))"""
        result = run_python(code, cwd=tmp_path)
        error = "taskhawk: [Errno 27] File too large\n"
        assert (result.returncode, result.stdout, result.stderr) == (1, "", error)
        assert (os.listdir(tmp_path), path.read_bytes()) == (["vendored.py"], before)

    @pytest.mark.parametrize("part", VENDOR_CUTS)
    def test_cut_works(self, part, tmp_path, capsys):
        """A part imports, exports what it has, dispatches, and runs tasks if it can."""
        path = vendor_package(tmp_path)
        assert vendor(capsys, path, "--part", part)[0] == 0
        assert path.read_text().endswith("\n" + vendor_cut(house_source(), part))
        (tmp_path / "jobs.py").write_text(VENDOR_TASKS)
        works = part != "publisher"
        env = {"TASKHAWK_BROKER": "sqlite:///queue.db"}
        program = VENDOR_PROGRAM + VENDOR_WORKER * works
        result = run_python(program, cwd=tmp_path, env=env)
        assert (result.returncode, result.stderr) == (0, "")
        ran = f"ran\nran apart: True\n{VENDOR_LEDGER}" * works
        assert result.stdout == f"2 dispatched\n{ran}"
        result = run_python(["-m", "service.vendor.taskhawk", "demo"], cwd=tmp_path)
        error = "taskhawk: this copy of the file has no command line\n"
        assert (result.returncode, result.stderr) == (2, error)

    @pytest.mark.slow
    @pytest.mark.parametrize("part", VENDOR_CUTS)
    def test_cut_is_tested(self, part, tmp_path):
        """The suite, cut like the module, passes; what uses a later part is left out."""
        module, tests = house_source(), Path(__file__).read_text(encoding="utf-8")
        (tmp_path / "taskhawk.py").write_text(vendor_cut(module, part))
        (tmp_path / "test_taskhawk.py").write_text(vendor_cut(tests, part))
        unfit = vendor_unfit(module, tests, part)
        (tmp_path / "conftest.py").write_text(VENDOR_CONFTEST.format(unfit=unfit))
        shutil.copy(project_file("pyproject.toml"), tmp_path)
        classes = [f"test_taskhawk.py::{name}" for name in VENDOR_CLASSES[part]]
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *classes],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")},
            timeout=300,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout
        assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= len(classes)


# --- README ---------------------------------------------------------------------------


class ReadmeBlock(NamedTuple):
    """A fenced block of README.md, with the comment before it that says how to run it."""

    line: int
    language: str
    marks: dict[str, str]
    text: str
    output: str | None = None  # of a ```text block right behind it


def readme_blocks() -> list[ReadmeBlock]:
    """Return README.md's fenced blocks, in order."""
    pattern = (
        r"(?m)^(?:<!-- test: (.*) -->\n)?```(\w+)\n((?s:.*?))^```\n"
        r"(?:```text\n((?s:.*?))^```\n)?"
    )
    text = project_file("README.md").read_text()
    return [
        ReadmeBlock(
            text[: found.start(3)].count("\n"),
            found[2],
            dict(mark.partition("=")[::2] for mark in (found[1] or "").split()),
            found[3],
            found[4],
        )
        for found in re.finditer(pattern, text)
    ]


def readme_files(folder: Path) -> None:
    """Write the modules that README.md shows."""
    for block in readme_blocks():
        if name := block.marks.get("file"):
            before = README_DJANGO if name == "shop_settings.py" else ""
            (folder / name).write_text(before + block.text)


README_DJANGO = """
DEBUG = True
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "shop.db"}}
"""


def readme_normalised(text: str) -> str:
    """Replace what differs from run to run: ids, times, paths, the frames of tracebacks."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "TIME", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "TIME", text)
    text = re.sub(r"\d+ s ago", "AGE", text)
    text = re.sub(r"/\S*/queue\.db", "PATH", text)
    return re.sub(r"(?m)(^Traceback .*\n)(?: .*\n)+", r"\1  ...\n", text)


README_GROUPS = ("plain", "aws", "django", "flask")  # blocks that share an interpreter
README_BEFORE = {
    "django": "import django; django.setup()\n"
    "from django.core.management import call_command; call_command('migrate', verbosity=0)\n"
}
README_AFTER = {  # what the blocks dispatched, or can dispatch now, is run
    "aws": "import tasks; tasks.audit.dispatch('ready')\n"
    "print(taskhawk.listen_for_messages(taskhawk.Priority.default, until_empty=True).acked)",
    "django": "import taskhawk\n"
    "taskhawk.listen_for_messages(taskhawk.Priority.default, until_empty=True)",
}
README_AFTER_OUTPUT = {
    "aws": "ready: attempt 1 of a default message, {}\n1\n",
    "django": "Welcome! -> you@example.com\n",
}
README_RUNNER = """
import glob, json, os, sys, traceback, types, taskhawk
page = sys.modules["page"] = types.ModuleType("page")
for line, source, marks in json.load(open("blocks.json")):
    print(f"\\0{line}", flush=True)
    taskhawk.configure()
    for path in glob.glob("queue.db*") if "fresh" in marks else ():
        os.remove(path)
    try:
        exec(compile("\\n" * line + source, "README.md", "exec"), vars(page))
    except Exception as error:
        if "raises" not in marks:
            raise
        print(*traceback.format_exception_only(error), end="")
taskhawk.configure()
"""


class TestReadme:
    """README.md says what is true: its code runs, and its output is real."""

    @pytest.mark.parametrize("group", README_GROUPS)
    def test_python_blocks_run(self, group, request, tmp_path):
        """Each Python block runs, in order, and prints what the block behind it says."""
        readme_files(tmp_path)
        python = [block for block in readme_blocks() if block.language == "python"]
        assert {block.marks.get("run", "plain") for block in python} == set(
            README_GROUPS
        )
        blocks = [block for block in python if block.marks.get("run", "plain") == group]
        sources = [(block.line, self.source(block), block.marks) for block in blocks]
        after = (9999, README_AFTER.get(group, ""), {})
        (tmp_path / "blocks.json").write_text(json.dumps([*sources, after]))
        env = {"TASKHAWK_BROKER": "sqlite:///queue.db"}
        if group == "django":
            env = {"DJANGO_SETTINGS_MODULE": "shop_settings"}
        if group == "aws":
            env = self.aws(request.getfixturevalue("ministack"))
        code = README_BEFORE.get(group, "") + README_RUNNER
        result = run_python(code, cwd=tmp_path, env=env)
        assert result.returncode == 0, result.stderr
        outputs = dict(part.split("\n", 1) for part in result.stdout.split("\0")[1:])
        expected = {str(block.line): block.output or "" for block in blocks}
        assert outputs == {**expected, "9999": README_AFTER_OUTPUT.get(group, "")}

    @staticmethod
    def source(block):
        """Return what is to be run: the block, or the import of one that is a file."""
        name = block.marks.get("file")
        return f"import {name.removesuffix('.py')}" if name else block.text

    @staticmethod
    def aws(url):
        """Return the environment in which taskhawk and botocore talk to an emulator."""
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        places = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ENDPOINT_SQS": url,
            "AWS_REGION": "eu-west-1",
        }
        return {**keys, **places, "TASKHAWK_QUEUE": "dev-myapp"}

    @pytest.mark.slow
    def test_commands_print_what_is_shown(self, tmp_path):
        """The commands of the console blocks, run in order, print what is shown."""
        readme_files(tmp_path)
        env = python_env({"PYTHONUNBUFFERED": "1", "PY": sys.executable})
        blocks = [block for block in readme_blocks() if block.language == "console"]
        shown = "".join(block.text for block in blocks)
        commands = re.findall(r"(?m)^\$ (.*)\n((?:(?!\$ ).*\n)*)", shown)
        assert shown.count("\n$ ") + 1 == len(commands)
        for command, expected in commands:
            if variable := re.fullmatch(r"export (\w+)=(\S+)", command):
                env[variable[1]] = variable[2]
                continue
            result = subprocess.run(
                ["bash", "-c", f'python() {{ "$PY" "$@"; }}; {command}'],
                cwd=tmp_path,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=60,
                check=False,
            )
            assert readme_normalised(result.stdout) == readme_normalised(expected), (
                command
            )

    def test_settings_are_documented(self):
        """The settings' table has each setting, its true default, and an example that is legal."""
        cell = r" *(.*?) *\|"
        rows = re.findall(
            rf"(?m)^\| `([A-Z_]+)` \|{cell * 3}$", project_file("README.md").read_text()
        )
        assert sorted(name for name, *_ in rows) == sorted(taskhawk._SETTINGS)
        for name, _, default, example in rows:
            if default[:1] == "`" and name != "TASKHAWK_TASK_CLASS":
                assert f"`{getattr(taskhawk.settings, name)}`" == default
            if not example.startswith("`myapp."):
                taskhawk.configure({name: example.strip("`")})
                read = str(getattr(taskhawk.settings, name)).replace(
                    f"{Path.cwd()}/", ""
                )
                assert read == example.strip("`")
                taskhawk.configure()

    @pytest.mark.parametrize("name", taskhawk.__all__)
    def test_public_names_are_documented(self, name):
        """The API section has each public name, and functions with their true signature."""
        _, _, rest = project_file("README.md").read_text().partition("\n## API\n")
        api = " ".join(rest.partition("\n## ")[0].split())
        assert re.search(rf"`(Message\.)?{name}\b", api)
        public = getattr(taskhawk, name)
        functions = {name: public} if inspect.isfunction(public) else {}
        if public in (
            taskhawk.AsyncInvocation,
            taskhawk.Broker,
            taskhawk.Message,
            taskhawk.Task,
        ):
            names = [n for n in vars(public) if not n.startswith("_")]
            functions = {
                n: getattr(public, n) for n in names if callable(getattr(public, n))
            }
        for function_name, function in functions.items():
            signature = inspect.signature(function)
            parameters = [
                p.replace(annotation=p.empty)
                for p in signature.parameters.values()
                if p.name != "self"
            ]
            text = str(
                signature.replace(
                    parameters=parameters, return_annotation=signature.empty
                )
            )
            text = re.sub(r"<class '(\w+)'>|<(Priority\.\w+): \d>", r"\1\2", text)
            text = text.replace("(/, ", "(")
            assert f"{function_name}{text}`" in api

    def test_json_blocks_are_valid(self):
        """The messages shown are valid ones; a schedule's too, once its gaps are filled."""
        filled = {"execution-id": "d3b0-7", "scheduled-time": "2026-01-31T02:00:00Z"}
        blocks = [block for block in readme_blocks() if block.language == "json"]
        texts = [
            re.sub(
                r"<aws\.scheduler\.([\w-]+)>",
                lambda found: filled[found[1]],
                block.text,
            )
            for block in blocks
        ]
        messages = [data for data in map(json.loads, texts) if "task" in data]
        assert len(messages) == 2
        for data in messages:
            taskhawk.Message(data)

    def test_migration_command(self, tmp_path):
        """The line of sed turns imports of the old packages' submodules into ours."""
        old = tmp_path / "old.py"
        old.write_text(
            "import taskhawk.exceptions\n"
            "from taskhawk.exceptions import RetryException\n"
            "from taskhawk.conf import settings\n"
            "from taskhawk.backends.exceptions import PartialFailure\n"
            "import taskhawk, taskhawk.config_of_mine\n"
            "raise taskhawk.exceptions.IgnoreException(mytaskhawk.models)\n"
        )
        commands = [
            b.text for b in readme_blocks() if b.language == "sh" and " sed " in b.text
        ]
        subprocess.run(["bash", "-c", *commands], cwd=tmp_path, check=True)
        assert old.read_text() == (
            "import taskhawk\n"
            "from taskhawk import RetryException\n"
            "from taskhawk import settings\n"
            "from taskhawk import PartialFailure\n"
            "import taskhawk, taskhawk.config_of_mine\n"
            "raise taskhawk.IgnoreException(mytaskhawk.models)\n"
        )

    def test_code_comes_first(self):
        """A reader sees code by line 20, and the two commands that do all set-up."""
        text = project_file("README.md").read_text()
        assert "\n```python\nimport taskhawk\n" in "\n".join(text.splitlines()[:20])
        assert "\npip install . && python -m taskhawk demo\n" in text
        assert "\npip install '.[test]' && pytest\n" in text

    def test_links_resolve(self):
        """Each link leads to a heading of the page, a file of the project, or a web address."""
        text = project_file("README.md").read_text()
        prose = re.sub(r"(?ms)^```.*?^```$", "", text)
        headings = re.findall(r"(?m)^#+ (.*)$", prose)
        anchors = {
            re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings
        }
        links = re.findall(r"\]\(([^)\s]+)\)", prose)
        assert len(links) > 20
        for link in links:
            if link.startswith("#"):
                assert link[1:] in anchors
            elif not link.startswith("https://"):
                assert project_file(link).exists()
