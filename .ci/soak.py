#!/usr/bin/env python3
"""Soak taskhawk: workers under kill -9, SIGTERM and cut connections, on SQLite and on SQS.

usage: python .ci/soak.py [--minutes 10] [--seed N]

Needs the `test` extra (ministack is the SQS server). Prints what went in, what ran, what ran more
than once, what was lost, and how the memory of a worker grew. Exit code 1 if anything was lost.
"""

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import botocore.session

import taskhawk

JOBS = """
import os
import random
import taskhawk

NOTES = os.open(os.environ["SOAK_NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

@taskhawk.task(name="soak.job")
def job(number):
    if random.random() < 0.05:
        raise taskhawk.RetryException(delay_seconds=random.choice([0, 1]))
    os.write(NOTES, b"%d\\n" % number)

@taskhawk.task(name="soak.isolated", isolate=True)
def isolated(number):
    if random.random() < 0.1:
        os.kill(os.getpid(), 9)
    os.write(NOTES, b"%d\\n" % number)
"""
WORKERS = 3  # that are killed; one more is not, and its memory is measured
QUEUE = "TASKHAWK-SOAK"


class Proxy:
    """A TCP proxy whose connections can be cut."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.open: set[socket.socket] = set()
        self.down_until = 0.0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        """Connect whoever comes, unless it is down."""
        while True:
            client, _ = self.server.accept()
            if time.monotonic() < self.down_until:
                client.close()
                continue
            with contextlib.suppress(OSError):
                target = socket.create_connection(("127.0.0.1", self.target))
                self.open |= {client, target}
                for pair in ((client, target), (target, client)):
                    threading.Thread(target=self.copy, args=pair, daemon=True).start()

    def copy(self, source: socket.socket, target: socket.socket) -> None:
        """Pass on what one side sends."""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        self.end(source)
        self.end(target)

    def end(self, connection: socket.socket) -> None:
        """Close a connection for both sides."""
        self.open.discard(connection)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()

    def cut(self, seconds: float) -> None:
        """Cut all connections, and refuse new ones for a while."""
        self.down_until = time.monotonic() + seconds
        for connection in list(self.open):
            self.end(connection)


@contextlib.contextmanager
def ministack(folder: Path) -> Iterator[int]:
    """Run an SQS server, and yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {
        "BIND_HOST": "127.0.0.1",
        "MINISTACK_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
    }
    env |= {"IOT_MTLS_ENABLED": "0", "SFTP_ENABLED": "0"}
    script = Path(sys.executable).with_name("ministack")
    with (folder / "ministack.log").open("w") as log:
        server = subprocess.Popen(
            [script], env={**os.environ, **env}, stdout=log, stderr=log
        )
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(
                    f"http://127.0.0.1:{port}/_ministack/health"
                ).close()
                break
            time.sleep(0.1)
        yield port
    finally:
        server.kill()
        server.wait()


def make_queues(port: int) -> None:
    """Make a queue and its dead-letter queue."""
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    url = f"http://127.0.0.1:{port}"
    session = botocore.session.get_session()
    client = session.create_client(
        "sqs", region_name="us-east-1", endpoint_url=url, **keys
    )
    dead = client.create_queue(QueueName=f"{QUEUE}-DLQ")["QueueUrl"]
    names = ["QueueArn"]
    arn = client.get_queue_attributes(QueueUrl=dead, AttributeNames=names)[
        "Attributes"
    ]["QueueArn"]
    policy = f'{{"deadLetterTargetArn": "{arn}", "maxReceiveCount": 1000}}'
    attributes = {"RedrivePolicy": policy, "VisibilityTimeout": "5"}
    client.create_queue(QueueName=QUEUE, Attributes=attributes)


