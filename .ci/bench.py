#!/usr/bin/env python3
"""Measure taskhawk beside raw botocore, against a fast local stub of SQS.

usage: python .ci/bench.py [--rounds 5] [--only WORD] [--against FILE] [--json]

Every figure is the median of some rounds; in each round both sides run in turn, each in a process
of its own. The stub is another process, on the last CPU, so that CPU time is the client's alone.
Where both sides are compared they run on the first CPU, but for "all CPUs": what a thread costs
that is woken on another CPU differs more from run to run than what is measured here.
Prints ratios (taskhawk to botocore, with botocore's default Config) and the targets; it never
fails a build. With --against, another version of taskhawk.py takes the place of botocore.
"""

import argparse
import asyncio
import collections
import functools
import heapq
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
QUEUE = "TASKHAWK-BENCH"
MESSAGE = {
    "id": "b1328174-a21c-43d3-b303-964dfcc76efc",
    "metadata": {"priority": "default", "timestamp": 1460868253255, "version": "1.0"},
    "headers": {"request_id": "1234"},
    "task": "bench.job",
    "args": ["email@automatic.com", "Hello!"],
    "kwargs": {"from_email": "spam@example.com"},
}
BODY = json.dumps(MESSAGE)


# --- the stub ---


class Stub(asyncio.Protocol):
    """SQS in memory: its JSON protocol, long polls, visibility timeouts, and requests counted."""

    # All connections share them; a message is (id, body).
    visible: ClassVar[collections.deque[tuple[str, str]]] = collections.deque()
    in_flight: ClassVar[dict[str, tuple[str, str]]] = {}
    timeouts: ClassVar[list[tuple[float, str]]] = []
    requests: ClassVar[collections.Counter[str]] = collections.Counter()
    latency_s: ClassVar[float] = 0.0

    def __init__(self) -> None:
        self.buffer = b""

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each request that is complete."""
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].decode("latin-1").lower()
            size = int(head.partition("content-length:")[2].split("\r\n")[0])
            if len(self.buffer) < end + 4 + size:
                return
            body = self.buffer[end + 4 : end + 4 + size]
            self.buffer = self.buffer[end + 4 + size :]
            action = (
                head.partition("x-amz-target:")[2].split("\r\n")[0].rpartition(".")[2]
            )
            self.answer(action, json.loads(body))

    def answer(
        self, action: str, request: dict[str, Any], until: float | None = None
    ) -> None:
        """Do what is asked for, now or when there is something to receive."""
        now = time.monotonic()
        if until is None and not action.startswith("bench"):
            self.requests[action] += 1
        while self.timeouts and self.timeouts[0][0] <= now:
            if message := self.in_flight.pop(heapq.heappop(self.timeouts)[1], None):
                self.visible.append(message)
        if action == "receivemessage" and not self.visible:
            until = now + request.get("WaitTimeSeconds", 0) if until is None else until
            if now < until:
                asyncio.get_running_loop().call_later(
                    0.001, self.answer, action, request, until
                )
                return
        body = json.dumps(getattr(self, action)(request)).encode()
        kind = "Content-Type: application/x-amz-json-1.0"
        head = f"HTTP/1.1 200 OK\r\n{kind}\r\nContent-Length: {len(body)}"
        write = functools.partial(
            self.transport.write, f"{head}\r\n\r\n".encode() + body
        )
        if self.latency_s and not action.startswith("bench"):
            asyncio.get_running_loop().call_later(self.latency_s, write)
        else:
            write()

    def getqueueurl(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"QueueUrl": f"http://127.0.0.1/1/{request['QueueName']}"}

    def getqueueattributes(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {"Attributes": {"VisibilityTimeout": "30"}}

    def sendmessage(self, request: dict[str, Any]) -> dict[str, Any]:
        message_id = str(uuid.uuid4())
        self.visible.append((message_id, request["MessageBody"]))
        return {"MessageId": message_id, "MD5OfMessageBody": "0" * 32}

    def sendmessagebatch(self, request: dict[str, Any]) -> dict[str, Any]:
        done = [
            {"Id": entry["Id"], **self.sendmessage(entry)}
            for entry in request["Entries"]
        ]
        return {"Successful": done, "Failed": []}

    def receivemessage(self, request: dict[str, Any]) -> dict[str, Any]:
        messages = []
        until = time.monotonic() + request.get("VisibilityTimeout", 30)
        while self.visible and len(messages) < request.get("MaxNumberOfMessages", 1):
            message = self.visible.popleft()
            receipt = str(uuid.uuid4())
            self.in_flight[receipt] = message
            heapq.heappush(self.timeouts, (until, receipt))
            attributes = {
                "ApproximateReceiveCount": "1",
                "SentTimestamp": "1460868253255",
                "ApproximateFirstReceiveTimestamp": "1460868253256",
            }
            one = {
                "MessageId": message[0],
                "ReceiptHandle": receipt,
                "Body": message[1],
            }
            messages.append({**one, "MD5OfBody": "0" * 32, "Attributes": attributes})
        return {"Messages": messages} if messages else {}

    def deletemessage(self, request: dict[str, Any]) -> dict[str, Any]:
        self.in_flight.pop(request["ReceiptHandle"], None)
        return {}

    def deletemessagebatch(self, request: dict[str, Any]) -> dict[str, Any]:
        done = [{"Id": e["Id"], **self.deletemessage(e)} for e in request["Entries"]]
        return {"Successful": done, "Failed": []}

    def changemessagevisibilitybatch(self, request: dict[str, Any]) -> dict[str, Any]:
        return {
            "Successful": [{"Id": e["Id"]} for e in request["Entries"]],
            "Failed": [],
        }

    def updateitem(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {}  # of DynamoDB: every condition holds

    def benchset(self, request: dict[str, Any]) -> dict[str, Any]:
        """Begin anew with so many messages and so much latency."""
        for part in (self.visible, self.in_flight, self.timeouts, self.requests):
            part.clear()
        self.visible.extend(
            (str(uuid.uuid4()), BODY) for _ in range(request["messages"])
        )
        Stub.latency_s = request["latency_s"]
        return {}

    def benchget(self, _request: dict[str, Any]) -> dict[str, Any]:
        """Tell how many requests there were, by action, and what is left."""
        left = len(self.visible) + len(self.in_flight)
        return {"requests": dict(self.requests), "left": left}


async def serve() -> None:
    """Run the stub, and print its port."""
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def ask(port: int, action: str, **request: Any) -> Any:
    """Control the stub."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(
        "POST", "/", json.dumps(request), {"X-Amz-Target": f"Bench.{action}"}
    )
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


