#!/usr/bin/env python3
"""Soak taskhawk: workers under signals, kill -9 and faults, on SQLite and on SQS.

usage: python .ci/soak.py [--minutes 10] [--seed N]

Needs the `test` extra (ministack is the SQS server; a proxy before it denies calls and
loses answers). Prints what went in, what ran, what ran twice and why, what was lost, how
workers ended, and how the memory of one grew. Exit code 1 if a message was lost, or ran
twice though DESIGN's promise 2 does not allow it, or if a worker ended as it must not.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import botocore.session

import taskhawk

QUEUE = "TASKHAWK-SOAK"
WORKERS = 3  # that get signals; one more gets none, and its memory is measured
BACKLOG = 400  # messages that wait: with more, none are sent
LEASE_S = 5  # the queue's visibility timeout
GRACE_S, FLUSH_S = 6, 3  # from a signal to the end, and what is kept for deletes
ACKNOWLEDGED_S = 2  # a run that ended so long ago is acknowledged, unless it can't be

SIGNALS = {  # each is sent to one worker
    "kill -9": (signal.SIGKILL,),
    "SIGTERM": (signal.SIGTERM,),
    "SIGTERM twice": (signal.SIGTERM, signal.SIGTERM),
    "SIGINT twice within a second": (signal.SIGINT, signal.SIGINT),
}
# A fault lasts as long as a file of its name exists: workers and the proxy look for it.
# There is one at a time, and signals meanwhile.
FAULTS = {  # the longest, in seconds
    "no children": 8,  # they can't start
    "hanging hook": 8,  # the one for heartbeats
}
SQS_FAULTS = {
    "no connection": 3,
    "lost answers": 1,  # what was asked for is done
    "denied changes": 5,  # ChangeMessageVisibility
    "denied deletes": 5,  # DeleteMessage
    "denied calls": 5,  # both
    "short timeout": 10,  # the queue's visibility timeout is lowered
}
DENIED = {  # operations, by the fault
    "denied changes": ("ChangeMessageVisibility",),
    "denied deletes": ("DeleteMessage",),
    "denied calls": ("ChangeMessageVisibility", "DeleteMessage"),
}
# In these a worker may not be able to extend its leases: promise 2 needs that it can.
OUTAGES = ("no connection", "lost answers", "denied changes", "denied calls")

JOBS = """
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import taskhawk

FOLDER = Path(__file__).parent
NOTES = os.open(FOLDER / "notes", os.O_WRONLY | os.O_APPEND)
IS_CHILD = "_child" in sys.argv
HERE = threading.local()

if IS_CHILD and (FOLDER / "no children").exists():
    raise MemoryError

def remember(sqs_queue_message, **_):
    HERE.message_id = sqs_queue_message.message_id

def beat():
    while (FOLDER / "hanging hook").exists():
        time.sleep(0.1)

def note(number, began, **more):
    worker = os.getppid() if IS_CHILD else os.getpid()
    run = {"number": number, "message_id": HERE.message_id, "worker": worker}
    run |= {"began": began, "ended": time.monotonic()}
    os.write(NOTES, json.dumps(run | more).encode() + b"\\n")

@taskhawk.task(name="soak.job")
def job(number):
    began = time.monotonic()
    if random.random() < 0.05:
        raise taskhawk.RetryException(delay_seconds=random.choice([0, 1]))
    if random.random() < 0.02:
        time.sleep(random.uniform(0, 8))  # some are longer than a lease and the grace
    note(number, began)

@taskhawk.task(name="soak.isolated", isolate=True)
def isolated(number):
    began = time.monotonic()
    if random.random() < 0.1:
        os.kill(os.getpid(), signal.SIGKILL)
    note(number, began)

def start_processes(number):
    began = time.monotonic()
    with multiprocessing.Pool(2) as pool:
        pool.map(abs, range(10))
    program = subprocess.Popen(["sleep", "60"])
    program.terminate()
    program.wait()
    note(number, began, starts=True)

taskhawk.task(name="soak.starts")(start_processes)
taskhawk.task(name="soak.isolated_starts", isolate=True)(start_processes)
"""


def stand_in(name: str) -> taskhawk.Task[[int], None]:
    """Return a task to dispatch; it is run in the workers."""

    @taskhawk.task(name=name)
    def run(number: int) -> None:
        """Be in the workers' module."""

    return run


