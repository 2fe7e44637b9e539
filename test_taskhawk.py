"""The test suite of taskhawk: real queues, real processes, real signals, no sleep that decides.

The classes mirror the rooms of taskhawk.py. SQS and SNS are emulators that the fixtures start;
nothing here needs AWS, credentials, or a network.
"""

import ast
import asyncio
import bisect
import collections
import concurrent.futures
import contextlib
import contextvars
import copy
import ctypes
import dataclasses
import datetime as dt
import functools
import gc
import hashlib
import html
import http.client
import http.server
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import linecache
import logging
import math
import multiprocessing
import operator
import os
import pty
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import types
import urllib.parse
import urllib.request
import uuid
import venv
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import botocore.exceptions
import botocore.loaders
import botocore.session
import botocore.stub
import botocore.validate
import flask
import hypothesis
import hypothesis.stateful
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


def python_lines(cwd: Path, code: str, **env: str) -> list[str]:
    """Run code in a new interpreter, strictly, and return the lines that it printed."""
    result = run_python(["-W", "error", "-c", textwrap.dedent(code)], cwd=cwd, env=env)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


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


@pytest.fixture(scope="session", autouse=True)
def botocore_files() -> Iterator[None]:
    """Read each of botocore's data files once, as a session of it does, and not in each test."""
    loader = botocore.loaders.JSONFileLoader
    read = functools.cache(loader().load_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "load_file", lambda _, path: read(path))
        yield


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
    services = ("DYNAMODB", "SCHEDULER", "SNS", "SQS")
    endpoints = {f"AWS_ENDPOINT_{service}": endpoint for service in services}
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
        elif self.path.startswith("/schedules/"):
            action, data = "CreateSchedule", json.loads(body)
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
    if name.endswith(".fifo"):
        attributes["FifoQueue"] = "true"
    dead = client.create_queue(
        QueueName=taskhawk._dead_letter_name(name), Attributes=attributes
    )["QueueUrl"]
    found = client.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])
    policy = {
        "deadLetterTargetArn": found["Attributes"]["QueueArn"],
        "maxReceiveCount": most,
    }
    redrive = {"RedrivePolicy": json.dumps(policy)}
    client.create_queue(QueueName=name, Attributes={**redrive, **attributes})
    return name


def make_queues(client: Any, name: str, **attributes: str) -> None:
    """Make the default and the high-priority queue, and the dead-letter queue of each."""
    for suffix in ("", "-HIGH-PRIORITY"):
        make_queue(client, f"TASKHAWK-{name}{suffix}", **attributes)


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


def run_body(body: Any) -> taskhawk.Outcome:
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


def another(name: str) -> Callable[[], None]:
    """Return a function that does nothing, unlike all others."""

    def f():
        """Do nothing."""

    f.__qualname__ = name
    return f


PROCESSING_ID = VALID["id"]
PROCESSING_SECRET = "hunter2-0f6b6d1c"


def processing_body(task: str = "mail.send", **changes: Any) -> str:
    """Return the body of a valid message without arguments, with some keys changed."""
    empty = {"headers": {}, "task": task, "args": [], "kwargs": {}}
    return json.dumps(VALID | empty | changes)


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

UNKNOWN_KEY = (
    "AWS does not know these credentials: check AWS_ACCESS_KEY, or AWS_ACCESS_KEY_ID and"
    " the profile"
)


@pytest.fixture
def aws() -> Iterator[ScriptedAws]:
    """Yield a server that accepts everything, with taskhawk configured to use its queue APP."""
    with ScriptedAws().running("app") as server:
        yield server


def numbered(count: int, start: int = 0) -> list[taskhawk.Outgoing]:
    """Return messages whose bodies are numbers."""
    return [taskhawk.Outgoing(str(start + i), {}) for i in range(count)]


def grouped(words: str) -> list[taskhawk.Outgoing]:
    """Return a message for each word: its letter is its group, and "-" is none."""
    return [
        Outgoing(
            word,
            {},
            0,
            word[0].replace("-", "") or None,
            f"{word}-{os.urandom(8).hex()}",
        )
        for word in words.split()
    ]


def bodies_of(messages: Iterable[QueueMessage]) -> str:
    """Return the words that grouped() has made messages of."""
    return " ".join(message.body for message in messages)


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


#: the second emulator, which disagrees with the first where one of them is wrong
MOTO = pytest.param("moto", marks=pytest.mark.slow)


@pytest.fixture(params=["ministack", MOTO, "sqlite"])
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


@pytest.fixture(params=["ministack", MOTO])
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


def refused(
    call: Callable[..., Any],
    *args: Any,
    error: type[Exception] = taskhawk.ConfigurationError,
    **kwargs: Any,
) -> str:
    """Return the sentence with which a call is refused."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


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
import hashlib
import sys
import threading
import taskhawk

@taskhawk.task
def wait(number):
    print("started", number, flush=True)
    sys.stdin.readline()
    print("ended", number, flush=True)

@taskhawk.task
def note(number):
    print("noted", number, flush=True)

@taskhawk.task
def in_c(number):
    print("started", number, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # one call, for minutes

@taskhawk.task
def delete(number):
    taskhawk.SqliteBroker.delete = lambda *_, **__: threading.Event().wait()
    print("started", number, flush=True)
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

    def work(self, *queues: str, **options: Any) -> taskhawk.Ledger:
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
    try:
        code = taskhawk.main(arguments)
    except SystemExit as ended:
        code = ended.code
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    return code, errors.removesuffix("\n")


def told(text: str) -> list[tuple[str, str]]:
    """Read cases: a line that begins at the margin, and the sentence below it."""
    found = re.findall(r"(?m)^(\S.*)\n((?: .*\n)+)", text)
    return [(case, " ".join(sentence.split())) for case, sentence in found]


MESSAGE_ID = "[0-9a-f-]{36}"


def work_once(broker: taskhawk.Broker, queue: str | None = None) -> taskhawk.Ledger:
    """Receive once, run what there is, and return what became of it."""
    queues = [queue or broker.destination(Priority.default)]
    return taskhawk.Worker(
        broker, queues, num_messages=10, loop_count=1, wait_s=0
    ).run()


# --- the house ------------------------------------------------------------------------

HOUSE_BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
HOUSE_BLOCKS += (ast.AsyncFor, ast.AsyncWith, ast.TryStar)
HOUSE_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
HOUSE_INLINE = (ast.IfExp, ast.NamedExpr, ast.comprehension, ast.Lambda)
HOUSE_BRANCHES = (ast.If, ast.For, ast.While, ast.AsyncFor, ast.ExceptHandler)
HOUSE_FILES = ["LICENSE", "README.md", "pyproject.toml"]
HOUSE_FILES += ["schema.json", "taskhawk.py", "test_taskhawk.py"]
HOUSE_LIMITS = {
    "inline decisions per 100 statements": 10,
    "complexity of a function": 10,
    "lines of a function": 40,
    "nesting of a function": 4,
    "lines of a class": 200,
    "columns of a line": 88,
    "uses of a later part": 0,
}
# What one reads to vouch for each promise: change it with the code, then paste what
# test_guide prints into the module's docstring.
HOUSE_PROMISES = {
    1: """publish _send_one _Lane._conclude _Lane._send_together
        _accepted _send_all_ready _partial_failure _send_all
        _in_batches _one_round SqliteBroker.send SqliteBroker._claim SqliteBroker.delete
        _SqliteFile.change _use_write_ahead_log _AwsSender._batch SqsBroker.send
        SqsBroker.delete process _verdict _wanted _delay_s _ask_policy _Slot._run Worker.settle
        _carry_out _postpone Worker._close _dead_letter _send_copy _Held.move
        _Holdings.finish
        _Holdings.release _Holdings._decide _Calls.answered _Calls._deleted
        _Calls._delayed _Calls._try_later _Holdings.doubt _Holdings.close
        _Holdings.end _Scheduler.send _Ticker._move_on""",
    2: """SqliteBroker.receive SqliteBroker._claim SqliteBroker.change_visibility
        SqsBroker.receive _find_lease _Poller._receive _Intake.take _Intake.close
        _Course.take _Course._release_if_stuck _Backlog
        _Call _Leases _Holdings.take _Holdings.start _Holdings.start_more _Holdings.release _Holdings.release_waiting
        _Holdings._decide _Holdings.expire _Holdings.lose _Calls.next _Calls.answered
        _Calls._extended _Calls._deleted _Keeper._look _Keeper._make _Slot._run
        _Slot._process Worker._give_up _Child.kill""",
    3: """_decode _parse Message.__init__ _validate _fits _find_task Task.find_by_name
        Task.call _register _import _import_path _parse_line _to_outcome
        _import_tasks""",
    4: """process _begin_run _RunOfMany.begin _decode _parse _failed _log_failed _verdict _is_invalid _text_of_invalid
        _Slot._run Worker.settle""",
    5: """_begin_run _end_run _failed _log_failed _sentence _what_follows _name_of _reason _in_one_line _facts
        _extra_of _text_of_invalid _shown _mismatch _too_large _Holdings.warn
        _Keeper._tell _Faults _error_code _error_details _explained _explanation
        _find_remedy _Source.read _call_safely _log_again""",
    6: """_Polls _Intake.begin _Intake.adds_helper _Poller.work _Poller._help
        _Poller._try _Poller._receive _pause_s _Holdings._decide
        _Ends _Calls.next _Calls._due_at _Calls._patience_s _Calls._extended _Leases
        _Keeper._wait _Keeper._make
        SqsBroker.receive SqsBroker.url SqsBroker._find_url _parts""",
    7: """_in_own_context _refresh_django_connections _PerProcess _made_once
        _Brokers.before_fork _Brokers.after_fork _close_sqlite_files
        _release_sqlite_files _Signals _hold_signals _release_signals _forget_signals
        _path_of_children _Child._start_process _ChildProcess.__init__ _serve_worker
        _leave_signals_to_worker _ignore_signal _die_with_parent""",
    8: """_in_group _send_all _in_order _OrderedSend SqliteBroker.send
        SqliteBroker._claim SqliteBroker.delete SqsBroker.receive
        SqsBroker._receive_in_order _Polls _Holdings._decide _dead_letter _run_records
        _is_behind""",
}


def house_source() -> str:
    """Return the text of the module under test: the checkout's, or the installed one's."""
    return Path(taskhawk.__file__).read_text(encoding="utf-8")


def house_banners(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the line, number and title of each banner of a part ("IV") or room ("14")."""
    pattern = r"# (?:=== PART|---) ?([IVX]+|\d+)?[:.]? ?(.+?) [=-]+"
    for number, line in enumerate(text.splitlines(), 1):
        if banner := re.fullmatch(pattern, line):
            yield number, banner[1] or "", banner[2]


def house_walk(node: ast.AST, *stops: type) -> Iterator[ast.AST]:
    """Yield what is inside a node, but not what is inside nodes of these types."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, stops):
            yield from house_walk(child, *stops)


def house_statements(node: ast.AST) -> int:
    """Count the statements of a piece of source, without docstrings."""
    found = [each for each in ast.walk(node) if isinstance(each, ast.stmt)]
    values = [each.value for each in found if isinstance(each, ast.Expr)]
    texts = [each for each in values if isinstance(each, ast.Constant)]
    return len(found) - sum(isinstance(each.value, str) for each in texts)


def house_inline(node: ast.AST) -> int:
    """Count the decisions that a node itself makes inside an expression."""
    if isinstance(node, ast.BoolOp):
        return len(node.values) - 1
    return int(isinstance(node, HOUSE_INLINE))


def house_complexity(function: ast.AST) -> int:
    """Return McCabe's complexity of a function, without those that it defines."""
    inside = [*house_walk(function, *HOUSE_FUNCTIONS, ast.ClassDef)]
    branches = sum(isinstance(each, HOUSE_BRANCHES) for each in inside)
    conditions = sum(len(getattr(each, "ifs", ())) for each in inside)
    walruses = sum(isinstance(each, ast.NamedExpr) for each in inside)
    return 1 + branches + conditions - walruses + sum(map(house_inline, inside))


def house_nesting(node: ast.AST, level: int = 0) -> int:
    """Return how deep a function's blocks nest; an elif is no deeper than its if."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*HOUSE_FUNCTIONS, ast.ClassDef, ast.Lambda)):
            continue
        is_elif = isinstance(node, ast.If) and node.orelse == [child]
        is_elif = is_elif and isinstance(child, ast.If)
        inner = level + (isinstance(child, HOUSE_BLOCKS) and not is_elif)
        deepest = max(deepest, house_nesting(child, inner))
    return deepest


def house_lines(node: Any) -> int:
    """Count the lines of a class, or of a function without its docstring."""
    lines = node.end_lineno - node.lineno + 1
    if isinstance(node, HOUSE_FUNCTIONS) and ast.get_docstring(node) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


def house_defined(tree: ast.Module) -> dict[str, int]:
    """Return the line at which the module defines each of its names."""
    defined: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, (*HOUSE_FUNCTIONS, ast.ClassDef)):
            defined.setdefault(node.name, node.lineno)
        elif not isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in house_walk(node, *HOUSE_FUNCTIONS, ast.comprehension):
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    defined.setdefault(name.id, node.lineno)
    return defined


def house_uses(node: ast.AST, own: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Yield the names that run-time code uses, without a function's own variables."""
    if isinstance(node, (*HOUSE_FUNCTIONS, ast.Lambda)):
        names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
        own |= {each.id for each in names if isinstance(each.ctx, ast.Store)}
        own |= {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
    is_used = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    if is_used and node.id not in own:
        yield node
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from house_uses(child, own)


@functools.cache
def house_figures() -> dict[str, tuple[float, object]]:
    """Measure the module: each figure, with the place that it is the figure of."""
    text = house_source()
    tree = ast.parse(text)
    nodes = [*ast.walk(tree)]
    functions = [each for each in nodes if isinstance(each, HOUSE_FUNCTIONS)]
    classes = [each for each in nodes if isinstance(each, ast.ClassDef)]
    parts = [line for line, number, _ in house_banners(text) if number.isalpha()]
    part_of = functools.partial(bisect.bisect, parts)
    defined = house_defined(tree)
    later = {
        f"{name.id}, line {name.lineno}"
        for name in house_uses(tree)
        if part_of(name.lineno) < part_of(defined.get(name.id, 0))
    }
    inline = 100 * sum(map(house_inline, nodes)) / house_statements(tree)
    return {
        "inline decisions per 100 statements": (inline, "the module"),
        "complexity of a function": max(
            (house_complexity(each), each.name) for each in functions
        ),
        "lines of a function": max(
            (house_lines(each), each.name) for each in functions
        ),
        "nesting of a function": max(
            (house_nesting(each), each.name) for each in functions
        ),
        "lines of a class": max((house_lines(each), each.name) for each in classes),
        "columns of a line": max((len(line), line) for line in text.splitlines()),
        "uses of a later part": (len(later), sorted(later)),
    }


def house_promises() -> dict[int, int]:
    """Return how many statements one must read for each promise."""
    sizes = {}
    for node in ast.parse(house_source()).body:
        sizes[getattr(node, "name", None)] = house_statements(node)
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, HOUSE_FUNCTIONS):
                    sizes[f"{node.name}.{method.name}"] = house_statements(method)
    unknown = {*" ".join(HOUSE_PROMISES.values()).split()} - {*sizes}
    assert not unknown, f"no longer there: {sorted(unknown)}"
    return {
        promise: sum(sizes[name] for name in names.split())
        for promise, names in HOUSE_PROMISES.items()
    }


def house_guide() -> str:
    """Return how the module's docstring ends: what to read for what, parts and rooms."""
    wrap = functools.partial(textwrap.fill, width=88, break_on_hyphens=False)
    blocks = ["What to read for each promise, and how many statements that is"]
    for promise, size in house_promises().items():
        names = ", ".join(HOUSE_PROMISES[promise].split())
        text = f"    {promise} ({size}): {names}"
        blocks.append(wrap(text, subsequent_indent=" " * 8))
    blocks.append(
        "\nParts and rooms; the file still works if cut before part IV, V or VI"
    )
    rooms: list[str] = []
    for _, number, title in [*house_banners(house_source()), (0, "", "")]:
        if not number.isdecimal() and rooms:
            lines = wrap(
                ", ".join(rooms), initial_indent=" " * 8, subsequent_indent=" " * 8
            )
            blocks.append(lines)
            rooms.clear()
        if number.isdecimal():
            rooms.append(f"{number} {title}")
        elif number:
            blocks.append(f"    {number} {title.lower()}")
    return "\n".join(blocks) + "\n"


class TestHouse:
    """The module keeps to its plan: what it exports, imports, and how it reads."""

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

    def test_all(self):
        """Each part adds its public names, in order; all together are what is public."""
        tree = ast.parse(house_source())
        lists = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, (ast.Assign, ast.AugAssign))
            and ast.unparse(node).startswith("__all__ ")
        ]
        for names in lists:  # constants, then classes, then functions
            order = sorted(names, key=lambda n: (not n.isupper(), n[0].islower(), n))
            assert names == order
        public = sorted(name for name in house_defined(tree) if name[0] != "_")
        assert sorted(itertools.chain(*lists)) == public
        assert sorted(taskhawk.__all__) == public
        assert all(hasattr(taskhawk, name) for name in public)

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

    @pytest.mark.slow
    @pytest.mark.parametrize("figure", HOUSE_LIMITS)
    def test_how_it_reads(self, figure):
        """One decision a line, one thought a function, and no use of a later part."""
        value, place = house_figures()[figure]
        assert value <= HOUSE_LIMITS[figure], f"{value:g}: {place}"

    def test_guide(self):
        """The docstring's guide is true; where it is not, paste in what this prints."""
        guide = house_guide()
        assert taskhawk.__doc__.endswith(f"\n\n{guide}"), f"\n{guide}"

    def test_what_to_read(self):
        """No promise takes more than 370 statements, those about hostile input 120."""
        sizes = house_promises()
        listed = re.findall(r"(?m)^    (\d)\. ", taskhawk.__doc__)
        assert [*map(int, listed)] == [*sizes]
        assert max(sizes.values()) <= 370, sizes
        assert max(sizes[3], sizes[4]) < 120, sizes

    def test_nothing_is_evaluated(self):
        """Promise 3 in the source: no pickle, no eval; what imports is among what to read."""
        tree = ast.parse(house_source())
        names = {each.id for each in ast.walk(tree) if isinstance(each, ast.Name)}
        assert not names & {
            "eval",
            "exec",
            "compile",
            "__import__",
            "pickle",
            "marshal",
        }
        importers = {
            node.name
            for node in tree.body
            for call in ast.walk(node)
            if isinstance(call, ast.Call)
            and ast.unparse(call.func) == "importlib.import_module"
            and not isinstance(call.args[0], ast.Constant)
            and isinstance(node, (*HOUSE_FUNCTIONS, ast.ClassDef))
        }
        assert importers <= {*HOUSE_PROMISES[3].split()}

    def test_banners(self):
        """Rooms are numbered, each begins with two to six lines, and the tests mirror them."""
        text = house_source()
        banners = [(number, title) for _, number, title in house_banners(text)]
        rooms = [int(number) for number, _ in banners if number.isdecimal()]
        assert rooms == [*range(1, len(rooms) + 1)]
        assert len({title for _, title in banners}) == len(banners)
        for line, number, title in house_banners(text):
            below = itertools.takewhile(
                lambda text: text.startswith("# "), text.splitlines()[line:]
            )
            wanted = range(2, 7) if number.isdecimal() else range(3)
            assert len([*below]) in wanted, title
        tests = house_banners(Path(__file__).read_text(encoding="utf-8"))
        assert [(number, title) for _, number, title in tests if number] == banners

    def test_each_name_once(self):
        """No name of the module means one thing above a room and another below it."""
        targets = [
            target
            for node in ast.parse(house_source()).body
            if isinstance(node, (ast.Assign, ast.AnnAssign))
            for target in getattr(node, "targets", [getattr(node, "target", None)])
        ]
        names = collections.Counter(ast.unparse(target) for target in targets)
        assert [name for name, count in names.items() if count > 1] == []

    @pytest.mark.slow
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


class TestNames:
    """The file is one that an application can own."""

    def test_no_command_line(self, monkeypatch, capsys):
        """A copy that is cut before the command line says so where it is run."""
        monkeypatch.setattr(taskhawk, "_programs", {})
        assert taskhawk._run_program(["listen"]) == 2
        assert capsys.readouterr().err == (
            "taskhawk: this copy of the file has no command line: vendor it whole, or"
            " call listen_for_messages() in a script\n"
        )

    @pytest.mark.slow
    def test_vendored_copy_is_typed(self, tmp_path):
        """A vendored copy passes `mypy --strict` where no configuration is ours."""
        (tmp_path / "service").mkdir()
        shutil.copy(taskhawk.__file__, tmp_path / "service")
        args = ["-m", "mypy", "--strict", "--cache-dir=cache", "service"]
        result = run_python(args, cwd=tmp_path, env={"PYTHONPATH": ""})
        assert result.stdout == "Success: no issues found in 1 source file\n"


# --- 2. errors ------------------------------------------------------------------------


class TestErrors:
    """Each failure has a name, and carries what a caller can act on."""

    def test_bases(self):
        """Every error is a TaskhawkError; two of them are kinds of a wrong message."""
        ours = [
            value
            for value in (getattr(taskhawk, name) for name in taskhawk.__all__)
            if inspect.isclass(value) and issubclass(value, Exception)
        ]
        names = collections.defaultdict(list)
        for error in ours:
            names[error.__base__].append(error.__name__)
        assert {base: " ".join(sorted(its)) for base, its in names.items()} == {
            Exception: "TaskhawkError",
            taskhawk.TaskhawkError: "ChildCrashed ConfigurationError IgnoreException"
            " LoggingException PartialFailure QueueFull RetryException StopRetry"
            " TimeLimitExceeded ValidationError",
            taskhawk.RetryException: "PostponeException",
            taskhawk.ValidationError: "MessageTooLarge TaskNotFound",
        }

    @pytest.mark.parametrize(
        ("args", "text"),
        [
            ((), "4 of 5 messages failed: InternalError, Throttled, unknown"),
            (("two are left", 2), "('two are left', 2)"),
        ],
        ids=["its own text", "as 1.4 made it"],
    )
    def test_partial_failure(self, args, text):
        """PartialFailure counts, says why, and keeps the unsent messages in order."""
        codes = ["Throttled", "InternalError", "Throttled"]
        failed = [*({"Code": code} for code in codes), {}]
        result = {"Successful": [{}], "Failed": failed}
        unsent = (taskhawk.Message(VALID), taskhawk.Message(edited("id", "2")))
        error = taskhawk.PartialFailure(result, *args, unsent=unsent)
        assert str(error) == text
        assert (error.result, error.unsent) == (result, list(unsent))
        assert (error.success_count, error.failure_count) == (1, 4)
        assert taskhawk.PartialFailure(result).unsent == []

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
    @pytest.mark.parametrize(
        "kind", [taskhawk.RetryException, taskhawk.PostponeException]
    )
    def test_retry(self, kind, args, kwargs, delay_seconds, text):
        """The first argument of both is a delay if it is a number, else text."""
        error = kind(*args, **kwargs)
        assert (error.delay_seconds, str(error)) == (delay_seconds, text)

    @pytest.mark.parametrize("delay_seconds", [-1, -0.5, math.inf, math.nan])
    def test_retry_at_an_impossible_time(self, delay_seconds):
        """RetryException refuses a delay that no queue can hold."""
        sentence = f"delay_seconds: expected 0 or more seconds, got {delay_seconds}"
        named = {"delay_seconds": delay_seconds}
        for args, kwargs in ((delay_seconds,), {}), ((), named):
            made = refused(taskhawk.RetryException, *args, error=ValueError, **kwargs)
            assert made == sentence

    def test_retry_at_a_text(self):
        """RetryException refuses a delay that is no number."""
        named = {"delay_seconds": "10"}
        made = refused(taskhawk.RetryException, error=ValueError, **named)
        assert made == "delay_seconds: expected 0 or more seconds, got '10'"

    def test_retry_by_no_policy(self):
        """RetryException refuses a policy that can't be called."""
        kwargs = {"error": ValueError, "retry": "soon"}
        made = refused(taskhawk.RetryException, **kwargs)
        assert made == "retry: expected a retry policy, got 'soon'"

    @pytest.mark.parametrize(
        ("args", "named"), [((5,), {}), ((), {"delay_seconds": 0})]
    )
    def test_retry_by_both(self, args, named):
        """RetryException refuses a delay together with a policy, which might differ."""
        kwargs = {"error": ValueError, "retry": taskhawk.fixed(60, 3), **named}
        made = refused(taskhawk.RetryException, *args, **kwargs)
        assert made == "expected delay_seconds or retry, got both"

    def test_data(self):
        """LoggingException has the record's `extra`; MessageTooLarge has the limit."""
        failed = taskhawk.LoggingException("out of stock", {"item": 7})
        assert (str(failed), failed.extra) == ("out of stock", {"item": 7})
        assert taskhawk.LoggingException("out of stock").extra is None
        large = taskhawk.MessageTooLarge("300 bytes, at most 256", 256)
        assert (str(large), large.limit) == ("300 bytes, at most 256", 256)


# --- 3. settings ----------------------------------------------------------------------

SETTINGS_HOOK = "a function or its dotted path, such as 'myapp.hooks.{}'"
SETTINGS_URL = (
    "a URL that begins with http:// or https://, such as 'http://127.0.0.1:4566'"
)
SETTINGS_TABLE = {  # the default, and how an error goes on after "expected"
    "AWS_ACCESS_KEY": (None, "a string, such as 'AKIAIOSFODNN7EXAMPLE'"),
    "AWS_ACCOUNT_ID": (None, "an account id of twelve digits, such as '123456789012'"),
    "AWS_CONNECT_TIMEOUT_S": (2, "a number of seconds above 0, such as '2'"),
    "AWS_ENDPOINT_DYNAMODB": (None, SETTINGS_URL),
    "AWS_ENDPOINT_SCHEDULER": (None, SETTINGS_URL),
    "AWS_ENDPOINT_SNS": (None, SETTINGS_URL),
    "AWS_ENDPOINT_SQS": (None, SETTINGS_URL),
    "AWS_READ_TIMEOUT_S": (2, "a number of seconds above 0, such as '2'"),
    "AWS_REGION": (
        None,
        "the name of a region, not of an availability zone, such as 'eu-west-1'",
    ),
    "AWS_SECRET_KEY": (None, "a string, such as 'wJalrXUtnFEMI/EXAMPLEKEY'"),
    "AWS_SESSION_TOKEN": (None, "a string, such as 'AQoDYXdzEJr/EXAMPLETOKEN'"),
    "IS_LAMBDA_APP": (False, "true or false, such as 'False'"),
    "TASKHAWK_BROKER": (
        "sqs",
        "'sqs' or a URL of SQLite, such as 'sqlite:///queue.db'",
    ),
    "TASKHAWK_CLAIMS_TABLE": (
        None,
        (
            "3 to 255 letters, digits, dots, hyphens and underscores, such as"
            " 'taskhawk-claims'"
        ),
    ),
    "TASKHAWK_DEFAULT_HEADERS": (None, SETTINGS_HOOK.format("default_headers")),
    "TASKHAWK_ERROR_HOOK": (None, SETTINGS_HOOK.format("report_error")),
    "TASKHAWK_FIFO": (False, "true or false, such as 'False'"),
    "TASKHAWK_HEARTBEAT_HOOK": (None, SETTINGS_HOOK.format("touch_file")),
    "TASKHAWK_MAX_DB_REUSE_LOOPS": (5, "a whole number above 0, such as '5'"),
    "TASKHAWK_POST_PROCESS_HOOK": (None, SETTINGS_HOOK.format("after")),
    "TASKHAWK_PRE_PROCESS_HOOK": (None, SETTINGS_HOOK.format("before")),
    "TASKHAWK_QUEUE": (
        None,
        "at most 53 letters, digits, hyphens and underscores, such as 'dev-myapp'",
    ),
    "TASKHAWK_RETRY": (
        None,
        "a retry policy or its dotted path, such as 'myapp.retries.patient'",
    ),
    "TASKHAWK_RUN_HOOK": (None, SETTINGS_HOOK.format("count_run")),
    "TASKHAWK_SCHEDULER_ROLE": (
        None,
        (
            "the ARN of an IAM role, such as"
            " 'arn:aws:iam::123456789012:role/taskhawk-dev-myapp'"
        ),
    ),
    "TASKHAWK_SYNC": (False, "true or false, such as 'False'"),
    "TASKHAWK_TASK_CLASS": (
        None,
        "a class or its dotted path, such as 'myapp.tasks.MyTask'",
    ),
}
SETTINGS_LEGAL = [
    ("AWS_ACCOUNT_ID", "000000000000"),
    ("AWS_CONNECT_TIMEOUT_S", 0.5),
    ("AWS_ENDPOINT_SNS", "https://sns.example.com"),
    ("AWS_REGION", "us-isob-east-1"),
    ("AWS_REGION", "elasticmq"),
    ("TASKHAWK_BROKER", "sqs"),
    ("TASKHAWK_BROKER", "sqlite://"),
    ("TASKHAWK_BROKER", "sqlite:////a/b.db"),
    ("TASKHAWK_ERROR_HOOK", json.dumps),
    ("TASKHAWK_MAX_DB_REUSE_LOOPS", 1),
    ("TASKHAWK_QUEUE", "Dev_my-app-2"),
    ("TASKHAWK_QUEUE", "q" * 53),
    ("TASKHAWK_RETRY", taskhawk.fixed(60, 3)),
    ("TASKHAWK_RETRY", math.sqrt),
    ("TASKHAWK_SCHEDULER_ROLE", "arn:aws-us-gov:iam::000000000000:role/a/b+c"),
    ("TASKHAWK_TASK_CLASS", taskhawk.Task),
]
SETTINGS_ILLEGAL = [
    *(("AWS_ACCOUNT_ID", value) for value in (1.5, True, -1, 10**12)),
    *(("AWS_ACCOUNT_ID", value) for value in ("12345", "1234-5678-9012")),
    *(("AWS_CONNECT_TIMEOUT_S", value) for value in (0, "soon", True, [2])),
    *(("AWS_READ_TIMEOUT_S", value) for value in (-2, math.inf, "nan")),
    *(("AWS_ENDPOINT_SNS", value) for value in (4566, "127.0.0.1:4566", "http://")),
    *(("AWS_ENDPOINT_SQS", value) for value in ("http:///sqs", "http://a b")),
    *(("AWS_REGION", value) for value in (1, "us-east-1a", "us-west-2-lax-1a")),
    ("AWS_REGION", "us east 1"),
    ("IS_LAMBDA_APP", "perhaps"),
    ("TASKHAWK_FIFO", "first in"),
    ("TASKHAWK_SYNC", "fasle"),
    *(("TASKHAWK_BROKER", value) for value in ("redis://127.0.0.1", "SQS", 5)),
    *(("TASKHAWK_MAX_DB_REUSE_LOOPS", value) for value in (0, "five", 2.5, True)),
    *(("TASKHAWK_QUEUE", value) for value in ("my queue", "q" * 54, 7)),
    ("TASKHAWK_DEFAULT_HEADERS", {"a": "b"}),
    ("TASKHAWK_ERROR_HOOK", "print"),
    *(("TASKHAWK_HEARTBEAT_HOOK", value) for value in ("os.sep", ".hooks.beat")),
    ("TASKHAWK_RETRY", 60),
    *(
        ("TASKHAWK_SCHEDULER_ROLE", value)
        for value in ("role/a", "arn:aws:iam::1:role/a", 5)
    ),
    ("TASKHAWK_TASK_CLASS", 5),
]
#: names that are no settings, and no mistakes either: of 4.7, or set by Kubernetes
SETTINGS_OF_OTHERS = """
    TASKHAWK_CONSUMER_BACKEND TASKHAWK_HEARTBEAT_HOOK_SYNC_CALL_S
    TASKHAWK_PUBLISHER_BACKEND TASKHAWK_PUBLISHER_GCP_BATCH_SETTINGS
    GOOGLE_CLOUD_PROJECT TASKHAWK_SERVICE_HOST TASKHAWK_SERVICE_PORT
    TASKHAWK_SERVICE_PORT_HTTPS TASKHAWK_PORT TASKHAWK_PORT_80_TCP
    TASKHAWK_PORT_80_TCP_ADDR TASKHAWK_PORT_80_TCP_PORT TASKHAWK_PORT_53_UDP_PROTO
    TASKHAWK_WEB_SERVICE_HOST TASKHAWK_WEB_PORT TASKHAWK_WEB_PORT_443_TCP
"""
SETTINGS_SECRETS = ("AWS_ACCESS_KEY", "AWS_SECRET_KEY", "AWS_SESSION_TOKEN")


def refusal_of(name: str) -> str:
    """Return the text of the error that reading a setting raises."""
    return refused(getattr, taskhawk.settings, name)


def settings_task(headers=None):
    """Take headers."""
    settings_task.headers = headers


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


class TestSettings:
    """Settings are read lazily, in one place, and what is wrong is said in full."""

    def test_defaults(self):
        """These are all the settings, and what they are if nobody sets them."""
        defaults = {name: default for name, (default, _) in SETTINGS_TABLE.items()}
        assert {n: getattr(taskhawk.settings, n) for n in SETTINGS_TABLE} == defaults

    @pytest.mark.parametrize(
        ("given", "name", "sentence"),
        [
            (
                {"IS_LAMBDA_APP": True},
                "IS_LAMBDA_APP",
                (
                    "TASKHAWK_FIFO and IS_LAMBDA_APP are both set, but a FIFO topic"
                    " can't call a function: set one of them; with TASKHAWK_FIFO alone,"
                    " messages go to queues, which a function can consume, too"
                ),
            ),
            (
                {"TASKHAWK_QUEUE": "q" * 49},
                "TASKHAWK_FIFO",
                (
                    "TASKHAWK_QUEUE: expected at most 48 characters where TASKHAWK_FIFO"
                    " is set, for the names of FIFO queues end with '.fifo', got 49 in"
                    f" {'q' * 49!r}"
                ),
            ),
        ],
    )
    def test_fifo(self, given, name, sentence):
        """What FIFO queues do not go with is refused at first use, and by a check."""
        taskhawk.configure(given, TASKHAWK_FIFO=True)
        assert refusal_of(name) == sentence
        assert refusal_of("TASKHAWK_FIFO") == sentence
        assert [str(error) for error in taskhawk.settings.errors()] == [sentence]
        taskhawk.configure(given)
        assert getattr(taskhawk.settings, name) == given.get(name, False)

    def test_longest_fifo_queue(self):
        """The longest name that is allowed gives queues of 80 characters."""
        taskhawk.configure(TASKHAWK_FIFO="true", TASKHAWK_QUEUE="q" * 48)
        queue = taskhawk.SqsBroker().destination(Priority.high)
        assert queue.endswith("-HIGH-PRIORITY.fifo")
        assert len(taskhawk._dead_letter_name(queue)) == 80

    def test_order_of_sources(self, tmp_path):
        """configure() goes before SETTINGS_MODULE, Django, environment and defaults."""
        names = ["TASKHAWK_QUEUE", "AWS_REGION", "AWS_ACCOUNT_ID", "AWS_ENDPOINT_SQS"]
        (tmp_path / "own.py").write_text("TASKHAWK_QUEUE = AWS_REGION = 'module'\n")
        django_names = " = ".join(names[:3])
        (tmp_path / "site_settings.py").write_text(f"{django_names} = '000000000000'\n")
        env = dict.fromkeys(names, "http://environment")
        code = f"""
            import taskhawk
            taskhawk.configure(TASKHAWK_QUEUE="configure")
            for name in {[*names, "AWS_READ_TIMEOUT_S"]}:
                print(getattr(taskhawk.settings, name))
        """
        env |= {"SETTINGS_MODULE": "own", "DJANGO_SETTINGS_MODULE": "site_settings"}
        found = python_lines(tmp_path, code, **env)
        assert found == ["configure", "module", "0" * 12, "http://environment", "2"]

    @pytest.mark.parametrize(
        "given",
        [
            {"TASKHAWK_QUEUE": "given", "OTHER": 1},
            types.MappingProxyType({"TASKHAWK_QUEUE": "given", 7: 1}),
            types.SimpleNamespace(TASKHAWK_QUEUE="given", other=1),
            type("Config", (), {"TASKHAWK_QUEUE": "given", "OTHER": 1}),
            flask.Config(".", {"TASKHAWK_QUEUE": "given", "TASKHAWK_SYNC": None}),
        ],
        ids=["dict", "mapping", "object", "class", "Flask"],
    )
    def test_configure_with_an_object(self, given):
        """configure() takes any mapping or object; a keyword goes before it.

        Names that are not taskhawk's are ignored. Each call replaces the one before.
        """
        taskhawk.configure(given)
        assert taskhawk.settings.TASKHAWK_QUEUE == "given"
        assert taskhawk.settings.TASKHAWK_SYNC is False
        taskhawk.configure(given, TASKHAWK_QUEUE="keyword", AWS_REGION="eu-west-1")
        assert taskhawk.settings.TASKHAWK_QUEUE == "keyword"
        assert taskhawk.settings.AWS_REGION == "eu-west-1"
        taskhawk.configure(TASKHAWK_SYNC=True)
        assert taskhawk.settings.TASKHAWK_QUEUE is None
        assert taskhawk.settings.AWS_REGION is None

    def test_unknown_keyword(self):
        """configure() refuses a keyword that is no setting, and sets nothing then."""
        taskhawk.configure(TASKHAWK_QUEUE="before")
        wrong = {"TASKHAWK_QUEUE": "after", "TASKHAWK_SINC": True, "colour": "red"}
        sentence = "TASKHAWK_SINC is not a setting of taskhawk"
        suggestion = "; did you mean TASKHAWK_SYNC?"
        assert refused(taskhawk.configure, **wrong) == sentence + suggestion
        assert taskhawk.settings.TASKHAWK_QUEUE == "before"
        assert refused(taskhawk.configure, colour="red") == (
            "colour is not a setting of taskhawk"
        )
        assert refused(taskhawk.configure, TASKHAWK_ZEBRA=2) == (
            "TASKHAWK_ZEBRA is not a setting of taskhawk"
        )
        # Reading one is an AttributeError.
        read = (getattr, taskhawk.settings, "TASKHAWK_SINC")
        assert refused(*read, error=AttributeError) == sentence + suggestion

    def test_lazy(self, monkeypatch):
        """A setting is remembered from its first use until configure() is called."""
        monkeypatch.setenv("TASKHAWK_QUEUE", "one")
        assert taskhawk.settings.TASKHAWK_QUEUE == "one"
        monkeypatch.setenv("TASKHAWK_QUEUE", "two")
        assert taskhawk.settings.TASKHAWK_QUEUE == "one"
        taskhawk.configure()
        assert taskhawk.settings.TASKHAWK_QUEUE == "two"

    def test_configure_while_another_thread_reads(self, settings_module):
        """What a thread reads while configure() is called is not remembered."""
        name = settings_module("""if True:
            import taskhawk
            TASKHAWK_QUEUE = "one"
            taskhawk.configure(TASKHAWK_QUEUE="two") # as if in another thread
        """)
        assert taskhawk.settings.TASKHAWK_QUEUE == "one"
        assert name in sys.modules
        assert taskhawk.settings.TASKHAWK_QUEUE == "two"

    @pytest.mark.parametrize("name", ["no_such_module", "json.no_such_module"])
    def test_settings_module_is_missing(self, monkeypatch, name):
        """A SETTINGS_MODULE that does not exist is a ConfigurationError naming it."""
        monkeypatch.setenv("SETTINGS_MODULE", name)
        assert refusal_of("TASKHAWK_QUEUE") == (
            f"the module named by SETTINGS_MODULE {name!r} can't be imported:"
            f" No module named {name!r}"
        )

    def test_settings_module_is_broken(self, settings_module):
        """What a settings module itself fails to import is reported as it is."""
        settings_module("import no_such_dependency")
        read = (getattr, taskhawk.settings, "TASKHAWK_QUEUE")
        sentence = "No module named 'no_such_dependency'"
        assert refused(*read, error=ModuleNotFoundError) == sentence

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            *((name, value, value) for name, value in SETTINGS_LEGAL),
            ("AWS_ACCOUNT_ID", 123456789012, "123456789012"),
            ("AWS_ACCOUNT_ID", 12345, "000000012345"),
            ("AWS_CONNECT_TIMEOUT_S", "0.5", 0.5),
            ("AWS_READ_TIMEOUT_S", "3", 3),
            ("AWS_ENDPOINT_SQS", "http://127.0.0.1:4566/", "http://127.0.0.1:4566"),
            ("TASKHAWK_MAX_DB_REUSE_LOOPS", "20", 20),
            ("TASKHAWK_HEARTBEAT_HOOK", "json.dumps", json.dumps),
            ("TASKHAWK_PRE_PROCESS_HOOK", "collections.abc.Mapping", Mapping),
            ("TASKHAWK_TASK_CLASS", "taskhawk.Task", taskhawk.Task),
            ("TASKHAWK_TASK_CLASS", "taskhawk.task_manager.Task", taskhawk.Task),
        ],
    )
    def test_legal_value(self, name, value, expected):
        """A value that has the meaning of the setting's type is taken for it."""
        taskhawk.configure({name: value})
        assert getattr(taskhawk.settings, name) == expected

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ((False, 0, "False", "false", "0", "", "no", "OFF"), False),
            ((True, 1, "True", "true", "1", "yes", "ON"), True),
        ],
    )
    def test_flag(self, monkeypatch, values, expected):
        """A flag may be a word; set to anything, it is not left to the next source."""
        for value in values:
            monkeypatch.setenv("TASKHAWK_SYNC", str(not expected))
            taskhawk.configure(TASKHAWK_SYNC=value)
            assert taskhawk.settings.TASKHAWK_SYNC is expected
            monkeypatch.setenv("TASKHAWK_SYNC", str(value))
            taskhawk.configure()
            assert taskhawk.settings.TASKHAWK_SYNC is expected

    @pytest.mark.parametrize("nothing", [None, ""])
    def test_nothing(self, monkeypatch, nothing):
        """None, or an empty text for what is no flag, leaves it to the next source."""
        monkeypatch.setenv("TASKHAWK_QUEUE", "mine")
        taskhawk.configure(TASKHAWK_QUEUE=nothing, TASKHAWK_ERROR_HOOK=nothing)
        assert taskhawk.settings.TASKHAWK_QUEUE == "mine"
        assert taskhawk.settings.TASKHAWK_ERROR_HOOK is None

    def test_relative_file(self, tmp_path, monkeypatch):
        """A relative file stays the same when a task changes the directory."""
        monkeypatch.chdir(tmp_path)
        taskhawk.configure(TASKHAWK_BROKER="sqlite:///a/q.db?max_receive_count=5")
        url = taskhawk.settings.TASKHAWK_BROKER
        assert url == f"sqlite:///{tmp_path}/a/q.db?max_receive_count=5"
        (tmp_path / "what?").mkdir()
        monkeypatch.chdir("what?")  # which a URL can't hold
        taskhawk.configure(TASKHAWK_BROKER="sqlite:///q.db")
        assert taskhawk.settings.TASKHAWK_BROKER == "sqlite:///q.db"

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            *((name, value, "") for name, value in SETTINGS_ILLEGAL),
            (
                "TASKHAWK_POST_PROCESS_HOOK",
                "json.nope",
                " (module 'json' has no attribute 'nope')",
            ),
            (
                "TASKHAWK_PRE_PROCESS_HOOK",
                "no_such_module.hook",
                " (No module named 'no_such_module')",
            ),
        ],
    )
    def test_illegal_value(self, name, value, reason):
        """An error names setting, source, rule and a legal value, and what came."""
        taskhawk.configure({name: value})
        rule = SETTINGS_TABLE[name][1]
        for _ in range(2):  # it is not remembered as something else
            assert refusal_of(name) == (
                f"{name} in configure(): expected {rule}, got {value!r}{reason}"
            )

    @pytest.mark.parametrize("name", SETTINGS_TABLE)
    @pytest.mark.parametrize(
        "edge", ["{} ", "\t{}", "{}\r", "a\n{}", "\x85{}", "{}\x7f"]
    )
    def test_unclean_value(self, monkeypatch, name, edge):
        """No value may have outer spaces or control characters; no secret is shown."""
        rule = SETTINGS_TABLE[name][1]
        value = edge.format(re.search(r"such as '(.+)'$", rule)[1])
        monkeypatch.setenv(name, value)
        got = "str" if name in SETTINGS_SECRETS else repr(value)
        assert refusal_of(name) == (
            f"{name} in the environment: expected {rule}, got {got}"
            " (it has outer spaces, or control characters such as a line break)"
        )

    @pytest.mark.parametrize("name", SETTINGS_TABLE)
    def test_legal_value_of_an_error(self, name):
        """The legal value in an error is legal, if the application has such a hook."""
        value = re.search(r"such as '(.+)'$", SETTINGS_TABLE[name][1])[1]
        taskhawk.configure({name: value})
        if value.startswith("myapp."):
            assert refusal_of(name).endswith(f"{value!r} (No module named 'myapp')")
        else:
            read = str(getattr(taskhawk.settings, name))
            assert read.replace(f"{Path.cwd()}/", "") in (value, f"{value}.0")

    def test_hook_whose_module_is_broken(self, settings_module):
        """What a hook's module raises while it is imported is reported as it is."""
        name = settings_module("raise ValueError('no database')")
        taskhawk.configure(TASKHAWK_ERROR_HOOK=f"{name}.hook")
        for use in (taskhawk.settings.check, lambda: taskhawk.settings.TASKHAWK_QUEUE):
            with pytest.raises(ValueError, match=r"^no database$"):
                use()

    def test_illegal_value_of_another_source(self, monkeypatch, settings_module):
        """An error names the environment, or the module, that the value is from."""
        rule = SETTINGS_TABLE["TASKHAWK_QUEUE"][1]
        monkeypatch.setenv("TASKHAWK_QUEUE", "5!")
        assert refusal_of("TASKHAWK_QUEUE") == (
            f"TASKHAWK_QUEUE in the environment: expected {rule}, got '5!'"
        )
        module = settings_module("TASKHAWK_QUEUE = 5")
        assert refusal_of("TASKHAWK_QUEUE") == (
            f"TASKHAWK_QUEUE in the module {module}: expected {rule}, got 5"
        )

    @pytest.mark.parametrize("name", SETTINGS_SECRETS)
    @pytest.mark.parametrize("secret", [b"my-secret-value", ["my-secret-value"]])
    def test_secret(self, name, secret):
        """Neither an error nor its traceback shows a secret, only its type."""
        legal = dict.fromkeys(SETTINGS_SECRETS, "legal")
        taskhawk.configure({**legal, name: secret})
        rule, got = SETTINGS_TABLE[name][1], type(secret).__name__
        for use in (
            lambda: getattr(taskhawk.settings, name),
            taskhawk.settings.credentials,
        ):
            with pytest.raises(taskhawk.ConfigurationError) as caught:
                use()
            sentence = f"{name} in configure(): expected {rule}, got {got}"
            assert str(caught.value) == sentence
            trace = "".join(traceback.format_exception(caught.value))
            assert "my-secret-value" not in trace

    @pytest.mark.parametrize(
        ("where", "suffix"),
        [
            ("configure()", "A"),
            ("a mapping", "B"),
            ("the module", "C"),
            ("the environment", "D"),
        ],
    )
    def test_unknown_name(self, monkeypatch, caplog, settings_module, where, suffix):
        """A name that only looks like a setting is one warning, in whatever source."""
        names = (f"TASKHAWK_SYNC_{suffix}", f"TASKHAWK_{'XYZ' * 8}{suffix}")
        values = {**dict.fromkeys(names, "q"), "DEBUG": "1", "TASKHAWK_QUEUE": "q"}
        if where == "the environment":
            for name, value in values.items():
                monkeypatch.setenv(name, value)
        elif where == "the module":
            source = [f"{name} = {value!r}" for name, value in values.items()]
            where += f" {settings_module(';'.join(source))}"
        else:
            given = values if where == "a mapping" else types.SimpleNamespace(**values)
            taskhawk.configure(given)
            taskhawk.configure(given)
            where = "configure()"
        assert taskhawk.settings.TASKHAWK_QUEUE == "q"
        assert taskhawk.settings.TASKHAWK_SYNC is False
        assert {record.levelname for record in caplog.records} == {"WARNING"}
        what = f"in {where} is not a setting of taskhawk"
        assert sorted(caplog.messages) == [
            f"{names[0]} {what}; did you mean TASKHAWK_SYNC?",
            f"{names[1]} {what}",
        ]

    def test_names_of_others(self, monkeypatch, caplog, settings_module):
        """What 4.7 has, or Kubernetes sets for a service, is ignored without a word."""
        names = SETTINGS_OF_OTHERS.split()
        for name in names:
            monkeypatch.setenv(name, "1")
        settings_module(" = ".join([*names, "1"]))
        taskhawk.configure(dict.fromkeys(names, 1))
        assert taskhawk.settings.TASKHAWK_QUEUE is None
        assert caplog.messages == []

    @pytest.mark.parametrize(
        ("parts", "scope", "token"),
        [
            ("key secret token", r"AKIAOURS/\d+/us-west-1/", "ours"),
            ("", r"AKIACHAIN/\d+/us-west-1/", "of-the-chain"),
        ],
    )
    def test_credentials_of_a_request(self, monkeypatch, aws, parts, scope, token):
        """A request is signed with ours or, without any, with those botocore finds."""
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIACHAIN")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "of-the-chain")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-1")
        ours = self.credentials(parts, "ours")
        taskhawk.configure(ours, AWS_ENDPOINT_SQS=aws.url, TASKHAWK_QUEUE="q")
        taskhawk.task(plain, name="settings.plain").dispatch()
        headers = aws.calls[-1].headers
        assert re.search(f"Credential={scope}sqs/", headers["Authorization"])
        assert headers["X-Amz-Security-Token"] == token

    @pytest.mark.parametrize(
        ("configured", "module", "environment", "used"),
        [
            ("key secret token", "", "", ["AKIACONFIGURED", "configured"]),
            ("key secret", "", "key secret token", ["AKIACONFIGURED", None]),
            ("token", "", "key secret", ["AKIAENVIRONMENT", None]),
            ("token", "key secret", "key secret token", ["AKIAMODULE", None]),
            ("", "token", "key secret token", ["AKIAENVIRONMENT", "environment"]),
            ("", "", "key secret token role", ["AKIAENVIRONMENT", None]),
            ("", "", "key secret token same", ["AKIAENVIRONMENT", "environment"]),
            ("", "", "key token same", []),
            ("", "", "token role", []),
            ("", "key secret", "token role", ["AKIAMODULE", None]),
        ],
    )
    def test_credentials_are_taken_together(  # noqa: PLR0917 - fixtures
        self, monkeypatch, settings_module, configured, module, environment, used
    ):
        """Key, secret and token come from the one source that has the key.

        Lambda sets the token, and perhaps the key, of the function's role: they are
        left to botocore, and never paired with another's.
        """
        values = self.credentials(module, "module")
        settings_module("\n".join(f"{name} = {values[name]!r}" for name in values))
        for name, value in self.credentials(environment, "environment").items():
            monkeypatch.setenv(name, value)
        taskhawk.configure(self.credentials(configured, "configured"))
        found = taskhawk.settings.credentials()
        assert [value for name, value in found.items() if "secret" not in name] == used
        assert found.get("aws_secret_access_key", "secret").endswith("secret")

    @pytest.mark.parametrize(
        ("parts", "missing"),
        [
            ("key", "AWS_SECRET_KEY"),
            ("key token", "AWS_SECRET_KEY"),
            ("secret", "AWS_ACCESS_KEY"),
        ],
    )
    def test_incomplete_credentials(self, monkeypatch, parts, missing):
        """A key without its secret is an error, and so is a secret without its key."""
        taskhawk.configure(self.credentials(parts, "configured"), TASKHAWK_QUEUE="q")
        for name, value in self.credentials("key secret", "environment").items():
            monkeypatch.setenv(name, value)
        assert refused(taskhawk.task(plain, name="settings.plain").dispatch) == (
            f"{missing} is not set in configure(), but the other half of the"
            " credentials is: expected both or neither"
        )

    @staticmethod
    def credentials(parts: str, source: str) -> dict[str, str]:
        """Return settings for the parts that are named; values tell their source."""
        values = {
            "key": ("AWS_ACCESS_KEY", f"AKIA{source.upper()}"),
            "secret": ("AWS_SECRET_KEY", f"{source} secret"),
            "token": ("AWS_SESSION_TOKEN", source),
            "role": ("AWS_ACCESS_KEY_ID", "AKIAROLE"),
            "same": ("AWS_ACCESS_KEY_ID", f"AKIA{source.upper()}"),
        }
        return dict(values[part] for part in parts.split())

    def test_check(self, monkeypatch):
        """All that is wrong is found at once: values, hooks, half of a credential."""
        taskhawk.settings.check()
        assert taskhawk.settings.errors() == []
        wrong = {"TASKHAWK_SYNC": "maybe", "TASKHAWK_PRE_PROCESS_HOOK": "json.nope"}
        taskhawk.configure(wrong, AWS_SECRET_KEY="half")
        errors = list(map(str, taskhawk.settings.errors()))
        half = "AWS_ACCESS_KEY is not set in configure(), but the other half of the"
        assert errors == [
            f"{half} credentials is: expected both or neither",
            *(refusal_of(name) for name in sorted(wrong)),
        ]
        assert refused(taskhawk.settings.check) == "; ".join(errors)
        taskhawk.configure()
        monkeypatch.setenv("SETTINGS_MODULE", "no_such_module")
        assert len(taskhawk.settings.errors()) == 1

    @pytest.mark.parametrize(
        ("given", "missing"),
        [
            ({}, "TASKHAWK_QUEUE"),
            ({"IS_LAMBDA_APP": True, "TASKHAWK_QUEUE": "q"}, "AWS_ACCOUNT_ID"),
        ],
        ids=["SQS", "SNS"],
    )
    def test_required(self, given, missing):
        """Where a dispatch needs a setting, the error says what to set, and where."""
        taskhawk.configure(given, AWS_REGION="us-east-1")
        without = "; without AWS, try TASKHAWK_BROKER=sqlite:///queue.db"
        hint = without if missing == "TASKHAWK_QUEUE" else ""
        assert refused(taskhawk.task(plain, name="settings.plain").dispatch) == (
            f"{missing} is not set: expected {SETTINGS_TABLE[missing][1]}, from"
            " taskhawk.configure(), the module named by SETTINGS_MODULE, Django's"
            f" settings or the environment{hint}"
        )

    def test_paths_of_1_4(self):
        """1.4's own defaults, paths into submodules that are gone, still work."""
        hooks = "PRE_PROCESS", "POST_PROCESS", "HEARTBEAT"
        given = {f"TASKHAWK_{hook}_HOOK": "taskhawk.conf.noop_hook" for hook in hooks}
        given["TASKHAWK_DEFAULT_HEADERS"] = "taskhawk.conf.default_headers_hook"
        taskhawk.configure(given, TASKHAWK_BROKER="sqlite://")
        task = taskhawk.task(settings_task, name="settings.of_1_4")
        task.with_headers(mine="yes").dispatch()
        ledger = work_once(taskhawk._brokers.broker())
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
            (lambda: {1: "x"}, {"1": "x"}),
        ],
        ids=[
            "task",
            "keyword",
            "any",
            "partial",
            "nothing",
            "another",
            "None",
            "number",
        ],
    )
    def test_default_headers(self, hook, expected):
        """The hook gets the task if it takes `task`, as in the manual, else nothing.

        The latter is how 1.4.0 called it. What `with_headers` says goes before.
        """
        taskhawk.configure(TASKHAWK_SYNC=True, TASKHAWK_DEFAULT_HEADERS=hook)
        task = taskhawk.task(settings_task, name="settings.headers")
        task.with_headers(own="1").dispatch()
        assert settings_task.headers == {**expected, "own": "1"}


# --- 4. Django ------------------------------------------------------------------------

#: the start of a script that has a database of Django's, and a task that uses it
DJANGO_DATABASE = """
    import logging, sys, threading
    from unittest import mock
    import django
    from django.conf import settings
    from django.db import connection, transaction
    from django.test.utils import override_settings
    import taskhawk

    class Short(logging.Formatter):
        def formatException(self, info):
            return str(info[1])

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(Short())
    logging.basicConfig(handlers=[handler], level="ERROR")

    def use(engine="django.db.backends.sqlite3", **more):
        database = {"ENGINE": engine, "NAME": "django.db", "CONN_MAX_AGE": None}
        settings.configure(DATABASES={"default": database}, **more)
        django.setup()

    def in_a_thread(call, *args):
        thread = threading.Thread(target=call, args=args)
        thread.start()
        thread.join()

    def body(name):
        return taskhawk.QueueMessage(
            taskhawk._encode(taskhawk.Message.new(name)), "1", "r"
        )

    @taskhawk.task
    def query():
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")

    @taskhawk.task
    def fail():
        query()
        raise KeyError("stock")

    def open_after(name, runs):
        found = ""
        for _ in range(runs):
            taskhawk.process(body(f"__main__.{name}"))
            found += str(int(connection.connection is not None))
        print(found)
"""


class TestDjango:
    """Django is imported only where it is in use, and what it keeps is kept with it."""

    @pytest.mark.parametrize(
        ("code", "env", "expected"),
        [
            ("", {"DJANGO_SETTINGS_MODULE": "site_settings"}, "site True"),
            ("from django.conf import settings", {}, "environment True"),
            (
                "import django.conf as c; c.settings.configure(TASKHAWK_QUEUE='hand')",
                {},
                "hand True",
            ),
            ("", {}, "environment False"),
        ],
        ids=["named", "imported only", "configured by hand", "not in use"],
    )
    def test_settings(self, tmp_path, code, env, expected):
        """Django's settings count where Django is in use; else it is not imported."""
        (tmp_path / "site_settings.py").write_text("TASKHAWK_QUEUE = 'site'\n")
        code += "\nimport sys, taskhawk\nqueue = taskhawk.settings.TASKHAWK_QUEUE"
        code += "\nprint(queue, 'django' in sys.modules)"
        env = {"TASKHAWK_QUEUE": "environment", **env}
        assert python_lines(tmp_path, code, **env) == [expected]

    def test_errors(self, tmp_path):
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
        rule = SETTINGS_TABLE["TASKHAWK_QUEUE"][1]
        what = "in Django's settings is not a setting of taskhawk"
        assert python_lines(tmp_path, code) == [
            f"TASKHAWK_QUEUEUE {what}; did you mean TASKHAWK_QUEUE?",
            f"TASKHAWK_QUEUE in Django's settings: expected {rule}, got 5",
        ]

    @pytest.mark.slow
    def test_override_settings(self, tmp_path, aws):
        """Django's override_settings has its effect at once, in and after the block.

        Clients are made anew where they depend on it; messages in memory outlive it.
        """
        code = f"""
            from django.conf import settings
            from django.test.utils import override_settings
            import taskhawk
            settings.configure(TASKHAWK_QUEUE="one", AWS_ENDPOINT_SQS="{aws.url}/one",
                **{AWS_KEYS})
            ran = []
            @taskhawk.task
            def task():
                ran.append(1)
            task.dispatch()
            two = dict(TASKHAWK_QUEUE="two", AWS_ENDPOINT_SQS="{aws.url}/two")
            with override_settings(**two):
                task.dispatch()
            task.dispatch()
            with override_settings(TASKHAWK_BROKER="sqlite://"):
                with override_settings(DEBUG=True):
                    task.dispatch()
                taskhawk.listen_for_messages(taskhawk.Priority.default, loop_count=1)
            print(ran)
        """
        assert python_lines(tmp_path, code) == ["[1]"]
        found = [
            (call.path.strip("/"), call.data["QueueName"])
            for call in aws.calls
            if call.action == "GetQueueUrl"
        ]
        one, two = ("one", "TASKHAWK-ONE"), ("two", "TASKHAWK-TWO")
        assert found == [one, two, one]

    def test_connections_are_recycled(self, tmp_path):
        """After so many runs, failed ones too, the thread's connections are closed."""
        cases = {
            (None, 5, "query"): "1111011",
            (0, 5, "query"): "0000000",
            (None, 3, "query"): "1101101",
            (None, 3, "fail"): "1101101",
            (None, 1, "query"): "0000000",
        }
        code = f"""{DJANGO_DATABASE}
    use()
    logging.disable()

    def check(max_age, runs, task):
        connection.settings_dict["CONN_MAX_AGE"] = max_age
        with override_settings(TASKHAWK_MAX_DB_REUSE_LOOPS=runs):
            open_after(task, 7)
        connection.close()

    for case in {list(cases)}:
        in_a_thread(check, *case)"""
        assert python_lines(tmp_path, code) == list(cases.values())

    @pytest.mark.slow
    def test_connections_of_other_threads(self, tmp_path):
        """A worker closes the connections of its own thread, and no others."""
        code = f"""{DJANGO_DATABASE}
    use(TASKHAWK_MAX_DB_REUSE_LOOPS=1, TASKHAWK_BROKER="sqlite://")
    connection.ensure_connection()
    mine = connection.connection
    query.dispatch()
    in_a_thread(taskhawk.listen_for_messages, taskhawk.Priority.default, 1, None, 1)
    print(connection.connection is mine, mine.execute("SELECT 1").fetchone())
    connection.close()"""
        assert python_lines(tmp_path, code) == ["True (1,)"]

    def test_connection_that_was_dropped(self, tmp_path):
        """What the database dropped fails one run at most, or none with checks."""
        (tmp_path / "served").mkdir()
        (tmp_path / "served" / "base.py").write_text("""if True:
            from django.db.backends.sqlite3 import base
            class DatabaseWrapper(base.DatabaseWrapper):
                def is_usable(self): # as a client of a server finds out
                    try:
                        return bool(self.connection.execute("SELECT 1"))
                    except base.Database.Error:
                        return False
        """)
        code = f"""{DJANGO_DATABASE}
    use("served", TASKHAWK_MAX_DB_REUSE_LOOPS=100)
    logging.disable()

    def check(health_checks):
        connection.settings_dict["CONN_HEALTH_CHECKS"] = health_checks
        query()
        connection.connection.close() # as a server does that is restarted
        print(*(taskhawk.process(body("__main__.query")).fate.name for _ in range(3)))
        connection.close()

    in_a_thread(check, True)
    in_a_thread(check, False)"""
        done = " ".join(["acknowledge"] * 3)
        fates = [done, done.replace("acknowledge", "retry", 1)]
        assert python_lines(tmp_path, code) == fates

    def test_connection_in_a_transaction(self, tmp_path):
        """A connection inside its caller's transaction is left open until after it."""
        code = f"""{DJANGO_DATABASE}
    use(TASKHAWK_MAX_DB_REUSE_LOOPS=1)
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE kept (id INTEGER)")
        open_after("query", 3)
    print(connection.introspection.table_names())
    open_after("query", 2)"""
        assert python_lines(tmp_path, code) == ["111", "['kept']", "00"]

    def test_connection_that_fails_to_close(self, tmp_path):
        """A database that fails to close its connection is logged; the run stands."""
        code = f"""{DJANGO_DATABASE}
    use(TASKHAWK_MAX_DB_REUSE_LOOPS=1)
    query()
    forgotten = connection.connection
    gone = django.db.OperationalError("the server has gone away")
    with mock.patch.object(connection, "_close", side_effect=gone):
        print(taskhawk.process(body("__main__.query")).fate.name)
    connection.close()
    forgotten.close()"""
        assert python_lines(tmp_path, code) == [
            "can't close the database connections",
            "the server has gone away",
            "acknowledge",
        ]


# --- 5. messages ----------------------------------------------------------------------

MESSAGE_RULES = {  # what errors say is expected, by path
    "id": "a non-empty string",
    "metadata": "an object",
    "metadata.priority": "one of default, high, low, bulk",
    "metadata.timestamp": "epoch milliseconds or an ISO 8601 date and time",
    "metadata.version": '"1.0"',
    "headers": "an object",
    "task": "a non-empty string",
    "args": "an array",
    "kwargs": "an object",
}
LATEST_MS = 8_640_000_000_000_000
#: by path, wrong values as JSON, and how an error shows each
MESSAGE_FLAWS_TEXT = """
id: "" is "" | null is null | 5 is a number | 0.5 is a number | true is a boolean
id: ["x"] is an array | {"x": 1} is an object
metadata: null is null | [] is an array | "" is ""
headers: null is null | [["a", "b"]] is an array
task: "" is "" | ["os.system"] is an array
args: "ab" is a string | {"0": 1} is an object
kwargs: [] is an array
metadata.version: 2 is 2 | 1.0 is 1.0 | "2.0" is "2.0" | null is null | false is false
metadata.version: ["1.0"] is an array | 1000000000000000000 is a huge number
metadata.timestamp: null is null | true is true | [] is an array | {} is an object
metadata.timestamp: "" is "" | -1 is -1 | -0.5 is -0.5
metadata.timestamp: 8640000000000001 is 8640000000000001 | "yesterday" is "yesterday"
metadata.timestamp: "2023-02-29" is "2023-02-29" | "1900-02-29" is "1900-02-29"
metadata.timestamp: "0000-01-01" is "0000-01-01" | "2018-04-31" is "2018-04-31"
metadata.timestamp: "2018-04-05T24:00Z" is "2018-04-05T24:00Z"
metadata.priority: null is null | 2 is 2 | "urgent" is "urgent" | "HIGH" is "HIGH"
metadata.priority: ["high"] is an array
"""
MESSAGE_FLAWS = [
    *(
        (path, ABSENT, "nothing")
        for path in MESSAGE_RULES
        if path != "metadata.priority"
    ),
    ("metadata.version", "9" * 99, f'"{"9" * 40}"'),
    ("metadata.timestamp", 10**400, "a huge number"),
    ("metadata.timestamp", "2018-04-05T11:22\n", r'"2018-04-05T11:22\n"'),
    ("metadata.timestamp", "٢018-04-05", r'"\u0662018-04-05"'),
]
for line in MESSAGE_FLAWS_TEXT.strip().splitlines():
    path, _, flaws = line.partition(": ")
    for flaw in flaws.split(" | "):
        value, _, shown = flaw.partition(" is ")
        MESSAGE_FLAWS.append((path, json.loads(value), shown))
FOREIGN_BODIES = {  # what an error calls a body with these keys
    "a notification of SNS: turn on raw message delivery for the subscription": (
        "Type MessageId TopicArn Message Timestamp UnsubscribeURL"
    ),
    "SNS's request to confirm a subscription: confirm it, and choose raw delivery": (
        "Type MessageId Token TopicArn Message SubscribeURL"
    ),
    "an event of EventBridge: send it to another queue": (
        "version id detail-type source account time region resources detail"
    ),
    "an event of S3 or a similar service: send it to another queue": "Records",
    "a test event of S3: send it to another queue": (
        "Service Event Time Bucket RequestId HostId"
    ),
}
SCHEMA_VALIDATOR = jsonschema.Draft202012Validator(taskhawk.SCHEMA)
TOO_EXACT = "a Decimal has more digits than a float: send it as a string"
NOT_FINITE = "Out of range float values are not JSON compliant"


@pytest.fixture
def send_email(isolated):
    """Return the task of the valid message; its attribute `calls` collects its runs."""
    calls = []

    @taskhawk.task(name="tasks.send_email")
    def send_email(to, subject, from_email=None):
        calls.append((to, subject, from_email))

    send_email.calls = calls
    return send_email


JSON_TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates and NUL too
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
    st.sampled_from(["", "00:00", "23:59", "24:00", "12:60", "12:30:60", "1:30"])
    | st.builds("23:59:59{}{}".format, st.sampled_from(".,;"), st.integers(0, 10**10)),
    st.sampled_from(["", "Z", "z", "+05:30", "-0130", "+23:59", "+24:00", "+1", "\n"]),
)
ALMOST = {
    "metadata.timestamp": ISO_8601_LIKE
    | st.datetimes().map(dt.datetime.isoformat)
    | st.integers(-2, 1)
    | st.sampled_from([LATEST_MS, LATEST_MS + 0.5, LATEST_MS + 1])
    | st.floats(allow_nan=False),
    "metadata.version": st.sampled_from(["1.0", "1", "1.0 ", 1.0, "2.0"]),
    "metadata.priority": st.sampled_from(["default", "bulk", "High", "", 1]),
    **dict.fromkeys((*VALID, "metadata.unknown", "unknown"), JSON_VALUE),
}


@st.composite
def almost_valid(draw):
    """Draw a message that differs from the valid one by at most two edits."""
    data = copy.deepcopy(VALID)
    paths = st.lists(st.sampled_from(sorted(ALMOST)), max_size=2, unique=True)
    for path in draw(paths):
        value = draw(st.just(ABSENT) | ALMOST[path] | JSON_VALUE)
        *parents, key = path.split(".")
        parent = data.get(parents[0]) if parents else data
        if isinstance(parent, dict):
            parent.pop(key, None)
            parent.update({} if value is ABSENT else {key: value})
    return data


class TestMessages:
    """Untrusted bytes stop here, and nothing leaves that would be refused here."""

    def test_wire_format(self, memory, send_email):
        """A dispatched message has 1.4's format, a new id and the time of dispatch."""
        before_ms = time.time_ns() // 1_000_000
        call = send_email.with_headers(request_id="1234").with_priority(Priority.high)
        message_id = call.dispatch(*VALID["args"], **VALID["kwargs"])
        [received] = receive_all(Priority.high)
        data = json.loads(received.body)
        assert str(uuid.UUID(message_id, version=4)) == message_id
        timestamp = data["metadata"]["timestamp"]
        assert type(timestamp) is int
        assert before_ms <= timestamp <= time.time_ns() // 1_000_000
        metadata = {**VALID["metadata"], "timestamp": timestamp}
        assert same_json(data, {**VALID, "id": message_id, "metadata": metadata})
        assert received.body.isascii()
        assert taskhawk.process(received) == Outcome(Fate.acknowledge)
        run = ("email@automatic.com", "Hello!", "spam@example.com")
        assert send_email.calls == [run]

    def test_properties(self, send_email):
        """A message has the properties and methods of 1.4."""
        message = Message(VALID)
        assert message.id == VALID["id"]
        assert message.metadata == VALID["metadata"]
        assert (message.timestamp, message.version) == (1460868253255, "1.0")
        assert message.priority is Priority.high
        assert message.headers == VALID["headers"]
        assert (message.task, message.task_name) == (send_email, "tasks.send_email")
        assert (message.args, message.kwargs) == (VALID["args"], VALID["kwargs"])
        assert message.as_dict() == dict(message.items()) == VALID
        assert (message.CURRENT_VERSION, list(message.VERSIONS)) == ("1.0", ["1.0"])
        message.call_task(None)
        assert len(send_email.calls) == 1
        message.priority = Priority.low
        message.args.append("more")
        metadata = {**VALID["metadata"], "priority": "low"}
        args = [*VALID["args"], "more"]
        assert message.as_dict() == {**VALID, "metadata": metadata, "args": args}

    def test_equality(self):
        """Messages are equal where their contents are, and can't be keys of a dict."""
        assert Message(VALID) == Message(copy.deepcopy(VALID))
        assert Message(VALID) != Message(edited("id", "other"))
        assert Message(VALID) != VALID
        with pytest.raises(TypeError, match=r"^unhashable type: 'Message'$"):
            hash(Message(VALID))

    def test_new(self, memory, send_email):
        """Message.new takes 1.4's arguments in order; publish() sends what it made."""
        kwargs, headers = {"from_email": 3}, {"h": 4}
        message = Message.new("tasks.send_email", (1, 2), kwargs, "id", headers)
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
        message.priority = Priority.high  # it may be changed until it is sent
        assert taskhawk.publish(message) == "id"
        [received] = receive_all(Priority.high)
        assert json.loads(received.body) == message.as_dict()
        least = Message.new("tasks.send_email", priority=Priority.bulk)
        assert (least.args, least.kwargs, least.headers) == ([], {}, {})
        assert least.priority is Priority.bulk
        assert least.id != Message.new("tasks.send_email").id

    def test_new_is_refused(self, send_email):
        """Message.new takes no task that is not registered, and no id but a string."""
        sentence = "no task is registered as 'tasks.nope': is its module imported?"
        for find in (Message.new, taskhawk.Task.find_by_name):
            assert refused(find, "tasks.nope", error=taskhawk.TaskNotFound) == sentence
        assert self.refused(json.dumps(edited("task", "tasks.nope"))) == sentence
        wrong = {"msg_id": uuid.UUID(VALID["id"]), "error": taskhawk.ValidationError}
        sentence = "id: expected a non-empty string, got UUID"
        assert refused(Message.new, "tasks.send_email", **wrong) == sentence

    @pytest.mark.parametrize(("path", "value", "shown"), MESSAGE_FLAWS)
    def test_wrong_value(self, send_email, path, value, shown):
        """An invalid message is refused by the path of what is wrong, and not run."""
        sentence = f"{path}: expected {MESSAGE_RULES[path]}, got {shown}"
        data = edited(path, value)
        assert refused(Message, data, error=taskhawk.ValidationError) == sentence
        assert self.refused(json.dumps(data)) == sentence
        assert send_email.calls == []

    @pytest.mark.parametrize(
        ("body", "sentence"),
        [
            ("", "not JSON at character 0"),
            ("nope", "not JSON at character 0"),
            ("{", "not JSON at character 1"),
            ('{"password": hunter2}', "not JSON at character 13"),
            ('{"a": 1} x', "not JSON at character 9"),
            ("{'id': 1}", "not JSON at character 1"),
            ('{"id": NaN}', "not JSON"),
            ('{"id": -Infinity}', "not JSON"),
            ('{"id": 1e999}', "not JSON"),
            ("9" * 5000, "not JSON"),
            ("[" * 100_000, "nested too deeply"),
            ('{"a":' * 100_000, "nested too deeply"),
            ("[1]", "expected an object, got an array"),
            ("null", "expected an object, got null"),
            ("true", "expected an object, got a boolean"),
            ("1e3", "expected an object, got a number"),
            ('"x"', "expected an object, got a string"),
            (None, "expected a string of JSON, got null"),
            (b"{}", "expected a string of JSON, got bytes"),
        ],
        ids=lambda value: repr(value)[:20],
    )
    def test_hostile_body(self, body, sentence):
        """A body that is no message is refused by an error that does not quote it."""
        assert self.refused(body) == f"message: {sentence}"

    @pytest.mark.parametrize(("what", "keys"), FOREIGN_BODIES.items())
    def test_body_of_another_service(self, what, keys):
        """A body that another service sent is called what it is, and what to do."""
        sentence = f"message: expected one of taskhawk's, got {what}"
        foreign = dict.fromkeys(keys.split(), "x")
        assert self.refused(json.dumps(foreign)) == sentence
        # A message is ours, whatever keys it has besides.
        assert Message(foreign | VALID) == Message(VALID)

    @pytest.mark.slow
    @given(st.text() | st.binary() | JSON_VALUE.map(json.dumps))
    def test_any_body(self, body):
        """Whatever a body is, it is refused by a ValidationError and no other error."""
        self.refused(body)

    @staticmethod
    def refused(body: Any) -> str:
        """Return why a received body is left to the queue, with no delay of ours."""
        outcome = run_body(body)
        assert (outcome.fate, outcome.delay_s) == (Fate.retry, None)
        assert isinstance(outcome.error, taskhawk.ValidationError)
        return str(outcome.error)

    @pytest.mark.parametrize(
        ("timestamp", "epoch_ms"),
        [
            (0, 0),
            (1460868253255, 1460868253255),
            (1460868253255.9, 1460868253255),
            (1.5e12, 1500000000000),
            (LATEST_MS, LATEST_MS),
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
        """Milliseconds or ISO 8601, in UTC unless it says so, become an int."""
        with monkeypatch.context() as context:
            context.setenv("TZ", "IST-5:30")  # local time must not matter
            time.tzset()
            message = Message(edited("metadata.timestamp", timestamp))
        time.tzset()
        assert (message.timestamp, type(message.timestamp)) == (epoch_ms, int)
        assert message.as_dict()["metadata"]["timestamp"] == epoch_ms

    def test_lenient(self, send_email):
        """Unknown keys are dropped, a priority is optional, headers are any JSON."""
        headers = {"a": {"b": [None]}}
        data = {
            **edited("metadata.priority", ABSENT),
            "headers": headers,
            "more": [1],
        }
        data["metadata"]["unknown"] = 1
        message = Message(data)
        assert message.priority is Priority.default
        metadata = {**VALID["metadata"], "priority": "default"}
        kept = {**VALID, "headers": headers, "metadata": metadata}
        assert message.as_dict() == kept
        assert run_body(json.dumps(data)).fate is Fate.acknowledge
        assert len(send_email.calls) == 1

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            ({1}, "set is not a JSON type"),
            ([{"a": b"x"}], "bytes is not a JSON type"),
            (Priority.high, "Priority is not a JSON type"),
            ({(1, 2): 3}, "keys must be str, int, float, bool or None, not tuple"),
            ([math.nan], NOT_FINITE),
            (-math.inf, NOT_FINITE),
            (Decimal("NaN"), NOT_FINITE),
            (Decimal("sNaN"), "cannot convert signaling NaN to float"),
            (Decimal("Infinity"), NOT_FINITE),
            (Decimal("1E+5000"), NOT_FINITE),
            ([Decimal("12345678901234567.89")], TOO_EXACT),
            (Decimal("0.1234567890123456789"), TOO_EXACT),
            (Decimal("1E-400"), TOO_EXACT),
        ],
        ids=repr,
    )
    def test_not_json(self, memory, send_email, value, reason):
        """An argument or header that is not JSON fails at the dispatch, by its path."""
        is_typed = re.search("type|keys", reason)
        error = TypeError if is_typed else taskhawk.ValidationError
        dispatch, with_headers = send_email.dispatch, send_email.with_headers
        calls = {
            "args[1]": lambda: dispatch("x", value),
            "kwargs.from_email": lambda: dispatch("x", "y", from_email=value),
            "headers.h": lambda: with_headers(h=value).dispatch("x", "y"),
        }
        for path, call in calls.items():
            # Newer Pythons add the value, which is a float here.
            text = re.sub(
                "(compliant): -?(nan|inf)$", r"\1", refused(call, error=error)
            )
            assert text == f"tasks.send_email: {path} is not JSON: {reason}"
        assert receive_all() == []

    def test_not_json_as_a_whole(self, memory, send_email):
        """Where no one argument or header is at fault, the error names the task."""
        message = Message.new("tasks.send_email", [1])
        message.id = b"1"
        sentence = "tasks.send_email: not JSON: bytes is not a JSON type"
        error = taskhawk.ValidationError
        assert refused(taskhawk.publish, message, error=error) == sentence

    def test_json(self, memory, send_email):
        """Decimals become ints if whole, else floats; tuples arrays; the body is ASCII."""
        decimals = "2 1.10 1E+3 -0.5 12345678901234567890.0 1234567890123.45 1E-7"
        values = [*map(Decimal, decimals.split()), (1, [None]), "\ud800\0é"]
        send_email.dispatch("x", values)
        [received] = receive_all()
        assert json.dumps(json.loads(received.body)["args"][1]) == (
            "[2, 1.1, 1000, -0.5, 12345678901234567890, 1234567890123.45, 1e-07,"
            r' [1, [null]], "\ud800\u0000\u00e9"]'
        )
        assert received.body.isascii()

    @pytest.mark.slow
    def test_round_trip(self, sync):
        """Any JSON call arrives as it was made: arguments, keywords and headers."""
        runs = []

        @taskhawk.task(name="tasks.echo")
        def echo(*, value, headers, metadata, **kwargs):
            runs.append((value, kwargs, headers, metadata.id))

        @taskhawk.task(name="tasks.echo_args")
        def echo_args(first, second, /, headers, **kwargs):
            del kwargs["metadata"]
            runs.append((second, kwargs, headers, first))

        taken = {"value", "headers", "metadata"}
        keyword = JSON_TEXT.filter(lambda name: name not in taken)
        keywords = st.dictionaries(keyword, JSON_VALUE)

        @given(JSON_VALUE, keywords, st.dictionaries(JSON_TEXT, JSON_VALUE))
        @hypothesis.settings(max_examples=60)
        def check(value, kwargs, headers):
            runs.clear()
            message_id = echo.with_headers(**headers).dispatch(value=value, **kwargs)
            echo_args.with_headers(**headers).dispatch(message_id, value, **kwargs)
            call = (value, kwargs, headers, message_id)
            assert same_json(runs, [call, call])

        check()

    @pytest.mark.slow
    @given(almost_valid() | JSON_VALUE)
    @hypothesis.example(edited("metadata.timestamp", "0000-01-01"))
    @hypothesis.example(edited("metadata.timestamp", "0000-02-29T00:00:00Z"))
    @hypothesis.example(edited("metadata.timestamp", "1970-01-01T00:00+23:59"))
    @hypothesis.settings(max_examples=250)
    def test_schema(self, data):
        """The validator and the JSON Schema agree on every message."""
        if not SCHEMA_VALIDATOR.is_valid(data):
            with pytest.raises(taskhawk.ValidationError):
                Message(data)
            return
        message = Message(data)
        assert Message(message.as_dict()) == message

    def test_schema_of_the_schema(self):
        """SCHEMA is a valid JSON Schema 2020-12."""
        SCHEMA_VALIDATOR.check_schema(taskhawk.SCHEMA)


# What PyPI's taskhawk 1.4.0 and 4.7.0 sent: the library, how it came to the queue (SNS:
# with or without raw delivery), the case, and the body, verbatim but for line breaks in
# place of spaces.
RECORDED = r"""
1.4.0 sqs plain
{"id": "d91c68be-a158-4a97-bba6-5c65e3b6be81", "metadata": {"priority": "default",
"timestamp": 1795220678277, "version": "1.0"}, "headers": {}, "task":
"tasks.send_email", "args": ["example@email.com", "Hello!"], "kwargs": {}}

1.4.0 sqs kwargs
{"id": "05c6bd64-7caa-4527-9085-4cad977461cd", "metadata": {"priority": "default",
"timestamp": 1795220678551, "version": "1.0"}, "headers": {}, "task":
"tasks.send_email", "args": ["example@email.com"], "kwargs": {"subject": "Hello!",
"from_email": "spam@example.com"}}

1.4.0 sqs headers-str
{"id": "75343dbf-6798-4708-8b9c-c2bd9268a829", "metadata": {"priority": "default",
"timestamp": 1795220678814, "version": "1.0"}, "headers": {"request_id": "1234",
"tenant": "acme"}, "task": "tasks.notify", "args": ["bob"], "kwargs": {}}

1.4.0 sqs headers-mixed
{"id": "5b660205-7f09-42aa-bc23-a6f750df0ef7", "metadata": {"priority": "default",
"timestamp": 1795220679052, "version": "1.0"}, "headers": {"count": 3, "ratio": 0.5,
"flag": true, "nothing": null, "nested": {"a": [1, {"b": null}], "\u00e9": "it's"},
"name": "\u017dlu\u0165ou\u010dk\u00fd \ud83d\udc0e", "price": 1.5}, "task":
"tasks.send_email", "args": ["a@b.c", "mixed"], "kwargs": {}}

1.4.0 sqs high-task
{"id": "457fd27e-130c-4184-bf2a-68d4b87abcc9", "metadata": {"priority": "high",
"timestamp": 1795220679331, "version": "1.0"}, "headers": {}, "task":
"tasks.send_email_high", "args": ["example@email.com", "Now!"], "kwargs": {}}

1.4.0 sqs values
{"id": "02133125-dc2c-432d-ad2c-14eefbbd92f3", "metadata": {"priority": "default",
"timestamp": 1795220679622, "version": "1.0"}, "headers": {}, "task": "tasks.store",
"args": [[2, 1.1, 1000, 0.12345678901234568, 100000000000000000000, 1e+22, -0.0, true,
null, "\u017dlu\u0165ou\u010dk\u00fd \ud83d\udc0e \u2028 \"q\" \\ / <&> \n\t\u007f"]],
"kwargs": {"extra": {"tuple": [1, [2]], "3": {"deep": [[], {}]}, "d": {"x": 5}}}}

4.7.0 sns-raw plain
{"id": "4acc8aaf-35f4-47a9-bb93-4578d298e522", "metadata": {"timestamp": 1795220680640,
"priority": "default", "version": "1.0"}, "headers": {}, "task": "tasks.send_email",
"args": ["example@email.com", "Hello!"], "kwargs": {}}

4.7.0 sns-raw headers-mixed
{"id": "7282171d-71ed-4b74-aeaf-470dfcd76336", "metadata": {"timestamp": 1795220680931,
"priority": "default", "version": "1.0"}, "headers": {"count": 3, "ratio": 0.5, "flag":
true, "nothing": null, "nested": {"a": [1, {"b": null}], "\u00e9": "it's"}, "name":
"\u017dlu\u0165ou\u010dk\u00fd \ud83d\udc0e", "price": 1.5}, "task": "tasks.send_email",
"args": ["a@b.c", "mixed"], "kwargs": {}}

4.7.0 sns-raw values
{"id": "f00cf316-a9b0-4d5b-bfa1-2d9a63001c5c", "metadata": {"timestamp": 1795220681240,
"priority": "default", "version": "1.0"}, "headers": {}, "task": "tasks.store", "args":
[[2, 1.1, 1000, 0.12345678901234568, 100000000000000000000, 1e+22, -0.0, true, null,
"\u017dlu\u0165ou\u010dk\u00fd \ud83d\udc0e \u2028 \"q\" \\ / <&> \n\t\u007f"]],
"kwargs": {"extra": {"tuple": [1, [2]], "3": {"deep": [[], {}]}, "d": {"x": 5}}}}

4.7.0 sns-raw kwargs-task
{"id": "0c27eb29-4b8e-4d1a-9859-de4023a01abe", "metadata": {"timestamp": 1795220681601,
"priority": "default", "version": "1.0"}, "headers": {"source": "web"}, "task":
"tasks.log_event", "args": ["login"], "kwargs": {"user": {"id": 7}, "ok": true}}

4.7.0 sns-raw bulk
{"id": "ab0309e5-11b7-4c6f-a8e4-9a7eedb9e28e", "metadata": {"timestamp": 1795220682009,
"priority": "bulk", "version": "1.0"}, "headers": {"batch": "7"}, "task":
"tasks.send_email", "args": ["a@b.c", "bulk"], "kwargs": {}}

4.7.0 sns headers-str
{"id": "90b8c9b1-0791-4104-8561-53f160f29539", "metadata": {"timestamp": 1795220682426,
"priority": "default", "version": "1.0"}, "headers": {"request_id": "1234", "tenant":
"acme"}, "task": "tasks.notify", "args": ["bob"], "kwargs": {}}
"""
RECORDINGS = {}
for record in RECORDED.strip().split("\n\n"):
    first, *rest = record.splitlines()
    RECORDINGS[first] = " ".join(rest)
MIXED_HEADERS = {
    "count": 3,
    "ratio": 0.5,
    "flag": True,
    "nothing": None,
    "nested": {"a": [1, {"b": None}], "é": "it's"},
    "name": "Žluťoučký 🐎",
    "price": Decimal("1.50"),
}
VALUES = [Decimal(2), Decimal("1.10"), Decimal("1E+3"), 0.12345678901234568, 10**20]
VALUES += [1e22, -0.0, True, None, 'Žluťoučký 🐎 \u2028 "q" \\ / <&> \n\t\x7f']
EXTRA = {"tuple": (1, (2,)), 3: {"deep": [[], {}]}, "d": {"x": Decimal("5.0")}}
EMAIL = {"subject": "Hello!", "from_email": "spam@example.com"}
EVENT = {"user": {"id": 7}, "ok": True}
RECORDED_CALLS = {  # what was dispatched: task, headers, arguments, keyword arguments
    "bulk": ("send_email", {"batch": "7"}, ("a@b.c", "bulk"), {}),
    "headers-mixed": ("send_email", MIXED_HEADERS, ("a@b.c", "mixed"), {}),
    "headers-str": ("notify", {"request_id": "1234", "tenant": "acme"}, ("bob",), {}),
    "high-task": ("send_email_high", {}, ("example@email.com", "Now!"), {}),
    "kwargs": ("send_email", {}, ("example@email.com",), EMAIL),
    "kwargs-task": ("log_event", {"source": "web"}, ("login",), EVENT),
    "plain": ("send_email", {}, ("example@email.com", "Hello!"), {}),
    "values": ("store", {}, (VALUES,), {"extra": EXTRA}),
}


def recorded_email(to, subject, from_email=None):
    """Be a task of the recordings."""


def recorded_event(name, **kwargs):
    """Be one that takes metadata and headers among others."""


def recorded_notify(to: str, metadata: dict, headers: dict):
    """Be one that takes both by name."""


def recorded_store(value, extra=None):
    """Be one of any arguments."""


RECORDED_TASKS = {
    "send_email": recorded_email,
    "send_email_high": recorded_email,
    "log_event": recorded_event,
    "notify": recorded_notify,
    "store": recorded_store,
}


def recorded_arguments(task: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by their names."""
    return inspect.signature(RECORDED_TASKS[task]).bind(*args, **kwargs).arguments


@pytest.fixture
def recorded_runs(isolated):
    """Register the tasks of the recordings, and return the list of their runs."""
    runs = []

    def register(name: str, fn: Callable[..., None]) -> None:
        @functools.wraps(fn)
        def run(*args: Any, **kwargs: Any) -> None:
            runs.append(recorded_arguments(name, *args, **kwargs))

        taskhawk.task(run, name=f"tasks.{name}")

    for name, fn in RECORDED_TASKS.items():
        register(name, fn)
    return runs


def recorded_run(case: str, body: str, receipt: str | None) -> dict[str, Any]:
    """Return what a case's task is called with."""
    task, headers, args, kwargs = RECORDED_CALLS[case]
    given = {}
    if task in ("log_event", "notify"):
        metadata = json.loads(body)["metadata"]
        metadata["priority"] = Priority[metadata["priority"]]
        metadata |= {"id": json.loads(body)["id"], "receipt": receipt}
        given = {"metadata": metadata, "headers": plain_json(headers)}
    return recorded_arguments(task, *plain_json(args), **plain_json(kwargs), **given)


def plain_json(value: object) -> Any:
    """Return the JSON that 1.4 made of a value."""
    text = json.dumps(value, default=lambda d: int(d) if d == int(d) else float(d))
    return json.loads(text)


def string_attributes(case: str, kind: str, content: str) -> dict[str, dict[str, str]]:
    """Return a case's message attributes as 1.4 made them: str() of each header."""
    headers = RECORDED_CALLS[case][1]
    return {name: {kind: "String", content: str(headers[name])} for name in headers}


@pytest.mark.parametrize("recording", RECORDINGS)
class TestInterop:
    """What PyPI's taskhawk 1.4.0 and 4.7.0 publish, we run; and we publish the same."""

    def test_theirs(self, recorded_runs, recording):
        """A message of theirs runs our task, from SQS and in Lambda behind SNS."""
        case, body = recording.split()[-1], RECORDINGS[recording]
        assert SCHEMA_VALIDATOR.is_valid(json.loads(body))
        attributes = string_attributes(case, "DataType", "StringValue")
        received = QueueMessage(body, "id", "receipt", message_attributes=attributes)
        assert taskhawk.process(received) == Outcome(Fate.acknowledge)
        attributes = string_attributes(case, "Type", "Value")
        sns = {"Type": "Notification", "MessageId": "sns-id", "Message": body}
        record = {"Sns": {**sns, "MessageAttributes": attributes}}
        record |= {"EventSource": "aws:sns", "EventVersion": "1.0"}
        taskhawk.process_messages_for_lambda_consumer({"Records": [record]})
        receipts = ("receipt", None)
        assert recorded_runs == [recorded_run(case, body, each) for each in receipts]

    def test_ours(self, memory, recorded_runs, recording):
        """The same call makes the same message here, body and attributes."""
        case, theirs = recording.split()[-1], json.loads(RECORDINGS[recording])
        name, headers, args, kwargs = RECORDED_CALLS[case]
        priority = Priority[theirs["metadata"]["priority"]]
        task = taskhawk.Task.find_by_name(f"tasks.{name}")
        invocation = task.with_headers(**headers).with_priority(priority)
        message_id = invocation.dispatch(*args, **kwargs)
        [received] = receive_all(priority)
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

    def test_attributes(self, ministack, sqs_client, queue_name, recorded_runs, via):
        """Sent to a queue, or to a topic with raw delivery, a message is the same."""
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
        configure_aws(ministack, queue_name, IS_LAMBDA_APP=via == "sns")
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
        sent = string_attributes("headers-mixed", "DataType", "StringValue")
        assert attributes == sent


# --- 6. retry policies ----------------------------------------------------------------


class TestRetryPolicies:
    """A policy turns an attempt into a delay, or gives up."""

    @pytest.mark.parametrize(
        ("policy", "delays"),
        [
            (taskhawk.fixed(7, jitter=False), [7, 7, 7, 7, 7]),
            (taskhawk.linear(5, 10, jitter=False), [5, 15, 25, 35, 45]),
            (taskhawk.linear(5, 10, max_delay_s=30, jitter=False), [5, 15, 25, 30, 30]),
            (taskhawk.exponential(jitter=False), [1, 2, 4, 8, 16]),
            (taskhawk.exponential(0.5, 3, jitter=False), [0.5, 1.5, 4.5, 13.5, 40.5]),
            (taskhawk.exponential(max_delay_s=5, jitter=False), [1, 2, 4, 5, 5]),
            (taskhawk.fixed(0), [0, 0, 0, 0, 0]),
        ],
    )
    def test_delays(self, policy, delays):
        """Delays are equal, or grow by a step or by a factor."""
        assert [policy(attempt) for attempt in range(1, 6)] == delays

    @pytest.mark.parametrize(
        "policy",
        [taskhawk.fixed(1, 2), taskhawk.linear(1, 1, 2), taskhawk.exponential(1, 2, 2)],
    )
    def test_gives_up(self, policy):
        """After max_retries retries a policy raises StopRetry."""
        assert all(policy(attempt) <= 3 for attempt in (1, 2))
        sentence = "all 2 retries are used up"
        assert refused(policy, 3, error=taskhawk.StopRetry) == sentence

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
    def test_no_overflow(self, policy, attempt, delay_s):
        """A delay beyond all floats is the longest one, at most SQS's 12 hours."""
        assert policy(attempt) == delay_s

    @given(
        base_s=st.integers(0, 10**6) | st.floats(0, 1e6),
        growth=st.floats(1, 1e9) | st.integers(1, 10),
        ceiling_s=st.floats(0, 1e6),
        attempt=st.integers(1, 100_000),
        seed=st.integers(0, 2**32),  # Hypothesis seeds `random` alike in each example
    )
    def test_jitter(self, base_s, growth, ceiling_s, attempt, seed):
        """Jitter, on by default, takes from half of a delay to all of it."""
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

    @pytest.mark.parametrize(
        "policy",
        [taskhawk.fixed(60), taskhawk.linear(60, 1), taskhawk.exponential(60)],
    )
    def test_jitter_differs(self, policy):
        """What failed together does not come back together, unless told otherwise."""
        assert len({policy(1) for _ in range(20)}) > 1

    @pytest.mark.parametrize(
        ("maker", "arguments", "wrong"),
        [
            (taskhawk.fixed, (-1,), "-1"),
            (taskhawk.fixed, (None,), "None"),
            (taskhawk.fixed, (1, -1), "-1"),
            (taskhawk.fixed, (1, True), "True"),
            (taskhawk.linear, ("1", 1), "'1'"),
            (taskhawk.linear, (1, -2), "-2"),
            (taskhawk.linear, (1, 1, 3, -1), "-1"),
            (taskhawk.exponential, (math.nan,), "nan"),
            (taskhawk.exponential, (True,), "True"),
            (taskhawk.exponential, (1, math.nan), "nan"),
            (taskhawk.exponential, (1, "2"), "'2'"),
        ],
    )
    def test_wrong_parameter(self, maker, arguments, wrong):
        """A policy that makes no sense is refused where it is written."""
        sentence = f"retry policy: expected 0 or more, got {wrong}"
        assert refused(maker, *arguments) == sentence


# === PART II: QUEUES ==================================================================


# --- 7. the broker contract -----------------------------------------------------------

STALE = taskhawk.Refusal(0, "ReceiptHandleIsInvalid", "", final=True)


@dataclasses.dataclass
class Queues:
    """A broker, and one of its queues, which has a dead-letter queue after two receives."""

    broker: taskhawk.Broker
    name: str
    refuses_stale: bool
    clock: Clock

    def send(self, *bodies: str, delay_s: float = 0) -> None:
        """Send all in one call."""
        entries = [Outgoing(body, ATTRIBUTES, delay_s) for body in bodies]
        assert self.broker.send(self.name, entries) == []

    def receive(
        self, limit: int = 10, wait_s: float = 0, lease_s: float | None = None
    ) -> list[QueueMessage]:
        """Receive, by default at once what is visible."""
        return self.broker.receive(self.name, limit, wait_s, lease_s, NEVER)

    def receive_all(self, count: int) -> list[QueueMessage]:
        """Receive until there are so many, waiting for them; sort them by their bodies."""
        deadline = time.monotonic() + 15
        found: list[QueueMessage] = []
        while len(found) < count:
            assert time.monotonic() < deadline
            found += self.receive(10, 5)
        return sorted(found, key=lambda message: message.body)

    def change(self, *changes: tuple[Any, float]) -> list[taskhawk.Refusal]:
        """Change visibility timeouts; return the refusals without their text."""
        return self._wordless(self.broker.change_visibility(self.name, changes))

    def delete(self, *receipts: Any) -> list[taskhawk.Refusal]:
        """Delete; return the refusals without their text."""
        return self._wordless(self.broker.delete(self.name, receipts))

    def depth(self) -> tuple[int, ...]:
        """Return how many messages are visible, in flight and delayed."""
        return tuple(self.broker.depth(self.name))

    def receive_one(self) -> QueueMessage:
        """Receive one message, waiting for it."""
        (message,) = self.receive(1, 15)
        return message

    def stale(self) -> tuple[Any, QueueMessage]:
        """Return a receipt that is stale, and its message as it was received again."""
        first = self.receive_one()
        assert self.change((first.receipt_handle, 0)) == []
        second = self.receive_one()
        return first.receipt_handle, second

    @staticmethod
    def _wordless(refusals: list[taskhawk.Refusal]) -> list[taskhawk.Refusal]:
        return [refusal._replace(text="") for refusal in refusals]


class TestBrokerContract:
    """What every broker does alike, so that a test on SQLite means something for SQS."""

    @pytest.fixture(params=["ministack", MOTO, "file", "memory"])
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
            url = f"sqlite://{path}?max_receive_count=2"
            broker = taskhawk.SqliteBroker(url, clock)
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
        hook_kwargs = {"queue_name": queues.name, "sqs_queue_message": message}
        assert message.hook_kwargs == hook_kwargs

    def test_ten_in_a_call(self, queues):
        """A call sends ten; a receive takes at most what it asks for, and ten."""
        queues.send(*"abcdefghij")
        queues.send("k")
        few = queues.receive(3)
        assert 1 <= len(few) <= 3
        many = queues.receive(50)
        assert len(many) <= 10
        found = [*few, *many, *queues.receive_all(11 - len(few) - len(many))]
        assert sorted(message.body for message in found) == list("abcdefghijk")
        assert len({message.message_id for message in found}) == 11

    def test_visibility(self, queues):
        """A message is visible when its timeout ends: later if extended, sooner if cut."""
        queues.send("extended")
        (extended,) = queues.receive(lease_s=1)
        assert queues.change((extended.receipt_handle, 60)) == []
        queues.send("left")
        (left,) = queues.receive(lease_s=1)
        queues.send("cut")
        (cut,) = queues.receive()
        assert queues.change((cut.receipt_handle, 1)) == []
        assert queues.receive() == []
        queues.clock.now += 1
        again = queues.receive_all(2)
        assert [(m.body, m.attempt) for m in again] == [("cut", 2), ("left", 2)]
        for before, after in zip((cut, left), again, strict=True):
            assert before.receipt_handle != after.receipt_handle
            assert before.message_id == after.message_id
            sent = before.attributes["SentTimestamp"]
            assert after.attributes["SentTimestamp"] == sent

    def test_delays_and_depth(self, queues):
        """A delayed message is counted as such, and received when its delay is over."""
        queues.send("now", "too")
        queues.send("later", delay_s=1)
        assert queues.depth() == (2, 0, 1)
        now = queues.receive_all(2)
        assert [message.body for message in now] == ["now", "too"]
        assert queues.depth() == (0, 2, 1)
        queues.clock.now += 1
        (later,) = queues.receive_all(1)
        assert later.body == "later"
        assert queues.delete(*(m.receipt_handle for m in (*now, later))) == []
        assert queues.depth() == (0, 0, 0)

    def test_stale_receipts(self, queues):
        """A receipt is void once the message was received again; AWS may not say so."""
        queues.send("x")
        stale, again = queues.stale()
        assert (again.attempt, again.receipt_handle != stale) == (2, True)
        if queues.refuses_stale:
            assert queues.change((stale, 0)) == [STALE]
            assert queues.delete(stale) == [STALE]
            assert queues.depth() == (0, 1, 0)
        assert queues.delete(again.receipt_handle) == []
        assert queues.depth() == (0, 0, 0)

    def test_batch_answers(self, queues):
        """The answer to a batch names the entries that failed by their index."""
        queues.send("a")
        stale, last = queues.stale()
        queues.send("b", "c")
        first, second = (m.receipt_handle for m in queues.receive_all(2))
        bad = stale if queues.refuses_stale else "no receipt"
        changed = queues.change((first, 60), (bad, 60), (second, 60))
        assert changed == [STALE._replace(index=1)]
        assert queues.delete(first, second, bad) == [STALE._replace(index=2)]
        assert queues.delete(last.receipt_handle) == []
        assert queues.depth() == (0, 0, 0)

    def test_dead_letters(self, queues):
        """After two receives a message goes, as it was sent, to the dead-letter queue."""
        dead = dataclasses.replace(queues, name=f"{queues.name}-DLQ")
        limits = taskhawk.QueueInfo(30.0, dead.name, 2)
        assert queues.broker.info(queues.name) == limits
        assert queues.broker.info(dead.name) == taskhawk.QueueInfo(30.0, None, None)
        queues.send("poison")
        _, second = queues.stale()
        second.change_visibility(VisibilityTimeout=0)
        assert queues.receive() == []
        (found,) = dead.receive_all(1)
        assert (found.body, found.message_id) == ("poison", second.message_id)
        assert found.message_attributes == second.message_attributes
        assert found.attributes["SentTimestamp"] == second.attributes["SentTimestamp"]
        assert queues.depth() == (0, 0, 0)

    def test_long_poll(self, queues):
        """A receive that waits ends with the send of a message, in this process too."""
        sending = threading.Timer(0.2, queues.send, ("wake up",))
        sending.start()
        start = time.monotonic()
        (message,) = queues.receive(wait_s=15)
        assert message.body == "wake up"
        assert time.monotonic() - start < 10
        sending.join(10)

    def test_message_acts_at_once(self, queues):
        """A message changes its visibility and deletes itself, as boto3's; or raises."""
        queues.send("x")
        (message,) = queues.receive()
        message.change_visibility(VisibilityTimeout=0)
        (again,) = queues.receive_all(1)
        assert again.attempt == 2
        again.delete()
        assert queues.depth() == (0, 0, 0)
        with pytest.raises(taskhawk.PartialFailure) as caught:
            again.change_visibility(VisibilityTimeout=0)
        assert str(caught.value) == "1 of 1 messages failed: ReceiptHandleIsInvalid"
        assert (caught.value.success_count, caught.value.failure_count) == (0, 1)

    def test_message_of_no_queue(self):
        """A message that no queue has is deleted and changed without effect."""
        message = QueueMessage("body", "id", sns_record={"Sns": {}})
        message.delete()
        message.change_visibility(VisibilityTimeout=3)
        assert (message.attempt, message.group_id, message.queue_url) == (1, None, "")
        assert (message.attributes, message.message_attributes) == ({}, {})
        assert message.hook_kwargs == {"sns_record": {"Sns": {}}}
        assert not message.is_last_receive

    @pytest.mark.parametrize(
        ("received", "limit", "is_last"),
        [("1", 2, False), ("2", 2, True), ("3", 2, True), ("9", None, False)],
    )
    def test_last_receive(self, received, limit, is_last):
        """A message says whether its queue's redrive policy allows another receive."""
        counted = {"ApproximateReceiveCount": received}
        message = QueueMessage("body", "id", attributes=counted)
        message.max_receive_count = limit
        assert message.is_last_receive is is_last

    @pytest.mark.parametrize(
        ("queue", "deduplication_id"), [("Q", None), ("Q.fifo", "sqs-id")]
    )
    def test_copy(self, queue, deduplication_id):
        """A copy keeps the group; on FIFO queues the SQS MessageId deduplicates it."""
        group = {"MessageGroupId": "customer 7"}
        message = QueueMessage("body", "sqs-id", "r", group, queue=queue)
        expected = Outgoing("body", ATTRIBUTES, 0, "customer 7", deduplication_id)
        assert message.copy(ATTRIBUTES) == expected

    def test_size(self):
        """The size is of body, attribute names, types and values, in bytes."""
        binary = {"b": {"DataType": "Binary", "BinaryValue": b"\x00\xff"}}
        assert Outgoing("é", {}).size() == 2
        assert Outgoing("", ATTRIBUTES).size() == len("request_idString") + 6
        assert Outgoing("", binary).size() == len("bBinary") + 2


class TestGroups:
    """What every broker does alike with the groups of messages."""

    @pytest.fixture(params=["ministack", "file", "memory"])
    def fifo(self, request, tmp_path, sqs_client, queue_name):
        """Yield a fresh FIFO queue of each broker that can be trusted with one."""
        name, clock = f"TASKHAWK-{queue_name}.fifo", Clock(time.time())
        if request.param == "ministack":
            endpoint = request.getfixturevalue("ministack")
            make_queue(sqs_client(endpoint), name, 2)
            configure_aws(endpoint)
            broker = taskhawk.SqsBroker()
        else:
            path = f"/{tmp_path}/queue.db" if request.param == "file" else ""
            url = f"sqlite://{path}?max_receive_count=2"
            broker = taskhawk.SqliteBroker(url, clock)
        with contextlib.closing(broker):
            yield Queues(broker, name, True, clock)

    @pytest.mark.parametrize(
        ("queue", "dead"), [("Q", "Q-DLQ"), ("Q-BULK.fifo", "Q-BULK-DLQ.fifo")]
    )
    def test_names(self, queue, dead):
        """The dead-letter queue of a FIFO queue is one, and its name ends like one."""
        assert taskhawk._dead_letter_name(queue) == dead
        assert taskhawk._is_dead_letter_queue(dead)
        assert not taskhawk._is_dead_letter_queue(queue)

    @pytest.mark.parametrize("is_fifo", [False, True])
    def test_destinations(self, is_fifo):
        """TASKHAWK_FIFO gives each queue's name an end, in lower case."""
        taskhawk.configure(TASKHAWK_QUEUE="dev-x", TASKHAWK_FIFO=is_fifo)
        names = ["DEV-X", "DEV-X-HIGH-PRIORITY", "DEV-X-LOW-PRIORITY", "DEV-X-BULK"]
        end = ".fifo" if is_fifo else ""
        found = [taskhawk.SqsBroker().destination(priority) for priority in Priority]
        assert found == [f"TASKHAWK-{name}{end}" for name in names]

    def test_order(self, fifo):
        """A group's next message is not given before the one before it is gone.

        It does not matter whether that is in flight, waits for its retry, or is visible
        again; a delete or the dead-letter queue frees the group. Groups are apart.
        """
        assert fifo.broker.send(fifo.name, grouped("a1 b1 a2 a3")) == []
        (a1,), (b1,) = fifo.receive(1), fifo.receive(1)
        assert (bodies_of([a1, b1]), a1.group_id, b1.group_id) == ("a1 b1", "a", "b")
        assert fifo.receive() == []
        assert fifo.broker.send(fifo.name, grouped("b2")) == []
        assert fifo.receive() == []
        assert sum(fifo.depth()) == 5
        assert fifo.delete(a1.receipt_handle) == []
        (a2,) = fifo.receive(1)
        assert a2.body == "a2"
        assert fifo.change((a2.receipt_handle, 1)) == []
        assert fifo.delete(b1.receipt_handle) == []
        assert bodies_of(fifo.receive(1)) == "b2"
        assert fifo.receive() == []
        fifo.clock.now += 1
        a2 = fifo.receive_one()
        assert (a2.body, a2.attempt) == ("a2", 2)
        assert fifo.change((a2.receipt_handle, 0)) == []
        assert fifo.receive_one().body == "a3"
        dead_letters = fifo.broker.info(fifo.name).dead_letter_queue
        dead = dataclasses.replace(fifo, name=dead_letters)
        (found,) = dead.receive_all(1)
        assert (found.body, found.message_id) == ("a2", a2.message_id)
        assert (found.group_id, found.queue) == ("a", f"{fifo.name[:-5]}-DLQ.fifo")

    def test_stale_receipt(self, fifo):
        """A receipt is refused once the message was received again."""
        assert fifo.broker.send(fifo.name, grouped("a1 a2")) == []
        stale, again = fifo.stale()
        assert fifo.delete(stale) == [STALE]
        assert fifo.receive() == []
        assert fifo.delete(again.receipt_handle) == []
        assert fifo.receive_one().body == "a2"


FAULT, MISSING = OSError("no route"), taskhawk.ConfigurationError("no queue")
# Of batch calls for "abcdefghijkl": each call that is made, with its answer: who is
# refused (in upper case: for good), or an error; who is refused in the end; how many
# rounds there are.
ROUNDS = {
    "all accepted": ([("abcdefghij", ""), ("kl", "")], "", 1),
    "refused once": ([("abcdefghij", "bd"), ("kl", "l"), ("bdl", "")], "", 2),
    "refused for good": ([("abcdefghij", "B"), ("kl", "")], "b", 1),
    "refused in turn": (
        [("abcdefghij", "ab"), ("kl", ""), ("ab", "Ab"), ("b", "")],
        "a",
        3,
    ),
    "refused always": (
        [("abcdefghij", "a"), ("kl", ""), ("a", "a"), ("a", "a")],
        "a",
        3,
    ),
    "a fault": ([("abcdefghij", FAULT), ("abcdefghij", ""), ("kl", "")], "", 2),
    "a fault in the second round": (
        [("abcdefghij", "a"), ("kl", "l"), ("al", FAULT), ("al", "")],
        "",
        3,
    ),
    "a mistake": ([("abcdefghij", MISSING)], "abcdefghijkl", 1),
    "a mistake after a part": ([("abcdefghij", ""), ("kl", MISSING)], "kl", 1),
}
# The same where the whole call was repeated before it failed.
REPEATED = {
    "at once": ([("abcdefghij", FAULT)], "abcdefghijkl", 1),
    "after a part": ([("abcdefghij", "a"), ("kl", FAULT), ("a", "")], "kl", 2),
    "in the second round": (
        [("abcdefghij", "a"), ("kl", "l"), ("al", FAULT)],
        "al",
        2,
    ),
}


# Of sends to a FIFO queue: each call, with the places in it that are refused (negative,
# from -1: for good), or an error; what is refused in the end, and how many rounds.
ORDERED = {
    "all accepted": ("a1 a2 b1", [("a1 a2 b1", [])], "", 1),
    "tried again in order": (
        "a1 a2 b1 a3 b2 a4 b3 a5 b4 a6 a7 b5",
        [
            ("a1 a2 b1 a3 b2 a4 b3 a5 b4 a6", [7, 9]),
            ("b5", []),
            ("a5 a6 a7", []),
        ],
        "",
        2,
    ),
    "overtaken": ("a1 a2 b1", [("a1 a2 b1", [0])], "a1", 1),
    "overtaken, then no more": (
        "a1 a2 b1 b2 b3 b4 b5 b6 b7 b8 a3 b9",
        [("a1 a2 b1 b2 b3 b4 b5 b6 b7 b8", [0]), ("b9", [])],
        "a1 a3",
        1,
    ),
    "for good": (
        "a1 a2 b1 b2 b3 b4 b5 b6 b7 b8 a3 b9",
        [("a1 a2 b1 b2 b3 b4 b5 b6 b7 b8", [-2]), ("b9", [])],
        "a2 a3",
        1,
    ),
    "for good, then one that may be tried": (
        "a1 a2",
        [("a1 a2", [-1, 1])],
        "a1 a2",
        1,
    ),
    "one that may be tried, then for good": (
        "a1 a2 b1 b2 b3 b4 b5 b6 b7 b8 a3",
        [("a1 a2 b1 b2 b3 b4 b5 b6 b7 b8", [0, -2]), ("a1", [])],
        "a2 a3",
        2,
    ),
    "always": (
        "a1 a2 b1",
        [("a1 a2 b1", [0, 1]), ("a1 a2", [0, 1]), ("a1 a2", [0, 1])],
        "a1 a2",
        3,
    ),
    "nothing is left to send": (
        "b1 a1 a2 a3 a4 a5 a6 a7 a8 a9 a10",
        [("b1 a1 a2 a3 a4 a5 a6 a7 a8 a9", [-2, 2, 3, 4, 5, 6, 7, 8, 9])],
        "a1 a2 a3 a4 a5 a6 a7 a8 a9 a10",
        1,
    ),
    "a fault": (
        "a1 a2 a3 a4 a5 a6 a7 a8 a9 a10 a11",
        [("a1 a2 a3 a4 a5 a6 a7 a8 a9 a10", []), ("a11", FAULT)],
        "a11",
        1,
    ),
}


class TestBatchCalls:
    """How often, and when, the entries of a batch are tried."""

    @pytest.fixture
    def pauses(self, monkeypatch):
        """Return a list of the pauses, which take no time and have no jitter."""
        pauses: list[float] = []
        monkeypatch.setattr(time, "sleep", pauses.append)
        monkeypatch.setattr(random, "uniform", lambda low, high: high)
        return pauses

    @pytest.mark.parametrize(
        ("repeated", "script", "refused", "rounds"),
        [
            *(pytest.param(False, *case, id=name) for name, case in ROUNDS.items()),
            *(pytest.param(True, *case, id=name) for name, case in REPEATED.items()),
        ],
    )
    def test_rounds(self, pauses, repeated, script, refused, rounds):
        """What is refused, but not for good, is tried three times, with pauses."""
        calls = iter(script)

        def call(entries: Sequence[str]) -> list[taskhawk.Refusal]:
            expected, answer = next(calls)
            assert "".join(entries) == expected
            if isinstance(answer, Exception):
                raise answer
            return [
                taskhawk.Refusal(expected.index(c.lower()), "C", "why", c.isupper())
                for c in answer
            ]

        letters = "abcdefghijkl"
        found = taskhawk._in_batches(call, letters, 3, repeated=repeated)
        assert "".join(letters[index] for index in sorted(found)) == refused
        assert all(refusal.index == index for index, refusal in found.items())
        assert next(calls, None) is None
        assert pauses == [0.09, 0.3][: max(0, rounds - 1)]

    @pytest.mark.parametrize("name", ORDERED)
    def test_ordered(self, pauses, name):
        """On a FIFO queue a message never overtakes one of its group by being sent later.

        What a call has accepted all the same is there: then the one before it is not
        sent any more, and neither is what follows.
        """
        words, script, refused, rounds = ORDERED[name]
        calls = iter(script)

        class Sender(taskhawk.SqliteBroker):
            def send(self, destination, entries):
                expected, answer = next(calls)
                assert [entry.body for entry in entries] == expected.split()
                if isinstance(answer, Exception):
                    raise answer
                return [
                    taskhawk.Refusal(p if p >= 0 else -1 - p, "C", "why", p < 0)
                    for p in answer
                ]

        entries = grouped(words)
        with contextlib.closing(Sender("sqlite://")) as sender:
            found = taskhawk._send_all(sender, "Q.fifo", entries)
        assert [entries[index].body for index in sorted(found)] == refused.split()
        assert all(refusal.index == index for index, refusal in found.items())
        assert next(calls, None) is None
        assert pauses == [0.09, 0.3][: rounds - 1]

    def test_held_back(self):
        """What was not sent, because of one before it, says so."""
        answers = [[taskhawk.Refusal(0, "C", "why", final=True)]]
        send = taskhawk._in_order("Q.fifo", lambda _: answers.pop())
        first, second = grouped("a1 a2")
        assert send([first]) == [taskhawk.Refusal(0, "C", "why", final=True)]
        text = "an earlier message of its group was refused"
        assert send([second]) == [taskhawk.Refusal(0, "GroupStopped", text, final=True)]

    def test_one_call(self):
        """An error in place of an answer refuses each entry, but not for good."""
        for error, code in ((FAULT, "OSError"), (MISSING, "ConfigurationError")):
            found = taskhawk._one_call(raising(error), "ab")
            expected = taskhawk.Refusal(0, code, str(error), final=False)
            assert found == {0: expected, 1: expected._replace(index=1)}
        refusal = taskhawk.Refusal(1, "C", "why", final=True)
        assert taskhawk._one_call(lambda entries: [refusal], "ab") == {1: refusal}
        assert not refusal.is_denied
        assert refusal._replace(code="AccessDeniedException").is_denied

    def test_change_all(self, caplog):
        """What can't be changed is a warning; a message of no queue is left alone."""
        with contextlib.closing(taskhawk.SqliteBroker("sqlite://")) as broker:
            broker.send("Q", numbered(1))
            (known,) = broker.receive("Q", 1, 0, None, NEVER)
            stale = dataclasses.replace(
                known, receipt_handle=f"{known.receipt_handle}x"
            )
            foreign = QueueMessage("body", "id", "r")
            for messages, warnings in (
                ([foreign], []),
                ([stale, foreign], ["1 of 1: the message is no longer in flight"]),
                ([foreign, known], []),
            ):
                receipts = {m: m.receipt_handle for m in messages}
                taskhawk._change_all("delete", receipts, "%d of %d: %s")
                found = [
                    record.getMessage().partition(",")[0] for record in caplog.records
                ]
                assert found == warnings
                caplog.clear()
            assert broker.depth("Q") == Depth(0, 0, 0)

    def test_sizes(self):
        """A batch call has ten messages and max_bytes at most, or one that is too large."""
        entries = [Outgoing("x" * size, {}) for size in (4, 4, 4, 11, 1, *[1] * 11)]
        sizes = []

        def call(batch: Sequence[Outgoing]) -> list[taskhawk.Refusal]:
            sizes.append([entry.size() for entry in batch])
            return []

        assert taskhawk._in_batches(call, entries, max_bytes=10) == {}
        assert taskhawk._in_batches(call, [], 3) == {}
        assert sizes == [[4, 4], [4], [11], [1] * 10, [1, 1]]

    @pytest.mark.parametrize(
        ("answers", "pauses_s", "code"),
        [
            ([""], [], None),
            (["a", ""], [0.09], None),
            (["A"], [], "C"),
            (["a", "a", "a"], [0.09, 0.3], "C"),
        ],
    )
    def test_message_insists(self, pauses, answers, pauses_s, code):
        """A message that acts at once tries again where the service is at fault."""
        broker, told = taskhawk.SqliteBroker("sqlite://"), iter(answers)

        def delete(queue: str, receipts: Sequence[str], *, retry: bool) -> Any:
            assert (queue, receipts, retry) == ("Q", ["r"], True)
            return [taskhawk.Refusal(0, "C", "", c.isupper()) for c in next(told)]

        broker.delete = delete
        message = QueueMessage("body", "id", "r", queue="Q", broker=broker)
        with contextlib.closing(broker), contextlib.ExitStack() as stack:
            if code:
                stack.enter_context(pytest.raises(taskhawk.PartialFailure, match=code))
            message.delete()
        assert next(told, None) is None
        assert pauses == pauses_s


# --- 8. SQLite ------------------------------------------------------------------------


@contextlib.contextmanager
def python_child(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """Run code in a new interpreter for the length of the block, with pipes to it."""
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


# How the programs here begin. The hook hands out the connection that a SqliteBroker
# makes, which is nobody else's business.
SQLITE_PROGRAM = """
import os, signal, sqlite3, sys, threading, time, taskhawk
from taskhawk import Outgoing
connections, url = [], sys.argv[1]
def hook(event, args):
    if event == 'sqlite3.connect/handle':
        connections.append(args[0])
sys.addaudithook(hook)
broker = taskhawk.SqliteBroker(url)
def go_when_told():
    print('ready', flush=True)
    sys.stdin.readline()
def receive(limit, queue='Q'):
    return broker.receive(queue, limit, 0, 600, threading.Event())
"""


def sqlite_program(code: str, url: str, *args: str) -> str:
    """Run a program on a SQLite file, and return what it prints; nothing may go wrong."""
    result = run_python(["-c", SQLITE_PROGRAM + code, url, *args], timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@contextlib.contextmanager
def sqlite_children(
    code: str, url: str, *arguments: Sequence[object]
) -> Iterator[list[subprocess.Popen[str]]]:
    """Run programs that begin with go_when_told(), and tell all at the same moment."""
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(python_child(SQLITE_PROGRAM + code, url, *given))
            for given in arguments
        ]
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            print(file=child.stdin, flush=True)
        yield children


def sqlite_execute(path: Path, statement: str) -> list[Any]:
    """Execute a statement as somebody else who has opened the file."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(statement).fetchall()


class TestSqlite:
    """The embedded broker, where it is more than the contract: files and crashes."""

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

    @pytest.mark.parametrize("is_ours", [True, False])
    def test_dropped(self, tmp_path, is_ours):
        """A file that nobody uses any more is closed, but for one of a parent process."""
        file = taskhawk._SqliteFile(f"{tmp_path}/queue.db")
        file.open()
        connection = file._connection()
        if not is_ours:
            file.pid = os.getppid()
        del file
        with contextlib.closing(connection):
            is_open = True
            try:
                connection.execute("SELECT 1")
            except sqlite3.ProgrammingError:
                is_open = False
        assert is_open is not is_ours

    @pytest.fixture
    def broker(self, url, clock):
        """Yield a broker with that clock."""
        with contextlib.closing(taskhawk.SqliteBroker(url, clock)) as broker:
            yield broker

    def test_every_commit_is_on_the_disk(self, url):
        """Transactions wait for the disk; a statement waits 30 s for a locked file."""
        code = """
for name in 'journal_mode', 'synchronous', 'user_version', 'busy_timeout':
    print(connections[-1].execute(f'PRAGMA {name}').fetchone()[0])
"""
        assert sqlite_program(code, url).split() == ["wal", "2", "1", "30000"]

    def test_memory_is_gone_with_its_broker(self):
        """A broker in memory is its own, and empty each time."""
        for _ in range(2):
            with contextlib.closing(taskhawk.SqliteBroker("sqlite://")) as broker:
                assert broker.send("Q", numbered(1)) == []
                assert broker.depth("Q") == Depth(1, 0, 0)

    def test_queues_need_not_be_made(self, broker):
        """An unknown queue is an empty one, and queues are apart."""
        broker.send("A", numbered(1))
        assert broker.receive("B", 1, 0, None, NEVER) == []
        assert (broker.depth("B"), broker.depth("A")) == (Depth(0, 0, 0), (1, 0, 0))

    def test_destination(self, url):
        """Queues are named as on SQS; TASKHAWK_QUEUE may be left out."""
        suffixes = ["", "-HIGH-PRIORITY", "-LOW-PRIORITY", "-BULK"]
        for settings, name in (({}, "DEFAULT"), ({"TASKHAWK_QUEUE": "dev-x"}, "DEV-X")):
            taskhawk.configure(TASKHAWK_BROKER=url, **settings)
            broker = taskhawk._brokers.broker()
            found = [broker.destination(priority) for priority in Priority]
            assert found == [f"TASKHAWK-{name}{suffix}" for suffix in suffixes]
        taskhawk.configure(TASKHAWK_BROKER="sqs")
        with pytest.raises(
            taskhawk.ConfigurationError, match="TASKHAWK_QUEUE is not set"
        ):
            taskhawk._brokers.broker().destination(Priority.default)

    @pytest.mark.parametrize(
        ("query", "lease_s", "limit"),
        [
            ("", 30.0, 5),
            ("?visibility_timeout_s=1.5&max_receive_count=3", 1.5, 3),
            ("?max_receive_count=1", 30.0, 1),
        ],
    )
    def test_options(self, path, clock, query, lease_s, limit):
        """The URL may set the visibility timeout, and the receives of a message."""
        with contextlib.closing(
            taskhawk.SqliteBroker(f"sqlite:///{path}{query}", clock)
        ) as b:
            assert b.info("Q") == taskhawk.QueueInfo(lease_s, "Q-DLQ", limit)
            assert b.info("Q-DLQ") == taskhawk.QueueInfo(lease_s, None, None)
            b.send("Q", numbered(1))
            (message,) = b.receive("Q", 1, 0, None, NEVER)
            assert message.max_receive_count == limit
            assert message.is_last_receive is (limit == 1)
            clock.now += lease_s - 0.001
            assert b.receive("Q", 1, 0, None, NEVER) == []
            clock.now += 0.001
            assert len(b.receive("Q", 1, 0, None, NEVER)) == (limit > 1)
            assert sum(b.depth("Q-DLQ")) == (limit == 1)

    @pytest.mark.parametrize(
        ("url", "reason"),
        [
            ("sqlite://host/queue.db", ""),
            ("sqlite://queue.db", ""),
            ("sqlite://[q", ""),
            ("sqlite:///q.db\n", ""),
            ("sqlite:///q.db?timeout=3", "'timeout' is not an option: "),
            ("sqlite:///q.db?max_receive_count=2&&=", "'' is not an option: "),
            ("sqlite:///q.db?visibility_timeout_s=0", ("visibility_timeout_s", "'0'")),
            ("sqlite:///q.db?visibility_timeout_s", ("visibility_timeout_s", "''")),
            (
                "sqlite:///q.db?visibility_timeout_s=nan",
                ("visibility_timeout_s", "'nan'"),
            ),
            ("sqlite:///q.db?max_receive_count=2.5", ("max_receive_count", "'2.5'")),
            ("sqlite:///q.db?max_receive_count=0", ("max_receive_count", "'0'")),
        ],
    )
    def test_url_errors(self, url, reason, tmp_path, monkeypatch):
        """A URL that is not understood is refused, and says why; no file is made."""
        monkeypatch.chdir(tmp_path)
        if isinstance(reason, tuple):
            name, value = reason
            rule = {"v": "a number of seconds above 0", "m": "a whole number above 0"}
            text = f"{name}: expected {rule[name[0]]}, got {value} in {url!r}"
        else:
            text = (
                f"{reason}expected sqlite:///relative.db or sqlite:////absolute.db, then"
                f" perhaps ?visibility_timeout_s=30&max_receive_count=5, got {url!r}"
            )
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.SqliteBroker(url)
        assert str(caught.value) == f"TASKHAWK_BROKER: {text}"
        assert list(tmp_path.iterdir()) == []

    def test_paths(self, tmp_path, monkeypatch):
        """Three slashes begin a relative path, four an absolute one; spaces are spaces."""
        monkeypatch.chdir(tmp_path)
        taskhawk.SqliteBroker("sqlite:///a b.db").close()
        taskhawk.SqliteBroker(f"sqlite:///{tmp_path}/c.db").close()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a b.db", "c.db"]

    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (lambda path: path.parent.rmdir(), "unable to open database file"),
            (
                lambda path: path.write_text("no database" * 200),
                "file is not a database",
            ),
            (
                lambda path: sqlite_execute(path, "PRAGMA user_version = 7"),
                "expected version 1 of its tables, got 7",
            ),
        ],
        ids=["no directory", "no database", "another version"],
    )
    def test_unusable_file(self, tmp_path, make, reason):
        """A file that can't be used is refused at once, by name, and left as it is."""
        path = tmp_path / "sub" / "queue.db"
        path.parent.mkdir()
        make(path)
        before = path.read_bytes() if path.exists() else None
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.SqliteBroker(f"sqlite:///{path}")
        assert str(caught.value) == f"TASKHAWK_BROKER: can't open {path}: {reason}"
        assert before == (path.read_bytes() if path.exists() else None)

    def test_full_disk_while_it_opens(self, path):
        """A file that can't be written is refused at once, by name."""
        code = """
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
try:
    taskhawk.SqliteBroker(f'sqlite:///{sys.argv[2]}')
except taskhawk.ConfigurationError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
"""
        expected = f"TASKHAWK_BROKER: can't open {path}: disk I/O error\n"
        assert sqlite_program(code, "sqlite://", str(path)) == expected

    def test_locked_while_it_opens(self, path, url, monkeypatch):
        """A file that another process is just making is waited for, but not for ever."""
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        with contextlib.closing(other):
            other.execute("BEGIN IMMEDIATE")
            monkeypatch.setattr(taskhawk, "_LOCKED_S", 0.1)
            with pytest.raises(taskhawk.ConfigurationError) as caught:
                taskhawk.SqliteBroker(url)
            reason = f"can't open {path}: database is locked"
            assert str(caught.value) == f"TASKHAWK_BROKER: {reason}"
            monkeypatch.undo()
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
        monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 30, 0))
        taskhawk.SqliteBroker(url).close()

    def test_clock(self, broker, clock):
        """Delays of any length and timeouts are counted on the clock that is passed in."""
        year = 365 * 86_400
        broker.send("Q", [Outgoing("late", {}, 10 * year)])
        clock.now += 10 * year - 0.001
        assert broker.receive("Q", 1, 0, None, NEVER) == []
        assert broker.depth("Q") == Depth(0, 0, 1)
        clock.now += 0.001
        (message,) = broker.receive("Q", 1, 0, 100, NEVER)
        assert int(message.attributes["SentTimestamp"]) == 1_700_000_000_000
        assert broker.change_visibility("Q", [(message.receipt_handle, 5)]) == []
        clock.now += 5
        assert drain(broker, "Q") == ["late"]

    def test_clock_set_back(self, broker, clock):
        """What is visible when the clock is set back stays visible, in its order."""
        broker.send("Q", numbered(2))
        (leased,) = broker.receive("Q", 1, 0, None, NEVER)
        broker.send("Q", [Outgoing("delayed", {}, 10)])
        clock.now += 30
        broker.send("Q", [Outgoing("new", {})])
        (first,) = broker.receive("Q", 1, 0, None, NEVER)
        assert first.body == "1"  # now the others have been seen, too
        clock.now -= 3600
        assert broker.depth("Q") == Depth(3, 1, 0)
        assert broker.delete("Q", [leased.receipt_handle]) == []
        assert drain(broker, "Q") == ["delayed", "new"]

    def test_first_come_first_served(self, broker):
        """What became visible first is received first."""
        for number in range(3):
            broker.send("Q", numbered(4, number * 4))
        assert drain(broker, "Q") == [str(number) for number in range(12)]

    def test_redrive(self, broker, clock):
        """A message moves when it would be received once too often, and no further."""
        broker.send("Q", numbered(1))
        for attempt in (1, 2):
            (message,) = broker.receive("Q", 1, 0, None, NEVER)
            assert message.attempt == attempt
            clock.now += 30
        assert broker.depth("Q-DLQ") == Depth(0, 0, 0)
        assert broker.receive("Q", 1, 0, None, NEVER) == []
        stale = message.receipt_handle
        for attempt in (1, 2, 3, 4):
            (message,) = broker.receive("Q-DLQ", 1, 0, None, NEVER)
            assert (message.attempt, message.max_receive_count) == (attempt, None)
            clock.now += 30
        assert broker.delete("Q", [stale]) != []
        assert broker.depth("Q-DLQ") == Depth(1, 0, 0)

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

    def test_waiting(self, broker):
        """A receive looks at once, then after pauses of up to 50 ms, until told to stop."""

        class Stop(list[float]):
            def wait(self, pause_s: float) -> bool:
                self.append(pause_s)
                return len(self) == 8

        stop = Stop()
        assert broker.receive("Q", 1, 20, None, stop) == []
        assert stop == [0.002, 0.004, 0.008, 0.016, 0.032, 0.05, 0.05, 0.05]
        broker.send("Q", numbered(1))
        assert len(broker.receive("Q", 1, 20, None, stop)) == 1
        assert len(stop) == 8

    @pytest.mark.slow
    def test_another_process_wakes_it(self, url):
        """A receive that waits has a message of another process within a second."""
        code = """
go_when_told()
time.sleep(0.3)
broker.send('Q', [Outgoing('x', {})])
print(time.monotonic())
"""
        with (
            contextlib.closing(taskhawk.SqliteBroker(url)) as broker,
            sqlite_children(code, url, ()) as (child,),
        ):
            assert len(broker.receive("Q", 1, 20, None, NEVER)) == 1
            assert time.monotonic() - float(child.stdout.readline()) < 1

    @pytest.mark.slow
    def test_eight_processes_open_a_new_file(self, path, url):
        """Any number of processes may make the file at the same moment."""
        code = """
go_when_told()
taskhawk.SqliteBroker(sys.argv[2]).send('Q', [Outgoing(sys.argv[3], {})])
"""
        arguments = [(url, number) for number in range(8)]
        with sqlite_children(code, "sqlite://", *arguments) as children:
            assert [child.wait(60) for child in children] == [0] * 8
        with contextlib.closing(taskhawk.SqliteBroker(url)) as broker:
            assert sorted(drain(broker, "Q")) == list("01234567")

    @pytest.mark.slow
    def test_processes_claim_apart(self, url):
        """Workers that receive at the same time never share a message, and miss none."""
        code = """
go_when_told()
while received := receive(3):
    print(*(message.body for message in received))
    refusals = broker.delete('Q', [message.receipt_handle for message in received])
    assert not refusals, refusals
"""
        with contextlib.closing(taskhawk.SqliteBroker(url)) as broker:
            for start in range(0, 300, 10):
                broker.send("Q", numbered(10, start))
            with sqlite_children(code, url, (), (), (), ()) as children:
                bodies = [
                    body
                    for c in children
                    for body in c.communicate(timeout=60)[0].split()
                ]
            assert [child.returncode for child in children] == [0] * 4
            assert sorted(map(int, bodies)) == list(range(300))
            assert broker.depth("Q") == Depth(0, 0, 0)

    @pytest.mark.slow
    def test_kill_while_sending(self, path, url):
        """A kill -9 loses nothing that was sent, and leaves no part of a batch."""
        code = """
import itertools
for start in itertools.count(0, 3):
    broker.send(sys.argv[2], [Outgoing(str(start + i), {}) for i in range(3)])
    print(start + 3, flush=True)
"""
        for lines in (1, 17, 40):
            queue = f"Q{lines}"
            with python_child(SQLITE_PROGRAM + code, url, queue) as child:
                sent = [child.stdout.readline() for _ in range(lines)]
                child.kill()
                sent += child.stdout.readlines()
            with contextlib.closing(taskhawk.SqliteBroker(url)) as broker:
                bodies = drain(broker, queue)
            assert bodies == [str(number) for number in range(len(bodies))]
            assert len(bodies) - int(sent[-1]) in (0, 3)
        assert sqlite_execute(path, "PRAGMA integrity_check") == [("ok",)]

    @pytest.mark.slow
    def test_kill_while_receiving(self, path):
        """A kill -9 loses nothing that was not deleted; nothing deleted comes back."""
        url = f"sqlite:///{path}?max_receive_count=100"
        code = """
while received := receive(2):
    broker.delete('Q', [message.receipt_handle for message in received])
    print(*(message.body for message in received), flush=True)
"""
        with contextlib.closing(taskhawk.SqliteBroker(url)) as broker:
            for start in range(0, 400, 10):
                broker.send("Q", numbered(10, start))
        done: list[str] = []
        for lines in (1, 17, 40):
            with python_child(SQLITE_PROGRAM + code, url) as child:
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

    def test_errors_are_raised_and_over(self, path, url):
        """A locked file and a full disk are errors of that call; the next one works."""
        code = """
def attempt(call, *args):
    try:
        print(bool(call(*args)))
    except sqlite3.OperationalError as error:
        print(error)
taskhawk.configure(TASKHAWK_BROKER=url)
@taskhawk.task(name='tests.f')
def f(x): pass
f.dispatch('first')
for connection in connections:
    connection.execute('PRAGMA busy_timeout = 50')
other = sqlite3.connect(sys.argv[2], isolation_level=None)
other.execute('BEGIN IMMEDIATE')
attempt(f.dispatch, 'locked')
attempt(receive, 1, 'TASKHAWK-DEFAULT')
other.execute('ROLLBACK')
attempt(receive, 1, 'TASKHAWK-DEFAULT')
pages = connections[1].execute('PRAGMA page_count').fetchone()[0]
connections[1].execute(f'PRAGMA max_page_count = {pages}')
attempt(f.dispatch, 'x' * 1_000_000)
connections[1].execute('PRAGMA max_page_count = 1000000')
attempt(f.dispatch, 'x' * 1_000_000)
print(*broker.depth('TASKHAWK-DEFAULT'))
"""
        assert sqlite_program(code, url, str(path)).splitlines() == [
            "database is locked",
            "database is locked",
            "True",
            "database or disk is full",
            "True",
            "1 1 0",
        ]

    def test_interrupted_while_it_waits(self, path, url):
        """Control-C while the file is locked leaves no lock behind."""
        code = """
other = sqlite3.connect(sys.argv[2], isolation_level=None, check_same_thread=False)
other.execute('BEGIN IMMEDIATE')
main = threading.get_ident()
def interrupt():
    before = here = None
    while before is None or here != before:  # until the main thread waits in SQLite
        time.sleep(0.05)
        frame = sys._current_frames()[main]
        ours = frame.f_code.co_filename == taskhawk.__file__
        before, here = here, (frame.f_code, frame.f_lasti) if ours else object()
    os.kill(os.getpid(), signal.SIGINT)
    other.execute('ROLLBACK')
signal.signal(signal.SIGINT, signal.default_int_handler)
thread = threading.Thread(target=interrupt)
thread.start()
try:
    broker.send('Q', [Outgoing('interrupted', {})])
except KeyboardInterrupt:
    print('interrupted')
thread.join()
other.execute('BEGIN IMMEDIATE')
other.execute('ROLLBACK')
broker.send('Q', [Outgoing('after', {})])
print(receive(10)[-1].body)
"""
        assert sqlite_program(code, url, str(path)) == "interrupted\nafter\n"

    @pytest.mark.parametrize("how", ["signal", "__del__"])
    def test_dispatch_in_the_midst(self, url, how):
        """A signal handler or a __del__ may dispatch at any moment, and nothing is lost."""
        code = """
import gc
how, count, own = sys.argv[2], 0, 0
taskhawk.configure(TASKHAWK_BROKER=url)
@taskhawk.task(name='tests.f')
def f(x): pass
def dispatch(*_):
    global count
    if count < 100:
        f.dispatch('midst')
        count += 1
class Garbage:
    def __init__(self):
        self.cycle = self
    __del__ = dispatch
signal.signal(signal.SIGALRM, dispatch)
while count < 100:
    if how == '__del__':
        Garbage()
        gc.set_threshold(own % 50 + 1)
    else:
        signal.setitimer(signal.ITIMER_REAL, 0.00001 * (own % 20 + 1))
    f.dispatch('own')
    own += 1
signal.signal(signal.SIGALRM, signal.SIG_IGN)
gc.set_threshold(0)
print(taskhawk._brokers.broker().depth('TASKHAWK-DEFAULT').visible - own - count)
"""
        assert sqlite_program(code, url, how) == "0\n"

    @pytest.mark.parametrize("successor", [True, False])
    @pytest.mark.parametrize(
        ("use", "sent"),
        [
            (lambda broker: broker.send("Q", numbered(1)), 1),
            (lambda broker: broker.receive("Q", 1, 0, None, NEVER), 0),
            (lambda broker: broker.depth("Q"), 0),
        ],
        ids=["send", "receive", "depth"],
    )
    def test_file_replaced(  # noqa: PLR0917 - fixtures
        self, path, url, broker, caplog, successor, use, sent
    ):
        """A file that is replaced or removed is noticed by what looks at it or sends."""
        broker.send("Q", numbered(1))
        (message,) = broker.receive("Q", 1, 0, None, NEVER)
        for file in path.parent.iterdir():
            file.rename(f"{file}.old")
        if successor:
            with contextlib.closing(taskhawk.SqliteBroker(url)) as other:
                other.send("Q", numbered(1))
        assert broker.delete("Q", [message.receipt_handle]) == []
        # A receipt is of the file that it was received from.
        assert caplog.records == []
        use(broker)
        with contextlib.closing(taskhawk.SqliteBroker(url)) as other:
            assert sum(other.depth("Q")) == successor + sent
        (record,) = caplog.records
        text = f"{path} was removed or replaced: opening it anew"
        assert (record.levelname, record.getMessage()) == ("WARNING", text)


# What a file had before there were groups, and how it was filled.
SQLITE_BEFORE_GROUPS = """BEGIN IMMEDIATE;
CREATE TABLE message (id INTEGER PRIMARY KEY AUTOINCREMENT,
    queue TEXT NOT NULL, message_id TEXT NOT NULL, body TEXT NOT NULL,
    attributes TEXT NOT NULL, sent_ms INTEGER NOT NULL, visible_ms INTEGER NOT NULL,
    receive_count INTEGER NOT NULL DEFAULT 0, receipt TEXT);
CREATE INDEX message_visible ON message (queue, visible_ms);
PRAGMA user_version = 1; COMMIT;"""
SQLITE_SEND_BEFORE_GROUPS = """INSERT INTO message
    (queue, message_id, body, attributes, sent_ms, visible_ms)
    VALUES ('Q', lower(hex(randomblob(16))), '{}', '{{}}', {now}, {visible})"""
# What is sent, as grouped() reads it, and in which order it is received.
SQLITE_TURNS = {
    "one tenant": ("a1 a2 a3", "a1 a2 a3"),
    "no group": ("-1 -2 -3", "-1 -2 -3"),
    "three tenants": ("a1 a2 a3 a4 b1 b2 c1", "a1 a2 b1 c1 a3 b2 a4"),
    "others have no group": ("a1 a2 a3 a4 -1 -2 b1", "a1 a2 -1 -2 b1 a3 a4"),
}
# The same in one call, where those without a group see the line as it was before.
SQLITE_TURNS_AT_ONCE = {"others have no group": "a1 -1 -2 a2 b1 a3 a4"}
SQLITE_STEPS = st.lists(
    st.tuples(
        st.sampled_from(("send", "receive", "delete", "retry", "wait")),
        st.integers(0, 3),
    ),
    max_size=60,
)


class TestSqliteGroups:
    """Groups take turns, and those of a FIFO queue keep their order, at a constant cost."""

    @pytest.fixture
    def broker(self):
        """Yield a broker in memory, whose clock stands."""
        url = "sqlite://?max_receive_count=3"
        with contextlib.closing(taskhawk.SqliteBroker(url, Clock())) as broker:
            yield broker

    @staticmethod
    def receive(broker: taskhawk.Broker, count: int = 1, queue: str = "Q") -> Any:
        """Receive what is visible, up to so many."""
        return broker.receive(queue, count, 0, 60, NEVER)

    @pytest.mark.parametrize("at_once", [1, 2, 10])
    @pytest.mark.parametrize("name", SQLITE_TURNS)
    def test_turns(self, broker, name, at_once):
        """A tenant with many messages does not make the others wait for all of them."""
        sent, expected = SQLITE_TURNS[name]
        if at_once == 10:
            expected = SQLITE_TURNS_AT_ONCE.get(name, expected)
        for start in range(0, 10, at_once):
            if entries := grouped(sent)[start : start + at_once]:
                broker.send("Q", entries)
        polls = iter(lambda: self.receive(broker), [])
        assert bodies_of(m for poll in polls for m in poll) == expected

    @pytest.mark.parametrize("others", ["b", "-", "bcdefghij"])
    def test_nobody_waits_for_ever(self, broker, others):
        """However much others send, a message is received after a few of each of them."""
        broker.send("Q", grouped("a1 a2 a3 a4"))
        found: list[str] = []
        for number in range(60):
            broker.send("Q", grouped(" ".join(f"{o}{number}" for o in others)))
            found += [message.body for message in self.receive(broker)]
        waited = [found.index(f"a{number}") for number in (1, 2, 3, 4)]
        assert waited[-1] <= 4 * (len(others) + 1)

    def test_retries_take_turns(self, broker):
        """What is visible again joins the end of its tenant's messages."""
        broker.send("Q", grouped("a1 a2 a3 a4 b1 b2"))
        first = self.receive(broker)
        broker.change_visibility("Q", [(m.receipt_handle, 0) for m in first])
        assert self.receive(broker, 0) == []
        polls = iter(lambda: self.receive(broker), [])
        assert bodies_of(m for poll in polls for m in poll) == "a2 b1 a3 b2 a4 a1"

    @pytest.mark.parametrize("queue", ["Q", "Q.fifo"])
    @pytest.mark.parametrize("words", ["a1 a2 a3 a4", "-1 -2 -3 -4", "a1 b1 c1 d1"])
    def test_cost(self, queue, words):
        """A send, a receive and a delete cost the same on 4,000 messages as on 40."""
        costs = []
        for rounds in (1, 100):
            with contextlib.closing(taskhawk.SqliteBroker("sqlite://")) as broker:
                for _ in range(rounds * 10):
                    broker.send(queue, grouped(words))
                steps = [0]

                def count(steps: list[int] = steps) -> int:
                    steps[0] += 1
                    return 0

                broker._file._connection().set_progress_handler(count, 1)
                broker.send(queue, grouped(words))
                found = self.receive(broker, 2, queue)
                broker.delete(queue, [m.receipt_handle for m in found])
                found = self.receive(broker, 2, queue)
                broker.change_visibility(queue, [(m.receipt_handle, 0) for m in found])
                self.receive(broker, 2, queue)
                costs.append(steps[0])
        assert costs[1] < 1.2 * costs[0]

    @given(steps=SQLITE_STEPS)
    def test_order(self, steps):
        """Whatever happens, a FIFO group's messages are received in order, one at a time."""
        clock, url = Clock(), "sqlite://?max_receive_count=3"
        with contextlib.closing(taskhawk.SqliteBroker(url, clock)) as broker:
            self.check_order(broker, clock, steps)

    def check_order(
        self, broker: taskhawk.Broker, clock: Clock, steps: Sequence[tuple[str, int]]
    ) -> None:
        """Take the steps, and compare what is received with lists."""
        queued: dict[str, list[str]] = {group: [] for group in "abcd"}
        held: dict[str, QueueMessage] = {}
        numbers = itertools.count()

        def take(messages: Sequence[QueueMessage]) -> None:
            for letter in self.receive(broker, 10, "Q-DLQ.fifo"):
                queued[letter.group_id].remove(letter.body)
                held.pop(letter.group_id, None)
            for message in messages:
                assert queued[message.group_id][0] == message.body
                held[message.group_id] = message

        for step, number in steps:
            group = "abcd"[number]
            if step == "send":
                names = [f"{group}{next(numbers)}" for _ in range(1 + number % 2)]
                queued[group] += names
                broker.send("Q.fifo", grouped(" ".join(names)))
            elif step == "receive":
                take(self.receive(broker, 1 + number, "Q.fifo"))
            elif step == "wait":
                clock.now += 25 * number
            elif group in held:
                receipt = held.pop(group).receipt_handle
                if step == "delete":
                    assert broker.delete("Q.fifo", [receipt]) == []
                    queued[group].pop(0)
                else:  # which is refused where its lease has ended
                    broker.change_visibility("Q.fifo", [(receipt, number)])
        for _ in range(1000):
            clock.now += 100
            messages = self.receive(broker, 10, "Q.fifo")
            take(messages)
            broker.delete("Q.fifo", [m.receipt_handle for m in messages])
            for message in messages:
                queued[message.group_id].pop(0)
            if not any(queued.values()):
                break
        assert not any(queued.values())
        assert broker.depth("Q.fifo") == Depth(0, 0, 0)

    def test_file_of_before(self, tmp_path):
        """A file that was made before there were groups is opened, and its messages come first.

        A process that still runs the older version may go on with it.
        """
        path, clock = tmp_path / "queue.db", Clock()
        now = int(clock.now * 1000)
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.executescript(SQLITE_BEFORE_GROUPS)
        send = SQLITE_SEND_BEFORE_GROUPS

        def send_as_before(body: str, visible: int = now - 10**15) -> None:
            with contextlib.closing(sqlite3.connect(path)) as db, db:
                db.execute(send.format(body, now=now, visible=visible))

        send_as_before("one")
        send_as_before("two")
        send_as_before("delayed", now + 1000)
        url = f"sqlite:///{path}"
        with contextlib.closing(taskhawk.SqliteBroker(url, clock)) as broker:
            broker.send("Q", grouped("a1 a2 b1"))
            send_as_before("three", now - 10**15 + 1)
            assert broker.depth("Q") == Depth(6, 0, 1)
            polls = iter(lambda: self.receive(broker), [])
            found = bodies_of(m for poll in polls for m in poll)
            assert found == "one two three a1 b1 a2"
            clock.now += 1
            assert bodies_of(self.receive(broker)) == "delayed"

    def test_processes_that_open_a_file_of_before(self, tmp_path):
        """Any number of processes may find that the file lacks groups at the same time."""
        path = tmp_path / "queue.db"
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.executescript(SQLITE_BEFORE_GROUPS)
        code = """
go_when_told()
broker = taskhawk.SqliteBroker(sys.argv[2])
print(broker.send('Q', [Outgoing(sys.argv[3], {}, 0, 'group')]))
"""
        url = f"sqlite:///{path}"
        arguments = [(url, str(number)) for number in range(4)]
        with sqlite_children(code, "sqlite://", *arguments) as children:
            assert [child.stdout.read() for child in children] == ["[]\n"] * 4
        with contextlib.closing(taskhawk.SqliteBroker(url)) as broker:
            found = [(m.body, m.group_id) for m in self.receive(broker, 10)]
        assert sorted(found) == [(str(number), "group") for number in range(4)]


# --- 9. SQS and SNS -------------------------------------------------------------------

NO_QUEUE = (
    "there is no such queue here: make it, or check TASKHAWK_QUEUE, AWS_REGION and the"
    " account"
)
NO_TOPIC = "there is no such topic: make it, or check TASKHAWK_QUEUE and AWS_ACCOUNT_ID"
NO_KEY = (
    "no AWS credentials: set AWS_ACCESS_KEY and AWS_SECRET_KEY, or give botocore a"
    " profile or role; to try things out without AWS, set TASKHAWK_BROKER to"
    " sqlite:///queue.db (NoCredentialsError: Unable to locate credentials)"
)
NO_REGION = (
    "no AWS region: set AWS_REGION, for example eu-west-1"
    " (NoRegionError: You must specify a region.)"
)
KMS_DENIED = (
    "access denied: the policies of these credentials and of the KMS key must allow"
    " kms:GenerateDataKey and kms:Decrypt"
)
KMS_OFF = "the KMS key can't be used: enable it, or encrypt with another one"
NO_SECRET = (
    "AWS refuses these credentials: check AWS_SECRET_KEY, or AWS_SECRET_ACCESS_KEY and"
    " the profile"
)
CLOCK_OFF = "the clock of this machine is off: set it"
BY_ENDPOINT = "access denied: the policy of the VPC endpoint does not allow {}"
BY_ORGANIZATION = "access denied: a policy of the AWS organization does not allow {}"
BECAUSE = "User: arn:aws:iam::1:user/u is not authorized to perform: {} because {}"
# AWS's code and text of what only a person can fix, and what to do about it.
AWS_MISTAKES = [
    ("AWS.SimpleQueueService.NonExistentQueue", "no queue", NO_QUEUE),
    ("com.amazonaws.sqs#QueueDoesNotExist", "no queue", NO_QUEUE),
    ("AccessDenied", "Access to the resource is denied.", DENIED),
    ("AccessDeniedException", BECAUSE.format("sqs:x", "no policy allows it"), DENIED),
    (
        "AccessDenied",
        BECAUSE.format("sqs:x", "no VPC endpoint policy allows the sqs:x action"),
        BY_ENDPOINT,
    ),
    (
        "AccessDenied",
        BECAUSE.format("sqs:x", "of an explicit deny in a service control policy"),
        BY_ORGANIZATION,
    ),
    (
        "AccessDeniedException",
        BECAUSE.format("kms:GenerateDataKey", "no resource-based policy allows it"),
        KMS_DENIED,
    ),
    ("KMS.AccessDeniedException", "The ciphertext…", KMS_DENIED),
    ("com.amazonaws.sqs#KmsAccessDenied", "The ciphertext…", KMS_DENIED),
    ("KMS.DisabledException", "key is\ndisabled", KMS_OFF),
    ("KMSInvalidState", "pending deletion", KMS_OFF),
    ("InvalidClientTokenId", "unknown", UNKNOWN_KEY),
    ("InvalidSecurity", "", UNKNOWN_KEY),
    ("UnrecognizedClientException", "unknown", UNKNOWN_KEY),
    ("SignatureDoesNotMatch", "The request signature…", NO_SECRET),
    (
        "SignatureDoesNotMatch",
        "Signature expired: 20260101T000000Z is now earlier than 20260101T001000Z",
        CLOCK_OFF,
    ),
    ("InvalidSignatureException", "Signature not yet current: 2026…", CLOCK_OFF),
]
# The environment and ~/.aws/config of what only a person can fix before a request is
# made, the remedy, and botocore's text.
LOCAL_MISTAKES = {
    "profile": (
        {"AWS_PROFILE": "nope"},
        "",
        "there is no such profile: check AWS_PROFILE and ~/.aws/config",
        "ProfileNotFound: The config profile (nope) could not be found",
    ),
    "SSO login": (
        {},
        (
            "sso_start_url = https://x\nsso_region = us-east-1\n"
            "sso_account_id = 1\nsso_role_name = r"
        ),
        "nobody is logged in: run aws sso login",
        "SSOTokenLoadError: Error loading SSO Token: Token for https://x does not exist",
    ),
    "web identity file": (
        {"AWS_WEB_IDENTITY_TOKEN_FILE": "/nonexistent/token", "AWS_ROLE_ARN": "arn:r"},
        "",
        (
            "a file that the credentials need can't be read: check"
            " AWS_WEB_IDENTITY_TOKEN_FILE and ~/.aws/config"
        ),
        "FileNotFoundError: [Errno 2] No such file or directory: '/nonexistent/token'",
    ),
    "process": (
        {},
        "credential_process = /bin/sh -c 'echo broken >&2; exit 3'",
        "the credential_process of the profile failed: check ~/.aws/config",
        (
            "CredentialRetrievalError: Error when retrieving credentials from"
            " custom-process: broken"
        ),
    ),
    "process without JSON": (
        {},
        "credential_process = /bin/echo hello",
        "the credential_process of the profile failed: check ~/.aws/config",
        "JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
    ),
    "role": (
        {},
        "role_arn = arn:aws:iam::1:role/r\nsource_profile = q",
        "botocore can't use its settings: check ~/.aws/config",
        (
            'InvalidConfigError: The source_profile "q" referenced in the profile "default"'
            " does not exist."
        ),
    ),
    "region": (
        {"AWS_DEFAULT_REGION": "us-east-1 "},
        "",
        "this is not the name of a region: set AWS_REGION, for example eu-west-1",
        (
            "InvalidRegionError: Provided region_name 'us-east-1 ' doesn't match a supported"
            " format."
        ),
    ),
    "endpoint": (
        {"AWS_ENDPOINT_URL_SQS": "localhost:4566"},
        "",
        (
            "an endpoint is a URL, such as http://127.0.0.1:4566: check AWS_ENDPOINT_SQS and"
            " AWS_ENDPOINT_SNS, or AWS_ENDPOINT_URL and the profile"
        ),
        "ValueError: Invalid endpoint: localhost:4566",
    ),
}
# Calls of a broker: the action, and how often it is tried.
SQS_CALLS = {
    "send": (lambda b: b.send("Q", numbered(1)), "SendMessage", 3),
    "receive": (lambda b: b.receive("Q", 1, 0, None, NEVER), "ReceiveMessage", 1),
    "delete": (lambda b: b.delete("Q", ["r"]), "DeleteMessageBatch", 1),
    "change": (
        lambda b: b.change_visibility("Q", [("r", 1)]),
        "ChangeMessageVisibilityBatch",
        1,
    ),
    "message.delete": (
        lambda b: QueueMessage("", "id", "r", queue="Q", broker=b).delete(),
        "DeleteMessageBatch",
        3,
    ),
    "message.change": (
        lambda b: QueueMessage("", "id", "r", queue="Q", broker=b).change_visibility(
            VisibilityTimeout=1
        ),
        "ChangeMessageVisibilityBatch",
        3,
    ),
    "extend_visibility_timeout": (
        lambda b: taskhawk.extend_visibility_timeout(Priority.default, "r", 1),
        "ChangeMessageVisibilityBatch",
        3,
    ),
}
UNANSWERED = ("Unanswered", "the answer does not name this entry", False)


def sqs_record(number: int, body: str, account: str) -> dict[str, Any]:
    """Return a record of an event that Lambda makes of an account's queue."""
    return {
        "messageId": f"m{number}",
        "receiptHandle": f"r{number}",
        "body": body,
        "attributes": {"ApproximateReceiveCount": "1"},
        "messageAttributes": {},
        "eventSource": "aws:sqs",
        "eventSourceARN": f"arn:aws:sqs:us-east-1:{account}:TASKHAWK-APP",
    }


class TestSqs:
    """Every request that is made to SQS, and what becomes of its answer."""

    @pytest.fixture
    def sqs(self, aws):
        """Yield a broker on a server that accepts everything."""
        with contextlib.closing(taskhawk.SqsBroker()) as broker:
            yield broker

    @pytest.fixture
    def aws_files(self, tmp_path, monkeypatch):
        """Let botocore read a folder's `config` and `credentials`; return the folder."""
        for name, file in (("CONFIG", "config"), ("SHARED_CREDENTIALS", "credentials")):
            monkeypatch.setenv(f"AWS_{name}_FILE", str(tmp_path / file))
        return tmp_path

    def test_one_request_per_dispatch(self, aws, task):
        """A dispatch is one request; the first to a queue looks up its URL, too."""
        for text in "abc":
            task.dispatch(text)
        task.with_priority(Priority.high).dispatch("d")
        task.with_priority(Priority.high).dispatch("e")
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

    def test_optional_arguments(self, aws, sqs):
        """Delay, attributes, group and deduplication id are sent where there are any."""
        everything = Outgoing("b", ATTRIBUTES, 0.2, "group", "once")
        sqs.send("Q", [Outgoing("a", {})])
        sqs.send("Q", [Outgoing("a", {}), everything])
        url = f"{aws.url}/000000000000/Q"
        assert aws.asked("SendMessage") == [{"QueueUrl": url, "MessageBody": "a"}]
        first, second = aws.calls[2].data["Entries"]
        assert first == {"Id": "0", "MessageBody": "a"}
        assert second == {
            "Id": "1",
            "MessageBody": "b",
            "MessageAttributes": ATTRIBUTES,
            "DelaySeconds": 1,
            "MessageGroupId": "group",
            "MessageDeduplicationId": "once",
        }

    def test_fifo(self, ministack, sqs_client, queue_name):
        """A FIFO queue's message has its group; a known id is not sent again."""
        client, name = sqs_client(ministack), f"{queue_name}.fifo"
        client.create_queue(QueueName=name, Attributes={"FifoQueue": "true"})
        configure_aws(ministack)
        with contextlib.closing(taskhawk.SqsBroker()) as broker:
            for body, once in (("a", "id"), ("b", "id"), ("c", "other")):
                broker.send(name, [Outgoing(body, {}, 0, "group", once)])
            found = broker.receive(name, 10, 1, None, NEVER)
        assert [(m.body, m.group_id) for m in found] == [("a", "group"), ("c", "group")]

    @pytest.mark.parametrize(
        ("wanted", "expected"),
        [
            ((1, 0, None), (1, 0, None)),
            ((50, 0.2, 1.5), (10, 1, 2)),
            ((3, 60, 0), (3, 20, 0)),
        ],
    )
    def test_receive(self, aws, sqs, wanted, expected):
        """A poll asks for ten messages and 20 s at most, in whole seconds."""
        assert sqs.receive("Q", *wanted, NEVER) == []
        data = aws.calls[1].data
        limits = (data["MaxNumberOfMessages"], data["WaitTimeSeconds"])
        assert (*limits, data.get("VisibilityTimeout")) == expected
        assert data["MessageSystemAttributeNames"] == [
            "ApproximateReceiveCount",
            "SentTimestamp",
            "ApproximateFirstReceiveTimestamp",
            "MessageGroupId",
        ]
        assert data["MessageAttributeNames"] == ["All"]

    def test_lost_answer(self, aws, sqs):
        """A receive from a FIFO queue whose answer was lost is repeated with its id.

        So SQS returns its messages again, which would hold up their groups until their
        visibility timeout ends.
        """
        aws.script("ReceiveMessage", DROPPED, fault("Throttled"), None, None)
        for _ in range(2):
            with pytest.raises(
                (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError)
            ):
                sqs.receive("Q.fifo", 1, 0, None, NEVER)
        for _ in range(2):
            assert sqs.receive("Q.fifo", 1, 0, None, NEVER) == []
        assert sqs.receive("Q", 1, 0, None, NEVER) == []
        polls = aws.asked("ReceiveMessage")
        first, second, third, fourth, fifth = (
            poll.get("ReceiveRequestAttemptId") for poll in polls
        )
        assert re.fullmatch(MESSAGE_ID, first)
        assert first == second == third != fourth
        assert fifth is None

    def test_receives_at_once(self, aws, sqs):
        """Receives from a FIFO queue that are under way together have ids of their own."""
        aws.always("ReceiveMessage", DROPPED)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            polls = [
                pool.submit(sqs.receive, "Q.fifo", 1, 0, None, NEVER) for _ in range(4)
            ]
            assert all(poll.exception() for poll in polls)
        repeated = len(aws.calls)
        aws.answers.clear()
        for _ in range(4):
            sqs.receive("Q.fifo", 1, 0, None, NEVER)
        ids = [poll["ReceiveRequestAttemptId"] for poll in aws.asked("ReceiveMessage")]
        assert set(ids[-4:]) >= set(ids[:-4])
        assert len(set(ids[-4:])) == 4
        assert len(aws.calls) == repeated + 4

    def test_too_large_for_a_fifo_queue(self, aws, sqs):
        """One by one, too, what follows a refused message of its group is not sent."""
        too_long = "AWS.SimpleQueueService.BatchRequestTooLong"
        aws.always("SendMessageBatch", fault(too_long))
        aws.script("SendMessage", fault("InvalidParameterValue"), None)
        refusals = sqs.send("Q.fifo", grouped("a1 b1 a2"))
        assert [(r.index, r.code, r.final) for r in refusals] == [
            (0, "InvalidParameterValue", True),
            (2, "GroupStopped", True),
        ]
        assert [each["MessageBody"] for each in aws.asked("SendMessage")] == [
            "a1",
            "b1",
        ]

    def test_whole_seconds(self, aws, sqs):
        """A fraction of a second is rounded up: a retry is never early."""
        assert sqs.change_visibility("Q", [("r", 0), ("s", 0.1)]) == []
        entries = aws.calls[1].data["Entries"]
        assert [entry["VisibilityTimeout"] for entry in entries] == [0, 1]

    def test_info_is_read_once(self, aws, sqs):
        """Attributes are read once; without a redrive policy, nothing is dead-lettered."""
        aws.always("GetQueueAttributes", {"Attributes": {"VisibilityTimeout": "45"}})
        for _ in range(2):
            assert sqs.info("Q") == taskhawk.QueueInfo(45.0, None, None)
        assert aws.actions == ["GetQueueUrl", "GetQueueAttributes"]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", SQS_CALLS)
    def test_attempts(self, aws, sqs, monkeypatch, name):
        """What people ask for is tried three times, what the worker repeats once."""
        call, action, attempts = SQS_CALLS[name]
        monkeypatch.setattr(time, "sleep", lambda _: None)  # botocore's pauses
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "7")
        monkeypatch.setenv("AWS_RETRY_MODE", "legacy")
        aws.always(action, fault("InternalError", status=500))
        with pytest.raises(botocore.exceptions.ClientError):
            call(sqs)
        assert aws.actions == ["GetQueueUrl", *[action] * attempts]

    @pytest.mark.parametrize(
        ("call", "action"),
        [
            (lambda b: b.send("Q", numbered(5)), "SendMessageBatch"),
            (lambda b: b.delete("Q", list("abcde")), "DeleteMessageBatch"),
            (
                lambda b: b.change_visibility("Q", [(r, 1) for r in "abcde"]),
                "ChangeMessageVisibilityBatch",
            ),
        ],
        ids=["send", "delete", "change_visibility"],
    )
    def test_partial_failure(self, aws, sqs, call, action):
        """An answer of 200 is read entry by entry; what it does not name has failed."""
        wrong = {"SenderFault": True, "Code": "InvalidThing", "Message": "why"}
        failed = [
            {"Id": "3", **wrong},
            {"Id": "1", "SenderFault": False, "Code": "InternalError"},
        ]
        successful = [{"Id": "2", "MessageId": "m"}]
        aws.always(action, {"Successful": successful, "Failed": failed})
        assert call(sqs) == [
            taskhawk.Refusal(0, *UNANSWERED),
            taskhawk.Refusal(1, "InternalError", "", final=False),
            taskhawk.Refusal(3, "InvalidThing", "why", final=True),
            taskhawk.Refusal(4, *UNANSWERED),
        ]

    def test_sum_too_long(self, aws, sqs):
        """A batch that SQS finds too long is sent one by one, in order."""
        code = "AWS.SimpleQueueService.BatchRequestTooLong"
        aws.always("SendMessageBatch", fault(code))
        aws.script("SendMessage", passed, fault("OverLimit"))
        (refusal,) = sqs.send("Q", numbered(3))
        sent = [request["MessageBody"] for request in aws.asked("SendMessage")]
        assert sent == ["0", "1", "2"]
        assert (refusal.index, refusal.code, refusal.final) == (1, "OverLimit", True)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("action", "mistake"),
        [
            ("GetQueueUrl", AWS_MISTAKES[0]),
            *(("SendMessage", mistake) for mistake in AWS_MISTAKES),
        ],
    )
    def test_mistakes(self, aws, task, action, mistake):
        """What only a person can fix is one sentence: the remedy, and AWS's own text."""
        code, text, remedy = mistake
        aws.always(action, fault(code, text, status=403))
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            task.dispatch("secret")
        assert isinstance(caught.value.__cause__, botocore.exceptions.ClientError)
        told = code.rpartition("#")[2].removeprefix("AWS.SimpleQueueService.")
        if text:
            told += f": {' '.join(text.split())}"
        assert str(caught.value) == f"TASKHAWK-APP: {remedy.format(action)} ({told})"

    @pytest.mark.parametrize("name", LOCAL_MISTAKES)
    def test_local_mistakes(self, aws_files, monkeypatch, name):
        """So is what botocore finds wrong before it makes a request, each time."""
        environment, config, remedy, text = LOCAL_MISTAKES[name]
        (aws_files / "config").write_text(f"[default]\nregion = us-east-1\n{config}")
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        with contextlib.closing(taskhawk.SqsBroker()) as broker:
            for _ in range(2):
                with pytest.raises(taskhawk.ConfigurationError) as caught:
                    broker.depth("Q")
                assert str(caught.value) == f"Q: {remedy} ({text})"

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            ({"AWS_REGION": None}, NO_REGION),
            ({"AWS_ACCESS_KEY": None, "AWS_SECRET_KEY": None}, NO_KEY),
        ],
        ids=["region", "credentials"],
    )
    @pytest.mark.parametrize("is_lambda_app", [False, True])
    def test_missing(self, aws, task, values, reason, is_lambda_app):
        """Without a region or credentials, the sentence says where to set them."""
        configure_aws(aws.url, "app", **values, IS_LAMBDA_APP=is_lambda_app)
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            task.dispatch("x")
        where, _, text = str(caught.value).partition(": ")
        assert text == reason
        assert where.rpartition(":")[2].upper() == "TASKHAWK-APP"
        assert aws.calls == []

    def test_wrong_setting(self, aws, task):
        """A setting that is wrong is told by its own name, not by the queue's."""
        configure_aws(aws.url, "app", AWS_READ_TIMEOUT_S="soon")
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            task.dispatch("x")
        assert str(caught.value).startswith("AWS_READ_TIMEOUT_S in configure(): ")

    @pytest.mark.parametrize(
        ("url", "fixed"),
        [
            ("https://sqs.us-east-1a.amazonaws.com/", "us-east-1a"),
            ("https://sns.us-esat-1.amazonaws.com/", "us-esat-1"),
            ("https://sqs.us-east-1.amazonaws.com/", None),
            ("http://localhost:4566/", None),
        ],
    )
    def test_impossible_region(self, url, fixed):
        """A host without an address is a fault, unless its region is not one."""
        error = botocore.exceptions.EndpointConnectionError(endpoint_url=url, error="?")
        expected = type(error) if fixed is None else taskhawk.ConfigurationError
        with pytest.raises(expected) as caught, taskhawk._explained("Q"):
            raise error
        text = f'Could not connect to the endpoint URL: "{url}"'
        if fixed is not None:
            remedy = f"{fixed} is not a region: set AWS_REGION, for example eu-west-1"
            text = f"Q: {remedy} (EndpointConnectionError: {text})"
        assert str(caught.value) == text

    @pytest.mark.slow
    def test_unsendable_header(self, aws, task, aws_files):
        """A secret that no header can hold is in no error, nor in its traceback."""
        process = aws_files / "process.py"
        keys = {"Version": 1, "AccessKeyId": "k", "SecretAccessKey": "s"}
        token = {"SessionToken": "hunter2\r"}
        process.write_text(f"print({json.dumps({**keys, **token})!r})")
        config = f"[default]\ncredential_process = {sys.executable} {process}\n"
        (aws_files / "config").write_text(config)
        keyless = {"AWS_ACCESS_KEY": None, "AWS_SECRET_KEY": None}
        configure_aws(aws.url, "app", **keyless)
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            task.dispatch("x")
        assert str(caught.value) == (
            "TASKHAWK-APP: a credential has a line break or another control character:"
            " check AWS_SESSION_TOKEN and where else credentials come from"
            " (HTTPClientError: An HTTP Client raised an unhandled exception:"
            " Invalid header value…)"
        )
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))

    def test_headers_in_answer(self, aws, task):
        """Where AWS shows the headers that it got, the error does not."""
        text = "Check your key.\n\nThe Canonical String should be\n'x:hunter2"
        aws.always("SendMessage", fault("SignatureDoesNotMatch", text, status=403))
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            task.dispatch("x")
        told = "SignatureDoesNotMatch: Check your key. The Canonical String…"
        assert str(caught.value) == f"TASKHAWK-APP: {NO_SECRET} ({told})"
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))

    @pytest.mark.slow
    @pytest.mark.parametrize("fips", [False, True])
    def test_endpoints(self, monkeypatch, fips):
        """In each partition, with FIPS or without, endpoints are those of botocore."""
        monkeypatch.setenv("AWS_USE_FIPS_ENDPOINT", str(fips))
        plain = botocore.session.Session()
        regions = [
            region
            for partition in plain.get_available_partitions()
            for region in plain.get_available_regions("sqs", partition)
        ]
        special = ["us-iso-east-1", "us-isob-east-1", "eusc-de-east-1", "moon-1"]
        for region in {*regions[::20], "us-gov-west-1", "cn-north-1", *special}:
            taskhawk.configure(AWS_SETTINGS, AWS_REGION=region)
            for ours in (taskhawk.SqsBroker(), taskhawk.SnsSender()):
                keys = {**CREDENTIALS, "region_name": region}
                theirs = plain.create_client(ours.service, **keys).meta
                meta = ours.client("send").meta
                assert meta.endpoint_url == theirs.endpoint_url
                assert meta.partition == theirs.partition
                assert meta.service_model.metadata == theirs.service_model.metadata

    def test_keys_of_ours(self, aws, task):
        """Keys that are set, with their token, are used before any of botocore's."""
        keys = {"AWS_ACCESS_KEY": "OURS", "AWS_SECRET_KEY": "s"}
        keys |= {"AWS_SESSION_TOKEN": "token", "AWS_REGION": "eu-west-1"}
        taskhawk.configure(**keys, AWS_ENDPOINT_SQS=aws.url, TASKHAWK_QUEUE="app")
        task.dispatch("x")
        headers = aws.calls[-1].headers
        assert "Credential=OURS/" in headers["Authorization"]
        assert "/eu-west-1/sqs/aws4_request" in headers["Authorization"]
        assert headers["X-Amz-Security-Token"] == "token"

    def test_keys_of_botocore(self, aws, task, monkeypatch, aws_files):
        """Without keys of ours, botocore's chain has profile, region and endpoint."""
        keys = "aws_access_key_id = PROFILE\naws_secret_access_key = s\n"
        (aws_files / "credentials").write_text(f"[worker]\n{keys}")
        (aws_files / "config").write_text("[profile worker]\nregion = sa-east-1\n")
        monkeypatch.setenv("AWS_PROFILE", "worker")
        monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", aws.url)
        taskhawk.configure(TASKHAWK_QUEUE="app")
        task.dispatch("x")
        authorization = aws.calls[-1].headers["Authorization"]
        assert "Credential=PROFILE/" in authorization
        assert "/sa-east-1/sqs/aws4_request" in authorization

    def test_keys_that_come_later(self, aws, task, aws_files):
        """Credentials are looked for again where there were none, or they expired."""
        configure_aws(aws.url, "app", AWS_ACCESS_KEY=None, AWS_SECRET_KEY=None)
        with pytest.raises(taskhawk.ConfigurationError, match="no AWS credentials"):
            task.dispatch("x")
        aws.script("SendMessage", passed, fault("ExpiredToken", "it has expired", 403))
        for name in ("FIRST", "SECOND"):
            keys = f"aws_access_key_id = {name}\naws_secret_access_key = s\n"
            (aws_files / "credentials").write_text(f"[default]\n{keys}")
            task.dispatch("x")
            assert f"Credential={name}/" in aws.calls[-1].headers["Authorization"]
            if name == "FIRST":
                with pytest.raises(botocore.exceptions.ClientError, match="expired"):
                    task.dispatch("x")

    @pytest.mark.slow
    def test_read_timeout(self, aws, sqs):
        """An answer is given up after AWS_READ_TIMEOUT_S; a poll waits on."""
        configure_aws(aws.url, AWS_READ_TIMEOUT_S=0.2)
        released = threading.Event()
        aws.always("DeleteMessageBatch", late(aws.closing))
        aws.always("ReceiveMessage", late(released))
        start = time.monotonic()
        with pytest.raises(botocore.exceptions.ReadTimeoutError):
            sqs.delete("Q", ["r"])
        assert time.monotonic() - start < 1.9
        threading.Timer(0.6, released.set).start()
        assert sqs.receive("Q", 1, 1, None, NEVER) == []
        assert aws.actions == ["GetQueueUrl", "DeleteMessageBatch", "ReceiveMessage"]

    @pytest.mark.slow
    def test_connect_timeout(self):
        """A service that can't be reached is given up after AWS_CONNECT_TIMEOUT_S."""
        with contextlib.ExitStack() as stack:
            listener = socket.create_server(("127.0.0.1", 0), backlog=0)
            host, port = stack.enter_context(listener).getsockname()
            # With the backlog full, the kernel drops connections.
            for _ in range(4):
                client = stack.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex((host, port))
            configure_aws(f"http://{host}:{port}", AWS_CONNECT_TIMEOUT_S=0.2)
            broker = stack.enter_context(contextlib.closing(taskhawk.SqsBroker()))
            start = time.monotonic()
            with pytest.raises(botocore.exceptions.ConnectTimeoutError):
                broker.receive("Q", 1, 1, None, NEVER)
            assert time.monotonic() - start < 1.9

    @pytest.mark.parametrize("server", ["ministack", MOTO])
    def test_pinned_queue(self, request, server, task, sqs_client, queue_name):
        """A queue that takes less than SQS is known by its limit when it refuses."""
        endpoint = request.getfixturevalue(server)
        name = f"TASKHAWK-{queue_name}"
        make_queue(sqs_client(endpoint), name, MaximumMessageSize="1024")
        configure_aws(endpoint, queue_name)
        with pytest.raises(taskhawk.MessageTooLarge) as caught:
            task.dispatch("x" * 2000)
        message = Message.new("tests.f", ["x" * 2000])
        size = len(json.dumps(message.as_dict(), separators=(",", ":")))
        assert str(caught.value) == (
            f"tests.f: the message has {size} bytes (body and attributes), and the limit"
            " is 1024: the largest argument is args[0] with 2002 bytes"
        )
        assert caught.value.limit == 1024

    def test_queues_of_lambda(self, aws, task):
        """A Lambda's queue is in the account of the event, whatever else has its name."""
        good = json.dumps(Message.new("tests.f", [1]).as_dict())
        accounts = ("111111111111", "222222222222", "111111111111")
        for account in accounts:
            records = [sqs_record(0, good, account), sqs_record(1, "bad", account)]
            with pytest.raises(taskhawk.ValidationError):
                taskhawk.process_messages_for_lambda_consumer({"Records": records})
        task.dispatch("ours")
        deletes = ["DeleteMessageBatch"] * 3
        assert aws.actions == [*deletes, "GetQueueUrl", "SendMessage"]
        urls = [call.data.get("QueueUrl") for call in aws.calls]
        assert urls[:3] == [f"{aws.url}/{name}/TASKHAWK-APP" for name in accounts]
        assert urls[4] == f"{aws.url}/000000000000/TASKHAWK-APP"
        assert aws.calls[0].data["Entries"] == [{"Id": "0", "ReceiptHandle": "r0"}]


class TestSns:
    """What a Lambda app's publisher sends to topics."""

    @pytest.fixture
    def sns(self, scripted, queue_name):
        """Return the scripted ministack, set up for a Lambda app."""
        configure_aws(scripted.url, queue_name, IS_LAMBDA_APP=True)
        return scripted

    @pytest.fixture
    def received(self, sns, ministack, sqs_client, queue_name):
        """Subscribe a queue to the high-priority topic; return what empties it."""
        client = sqs_client(ministack, "sns")
        name = f"taskhawk-{queue_name.lower()}-high-priority"
        sqs_client(ministack).create_queue(QueueName=name)
        client.subscribe(
            TopicArn=client.create_topic(Name=name)["TopicArn"],
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
        """One dispatch is one request, and ten in a batch are; headers arrive, too."""
        high = task.with_priority(Priority.high).with_headers(request_id="é1")
        ids = [high.dispatch("a")]
        with taskhawk.batch():
            ids += [high.dispatch(number) for number in range(12)]
        assert sns.actions == ["Publish", "PublishBatch", "PublishBatch"]
        assert not any("MessageGroupId" in key for key in sns.calls[0].data)
        assert sns.batches == [1, 10, 2]
        messages = received()
        bodies = [json.loads(message.body) for message in messages]
        assert sorted(body["id"] for body in bodies) == sorted(ids)
        for body, message in zip(bodies, messages, strict=True):
            assert body["headers"] == {"request_id": "é1"}
            assert message.message_attributes["request_id"]["StringValue"] == "é1"

    def test_groups(self, aws, task):
        """A message's group goes along, for the fair queues that subscribe to the topic."""
        configure_aws(aws.url, "app", IS_LAMBDA_APP=True)
        invocation = task.with_group("tenant 7")
        invocation.dispatch("a")
        invocation.dispatch_many("bc")
        one, two = (call.data for call in aws.calls)
        group = taskhawk._group_id_of("tenant 7", "group")
        entries = "PublishBatchRequestEntries.member"
        found = [two[f"{entries}.{number}.MessageGroupId"] for number in (1, 2)]
        assert [one["MessageGroupId"], *found] == [group] * 3

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
                taskhawk.Refusal(3, *UNANSWERED),
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
        """Partition, region, account, queue and priority name a topic, not a request."""
        account = {"AWS_ACCOUNT_ID": 12345, "TASKHAWK_QUEUE": "DEV-myApp"}
        taskhawk.configure(AWS_SETTINGS, AWS_REGION=region, **account)
        with contextlib.closing(taskhawk.SnsSender()) as sender:
            names = [sender.destination(priority) for priority in Priority]
        topic = f"arn:{partition}:sns:{region}:000000012345:taskhawk-dev-myapp"
        suffixes = ["", "-high-priority", "-low-priority", "-bulk"]
        assert names == [f"{topic}{suffix}" for suffix in suffixes]

    @pytest.mark.parametrize(
        ("code", "status", "remedy"),
        [
            ("NotFound", 404, NO_TOPIC),
            ("AuthorizationError", 403, DENIED),
            ("InvalidClientTokenId", 403, UNKNOWN_KEY),
            ("KMSAccessDenied", 400, KMS_DENIED),
        ],
    )
    def test_mistakes(self, aws, task, code, status, remedy):
        """What only a person can fix is one sentence with its remedy."""
        configure_aws(aws.url, "app", IS_LAMBDA_APP=True)
        aws.always("Publish", fault(code, "why", status))
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            task.dispatch("x")
        topic = "arn:aws:sns:us-east-1:000000000000:taskhawk-app"
        text = f"{topic}: {remedy.format('Publish')} ({code}: why)"
        assert str(caught.value) == text


# --- 10. connections ------------------------------------------------------------------


def fork_in_c() -> int:
    """Fork as uWSGI does, so that Python does not see it.

    Nobody may wait for the GIL meanwhile: a child that is asked to give it up waits for
    ever for a thread that it does not have.
    """
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(60)
    time.sleep(0.05)  # those that wait give up their turn, and ask again in a minute
    try:
        return ctypes.PyDLL(None).fork()
    finally:
        sys.setswitchinterval(interval_s)


def forked(function: Callable[[], object], how: str = "os") -> Callable[[], int | None]:
    """Run a function in a forked child; return a function that waits for its exit code.

    :param how: "os", or "C" for a fork that Python does not see
    """
    fork = os.fork if how == "os" else fork_in_c
    if pid := fork():
        return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)  # a child that hangs ends with -SIGALRM
        function()
        os._exit(0)
    finally:
        os._exit(1)


def sent_texts(messages: Iterable[str]) -> list[Any]:
    """Return the first argument of each message, in order."""
    return sorted(json.loads(message)["args"][0] for message in messages)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
class TestProcesses:
    """Threads share one broker, and a forked child has its own."""

    @pytest.fixture
    def url(self, tmp_path):
        """Queue in a file, and return the broker's URL."""
        url = f"sqlite:///{tmp_path}/queue.db"
        taskhawk.configure(TASKHAWK_BROKER=url)
        return url

    def texts(self, queue: str = "TASKHAWK-DEFAULT") -> list[Any]:
        """Take all messages, and return their arguments."""
        return sent_texts(drain(taskhawk._brokers.broker(), queue))

    def test_made_once(self, url):
        """However many threads are the first to need a broker, there is one."""
        for broker_url in ("sqs", url):
            taskhawk.configure(AWS_SETTINGS, TASKHAWK_BROKER=broker_url)
            barrier = threading.Barrier(16)

            def first(barrier=barrier):
                barrier.wait(20)
                return taskhawk._brokers.broker()

            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                found = [pool.submit(first) for _ in range(16)]
                assert len({id(future.result()) for future in found}) == 1
            assert taskhawk._brokers.sender() is taskhawk._brokers.broker()

    def test_sender(self, url):
        """A Lambda app publishes to SNS, but on SQLite to its queues."""
        taskhawk.configure(AWS_SETTINGS, IS_LAMBDA_APP=True)
        assert isinstance(taskhawk._brokers.sender(), taskhawk.SnsSender)
        assert isinstance(taskhawk._brokers.broker(), taskhawk.SqsBroker)
        taskhawk.configure(IS_LAMBDA_APP=True, TASKHAWK_BROKER=url)
        assert isinstance(taskhawk._brokers.sender(), taskhawk.SqliteBroker)
        with taskhawk.capture():
            assert taskhawk._brokers.sender() is not taskhawk._brokers.broker()
        taskhawk.configure(TASKHAWK_SYNC=True)
        assert taskhawk._brokers.sender() is not taskhawk._brokers.broker()

    def test_cut_off(self, url, monkeypatch):
        """A copy of the module without the part that a broker is in says so."""
        monkeypatch.delitem(taskhawk._schemes, "sqlite")
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk._brokers.broker()
        assert str(caught.value) == (
            "'sqlite' is not in this copy of taskhawk: vendor more of its parts"
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("is_first", [True, False])
    def test_threads_dispatch(self, aws, task, is_first):
        """Threads share a client: no dispatch is lost or mixed up."""
        if not is_first:
            task.dispatch(-1)
        barrier = threading.Barrier(16)

        def dispatch(number):
            barrier.wait(20)
            return [task.dispatch(number + i) for i in range(5)]

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            ids = itertools.chain(*pool.map(dispatch, range(0, 80, 5)))
        assert len(set(ids)) == 80
        requests = aws.asked("SendMessage") + [
            entry for each in aws.asked("SendMessageBatch") for entry in each["Entries"]
        ]
        sent = [request["MessageBody"] for request in requests]
        assert sent_texts(sent) == [*([] if is_first else [-1]), *range(80)]
        assert len(aws.asked("GetQueueUrl")) == 1

    def test_threads_dispatch_to_sqlite(self, task, url):
        """Threads share a connection, and none is lost."""
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(task.dispatch, range(80)))
        assert self.texts() == list(range(80))

    def test_configure_closes_connections(self, aws, task):
        """configure() closes the connections to SQS; the next dispatch makes new ones."""
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
    def test_configure_closes_files(self, task, url):
        """configure() closes the database, and the next dispatch opens it anew."""

        def is_open():
            files = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
            return url.removeprefix("sqlite:///") in files

        assert not is_open()
        for number in (1, 2):
            task.dispatch(number)
            assert is_open()
            taskhawk.configure(TASKHAWK_BROKER=url)
            assert not is_open()
        assert self.texts() == [1, 2]

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["sqlite", "sqs"])
    def test_configure_in_a_task(self, request, kind):
        """A worker whose task calls configure() goes on with new connections."""
        request.getfixturevalue("url" if kind == "sqlite" else "scripted")
        given = dict(taskhawk.settings.given)

        @taskhawk.task(name="tests.configure")
        def configure() -> None:
            taskhawk.configure(given)

        for _ in range(3):
            configure.dispatch()
        stop = threading.Event()
        alarm = threading.Timer(20, stop.set)
        alarm.start()
        ledger = taskhawk.listen_for_messages(
            Priority.default, until_empty=True, shutdown_event=stop
        )
        alarm.cancel()
        assert (ledger.acked, stop.is_set()) == (3, False)

    @pytest.mark.parametrize("how", ["os", "C"])
    def test_fork_on_sqs(self, aws, task, how):
        """A forked child dispatches over its own connections while its parent goes on."""
        task.dispatch("parent")
        ours = {call.port for call in aws.calls}
        wait = forked(lambda: [task.dispatch("child") for _ in range(5)], how)
        for _ in range(5):
            task.dispatch("parent")
        assert wait() == 0
        sent = [call for call in aws.calls if call.action == "SendMessage"]
        ports = {"parent": [], "child": []}
        for call in sent:
            ports[json.loads(call.data["MessageBody"])["args"][0]].append(call.port)
        assert (len(ports["parent"]), len(ports["child"])) == (6, 5)
        assert set(ports["parent"]) <= ours
        assert not ours & set(ports["child"])

    @pytest.mark.slow
    @pytest.mark.parametrize("how", ["os", "C"])
    def test_fork_on_sqlite(self, task, url, how):
        """What a forked child dispatches is kept, whichever closes the file first."""

        def connections():
            found = gc.get_objects()
            return sum(isinstance(each, sqlite3.Connection) for each in found)

        task.dispatch("parent before")
        gc.collect()
        ours = connections()
        fork_context = multiprocessing.get_context("fork")
        dispatched, closed = fork_context.Event(), fork_context.Event()

        def child():
            task.dispatch("child 1")
            # It has its own, and leaves an inherited one alone: SQLite forbids a close.
            assert connections() == ours + (how == "C")
            dispatched.set()
            assert closed.wait(20)
            assert forked(lambda: task.dispatch("child 2"))() == 0

        wait = forked(child, how)
        task.dispatch("parent after")
        assert dispatched.wait(20)
        if how == "os":  # a child that inherits the open file may not outlive this
            taskhawk.configure(TASKHAWK_BROKER=url)
        closed.set()
        assert wait() == 0
        texts = ["child 1", "child 2", "parent after", "parent before"]
        assert self.texts() == texts

    @pytest.mark.parametrize("how", ["os", "C"])
    @pytest.mark.parametrize("kind", ["sqlite", "sqs"])
    def test_fork_uses_its_message(self, request, kind, how):
        """A process that a task forks may use the task's message, on its own socket."""
        if kind == "sqlite":
            request.getfixturevalue("url")
        else:
            scripted = request.getfixturevalue("scripted")
        codes = []

        @taskhawk.task(name="tests.fork")
        def fork(metadata: taskhawk.Metadata) -> None:
            metadata.extend_visibility_timeout(60)
            codes.append(forked(lambda: metadata.extend_visibility_timeout(60), how)())

        fork.dispatch()
        taskhawk.listen_for_messages(Priority.default, loop_count=1)
        assert codes == [0]
        if kind == "sqs":
            ours, child = [
                call.port
                for call in scripted.calls
                if call.action == "ChangeMessageVisibilityBatch"
            ]
            assert ours != child

    def test_fork_while_threads_dispatch(self, task, url):
        """A fork amid other threads' transactions harms neither child nor parent."""
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

    def test_fork_while_a_thread_adds_to_its_batch(self, task, url):
        """A fork waits for what a thread adds, lest the child find a lock held."""
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
        """A relative path is relative to where it was first used."""
        monkeypatch.chdir(tmp_path)
        taskhawk.configure(TASKHAWK_BROKER="sqlite:///queue.db")
        task.dispatch("before")
        (tmp_path / "elsewhere").mkdir()
        os.chdir("elsewhere")
        assert forked(lambda: task.dispatch("child"))() == 0
        task.dispatch("after")
        assert self.texts() == ["after", "before", "child"]
        assert os.listdir() == []

    def test_odd_directory(self, task, tmp_path, monkeypatch):
        """A directory that no URL can name is no trouble to a relative path."""
        (tmp_path / "odd?").mkdir()
        monkeypatch.chdir(tmp_path / "odd?")
        taskhawk.configure(TASKHAWK_BROKER="sqlite:///queue.db")
        task.dispatch(1)
        assert os.listdir(tmp_path / "odd?") != []

    def test_fork_without_the_file(self, task, tmp_path):
        """A file that can't be opened after a fork is an error until it can be."""
        queues, away = tmp_path / "queues", tmp_path / "away"
        taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{queues}/queue.db")
        queues.mkdir()
        task.dispatch("before")
        queues.rename(away)
        assert forked(lambda: None)() == 0
        with pytest.raises(taskhawk.ConfigurationError, match="unable to open"):
            task.dispatch("meanwhile")
        away.rename(queues)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(task.dispatch, "after").result(20)
        assert self.texts() == ["after", "before"]
        queues.rename(away)
        assert forked(lambda: None)() == 0
        taskhawk._brokers.close()  # there is nothing to close

    @pytest.mark.parametrize("how", ["os", "C"])
    def test_fork_with_memory(self, task, memory, how):
        """Memory is of one process: a forked child is refused, and the parent goes on."""
        task.dispatch(1)
        read, write = os.pipe()

        def child():
            try:
                task.dispatch(2)
            except taskhawk.ConfigurationError as error:
                os.write(write, str(error).encode())

        assert forked(child, how)() == 0
        os.close(write)
        assert os.read(read, 1000).decode() == (
            "sqlite:// is the memory of one process, and this is another: use a file,"
            " such as sqlite:///queue.db"
        )
        os.close(read)
        task.dispatch(3)
        assert self.texts() == [1, 3]


# === PART III: TASKS ==================================================================


# --- 11. tasks ------------------------------------------------------------------------


def place(fn: Any) -> str:
    """Return what errors say of where a function is."""
    code = fn.__code__
    where = f"{code.co_filename}:{code.co_firstlineno}"
    return f"{fn.__module__}.{fn.__qualname__} ({where})"


def run_queued(priority: Priority = Priority.default) -> taskhawk.Outcome:
    """Run the one message that is in the queue of a priority."""
    [received] = receive_all(priority)
    return taskhawk.process(received)


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

    def dispatch(self, *args, **kwargs):
        """Note the dispatch, and go on."""
        self.runs.append("dispatch")
        return super().dispatch(*args, **kwargs)


def generates():
    """Yield, as no task does."""
    yield


async def generates_async():
    """Yield, as no task does."""
    yield


def many(what, *more):
    """Take any arguments, as no task does."""


A_METHOD = (
    "is a method: expected a function, which a message can call without an object"
)
A_LAMBDA = "is a lambda: expected a function with a name (def)"
A_GENERATOR = "is a generator: expected a function that runs when it is called"
RETRY_WANTED = "a function of the attempt, such as taskhawk.fixed(60, max_retries=3)"
NO_FUNCTION = "can't be called: expected a function"
NO_PARAMETERS = "does not tell its parameters: expected a function written in Python"
NO_NAME = "has no name: pass name= to taskhawk.task"
STARRED = "*args can't be a task's parameter: name the arguments, or take a list"
PARTIAL = functools.partial(plain)
SHOP = Shop()
TASK = taskhawk.Task(plain, Priority.low, "x")
NO_TASKS: list[tuple[Any, dict[str, Any], str]] = [
    (Shop.method, {}, f"Shop.method {A_METHOD}"),
    (SHOP.method, {"name": "x"}, f"Shop.method {A_METHOD}"),
    (Shop.class_method, {}, f"Shop.class_method {A_METHOD}"),
    (lambda: None, {"name": "x"}, f"<lambda> {A_LAMBDA}"),
    (generates, {}, f"generates {A_GENERATOR}"),
    (generates_async, {}, f"generates_async {A_GENERATOR}"),
    (None, {}, f"None {NO_FUNCTION}"),
    (5, {"name": "x"}, f"5 {NO_FUNCTION}"),
    ("x.y", {}, "'x.y' is no function: pass a name as name="),
    (
        Priority.high,
        {},
        f"{Priority.high!r} is no function: pass a priority as priority=",
    ),
    (classmethod(plain), {}, f"plain {NO_FUNCTION}"),
    (TASK, {}, "plain is a task already: decorate it once"),
    (many, {"name": "x"}, f"x: {STARRED}"),
    (dict, {"name": "x"}, f"x {NO_PARAMETERS}"),
    (dict.update, {"name": "x"}, f"dict.update {NO_PARAMETERS}"),
    (PARTIAL, {}, f"{PARTIAL!r} {NO_NAME}"),
    (SHOP, {}, f"{SHOP!r} {NO_NAME}"),
]
WRONG_OPTIONS = [
    ("name", 5, "a string"),
    ("priority", "high", "a taskhawk.Priority"),
    ("priority", 2, "a taskhawk.Priority"),
    ("retry", 5, RETRY_WANTED),
    ("retry", 0, RETRY_WANTED),
    ("retry_on", [ValueError], "exceptions"),
    ("retry_on", ("ValueError",), "exceptions"),
    ("never_retry_on", 5, "exceptions"),
    ("never_retry_on", (ValueError, int), "exceptions"),
    ("time_limit", "5", "a number of seconds above 0"),
    ("time_limit", True, "a number of seconds above 0"),
    ("time_limit", 0, "a number of seconds above 0"),
    ("time_limit", math.inf, "a number of seconds above 0"),
]
NO_TASKS += [
    (plain, {"name": "x", name: value}, f"plain has {name}={value!r}: expected {rule}")
    for name, value, rule in WRONG_OPTIONS
]


class TestTasks:
    """A message can only run what is registered, under the name of its registration."""

    def test_looks_like_its_function(self):
        """A task is called as its function was, and looks like it."""

        def add(one: int, /, other: int = 1, *, self: int = 0) -> int:
            """Add numbers."""
            return one + other + self

        add.custom = "kept"
        task = taskhawk.task(add)
        for name in ("__name__", "__qualname__", "__doc__", "__module__", "custom"):
            assert getattr(task, name) == getattr(add, name)
        assert task.__wrapped__ is add
        for look in (inspect.signature, inspect.get_annotations):
            assert look(task) == look(add)
        assert (task(1), task(1, 2), task(1, other=3, self=4)) == (2, 3, 8)

    def test_annotations_for_checkers(self, memory):
        """Annotations that exist for type checkers only are never evaluated."""
        scope: dict[str, Any] = {}
        lazy = sys.version_info >= (3, 14)
        code = "" if lazy else "from __future__ import annotations\n"
        code += "def sell(what: Milk, metadata: Any) -> Bread: sold.append(what)\n"
        code += "def headers(task: Milk) -> Bread: return {'name': task.name}\n"
        exec(code, scope)
        scope["sold"] = sold = []
        scope["sell"].__qualname__ = "Shop.sell"  # one may be a method
        task = taskhawk.task(name="shop.sell")(scope["sell"])
        taskhawk.configure(
            TASKHAWK_BROKER="sqlite://", TASKHAWK_DEFAULT_HEADERS=scope["headers"]
        )
        assert task.accepts_metadata
        task.dispatch("milk")
        assert run_queued().error is None
        assert sold == ["milk"]

    def test_api_of_1_4(self):
        """A task has 1.4's properties, and can be made by hand."""

        @taskhawk.task(priority=Priority.low, name="mail.send")
        def send(to):
            pass

        assert isinstance(send, taskhawk.Task)
        assert send.task is send
        assert taskhawk.Task.find_by_name("mail.send") is send
        assert (send.name, send.priority) == ("mail.send", Priority.low)
        assert isinstance(send.fn, types.FunctionType)
        assert str(send) == repr(send) == "Taskhawk task: mail.send"
        made = taskhawk.Task(plain, Priority.bulk, "by.hand")
        assert (made.fn, made.priority, made.name) == (plain, Priority.bulk, "by.hand")
        values = {priority.name: priority.value for priority in Priority}
        assert values == {"default": 1, "high": 2, "low": 3, "bulk": 4}

    @pytest.mark.parametrize(
        ("fn", "options", "name"),
        [
            (plain, {}, f"{__name__}.plain"),
            (Shop.function, {"priority": Priority.high}, f"{__name__}.function"),
            (PARTIAL, {"name": "shop.partial"}, "shop.partial"),
            (SHOP, {"name": "shop.call", "priority": Priority.low}, "shop.call"),
        ],
    )
    def test_names(self, fn, options, name):
        """A task without name= is called by its module and function; so is a copy."""
        task = taskhawk.task(**options)(fn) if options else taskhawk.task(fn)
        assert (task.name, task.fn) == (name, fn)
        assert task.priority is options.get("priority", Priority.default)
        assert str(copy.copy(task)) == str(task)

    def test_function_attributes(self, sync):
        """Attributes that another decorator set do not replace the task's own."""

        def fetch():
            return "fetched"

        for name in ("retry", "dispatch", "call", "name", "fn"):
            setattr(fetch, name, "another decorator's")
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
        task = taskhawk.Task(fn, Priority.default, "shop.f")
        assert (task.accepts_metadata, task.accepts_headers) == (metadata, headers)

    def test_current_task(self):
        """Code in a task, and in threads with its context, knows the task."""

        @taskhawk.task(name="tasks.send_email")
        def send_email(to, subject, metadata, from_email=None):
            threads = concurrent.futures.ThreadPoolExecutor(1)
            context = contextvars.copy_context()
            with threads:
                there = threads.submit(context.run, taskhawk.current_task).result()
            known.append((taskhawk.current_task() is metadata, there is metadata))
            raise ValueError

        known = []
        assert taskhawk.current_task() is None
        run_body(json.dumps(VALID))
        assert (known, taskhawk.current_task()) == ([(True, True)], None)

    def test_call(self):
        """Task.call() gives metadata and headers to parameters of these names."""

        @taskhawk.task(name="tasks.send_email")
        def send_email(to, subject, metadata: str, headers: 0, from_email=None):
            runs.append((to, subject, metadata, dict(headers), from_email))
            headers.clear()  # the message keeps its own

        runs: list[Any] = []
        message = taskhawk.Message(copy.deepcopy(VALID))
        send_email.call(message, "receipt")
        message.call_task(None)
        metadata = {"id": VALID["id"], "priority": Priority.high}
        metadata |= {"timestamp": 1460868253255, "version": "1.0"}
        rest = (VALID["headers"], "spam@example.com")
        assert runs == [
            (*VALID["args"], {**metadata, "receipt": receipt}, *rest)
            for receipt in ("receipt", None)
        ]
        assert message.as_dict() == VALID

    def test_keywords(self):
        """A task gets both in **kwargs, too, and no message can forge them."""

        @taskhawk.task(name="tasks.send_email")
        def send_email(to, /, subject, **kwargs):
            runs.append(kwargs)

        runs: list[Any] = []
        forged = {"metadata": {"id": "forged"}, "headers": "forged", "to": 1}
        assert run_body(json.dumps(edited("kwargs", forged))).error is None
        [kwargs] = runs
        metadata = kwargs.pop("metadata")
        assert (metadata.id, metadata.receipt) == (VALID["id"], "receipt")
        assert kwargs == {"headers": VALID["headers"], "to": 1}

    def test_metadata(self):
        """Metadata is a dict of 1.4's five keys; they and others are attributes."""
        message = taskhawk.Message(VALID)
        metadata = taskhawk.Metadata(message, "receipt")
        assert isinstance(metadata, dict)
        assert sorted(metadata) == ["id", "priority", "receipt", "timestamp", "version"]
        assert {name: getattr(metadata, name) for name in metadata} == metadata
        assert (metadata.task, metadata.headers) == (
            "tasks.send_email",
            message.headers,
        )
        assert (metadata.queue, metadata.attempt) == (None, 1)
        assert metadata.lease_lost is False
        sentence = refused(lambda: metadata.provider, error=AttributeError)
        assert sentence == "metadata has no 'provider'"
        assert copy.copy(metadata) == metadata

    def test_metadata_of_queue(self, memory):
        """Metadata knows the queue, the attempt, and whether the lease is lost."""
        seen = []

        @taskhawk.task(name="tasks.note")
        def note(metadata):
            received.lease_lost = True
            seen.append((metadata.queue, metadata.attempt, metadata.receipt))
            seen.append(metadata.lease_lost)
            metadata.extend_visibility_timeout(0)

        note.dispatch()
        for attempt in (1, 2):
            [received] = receive_all()
            assert taskhawk.process(received).error is None
            receipt = received.receipt_handle
            assert seen == [("TASKHAWK-DEFAULT", attempt, receipt), True]
            seen.clear()

    @pytest.mark.parametrize(
        ("args", "kwargs", "sentence"),
        [
            ((), {}, "missing a required argument: 'one'"),
            ((1,), {}, "missing a required argument: 'three'"),
            ((1, 2, 3), {"three": 3}, "too many positional arguments"),
            (
                (1,),
                {"three": 3, "four": 4},
                "got an unexpected keyword argument 'four'",
            ),
            ((1, 2), {"two": 2, "three": 3}, "multiple values for argument 'two'"),
            (
                (1,),
                {"three": 3, "metadata": {}},
                "'metadata' is given by the worker: leave it out",
            ),
        ],
    )
    def test_binding(self, memory, args, kwargs, sentence):
        """A call that the worker could not make is a TypeError at the dispatch."""

        @taskhawk.task(name="tasks.send")
        def send(one, /, two=2, *, three, metadata):
            pass

        for dispatch in (send.dispatch, send.with_headers(a=1).dispatch):
            found = refused(dispatch, *args, error=TypeError, **kwargs)
            assert found == f"tasks.send: {sentence}"
        assert receive_all() == []
        assert send.dispatch(1, three=3)

    def test_binding_names(self, memory):
        """Parameters may be called self or args, and headers self or task."""

        @taskhawk.task(name="tasks.odd")
        def odd(self, args, priority, headers):
            runs.append((self, args, priority, headers))

        runs: list[Any] = []
        invocation = odd.with_headers(self=1, task=2).with_headers(h1=3)
        invocation.dispatch(self=4, args=5, priority=6)
        assert run_queued().error is None
        assert runs == [(4, 5, 6, {"self": 1, "task": 2, "h1": 3})]

    @pytest.mark.parametrize(
        ("wrapper", "is_mute"),
        [
            (lambda *args, **kwargs: None, True),
            (lambda *args: None, True),
            (lambda **kwargs: None, True),
            (lambda what, **kwargs: None, True),
            (functools.cache(lambda what: None), True),
            (lambda what: None, False),
            (lambda what, size=1: None, False),
        ],
        ids=["*, **", "*", "**", "name, **", "compiled", "name", "default"],
    )
    def test_injecting_decorator(self, wrapper, is_mute, memory):
        """Calls are checked by what can be called, as far as a wrapper names it.

        Where it does not, the error says what to do; what is set then counts.
        """

        def sell(session, what):
            raise AssertionError

        functools.update_wrapper(wrapper, sell)
        task = taskhawk.task(name="shop.sell")(wrapper)
        if is_mute:
            sentence = (
                "shop.sell: missing a required argument: 'what' (if a decorator passes"
                " it, set __signature__ of the function that the decorator returns)"
            )
            assert refused(task.dispatch, "milk", error=TypeError) == sentence
            taskhawk._registry.clear()
            vars(wrapper)["__signature__"] = inspect.signature(lambda what: None)
            task = taskhawk.task(name="shop.sell")(wrapper)
        sentence = "shop.sell: missing a required argument: 'what'"
        assert refused(task.dispatch, error=TypeError) == sentence
        task.dispatch("milk")

    def test_signature_is_taken_at_its_word(self, memory):
        """A function that is not wrapped, and takes anything, may say what it takes."""
        ran = []

        def count(*numbers):
            ran.append(numbers)

        assert refused(taskhawk.task(name="a.count"), count) == f"a.count: {STARRED}"
        count.__signature__ = inspect.signature(count)
        taskhawk.task(name="a.count")(count).dispatch(1, 2)
        assert run_queued().error is None
        assert ran == [(1, 2)]

    def test_place_of_wrapped_function(self):
        """Where a decorated function is written is where the one inside it is."""

        def decorated(fn):
            return functools.wraps(fn)(lambda: None)

        def one():
            pass

        taskhawk.task(name="a.one")(decorated(one))
        line = one.__code__.co_firstlineno
        error = refused(taskhawk.task(name="a.one"), decorated(one))
        assert (
            f"is taken by {__name__}.{one.__qualname__} ({__file__}:{line}): " in error
        )

    def test_immutable_invocations(self, memory):
        """Each with_… returns a new invocation and leaves the old one as it was."""
        send = taskhawk.task(name="tasks.send", priority=Priority.low)(plain)
        first = send.with_headers(a=1, b=1)
        second = first.with_headers(b=2)
        high = first.with_priority(Priority.high)
        assert high.with_priority(Priority.bulk).with_delay(0) is not high
        bare = taskhawk.AsyncInvocation(send)
        for invocation in (first, second, high, bare):
            assert isinstance(invocation, taskhawk.AsyncInvocation)
        for invocation in (send, first, second, high, bare):
            invocation.dispatch()
        low, urgent = receive_all(Priority.low), receive_all(Priority.high)
        sent = [json.loads(received.body) for received in low + urgent]
        one = {"a": 1, "b": 1}
        assert [data["headers"] for data in sent] == [
            {},
            one,
            {"a": 1, "b": 2},
            {},
            one,
        ]
        assert [data["metadata"]["priority"] for data in sent] == ["low"] * 4 + ["high"]
        assert receive_all(Priority.bulk) == []
        sentence = refused(send.with_priority, "high", error=TypeError)
        assert sentence == "priority: expected a taskhawk.Priority, got 'high'"

    @pytest.mark.parametrize(
        ("delay", "error", "got"),
        [
            ("5", TypeError, "seconds, a timedelta or a datetime, got '5'"),
            (True, TypeError, "seconds, a timedelta or a datetime, got True"),
            (-1, ValueError, "0 or more seconds, got -1"),
            (math.nan, ValueError, "0 or more seconds, got nan"),
            (math.inf, ValueError, "0 or more seconds, got inf"),
            (timedelta(days=-1), ValueError, "0 or more seconds, got -86400.0"),
            (
                datetime(2099, 1, 1),  # noqa: DTZ001 - that is what is wrong
                ValueError,
                (
                    "a datetime with a time zone, such as datetime.now(UTC), got"
                    " 2099-01-01 00:00:00"
                ),
            ),
        ],
    )
    def test_wrong_delay(self, delay, error, got):
        """A delay is a time, neither negative nor without end, nor without a time zone."""
        sentence = refused(taskhawk.task(plain).with_delay, delay, error=error)
        assert sentence == f"delay: expected {got}"

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
        """A script's task has its importable name, and answers to __main__ too."""
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
        (tmp_path / "stores").mkdir()
        (tmp_path / "stores/__init__.py").touch()
        for path in ("shop.py", "stores/shop.py", "stores/__main__.py"):
            (tmp_path / path).write_text(script)
        result = run_python(args, cwd=tmp_path)
        names = sorted({name, "__main__.sell", "shop.buy"})
        expected = f"{name} True\nshop.buy {names}\n"
        assert (result.stderr, result.stdout) == ("", expected)

    def test_script(self, tmp_path):
        """A script may import itself, and pickle its task for what it spawns."""
        (tmp_path / "shop.py").write_text(
            textwrap.dedent("""
            import multiprocessing, pickle, taskhawk
            @taskhawk.task
            def sell(what): return what
            def name(task): return task.name
            if __name__ == "__main__":
                import shop
                print(shop.sell is taskhawk.Task.find_by_name("shop.sell"))
                print(pickle.loads(pickle.dumps(sell)) is sell)
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    print(pool.map(sell, ["milk", "bread"]), pool.map(name, [sell]))
            """)
        )
        result = run_python(["shop.py"], cwd=tmp_path)
        expected = "True\nTrue\n['milk', 'bread'] ['shop.sell']\n"
        assert (result.stdout, result.stderr) == (expected, "")

    def test_declared_in(self, tmp_path, monkeypatch):
        """A task knows the module whose import declares it, whatever its function's is."""
        modules = {
            "lib": """
                import taskhawk
                def send(): pass
                def declared(name):
                    return taskhawk.task(name=name)(send)
                """,
            "shop": """
                import functools, lib, taskhawk
                other = taskhawk.task(name="other")(lib.send)
                partial = taskhawk.task(name="partial")(functools.partial(lib.send))
                made = lib.declared("made")
                class Cart:
                    @taskhawk.task
                    def fill(): pass
                exec("executed = taskhawk.task(name='executed')(lib.send)", {**globals()})
                exec("odd = taskhawk.task(name='odd')(lib.send)", {
                    "taskhawk": taskhawk, "lib": lib, "__name__": "nowhere"})
                def fills(): return taskhawk.task(name="fills")(lib.send)
                """,
            "script": """
                import shop, lib, taskhawk, threading
                own = taskhawk.task(name="own")(lib.send)
                @taskhawk.task
                def sell(): pass
                def declares(): return taskhawk.task(name="declares")(lib.send)
                def main():
                    declares()
                    shop.fills()
                    @taskhawk.task
                    def inner(): pass
                main()
                for task in dict.fromkeys(taskhawk._registry.values()):
                    print(task.name, task.declared_in)
                """,
        }
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        result = run_python(["script.py"], cwd=tmp_path)
        assert result.stdout.splitlines() == [
            *("other shop", "partial shop", "made shop", "shop.fill shop"),
            *("executed shop", "odd shop"),
            *("own __main__", "script.sell __main__", "declares __main__"),
            *("fills shop", "script.inner __main__"),
        ], result.stderr
        assert taskhawk.task(plain).declared_in == __name__

    def test_taken_name(self):
        """Another function under a taken name is refused; the error has both places."""

        def make(what):
            def sell():
                return what

            return sell

        def other():
            pass

        partial = functools.partial(plain)
        declare = taskhawk.task(name="shop.sell")
        task = declare(make("milk"))
        for taker, shown in (
            (other, place(other)),
            (make("bread"), place(task.fn)),  # of one factory, but another function
            (partial, f"functools.{partial!r}"),
        ):
            assert refused(declare, taker) == (
                f"shop.sell: the name of {shown} is taken by {place(task.fn)}:"
                " rename one, or pass name= to @taskhawk.task"
            )
            assert taskhawk.Task.find_by_name("shop.sell") is task
        again = declare(task.fn)  # the same function, declared twice
        assert taskhawk.Task.find_by_name("shop.sell") is again

    def test_taken_by_twin(self, tmp_path, monkeypatch):
        """Two functions of one name in a module are two functions."""
        source = "import taskhawk\n\n@taskhawk.task\ndef sell():\n    pass\n"
        path = tmp_path / "twins.py"
        path.write_text(source + source)
        monkeypatch.syspath_prepend(tmp_path)
        assert refused(importlib.import_module, "twins") == (
            f"twins.sell: the name of twins.sell ({path}:8) is taken by twins.sell"
            f" ({path}:3): rename one, or pass name= to @taskhawk.task"
        )

    @pytest.mark.parametrize("again", ["reload", "import"])
    @pytest.mark.parametrize("edit", ["", "\n\n\n"])
    @pytest.mark.parametrize("cls", ["taskhawk.Task", f"{__name__}.Wrapping"])
    def test_reload(self, tmp_path, monkeypatch, again, edit, cls):
        """A module that is read again replaces its tasks, on other lines too."""
        monkeypatch.setenv("TASKHAWK_TASK_CLASS", cls)
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

    @pytest.mark.parametrize("where", ["interpreter", "notebook"])
    def test_typed_again(self, tmp_path, where):
        """In the interactive interpreter and in notebooks, a task can be redefined."""
        code = "import taskhawk\n"
        for number in (1, 2):
            cell = f"@taskhawk.task\ndef sell(): return {number}\n\n"
            if where == "notebook":
                file = f"/tmp/ipykernel_1/{number}.py"
                cell = f"exec(compile({cell!r}, {file!r}, 'exec'))\n"
            code += cell
        code += "print(sell.name, taskhawk.Task.find_by_name('__main__.sell')())\n"
        result = subprocess.run(
            [sys.executable, "-i", "-q"],
            input=code,
            env=python_env(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.stdout == "__main__.sell 2\n", result.stderr

    # --- refusals ---

    @pytest.mark.parametrize(
        ("fn", "options", "sentence"),
        NO_TASKS,
        ids=[re.sub(" at 0x\\w+", "", row[2]) for row in NO_TASKS],
    )
    def test_refused(self, fn, options, sentence):
        """What a message can't call is refused at once; so are wrong options."""
        before = dict(taskhawk._registry)
        declare = taskhawk.task(**options) if options else taskhawk.task
        assert refused(declare, fn) == sentence
        assert taskhawk._registry == before

    def test_refused_in_class(self):
        """The decorator in a class body is refused at once."""

        def declare():
            class Cart:
                @taskhawk.task
                def fill(self):
                    pass

        name = "TestTasks.test_refused_in_class.<locals>.declare.<locals>.Cart.fill"
        assert refused(declare) == f"{name} {A_METHOD}"

    @pytest.mark.parametrize(
        ("args", "options"), [((plain, 5), {}), ((plain,), {"colour": 1})]
    )
    def test_wrong_arguments(self, args, options):
        """Arguments that task() does not have are refused."""
        with pytest.raises(TypeError, match=r"\(\) (takes 1|got an unexpected)"):
            taskhawk.task(*args, **options)

    def test_options(self):
        """The options are the task's; one that has a time limit is isolated."""
        names = ("retry", "retry_on", "never_retry_on", "time_limit", "isolate")
        values: Callable[[Any], Any] = operator.attrgetter(*names)
        by_default = (None, (BaseException,), (), None, False)
        assert values(taskhawk.Task(plain, Priority.low, "by.hand")) == by_default
        assert values(taskhawk.task(plain)) == by_default
        policy = taskhawk.fixed(1)
        given = (policy, (OSError, (KeyError,)), TimeoutError, 60, True)
        for isolate in (True, False):
            options = {**dict(zip(names, given, strict=True)), "isolate": isolate}
            assert values(taskhawk.task(name="shop.sell", **options)(plain)) == given
        assert taskhawk.task(plain, isolate=True).isolate is True

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
        assert run_queued().fate is taskhawk.Fate.acknowledge
        assert runs == [("milk", 1)]
        metadata = taskhawk.Metadata(taskhawk.Message(VALID), None)
        assert asyncio.run(sell("bread", metadata)) == "bread"

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

    @pytest.mark.parametrize("kind", ["wrapped", "object", "partial", "compiled"])
    def test_async_in_disguise(self, kind):
        """Whatever can be awaited is awaited: no run counts as done before it is."""
        runs = []

        async def sell(*_args, **_kwargs):
            await asyncio.sleep(0)
            runs.append("milk")

        class Compiled:
            """A coroutine as Cython makes it, which inspect does not know as one."""

            def __await__(self):
                return (yield from sell().__await__())

        class Seller:
            async def __call__(self, to, subject, from_email):
                await sell()

        def wrapped(to, subject, from_email):
            return Compiled() if kind == "compiled" else sell()

        things = {"object": Seller(), "partial": functools.partial(wrapped)}
        taskhawk.task(name="tasks.send_email")(things.get(kind, wrapped))
        assert run_body(json.dumps(VALID)).error is None
        assert runs == ["milk"]

    @pytest.mark.parametrize("generate", [generates, generates_async])
    def test_generator_in_disguise(self, memory, generate):
        """A generator behind a wrapper is a failed run, for nothing would run it."""

        @taskhawk.task(name="shop.sell")
        def sell():
            return generate()

        sell.dispatch()
        outcome = run_queued()
        assert outcome.fate is taskhawk.Fate.retry
        assert str(outcome.error) == (
            "shop.sell returned a generator, which runs only if something reads it:"
            " expected a function that runs when it is called"
        )

    @pytest.mark.parametrize("error", [None, ValueError])
    def test_left_behind(self, memory, caplog, error):
        """Asyncio tasks that a run leaves behind are logged, and end with the worker."""
        ended = []

        async def linger():
            try:
                await asyncio.sleep(WORKER_PATIENCE_S)
            finally:
                ended.append(len(runs))

        @taskhawk.task(name="shop.sell")
        async def sell(count):
            runs.append([asyncio.create_task(linger()) for _ in range(count)])
            await asyncio.sleep(0)
            if error:
                raise error

        runs = []
        for count in (2, 0, 1):
            sell.dispatch(count)
        taskhawk.listen_for_messages(Priority.default, loop_count=3)
        name = "TestTasks.test_left_behind.<locals>.linger"
        logged = [r.getMessage() for r in caplog.records if "asyncio" in r.msg]
        text = "shop.sell ended while asyncio tasks that it began were still running"
        assert logged == [f"{text}: {name}, {name}", f"{text}: {name}"]
        assert ended == [3, 3, 3]

    # --- contexts ---

    @pytest.mark.parametrize("sync", [False, True])
    def test_context(self, sync):
        """A ContextVar that a task or hook sets is seen in its run, and in no other."""
        user = contextvars.ContextVar("user", default="nobody")
        seen = []

        def note(**_):
            seen.append(user.get())
            user.set("hook")

        taskhawk.configure(
            TASKHAWK_BROKER="sqlite://",
            TASKHAWK_SYNC=sync,
            TASKHAWK_PRE_PROCESS_HOOK=note,
            TASKHAWK_POST_PROCESS_HOOK=note,
            TASKHAWK_ERROR_HOOK=note,
        )

        @taskhawk.task(name="shop.sell")
        def sell(fails=False):
            seen.append(user.get())
            user.set("task")
            if fails:
                raise taskhawk.StopRetry

        sell.dispatch()
        sell.dispatch()
        if not sync:  # there, the error is the caller's
            sell.dispatch(fails=True)
            taskhawk.listen_for_messages(Priority.default, loop_count=3)
        assert seen == ["nobody", "hook", "task"] * (2 if sync else 3)
        assert user.get() == "nobody"

    def test_context_of_django(self, tmp_path):
        """All runs of a thread share Django's caches, which belong to a context."""
        code = """
            from django.conf import settings
            settings.configure(CACHES={"default": {
                "BACKEND": "django.core.cache.backends.locmem.LocMemCache"}})
            from django.core.cache import caches
            import taskhawk
            taskhawk.configure(TASKHAWK_BROKER="sqlite://")
            seen = []
            @taskhawk.task
            def look():
                seen.append(caches["default"])
            for _ in range(2):
                look.dispatch()
            taskhawk.listen_for_messages(taskhawk.Priority.default, loop_count=2)
            print(seen[0] is seen[1])
        """
        assert python_lines(tmp_path, code) == ["True"]

    def test_async_in_a_loop(self, sync):
        """In sync mode, dispatch waits for an async task, in an event loop too."""
        user = contextvars.ContextVar("user")
        runs = []

        @taskhawk.task(name="shop.sell")
        async def sell(what):
            await asyncio.sleep(0)
            runs.append((what, user.get()))
            if what == "nothing":
                raise LookupError(what)

        async def main():
            user.set("Zoë")
            sell.dispatch("milk")
            assert runs == [("milk", "Zoë")]
            assert refused(sell.dispatch, "nothing", error=LookupError) == "nothing"

        asyncio.run(main())

    @pytest.mark.slow
    def test_one_loop_for_a_worker(self, memory):
        """A worker runs its coroutines on one loop; one inside its task has another."""
        loops = []

        @taskhawk.task(name="shop.sell")
        async def sell():
            loops.append(asyncio.get_running_loop())

        @taskhawk.task(name="shop.work")
        def work():
            sell.with_priority(Priority.high).dispatch()
            taskhawk.listen_for_messages(Priority.high, until_empty=True)

        for task in (sell, work, sell):
            task.dispatch()
            taskhawk.listen_for_messages(Priority.default, loop_count=0)
        ledger = taskhawk.listen_for_messages(Priority.default, until_empty=True)
        assert ledger.acked == 3
        assert loops[0] is loops[2]
        assert loops[0] is not loops[1]
        assert all(loop.is_closed() for loop in loops)

    # --- TASKHAWK_TASK_CLASS ---

    def test_task_class(self, memory, monkeypatch):
        """TASKHAWK_TASK_CLASS may override call() and dispatch()."""
        monkeypatch.setattr(HandMade, "runs", [])
        policy = taskhawk.fixed(1)
        taskhawk.configure(TASKHAWK_BROKER="sqlite://", TASKHAWK_TASK_CLASS=HandMade)
        task = taskhawk.task(name="shop.sell", retry=policy)(plain)
        assert type(task) is HandMade
        task.dispatch()
        [received] = receive_all()
        taskhawk.process(received)
        taskhawk.configure(TASKHAWK_SYNC=True)
        task.dispatch()
        task.with_headers(a=1).dispatch()
        receipts = (received.receipt_handle, None, None)
        ran = [("shop.sell", policy, receipt) for receipt in receipts]
        assert HandMade.runs == ["dispatch", ran[0], "dispatch", ran[1], ran[2]]

    def test_task_class_alone(self, monkeypatch):
        """The class is read at each decoration, and no other setting is read."""
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
        taskhawk.configure(TASKHAWK_TASK_CLASS=many)
        assert refused(taskhawk.task, plain) == (
            f"TASKHAWK_TASK_CLASS: expected a subclass of taskhawk.Task, got {many!r}"
        )

    @pytest.mark.slow
    def test_typing(self, tmp_path):
        """A type checker sees wrong arguments of dispatch, call and decorator."""
        shutil.copy(taskhawk.__file__, tmp_path)
        source = textwrap.dedent("""\
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
            e: tuple[str, taskhawk.Priority] = (sell.name, sell.priority)

            @taskhawk.task(max_queue_size=5)
            async def count(number: int) -> None:
                g: str = await count.dispatch_async(number)
                h: str = await sell.with_headers(a="1").dispatch_async("milk", count=2)
                i: str = count.with_options(time_limit=3).dispatch(number)
                await count.dispatch_async("1")  # arg-type
                count.with_options(retry=taskhawk.fixed(1)).dispatch()  # call-arg

            sell.dispatch(1)  # arg-type
            sell.dispatch("milk", number=2)  # call-arg
            sell.with_headers(a="1").dispatch()  # call-arg
            sell.with_priority(taskhawk.Priority.low).dispatch("milk", "2")  # arg-type
            buy.dispatch(2)  # arg-type
            f: str = sell("milk")  # assignment
            sell.dispatched("milk")  # attr-defined
            taskhawk.task(priority=1)  # call-overload
        """)
        (tmp_path / "shop.py").write_text(source)
        args = "-m mypy --strict --follow-imports=silent --cache-dir=cache shop.py"
        result = run_python(args.split(), cwd=tmp_path, env={"PYTHONPATH": ""})
        errors = re.findall(
            r"^shop\.py:(\d+): error: .*\[(.+)\]$", result.stdout, re.MULTILINE
        )
        lines = enumerate(source.splitlines(), 1)
        expected = [
            (str(number), line.partition("  # ")[2])
            for number, line in lines
            if "  # " in line
        ]
        assert errors == expected


class Wrapping(taskhawk.Task):
    """A TASKHAWK_TASK_CLASS that runs another function than the one decorated."""

    def __init__(self, fn, priority, name):
        super().__init__(functools.partial(fn), priority, name)


class TestExtendVisibilityTimeout:
    """extend_visibility_timeout(), and the same by a task's metadata."""

    def test_sqs(self, scripted, mail):
        """It sets how long a message stays hidden from now; SQS may refuse."""
        mail.with_priority(Priority.high).dispatch()
        (received,) = receive_all(Priority.high)
        receipt = received.receipt_handle
        taskhawk.extend_visibility_timeout(Priority.high, receipt, 600)
        (payload,) = scripted.asked("ChangeMessageVisibilityBatch")
        assert payload["QueueUrl"].endswith("-HIGH-PRIORITY")
        (entry,) = payload["Entries"]
        assert (entry["ReceiptHandle"], entry["VisibilityTimeout"]) == (receipt, 600)
        gone = refuse(0, code="MessageNotInflight", ours=True)
        scripted.script("ChangeMessageVisibilityBatch", gone)
        with pytest.raises(taskhawk.PartialFailure) as raised:
            taskhawk.extend_visibility_timeout(Priority.default, receipt, 600)
        assert str(raised.value) == "1 of 1 messages failed: MessageNotInflight"
        failed = [{"Id": "0", "Code": "MessageNotInflight", "Message": "no"}]
        assert raised.value.result["Failed"] == failed

    @pytest.mark.parametrize("by", ["function", "metadata"])
    def test_hides(self, broker, by):
        """A message can be had by others at once, or not before the time is over."""
        waits = iter([0, 600])

        @taskhawk.task(name="mail.again")
        def again(metadata):
            call = metadata.extend_visibility_timeout
            if by == "function":
                extend = taskhawk.extend_visibility_timeout
                call = functools.partial(extend, Priority.default, metadata.receipt)
            call(next(waits))

        again.dispatch()
        (first,) = receive_all()
        assert taskhawk.process(first).error is None
        (second,) = receive_all()
        assert (second.message_id, second.attempt) == (first.message_id, 2)
        assert taskhawk.process(second).error is None
        assert receive_all() == []

    def test_gone(self, sqlite, mail):
        """Where another worker has the message, the task gets the error."""

        @taskhawk.task(name="mail.lost")
        def lost(metadata):
            metadata.extend_visibility_timeout(60)

        lost.dispatch()
        (received,) = receive_all()
        received.change_visibility(VisibilityTimeout=0)
        (again,) = receive_all()
        outcome = taskhawk.process(received)
        assert outcome.fate is taskhawk.Fate.retry
        assert str(outcome.error) == "1 of 1 messages failed: ReceiptHandleIsInvalid"
        assert taskhawk.process(again).error is None

    def test_no_queue(self):
        """Where no queue has the message (a call by hand, SNS), it does nothing."""
        ran = []

        @taskhawk.task(name="mail.nowhere")
        def nowhere(metadata):
            metadata.extend_visibility_timeout(60)
            ran.append(metadata.receipt)

        message = Message.new("mail.nowhere")
        message.call_task(None)
        body = json.dumps(message.as_dict())
        record = {"Sns": {"Message": body, "MessageId": "m", "MessageAttributes": {}}}
        taskhawk.process_messages_for_lambda_consumer({"Records": [record]})
        assert ran == [None, None]


# --- 12. publishing -------------------------------------------------------------------

#: Headers whose name and value SQS takes as an attribute, and those that it does not.
ATTRIBUTE_HEADERS = {
    "request_id": "1234",
    "number": 5,
    "all.of_it-0": "Ümläut 😀\t\r\n\x7f\ud7ff\ue000\ufffd",
    "AWSx": "a",
    "x" * 256: "a",
}
OTHER_HEADERS = {
    **dict.fromkeys(("x" * 257, "", ".x", "x.", "x..y", "x y", "x\n", "ä"), "a"),
    **dict.fromkeys(("AWS.x", "aws.x", "Amazon.x", "aMAZON.x", "taskhawk.error"), "a"),
    "empty": "",
    "control": "a\x00",
    "surrogate": "\ud800",
    "not_a_character": "\ufffe",
}


def too_large(size: int, limit: int, largest: str) -> str:
    """Return the sentence that refuses a message of so many bytes."""
    return (
        f"mail.send: the message has {size} bytes (body and attributes), and the limit"
        f" is {limit}: the largest argument is {largest} bytes"
    )


class TestPublishing:
    """dispatch(): nothing leaves that can't arrive, and what was accepted has an id."""

    def test_attributes(self, sqlite, mail):
        """A header that SQS takes is an attribute; the body has every header."""
        for name, value in [*ATTRIBUTE_HEADERS.items(), *OTHER_HEADERS.items()]:
            mail.with_headers(**{name: value}).dispatch()
            (received,) = receive_all()
            assert json.loads(received.body)["headers"] == {name: value}
            attribute = {"DataType": "String", "StringValue": str(value)}
            expected = {name: attribute} if name in ATTRIBUTE_HEADERS else {}
            assert received.message_attributes == expected

    def test_hostile_headers(self, endpoint, sqs_client, queue_name):
        """A message arrives with all headers, though SQS takes ten attributes."""
        seen = []

        @taskhawk.task(name="headers.note")
        def note(headers):
            seen.append(headers)

        make_queues(sqs_client(endpoint), queue_name)
        configure_aws(endpoint, queue_name)
        good = {f"header-{number}": f"é{number}" for number in range(12)}
        sent = {**OTHER_HEADERS, "ü": {"any": [1]}, **good}
        note.with_headers(**sent).dispatch()
        (received,) = receive_all()
        assert set(received.message_attributes) == set([*good][:10])
        assert taskhawk.process(received).error is None
        assert seen == [sent]

    @pytest.mark.parametrize("limit", [1_048_576, 262_144], ids=["SQS", "SNS"])
    def test_size(self, aws, mail, limit):
        """A message may have the limit's bytes, attributes included, and no more."""
        configure_aws(aws.url, "app", IS_LAMBDA_APP=limit == 262_144)
        text = filler(limit, trace="é", name="n")
        invocation = mail.with_headers(trace="é", name="n")
        invocation.dispatch(text)
        before = aws.actions
        with pytest.raises(taskhawk.MessageTooLarge) as raised:
            invocation.dispatch(text + "x")
        largest = f"args[0] with {len(text) + 3}"
        assert str(raised.value) == too_large(limit + 1, limit, largest)
        assert raised.value.limit == limit
        assert isinstance(raised.value, taskhawk.ValidationError)
        assert aws.actions == before

    @pytest.mark.parametrize(
        ("call", "largest"),
        [
            ({"to": "x", "text": "é" * 180_000}, "kwargs.text with 1080002 bytes"),
            (["y" * 500_000, "x" * 600_000], "args[1] with 600002 bytes"),
            ("x" * 1_048_576, "headers.trace with 1048578 bytes"),
        ],
    )
    def test_largest(self, sqlite, mail, call, largest):
        """The error names the largest argument or header, with its bytes."""
        error = taskhawk.MessageTooLarge
        if isinstance(call, dict):
            sentence = refused(mail.dispatch, error=error, **call)
        elif isinstance(call, list):
            sentence = refused(mail.dispatch, *call, error=error)
        else:
            sentence = refused(mail.with_headers(trace=call).dispatch, error=error)
        assert sentence.endswith(f" is 1048576: the largest argument is {largest}")
        assert sqlite.depth("TASKHAWK-DEFAULT") == Depth(0, 0, 0)

    def test_too_large_without_arguments(self, sqlite):
        """Where the task's name is too large, the error blames no argument."""
        name = "n" * 1_048_576
        dispatch = taskhawk.task(name=name)(plain).dispatch
        sentence = refused(dispatch, error=taskhawk.MessageTooLarge)
        assert re.fullmatch(
            r"n{200}: the message has \d+ bytes \(body and attributes\), and the limit"
            r" is 1048576",
            sentence,
        )

    def test_pinned_queue(self, endpoint, sqs_client, queue_name, mail):
        """A size that only this queue refuses raises the same error."""
        make_queues(sqs_client(endpoint), queue_name, MaximumMessageSize="2048")
        configure_aws(endpoint, queue_name)
        mail.dispatch(filler(2048))
        text = filler(2049)
        with pytest.raises(taskhawk.MessageTooLarge) as raised:
            mail.dispatch(text)
        largest = f"args[0] with {len(text) + 2}"
        assert str(raised.value) == too_large(2049, 2048, largest)
        assert raised.value.limit == 2048

    def test_astronomical(self):
        """A Decimal with a huge exponent is refused, not written out for minutes."""
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
            sentence = refused(mail.dispatch, value, error=taskhawk.ValidationError)
            assert sentence.startswith("mail.send: args[0] is not JSON: ")
        while deep:  # or its deallocation is what nests too deeply
            deep = deep.pop()

    def test_delay_sqs(self, aws, mail):
        """A delay of up to 15 minutes is the queue's DelaySeconds, rounded up."""
        delays = {900: 900, timedelta(minutes=15): 900, 0.2: 1, 59.5: 60, 0: None}
        for delay in delays:
            mail.with_delay(3).with_delay(delay).dispatch()
        with taskhawk.batch():
            for delay in delays:
                mail.with_delay(delay).dispatch()
        (in_batch,) = aws.asked("SendMessageBatch")
        for sent in (aws.asked("SendMessage"), in_batch["Entries"]):
            seconds = [entry.get("DelaySeconds") for entry in sent]
            assert seconds == [*delays.values()]

    def test_delay_too_long(self, sqlite, mail):
        """A delay that no number of SQLite's can hold is refused."""
        assert refused(mail.with_delay(timedelta(days=36_501)).dispatch) == (
            "mail.send: the queue can hold a message back for at most 3.1536e+09 s, got"
            " 3.15369e+09 s"
        )

    def test_delay_sqlite(self, tmp_path, mail):
        """SQLite holds a message back for any time, to the millisecond."""
        url = f"sqlite:///{tmp_path}/queue.db"
        taskhawk.configure(TASKHAWK_BROKER=url)
        mail.with_delay(timedelta(days=400)).dispatch("late")
        now = time.time()
        assert taskhawk._brokers.broker().depth("TASKHAWK-DEFAULT") == Depth(0, 0, 1)
        for days, visible in ((399.999, 0), (400.001, 1)):
            later = Clock(now + days * 86_400)
            with contextlib.closing(taskhawk.SqliteBroker(url, clock=later)) as broker:
                assert broker.depth("TASKHAWK-DEFAULT").visible == visible

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "answer",
        [fault("InternalFailure", status=500), DROPPED],
        ids=["fault", "dropped"],
    )
    def test_retried_by_botocore(self, scripted, mail, answer):
        """A send that the service fails at or cuts short is made again."""
        scripted.script("SendMessage", answer)
        mail.dispatch("once")
        assert scripted.actions == ["GetQueueUrl", "SendMessage", "SendMessage"]
        assert received_args() == ["once"]


BATCH_TOO_LONG = fault("AWS.SimpleQueueService.BatchRequestTooLong", "too long")
DENY = fault("AccessDenied", status=403)


def longer_than(limit: int) -> AwsAnswer:
    """Refuse longer requests, as a queue does that is pinned to this size."""

    def answer(call: AwsCall) -> AwsAnswer:
        entries = call.data.get("Entries", [call.data])
        size = sum(len(entry["MessageBody"]) for entry in entries)
        return BATCH_TOO_LONG(call) if size > limit else None

    return answer


def first_alone(call: AwsCall) -> AwsAnswer:
    """Do what the first entry asks, and name no other in the answer."""
    return {"Successful": call.forward(Entries=call.data["Entries"][:1])["Successful"]}


class BatchFault(NamedTuple):
    """So many messages, what the service answers, and what then becomes of them."""

    count: int
    answers: dict[str, Sequence[AwsAnswer]]
    requests: Sequence[int]  # how many messages each has
    unsent: Sequence[int] = ()
    code: str = ""


SEND, SEND_BATCH = "SendMessage", "SendMessageBatch"
AT_FAULT = refuse(1, 9, code="Bad", ours=True)
BATCH_FAULTS = {
    "refused for now": BatchFault(
        4, {SEND_BATCH: [refuse(1, 3), refuse(1)]}, [4, 2, 1]
    ),
    "refused three times": BatchFault(
        10,
        {SEND_BATCH: [refuse(2, 5), *[refuse(0, 1)] * 2]},
        [10, 2, 2],
        [2, 5],
        "InternalError",
    ),
    "refused for good": BatchFault(
        25, {SEND_BATCH: [passed, AT_FAULT, passed]}, [10, 10, 5], [11, 19], "Bad"
    ),
    "not named by the answer": BatchFault(
        4, {SEND_BATCH: [first_alone] * 3}, [4, 3, 2], [3], "Unanswered"
    ),
    "the second request fails": BatchFault(
        25, {SEND_BATCH: [passed, DENY]}, [10, 10], range(10, 25), "AccessDenied"
    ),
    "the second attempt fails": BatchFault(
        3, {SEND_BATCH: [refuse(1)], SEND: [DENY]}, [3, 1], [1], "AccessDenied"
    ),
    "the sum is too long": BatchFault(
        4,
        {SEND_BATCH: [longer_than(0)], SEND: [passed, DENY, passed, passed]},
        [4, 1, 1, 1, 1],
        [1],
        "AccessDenied",
    ),
    "unknown": BatchFault(2, {SEND_BATCH: [fault("Odd")]}, [2], [0, 1], "Odd"),
}


class TestBatch:
    """batch() and dispatch_many() need few requests and raise exactly what failed."""

    def test_ten_to_a_call(self, scripted, mail):
        """Dispatches leave ten to a request, in order, when the block ends."""
        with taskhawk.batch():
            ids = [mail.dispatch(number) for number in range(12)]
            with taskhawk.batch():  # joins the outer one
                ids += [mail.dispatch(12)]
            mail.dispatch_many(range(13, 25))
            assert scripted.actions == []
        assert scripted.actions == ["GetQueueUrl", *["SendMessageBatch"] * 3]
        assert scripted.batches == [10, 10, 5]
        messages = [json.loads(message.body) for message in receive_all()]
        messages.sort(key=lambda message: message["args"][0])
        assert [message["args"] for message in messages] == [[n] for n in range(25)]
        assert [message["id"] for message in messages[:13]] == ids

    def test_one_or_none(self, aws, mail):
        """A block with one dispatch is one request, and a block with none is none."""
        with taskhawk.batch():
            pass
        assert aws.actions == []
        with taskhawk.batch():
            mail.dispatch()
        assert aws.actions == ["GetQueueUrl", "SendMessage"]

    def test_total_size(self, aws, mail):
        """A request may have 1 MiB, attributes included, and no byte more."""
        half, header = 524_288, {"trace": "é"}
        invocation = mail.with_headers(**header)
        with taskhawk.batch():
            for size in (half, half, half, half + 1, half, half):
                invocation.dispatch(filler(size, **header))
        assert aws.batches == [2, 1, 1, 2]

    def test_priorities_and_tasks(self, scripted, mail):
        """One block takes all tasks and priorities; each queue has its requests."""
        other = taskhawk.task(name="mail.other", priority=Priority.high)(plain)
        with taskhawk.batch():
            for number in range(8):
                mail.dispatch(number)
                other.with_headers(n=str(number)).dispatch(number)
        assert scripted.actions == ["GetQueueUrl", "SendMessageBatch"] * 2
        assert scripted.batches == [8, 8]
        for priority in (Priority.default, Priority.high):
            assert sorted(received_args(priority)) == list(range(8))

    def test_sns(self, aws, mail):
        """Over SNS, a request has ten messages at most and 256 KiB at most."""
        configure_aws(aws.url, "app", IS_LAMBDA_APP=True)
        with taskhawk.batch():
            for number in range(12):
                mail.dispatch(number)
            for number in (12, 13):
                mail.dispatch(number, "x" * 250_000)
        assert aws.actions == ["PublishBatch", "PublishBatch", "Publish"]
        assert aws.batches == [10, 3, 1]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_exception(self, sqlite, mail, error):
        """An exception inside sends nothing; later dispatches are sent at once."""

        def fail() -> None:
            with taskhawk.batch():
                mail.dispatch(0)
                with taskhawk.batch():
                    mail.dispatch(1)
                raise error

        with pytest.raises(error):
            fail()
        assert received_args() == []
        with taskhawk.batch():
            mail.dispatch(2)
            with pytest.raises(error):
                fail()
            assert received_args() == []
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

    # --- threads and tasks ---

    def test_thread(self, sqlite, mail):
        """A thread started inside has no part in the block: it sends directly."""
        with taskhawk.batch(), concurrent.futures.ThreadPoolExecutor(1) as pool:
            mail.dispatch("block")
            pool.submit(mail.dispatch, "thread").result(WORKER_PATIENCE_S)
            assert received_args() == ["thread"]
        assert received_args() == ["block"]

    def test_thread_with_context(self, sqlite, mail):
        """A thread in a copy of the context joins the block until it ends."""
        joined, ended = threading.Event(), threading.Event()

        def work() -> list[Any]:
            mail.dispatch("inside")
            joined.set()
            assert ended.wait(WORKER_PATIENCE_S)
            with taskhawk.batch():  # of its own, now
                mail.dispatch("after")
                mail.dispatch("after too")
                before = received_args()
            mail.dispatch("at last")
            return before

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            with taskhawk.batch():
                working = pool.submit(contextvars.copy_context().run, work)
                assert joined.wait(WORKER_PATIENCE_S)
                assert received_args() == []
            assert received_args() == ["inside"]
            ended.set()
            assert working.result(WORKER_PATIENCE_S) == []
        assert received_args() == ["after", "after too", "at last"]

    def test_race(self, sqlite, mail):
        """What threads dispatch while their block ends is sent once."""
        busy = threading.Barrier(5)

        def work(first: int) -> None:
            for number in range(first, first + 100):
                mail.dispatch(number)
                if number == first + 20:
                    busy.wait(WORKER_PATIENCE_S)

        pool = concurrent.futures.ThreadPoolExecutor(4)
        with taskhawk.batch():
            for first in (0, 100, 200, 300):
                pool.submit(contextvars.copy_context().run, work, first)
            busy.wait(WORKER_PATIENCE_S)
        pool.shutdown()
        assert sorted(received_args()) == list(range(400))

    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
    def test_fork(self, tmp_path, mail):
        """A process forked in a block sends directly, and leaves the block to its parent."""
        taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{tmp_path}/queue.db")

        parent = os.getpid()
        try:
            with taskhawk.batch():
                mail.dispatch("parent")
                child = os.fork()
                if child:
                    assert os.waitpid(child, 0)[1] == 0
                    assert received_args() == ["child", "block"]
                else:
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)
                    signal.alarm(WORKER_PATIENCE_S)
                    mail.dispatch("child")
                    with taskhawk.batch():  # of its own
                        mail.dispatch("block")
            if not child:
                os._exit(0)
        finally:
            if os.getpid() != parent:
                os._exit(1)
        assert received_args() == ["parent"]

    # --- what is not accepted ---

    @pytest.mark.slow
    @pytest.mark.parametrize("case", BATCH_FAULTS.values(), ids=BATCH_FAULTS)
    def test_faults(self, scripted, mail, case):
        """What the service fails at is sent again; what is unsent is raised."""
        count, answers, requests, unsent, code = case
        for action, script in answers.items():
            scripted.script(action, *script)
        failure = None
        try:
            with taskhawk.batch():
                ids = [mail.dispatch(number) for number in range(count)]
        except taskhawk.PartialFailure as error:
            failure = error
        assert scripted.batches == requests
        assert sorted(received_args()) == [n for n in range(count) if n not in unsent]
        if not unsent:
            assert failure is None
            return
        assert [message.args for message in failure.unsent] == [[n] for n in unsent]
        assert str(failure) == f"{len(unsent)} of {count} messages failed: {code}"
        assert failure.failure_count == len(unsent)
        assert failure.success_count == count - len(unsent)
        failed = [(entry["Id"], entry["Code"]) for entry in failure.result["Failed"]]
        assert failed == [(ids[number], code) for number in unsent]
        assert failure.result["Successful"] == [
            {"Id": sent} for number, sent in enumerate(ids) if number not in unsent
        ]

    def test_other_queues_go_on(self, aws, mail):
        """Where a request fails, other queues get theirs; entries have a remedy."""
        aws.script("SendMessageBatch", DENY)
        high = mail.with_priority(Priority.high)
        with pytest.raises(taskhawk.PartialFailure) as raised, taskhawk.batch():
            [task.dispatch(n) for task in (mail, high) for n in (0, 1)]
        assert str(raised.value) == "2 of 4 messages failed: AccessDenied"
        reasons = {entry["Message"] for entry in raised.value.result["Failed"]}
        reason = DENIED.format("SendMessage")
        assert reasons == {f"TASKHAWK-APP: {reason} (AccessDenied: no)"}
        assert aws.calls[-1].data["QueueUrl"].endswith("-HIGH-PRIORITY")

    def test_unsent_as_dispatched(self, aws, mail):
        """What is unsent is as it was dispatched, though the caller changed it."""
        aws.always("SendMessageBatch", refuse(0, 1, 2, code="Bad", ours=True))
        row: dict[str, int] = {}
        calls = (row.update(number=number) or (row,) for number in range(3))
        with pytest.raises(taskhawk.PartialFailure) as raised:
            mail.dispatch_many(calls)
        rows = [message.args for message in raised.value.unsent]
        assert rows == [[{"number": 0}], [{"number": 1}], [{"number": 2}]]

    def test_unsent_again(self, scripted, mail):
        """What is unsent can be published, with its priority, headers and delay."""
        scripted.script("SendMessageBatch", refuse(0, ours=True))
        invocation = mail.with_priority(Priority.high).with_headers(a="b").with_delay(7)
        with pytest.raises(taskhawk.PartialFailure) as raised, taskhawk.batch():
            ids = [invocation.dispatch(number) for number in range(2)]
        with taskhawk.batch():
            assert [*map(taskhawk.publish, raised.value.unsent)] == ids[:1]
        (sent,) = scripted.asked("SendMessage")
        assert (sent["DelaySeconds"], [*sent["MessageAttributes"]]) == (7, ["a"])
        assert sent["QueueUrl"].endswith("-HIGH-PRIORITY")
        assert json.loads(sent["MessageBody"])["args"] == [0]

    def test_pinned_queue(self, scripted, mail):
        """Only the message that is too large for its queue is refused."""
        for action in (SEND, SEND_BATCH):
            scripted.always(action, longer_than(262_144))
        sizes = enumerate([100_000, 100_000, 300_000, 100_000])
        with pytest.raises(taskhawk.PartialFailure) as raised, taskhawk.batch():
            [mail.dispatch(number, "x" * size) for number, size in sizes]
        assert [message.args[0] for message in raised.value.unsent] == [2]
        assert sorted(received_args()) == [0, 1, 3]

    def test_sync(self):
        """In sync mode the tasks run in order when the block ends, up to an error."""
        ran = []

        @taskhawk.task(name="sync.note")
        def note(number):
            ran.append(number)
            if number == 1:
                note.dispatch(10)  # no block is open any more
            if number == 12:
                raise ZeroDivisionError

        taskhawk.configure(TASKHAWK_SYNC=True)
        with taskhawk.batch():
            for number in range(3):
                note.dispatch(number)
            assert ran == []
        assert ran == [0, 1, 10, 2]
        assert note.dispatch_many([5]) == 1
        with pytest.raises(ZeroDivisionError):
            note.dispatch_many(range(11, 20))
        assert ran[4:] == [5, 11, 12]

    # --- dispatch_many() ---

    def test_dispatch_many(self, sqlite, mail):
        """A call is a tuple or dict of arguments, or its only argument."""
        calls = {
            (): ([], {}),
            (1,): ([1], {}),
            ("a", "b"): (["a", "b"], {}),
            "text": (["text"], {}),
            None: ([None], {}),
            5: ([5], {}),
        }
        others = [{}, {"text": "c"}, [1, 2]]
        assert mail.dispatch_many([]) == 0
        assert mail.dispatch_many([*calls, *others]) == 9
        messages = [json.loads(message.body) for message in receive_all()]
        expected = [*calls.values(), ([], {}), ([], {"text": "c"}), ([[1, 2]], {})]
        assert [(data["args"], data["kwargs"]) for data in messages] == expected
        assert len({message["id"] for message in messages}) == 9

    @pytest.mark.parametrize(
        ("wrong", "sentence"),
        [
            ((1, 2, 3, 4), "mail.send: too many positional arguments"),
            (b"x", "mail.send: args[0] is not JSON: bytes is not a JSON type"),
        ],
    )
    def test_dispatch_many_names_the_call(self, sqlite, mail, wrong, sentence):
        """An error about a call has a note that says which one it is."""
        with pytest.raises((TypeError, taskhawk.ValidationError)) as caught:
            mail.dispatch_many([1, wrong])
        assert str(caught.value) == sentence
        note = "This is call 1 of dispatch_many(), from 0."
        assert caught.value.__notes__ == [note]
        assert receive_all() == []

    def test_dispatch_many_options(self, aws, mail):
        """An invocation's headers, priority and delay are those of each message."""
        invocation = mail.with_priority(Priority.high).with_headers(a="b").with_delay(5)
        assert invocation.dispatch_many(range(12)) == 12
        assert aws.batches == [10, 2]
        for request in aws.asked("SendMessageBatch"):
            assert request["QueueUrl"].endswith("-HIGH-PRIORITY")
            for entry in request["Entries"]:
                assert entry["DelaySeconds"] == 5
                assert json.loads(entry["MessageBody"])["headers"] == {"a": "b"}

    def test_dispatch_many_is_lazy(self, sqlite, mail):
        """At most ten messages wait in memory, each as it was when it was read."""
        row = []

        def rows() -> Iterator[Any]:
            for number in range(95):
                assert sqlite.depth("TASKHAWK-DEFAULT").visible == number // 10 * 10
                row[:] = [number]
                yield row

        assert mail.dispatch_many(rows()) == 95
        assert received_args() == [[number] for number in range(95)]

    @pytest.mark.parametrize("bad", [{1}, ZeroDivisionError, StopIteration])
    def test_dispatch_many_stops(self, sqlite, mail, bad):
        """A call that can't be made ends it; full tens were sent before."""

        def numbers() -> Iterator[Any]:
            yield from range(13)
            if bad is ZeroDivisionError:
                raise bad
            yield bad
            pytest.fail("read on")

        headers = iter([{}] * 13)
        if bad is StopIteration:
            taskhawk.configure(
                TASKHAWK_BROKER="sqlite://",
                TASKHAWK_DEFAULT_HEADERS=lambda **_: next(headers),
            )
        with pytest.raises(TypeError if bad == {1} else bad):
            mail.dispatch_many(numbers())
        assert received_args() == list(range(10))

    def test_dispatch_many_refused(self, scripted, mail):
        """What is not accepted ends it too, and says exactly what it was."""
        numbers = iter(range(35))
        scripted.script("SendMessageBatch", passed, refuse(4, ours=True))
        with pytest.raises(taskhawk.PartialFailure) as raised:
            mail.dispatch_many(numbers)
        assert [message.args for message in raised.value.unsent] == [[14]]
        assert next(numbers) == 20
        assert sorted(received_args()) == [n for n in range(20) if n != 14]


def sha256(text: str) -> str:
    """Return the group that stands for a text that SQS does not take."""
    return f"sha256:{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()}"


#: Keys of groups, and the group ids that they stand for.
GROUP_KEYS = {
    7: "7",
    -1: "-1",
    "7": "7",
    "customer-7": "customer-7",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~": "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "x" * 128: "x" * 128,
    "x" * 129: sha256("x" * 129),
    "Müller": sha256("Müller"),
    "Smith & Sons": sha256("Smith & Sons"),
    "line\n": sha256("line\n"),
    "\ud800": sha256("\ud800"),
    "": sha256(""),
}


def ship(order, customer="nobody", *, to=None, **more):
    """Do nothing."""


def with_metadata(metadata, customer):
    """Do nothing."""


#: The option `group` of ship(), the arguments of a call, and its group.
GROUP_OPTIONS = [
    (None, (1,), {}, None),
    ("customer", (1, "a"), {}, "a"),
    ("customer", (1,), {"customer": 7}, "7"),
    ("customer", (1,), {}, "nobody"),
    ("customer", (1, None), {}, None),
    ("order", (1,), {}, "1"),
    ("to", (1,), {"to": "b c"}, sha256("b c")),
    ("to", (1,), {}, None),
    ("tenant", (1,), {"tenant": "t"}, "t"),
    ("tenant", (1,), {}, None),
    (lambda order, **_: f"order-{order}", (1,), {"customer": "a"}, "order-1"),
    (lambda *_, **__: None, (1,), {}, None),
]


class TestGroupKeys:
    """What groups messages: an invocation's key, or what the task's option says."""

    @pytest.mark.parametrize("key", GROUP_KEYS)
    def test_keys(self, mail, key):
        """Any key is one that SQS takes; the same key is always the same group."""
        with taskhawk.capture() as calls:
            mail.with_group(key).dispatch()
        assert [call.group_id for call in calls] == [GROUP_KEYS[key]]
        assert re.fullmatch(r"[!-~]{1,128}", GROUP_KEYS[key])

    @pytest.mark.parametrize("key", [None, True, 1.5, ["a"], b"a"])
    def test_no_keys(self, mail, key):
        """What is neither a string nor an int is refused, and not shown."""
        kind = type(key).__name__
        sentence = f"group: expected a string or an int, got {kind}"
        assert refused(mail.with_group, key, error=TypeError) == sentence
        task = taskhawk.task(name="g.h", group="customer")(ship)
        if key is not None:
            call = (task.dispatch, 1, [key])
            sentence = "g.h: group: expected a string or an int, got list"
            assert refused(*call, error=TypeError) == sentence

    def test_invocations(self, sqlite, mail):
        """An invocation with a group is another one, and has all else that it had."""
        one = mail.with_headers(a="b").with_group("g")
        two = one.with_group("h").with_priority(Priority.high)
        for invocation in (one, two, mail.with_group("i").with_delay(0)):
            invocation.dispatch()
        groups = [message.group_id for message in receive_all()]
        (high,) = receive_all(Priority.high)
        assert (sorted(groups), high.group_id) == (["g", "i"], "h")
        assert json.loads(high.body)["headers"] == {"a": "b"}

    @pytest.mark.parametrize(("group", "args", "kwargs", "expected"), GROUP_OPTIONS)
    def test_option(self, group, args, kwargs, expected):
        """A task's option names the argument that is the group, or is a function of all."""
        task = taskhawk.task(name="g.ship", group=group)(ship)
        with taskhawk.capture() as calls:
            task.dispatch(*args, **kwargs)
            task.dispatch_many([(*args,)])
            task.with_group("own").dispatch(*args, **kwargs)
        assert (calls[0].group_id, calls[2].group_id) == (expected, "own")

    @pytest.mark.parametrize(
        ("fn", "group"),
        [
            (plain, "customer"),
            (with_metadata, "metadata"),
            (ship, 7),
            (plain, ["value"]),
            (ship, "headers"),
        ],
    )
    def test_wrong_option(self, fn, group):
        """An option that names no argument is refused where it is declared."""
        assert refused(taskhawk.task(name="g.f", group=group), fn) == (
            f"g.f has group={group!r}: expected the name of one of its arguments, or a"
            " function of its arguments"
        )
        assert "g.f" not in taskhawk._registry

    def test_fifo(self, aws, mail):
        """On a FIFO queue a message is deduplicated by its id; without a group, it is its own."""
        taskhawk.configure(taskhawk.settings.given, TASKHAWK_FIFO=True)
        ids = [mail.dispatch(), mail.with_group("g").dispatch()]
        strange = Message.new("mail.send", msg_id="an id")
        taskhawk.publish(strange)
        sent = [
            (call["MessageGroupId"], call["MessageDeduplicationId"])
            for call in aws.asked("SendMessage")
        ]
        own = sha256("an id")
        assert sent == [(ids[0], ids[0]), ("g", ids[1]), (own, own)]
        assert aws.asked("GetQueueUrl") == [{"QueueName": "TASKHAWK-APP.fifo"}]

    def test_standard(self, aws, mail):
        """On a standard queue there is no deduplication, and no group unless one is given."""
        mail.dispatch()
        mail.with_group("g").dispatch()
        one, two = aws.asked("SendMessage")
        assert "MessageGroupId" not in one
        assert two["MessageGroupId"] == "g"
        assert "MessageDeduplicationId" not in {**one, **two}

    @pytest.mark.parametrize("url", ["sqs", "sqlite://"])
    def test_delays(self, aws, mail, url):
        """A FIFO queue can't delay a message: that is refused before anything is sent."""
        given = taskhawk.settings.given
        taskhawk.configure(given, TASKHAWK_FIFO=True, TASKHAWK_BROKER=url)
        assert refused(mail.with_delay(1).dispatch) == (
            "mail.send: a FIFO queue can't delay a message: leave the delay out, or use a"
            " queue without TASKHAWK_FIFO"
        )
        with taskhawk.capture() as calls:
            assert refused(mail.with_delay(1).dispatch).startswith("mail.send: a FIFO")
        assert calls == []
        mail.with_delay(0).dispatch()
        assert [a for a in aws.actions if a != "GetQueueUrl"] == ["SendMessage"] * (
            url == "sqs"
        )

    def test_unsent(self, aws, mail):
        """What was not accepted keeps its group; what follows of the group was not sent."""
        taskhawk.configure(taskhawk.settings.given, TASKHAWK_FIFO=True)
        aws.script("SendMessageBatch", refuse(8, 9, ours=True), None)
        batch = taskhawk.batch()
        batch.__enter__()
        for number in range(11):
            mail.with_group("g").dispatch(number)
        mail.with_group("h").dispatch("other")
        with pytest.raises(taskhawk.PartialFailure) as caught:
            batch.__exit__(None, None, None)
        failure = caught.value
        assert [message.args for message in failure.unsent] == [[8], [9], [10]]
        assert [message.group_id for message in failure.unsent] == ["g"] * 3
        codes = [entry["Code"] for entry in failure.result["Failed"]]
        assert codes == ["InternalError"] * 2 + ["GroupStopped"]
        for message in failure.unsent:
            taskhawk.publish(message)
        again = aws.asked("SendMessage")[1:]
        assert [call["MessageGroupId"] for call in again] == ["g"] * 3
        ids = [message.id for message in failure.unsent]
        assert [call["MessageDeduplicationId"] for call in again] == ids

    def test_sync(self, sync):
        """Sync mode runs a message of a group as any other."""
        runs = []
        taskhawk.configure(TASKHAWK_SYNC=True, TASKHAWK_FIFO=True)
        task = taskhawk.task(name="g.run", group="key")(lambda_of(runs))
        task.dispatch("x y")
        assert runs == ["x y"]


def lambda_of(runs: list[Any]) -> Any:
    """Return a function that notes its argument."""

    def run(key: Any) -> None:
        runs.append(key)

    return run


class TestCapture:
    """capture() collects what would be sent, as the worker would get it."""

    @pytest.mark.parametrize("sync", [False, True])
    def test_collects(self, sync):
        """Each dispatch is there, in order, whatever way it takes; nothing runs."""

        @taskhawk.task(name="mail.send")
        def send(to, at=None):
            pytest.fail("ran")

        if sync:  # else nothing is configured
            taskhawk.configure(TASKHAWK_SYNC=True)
        high = send.with_headers(a="1").with_priority(Priority.high).with_delay(60)
        with taskhawk.capture() as calls:
            message_id = high.dispatch("x", at=Decimal("1.5"))
            with taskhawk.batch():
                send.dispatch("y")
            send.dispatch_many(["z"])
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                pool.submit(send.dispatch, "thread")
        assert calls[0] == taskhawk.Captured(
            "mail.send", ["x"], {"at": 1.5}, {"a": "1"}, Priority.high, 60, message_id
        )
        assert [call.args for call in calls] == [["x"], ["y"], ["z"], ["thread"]]

    def test_refuses(self, mail):
        """What can't be sent raises as it does for real, and is not there."""
        with taskhawk.capture() as calls:
            for error, dispatch, *args in (
                (TypeError, mail.dispatch, 1, 2, 3),
                (taskhawk.ValidationError, mail.dispatch, math.nan),
                (taskhawk.MessageTooLarge, mail.dispatch, "x" * 1_048_576),
            ):
                assert refused(dispatch, *args, error=error)
        assert calls == []

    def test_ends(self, sqlite, mail):
        """The inner of two has its own list; after the end, messages are sent."""
        with contextlib.suppress(ZeroDivisionError), taskhawk.capture() as outer:
            with taskhawk.capture() as inner:
                mail.dispatch("inner")
            mail.dispatch("outer")
            raise ZeroDivisionError
        assert [call.args for call in inner] == [["inner"]]
        assert [call.args for call in outer] == [["outer"]]
        mail.dispatch("sent")
        assert received_args() == ["sent"]


#: a user's program: each line with "# wrong" is an error, and no other is
TYPED_PROGRAM = """
import datetime
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

IMPORT taskhawk
from PACKAGE import Priority

P = ParamSpec("P")
R = TypeVar("R")
GIVEN: Any = None  # what the worker gives


@taskhawk.task
def send(to: str, subject: str, from_email: str | None = None) -> None: ...


@taskhawk.task(priority=Priority.high, retry=taskhawk.fixed(5), time_limit=60)
async def charge(customer: int, *, cents: int) -> str:
    return f"{customer} {cents}"


@taskhawk.task
def audit(
    event: str,
    metadata: taskhawk.Metadata = GIVEN,
    headers: dict[str, Any] = GIVEN,
) -> int:
    return metadata.attempt + len(headers)


@taskhawk.task
def load(rows: dict[str, Any]) -> None: ...


@taskhawk.task(batch=50)
def index(calls: list[taskhawk.Call]) -> None: ...


def with_session(fn: Callable[Concatenate[str, P], R]) -> Callable[P, R]:
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return fn("a session", *args, **kwargs)

    return call


@taskhawk.task(name="rename")
@with_session
def rename(session: str, user: int) -> None: ...


def right() -> str:
    urgent = send.with_headers(request_id="1").with_priority(Priority.high)
    urgent.with_delay(datetime.timedelta(seconds=5)).dispatch("a", subject="b")
    send.with_delay(5).dispatch("a", "b", from_email=None)
    send.with_priority(Priority.low).dispatch_many([("a", "b"), {"to": "a"}])
    send("a", "b")
    audit.dispatch("login")
    load.dispatch({"a": 1})
    rename.dispatch(7)
    rename.dispatch(user=7)
    with taskhawk.batch():
        charge.dispatch(7, cents=5)
    return send.dispatch("a", "b")


async def right_too() -> str:
    index.dispatch(7)
    await send.with_headers(a=1).dispatch_async("a", "b")
    text: str = await charge.dispatch_async(7, cents=5)
    return text + await charge(7, cents=5)


def wrong() -> None:
    send.dispatch("a")  # wrong
    send.dispatch(1, "b")  # wrong
    send.dispatch("a", "b", to_email="c")  # wrong
    send("a")  # wrong
    charge.dispatch(7, 5)  # wrong
    charge.dispatch(7, cents="5")  # wrong
    charge.with_headers(a=1).dispatch("7", cents=5)  # wrong
    charge.with_priority(Priority.low).with_delay(5).dispatch(7)  # wrong
    send.with_priority("high")  # wrong
    send.with_delay("5")  # wrong
    audit.dispatch(5)  # wrong
    load.dispatch()  # wrong
    rename.dispatch("a session", 7)  # wrong
    number: int = send.dispatch("a", "b")  # wrong
    print(number)


@taskhawk.task(priority=5)  # wrong
def late() -> None: ...


@taskhawk.task(no_option=5)  # wrong
def later() -> None: ...


async def wrong_too() -> None:
    text: int = await charge(7, cents=5)  # wrong
    await send.dispatch_async("a")  # wrong
    await charge.with_group("a").dispatch_async(7, 5)  # wrong
    print(text)
"""
TYPED_PLACES = {  # where taskhawk is, and how it is imported
    "installed": ("import", "taskhawk"),
    "vendored": ("from service.vendor import", "service.vendor.taskhawk"),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", TYPED_PLACES)
class TestTyping:
    """A type checker knows a task's arguments, and what comes of calling it."""

    @pytest.fixture
    def folder(self, place, tmp_path):
        """Return a folder with the program, and an interpreter that has taskhawk."""
        statement, package = TYPED_PLACES[place]
        code = TYPED_PROGRAM.replace("IMPORT", statement).replace("PACKAGE", package)
        (tmp_path / "jobs.py").write_text(code.lstrip())
        venv.create(tmp_path / "venv")
        (home,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
        if place == "vendored":
            home = vendor_package(tmp_path).parent
        shutil.copy(taskhawk.__file__, home / "taskhawk.py")
        return tmp_path

    @staticmethod
    def check(folder, module, *options):
        """Assert that a checker finds what is wrong in the program, and nothing else."""
        result = run_python(["-m", module, *options, "jobs.py"], cwd=folder)
        found = {
            int(line) for line in re.findall(r"jobs\.py:(\d+):.*error", result.stdout)
        }
        lines = (folder / "jobs.py").read_text().splitlines()
        wrong = {number for number, line in enumerate(lines, 1) if "# wrong" in line}
        assert found == wrong, result.stdout

    def test_mypy(self, folder):
        """The strict mode of mypy, with the two lines that README says for a pip install."""
        ini = "[mypy]\nstrict = true\n[mypy-taskhawk]\nfollow_untyped_imports = true\n"
        (folder / "mypy.ini").write_text(ini)
        self.check(folder, "mypy", "--python-executable", "venv/bin/python")

    def test_pyright(self, folder):
        """The strict mode of pyright, which can't be told that an installed file has types."""
        pytest.importorskip("basedpyright")
        config = {"typeCheckingMode": "strict", "reportMissingTypeStubs": False}
        (folder / "pyrightconfig.json").write_text(json.dumps(config))
        self.check(folder, "basedpyright", "--pythonpath", "venv/bin/python")


# --- dispatches that share requests ---


class SharingMachine(hypothesis.stateful.RuleBasedStateMachine):
    """Dispatches, calls and pauses in any order; no thread, no sleep, no I/O."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.count = 1000.0, 0
        self.waiting: list[Any] = []  # in the order of their dispatches
        self.under_way: dict[int, list[Any]] = {}

    @hypothesis.stateful.initialize(
        max_calls=st.sampled_from([1, 2, 16]), max_bytes=st.sampled_from([25, 10**6])
    )
    def begin(self, max_calls: int, max_bytes: int) -> None:
        """Draw a destination's limits."""
        self.max_calls, self.max_bytes = max_calls, max_bytes
        self.sharing = taskhawk._Sharing(max_bytes, max_calls)

    @hypothesis.stateful.rule(size=st.integers(1, 30))
    def dispatch(self, size: int) -> None:
        """Dispatch: alone where nothing is in the way, else wait."""
        self.count += 1
        parcel = taskhawk._Parcel(Outgoing("x" * size, {}))
        if self.sharing.enter(self.count, parcel, self.now):
            assert not self.waiting
            assert not self.under_way
            self.under_way[self.count] = [parcel]
        else:
            self.sharing.add(parcel, self.now)
            self.waiting.append(parcel)

    @hypothesis.stateful.precondition(lambda self: self.sharing.is_due(self.now))
    @hypothesis.stateful.rule()
    def call(self) -> None:
        """Begin the call that is due: it has the next messages, up to the limits."""
        self.count += 1
        parcels = self.sharing.begin(self.count, self.now)
        here = [parcel for parcel in self.waiting if not parcel.is_left]
        assert parcels == here[: len(parcels)]
        size = sum(parcel.size for parcel in parcels)
        assert size <= self.max_bytes or len(parcels) == 1
        is_full = len(parcels) == 10
        if len(here) > len(parcels):
            is_full |= size + here[len(parcels)].size > self.max_bytes
            assert is_full
        assert is_full or not self.under_way or self.now >= here[0].since + 0.2
        self.waiting = here[len(parcels) :]
        self.under_way[self.count] = parcels
        assert len(self.under_way) <= self.max_calls

    @hypothesis.stateful.precondition(lambda self: self.under_way)
    @hypothesis.stateful.rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """End a call: it is told whose it was, once."""
        thread = data.draw(st.sampled_from([*self.under_way]))
        assert self.sharing.end(thread, self.now) == self.under_way.pop(thread)
        assert self.sharing.end(thread, self.now) == ()
        if not self.waiting and not self.under_way:
            assert self.sharing.due_at() == math.inf

    @hypothesis.stateful.precondition(lambda self: self.waiting)
    @hypothesis.stateful.rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Interrupt a dispatch: its message is not sent."""
        data.draw(st.sampled_from(self.waiting)).is_left = True

    @hypothesis.stateful.rule()
    def sweep(self) -> None:
        """Forget the messages that are left, and no other."""
        self.waiting = [parcel for parcel in self.waiting if not parcel.is_left]
        self.sharing.sweep()
        assert self.sharing.waiting == self.waiting

    @hypothesis.stateful.precondition(lambda self: self.waiting)
    @hypothesis.stateful.rule()
    def give_up(self) -> None:
        """Let nobody wait any more."""
        given_up = [each for each in self.sharing.give_up() if not each.is_left]
        assert given_up == [each for each in self.waiting if not each.is_left]
        self.waiting = []

    @hypothesis.stateful.rule(pause_s=st.sampled_from([0.0001, 0.001, 0.01, 0.1]))
    def sleep(self, pause_s: float) -> None:
        """Let time pass."""
        self.now += pause_s

    @hypothesis.stateful.invariant()
    def nobody_waits_for_long(self) -> None:
        """What waits is due within 0.2 s, where another call may be made."""
        here = [parcel for parcel in self.waiting if not parcel.is_left]
        due_at = self.sharing.due_at()
        if not here or len(self.under_way) == self.max_calls:
            assert due_at == math.inf
            assert not self.sharing.is_due(self.now + 1)
            return
        assert due_at <= here[0].since + 0.2
        assert self.sharing.is_due(max(due_at, self.now))
        if not self.under_way:
            assert due_at <= self.now + 0.002


TestSharingMachine = SharingMachine.TestCase
TestSharingMachine.settings = hypothesis.settings(
    max_examples=60, stateful_step_count=60, deadline=None
)


class SharedSender(taskhawk.Sender):
    """Keeps the bodies of each call; then does in it what the test wants."""

    max_bytes, max_delay_s, shared_calls = 1000, 0, 16

    def __init__(self, during: Callable[[list[str]], Any] = passed) -> None:
        self.calls: list[list[str]] = []
        self.during = during

    def send(self, destination, entries):
        bodies = [entry.body for entry in entries]
        self.calls.append(bodies)
        return self.during(bodies) or []

    def close(self):
        """Have nothing to close."""


class Dispatches:
    """Dispatches to one destination, and what each ended with: "sent", or its error."""

    def __init__(self, sender: Any, destination: str = "Q") -> None:
        self.sender, self.destination = sender, destination
        self.lane = taskhawk._Lane(sender, destination, set())
        self.ends: dict[str, Any] = {}
        self.threads: list[threading.Thread] = []

    def ready(self, body: str) -> Any:
        """Return a message with this body."""
        message = Message(json.loads(processing_body()))
        return taskhawk._Ready(
            message, self.sender, self.destination, Outgoing(body, {})
        )

    def send(self, body: str) -> None:
        """Dispatch in this thread."""
        try:
            self.lane.send(self.ready(body))
        except BaseException as error:
            self.ends[body] = error
        else:
            self.ends[body] = "sent"

    def start(self, *bodies: str) -> None:
        """Dispatch in threads, one after another, until each of them waits."""
        for body in bodies:
            self.threads.append(
                threading.Thread(target=self.send, args=[body], daemon=True)
            )
            self.threads[-1].start()
            worker_eventually(functools.partial(self.has_come, body))

    def has_come(self, body: str) -> bool:
        """Return whether a dispatch waits, is being sent, or has ended."""
        waiting = [parcel.entry.body for parcel in self.lane._sharing.waiting]
        return body in (*waiting, *itertools.chain(*self.sender.calls), *self.ends)

    def wait(self) -> dict[str, Any]:
        """Wait for the threads, and return how all dispatches ended."""
        for thread in self.threads:
            thread.join(WORKER_PATIENCE_S)
            assert not thread.is_alive(), self.ends
        return self.ends


class Fault:
    """A trace function that raises KeyboardInterrupt at one line of what shares requests.

    Not where a `with` is left or a `try` begins: Python handles no signal there, and has
    not entered, or has left, the block whose end releases the lock.
    """

    def __init__(self, line: int, thread: str = "") -> None:
        self.left, self.thread = line, thread
        self.entered: set[tuple[Any, int]] = set()

    def __call__(self, frame: Any, event: str, _arg: object) -> Any:
        """Count a line; raise at the one that is wanted."""
        code = frame.f_code
        if code.co_filename != taskhawk.__file__ or not re.match(
            r"_(Lane|Sharing)\.", code.co_qualname
        ):
            return None
        if self.thread and threading.current_thread().name != self.thread:
            return None
        if event == "line" and not self.is_between(frame):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def is_between(self, frame: Any) -> bool:
        """Return whether this is a `with` that is being left, or a `try`."""
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        key = (frame, frame.f_lineno)
        is_again = key in self.entered
        self.entered.add(key)
        if line.strip() == "try:":
            return True
        return line.strip().startswith("with ") and is_again


def interrupted_first(
    dispatches: Dispatches, fault: Any = None, fails: bool = False
) -> None:
    """Interrupt the dispatch that sends by itself, while others wait for it."""

    def during(bodies: list[str]) -> None:
        if bodies == ["0"]:
            dispatches.start("a", "b")
            if fails:
                raise ValueError

    dispatches.sender.during = during
    with traced(fault):
        dispatches.send("0")
    if not dispatches.threads:  # it did not come so far
        dispatches.start("a", "b")


def interrupted_follower(
    dispatches: Dispatches, fault: Any = None, fails: bool = False
) -> None:
    """Interrupt a dispatch that waits, while others wait for the same call."""
    others_wait = threading.Event()

    def during(bodies: list[str]) -> None:
        if bodies == ["0"]:
            assert others_wait.wait(WORKER_PATIENCE_S)
            if fails:
                raise ValueError

    def follow() -> None:
        worker_eventually(lambda: dispatches.has_come("x"))
        dispatches.start("a", "b")
        others_wait.set()

    dispatches.sender.during = during
    dispatches.start("0")
    following = threading.Thread(target=follow)
    following.start()
    with traced(fault):
        dispatches.send("x")
    following.join()


@contextlib.contextmanager
def traced(fault: Any) -> Iterator[None]:
    """Trace this thread, inside the block."""
    before = sys.gettrace()
    if fault:
        sys.settrace(fault)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.fixture
def patience(monkeypatch):
    """Let no message be sent only because it has waited for long."""
    monkeypatch.setattr(taskhawk, "_SHARE_WITHIN_S", 1000)


@pytest.fixture
def slow_aws(aws):
    """Return a server whose answers taskhawk waits for as long as any test needs."""
    configure_aws(aws.url, "app", AWS_READ_TIMEOUT_S=WORKER_PATIENCE_S)
    return aws


@pytest.fixture
def company(slow_aws, mail, patience):
    """Return a server with a function that dispatches three messages while one is sent.

    It returns how each of the three ended: None, or an error.
    """

    def caller(number: int) -> None:
        mail.dispatch(number)

    def dispatch(alone: Sequence[AwsAnswer]) -> list[BaseException | None]:
        go, ends = threading.Event(), []
        slow_aws.script("SendMessage", late(go), *alone)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            ends.append(pool.submit(caller, 0))
            worker_eventually(lambda: slow_aws.batches == [1])
            (lane,) = taskhawk._lanes.get().lanes.values()
            for number in (1, 2, 3):
                ends.append(pool.submit(caller, number))
                worker_eventually(lambda: len(lane._sharing.waiting) == len(ends) - 1)
            go.set()
            first, *others = [each.exception(WORKER_PATIENCE_S) for each in ends]
        assert first is None
        return others

    slow_aws.dispatch = dispatch
    return slow_aws


class TestSharing:
    """Dispatches that run at the same time share requests; each has its own result."""

    def test_alone(self, aws, mail):
        """One dispatch after another is one request each, and starts no thread."""
        threads = threading.active_count()
        for number in range(5):
            mail.dispatch(number)
        assert aws.batches == [1] * 5
        assert not [t for t in threading.enumerate() if "dispatch" in t.name]
        assert threads <= threading.active_count()

    def test_threads(self, slow_aws, mail, patience):
        """Those that find a call under way share the next; ten wait for no call."""
        go = threading.Event()
        slow_aws.script("SendMessage", late(go))
        with concurrent.futures.ThreadPoolExecutor(13) as pool:
            first = pool.submit(mail.dispatch, 0)
            worker_eventually(lambda: slow_aws.batches == [1])
            ids = [pool.submit(mail.dispatch, number) for number in range(1, 13)]
            worker_eventually(lambda: slow_aws.batches == [1, 10])
            assert not first.done()
            go.set()
            assert len({each.result() for each in [first, *ids]}) == 13
        assert slow_aws.batches == [1, 10, 2]
        sent = [
            entry for each in slow_aws.asked(SEND_BATCH) for entry in each["Entries"]
        ]
        sent += slow_aws.asked(SEND)
        assert sent_texts(entry["MessageBody"] for entry in sent) == [*range(13)]

    def test_requests(self, aws, mail):
        """Threads that dispatch all the time make one request for several messages."""
        aws.always("SendMessage", late(0.01))
        aws.always("SendMessageBatch", late(0.01))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(mail.dispatch, range(160)))
        assert sum(aws.batches) == 160
        assert len(aws.batches) <= 80  # 25 on a machine that does nothing else

    def test_size(self, patience):
        """A call has no more bytes than the service takes, and is full with them."""
        sender = SharedSender()
        dispatches = Dispatches(sender)
        others = [letter * 400 for letter in list("abcd")]
        sender.during = lambda bodies: bodies == ["0"] and dispatches.start(*others)
        dispatches.send("0")
        assert set(dispatches.wait().values()) == {"sent"}
        assert sender.calls == [["0"], others[:2], others[2:]]

    def test_full_at_once(self, patience):
        """Of two full calls that are due at once, neither waits for the other."""
        dispatches = Dispatches(SharedSender())
        calls = dispatches.sender.calls
        dispatches.sender.during = lambda _: (
            worker_eventually(lambda: len(calls) == 2) and []
        )
        for body in "abcdefghijklmnopqrs":  # as coroutines do before a helper looks
            parcel = taskhawk._Parcel(Outgoing(body, {}))
            dispatches.lane._sharing.add(parcel, time.monotonic())
        dispatches.send("t")
        assert dispatches.ends == {"t": "sent"}
        bodies = sorted("".join(call) for call in calls)
        assert bodies == ["abcdefghij", "klmnopqrst"]

    def test_patience(self):
        """A call that hangs holds others up for a moment only."""
        sender = SharedSender()
        dispatches = Dispatches(sender)

        def during(bodies: list[str]) -> None:
            if bodies == ["0"]:
                dispatches.start("a", "b")
                worker_eventually(lambda: len(dispatches.ends) == 2)

        sender.during = during
        dispatches.send("0")
        assert dispatches.wait() == dict.fromkeys("ab0", "sent")

    @pytest.mark.parametrize(
        ("destination", "calls"),
        [("Q", ["0", "abcdefghij", "k"]), ("Q.fifo", ["0", "abcdefghij", "k"])],
    )
    def test_order(self, patience, destination, calls):
        """Messages are sent in the order of their dispatches; on FIFO, one call at a time."""
        sender, most = SharedSender(), []
        dispatches = Dispatches(sender, destination)

        def during(bodies: list[str]) -> None:
            most.append(len(dispatches.lane._sharing.under_way))
            if bodies == ["0"]:
                dispatches.start(*"abcdefghijk")
                if destination == "Q":  # a full call waits for none
                    worker_eventually(lambda: len(sender.calls) == 2)

        sender.during = during
        dispatches.send("0")
        assert set(dispatches.wait().values()) == {"sent"}
        assert ["".join(call) for call in sender.calls] == calls
        assert max(most) == (1 if destination == "Q.fifo" else 2)

    @pytest.mark.parametrize(
        ("answers", "requests", "ends"),
        [
            pytest.param(
                [refuse(1, code="Bad", ours=True), [passed]],
                [1, 3, 1],
                ["", "", ""],
                id="refused, then accepted alone",
            ),
            pytest.param(
                [refuse(1, 2), [fault("Odd", "no"), passed]],
                [1, 3, 1, 1],
                ["", "ClientError", ""],
                id="refused, then alone too",
            ),
            pytest.param(
                [DENY, []],
                [1, 3],
                ["ConfigurationError"] * 3,
                id="denied",
            ),
            pytest.param([fault("Odd"), []], [1, 3], ["ClientError"] * 3, id="unknown"),
            pytest.param(
                [BATCH_TOO_LONG, [passed] * 3], [1, 3, 1, 1, 1], [""] * 3, id="long"
            ),
        ],
    )
    def test_shared_faults(self, company, answers, requests, ends):
        """What was refused in company is sent alone; an error of a call is everyone's."""
        in_batch, alone = answers
        company.script("SendMessageBatch", in_batch)
        found = company.dispatch(alone)
        assert company.batches == requests
        errors = [error for error in found if error]
        names = ["" if e is None else type(e).__name__ for e in found]
        assert sorted(names) == sorted(ends)
        assert len({id(error) for error in errors}) == len(errors)
        assert len({(str(e), taskhawk._error_code(e)) for e in errors}) <= 1
        for error in errors:  # its own caller's traceback, down to the call
            frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
            assert frames.count("caller") == frames.count("call") == 1

    def test_too_large_for_the_queue(self, patience):
        """A queue's lower limit is told to whose message it is, and to nobody else."""
        sender = SharedSender()
        dispatches = Dispatches(sender)

        def during(bodies: list[str]) -> None:
            if bodies == ["0"]:
                dispatches.start("a", "bbbbb")
            if any(len(body) > 4 for body in bodies):
                raise taskhawk.MessageTooLarge("too large", 4)

        sender.during = during
        dispatches.send("0")
        ends = dispatches.wait()
        assert str(ends.pop("bbbbb")) == (
            "mail.send: the message has 5 bytes (body and attributes), and the limit"
            " is 4"
        )
        assert ends == {"0": "sent", "a": "sent"}

    def test_error_without_a_copy(self, patience):
        """An error that can't be copied is raised all the same."""

        class Odd(Exception):
            def __reduce__(self):
                raise TypeError

        def during(bodies: list[str]) -> None:
            if bodies == ["0"]:
                dispatches.start("a", "b")
            else:
                raise Odd

        sender = SharedSender(during)
        dispatches = Dispatches(sender)
        dispatches.send("0")
        ends = dispatches.wait()
        assert (type(ends["a"]), type(ends["b"]), ends["0"]) == (Odd, Odd, "sent")

    # --- interrupted, forked, re-entered ---

    @pytest.mark.parametrize("fails", [False, True], ids=["sent", "fails"])
    @pytest.mark.parametrize("interrupted", [interrupted_first, interrupted_follower])
    def test_interrupted(self, patience, interrupted, fails):
        """Control-C at any line of a dispatch leaves nobody waiting, and sends no twice."""
        for line in itertools.count(1):
            dispatches, fault = Dispatches(SharedSender()), Fault(line)
            interrupted(dispatches, fault, fails)
            ends = dispatches.wait()
            assert (ends["a"], ends["b"]) == ("sent", "sent"), line
            sent = [body for call in dispatches.sender.calls for body in call]
            assert len(sent) == len(set(sent)), line
            if fault.left > 0:  # there is no such line
                break
        assert line > 20

    def test_helper_ends_in_a_call(self, patience, monkeypatch):
        """What leaves a helper's call lets those that wait send by themselves."""
        died: list[Any] = []
        monkeypatch.setattr(threading, "excepthook", died.append)
        dispatches = Dispatches(SharedSender())

        def during(bodies: list[str]) -> None:
            if bodies == ["0"]:
                dispatches.start("a", "b")
            elif len(bodies) > 1:
                raise SystemExit

        dispatches.sender.during = during
        dispatches.send("0")
        assert dispatches.wait() == dict.fromkeys("0ab", "sent")
        assert dispatches.sender.calls[1] == ["a", "b"]
        worker_eventually(lambda: died)

    def test_helper_dies(self, patience, monkeypatch):
        """Where a helper's thread ends, at any line, those that wait send by themselves."""
        died: list[Any] = []
        monkeypatch.setattr(threading, "excepthook", died.append)
        monkeypatch.setattr(taskhawk, "_HELPER_IDLE_S", 0.05)
        for line in range(1, 150):
            dispatches = Dispatches(SharedSender())
            fault = Fault(line, "taskhawk dispatch")
            before = threading.gettrace()
            threading.settrace(fault)
            try:
                interrupted_first(dispatches)
                assert dispatches.wait() == dict.fromkeys("0ab", "sent"), line
            finally:
                threading.settrace(before)
            is_over, fault.left = fault.left > 0, 0
            if is_over:  # there is no such line
                break
        assert line > 20

    @pytest.mark.parametrize(
        ("allowed", "calls"),
        [(0, [*"0abcdefghijklmnopqrst"]), (1, ["0", "abcdefghij", "klmnopqrst"])],
        ids=["none", "one"],
    )
    def test_no_threads(self, patience, monkeypatch, allowed, calls):
        """Where no thread can be started, each dispatch sends its message itself."""
        dispatches = Dispatches(SharedSender())
        start, left = threading.Thread.start, [None] * allowed

        def refuse_helpers(thread: threading.Thread) -> None:
            if thread.name == "taskhawk dispatch":
                if not left:
                    raise RuntimeError("can't start new thread")
                left.pop()
            start(thread)

        def during(bodies: list[str]) -> None:
            if bodies == ["0"]:
                dispatches.start(*"abcdefghij")
            if "a" in bodies:
                dispatches.start(*"klmnopqrst")

        monkeypatch.setattr(threading.Thread, "start", refuse_helpers)
        dispatches.sender.during = during
        dispatches.send("0")
        worker_eventually(lambda: "a" in dispatches.ends)
        assert dispatches.wait() == dict.fromkeys("0abcdefghijklmnopqrst", "sent")
        assert sorted("".join(call) for call in dispatches.sender.calls) == calls

    def test_helper_ends(self, patience, monkeypatch):
        """A helper ends when there is nothing to send; the next dispatch is alone."""
        monkeypatch.setattr(taskhawk, "_HELPER_IDLE_S", 0.01)
        sender = SharedSender()
        dispatches = Dispatches(sender)
        for _ in range(2):
            sender.during = lambda bodies: bodies == ["0"] and dispatches.start("a")
            dispatches.send("0")
            assert dispatches.wait() == {"0": "sent", "a": "sent"}
            worker_eventually(lambda: not dispatches.lane._helpers)
            dispatches.ends.clear()
        assert sender.calls == [["0"], ["a"]] * 2

    def test_left(self, patience, monkeypatch):
        """A message for which nobody waits any more keeps no helper, and holds up none."""
        monkeypatch.setattr(taskhawk, "_HELPER_IDLE_S", 0.01)
        go = threading.Event()
        dispatches = Dispatches(SharedSender(lambda bodies: go.wait() and None))
        dispatches.start("0")

        async def be_cancelled() -> None:
            waiting = asyncio.ensure_future(
                dispatches.lane.send_async(dispatches.ready("a"))
            )
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

        asyncio.run(be_cancelled())
        worker_eventually(lambda: not dispatches.lane._helpers)
        assert not dispatches.lane._sharing.waiting
        go.set()
        assert dispatches.wait() == {"0": "sent"}
        assert dispatches.sender.calls == [["0"]]

    @pytest.mark.parametrize("state", ["lock", "call", "wait"])
    def test_reentered(self, patience, state):
        """A signal handler's dispatch is sent at once, wherever it interrupts another."""
        sender = SharedSender()
        dispatches = Dispatches(sender)
        handler = functools.partial(dispatches.send, "handler")
        if state == "call":
            sender.during = lambda bodies: bodies == ["0"] and handler()
            dispatches.send("0")
        elif state == "lock":
            with dispatches.lane._lock:
                dispatches.lane._busy.add(threading.get_ident())
                handler()
            dispatches.send("0")
        else:

            def during(bodies: list[str]) -> None:
                if bodies == ["1"]:
                    worker_eventually(lambda: dispatches.has_come("0"))
                    signal.pthread_kill(main, signal.SIGUSR1)
                    worker_eventually(lambda: "handler" in dispatches.ends)

            main = threading.get_ident()
            sender.during = during
            before = signal.signal(signal.SIGUSR1, lambda *_: handler())
            try:
                dispatches.start("1")
                dispatches.send("0")
            finally:
                signal.signal(signal.SIGUSR1, before)
        dispatches.wait()
        assert set(dispatches.ends.values()) == {"sent"}
        assert ["handler"] in sender.calls

    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
    def test_fork(self, slow_aws, mail, patience):
        """A child that is forked while others send has nobody to wait for."""
        go = threading.Event()
        slow_aws.script("SendMessage", late(go))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            parents = [pool.submit(mail.dispatch, "parent")]
            worker_eventually(lambda: slow_aws.batches == [1])
            wait = forked(lambda: mail.dispatch("child"))
            assert wait() == 0
            parents.append(pool.submit(mail.dispatch, "parent"))
            go.set()
            assert len({each.result() for each in parents}) == 2
        bodies = [each["MessageBody"] for each in slow_aws.asked(SEND)]
        assert sent_texts(bodies) == ["child", "parent", "parent"]

    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
    def test_forked_in_a_call(self):
        """What is forked inside a call leaves it without the locks of the parent's threads."""
        sender = SharedSender()
        dispatches = Dispatches(sender)
        children: list[int] = []

        def during(bodies: list[str]) -> None:
            with dispatches.lane._lock:  # as another thread might
                children.append(os.fork())
            if not children[0]:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(WORKER_PATIENCE_S)
                dispatches.lane._lock.acquire()

        sender.during = during
        dispatches.send("0")
        if not children[0]:
            os._exit(dispatches.ends != {"0": "sent"})
        assert os.waitpid(children[0], 0)[1] == 0

    @pytest.mark.slow
    def test_at_exit(self, aws, tmp_path):
        """A __del__ at the interpreter's end waits for no thread that has stopped."""
        go = threading.Event()
        aws.script("SendMessage", passed, late(go))
        code = f"""
            import gc, sys, threading, time, taskhawk
            taskhawk.configure(
                AWS_REGION="x", AWS_ACCESS_KEY="x", AWS_SECRET_KEY="x",
                AWS_ENDPOINT_SQS={aws.url!r}, TASKHAWK_QUEUE="app")

            @taskhawk.task(name="mail.send")
            def send(text): pass

            class Last:
                def __del__(self):
                    try:
                        send.dispatch("last")
                    except Exception: pass # the interpreter imports no more
                    print(sys.is_finalizing())

            send.dispatch("first")
            gc.disable()
            last = Last()
            last.itself = last
            del last # collected at the end
            threading.Thread(target=send.dispatch, args=["hang"], daemon=True).start()
            while not taskhawk._lanes.get().busy: time.sleep(0.01)
        """
        try:
            assert python_lines(tmp_path, code) == ["True"]
        finally:
            go.set()

    # --- who does not share ---

    def test_others(self, sync, mail):
        """Sync mode and capture() make no lane: each dispatch is on its own."""
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(mail.dispatch, range(8)))
            with taskhawk.capture() as calls:
                list(pool.map(mail.dispatch, range(8)))
        assert len(calls) == 8
        assert taskhawk._lanes.get().lanes == {}

    def test_configure(self, aws, mail):
        """configure() lets the next dispatch begin anew, with the new settings."""
        mail.dispatch(1)
        configure_aws(aws.url, "other")
        assert taskhawk._lanes.get().lanes == {}
        mail.dispatch(2)
        urls = [each["QueueUrl"].rpartition("/")[2] for each in aws.asked(SEND)]
        assert urls == ["TASKHAWK-APP", "TASKHAWK-OTHER"]


class TestDispatchAsync:
    """`await dispatch_async(…)` is dispatch(), while the event loop goes on."""

    def test_requests(self, aws, mail):
        """Many at once share requests; each has its message's id."""

        async def dispatch() -> list[str]:
            return await asyncio.gather(*map(mail.dispatch_async, range(200)))

        ids = asyncio.run(dispatch())
        assert len(set(ids)) == 200
        assert len(aws.batches) <= 24
        sent = [entry for each in aws.asked(SEND_BATCH) for entry in each["Entries"]]
        sent += aws.asked(SEND)
        assert sent_texts(entry["MessageBody"] for entry in sent) == [*range(200)]

    def test_loop_goes_on(self, slow_aws, mail):
        """The loop runs other coroutines while a request waits, the first one too."""
        go = threading.Event()
        slow_aws.script("GetQueueUrl", late(go))
        slow_aws.script("SendMessage", late(go))

        async def dispatch() -> None:
            for _ in range(2):
                sending = asyncio.create_task(mail.with_delay(3).dispatch_async("x"))
                await asyncio.to_thread(worker_eventually, lambda: slow_aws.calls)
                go.set()
                assert len(await sending) == 36
                go.clear()
                slow_aws.calls.clear()

        asyncio.run(dispatch())

    @pytest.mark.parametrize(
        ("answers", "error"),
        [
            ({SEND_BATCH: refuse(1, code="Bad", ours=True)}, None),
            ({SEND_BATCH: refuse(1), SEND: DENY}, taskhawk.ConfigurationError),
        ],
        ids=["refused, then accepted alone", "refused alone too"],
    )
    def test_errors(self, aws, mail, answers, error):
        """Each coroutine gets what its message gets; what was refused is sent alone."""
        for action, answer in answers.items():
            aws.script(action, answer)

        async def dispatch() -> list[Any]:
            calls = map(mail.dispatch_async, range(10))
            return await asyncio.gather(*calls, return_exceptions=True)

        taskhawk._lanes.get().looked_up.add(Priority.default)
        ends = asyncio.run(dispatch())
        assert {type(end) for end in ends} == {str, error} - {None}
        for wrong in ((1, 2, 3), ({1},)):
            with pytest.raises(TypeError):
                asyncio.run(mail.dispatch_async(*wrong))

    def test_batch_and_capture(self, sqlite, mail):
        """In a batch() the message is sent at the end of the block; capture() keeps it."""

        async def dispatch() -> None:
            with taskhawk.batch():
                await mail.dispatch_async("batch")
                assert received_args() == []
            with taskhawk.capture() as calls:
                await mail.dispatch_async("captured")
            assert [call.args for call in calls] == [["captured"]]

        asyncio.run(dispatch())
        assert received_args() == ["batch"]

    @pytest.mark.parametrize("fails", [False, True])
    def test_sync(self, sync, fails):
        """In sync mode the task has run, in a thread, when the dispatch returns."""
        ran = []

        @taskhawk.task
        async def note(number):
            await asyncio.sleep(0)
            ran.append((number, threading.get_ident()))
            if fails:
                raise ZeroDivisionError

        expected = (
            pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext()
        )
        with expected:
            asyncio.run(note.dispatch_async(1))
        [(number, thread)] = ran
        assert number == 1
        assert thread != threading.get_ident()

    def test_cancelled(self, slow_aws, mail):
        """Who is cancelled leaves nobody else waiting; what was not sent yet is not sent."""
        go = threading.Event()
        slow_aws.script("SendMessage", late(go))

        async def dispatch() -> None:
            calls = [asyncio.create_task(mail.dispatch_async(0))]
            await asyncio.to_thread(worker_eventually, lambda: slow_aws.batches == [1])
            calls += [asyncio.create_task(mail.dispatch_async(n)) for n in (1, 2, 3)]
            await asyncio.sleep(0)
            for cancelled in (calls[0], calls[2]):
                cancelled.cancel()
            go.set()
            ends = await asyncio.gather(*calls, return_exceptions=True)
            kinds = [type(end).__name__ for end in ends]
            assert kinds == ["CancelledError", "str", "CancelledError", "str"]

        taskhawk._lanes.get().looked_up.add(Priority.default)
        asyncio.run(dispatch())
        assert sum(slow_aws.batches) == 3

    def test_loop_closed(self, patience):
        """A loop that is closed before its message is sent is no error for anybody."""
        go = threading.Event()
        dispatches = Dispatches(
            SharedSender(lambda _: go.wait(WORKER_PATIENCE_S) and [])
        )

        async def dispatch() -> None:
            sending = dispatches.lane.send_async(dispatches.ready("0"))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(sending, 0.01)

        asyncio.run(dispatch())
        go.set()
        worker_eventually(lambda: not dispatches.lane._sharing.under_way)
        dispatches.send("1")
        assert dispatches.ends == {"1": "sent"}

    def test_interrupted(self, patience, monkeypatch):
        """Where Ctrl-C comes, at any line, the next dispatch does not wait for another."""
        monkeypatch.setattr(taskhawk, "_HELPER_IDLE_S", 0.001)
        for line in range(1, 100):
            dispatches = Dispatches(SharedSender())
            # As after a call that was shared: others are likely to come at once.
            dispatches.lane._sharing._expected = 9
            dispatches.lane._sharing._gather_until = time.monotonic() + 0.03
            fault = Fault(line)
            with contextlib.suppress(KeyboardInterrupt), traced(fault):
                asyncio.run(dispatches.lane.send_async(dispatches.ready("0")))
            dispatches.start("1")
            assert dispatches.wait() == {"1": "sent"}, line
            if fault.left > 0:  # there is no such line
                break
        assert line > 5

    def test_reentered(self):
        """A loop that a signal handler runs inside a dispatch waits for no other."""
        dispatches = Dispatches(SharedSender())
        dispatches.lane._busy.add(threading.get_ident())
        with dispatches.lane._lock:
            asyncio.run(dispatches.lane.send_async(dispatches.ready("0")))
        assert dispatches.sender.calls == [["0"]]


class TestQueueFull:
    """`max_queue_size`: a dispatch to a full queue raises, before anything is sent."""

    @pytest.fixture
    def index(self):
        """Return a task whose queue may have three messages."""
        return taskhawk.task(name="index", max_queue_size=3)(plain)

    def test_full(self, sqlite, index, mail):
        """Waiting, running and delayed messages count; other tasks are not bounded."""
        index.dispatch(1)
        mail.dispatch(2)
        [*_] = receive_all()  # they run
        mail.with_delay(60).dispatch(3)
        taskhawk._queue_sizes.get()._known_until.clear()  # a second is over
        with pytest.raises(taskhawk.QueueFull) as raised:
            index.dispatch(4)
        error = raised.value
        sentence = "index: TASKHAWK-DEFAULT has 3 messages, and max_queue_size is 3"
        assert str(error) == sentence
        assert isinstance(error, taskhawk.TaskhawkError)
        assert (error.queue, error.size, error.limit) == ("TASKHAWK-DEFAULT", 3, 3)
        mail.dispatch(5)
        index.with_priority(Priority.high).dispatch(6)
        assert sum(sqlite.depth("TASKHAWK-DEFAULT")) == 4

    def test_asked_once(self, aws, index, mail):
        """A queue is asked once a second; what is dispatched in between is counted."""
        for number in range(3):
            index.dispatch(number)
        with taskhawk.batch(), pytest.raises(taskhawk.QueueFull):
            index.dispatch(3)
        with pytest.raises(taskhawk.QueueFull) as raised:
            index.dispatch_many([1, 2])
        note = "This is call 0 of dispatch_many(), from 0."
        assert raised.value.__notes__ == [note]
        with pytest.raises(taskhawk.QueueFull):
            asyncio.run(index.dispatch_async(4))
        assert aws.actions == [
            "GetQueueUrl",
            "GetQueueAttributes",
            *["SendMessage"] * 3,
        ]
        mail.dispatch_many([1, 2])

    def test_asked_again(self, aws, index, monkeypatch):
        """After a second, the queue is asked anew."""
        monkeypatch.setattr(taskhawk, "_SIZE_KNOWN_S", 0)
        for number in range(5):
            index.dispatch(number)
        assert aws.actions.count("GetQueueAttributes") == 5

    def test_denied(self, aws, index):
        """Where the queue may not be asked, nothing is sent, and the error says why."""
        aws.script("GetQueueAttributes", DENY)
        denied = DENIED.format("GetQueueAttributes")
        sentence = f"TASKHAWK-APP: {denied} (AccessDenied: no)"
        assert refused(index.dispatch, 1) == sentence
        assert aws.batches == []
        configure_aws(aws.url, "app", IS_LAMBDA_APP=True)
        sentence = "index: max_queue_size needs a queue, and SNS has none"
        assert refused(index.dispatch, 1) == sentence

    def test_elsewhere(self, sync, index):
        """Sync mode and capture() have no queue that could be full."""
        for number in range(5):
            index.dispatch(number)
            with taskhawk.capture() as calls:
                index.dispatch(number)
            assert len(calls) == 1

    def test_unknown_task(self, sqlite):
        """A message of a task that is not registered here has no bound."""
        taskhawk.publish(Message(VALID))
        assert sqlite.depth("TASKHAWK-DEFAULT-HIGH-PRIORITY").visible == 1

    @pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", None])
    def test_refused(self, value):
        """The bound is a whole number above 0."""
        decorate = taskhawk.task(name="index", max_queue_size=value)
        assert refused(decorate, plain) == (
            f"index has max_queue_size={value!r}: expected a whole number above 0"
        )
        assert "index" not in taskhawk._registry


POLICY = taskhawk.linear(5, 2.5, 3, jitter=False)
WRONG_OPTIONS = [
    7,
    "retry",
    [["retry"]],
    [[{}, 1]],
    {"other": 1},
    {"retry": 5},
    {"retry": {}},
    {"retry": {**taskhawk._policy_data(POLICY), "jitter": 2}},
    {"retry": {**taskhawk._policy_data(POLICY), "base_s": -1}},
    {"retry": {**taskhawk._policy_data(POLICY), "base_s": "1"}},
    {"retry": {**taskhawk._policy_data(POLICY), "factor": 10**400}},
    {"retry": {**taskhawk._policy_data(POLICY), "more": 1}},
    {"time_limit": 0},
    {"time_limit": True},
    {"time_limit": "5"},
    {"time_limit": None, "retry": taskhawk._policy_data(POLICY)},
]


class TestOptions:
    """with_options(): a retry policy and a time limit for one dispatch."""

    def test_travel(self, sqlite):
        """They travel in a header, which is no attribute and which the task never sees."""
        seen = []

        @taskhawk.task(name="mail.send")
        def note(metadata, headers):
            seen.extend([metadata.headers, headers])

        invocation = note.with_options(retry=POLICY).with_headers(a="1")
        invocation.with_options(time_limit=30).with_options().dispatch()
        [received] = receive_all()
        assert json.loads(received.body)["headers"] == {
            "a": "1",
            "taskhawk.options": {
                "retry": taskhawk._policy_data(POLICY),
                "time_limit": 30,
            },
        }
        assert [*received.message_attributes] == ["a"]
        assert taskhawk.process(received) == Outcome(Fate.acknowledge)
        assert seen == [{"a": "1"}, {"a": "1"}]

    @pytest.mark.parametrize(
        ("policy", "delays"),
        [
            (POLICY, [5, 7.5, 10, None]),
            (taskhawk.fixed(0.5, jitter=False), [0.5] * 4),
            (
                taskhawk.exponential(2, 150, max_delay_s=math.inf, jitter=False),
                [2, 300, 43_200, 43_200],
            ),
        ],
        ids=["linear", "fixed", "exponential"],
    )
    def test_retry(self, sqlite, policy, delays):
        """A failed run is repeated by the dispatch's policy, not by the task's."""
        fail = raising(ZeroDivisionError())
        task = taskhawk.task(name="mail.send", retry=taskhawk.fixed(1000))(fail)
        task.with_options(retry=policy).dispatch()
        [received] = receive_all()
        received.max_receive_count = None
        for attempt, delay_s in enumerate(delays, 1):
            received.attributes = {"ApproximateReceiveCount": str(attempt)}
            fate = Fate.retry if delay_s else Fate.dead_letter
            outcome = taskhawk.process(received)
            assert (outcome.fate, outcome.delay_s) == (fate, delay_s)

    def test_jitter(self, mail):
        """Jitter is a part of the policy."""
        for jitter in (True, False):
            policy = taskhawk.fixed(60, 3, jitter=jitter)
            with taskhawk.capture() as calls:
                mail.with_options(retry=policy).dispatch()
            message = Message({**VALID, "headers": calls[0].headers})
            assert taskhawk._options_of(message).retry == policy

    @pytest.mark.parametrize("options", WRONG_OPTIONS, ids=repr)
    def test_hostile(self, options, caplog):
        """Wrong options are ignored with a warning: the task's own hold."""
        taskhawk.task(name="mail.send", retry=taskhawk.fixed(7, jitter=False))(
            raising(ZeroDivisionError())
        )
        body = processing_body(headers={"taskhawk.options": options})
        outcome = run_body(body)
        assert (outcome.fate, outcome.delay_s) == (Fate.retry, 7)
        warning = "'mail.send': the options of a message are wrong, and not used"
        assert warning in [record.getMessage() for record in caplog.records]

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (
                {"retry": plain},
                f"retry: expected taskhawk.fixed(), linear() or exponential(), got {plain}",
            ),
            (
                {"time_limit": 0},
                "time_limit: expected a number of seconds above 0, got 0",
            ),
            (
                {"time_limit": "5"},
                "time_limit: expected a number of seconds above 0, got '5'",
            ),
        ],
        ids=["function", "no time", "text"],
    )
    def test_refused(self, mail, options, sentence):
        """A function can't be sent, and a limit is a number of seconds."""
        assert refused(mail.with_options, error=TypeError, **options) == sentence


# === PART IV: WORK ====================================================================

Fate, Outcome = taskhawk.Fate, taskhawk.Outcome  # no name of a later part stands above


# --- 13. processing -------------------------------------------------------------------


def processing_run(fn: Callable[..., Any], attempt: int = 1, **options: Any) -> Outcome:
    """Register a function as the task mail.send, and process one message for it."""
    taskhawk._registry.pop("mail.send", None)
    taskhawk.task(name="mail.send", **options)(fn)
    attributes = {"ApproximateReceiveCount": str(attempt)}
    received = QueueMessage(processing_body(), "m1", attributes=attributes, queue="Q")
    received.max_receive_count = 10
    return taskhawk.process(received)


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


# What the log says of a message, of its end, and the outcome that this stands for.
PROCESSING_NAME = f"mail.send {PROCESSING_ID} (message m1)"
LEFT, DEAD, DELAY = "is left to the queue", "is given up", "runs again in {} s"
IN_12_HOURS = "runs again in 43200 s, the most that SQS allows"
PROCESSING_ENDS: dict[str, tuple[Fate, float | None]] = {
    LEFT: (Fate.retry, None),
    DEAD: (Fate.dead_letter, None),
    **{DELAY.format(s): (Fate.retry, s) for s in (0, 1, 5, 7, 7.5, 90)},
}
PROCESSING_ENDS[IN_12_HOURS] = (Fate.retry, 43200)
for said in ("True", "not yet,?hm", "a; b"):
    PROCESSING_ENDS[f"{LEFT}: {said}"] = (Fate.retry, None)
AT_LAST = f"{DEAD}: the queue allows no further receive"
PROCESSING_ENDS[AT_LAST] = (Fate.dead_letter, None)
FIVE: dict[str, Any] = {"retry": taskhawk.fixed(5, 2, jitter=False)}
IN_5_S, IN_7_S = DELAY.format(5), DELAY.format(7)
IN_7 = taskhawk.fixed(7, 2, jitter=False)
FILES: dict[str, Any] = {**FIVE, "retry_on": (OSError,)}
NO_FILES: dict[str, Any] = {**FIVE, "never_retry_on": (OSError, ValueError)}
ONLY_FILES: dict[str, Any] = {"retry_on": OSError, "never_retry_on": FileNotFoundError}
GIVES_UP: dict[str, Any] = {"retry": raising(taskhawk.StopRetry())}
ASKED, FAILS = "asked to be retried", "failed"
later, Ignored = taskhawk.RetryException, taskhawk.IgnoreException


def group(*errors: BaseException) -> BaseExceptionGroup[BaseException]:
    """Return errors as a task group raises them, the last two in a group of their own."""
    return BaseExceptionGroup("g", [*errors[:-2], BaseExceptionGroup("h", errors[-2:])])


# What a task or hook raises, the task's options, the attempt; what the log says of it.
PROCESSING_FAILURES = [
    ("an exception", ValueError("no"), {}, 1, FAILS, LEFT),
    ("SystemExit", SystemExit(3), {}, 1, FAILS, LEFT),
    ("GeneratorExit", GeneratorExit(), {}, 1, FAILS, LEFT),
    ("CancelledError", asyncio.CancelledError(), {}, 1, FAILS, LEFT),
    ("group", group(KeyError(), OSError()), {}, 1, FAILS, LEFT),
    ("group, policy", group(KeyError(), OSError()), FIVE, 1, FAILS, IN_5_S),
    ("group, exit", group(SystemExit(), later(5)), {}, 1, FAILS, IN_5_S),
    ("group, stop", group(later(5), taskhawk.StopRetry()), {}, 1, FAILS, DEAD),
    ("group, never", group(later(5), KeyError(), OSError()), NO_FILES, 1, FAILS, DEAD),
    ("group, not in", group(OSError(), KeyError(), OSError()), FILES, 1, FAILS, DEAD),
    ("group, in", group(FileNotFoundError(), OSError()), FILES, 1, FAILS, IN_5_S),
    ("group, ignored", group(OSError(), Ignored()), FILES, 1, FAILS, IN_5_S),
    (
        "group asks for",
        group(later(5), later(90), later()),
        {},
        1,
        ASKED,
        DELAY.format(90),
    ),
    ("group says why", group(later("a"), later("b")), {}, 1, ASKED, f"{LEFT}: a; b"),
    ("group asks policy", group(later(), later()), FIVE, 1, ASKED, IN_5_S),
    ("group asks too often", group(later(), later()), FIVE, 3, FAILS, DEAD),
    ("its own TaskNotFound", taskhawk.TaskNotFound("other"), {}, 1, FAILS, LEFT),
    ("policy", ValueError("no"), FIVE, 2, FAILS, IN_5_S),
    ("policy, SystemExit", SystemExit(), FIVE, 1, FAILS, IN_5_S),
    ("policy, 0 s", KeyError(), {"retry": lambda _: 0}, 1, FAILS, DELAY.format(0)),
    ("huge", KeyError(), {"retry": lambda _: 1e300}, 1, FAILS, IN_12_HOURS),
    ("used up", ValueError("no"), FIVE, 3, FAILS, DEAD),
    ("no retries", KeyError(), {"retry": taskhawk.linear(1, 1, 0)}, 1, FAILS, DEAD),
    ("RetryException, used up", later(), FIVE, 3, FAILS, DEAD),
    ("StopRetry", taskhawk.StopRetry("enough"), FIVE, 1, FAILS, DEAD),
    ("StopRetry, no policy", taskhawk.StopRetry("enough"), {}, 1, FAILS, DEAD),
    ("never retried", FileNotFoundError(), NO_FILES, 1, FAILS, DEAD),
    ("retried, not never", KeyError("no"), NO_FILES, 1, FAILS, IN_5_S),
    ("in retry_on", FileNotFoundError("no"), FILES, 1, FAILS, IN_5_S),
    ("not in retry_on", ValueError("no"), FILES, 1, FAILS, DEAD),
    ("in both", FileNotFoundError("no"), ONLY_FILES, 1, FAILS, DEAD),
    ("in one of both", PermissionError("no"), ONLY_FILES, 1, FAILS, LEFT),
    ("last", ValueError("no"), {}, 10, FAILS, AT_LAST),
    ("one too many", ValueError("no"), {}, 11, FAILS, AT_LAST),
    ("the policy gives up", KeyError(), GIVES_UP, 1, FAILS, DEAD),
    ("last but one", ValueError("no"), {}, 9, FAILS, LEFT),
    ("last, policy", KeyError(), {"retry": lambda _: 5}, 10, FAILS, AT_LAST),
    ("last, asks", later(), {}, 10, FAILS, AT_LAST),
    ("last, asks for a delay", later(5), {}, 10, FAILS, AT_LAST),
    ("asks, no delay", later(), {}, 1, ASKED, LEFT),
    ("asks, and says why", later("not yet,\nhm"), {}, 1, ASKED, f"{LEFT}: not yet,?hm"),
    ("asks for a delay", later(delay_seconds=90), {}, 1, ASKED, DELAY.format(90)),
    ("asks for now", later(delay_seconds=0), {}, 1, ASKED, DELAY.format(0)),
    ("asks as in 4.7", later(7.5), {}, 1, ASKED, DELAY.format(7.5)),
    ("asks for ever", later(10**400), {}, 1, ASKED, IN_12_HOURS),
    ("asks for 2 days", later(delay_seconds=172800), {}, 1, ASKED, IN_12_HOURS),
    ("asks with a bool", later(True), {}, 1, ASKED, f"{LEFT}: True"),
    ("asks the policy", later(), FIVE, 1, ASKED, IN_5_S),
    ("asks past the policy", later(1), FIVE, 9, ASKED, DELAY.format(1)),
    ("asks past retry_on", later(), FILES, 1, ASKED, IN_5_S),
    ("asks past never", later(), {"never_retry_on": (later,)}, 1, ASKED, LEFT),
    ("asks by a policy", later(retry=IN_7), {}, 1, ASKED, DELAY.format(7)),
    ("asks by another policy", later(retry=IN_7), FIVE, 2, ASKED, DELAY.format(7)),
    ("asks by one, used up", later(retry=IN_7), FIVE, 3, FAILS, DEAD),
    ("asks by one, last", later(retry=IN_7), {}, 10, FAILS, AT_LAST),
    ("asks by a huge one", later(retry=lambda _: 1e9), {}, 1, ASKED, IN_12_HOURS),
    ("group, policies", group(later(retry=IN_7), later(5)), {}, 1, ASKED, IN_7_S),
    ("group, a policy", group(later(retry=IN_7), KeyError()), FIVE, 1, FAILS, IN_7_S),
    ("group, used up", group(later(retry=IN_7), later(5)), {}, 3, FAILS, DEAD),
]
PROCESSING_PLACES = ["task", "policy", "error hook", "run hook", "pre hook"]
postponed = taskhawk.PostponeException
# What is raised, at which attempt, in which queue; and what comes of it.
PROCESSING_POSTPONED: dict[str, tuple[BaseException, int, str | None, Fate, Any]] = {
    "a minute": (postponed(), 1, "Q", Fate.postpone, 60),
    "half a minute": (postponed(delay_seconds=30), 1, "Q", Fate.postpone, 30),
    "at once: now": (postponed(0, "now"), 1, "Q", Fate.postpone, 0),
    "longer than SQS can": (postponed(86_400), 2, "Q", Fate.postpone, 900),
    "at the last receive": (postponed(5), 10, "Q", Fate.postpone, 5),
    "group: a; b; c": (
        group(postponed("a"), postponed(7, "b"), postponed(5, "c")),
        1,
        "Q",
        Fate.postpone,
        7,
    ),
    "group, one retry": (group(postponed(7), later(5)), 1, "Q", Fate.retry, 7),
    "FIFO": (postponed(7), 1, "Q.fifo", Fate.retry, 7),
    "FIFO, last": (postponed(7), 10, "Q.fifo", Fate.dead_letter, None),
    "no queue": (postponed(7), 1, None, Fate.retry, 7),
}


def leave(_number: int, _frame: object) -> None:
    """Handle a signal, as web servers do."""
    sys.exit(7)


class Leaver:
    """A signal handler with a state: it hands on the next signal to the system."""

    def __call__(self, number: int, _frame: object) -> None:
        """Handle a signal."""
        signal.signal(number, signal.SIG_IGN)
        self.leave(number, _frame)

    def leave(self, _number: int, _frame: object, _reason: object = None) -> None:
        """Handle a signal."""
        sys.exit(7)


PROCESSING_HANDLERS: list[tuple[str, Any]] = [
    ("a function", leave),
    ("any arguments", lambda *_: sys.exit(7)),
    ("an object", Leaver()),
    ("a method", Leaver().leave),
    ("a partial function", functools.partial(Leaver().leave, _reason="deploy")),
]
PROCESSING_SIGNALLED = """
import os, signal, sys, time
import taskhawk

@taskhawk.task(name="mail.send")
def send():
    print("begins", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
taskhawk.listen_for_messages(taskhawk.Priority.default, until_empty=True)
"""
NO_DELAYS = [-1, math.nan, math.inf, "5", True, (5,)]


class TestProcessing:
    """process() decides what becomes of a message; KeyboardInterrupt alone leaves it."""

    @pytest.mark.parametrize(
        ("task", "level", "end"),
        [
            (nothing, logging.DEBUG, "finished"),
            (raising(Ignored()), logging.INFO, "ignored"),
            (raising(group(Ignored(), Ignored(), Ignored())), logging.INFO, "ignored"),
        ],
    )
    def test_done(self, task, level, end, caplog):
        """A run that returns or has nothing to do is done; its body is logged as an extra."""
        caplog.set_level(logging.DEBUG, "taskhawk")
        assert processing_run(task, 2) == Outcome(Fate.acknowledge)
        assert caplog.record_tuples == [
            ("taskhawk", logging.DEBUG, "Received message"),
            (
                "taskhawk",
                level,
                f"mail.send {PROCESSING_ID} (message m1): attempt 2 {end}",
            ),
        ]
        assert caplog.records[0].message_body == processing_body()
        record = caplog.records[1]
        assert (record.task, record.id, record.attempt, record.outcome) == (
            "mail.send",
            PROCESSING_ID,
            2,
            {"finished": "done"}.get(end, end),
        )

    @pytest.mark.parametrize("where", ["task", "post hook"])
    @pytest.mark.parametrize("case", PROCESSING_FAILURES, ids=lambda case: case[0])
    def test_failed(self, case, where, caplog):
        """A failed run is for its own delay, the policy, the queue or the dead letters.

        So is one whose post hook fails, which may be the commit. The error hook is told
        of what is logged as an error, with its traceback.
        """
        _, error, options, attempt, how, then = case
        told: list[Any] = []
        hook = {"TASKHAWK_POST_PROCESS_HOOK": raising(error)}
        taskhawk.configure(
            hook if where == "post hook" else None,
            TASKHAWK_ERROR_HOOK=lambda **given: told.append(given),
        )
        caplog.set_level(logging.INFO, "taskhawk")
        task = raising(error) if where == "task" else nothing
        fate, delay_s = PROCESSING_ENDS[then]
        assert processing_run(task, attempt, **options) == Outcome(fate, error, delay_s)
        [record] = caplog.records
        text = f"{PROCESSING_NAME}: attempt {attempt} {how} and {then}"
        assert record.getMessage() == text
        assert (record.task, record.id, record.attempt, record.outcome) == (
            "mail.send",
            PROCESSING_ID,
            attempt,
            fate.value,
        )
        if how == FAILS:
            assert (record.levelname, record.exc_info[1]) == ("ERROR", error)
            message = Message(json.loads(processing_body()))
            assert told == [{"exception": error, "message": message}]
        else:
            assert (record.levelname, record.exc_info) == ("INFO", None)
            assert told == []

    def test_coroutine_failed(self):
        """An `async def` task ends as any other: cancelled is failed."""

        async def waits() -> None:
            raise asyncio.CancelledError

        fate, error, delay_s = processing_run(waits, **FIVE)
        assert (fate, type(error), delay_s) == (Fate.retry, asyncio.CancelledError, 5)

    def run_with(self, where: str, fn: Callable[..., Any]) -> Outcome:
        """Process a message whose task fails, with this function in one place."""
        hooks = {"pre hook": "PRE_PROCESS", "error hook": "ERROR", "run hook": "RUN"}
        hook = hooks.get(where)
        taskhawk.configure({f"TASKHAWK_{hook}_HOOK": fn} if hook else None)
        task = fn if where == "task" else raising(ValueError())
        return processing_run(task, retry=fn if where == "policy" else None)

    @pytest.mark.parametrize(
        ("error", "attempt", "level", "how", "then"),
        [
            (later("no", log_error=False), 3, "WARNING", ASKED, f"{DEAD}: no"),
            (later(retry=IN_7, log_error=False), 3, "WARNING", ASKED, DEAD),
            (later(5, log_error=False), 10, "WARNING", ASKED, AT_LAST),
            (later(log_error=False), 1, "INFO", ASKED, IN_5_S),
            (group(*[later(log_error=False)] * 2), 3, "WARNING", ASKED, DEAD),
            (group(later(log_error=False), later()), 3, "ERROR", FAILS, DEAD),
            (group(later(log_error=False), KeyError()), 3, "ERROR", FAILS, DEAD),
        ],
    )
    def test_no_error(self, error, attempt, level, how, then, caplog):  # noqa: PLR0917
        """With log_error=False the last failure is a warning, not an error, if all say so.

        The error hook is not told, and the dead letter has the error all the same.
        """
        told: list[Any] = []
        taskhawk.configure(TASKHAWK_ERROR_HOOK=lambda **given: told.append(given))
        caplog.set_level(logging.INFO, "taskhawk")
        outcome = processing_run(raising(error), attempt, **FIVE)
        assert outcome.fate is (Fate.retry if level == "INFO" else Fate.dead_letter)
        assert outcome.error is error
        [record] = caplog.records
        assert (
            record.getMessage()
            == f"{PROCESSING_NAME}: attempt {attempt} {how} and {then}"
        )
        assert (record.levelname, len(told)) == (level, int(level == "ERROR"))
        assert (record.exc_info is None) == (level != "ERROR")

    def test_default_policy(self):
        """TASKHAWK_RETRY is the policy of the tasks that have none."""
        taskhawk.configure(TASKHAWK_RETRY=IN_7)
        error = ValueError("no")
        for attempt, options, fate, delay_s in [
            (1, {}, Fate.retry, 7),
            (3, {}, Fate.dead_letter, None),
            (1, FIVE, Fate.retry, 5),
        ]:
            outcome = processing_run(raising(error), attempt, **options)
            assert outcome == Outcome(fate, error, delay_s)
        assert processing_run(raising(later(90))).delay_s == 90
        taskhawk.configure(TASKHAWK_RETRY="json.missing")
        outcome = processing_run(raising(error))
        assert (outcome.fate, outcome.delay_s) == (Fate.retry, None)
        assert str(outcome.error).startswith(
            "TASKHAWK_RETRY in configure(): expected a"
        )

    @pytest.mark.parametrize("where", PROCESSING_PLACES)
    @pytest.mark.parametrize("grouped", [False, True])
    def test_keyboard_interrupt(self, where, grouped):
        """Control-C is the user's and goes on, wherever it comes: nothing swallows it."""
        interrupt = KeyboardInterrupt()
        error = group(KeyError(), interrupt, OSError()) if grouped else interrupt
        with pytest.raises(KeyboardInterrupt) as caught:
            self.run_with(where, raising(error))
        assert caught.value is interrupt

    @pytest.mark.parametrize("where", PROCESSING_PLACES)
    def test_exit_of_its_own(self, where):
        """A task, policy or hook that calls sys.exit() has failed; the process goes on."""

        def with_arguments(*arguments: Any) -> Any:
            arguments = 5
            return sys.exit(arguments)

        def leave(_attempt: int = 0, **_: Any) -> None:
            with_arguments(None, sys._getframe())

        assert self.run_with(where, leave).fate is Fate.retry

    @pytest.mark.parametrize("where", PROCESSING_PLACES)
    @pytest.mark.parametrize("handler", PROCESSING_HANDLERS, ids=lambda h: h[0])
    def test_exit_of_a_signal_handler(self, where, handler):
        """A signal handler of the application's that calls sys.exit() is obeyed."""

        def is_interrupted(_attempt: int = 0, **_: Any) -> None:
            signal.raise_signal(signal.SIGUSR1)

        before = signal.signal(signal.SIGUSR1, handler[1])
        try:
            with pytest.raises(SystemExit) as caught:
                self.run_with(where, is_interrupted)
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert caught.value.code == 7

    def test_exit_of_a_signal_handler_in_a_task_group(self):
        """A handler's exit is obeyed too where a task of asyncio was interrupted."""

        async def is_interrupted() -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(asyncio.sleep(60))
                signal.raise_signal(signal.SIGUSR1)
                await asyncio.sleep(60)

        before = signal.signal(signal.SIGUSR1, leave)
        try:
            with pytest.raises(SystemExit):
                processing_run(is_interrupted)
        finally:
            signal.signal(signal.SIGUSR1, before)

    def test_worker_with_a_signal_handler(self, tmp_path):
        """A worker ends by its application's handler of SIGTERM; the message is left."""
        broker = taskhawk.SqliteBroker(f"sqlite:///{tmp_path}/queue.db")
        entry = Outgoing(processing_body("mail.send"), {})
        assert broker.send("TASKHAWK-DEFAULT", [entry]) == []
        env = {"TASKHAWK_BROKER": f"sqlite:///{tmp_path}/queue.db"}
        result = run_python(PROCESSING_SIGNALLED, env=env)
        assert (result.stdout, result.returncode) == ("begins\n", 7), result.stderr
        assert broker.depth("TASKHAWK-DEFAULT") == Depth(1, 0, 0)
        broker.close()

    def test_duration(self, monkeypatch, caplog):
        """A record says how many milliseconds the run took, hooks included."""
        clock = Clock()
        monkeypatch.setattr(time, "monotonic", clock)
        caplog.set_level(logging.DEBUG)

        def works(**_: Any) -> None:
            clock.now += 0.75

        def fails() -> None:
            works()
            raise ValueError

        taskhawk.configure(TASKHAWK_PRE_PROCESS_HOOK=works)
        processing_run(works)
        processing_run(fails)
        found = [getattr(record, "duration_ms", None) for record in caplog.records]
        assert found == [None, 1500, None, 1500]

    @pytest.mark.parametrize(
        ("extra", "found"),
        [
            pytest.param({"order": 7, "outcome": "mine"}, {"order": 7}, id="fields"),
            pytest.param({"name": 3}, {"extra_name": 3, "name": "taskhawk"}, id="name"),
            pytest.param({"asctime": 2}, {"extra_asctime": 2}, id="asctime"),
            pytest.param({"message": 1}, {"extra_message": 1}, id="message"),
            pytest.param({7: 8, "order": 9}, {"7": 8, "order": 9}, id="odd name"),
            pytest.param(None, {"outcome": "retry"}, id="none"),
            pytest.param(["order", 7], {"outcome": "retry"}, id="no mapping"),
        ],
    )
    @pytest.mark.parametrize("grouped", [False, True])
    def test_logging_exception(self, extra, found, grouped, caplog):
        """LoggingException gives the record's text, and fields of the record."""
        error: BaseException = taskhawk.LoggingException("lost 100 %", extra=extra)
        error = group(KeyError(), error, OSError()) if grouped else error
        assert processing_run(raising(error)) == Outcome(Fate.retry, error)
        [record] = caplog.records
        assert (record.levelname, record.getMessage()) == ("ERROR", "lost 100 %")
        assert record.exc_info[1] is error
        assert vars(record) | found == vars(record)
        assert record.outcome == ("mine" if "outcome" in (extra or ()) else "retry")

    @pytest.mark.parametrize(
        "base", [taskhawk.RetryException, taskhawk.LoggingException]
    )
    @pytest.mark.parametrize("delay_s", [None, *NO_DELAYS])
    def test_exceptions_of_their_own_making(self, base, delay_s):
        """A subclass may leave our __init__ out, or set as its delay what is none."""

        class Own(base):
            def __init__(self) -> None:
                if delay_s is not None:
                    self.delay_seconds = self.retry = delay_s

        error = Own()
        assert processing_run(raising(error)) == Outcome(Fate.retry, error)

    @pytest.mark.parametrize(
        "base", [taskhawk.LoggingException, taskhawk.ValidationError]
    )
    @pytest.mark.parametrize("where", ["task", "pre hook"])
    def test_exception_without_text(self, base, where):
        """An exception whose text can't be had is a failed run like any other."""

        class Mute(base):
            def __str__(self) -> str:
                raise ValueError("mute")

        hook = raising(Mute("x")) if where == "pre hook" else None
        taskhawk.configure(TASKHAWK_PRE_PROCESS_HOOK=hook)
        assert processing_run(raising(Mute("x"))).fate is Fate.retry

    @pytest.mark.parametrize("delay_s", [None, *NO_DELAYS])
    def test_impossible_delay_of_the_policy(self, delay_s, caplog):
        """A policy that gives no delay is at fault: the message is left to the queue."""
        error = KeyError("no")
        outcome = processing_run(raising(error), retry=lambda _attempt: delay_s)
        assert (outcome.fate, outcome.delay_s) == (Fate.retry, None)
        sentence = f"mail.send: retry: expected 0 or more seconds, got {delay_s!r}"
        assert repr(outcome.error) == repr(taskhawk.ConfigurationError(sentence))
        assert outcome.error.__context__ is error
        text = f"{PROCESSING_NAME}: attempt 1 failed and is left to the queue"
        assert caplog.messages == [text]
        assert "KeyError: 'no'" in caplog.text
        assert f"ConfigurationError: {sentence}" in caplog.text

    @pytest.mark.parametrize("broken", [ZeroDivisionError("oh"), SystemExit(3)])
    def test_policy_that_fails(self, broken, caplog):
        """A policy that raises leaves the message to the queue, and both errors are logged."""
        error = KeyError("no")
        outcome = processing_run(raising(error), retry=raising(broken))
        assert outcome == Outcome(Fate.retry, broken)
        assert broken.__context__ is error
        assert [record.levelname for record in caplog.records] == ["ERROR"]

    def test_hooks(self):
        """Pre hook, task and post hook run in this order; hooks get queue and message."""
        seen: list[Any] = []
        taskhawk.configure(
            TASKHAWK_PRE_PROCESS_HOOK=lambda **given: seen.append(("before", given)),
            TASKHAWK_POST_PROCESS_HOOK=lambda **given: seen.append(("after", given)),
        )

        def runs() -> None:
            seen.append("run")

        processing_run(runs)
        given = seen[0][1]
        assert seen == [("before", given), "run", ("after", given)]
        message = given["sqs_queue_message"]
        assert given == {"queue_name": "Q", "sqs_queue_message": message}
        assert (message.body, message.message_id) == (processing_body(), "m1")

    @pytest.mark.parametrize(
        ("error", "attempt", "how", "then"),
        [
            (OSError("no"), 1, FAILS, LEFT),
            (OSError("no"), 10, FAILS, AT_LAST),
            (taskhawk.StopRetry(), 1, FAILS, LEFT),
            (SystemExit(), 1, FAILS, LEFT),
            (later(delay_seconds=90), 1, ASKED, DELAY.format(90)),
            (later(delay_seconds=172800), 1, ASKED, IN_12_HOURS),
        ],
    )
    def test_pre_hook_that_fails(self, error, attempt, how, then, caplog):
        """A pre hook that fails leaves the message to the queue; its task does not run.

        What the queue would move is dead-lettered with the error that is why.
        """
        runs: list[int] = []

        def run() -> None:
            runs.append(1)

        caplog.set_level(logging.INFO)
        taskhawk.configure(TASKHAWK_PRE_PROCESS_HOOK=raising(error))
        fate, delay_s = PROCESSING_ENDS[then]
        assert processing_run(run, attempt, **FIVE) == Outcome(fate, error, delay_s)
        assert caplog.messages == [f"message m1: attempt {attempt} {how} and {then}"]
        assert (runs, hasattr(caplog.records[0], "task")) == ([], False)

    @pytest.mark.parametrize("where", ["task", "pre hook", "post hook"])
    @pytest.mark.parametrize("case", PROCESSING_POSTPONED)
    def test_postponed(self, case, where, caplog):
        """Who is not to run yet is sent anew with a delay; that is no error, nor news.

        A FIFO queue's order and a queue that nobody knows leave it at a retry.
        """
        error, attempt, queue, fate, delay_s = PROCESSING_POSTPONED[case]
        told: list[Any] = []
        hooks = {
            "pre hook": {"TASKHAWK_PRE_PROCESS_HOOK": raising(error)},
            "post hook": {"TASKHAWK_POST_PROCESS_HOOK": raising(error)},
        }
        taskhawk.configure(
            hooks.get(where, {}), TASKHAWK_ERROR_HOOK=lambda **given: told.append(given)
        )
        caplog.set_level(logging.DEBUG)
        run = raising(error) if where == "task" else nothing
        taskhawk.task(name="mail.send", never_retry_on=(taskhawk.TaskhawkError,))(run)
        received = QueueMessage(
            processing_body(),
            "m1",
            attributes={"ApproximateReceiveCount": str(attempt)},
            queue=queue,
            broker=taskhawk.SqsBroker(),
            max_receive_count=10,
        )
        assert taskhawk.process(received) == Outcome(fate, error, delay_s)
        name = "message m1" if where == "pre hook" else PROCESSING_NAME
        record = caplog.records[-1]
        if fate is Fate.postpone:
            end = f"attempt {attempt} was postponed and runs again in {delay_s} s"
            assert (
                record.getMessage()
                == f"{name}: {end}{''.join(case.partition(':')[1:])}"
            )
            assert (record.levelname, record.outcome) == ("DEBUG", "postpone")
        assert bool(told) == (fate is Fate.dead_letter)

    @pytest.mark.parametrize(
        ("place", "kind", "seen"),
        [
            (None, None, "in1 in2 run hook out2 out1"),
            ("run", Ignored, "in1 in2 run hook out2 out1"),
            ("run", ValueError, "in1 in2 run bad2 bad1"),
            ("hook", ValueError, "in1 in2 run hook bad2 bad1"),
            ("in1", Ignored, "in1 hook"),
            ("in2", Ignored, "in1 in2 hook out1"),
            ("in2", taskhawk.PostponeException, "in1 in2 bad1"),
            ("out2", ValueError, "in1 in2 run hook out2 bad1"),
        ],
    )
    def test_around(self, place, kind, seen, monkeypatch):
        """What surrounds a run is told how it ended, of the post hook's failure too.

        What it raises before the run is the run's end, and the task is not called.
        """
        steps: list[str] = []

        def step(name: str, **_: Any) -> None:
            steps.append(name)
            if name == place:
                raise kind

        @contextlib.contextmanager
        def surround(number: int, its_task: Any, received: Any) -> Iterator[None]:
            assert its_task is received.message.task
            step(f"in{number}")
            try:
                yield
            except (ValueError, taskhawk.PostponeException):
                steps.append(f"bad{number}")
                raise
            step(f"out{number}")

        around = [functools.partial(surround, number) for number in (1, 2)]
        monkeypatch.setattr(taskhawk, "_around_runs", around)
        taskhawk.configure(TASKHAWK_POST_PROCESS_HOOK=lambda **_: step("hook"))

        def run() -> None:
            step("run")

        fates = {ValueError: Fate.retry, taskhawk.PostponeException: Fate.postpone}
        assert processing_run(run).fate is fates.get(kind, Fate.acknowledge)
        assert " ".join(steps) == seen

    @pytest.mark.parametrize(
        ("text", "attempt"),
        [("4", 6), ("", 2), ("-1", 2), ("1e3", 2), ("9" * 10, 2), (None, 2)],
    )
    def test_attempts_before(self, text, attempt):
        """Attempts before a postponement count; whoever writes nonsense there adds none."""
        attributes = {"taskhawk.attempts": {"DataType": "String", "StringValue": text}}
        counts = {"ApproximateReceiveCount": "2"}
        received = QueueMessage("", "m1", None, counts, attributes, max_receive_count=6)
        assert (received.attempt, received.receive_count) == (attempt, 2)
        assert received.is_last_receive == (attempt == 6)
        assert not received.would_be_redriven

    @pytest.mark.parametrize("end", [nothing, raising(taskhawk.IgnoreException())])
    def test_post_hook(self, end):
        """The post hook is for what returned or was ignored, and may fail both."""
        error = ValueError("no")
        taskhawk.configure(TASKHAWK_POST_PROCESS_HOOK=raising(error))
        assert processing_run(end) == Outcome(Fate.retry, error)
        taskhawk.configure(TASKHAWK_POST_PROCESS_HOOK=raising(KeyError()))
        assert processing_run(raising(error)) == Outcome(Fate.retry, error)

    @pytest.mark.parametrize("broken", [OSError("no network"), SystemExit(3)])
    def test_error_hook_that_fails(self, broken, caplog):
        """An error hook's own failure is logged, no more."""
        taskhawk.configure(TASKHAWK_ERROR_HOOK=raising(broken))
        error = ValueError("no")
        assert processing_run(raising(error)) == Outcome(Fate.retry, error)
        assert [(r.getMessage(), r.exc_info[1]) for r in caplog.records] == [
            (f"{PROCESSING_NAME}: attempt 1 failed and {LEFT}", error),
            ("TASKHAWK_ERROR_HOOK failed", broken),
        ]

    @pytest.mark.parametrize(
        ("task", "hooks", "attempt", "end"),
        [
            (nothing, {}, 1, "done"),
            (raising(Ignored("no")), {}, 1, "ignored"),
            (raising(ValueError("no")), {}, 1, "retry"),
            (raising(later(5)), {}, 1, "retry"),
            (raising(taskhawk.PostponeException(5)), {}, 1, "postpone"),
            (raising(ValueError("no")), {}, 10, "dead_letter"),
            (nothing, {"TASKHAWK_PRE_PROCESS_HOOK": raising(OSError())}, 1, "retry"),
            (nothing, {"TASKHAWK_POST_PROCESS_HOOK": raising(OSError())}, 1, "retry"),
        ],
    )
    def test_run_hook(self, monkeypatch, task, hooks, attempt, end):
        """The run hook is told of each run, how it ended, and what it took.

        A run that its task ignored has no exception: it did not fail.
        """
        clock, told = Clock(), []
        monkeypatch.setattr(time, "monotonic", clock)

        def runs() -> None:
            clock.now += 1.5
            task()

        hook = lambda **given: told.append(given)  # noqa: E731
        taskhawk.configure(hooks, TASKHAWK_RUN_HOOK=hook)
        outcome = processing_run(runs, attempt)
        has_run = "TASKHAWK_PRE_PROCESS_HOOK" not in hooks
        assert told == [
            {
                "message": Message(json.loads(processing_body())) if has_run else None,
                "outcome": end,
                "exception": outcome.error,
                "duration_ms": 1500 * has_run,
            }
        ]

    @pytest.mark.parametrize("case", PROCESSING_INVALID)
    def test_run_hook_of_no_message(self, case):
        """It is told of what is no message, or for no task here, each time."""
        told: list[Any] = []
        hook = lambda **given: told.append(given)  # noqa: E731
        taskhawk.configure(TASKHAWK_RUN_HOOK=hook)
        received = QueueMessage(PROCESSING_INVALID[case][0], "m1", queue="Q")
        outcomes = [taskhawk.process(received) for _ in range(2)]
        errors = [(each["exception"], each["message"]) for each in told]
        assert errors == [(outcome.error, None) for outcome in outcomes]

    @pytest.mark.parametrize("broken", [OSError("no network"), SystemExit(3)])
    @pytest.mark.parametrize("task", [nothing, raising(ValueError("no"))])
    def test_run_hook_that_fails(self, broken, task, caplog):
        """A run hook's own failure is logged, no more."""
        before = processing_run(task)
        caplog.clear()
        taskhawk.configure(TASKHAWK_RUN_HOOK=raising(broken))
        assert processing_run(task)[::2] == before[::2]
        assert caplog.records[-1].getMessage() == "TASKHAWK_RUN_HOOK failed"
        assert caplog.records[-1].exc_info[1] is broken

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
        assert caplog.messages == [
            "message m1: attempt 1 failed and is left to the queue",
            "TASKHAWK_ERROR_HOOK failed",
        ]

    @pytest.mark.parametrize("case", PROCESSING_INVALID)
    def test_invalid_messages(self, case):
        """What is no message, or for no task here, is left to the queue.

        So it is at the last receive: this worker may be too old. The pre hook sees it.
        """
        seen: list[Any] = []
        taskhawk.configure(
            TASKHAWK_PRE_PROCESS_HOOK=lambda **given: seen.append(given),
        )
        body, wrong = PROCESSING_INVALID[case]
        received = QueueMessage(body, "m1", queue="Q", max_receive_count=1)
        fate, error, delay_s = taskhawk.process(received)
        assert (fate, str(error), delay_s) == (Fate.retry, wrong, None)
        unknown = case == "unknown task"
        kind = taskhawk.TaskNotFound if unknown else taskhawk.ValidationError
        assert type(error) is kind
        assert seen == [{"queue_name": "Q", "sqs_queue_message": received}]

    def test_invalid_messages_are_logged_at_intervals(self, monkeypatch, caplog):
        """A poisoned queue does not fill the disk: one record of a kind in ten seconds."""
        told: list[Any] = []
        clock = Clock()
        monkeypatch.setattr(time, "monotonic", clock)

        class Bad(taskhawk.ValidationError):
            """An error of this test alone: the interval is one for each class."""

        class Worse(Bad):
            """Another one."""

        for after_s, error in [
            (0, Bad("a")),
            (0, Bad("b")),
            (0, Worse("c")),
            (9.9, Bad("d")),
            (0, Worse("e")),
            (0.1, Bad("f")),
            (10, Bad("g")),
        ]:
            clock.now += after_s
            taskhawk.configure(
                TASKHAWK_PRE_PROCESS_HOOK=raising(error),
                TASKHAWK_ERROR_HOOK=lambda **given: told.append(given),
            )
            assert processing_run(nothing) == Outcome(Fate.retry, error)
        start = "message m1 is left to the queue:"
        assert caplog.messages == [
            f"{start} a",
            f"{start} c",
            f"{start} f (2 more like it since the last record)",
            f"{start} g",
        ]
        for record in caplog.records:
            assert (record.levelname, record.exc_info) == ("ERROR", None)
            assert (record.outcome, hasattr(record, "task")) == ("retry", False)
        assert [str(given["exception"]) for given in told] == ["a", "c", "f", "g"]
        assert {given["message"] for given in told} == {None}

    def test_ids_are_free_text(self, caplog):
        """An id can't forge a line of the log, nor fill it: whatever became of the run."""
        caplog.set_level(logging.DEBUG)
        forged = "1\n2026-01-01 ERROR \x1b[2J\u2028ü" + "x" * 300
        shown = "1?2026-01-01 ERROR ?[2J?ü" + "x" * 300
        run, message = f"mail.send {shown}"[:200], f"message {shown[:200]}"
        end = "attempt 1 failed and is left to the queue"
        for fn, how in (
            (nothing, "attempt 1 finished"),
            (raising(Ignored("not\nhere")), "attempt 1 ignored: not?here"),
            (raising(ValueError()), end),
        ):
            taskhawk._registry.pop("mail.send", None)
            taskhawk.task(name="mail.send")(fn)
            taskhawk.process(QueueMessage(processing_body(id=forged), forged))
            assert caplog.messages[-1] == f"{run} ({message}): {how}"
        taskhawk.configure(TASKHAWK_PRE_PROCESS_HOOK=raising(ValueError()))
        taskhawk.process(QueueMessage(None, forged))
        assert caplog.messages[-1] == f"{message}: {end}"

    def test_error_at_the_last_receive(self):
        """The dead letter of a task without a policy says which error put it there."""
        taskhawk.configure(TASKHAWK_BROKER="sqlite://?max_receive_count=1")
        taskhawk.task(name="mail.send")(raising(ValueError("no milk"))).dispatch()
        broker = taskhawk._brokers.broker()
        assert work_once(broker).dead_lettered == 1
        [letter] = receive_all("TASKHAWK-DEFAULT-DLQ")
        error = json.loads(letter.message_attributes["taskhawk.error"]["StringValue"])
        found = (error["type"], error["message"], error["attempt"])
        assert found == ("ValueError", "no milk", 1)

    @pytest.mark.parametrize("end", [None, Ignored, ValueError, later])
    @pytest.mark.parametrize("how", ["process", "sync"])
    def test_memory(self, end, how):
        """Once a run is over, nothing keeps its body until the garbage collector runs."""
        seen: list[Any] = []

        def hook(sqs_queue_message: QueueMessage, **_: Any) -> None:
            seen.append(weakref.ref(sqs_queue_message))

        def fn() -> None:
            if end:
                raise end

        taskhawk.configure(TASKHAWK_PRE_PROCESS_HOOK=hook, TASKHAWK_SYNC=how == "sync")
        logging.disable()  # what pytest keeps of the log holds tracebacks
        gc.collect()
        gc.disable()
        try:
            if how == "process":
                processing_run(fn)
            else:
                with contextlib.suppress(ValueError, later):
                    taskhawk.task(name="mail.send")(fn).dispatch()
            assert [reference() for reference in seen] == [None]
        finally:
            gc.enable()
            logging.disable(logging.NOTSET)

    @pytest.mark.slow
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
        ends = [row[1:3] for row in PROCESSING_FAILURES]
        ends += [(None, {}), (taskhawk.IgnoreException(), {})]
        ends += [(taskhawk.LoggingException("lost", {"message": 1}), {})]
        ends += [(KeyError(), {"retry": lambda _attempt: -1})]
        error, options = data.draw(st.sampled_from(ends))
        places = ["task", "TASKHAWK_PRE_PROCESS_HOOK", "TASKHAWK_POST_PROCESS_HOOK"]
        failing = data.draw(st.sampled_from(places))
        error_hook = data.draw(st.sampled_from([None, raising(OSError())]))

        def runs(given: Any = None, *, named: Any = None, headers: Any = None) -> None:
            assert PROCESSING_SECRET in json.dumps([given, named, headers])
            if error and failing == "task":
                raise error.with_traceback(None)

        hooks = {failing: raising(error)} if error and failing != "task" else {}
        taskhawk.configure(hooks, TASKHAWK_ERROR_HOOK=error_hook)
        taskhawk._registry.pop("mail.send", None)
        taskhawk.task(name="mail.send", **options)(runs)
        places = [{"args": [value]}, {"kwargs": {"named": value}}]
        where = data.draw(st.sampled_from([*places, {"headers": {"a": value}}]))
        bodies = [
            processing_body(**where),
            processing_body(**where),
            processing_body(**where)[:-1],
            processing_body("mail.receive", **where),
            processing_body(**{**where, "args": [value, value]}),
            processing_body(**{**where, "kwargs": {"unknown": value}}),
            processing_body(**dict.fromkeys(where, value)),
            processing_body(**where, metadata=value),
        ]
        with processing_log() as log:
            message = QueueMessage(data.draw(st.sampled_from(bodies)), "m1")
            assert isinstance(taskhawk.process(message), Outcome)
        assert PROCESSING_SECRET not in log.getvalue()


class TestSync:
    """TASKHAWK_SYNC runs a dispatched task here and now, the way a worker would."""

    def test_runs(self, sync):
        """The call goes through JSON and back; dispatch returns the id, and waits for no delay."""
        runs = []

        @taskhawk.task(name="shop.sell", priority=Priority.bulk)
        def sell(what, metadata, headers):
            runs.append((what, metadata, headers))

        value = ({1: Decimal("1.50")}, (2, Decimal(3)))
        invocation = sell.with_headers(when=(4,)).with_delay(timedelta(days=30))
        message_id = invocation.dispatch(value)
        [(what, metadata, headers)] = runs
        assert same_json(what, [{"1": 1.5}, [2, 3]])
        assert headers == metadata.headers == {"when": [4]}
        assert (metadata.id, metadata.priority) == (message_id, Priority.bulk)
        assert (metadata.receipt, metadata.queue, metadata.attempt) == (None, None, 1)
        assert not metadata.lease_lost
        metadata.extend_visibility_timeout(10)  # of no queue: nothing to do

    @pytest.mark.parametrize(
        "error",
        [
            ValueError("no milk"),
            taskhawk.RetryException("later", delay_seconds=5),
            taskhawk.PostponeException("later", delay_seconds=5),
            taskhawk.LoggingException("no milk", extra={"shop": 1}),
            taskhawk.StopRetry("never"),
            SystemExit(3),
            KeyboardInterrupt(),
        ],
        ids=lambda error: type(error).__name__,
    )
    @pytest.mark.parametrize("where", ["task", "pre", "post"])
    def test_errors(self, where, error):
        """What a task or hook raises comes out of dispatch: nothing is retried or logged."""
        ran = []

        def step(name):
            ran.append(name)
            if name == where:
                raise error

        hooks = {
            f"TASKHAWK_{name.upper()}_PROCESS_HOOK": lambda name=name, **_: step(name)
            for name in ("pre", "post")
        }
        error_hook = lambda **_: ran.append("error hook")  # noqa: E731
        taskhawk.configure(hooks, TASKHAWK_SYNC=True, TASKHAWK_ERROR_HOOK=error_hook)

        @taskhawk.task(name="shop.sell", retry=taskhawk.fixed(0, max_retries=3))
        def sell():
            step("task")

        with pytest.raises(type(error)) as caught:
            sell.dispatch()
        assert caught.value is error
        order = ["pre", "task", "post"]
        assert ran == order[: order.index(where) + 1]

    @pytest.mark.parametrize(
        ("error", "end"),
        [
            (None, "done"),
            (taskhawk.IgnoreException(), "ignored"),
            (OSError(), "failed"),
        ],
    )
    def test_run_hook(self, error, end):
        """The run hook is told how it ended: "failed" where dispatch raises."""
        told = []
        hook = lambda **given: told.append(given)  # noqa: E731
        taskhawk.configure(TASKHAWK_SYNC=True, TASKHAWK_RUN_HOOK=hook)
        fn = raising(error) if error else nothing
        sell = taskhawk.task(name="shop.sell")(fn)
        with contextlib.suppress(OSError):
            sell.dispatch()
        [given] = told
        assert (given["outcome"], given["message"].task_name) == (end, "shop.sell")
        assert given["exception"] is (error if end == "failed" else None)
        assert given["duration_ms"] in range(1000)

    @pytest.mark.parametrize(
        ("queue", "name"),
        [(None, "TASKHAWK-SYNC"), ("shop", "TASKHAWK-SHOP-HIGH-PRIORITY")],
    )
    def test_hooks(self, queue, name):
        """The hooks run around the task, also where it raises IgnoreException."""
        seen = []

        def hook(queue_name, sqs_queue_message):
            body = json.loads(sqs_queue_message.body)
            shop = sqs_queue_message.message_attributes["shop"]
            handle = sqs_queue_message.receipt_handle
            seen.append((queue_name, body["task"], handle, shop))
            sqs_queue_message.change_visibility(VisibilityTimeout=3)  # of no queue
            sqs_queue_message.delete()

        taskhawk.configure(
            TASKHAWK_SYNC=True,
            TASKHAWK_QUEUE=queue,
            TASKHAWK_PRE_PROCESS_HOOK=hook,
            TASKHAWK_POST_PROCESS_HOOK=hook,
        )

        @taskhawk.task(name="shop.sell")
        def sell():
            seen.append("sold")
            raise taskhawk.IgnoreException

        assert sell.with_priority(Priority.high).with_headers(shop="5").dispatch()
        hooked = (name, "shop.sell", None, {"DataType": "String", "StringValue": "5"})
        assert seen == [hooked, "sold", hooked]

    def test_hooks_of_lambda(self):
        """In a Lambda app, the hooks get an SNS record."""
        seen = []
        taskhawk.configure(
            TASKHAWK_SYNC=True,
            IS_LAMBDA_APP=True,
            TASKHAWK_PRE_PROCESS_HOOK=lambda sns_record: seen.append(sns_record["Sns"]),
        )
        message_id = taskhawk.task(name="shop.sell")(plain).dispatch(5)
        [sns] = seen
        message = json.loads(sns["Message"])
        assert sns["MessageId"] == message["id"] == message_id
        assert (message["args"], sns["MessageAttributes"]) == ([5], {})

    def test_needs_nothing(self, tmp_path):
        """Sync mode needs no queue, no region and no credentials, and imports no botocore."""
        code = """
            import sys

            before = set(sys.modules)
            import taskhawk

            @taskhawk.task
            def sell(what):
                print("sold", what)

            sell.dispatch("milk")
            print(sorted({"asyncio", "botocore", "sqlite3"} & (set(sys.modules) - before)))
        """
        lines = python_lines(tmp_path, code, TASKHAWK_SYNC="true")
        assert lines == ["sold milk", "[]"]


LOGGING_MODULE = """
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


@pytest.fixture
def logging_queue(tmp_path: Path) -> Iterator[Callable[..., taskhawk.SqliteBroker]]:
    """Yield a function that queues a message for each of these tasks of LOGGING_MODULE.

    A message's id is the name of its task; the queue is the one of the environment.
    """
    (tmp_path / "jobs.py").write_text(LOGGING_MODULE)
    broker = taskhawk.SqliteBroker(f"sqlite:///{tmp_path}/queue.db")

    def put(*names: str) -> taskhawk.SqliteBroker:
        bodies = [processing_body(f"jobs.{name}", id=f"jobs.{name}") for name in names]
        entries = [Outgoing(body, {}) for body in bodies]
        assert broker.send("TASKHAWK-DEFAULT", entries) == []
        return broker

    yield put
    broker.close()


#: What a call of the batch task does, by its argument.
TOGETHER_ENDS: dict[str, BaseException] = {
    "fail": ValueError("this one"),
    "never": KeyError("this one"),
    "later": taskhawk.RetryException(delay_seconds=7),
    "ignore": taskhawk.IgnoreException(),
}


@pytest.fixture
def together(isolated):
    """Register a batch task that notes its calls; return the notes."""
    notes: list[list[Any]] = []

    @taskhawk.task(batch=5, name="shop.index", never_retry_on=(KeyError,))
    def index(calls: list[taskhawk.Call]) -> None:
        notes.append([call.args[0] for call in calls])
        for call in calls:
            if call.args[0] in TOGETHER_ENDS:
                call.fail(TOGETHER_ENDS[call.args[0]])
        if "stop" in notes[-1]:
            raise LookupError("all of them")
        if "exit" in notes[-1]:
            raise KeyboardInterrupt

    return notes


def together_batch(*calls: Any) -> list[QueueMessage]:
    """Return received messages for the batch task; None is one that is not valid."""
    bodies = [processing_body("shop.index", args=[call]) for call in calls]
    return [
        QueueMessage(body if call is not None else "{", f"m{n}", f"r{n}", queue="Q")
        for n, (call, body) in enumerate(zip(calls, bodies, strict=True), 1)
    ]


def together_no_list(*, calls: Any) -> None:
    """Take the calls by name alone."""


class TestBatchTasks:
    """A batch task gets what waits for it together, and each message its own outcome."""

    @pytest.mark.parametrize("most", [0, 101, "5", 2.5, True, None])
    def test_wrong_option(self, isolated, most):
        """The option says how many calls the task gets at most."""
        assert refused(taskhawk.task(batch=most, name="shop.index"), plain) == (
            f"shop.index has batch={most!r}: expected 1 to 100"
        )

    @pytest.mark.parametrize("fn", [nothing, operator.add, together_no_list])
    def test_wrong_function(self, isolated, fn):
        """Its function takes one argument."""
        assert refused(taskhawk.task(batch=5, name="shop.index"), fn) == (
            "shop.index: expected a function of one argument, the list of calls"
        )

    def test_dispatch(self, memory, together):
        """It is dispatched with any arguments that are JSON, metadata and headers too."""
        index = taskhawk.Task.find_by_name("shop.index")
        index.dispatch(1, "two", metadata=3, headers={"four": None})
        with pytest.raises(TypeError, match=r"args\[0\] is not JSON"):
            index.dispatch(object())
        [received] = receive_all()
        message = json.loads(received.body)
        assert message["args"] == [1, "two"]
        assert message["kwargs"] == {"metadata": 3, "headers": {"four": None}}
        assert not index.accepts_metadata

    def test_alone(self, sync):
        """In sync mode, and where one message waits, it gets that one."""
        seen = []

        @taskhawk.task(batch=5, name="shop.index")
        async def index(calls: list[taskhawk.Call]) -> None:
            await asyncio.sleep(0)
            [call] = calls
            metadata = call.metadata
            assert metadata is taskhawk.current_task()
            seen.append((call.args, call.kwargs, call.headers, metadata.task))
            if call.args:
                call.fail(ValueError("no milk"))

        index.with_headers(a=1).dispatch(b=2)
        assert seen == [([], {"b": 2}, {"a": 1}, "shop.index")]
        assert refused(index.dispatch, 7, error=ValueError) == "no milk"

    def test_in_a_test(self):
        """A user's test calls the function with calls that it makes."""

        @taskhawk.task(batch=5, name="shop.index")
        def index(calls: list[taskhawk.Call]) -> int:
            for call in calls:
                call.fail(ValueError("no"))
            return len(calls)

        call = taskhawk.Call([7], {"what": "milk"})
        assert index([call]) == 1
        assert (str(call.error), call.metadata, call.headers) == ("no", None, {})
        text = "error: expected an exception, got 'no'"
        assert refused(call.fail, "no", error=TypeError) == text

    @pytest.mark.parametrize(
        ("calls", "fates"),
        [
            ("a b c", "acknowledge acknowledge acknowledge"),
            (
                "a fail never later ignore",
                "acknowledge retry dead_letter retry acknowledge",
            ),
            ("a stop ignore never", "retry retry acknowledge dead_letter"),
        ],
    )
    def test_outcomes(self, together, calls, fates):
        """An error of its own is a call's end; the task's error is that of all others."""
        batch = together_batch(*calls.split())
        outcomes = taskhawk._process_all(batch)
        assert together == [calls.split()]
        assert [outcome.fate.name for outcome in outcomes] == fates.split()
        for call, outcome in zip(calls.split(), outcomes, strict=True):
            if outcome.error is not None:
                error = TOGETHER_ENDS.get(call)
                assert outcome.error is error or type(outcome.error) is LookupError
                trace = traceback.format_exception(outcome.error)
                assert sum(line.count("in index") for line in trace) == (not error)
                assert "in _end_run" not in "".join(trace)  # for it would grow
        delays = [outcome.delay_s for outcome in outcomes]
        assert delays == [7 if call == "later" else None for call in calls.split()]

    def test_hooks(self, together, caplog):
        """Hooks see each message, and an error of one fails that one; each is logged."""
        seen, told = [], []

        def hook(name: str, bad: str) -> Callable[..., None]:
            def note(queue_name: Any, sqs_queue_message: QueueMessage) -> None:
                seen.append((name, sqs_queue_message.message_id))
                if sqs_queue_message.message_id == bad:
                    raise OSError(name)

            return note

        taskhawk.configure(
            TASKHAWK_PRE_PROCESS_HOOK=hook("pre", "m1"),
            TASKHAWK_POST_PROCESS_HOOK=hook("post", "m3"),
            TASKHAWK_RUN_HOOK=lambda **given: told.append(given["outcome"]),
        )
        outcomes = taskhawk._process_all(together_batch("a", "b", "c", None, "fail"))
        assert together == [["b", "c", "fail"]]
        fates = [outcome.fate.name for outcome in outcomes]
        assert fates == ["retry", "acknowledge", "retry", "retry", "retry"]
        errors = [type(outcome.error).__name__ for outcome in outcomes]
        assert errors == [
            "OSError",
            "NoneType",
            "OSError",
            "ValidationError",
            "ValueError",
        ]
        post = [("post", "m2"), ("post", "m3")]
        assert seen == [("pre", f"m{n}") for n in range(1, 6)] + post
        assert sorted(told) == ["done", "retry", "retry", "retry", "retry"]

    def test_none_is_left(self, together):
        """Where no message is ready, the task is not called."""
        taskhawk.configure(TASKHAWK_PRE_PROCESS_HOOK=raising(OSError()))
        outcomes = taskhawk._process_all(together_batch("a", "b"))
        assert [outcome.fate for outcome in outcomes] == [Fate.retry] * 2
        assert together == []

    def test_what_surrounds(self, together, monkeypatch):
        """What surrounds a run surrounds each message's, and sees its own error."""
        ends: list[tuple[str, str]] = []

        @contextlib.contextmanager
        def surround(task: Any, received: QueueMessage) -> Iterator[None]:
            if received.message_id == "m2":
                raise taskhawk.PostponeException(delay_seconds=3)
            if received.message_id == "m3":
                raise taskhawk.IgnoreException
            try:
                yield
            except BaseException as error:
                ends.append((received.message_id, type(error).__name__))
                raise
            ends.append((received.message_id, "done"))

        monkeypatch.setattr(taskhawk, "_around_runs", [surround])
        batch = together_batch("a", "b", "c", "fail")
        outcomes = taskhawk._process_all(batch)
        assert together == [["a", "fail"]]
        fates = [outcome.fate.name for outcome in outcomes]
        assert fates == ["acknowledge", "postpone", "acknowledge", "retry"]
        assert ends == [("m1", "done"), ("m4", "ValueError")]
        ends.clear()
        with pytest.raises(KeyboardInterrupt):
            taskhawk._process_all(together_batch("exit", "b", "c", "d"))
        assert ends == [("m1", "KeyboardInterrupt"), ("m4", "KeyboardInterrupt")]

    def test_no_one_message(self, isolated):
        """While several are run, the run is no single message's."""
        seen = []

        @taskhawk.task(batch=5, name="shop.index")
        def index(calls: list[taskhawk.Call]) -> None:
            seen.append((taskhawk.current_task(), [c.metadata.id for c in calls]))

        batch = together_batch("a", "b")
        taskhawk._process_all(batch)
        ids = [json.loads(received.body)["id"] for received in batch]
        assert seen == [(None, ids)]

    def test_find_batch_task(self, isolated):
        """What is not valid, another task's, of a FIFO queue or limited runs by itself."""
        [received] = together_batch("a")
        find = taskhawk._find_batch_task
        taskhawk.task(name="shop.plain")(nothing)
        assert find(received) is None  # no such task
        taskhawk.task(batch=5, name="shop.index")(plain)
        assert (find(received), taskhawk._most_together(received)) == ("shop.index", 1)
        received.batch_task = "shop.index"
        assert taskhawk._most_together(received) == 5
        others = [QueueMessage("{", "m1"), QueueMessage(received.body, "m1")]
        others[1].queue = "Q.fifo"
        others.append(QueueMessage(processing_body("shop.plain"), "m1"))
        taskhawk.configure(TASKHAWK_BROKER="sqlite://")
        index = taskhawk.Task.find_by_name("shop.index")
        index.with_options(time_limit=3).dispatch()
        others += receive_all()
        assert [*map(find, others)] == [None] * 4


class TestLogging:
    """Records say in which task they were made, as JSON too, and after a worker's grace."""

    def test_current_task(self, sync):
        """current_task() is the innermost task's: after a task inside it, again its own."""
        seen = []

        def note():
            seen.append(taskhawk.current_task().task)

        inner = taskhawk.task(name="shop.inner")(note)

        @taskhawk.task(name="shop.outer")
        async def outer():
            await asyncio.to_thread(note)
            inner.dispatch()
            note()

        outer.dispatch()
        assert seen == ["shop.outer", "shop.inner", "shop.outer"]

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

    def test_fields_of_its_own(self, caplog):
        """What a record has of its own stays, and the task's id and attempt are added."""

        def sell():
            logging.getLogger("shop").warning("sold", extra={"task": "mine"})

        caplog.handler.addFilter(taskhawk._add_task)
        processing_run(sell)
        caplog.handler.removeFilter(taskhawk._add_task)
        [record] = caplog.records
        found = (record.task, record.id, record.attempt)
        assert found == ("mine", PROCESSING_ID, 1)

    def test_json(self, tmp_path, logging_queue):
        """With --log-format json each record is an object in a line, and says in which task."""
        logging_queue("talk", "fail", "break")
        command = ["-m", "taskhawk", "listen", "jobs", "--loop-count", "3"]
        env = {"TASKHAWK_BROKER": f"sqlite:///{tmp_path}/queue.db"}
        options = ["--log-format", "json"]
        result = run_python([*command, *options], cwd=tmp_path, env=env)
        lines = [json.loads(line) for line in result.stderr.splitlines()]
        by_text = {line["message"]: line for line in lines}
        for text, name in (
            ("from the task", "jobs.talk"),
            ("from its thread", "jobs.talk"),
            ("from a child", "jobs.fail"),
        ):
            line = by_text[text]
            found = (line["task"], line["id"], line["attempt"], line["logger"])
            assert found == (name, name, 1, "jobs")
        assert by_text["from the task"]["order"] == 7
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", lines[0]["time"])
        failed = {
            line["task"]: (line["level"], line["exception"].splitlines()[-1])
            for line in lines
            if line.get("outcome") == "retry"
        }
        assert failed == {
            "jobs.fail": ("ERROR", "ValueError: for a reason"),
            "jobs.break": ("ERROR", "ValueError: for another"),
        }
        assert by_text["worker ended: " + result.stdout.strip()]["level"] == "INFO"

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("job", "retried", "concurrency"), [("hang", 0, "1"), ("spin", 1, "2")]
    )
    def test_grace(self, tmp_path, logging_queue, job, retried, concurrency):
        """A command ends with its grace, flushes, says what became of messages, exits with 1."""
        broker = logging_queue("quick", job)
        env = {"TASKHAWK_BROKER": f"sqlite:///{tmp_path}/queue.db"}
        options = ("--grace", "3.1", "--num-messages", "2", "--concurrency")
        with worker_process(
            tmp_path, env, *options, concurrency, module=LOGGING_MODULE
        ) as worker:
            assert worker.stdout.readline() == "hangs\n"
            worker.terminate()
            output = worker.stdout.read()
            assert worker.wait() == 1
        assert output == (
            f"2 received, 1 acked, {retried} retried, 0 dead-lettered, 0 postponed, 0 released,"
            " 0 uncertain\n"
        )
        visible, in_flight, _ = broker.depth("TASKHAWK-DEFAULT")
        assert (visible, in_flight) == (retried, 1 - retried)


# --- 14. holdings ---------------------------------------------------------------------


class Service:
    """A queue as SQS behaves: for each receipt, until when it hides the message."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.hidden_until: dict[str, float] = {}
        self.received_at: dict[str, float] = {}

    def receive(self, receipt: str, at: float, lease_s: float) -> None:
        """Hide a message from that time on."""
        self.received_at[receipt], self.hidden_until[receipt] = at, at + lease_s

    def apply(self, call: Any, at: float) -> dict[int, taskhawk.Refusal]:
        """Make a call at that time, and return its refusals, by place."""
        refused = {}
        for place, entry in enumerate(call.entries()):
            receipt, seconds = entry if isinstance(entry, tuple) else (entry, None)
            if self.chance.random() < 0.1:
                refused[place] = taskhawk.Refusal(place, "Chaos", "by chance", False)
            elif seconds is None:
                self.hidden_until[receipt] = math.inf  # it is gone
            elif at >= self.hidden_until[receipt]:
                text = "it is not in flight"
                refused[place] = taskhawk.Refusal(place, "NotInflight", text, True)
            elif at + seconds > self.received_at[receipt] + 43_200:
                assert at - call.asked_at > 10  # else we asked for too much
                text = "beyond 12 hours"
                refused[place] = taskhawk.Refusal(place, "Invalid", text, True)
            else:
                self.hidden_until[receipt] = at + seconds
        return refused


class HoldingsMachine(hypothesis.stateful.RuleBasedStateMachine):
    """Any order of receives, runs, faults and pauses; no thread, no sleep, no I/O."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.holdings = taskhawk._Holdings(["HIGH", "LOW"])
        self.receives: list[tuple[str, float, float]] = []  # under way
        self.running: list[Any] = []
        self.calls: list[tuple[Any, float]] = []  # under way, and how far they got
        self.count = 0
        self.ended: dict[str, str] = {}  # what a run was to become, by receipt
        self.done: set[str] = set()  # receipts whose delete or delay was confirmed
        self.denied: set[str] = set()  # receipts whose lease could not be extended

    @hypothesis.stateful.initialize(seed=st.integers())
    def begin(self, seed: int) -> None:
        """Draw what chance decides."""
        self.service = Service(random.Random(seed))

    @hypothesis.stateful.rule(
        queue=st.sampled_from(["HIGH", "LOW"]),
        lease_s=st.sampled_from([1, 3, 30, 43_200]),
    )
    def ask(self, queue: str, lease_s: float) -> None:
        """Begin a receive; others may be under way."""
        self.receives.append((queue, lease_s, self.now))

    @hypothesis.stateful.precondition(lambda self: self.receives)
    @hypothesis.stateful.rule(
        count=st.integers(1, 10),
        which=st.integers(0, 99),
        took_s=st.sampled_from([0, 0, 0.5, 2.5, 19]),
    )
    def receive(self, count: int, which: int, took_s: float) -> None:
        """Receive: the service hides the messages at some time during the call."""
        queue, lease_s, asked_at = self.receives.pop(which % len(self.receives))
        self.now += took_s
        hidden_at = self.service.chance.uniform(asked_at, self.now)
        messages = []
        for _ in range(count):
            self.count += 1
            receipt = f"r{self.count}"
            self.service.receive(receipt, hidden_at, lease_s)
            most = self.service.chance.choice((1, 5))
            message = QueueMessage("", f"m{self.count}", receipt, queue=queue)
            messages.append(dataclasses.replace(message, max_receive_count=most))
        self.holdings.take(messages, lease_s, asked_at, self.now)

    @hypothesis.stateful.rule(most=st.sampled_from([1, 1, 3, 100]))
    def start(self, most: int) -> None:
        """Start the most urgent message: nobody else can have it by now.

        Others of its queue may run together with it.
        """
        waiting = [h for h in self.holdings.held if h.state == "received" and not h.end]
        held = self.holdings.start(self.now)
        if held is None:
            assert not any(h.is_sure and h.lease_until > self.now for h in waiting)
            return
        more = self.holdings.start_more(held, most, self.now)
        assert len(more) < most
        assert {held.queue} >= {each.queue for each in more}
        for each in (held, *more):
            receipt = each.message.receipt_handle
            assert receipt not in self.done
            if receipt not in self.denied:
                assert self.service.hidden_until[receipt] > self.now
        self.running += more
        if held.queue == "LOW":
            startable = (h for h in waiting if h.is_sure and h.lease_until > self.now)
            assert "HIGH" not in {h.queue for h in startable}
        self.running.append(held)

    @hypothesis.stateful.precondition(lambda self: self.running)
    @hypothesis.stateful.rule(
        end=st.sampled_from(
            ["acked", "retried", "dead_lettered", "postponed", "released"]
        ),
        delay_s=st.sampled_from([None, 0, 5, 60, 50_000]),
        which=st.integers(0, 1_000),
    )
    def finish(self, end: str, delay_s: float | None, which: int) -> None:
        """End one of the runs."""
        held = self.running.pop(which % len(self.running))
        self.ended[held.message.receipt_handle] = end
        if end == "released":
            self.holdings.release(held, self.now)
        else:
            self.holdings.finish(held, end, self.now, delay_s)

    @hypothesis.stateful.rule()
    def call(self) -> None:
        """Begin the call that is due, if there is one; others may be under way."""
        self.holdings.expire(self.now)
        free = [held for held in self.holdings.held if not held.in_call]
        due_at = [min(held.decided_at, held.renew_at) for held in free]
        call = self.holdings.calls.next(self.now)
        if call is None:
            assert self.holdings.calls.next_at() > self.now
            return
        is_full = len(call.batch) == 10
        assert not self.calls or is_full or min(due_at) <= self.now - 0.0999
        under_way = [held for other, _ in self.calls for held in other.batch]
        assert not set(map(id, call.batch)) & set(map(id, under_way))
        assert 1 <= len(call.batch) <= 10
        assert {held.queue for held in call.batch} == {call.queue}
        for held in call.batch:
            receipt = held.message.receipt_handle
            assert receipt not in self.done
            end = self.ended.get(receipt)
            if call.kind.name == "delete":
                assert end in {"acked", "dead_lettered", "postponed"}
            elif call.kind.name == "delay":
                assert end in {"retried", "released"} or held.state == "received"
            else:
                assert end in {None, "acked", "dead_lettered", "postponed"}
        self.calls.append((call, self.now))

    @hypothesis.stateful.precondition(lambda self: self.calls)
    @hypothesis.stateful.rule(
        fault=st.sampled_from(["none", "none", "none", "before", "after", "denied"]),
        took_s=st.sampled_from([0, 0.01, 2]),
    )
    def answer(self, fault: str, took_s: float) -> None:
        """Answer a call that is under way, or lose it, or lose its answer."""
        call, _ = self.calls.pop(0)
        self.now += took_s
        refused = {}
        if fault in {"none", "after"}:
            at = self.now - took_s * self.service.chance.random()
            refused = self.service.apply(call, max(at, call.asked_at))
        if fault != "none":
            code = "AccessDenied" if fault == "denied" else "TimeoutError"
            whole = taskhawk.Refusal(0, code, fault, final=False)
            refused = dict.fromkeys(range(len(call.batch)), whole)
        elif call.kind.name != "extend":
            places = set(range(len(call.batch))) - refused.keys()
            self.done |= {call.batch[place].message.receipt_handle for place in places}
        if fault == "denied":
            self.denied |= {held.message.receipt_handle for held in call.batch}
        self.holdings.calls.answered(call, refused)

    @hypothesis.stateful.rule(seconds=st.sampled_from([0.05, 0.3, 1, 9, 31, 40_000]))
    def wait(self, seconds: float) -> None:
        """Let time go by."""
        self.now += seconds

    @hypothesis.stateful.invariant()
    def nothing_is_lost(self) -> None:
        """Each message received is held, or ended in one of the ways."""
        counts = dataclasses.asdict(self.holdings.ledger)
        assert counts.pop("received") == self.count
        assert sum(counts.values()) + len(self.holdings.held) == self.count
        holdings = self.holdings
        runs = [held for held in self.running if held.is_run]
        assert holdings.running == len(runs)
        known = holdings.waiting + len(self.running) + len(holdings.decided)
        assert known == len(holdings.held)

    def teardown(self) -> None:
        """Shut down: whatever happened, all is accounted for within a minute of calls."""
        holdings = self.holdings
        for held in self.running:
            holdings.finish(held, "acked", self.now)
        while self.receives:
            self.receive(1, 0, 0)
        holdings.release_waiting(self.now)
        while held := holdings.start(self.now):
            assert held.message.would_be_redriven
            holdings.finish(held, "postponed", self.now)
        holdings.end_leases()
        for call, _ in self.calls:
            holdings.calls.answered(call, {})
        for _ in range(10 * self.count + 10):
            call = holdings.calls.next(self.now)
            if call:
                holdings.calls.answered(call, {})
            self.now += 0.1
        assert not holdings.decided
        assert holdings.ledger.balanced
        assert holdings.unanswered <= holdings.ledger.uncertain


TestHoldingsMachine = HoldingsMachine.TestCase
TestHoldingsMachine.settings = hypothesis.settings(
    max_examples=100, stateful_step_count=100, deadline=None
)


def held_messages(
    count: int, queue: str = "Q", lost: bool = False
) -> list[QueueMessage]:
    """Return received messages m1, m2, … of a queue."""
    return [
        QueueMessage("", f"m{n}", f"r{n}", queue=queue, lease_lost=lost)
        for n in range(1, count + 1)
    ]


def holding(
    count: int = 1, *, started: int | None = None, queue: str = "Q", **options: Any
) -> tuple[Any, list[Any]]:
    """Return holdings that took messages at 0 s with a lease of 30 s, and the started ones."""
    holdings = taskhawk._Holdings([queue], **options)
    holdings.take(held_messages(count, queue), 30, 0, 0)
    starts = count if started is None else started
    return holdings, [holdings.start(0) for _ in range(starts)]


def receipts(call: Any) -> list[str] | None:
    """Return the receipts of a call, None where there is no call."""
    return call and [held.message.receipt_handle for held in call.batch]


def refusing(code: str = "Busy", *, final: bool = False) -> dict[int, taskhawk.Refusal]:
    """Return the answer to a call that refuses its first message."""
    return {0: taskhawk.Refusal(0, code, "no", final)}


class Busy:
    """Holdings whose messages end one after another, and a keeper: time is passed in.

    :param calls: how many the keeper makes at once
    :param latency_ms: of each
    """

    def __init__(self, queues: list[str], calls: int, latency_ms: int) -> None:
        self.holdings = taskhawk._Holdings(queues)
        self.calls, self.latency_ms = calls, latency_ms
        self.now_ms = 0
        self.under_way: collections.deque[tuple[int, Any]] = collections.deque()
        self.made: collections.Counter[str] = collections.Counter()
        self.slowest_ms = 0.0  # from the end of a run to its answer

    def end(self, queue: str, end: str) -> None:
        """Receive a message, run it, and have it end."""
        now = self.now_ms / 1000
        self.holdings.take(held_messages(1, queue), 30, now, now)
        self.holdings.finish(self.holdings.start(now), end, now, 60)

    def step(self) -> None:
        """Answer calls, begin those that are due, and let a millisecond go by."""
        while self.under_way and self.under_way[0][0] <= self.now_ms:
            _, call = self.under_way.popleft()
            self.holdings.calls.answered(call, {})
            waited_s = [self.now_ms / 1000 - held.decided_at for held in call.batch]
            self.slowest_ms = max(self.slowest_ms, *(1000 * s for s in waited_s), 0)
        while len(self.under_way) < self.calls:
            call = self.holdings.calls.next(self.now_ms / 1000)
            if call is None:
                break
            self.made[call.kind.name] += 1
            self.under_way.append((self.now_ms + self.latency_ms, call))
        self.now_ms += 1


FINAL, BUSY = refusing(final=True), refusing()
FORBIDDEN = refusing("AccessDenied")
TWICE = "message m1 may run twice: "
AGAIN = "message m1 may run again: "


class TestHoldings:
    """What becomes of the messages that a worker holds, told without a thread or a clock."""

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
        ends = set().union(*taskhawk._STEPS.values()) - taskhawk._STEPS.keys()
        assert ends | {"received"} == set(vars(taskhawk.Ledger()))

    def test_wrong_step(self):
        """No message is acknowledged that was not run."""
        holdings, [held] = holding()
        holdings.finish(held, "acked", 1)
        with pytest.raises(
            RuntimeError, match=r"^a message can't go from finished to finished$"
        ):
            holdings.finish(held, "retried", 2)

    def test_counts(self):
        """What waits, what runs and what has ended are told apart."""
        holdings, [first, second] = holding(5, started=2)
        holdings.finish(first, "acked", 1)
        assert (holdings.waiting, holdings.running, len(holdings.decided)) == (3, 1, 1)
        assert holdings.still_run() == [second.message]

    def test_overdue(self):
        """What is decided and in no call is overdue once it is two full batches."""
        holdings, runs = holding(22)
        overdue = []
        for run in runs[:21]:
            holdings.finish(run, "acked", 1)
            overdue.append(holdings.calls.is_overdue)
        assert overdue == [False] * 19 + [True] * 2
        call = holdings.calls.next(1)
        assert not holdings.calls.is_overdue
        holdings.calls.answered(call, dict.fromkeys(range(10), BUSY[0]))
        assert holdings.calls.is_overdue

    @pytest.mark.parametrize(
        ("took_s", "answer", "starts_at", "news"),
        [
            (0, {}, 0, []),
            (20, {}, 20, []),  # two thirds of the lease: a third is left for sure
            (21, {}, 21.1, []),
            (21, BUSY, None, []),
            (21, FORBIDDEN, 21.1, []),
            (21, FINAL, None, [TWICE + "no"]),
            (29, {}, 29.1, []),
        ],
    )
    def test_slow_receive(self, took_s, answer, starts_at, news):
        """After a slow receive, a message is started once its lease is known to hold."""
        holdings = taskhawk._Holdings(["Q"])
        holdings.take(held_messages(1), 30, 0, took_s)
        held = holdings.start(took_s)
        assert (held is not None) is (starts_at == took_s)
        if held is None:
            call = holdings.calls.next(took_s)
            assert call.entries() == [("r1", 30)]
            holdings.calls.answered(call, answer)
            held = holdings.start(took_s + 0.1)
            assert (held is not None) is (starts_at is not None)
        assert [text for _, text in holdings.news] == news
        assert holdings.ledger.released == len(news)

    def test_lease(self):
        """A lease is extended each third of it, counted from the calls."""
        holdings, _ = holding()
        assert (holdings.calls.next_at(), holdings.calls.next(9.9)) == (10, None)
        for asked_at in (10, 20.5, 31):
            call = holdings.calls.next(asked_at)
            assert (call.kind.value, call.entries()) == ("extend leases", [("r1", 30)])
            assert holdings.calls.next(asked_at) is None  # one is under way
            holdings.calls.answered(call, {})
            assert holdings.calls.next(asked_at + 9.9) is None
            assert holdings.calls.next_at() == asked_at + 10

    @pytest.mark.parametrize(("answer", "again_s"), [(BUSY, 1.5), (FORBIDDEN, 10)])
    def test_lease_not_extended(self, answer, again_s):
        """An extension that failed is tried again; a denied one, a third of the lease later."""
        holdings, _ = holding()
        holdings.calls.answered(holdings.calls.next(10), answer)
        assert holdings.calls.next(10 + again_s - 0.1) is None
        assert holdings.calls.next_at() == 10 + again_s
        assert receipts(holdings.calls.next(10 + again_s)) == ["r1"]

    @pytest.mark.parametrize(
        ("lease_s", "at", "why"),
        [
            (30, 30, "its lease ended before it could be extended"),
            (43_200, 43_189.5, "it was received 12 hours ago"),
        ],
    )
    def test_lease_lost(self, lease_s, at, why):
        """A lease that ended, or that can't be extended any more, is lost."""
        holdings = taskhawk._Holdings(["Q"])
        holdings.take(held_messages(1), lease_s, 0, 0)
        held = holdings.start(0)
        holdings.expire(at)
        assert holdings.news == [(logging.WARNING, TWICE + why)]
        assert held.message.lease_lost
        assert holdings.calls.next(at) is None
        holdings.finish(held, "retried", at, 5)  # others have it: no delay is sent
        assert holdings.ledger == taskhawk.Ledger(received=1, retried=1)

    def test_lease_within_12_hours(self):
        """No extension and no delay asks for more than SQS allows."""
        holdings = taskhawk._Holdings(["Q"])
        holdings.take(held_messages(1), 30_000, 0, 0)
        held = holdings.start(0)
        call = holdings.calls.next(20_000)
        assert call.entries() == [("r1", 23_190)]
        holdings.calls.answered(call, {})
        holdings.finish(held, "retried", 30_000, 43_200)
        assert holdings.calls.next(30_000).entries() == [("r1", 13_190)]

    def test_start_more(self):
        """What runs together waits in one queue for one task, under a lease that holds."""
        holdings = taskhawk._Holdings(["P", "Q"])
        holdings.take(held_messages(2, "Q"), 3, 0, 0)
        holdings.take(held_messages(6, "Q"), 30, 0, 0)
        holdings.take(held_messages(2, "P"), 30, 0, 0)
        holdings.take(held_messages(1, "Q"), 30, 0, 29)
        for held in holdings.held:
            held.message.batch_task = "index"
            if held.message.message_id == "m3":
                held.message.batch_task = None
        holdings.start(1), holdings.start(1)
        first = holdings.start(1)
        more = holdings.start_more(first, 5, 4)
        assert [held.message.message_id for held in more] == ["m1", "m2", "m4", "m5"]
        assert (holdings.running, len(holdings.still_run())) == (3, 7)
        for held in (first, *more):
            holdings.finish(held, "acked", 5)
        assert (holdings.running, len(holdings.decided)) == (2, 5)

    def test_lost_while_waiting(self):
        """A message whose lease ended, or was lost, while it waited is not started."""
        holdings, _ = holding(2, started=0)
        call = holdings.calls.next(10)
        holdings.calls.answered(call, FINAL)
        assert holdings.start(29).message.message_id == "m2"
        holdings.take(held_messages(1), 30, 0, 0)
        assert holdings.start(30) is None
        assert [text for _, text in holdings.news] == [
            TWICE + "no",
            TWICE + "its lease ended while it waited",
        ]
        assert holdings.ledger.released == 2

    def test_urgency(self):
        """The most urgent of what waits is started first, and of each queue the oldest."""
        holdings = taskhawk._Holdings(["H", "L"])
        for queue, first in (("L", 1), ("H", 3), ("L", 5), ("H", 7)):
            messages = [
                QueueMessage("", f"m{n}", "r", queue=queue) for n in (first, first + 1)
            ]
            holdings.take(messages, 30, 0, 0)
        order = [holdings.start(0).message.message_id for _ in range(8)]
        assert order == ["m3", "m4", "m7", "m8", "m1", "m2", "m5", "m6"]

    @pytest.mark.parametrize(
        ("held", "ended", "queue", "options", "due_s"),
        [
            (2, 1, "Q", {}, 0.05),
            (1, 1, "Q", {}, 0),
            (11, 9, "Q", {}, 0.05),
            (11, 10, "Q", {}, 0),
            (2, 1, "Q.fifo", {}, 0),
            (2, 1, "Q", {"ack_wait_s": 0}, 0),
            (2, 1, "Q", {"ack_wait_s": 3}, 3),
        ],
    )
    def test_acknowledgement(self, held, ended, queue, options, due_s):
        """An acknowledgement waits for others, unless ten are there or no more can come."""
        holdings, runs = holding(held, queue=queue, **options)
        for run in runs[:ended]:
            holdings.finish(run, "acked", 1)
        assert holdings.calls.next_at() == 1 + due_s
        assert due_s == 0 or holdings.calls.next(1 + due_s - 0.01) is None
        call = holdings.calls.next(1 + due_s)
        assert call.kind.value == "delete"
        assert call.entries() == [f"r{n}" for n in range(1, ended + 1)]
        holdings.calls.answered(call, {})
        assert holdings.ledger.acked == ended

    def test_shared_call(self):
        """What is due takes along new acknowledgements, and no other queue's."""
        holdings = taskhawk._Holdings(["P", "Q"])
        holdings.take(held_messages(3, "Q"), 30, 0, 0)
        holdings.take(held_messages(2, "P"), 30, 0, 0)
        others, runs = [holdings.start(0) for _ in range(2)], []
        runs += [holdings.start(0) for _ in range(2)]
        holdings.finish(others[0], "dead_lettered", 1)
        holdings.finish(runs[0], "acked", 1.03)
        holdings.finish(runs[1], "acked", 1.07)
        call = holdings.calls.next(1.08)
        assert (call.queue, receipts(call)) == ("P", ["r1"])
        holdings.calls.answered(call, {})
        call = holdings.calls.next(1.08)
        assert (call.queue, receipts(call)) == ("Q", ["r1", "r2"])

    @pytest.mark.parametrize(
        ("end", "answer", "asked_at", "ledger", "news"),
        [
            ("acked", {}, 1, {"acked": 1}, []),
            ("dead_lettered", {}, 1, {"dead_lettered": 1}, []),
            ("postponed", {}, 1, {"postponed": 1}, []),
            ("postponed", {}, 30, {"uncertain": 1}, [AGAIN + "its lease had ended"]),
            ("acked", BUSY, 1, {}, []),
            ("acked", FORBIDDEN, 1, {}, []),
            ("acked", FINAL, 1, {"uncertain": 1}, [AGAIN + "no"]),
            ("acked", {}, 30, {"uncertain": 1}, [AGAIN + "its lease had ended"]),
            ("acked", BUSY, 30, {"uncertain": 1}, [AGAIN + "no"]),
            ("retried", {}, 1, {"retried": 1}, []),
            ("retried", BUSY, 1, {}, []),
            *[
                (
                    "retried",
                    answer,
                    asked_at,
                    {"retried": 1},
                    ["message m1 is visible again when its lease ends: no"],
                )
                for answer, asked_at in ((FINAL, 1), (FORBIDDEN, 1), (BUSY, 30))
            ],
        ],
    )
    def test_end(self, end, answer, asked_at, ledger, news):
        """What the queue answers to a delete or a delay decides how a message ends."""
        holdings, [held] = holding()
        holdings.finish(held, end, 1, 7)
        if asked_at == 30:
            holdings.end_leases()
        call = holdings.calls.next(asked_at)
        assert call.kind.value == ("set delays" if end == "retried" else "delete")
        holdings.calls.answered(call, answer)
        assert holdings.ledger == taskhawk.Ledger(received=1, **ledger)
        assert [text for _, text in holdings.news] == news
        assert holdings.unanswered == (asked_at == 30 and "uncertain" in ledger)
        assert bool(holdings.decided) == (not ledger)

    def test_tries(self):
        """What fails is tried again after pauses that double from 0.2 s to 5 s."""
        holdings, [held] = holding()
        holdings.finish(held, "acked", 1)
        at, pauses = 1, []
        for _ in range(7):
            call = holdings.calls.next(at)
            if call.kind.value == "extend leases":
                holdings.calls.answered(call, {})
                call = holdings.calls.next(at)
            holdings.calls.answered(call, BUSY)
            pauses.append(held.due_at - at)
            at = held.due_at
        assert pauses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5, 5])

    def test_tried_alone(self):
        """What was refused is not tried before its time because others are due."""
        holdings, [first, second, _] = holding(3)
        holdings.finish(first, "acked", 1)
        holdings.calls.answered(holdings.calls.next(1.05), BUSY)
        holdings.finish(second, "acked", 1.1)
        call = holdings.calls.next(1.2)
        assert receipts(call) == ["r2"]
        holdings.calls.answered(call, {})
        assert receipts(holdings.calls.next(1.3)) == ["r1"]

    def test_order_of_calls(self):
        """Leases and the others take turns; what has been due for longest comes first."""
        holdings, runs = holding(13)
        holdings.finish(runs[0], "retried", 9, 60)
        for run in runs[1:11]:
            holdings.finish(run, "acked", 9.01)
        holdings.finish(runs[11], "retried", 9.02)
        kinds = []
        while call := holdings.calls.next(10):
            kinds.append((call.kind.name, len(call.batch)))
            holdings.calls.answered(call, {})
        assert kinds == [("extend", 10), ("delay", 2), ("extend", 1), ("delete", 10)]

    def test_calls_at_once(self):
        """Besides a call under way one is made that is full, or has waited for a while."""
        holdings, runs = holding(25)
        holdings.finish(runs[0], "acked", 1)
        first = holdings.calls.next(1.05)
        holdings.finish(runs[1], "retried", 1.06, 60)
        for run in runs[2:13]:
            holdings.finish(run, "acked", 1.07)
        full = holdings.calls.next(1.07)
        assert receipts(full) == [f"r{n}" for n in range(3, 13)]
        assert holdings.calls.next_at() == pytest.approx(1.16)
        assert holdings.calls.next(1.15) is None
        overdue = holdings.calls.next(1.17)
        assert overdue.entries() == [("r2", 60)]
        for call in (first, full, overdue):
            assert holdings.calls.next(1.18) is None
            holdings.calls.answered(call, {})
        assert receipts(holdings.calls.next(1.18)) == ["r13"]

    def test_lease_during_a_wait(self):
        """What waits for a delete is in none while its lease is extended."""
        holdings, [first, second, _] = holding(3, ack_wait_s=9.5)
        holdings.finish(first, "acked", 0)
        holdings.calls.answered(holdings.calls.next(9.5), BUSY)
        holdings.finish(second, "acked", 9.6)
        extension = holdings.calls.next(10)
        assert receipts(extension) == ["r1", "r2", "r3"]
        assert (holdings.calls.left, holdings.calls.next(30)) == (0, None)
        holdings.calls.answered(extension, {})
        assert receipts(holdings.calls.next(19.5)) == ["r1", "r2"]

    def test_many_acknowledgements(self):
        """At 30 ms a call, 1,000 messages a second are acknowledged as they come."""
        busy = Busy(["Q"], calls=taskhawk._MAX_CALLS, latency_ms=30)
        while busy.now_ms < 3_000:
            assert not busy.holdings.calls.is_overdue
            busy.end("Q", "acked")
            busy.step()
        assert busy.holdings.ledger.acked > 2_900
        assert busy.holdings.ledger.acked / busy.made["delete"] > 9

    @pytest.mark.parametrize("queues", [["A"], ["A", "B", "C"]])
    def test_delay_among_deletes(self, queues):
        """A delay is sent within a second though deletes never cease."""
        busy = Busy(queues, calls=taskhawk._MAX_CALLS, latency_ms=30)
        while busy.now_ms < 10_000:
            if busy.now_ms % 100 == 0:
                busy.end(queues[-1], "retried")
            while not busy.holdings.calls.is_overdue:
                for queue in queues:
                    busy.end(queue, "acked")
            busy.step()
        assert busy.holdings.ledger.retried > 80
        assert busy.slowest_ms < 1_000

    @pytest.mark.parametrize(
        ("delay_s", "entries"), [(None, None), (0, [("r1", 0)]), (60, [("r1", 60)])]
    )
    def test_retry(self, delay_s, entries):
        """A retry is visible again after its delay, or at the end of its lease."""
        holdings, [held] = holding()
        holdings.finish(held, "retried", 1, delay_s)
        call = holdings.calls.next(1)
        assert (call and call.entries()) == entries
        assert holdings.ledger.retried == (entries is None)

    def test_delay_during_an_extension(self):
        """A delay is sent after the extension that was under way when its run ended."""
        holdings, [held] = holding()
        extension = holdings.calls.next(10)
        holdings.finish(held, "retried", 10.1, 600)
        assert holdings.calls.next(10.2) is None
        holdings.calls.answered(extension, {})
        assert holdings.calls.next(10.3).entries() == [("r1", 600)]
        assert holdings.calls.next(25) is None  # out of the lease for good

    def test_lost_during_a_call(self):
        """A message that is given up while a call is under way ends once."""
        holdings, _ = holding(1, started=0)
        call = holdings.calls.next(10)
        assert holdings.start(30) is None
        holdings.calls.answered(call, {})
        assert holdings.ledger == taskhawk.Ledger(received=1, released=1)

    def test_release(self):
        """What waits, and what could not begin, is visible again at once."""
        holdings, [held] = holding(2, started=1)
        holdings.release(held, 1)
        holdings.release_waiting(1)
        assert not holdings.still_run()
        call = holdings.calls.next(1)
        assert call.entries() == [("r1", 0), ("r2", 0)]
        holdings.calls.answered(call, {})
        assert holdings.ledger == taskhawk.Ledger(received=2, released=2)

    @pytest.mark.parametrize(
        ("queue", "took_s", "waiting"), [("Q", 0, 1), ("Q", 21, 0), ("Q.fifo", 0, 0)]
    )
    def test_release_at_the_last_receive(self, queue, took_s, waiting):
        """What its queue would dead-letter is not released, unless a copy is worse.

        A FIFO queue's order would suffer, and where the lease is not sure, another may
        have the message.
        """
        holdings = taskhawk._Holdings([queue])
        first, last = held_messages(2, queue)
        last.max_receive_count = 1
        holdings.take([first, last], 30, 0, took_s)
        holdings.release_waiting(took_s)
        assert (holdings.waiting, len(holdings.decided)) == (waiting, 2 - waiting)
        holdings.close()
        assert holdings.ledger == taskhawk.Ledger(received=2, released=2)

    def test_closing(self):
        """While it closes, no lease is extended: leases bound how long deletes are tried."""
        holdings, [first, _] = holding(2)
        holdings.finish(first, "acked", 1)
        holdings.end_leases()
        holdings.expire(40)
        assert holdings.calls.next_at() == 1.05
        assert receipts(holdings.calls.next(10)) == ["r1"]

    def test_close(self):
        """In the end, what is decided ends whatever is done; what runs is left to run."""
        holdings, runs = holding(5, started=4)
        ends = ("acked", "dead_lettered", "retried")
        for run, end in zip(runs, ends, strict=False):
            holdings.finish(run, end, 1)
        holdings.release_waiting(1)
        holdings.end_leases()
        holdings.close()
        assert holdings.ledger == taskhawk.Ledger(
            received=5, uncertain=2, retried=1, released=1
        )
        assert (holdings.unanswered, holdings.still_run()) == (2, [runs[3].message])

    def test_untried(self):
        """What ended after a time, and was not told to the queue, is known."""
        holdings, [held, _] = holding(2)
        holdings.finish(held, "acked", 5)
        assert (holdings.untried(5), holdings.untried(6)) == (True, False)
        holdings.calls.answered(holdings.calls.next(6), BUSY)
        assert not holdings.untried(5)


# --- 15. the keeper -------------------------------------------------------------------

WORKER_TOO_LARGE = taskhawk.MessageTooLarge("it is too large", 256)


class WorkerDenied(taskhawk.ConfigurationError):
    """What a broker raises where IAM does not allow a call, as far as it matters."""

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


def worker_lose(error: BaseException) -> Callable[..., Any]:
    """Return a fault: the call has its effect, and its answer is lost."""

    def fault(real: Any, *args: Any) -> Any:
        real()
        raise error

    return fault


def worker_logs(
    caplog: pytest.LogCaptureFixture, level: int = logging.WARNING
) -> list[str]:
    """Return the texts that were logged at that level or above, with "ID" for ids."""
    return [
        re.sub(MESSAGE_ID, "ID", record.getMessage())
        for record in caplog.records
        if record.levelno >= level
    ]


def worker_after_a_while(look: Callable[[], Any]) -> Any:
    """Look at what may not change, after a time in which it could: too short passes."""
    time.sleep(0.3)
    return look()


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


WORKER_ISOLATED = """
import taskhawk

@taskhawk.task(isolate=True)
def fine():
    pass
"""
#: With another task, for which the worker receives before a child has started.
WORKER_PARTLY_ISOLATED = f"{WORKER_ISOLATED}\n@taskhawk.task\ndef plain():\n    pass\n"
#: A task for each thing that a task may start; it says whether that went as it should.
WORKER_STARTERS = """
import asyncio, multiprocessing, os, signal, subprocess, taskhawk

FORKING = multiprocessing.get_context("fork")
HANDLERS = [signal.SIG_DFL, signal.default_int_handler]

def says(fn):
    def said():
        os.write(1, f"{fn.__name__} {fn()}\\n".encode())
    return taskhawk.task(name=f"jobs.{fn.__name__}")(said)

@says
def pool():
    with FORKING.Pool(2) as pool:
        return pool.map(abs, [-1, 1]) == [1, 1]

@says
def program():
    process = subprocess.Popen(["sleep", "60"])
    process.terminate()
    return process.wait() == -signal.SIGTERM

@says
def shell():
    return subprocess.call(["sh", "-c", "kill -INT $$; sleep 60"]) == -signal.SIGINT

async def sleep():
    process = await asyncio.create_subprocess_exec("sleep", "60")
    process.terminate()
    return await process.wait() == -signal.SIGTERM

@says
def coroutine():
    return asyncio.run(sleep())

@says
def fork():
    codes = set()
    for _ in range(10):
        process = FORKING.Process(target=signal.pause)
        process.start()
        process.terminate()
        process.join()
        codes.add(process.exitcode)
    return codes == {-signal.SIGTERM}

@says
def own():
    if forked := os.fork():
        return os.waitpid(forked, 0)[1] == 0
    found = [*map(signal.getsignal, (signal.SIGTERM, signal.SIGINT))]
    os._exit((found, signal.set_wakeup_fd(-1)) != (HANDLERS, -1))

@says
def back():
    if forked := os.fork():
        return os.waitpid(forked, 0)[1] == 0
    raise KeyError("the message is not the child's")
"""
WORKER_ACTS: dict[str, Callable[[], Any]] = {
    "run": plain,
    "ignore": raising(taskhawk.IgnoreException()),
    "fail": raising(ValueError("a failed run")),
    "never": raising(KeyError("never again")),
    "retry": raising(taskhawk.RetryException(delay_seconds=7)),
    "leave": raising(taskhawk.RetryException("not now")),
    "postpone": raising(taskhawk.PostponeException("not yet", delay_seconds=7)),
}


@pytest.fixture
def worker_act() -> Iterator[Any]:
    """Yield a task that does what WORKER_ACTS says; what a test adds there is removed."""
    before = dict(WORKER_ACTS)

    @taskhawk.task(name="work.act", never_retry_on=(KeyError,))
    def act(name: str) -> None:
        WORKER_ACTS[name]()

    yield act
    WORKER_ACTS.clear()
    WORKER_ACTS.update(before)


class TestKeeper:
    """One thread makes the calls that are due, in time, and says what fails."""

    def test_waits_for_no_tick(self, worker_broker, worker_act, monkeypatch):
        """Whoever waits is woken by what it waits for, and not by a look now and then."""
        monkeypatch.setattr(taskhawk, "_TICK_S", 60)
        worker_broker.put(worker_act, *[("run",)] * 30)
        ledger = worker_broker.work(concurrency=3, loop_count=10, num_messages=3)
        assert ledger.acked == ledger.received

    def test_lease_in_time(self, worker_broker, worker_act, monkeypatch):
        """A lease is extended after a third of it, though nothing else is to be done."""
        monkeypatch.setattr(taskhawk, "_TICK_S", 60)
        at: list[float] = []

        def extend(real: Any, *_: Any) -> Any:
            at.append(time.monotonic())
            return real()

        def slow() -> None:
            began = time.monotonic()
            worker_eventually(lambda: at)
            assert at[0] - began < 0.9  # and not as the lease ends

        WORKER_ACTS["slow"] = slow
        worker_broker.faults["change_visibility"] = extend
        worker_broker.put(worker_act, ("slow",))
        ledger = worker_broker.work(loop_count=1, visibility_timeout_s=1)
        assert ledger == taskhawk.Ledger(received=1, acked=1)

    @pytest.mark.parametrize(
        "row",  # the fault, what is logged of it, and how many heartbeats come
        [
            (lambda real, *_: real(), [], 3),
            (
                worker_first(1, worker_raise(OSError("reset"))),
                [
                    "WORKER: can't extend leases, goes on trying: reset",
                    "WORKER: can extend leases again; tries that failed: 1",
                ],
                2,
            ),
            (
                worker_first(1, worker_refuse("Busy", final=False)),
                [
                    "WORKER: can't extend leases, goes on trying: refused by Busy",
                    "WORKER: can extend leases again; tries that failed: 1",
                ],
                2,
            ),
            (
                worker_raise(WorkerDenied("denied")),
                ["WORKER: can't extend leases, goes on trying: denied"],
                1,
            ),
        ],
        ids=["works", "call fails", "entry fails", "denied"],
    )
    def test_rounds(self, worker_broker, worker_act, worker_clock, caplog, row):
        """Each third of a lease it is extended, whatever came of that the last time.

        Each round that works is a heartbeat, as each poll is.
        """
        fault, logs, beats = row
        beaten: list[int] = []

        def slow() -> None:
            worker_eventually(lambda: len(beaten) == 1)  # of the poll
            for step in (1, 2):
                worker_clock.now += 10
                worker_eventually(
                    lambda s=step: len(worker_broker.made("change_visibility")) == s
                )
                done = min(beats, step + beats - 2)
                worker_eventually(lambda n=done: len(beaten) >= n)

        caplog.set_level(logging.INFO)
        WORKER_ACTS["slow"] = slow
        taskhawk.configure(TASKHAWK_HEARTBEAT_HOOK=lambda: beaten.append(1))
        worker_broker.faults["change_visibility"] = fault
        worker_broker.put(worker_act, ("slow",))
        ledger = worker_broker.work(loop_count=1, clock=worker_clock)
        assert ledger == taskhawk.Ledger(received=1, acked=1)
        assert worker_logs(caplog, logging.INFO)[:-1] == logs
        assert {record.levelname for record in caplog.records} <= {
            "INFO",
            "ERROR" if beats == 1 else "WARNING",
        }
        assert len(beaten) == beats

    def test_many_calls(self, worker_broker, worker_act):
        """Full batches do not wait for calls under way, and no message is in two."""
        at_once = threading.Barrier(taskhawk._MAX_CALLS)

        def hang(real: Any, *_: Any) -> Any:
            if len(worker_broker.made("delete")) <= taskhawk._MAX_CALLS:
                at_once.wait(WORKER_PATIENCE_S)
            return real()

        worker_broker.faults["delete"] = hang
        worker_broker.put(worker_act, *[("run",)] * 90)
        ledger = worker_broker.work(num_messages=10)
        assert ledger == taskhawk.Ledger(received=90, acked=90)
        deleted = [r for _, batch in worker_broker.made("delete") for r in batch]
        assert sorted(deleted) == sorted(set(deleted))

    def test_call_that_hangs(self, worker_broker, worker_act):
        """While one call hangs, what is overdue is done by another thread."""
        delayed = threading.Event()

        def hang(real: Any, *_: Any) -> Any:
            assert delayed.wait(WORKER_PATIENCE_S)
            return real()

        def delay(real: Any, *_: Any) -> Any:
            delayed.set()
            return real()

        worker_broker.faults |= {"delete": hang, "change_visibility": delay}
        worker_broker.put(worker_act, ("run",), ("retry",))
        ledger = worker_broker.work(loop_count=2)
        assert ledger == taskhawk.Ledger(received=2, acked=1, retried=1)

    def test_leases_while_a_call_hangs(self, worker_broker, worker_act, monkeypatch):
        """While the only call under way hangs, leases are extended by another thread."""
        monkeypatch.setattr(taskhawk, "_SPARE_S", 0.1)
        extended = threading.Event()

        def hang(real: Any, *_: Any) -> Any:
            extended.wait(WORKER_PATIENCE_S / 2)
            return real()

        def extend(real: Any, *_: Any) -> Any:
            extended.set()
            return real()

        WORKER_ACTS["wait"] = lambda: extended.wait(WORKER_PATIENCE_S / 2)
        worker_broker.faults |= {"delete": hang, "change_visibility": extend}
        worker_broker.put(worker_act, ("run",), ("wait",))
        options = {"loop_count": 2, "concurrency": 2, "visibility_timeout_s": 3}
        ledger = worker_broker.work(**options)
        assert extended.is_set()
        assert ledger == taskhawk.Ledger(received=2, acked=2)

    def test_defect(self, worker_broker, worker_act):
        """An error that ends one thread of the keeper ends the others and the worker."""
        worker_broker.faults["delete"] = worker_raise(SystemExit("a defect"))
        worker_broker.put(worker_act, ("run",))
        with pytest.raises(SystemExit, match=r"^a defect$"):
            worker_broker.work()

    def test_overdue_acknowledgements(self, worker_broker, worker_act):
        """Nothing is received while two batches of deletes wait for all calls to end."""
        ran: list[int] = []
        held: list[int] = []
        measured = threading.Event()

        def hang(real: Any, *_: Any) -> Any:
            if len(worker_broker.made("delete")) == 1:
                held.append(worker_after_a_while(lambda: len(ran)))
                measured.set()
            assert measured.wait(WORKER_PATIENCE_S)
            return real()

        WORKER_ACTS["note"] = lambda: ran.append(1)
        worker_broker.faults["delete"] = hang
        worker_broker.put(worker_act, *[("note",)] * 120)
        ledger = worker_broker.work(num_messages=10)
        assert 10 * taskhawk._MAX_CALLS <= held[0] <= 10 * (taskhawk._MAX_CALLS + 3)
        assert ledger == taskhawk.Ledger(received=120, acked=120)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("fails_s", "ledger"), [(1.2, {"acked": 1}), (9, {"uncertain": 1})]
    )
    def test_last_delete(self, worker_broker, worker_act, fails_s, ledger):
        """At the end, deletes are tried for as long as the lease lasts, and no longer."""
        began = time.monotonic()

        def fail(real: Any, *_: Any) -> Any:
            if time.monotonic() < began + fails_s:
                raise OSError("reset")
            return real()

        worker_broker.faults |= {"delete": fail, "change_visibility": fail}
        worker_broker.put(worker_act, ("run",))
        options = {"loop_count": 1, "visibility_timeout_s": 3}
        expected = taskhawk.Ledger(received=1, **ledger)
        assert worker_broker.work(**options) == expected
        assert time.monotonic() < began + 8


# --- 16. the worker -------------------------------------------------------------------


class PollsMachine(hypothesis.stateful.RuleBasedStateMachine):
    """Any order of receives, runs and faults in a worker of several queues; no thread."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.under_way: list[Any] = []
        self.started = self.running = 0
        self.last: dict[str, int | None] = {}  # what the last receive brought
        self.asked: collections.Counter[str] = collections.Counter()
        self.over: set[str] = set()

    @hypothesis.stateful.initialize(
        queues=st.sampled_from([["Q"], ["HIGH", "LOW"], ["A", "B.fifo", "C"]]),
        num_messages=st.sampled_from([1, 2, 5, 10, 12, 40, 100]),
        slots=st.sampled_from([1, 2, 8, 64]),
        loop_count=st.sampled_from([None, None, 1, 4]),
        max_tasks=st.sampled_from([math.inf, math.inf, 1, 2, 7, 30]),
    )
    def begin(self, queues, num_messages, slots, loop_count, max_tasks) -> None:
        """Draw a worker's options."""
        self.most = num_messages + slots - 1
        self.slots, self.loops, self.max_tasks = slots, loop_count, max_tasks
        self.polls = taskhawk._Polls(queues, num_messages, slots, loop_count)
        self.waiting = dict.fromkeys(queues, 0)

    def load(self) -> Any:
        """Return what the worker holds."""
        waiting = list(self.waiting.values())
        starts = self.max_tasks - self.started - sum(waiting)
        return taskhawk._Load(self.slots - self.running, waiting, starts)

    def in_flight(self, queue: str) -> list[Any]:
        """Return the receives of a queue that are under way, the oldest first."""
        return [poll for poll in self.under_way if poll.queue == queue]

    def is_known_to_be_empty(self, queue: str) -> bool:
        """Return whether less urgent queues may be asked."""
        if self.last.get(queue) == 0 or queue in self.over:
            return True
        flights = self.in_flight(queue)
        return bool(flights) and self.now >= flights[0].began_at + 0.1

    @hypothesis.stateful.rule(which=st.integers(0, 2))
    def ask(self, which: int) -> None:
        """Begin a receive of a queue, if it may."""
        queue = list(self.waiting)[which % len(self.waiting)]
        load, flights = self.load(), self.in_flight(queue)
        if self.polls.may_begin_at(queue, load) > self.now:
            return
        poll = self.polls.begin(queue, load, self.now)
        self.under_way.append(poll)
        self.asked[queue] += 1
        assert 1 <= poll.most <= (1 if queue.endswith("fifo") else 10)
        assert len(flights) < (1 if queue.endswith("fifo") else 12)
        assert self.loops is None or self.asked[queue] <= self.loops
        urgent = list(self.waiting)[: which % len(self.waiting)]
        assert all(map(self.is_known_to_be_empty, urgent))
        held = self.running + sum(map(self.waiting.get, [*urgent, queue]))
        assert held + poll.most + sum(each.most for each in flights) <= self.most

    @hypothesis.stateful.precondition(lambda self: self.under_way)
    @hypothesis.stateful.rule(
        which=st.integers(0, 99), share=st.sampled_from([0, 0, 0.5, 1, 1, 1])
    )
    def answer(self, which: int, share: float) -> None:
        """Answer a receive with nothing, with a part of what it may bring, or with all."""
        poll = self.under_way.pop(which % len(self.under_way))
        count = math.ceil(poll.most * share)
        self.polls.answered(poll, count)
        self.last[poll.queue] = count
        self.waiting[poll.queue] += count

    @hypothesis.stateful.precondition(lambda self: self.under_way)
    @hypothesis.stateful.rule(which=st.integers(0, 99), fails=st.booleans())
    def fail(self, which: int, fails: bool) -> None:
        """Let a receive fail, or not be made after all."""
        poll = self.under_way.pop(which % len(self.under_way))
        self.asked[poll.queue] -= 1
        if fails:
            self.polls.failed(poll)
            self.last[poll.queue] = 0
        else:
            self.polls.dropped(poll)

    @hypothesis.stateful.precondition(lambda self: self.running < self.slots)
    @hypothesis.stateful.rule()
    def start(self) -> None:
        """Start the most urgent message: that leaves no room that was not there before."""
        queue = next((name for name, count in self.waiting.items() if count), None)
        if queue is None:
            return
        before = {name: self.may_begin_at(name) for name in self.waiting}
        self.waiting[queue] -= 1
        self.started += 1
        self.running += 1
        assert all(self.may_begin_at(name) >= before[name] for name in self.waiting)

    def may_begin_at(self, queue: str) -> float:
        """Return when a queue may be asked."""
        return self.polls.may_begin_at(queue, self.load())

    @hypothesis.stateful.precondition(lambda self: self.running)
    @hypothesis.stateful.rule()
    def finish(self) -> None:
        """End a run."""
        self.running -= 1

    @hypothesis.stateful.rule(seconds=st.sampled_from([0.01, 0.1, 20]))
    def wait(self, seconds: float) -> None:
        """Let time go by."""
        self.now += seconds

    @hypothesis.stateful.rule(which=st.integers(0, 2))
    def end(self, which: int) -> None:
        """End the pollers of a queue that is asked no more."""
        queue = list(self.waiting)[which % len(self.waiting)]
        if not self.polls.is_open(queue):
            self.polls.close(queue)
            self.over.add(queue)

    @hypothesis.stateful.invariant()
    def nothing_is_too_much(self) -> None:
        """No more is received than can be started, over all that is under way."""
        asked = sum(poll.most for poll in self.under_way)
        assert self.started + sum(self.waiting.values()) + asked <= self.max_tasks
        assert self.polls.under_way == len(self.under_way)

    @hypothesis.stateful.invariant()
    def nobody_waits_for_ever(self) -> None:
        """While nothing waits and a slot is free, something is asked for, unless all is."""
        asked = sum(poll.most for poll in self.under_way)
        starts = self.max_tasks - self.started - asked
        opened = [name for name in self.waiting if self.polls.is_open(name)]
        if self.running == self.slots or any(self.waiting.values()) or starts < 1:
            return
        if self.under_way or opened != [q for q in self.waiting if q not in self.over]:
            return
        assert not opened or min(map(self.may_begin_at, opened)) <= self.now


TestPollsMachine = PollsMachine.TestCase
TestPollsMachine.settings = hypothesis.settings(
    max_examples=100, stateful_step_count=60, deadline=None
)


def load(free: int, *waiting: int, starts: float = math.inf) -> Any:
    """Return what a worker holds: free slots, and what waits of each queue."""
    return taskhawk._Load(free, waiting or (0,), starts)


def asked(polls: Any, queue: str, held: Any, now: float = 0) -> int | None:
    """Return for how many messages a queue is asked now, None if it may not be."""
    if polls.may_begin_at(queue, held) > now:
        return None
    return polls.begin(queue, held, now).most


class TestPolls:
    """Which queue is asked, when, and for how much, told without a thread or a clock."""

    @pytest.mark.parametrize(
        ("num_messages", "slots", "free", "waiting", "most"),
        [
            (1, 1, 1, 0, 1),  # the default never holds what can't start
            (1, 1, 0, 0, None),
            (1, 8, 8, 0, 8),  # eight start from one receive
            (1, 8, 3, 1, 2),
            (1, 8, 1, 1, None),
            (1, 64, 64, 0, 10),
            (7, 1, 1, 0, 7),
            (7, 1, 0, 0, None),  # not full: it waits for the slot
            (5, 8, 1, 0, 5),
            (10, 1, 1, 0, 10),
            (10, 1, 0, 0, 9),  # while the last one runs: nine tenths are enough
            (10, 1, 0, 1, None),
            (40, 1, 0, 0, 10),
            (40, 1, 0, 30, 9),
            (40, 1, 0, 31, None),
        ],
    )
    def test_room(self, num_messages, slots, free, waiting, most):
        """A receive asks for what can start, and for what num_messages lets wait."""
        polls = taskhawk._Polls(["Q"], num_messages, slots)
        assert asked(polls, "Q", load(free, waiting)) == most

    def test_room_of_several(self):
        """What waits of a less urgent queue takes no room of a more urgent one."""
        polls = taskhawk._Polls(["H", "L"], 10)
        polls.close("H")
        assert asked(polls, "L", load(0, 1, 0)) is None
        polls = taskhawk._Polls(["H", "L"], 10)
        assert asked(polls, "H", load(0, 0, 9)) == 9

    @pytest.mark.parametrize(
        ("queue", "num_messages", "slots", "brought", "most"),
        [
            ("Q", 10, 64, 10, [10] * 7),
            ("Q", 10, 64, 9, [10]),
            ("Q", 10, 8, 10, [10]),
            ("Q", 1, 64, 10, [10] * 6),
            ("Q", 1, 8, 8, [8]),
            ("Q", 1, 2, 2, [2]),
            ("Q", 40, 1, 10, [10] * 4),
            ("Q", 100, 200, 10, [10] * 12),
            ("Q.fifo", 40, 8, 1, [1]),
        ],
    )
    def test_at_once(self, queue, num_messages, slots, brought, most):
        """While receives are full, others run beside them as long as there is room."""
        polls = taskhawk._Polls([queue], num_messages, slots)
        first = polls.begin(queue, load(slots), 0)
        assert polls.may_begin_at(queue, load(slots)) == math.inf
        polls.answered(first, brought)
        found = []
        while number := asked(polls, queue, load(slots)):
            found.append(number)
        assert found == most
        assert polls.is_busy(queue) is (brought >= first.most)
        assert polls.under_way == len(most)

    @pytest.mark.parametrize(
        ("what", "may_begin_at"),
        [
            ("nothing yet", math.inf),
            ("begun", 5.1),
            ("dropped", math.inf),
            ("failed", -math.inf),
            ("empty", -math.inf),
            ("brought", math.inf),
            ("brought, begun", 7.1),
            ("empty, begun", -math.inf),
            ("closed", -math.inf),
        ],
    )
    def test_urgency(self, what, may_begin_at):
        """A queue is asked only while the more urgent one is known to be empty."""
        polls = taskhawk._Polls(["H", "L"])
        steps = {
            "dropped": polls.dropped,
            "failed": polls.failed,
            "empty": lambda poll: polls.answered(poll, 0),
            "brought": lambda poll: polls.answered(poll, 1),
        }
        if what == "closed":
            polls.close("H")
        elif what != "nothing yet":
            poll = polls.begin("H", load(1, 0, 0), 5)
            ended, _, again = what.partition(", ")
            if ended != "begun":
                steps[ended](poll)
            if again:
                polls.begin("H", load(1, 0, 0), 7)
        assert polls.may_begin_at("L", load(1, 0, 0)) == may_begin_at

    def test_urgency_of_several(self):
        """A queue waits for all that are more urgent, the oldest receive of each."""
        polls = taskhawk._Polls(["A", "B", "C"], 40)
        held = load(1, 0, 0, 0)
        polls.answered(polls.begin("A", held, 0), 10)
        for now in (1, 2):
            polls.begin("A", held, now)
        assert polls.may_begin_at("C", held) == math.inf
        polls.begin("B", held, 3)
        assert polls.may_begin_at("C", held) == 3.1

    def test_connections(self, aws):
        """All receives that may run at once have a connection of their own, to be kept."""
        pool = taskhawk._brokers.broker().client("poll").meta.config
        assert len(Priority) * taskhawk._MAX_POLLS <= pool.max_pool_connections

    def test_loop_count(self):
        """The loop count is of receives that were answered."""
        polls = taskhawk._Polls(["Q"], loop_count=2)
        for end in (polls.failed, polls.dropped):
            end(polls.begin("Q", load(1), 0))
        assert not polls.failed(polls.begin("Q", load(1), 0))  # nor was one before
        polls.answered(polls.begin("Q", load(1), 0), 1)
        last = polls.begin("Q", load(1), 0)
        assert (polls.may_begin_at("Q", load(1)), polls.is_open("Q")) == (
            math.inf,
            True,
        )
        polls.answered(last, 1)
        assert not polls.is_open("Q")

    @pytest.mark.parametrize(
        ("starts", "first", "second", "is_short"),
        [
            (100, 10, 10, False),
            (18, 9, 9, True),  # what is left is less than the other could receive
            (4, 2, 2, True),
            (3, 1, 2, True),
            (1, 1, None, True),
            (0, None, None, None),
        ],
    )
    def test_starts(self, starts, first, second, is_short):
        """What max_tasks leaves is shared, and polls are short if it may be too little."""
        polls = taskhawk._Polls(["H", "L"], 10)
        held = load(1, 0, 0, starts=starts)
        assert asked(polls, "H", held) == first
        if first:
            (poll,) = polls.of["H"].polls
            assert poll.is_short is is_short
        assert asked(polls, "L", held, 0.1) == second

    def test_turns(self):
        """For the last start, empty queues take turns, and no other waits for a failing one."""
        polls = taskhawk._Polls(["A", "B", "C"], 10)
        held, order = load(1, 0, 0, 0, starts=1), []
        for now in range(6):
            (queue,) = [q for q in polls.of if polls.may_begin_at(q, held) <= now]
            order.append(queue)
            poll = polls.begin(queue, held, now)
            if now == 3:
                polls.failed(poll)
            else:
                polls.answered(poll, 0)
        assert order == ["A", "B", "C", "A", "B", "C"]
        free = [q for q in polls.of if polls.may_begin_at(q, held) <= now]
        assert free == ["A", "B"]  # its thread comes back when it likes


class TestIntake:
    """Whatever lets a poller begin, or ends it, wakes it: no wait has a tick."""

    @pytest.fixture
    def made(
        self, worker_broker: WorkerBroker, worker_clock: Clock
    ) -> Callable[..., Any]:
        """Return a function that makes a worker, and what its pollers share."""

        def make(*queues: str, **options: Any) -> tuple[Any, Any]:
            options.setdefault("clock", worker_clock)
            worker = taskhawk.Worker(worker_broker, queues, **options)
            polls = worker._polls
            return worker, taskhawk._Intake(worker._course, worker._keeper, polls)

        return make

    @staticmethod
    def waits(intake: Any, queue: str, goes_on: Any) -> Any:
        """Call begin() in a thread, and return its future once it waits."""
        before = intake._pollers[queue].waiting
        future: Any = concurrent.futures.Future()

        def begin() -> None:
            future.set_result(intake.begin(queue, goes_on))

        threading.Thread(target=begin, daemon=True).start()
        worker_eventually(lambda: intake._pollers[queue].waiting > before)
        return future

    @staticmethod
    def take(intake: Any, queue: str, count: int) -> None:
        """Receive so many messages."""
        poll = intake.begin(queue, intake.polls.is_open)
        intake.take(poll, held_messages(count, queue), 30)

    def test_finished_run(self, made):
        """The end of a run wakes a poller that waits for room."""
        worker, intake = made("Q")
        self.take(intake, "Q", 1)
        (held,) = worker._course.next()
        begun = self.waits(intake, "Q", intake.polls.is_open)
        worker._course.finish(held, "acked")
        assert begun.result(WORKER_PATIENCE_S).most == 1

    def test_lost_message(self, made, worker_clock):
        """So does the loss of a message that waited to be started."""
        worker, intake = made("Q", num_messages=10)
        self.take(intake, "Q", 1)
        worker_clock.now += 31
        self.take(intake, "Q", 1)
        begun = self.waits(intake, "Q", intake.polls.is_open)
        assert worker._course.next()
        assert begun.result(WORKER_PATIENCE_S).most == 9

    def test_urgent_receive(self, made):
        """A receive of a more urgent queue is waited for, once it has begun, by the time."""
        _worker, intake = made("HIGH", "LOW", clock=time.monotonic)
        begun = self.waits(intake, "LOW", intake.polls.is_open)
        began_at = intake.begin("HIGH", intake.polls.is_open).began_at
        assert begun.result(WORKER_PATIENCE_S).began_at >= began_at + 0.1

    @pytest.mark.parametrize("end", ["take", "fail", "close"])
    def test_urgent_queue(self, made, end):
        """The end of a more urgent queue's receive, or of all of them, is not waited for."""
        _worker, intake = made("HIGH", "LOW")
        poll = intake.begin("HIGH", intake.polls.is_open)
        begun = self.waits(intake, "LOW", intake.polls.is_open)
        ends = {
            "take": lambda: intake.take(poll, [], 30),
            "fail": lambda: intake.fail(poll),
            "close": lambda: intake.close("HIGH"),
        }
        ends[end]()
        assert begun.result(WORKER_PATIENCE_S).most == 1

    @pytest.mark.parametrize("count", [0, 1])
    def test_last_receive(self, made, count):
        """Who waits for the last receive of the loop count ends with it."""
        _worker, intake = made("Q", loop_count=1, concurrency=2)
        poll = intake.begin("Q", intake.polls.is_open)
        begun = self.waits(intake, "Q", intake.polls.is_open)
        intake.take(poll, held_messages(poll.most if count else 0), 30)
        assert begun.result(WORKER_PATIENCE_S) is None

    def test_helpers(self, made):
        """A receive that is not full ends the helpers that wait, and their queue's end is last."""
        _worker, intake = made("Q", num_messages=20)
        self.take(intake, "Q", 10)
        poll = intake.begin("Q", intake.polls.is_open)
        begun = self.waits(intake, "Q", intake.polls.is_busy)
        intake.take(poll, [], 30)
        assert begun.result(WORKER_PATIENCE_S) is None

    def test_close(self, made):
        """A queue's poller ends after its helpers, so that all receives are waited out."""
        worker, intake = made("Q", num_messages=40)
        self.take(intake, "Q", 10)
        intake.begin("Q", intake.polls.is_open)
        assert intake.adds_helper("Q")
        assert not intake.adds_helper("Q")  # the first has not begun yet
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            closed = pool.submit(intake.close, "Q")
            assert not worker_after_a_while(closed.done)
            intake.helper_ended("Q")
            closed.result(WORKER_PATIENCE_S)
        assert worker._course._polls == 0

    def test_one_after_another(self, made):
        """One that is woken wakes the next, if there is room for both."""
        worker, intake = made("Q", num_messages=40)
        for _ in range(4):
            self.take(intake, "Q", 10)
        goes_on = (intake.polls.is_busy, intake.polls.is_open)
        begun = [self.waits(intake, "Q", each) for each in goes_on]
        worker._course.suspend()  # it releases all
        worker._course.resume()
        keeper = threading.Thread(target=worker._keeper.run)
        keeper.start()
        assert [each.result(WORKER_PATIENCE_S).most for each in begun] == [10, 10]
        worker._keeper.close()
        keeper.join(WORKER_PATIENCE_S)

    def test_end(self, made):
        """A new phase wakes all."""
        worker, intake = made("HIGH", "LOW")
        begun = [self.waits(intake, "LOW", intake.polls.is_open) for _ in range(2)]
        worker._course.fail(OSError())
        assert [each.result(WORKER_PATIENCE_S) for each in begun] == [None, None]


RUN = "work.act ID (message ID)"  # as logs name a message of worker_act
FAILED = f"{RUN}: attempt 1 failed and is "
LETTER_LEFT = f"WORKER: {RUN} can't be dead-lettered and is left to the queue: "
COPY_LEFT = f"WORKER: {RUN} can't be postponed and is left to the queue: "
LAST = {"info": lambda real, _queue: real()._replace(max_receive_count=1)}
NO_LETTERS = {"info": lambda real, _queue: real()._replace(dead_letter_queue=None)}
FORBIDDEN_INFO = {"info": worker_raise(WorkerDenied("denied"))}
#: What the messages of a queue do, the faults on the way, what the ledger counts
#: besides the receives, and what is logged as a warning or an error.
WORKER_SCENARIOS: list[tuple[str, dict[str, Any], dict[str, int], list[str]]] = [
    ("run run run", {}, {"acked": 3}, []),
    ("ignore", {}, {"acked": 1}, []),
    ("retry leave", {}, {"retried": 2}, []),
    ("postpone", {}, {"postponed": 1}, []),
    ("postpone", LAST, {"postponed": 1}, []),
    (
        "postpone",
        {"send": worker_raise(WorkerDenied("not allowed"))},
        {"retried": 1},
        [f"{COPY_LEFT}not allowed"],
    ),
    (
        "postpone",
        {"send": worker_refuse("InternalError", final=False)},
        {"retried": 1},
        [f"{COPY_LEFT}1 of 1 messages failed: InternalError"],
    ),
    (
        "postpone",
        {"delete": worker_refuse("Gone", final=True)},
        {"uncertain": 1},
        [f"{RUN} may run again: refused by Gone"],
    ),
    ("fail", {}, {"retried": 1}, [f"{FAILED}left to the queue"]),
    ("never", {}, {"dead_lettered": 1}, [f"{FAILED}given up"]),
    (
        "fail leave",
        LAST,
        {"dead_lettered": 2},
        [f"{FAILED}given up: the queue allows no further receive"] * 2,
    ),
    (
        "never",
        NO_LETTERS,
        {"retried": 1},
        [f"{FAILED}given up", f"{LETTER_LEFT}it has no dead-letter queue"],
    ),
    (
        "never",
        {"send": worker_raise(WorkerDenied("not allowed"))},
        {"retried": 1},
        [f"{FAILED}given up", f"{LETTER_LEFT}not allowed"],
    ),
    (
        "never",
        {"send": worker_refuse("InternalError", final=False)},
        {"retried": 1},
        [
            f"{FAILED}given up",
            f"{LETTER_LEFT}1 of 1 messages failed: InternalError",
        ],
    ),
    (
        "never",  # to a queue that is pinned lower than the service's limit
        {"send": worker_first(1, worker_raise(WORKER_TOO_LARGE))},
        {"dead_lettered": 1},
        [f"{FAILED}given up"],
    ),
    (
        "run",
        {"delete": worker_first(2, worker_raise(OSError("reset")))},
        {"acked": 1},
        ["WORKER: can't delete, goes on trying: reset"],
    ),
    (
        "run",
        {"delete": worker_first(1, worker_lose(OSError("reset")))},
        {"acked": 1},
        ["WORKER: can't delete, goes on trying: reset"],
    ),
    (
        "run run run",
        {"delete": worker_first(2, worker_refuse("InternalError", final=False))},
        {"acked": 3},
        ["WORKER: can't delete, goes on trying: refused by InternalError"],
    ),
    (
        "run",
        {"delete": worker_first(3, worker_raise(WorkerDenied("not allowed")))},
        {"acked": 1},
        ["WORKER: can't delete, goes on trying: not allowed"],
    ),
    (
        "run run",
        {"delete": worker_refuse("Gone", final=True)},
        {"acked": 1, "uncertain": 1},
        [f"{RUN} may run again: refused by Gone"],
    ),
    (
        "retry",
        {"change_visibility": worker_first(2, worker_raise(OSError("reset")))},
        {"retried": 1},
        ["WORKER: can't set delays, goes on trying: reset"],
    ),
    (
        "retry",
        {"change_visibility": worker_raise(WorkerDenied("not allowed"))},
        {"retried": 1},
        [
            f"{RUN} is visible again when its lease ends: not allowed",
            "WORKER: can't set delays, goes on trying: not allowed",
        ],
    ),
    (
        "run",
        {"receive": worker_first(2, worker_raise(OSError("no route")))},
        {"acked": 1},
        ["WORKER: can't receive, goes on trying: OSError('no route')"],
    ),
    (
        "run",
        {"info": worker_first(1, worker_raise(OSError("reset")))},
        {"acked": 1},
        ["WORKER: can't receive, goes on trying: OSError('reset')"],
    ),
    (
        "run",
        FORBIDDEN_INFO,
        {"acked": 1},
        ["WORKER: can't read its attributes: AccessDenied"],
    ),
]


def worker_fast_clock() -> float:
    """Tell a time that runs five times faster: pauses are short, leases of minutes long."""
    return time.monotonic() * 5


class TestWorker:
    """Pollers receive, slots run, and a worker ends in order whatever interrupts it."""

    # -- what becomes of messages

    @pytest.mark.parametrize("scenario", WORKER_SCENARIOS)
    def test_scenario(self, worker_broker, worker_act, caplog, scenario):
        """Each message ends in one way, whatever fails; the log says what failed."""
        acts, faults, counts, logs = scenario
        worker_broker.faults = dict(faults)
        worker_broker.put(worker_act, *[(act,) for act in acts.split()])
        options = {"loop_count": 1, "num_messages": 10, "clock": worker_fast_clock}
        ledger = worker_broker.work(**options)
        assert ledger == taskhawk.Ledger(len(acts.split()), **counts)
        assert ledger.balanced
        assert worker_logs(caplog) == logs
        left = worker_broker.depth(WORKER_QUEUE)
        gone = ledger.acked + ledger.dead_lettered + ledger.postponed
        assert left.visible + left.in_flight == ledger.received - gone

    @pytest.mark.parametrize(
        ("act", "sends", "error"),
        [
            ("fail", 1, ("ValueError", "a failed run", 1)),
            ("leave", 1, ("RetryException", "not now", 1)),
            ("fail", 2, None),
        ],
    )
    def test_last_receive(self, worker_broker, worker_act, act, sends, error):
        """A run that fails at the last receive that the queue allows is a dead letter.

        The letter has the error, unless that makes it too large for its queue.
        """
        too_large = worker_raise(WORKER_TOO_LARGE)
        worker_broker.faults = {**LAST, "send": worker_first(sends - 1, too_large)}
        worker_broker.put(worker_act, (act,))
        worker_broker.work(loop_count=1)
        names = [name for name, _ in worker_broker.calls]
        assert names.count("send") == sends
        assert names.index("send") < names.index("delete")
        letters = f"{WORKER_QUEUE}-DLQ"
        (letter,) = worker_broker.receive(letters, 1, 0, None, threading.Event())
        found = None
        if letter.message_attributes:
            text = letter.message_attributes["taskhawk.error"]["StringValue"]
            record = json.loads(text)
            found = (record["type"], record["message"], record["attempt"])
        assert found == error

    def test_ledger(self, worker_broker, worker_act, caplog):
        """The ledger is logged at the end, and says in words what became of the messages."""
        caplog.set_level(logging.INFO)
        worker_broker.put(worker_act, ("never",), ("leave",))
        ledger = worker_broker.work(loop_count=2)
        words = "2 received, 0 acked, 1 retried, 1 dead-lettered, 0 postponed, 0 released, 0 uncertain"
        assert str(ledger) == words
        assert worker_logs(caplog, logging.INFO)[-1] == f"worker ended: {words}"
        assert not taskhawk.Ledger(received=1).balanced

    def test_runs(self, worker_any, worker_act):
        """Busy with ten at a time, a worker makes at most 0.12 receives and deletes a task."""
        queue = worker_any.destination(Priority.default)
        worker_any.put(worker_act, *[("run",)] * 200, queue=queue)
        ledger = worker_any.work(queue, num_messages=10)
        assert ledger == taskhawk.Ledger(received=200, acked=200)
        assert len(worker_any.made("receive")) <= 24
        assert len(worker_any.made("delete")) <= 24
        assert worker_any.made("change_visibility") == []
        assert worker_any.depth(queue) == (0, 0, 0)

    def test_delayed(self, worker_broker, worker_act, worker_clock):
        """A retry makes the same message visible again after its delay."""
        worker_broker.put(worker_act, ("retry",))
        for _ in range(2):
            ran = worker_broker.work(loop_count=1)
            assert ran == taskhawk.Ledger(received=1, retried=1)
            assert worker_broker.work(loop_count=1) == taskhawk.Ledger()
            worker_clock.now += 7
        changes = worker_broker.made("change_visibility")
        assert [seconds for _, ((_, seconds),) in changes] == [7, 7]

    # -- what is received

    def test_parameters_of_1_4(self, aws):
        """All five of 1.4's parameters are taken by position and reach SQS as they are."""
        ledger = taskhawk.listen_for_messages(
            Priority.high, 7, 90, 2, threading.Event()
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
                "ApproximateFirstReceiveTimestamp",
                "MessageGroupId",
            ],
        }
        assert aws.asked("ReceiveMessage") == [receive, receive]
        assert len(aws.asked("GetQueueAttributes")) == 1  # for the redrive policy

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"num_messages": 0}, "num_messages: expected 1 to 100, got 0"),
            ({"num_messages": 101}, "num_messages: expected 1 to 100, got 101"),
            ({"concurrency": 0}, "concurrency: expected 1 or more, got 0"),
            ({"max_tasks": -1}, "max_tasks: expected 1 or more, got -1"),
            (
                {"visibility_timeout_s": 0},
                "visibility_timeout_s: expected 1 to 43200 seconds, got 0",
            ),
            (
                {"visibility_timeout_s": 43_201},
                "visibility_timeout_s: expected 1 to 43200 seconds, got 43201",
            ),
            ({"grace_s": -1}, "grace_s: expected 0 or more seconds, got -1"),
            *[
                (
                    {"priority": wrong},
                    f"priority: expected a taskhawk.Priority or several, got {wrong!r}",
                )
                for wrong in ([], "high", [Priority.high, "x"])
            ],
        ],
    )
    def test_wrong_parameters(self, memory, options, sentence):
        """A parameter that can't work is refused before anything is received."""
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            taskhawk.listen_for_messages(**{"priority": Priority.default, **options})
        assert str(raised.value) == sentence

    @pytest.mark.parametrize(
        ("queue_s", "option", "asked_s"),
        [
            (300, None, 300),
            (300, 90, 90),
            (0, None, 30),
            (None, None, 30),
            (None, 90, 90),
        ],
    )
    def test_lease_asked(self, worker_broker, queue_s, option, asked_s):
        """Each receive asks for its lease, which may be the queue's as it was at the start."""

        def info(real: Any, _queue: str) -> taskhawk.QueueInfo:
            if queue_s is None:
                raise WorkerDenied("denied")
            return real()._replace(visibility_timeout_s=queue_s)

        worker_broker.faults["info"] = info
        worker_broker.work(loop_count=2, visibility_timeout_s=option)
        receives = worker_broker.made("receive")
        assert [asked[1:4] for asked in receives] == [(1, 0.05, asked_s)] * 2
        assert len(worker_broker.made("info")) == 1

    @pytest.mark.parametrize(
        ("options", "wait_s"),
        [
            ({}, 20),
            ({"grace_s": 25}, 20),
            ({"grace_s": 14}, 10),
            ({"grace_s": 0}, 1),
            ({"until_empty": True}, 1),
        ],
    )
    def test_wait(self, worker_broker, options, wait_s):
        """A poll ends before the grace does, and soon where a worker ends by itself."""
        worker = taskhawk.Worker(worker_broker, [WORKER_QUEUE], **options)
        assert worker.wait_s == wait_s

    def test_loop_count(self, worker_broker, worker_act):
        """The loop count is receives of each queue; what they brought is run to its end."""
        for queue in ("A", "B"):
            worker_broker.put(worker_act, *[("run",)] * 5, queue=queue)
        ledger = worker_broker.work("A", "B", loop_count=2)
        assert ledger == taskhawk.Ledger(received=4, acked=4)
        asked = collections.Counter(args[0] for args in worker_broker.made("receive"))
        assert asked == {"A": 2, "B": 2}

    @pytest.mark.parametrize("concurrency", [1, 2])
    @pytest.mark.parametrize("num_messages", [3, 6])
    def test_max_tasks(self, worker_broker, worker_act, concurrency, num_messages):
        """A worker ends by itself after max_tasks runs, and receives no more than these."""
        worker_broker.put(worker_act, *[("run",)] * 10)
        options = {"concurrency": concurrency, "num_messages": num_messages}
        ledger = worker_broker.work(max_tasks=4, loop_count=None, **options)
        assert ledger == taskhawk.Ledger(received=4, acked=4)

    def test_no_prefetch(self, worker_broker, worker_act):
        """By default a worker holds the one message that it runs."""
        depths: list[int] = []
        WORKER_ACTS["look"] = lambda: depths.append(
            worker_broker.inner.depth(WORKER_QUEUE).visible
        )
        worker_broker.put(worker_act, *[("look",)] * 3)
        worker_broker.work()
        assert depths == [2, 1, 0]

    @pytest.mark.parametrize(
        ("fault", "asked"),
        [
            (worker_first(2, worker_raise(OSError("reset"))), 3),
            (worker_raise(WorkerDenied("denied")), 1),
        ],
        ids=["fails twice", "denied"],
    )
    def test_until_empty(self, worker_broker, worker_act, fault, asked):
        """A worker ends once its queue is empty; it asks after an empty receive alone.

        It asks again where that fails, and takes it for empty where it may not ask.
        """
        worker_broker.faults["depth"] = fault
        worker_broker.put(worker_act, ("run",), ("run",))
        assert worker_broker.work() == taskhawk.Ledger(received=2, acked=2)
        names = [n for n, _ in worker_broker.calls if n in {"receive", "depth"}]
        assert names[:4] == ["receive"] * 3 + ["depth"]
        assert names[4:] == ["receive", "depth"] * (len(names[4:]) // 2)
        assert names.count("depth") >= asked

    def test_until_empty_of_all(self, worker_broker, worker_act):
        """A queue is listened to until the others are empty too, delayed messages included."""
        looked = threading.Event()

        def slow() -> None:
            assert looked.wait(WORKER_PATIENCE_S)
            worker_broker.put(worker_act, ("run",), queue="HIGH")

        def look(real: Any, queue: str) -> taskhawk.Depth:
            found = real()
            if queue == "HIGH" and not any(found):
                looked.set()
            return found

        WORKER_ACTS["slow"] = slow
        worker_broker.faults["depth"] = look
        worker_broker.put(worker_act, ("slow",), queue="LOW")
        assert worker_broker.work("HIGH", "LOW") == taskhawk.Ledger(2, 2)

    @pytest.mark.parametrize(
        ("action", "code", "sentence"),
        [
            (
                "GetQueueUrl",
                "com.amazonaws.sqs#QueueDoesNotExist",
                (
                    "TASKHAWK-APP: there is no such queue here: make it, or check "
                    "TASKHAWK_QUEUE, AWS_REGION and the account (QueueDoesNotExist: no)"
                ),
            ),
            (
                "ReceiveMessage",
                "com.amazon.coral.service#AccessDeniedException",
                (
                    f"TASKHAWK-APP: {DENIED.format('ReceiveMessage')} "
                    "(AccessDeniedException: no)"
                ),
            ),
        ],
    )
    def test_fatal_at_start(self, aws, caplog, action, code, sentence):
        """What only a person can mend ends the worker at its start, with one sentence."""
        aws.script(action, *[fault(code)] * 2)  # of each role's client, at most
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            taskhawk.listen_for_messages(Priority.default, loop_count=1)
        assert str(raised.value) == sentence
        assert worker_logs(caplog) == []

    def test_fatal_for_one_of_two(self, worker_broker, worker_act):
        """One queue that is missing ends the worker of several; what it holds is released."""
        ran, missing, both = (threading.Event() for _ in range(3))

        def wait() -> None:
            ran.set()
            assert missing.wait(WORKER_PATIENCE_S)

        def receive(real: Any, queue: str, *_: Any) -> Any:
            if queue == "A":
                assert both.wait(WORKER_PATIENCE_S)  # later, there would be no room
                return real()
            both.set()
            assert ran.wait(WORKER_PATIENCE_S)
            missing.set()
            raise taskhawk.ConfigurationError("B: no such")

        WORKER_ACTS["wait"] = wait
        worker_broker.faults["receive"] = receive
        worker_broker.put(worker_act, *[("wait",)] * 3, queue="A")
        with pytest.raises(taskhawk.ConfigurationError, match=r"^B: no such$"):
            worker_broker.work("A", "B", num_messages=3)
        left = worker_broker.depth("A")
        assert left in {(2, 0, 0), (1, 0, 0), (0, 0, 0)}  # it may have begun the next

    @pytest.mark.slow
    def test_not_fatal(self, aws, caplog):
        """A queue that was there once, and is missing now, is waited for."""
        missing = fault("com.amazonaws.sqs#QueueDoesNotExist")
        aws.script("ReceiveMessage", passed, missing)
        taskhawk.listen_for_messages(Priority.default, 1, 30, 2)
        assert len(aws.asked("ReceiveMessage")) == 3
        assert len(worker_logs(caplog)) == 1

    def test_back_off(self):
        """Pauses double from a second to a minute, and are jittered."""
        pauses = [
            [taskhawk._pause_s(failures) for _ in range(20)] for failures in (1, 2, 99)
        ]
        for least, drawn in zip((1, 2, 60), pauses, strict=True):
            assert least / 2 <= min(drawn) < max(drawn) <= least * 1.5

    # -- leases

    @pytest.mark.slow
    def test_lease(self, worker_broker, worker_act, worker_clock):
        """A message is kept from others while it runs, and so is one that waits behind it."""
        taken: list[Any] = []

        def slow() -> None:
            for step in range(1, 5):  # 0.8 s each: more than three visibility timeouts
                worker_clock.now += 0.8
                worker_eventually(
                    lambda s=step: len(worker_broker.made("change_visibility")) >= s
                )
                never = threading.Event()
                taken.extend(worker_broker.inner.receive(WORKER_QUEUE, 10, 0, 1, never))

        WORKER_ACTS["slow"] = slow
        worker_broker.put(worker_act, ("slow",), ("run",))
        options = {"visibility_timeout_s": 1, "num_messages": 2, "loop_count": 1}
        ledger = worker_broker.work(clock=worker_clock, **options)
        assert (taken, ledger) == ([], taskhawk.Ledger(received=2, acked=2))

    @pytest.mark.slow
    def test_lease_on_sqs(self, ministack, sqs_client, queue_name, request, worker_act):
        """On SQS, a task runs once that takes longer than two visibility timeouts of 1 s."""
        worker_configure(request, "sqs", queue_name)
        broker = WorkerBroker(taskhawk._brokers.broker())
        queue = make_queue(sqs_client(ministack), f"TASKHAWK-{queue_name}")
        taken: list[Any] = []

        def slow() -> None:
            end = time.monotonic() + 2.3
            while time.monotonic() < end:
                taken.extend(broker.inner.receive(queue, 10, 1, 30, threading.Event()))

        WORKER_ACTS["slow"] = slow
        broker.put(worker_act, ("slow",), queue=queue)
        ledger = broker.work(queue, visibility_timeout_s=1, wait_s=0)
        assert (taken, ledger) == ([], taskhawk.Ledger(received=1, acked=1))

    def test_slow_receive(self, worker_broker, worker_act, worker_clock):
        """Where an answer takes most of the lease, nothing runs before that is extended."""
        extended: list[int] = []

        def receive(real: Any, *_: Any) -> Any:
            found = real()
            worker_clock.now += 2.5
            return found

        WORKER_ACTS["look"] = lambda: extended.append(
            len(worker_broker.made("change_visibility"))
        )
        worker_broker.faults["receive"] = receive
        worker_broker.put(worker_act, ("look",))
        options = {"visibility_timeout_s": 3, "clock": worker_clock}
        assert worker_broker.work(loop_count=1, **options) == taskhawk.Ledger(1, 1)
        assert extended == [1]

    def test_lease_lost(self, worker_broker, worker_act, caplog):
        """A task sees that another took its message; one that waits is then not started."""
        received: list[QueueMessage] = []

        def receive(real: Any, *_: Any) -> list[QueueMessage]:
            received.extend(found := real())
            return found

        def slow() -> None:
            changes = [(message.receipt_handle, 0) for message in received]
            assert worker_broker.inner.change_visibility(WORKER_QUEUE, changes) == []
            never = threading.Event()
            again = worker_broker.inner.receive(WORKER_QUEUE, 10, 0, 60, never)
            assert len(again) == 2
            worker_eventually(lambda: received[0].lease_lost)

        WORKER_ACTS["slow"] = slow
        worker_broker.faults["receive"] = receive
        worker_broker.put(worker_act, ("slow",), ("run",))
        options = {"loop_count": 1, "visibility_timeout_s": 1, "num_messages": 2}
        ledger = worker_broker.work(**options)
        assert ledger == taskhawk.Ledger(received=2, released=1, uncertain=1)
        why = "the message is no longer in flight, or was received again"
        assert worker_logs(caplog) == [
            f"{RUN} may run twice: {why}",
            f"message ID may run twice: {why}",
            f"{RUN} may run again: {why}",
        ]

    # -- hooks

    def test_heartbeat(self, worker_broker, tmp_path, caplog):
        """The heartbeat follows each poll that works; one that fails is logged, no more."""
        beats: list[int] = []
        file = tmp_path / "alive"

        def beat() -> None:
            assert file.exists()
            beats.append(1)
            raise ZeroDivisionError

        taskhawk.configure(TASKHAWK_HEARTBEAT_HOOK=beat)
        worker_broker.work(loop_count=1, liveness_file=str(file))
        worker_eventually(lambda: caplog.records)
        os.utime(file, (0, 0))
        worker_broker.work(loop_count=1, liveness_file=str(file))
        worker_eventually(lambda: file.stat().st_mtime)
        worker_eventually(lambda: len(caplog.records) == 2)
        assert worker_logs(caplog) == ["TASKHAWK_HEARTBEAT_HOOK failed"] * 2
        stop = threading.Event()

        def fail(_real: Any, *_: Any) -> Any:
            stop.set()
            raise OSError("reset")

        worker_broker.faults["receive"] = fail
        worker_broker.work(shutdown_event=stop, until_empty=False)
        assert beats == [1, 1]

    def test_liveness_file(self, worker_broker, tmp_path, caplog):
        """A liveness file that can't be touched is logged."""
        worker_broker.work(loop_count=1, liveness_file=str(tmp_path))
        worker_eventually(lambda: caplog.records)
        path = repr(str(tmp_path))
        assert worker_logs(caplog) == [
            f"can't touch the liveness file: [Errno 21] Is a directory: {path}"
        ]

    @pytest.mark.slow
    def test_heartbeat_hangs(self, worker_broker, worker_act):
        """A heartbeat hook that hangs stops neither leases nor the worker's end."""
        hanging, release = threading.Event(), threading.Event()

        def hang() -> None:
            hanging.set()
            release.wait(WORKER_PATIENCE_S)

        def slow() -> None:
            assert hanging.wait(WORKER_PATIENCE_S)
            worker_eventually(lambda: worker_broker.made("change_visibility"))

        WORKER_ACTS["slow"] = slow
        taskhawk.configure(TASKHAWK_HEARTBEAT_HOOK=hang)
        worker_broker.put(worker_act, ("slow",))
        ledger = worker_broker.work(loop_count=1, visibility_timeout_s=1)
        release.set()
        assert ledger == taskhawk.Ledger(received=1, acked=1)

    def test_hooks(self, worker_any, worker_act):
        """Hooks get the queue's name and the message; the error hook the exception."""
        seen: list[Any] = []

        def hook(*, queue_name: str, sqs_queue_message: Any) -> None:
            attributes = sqs_queue_message.attributes
            assert attributes["ApproximateReceiveCount"] == "1"
            (act,) = json.loads(sqs_queue_message.body)["args"]
            seen.append((threading.current_thread(), queue_name, act))

        def on_error(*, exception: BaseException, message: Any) -> None:
            seen.append((str(exception), message.args))

        taskhawk.configure(
            worker_any.settings,
            TASKHAWK_PRE_PROCESS_HOOK=hook,
            TASKHAWK_POST_PROCESS_HOOK=hook,
            TASKHAWK_ERROR_HOOK=on_error,
        )
        worker_any.inner = taskhawk._brokers.broker()
        queue = worker_any.destination(Priority.default)
        for act in ("run", "fail"):
            worker_any.put(worker_act, (act,), queue=queue)
            worker_any.work(queue, loop_count=1, wait_s=1)
        run = (threading.main_thread(), queue, "run")
        assert seen == [run, run, (*run[:2], "fail"), ("a failed run", ["fail"])]

    @pytest.mark.parametrize("told", [True, False])
    def test_filter_fails(self, worker_broker, worker_act, capsys, monkeypatch, told):
        """A filter of the application that fails on our records changes nothing but the log."""
        monkeypatch.setattr(logging, "raiseExceptions", told)

        def no_request(record: logging.LogRecord) -> bool:
            raise AttributeError("no request")

        worker_broker.put(worker_act, ("run",), ("fail",))
        logging.getLogger("taskhawk").addFilter(no_request)
        try:
            ledger = worker_broker.work(loop_count=1, num_messages=2)
        finally:
            logging.getLogger("taskhawk").removeFilter(no_request)
        assert ledger == taskhawk.Ledger(received=2, acked=1, retried=1)
        assert ("AttributeError: no request\n" in capsys.readouterr().err) is told

    # -- several receives

    def test_free_slots(self, worker_broker, worker_act):
        """By default, one receive brings a message for each slot that is free."""
        together = threading.Barrier(8)
        WORKER_ACTS["meet"] = lambda: together.wait(WORKER_PATIENCE_S)
        worker_broker.put(worker_act, *[("meet",)] * 8)
        ledger = worker_broker.work(concurrency=8, loop_count=1)
        assert ledger == taskhawk.Ledger(received=8, acked=8)
        assert [most for _, most, *_ in worker_broker.made("receive")] == [8]

    @pytest.mark.parametrize("loop_count", [None, 6])
    def test_pollers(self, worker_broker, worker_act, loop_count):
        """While receives are full, several run at once; the loop count is of them all."""
        three, numbers = threading.Barrier(3), itertools.count(1)

        def receive(real: Any, *_: Any) -> Any:
            if next(numbers) in {2, 3, 4}:
                three.wait(WORKER_PATIENCE_S)
            return real()

        worker_broker.faults["receive"] = receive
        worker_broker.put(worker_act, *[("run",)] * 65)
        options = {"num_messages": 40, "until_empty": loop_count is None}
        ledger = worker_broker.work(loop_count=loop_count, **options)
        assert ledger.acked == ledger.received
        if loop_count:
            assert len(worker_broker.made("receive")) == loop_count
        else:
            assert ledger.received == 65

    def test_idle(self, worker_broker):
        """An idle queue is asked by one receive after another, whatever may be received."""
        under_way: list[int] = []

        def receive(real: Any, *_: Any) -> Any:
            under_way.append(1)
            found = real()
            assert len(under_way) == 1
            under_way.pop()
            return found

        worker_broker.faults["receive"] = receive
        worker_broker.work(loop_count=3, num_messages=100, concurrency=8)
        assert len(worker_broker.made("receive")) == 3

    @pytest.mark.parametrize("fails", [False, True])
    def test_stopped_with_pollers(self, worker_broker, worker_act, fails):
        """Told to stop, a worker waits out all its receives, and releases what they bring."""
        stop, numbers = threading.Event(), itertools.count(1)
        three = threading.Barrier(3, stop.set)

        def receive(real: Any, *_: Any) -> Any:
            number = next(numbers)
            if number > 1:
                three.wait(WORKER_PATIENCE_S)
                # Time enough for a keeper that releases too early.
                made = functools.partial(worker_broker.made, "change_visibility")
                assert worker_after_a_while(made) == []
            if number == 3 and fails:
                raise OSError("reset")
            return real()

        worker_broker.faults["receive"] = receive
        WORKER_ACTS["hold"] = lambda: stop.wait(WORKER_PATIENCE_S)
        worker_broker.put(worker_act, *[("hold",)] * 40)
        options = {"shutdown_event": stop, "until_empty": False, "num_messages": 40}
        ledger = worker_broker.work(**options)
        brought = 10 * (4 - fails)
        assert ledger == taskhawk.Ledger(brought, acked=1, released=brought - 1)
        assert worker_broker.depth(WORKER_QUEUE) == (39, 0, 0)

    def test_pollers_that_fail(self, worker_broker, worker_act, caplog):
        """Where several receives fail at once, that is one failure, and one pause."""
        three = threading.Barrier(3)
        pollers: list[threading.Thread] = []
        left = {True: iter(range(1)), False: iter(range(2))}  # receives that fail

        def receive(real: Any, *_: Any) -> Any:
            pollers.append(threading.current_thread())
            is_first = threading.current_thread() is pollers[0]
            if len(pollers) > 1 and next(left[is_first], None) is not None:
                three.wait(WORKER_PATIENCE_S)
                raise OSError("reset")
            return real()

        worker_broker.faults["receive"] = receive
        worker_broker.put(worker_act, *[("run",)] * 40)
        options = {"num_messages": 40, "clock": worker_fast_clock}
        with caplog.at_level(logging.INFO):
            assert worker_broker.work(**options).acked == 40
        failed, works, _ended = worker_logs(caplog, logging.INFO)
        assert failed == "WORKER: can't receive, goes on trying: OSError('reset')"
        assert works == "WORKER: can receive again; tries that failed: 1"

    def test_defect_of_a_poller(self, worker_broker, worker_act):
        """An error of our own in a second poller ends the worker, and is raised."""
        both, numbers = threading.Barrier(2), itertools.count(1)

        def receive(real: Any, *_: Any) -> Any:
            if next(numbers) in {2, 3}:
                both.wait(WORKER_PATIENCE_S)
                raise SystemExit("a defect")
            return real()

        worker_broker.faults["receive"] = receive
        worker_broker.put(worker_act, *[("run",)] * 40)
        with pytest.raises(SystemExit, match=r"^a defect$"):
            worker_broker.work(num_messages=40)

    @pytest.mark.slow
    def test_poller_that_cannot_start(self, tmp_path):
        """Where a second poller can't start, the worker goes on with one, and says so once."""
        code = """if True:
            import resource, threading, taskhawk

            @taskhawk.task
            def limit():
                threading.stack_size(1 << 30)
                used = int(open("/proc/self/statm").read().split()[0]) * 4096
                resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29),) * 2)
                run.dispatch_many([()] * 99)

            @taskhawk.task
            def run():
                pass

            limit.dispatch()
            default, options = taskhawk.Priority.default, {"until_empty": True}
            print(taskhawk.listen_for_messages(default, 40, **options).acked)"""
        result = run_python(code, env={"TASKHAWK_BROKER": f"sqlite:///{tmp_path}/q.db"})
        assert result.stdout == "100\n"
        assert result.stderr == (
            "TASKHAWK-DEFAULT: can't start another poller, goes on trying:"
            " can't start new thread\n"
        )

    @pytest.mark.parametrize("num_messages", [1, 10])
    def test_urgency(self, worker_broker, worker_act, num_messages):
        """With messages in each of four queues, one slot runs them in order of urgency."""
        ran: list[str] = []
        queues = ["HIGH", "DEFAULT", "LOW", "BULK"]
        for queue in queues:
            WORKER_ACTS[queue] = functools.partial(ran.append, queue)
            worker_broker.put(worker_act, *[(queue,)] * 10, queue=queue)
        options = {"num_messages": num_messages, "clock": Clock()}
        assert worker_broker.work(*queues, **options).acked == 40
        assert ran == [queue for queue in queues for _ in range(10)]

    def test_urgent_queue_that_waits(self, worker_broker, worker_act):
        """A less urgent queue is asked a tenth of a second after the other's receive began."""
        began: dict[str, float] = {}
        ran = threading.Event()

        def receive(real: Any, queue: str, *_: Any) -> Any:
            began.setdefault(queue, time.monotonic())
            if queue == "HIGH":
                assert ran.wait(WORKER_PATIENCE_S)
            return real()

        WORKER_ACTS["note"] = ran.set
        worker_broker.faults["receive"] = receive
        worker_broker.put(worker_act, ("note",), queue="LOW")
        ledger = worker_broker.work("HIGH", "LOW", loop_count=1)
        assert ledger == taskhawk.Ledger(received=1, acked=1)
        assert began["LOW"] - began["HIGH"] >= 0.09

    def test_urgent_queue_that_fails(self, worker_broker, worker_act, caplog):
        """A queue that can't be received from does not keep the others from their turn."""
        ran = threading.Event()

        def receive(real: Any, queue: str, *_: Any) -> Any:
            if queue == "HIGH" and not ran.is_set():
                raise OSError("reset")
            return real()

        WORKER_ACTS["note"] = ran.set
        worker_broker.faults["receive"] = receive
        worker_broker.put(worker_act, ("note",), queue="LOW")
        options = {"loop_count": 1, "clock": worker_fast_clock}
        assert worker_broker.work("HIGH", "LOW", **options) == taskhawk.Ledger(1, 1)

    @pytest.mark.parametrize("concurrency", [1, 3])
    def test_fifo(self, worker_broker, worker_act, concurrency):
        """From a FIFO queue come one message a receive, and several groups run at once."""
        together = threading.Barrier(concurrency)
        WORKER_ACTS["meet"] = lambda: together.wait(WORKER_PATIENCE_S)
        worker_broker.put(worker_act, *[("meet",)] * 6, queue="Q.fifo")
        options = {"concurrency": concurrency, "num_messages": 10}
        assert worker_broker.work("Q.fifo", **options).acked == 6
        assert {most for _, most, *_ in worker_broker.made("receive")} == {1}

    def test_max_tasks_of_several(self, worker_broker, worker_act):
        """Where few starts are left, no queue keeps them for as long as a long poll takes."""
        worker_broker.put(worker_act, *[("run",)] * 5, queue="LOW")
        options = {"max_tasks": 3, "num_messages": 10, "wait_s": 20}
        ledger = worker_broker.work("HIGH", "LOW", until_empty=False, **options)
        assert ledger == taskhawk.Ledger(received=3, acked=3)
        assert max(wait_s for _, _, wait_s, *_ in worker_broker.made("receive")) <= 1

    def test_one_slot_for_a_message(self, worker_broker, worker_act):
        """A message wakes one slot: that others wait costs nothing."""
        looks: list[list[float]] = []

        def clock() -> float:
            looks[-1].append(time.monotonic())
            return looks[-1][-1]

        for concurrency in (2, 40):
            looks.append([])
            worker_broker.put(worker_act, *[("run",)] * 200)
            options = {"concurrency": concurrency, "num_messages": 10, "clock": clock}
            assert worker_broker.work(**options).acked == 200
        few, many = map(len, looks)
        assert many < 3 * few

    # -- concurrency

    @pytest.mark.slow
    def test_concurrency(self, worker_any, worker_act):
        """With concurrency=N, N messages run at once, in threads, and no more are received."""
        together = threading.Barrier(3)
        held: list[int] = []
        queue = worker_any.destination(Priority.default)

        def meet() -> None:
            together.wait(WORKER_PATIENCE_S)
            held.append(worker_any.inner.depth(queue).in_flight)
            together.wait(WORKER_PATIENCE_S)

        WORKER_ACTS["meet"] = meet
        worker_any.put(worker_act, *[("meet",)] * 6, queue=queue)
        options = {"concurrency": 3, "ack_wait_s": 0}
        ledger = worker_any.work(queue, **options)
        assert ledger == taskhawk.Ledger(received=6, acked=6)
        assert max(held[:3]) == 3

    @pytest.mark.parametrize("everywhere", [False, True])
    def test_interrupt_in_a_slot(self, worker_broker, worker_act, everywhere):
        """A KeyboardInterrupt in another slot than the caller's ends the worker, too."""
        both = threading.Barrier(2)

        def interrupt() -> None:
            both.wait(WORKER_PATIENCE_S)
            if everywhere or threading.current_thread() is not threading.main_thread():
                raise KeyboardInterrupt

        WORKER_ACTS["interrupt"] = interrupt
        worker_broker.put(worker_act, ("interrupt",), ("interrupt",))
        with pytest.raises(KeyboardInterrupt):
            worker_broker.work(concurrency=2, num_messages=2)
        assert worker_broker.depth(WORKER_QUEUE) == (1 + everywhere, 0, 0)

    @pytest.mark.slow
    @pytest.mark.parametrize("concurrency", [1, 2])
    def test_child_cannot_start(
        self, worker_broker, tmp_path, monkeypatch, caplog, concurrency
    ):
        """Where no child can start, messages are released, and nothing is received.

        The log says it once, and once that it works again.
        """
        caplog.set_level(logging.INFO)
        monkeypatch.syspath_prepend(tmp_path)
        module = isolated_import(tmp_path, startable=WORKER_PARTLY_ISOLATED)
        python = sys.executable
        monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
        receives: list[int] = []

        def released(real: Any, *_: Any) -> Any:
            answer = real()
            if worker_broker.inner.depth(WORKER_QUEUE).visible == 3:
                receives.append(
                    worker_after_a_while(lambda: len(worker_broker.made("receive")))
                )
                monkeypatch.setattr(sys, "executable", python)
            return answer

        worker_broker.faults["change_visibility"] = released
        worker_broker.put(module.fine, *[()] * 3)
        options = {"num_messages": 3}
        taskhawk.configure(TASKHAWK_BROKER="sqlite://")
        ledger = worker_broker.work(
            concurrency=concurrency, clock=worker_fast_clock, **options
        )
        assert ledger.released >= 3
        assert ledger == taskhawk.Ledger(
            ledger.released + 3, 3, released=ledger.released
        )
        assert receives[0] == 1
        cannot, can, _ended = worker_logs(caplog, logging.INFO)
        assert cannot == (
            "can't start a child, goes on trying: no process can be started: "
            f"[Errno 2] No such file or directory: '{tmp_path}/nothing'"
        )
        assert re.fullmatch(r"can start a child again; tries that failed: \d+", can)
        del sys.modules["startable"]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "case",
        [(WORKER_ISOLATED, False), (WORKER_PARTLY_ISOLATED, True)],
        ids=["by decorators", "by an option"],
    )
    def test_isolated_without_a_child(
        self, worker_broker, tmp_path, monkeypatch, caplog, case
    ):
        """A worker that isolates all receives nothing before its children have started."""
        monkeypatch.syspath_prepend(tmp_path)
        taskhawk.configure(TASKHAWK_BROKER="sqlite://")
        module, isolate = case
        fine = isolated_import(tmp_path, waiting=module).fine
        python = sys.executable
        monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
        received: list[int] = []

        def mend() -> None:
            worker_eventually(lambda: worker_logs(caplog))
            received.append(
                worker_after_a_while(lambda: len(worker_broker.made("receive")))
            )
            monkeypatch.setattr(sys, "executable", python)

        worker_broker.put(fine, ())
        mender = threading.Thread(target=mend)
        mender.start()
        options = {"isolate": isolate, "concurrency": 2, "clock": worker_fast_clock}
        ledger = worker_broker.work(**options)
        mender.join()
        assert (received, ledger) == ([0], taskhawk.Ledger(1, 1))
        del sys.modules["waiting"]

    def test_stopped_without_a_child(self, worker_broker, tmp_path, monkeypatch):
        """A worker that can't start a child ends when it is told to."""
        stop = threading.Event()
        monkeypatch.syspath_prepend(tmp_path)
        taskhawk.configure(TASKHAWK_BROKER="sqlite://")
        module = isolated_import(tmp_path, stoppable=WORKER_PARTLY_ISOLATED)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))

        def released(real: Any, *_: Any) -> Any:
            stop.set()
            return real()

        worker_broker.faults["change_visibility"] = released
        worker_broker.put(module.fine, ())
        options = {"shutdown_event": stop, "until_empty": False, "clock": Clock()}
        assert worker_broker.work(**options) == taskhawk.Ledger(1, released=1)
        del sys.modules["stoppable"]

    def test_last_receive_without_a_child(self, worker_broker, tmp_path, monkeypatch):
        """What no child can run at its last receive is sent anew: it was never run."""
        stop = threading.Event()
        monkeypatch.syspath_prepend(tmp_path)
        taskhawk.configure(TASKHAWK_BROKER="sqlite://")
        module = isolated_import(tmp_path, copyable=WORKER_PARTLY_ISOLATED)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))

        def send(real: Any, *_: Any) -> Any:
            stop.set()
            return real()

        worker_broker.faults = {**LAST, "send": send}
        worker_broker.put(module.fine, ())
        options = {"shutdown_event": stop, "until_empty": False, "clock": Clock()}
        assert worker_broker.work(**options) == taskhawk.Ledger(1, postponed=1)
        assert worker_broker.depth(WORKER_QUEUE) == (1, 0, 0)
        del sys.modules["copyable"]

    # -- the end

    @pytest.mark.parametrize("when", ["before", "lookup"])
    def test_stopped_before(self, worker_broker, when):
        """A worker that is told to stop before its first poll receives nothing."""
        stop = threading.Event()

        def info(real: Any, *_: Any) -> Any:
            stop.set()
            return real()

        worker_broker.faults["info"] = info
        if when == "before":
            stop.set()
        options = {"shutdown_event": stop, "until_empty": False}
        assert worker_broker.work(**options) == taskhawk.Ledger()
        assert worker_broker.made("receive") == []

    @pytest.mark.slow
    def test_stopped_during(self, worker_any, worker_act, caplog):
        """Told to stop, a worker runs its task to the end and releases what waits."""
        caplog.set_level(logging.INFO)
        stop, queue = threading.Event(), worker_any.destination(Priority.default)

        def end() -> None:
            stop.set()
            worker_eventually(lambda: worker_logs(caplog, logging.INFO))

        WORKER_ACTS["end"] = end
        worker_any.put(worker_act, *[("end",)] * 10, queue=queue)
        options = {"num_messages": 10, "shutdown_event": stop, "until_empty": False}
        ledger = worker_any.work(queue, wait_s=1, **options)
        assert ledger == taskhawk.Ledger(
            ledger.received, acked=1, released=ledger.received - 1
        )
        assert worker_any.depth(queue) == (9, 0, 0)
        assert worker_logs(caplog, logging.INFO)[0] == (
            "stopping: waiting for polls in flight: 0, running tasks: 1"
            "; Ctrl-C again ends at once"
        )

    @pytest.mark.parametrize(
        ("faults", "counts", "sends"),
        [
            ({}, {"postponed": 3}, 3),
            ({"send": worker_raise(OSError("reset"))}, {"released": 3}, 1),
        ],
    )
    def test_stopped_at_the_last_receive(
        self, worker_broker, worker_act, faults, counts, sends
    ):
        """What waits at its last receive is released by a copy: it was never run.

        Where no copy can be sent, it is visible at once, and its queue decides.
        """
        queue, stop = f"{WORKER_QUEUE}-LAST", threading.Event()
        worker_broker.faults = {**LAST, **faults}
        WORKER_ACTS["stop"] = stop.set
        worker_broker.put(worker_act, *[("stop",)] * 4, queue=queue)
        options = {"num_messages": 4, "shutdown_event": stop, "until_empty": False}
        ledger = worker_broker.work(queue, **options)
        assert ledger == taskhawk.Ledger(received=4, acked=1, **counts)
        assert len(worker_broker.made("send")) == sends
        assert worker_broker.depth(queue) == (3, 0, 0)
        again = worker_broker.receive(queue, 10, 0, None, threading.Event())
        attempts = {(found.attempt, found.receive_count) for found in again}
        assert attempts == {(1, 1) if "postponed" in counts else (2, 2)}

    def test_stopped_while_backing_off(self, worker_broker):
        """A shutdown does not wait for the end of a pause between receives."""
        stopped_at: list[float] = []
        stop = threading.Event()

        def fail(_real: Any, *_: Any) -> Any:
            stopped_at.append(time.monotonic())
            stop.set()
            raise OSError("no route to host")

        worker_broker.faults["receive"] = fail
        clock = Clock()  # it stands: the pause has no end
        options = {"shutdown_event": stop, "until_empty": False, "clock": clock}
        assert worker_broker.work(**options) == taskhawk.Ledger()

    def test_released_after_the_last_poll(self, worker_broker, worker_act):
        """A poll in flight is waited out, what it brings is released too, and nothing before."""
        stop, polling = threading.Event(), threading.Event()
        early: list[int] = []

        def receive(real: Any, queue: str, *_: Any) -> Any:
            if queue == "A":
                assert polling.wait(WORKER_PATIENCE_S)
                return real()
            polling.set()
            assert stop.wait(WORKER_PATIENCE_S)
            # Time enough for a keeper that releases too early.
            early.append(
                worker_after_a_while(
                    lambda: len(worker_broker.made("change_visibility"))
                )
            )
            worker_broker.put(worker_act, ("run",), queue="B")
            return real()

        WORKER_ACTS["stop"] = stop.set
        worker_broker.faults["receive"] = receive
        worker_broker.put(worker_act, *[("stop",)] * 3, queue="A")
        options = {"num_messages": 3, "shutdown_event": stop, "until_empty": False}
        ledger = worker_broker.work("A", "B", **options)
        assert ledger == taskhawk.Ledger(received=4, acked=1, released=3)
        assert early == [0]
        assert [worker_broker.depth(queue).visible for queue in ("A", "B")] == [2, 1]

    @pytest.mark.parametrize(
        ("error", "concurrency"),
        [(KeyboardInterrupt(), 1), (SystemExit(7), 1), (SystemExit(7), 2)],
    )
    def test_raised_by_a_handler(self, worker_broker, worker_act, error, concurrency):
        """What a handler of the application raises ends the worker in order, then goes on.

        The run that it interrupts is released, and those of other slots are waited for.
        """
        both, order = threading.Barrier(concurrency), []

        def halt(*_: object) -> None:
            order.append("raised")
            raise error

        def interrupted() -> None:
            both.wait(WORKER_PATIENCE_S)
            if threading.current_thread() is threading.main_thread():
                signal.raise_signal(signal.SIGTERM)
            worker_eventually(lambda: order)
            order.append("ran")

        WORKER_ACTS["interrupted"] = interrupted
        worker_broker.put(worker_act, *[("interrupted",)] * 3)
        before = signal.signal(signal.SIGTERM, halt)
        try:
            with pytest.raises(type(error)) as raised:
                worker_broker.work(num_messages=3, concurrency=concurrency)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert raised.value is error
        assert order == ["raised", "ran"][:concurrency]
        assert worker_broker.depth(WORKER_QUEUE) == (4 - concurrency, 0, 0)
        assert len(worker_broker.made("delete")) == concurrency - 1

    def test_raised_between_runs(self, worker_broker, worker_act):
        """A handler may raise at any point: the message that was just run is not lost."""

        class Halt(BaseException):
            pass

        def halt(*_: object) -> None:
            raise Halt

        def send(_real: Any, *_: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)

        worker_broker.put(worker_act, ("never",))
        worker_broker.faults["send"] = send
        before = signal.signal(signal.SIGTERM, halt)
        try:
            with pytest.raises(Halt):
                worker_broker.work(loop_count=1)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert worker_broker.depth(WORKER_QUEUE) == (1, 0, 0)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signal_in_process(self, worker_broker, worker_act, number):
        """A signal ends the worker after the task, and Python's own handlers are back then."""
        both = (signal.SIGTERM, signal.SIGINT)
        before, during = [*map(signal.getsignal, both)], []

        def kill() -> None:
            during.extend(map(signal.getsignal, both))
            signal.raise_signal(number)

        WORKER_ACTS["kill"] = kill
        worker_broker.put(worker_act, ("kill",), ("kill",))
        ledger = worker_broker.work(until_empty=False)
        assert ledger == taskhawk.Ledger(received=1, acked=1)
        assert not set(during) & set(before)
        assert [*map(signal.getsignal, both)] == before

    def test_worker_in_a_task(self, worker_broker, worker_act):
        """A task may run a worker itself, and both end with one signal."""

        def inner() -> None:
            signal.raise_signal(signal.SIGTERM)

        def outer() -> None:
            ledger = worker_broker.work("INNER", until_empty=False)
            assert ledger == taskhawk.Ledger(received=1, acked=1)

        WORKER_ACTS.update(inner=inner, outer=outer)
        worker_broker.put(worker_act, ("outer",), ("outer",))
        worker_broker.put(worker_act, ("inner",), queue="INNER")
        ledger = worker_broker.work(until_empty=False)
        assert ledger == taskhawk.Ledger(received=1, acked=1)

    def test_wakeup_descriptor(self, worker_broker, worker_act):
        """The application's wakeup descriptor is told of its signals, and is back at the end."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        handled: list[int] = []
        before = signal.signal(signal.SIGUSR1, lambda number, _: handled.append(number))
        WORKER_ACTS["kill"] = lambda: signal.raise_signal(signal.SIGUSR1)
        worker_broker.put(worker_act, ("kill",))
        signal.set_wakeup_fd(ours.fileno())
        try:
            worker_broker.work(loop_count=1)
            assert signal.set_wakeup_fd(-1) == ours.fileno()
        finally:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGUSR1, before)
        assert handled == [signal.SIGUSR1]
        theirs.settimeout(WORKER_PATIENCE_S)
        assert theirs.recv(9) == bytes(handled)
        ours.close()
        theirs.close()

    def test_many_descriptors(self, worker_broker, worker_act):
        """A worker runs in a process that has more descriptors open than select() takes."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
        with contextlib.ExitStack() as opened:
            opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            for _ in range(1100):
                opened.enter_context(open(os.devnull))
            worker_broker.put(worker_act, ("run",))
            assert worker_broker.work(loop_count=1) == taskhawk.Ledger(1, 1)

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_handlers_of_the_application(self, worker_broker, worker_act, number):
        """Handlers of the application stay; with a shutdown event they work as in 1.4."""
        both, stop = (signal.SIGTERM, signal.SIGINT), threading.Event()

        def own(*_: object) -> None:
            stop.set()

        WORKER_ACTS["kill"] = lambda: signal.raise_signal(number)
        before = [signal.signal(each, own) for each in both]
        try:
            worker_broker.put(worker_act, ("kill",), ("kill",))
            ledger = worker_broker.work(shutdown_event=stop, until_empty=False)
            assert [*map(signal.getsignal, both)] == [own, own]
        finally:
            for each, handler in zip(both, before, strict=True):
                signal.signal(each, handler)
        assert ledger == taskhawk.Ledger(received=1, acked=1)

    def test_handler_of_a_task(self, worker_broker, worker_act):
        """A handler that a task installs is there after the worker, too."""
        before = signal.getsignal(signal.SIGTERM)
        WORKER_ACTS["own"] = lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)
        worker_broker.put(worker_act, ("own",))
        try:
            worker_broker.work(loop_count=1)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_in_a_thread(self, worker_broker, worker_act):
        """Outside the main thread no handler is installed."""
        both = (signal.SIGTERM, signal.SIGINT)
        before, during = [*map(signal.getsignal, both)], []
        WORKER_ACTS["look"] = lambda: during.extend(map(signal.getsignal, both))
        worker_broker.put(worker_act, ("look",))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            ledger = pool.submit(worker_broker.work).result(WORKER_PATIENCE_S)
        assert (during, ledger) == (before, taskhawk.Ledger(received=1, acked=1))

    def test_second_interrupt(self, worker_broker, worker_act, monkeypatch):
        """A second SIGINT waits for no poll; what waited and what ran is released."""
        monkeypatch.setattr(taskhawk._Signals, "_again_s", 0)
        polling, release = threading.Event(), threading.Event()

        def receive(real: Any, queue: str, *_: Any) -> Any:
            if queue == "A":
                assert polling.wait(WORKER_PATIENCE_S)
                return real()
            polling.set()
            assert release.wait(WORKER_PATIENCE_S)
            return []

        def interrupt() -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        WORKER_ACTS["interrupt"] = interrupt
        worker_broker.faults["receive"] = receive
        worker_broker.put(worker_act, *[("interrupt",)] * 2, queue="A")
        with pytest.raises(KeyboardInterrupt):
            worker_broker.work("A", "B", num_messages=2, until_empty=False)
        assert worker_broker.depth("A") == (2, 0, 0)
        release.set()

    # -- the grace

    @pytest.mark.slow
    def test_grace_of_a_library(self, worker_broker, worker_act, caplog):
        """After the grace a run goes on, for it can't be killed; the worker waits for its own.

        A run in another slot than the caller's is left alone, and named.
        """
        stop, release = threading.Event(), threading.Event()
        both, late = threading.Barrier(2), []

        def hang() -> None:
            both.wait(WORKER_PATIENCE_S)
            stop.set()
            if threading.current_thread() is not threading.main_thread():
                late.append(release.wait(WORKER_PATIENCE_S))

        WORKER_ACTS["hang"] = hang
        worker_broker.put(worker_act, ("hang",), ("hang",))
        options = {"num_messages": 2, "grace_s": 0.1, "shutdown_event": stop}
        ledger = worker_broker.work(concurrency=2, until_empty=False, **options)
        assert (late, ledger) == ([], taskhawk.Ledger(received=2, acked=1))
        assert worker_logs(caplog) == [
            f"the grace is over, and {RUN} still runs",
            f"worker ended: {ledger}",
        ]
        release.set()
        worker_eventually(lambda: late)

    def test_grace_of_the_caller(self, worker_broker, worker_act):
        """A run of the calling thread that ends after the grace is acknowledged all the same."""
        stop, release = threading.Event(), threading.Event()

        def hang() -> None:
            stop.set()
            assert release.wait(WORKER_PATIENCE_S)

        WORKER_ACTS["hang"] = hang
        worker_broker.put(worker_act, ("hang",))
        options = {"shutdown_event": stop, "grace_s": 0.1, "wait_s": 0}
        worker = taskhawk.Worker(worker_broker, [WORKER_QUEUE], **options)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(worker.run)
            assert worker.overdue.wait(WORKER_PATIENCE_S)
            worker_eventually(lambda: worker.clock() > worker._keeper._gives_up_at)
            release.set()
            assert running.result() == taskhawk.Ledger(received=1, acked=1)

    @pytest.mark.slow
    @pytest.mark.parametrize("acts", [["stop"], ["run", *["stop"] * 3]])
    @pytest.mark.parametrize("is_command", [False, True])
    def test_grace_of_a_delete(self, worker_broker, worker_act, acts, is_command):
        """A delete that is not answered within the grace is uncertain; what waits is released."""
        stop, release, told = threading.Event(), threading.Event(), []
        deleting = threading.Event()

        def end() -> None:
            assert acts == ["stop"] or deleting.wait(WORKER_PATIENCE_S)
            stop.set()

        def fail(_real: Any, *_: Any) -> Any:
            deleting.set()
            if is_command:
                assert release.wait(WORKER_PATIENCE_S)
            raise OSError("reset")

        def on_overdue(ledger: taskhawk.Ledger) -> None:
            told.append(dataclasses.replace(ledger))
            release.set()

        WORKER_ACTS["stop"] = end
        worker_broker.faults["delete"] = fail
        worker_broker.put(worker_act, *[(act,) for act in acts])
        options: dict[str, Any] = {"num_messages": 4, "grace_s": 0.4, "wait_s": 0}
        if is_command:
            options["on_overdue"] = on_overdue
        worker = taskhawk.Worker(
            worker_broker, [WORKER_QUEUE], shutdown_event=stop, **options
        )
        ran = min(2, len(acts))
        expected = taskhawk.Ledger(len(acts), uncertain=ran, released=len(acts) - ran)
        assert worker.run() == expected
        assert told == [expected] * is_command
        assert (worker.unanswered, worker.overdue.is_set()) == (True, True)

    def test_small_grace(self, worker_broker):
        """An idle worker ends within a grace that is shorter than what is kept for flushing."""
        stop = threading.Event()

        def receive(real: Any, *_: Any) -> Any:
            stop.set()
            return real()

        worker_broker.faults["receive"] = receive
        worker = taskhawk.Worker(
            worker_broker, [WORKER_QUEUE], shutdown_event=stop, grace_s=3
        )
        assert worker.run() == taskhawk.Ledger()
        assert not worker.overdue.is_set()

    def test_no_grace_for_an_end_of_its_own(self, worker_broker, worker_act):
        """The grace begins when a worker is told to stop, not when it has run its last task."""
        idle, overdue = threading.Event(), []

        def slow() -> None:
            assert idle.wait(WORKER_PATIENCE_S)
            overdue.append(worker.overdue.wait(0.3))

        WORKER_ACTS.update(slow=slow, quick=idle.set)
        worker_broker.put(worker_act, ("slow",), ("quick",))
        options = {"concurrency": 2, "max_tasks": 2, "grace_s": 0.1, "num_messages": 2}
        worker = taskhawk.Worker(worker_broker, [WORKER_QUEUE], wait_s=0, **options)
        assert worker.run() == taskhawk.Ledger(received=2, acked=2)
        assert overdue == [False]

    # -- whole processes

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
        ended = "can't start new thread ['MainThread']\n"
        assert run_python(code, env=env).stdout == ended

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signal(self, worker_shared, number, tmp_path):
        """A signalled listener ends its task, releases what waits, and exits with 0."""
        queue = worker_shared.destination(Priority.default)
        worker_shared.put(worker_job("wait"), *[(i,) for i in range(3)], queue=queue)
        options = ("--num-messages", "3", "--until-empty")
        with worker_process(tmp_path, worker_shared.settings, *options) as process:
            assert process.stdout.readline().startswith("started ")
            process.send_signal(number)
            output, errors = process.communicate("\n")
        assert process.returncode == 0, errors
        assert re.fullmatch(
            r"ended \d\n3 received, 1 acked, 0 retried, 0 dead-lettered, 0 postponed, 2 released,"
            r" 0 uncertain\n",
            output,
        )
        assert worker_shared.depth(queue) == (2, 0, 0)

    @pytest.mark.slow
    @pytest.mark.parametrize("task", ["wait", "delete"])
    def test_second_signal(self, tmp_path, task):
        """A second Ctrl-C a second later ends a task, or a delete that hangs; nothing else does."""
        url = f"sqlite:///{tmp_path}/queue.db"
        with contextlib.closing(taskhawk.SqliteBroker(url)) as broker:
            WorkerBroker(broker).put(worker_job(task), (1,), queue="TASKHAWK-DEFAULT")
        with worker_process(tmp_path, {"TASKHAWK_BROKER": url}) as process:
            assert process.stdout.readline() == "started 1\n"
            process.terminate()
            assert any("stopping" in line for line in process.stderr)
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                process.send_signal(number)  # none of these is a second Ctrl-C
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.1)
            # Of a burst, the kernel may hand one to a thread that need not wake up the
            # main one: then that is noted with the next, and one more ends the process.
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2)
            process.wait(WORKER_PATIENCE_S)
            assert process.stdout.read() == ""
        assert process.returncode == 130

    @pytest.mark.slow
    @pytest.mark.parametrize("is_read", [True, False])
    def test_grace_in_c(self, tmp_path, is_read):
        """The grace begins, and ends, while the main thread is in C code, whoever reads it."""
        url = f"sqlite:///{tmp_path}/queue.db"
        with contextlib.closing(taskhawk.SqliteBroker(url)) as broker:
            WorkerBroker(broker).put(worker_job("in_c"), (1,), queue="TASKHAWK-DEFAULT")
        options = ("--grace", "0.5")
        with worker_process(tmp_path, {"TASKHAWK_BROKER": url}, *options) as process:
            assert process.stdout.readline() == "started 1\n"
            if not is_read:
                process.stdout.close()
            process.terminate()
            process.terminate()
            errors = process.stderr.read()
            assert process.wait(WORKER_PATIENCE_S) == 1
            if is_read:
                assert process.stdout.read() == (
                    "1 received, 0 acked, 0 retried, 0 dead-lettered, 0 postponed, 0 released,"
                    " 0 uncertain\n"
                )
        lines = re.sub(MESSAGE_ID, "ID", errors).splitlines()
        assert lines[-2].endswith(
            "stopping: waiting for polls in flight: 0, running tasks: 1"
            "; Ctrl-C again ends at once"
        )
        over = "the grace is over, and jobs.in_c ID (message ID) still runs"
        assert lines[-1].endswith(over)

    @pytest.mark.slow
    @pytest.mark.parametrize("concurrency", ["1", "2"])
    def test_what_a_task_starts(self, tmp_path, concurrency):
        """What a task starts or forks has the signals that it would have without us."""
        url = f"sqlite:///{tmp_path}/queue.db"
        names = ["pool", "program", "shell", "coroutine", "fork", "own", "back"]
        with contextlib.closing(taskhawk.SqliteBroker(url)) as broker:
            for name in names:
                job = worker_job(name)
                WorkerBroker(broker).put(job, (), queue="TASKHAWK-DEFAULT")
        options = ("--until-empty", "--concurrency", concurrency)
        with worker_process(
            tmp_path, {"TASKHAWK_BROKER": url}, *options, module=WORKER_STARTERS
        ) as process:
            output, errors = process.communicate()
        *said, ledger = output.splitlines()
        assert sorted(said) == sorted(f"{name} True" for name in names), errors
        assert ledger == (
            f"{len(names)} received, {len(names)} acked, 0 retried, 0 dead-lettered,"
            " 0 postponed, 0 released, 0 uncertain"
        )

    @pytest.mark.slow
    def test_killed(self, worker_shared, tmp_path):
        """A listener killed in the middle of a task and started again loses no message."""
        queue = worker_shared.destination(Priority.default)
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
        noted = {f"noted {number}\n" for number in (0, 1, 3)}
        assert {*ran, *output.splitlines(keepends=True)} >= noted
        assert worker_shared.depth(queue) == (0, 0, 0)


class TestBatchesOfAWorker:
    """A slot takes along what waits for the same batch task; each message ends by itself."""

    def test_ends(self, worker_broker, together):
        """Up to so many run together, and the ledger counts each."""
        index = taskhawk.Task.find_by_name("shop.index")
        taskhawk.task(name="shop.plain")(nothing)
        plain = taskhawk.Task.find_by_name("shop.plain")
        worker_broker.put(index, ("a",), ("fail",), ("later",))
        worker_broker.put(plain, ())
        worker_broker.put(index, ("ignore",), *[(n,) for n in range(5)])
        ledger = worker_broker.work(num_messages=10, loop_count=1)
        assert together == [["a", "fail", "later", "ignore", 0], [1, 2, 3, 4]]
        assert ledger == taskhawk.Ledger(received=10, acked=8, retried=2)
        delays = [batch for _, batch in worker_broker.made("change_visibility")]
        assert [s for batch in delays for _, s in batch] == [7]

    def test_max_tasks(self, worker_broker, together):
        """Each counts as a run of its own, so none is run beyond the last."""
        index = taskhawk.Task.find_by_name("shop.index")
        worker_broker.put(index, *[(n,) for n in range(9)])
        ledger = worker_broker.work(num_messages=10, max_tasks=7, until_empty=False)
        assert ledger == taskhawk.Ledger(received=7, acked=7)
        assert together == [[0, 1, 2, 3, 4], [5, 6]]

    def test_other_slots(self, worker_broker, worker_act):
        """A batch takes one slot: others receive and run meanwhile."""
        others = threading.Semaphore(0)

        @taskhawk.task(batch=5, name="shop.index")
        def index(calls: list[taskhawk.Call]) -> None:
            for _ in range(4):
                assert others.acquire(timeout=WORKER_PATIENCE_S)

        WORKER_ACTS["other"] = others.release
        worker_broker.put(index, *[()] * 5)
        worker_broker.put(worker_act, *[("other",)] * 4)
        ledger = worker_broker.work(num_messages=10, concurrency=2)
        assert ledger == taskhawk.Ledger(received=9, acked=9)

    def test_next_batch(self, worker_broker):
        """While a batch runs, those that are to run next are received."""

        @taskhawk.task(batch=10, name="shop.index")
        def index(calls: list[taskhawk.Call]) -> None:
            worker_eventually(lambda: len(worker_broker.made("receive")) > 1)

        worker_broker.put(index, *[()] * 25)
        assert worker_broker.work(num_messages=10).acked == 25

    def test_interrupted(self, worker_broker, together):
        """What ends the worker leaves all of them to the queue."""
        index = taskhawk.Task.find_by_name("shop.index")
        worker_broker.put(index, ("a",), ("exit",), ("b",))
        options = {"num_messages": 3, "loop_count": 1}
        worker = taskhawk.Worker(worker_broker, [WORKER_QUEUE], wait_s=0, **options)
        with pytest.raises(KeyboardInterrupt):
            worker.run()
        assert worker.ledger == taskhawk.Ledger(received=3, retried=3)


async def cor_eventually(condition: Callable[[], Any]) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(WORKER_PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - another thread may make it hold
            await asyncio.sleep(0.001)


async def cor_raise(error: BaseException) -> None:
    """Raise it after a while."""
    await asyncio.sleep(0)
    raise error


async def cor_group() -> None:
    """Fail in two asyncio tasks, which ask for different delays."""
    async with asyncio.TaskGroup() as tasks:
        for delay_s in (7, 70):
            retry = taskhawk.RetryException(delay_seconds=delay_s)
            tasks.create_task(cor_raise(retry))


async def cor_exit() -> None:
    """Exit in an asyncio task that is awaited."""
    await asyncio.create_task(cor_raise(SystemExit("of a task")))


class TestCoroutines:
    """All coroutines of a worker run on one event loop, and each as any other task."""

    @pytest.fixture
    def act(self, worker_act):
        """Return a coroutine task that does what WORKER_ACTS says."""

        @taskhawk.task(name="work.act_async", never_retry_on=(KeyError,))
        async def act(name: str) -> None:
            await WORKER_ACTS[name]()

        return act

    def test_at_the_same_time(self, worker_broker, act):
        """They run at the same time, as many as there are slots, and share clients."""
        made: list[Any] = []

        async def meet() -> None:
            if not made:
                made.append(asyncio.Barrier(3))
            async with asyncio.timeout(WORKER_PATIENCE_S):
                await made[0].wait()
            made.append(asyncio.get_running_loop())

        WORKER_ACTS["meet"] = meet
        worker_broker.put(act, *[("meet",)] * 6)
        ledger = worker_broker.work(concurrency=3, num_messages=10)
        assert ledger == taskhawk.Ledger(received=6, acked=6)
        _, *loops = made
        assert (len(loops), len({*loops})) == (6, 1)
        assert loops[0].is_closed()

    @pytest.mark.parametrize(
        ("run", "ledger", "delay_s"),
        [
            (functools.partial(asyncio.sleep, 0), {"acked": 1}, None),
            (lambda: cor_raise(ValueError()), {"retried": 1}, None),
            (lambda: cor_raise(KeyError()), {"dead_lettered": 1}, None),
            (lambda: cor_raise(SystemExit()), {"retried": 1}, None),
            (lambda: cor_raise(KeyboardInterrupt()), {}, None),
            (lambda: cor_raise(asyncio.CancelledError()), {"retried": 1}, None),
            (lambda: cor_raise(taskhawk.IgnoreException()), {"acked": 1}, None),
            (cor_group, {"retried": 1}, 70),
            (cor_exit, {"retried": 1}, None),
        ],
        ids=[
            "returns",
            "fails",
            "never",
            "exits",
            "ends",
            "cancelled",
            "ignored",
            "group",
            "exits_aside",
        ],
    )
    def test_ends(self, worker_broker, act, run, ledger, delay_s):
        """A coroutine ends as any run does, while others go on."""
        other = []

        async def wait() -> None:
            other.append(asyncio.Event())
            await other[0].wait()
            await asyncio.sleep(0.01)

        async def end() -> None:
            await cor_eventually(lambda: other)
            try:
                await run()
            finally:
                other[0].set()

        WORKER_ACTS.update({"wait": wait, "end": end})
        worker_broker.faults |= LAST if "dead_lettered" in ledger else {}
        worker_broker.put(act, ("wait",), ("end",))
        options = {"concurrency": 2, "num_messages": 2, "loop_count": 1}
        if not ledger:  # Control-C ends the worker
            with pytest.raises(KeyboardInterrupt):
                worker_broker.work(**options)
            return
        found = worker_broker.work(**options)
        expected = taskhawk.Ledger(received=2, **ledger)
        expected.acked += 1
        assert found == expected
        delays = [batch for _, batch in worker_broker.made("change_visibility")]
        assert [s for batch in delays for _, s in batch] == [delay_s] * bool(delay_s)

    def test_context(self, worker_broker, act):
        """Each runs in its own message's context, with what its hook has set there."""
        number = contextvars.ContextVar("number", default=0)
        counter, seen = itertools.count(1), []

        async def look() -> None:
            before, metadata = number.get(), taskhawk.current_task()
            await asyncio.sleep(0.01)
            seen.append((before, number.get(), metadata is taskhawk.current_task()))
            number.set(-1)

        WORKER_ACTS["look"] = look
        taskhawk.configure(
            TASKHAWK_PRE_PROCESS_HOOK=lambda **_: number.set(next(counter))
        )
        worker_broker.put(act, *[("look",)] * 4)
        worker_broker.work(concurrency=2, num_messages=2)
        assert sorted(seen) == [(n, n, True) for n in range(1, 5)]

    def test_left_behind(self, worker_broker, act, caplog):
        """What a run leaves is named for that run alone; it is cancelled and awaited."""
        ended, begun = [], []

        async def linger() -> None:
            try:
                await asyncio.sleep(WORKER_PATIENCE_S)
            finally:
                await asyncio.sleep(0.3)  # such as to close a connection
                ended.append(1)

        async def leave() -> None:
            begun.append(asyncio.create_task(linger()))
            await asyncio.sleep(0)

        async def watch() -> None:
            await cor_eventually(lambda: begun)

        WORKER_ACTS.update({"leave": leave, "watch": watch})
        worker_broker.put(act, ("watch",), ("leave",))
        worker_broker.work(concurrency=2, num_messages=2)
        text = (
            "work.act_async ended while asyncio tasks that it began were still running"
        )
        name = "TestCoroutines.test_left_behind.<locals>.linger"
        assert worker_logs(caplog) == [f"{text}: {name}"]
        assert ended == [1]

    def test_no_threads(self, worker_broker, act, monkeypatch):
        """Where no thread can be started for the loop, a run has a loop of its own."""
        start = threading.Thread.start
        serve = taskhawk._EventLoop._serve

        def refuse_loop(thread: threading.Thread) -> None:
            if getattr(thread, "_target", None) is serve:
                raise RuntimeError("can't start new thread")
            start(thread)

        ran = []

        async def look() -> None:
            await asyncio.sleep(0)
            ran.append(1)

        WORKER_ACTS["look"] = look
        monkeypatch.setattr(threading.Thread, "start", refuse_loop)
        worker_broker.put(act, ("look",), ("look",))
        assert worker_broker.work().acked == 2
        assert ran == [1, 1]

    def test_end_is_bounded(self, worker_broker, act, caplog, monkeypatch):
        """The worker ends though a thread that a coroutine began does not."""
        monkeypatch.setattr(taskhawk, "_LOOP_END_S", 0.05)
        release = threading.Event()

        async def leave() -> None:
            asyncio.get_running_loop().run_in_executor(None, release.wait)

        WORKER_ACTS["leave"] = leave
        worker_broker.put(act, ("leave",))
        assert worker_broker.work().acked == 1
        release.set()
        text = "something that a coroutine began does not end: left to run"
        assert worker_logs(caplog) == [text]

    def test_interrupted_at_once(self, worker_broker, act, monkeypatch):
        """Control-C does not wait long for a coroutine that won't be cancelled."""
        monkeypatch.setattr(taskhawk, "_LOOP_END_S", 2 * WORKER_PATIENCE_S)
        released = threading.Event()

        async def refuse() -> None:
            os.kill(os.getpid(), signal.SIGUSR1)
            while not released.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        WORKER_ACTS["refuse"] = refuse
        worker_broker.put(act, ("refuse",))
        before = signal.signal(signal.SIGUSR1, interrupt)
        began = time.monotonic()
        try:
            with pytest.raises(KeyboardInterrupt):
                worker_broker.work()
        finally:
            signal.signal(signal.SIGUSR1, before)
            released.set()
        assert time.monotonic() < began + WORKER_PATIENCE_S

    def test_interrupted(self, worker_broker, act):
        """The exit of a signal handler in the thread that waits cancels the coroutine."""
        ended = []

        async def wait() -> None:
            try:
                os.kill(os.getpid(), signal.SIGUSR1)
                await asyncio.sleep(WORKER_PATIENCE_S)
            finally:
                ended.append(1)

        WORKER_ACTS["wait"] = wait
        worker_broker.put(act, ("wait",))
        before = signal.signal(signal.SIGUSR1, lambda *_: sys.exit("told to"))
        try:
            with pytest.raises(SystemExit, match=r"^told to$"):
                worker_broker.work()
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert ended == [1]

    def test_interrupted_alone(self):
        """Where others go on on the loop, what was interrupted is cancelled at once."""
        event_loop, ended = taskhawk._EventLoop(), []

        async def wait() -> None:
            try:
                os.kill(os.getpid(), signal.SIGUSR1)
                await asyncio.sleep(WORKER_PATIENCE_S)
            finally:
                ended.append(1)

        before = signal.signal(signal.SIGUSR1, lambda *_: sys.exit("told to"))
        try:
            with event_loop.in_this_thread():
                with pytest.raises(SystemExit, match=r"^told to$"):
                    event_loop.run(wait())
                worker_eventually(lambda: ended)
        finally:
            signal.signal(signal.SIGUSR1, before)

    def test_no_loop(self, worker_broker, act, caplog, monkeypatch):
        """A loop that can't be made fails the run, and the next one has it."""
        caplog.set_level(logging.CRITICAL)  # a record would keep the coroutine
        made = asyncio.new_event_loop

        def fail_once() -> Any:
            monkeypatch.setattr(asyncio, "new_event_loop", made)
            raise OSError("too many open files")

        WORKER_ACTS["nothing"] = functools.partial(asyncio.sleep, 0)
        monkeypatch.setattr(asyncio, "new_event_loop", fail_once)
        worker_broker.put(act, ("nothing",), ("nothing",))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited")
            ledger = worker_broker.work(loop_count=2)
            gc.collect()
        assert ledger == taskhawk.Ledger(received=2, acked=1, retried=1)

    def test_forked(self, worker_broker, act, worker_act):
        """A process that a task forks runs coroutines on its own; none comes back."""
        codes = []

        def fork() -> None:
            if forked := os.fork():
                codes.append(os.waitpid(forked, 0)[1])
                return
            taskhawk._run_coroutine(asyncio.sleep(0))
            os._exit(7)

        async def come_back() -> None:
            if forked := os.fork():
                codes.append(os.waitpid(forked, 0)[1])  # noqa: ASYNC222

        WORKER_ACTS.update({"fork": fork, "come_back": come_back})
        WORKER_ACTS["nothing"] = functools.partial(asyncio.sleep, 0)
        worker_broker.put(act, ("nothing",))
        worker_broker.put(worker_act, ("fork",))
        worker_broker.put(act, ("come_back",))
        assert worker_broker.work(num_messages=3).acked == 3
        assert codes == [7 << 8, 0]

    def test_lease_lost(self, worker_broker, act, worker_clock):
        """A coroutine sees that its lease was lost."""

        async def wait() -> None:
            worker_clock.now += 31
            await cor_eventually(lambda: taskhawk.current_task().lease_lost)

        WORKER_ACTS["wait"] = wait
        worker_broker.put(act, ("wait",))
        ledger = worker_broker.work(loop_count=1, clock=worker_clock)
        assert ledger.received == 1

    def test_grace(self, worker_broker, act, caplog):
        """A coroutine is waited for when the worker stops, until the grace is over."""
        stop, release, ended = threading.Event(), threading.Event(), []

        async def hang() -> None:
            stop.set()
            await cor_eventually(release.is_set)
            ended.append(1)

        async def stopped() -> None:
            await cor_eventually(stop.is_set)

        def work_in_thread() -> taskhawk.Ledger:
            return worker_broker.work(
                until_empty=False,
                num_messages=2,
                concurrency=2,
                grace_s=0.1,
                shutdown_event=stop,
            )

        WORKER_ACTS.update({"stopped": stopped, "hang": hang})
        worker_broker.put(act, ("stopped",), ("hang",))
        name = "work.act_async ID (message ID)"
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(work_in_thread)
            text = f"the grace is over, and {name} still runs"
            worker_eventually(lambda: text in worker_logs(caplog))
            release.set()
            ledger = running.result()
        assert ledger.received == 2
        worker_eventually(lambda: ended)


class TestPostponedCopies:
    """What is postponed is copied to its own queue, and counts no attempt."""

    def test_attempts(self, broker):
        """Attempts go on where they were; id, headers and body are the message's own."""
        seen: list[Any] = []

        @taskhawk.task(name="mail.send")
        def send(metadata):
            seen.append((metadata.id, metadata.attempt, dict(metadata.headers)))
            if len(seen) in (1, 3, 4):
                raise taskhawk.PostponeException(delay_seconds=0)
            if len(seen) == 2:
                raise taskhawk.RetryException(delay_seconds=0)

        sent = send.with_headers(n="5").dispatch()
        ledgers = [work_once(broker) for _ in range(5)]
        ends = ["postponed", "retried", "postponed", "postponed", "acked"]
        assert ledgers == [taskhawk.Ledger(1, **{end: 1}) for end in ends]
        assert seen == [(sent, attempt, {"n": "5"}) for attempt in (1, 1, 2, 2, 2)]
        assert broker.depth(broker.destination(Priority.default)) == (0, 0, 0)

    def test_delay(self, scripted):
        """The copy has the delay, which SQS can keep for 15 minutes, group and headers."""

        @taskhawk.task(name="mail.send")
        def send():
            raise taskhawk.PostponeException(delay_seconds=3600)

        send.with_headers(n="5").dispatch()
        assert work_once(taskhawk._brokers.broker()).postponed == 1
        first, copy = scripted.asked("SendMessage")
        ours = {"taskhawk.postponed": {"DataType": "String", "StringValue": "1"}}
        attributes = {**first["MessageAttributes"], **ours}
        changed = {"DelaySeconds": 900, "MessageAttributes": attributes}
        assert copy == first | changed

    def test_retries_used_up(self, sqlite):
        """A task that is postponed now and then has no more retries than another."""
        ends = iter([postponed(0), KeyError(), postponed(0), postponed(0), KeyError()])

        @taskhawk.task(name="mail.send", retry=taskhawk.fixed(0, 1, jitter=False))
        def send():
            raise next(ends)

        send.dispatch()
        ledgers = [work_once(sqlite) for _ in range(5)]
        assert [ledger.postponed for ledger in ledgers] == [1, 0, 1, 1, 0]
        assert (ledgers[1].retried, ledgers[4].dead_lettered) == (1, 1)
        [letter] = receive_all("TASKHAWK-DEFAULT-DLQ")
        error = json.loads(letter.message_attributes["taskhawk.error"]["StringValue"])
        assert error["attempt"] == 2
        # Nor have our counts any say once somebody has the queue send it back.
        assert list(letter.message_attributes) == ["taskhawk.error"]

    @pytest.mark.parametrize(
        ("attempt", "headers", "kept", "ours"),
        [
            (1, 10, 9, {"taskhawk.postponed": "3"}),
            (2, 10, 8, {"taskhawk.postponed": "3", "taskhawk.attempts": "1"}),
            (2, 3, 3, {"taskhawk.postponed": "3", "taskhawk.attempts": "1"}),
        ],
    )
    def test_ten_attributes(self, attempt, headers, kept, ours):
        """Ours come first; of ten headers, some give way: the body has them."""
        names = [*(f"h{number}" for number in range(headers)), "taskhawk.postponed"]
        given = {name: {"DataType": "String", "StringValue": "2"} for name in names}
        counts = {"ApproximateReceiveCount": str(attempt), "MessageGroupId": "g"}
        received = QueueMessage("{}", "m1", "r1", counts, given, queue="Q")
        copy = taskhawk._postponed_copy(received, 5, 1000)
        values = {name: it["StringValue"] for name, it in copy.attributes.items()}
        assert {name: values.pop(name) for name in ours} == ours
        assert len(values) == kept
        assert (copy.body, copy.delay_s, copy.group_id) == ("{}", 5, "g")

    def test_lease_lost(self, worker_broker, worker_act, worker_clock):
        """No copy is sent of what another may have by now: there would be two for good."""

        def late() -> None:
            worker_clock.now += 30
            raise taskhawk.PostponeException

        WORKER_ACTS["late"] = late
        worker_broker.put(worker_act, ("late",))
        ledger = worker_broker.work(loop_count=1, clock=worker_clock)
        assert ledger == taskhawk.Ledger(received=1, retried=1)
        assert worker_broker.made("send") == []
        assert worker_broker.depth(WORKER_QUEUE) == (1, 0, 0)


class TestListenAsync:
    """A worker beside an application's event loop, which runs its coroutine tasks."""

    @pytest.fixture
    def ran(self, memory):
        """Return what the tasks async.aside and async.plain have seen of where they ran."""
        ran: list[Any] = []

        @taskhawk.task(name="async.aside")
        async def aside(wait_s=0):
            await asyncio.sleep(wait_s)
            ran.append(asyncio.get_running_loop())

        @taskhawk.task(name="async.plain")
        def plain():
            ran.append(threading.current_thread())

        return ran

    @staticmethod
    def dispatch(name, *args):
        """Queue a run."""
        taskhawk.Task.find_by_name(f"async.{name}").dispatch(*args)

    def test_loop(self, ran):
        """Coroutines run on the application's loop, and plain tasks beside it."""
        for name in ("aside", "plain", "aside"):
            self.dispatch(name)

        async def serve():
            ledger = await taskhawk.listen_async(
                Priority.default, max_tasks=3, num_messages=3
            )
            return ledger, asyncio.get_running_loop(), threading.current_thread()

        ledger, loop, thread = asyncio.run(serve())
        assert ledger == taskhawk.Ledger(received=3, acked=3)
        assert (ran[0], ran[2]) == (loop, loop)
        assert isinstance(ran[1], threading.Thread)
        assert ran[1] is not thread

    def test_concurrency(self, ran):
        """Coroutines run at the same time, and may wait for the application's own."""
        meeting = asyncio.Barrier(3)

        @taskhawk.task(name="async.meet")
        async def meet():
            await meeting.wait()

        self.dispatch("meet")
        self.dispatch("meet")

        async def serve():
            worker = taskhawk.listen_async(
                Priority.default, max_tasks=2, concurrency=2, num_messages=2
            )
            async with asyncio.timeout(WORKER_PATIENCE_S):
                ledger, _ = await asyncio.gather(worker, meeting.wait())
            return ledger

        assert asyncio.run(serve()).acked == 2

    @pytest.mark.parametrize("event", [asyncio.Event, threading.Event])
    def test_shutdown_event(self, event, ran):
        """An event of either kind stops it, after what runs."""

        async def serve():
            stop = event()
            self.dispatch("aside", 0.05)
            worker = asyncio.create_task(
                taskhawk.listen_async(Priority.default, shutdown_event=stop)
            )
            await cor_eventually(lambda: taskhawk._brokers.broker() and ran)
            stop.set()
            return await worker

        assert asyncio.run(serve()) == taskhawk.Ledger(received=1, acked=1)

    def test_cancelled(self, ran):
        """Cancelled, it stops as by the event, and is cancelled once it has ended."""
        logs = []

        async def serve():
            began = asyncio.Event()

            @taskhawk.task(name="async.begin")
            async def begin():
                began.set()
                await asyncio.sleep(0.05)
                ran.append("ended")

            self.dispatch("begin")
            worker = asyncio.create_task(taskhawk.listen_async(Priority.default))
            await began.wait()
            worker.cancel()
            with pytest.raises(asyncio.CancelledError):
                await worker
            logs.extend(ran)
            return sum(taskhawk._brokers.broker().depth("TASKHAWK-DEFAULT"))

        assert asyncio.run(serve()) == 0
        assert logs == ["ended"]

    def test_cancelled_again(self, ran):
        """Cancelled again, it does not wait for what runs, and the worker still ends."""
        threads = {*threading.enumerate()}

        async def serve():
            began, go_on = asyncio.Event(), asyncio.Event()

            @taskhawk.task(name="async.wait")
            async def wait():
                began.set()
                await go_on.wait()

            self.dispatch("wait")
            worker = asyncio.create_task(taskhawk.listen_async(Priority.default))
            await began.wait()
            for _ in range(2):
                worker.cancel()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            assert worker.cancelled()
            go_on.set()
            await cor_eventually(lambda: {*threading.enumerate()} <= threads)
            return sum(taskhawk._brokers.broker().depth("TASKHAWK-DEFAULT"))

        assert asyncio.run(serve()) == 0

    def test_error(self, ran):
        """What ends a worker is raised; so are options that make no sense."""
        coroutine = taskhawk.listen_async(Priority.default, num_messages=0)
        sentence = "num_messages: expected 1 to 100, got 0"
        assert refused(asyncio.run, coroutine) == sentence
        coroutine = taskhawk.listen_async("high")
        sentence = "priority: expected a taskhawk.Priority or several, got 'high'"
        assert refused(asyncio.run, coroutine) == sentence

    def test_end_of_the_loop(self, ran):
        """An application that ends with it running cancels its coroutines: no run is lost."""

        async def serve():
            began = asyncio.Event()

            @taskhawk.task(name="async.endless")
            async def endless():
                began.set()
                await asyncio.sleep(WORKER_PATIENCE_S)

            self.dispatch("endless")
            worker = asyncio.create_task(taskhawk.listen_async(Priority.default))
            await began.wait()
            return worker  # asyncio.run() cancels it, and waits

        assert asyncio.run(serve()).cancelled()
        assert sum(taskhawk._brokers.broker().depth("TASKHAWK-DEFAULT")) == 1


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
        sqlite.send("TASKHAWK-DEFAULT", [Outgoing(processing_body(args=[1]), old)])
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

    @pytest.mark.parametrize("room", [180, 400, 900, 1500, 2500, 20_000])
    def test_cut(self, room):
        """An error is cut as little as needed: its traceback's end and text's start stay."""
        try:
            raise ValueError("why " + "é" * 400)
        except ValueError as caught:
            error = caught
        received = QueueMessage("{}", "m1", "receipt")
        whole = json.loads(taskhawk._error_record(received, error, 99_999))
        text = taskhawk._error_record(received, error, room)
        cut = json.loads(text)
        assert whole["message"] == str(error)
        assert whole["traceback"] == "".join(traceback.format_exception(error))
        assert whole["traceback"].endswith(cut["traceback"])
        assert whole["message"].startswith(cut["message"])
        assert not cut["traceback"] or cut["message"] == whole["message"]
        if cut != {**whole, "time": cut["time"]} and cut["message"]:
            assert room - 6 < len(text) <= room  # a character has 6 bytes at most

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
        body = processing_body(args=[1])
        ids = [
            client.send_message(
                QueueUrl=url["QueueUrl"],
                MessageBody=body,
                MessageGroupId="group",
                MessageDeduplicationId=f"once-{number}",
            )["MessageId"]
            for number in range(2)
        ]
        for _ in ids:  # a FIFO queue is asked for one message at a time
            assert work_once(taskhawk._brokers.broker(), name).dead_lettered == 1
        found = client.receive_message(
            QueueUrl=letters,
            MaxNumberOfMessages=10,
            MessageSystemAttributeNames=["All"],
        )["Messages"]
        names = ("MessageDeduplicationId", "MessageGroupId")
        assert [
            tuple(message["Attributes"][name] for name in names) for message in found
        ] == [(sent, "group") for sent in ids]


WORKER_12_HOURS_S = 43_200


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
        self.copied: set[int] = set()  # what was postponed
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
            sent = {json.loads(entry.body)["args"][0] for entry in entries}
            if args[0] == WORKER_QUEUE:
                self.copied |= sent
            else:
                self.dead |= sent
        elif name == "delete":
            numbers = {self.numbers[receipt] for receipt in args[1]}
            for number in numbers - self.done - self.dead - self.copied:
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

    @pytest.mark.parametrize(
        "seeds",
        [
            pytest.param(range(15), id="few"),
            pytest.param(range(15, 450), marks=pytest.mark.slow, id="many"),
        ],
    )
    def test_nothing_is_lost(self, seeds, monkeypatch):
        """Whatever fails, each message runs or is a dead letter, and the ledgers balance."""
        monkeypatch.setattr(
            taskhawk, "_TICK_S", 0.0005
        )  # the clock goes on as it is looked at
        logging.disable(logging.CRITICAL)
        try:
            for seed in seeds:
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
                if draw > 0.9:
                    raise taskhawk.PostponeException(chance.choice((0, 5, 60)))
                broker.done.add(number)
                if draw < 0.4:
                    raise taskhawk.IgnoreException
            finally:
                broker.running.discard(metadata.receipt)

        broker.put(job, *((number,) for number in range(12)))
        # The last runs what is left of a run whose lease ended as it was postponed.
        for fault_rate in (0.4, 0.2, 0.1, 0, 0):
            broker.fault_rate, broker.crashed = fault_rate, False
            broker.stop = threading.Event()
            worker = taskhawk.Worker(
                broker,
                [WORKER_QUEUE],
                num_messages=chance.choice((1, 3, 10, 40)),
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


#: A task that notes its runs in a file; some ask for a retry, or are killed with the worker.
ORDER_MODULE = """
import os
import time
import taskhawk

@taskhawk.task(group="group")
def note(group, number, metadata):
    journal = os.open("journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(journal, f"{group} {number} began\\n".encode())
    time.sleep(0.02)
    if number % 5 == 2 and metadata.attempt == 1:
        raise taskhawk.RetryException(delay_seconds=number % 2)
    os.write(journal, f"{group} {number} ended\\n".encode())
    os.close(journal)
"""


class TestOrder:
    """A FIFO queue's groups are run in order, one message at a time, whatever happens."""

    def test_one_group(self, worker_broker, worker_act):
        """With ten slots and a prefetch, too, a group has one run at a time, in order."""
        queue, runs, running = f"{WORKER_QUEUE}.fifo", [], []

        def act(number: int) -> None:
            running.append(number)
            worker_eventually(lambda: True)
            assert running == [number]
            runs.append(running.pop())

        for number in range(30):
            WORKER_ACTS[f"run{number}"] = functools.partial(act, number)
            message = Message.new(worker_act.name, [f"run{number}"])
            entry = Outgoing(json.dumps(message.as_dict()), {}, 0, "g", message.id)
            worker_broker.inner.send(queue, [entry])
        ledger = worker_broker.work(queue, concurrency=10, num_messages=10)
        assert ledger == taskhawk.Ledger(received=30, acked=30)
        assert runs == list(range(30))

    def test_refused_delete(self, scripted, queue_name, sqs_client, ministack):
        """A FIFO queue refuses the delete of a message that was received again: uncertain."""
        make_queue(sqs_client(ministack), f"TASKHAWK-{queue_name}.fifo")
        taskhawk.configure(taskhawk.settings.given, TASKHAWK_FIFO=True)
        broker = taskhawk._brokers.broker()
        queue = broker.destination(Priority.default)

        @taskhawk.task(name="order.slow")
        def slow() -> None:
            (again,) = broker.receive(queue, 1, 5, 30, NEVER)
            assert again.attempt == 2

        slow.dispatch()
        scripted.always("ChangeMessageVisibilityBatch", refuse(0))
        ledger = taskhawk.Worker(
            broker, [queue], visibility_timeout_s=1, loop_count=1
        ).run()
        assert ledger == taskhawk.Ledger(received=1, uncertain=1)

    @pytest.mark.slow
    @pytest.mark.parametrize("place", ["ministack", "sqlite"])
    def test_killed_workers(self, request, place, sqs_client, queue_name, tmp_path):
        """Through retries, kill -9 and restarts, each group's messages are run in order."""
        env = {"TASKHAWK_FIFO": "true", "TASKHAWK_QUEUE": queue_name, **AWS_SETTINGS}
        if place == "ministack":
            endpoint = request.getfixturevalue("ministack")
            make_queue(sqs_client(endpoint), f"TASKHAWK-{queue_name}.fifo", 100)
            env["AWS_ENDPOINT_SQS"] = endpoint
        else:
            options = "visibility_timeout_s=2&max_receive_count=100"
            env["TASKHAWK_BROKER"] = f"sqlite:///{tmp_path}/queue.db?{options}"
        (tmp_path / "jobs.py").write_text(ORDER_MODULE)
        send = """
            import jobs
            for number in range(20):
                for group in "abc":
                    jobs.note.dispatch(group, number)
        """
        assert python_lines(tmp_path, send, **env) == []
        listen = [sys.executable, "-m", "taskhawk", "listen", "jobs"]
        listen += ["--concurrency=4", "--visibility-timeout=2", "--log-level=error"]
        workers: list[subprocess.Popen[bytes]] = []
        journal = tmp_path / "journal"

        def start() -> None:
            workers.append(subprocess.Popen(listen, cwd=tmp_path, env=python_env(env)))

        def ended() -> int:
            text = journal.read_text() if journal.exists() else ""
            return len(re.findall(".* ended", text))

        deadline = time.monotonic() + 90
        try:
            start()
            start()
            for kill_at in (5, 12, 25, 40):
                while ended() < kill_at:
                    assert time.monotonic() < deadline
                    time.sleep(0.002)
                victim = workers.pop(0)
                victim.kill()
                victim.wait()
                start()
            while len(set(journal.read_text().splitlines())) < 2 * 60:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        for group in "abc":
            lines = re.findall(rf"{group} (\d+) (\w+)", journal.read_text())
            numbers = [int(number) for number, _ in lines]
            assert numbers == sorted(numbers)
            assert set(numbers) == set(range(20))


# --- 17. log records ------------------------------------------------------------------


# --- 18. isolation --------------------------------------------------------------------

REAL_TIME = signal.SIGRTMIN + 1
ISOLATED_MODULE = """
import asyncio, atexit, ctypes, logging.config, multiprocessing, os, pathlib
import signal, subprocess, sys, threading, time
import taskhawk

HERE = pathlib.Path(__file__).parent
LOG = logging.getLogger("isolated")
BELOW = logging.getLogger("nobody.somebody")
LOOPS = set()
# The worker's own settings and logging hold, whatever a module sets up for itself.
taskhawk.configure(AWS_ACCESS_KEY="key", AWS_SECRET_KEY="the module's")
if "_child" in sys.argv:
    logging.config.dictConfig({
        "version": 1,
        "root": {"level": "CRITICAL"},
        "loggers": {"isolated": {"propagate": False}},
    })
NEVER = taskhawk.fixed(0, max_retries=0)
IN_7_S = taskhawk.fixed(7, 3, jitter=False)

def note(*words):
    with (HERE / "notes").open("a") as file:
        print(*words, file=file)

def before(sqs_queue_message, **_):
    note("before", os.getpid())

def after_run(message, outcome, exception, duration_ms):
    note(message.task_name, outcome, repr(exception), os.getpid())

@taskhawk.task(isolate=True)
def pid():
    note(os.getpid(), os.getppid())

@taskhawk.task(time_limit=30)
def meet():
    note(os.getpid())
    while (HERE / "notes").read_text().count("\\n") < 2:
        time.sleep(0.01)

@taskhawk.task(retry=NEVER)
def nap():
    time.sleep(600)

@taskhawk.task(time_limit=0.5, retry=NEVER)
def spin():
    note(subprocess.Popen(["sleep", "600"]).pid)
    sum(range(10**12))

@taskhawk.task(isolate=True, retry=NEVER)
def fail(how, text="lost"):
    {
        "exit": lambda: os._exit(3),
        "segfault": lambda: ctypes.string_at(0),
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "real time": lambda: os.kill(os.getpid(), signal.SIGRTMIN + 1),
        "leave": lambda: sys.exit(text),
        "raise": lambda: {}[text],
        "write": lambda: os.write(int(sys.argv[-2]), text.encode() + b"\\n"),
        "close": lambda: (os.closerange(3, 256), threading.Event().wait()),
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

@taskhawk.task(batch=5, isolate=True)
def together(calls):
    note(*[call.args[0] for call in calls])
    for call in calls:
        {
            "fine": lambda: None,
            "fail": lambda: call.fail(KeyError("lost")),
            "exit": lambda: os._exit(3),
        }[call.args[0]]()

@taskhawk.task(isolate=True)
def ask(how):
    raise {
        "retry": taskhawk.RetryException("not yet", delay_seconds=5),
        "postpone": taskhawk.PostponeException("not now", delay_seconds=0),
        "policy": taskhawk.RetryException(retry=IN_7_S, log_error=False),
        "give up": taskhawk.RetryException("so", retry=NEVER, log_error=False),
        "ignore": taskhawk.IgnoreException("no need"),
        "log": taskhawk.LoggingException("it failed", extra={"order": 7}),
        "error": KeyError("lost"),
    }[how]

@taskhawk.task(isolate=True)
def log(**extra):
    LOG.debug("not this")
    LOG.warning("from %s", "afar", extra={"thing": LOG, **extra})

def talk():
    while not time.sleep(0.01):
        LOG.warning("still here")

@taskhawk.task(isolate=True)
def linger():
    threading.Thread(target=talk).start()

@taskhawk.task(isolate=True)
async def wait(metadata):
    await asyncio.sleep(0)
    LOOPS.add(asyncio.get_running_loop())
    note(metadata.attempt, metadata.queue, len(LOOPS))

@taskhawk.task(isolate=True)
def look(secret):
    argv = pathlib.Path("/proc/self/cmdline").read_text()
    environ = pathlib.Path("/proc/self/environ").read_text()
    note(secret in argv + environ, taskhawk.settings.AWS_SECRET_KEY == secret)
    note(taskhawk.settings.credentials()["aws_session_token"])
    note(os.environ.get("PYTHONPATH"), sys.stdin.read() == "")
    note(os.get_inheritable(int(sys.argv[-2])))

@taskhawk.task(isolate=True)
def again(metadata):
    metadata.extend_visibility_timeout(0)
    note("again", metadata.attempt)
    raise taskhawk.RetryException

@taskhawk.task(isolate=True)
def hold():
    note(os.getpid())
    sum(range(10**12))

@taskhawk.task(time_limit=20)
def start(how):
    STARTERS[how]()

def itself():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    note(True)

def a_program():
    process = subprocess.Popen(["sleep", "60"])
    process.terminate()
    note(process.wait() == -signal.SIGTERM)

def a_shell():
    process = subprocess.Popen(["sh", "-c", "kill -INT $$; sleep 60"])
    note(process.wait() == -signal.SIGINT)

def a_fork():
    forked = os.fork() or time.sleep(60)
    os.kill(forked, signal.SIGTERM)
    note(os.waitpid(forked, 0)[1] == signal.SIGTERM)

def a_pool():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        note(pool.map(abs, [-1, 1]) == [1, 1])

async def run_program():
    process = await asyncio.create_subprocess_exec("sleep", "60")
    process.terminate()
    note(await process.wait() == -signal.SIGTERM)

def own_handler():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    forked = os.fork()
    if forked:
        os.waitpid(forked, 0)
    note(*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM)))

STARTERS = {f.__name__: f for f in (itself, a_program, a_shell, a_fork, a_pool)}
STARTERS |= {"at_exit": lambda: atexit.register(LOG.warning, "bye")}
STARTERS |= {"a_coroutine": lambda: asyncio.run(run_program()), "own": own_handler}

@taskhawk.task(isolate=True)
def interpreter():
    note(sys.flags.optimize, sys.warnoptions, sys._xoptions)
    note(sys.path[:2], len(sys.path))

@taskhawk.task
def plain():
    note("plain", os.getpid())
"""


@pytest.fixture
def isolated_jobs(tmp_path, monkeypatch):
    """Return ISOLATED_MODULE, imported, with a queue in a file."""
    monkeypatch.syspath_prepend(tmp_path)
    module = isolated_import(tmp_path, isolated=ISOLATED_MODULE)
    taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{tmp_path}/queue.db")
    yield module
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


def isolated_import(folder: Path, **sources: str) -> Any:
    """Write modules, and import the last of them."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    importlib.invalidate_caches()
    return importlib.import_module(name)


def isolated_notes(module: Any) -> list[str]:
    """Return what the module's tasks noted."""
    return (module.HERE / "notes").read_text().splitlines()


def isolated_work(**options: Any) -> dict[str, int]:
    """Receive once, run what came, and return what the ledger counts."""
    options = {"loop_count": 1, "num_messages": 10, **options}
    ledger = taskhawk.listen_for_messages(Priority.default, **options)
    return {name: count for name, count in vars(ledger).items() if count}


def isolated_slot(given_up: threading.Event | None = None) -> Any:
    """Return what runs the isolated messages of a slot."""
    start = taskhawk._start_of_children(everything=False)
    return taskhawk._Child(start, 100, given_up or threading.Event())


@pytest.fixture
def isolated_child(isolated_jobs):
    """Return what runs the isolated messages of a slot."""
    with contextlib.closing(isolated_slot()) as child:
        yield child


def isolated_run(child: Any) -> list[Outcome]:
    """Have a child run what is queued."""
    received = receive_all()
    return [outcome for message in received for outcome in child.process([message])]


def isolated_log(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return the records of the module's own logger."""
    return [record for record in caplog.records if record.name == "isolated"]


def isolated_refusal(child: Any, received: QueueMessage) -> str:
    """Return why a child can't run a message."""
    with pytest.raises(taskhawk._CannotStart) as raised:
        child.process([received])
    return str(raised.value)


def is_gone(pid: int) -> bool:
    """Return whether a process has ended, be it reaped or not."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


ISOLATED_EARLY_END = (
    ISOLATED_MODULE
    + """
tell = taskhawk._Report.tell

def tell_less(report, kind, *more):
    if kind == "began":
        os._exit(5)
    tell(report, kind, *more)

taskhawk._Report.tell = tell_less
"""
)
ISOLATED_DJANGO = {
    "__init__": "",
    "settings": """
INSTALLED_APPS = ["shop"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
""",
    "models": """
from django.db import models
class Order(models.Model): pass
""",
    "tasks": """
import taskhawk
from django.db import connection
from shop.models import Order
@taskhawk.task(isolate=True)
def count():
    with connection.schema_editor() as editor:
        editor.create_model(Order)
    assert Order.objects.count() == 0
""",
}
# What a task does, and the error that its dead letter has.
ISOLATED_FAILURES = f"""
exit       ChildCrashed: isolated.fail: its process ended: exit code 3
segfault   ChildCrashed: isolated.fail: its process ended: SIGSEGV
kill       ChildCrashed: isolated.fail: its process ended: SIGKILL
real time  ChildCrashed: isolated.fail: its process ended: signal {REAL_TIME}
write      ChildCrashed: isolated.fail: its process wrote to the socket of its worker
leave      SystemExit: lost
raise      KeyError: 'lost'
"""
# Lines that a task writes to the socket of its worker.
ISOLATED_STRAYS = ["7", "null", "[]", '["began"]', '["ended"]', "[" * 100_000, "\xff"]
ISOLATED_STRAYS += ['["ended", ["done", null, null]]', '["ended", null]']
ISOLATED_STRAYS += ['["ended", ["retry", "soon", null]]']
# What the module of the tasks does in a child, and why that can't begin a run.
ISOLATED_OBSTACLES = [
    ("1 / 0", "{no_import}: ZeroDivisionError: division by zero ({file}:1)"),
    ("raise SystemExit(2)", "{no_import}: SystemExit: 2 ({file}:1)"),
    ("import os; os._exit(4)", "{no_import}: its process ended: exit code 4"),
    ("import time; time.sleep(60)", "{no_import}: it takes longer than 0.5 s"),
    (
        ISOLATED_EARLY_END,
        "isolated.pid: its process ended before the run began: exit code 5",
    ),
]
# What a worker may have imported that a child must import in the same order.
ISOLATED_LISTEN = (
    "print(taskhawk.listen_for_messages(taskhawk.Priority.default, loop_count=1))"
)
ISOLATED_TASK = "@taskhawk.task(isolate=True)\ndef job(text=''): pass"
ISOLATED_FACTORY = f"""
import taskhawk
def create_app():
{textwrap.indent(ISOLATED_TASK, "    ")}
"""
ISOLATED_SLOW = """
import sys, taskhawk, time
time.sleep(1.5 * ('_child' in sys.argv))
@taskhawk.task(time_limit=1)
def job(text): pass
"""
ISOLATED_CHATTY = f"""
import logging, taskhawk
for _ in range(2000):
    logging.warning("x" * 300)
{ISOLATED_TASK}
"""
ISOLATED_IMPORTS = {
    "another function": ("def job(text): pass", "task(isolate=True)(lib.job)"),
    "a circle": (
        f"import taskhawk; from entry import task\n{ISOLATED_TASK}",
        "lib.job",
    ),
    "a factory": (ISOLATED_FACTORY, "app = lib.create_app()"),
    "longer than the time limit": (ISOLATED_SLOW, ""),
    "many log records": (ISOLATED_CHATTY, ""),
}


def main_hook(**_: Any) -> None:
    """Be a hook of a script."""


main_hook.__module__ = "__main__"


class TestIsolation:
    """A task may have a process of its own, which can be killed and may crash."""

    @pytest.mark.slow
    @pytest.mark.parametrize(("runs", "processes"), [(100, 1), (2, 2)])
    def test_process(self, isolated_jobs, runs, processes):
        """A child runs one message after another, up to max_tasks_per_child."""
        isolated_jobs.pid.dispatch_many([()] * 3)
        done = isolated_work(max_tasks_per_child=runs)
        assert done == {"received": 3, "acked": 3}
        notes = [note.split() for note in isolated_notes(isolated_jobs)]
        assert {worker for _, worker in notes} == {str(os.getpid())}
        assert len({child for child, _ in notes}) == processes

    @pytest.mark.parametrize("isolate", [False, True])
    def test_which(self, isolated_jobs, isolate):
        """With isolate=True all tasks are isolated, otherwise those that say so."""
        isolated_jobs.plain.dispatch()
        isolated_work(isolate=isolate)
        [note] = isolated_notes(isolated_jobs)
        assert (note != f"plain {os.getpid()}") == isolate

    def test_slots(self, isolated_jobs):
        """Each slot has a child of its own."""
        isolated_jobs.meet.dispatch_many([(), ()])
        assert isolated_work(concurrency=2) == {"received": 2, "acked": 2}
        assert len(set(isolated_notes(isolated_jobs))) == 2

    @pytest.mark.slow
    @pytest.mark.parametrize("case", ISOLATED_FAILURES.strip().splitlines())
    def test_failures(self, isolated_jobs, case):
        """A crash or an error is a failed run, and the next message has its run."""
        how, error = re.split(" {2,}", case)
        isolated_jobs.fail.dispatch(how)
        isolated_jobs.pid.dispatch()
        done = isolated_work()
        assert done == {"received": 2, "acked": 1, "dead_lettered": 1}
        broker = taskhawk._brokers.broker()
        [dead] = broker.receive("TASKHAWK-DEFAULT-DLQ", 10, 0, None, NEVER)
        noted = json.loads(dead.message_attributes["taskhawk.error"]["StringValue"])
        assert f"{noted['type']}: {noted['message']}" == error
        raised = not error.startswith("ChildCrashed")
        assert ("in fail\n" in noted["traceback"]) == raised

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "call", [*(("write", line) for line in ISOLATED_STRAYS), ("close",)]
    )
    def test_strays(self, isolated_jobs, isolated_child, call):
        """Whatever a task does with the worker's socket, it has crashed."""
        isolated_jobs.fail.dispatch(*call)
        [outcome] = isolated_run(isolated_child)
        assert outcome.fate is Fate.dead_letter
        assert type(outcome.error) is taskhawk.ChildCrashed

    def test_stray_record(self, isolated_jobs, isolated_child, capsys):
        """What such a task writes like a log record that is none changes nothing."""
        isolated_jobs.fail.dispatch("write", '{"name": 7}')
        assert isolated_run(isolated_child) == [Outcome(Fate.acknowledge)]
        assert "TypeError: A logger name must be a string" in capsys.readouterr().err

    @pytest.mark.slow
    def test_time_limit(self, isolated_jobs, isolated_child):
        """At its limit a run is killed in whatever code it is, with what it started."""
        isolated_jobs.spin.dispatch()
        [outcome] = isolated_run(isolated_child)
        assert type(outcome.error) is taskhawk.TimeLimitExceeded
        text = "isolated.spin ran longer than its time limit of 0.5 s"
        assert str(outcome.error) == text
        [started] = isolated_notes(isolated_jobs)
        worker_eventually(lambda: is_gone(int(started)))

    @pytest.mark.slow
    def test_time_limit_of_a_dispatch(self, isolated_jobs, caplog):
        """A dispatch's own limit isolates its message, though no task is isolated."""
        limited = isolated_jobs.plain.with_options(time_limit=30)
        given_up = threading.Event()
        with contextlib.closing(taskhawk._Child({}, 100, given_up)) as child:
            isolated_jobs.plain.dispatch()
            limited.dispatch()
            limited.dispatch()
            isolated_jobs.plain.dispatch()
            assert isolated_run(child) == [Outcome(Fate.acknowledge)] * 4
            pids = [note.split()[1] for note in isolated_notes(isolated_jobs)]
            assert pids[0] == pids[3] == str(os.getpid())
            assert pids[1] == pids[2] != pids[0]
            isolated_jobs.nap.with_options(time_limit=0.2).dispatch()
            [outcome] = isolated_run(child)
        assert str(outcome.error) == (
            "isolated.nap ran longer than its time limit of 0.2 s"
        )

    def test_time_limit_without_a_child(self, isolated_jobs, caplog):
        """Where no child can run it, a message runs without its limit, and the log says so."""
        isolated_jobs.plain.with_options(time_limit=30).dispatch()
        isolated_jobs.plain.with_options(retry=taskhawk.fixed(1)).dispatch()
        hook = lambda **_: None  # noqa: E731
        given = dict(taskhawk.settings.given)
        taskhawk.configure(given, TASKHAWK_ERROR_HOOK=hook)
        child = taskhawk._Child({}, 100, threading.Event())
        assert isolated_run(child) == [Outcome(Fate.acknowledge)] * 2
        [warning] = [each for each in caplog.records if each.levelname == "WARNING"]
        assert warning.getMessage() == (
            "a time limit of one message is not kept: TASKHAWK_ERROR_HOOK: where tasks"
            f" are isolated, expected a function with a dotted path, got {hook!r}"
        )

    @pytest.mark.slow
    def test_crash_after_fork(self, isolated_jobs, isolated_child):
        """A child's crash is seen at once, though what its task forked goes on."""
        isolated_jobs.fork.dispatch("exit")
        [outcome] = isolated_run(isolated_child)
        assert type(outcome.error) is taskhawk.ChildCrashed
        [forked] = map(int, isolated_notes(isolated_jobs))
        assert not is_gone(forked)
        os.kill(forked, signal.SIGKILL)

    def test_fork(self, isolated_jobs, isolated_child, caplog, capfd):
        """What a task forks does not answer or log in its name, though it returns."""
        isolated_jobs.fork.dispatch("wait")
        assert isolated_run(isolated_child) == [Outcome(Fate.acknowledge)]
        [forked] = isolated_notes(isolated_jobs)
        [record] = isolated_log(caplog)
        assert record.getMessage() == f"from {forked}"
        assert "from a fork" in capfd.readouterr().err

    @pytest.mark.slow
    def test_chatty_import(self, isolated_jobs):
        """A large message is not in the way of the many log records of an import."""
        source = "import logging, taskhawk\nfor _ in range(2000):\n"
        source += "    logging.warning('x' * 300)\n"
        source += "@taskhawk.task(time_limit=10)\ndef chatty(text): pass\n"
        chatty = isolated_import(isolated_jobs.HERE, chatty=source).chatty
        chatty.dispatch("x" * 900_000)
        assert isolated_work() == {"received": 1, "acked": 1}

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "how", ["itself", "a_program", "a_shell", "a_fork", "a_pool", "a_coroutine"]
    )
    def test_signals(self, isolated_jobs, isolated_child, how):
        """A child is not ended by its worker's signals; what a task starts is."""
        isolated_jobs.start.dispatch(how)
        assert isolated_run(isolated_child) == [Outcome(Fate.acknowledge)]
        assert isolated_notes(isolated_jobs) == ["True"]

    def test_signal_handlers(self, isolated_jobs, isolated_child):
        """An ignored signal stays ignored, and a task's own handler is its forks'."""
        isolated_jobs.start.dispatch("own")
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            assert isolated_run(isolated_child) == [Outcome(Fate.acknowledge)]
        finally:
            signal.signal(signal.SIGINT, before)
        assert isolated_notes(isolated_jobs) == ["1 1"] * 2

    @pytest.mark.slow
    def test_died_while_idle(self, isolated_jobs, isolated_child):
        """A child that died between two messages is replaced, and no run failed."""
        for count in (1, 2):
            isolated_jobs.pid.dispatch()
            assert isolated_run(isolated_child) == [Outcome(Fate.acknowledge)]
            notes = isolated_notes(isolated_jobs)
            pid = int(notes[-1].split()[0])
            os.kill(pid, signal.SIGKILL)
            worker_eventually(lambda pid=pid: is_gone(pid))
            assert len(set(notes)) == count
        isolated_child._process.end(0)
        isolated_child.kill()  # nobody: its number may be another's by now

    @pytest.mark.parametrize(
        ("how", "done", "level", "text"),
        [
            ("retry", "retried", "INFO", "runs again in 5 s: not yet"),
            ("postpone", "postponed", "DEBUG", "runs again in 0 s: not now"),
            ("policy", "retried", "INFO", "asked to be retried and runs again in 7 s"),
            ("give up", "dead_lettered", "WARNING", "retried and is given up: so"),
            ("ignore", "acked", "INFO", "ignored: no need"),
            ("log", "retried", "ERROR", "it failed"),
            ("error", "retried", "ERROR", "failed and is left to the queue"),
        ],
    )
    def test_errors(self, isolated_jobs, caplog, how, done, level, text):  # noqa: PLR0917
        """What a task raises means the same in a child, and its traceback is logged."""
        caplog.set_level(logging.DEBUG)
        isolated_jobs.ask.dispatch(how)
        assert isolated_work() == {"received": 1, done: 1}
        record = next(r for r in caplog.records if r.getMessage().endswith(text))
        assert record.levelname == level
        assert getattr(record, "order", None) == (7 if how == "log" else None)
        assert ("in ask\n" in (record.exc_text or "")) == (level == "ERROR")

    # Whatever a record carries, it is not taken for the end of a run.
    @pytest.mark.parametrize("extra", [{"order": 8}, {"fate": "retry", "0": "ended"}])
    def test_log(self, isolated_jobs, isolated_child, caplog, extra):
        """A child's log records come out in the worker, with what they carry."""
        isolated_jobs.log.dispatch(**extra)
        assert isolated_run(isolated_child) == [Outcome(Fate.acknowledge)]
        [record] = isolated_log(caplog)
        assert (record.getMessage(), record.levelname) == ("from afar", "WARNING")
        assert record.thing == "<Logger isolated (WARNING)>"
        assert extra.items() <= vars(record).items()
        assert (record.task, record.attempt) == ("isolated.log", 1)
        assert record.process != os.getpid()

    def test_log_at_exit(self, isolated_jobs, isolated_child, caplog):
        """What a child logs while it ends comes out as well."""
        isolated_jobs.start.dispatch("at_exit")
        assert isolated_run(isolated_child) == [Outcome(Fate.acknowledge)]
        isolated_child.close()
        assert [record.getMessage() for record in isolated_log(caplog)] == ["bye"]

    def test_log_level(self, isolated_jobs, isolated_child, caplog):
        """The worker's levels say which of them."""
        caplog.set_level("ERROR", "isolated")
        isolated_jobs.log.dispatch()
        assert isolated_run(isolated_child) == [Outcome(Fate.acknowledge)]
        assert isolated_log(caplog) == []

    def test_filter_fails(self, isolated_jobs, isolated_child, capsys):
        """A filter that fails on a record of the task's changes nothing but the log."""

        def no_request(record: logging.LogRecord) -> bool:
            raise AttributeError("no request")

        logging.getLogger("isolated").addFilter(no_request)
        try:
            isolated_jobs.log.dispatch()
            assert isolated_run(isolated_child) == [Outcome(Fate.acknowledge)]
        finally:
            logging.getLogger("isolated").removeFilter(no_request)
        assert "AttributeError: no request\n" in capsys.readouterr().err

    @pytest.mark.slow
    def test_lingers(self, isolated_jobs, monkeypatch):
        """A child that does not end when it is told to is killed: its slot goes on."""
        monkeypatch.setattr(taskhawk, "_END_S", 0.2)
        isolated_jobs.linger.dispatch()
        isolated_jobs.pid.dispatch()
        assert isolated_work(max_tasks_per_child=1) == {"received": 2, "acked": 2}

    def test_another_parent(self):
        """A process whose parent is not the worker any more ends at once."""
        result = run_python(["-m", "taskhawk", "_child", "0", "1"])
        assert (result.returncode, result.stderr) == (1, "")

    @pytest.mark.slow
    @pytest.mark.parametrize(("source", "reason"), ISOLATED_OBSTACLES)
    def test_cannot_begin(
        self, isolated_jobs, isolated_child, monkeypatch, source, reason
    ):
        """Where no child can begin a run nothing is run, until one can."""
        file = isolated_jobs.HERE / "isolated.py"
        file.write_text(source)
        isolated_jobs.pid.dispatch()
        [received] = receive_all()
        with monkeypatch.context() as patch:
            if "0.5 s" in reason:
                patch.setattr(taskhawk, "_START_S", 0.5)
            text = isolated_refusal(isolated_child, received)
        no_import = "a child can't import the tasks"
        assert text == reason.format(file=file, no_import=no_import)
        file.write_text(ISOLATED_MODULE)
        isolated_child.start()
        process = isolated_child._process
        isolated_child.start()  # it has one
        assert isolated_child.process([received]) == [Outcome(Fate.acknowledge)]
        assert isolated_child._process is process

    @pytest.mark.slow
    @pytest.mark.parametrize("left", [0, 2])
    def test_no_process(self, isolated_jobs, isolated_child, left):
        """Where no process can be started nothing is run."""
        import resource

        isolated_jobs.pid.dispatch()
        [received] = receive_all()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
        free = sorted(set(range(1000)) - used)[left]
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            text = isolated_refusal(isolated_child, received)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert text == "no process can be started: [Errno 24] Too many open files"

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("lib", "entry"), ISOLATED_IMPORTS.values(), ids=list(ISOLATED_IMPORTS)
    )
    def test_imports(self, isolated_jobs, lib, entry):
        """A child imports what its worker imported, as it did; then the run begins."""
        entry = f"from taskhawk import task; import lib; {entry}"
        isolated_import(isolated_jobs.HERE, lib=lib, entry=entry)
        taskhawk.Task.find_by_name("lib.job").dispatch("x" * 900_000)
        assert isolated_work() == {"received": 1, "acked": 1}

    def test_not_declared(self, isolated_jobs, caplog, monkeypatch):
        """A task that no imported module declares is left to the queue; others are run."""
        monkeypatch.setattr(
            taskhawk, "_INVALID_EVERY_S", 0
        )  # whatever was logged before
        isolated_import(isolated_jobs.HERE, lib=ISOLATED_FACTORY).create_app()
        taskhawk.Task.find_by_name("lib.job").dispatch()
        isolated_jobs.pid.dispatch()
        lost, found = receive_all()
        child = isolated_slot()
        [outcome] = child.process([lost])
        assert (outcome.fate, outcome.delay_s) == (Fate.retry, None)
        assert caplog.messages[0] == (
            "a child can't run lib.job: declare it in a module, not in a function that "
            "the worker calls"
        )
        assert caplog.messages[1].endswith(
            "is left to the queue: no task is registered as 'lib.job': is its module "
            "imported?"
        )
        assert child.process([found]) == [Outcome(Fate.acknowledge)]
        child.close()

    @pytest.mark.slow
    def test_worker_started_by_an_import(self, isolated_jobs):
        """A child does not import a module whose import starts the worker."""
        entry = f"import lib, taskhawk; lib.job.dispatch(); {ISOLATED_LISTEN}"
        (isolated_jobs.HERE / "lib.py").write_text(f"import taskhawk\n{ISOLATED_TASK}")
        (isolated_jobs.HERE / "entry.py").write_text(entry)
        env = {"TASKHAWK_BROKER": taskhawk.settings.TASKHAWK_BROKER}
        result = run_python("import entry", cwd=isolated_jobs.HERE, env=env)
        assert result.stdout.startswith("1 received, 1 acked, "), result.stderr

    @pytest.mark.slow
    def test_path(self, isolated_jobs, monkeypatch, tmp_path):
        """A child looks for modules where its worker does, wherever that is."""
        hook = "__editable__.shop-1.0.finder.__path_hook__"
        long = [f"/nowhere/{'x' * 100}/{number}" for number in range(1200)]
        monkeypatch.setattr(sys, "path", ["", hook, *sys.path, *long])
        monkeypatch.chdir(tmp_path)
        isolated_jobs.interpreter.dispatch()
        assert isolated_work() == {"received": 1, "acked": 1}
        path = isolated_notes(isolated_jobs)[1]
        assert path == f"{[str(tmp_path), hook]} {len(sys.path)}"

    @pytest.mark.slow
    def test_interpreter(self, isolated_jobs):
        """A child has the options of its worker's interpreter."""
        isolated_jobs.interpreter.dispatch()
        command = ["-O", "-W", "ignore::UserWarning", "-X", "faulthandler"]
        command += ["-m", "taskhawk", "listen", "isolated", "--loop-count=1"]
        env = {"TASKHAWK_BROKER": taskhawk.settings.TASKHAWK_BROKER}
        run_python(command, cwd=isolated_jobs.HERE, env=env)
        options = isolated_notes(isolated_jobs)[0]
        assert options == "1 ['ignore::UserWarning'] {'faulthandler': True}"

    def test_frozen(self, isolated_jobs, monkeypatch):
        """An application that starts itself where Python should start is refused."""
        monkeypatch.setattr(sys, "frozen", True, raising=False)
        for name in [n for n in taskhawk._registry if n != "isolated.pid"]:
            del taskhawk._registry[name]
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            isolated_work()
        assert str(raised.value) == (
            "isolated.pid: a frozen application can't isolate tasks: "
            "leave out isolate and time_limit, or run it with Python"
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["vendored", "shop.vendored"])
    def test_vendored(self, tmp_path, name):
        """A file that is cut after part IV isolates tasks, whatever it is called."""
        text = house_source()
        folder, _, module = name.rpartition(".")
        (tmp_path / folder).mkdir(exist_ok=True)
        file = tmp_path / folder / f"{module}.py"
        file.write_text(text[: text.index("# === PART V:")])
        jobs = f"import {name} as taskhawk\n@taskhawk.task(isolate=True)\n"
        (tmp_path / "jobs.py").write_text(f"{jobs}def job(): pass")
        if folder:
            (tmp_path / folder / "__init__.py").write_text("import jobs")
        code = f"import {name} as taskhawk, jobs; jobs.job.dispatch(); "
        code += ISOLATED_LISTEN
        env = {"TASKHAWK_BROKER": f"sqlite:///{tmp_path}/queue.db"}
        result = run_python(code, cwd=tmp_path, env=env)
        assert result.stdout.startswith("1 received, 1 acked, "), result.stderr

    @pytest.mark.slow
    def test_django(self, tmp_path):
        """Where Django is in use, a child sets it up before it imports the tasks."""
        (tmp_path / "shop").mkdir()
        for name, source in ISOLATED_DJANGO.items():
            (tmp_path / "shop" / f"{name}.py").write_text(source)
        env = {
            "TASKHAWK_BROKER": f"sqlite:///{tmp_path}/queue.db",
            "DJANGO_SETTINGS_MODULE": "shop.settings",
        }
        for command in (
            ["dispatch", "shop.tasks.count", "--module", "shop.tasks"],
            ["listen", "shop.tasks", "--loop-count", "1"],
        ):
            result = run_python(["-m", "taskhawk", *command], cwd=tmp_path, env=env)
        assert result.stdout.startswith("1 received, 1 acked, "), result.stderr

    @pytest.mark.parametrize(
        ("last", "ends"),
        [("fine", {"acked": 2, "retried": 1}), ("exit", {"retried": 3})],
    )
    def test_batch(self, isolated_jobs, caplog, last, ends):
        """Messages of a batch task run in one child together; a crash fails them all."""
        isolated_jobs.together.dispatch_many([("fine",), ("fail",), (last,)])
        assert isolated_work() == {"received": 3, **ends}
        assert isolated_notes(isolated_jobs) == [f"fine fail {last}"]
        crash = "isolated.together: its process ended: exit code 3"
        errors = [
            str(record.exc_info[1]) for record in caplog.records if record.exc_info
        ]
        assert errors == ([crash] * 3 if last == "exit" else [])

    def test_started_too_late(self, isolated_jobs):
        """A child that is started as the grace ends runs nothing."""
        given_up = threading.Event()
        child = isolated_slot(given_up)
        isolated_jobs.pid.dispatch()
        [received] = receive_all()
        given_up.set()
        child.kill()  # there is none yet
        assert child.process([received]) == []
        child.close()
        assert not (isolated_jobs.HERE / "notes").exists()

    def test_async(self, isolated_jobs):
        """Coroutines of a child share an event loop, and have the worker's metadata."""
        isolated_jobs.wait.dispatch_many([(), ()])
        assert isolated_work() == {"received": 2, "acked": 2}
        assert isolated_notes(isolated_jobs) == ["1 TASKHAWK-DEFAULT 1"] * 2

    def test_settings(self, isolated_jobs, monkeypatch):
        """Settings reach a child by its socket alone, with no other key's token."""
        monkeypatch.setenv("PYTHONPATH", "/some/where")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "of a role")
        url = taskhawk.settings.TASKHAWK_BROKER
        secrets = {"AWS_ACCESS_KEY": "key", "AWS_SECRET_KEY": "a-very-secret-thing"}
        taskhawk.configure(TASKHAWK_BROKER=url, **secrets)
        isolated_jobs.look.dispatch("a-very-secret-thing")
        assert isolated_work() == {"received": 1, "acked": 1}
        assert isolated_notes(isolated_jobs) == [
            "False True",
            "None",
            "/some/where True",
            "False",
        ]

    def test_act_on_the_queue(self, isolated_jobs):
        """A task in a child can change its message on the queue."""
        isolated_jobs.again.dispatch()
        isolated_work(loop_count=2)
        assert isolated_notes(isolated_jobs) == ["again 1", "again 2"]

    def test_memory(self, isolated_jobs):
        """Tasks can be isolated where the queue is in memory."""
        taskhawk.configure(TASKHAWK_BROKER="sqlite://")
        isolated_jobs.pid.dispatch()
        assert isolated_work() == {"received": 1, "acked": 1}

    def test_hooks(self, isolated_jobs):
        """Hooks run in the child, by their dotted paths."""
        url = taskhawk.settings.TASKHAWK_BROKER
        hook = isolated_jobs.before
        taskhawk.configure(TASKHAWK_BROKER=url, TASKHAWK_PRE_PROCESS_HOOK=hook)
        isolated_jobs.pid.dispatch()
        assert isolated_work() == {"received": 1, "acked": 1}
        before, after = isolated_notes(isolated_jobs)
        assert before.split()[1] == after.split()[0] != str(os.getpid())

    @pytest.mark.slow
    def test_run_hook(self, isolated_jobs):
        """The run hook is told by who saw the end: the child, or the worker if it crashed."""
        url = taskhawk.settings.TASKHAWK_BROKER
        taskhawk.configure(
            TASKHAWK_BROKER=url, TASKHAWK_RUN_HOOK=isolated_jobs.after_run
        )
        isolated_jobs.ask.dispatch("ignore")
        isolated_jobs.fail.dispatch("exit")
        assert isolated_work() == {"received": 2, "acked": 1, "dead_lettered": 1}
        ignored, crashed = isolated_notes(isolated_jobs)
        error = "ChildCrashed('isolated.fail: its process ended: exit code 3')"
        assert crashed == f"isolated.fail dead_letter {error} {os.getpid()}"
        assert ignored.startswith("isolated.ask ignored None ")
        assert not ignored.endswith(f" {os.getpid()}")

    @pytest.mark.parametrize("given", ["itself", "its path"])
    def test_default_policy(self, isolated_jobs, caplog, given):
        """A default retry policy holds in a child too."""
        url = taskhawk.settings.TASKHAWK_BROKER
        policy = {"itself": isolated_jobs.IN_7_S, "its path": "isolated.IN_7_S"}[given]
        taskhawk.configure(TASKHAWK_BROKER=url, TASKHAWK_RETRY=policy)
        isolated_jobs.ask.dispatch("error")
        assert isolated_work() == {"received": 1, "retried": 1}
        assert caplog.messages[-1].endswith("failed and runs again in 7 s")

    @pytest.mark.parametrize("hook", [functools.partial(print), main_hook])
    def test_hook_without_a_path(self, isolated_jobs, monkeypatch, hook):
        """A hook that a child can't import is refused before anything is received."""
        main = sys.modules["__main__"]
        monkeypatch.setattr(main, "main_hook", main_hook, raising=False)
        taskhawk.configure(TASKHAWK_BROKER="sqlite://", TASKHAWK_POST_PROCESS_HOOK=hook)
        with pytest.raises(taskhawk.ConfigurationError) as raised:
            isolated_work()
        assert str(raised.value) == (
            "TASKHAWK_POST_PROCESS_HOOK: where tasks are isolated, expected a function "
            f"with a dotted path, got {hook!r}"
        )

    @pytest.mark.parametrize("source", [ISOLATED_TASK, "from lib import job"])
    def test_main(self, tmp_path, source):
        """An isolated task of __main__ is refused: a child does not import that."""
        (tmp_path / "lib.py").write_text("def job(): pass")
        (tmp_path / "script.py").write_text(
            "import taskhawk\n"
            "taskhawk.configure(TASKHAWK_BROKER='sqlite://')\n"
            f"{source}\n"
            "if not isinstance(job, taskhawk.Task):\n"
            "    taskhawk.task(name='script.job', isolate=True)(job)\n"
            "taskhawk.listen_for_messages(taskhawk.Priority.default)\n"
        )
        result = run_python(["script.py"], cwd=tmp_path)
        text = "script.job: a task of __main__ can't be isolated: move it to a module"
        assert result.stderr.splitlines()[-1] == f"taskhawk.ConfigurationError: {text}"

    def test_malformed(self, isolated_jobs):
        """What is no valid message of an isolated task never reaches a child."""
        broker = taskhawk._brokers.broker()
        broker.send("TASKHAWK-DEFAULT", [taskhawk.Outgoing("{}", {})])
        assert isolated_work() == {"received": 1, "retried": 1}

    @pytest.mark.skipif(
        sys.platform != "linux", reason="elsewhere it ends with its message"
    )
    def test_orphan(self, isolated_jobs):
        """On Linux no child outlives a killed worker, even if it holds the GIL."""
        isolated_jobs.hold.dispatch()
        notes = isolated_jobs.HERE / "notes"
        env = {"TASKHAWK_BROKER": taskhawk.settings.TASKHAWK_BROKER}
        with worker_process(isolated_jobs.HERE, env, "isolated") as worker:
            worker_eventually(lambda: notes.exists() and "\n" in notes.read_text())
            worker.kill()
            child = int(notes.read_text())
            try:
                worker_eventually(lambda: is_gone(child))
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)

    @pytest.mark.slow
    @pytest.mark.parametrize("concurrency", [1, 2])
    def test_grace(self, isolated_jobs, concurrency):
        """After the grace, isolated runs are killed, and their messages visible."""
        isolated_jobs.hold.dispatch()
        stop = threading.Event()

        def tell() -> None:
            worker_eventually((isolated_jobs.HERE / "notes").exists)
            stop.set()

        threading.Thread(target=tell).start()
        options = {"shutdown_event": stop, "concurrency": concurrency, "grace_s": 0.1}
        done = isolated_work(loop_count=None, **options)
        assert done == {"received": 1, "retried": 1}
        assert taskhawk._brokers.broker().depth("TASKHAWK-DEFAULT") == (1, 0, 0)

    def test_none(self, isolated_jobs):
        """Where no task is isolated nothing is for a child."""
        for name in [name for name in taskhawk._registry if name != "isolated.plain"]:
            del taskhawk._registry[name]
        assert taskhawk._start_of_children(everything=False) == {}
        isolated_jobs.plain.dispatch()
        assert isolated_run(isolated_slot()) == [Outcome(Fate.acknowledge)]

    def test_sync(self, isolated_jobs):
        """Sync mode runs an isolated task where it is."""
        taskhawk.configure(TASKHAWK_SYNC=True)
        isolated_jobs.pid.dispatch()
        assert isolated_notes(isolated_jobs)[0].split()[0] == str(os.getpid())


# --- 19. Lambda -----------------------------------------------------------------------

LAMBDA_ARN = "arn:aws:sqs:us-east-1:123456789012:TASKHAWK-DEV-MYAPP"
LAMBDA_DENIED = f"TASKHAWK-DEV-MYAPP: {DENIED} (AccessDenied: no)"


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


def lambda_consume(event: Any, **options: Any) -> tuple[Any, list[BaseException]]:
    """Consume an event; return the answer, and the error or errors that were raised."""
    error: BaseException | None = None
    answer = None
    try:
        answer = taskhawk.process_messages_for_lambda_consumer(event, **options)
    except (Exception, BaseExceptionGroup, SystemExit) as raised:
        error = raised
    if not isinstance(error, BaseExceptionGroup):
        return answer, [error] if error else []
    errors = error.exceptions
    assert str(error) == f"several runs failed ({len(errors)} sub-exceptions)"
    assert len(errors) > 1
    return None, list(errors)


def lambda_failures(*numbers: int) -> dict[str, Any]:
    """Return the answer that has these messages failed."""
    return {"batchItemFailures": [{"itemIdentifier": f"m{n}"} for n in numbers]}


@pytest.fixture
def lambda_sqs(aws: ScriptedAws) -> ScriptedAws:
    """Return an SQS that accepts everything, and configure taskhawk as in a Lambda function."""
    taskhawk.configure(AWS_KEYS, AWS_ENDPOINT_SQS=aws.url, IS_LAMBDA_APP=True)
    return aws


def lambda_entries(sqs: ScriptedAws, action: str, *keys: str) -> list[tuple[Any, ...]]:
    """Return what the batch calls of this action had in their entries, in order."""
    entries = [entry for data in sqs.asked(action) for entry in data["Entries"]]
    return [tuple(entry[key] for key in keys) for entry in entries]


def lambda_deleted(sqs: ScriptedAws) -> list[int]:
    """Return the numbers of the messages for which a delete was asked."""
    receipts = lambda_entries(sqs, "DeleteMessageBatch", "ReceiptHandle")
    return [int(receipt.removeprefix("receipt of m")) for (receipt,) in receipts]


def lambda_delays(sqs: ScriptedAws) -> list[tuple[str, int]]:
    """Return the message and the seconds of each change of a visibility."""
    keys = ("ReceiptHandle", "VisibilityTimeout")
    return lambda_entries(sqs, "ChangeMessageVisibilityBatch", *keys)


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
    "ignore": taskhawk.IgnoreException(),
    "fail": ValueError("no"),
    "fail too": OSError("nor this"),
    "exit": SystemExit(3),
    "give up": taskhawk.StopRetry("enough"),
    "later": taskhawk.RetryException("later"),
    "in 90.5 s": taskhawk.RetryException(delay_seconds=90.5),
    "at once": taskhawk.RetryException(delay_seconds=0),
    "in a month": taskhawk.RetryException(delay_seconds=2_592_000),
    "fail, and say so": taskhawk.LoggingException("no", {"order": 7}),
}
LAMBDA_CALLS = [
    (1, "fail", 2),
    ("exit", 1),
    tuple(LAMBDA_ENDS),
    ("fail", *range(21), "give up"),
    (1, "ignore", 2),
    (),
]
LAMBDA_ENDS["not yet"] = taskhawk.PostponeException(delay_seconds=45)
# A call, its entries where two of five messages fail, and the warning if it is refused.
LAMBDA_WARNINGS = [
    (
        "DeleteMessage",
        3,
        "{} of 3 messages that succeeded may run again: can't delete them: {}",
    ),
    (
        "ChangeMessageVisibility",
        2,
        "can't change when {} of 2 failed messages run again: {}",
    ),
]
LAMBDA_MALFORMED: dict[str, Any] = {
    "null": None,
    "text": "text",
    "empty": {},
    "Sns null": {"Sns": None},
    "Sns empty": {"Sns": {}},
    "Sns of nulls": {"Sns": {"Message": None, "MessageId": None}},
    "Kinesis": {"kinesis": {"data": "e30="}},
    "body null": {"body": None},
    "messageAttributes null": {"messageAttributes": None},
    "messageAttributes of numbers": {"messageAttributes": {"a": 1}},
    "messageAttributes an array": {"messageAttributes": ["a"]},
    "attributes null": {"attributes": None},
    "attributes text": {"attributes": "text"},
    "receive count text": {"attributes": {"ApproximateReceiveCount": "many"}},
    "ARN text": {"eventSourceARN": "text"},
    "ARN a number": {"eventSourceARN": 5},
}
LAMBDA_NO_BODY = "message: expected a string of JSON, got null"


class LambdaTime:
    """Lambda's context: its time passes as the tasks say."""

    def __init__(self, remaining_ms: int) -> None:
        self.remaining_ms = remaining_ms

    def get_remaining_time_in_millis(self) -> int:
        """Return the time until Lambda ends the function."""
        return self.remaining_ms


class TestLambda:
    """An event's failures always raise, or are in the answer."""

    @pytest.mark.parametrize("partial_batch", [False, True])
    @pytest.mark.parametrize("kind", LAMBDA_RECORDS)
    @pytest.mark.parametrize("calls", LAMBDA_CALLS, ids=str)
    def test_failures(self, calls, kind, partial_batch, lambda_sqs, lambda_runs):
        """All are run, and failures are raised; of SQS, what succeeded is deleted before.

        Or they are in the answer, where that is wanted, and Lambda deletes the others. SNS
        has no such answer, nor a delay of ours. Where nothing failed, nothing is called.
        """
        event = lambda_event(*calls, make=LAMBDA_RECORDS[kind])
        answer, errors = lambda_consume(event, partial_batch=partial_batch)
        failing = LAMBDA_ENDS.keys() - {"ignore"}
        failed = [n for n, call in enumerate(calls, 1) if call in failing]
        assert lambda_runs == list(calls)
        if partial_batch and (kind == "SQS" or not failed):
            assert (answer, errors) == (lambda_failures(*failed), [])
        else:
            raised = [LAMBDA_ENDS[calls[n - 1]] for n in failed]
            assert (answer, errors) == (None, raised)
        deletes = kind == "SQS" and failed and not partial_batch
        done = {n for n in range(1, len(calls) + 1) if deletes and n not in failed}
        assert lambda_deleted(lambda_sqs) == sorted(done)
        count = len(lambda_sqs.asked("DeleteMessageBatch"))
        assert count == math.ceil(len(done) / 10)
        url = f"{lambda_sqs.url}/123456789012/TASKHAWK-DEV-MYAPP"
        assert {call.data["QueueUrl"] for call in lambda_sqs.calls} <= {url}
        assert "GetQueueUrl" not in lambda_sqs.actions  # its role may not look it up
        if kind == "SNS" or not failed:
            assert lambda_sqs.calls == []

    @pytest.mark.parametrize("kind", LAMBDA_RECORDS)
    def test_batch_task(self, kind, lambda_sqs, lambda_runs, together):
        """Messages of a batch task run together, up to its number, and fail by themselves."""
        calls = [1, "fail", *range(2, 6), "fail", "later"]
        bodies = [processing_body("shop.index", args=[call]) for call in calls]
        bodies[3:3] = [processing_body("lambda.run", args=["plain"]), "not JSON"]
        make = LAMBDA_RECORDS[kind]
        records = [make(body, f"m{n}") for n, body in enumerate(bodies, 1)]
        _, errors = lambda_consume({"Records": records})
        assert (together, lambda_runs) == ([calls[:5], calls[5:]], ["plain"])
        names = [type(error).__name__ for error in errors]
        assert names == [
            "ValidationError",
            "ValueError",
            "ValueError",
            "RetryException",
        ]
        if kind == "SQS":
            assert sorted(lambda_deleted(lambda_sqs)) == [1, 3, 4, 6, 7, 8]

    def test_batch_task_on_fifo(self, lambda_sqs, together):
        """On FIFO queues they run one by one: none runs before one that failed."""
        event = {"Records": []}
        for n, call in enumerate([1, "fail", 2], 1):
            body = processing_body("shop.index", args=[call])
            record = lambda_sqs_record(body, f"m{n}", MessageGroupId="g")
            record["eventSourceARN"] += ".fifo"
            event["Records"].append(record)
        answer, _ = lambda_consume(event, partial_batch=True)
        assert (together, answer) == ([[1], ["fail"]], lambda_failures(2, 3))

    def test_run_hook(self, lambda_runs):
        """The run hook is told of each run, as in a worker."""
        told: list[Any] = []
        hook = lambda **given: told.append((given["outcome"], given["exception"]))  # noqa: E731
        taskhawk.configure(TASKHAWK_BROKER="sqlite://", TASKHAWK_RUN_HOOK=hook)
        lambda_consume(lambda_event(1, "fail", "ignore"))
        assert told == [
            ("done", None),
            ("retry", LAMBDA_ENDS["fail"]),
            ("ignored", None),
        ]

    def test_embedded_broker(self, lambda_runs):
        """A handler can be tried out on a machine whose broker is the embedded one, without AWS."""
        taskhawk.configure(TASKHAWK_BROKER="sqlite://")
        _, errors = lambda_consume(lambda_event(1, "fail"))
        assert (lambda_runs, errors) == ([1, "fail"], [LAMBDA_ENDS["fail"]])

    def test_record_without_a_queue(self, lambda_sqs, lambda_runs):
        """A record that does not say which queue has it is run; nothing can be deleted."""
        event = lambda_event(1, "fail")
        for record in event["Records"]:
            del record["eventSourceARN"]
        assert lambda_consume(event) == (None, [LAMBDA_ENDS["fail"]])
        assert (lambda_runs, lambda_sqs.calls) == ([1, "fail"], [])

    def test_real_queue(self, ministack, sqs_client, queue_name, lambda_runs):
        """On a real queue the failed message alone is left, or nothing but the answer is."""
        client = sqs_client(ministack)
        url = client.create_queue(QueueName=f"TASKHAWK-{queue_name}")["QueueUrl"]
        names = ["QueueArn", "ApproximateNumberOfMessages"]
        names.append("ApproximateNumberOfMessagesNotVisible")

        def attributes() -> list[str]:
            found = client.get_queue_attributes(QueueUrl=url, AttributeNames=names)
            return [found["Attributes"][name] for name in names]

        sent = lambda_event(1, "fail", 2, "ignore")["Records"]
        for record in sent:
            client.send_message(QueueUrl=url, MessageBody=record["body"])
        received: list[Any] = []
        ask = {"MaxNumberOfMessages": 10, "MessageSystemAttributeNames": ["All"]}
        while len(received) < len(sent):
            answer = client.receive_message(QueueUrl=url, **ask)
            received += answer.get("Messages", [])
        records = [
            {
                "messageId": message["MessageId"],
                "receiptHandle": message["ReceiptHandle"],
                "body": message["Body"],
                "attributes": message["Attributes"],
                "eventSourceARN": attributes()[0],
            }
            for message in received
        ]
        assert attributes()[1:] == ["0", "4"]
        taskhawk.configure(AWS_KEYS, AWS_ENDPOINT_SQS=ministack)
        errors = [LAMBDA_ENDS["fail"]]
        assert lambda_consume({"Records": records}) == (None, errors)
        assert attributes()[1:] == ["0", "1"]
        [failed] = [record for record in records if '"fail"' in record["body"]]
        failed["body"] = processing_body("lambda.run", args=["at once"])
        answer, _ = lambda_consume({"Records": [failed]}, partial_batch=True)
        identifier = {"itemIdentifier": failed["messageId"]}
        assert answer == {"batchItemFailures": [identifier]}
        (again,) = client.receive_message(QueueUrl=url)["Messages"]
        assert again["MessageId"] == failed["messageId"]

    @pytest.mark.usefixtures("lambda_runs")
    @pytest.mark.parametrize("how", ["denied", "refused"])
    @pytest.mark.parametrize("case", LAMBDA_WARNINGS, ids=lambda case: case[0])
    def test_refusals(self, case, how, lambda_sqs, caplog):
        """What the service refuses costs one warning; all else is done, and failures raise."""
        action, entries, warning = case
        answer = refuse(1, code="ReceiptHandleIsInvalid", ours=True)
        count, reason = 1, "no"
        if how == "denied":
            answer, count = fault("AccessDenied", status=403), entries
            reason = LAMBDA_DENIED.format(action)
        lambda_sqs.always(f"{action}Batch", answer)
        event = lambda_event(1, "in 90.5 s", 2, "at once", 3)
        errors = [LAMBDA_ENDS["in 90.5 s"], LAMBDA_ENDS["at once"]]
        assert lambda_consume(event) == (None, errors)
        warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        ours = [text.replace(" (reached max retries: 0)", "") for text in warnings]
        assert ours == [warning.format(count, reason)]
        assert lambda_deleted(lambda_sqs) == [1, 3, 5]
        assert lambda_delays(lambda_sqs) == [
            ("receipt of m2", 91),
            ("receipt of m4", 0),
        ]

    @pytest.mark.parametrize(
        "action", ["DeleteMessageBatch", "ChangeMessageVisibilityBatch"]
    )
    def test_a_passing_fault(self, action, lambda_sqs, lambda_runs, caplog):
        """A call that fails in passing is repeated, as nobody comes after the function to do it."""
        lambda_sqs.script(action, (503, {}, b"{}"))
        assert lambda_consume(lambda_event(1, "at once"))[1] == [LAMBDA_ENDS["at once"]]
        assert lambda_sqs.actions.count(action) == 2
        assert len(lambda_sqs.actions) == 3
        assert [r for r in caplog.records if r.levelname == "WARNING"] == []

    @pytest.mark.parametrize("partial_batch", [False, True])
    def test_delays(self, partial_batch, lambda_sqs, lambda_runs):
        """A retry's delay is set on the queue first, in whole seconds, within SQS's 12 hours.

        Lambda's longest run (900 s) and longest wait for a batch (300 s) may be over then.
        """
        policy = taskhawk.fixed(7, jitter=False)
        taskhawk.task(name="lambda.policy", retry=policy)(raising(KeyError()))
        event = lambda_event("in 90.5 s", 1, "later", "fail", "at once", "in a month")
        event["Records"].append(
            lambda_sqs_record(processing_body("lambda.policy"), "m7")
        )
        lambda_consume(event, partial_batch=partial_batch)
        assert lambda_delays(lambda_sqs) == [
            ("receipt of m1", 91),
            ("receipt of m5", 0),
            ("receipt of m6", 42_000),
            ("receipt of m7", 7),
        ]
        deletes = [] if partial_batch else ["DeleteMessageBatch"]
        assert lambda_sqs.actions == ["ChangeMessageVisibilityBatch", *deletes]

    @pytest.mark.parametrize("partial_batch", [False, True])
    @pytest.mark.parametrize("answer", [None, fault("AccessDenied", status=403)])
    def test_postponed(self, answer, partial_batch, lambda_sqs, lambda_runs, caplog):
        """A copy is sent of what is postponed, and then it is done.

        Where the function may not send, the message failed, and is visible in time.
        """
        lambda_sqs.always("SendMessage", answer)
        event = lambda_event(1, "not yet", make=lambda_sqs_record)
        found = lambda_consume(event, partial_batch=partial_batch)
        [copy] = lambda_sqs.asked("SendMessage")
        assert copy["MessageBody"] == event["Records"][1]["body"]
        assert copy["DelaySeconds"] == 45
        if answer is None:
            assert found == (lambda_failures() if partial_batch else None, [])
            assert lambda_sqs.actions == ["SendMessage"]
            return
        assert lambda_delays(lambda_sqs) == [("receipt of m2", 45)]
        if partial_batch:
            assert found == (lambda_failures(2), [])
        else:
            assert found == (None, [LAMBDA_ENDS["not yet"]])
        text = "TASKHAWK-DEV-MYAPP: lambda.run ID (message m2) can't be postponed and"
        assert f"{text} is left to the queue: " in caplog.text.replace(
            PROCESSING_ID, "ID"
        )

    def test_attributes_of_a_copy(self, lambda_sqs, lambda_runs):
        """A copy has the message's attributes as they were sent, in the form SQS takes."""
        event = lambda_event("not yet", make=lambda_sqs_record)
        given = event["Records"][0]["messageAttributes"]
        given["image"] = {"binaryValue": "AP8=", "dataType": "Binary"}
        given["hostile"] = {"binaryValue": 7, "dataType": "Binary"}
        received = taskhawk._from_record(event["Records"][0])
        assert received.message_attributes == {
            "request_id": {"StringValue": "1234", "DataType": "String"},
            "image": {"BinaryValue": b"\x00\xff", "DataType": "Binary"},
            "hostile": {"BinaryValue": 7, "DataType": "Binary"},
        }
        del given["hostile"]
        lambda_consume(event)
        [copy] = lambda_sqs.asked("SendMessage")
        assert copy["MessageAttributes"] == {
            "request_id": {"StringValue": "1234", "DataType": "String"},
            "image": {"BinaryValue": "AP8=", "DataType": "Binary"},
            "taskhawk.postponed": {"StringValue": "1", "DataType": "String"},
        }

    def test_postponed_of_a_topic(self, lambda_sqs, lambda_runs):
        """No copy can take the place of a message of a topic: Lambda retries it."""
        event = lambda_event("not yet", make=lambda_sns_record)
        assert lambda_consume(event) == (None, [LAMBDA_ENDS["not yet"]])
        assert lambda_sqs.calls == []

    @pytest.mark.parametrize("kind", LAMBDA_RECORDS)
    def test_log(self, kind, lambda_sqs, lambda_runs, caplog):
        """The log does not say when or whether a failed message runs again: Lambda decides."""
        caplog.set_level(logging.INFO)
        calls = ("in 90.5 s", "give up", "later")
        event = lambda_event(*calls, make=LAMBDA_RECORDS[kind])
        lambda_consume(event)

        class Bad(taskhawk.ValidationError):
            """An error of this test alone: one in ten seconds of each class is logged."""

        hook = raising(Bad("wrong"))
        taskhawk.configure(AWS_KEYS, TASKHAWK_PRE_PROCESS_HOOK=hook)
        lambda_consume({"Records": [LAMBDA_RECORDS[kind]("{", "m4\n")]})
        name = f"lambda.run {PROCESSING_ID} (message"
        assert caplog.messages == [
            f"{name} m1): attempt 1 asked to be retried and is left to Lambda",
            f"{name} m2): attempt 1 failed and is left to Lambda",
            f"{name} m3): attempt 1 asked to be retried and is left to Lambda: later",
            "message m4? is left to Lambda: wrong",
        ]

    @pytest.mark.parametrize("kind", LAMBDA_RECORDS)
    def test_metadata(self, kind, lambda_sqs):
        """A task is told of its run, and may hold its message: at once, nothing is looked up.

        Behind SNS it has no queue and no receipt.
        """
        seen: list[Any] = []

        @taskhawk.task(name="lambda.told")
        def told(metadata: taskhawk.Metadata) -> None:
            metadata.extend_visibility_timeout(600)
            seen.append((metadata, metadata.headers, metadata.queue, metadata.attempt))
            seen.extend((call.action, call.data) for call in lambda_sqs.calls)

        body = processing_body("lambda.told", headers={"request_id": "1234"})
        record = LAMBDA_RECORDS[kind](body, "m1")
        if kind == "SQS":
            record["attributes"]["ApproximateReceiveCount"] = "3"
        taskhawk.process_messages_for_lambda_consumer({"Records": [record]})
        metadata = {
            "id": PROCESSING_ID,
            "priority": Priority.high,
            "receipt": "receipt of m1" if kind == "SQS" else None,
            "timestamp": 1460868253255,
            "version": "1.0",
        }
        where = ("TASKHAWK-DEV-MYAPP", 3) if kind == "SQS" else (None, 1)
        assert seen[0] == (metadata, {"request_id": "1234"}, *where)
        assert not seen[0][0].lease_lost
        url = f"{lambda_sqs.url}/123456789012/TASKHAWK-DEV-MYAPP"
        entry = {"Id": "0", "ReceiptHandle": "receipt of m1", "VisibilityTimeout": 600}
        call = ("ChangeMessageVisibilityBatch", {"QueueUrl": url, "Entries": [entry]})
        assert seen[1:] == ([call] if kind == "SQS" else [])

    def test_hooks_of_sqs_events(self, lambda_sqs, lambda_runs):
        """For an SQS event the hooks get what they get in a worker, shaped like boto3's message."""
        seen: list[Any] = []

        def delete(sqs_queue_message: QueueMessage, **_: Any) -> None:
            sqs_queue_message.delete()

        taskhawk.configure(
            AWS_KEYS,
            AWS_ENDPOINT_SQS=lambda_sqs.url,
            TASKHAWK_PRE_PROCESS_HOOK=lambda **given: seen.append(given),
            TASKHAWK_POST_PROCESS_HOOK=delete,
        )
        taskhawk.process_messages_for_lambda_consumer(lambda_event(1))
        (given,) = seen
        message = given.pop("sqs_queue_message")
        assert given == {"queue_name": "TASKHAWK-DEV-MYAPP"}
        assert message.body == processing_body("lambda.run", args=[1])
        assert (message.message_id, message.receipt_handle) == ("m1", "receipt of m1")
        assert message.attributes == lambda_sqs_record("", "m1")["attributes"]
        attribute = message.message_attributes["request_id"]
        assert (attribute["StringValue"], attribute["DataType"]) == ("1234", "String")
        assert lambda_deleted(lambda_sqs) == [1]

    def test_queues_of_two_accounts(self, lambda_sqs, lambda_runs):
        """A queue is its account's: another account's of the same name is another queue."""
        urls = []
        for account in ("123456789012", "210987654321"):
            event = lambda_event(1, "fail")
            for record in event["Records"]:
                record["eventSourceARN"] = LAMBDA_ARN.replace("123456789012", account)
            lambda_consume(event)
            urls.append(f"{lambda_sqs.url}/{account}/TASKHAWK-DEV-MYAPP")
        deletes = lambda_sqs.asked("DeleteMessageBatch")
        assert [delete["QueueUrl"] for delete in deletes] == urls

    def test_queue_url_of_aws(self, lambda_runs):
        """Without an endpoint of one's own, the queue's URL is the one that AWS has."""
        urls: list[str] = []

        def look(sqs_queue_message: QueueMessage, **_: Any) -> None:
            urls.append(sqs_queue_message.queue_url)

        taskhawk.configure(AWS_KEYS, TASKHAWK_PRE_PROCESS_HOOK=look)
        taskhawk.process_messages_for_lambda_consumer(lambda_event(1))
        url = "https://sqs.us-east-1.amazonaws.com/123456789012/TASKHAWK-DEV-MYAPP"
        assert urls == [url]

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
    def test_records_of_another_type(self, kind, memory, lambda_runs):
        """An event and its records may be any mappings, such as a library's read-only ones."""
        event = lambda_event(1, 2, make=LAMBDA_RECORDS[kind])
        records = [types.MappingProxyType(record) for record in event["Records"]]
        event = types.MappingProxyType({"Records": records})
        taskhawk.process_messages_for_lambda_consumer(event)
        assert lambda_runs == [1, 2]

    @pytest.mark.parametrize("case", LAMBDA_MALFORMED)
    def test_malformed_records(self, case, memory, lambda_runs):
        """A record that is none fails as an invalid message does, and does not stop the others."""
        event = lambda_event(1, "bad", 2)
        malformed = LAMBDA_MALFORMED[case]
        if isinstance(malformed, dict) and malformed.keys() & {*event["Records"][1]}:
            malformed = {**event["Records"][1], **malformed}
        event["Records"][1] = malformed
        _, [error] = lambda_consume(event)
        assert (type(error), str(error)) == (taskhawk.ValidationError, LAMBDA_NO_BODY)
        assert lambda_runs == [1, 2]

    @pytest.mark.parametrize("kind", LAMBDA_RECORDS)
    @pytest.mark.parametrize("case", PROCESSING_INVALID)
    def test_invalid_messages(self, case, kind, memory, lambda_runs):
        """An invalid message, or one for an unknown task, fails and does not stop the others."""
        body, wrong = PROCESSING_INVALID[case]
        event = lambda_event(1, 2, make=LAMBDA_RECORDS[kind])
        event["Records"].insert(1, LAMBDA_RECORDS[kind](body, "bad"))
        _, [error] = lambda_consume(event)
        assert isinstance(error, taskhawk.ValidationError)
        assert (str(error), lambda_runs) == (wrong, [1, 2])

    @pytest.mark.parametrize(
        "event", [None, [], "text", {}, {"Records": None}, {"Records": {}}]
    )
    def test_malformed_events(self, event):
        """What is no event with records raises, lest its messages be taken for processed."""
        _, [error] = lambda_consume(event)
        assert isinstance(error, taskhawk.ValidationError)
        sentence = "Records: expected an array of SNS or SQS records, got none"
        assert str(error) == sentence

    @pytest.mark.parametrize("partial_batch", [False, True])
    @pytest.mark.parametrize("kind", LAMBDA_RECORDS)
    def test_time_budget(self, kind, partial_batch, lambda_sqs):
        """With Lambda's context nothing is started in the last tenth of the time that was left."""
        context = LambdaTime(10_000)
        runs: list[int] = []

        @taskhawk.task(name="lambda.run")
        def run(takes_ms: int) -> None:
            runs.append(takes_ms)
            context.remaining_ms -= takes_ms

        event = lambda_event(4_000, 4_900, 101, 1, 1, make=LAMBDA_RECORDS[kind])
        options = {"context": context, "partial_batch": partial_batch}
        answer, errors = lambda_consume(event, **options)
        assert runs == [4_000, 4_900, 101]
        of_queue = kind == "SQS"
        deletes = of_queue and not partial_batch
        assert lambda_deleted(lambda_sqs) == ([1, 2, 3] if deletes else [])
        if of_queue and partial_batch:
            assert (answer, errors) == (lambda_failures(4, 5), [])
            return
        assert [(type(error), str(error)) for error in errors] == [
            (taskhawk.TaskhawkError, f"message m{n} was not started: no time was left")
            for n in (4, 5)
        ]

    @pytest.mark.parametrize("partial_batch", [False, True])
    @pytest.mark.parametrize("first", ["fail", "in 90.5 s", None])
    def test_fifo_groups(self, first, partial_batch, lambda_sqs, lambda_runs):
        """Nothing of a FIFO group runs after its first failure; the rest counts as failed."""
        event = lambda_event(1, first, 2, 3, 4)
        for record, group in zip(event["Records"], "aabab", strict=True):
            record["attributes"]["MessageGroupId"] = group
            record["eventSourceARN"] = f"{LAMBDA_ARN}.fifo"
        if first is None:
            event["Records"][1]["body"] = "{"  # what can't be run is a failure too
        answer, errors = lambda_consume(event, partial_batch=partial_batch)
        assert lambda_runs == [1, *filter(None, [first]), 2, 4]
        if partial_batch:
            assert (answer, lambda_deleted(lambda_sqs)) == (lambda_failures(2, 4), [])
            return
        assert lambda_deleted(lambda_sqs) == [1, 3, 5]
        text = "message m4 was not started: an earlier one of its group failed"
        assert (len(errors), type(errors[1])) == (2, taskhawk.TaskhawkError)
        assert str(errors[1]) == text

    def test_groups_of_standard_queues(self, lambda_sqs, lambda_runs):
        """On a standard queue a group is for fairness, and a failure does not stop it."""
        event = lambda_event("fail", 1)
        for record in event["Records"]:
            record["attributes"]["MessageGroupId"] = "a"
        lambda_consume(event)
        assert lambda_runs == ["fail", 1]

    def test_keyboard_interrupt(self, lambda_sqs, lambda_runs, monkeypatch):
        """KeyboardInterrupt ends the handler: no run follows."""
        monkeypatch.setitem(LAMBDA_ENDS, "interrupt", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            lambda_consume(lambda_event(1, "interrupt", 2))
        assert lambda_runs == [1, "interrupt"]


# === PART V: STATE ====================================================================


# --- 20. claims -----------------------------------------------------------------------

CLAIMS_TABLE = "taskhawk-claims"
NO_TABLE = (
    "TASKHAWK_CLAIMS_TABLE is not set: on SQS, once, unique and limit need a DynamoDB"
    " table: set its name, such as 'taskhawk-claims', and run python -m taskhawk provision"
)


def make_claims_table(client: Any) -> None:
    """Make the table as `provision` does, unless it exists."""
    with contextlib.suppress(client.exceptions.ResourceInUseException):
        client.create_table(
            TableName=CLAIMS_TABLE,
            KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
            BillingMode="PAY_PER_REQUEST",
        )


@pytest.fixture(params=["ministack", MOTO, "sqlite"])
def claims(
    request: pytest.FixtureRequest,
    sqs_client: Callable[..., Any],
    queue_name: str,
    tmp_path: Path,
) -> tuple[Any, Clock]:
    """Return claims in each kind of place, and the clock that they go by."""
    clock = Clock()
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/queue.db"
        return taskhawk._SqliteClaims(taskhawk.SqliteBroker(url, clock)), clock
    endpoint = request.getfixturevalue(request.param)
    make_claims_table(sqs_client(endpoint, "dynamodb"))
    configure_aws(endpoint, queue_name)
    return taskhawk._DynamoClaims(f"dynamodb:{CLAIMS_TABLE}", clock), clock


@pytest.fixture
def key() -> str:
    """Return the key of a claim that no other test uses."""
    return f"test:{uuid.uuid4().hex}"


class TestClaims:
    """One holder at a time, until it releases, or until its time is over."""

    def test_held(self, claims, key):
        """Who has a claim has it alone, until it is released; other keys are others."""
        store, _ = claims
        first = store.claim(key, 60)
        assert first.token
        assert not first.is_done
        assert store.claim(key, 60) == taskhawk._Claim()
        assert store.claim(f"{key}2", 60).token
        store.release(key, first.token)
        store.release(key, first.token)  # it makes no difference
        assert store.claim(key, 60).token

    def test_void(self, claims, key):
        """A claim ends by itself, and whoever had it can't release it for the next."""
        store, clock = claims
        dead = store.claim(key, 60)
        clock.now += 60
        assert not store.claim(key, 60).token
        clock.now += 0.1
        assert store.claim(key, 60).token
        store.release(key, dead.token)
        assert not store.claim(key, 60).token

    @pytest.mark.parametrize("after_s", [1, 61])
    def test_done(self, claims, key, after_s):
        """What is finished is done for as long as it is kept, and then forgotten.

        So it is if it was finished after its time: the run has been.
        """
        store, clock = claims
        first = store.claim(key, 60)
        clock.now += after_s
        store.finish(key, first.token, 100)
        clock.now += 99
        assert store.claim(key, 60) == taskhawk._Claim(is_done=True)
        store.release(key, first.token)
        clock.now += 3  # DynamoDB keeps whole seconds
        assert store.claim(key, 60).token

    def test_extend(self, claims, key):
        """A claim can be extended for as long as it is ours."""
        store, clock = claims
        first = store.claim(key, 60)
        clock.now += 59
        assert store.extend(key, first.token, 60)
        clock.now += 59
        assert not store.claim(key, 60).token
        clock.now += 2
        assert store.claim(key, 60).token
        assert not store.extend(key, first.token, 60)

    def test_look(self, claims, key):
        """Whether a key is done can be told without a claim; what is over is not done."""
        store, clock = claims
        assert not store.is_done(key)
        store.finish(key, "0-", 60)
        assert store.is_done(key)
        store.finish(key, "0-", -2)
        assert not store.is_done(key)
        clock.now += 0.001
        assert store.claim(key, 60).token

    def test_finished_behind_the_next(self, claims, key):
        """A run that outlived its claim is done all the same, whatever the next one does."""
        store, clock = claims
        slow = store.claim(key, 60)
        clock.now += 61
        quick = store.claim(key, 60)
        store.finish(key, slow.token, 1000)
        store.release(key, quick.token)
        assert store.claim(key, 60) == taskhawk._Claim(is_done=True)

    @pytest.mark.parametrize("most", [2, 7])
    def test_places(self, claims, key, most):
        """There are as many places as are asked for; a free one is found."""
        store, clock = claims
        taken = [store.claim(key, 60, most).token for _ in range(most)]
        assert len({*taken, ""}) == most + 1
        assert store.claim(key, 60, most) == taskhawk._Claim()
        store.release(key, taken[1])
        assert store.claim(key, 120, most).token
        assert store.claim(key, 60, most) == taskhawk._Claim()
        clock.now += 61  # one of them is left
        again = [store.claim(key, 60, most).token for _ in range(most)]
        assert (all(again[:-1]), again[-1]) == (True, "")

    @pytest.mark.parametrize(
        ("second", "starts"),
        [
            (("m2", 900, 1500), False),
            (("m2", 999, 1500), False),
            (("m2", 1000, 1500), True),  # equal times say nothing: nothing is lost
            (("m2", 1001, 1500), True),
            (("m1", 900, 1000), True),  # its own retry
        ],
    )
    def test_start(self, claims, key, second, starts):
        """A message starts, unless another's run started after it was sent."""
        store, clock = claims
        assert store.start(key, "m1", 900, 1000)
        clock.now += 13 * 86_400
        assert store.start(key, *second) is starts
        assert store.start(key, "m3", 1500, 1600)
        assert not store.start(key, "m1", 900, 1000)  # by now m3 stands for it
        clock.now += 14 * 86_400 + 2
        assert store.start(key, "m1", 900, 1000)  # no queue has kept it for so long

    @pytest.mark.parametrize("claims", ["ministack", "sqlite"], indirect=True)
    def test_race(self, claims, key):
        """However many ask at once, no more get a place than there are.

        moto is left out, whose conditional writes are not atomic.
        """
        store, _ = claims
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(store.claim, key, 60, 3) for _ in range(16)]
        tokens = [each.result().token for each in asked]
        assert 1 <= len([*filter(None, tokens)]) <= 3
        while store.claim(key, 60, 3).token:
            tokens.append("one more")
        assert len([*filter(None, tokens)]) == 3

    def test_layout(self, ministack, sqs_client, key):
        """An item has Powertools' attributes, and an end by which DynamoDB deletes it."""
        client = sqs_client(ministack, "dynamodb")
        make_claims_table(client)
        configure_aws(ministack)
        store = taskhawk._DynamoClaims(f"dynamodb:{CLAIMS_TABLE}", Clock(1000.5))

        def item() -> dict[str, Any]:
            found = client.get_item(TableName=CLAIMS_TABLE, Key={"id": {"S": key}})
            return found["Item"]

        claim = store.claim(key, 60)
        owner = claim.token.removeprefix("0-")
        assert item() == {
            "id": {"S": key},
            "status": {"S": "INPROGRESS"},
            "in_progress_expiration": {"N": "1060500"},
            "expiration": {"N": "87461"},
            "owner_0": {"S": owner},
        }
        store.finish(key, claim.token, 3600)
        assert item() == {
            "id": {"S": key},
            "status": {"S": "COMPLETED"},
            "expiration": {"N": "4601"},
        }

    def test_lost_answer(self, ministack, sqs_client, key):
        """A claim whose answer was lost is ours all the same, as botocore repeats it."""
        make_claims_table(sqs_client(ministack, "dynamodb"))
        with ScriptedAws(ministack).running("app") as aws:
            store = taskhawk._DynamoClaims(f"dynamodb:{CLAIMS_TABLE}")

            def lose(call: AwsCall) -> AwsAnswer:
                passed(call)
                return DROPPED

            aws.script("UpdateItem", lose)
            assert store.claim(key, 60).token
            assert aws.actions == ["UpdateItem", "UpdateItem"]
            assert not store.claim(key, 60).token

    def test_others_are_quicker(self, aws, key):
        """Who finds that a free place has just been taken tries another, three times."""
        error = {"__type": "ConditionalCheckFailedException", "message": "no"}
        body = json.dumps({**error, "Item": {"status": {"S": "INPROGRESS"}}}).encode()
        aws.always("UpdateItem", (400, {}, body))
        store = taskhawk._DynamoClaims(f"dynamodb:{CLAIMS_TABLE}")
        assert store.claim(key, 60, 5) == taskhawk._Claim()
        assert aws.actions == ["UpdateItem"] * 3

    @pytest.mark.parametrize(
        ("answer", "sentence"),
        [
            (
                fault("ResourceNotFoundException", "Requested resource not found"),
                (
                    "taskhawk-claims: there is no such table: run python -m taskhawk"
                    " provision, or check TASKHAWK_CLAIMS_TABLE and AWS_REGION"
                    " (ResourceNotFoundException: Requested resource not found)"
                ),
            ),
            (
                fault("AccessDeniedException"),
                f"taskhawk-claims: {DENIED.format('UpdateItem')} (AccessDeniedException: no)",
            ),
        ],
    )
    def test_refused(self, aws, key, answer, sentence):
        """What only a person can mend is said in a sentence, with the remedy."""
        aws.always("UpdateItem", answer)
        store = taskhawk._DynamoClaims(f"dynamodb:{CLAIMS_TABLE}")
        for call in (store.claim, store.release, store.finish):
            args = (key, "0-x", 60)[: 3 - (call == store.release)]
            args = (key, 60) if call == store.claim else args
            assert refused(call, *args) == sentence

    def test_which(self, sqlite):
        """Claims are in the file on SQLite, and in the table that is set on SQS."""
        assert isinstance(taskhawk._find_claims(), taskhawk._SqliteClaims)
        taskhawk.configure(AWS_KEYS)
        assert refused(taskhawk._find_claims) == NO_TABLE
        taskhawk.configure(AWS_KEYS, TASKHAWK_CLAIMS_TABLE=CLAIMS_TABLE)
        store = taskhawk._find_claims()
        assert isinstance(store, taskhawk._DynamoClaims)
        assert taskhawk._find_claims() is store

    def test_file(self, tmp_path, key):
        """Claims are the file's: other processes see them, and they go with it."""
        path, clock = tmp_path / "queue.db", Clock()
        one, two = (
            taskhawk._SqliteClaims(taskhawk.SqliteBroker(f"sqlite:///{path}", clock))
            for _ in range(2)
        )
        assert one.claim(key, 60).token
        assert not two.claim(key, 60).token
        clock.now += 61
        assert two.claim(f"{key}2", 60).token
        assert sqlite_execute(path, "SELECT key FROM claim") == [(f"{key}2",)]
        for name in tmp_path.iterdir():
            name.unlink()
        assert one.claim(key, 60).token


# --- 21. once, unique, limits ---------------------------------------------------------

#: Options of a task `stock(item, shop="A", metadata=None, **more)`, and why they are refused.
STATE_OPTIONS: list[tuple[dict[str, Any], str]] = [
    (
        {"once": 5},
        "once: expected True or a tuple of names of arguments, such as ('order_id',), got 5",
    ),
    (
        {"once": "item"},
        (
            "once: expected True or a tuple of names of arguments, such as ('order_id',),"
            " got 'item'"
        ),
    ),
    (
        {"unique": ()},
        (
            "unique: expected True or a tuple of names of arguments, such as ('order_id',),"
            " got ()"
        ),
    ),
    ({"unique": ("item", "size")}, "unique: the function has no argument 'size'"),
    ({"unique": ("metadata",)}, "unique: the function has no argument 'metadata'"),
    ({"once": ("more",)}, "once: the function has no argument 'more'"),
    ({"keep_s": 60}, "keep_s: expected once= as well"),
    (
        {"once": True, "keep_s": 0},
        "keep_s: expected a number of seconds above 0, got 0",
    ),
    ({"limit": 5}, "limit: expected taskhawk.limit(…), got 5"),
    (
        {"limit": taskhawk.limit(1, per=("size",)), "time_limit": 5},
        "limit: the function has no argument 'size'",
    ),
    (
        {"limit": taskhawk.limit(1)},
        (
            "limit: expected time_limit= as well: after it, the place of a worker that died is"
            " free again"
        ),
    ),
]
#: Where a worker dies, and how often the work is done then.
ONCE_CRASHES = [
    ("before claim", 1),
    ("after claim", 1),
    ("before work", 1),
    ("after work", 2),
    ("before finish", 2),
    ("after finish", 1),
    ("before delete", 1),
    ("after delete", 1),
]
EVERY_ARGUMENT: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((7,), {}),
    ((7, "A"), {}),
    ((), {"item": 7}),
    ((), {"shop": "A", "item": 7}),
    ((7,), {"shop": "A"}),
]


@pytest.fixture(params=["sqlite", "ministack"])
def state(
    request: pytest.FixtureRequest, sqs_client: Callable[..., Any], queue_name: str
) -> Any:
    """Return a broker that has claims, which taskhawk is configured to use."""
    if request.param == "sqlite":
        taskhawk.configure(TASKHAWK_BROKER="sqlite://", TASKHAWK_QUEUE=queue_name)
    else:
        endpoint = request.getfixturevalue(request.param)
        make_queues(sqs_client(endpoint), queue_name)
        make_claims_table(sqs_client(endpoint, "dynamodb"))
        configure_aws(endpoint, queue_name, TASKHAWK_CLAIMS_TABLE=CLAIMS_TABLE)
    return taskhawk._brokers.broker()


@pytest.fixture
def stored(isolated) -> tuple[Any, Clock]:
    """Return the embedded broker in memory, and the clock that it and its claims go by."""
    taskhawk.configure(TASKHAWK_BROKER="sqlite://")
    broker = taskhawk._brokers.broker()
    broker._clock = clock = Clock()
    return broker, clock


def until_visible(broker: Any, clock: Clock) -> None:
    """Let time pass until a message is visible."""
    [[visible_ms]] = broker._file.read("SELECT min(visible_ms) FROM message", ())
    clock.now = max(clock.now, visible_ms / 1000)


def work_all(broker: Any) -> taskhawk.Ledger:
    """Run all that is visible, one after another."""
    total = taskhawk.Ledger()
    while not total.balanced or broker.depth(broker.destination(Priority.default))[0]:
        for name, count in dataclasses.asdict(work_once(broker)).items():
            setattr(total, name, getattr(total, name) + count)
    return total


class FaultyClaims:
    """Claims that a test lets fail: faults[name] is called in place of the method.

    It gets the real call, as WorkerBroker's faults do.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **faults: Any) -> None:
        self.find, self.faults = taskhawk._find_claims, faults
        self.calls: list[str] = []
        monkeypatch.setattr(taskhawk, "_find_claims", lambda: self)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a method that notes its call."""

        def call(*args: Any) -> Any:
            self.calls.append(name)
            real = functools.partial(getattr(self.find(), name), *args)
            return self.faults[name](real, *args) if name in self.faults else real()

        return call


LIMITS_MODULE = """
import time, taskhawk

taskhawk._FIRST_WAIT_S = taskhawk._LONGEST_WAIT_S = 1

def note(*words):
    with open("notes", "a") as file:
        print(*words, time.time(), file=file)

@taskhawk.task(limit=taskhawk.limit(1), time_limit=3)
def bill(name, metadata=None):
    note("begin", name)
    if metadata.attempt == 1 and name == "first":
        time.sleep(60)
    note("end", name)
"""


def plain_bill(name: str) -> None:
    """Be dispatched; the worker has the task."""


class TestOptionsOfState:
    """Options are checked where a task is declared, and cost nothing where there are none."""

    @pytest.mark.parametrize(("options", "sentence"), STATE_OPTIONS)
    def test_refused(self, options, sentence):
        """A wrong option is refused in one sentence."""

        def stock(
            item: int, shop: str = "A", metadata: Any = None, **more: Any
        ) -> None:
            """Do nothing."""

        declare = taskhawk.task(name="shop.stock", **options)
        assert refused(declare, stock) == f"shop.stock: {sentence}"
        assert "shop.stock" not in taskhawk._registry

    @pytest.mark.parametrize(
        ("call", "sentence"),
        [
            (((0,), {}), "most: expected 1 to 1000 runs, got 0"),
            (((1001,), {}), "most: expected 1 to 1000 runs, got 1001"),
            (((True,), {}), "most: expected 1 to 1000 runs, got True"),
            (
                ((1,), {"per": "customer"}),
                (
                    "per: expected a tuple of names of arguments, such as ('order_id',), got"
                    " 'customer'"
                ),
            ),
            (
                ((1,), {"every_s": 0}),
                "every_s: expected a number of seconds above 0, got 0",
            ),
        ],
    )
    def test_limit_refused(self, call, sentence):
        """A limit that makes no sense is refused where it is written."""
        args, kwargs = call
        assert refused(taskhawk.limit, *args, **kwargs) == f"limit: {sentence}"

    def test_switched_off(self, stored):
        """False is as good as leaving an option out."""
        broker, _ = stored
        runs: list[int] = []
        off: dict[str, Any] = {"once": False, "unique": False}
        index = taskhawk.task(name="shop.index", **off)(runs.append)
        for _ in range(2):
            index.dispatch(7)
        work_all(broker)
        assert runs == [7, 7]

    @pytest.mark.parametrize("lambda_app", [False, True])
    def test_no_table(self, aws, lambda_app):
        """A worker, or a Lambda function, without the table ends before it runs anything.

        Who only dispatches needs none.
        """
        job = taskhawk.task(name="mail.send", once=True)(nothing)
        job.dispatch()
        if lambda_app:
            event = lambda_event(make=lambda_sqs_record)
            process = taskhawk.process_messages_for_lambda_consumer
            assert refused(process, event) == NO_TABLE
        else:
            listen = taskhawk.listen_for_messages
            assert refused(listen, Priority.default) == NO_TABLE
        assert aws.actions == ["GetQueueUrl", "SendMessage"]

    def test_memory(self, isolated):
        """The memory of a worker can't have the claims of another process."""
        taskhawk.configure(TASKHAWK_BROKER="sqlite://?max_receive_count=3")
        options = {"limit": taskhawk.limit(1), "time_limit": 5}
        taskhawk.task(name="mail.send", **options)(nothing)
        assert refused(taskhawk.listen_for_messages, Priority.default) == (
            "mail.send: sqlite:// is the memory of one process, where the claims of an"
            " isolated task can't be: use a file, such as sqlite:///queue.db"
        )

    def test_sync(self, sync):
        """In sync mode there is nobody else: nothing is claimed, and all is run."""
        runs: list[int] = []
        options = {"once": ("item",), "unique": True, "limit": taskhawk.limit(1)}
        job = taskhawk.task(name="mail.send", time_limit=5, **options)

        def run(item: int) -> None:
            runs.append(item)

        job = job(run)
        job.dispatch(7)
        job.dispatch(7)
        assert runs == [7, 7]

    @pytest.mark.parametrize(
        ("options", "actions"),
        [
            ({}, []),
            ({"once": True}, ["UpdateItem"] * 2),
            ({"unique": True}, ["UpdateItem"]),
            ({"limit": taskhawk.limit(3), "time_limit": 9}, ["UpdateItem"] * 2),
            ({"limit": taskhawk.limit(3, every_s=9)}, ["UpdateItem"]),
        ],
    )
    def test_requests(self, aws, options, actions):
        """A run makes a request to begin a claim and one to end it; without options none."""
        table = {"TASKHAWK_CLAIMS_TABLE": CLAIMS_TABLE}
        taskhawk.configure({**taskhawk.settings.given, **table})
        taskhawk.task(name="mail.send", **options)(nothing)
        attributes = {
            "SentTimestamp": "1000",
            "ApproximateFirstReceiveTimestamp": "2000",
        }
        received = QueueMessage(processing_body(), "m1", "r1", attributes, queue="Q")
        assert taskhawk.process(received) == Outcome(Fate.acknowledge)
        assert aws.actions == actions

    @pytest.mark.parametrize("option", ["once", "unique", "limit"])
    @pytest.mark.parametrize(
        ("error", "level", "text"),
        [
            (OSError("no route"), "WARNING", "no route"),
            (WorkerDenied("not allowed"), "ERROR", "not allowed"),
        ],
    )
    def test_claim_fails(self, stored, monkeypatch, caplog, option, error, level, text):  # noqa: PLR0917
        """A message never runs without its claim: it is postponed, and the log says so once."""
        broker, clock = stored
        caplog.set_level(logging.INFO)
        runs: list[int] = []
        value = taskhawk.limit(1, every_s=1) if option == "limit" else ("item",)
        job = taskhawk.task(name="shop.index", **{option: value})

        def index(item: int) -> None:
            runs.append(item)

        job(index).dispatch(7)
        fault = worker_first(3, worker_raise(error))
        faulty = FaultyClaims(monkeypatch, claim=fault, start=fault)
        for _ in range(3):
            assert work_once(broker) == taskhawk.Ledger(received=1, postponed=1)
            [delayed] = broker._file.read("SELECT visible_ms FROM message", ())
            assert 30 <= delayed[0] / 1000 - clock.now <= 60
            clock.now += 60
        assert work_once(broker).acked == 1
        claims = [name for name in faulty.calls if name != "is_done"]
        assert (runs, len(claims)) == ([7], 5 if option == "once" else 4)
        said = [r for r in caplog.records if "claim" in r.getMessage()]
        assert [(r.levelname, r.getMessage()) for r in said] == [
            (level, f"claims: can't claim, goes on trying: {text}"),
            ("INFO", "claims: can claim again; tries that failed: 3"),
        ]


class TestOnce:
    """A message, or a call with these arguments, is run to its end once."""

    @pytest.mark.parametrize("case", [(True, [1, 2]), (("item",), [1])])
    def test_duplicates(self, state, case):
        """Duplicates are acknowledged and ignored, with the message's id as the key or not."""
        once, expected = case
        runs: list[Any] = []

        def index(item: int, number: int) -> None:
            runs.append(number)

        job = taskhawk.task(name="shop.index", once=once)(index)
        for number in (1, 2):
            message = Message.new(job.name, [7], {"number": number})
            for _ in range(2):  # SQS delivers it twice
                taskhawk.publish(message)
        assert work_all(state) == taskhawk.Ledger(received=4, acked=4)
        assert sorted(runs) == expected

    @pytest.mark.parametrize("call", EVERY_ARGUMENT)
    def test_key(self, stored, call):
        """However a call is written, it has one key; other values have others."""
        broker, _ = stored
        runs: list[Any] = []

        def stock(
            item: int, shop: str = "A", headers: Any = None, *, by: Any = ABSENT
        ) -> None:
            runs.append((item, shop))

        args, kwargs = call
        job = taskhawk.task(name="shop.stock", once=("shop", "item", "by"))(stock)
        for other in ((7,), (8,), (7, "B")):
            job.with_headers(number=1).dispatch(*other)
        job.dispatch(*args, **kwargs)
        work_all(broker)
        assert runs == [(7, "A"), (8, "A"), (7, "B")]

    def test_keys_of_services(self, stored):
        """Tasks of the same name in other services, and other tasks, have their own keys."""
        keys = set()
        for queue in ("one", "two"):
            taskhawk.configure(TASKHAWK_QUEUE=queue)
            for name in ("a", "b"):
                job = taskhawk.task(name=f"{queue}.{name}")(nothing)
                job.name = name
                keys |= {taskhawk._key(job, kind, {}) for kind in ("once", "unique")}
        assert len(keys) == 8
        assert all(re.fullmatch("(once|unique):[0-9a-f]{64}", key) for key in keys)

    @pytest.mark.parametrize(
        ("fails", "runs"),
        [("nothing", 1), ("task", 2), ("post hook", 2), ("finish", 1)],
    )
    def test_failures(self, stored, monkeypatch, caplog, fails, runs):
        """A failed run may run again, one whose commit failed too; a done one may not.

        Where the claim can't be told, the run has been, and the message is done with.
        """
        broker, clock = stored
        seen: list[int] = []
        first = worker_first(1, worker_raise(OSError("no route")))

        def run() -> None:
            seen.append(1)
            if fails == "task":
                first(int)

        hook = (lambda **_: first(int)) if fails == "post hook" else None
        taskhawk.configure(
            {**taskhawk.settings.given, "TASKHAWK_POST_PROCESS_HOOK": hook}
        )
        broker = taskhawk._brokers.broker()
        broker._clock = clock
        faults = {"finish": first} if fails == "finish" else {}
        FaultyClaims(monkeypatch, **faults)
        job = taskhawk.task(name="mail.send", once=True, retry=lambda _: 0)(run)
        job.dispatch()
        assert work_all(broker).acked == 1
        assert len(seen) == runs
        if fails == "finish":
            assert worker_logs(caplog) == [
                "claims: can't end claims, goes on trying: no route"
            ]

    def test_acknowledgement_lost(self, stored):
        """What ran to its end is ignored when it is delivered again, for a day by default."""
        broker, clock = stored
        runs: list[int] = []
        job = taskhawk.task(name="mail.send", once=True)(lambda_free(runs))
        message = Message.new(job.name)
        for after_s in (0, 86_399, 2):
            clock.now += after_s
            taskhawk.publish(message)
            work_all(broker)
        assert len(runs) == 2

    def test_keep(self, stored):
        """It is remembered for as long as keep_s says."""
        broker, clock = stored
        runs: list[int] = []
        job = taskhawk.task(name="mail.send", once=True, keep_s=60)(lambda_free(runs))
        message = Message.new(job.name)
        for after_s in (0, 59, 2):
            clock.now += after_s
            taskhawk.publish(message)
            work_all(broker)
        assert len(runs) == 2

    @pytest.mark.parametrize(
        ("options", "lease_s", "void_s"),
        [({}, 40, 45), ({"time_limit": 600}, 40, 605)],
    )
    def test_crash(self, stored, options, lease_s, void_s):
        """A run that died is repeated once its claim is void, and not before.

        The claim lasts for the task's time limit, or else for the visibility timeout.
        """
        broker, clock = stored
        runs: list[int] = []
        job = taskhawk.task(name="mail.send", once=True, **options)(lambda_free(runs))
        job.isolate = False
        job.dispatch()
        queue = broker.destination(Priority.default)
        began = clock.now
        [received] = broker.receive(queue, 1, 0, lease_s, NEVER)
        received.message, received.lease_s = Message(json.loads(received.body)), lease_s
        held = taskhawk._with_claims(job, received)
        held.__enter__()  # and the worker dies
        ends: list[taskhawk.Ledger] = []
        while not runs:
            until_visible(broker, clock)
            ends.append(work_once(broker))
        assert {each.postponed for each in ends[:-1]} == {1}
        assert ends[-1].acked == 1
        assert void_s < clock.now - began <= void_s + 161

    @pytest.mark.parametrize(("where", "ends"), ONCE_CRASHES)
    def test_crashes(self, isolated, monkeypatch, where, ends):
        """Wherever a worker dies, the message is run to its end, and once.

        Only between the end of the work and its note is there nothing that knows of it.
        """
        clock = ChaosClock(1_000_000)  # it goes on, so what is tried again ends
        monkeypatch.setattr(taskhawk, "_TICK_S", 0.0005)
        broker = WorkerBroker(taskhawk.SqliteBroker("sqlite://", clock=clock))
        crashed, done = threading.Event(), []

        def die(name: str) -> Callable[..., Any]:
            def call(real: Any, *_: Any) -> Any:
                if where == f"before {name}":
                    crashed.set()
                if crashed.is_set():
                    raise OSError("the worker was killed")
                answer = real()
                if where == f"after {name}":
                    crashed.set()
                    raise OSError("the worker was killed")
                return answer

            return call

        names = ("claim", "finish", "release")
        claims = FaultyClaims(monkeypatch, **{name: die(name) for name in names})
        claims.find = lambda: taskhawk._SqliteClaims(broker.inner)
        names = ("receive", "delete", "change_visibility", "send")
        broker.faults = {name: die(name) for name in names}

        def work() -> None:
            die("work")(lambda: done.append(1))

        job = taskhawk.task(name="mail.send", once=True)(work)
        broker.put(job, ())
        options = {"clock": clock, "max_tasks": 1, "until_empty": False}
        broker.work(shutdown_event=crashed, **options)
        where = ""
        crashed.clear()
        clock.now += 3600
        broker.work(clock=clock)
        assert len(done) == ends
        assert broker.depth(WORKER_QUEUE) == (0, 0, 0)


def lambda_free(runs: list[int]) -> Callable[[], None]:
    """Return a task's function that notes its runs."""

    def run() -> None:
        runs.append(1)

    return run


class TestUnique:
    """Queued duplicates collapse into one run, which starts after the last was sent."""

    def test_collapses(self, stored):
        """A thousand dispatches while it runs cost one more run, after the last of them."""
        broker, clock = stored
        states: list[int] = []
        latest = [0]

        def index(document: int) -> None:
            states.append(latest[0])
            if len(states) == 1:
                for _ in range(100):
                    latest[0] += 10
                    clock.now += 0.001
                    job.dispatch_many([document] * 10)
                clock.now += 0.001

        job = taskhawk.task(name="shop.index", unique=("document",))(index)
        job.dispatch(7)
        assert work_all(broker) == taskhawk.Ledger(received=1001, acked=1001)
        assert states == [0, 1000]

    def test_queued_while_it_runs(self, state):
        """One that is sent while its like runs does run: it may have come too late for that."""
        runs: list[Any] = []

        def index(document: int, shop: str = "A") -> None:
            runs.append((document, shop))
            if len(runs) == 1:
                job.dispatch(document, shop=shop)

        job = taskhawk.task(name="shop.index", unique=True)(index)
        job.dispatch(7)
        job.dispatch(7, "B")
        work_all(state)
        assert sorted(runs) == [(7, "A"), (7, "A"), (7, "B")]

    def test_own_retries(self, stored):
        """The message that ran may run again, also where it stands for others."""
        broker, clock = stored
        runs: list[str] = []

        def index(metadata: Any) -> None:
            runs.append(metadata.id)
            if len(runs) < 3:
                raise OSError

        job = taskhawk.task(name="shop.index", unique=True, retry=lambda _: 0)(index)
        first, _ = job.dispatch(), job.dispatch()
        clock.now += 0.001
        assert work_all(broker) == taskhawk.Ledger(received=4, acked=2, retried=2)
        assert runs == [first] * 3

    def test_of_a_topic(self, isolated):
        """Messages of a topic have no times to compare: each runs."""
        taskhawk.configure(AWS_KEYS, TASKHAWK_CLAIMS_TABLE=CLAIMS_TABLE)
        runs: list[int] = []
        taskhawk.task(name="mail.send", unique=True)(lambda_free(runs))
        event = {"Records": [lambda_sns_record(processing_body(), "m1")] * 2}
        assert lambda_consume(event) == (None, [])
        assert len(runs) == 2

    def test_clock_set_back(self, stored):
        """A clock of SQLite's that is set back has no message taken for seen."""
        broker, clock = stored
        seen: list[int] = []

        def run() -> None:
            seen.append(1)

        job = taskhawk.task(name="mail.send", unique=True)(run)
        job.dispatch()
        work_once(broker)
        clock.now -= 3600
        job.dispatch()
        clock.now += 1
        work_once(broker)
        assert len(seen) == 2


class TestLimits:
    """At most so many at once or in a time; who waits uses up no attempts."""

    def test_rate(self, stored):
        """At most so many start in any time of that length; the others wait for theirs."""
        broker, clock = stored
        starts: list[float] = []

        def call() -> None:
            starts.append(clock.now)

        job = taskhawk.task(name="mail.call", limit=taskhawk.limit(3, every_s=60))(call)
        for _ in range(10):
            job.dispatch()
        while len(starts) < 10:
            until_visible(broker, clock)
            work_once(broker)
        for first, fourth in zip(starts, starts[3:], strict=False):
            assert fourth - first >= 60
        assert starts[-1] - starts[0] <= 3 * 60 + 4 * 160

    @pytest.mark.parametrize(
        ("looks", "wait_s"), [(0, 10), (1, 20), (3, 80), (4, 160), (99, 160)]
    )
    def test_waits(self, isolated, looks, wait_s):
        """Who waits looks less and less often; on a FIFO queue, as receives go by."""
        count = {"DataType": "String", "StringValue": str(looks)}
        postponed = QueueMessage("", "1", queue="Q")
        postponed.message_attributes = {"taskhawk.postponed": count}
        received = QueueMessage("", "1", queue="Q.fifo")
        received.attributes = {"ApproximateReceiveCount": str(looks + 1)}
        for message in (postponed, received):
            waits_s = [taskhawk._wait_s(message) for _ in range(100)]
            assert wait_s / 2 <= min(waits_s) <= max(waits_s) <= wait_s
            assert max(waits_s) > wait_s * 0.75

    def test_lock(self, state):
        """While one runs, the others of its customer wait, and only they."""
        runs: list[Any] = []
        option = {"limit": taskhawk.limit(1, per=("customer",)), "time_limit": 60}

        def bill(customer: str) -> None:
            runs.append(customer)
            if len(runs) == 1:
                inner.append(work_once(state))

        inner: list[taskhawk.Ledger] = []
        job = taskhawk.task(name="shop.bill", **option)(bill)
        job.isolate = False
        for customer in "aab":
            job.dispatch(customer)
        queue = state.destination(Priority.default)
        found: list[QueueMessage] = []
        while not found:
            found = state.receive(queue, 1, 1, 60, NEVER)
        assert taskhawk.process(found[0]).fate is Fate.acknowledge
        total = len(runs) + sum(ledger.postponed for ledger in inner)
        assert sum(ledger.received for ledger in inner) == total - 1
        first = runs[0]
        assert all(customer != first for customer in runs[1:])

    def test_several_workers(self, stored):
        """However many workers there are, no more run at once, and all run."""
        broker, _ = stored
        broker._clock = lambda: time.time() * 100  # waits are short, and leases are not
        running, most, runs = [0], [0], []
        guard = threading.Lock()
        numbers, two = itertools.count(), threading.Barrier(2)

        def render(page: int) -> None:
            with guard:
                running[0] += 1
                most[0] = max(most[0], running[0])
                number = next(numbers)
            if number < 2:  # both stay until a third was put off
                two.wait(WORKER_PATIENCE_S)
                worker_eventually(lambda: sum(w.ledger.postponed for w in workers))
            with guard:
                running[0] -= 1
            runs.append(page)

        options = {"limit": taskhawk.limit(2), "time_limit": 7200}
        job = taskhawk.task(name="shop.render", **options)(render)
        job.isolate = False
        job.dispatch_many(range(12))
        queues = [broker.destination(Priority.default)]
        limits: dict[str, Any] = {"concurrency": 2, "until_empty": True, "wait_s": 0.05}
        workers = [
            taskhawk.Worker(broker, queues, visibility_timeout_s=7200, **limits)
            for _ in range(3)
        ]
        threads = [threading.Thread(target=worker.run) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (sorted(runs), most[0]) == ([*range(12)], 2)
        ends = [worker.ledger for worker in workers]
        assert sum(ledger.acked for ledger in ends) == 12
        assert sum(ledger.postponed for ledger in ends) > 0

    @pytest.mark.slow
    def test_killed_worker(self, tmp_path):
        """A worker that is killed holds a lock for its time limit, and no longer.

        Meanwhile another worker has the queue, and no two runs of it overlap.
        """
        env = {"TASKHAWK_BROKER": f"sqlite:///{tmp_path}/q.db?visibility_timeout_s=2"}
        taskhawk.configure(env)
        job = taskhawk.task(name="jobs.bill")(plain_bill)
        job.dispatch("first")
        with contextlib.ExitStack() as stack:
            options = ("--concurrency", "2", "--visibility-timeout", "2")
            start = functools.partial(
                worker_process, tmp_path, env, *options, module=LIMITS_MODULE
            )
            one = stack.enter_context(start())
            notes = tmp_path / "notes"
            worker_eventually(notes.exists)
            stack.enter_context(start())
            job.dispatch_many(["second", "third"])
            one.kill()
            killed_at = time.time()

            def lines() -> list[list[str]]:
                return [line.split() for line in notes.read_text().splitlines()]

            worker_eventually(lambda: len(lines()) == 7)
        words = [(what, which) for what, which, _ in lines()]
        assert words[0] == ("begin", "first")
        for begin, end in zip(words[1::2], words[2::2], strict=True):
            assert (begin[0], end) == ("begin", ("end", begin[1]))
        began_at = [float(at) for what, _, at in lines() if what == "begin"]
        assert began_at[0] + 3 + 5 <= began_at[1] < killed_at + 3 + 5 + 10

    def test_failed_run(self, stored):
        """However a run ends, its place is free again."""
        broker, _ = stored
        runs: list[int] = []

        def run() -> None:
            runs.append(1)
            raise KeyError

        options = {"limit": taskhawk.limit(1), "time_limit": 3600}
        job = taskhawk.task(name="mail.send", retry=lambda _: 0, **options)(run)
        job.isolate = False
        job.dispatch()
        for attempt in range(1, 4):
            assert work_once(broker).retried == 1
            assert len(runs) == attempt

    def test_waiting(self, stored):
        """Waiting for hours is no attempt, and costs a request in ten seconds at most."""
        broker, clock = stored
        options = {"limit": taskhawk.limit(1), "time_limit": 5 * 3600}
        seen: list[Any] = []

        def run(metadata: Any) -> None:
            seen.append(metadata.attempt)

        job = taskhawk.task(name="mail.send", **options)(run)
        job.isolate = False
        job.dispatch()
        key, began = taskhawk._key(job, "limit", {}), clock.now
        taskhawk._SqliteClaims(broker).claim(key, 4 * 3600)
        looks = []
        while not seen:
            until_visible(broker, clock)
            looks.append(clock.now)
            work_once(broker)
        assert seen == [1]
        assert 4 * 3600 < clock.now - began <= 4 * 3600 + 170
        for count, at in enumerate(looks):
            # A receive, a claim, a copy and a delete; and the first minutes are quicker.
            assert 4 * count <= (at - began) / 10 + 16

    @pytest.mark.parametrize(
        ("ahead_s", "after_s", "end"),
        [(4.9, 60, "postponed"), (4.9, 60.2, "acked"), (-4.9, 69.9, "postponed")],
    )
    def test_clocks(self, tmp_path, ahead_s, after_s, end):
        """A clock that is some seconds ahead does not end a run's claim while it may run."""
        url = f"sqlite:///{tmp_path}/q.db"
        taskhawk.configure(TASKHAWK_BROKER=url)
        broker, clock = taskhawk._brokers.broker(), Clock()
        options = {"limit": taskhawk.limit(1), "time_limit": 60}
        job = taskhawk.task(name="mail.send", **options)(nothing)
        job.isolate = False
        message = job._invocation._message((), {})
        held = taskhawk.SqliteBroker(url, clock)
        key = taskhawk._key(job, "limit", {})
        received = QueueMessage("", "m1", message=message)
        taskhawk._SqliteClaims(held).claim(key, taskhawk._void_s(job, received))
        broker._clock = Clock(clock.now + after_s + ahead_s)
        job.dispatch()
        assert getattr(work_once(broker), end) == 1

    @pytest.mark.parametrize(
        ("options", "sends"),
        [({"limit": taskhawk.limit(1, every_s=60)}, 1), ({"unique": True}, 0)],
    )
    def test_lambda_event(self, lambda_sqs, options, sends):
        """In Lambda behind SQS, claims work as in a worker: the second is sent anew."""
        runs: list[int] = []
        taskhawk.task(name="lambda.run", **options)(runs.append)
        more = {
            "AWS_ENDPOINT_DYNAMODB": lambda_sqs.url,
            "TASKHAWK_CLAIMS_TABLE": CLAIMS_TABLE,
        }
        taskhawk.configure({**taskhawk.settings.given, **more})
        item = {"in_progress_expiration": {"N": "9999999999999"}}
        error = {"__type": "ConditionalCheckFailedException", "message": "no"}
        refusal = (400, {}, json.dumps({**error, "Item": item}).encode())
        lambda_sqs.script("UpdateItem", None, refusal)
        assert lambda_consume(lambda_event(7, 7)) == (None, [])
        copies = lambda_sqs.asked("SendMessage")
        assert (runs, len(copies)) == ([7], sends)
        assert all(5 <= copy["DelaySeconds"] <= 10 for copy in copies)

    def test_lambda(self, lambda_sqs, lambda_runs, sqlite):
        """A function's claim lasts as long as a function may run, whatever its time limit."""
        job = taskhawk.task(name="lambda.slow", time_limit=5, limit=taskhawk.limit(1))(
            nothing
        )
        record = lambda_sqs_record(processing_body("lambda.slow"), "m1")
        received = taskhawk._from_record(record)
        assert taskhawk._void_s(job, received) == 905

    @pytest.mark.parametrize(
        ("options", "own_s", "void_s"),
        [({}, None, 45), ({"time_limit": 9}, None, 14), ({"time_limit": 9}, 60, 65)],
    )
    def test_void(self, options, own_s, void_s):
        """A claim lasts for the longest that its run may take, and five seconds more."""
        job = taskhawk.task(name="mail.send", **options)(nothing)
        message = job.with_options(time_limit=own_s)._message((), {})
        received = QueueMessage("", "m1", lease_s=40, message=message)
        assert taskhawk._void_s(job, received) == void_s


class TestPauses:
    """A queue may be paused, and have so many workers, no more."""

    def test_paused(self, state, caplog):
        """A paused queue is not received from, until it is resumed."""
        caplog.set_level(logging.INFO)
        queue = state.destination(Priority.default)
        job = taskhawk.task(name="mail.send")(nothing)
        job.dispatch()
        clock = Clock()
        taskhawk.pause(Priority.default)
        assert taskhawk.is_paused(Priority.default)
        assert not taskhawk.is_paused(Priority.high)
        options = {"loop_count": 1, "wait_s": 0, "clock": clock}
        assert taskhawk.Worker(state, [queue], **options).run() == taskhawk.Ledger()
        taskhawk.resume(Priority.default)
        assert not taskhawk.is_paused(Priority.default)
        assert taskhawk.Worker(state, [queue], **options).run().acked == 1
        assert f"{queue}: receives nothing: it is paused" in caplog.messages

    def test_for_a_while(self, stored):
        """A pause may end by itself."""
        _, clock = stored
        taskhawk.pause(Priority.bulk, for_s=600)
        clock.now += 599
        assert taskhawk.is_paused(Priority.bulk)
        clock.now += 2
        assert not taskhawk.is_paused(Priority.bulk)

    def test_wrong(self, stored):
        """A wrong queue or time is refused."""
        for change in (taskhawk.pause, taskhawk.resume, taskhawk.is_paused):
            with pytest.raises(taskhawk.ConfigurationError) as caught:
                change("bulk")
            sentence = "priority: expected a taskhawk.Priority, got 'bulk'"
            assert str(caught.value) == sentence
        with pytest.raises(taskhawk.ConfigurationError) as caught:
            taskhawk.pause(Priority.bulk, for_s="10m")
        sentence = "for_s: expected a number of seconds above 0, got '10m'"
        assert str(caught.value) == sentence

    def test_looks(self, stored, monkeypatch, caplog):
        """A worker looks every 10 to 20 s, and goes on as before where it can't."""
        caplog.set_level(logging.INFO)
        broker, clock = stored
        faulty = FaultyClaims(monkeypatch)
        worker = taskhawk.Worker(broker, ["Q"], clock=clock)
        done = iter([False, None, True, None, False])

        def is_done(_real: Any, _key: str) -> bool:
            answer = next(done)
            if answer is None:
                raise OSError("no route")
            return answer

        faulty.faults["is_done"] = is_done
        seen = []
        for _ in range(5):
            seen.append([taskhawk._may_receive(worker, "Q") for _ in range(3)])
            clock.now += 20
        assert seen == [[each] * 3 for each in (True, True, False, False, True)]
        assert len(faulty.calls) == 5
        assert caplog.messages == [
            "Q: can't look for a pause, goes on trying: no route",
            "Q: can look for a pause again; tries that failed: 1",
            "Q: receives nothing: it is paused",
            "Q: can't look for a pause, goes on trying: no route",
            "Q: can look for a pause again; tries that failed: 1",
            "Q: receives again",
        ]

    def test_max_workers(self, stored, monkeypatch, caplog):
        """So many workers receive from a queue; another takes the place of one that died."""
        caplog.set_level(logging.INFO)
        broker, clock = stored
        one, two, three = (
            taskhawk.Worker(broker, ["Q"], max_workers=2, clock=clock) for _ in range(3)
        )

        def may() -> list[bool]:
            return [taskhawk._may_receive(worker, "Q") for worker in (one, two, three)]

        for _ in range(5):
            assert may() == [True, True, False]
            clock.now += 20
        clock.now += 41
        assert taskhawk._may_receive(three, "Q")
        assert taskhawk._may_receive(two, "Q")
        assert not taskhawk._may_receive(one, "Q")
        assert caplog.messages[0] == "Q: receives nothing: it has 2 workers already"
        clock.now += 20
        FaultyClaims(monkeypatch, is_done=worker_raise(OSError("no route")))
        assert not taskhawk._may_receive(three, "Q")  # its place may be another's soon
        assert caplog.messages[-1] == (
            "Q: receives nothing: it can't be told how many workers it has"
        )

    def test_busy_worker(self, stored):
        """A worker that runs something for long keeps its place, and no other's."""
        broker, clock = stored
        one, two = (
            taskhawk.Worker(broker, ["Q", "R"], max_workers=1, clock=clock)
            for _ in range(2)
        )
        assert taskhawk._may_receive(one, "Q")
        assert taskhawk._may_receive(two, "R")
        assert not taskhawk._may_receive(one, "R")

        class Stop(threading.Event):
            left = 120  # waits of 5 s, which are ten minutes

            def wait(self, timeout: float | None = None) -> bool:
                clock.now += timeout or 0
                self.left -= 1
                return self.left < 0

        keep = taskhawk._begin_keeping(one, Stop())
        assert keep is not None
        keep()
        assert not taskhawk._may_receive(two, "Q")
        assert taskhawk._may_receive(one, "R")  # nobody has kept that of the other
        assert taskhawk._begin_keeping(taskhawk.Worker(broker, ["Q"]), NEVER) is None

    def test_no_table(self, aws):
        """Without a table, a worker looks nowhere; a pause says what is missing."""
        assert not taskhawk.is_paused(Priority.default)
        assert refused(taskhawk.pause, Priority.default) == NO_TABLE
        assert (
            taskhawk.Worker(
                taskhawk._brokers.broker(), ["Q"], loop_count=1, wait_s=0
            ).run()
            == taskhawk.Ledger()
        )
        assert "UpdateItem" not in aws.actions

    def test_commands(self, tmp_path, capsys):
        """`pause` and `resume` say what they did; `stats` and `check` show a pause."""
        taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{tmp_path}/q.db")
        assert taskhawk.main(["pause", "--priority", "bulk", "--for", "10m"]) == 0
        assert capsys.readouterr().out == "TASKHAWK-DEFAULT-BULK: paused\n"
        assert taskhawk.main(["stats"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.endswith("  paused") for line in lines[1:]] == [False] * 3 + [True]
        assert taskhawk.main(["check", "--priority", "bulk"]) == 0
        assert "TASKHAWK-DEFAULT-BULK: it is paused" in capsys.readouterr().out
        assert taskhawk.main(["resume"]) == 0
        assert capsys.readouterr().out.count(": resumed\n") == 4
        assert not taskhawk.is_paused(Priority.bulk)


class ChaosClaims:
    """Claims that fail at any call in the ways a service can, as ChaosBroker does."""

    def __init__(self, inner: Any, broker: ChaosBroker) -> None:
        self.inner, self.broker = inner, broker

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a method that meets a fault, or none."""

        def call(*args: Any) -> Any:
            real = functools.partial(getattr(self.inner, name), *args)
            broker = self.broker
            with broker.lock:
                faulty = broker.chance.random() < broker.fault_rate
                fault = broker.chance.choice(("before", "after", "crash"))
            if faulty and fault == "crash":
                broker.crashed = True
            if broker.crashed:
                broker.stop.set()
                raise OSError("the worker was killed")
            if faulty and fault == "before":
                raise OSError("the connection was refused")
            answer = real()
            if faulty:
                raise OSError("the answer was lost")
            return answer

        return call


class TestChaosOfState:
    """Whatever crashes, no message is lost, and none is run that must not be."""

    @pytest.mark.parametrize(
        "seeds",
        [
            pytest.param(range(15), id="few"),
            pytest.param(range(15, 180), marks=pytest.mark.slow, id="many"),
        ],
    )
    def test_nothing_is_lost(self, seeds, monkeypatch):
        """For each document, the last run that ended saw its last change."""
        monkeypatch.setattr(taskhawk, "_TICK_S", 0.0005)
        logging.disable(logging.CRITICAL)
        try:
            for seed in seeds:
                self.run(seed, monkeypatch)
        finally:
            logging.disable(logging.NOTSET)

    def run(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let workers run into faults, one after another; the last one meets none."""
        chance, clock = random.Random(seed), ChaosClock(1_000_000)
        inner = taskhawk.SqliteBroker("sqlite://?max_receive_count=1000", clock=clock)
        broker = ChaosBroker(inner, clock, chance)
        claims = ChaosClaims(taskhawk._SqliteClaims(inner), broker)
        monkeypatch.setattr(taskhawk, "_find_claims", lambda: claims)
        taskhawk._registry.pop("chaos.job", None)
        options = chance.choice(
            (
                {"unique": ("number",)},
                {"limit": taskhawk.limit(2, per=("number",)), "time_limit": 60},
                {"unique": True, "limit": taskhawk.limit(1), "time_limit": 60},
                {"once": True},
                {"once": True, "unique": ("number",)},
            )
        )
        latest, seen = dict.fromkeys(range(4), 0), dict.fromkeys(range(4), -1)

        @taskhawk.task(name="chaos.job", **options)
        def job(number: int) -> None:
            state = latest[number]
            clock.now += chance.choice((0, 0, 0.1, 3))
            broker.done.add(number)
            if chance.random() < 0.2:
                latest[number] += 1
                broker.put(job, (number,))
            if chance.random() < 0.2:
                raise ValueError(number)
            seen[number] = max(seen[number], state)

        job.isolate = False
        broker.put(job, *((number % 4,) for number in range(12)))
        # The second without faults runs what a run sent that had lost its lease.
        for fault_rate in (0.3, 0.1, 0, 0):
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
            assert worker.run().balanced, f"seed {seed}"
            clock.now += WORKER_12_HOURS_S
        assert inner.depth(WORKER_QUEUE) == (0, 0, 0), f"seed {seed}"
        assert seen == latest, f"seed {seed}"
        inner.close()


# --- 22. schedules --------------------------------------------------------------------

ROLE = "arn:aws:iam::000000000000:role/taskhawk-app"
NO_ROLE = (
    "TASKHAWK_SCHEDULER_ROLE is not set: delays of over 15 minutes on SQS, any on SNS,"
    " and periodic tasks are schedules of EventBridge Scheduler, which sends with a role:"
    " expected its ARN, such as 'arn:aws:iam::123456789012:role/taskhawk-dev-myapp'"
)


QUEUE_ARN = "arn:aws:sqs:us-east-1:000000000000:TASKHAWK-APP"


@pytest.fixture
def schedules(
    endpoint: str, sqs_client: Callable[..., Any], queue_name: str
) -> Iterator[Callable[..., Any]]:
    """Have schedules on each of the emulators; yield a function that calls the service."""
    client = sqs_client(endpoint, "scheduler")
    group = f"taskhawk-{queue_name.lower()}"
    make_queues(sqs_client(endpoint), queue_name)
    client.create_schedule_group(Name=group)
    configure_aws(endpoint, queue_name, TASKHAWK_SCHEDULER_ROLE=ROLE)

    def call(operation: str, **parameters: Any) -> Any:
        return getattr(client, operation)(GroupName=group, **parameters)

    return call


@pytest.fixture
def stubbed(aws: ScriptedAws) -> Iterator[botocore.stub.Stubber]:
    """Yield botocore's stand-in for EventBridge Scheduler."""
    configure_aws(aws.url, "app", TASKHAWK_SCHEDULER_ROLE=ROLE)
    client = taskhawk._brokers.get("schedule").client("send")
    with botocore.stub.Stubber(client) as stub:
        yield stub
        stub.assert_no_pending_responses()


class TestLongDelays:
    """A message that a queue can't hold back for so long is sent later, once, by a schedule."""

    def test_schedule(self, schedules, mail, queue_name):
        """It is a one-time schedule with the message and its id; dispatch says what it is."""
        due = datetime(2099, 3, 27, 1, 30, 1, tzinfo=ZoneInfo("Europe/Berlin"))
        message_id = mail.with_headers(a="b").with_delay(due).dispatch("you")
        found = schedules("get_schedule", Name=message_id)
        assert found["ScheduleExpression"] == "at(2099-03-27T00:31:00)"
        assert found["ScheduleExpressionTimezone"] == "UTC"
        assert found["ActionAfterCompletion"] == "DELETE"
        assert found["FlexibleTimeWindow"] == {"Mode": "OFF"}
        target = found["Target"]
        message = Message(json.loads(target.pop("Input")))
        assert (message.id, message.args) == (message_id, ["you"])
        assert message.headers == {"a": "b"}
        arn = f"arn:aws:sqs:us-east-1:000000000000:TASKHAWK-{queue_name}"
        assert target == {
            "Arn": arn,
            "RoleArn": ROLE,
            "RetryPolicy": {
                "MaximumEventAgeInSeconds": 86_400,
                "MaximumRetryAttempts": 185,
            },
            "DeadLetterConfig": {"Arn": f"{arn}-DLQ"},
        }

    def test_model(self, stubbed, mail):
        """What is sent has the shape that the service's model asks for."""
        seen = []
        client = stubbed.client
        client.meta.events.register(
            "provide-client-params.scheduler.*", lambda params, **_: seen.append(params)
        )
        stubbed.add_response("create_schedule", {"ScheduleArn": "arn"})
        message = Message.new("mail.send", msg_id="a b")
        message.delay_s = 901
        entry = taskhawk._prepare(message).entry._replace(group_id="g1")
        taskhawk._brokers.get("schedule").send(f"{QUEUE_ARN}.fifo", [entry])
        (parameters,) = seen
        shape = client.meta.service_model.operation_model("CreateSchedule").input_shape
        report = botocore.validate.ParamValidator().validate(parameters, shape)
        assert not report.has_errors(), report.generate_report()
        assert parameters["Target"]["SqsParameters"] == {"MessageGroupId": "g1"}
        assert "DeadLetterConfig" not in parameters["Target"]  # it can't be FIFO
        stubbed.add_response("create_schedule", {"ScheduleArn": "arn"})
        taskhawk._brokers.get("schedule").send(QUEUE_ARN, [entry])
        assert "SqsParameters" not in seen[1]["Target"]  # which are for FIFO queues
        assert seen[1]["Target"]["DeadLetterConfig"] == {"Arn": f"{QUEUE_ARN}-DLQ"}
        assert re.fullmatch("[0-9a-f]{64}", parameters["Name"])

    @given(
        st.integers(0, 10**7).map(lambda n: n / 100),
        st.integers(0, 10**7).map(lambda n: n / 100),
    )
    def test_never_early(self, due_s, now_s):
        """It is due at a full minute: never early, at most a minute late, never past."""
        text = taskhawk._at(due_s, now_s)
        at = datetime.strptime(text, "at(%Y-%m-%dT%H:%M:00)").replace(tzinfo=UTC)
        at_s = at.timestamp()
        assert max(due_s, now_s + 10) <= at_s < max(due_s, now_s + 10) + 60

    def test_on_time(self, stubbed, mail):
        """A due time with no seconds is met to the minute, however late the batch ends."""
        due = datetime(2099, 1, 1, tzinfo=UTC)
        seen = []
        stubbed.client.meta.events.register(
            "provide-client-params.scheduler.*",
            lambda params, **_: seen.append(params["ScheduleExpression"]),
        )
        for _ in range(2):
            stubbed.add_response("create_schedule", {"ScheduleArn": "arn"})
        with taskhawk.batch():
            for _ in range(2):
                mail.with_delay(due).dispatch()
        assert seen == ["at(2099-01-01T00:00:00)"] * 2

    @pytest.mark.slow
    def test_arrives(self, ministack, sqs_client, queue_name, mail):
        """It arrives as it was, though its own text looks like one of Scheduler's keywords."""
        client = sqs_client(ministack, "scheduler")
        client.create_schedule_group(Name=f"taskhawk-{queue_name.lower()}")
        make_queues(sqs_client(ministack), queue_name)
        configure_aws(ministack, queue_name, TASKHAWK_SCHEDULER_ROLE=ROLE)
        text = "a < b, \\<aws.scheduler.scheduled-time> <b>"
        message = Message.new("mail.send", [text], headers={"h": text})
        message.delay_s = 901
        assert taskhawk.publish(message) == message.id
        group = f"taskhawk-{queue_name.lower()}"
        found = client.get_schedule(GroupName=group, Name=message.id)
        assert "<aws." not in found["Target"]["Input"]
        names = ("ActionAfterCompletion", "FlexibleTimeWindow", "Target")
        client.update_schedule(  # let its time come now
            GroupName=group,
            Name=message.id,
            ScheduleExpression="at(2020-01-01T00:00:00)",
            **{name: found[name] for name in names},
        )
        broker = taskhawk._brokers.broker()
        queue = broker.destination(Priority.default)
        (arrived,) = broker.receive(queue, 1, 20, 60, NEVER)
        assert taskhawk._decode(arrived.body) == message
        assert taskhawk.cancel(message.id) is False

    def test_topic(self, schedules, mail, queue_name, endpoint):
        """In a Lambda app any delay is a schedule, whose target is the topic."""
        configure_aws(
            endpoint, queue_name, TASKHAWK_SCHEDULER_ROLE=ROLE, IS_LAMBDA_APP=True
        )
        message_id = mail.with_priority(Priority.low).with_delay(1).dispatch()
        target = schedules("get_schedule", Name=message_id)["Target"]
        topic = f"taskhawk-{queue_name.lower()}-low-priority"
        assert target["Arn"] == f"arn:aws:sns:us-east-1:000000000000:{topic}"
        assert "DeadLetterConfig" not in target
        assert taskhawk.cancel(message_id)

    @pytest.mark.parametrize(
        ("lambda_app", "delay"),
        [(False, 900.001), (False, timedelta(days=1)), (True, 1)],
    )
    def test_no_role(self, aws, mail, lambda_app, delay):
        """Without a role it is refused, and the error says what to set."""
        configure_aws(aws.url, "app", IS_LAMBDA_APP=lambda_app)
        assert refused(mail.with_delay(delay).dispatch) == NO_ROLE
        assert aws.calls == []

    def test_short(self, aws, mail):
        """What the queue itself holds back needs no role, and is no schedule."""
        mail.with_delay(900).dispatch()
        mail.with_delay(datetime.now(UTC) - timedelta(days=1)).dispatch()
        sent = aws.asked("SendMessage")
        assert [entry.get("DelaySeconds") for entry in sent] == [900, None]

    def test_too_large(self, stubbed, mail):
        """It may be 256 KiB; more is refused as dispatch does."""
        error = taskhawk.MessageTooLarge
        later = mail.with_delay(timedelta(days=2))
        text = filler(262_145)
        sentence = refused(later.dispatch, text, error=error)
        largest = f"args[0] with {len(text) + 2}"
        assert sentence == too_large(262_145, 262_144, largest)

    @pytest.mark.slow
    def test_repeated(self, aws, mail):
        """A request that botocore repeats makes one schedule; the next dispatch is another."""
        configure_aws(aws.url, "app", TASKHAWK_SCHEDULER_ROLE=ROLE)
        aws.script("CreateSchedule", fault("InternalServerException", status=500))
        later = mail.with_delay(timedelta(days=2))
        message = later._message((), {})
        for _ in range(2):
            taskhawk.publish(message)
        tokens = [data["ClientToken"] for data in aws.asked("CreateSchedule")]
        assert tokens[0] == tokens[1] != tokens[2]

    def test_at_once(self, aws, mail):
        """Dispatches at the same time make a request each, and each has its own answer."""
        configure_aws(aws.url, "app", TASKHAWK_SCHEDULER_ROLE=ROLE)
        denied = fault("AccessDeniedException", status=403)
        aws.always(
            "CreateSchedule",
            lambda call: denied(call) if "odd" in call.data["Target"]["Input"] else {},
        )
        later = mail.with_delay(timedelta(days=2))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            sent = [
                pool.submit(later.dispatch, ("even", "odd")[n % 2]) for n in range(8)
            ]
        for number, dispatched in enumerate(sent):
            if number % 2:
                assert refused(dispatched.result).startswith(
                    "taskhawk-app: access denied"
                )
            else:
                assert re.fullmatch(MESSAGE_ID, dispatched.result())
        assert aws.actions == ["CreateSchedule"] * 8

    def test_batch(self, stubbed, mail):
        """In a batch each has a schedule; those that were refused are raised, and can be sent."""
        stubbed.add_response("create_schedule", {"ScheduleArn": "arn"})
        stubbed.add_client_error("create_schedule", "ServiceQuotaExceededException")
        stubbed.add_response("create_schedule", {"ScheduleArn": "arn"})
        with pytest.raises(taskhawk.PartialFailure) as caught, taskhawk.batch():
            ids = [mail.with_delay(timedelta(days=2)).dispatch(n) for n in range(3)]
        (failed,) = caught.value.result["Failed"]
        assert failed["Id"] == ids[1]
        assert failed["Code"] == "ServiceQuotaExceededException"
        (unsent,) = caught.value.unsent
        assert (unsent.id, unsent.delay_s) == (ids[1], 172_800)
        stubbed.add_response("create_schedule", {"ScheduleArn": "arn"})
        assert taskhawk.publish(unsent) == ids[1]

    @pytest.mark.parametrize(
        ("code", "text", "sentence"),
        [
            (
                "AccessDeniedException",
                "no",
                f"{DENIED.format('CreateSchedule')} (AccessDeniedException: no)",
            ),
            (
                "ResourceNotFoundException",
                "Schedule group taskhawk-app does not exist.",
                (
                    "there is no such group of schedules: run python -m taskhawk provision"
                    " (ResourceNotFoundException: Schedule group taskhawk-app does not exist.)"
                ),
            ),
            (
                "ValidationException",
                (
                    "The execution role you provide must allow AWS EventBridge Scheduler to"
                    " assume the role."
                ),
                (
                    "EventBridge Scheduler can't use this role: check TASKHAWK_SCHEDULER_ROLE"
                    " (ValidationException: The execution role you provide must allow AWS"
                    " EventBridge Scheduler to assume the role.)"
                ),
            ),
        ],
    )
    def test_explained(self, stubbed, mail, code, text, sentence):
        """What only a person can mend is said in a sentence, with AWS's own text."""
        stubbed.add_client_error("create_schedule", code, text)
        later = mail.with_delay(timedelta(days=2))
        assert refused(later.dispatch) == f"taskhawk-app: {sentence}"

    def test_capture(self, mail):
        """Captured and in sync mode, any delay will do, and nothing waits."""
        with taskhawk.capture() as calls:
            message_id = mail.with_delay(timedelta(days=2)).dispatch()
            assert taskhawk.cancel(message_id) is False
        assert calls[0].delay_s == 172_800
        taskhawk.configure(TASKHAWK_SYNC=True)
        assert taskhawk.cancel(mail.with_delay(timedelta(days=2)).dispatch()) is False


class TestCancel:
    """cancel() says whether a message was still waiting, and then it never runs."""

    def test_behind_its_group(self, mail):
        """What waits for others of its group, and for no delay, is not cancelled."""
        taskhawk.configure(TASKHAWK_BROKER="sqlite://", TASKHAWK_FIFO=True)
        ids = [mail.with_group("g").dispatch() for _ in range(2)]
        assert [taskhawk.cancel(each) for each in ids] == [False, False]
        assert sum(taskhawk._brokers.broker().depth("TASKHAWK-DEFAULT.fifo")) == 2

    @pytest.mark.parametrize("message_id", [None, "order 7/ä", "a.b", "x" * 65])
    def test_schedule(self, schedules, mail, message_id):
        """A schedule is deleted, whatever the message's id."""
        message = Message.new("mail.send", msg_id=message_id)
        message.delay_s = 86_400
        assert taskhawk.cancel(message.id) is False
        taskhawk.publish(message)
        assert taskhawk.cancel(message.id) is True
        assert taskhawk.cancel(message.id) is False
        assert schedules("list_schedules")["Schedules"] == []

    @pytest.mark.parametrize("message_id", [None, 'it\'s "7"', "é"])
    def test_sqlite(self, sqlite, mail, message_id):
        """On SQLite, it is the row of just that message."""
        message = Message.new("mail.send", msg_id=message_id, priority=Priority.bulk)
        message.delay_s = 60
        other = mail.with_delay(60).dispatch()
        taskhawk.publish(message)
        assert taskhawk.cancel(message.id) is True
        assert taskhawk.cancel(message.id) is False
        assert sqlite.depth("TASKHAWK-DEFAULT").delayed == 1
        assert taskhawk.cancel(other) is True

    def test_too_late(self, sqlite, mail):
        """What is visible, runs or waits for its next attempt is not cancelled."""
        message_id = mail.dispatch()
        assert taskhawk.cancel(message_id) is False
        (received,) = receive_all()
        assert taskhawk.cancel(message_id) is False
        received.change_visibility(VisibilityTimeout=60)
        assert taskhawk.cancel(message_id) is False

    @pytest.mark.parametrize(
        ("due_in_s", "code", "is_cancelled"),
        [
            (3600, None, True),
            (3600, "ResourceNotFoundException", False),
            (2, "never called", False),
            (-3600, "never called", False),
        ],
    )
    def test_due(self, stubbed, due_in_s, code, is_cancelled):
        """A schedule that is due may have been sent: it is left alone, for it may not yet."""
        due = datetime.now(UTC) + timedelta(seconds=due_in_s)
        at = f"at({due:%Y-%m-%dT%H:%M:%S})"
        stubbed.add_response("get_schedule", {"ScheduleExpression": at})
        if code is None:
            stubbed.add_response("delete_schedule", {})
        elif code != "never called":
            stubbed.add_client_error("delete_schedule", code)
        assert taskhawk.cancel("some-id") is is_cancelled
        stubbed.assert_no_pending_responses()

    def test_postponed(self, stored):
        """What was postponed may stand for others that were ignored: it is to run."""
        broker, clock = stored
        busy = {"limit": taskhawk.limit(1), "time_limit": 60, "unique": True}
        job = taskhawk.task(name="mail.send", **busy)(nothing)
        job.isolate = False
        taskhawk._find_claims().claim(taskhawk._key(job, "limit", {}), 30)
        ids = [job.dispatch() for _ in range(2)]
        clock.now += 1
        ledger = work_once(broker)
        assert (ledger.postponed, ledger.acked) == (1, 1)
        assert [taskhawk.cancel(each) for each in ids] == [False, False]
        clock.now += 60
        assert work_once(broker).acked == 1

    def test_command(self, tmp_path, mail, capsys):
        """The commands dispatch with a delay of days, and cancel by the id that was printed."""
        taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{tmp_path}/queue.db")
        assert taskhawk.main(["dispatch", "mail.send", "--delay", "2d"]) == 0
        message_id = capsys.readouterr().out.strip()
        for code, line in (
            (0, "cancelled"),
            (1, "nothing to cancel: no delayed message has this id"),
        ):
            assert taskhawk.main(["cancel", message_id]) == code
            assert capsys.readouterr().out == f"{line}\n"

    def test_fault(self, stubbed):
        """A fault is raised: nobody knows then whether it was waiting."""
        stubbed.add_client_error("get_schedule", "AccessDeniedException", "no")
        denied = DENIED.format("GetSchedule")
        assert refused(taskhawk.cancel, "some-id") == (
            f"taskhawk-app: {denied} (AccessDeniedException: no)"
        )


#: What is refused at declaration, and what the error says after the task's name.
WRONG_SCHEDULES = """
every day
    expected 'rate(5 minutes)', 'cron(0 9 ? * MON-FRI *)' or a timedelta of minutes
at(2099-01-01T00:00:00)
    expected 'rate(5 minutes)', 'cron(0 9 ? * MON-FRI *)' or a timedelta of minutes
rate(0 minutes)
    expected 'rate(5 minutes)', 'cron(0 9 ? * MON-FRI *)' or a timedelta of minutes
rate(5 seconds)
    expected 'rate(5 minutes)', 'cron(0 9 ? * MON-FRI *)' or a timedelta of minutes
cron(0 9 * * MON)
    expected six fields (minutes, hours, day-of-month, month, day-of-week, year), got 5
cron(0 9 * * MON *)
    expected ? for either day-of-month or day-of-week
cron(0 9 ? * ? *)
    expected ? for either day-of-month or day-of-week
cron(? 9 * * MON *)
    expected ? for either day-of-month or day-of-week
cron(60 9 ? * MON *)
    minutes: expected 0 to 59, lists, ranges or steps of them, got '60'
cron(0,a 9 ? * MON *)
    minutes: expected 0 to 59, lists, ranges or steps of them, got 'a'
cron(0 9- ? * MON *)
    hours: expected 0 to 23, lists, ranges or steps of them, got '9-'
cron(0 17-9 ? * MON *)
    hours: expected 0 to 23, lists, ranges or steps of them, got '17-9'
cron(0 */0 ? * MON *)
    hours: expected 0 to 23, lists, ranges or steps of them, got '*/0'
cron(?/5 9 ? * MON *)
    minutes: expected 0 to 59, lists, ranges or steps of them, got '?/5'
cron(0 9 0 * ? *)
    day-of-month: expected 1 to 31, lists, ranges or steps of them, got '0'
cron(0 9 32W * ? *)
    day-of-month: expected 1 to 31, lists, ranges or steps of them, got '32W'
cron(0 9 ? MON MON *)
    month: expected 1 to 12, lists, ranges or steps of them, got 'MON'
cron(0 9 ? * 0 *)
    day-of-week: expected 1 to 7, lists, ranges or steps of them, got '0'
cron(0 9 ? * MON#6 *)
    day-of-week: expected 1 to 7, lists, ranges or steps of them, got 'MON#6'
cron(0 9 ? * MON 1969)
    year: expected 1970 to 2199, lists, ranges or steps of them, got '1969'
cron(0 9 ? * MON L)
    year: expected 1970 to 2199, lists, ranges or steps of them, got 'L'
"""
#: An expression, a moment, and the next time after it; "-" for none.
NEXT_TIMES = """
rate(5 minutes)                  UTC               2026-11-28T13:00:00  2026-11-28T13:05:00
rate(1 day)                      Europe/Berlin     2026-03-28T23:59:59  2026-03-29T00:00:00
cron(0 9 ? * MON-FRI *)          UTC               2026-11-27T09:00:00  2026-11-30T09:00:00
cron(0 9 ? * 2-6 *)              UTC               2026-11-27T08:59:59  2026-11-27T09:00:00
cron(0/20 8,18 1 jan-mar/2 ? *)  UTC               2026-01-01T18:40:00  2026-03-01T08:00:00
cron(*/25 */12 ? * SUN,sat *)    UTC               2026-11-28T12:00:00  2026-11-28T12:25:00
cron(0 0 29 2 ? *)               UTC               2026-01-01T00:00:00  2028-02-29T00:00:00
cron(0 0 1 1 ? 2030-2031)        UTC               2031-01-01T00:00:00  -
cron(0 0 30 2 ? *)               UTC               2026-01-01T00:00:00  -
cron(0 9 L * ? *)                UTC               2026-01-01T00:00:00  -
cron(30 2 * * ? *)               Europe/Berlin     2026-03-28T01:30:00  2026-03-30T00:30:00
cron(30 2 * * ? *)               Europe/Berlin     2026-10-24T00:30:00  2026-10-25T00:30:00
cron(30 2 * * ? *)               Europe/Berlin     2026-10-25T00:30:00  2026-10-26T01:30:00
cron(0/30 * * * ? *)             Europe/Berlin     2026-10-25T00:30:00  2026-10-25T02:00:00
cron(30 1 * * ? *)               America/New_York  2026-11-01T05:30:00  2026-11-02T06:30:00
cron(15 2 * * ? *)               Australia/Lord_Howe  2026-10-03T15:29:00  2026-10-04T15:15:00
"""
#: Around both changes of 2026 in each of the time zones.
ZONE_CHANGES = {
    "Europe/Berlin": ("2026-03-29T01:00Z", "2026-10-25T01:00Z"),
    "America/New_York": ("2026-03-08T07:00Z", "2026-11-01T06:00Z"),
    "Australia/Lord_Howe": ("2026-04-04T15:00Z", "2026-10-03T15:30Z"),
}


def field_texts(low: int, high: int) -> st.SearchStrategy[str]:
    """Draw what AWS takes for a field of numbers."""
    number = st.integers(low, high)
    pair = st.tuples(number, number).map(sorted)
    part = st.one_of(
        st.just("*"),
        number.map(str),
        pair.map(lambda ends: "{}-{}".format(*ends)),
        st.tuples(number, st.integers(1, 20)).map(lambda step: "{}/{}".format(*step)),
    )
    return st.lists(part, min_size=1, max_size=3).map(",".join)


def brute_force(schedule: Any, moment: datetime, days: int) -> datetime | None:
    """Return the next time by looking at every minute of UTC, for so many days."""
    zone = ZoneInfo(schedule.timezone)
    minute = moment.replace(second=0, microsecond=0)
    for _ in range(days * 24 * 60):
        minute += timedelta(minutes=1)
        local = minute.astimezone(zone)
        weekday = local.isoweekday() % 7 + 1
        found = (local.minute, local.hour, local.day, local.month, weekday, local.year)
        is_first = local.fold == 0
        if is_first and all(map(operator.contains, schedule.fields, found)):
            return minute
    return None


class TestScheduleExpressions:
    """AWS's expressions: what is one, and when it is due."""

    @pytest.mark.parametrize(("expression", "sentence"), told(WRONG_SCHEDULES))
    def test_wrong(self, expression, sentence):
        """A wrong one is refused where the task is declared, by one sentence."""
        declare = taskhawk.task(name="audit", schedule=expression)
        assert refused(declare, plain) == (
            f"audit has schedule={expression!r}: {sentence}"
        )

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (
                {"schedule": 5},
                (
                    "schedule=5: expected 'rate(5 minutes)', 'cron(0 9 ? * MON-FRI *)'"
                    " or a timedelta of minutes"
                ),
            ),
            *(
                (
                    {"schedule": wrong},
                    f"schedule={wrong!r}: expected whole minutes, from 1 to 99999",
                )
                for wrong in (
                    timedelta(),
                    timedelta(minutes=-1),
                    timedelta(seconds=90),
                    timedelta(days=70),
                )
            ),
            ({"timezone": "UTC"}, "timezone='UTC': expected schedule= as well"),
            *(
                (
                    {"schedule": "rate(1 day)", "timezone": wrong},
                    (
                        f"timezone={wrong!r}: expected the name of a time zone that"
                        " this system has, such as 'Europe/Berlin'"
                    ),
                )
                for wrong in ("Berlin", "../etc/passwd", "Europe", "", None)
            ),
        ],
    )
    def test_wrong_options(self, options, sentence):
        """What is no schedule or no time zone is refused likewise."""
        declare = taskhawk.task(name="audit", **options)
        assert refused(declare, plain) == f"audit has {sentence}"

    def test_arguments(self):
        """A periodic task can be called without arguments, or it is refused."""

        def resize(image, *, metadata, size=1):
            """Do nothing."""

        declare = taskhawk.task(name="resize", schedule="rate(1 day)")
        assert refused(declare, resize) == (
            "resize has schedule='rate(1 day)': expected a function that can be called"
            " without arguments (resize: missing a required argument: 'image')"
        )

    @pytest.mark.parametrize(
        ("value", "text", "interval_s"),
        [
            (timedelta(minutes=1), "rate(1 minute)", 60),
            (timedelta(hours=1.5), "rate(90 minutes)", 5400),
            ("rate(1 hours)", "rate(1 hour)", 3600),
            ("rate(2 day)", "rate(2 days)", 172_800),
        ],
    )
    def test_written(self, value, text, interval_s):
        """A timedelta is a rate, and a rate is written as AWS wants it."""
        task = taskhawk.task(name="audit", schedule=value)(plain)
        schedule = taskhawk._schedule_of(task)
        assert (schedule.text, schedule.interval_s) == (text, interval_s)

    @pytest.mark.parametrize(
        ("expression", "zone", "moment", "expected"),
        [re.split(r"\s{2,}", line) for line in NEXT_TIMES.strip().splitlines()],
    )
    def test_next(self, expression, zone, moment, expected):
        """The next time is strictly after a moment; daylight saving skips, and repeats none."""
        schedule = taskhawk._parse_schedule(expression, zone)
        due = schedule.next_after(datetime.fromisoformat(f"{moment}Z"))
        assert (f"{due:%Y-%m-%dT%H:%M:%S}" if due else "-") == expected

    @pytest.mark.parametrize("zone", ZONE_CHANGES)
    @hypothesis.settings(max_examples=60)
    @given(data=st.data())
    def test_like_brute_force(self, zone, data):
        """Around both changes of a year, it is what a look at every minute finds."""
        minutes, hours = data.draw(field_texts(0, 59)), data.draw(field_texts(0, 23))
        days = data.draw(st.sampled_from(["* * ?", "? * *", "? * 1,7", "25-31 * ?"]))
        expression = f"cron({minutes} {hours} {days} *)"
        schedule = taskhawk._parse_schedule(expression, zone)
        change = data.draw(st.sampled_from(ZONE_CHANGES[zone]))
        moment = datetime.fromisoformat(change) + timedelta(
            seconds=data.draw(st.integers(-90_000, 10_000))
        )
        expected = brute_force(schedule, moment, 2)
        if expected:
            assert schedule.next_after(moment) == expected
        else:
            due = schedule.next_after(moment)
            assert due is None or due > moment + timedelta(days=2, minutes=-1)

    @given(
        st.integers(1, 99_999),
        st.sampled_from(["minute", "hour", "day"]),
        st.integers(0, 4_000_000_000),
    )
    def test_rate(self, count, unit, now_s):
        """A rate is due at each multiple of its interval, whatever the time zone does."""
        schedule = taskhawk._parse_schedule(f"rate({count} {unit}s)", "Europe/Berlin")
        moment = datetime.fromtimestamp(now_s, UTC)
        due_s = schedule.next_after(moment).timestamp()
        assert due_s % schedule.interval_s == 0
        assert now_s < due_s <= now_s + schedule.interval_s


MINUTELY = timedelta(minutes=1)
#: Three workers at any time, of which one is killed again and again.
TICKING = """
import os, random, signal, sys, threading, time
from datetime import timedelta
import taskhawk

began = time.time()
url = f"sqlite:///{sys.argv[1]}"
taskhawk.configure(TASKHAWK_BROKER=url)

@taskhawk.task(name="audit", schedule=timedelta(minutes=1))
def audit():
    pass

def clock():
    return began + (time.time() - began) * 2000  # a minute takes 30 ms

def work():
    broker = taskhawk.SqliteBroker(url, clock=clock)
    while True:
        taskhawk._Ticker(broker, [audit], threading.Event()).look()

workers = []
for number in range(33):
    workers.append(os.fork())
    if not workers[-1]:
        work()
    if len(workers) == 3:
        time.sleep(random.random() / 10)
        os.kill(workers[0], signal.SIGKILL)
        os.waitpid(workers.pop(0), 0)
for worker in workers:
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
"""


def periodic_ids(path: Path) -> list[str]:
    """Return the ids of the messages of all queues, in the order of their sending."""
    bodies = sqlite_execute(path, "SELECT body FROM message ORDER BY sent_ms, id")
    return [json.loads(body)["id"] for (body,) in bodies]


class TestPeriodicTasks:
    """On SQLite any worker queues what is due: each firing once, whoever dies when."""

    @pytest.fixture
    def runs(self, isolated):
        """Return the metadata of each run of a task that is due each minute."""
        runs = []

        @taskhawk.task(name="audit", schedule=MINUTELY, priority=Priority.high)
        def audit(metadata):
            runs.append(metadata)

        return runs

    @pytest.fixture
    def clock(self):
        """Return a clock that stands half a minute past."""
        return Clock(1_700_000_000 // 60 * 60 + 30)

    @pytest.fixture
    def ticking(self, tmp_path, clock, runs):
        """Return a broker on disk with that clock, which taskhawk is configured to use."""
        url = f"sqlite:///{tmp_path}/queue.db"
        taskhawk.configure(TASKHAWK_BROKER=url)
        broker = taskhawk.SqliteBroker(url, clock=clock)
        yield broker
        broker.close()

    @staticmethod
    def ticker(broker):
        """Return what a worker on a broker runs beside itself."""
        tasks = taskhawk._periodic_tasks().values()
        return taskhawk._Ticker(broker, tasks, threading.Event())

    def test_runs(self, ticking, clock, runs):
        """It is due from the first look on, runs once when it is, and has an id made of the time."""
        queue = ticking.destination(Priority.high)
        assert work_once(ticking, queue).received == 0
        clock.now += 30
        assert work_once(ticking, queue).acked == 1
        assert work_once(ticking, queue).received == 0
        (metadata,) = runs
        due_s = clock.now // 60 * 60
        due = datetime.fromtimestamp(due_s, UTC)
        assert metadata.id == f"task.audit-{due:%Y-%m-%dT%H:%M:%SZ}"
        assert metadata.timestamp == due_s * 1000
        assert metadata.priority is Priority.high

    def test_once_after_a_stop(self, ticking, clock, tmp_path):
        """What was missed while no worker ran is queued once, and then it goes on."""
        self.ticker(ticking).look()
        clock.now += 86_400
        for _ in range(2):
            self.ticker(ticking).look()
        clock.now += 60
        self.ticker(ticking).look()
        assert len(periodic_ids(tmp_path / "queue.db")) == 2

    def test_changed(self, ticking, clock, tmp_path):
        """A schedule that is changed begins anew: nothing is due at once."""
        self.ticker(ticking).look()
        taskhawk._registry.clear()
        clock.now += 86_400
        taskhawk.task(name="audit", schedule="cron(0 0 1 1 ? *)")(plain)
        taskhawk.task(name="over", schedule="cron(0 0 1 1 ? 2001)")(plain)
        ticker = self.ticker(ticking)
        ticker.look()
        assert periodic_ids(tmp_path / "queue.db") == []
        assert ticker._due_ms / 1000 == datetime(2024, 1, 1, tzinfo=UTC).timestamp()

    @pytest.mark.slow
    def test_many_workers(self, ticking, clock, tmp_path):
        """Of workers that look at the same moment, one queues it."""
        tickers = [
            self.ticker(taskhawk.SqliteBroker(ticking.url(""), clock=clock))
            for _ in range(6)
        ]
        ticking.close()
        with concurrent.futures.ThreadPoolExecutor(len(tickers)) as pool:
            for _ in range(20):
                for done in [pool.submit(ticker.look) for ticker in tickers]:
                    done.result()
                clock.now += 60
        ids = periodic_ids(tmp_path / "queue.db")
        assert len(ids) == len({*ids}) == 19
        for ticker in tickers:
            ticker._broker.close()

    @pytest.mark.slow
    def test_kill(self, tmp_path):
        """Workers that are killed at any moment queue each firing once, and lose none."""
        path = tmp_path / "queue.db"
        result = run_python(["-c", TICKING, str(path)])
        assert (result.returncode, result.stderr) == (0, "")
        sent = sqlite_execute(
            path, "SELECT body, sent_ms FROM message ORDER BY sent_ms"
        )
        assert len(sent) > 20
        next_ms = None
        for body, sent_ms in sent:
            data = json.loads(body)
            due_ms = Message(data).timestamp
            assert data["id"].endswith(data["metadata"]["timestamp"])
            assert due_ms == next_ms or next_ms is None
            next_ms = (sent_ms // 60_000 + 1) * 60_000
        [(due_ms,)] = sqlite_execute(path, "SELECT due_ms FROM schedule")
        assert due_ms == next_ms

    def test_while_it_works(self, tmp_path, runs):
        """A worker queues what becomes due while it runs, then runs it."""
        url = f"sqlite:///{tmp_path}/queue.db"
        taskhawk.configure(TASKHAWK_BROKER=url)
        late_s = 59.7 - time.time() % 60  # its next minute begins soon
        broker = taskhawk.SqliteBroker(url, clock=lambda: time.time() + late_s)
        queues = [broker.destination(Priority.high)]
        assert taskhawk.Worker(broker, queues, max_tasks=1).run().acked == 1
        assert len(runs) == 1
        broker.close()

    def test_fault(self, ticking, clock, tmp_path, caplog):
        """A fault is said once, and tried again; a file that was removed is made anew."""
        caplog.set_level(logging.INFO)
        ticker = self.ticker(ticking)
        ticker.look()
        ticking.close()
        (tmp_path / "queue.db").unlink()
        (tmp_path / "queue.db").mkdir()
        for _ in range(2):
            ticker.look()
            assert clock.now * 1000 < ticker._due_ms < (clock.now + 60) * 1000
        (tmp_path / "queue.db").rmdir()
        ticker.look()
        assert ticker._due_ms == (clock.now + 30) * 1000
        cant, can = caplog.messages
        where = f"sqlite:///{tmp_path}/queue.db"
        assert cant.startswith(
            f"{where}: can't queue periodic tasks, goes on trying: ConfigurationError("
        )
        assert can == f"{where}: can queue periodic tasks again; tries that failed: 2"

    @pytest.mark.parametrize(
        "expression",
        [
            "cron(0 9 L * ? *)",
            "cron(0 9 LW * ? *)",
            "cron(0 9 15W * ? *)",
            "cron(0 9 ? * FRIL *)",
            "cron(0 9 ? * 2#1 *)",
        ],
    )
    def test_foreign(self, worker_broker, tmp_path, expression):
        """What AWS alone understands is declared, but no worker on SQLite begins with it."""
        taskhawk._registry.clear()
        task = taskhawk.task(name="audit", schedule=expression)(plain)
        assert task.options["schedule"] == expression
        broker = taskhawk.SqliteBroker(f"sqlite:///{tmp_path}/queue.db")
        assert refused(taskhawk.Worker(broker, [WORKER_QUEUE]).run) == (
            f"audit has schedule={expression!r}: L, W and # are AWS's alone: expected"
            " numbers, lists, ranges and steps on SQLite"
        )
        broker.close()
        # On SQS it is Scheduler that sends: a worker has nothing to do with it.
        assert work_once(worker_broker, WORKER_QUEUE).received == 0

    @pytest.mark.parametrize(
        ("fifo", "options", "group"),
        [
            (False, {}, None),
            (True, {}, "task.count"),
            (True, {"group": "customer"}, "7"),
            (False, {"group": lambda customer=None: None}, None),
        ],
    )
    def test_group(self, tmp_path, clock, fifo, options, group):
        """Its message has the group that a dispatch would have; a FIFO queue needs one."""

        def count(customer=7):
            """Do nothing."""

        url = f"sqlite:///{tmp_path}/queue.db"
        taskhawk.configure(TASKHAWK_BROKER=url, TASKHAWK_FIFO=fifo)
        task = taskhawk.task(name="count", schedule=MINUTELY, **options)(count)
        broker = taskhawk.SqliteBroker(url, clock=clock)
        ticker = taskhawk._Ticker(broker, [task], threading.Event())
        ticker.look()
        clock.now += 60
        ticker.look()
        queue = broker.destination(Priority.default)
        (received,) = broker.receive(queue, 1, 0, 60, NEVER)
        assert received.group_id == group
        broker.close()

    def test_names(self):
        """A schedule's name tells the task; a name that can't be one is a hash."""
        names = ["audit", "ä", "x" * 60, "app.tasks.audit"]
        for name in names:
            taskhawk.task(name=name, schedule=MINUTELY)(another(name))
        tasks = taskhawk._periodic_tasks()
        for schedule, task in tasks.items():
            assert re.fullmatch(r"task\.[0-9a-zA-Z_.-]{1,59}", schedule)
            is_plain = task.name in ("audit", "app.tasks.audit")
            assert (schedule == f"task.{task.name}") is is_plain
        assert {task.name for task in tasks.values()} >= {*names}

    def test_list(self, sqlite, capsys):
        """The command lists them with the time when each is due next."""
        taskhawk._registry.clear()
        taskhawk.task(name="a", schedule="rate(1 day)", timezone="Europe/Berlin")(plain)
        taskhawk.task(name="b", schedule="cron(0 9 L * ? *)")(another("b"))
        taskhawk.task(name="c")(another("c"))
        day = datetime.now(UTC).date() + timedelta(days=1)
        assert taskhawk.main(["schedules"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            f"a  rate(1 day)  Europe/Berlin  {day}T00:00:00+00:00",
            "b  cron(0 9 L * ? *)  UTC  when AWS says",
        ]
        taskhawk.configure(TASKHAWK_QUEUE="app")
        assert taskhawk.main(["schedules", "--json"]) == 0
        (row, _) = json.loads(capsys.readouterr().out)
        assert row == {
            "task": "a",
            "priority": "default",
            "schedule": "rate(1 day)",
            "timezone": "Europe/Berlin",
            "next": None,
        }


# --- 23. Django's tasks ---------------------------------------------------------------

DJANGO_SITE = """
SECRET_KEY = "x"
USE_TZ = True
INSTALLED_APPS = ["shop"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "shop.db"}}
DATABASES["default"]["CONN_MAX_AGE"] = 0
HAWK = "taskhawk.DjangoBackend"
BROKER = {"TASKHAWK_BROKER": "sqlite://?max_receive_count=2"}
TASKS = {
    "default": {"BACKEND": HAWK, "QUEUES": ["default", "low"], "OPTIONS": BROKER},
    "any": {"BACKEND": HAWK, "QUEUES": [], "OPTIONS": {"isolate": True}},
    "later": {"BACKEND": HAWK, "OPTIONS": {"on_commit": True}},
    "immediate": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"},
}
"""
DJANGO_SHOP = """
import threading
import taskhawk
from asgiref.sync import sync_to_async
from django.db import connection
from django.tasks import TaskContext, task, task_backends

@task
def sell(what, count=1):
    print("sold", count, what)
    return count

@task(priority=1)
async def rush(what):
    print("rushed", what)
    return what

results = []

@task(takes_context=True)
def look(context, *args, metadata, **headers):
    result = context.task_result
    results.append(result)
    print(isinstance(context, TaskContext), context.attempt, result.status.name)
    print(args, metadata, headers, result.args, result.kwargs)
    print(result.enqueued_at <= result.started_at <= result.last_attempted_at)
    if context.attempt == 1:
        raise ValueError("look again")

@task
def fail():
    raise ZeroDivisionError("no stock")

@task
async def fail_late():
    raise ZeroDivisionError("no stock")

@task
def skip():
    raise taskhawk.IgnoreException("closed")

@task
async def count_rows():
    await sync_to_async(lambda: connection.ensure_connection())()
    print(await sync_to_async(lambda: connection.connection is not None)())

@task
def where():
    print(threading.current_thread() is threading.main_thread())

@task(backend="any")
def apart(): pass

@task(backend="later")
def later(what): pass

@task(backend="immediate")
def elsewhere(): print("ran elsewhere")

def declared(func, backend="default", **more):  # as the decorator does, from 6.1 on
    given = {"queue_name": "default", "priority": 0, "run_after": None, **more}
    made = task_backends[backend].task_class
    return made(func=func, backend=backend, **given)

def stubborn(): raise ValueError("again")

stubborn = declared(
    stubborn, "any", retry=taskhawk.fixed(5, max_retries=3), isolate=False
)
"""
DJANGO_ROWS_START = """
import asyncio, contextlib, json, logging, pathlib, pickle, sys, threading
from datetime import datetime, timedelta
import django
import taskhawk
assert "django.tasks" not in sys.modules
django.setup()
from django.conf import settings
from django.db import connection, transaction
from django.tasks import task, task_backends, signals
from asgiref.sync import async_to_sync, sync_to_async
from django.test.utils import override_settings
from django.utils import timezone
import shop.tasks
from shop.tasks import *

logging.disable()
backend = task_backends["default"]

def work():
    broker = taskhawk._brokers.broker()
    for priority in taskhawk.Priority:
        queue = broker.destination(priority)
        for received in broker.receive(queue, 10, 0, None, threading.Event()):
            outcome = taskhawk.process(received)
            print(priority.name, received.attempt, outcome.fate.name)
            if outcome.fate is taskhawk.Fate.retry:
                broker.change_visibility(queue, [(received.receipt_handle, 0)])
            else:
                broker.delete(queue, [received.receipt_handle])

def watch(name):
    def note(sender, task_result, **_):
        r = task_result
        assert sender is taskhawk.DjangoBackend
        value = r.return_value if r.status == "SUCCESSFUL" else None
        errors = [(error.exception_class.__name__) for error in r.errors]
        print(name, r.status.name, value, errors, r.attempts, r.is_finished)
    return note

def watched(call):
    watchers = [(getattr(signals, f"task_{name}"), watch(name))
                for name in ("enqueued", "started", "finished")]
    for signal, note in watchers:
        signal.connect(note)
    try:
        call()
    finally:
        for signal, note in watchers:
            signal.disconnect(note)

def tried(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")

def pickled(value): # which Django can from 6.1 on
    if django.VERSION < (6, 1):
        return value
    return pickle.loads(pickle.dumps(value))

def sent(task):
    with taskhawk.capture() as calls:
        task.enqueue(1)
    (call,) = calls
    return call

def with_tasks(**params):
    row = {"BACKEND": "taskhawk.DjangoBackend", **params}
    return override_settings(TASKS={"default": row})

for name, code in json.loads(pathlib.Path("rows.json").read_text()):
    print(f"\\0{name}")
    exec(code)
connection.close()
"""
#: what is done with Django's tasks, and what is printed
DJANGO_ROWS = {
    "flags": (
        """b = backend
print(b.supports_defer, b.supports_async_task, b.supports_priority)
print(b.supports_get_result)
tried(sell.get_result, "1")""",
        """True True True
False
NotImplementedError: This backend does not support retrieving or refreshing results.""",
    ),
    "the class": (
        """print(taskhawk.DjangoBackend is type(backend), type(backend).__module__)
print(hasattr(taskhawk, "DjangoBackends"), type(sell) is backend.task_class)
print("DjangoBackend" in taskhawk.__all__)""",
        "True taskhawk\nFalse True\nFalse",
    ),
    "enqueue": (
        """r = sell.enqueue("milk", count=2)
print(r.status.name, r.task is sell, r.args, r.kwargs, r.backend, r.attempts)
print(r.started_at, r.finished_at, r.errors, r.enqueued_at <= timezone.now())
print(r.is_finished, pickled(r) == r)
work()""",
        """READY True ['milk'] {'count': 2} default 0
None None [] True
False True
sold 2 milk
default 1 acknowledge""",
    ),
    "aenqueue": (
        """async def both():
    return await asyncio.gather(rush.aenqueue("milk"), sell.aenqueue("tea"))
watched(lambda: print([(r.args, r.enqueued_at.tzname()) for r in asyncio.run(both())]))
work()""",
        """enqueued READY None [] 0 False
enqueued READY None [] 0 False
[(['milk'], 'UTC'), (['tea'], 'UTC')]
sold 1 tea
default 1 acknowledge
rushed milk
high 1 acknowledge""",
    ),
    "aenqueue in Django's thread": (
        """with taskhawk.capture() as calls:
    with transaction.atomic():
        async_to_sync(later.aenqueue)("milk")
        print(len(calls))
    print(len(calls))
with override_settings(TASKHAWK_SYNC=True):
    async_to_sync(where.aenqueue)()""",
        "0\n1\nTrue",
    ),
    "the message": (
        """with taskhawk.capture() as calls:
    r = sell.enqueue(("milk", b"tea"), count={1: 2})
    look.enqueue(metadata=1)
print(r.id == calls[0].id, calls[0].task, calls[0].args, calls[0].kwargs)
print(calls[1].args, calls[1].kwargs)""",
        "True shop.tasks.sell [['milk', 'tea']] {'count': {'1': 2}}\n[] {'metadata': 1}",
    ),
    "wrong arguments": (
        """tried(sell.enqueue)
tried(sell.enqueue, "milk", metadata=1)
tried(sell.enqueue, datetime.now())
tried(look.enqueue, 1, 2)
work()""",
        """TypeError: shop.tasks.sell: missing a required argument: 'what'
TypeError: shop.tasks.sell: got an unexpected keyword argument 'metadata'
TypeError: Unsupported type: <class 'datetime.datetime'>
TypeError: shop.tasks.look: missing a required argument: 'metadata'""",
    ),
    "queues": (
        """for queue_name, priority in [
    ("default", 0), ("default", 100), ("default", 1), ("default", -1), ("low", 100)
]:
    print(sent(sell.using(queue_name=queue_name, priority=priority)).priority.name)
for name in ("default", "high", "low", "bulk"):
    print(sent(sell.using(backend="any", queue_name=name)).priority.name)
print(taskhawk.Task.find_by_name("shop.tasks.rush").priority.name)""",
        "default high high low low default high low bulk high".replace(" ", "\n"),
    ),
    "wrong queues and priorities": (
        """tried(sell.using, queue_name="bulk")
tried(sell.using, backend="any", queue_name="emails")
tried(sell.using, priority=101)
tried(sell.using, priority=1.5)
with with_tasks(QUEUES=["low"]):
    tried(sell.enqueue, "milk")""",
        """InvalidTask: Queue 'bulk' is not valid for backend.
InvalidTask: queue_name: expected one of default, high, low, bulk, got 'emails'
InvalidTask: priority must be a whole number between -100 and 100.
InvalidTask: priority must be a whole number between -100 and 100.
InvalidTask: Queue 'default' is not valid for backend.""",
    ),
    "run_after": (
        """soon = timedelta(minutes=2)
print(-(-sent(sell.using(run_after=timezone.now() + soon)).delay_s // 1))
print(sent(sell.using(run_after=timezone.now() - soon)).delay_s)
tried(sell.using, run_after=datetime.now())
with override_settings(USE_TZ=False):
    print(-(-sent(sell.using(run_after=datetime.now() + soon)).delay_s // 1))
    shop.tasks.sell.enqueue("naive")
    work()""",
        """120.0
0
InvalidTask: run_after must be an aware datetime.
120.0
sold 1 naive
default 1 acknowledge""",
    ),
    "context, and arguments of any name": (
        """look.enqueue(1, 2, metadata=3, headers=4, other=5)
work()
work()
print([(r.status.name, len(r.errors), r.worker_ids[:-1]) for r in results])""",
        """True 1 RUNNING
(1, 2) 3 {'headers': 4, 'other': 5} [1, 2] {'metadata': 3, 'headers': 4, 'other': 5}
True
default 1 retry
True 2 RUNNING
(1, 2) 3 {'headers': 4, 'other': 5} [1, 2] {'metadata': 3, 'headers': 4, 'other': 5}
True
default 2 acknowledge
[('READY', 1, []), ('SUCCESSFUL', 0, ['unknown'])]""",
    ),
    "signals": (
        """watched(lambda: sell.enqueue("milk"))
watched(work)""",
        """enqueued READY None [] 0 False
started RUNNING None [] 1 False
sold 1 milk
finished SUCCESSFUL 1 [] 1 True
default 1 acknowledge""",
    ),
    "signals of a coroutine": (
        """rush.enqueue("milk")
watched(work)""",
        """started RUNNING None [] 1 False
rushed milk
finished SUCCESSFUL milk [] 1 True
high 1 acknowledge""",
    ),
    "signals of failures": (
        """for task_ in (fail, fail_late):
    task_.enqueue()
    watched(work)
    watched(work)
    work()""",
        """started RUNNING None [] 1 False
default 1 retry
started RUNNING None [] 2 False
finished FAILED None ['ZeroDivisionError'] 2 True
default 2 dead_letter
"""
        * 2,
    ),
    "signals of what is ignored": (
        """skip.enqueue()
watched(work)""",
        """started RUNNING None [] 1 False
finished SUCCESSFUL None [] 1 True
default 1 acknowledge""",
    ),
    "sync mode": (
        """with override_settings(TASKHAWK_SYNC=True):
    watched(lambda: sell.enqueue("milk"))
    watched(lambda: tried(fail.enqueue))""",
        """started RUNNING None [] 1 False
sold 1 milk
finished SUCCESSFUL 1 [] 1 True
enqueued READY None [] 0 False
started RUNNING None [] 1 False
finished FAILED None ['ZeroDivisionError'] 1 True
ZeroDivisionError: no stock""",
    ),
    "in a transaction": (
        """with transaction.atomic():
    sell.enqueue("at once")
    work()""",
        "sold 1 at once\ndefault 1 acknowledge",
    ),
    "on commit": (
        """with taskhawk.capture() as calls:
    with transaction.atomic():
        r = later.enqueue("milk")
        print(len(calls), r.enqueued_at)
        tried(later.enqueue)
        with contextlib.suppress(taskhawk.MessageTooLarge):
            print(later.enqueue("x" * 2**21))
    print([call.args for call in calls], r.enqueued_at <= timezone.now())
    with contextlib.suppress(KeyError), transaction.atomic():
        watched(lambda: later.enqueue("tea"))
        raise KeyError
    later.enqueue("outside")
    print([call.args for call in calls])""",
        """0 None
TypeError: shop.tasks.later: missing a required argument: 'what'
[['milk']] True
[['milk'], ['outside']]""",
    ),
    "connections of a coroutine": (
        """count_rows.enqueue()
work()
print(asyncio.run(sync_to_async(lambda: connection.connection)()))""",
        "True\ndefault 1 acknowledge\nNone",
    ),
    "options of tasks": (
        """for name in ("sell", "apart", "stubborn"):
    found = taskhawk.Task.find_by_name(f"shop.tasks.{name}")
    print(found.isolate, found.retry and found.retry(1) > 0)
print(pickled(stubborn) == stubborn == stubborn.using())
if django.VERSION >= (6, 1):
    def once(): pass
    assert task(isolate=True, priority=2)(once) == declared(once, priority=2, isolate=True)""",
        "False None\nTrue None\nFalse True\nTrue",
    ),
    "wrong options of tasks": (
        """def once(): pass
def twice(): pass
once.__module__ = twice.__module__ = "rows"
tried(declared, once, time_limit=-1)
with contextlib.suppress(TypeError):
    declared(once, no_option=5)
declared(once, time_limit=5)
declared(once, time_limit=5, priority=1)
tried(declared, once, time_limit=6)
taskhawk.task(name="rows.twice")(twice)
tried(declared, twice)""",
        """InvalidTask: once has time_limit=-1: expected a number of seconds above 0
InvalidTask: rows.once: the name of rows.once (<string>:1) is taken by rows.once \
(<string>:1): rename one, or pass name= to @taskhawk.task
InvalidTask: rows.twice: the name of rows.twice (<string>:2) is taken by rows.twice \
(<string>:2): rename one, or pass name= to @taskhawk.task""",
    ),
    "other backends": (
        """elsewhere.enqueue()
sell.using(backend="immediate").enqueue("here")
print("shop.tasks.elsewhere" in taskhawk._registry)
elsewhere.using(backend="default").enqueue()
work()""",
        """ran elsewhere
sold 1 here
False
ran elsewhere
default 1 acknowledge""",
    ),
    "checks": (
        """def check(**params):
    with with_tasks(**params):
        for error in task_backends["default"].check():
            print(error.id, error.level, error.msg)
        def fresh(): pass
        fresh.__qualname__ = "fresh"
        tried(task, fresh)
check()
check(QUEUES=["emails"])
check(OPTIONS={"on_comit": True})
check(OPTIONS={"TASKHAWK_QUEUE": "a b"})
shop.tasks.Special = type("Special", (taskhawk.DjangoBackend,), {})
check(BACKEND="shop.tasks.Special", OPTIONS={"isolate": True, "TASKHAWK_QUEUE": "a"})""",
        """taskhawk.E001 40 TASKS['default']: QUEUES: expected one of default, high, low, \
bulk, got 'emails'
InvalidTask: Queue 'default' is not valid for backend.
taskhawk.E001 40 TASKS['default']: OPTIONS: expected on_commit, settings of taskhawk \
or options of taskhawk.task, got 'on_comit'
InvalidTask: TASKS['default']: OPTIONS: expected on_commit, settings of taskhawk \
or options of taskhawk.task, got 'on_comit'
taskhawk.E001 40 TASKHAWK_QUEUE in OPTIONS of Django's TASKS: expected at most 53 \
letters, digits, hyphens and underscores, such as 'dev-myapp', got 'a b'
taskhawk.E001 40 TASKS['default']: OPTIONS: TASKHAWK_QUEUE is not read for a subclass
InvalidTask: TASKS['default']: OPTIONS: TASKHAWK_QUEUE is not read for a subclass""",
    ),
    "settings": (
        """print(taskhawk.settings.TASKHAWK_BROKER)
with with_tasks(OPTIONS={"TASKHAWK_QUEUE": "one"}):
    print(taskhawk.settings.TASKHAWK_BROKER, taskhawk.settings.TASKHAWK_QUEUE)
    with override_settings(TASKHAWK_QUEUE="two"):
        print(taskhawk.settings.TASKHAWK_QUEUE)
rows = {name: {"BACKEND": "taskhawk.DjangoBackend"} for name in "ab"}
rows["a"]["OPTIONS"] = {"TASKHAWK_QUEUE": "one", "isolate": True}
rows["b"]["OPTIONS"] = {"TASKHAWK_QUEUE": "two", "isolate": False}
with override_settings(TASKS=rows):
    tried(lambda: taskhawk.settings.TASKHAWK_QUEUE)""",
        """sqlite://?max_receive_count=2
sqs one
two
ConfigurationError: TASKHAWK_QUEUE in OPTIONS of Django's TASKS: expected the same \
value for each backend of taskhawk, got two""",
    ),
}


@pytest.fixture(scope="module")
def django_printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what each row prints; they share one process, which takes its time to start."""
    folder = tmp_path_factory.mktemp("django")
    (folder / "site_settings.py").write_text(DJANGO_SITE)
    (folder / "shop").mkdir()
    (folder / "shop" / "tasks.py").write_text(DJANGO_SHOP)
    rows = [(name, code) for name, (code, _) in DJANGO_ROWS.items()]
    (folder / "rows.json").write_text(json.dumps(rows))
    lines = python_lines(
        folder, DJANGO_ROWS_START, DJANGO_SETTINGS_MODULE="site_settings"
    )
    parts = [part.partition("\n") for part in "\n".join([*lines, ""]).split("\0")[1:]]
    return {name: printed for name, _, printed in parts}


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Django 6 needs Python 3.12")
class TestDjangoTasks:
    """Django's own API queues, and tells by its signals what came of it."""

    @pytest.mark.parametrize("row", DJANGO_ROWS)
    def test_rows(self, row, django_printed):
        """Each row prints what Django's documentation, or ours, says."""
        assert django_printed[row].rstrip() == DJANGO_ROWS[row][1].rstrip()

    @pytest.mark.slow
    def test_project(self, tmp_path):
        """`listen` without a module runs the tasks of a project, isolated ones too.

        `manage.py check` fails with what is wrong in TASKS.
        """
        (tmp_path / "shop").mkdir()
        (tmp_path / "shop" / "tasks.py").write_text(DJANGO_SHOP)
        site = DJANGO_SITE.replace("sqlite://?", "sqlite:///queue.db?")
        (tmp_path / "site_settings.py").write_text(site)
        code = """
            import asyncio, django
            django.setup()
            from shop.tasks import *
            sell.enqueue("milk")
            asyncio.run(rush.aenqueue("tea"))
            sell.using(backend="any", queue_name="low").enqueue("bread", 2)
            apart.enqueue()
        """
        env = {"DJANGO_SETTINGS_MODULE": "site_settings"}
        assert python_lines(tmp_path, code, **env) == []
        queues = [f"--priority={priority.name}" for priority in Priority]
        listen = ["-m", "taskhawk", "listen", "--until-empty", *queues]
        result = run_python(listen, cwd=tmp_path, env=env)
        assert result.returncode == 0, result.stderr
        *ran, ledger = result.stdout.splitlines()
        assert sorted(ran) == ["rushed tea", "sold 1 milk", "sold 2 bread"]
        assert ledger.startswith("4 received, 4 acked, ")
        (tmp_path / "site_settings.py").write_text(site.replace("isolate", "isolated"))
        check = "from django.core.management import *; import django.tasks"
        check += "; execute_from_command_line(['manage.py', 'check'])"
        result = run_python(check, cwd=tmp_path, env=env)
        assert result.returncode == 1
        assert "(taskhawk.E001) TASKS['any']: OPTIONS: expected" in result.stderr


def test_no_django_tasks(tmp_path):
    """Without Django, or with one that is too old, there is no such class."""
    code = """
        import sys
        sys.modules["django.tasks"] = None # its import fails
        import taskhawk
        from taskhawk import *
        print(hasattr(taskhawk, "DjangoBackend"), hasattr(taskhawk, "Nonsense"))
        try:
            taskhawk.DjangoBackend
        except AttributeError as error:
            print(error)
    """
    assert python_lines(tmp_path, code) == [
        "False False",
        "DjangoBackend needs Django 6.0 or newer",
    ]


# === PART VI: PEOPLE ==================================================================


# --- 24. dead letters -----------------------------------------------------------------

GONE = f"{NO_QUEUE} (NonExistentQueue: The specified queue does not exist.)"
REFUSED = ["InternalError"] * 2
COPIED = "copied, but not deleted: "
NOT_DELETED = [f"{COPIED}InternalError"] * 2
ERROR_RECORD = {
    "type": "ValueError",
    "message": "no amount\nat all",
    "traceback": "Traceback\nValueError: no amount\n",
    "attempt": 3,
    "worker": "host:1",
    "time": "2026-11-21T00:00:00Z",
}


def fault_after(code: str) -> AwsAnswer:
    """Do what is asked, and answer that it failed: as a lost answer, without its timeout."""
    return lambda call: (call.forward(), fault(code)(call))[1]


def put_dead_letters(broker: taskhawk.Broker, count: int, *args: Any) -> str:
    """Send so many messages to the dead letters, and return the name of that queue."""
    queue = f"{broker.destination(Priority.default)}-DLQ"
    for number in range(count):
        assert (
            broker.send(queue, [Outgoing(processing_body(args=[number, *args]), {})])
            == []
        )
    return queue


def bring_dead_letters(aws: ScriptedAws, count: int, receipts: Iterator[str]) -> None:
    """Let each receive bring the same dead letter, of as many as the queue says it has."""
    attributes = aws.default("GetQueueAttributes", {})["Attributes"]
    arn = "arn:aws:sqs:us-east-1:1:letters"
    policy = {"deadLetterTargetArn": arn, "maxReceiveCount": 5}
    attributes["RedrivePolicy"] = json.dumps(policy)
    attributes["ApproximateNumberOfMessages"] = str(count)
    aws.always("GetQueueAttributes", {"Attributes": attributes})

    def receive(call: AwsCall) -> AwsAnswer:
        letter = {"MessageId": "m", "ReceiptHandle": next(receipts), "Body": "{}"}
        return {"Messages": [letter]}

    aws.always("ReceiveMessage", receive)


class TestDeadLetters:
    """Dead letters go back to their queues without one being lost."""

    def test_requeue_of_no_priority(self, sqlite):
        """What is no Priority is refused."""
        assert refused(taskhawk.requeue_dead_letter, "default") == (
            "priority: expected a taskhawk.Priority, got 'default'"
        )

    def test_requeue(self, broker):
        """They go back to the queue of their priority as they were, without our attributes."""
        header = {"n": {"DataType": "String", "StringValue": "é"}}
        value = {"DataType": "String", "StringValue": "3"}
        names = ("taskhawk.error", "taskhawk.attempts", "taskhawk.postponed")
        ours = dict.fromkeys(names, value)
        queue = broker.destination(Priority.high)
        broker.send(
            f"{queue}-DLQ", [Outgoing(processing_body(args=[1]), {**ours, **header})]
        )
        assert taskhawk.requeue_dead_letter(Priority.high) == 1
        (received,) = receive_all(Priority.high)
        assert json.loads(received.body)["args"] == [1]
        assert list(received.message_attributes) == ["n"]
        assert received.message_attributes["n"]["StringValue"] == "é"
        assert receive_all() == []
        assert broker.depth(f"{queue}-DLQ") == Depth(0, 0, 0)

    @pytest.mark.parametrize(
        "place", [pytest.param("ministack", marks=pytest.mark.slow), "sqlite"]
    )
    def test_fifo(  # noqa: PLR0917 - fixtures
        self, request, place, sqs_client, queue_name, capsys, caplog, tmp_path
    ):
        """Of a FIFO queue, they go back in the order and group that they had.

        A copy is deduplicated by what it is a copy of: its own id was sent before. What
        waits behind those that are looked at can't be seen, and that is said.
        """
        taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{tmp_path}/queue.db")
        if place == "ministack":
            endpoint = request.getfixturevalue("ministack")
            make_queue(sqs_client(endpoint), f"TASKHAWK-{queue_name}.fifo")
            configure_aws(endpoint, queue_name)
        taskhawk.configure(taskhawk.settings.given, TASKHAWK_FIFO=True)
        broker = taskhawk._brokers.broker()
        queue = broker.destination(Priority.default)
        dead = taskhawk._dead_letter_name(queue)
        letters = [
            Outgoing(processing_body(args=[n]), {}, 0, "g", f"{n}") for n in range(12)
        ]
        for letter in letters:
            broker.send(dead, [letter])
        assert taskhawk.main(["dead-letters", "list", "--json"]) == 0
        seen, warnings = 12, []
        if place == "ministack":
            seen = 10
            warnings = [f"{dead}: about 2 more wait behind these, in their groups"]
        assert capsys.readouterr().out.count("\n") == seen
        assert caplog.messages == warnings
        assert taskhawk.requeue_dead_letter(Priority.default) == 12
        found = []
        while messages := broker.receive(queue, 1, 0, 60, NEVER):
            found += [(json.loads(m.body)["args"], m.group_id) for m in messages]
            broker.delete(queue, [m.receipt_handle for m in messages])
        assert found == [([number], "g") for number in range(12)]

    @pytest.mark.parametrize("num_messages", [1, 4, 10, 1000])
    def test_requeue_many(self, sqlite, caplog, num_messages):
        """Any number is received at once, up to ten, and the progress is logged."""
        caplog.set_level(logging.INFO, "taskhawk")
        source = put_dead_letters(sqlite, 12)
        assert taskhawk.requeue_dead_letter(Priority.default, num_messages) == 12
        assert sorted(received_args()) == list(range(12))
        at_once = min(num_messages, 10)
        done = [min(n, 12) for n in range(at_once, 12 + at_once, at_once)]
        assert caplog.messages == [
            f"requeueing about 12 messages from {source}",
            *(f"requeued {n} of 12 messages, 0 failed" for n in done),
        ]

    def test_visibility_timeout(self, scripted):
        """The copies are made in the queue's own visibility timeout, or in the one given."""
        for timeout in ({"visibility_timeout": 7}, {}):
            put_dead_letters(taskhawk._brokers.broker(), 1)
            taskhawk.requeue_dead_letter(Priority.default, **timeout)
        polls = scripted.asked("ReceiveMessage")
        assert [poll.get("VisibilityTimeout") for poll in polls] == [7, None]

    def test_in_circles(self, scripted):
        """Messages that fail again and come back are not sent in circles: it ends."""
        source = put_dead_letters(taskhawk._brokers.broker(), 5)

        def comes_back(call: AwsCall) -> None:
            call.forward(QueueUrl=f"{call.data['QueueUrl']}-DLQ")

        scripted.always("SendMessage", comes_back)
        scripted.always("SendMessageBatch", comes_back)
        assert taskhawk.requeue_dead_letter(Priority.default, num_messages=2) == 5
        assert sorted(received_args()) == list(range(5))
        assert sorted(received_args(source)) == list(range(5))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("there", "counted", "moved"), [(4, 9, 4), (4, 2, 2), (4, 0, 1), (0, 0, 0)]
    )
    def test_approximate(self, scripted, there, counted, moved):
        """SQS counts approximately: an empty receive ends it too, and no messages are one."""
        put_dead_letters(taskhawk._brokers.broker(), there)

        def count(call: AwsCall) -> AwsAnswer:
            names = call.data["AttributeNames"]
            if "RedrivePolicy" in names:
                return None
            return {"Attributes": dict.fromkeys(names, str(counted))}

        scripted.always("GetQueueAttributes", count)
        assert taskhawk.requeue_dead_letter(Priority.default) == moved
        assert len(received_args()) == moved

    def test_comes_back(self, aws):
        """One whose lease ends during the scan is sent back once, and shown again."""
        receipts = (f"r{number}" for number in itertools.count())
        bring_dead_letters(aws, 3, receipts)
        assert taskhawk.requeue_dead_letter(Priority.default) == 1
        assert len(aws.asked("SendMessage")) == 1
        (deletes,) = aws.asked("DeleteMessageBatch")
        assert [entry["ReceiptHandle"] for entry in deletes["Entries"]] == ["r0"]
        (shown,) = aws.asked("ChangeMessageVisibilityBatch")
        assert [entry["ReceiptHandle"] for entry in shown["Entries"]] == ["r1"]

    def test_large(self, scripted):
        """Ten dead letters of 300 KB, which are received at once, are sent three at a time."""
        put_dead_letters(taskhawk._brokers.broker(), 10, "x" * 300_000)
        scripted.calls.clear()
        assert taskhawk.requeue_dead_letter(Priority.default) == 10
        assert scripted.batches == [3, 3, 3, 1]

    def test_binary(self, scripted):
        """What another publisher sent stays what it was, in body, types and bytes."""
        attributes = {
            "b": {"DataType": "Binary.png", "BinaryValue": b"\x89"},
            "n": {"DataType": "Number", "StringValue": "1"},
        }
        broker = taskhawk._brokers.broker()
        source = f"{broker.destination(Priority.default)}-DLQ"
        broker.send(source, [Outgoing("not even JSON", attributes)])
        assert taskhawk.requeue_dead_letter(Priority.default) == 1
        (received,) = receive_all()
        assert received.message_attributes == attributes
        assert received.body == "not even JSON"

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("action", "answers", "counts", "failed"),
        [
            # sending is refused: by fault of the message, of the service once, and always
            ("Send", [refuse(1, 2, ours=True)], (10, 2), REFUSED),
            ("Send", [refuse(1, 2), passed], (12, 0), []),
            ("Send", [refuse(1, 2), *[refuse(0, 1)] * 2], (10, 2), REFUSED),
            # the call failed with no effect, after it, and while it was tried again
            ("Send", [fault("Odd")] * 6, (0, 12), ["Odd"] * 12),
            ("Send", [fault_after("Odd")] * 2, (12, 12), ["Odd"] * 12),
            ("Send", [refuse(1, 2), fault("Odd")], (10, 2), ["Odd"] * 2),
            # deleting is refused, or the call failed
            ("Delete", [refuse(1, 2), passed], (12, 0), []),
            ("Delete", [refuse(0, 3), *[refuse(0, 1)] * 2], (12, 2), NOT_DELETED),
            ("Delete", [fault("Odd")] * 6, (12, 12), [f"{COPIED}Odd"] * 12),
            ("Delete", [fault_after("Odd")] * 3, (12, 0), [f"{COPIED}Odd"] * 10),
        ],
    )
    def test_faults(self, scripted, action, answers, counts, failed):
        """A dead letter is deleted once its copy is confirmed, or stays; the counts are exact."""
        broker = taskhawk._brokers.broker()
        source = put_dead_letters(broker, 12)
        scripted.script(f"{action}MessageBatch", *answers)
        if failed:
            with pytest.raises(taskhawk.PartialFailure) as raised:
                taskhawk.requeue_dead_letter(Priority.default)
            result = raised.value.result
            assert [entry["Code"] for entry in result["Failed"]] == failed
            entries = result["Successful"] + result["Failed"]
            assert len({uuid.UUID(entry["Id"]) for entry in entries}) == 12
            text = f"{len(failed)} of 12 messages failed: {failed[0]}"
            assert str(raised.value) == text
        else:
            assert taskhawk.requeue_dead_letter(Priority.default) == 12
        depth = broker.depth(source)
        assert (len(set(received_args())), depth.visible + depth.in_flight) == counts

    @pytest.mark.parametrize(("step", "moved"), [("INSERT", []), ("DELETE", [0, 1])])
    def test_sqlite_faults(self, tmp_path, step, moved):
        """On SQLite, where a transaction fails, nothing is lost either."""
        path = tmp_path / "queue.db"
        taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{path}")
        broker = taskhawk._brokers.broker()
        source = put_dead_letters(broker, 2)
        with contextlib.closing(sqlite3.connect(path)) as db:
            full = "SELECT RAISE(ABORT, 'disk full')"
            db.execute(f"CREATE TRIGGER t BEFORE {step} ON message BEGIN {full}; END")
            with pytest.raises(taskhawk.PartialFailure) as raised:
                taskhawk.requeue_dead_letter(Priority.default)
            db.execute("DROP TRIGGER t")
        assert (raised.value.success_count, raised.value.failure_count) == (0, 2)
        assert received_args() == moved
        assert broker.depth(source) == Depth(2, 0, 0)

    def test_receive_fails(self, scripted):
        """Where a receive fails midway, what was sent back until then stays so."""
        source = put_dead_letters(taskhawk._brokers.broker(), 12)
        scripted.script("ReceiveMessage", passed, fault("AccessDenied", status=403))
        error = refused(taskhawk.requeue_dead_letter, Priority.default)
        denied = DENIED.format("ReceiveMessage")
        assert error == f"{source}: {denied} (AccessDenied: no)"
        assert len(received_args()) == 10
        assert len(received_args(source)) == 2

    @pytest.mark.parametrize("number", [0, -1])
    def test_num_messages(self, sqlite, number):
        """To receive none at once is refused, as by listen_for_messages."""
        error = refused(taskhawk.requeue_dead_letter, Priority.default, number)
        assert error == f"num_messages: expected 1 or more, got {number}"

    def test_no_queue(self, ministack, sqs_client, queue_name):
        """Without the queue, its RedrivePolicy or its dead-letter queue, the error says so."""
        client, queue = sqs_client(ministack), f"TASKHAWK-{queue_name}"

        def error() -> str:
            configure_aws(ministack, queue_name)
            return refused(taskhawk.requeue_dead_letter, Priority.default)

        assert error() == f"{queue}: {GONE}"
        url = client.create_queue(QueueName=queue)["QueueUrl"]
        assert error() == f"{queue}: it has no dead-letter queue (no RedrivePolicy)"
        client.delete_queue(QueueUrl=url)
        make_queue(client, queue)
        url = client.get_queue_url(QueueName=f"{queue}-DLQ")["QueueUrl"]
        client.delete_queue(QueueUrl=url)
        assert error() == f"{queue}-DLQ: {GONE}"

    def test_lambda_app(self, scripted, queue_name, caplog):
        """For a Lambda app there is nothing to do, and a warning says so."""
        configure_aws(scripted.url, queue_name, IS_LAMBDA_APP=True)
        assert taskhawk.requeue_dead_letter(Priority.default) == 0
        assert scripted.actions == []
        assert caplog.messages == [
            "requeue_dead_letter: not supported for Lambda apps, whose queues are Lambda's"
        ]

    def test_circle(self, broker):
        """A message whose task gives up goes to the dead letters, comes back, and runs."""
        broken = [True]
        ran: list[Any] = []

        @taskhawk.task(name="mail.circle", never_retry_on=(ZeroDivisionError,))
        def circle(number, headers):
            if broken:
                raise ZeroDivisionError("é" + "\0\ud800")
            ran.append((number, headers))

        circle.with_headers(n="5").dispatch(7)
        assert work_once(broker) == taskhawk.Ledger(received=1, dead_lettered=1)
        queue = broker.destination(Priority.default)
        assert broker.depth(queue) == Depth(0, 0, 0)
        assert broker.depth(f"{queue}-DLQ") == Depth(1, 0, 0)
        broken.clear()
        assert taskhawk.requeue_dead_letter(Priority.default) == 1
        assert work_once(broker) == taskhawk.Ledger(received=1, acked=1)
        assert ran == [(7, {"n": "5"})]


class Letters:
    """Three dead letters, one that a worker gave up, one that the queue moved, an invalid one."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.broker = taskhawk._brokers.broker()
        self.queue = self.broker.destination(Priority.default)
        self.ids = [str(uuid.uuid4()) for _ in range(2)]
        self.put({"headers": {"n": "0"}, "id": self.ids[0]}, ERROR_RECORD)
        self.put({"headers": {"n": "1"}, "id": self.ids[1], "task": "other.task"}, [])
        self.broker.send(f"{self.queue}-DLQ", [Outgoing("rubbish", {})])

    def put(self, changes: dict[str, Any], error: Any = None) -> None:
        """Put one more there."""
        body = json.dumps({**json.loads(processing_body(args=[0])), **changes})
        recorded = {"DataType": "String", "StringValue": json.dumps(error)}
        self.broker.send(
            f"{self.queue}-DLQ", [Outgoing(body, {"taskhawk.error": recorded})]
        )

    def __call__(self, *arguments: str, code: int = 0) -> list[str]:
        """Run a command, and return its lines."""
        assert taskhawk.main(["dead-letters", *arguments]) == code
        return self.capsys.readouterr().out.splitlines()

    def age(self, seconds: int) -> None:
        """Have those that are in the file been sent so long ago."""
        path = taskhawk.settings.TASKHAWK_BROKER.removeprefix("sqlite:///")
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE message SET sent_ms = sent_ms - ?", [seconds * 1000])

    def depths(self) -> tuple[int, Depth]:
        """Return how many are visible in the queue, and the depth of the dead letters."""
        visible = self.broker.depth(self.queue).visible
        return visible, self.broker.depth(f"{self.queue}-DLQ")


@pytest.fixture
def every_letters(
    broker: taskhawk.Broker, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Letters:
    """Return three dead letters on each of the brokers."""
    if isinstance(broker, taskhawk.SqliteBroker):
        # The memory of a process is no queue of commands.
        taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{tmp_path}/queue.db")
    return Letters(capsys)


@pytest.fixture
def letters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Letters:
    """Return three dead letters in a file."""
    taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{tmp_path}/queue.db")
    return Letters(capsys)


class TestDeadLettersFromPython:
    """A loop over the dead letters deals with each, and leaves the others as they were."""

    def test_undelivered(self, broker, mail):
        """What Scheduler could not deliver says why, and goes back without that."""
        message = Message.new("mail.send", ["late"])
        said = {
            "ERROR_CODE": "AWS.SimpleQueueService.NonExistentQueue",
            "ERROR_MESSAGE": "no such queue",
            "SCHEDULE_ARN": "arn:aws:scheduler:us-east-1:000000000000:schedule/g/n",
            "own": "5",
        }
        attributes = {
            name: {"DataType": "String", "StringValue": text}
            for name, text in said.items()
        }
        queue = broker.destination(Priority.default)
        copy = Outgoing(json.dumps(message.as_dict()), attributes)
        assert broker.send(f"{queue}-DLQ", [copy]) == []
        for letter in taskhawk.dead_letters(Priority.default):
            assert letter.error == (
                "AWS.SimpleQueueService.NonExistentQueue: no such queue"
            )
            letter.requeue()
        (received,) = receive_all()
        assert [*received.message_attributes] == ["own"]

    def test_what_is_known(self, every_letters):
        """Each says what it is and why it is there; they stay, visible again at once."""
        found = {each.task: each for each in taskhawk.dead_letters(Priority.default)}
        assert every_letters.depths() == (0, Depth(3, 0, 0))
        given_up, moved, invalid = map(found.get, ("mail.send", "other.task", None))
        assert (given_up.id, given_up.message.args) == (every_letters.ids[0], [0])
        assert given_up.message.headers == {"n": "0"}
        assert given_up.error == given_up.cause == "ValueError: no amount\nat all"
        assert given_up.traceback == ERROR_RECORD["traceback"]
        assert given_up.record == ERROR_RECORD
        assert given_up.received.body.startswith("{")
        assert given_up.age_s in range(60)
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", given_up.sent)
        assert (moved.error, moved.traceback, moved.record) == ("", "", None)
        assert moved.cause == "moved by the queue itself, after too many receives"
        assert (invalid.message, invalid.id) == (None, None)
        assert invalid.cause == invalid.invalid == "message: not JSON at character 0"

    @pytest.mark.parametrize(
        ("filters", "found"),
        [
            ({}, [None, "mail.send", "other.task"]),
            ({"task": "mail.*"}, ["mail.send"]),
            ({"error": "no amount"}, ["mail.send"]),
            ({"error": "moved by"}, ["other.task"]),
            ({"error": "not JSON"}, [None]),
            ({"header": {"n": 1}}, ["other.task"]),
            ({"header": {"n": "1"}, "task": "mail.*"}, []),
            ({"older_than_s": 3600}, []),
            ({"newer_than_s": 3600, "task": "*.*"}, ["mail.send", "other.task"]),
        ],
    )
    def test_filters(self, letters, filters, found):
        """Filters together say which are meant."""
        meant = taskhawk.dead_letters(Priority.default, **filters)
        assert sorted((each.task for each in meant), key=str) == sorted(found, key=str)

    def test_acts(self, every_letters):
        """Each is sent back, deleted or left, as the loop's body decides."""
        for letter in taskhawk.dead_letters(Priority.default):
            if letter.message is None:
                letter.delete()
            elif letter.task == "mail.send":
                letter.requeue()
        assert every_letters.depths() == (1, Depth(1, 0, 0))
        [received] = receive_all()
        assert json.loads(received.body)["id"] == every_letters.ids[0]
        assert "taskhawk.error" not in received.message_attributes

    def test_purge(self, letters):
        """A loop with an age deletes the old ones."""
        letters.age(3600)
        letters.put({"task": "new.task"})
        for letter in taskhawk.dead_letters(Priority.default, older_than_s=3600):
            letter.delete()
        assert letters.depths() == (0, Depth(1, 0, 0))

    @pytest.mark.parametrize("error", [None, KeyError])
    def test_ends_early(self, every_letters, error):
        """After a break or an exception, all that the loop left are visible again."""
        with contextlib.suppress(KeyError):
            for letter in taskhawk.dead_letters(Priority.default):
                letter.delete()
                if error:
                    raise error
                break
        assert every_letters.depths() == (0, Depth(2, 0, 0))

    @pytest.mark.parametrize("act", ["requeue", "delete"])
    @pytest.mark.parametrize("before", ["requeue", "delete", "end"])
    def test_too_late(self, letters, act, before):
        """Once it was dealt with, or its loop has ended, a letter can't be moved."""
        loop = taskhawk.dead_letters(Priority.default, task="mail.send")
        with contextlib.closing(loop):
            letter = next(loop)
            if before == "end":
                loop.close()
            else:
                getattr(letter, before)()
            depths = letters.depths()
            assert refused(getattr(letter, act), error=taskhawk.TaskhawkError) == (
                f"dead letter {letter.message_id}: it was sent back or deleted before,"
                " or its loop has ended"
            )
            assert letters.depths() == depths

    def test_no_priority(self, letters):
        """What is wrong is said by the call, not by the loop."""
        error = refused(taskhawk.dead_letters, "default")
        assert error == "priority: expected a taskhawk.Priority, got 'default'"

    def test_no_queue(self, ministack, sqs_client, queue_name):
        """So is that there is no dead-letter queue."""
        sqs_client(ministack).create_queue(QueueName=f"TASKHAWK-{queue_name}")
        configure_aws(ministack, queue_name)
        assert refused(taskhawk.dead_letters, Priority.default) == (
            f"TASKHAWK-{queue_name}: it has no dead-letter queue (no RedrivePolicy)"
        )

    @pytest.mark.parametrize(
        ("action", "answers", "codes"),
        [
            ("SendMessage", [fault("Odd")], ["Odd"]),
            (
                "DeleteMessageBatch",
                [fault("Odd")] * 3,
                ["copied, but not deleted: Odd"],
            ),
        ],
    )
    def test_faults(self, scripted, capsys, action, answers, codes):
        """What could not be sent or deleted is said at once, and can be tried again."""
        letters = Letters(capsys)
        scripted.script(action, *answers)
        for letter in taskhawk.dead_letters(Priority.default, task="mail.send"):
            with pytest.raises(taskhawk.PartialFailure) as raised:
                letter.requeue()
            assert [each["Code"] for each in raised.value.result["Failed"]] == codes
            letter.requeue()
        copies = 1 if action == "SendMessage" else 2
        assert letters.depths() == (copies, Depth(2, 0, 0))

    def test_requests(self, scripted, capsys):
        """A loop costs one receive for ten, and a send and a delete for each that goes."""
        Letters(capsys)
        scripted.calls.clear()
        for letter in taskhawk.dead_letters(Priority.default):
            letter.requeue()
        counts = collections.Counter(scripted.actions)
        assert (counts["ReceiveMessage"], counts["SendMessage"]) == (1, 3)
        assert counts["DeleteMessageBatch"] == 3


class TestDeadLetterCommands:
    """Dead letters are looked at where they are, and leave when they are told to."""

    def test_list(self, every_letters):
        """Each is a line with its error; they stay, and are visible again at once."""
        lines = every_letters("list")
        about = sorted(re.sub(r"\d+ s ago", "AGE", line[38:]) for line in lines)
        assert about == [
            "None  AGE  message: not JSON at character 0",
            "mail.send  AGE  ValueError: no amount",
            "other.task  AGE  moved by the queue itself, after too many receives",
        ]
        ids = {line.partition("  ")[0] for line in lines}
        assert ids.issuperset(every_letters.ids)
        assert every_letters.depths() == (0, Depth(3, 0, 0))

    @pytest.mark.parametrize(
        ("arguments", "found"),
        [
            ("--task mail.*", [0]),
            ("--task mail", []),
            ("--error ValueError:", [0]),
            ("--header n=1", [1]),
            ("--header tenant=None", []),
            ("--header n=1 --task mail.send", []),
            ("--older-than 1h", []),
            ("--newer-than 1.5h --task *.*", [0, 1]),
            ("--limit 0", []),
            ("--id ID", [0]),
            ("--error moved", [1]),
        ],
    )
    def test_filters(self, letters, arguments, found):
        """Filters together say which are meant."""
        words = arguments.replace("ID", letters.ids[0]).split()
        shown = [json.loads(line) for line in letters("list", "--json", *words)]
        assert {letter["id"] for letter in shown} == {letters.ids[n] for n in found}

    def test_limit(self, letters):
        """A limit counts those that match, whichever they are."""
        assert len(letters("list", "--limit", "1", "--task", "*.*")) == 1

    def test_json(self, letters):
        """For programs, each is an object with all that is known of it."""
        (line,) = letters("list", "--json", "--task", "mail.send")
        letter = json.loads(line)
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
            "error": ERROR_RECORD,
            "invalid": None,
        }

    def test_show(self, letters):
        """One is shown with its arguments and its traceback."""
        lines = letters("show", letters.ids[0])
        assert {
            f"id: {letters.ids[0]}",
            "args: [0]",
            "error: ValueError: no amount",
            "error traceback: Traceback",
            "error attempt: 3",
            "error worker: host:1",
        } <= set(lines)
        (line,) = letters("show", letters.ids[0], "--json")
        assert json.loads(line)["args"] == [0]

    def test_show_poison(self, letters):
        """One that is not valid is shown with its body, escaped."""
        source = f"{letters.queue}-DLQ"
        letters.broker.send(source, [Outgoing("é\x1b[2J\n{", {})])
        found = [json.loads(line) for line in letters("list", "--json")]
        name = found[-1]["message_id"]
        lines = letters("show", name)
        assert "invalid: message: not JSON at character 0" in lines
        assert r"body: '\xe9\x1b[2J\n{'" in lines

    def test_summary(self, every_letters, capsys):
        """They are counted by task and error, with the commands that deal with each group."""
        letters = every_letters
        letters.put({}, ERROR_RECORD | {"message": "no amount\neither"})
        letters.put({}, ERROR_RECORD | {"type": "KeyError", "message": "'a b'"})
        lines = letters("summary", "--task", "*.*")
        assert lines[-1] == "4 dead letters"
        times = r"    from 20\d\d-\d\d-\d\dT[\d:]{8}Z to 20\d\d-\d\d-\d\dT[\d:]{8}Z"
        assert [line for line in lines[:-1] if not re.fullmatch(times, line)][:5] == [
            "2  mail.send  ValueError",
            "    the newest: ValueError: no amount",
            "    python -m taskhawk dead-letters list --error 'ValueError: ' --task mail.send",
            "    python -m taskhawk dead-letters requeue --error 'ValueError: ' --task mail.send",
            "",
        ]
        groups = json.loads("\n".join(letters("summary", "--json")))
        assert {
            (group["task"], group["error"], group["count"]) for group in groups
        } == {
            ("mail.send", "ValueError", 2),
            ("mail.send", "KeyError", 1),
            ("other.task", "moved by the queue itself, after too many receives", 1),
            (None, "message: not JSON at character 0", 1),
        }
        for group in groups:
            assert group["oldest"] <= group["newest"]
            words = shlex.split(group["list"])[4:]
            assert len(letters(*words)) == group["count"]
        assert letters.depths() == (0, Depth(5, 0, 0))
        for group in groups:
            words = shlex.split(group["requeue"])[4:]
            assert letters(*words) == [f"sent back: {group['count']}"]

    def test_summary_in_any_order(self):
        """The example is the newest one's, in whichever order they are received."""
        ages = {f"{hour:02}": hour * 3_600_000 for hour in range(3)}
        for order in itertools.permutations(ages):
            found = []
            for hour in order:
                sent = {"SentTimestamp": str(ages[hour])}
                record = json.dumps({"type": "E", "message": hour})
                error = {"taskhawk.error": {"StringValue": record}}
                received = taskhawk.QueueMessage("", hour, None, sent, error)
                found.append(taskhawk._read_dead_letter(None, received))
            group = taskhawk._Group(found[0])
            for letter in found[1:]:
                group.add(letter)
            assert (group.count, group.example) == (3, "E: 02")
            assert group.oldest == "1970-01-01T00:00:00Z"
            assert group.newest == "1970-01-01T02:00:00Z"

    def test_summary_keeps_filters(self, letters):
        """The commands of a group have the summary's own filters too."""
        letters.put({"task": "odd[1]*", "headers": {"n": "a b"}})
        letters.age(100)
        words = ["--header", "n=a b", "--older-than", "1.5m", "--newer-than", "20d"]
        words += ["--priority", "default", "--module", "json"]
        [group] = json.loads("\n".join(letters("summary", "--json", *words)))
        error = "'moved by the queue itself, after too many receives'"
        assert group["list"] == (
            f"python -m taskhawk dead-letters list --error {error} --task 'odd[[]1][*]'"
            " --header 'n=a b' --older-than 90s --newer-than 1728000s --module json"
        )
        assert len(letters(*shlex.split(group["list"])[4:])) == 1

    def test_summary_of_a_priority(self, tmp_path, capsys):
        """They name the queue, if it is not the default one."""
        taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{tmp_path}/queue.db")
        broker = taskhawk._brokers.broker()
        queue = broker.destination(Priority.bulk)
        broker.send(f"{queue}-DLQ", [Outgoing(processing_body(), {})])
        assert taskhawk.main(["dead-letters", "summary", "--priority", "bulk"]) == 0
        assert " --task mail.send --priority bulk\n" in capsys.readouterr().out

    def test_export(self, letters):
        """An exported one has body and attributes as they are."""
        (line,) = letters("export", "--task", "mail.send")
        exported = json.loads(line)
        assert json.loads(exported["body"])["args"] == [0]
        assert exported["attributes"]["taskhawk.error"]["DataType"] == "String"
        assert letters.depths() == (0, Depth(3, 0, 0))

    def test_requeue(self, every_letters):
        """Only those that are meant go back; --dry-run shows which."""
        letters = every_letters
        (line,) = letters("requeue", "--header", "n=1", "--dry-run")
        assert line.startswith(letters.ids[1])
        assert letters.depths() == (0, Depth(3, 0, 0))
        assert letters("requeue", "--header", "n=1") == ["sent back: 1"]
        assert letters.depths() == (1, Depth(2, 0, 0))
        assert letters("requeue", "--task", "nothing") == ["sent back: 0"]
        assert letters("requeue") == ["sent back: 2"]
        assert letters.depths() == (3, Depth(0, 0, 0))

    def test_delete(self, every_letters):
        """Only those that are meant are deleted; --dry-run shows which."""
        letters = every_letters
        assert len(letters("delete", "--error", "no amount", "--dry-run")) == 1
        assert letters("delete", "--error", "no amount") == ["deleted: 1"]
        assert letters.depths() == (0, Depth(2, 0, 0))
        assert letters("delete", "--all") == ["deleted: 2"]
        assert letters.depths() == (0, Depth(0, 0, 0))

    def test_needs_a_filter(self, letters, capsys):
        """A delete wants a filter, or --all, which has no abbreviation."""
        assert command_error(capsys, "dead-letters", "delete") == (
            2,
            "taskhawk: delete: expected a filter, or --all for every one",
        )
        assert command_error(capsys, "dead-letters", "delete", "--a")[0] == 2
        assert letters.depths() == (0, Depth(3, 0, 0))

    @pytest.mark.parametrize("command", ["list", "show", "requeue", "delete"])
    def test_unknown_id(self, letters, capsys, command):
        """An id that no dead letter has is an error, and the others are dealt with."""
        option = [] if command == "show" else ["--id"]
        words = ["dead-letters", command, *option, letters.ids[1], *option, "nope"]
        assert taskhawk.main(words) == 1
        output, errors = capsys.readouterr()
        assert letters.ids[1] in output or output.endswith(": 1\n")
        line = "taskhawk: no dead letter that fits the filters has this id: nope"
        assert errors.splitlines()[-1] == line

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("arguments", "answer", "deleted"),
        [
            ("--all", "n", 0),
            ("--id ID --id OTHER", "", 0),
            ("--newer-than 1h", "yes", 3),
            ("--all --yes", None, 3),
            ("--error ValueError --limit 1", None, 1),
            ("--id ID", None, 1),
        ],
    )
    def test_asks(self, letters, tmp_path, arguments, answer, deleted):
        """In a terminal, a delete of what may be more than one asks first."""
        words = arguments.replace("ID", letters.ids[0]).split()
        count = words.count("--id") or 3
        env = {"TASKHAWK_BROKER": taskhawk.settings.TASKHAWK_BROKER}
        with in_terminal(tmp_path, env, "dead-letters", "delete", *words) as run:
            if answer is not None:
                which = f"dead letters of {letters.queue}-DLQ"
                if words != ["--all"]:
                    which += " that fit the filters"
                run.wait_for(f"delete up to {count} {which} for good? [y/N] ")
                run.type(f"{answer}\n")
            assert run.end() == 0
        assert f"deleted: {deleted}\r\n" in run.shown
        assert letters.depths()[1] == Depth(3 - deleted, 0, 0)

    @pytest.mark.slow
    @pytest.mark.parametrize(("answer", "sent"), [("n", 0), ("y", 3)])
    def test_asks_before_requeueing(self, letters, tmp_path, answer, sent):
        """In a terminal, it says how many may be sent back, and asks."""
        env = {"TASKHAWK_BROKER": taskhawk.settings.TASKHAWK_BROKER}
        with in_terminal(tmp_path, env, "dead-letters", "requeue") as run:
            which = f"dead letters of {letters.queue}-DLQ"
            run.wait_for(f"requeue up to 3 {which}? [y/N] ")
            run.type(f"{answer}\n")
            assert run.end() == 0
        assert f"sent back: {sent}\r\n" in run.shown
        assert letters.depths() == (sent, Depth(3 - sent, 0, 0))

    @pytest.mark.slow
    def test_progress(self, letters, tmp_path):
        """In a terminal, the progress is one line that is rewritten, and cleared at the end."""
        env = {"TASKHAWK_BROKER": taskhawk.settings.TASKHAWK_BROKER}
        with in_terminal(tmp_path, env, "dead-letters", "requeue", "--yes") as run:
            assert run.end() == 0
        assert run.shown == (
            f"\r\x1b[Krequeueing about 3 messages from {letters.queue}-DLQ"
            "\r\x1b[Krequeued 3 of 3 messages, 0 failed"
            "\r\x1b[Ksent back: 3\r\n"
        )

    @pytest.mark.parametrize(
        ("task", "shown"),
        [("\x1b[2Jevil", "?[2Jevil"), ("forged\nline", "forged?line")],
    )
    def test_hostile(self, letters, task, shown):
        """What a message says does not command the terminal."""
        letters.put({"task": task})
        (line,) = letters("list", "--task", task)
        assert f"  {shown}  " in line

    def test_clock_behind(self):
        """A dead letter of a clock that is ahead of ours has no age."""
        sent_ms = {"SentTimestamp": str(round((time.time() + 5) * 1000))}
        received = taskhawk.QueueMessage("", "m1", attributes=sent_ms)
        assert taskhawk._read_dead_letter(None, received).age_s == 0

    def test_interrupted(self, every_letters, caplog):
        """Whatever ends it, what was looked at is visible again, and nothing is lost."""
        caplog.set_level(logging.INFO, "taskhawk")

        def look() -> None:
            with taskhawk._Scan(Priority.default, "looking", "looked at") as scan:
                for _ in scan.pages():
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            look()
        assert every_letters.depths() == (0, Depth(3, 0, 0))
        text = "stopped: up to 10 more messages may have been looked at"
        assert caplog.messages[-1] == text

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_signal(self, number):
        """SIGTERM and the end of a terminal interrupt, as Ctrl-C does; others' handlers stay."""
        before = signal.signal(number, signal.SIG_DFL)
        try:
            with pytest.raises(KeyboardInterrupt), taskhawk._interruptible():
                os.kill(os.getpid(), number)
            assert signal.signal(number, signal.SIG_IGN) == signal.SIG_DFL
            with taskhawk._interruptible():
                assert signal.getsignal(number) == signal.SIG_IGN
        finally:
            signal.signal(number, before)

    def test_in_a_thread(self, letters):
        """Out of the main thread, where no handler can be set, the commands work too."""
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert pool.submit(letters, "requeue").result(30) == ["sent back: 3"]

    def test_memory(self, letters):
        """A letter is let go of once it was looked at: a thousand of a megabyte may follow."""
        looked_at = []
        scan = taskhawk._Scan(Priority.default, "looking", "looked at", num_messages=1)
        with scan:
            for batch in scan.pages():
                looked_at += [weakref.ref(letter.received) for letter in batch]
                del batch
                alive = [ref for ref in looked_at if ref()]
                assert len(alive) == 1
        assert len(looked_at) == 3

    def test_not_deleted(self, scripted, capsys):
        """What can't be deleted is still there, and the exit code says so."""
        letters = Letters(capsys)
        scripted.always("DeleteMessageBatch", fault("AccessDenied", status=403))
        assert taskhawk.main(["dead-letters", "delete", "--task", "mail.send"]) == 1
        line = "taskhawk: 1 of 1 messages failed: AccessDenied"
        assert capsys.readouterr().err.splitlines()[-1] == line
        assert letters.depths()[1] == Depth(3, 0, 0)

    def test_stay_hidden(self, scripted, capsys, caplog):
        """Where they can't be shown again, the log says how many stay hidden for a while."""
        letters = Letters(capsys)
        scripted.always("ChangeMessageVisibilityBatch", fault("AccessDenied"))
        assert len(letters("list")) == 3
        denied = DENIED.format("ChangeMessageVisibility")
        hidden = "3 of 3 dead letters looked at stay hidden for a while"
        error = f"{letters.queue}-DLQ: {denied} (AccessDenied: no)"
        assert caplog.messages == [f"{hidden}: {error}"]


# --- 25. infrastructure ---------------------------------------------------------------


class Terminal:
    """A command that runs in a terminal, and what it has shown."""

    def __init__(self, leader: int, process: "subprocess.Popen[bytes]") -> None:
        self.leader, self.process, self.shown = leader, process, ""

    def wait_for(self, text: str, count: int = 1) -> None:
        """Wait until a text was shown so often."""
        deadline = time.monotonic() + WORKER_PATIENCE_S
        while self.shown.count(text) < count:
            assert time.monotonic() < deadline, self.shown
            self.read()

    def read(self) -> bool:
        """Read what was shown meanwhile; return whether there may be more."""
        if select.select([self.leader], [], [], 0.1)[0]:
            try:
                self.shown += os.read(self.leader, 10_000).decode()
            except OSError:  # nobody has the terminal any more
                return False
        return True

    def type(self, text: str) -> None:
        """Type a text."""
        os.write(self.leader, text.encode())

    def end(self) -> int:
        """Wait until the command ends, and return its exit code."""
        deadline = time.monotonic() + WORKER_PATIENCE_S
        while self.read():
            assert time.monotonic() < deadline, self.shown
        return self.process.wait(WORKER_PATIENCE_S)


@contextlib.contextmanager
def in_terminal(
    folder: Path, env: Mapping[str, str], *arguments: str
) -> Iterator[Terminal]:
    """Run a command in a terminal of its own; it is killed at the end of the block."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "taskhawk", *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=python_env(env),
        cwd=folder,
        start_new_session=True,
    )
    os.close(follower)
    try:
        yield Terminal(leader, process)
    finally:
        process.kill()
        process.wait()
        os.close(leader)


class TestStats:
    """How many messages there are, in each state, of each priority."""

    def test_json(self, broker, mail, capsys):
        """As JSON, a queue that is not there is null."""
        mail.dispatch()
        mail.with_delay(60).dispatch()
        broker.send(f"{broker.destination(Priority.high)}-DLQ", [Outgoing("x", {})])
        assert taskhawk.main(["stats", "--json"]) == 0
        names = ("visible", "in_flight", "delayed", "dead_letters")
        empty = {**dict.fromkeys(names, 0), "paused": False}
        missing = empty if isinstance(broker, taskhawk.SqliteBroker) else None
        assert json.loads(capsys.readouterr().out) == {
            "high": empty | {"dead_letters": 1},
            "default": empty | {"visible": 1, "delayed": 1},
            "low": missing,
            "bulk": missing,
        }

    def test_text(self, sqs_client, ministack, queue_name, capsys):
        """As text, it is a table; a queue without dead letters says so."""
        sqs_client(ministack).create_queue(QueueName=f"TASKHAWK-{queue_name}")
        configure_aws(ministack, queue_name)
        assert taskhawk.main(["stats"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "          visible  in flight  delayed  dead letters",
            "high      no queue or access",
            "default         0          0        0   none/denied",
            "low       no queue or access",
            "bulk      no queue or access",
        ]

    def test_no_queue(self, ministack, queue_name, capsys):
        """Where there is no queue at all, such as for a mistyped name, it is an error."""
        configure_aws(ministack, queue_name)
        sentence = f"taskhawk: TASKHAWK-{queue_name}: {GONE}"
        assert command_error(capsys, "stats") == (2, sentence)

    def test_denied(self, scripted, capsys):
        """What is not allowed is an error, not a queue that is not there."""
        scripted.always("GetQueueAttributes", fault("AccessDenied", status=403))
        code, line = command_error(capsys, "stats")
        assert code == 2
        assert "does not allow GetQueueAttributes" in line

    def test_denied_for_some(self, scripted, capsys):
        """Where one may look at some of the queues alone, these are counted."""

        def deny_others(call: AwsCall) -> AwsAnswer:
            other = re.search("PRIORITY|BULK", call.data["QueueName"])
            return fault("AccessDenied", status=403)(call) if other else None

        scripted.always("GetQueueUrl", deny_others)
        assert taskhawk.main(["stats", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [name for name, counts in found.items() if counts] == ["default"]

    def test_bars(self, monkeypatch):
        """In a terminal there are bars, to scale; dead letters are red unless NO_COLOR is set."""
        counts = {
            "high": taskhawk._Counts(60, 20, 0, dead_letters=2),
            "low": taskhawk._Counts(1, 0, 4, dead_letters=0),
        }
        lines = list(taskhawk._table(counts, {"high": -5}, in_color=True))
        assert lines[1:] == [
            (
                "high           60         20        0\x1b[31m             2\x1b[0m"
                f"    -5.0/s  {'█' * 12}{'▓' * 4}"
            ),
            "low             1          0        4             0  █░",
        ]
        assert len(lines[1].replace("\x1b[31m", "").replace("\x1b[0m", "")) <= 80
        monkeypatch.setenv("NO_COLOR", "1")
        assert "\x1b" not in "".join(taskhawk._table(counts, {}, in_color=True))
        assert "█" not in "".join(taskhawk._table(counts, {}, in_color=False))

    @pytest.mark.slow
    def test_watch(self, tmp_path):
        """Watched in a terminal, it is drawn again and again, with the trend, until Ctrl-C."""
        env = {"TASKHAWK_BROKER": f"sqlite:///{tmp_path}/queue.db"}
        with in_terminal(tmp_path, env, "stats", "--watch", "--interval=0.1") as run:
            run.wait_for("\x1b[2J", 3)
            run.process.send_signal(signal.SIGINT)
            assert run.end() == 0
        assert "+0.0/s" in run.shown
        assert run.shown.endswith("\r\x1b[K")  # where the terminal wrote ^C
        assert max(map(len, run.shown.splitlines())) <= 80

    @pytest.mark.slow
    def test_watch_fault(self, aws, capsys, caplog):
        """Watching goes on after a fault; a queue that is not there has no trend."""

        def interrupt(call: AwsCall) -> None:
            os.kill(os.getpid(), signal.SIGINT)

        def all_but_bulk(call: AwsCall) -> AwsAnswer:
            is_bulk = call.data["QueueName"].endswith("BULK")
            return fault("QueueDoesNotExist")(call) if is_bulk else None

        aws.always("GetQueueUrl", all_but_bulk)
        looks = [None] * 12  # of three queues, for their depth and their settings
        expired = fault("ExpiredToken", status=403)
        aws.script("GetQueueAttributes", *looks, expired, *looks, interrupt)
        assert taskhawk.main(["stats", "--watch", "--interval=0.1"]) == 0
        shown = capsys.readouterr().out
        assert shown.count("default") >= 2
        assert "+0.0/s" in shown
        (line,) = caplog.messages
        assert line.startswith("can't count: An error occurred (ExpiredToken)")


def configure_account(
    client: Callable[..., Any], endpoint: str, queue: str, **values: Any
) -> str:
    """Configure what an emulator needs for provisioning, and return its account."""
    configure_aws(endpoint, queue)
    account = client(endpoint, "sts").get_caller_identity()["Account"]
    taskhawk.configure(taskhawk.settings.given, AWS_ACCOUNT_ID=account, **values)
    return account


def attributes_of(client: Any, queue: str) -> dict[str, Any]:
    """Return the attributes of a queue, and its tags."""
    url = client.get_queue_url(QueueName=queue)["QueueUrl"]
    found = client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])
    return found["Attributes"] | client.list_queue_tags(QueueUrl=url)


def set_attributes(client: Any, queue: str, **attributes: str) -> None:
    """Set attributes of a queue."""
    url = client.get_queue_url(QueueName=queue)["QueueUrl"]
    client.set_queue_attributes(QueueUrl=url, Attributes=attributes)


def provision(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Run the command, and return its lines."""
    assert taskhawk.main(["provision", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def provision_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Run the command, and return what it printed as JSON."""
    return json.loads("\n".join(provision(capsys, *arguments)))


class TestProvision:
    """Queues, dead-letter queues and topics: made, raised, or written down for review."""

    def test_queues(self, endpoint, sqs_client, queue_name, capsys):
        """All are made; the second time there is nothing to do."""
        configure_account(sqs_client, endpoint, queue_name)
        suffixes = ("-HIGH-PRIORITY", "", "-LOW-PRIORITY", "-BULK")
        names = [f"TASKHAWK-{queue_name}{suffix}" for suffix in suffixes]
        queues = [f"{name}{dlq}" for name in names for dlq in ("-DLQ", "")]
        would = [f"queue {queue}: would be made" for queue in queues]
        assert provision(capsys, "--dry-run") == would
        assert provision(capsys) == [f"queue {queue}: made" for queue in queues]
        as_it_should_be = [f"queue {queue}: is as it should be" for queue in queues]
        assert provision(capsys) == as_it_should_be
        client = sqs_client(endpoint)
        for name in names:
            found = attributes_of(client, name)
            dead = attributes_of(client, f"{name}-DLQ")
            assert found["MessageRetentionPeriod"] == str(4 * 86_400)
            assert dead["MessageRetentionPeriod"] == str(14 * 86_400)
            policy = json.loads(found["RedrivePolicy"])
            assert policy["deadLetterTargetArn"] == dead["QueueArn"]
            assert int(policy["maxReceiveCount"]) == 5
            assert found["Tags"] == dead["Tags"] == {"taskhawk": queue_name}

    def test_fifo(self, ministack, sqs_client, queue_name, capsys):
        """FIFO queues are made as such, in high throughput mode, and nothing is wrong then.

        What someone has changed of that mode stays.
        """
        account = configure_account(
            sqs_client, ministack, queue_name, TASKHAWK_FIFO=True
        )
        name, only = f"TASKHAWK-{queue_name}", "--priority=default"
        names = [f"{name}-DLQ.fifo", f"{name}.fifo"]
        assert provision(capsys, only) == [f"queue {queue}: made" for queue in names]
        client = sqs_client(ministack)
        for queue in names:
            found = attributes_of(client, queue)
            assert found["FifoQueue"] == found["ContentBasedDeduplication"] == "true"
            assert found["DeduplicationScope"] == "messageGroup"
            assert found["FifoThroughputLimit"] == "perMessageGroupId"
        policy = json.loads(found["RedrivePolicy"])
        arn = f"arn:aws:sqs:us-east-1:{account}:{name}"
        assert policy["deadLetterTargetArn"] == f"{arn}-DLQ.fifo"
        url = client.get_queue_url(QueueName=names[1])["QueueUrl"]
        limit = {"FifoThroughputLimit": "perQueue"}
        client.set_queue_attributes(QueueUrl=url, Attributes=limit)
        as_it_should_be = [f"queue {queue}: is as it should be" for queue in names]
        assert provision(capsys, only) == as_it_should_be
        assert check(capsys, only) == (0, ["nothing is wrong"])
        taskhawk._brokers.broker().send(f"{name}.fifo", grouped("a1 a2 b1"))
        assert taskhawk.main(["stats", "--json"]) == 0
        counts = json.loads(capsys.readouterr().out)["default"]
        assert (counts["visible"], counts["dead_letters"]) == (3, 0)

    def test_fifo_described(self, queue_name, aws, capsys):
        """Terraform and IAM know FIFO queues and their dead-letter queues, too."""
        taskhawk.configure(taskhawk.settings.given, TASKHAWK_FIFO=True)
        only = "--priority=default"
        queues = provision_json(capsys, only, "--format=terraform")["resource"]
        queues = queues["aws_sqs_queue"]
        assert list(queues) == ["taskhawk_app_dlq_fifo", "taskhawk_app_fifo"]
        for queue in queues.values():
            assert queue["fifo_queue"] is queue["content_based_deduplication"] is True
            assert queue["deduplication_scope"] == "messageGroup"
            assert queue["fifo_throughput_limit"] == "perMessageGroupId"
        redrive = json.loads(queues["taskhawk_app_fifo"]["redrive_policy"])
        reference = "${aws_sqs_queue.taskhawk_app_dlq_fifo.arn}"
        assert redrive["deadLetterTargetArn"] == reference
        roles = provision_json(capsys, only, "--format=iam")
        arn = "arn:aws:sqs:us-east-1:000000000000:TASKHAWK-APP"
        queue, dead = roles["worker"]["Statement"]
        assert (queue["Resource"], dead["Resource"]) == (
            [f"{arn}.fifo"],
            [f"{arn}-DLQ.fifo"],
        )

    def test_raises(self, endpoint, sqs_client, queue_name, capsys):
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
        only = "--priority=default"
        for would_be, option in (("would be ", ["--dry-run"]), ("", [])):
            assert provision(capsys, only, *option) == [
                f"queue {queue}: {would_be}{change}"
                for queue, change in changes.items()
            ]
        assert attributes_of(client, name)["MessageRetentionPeriod"] == "864000"
        (_, line) = provision(capsys, only, "--max-receive-count", "8")
        assert '"maxReceiveCount": 8' in line
        assert provision(capsys, only)[1] == f"queue {name}: is as it should be"
        policy = json.loads(attributes_of(client, name)["RedrivePolicy"])
        assert int(policy["maxReceiveCount"]) == 8
        assert policy["deadLetterTargetArn"] == arn

    def test_terraform(self, ministack, sqs_client, queue_name, capsys):
        """Terraform's description is, attribute by attribute, what the API was told."""
        configure_aws(ministack, queue_name)
        queues = provision_json(capsys, "--format", "terraform")["resource"]
        queues = queues["aws_sqs_queue"]
        assert len(queues) == 8
        provision(capsys)
        client = sqs_client(ministack)
        for queue in queues.values():
            found = attributes_of(client, queue["name"])
            kept_s = str(queue["message_retention_seconds"])
            assert found["MessageRetentionPeriod"] == kept_s
            assert found["MaximumMessageSize"] == str(queue["max_message_size"])
            assert queue["max_message_size"] == 1_048_576
            assert found["Tags"] == queue["tags"]
            ours = json.loads(queue.get("redrive_policy", "{}"))
            theirs = json.loads(found.get("RedrivePolicy", "{}"))
            if reference := ours.get("deadLetterTargetArn"):
                label = re.fullmatch(r"\$\{aws_sqs_queue\.(\w+)\.arn\}", reference)[1]
                target = attributes_of(client, queues[label]["name"])
                ours["deadLetterTargetArn"] = target["QueueArn"]
                theirs["maxReceiveCount"] = int(theirs["maxReceiveCount"])
            assert ours == theirs

    def test_iam(self, ministack, queue_name, capsys):
        """The policies allow each role what it needs, on what it needs it for."""
        configure_aws(ministack, queue_name)
        roles = provision_json(capsys, "--format=iam", "--priority=default")
        assert set(roles) == {"publisher", "worker", "lambda", "operator"}
        arn = f"arn:aws:sqs:us-east-1:000000000000:TASKHAWK-{queue_name}"
        send = ["sqs:SendMessage", "sqs:GetQueueUrl"]
        statement = {"Effect": "Allow", "Action": send, "Resource": [arn]}
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        assert roles["publisher"] == policy
        queue, dead = roles["worker"]["Statement"]
        assert (queue["Resource"], dead["Resource"]) == ([arn], [f"{arn}-DLQ"])
        assert "sqs:ChangeMessageVisibility" in queue["Action"]
        assert dead["Action"] == send
        taskhawk.task(name="mail.send", max_queue_size=9)(nothing)
        roles = provision_json(capsys, "--format=iam", "--priority=default")
        look = {**statement, "Action": ["sqs:GetQueueAttributes"]}
        assert roles["publisher"] == {**policy, "Statement": [statement, look]}

    def test_topics(self, endpoint, sqs_client, queue_name, capsys):
        """A Lambda app has topics, and functions subscribe to them."""
        account = configure_account(
            sqs_client, endpoint, queue_name, IS_LAMBDA_APP=True
        )
        topic = f"taskhawk-{queue_name.lower()}"
        function = f"arn:aws:lambda:us-east-1:{account}:function:app"
        only = ("--priority=default", "--lambda", function)
        for would_be, option in (("would be ", ["--dry-run"]), ("", [])):
            assert provision(capsys, *only, *option) == [
                f"topic {topic}: {would_be}made",
                f"subscription {topic}: {would_be}made for {function}",
            ]
        assert provision(capsys, *only) == [
            f"topic {topic}: is as it should be",
            f"subscription {topic}: is as it should be",
        ]
        described = provision_json(capsys, *only, "--format=terraform")["resource"]
        label = topic.replace("-", "_")
        arn = f"${{aws_sns_topic.{label}.arn}}"
        subscription = {"topic_arn": arn, "protocol": "lambda", "endpoint": function}
        assert described["aws_sns_topic_subscription"][label] == subscription
        assert described["aws_lambda_permission"][label] == {
            "action": "lambda:InvokeFunction",
            "principal": "sns.amazonaws.com",
            "function_name": function,
            "source_arn": arn,
        }
        roles = provision_json(capsys, *only, "--format=iam")
        arn = f"arn:aws:sns:us-east-1:{account}:{topic}"
        (statement,) = roles["publisher"]["Statement"]
        assert (statement["Action"], statement["Resource"]) == (["sns:Publish"], [arn])
        assert list(roles) == ["publisher", "operator"]
        assert check(capsys) == (0, ["nothing is wrong"])

    def test_sqlite(self, tmp_path, capsys):
        """On SQLite it makes the file."""
        url = f"sqlite:///{tmp_path}/queue.db"
        taskhawk.configure(TASKHAWK_BROKER=url)
        would = f"would be made, unless it is there: {url}"
        assert provision(capsys, "--dry-run") == [would]
        assert not (tmp_path / "queue.db").exists()
        assert provision(capsys) == [f"ready: {url}"]
        assert (tmp_path / "queue.db").exists()

    @pytest.mark.parametrize(
        ("values", "options", "sentence"),
        [
            ({}, "--lambda arn", "--lambda: expected IS_LAMBDA_APP to be set"),
            (
                {"TASKHAWK_BROKER": "sqlite://"},
                "--format iam",
                "--format: expected TASKHAWK_BROKER to be sqs",
            ),
            (
                {"AWS_ACCOUNT_ID": None},
                "",
                (
                    "AWS_ACCOUNT_ID is not set: expected an account id of twelve digits,"
                    " such as '123456789012', from taskhawk.configure(), the module named by"
                    " SETTINGS_MODULE, Django's settings or the environment"
                ),
            ),
        ],
    )
    def test_refused(self, aws, capsys, values, options, sentence):
        """What SQS would refuse, or nobody would use, is refused before anything is made."""
        taskhawk.configure(dict(taskhawk.settings.given) | values)
        line = f"taskhawk: {sentence}"
        assert command_error(capsys, "provision", *options.split()) == (2, line)
        assert aws.actions == []

    def test_denied(self, aws, capsys):
        """What is not allowed is one sentence."""
        aws.always("GetQueueAttributes", fault("AccessDenied", status=403))
        denied = DENIED.format("GetQueueAttributes")
        assert command_error(capsys, "provision", "--priority=default") == (
            2,
            f"taskhawk: TASKHAWK-APP-DLQ: {denied} (AccessDenied: no)",
        )


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """Run the command, and return its exit code and lines."""
    code = taskhawk.main(["check", *arguments])
    return code, capsys.readouterr().out.splitlines()


WRONG_SETTINGS = """
TASKHAWK_QUEUE=
    TASKHAWK_QUEUE is not set: no queue has a name; without AWS, try
    TASKHAWK_BROKER=sqlite:///queue.db. Fix: export TASKHAWK_QUEUE=dev-myapp
TASKHAWK_QUEUE=my app
    TASKHAWK_QUEUE in configure(): expected at most 53 letters, digits, hyphens and
    underscores, such as 'dev-myapp', got 'my app': what uses it fails. Fix: as the
    error says
IS_LAMBDA_APP=maybe
    IS_LAMBDA_APP in configure(): expected true or false, such as 'False', got 'maybe':
    what uses it fails. Fix: as the error says
TASKHAWK_SYNC=maybe
    TASKHAWK_SYNC in configure(): expected true or false, such as 'False', got 'maybe':
    what uses it fails. Fix: as the error says
TASKHAWK_ERROR_HOOK=nowhere.hook
    TASKHAWK_ERROR_HOOK in configure(): expected a function or its dotted path, such as
    'myapp.hooks.report_error', got 'nowhere.hook' (No module named 'nowhere'): what
    uses it fails. Fix: as the error says
AWS_REGION=
    TASKHAWK-APP: no AWS region: set AWS_REGION, for example eu-west-1 (NoRegionError:
    You must specify a region.): the rest can't be checked. Fix: as the error says
AWS_ACCESS_KEY=,AWS_SECRET_KEY=
    TASKHAWK-APP: no AWS credentials: set AWS_ACCESS_KEY and AWS_SECRET_KEY, or give
    botocore a profile or role; to try things out without AWS, set TASKHAWK_BROKER to
    sqlite:///queue.db (NoCredentialsError: Unable to locate credentials): the rest
    can't be checked. Fix: as the error says
"""


FINDINGS = """
warning
    {name}: its visibility timeout of 30 s is below slow's limit of 60 s: where no
    worker extends it, such as in Lambda, the task runs twice at once. Fix: set
    VisibilityTimeout above 60 s
error
    {name}: its maxReceiveCount of 2 is not above quick's 2 retries: the queue gives up
    before the task's policy does. Fix: python -m taskhawk provision
    --max-receive-count 4
error
    {name}: its maxReceiveCount of 2 is not above slow's 2 retries: the queue gives up
    before the task's policy does. Fix: python -m taskhawk provision
    --max-receive-count 4
warning
    {name}: its maxReceiveCount is 2: a few crashes or releases make a dead letter of a
    good message. Fix: python -m taskhawk provision --max-receive-count 5
warning
    {name}-DLQ: it keeps messages for 86400 s, and {name} for 86400 s: the time counts
    from the first sending: a dead letter may expire at once. Fix: python -m taskhawk
    provision
warning
    {name}: it takes messages of at most 262144 bytes: SQS takes 1 MiB, and larger ones
    are refused at dispatch. Fix: python -m taskhawk provision
"""


class TestDashboard:
    """A dashboard and alarms of CloudWatch are written down, to be put or by Terraform."""

    def test_queues(self, moto, sqs_client, queue_name, capsys):
        """A chart shows each metric, and each queue has its alarms; CloudWatch takes them."""
        account = configure_account(sqs_client, moto, queue_name)
        name = f"TASKHAWK-{queue_name}"
        topic = f"arn:aws:sns:us-east-1:{account}:pager"
        options = ["--max-age=10m", "--max-backlog=50", f"--notify={topic}"]
        found = provision_json(
            capsys, "--format=dashboard", "--priority=default", *options
        )
        client = sqs_client(moto, "cloudwatch")
        dashboard = found["put-dashboard"]
        assert client.put_dashboard(**dashboard)["DashboardValidationMessages"] == []
        assert dashboard["DashboardName"] == f"taskhawk-{queue_name}"
        widgets = json.loads(dashboard["DashboardBody"])["widgets"]
        assert [(each["x"], each["y"]) for each in widgets] == [
            (0, 0),
            (6, 0),
            (12, 0),
            (18, 0),
        ]
        shown = [each["properties"] for each in widgets]
        assert {each["region"] for each in shown} == {"us-east-1"}
        assert shown[0]["title"] == f"{name}-DLQ: dead letters"
        visible = "ApproximateNumberOfMessagesVisible"
        dead = ["AWS/SQS", visible, "QueueName", f"{name}-DLQ"]
        assert shown[0]["metrics"] == [dead]
        assert [len(each["metrics"]) for each in shown] == [1, 3, 1, 2]
        alarms = found["put-metric-alarm"]
        for alarm in alarms:
            client.put_metric_alarm(**alarm)
        made = client.describe_alarms()["MetricAlarms"]
        ours = [each for each in made if each["AlarmName"].startswith(name)]
        limits = {each["AlarmName"]: each["Threshold"] for each in ours}
        assert limits == {
            f"{name}-DLQ-not-empty": 0,
            f"{name}-too-old": 600,
            f"{name}-backlog": 50,
        }
        for alarm in ours:
            assert alarm["AlarmActions"] == [topic]
            assert alarm["ComparisonOperator"] == "GreaterThanThreshold"
        assert alarms[0]["AlarmDescription"] == (
            f"{name}-DLQ: there are dead letters: python -m taskhawk dead-letters summary"
        )

    def test_workers(self, aws, capsys):
        """With the namespace of their metrics, what workers print is shown too."""
        found = provision_json(
            capsys, "--format=dashboard", "--priority=high", "--emf=my app"
        )
        widgets = json.loads(found["put-dashboard"]["DashboardBody"])["widgets"]
        shown = [each["properties"]["metrics"] for each in widgets]
        printed = {
            metric
            for metrics in shown
            for namespace, metric, dimension, queue in metrics
            if (namespace, dimension) == ("my app", "queue")
            and queue.endswith("-HIGH-PRIORITY")
        }
        known = dataclasses.asdict(taskhawk.Ledger())
        counts = {name.title().replace("_", "") for name in known}
        assert printed < counts | {"RunDuration", "OldestRunAge", "LeasesLost"}
        assert len(printed) == 7

    def test_terraform(self, aws, capsys):
        """Terraform's resources say the same, by its names."""
        options = ["--priority=default", "--priority=bulk", "--notify=arn:x"]
        found = provision_json(capsys, "--format=dashboard", *options)
        resources = provision_json(capsys, "--format=dashboard-terraform", *options)
        kinds = resources["resource"]
        [board] = kinds.pop("aws_cloudwatch_dashboard").values()
        assert board == {
            "dashboard_name": found["put-dashboard"]["DashboardName"],
            "dashboard_body": found["put-dashboard"]["DashboardBody"],
        }
        alarms = kinds.pop("aws_cloudwatch_metric_alarm")
        assert kinds == {}
        assert len(alarms) == len(found["put-metric-alarm"]) == 6
        for label, alarm in alarms.items():
            assert re.fullmatch("[a-z0-9_]+", label)
            [call] = [
                each
                for each in found["put-metric-alarm"]
                if each["AlarmName"] == alarm["alarm_name"]
            ]
            assert alarm == {
                "alarm_name": call["AlarmName"],
                "alarm_description": call["AlarmDescription"],
                "namespace": "AWS/SQS",
                "metric_name": call["MetricName"],
                "dimensions": {"QueueName": call["Dimensions"][0]["Value"]},
                "statistic": "Maximum",
                "period": 60,
                "evaluation_periods": call["EvaluationPeriods"],
                "threshold": call["Threshold"],
                "comparison_operator": "GreaterThanThreshold",
                "treat_missing_data": "notBreaching",
                "alarm_actions": ["arn:x"],
            }

    def test_topics(self, aws, capsys):
        """A Lambda app has topics: what they did not deliver is an alarm."""
        taskhawk.configure(dict(taskhawk.settings.given) | {"IS_LAMBDA_APP": True})
        options = ["--priority=default", "--emf=my app", "--lambda=arn:f"]
        found = provision_json(capsys, "--format=dashboard", *options)
        [alarm] = found["put-metric-alarm"]
        assert alarm["MetricName"] == "NumberOfNotificationsFailed"
        assert (alarm["Namespace"], alarm["Statistic"]) == ("AWS/SNS", "Sum")
        assert "AlarmActions" not in alarm
        [widget] = json.loads(found["put-dashboard"]["DashboardBody"])["widgets"]
        assert len(widget["properties"]["metrics"]) == 2


class TestCheck:
    """What is wrong is found before it loses messages, with what mends it."""

    @pytest.fixture(autouse=True)
    def no_tasks(self, isolated):
        """Forget the tasks of other tests."""
        taskhawk._registry.clear()

    @pytest.mark.parametrize(("settings", "finding"), told(WRONG_SETTINGS))
    def test_settings(self, aws, capsys, settings, finding):
        """A setting that is missing or wrong is a finding, before anything is asked for."""
        values = dict(pair.split("=") for pair in settings.split(","))
        wrong = {name: value or None for name, value in values.items()}
        taskhawk.configure(dict(taskhawk.settings.given) | wrong)
        assert check(capsys) == (1, [f"error: {finding}", "1 found"])
        assert aws.actions == []

    def test_good(self, endpoint, sqs_client, queue_name, capsys):
        """What was provisioned has no fault."""
        configure_account(sqs_client, endpoint, queue_name)
        provision(capsys)
        priorities = ("--priority=high", "--priority=default")
        assert check(capsys, *priorities) == (0, ["nothing is wrong"])
        assert check(capsys, "--json") == (0, ["[]"])

    def test_missing(self, ministack, queue_name, capsys):
        """A queue that is not there is an error: of the tasks' priorities, or the ones named."""
        configure_aws(ministack, queue_name)
        code, lines = check(capsys, "--json", "--priority=bulk")
        finding = {
            "severity": "error",
            "what": f"TASKHAWK-{queue_name}-BULK: no such queue",
            "why": "dispatch raises",
            "remedy": "python -m taskhawk provision",
        }
        assert (code, json.loads("\n".join(lines))) == (1, [finding])
        taskhawk.task(name="t", priority=Priority.low)(plain)
        (line, _) = check(capsys)[1]
        assert line.startswith(f"error: TASKHAWK-{queue_name}-LOW-PRIORITY: no such")

    def test_queue(self, ministack, sqs_client, queue_name, capsys):
        """Redrive, retention and sizes are held against each other and the tasks."""
        client, name = sqs_client(ministack), f"TASKHAWK-{queue_name}"
        configure_aws(ministack, queue_name)
        client.create_queue(QueueName=name)
        assert check(capsys)[1][0] == (
            f"error: {name}: it has no dead-letter queue: what fails is retried until it"
            " expires. Fix: python -m taskhawk provision"
        )
        client.delete_queue(QueueUrl=client.get_queue_url(QueueName=name)["QueueUrl"])
        make_queue(
            client, name, 2, MessageRetentionPeriod="86400", MaximumMessageSize="262144"
        )
        retry = taskhawk.fixed(1, max_retries=2)
        taskhawk.task(name="slow", time_limit=60, retry=retry)(plain)
        taskhawk.task(name="quick", time_limit=30)(plain)
        configure_aws(ministack, queue_name, TASKHAWK_RETRY=retry)
        found = [
            f"{kind}: {sentence}" for kind, sentence in told(FINDINGS.format(name=name))
        ]
        assert check(capsys) == (1, [*found, "6 found"])

    def test_no_dead_letter_queue(self, ministack, sqs_client, queue_name, capsys):
        """A dead-letter queue that is gone is an error, and the other queues are looked at too."""
        client, name = sqs_client(ministack), f"TASKHAWK-{queue_name}"
        configure_aws(ministack, queue_name)
        provision(capsys, "--priority=default")
        low, policy = f"{name}-LOW-PRIORITY", attributes_of(client, name)
        client.create_queue(QueueName=low)
        set_attributes(client, low, RedrivePolicy=policy["RedrivePolicy"])
        url = client.get_queue_url(QueueName=f"{name}-DLQ")["QueueUrl"]
        client.delete_queue(QueueUrl=url)
        configure_aws(ministack, queue_name)
        gone = (
            f"error: {name}-DLQ: no such queue: what fails is retried until it expires"
        )
        other = f"{gone}. Fix: make it, or correct the RedrivePolicy"
        assert check(capsys, "--priority=low") == (1, [other, "1 found"])
        make = "Fix: python -m taskhawk provision"
        bulk = f"error: {name}-BULK: no such queue: dispatch raises. {make}"
        found = [f"{gone}. {make}", bulk, "2 found"]
        assert check(capsys, "--priority=default", "--priority=bulk") == (1, found)

    def test_undelivered(self, ministack, sqs_client, queue_name, capsys):
        """What a schedule can't deliver needs the queue that it is sent to."""
        client, name = sqs_client(ministack), f"TASKHAWK-{queue_name}"
        other = client.create_queue(QueueName=f"{name}-LETTERS")["QueueUrl"]
        set_attributes(client, f"{name}-LETTERS", MessageRetentionPeriod="1209600")
        arn = f"arn:aws:sqs:us-east-1:000000000000:{other.rpartition('/')[2]}"
        policy = {"deadLetterTargetArn": arn, "maxReceiveCount": 5}
        client.create_queue(
            QueueName=name, Attributes={"RedrivePolicy": json.dumps(policy)}
        )
        configure_aws(ministack, queue_name)
        lost = (
            f"error: {name}-DLQ: no such queue: a message that a schedule can't deliver"
            f" to {name} for a day is lost. Fix: make it, though the RedrivePolicy names"
            " another"
        )
        assert lost not in check(capsys, "--priority=default")[1]
        role = "arn:aws:iam::000000000000:role/taskhawk"
        configure_aws(ministack, queue_name, TASKHAWK_SCHEDULER_ROLE=role)
        assert lost in check(capsys, "--priority=default")[1]
        client.create_queue(QueueName=f"{name}-DLQ")
        assert lost not in check(capsys, "--priority=default")[1]

    def test_kept_for_long(self, ministack, sqs_client, queue_name, capsys):
        """Where provisioning would not mend it, the remedy is another."""
        client, name = sqs_client(ministack), f"TASKHAWK-{queue_name}"
        configure_aws(ministack, queue_name)
        provision(capsys, "--priority=default")
        set_attributes(client, name, MessageRetentionPeriod="1209600")
        (line, _) = check(capsys, "--priority=default")[1]
        assert line.partition(" Fix: ")[2] == (
            f"set MessageRetentionPeriod of {name} below that of {name}-DLQ, at most"
            " 1209600"
        )

    def test_fault(self, aws, capsys):
        """What can't be looked at is a finding too, and tells where to look for the reason."""
        aws.always("GetQueueUrl", fault("ExpiredToken", status=403))
        code, lines = check(capsys, "--json", "--priority=default", "--priority=bulk")
        (finding,) = json.loads("\n".join(lines))
        assert (code, finding["severity"]) == (1, "error")
        assert finding["what"].startswith("An error occurred (ExpiredToken)")
        assert finding["remedy"] == (
            "check credentials, AWS_REGION, AWS_ENDPOINT_SQS and the network"
        )

    def test_lambda_app_on_sqlite(self, tmp_path, capsys):
        """A Lambda app that is tried out on SQLite has no topics to look at."""
        url = f"sqlite:///{tmp_path}/queue.db?max_receive_count=2"
        taskhawk.configure(TASKHAWK_BROKER=url, IS_LAMBDA_APP=True)
        taskhawk.task(name="slow", time_limit=60)(plain)
        (limit, receives, _) = check(capsys)[1]
        assert limit.endswith(
            " Fix: set visibility_timeout_s in TASKHAWK_BROKER above 60 s"
        )
        assert receives.endswith(" Fix: set max_receive_count=5 in TASKHAWK_BROKER")

    def test_topics(self, ministack, queue_name, capsys):
        """A topic must be there, and have a subscriber."""
        configure_aws(ministack, queue_name, IS_LAMBDA_APP=True)
        topic = f"arn:aws:sns:us-east-1:000000000000:taskhawk-{queue_name.lower()}"
        make = "Fix: python -m taskhawk provision"
        missing = f"error: {topic}: no such topic: dispatch raises. {make}"
        assert check(capsys) == (1, [missing, "1 found"])
        provision(capsys, "--priority=default")
        lost = f"error: {topic}: nobody subscribes: what is sent is lost. {make}"
        assert check(capsys) == (1, [f"{lost} --lambda ARN", "1 found"])

    @pytest.mark.parametrize("lambda_app", [False, True])
    def test_denied(self, aws, capsys, lambda_app):
        """What is not allowed is an error of each queue, with its sentence."""
        configure_aws(aws.url, "app", IS_LAMBDA_APP=lambda_app)
        for action in ("GetQueueAttributes", "ListSubscriptionsByTopic"):
            aws.always(action, fault("AccessDenied", status=403))
        code, lines = check(capsys, "--priority=high", "--priority=low")
        assert (code, lines[2]) == (1, "2 found")
        assert f": {DENIED.partition('{')[0]}" in lines[0]
        assert "low-priority: access denied" in lines[1].lower()

    def test_not_served(self, sqlite, capsys):
        """A task that a worker of these priorities would not serve is a warning."""
        taskhawk.task(name="resize", priority=Priority.bulk)(plain)
        assert check(capsys) == (0, ["nothing is wrong"])
        warning = (
            "warning: task resize is of priority bulk: a worker that serves these priorities"
            " does not run it. Fix: serve --priority bulk too, here or in another worker"
        )
        assert check(capsys, "--priority=high") == (0, [warning, "1 found"])

    def test_main(self, sqlite, capsys):
        """A task that is registered under __main__ is found by no worker."""
        taskhawk.task(name="__main__.job")(plain)
        error = (
            "error: task __main__.job is of __main__: a worker can't find it under that"
            " name. Fix: move it to a module"
        )
        assert check(capsys) == (1, [error, "1 found"])


@pytest.fixture
def scheduled(
    request: pytest.FixtureRequest,
    sqs_client: Callable[..., Any],
    queue_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """Have two periodic tasks on an emulator; return a client of Scheduler."""
    endpoint = request.getfixturevalue(getattr(request, "param", "ministack"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_IAM", endpoint)
    account = configure_account(sqs_client, endpoint, queue_name)
    taskhawk.configure(
        taskhawk.settings.given,
        TASKHAWK_SCHEDULER_ROLE=f"arn:aws:iam::{account}:role/app/th-{queue_name}",
    )
    taskhawk._registry.clear()
    rush = {"priority": Priority.high, "timezone": "Europe/Berlin"}
    taskhawk.task(name="app.audit", schedule="cron(0 9 ? * MON-FRI *)", **rush)(plain)
    taskhawk.task(name="app.count", schedule=MINUTELY)(another("count"))
    return sqs_client(endpoint, "scheduler")


class TestProvisionSchedules:
    """Long delays and periodic tasks: their group, role and schedules on AWS."""

    @pytest.mark.parametrize(
        "scheduled",
        ["ministack", MOTO],
        indirect=True,
    )
    def test_made(self, scheduled, sqs_client, queue_name, capsys):
        """All are made, and are then as they should be; a dry run says what would be."""
        group, role = f"taskhawk-{queue_name.lower()}", f"th-{queue_name}"
        only = "--priority=default"
        names = [
            f"group {group}",
            f"role {role}",
            f"policy {role}",
            "schedule task.app.audit",
            "schedule task.app.count",
        ]
        would = provision(capsys, only, "--dry-run")
        assert would[2:] == [f"{name}: would be made" for name in names]
        assert provision(capsys, only)[2:] == [f"{name}: made" for name in names]
        as_it_should_be = [f"{name}: is as it should be" for name in names]
        assert provision(capsys, only)[2:] == as_it_should_be
        found = scheduled.get_schedule(GroupName=group, Name="task.app.audit")
        assert found["ScheduleExpression"] == "cron(0 9 ? * MON-FRI *)"
        assert found["ScheduleExpressionTimezone"] == "Europe/Berlin"
        assert found["Target"]["Arn"].endswith(f":TASKHAWK-{queue_name}-HIGH-PRIORITY")
        endpoint = taskhawk.settings.AWS_ENDPOINT_SQS
        made = sqs_client(endpoint, "iam").get_role(RoleName=role)["Role"]
        assert made["Arn"] == found["Target"]["RoleArn"]
        (statement,) = made["AssumeRolePolicyDocument"]["Statement"]
        account = taskhawk.settings.AWS_ACCOUNT_ID
        assert statement["Condition"] == {
            "StringEquals": {"aws:SourceAccount": account}
        }

    def test_model(self, scheduled):
        """What is sent has the shape that the service's model asks for."""
        model = scheduled.meta.service_model
        for operation in ("CreateSchedule", "UpdateSchedule"):
            for task in taskhawk._periodic_tasks().values():
                report = botocore.validate.ParamValidator().validate(
                    taskhawk._periodic_schedule(task),
                    model.operation_model(operation).input_shape,
                )
                assert not report.has_errors(), report.generate_report()

    @pytest.mark.parametrize("refusals", [0, 2, 11])
    def test_new_role(self, stubbed, monkeypatch, refusals):
        """A role that was made just now is not known everywhere: the schedule waits for it."""
        monkeypatch.setattr(taskhawk, "_NEW_ROLE_PAUSE_S", 0)
        text = "The execution role you provide must allow AWS EventBridge Scheduler to"
        text += " assume the role."
        for _ in range(refusals):
            stubbed.add_client_error("create_schedule", "ValidationException", text)
        if refusals < 11:
            stubbed.add_response("create_schedule", {"ScheduleArn": "arn"})
        task = taskhawk.task(name="app.audit", schedule="rate(5 minutes)")(nothing)
        wanted = taskhawk._periodic_schedule(task)
        change = taskhawk._Change("made", "create_schedule", wanted)
        client = taskhawk._brokers.get("schedule").client("send")
        make = functools.partial(taskhawk._make, client, change)
        if refusals < 11:
            make()
            stubbed.add_client_error("create_schedule", "ValidationException", "no")
        with pytest.raises(botocore.exceptions.ClientError):
            make()

    def test_update(self, stubbed, queue_name):
        """An update resets what it leaves out: what others have set is not left out."""
        task = taskhawk.task(name="app.audit", schedule="rate(5 minutes)")(nothing)
        wanted = taskhawk._periodic_schedule(task)
        others = {"State": "DISABLED", "KmsKeyArn": "arn:aws:kms:us-east-1:1:key/2"}
        existing = {**wanted, **others, "ScheduleExpression": "rate(6 minutes)"}
        stubbed.add_response("get_schedule", existing)
        scheduler = taskhawk._brokers.get("schedule")
        resource = taskhawk._Resource("aws_scheduler_schedule", "task.app.audit", {})
        change = taskhawk._schedule_change(scheduler, resource)
        assert change.parameters == {**wanted, **others}

    def test_message(self, scheduled, caplog):
        """With the time filled in, the input is a message that runs, with one id a firing."""
        task = taskhawk._registry["app.audit"]
        body = taskhawk._periodic_schedule(task)["Target"]["Input"]
        time_of_it = "2026-11-27T08:00:00Z"
        filled = body.replace("<aws.scheduler.scheduled-time>", time_of_it)
        message = taskhawk._decode(filled)
        assert message.id == f"task.app.audit-{time_of_it}"
        assert message.timestamp == 1_795_766_400_000
        assert message.priority is Priority.high
        assert run_body(filled).fate is taskhawk.Fate.acknowledge

    @pytest.mark.parametrize(
        "scheduled",
        ["ministack", MOTO],
        indirect=True,
    )
    def test_changed(self, scheduled, queue_name, capsys):
        """What differs is corrected, and check says so; who disabled one finds it disabled."""
        provision(capsys)
        priorities = ("--priority=high", "--priority=default")
        assert check(capsys, *priorities) == (0, ["nothing is wrong"])
        group = f"taskhawk-{queue_name.lower()}"
        audit = {"GroupName": group, "Name": "task.app.audit"}
        found = scheduled.get_schedule(**audit)
        scheduled.update_schedule(
            **audit,
            ScheduleExpression="cron(0 8 ? * MON-FRI *)",
            ScheduleExpressionTimezone=found["ScheduleExpressionTimezone"],
            Description=found["Description"],
            FlexibleTimeWindow={"Mode": "OFF"},
            State="DISABLED",
            Target={**found["Target"], "Input": "{}"},
        )
        scheduled.delete_schedule(GroupName=group, Name="task.app.count")
        wrong = "ScheduleExpression, Target"
        fix = "Fix: python -m taskhawk provision MODULE …"
        why = "the task does not run as its code says"
        assert check(capsys, *priorities) == (
            1,
            [
                f"error: schedule task.app.audit: would be changed: {wrong}: {why}. {fix}",
                f"error: schedule task.app.count: would be made: {why}. {fix}",
                "2 found",
            ],
        )
        assert provision(capsys)[-2:] == [
            f"schedule task.app.audit: changed: {wrong}",
            "schedule task.app.count: made",
        ]
        found = scheduled.get_schedule(**audit)
        assert found["ScheduleExpression"] == "cron(0 9 ? * MON-FRI *)"
        assert found["State"] == "DISABLED"
        assert check(capsys, *priorities) == (0, ["nothing is wrong"])

    @pytest.mark.parametrize(
        "scheduled",
        ["ministack", MOTO],
        indirect=True,
    )
    def test_abandoned(self, scheduled, queue_name, mail, capsys):
        """Of tasks that are gone, in our own group alone, --prune deletes the schedules."""
        provision(capsys)
        group = f"taskhawk-{queue_name.lower()}"
        waiting = mail.with_delay(timedelta(days=2)).dispatch()
        taskhawk._registry.pop("app.count")
        assert check(capsys, "--priority=default", "--priority=high")[1][0] == (
            "warning: schedule task.app.count: no task has it: its messages are dead"
            " letters, unless another module has the task. Fix: name all modules, or"
            " python -m taskhawk provision MODULE … --prune"
        )
        kept = "schedule task.app.count: no task has it; --prune deletes it"
        assert provision(capsys)[-1] == kept
        assert provision(capsys, "--prune", "--dry-run")[-1] == kept
        assert provision(capsys, "--prune")[-1] == "schedule task.app.count: deleted"
        names = scheduled.list_schedules(GroupName=group)["Schedules"]
        assert {found["Name"] for found in names} >= {"task.app.audit", waiting}
        assert taskhawk.cancel(waiting)

    def test_group_is_missing(self, scheduled, queue_name, capsys):
        """Without the group no message waits, which is an error."""
        taskhawk._registry.clear()
        provision_queues = [
            taskhawk._provide(resource, dry_run=False)
            for resource in taskhawk._resources(Priority.default, 5, None)
        ]
        assert len(provision_queues) == 2
        assert check(capsys, "--priority=default") == (
            1,
            [
                (
                    f"error: group taskhawk-{queue_name.lower()}: would be made: long"
                    " delays are refused at dispatch. Fix: python -m taskhawk provision"
                    " MODULE …"
                ),
                "1 found",
            ],
        )

    def test_no_role(self, ministack, queue_name, capsys):
        """Periodic tasks without a role are an error."""
        configure_aws(ministack, queue_name)
        taskhawk._registry.clear()
        taskhawk.task(name="audit", schedule=MINUTELY)(plain)
        assert command_error(capsys, "provision") == (2, f"taskhawk: {NO_ROLE}")
        _, lines = check(capsys)
        assert lines[-2] == (
            f"error: {NO_ROLE}: the rest can't be checked. Fix: as the error says"
        )

    def test_sqlite(self, sqlite, capsys):
        """On SQLite, what AWS alone understands is an error."""
        taskhawk._registry.clear()
        taskhawk.task(name="audit", schedule=MINUTELY)(plain)
        assert check(capsys) == (0, ["nothing is wrong"])
        taskhawk.task(name="bill", schedule="cron(0 9 L * ? *)")(another("bill"))
        assert check(capsys) == (
            1,
            [
                (
                    "error: bill has schedule='cron(0 9 L * ? *)': L, W and # are AWS's"
                    " alone: expected numbers, lists, ranges and steps on SQLite: the"
                    " rest can't be checked. Fix: as the error says"
                ),
                "1 found",
            ],
        )

    def test_terraform(self, scheduled, queue_name, capsys):
        """Terraform's description has, name by name, what the API is told."""
        described = provision_json(capsys, "--format=terraform")["resource"]
        label = f"th_{queue_name.lower()}"
        schedule = described["aws_scheduler_schedule"]["task_app_audit"]
        assert schedule.pop("depends_on") == [
            f"aws_scheduler_schedule_group.taskhawk_{queue_name.lower()}",
            f"aws_iam_role_policy.{label}",
        ]
        told = taskhawk._periodic_schedule(taskhawk._registry["app.audit"])
        assert schedule["schedule_expression"] == told["ScheduleExpression"]
        assert schedule["flexible_time_window"] == {"mode": "OFF"}
        target = told["Target"]
        assert schedule["target"] == {
            "arn": target["Arn"],
            "role_arn": target["RoleArn"],
            "input": target["Input"],
            "retry_policy": {
                "maximum_event_age_in_seconds": 86_400,
                "maximum_retry_attempts": 185,
            },
            "dead_letter_config": {"arn": target["DeadLetterConfig"]["Arn"]},
        }
        role = described["aws_iam_role"][label]
        assert (role["name"], role["path"]) == (f"th-{queue_name}", "/app/")
        policy = json.loads(described["aws_iam_role_policy"][label]["policy"])
        (statement,) = policy["Statement"]
        assert statement["Action"] == "sqs:SendMessage"
        assert {arn.rpartition(":")[2] for arn in statement["Resource"]} == {
            f"TASKHAWK-{queue_name}{suffix}{dlq}"
            for suffix in ("", "-HIGH-PRIORITY", "-LOW-PRIORITY", "-BULK")
            for dlq in ("", "-DLQ")
        }

    def test_labels(self, scheduled, capsys):
        """Tasks whose names differ in punctuation alone are two of Terraform's resources."""
        taskhawk.task(name="app_count", schedule=MINUTELY)(another("other"))
        described = provision_json(capsys, "--format=terraform")["resource"]
        schedules = described["aws_scheduler_schedule"]
        assert schedules["task_app_count"]["name"] == "task.app.count"
        assert schedules["task_app_count_"]["name"] == "task.app_count"

    def test_iam(self, scheduled, queue_name, capsys):
        """A publisher may make and delete schedules in the group, and hand over the role."""
        roles = provision_json(capsys, "--format=iam", "--priority=default")
        _, schedules, hand_over = roles["publisher"]["Statement"]
        region = f"us-east-1:{taskhawk.settings.AWS_ACCOUNT_ID}"
        group = f"arn:aws:scheduler:{region}:schedule/taskhawk-{queue_name.lower()}/*"
        assert schedules == {
            "Effect": "Allow",
            "Action": [
                "scheduler:CreateSchedule",
                "scheduler:GetSchedule",
                "scheduler:DeleteSchedule",
            ],
            "Resource": [group],
        }
        assert hand_over == {
            "Effect": "Allow",
            "Action": ["iam:PassRole"],
            "Resource": [taskhawk.settings.TASKHAWK_SCHEDULER_ROLE],
            "Condition": {
                "StringEquals": {"iam:PassedToService": "scheduler.amazonaws.com"}
            },
        }
        by_hand, group_itself, lists = roles["operator"]["Statement"][2:]
        assert by_hand["Resource"] == [group]
        assert by_hand["Action"] == [
            "scheduler:GetSchedule",
            "scheduler:DeleteSchedule",
        ]
        # Each on what AWS's service authorization reference names for it.
        name = f"schedule-group/taskhawk-{queue_name.lower()}"
        assert group_itself["Resource"] == [f"arn:aws:scheduler:{region}:{name}"]
        assert group_itself["Action"] == ["scheduler:GetScheduleGroup"]
        assert (lists["Action"], lists["Resource"]) == (
            ["scheduler:ListSchedules"],
            ["*"],
        )

    def test_topics(self, scheduled, queue_name, capsys):
        """In a Lambda app, schedules publish to the topics."""
        taskhawk.configure(taskhawk.settings.given, IS_LAMBDA_APP=True)
        described = provision_json(capsys, "--format=terraform")["resource"]
        ((_, policy),) = described["aws_iam_role_policy"].items()
        (statement,) = json.loads(policy["policy"])["Statement"]
        assert statement["Action"] == "sns:Publish"
        schedule = described["aws_scheduler_schedule"]["task_app_audit"]
        assert schedule["target"]["arn"] in statement["Resource"]
        assert "dead_letter_config" not in schedule["target"]

    def test_fifo(self, scheduled, queue_name, sqs_client, capsys):
        """On a FIFO queue a periodic task has a group, and the queue makes the id."""
        taskhawk.configure(taskhawk.settings.given, TASKHAWK_FIFO=True)
        target = taskhawk._periodic_schedule(taskhawk._registry["app.count"])["Target"]
        assert target["SqsParameters"] == {"MessageGroupId": "task.app.count"}
        assert "DeadLetterConfig" not in target
        provision(capsys, "--priority=default")
        client = sqs_client(taskhawk.settings.AWS_ENDPOINT_SQS)
        found = attributes_of(client, f"TASKHAWK-{queue_name}.fifo")
        assert found["ContentBasedDeduplication"] == "true"
        url = client.get_queue_url(QueueName=f"TASKHAWK-{queue_name}.fifo")["QueueUrl"]
        assert "content-based" not in str(check(capsys, "--priority=default"))
        wrong = {"ContentBasedDeduplication": "false"}
        client.set_queue_attributes(QueueUrl=url, Attributes=wrong)
        finding = (
            f"error: TASKHAWK-{queue_name}.fifo: it has no content-based deduplication:"
            " it refuses what schedules send, and no dead-letter queue gets that. Fix:"
            f" set ContentBasedDeduplication of TASKHAWK-{queue_name}.fifo to true"
        )
        assert finding in check(capsys, "--priority=default")[1]


class TestProvisionTable:
    """The table of claims: made with its TTL, described, and checked."""

    @pytest.fixture(params=["ministack", MOTO])
    def table(self, request, sqs_client, queue_name):
        """Name a table that is not there yet."""
        endpoint = request.getfixturevalue(request.param)
        name = f"claims-{queue_name}"
        configure_account(sqs_client, endpoint, queue_name)
        taskhawk.configure(
            taskhawk.settings.given,
            TASKHAWK_CLAIMS_TABLE=name,
            AWS_ENDPOINT_DYNAMODB=endpoint,
        )
        taskhawk._registry.clear()
        return name

    def test_made(self, table, sqs_client, capsys):
        """It is made on demand, with its key and TTL; then there is nothing to do."""
        only = "--priority=default"
        names = [f"table {table}", f"ttl {table}"]
        would = [f"{name}: would be made" for name in names]
        assert provision(capsys, only, "--dry-run")[2:] == would
        fix = "Fix: python -m taskhawk provision MODULE …"
        assert check(capsys, only)[1][-3:] == [
            (
                f"error: table {table}: would be made: tasks with once, unique or limit"
                f" are left to be retried. {fix}"
            ),
            (
                f"error: ttl {table}: would be made: claims that have expired are kept,"
                f" and cost money. {fix}"
            ),
            "3 found",
        ]
        assert provision(capsys, only)[2:] == [f"{name}: made" for name in names]
        as_it_should_be = [f"{name}: is as it should be" for name in names]
        assert provision(capsys, only)[2:] == as_it_should_be
        assert check(capsys, only) == (0, ["nothing is wrong"])
        claims = taskhawk._find_claims()
        assert claims.claim("key", 60).token

    def test_other_table(self, table, sqs_client, capsys):
        """A table with another key is refused, for it is somebody else's."""
        endpoint = taskhawk.settings.AWS_ENDPOINT_DYNAMODB
        sqs_client(endpoint, "dynamodb").create_table(
            TableName=table,
            KeySchema=[{"AttributeName": "pk", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "pk", "AttributeType": "S"}],
            BillingMode="PAY_PER_REQUEST",
        )
        sentence = (
            f"table {table}: expected its key to be id alone: name another one by"
            " TASKHAWK_CLAIMS_TABLE"
        )
        assert taskhawk.main(["provision", "--priority=default"]) == 2
        assert capsys.readouterr().err == f"taskhawk: {sentence}\n"

    @pytest.mark.parametrize(
        ("name", "label"), [("3-claims", "_3_claims"), ("Claims.v2", "claims_v2")]
    )
    def test_label(self, name, label):
        """What Terraform calls a table is an identifier of Terraform's."""
        assert taskhawk._label(name) == label

    def test_described(self, aws, capsys):
        """Terraform has its TTL in it; workers may update its items, and no more."""
        table = "taskhawk-claims"
        configure_aws(aws.url, "app", TASKHAWK_CLAIMS_TABLE=table)
        only = "--priority=default"
        described = provision_json(capsys, only, "--format=terraform")["resource"]
        assert "aws_dynamodb_ttl" not in described
        assert described["aws_dynamodb_table"]["taskhawk_claims"] == {
            "name": table,
            "billing_mode": "PAY_PER_REQUEST",
            "hash_key": "id",
            "attribute": [{"name": "id", "type": "S"}],
            "ttl": {"attribute_name": "expiration", "enabled": True},
            "tags": {"taskhawk": "app"},
        }
        roles = provision_json(capsys, only, "--format=iam")
        for role in ("worker", "lambda"):
            assert roles[role]["Statement"][-1] == {
                "Effect": "Allow",
                "Action": ["dynamodb:UpdateItem"],
                "Resource": [f"arn:aws:dynamodb:us-east-1:000000000000:table/{table}"],
            }
        # Who pauses a queue writes, too, and so does whoever looks for a pause.
        assert "dynamodb:UpdateItem" in roles["operator"]["Statement"][-1]["Action"]

    def test_missing(self, aws, capsys):
        """Check says that tasks need a table where none is named, as workers do."""
        configure_aws(aws.url, "app")
        taskhawk.task(name="mail.send", once=True)(nothing)
        code, lines = check(capsys, "--priority=default")
        assert code == 1
        assert (
            f"error: {NO_TABLE}: workers do not start. Fix: as the error says" in lines
        )


# --- 26. command line -----------------------------------------------------------------

COMMAND_MODULE = """
import logging
import {package} as taskhawk

@taskhawk.task
def add(one, other=2, headers=None, metadata=None):
    print("sum", one + other, headers, metadata.priority.name, flush=True)
    logging.getLogger("shop").info("added")

@taskhawk.task(priority=taskhawk.Priority.high, name="skip")
def skip():
    raise taskhawk.IgnoreException  # of the very module that runs the worker

@taskhawk.task(name="job.broken", never_retry_on=(ZeroDivisionError,))
def broken():
    1 / 0
"""
COMMANDS = """
demo, listen, dispatch, tasks, schema, stats, check, provision, vendor, dead-letters,
dead-letters list, dead-letters show, dead-letters requeue, dead-letters delete,
dead-letters export
"""
WRONG_OPTIONS = """
dispatch t --args [1                 an array of JSON
dispatch t --args [NaN]              an array of JSON
dispatch t --args {}                 an array of JSON
dispatch t --kwargs []               an object of JSON
dispatch t --header a                K=V
dispatch t --delay -1                0 or more seconds, such as 90 or 10m
dispatch t --delay nan               0 or more seconds, such as 90 or 10m
dispatch t --delay 1w                0 or more seconds, such as 90 or 10m
listen --num-messages 0              1 to 100
listen --num-messages 101            1 to 100
listen --concurrency 0               1 or more
listen --max-tasks 1.5               1 or more
listen --loop-count -1               1 or more
listen --grace -1                    0 or more seconds, such as 90 or 10m
listen --visibility-timeout 0.5      1 to 43200 seconds, such as 90 or 10m
listen --visibility-timeout 13h      1 to 43200 seconds, such as 90 or 10m
provision --max-receive-count 0      1 to 1000
provision --max-receive-count 1001   1 to 1000
stats --interval 0                   0.1 or more seconds, such as 90 or 10m
stats --interval inf                 0.1 or more seconds, such as 90 or 10m
dead-letters list --limit x          0 or more
dead-letters list --older-than 36    a number and one of s, m, h, d, such as 36h
dead-letters list --older-than h     0 or more seconds, such as 90 or 10m
"""
WRONG_ARGUMENTS = """
listen
    listen: no task is registered: name the modules that define them, such as
    myapp.tasks
tasks
    tasks: no task is registered: name the modules that define them, such as myapp.tasks
listen nowhere.tasks
    the module 'nowhere.tasks' can't be imported: No module named 'nowhere'
listen job.add
    listen: job.add is a task: name its module, job
listen none
    listen: none: no task of this taskhawk is defined there; if it uses a vendored copy,
    run python -m PACKAGE.taskhawk listen none
listen ./job.py
    listen: './job.py' is a file: name the module, such as job
check shop/tasks.py
    check: 'shop/tasks.py' is a file: name the module, such as shop.tasks
dispatch nowhere.f
    no task is registered as 'nowhere.f', and the module 'nowhere' can't be imported: No
    module named 'nowhere': name the module that defines the task with --module
dispatch f
    no task is registered as 'f': is its module imported? Its name begins with its
    module, such as myapp.tasks.f
dispatch add --module job
    no task is registered as 'add': is its module imported? Did you mean job.add?
dispatch job.ad
    no task is registered as 'job.ad': is its module imported? Did you mean job.add?
dispatch job.xyz
    no task is registered as 'job.xyz': is its module imported?
dispatch odd.f
    odd.f: *args can't be a task's parameter: name the arguments, or take a list
tasks odd
    odd.f: *args can't be a task's parameter: name the arguments, or take a list
dispatch job.add
    job.add: missing a required argument: 'one'
"""
WRONG_CONFIGURATION = """
TASKHAWK_BROKER=redis://
    TASKHAWK_BROKER in the environment: expected 'sqs' or a URL of SQLite, such as
    'sqlite:///queue.db', got 'redis://'
SETTINGS_MODULE=nowhere
    the module named by SETTINGS_MODULE 'nowhere' can't be imported: No module named
    'nowhere'
DJANGO_SETTINGS_MODULE=nowhere
    the module named by DJANGO_SETTINGS_MODULE 'nowhere' can't be imported: No module
    named 'nowhere'
TASKHAWK_SYNC=maybe
    TASKHAWK_SYNC in the environment: expected true or false, such as 'False', got
    'maybe'
TASKHAWK_PRE_PROCESS_HOOK=nowhere.hook
    TASKHAWK_PRE_PROCESS_HOOK in the environment: expected a function or its dotted
    path, such as 'myapp.hooks.before', got 'nowhere.hook' (No module named 'nowhere')
"""
SERVED = """
listen job --until-empty
    listening to TASKHAWK-DEFAULT-HIGH-PRIORITY, TASKHAWK-DEFAULT (BROKER) for job.add,
    job.broken, skip
listen job --until-empty --priority=low --priority=default
    listening to TASKHAWK-DEFAULT, TASKHAWK-DEFAULT-LOW-PRIORITY (BROKER) for job.add,
    job.broken; not served here: skip
listen job --until-empty --priority=low
    listening to TASKHAWK-DEFAULT-LOW-PRIORITY (BROKER) for no task; not served here:
    job.add, job.broken, skip
"""
COMMAND_DJANGO = {
    "site_settings.py": """
INSTALLED_APPS = ["shop", "empty"]
USE_TZ = True
SECRET_KEY = "x"
LOGGING = {
    "version": 1,
    "disable_existing_loggers": True,
    "handlers": {"h": {"class": "logging.StreamHandler"}},
    LOGGING_HERE,
}
""",
    "empty/__init__.py": "",
    "shop/__init__.py": "",
    "shop/models.py": """
from django.db import models
class Sale(models.Model):
    id = models.BigAutoField(primary_key=True)
""",
    "shop/tasks.py": """
import taskhawk
from shop.models import Sale
@taskhawk.task
def sell():
    print("sold", Sale._meta.label)
""",
}
LOG_TIME = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d,\d\d\d"


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
    program = {"module": ["-m", "taskhawk"], "file": [taskhawk.__file__]}
    return program.get(way, [str(script)]), "taskhawk"


@pytest.fixture
def command_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the current directory of a command that runs in this process, with a job.py."""
    taskhawk._registry.clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "job.py").write_text(COMMAND_MODULE.format(package="taskhawk"))
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if str(tmp_path) in str(file):
            del sys.modules[name]


class Commands:
    """The commands in a folder of their own, each in a process, with a job.py and a queue."""

    def __init__(self, folder: Path, *command: str, package: str = "taskhawk") -> None:
        self.folder, self.command = folder, command or ("-m", "taskhawk")
        self.env = {"TASKHAWK_BROKER": f"sqlite:///{folder}/queue.db"}
        (folder / "job.py").write_text(COMMAND_MODULE.format(package=package))

    def __call__(
        self, *arguments: str, code: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, which is to end with this exit code."""
        result = run_python([*self.command, *arguments], self.folder, self.env)
        assert result.returncode == code, result.stderr
        return result

    def send(self, name: str, *args: object) -> None:
        """Put a message in the queue, without the cost of a process."""
        taskhawk.configure(TASKHAWK_BROKER=self.env["TASKHAWK_BROKER"])
        body = processing_body(task=name, args=args)
        broker = taskhawk._brokers.broker()
        broker.send("TASKHAWK-DEFAULT", [taskhawk.Outgoing(body, {})])

    def popen(self, *arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
        """Start a command whose output is read by the caller."""
        return subprocess.Popen(
            [sys.executable, *self.command, *arguments],
            cwd=self.folder,
            env=python_env(self.env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def logged(self, *arguments: str) -> list[str]:
        """Run a command, and return its log without times and ids."""
        lines = self(*arguments).stderr.splitlines()
        ids = re.compile(rf"{MESSAGE_ID}( \(message {MESSAGE_ID}\))?")
        return [ids.sub("ID", re.sub(rf"^{LOG_TIME} ", "", line)) for line in lines]


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    """Return the commands."""
    return Commands(tmp_path)


class TestCommandLine:
    """Glue only; exit codes: 0 done, 1 failed, 2 wrong usage or configuration."""

    def test_shadow(self, tmp_path):
        """The script's help runs nothing that lies in the current directory."""
        (tmp_path / "argparse.py").write_text("raise SystemExit(3)")
        script = "import sys, taskhawk; sys.exit(taskhawk.main(['--version']))"
        result = run_python(["-P", "-c", script], cwd=tmp_path)
        assert (result.returncode, result.stdout) == (0, f"{taskhawk.VERSION}\n")

    @pytest.mark.parametrize(
        ("options", "group"), [([], None), (["--group", "7"], "7")]
    )
    def test_group(self, tmp_path, mail, capsys, options, group):
        """A message that is dispatched by hand may have a group."""
        taskhawk.configure(TASKHAWK_BROKER=f"sqlite:///{tmp_path}/queue.db")
        assert taskhawk.main(["dispatch", "mail.send", *options]) == 0
        (received,) = receive_all()
        assert received.group_id == group
        assert capsys.readouterr().out == f"{json.loads(received.body)['id']}\n"

    @pytest.mark.slow
    @pytest.mark.parametrize("way", ["module", "vendored", "file", "script"])
    def test_ways(self, tmp_path, way):
        """However it is called, the command line and the tasks' modules share one registry."""
        command, package = command_line(tmp_path, way)
        run = Commands(tmp_path, *command, package=package)
        assert run("tasks", "job").stdout == (
            "job.add  default\njob.broken  default\nskip  high\n"
        )
        arguments = ("--args", "[1]", "--kwargs", '{"other": 3}', "--priority", "high")
        sent = run("dispatch", "job.add", *arguments, "--header", "a=b=c")
        assert re.fullmatch(f"{MESSAGE_ID}\n", sent.stdout)
        run("dispatch", "skip", "--module", "job")
        listen = ("listen", "job", "--loop-count=1", "--num-messages=2")
        assert run(*listen, "--priority=high").stdout == (
            "sum 4 {'a': 'b=c'} high\n"
            "2 received, 2 acked, 0 retried, 0 dead-lettered, 0 postponed, 0 released, 0 uncertain\n"
        )

    @pytest.mark.slow
    def test_demo(self, commands):
        """Whatever is set, the demo shows a run, a retry, a dead letter's return."""
        commands.env |= {"TASKHAWK_SYNC": "true", "IS_LAMBDA_APP": "true"}
        result = commands("demo")
        assert result.stderr == ""
        shown = re.sub(MESSAGE_ID, "ID", result.stdout)
        shown = re.sub(r"A queue in \S+queue\.db", "A queue in FILE", shown)
        shown = re.sub(
            r"again in [5-9]\.?\d* s|again in 10 s", "again in 5-10 s", shown
        )
        shown = re.sub(r"due \S+T09:00:00\+00:00", "due at 9", shown)
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
            "The bug in demo.divide is fixed, and its dead letter sent back:",
            "requeued       1 message",
            "ran            demo.divide   attempt 1",
            "  5 received, 2 acked, 2 retried, 1 dead-lettered, 0 postponed, 0 released, 0 uncertain",
            "  1 received, 1 acked, 0 retried, 0 dead-lettered, 0 postponed, 0 released, 0 uncertain",
            "                             Ann is in step again",
            "ran            demo.sync     attempt 1",
            "postponed      demo.sync     attempt 1: its limit is reached; again in 5-10 s",
            "cancelled      demo.sync     ID",
            "scheduled      demo.report   cron(0 9 ? * MON-FRI *): due at 9",
            "  2 received, 1 acked, 0 retried, 0 dead-lettered, 1 postponed, 0 released, 0 uncertain",
        ):
            assert line in shown.splitlines()
        assert [path.name for path in commands.folder.iterdir()] == ["job.py"]

    def test_tasks_of_a_script(self):
        """A task of a script, which 1.4 named otherwise, is listed once."""
        taskhawk._registry.clear()

        def job() -> None:
            raise NotImplementedError

        job.__module__ = "__main__"
        name = taskhawk.task(job).name
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert taskhawk.main(["tasks"]) == 0
        assert output.getvalue() == f"{name}  default\n"

    @pytest.mark.parametrize("command", re.split(r",\s+", COMMANDS.strip()))
    def test_help(self, capsys, command):
        """The help of every command shows an example, whole on its line, that can be copied."""
        with pytest.raises(SystemExit) as ended:
            taskhawk.main([*command.split(), "--help"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        (example,) = re.findall(
            r"^(?:example: +| +)(python -m .*)$", shown, re.MULTILINE
        )
        assert re.search(rf"taskhawk {command}\b", example)

    def test_defaults(self, capsys):
        """Help shows the default of each option that has one."""
        with pytest.raises(SystemExit):
            taskhawk.main(["listen", "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert re.findall(r"\(default: ([^)]+)\)", shown) == [
            "those of the tasks",  # --priority
            "1",  # --num-messages
            "the queue's own",  # --visibility-timeout
            "1",  # --concurrency
            "25",  # --grace
            "info",  # --log-level
            "text",  # --log-format
        ]

    @pytest.mark.parametrize(
        ("arguments", "usage"),
        [("", "taskhawk [-h]"), ("dead-letters", "taskhawk dead-letters [-h]")],
    )
    def test_bare(self, capsys, arguments, usage):
        """Without a command, the help is shown, and nothing was done."""
        assert taskhawk.main(arguments.split()) == 2
        output, help_text = capsys.readouterr()
        assert output == ""
        assert help_text.startswith(f"usage: {usage}")

    @pytest.mark.parametrize(("arguments", "sentence"), told(WRONG_ARGUMENTS))
    def test_wrong_arguments(
        self, capsys, command_folder, monkeypatch, arguments, sentence
    ):
        """What can't work is said in one line, with the exit code 2."""
        odd = "import taskhawk\n@taskhawk.task\ndef f(*args): ..."
        (command_folder / "odd.py").write_text(odd)
        (command_folder / "none.py").touch()
        monkeypatch.setenv("TASKHAWK_BROKER", "sqlite:///queue.db")
        assert command_error(capsys, *arguments.split()) == (2, f"taskhawk: {sentence}")

    def test_unknown_option(self, capsys):
        """An unknown option is refused with a pointer to the command's own help."""
        assert command_error(capsys, "dead-letters", "list", "--older", "3h") == (
            2,
            (
                "taskhawk dead-letters list: unrecognized arguments: --older 3h; see"
                " taskhawk dead-letters list --help"
            ),
        )

    @pytest.mark.parametrize("case", WRONG_OPTIONS.strip().splitlines())
    def test_wrong_options(self, capsys, case):
        """An option that is out of its bounds is refused by name, with what is expected."""
        words, expected = re.split(" {2,}", case)
        *command, name, value = words.split()
        called = " ".join(["taskhawk", *command]).removesuffix(" t")
        assert command_error(capsys, *command, name, value) == (
            2,
            (
                f"{called}: argument {name}: expected {expected}, got '{value}'; see"
                f" {called} --help"
            ),
        )

    @pytest.mark.parametrize(
        "arguments",
        [
            "nonsense",
            "listen --nonsense",
            "listen --priority=x",
            "listen --liveness=x",
            "dead-letters show",
            "dead-letters show a --id b",
        ],
    )
    def test_wrong_usage(self, capsys, arguments):
        """What the parser does not know is wrong usage, abbreviations too."""
        code, line = command_error(capsys, *arguments.split())
        assert code == 2
        assert line.startswith("taskhawk")
        assert line.endswith(" --help")

    @pytest.mark.parametrize(("setting", "sentence"), told(WRONG_CONFIGURATION))
    def test_wrong_configuration(
        self, capsys, command_folder, monkeypatch, setting, sentence
    ):
        """A worker does not start with a wrong setting or hook: each message would fail."""
        monkeypatch.setenv("TASKHAWK_BROKER", "sqlite:///queue.db")
        monkeypatch.setenv(*setting.split("=", 1))
        line = f"taskhawk: {sentence}"
        assert command_error(capsys, "listen", "job", "--until-empty") == (2, line)
        assert not (command_folder / "queue.db").exists()

    @pytest.mark.parametrize(
        ("command", "setting", "line", "text"),
        [
            ("tasks failing", "", "import os; os.environ['NO']", "KeyError('NO')"),
            ("tasks failing", "", "assert 0", "AssertionError()"),
            ("tasks failing", "", "raise OSError('two\\nlines')", "two lines"),
            ("stats", "SETTINGS_MODULE", "1 / 0", "division by zero"),
            *(
                (command, "TASKHAWK_POST_PROCESS_HOOK", "1 / 0", "division by zero")
                for command in ("listen job", "check job")
            ),
        ],
    )
    def test_module_fails(  # noqa: PLR0917
        self, command_folder, capsys, monkeypatch, command, setting, line, text
    ):
        """A module that fails when it is imported keeps its traceback, which begins there."""
        path = command_folder / "failing.py"
        path.write_text(f"{line}\n")
        monkeypatch.setenv("TASKHAWK_BROKER", "sqlite:///queue.db")
        if setting:
            monkeypatch.setenv(
                setting, "failing.hook" if "HOOK" in setting else "failing"
            )
        assert taskhawk.main(command.split()) == 1
        head, place, *_, last = capsys.readouterr().err.splitlines()
        assert head == "Traceback (most recent call last):"
        assert place == f'  File "{path}", line 1, in <module>'
        what = "the settings can't be read"
        if not setting:
            what = "the module 'failing' can't be imported"
        assert last == f"taskhawk: {what}: {text}"

    @pytest.mark.parametrize(
        ("command", "url"),
        [
            ("listen job", "sqlite://"),
            ("dispatch job.add", "sqlite://?max_receive_count=3"),
            ("dead-letters requeue", "sqlite://"),
            ("listen memory_job", None),
            ("dispatch memory_job.add --args [1]", None),
        ],
    )
    def test_memory(self, capsys, command_folder, monkeypatch, command, url):
        """A queue in the memory of a process that ends is refused, whoever configured it."""
        if url:
            monkeypatch.setenv("TASKHAWK_BROKER", url)
        (command_folder / "memory_job.py").write_text(
            COMMAND_MODULE.format(package="taskhawk")
            + "taskhawk.configure(TASKHAWK_BROKER='sqlite://')\n"
        )
        name = re.match(r"dead-letters \w+|\w+", command)[0]
        assert command_error(capsys, *command.split()) == (
            2,
            (
                f"taskhawk: {name}: sqlite:// is the memory of one process: use a file, such"
                " as sqlite:///queue.db"
            ),
        )

    def test_failed(self, capsys, command_folder, aws):
        """What the service refuses is said in one line, and the exit code is 1."""
        bring_dead_letters(aws, 1, itertools.repeat("r"))
        aws.always("SendMessage", fault("Odd"))
        assert command_error(capsys, "dead-letters", "requeue") == (
            1,
            "taskhawk: 1 of 1 messages failed: Odd",
        )
        code, line = command_error(capsys, "dispatch", "job.broken")
        assert code == 1
        assert line.startswith("taskhawk: ")
        assert "(Odd)" in line

    @pytest.mark.slow
    def test_unreachable(self, capsys, command_folder):
        """A service that can't be reached is said in one line, and the exit code is 1."""
        url = f"http://127.0.0.1:{free_port()}"
        configure_aws(url, "app")
        code, line = command_error(capsys, "dispatch", "job.broken")
        assert code == 1
        assert url in line

    def test_uncertain(self, capsys, command_folder, aws):
        """A worker that does not know whether a message was deleted exits with 1."""

        def receive(call: AwsCall) -> AwsAnswer:
            return brings_messages(taskhawk.Message.new("job.add", [1]))

        aws.always("ReceiveMessage", receive)
        gone = refuse(0, code="ReceiptHandleIsInvalid", ours=True)
        aws.always("DeleteMessageBatch", gone)
        options = ("--priority=default", "--loop-count=1", "--visibility-timeout=30")
        assert taskhawk.main(["listen", "job", *options]) == 1
        assert capsys.readouterr().out == (
            "sum 3 {} default\n"
            "1 received, 0 acked, 0 retried, 0 dead-lettered, 0 postponed, 0 released, 1 uncertain\n"
        )

    def test_interrupted(self, command_folder):
        """A KeyboardInterrupt ends a command without a traceback."""
        (command_folder / "job.py").write_text("raise KeyboardInterrupt")
        assert taskhawk.main(["tasks", "job"]) == 130

    @pytest.mark.slow
    @pytest.mark.parametrize("command", ["dead-letters list", "schema"])
    def test_pipe_is_closed(self, commands, command):
        """Output that nobody reads any more, as of `head`, is no traceback."""
        commands.send("job.broken")
        commands("listen", "job", "--until-empty")
        process = commands.popen(*command.split(), text=True)
        process.stdout.close()
        with process.stderr:
            errors = process.stderr.read()
        assert process.wait(WORKER_PATIENCE_S) == 1
        assert "Traceback" not in errors
        assert "BrokenPipeError" not in errors
        assert commands("dead-letters", "list").stdout.count("\n") == 1

    @pytest.mark.slow
    def test_without_streams(self, commands):
        """A daemon whose standard streams are closed works as any other."""
        commands.send("job.broken")
        code = (
            "import subprocess, sys; command = [sys.executable, '-m', 'taskhawk']\n"
            "for line in ('listen job --until-empty', 'dead-letters delete --all'):\n"
            "    script = ['sh', '-c', 'exec \"$@\" <&- >&- 2>&-', 'sh', *command]\n"
            "    print(subprocess.run([*script, *line.split()]).returncode)"
        )
        result = run_python(code, commands.folder, commands.env)
        assert result.stdout == "0\n0\n"
        assert commands("dead-letters", "list").stdout == ""

    @pytest.mark.slow
    def test_overdue(self, commands):
        """A worker ends once its grace is over, though nobody reads its output any more."""
        (commands.folder / "job.py").write_text(WORKER_MODULE)
        commands.send("job.wait", 1)
        process = commands.popen("listen", "job", "--grace=1", stdin=subprocess.PIPE)
        try:
            assert process.stdout.readline() == b"started 1\n"
            process.stdout.close()
            process.terminate()
            assert process.wait(WORKER_PATIENCE_S) == 1
        finally:
            process.kill()
            process.stdin.close()
            process.stderr.close()

    @pytest.mark.slow
    def test_encoding(self, commands):
        """A terminal that knows ASCII alone gets the rest escaped."""
        (commands.folder / "job.py").write_text(
            "import taskhawk\n"
            "@taskhawk.task(never_retry_on=(ValueError,))\n"
            "def broken(): raise ValueError('Zo\\xeb')\n"
        )
        commands.env |= {"PYTHONIOENCODING": "ascii"}
        commands.send("job.broken")
        commands("listen", "job", "--until-empty")
        line = commands("dead-letters", "list").stdout
        assert line.endswith("  ValueError: Zo\\xeb\n")

    @pytest.mark.slow
    @pytest.mark.parametrize(("command", "served"), told(SERVED))
    def test_serves(self, command_folder, monkeypatch, caplog, command, served):
        """At start, a line says what is served, with what, and what is left to others."""
        broker = f"sqlite:///{command_folder}/queue.db"
        monkeypatch.setenv("TASKHAWK_BROKER", broker)
        caplog.set_level(logging.INFO)
        assert taskhawk.main(command.split()) == 0
        assert caplog.messages[0] == served.replace("BROKER", broker)
        level = "WARNING" if "for no task" in served else "INFO"
        assert caplog.records[0].levelname == level

    def test_many_tasks(self):
        """Of many tasks, the first ten are named."""
        taskhawk._registry.clear()
        for number in range(12):
            taskhawk.task(name=f"t{number:02}")(plain)
        served = taskhawk._served(["Q"], [Priority.default])
        assert served.endswith("t07, t08, t09, and 2 more")

    @pytest.mark.slow
    @pytest.mark.parametrize("level", ["debug", "info", "error"])
    def test_log(self, commands, level):
        """A worker logs each finished task, and whose a line of another logger is."""
        commands.send("job.add", 1)
        commands.send("skip")
        lines = commands.logged("listen", "job", "--until-empty", "--log-level", level)
        levels = [line.split(maxsplit=1)[0] for line in lines]
        assert levels.count("DEBUG") == (2 if level == "debug" else 0)
        finished = [
            "INFO [job.add ID attempt 1] added",
            "INFO job.add ID: attempt 1 finished",
            "INFO skip ID: attempt 1 ignored",
        ]
        informed = [line for line in lines if line.startswith("INFO")][1:-1]
        assert informed == ([] if level == "error" else finished)

    @pytest.mark.slow
    def test_quiet_libraries(self, commands, ministack, queue_name):
        """What botocore says of its requests at INFO is not shown."""
        commands.env |= TestReadme.aws(ministack) | {
            "TASKHAWK_BROKER": "sqs",
            "TASKHAWK_QUEUE": queue_name,
            "AWS_ACCOUNT_ID": "000000000000",
        }
        assert commands("provision").stderr == ""

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [[], ["--log-format=json"]], ids=["", "json"])
    @pytest.mark.parametrize("root", ["", '"root": {"handlers": ["h"]},'])
    def test_dict_config(self, commands, root, options):
        """A dictConfig() of a tasks module neither silences the log nor drops its options."""
        config = f"""import logging.config
logging.config.dictConfig({{
    "version": 1,
    "disable_existing_loggers": True,
    "formatters": {{"theirs": {{"format": "theirs %(task)s %(message)s"}}}},
    "handlers": {{"h": {{"class": "logging.StreamHandler", "formatter": "theirs"}}}},
    {root}
    "loggers": {{"shop": {{"handlers": ["h"], "level": "INFO", "propagate": False}}}},
}})
"""
        with (commands.folder / "job.py").open("a") as file:
            file.write(config)
        commands.send("job.add", 1)
        lines = commands.logged("listen", "job", "--until-empty", *options)
        (added,) = [line for line in lines if "added" in line]
        (finished,) = [line for line in lines if "finished" in line]
        if options:
            found = json.loads(added)
            assert (found["task"], found["message"]) == ("job.add", "added")
            assert json.loads(finished)["message"] == "job.add ID: attempt 1 finished"
        else:
            assert added == "theirs job.add added"
            text = "theirs job.add " if root else "INFO "
            assert finished == f"{text}job.add ID: attempt 1 finished"

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [[], ["--log-format=json"]], ids=["", "json"])
    def test_basic_config(self, commands, options):
        """A basicConfig() of a tasks module holds; a format that was asked for does too."""
        with (commands.folder / "job.py").open("a") as file:
            file.write("logging.basicConfig(format='theirs %(task)s %(message)s')\n")
        commands.send("job.add", 1)
        lines = commands.logged("listen", "job", "--until-empty", *options)
        (finished,) = [line for line in lines if "finished" in line]
        if options:
            assert json.loads(finished)["task"] == "job.add"
        else:
            assert finished == "theirs job.add job.add ID: attempt 1 finished"

    @pytest.mark.slow
    def test_early_log(self, commands):
        """What is logged while modules are imported has the format that was asked for."""
        (commands.folder / "job.py").write_text("import taskhawk.nothing")
        commands.env |= {"TASKHAWK_QUEU": "x"}
        (commands.folder / "job.py").write_text(
            "import taskhawk\n@taskhawk.task\ndef add(): pass\n"
            "taskhawk.settings.TASKHAWK_SYNC\n"
        )
        options = ("--log-format=json", "--until-empty")
        first, *_ = commands("listen", "job", *options).stderr.splitlines()
        assert json.loads(first)["message"].startswith(
            "TASKHAWK_QUEU in the environment"
        )

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "logging",
        [
            '"root": {"handlers": ["h"]}',
            '"root": {"level": "INFO"}',
            '"loggers": {"django": {"handlers": ["h"]}}',
        ],
        ids=["root", "root without handlers", "no root"],
    )
    def test_django(self, commands, logging):
        """Django is set up before modules are imported; without one, the apps' tasks are.

        Whatever its LOGGING says, the worker's log has its format and the task's fields.
        """
        self.write_django(commands, logging)
        commands.send("shop.tasks.sell")
        result = commands("listen", "--until-empty", "--log-format=json")
        assert re.fullmatch("sold shop.Sale\n1 received, 1 acked,.*\n", result.stdout)
        lines = [json.loads(line) for line in result.stderr.splitlines()]
        assert [line["logger"] for line in lines] == ["taskhawk"] * 3
        assert lines[1]["task"] == "shop.tasks.sell"

    @staticmethod
    def write_django(commands, logging):
        """Write a site of Django whose LOGGING has this in it."""
        for name, text in COMMAND_DJANGO.items():
            path = commands.folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.replace("LOGGING_HERE", logging))
        commands.env |= {"DJANGO_SETTINGS_MODULE": "site_settings"}

    @pytest.mark.slow
    @pytest.mark.parametrize("line", ["import not_installed", "1 / 0"])
    def test_django_tasks_fail(self, commands, line):
        """An app's tasks that can't be imported are an error: they would not be served."""
        self.write_django(commands, '"root": {}')
        with (commands.folder / "shop/tasks.py").open("a") as file:
            file.write(line)
        errors = commands("listen", "--until-empty", code=1).stderr.splitlines()
        assert errors[-1].startswith(
            "taskhawk: the module 'shop.tasks' can't be imported: "
        )
        assert f"    {line}" in errors

    @pytest.mark.slow
    def test_django_fails(self, commands):
        """Where Django can't be set up, the traceback says why."""
        (commands.folder / "broken_settings.py").write_text("1 / 0\n")
        commands.env |= {"DJANGO_SETTINGS_MODULE": "broken_settings"}
        errors = commands("tasks", "job", code=1).stderr
        assert "broken_settings.py" in errors
        last = errors.splitlines()[-1]
        assert last == "taskhawk: Django can't be set up: division by zero"


EMF_COUNTS = ("Received", "Acked", "Retried", "DeadLettered", "Postponed")


def emf_lines(text: str) -> list[dict[str, Any]]:
    """Return the metrics among printed lines, by their names; each line must be legal."""
    found = []
    for line in text.splitlines():
        if not line.startswith("{"):
            continue
        values = json.loads(line)
        aws = values.pop("_aws")
        assert abs(aws["Timestamp"] / 1000 - time.time()) < 60
        [directive] = aws["CloudWatchMetrics"]
        assert directive["Namespace"] == "my app"
        assert directive["Dimensions"] == [["queue"]]
        units = {each["Name"]: each["Unit"] for each in directive["Metrics"]}
        assert units.keys() == values.keys() - {"queue"}
        units.pop("RunDuration", None)
        assert units.pop("OldestRunAge") == "Seconds"
        assert set(units.values()) == {"Count"}
        found.append(values)
    return found


class TestMetrics:
    """A worker prints what CloudWatch makes metrics of, each minute and at its end."""

    @pytest.fixture
    def work(self, worker_broker):
        """Return a function that runs a worker which prints metrics."""

        def run(*queues: str, **options: Any) -> taskhawk.Ledger:
            return taskhawk._MeasuredWorker(
                worker_broker,
                queues or [WORKER_QUEUE],
                until_empty=True,
                wait_s=0.05,
                namespace="my app",
                **options,
            ).run()

        return run

    def test_counts(self, work, worker_broker, worker_act, capsys):
        """Each end of the ledger is counted for its queue, and each run has a duration."""
        acts = ["run", "run", "ignore", "never"]
        worker_broker.put(worker_act, *[(act,) for act in acts])
        worker_broker.put(worker_act, ("run",), queue=f"{WORKER_QUEUE}-BULK")
        ledger = work(WORKER_QUEUE, f"{WORKER_QUEUE}-BULK")
        first, second = emf_lines(capsys.readouterr().out)
        assert first["queue"] == WORKER_QUEUE
        assert second["queue"] == f"{WORKER_QUEUE}-BULK"
        assert [first[name] for name in EMF_COUNTS] == [4, 3, 0, 1, 0]
        assert [second[name] for name in EMF_COUNTS] == [1, 1, 0, 0, 0]
        assert (len(first["RunDuration"]), len(second["RunDuration"])) == (4, 1)
        assert first["OldestRunAge"] == first["LeasesLost"] == 0
        assert ledger.received == 5

    def test_each_minute(self, work, worker_broker, worker_act, monkeypatch):
        """Lines tell what is new since the last one, and how old the oldest run is."""
        monkeypatch.setattr(taskhawk, "_EMF_EVERY_S", 0.01)
        printed = io.StringIO()
        monkeypatch.setattr(sys, "stdout", printed)

        def slow() -> None:
            def oldest() -> list[float]:
                return [each["OldestRunAge"] for each in emf_lines(printed.getvalue())]

            worker_eventually(lambda: len([age for age in oldest() if age > 0]) > 2)

        WORKER_ACTS["slow"] = slow
        worker_broker.put(worker_act, ("run",), ("slow",))
        work()
        lines = emf_lines(printed.getvalue())
        assert sum(line["Received"] for line in lines) == 2
        assert sum(line["Acked"] for line in lines) == 2
        durations = [ms for line in lines for ms in line.get("RunDuration", ())]
        assert len(durations) == 2
        ages = [line["OldestRunAge"] for line in lines]
        assert max(ages) * 1000 <= max(durations) + 1
        assert ages[-1] == 0

    def test_lease_lost(self, work, worker_broker, worker_act, capsys):
        """Runs that lost their lease are counted: others may have run them too."""

        def lose() -> None:
            taskhawk.current_task()._received.lease_lost = True

        WORKER_ACTS["lose"] = lose
        worker_broker.put(worker_act, ("lose",), ("run",))
        work()
        [line] = emf_lines(capsys.readouterr().out)
        assert line["LeasesLost"] == 1

    def test_sample(self):
        """Of very many runs, a hundred durations are a fair sample: a line holds no more."""
        runs = taskhawk._Runs()
        for duration_ms in range(10_000):
            runs.add(duration_ms, lost=False)
        assert (runs.count, len(set(runs.durations_ms))) == (10_000, 100)
        assert 3000 < sum(runs.durations_ms) / 100 < 7000

    def test_cannot_print(self, work, worker_broker, worker_act, monkeypatch, caplog):
        """Where nothing can be printed for a while, the worker goes on."""
        monkeypatch.setattr(taskhawk, "_EMF_EVERY_S", 0.01)

        class Full(io.StringIO):
            def flush(self) -> None:
                if not caplog.messages:
                    raise OSError("disk full")

        monkeypatch.setattr(sys, "stdout", Full())
        WORKER_ACTS["slow"] = lambda: worker_eventually(lambda: caplog.messages)
        worker_broker.put(worker_act, ("slow",))
        assert work().acked == 1
        assert caplog.messages == ["can't print metrics: disk full"]

    @pytest.mark.slow
    def test_command(self, commands):
        """The command prints the last line before its ledger."""
        commands.send("skip")
        result = commands("listen", "job", "--until-empty", "--emf", "my app")
        assert len(emf_lines(result.stdout)) == 2
        assert result.stdout.splitlines()[-1].startswith("1 received, 1 acked, ")

    @pytest.mark.slow
    def test_overdue(self, commands):
        """So it does where the grace is over, and a run is left."""
        (commands.folder / "job.py").write_text(WORKER_MODULE)
        commands.send("job.wait", 1)
        options = ("--grace=1", "--emf=my app")
        process = commands.popen("listen", "job", *options, stdin=subprocess.PIPE)
        try:
            assert process.stdout.readline() == b"started 1\n"
            process.terminate()
            output = process.stdout.read().decode()
            assert process.wait(WORKER_PATIENCE_S) == 1
        finally:
            process.kill()
            process.stdin.close()
            process.stdout.close()
            process.stderr.close()
        [line] = emf_lines(output)
        assert line["Received"] == 1
        assert line["OldestRunAge"] > 0

    @pytest.mark.parametrize("name", ["", "AWS/SQS", ":x", "é", "x" * 256])
    def test_namespace(self, capsys, name):
        """What is no namespace of CloudWatch is refused."""
        code, line = command_error(capsys, "listen", "job", f"--emf={name}")
        assert code == 2
        expected = f"expected a namespace of CloudWatch, such as myapp, got {name!r}"
        assert f"argument --emf: {expected}" in line


# --- 27. vendoring --------------------------------------------------------------------

# Where a part's copy ends, and the classes of the last part it has: a sample that is quick.
VENDOR_CUTS = {"publisher": "PART IV:", "service": "PART V:", "production": "PART VI:"}
VENDOR_CLASSES = {
    "publisher": ["TestTasks", "TestPublishing", "TestBatch", "TestCapture"],
    "service": ["TestProcessing", "TestSync"],
    "production": ["TestHoldings"],
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
VENDOR_LEDGER = "2 received, 2 acked, 0 retried, 0 dead-lettered, 0 postponed, 0 released, 0 uncertain\n"
VENDOR_CONFTEST = """
import pathlib, taskhawk
assert pathlib.Path(taskhawk.__file__).parent == pathlib.Path(__file__).parent

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

    @pytest.mark.slow
    def test_whole(self, tmp_path, capsys):
        """A copy has all the text below a header; it can write and check further copies."""
        path = vendor_package(tmp_path)
        code, report = vendor(capsys, path)
        banners = re.findall(r"(?m)^# (?:===|--- \d+\.) (.+?) [-=]+$", house_source())
        banners.remove("PART I: MEANING")  # has no text of its own
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

    def test_no_copy(self, tmp_path, capsys):
        """A folder, or a copy to check that is not there, is refused by name."""
        folder, gone = f"{tmp_path}", f"{tmp_path}/nosuch.py"
        assert command_error(capsys, "vendor", f"{folder}/") == (
            2,
            (
                f"taskhawk: vendor: {folder} is a folder. Fix: name the file, such as"
                f" {folder}/taskhawk.py"
            ),
        )
        assert command_error(capsys, "vendor", "--check", gone) == (
            2,
            (
                f"taskhawk: vendor: {gone} does not exist. Fix: name the file of a"
                " vendored copy"
            ),
        )

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
        path.write_text(path.read_text().replace("\nVERSION", "\nOTHER = VERSION"))
        assert taskhawk.main(["vendor", "--check", str(path)]) == 1
        first = first.replace("unmodified", "changed by hand")
        changed = [first, "changed by hand: names and limits"]
        assert capsys.readouterr().out.splitlines() == changed

    def test_no_folder(self, tmp_path, capsys):
        """A folder that is missing is not made: it would have to be a package."""
        path = tmp_path / "vendor" / "taskhawk.py"
        expected = (
            f"taskhawk: vendor: {path.parent} is not a folder. Fix: make it first"
        )
        assert command_error(capsys, "vendor", str(path)) == (2, expected)

    @pytest.mark.slow
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
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
            code = taskhawk.main(["vendor", {str(path)!r}])
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            sys.exit(code)"""
        result = run_python(code, cwd=tmp_path)
        error = "taskhawk: [Errno 27] File too large\n"
        assert (result.returncode, result.stdout, result.stderr) == (1, "", error)
        assert (os.listdir(tmp_path), path.read_bytes()) == (["vendored.py"], before)

    @pytest.mark.parametrize(
        "part",
        [
            part if part == "publisher" else pytest.param(part, marks=pytest.mark.slow)
            for part in VENDOR_CUTS
        ],
    )
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
        error = (
            "taskhawk: this copy of the file has no command line: vendor it whole, or"
            " call listen_for_messages() in a script\n"
        )
        assert (result.returncode, result.stderr) == (2, error)

    @pytest.mark.slow
    @pytest.mark.parametrize("part", VENDOR_CUTS)
    def test_cut_is_tested(self, part, tmp_path):
        """The suite, cut like the module, passes; what uses a later part is left out."""
        module, tests = house_source(), Path(__file__).read_text(encoding="utf-8")
        (tmp_path / "taskhawk.py").write_text(vendor_cut(module, part))
        left = f"from __future__ import annotations\n{vendor_cut(tests, part)}"
        (tmp_path / "test_taskhawk.py").write_text(left)  # may annotate what is gone
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
            before = README_DJANGO if name.endswith("_settings.py") else ""
            (folder / name).write_text(before + block.text)


README_DJANGO = """
DEBUG = True
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "shop.db"}}
"""


def readme_normalised(text: str) -> str:
    """Replace what differs from run to run: ids, times, paths, the frames of tracebacks."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", text)
    text = re.sub(r"(?m)^# [0-9a-f]{16} ", "# HASH ", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "TIME", text)
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?(Z|\+00:00)"
    text = re.sub(time, "TIME", text)
    text = re.sub(r"reached; again in [\d.]+ s", "reached; again in WAIT", text)
    text = re.sub(r"\d+ s ago", "AGE", text)
    text = re.sub(r'"duration_ms": \d+', "DURATION", text)
    text = re.sub(r"/\S*/\w+\.db", "PATH", text)
    return re.sub(r"(?m)(^Traceback .*\n)(?: .*\n)+", r"\1  ...\n", text)


README_GROUPS = ["plain", "aws", "django", "flask"]  # blocks that share an interpreter
README_NEW_DJANGO = pytest.mark.skipif(sys.version_info < (3, 12), reason="Django 6")
README_FASTAPI = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("aiohttp", "fastapi", "uvicorn"))),
    reason="not installed",
)
README_BEFORE = {
    "flask": "import web\n",
    "mall": "import django; django.setup()\n",
    "django": "import django; django.setup()\n"
    "from django.core.management import call_command; call_command('migrate', verbosity=0)\n",
}
README_AFTER = {  # what the blocks dispatched, or can dispatch now, is run
    "aws": "import tasks; tasks.audit.dispatch('ready')\n"
    "print(taskhawk.listen_for_messages(taskhawk.Priority.default, until_empty=True).acked)",
    "flask": "import web_tasks, taskhawk\n"
    "web_tasks.confirm.dispatch(1, 'you@example.com')\n"
    "taskhawk.listen_for_messages(taskhawk.Priority.default, until_empty=True)\n"
    "print(open('outbox.txt').read(), end='')",
    "django": "import taskhawk\n"
    "taskhawk.listen_for_messages(taskhawk.Priority.default, until_empty=True)",
    "mall": "import taskhawk\n"
    "taskhawk.listen_for_messages(list(taskhawk.Priority), until_empty=True)",
}
README_AFTER_OUTPUT = {
    "aws": "ready: attempt 1 of a default message, {}\n1\n",
    "django": "Welcome! -> you@example.com\n",
    "flask": "you@example.com: we have your order 1\n",
    "mall": "May: attempt 1 of report\nJune: attempt 1 of report\n",
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


# A service whose runs end in each way; what is measured of them is printed at the end.
RECIPE_SERVICE = """
import os, sys, taskhawk
broker = {"TASKHAWK_BROKER": "sqlite://"}
taskhawk.configure(broker, **SETTINGS)

@taskhawk.task(name="shop.sell")
def sell(how):
    inside()
    if how == "fail":
        raise ValueError("sold out")
    if how == "ignore":
        raise taskhawk.IgnoreException
    if how == "later":
        raise taskhawk.RetryException("closed", delay_seconds=60)

def serve():
    for how in ("run", "fail", "ignore", "later"):
        sell.dispatch(how)
    queue = taskhawk.Outgoing("rubbish", {})
    taskhawk._brokers.broker().send("TASKHAWK-DEFAULT", [queue])
    taskhawk.listen_for_messages(taskhawk.Priority.default, num_messages=9, loop_count=1)
"""
RECIPES = {
    "prometheus": """
SETTINGS = {"TASKHAWK_RUN_HOOK": "prometheus_hook.count_run"}
inside = int
SERVICE
serve()
import prometheus_client
for metric in prometheus_client.REGISTRY.collect():
    for sample in metric.samples:
        if sample.name in ("taskhawk_runs_total", "taskhawk_run_seconds_count"):
            print(*sample.labels.values(), sample.value)
""",
    "statsd": """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 0))
import statsd.defaults
statsd.defaults.HOST, statsd.defaults.PORT = server.getsockname()
SETTINGS = {"TASKHAWK_RUN_HOOK": "statsd_hook.count_run"}
inside = int
SERVICE
import statsd_hook
statsd_hook.CLIENT = statsd.StatsClient(*server.getsockname(), prefix="taskhawk")
serve()
for _ in range(10):
    name, _, value = server.recv(100).decode().partition(":")
    print(name, value if value.endswith("|c") else value.split("|")[1])
""",
    "sentry": """
import sentry_hook, sentry_sdk
def before_send(event, hint):
    transaction, tags = event.get("transaction"), event.get("tags", {})
    error = event["exception"]["values"][-1]["value"]
    print(transaction, [*tags], error)
sentry_sdk.init("http://key@127.0.0.1:9/1", before_send=before_send)
SETTINGS = {"TASKHAWK_ERROR_HOOK": "sentry_hook.report_error"}
inside = int
SERVICE
serve()
""",
    "tracing": """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exporter = InMemorySpanExporter()
trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))
tracer = trace.get_tracer("shop")
SETTINGS = {
    "TASKHAWK_TASK_CLASS": "tracing.TracedTask",
    "TASKHAWK_DEFAULT_HEADERS": "tracing.default_headers",
}
inside = lambda: tracer.start_span("inside").end()
SERVICE
with tracer.start_as_current_span("request"):
    serve()
spans = exporter.get_finished_spans()
names = {span.context.span_id: span.name for span in spans}
print(len({span.context.trace_id for span in spans}))
for span in spans:
    kind = span.attributes.get("messaging.operation.type")
    parent = span.parent and names[span.parent.span_id]
    error = span.attributes.get("error.type")
    print(span.name, span.kind.name, kind, parent, span.status.status_code.name, error)
""",
}
RECIPES_PRINT = {
    "prometheus": """
        shop.sell done 1.0
        shop.sell retry 2.0
        shop.sell ignored 1.0
        none retry 1.0
        shop.sell 4.0
        none 1.0
    """,
    "statsd": """
        taskhawk.shop.sell.done 1|c
        taskhawk.shop.sell ms
        taskhawk.shop.sell.retry 1|c
        taskhawk.shop.sell ms
        taskhawk.shop.sell.ignored 1|c
        taskhawk.shop.sell ms
        taskhawk.shop.sell.retry 1|c
        taskhawk.shop.sell ms
        taskhawk.none.retry 1|c
        taskhawk.none ms
    """,
    "sentry": """
        shop.sell ['taskhawk.id'] sold out
        None [] message: not JSON at character 0
    """,
    "tracing": """
        1
        send shop.sell PRODUCER send request UNSET None
        send shop.sell PRODUCER send request UNSET None
        send shop.sell PRODUCER send request UNSET None
        send shop.sell PRODUCER send request UNSET None
        inside INTERNAL None process shop.sell UNSET None
        process shop.sell CONSUMER process send shop.sell UNSET None
        inside INTERNAL None process shop.sell UNSET None
        process shop.sell CONSUMER process send shop.sell ERROR ValueError
        inside INTERNAL None process shop.sell UNSET None
        process shop.sell CONSUMER process send shop.sell UNSET None
        inside INTERNAL None process shop.sell UNSET None
        process shop.sell CONSUMER process send shop.sell ERROR RetryException
        request INTERNAL None None UNSET None
    """,
}


class TestReadme:
    """README.md says what is true: its code runs, and its output is real."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "group",
        [
            *README_GROUPS,
            pytest.param("mall", marks=README_NEW_DJANGO),
            pytest.param("asyncio", marks=README_FASTAPI),
        ],
    )
    def test_python_blocks_run(self, group, request, tmp_path):
        """Each Python block runs, in order, and prints what the block behind it says."""
        readme_files(tmp_path)
        python = [block for block in readme_blocks() if block.language == "python"]
        python = [block for block in python if block.marks.get("run") != "never"]
        assert {block.marks.get("run", "plain") for block in python} == {
            *README_GROUPS,
            "mall",
            "asyncio",
        }
        blocks = [block for block in python if block.marks.get("run", "plain") == group]
        sources = [(block.line, self.source(block), block.marks) for block in blocks]
        after = (9999, README_AFTER.get(group, ""), {})
        (tmp_path / "blocks.json").write_text(json.dumps([*sources, after]))
        env = {"TASKHAWK_BROKER": "sqlite:///queue.db"}
        if group == "django":
            env = {"DJANGO_SETTINGS_MODULE": "shop_settings"}
        if group == "mall":
            env = {"DJANGO_SETTINGS_MODULE": "mall_settings"}
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
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_recipes(self, tmp_path, recipe):
        """The hooks for traces, metrics and errors work with the libraries they are for."""
        readme_files(tmp_path)
        code = RECIPES[recipe].replace("SERVICE", RECIPE_SERVICE)
        result = run_python(code, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        expected = textwrap.dedent(RECIPES_PRINT[recipe]).strip()
        assert result.stdout.strip() == expected

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

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("command", "passed"),
        [
            (["pytest", "-q", "test_tasks.py"], "4 passed"),
            (["unittest", "test_tasks_unittest"], "Ran 2 tests"),
            (["django", "test", "test_tasks_django"], "Ran 2 tests"),
        ],
        ids=["pytest", "unittest", "Django"],
    )
    def test_test_recipes(self, command, passed, tmp_path):
        """The tests of README pass, by the command that people run."""
        readme_files(tmp_path)
        env = {"DJANGO_SETTINGS_MODULE": "shop_settings"}
        result = run_python(["-m", *command], cwd=tmp_path, env=env)
        assert result.returncode == 0, result.stdout + result.stderr
        assert passed in result.stdout + result.stderr

    @pytest.mark.slow
    def test_five_steps(self, ministack, tmp_path):
        """The way from the demo to a real queue, on an emulator as README says."""
        readme_files(tmp_path)
        shown = [block.text for block in readme_blocks() if block.language == "sh"]
        (steps,) = [text for text in shown if "# 5." in text]
        (emulator,) = [text for text in shown if "AWS_ENDPOINT_SQS" in text]
        emulator = emulator.replace("http://127.0.0.1:4566", ministack)
        export, _, steps = steps.replace(" # 5.", " --until-empty # 5.").partition("\n")
        script = f'set -e; python() {{ "$PY" "$@"; }}\n{export}\n{emulator}{steps}'
        result = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=python_env({"PY": sys.executable}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert "\nnothing is wrong\n" in result.stdout
        assert re.search(r"\ndefault +1 +0 +0 +0\n", result.stdout)
        assert "\nHello! -> you@example.com\n1 received, 1 acked," in result.stdout

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
        """The messages shown are valid ones."""
        blocks = [block for block in readme_blocks() if block.language == "json"]
        values = [json.loads(block.text) for block in blocks]
        (message,) = [value for value in values if "task" in value]
        assert taskhawk.Message(message)

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


@contextlib.contextmanager
def service_worker(
    folder: Path, env: Mapping[str, str], *modules: str
) -> Iterator[None]:
    """Run a worker of some modules for the length of the block, then stop it."""
    with (folder / "worker.txt").open("w") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "taskhawk", "listen", "--grace", "5", *modules],
            cwd=folder,
            env=python_env(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
        )
    try:
        yield
        worker.terminate()
        assert worker.wait(30) == 0
    finally:
        worker.kill()
        worker.wait()


def service_post(url: str, data: object) -> tuple[int, Any]:
    """Post JSON, and return the status and the answer."""
    request = urllib.request.Request(url, json.dumps(data).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.status, json.load(answer)


def service_wait(is_done: Callable[[], object]) -> None:
    """Wait for what another process does."""
    until = time.monotonic() + 60
    while not is_done():
        assert time.monotonic() < until
        time.sleep(0.05)


class ServiceHook(http.server.BaseHTTPRequestHandler):
    """Keeps the JSON that is posted to it."""

    called: list[Any]  # by the server that the handler is made for

    def do_POST(self) -> None:
        """Keep it."""
        size = int(self.headers["Content-Length"])
        self.called.append(json.loads(self.rfile.read(size)))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.slow
class TestServices:
    """README's services start, take a request, and run its task."""

    @pytest.fixture(params=["SQLite", "ministack"])
    def env(self, request, tmp_path):
        """Return an environment with a queue, after the modules of README are written."""
        readme_files(tmp_path)
        if request.param == "SQLite":
            return {"TASKHAWK_BROKER": f"sqlite:///{tmp_path}/web.db"}
        env = TestReadme.aws(request.getfixturevalue("ministack"))
        env |= {"AWS_ACCOUNT_ID": "000000000000", "TASKHAWK_QUEUE": "dev-web"}
        command = ["-m", "taskhawk", "provision"]
        result = run_python(command, cwd=tmp_path, env=env)
        assert result.returncode == 0, result.stderr
        return env

    def test_flask(self, env, tmp_path):
        """Flask's server dispatches, and a worker runs it in the application's context."""
        port, outbox = free_port(), tmp_path / "outbox.txt"
        flask_run = ["-m", "flask", "--app", "web", "run", "--port", str(port)]
        with (
            server(port, flask_run, python_env(env), tmp_path) as url,
            service_worker(tmp_path, env, "web_tasks"),
        ):
            order = service_post(f"{url}/orders/7", {"address": "you@example.com"})
            service_wait(outbox.exists)
            service_wait(outbox.read_text)
        status, answer = order
        assert (status, len(answer["message"])) == (202, 36)
        assert outbox.read_text() == "you@example.com: we have your order 7\n"
        ledger = (tmp_path / "worker.txt").read_text()
        assert ledger.startswith("1 received, 1 acked, ")

    @pytest.fixture
    def hook(self):
        """Yield a server that keeps what is posted to its URL."""
        called: list[Any] = []
        handler = type("Handler", (ServiceHook,), {"called": called})
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
            thread = threading.Thread(target=listener.serve_forever)
            thread.start()
            url = f"http://127.0.0.1:{listener.server_port}/"
            yield types.SimpleNamespace(url=url, called=called)
            listener.shutdown()
            thread.join()

    @README_FASTAPI
    def test_fastapi(self, env, tmp_path, hook):
        """A lifespan runs a worker on the server's loop, with the server's client."""
        port = free_port()
        run = ["-m", "uvicorn", "webhooks:app", "--port", str(port)]
        path = tmp_path / "webhooks.py"  # a poll in flight is waited out
        path.write_text(path.read_text().replace("grace_s=20", "grace_s=5"))
        env["PYTHONUNBUFFERED"] = "1"
        with server(port, run, python_env(env), tmp_path) as url:
            answers = [
                service_post(f"{url}/events", {"url": hook.url, "paid": paid})
                for paid in range(3)
            ]
            service_wait(lambda: len(hook.called) == 3)
        assert {status for status, _ in answers} == {202}
        assert sorted(event["paid"] for event in hook.called) == [0, 1, 2]
        log = (tmp_path / "server.log").read_text()
        assert "\n3 received, 3 acked, " in log, log

    def test_lambda(self, tmp_path):
        """The handler takes events as AWS has recorded them, and raises what fails."""
        readme_files(tmp_path)
        hello = processing_body("tasks.send_email", args=["you@example.com", "Hello!"])
        fails = processing_body("tasks.pay", args=[7])
        events = [
            {"Records": [lambda_sns_record(hello, "1")]},
            {"Records": [lambda_sqs_record(body, "1") for body in (fails, hello)]},
        ]
        (tmp_path / "events.json").write_text(json.dumps(events))
        code = """if True:
            import json, handler
            with open("events.json") as file:
                for event in json.load(file):
                    try:
                        handler.handler(event, None)
                    except ValueError as error:
                        print(error)
        """
        env = {"AWS_REGION": "us-east-1", "AWS_ENDPOINT_SQS": "http://127.0.0.1:9"}
        env |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        result = run_python(code, cwd=tmp_path, env=env)
        printed = ["Hello! -> you@example.com"] * 2 + ["bill 7 has no amount"]
        assert (result.returncode, result.stdout.splitlines()) == (0, printed)


#: a solution of the last exercise in README, and of nothing else: see SqliteBroker
READING_BROKER = """
import threading
import time
import uuid

import taskhawk
from taskhawk import Depth, QueueInfo, QueueMessage, Refusal


class MemoryBroker(taskhawk.Broker):
    max_bytes = 1_048_576
    max_delay_s = 900

    def __init__(self, clock=time.time):
        self.clock = clock
        # Guards the rows, and tells receivers that wait of what is sent.
        self.changed = threading.Condition()
        self.rows = []

    def send(self, destination, entries):
        with self.changed:
            for entry in entries:
                now = self.clock()
                self.rows.append(
                    {
                        "queue": destination,
                        "entry": entry,
                        "id": str(uuid.uuid4()),
                        "sent": now,
                        "visible_at": now + entry.delay_s,
                        "receives": 0,
                        "receipt": None,
                    }
                )
            self.changed.notify_all()
        return []

    def receive(self, queue, limit, wait_s, lease_s, stop):
        until = time.monotonic() + wait_s
        with self.changed:
            while True:
                found = self._claim(queue, min(limit, 10), lease_s)
                left_s = until - time.monotonic()
                if found or left_s <= 0 or stop.is_set():
                    return found
                self.changed.wait(min(left_s, 0.05))  # the clock moves, too

    def _claim(self, queue, limit, lease_s):
        info, found = self.info(queue), []
        for row in self.rows:
            if row["queue"] != queue or row["visible_at"] > self.clock():
                continue
            if row["receives"] == info.max_receive_count:
                row |= {"queue": info.dead_letter_queue, "receives": 0, "receipt": None}
                continue
            hidden_s = info.visibility_timeout_s if lease_s is None else lease_s
            row["visible_at"] = self.clock() + hidden_s
            row["receives"] += 1
            row["receipt"] = str(uuid.uuid4())
            found.append(self._message(row))
            if len(found) == limit:
                break
        return found

    def _message(self, row):
        counts = {
            "ApproximateReceiveCount": str(row["receives"]),
            "SentTimestamp": str(int(row["sent"] * 1000)),
        }
        return QueueMessage(
            row["entry"].body,
            row["id"],
            row["receipt"],
            counts,
            dict(row["entry"].attributes),
            row["queue"],
            self,
        )

    def delete(self, queue, receipts, *, retry=False):
        return self._each(queue, receipts, self.rows.remove)

    def change_visibility(self, queue, changes, *, retry=False):
        seconds = dict(changes)

        def change(row):
            row["visible_at"] = self.clock() + seconds[row["receipt"]]
            if seconds[row["receipt"]] == 0:
                self.changed.notify_all()

        return self._each(queue, list(seconds), change)

    def _each(self, queue, receipts, change):
        refused = []
        with self.changed:
            for index, receipt in enumerate(receipts):
                rows = [row for row in self.rows if row["receipt"] == receipt]
                if rows and rows[0]["queue"] == queue:
                    change(rows[0])
                else:
                    code = "ReceiptHandleIsInvalid"
                    refused.append(Refusal(index, code, "it is stale", final=True))
        return refused

    def info(self, queue):
        if queue.endswith("-DLQ"):
            return QueueInfo(30.0, None, None)
        return QueueInfo(30.0, f"{queue}-DLQ", 2)

    def depth(self, queue):
        with self.changed:
            rows = [row for row in self.rows if row["queue"] == queue]
        visible = [row for row in rows if row["visible_at"] <= self.clock()]
        received = [row for row in rows if row["receives"] and row not in visible]
        delayed = len(rows) - len(visible) - len(received)
        return Depth(len(visible), len(received), delayed)

    def url(self, queue):
        return f"memory:{queue}"

    def close(self):
        pass
"""


@pytest.mark.slow
class TestReading:
    """README's page for who reads the source is true, and its exercises can be done."""

    def test_names(self):
        """What it tells to read is there, in the room that it says."""
        text = project_file("README.md").read_text()
        page = text.partition("\n## Read the source\n")[2].partition("\n## ")[0]
        rows = re.findall(r"(?m)^\| \d+ \| rooms? (\d+)(?: \w+ (\d+))?: (.*?) \|", page)
        assert len(rows) == 6
        for first, last, names in rows:
            source = self.rooms(int(first), int(last or first))
            for name in re.findall(r"`([\w.]+)`", names):
                word = name.rpartition(".")[2]
                defined = re.search(rf"(?m)^ *(def |class |){word}\b[(: ]", source)
                assert defined, name

    @staticmethod
    def rooms(first, last):
        """Return the source of some rooms."""
        lines = house_source().splitlines()
        starts = [line for line, number, _ in house_banners(house_source())]
        numbers = [number for _, number, _ in house_banners(house_source())]
        begin = starts[numbers.index(str(first))]
        end = starts[numbers.index(str(last)) + 1]
        return "\n".join(lines[begin:end])

    @staticmethod
    def run_suite(folder, *options):
        """Run a copy of the suite on a copy of the module, and return what pytest says."""
        shutil.copy(project_file("pyproject.toml"), folder)
        shutil.copy(__file__, folder / "test_taskhawk.py")
        env = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options],
            cwd=folder,
            env={**env, "PYTHONPATH": str(folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )

    @pytest.mark.parametrize("breaks", ["TestRetryPolicies", "TestProcessing"])
    def test_changes_are_noticed(self, breaks, tmp_path):
        """The tests that README names fail after the change that it proposes."""
        (block,) = [b for b in readme_blocks() if b.marks.get("breaks") == breaks]
        old, new = (
            "".join(
                f"{line[1:]}\n" for line in block.text.splitlines() if line[0] == sign
            )
            for sign in "-+"
        )
        source = house_source()
        assert source.count(old) == 1
        (tmp_path / "taskhawk.py").write_text(source.replace(old, new))
        result = self.run_suite(tmp_path, "-x", "-k", breaks, "-m", "not slow")
        assert (result.returncode, "1 failed" in result.stdout) == (1, True)

    def test_memory_broker(self, tmp_path):
        """A broker in memory passes the contract, in as many statements as README says."""
        readme_files(tmp_path)
        (tmp_path / "memory_broker.py").write_text(READING_BROKER)
        shutil.copy(taskhawk.__file__, tmp_path / "taskhawk.py")
        result = self.run_suite(tmp_path, "test_memory_broker.py")
        assert result.returncode == 0, result.stdout
        assert house_statements(ast.parse(READING_BROKER)) == 81