# --- the clients: each runs in a process of its own, and prints its figures ---


def raw_client(**config: Any) -> Any:
    """Make a client as botocore's manual does; or, for comparison, with our options."""
    if os.environ.get("BENCH_TUNED"):
        config |= {"user_agent": "bench", "parameter_validation": False}
    import botocore.session
    from botocore.config import Config

    options: Any = {"config": Config(**config)} if config else {}
    session = botocore.session.get_session()
    url = f"http://127.0.0.1:{os.environ['BENCH_PORT']}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    return session.create_client(
        "sqs", region_name="eu-west-1", endpoint_url=url, **keys, **options
    )


def our_task(**options: Any) -> Any:
    """Configure taskhawk, and register the task."""
    import bench_jobs

    return bench_jobs.isolated if options else bench_jobs.job


JOBS = """
import asyncio
import os
import time
import taskhawk

url = f"http://127.0.0.1:{os.environ['BENCH_PORT']}"
keys = {"AWS_ACCESS_KEY": "test", "AWS_SECRET_KEY": "test"}
broker = os.environ.get("BENCH_BROKER", "sqs")
state = os.environ.get("BENCH_STATE", "")
if state:
    keys |= {"AWS_ENDPOINT_DYNAMODB": url, "TASKHAWK_CLAIMS_TABLE": "claims"}
taskhawk.configure(AWS_ENDPOINT_SQS=url, AWS_REGION="eu-west-1", TASKHAWK_QUEUE="bench",
                   TASKHAWK_BROKER=broker, **keys)

sleep_s = float(os.environ.get("BENCH_SLEEP_S", 0))
options = {}
if state in ("once", "unique"):
    options = {state: True}
elif state == "lock":
    options = {"limit": taskhawk.limit(1), "time_limit": 60}
elif state == "rate":
    options = {"limit": taskhawk.limit(10, every_s=60)}

@taskhawk.task(name="bench.job", **options)
def job(to, subject, from_email=None):
    if sleep_s:
        time.sleep(sleep_s)

job.isolate = bool(os.environ.get("BENCH_ISOLATE"))

@taskhawk.task(name="bench.wait")
async def wait():
    await asyncio.sleep(0.1)
"""
CALL = (("email@automatic.com", "Hello!"), {"from_email": "spam@example.com"})