MANY = [stand_in("soak.job"), stand_in("soak.isolated")]  # tasks of many messages
FEW = [stand_in("soak.starts"), stand_in("soak.isolated_starts")]


class Proxy:
    """A TCP proxy in front of SQS that does what the files of faults say."""

    def __init__(self, port: int, folder: Path) -> None:
        self.target, self.folder = port, folder
        self.open: set[socket.socket] = set()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def has(self, fault: str) -> bool:
        """Return whether there is this fault now."""
        return (self.folder / fault).exists()

    def accept(self) -> None:
        """Connect whoever comes, unless it is down."""
        while True:
            client, _ = self.server.accept()
            if self.has("no connection"):
                client.close()
                continue
            with contextlib.suppress(OSError):
                target = socket.create_connection(("127.0.0.1", self.target))
                self.open |= {client, target}
                for copy in (self.pass_requests, self.pass_answers):
                    pair = (client, target)
                    threading.Thread(target=copy, args=pair, daemon=True).start()

    def pass_requests(self, client: socket.socket, target: socket.socket) -> None:
        """Pass on requests; answer those that are denied."""
        with contextlib.suppress(OSError), client.makefile("rb") as lines:
            while head := self.read_head(lines):
                fields = head.decode("latin-1").lower()
                size = int(fields.partition("content-length:")[2].split("\r\n")[0])
                body = lines.read(size)
                if self.is_denied(fields):
                    client.sendall(self.denial())
                else:
                    target.sendall(head + body)
        self.close(client, target)

    @staticmethod
    def read_head(lines: Iterable[bytes]) -> bytes:
        """Return a request up to its body; nothing if there are no more."""
        head = b""
        for line in lines:
            head += line
            if line == b"\r\n":
                return head
        return b""

    def is_denied(self, fields: str) -> bool:
        """Return whether a request with this head, in lower case, is denied."""
        operation = fields.partition("x-amz-target: amazonsqs.")[2]
        return any(
            operation.startswith(denied.lower()) and self.has(fault)
            for fault, operations in DENIED.items()
            for denied in operations
        )

    @staticmethod
    def denial() -> bytes:
        """Return what SQS answers to a request that is denied."""
        error = {"__type": "com.amazon.coral.service#AccessDeniedException"}
        body = json.dumps({**error, "message": "no policy allows it"}).encode()
        head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/x-amz-json-1.0"
        return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    def pass_answers(self, client: socket.socket, target: socket.socket) -> None:
        """Pass on answers, unless they are to be lost."""
        with contextlib.suppress(OSError):
            while data := target.recv(65536):
                if self.has("lost answers"):
                    break
                client.sendall(data)
        self.close(client, target)

    def close(self, *connections: socket.socket) -> None:
        """Close connections for both sides."""
        for connection in connections:
            self.open.discard(connection)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def cut(self) -> None:
        """Cut all connections."""
        self.close(*self.open)