class Soak:
    """Workers on one broker, and what becomes of the messages sent to them."""

    def __init__(
        self, folder: Path, settings: dict[str, str], proxy: Proxy | None
    ) -> None:
        self.folder, self.settings, self.proxy = folder, settings, proxy
        self.notes = folder / "notes"
        self.notes.touch()
        (folder / "soak_jobs.py").write_text(JOBS)
        self.workers: list[subprocess.Popen[bytes]] = []
        self.events: collections.Counter[str] = collections.Counter()
        self.sent = 0
        self.ids: set[int] = set()
        self.memory: list[int] = []
        self.veteran = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        """Start a worker."""
        module = str(Path(taskhawk.__file__).parent)
        path = os.pathsep.join([str(self.folder), module])
        env = {
            **os.environ,
            **self.settings,
            "SOAK_NOTES": str(self.notes),
            "PYTHONPATH": path,
        }
        options = ["--num-messages", str(random.choice([1, 10])), "--grace", "6"]
        options += ["--concurrency", str(random.choice([1, 4]))]
        command = [sys.executable, "-m", "taskhawk", "listen", "soak_jobs", *options]
        with (self.folder / "worker.log").open("ab") as log:
            return subprocess.Popen(
                command, env=env, cwd=self.folder, stdout=log, stderr=log
            )

    def send(self) -> None:
        """Dispatch some messages; those whose dispatch returned must not be lost."""
        for task in (JOB, JOB, JOB, ISOLATED):
            numbers = range(self.sent, self.sent + random.choice([1, 5, 20]))
            self.sent = numbers.stop
            try:
                if len(numbers) == 1:
                    task.dispatch(numbers[0])
                else:
                    task.dispatch_many(numbers)
                self.ids |= set(numbers)
            except Exception:
                self.events["dispatches that failed"] += 1

    def trouble(self) -> None:
        """Kill, stop or cut something."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        while len(self.workers) < WORKERS:
            self.workers.append(self.start())
        kinds = ["kill -9", "SIGTERM", "none"] + (
            ["cut connections"] if self.proxy else []
        )
        kind = random.choice(kinds)
        self.events[kind] += 1
        worker = random.choice(self.workers)
        if kind == "kill -9":
            worker.kill()
        elif kind == "SIGTERM":
            worker.terminate()
        elif kind == "cut connections" and self.proxy:
            self.proxy.cut(random.choice([0, 1, 3]))

    def measure(self) -> None:
        """Note the memory of the worker that nobody kills."""
        if len(self.ran()) > 1000:
            status = Path(f"/proc/{self.veteran.pid}/status").read_text()
            self.memory.append(int(status.partition("VmRSS:")[2].split()[0]))

    def ran(self) -> list[int]:
        """Return the number of each run."""
        return [int(line) for line in self.notes.read_text().split()]

    def finish(self) -> bool:
        """Let the workers run until the queue is empty, and print the figures."""
        broker = taskhawk._brokers.broker()
        deadline = time.monotonic() + 120
        while any(broker.depth(QUEUE)) and time.monotonic() < deadline:
            time.sleep(0.5)
        for worker in (self.veteran, *self.workers):
            worker.send_signal(signal.SIGTERM)
        for worker in (self.veteran, *self.workers):
            worker.wait()
        ran = self.ran()
        dead = broker.depth(f"{QUEUE}-DLQ").visible
        lost = self.ids - set(ran)
        print(
            f"  messages in {len(self.ids)}, runs {len(ran)}, more than once", end=" "
        )
        print(f"{len(ran) - len(set(ran))}, dead letters {dead}, LOST {len(lost)}")
        print(
            "  "
            + ", ".join(
                f"{name}: {count}" for name, count in sorted(self.events.items())
            )
        )
        if self.memory:
            first, last = self.memory[0], self.memory[-1]
            print(
                f"  memory of a worker: {first} kB after 1,000 messages, {last} kB at the end"
            )
        return not lost


@taskhawk.task(name="soak.job")
def JOB(number: int) -> None:  # noqa: N802 - a stand-in for the workers' task
    """Run in the workers."""


@taskhawk.task(name="soak.isolated")
def ISOLATED(number: int) -> None:  # noqa: N802
    """Run in the workers' children."""


def soak(
    folder: Path, settings: dict[str, str], minutes: float, proxy: Proxy | None
) -> bool:
    """Soak one broker; return whether nothing was lost."""
    taskhawk.configure(settings)
    run = Soak(folder, settings, proxy)
    end = time.monotonic() + minutes * 60
    while time.monotonic() < end:
        run.send()
        run.trouble()
        run.measure()
        time.sleep(random.uniform(0.2, 1))
    return run.finish()


def main() -> int:
    """Soak both brokers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=10, help="for both brokers together"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    print(
        f"taskhawk {taskhawk.VERSION}, {arguments.minutes:g} minutes, seed {arguments.seed}"
    )
    folder = Path(tempfile.mkdtemp())
    good = True
    for name in ("sqlite", "sqs"):
        (folder / name).mkdir()
        settings = {"TASKHAWK_QUEUE": "soak"}
        with contextlib.ExitStack() as stack:
            proxy = None
            if name == "sqs":
                port = stack.enter_context(ministack(folder))
                make_queues(port)
                proxy = Proxy(port)
                url = f"http://127.0.0.1:{proxy.port}"
                settings |= {"AWS_ENDPOINT_SQS": url, "AWS_REGION": "us-east-1"}
                settings |= {"AWS_ACCESS_KEY": "test", "AWS_SECRET_KEY": "test"}
            else:
                file = folder / name / "queue.db"
                options = "visibility_timeout_s=5&max_receive_count=1000"
                settings["TASKHAWK_BROKER"] = f"sqlite:///{file}?{options}"
            print(name)
            good &= soak(folder / name, settings, arguments.minutes / 2, proxy)
    if good:
        shutil.rmtree(folder)
    else:
        print(f"logs: {folder}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