def in_threads(count: int, threads: int, call: Callable[[], object]) -> None:
    """Make so many calls from so many threads."""

    def work() -> None:
        for _ in range(count // threads):
            call()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Return the time and the CPU that something takes."""

    def cpu() -> float:
        ours, theirs = (
            resource.getrusage(who)
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        return ours.ru_utime + ours.ru_stime + theirs.ru_utime + theirs.ru_stime

    cpu_before, before = cpu(), time.perf_counter()
    work()
    return {"wall_s": time.perf_counter() - before, "cpu_s": cpu() - cpu_before}


def run_dispatch(
    side: str, count: int, batch: int = 1, threads: int = 1, **_: Any
) -> Any:
    """Send messages, one by one or ten at a time."""
    attributes = {"request_id": {"DataType": "String", "StringValue": "1234"}}
    if side == "raw":
        client = raw_client()
        url = client.get_queue_url(QueueName=QUEUE)["QueueUrl"]
        one = {"MessageBody": BODY, "MessageAttributes": attributes}
        entries = [{"Id": str(i), **one} for i in range(10)]

        def call() -> None:
            if batch == 1:
                client.send_message(QueueUrl=url, **one)
            else:
                client.send_message_batch(QueueUrl=url, Entries=entries)

    else:
        import taskhawk

        job = our_task().with_headers(request_id="1234")

        def call() -> None:
            if batch == 1:
                job.dispatch(*CALL[0], **CALL[1])
            else:
                with taskhawk.batch():
                    for _ in range(10):
                        job.dispatch(*CALL[0], **CALL[1])

    call()
    in_threads(threads, threads, call)
    return measured(lambda: in_threads(count // batch, threads, call))


def run_dispatch_async(count: int, at_once: int, **_: Any) -> Any:
    """Send messages from coroutines, so many at once."""
    job = our_task().with_headers(request_id="1234")

    async def work() -> None:
        for _ in range(count // at_once):
            calls = [job.dispatch_async(*CALL[0], **CALL[1]) for _ in range(at_once)]
            await asyncio.gather(*calls)

    job.dispatch(*CALL[0], **CALL[1])
    return measured(lambda: asyncio.run(work()))


def run_consume(
    side: str, count: int, most: int, concurrency: int = 1, **_: Any
) -> Any:
    """Receive, decode, run and delete messages until there is none."""
    if side == "raw":
        client = raw_client(read_timeout=30)
        url = client.get_queue_url(QueueName=QUEUE)["QueueUrl"]

        def work() -> None:
            left = count
            while left:
                asked = {"MaxNumberOfMessages": min(most, 10), "WaitTimeSeconds": 20}
                found = client.receive_message(QueueUrl=url, **asked)["Messages"]
                left -= len(found)
                for message in found:
                    json.loads(message["Body"])
                if most == 1:
                    client.delete_message(
                        QueueUrl=url, ReceiptHandle=found[0]["ReceiptHandle"]
                    )
                else:
                    entries = [
                        {"Id": str(i), "ReceiptHandle": m["ReceiptHandle"]}
                        for i, m in enumerate(found)
                    ]
                    client.delete_message_batch(QueueUrl=url, Entries=entries)
    else:
        import taskhawk

        our_task()
        priority = taskhawk.Priority.default
        taskhawk._brokers.broker().url(
            QUEUE, "poll"
        )  # as the raw side's client is made before

        def work() -> None:
            options = {"concurrency": concurrency, "max_tasks": count}
            ledger = taskhawk.listen_for_messages(priority, most, **options)
            assert ledger.acked == count, ledger

    return measured(work)


def run_cold(side: str, **_: Any) -> Any:
    """Send one message; the time counts from before the process was started."""
    if side == "raw":
        client = raw_client()
        url = client.get_queue_url(QueueName=QUEUE)["QueueUrl"]
        client.send_message(QueueUrl=url, MessageBody=BODY)
    else:
        our_task().dispatch(*CALL[0], **CALL[1])
    took = time.perf_counter() - float(
        os.environ["BENCH_BEGAN"]
    )  # Linux: one clock for all
    return {"wall_s": took, "rss_kb": rss_kb()}


IMPORT = """
import sys, time
before, began = len(sys.modules), time.perf_counter()
import {}
took = time.perf_counter() - began
rss_kb = open("/proc/self/status").read().partition("VmRSS:")[2].split()[0]
print(took, len(sys.modules) - before, rss_kb)
"""


def run_import(side: str, **_: Any) -> Any:
    """Import in a bare interpreter, and look at what that cost."""
    code = IMPORT.format("botocore.session" if side == "raw" else "taskhawk")
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, check=True
    )
    took, modules, rss = result.stdout.split()
    return {"wall_s": float(took), "modules": int(modules), "rss_kb": int(rss)}


def run_sqlite(count: int, batch: int = 1, *, consume: bool = False, **_: Any) -> Any:
    """Dispatch to a file, or run what is in it."""
    import taskhawk

    job = our_task()

    def send(number: int) -> None:
        if batch == 1:
            for _ in range(number):
                job.dispatch(*CALL[0], **CALL[1])
        else:
            job.dispatch_many([CALL[0]] * number)

    if not consume:
        return measured(lambda: send(count))
    batch = 10
    send(count)
    memory: list[int] = []
    options: Any = {"max_tasks": count // 2}
    listen = functools.partial(
        taskhawk.listen_for_messages, taskhawk.Priority.default, 10
    )
    first = measured(lambda: listen(**options))
    memory.append(rss_kb())
    second = measured(lambda: listen(**options))
    memory.append(rss_kb())
    wall = first["wall_s"] + second["wall_s"]
    return {"wall_s": wall, "cpu_s": first["cpu_s"] + second["cpu_s"], "rss_kb": memory}


def run_coroutines(count: int, concurrency: int, **_: Any) -> Any:
    """Run coroutines that wait 100 ms each, from the start of the worker to its end."""
    import bench_jobs

    import taskhawk

    bench_jobs.wait.dispatch_many([()] * count)
    options = {"concurrency": concurrency, "max_tasks": count}
    listen = functools.partial(taskhawk.listen_for_messages, **options)
    return measured(lambda: listen(taskhawk.Priority.default))


def run_idle(**_: Any) -> Any:
    """Listen to an empty queue for a minute."""
    import taskhawk

    our_task()
    stop = threading.Event()
    threading.Timer(60, stop.set).start()
    taskhawk.listen_for_messages(taskhawk.Priority.default, shutdown_event=stop)
    return {}


def rss_kb() -> int:
    """Return the memory of this process."""
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])


# --- the benchmark ---


class Bench:
    """Runs the clients against the stub, and keeps the figures."""

    def __init__(self, rounds: int, only: str, against: str | None = None) -> None:
        self.rounds, self.only, self.against = rounds, only, against
        self.rows: list[dict[str, Any]] = []
        self.folder = tempfile.TemporaryDirectory()
        modules = {"raw": against or ROOT / "taskhawk.py", "ours": ROOT / "taskhawk.py"}
        for side, module in modules.items():
            folder = Path(self.folder.name) / side  # bytecode is cached there
            folder.mkdir()
            (folder / "bench_jobs.py").write_text(JOBS)
            shutil.copy(module, folder / "taskhawk.py")
        command = [sys.executable, __file__, "--serve"]
        self.stub = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.stub.stdout
        self.port = int(self.stub.stdout.readline())

    def client(
        self, kind: str, env: dict[str, str], side: str, **options: Any
    ) -> dict[str, Any]:
        """Run a client in a process of its own."""
        path = Path(self.folder.name) / side
        options["side"] = "ours" if self.against else side
        command = [sys.executable, __file__, "--client", kind, json.dumps(options)]
        extra = {"BENCH_PORT": str(self.port), "PYTHONPATH": str(path), **env}
        if kind in {"sqlite", "coroutines"}:
            extra["BENCH_BROKER"] = f"sqlite:///{path / str(uuid.uuid4())}"
        extra["PYTHONDONTWRITEBYTECODE"] = ""
        extra["BENCH_BEGAN"] = str(time.perf_counter())
        environ = {**os.environ, **extra}
        result = subprocess.run(
            command, env=environ, stdout=subprocess.PIPE, check=True
        )
        return dict(json.loads(result.stdout))

    def compare(
        self,
        name: str,
        kind: str,
        *,
        sides: tuple[str, ...] = ("raw", "ours"),
        figure: str = "cpu_s",
        target: str = "",
        latency_s: float = 0,
        env: dict[str, str] | None = None,
        rounds: int | None = None,
        pinned: bool = True,
        **options: Any,
    ) -> None:
        """Run both sides in turn, and note the medians."""
        if self.only not in name:
            return
        if self.against:
            if "tuned" in sides:
                return
            sides = ("raw", "ours")
        count = options.get("count", 1)
        env = {"BENCH_CPU": "0" if pinned and len(sides) > 1 else "", **(env or {})}
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(rounds or self.rounds):
            for side in sides:
                messages = count if kind == "consume" else 0
                ask(self.port, "BenchSet", messages=messages, latency_s=latency_s)
                tuned = {"BENCH_TUNED": "1"} if side == "tuned" else {}
                real = "raw" if tuned else side
                one = self.client(kind, env | tuned, side=real, **options)
                requests = ask(self.port, "BenchGet")["requests"]
                one["requests"] = sum(requests.values()) / count
                found[side].append(one)
        row: dict[str, Any] = {
            "name": name,
            "figure": figure,
            "target": target,
            "count": count,
        }
        for measured_side, runs in found.items():
            side = (
                "ours" if measured_side == "tuned" else measured_side
            )  # the second column
            for key in runs[0]:
                if not isinstance(runs[0][key], list):
                    row[f"{side} {key}"] = statistics.median(run[key] for run in runs)
                else:
                    row[f"{side} {key}"] = runs[-1][key]
        if len(sides) > 1 and row.get(f"raw {figure}"):
            ratios = [
                ours[figure] / raw[figure]
                for ours, raw in zip(found[sides[1]], found["raw"], strict=True)
            ]
            row["ratio"] = statistics.median(ratios)
        self.rows.append(row)
        print(self.line(row), file=sys.stderr, flush=True)

    @staticmethod
    def line(row: dict[str, Any]) -> str:
        """Return a row for people."""
        count, cells = row["count"], [f"{row['name']:42}"]
        for side in ("raw", "ours"):
            if f"{side} wall_s" in row and count > 1:
                rate = count / row[f"{side} wall_s"]
                cpu_us = row[f"{side} cpu_s"] / count * 1e6
                cell = f"{rate:7,.0f}/s {cpu_us:6.0f} us {row[f'{side} requests']:5.2f} req"
            elif f"{side} {row['figure']}" in row:
                value = row[f"{side} {row['figure']}"]
                scaled = value * 1000 if row["figure"].endswith("_s") else value
                unit = (
                    "ms"
                    if row["figure"].endswith("_s")
                    else row["figure"].replace("rss_", "")
                )
                cell = f"{scaled:,.1f} {unit}"
            else:
                cell = ""
            if isinstance(memory := row.get(f"{side} rss_kb"), list):
                cell += " {} -> {} kB".format(*memory)
            cells.append(f"{cell:>29}")
        cells.append(f"{row['ratio']:6.2f}" if "ratio" in row else " " * 6)
        return "  ".join([*cells, row["target"]])

    def run(self) -> None:
        """Measure it all."""
        more = max(self.rounds, 15)
        self.compare("import", "import", figure="wall_s", target="<= 0.30", rounds=more)
        self.compare("import: modules", "import", figure="modules", rounds=1)
        self.compare("import: memory", "import", figure="rss_kb", rounds=3)
        self.compare(
            "cold first dispatch",
            "cold",
            figure="wall_s",
            target="<= 1.03",
            rounds=more,
        )
        self.compare(
            "memory after a dispatch", "cold", figure="rss_kb", target="<= +4096 kB"
        )
        self.compare("dispatch", "dispatch", count=2000, target="<= 0.93")
        self.compare(
            "dispatch, batched", "dispatch", count=5000, batch=10, target="<= 1.10"
        )
        self.compare("consume, 10", "consume", count=5000, most=10, target="<= 1.15")
        self.compare(
            "consume, 10, all CPUs", "consume", count=5000, most=10, pinned=False
        )
        self.compare("consume, 1", "consume", count=5000, most=1)
        tuned = functools.partial(self.compare, sides=("raw", "tuned"))
        tuned("dispatch: botocore with our options", "dispatch", count=2000)
        tuned("consume, 10: botocore with our options", "consume", count=5000, most=10)
        ours = functools.partial(self.compare, sides=("ours",))
        for concurrency in (1, 2):
            options = {"count": 5000, "most": 10, "concurrency": concurrency}
            isolated = {"BENCH_ISOLATE": "1"}
            ours(
                f"consume, 10, isolated, {concurrency}",
                "consume",
                env=isolated,
                **options,
            )
        for state in ("none", "once", "unique", "lock", "rate"):
            env = {} if state == "none" else {"BENCH_STATE": state}
            options = {"count": 1000, "most": 10, "env": {"BENCH_CPU": "0", **env}}
            ours(f"state: consume, 10, {state}", "consume", **options)
        slow: Any = {"latency_s": 0.01, "figure": "wall_s"}
        for threads in (1, 8, 32):
            name, options = (
                f"10 ms: dispatch, {threads} threads",
                {"count": 800, "threads": threads},
            )
            target = ""
            if threads == 8:
                target = "CPU <= 0.4, requests <= 0.2"
            figure = {"figure": "cpu_s", "target": target}
            self.compare(name, "dispatch", **{**options, **slow, **figure})
        for at_once in (1, 10, 200):
            target = ""
            if at_once == 200:
                target = "requests <= 0.12"
            name = f"10 ms: dispatch, {at_once} coroutines"
            options = {"count": 10 * at_once, "at_once": at_once, "target": target}
            ours(name, "dispatch_async", **options, **slow)
        self.compare(
            "10 ms: dispatch, batched", "dispatch", count=2000, batch=10, **slow
        )
        for most, count, target in (
            (10, 2000, "<= 0.53 (1.9 times)"),
            (40, 2000, "<= 0.33 (3 times)"),
            (1, 300, ""),
        ):
            options = {"count": count, "most": most, "target": target}
            self.compare(f"10 ms: consume, {most}", "consume", **options, **slow)
        self.run_workers(ours)
        for number in (1_000, 10_000, 100_000):
            rounds = 1 if number > 10_000 and not self.against else max(3, self.rounds)
            sqlite = functools.partial(ours, kind="sqlite", count=number, rounds=rounds)
            sqlite(f"sqlite: dispatch, {number:,}")
            sqlite(f"sqlite: batched, {number:,}", batch=10)
            sqlite(f"sqlite: consume, {number:,}", batch=10, consume=True)
        for state in ("once", "unique", "lock", "rate"):
            options = {"kind": "sqlite", "count": 1000, "env": {"BENCH_STATE": state}}
            ours(f"sqlite: consume, 1,000, {state}", consume=True, **options)
        for concurrency in (1, 10, 100):
            name = f"sqlite: coroutines of 100 ms, concurrency {concurrency}"
            options = {"count": 10 * concurrency, "concurrency": concurrency}
            ours(name, "coroutines", figure="wall_s", target="<= 1,600 ms", **options)
        ours("idle for a minute, start included", "idle", figure="requests", rounds=1)

    def run_workers(self, ours: Callable[..., None]) -> None:
        """Measure what a worker gains by slots, and by messages that wait for them.

        At 10 ms, 8 slots are to be 6 times as fast as one, and 64 with tasks of 20 ms
        0.8 times as fast as 8 with nothing to do; the CPU of 200, 1.5 times that of 8.
        """
        env = {"BENCH_CPU": "0"}
        for latency_ms in (0, 10, 30):
            slow: Any = {"latency_s": latency_ms / 1000, "figure": "wall_s"}
            for most in (1, 10, 40):
                for concurrency in (1, 8, 64, 200):
                    name = f"{latency_ms} ms: {most}, concurrency {concurrency}"
                    count = 3000
                    if latency_ms:
                        count = 60 * min(concurrency + most - 1, 40)
                    options = {"count": count, "most": most, "concurrency": concurrency}
                    ours(f"worker at {name}", "consume", env=env, **options, **slow)
        env = {**env, "BENCH_SLEEP_S": "0.02"}
        slow = {"latency_s": 0.01, "figure": "wall_s"}
        for most in (10, 40):
            name = f"worker at 10 ms: {most}, concurrency 64, 20 ms"
            options = {"count": 4000, "most": most, "concurrency": 64}
            ours(name, "consume", env=env, **options, **slow)

    def close(self) -> None:
        """End the stub."""
        self.stub.kill()
        self.stub.communicate()
        self.folder.cleanup()


def main() -> None:
    """Run the benchmark, or a part of it that it starts itself."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", default="", metavar="WORD", help="figures with this in the name"
    )
    parser.add_argument(
        "--against", metavar="FILE", help="another taskhawk.py, in place of botocore"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--client", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
        asyncio.run(serve())
    elif arguments.client:
        if cpu := os.environ.get("BENCH_CPU"):
            os.sched_setaffinity(0, [int(cpu)])
        run = globals()[f"run_{arguments.client[0]}"]
        print(json.dumps(run(**json.loads(arguments.client[1]))))
    else:
        versions = f"Python {platform.python_version()}, {os.cpu_count()} CPUs, {platform.machine()}"
        other = "the other" if arguments.against else "botocore"
        print(f"{versions}; medians of {arguments.rounds} rounds", file=sys.stderr)
        print(
            f"{'':42}  {other:>29}  {'taskhawk':>29}   ratio  target",
            file=sys.stderr,
        )
        bench = Bench(arguments.rounds, arguments.only, arguments.against)
        try:
            bench.run()
        finally:
            bench.close()
        if arguments.json:
            print(json.dumps(bench.rows, indent=2))


if __name__ == "__main__":
    main()