@contextlib.contextmanager
def ministack(folder: Path) -> Iterator[int]:
    """Run an SQS server, and yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {
        "BIND_HOST": "127.0.0.1",
        "MINISTACK_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "IOT_MTLS_ENABLED": "0",
        "SFTP_ENABLED": "0",
    }
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


class SqsQueue:
    """The queue on SQS, for what is no business of taskhawk's."""

    def __init__(self, port: int) -> None:
        self.client = botocore.session.get_session().create_client(
            "sqs",
            region_name="us-east-1",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        dead = self.client.create_queue(QueueName=f"{QUEUE}-DLQ")["QueueUrl"]
        answer = self.client.get_queue_attributes(
            QueueUrl=dead, AttributeNames=["QueueArn"]
        )
        arn = answer["Attributes"]["QueueArn"]
        policy = {"deadLetterTargetArn": arn, "maxReceiveCount": 1000}
        attributes = {"RedrivePolicy": json.dumps(policy)}
        self.url = self.client.create_queue(QueueName=QUEUE, Attributes=attributes)[
            "QueueUrl"
        ]
        self.set_timeout(LEASE_S)

    def set_timeout(self, seconds: int) -> None:
        """Set the queue's visibility timeout."""
        attributes = {"VisibilityTimeout": str(seconds)}
        self.client.set_queue_attributes(QueueUrl=self.url, Attributes=attributes)


@dataclasses.dataclass(eq=False)
class Worker:
    """A worker, and how it was told to end."""

    process: "subprocess.Popen[bytes]"
    log: Path
    told: str = ""
    told_at: float = float("inf")

    def is_ready(self) -> bool:
        """Return whether it handles signals: it has run something."""
        return b" finished" in self.log.read_bytes()

    def tell(self, name: str) -> None:
        """Send it signals."""
        self.told, self.told_at = name, time.monotonic()
        for number in SIGNALS[name]:
            self.process.send_signal(number)
            time.sleep(random.choice([0, 0.3]))

    def how_it_ended(self) -> str:
        """Return how it was told to end, and its exit code."""
        return f"{self.told or 'not told'}, exit code {self.process.returncode}"

    def ended_well(self) -> bool:
        """Return whether that exit code is one it may end with.

        It is 1 where the grace was over, or a delete was denied to the end. A second
        signal may come after the ledger, when Python has dropped its handlers.
        """
        code = self.process.returncode
        if not self.told:
            return False
        if self.told == "kill -9":
            return code == -signal.SIGKILL
        is_told_twice = len(SIGNALS[self.told]) > 1
        has_ledger = self.log.read_bytes().endswith(b" uncertain\n")
        return code in (0, 1) or (is_told_twice and has_ledger)


@dataclasses.dataclass
class Fault:
    """A fault, and the time that it took."""

    name: str
    began: float
    ended: float = float("inf")


class Run(NamedTuple):
    """A run that came to its end, as it was noted by the task."""

    number: int
    message_id: str  # SQS's: a message that was sent twice has two
    worker: int
    began: float
    ended: float
    starts: bool = False  # it started processes


class Soak:
    """Workers on one broker, and what becomes of the messages sent to them."""

    def __init__(
        self,
        folder: Path,
        settings: dict[str, str],
        proxy: Proxy | None,
        queue: SqsQueue | None,
    ) -> None:
        self.folder, self.settings = folder, settings
        self.proxy, self.queue = proxy, queue
        (folder / "soak_jobs.py").write_text(JOBS)
        (folder / "notes").touch()
        self.notes = (folder / "notes").open()
        self.runs: dict[int, list[Run]] = collections.defaultdict(list)
        self.ids: set[int] = set()  # numbers whose dispatch returned
        self.sent = 0
        self.troubles: collections.Counter[str] = collections.Counter()
        self.faults: list[Fault] = []
        self.has_ended = threading.Event()  # no fault lasts
        self.has_ended.set()
        self.workers: dict[int, Worker] = {}  # that ever were, by process id
        self.memory: list[int] = []
        self.veteran = self.start()

    # Workers and messages.

    def start(self) -> Worker:
        """Start a worker."""
        log = self.folder / f"worker-{len(self.workers)}.log"
        paths = [str(self.folder), str(Path(taskhawk.__file__).parent)]
        env = {
            **os.environ,
            **self.settings,
            "PYTHONPATH": os.pathsep.join(paths),
            "TASKHAWK_PRE_PROCESS_HOOK": "soak_jobs.remember",
            "TASKHAWK_HEARTBEAT_HOOK": "soak_jobs.beat",
        }
        options = ["--num-messages", str(random.choice([1, 10]))]
        options += ["--concurrency", str(random.choice([1, 4]))]
        options += ["--grace", str(GRACE_S)]
        command = [sys.executable, "-m", "taskhawk", "listen", "soak_jobs", *options]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=env, cwd=self.folder, stdout=output, stderr=output
            )
        self.workers[process.pid] = Worker(process, log)
        return self.workers[process.pid]

    def alive(self) -> list[Worker]:
        """Return the workers that have not ended."""
        return [each for each in self.workers.values() if each.process.poll() is None]

    def send(self) -> None:
        """Dispatch some messages; those whose dispatch returned must not be lost."""
        if len(self.ids - self.runs.keys()) > BACKLOG:
            return
        for task in (*MANY, *MANY, random.choice(FEW)):
            count = 1 if task in FEW else random.choice([1, 5, 20])
            numbers = range(self.sent, self.sent + count)
            self.sent = numbers.stop
            try:
                if count == 1:
                    task.dispatch(numbers[0])
                else:
                    task.dispatch_many(numbers)
                self.ids |= set(numbers)
            except Exception:
                self.troubles["dispatches that failed"] += 1

    def read_notes(self) -> None:
        """Read which runs have ended."""
        for line in self.notes:
            run = Run(**json.loads(line))
            self.runs[run.number].append(run)

    def measure(self) -> None:
        """Note the memory of the worker that gets no signal."""
        if len(self.runs) > 1000 and self.veteran.process.poll() is None:
            status = Path(f"/proc/{self.veteran.process.pid}/status").read_text()
            self.memory.append(int(status.partition("VmRSS:")[2].split()[0]))

    # Troubles.

    def trouble(self) -> None:
        """Send a signal to a worker, or begin a fault."""
        free = [w for w in self.alive() if not w.told and w is not self.veteran]
        for _ in range(WORKERS - len(free)):
            self.start()
        faults = FAULTS | (SQS_FAULTS if self.proxy else {})
        name = random.choice([*SIGNALS, *faults])
        if name in SIGNALS:
            ready = [worker for worker in free if worker.is_ready()]
            if ready:
                random.choice(ready).tell(name)
                self.troubles[name] += 1
        elif self.has_ended.is_set():
            self.begin(name, random.uniform(0, faults[name]))

    def begin(self, name: str, seconds: float) -> None:
        """Begin a fault, and have it end after so many seconds."""
        fault = Fault(name, time.monotonic())
        self.faults.append(fault)
        self.troubles[name] += 1
        self.has_ended.clear()
        (self.folder / name).touch()
        if name == "no connection" and self.proxy:
            self.proxy.cut()
        elif name == "short timeout" and self.queue:
            self.queue.set_timeout(2)
        # In a thread: a dispatch may wait for the end.
        threading.Timer(seconds, self.end, [fault]).start()

    def end(self, fault: Fault) -> None:
        """End a fault."""
        if fault.name == "short timeout" and self.queue:
            self.queue.set_timeout(LEASE_S)
        (self.folder / fault.name).unlink()
        fault.ended = time.monotonic()
        self.has_ended.set()

    # What came of it.

    def finish(self) -> bool:
        """Let the workers run until the queue is empty, and print the figures."""
        self.has_ended.wait()
        broker = taskhawk._brokers.broker()
        deadline = time.monotonic() + 180
        while any(broker.depth(QUEUE)) and time.monotonic() < deadline:
            time.sleep(0.5)
        self.measure()
        for worker in self.alive():
            if not worker.told:
                worker.tell("SIGTERM")
        for worker in self.alive():
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(60)
        self.read_notes()
        lost = self.ids - self.runs.keys()
        dead = broker.depth(f"{QUEUE}-DLQ").visible
        runs = sum(map(len, self.runs.values()))
        print(
            f"  messages in {len(self.ids)}, runs {runs}, dead letters {dead}, ", end=""
        )
        print(f"LOST {len(lost)}")
        is_good = not lost
        is_good &= self.print_runs()
        is_good &= self.print_workers()
        return is_good

    def print_runs(self) -> bool:
        """Print what ran twice and why; return whether promise 2 allows it."""
        excuses: collections.Counter[str] = collections.Counter()
        for runs in self.runs.values():
            runs.sort(key=lambda run: run.began)
            for first, second in itertools.pairwise(runs):
                excuse = self.excuse(first, second)
                if first.ended > second.began:
                    excuse += " (at the same time)"
                excuses[excuse] += 1
                if excuse.startswith("NOT ALLOWED"):
                    print(f"  {first}\n  {second}")
        print(f"  run once more {excuses.total()}: {listed(excuses)}")
        took = [
            r.ended - r.began for runs in self.runs.values() for r in runs if r.starts
        ]
        print(f"  slowest run that starts processes: {max(took, default=0):.1f} s")
        return not any(excuse.startswith("NOT ALLOWED") for excuse in excuses)

    def excuse(self, first: Run, second: Run) -> str:
        """Return why promise 2 allows that a message was run again."""
        if first.message_id != second.message_id:
            return "sent twice, for its answer was lost"
        worker = self.workers[first.worker]
        # A child may come to the end of its run just after its worker was killed.
        if worker.told == "kill -9" and worker.told_at <= second.began:
            since = worker.told_at - ACKNOWLEDGED_S
            unable = self.had(since, worker.told_at, *OUTAGES, "denied deletes")
            if first.ended >= since or unable:
                return "kill -9 before it was acknowledged"
        # What of its lease can be told from the run: then it was held, and acknowledged.
        since, until = first.began - LEASE_S / 3, first.ended + ACKNOWLEDGED_S
        for name in OUTAGES:
            if self.had(since, until, name):
                return name
        if worker.told_at < second.began:
            if self.had(worker.told_at, second.began, "denied deletes"):
                return "denied deletes of a worker that ended"
            if first.ended > worker.told_at + GRACE_S - FLUSH_S:
                return "the grace was over"
        return "NOT ALLOWED"

    def had(self, since: float, until: float, *names: str) -> bool:
        """Return whether there was one of these faults in that time."""
        return any(
            fault.name in names and fault.began <= until and fault.ended >= since
            for fault in self.faults
        )

    def print_workers(self) -> bool:
        """Print how workers ended; return whether they all did as they should."""
        stuck = self.alive()
        for worker in stuck:
            worker.process.kill()
            worker.process.wait()
        endings = collections.Counter(w.how_it_ended() for w in self.workers.values())
        bad = [worker for worker in self.workers.values() if not worker.ended_well()]
        print(f"  troubles: {listed(self.troubles)}")
        print(f"  workers ended: {listed(endings)}")
        for worker in bad:
            print(f"  BAD END: {worker.how_it_ended()}: {worker.log}")
        for worker in stuck:
            print(f"  DID NOT END: {worker.told}: {worker.log}")
        if self.memory:
            first, last = self.memory[0], self.memory[-1]
            print(f"  memory: {first} kB after 1,000 messages, {last} kB at the end")
        return not (bad or stuck)


def listed(counts: "collections.Counter[str]") -> str:
    """Return counts in a line."""
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def soak(run: Soak, minutes: float) -> bool:
    """Soak one broker; return whether all went well."""
    end = time.monotonic() + minutes * 60
    try:
        while time.monotonic() < end:
            run.send()
            run.trouble()
            run.read_notes()
            run.measure()
            time.sleep(random.uniform(0.2, 1))
        return run.finish()
    finally:
        for worker in run.alive():
            worker.process.kill()


def on_sqlite(folder: Path, minutes: float) -> bool:
    """Soak workers on a file."""
    options = f"visibility_timeout_s={LEASE_S}&max_receive_count=1000"
    broker = f"sqlite:///{folder / 'queue.db'}?{options}"
    settings = {"TASKHAWK_QUEUE": "soak", "TASKHAWK_BROKER": broker}
    taskhawk.configure(settings)
    return soak(Soak(folder, settings, None, None), minutes)


def on_sqs(folder: Path, minutes: float) -> bool:
    """Soak workers on SQS, through the proxy."""
    with ministack(folder) as port:
        queue, proxy = SqsQueue(port), Proxy(port, folder)
        settings = {
            "TASKHAWK_QUEUE": "soak",
            "AWS_ENDPOINT_SQS": f"http://127.0.0.1:{proxy.port}",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY": "test",
            "AWS_SECRET_KEY": "test",
        }
        taskhawk.configure(settings)
        return soak(Soak(folder, settings, proxy, queue), minutes)


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
        f"taskhawk {taskhawk.VERSION}, {arguments.minutes:g} minutes,"
        f" seed {arguments.seed}"
    )
    folder = Path(tempfile.mkdtemp())
    is_good = True
    soaks: dict[str, Any] = {"sqlite": on_sqlite, "sqs": on_sqs}
    for name, work in soaks.items():
        print(name, flush=True)
        (folder / name).mkdir()
        is_good &= work(folder / name, arguments.minutes / 2)
    if is_good:
        shutil.rmtree(folder)
    else:
        print(f"logs: {folder}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
