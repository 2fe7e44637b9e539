"""Run Python functions later on AWS SQS, SNS and Lambda: one file, one dependency.

Quickstart, with nothing set up (without TASKHAWK_BROKER, it talks to AWS)::

    import taskhawk

    taskhawk.configure(TASKHAWK_BROKER="sqlite:///queue.db")

    @taskhawk.task
    def send_email(to: str, subject: str, from_email: str | None = None) -> None:
        print(f"{subject} -> {to}")

    send_email.dispatch("you@example.com", "Hello!")  # returns an id
    taskhawk.listen_for_messages(taskhawk.Priority.default, until_empty=True)

Promises
    1. Within the queue's retention, and if it has a dead-letter queue, a message whose
       dispatch returned is run at least once or ends in the dead-letter queue: through
       ``kill -9``, crashes, network faults, denied calls and shutdown at any moment, on
       SQLite also through a power loss. No policy dead-letters what was never started.
       Lambda behind SNS has Lambda's own retries and dead-letter queue instead.
    2. While its worker lives, reaches the queue and may extend its leases, a message is
       not run twice at the same time, unless a task in its process holds the GIL for
       longer than the visibility timeout (isolate those), SQS itself delivers it twice,
       it runs for over 12 hours, its send was repeated because the answer was lost, or
       the clock of a SQLite queue is set forward by more than the lease.
    3. No byte of a message is unpickled, evaluated, or used as an import name.
    4. A malformed message never stops a worker and is never silently dropped.
    5. Our log texts never hold bodies, arguments, header values or credentials, nor a
       line break of a message's. A task's own exceptions are logged as they are.
    6. An idle queue costs one 20 s poll after another. With ``num_messages=10``, a task
       costs at most 0.12 receives and 0.12 deletes, and on a FIFO queue one of each;
       leases are extra for tasks of over a third of the visibility timeout. A dispatch
       in a batch costs 0.1 requests.
    7. A process that a task starts is as it would be without us: its signals, its
       environment, its connections.
    8. Of a group on a FIFO queue, one message runs at a time, in the order in which
       they were queued; the next one waits until it is done or a dead letter. What
       promise 2 excepts is excepted here, too.

Not here: results, chains, soft time limits, purging or browsing a queue.

The way of a message; a Lambda event joins it where messages are decoded::

    fn.dispatch(...) -> Message -> encode -> Broker.send
        == queue ==> Broker.receive -> decode -> process() -> Outcome
            -> Broker: delete it, show it again later, or dead-letter it

Words of AWS; lease and acknowledgement are ours
    receipt handle       the token of one receive, needed to delete or delay the message
    visibility timeout   how long a received message is hidden from other receivers
    lease                that timeout, extended while a worker holds the message
    acknowledgement      the delete after a run
    dead-letter queue    where a message goes that was received too often or given up
    redrive policy       a queue's setting: its dead-letter queue, and after how many
                         receives a message goes there

A message that a worker holds; the :class:`Ledger` counts what each becomes::

    received --> started --> finished --> acked          deleted from the queue
        |           |            |------> retried        visible again, now or later
        |           |            |------> dead_lettered  copied, then deleted
        |           |            |------> postponed      copied with a delay, deleted
        |           |            '------> uncertain      its delete may not be applied
        |           '--> released                        its run could not begin
        '--> released                                    never started, visible at once

What to read for each promise, and how many statements that is
    1 (372): publish, _send_one, _Lane._conclude, _Lane._send_together, _accepted,
        _send_all_ready, _partial_failure, _send_all, _in_batches, _one_round,
        SqliteBroker.send, SqliteBroker._claim, SqliteBroker.delete, _SqliteFile.change,
        _use_write_ahead_log, _AwsSender._batch, SqsBroker.send, SqsBroker.delete,
        process, _verdict, _wanted, _delay_s, _ask_policy, _Slot._run, Worker.settle,
        _carry_out, _postpone, Worker._close, _dead_letter, _send_copy, _Held.move,
        _Holdings.finish, _Holdings.release, _Holdings._decide, _Calls.answered,
        _Calls._deleted, _Calls._delayed, _Calls._try_later, _Holdings.doubt,
        _Holdings.close, _Holdings.end, _Scheduler.send, _Ticker._move_on
    2 (339): SqliteBroker.receive, SqliteBroker._claim, SqliteBroker.change_visibility,
        SqsBroker.receive, _find_lease, _Poller._receive, _Intake.take, _Intake.close,
        _Course.take, _Course._release_if_stuck, _Backlog, _Call, _Leases,
        _Holdings.take, _Holdings.start, _Holdings.start_more, _Holdings.release,
        _Holdings.release_waiting, _Holdings._decide, _Holdings.expire, _Holdings.lose,
        _Calls.next, _Calls.answered, _Calls._extended, _Calls._deleted, _Keeper._look,
        _Keeper._make, _Slot._run, _Slot._process, Worker._give_up, _Child.kill
    3 (112): _decode, _parse, Message.__init__, _validate, _fits, _find_task,
        Task.find_by_name, Task.call, _register, _import, _import_path, _parse_line,
        _to_outcome, _import_tasks
    4 (106): process, _begin_run, _RunOfMany.begin, _decode, _parse, _failed,
        _log_failed, _verdict, _is_invalid, _text_of_invalid, _Slot._run, Worker.settle
    5 (214): _begin_run, _end_run, _failed, _log_failed, _sentence, _what_follows,
        _name_of, _reason, _in_one_line, _facts, _extra_of, _text_of_invalid, _shown,
        _mismatch, _too_large, _Holdings.warn, _Keeper._tell, _Faults, _error_code,
        _error_details, _explained, _explanation, _find_remedy, _Source.read,
        _call_safely, _log_again
    6 (338): _Polls, _Intake.begin, _Intake.adds_helper, _Poller.work, _Poller._help,
        _Poller._try, _Poller._receive, _pause_s, _Holdings._decide, _Ends, _Calls.next,
        _Calls._due_at, _Calls._patience_s, _Calls._extended, _Leases, _Keeper._wait,
        _Keeper._make, SqsBroker.receive, SqsBroker.url, SqsBroker._find_url, _parts
    7 (211): _in_own_context, _refresh_django_connections, _PerProcess, _made_once,
        _Brokers.before_fork, _Brokers.after_fork, _close_sqlite_files,
        _release_sqlite_files, _Signals, _hold_signals, _release_signals,
        _forget_signals, _path_of_children, _Child._start_process,
        _ChildProcess.__init__, _serve_worker, _leave_signals_to_worker, _ignore_signal,
        _die_with_parent
    8 (243): _in_group, _send_all, _in_order, _OrderedSend, SqliteBroker.send,
        SqliteBroker._claim, SqliteBroker.delete, SqsBroker.receive,
        SqsBroker._receive_in_order, _Polls, _Holdings._decide, _dead_letter,
        _run_records, _is_behind

Parts and rooms; the file still works if cut before part IV, V or VI
    I meaning
        1 names and limits, 2 errors, 3 settings, 4 Django, 5 messages, 6 retry policies
    II queues
        7 the broker contract, 8 SQLite, 9 SQS and SNS, 10 connections
    III tasks
        11 tasks, 12 publishing
    IV work
        13 processing, 14 holdings, 15 the keeper, 16 the worker, 17 log records, 18
        isolation, 19 Lambda
    V state
        20 claims, 21 once, unique, limits, 22 schedules, 23 Django's tasks
    VI people
        24 dead letters, 25 infrastructure, 26 command line, 27 vendoring
"""

# === PART I: MEANING ==================================================================


# --- 1. names and limits --------------------------------------------------------------
# Importing this file does no I/O, reads no environment and imports no botocore,
# sqlite3, argparse or asyncio: the first function that needs a slow module imports it.
# All that AWS allows in one call, and for one message, is written down here once.
# https://docs.aws.amazon.com/general/latest/gr/sqs-service.html

from __future__ import annotations

# Neither botocore nor Django ships types. Said here, it holds for a vendored copy too.
# mypy: disable-error-code="import-untyped,import-not-found"

__version__ = "5.0.0"

# These names are promised to stay; those with an underscore may change at any time.
# Each later part adds its own.
__all__ = [
    "SCHEMA",
    "VERSION",
    "ChildCrashed",
    "ConfigurationError",
    "IgnoreException",
    "LoggingException",
    "Message",
    "MessageTooLarge",
    "PartialFailure",
    "PostponeException",
    "Priority",
    "QueueFull",
    "RetryException",
    "RetryPolicy",
    "StopRetry",
    "TaskNotFound",
    "TaskhawkError",
    "TimeLimitExceeded",
    "ValidationError",
    "configure",
    "exponential",
    "fixed",
    "linear",
    "settings",
]

import abc
import contextlib
import contextvars
import dataclasses
import enum
import functools
import heapq
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import operator
import os
import re
import signal
import sys
import threading
import time
import traceback
import typing
import weakref
from collections.abc import (
    AsyncGenerator,
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

# What `python -m taskhawk NAME …` runs, by name; "" is what runs for all other names.
_programs: dict[str, Callable[[Sequence[str]], int]] = {}


def _run_program(argv: Sequence[str]) -> int:
    """Run the program that a later part has registered; return its exit code."""
    if argv and argv[0] in _programs:
        return _programs[argv[0]](argv[1:])
    if "" in _programs:
        return _programs[""](argv)
    print(
        "taskhawk: this copy of the file has no command line: vendor it whole, or call"
        " listen_for_messages() in a script",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    # `python -m taskhawk` runs this file as __main__, and the tasks' modules import it
    # again under its own name. Go on in that one, or there would be two registries.
    _name = __spec__.name if __spec__ else inspect.getmodulename(__file__)
    _module = importlib.import_module(_name or "")
    sys.exit(_module._run_program(sys.argv[1:]))  # noqa: SLF001 - its own

VERSION = __version__  # the name that taskhawk 1.4 gave it
_MAX_BATCH = 10  # entries in a batch call of SQS and SNS, and messages in a receive
_MAX_SQS_BYTES = 1_048_576  # a message, or the sum of a batch: body plus attributes
_MAX_SNS_BYTES = 262_144  # the same for SNS, whose topics may allow more
_MAX_ATTRIBUTES = 10  # a raw SNS delivery to SQS discards a message that has more
_MAX_DELAY_S = 900  # DelaySeconds of SQS
_MAX_QUEUE = 80 - len("TASKHAWK--HIGH-PRIORITY-DLQ")  # the longest name has it inside
_FIFO = ".fifo"  # the name of a FIFO queue ends with it, in lower case
_MAX_GROUP = 128  # characters of MessageGroupId and MessageDeduplicationId
_MAX_HELD_S = 43_200  # SQS counts these 12 hours from the receive, extensions included
_LONG_POLL_S = 20  # the longest wait of ReceiveMessage, and so the cheapest
_DEFAULT_LEASE_S = 30  # the visibility timeout of a queue that sets none
_ERROR_ATTRIBUTE = "taskhawk.error"  # says why the worker dead-lettered a message
_MAX_ERROR_BYTES = 16_384  # its size: enough for a traceback, little beside 1 MiB
_ATTEMPTS_ATTRIBUTE = "taskhawk.attempts"  # how many there were before it was postponed
_POSTPONED_ATTRIBUTE = "taskhawk.postponed"  # how often it was
_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Log(logging.LoggerAdapter):  # type: ignore[type-arg]
    """Logs, and goes on if logging fails: a broken filter must not end a worker."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        """Leave `extra` to each call."""
        return msg, kwargs

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log; the record names the line that called us, which is three frames up."""
        if self.isEnabledFor(level):
            self.safely(super().log, level, msg, *args, stacklevel=3, **kwargs)

    def safely(self, call: Callable[..., object], *args: object, **kwargs: Any) -> None:
        """Make a call of logging; print its error to stderr, as its handlers do."""
        try:
            call(*args, **kwargs)
        except Exception:
            if logging.raiseExceptions:
                traceback.print_exc()


_log = _Log(logging.getLogger(__name__), {})


# --- 2. errors ------------------------------------------------------------------------
# Every failure has a name and a fate. A ConfigurationError is for a person to fix; a
# ValidationError is a fault of a message; a PartialFailure names the messages that were
# not accepted. Tasks and retry policies raise the last five classes to say what is to
# become of the message.


class TaskhawkError(Exception):
    """The base class of all taskhawk errors."""


class ConfigurationError(TaskhawkError):
    """A setting, a task's declaration or the infrastructure is wrong.

    Only a person can fix it. A worker that meets one before its first successful
    receive ends with it; later, it keeps trying.
    """


class ValidationError(TaskhawkError):
    """A message does not have the format of :data:`SCHEMA`, or can't be sent.

    A worker leaves such a message to the queue's redrive policy, and never deletes it.
    """


class MessageTooLarge(ValidationError):
    """A message and its attributes are larger than the service accepts; it is not sent.

    :ivar limit: the most bytes that the service accepts: 1 MiB on SQS and SQLite, 256
        KiB on SNS, or less if the queue is set to less
    """

    def __init__(self, text: str, max_bytes: int) -> None:
        super().__init__(text)
        self.limit = max_bytes


class TaskNotFound(ValidationError):
    """No task of that name is registered, perhaps because its module is not imported.

    A worker leaves such a message to the queue's redrive policy, because the message
    may be newer than the worker.
    """


class PartialFailure(TaskhawkError):
    """Some entries of a batch were not accepted.

    :ivar result: the lists ``Successful`` and ``Failed``. Each entry has the ``Id`` of
        its message; a failed one also has the service's ``Code`` and ``Message``
    :ivar success_count: the length of ``Successful``
    :ivar failure_count: the length of ``Failed``
    :ivar unsent: the messages of a dispatch that were not accepted, in order, ready for
        :func:`publish`
    """

    def __init__(
        self, result: dict[str, Any], *args: Any, unsent: Sequence[Message] = ()
    ) -> None:
        self.result = result
        self.success_count = len(result["Successful"])
        self.failure_count = len(result["Failed"])
        self.unsent = list(unsent)
        if not args:
            args = (self._summary(),)
        super().__init__(*args)

    def _summary(self) -> str:
        """Return how many messages failed, and the codes that say why."""
        codes = {str(entry.get("Code", "unknown")) for entry in self.result["Failed"]}
        total = self.success_count + self.failure_count
        reasons = ", ".join(sorted(codes))
        return f"{self.failure_count} of {total} messages failed: {reasons}"


class QueueFull(TaskhawkError):
    """A task's queue has as many messages as its `max_queue_size`: nothing was sent.

    :ivar queue: the queue's name
    :ivar size: how many messages it has, on SQS approximately
    :ivar limit: the task's `max_queue_size`
    """

    def __init__(self, text: str, queue: str, size: int, max_size: int) -> None:
        super().__init__(text)
        self.queue, self.size, self.limit = queue, size, max_size


class TimeLimitExceeded(TaskhawkError):
    """A task ran longer than its time limit and was killed: the run has failed."""


class ChildCrashed(TaskhawkError):
    """The process that ran an isolated task ended by itself: the run has failed.

    For example, the task called ``os._exit()`` or crashed in C code, or the system ran
    out of memory and killed the process.
    """


class RetryException(TaskhawkError):
    """Raised by a task: run me again later. It is logged without a traceback.

    Such a run counts as an attempt: the receive count grows. A task that gives a delay
    overrides its retry policy, so only the queue's redrive policy ends the attempts. A
    policy given here replaces the task's own for this failure.

    SQS hides a message for at most 12 hours after its receive. A longer delay is cut to
    that, and the log says so: raise it again then, or dispatch a new message.

    :param args: the text; a number in the first place is the delay, as in taskhawk 4.7
    :param delay_seconds: seconds until the next run; None leaves it to the task's retry
        policy or, without one, to the queue's visibility timeout
    :param retry: a policy for this failure; when it gives up, the message goes to the
        dead-letter queue
    :param log_error: whether the failure is logged as an error, and the error hook
        called, if it is the last one; False logs a warning, without a traceback
    :raises ValueError: if the delay is negative or not finite, the policy can't be
        called, or both are given
    """

    # For subclasses with an __init__ of their own.
    delay_seconds: float | None = None
    retry: Callable[[int], float] | None = None
    log_error = True

    def __init__(
        self,
        *args: Any,
        delay_seconds: float | None = None,
        retry: Callable[[int], float] | None = None,
        log_error: bool = True,
    ) -> None:
        if delay_seconds is None and args and _is_number(args[0]):
            delay_seconds = args[0]
            args = args[1:]
        if delay_seconds is not None and not _is_delay(delay_seconds):
            raise ValueError(
                f"delay_seconds: expected 0 or more seconds, got {delay_seconds!r}"
            )
        if retry is not None and not callable(retry):
            raise ValueError(f"retry: expected a retry policy, got {retry!r}")
        if retry is not None and delay_seconds is not None:
            raise ValueError("expected delay_seconds or retry, got both")
        self.delay_seconds = delay_seconds
        self.retry = retry
        self.log_error = log_error
        super().__init__(*args)


class PostponeException(RetryException):
    """Raised by a task: run me later, and do not count this as an attempt.

    A copy of the message is sent with the delay, and then the message is deleted. So a
    message is never given up because it waits, however often it is postponed. It is
    logged at debug level. A delay over SQS's 15 minutes is cut to that.

    Where no copy can be sent, the run counts as one that raised
    :class:`RetryException`: on a FIFO queue, where a copy would break the order, and in
    Lambda behind SNS, or behind SQS if the function may not send.

    :param args: the text; a number in the first place is the delay
    :param delay_seconds: seconds until the next run; None for a minute
    :raises ValueError: if the delay is negative or not finite
    """


class LoggingException(TaskhawkError):
    """Raised by a task: I failed; log this message, with this `extra`.

    Otherwise it is a failed run like any other: the retry policy decides, and the error
    hook is called.

    :param message: the text of the log record
    :param extra: attributes of the log record; a name that logging itself uses gets the
        prefix "extra_"
    """

    extra: Mapping[str, Any] | None = None

    def __init__(self, message: object, extra: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.extra = extra


class IgnoreException(TaskhawkError):
    """Raised by a task: there is nothing to do; acknowledge the message."""


class StopRetry(TaskhawkError):
    """Raised by a retry policy or a task: give up; dead-letter the message at once."""


def _is_number(value: object) -> typing.TypeGuard[float]:
    """Return whether a value is a number. True and False are not, unlike in Python."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_delay(value: object) -> typing.TypeGuard[float]:
    """Return whether a value is a number of seconds that one can wait."""
    return _is_number(value) and 0 <= value < math.inf


def _text_of(error: object) -> str:
    """Return the text of an error, even of one whose class fails to make it."""
    try:
        return str(error)
    except Exception:
        return f"{type(error).__name__} (its text can't be made)"


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors at the ends of an exception group; another error is its own."""
    if not isinstance(error, BaseExceptionGroup):
        yield error
        return
    for inner in error.exceptions:
        yield from _leaves(inner)


def _raise_interrupt(error: BaseException) -> None:
    """Raise what is to end the process: Control-C, or a signal handler's exit.

    A handler of the application's may call ``sys.exit()`` while a task or hook runs.
    The ``sys.exit()`` of the task itself is a failed run, and is not raised here.
    """
    for leaf in _leaves(error):
        if isinstance(leaf, KeyboardInterrupt):
            raise leaf
        if isinstance(leaf, SystemExit) and _passed_a_handler(leaf):
            raise leaf


def _passed_a_handler(error: BaseException) -> bool:
    """Return whether an error came out of a signal handler.

    Python calls a handler with the frame that it interrupted, which is its caller's:
    https://docs.python.org/3/library/signal.html#signal.signal
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        names, rest, _, values = inspect.getargvalues(frame)
        given = list(map(values.get, names))
        others = values.get(str(rest))
        if isinstance(others, tuple):
            given += others
        if frame.f_back in list(filter(inspect.isframe, given)):
            return True
    return False


# --- 3. settings ----------------------------------------------------------------------
# The only place where configuration is read. The first source that has a setting wins:
# configure(), the module named by SETTINGS_MODULE, Django's settings, the environment,
# the default. A setting is checked at its first use, and the error for a wrong value
# says where the value came from. No error shows the value of a secret.

# Outer spaces and control characters, which an .env file of Windows may add.
_UNCLEAN = re.compile(r"^\s|\s$|[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_FLAGS = dict.fromkeys(("", "0", "false", "no", "off"), False)
_FLAGS |= dict.fromkeys(("1", "true", "yes", "on"), True)
# Dotted paths of taskhawk's own, and of 1.4's submodules, also in a vendored copy.
_OWN_PATHS = {
    "taskhawk.Task": "Task",
    "taskhawk.conf.default_headers_hook": "_do_nothing",
    "taskhawk.conf.noop_hook": "_do_nothing",
    "taskhawk.task_manager.Task": "Task",
}


class _Illegal(ValueError):
    """A value breaks the rule of its setting; the text may say more."""


class _Rule(NamedTuple):
    """What a setting may be.

    `parse` returns a value as taskhawk uses it, and takes text for any value, for the
    environment has nothing else. It raises _Illegal if the value breaks the rule, and
    ImportError or AttributeError if a dotted path leads nowhere.
    """

    expected: str  # the words that errors use for it
    parse: Callable[[Any], Any]


class _Setting(NamedTuple):
    """A row of the table of settings."""

    rule: _Rule
    example: str  # a legal value, for errors
    default: Any = None

    @property
    def expected(self) -> str:
        """What errors say of a legal value."""
        return f"{self.rule.expected}, such as {self.example!r}"


def _parse_text(pattern: str, value: Any) -> str:
    """Take text that the pattern matches as a whole."""
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise _Illegal
    return value


def _parse_flag(value: Any) -> bool:
    """Take words for true and false; any other value counts as Python takes it."""
    if not isinstance(value, str):
        return bool(value)
    word = value.lower()
    if word not in _FLAGS:
        raise _Illegal
    return _FLAGS[word]


def _parse_number(convert: Callable[[str], float], value: Any) -> float:
    """Take a number above 0."""
    try:
        number = convert(str(value))  # of its text, so that True is not 1
    except ValueError as error:
        raise _Illegal from error
    if not 0 < number < math.inf:
        raise _Illegal
    return number


def _parse_account(value: Any) -> str:
    """Take an account id; as an int, it has lost its leading zeros."""
    if type(value) is int:
        value = f"{value:012d}"
    return _parse_text("[0-9]{12}", value)


def _parse_queue(value: Any) -> str:
    """Take the name of a service, whose queues' names are made of it."""
    name = _parse_text(f"[A-Za-z0-9_-]{{1,{_MAX_QUEUE}}}", value)
    if name.upper().endswith("-DLQ"):
        raise _Illegal("its queue would be another's dead-letter queue")
    return name


def _parse_url(value: Any) -> str:
    """Take a URL of HTTP."""
    return _parse_text(r"https?://[^\s/]\S*", value).rstrip("/")


def _parse_broker(value: Any) -> str:
    """Take the name of a broker; make a file's path absolute, for a task may chdir."""
    url = _parse_text("sqs|sqlite://.*", value)
    relative = re.fullmatch("sqlite:///([^/?].*)", url)
    if not relative:
        return url
    folder = os.getcwd()
    if "?" in folder or _UNCLEAN.search(folder):  # which no URL can hold
        return url
    return f"sqlite:///{folder}/{relative[1]}"


def _parse_callable(value: Any) -> Any:
    """Take a function or class, or import it by its dotted path."""
    if isinstance(value, str):
        value = _import_path(value)
    if not callable(value):
        raise _Illegal
    return value


def _import_path(path: str) -> Any:
    """Return what a dotted path leads to."""
    if path in _OWN_PATHS:
        return globals()[_OWN_PATHS[path]]
    module, _, name = path.rpartition(".")
    if not module or module.startswith("."):
        raise _Illegal
    return getattr(importlib.import_module(module), name)


def _do_nothing(**_: object) -> None:
    """Do what 1.4's default hooks did."""


_TEXT = _Rule("a string", functools.partial(_parse_text, ".+"))
# Emulators have regions of any name. One that ends in a digit and a letter is a zone.
_REGION = _Rule(
    "the name of a region, not of an availability zone",
    functools.partial(_parse_text, r"(?!.*-[0-9]+[a-z]$)[A-Za-z0-9-]{1,63}"),
)
_ACCOUNT = _Rule("an account id of twelve digits", _parse_account)
_FLAG = _Rule("true or false", _parse_flag)
_SECONDS = _Rule("a number of seconds above 0", functools.partial(_parse_number, float))
_COUNT = _Rule("a whole number above 0", functools.partial(_parse_number, int))
_HOOK = _Rule("a function or its dotted path", _parse_callable)
_POLICY = _Rule("a retry policy or its dotted path", _parse_callable)
_CLASS = _Rule("a class or its dotted path", _parse_callable)
_URL = _Rule("a URL that begins with http:// or https://", _parse_url)
_ROLE = _Rule(
    "the ARN of an IAM role",
    functools.partial(
        _parse_text, r"(?a)arn:aws(-[a-z]+)*:iam::[0-9]{12}:role/[\w+=,.@/-]+"
    ),
)
_BROKER = _Rule("'sqs' or a URL of SQLite", _parse_broker)
_TABLE = _Rule(
    "3 to 255 letters, digits, dots, hyphens and underscores",
    functools.partial(_parse_text, "[A-Za-z0-9_.-]{3,255}"),
)
_QUEUE = _Rule(
    f"at most {_MAX_QUEUE} letters, digits, hyphens and underscores", _parse_queue
)
_SETTINGS = {
    "AWS_ACCESS_KEY": _Setting(_TEXT, "AKIAIOSFODNN7EXAMPLE"),
    "AWS_ACCOUNT_ID": _Setting(_ACCOUNT, "123456789012"),
    "AWS_CONNECT_TIMEOUT_S": _Setting(_SECONDS, "2", 2),
    "AWS_ENDPOINT_DYNAMODB": _Setting(_URL, "http://127.0.0.1:4566"),
    "AWS_ENDPOINT_SCHEDULER": _Setting(_URL, "http://127.0.0.1:4566"),
    "AWS_ENDPOINT_SNS": _Setting(_URL, "http://127.0.0.1:4566"),
    "AWS_ENDPOINT_SQS": _Setting(_URL, "http://127.0.0.1:4566"),
    "AWS_READ_TIMEOUT_S": _Setting(_SECONDS, "2", 2),
    "AWS_REGION": _Setting(_REGION, "eu-west-1"),
    "AWS_SECRET_KEY": _Setting(_TEXT, "wJalrXUtnFEMI/EXAMPLEKEY"),
    "AWS_SESSION_TOKEN": _Setting(_TEXT, "AQoDYXdzEJr/EXAMPLETOKEN"),
    "IS_LAMBDA_APP": _Setting(_FLAG, "False", default=False),
    "TASKHAWK_BROKER": _Setting(_BROKER, "sqlite:///queue.db", "sqs"),
    "TASKHAWK_CLAIMS_TABLE": _Setting(_TABLE, "taskhawk-claims"),
    "TASKHAWK_DEFAULT_HEADERS": _Setting(_HOOK, "myapp.hooks.default_headers"),
    "TASKHAWK_ERROR_HOOK": _Setting(_HOOK, "myapp.hooks.report_error"),
    "TASKHAWK_FIFO": _Setting(_FLAG, "False", default=False),
    "TASKHAWK_HEARTBEAT_HOOK": _Setting(_HOOK, "myapp.hooks.touch_file"),
    "TASKHAWK_MAX_DB_REUSE_LOOPS": _Setting(_COUNT, "5", 5),
    "TASKHAWK_POST_PROCESS_HOOK": _Setting(_HOOK, "myapp.hooks.after"),
    "TASKHAWK_PRE_PROCESS_HOOK": _Setting(_HOOK, "myapp.hooks.before"),
    "TASKHAWK_QUEUE": _Setting(_QUEUE, "dev-myapp"),
    "TASKHAWK_RETRY": _Setting(_POLICY, "myapp.retries.patient"),
    "TASKHAWK_RUN_HOOK": _Setting(_HOOK, "myapp.hooks.count_run"),
    "TASKHAWK_SCHEDULER_ROLE": _Setting(
        _ROLE, "arn:aws:iam::123456789012:role/taskhawk-dev-myapp"
    ),
    "TASKHAWK_SYNC": _Setting(_FLAG, "False", default=False),
    "TASKHAWK_TASK_CLASS": _Setting(_CLASS, "myapp.tasks.MyTask"),
}
_SECRETS = ("AWS_ACCESS_KEY", "AWS_SECRET_KEY", "AWS_SESSION_TOKEN")
# Names that are no mistake: 4.7's own, and what Kubernetes sets for services such as
# "taskhawk" or "taskhawk-web": TASKHAWK_SERVICE_HOST, TASKHAWK_PORT_80_TCP_ADDR, ….
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_FOREIGN_NAMES = re.compile(
    r"TASKHAWK_(CONSUMER_BACKEND|PUBLISHER_BACKEND|PUBLISHER_GCP_BATCH_SETTINGS"
    r"|HEARTBEAT_HOOK_SYNC_CALL_S"
    r"|(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?)"
    r"|(\w+_)?PORT(_[0-9]+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?)?)"
)
_warned: set[str] = set()  # names already warned about


class _Source(NamedTuple):
    """A place that may have settings."""

    where: str  # the words that errors use for it
    get: Callable[[str], Any]  # returns a setting's raw value, or None

    def read(self, name: str) -> Any:
        """Return a setting as its rule makes it, or None if it is not set here.

        :raises ConfigurationError: if the value breaks the rule; it shows no secret
        """
        setting = _SETTINGS[name]
        value = self.get(name)
        # An empty text means false, but it is not the name of anything.
        if value is None or (value == "" and setting.rule is not _FLAG):
            return None
        try:
            if isinstance(value, str) and _UNCLEAN.search(value):
                raise _Illegal(
                    "it has outer spaces, or control characters such as a line break"
                )
            return setting.rule.parse(value)
        except (_Illegal, ImportError, AttributeError) as error:
            shown = type(value).__name__ if name in _SECRETS else repr(value)
            if str(error):
                shown += f" ({error})"
            raise ConfigurationError(
                f"{name} in {self.where}: expected {setting.expected}, got {shown}"
            ) from error


class _Settings:
    """The settings as attributes, each read at its first use and remembered.

    Nothing is read when taskhawk is imported, so an application may configure it later.
    """

    def __init__(self) -> None:
        self.given: Mapping[str, Any] = {}  # by configure()
        self.on_change: list[Callable[[], None]] = []  # closes what was made with them
        self._forgotten = 0  # how often forget() was called

    def __getattr__(self, name: str) -> Any:
        """Read a setting that is not remembered as an attribute yet."""
        if name not in _SETTINGS:
            raise AttributeError(_no_setting(name))
        forgotten = self._forgotten
        value = self.read(name)
        setattr(self, name, value)
        # Only now look whether forget() was called meanwhile: the value may be old.
        if self._forgotten != forgotten:
            vars(self).pop(name, None)
        return value

    def read(self, name: str) -> Any:
        """Read a setting from its source, whatever is remembered."""
        value = self._find(name)
        if value and name in ("IS_LAMBDA_APP", "TASKHAWK_FIFO"):
            self._check_fifo()
        return value

    def _find(self, name: str) -> Any:
        """Return the value of the first source that has a setting, or its default."""
        for source in self._sources():
            value = source.read(name)
            if value is not None:
                return value
        return _SETTINGS[name].default

    def _check_fifo(self) -> None:
        """Refuse the settings that FIFO queues do not go with."""
        if not self._find("TASKHAWK_FIFO"):
            return
        if self._find("IS_LAMBDA_APP"):
            raise ConfigurationError(
                "TASKHAWK_FIFO and IS_LAMBDA_APP are both set, but a FIFO topic can't"
                " call a function: set one of them; with TASKHAWK_FIFO alone, messages"
                " go to queues, which a function can consume, too"
            )
        queue = self._find("TASKHAWK_QUEUE") or ""
        longest = _MAX_QUEUE - len(_FIFO)
        if len(queue) > longest:
            raise ConfigurationError(
                f"TASKHAWK_QUEUE: expected at most {longest} characters where"
                " TASKHAWK_FIFO is set, for the names of FIFO queues end with"
                f" {_FIFO!r}, got {len(queue)} in {queue!r}"
            )

    def require(self, name: str) -> Any:
        """Return a setting that has no default; raise ConfigurationError if unset."""
        value = getattr(self, name)
        if value is None:
            sentence = (
                f"{name} is not set: expected {_SETTINGS[name].expected}, from"
                " taskhawk.configure(), the module named by SETTINGS_MODULE, Django's"
                " settings or the environment"
            )
            if name == "TASKHAWK_QUEUE":
                sentence += "; without AWS, try TASKHAWK_BROKER=sqlite:///queue.db"
            raise ConfigurationError(sentence)
        return value

    def credentials(self) -> dict[str, str]:
        """Return botocore's arguments, or {} to leave it to botocore.

        All come from one source: a key never meets another's secret or token.
        """
        for source in self._sources():
            key, secret, token = map(source.read, _SECRETS)
            if key and secret:
                return {
                    "aws_access_key_id": key,
                    "aws_secret_access_key": secret,
                    "aws_session_token": token,
                }
            if key or secret:
                missing = "AWS_SECRET_KEY" if key else "AWS_ACCESS_KEY"
                raise ConfigurationError(
                    f"{missing} is not set in {source.where}, but the other half of the"
                    " credentials is: expected both or neither"
                )
        return {}

    def errors(self) -> list[ConfigurationError]:
        """Read all settings, import all hooks, and return what is wrong with them."""
        found: dict[str, ConfigurationError] = {}
        reads: list[Callable[[], Any]] = [self.credentials]
        reads += [functools.partial(self.read, name) for name in _SETTINGS]
        for read in reads:
            try:
                read()
            except ConfigurationError as error:
                found.setdefault(str(error), error)  # one wrong module fails them all
        return list(found.values())

    def check(self) -> None:
        """Raise what is wrong with the settings, as one ConfigurationError."""
        errors = self.errors()
        if errors:
            raise ConfigurationError("; ".join(map(str, errors))) from errors[0]

    def forget(self) -> None:
        """Read each setting anew at its next use."""
        self._forgotten += 1  # first, or a thread that reads one now would not see it
        for name in _SETTINGS:
            vars(self).pop(name, None)

    def changed(self) -> None:
        """Close what was made with the settings, such as clients of AWS."""
        for callback in self.on_change:
            callback()

    def _sources(self) -> Iterator[_Source]:
        """Yield the places that may have settings, in the order of precedence."""
        yield _Source("configure()", self.given.get)
        module = os.environ.get("SETTINGS_MODULE")
        if module:
            imported = _import(module, "the module named by SETTINGS_MODULE")
            yield _source(imported, f"the module {module}")
        django = _django_settings()
        if django:
            yield _source(django, "Django's settings")
            yield _source(_django_options(django), "OPTIONS of Django's TASKS")
        environment = dict(os.environ)
        for name in _variables_of_botocore():
            environment.pop(name, None)
        yield _source(environment, "the environment")


settings = _Settings()


def _source(holder: Any, where: str) -> _Source:
    """Make a source of an object or mapping."""
    # os.environ and Flask's config are mappings; modules and Django's settings are not.
    if isinstance(holder, Mapping):
        _warn_of_unknown(map(str, holder), where)
        return _Source(where, holder.get)
    _warn_of_unknown(dir(holder), where)
    return _Source(where, lambda name: getattr(holder, name, None))


def _variables_of_botocore() -> set[str]:
    """Return the variables of the environment that belong to botocore's credentials.

    Lambda sets AWS_ACCESS_KEY_ID and AWS_SESSION_TOKEN to those of the function's role
    and, by its manual, AWS_ACCESS_KEY too:
    https://docs.aws.amazon.com/lambda/latest/dg/configuration-envvars.html
    """
    botocores_key = os.environ.get("AWS_ACCESS_KEY_ID")
    if not botocores_key:
        return set()
    if os.environ.get("AWS_ACCESS_KEY") != botocores_key:
        return {"AWS_SESSION_TOKEN"}
    if not os.environ.get("AWS_SECRET_KEY"):
        return {"AWS_ACCESS_KEY", "AWS_SESSION_TOKEN"}
    return set()


def _warn_of_unknown(names: Iterable[str], where: str) -> None:
    """Warn once of each name that looks like a setting and is none."""
    for name in sorted(set(names).difference(_SETTINGS, _warned)):
        if name.startswith("TASKHAWK_") and not _FOREIGN_NAMES.fullmatch(name):
            _warned.add(name)
            _log.warning("%s", _no_setting(name, f" in {where}"))


def _no_setting(name: str, where: str = "") -> str:
    """Return a sentence that refuses a name, and suggests a setting if one is near."""
    import difflib

    sentence = f"{name}{where} is not a setting of taskhawk"
    # The prefix alone makes names alike, so they must be nearer than by default.
    near = difflib.get_close_matches(name, _SETTINGS, 1, cutoff=0.8)
    if near:
        sentence += f"; did you mean {near[0]}?"
    return sentence


def _import(name: str, what: str) -> Any:
    """Import a module that a person named; a wrong name is a ConfigurationError."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists, but something that it imports does not
        raise ConfigurationError(
            f"{what} {name!r} can't be imported: {error}"
        ) from error


def configure(obj_or_mapping: object = None, /, **values: Any) -> None:
    """Set settings in code: they win over all other sources and replace earlier ones.

    Call it before tasks are dispatched or run, for it closes open connections. What is
    not set here is looked up in the module named by SETTINGS_MODULE, in Django's
    settings and in the environment, in this order.

    :param obj_or_mapping: an object with settings as attributes, or a mapping such as
        Flask's ``app.config``; other names in it are ignored, with a warning if they
        begin with TASKHAWK_
    :param values: settings by name, ahead of those in `obj_or_mapping`
    :raises ConfigurationError: if a name in `values` is not a setting; a value is
        checked when it is first used
    """
    for name in values:
        if name not in _SETTINGS:
            raise ConfigurationError(_no_setting(name))
    source = _source(obj_or_mapping, "configure()")
    settings.given = {name: source.get(name) for name in _SETTINGS} | values
    settings.forget()
    settings.changed()


def _call_safely(name: str, **kwargs: Any) -> None:
    """Call a hook by its setting's name; log its failure, and go on."""
    try:
        hook = getattr(settings, name)
        if hook:
            hook(**kwargs)
    except BaseException as error:  # SystemExit and CancelledError too
        _raise_interrupt(error)
        _log.exception("%s failed", name)


# --- 4. Django ------------------------------------------------------------------------
# All that this file knows of Django. It imports Django only where the application uses
# it: where DJANGO_SETTINGS_MODULE is set, or where django.conf is imported already.


def _django_settings() -> Any:
    """Return Django's settings, or None if Django is not in use."""
    named = os.environ.get("DJANGO_SETTINGS_MODULE")
    # An application may also call Django's settings.configure(), and name no module.
    if not named and "django.conf" not in sys.modules:
        return None
    from django.conf import settings as django_settings
    from django.core.signals import setting_changed

    # To connect again does nothing. A weak connection would leave a finalizer behind.
    setting_changed.connect(_django_setting_changed, weak=False)
    if named or django_settings.configured:
        return django_settings
    return None


def _django_options(django_settings: Any) -> Mapping[str, Any]:
    """Return what the OPTIONS of those of Django's task backends have that are ours.

    :raises ConfigurationError: if they differ in a setting: a process has only one
    """
    found: dict[str, Any] = {}
    for params in (getattr(django_settings, "TASKS", None) or {}).values():
        if params.get("BACKEND") != f"{__name__}.DjangoBackend":
            continue
        for name, value in params.get("OPTIONS", {}).items():
            if found.setdefault(name, value) != value and name in _SETTINGS:
                raise ConfigurationError(
                    f"{name} in OPTIONS of Django's TASKS: expected the same value for"
                    " each backend of taskhawk, got two"
                )
    return found


def _django_setting_changed(*, setting: str, **_: object) -> None:
    """Follow Django's override_settings, which changes one setting at a time."""
    settings.forget()
    if setting == "TASKS" or setting.startswith("AWS_"):  # clients are made with these
        settings.changed()


def _set_up_django() -> None:
    """Call ``django.setup()`` if DJANGO_SETTINGS_MODULE is set.

    For a process of our own, before it imports tasks, which may import models.

    :raises ConfigurationError: if the settings' module, or Django, is not installed
    """
    module = os.environ.get("DJANGO_SETTINGS_MODULE")
    if module:
        _import(module, "the module named by DJANGO_SETTINGS_MODULE")
        _import("django", "the package").setup()


def _django_task_modules() -> list[str]:
    """Return the modules named `tasks` of the installed apps, if Django is set up."""
    if "django.apps" not in sys.modules:
        return []
    from django.apps import apps
    from django.utils.module_loading import module_has_submodule

    return [
        f"{app.name}.tasks"
        for app in apps.get_app_configs()
        if module_has_submodule(app.module, "tasks")
    ]


# A thread's count of `runs`.
_slot = threading.local()


def _refresh_django_connections(*, ran: bool = False) -> None:
    """Close this thread's unusable and obsolete connections, before and after each run.

    Django does so around a request, and so CONN_MAX_AGE and CONN_HEALTH_CHECKS hold. A
    connection inside its caller's transaction, as in a test, is left alone.

    :param ran: this is after a run: after TASKHAWK_MAX_DB_REUSE_LOOPS, all are closed
    """
    if "django.db" not in sys.modules or not _django_settings():
        return
    try:
        worn = ran and _count_run()
        connections = sys.modules["django.db"].connections
        for connection in connections.all(initialized_only=True):
            if connection.in_atomic_block:
                continue
            if worn:
                connection.close()
            else:
                connection.close_if_unusable_or_obsolete()
    except Exception:  # of the database: the run is not to blame
        _log.exception("can't close the database connections")


# The runs of coroutines that are under way. What they do with the ORM is done in one
# thread of asgiref's, one thing after another, by the connections of that thread.
_coroutine_runs: set[object] = set()


def _refresh_shared_connections(*, ran: bool = False) -> None:
    """Do as :func:`_refresh_django_connections` in the thread for coroutines.

    While others run, they may be reading from a connection that is only obsolete. One
    that begins meanwhile comes here before, or waits for this thread.
    """
    if len(_coroutine_runs) > 1:
        _close_unusable_connections()
    else:
        _refresh_django_connections(ran=ran)


async def _refresh_after_coroutine() -> None:
    """Close the connections because of which the run of a coroutine may have failed."""
    if "django.db" not in sys.modules or not _django_settings():
        return
    if settings.TASKHAWK_SYNC:
        return  # they are the caller's
    from asgiref.sync import sync_to_async

    with contextlib.suppress(RuntimeError):  # the process ends: no thread does it
        await sync_to_async(_close_unusable_connections)()


def _close_unusable_connections() -> None:
    """Close those of this thread's connections with which nobody can work any more."""
    try:
        connections = sys.modules["django.db"].connections
        for connection in connections.all(initialized_only=True):
            is_open = connection.connection is not None
            if is_open and connection.errors_occurred and not connection.is_usable():
                connection.close()
    except Exception:  # of the database
        _log.exception("can't close the database connections")


def _count_run() -> bool:
    """Count a run of this thread; return whether its connections are to be replaced."""
    runs: int = getattr(_slot, "runs", 0) + 1
    most: int = settings.TASKHAWK_MAX_DB_REUSE_LOOPS
    _slot.runs = runs % most
    return runs >= most


def _run_as_django(coroutine: Any) -> None:
    """Run a coroutine to its end as Django runs one, for what it does with asgiref.

    What it awaits of sync_to_async, and so of the ORM, is done in this thread, with its
    connections: in a test, these have the test's transaction. Elsewhere, asgiref would
    wait for a thread that may be this one.
    """

    async def run() -> None:
        await coroutine

    sys.modules["asgiref.sync"].async_to_sync(run)()


def _share_django_caches() -> None:
    """Make Django's caches in this context, so that its copies share their connections.

    Django keeps a cache's client in the context that first uses it: without this, each
    message would connect anew.
    """
    if "django.core.cache" in sys.modules:
        # Not set up, or set wrongly: the task that uses such a cache gets the error.
        with contextlib.suppress(Exception):
            sys.modules["django.core.cache"].caches.all()


# --- 5. messages ----------------------------------------------------------------------
# Untrusted bytes stop here: what _decode() returns has the shape that SCHEMA describes.
# Dispatch refuses what _decode() would refuse, and both go by SCHEMA itself. Decoding
# is pure: it does no I/O, and reads neither a clock nor a setting.


class Priority(enum.Enum):
    """The queue of a message: each priority is a queue, and can have its own workers.

    A worker of several queues runs the most urgent message first: high before default,
    low and bulk.
    """

    default = 1
    high = 2
    low = 3
    bulk = 4


# The calendar in full, for JSON Schema can't say otherwise that February has no 30th.
_ISO_8601 = (
    r"^(?!0000)(?:[0-9]{4}-(?:(?:0[13578]|1[02])-31|(?:0[13-9]|1[0-2])-(?:29|30)"
    r"|(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])"
    r"|(?:[02468][048]|[13579][26])00)-02-29)"
    r"(?:[T ](?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9](?:[.,][0-9]{1,9})?)?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):?[0-5][0-9])?)?(?![\s\S])"
)
# An error says the description after "expected".
_NAME = {"description": "a non-empty string", "type": ["string"], "minLength": 1}
_OBJECT = {"description": "an object", "type": ["object"]}
_PRIORITIES = [priority.name for priority in Priority]
_METADATA = {
    "priority": {
        "description": f"one of {', '.join(_PRIORITIES)}",
        "type": ["string"],
        "enum": _PRIORITIES,
    },
    "timestamp": {
        "description": "epoch milliseconds or an ISO 8601 date and time",
        "type": ["number", "string"],
        "minimum": 0,
        "maximum": 8_640_000_000_000_000,
        "pattern": _ISO_8601,
    },
    "version": {"description": '"1.0"', "type": ["string"], "enum": ["1.0"]},
}
#: the message format as JSON Schema 2020-12: the contract for other languages
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "taskhawk message: the body of an SQS or SNS message",
    **_OBJECT,
    "required": ["id", "metadata", "headers", "task", "args", "kwargs"],
    "properties": {
        "id": _NAME,
        "metadata": {
            **_OBJECT,
            "required": ["timestamp", "version"],
            "properties": _METADATA,
        },
        "headers": _OBJECT,
        "task": _NAME,
        "args": {"description": "an array", "type": ["array"]},
        "kwargs": _OBJECT,
    },
}
_BODY = {"description": "a string of JSON", "type": ["string"]}
# What JSON calls a Python type, and how an error shows a value of it.
_KINDS = {
    dict: ("object", "an object"),
    list: ("array", "an array"),
    tuple: ("array", "an array"),
    str: ("string", "a string"),
    bool: ("boolean", "a boolean"),
    int: ("number", "a number"),
    float: ("number", "a number"),
    type(None): ("null", "null"),
}


def _kind(value: object) -> tuple[str, str]:
    """Return what JSON calls a value's type, and how an error shows the value."""
    for base in type(value).__mro__:  # a subclass counts as what it derives from
        if base in _KINDS:
            return _KINDS[base]
    return "", type(value).__name__


def _validate(value: Any, schema: Mapping[str, Any], path: str = "") -> None:
    """Check a value by the keywords that SCHEMA uses.

    :param path: how the error names the value, such as ``metadata.version``
    :raises ValidationError: says what differs, what was expected and what came; it
        shows nothing that may be secret
    """
    if not _fits(value, schema):
        raise _mismatch(path or "message", schema, _shown(value, path))
    if "properties" not in schema:
        return
    for key, inner in schema["properties"].items():
        inner_path = f"{path}.{key}" if path else key
        if key in value:
            _validate(value[key], inner, inner_path)
        elif key in schema["required"]:
            raise _mismatch(inner_path, inner, "nothing")


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Return whether a value, not counting what it contains, fits its schema."""
    kind, _ = _kind(value)
    if kind not in schema["type"]:
        return False
    if kind == "number":
        return bool(schema["minimum"] <= value <= schema["maximum"])
    if "enum" in schema:
        return bool(value in schema["enum"])
    if "pattern" in schema:
        return re.search(schema["pattern"], value) is not None
    return bool(value) or "minLength" not in schema  # which is 1


def _mismatch(path: str, schema: Mapping[str, Any], shown: str) -> ValidationError:
    """Return the error for a value that differs from its schema."""
    return ValidationError(f"{path}: expected {schema['description']}, got {shown}")


def _shown(value: object, path: str) -> str:
    """Return how an error shows a value: by its type, for the value may be secret.

    Metadata are not secret: their texts are shown up to 40 characters.
    """
    _, shown = _kind(value)
    if value == "":
        return '""'
    if not path.startswith("metadata."):
        return shown
    if isinstance(value, str):
        return json.dumps(value[:40])
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a huge number"
    if isinstance(value, int | float):
        return json.dumps(value)
    return shown


def _new_id() -> str:
    """Return a random UUID (RFC 9562, version 4), in a third of uuid.uuid4()'s time."""
    digits = os.urandom(16).hex()
    return (
        f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"
    )


# The tasks that a message can name. Nothing else is ever looked up for a message.
_registry: dict[str, Task[Any, Any]] = {}


def _find_task(name: str) -> Task[Any, Any]:
    """Return the task registered under a name, or raise :exc:`TaskNotFound`."""
    registered = _registry.get(name)
    if registered is None:
        raise TaskNotFound(
            f"no task is registered as {name[:200]!r}: is its module imported?"
        )
    return registered


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _epoch_ms(timestamp: float | str) -> int:
    """Return a valid timestamp as epoch milliseconds; without an offset, it is UTC."""
    if not isinstance(timestamp, str):
        return int(timestamp)
    moment = datetime.fromisoformat(timestamp)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    # Not below 0, so that what was decoded can be sent again.
    return max(0, (moment - _EPOCH) // timedelta(milliseconds=1))


class Message:  # noqa: PLW1641 - it may change, so it is no key of a dict
    """One request for a run of a task: what the publisher makes and the worker gets.

    It may be changed until it is sent, as in taskhawk 1.4. Two messages are equal if
    they are the same on the wire.

    :param data: as :data:`SCHEMA` describes it; unknown keys are ignored
    :raises ValidationError: says what differs, what was expected and what came
    """

    CURRENT_VERSION = "1.0"
    VERSIONS = ("1.0",)
    delay_s: float = 0  #: seconds for which the queue holds it back; not on the wire
    group_id: str | None = None  #: its message group, as SQS takes it; not in the body
    received: QueueMessage | None = None  #: what it arrived as; None where it was made

    def __init__(self, data: Mapping[str, Any]) -> None:
        _validate(data, SCHEMA)
        metadata = data["metadata"]
        self.id: str = data["id"]
        #: the queue that it goes through
        self.priority = Priority[metadata.get("priority", "default")]
        #: when it was dispatched, in epoch milliseconds
        self.timestamp = _epoch_ms(metadata["timestamp"])
        #: of the format
        self.version: str = metadata["version"]
        self.headers: dict[str, Any] = data["headers"]
        #: of a task that need not be registered here
        self.task_name: str = data["task"]
        # A list, even of a tuple: JSON has no tuples.
        self.args: list[Any] = list(data["args"])
        self.kwargs: dict[str, Any] = data["kwargs"]

    @classmethod
    def new(
        cls,
        task: str,
        args: Iterable[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        msg_id: str | None = None,
        headers: Mapping[str, Any] | None = None,
        *,
        priority: Priority = Priority.default,
    ) -> Message:
        """Make a message for :func:`publish`.

        :param task: the name of a registered task
        :param args: positional arguments, not checked against the function's signature
        :param kwargs: keyword arguments, likewise
        :param msg_id: the message's id; a new UUID if None
        :param headers: headers, whose values are any JSON
        :raises TaskNotFound: if there is no such task
        :raises ValidationError: if `msg_id` is empty or not a string
        """
        _find_task(task)
        if msg_id is None:
            msg_id = _new_id()
        else:
            _validate(msg_id, _NAME, "id")
        # Not by __init__, which would check what is valid: that takes long.
        message = cls.__new__(cls)
        message.id = msg_id
        message.priority = priority
        message.timestamp = int(time.time() * 1000)
        message.version = cls.CURRENT_VERSION
        message.headers = dict(headers or {})
        message.task_name = task
        message.args = list(args or ())
        message.kwargs = dict(kwargs or {})
        return message

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata as they are on the wire."""
        return {
            "priority": self.priority.name,
            "timestamp": self.timestamp,
            "version": self.version,
        }

    @property
    def task(self) -> Task[Any, Any]:
        """The registered task; raises :exc:`TaskNotFound` if there is none."""
        return _find_task(self.task_name)

    def call_task(self, receipt: str | None) -> None:
        """Run the task, here and now.

        :param receipt: the receipt handle, for the task's metadata; None if the message
            is on no queue
        :raises TaskNotFound: if no such task is registered
        :raises Exception: whatever the task raises
        """
        self.task.call(self, receipt)

    def as_dict(self) -> dict[str, Any]:
        """Return the message as it is on the wire."""
        return {
            "id": self.id,
            "metadata": self.metadata,
            "headers": self.headers,
            "task": self.task_name,
            "args": self.args,
            "kwargs": self.kwargs,
        }

    def items(self) -> typing.ItemsView[str, Any]:
        """Return the items of :meth:`as_dict`."""
        return self.as_dict().items()

    def __eq__(self, other: object) -> bool:
        """Compare what is on the wire."""
        if not isinstance(other, Message):
            return NotImplemented
        return self.as_dict() == other.as_dict()


def _from_decimal(value: object) -> float:
    """Make a JSON number of a Decimal, which databases return; refuse all else.

    A reader of JSON makes a float of it: one that would change the digits is refused.
    """
    # Unless something has imported decimal, no value can be a Decimal.
    decimal = sys.modules.get("decimal")
    if decimal is None or not isinstance(value, decimal.Decimal):
        raise TypeError(f"{type(value).__name__} is not a JSON type")
    if not value.is_finite():
        return float(value)  # which the encoder refuses
    # Python writes no int of over 4300 digits; as a float, it is infinite and refused.
    small = abs(value.adjusted()) < 4300  # noqa: PLR2004
    if small and value == value.to_integral_value():
        return int(value)
    number = float(value)
    if math.isfinite(number) and decimal.Decimal(repr(number)) != value:
        raise ValueError("a Decimal has more digits than a float: send it as a string")
    return number


def _finite(text: str) -> float:
    """Parse a JSON number; Python's decoder would take NaN and infinities too."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


# ASCII always passes SQS, which refuses some control characters and surrogates.
_DUMP: Any = {"default": _from_decimal, "allow_nan": False, "separators": (",", ":")}
_CHECKING_ENCODER = json.JSONEncoder(**_DUMP)
# A circle ends in a RecursionError without a check, too.
_ENCODER = json.JSONEncoder(**_DUMP, check_circular=False)
_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def _encode(message: Message) -> str:
    """Return the body of a message, or raise the error that names what is not JSON.

    :raises TypeError: if an argument or header is of a type that JSON does not have
    :raises ValidationError: if one is NaN or infinite, a Decimal with more digits than
        a float, or nested too deeply
    """
    try:
        return _ENCODER.encode(message.as_dict())
    except (TypeError, ValueError, RecursionError) as error:
        _sizes(message)  # the encoder does not say what it failed at: this does
        raise ValidationError(f"{message.task_name}: not JSON: {error}") from error


def _sizes(message: Message) -> dict[str, int]:
    """Return the encoded size of each argument and header, by its path in errors.

    :raises TypeError, ValidationError: as :func:`_encode`
    """
    values = {f"args[{index}]": value for index, value in enumerate(message.args)}
    values |= {f"kwargs.{key}": value for key, value in message.kwargs.items()}
    values |= {f"headers.{key}": value for key, value in message.headers.items()}
    sizes = {}
    for path, value in values.items():
        try:
            sizes[path] = len(_CHECKING_ENCODER.encode(value))
        except TypeError as error:
            raise TypeError(
                f"{message.task_name}: {path} is not JSON: {error}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ValidationError(
                f"{message.task_name}: {path} is not JSON: {error}"
            ) from error
    return sizes


# What else may be in a queue: the keys that tell it, what it is, and what to do.
_FOREIGN_BODIES = (
    (
        {"TopicArn", "SubscribeURL"},
        "SNS's request to confirm a subscription: confirm it, and choose raw delivery",
    ),
    (
        {"TopicArn", "Message"},
        "a notification of SNS: turn on raw message delivery for the subscription",
    ),
    ({"detail-type", "detail"}, "an event of EventBridge: send it to another queue"),
    ({"Records"}, "an event of S3 or a similar service: send it to another queue"),
    ({"Service", "Event", "Bucket"}, "a test event of S3: send it to another queue"),
)


def _decode(body: Any) -> Message:
    """Return the message of a body; raise ValidationError, whatever is wrong with it.

    The body is hostile: an error quotes at most 40 characters of a metadata value, and
    neither nesting nor numbers can do more than have the body refused.
    """
    data = _parse(body)
    try:
        return Message(data)
    except ValidationError as error:
        foreign = _foreign(data)
        if not foreign:
            raise
        raise ValidationError(
            f"message: expected one of taskhawk's, got {foreign}"
        ) from error


def _foreign(data: Any) -> str:
    """Return what another service's body is, and what to do; "" for any other body."""
    if not isinstance(data, dict):
        return ""
    for keys, what in _FOREIGN_BODIES:
        if keys <= data.keys():
            return what
    return ""


def _parse(body: Any) -> Any:
    """Return the JSON value of a body; raise ValidationError if it has none."""
    # It may be anything: in a malformed event of Lambda, it is None.
    _validate(body, _BODY)
    try:
        return _DECODER.decode(body)
    except RecursionError:
        raise ValidationError("message: nested too deeply") from None
    except json.JSONDecodeError as error:
        # Only the position: the error's own text may quote the body.
        raise ValidationError(f"message: not JSON at character {error.pos}") from None
    except ValueError:
        raise ValidationError("message: not JSON") from None


# --- 6. retry policies ----------------------------------------------------------------
# A policy is a function of the attempt (the receive count, from 1): it returns seconds,
# or raises StopRetry. It does no I/O and keeps no state; only its jitter is random.


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """Returns the seconds until the next run, which grow by a factor and a step.

    Made by :func:`fixed`, :func:`linear` and :func:`exponential`. Jitter takes a random
    part of a delay, from half to all of it, to spread out what failed together:
    https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/

    :raises ConfigurationError: if a value is negative, or is not a number
    """

    base_s: float
    factor: float
    step_s: float
    max_retries: int | None
    max_delay_s: float
    jitter: bool

    def __post_init__(self) -> None:
        numbers = [self.base_s, self.factor, self.step_s, self.max_delay_s]
        if self.max_retries is not None:
            numbers.append(self.max_retries)
        for number in numbers:
            if not _is_number(number) or not number >= 0:  # NaN is neither
                raise ConfigurationError(
                    f"retry policy: expected 0 or more, got {number!r}"
                )

    def __call__(self, attempt: int) -> float:
        """Return the delay after the `attempt`-th run.

        :param attempt: the message's receive count, from 1: crashes and releases count
        :returns: 0 to 43,200 seconds, the longest that SQS hides a message
        :raises StopRetry: if all retries are used up
        """
        if self.max_retries is not None and attempt > self.max_retries:
            raise StopRetry(f"all {self.max_retries} retries are used up")
        first_s = min(self.base_s, _MAX_HELD_S)
        step_s = min(self.step_s, _MAX_HELD_S)
        growth = sys.float_info.max
        with contextlib.suppress(OverflowError):  # 2.0 ** 1024 is too large for a float
            growth = float(self.factor ** (attempt - 1))
        grown_s = first_s * growth + step_s * (attempt - 1)
        delay_s = min(grown_s, self.max_delay_s, _MAX_HELD_S)
        if self.jitter:
            return _jittered(delay_s)
        return delay_s


def _jittered(delay_s: float) -> float:
    """Return a random part of a delay, from half to all of it."""
    import random

    return delay_s * random.uniform(0.5, 1)


def fixed(
    delay_s: float, max_retries: int | None = None, *, jitter: bool = True
) -> RetryPolicy:
    """Return a retry policy of equal delays.

    :param delay_s: seconds from a failed run to the next
    :param max_retries: how many retries before the message is dead-lettered; None
        leaves it to the queue's maxReceiveCount
    :param jitter: take a random part of each delay, at least half of it
    """
    return RetryPolicy(delay_s, 1, 0, max_retries, _MAX_HELD_S, jitter)


def linear(
    base_s: float,
    step_s: float,
    max_retries: int | None = None,
    max_delay_s: float = 3600,
    *,
    jitter: bool = True,
) -> RetryPolicy:
    """Return a retry policy of delays that grow by `step_s` each time.

    :param base_s: seconds from the first failed run to the next
    :param step_s: seconds by which each delay is longer than the one before
    :param max_retries: how many retries before the message is dead-lettered; None
        leaves it to the queue's maxReceiveCount
    :param max_delay_s: the longest delay in seconds
    :param jitter: take a random part of each delay, at least half of it
    """
    return RetryPolicy(base_s, 1, step_s, max_retries, max_delay_s, jitter)


def exponential(
    base_s: float = 1,
    factor: float = 2,
    max_retries: int | None = None,
    max_delay_s: float = 3600,
    *,
    jitter: bool = True,
) -> RetryPolicy:
    """Return a retry policy of delays that are `factor` times longer each time.

    :param base_s: seconds from the first failed run to the next
    :param factor: how many times longer each delay is than the one before
    :param max_retries: how many retries before the message is dead-lettered; None
        leaves it to the queue's maxReceiveCount
    :param max_delay_s: the longest delay in seconds
    :param jitter: take a random part of each delay, at least half of it
    """
    return RetryPolicy(base_s, factor, 0, max_retries, max_delay_s, jitter)


# What with_options() says of a message, in its headers. No header of a user's has this
# name by accident, and none that begins so becomes an attribute.
_OPTIONS_HEADER = "taskhawk.options"


class _Options(NamedTuple):
    """What a dispatch says in place of its task; None where it says nothing."""

    retry: RetryPolicy | None = None
    time_limit: float | None = None


def _policy_data(policy: RetryPolicy) -> dict[str, Any]:
    """Return a retry policy as :func:`_read_policy` reads it."""
    data = dataclasses.asdict(policy)
    for name in ("base_s", "step_s", "max_delay_s"):
        data[name] = min(data[name], _MAX_HELD_S)  # JSON has no infinity
    return data


def _read_policy(data: Any) -> RetryPolicy:
    """Return the retry policy of hostile data; raise ValueError if they are wrong."""
    fields = [field.name for field in dataclasses.fields(RetryPolicy)]
    if not isinstance(data, dict) or sorted(data) != sorted(fields):
        raise ValueError("retry: expected a policy")
    if data["jitter"] not in (True, False):
        raise ValueError("retry: expected true or false as jitter")
    policy = RetryPolicy(**data)
    # The power of an int of a thousand digits would take for ever.
    return dataclasses.replace(policy, factor=float(policy.factor))


def _read_time_limit(value: object) -> float:
    """Return the time limit of hostile data; raise ValueError if it is wrong."""
    if not _is_number(value) or value <= 0:
        raise ValueError("time_limit: expected a number of seconds above 0")
    return min(value, _MAX_HELD_S)


_OPTION_READERS: dict[str, Callable[[Any], Any]] = {
    "retry": _read_policy,
    "time_limit": _read_time_limit,
}


def _options_of(message: Message) -> _Options:
    """Return what a message says in place of its task.

    What is wrong is ignored, with a warning: it is no reason to lose the message.
    """
    data = message.headers.get(_OPTIONS_HEADER)
    if data is None:
        return _Options()
    values = {}
    try:
        for name, value in dict(data).items():
            values[name] = _OPTION_READERS[name](value)
        return _Options(**values)
    except (ArithmeticError, TypeError, ValueError, KeyError, ConfigurationError):
        _log.warning(
            "%r: the options of a message are wrong, and not used",
            message.task_name[:200],
        )
        return _Options()


# === PART II: QUEUES ==================================================================

__all__ += [
    "Broker",
    "Depth",
    "Outgoing",
    "QueueInfo",
    "QueueMessage",
    "Refusal",
    "Sender",
    "SnsSender",
    "SqliteBroker",
    "SqsBroker",
]


# --- 7. the broker contract -----------------------------------------------------------
# All the queue I/O that this library can do. A call that fails as a whole raises:
# ConfigurationError if only a person can fix it. The answer to a batch names the
# entries that failed; an entry that a service's answer leaves out has failed too. How
# often the entries of a batch are tried in all is decided here alone.


_SUFFIXES = {
    Priority.default: "",
    Priority.high: "-high-priority",
    Priority.low: "-low-priority",
    Priority.bulk: "-bulk",
}
# Not the order of the enum, whose numbers are 1.4's.
_URGENCY = (Priority.high, Priority.default, Priority.low, Priority.bulk)
# The pauses between the tries of a batch's entries.
_PAUSES_S = (0.09, 0.3)

# What makes a sender or broker, by the scheme of its URL: later rooms add theirs.
_schemes: dict[str, Callable[[str], Sender]] = {}


def _is_fifo(queue: str) -> bool:
    """Return whether a queue is a FIFO queue, by its name or its ARN."""
    return queue.endswith(_FIFO)


def _dead_letter_name(queue: str) -> str:
    """Return what the dead-letter queue of a queue is called, by its name or its ARN.

    That of a FIFO queue is a FIFO queue, too.
    """
    if _is_fifo(queue):
        return f"{queue.removesuffix(_FIFO)}-DLQ{_FIFO}"
    return f"{queue}-DLQ"


def _is_dead_letter_queue(queue: str) -> bool:
    """Return whether a queue is a dead-letter queue, by its name."""
    return queue.removesuffix(_FIFO).endswith("-DLQ")


class Outgoing(NamedTuple):
    """A message to send.

    :ivar attributes: message attributes, in the form that SQS gives them
    :ivar delay_s: seconds for which the queue holds the message back
    :ivar group_id: the message group of a FIFO queue, or the tenant of a fair queue
    :ivar deduplication_id: a FIFO queue drops a message whose id it has seen
    """

    body: str
    attributes: Mapping[str, Mapping[str, Any]]
    delay_s: float = 0
    group_id: str | None = None
    deduplication_id: str | None = None

    def size(self) -> int:
        """Count bytes as the service does: body, attribute names, types and values."""
        size = _byte_count(self.body)
        for name, value in self.attributes.items():
            size += _byte_count(name) + sum(map(_byte_count, value.values()))
        return size


def _byte_count(content: str | bytes) -> int:
    """Count the bytes of text, or of the value of a binary attribute."""
    if isinstance(content, str):
        content = content.encode()
    return len(content)


class Refusal(NamedTuple):
    """An entry of a batch call that failed.

    :ivar index: the place of the entry among the entries of the call
    :ivar code: the service's code, or the type of an exception
    :ivar text: the service's reason
    :ivar final: whether to try no more: the entry is at fault, a person must act, or
        it was tried often enough
    """

    index: int  # type: ignore[assignment]
    code: str
    text: str
    final: bool

    @property
    def is_denied(self) -> bool:
        """Whether the service says that the caller may not do it."""
        return _is_denial(self.code)


class QueueInfo(NamedTuple):
    """What a worker needs to know of a queue; None: it has no dead-letter queue."""

    visibility_timeout_s: float
    dead_letter_queue: str | None
    max_receive_count: int | None


class Depth(NamedTuple):
    """How many messages a queue has; SQS's numbers are approximate and minutes old.

    :ivar visible: can be received now
    :ivar in_flight: were received, and are hidden until their visibility timeout ends
    :ivar delayed: were sent with a delay that has not passed yet
    """

    visible: int
    in_flight: int
    delayed: int


class Sender(typing.Protocol):
    """What publishing needs of a service.

    ``send`` takes at most ten messages, together no larger than `max_bytes`, and
    returns the refused ones. ``close`` closes connections; the next call opens new
    ones.

    Any thread may call at any time. A call that raises may have had its effect all the
    same.

    :ivar max_bytes: the largest message, and the largest sum of a batch
    :ivar max_delay_s: the longest delay
    :ivar shared_calls: how many calls may be under way at once that have messages of
        several dispatches; 0 where each dispatch makes a call of its own
    """

    max_bytes: int
    max_delay_s: float
    shared_calls: int = 0

    def destination(self, priority: Priority) -> str:
        """Return the name of the queue or topic for messages of a priority."""
        if settings.TASKHAWK_BROKER == "sqs":
            queue = settings.require("TASKHAWK_QUEUE")
        else:  # nobody else's queues are in the file
            queue = settings.TASKHAWK_QUEUE or "default"
        name = f"TASKHAWK-{queue}{_SUFFIXES[priority]}".upper()
        if settings.TASKHAWK_FIFO:
            return name + _FIFO
        return name

    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]: ...
    def close(self) -> None: ...


class Broker(Sender, typing.Protocol):
    """What workers and operations need besides; queues are called by name.

    ``receive`` takes at most ten messages and hides them from others for `lease_s`, or
    for the queue's own timeout if that is None. It waits `wait_s` for the first
    message, or until `stop` is set. ``delete`` and ``change_visibility`` take at most
    ten receipt handles; the latter makes each message visible again so many seconds
    from now. Both make one attempt, for a worker that tries again by itself, or several
    with `retry`. ``url`` is what the service calls a queue.
    """

    def receive(
        self,
        queue: str,
        most: int,
        wait_s: float,
        lease_s: float | None,
        stop: threading.Event,
    ) -> list[QueueMessage]: ...
    def delete(
        self, queue: str, receipts: Sequence[str], *, retry: bool = False
    ) -> list[Refusal]: ...
    def change_visibility(
        self, queue: str, changes: Sequence[tuple[str, float]], *, retry: bool = False
    ) -> list[Refusal]: ...
    def url(self, queue: str) -> str: ...
    def info(self, queue: str) -> QueueInfo: ...
    def depth(self, queue: str) -> Depth: ...


@dataclasses.dataclass(eq=False, repr=False)
class QueueMessage:
    """A received message, as hooks get it: it works like boto3's ``sqs.Message``.

    Body and attributes are as the service returned them: nothing is checked here.

    :ivar receipt_handle: of this receive; None where no queue has the message
    :ivar queue: the name of its queue
    :ivar broker: what to reach the queue by; None where no queue has the message
    :ivar sns_record: the record, where Lambda received the message from a topic
    :ivar message: the decoded message, once it is valid and its task is registered
    :ivar lease_lost: whether others may have received the message; set by the worker
    :ivar max_receive_count: of the queue's redrive policy, where it is known
    :ivar batch_task: the name of its task, if others of that task may run with it
    :ivar done_level: at which a run that returned is logged
    :ivar lease_s: for which the receive hid it; a worker extends that while it runs
    """

    body: Any
    message_id: str
    receipt_handle: str | None = None
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    message_attributes: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=dict
    )
    queue: str | None = None
    broker: Broker | None = None
    sns_record: Mapping[str, Any] | None = None
    message: Message | None = None
    lease_lost: bool = False
    max_receive_count: int | None = None
    batch_task: str | None = None
    done_level: int = logging.DEBUG
    lease_s: float = _DEFAULT_LEASE_S
    in_lambda: typing.ClassVar[bool] = False  # whether Lambda decides on retries

    @property
    def receive_count(self) -> int:
        """How often the queue has delivered the message, from 1."""
        return int(self.attributes.get("ApproximateReceiveCount", 1))

    @property
    def attempt(self) -> int:
        """How often it has been received, from 1, but for those that postponed it."""
        return self.receive_count + self._count(_ATTEMPTS_ATTRIBUTE)

    @property
    def postponed(self) -> int:
        """How often it has been postponed."""
        return self._count(_POSTPONED_ATTRIBUTE)

    def _count(self, name: str) -> int:
        """Return the number in an attribute; 0 if it has none, whoever wrote it."""
        if name not in self.message_attributes:
            return 0
        text = str(self.message_attributes[name].get("StringValue"))
        return int(text) if re.fullmatch("[0-9]{1,9}", text) else 0

    @property
    def is_last_receive(self) -> bool:
        """Whether its attempts are as many as the queue's redrive policy allows."""
        most = self.max_receive_count
        return most is not None and self.attempt >= most

    @property
    def would_be_redriven(self) -> bool:
        """Whether the queue dead-letters it at the next receive, and a copy helps."""
        most = self.max_receive_count
        if most is None or self.is_fifo:
            return False
        return self.receive_count >= most

    @property
    def queue_url(self) -> str:
        """The URL of the queue; "" where no queue has the message."""
        if self.broker is None or self.queue is None:
            return ""
        return self.broker.url(self.queue)

    @property
    def is_fifo(self) -> bool:
        """Whether the message is from a FIFO queue."""
        return self.queue is not None and _is_fifo(self.queue)

    @property
    def group_id(self) -> str | None:
        """The message group, on FIFO and fair queues."""
        return self.attributes.get("MessageGroupId")

    @property
    def hook_kwargs(self) -> dict[str, Any]:
        """The arguments for hooks."""
        if self.sns_record is not None:
            return {"sns_record": self.sns_record}
        return {"queue_name": self.queue, "sqs_queue_message": self}

    def delete(self) -> None:
        """Delete the message from its queue, at once and with retries.

        For hooks and old code: a worker deletes what it has run, ten in a call.

        :raises PartialFailure: if the service refuses
        """
        if self.broker and self.receipt_handle:
            _insist(self.broker.delete, self.queue, self.receipt_handle)

    def change_visibility(self, *, VisibilityTimeout: float) -> None:  # noqa: N803
        """Make the message visible again so many seconds from now.

        :param VisibilityTimeout: 0 to 43,200 seconds; SQS allows 12 hours in all from
            the receive
        :raises PartialFailure: if the service refuses: the message is no longer in
            flight, for example
        """
        if self.broker and self.receipt_handle:
            change = (self.receipt_handle, VisibilityTimeout)
            _insist(self.broker.change_visibility, self.queue, change)

    def copy(self, attributes: Mapping[str, Mapping[str, Any]]) -> Outgoing:
        """Return the message in the form in which it is sent to another queue.

        A FIFO queue knows the body's id and would drop the copy: its own MessageId
        identifies the copy there.
        """
        deduplication_id = None
        if self.is_fifo:
            deduplication_id = self.message_id
        return Outgoing(self.body, attributes, 0, self.group_id, deduplication_id)


_BatchCall = Callable[[Sequence[Any]], list[Refusal]]


def _accepted(refusals: Sequence[Refusal]) -> None:
    """Raise PartialFailure if a call of one entry was refused."""
    failed = [{"Id": str(r.index), "Code": r.code, "Message": r.text} for r in refusals]
    if failed:
        raise PartialFailure({"Successful": [], "Failed": failed})


def _tries(most: int) -> Iterator[None]:
    """Yield for each try, at most three: at once for the first, then after pauses."""
    yield
    for pause_s in _PAUSES_S[: most - 1]:
        time.sleep(_jittered(pause_s))
        yield


def _insist(
    call: Callable[..., list[Refusal]], queue: str | None, entry: object
) -> None:
    """Delete or change one message; try it again where the service is at fault.

    :raises PartialFailure: if the entry is refused in the end
    """
    refusals: list[Refusal] = []
    for _ in _tries(3):
        refusals = call(queue, [entry], retry=True)
        if all(refusal.final for refusal in refusals):
            break
    _accepted(refusals)


def _one_call(call: _BatchCall, entries: Sequence[Any]) -> dict[int, Refusal]:
    """Make one batch call of at most ten entries; return the refused ones by index.

    A call that fails as a whole refuses each entry, but not finally: even a permission
    may come back.
    """
    try:
        refusals = call(entries)
    except Exception as error:
        return _all_refused(error, range(len(entries)), final=False)
    return {refusal.index: refusal for refusal in refusals}


def _all_refused(
    error: Exception, indexes: Iterable[int], *, final: bool
) -> dict[int, Refusal]:
    """Return a refusal for each entry of a call that failed as a whole."""
    code, text = _error_code(error), _text_of(error)
    return {index: Refusal(index, code, text, final) for index in indexes}


def _in_batches(
    call: _BatchCall,
    entries: Sequence[Any],
    tries: int = 1,
    *,
    max_bytes: int = 0,
    repeated: bool = False,
) -> dict[int, Refusal]:
    """Make batch calls for any number of entries; return the refused ones by index.

    Entries whose refusal is not final are tried again after a pause.

    :param tries: how often an entry is tried in all, at most 3 times
    :param max_bytes: the limit for the sum of a call's entries, where they are messages
    :param repeated: the caller has repeated a call that failed as a whole, as botocore
        does for sends: its entries are not tried again
    """
    refused: dict[int, Refusal] = {}
    remaining: Sequence[int] = range(len(entries))
    for _ in _tries(tries):
        left = [entries[index] for index in remaining]
        answer = _one_round(call, left, max_bytes, repeated=repeated)
        for place, index in enumerate(remaining):
            refused.pop(index, None)
            if place in answer:
                refused[index] = answer[place]._replace(index=index)
        remaining = [i for i, refusal in refused.items() if not refusal.final]
        if not remaining:
            break
    return refused


def _one_round(
    call: _BatchCall, entries: Sequence[Any], max_bytes: int, *, repeated: bool
) -> dict[int, Refusal]:
    """Make a batch call for each ten entries; return the refused ones by index.

    After a call that fails as a whole, the entries that follow are refused untried.
    """
    refused: dict[int, Refusal] = {}
    start = 0
    for part in _parts(entries, max_bytes):
        try:
            refusals = call(part)
        except Exception as error:
            final = repeated or isinstance(error, ConfigurationError)
            rest = range(start, len(entries))
            return refused | _all_refused(error, rest, final=final)
        for refusal in refusals:
            refused[start + refusal.index] = refusal
        start += len(part)
    return refused


def _parts(entries: Sequence[Any], max_bytes: int) -> Iterator[Sequence[Any]]:
    """Yield entries in parts of ten, each together within `max_bytes`.

    An entry that is too large by itself is a part of its own: the service says so.
    """
    part: list[Any] = []
    part_bytes = 0
    for entry in entries:
        entry_bytes = entry.size() if max_bytes else 0
        is_full = len(part) == _MAX_BATCH or part_bytes + entry_bytes > max_bytes
        if part and is_full:
            yield part
            part, part_bytes = [], 0
        part.append(entry)
        part_bytes += entry_bytes
    if part:
        yield part


def _send_all(
    sender: Sender, destination: str, entries: Sequence[Outgoing]
) -> dict[int, Refusal]:
    """Send any number of messages to one destination; return the refused by index.

    On a FIFO queue, what follows a refused message of its group is refused, too.
    """
    send = _in_order(destination, functools.partial(sender.send, destination))
    return _in_batches(send, entries, 3, max_bytes=sender.max_bytes, repeated=True)


def _in_order(destination: str, send: _BatchCall) -> _BatchCall:
    """Return what sends to a destination: group by group in order, if it is FIFO."""
    if _is_fifo(destination):
        return _OrderedSend(send).send
    return send


class _OrderedSend:
    """Sends to a FIFO queue, where no message may overtake an earlier one of its group.

    What follows a refused message is held back until that is tried again. It may be too
    late for that, because the call has accepted one that follows it, or because its
    refusal is final: then its group stops there.
    """

    def __init__(self, send: _BatchCall) -> None:
        self._send = send
        self._to_retry: dict[str | None, Outgoing] = {}  # the first refused, by group
        self._stopped: set[str | None] = set()  # groups of which nothing more is sent

    def send(self, entries: Sequence[Outgoing]) -> list[Refusal]:
        """Make one call for those whose turn it is; return what was not accepted."""
        places = [place for place, entry in enumerate(entries) if self._may_go(entry)]
        refused = self._send_those(entries, places)
        for place, entry in enumerate(entries):
            if place not in places:
                refused[place] = self._hold_back(entry)
        return [refusal._replace(index=place) for place, refusal in refused.items()]

    def _send_those(
        self, entries: Sequence[Outgoing], places: Sequence[int]
    ) -> dict[int, Refusal]:
        """Send the entries at these places; return the refused ones by their place."""
        if not places:
            return {}
        refusals = self._send([entries[place] for place in places])
        refused = {places[refusal.index]: refusal for refusal in refusals}
        last = {entries[p].group_id: p for p in places if p not in refused}  # accepted
        for place, refusal in sorted(refused.items()):
            is_late = last.get(entries[place].group_id, -1) > place
            refused[place] = self._refuse(entries[place], refusal, is_late=is_late)
        return refused

    def _may_go(self, entry: Outgoing) -> bool:
        """Return whether no earlier message of the group waits or has failed."""
        group = entry.group_id
        if self._to_retry.get(group) is entry:
            del self._to_retry[group]
            return True
        return group not in self._to_retry and group not in self._stopped

    def _refuse(self, entry: Outgoing, refusal: Refusal, *, is_late: bool) -> Refusal:
        """Note a refusal; return it, final where a later one would break the order."""
        group = entry.group_id
        if is_late or refusal.final or group in self._stopped:
            self._stopped.add(group)
            return refusal._replace(final=True)
        self._to_retry.setdefault(group, entry)
        return refusal

    def _hold_back(self, entry: Outgoing) -> Refusal:
        """Return the refusal of a message that was not sent."""
        is_final = entry.group_id in self._stopped
        text = "an earlier message of its group was refused"
        return Refusal(0, "GroupStopped", text, is_final)


def _change_all(call: str, entries: Mapping[QueueMessage, Any], warning: str) -> None:
    """Delete or change those of one queue's messages that a queue has.

    A refusal is a warning only: the role of a Lambda function may not be allowed to.

    :param call: the name of the broker's method
    :param entries: what the method takes of each message
    :param warning: logged with how many of how many were refused, and why
    """
    queued = [(message, entry) for message, entry in entries.items() if message.broker]
    if not queued:
        return
    first, _ = queued[0]
    change = functools.partial(getattr(first.broker, call), first.queue)
    refused = _in_batches(change, [entry for _, entry in queued], 3)
    if refused:
        reason = next(iter(refused.values())).text
        _log.warning(warning, len(refused), len(queued), reason)


# --- 8. SQLite ------------------------------------------------------------------------
# The embedded broker, with the semantics of SQS, for any number of processes on one
# machine. Every change is ONE statement, its triggers included, and so one transaction:
# it is on the disk when the call returns, and neither a crash nor a signal handler
# comes between its halves. visible_ms says when a message is visible: delay, visibility
# timeout and retry in one. A receipt is good for a delete until the message is received
# again or dead-lettered; for a change, only while the message is hidden too.


# A visible message has a place in the line, which is a number below 0: a clock that is
# set back hides nothing. It joins the line behind all in the first place and, if it has
# a group, behind the last of that: a tenant that has sent 10,000 messages has one in
# each place, and no other waits for them.
_LINE_START = -(10**15) // 2  # earlier versions put times below it: those come first
# The message waits in a FIFO queue until the one before it in its group has left that.
_BEHIND = 2**62
_JOIN = 0  # whatever is set to this joins the line; no clock has this time any more
_SECOND_PLACE = f"""1 + max({_LINE_START}, coalesce((SELECT min(visible_ms)
    FROM message WHERE queue = {{}} AND visible_ms < 0),
    {_LINE_START}))"""  # noqa: S608
_JOIN_LINE = f"""UPDATE message SET visible_ms = CASE
    WHEN queue GLOB '*{_FIFO}' AND queue NOT GLOB '*-DLQ{_FIFO}' AND EXISTS (
        SELECT 1 FROM message WHERE queue = new.queue AND group_id = new.group_id
        AND visible_ms < {_BEHIND} AND id <> new.id) THEN {_BEHIND}
    ELSE max({_SECOND_PLACE.format("new.queue")}, 1 + coalesce(
        (SELECT max(visible_ms) FROM message WHERE queue = new.queue
            AND group_id = new.group_id AND visible_ms < 0), {_LINE_START}))
    END WHERE id = new.id"""  # noqa: S608 - no value is in it
_NEXT_OF_GROUP = f"""UPDATE message SET visible_ms = {_JOIN} WHERE id = (
    SELECT id FROM message WHERE queue = old.queue AND group_id = old.group_id
    AND visible_ms = {_BEHIND} ORDER BY id LIMIT 1)"""  # noqa: S608
# Triggers are a part of the one statement that meets them, whoever makes it.
_SQLITE_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS message (
    id INTEGER PRIMARY KEY AUTOINCREMENT, -- a receipt names it: it is never used again
    queue TEXT NOT NULL, message_id TEXT NOT NULL, body TEXT NOT NULL,
    attributes TEXT NOT NULL, sent_ms INTEGER NOT NULL, visible_ms INTEGER NOT NULL,
    receive_count INTEGER NOT NULL DEFAULT 0, receipt TEXT)""",
    "ALTER TABLE message ADD COLUMN group_id TEXT",  # which the first files lack
    "ALTER TABLE message ADD COLUMN first_ms INTEGER",  # of the first receive
    "CREATE INDEX IF NOT EXISTS message_visible ON message (queue, visible_ms)",
    """CREATE INDEX IF NOT EXISTS message_group ON message
    (queue, group_id, visible_ms) WHERE group_id IS NOT NULL""",
    f"""CREATE TRIGGER IF NOT EXISTS message_sent AFTER INSERT ON message
    WHEN new.visible_ms = {_JOIN} BEGIN {_JOIN_LINE}; END""",
    f"""CREATE TRIGGER IF NOT EXISTS message_shown AFTER UPDATE OF visible_ms ON message
    WHEN new.visible_ms = {_JOIN} BEGIN {_JOIN_LINE}; END""",
    f"""CREATE TRIGGER IF NOT EXISTS message_deleted AFTER DELETE ON message
    WHEN old.queue GLOB '*{_FIFO}' BEGIN {_NEXT_OF_GROUP}; END""",
    f"""CREATE TRIGGER IF NOT EXISTS message_moved AFTER UPDATE OF queue ON message
    WHEN old.queue GLOB '*{_FIFO}' BEGIN {_NEXT_OF_GROUP}; END""",
    "PRAGMA user_version = 1",
)
_more_tables: list[str] = []  # statements that make what later parts keep in a file
_SQLITE_EXAMPLE = (
    "sqlite:///relative.db or sqlite:////absolute.db, then perhaps"
    " ?visibility_timeout_s=30&max_receive_count=5"
)
# The options of the URL: the default, the form, and what an error calls it.
_SQLITE_OPTIONS = {
    "visibility_timeout_s": ("30", r"[0-9]*\.?[0-9]+", "a number of seconds above 0"),
    "max_receive_count": ("5", "[0-9]+", "a whole number above 0"),
}
_LOCKED_S = 30  # how long to wait for a file that another process has locked
_FIRST_LOOK_S = 0.002  # the pause between looks for a message grows from this…
_LAST_LOOK_S = 0.05  # …to this: twenty looks a second cost next to no CPU


def _is_in_memory(url: str) -> bool:
    """Return whether a URL is of a queue in the memory of one process."""
    return re.match(r"sqlite://(\?|$)", url) is not None


def _parse_sqlite_url(url: str) -> tuple[str, float, int]:
    """Return the path (empty for memory), the lease in seconds, the receives allowed.

    A URL is, for example, sqlite:///queue.db?max_receive_count=3.
    """
    match = re.fullmatch(r"sqlite://(?:/([^?\n]+))?(?:\?(.*))?", url)
    if match is None:
        raise ConfigurationError(
            f"TASKHAWK_BROKER: expected {_SQLITE_EXAMPLE}, got {url!r}"
        )
    path, query = match.groups("")
    options = {name: default for name, (default, *_) in _SQLITE_OPTIONS.items()}
    for pair in filter(None, query.split("&")):
        name, _, value = pair.partition("=")
        _check_sqlite_option(name, value, url)
        options[name] = value
    if path:
        path = os.path.abspath(path)  # a task may change the directory
    lease_s = float(options["visibility_timeout_s"])
    return path, lease_s, int(options["max_receive_count"])


def _check_sqlite_option(name: str, value: str, url: str) -> None:
    """Raise ConfigurationError unless the URL's option exists and has a legal value."""
    if name not in _SQLITE_OPTIONS:
        raise ConfigurationError(
            f"TASKHAWK_BROKER: {name!r} is not an option:"
            f" expected {_SQLITE_EXAMPLE}, got {url!r}"
        )
    _, form, meaning = _SQLITE_OPTIONS[name]
    if not re.fullmatch(form, value) or float(value) == 0:
        raise ConfigurationError(
            f"TASKHAWK_BROKER: {name}: expected {meaning}, got {value!r} in {url!r}"
        )


class _SqliteFile:
    """A process's connection to a file or to its own memory, for all its threads.

    :cvar memory_pid: the first process that had a queue in memory
    """

    memory_pid: typing.ClassVar[int | None] = None

    def __init__(self, path: str) -> None:
        self.path, self.pid = path, os.getpid()
        # Held for each statement, and over a fork, which must find no file open.
        # Reentrant: a signal handler or a __del__ may dispatch while its thread has it.
        self.lock = threading.RLock()
        self._db: Any = None
        self._inode: tuple[int, int] | None = None
        if not path:
            self._take_memory()
        _sqlite_files.add(weakref.ref(self, _sqlite_files.discard))

    def _take_memory(self) -> None:
        """Refuse a queue in memory to all processes but the first that had one."""
        if _SqliteFile.memory_pid is None:
            _SqliteFile.memory_pid = self.pid
        if _SqliteFile.memory_pid != self.pid:
            raise ConfigurationError(
                "sqlite:// is the memory of one process, and this is another:"
                " use a file, such as sqlite:///queue.db"
            )

    def __del__(self) -> None:
        """Close what a worker opened after configure() had replaced its broker."""
        if self.pid == os.getpid():  # closing a parent's would disturb the parent
            self.close()

    def read(self, query: str, parameters: Sequence[Any]) -> list[Any]:
        """Return the rows that a SELECT finds."""
        with self.lock:
            return list(self._connection().execute(query, parameters))

    def change(self, statement: str, parameters: Sequence[Any]) -> int:
        """Make a change, which is on the disk then; return how many rows it met."""
        with self.lock:
            return int(self._connection().execute(statement, parameters).rowcount)

    def open(self) -> None:
        """Open the file that has the path now, unless it is open."""
        with self.lock:
            if self._db is not None and self._find_inode() != self._inode:
                # What is written to a file without a name is lost.
                _log.warning("%s was removed or replaced: opening it anew", self.path)
                self.close()
            self._connection()

    def close(self) -> None:
        """Close the file until the next use; what is in memory is gone."""
        with self.lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def _connection(self) -> Any:
        """Return the connection, opened where there is none; for who holds the lock."""
        if self._db is None:
            self._db = _open_sqlite(self.path)
            self._inode = self._find_inode()
        return self._db

    def _find_inode(self) -> tuple[int, int] | None:
        """Return which file has the path now; None where there is none."""
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino


# Those of this process are closed over a fork that Python sees: SQLite's locks are the
# process's, and a child with an open file would believe that it has its parent's.
_sqlite_files: set[weakref.ref[_SqliteFile]] = set()
_held_over_fork: list[_SqliteFile] = []


def _close_sqlite_files() -> None:
    """Close the files before a fork, and let nobody open them until it is done."""
    for reference in list(_sqlite_files):
        file = reference()
        if file is not None and file.pid == os.getpid():
            file.lock.acquire()
            _held_over_fork.append(file)
            if file.path:  # what is in memory would be gone
                file.close()


def _release_sqlite_files() -> None:
    """Go on in the parent."""
    while _held_over_fork:
        _held_over_fork.pop().lock.release()


# For good, once this module is imported. The child has no use for its parent's locks.
os.register_at_fork(
    before=_close_sqlite_files,
    after_in_parent=_release_sqlite_files,
    after_in_child=_held_over_fork.clear,
)


def _open_sqlite(path: str) -> Any:
    """Open a file, or memory where the path is empty; make the table it lacks."""
    import sqlite3

    if sqlite3.sqlite_version_info < (3, 30):  # the first with count(*) FILTER
        raise ConfigurationError(
            f"SQLite {sqlite3.sqlite_version} is too old: expected 3.30.0 or newer"
        )
    db = None
    try:
        db = sqlite3.connect(
            path or ":memory:",
            timeout=_LOCKED_S,
            isolation_level=None,  # each statement commits
            check_same_thread=False,
        )
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, 1):
            raise sqlite3.OperationalError(
                f"expected version 1 of its tables, got {version}"
            )
        _use_write_ahead_log(db)
        db.execute("PRAGMA synchronous = FULL")  # a commit outlives a power failure
        _make_tables(db)
    except sqlite3.Error as error:
        if db is not None:
            db.close()
        where = path or "memory"
        raise ConfigurationError(
            f"TASKHAWK_BROKER: can't open {where}: {error}"
        ) from error
    return db


def _make_tables(db: Any) -> None:
    """Make what the file lacks, in one transaction: processes may open it together."""
    db.execute("BEGIN IMMEDIATE")
    columns = [name for _, name, *_ in db.execute("PRAGMA table_info(message)")]
    for statement in (*_SQLITE_SCHEMA, *_more_tables):
        added = re.match(r"ALTER TABLE message ADD COLUMN (\w+)", statement)
        if added is None or added[1] not in columns:
            db.execute(statement)
    db.execute("COMMIT")


def _use_write_ahead_log(db: Any) -> None:
    """Let readers wait for nobody.

    Alone of all statements, this one does not wait for a locked file by itself.
    """
    import sqlite3

    deadline = time.monotonic() + _LOCKED_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            is_locked = error.sqlite_errorname == "SQLITE_BUSY"
            if not is_locked or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


class SqliteBroker(Broker):
    """Queues in a file; or in memory, for the tests of one process.

    Any number of processes on one machine may use a file: they share memory, which they
    can't over a network's file system (https://www.sqlite.org/wal.html).

    :param url: ``sqlite:///relative.db``, ``sqlite:////absolute.db`` or ``sqlite://``
        (memory), and perhaps ``?visibility_timeout_s=30&max_receive_count=5``
    :param clock: epoch seconds; passed in by tests
    :raises ConfigurationError: if the URL or the file is not usable
    """

    max_bytes = _MAX_SQS_BYTES  # as on SQS, so that what works here works there
    max_delay_s = 100 * 365 * 86_400  # a number that SQLite can hold
    shared_calls = 1  # the file takes one at a time

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        self._url, self._clock = url, clock
        path, self._lease_s, self._max_receives = _parse_sqlite_url(url)
        self._files = _PerProcess(functools.partial(_SqliteFile, path))
        self._file.open()

    @property
    def _file(self) -> _SqliteFile:
        return self._files.get()

    def url(self, queue: str) -> str:
        """Return the broker's URL: a queue has none of its own."""
        return self._url

    def close(self) -> None:
        """Close the file until the next use; what is in memory is gone."""
        self._file.close()

    def _in_ms(self, seconds: float = 0) -> int:
        """Return the time so many seconds from now, as the table has it."""
        return math.ceil((self._clock() + seconds) * 1000)

    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        """Write the messages in one transaction: all, or none if it raises."""
        now_ms = self._in_ms()
        rows: list[str] = []
        values: list[Any] = []
        for entry in entries:
            visible, value = self._when_visible(destination, entry)
            rows.append(f"(?, ?, ?, ?, ?, ?, {visible})")
            values += (destination, _new_id(), entry.body)
            values += (json.dumps(entry.attributes), now_ms, entry.group_id, value)
        insert = """INSERT INTO message (queue, message_id, body, attributes, sent_ms,
            group_id, visible_ms) VALUES"""
        file = self._file
        file.open()
        file.change(f"{insert} {', '.join(rows)}", values)
        return []

    def _when_visible(self, queue: str, entry: Outgoing) -> tuple[str, object]:
        """Return SQL that says when a new message is visible, and the value in it."""
        if entry.delay_s:
            return "?", self._in_ms(entry.delay_s)
        if entry.group_id is not None:
            return "?", _JOIN
        # Without the trigger, which costs a second change of the row.
        return _SECOND_PLACE.format("?"), queue

    def receive(
        self,
        queue: str,
        most: int,
        wait_s: float,
        lease_s: float | None,
        stop: threading.Event,
    ) -> list[QueueMessage]:
        """Claim messages; wait for the first without holding a lock.

        The first look comes at once, the others after pauses that grow to 50 ms: an
        idle worker takes next to no CPU.
        """
        deadline, pause_s = time.monotonic() + wait_s, _FIRST_LOOK_S
        lease_s = lease_s or self._lease_s
        while True:
            claimed = self._claim(queue, min(most, _MAX_BATCH), lease_s)
            if claimed or time.monotonic() >= deadline or stop.wait(pause_s):
                return claimed
            pause_s = min(pause_s * 2, _LAST_LOOK_S)

    def _claim(self, queue: str, most: int, lease_s: float) -> list[QueueMessage]:
        """Take the messages that have been visible longest, if there are any."""
        file, now_ms = self._file, self._in_ms()
        file.open()
        look = "SELECT max(visible_ms) FROM message WHERE queue = ? AND visible_ms <= ?"
        [[newest_ms]] = file.read(look, (queue, now_ms))
        if newest_ms is None:
            return []
        if newest_ms > 0:
            self._show(queue, now_ms)
        # The claim is this one statement; then its token tells what is ours.
        until_ms, token = self._in_ms(lease_s), os.urandom(16).hex()
        claim = """UPDATE message SET receipt = id || '-' || ?, visible_ms = ?,
            receive_count = receive_count + 1, first_ms = coalesce(first_ms, ?)
            WHERE id IN (SELECT id FROM message
            WHERE queue = ? AND visible_ms < 0 ORDER BY visible_ms, id LIMIT ?)"""
        file.change(claim, (token, until_ms, now_ms, queue, most))
        find = """SELECT receipt, receive_count, sent_ms, attributes, body, message_id,
            group_id, first_ms FROM message
            WHERE queue = ? AND visible_ms = ? AND receipt = id || '-' || ?
            ORDER BY id"""
        rows = file.read(find, (queue, until_ms, token))
        max_receives = self.info(queue).max_receive_count
        return [_to_message(self, queue, row, max_receives) for row in rows]

    def _show(self, queue: str, now_ms: int) -> None:
        """Show for good the messages whose delay or visibility timeout has ended.

        Those that were received too often go to the dead-letter queue instead. As on
        SQS, it is a receive that moves them, and they keep their ids and attributes.
        """
        _, dead_letter_queue, most = self.info(queue)
        redrive = """UPDATE message SET queue = ?, receive_count = 0, receipt = NULL,
            visible_ms = ? WHERE queue = ?
            AND visible_ms BETWEEN 0 AND ? AND receive_count >= ?"""
        values = (dead_letter_queue, _JOIN, queue, now_ms, most)
        self._file.change(redrive, values)  # nothing, where the last is NULL
        show = """UPDATE message SET visible_ms = ?
            WHERE queue = ? AND visible_ms BETWEEN 0 AND ?"""
        self._file.change(show, (_JOIN, queue, now_ms))

    def delete(
        self, queue: str, receipts: Sequence[str], *, retry: bool = False
    ) -> list[Refusal]:
        """Delete; it is an error only if a message was received again since."""
        marks, rows = _marks("?", receipts), _rows(receipts)
        delete = "DELETE FROM message WHERE"
        where = f"id IN ({marks}) AND receipt IN ({marks})"
        if self._file.change(f"{delete} {where}", (*rows, *receipts)) == len(receipts):
            return []
        find = "SELECT CAST(id AS TEXT) FROM message WHERE"
        kept = {row for (row,) in self._file.read(f"{find} id IN ({marks})", rows)}
        return _stale(row in kept for row in rows)

    def change_visibility(
        self, queue: str, changes: Sequence[tuple[str, float]], *, retry: bool = False
    ) -> list[Refusal]:
        """Change when messages are visible again, while they are in flight."""
        receipts = [receipt for receipt, _ in changes]
        marks, rows = _marks("?", receipts), _rows(receipts)
        wanted = [(receipt, self._in_ms(seconds)) for receipt, seconds in changes]
        pairs = [value for pair in wanted for value in pair]
        change = "UPDATE message SET visible_ms = CASE receipt"
        cases = " ".join(["WHEN ? THEN ?"] * len(changes))
        where = f"visible_ms > ? AND id IN ({marks}) AND receipt IN ({marks})"
        values = (*pairs, self._in_ms(), *rows, *receipts)
        statement = f"{change} {cases} END WHERE {where}"
        if self._file.change(statement, values) == len(changes):
            return []
        find = "SELECT receipt, visible_ms FROM message WHERE"
        changed = set(self._file.read(f"{find} id IN ({marks})", rows))
        return _stale(each not in changed for each in wanted)

    def info(self, queue: str) -> QueueInfo:
        """Return what the URL says; a dead-letter queue has none itself."""
        if _is_dead_letter_queue(queue):
            return QueueInfo(self._lease_s, None, None)
        return QueueInfo(self._lease_s, _dead_letter_name(queue), self._max_receives)

    def depth(self, queue: str) -> Depth:
        """Count exactly, unlike SQS."""
        self._file.open()
        now_ms = self._in_ms()
        # One statement, and so one moment: each message is counted once. As on SQS, one
        # that waits for its group is counted as visible.
        count = """SELECT count(*) FILTER (WHERE visible_ms <= ? OR visible_ms = ?),
            count(*) FILTER (WHERE visible_ms > ? AND receipt IS NOT NULL),
            count(*) FILTER (WHERE visible_ms > ? AND visible_ms < ?
                AND receipt IS NULL)
            FROM message WHERE queue = ?"""
        values = (now_ms, _BEHIND, now_ms, now_ms, _BEHIND, queue)
        [counts] = self._file.read(count, values)
        return Depth(*counts)


def _to_message(
    broker: SqliteBroker, queue: str, row: Sequence[Any], max_receives: int | None
) -> QueueMessage:
    """Return a message that was just received."""
    receipt, receive_count, sent_ms, attributes, body, message_id, *more = row
    group, first_ms = more
    system_attributes = {
        "ApproximateReceiveCount": str(receive_count),
        "SentTimestamp": str(sent_ms),
        "ApproximateFirstReceiveTimestamp": str(first_ms),
    }
    if group is not None:
        system_attributes["MessageGroupId"] = group
    return QueueMessage(
        body=body,
        message_id=message_id,
        receipt_handle=receipt,
        attributes=system_attributes,
        message_attributes=json.loads(attributes),
        queue=queue,
        broker=broker,
        max_receive_count=max_receives,
    )


def _marks(mark: str, values: Sequence[object]) -> str:
    """Return a placeholder for each value."""
    return ", ".join([mark] * len(values))


def _rows(receipts: Sequence[str]) -> list[str]:
    """Return the ids of the rows that receipts are of, with which they begin."""
    return [receipt.partition("-")[0] for receipt in receipts]


def _stale(refused: Iterable[bool]) -> list[Refusal]:
    """Return a refusal for each receipt that is refused."""
    text = "the message is no longer in flight, or was received again"
    refusal = Refusal(0, "ReceiptHandleIsInvalid", text, final=True)
    return [refusal._replace(index=i) for i, stale in enumerate(refused) if stale]


_schemes["sqlite"] = SqliteBroker


# --- 9. SQS and SNS -------------------------------------------------------------------
# Every AWS call of the core, and all that it knows of botocore's errors. botocore does
# credentials, signing, endpoints and, for sends, the retries. The number of attempts is
# always set: if botocore repeated a receive, the messages of a lost answer would be
# stranded until their visibility timeout.


# What a person can do about an error, by a pattern for the beginning of its code and
# text; the first one holds. Services, and the protocols that they speak, have more than
# one code for the same error.
_ACCESS_DENIED = "(AccessDenied|AuthorizationError)"
_REMEDIES = (
    (
        rf"KMS\.?AccessDenied|{_ACCESS_DENIED}.* kms:",
        (
            "access denied: the policies of these credentials and of the KMS key must"
            " allow kms:GenerateDataKey and kms:Decrypt"
        ),
    ),
    (
        r"KMS\.?(Disabled|InvalidState|InvalidKeyUsage|NotFound|OptInRequired)",
        "the KMS key can't be used: enable it, or encrypt with another one",
    ),
    (
        f"{_ACCESS_DENIED}.* VPC endpoint policy",
        "access denied: the policy of the VPC endpoint does not allow {operation}",
    ),
    (
        f"{_ACCESS_DENIED}.* (service|resource) control policy",
        "access denied: a policy of the AWS organization does not allow {operation}",
    ),
    (
        _ACCESS_DENIED,
        (
            "access denied: the IAM policy of these credentials does not allow"
            " {operation}"
        ),
    ),
    (
        "NonExistentQueue|QueueDoesNotExist",
        (
            "there is no such queue here: make it, or check TASKHAWK_QUEUE,"
            " AWS_REGION and the account"
        ),
    ),
    (
        "NotFound",
        ("there is no such topic: make it, or check TASKHAWK_QUEUE and AWS_ACCOUNT_ID"),
    ),
    (
        "ResourceNotFoundException: (Requested|Cannot|Table)",
        (
            "there is no such table: run python -m taskhawk provision, or check"
            " TASKHAWK_CLAIMS_TABLE and AWS_REGION"
        ),
    ),
    (
        "ResourceNotFoundException: Schedule group",
        "there is no such group of schedules: run python -m taskhawk provision",
    ),
    (
        "ValidationException: The execution role",
        "EventBridge Scheduler can't use this role: check TASKHAWK_SCHEDULER_ROLE",
    ),
    (
        ".*Invalid header value",
        (
            "a credential has a line break or another control character: check"
            " AWS_SESSION_TOKEN and where else credentials come from"
        ),
    ),
    (
        ".*(Signature expired|Signature not yet current|TooSkewed)",
        "the clock of this machine is off: set it",
    ),
    (
        "SignatureDoesNotMatch|InvalidSignature",
        (
            "AWS refuses these credentials: check AWS_SECRET_KEY, or"
            " AWS_SECRET_ACCESS_KEY and the profile"
        ),
    ),
    (
        "InvalidClientTokenId|UnrecognizedClient|InvalidAccessKeyId|InvalidSecurity",
        (
            "AWS does not know these credentials: check AWS_ACCESS_KEY, or"
            " AWS_ACCESS_KEY_ID and the profile"
        ),
    ),
    (
        "(No|Partial)CredentialsError",
        (
            "no AWS credentials: set AWS_ACCESS_KEY and AWS_SECRET_KEY, or give"
            " botocore a profile or role; to try things out without AWS, set"
            " TASKHAWK_BROKER to sqlite:///queue.db"
        ),
    ),
    (
        "ProfileNotFound",
        "there is no such profile: check AWS_PROFILE and ~/.aws/config",
    ),
    (
        "SSOTokenLoadError|UnauthorizedSSOTokenError|TokenRetrievalError",
        "nobody is logged in: run aws sso login",
    ),
    (
        "Login",
        "nobody is logged in: run aws login",
    ),
    (
        "CredentialRetrievalError.* custom-process|JSONDecodeError",
        "the credential_process of the profile failed: check ~/.aws/config",
    ),
    (
        "FileNotFoundError|PermissionError",
        (
            "a file that the credentials need can't be read: check"
            " AWS_WEB_IDENTITY_TOKEN_FILE and ~/.aws/config"
        ),
    ),
    (
        (
            "InvalidConfigError|ConfigParseError|InfiniteLoopConfigError"
            "|UnknownCredentialError|MissingDependencyException"
        ),
        "botocore can't use its settings: check ~/.aws/config",
    ),
    (
        "NoRegionError",
        "no AWS region: set AWS_REGION, for example eu-west-1",
    ),
    (
        "InvalidRegionError",
        "this is not the name of a region: set AWS_REGION, for example eu-west-1",
    ),
    (
        "ValueError: Invalid endpoint",
        (
            "an endpoint is a URL, such as http://127.0.0.1:4566: check"
            " AWS_ENDPOINT_SQS and AWS_ENDPOINT_SNS, or AWS_ENDPOINT_URL and the"
            " profile"
        ),
    ),
)
# After these words botocore or AWS shows header values, and so a session token.
_SHOWS_HEADERS = "Invalid header value|The Canonical String"
# Of clients whose credentials can't be used any more: a new one looks for others.
_NO_CREDENTIALS = "NoCredentialsError|ExpiredToken.*|RequestExpired"
# What the answer to a batch call has not named counts as this failure.
_UNANSWERED = {
    "Code": "Unanswered",
    "Message": "the answer does not name this entry",
}


def _error_code(error: BaseException) -> str:
    """Return an AWS error's code, or else the type of the error.

    Where we turned an AWS error into one of ours, the AWS error is its cause.
    """
    origin = error.__cause__ or error
    code = _error_details(origin).get("Code") or type(origin).__name__
    # The older of SQS's protocols puts a prefix before some of its codes.
    return str(code).removeprefix("AWS.SimpleQueueService.")


def _is_denial(code: str) -> bool:
    """Return whether a code says that the caller may not make a call."""
    return re.match(_ACCESS_DENIED, code) is not None


def _error_details(error: BaseException) -> Mapping[str, Any]:
    """Return code and message of an error that AWS has answered."""
    response = getattr(error, "response", None) or {}
    return typing.cast("Mapping[str, Any]", response.get("Error", {}))


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn the errors that only a person can fix into a sentence that says how.

    :param where: the queue or topic, with which the sentence begins
    :raises MessageTooLarge: where the service names a limit that is lower than ours
    :raises ConfigurationError: for what has a remedy; all else goes on as it is
    """
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        known = re.search(r"shorter than (\d+) bytes", str(error))
        if known is not None:
            text = f"{where} takes messages of at most {known[1]} bytes"
            raise MessageTooLarge(text, int(known[1])) from error
        explanation = _explanation(error)
        if explanation is None:
            raise
        cause = None if re.search(_SHOWS_HEADERS, str(error)) else error
        raise ConfigurationError(f"{where}: {explanation}") from cause


def _explanation(error: Exception) -> str | None:
    """Return what a person can do about an error, then AWS's or botocore's own text.

    None is for an error that may pass by itself.
    """
    message = str(_error_details(error).get("Message", error))
    message = re.sub(f"({_SHOWS_HEADERS}).*", r"\1…", message, flags=re.DOTALL)
    # In one line, whatever the service says.
    text = " ".join(f"{_error_code(error)}: {message}".split()).removesuffix(":")
    remedy = _find_remedy(text)
    if remedy is None:
        return None
    # IAM has no actions of their own for batches.
    operation = getattr(error, "operation_name", "").removesuffix("Batch")
    return f"{remedy.format(operation=operation)} ({text})"


def _find_remedy(text: str) -> str | None:
    """Return the remedy for an error with this code and text, if it has one."""
    for pattern, remedy in _REMEDIES:
        if re.match(pattern, text, re.IGNORECASE):
            return remedy
    host = re.match(r"EndpointConnectionError.*//s[nq]s\.([^.]+)\.amazonaws\.", text)
    if host is None or _is_region(host[1]):
        return None
    return f"{host[1]} is not a region: set AWS_REGION, for example eu-west-1"


def _is_region(name: str) -> bool:
    """Return whether botocore knows a region of this name."""
    with _brokers.lock:
        session = _brokers.aws_session()
    partitions = session.get_available_partitions()
    return any(name in session.get_available_regions("sqs", p) for p in partitions)


def _make_aws_session() -> Any:
    """Make botocore's session, with a quicker list of the services that it knows."""
    from botocore.session import get_session

    session = get_session()
    loader = session.get_component("data_loader")
    # botocore looks into 400 folders for this: 8 ms before the first dispatch.
    loader.list_available_services = lambda _type: os.listdir(loader.BUILTIN_DATA_PATH)
    return session


class _AwsConnections:
    """The clients of one process, by role; and a lock to look up something once."""

    def __init__(self) -> None:
        self.clients: dict[str, Any] = {}
        # Held while a queue's URL is looked up, so that threads do not all look it up.
        # Reentrant: a signal handler or a __del__ may dispatch while its thread has it.
        self.lock = threading.RLock()


class _AwsService:
    """What all services of AWS share: clients, and errors.

    :ivar service: botocore's name of the service
    :ivar target_key: its parameter for the queue, topic or table
    """

    service = target_key = ""

    def __init__(self, _url: str = "") -> None:
        self._connections = _PerProcess(_AwsConnections)

    def client(self, role: str) -> Any:
        """Return the client for a role; roles differ in timeouts and retries.

        "send" is for publishers and for people: botocore makes three attempts. "poll"
        outlasts a long poll, and "keep" must be back before a lease ends: both make one
        attempt, for the worker tries again by itself.
        """
        clients = self._connections.get().clients
        return _made_once(clients, role, _brokers.lock, self._make_client)

    def _make_client(self, role: str) -> Any:
        """Make a client; botocore finds what credentials and region settings lack."""
        from botocore.config import Config

        attempts, read_timeout_s = 1, settings.AWS_READ_TIMEOUT_S
        if role == "send":
            attempts = 3
        if role == "poll":
            read_timeout_s += _LONG_POLL_S
        config = Config(
            connect_timeout=settings.AWS_CONNECT_TIMEOUT_S,
            read_timeout=read_timeout_s,
            max_pool_connections=50,  # one for each dispatching thread, or they queue
            # botocore would build its own twice a call; our parameters are right. The
            # next two lines together save 13 % of a dispatch.
            user_agent=f"taskhawk/{VERSION}",
            parameter_validation=False,
            retries={"mode": "standard", "total_max_attempts": attempts},
        )
        return _brokers.aws_session().create_client(
            self.service,
            region_name=settings.AWS_REGION,
            endpoint_url=getattr(
                settings, f"AWS_ENDPOINT_{self.service.upper()}", None
            ),
            config=config,
            **settings.credentials(),
        )

    def close(self) -> None:
        """Close the clients; the next call makes new ones, with the latest settings."""
        connections = self._connections.get()
        clients, connections.clients = connections.clients, {}
        for client in clients.values():
            client.close()

    def url(self, queue: str, role: str = "send") -> str:
        """Return what the service calls a queue, topic or table."""
        return queue

    def arn(self, name: str) -> str:
        """Return what AWS calls a queue or topic of this account."""
        account = settings.require("AWS_ACCOUNT_ID")
        with self._calling(name):
            meta = self.client("send").meta
        service, region = self.service, meta.region_name
        return f"arn:{meta.partition}:{service}:{region}:{account}:{name}"

    def call(self, role: str, operation: str, where: str, **parameters: Any) -> Any:
        """Make a call for a queue, topic or table, by botocore's name of it."""
        target = {self.target_key: self.url(where, role)}
        with self._calling(where):
            return getattr(self.client(role), operation)(**target, **parameters)

    @contextlib.contextmanager
    def _calling(self, where: str) -> Iterator[None]:
        """Explain errors; drop the clients whose credentials can't be used."""
        try:
            with _explained(where):
                yield
        except Exception as error:
            if re.fullmatch(_NO_CREDENTIALS, _error_code(error)):
                _brokers.forget_aws_session()
                self.close()
            raise


class _AwsSender(_AwsService, Sender):
    """What SQS and SNS share besides: sending, and the answers of batch calls.

    :ivar entries_key: its parameter for the entries of a batch
    :ivar send_one: its operation that sends one message
    :ivar send_many: its operation that sends several
    """

    entries_key = send_one = send_many = ""
    shared_calls = 16  # at 10 ms a call, that is all that one CPU can send

    def _batch(
        self, role: str, operation: str, where: str, entries: Sequence[Any]
    ) -> list[Refusal]:
        """Make a batch call; return what its answer does not say was done.

        A call that succeeds may have done only a part of its batch.
        """
        named = [{"Id": str(index), **entry} for index, entry in enumerate(entries)]
        answer = self.call(role, operation, where, **{self.entries_key: named})
        done = {entry["Id"] for entry in answer.get("Successful", ())}
        failed = {entry["Id"]: entry for entry in answer.get("Failed", ())}
        refusals = []
        for index in range(len(entries)):
            if str(index) not in done:
                failure = failed.get(str(index), _UNANSWERED)
                code, text = failure["Code"], failure.get("Message", "")
                final = bool(failure.get("SenderFault"))
                refusals.append(Refusal(index, code, text, final))
        return refusals

    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        """Send one message by itself, and several in a batch call."""
        calls = [self._parameters(entry) for entry in entries]
        if len(calls) > 1:
            return self._batch("send", self.send_many, destination, calls)
        self.call("send", self.send_one, destination, **calls[0])
        return []

    def _one_by_one(
        self, destination: str, entries: Sequence[Outgoing]
    ) -> list[Refusal]:
        """Send each message by itself; return the refused ones."""
        send = _in_order(destination, functools.partial(self._send_alone, destination))
        refusals: list[Refusal] = []
        for index, entry in enumerate(entries):
            refusals += [each._replace(index=index) for each in send([entry])]
        return refusals

    def _send_alone(
        self, destination: str, entries: Sequence[Outgoing]
    ) -> list[Refusal]:
        """Send one message; any error is its refusal."""
        refused = _one_call(functools.partial(self.send, destination), entries)
        # Final, for botocore has repeated it.
        return [refusal._replace(final=True) for refusal in refused.values()]

    @abc.abstractmethod
    def _parameters(self, entry: Outgoing) -> dict[str, Any]:
        """Return the service's parameters for a message, without the empty ones."""


class SnsSender(_AwsSender):
    """Publishes to the topics that a Lambda app's functions are subscribed to.

    Between SNS and Lambda their own retries and dead-letter queues apply:
    https://docs.aws.amazon.com/sns/latest/dg/sns-message-delivery-retries.html
    """

    service, target_key, entries_key = "sns", "TopicArn", "PublishBatchRequestEntries"
    send_one, send_many = "publish", "publish_batch"
    max_bytes, max_delay_s = _MAX_SNS_BYTES, 0

    def destination(self, priority: Priority) -> str:
        """Return the topic's ARN, put together: a look-up would need a permission."""
        queue = settings.require("TASKHAWK_QUEUE").lower()
        return self.arn(f"taskhawk-{queue}{_SUFFIXES[priority]}")

    def _parameters(self, entry: Outgoing) -> dict[str, Any]:
        """Return the parameters of Publish."""
        parameters: dict[str, Any] = {"Message": entry.body}
        if entry.attributes:
            parameters["MessageAttributes"] = entry.attributes
        if entry.group_id:  # for fair queues that subscribe to the topic
            parameters["MessageGroupId"] = entry.group_id
        return parameters


class SqsBroker(_AwsSender, Broker):
    """Queues on SQS.

    https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/

    URLs, visibility timeouts and redrive policies of queues are looked up once: only a
    new process sees that they were changed.
    """

    service, target_key, entries_key = "sqs", "QueueUrl", "Entries"
    send_one, send_many = "send_message", "send_message_batch"
    max_bytes, max_delay_s = _MAX_SQS_BYTES, _MAX_DELAY_S

    def __init__(self, _url: str = "sqs") -> None:
        super().__init__()
        self._urls: dict[str, str] = {}
        self._infos: dict[str, QueueInfo] = {}
        # Ids of receives of FIFO queues whose answers were lost, by queue.
        self._unanswered: dict[str, list[str]] = {}
        self._of_accounts: dict[str, SqsBroker] = {}

    def url(self, queue: str, role: str = "send") -> str:
        """Look up a queue's URL, once."""
        lock = self._connections.get().lock
        find = functools.partial(self._find_url, role)
        return _made_once(self._urls, queue, lock, find)

    def _find_url(self, role: str, queue: str) -> str:
        """Ask for a queue's URL."""
        with self._calling(queue):
            answer = self.client(role).get_queue_url(QueueName=queue)
        return str(answer["QueueUrl"])

    def at_arn(self, arn: str) -> tuple[SqsBroker, str]:
        """Return the broker and the name of a queue that Lambda receives from.

        Its account may be another one, where the same name is another queue.
        """
        _, _, _, _, account, queue = arn.split(":")
        lock = self._connections.get().lock
        make = functools.partial(_SqsOfAccount, self._connections)
        return _made_once(self._of_accounts, account, lock, make), queue

    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        """Send, in a batch call if the queue takes it as a whole.

        A queue's limit may be set lower than the service's. Then the messages are sent
        one by one, so that only those are refused which are too large themselves.
        """
        try:
            return super().send(destination, entries)
        except Exception as error:
            if len(entries) == 1 or _error_code(error) != "BatchRequestTooLong":
                raise
        return self._one_by_one(destination, entries)

    def _parameters(self, entry: Outgoing) -> dict[str, Any]:
        """Return the parameters of SendMessage; delays are whole seconds."""
        parameters = {
            "MessageBody": entry.body,
            "MessageAttributes": entry.attributes,
            "DelaySeconds": math.ceil(entry.delay_s),
            "MessageGroupId": entry.group_id,
            "MessageDeduplicationId": entry.deduplication_id,
        }
        return {name: value for name, value in parameters.items() if value}

    def receive(
        self,
        queue: str,
        most: int,
        wait_s: float,
        lease_s: float | None,
        stop: threading.Event,
    ) -> list[QueueMessage]:
        """Poll once with ReceiveMessage; wait it out, for its answer may hold messages.

        A long poll asks all of SQS's servers and costs one request in 20 s; a short one
        asks some of them, and may miss messages:
        https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/
        """
        parameters: dict[str, Any] = {
            "MaxNumberOfMessages": min(most, _MAX_BATCH),
            "WaitTimeSeconds": min(math.ceil(wait_s), _LONG_POLL_S),
            # AWS has discontinued AttributeNames, the older parameter for these.
            "MessageSystemAttributeNames": [
                "ApproximateReceiveCount",
                "SentTimestamp",
                "ApproximateFirstReceiveTimestamp",
                "MessageGroupId",
            ],
            "MessageAttributeNames": ["All"],
        }
        if lease_s is not None:
            parameters["VisibilityTimeout"] = math.ceil(lease_s)
        if _is_fifo(queue):
            return self._receive_in_order(queue, parameters)
        return self._receive(queue, parameters)

    def _receive(self, queue: str, parameters: dict[str, Any]) -> list[QueueMessage]:
        """Call ReceiveMessage."""
        answer = self.call("poll", "receive_message", queue, **parameters)
        return [self._message(queue, found) for found in answer.get("Messages", ())]

    def _receive_in_order(
        self, queue: str, parameters: dict[str, Any]
    ) -> list[QueueMessage]:
        """Receive from a FIFO queue; repeat a receive whose answer was lost.

        Its messages are in flight, and hold up their groups until their visibility
        timeout ends. With the id of that receive, SQS returns them again: see
        ReceiveMessage in
        https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/
        """
        unanswered = self._unanswered.setdefault(queue, [])
        try:
            attempt_id = unanswered.pop()  # each is repeated by one thread only
        except IndexError:
            attempt_id = _new_id()
        parameters["ReceiveRequestAttemptId"] = attempt_id
        try:
            return self._receive(queue, parameters)
        except Exception:
            unanswered.append(attempt_id)
            raise

    def _message(self, queue: str, found: Mapping[str, Any]) -> QueueMessage:
        """Return a message of the answer to ReceiveMessage."""
        return QueueMessage(
            body=found["Body"],
            message_id=found["MessageId"],
            receipt_handle=found["ReceiptHandle"],
            attributes=found.get("Attributes", {}),
            message_attributes=found.get("MessageAttributes", {}),
            queue=queue,
            broker=self,
        )

    def delete(
        self, queue: str, receipts: Sequence[str], *, retry: bool = False
    ) -> list[Refusal]:
        """Delete; to a standard queue, a stale receipt handle is no error."""
        entries = [{"ReceiptHandle": receipt} for receipt in receipts]
        return self._batch(_role(retry), "delete_message_batch", queue, entries)

    def change_visibility(
        self, queue: str, changes: Sequence[tuple[str, float]], *, retry: bool = False
    ) -> list[Refusal]:
        """Change the visibility timeouts, in whole seconds."""
        operation = "change_message_visibility_batch"
        entries = [
            {"ReceiptHandle": receipt, "VisibilityTimeout": math.ceil(seconds)}
            for receipt, seconds in changes
        ]
        return self._batch(_role(retry), operation, queue, entries)

    def attributes(self, queue: str, names: Sequence[str]) -> Any:
        """Read attributes of a queue, by their names on SQS."""
        answer = self.call("send", "get_queue_attributes", queue, AttributeNames=names)
        return answer["Attributes"]

    def info(self, queue: str) -> QueueInfo:
        """Read the queue's visibility timeout and redrive policy, once."""
        if queue not in self._infos:
            self._infos[queue] = self._read_info(queue)
        return self._infos[queue]

    def _read_info(self, queue: str) -> QueueInfo:
        """Read the queue's visibility timeout and redrive policy."""
        found = self.attributes(queue, ["VisibilityTimeout", "RedrivePolicy"])
        lease_s = float(found["VisibilityTimeout"])
        policy = json.loads(found.get("RedrivePolicy") or "{}")
        if not policy:
            return QueueInfo(lease_s, None, None)
        dead_letter_queue = policy["deadLetterTargetArn"].rpartition(":")[2]
        # It comes back as it was set, as a number or a string.
        return QueueInfo(lease_s, dead_letter_queue, int(policy["maxReceiveCount"]))

    def depth(self, queue: str) -> Depth:
        """Count by three of the queue's attributes, in one call."""
        names = [
            "ApproximateNumberOfMessages",
            "ApproximateNumberOfMessagesNotVisible",
            "ApproximateNumberOfMessagesDelayed",
        ]
        found = self.attributes(queue, names)
        return Depth(*(int(found[name]) for name in names))


class _SqsOfAccount(SqsBroker):
    """Queues of an account, by the clients of another broker.

    Their URLs are made up: the role of a Lambda function may not look them up.
    """

    def __init__(self, connections: _PerProcess[_AwsConnections], account: str) -> None:
        super().__init__()
        self._connections, self._account = connections, account

    def _find_url(self, role: str, queue: str) -> str:
        with self._calling(queue):
            endpoint = self.client(role).meta.endpoint_url
        return f"{endpoint}/{self._account}/{queue}"


def _role(retry: bool) -> str:  # noqa: FBT001 - it names the client
    """Return the role of the client that deletes and changes messages."""
    return "send" if retry else "keep"


_schemes["sns"], _schemes["sqs"] = SnsSender, SqsBroker


# --- 10. connections ------------------------------------------------------------------
# The one sender and the one broker of a process, and what a fork must not share. What a
# process must not share with the processes that it forks is in a _PerProcess: sockets,
# a SQLite connection, and locks that another thread may have held at the fork.

_T = TypeVar("_T")
_K = TypeVar("_K")

# What a parent had at a fork: the child keeps it unused, for closing it would disturb
# the parent.
_inherited: list[object] = []


class _PerProcess(Generic[_T]):
    """A value that each process makes for itself.

    The process id is compared at each use, for Python does not see every fork: uWSGI's
    is one in C.
    """

    def __init__(self, make: Callable[[], _T]) -> None:
        self._make = make
        self._owned = (os.getpid(), make())

    def get(self) -> _T:
        """Return the value of this process."""
        pid, value = self._owned
        if pid == os.getpid():
            return value
        own = self._make()
        _inherited.append(value)
        self._owned = (os.getpid(), own)
        return own


def _made_once(
    made: dict[_K, _T], key: _K, lock: threading.RLock, make: Callable[[_K], _T]
) -> _T:
    """Return what is made for a key, once, however many threads ask for it first."""
    if key not in made:  # each dispatch comes by here, and reading a dict needs no lock
        with lock:
            if key not in made:
                # A signal handler may have made it meanwhile.
                made.setdefault(key, make(key))
    return made[key]


class _BrokerState:
    """The senders and brokers of one process, by URL, and botocore's session."""

    def __init__(self) -> None:
        # Held while a sender, a client or the session is made, so that there is never a
        # second; while a batch is added to or closed, so that nothing is added to a
        # closed one; and over a fork, so that a child has no half-made one. Reentrant:
        # settings that are read meanwhile may be of a module that calls configure().
        self.lock = threading.RLock()
        self.made: dict[str, Any] = {}
        self.session: Any = None


class _Brokers:
    """The one sender and the one broker of this process, made at their first use."""

    def __init__(self) -> None:
        self._states = _PerProcess(_BrokerState)
        #: what takes the messages instead of a queue; for tests
        self.captured_by: Sender | None = None

    @property
    def lock(self) -> threading.RLock:
        """The lock of this process; _BrokerState says what it guards."""
        return self._states.get().lock

    def sender(self) -> Sender:
        """Return what publishes: sync mode, SNS for a Lambda app, or the broker."""
        if self.captured_by is not None:
            return self.captured_by
        url = settings.TASKHAWK_BROKER
        if settings.TASKHAWK_SYNC:
            url = "sync"
        elif url == "sqs" and settings.IS_LAMBDA_APP:
            url = "sns"
        return typing.cast("Sender", self.get(url))

    def broker(self) -> Broker:
        """Return the broker that TASKHAWK_BROKER names."""
        return typing.cast("Broker", self.get(settings.TASKHAWK_BROKER))

    def get(self, url: str) -> Any:
        """Return the sender or broker of a URL."""
        state = self._states.get()
        return _made_once(state.made, url, state.lock, _make_sender)

    def aws_session(self) -> Any:
        """Return botocore's session, which is slow to make; for who holds the lock."""
        state = self._states.get()
        if state.session is None:
            state.session = _make_aws_session()
        return state.session

    def forget_aws_session(self) -> None:
        """Make the next client look for credentials anew."""
        state = self._states.get()
        with state.lock:
            state.session = None

    def close(self) -> None:
        """Close all connections; the next use opens new ones."""
        state = self._states.get()
        with state.lock:
            made, state.made, state.session = state.made, {}, None
        for sender in made.values():
            sender.close()

    def before_fork(self) -> None:
        """Let no thread make anything during a fork: the child would have a half."""
        self.lock.acquire()

    def after_fork(self) -> None:
        """Go on in the parent."""
        self.lock.release()


def _make_sender(url: str) -> Sender:
    """Make the sender or broker that a URL's scheme stands for."""
    scheme = url.partition(":")[0]
    if scheme not in _schemes:  # a copy of this file may have been cut
        raise ConfigurationError(
            f"{scheme!r} is not in this copy of taskhawk: vendor more of its parts"
        )
    return _schemes[scheme](url)


_brokers = _Brokers()
# For good, once this module is imported: each fork of the process calls them.
os.register_at_fork(before=_brokers.before_fork, after_in_parent=_brokers.after_fork)
settings.on_change.append(_brokers.close)


# === PART III: TASKS ==================================================================

__all__ += [
    "AsyncInvocation",
    "Call",
    "Captured",
    "Metadata",
    "Task",
    "batch",
    "capture",
    "current_task",
    "extend_visibility_timeout",
    "publish",
    "task",
]


# --- 11. tasks ------------------------------------------------------------------------
# A message can only invoke what is in the registry. A name that is taken is never given
# to another function, so no message reaches code that its publisher did not mean. Each
# call is checked against the function's signature where it is dispatched, because its
# caller can correct it and a worker can't.


class Metadata(dict[str, Any]):
    """What a task may know about its run: id, priority, receipt, timestamp, version.

    It is a dict, as in taskhawk 1.4, and its keys are attributes too. These are
    attributes only: `task`, the task's name; `headers`; `queue`, the name of the queue,
    or None; `attempt`, which counts receives from 1; and `lease_lost`, which says that
    the worker could not keep the message hidden, so that another worker may run it now.

    :param message: the message that is run
    :param receipt: its receipt handle, or None where no queue has the message
    """

    def __init__(self, message: Message, receipt: str | None) -> None:
        super().__init__(message.metadata, id=message.id, receipt=receipt)
        self["priority"] = message.priority  # not its name, which is on the wire
        self._received = message.received or QueueMessage(None, message.id)
        self.task = message.task_name
        self.headers = _without_options(message.headers)
        self.attempt = self._received.attempt
        self.queue = self._received.queue if receipt else None

    @property
    def lease_lost(self) -> bool:
        """Whether the worker could not keep the message hidden from other workers."""
        return self._received.lease_lost

    def __getattr__(self, name: str) -> Any:
        """Return a key as an attribute."""
        if name not in self:
            raise AttributeError(f"metadata has no {name!r}")
        return self[name]

    def extend_visibility_timeout(self, visibility_timeout_s: float) -> None:
        """Hide the message from others for so many seconds from now, if a queue has it.

        Useful in Lambda behind SQS only: a worker extends its leases by itself.

        :param visibility_timeout_s: 0 to 43,200 seconds; SQS counts 12 hours from the
            receive
        :raises PartialFailure: if the service refuses, for example because the message
            is no longer in flight
        :raises ConfigurationError: if the function's role may not change the visibility
        """
        self._received.change_visibility(VisibilityTimeout=visibility_timeout_s)


@dataclasses.dataclass(eq=False)
class Call:
    """One message's call of a batch task: ``@task(batch=50)``.

    :ivar args: the positional arguments of its dispatch
    :ivar kwargs: the keyword arguments
    :ivar metadata: of its message; None where a test makes the call
    :ivar headers: of its message
    :ivar error: how it failed by itself, if it did
    """

    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metadata: Metadata | None = None
    headers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: BaseException | None = None

    @classmethod
    def of(cls, message: Message, receipt: str | None) -> Call:
        """Return what a message asks for."""
        metadata = Metadata(message, receipt)
        return cls(message.args, message.kwargs, metadata, dict(metadata.headers))

    def fail(self, error: BaseException) -> None:
        """Have this message end as if the task had raised an error for it alone.

        :param error: a RetryException or an IgnoreException too
        """
        if not isinstance(error, BaseException):
            raise TypeError(f"error: expected an exception, got {error!r}")
        self.error = error


def _without_options(headers: dict[str, Any]) -> dict[str, Any]:
    """Return headers without ours: a task may pass them on, but these are its own."""
    if _OPTIONS_HEADER not in headers:
        return headers
    return {name: headers[name] for name in headers if name != _OPTIONS_HEADER}


class Task(Generic[_P, _R]):
    """A function that can be dispatched; calling it runs the function here and now.

    Made by :func:`task`, which describes its options and registers it; no message can
    reach a task that was made by hand.

    :param fn: the function; a coroutine function is run on an event loop
    :param priority: the priority of its messages, unless an invocation has another
    :param name: what messages call it
    :raises ConfigurationError: if a message can't call the function
    """

    declared_in: str  # the module whose import makes the task, once it is registered
    _place: _Place  # of the function that was decorated: a subclass may wrap it

    def __init__(self, fn: Callable[_P, _R], priority: Priority, name: str) -> None:
        """Read the function's signature; :func:`task` sets the options afterwards."""
        #: the function
        self.fn = fn
        #: the priority of its messages, unless an invocation has another
        self.priority = priority
        #: what messages call the task
        self.name = name
        self._invocation = AsyncInvocation(self)
        self._signature = _signature_of(fn, name)
        self._given_by_worker = _given_by_worker(self._signature)
        #: whether the function is given ``metadata``
        self.accepts_metadata = "metadata" in self._given_by_worker
        #: whether the function is given ``headers``
        self.accepts_headers = "headers" in self._given_by_worker
        # Cached: the signature's bind() takes as long as the rest of a dispatch.
        self._check_call = functools.lru_cache(self._bind)
        #: seconds from a failed run to the next, as a function of the attempt
        self.retry: Callable[[int], float] | None = None
        #: the exceptions after which a run is repeated
        self.retry_on: tuple[type[BaseException], ...] = (BaseException,)
        #: the exceptions that send a message to the dead-letter queue at once
        self.never_retry_on: tuple[type[BaseException], ...] = ()
        #: seconds until a worker kills a run
        self.time_limit: float | None = None
        #: whether a worker runs it in a process of its own
        self.isolate = False
        #: the options that later parts of this file know
        self.options: Mapping[str, Any] = {}
        functools.update_wrapper(self, fn, updated=())
        # What other decorators left on the function may have names that are ours.
        for attribute, value in getattr(fn, "__dict__", {}).items():
            if not hasattr(self, attribute):
                setattr(self, attribute, value)

    @property
    def task(self) -> Task[_P, _R]:
        """The task itself: in taskhawk 1.4, the decorator returned the function."""
        return self

    def __call__(self, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run the function."""
        return self.fn(*args, **kwargs)

    def dispatch(self, /, *args: _P.args, **kwargs: _P.kwargs) -> str:
        """Queue a run of the task and return its id; see AsyncInvocation.dispatch()."""
        return self._invocation.dispatch(*args, **kwargs)

    async def dispatch_async(self, /, *args: _P.args, **kwargs: _P.kwargs) -> str:
        """Queue a run of the task; see :meth:`AsyncInvocation.dispatch_async`."""
        return await self._invocation.dispatch_async(*args, **kwargs)

    def dispatch_many(self, calls: Iterable[Any]) -> int:
        """Queue many runs; see :meth:`AsyncInvocation.dispatch_many`."""
        return self._invocation.dispatch_many(calls)

    def with_headers(self, /, **headers: Any) -> AsyncInvocation[_P]:
        """Return an invocation with these headers."""
        return self._invocation.with_headers(**headers)

    def with_priority(self, priority: Priority) -> AsyncInvocation[_P]:
        """Return an invocation with this priority in place of the task's."""
        return self._invocation.with_priority(priority)

    def with_delay(self, delay: float | timedelta | datetime) -> AsyncInvocation[_P]:
        """Return an invocation whose messages wait this long, or until this time."""
        return self._invocation.with_delay(delay)

    def with_group(self, key: str | int) -> AsyncInvocation[_P]:
        """Return an invocation whose messages are of this group."""
        return self._invocation.with_group(key)

    def with_options(
        self, *, retry: RetryPolicy | None = None, time_limit: float | None = None
    ) -> AsyncInvocation[_P]:
        """Return an invocation with a retry policy or time limit of its own."""
        return self._invocation.with_options(retry=retry, time_limit=time_limit)

    def _bind(self, count: int, *names: str) -> None:
        """Check that the worker can call the function with such arguments.

        :param count: of positional arguments: their values decide nothing
        :param names: of keyword arguments
        :raises TypeError: if that call would fail
        """
        for name in sorted(self._given_by_worker.intersection(names)):
            raise TypeError(
                f"{self.name}: {name!r} is given by the worker: leave it out"
            )
        keywords = dict.fromkeys([*names, *self._given_by_worker])
        try:
            self._signature.bind(*range(count), **keywords)
        except TypeError as error:
            raise TypeError(
                f"{self.name}: {error}{_hint_of_wrapper(self.fn)}"
            ) from None

    def _take_any_arguments(self) -> None:
        """Have messages carry any arguments: the function gets calls, not arguments."""
        try:
            self._signature.bind([])
        except TypeError:
            raise ConfigurationError(
                f"{self.name}: expected a function of one argument, the list of calls"
            ) from None
        self._signature = _signature_of_any()
        self._given_by_worker = frozenset()
        self.accepts_metadata = self.accepts_headers = False

    def call(self, message: Message, receipt: str | None) -> None:
        """Run the function with a message's arguments, and await what can be awaited.

        :param message: the message; what its sender gave as ``metadata`` and
            ``headers`` is replaced
        :param receipt: its receipt handle, or None where no queue has the message
        :raises TypeError: if the function returns a generator, which nothing would read
        """
        if "batch" in self.options:
            call = Call.of(message, receipt)
            self._call_together([call])
            if call.error is not None:
                raise call.error
            return
        metadata = Metadata(message, receipt)
        kwargs = dict(message.kwargs)
        if self.accepts_metadata:
            kwargs["metadata"] = metadata
        if self.accepts_headers:
            kwargs["headers"] = dict(metadata.headers)
        self._run_function(metadata, *message.args, **kwargs)

    def _call_together(self, calls: list[Call]) -> None:
        """Run the function of a batch task once, for several messages."""
        metadata = calls[0].metadata
        if len(calls) > 1:
            metadata = None  # the run is no one message's
        self._run_function(metadata, calls)

    def _run_function(
        self, metadata: Metadata | None, /, *args: Any, **kwargs: Any
    ) -> None:
        """Run the function, and await what can be awaited."""
        fn: Callable[..., Any] = self.fn
        # Threads and coroutines that copy the context know the task, too.
        token = _current.set(metadata)
        try:
            with _InOneProcess():
                result: Any = fn(*args, **kwargs)
            if result is None:
                return  # most return nothing, and need no look at what it is
            if inspect.isawaitable(result):
                _run_coroutine(_awaited(result, self.name))
            else:
                _refuse_generator(result, self.name)
        finally:
            _current.reset(token)

    @classmethod
    def find_by_name(cls, name: str) -> Task[Any, Any]:
        """Return the task of that name; raise :exc:`TaskNotFound` if there is none."""
        return _find_task(name)

    def __reduce__(self) -> str:
        """Be pickled as the function would be: by its name in its module."""
        return str(getattr(self, "__qualname__", self.name))

    def __str__(self) -> str:
        return f"Taskhawk task: {self.name}"

    __repr__ = __str__


class _InOneProcess:
    """Ends a process that a task forks in this block and that comes back from it.

    The run is its parent's, with the post hook and what surrounds it. In sync mode, the
    process goes on as it would after a plain call.
    """

    def __enter__(self) -> None:
        self._process_id = os.getpid()

    def __exit__(self, *_: object) -> None:
        if os.getpid() != self._process_id and not settings.TASKHAWK_SYNC:
            os._exit(0)  # pragma: no cover - the process is gone


def _refuse_generator(result: object, name: str) -> None:
    """Raise TypeError if a task returned what has not run yet."""
    if isinstance(result, Generator | AsyncGenerator):
        raise TypeError(
            f"{name} returned a generator, which runs only if something reads it:"
            " expected a function that runs when it is called"
        )


def _signature_of(fn: Callable[..., Any], name: str) -> inspect.Signature:
    """Return the signature by which a task is called, or refuse the function.

    What a ``__signature__`` says that somebody has set is taken at its word.

    :raises ConfigurationError: if it can't be read, or does not name all arguments
    """
    try:
        called = _named_part(fn)
        signature = inspect.signature(called, follow_wrapped=False, **_ANNOTATIONS)
    except ValueError as error:
        raise ConfigurationError(
            f"{name} does not tell its parameters: expected a function written in"
            " Python"
        ) from error
    if hasattr(called, "__signature__"):
        return signature
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise ConfigurationError(
                f"{name}: *args can't be a task's parameter: name the arguments, or"
                " take a list"
            )
    return signature


def _named_part(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the outermost of a function's wrappers that names what it takes.

    A decorator's function may take other arguments than the one that it wraps; where it
    takes ``*args`` or ``**kwargs``, the one inside has to say what these may be.
    """
    found: Callable[..., Any] = inspect.unwrap(fn, stop=_names_its_arguments)
    return found


def _names_its_arguments(fn: Callable[..., Any]) -> bool:
    """Return whether a wrapper tells its arguments, without the function inside."""
    if hasattr(fn, "__signature__"):
        return True
    try:
        own = inspect.signature(fn, follow_wrapped=False, **_ANNOTATIONS)
    except ValueError:  # compiled, as what functools.cache makes is
        return False
    kinds = {parameter.kind for parameter in own.parameters.values()}
    return kinds.isdisjoint(_ANY_ARGUMENTS)


_ANY_ARGUMENTS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _hint_of_wrapper(fn: Callable[..., Any]) -> str:
    """Return what to do where a decorator, and not its caller, passes an argument."""
    if _named_part(fn) is fn:
        return ""
    return (
        " (if a decorator passes it, set __signature__ of the function that the"
        " decorator returns)"
    )


def _signature_of_any() -> inspect.Signature:
    """Return the signature of a function that takes whatever it is called with."""
    names = {
        "args": inspect.Parameter.VAR_POSITIONAL,
        "kwargs": inspect.Parameter.VAR_KEYWORD,
    }
    return inspect.Signature([inspect.Parameter(*each) for each in names.items()])


# From Python 3.14 on, a signature evaluates annotations, and those that exist for type
# checkers only would fail. 4 is annotationlib.Format.STRING: annotations as written.
_ANNOTATIONS: Any = {"annotation_format": 4} if sys.version_info >= (3, 14) else {}


def _given_by_worker(signature: inspect.Signature) -> frozenset[str]:
    """Return which of metadata and headers a function takes, maybe by ``**kwargs``."""
    given = set()
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            return frozenset(_FROM_WORKER)
        if parameter.kind is not parameter.POSITIONAL_ONLY:
            given.add(name)
    return _FROM_WORKER.intersection(given)


_FROM_WORKER = frozenset(["metadata", "headers"])

_current = contextvars.ContextVar[Metadata | None]("taskhawk task", default=None)


def current_task() -> Metadata | None:
    """Return the metadata of the task that this code runs in, or None outside of tasks.

    Threads and coroutines that the task started know it too, if they run in its
    context: https://docs.python.org/3/library/contextvars.html
    """
    return _current.get()


def _in_own_context(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run each call of a function in a copy of the context.

    So a ContextVar that one message's task or hooks set is not seen by the next.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        _share_django_caches()
        return contextvars.copy_context().run(function, *args, **kwargs)

    return call


def extend_visibility_timeout(
    priority: Priority, receipt: str, visibility_timeout_s: int
) -> None:
    """Hide a queue's message from others for so many seconds from now.

    A worker does so by itself while a task runs; this is for code that was written for
    taskhawk 1.4.

    :param priority: the priority of the queue
    :param receipt: the receipt handle, which a task finds in its metadata
    :param visibility_timeout_s: 0 to 43,200 seconds
    :raises PartialFailure: if the message is no longer in flight
    """
    broker = _brokers.broker()
    queue = broker.destination(priority)
    _insist(broker.change_visibility, queue, (receipt, visibility_timeout_s))


_LOOP_END_S = 5  # for what coroutines left behind to end, once it is cancelled
_LOOP_HURRIED_S = 0.5  # the same after a Ctrl-C that is to end the worker at once


class _EventLoop:
    """The event loop for a worker's coroutines, in a thread of its own.

    Each thread of the worker hands over the coroutine of its message, and waits for it:
    hooks, Django's connections and contexts stay the thread's own. The loop is made for
    the first coroutine, and ends when no thread uses it any more.

    :param given: an application's own loop, which runs already, in place of all that
    """

    def __init__(self, given: Any = None) -> None:
        self._given = given
        self._lock = threading.Lock()  # guards what follows
        self._users = 0  # threads that may run coroutines here
        self._serving: tuple[Any, threading.Event, threading.Thread] | None = None

    @contextlib.contextmanager
    def in_this_thread(self) -> Iterator[None]:
        """Run the coroutines of this thread's messages here, inside the block."""
        outer = getattr(_thread, "event_loop", None)  # where a task runs a worker
        _thread.event_loop = self
        within_s: float = _LOOP_END_S
        with self._lock:
            self._users += 1
        try:
            yield
        except KeyboardInterrupt:
            within_s = _LOOP_HURRIED_S
            raise
        finally:
            _thread.event_loop = outer
            self._leave(within_s)

    def run(self, coroutine: Any) -> None:
        """Run a coroutine to its end, in a copy of this thread's context."""
        import asyncio

        try:
            loop = self._get()
        except RuntimeError:  # no more threads can be started: that is no failed run
            _run_alone(coroutine)
            return
        run = _LoopRun(coroutine)
        try:
            error = asyncio.run_coroutine_threadsafe(run.caught(), loop).result()
        except BaseException:  # Control-C, or the exit of a signal handler
            with contextlib.suppress(RuntimeError):  # the loop has ended, and so has it
                loop.call_soon_threadsafe(run.leave)
            raise
        if error is None:
            return
        try:
            raise error
        finally:
            del error  # else it is in a cycle with this frame

    def _get(self) -> Any:
        """Return the loop, which may have to be made."""
        if self._given is not None:
            return self._given
        with self._lock:
            if self._serving is None:
                loop, end = _new_event_loop(), threading.Event()
                thread = threading.Thread(
                    target=self._serve, args=(loop, end), daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:
                    loop.close()
                    raise
                self._serving = loop, end, thread
            return self._serving[0]

    @staticmethod
    def _serve(loop: Any, end: threading.Event) -> None:
        """Run what is handed over; the body of a thread."""
        import asyncio

        asyncio.set_event_loop(loop)
        # At the end, it cancels what coroutines left running.
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.get_loop()
            while not end.is_set():
                # An asyncio task that raises them stops the loop, for all other runs.
                with contextlib.suppress(SystemExit, KeyboardInterrupt):
                    loop.run_forever()

    def _leave(self, within_s: float) -> None:
        """Note that a thread runs no more coroutines; after the last, end the loop."""
        with self._lock:
            self._users -= 1
            if self._users or self._serving is None:
                return
            loop, end, thread = self._serving
            self._serving = None
        end.set()
        with contextlib.suppress(RuntimeError):  # it has just ended: see _serve()
            loop.call_soon_threadsafe(loop.stop)
        thread.join(within_s)
        if thread.is_alive():
            _log.warning("something that a coroutine began does not end: left to run")


class _LoopRun:
    """A coroutine on an event loop, which may be left while it is being handed over.

    Only the loop's thread changes it, so it needs no lock.
    """

    def __init__(self, coroutine: Any) -> None:
        self._coroutine = coroutine
        self._task: Any = None  # of asyncio, once it has begun
        self._is_left = False

    async def caught(self) -> BaseException | None:
        """Run it to its end, and return its error."""
        import asyncio

        if self._is_left:
            self._coroutine.close()
            return None
        self._task = asyncio.current_task()
        return await _caught(self._coroutine)

    def leave(self) -> None:
        """Cancel it, whether it has begun or not."""
        self._is_left = True
        if self._task:
            self._task.cancel()


_thread = threading.local()  # `event_loop`: that of the worker whose thread this is


def _forget_event_loop() -> None:
    """Leave the loop to the parent of a forked process, which has no such thread."""
    _thread.event_loop = None


os.register_at_fork(after_in_child=_forget_event_loop)


def _run_coroutine(coroutine: Any) -> None:
    """Run a coroutine to its end: on the loop of a worker, if this is its thread."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    event_loop = getattr(_thread, "event_loop", None)
    if asyncio._get_running_loop():  # noqa: SLF001 - exported; None outside of one
        # Sync mode in an application's own event loop, which is busy until we return.
        context = contextvars.copy_context()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(context.run, _run_alone, coroutine).result()
    elif event_loop is not None:
        event_loop.run(coroutine)
    elif settings.TASKHAWK_SYNC and "asgiref.sync" in sys.modules:
        _run_as_django(coroutine)
    else:
        _run_alone(coroutine)


def _run_alone(coroutine: Any) -> None:
    """Run a coroutine on a loop that is made for it, as asyncio.run() does."""
    import asyncio

    with asyncio.Runner(loop_factory=_new_event_loop) as runner:
        runner.run(coroutine)


async def _caught(coroutine: Any) -> BaseException | None:
    """Await a coroutine, and return its error: SystemExit would stop the loop."""
    try:
        await coroutine
    except BaseException as error:
        return error
    return None


def _new_event_loop() -> Any:
    """Return an event loop of asyncio's policy that notes who begins asyncio tasks."""
    import asyncio

    loop = asyncio.new_event_loop()
    loop.set_task_factory(_make_asyncio_task)
    return loop


def _make_asyncio_task(loop: Any, coroutine: Any, **options: Any) -> Any:
    """Make an asyncio task, and note it for the run that began it."""
    import asyncio

    made = asyncio.Task(coroutine, loop=loop, **options)
    begun = _begun.get()
    if begun is not None:
        begun.add(made)
    return made


# The asyncio tasks that this run began, and those that they began.
_begun = contextvars.ContextVar[Any]("begun", default=None)


async def _awaited(awaitable: Any, name: str) -> None:
    """Await what a task returned, and log which asyncio tasks its run leaves behind.

    A client's connection may need them, so they are not cancelled here. They go on
    beside other runs of the worker, and end with it.
    """
    begun: weakref.WeakSet[Any] = weakref.WeakSet()
    _begun.set(begun)
    run = object()
    _coroutine_runs.add(run)
    try:
        with _InOneProcess():
            await awaitable
    except Exception:
        await _refresh_after_coroutine()
        raise
    finally:
        _coroutine_runs.remove(run)
        left = [each for each in begun if not each.done()]
        if left:
            names = sorted(_qualname(each.get_coro()) for each in left)
            _log.warning(
                "%s ended while asyncio tasks that it began were still running: %s",
                name,
                ", ".join(names),
            )


# What checks an option of :func:`task`, by its name: later parts add theirs. It is
# called with the task, before that is registered, and the option's value.
_more_options: dict[str, Callable[[Task[Any, Any], Any], object]] = {}
# Those that change which arguments the task takes: the others are checked after that.
_call_options: set[str] = set()


class _MoreOptions(typing.TypedDict, total=False):
    """The options of :func:`task` that later parts add, for type checkers.

    :ivar group: the argument whose value is the message group, or a function that
        returns it, which is called as the task is; None is no group
    :ivar once: run a message, or one with these arguments, to its end once
    :ivar keep_s: for how many seconds that is remembered, by default a day
    :ivar unique: ignore a message if a run with the same arguments, or the same values
        of these, started after it was sent
    :ivar limit: how many may run at once, or start within a period: see :func:`limit`
    :ivar schedule: queues a run without arguments again and again:
        ``'rate(5 minutes)'``, ``'cron(0 9 ? * MON-FRI *)'`` or a timedelta of minutes
    :ivar timezone: of the schedule, such as ``'Europe/Berlin'``; UTC without it
    :ivar max_queue_size: once the queue has this many messages, running ones included,
        a dispatch of the task raises :exc:`QueueFull`; SQS's number is approximate
    """

    group: str | Callable[..., str | int | None] | None
    once: bool | tuple[str, ...]
    keep_s: float
    unique: bool | tuple[str, ...]
    limit: Any
    schedule: str | timedelta
    timezone: str
    max_queue_size: int


@typing.overload
def task(fn: Callable[_P, _R], /) -> Task[_P, _R]: ...
@typing.overload
def task(
    *,
    batch: int,
    priority: Priority = ...,
    name: str | None = ...,
    retry: Callable[[int], float] | None = ...,
    retry_on: tuple[type[BaseException], ...] = ...,
    never_retry_on: tuple[type[BaseException], ...] = ...,
    time_limit: float | None = ...,
    isolate: bool = ...,
    **more: typing.Unpack[_MoreOptions],
) -> Callable[[Callable[[list[Call]], _R]], Task[..., _R]]: ...
@typing.overload
def task(
    *,
    priority: Priority = ...,
    name: str | None = ...,
    retry: Callable[[int], float] | None = ...,
    retry_on: tuple[type[BaseException], ...] = ...,
    never_retry_on: tuple[type[BaseException], ...] = ...,
    time_limit: float | None = ...,
    isolate: bool = ...,
    **more: typing.Unpack[_MoreOptions],
) -> Callable[[Callable[_P, _R]], Task[_P, _R]]: ...
def task(
    *args: Any,
    priority: Priority = Priority.default,
    name: str | None = None,
    retry: Callable[[int], float] | None = None,
    retry_on: Any = (BaseException,),
    never_retry_on: Any = (),
    time_limit: float | None = None,
    isolate: bool = False,
    **more: Any,
) -> Any:
    """Turn a function into a :class:`Task`: ``@task`` or ``@task(priority=…)``.

    :param priority: the priority of its messages, unless an invocation has another
    :param name: what messages call it; None for the names of its module and function
    :param retry: returns the seconds from a failed run to the next: :func:`fixed`,
        :func:`linear`, :func:`exponential`, or any function of the attempt (from 1);
        None leaves retries to the queue
    :param retry_on: the exceptions after which a run is repeated; all others send the
        message to the dead-letter queue at once
    :param never_retry_on: exceptions that send it there at once all the same
    :param time_limit: seconds until a worker kills a run, whatever code it is in; such
        a task is isolated
    :param isolate: run it in a process of its own, which may crash
    :param batch: call the function once for up to this many messages, at most 100, with
        the list of their :class:`Call`
    :param more: options of later parts, see :class:`_MoreOptions`
    :raises ConfigurationError: if a message can't call the function, if its name is
        taken, or if an option is wrong
    :raises TypeError: if there is no such option
    """
    _refuse_unknown_options(more)
    options = {
        "retry": retry,
        "retry_on": retry_on,
        "never_retry_on": never_retry_on,
        "time_limit": time_limit,
    }

    def decorate(fn: Any) -> Task[Any, Any]:
        flaw = _flaw_of_function(fn, name)
        if not flaw:
            flaw = _flaw_of_options(name=name, priority=priority, **options)
        if flaw:
            raise ConfigurationError(f"{_qualname(fn)} {flaw}")
        made = _make_task(fn, priority, name)
        for option, value in options.items():
            setattr(made, option, value)
        made.options = more
        made.isolate = isolate or time_limit is not None
        for option in sorted(more, key=lambda name: name not in _call_options):
            _more_options[option](made, more[option])
        _register(made)
        if not name and fn.__module__ == "__main__":
            # Messages that taskhawk 1.4 queued call it by this name.
            _registry[f"__main__.{fn.__name__}"] = made
        return made

    return decorate(*args) if args else decorate


def _refuse_unknown_options(options: Iterable[str]) -> None:
    """Raise TypeError, as any function does, for an option that no part knows."""
    for option in options:
        if option not in _more_options:
            raise TypeError(f"task() got an unexpected keyword argument {option!r}")


def _qualname(fn: Any) -> str:
    """Return what errors call a function, or any other object."""
    return str(getattr(fn, "__qualname__", repr(fn)))


def _flaw_of_function(fn: Any, name: object) -> str:
    """Return why a message can't call this and what to do instead, or ""."""
    # These two first: the others look into the function.
    if isinstance(fn, Task):
        return "is a task already: decorate it once"
    if not callable(fn):
        return _flaw_of_value(fn)
    if _is_method(fn):
        return (
            "is a method: expected a function, which a message can call without an"
            " object"
        )
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        return "is a generator: expected a function that runs when it is called"
    if _qualname(fn).endswith("<lambda>"):
        return "is a lambda: expected a function with a name (def)"
    if not name and not hasattr(fn, "__name__"):
        return "has no name: pass name= to taskhawk.task"
    return ""


def _flaw_of_value(value: object) -> str:
    """Return what to do with a value that can't be called."""
    if isinstance(value, str):
        return "is no function: pass a name as name="
    if isinstance(value, Priority):
        return "is no function: pass a priority as priority="
    return "can't be called: expected a function"


def _is_method(fn: Any) -> bool:
    """Return whether a function needs an object to be called."""
    if inspect.ismethod(fn):
        return True
    # In a class body a method is still a function: its first parameter gives it away.
    container = _qualname(fn).rpartition(".")[0]
    if not container or container.endswith("<locals>"):
        return False
    parameters = _signature_of(fn, _qualname(fn)).parameters
    return next(iter(parameters), None) == "self"


def _flaw_of_options(
    *,
    name: object,
    priority: object,
    retry: object,
    retry_on: object,
    never_retry_on: object,
    time_limit: object,
) -> str:
    """Return which option of :func:`task` is wrong and what is right, or ""."""
    rows = [
        ("name", name, isinstance(name, str | None), "a string"),
        ("priority", priority, isinstance(priority, Priority), "a taskhawk.Priority"),
        (
            "retry",
            retry,
            retry is None or callable(retry),
            "a function of the attempt, such as taskhawk.fixed(60, max_retries=3)",
        ),
        ("retry_on", retry_on, _are_exceptions(retry_on), "exceptions"),
        (
            "never_retry_on",
            never_retry_on,
            _are_exceptions(never_retry_on),
            "exceptions",
        ),
        (
            "time_limit",
            time_limit,
            time_limit is None or _is_above_zero(time_limit),
            "a number of seconds above 0",
        ),
    ]
    for option, value, is_right, expected in rows:
        if not is_right:
            return f"has {option}={value!r}: expected {expected}"
    return ""


def _are_exceptions(kinds: object) -> bool:
    """Return whether this is an exception class or a tuple of them."""
    if isinstance(kinds, tuple):
        return all(map(_are_exceptions, kinds))
    return isinstance(kinds, type) and issubclass(kinds, BaseException)


def _is_above_zero(value: object) -> bool:
    """Return whether this is a number above 0, and finite."""
    return _is_number(value) and 0 < value < math.inf


def _make_task(fn: Any, priority: Priority, name: str | None) -> Task[Any, Any]:
    """Make a task of the class that TASKHAWK_TASK_CLASS names."""
    cls = settings.read("TASKHAWK_TASK_CLASS") or Task
    place = _place_of(fn)
    made = cls(fn, priority, name or f"{place.module}.{fn.__name__}")
    if not isinstance(made, Task):
        raise ConfigurationError(
            f"TASKHAWK_TASK_CLASS: expected a subclass of taskhawk.Task, got {cls!r}"
        )
    made._place = place
    made.declared_in = _declaring_module(fn)
    return made


def _register(made: Task[Any, Any]) -> None:
    """Add a task to the registry, unless another function has its name."""
    # One step finds the name free and takes it: two threads can't both do so.
    existing = _registry.setdefault(made.name, made)
    here, there = made._place, existing._place  # noqa: SLF001 - their own
    if existing.fn is not made.fn and not here.replaces(there):
        raise ConfigurationError(
            f"{made.name}: the name of {here} is taken by {there}:"
            " rename one, or pass name= to @taskhawk.task"
        )
    _registry[made.name] = made


class _Place(NamedTuple):
    """Where a function is written.

    `module` is the one that a worker imports it from, also if it is a script's; `line`
    is text for errors; `spec` is that of its module, which gets another one when it is
    read again.
    """

    module: str
    qualname: str
    line: str
    spec: object

    def __str__(self) -> str:
        return f"{self.module}.{self.qualname}{self.line}"

    def replaces(self, other: _Place) -> bool:
        """Return whether a function here is a function there, defined anew.

        A module may be read again, as ``__main__`` and by its name too, and a function
        may be typed again in an interactive interpreter.
        """
        if (self.module, self.qualname) != (other.module, other.qualname):
            return False
        return self.spec is not other.spec or self.module == "__main__"


def _place_of(fn: Any) -> _Place:
    """Return where a function is written: the one that decorators wrap."""
    fn = inspect.unwrap(fn)
    code = getattr(fn, "__code__", None)
    line = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    spec = getattr(fn, "__globals__", {}).get("__spec__")
    return _Place(_importable_name(fn.__module__), _qualname(fn), line, spec)


# A script, and the same script in a process of multiprocessing.
_MAINS = ("__main__", "__mp_main__")


def _declaring_module(fn: Any) -> str:
    """Return the module whose import declares the task that is made of a function.

    It may be another than the function's: ``send = taskhawk.task(lib.send)``. Where
    modules import each other, it is the outermost: no other order may work for them.
    Where a function declares tasks, it is the module that is being imported, if any.
    """
    if fn.__module__ in (*_MAINS, __name__):
        return str(fn.__module__)
    stack = traceback.walk_stack(inspect.currentframe())
    callers = [frame for frame, _ in stack if frame.f_globals is not globals()]
    declaring = callers[0].f_globals.get("__name__")
    for frame in callers:
        name = frame.f_globals.get("__name__")
        importing = frame.f_code.co_name == "<module>" and name in sys.modules
        # A script is below all other frames: it declares only what its own code does.
        if importing and name not in _MAINS:
            declaring = name
    return str(declaring)


def _importable_name(module: str) -> str:
    """Return the name that a worker imports a module by, also that of a script."""
    script = sys.modules.get(module)
    path = getattr(script, "__file__", None)
    if module not in _MAINS or not path:
        return str(module)
    spec = getattr(script, "__spec__", None)
    name = spec.name if spec else inspect.getmodulename(path)
    return name or module


# --- 12. publishing -------------------------------------------------------------------
# Nothing leaves that _decode() would refuse or that the service can't hold. What was
# not accepted raises: once dispatch() has returned, the message is in the queue's
# keeping. In a batch(), every message is checked and encoded before the first is sent.


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AsyncInvocation(Generic[_P]):
    """How to dispatch a task: with which headers, priority and delay.

    Each ``with_…`` returns another invocation and leaves this one as it is: one can be
    kept and shared between threads: ``urgent = send.with_priority(Priority.high)``.

    :param task: the task to dispatch
    """

    task: Task[_P, Any]
    _: dataclasses.KW_ONLY
    _headers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _priority: Priority | None = None  # None for the task's
    _delay: float | datetime = 0
    _group_id: str | None = None  # None for the task's

    def with_headers(self, /, **headers: Any) -> AsyncInvocation[_P]:
        """Return an invocation with these headers too, in place of any of their names.

        :param headers: any values that JSON can hold. The message has them all, and up
            to ten of them are also string attributes, which SNS can filter by.
        """
        return dataclasses.replace(self, _headers={**self._headers, **headers})

    def with_priority(self, priority: Priority) -> AsyncInvocation[_P]:
        """Return an invocation with this priority in place of the task's.

        :raises TypeError: if it is not a :class:`Priority`
        """
        if not isinstance(priority, Priority):
            raise TypeError(f"priority: expected a taskhawk.Priority, got {priority!r}")
        return dataclasses.replace(self, _priority=priority)

    def with_delay(self, delay: float | timedelta | datetime) -> AsyncInvocation[_P]:
        """Return an invocation whose messages wait for so long, or until then.

        SQS holds a message back for up to 15 minutes, SQLite for any time. Beyond that,
        and on SNS, a delay becomes an EventBridge schedule, which counts in minutes and
        rounds up; it needs TASKHAWK_SCHEDULER_ROLE. See :func:`cancel`.

        :param delay: seconds, a timedelta, or a datetime with a time zone; a time in
            the past means now
        :raises TypeError: if it is none of these
        :raises ValueError: if it is negative or not finite, or has no time zone
        """
        if isinstance(delay, datetime):
            if delay.utcoffset() is None:
                raise ValueError(
                    "delay: expected a datetime with a time zone, such as"
                    f" datetime.now(UTC), got {delay}"
                )
            return dataclasses.replace(self, _delay=delay)
        delay_s = delay.total_seconds() if isinstance(delay, timedelta) else delay
        if not _is_number(delay_s):
            raise TypeError(
                f"delay: expected seconds, a timedelta or a datetime, got {delay!r}"
            )
        if not 0 <= delay_s < math.inf:
            raise ValueError(f"delay: expected 0 or more seconds, got {delay_s}")
        return dataclasses.replace(self, _delay=delay_s)

    def with_group(self, key: str | int) -> AsyncInvocation[_P]:
        """Return an invocation whose messages are of this group, not of the task's.

        A FIFO queue keeps the order of a group's messages, and has one of them run at a
        time. Any other serves its groups in turn, as a fair queue.

        :param key: such as the id of a customer; a text that SQS does not accept,
            because it is over 128 characters long or has spaces or non-ASCII letters,
            is replaced by its hash
        :raises TypeError: if it is neither a string nor an int
        """
        return dataclasses.replace(self, _group_id=_group_id_of(key, "group"))

    def with_options(
        self, *, retry: RetryPolicy | None = None, time_limit: float | None = None
    ) -> AsyncInvocation[_P]:
        """Return an invocation with its own retry policy or time limit, not its task's.

        They travel in a header, which the task does not see.

        :param retry: from :func:`fixed`, :func:`linear` or :func:`exponential`; None
            leaves it as it is
        :param time_limit: seconds until a worker kills the run, which it isolates for
            that; None leaves it as it is
        :raises TypeError: if it is anything else: a function of yours can't be sent
        """
        options = dict(self._headers.get(_OPTIONS_HEADER, {}))
        if retry is not None:
            if type(retry) is not RetryPolicy:
                raise TypeError(
                    "retry: expected taskhawk.fixed(), linear() or exponential(), got"
                    f" {retry!r}"
                )
            options["retry"] = _policy_data(retry)
        if time_limit is not None:
            if not _is_above_zero(time_limit):
                raise TypeError(
                    "time_limit: expected a number of seconds above 0, got"
                    f" {time_limit!r}"
                )
            options["time_limit"] = time_limit
        return self.with_headers(**{_OPTIONS_HEADER: options})

    def dispatch(self, /, *args: _P.args, **kwargs: _P.kwargs) -> str:
        """Queue a run of the task: one request, and one more at a queue's first use.

        In a :func:`batch` the message is sent at the end of the block. With
        TASKHAWK_SYNC the task runs here and now.

        :param args: arguments of the function that JSON can hold; Decimals become
            numbers
        :returns: the message's id, which the task finds in its ``metadata``
        :raises TypeError: if the function can't be called so, or an argument is not
            JSON
        :raises ValidationError: if an argument can't be sent: NaN, too deep, too large
        :raises QueueFull: if the queue already has the task's `max_queue_size` messages
        :raises ConfigurationError: if the queue is missing or forbidden, or if it can't
            hold the message back for so long
        :raises Exception: of botocore or sqlite3, if the call fails otherwise; the
            message may have been queued then
        """
        return publish(self._message(args, kwargs))

    async def dispatch_async(self, /, *args: _P.args, **kwargs: _P.kwargs) -> str:
        """Queue a run of the task as :meth:`dispatch` does; the event loop goes on.

        Concurrent dispatches share requests. With TASKHAWK_SYNC the task runs in a
        thread. If the coroutine is cancelled, the message may have been queued.

        :returns: the message's id
        :raises Exception: as :meth:`dispatch`
        """
        return await _publish_async(self._message(args, kwargs))

    def dispatch_many(self, calls: Iterable[Any]) -> int:
        """Queue a run for each of `calls`, ten to a request, with bounded memory.

        :param calls: a tuple is a call's positional arguments, a dict its keyword
            arguments, and anything else its only argument
        :returns: the number of calls
        :raises PartialFailure: if some were not accepted; no more of `calls` was read
            then
        :raises Exception: as :meth:`dispatch`; earlier calls may have been queued then,
            and a note on the error says which call is wrong
        """
        count = 0
        waiting: list[_Ready] = []  # at most ten, unless a batch() is around this
        for call in calls:
            try:
                message = self._message(*_arguments_of(call))
                if _max_queue_size(message) is not None:
                    _refuse_if_full(message)
                waiting.append(_prepare(message))
            except (TypeError, ValidationError, QueueFull) as error:
                error.add_note(f"This is call {count} of dispatch_many(), from 0.")
                raise
            count += 1
            if len(waiting) == _MAX_BATCH:
                _send_all_ready(waiting)
                waiting = []
        _send_all_ready(waiting)
        return count

    def _message(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Message:
        """Make the message of a call, once it is known that the worker can make it."""
        self.task._check_call(len(args), *kwargs)  # noqa: SLF001 - its own
        message = Message.new(
            self.task.name,
            args,
            kwargs,
            headers={**_default_headers(self.task), **self._headers},
            priority=self._priority or self.task.priority,
        )
        message.delay_s = _delay_from(message.timestamp, self._delay)
        message.group_id = self._group_id
        group = self.task.options.get("group")
        if group is not None and message.group_id is None:
            message.group_id = _group_id_of_call(self.task, group, args, kwargs)
        return message


def _delay_from(timestamp_ms: int, delay: float | datetime) -> float:
    """Return the seconds from a message's timestamp to the end of its delay."""
    if isinstance(delay, datetime):
        return max(0.0, delay.timestamp() - timestamp_ms / 1000)
    return delay


# What SQS takes as MessageGroupId: letters and digits of ASCII, and punctuation.
_GROUP_ID = re.compile(f"[!-~]{{1,{_MAX_GROUP}}}")


def _group_id_of(key: object, what: str) -> str:
    """Return the group id that a key stands for: always the same, and legal on SQS."""
    if isinstance(key, bool) or not isinstance(key, str | int):
        kind = type(key).__name__  # not its value, which is an argument's
        raise TypeError(f"{what}: expected a string or an int, got {kind}")
    text = str(key)
    if _GROUP_ID.fullmatch(text):
        return text
    # The name of a customer may be anything, and is no reason to refuse a dispatch.
    return f"sha256:{_hash(text)}"


def _hash(text: str) -> str:
    """Return 64 characters that stand for a text."""
    import hashlib

    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _group_id_of_call(
    task: Task[Any, Any], group: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """Return the group id of a call by the task's option, or None."""
    if callable(group):
        key = group(*args, **kwargs)
    elif group in kwargs:
        key = kwargs[group]
    else:
        bound = task._signature.bind_partial(*args)  # noqa: SLF001 - its own
        bound.apply_defaults()
        key = bound.arguments.get(group)
    if key is None:
        return None
    return _group_id_of(key, f"{task.name}: group")


def _check_group(task: Task[Any, Any], group: Any) -> None:
    """Refuse a `group` that is neither an argument nor a function of the arguments."""
    if group is None or callable(group):
        return
    parameters = task._signature.parameters.values()  # noqa: SLF001 - its own
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    if isinstance(group, str) and group not in _FROM_WORKER:
        takes_any = len(names) < len(parameters)  # by **kwargs
        if takes_any or group in names:
            return
    raise ConfigurationError(
        f"{task.name} has group={group!r}: expected the name of one of its"
        " arguments, or a function of its arguments"
    )


_more_options["group"] = _check_group


def _arguments_of(call: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return the positional and keyword arguments of a call for dispatch_many()."""
    if isinstance(call, dict):
        return (), call
    if isinstance(call, tuple):
        return call, {}
    return (call,), {}


def _default_headers(task: Task[Any, Any]) -> Mapping[str, Any]:
    """Return the headers that each message of a task has."""
    hook = settings.TASKHAWK_DEFAULT_HEADERS
    if hook is None:
        return {}
    # The manual of 1.4 says that the hook gets the task; 1.4.0 called it with nothing.
    headers = hook(task=task) if _takes_task(hook) else hook()
    return headers or {}


@functools.lru_cache
def _takes_task(hook: Callable[..., Any]) -> bool:
    """Return whether a hook takes the task; cached, because a look takes long."""
    parameters = inspect.signature(hook, **_ANNOTATIONS).parameters.values()
    return any(p.name == "task" or p.kind is p.VAR_KEYWORD for p in parameters)


class _Ready(NamedTuple):
    """A message that was checked and encoded, and where it goes."""

    message: Message
    sender: Sender
    destination: str
    entry: Outgoing


def _prepare(message: Message) -> _Ready:
    """Check and encode a message; nothing is sent yet.

    So a batch with one message that can't be sent sends nothing.
    """
    body = _encode(message)
    attributes = _attributes_of(message.headers)
    entry = Outgoing(body, attributes, message.delay_s, message.group_id)
    sender = _brokers.sender()
    if settings.TASKHAWK_FIFO:
        entry = _in_group(message, entry)
    if entry.delay_s > sender.max_delay_s and isinstance(sender, _AwsSender):
        sender = _brokers.get("schedule")
        entry = entry._replace(attributes={})  # which no schedule has
    if entry.delay_s > sender.max_delay_s:
        raise ConfigurationError(
            f"{message.task_name}: the queue can hold a message back for at most"
            f" {sender.max_delay_s:g} s, got {entry.delay_s:g} s"
        )
    if entry.size() > sender.max_bytes:
        raise _too_large(message, entry, sender.max_bytes)
    return _Ready(message, sender, sender.destination(message.priority), entry)


def _in_group(message: Message, entry: Outgoing) -> Outgoing:
    """Return a message as a FIFO queue takes it: with a group and a deduplication id.

    Without a group, the message is its own: it waits for none and none waits for it.
    """
    if entry.delay_s:
        raise ConfigurationError(
            f"{message.task_name}: a FIFO queue can't delay a message: leave the delay"
            " out, or use a queue without TASKHAWK_FIFO"
        )
    own = _group_id_of(message.id, "id")
    group_id = entry.group_id or own
    return entry._replace(group_id=group_id, deduplication_id=own)


# SQS takes names with single dots inside, except with AWS's prefixes; one prefix is
# ours.
_ATTRIBUTE_NAME = re.compile(
    r"(?a)(?!.{257})(?!(?i:aws|amazon|taskhawk)\.)[\w-]+(\.[\w-]+)*"
)
# SQS takes the characters that XML 1.0 has.
_ATTRIBUTE_TEXT = re.compile("[^\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]+")


def _attributes_of(headers: Mapping[Any, Any]) -> dict[str, dict[str, str]]:
    """Return at most ten headers that SQS takes as attributes; the body has all."""
    attributes: dict[str, dict[str, str]] = {}
    for key, value in headers.items():
        name, text = str(key), str(value)
        if not _ATTRIBUTE_NAME.fullmatch(name) or not _ATTRIBUTE_TEXT.fullmatch(text):
            continue
        attributes[name] = {"DataType": "String", "StringValue": text}
        if len(attributes) == _MAX_ATTRIBUTES:
            break
    return attributes


def _too_large(message: Message, entry: Outgoing, max_bytes: int) -> MessageTooLarge:
    """Return an error that names the largest argument: that is what to look at."""
    reason = (
        f"{message.task_name[:200]}: the message has {entry.size()} bytes (body and"
        f" attributes), and the limit is {max_bytes}"
    )
    sizes = _sizes(message)
    if sizes:
        largest = max(sizes, key=sizes.__getitem__)
        reason += (
            f": the largest argument is {largest[:200]} with {sizes[largest]} bytes"
        )
    return MessageTooLarge(reason, max_bytes)


class _Batch:
    """What one ``with batch():`` block collects.

    A task or thread that outlives the block finds its batch closed; so does a process
    that was forked in the block, because its copy of the batch is sent by nobody.
    """

    def __init__(self) -> None:
        self._process_id = os.getpid()
        # Guards the two below: nothing is added to a batch that is closed. Reentrant,
        # because a signal handler may dispatch while it is held.
        self._lock = threading.RLock()
        self._collected: list[_Ready] = []
        self._closed = False

    def add(self, readies: Sequence[_Ready]) -> bool:
        """Add messages, or return False if this process has no open batch here."""
        # Before the lock, which another thread may have held at the fork.
        if self._process_id != os.getpid():
            return False
        with self._lock:
            if self._closed:
                return False
            self._collected.extend(readies)
            return True

    def close(self) -> Sequence[_Ready]:
        """Collect no more, and return what this process has to send."""
        if self._process_id != os.getpid():
            return ()
        with self._lock:
            self._closed = True
        return self._collected


_current_batch = contextvars.ContextVar[_Batch | None]("taskhawk batch", default=None)


@contextlib.contextmanager
def batch() -> Iterator[None]:
    """Collect dispatches, and send them ten to a request when the block ends.

    For a loop that dispatches, or a function that dispatches in many places::

        with taskhawk.batch():
            for user in users:
                send_email.dispatch(user.email, 'Hello!')

    If the block raises, none of its messages is sent. A nested block adds what it has
    collected to the outer one. A dispatch from a thread is sent directly, unless the
    thread runs in this context; so is a dispatch from a forked process, and from a task
    or thread that outlives the block.

    :raises PartialFailure: on exit, with exactly the messages that were not accepted
    """
    collecting = _Batch()
    token = _current_batch.set(collecting)
    try:
        yield
    finally:
        _current_batch.reset(token)
        collected = collecting.close()
    _send_all_ready(collected)  # or add them to the block around this one


def _collect(readies: Sequence[_Ready]) -> bool:
    """Add messages to the batch around this call; return whether there is one."""
    collecting = _current_batch.get()
    return collecting is not None and collecting.add(readies)


def publish(message: Message) -> str:
    """Send a message, or add it to the :func:`batch` around this call.

    For messages that could not be sent: ``for message in failure.unsent:
    publish(message)``.

    :param message: from :meth:`Message.new`; the queue holds it back for its
        ``delay_s``
    :returns: the message's id
    :raises Exception: as :meth:`AsyncInvocation.dispatch`
    """
    if _max_queue_size(message) is not None:
        _refuse_if_full(message)
    ready = _prepare(message)
    if not _collect([ready]):
        _send_now(ready)
    return message.id


async def _publish_async(message: Message) -> str:
    """Send a message as :func:`publish` does, while the event loop goes on."""
    import asyncio

    lanes = _lanes.get()
    if message.priority not in lanes.looked_up:
        await asyncio.to_thread(_look_up, message.priority)
        lanes.looked_up.add(message.priority)
    if _max_queue_size(message) is not None:
        await asyncio.to_thread(_refuse_if_full, message)
    ready = _prepare(message)
    if _collect([ready]):
        return message.id
    if ready.sender.shared_calls:
        await lanes.lane_of(ready).send_async(ready)
    else:  # in sync mode, the task runs there
        await asyncio.to_thread(_send_one, ready)
    return message.id


def _look_up(priority: Priority) -> None:
    """Do what takes long at a priority's first use, such as to open a file."""
    _brokers.sender().destination(priority)


def _send_now(ready: _Ready) -> None:
    """Send one message, perhaps in a request with those of other dispatches."""
    if ready.sender.shared_calls:
        _lanes.get().lane_of(ready).send(ready)
    else:
        _send_one(ready)


def _send_one(ready: _Ready) -> None:
    """Send one message, or raise why it was not accepted."""
    try:
        _accepted(ready.sender.send(ready.destination, [ready.entry]))
    except MessageTooLarge as error:  # the queue's limit is below the service's
        raise _too_large(ready.message, ready.entry, error.limit) from error
    _log_sent(ready)


def _log_sent(ready: _Ready) -> None:
    """Log that a message was accepted."""
    _log.debug("Sent message", extra={"message_body": ready.entry.body})


# Dispatches that run at the same time share requests. One that finds its lane empty
# sends its message itself, as if there were no lanes. The others wait for helpers,
# threads that send up to ten messages in a call, and that end when there is no more to
# send. So whatever interrupts a dispatch, the others have somebody who sends for them.

# How long a call may be held back for dispatches that are likely to come at once: those
# of threads that have just been told that their last message is sent.
_GATHER_S = 0.002
# The same, as a part of the time that the last call took.
_GATHER_PART = 0.2
# How long a message waits for a call under way at most: that one may hang.
_SHARE_WITHIN_S = 0.2
_HELPER_IDLE_S = 1  # after which a helper ends


class _Parcel:
    """A message that waits to be sent, and what came of it.

    If it is neither accepted nor in error, it is to be sent by itself: what happened to
    it in company may have been the fault of the others.
    """

    def __init__(self, entry: Outgoing) -> None:
        self.entry = entry
        #: to be called, from any thread, when it is known what came of it
        self.tell: Callable[[], object] = _do_nothing
        self.is_accepted = False
        self.error: Exception | None = None  #: of the call as a whole
        self.is_left = False  #: nobody waits for it any more
        self.size = 0
        self.since = 0.0


class _SharedCall(NamedTuple):
    """A call under way."""

    parcels: Sequence[_Parcel]
    began: float


class _Sharing:
    """Which messages to one destination are sent when, by whom, and with which others.

    Pure: it is told the time, and calls nothing. Threads are known by any number.

    :param max_bytes: for the sum of a call
    :param max_calls: how many calls may be under way at once
    """

    def __init__(self, max_bytes: int, max_calls: int) -> None:
        self._max_bytes, self._max_calls = max_bytes, max_calls
        self.waiting: list[_Parcel] = []  #: in the order of their dispatches
        self.under_way: dict[int, _SharedCall] = {}  #: by the thread that makes it
        self._expected = 0  # how many are likely to share the next call…
        self._gather_until = -math.inf  # …if they come before this

    def enter(self, thread: int, parcel: _Parcel, now: float) -> bool:
        """Begin a call with this parcel alone, if nothing is in its way."""
        if self.waiting or self.under_way or now < self._gather_until:
            return False
        self.under_way[thread] = _SharedCall([parcel], now)
        return True

    def add(self, parcel: _Parcel, now: float) -> None:
        """Let a parcel wait for others to go with."""
        parcel.size, parcel.since = parcel.entry.size(), now
        self.waiting.append(parcel)

    def is_due(self, now: float) -> bool:
        """Return whether a call is to begin now."""
        parcels, _, is_full = self._next_call()
        if not parcels or len(self.under_way) >= self._max_calls:
            return False
        if is_full or now >= parcels[0].since + _SHARE_WITHIN_S:
            return True
        if self.under_way:
            return False
        return len(parcels) >= self._expected or now >= self._gather_until

    def due_at(self) -> float:
        """Return when a call will be due, unless something happens before."""
        parcels, _, _ = self._next_call()
        if not parcels or len(self.under_way) >= self._max_calls:
            return math.inf
        patient_until = parcels[0].since + _SHARE_WITHIN_S
        if self.under_way:
            return patient_until
        return min(patient_until, self._gather_until)

    def begin(self, thread: int, now: float) -> Sequence[_Parcel]:
        """Begin the call that is due; return its parcels."""
        parcels, count, _ = self._next_call()
        call = _SharedCall(parcels, now)
        # One step: a thread that dies here has taken all of them, or none.
        self.waiting, self.under_way[thread] = self.waiting[count:], call
        return parcels

    def end(self, thread: int, now: float) -> Sequence[_Parcel]:
        """End this thread's call, if it has one under way; return its parcels."""
        call = self.under_way.get(thread)
        if call is None:
            return ()
        self._expected = len(call.parcels) + len(self.waiting)
        if self._expected > 1:
            pause_s = min(_GATHER_S, _GATHER_PART * (now - call.began))
            self._gather_until = now + pause_s
        del self.under_way[thread]  # last: an end that is interrupted is called again
        return call.parcels

    def sweep(self) -> None:
        """Forget the parcels for which nobody waits any more."""
        self.waiting = [each for each in self.waiting if not each.is_left]

    def give_up(self) -> Sequence[_Parcel]:
        """Let nobody wait any more; return who did."""
        parcels, self.waiting = self.waiting, []
        return parcels

    def _next_call(self) -> tuple[Sequence[_Parcel], int, bool]:
        """Look at the next call.

        :returns: its parcels; how many of those waiting they end; whether it is full
        """
        parcels: list[_Parcel] = []
        size = 0
        for place, parcel in enumerate(self.waiting):
            if parcel.is_left:
                continue
            size += parcel.size
            if parcels and size > self._max_bytes:
                return parcels, place, True
            parcels.append(parcel)
            if len(parcels) == _MAX_BATCH:
                return parcels, place + 1, True
        return parcels, len(self.waiting), False


class _Lane:
    """The way of dispatches to one destination, in one process."""

    def __init__(self, sender: Sender, destination: str, busy: set[int]) -> None:
        self._sender, self._destination, self._busy = sender, destination, busy
        self._process_id = os.getpid()
        max_calls = sender.shared_calls
        if _is_fifo(destination):  # or a later call might overtake an earlier
            max_calls = 1
        self._sharing = _Sharing(sender.max_bytes, max_calls)
        self._max_helpers = max_calls
        # Guards what is above and below, for moments only: never over a call.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._helpers: set[threading.Thread] = set()
        self._idle: set[int] = set()  # the helpers that wait on the condition

    def send(self, ready: _Ready) -> None:
        """Send a message by itself, or with others; raise why it was not accepted."""
        me = threading.get_ident()
        # This thread may hold the lock already, or have a call under way: a signal
        # handler or a __del__ may dispatch at any point below. A daemon thread's call
        # may never end when the interpreter does.
        if me in self._busy or sys.is_finalizing():
            _send_one(ready)
            return
        parcel = _Parcel(ready.entry)
        try:
            try:
                self._busy.add(me)
                if self._enter(me, parcel):
                    _send_one(ready)
                else:
                    self._wait(parcel)
                    self._conclude(ready, parcel)
            finally:
                self._leave(me, parcel)
        except BaseException:
            self._leave(me, parcel)  # again: Control-C may have interrupted the first
            raise

    def _enter(self, me: int, parcel: _Parcel) -> bool:
        """Return whether this thread is to send the parcel by itself."""
        with self._lock:
            return self._sharing.enter(me, parcel, time.monotonic())

    def _wait(self, parcel: _Parcel) -> None:
        """Wait until a helper has sent the parcel."""
        told = threading.Event()
        parcel.tell = told.set
        self._add(parcel)
        told.wait()

    def _add(self, parcel: _Parcel) -> None:
        """Leave a parcel to a helper."""
        with self._lock:
            now = time.monotonic()
            self._sharing.add(parcel, now)
            # One helper looks after those that wait, lest the call under way hang.
            if len(self._sharing.waiting) == 1 or self._sharing.is_due(now):
                self._wake()

    async def send_async(self, ready: _Ready) -> None:
        """Send a message as :meth:`send` does, while the event loop goes on."""
        import asyncio

        me = threading.get_ident()
        if me in self._busy:  # as in send()
            await asyncio.to_thread(_send_one, ready)
            return
        loop = asyncio.get_running_loop()
        told = loop.create_future()
        parcel = _Parcel(ready.entry)
        parcel.tell = functools.partial(_tell_loop, loop, told)
        try:
            self._busy.add(me)
            self._add(parcel)
        except BaseException:  # Control-C: no helper may have been woken
            parcel.is_left = True
            self._end(me)
            raise
        finally:
            self._busy.discard(me)
        try:
            await told
        finally:
            parcel.is_left = True  # if the coroutine is cancelled, say
        if parcel.error or parcel.is_accepted:
            self._conclude(ready, parcel)
        else:
            await asyncio.to_thread(_send_one, ready)

    def _leave(self, me: int, parcel: _Parcel) -> None:
        """Have nobody wait for this dispatch, and send nothing more for it."""
        # Of a forked process, the parent's other threads may have held the lock.
        if self._process_id == os.getpid():
            parcel.is_left = True
            self._end(me)
        self._busy.discard(me)

    def _end(self, me: int) -> Sequence[_Parcel]:
        """End this thread's call; return its parcels."""
        with self._lock:
            parcels = self._sharing.end(me, time.monotonic())
            if self._sharing.waiting and not self._sharing.under_way:
                self._wake()
        return parcels

    def _wake(self) -> None:
        """Have a helper look what is due, a new one if need be; the lock is held."""
        if self._idle:
            self._changed.notify()
            return
        self._helpers = {each for each in self._helpers if each.is_alive()}
        if len(self._helpers) >= self._max_helpers:
            return
        helper = threading.Thread(
            target=self._help, name="taskhawk dispatch", daemon=True
        )
        try:
            helper.start()
            self._helpers.add(helper)
        except RuntimeError:  # no more threads can be started
            if not self._helpers:
                for parcel in self._sharing.give_up():
                    parcel.tell()

    def _help(self) -> None:
        """Send what is due, until nothing is for a while."""
        me = threading.get_ident()
        parcels: Sequence[_Parcel] = ()
        try:
            self._busy.add(me)
            while parcels := self._next(me):
                self._send_together(parcels)
                self._end(me)
                for parcel in parcels:
                    parcel.tell()
        finally:
            # Whatever ends this thread, who waits for it is told.
            with self._lock:
                self._resign()
            for parcel in (*parcels, *self._end(me)):
                parcel.tell()
            self._busy.discard(me)

    def _resign(self) -> None:
        """Count this thread as a helper no more; the lock is held."""
        self._helpers.discard(threading.current_thread())
        self._idle.discard(threading.get_ident())

    def _next(self, me: int) -> Sequence[_Parcel]:
        """Begin the next call, and return its parcels; none if it is time to end."""
        with self._lock:
            while True:
                now = time.monotonic()
                if self._sharing.is_due(now):
                    parcels = self._sharing.begin(me, now)
                    if self._sharing.is_due(now):
                        self._wake()
                    return parcels
                pause_s = min(self._sharing.due_at() - now, _HELPER_IDLE_S)
                if pause_s == _HELPER_IDLE_S:  # what waits is left, or waits for calls
                    self._sharing.sweep()
                try:
                    self._idle.add(me)
                    self._changed.wait(pause_s)
                finally:
                    self._idle.discard(me)
                if pause_s == _HELPER_IDLE_S and not self._sharing.waiting:
                    self._resign()
                    return ()

    def _send_together(self, parcels: Sequence[_Parcel]) -> None:
        """Send parcels in one call, and note what came of each."""
        entries = [parcel.entry for parcel in parcels]
        try:
            refusals = self._sender.send(self._destination, entries)
        except MessageTooLarge:
            return  # sent by itself, each learns whether it is its own size
        except Exception as error:
            for parcel in parcels:
                parcel.error = error
            return
        refused = {refusal.index for refusal in refusals}
        for index, parcel in enumerate(parcels):
            parcel.is_accepted = index not in refused

    def _conclude(self, ready: _Ready, parcel: _Parcel) -> None:
        """Return if a helper has sent the message; else send it, or raise why not.

        A call that failed as a whole is not made again: botocore has repeated it, and
        an outage would last twice as long for each dispatch.
        """
        if parcel.error is not None:
            raise _own_copy(parcel.error)
        if parcel.is_accepted:
            _log_sent(ready)
        else:
            _send_one(ready)


def _tell_loop(loop: Any, told: Any) -> None:
    """Tell a coroutine that waits on an event loop, from any thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
        loop.call_soon_threadsafe(_resolve, told)


def _resolve(told: Any) -> None:
    """Let a coroutine go on that waits for this future."""
    if not told.done():  # it was cancelled, or is told a second time
        told.set_result(None)


def _own_copy(error: Exception) -> Exception:
    """Return a copy of an error that several threads raise, each with its traceback."""
    import copy

    try:
        own = copy.copy(error)
    except Exception:  # of a class that can't be copied
        return error
    own.__cause__ = error.__cause__
    return own.with_traceback(error.__traceback__)


class _Lanes:
    """The lanes of one process."""

    def __init__(self) -> None:
        self.lanes: dict[tuple[Sender, str], _Lane] = {}
        #: whose destination can be told without a file or a client being opened first
        self.looked_up: set[Priority] = set()
        # The threads that are inside of a lane. They wait for no other call, and so
        # there is no circle of calls that wait for each other.
        self.busy: set[int] = set()

    def lane_of(self, ready: _Ready) -> _Lane:
        """Return the lane of a message."""
        key = ready.sender, ready.destination
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.lanes.setdefault(key, _Lane(*key, self.busy))  # one step
        return lane


_lanes = _PerProcess(_Lanes)


def _forget_lanes() -> None:
    """Let the next dispatches begin anew, with other senders."""
    lanes = _lanes.get()
    lanes.lanes.clear()
    lanes.looked_up.clear()


settings.on_change.append(_forget_lanes)


def _send_all_ready(readies: Sequence[_Ready]) -> None:
    """Send messages, or add them to the batch around this call.

    :raises PartialFailure: with those that were not accepted
    """
    if _collect(readies):
        return
    if settings.TASKHAWK_SYNC:
        for ready in readies:
            _send_one(ready)
        return
    places: dict[tuple[Sender, str], list[int]] = {}
    for place, ready in enumerate(readies):
        places.setdefault((ready.sender, ready.destination), []).append(place)
    refused: dict[int, Refusal] = {}  # by the place among all messages
    for (sender, destination), mine in places.items():
        entries = [readies[place].entry for place in mine]
        for index, refusal in _send_all(sender, destination, entries).items():
            refused[mine[index]] = refusal
    if refused:
        raise _partial_failure(readies, refused)


def _partial_failure(
    readies: Sequence[_Ready], refused: Mapping[int, Refusal]
) -> PartialFailure:
    """Return the error that lists which messages were refused, and why."""
    successful = [
        {"Id": ready.message.id}
        for place, ready in enumerate(readies)
        if place not in refused
    ]
    failed, unsent = [], []
    for place, refusal in sorted(refused.items()):
        ready = readies[place]
        failed.append(
            {"Id": ready.message.id, "Code": refusal.code, "Message": refusal.text}
        )
        # As it was encoded: its arguments may have changed since.
        message = _decode(ready.entry.body)
        message.delay_s = ready.entry.delay_s
        message.group_id = ready.entry.group_id
        unsent.append(message)
    return PartialFailure({"Successful": successful, "Failed": failed}, unsent=unsent)


_SIZE_KNOWN_S = 1  # a queue is asked for its size no more often


class _QueueSizes:
    """How many messages the queues have, as far as this process knows.

    SQS counts what is sent some seconds late, so between two looks at a queue what this
    process sends is counted here.
    """

    def __init__(self) -> None:
        # Held while a queue is asked, so that threads do not all ask. Reentrant: a
        # signal handler or a __del__ may dispatch while its thread has it.
        self._lock = threading.RLock()
        self._sizes: dict[tuple[Broker, str], int] = {}
        self._known_until: dict[tuple[Broker, str], float] = {}

    def count(self, broker: Broker, queue: str, most: int) -> int:
        """Count one message more, unless the queue is full; return how many it has."""
        key = broker, queue
        with self._lock:
            if time.monotonic() >= self._known_until.get(key, -math.inf):
                self._sizes[key] = sum(broker.depth(queue))
                self._known_until[key] = time.monotonic() + _SIZE_KNOWN_S
            size = self._sizes[key]
            if size < most:
                self._sizes[key] = size + 1
            return size


_queue_sizes = _PerProcess(_QueueSizes)


def _max_queue_size(message: Message) -> int | None:
    """Return the `max_queue_size` of a message's task; None if it has none."""
    its_task = _registry.get(message.task_name)
    if its_task is None:
        return None
    return its_task.options.get("max_queue_size")


def _refuse_if_full(message: Message) -> None:
    """Raise QueueFull if the queue has the `max_queue_size` of the message's task."""
    most, sender = _max_queue_size(message), _brokers.sender()
    if isinstance(sender, SnsSender):
        raise ConfigurationError(
            f"{message.task_name}: max_queue_size needs a queue, and SNS has none"
        )
    if most is None or not hasattr(sender, "depth"):  # in sync mode, say
        return
    queue = sender.destination(message.priority)
    broker = typing.cast("Broker", sender)
    size = _queue_sizes.get().count(broker, queue, most)
    if size >= most:
        text = (
            f"{message.task_name}: {queue} has {size} messages, and max_queue_size is"
            f" {most}"
        )
        raise QueueFull(text, queue, size, most)


def _check_max_queue_size(made: Task[Any, Any], value: object) -> None:
    """Check the option of :func:`task`."""
    if type(value) is not int or value < 1:
        raise ConfigurationError(
            f"{made.name} has max_queue_size={value!r}: expected a whole number above 0"
        )


_more_options["max_queue_size"] = _check_max_queue_size


class Captured(NamedTuple):
    """A dispatch that :func:`capture` collected, with what the worker would get.

    So a tuple has become a list, a Decimal a number, and the key of a dict a string.
    """

    task: str
    args: list[Any]
    kwargs: dict[str, Any]
    headers: dict[str, Any]
    priority: Priority
    delay_s: float
    id: str
    group_id: str | None = None


class _CapturingSender(Sender):
    """Adds messages to a list; it needs no setting, and takes what SQS takes."""

    max_bytes = _MAX_SQS_BYTES
    max_delay_s = math.inf

    def __init__(self, calls: list[Captured]) -> None:
        self._calls = calls

    def destination(self, priority: Priority) -> str:
        return priority.name

    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        for entry in entries:
            message = _decode(entry.body)
            call = Captured(
                message.task_name,
                message.args,
                message.kwargs,
                message.headers,
                message.priority,
                entry.delay_s,
                message.id,
                entry.group_id,
            )
            self._calls.append(call)
        return []


@contextlib.contextmanager
def capture() -> Iterator[list[Captured]]:
    """Collect what this process dispatches instead of sending it, for tests.

    Arguments are bound, checked and encoded as for real, so what can't be sent raises
    here too. No setting is needed, and nothing runs.

    :returns: a context manager; its list grows with each dispatch
    """
    calls: list[Captured] = []
    outer = _brokers.captured_by
    _brokers.captured_by = _CapturingSender(calls)  # type: ignore[abstract]
    try:
        yield calls
    finally:
        _brokers.captured_by = outer


# === PART IV: WORK ====================================================================

__all__ += [
    "Fate",
    "Ledger",
    "Outcome",
    "Worker",
    "listen_async",
    "listen_for_messages",
    "process",
    "process_messages_for_lambda_consumer",
]


# --- 13. processing -------------------------------------------------------------------
# process() is the ONE place that decides what becomes of a message, and _verdict() is
# its table. It does no queue I/O: the worker and Lambda apply its Outcome. It raises
# only what must end the process: Control-C, and the exit of a signal handler. Each run
# leaves one log record, on one line but for the task's own text and traceback; invalid
# messages leave one in ten seconds for each class of error.


class Fate(enum.Enum):
    """What becomes of a message; a worker carries it out.

    In Lambda ``retry`` and ``dead_letter`` are failures, and Lambda decides.
    """

    acknowledge = "acknowledge"  # it is done: delete it
    retry = "retry"  # make it visible again
    dead_letter = "dead_letter"  # copy it to the dead-letter queue, then delete it
    postpone = "postpone"  # send a copy with a delay to the same queue, then delete it


_POSTPONE_S = 60  # where a PostponeException does not say how long


class Outcome(NamedTuple):
    """How a run ended: the fate of its message, and the error if the run failed.

    ``delay_s`` is how many seconds from now the message is to run again. If it is None,
    the message reappears when the lease in force ends, without a call.
    """

    fate: Fate
    error: BaseException | None = None
    delay_s: float | None = None


# What surrounds a run, in the order in which it is entered: the task's call, and the
# post hook, which may be the commit. Later parts add theirs; one returns None for a run
# that it does not surround. What one raises when it is entered, such as
# PostponeException or IgnoreException, is the run's end.
_around_runs: list[
    Callable[
        [Task[Any, Any], QueueMessage],
        contextlib.AbstractContextManager[object, bool | None] | None,
    ]
] = []


@_in_own_context
def process(received: QueueMessage) -> Outcome:
    """Run a received message through hooks, decoder and task, and decide its fate.

    Nothing is changed on the queue: the caller does what the Outcome says. The same
    function runs in a worker, in its child processes and in Lambda.

    :param received: from any source; ``message`` is set once it is known to be valid
    :returns: the message's fate, the error if the run failed, and when to run it again
    :raises KeyboardInterrupt: on Ctrl-C
    :raises SystemExit: of a signal handler; that of a task or hook is a failed run
    """
    began = time.monotonic()
    _refresh_django_connections()
    try:
        _run(received, began)
    except BaseException as error:  # SystemExit and CancelledError are failed runs too
        _raise_interrupt(error)
        return _failed(received, error, began)
    finally:
        # After a failed run too: the connection may be why it failed.
        _refresh_django_connections(ran=True)
    return Outcome(Fate.acknowledge)


def _run(received: QueueMessage, began: float) -> None:
    """Run the hooks and the task, and catch nothing but the task's IgnoreException."""
    message = _begin_run(received)
    its_task, around = message.task, contextlib.ExitStack()

    def call() -> None:
        _surround(around, its_task, received)
        its_task.call(message, received.receipt_handle)

    _end_run(received, began, around, call)


def _begin_run(received: QueueMessage) -> Message:
    """Run the pre hook, and decode the message."""
    _call_hook("TASKHAWK_PRE_PROCESS_HOOK", received)
    message = _decode(received.body)
    _find_task(message.task_name)
    received.message = message  # from here on, an error is the task's
    message.received = received
    _log.debug("Received message", extra={"message_body": received.body})
    return message


def _surround(
    around: contextlib.ExitStack, its_task: Task[Any, Any], received: QueueMessage
) -> None:
    """Begin what surrounds a run."""
    for surround in _around_runs:
        manager = surround(its_task, received)
        if manager is not None:
            around.enter_context(manager)


def _end_run(
    received: QueueMessage,
    began: float,
    around: contextlib.ExitStack,
    call: Callable[[], object],
) -> None:
    """Call the task, run the post hook, end what surrounds the run, and log it."""
    level, outcome, end = received.done_level, "done", "finished"
    with around:
        try:
            call()
        except BaseException as error:
            if not _are_all(IgnoreException, error):
                raise
            level, outcome, end = logging.INFO, "ignored", f"ignored{_reason(error)}"
        finally:
            # Else a cycle keeps the body until it is collected.
            typing.cast("Message", received.message).received = None
        _call_hook("TASKHAWK_POST_PROCESS_HOOK", received)
    if _log.isEnabledFor(level):
        facts = _facts(received, outcome, began)
        text = f"{_name_of(received)}: attempt {received.attempt} {end}"
        _log.log(level, "%s", text, extra=facts)
    _report_run(received, outcome, None, began)


def _are_all(kind: type[BaseException], error: BaseException) -> bool:
    """Return whether an error, or each one of an exception group, is of this class."""
    return all(isinstance(leaf, kind) for leaf in _leaves(error))


def _call_hook(name: str, received: QueueMessage) -> None:
    """Call the pre or post hook if there is one; its error fails the run."""
    hook = getattr(settings, name)
    if hook:
        hook(**received.hook_kwargs)


def _failed(received: QueueMessage, raised: BaseException, began: float) -> Outcome:
    """Decide the fate of a failed run's message, log it, and tell the hooks.

    :param began: when the run began, by ``time.monotonic()``
    """
    outcome = _verdict(received, raised)
    error = outcome.error or raised
    _log_failed(received, outcome, error, began)
    _report_run(received, outcome.fate.value, error, began)
    return outcome


def _log_failed(
    received: QueueMessage, outcome: Outcome, error: BaseException, began: float
) -> None:
    """Log how a run failed, and tell the error hook if it is an error."""
    spoken = [leaf for leaf in _leaves(error) if isinstance(leaf, LoggingException)]
    facts = _facts(received, outcome.fate.value, began)
    if _is_invalid(received, error):
        text = _text_of_invalid(received, error)
        if text is None:
            return
        _log.error("%s", text, extra=facts)
    elif outcome.fate is Fate.postpone:
        text = _sentence(received, "was postponed", outcome) + _reason(error)
        _log.debug("%s", text, extra=facts)
        return
    elif _is_asked_for(outcome, error):
        level = logging.INFO if outcome.fate is Fate.retry else logging.WARNING
        text = _sentence(received, "asked to be retried", outcome) + _reason(error)
        _log.log(level, "%s", text, extra=facts)
        return
    elif spoken:
        facts |= _extra_of(spoken[0])
        _log.error("%s", _text_of(spoken[0]), exc_info=error, extra=facts)
    else:
        text = _sentence(received, "failed", outcome)
        _log.error("%s", text, exc_info=error, extra=facts)
    _call_safely("TASKHAWK_ERROR_HOOK", exception=error, message=received.message)


def _is_asked_for(outcome: Outcome, error: BaseException) -> bool:
    """Return whether a run asked to be retried, and its failure is no error."""
    leaves = list(_leaves(error))
    asked = [leaf for leaf in leaves if isinstance(leaf, RetryException)]
    if len(asked) < len(leaves):
        return False
    return outcome.fate is Fate.retry or not any(leaf.log_error for leaf in asked)


def _report_run(
    received: QueueMessage, end: str, error: BaseException | None, began: float
) -> None:
    """Tell the run hook how a run ended, in the words of its log record."""
    _call_safely(
        "TASKHAWK_RUN_HOOK",
        message=received.message,
        outcome=end,
        exception=error,
        duration_ms=_duration_ms(began),
    )


def _duration_ms(began: float) -> int:
    """Return how long a run has taken until now."""
    return round((time.monotonic() - began) * 1000)


def _verdict(received: QueueMessage, error: BaseException) -> Outcome:
    """Decide the fate of a message whose run raised; the first row that fits counts.

    ==========================================  ==================================
    not valid, or its task is unknown here      left to the queue's redrive policy
    it was postponed (PostponeException)        a copy is sent with a delay
    the task raised StopRetry or never retries  dead letter
    the last receive that the queue allows      dead letter
    it asked for a delay (RetryException)       visible again after it
    the pre hook failed                         left to its visibility timeout
    there is no retry policy                    left to its visibility timeout
    the retry policy gives a delay              visible again after it
    the retries are used up                     dead letter
    the retry policy fails                      left to its visibility timeout
    ==========================================  ==================================

    The retry policy is that of the RetryException, or else the task's, or else
    TASKHAWK_RETRY. An exception group is retried if all its errors may be, and the
    longest delay that one of them asks for counts. It is postponed if all ask for that.
    """
    if _is_invalid(received, error):
        return Outcome(Fate.retry, error)
    if _are_all(PostponeException, error) and _can_be_copied(received):
        return Outcome(Fate.postpone, error, _postpone_s(received, error))
    wanted = _wanted(received, error)
    if wanted.fate is Fate.retry and received.is_last_receive:
        return Outcome(Fate.dead_letter, wanted.error)
    return wanted


def _is_invalid(received: QueueMessage, error: BaseException) -> bool:
    """Return whether the message was found not to be valid, or for no task here."""
    return received.message is None and isinstance(error, ValidationError)


def _can_be_copied(received: QueueMessage) -> bool:
    """Return whether a copy can take a message's place in its queue.

    A FIFO queue would deliver the copy after others of its group.
    """
    return received.queue is not None and not received.is_fifo


def _postpone_s(received: QueueMessage, error: BaseException) -> float:
    """Return for how long a message is postponed: no longer than its queue can."""
    delay_s = max(_asked_delays_s(_leaves(error)), default=_POSTPONE_S)
    most_s: float = _MAX_HELD_S  # in a child whose worker has the queue in its memory
    if received.broker is not None:
        most_s = received.broker.max_delay_s
    return min(delay_s, most_s)


def _wanted(received: QueueMessage, error: BaseException) -> Outcome:
    """Decide as if the queue allowed any number of receives."""
    leaves = list(_leaves(error))
    if received.message is None:  # no policy gives up what was never started
        return Outcome(Fate.retry, error, _longest_s(_asked_delays_s(leaves)))
    task = received.message.task
    if not all(_may_retry(task, leaf) for leaf in leaves):
        return Outcome(Fate.dead_letter, error)
    try:
        delay_s = _delay_s(received.message, leaves, received.attempt)
    except StopRetry:
        return Outcome(Fate.dead_letter, error)
    except BaseException as defect:  # of the policy: it must not lose the message
        _raise_interrupt(defect)
        return Outcome(Fate.retry, defect)
    return Outcome(Fate.retry, error, delay_s)


def _delay_s(
    message: Message, leaves: Sequence[BaseException], attempt: int
) -> float | None:
    """Return the seconds until the next run; None leaves it to the lease in force.

    :raises StopRetry: if the retries are used up
    :raises Exception: if a policy fails
    """
    delays_s = _asked_delays_s(leaves)
    asked = [leaf for leaf in leaves if isinstance(leaf, RetryException)]
    # A subclass that does not call our __init__ may have set anything.
    policies = [leaf.retry for leaf in asked if callable(leaf.retry)]
    if not (delays_s or policies):
        own = _options_of(message).retry or _policy_of(message.task)
        if own is None:
            return None
        policies = [own]
    delays_s += [_ask_policy(policy, message.task, attempt) for policy in policies]
    return _longest_s(delays_s)


def _longest_s(delays_s: Sequence[float]) -> float | None:
    """Return the longest delay, cut to what SQS allows, or None if there is none."""
    if not delays_s:
        return None
    return min(max(delays_s), _MAX_HELD_S)


def _policy_of(task: Task[Any, Any]) -> Callable[[int], float] | None:
    """Return the task's retry policy, or else the default one, or None."""
    if task.retry is not None:
        return task.retry
    default: Callable[[int], float] | None = settings.TASKHAWK_RETRY
    return default


def _ask_policy(
    policy: Callable[[int], float], task: Task[Any, Any], attempt: int
) -> float:
    """Return the delay that a retry policy gives."""
    delay_s = policy(attempt)
    if not _is_delay(delay_s):
        raise ConfigurationError(
            f"{task.name}: retry: expected 0 or more seconds, got {delay_s!r}"
        )
    return delay_s


def _asked_delays_s(leaves: Iterable[BaseException]) -> list[float]:
    """Return the delays that RetryExceptions ask for."""
    asked = [leaf.delay_seconds for leaf in leaves if isinstance(leaf, RetryException)]
    # A subclass that does not call our __init__ may have set anything.
    return [*filter(_is_delay, asked)]


def _may_retry(task: Task[Any, Any], error: BaseException) -> bool:
    """Return whether a task may run again after this error."""
    if isinstance(error, (RetryException, IgnoreException)):
        return True
    if isinstance(error, (StopRetry, task.never_retry_on)):
        return False
    return isinstance(error, task.retry_on)


def _sentence(received: QueueMessage, end: str, outcome: Outcome) -> str:
    """Say which attempt ended how, and what becomes of the message."""
    then = _what_follows(received, outcome)
    return f"{_name_of(received)}: attempt {received.attempt} {end} and {then}"


def _what_follows(received: QueueMessage, outcome: Outcome) -> str:
    """Say what becomes of a failed run's message."""
    if outcome.fate is Fate.postpone:
        return f"runs again in {outcome.delay_s:g} s"
    if received.in_lambda:
        return "is left to Lambda"
    if outcome.fate is Fate.dead_letter and received.is_last_receive:
        return "is given up: the queue allows no further receive"
    if outcome.fate is Fate.dead_letter:
        return "is given up"
    if outcome.delay_s is None:
        return "is left to the queue"
    if outcome.delay_s < _MAX_HELD_S:
        return f"runs again in {outcome.delay_s:g} s"
    return f"runs again in {_MAX_HELD_S} s, the most that SQS allows"


def _name_of(received: QueueMessage) -> str:
    """Return what log texts call a message: its task, its own id and the service's."""
    name = f"message {_in_one_line(received.message_id)}"
    if received.message is None:
        return name
    message = received.message
    return f"{_in_one_line(f'{message.task_name} {message.id}')} ({name})"


def _reason(error: BaseException) -> str:
    """Return what a task said when it raised, as the end of a sentence."""
    texts = [_in_one_line(_text_of(leaf)) for leaf in _leaves(error)]
    said = "; ".join(filter(None, texts))
    if not said:
        return ""
    return f": {said}"


def _in_one_line(text: str) -> str:
    """Return free text as one short line: it can neither forge nor fill a log."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def _facts(received: QueueMessage, end: str, began: float) -> dict[str, Any]:
    """Return the fields of a run's log record, which formatters may use."""
    facts: dict[str, Any] = {"outcome": end, "duration_ms": _duration_ms(began)}
    message, attempt = received.message, received.attempt
    if message:
        facts |= {"task": message.task_name, "id": message.id, "attempt": attempt}
    return facts


def _extra_of(error: LoggingException) -> dict[str, Any]:
    """Return the fields that an error gives to its log record."""
    fields: dict[str, Any] = {}
    if isinstance(error.extra, Mapping):
        for name, value in error.extra.items():
            # Logging refuses a field of a name that every record has.
            prefix = "extra_" if name in _RECORD_FIELDS else ""
            fields[f"{prefix}{name}"] = value
    return fields


_INVALID_EVERY_S = 10  # a poisoned queue must not fill the disk with logs
# When an error of each class was last logged, and how many were not logged since.
_invalid_logged_at: dict[type, float] = {}
_invalid_unlogged: dict[type, int] = {}


def _text_of_invalid(received: QueueMessage, error: BaseException) -> str | None:
    """Return the log text of a message that is not valid, or None if it is too soon."""
    kind, now = type(error), time.monotonic()
    if now < _invalid_logged_at.get(kind, -math.inf) + _INVALID_EVERY_S:
        _invalid_unlogged[kind] = _invalid_unlogged.get(kind, 0) + 1
        return None
    _invalid_logged_at[kind] = now
    then = _what_follows(received, Outcome(Fate.retry, error))
    text = f"{_name_of(received)} {then}: {_text_of(error)}"
    unlogged = _invalid_unlogged.pop(kind, 0)
    if unlogged:
        text += f" ({unlogged} more like it since the last record)"
    return text


# Batch tasks.


_MAX_CALLS_TOGETHER = 100  # that a batch task gets


def _check_batch(made: Task[Any, Any], most: object) -> None:
    """Check the option `batch`: its function takes the calls, and so any arguments."""
    is_right = isinstance(most, int) and not isinstance(most, bool)
    if not (is_right and 1 <= typing.cast("int", most) <= _MAX_CALLS_TOGETHER):
        raise ConfigurationError(
            f"{made.name} has batch={most!r}: expected 1 to {_MAX_CALLS_TOGETHER}"
        )
    made._take_any_arguments()  # noqa: SLF001 - its own
    _batch_tasks.add(made.name)


_more_options["batch"] = _check_batch
_call_options.add("batch")
_batch_tasks: set[str] = set()  # their names; without any, nothing is decoded twice


def _find_batch_task(received: QueueMessage) -> str | None:
    """Return the name of a message's task if that is a batch task.

    A message of a FIFO queue waits for the one before it, and one with a time limit of
    its own is killed by itself: neither runs with others.
    """
    if not _batch_tasks or received.is_fifo:
        return None
    try:
        message = _decode(received.body)
        options = message.task.options
    except ValidationError:
        return None  # process() will say what is wrong with it
    if "batch" not in options or _options_of(message).time_limit is not None:
        return None
    return message.task_name


def _most_together(received: QueueMessage) -> int:
    """Return how many messages may run together with this one, itself included."""
    if received.batch_task is None:
        return 1
    return int(_registry[received.batch_task].options["batch"])


def _process_all(batch: Sequence[QueueMessage]) -> list[Outcome]:
    """Run messages that run together; return an outcome for each."""
    if len(batch) == 1:
        return [process(batch[0])]
    return _process_together(batch)


@_in_own_context
def _process_together(batch: Sequence[QueueMessage]) -> list[Outcome]:
    """Run messages of one batch task in one call, as :func:`process` runs one."""
    began = time.monotonic()
    _refresh_django_connections()
    try:
        runs = [_RunOfMany(received, began) for received in batch]
        for run in runs:
            run.begin()
        error = _call_together(run.call for run in runs if run.call)
        for run in runs:
            run.end(error)
        return [run.outcome() for run in runs]
    finally:
        _refresh_django_connections(ran=True)


def _call_together(ready: Iterable[Call]) -> BaseException | None:
    """Call the batch task for all messages that are ready; return its error."""
    calls = list(ready)
    if not calls:
        return None
    metadata = typing.cast("Metadata", calls[0].metadata)
    try:
        _registry[metadata.task]._call_together(calls)  # noqa: SLF001 - its own
    except BaseException as error:
        return error
    return None


class _RunOfMany:
    """The run of one message among several of a batch task.

    It goes the way of any run: an error of its own, of a hook or of what surrounds it,
    ends it alone.
    """

    def __init__(self, received: QueueMessage, began: float) -> None:
        self._received, self._began = received, began
        self._around = contextlib.ExitStack()
        self._has_begun = False  # the message is valid, and the pre hook is done
        self._error: BaseException | None = None
        self.call: Call | None = None  # once the task may be called for it

    def begin(self) -> None:
        """Do what comes before the task's call."""
        try:
            message = _begin_run(self._received)
            self._has_begun = True
            _surround(self._around, message.task, self._received)
            self.call = Call.of(message, self._received.receipt_handle)
        except BaseException as error:
            self._error = error

    def end(self, error: BaseException | None) -> None:
        """Do what comes after it.

        :param error: of the call, for all messages that have none of their own
        """
        if not self._has_begun:
            return
        if self.call is not None:
            self._error = error
            if self.call.error is not None:
                self._error = self.call.error
        shared = self._error
        trace = getattr(shared, "__traceback__", None)
        try:
            _end_run(self._received, self._began, self._around, self._raise)
        except BaseException as raised:
            self._error = raised
        else:
            self._error = None
        if shared is not None:
            # It is raised for one message after another: it is not to grow.
            shared.__traceback__ = trace

    def _raise(self) -> None:
        """End as the task's call did."""
        if self._error is not None:
            raise self._error

    def outcome(self) -> Outcome:
        """Return what becomes of the message; raise what must end the process."""
        if self._error is None:
            return Outcome(Fate.acknowledge)
        _raise_interrupt(self._error)
        return _failed(self._received, self._error, self._began)


class _SyncSender(Sender):
    """Runs messages where they are sent, through JSON, decoder and hooks.

    Errors come out of :meth:`send`: no policy, delay or dead-letter queue applies.
    """

    max_bytes, max_delay_s = sys.maxsize, math.inf

    def __init__(self, _url: str = "sync") -> None:
        """Need nothing: there is no service."""

    def destination(self, priority: Priority) -> str:
        """Return the name that the hooks get for a queue."""
        if settings.TASKHAWK_QUEUE:
            return super().destination(priority)
        return "TASKHAWK-SYNC"

    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        """Run the messages one after another; the first error ends it."""
        for entry in entries:
            message_id = _decode(entry.body).id
            received = QueueMessage(entry.body, message_id, queue=destination)
            received.message_attributes = entry.attributes
            if settings.IS_LAMBDA_APP:
                sns = {"Message": entry.body, "MessageId": message_id}
                received.sns_record = {"Sns": {**sns, "MessageAttributes": {}}}
            _in_own_context(_run_here)(received)
        return []


_schemes["sync"] = _SyncSender


def _run_here(received: QueueMessage) -> None:
    """Run a message; its error is the caller's, and the run hook is told."""
    began = time.monotonic()
    try:
        _run(received, began)
    except BaseException as error:
        _raise_interrupt(error)
        _report_run(received, "failed", error, began)
        raise


# --- 14. holdings ---------------------------------------------------------------------
# What becomes of a message that a worker holds. Pure: it is told the time, and it calls
# nothing; what it has to say is kept as news for the keeper to log. _STEPS is the one
# table of states, and _Held.move() the one place that changes one. Each message ends
# exactly once, and the ledger counts that end.

_STEPS = {  # the allowed steps of a message; nothing else moves one
    "received": {"started", "released"},
    "started": {"finished", "released"},
    "finished": {"acked", "retried", "dead_lettered", "postponed", "uncertain"},
}
_ACK_WAIT_S = 0.05  # how long an acknowledgement waits for others to share its call
_PATIENCE_S = 0.1  # how long any waits besides for the calls that are under way
_LATEST_S = _MAX_HELD_S - 10  # of a lease: SQS counts from a little before the receive


@dataclasses.dataclass
class Ledger:
    """How many messages a worker received, and what became of them.

    At the end, each message received is in exactly one of the other counts: ``acked``
    was deleted after its run, ``retried`` is visible again now or later,
    ``dead_lettered`` was copied and then deleted, ``postponed`` too, but into the same
    queue with a delay, ``released`` never ran, and ``uncertain`` means that nobody
    knows whether its delete was applied, so it may run again.
    """

    received: int = 0
    acked: int = 0
    retried: int = 0
    dead_lettered: int = 0
    postponed: int = 0
    released: int = 0
    uncertain: int = 0

    @property
    def balanced(self) -> bool:
        """Whether every message that was received ended in exactly one way."""
        return bool(2 * self.received == sum(dataclasses.astuple(self)))

    def count(self, end: str, number: int = 1) -> None:
        """Count messages more that ended so."""
        setattr(self, end, getattr(self, end) + number)

    def __str__(self) -> str:
        """Return it as the command prints it."""
        counts = dataclasses.asdict(self).items()
        return ", ".join(f"{count} {name.replace('_', '-')}" for name, count in counts)


class _Tally:
    """The ledger, and the same for each queue."""

    def __init__(self, queues: Iterable[str]) -> None:
        self.ledger = Ledger()
        self.ledgers = {queue: Ledger() for queue in queues}

    def count(self, queue: str, end: str, number: int = 1) -> None:
        """Count messages more of a queue that were received, or ended so."""
        self.ledger.count(end, number)
        self.ledgers[queue].count(end, number)


@dataclasses.dataclass(eq=False)
class _Held:
    """A message that a worker holds, from its receive to its end.

    Times are those of the worker's clock, in seconds.
    """

    message: QueueMessage
    queue: str  # its name
    lease_s: float  # how long each extension hides it
    lease_until: float  # before that, nobody else can receive it
    last_at: float  # no lease can end later
    renew_at: float = math.inf  # when its lease is to be extended; never, if infinite
    is_sure: bool = True  # its lease is known to hold, so that it may be started
    state: str = "received"
    started_at: float = math.inf  # when its run began
    end: str = ""  # what it is to become; it is held until that is done
    delay_s: float = 0  # after which it is visible again, if that is its end
    decided_at: float = math.inf  # when that was known
    due_at: float = math.inf  # when the call that ends it is to be made at the latest
    tries: int = 0  # how often that call has failed
    is_run: bool = False  # it is counted as a run: others may run together with it
    in_call: bool = False  # a call with it is under way, so that no other is made

    @property
    def receipt(self) -> str:
        """What the queue's calls know this receive by."""
        return typing.cast("str", self.message.receipt_handle)

    @property
    def runs(self) -> bool:
        """Whether it was started, and it is not decided yet what it becomes."""
        return self.state == "started" and not self.end

    @property
    def to_delete(self) -> bool:
        """Whether a delete ends it."""
        return self.end in {"acked", "dead_lettered", "postponed"}

    @property
    def needs_copy(self) -> bool:
        """Whether its queue would dead-letter it, though it never ran, if it showed it.

        It waits for the end of the worker then, when a copy is sent in its place.
        """
        return self.is_sure and self.message.would_be_redriven

    def begin(self, now: float) -> None:
        """Note that its run begins."""
        self.move("started")
        self.started_at = now

    def move(self, state: str) -> None:
        """Make a step, or raise RuntimeError if _STEPS does not allow it."""
        if state not in _STEPS.get(self.state, ()):
            raise RuntimeError(f"a message can't go from {self.state} to {state}")
        self.state = state


class _Kind(enum.Enum):
    """The calls that a keeper makes; the value completes "can't …" in its logs."""

    extend = "extend leases"
    delete = "delete"
    delay = "set delays"


class _Call(NamedTuple):
    """A batch call that is due: at most ten messages of one queue."""

    kind: _Kind
    queue: str
    batch: list[_Held]
    asked_at: float

    def entries(self) -> list[Any]:
        """Return what the broker's method takes for each message."""
        if self.kind is _Kind.delete:
            return [held.receipt for held in self.batch]
        return [(held.receipt, self._hidden_s(held)) for held in self.batch]

    def _hidden_s(self, held: _Held) -> float:
        """Return for how long to hide a message: SQS allows 12 hours in all."""
        wanted_s = held.delay_s
        if self.kind is _Kind.extend:
            wanted_s = held.lease_s
        return max(0, min(wanted_s, held.last_at - self.asked_at))


class _Leases:
    """The leases that are to be extended, and when."""

    def __init__(self) -> None:
        self._held: dict[_Held, None] = {}  # an ordered set
        self._next_at = math.inf  # none is to be extended before

    def renew(self, held: _Held, at: float) -> None:
        """Have a lease extended at this time."""
        held.renew_at = at
        self._held[held] = None
        self._next_at = min(self._next_at, at)

    def drop(self, held: _Held) -> None:
        """Have a lease extended no more."""
        self._held.pop(held, None)
        held.renew_at = math.inf

    def due(self, now: float) -> list[_Held]:
        """Return what is to be extended now and is in no call, in order of its end."""
        if now < self._next_at:
            return []
        free = [held for held in self._held if not held.in_call]
        self._next_at = min((held.renew_at for held in free), default=math.inf)
        due = [held for held in free if held.renew_at <= now]
        return sorted(due, key=operator.attrgetter("lease_until"))

    def next_at(self) -> float:
        """Return a time before which none is to be extended."""
        return self._next_at


class _Backlog:
    """The messages that wait to be started, the most urgent first."""

    def __init__(self, queues: Iterable[str]) -> None:
        self._of: dict[str, dict[_Held, None]] = {each: {} for each in queues}

    def add(self, held: _Held) -> None:
        """Have a message wait, behind those of its queue."""
        self._of[held.queue][held] = None

    def drop(self, held: _Held) -> None:
        """Have a message wait no more, if it does."""
        self._of[held.queue].pop(held, None)

    def __contains__(self, held: _Held) -> bool:
        return held in self._of[held.queue]

    def __iter__(self) -> Iterator[_Held]:
        for those in self._of.values():
            yield from those

    def counts(self) -> list[int]:
        """Return how many there are of each queue, the most urgent first."""
        return [len(those) for those in self._of.values()]

    def first(self, now: float) -> _Held | None:
        """Return the first whose lease is known to hold, or to have ended."""
        for held in self:
            if held.is_sure or now >= held.lease_until:
                return held
        return None

    def like(self, first: _Held, now: float) -> Iterator[_Held]:
        """Yield what may run together with a message of a batch task."""
        for held in self._of[first.queue]:
            is_like = held.message.batch_task == first.message.batch_task
            if is_like and held.is_sure and now < held.lease_until:
                yield held


class _Holdings:
    """The messages that a worker holds, and what is due for them.

    It has no lock: whoever shares it between threads guards every call and field.

    :param queues: the names of the queues, the most urgent first
    :param ack_wait_s: how long an acknowledgement waits for others to share its call
    """

    def __init__(self, queues: Sequence[str], ack_wait_s: float = _ACK_WAIT_S) -> None:
        self.tally = _Tally(queues)
        self.ledger = self.tally.ledger
        self.news: list[tuple[int, str]] = []  # log levels and texts
        self.unanswered = 0  # deletes that were not known to be applied in the end
        self._is_closing = False
        self._ack_wait_s = ack_wait_s
        self.held: dict[_Held, None] = {}  # an ordered set, as are the following
        self.backlog = _Backlog(queues)  # received and not started
        self.decided: dict[_Held, None] = {}  # it is known what they become
        self.running = 0  # runs under way; messages that run together are one
        self.leases = _Leases()
        self.calls = _Calls(self, queues)

    @property
    def waiting(self) -> int:
        """How many messages wait to be started."""
        return sum(self.backlog.counts())

    def still_run(self) -> list[QueueMessage]:
        """Return the messages that run."""
        return [held.message for held in self.held if held.runs]

    # From a receive to the end of a run.

    def take(
        self,
        messages: Sequence[QueueMessage],
        lease_s: float,
        asked_at: float,
        now: float,
    ) -> None:
        """Hold the messages of a receive from now on.

        The service hid them at some time between the call and its answer. Where that
        took most of the lease, none is started before an extension shows that its lease
        still holds.

        :param lease_s: for how long the receive asked to hide them
        :param asked_at: when the receive was called
        """
        is_sure = now - asked_at <= lease_s * 2 / 3
        lease_until = asked_at + lease_s
        if not is_sure:
            lease_until = now + lease_s
        for message in messages:
            held = _Held(
                message,
                message.queue or "",
                lease_s,
                lease_until=lease_until,
                last_at=asked_at + _LATEST_S,
                is_sure=is_sure,
            )
            self.held[held] = None
            self.backlog.add(held)
            self.leases.renew(held, asked_at + lease_s / 3)
        if messages:
            self.tally.count(messages[0].queue or "", "received", len(messages))

    def start(self, now: float) -> _Held | None:
        """Start the most urgent message whose lease holds; return it, or None."""
        while (held := self.backlog.first(now)) and now >= held.lease_until:
            self.lose(held, "its lease ended while it waited")
        if held:
            self.backlog.drop(held)
            held.begin(now)
            held.is_run = True
            self.running += 1
        return held

    def start_more(self, first: _Held, most: int, now: float) -> list[_Held]:
        """Start others of a batch task, so that at most so many run with the first."""
        more = list(itertools.islice(self.backlog.like(first, now), most - 1))
        for held in more:
            self.backlog.drop(held)
            held.begin(now)
        return more

    def finish(
        self, held: _Held, end: str, now: float, delay_s: float | None = 0
    ) -> None:
        """Note that a run is over, and what its message is to become.

        :param end: one of the ends that _STEPS allows
        :param delay_s: until a retried message is visible; None: when its lease ends
        """
        held.move("finished")
        self._decide(held, end, now, delay_s)

    def release(self, held: _Held, now: float) -> None:
        """Note that a message did not run after all: it is to be visible at once."""
        self.backlog.drop(held)
        self._decide(held, "released", now, 0)

    def release_waiting(self, now: float) -> None:
        """Release all messages that were not started, but what needs a copy for it."""
        for held in tuple(self.backlog):
            if not held.needs_copy:
                self.release(held, now)

    def _decide(self, held: _Held, end: str, now: float, delay_s: float | None) -> None:
        """Note what a message is to become, and when the call for it is due."""
        self.decided[held] = None
        if held.is_run:
            held.is_run = False
            self.running -= 1
        held.end, held.decided_at, held.due_at = end, now, now
        if held.to_delete:
            if not held.message.is_fifo:  # else others of its group wait for it
                held.due_at = now + self._ack_wait_s
        elif delay_s is None or held.message.lease_lost:
            # It shows by itself at the end of its lease, or another has it by now.
            self.end(held, end)
            return
        else:
            # Out of the lease first: a later extension would undo the delay.
            self.leases.drop(held)
            held.delay_s = delay_s
        self.calls.add(held)

    # The end.

    def expire(self, now: float) -> None:
        """Give up the leases that ended, and those that can't be extended any more."""
        for held in self.leases.due(now):
            if held.last_at - now < 1:
                self.lose(held, "it was received 12 hours ago")
            elif now >= held.lease_until:
                self.lose(held, "its lease ended before it could be extended")

    def untried(self, since: float) -> bool:
        """Return whether a message ended after that time, and no call has said so."""
        new = (held for held in self.decided if held.tries == 0)
        return any(held.decided_at >= since for held in new)

    def end_leases(self) -> None:
        """Extend leases no more: they bound how long deletes are tried."""
        self._is_closing = True
        for held in self.held:
            self.leases.drop(held)

    def close(self) -> None:
        """End what is decided, done or not; what still runs stays held."""
        self.calls.clear()
        for held in [*self.backlog, *self.decided]:
            end = held.end or "released"
            if held.to_delete:
                end = "uncertain"
            self.end(held, end)

    def lose(self, held: _Held, why: str) -> None:
        """Note that others may have a message; if it waits, it is not started."""
        self.warn(held, f"may run twice: {why}")
        held.message.lease_lost = True
        held.lease_until = -math.inf
        self.leases.drop(held)
        if held in self.backlog:
            self.end(held, "released")

    def doubt(self, held: _Held, why: str) -> None:
        """End a message of which nobody knows whether its delete was applied."""
        self.warn(held, f"may run again: {why}")
        self.end(held, "uncertain")

    def end(self, held: _Held, end: str) -> None:
        """End a message: the ledger counts it, and nothing more is done for it."""
        held.move(end)
        self.tally.count(held.queue, end)
        self.leases.drop(held)
        self.backlog.drop(held)
        for those in (self.held, self.decided):
            those.pop(held, None)
        if self._is_closing and end == "uncertain":
            self.unanswered += 1

    def warn(self, held: _Held, text: str) -> None:
        """Keep a warning about a message for the log."""
        self.news.append((logging.WARNING, f"{_name_of(held.message)} {text}"))


class _Ends:
    """What one queue's deletes, or its delays, are to end: decided, and in no call.

    What a message costs here does not grow with how many there are.
    """

    def __init__(self, kind: _Kind, queue: str) -> None:
        self.kind, self.queue = kind, queue
        self._new: dict[_Held, None] = {}  # an ordered set, by time
        # What was refused before, as a heap: it is not tried before its time only
        # because others are due.
        self._again: list[tuple[float, int, _Held]] = []
        self._is_failing = False  # whether all was refused in the last call

    def __len__(self) -> int:
        return len(self._new) + len(self._again)

    @property
    def is_full(self) -> bool:
        """Whether new ones fill a call: nothing is to be gained by waiting for more."""
        return len(self._new) >= _MAX_BATCH

    def add(self, held: _Held) -> None:
        """Have a message ended by one of the next calls."""
        if held.tries:
            heapq.heappush(self._again, (held.due_at, id(held), held))
        else:
            self._new[held] = None

    def remove(self, held: _Held) -> None:
        """Leave a message out, whose lease is to be extended before."""
        self._new.pop(held, None)
        if held.tries:  # seldom: deletes fail while leases are extended
            self._again = [each for each in self._again if each[-1] is not held]
            heapq.heapify(self._again)

    def due_at(self, patience_s: float, *, is_last: bool) -> float:
        """Return when a call is to be made; infinity if none is.

        :param patience_s: how much later than it is due, if it is not full
        :param is_last: whether no others can come to share it
        """
        due_at = math.inf
        if self._again:
            due_at = self._again[0][0] + patience_s
        if not self._new:
            return due_at
        first = next(iter(self._new))
        if self.is_full:
            return min(due_at, first.decided_at)
        if is_last:
            return min(due_at, first.decided_at + patience_s)
        return min(due_at, first.due_at + patience_s)

    def answered(self, call: _Call, refused: Mapping[int, Refusal]) -> None:
        """Note whether calls work; once they do again, all that was refused is due.

        Else leases might end during the pauses, though nothing is wrong any more.
        """
        works = len(refused) < len(call.batch)
        if works and self._is_failing:
            again, self._again = self._again, []
            for _, _, held in again:
                held.due_at = call.asked_at
                self.add(held)
        self._is_failing = not works

    def take(self, now: float) -> list[_Held]:
        """Return what the next call is to end; all new ones share it."""
        batch: list[_Held] = []
        while self._again and self._again[0][0] <= now and len(batch) < _MAX_BATCH:
            batch.append(heapq.heappop(self._again)[-1])
        batch += itertools.islice(self._new, _MAX_BATCH - len(batch))
        for held in batch:
            self._new.pop(held, None)
        return batch


class _Calls:
    """The calls that are due for what a worker holds, and what their answers mean.

    Pure, as the holdings are, and guarded with them. Any number of calls may be under
    way; a message is in one of them at most.
    """

    def __init__(self, holdings: _Holdings, queues: Iterable[str]) -> None:
        self._all, self._queues = holdings, queues
        self._last: _Kind | None = None
        self._under_way = 0
        self.clear()

    @property
    def left(self) -> int:
        """How many messages are decided and in no call."""
        return sum(map(len, self._ends.values()))

    @property
    def is_overdue(self) -> bool:
        """Whether two full batches are decided and in no call: the keeper is behind."""
        two_calls = 2 * _MAX_BATCH
        return len(self._all.decided) >= two_calls and self.left >= two_calls

    def add(self, held: _Held) -> None:
        """Have a message ended that is decided, once it is in no call."""
        if not held.in_call:
            self._ends_of(held).add(held)

    def _ends_of(self, held: _Held) -> _Ends:
        """Return where a message waits for the call that ends it."""
        if held.to_delete:
            return self._ends[held.queue, _Kind.delete]
        return self._ends[held.queue, _Kind.delay]

    def clear(self) -> None:
        """Have no message ended any more."""
        self._ends = {
            (queue, kind): _Ends(kind, queue)
            for queue in self._queues
            for kind in (_Kind.delete, _Kind.delay)
        }

    def next(self, now: float) -> _Call | None:
        """Return the call to make now, if one is due, and mark its messages as in it.

        Leases come first, for a message whose lease ends may run twice; but one call of
        the others follows, or extensions that hang would starve them. Of these comes
        first what has been due for longest.
        """
        leases = self._all.leases.due(now)  # first, for that looks when they are
        if self._leases_at() > now:
            leases = []
        ends = min(self._ends.values(), key=self._due_at)
        is_due = self._due_at(ends) <= now
        if leases and not (is_due and self._last is _Kind.extend):
            queue = leases[0].queue
            batch = [held for held in leases if held.queue == queue][:_MAX_BATCH]
            call = _Call(_Kind.extend, queue, batch, now)
            for held in batch:
                self._ends_of(held).remove(held)
        elif is_due:
            call = _Call(ends.kind, ends.queue, ends.take(now), now)
        else:
            return None
        for held in call.batch:
            held.in_call = True
        self._last = call.kind
        self._under_way += 1
        return call

    def next_at(self) -> float:
        """Return when to look for the next call; infinity if none will be due."""
        due_at = [self._due_at(ends) for ends in self._ends.values() if ends]
        return min([self._leases_at(), *due_at])

    def _leases_at(self) -> float:
        """Return a time before which no leases are to be extended."""
        return self._all.leases.next_at() + self._patience_s()

    def _due_at(self, ends: _Ends) -> float:
        """Return when the call for these is to be made."""
        is_last = len(self._all.decided) == len(self._all.held)
        return ends.due_at(self._patience_s(), is_last=is_last)

    def _patience_s(self) -> float:
        """Return how much later than it is due a call is made that is not full.

        Until then, one that is under way may be answered, and others come to share it.
        """
        if self._under_way:
            return _PATIENCE_S
        return 0

    def answered(self, call: _Call, refused: Mapping[int, Refusal]) -> None:
        """Note the answer to a call.

        :param refused: what was refused, by its place in the batch
        """
        self._under_way -= 1
        if call.kind is not _Kind.extend:
            self._ends[call.queue, call.kind].answered(call, refused)
        note = {
            _Kind.extend: self._extended,
            _Kind.delete: self._deleted,
            _Kind.delay: self._delayed,
        }[call.kind]
        for place, held in enumerate(call.batch):
            held.in_call = False
            # Else it was given up while the call was under way.
            if held in self._all.held:
                note(held, refused.get(place), call.asked_at)
            if held in self._all.decided:
                self.add(held)  # its run ended meanwhile, or its call is made again
            # Leases that are in a call are not looked at.
            if held.renew_at < math.inf:
                self._all.leases.renew(held, held.renew_at)

    def _extended(self, held: _Held, refusal: Refusal | None, asked_at: float) -> None:
        """Note how the extension of a lease went; it counts from the call."""
        if held.renew_at == math.inf:
            return  # its run ended meanwhile: its delay is due next
        if refusal is None:
            held.is_sure = True
            held.lease_until = min(asked_at + held.lease_s, held.last_at)
            held.renew_at = min(asked_at + held.lease_s / 3, held.last_at - 1)
        elif refusal.is_denied:
            held.is_sure = True  # no later answer would tell more
            held.renew_at = asked_at + held.lease_s / 3
        elif refusal.final:
            self._all.lose(held, refusal.text)
        else:
            # A dozen tries are left until the lease ends.
            held.renew_at = asked_at + held.lease_s / 20

    def _deleted(self, held: _Held, refusal: Refusal | None, asked_at: float) -> None:
        """Note how a delete went; one sent after the lease ended proves nothing."""
        if refusal is None and asked_at < held.lease_until:
            self._all.end(held, held.end)
        elif refusal is None:
            self._all.doubt(held, "its lease had ended")
        elif refusal.final or asked_at >= held.lease_until:
            self._all.doubt(held, refusal.text)
        else:
            self._try_later(held, asked_at)

    def _delayed(self, held: _Held, refusal: Refusal | None, asked_at: float) -> None:
        """Note how a delay or release went; else the lease's end does the same."""
        if refusal is not None:
            is_hopeless = refusal.final or refusal.is_denied
            if not is_hopeless and asked_at < held.lease_until:
                self._try_later(held, asked_at)
                return
            why = f"is visible again when its lease ends: {refusal.text}"
            self._all.warn(held, why)
        self._all.end(held, held.end)

    def _try_later(self, held: _Held, asked_at: float) -> None:
        """Make the call again, after a pause that doubles from 0.2 s to 5 s."""
        held.tries += 1
        held.due_at = asked_at + min(0.1 * 2**held.tries, 5)


# --- 15. the keeper -------------------------------------------------------------------
# The one place that changes received messages on their queue. So a call never undoes a
# later one: no message is in two calls, and what leaves the lease is extended no more.
# It knows holdings, a broker, a clock and a heartbeat, and no worker. No call is made
# and no record is logged while the lock is held.

_TICK_S = 0.2  # how soon a shutdown_event, or a lease that has ended, is seen
_SPARE_S = 5  # from one look of a spare thread to the next, if it is not woken
_MAX_CALLS = 6  # at once: at 30 ms a call, they end 2,000 messages a second


class _Faults:
    """Logs when something begins to fail and when it works again, and nothing between.

    Any thread may call at any time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the counts
        self._counts: dict[tuple[str, str], int] = {}

    def failed(
        self, queue: str, what: str, error: object, level: int = logging.WARNING
    ) -> int:
        """Note a failure, and return how many there were one after another."""
        with self._lock:
            count = self._counts.get((queue, what), 0) + 1
            self._counts[queue, what] = count
        if count == 1:
            _log.log(level, "%s: can't %s, goes on trying: %s", queue, what, error)
        return count

    def worked(self, queue: str, what: str) -> None:
        """Note that it works."""
        with self._lock:
            count = self._counts.pop((queue, what), 0)
        if count:
            text = "%s: can %s again; tries that failed: %d"
            _log.info(text, queue, what, count)


class _Keeper:
    """Makes the calls that holdings say are due, several at once where they are many.

    A slot says what is to become of a message, and goes on at once; the keeper ends ten
    of them in a call. Its client tries once, so that an answer which does not come
    holds the leases up for one timeout only: what failed is due again a little later.

    :meth:`run` is the body of _MAX_CALLS threads. Each makes what calls are due, one
    after another. One of those that are left then watches: it waits for what will be
    due. While the only one that is awake makes a call, a spare one is woken to watch if
    anything is decided meanwhile. For leases alone, none is woken: each spare thread
    looks now and then by itself, in case the call hangs.

    :param clock: seconds; leases are measured with it
    :param beat: called after each round of lease extensions that worked
    """

    def __init__(
        self,
        holdings: _Holdings,
        broker: Broker,
        clock: Callable[[], float],
        beat: Callable[[], object],
    ) -> None:
        self._broker, self._clock, self._beat = broker, clock, beat
        self._faults = _Faults()
        # Guards the holdings, and all that follows. Who watches waits for `_due`, spare
        # threads of the keeper for `_spare`, slots for `startable`: no thread is woken
        # for nothing.
        # Enter the lock itself: entering a condition takes several steps, and a signal
        # handler that raises in between would leave it locked.
        self.lock = threading.RLock()
        self._due = threading.Condition(self.lock)
        self._spare = threading.Condition(self.lock)
        self.startable = threading.Condition(self.lock)  # notified for each message
        # Called with the lock held, as there may be room for other messages.
        self.freed: Callable[[], object] = lambda: None
        self.holdings = holdings
        self._is_watched = False  # whether a thread watches
        self._looks_at = 0.0  # when that looks for what is due, if nobody wakes it
        self._is_wanted = False  # whether a spare one was woken, and did not look yet
        self._gives_up_at = math.inf  # when it ends, whatever is not done by then
        self._is_closing = False
        self._is_over = False  # one thread has ended, and all others are to

    def wake(self) -> None:
        """Have a thread look at once, if something is due before one would."""
        with self.lock:
            if not self._is_watched:
                self._call_spare()
            elif self.holdings.calls.next_at() < self._looks_at:
                self._looks_at = 0.0  # it need not be woken again
                self._due.notify()

    def _call_spare(self) -> None:
        """Have a spare thread watch what is decided, while all others make calls."""
        if self.holdings.calls.left and not self._is_wanted:
            self._is_wanted = True
            self._spare.notify()

    def give_up_after(self, seconds: float) -> None:
        """End at the latest in so many seconds, once :meth:`close` is called."""
        with self.lock:
            self._gives_up_at = self._clock() + seconds

    def close(self) -> None:
        """Have :meth:`run` end once all that is decided is done: leases end too."""
        with self.lock:
            self._is_closing = True
            self.holdings.end_leases()
            self._due.notify()

    def run(self) -> None:
        """Make one call after another until closed; the body of each thread."""
        try:
            while not self._is_over:
                call, news = self._next()
                self._tell(news)
                if call:
                    self._make(call)
        finally:
            with self.lock:
                self._is_over = True
                self._due.notify()
                self._spare.notify_all()

    def _next(self) -> tuple[_Call | None, list[tuple[int, str]]]:
        """Wait until there is something to do; return the call to make, and news."""
        with self.lock:
            call = self._look()
            while not (call or self.holdings.news or self._is_over):
                self._wait()
                call = self._look()
            self.wake()
            return call, self._take_news()

    def _look(self) -> _Call | None:
        """Return the call to make now, if one is due; called with the lock held."""
        self._is_wanted = False
        now = self._clock()
        self.holdings.expire(now)
        if self._is_over or self._is_done(now):
            self._is_over = True
            return None
        was_overdue = self.holdings.calls.is_overdue
        call = self.holdings.calls.next(now)
        if self.holdings.news or was_overdue:
            self.freed()  # a message was lost, or a call begins
        return call

    def _is_done(self, now: float) -> bool:
        """Return whether there is nothing left to do; called with the lock held."""
        if not self._is_closing:
            return False
        if now >= self._gives_up_at:
            # What ended after that, in the calling thread, still has one try.
            return not self.holdings.untried(self._gives_up_at)
        return not self.holdings.decided

    def _wait(self) -> None:
        """Wait until something may be due; called with the lock held."""
        if self._is_watched:
            self._spare.wait(_SPARE_S)
            return
        self._is_watched = True
        now = self._clock()
        self._looks_at = min(now + _TICK_S, self.holdings.calls.next_at())
        self._due.wait(self._looks_at - now)
        self._is_watched = False

    def _make(self, call: _Call) -> None:
        """Make a call, and note its answer."""
        change: Callable[..., list[Refusal]] = self._broker.change_visibility
        if call.kind is _Kind.delete:
            change = self._broker.delete
        refused = _one_call(functools.partial(change, call.queue), call.entries())
        with self.lock:
            self.holdings.calls.answered(call, refused)
            news = self._take_news()
            self.startable.notify(self.holdings.waiting)  # their leases may be sure now
            self.freed()
        self._tell(news)
        faults = [refusal for refusal in refused.values() if not refusal.final]
        self._note_faults(call, faults)
        if call.kind is _Kind.extend and len(faults) < len(call.batch):
            self._beat()

    def _note_faults(self, call: _Call, faults: Sequence[Refusal]) -> None:
        """Log that calls of this kind begin to fail, or work again."""
        if not faults:
            self._faults.worked(call.queue, call.kind.value)
            return
        first = faults[0]
        # A denied call is for a person to mend: the policies of 1.4 lack permissions.
        level = logging.ERROR if first.is_denied else logging.WARNING
        self._faults.failed(call.queue, call.kind.value, first.text, level)

    def _take_news(self) -> list[tuple[int, str]]:
        """Return what the holdings have to say; called with the lock held."""
        news, self.holdings.news = self.holdings.news, []
        return news

    @staticmethod
    def _tell(news: Iterable[tuple[int, str]]) -> None:
        """Log it, without the lock: a handler may take long."""
        for level, text in news:
            _log.log(level, "%s", text)


# --- 16. the worker -------------------------------------------------------------------
# Every thread of a worker: pollers receive, slots run tasks (the calling thread is one
# of them), the keeper's change messages on the queue, one heart calls the heartbeat
# hook, one watch sees the signals and the grace, one loop runs coroutines, and later
# parts add those of _beside_workers. One lock guards holdings, polls, phase and counts;
# _Course.move_on() alone moves the phase.

_MAX_BACKOFF_S = 60  # between receives that fail
_FLUSH_S = 3  # of the grace, kept for acknowledgements once running tasks are given up
_HURRIED_S = 1  # for acknowledgements after a second Ctrl-C
_CLOSED_S = 5  # from one look to the next whether a queue may be received from again
_HEART_S = 1  # for the last heartbeat: its hook may hang
_MAX_NUM_MESSAGES = 100  # a worker keeps what waits for it from all others
_MAX_POLLS = 12  # of a queue at once; those of four fit into botocore's pool of 50
_QUIET_S = 0.1  # after which a poll that still waits says that its queue is empty
_SHORT_POLL_S = 1  # where another queue may need what a poll keeps for itself
# How a message ends, if the copy that its fate may need is sent.
_ENDS = {
    Fate.acknowledge: "acked",
    Fate.retry: "retried",
    Fate.dead_letter: "dead_lettered",
    Fate.postpone: "postponed",
}


class _Phase(enum.IntEnum):
    """How far a worker is: it only ever moves forward.

    A poll in flight is waited out, for nobody would run what it receives. Waiting
    messages are released only after that, or our own poll would take them again.
    """

    working = 1  # receives and runs
    stopping = 2  # receives and starts nothing more; polls in flight are waited out
    draining = 3  # no poll is in flight: what waits is released, what runs goes on
    flushing = 4  # nothing runs, or it is left to run: what is decided is done
    ended = 5


class _Signals:
    """Notes SIGTERM and SIGINT where nobody else handles them, while the block lasts.

    A handler runs between any two instructions of the main thread, so ours only sets
    flags. It does not run while the main thread is in C code: then the wakeup
    descriptor tells :meth:`wait`, in another thread. Supervisors and shells signal a
    process and its group, so a second SIGTERM does nothing; a second SIGINT, by hand,
    ends at once.
    """

    _again_s = 1  # a SIGINT within that time of the first is the same one, sent twice

    def __init__(self) -> None:
        self._is_seen = False
        self._outer: _Signals | None = None  # of the worker in whose task this one runs
        self._first_at = math.inf
        self._replaced: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._old_wakeup = -1  # of the application, which is told all the same

    @property
    def seen(self) -> bool:
        """Whether a signal came."""
        if self._outer is not None and self._outer.seen:
            return True
        return self._is_seen

    @property
    def has_interrupt(self) -> bool:
        """Whether SIGINT is noted here."""
        return signal.SIGINT in self._replaced

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if _installed:
            self._outer = _installed[-1]
            return
        defaults = {
            signal.SIGTERM: signal.SIG_DFL,
            signal.SIGINT: signal.default_int_handler,
        }
        for number, default in defaults.items():
            if signal.getsignal(number) == default:
                self._replaced[number] = default
        if not self._replaced:
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[0], False)
        os.set_blocking(self._pipe[1], False)  # as set_wakeup_fd() asks for
        self._old_wakeup = signal.set_wakeup_fd(
            self._pipe[1], warn_on_full_buffer=False
        )
        _installed.append(self)
        _restorers.append(self.restore)
        for number in self._replaced:
            signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        if self._pipe is None:
            return
        self.restore()
        _installed.remove(self)
        _restorers.remove(self.restore)
        self._read()
        for descriptor in self._pipe:
            os.close(descriptor)

    def restore(self) -> None:
        """Put back what was there before, where a task has not set its own since."""
        for number, handler in self._replaced.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)

    def wake(self) -> None:
        """End :meth:`wait`."""
        if self._pipe is not None:
            os.write(self._pipe[1], b"\0")

    def wait(self, seconds: float) -> None:
        """Wait for a signal, at most so long; from any thread but the main one."""
        if self._pipe is None:
            time.sleep(seconds)
            return
        import select

        poll = select.poll()  # select() refuses descriptors from 1,024 on
        poll.register(self._pipe[0], select.POLLIN)
        if poll.poll(seconds * 1000):
            self._read()

    def _read(self) -> None:
        """Note the signals that came, and tell the application's own descriptor."""
        with contextlib.suppress(OSError):  # none came, or the other end is closed
            numbers = os.read(typing.cast("tuple[int, int]", self._pipe)[0], 4096)
            if self._replaced.keys() & set(numbers):
                self._is_seen = True
            if self._old_wakeup >= 0:
                os.write(self._old_wakeup, numbers.replace(b"\0", b""))

    def _note(self, number: int, _frame: object) -> None:
        """Note a signal; a second Ctrl-C interrupts the main thread."""
        now = time.monotonic()
        self._is_seen = True
        if number == signal.SIGINT:
            if now - self._first_at >= self._again_s:
                raise KeyboardInterrupt
            self._first_at = min(now, self._first_at)


_installed: list[_Signals] = []  # of the worker in the main thread, if there is one
# Each gives what a task forks the handlers that it would have without a worker.
_restorers: list[Callable[[], None]] = []
_forking = threading.local()  # `mask`: the signals that were blocked before a fork


def _hold_signals() -> None:
    """Have signals wait over a fork: the child would note one, and tell its parent."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


def _release_signals() -> None:
    """Let the signals through that came during a fork."""
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _forget_signals() -> None:
    """Let what a task forks have the handlers that it would have without a worker."""
    for restore in _restorers:
        restore()
    _restorers.clear()
    _release_signals()


os.register_at_fork(
    before=_hold_signals,
    after_in_parent=_release_signals,
    after_in_child=_forget_signals,
)


class _Heart:
    """Calls the heartbeat hook and touches the liveness file, in a thread of its own.

    So a hook that hangs stops neither polls nor leases. Beats that come while one is
    under way are one.
    """

    def __init__(self, liveness_file: str | None) -> None:
        self._liveness_file = liveness_file
        hook = settings.TASKHAWK_HEARTBEAT_HOOK
        self._is_heard = liveness_file is not None or hook is not None
        self._changed = threading.Condition()  # guards these two
        self._is_wanted = self._is_over = False

    def beat(self) -> None:
        """Say that the worker lives: it has just polled, or extended leases."""
        if not self._is_heard:
            return
        with self._changed:
            self._is_wanted = True
            self._changed.notify()

    def stop(self) -> None:
        """End :meth:`run`, after the beat that is wanted."""
        with self._changed:
            self._is_over = True
            self._changed.notify()

    def run(self) -> None:
        """Beat whenever it is wanted; the body of a thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_wanted or self._is_over)
                if not self._is_wanted:
                    return
                self._is_wanted = False
            self._touch()
            _call_safely("TASKHAWK_HEARTBEAT_HOOK")

    def _touch(self) -> None:
        """Set the liveness file's time to now."""
        if self._liveness_file is None:
            return
        try:
            with open(self._liveness_file, "a"):
                os.utime(self._liveness_file)
        except OSError as error:
            _log.warning("can't touch the liveness file: %s", error)


class _Lease(NamedTuple):
    """What a poller must know of its queue."""

    seconds: float  # for which each receive asks to hide messages
    max_receive_count: int | None  # of the queue's redrive policy; None: not known


def _find_lease(broker: Broker, queue: str, wanted_s: float | None) -> _Lease:
    """Return the lease to ask for: the one wanted, or else the queue's own timeout.

    It is always asked for, as the queue's own may be changed while the worker runs.
    """
    try:
        info = broker.info(queue)
    except Exception as error:
        code = _error_code(error)
        if not _is_denial(code):  # the policies of 1.4's workers lack the permission
            raise
        if wanted_s is None:
            _log.warning("%s: can't read its attributes: %s", queue, code)
        return _Lease(wanted_s or _DEFAULT_LEASE_S, None)
    if wanted_s is None:
        # A timeout of 0 would show to all what was just received.
        wanted_s = info.visibility_timeout_s
        if wanted_s == 0:
            wanted_s = _DEFAULT_LEASE_S
    return _Lease(wanted_s, info.max_receive_count)


def _are_empty(broker: Broker, queues: Sequence[str]) -> bool | None:
    """Return whether the queues hold nothing at all; None if a look is denied."""
    # Again: a task of a later one may have dispatched to one that was looked at before.
    looks = [*queues, *queues[:-1]]
    try:
        return not any(any(broker.depth(queue)) for queue in looks)
    except ConfigurationError:  # a person would have to mend it
        return None
    except Exception:  # a fault is no reason to end
        return False


class _Limits(NamedTuple):
    """How much a worker does at once, and in all."""

    slots: int  # messages that run at once
    polls: int  # queues that are polled
    max_tasks: int | None  # starts, after which it stops; None for no limit
    paused: int  # slots that can't run anything until they have a child


class _Load(NamedTuple):
    """What a worker holds, as far as it matters for what it may receive."""

    free: int  # slots that run nothing, and could
    waiting: Sequence[int]  # messages to be started, by queue, the most urgent first
    starts: float  # that are left, besides what waits; infinity without a limit


@dataclasses.dataclass(eq=False)
class _Poll:
    """A receive that is under way."""

    queue: str
    most: int  # messages that it may bring
    began_at: float
    is_short: bool  # others may need the starts that it has asked for


@dataclasses.dataclass(eq=False)
class _Polled:
    """What is known of a queue from its receives."""

    rank: int  # of its urgency: 0 is the most urgent
    batch: int  # messages that a receive brings at most
    most_polls: int  # at once
    left: float  # receives that may still begin
    polls: dict[_Poll, None] = dataclasses.field(default_factory=dict)  # under way
    asked: int = 0  # messages that these may bring
    asked_at: float = -math.inf  # when the last one began
    answered: int = 0  # receives, ever
    is_full: bool = False  # the last one brought all that it asked for
    is_empty: bool = False  # it brought nothing, or failed, or no other follows
    is_failing: bool = False  # it failed, so that others do not wait for the next

    @property
    def quiet_at(self) -> float:
        """When it is known to be empty, if the receive under way still waits then."""
        if not self.polls:
            return math.inf
        return next(iter(self.polls)).began_at + _QUIET_S

    @property
    def turn(self) -> tuple[bool, float, int]:
        """What is less for the one to be asked first, where not all can be."""
        if self.is_empty:
            return True, self.asked_at, self.rank
        return False, 0, self.rank


class _Polls:
    """The receives that are under way, and which queue may be asked for how much.

    Pure, as the holdings are, and guarded with them. A queue is asked for what can be
    started, and for what num_messages allows to wait, less what is asked for already.
    It is asked only while all that are more urgent are known to be empty.

    :param slots: how many messages run at once
    """

    def __init__(
        self,
        queues: Sequence[str],
        num_messages: int = 1,
        slots: int = 1,
        loop_count: int | None = None,
    ) -> None:
        self._num_messages, self._slots = num_messages, slots
        receives: float = math.inf
        if loop_count is not None:
            receives = loop_count
        self.of: dict[str, _Polled] = {}
        for rank, queue in enumerate(queues):
            batch, most_polls = _MAX_BATCH, _MAX_POLLS
            if _is_fifo(queue):
                # It withholds the rest of a group while one message of that is held.
                batch = most_polls = 1
            self.of[queue] = _Polled(rank, batch, most_polls, receives)
        self._ranked = list(self.of.values())
        self._is_over = False

    @property
    def under_way(self) -> int:
        """How many receives are under way."""
        return sum(len(each.polls) for each in self._ranked)

    def is_open(self, queue: str) -> bool:
        """Return whether a queue is to be asked again, or may have to be."""
        polled = self.of[queue]
        return not self._is_over and bool(polled.left or polled.polls)

    def is_busy(self, queue: str) -> bool:
        """Return whether receives of a queue may run at the same time."""
        polled = self.of[queue]
        return not self._is_over and polled.is_full and polled.left > 0

    def may_begin_at(self, queue: str, load: _Load) -> float:
        """Return since when, or from when on, a receive may begin.

        :returns: infinity if that depends on what else happens
        """
        polled = self.of[queue]
        if not polled.left or self._most(polled, load) < 1:
            return math.inf
        since = -math.inf
        for urgent in self._ranked[: polled.rank]:
            if not urgent.is_empty:
                since = max(since, urgent.quiet_at)
        return since

    def _most(self, polled: _Polled, load: _Load) -> int:
        """Return how many messages to ask for; 0 if a receive is not worth it yet."""
        waiting = sum(load.waiting[: polled.rank + 1])
        room = load.free + self._num_messages - 1 - waiting - polled.asked
        if not self._is_worth_it(polled, room):
            return 0
        return int(min(room, polled.batch, self._share(polled, load)))

    def _is_worth_it(self, polled: _Polled, room: int) -> bool:
        """Return whether to receive for so much room: ten cost the same as one."""
        wanted = self._num_messages
        if polled.polls:
            if not polled.is_full or len(polled.polls) == polled.most_polls:
                return False
            wanted += self._slots - 1
        return room >= 0.9 * min(polled.batch, wanted)

    def _share(self, polled: _Polled, load: _Load) -> float:
        """Return how many of the starts that are left a queue may ask for.

        What others may need is left to them; if that is not enough for all, they take
        turns.
        """
        left = self._left(load)
        rivals = [each for each in self._others(polled) if not each.polls]
        if left > len(rivals):
            return left / (len(rivals) + 1)
        if all(polled.turn < each.turn for each in rivals):
            return left
        return 0

    def _left(self, load: _Load) -> float:
        """Return how many of the starts that are left are not asked for yet."""
        return load.starts - sum(each.asked for each in self._ranked)

    def _others(self, polled: _Polled) -> list[_Polled]:
        """Return the other queues that are asked, and answer."""
        others = (each for each in self._ranked if each is not polled)
        return [each for each in others if each.left and not each.is_failing]

    def begin(self, queue: str, load: _Load, now: float) -> _Poll:
        """Begin a receive, which must be allowed by now."""
        polled = self.of[queue]
        most = self._most(polled, load)
        polled.left -= 1
        polled.asked += most
        polled.asked_at = now
        is_short = self._left(load) < _MAX_BATCH * len(self._others(polled))
        poll = _Poll(queue, most, now, is_short)
        polled.polls[poll] = None
        return poll

    def answered(self, poll: _Poll, count: int) -> None:
        """Note that a receive has brought so many messages."""
        polled = self._ended(poll)
        polled.answered += 1
        polled.is_full, polled.is_empty = count >= poll.most, count == 0
        polled.is_failing = False

    def failed(self, poll: _Poll) -> bool:
        """Note that a receive has failed; return whether one was ever answered."""
        polled = self._ended(poll)
        polled.left += 1
        polled.is_full, polled.is_empty = False, True
        polled.is_failing = True
        return polled.answered > 0

    def dropped(self, poll: _Poll) -> None:
        """Note that a receive was not made after all."""
        self._ended(poll).left += 1

    def _ended(self, poll: _Poll) -> _Polled:
        """Note that a receive is over, and return its queue."""
        polled = self.of[poll.queue]
        del polled.polls[poll]
        polled.asked -= poll.most
        return polled

    def close(self, queue: str) -> None:
        """Note that a queue is asked no more, so that no other waits for it."""
        polled = self.of[queue]
        polled.left, polled.is_empty = 0, True

    def end(self) -> None:
        """Note that no queue is asked any more, for all were empty.

        If some still were, their messages might fill a queue that nobody asks any more,
        and nobody would ever find all empty.
        """
        self._is_over = True


class _Course:
    """What the threads of a worker share: the holdings, the phase, and how many go on.

    Every method takes the lock; none makes a call to the queue or runs a task.

    :param is_told: whether somebody told the worker to stop
    """

    def __init__(
        self,
        keeper: _Keeper,
        clock: Callable[[], float],
        is_told: Callable[[], bool],
        limits: _Limits,
    ) -> None:
        self._keeper, self.clock, self._is_told = keeper, clock, is_told
        self._limits = limits
        self.stop = threading.Event()  # set after the phase working: ends all waits
        self.ended = threading.Event()  # set in the phase ended
        # The keeper's lock guards the holdings, and all that follows. Slots wait for a
        # message: each that comes wakes one, which looks for itself, and a new phase
        # wakes all. So none waits while a message does that no other slot will look at.
        # The watch moves the phase on, for nobody notifies of an event or a signal.
        self.lock, self._to_start = keeper.lock, keeper.startable
        self._holdings = keeper.holdings
        self.phase = _Phase.working
        self.fatal: BaseException | None = None  # the error that ended a thread
        self._polls, self._slots = limits.polls, limits.slots  # that have not ended
        self._paused = limits.paused  # slots that can't run anything for now
        self._can_start = True  # a child, as far as the last try tells
        self._started = 0  # messages, ever

    def next(self) -> list[_Held]:
        """Wait for a message to run, and start it with those that run together with it.

        :returns: none if there will be no more
        """
        with self.lock:
            while self.is_working():
                held = self._holdings.start(self.clock())
                if self._holdings.news:  # a message was lost while it waited
                    self._keeper.freed()
                if held:
                    batch = [held, *self._start_more(held)]
                    self._started += len(batch)
                    return batch
                self._to_start.wait()
            return []

    def _start_more(self, held: _Held) -> list[_Held]:
        """Start what runs together with a message; called with the lock held."""
        most = _most_together(held.message)
        if most == 1:
            return []
        more = self._holdings.start_more(held, most, self.clock())
        self._keeper.freed()  # they wait no more, and take no slots
        return more

    def finish(self, held: _Held, end: str, delay_s: float | None = 0) -> None:
        """Note what a message that ran is to become."""
        with self.lock:
            self._holdings.finish(held, end, self.clock(), delay_s)
            self._changed()

    def release(self, held: _Held) -> None:
        """Note that a message did not run after all."""
        with self.lock:
            self._holdings.release(held, self.clock())
            self._keeper.wake()

    def begin(self) -> None:
        """Note that a slot of an isolated worker has a child, and can run messages."""
        with self.lock:
            self._paused -= 1
            self._changed()

    def suspend(self) -> bool:
        """Note that a slot can't start a child; return whether that is news."""
        with self.lock:
            self._paused += 1
            was_able, self._can_start = self._can_start, False
            self._release_if_stuck()
            self._changed()
            return was_able

    def resume(self) -> bool:
        """Note that a slot has a child again; return whether that is news."""
        with self.lock:
            self._paused -= 1
            was_able, self._can_start = self._can_start, True
            self._changed()
            return not was_able

    def _release_if_stuck(self) -> None:
        """Leave what waits to other workers, if nothing can be started here."""
        is_stuck = self._paused == self._limits.slots
        if is_stuck or self.phase >= _Phase.draining:  # by a poll not waited out, too
            self._holdings.release_waiting(self.clock())

    def slot_ended(self) -> None:
        """Note that a slot runs nothing more."""
        with self.lock:
            self._slots -= 1
            self.move_on()

    def still_run(self) -> list[QueueMessage]:
        """Return the messages that run."""
        with self.lock:
            return self._holdings.still_run()

    def load(self) -> _Load:
        """Return what matters for receives."""
        holdings, limits = self._holdings, self._limits
        waiting, starts = holdings.backlog.counts(), math.inf
        if limits.max_tasks is not None:
            starts = limits.max_tasks - self._started - sum(waiting)
        if self._paused == limits.slots or holdings.calls.is_overdue:
            starts = 0
        free = limits.slots - self._paused - holdings.running
        return _Load(free, waiting, starts)

    def take(
        self, messages: Sequence[QueueMessage], lease_s: float, asked_at: float
    ) -> None:
        """Hold received messages from now on."""
        with self.lock:
            self._holdings.take(messages, lease_s, asked_at, self.clock())
            self._release_if_stuck()
            self._to_start.notify(len(messages))
            self._keeper.wake()

    def polls_ended(self) -> None:
        """Note that nothing more is received from a queue."""
        with self.lock:
            self._polls -= 1
            self.move_on()

    # The phases.

    def move_on(self, to: _Phase = _Phase.working) -> None:
        """Move the phase on as far as it can go.

        :param to: the phase to reach at least, whatever still goes on
        """
        with self.lock:
            while self.phase < to or self._is_over():
                self.phase = _Phase(self.phase + 1)
                self._enter(self.phase)

    def is_working(self) -> bool:
        """Return whether messages are still to be received and run."""
        self.move_on()
        return self.phase is _Phase.working

    def fail(self, error: BaseException) -> None:
        """Note an error that ends the worker; the first one is the one that counts."""
        with self.lock:
            if self.fatal is None:
                self.fatal = error
            self.move_on()

    def is_told(self) -> bool:
        """Return whether somebody, or an error, told the worker to stop."""
        return self.fatal is not None or self._is_told()

    def _is_over(self) -> bool:
        """Return whether the present phase is."""
        if self.phase is _Phase.working:
            if self.is_told() or self._started == self._limits.max_tasks:
                return True
            return not self._polls and not self._holdings.waiting
        if self.phase is _Phase.stopping:
            return not self._polls
        return self.phase is _Phase.draining and not self._slots

    def _enter(self, phase: _Phase) -> None:
        """Do what a phase begins with, and tell all that wait."""
        if phase is _Phase.stopping:
            self.stop.set()
        elif phase is _Phase.draining:
            self._holdings.release_waiting(self.clock())
            self._keeper.wake()
        elif phase is _Phase.ended:
            self._holdings.close()
            self.ended.set()
        self._to_start.notify_all()
        self._keeper.freed()

    def _changed(self) -> None:
        """Tell those that wait for what a slot has done."""
        self._keeper.wake()
        self._keeper.freed()


class _Pollers:
    """The threads that receive from one queue; guarded by the keeper's lock."""

    def __init__(self, lock: threading.RLock) -> None:
        self.may_look = threading.Condition(lock)  # notified for these threads alone
        self.count = 1
        self.waiting = 0  # how many of them wait until they may begin a receive
        # When one of these looks again, at the latest: there is no need to tell them of
        # what may begin later. So it is -inf while none waits, or one was told.
        self.looks_at = -math.inf

    def wait(self, until: float, now: float) -> None:
        """Wait until told, or until a time."""
        within_s = None
        if until < math.inf:
            within_s = until - now
        self.waiting += 1
        self.looks_at = until
        self.may_look.wait(within_s)
        self.waiting -= 1
        self.looks_at = -math.inf
        if self.waiting:
            self.looks_at = math.inf

    def tell(self, at: float) -> None:
        """Have one of those that wait look, if it would look too late for this time."""
        if at < self.looks_at:
            self.looks_at = -math.inf
            self.may_look.notify()


class _Intake:
    """What the pollers of a worker share: the receives under way, and who waits.

    Every method takes the lock; none makes a call to the queue.
    """

    def __init__(self, course: _Course, keeper: _Keeper, polls: _Polls) -> None:
        self._course, self.polls = course, polls
        # The keeper's lock guards the polls, and all that follows. A poller waits for
        # room, and for more urgent queues. Whatever may let one begin calls tell(),
        # with the lock held; that wakes one of its queue, which looks for itself, and
        # calls tell() when it begins or leaves. So no wakeup is lost.
        self._lock = keeper.lock
        self._pollers = {queue: _Pollers(keeper.lock) for queue in polls.of}
        keeper.freed = self.tell

    def tell(self) -> None:
        """Have pollers look that may begin earlier than they would look."""
        if self._course.phase is not _Phase.working:
            for pollers in self._pollers.values():
                pollers.may_look.notify_all()
            return
        load = None
        for queue, pollers in self._pollers.items():
            if pollers.looks_at > -math.inf:
                load = load or self._course.load()
                pollers.tell(self.polls.may_begin_at(queue, load))

    def begin(self, queue: str, goes_on: Callable[[str], bool]) -> _Poll | None:
        """Wait until a queue is to be asked; return what for, or None for no more.

        :param goes_on: whether this thread is still to ask the queue
        """
        with self._lock:
            poll = None
            while not poll and self._course.is_working() and goes_on(queue):
                load, now = self._course.load(), self._course.clock()
                may_begin_at = self.polls.may_begin_at(queue, load)
                if may_begin_at <= now:
                    poll = self.polls.begin(queue, load, now)
                else:
                    self._pollers[queue].wait(may_begin_at, now)
            self.tell()
            return poll

    def take(
        self, poll: _Poll, messages: Sequence[QueueMessage], lease_s: float
    ) -> None:
        """Hold received messages from now on."""
        with self._lock:
            self._course.take(messages, lease_s, poll.began_at)
            self.polls.answered(poll, len(messages))
            self._ended(poll)

    def fail(self, poll: _Poll) -> bool:
        """Note that a receive has failed; return whether one was ever answered."""
        with self._lock:
            was_answered = self.polls.failed(poll)
            self._ended(poll)
            return was_answered

    def drop(self, poll: _Poll) -> None:
        """Note that a receive was not made after all."""
        with self._lock:
            self.polls.dropped(poll)
            self._ended(poll)

    def _ended(self, poll: _Poll) -> None:
        """Tell those who wait for that; if it was not full, helpers end."""
        if not self.polls.is_busy(poll.queue):
            self._pollers[poll.queue].may_look.notify_all()
        self.tell()

    def is_dry(self, queue: str) -> bool:
        """Return whether a queue's last receive was answered, and brought nothing."""
        with self._lock:
            polled = self.polls.of[queue]
            return polled.is_empty and not polled.is_failing

    def end(self) -> None:
        """Let no queue be asked any more, for all were empty."""
        with self._lock:
            self.polls.end()
            for pollers in self._pollers.values():
                pollers.may_look.notify_all()

    def adds_helper(self, queue: str) -> bool:
        """Count a helper more, if all receive and yet another receive may begin."""
        with self._lock:
            pollers = self._pollers[queue]
            if pollers.count > len(self.polls.of[queue].polls):
                return False
            may_begin_at = self.polls.may_begin_at(queue, self._course.load())
            if may_begin_at > self._course.clock():
                return False
            pollers.count += 1
            return True

    def helper_ended(self, queue: str) -> None:
        """Note that a helper receives nothing more."""
        with self._lock:
            self._pollers[queue].count -= 1
            self._pollers[queue].may_look.notify_all()

    def close(self, queue: str) -> None:
        """Wait for a queue's helpers; then nothing more is received from it."""
        with self._lock:
            pollers = self._pollers[queue]
            while pollers.count > 1:
                pollers.may_look.wait()
            self.polls.close(queue)
            self.tell()
            self._course.polls_ended()


class _Slot:
    """Runs one message after another, in its thread or in its child.

    :param settle: called with each message and the outcome of its run
    :param event_loop: the worker's, for its coroutines
    :param is_isolated: whether its child runs all messages
    """

    def __init__(
        self,
        course: _Course,
        child: _Child,
        settle: Callable[[_Held, Outcome], None],
        event_loop: _EventLoop,
        *,
        is_isolated: bool,
    ) -> None:
        self.child, self._event_loop = child, event_loop
        self._course, self._settle = course, settle
        self._is_isolated = is_isolated

    def work(self) -> None:
        """Run messages until there are no more; the body of a thread."""
        try:
            with self._event_loop.in_this_thread():
                if self._is_isolated:
                    self._start_child()
                while batch := self._course.next():
                    self._run(batch)
        except BaseException as error:
            self._course.fail(error)  # before the phases go on
            raise
        finally:
            # Only now: the worker ends after what coroutines left behind has.
            self.child.close()
            self._course.slot_ended()

    def _start_child(self) -> None:
        """Start the child before the first receive, for what it can't run must wait."""
        try:
            self.child.start()
        except _CannotStart as error:
            self._pause(error)
        self._course.begin()

    def _run(self, batch: Sequence[_Held]) -> None:
        """Run messages that run together, and note what each is to become."""
        try:
            outcomes = self._process([held.message for held in batch])
            for held, outcome in zip(batch, outcomes, strict=False):
                self._settle(held, outcome)
        except _CannotStart as error:
            for held in batch:
                self._give_back(held, error)
            self._pause(error)
        finally:
            for held in batch:
                if held.runs:
                    # It was interrupted, or killed as the grace ended. Where its child
                    # still runs, that must end before others may have the message.
                    self.child.kill()
                    self._course.finish(held, "retried")

    def _give_back(self, held: _Held, error: _CannotStart) -> None:
        """Leave a message that could not begin to run to other workers."""
        if held.message.would_be_redriven:
            self._settle(held, Outcome(Fate.postpone, error, 0))
        else:
            self._course.release(held)

    def _process(self, batch: Sequence[QueueMessage]) -> list[Outcome]:
        """Run messages, in the child if it is for that."""
        worker = os.getpid()
        try:
            return self.child.process(batch)
        finally:
            if os.getpid() != worker:
                # A process that a hook forked came back from it. The message is its
                # parent's, as are all threads and the children of slots.
                os._exit(0)  # pragma: no cover - the process is gone

    def _pause(self, error: _CannotStart) -> None:
        """Try again and again to start a child, before anything else is run."""
        is_news = self._course.suspend()
        if is_news:
            _log.error("can't start a child, goes on trying: %s", error)
        failures = 1
        while _back_off(self._course.stop, self._course.clock, failures):
            try:
                self.child.start()
            except _CannotStart:
                failures += 1
            else:
                is_news = self._course.resume()
                if is_news:
                    text = "can start a child again; tries that failed: %d"
                    _log.info(text, failures)
                return


class _Poller:
    """Receives from one queue, in a thread of its own.

    While its receives are full, helpers receive at the same time, in threads that end
    with the first receive that is not.
    """

    def __init__(
        self, worker: Worker, course: _Course, intake: _Intake, queue: str
    ) -> None:
        self._worker, self._course = worker, course
        self._intake, self._queue = intake, queue
        self._faults = _Faults()
        self._lease: _Lease | None = None  # once it is known

    def work(self) -> None:
        """Receive until there is no more to do; the body of a thread."""
        intake, course = self._intake, self._course
        try:
            while poll := intake.begin(self._queue, intake.polls.is_open):
                error = self._try(poll)
                if error:
                    failures = self._faults.failed(self._queue, "receive", repr(error))
                    _back_off(course.stop, self._worker.clock, failures)
                self._end_if_empty()
        except BaseException as fatal:
            course.fail(fatal)  # before the phases go on, or nobody would see it
            raise
        finally:
            intake.close(self._queue)

    def _help(self) -> None:
        """Receive as long as receives are full; the body of a thread."""
        intake = self._intake
        try:
            while poll := intake.begin(self._queue, intake.polls.is_busy):
                self._try(poll)  # if that fails, it ends: the poller backs off for all
        except BaseException as fatal:
            self._course.fail(fatal)
            raise
        finally:
            intake.helper_ended(self._queue)

    def _end_if_empty(self) -> None:
        """Have no queue asked any more if all are empty, where that is the end."""
        worker, intake = self._worker, self._intake
        if not worker.until_empty or not intake.is_dry(self._queue):
            return
        are_empty = _are_empty(worker.broker, worker.queues)
        if are_empty is None:  # what receives bring is all that can be known
            are_empty = all(map(intake.is_dry, worker.queues))
        if are_empty:
            intake.end()

    def _try(self, poll: _Poll) -> Exception | None:
        """Receive; return the error if that fails."""
        worker = self._worker
        try:
            if self._lease is None:
                wanted_s = worker.visibility_timeout_s
                self._lease = _find_lease(worker.broker, self._queue, wanted_s)
                self._intake.drop(poll)  # it may have taken long: look again whether to
            else:
                self._receive(poll, self._lease)
        except Exception as error:
            was_answered = self._intake.fail(poll)
            if not was_answered and isinstance(error, ConfigurationError):
                raise  # at the start, this is for a person to mend
            return error
        return None

    def _receive(self, poll: _Poll, lease: _Lease) -> None:
        """Receive once, and hold what came."""
        worker, wait_s = self._worker, self._worker.wait_s
        if poll.is_short:
            wait_s = min(wait_s, _SHORT_POLL_S)
        if self._intake.adds_helper(self._queue):
            self._start_helper()
        messages: list[QueueMessage] = []
        if all(may_receive(worker, self._queue) for may_receive in _gates):
            messages = worker.broker.receive(
                self._queue, poll.most, wait_s, lease.seconds, self._course.stop
            )
        else:  # as if the queue were empty
            self._course.stop.wait(min(wait_s, _CLOSED_S))
        for message in messages:
            message.max_receive_count = lease.max_receive_count
            message.done_level = worker.done_level
            message.batch_task = _find_batch_task(message)
            message.lease_s = lease.seconds
        # At once: from here on the keeper extends the leases.
        self._intake.take(poll, messages, lease.seconds)
        self._faults.worked(self._queue, "receive")
        worker.beat()

    def _start_helper(self) -> None:
        """Start another thread that receives; go on without it if that fails."""
        try:
            _make_thread(self._course, self._help).start()
        except RuntimeError as error:
            self._intake.helper_ended(self._queue)
            self._faults.failed(self._queue, "start another poller", error)


def _pause_s(failures: int) -> float:
    """Return how long to wait after so many failures in a row, up to a minute."""
    return _jittered(min(0.5 * 2 ** min(failures, 10), _MAX_BACKOFF_S))


def _back_off(stop: threading.Event, clock: Callable[[], float], failures: int) -> bool:
    """Wait after so many failures in a row; return False if the worker stops."""
    until = clock() + _pause_s(failures)
    while not stop.is_set():
        left_s = until - clock()
        if left_s <= 0:
            return True
        stop.wait(min(left_s, _TICK_S))
    return False


def _make_thread(course: _Course, work: Callable[[], object]) -> threading.Thread:
    """Make a thread; an error in it ends the worker, and the caller gets it.

    It is a daemon: neither a second Ctrl-C nor an overdue task waits for a thread.
    """

    def guard() -> None:
        try:
            work()
        except BaseException as error:  # such as a task's KeyboardInterrupt
            course.fail(error)

    return threading.Thread(target=guard, daemon=True)


class _Event(typing.Protocol):
    """What tells a worker to stop: threading's and asyncio's events are such."""

    def is_set(self) -> bool: ...


# What later parts run beside each worker. Each is called before the first receive, with
# the worker and the event that is set once it stops, and returns what a thread is to
# run until then, or None.
_beside_workers: list[
    Callable[[Worker, threading.Event], Callable[[], object] | None]
] = []


def _threads_beside(worker: Worker, course: _Course) -> list[threading.Thread]:
    """Return the threads of what later parts run beside a worker."""
    begun = [begin(worker, course.stop) for begin in _beside_workers]
    return [_make_thread(course, run) for run in begun if run is not None]


@dataclasses.dataclass(eq=False, repr=False)
class Worker:
    """Runs the messages of some queues, most urgent first, until it is stopped.

    The options are those of :func:`listen_for_messages`; time is passed in by `clock`,
    and `wait_s` is how long a poll may take. `on_overdue` gets the ledger where runs go
    on after `grace_s`. Polls and rounds of leases touch `liveness_file`. A run that
    returned is logged at `done_level`. No more than `max_workers` have one queue.
    """

    broker: Broker
    queues: Sequence[str]
    num_messages: int = 1
    visibility_timeout_s: float | None = None
    loop_count: int | None = None
    shutdown_event: _Event | None = None
    until_empty: bool = False
    concurrency: int = 1
    max_tasks: int | None = None
    grace_s: float | None = None
    isolate: bool = False
    max_tasks_per_child: int = 100
    ack_wait_s: float = _ACK_WAIT_S
    on_overdue: Callable[[Ledger], object] | None = None
    liveness_file: str | None = None
    done_level: int = logging.DEBUG
    max_workers: int | None = None
    clock: Callable[[], float] = time.monotonic
    wait_s: float = _LONG_POLL_S
    event_loop: Any = None  # the application's own, for coroutines

    def __post_init__(self) -> None:
        _check_options(self)
        self._signals = _Signals()
        self._heart = _Heart(self.liveness_file)
        self.beat = self._heart.beat  #: say that the worker lives
        self._holdings = _Holdings(self.queues, self.ack_wait_s)
        self.ledger = self._holdings.ledger
        self._keeper = _Keeper(self._holdings, self.broker, self.clock, self.beat)
        start = _start_of_children(everything=self.isolate)
        # All by --isolate, or each by its decorator.
        isolated = start.get("isolated", ())
        is_isolated = bool(isolated) and len(isolated) == len(_registry)
        self._course = _Course(
            self._keeper,
            self.clock,
            self._is_told,
            _Limits(
                slots=self.concurrency,
                polls=len(self.queues),
                max_tasks=self.max_tasks,
                paused=self.concurrency if is_isolated else 0,
            ),
        )
        self._keeping: list[threading.Thread] = []
        event_loop = _EventLoop(self.event_loop)
        self.overdue = threading.Event()  #: set once the grace is over
        self._slots = [
            _Slot(
                self._course,
                _Child(start, self.max_tasks_per_child, self.overdue),
                self.settle,
                event_loop,
                is_isolated=is_isolated,
            )
            for _ in range(self.concurrency)
        ]
        self._polls = _Polls(
            self.queues, self.num_messages, self.concurrency, self.loop_count
        )

    @property
    def unanswered(self) -> bool:
        """Whether a delete was not known to be applied at the end."""
        return self._holdings.unanswered > 0

    def run(self) -> Ledger:
        """Work until stopped.

        :returns: what became of the messages
        :raises ConfigurationError: if a queue is missing or forbidden, or there are no
            credentials
        """
        make = functools.partial(_make_thread, self._course)
        slots = [make(slot.work) for slot in self._slots[1:]]
        slots += _threads_beside(self, self._course)
        intake = _Intake(self._course, self._keeper, self._polls)
        poller = functools.partial(_Poller, self, self._course, intake)
        pollers = [make(poller(queue).work) for queue in self.queues]
        self._keeping = [make(self._keeper.run) for _ in range(_MAX_CALLS)]
        helpers = [*self._keeping, make(self._heart.run), make(self._watch)]
        within_s: float | None = _HURRIED_S
        with self._signals:
            try:
                self._work(helpers, [*pollers, *slots])
                within_s = None  # nothing interrupts it
            finally:
                self._close(within_s)
                *_, heart, watch = helpers
                _join(watch, None)
                _join(heart, _HEART_S)
        level = logging.INFO if self.ledger.balanced else logging.ERROR
        _log.log(level, "worker ended: %s", self.ledger)
        if self._course.fatal:
            raise self._course.fatal
        return self.ledger

    def _work(
        self,
        helpers: Sequence[threading.Thread],
        others: Sequence[threading.Thread],
    ) -> None:
        """Run messages until there are no more, then wait for the other threads."""
        try:
            for thread in (*helpers, *others):
                thread.start()
            self._slots[0].work()
        except BaseException as error:  # such as sys.exit() of a signal handler
            if self._signals.seen and isinstance(error, KeyboardInterrupt):
                raise  # a second Ctrl-C waits for nothing
            self._course.fail(error)
        for thread in others:  # unless they are left to run
            while thread.is_alive() and self._course.phase < _Phase.flushing:
                thread.join(_TICK_S)

    def _close(self, within_s: float | None) -> None:
        """Go through the phases that are left."""
        try:
            self._course.move_on(to=_Phase.flushing)
            _release_by_copies(self.broker, self._keeper, self._course)
            self._flush(within_s)
        finally:
            self._course.move_on(to=_Phase.ended)
            self._heart.stop()
            self._signals.wake()

    def _flush(self, within_s: float | None) -> None:
        """Wait until what is decided is done, or leases end, or time is up."""
        self._keeper.close()
        if within_s is None:
            within_s = threading.TIMEOUT_MAX
        until = time.monotonic() + within_s
        for thread in self._keeping:
            _join(thread, max(0, until - time.monotonic()))

    def settle(self, held: _Held, outcome: Outcome) -> None:
        """Have done what the outcome says; a copy is sent by the calling thread."""
        end, delay_s = _carry_out(outcome, self.broker, held, self.clock())
        self._course.finish(held, end, delay_s)

    # Signals, and the grace.

    def _is_told(self) -> bool:
        """Return whether somebody told the worker to stop."""
        event = self.shutdown_event
        return self._signals.seen or (event is not None and event.is_set())

    def _watch(self) -> None:
        """Stop the worker when it is told to, and give up what outlives its grace."""
        while not self._course.is_told():
            self._signals.wait(_TICK_S)
            self._course.move_on()
            if self._course.ended.is_set():
                return  # by itself, so that nobody waits to kill it: it has no deadline
        self._course.move_on()
        self._say_what_it_waits_for()
        if self.grace_s is None:
            return
        flush_s = min(_FLUSH_S, self.grace_s / 2)
        if not self._course.ended.wait(self.grace_s - flush_s):
            self._give_up(flush_s)

    def _say_what_it_waits_for(self) -> None:
        """Log why the worker does not end at once."""
        polls = self._polls.under_way
        runs = len(self._course.still_run())
        text = f"stopping: waiting for polls in flight: {polls}, running tasks: {runs}"
        if self._signals.has_interrupt:
            text += "; a second Ctrl-C ends at once"
        _log.info("%s", text)

    def _give_up(self, flush_s: float) -> None:
        """Kill isolated runs, and leave others to run: their messages reappear.

        :param flush_s: what is left of the grace
        """
        self.overdue.set()
        self._keeper.give_up_after(flush_s)
        for received in self._course.still_run():
            _log.warning("the grace is over, and %s still runs", _name_of(received))
        for slot in self._slots:
            slot.child.kill()
        if self._course.ended.wait(flush_s / 2):
            return
        self._course.move_on(to=_Phase.flushing)
        if self.on_overdue:
            # It ends the process, so it comes before run() returns, and not beside it.
            self._flush(flush_s / 2)
            with self._keeper.lock:
                self._holdings.close()
            self.on_overdue(self.ledger)


# What must hold before anything is received: later parts add what they need, and raise
# ConfigurationError.
_before_work: list[Callable[[], object]] = []


# Whether a worker may receive from a queue now: later parts have reasons why not.
_gates: list[Callable[[Worker, str], bool]] = []


def _check_before_work() -> None:
    """Raise ConfigurationError if a registered task can't be run here."""
    for check in _before_work:
        check()


def _check_options(worker: Worker) -> None:
    """Refuse what can't work, and fit the length of polls to the grace."""
    _check_before_work()
    _check_counts(worker)
    lease_s, grace_s = worker.visibility_timeout_s, worker.grace_s
    if lease_s is not None and not 1 <= lease_s <= _MAX_HELD_S:
        wanted = f"expected 1 to {_MAX_HELD_S} seconds"
        raise ConfigurationError(f"visibility_timeout_s: {wanted}, got {lease_s}")
    if grace_s is not None and not grace_s >= 0:
        wanted = "expected 0 or more seconds"
        raise ConfigurationError(f"grace_s: {wanted}, got {grace_s}")
    if worker.until_empty:
        worker.wait_s = min(worker.wait_s, 1)
    elif grace_s is not None:
        # A poll in flight is waited out, so it must end before the grace does.
        worker.wait_s = min(worker.wait_s, max(1, grace_s - _FLUSH_S - 1))


def _check_counts(worker: Worker) -> None:
    """Refuse numbers of messages, slots and runs that make no sense."""
    for name in ("concurrency", "max_tasks", "max_tasks_per_child", "max_workers"):
        number = getattr(worker, name)
        if number is not None and number < 1:
            raise ConfigurationError(f"{name}: expected 1 or more, got {number}")
    if not 1 <= worker.num_messages <= _MAX_NUM_MESSAGES:
        wanted = f"expected 1 to {_MAX_NUM_MESSAGES}"
        raise ConfigurationError(f"num_messages: {wanted}, got {worker.num_messages}")


def _join(thread: threading.Thread, within_s: float | None) -> None:
    """Wait for a thread, if it was ever started."""
    if thread.is_alive():
        thread.join(within_s)


def listen_for_messages(
    priority: Priority | Iterable[Priority],
    num_messages: int = 1,
    visibility_timeout_s: float | None = None,
    loop_count: int | None = None,
    shutdown_event: threading.Event | None = None,
    *,
    until_empty: bool = False,
    concurrency: int = 1,
    max_tasks: int | None = None,
    grace_s: float | None = None,
    isolate: bool = False,
    max_tasks_per_child: int = 100,
    ack_wait_s: float = _ACK_WAIT_S,
) -> Ledger:
    """Run the messages of a queue, in the calling thread, until told to stop.

    SIGTERM and SIGINT stop it unless the application has handlers of its own. It
    stops after the running task and the poll in flight, which takes up to 20 s on SQS.

    :param priority: the queue, or several: the most urgent message runs first
    :param num_messages: with N, which is at most 100, up to N - 1 messages of a queue
        wait while all slots are busy; with 1, one is received when it can start
    :param visibility_timeout_s: how long a received message is hidden from others,
        until the worker extends it; None takes the queue's own
    :param loop_count: end after this many receives from each queue; None for no end
    :param shutdown_event: set it to stop
    :param until_empty: end once the queues have no message, in flight or delayed
    :param concurrency: how many run at once: 1 in the calling thread, more in threads
    :param max_tasks: end after this many runs
    :param grace_s: how long runs may go on once told to stop; then isolated ones are
        killed
    :param isolate: run all tasks in child processes, one a slot
    :param max_tasks_per_child: replace a child after so many runs
    :param ack_wait_s: how long an acknowledgement waits for others to share its call; a
        kill within that time means that finished tasks run again
    :returns: what became of the messages
    :raises ConfigurationError: if a queue is missing or forbidden, or there are no
        credentials
    """
    worker = Worker(
        _brokers.broker(),
        _queues_of(priority),
        num_messages,
        visibility_timeout_s,
        loop_count,
        shutdown_event,
        until_empty=until_empty,
        concurrency=concurrency,
        max_tasks=max_tasks,
        grace_s=grace_s,
        isolate=isolate,
        max_tasks_per_child=max_tasks_per_child,
        ack_wait_s=ack_wait_s,
    )
    return worker.run()


async def listen_async(
    priority: Priority | Iterable[Priority],
    num_messages: int = 1,
    visibility_timeout_s: float | None = None,
    loop_count: int | None = None,
    shutdown_event: _Event | None = None,
    *,
    until_empty: bool = False,
    concurrency: int = 1,
    max_tasks: int | None = None,
    grace_s: float | None = None,
    isolate: bool = False,
    max_tasks_per_child: int = 100,
    ack_wait_s: float = _ACK_WAIT_S,
) -> Ledger:
    """Run the messages of a queue beside an application's other work on its event loop.

    ``async def`` tasks run on that loop, up to `concurrency` at once, and may use the
    application's clients. Everything else runs in threads: receives, hooks, and plain
    tasks. What coroutines leave running is the application's to end.

    The options are those of :func:`listen_for_messages`. No signals are handled. If
    this is cancelled, it stops as it does for `shutdown_event`, and then raises
    CancelledError; if it is cancelled again, it waits no longer.

    :param shutdown_event: set it to stop: threading's or asyncio's
    :returns: what became of the messages
    :raises ConfigurationError: as :func:`listen_for_messages`
    """
    make = functools.partial(
        Worker,
        num_messages=num_messages,
        visibility_timeout_s=visibility_timeout_s,
        loop_count=loop_count,
        until_empty=until_empty,
        concurrency=concurrency,
        max_tasks=max_tasks,
        grace_s=grace_s,
        isolate=isolate,
        max_tasks_per_child=max_tasks_per_child,
        ack_wait_s=ack_wait_s,
    )
    return await _run_beside_loop(make, priority, shutdown_event)


async def _run_beside_loop(
    make: Callable[..., Worker],
    priority: Priority | Iterable[Priority],
    shutdown_event: _Event | None,
) -> Ledger:
    """Make a worker that uses this event loop, and run it in a thread."""
    import asyncio

    told = _EitherEvent(shutdown_event)
    loop = asyncio.get_running_loop()

    def work() -> Ledger:
        queues = _queues_of(priority)
        broker = _brokers.broker()
        worker = make(broker, queues, shutdown_event=told, event_loop=loop)
        return worker.run()

    return await _wait_for_thread(work, told.set)


class _EitherEvent:
    """Is set once it, or another event, is."""

    def __init__(self, other: _Event | None) -> None:
        self._other, self._own = other, threading.Event()

    def set(self) -> None:
        """Set it, and leave the other one as it is."""
        self._own.set()

    def is_set(self) -> bool:
        """Return whether one of the two is set."""
        return self._own.is_set() or (self._other is not None and self._other.is_set())


async def _wait_for_thread(work: Callable[[], _R], stop: Callable[[], object]) -> _R:
    """Call a function in a thread of its own; if this is cancelled, stop it first.

    Not in the loop's executor, whose threads are few and hold up the interpreter's end.
    """
    import asyncio
    from concurrent.futures import Future

    running: Future[_R] = Future()
    running.set_running_or_notify_cancel()  # so nothing can cancel it

    def run() -> None:
        try:
            running.set_result(work())
        except BaseException as error:
            running.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    ended = asyncio.wrap_future(running)
    try:
        return await asyncio.shield(ended)
    except asyncio.CancelledError:
        stop()
        await asyncio.shield(ended)
        raise


def _queues_of(priority: Priority | Iterable[Priority]) -> list[str]:
    """Return the names of queues, the most urgent first, each once."""
    wanted = {priority} if isinstance(priority, Priority) else set(priority)
    if not wanted or not all(isinstance(each, Priority) for each in wanted):
        expected = "expected a taskhawk.Priority or several"
        raise ConfigurationError(f"priority: {expected}, got {priority!r}")
    broker = _brokers.broker()
    return [broker.destination(each) for each in _URGENCY if each in wanted]


# Copies: for the dead-letter queue, and for the queue itself.


def _carry_out(
    outcome: Outcome, broker: Broker, held: _Held, now: float
) -> tuple[str, float | None]:
    """Send the copy that an outcome needs; return how its message ends, and its delay.

    Without its copy, a message is left to its visibility timeout.
    """
    is_copied = True
    if outcome.fate is Fate.dead_letter:
        is_copied = _dead_letter(broker, held.message, outcome.error)
    elif outcome.fate is Fate.postpone and now >= held.lease_until:
        is_copied = False  # another may have it by now: there would be two for good
    elif outcome.fate is Fate.postpone:
        is_copied = _postpone(broker, held.message, outcome.delay_s or 0)
    if not is_copied:
        return "retried", None
    return _ENDS[outcome.fate], outcome.delay_s


def _release_by_copies(broker: Broker, keeper: _Keeper, course: _Course) -> None:
    """Release what never ran, and what its queue would dead-letter otherwise."""
    can_send = True
    while True:
        with keeper.lock:
            held = keeper.holdings.start(course.clock())
        if held is None:
            return
        if can_send:  # else the network is down, and the grace is short
            can_send = _postpone(broker, held.message, 0)
        if can_send:
            course.finish(held, "postponed")
        else:
            course.release(held)


def _postpone(broker: Broker, received: QueueMessage, delay_s: float) -> bool:
    """Send a copy to the same queue; return whether it is there, or log why not.

    Where it is not, the message is still in its queue.
    """
    queue = received.queue or ""
    try:
        copy = _postponed_copy(received, delay_s, broker.max_bytes)
        _accepted(broker.send(queue, [copy]))
    except Exception as failure:
        text = "%s: %s can't be postponed and is left to the queue: %s"
        _log.warning(text, queue, _name_of(received), failure)
        return False
    return True


def _postponed_copy(received: QueueMessage, delay_s: float, max_bytes: int) -> Outgoing:
    """Return the copy for the same queue; this receive of the message counts not.

    :param max_bytes: of the copy in bytes, attributes included
    """
    ours: dict[str, Mapping[str, Any]] = {}
    if received.attempt > 1:
        ours[_ATTEMPTS_ATTRIBUTE] = _as_attribute(received.attempt - 1)
    others = {_POSTPONED_ATTRIBUTE: _as_attribute(0), **received.message_attributes}
    others[_POSTPONED_ATTRIBUTE] = _as_attribute(received.postponed + 1)
    copy = received.copy(_add_attributes(received, ours, others, max_bytes))
    return copy._replace(delay_s=delay_s)


def _as_attribute(number: int) -> Mapping[str, Any]:
    """Return a number as a message attribute."""
    return {"DataType": "String", "StringValue": str(number)}


def _add_attributes(
    received: QueueMessage,
    ours: Mapping[str, Mapping[str, Any]],
    others: Mapping[str, Mapping[str, Any]],
    max_bytes: int,
) -> Mapping[str, Mapping[str, Any]]:
    """Return attributes of ours, and of the others those for which there is room.

    What gives way are headers, which the body has too.
    """
    attributes = dict(ours)
    for name, value in others.items():
        more = {name: value, **attributes}
        if len(more) <= _MAX_ATTRIBUTES and received.copy(more).size() <= max_bytes:
            attributes = more
    return attributes


def _dead_letter(
    broker: Broker, received: QueueMessage, error: BaseException | None
) -> bool:
    """Send a copy to the dead-letter queue; return whether it is there, or log why not.

    Where it is not, the message is still in its queue, which may redrive it.
    """
    try:
        target = broker.info(received.queue or "").dead_letter_queue
        if not target:
            raise ConfigurationError("it has no dead-letter queue")
        _send_copy(broker, target, received, error)
    except Exception as failure:
        text = "%s: %s can't be dead-lettered and is left to the queue: %s"
        _log.warning(text, received.queue, _name_of(received), failure)
        return False
    return True


def _send_copy(
    broker: Broker, target: str, received: QueueMessage, error: BaseException | None
) -> None:
    """Send a copy with the error, or without it where that makes it too large."""
    copy = _dead_letter_copy(received, error, broker.max_bytes)
    try:
        _accepted(broker.send(target, [copy]))
    except MessageTooLarge:  # a queue may be pinned lower than the service's limit
        plain = received.copy(_without_counts(received))
        _accepted(broker.send(target, [plain]))


def _dead_letter_copy(
    received: QueueMessage, error: BaseException | None, max_bytes: int
) -> Outgoing:
    """Return the copy for the dead-letter queue; ONE attribute says why it is there.

    :param max_bytes: of the copy in bytes, attributes included
    """
    attributes: dict[str, Mapping[str, Any]] = {}
    # The body stays as it is: a hundred bytes are for the attribute's name and type.
    room = min(_MAX_ERROR_BYTES, max_bytes - len(received.body.encode()) - 100)
    text = _error_record(received, error, room)
    if len(text) <= room:
        attributes[_ERROR_ATTRIBUTE] = {"DataType": "String", "StringValue": text}
    return received.copy(
        _add_attributes(received, attributes, _without_counts(received), max_bytes)
    )


def _without_counts(received: QueueMessage) -> dict[str, Mapping[str, Any]]:
    """Return a message's attributes but for what its attempts have been.

    Whoever sends a dead letter back, be it SQS, means it to begin anew.
    """
    attributes = dict(received.message_attributes)
    for name in (_ATTEMPTS_ATTRIBUTE, _POSTPONED_ATTRIBUTE):
        attributes.pop(name, None)
    return attributes


def _error_record(
    received: QueueMessage, error: BaseException | None, room: int
) -> str:
    """Return why a message was given up, as JSON: cut to fit as far as that can be."""
    record: dict[str, Any] = {
        "type": type(error).__name__,
        "message": _text_of(error)[:1000],
        "traceback": "".join(traceback.format_exception(error)),
        "attempt": received.attempt,
        "worker": f"{os.uname().nodename}:{os.getpid()}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    text = json.dumps(record)
    for key in ("traceback", "message"):
        while len(text) > room and record[key]:
            cut = math.ceil((len(text) - room) / 6)  # bytes of a character, or fewer
            if key == "traceback":
                record[key] = record[key][cut:]  # its end says most
            else:
                record[key] = record[key][:-cut]
            text = json.dumps(record)
    return text


# --- 17. log records ------------------------------------------------------------------
# The one place where records become lines: JSON for the command line's `--log-format`,
# and JSON for the worker that a child logs to. A record says in which task it was made,
# and fields that the application gave it stay as they are. Whatever a record carries,
# its line can be written.


# What every record has; all else was given to it as `extra`.
_RECORD_FIELDS = vars(logging.makeLogRecord({})).keys() | {"message", "asctime"}


def _add_task(record: logging.LogRecord) -> bool:
    """Note in a record the task that it was made in; used as a filter of handlers."""
    current = current_task()
    if current is not None:
        for name in ("task", "id", "attempt"):
            vars(record).setdefault(name, getattr(current, name))
    return True


def _to_line(values: Mapping[str, Any]) -> str:
    """Return values, which may be anything, as a JSON object in one line."""
    try:
        return json.dumps(values, default=str, allow_nan=False)
    except Exception:  # NaN, a circle, too deep, a key that is no text, a failing str()
        plain = {str(key): _to_plain(value) for key, value in values.items()}
        return json.dumps(plain)


def _to_plain(value: object) -> object:
    """Return what JSON makes of a value, or its text where JSON can't hold it."""
    try:
        return json.loads(json.dumps(value, default=str, allow_nan=False))
    except Exception:  # as above
        return _text_of(value)


class _JsonFormatter(logging.Formatter):
    """Writes a record as a JSON object in one line, with what it carries as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; what JSON can't hold is in it as text."""
        super().format(record)  # makes the record's text, and its traceback's
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{when}.{record.msecs:03.0f}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.message,
        }
        if record.exc_text:
            line["exception"] = record.exc_text
        extra = {
            key: value
            for key, value in vars(record).items()
            if key not in _RECORD_FIELDS
        }
        return _to_line(line | extra)


class _TextFormatter(logging.Formatter):
    """Writes a record as text, and adds the task it was made in unless the text has."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's
        """Return time, level, task and message; asctime is in the format given."""
        begin = f"{record.asctime} {record.levelname}"
        facts = vars(record)
        if "task" not in facts or str(facts.get("id")) in record.message:
            return f"{begin} {record.message}"
        run = f"{facts['task']} {facts.get('id')} attempt {facts.get('attempt')}"
        return f"{begin} [{_in_one_line(run)}] {record.message}"


class _LineFormatter(logging.Formatter):
    """Writes a child's record for its worker, where :func:`_log_again` reads it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a JSON object in one line that has all of the record as text."""
        super().format(record)  # makes the record's text, and its traceback's
        text = {"msg": record.message, "args": None, "exc_info": None}
        return _to_line(vars(record) | text)


def _log_again(fields: Mapping[str, Any]) -> None:
    """Log in the worker what a child has logged, if the worker's levels allow it."""
    record = logging.makeLogRecord(fields)
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


def _all_loggers() -> Iterator[logging.Logger]:
    """Yield all loggers that there are, the root first."""
    root = logging.getLogger()
    yield root
    for logger in list(root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):  # else a place in a dotted name
            yield logger


def _log_only_to(handler: logging.Handler, level: int) -> None:
    """Have all records go to one handler, whatever the application has configured."""
    for logger in _all_loggers():
        logger.handlers.clear()
        logger.propagate = True
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level)
    _log.logger.disabled = False  # as logging.config does to those made before it


# --- 18. isolation --------------------------------------------------------------------
# A slot of the worker may have a child: a process that runs its isolated messages, and
# that may be killed or crash without harm to the worker. Only a run that began can have
# crashed; what did not begin is a _CannotStart. They talk by one socket, in lines of
# JSON: nothing is unpickled, and no setting is in an argument or the environment. Of
# what comes from a child, only an answer that is due counts; else the child is killed.


_START_S = 60  # for a child to import the tasks, and to begin a run
_END_S = 5  # for a child to end by itself when it is told to, atexit functions included
_CRASH_S = 1  # for the system to say how a child ended whose socket is closed
_SIGNAL_NAMES = {number.value: number.name for number in signal.Signals}

# What a child runs. It must find modules where its worker does, this one included, so
# the first line from its socket is sys.path. Buffered, it would take the next ones too.
_BOOT = (
    "import importlib, json, sys; "
    "lines = open(int(sys.argv[3]), 'rb', 0, closefd=False); "
    "sys.path[:] = json.loads(lines.readline()); "
    "sys.exit(importlib.import_module(sys.argv[1])._run_program(sys.argv[2:]))"
)


class _CannotStart(TaskhawkError):
    """No child could begin to run a message: release it, and try again later."""


def _start_of_children(*, everything: bool) -> dict[str, Any]:
    """Return what children are told when they start, or {} if no task is isolated.

    :param everything: whether all tasks are isolated, or those that say so
    :raises ConfigurationError: if a child can't import a task or a hook
    """
    isolated = [each for each in _registry.values() if everything or each.isolate]
    if not isolated:
        return {}
    if getattr(sys, "frozen", False):
        raise ConfigurationError(
            f"{isolated[0].name}: a frozen application can't isolate tasks: "
            "leave out isolate and time_limit, or run it with Python"
        )
    return {
        "isolated": [each.name for each in isolated],
        "modules": list(dict.fromkeys(map(_module_to_import, isolated))),
        "settings": _settings_of_children(),
        "path": _path_of_children(),
        "level": logging.getLogger().level,
    }


def _module_to_import(declared: Task[Any, Any]) -> str:
    """Return the module whose import declares a task, as it did in the worker."""
    module = declared.declared_in
    # Not one that is starting the worker right now: a child would start another.
    spec = getattr(sys.modules.get(module), "__spec__", None)
    if getattr(spec, "_initializing", False):
        module = declared.fn.__module__
    if module in _MAINS:
        raise ConfigurationError(
            f"{declared.name}: a task of __main__ can't be isolated: "
            "move it to a module"
        )
    return module


def _path_of_children() -> list[str]:
    """Return sys.path with folders that do not depend on the current one."""
    path = []
    for entry in sys.path:
        if os.path.exists(entry or os.curdir):
            path.append(os.path.abspath(entry))
        else:  # it may be for a hook, such as those of editable installs
            path.append(entry)
    return path


def _settings_of_children() -> dict[str, Any]:
    """Return all settings as they are now, with hooks by their dotted paths."""
    values = {name: getattr(settings, name) for name in _SETTINGS}
    for name, value in values.items():
        if isinstance(value, RetryPolicy):
            values[name] = dataclasses.asdict(value)
        elif callable(value):
            values[name] = _path_of_hook(name, value)
    # Of one source, where another may have a token that does not belong to the key.
    credentials = settings.credentials()
    return values | {
        "AWS_ACCESS_KEY": credentials.get("aws_access_key_id"),
        "AWS_SECRET_KEY": credentials.get("aws_secret_access_key"),
        "AWS_SESSION_TOKEN": credentials.get("aws_session_token"),
    }


def _path_of_hook(name: str, hook: Any) -> str:
    """Return the dotted path by which a child finds the hook of a setting."""
    module = getattr(hook, "__module__", None)
    path = f"{module}.{getattr(hook, '__qualname__', '')}"
    found = None
    with contextlib.suppress(ConfigurationError):
        found = _Source("the hook itself", {name: path}.get).read(name)
    # The path must lead to this very hook: its name may be another function's by now.
    if found is hook and module not in _MAINS:
        return path
    raise ConfigurationError(
        f"{name}: where tasks are isolated, expected a function with a dotted path, "
        f"got {hook!r}"
    )


class _Child:
    """Runs the messages of a slot; isolated ones in one process after another.

    One thread calls its methods; any thread may call :meth:`kill`.

    :param start: what :func:`_start_of_children` returned
    :param max_tasks: a process is replaced after so many runs
    :param given_up: set before :meth:`kill` is called, when the worker's grace is over
    """

    def __init__(
        self, start: Mapping[str, Any], max_tasks: int, given_up: threading.Event
    ) -> None:
        self._start, self._max_tasks, self._given_up = start, max_tasks, given_up
        self._isolated = start.get("isolated", ())  # all messages of these tasks
        self._process: _ChildProcess | None = None
        self._runs_left = 0  # until the process is replaced

    def process(self, batch: Sequence[QueueMessage]) -> list[Outcome]:
        """Run messages that run together, and decide the fate of each.

        :returns: none if the process was killed because the worker's grace is over
        :raises _CannotStart: if the run did not begin, for another reason
        """
        message = self._find_isolated(batch[0])
        if message is None:
            return _process_all(batch)
        for received in batch:
            received.message = self._find_isolated(received)
        try:
            running = self._begin(message.task.name, batch)
        except _CannotStart:
            if self._given_up.is_set():
                return []
            raise
        return self._finish(running, message, batch)

    def start(self) -> _ChildProcess:
        """Return a process that lives, a new one if need be.

        :raises _CannotStart: if none can import the tasks
        """
        if self._process and self._process.has_ended(time.monotonic()):
            self._end(0)
        return self._process or self._start_process()

    def kill(self) -> None:
        """Kill the process and what it started, also in C code that holds the GIL."""
        running = self._process
        if running is not None:
            running.kill()

    def close(self) -> None:
        """Have the process end, if there is one."""
        self._end(_END_S)

    def _find_isolated(self, received: QueueMessage) -> Message | None:
        """Return the decoded message if its task is isolated, or has a time limit."""
        if not self._isolated and _OPTIONS_HEADER not in received.body:
            return None
        try:
            message = _decode(received.body)
            name = message.task.name
        except ValidationError:
            return None  # process() will say what is wrong with it
        if name in self._isolated:
            return message
        if _options_of(message).time_limit is not None and self._can_isolate(name):
            return message
        return None

    def _can_isolate(self, name: str) -> bool:
        """Have children import all tasks, for one that only its message isolates."""
        if name in self._start.get("isolated", ()):
            return True
        try:
            self._start = _start_of_children(everything=True)
        except ConfigurationError as error:
            _log.warning("a time limit of one message is not kept: %s", error)
            return False
        self.close()  # the process that knows fewer tasks
        return True

    def _begin(self, name: str, batch: Sequence[QueueMessage]) -> _ChildProcess:
        """Return a process that has begun to run messages, or raise _CannotStart."""
        request = [_fields_of(received) for received in batch]
        running = self.start()
        until = time.monotonic() + _START_S
        try:
            running.tell(request, until)
            running.hear("began", until)
        except (OSError, ValueError):
            how = self._end(_CRASH_S)
            text = f"{name}: its process ended before the run began: {how}"
            raise _CannotStart(text) from None
        return running

    def _start_process(self) -> _ChildProcess:
        """Start a process and have it import the tasks, or raise _CannotStart."""
        try:
            self._process = started = _ChildProcess()
        except OSError as error:
            raise _CannotStart(f"no process can be started: {error}") from error
        # Only now: had the grace ended before, kill() would not have seen the process.
        if self._given_up.is_set():
            started.kill()
        until = time.monotonic() + _START_S
        try:
            started.tell(self._start["path"], until)
            started.tell(self._start, until)
            [failure] = started.hear("imported", until)
        except TimeoutError:
            failure = f"it takes longer than {_START_S} s"
        except (OSError, ValueError):
            failure = f"its process ended: {self._end(_CRASH_S)}"
        if failure:
            self._end(_CRASH_S)
            raise _CannotStart(f"a child can't import the tasks: {failure}")
        self._runs_left = self._max_tasks
        return started

    def _finish(
        self, running: _ChildProcess, message: Message, batch: Sequence[QueueMessage]
    ) -> list[Outcome]:
        """Return how a run that began has ended; none if the grace is over."""
        name, began = message.task.name, time.monotonic()
        limit_s = _options_of(message).time_limit or message.task.time_limit
        failure: TaskhawkError
        try:
            answers = running.hear("ended", began + (limit_s or math.inf))
            outcomes = _to_outcomes(answers, len(batch))
        except TimeoutError:
            self._end(0)
            text = f"{name} ran longer than its time limit of {limit_s:g} s"
            failure = TimeLimitExceeded(text)
        except OSError:
            failure = ChildCrashed(f"{name}: its process ended: {self._end(_CRASH_S)}")
        except ValueError:
            self._end(0)
            text = f"{name}: its process wrote to the socket of its worker"
            failure = ChildCrashed(text)
        else:
            self._runs_left -= 1
            if not self._runs_left:
                self.close()
            return outcomes
        if self._given_up.is_set():
            return []
        return [_failed(received, failure, began) for received in batch]

    def _end(self, within_s: float) -> str:
        """Have the process end, if there is one, and return how it ended."""
        if self._process is None:
            return ""
        how = self._process.end(within_s)
        self._process = None  # only now: kill() may be called while it ends
        return how


class _ChildProcess:
    """A process of a slot, and the worker's end of the socket between them.

    :raises OSError: if it can't be started, for want of memory or file descriptors
    """

    def __init__(self) -> None:
        import socket

        subprocess: Any = importlib.import_module("subprocess")
        # Held to kill and to reap: what was reaped has a number that may be used again.
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair()
        number = theirs.fileno()
        program = [__name__, "_child", str(number), str(os.getpid())]
        # Such as -O and -W; multiprocessing takes them from there, too.
        flags = subprocess._args_from_interpreter_flags()  # noqa: SLF001
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, *flags, "-c", _BOOT, *program],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=[number],
                )
            except OSError:
                self._socket.close()
                raise
        self._lines = self._socket.makefile("rb")

    def tell(self, value: object, until: float) -> None:
        """Send it a line of JSON; raise OSError if it has ended, or time is up."""
        self._wait_at_most(until)
        self._socket.sendall(json.dumps(value, default=str).encode() + b"\n")

    def hear(self, kind: str, until: float) -> list[Any]:
        """Return what it says next of this kind, and log what it logged before.

        :raises TimeoutError: if it does not say it in time
        :raises OSError: if it has ended
        :raises ValueError: if it says anything else
        """
        while True:
            self._wait_at_most(until)
            line = self._lines.readline()
            if not line.endswith(b"\n"):
                raise ConnectionError("the process has ended")
            said = _parse_line(line)
            if isinstance(said, dict):
                _log.safely(_log_again, said)
            elif isinstance(said, list) and said[:1] == [kind]:
                return said[1:]
            else:
                raise ValueError(f"{kind!r} was expected of a child")

    def kill(self) -> None:
        """Kill it and what it started, also in C code that holds the GIL."""
        with self._lock, contextlib.suppress(PermissionError):  # macOS, of a zombie
            if self._process.returncode is None:
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self, within_s: float) -> str:
        """Have it end, by a kill if it takes longer, and return how it ended."""
        until = time.monotonic() + within_s
        with contextlib.suppress(OSError, ValueError):
            self._socket.shutdown(1)  # SHUT_WR: it ends when it has read all
            self.hear("nothing", until)  # but log records, and then that it has ended
        if not self.has_ended(until):  # a thread that a task left behind goes on, say
            self.kill()
            self.has_ended(math.inf)
        self._lines.close()
        self._socket.close()
        return _how_it_ended(self._process.returncode)

    def _wait_at_most(self, until: float) -> None:
        """Bound what follows on the socket; raise TimeoutError if time is up."""
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._socket.settimeout(None if until == math.inf else left_s)

    def has_ended(self, until: float) -> bool:
        """Wait for its end, at most until a time; return whether it has ended."""
        while True:
            with self._lock:
                code = self._process.poll()
            if code is not None:
                return True
            if time.monotonic() >= until:
                return False
            time.sleep(0.005)


def _fields_of(received: QueueMessage) -> dict[str, Any]:
    """Return a message as a child is told it."""
    fields = dict(vars(received))
    del fields["broker"], fields["message"]
    return fields


def _parse_line(line: bytes) -> Any:
    """Return the JSON of a line, or raise ValueError."""
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _to_answer(outcome: Outcome) -> list[Any]:
    """Return an outcome as :func:`_to_outcome` reads it; of an error, its texts."""
    error, raised = outcome.error, None
    if error is not None:
        trace = "".join(traceback.format_exception(error))
        raised = [type(error).__name__, _text_of(error), trace]
    return [outcome.fate.value, outcome.delay_s, raised]


def _to_outcomes(answers: Sequence[Any], count: int) -> list[Outcome]:
    """Return the outcomes that a child answers, one a message, or raise ValueError."""
    if len(answers) != count:
        raise ValueError("not an answer for each message")
    return [_to_outcome(answer) for answer in answers]


def _to_outcome(answer: Any) -> Outcome:
    """Return the outcome that a child answers, or raise ValueError."""
    match answer:
        case [str(fate), None | int() | float() as delay_s, None]:
            error = None
        case [
            str(fate),
            None | int() | float() as delay_s,
            [str(name), str(text), str(trace)],
        ]:
            # Not the class itself: a name in an answer is not to import anything.
            error = type(name, (TaskhawkError,), {})(text)
            error.add_note(trace)
        case _:
            raise ValueError("not an answer")
    return Outcome(Fate(fate), error, delay_s)


def _how_it_ended(exit_code: int) -> str:
    """Return in words what :attr:`subprocess.Popen.returncode` says."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    return _SIGNAL_NAMES.get(-exit_code, f"signal {-exit_code}")


class _Report(logging.StreamHandler[typing.TextIO]):
    """What a child says to its worker: its log records, and how its runs go.

    :param number: of the child's socket
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._socket = open(number, "w", closefd=False)  # noqa: SIM115 - until the end
        self._nowhere = os.open(os.devnull, os.O_RDWR)
        super().__init__(self._socket)
        self.addFilter(_add_task)
        self.setFormatter(_LineFormatter())
        os.register_at_fork(after_in_child=self._leave)

    def tell(self, *frame: object) -> None:
        """Say how a run goes."""
        with typing.cast("threading.RLock", self.lock):  # any thread may log
            self._socket.write(json.dumps(frame) + "\n")
            self._socket.flush()

    def _leave(self) -> None:
        """Keep what a task forks from the socket, and from holding it open."""
        os.dup2(self._nowhere, self._number, inheritable=False)
        self.stream = sys.stderr


@_EventLoop().in_this_thread()
def _serve_worker(argv: Sequence[str]) -> int:
    """Run messages for a slot of a worker, which started this process.

    :param argv: the number of the socket, and the worker's process id
    """
    number, worker = map(int, argv)
    _leave_signals_to_worker()
    _die_with_parent()
    if os.getppid() != worker:  # it died before that
        return 1
    # What is dispatched to the memory of this process would be lost.
    _SqliteFile.memory_pid = worker
    # What a task starts must not keep the socket open.
    os.set_inheritable(number, False)  # noqa: FBT003
    report = _Report(number)
    with open(number, "rb", closefd=False) as lines:
        start = json.loads(lines.readline())
        try:
            _import_tasks(start, report)
        except BaseException as error:  # SystemExit too
            report.tell("imported", _where_raised(error))
            return 1
        report.tell("imported", "")
        while line := lines.readline():
            report.tell("began")
            broker = _broker_of_child()
            batch = [QueueMessage(**it, broker=broker) for it in json.loads(line)]
            report.tell("ended", *map(_to_answer, _process_all(batch)))
    return 0


_programs["_child"] = _serve_worker


def _leave_signals_to_worker() -> None:
    """Have SIGINT and SIGTERM do nothing here, and what they did in what a task starts.

    A program that it starts has no handlers of ours; SIG_IGN would be inherited.
    """
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN  # it is inherited as it is
    }

    def restore() -> None:
        for number, handler in handlers.items():
            if signal.getsignal(number) is _ignore_signal:  # and not the task's own
                signal.signal(number, handler)

    for number in handlers:
        signal.signal(number, _ignore_signal)
    _restorers.append(restore)


def _ignore_signal(_number: int, _frame: object) -> None:
    """Handle a signal that is the worker's to handle."""


def _die_with_parent() -> None:
    """On Linux, have this process killed when the thread ends that started it."""
    with contextlib.suppress(ImportError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _import_tasks(start: Mapping[str, Any], report: logging.Handler) -> None:
    """Do in a child what its worker did before it began."""
    settings_of_worker = _read_settings(start["settings"])
    configure(settings_of_worker)
    _log_only_to(report, start["level"])
    _set_up_django()
    for name in start["modules"]:
        importlib.import_module(name)
    # Again, for modules may set up both when they are imported.
    configure(settings_of_worker)
    _log_only_to(report, start["level"])
    _broker_of_child()
    unknown = [name for name in start["isolated"] if name not in _registry]
    if unknown:
        # Their messages are left to the queue, as those of any unknown task.
        _log.error(
            "a child can't run %s: declare it in a module, not in a function that the "
            "worker calls",
            ", ".join(unknown),
        )


def _read_settings(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what :func:`_settings_of_children` wrote, after its way through JSON."""
    policy = values["TASKHAWK_RETRY"]
    if isinstance(policy, dict):
        policy = RetryPolicy(**policy)
    return {**values, "TASKHAWK_RETRY": policy}


def _broker_of_child() -> Broker | None:
    """Return the broker; None where the queue is in the memory of the worker."""
    if _is_in_memory(settings.TASKHAWK_BROKER):
        return None
    return _brokers.broker()


def _where_raised(error: BaseException) -> str:
    """Return an error's type, text and place in one line."""
    last = next(
        place
        for place in reversed(traceback.extract_tb(error.__traceback__))
        if not place.filename.startswith("<frozen ")
    )
    return f"{type(error).__name__}: {_text_of(error)} ({last.filename}:{last.lineno})"


# --- 19. Lambda -----------------------------------------------------------------------
# Lambda receives the messages, and deletes them if the handler returns without an
# error. So each failure is raised, or is in the answer. Nothing is deleted here but the
# messages that succeeded in a batch where others failed.


# SQS counts 12 hours from the receive, before Lambda's longest wait for a batch (5 min)
# and its longest run (15 min).
_MAX_LAMBDA_DELAY_S = _MAX_HELD_S - 1200
_SOME_ARN = "arn:aws:sqs:eu-west-1:123456789012:queue"  # the shape that is expected


def process_messages_for_lambda_consumer(
    lambda_event: Mapping[str, Any], *, context: Any = None, partial_batch: bool = False
) -> dict[str, list[dict[str, str]]] | None:
    """Run the messages of an SNS or SQS event; one that fails does not stop the others.

    If some of an SQS event failed, the others are deleted before the error is raised:
    that is safe with and without ReportBatchItemFailures on the event source mapping.

    :param lambda_event: the event that Lambda gives to the handler
    :param context: Lambda's context; with it, nothing is started in the last tenth of
        the remaining time
    :param partial_batch: return the failures of an SQS event instead of raising them:
        only with ReportBatchItemFailures
        (https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-errorhandling.html)
    :returns: None, or with `partial_batch` the answer that Lambda expects:
        ``{"batchItemFailures": [...]}``
    :raises ValidationError: if the event has no records; a malformed record is a failed
        run with this error
    :raises Exception: the error of the failed run, or an ExceptionGroup of several
    """
    records = None
    if isinstance(lambda_event, Mapping):
        records = lambda_event.get("Records")
    if not isinstance(records, list):
        raise ValidationError(
            "Records: expected an array of SNS or SQS records, got none"
        )
    done, failed = _run_records(records, context)
    _set_delays(failed)
    of_topic = any(received.sns_record is not None for received in failed)
    if partial_batch and not of_topic:  # SNS would take the answer for success
        return {"batchItemFailures": [{"itemIdentifier": r.message_id} for r in failed]}
    if not failed:
        return None
    _delete_done(done)
    errors: list[Any] = [outcome.error for outcome in failed.values()]
    if len(errors) > 1:
        raise BaseExceptionGroup("several runs failed", errors)
    raise errors[0]


def _run_records(
    records: Sequence[Any], context: Any
) -> tuple[list[QueueMessage], dict[QueueMessage, Outcome]]:
    """Run records in order, which is a FIFO queue's; return what is done and failed."""
    _check_before_work()
    done: list[QueueMessage] = []
    failed: dict[QueueMessage, Outcome] = {}
    reserve_ms = _left_ms(context) / 10  # for the deletes and the answer
    for batch in _batches_of(records):
        if _is_behind(batch[0], failed):
            outcomes = _not_started(batch, "an earlier one of its group failed")
        elif _left_ms(context) < reserve_ms:
            outcomes = _not_started(batch, "no time was left")
        else:
            outcomes = _process_all(batch)
        for received, outcome in zip(batch, outcomes, strict=True):
            if outcome.fate is Fate.acknowledge or _is_postponed(received, outcome):
                done.append(received)
            else:
                failed[received] = outcome
    return done, failed


def _batches_of(records: Sequence[Any]) -> Iterator[list[QueueMessage]]:
    """Yield each record by itself, and those of a batch task together."""
    waiting: dict[str, list[QueueMessage]] = {}
    for record in records:
        received = _from_record(record)
        received.batch_task = _find_batch_task(received)
        if received.batch_task is None:
            yield [received]
            continue
        batch = waiting.setdefault(received.batch_task, [])
        batch.append(received)
        if len(batch) == _most_together(received):
            yield waiting.pop(received.batch_task)
    yield from waiting.values()


def _is_postponed(received: QueueMessage, outcome: Outcome) -> bool:
    """Send the copy of a message that was postponed; return whether it is sent.

    Where the function may not send, the message counts as failed.
    """
    if outcome.fate is not Fate.postpone or received.broker is None:
        return False
    return _postpone(received.broker, received, outcome.delay_s or 0)


def _left_ms(context: Any) -> float:
    """Return how much time the function has left; without a context, it is infinite."""
    if context is None:
        return math.inf
    return float(context.get_remaining_time_in_millis())


def _is_behind(received: QueueMessage, failed: Iterable[QueueMessage]) -> bool:
    """Return whether a message must wait for one of its FIFO group that failed."""
    if not received.is_fifo:
        return False
    return received.group_id in [earlier.group_id for earlier in failed]


def _not_started(batch: Sequence[QueueMessage], reason: str) -> list[Outcome]:
    """Return the outcomes of messages that count as failed though they were not run."""
    texts = [f"{_name_of(received)} was not started: {reason}" for received in batch]
    return [Outcome(Fate.retry, TaskhawkError(text)) for text in texts]


def _set_delays(failed: Mapping[QueueMessage, Outcome]) -> None:
    """Have the queue show failed messages again when their outcomes say so."""
    changes = {}
    for received, outcome in failed.items():
        if outcome.delay_s is not None:
            delay_s = min(outcome.delay_s, _MAX_LAMBDA_DELAY_S)
            changes[received] = (received.receipt_handle, delay_s)
    warning = "can't change when %d of %d failed messages run again: %s"
    _change_all("change_visibility", changes, warning)


def _delete_done(done: Iterable[QueueMessage]) -> None:
    """Delete what succeeded, as Lambda will not after an error."""
    receipts = {received: received.receipt_handle for received in done}
    warning = "%d of %d messages that succeeded may run again: can't delete them: %s"
    _change_all("delete", receipts, warning)


class _LambdaMessage(QueueMessage):
    """A message that Lambda received: it decides when a failed one runs again."""

    in_lambda = True


def _from_record(record: Any) -> QueueMessage:
    """Read a record; a malformed one becomes a message that is not valid."""
    if not isinstance(record, Mapping):
        return _LambdaMessage(None, "")
    if "Sns" in record:
        return _from_topic(record)
    return _from_queue(record)


def _from_topic(record: Mapping[str, Any]) -> QueueMessage:
    """Read a record of an SNS event."""
    sns = record["Sns"]
    if not isinstance(sns, Mapping):
        sns = {}
    return _LambdaMessage(
        body=sns.get("Message"),
        message_id=str(sns.get("MessageId")),
        sns_record=record,
    )


def _from_queue(record: Mapping[str, Any]) -> QueueMessage:
    """Read a record of an SQS event."""
    message_id = str(record.get("messageId", ""))
    if not _is_well_formed(record):
        return _LambdaMessage(None, message_id)
    received = _LambdaMessage(
        body=record.get("body"),
        message_id=message_id,
        receipt_handle=record.get("receiptHandle"),
        attributes=record.get("attributes", {}),
        message_attributes=_as_boto3(record.get("messageAttributes", {})),
    )
    if "eventSourceARN" not in record:
        return received
    broker = _brokers.broker()
    if isinstance(broker, SqsBroker):  # else a handler is tried out without AWS
        received.broker, received.queue = broker.at_arn(record["eventSourceARN"])
    return received


def _is_well_formed(record: Mapping[str, Any]) -> bool:
    """Return whether the parts of an SQS event's record are of the types AWS gives."""
    attributes = record.get("attributes", {})
    message_attributes = record.get("messageAttributes", {})
    if not isinstance(message_attributes, Mapping):
        return False
    for part in (attributes, *message_attributes.values()):
        if not isinstance(part, Mapping):
            return False
    count = str(attributes.get("ApproximateReceiveCount", 1))
    arn = str(record.get("eventSourceARN", _SOME_ARN))
    return count.isdecimal() and arn.count(":") == _SOME_ARN.count(":")


def _as_boto3(
    attributes: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Return message attributes as a receive has them: Lambda's names begin small.

    So they can be sent again. Lambda adds lists, which are always empty, and which SQS
    does not take; the bytes of a binary one are Base64.
    """
    import base64

    found = {}
    for name, value in attributes.items():
        attribute = {
            part[:1].upper() + part[1:]: it for part, it in value.items() if it
        }
        if "BinaryValue" in attribute:
            with contextlib.suppress(ValueError, TypeError):  # then it stays as it is
                attribute["BinaryValue"] = base64.b64decode(attribute["BinaryValue"])
        found[name] = attribute
    return found


# === PART V: STATE ====================================================================
# What is remembered between messages, and for how long. Nothing here is needed by who
# does not use it: no table, no role, no request.


# --- 20. claims -----------------------------------------------------------------------
# Who holds a key, until when; in a DynamoDB table or in the SQLite file. Each change is
# one conditional write, so two workers never both get the same claim. A claim ends when
# it is released, and at the latest by itself, for who holds it may have died. A key is
# a hash, so neither a table nor a log has an argument. What fails raises: nobody has a
# claim that was not confirmed.
# https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/


_SKEW_S = 5  # by which the clocks of workers may differ, added to how long claims last
_MAX_PLACES = 1000  # of a key: all are in one item, and a write costs 1 KB of it
_MAX_RETENTION_S = 14 * 86_400  # no queue keeps a message for longer
_TTL_MARGIN_S = 86_400  # after a claim's end, before DynamoDB may delete its item
_CLAIM_TRIES = 3  # to get one of the places that are free, while others do too


class _Claim(NamedTuple):
    """The answer to a claim.

    :ivar token: what it is finished or released by; "" if others have the key
    :ivar is_done: whether a run of the key was finished, and is still remembered
    """

    token: str = ""
    is_done: bool = False


class _Claims(typing.Protocol):
    """Who holds a key, until when.

    ``claim`` takes one of `most` places of a key for `for_s`, unless all are taken or
    the key is done. ``extend`` has it end so long from now, and returns whether it is
    still ours. ``release`` gives it back, unless it is another's by now. ``finish`` has
    the key done for `keep_s`, whoever has it by now: the run has been.

    ``start`` notes that a message is about to run, unless another one's run of the same
    key started after this message was sent: then it returns False. The times are the
    queue's. A message may start again, and the times may be equal.

    Any thread may call at any time. A call that raises may have had its effect.
    """

    def claim(self, key: str, for_s: float, most: int = 1) -> _Claim: ...
    def extend(self, key: str, token: str, for_s: float) -> bool: ...
    def is_done(self, key: str) -> bool: ...
    def finish(self, key: str, token: str, keep_s: float) -> None: ...
    def release(self, key: str, token: str) -> None: ...
    def start(
        self, key: str, message_id: str, sent_ms: int, started_ms: int
    ) -> bool: ...


def _find_claims() -> _Claims:
    """Return where this process's claims are.

    :raises ConfigurationError: on SQS, if TASKHAWK_CLAIMS_TABLE is not set
    """
    broker = _brokers.broker()
    if isinstance(broker, SqliteBroker):
        return _SqliteClaims(broker)
    table = settings.TASKHAWK_CLAIMS_TABLE
    if table is None:
        example = _SETTINGS["TASKHAWK_CLAIMS_TABLE"].example
        raise ConfigurationError(
            "TASKHAWK_CLAIMS_TABLE is not set: on SQS, once, unique, limit, pauses and"
            f" --max-workers need a DynamoDB table: set its name, such as {example!r},"
            " and run python -m taskhawk provision"
        )
    return typing.cast("_Claims", _brokers.get(f"dynamodb:{table}"))


class _DynamoClaims(_AwsService, _Claims):
    """Claims in a DynamoDB table, one item for each key.

    The items have the layout that Powertools for AWS Lambda uses for idempotency:
    ``id`` (the key), ``status``, ``in_progress_expiration`` in milliseconds, and
    ``expiration`` in seconds, by which DynamoDB may delete the item. That may take
    days, so what is expired counts as deleted.

    :param url: ``dynamodb:`` and the name of the table
    :param clock: epoch seconds; passed in by tests
    """

    service, target_key = "dynamodb", "TableName"

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._table, self._clock = url.partition(":")[2], clock

    def claim(self, key: str, for_s: float, most: int = 1) -> _Claim:
        """Take a place: a free one if the first was not, as the answer then says."""
        import random

        owner, place = os.urandom(8).hex(), random.randrange(most)
        for _ in range(_CLAIM_TRIES):
            item = self._take(key, place, owner, for_s)
            if item is None or item.get(f"owner_{place}") == {"S": owner}:
                return _Claim(f"{place}-{owner}")
            if item.get("status") == {"S": "COMPLETED"}:
                return _Claim(is_done=True)
            free = self._free_places(item, most)
            if not free:
                break
            place = random.choice(free)
        return _Claim()

    def _take(
        self, key: str, place: int, owner: str, for_s: float
    ) -> Mapping[str, Any] | None:
        """Take a place if it is free; else return the item that is in the way.

        It is ours where botocore has repeated a request whose answer was lost.
        """
        now_s = self._clock()
        return self._update(
            key,
            "SET #owner = :owner, #until = :until, #status = :running, #expiry = :ttl",
            "(attribute_not_exists(#status) OR #status = :running OR #expiry < :now)"
            " AND (attribute_not_exists(#until) OR #until < :now_ms)",
            names={**_place_names(place), "#status": "status", "#expiry": "expiration"},
            values={
                ":owner": owner,
                ":until": _to_ms(now_s + for_s),
                ":running": "INPROGRESS",
                ":ttl": math.ceil(now_s + for_s + _TTL_MARGIN_S),
                ":now": math.floor(now_s),
                ":now_ms": _to_ms(now_s),
            },
        )

    def _free_places(self, item: Mapping[str, Any], most: int) -> list[int]:
        """Return the places of an item that nobody has."""
        now_ms = _to_ms(self._clock())
        free = []
        for place in range(most):
            until = item.get(_place_names(place)["#until"], {"N": "0"})
            if int(until["N"]) < now_ms:
                free.append(place)
        return free

    def extend(self, key: str, token: str, for_s: float) -> bool:
        """Have a claim end so long from now, if it is still ours."""
        place, _, owner = token.partition("-")
        until_s = self._clock() + for_s
        in_the_way = self._update(
            key,
            "SET #until = :until, #expiry = :ttl",
            "#owner = :owner",
            names={**_place_names(int(place)), "#expiry": "expiration"},
            values={
                ":owner": owner,
                ":until": _to_ms(until_s),
                ":ttl": math.ceil(until_s + _TTL_MARGIN_S),
            },
        )
        return in_the_way is None

    def is_done(self, key: str) -> bool:
        """Tell, by a claim that ends at once: that takes no other permission."""
        return self.claim(key, 0).is_done

    def finish(self, key: str, token: str, keep_s: float) -> None:
        """Have the key done for so long."""
        place, _, _ = token.partition("-")
        self._update(
            key,
            "SET #status = :done, #expiry = :ttl REMOVE #owner, #until",
            "",
            names={
                **_place_names(int(place)),
                "#status": "status",
                "#expiry": "expiration",
            },
            values={":done": "COMPLETED", ":ttl": math.ceil(self._clock() + keep_s)},
        )

    def release(self, key: str, token: str) -> None:
        """Give a place back."""
        place, _, owner = token.partition("-")
        self._update(
            key,
            "REMOVE #owner, #until",
            "#owner = :owner",
            names=_place_names(int(place)),
            values={":owner": owner},
        )

    def start(self, key: str, message_id: str, sent_ms: int, started_ms: int) -> bool:
        """Note that a message is about to run."""
        now_s = self._clock()
        in_the_way = self._update(
            key,
            "SET #message = :message, #started = :started, #expiry = :ttl",
            "attribute_not_exists(#started) OR #started <= :sent"
            " OR #message = :message OR #expiry < :now",
            names={
                "#message": "message_id",
                "#started": "started",
                "#expiry": "expiration",
            },
            values={
                ":message": message_id,
                ":started": started_ms,
                ":sent": sent_ms,
                ":ttl": math.ceil(now_s + _MAX_RETENTION_S),
                ":now": math.floor(now_s),
            },
        )
        return in_the_way is None

    def _update(
        self,
        key: str,
        change: str,
        condition: str,
        *,
        names: Mapping[str, str],
        values: Mapping[str, str | int],
    ) -> Mapping[str, Any] | None:
        """Change the item of a key; where the condition fails, return the item."""
        parameters: dict[str, Any] = {
            "Key": {"id": {"S": key}},
            "UpdateExpression": change,
            "ExpressionAttributeNames": names,
            "ExpressionAttributeValues": {
                name: _to_attribute(value) for name, value in values.items()
            },
        }
        if condition:
            parameters["ConditionExpression"] = condition
            parameters["ReturnValuesOnConditionCheckFailure"] = "ALL_OLD"
        try:
            self.call("send", "update_item", self._table, **parameters)
        except Exception as error:
            if _error_code(error) != "ConditionalCheckFailedException":
                raise
            answer = getattr(error, "response", {})
            return typing.cast("Mapping[str, Any]", answer.get("Item", {}))
        return None


def _to_ms(seconds: float) -> int:
    """Return a time in whole milliseconds."""
    return math.ceil(seconds * 1000)


def _to_attribute(value: str | int) -> dict[str, str]:
    """Return a value as DynamoDB's protocol has it."""
    if isinstance(value, int):
        return {"N": str(value)}
    return {"S": value}


def _place_names(place: int) -> dict[str, str]:
    """Return the attributes of a place; the first has Powertools' name."""
    until = "in_progress_expiration"
    if place:
        until += f"_{place}"
    return {"#owner": f"owner_{place}", "#until": until}


_schemes["dynamodb"] = _DynamoClaims  # type: ignore[assignment]


# A row for each claim. Of a start, the token is empty, for there is one for each key.
_more_tables += [
    """CREATE TABLE IF NOT EXISTS claim (
    key TEXT NOT NULL, token TEXT NOT NULL, until_ms INTEGER NOT NULL,
    is_done INTEGER NOT NULL DEFAULT 0, message_id TEXT, started_ms INTEGER,
    PRIMARY KEY (key, token)) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS claim_until ON claim (until_ms)",
]


class _SqliteClaims(_Claims):
    """Claims in the file of a broker, which they die with."""

    def __init__(self, broker: SqliteBroker) -> None:
        self._broker = broker

    def claim(self, key: str, for_s: float, most: int = 1) -> _Claim:
        """Take a place, if fewer than so many are taken."""
        token, now_ms = os.urandom(8).hex(), self._in_ms()
        insert = """INSERT INTO claim (key, token, until_ms) SELECT ?, ?, ?
            WHERE (SELECT count(*) FROM claim WHERE key = ? AND until_ms >= ?) < ?"""
        values = (key, token, self._in_ms(for_s), key, now_ms, most)
        if self._change(insert, values):
            return _Claim(token)
        return _Claim(is_done=self.is_done(key))

    def extend(self, key: str, token: str, for_s: float) -> bool:
        """Have a claim end so long from now, if it is still ours."""
        update = "UPDATE claim SET until_ms = ? WHERE key = ? AND token = ?"
        return self._change(update, (self._in_ms(for_s), key, token)) > 0

    def is_done(self, key: str) -> bool:
        """Tell, without a change to the file."""
        find = """SELECT count(*) FROM claim
            WHERE key = ? AND until_ms >= ? AND is_done"""
        self._file.open()
        [[done]] = self._file.read(find, (key, self._in_ms()))
        return bool(done)

    def finish(self, key: str, token: str, keep_s: float) -> None:
        """Have the key done for so long."""
        insert = """INSERT INTO claim (key, token, until_ms, is_done)
            VALUES (?, ?, ?, 1) ON CONFLICT (key, token)
            DO UPDATE SET until_ms = excluded.until_ms, is_done = 1"""
        self._change(insert, (key, token, self._in_ms(keep_s)))

    def release(self, key: str, token: str) -> None:
        """Give a place back."""
        self._change("DELETE FROM claim WHERE key = ? AND token = ?", (key, token))

    def start(self, key: str, message_id: str, sent_ms: int, started_ms: int) -> bool:
        """Note that a message is about to run."""
        insert = """INSERT INTO claim (key, token, until_ms, message_id, started_ms)
            VALUES (?, '', ?, ?, ?) ON CONFLICT (key, token) DO UPDATE
            SET until_ms = excluded.until_ms, message_id = excluded.message_id,
            started_ms = excluded.started_ms
            WHERE started_ms <= ? OR message_id = excluded.message_id
            OR started_ms > ?"""  # since then the clock was set back: it says nothing
        until_ms = self._in_ms(_MAX_RETENTION_S)
        values = (key, until_ms, message_id, started_ms, sent_ms, self._in_ms())
        return self._change(insert, values) > 0

    @property
    def _file(self) -> _SqliteFile:
        return self._broker._file  # noqa: SLF001 - the file is the broker's and ours

    def _in_ms(self, seconds: float = 0) -> int:
        """Return the time so many seconds from now, by the broker's clock."""
        return self._broker._in_ms(seconds)  # noqa: SLF001 - claims go by it

    def _change(self, statement: str, values: Sequence[Any]) -> int:
        """Make a change; return how many rows it met. What is expired goes, too."""
        file = self._file
        file.open()
        file.change("DELETE FROM claim WHERE until_ms < ?", (self._in_ms(),))
        return file.change(statement, values)


# --- 21. once, unique, limits ---------------------------------------------------------
# What claims are for. All of it acts where a run starts, never at dispatch, so no crash
# can suppress a message for one that was not sent. A message is ignored only if a run
# that stands for its own has ended, or has its own message in the queue. One that
# can't have its claim, or whose claim fails, is postponed: it never runs without it.
# Where a run has ended, and its claim can't be told, the claim ends by itself.


__all__ += ["Limit", "is_paused", "limit", "pause", "resume"]

_KEEP_S = 86_400  # how long `once` remembers, if keep_s does not say
_LAMBDA_RUN_S = 900  # a function runs no longer
_FIRST_WAIT_S = 10  # for a claim that others have; it doubles each time…
_LONGEST_WAIT_S = 160  # …up to this
_claim_faults = _Faults()


class Limit(NamedTuple):
    """What :func:`limit` returns, and the option `limit` of :func:`task` takes."""

    most: int
    per: tuple[str, ...] = ()
    every_s: float | None = None


def limit(
    most: int, *, per: tuple[str, ...] = (), every_s: float | None = None
) -> Limit:
    """Limit how many runs of a task there may be at once, or within a period.

    ``limit(1, per=('customer',))`` is a lock for each customer, ``limit(10)`` allows
    ten runs at once over all workers, and ``limit(100, every_s=60)`` a hundred starts
    in any minute.

    :param most: how many, 1 to 1,000
    :param per: names of arguments: each combination of their values has its own limit
    :param every_s: count the starts within this many seconds, not what runs at once
    :raises ConfigurationError: if one of them is wrong
    """
    if type(most) is not int or not 1 <= most <= _MAX_PLACES:
        raise ConfigurationError(
            f"limit: most: expected 1 to {_MAX_PLACES} runs, got {most!r}"
        )
    if not _are_names(per):
        raise ConfigurationError(f"limit: per: expected {_NAMES}, got {per!r}")
    if every_s is not None and not _is_above_zero(every_s):
        raise ConfigurationError(
            f"limit: every_s: expected a number of seconds above 0, got {every_s!r}"
        )
    return Limit(most, tuple(per), every_s)


# The options, when a task is declared.

_NAMES = "a tuple of names of arguments, such as ('order_id',)"


def _are_names(value: object) -> bool:
    """Return whether this is a tuple or list of strings."""
    if not isinstance(value, tuple | list):
        return False
    return all(isinstance(name, str) for name in value)


def _check_choice(option: str, made: Task[Any, Any], value: object) -> None:
    """Check `once` or `unique`: False, True, or arguments of the task."""
    if isinstance(value, bool):
        return
    if not value or not _are_names(value):
        raise ConfigurationError(
            f"{made.name}: {option}: expected True or {_NAMES}, got {value!r}"
        )
    _check_arguments(option, made, typing.cast("Sequence[str]", value))


def _check_arguments(option: str, made: Task[Any, Any], names: Sequence[str]) -> None:
    """Raise ConfigurationError unless these are arguments of the task."""
    for name in names:
        parameter = made._signature.parameters.get(name)  # noqa: SLF001
        given = name in made._given_by_worker  # noqa: SLF001
        if parameter is None or given or parameter.kind is parameter.VAR_KEYWORD:
            raise ConfigurationError(
                f"{made.name}: {option}: the function has no argument {name!r}"
            )


def _check_keep(made: Task[Any, Any], value: object) -> None:
    """Check `keep_s`, which goes with `once`."""
    if not made.options.get("once"):
        raise ConfigurationError(f"{made.name}: keep_s: expected once= as well")
    if not _is_above_zero(value):
        raise ConfigurationError(
            f"{made.name}: keep_s: expected a number of seconds above 0, got {value!r}"
        )


def _check_limit(made: Task[Any, Any], value: object) -> None:
    """Check `limit`."""
    if not isinstance(value, Limit):
        raise ConfigurationError(
            f"{made.name}: limit: expected taskhawk.limit(…), got {value!r}"
        )
    limit(value.most, per=value.per, every_s=value.every_s)  # it may be made by hand
    _check_arguments("limit", made, value.per)
    if value.every_s is None and made.time_limit is None:
        raise ConfigurationError(
            f"{made.name}: limit: expected time_limit= as well: after it, the place of"
            " a worker that died is free again"
        )


_more_options["once"] = functools.partial(_check_choice, "once")
_more_options["unique"] = functools.partial(_check_choice, "unique")
_more_options["keep_s"] = _check_keep
_more_options["limit"] = _check_limit
_CLAIMING = ("once", "unique", "limit")


def _needs_claims(its_task: Task[Any, Any]) -> bool:
    """Return whether a run of the task begins with a claim."""
    return any(its_task.options.get(option) for option in _CLAIMING)


def _check_claims() -> None:
    """Raise ConfigurationError if a registered task needs claims, and there are none.

    It is workers that need them, at their start: who only dispatches has no use for the
    table, nor a permission.
    """
    for its_task in _registry.values():
        if _needs_claims(its_task):
            _find_claims()
            if its_task.isolate and _is_in_memory(settings.TASKHAWK_BROKER):
                raise ConfigurationError(
                    f"{its_task.name}: sqlite:// is the memory of one process, where"
                    " the claims of an isolated task can't be: use a file, such as"
                    " sqlite:///queue.db"
                )


_before_work.append(_check_claims)


# A run.


def _around_run(
    its_task: Task[Any, Any], received: QueueMessage
) -> contextlib.AbstractContextManager[object, bool | None] | None:
    """Return what holds the claims of a run; in sync mode, there is nobody else."""
    if not its_task.options or not _needs_claims(its_task) or settings.TASKHAWK_SYNC:
        return None
    return _with_claims(its_task, received)


_around_runs.append(_around_run)


@contextlib.contextmanager
def _with_claims(its_task: Task[Any, Any], received: QueueMessage) -> Iterator[None]:
    """Hold the claims of a run, from before the task's call to after the post hook.

    The order matters. A message that `unique` has noted stands for others, so `once`
    must not ignore it after that. One that waits for its limit stands for them, too.
    """
    options = its_task.options
    with contextlib.ExitStack() as claims:
        if options.get("once"):
            claims.enter_context(_once(its_task, received))
        if options.get("unique"):
            _start_unique(its_task, received)
        if options.get("limit"):
            claims.enter_context(_within_limit(its_task, received))
        yield


@contextlib.contextmanager
def _once(its_task: Task[Any, Any], received: QueueMessage) -> Iterator[None]:
    """Claim a message, or its arguments; if the run succeeds, have the claim done."""
    message, chosen = _message_of(received), its_task.options["once"]
    if chosen is True:
        key = _key(its_task, "once", message.id)
    else:
        key = _key(its_task, "once", _arguments(its_task, message, chosen))
    claim = _ask("claim", key, _void_s(its_task, received))
    if claim.is_done:
        raise IgnoreException("it has been done")
    if not claim.token:
        raise PostponeException("it runs elsewhere", delay_seconds=_wait_s(received))
    try:
        yield
    except BaseException:
        _tell("release", key, claim.token)
        raise
    _tell("finish", key, claim.token, its_task.options.get("keep_s", _KEEP_S))


def _start_unique(its_task: Task[Any, Any], received: QueueMessage) -> None:
    """Ignore a message if a run of its key started after it was sent.

    The times are the queue's own. The first receive of the message that ran was before
    its start, so a time between the two says too little, and at worst one runs more.
    """
    sent = received.attributes.get("SentTimestamp")
    first = received.attributes.get("ApproximateFirstReceiveTimestamp")
    if sent is None or first is None:
        return  # of a topic: nothing can be compared
    message, chosen = _message_of(received), its_task.options["unique"]
    key = _key(its_task, "unique", _arguments(its_task, message, chosen))
    may_run = _ask("start", key, message.id, int(sent), int(first))
    if not may_run:
        raise IgnoreException("a run that started after it was sent stands for it")


@contextlib.contextmanager
def _within_limit(its_task: Task[Any, Any], received: QueueMessage) -> Iterator[None]:
    """Hold one of the places of a limit; of a rate, a place is taken for its time."""
    most, per, every_s = its_task.options["limit"]
    message = _message_of(received)
    key = _key(its_task, "limit", _arguments(its_task, message, per))
    for_s = every_s or _void_s(its_task, received)
    claim = _ask("claim", key, for_s, most)
    if not claim.token:
        raise PostponeException("its limit is reached", delay_seconds=_wait_s(received))
    try:
        yield
    finally:
        if every_s is None:
            _tell("release", key, claim.token)


def _message_of(received: QueueMessage) -> Message:
    """Return the decoded message of a run that is about to begin."""
    return typing.cast("Message", received.message)


def _void_s(its_task: Task[Any, Any], received: QueueMessage) -> float:
    """Return after which time the claim of a run is void, for its worker has died."""
    if received.in_lambda:  # which has no regard for time limits
        return _LAMBDA_RUN_S + _SKEW_S
    own_s = _options_of(_message_of(received)).time_limit or 0
    return max(own_s, its_task.time_limit or received.lease_s) + _SKEW_S


def _wait_s(received: QueueMessage) -> float:
    """Return when to look again for a claim that others have.

    A look costs a receive, a claim, a copy and a delete. The longer a message waits,
    the fewer looks; after some minutes that is one request in thirty seconds.
    """
    looks = received.postponed
    if received.is_fifo:  # it can't be postponed: each look is a receive that counts
        looks = received.receive_count - 1
    doublings = min(looks, 10)
    return _jittered(min(_FIRST_WAIT_S * 2**doublings, _LONGEST_WAIT_S))


def _key(its_task: Task[Any, Any], kind: str, what: object) -> str:
    """Return the key of a claim; a table may serve several services."""
    parts = [settings.TASKHAWK_QUEUE, its_task.name, what]
    # A default need not be JSON, and its text may differ from process to process.
    text = json.dumps(parts, sort_keys=True, default=_type_name)
    return f"{kind}:{_hash(text)}"


def _type_name(value: object) -> str:
    """Return the name of a value's type."""
    return _qualname(type(value))


def _arguments(
    its_task: Task[Any, Any], message: Message, chosen: Any
) -> dict[str, Any]:
    """Return a call's arguments by name, however they were given.

    :param chosen: True for all, or the names of some
    """
    given = its_task._given_by_worker  # noqa: SLF001
    keywords = {**message.kwargs, **dict.fromkeys(given)}
    bound = its_task._signature.bind(*message.args, **keywords)  # noqa: SLF001
    bound.apply_defaults()
    if chosen is True:
        chosen = [name for name in bound.arguments if name not in given]
    return {name: bound.arguments[name] for name in chosen}


def _ask(operation: str, *values: object) -> Any:
    """Make a claim, or postpone the run if that fails."""
    try:
        answer = getattr(_find_claims(), operation)(*values)
    except Exception as error:
        level = logging.WARNING
        if isinstance(error, ConfigurationError):
            level = logging.ERROR  # for a person to mend
        _claim_faults.failed("claims", "claim", _text_of(error), level)
        delay_s = _jittered(_POSTPONE_S)
        raise PostponeException("its claim failed", delay_seconds=delay_s) from error
    _claim_faults.worked("claims", "claim")
    return answer


def _tell(operation: str, *values: object) -> None:
    """End a claim; where that fails, it ends by itself, and the run has been."""
    try:
        getattr(_find_claims(), operation)(*values)
    except Exception as error:
        _claim_faults.failed("claims", "end claims", _text_of(error))
    else:
        _claim_faults.worked("claims", "end claims")


# A queue: pauses, and how many workers it has.

_LOOK_S = 20  # from one look at a pause or a worker's place to the next, at most
_PLACE_S = 60  # that a worker's place lasts without an extension
_KEEP_EVERY_S = 5  # a look at which places are to be extended; most are not yet
_FOR_EVER_S = 100 * 365 * 86_400
_PAUSED_BY = "0-"  # the token of a pause: anybody may end it


def pause(priority: Priority, *, for_s: float | None = None) -> None:
    """Stop all workers from receiving from a queue; they notice within 20 s.

    What they have received by then is run. Lambda does not notice.

    :param priority: which queue
    :param for_s: after how many seconds it resumes by itself; None for never
    :raises ConfigurationError: if an argument is wrong, or, on SQS, if
        TASKHAWK_CLAIMS_TABLE is not set
    """
    keep_s = _FOR_EVER_S if for_s is None else for_s
    if not _is_above_zero(keep_s):
        raise ConfigurationError(
            f"for_s: expected a number of seconds above 0, got {for_s!r}"
        )
    _find_claims().finish(_pause_key(_queue_of(priority)), _PAUSED_BY, keep_s)


def resume(priority: Priority) -> None:
    """Let workers receive from a queue again."""
    past_s = -2  # DynamoDB has whole seconds
    _find_claims().finish(_pause_key(_queue_of(priority)), _PAUSED_BY, past_s)


def is_paused(priority: Priority) -> bool:
    """Return whether a queue is paused."""
    return _is_queue_paused(_queue_of(priority))


def _is_queue_paused(queue: str) -> bool:
    """Return whether a queue of this name is paused."""
    if not _has_claims():
        return False
    return _find_claims().is_done(_pause_key(queue))


def _require_priority(priority: object) -> None:
    """Refuse what is no Priority."""
    if not isinstance(priority, Priority):
        raise ConfigurationError(
            f"priority: expected a taskhawk.Priority, got {priority!r}"
        )


def _queue_of(priority: Priority) -> str:
    """Return the name of the queue of a priority."""
    _require_priority(priority)
    return _brokers.broker().destination(priority)


def _pause_key(queue: str) -> str:
    """Return the key that is done while a queue is paused."""
    return f"pause:{_hash(queue)}"


def _has_claims() -> bool:
    """Return whether there is a place for claims, and so for pauses."""
    if settings.TASKHAWK_BROKER == "sqs":
        return bool(settings.TASKHAWK_CLAIMS_TABLE)
    return True


class _Gate:
    """Whether one worker may receive from its queues, as its last look says."""

    def __init__(self, worker: Worker) -> None:
        self._clock, self._most = worker.clock, worker.max_workers
        self._why_not: dict[str, str] = {}  # by queue; "" where it may
        self._looks_at: dict[str, float] = {}
        self._tokens: dict[str, str] = {}  # of its places

    def is_open(self, queue: str) -> bool:
        """Return whether to receive from a queue; look at most every 10 to 20 s."""
        now, why_not = self._clock(), self._why_not.get(queue, "")
        if now < self._looks_at.get(queue, -math.inf):
            return not why_not
        self._looks_at[queue] = now + _jittered(_LOOK_S)  # no other thread looks, too
        self._why_not[queue] = found = self._look(queue, why_not)
        if found and not why_not:
            _log.info("%s: receives nothing: %s", queue, found)
        elif why_not and not found:
            _log.info("%s: receives again", queue)
        return not found

    def keep(self, stop: threading.Event) -> None:
        """Keep its places while it is too busy to receive; the body of a thread."""
        while not stop.wait(_KEEP_EVERY_S):
            for queue, token in [*self._tokens.items()]:
                if token:
                    self.is_open(queue)

    def _look(self, queue: str, before: str) -> str:
        """Return why not to receive, or ""; if that can't be told, as before."""
        try:
            found = self._find_reason(queue)
        except Exception as error:
            _claim_faults.failed(queue, "look for a pause", _text_of(error))
            if self._most is not None:  # others may take its place
                return "it can't be told how many workers it has"
            return before
        _claim_faults.worked(queue, "look for a pause")
        return found

    def _find_reason(self, queue: str) -> str:
        """Look at the claims."""
        claims = _find_claims()
        if claims.is_done(_pause_key(queue)):
            return "it is paused"
        if self._most is None:
            return ""
        key, token = f"workers:{_hash(queue)}", self._tokens.get(queue, "")
        if token and claims.extend(key, token, _PLACE_S):
            return ""
        self._tokens[queue] = claims.claim(key, _PLACE_S, self._most).token
        if self._tokens[queue]:
            return ""
        return f"it has {self._most} workers already"


_gate_of = weakref.WeakKeyDictionary[Worker, _Gate]()


def _may_receive(worker: Worker, queue: str) -> bool:
    """Return whether a worker may receive from a queue now."""
    if worker.max_workers is None and not _has_claims():
        return True
    gate = _gate_of.setdefault(worker, _Gate(worker))
    return gate.is_open(queue)


def _begin_keeping(
    worker: Worker, stop: threading.Event
) -> Callable[[], object] | None:
    """Have a worker keep its places, also while all that it may run is running.

    :raises ConfigurationError: on SQS, if TASKHAWK_CLAIMS_TABLE is not set
    """
    if worker.max_workers is None:
        return None
    _find_claims()  # else the worker would look for a place for ever
    gate = _gate_of.setdefault(worker, _Gate(worker))
    return functools.partial(gate.keep, stop)


_gates.append(_may_receive)
_beside_workers.append(_begin_keeping)


# --- 22. schedules --------------------------------------------------------------------
# What is sent later. A long delay is a one-time schedule of EventBridge Scheduler that
# has the message and its id: dispatch returns once it is made. A periodic task has a
# schedule, too; on SQLite any worker queues it, each firing once. What Scheduler can't
# deliver within a day goes to the dead-letter queue. SQLite's own delays have no limit.
# https://docs.aws.amazon.com/scheduler/latest/UserGuide/


__all__ += ["cancel"]

_MAX_INPUT_BYTES = 262_144  # what a schedule can send
_LATER_S = 100 * 365 * 86_400  # a date that a schedule can have, as on SQLite
_EARLY_S = 10  # a time that is past when the request arrives is refused
_MINUTE_S = 60  # Scheduler's precision
# The longest that Scheduler tries to deliver; explicit, for an update to a schedule
# resets what it leaves out.
_DELIVERY = {"MaximumEventAgeInSeconds": 86_400, "MaximumRetryAttempts": 185}


def _schedule_group() -> str:
    """Return the name of the group that has all schedules of this service."""
    return f"taskhawk-{settings.require('TASKHAWK_QUEUE').lower()}"


def _schedule_name(message_id: str) -> str:
    """Return the name of a message's schedule: its id, or a hash where it can't be.

    It has no dot, so it is never the name of a periodic task's schedule.
    """
    if re.fullmatch("(?a)[\\w-]{1,64}", message_id):
        return message_id
    return _hash(message_id)


def _at(due_s: float, now_s: float) -> str:
    """Return when a schedule is to send: never early, at most a minute late, in UTC."""
    minutes = math.ceil(max(due_s, now_s + _EARLY_S) / _MINUTE_S)
    due = _EPOCH + timedelta(minutes=minutes)
    return f"at({due:%Y-%m-%dT%H:%M:%S})"


def _target(arn: str, body: str, group_id: str | None) -> dict[str, Any]:
    """Return what a schedule sends, and where: to a queue, or to a topic.

    :param body: the message; Scheduler fills in what looks like ``<aws.scheduler…>``
    :raises ConfigurationError: if TASKHAWK_SCHEDULER_ROLE is not set
    """
    target: dict[str, Any] = {
        "Arn": arn,
        "RoleArn": _scheduler_role(),
        "Input": body,
        "RetryPolicy": _DELIVERY,
    }
    # By its model, Scheduler knows the groups of FIFO queues only, and sends what it
    # can't deliver to no FIFO queue.
    if _is_fifo(arn):
        target["SqsParameters"] = {"MessageGroupId": group_id}
    elif ":sqs:" in arn:
        target["DeadLetterConfig"] = {"Arn": _dead_letter_name(arn)}
    return target


def _scheduler_role() -> str:
    """Return the role that schedules send by."""
    role = settings.TASKHAWK_SCHEDULER_ROLE
    if role is None:
        example = _SETTINGS["TASKHAWK_SCHEDULER_ROLE"].example
        raise ConfigurationError(
            "TASKHAWK_SCHEDULER_ROLE is not set: delays of over 15 minutes on SQS, any"
            " on SNS, and periodic tasks are schedules of EventBridge Scheduler, which"
            f" sends with a role: expected its ARN, such as {example!r}"
        )
    return str(role)


def _target_arn(priority: Priority) -> str:
    """Return the ARN of the queue or topic for messages of a priority."""
    if settings.IS_LAMBDA_APP:
        return str(_brokers.get("sns").destination(priority))
    sqs: SqsBroker = _brokers.get("sqs")
    return sqs.arn(sqs.destination(priority))


class _Scheduler(_AwsSender):
    """Sends messages later, each by a schedule of its own.

    Message attributes are left out, for a schedule has none: the body has all headers.
    """

    service, target_key = "scheduler", "GroupName"
    max_bytes, max_delay_s = _MAX_INPUT_BYTES, _LATER_S
    shared_calls = 0  # a call makes one schedule

    def destination(self, priority: Priority) -> str:
        """Return the ARN of the queue or topic that the message goes to."""
        _scheduler_role()  # else another error would be the first
        return _target_arn(priority)

    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        """Make a schedule for each message."""
        if len(entries) > 1:
            return self._one_by_one(destination, entries)
        [entry] = entries
        # What looks like a keyword of Scheduler's is the user's own text.
        body = entry.body.replace("<aws.", r"\u003caws.")
        target = _target(destination, body, entry.group_id)
        parameters = {**self._parameters(entry), "Target": target}
        try:
            self.call("send", "create_schedule", _schedule_group(), **parameters)
        except Exception as error:
            if _error_code(error) != "ConflictException" or not self._has(parameters):
                raise
        return []

    def _has(self, wanted: Mapping[str, Any]) -> bool:
        """Return whether this very schedule is there: the answer to its call was lost.

        Whoever publishes the message again is to be told that it is accepted.
        """
        found = None
        with contextlib.suppress(Exception):  # then nobody can tell
            found = self._call_on(wanted["Name"], "get_schedule")
        if found is None or found["Target"]["Input"] != wanted["Target"]["Input"]:
            return False
        return bool(found["ScheduleExpression"] == wanted["ScheduleExpression"])

    def _parameters(self, entry: Outgoing) -> dict[str, Any]:
        """Return when a message is to be sent, by a schedule of its name.

        The token that makes a repeated request harmless is botocore's, new for each
        call. If it were made of the id, AWS could take a message for its like that was
        cancelled.
        """
        message = _decode(entry.body)
        due_s = message.timestamp / 1000 + entry.delay_s
        return {
            "Name": _schedule_name(message.id),
            "ScheduleExpression": _at(due_s, time.time()),
            "ActionAfterCompletion": "DELETE",
            "FlexibleTimeWindow": {"Mode": "OFF"},
        }

    def delete(self, name: str) -> bool:
        """Delete a schedule; return whether it was there."""
        return self._call_on(name, "delete_schedule") is not None

    def cancel(self, name: str) -> bool:
        """Delete a message's schedule; return whether it can't have been sent.

        Once it is due, it is left alone: it is sent, or was and is still listed, or it
        is tried again, and is not to be lost.
        """
        found = self._call_on(name, "get_schedule")
        if found is None or _is_due(found["ScheduleExpression"]):
            return False
        return self.delete(name) and not _is_due(found["ScheduleExpression"])

    def _call_on(self, name: str, operation: str) -> Any:
        """Make a call for a schedule; return its answer, None if there is none."""
        try:
            return self.call("send", operation, _schedule_group(), Name=name)
        except Exception as error:
            if _error_code(error) != "ResourceNotFoundException":
                raise
            return None


def _is_due(at: str) -> bool:
    """Return whether a message may have been sent, by what :func:`_at` made of it."""
    soon = datetime.now(UTC) + timedelta(seconds=_SKEW_S)  # AWS's clock is another
    return at <= f"at({soon:%Y-%m-%dT%H:%M:%S})"


_schemes["schedule"] = _Scheduler


def cancel(message_id: str) -> bool:
    """Delete a message whose delay has not ended yet.

    On SQS and SNS this deletes its schedule. A message that the queue itself delays, up
    to 15 minutes on SQS, can't be cancelled. Nor can one that runs, has run or was
    postponed: with the option `unique`, it may stand for others that were ignored.

    :param message_id: what dispatch returned
    :returns: whether the message was still waiting; if so, it will never run. If it is
        due within seconds, that is False.
    :raises ConfigurationError: if schedules may not be read and deleted
    :raises Exception: of botocore or sqlite3, if the call fails otherwise; the message
        may have been deleted then
    """
    sender = _brokers.sender()
    if isinstance(sender, _AwsSender):
        scheduler: _Scheduler = _brokers.get("schedule")
        return scheduler.cancel(_schedule_name(message_id))
    if isinstance(sender, SqliteBroker):
        return _cancel_in_file(sender, message_id)
    return False  # in sync mode and in capture(), nothing waits


def _cancel_in_file(broker: SqliteBroker, message_id: str) -> bool:
    """Delete a message that waits in a file, if nobody has received it."""
    queues = [broker.destination(priority) for priority in Priority]
    beginning = _ENCODER.encode({"id": message_id})[:-1] + ","  # of each body
    delete = "DELETE FROM message WHERE"
    where = f"""queue IN ({_marks("?", queues)}) AND visible_ms > ?
        AND visible_ms < ? AND receipt IS NULL AND instr(attributes, ?) = 0
        AND substr(body, 1, ?) = ?"""
    now_ms = broker._in_ms()  # noqa: SLF001
    postponed = json.dumps(_POSTPONED_ATTRIBUTE) + ":"  # the name, not a header's value
    values = (*queues, now_ms, _BEHIND, postponed, len(beginning), beginning)
    file = broker._file  # noqa: SLF001 - both are of this very file
    return file.change(f"{delete} {where}", values) > 0


# Periodic tasks. AWS's expressions are parsed where a task is declared.


class _Field(NamedTuple):
    """A field of a cron expression: which numbers it may have, and names for them.

    `foreign` is a pattern for what AWS alone understands.
    """

    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()  # of the lowest number, and so on
    foreign: str = "(?!)"  # nothing

    def read(self, text: str) -> frozenset[int]:
        """Return the numbers that a field stands for; none if AWS alone knows them.

        :raises _Illegal: if it stands for nothing
        """
        if re.fullmatch(self.foreign, text.upper()):
            return frozenset()
        if text == "?":
            text = "*"
        numbers: set[int] = set()
        for part in text.split(","):
            found = self._read_part(part)
            if not found:
                raise _Illegal(
                    f"{self.name}: expected {self.low} to {self.high}, lists, ranges or"
                    f" steps of them, got {part!r}"
                )
            numbers.update(found)
        return frozenset(numbers)

    def _read_part(self, part: str) -> range:
        """Return the numbers of a part of a list: one, a range, all, or steps of them.

        There are none where it is no such part.
        """
        found = re.fullmatch(r"(?:\*|(\w+)(?:-(\w+))?)(?:/([1-9][0-9]?))?", part)
        if found is None:
            return range(0)
        first, last, step = found.groups()
        low, high = self.low, self.high
        if first is not None:
            low = self._number(first)
        if last is not None:
            high = self._number(last)
        elif first is not None and step is None:
            high = low
        if not self.low <= low <= high <= self.high:
            return range(0)
        return range(low, high + 1, int(step or 1))

    def _number(self, text: str) -> int:
        """Return the number that a number or name stands for; -1 for neither."""
        if text.upper() in self.names:
            return self.low + self.names.index(text.upper())
        return int(text) if re.fullmatch("[0-9]{1,4}", text) else -1


_MONTHS = (
    *("JAN", "FEB", "MAR", "APR", "MAY", "JUN"),
    *("JUL", "AUG", "SEP", "OCT", "NOV", "DEC"),
)
_WEEKDAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
_WEEKDAY = f"([1-7]|{'|'.join(_WEEKDAYS)})"
_FIELDS = (
    _Field("minutes", 0, 59),
    _Field("hours", 0, 23),
    _Field("day-of-month", 1, 31, (), "L|LW|([1-9]|[12][0-9]|3[01])W"),
    _Field("month", 1, 12, _MONTHS),
    _Field("day-of-week", 1, 7, _WEEKDAYS, f"{_WEEKDAY}?L|{_WEEKDAY}#[1-5]"),
    _Field("year", 1970, 2199),
)
_MAX_RATE = 99_999  # of any unit: five digits, which are 273 years at most
_UNITS_S = {"minute": 60, "hour": 3600, "day": 86_400}
_EXPRESSIONS = "'rate(5 minutes)', 'cron(0 9 ? * MON-FRI *)' or a timedelta of minutes"


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """When a periodic task is due.

    :ivar text: the expression, as AWS has it
    :ivar timezone: the name of its time zone
    :ivar interval_s: of a rate; 0 for a cron expression
    :ivar fields: the numbers of each field of a cron expression, all days for "?"; a
        field that AWS alone understands has none
    """

    text: str
    timezone: str
    interval_s: int = 0
    fields: tuple[frozenset[int], ...] = ()

    @property
    def is_foreign(self) -> bool:
        """Whether AWS alone understands it."""
        return not all(self.fields)

    def next_after(self, moment: datetime) -> datetime | None:
        """Return when it is due next, in UTC; None if never, or if AWS alone knows.

        A rate counts from 1970, and its days have 24 hours. A local time that daylight
        saving skips is skipped; one that it repeats counts once, the first time.
        https://docs.aws.amazon.com/scheduler/latest/UserGuide/schedule-types.html
        """
        if self.interval_s:
            interval = timedelta(seconds=self.interval_s)
            return _EPOCH + ((moment - _EPOCH) // interval + 1) * interval
        if self.is_foreign:
            return None
        zone = _zone(self.timezone)
        start = moment.astimezone(zone).replace(tzinfo=None, fold=0)
        for local in self._local_times(start):
            due = local.replace(tzinfo=zone).astimezone(UTC)
            is_skipped = due.astimezone(zone).replace(tzinfo=None) != local
            if due > moment and not is_skipped:
                return due
        return None

    def _local_times(self, start: datetime) -> Iterator[datetime]:
        """Yield the times that fit the fields, in order, from a minute on."""
        minutes, hours, _, _, _, years = map(sorted, self.fields)
        start = start.replace(second=0, microsecond=0)
        times = [timedelta(hours=h, minutes=m) for h in hours for m in minutes]
        day = start.replace(hour=0, minute=0)
        while day.year <= years[-1]:
            if self._is_due_on(day):
                for time_of_day in times:
                    if day + time_of_day >= start:
                        yield day + time_of_day
            day += timedelta(days=1)

    def _is_due_on(self, day: datetime) -> bool:
        """Return whether it is due on a day."""
        _, _, days, months, weekdays, years = self.fields
        if day.year not in years or day.month not in months:
            return False
        return day.day in days and day.isoweekday() % 7 + 1 in weekdays


def _zone(name: str) -> Any:
    """Return a time zone; that of UTC needs no data of the system's."""
    if name == "UTC":
        return UTC
    from zoneinfo import ZoneInfo

    return ZoneInfo(name)


def _parse_schedule(value: object, timezone: str) -> _Schedule:
    """Return what a task's option `schedule` stands for.

    :raises _Illegal: if it is wrong: says what was expected
    """
    if isinstance(value, timedelta):
        minutes, rest = divmod(value, timedelta(minutes=1))
        if rest or not 1 <= minutes <= _MAX_RATE:
            raise _Illegal(f"expected whole minutes, from 1 to {_MAX_RATE}")
        return _rate(minutes, "minute", timezone)
    if not isinstance(value, str):
        raise _Illegal(f"expected {_EXPRESSIONS}")
    rate = re.fullmatch(r"rate\(([1-9][0-9]{0,4}) (minute|hour|day)s?\)", value)
    if rate is not None:
        return _rate(int(rate[1]), rate[2], timezone)
    cron = re.fullmatch(r"cron\((.*)\)", value)
    if cron is None:
        raise _Illegal(f"expected {_EXPRESSIONS}")
    return _parse_cron(cron[1].split(), timezone)


def _rate(count: int, unit: str, timezone: str) -> _Schedule:
    """Return the schedule of a rate; AWS wants the plural for all but 1."""
    text = f"rate({count} {unit}s)"
    if count == 1:
        text = f"rate(1 {unit})"
    return _Schedule(text, timezone, count * _UNITS_S[unit])


def _parse_cron(texts: Sequence[str], timezone: str) -> _Schedule:
    """Return the schedule of a cron expression's fields."""
    if len(texts) != len(_FIELDS):
        names = ", ".join(field.name for field in _FIELDS)
        raise _Illegal(f"expected six fields ({names}), got {len(texts)}")
    expression = f"cron({' '.join(texts)})"
    if texts.count("?") != 1 or "?" not in (texts[2], texts[4]):
        raise _Illegal("expected ? for either day-of-month or day-of-week")
    fields = [field.read(text) for field, text in zip(_FIELDS, texts, strict=True)]
    return _Schedule(expression, timezone, 0, tuple(fields))


def _check_schedule(made: Task[Any, Any], value: object) -> None:
    """Refuse a schedule that is wrong, or of a task that needs arguments."""
    try:
        _parse_schedule(value, "UTC")
    except _Illegal as error:
        raise ConfigurationError(
            f"{made.name} has schedule={value!r}: {error}"
        ) from error
    try:
        made._check_call(0)  # noqa: SLF001 - as a worker will call it
    except TypeError as error:
        raise ConfigurationError(
            f"{made.name} has schedule={value!r}: expected a function that can be"
            f" called without arguments ({error})"
        ) from error


def _check_timezone(made: Task[Any, Any], value: Any) -> None:
    """Refuse a time zone that there is not, or without a schedule."""
    if "schedule" not in made.options:
        raise ConfigurationError(
            f"{made.name} has timezone={value!r}: expected schedule= as well"
        )
    try:
        _zone(value)
    except Exception as error:  # of many kinds, for names are looked up as files
        raise ConfigurationError(
            f"{made.name} has timezone={value!r}: expected the name of a time zone that"
            " this system has, such as 'Europe/Berlin'"
        ) from error


_more_options["schedule"] = _check_schedule
_more_options["timezone"] = _check_timezone


def _periodic_tasks() -> dict[str, Task[..., Any]]:
    """Return the tasks that have a schedule, by the names of their schedules."""
    tasks = {
        _periodic_name(found): found
        for found in _registry.values()
        if "schedule" in found.options
    }
    return dict(sorted(tasks.items()))


def _periodic_name(task: Task[..., Any]) -> str:
    """Return the name of a task's schedule, which no message's schedule can have."""
    name = f"task.{task.name}"
    if re.fullmatch(r"(?a)[\w.-]{1,64}", name):
        return name
    return f"task.{_hash(task.name)[:32]}"


def _schedule_of(task: Task[..., Any]) -> _Schedule:
    """Return the schedule of a periodic task."""
    options = task.options
    return _parse_schedule(options["schedule"], options.get("timezone", "UTC"))


def _periodic_body(task: Task[..., Any], scheduled: str) -> str:
    """Return the message of one firing.

    Its id names schedule and time: a delivery that is tried twice has one id.
    """
    message_id = f"{_periodic_name(task)}-{scheduled}"
    message = Message.new(task.name, msg_id=message_id, priority=task.priority)
    data = message.as_dict()
    data["metadata"]["timestamp"] = scheduled
    return _ENCODER.encode(data)


def _periodic_group(task: Task[..., Any], destination: str) -> str | None:
    """Return the group of a periodic task's messages; a FIFO queue needs one."""
    group = task.options.get("group")
    if group is not None:
        group = _group_id_of_call(task, group, (), {})
    if group is None and _is_fifo(destination):
        return _periodic_name(task)
    return group


def _periodic_schedule(task: Task[..., Any]) -> dict[str, Any]:
    """Return the schedule of a periodic task as Scheduler has it."""
    schedule, arn = _schedule_of(task), _target_arn(task.priority)
    # Scheduler fills in the time, the same for each attempt of a delivery.
    body = _periodic_body(task, "<aws.scheduler.scheduled-time>")
    return {
        "Name": _periodic_name(task),
        "GroupName": _schedule_group(),
        "Description": f"taskhawk: {task.name}"[:512],
        "ScheduleExpression": schedule.text,
        "ScheduleExpressionTimezone": schedule.timezone,
        "FlexibleTimeWindow": {"Mode": "OFF"},
        "Target": _target(arn, body, _periodic_group(task, arn)),
    }


# Periodic tasks on SQLite: any worker queues what is due. A schedule's row has when
# that is. The trigger makes one statement of moving it on and of the message, so each
# firing is queued once, however many workers see it due and whenever they die.
_SCHEDULE_TABLE = (
    """CREATE TABLE IF NOT EXISTS schedule (rule TEXT PRIMARY KEY,
    due_ms INTEGER NOT NULL, queue TEXT, group_id TEXT, message_id TEXT, body TEXT,
    sent_ms INTEGER)""",
    f"""CREATE TRIGGER IF NOT EXISTS schedule_fires AFTER UPDATE ON schedule
    BEGIN INSERT INTO message
    (queue, group_id, message_id, body, attributes, sent_ms, visible_ms) VALUES
    (new.queue, new.group_id, new.message_id, new.body, '{{}}', new.sent_ms, {_JOIN});
    END""",  # noqa: S608 - no value is in it
)
_NEVER_MS = 10**15
_LONGEST_NAP_S = 60  # a machine may sleep meanwhile, which no wait notices
_SET_BACK_S = 3 * 3600  # a clock set back by more was wrong before: no firing waits


class _Ticker:
    """Queues the periodic tasks of a worker on SQLite when they are due.

    What was missed while no worker ran is queued once.
    """

    def __init__(
        self,
        broker: SqliteBroker,
        tasks: Iterable[Task[..., Any]],
        stop: threading.Event,
    ) -> None:
        self._broker, self._stop = broker, stop
        self._in_ms = broker._in_ms  # noqa: SLF001 - the clock of the file's times
        self._tasks: dict[str, tuple[Task[..., Any], _Schedule]] = {}  # by rule
        for task in tasks:
            schedule = _schedule_of(task)
            rule = f"{_periodic_name(task)} {schedule.text} {schedule.timezone}"
            if settings.TASKHAWK_QUEUE:  # a file may have queues of several services
                rule += f" {settings.TASKHAWK_QUEUE}"
            self._tasks[rule] = task, schedule
        self._faults = _Faults()
        self._due_ms = 0  # when to look again

    def run(self) -> None:
        """Look whenever something is due; the body of a thread."""
        while not self._stop.is_set():
            left_s = (self._due_ms - self._in_ms()) / 1000
            if left_s <= 0:
                self.look()
            else:
                self._stop.wait(min(left_s, _LONGEST_NAP_S))

    def look(self) -> None:
        """Queue what is due; where that fails, say so once and try again later."""
        where, what = self._broker.url(""), "queue periodic tasks"
        try:
            self._due_ms = self._queue_due()
        except Exception as error:
            failures = self._faults.failed(where, what, repr(error))
            self._due_ms = self._in_ms(_pause_s(failures))
        else:
            self._faults.worked(where, what)

    def _queue_due(self) -> int:
        """Queue what is due, and return when the next will be.

        :raises Exception: if that fails for a task, once it is done for the others
        """
        file = self._broker._file  # noqa: SLF001 - of this very file, as its tables are
        file.open()
        for statement in _SCHEDULE_TABLE:
            file.change(statement, ())
        now_ms = self._in_ms()
        forget = "DELETE FROM schedule WHERE sent_ms > ?"
        file.change(forget, (self._in_ms(_SET_BACK_S),))
        for rule, (_, schedule) in self._tasks.items():
            insert = """INSERT OR IGNORE INTO schedule (rule, due_ms, sent_ms)
                VALUES (?, ?, ?)"""
            file.change(insert, (rule, _next_ms(schedule, now_ms), now_ms))
        select = "SELECT rule, due_ms FROM schedule WHERE"
        ours = f"rule IN ({_marks('?', list(self._tasks))})"
        moments_ms: list[int] = []
        failures: list[Exception] = []
        for rule, due_ms in file.read(f"{select} {ours}", list(self._tasks)):
            if due_ms > now_ms:
                moments_ms.append(due_ms)
                continue
            try:
                moments_ms.append(self._move_on(file, rule, due_ms, now_ms))
            except Exception as error:  # such as one of the function of its group
                failures.append(error)
        if failures:
            raise failures[0]
        return min(moments_ms)

    def _move_on(self, file: _SqliteFile, rule: str, due_ms: int, now_ms: int) -> int:
        """Queue a task that is due, unless another worker has; return the next time."""
        task, schedule = self._tasks[rule]
        next_ms = _next_ms(schedule, now_ms)
        scheduled = _EPOCH + timedelta(milliseconds=due_ms)
        body = _periodic_body(task, f"{scheduled:%Y-%m-%dT%H:%M:%SZ}")
        queue = self._broker.destination(task.priority)
        group_id = _periodic_group(task, queue)
        change = """UPDATE schedule SET due_ms = ?, queue = ?, group_id = ?,
            message_id = ?, body = ?, sent_ms = ? WHERE rule = ? AND due_ms = ?"""
        values = (next_ms, queue, group_id, _new_id(), body, now_ms)
        file.change(change, (*values, rule, due_ms))
        return next_ms


def _next_ms(schedule: _Schedule, now_ms: int) -> int:
    """Return when a schedule is due after now."""
    due = schedule.next_after(_EPOCH + timedelta(milliseconds=now_ms))
    if due is None:
        return _NEVER_MS
    return (due - _EPOCH) // timedelta(milliseconds=1)


def _refuse_foreign(task: Task[..., Any]) -> None:
    """Raise ConfigurationError if AWS alone understands a task's schedule."""
    if _schedule_of(task).is_foreign:
        raise ConfigurationError(
            f"{task.name} has schedule={task.options['schedule']!r}: L, W and # are"
            " AWS's alone: expected numbers, lists, ranges and steps on SQLite"
        )


def _begin_ticking(
    worker: Worker, stop: threading.Event
) -> Callable[[], object] | None:
    """Have a worker on SQLite queue the periodic tasks, and queue what is due now.

    :raises ConfigurationError: if AWS alone understands one of the schedules
    """
    tasks = _periodic_tasks()
    if not tasks or not isinstance(worker.broker, SqliteBroker):
        return None
    for task in tasks.values():
        _refuse_foreign(task)
    ticker = _Ticker(worker.broker, tasks.values(), stop)
    ticker.look()
    return ticker.run


_beside_workers.append(_begin_ticking)


# --- 23. Django's tasks ---------------------------------------------------------------
# Django's own API over the same messages and workers. One of Django's tasks becomes one
# of ours where it is declared, so no message has anything imported. Results are not
# kept: whoever wants them gets them by the signal task_finished, which is sent once for
# a message that is done with. Django is imported only when the class is asked for.
# https://docs.djangoproject.com/en/stable/topics/tasks/


class _DjangoBackend:
    """A backend of Django's tasks, on taskhawk's queues: Django 6.0 or newer has them.

    Its queues are the names of priorities. On the queue "default", a task whose
    priority is above 0 goes to "high", and one below 0 to "low".

    OPTIONS may have settings of taskhawk; options of :func:`task`, for all tasks of the
    backend; and ``on_commit``: True, which sends a message once the transaction around
    ``enqueue`` is committed. From Django 6.1 on, Django's decorator takes options of
    :func:`task`, too: those in the declaration count, whatever runs the task.
    """

    supports_async_task = True
    supports_defer = True  # where the queue can; enqueue() refuses what it can't
    supports_get_result = False
    supports_priority = True

    # Set by Django's own base class, which _make_django_backend() adds.
    alias: str
    queues: set[str]
    options: Mapping[str, Any]

    def check(self, **_: Any) -> list[Any]:
        """Return what is wrong with the settings, for ``manage.py check``."""
        from django.core.checks import Error

        wrong = [*self._flaws(), *map(str, settings.errors())]
        return [Error(text, id="taskhawk.E001") for text in wrong]

    def validate_task(self, task: Any) -> None:
        """Refuse a task that can't be run, and register one that can.

        Django calls it where a task is declared, and for each ``using()``.
        """
        from django.tasks.exceptions import InvalidTask

        super().validate_task(task)  # type: ignore[misc]
        try:
            _django_priority(task)
            self._task_of(task)
        except ConfigurationError as error:
            raise InvalidTask(str(error)) from error

    def enqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        """Queue a run, and return what Django calls its result: its id, above all.

        :raises Exception: as :meth:`AsyncInvocation.dispatch`. With ``on_commit``, the
            commit raises what the queue does not accept: its rows are committed then
        """
        message, result = self._make(task, args, kwargs)
        send = functools.partial(self._send, message, result)
        if self.options.get("on_commit"):
            from django.db.transaction import on_commit

            _prepare(message)  # the caller is told of what is wrong with the call
            on_commit(send)
        else:
            send()
        return result

    async def aenqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        """Queue a run as :meth:`enqueue` does; many at once share requests."""
        from django.tasks.signals import task_enqueued

        if settings.TASKHAWK_SYNC or self.options.get("on_commit"):
            # A transaction is of the thread in which Django runs what is not async.
            return await super().aenqueue(task, args, kwargs)  # type: ignore[misc]
        message, result = self._make(task, args, kwargs)
        await _publish_async(message)
        _note_enqueued(result)
        await task_enqueued.asend(type(self), task_result=result)
        return result

    def _make(self, task: Any, args: Any, kwargs: Any) -> tuple[Message, Any]:
        """Make the message of a run, and its result."""
        self.validate_task(task)
        message = self._message(task, args, kwargs)
        return message, _django_result(task, message.id, message.args, message.kwargs)

    def _message(self, task: Any, args: Any, kwargs: Any) -> Message:
        """Make the message of a run, once it is known that the worker can make it."""
        from django.utils.json import normalize_json

        invocation = self._task_of(task).with_priority(_django_priority(task))
        if task.run_after is not None:
            # A naive time, which it may be without USE_TZ, is the process's local time.
            left_s = task.run_after.timestamp() - time.time()
            invocation = invocation.with_delay(max(left_s, 0))
        return invocation._message(  # noqa: SLF001 - its own
            normalize_json(args), normalize_json(kwargs)
        )

    def _send(self, message: Message, result: Any) -> None:
        """Send a message, and tell that it is queued; in sync mode, before it runs."""
        if settings.TASKHAWK_SYNC:
            self._tell_enqueued(result)
            publish(message)
        else:
            publish(message)
            self._tell_enqueued(result)

    def _tell_enqueued(self, result: Any) -> None:
        """Tell that a message is queued."""
        from django.tasks.signals import task_enqueued

        _note_enqueued(result)
        task_enqueued.send(type(self), task_result=result)

    def _task_of(self, declared: Any) -> Task[Any, Any]:
        """Return our task for one of Django's; register it if it is new."""
        place = _place_of(declared.func)
        name = f"{place.module}.{place.qualname}"
        known = _registry.get(name)
        if known is not None and _is_made_of(known, declared):
            return known
        for flaw in self._flaws():
            raise ConfigurationError(flaw)
        options = {"name": name, "priority": _django_priority(declared)}
        for option in _django_task_options().intersection(self.options):
            options[option] = self.options[option]
        options |= _options_of_declaration(declared)
        decorator: Any = task
        made: Task[Any, Any] = decorator(**options, _django=declared)(
            _django_function(declared, type(self))
        )
        return made

    def _flaws(self) -> Iterator[str]:
        """Yield what is wrong with the backend's entry in TASKS."""
        where = f"TASKS[{self.alias!r}]"
        for name in sorted(self.queues.difference(_PRIORITIES)):
            yield f"{where}: QUEUES: {_expected_queue(name)}"
        legal = {"on_commit", *_SETTINGS, *_django_task_options()}
        for name in sorted(set(self.options) - legal):
            yield (
                f"{where}: OPTIONS: expected on_commit, settings of taskhawk or options"
                f" of taskhawk.task, got {name!r}"
            )
        if type(self) is not _make_django_backend():
            for name in sorted(_SETTINGS.keys() & self.options):
                yield f"{where}: OPTIONS: {name} is not read for a subclass"


def _expected_queue(name: object) -> str:
    """Return the sentence that refuses the name of a queue."""
    return f"expected one of {', '.join(_PRIORITIES)}, got {name!r}"


def _django_priority(declared: Any) -> Priority:
    """Return the queue of one of Django's tasks."""
    name = declared.queue_name
    if name not in _PRIORITIES:  # QUEUES = [] allows any
        raise ConfigurationError(f"queue_name: {_expected_queue(name)}")
    if name != Priority.default.name or declared.priority == 0:
        return Priority[name]
    if declared.priority > 0:
        return Priority.high
    return Priority.low


@functools.cache
def _django_task_options() -> frozenset[str]:
    """Return the options of :func:`task` that one of Django's tasks may have.

    Its name and priority are Django's to say, and it is called with its own arguments.
    """
    own = inspect.signature(task, **_ANNOTATIONS).parameters
    others = {"args", "more", "name", "priority", "batch", "_django"}
    return frozenset([*own, *_more_options]) - others


def _options_of_declaration(declared: Any) -> dict[str, Any]:
    """Return the options of :func:`task` that Django's decorator was given."""
    options = {}
    for name in _django_task_options():
        value = getattr(declared, name, None)  # it may be of another backend's class
        if value is not None:
            options[name] = value
    return options


def _is_made_of(known: Task[Any, Any], declared: Any) -> bool:
    """Return whether a task of ours was made of this one of Django's.

    It may be another object: each ``using()`` makes one.
    """
    first = known.options.get("_django")
    if first is None or first.func is not declared.func:
        return False
    return _options_of_declaration(first) == _options_of_declaration(declared)


def _leave_arguments(made: Task[Any, Any], _declared: Any) -> None:
    """Have one of Django's tasks called with what its message has, and no more."""
    made._given_by_worker = frozenset()  # noqa: SLF001 - its own
    made.accepts_metadata = made.accepts_headers = False


_more_options["_django"] = _leave_arguments
_call_options.add("_django")


def _django_function(declared: Any, backend: type) -> Callable[..., Any]:
    """Return what a worker calls for one of Django's tasks: its function, and signals.

    :param backend: the class, which is the sender of the signals
    """
    fn = declared.func
    # What it takes is Django's to say: `*args`, or arguments that are named as ours.
    called = _named_part(fn)
    signature = inspect.signature(called, follow_wrapped=False, **_ANNOTATIONS)
    parameters = list(signature.parameters.values())
    if declared.takes_context:
        del parameters[0]
    make = _django_plain_function
    if inspect.iscoroutinefunction(fn):
        make = _django_coroutine_function
    made = make(declared, backend)
    functools.update_wrapper(made, fn)
    vars(made)["__signature__"] = signature.replace(parameters=parameters)
    return made


def _django_plain_function(declared: Any, backend: type) -> Callable[..., Any]:
    """Return what runs a function of Django's between its signals."""
    from django.tasks.signals import task_finished, task_started

    def call(*args: Any, **kwargs: Any) -> None:
        run = _DjangoRun(declared, args, kwargs)
        task_started.send(backend, task_result=run.result)
        try:
            with _InOneProcess():
                value = declared.func(*run.context, *args, **kwargs)
            _refuse_what_has_not_run(value, declared.module_path)
            run.succeeded(value)
        except BaseException as error:
            run.failed(error)
            raise
        finally:
            if run.result.is_finished:
                task_finished.send(backend, task_result=run.result)

    return call


def _refuse_what_has_not_run(value: object, name: str) -> None:
    """Raise TypeError if a function returned what something else would have to run."""
    if inspect.isawaitable(value):
        raise TypeError(
            f"{name} returned what is to be awaited, but is no coroutine function:"
            " expected async def, also of what a decorator returns"
        )
    _refuse_generator(value, name)


def _django_coroutine_function(declared: Any, backend: type) -> Callable[..., Any]:
    """Return what runs a coroutine function of Django's between its signals."""
    from asgiref.sync import sync_to_async
    from django.tasks.signals import task_finished, task_started

    async def refresh(*, ran: bool = False) -> None:
        # Receivers of signals, and the ORM, run in a thread of asgiref's, which has
        # connections of its own. In sync mode, they are the caller's.
        if not settings.TASKHAWK_SYNC:
            await sync_to_async(_refresh_shared_connections)(ran=ran)

    async def call(*args: Any, **kwargs: Any) -> None:
        run = _DjangoRun(declared, args, kwargs)
        await refresh()
        await task_started.asend(backend, task_result=run.result)
        try:
            with _InOneProcess():
                value = await declared.func(*run.context, *args, **kwargs)
            run.succeeded(value)
        except BaseException as error:
            run.failed(error)
            raise
        finally:
            if run.result.is_finished:
                await task_finished.asend(backend, task_result=run.result)
            await refresh(ran=True)

    return call


class _DjangoRun:
    """A run of one of Django's tasks, as its context and the signals tell of it.

    Nobody knows what came of earlier runs of the message; how many, its receives tell.

    :param declared: Django's task
    :param args: the arguments that the message has
    """

    def __init__(self, declared: Any, args: Any, kwargs: Any) -> None:
        from django.tasks import TaskContext, TaskResultStatus
        from django.utils import timezone

        self._metadata = typing.cast("Metadata", current_task())
        self._status = TaskResultStatus
        now = timezone.now()
        earlier = ["unknown"] * (self._metadata.attempt - 1)
        self.result = _django_result(
            declared,
            self._metadata.id,
            args,
            kwargs,
            status=TaskResultStatus.RUNNING,
            enqueued_at=datetime.fromtimestamp(
                self._metadata.timestamp / 1000, now.tzinfo
            ),
            started_at=now,
            last_attempted_at=now,
            worker_ids=[*earlier, f"{os.uname().nodename}:{os.getpid()}"],
        )
        #: what the function gets ahead of its arguments
        self.context: list[Any] = []
        if declared.takes_context:
            self.context.append(TaskContext(task_result=self.result))

    def succeeded(self, value: Any) -> None:
        """Note that the function has returned."""
        self._ended(self._status.SUCCESSFUL)
        _set_fields(self.result, _return_value=value)

    def failed(self, error: BaseException) -> None:
        """Note that it raised: then the message may be done with, or be run again."""
        from django.tasks.base import TaskError

        if _are_all(IgnoreException, error):
            self._ended(self._status.SUCCESSFUL)
            return
        kind = type(error)
        path = f"{kind.__module__}.{kind.__qualname__}"
        text = "".join(traceback.format_exception(error))
        self.result.errors.append(TaskError(exception_class_path=path, traceback=text))
        if self._is_last(error):
            self._ended(self._status.FAILED)
        else:
            _set_fields(self.result, status=self._status.READY)

    def _is_last(self, error: BaseException) -> bool:
        """Return whether nothing runs the message again, by the table of fates."""
        if settings.TASKHAWK_SYNC:
            return True
        verdict = _verdict(self._metadata._received, error)  # noqa: SLF001 - its own
        return verdict.fate is Fate.dead_letter

    def _ended(self, status: Any) -> None:
        """Note that the message is done with."""
        from django.utils import timezone

        _set_fields(self.result, status=status, finished_at=timezone.now())


def _django_result(
    declared: Any, message_id: str, args: Any, kwargs: Any, **fields: Any
) -> Any:
    """Make a result of Django's, of a message that is queued unless `fields` differ."""
    from django.tasks import TaskResult, TaskResultStatus

    queued = {
        "status": TaskResultStatus.READY,
        "enqueued_at": None,
        "started_at": None,
        "finished_at": None,
        "last_attempted_at": None,
        "errors": [],
        "worker_ids": [],
    }
    return TaskResult(
        task=declared,
        id=message_id,
        args=args,
        kwargs=kwargs,
        backend=declared.backend,
        **{**queued, **fields},
    )


def _note_enqueued(result: Any) -> None:
    """Note that the queue has a message."""
    from django.utils import timezone

    _set_fields(result, enqueued_at=timezone.now())


def _set_fields(result: Any, **fields: Any) -> None:
    """Set fields of a result, which is frozen for everybody else."""
    for name, value in fields.items():
        object.__setattr__(result, name, value)


@functools.cache
def _make_django_backend() -> type:
    """Make the class, which needs Django's own as a base."""
    from django.tasks import Task as DjangoTask
    from django.tasks.backends.base import BaseTaskBackend

    place = {"__module__": __name__, "__qualname__": "DjangoBackend.task_class"}
    task_class = dataclasses.make_dataclass(
        "task_class",
        [(name, Any, None) for name in sorted(_django_task_options())],
        bases=(DjangoTask,),
        namespace=place,
        frozen=True,
        slots=True,
        kw_only=True,
    )
    names = {
        "__doc__": _DjangoBackend.__doc__,
        "__module__": __name__,
        "task_class": task_class,
    }
    return type("DjangoBackend", (_DjangoBackend, BaseTaskBackend), names)


def _get_late(name: str) -> Any:
    """Return what this module makes when it is asked for, and not before."""
    if name != "DjangoBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return _make_django_backend()
    except ImportError as error:
        raise AttributeError("DjangoBackend needs Django 6.0 or newer") from error


if typing.TYPE_CHECKING:

    class DjangoBackend(_DjangoBackend):
        """A backend of Django's tasks."""
else:
    __getattr__ = _get_late


# === PART VI: PEOPLE ==================================================================

__all__ += [
    "DeadLetter",
    "dead_letters",
    "main",
    "requeue_dead_letter",
]


# --- 24. dead letters -----------------------------------------------------------------
# For people: nothing in production depends on this room. A dead letter is deleted only
# once its copy is confirmed, so a crash or a fault in between leaves two copies, never
# none. A scan hides what it receives, and in the end makes what it left visible again.


_MOVED = "moved by the queue itself, after too many receives"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DeadLetter:
    """A message in a dead-letter queue, as :func:`dead_letters` yields it.

    It may come from anywhere, so neither its body nor its error need be ours. It can be
    sent back or deleted until the loop that yielded it has ended.

    :ivar received: the message as the queue gave it, with its body and attributes
    :ivar age_s: seconds since it was sent: here, by a worker; or for the first time, if
        the queue itself moved it
    :ivar record: what a worker recorded of the error: ``type``, ``message``,
        ``traceback``, ``attempt``, ``worker`` and ``time``; None where it recorded none
    :ivar message: None where the body is not valid; its task need not be registered
    :ivar invalid: why the body is not valid; None where it is
    """

    _scan: _Scan
    received: QueueMessage
    age_s: int
    record: Mapping[str, Any] | None
    message: Message | None = None
    invalid: str | None = None

    @property
    def message_id(self) -> str:
        """The id that the queue gave it."""
        return self.received.message_id

    @property
    def id(self) -> str | None:
        """The message's own id."""
        return self.message.id if self.message else None

    @property
    def task(self) -> str | None:
        """The name of its task."""
        return self.message.task_name if self.message else None

    @property
    def error(self) -> str:
        """Type and message of the recorded error; "" where there is none."""
        if not self.record:
            return ""
        return f"{self.record.get('type')}: {self.record.get('message')}"

    @property
    def traceback(self) -> str:
        """The traceback of the recorded error; "" where there is none."""
        if not self.record:
            return ""
        return str(self.record.get("traceback", ""))

    @property
    def cause(self) -> str:
        """Why it is here: its error, or what stands for one."""
        return self.error or self.invalid or _MOVED

    @property
    def sent(self) -> str:
        """When it was sent, as `age_s` has it, in ISO 8601."""
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(_sent_s(self.received)))

    def requeue(self) -> None:
        """Send it back to the queue of its priority, and delete it here.

        :raises PartialFailure: if it could not be sent, or if its copy was sent and it
            could not be deleted: then it is in both queues
        :raises TaskhawkError: if the loop has ended, or it was sent back or deleted
        """
        self._scan.requeue([self])
        self._scan.check([self.message_id])

    def delete(self) -> None:
        """Delete it for good.

        :raises PartialFailure: if it could not be deleted
        :raises TaskhawkError: if the loop has ended, or it was sent back or deleted
        """
        self._scan.delete([self])
        self._scan.check([self.message_id])

    def as_dict(self) -> dict[str, Any]:
        """Return all that is known of it but its body, for JSON."""
        message = self.message
        return {
            "message_id": self.message_id,
            "sent": self.sent,
            "age_s": self.age_s,
            "receives": self.received.attempt,
            "error": self.record,
            "invalid": self.invalid,
            "id": self.id,
            "task": self.task,
            "headers": message.headers if message else {},
            "args": message.args if message else None,
            "kwargs": message.kwargs if message else None,
        }


def _sent_s(received: QueueMessage) -> float:
    """Return when a message was sent, as SQS counts, in epoch seconds.

    A redrive keeps that time; a copy has its own.
    """
    return int(received.attributes.get("SentTimestamp", 0)) / 1000


def _read_dead_letter(scan: _Scan, received: QueueMessage) -> DeadLetter:
    """Read a dead letter; nothing in it is trusted."""
    age_s = max(0, round(time.time() - _sent_s(received)))
    record = _recorded_error(received)
    try:
        message = _decode(received.body)
    except ValidationError as error:
        return DeadLetter(scan, received, age_s, record, invalid=str(error))
    return DeadLetter(scan, received, age_s, record, message)


# What EventBridge Scheduler says of a message that it could not deliver:
# https://docs.aws.amazon.com/scheduler/latest/UserGuide/configuring-schedule-dlq.html
_UNDELIVERED = (
    "ERROR_CODE",
    "ERROR_MESSAGE",
    "EXECUTION_ID",
    "EXHAUSTED_RETRY_CONDITION",
    "IS_PAYLOAD_TRUNCATED",
    "RETRY_ATTEMPTS",
    "SCHEDULED_TIME",
    "SCHEDULE_ARN",
    "TARGET_ARN",
)


def _is_undelivered(received: QueueMessage) -> bool:
    """Return whether it is Scheduler that gave up a message."""
    return "SCHEDULE_ARN" in received.message_attributes


def _recorded_error(received: QueueMessage) -> dict[str, Any] | None:
    """Return the error that a worker recorded, or Scheduler."""
    attributes = received.message_attributes
    if _is_undelivered(received):
        code, text = [attributes.get(name, {}) for name in _UNDELIVERED[:2]]
        return {"type": code.get("StringValue"), "message": text.get("StringValue")}
    attribute = attributes.get(_ERROR_ATTRIBUTE, {})
    try:
        error = _DECODER.decode(attribute.get("StringValue", ""))
    except (ValueError, RecursionError):
        return None
    return error if isinstance(error, dict) else None


@dataclasses.dataclass(frozen=True)
class _LetterFilter:
    """Says which dead letters are meant: those that fit every field."""

    task: str = "*"  # a pattern, as the shell's
    errors: tuple[str, ...] = ()  # parts of its cause
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    oldest_s: float = math.inf
    newest_s: float = 0
    ids: frozenset[str] = frozenset()  # of the message or of SQS; any, if empty

    def matches(self, letter: DeadLetter) -> bool:
        """Return whether a dead letter is meant."""
        import fnmatch

        if not fnmatch.fnmatchcase(letter.task or "", self.task):
            return False
        if not all(text in letter.cause for text in self.errors):
            return False
        if not self.newest_s <= letter.age_s <= self.oldest_s:
            return False
        if self.ids and self.ids.isdisjoint([letter.id, letter.message_id]):
            return False
        return self.headers.items() <= _texts(letter).items()


def _texts(letter: DeadLetter) -> dict[str, str]:
    """Return the headers of a dead letter as text."""
    if letter.message is None:
        return {}
    return {name: str(value) for name, value in letter.message.headers.items()}


@dataclasses.dataclass
class _Scan:
    """One look at each dead letter of a queue; use it in a ``with`` block.

    It receives as it is iterated, and yields those that match. When the block ends,
    what is left is visible again.

    :param doing: what the scan is for, such as "requeueing"; `done` is that afterwards
    :param num_messages: how many to receive at once, up to ten
    :param lease_s: how long others can't see what was received; None takes the queue's
        own visibility timeout
    :param limit: end after so many that match
    :param say: shows the progress: a format and its arguments
    :param warn: says what went wrong, likewise
    """

    priority: Priority
    doing: str
    done: str
    wanted: _LetterFilter = _LetterFilter()
    limit: int = sys.maxsize
    num_messages: int = _MAX_BATCH
    lease_s: float | None = 600
    say: Callable[..., object] = _log.info
    warn: Callable[..., object] = _log.warning

    def __post_init__(self) -> None:
        """Find the queue and its dead-letter queue; nothing is received yet."""
        if self.num_messages < 1:
            raise ConfigurationError(
                f"num_messages: expected 1 or more, got {self.num_messages}"
            )
        self._broker = _brokers.broker()
        self._queue = self._broker.destination(self.priority)
        source = self._broker.info(self._queue).dead_letter_queue
        if source is None:
            raise ConfigurationError(
                f"{self._queue}: it has no dead-letter queue (no RedrivePolicy)"
            )
        self.source = source
        self.matched = 0
        self.found_ids: set[str | None] = set()  # of those that matched
        self._removed: list[str] = []  # the message ids of those moved or deleted
        self._failed: dict[str, str] = {}  # why one could not be, by its message id
        self._hidden: dict[str, str] = {}  # receipt handles, by message id
        self._seen: set[str] = set()
        self._has_begun = False

    def __enter__(self) -> typing.Self:
        return self

    def __iter__(self) -> Iterator[DeadLetter]:
        """Yield those that match, one by one."""
        for page in self.pages():
            yield from page

    def pages(self) -> Iterator[list[DeadLetter]]:
        """Yield those that match in lists of at most ten, which need one call each.

        End after as many as there were at the start. What arrives meanwhile is left to
        the next scan: it may be what was sent back.
        """
        total = self.total()
        self._has_begun = True
        self.say("%s about %d messages from %s", self.doing, total, self.source)
        total = max(total, 1)  # the count is approximate: look at least once
        while len(self._seen) < total and self.matched < self.limit:
            new = self._receive(total - len(self._seen))
            if not new:
                self._warn_of_groups(total - len(self._seen))
                return
            letters = [_read_dead_letter(self, received) for received in new]
            letters = [*filter(self.wanted.matches, letters)]
            letters = letters[: self.limit - self.matched]
            self.matched += len(letters)
            for letter in letters:
                self.found_ids |= {letter.id, letter.message_id}
            yield letters
            failed = len(self._failed)
            text = "%s %d of %d messages, %d failed"
            self.say(text, self.done, self.matched - failed, total, failed)

    def _warn_of_groups(self, left: int) -> None:
        """Warn of what a FIFO queue withholds: the rest of groups that were met."""
        if self._hidden and _is_fifo(self.source):
            text = "%s: about %d more wait behind these, in their groups"
            self.warn(text, self.source, left)

    def total(self) -> int:
        """Count the dead letters that are visible; SQS does so approximately."""
        return self._broker.depth(self.source).visible

    def _receive(self, left: int) -> list[QueueMessage]:
        """Receive once, and return what was not met before."""
        at_once = min(self.num_messages, _MAX_BATCH, left)
        received = self._broker.receive(
            self.source, at_once, 1, self.lease_s, threading.Event()
        )
        new = {}
        for message in received:
            # One comes back if its lease ends before the scan does.
            if message.message_id not in self._seen:
                new[message.message_id] = message
            self._hidden[message.message_id] = message.receipt_handle or ""
        self._seen.update(new)
        return list(new.values())

    def requeue(self, letters: Sequence[DeadLetter]) -> None:
        """Send copies to the queue, and delete those whose copy is confirmed.

        After a crash in between, a message is in both queues: it runs again.
        """
        self._receipts(letters)  # nothing is sent that can't be deleted then
        copies = []
        for letter in letters:
            attributes = _without_counts(letter.received)
            names = [_ERROR_ATTRIBUTE]
            if _is_undelivered(letter.received):
                names += _UNDELIVERED
            for name in names:
                attributes.pop(name, None)
            copies.append(letter.received.copy(attributes))
        refused = _send_all(self._broker, self._queue, copies)
        self.delete(self._accepted(letters, refused), "copied, but not deleted: ")

    def delete(self, letters: Sequence[DeadLetter], failure: str = "") -> None:
        """Delete dead letters; `failure` is what is said before the reason of one."""
        receipts = self._receipts(letters)
        delete = functools.partial(self._broker.delete, self.source)
        refused = _in_batches(delete, receipts, 3)
        for letter in self._accepted(letters, refused, failure):
            self._removed.append(letter.message_id)
            del self._hidden[letter.message_id]

    def _receipts(self, letters: Iterable[DeadLetter]) -> list[str]:
        """Return what they can be deleted by; raise TaskhawkError if one has none."""
        for letter in letters:
            if letter.message_id not in self._hidden:
                raise TaskhawkError(
                    f"dead letter {letter.message_id}: it was sent back or deleted"
                    " before, or its loop has ended"
                )
        return [self._hidden[letter.message_id] for letter in letters]

    def _accepted(
        self,
        letters: Sequence[DeadLetter],
        refused: Mapping[int, Refusal],
        failure: str = "",
    ) -> list[DeadLetter]:
        """Return those that were not refused; log the first refusal with its remedy."""
        if refused:
            first = next(iter(refused.values()))
            self.warn("%s: %s", first.code, first.text)
        for index, refusal in refused.items():
            self._failed[letters[index].message_id] = failure + refusal.code
        accepted = [letters[i] for i in range(len(letters)) if i not in refused]
        for letter in accepted:
            self._failed.pop(letter.message_id, None)  # of an earlier try
        return accepted

    def __exit__(self, kind: object, *_: object) -> None:
        """Show what is left to others again."""
        show = functools.partial(self._broker.change_visibility, self.source)
        changes = [(receipt, 0) for receipt in self._hidden.values()]
        self._hidden.clear()  # whoever receives them next has receipts of their own
        refused = _in_batches(show, changes, 3)
        if refused:
            reason = next(iter(refused.values())).text
            text = "%d of %d dead letters looked at stay hidden for a while: %s"
            self.warn(text, len(refused), len(changes), reason)
        if kind and self._has_begun:
            text = "stopped: up to %d more messages may have been %s or be hidden"
            self.say(text, _MAX_BATCH, self.done)

    def count(self) -> int:
        """Return how many were moved or deleted.

        :raises PartialFailure: if some were not; they are still among the dead letters
        """
        self.check([*self._removed, *self._failed])
        return len(self._removed)

    def check(self, message_ids: Iterable[str]) -> None:
        """Raise PartialFailure if one of these could not be moved or deleted."""
        good, bad = [], []
        for message_id in message_ids:
            if message_id in self._failed:
                bad.append({"Id": message_id, "Code": self._failed[message_id]})
            else:
                good.append({"Id": message_id})
        if bad:
            raise PartialFailure({"Successful": good, "Failed": bad})


def dead_letters(
    priority: Priority,
    *,
    task: str = "*",
    error: str = "",
    header: Mapping[str, Any] | None = None,
    older_than_s: float = 0,
    newer_than_s: float = math.inf,
) -> Generator[DeadLetter, None, None]:
    """Yield the dead letters of a queue, each once, for as many as there are now.

    The ones that the loop has reached are hidden from others, for ten minutes at most.
    Those it neither sent back nor deleted are visible again when it ends, whether by
    ``break`` or by an exception.

    :param priority: says which queue; its redrive policy names its dead-letter queue
    :param task: only those of this task; ``*`` stands for any text, ``?`` for one
        character, and ``[ab]`` for one of these
    :param error: only those with this text in their :attr:`DeadLetter.cause`
    :param header: only those with these headers, whose values are compared as text
    :param older_than_s: only those whose :attr:`DeadLetter.age_s` is at least that
    :param newer_than_s: only those whose age is at most that
    :raises ConfigurationError: if the queue has no dead-letter queue
    """
    _require_priority(priority)
    headers = {name: str(value) for name, value in (header or {}).items()}
    wanted = _LetterFilter(task, (error,), headers, newer_than_s, older_than_s)
    scan = _Scan(priority, "looking at", "looked at", wanted, say=_log.debug)
    return _letters_of(scan)


def _letters_of(scan: _Scan) -> Generator[DeadLetter, None, None]:
    """Yield the dead letters of a scan, and show what is left when the loop ends."""
    with scan:
        yield from scan


def requeue_dead_letter(
    priority: Priority, num_messages: int = 10, visibility_timeout: float | None = None
) -> int:
    """Send the dead letters of a queue back to it, and delete each that was copied.

    It ends after as many messages as there were at the start, so that those that fail
    again don't go round in circles, or when a receive comes back empty.

    :param priority: says which queue; its redrive policy names its dead-letter queue
    :param num_messages: how many to receive at once, up to 10
    :param visibility_timeout: seconds for which a message is hidden while it is copied;
        None takes the queue's own visibility timeout
    :returns: how many were sent back; 0, with a warning, where IS_LAMBDA_APP is set
    :raises ConfigurationError: if the queue has no dead-letter queue
    :raises PartialFailure: if some were not; they are still among the dead letters
    """
    _require_priority(priority)
    if settings.IS_LAMBDA_APP:
        _log.warning(
            "requeue_dead_letter: not supported for Lambda apps, whose queues are"
            " Lambda's"
        )
        return 0
    with _Scan(
        priority,
        "requeueing",
        "requeued",
        num_messages=num_messages,
        lease_s=visibility_timeout,
    ) as scan:
        for letters in scan.pages():
            scan.requeue(letters)
    return scan.count()


# --- 25. infrastructure ---------------------------------------------------------------
# What the tasks need from AWS: counted, made, written down for review, and checked.
# Nothing is ever deleted or lowered here: a value that someone set higher than we would
# stays. A missing queue is an answer, not an error.


_PROGRAM = f"python -m {__name__}"  # a vendored copy has another name
_PROVISION = f"{_PROGRAM} provision"  # fixes most of what check finds
_LETTERS_COMMAND = f"{_PROGRAM} dead-letters"
_TOLD = "as the error says"  # how to fix the rest
_ABSENT = "NonExistentQueue|QueueDoesNotExist|NotFound"  # codes of AWS, as patterns
_FORBIDDEN = "AccessDenied.*|AuthorizationError"
_NO_CLAIMS = f"{_FORBIDDEN}|ResourceNotFoundException"  # a table that is not there, too
_RETENTION_S = 4 * 86_400  # SQS's own default
# SQS counts from the first sending, so dead letters are kept for longer: for the most.
_DEAD_RETENTION_S = 14 * 86_400
_FEW_RECEIVES = 5  # AWS advises at least as many before the dead-letter queue
_NEVER_GIVEN_UP = "what fails is retried until it expires"


def _unless(codes: str, call: Callable[..., Any], *args: Any) -> Any:
    """Return what a call returns; None if it fails with one of these codes of AWS."""
    try:
        return call(*args)
    except Exception as error:
        if re.fullmatch(codes, _error_code(error)):
            return None
        raise


class _Counts(NamedTuple):
    """How many messages a queue has, and how many its dead-letter queue."""

    visible: int
    in_flight: int
    delayed: int
    dead_letters: int | None  # None: no dead-letter queue, or no access to it
    paused: bool | None = False  # None: that can't be told

    @property
    def queued(self) -> int:
        """All messages of the queue itself."""
        return self.visible + self.in_flight + self.delayed


_AllCounts = Mapping[str, _Counts | None]  # by the priorities' names
_Rates = Mapping[str, float]  # by how many messages a second each queue grows


def _counts(broker: Broker, queue: str) -> _Counts | None:
    """Count the messages of a queue; None where it is not there or may not be seen."""
    find_depth = functools.partial(_unless, f"{_ABSENT}|{_FORBIDDEN}", broker.depth)
    depth = find_depth(queue)
    if depth is None:
        return None
    dead = broker.info(queue).dead_letter_queue
    dead_depth = find_depth(dead) if dead else None
    dead_letters = sum(dead_depth) if dead_depth else None
    paused = _find_pause(queue)
    return _Counts(depth.visible, depth.in_flight, depth.delayed, dead_letters, paused)


def _find_pause(queue: str) -> bool | None:
    """Return whether a queue is paused; None, with a warning, if that can't be told."""
    try:
        return _unless(_NO_CLAIMS, _is_queue_paused, queue) or False
    except Exception as error:
        text = "%s: it can't be told whether it is paused: %s"
        _log.warning(text, queue, _text_of(error))
        return None


def _count_all() -> dict[str, _Counts | None]:
    """Count the messages of each priority, most urgent first.

    :raises ConfigurationError: if there is no queue at all, or none may be seen
    """
    broker = _brokers.broker()
    counts = {
        priority.name: _counts(broker, broker.destination(priority))
        for priority in _URGENCY
    }
    if not any(counts.values()):
        broker.depth(broker.destination(Priority.default))  # says what is wrong
    return counts


_BAR_WIDTH = 15  # marks: one a message, or shares where a queue has more


def _table(counts: _AllCounts, rates: _Rates, *, in_color: bool) -> Iterator[str]:
    """Draw the lines of a table; in colour, with bars, for a terminal of 80 columns."""
    yield f"{'':8}{'visible':>9}{'in flight':>11}{'delayed':>9}{'dead letters':>14}"
    queued = [found.queued for found in counts.values() if found]
    scale = _BAR_WIDTH / max([_BAR_WIDTH, *queued])
    for name, found in counts.items():
        if found is None:
            yield f"{name:8}{'no queue or access':>20}"
            continue
        line = f"{name:8}{found.visible:>9}{found.in_flight:>11}{found.delayed:>9}"
        line += _dead_cell(found.dead_letters, in_color=in_color)
        if name in rates:
            line += f"{rates[name]:>+8.1f}/s"
        if found.paused:
            line += "  paused"
        if in_color:
            line += f"  {_bar(found, scale)}"
        yield line.rstrip()


def _dead_cell(dead_letters: int | None, *, in_color: bool) -> str:
    """Return the cell of the table that counts dead letters: red, if there are any."""
    if dead_letters is None:
        return f"{'none/denied':>14}"
    cell = f"{dead_letters:>14}"
    if dead_letters and in_color and not os.environ.get("NO_COLOR"):
        return f"\x1b[31m{cell}\x1b[0m"
    return cell


def _bar(counts: _Counts, scale: float) -> str:
    """Draw a queue's messages: visible, in flight and delayed ones have a mark each."""
    visible = "█" * math.ceil(counts.visible * scale)
    in_flight = "▓" * math.ceil(counts.in_flight * scale)
    return visible + in_flight + "░" * math.ceil(counts.delayed * scale)


class _Resource(NamedTuple):
    """A queue, topic or subscription, with Terraform's type and attributes."""

    kind: str
    name: str
    attributes: dict[str, Any]


def _label(name: str) -> str:
    """Return Terraform's name for a resource: it can't begin with a digit."""
    return re.sub(r"\W|^(?=[0-9])", "_", name.lower())


def _resources(
    priority: Priority, max_receive_count: int, function: str | None
) -> list[_Resource]:
    """Describe what messages of a priority need, in an order in which it can be made.

    :param function: the ARN of a Lambda function to subscribe to the topic
    """
    service = settings.require("TASKHAWK_QUEUE")
    tags = {"taskhawk": service}
    if settings.IS_LAMBDA_APP:
        topic = f"taskhawk-{service.lower()}{_SUFFIXES[priority]}"
        return _topic_resources(topic, tags, function)
    queue = _brokers.broker().destination(priority)
    return _queue_resources(queue, tags, max_receive_count)


# In high throughput mode, which costs the same: a FIFO queue's limits are then those of
# its groups, not of the queue. What we send has ids of its own for deduplication; what
# schedules send has none, and its content identifies it.
_FIFO_ATTRIBUTES = {
    "fifo_queue": True,
    "content_based_deduplication": True,  # for schedules, which send no id
    "deduplication_scope": "messageGroup",
    "fifo_throughput_limit": "perMessageGroupId",
}


def _queue_resources(
    queue: str, tags: Mapping[str, str], max_receive_count: int
) -> list[_Resource]:
    """Describe a queue and, before it, its dead-letter queue."""
    dead = _dead_letter_name(queue)
    redrive = {
        "deadLetterTargetArn": f"${{aws_sqs_queue.{_label(dead)}.arn}}",
        "maxReceiveCount": max_receive_count,
    }
    dead_attributes = {
        "name": dead,
        "message_retention_seconds": _DEAD_RETENTION_S,
        "max_message_size": _MAX_SQS_BYTES,  # else Terraform sets 256 KiB
        "tags": tags,
    }
    if _is_fifo(queue):
        dead_attributes |= _FIFO_ATTRIBUTES
    attributes = dead_attributes | {
        "name": queue,
        "message_retention_seconds": _RETENTION_S,
        "redrive_policy": json.dumps(redrive),
    }
    return [
        _Resource("aws_sqs_queue", dead, dead_attributes),
        _Resource("aws_sqs_queue", queue, attributes),
    ]


def _topic_resources(
    topic: str, tags: Mapping[str, str], function: str | None
) -> list[_Resource]:
    """Describe a topic and the subscription of a function to it."""
    resources = [_Resource("aws_sns_topic", topic, {"name": topic, "tags": tags})]
    if function:
        attributes = {
            "topic_arn": f"${{aws_sns_topic.{_label(topic)}.arn}}",
            "protocol": "lambda",
            "endpoint": function,
        }
        resources.append(_Resource("aws_sns_topic_subscription", topic, attributes))
    return resources


def _schedule_resources() -> list[_Resource]:
    """Describe what long delays and periodic tasks need, if they are used."""
    tasks = _periodic_tasks()
    if not tasks and not settings.TASKHAWK_SCHEDULER_ROLE:
        return []
    role_path, _, role = _scheduler_role().partition(":role")[2].rpartition("/")
    group, tags = _schedule_group(), {"taskhawk": settings.TASKHAWK_QUEUE}
    attributes = {
        "name": role,
        "path": f"{role_path}/",
        "assume_role_policy": json.dumps(_trust()),
        "tags": tags,
    }
    policy = {
        "name": _SCHEDULE_POLICY,
        "role": role,
        "policy": json.dumps(_may_send()),
        "depends_on": [f"aws_iam_role.{_label(role)}"],
    }
    resources = [
        _Resource("aws_scheduler_schedule_group", group, {"name": group, "tags": tags}),
        _Resource("aws_iam_role", role, attributes),
        _Resource("aws_iam_role_policy", role, policy),
    ]
    for name, task in tasks.items():
        # Terraform has the names that the service has, in snake_case.
        schedule = _in_snake_case(_periodic_schedule(task))
        schedule["depends_on"] = [
            f"aws_scheduler_schedule_group.{_label(group)}",
            f"aws_iam_role_policy.{_label(role)}",
        ]
        resources.append(_Resource("aws_scheduler_schedule", name, schedule))
    return resources


def _table_resources() -> list[_Resource]:
    """Describe the table of claims, if it is used; Terraform has its TTL in it."""
    table = settings.TASKHAWK_CLAIMS_TABLE
    if table is None:
        return []
    attributes = {
        "name": table,
        "billing_mode": "PAY_PER_REQUEST",
        "hash_key": "id",
        "attribute": [{"name": "id", "type": "S"}],
        "ttl": {"attribute_name": "expiration", "enabled": True},
        "tags": {"taskhawk": settings.TASKHAWK_QUEUE},
    }
    return [
        _Resource("aws_dynamodb_table", table, attributes),
        _Resource("aws_dynamodb_ttl", table, {}),
    ]


_SCHEDULE_POLICY = "taskhawk"  # the name of the role's inline policy


def _trust() -> dict[str, Any]:
    """Return the policy that lets Scheduler use the role, for this account alone."""
    statement = {
        "Effect": "Allow",
        "Principal": {"Service": "scheduler.amazonaws.com"},
        "Action": "sts:AssumeRole",
        "Condition": {
            "StringEquals": {"aws:SourceAccount": settings.require("AWS_ACCOUNT_ID")}
        },
    }
    return {"Version": "2012-10-17", "Statement": [statement]}


def _may_send() -> dict[str, Any]:
    """Return the policy that lets the role send to what the service has."""
    arns = [_target_arn(priority) for priority in _URGENCY]
    action = "sns:Publish"
    if not settings.IS_LAMBDA_APP:
        action = "sqs:SendMessage"
        arns += [_dead_letter_name(arn) for arn in arns]
    statement = {"Effect": "Allow", "Action": action, "Resource": arns}
    return {"Version": "2012-10-17", "Statement": [statement]}


def _in_snake_case(value: Any) -> Any:
    """Return parameters of AWS with names as Terraform has them."""
    if not isinstance(value, dict):
        return value
    return {
        re.sub("(?<!^)(?=[A-Z])", "_", name).lower(): _in_snake_case(inner)
        for name, inner in value.items()
    }


def _terraform(resources: Iterable[_Resource]) -> dict[str, Any]:
    """Write resources in Terraform's JSON syntax."""
    by_kind: dict[str, dict[str, Any]] = {}
    for resource in resources:
        attributes = resource.attributes
        if not attributes:  # those of another resource say it
            continue
        described = by_kind.setdefault(resource.kind, {})
        label = _label(resource.name)
        while label in described:  # of a task whose name differs in punctuation alone
            label += "_"
        described[label] = attributes
        if "endpoint" in attributes:
            # Besides its subscription, the function's own policy must let SNS call it.
            by_kind.setdefault("aws_lambda_permission", {})[label] = {
                "action": "lambda:InvokeFunction",
                "principal": "sns.amazonaws.com",
                "function_name": attributes["endpoint"],
                "source_arn": attributes["topic_arn"],
            }
    return {"resource": by_kind}


def _find(service: _AwsService, operation: str, **parameters: Any) -> Any:
    """Return what a call of a service finds; None if there is no such thing."""
    explain = _explained(f"{service.service}:{operation}")
    call = functools.partial(getattr(service.client("send"), operation), **parameters)
    return _unless("ResourceNotFound.*|NoSuchEntity.*", explain(call))


class _Change(NamedTuple):
    """A call that makes or changes a resource, and what to say of it."""

    text: str
    operation: str  # botocore's name
    parameters: dict[str, Any]


def _queue_change(sqs: SqsBroker, resource: _Resource) -> _Change | None:
    """Return how to make or raise a queue; None if it is as it should be."""
    name = resource.name
    arn = sqs.arn(name)  # first of all, for it needs AWS_ACCOUNT_ID
    existing = _unless(_ABSENT, sqs.attributes, name, ["All"])
    attributes = _too_low(arn, existing or {}, resource.attributes)
    if existing is None:
        attributes |= _fixed_attributes(resource)
        parameters = {
            "QueueName": name,
            "Attributes": attributes,
            "tags": resource.attributes["tags"],
        }
        return _Change("made", "create_queue", parameters)
    if not attributes:
        return None
    changes = [
        f"{key} from {existing.get(key, 'none')} to {value}"
        for key, value in attributes.items()
    ]
    parameters = {"QueueUrl": sqs.url(name), "Attributes": attributes}
    return _Change(f"changed: {', '.join(changes)}", "set_queue_attributes", parameters)


def _fixed_attributes(resource: _Resource) -> dict[str, str]:
    """Return what is set of a queue when it is made, by SQS's names, and never after.

    What makes it a FIFO queue can't be changed; the rest someone may have changed.
    """
    if "fifo_queue" not in resource.attributes:
        return {}
    return {
        "FifoQueue": "true",
        "ContentBasedDeduplication": "true",
        "DeduplicationScope": resource.attributes["deduplication_scope"],
        "FifoThroughputLimit": resource.attributes["fifo_throughput_limit"],
    }


def _too_low(
    arn: str, existing: Mapping[str, str], wanted: Mapping[str, Any]
) -> dict[str, str]:
    """Return what to set of a queue's attributes: what is lower than it should be.

    A higher value was set for a reason; a lower one would cost messages.
    """
    attributes = {}
    for key, least in (
        ("MessageRetentionPeriod", wanted["message_retention_seconds"]),
        ("MaximumMessageSize", wanted["max_message_size"]),
    ):
        if int(existing.get(key, 0)) < least:
            attributes[key] = str(least)
    if "redrive_policy" in wanted:
        least = json.loads(wanted["redrive_policy"])["maxReceiveCount"]
        policy = json.loads(existing.get("RedrivePolicy") or "{}")
        policy.setdefault("deadLetterTargetArn", _dead_letter_name(arn))
        # The policy's number comes back as it was set: it may be a string.
        if int(policy.get("maxReceiveCount", 0)) < least:
            policy["maxReceiveCount"] = least
            attributes["RedrivePolicy"] = json.dumps(policy)
    return attributes


def _topic_change(sns: SnsSender, resource: _Resource) -> _Change | None:
    """Return how to make a topic; None if it is there."""
    if _subscribers(sns, sns.arn(resource.name)) is not None:
        return None
    parameters = {"Name": resource.name, "Tags": _tags(resource)}
    return _Change("made", "create_topic", parameters)


def _subscription_change(sns: SnsSender, resource: _Resource) -> _Change | None:
    """Return how to subscribe a function to a topic; None if it is subscribed."""
    topic = sns.arn(resource.name)
    function = resource.attributes["endpoint"]
    if function in (_subscribers(sns, topic) or ()):
        return None
    parameters = {"TopicArn": topic, "Protocol": "lambda", "Endpoint": function}
    return _Change(f"made for {function}", "subscribe", parameters)


def _subscribers(sns: SnsSender, topic: str) -> list[str] | None:
    """Return the endpoints that subscribe to a topic; None if there is none."""
    pages = sns.client("send").get_paginator("list_subscriptions_by_topic")
    read = _explained(topic)(pages.paginate(TopicArn=topic).build_full_result)
    found = _unless(_ABSENT, read)
    if found is None:
        return None
    return [subscription["Endpoint"] for subscription in found["Subscriptions"]]


def _group_change(scheduler: _Scheduler, resource: _Resource) -> _Change | None:
    """Return how to make the group of schedules; None if it is there."""
    if _find(scheduler, "get_schedule_group", Name=resource.name) is not None:
        return None
    parameters = {"Name": resource.name, "Tags": _tags(resource)}
    return _Change("made", "create_schedule_group", parameters)


_SCHEDULE_KEEPS = ("State", "KmsKeyArn")  # not a StartDate: a past one is refused


def _schedule_change(scheduler: _Scheduler, resource: _Resource) -> _Change | None:
    """Return how to make or correct a periodic task's schedule; None if it is right."""
    wanted = _periodic_schedule(_periodic_tasks()[resource.name])
    group = wanted["GroupName"]
    existing = _find(scheduler, "get_schedule", GroupName=group, Name=resource.name)
    if existing is None:
        return _Change("made", "create_schedule", wanted)
    differing = [
        key for key, value in wanted.items() if not _has_all(existing.get(key), value)
    ]
    if not differing:
        return None
    # An update resets what it leaves out. Someone may have disabled it, for example.
    kept = {key: existing[key] for key in _SCHEDULE_KEEPS if key in existing}
    parameters = {**kept, **wanted}
    return _Change(f"changed: {', '.join(differing)}", "update_schedule", parameters)


def _table_change(dynamodb: _AwsService, resource: _Resource) -> _Change | None:
    """Return how to make the table of claims; None if it is there.

    :raises ConfigurationError: if it is another one's table, with another key
    """
    found = _find(dynamodb, "describe_table", TableName=resource.name)
    key = [{"AttributeName": "id", "KeyType": "HASH"}]
    types = [{"AttributeName": "id", "AttributeType": "S"}]
    if found is None:
        parameters = {
            "TableName": resource.name,
            "KeySchema": key,
            "AttributeDefinitions": types,
            "BillingMode": "PAY_PER_REQUEST",
            "Tags": _tags(resource),
        }
        return _Change("made", "create_table", parameters)
    table = found["Table"]
    if table["KeySchema"] != key or types[0] not in table["AttributeDefinitions"]:
        raise ConfigurationError(
            f"table {resource.name}: expected its key to be id alone, a string: name"
            " another one by TASKHAWK_CLAIMS_TABLE"
        )
    return None


def _ttl_change(dynamodb: _AwsService, resource: _Resource) -> _Change | None:
    """Return how to have DynamoDB delete what has expired; None if it does."""
    table = resource.name
    found = _find(dynamodb, "describe_time_to_live", TableName=table) or {}
    description = found.get("TimeToLiveDescription", {})
    is_on = description.get("TimeToLiveStatus") in ("ENABLING", "ENABLED")
    if is_on and description.get("AttributeName") == "expiration":
        return None
    wanted = {"AttributeName": "expiration", "Enabled": True}
    parameters = {"TableName": table, "TimeToLiveSpecification": wanted}
    return _Change("made", "update_time_to_live", parameters)


def _tags(resource: _Resource) -> list[dict[str, str]]:
    """Return a resource's tags as most services take them."""
    return [{"Key": k, "Value": v} for k, v in resource.attributes["tags"].items()]


def _abandoned_schedules() -> list[str]:
    """Return the names of our schedules whose tasks are not registered."""
    if not _schedule_resources():
        return []
    scheduler, group = _brokers.get("schedule"), _schedule_group()
    pages = scheduler.client("send").get_paginator("list_schedules")
    # Of messages with a long delay there may be millions: their names have no dot.
    found = pages.paginate(GroupName=group, NamePrefix="task.")
    read = _explained(group)(found.build_full_result)
    answer = _unless("ResourceNotFoundException", read) or {"Schedules": []}
    names = {schedule["Name"] for schedule in answer["Schedules"]}
    return sorted(names.difference(_periodic_tasks()))


def _has_all(existing: Any, wanted: Any) -> bool:
    """Return whether a value of AWS's has all that is wanted of it."""
    if isinstance(wanted, dict) and isinstance(existing, dict):
        return all(_has_all(existing.get(key), wanted[key]) for key in wanted)
    return bool(existing == wanted)


def _role_change(iam: _Iam, resource: _Resource) -> _Change | None:
    """Return how to make the role that schedules send by; None if it is there."""
    if _find(iam, "get_role", RoleName=resource.name) is not None:
        return None
    attributes = resource.attributes
    parameters = {
        "RoleName": resource.name,
        "Path": attributes["path"],
        "AssumeRolePolicyDocument": attributes["assume_role_policy"],
        "Tags": _tags(resource),
    }
    return _Change("made", "create_role", parameters)


def _policy_change(iam: _Iam, resource: _Resource) -> _Change | None:
    """Return how to let the role send; None if it may."""
    wanted = resource.attributes["policy"]
    of_role = {"RoleName": resource.name, "PolicyName": _SCHEDULE_POLICY}
    found = _find(iam, "get_role_policy", **of_role)
    if found is not None and found["PolicyDocument"] == json.loads(wanted):
        return None
    text = "changed" if found else "made"
    return _Change(text, "put_role_policy", {**of_role, "PolicyDocument": wanted})


class _Iam(_AwsService):
    """IAM, which has the role that schedules send by."""

    service = "iam"


_schemes["iam"] = _Iam  # type: ignore[assignment]


# By Terraform's type: which service makes it, and what finds out whether it is there.
_PROVIDERS: dict[str, tuple[str, Callable[[Any, _Resource], _Change | None]]] = {
    "aws_sqs_queue": ("sqs", _queue_change),
    "aws_sns_topic": ("sns", _topic_change),
    "aws_sns_topic_subscription": ("sns", _subscription_change),
    "aws_scheduler_schedule_group": ("schedule", _group_change),
    "aws_iam_role": ("iam", _role_change),
    "aws_iam_role_policy": ("iam", _policy_change),
    "aws_scheduler_schedule": ("schedule", _schedule_change),
    "aws_dynamodb_table": ("dynamodb", _table_change),
    "aws_dynamodb_ttl": ("dynamodb", _ttl_change),
}


def _what_is(resource: _Resource) -> str:
    """Return what people call a resource."""
    return f"{resource.kind.rpartition('_')[2]} {resource.name}"


def _provide(resource: _Resource, *, dry_run: bool) -> str:
    """Make what is missing, raise what is too low, and return what to say of it."""
    service, find_change = _PROVIDERS[resource.kind]
    sender = _brokers.get(service)
    what = _what_is(resource)
    change = find_change(sender, resource)
    if change is None:
        return f"{what}: is as it should be"
    if dry_run:
        return f"{what}: would be {change.text}"
    client = sender.client("send")
    with _explained(resource.name):
        _make(client, change)
        if change.operation == "create_table":  # nothing can be set of it before
            client.get_waiter("table_exists").wait(TableName=resource.name)
    return f"{what}: {change.text}"


_NEW_ROLE = "must allow AWS EventBridge Scheduler to assume the role"  # says Scheduler
_NEW_ROLE_PAUSES = 10
_NEW_ROLE_PAUSE_S = 3.0


def _make(client: Any, change: _Change) -> None:
    """Make a change; wait for a role that is new, which takes IAM some seconds."""
    call = functools.partial(getattr(client, change.operation), **change.parameters)
    for _ in range(_NEW_ROLE_PAUSES):
        try:
            call()
        except Exception as error:
            if _NEW_ROLE not in str(error):
                raise
            time.sleep(_NEW_ROLE_PAUSE_S)
        else:
            return
    call()


_SEND = "sqs:SendMessage sqs:GetQueueUrl"
_RECEIVE = (
    "sqs:ReceiveMessage sqs:DeleteMessage"
    " sqs:ChangeMessageVisibility sqs:GetQueueAttributes"
)
_CANCEL = "scheduler:GetSchedule scheduler:DeleteSchedule"
_SCHEDULE = f"scheduler:CreateSchedule {_CANCEL}"
_LOOK_AT_TABLE = "dynamodb:DescribeTable dynamodb:DescribeTimeToLive"
_GRANTS = [  # the least that each role needs, on topics, queues and dead-letter queues
    ("publisher", "aws_sns_topic", "sns:Publish"),
    ("publisher", "aws_sqs_queue", _SEND),
    ("publisher", "queue with a limit", "sqs:GetQueueAttributes"),
    ("worker", "aws_sqs_queue", f"{_RECEIVE} {_SEND}"),  # it postpones by copies
    ("worker", "DLQ", _SEND),
    # No sqs:GetQueueUrl: the URL is put together from the event's ARN.
    ("lambda", "aws_sqs_queue", f"{_RECEIVE} sqs:SendMessage"),
    ("publisher", "schedules", _SCHEDULE),
    ("publisher", "aws_iam_role", "iam:PassRole"),
    ("worker", "aws_dynamodb_table", "dynamodb:UpdateItem"),
    ("lambda", "aws_dynamodb_table", "dynamodb:UpdateItem"),
    ("operator", "aws_sns_topic", "sns:ListSubscriptionsByTopic"),
    ("operator", "aws_sqs_queue", f"{_SEND} sqs:GetQueueAttributes"),
    ("operator", "DLQ", f"{_RECEIVE} sqs:GetQueueUrl"),
    ("operator", "schedules", _CANCEL),
    ("operator", "aws_scheduler_schedule_group", "scheduler:GetScheduleGroup"),
    ("operator", "all schedules", "scheduler:ListSchedules"),
    # It pauses queues, and looks whether they are paused.
    ("operator", "aws_dynamodb_table", f"{_LOOK_AT_TABLE} dynamodb:UpdateItem"),
]


def _iam(resources: Iterable[_Resource]) -> dict[str, Any]:
    """Write the least policies, by role."""
    arns: dict[str, list[str]] = {}
    for resource in resources:
        for kind, arn in _grantable(resource):
            arns.setdefault(kind, []).append(arn)
    policies: dict[str, Any] = {}
    for role, kind, actions in _GRANTS:
        if kind in arns:
            empty = {"Version": "2012-10-17", "Statement": []}
            statement: dict[str, Any] = {
                "Effect": "Allow",
                "Action": actions.split(),
                "Resource": arns[kind],
            }
            if actions == "iam:PassRole":
                to = {"iam:PassedToService": "scheduler.amazonaws.com"}
                statement["Condition"] = {"StringEquals": to}
            policies.setdefault(role, empty)["Statement"].append(statement)
    return policies


def _grantable(resource: _Resource) -> Iterator[tuple[str, str]]:
    """Yield what rights can be granted on, as _GRANTS calls it, and its ARN."""
    kind, name = resource.kind, resource.name
    if kind == "aws_iam_role":
        yield kind, _scheduler_role()
    if kind not in _ARN_PREFIXES:
        return
    service, _ = _PROVIDERS[kind]
    arn = _brokers.get(service).arn
    if kind == "aws_sqs_queue" and _is_dead_letter_queue(name):
        kind = "DLQ"
    yield kind, arn(_ARN_PREFIXES[resource.kind] + name)
    if kind == "aws_sqs_queue" and _has_sizes():
        yield "queue with a limit", arn(name)
    if kind == "aws_scheduler_schedule_group":
        yield "schedules", arn(f"schedule/{name}/*")
        yield "all schedules", "*"  # a list is of no resource, says AWS


def _has_sizes() -> bool:
    """Return whether a dispatch of some task asks how many messages its queue has."""
    return any("max_queue_size" in task.options for task in _registry.values())


_ARN_PREFIXES = {
    "aws_sqs_queue": "",
    "aws_sns_topic": "",
    "aws_dynamodb_table": "table/",
    "aws_scheduler_schedule_group": "schedule-group/",
}


class _Watched(NamedTuple):
    """What CloudWatch is to watch, besides what it must show.

    :ivar max_age_s: alarm if the oldest message waits for longer
    :ivar max_backlog: alarm if more messages wait
    :ivar notified: the ARN of the topic that alarms are sent to; None for no topic
    :ivar namespace: of the metrics that workers print; None if they do not
    """

    max_age_s: float
    max_backlog: int
    notified: str | None
    namespace: str | None


class _Chart(NamedTuple):
    """What a chart of a dashboard shows: some metrics of a queue or topic."""

    title: str
    statistic: str
    metrics: Sequence[str]  # by CloudWatch's names


_VISIBLE = "ApproximateNumberOfMessagesVisible"
_OLDEST = "ApproximateAgeOfOldestMessage"  # of those received less than three times
_NOT_DELIVERED = "NumberOfNotificationsFailed"
_DEPTH = (
    _VISIBLE,
    "ApproximateNumberOfMessagesNotVisible",
    "ApproximateNumberOfMessagesDelayed",
)
_RUNS = ("Acked", "Retried", "DeadLettered", "Uncertain")
_QUEUE_CHARTS = (
    _Chart("messages", "Maximum", _DEPTH),
    _Chart("seconds that the oldest waits", "Maximum", [_OLDEST]),
    _Chart("a minute", "Sum", ["NumberOfMessagesSent", "NumberOfMessagesDeleted"]),
)
_DEAD_CHARTS = (_Chart("dead letters", "Maximum", [_VISIBLE]),)
_TOPIC_CHARTS = (
    _Chart("a minute", "Sum", ["NumberOfMessagesPublished", _NOT_DELIVERED]),
)
_WORKER_CHARTS = (
    _Chart("runs a minute", "Sum", _RUNS),
    _Chart("milliseconds of a run", "p99", ["RunDuration"]),
    _Chart("seconds of the oldest run", "Maximum", ["OldestRunAge"]),
    _Chart("leases lost a minute", "Sum", ["LeasesLost"]),
)
_CHARTS_A_ROW, _CHART_SIZE = 4, 6  # of the 24 columns of a dashboard


def _dashboard(resources: Iterable[_Resource], watched: _Watched) -> dict[str, Any]:
    """Write a dashboard and its alarms as the parameters of CloudWatch's calls."""
    shown = [each for each in resources if each.kind in _DIMENSIONS]
    widgets: list[dict[str, Any]] = []
    alarms = []
    for resource in shown:
        for whose, chart in _charts_of(resource, watched.namespace):
            widgets.append(_widget(len(widgets), resource, whose, chart))
        alarms += [
            _alarm_call(resource, alarm, watched.notified)
            for alarm in _alarms_of(resource, watched)
        ]
    return {
        "put-dashboard": {
            "DashboardName": f"taskhawk-{settings.require('TASKHAWK_QUEUE')}",
            "DashboardBody": json.dumps({"widgets": widgets}),
        },
        "put-metric-alarm": alarms,
    }


def _dashboard_terraform(
    resources: Iterable[_Resource], watched: _Watched
) -> dict[str, Any]:
    """Write the same in Terraform's JSON syntax."""
    found = _dashboard(resources, watched)
    dashboard = _in_snake_case(found["put-dashboard"])
    name = dashboard["dashboard_name"]
    written = [_Resource("aws_cloudwatch_dashboard", name, dashboard)]
    for parameters in found["put-metric-alarm"]:
        alarm = _in_snake_case(parameters)
        [dimension] = alarm["dimensions"]
        alarm["dimensions"] = {dimension["Name"]: dimension["Value"]}
        name = alarm["alarm_name"]
        written.append(_Resource("aws_cloudwatch_metric_alarm", name, alarm))
    return _terraform(written)


# CloudWatch's namespace and dimension, by Terraform's type.
_DIMENSIONS = {
    "aws_sqs_queue": ("AWS/SQS", "QueueName"),
    "aws_sns_topic": ("AWS/SNS", "TopicName"),
}


def _charts_of(
    resource: _Resource, workers: str | None
) -> Iterator[tuple[tuple[str, str], _Chart]]:
    """Yield what to show of a queue or topic: namespace and dimension, and a chart."""
    charts: Sequence[_Chart]
    if resource.kind == "aws_sns_topic":
        charts, workers = _TOPIC_CHARTS, None
    elif _is_dead_letter_queue(resource.name):
        charts, workers = _DEAD_CHARTS, None
    else:
        charts = _QUEUE_CHARTS
    for chart in charts:
        yield _DIMENSIONS[resource.kind], chart
    if workers:
        for chart in _WORKER_CHARTS:
            yield (workers, "queue"), chart


def _widget(
    place: int, resource: _Resource, whose: tuple[str, str], chart: _Chart
) -> dict[str, Any]:
    """Return a widget; CloudWatch calls this "Dashboard body structure and syntax"."""
    namespace, dimension = whose
    service, _ = _PROVIDERS[resource.kind]
    region = _brokers.get(service).arn(resource.name).split(":")[3]
    row, column = divmod(place, _CHARTS_A_ROW)
    return {
        "type": "metric",
        "x": column * _CHART_SIZE,
        "y": row * _CHART_SIZE,
        "width": _CHART_SIZE,
        "height": _CHART_SIZE,
        "properties": {
            "title": f"{resource.name}: {chart.title}",
            "region": region,
            "stat": chart.statistic,
            "period": 60,
            "view": "timeSeries",
            "metrics": [
                [namespace, metric, dimension, resource.name]
                for metric in chart.metrics
            ],
        },
    }


class _Alarm(NamedTuple):
    """A metric of a queue or topic is above a threshold for so many minutes."""

    suffix: str  # of its name
    metric: str
    threshold: float
    minutes: int
    why: str
    statistic: str = "Maximum"


def _alarms_of(resource: _Resource, watched: _Watched) -> Iterator[_Alarm]:
    """Yield the alarms of a queue or topic."""
    if resource.kind == "aws_sns_topic":
        why = "a message was not delivered to a subscriber"
        yield _Alarm("not-delivered", _NOT_DELIVERED, 0, 1, why, "Sum")
    elif _is_dead_letter_queue(resource.name):
        whose = {_dead_letter_name(_queue_of(each)): each.name for each in _URGENCY}
        command = f"{_LETTERS_COMMAND} summary --priority {whose[resource.name]}"
        why = f"there are dead letters: {command}"
        yield _Alarm("not-empty", _VISIBLE, 0, 1, why)
    else:
        age_s, most = watched.max_age_s, watched.max_backlog
        why = f"a message has waited for more than {age_s:.15g} s"  # all its digits
        yield _Alarm("too-old", _OLDEST, age_s, 5, why)
        yield _Alarm("backlog", _VISIBLE, most, 5, f"more than {most} messages wait")


def _alarm_call(
    resource: _Resource, alarm: _Alarm, notified: str | None
) -> dict[str, Any]:
    """Return the parameters of the call that makes an alarm."""
    namespace, dimension = _DIMENSIONS[resource.kind]
    parameters = {
        "AlarmName": f"{resource.name}-{alarm.suffix}",
        "AlarmDescription": f"{resource.name}: {alarm.why}",
        "Namespace": namespace,
        "MetricName": alarm.metric,
        "Dimensions": [{"Name": dimension, "Value": resource.name}],
        "Statistic": alarm.statistic,
        "Period": 60,
        "EvaluationPeriods": alarm.minutes,
        "Threshold": alarm.threshold,
        "ComparisonOperator": "GreaterThanThreshold",
        "TreatMissingData": "notBreaching",  # of a queue that nobody uses
    }
    if notified:
        parameters["AlarmActions"] = [notified]
    return parameters


class _Finding(NamedTuple):
    """Something that `check` found: an error loses messages or time, a warning may."""

    severity: str
    what: str
    why: str
    remedy: str = _PROVISION


_error = functools.partial(_Finding, "error")
_warning = functools.partial(_Finding, "warning")


def _check(priorities: Collection[Priority]) -> Iterator[_Finding]:
    """Look for what is wrong with tasks, settings and queues.

    :param priorities: those of the queues that a worker is to serve
    """
    yield from _check_tasks(priorities)
    wrong = _check_settings()
    yield from wrong
    if not wrong:
        yield from _check_places(priorities)
        yield from _check_state()


def _check_tasks(priorities: Collection[Priority]) -> Iterator[_Finding]:
    """Look for tasks that no worker would run."""
    for task in _tasks_by_name():
        if task.name.startswith("__main__."):
            yield _error(
                f"task {task.name} is of __main__",
                "a worker can't find it under that name",
                "move it to a module",
            )
        if task.priority not in priorities:
            priority = task.priority.name
            yield _warning(
                f"task {task.name} is of priority {priority}",
                "a worker that serves these priorities does not run it",
                f"serve --priority {priority} too, here or in another worker",
            )


def _check_places(priorities: Collection[Priority]) -> Iterator[_Finding]:
    """Look at the queues or topics of these priorities."""
    on_topics = settings.IS_LAMBDA_APP and settings.TASKHAWK_BROKER == "sqs"
    for priority in priorities:
        try:
            yield from (_check_topic if on_topics else _check_queue)(priority)
        except Exception as error:
            yield _unchecked(error, "AWS_ENDPOINT_SQS")
            if not re.match(_FORBIDDEN, _error_code(error)):
                return  # the others would say the same


def _check_state() -> Iterator[_Finding]:
    """Look at what claims, long delays and periodic tasks need."""
    look = _check_state_on_aws
    if settings.TASKHAWK_BROKER != "sqs":
        look = _check_state_in_file
    try:
        _check_before_work()
    except ConfigurationError as error:
        yield _error(str(error), "workers do not start", _TOLD)
    try:
        yield from look()
    except Exception as error:
        yield _unchecked(error, "AWS_ENDPOINT_SCHEDULER, AWS_ENDPOINT_DYNAMODB")


def _unchecked(error: Exception, endpoints: str) -> _Finding:
    """Return the finding that a look has failed."""
    remedy = f"check credentials, AWS_REGION, {endpoints} and the network"
    if isinstance(error, ConfigurationError):
        remedy = _TOLD
    return _error(_text_of(error), "the rest can't be checked", remedy)


def _check_state_in_file() -> Iterator[_Finding]:
    """Look for schedules that SQLite does not understand."""
    for task in _periodic_tasks().values():
        _refuse_foreign(task)
    yield from ()


def _check_state_on_aws() -> Iterator[_Finding]:
    """Look at schedules and tables."""
    for resource in [*_schedule_resources(), *_table_resources()]:
        # Who checks need not be allowed to look at roles.
        if not resource.kind.startswith("aws_iam"):
            yield from _check_resource(resource)
    yield from _check_abandoned()


# Why what is missing is an error, by Terraform's type.
_WHY_NEEDED = {
    "aws_scheduler_schedule_group": "long delays are refused at dispatch",
    "aws_scheduler_schedule": "the task does not run as its code says",
    "aws_dynamodb_table": "tasks with once, unique or limit are left to be retried",
    "aws_dynamodb_ttl": "claims that have expired are kept, and cost money",
}


def _check_resource(resource: _Resource) -> Iterator[_Finding]:
    """Look whether a resource is as `provision` would make it."""
    service, find_change = _PROVIDERS[resource.kind]
    change = find_change(_brokers.get(service), resource)
    if change is not None:
        what = f"{_what_is(resource)}: would be {change.text}"
        yield _error(what, _WHY_NEEDED[resource.kind], f"{_PROVISION} MODULE …")


def _check_abandoned() -> Iterator[_Finding]:
    """Look for schedules of tasks that are gone."""
    for name in _abandoned_schedules():
        yield _warning(
            f"schedule {name}: no task has it",
            "its messages are dead letters, unless another module has the task",
            f"name all modules, or {_PROVISION} MODULE … --prune",
        )


def _check_settings() -> list[_Finding]:
    """Read all settings, and import the hooks and classes that they name."""
    findings = [
        _error(str(error), "what uses it fails", _TOLD) for error in settings.errors()
    ]
    if findings or settings.TASKHAWK_BROKER != "sqs" or settings.TASKHAWK_QUEUE:
        return findings
    finding = _error(
        "TASKHAWK_QUEUE is not set",
        "no queue has a name; without AWS, try TASKHAWK_BROKER=sqlite:///queue.db",
        "export TASKHAWK_QUEUE=dev-myapp",
    )
    return [finding]


def _check_topic(priority: Priority) -> Iterator[_Finding]:
    """Look at one topic."""
    sns = _brokers.get("sns")
    topic = sns.destination(priority)
    subscribers = _subscribers(sns, topic)
    if subscribers is None:
        yield _error(f"{topic}: no such topic", "dispatch raises")
    elif not subscribers:
        yield _error(
            f"{topic}: nobody subscribes",
            "what is sent is lost",
            f"{_PROVISION} --lambda ARN",
        )


def _check_queue(priority: Priority) -> Iterator[_Finding]:
    """Look at one queue, and at the tasks whose messages it has."""
    broker = _brokers.broker()
    queue = broker.destination(priority)
    info = _unless(_ABSENT, broker.info, queue)
    if info is None:
        yield _error(f"{queue}: no such queue", "dispatch raises")
        return
    yield from _check_pause(queue)
    tasks = _tasks_of(priority)
    yield from _check_time_limits(queue, info.visibility_timeout_s, tasks)
    if info.max_receive_count is None:
        yield _error(f"{queue}: it has no dead-letter queue", _NEVER_GIVEN_UP)
    else:
        yield from _check_receives(queue, info.max_receive_count, tasks)
    if _is_fifo(queue):
        yield from _check_limits(queue, tasks)
    if isinstance(broker, SqsBroker) and _is_fifo(queue):
        yield from _check_deduplication(broker, queue, tasks)
    if isinstance(broker, SqsBroker) and info.dead_letter_queue:
        yield from _check_attributes(broker, queue, info.dead_letter_queue)
        yield from _check_undelivered(broker, queue)


def _check_pause(queue: str) -> Iterator[_Finding]:
    """Look whether a queue is paused; a fault of the claims is none of the queue."""
    is_paused = _find_pause(queue)
    if is_paused is None:
        yield _warning(
            f"{queue}: it can't be told whether it is paused",
            "claims can't be read, for the reason that the log has",
            "check TASKHAWK_CLAIMS_TABLE, AWS_ENDPOINT_DYNAMODB and the network",
        )
    if is_paused:
        yield _warning(
            f"{queue}: it is paused",
            "workers receive nothing from it",
            f"run {_PROGRAM} resume",
        )


def _tasks_by_name() -> list[Task[..., Any]]:
    """Return the registered tasks in order, without aliases."""
    return [task for name, task in sorted(_registry.items()) if name == task.name]


def _tasks_of(priority: Priority) -> list[Task[..., Any]]:
    """Return the tasks of a priority, by name."""
    return [task for task in _tasks_by_name() if task.priority is priority]


def _check_time_limits(
    queue: str, lease_s: float, tasks: Iterable[Task[..., Any]]
) -> Iterator[_Finding]:
    """Look for tasks that may run for longer than their message is hidden."""
    setting = "visibility_timeout_s in TASKHAWK_BROKER"
    if settings.TASKHAWK_BROKER == "sqs":
        setting = "VisibilityTimeout"
    for task in tasks:
        limit_s = task.time_limit
        if limit_s is not None and limit_s > lease_s:
            yield _warning(
                f"{queue}: its visibility timeout of {lease_s:g} s"
                f" is below {task.name}'s limit of {limit_s:g} s",
                "where no worker extends it, such as in Lambda, the task runs twice at"
                " once",
                f"set {setting} above {limit_s:g} s",
            )


def _check_receives(
    queue: str, receives: int, tasks: Iterable[Task[..., Any]]
) -> Iterator[_Finding]:
    """Look whether the queue gives up before a task's policy, or after few crashes."""
    for task in tasks:
        retries = getattr(_policy_of(task), "max_retries", None) or 0
        if receives <= retries:
            yield _error(
                f"{queue}: its maxReceiveCount of {receives}"
                f" is not above {task.name}'s {retries} retries",
                "the queue gives up before the task's policy does",
                _raise_receives(max(retries + 2, _FEW_RECEIVES)),
            )
    if receives < _FEW_RECEIVES:
        yield _warning(
            f"{queue}: its maxReceiveCount is {receives}",
            "a few crashes or releases make a dead letter of a good message",
            _raise_receives(_FEW_RECEIVES),
        )


def _check_limits(queue: str, tasks: Iterable[Task[..., Any]]) -> Iterator[_Finding]:
    """Look for limits on a FIFO queue, where each look for a place is a receive."""
    for task in tasks:
        if task.options.get("limit"):
            yield _warning(
                f"{queue}: {task.name} has a limit",
                "a message of a FIFO queue that finds no place for some minutes becomes"
                " a dead letter without being run",
                "give it a group in place of the limit",
            )


def _raise_receives(receives: int) -> str:
    """Return how to allow so many receives."""
    if settings.TASKHAWK_BROKER == "sqs":
        return f"{_PROVISION} --max-receive-count {receives}"
    return f"set max_receive_count={receives} in TASKHAWK_BROKER"


def _check_deduplication(
    broker: SqsBroker, queue: str, tasks: Iterable[Task[..., Any]]
) -> Iterator[_Finding]:
    """Look whether a FIFO queue takes what schedules send, which has no id."""
    if not any("schedule" in task.options for task in tasks):
        return
    name = "ContentBasedDeduplication"
    if broker.attributes(queue, [name]).get(name) != "true":
        yield _error(
            f"{queue}: it has no content-based deduplication",
            "it refuses what schedules send, and no dead-letter queue gets that",
            f"set {name} of {queue} to true",
        )


def _check_undelivered(broker: SqsBroker, queue: str) -> Iterator[_Finding]:
    """Look whether what a schedule can't deliver has the queue that it is sent to."""
    if settings.TASKHAWK_SCHEDULER_ROLE is None or _is_fifo(queue):
        return
    wanted = _dead_letter_name(queue)
    if _unless(_ABSENT, broker.info, wanted) is None:
        yield _error(
            f"{wanted}: no such queue",
            f"a message that a schedule can't deliver to {queue} for a day is lost",
        )


def _check_attributes(broker: SqsBroker, queue: str, dead: str) -> Iterator[_Finding]:
    """Look at what only queues on SQS have: a retention and a largest size."""
    names = ["MessageRetentionPeriod", "MaximumMessageSize"]
    ours = broker.attributes(queue, names)
    theirs = _unless(_ABSENT, broker.attributes, dead, names)
    is_provisioned = dead == _dead_letter_name(queue)
    if theirs is None:
        other = "make it, or correct the RedrivePolicy"
        remedy = _PROVISION if is_provisioned else other
        yield _error(f"{dead}: no such queue", _NEVER_GIVEN_UP, remedy)
        return
    kept_s = int(ours["MessageRetentionPeriod"])
    dead_s = int(theirs["MessageRetentionPeriod"])
    if dead_s <= kept_s:
        remedy = f"set MessageRetentionPeriod of {queue} below that of {dead}, at most"
        remedy += f" {_DEAD_RETENTION_S}"
        if is_provisioned and kept_s < _DEAD_RETENTION_S:
            remedy = _PROVISION
        yield _warning(
            f"{dead}: it keeps messages for {dead_s} s, and {queue} for {kept_s} s",
            "the time counts from the first sending: a dead letter may expire at once",
            remedy,
        )
    max_bytes = int(ours["MaximumMessageSize"])
    if max_bytes < _MAX_SQS_BYTES:
        yield _warning(
            f"{queue}: it takes messages of at most {max_bytes} bytes",
            "SQS takes 1 MiB, and larger ones are refused at dispatch",
        )


# --- 26. command line -----------------------------------------------------------------
# Glue only. Each command is a function around what stands above: its decorator has its
# options, each read and checked by its `type`; its docstring is its help and ends with
# an example; it returns whether it failed. Exit codes: 0 done, 1 failed, 2 wrong usage
# or configuration. What is asked for goes to stdout, all else to stderr.


_Option = tuple[str, dict[str, Any]]  # the arguments of argparse's add_argument()
_commands: dict[str, tuple[Callable[[Any], object], Sequence[_Option]]] = {}


def _option(name: str, text: str | None = None, **kwargs: Any) -> _Option:
    """Describe an option, or an argument if its name has no dashes."""
    return name, {"help": text, **kwargs}


def _command(name: str, *options: _Option) -> Callable[..., Any]:
    """Make a command of a function; its docstring, with an example, is the help."""

    def register(run: Callable[[Any], object]) -> Callable[[Any], object]:
        _commands[name] = run, options
        return run

    return register


def _wrong(expected: str, text: str) -> Exception:
    """Return the error by which an option's `type` refuses a text."""
    import argparse

    return argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


def _whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """Return a reader of whole numbers within bounds."""

    def read(text: str) -> int:
        if re.fullmatch("[0-9]+", text) and least <= int(text) <= most:
            return int(text)
        raise _wrong(_bounds(least, most), text)

    return read


def _seconds(least: float = 0, most: float = math.inf) -> Callable[[str], float]:
    """Return a reader of times within bounds, in seconds where no unit is given."""
    units_s = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}

    def read(text: str) -> float:
        found = re.fullmatch(r"([0-9]+|[0-9]*\.[0-9]+)([smhd]?)", text)
        if found:
            value_s = float(found[1]) * units_s[found[2]]
            if least <= value_s <= most:
                return value_s
        raise _wrong(f"{_bounds(least, most)} seconds, such as 90 or 10m", text)

    return read


def _bounds(least: float, most: float) -> str:
    """Say which numbers are within bounds."""
    if most == math.inf:
        return f"{least} or more"
    return f"{least} to {most}"


def _age(text: str) -> float:
    """Read an age, in seconds; it must have a unit."""
    if text.endswith(("s", "m", "h", "d")):
        return _seconds()(text)
    raise _wrong("a number and one of s, m, h, d, such as 36h", text)


def _pair(text: str) -> tuple[str, str]:
    """Read a header, K=V."""
    name, equals, value = text.partition("=")
    if not equals:
        raise _wrong("K=V", text)
    return name, value


def _json(kind: type, expected: str) -> Callable[[str], Any]:
    """Return a reader of JSON of one kind."""

    def read(text: str) -> Any:
        with contextlib.suppress(ValueError, RecursionError):
            value = _DECODER.decode(text)
            if isinstance(value, kind):
                return value
        raise _wrong(expected, text)

    return read


_flag = functools.partial(_option, action="store_true")
_many = functools.partial(_option, action="append", default=[])
_MODULES = _option(
    "modules", "modules to import, which define the tasks", nargs="*", metavar="MODULE"
)
_MODULE = _many("--module", "module to import first", dest="modules", metavar="MODULE")
_AS_JSON = _flag("--json", "print JSON, for programs")
_DRY_RUN = _flag("--dry-run", "only say what would be done")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    :param argv: the arguments; those of the process if None
    :returns: the exit code: 0 done, 1 failed, 2 wrong usage or configuration,
        130 interrupted
    :raises SystemExit: for ``--help``, ``--version`` and what argparse refuses
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for ASCII and Latin-1
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:  # refused by the command itself, whose help lists its options
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.run is None:
        arguments.parser.print_help(sys.stderr)
        return 2
    try:
        failed = _run_command(arguments)
        print(end="", flush=True)  # here, where a reader may be found to be gone
    except KeyboardInterrupt:
        _clear_line()  # of the terminal's ^C
        return 130
    except BrokenPipeError:  # such as of `head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _report(error)
    return int(failed)


_programs[""] = main


def _run_command(arguments: Any) -> bool:
    """Import the tasks and run the command; return whether it failed."""
    _log_meanwhile(arguments.log_level, arguments.log_format)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, for the script
    with _telling_where("Django can't be set up"):
        _set_up_django()
    modules = arguments.modules
    if arguments.command in _TASK_COMMANDS:
        modules = modules or _django_task_modules()
    _load(modules, arguments.command)
    # Only now, for Django and the tasks' modules may have set up logging.
    _set_up_logging(arguments.log_level, arguments.log_format)
    return bool(arguments.run(arguments))


def _report(error: Exception) -> int:
    """Say in one line what went wrong, and return the exit code."""
    _log.debug("the command failed", exc_info=True)
    print(f"taskhawk: {_one_line(error)}", file=sys.stderr)
    if isinstance(error, ConfigurationError | ValidationError | TypeError | ValueError):
        return 2
    return 1


def _one_line(error: Exception) -> str:
    """Return an error in one line, and never an empty one."""
    text = " ".join(_text_of(error).split())
    if not text or isinstance(error, KeyError):  # whose text is the key alone
        return repr(error)
    return text


def _formatter(log_format: str | None) -> logging.Formatter:
    """Return what writes records in this format; None is text."""
    if log_format == "json":
        return _JsonFormatter()
    return _TextFormatter("%(asctime)s")


def _log_meanwhile(level: str | None, log_format: str | None) -> None:
    """Log to stderr what comes before the application has set up logging.

    Not by a handler of the root logger, or its basicConfig() would do nothing.
    """
    ours = logging.StreamHandler()
    ours.setFormatter(_formatter(log_format))
    logging.lastResort = ours
    root = logging.getLogger()
    if level or not root.handlers:
        root.setLevel((level or "info").upper())


def _set_up_logging(level: str | None, log_format: str | None) -> None:
    """Log to stderr, with the task that a record was made in.

    An application that has set up logging keeps its handlers and levels. But its
    dictConfig(), such as Django's, may disable our logger, and can't know our options.

    :param level: None leaves it to the application, or INFO
    :param log_format: "text" or "json"; None leaves it to the application, or text
    """
    ours = logging.StreamHandler()
    ours.setFormatter(_formatter("text"))
    logging.basicConfig(level=logging.INFO, handlers=[ours])
    _log.logger.disabled = False
    if level:
        logging.getLogger().setLevel(level.upper())
        _log.logger.setLevel(level.upper())
    for name in ("botocore", "urllib3"):  # what they say of a request is no news
        library = logging.getLogger(name)
        library.setLevel(library.level or logging.WARNING)
    for logger in _all_loggers():
        for handler in logger.handlers:
            # On handlers: a logger's own filters do not see what its children log.
            handler.addFilter(_add_task)
            to_terminal = getattr(handler, "stream", None) in (sys.stdout, sys.stderr)
            if log_format and to_terminal:
                handler.setFormatter(_formatter(log_format))


def _parser() -> Any:
    """Make the parser of all commands."""
    import argparse

    class Parser(argparse.ArgumentParser):
        """Refuses in one line."""

        def error(self, message: str) -> typing.NoReturn:
            self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    make: Any = functools.partial(
        Parser,
        allow_abbrev=False,  # --a is not --all
        formatter_class=argparse.RawDescriptionHelpFormatter,  # an example is one line
    )
    parser = make(prog="taskhawk", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--version", action="version", version=VERSION)
    defaults = {"modules": (), "ids": (), "log_level": None, "log_format": None}
    parser.set_defaults(run=None, parser=parser, json=False, **defaults)
    groups = {"": parser.add_subparsers(metavar="COMMAND", parser_class=make)}
    for command, (run, options) in _commands.items():
        doc = (inspect.getdoc(run) or command).replace("python -m taskhawk", _PROGRAM)
        text, _, example = doc.partition("\n\n")
        group, _, name = command.rpartition(" ")
        if group not in groups:
            about = "Look at dead letters, send them back, or delete them."
            made = groups[""].add_parser(group, help=about, epilog=example)
            made.set_defaults(parser=made)
            groups[group] = made.add_subparsers(metavar="ACTION", parser_class=make)
        made = groups[group].add_parser(
            name, help=text, description=text, epilog=example
        )
        made.set_defaults(command=command, run=run, parser=made)
        for option, kwargs in options:
            made.add_argument(option, **kwargs)
    return parser


_TASK_COMMANDS = ("listen", "check", "provision", "schedules", "tasks")
_QUEUE_COMMANDS = (
    "listen",
    "dispatch",
    "cancel",
    "pause",
    "resume",
    "stats",
    "provision",
    "dead-letters",
)
_UNREADABLE = "the settings can't be read"


def _load(modules: Iterable[str], command: str) -> None:
    """Import the tasks' modules, and refuse a queue in memory that must be shared."""
    for name in modules:
        if name.endswith(".py") or "/" in name:
            module = os.path.relpath(name).removesuffix(".py").replace("/", ".")
            raise ConfigurationError(
                f"{command}: {name!r} is a file: name the module, such as {module}"
            )
        with _telling_where(f"the module {name!r} can't be imported"):
            _import_named(name, command)
    if not command.startswith(_QUEUE_COMMANDS):
        return
    with _telling_where(_UNREADABLE):
        broker = settings.TASKHAWK_BROKER
    shares_queue = command not in ("stats", "provision")
    if shares_queue and _is_in_memory(broker):
        raise ConfigurationError(
            f"{command}: sqlite:// is the memory of one process:"
            " use a file, such as sqlite:///queue.db"
        )


def _import_named(name: str, command: str) -> None:
    """Import a module of tasks; refuse the name of a task, which is a likely slip."""
    try:
        _import(name, "the module")
    except ConfigurationError as error:
        if name not in _registry:
            raise
        module = _registry[name].declared_in
        raise ConfigurationError(
            f"{command}: {name} is a task: name its module, {module}"
        ) from error


@contextlib.contextmanager
def _telling_where(failure: str) -> Iterator[None]:
    """Print the traceback of an application that fails while it is imported."""
    try:
        yield
    except TaskhawkError:
        raise
    except Exception as error:
        trace = error.__traceback__
        while trace and _is_import(trace.tb_frame.f_code.co_filename):
            trace = trace.tb_next  # to where the application begins
        traceback.print_exception(type(error), error, trace)
        raise TaskhawkError(f"{failure}: {_one_line(error)}") from error


def _is_import(file: str) -> bool:
    """Return whether a frame of this file is ours, or of Python's import."""
    return file == __file__ or "importlib" in file


def _is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal; it is None where it was closed."""
    return stream is not None and stream.isatty()


def _clear_line() -> None:
    """Clear the line of a terminal, to write something else there."""
    if _is_terminal(sys.stderr):
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _require_tasks(command: str, modules: Sequence[str]) -> None:
    """Refuse to go on without a task.

    :param modules: those that a person named, which have been imported
    """
    if _registry:
        return
    if modules:
        named = " ".join(modules)
        raise ConfigurationError(
            f"{command}: {named}: no task of this taskhawk is defined there;"
            " if it uses a vendored copy, run"
            f" python -m PACKAGE.taskhawk {command} {named}"
        )
    raise ConfigurationError(
        f"{command}: no task is registered:"
        " name the modules that define them, such as myapp.tasks"
    )


def _priorities(names: Collection[str]) -> list[Priority]:
    """Return the priorities of these names, most urgent first.

    Without any, return those of the registered tasks; without tasks, the default one.
    """
    wanted = {Priority[name] for name in names}
    if not names:
        wanted = {found.priority for found in _registry.values()}
    if not wanted:
        wanted = {Priority.default}
    return [priority for priority in _URGENCY if priority in wanted]


class _DemoWorker(Worker):
    """A worker that prints what became of each message."""

    def settle(self, held: _Held, outcome: Outcome) -> None:
        """Do what the outcome says, then print it."""
        super().settle(held, outcome)
        verb = {
            Fate.acknowledge: "ran",
            Fate.retry: "failed",
            Fate.dead_letter: "dead-lettered",
            Fate.postpone: "postponed",
        }[outcome.fate]
        name = held.message.message.task_name if held.message.message else ""
        line = f"{verb:15}{name:14}attempt {held.message.attempt}"
        if outcome.error:
            line += f": {outcome.error}"
        if outcome.delay_s is not None:
            line += f"; again in {outcome.delay_s:.2g} s"
        print(line)


@_command("demo")
def _demo(_arguments: Any) -> bool:
    """Show a queue at work, with nothing set up.

    example: python -m taskhawk demo
    """
    import tempfile

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        # Nothing is left of what an application has set up.
        hooks = [name for name in _SETTINGS if _SETTINGS[name].rule is _HOOK]
        configure(
            dict.fromkeys(hooks, _do_nothing),
            TASKHAWK_BROKER=f"sqlite:///{folder}/queue.db",
            TASKHAWK_QUEUE="demo",
            TASKHAWK_FIFO=False,
            TASKHAWK_SYNC=False,
            TASKHAWK_TASK_CLASS=Task,
            IS_LAMBDA_APP=False,
        )
        undo.callback(configure)
        logging.disable()  # what it says is printed below
        undo.callback(logging.disable, logging.NOTSET)
        print(f"A queue in {folder}/queue.db: the real broker, and a real worker.\n")
        return _play()


def _play() -> bool:
    """Dispatch, run, retry, dead-letter, requeue; return whether any of it failed."""
    bugs = ["demo.divide"]

    @task(name="demo.greet")
    def greet(name: str) -> None:
        print(f"{'':29}Hello, {name}!")

    @task(name="demo.connect", retry=fixed(0.5, max_retries=3, jitter=False))
    def connect(metadata: Metadata | None = None) -> None:
        if metadata and metadata.attempt == 1:
            raise RetryException("the network is down")

    @task(name="demo.divide", retry=fixed(0.2, max_retries=1, jitter=False))
    def divide(number: int, by: int) -> None:
        print(f"{'':29}{number} / {by} = {number / by if bugs else 'not a number'}")

    for found, args in ((greet, ["world"]), (connect, []), (divide, [1, 0])):
        message_id = typing.cast("Task[..., Any]", found).dispatch(*args)
        print(f"{'dispatched':15}{found.name:14}{message_id}")
    print("\nThe worker runs until nothing is queued:")
    queues = _queues_of(Priority.default)
    work = functools.partial(
        _DemoWorker, _brokers.broker(), queues, 10, until_empty=True
    )
    first = work().run()
    bugs.clear()
    print("\nThe bug in demo.divide is fixed, and its dead letter sent back:")
    print(f"{'requeued':15}{requeue_dead_letter(Priority.default)} message")
    second = work().run()
    third = _play_in_turn(work)
    print(f"\nThe ledgers of the three workers:\n  {first}\n  {second}\n  {third}")
    ends = first.dead_lettered, second.acked, third.acked, third.postponed
    return ends != (1, 1, 1, 1)


def _play_in_turn(work: Callable[..., Worker]) -> Ledger:
    """Show a limit, a cancelled message and a schedule; return the worker's ledger."""

    @task(name="demo.sync", limit=limit(1, per=("customer",), every_s=60))
    def sync(customer: str) -> None:
        print(f"{'':29}{customer} is in step again")

    print("\ndemo.sync may run once a minute for each customer:")
    sync.dispatch_many(["Ann", "Ann"])
    ledger = work(until_empty=False, loop_count=1).run()
    later = sync.with_delay(60).dispatch("Bob")
    cancel(later)
    print(f"{'cancelled':15}{sync.name:14}{later}")

    @task(name="demo.report", schedule="cron(0 9 ? * MON-FRI *)")
    def report() -> None:
        """Be declared: the demo does not wait until it is due."""

    row = _row_of(report)
    print(f"{'scheduled':15}{report.name:14}{row['schedule']}: due {row['next']}")
    return ledger


_EMF_EVERY_S = 60  # the resolution of CloudWatch's standard metrics
_MOST_VALUES = 100  # of a metric in a line
_UNITS = {"RunDuration": "Milliseconds", "OldestRunAge": "Seconds"}


def _namespace(text: str) -> str:
    """Read a namespace of CloudWatch."""
    if re.fullmatch(r"(?!AWS/|:)[A-Za-z0-9._/#: -]{1,255}", text):
        return text
    raise _wrong("a namespace of CloudWatch, such as myapp", text)


class _Runs:
    """The runs of a queue since its last metrics."""

    def __init__(self) -> None:
        self.count = self.leases_lost = 0
        self.durations_ms: list[int] = []  # of all, or of a fair sample

    def add(self, duration_ms: int, *, lost: bool) -> None:
        """Note a run, and whether its lease was lost."""
        import random

        place = random.randint(0, self.count)  # so that each run is as likely to stay
        self.count += 1
        self.leases_lost += lost
        if len(self.durations_ms) < _MOST_VALUES:
            self.durations_ms.append(duration_ms)
        elif place < _MOST_VALUES:
            self.durations_ms[place] = duration_ms


@dataclasses.dataclass(eq=False, repr=False)
class _MeasuredWorker(Worker):
    """A worker that prints metrics each minute, a line for each queue.

    Counts are those since the last line. Printing may block, so a thread of its own
    does it. CloudWatch makes metrics of such lines wherever it gets them as logs. Their
    form is CloudWatch's "Embedded metric format specification".
    """

    namespace: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.on_overdue = self._exit_overdue
        self._printed: dict[str, Mapping[str, float]] = {}  # the totals, by queue
        self._runs_lock = threading.Lock()  # guards this, which slots change
        self._runs = {queue: _Runs() for queue in self.queues}

    def settle(self, held: _Held, outcome: Outcome) -> None:
        """Do what the outcome says, and note how the run went."""
        duration_ms = round((self.clock() - held.started_at) * 1000)
        with self._runs_lock:
            self._runs[held.queue].add(duration_ms, lost=held.message.lease_lost)
        super().settle(held, outcome)

    def run(self) -> Ledger:
        """Work until stopped, and print metrics all the while."""
        is_over = threading.Event()
        printing = threading.Thread(target=self._go_on, args=(is_over,), daemon=True)
        printing.start()
        try:
            return super().run()
        finally:
            is_over.set()
            printing.join(_HEART_S)
            self.print_metrics()

    def _go_on(self, is_over: threading.Event) -> None:
        """Print metrics each minute; the body of a thread."""
        while not is_over.wait(_EMF_EVERY_S):
            try:
                self.print_metrics()
            except OSError as error:
                _log.warning("can't print metrics: %s", error)

    def _exit_overdue(self, ledger: Ledger) -> None:
        """Print the last metrics, and end at once."""
        try:
            self.print_metrics()
        finally:
            _exit_overdue(ledger)

    def print_metrics(self) -> None:
        """Print a line for each queue."""
        now_ms = round(time.time() * 1000)
        for queue in self.queues:
            values = self._measure(queue)
            metrics = [
                {"Name": name, "Unit": _UNITS.get(name, "Count")} for name in values
            ]
            about = {"Namespace": self.namespace, "Dimensions": [["queue"]]}
            directive = {**about, "Metrics": metrics}
            aws = {"Timestamp": now_ms, "CloudWatchMetrics": [directive]}
            line = json.dumps({"_aws": aws, "queue": queue, **values})
            sys.stdout.write(f"{line}\n")  # at once: tasks print too
        sys.stdout.flush()

    def _measure(self, queue: str) -> dict[str, Any]:
        """Return the metrics of a queue by their names, and begin to count anew."""
        with self._keeper.lock:
            totals = dataclasses.asdict(self._holdings.tally.ledgers[queue])
            runs = [held for held in self._holdings.held if held.runs]
        now = self.clock()
        began = [held.started_at for held in runs if held.queue == queue]
        age_s = now - min(began, default=now)
        with self._runs_lock:
            since, self._runs[queue] = self._runs[queue], _Runs()
        printed = self._printed.get(queue, {})
        self._printed[queue] = totals
        values: dict[str, Any] = {}
        for name, total in totals.items():
            metric = name.title().replace("_", "")  # such as DeadLettered
            values[metric] = total - printed.get(name, 0)
        values["LeasesLost"] = since.leases_lost
        values["OldestRunAge"] = round(age_s, 3)
        if since.durations_ms:
            values["RunDuration"] = since.durations_ms
        return values


@_command(
    "listen",
    _MODULES,
    _many(
        "--priority",
        "queue to listen to; may be repeated (default: those of the tasks)",
        choices=_PRIORITIES,
    ),
    _option(
        "--num-messages",
        "hold up to N - 1 messages of a queue ready for a free slot (default: 1)",
        type=_whole(1, _MAX_NUM_MESSAGES),
        default=1,
        metavar="N",
    ),
    _option(
        "--visibility-timeout",
        "how long a message is hidden from others (default: the queue's own)",
        type=_seconds(1, _MAX_HELD_S),
        dest="visibility_timeout_s",
        metavar="S",
    ),
    _option("--loop-count", "end after N receives", type=_whole(1), metavar="N"),
    _flag("--until-empty", "end once nothing is queued"),
    _option(
        "--concurrency",
        "tasks to run at once (default: 1)",
        type=_whole(1),
        default=1,
        metavar="N",
    ),
    _option("--max-tasks", "end after N runs", type=_whole(1), metavar="N"),
    _option(
        "--grace",
        "seconds from a signal to the end (default: 25)",
        type=_seconds(),
        default=25,
        dest="grace_s",
        metavar="S",
    ),
    _flag("--isolate", "run tasks in child processes"),
    _option(
        "--max-workers",
        "receive from a queue only while fewer than N other workers do",
        type=_whole(1, _MAX_PLACES),
        metavar="N",
    ),
    _option("--liveness-file", "file to touch while the worker lives", metavar="PATH"),
    _option(
        "--emf",
        "CloudWatch namespace of metrics to print, in the Embedded Metric Format",
        type=_namespace,
        metavar="NAMESPACE",
    ),
    _option(
        "--log-level",
        "least level to log (default: info)",
        choices=["debug", "info", "warning", "error"],
        type=str.lower,
    ),
    _option(
        "--log-format", "format of the log (default: text)", choices=["text", "json"]
    ),
)
def _listen(arguments: Any) -> bool:
    """Run a worker.

    example: python -m taskhawk listen myapp.tasks --priority high --priority default
    """
    _require_tasks("listen", arguments.modules)
    # A typo, such as in a hook's name, would send the whole queue to the dead letters.
    with _telling_where(_UNREADABLE):
        settings.check()
    priorities = _priorities(arguments.priority)
    make: Callable[..., Worker] = Worker
    if arguments.emf:
        make = functools.partial(_MeasuredWorker, namespace=arguments.emf)
    worker = make(
        _brokers.broker(),
        _queues_of(priorities),
        num_messages=arguments.num_messages,
        visibility_timeout_s=arguments.visibility_timeout_s,
        loop_count=arguments.loop_count,
        until_empty=arguments.until_empty,
        concurrency=arguments.concurrency,
        max_tasks=arguments.max_tasks,
        grace_s=arguments.grace_s,
        isolate=arguments.isolate,
        max_workers=arguments.max_workers,
        liveness_file=arguments.liveness_file,
        done_level=logging.INFO,
        on_overdue=_exit_overdue,
    )
    # Messages would be received and left to the redrive policy, one after another.
    level = logging.INFO if _names_of(priorities) else logging.WARNING
    _log.log(level, "%s", _served(worker.queues, priorities))
    print(worker.run())
    return not worker.ledger.balanced or worker.unanswered or worker.overdue.is_set()


def _served(queues: Sequence[str], priorities: Sequence[Priority]) -> str:
    """Return what a worker serves, and what it leaves to others."""
    where = f"{', '.join(queues)} ({settings.TASKHAWK_BROKER})"
    text = f"listening to {where} for {_names_of(priorities) or 'no task'}"
    others = _names_of(set(Priority).difference(priorities))
    if others:
        text += f"; not served here: {others}"
    return text


_MOST_LISTED = 10  # names in a line


def _names_of(priorities: Iterable[Priority]) -> str:
    """Return the names of these priorities' tasks in a line, if many the first ones."""
    names = sorted(found.name for each in priorities for found in _tasks_of(each))
    if len(names) > _MOST_LISTED:
        names[_MOST_LISTED:] = [f"and {len(names) - _MOST_LISTED} more"]
    return ", ".join(names)


def _exit_overdue(ledger: Ledger) -> None:
    """End at once: a task still runs, and its message reappears when its lease ends."""
    try:
        print(ledger, flush=True)
    finally:  # though nobody reads it any more
        # Not sys.exit(): it would only end the thread in which the worker calls this.
        os._exit(1)


@_command(
    "dispatch",
    _option("task", "the task's name"),
    _option(
        "--args",
        "its arguments, an array (default: [])",
        type=_json(list, "an array of JSON"),
        default=[],
        metavar="JSON",
    ),
    _option(
        "--kwargs",
        "its keyword arguments, an object (default: {})",
        type=_json(dict, "an object of JSON"),
        default={},
        metavar="JSON",
    ),
    _many(
        "--header",
        "a header, as NAME=VALUE; may be repeated",
        type=_pair,
        metavar="K=V",
    ),
    _option(
        "--priority", "queue to send to (default: the task's)", choices=_PRIORITIES
    ),
    _option(
        "--delay",
        "how long to hold it back: 90, 90s, 10m, 1h or 2d (default: 0)",
        type=_seconds(),
        default=0,
        metavar="S",
    ),
    _option(
        "--group",
        "its message group, such as a customer's id (default: the task's)",
        metavar="KEY",
    ),
    _MODULE,
)
def _dispatch(arguments: Any) -> None:
    """Queue a run of a task, and print its id.

    example: python -m taskhawk dispatch myapp.tasks.send_email --args '["a@b.example"]'
    """
    module = arguments.task.rpartition(".")[0]
    if module and arguments.task not in _registry:
        _load_module_of(arguments.task, module)
    invocation = _task_named(arguments.task).with_headers(**dict(arguments.header))
    if arguments.priority:
        invocation = invocation.with_priority(Priority[arguments.priority])
    if arguments.group is not None:
        invocation = invocation.with_group(arguments.group)
    invocation = invocation.with_delay(arguments.delay)
    print(invocation.dispatch(*arguments.args, **arguments.kwargs))


def _load_module_of(task_name: str, module: str) -> None:
    """Import the module that a task's name begins with; it may be any name."""
    try:
        _load([module], "dispatch")
    except ConfigurationError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        raise TaskNotFound(
            f"no task is registered as {task_name!r}, and {error}: name the module that"
            " defines the task with --module"
        ) from error


def _task_named(name: str) -> Task[..., Any]:
    """Return the task of this name, or suggest another name."""
    import difflib

    try:
        return Task.find_by_name(name)
    except TaskNotFound as error:
        # Either without its module, or with a typo.
        known = sorted(known for known in _registry if known.endswith(f".{name}"))
        known += difflib.get_close_matches(name, _registry, 1)
        if known:
            hint = f"Did you mean {known[0]}?"
        elif "." not in name:
            hint = f"Its name begins with its module, such as myapp.tasks.{name}"
        else:
            raise
        raise TaskNotFound(f"{error} {hint}") from error


@_command("cancel", _option("id", "the message's id, which dispatch printed"))
def _cancel(arguments: Any) -> bool:
    """Delete a message whose delay has not ended yet.

    example: python -m taskhawk cancel b1328174-a21c-43d3-b303-964dfcc76efc
    """
    is_cancelled = cancel(arguments.id)
    print(
        "cancelled"
        if is_cancelled
        else "nothing to cancel: no delayed message has this id"
    )
    return not is_cancelled


_PAUSED_QUEUES = _many("--priority", "queue (default: all)", choices=_PRIORITIES)


@_command(
    "pause",
    _PAUSED_QUEUES,
    _option(
        "--for",
        "after which time it resumes by itself: 90, 10m, 1h (default: never)",
        type=_seconds(1),
        dest="for_s",
        metavar="S",
    ),
)
def _pause(arguments: Any) -> None:
    """Stop workers from receiving from a queue.

    example: python -m taskhawk pause --priority bulk --for 10m
    """
    for priority in _priorities(arguments.priority or _PRIORITIES):
        pause(priority, for_s=arguments.for_s)
        print(f"{_queue_of(priority)}: paused")


@_command("resume", _PAUSED_QUEUES)
def _resume(arguments: Any) -> None:
    """Let workers receive from a queue again.

    example: python -m taskhawk resume --priority bulk
    """
    for priority in _priorities(arguments.priority or _PRIORITIES):
        resume(priority)
        print(f"{_queue_of(priority)}: resumed")


@_command("tasks", _MODULES)
def _tasks(arguments: Any) -> None:
    """List the registered tasks.

    example: python -m taskhawk tasks myapp.tasks
    """
    _require_tasks("tasks", arguments.modules)
    for found in _tasks_by_name():
        print(f"{found.name}  {found.priority.name}")


@_command("schedules", _MODULES, _AS_JSON)
def _schedules(arguments: Any) -> None:
    """List the periodic tasks, and when each is due next.

    example: python -m taskhawk schedules myapp.tasks
    """
    _require_tasks("schedules", arguments.modules)
    periodic = _periodic_tasks().values()
    if arguments.json:
        print(json.dumps([_row_of(found) for found in periodic], indent=2))
        return
    for found in periodic:
        row = _row_of(found)
        due = row["next"] or _unknown_due(_schedule_of(found))
        print(f"{row['task']}  {row['schedule']}  {row['timezone']}  {due}")


def _unknown_due(schedule: _Schedule) -> str:
    """Say when a schedule is due that has no next time, as far as we know."""
    if schedule.interval_s or schedule.is_foreign:
        return "when AWS says"
    return "never"  # its dates are past, or there are none, such as February 30th


def _row_of(task: Task[..., Any]) -> dict[str, Any]:
    """Return what there is to say of a periodic task; `next` is None if AWS knows it.

    There, a rate counts from when its schedule was made.
    """
    schedule = _schedule_of(task)
    due = schedule.next_after(datetime.now(UTC))
    if schedule.interval_s and settings.TASKHAWK_BROKER == "sqs":
        due = None
    return {
        "task": task.name,
        "priority": task.priority.name,
        "schedule": schedule.text,
        "timezone": schedule.timezone,
        "next": due and due.isoformat(),
    }


@_command("schema")
def _schema(_arguments: Any) -> None:
    """Print the message format as JSON Schema.

    example: python -m taskhawk schema > schema.json
    """
    print(json.dumps(SCHEMA, indent=2))


@_command(
    "stats",
    _flag("--watch", "count again and again, with the trend, until Ctrl-C"),
    _option(
        "--interval",
        "time between two counts (default: 2)",
        type=_seconds(0.1),
        default=2,
        metavar="S",
    ),
    _AS_JSON,
)
def _stats(arguments: Any) -> None:
    """Count the messages of all priorities.

    example: python -m taskhawk stats --watch
    """
    show = _show_json if arguments.json else _show_table
    counts = _count_all()
    show(counts, {})
    if arguments.watch:
        # Ctrl-C is how one stops watching, and no error.
        with contextlib.suppress(KeyboardInterrupt):
            _watch(arguments.interval, counts, show)
        _clear_line()


def _watch(
    interval_s: float, counts: _AllCounts, show: Callable[[_AllCounts, _Rates], None]
) -> None:
    """Count again and again, with the trend; a fault is said, and passes."""
    counted_at = time.monotonic()
    while True:
        time.sleep(interval_s)
        try:
            new = _count_all()
        except Exception as error:
            _log.warning("can't count: %s", _one_line(error))
            continue
        now = time.monotonic()
        rates = {}
        for name, found in new.items():
            earlier = counts[name]
            if found and earlier:
                rates[name] = (found.queued - earlier.queued) / (now - counted_at)
        show(new, rates)
        counts, counted_at = new, now


def _show_table(counts: _AllCounts, rates: _Rates) -> None:
    """Print counts for people; in a terminal, in place of the last ones."""
    in_terminal = _is_terminal(sys.stdout)
    if in_terminal and rates:
        print("\x1b[H\x1b[2J", end="")
    print("\n".join(_table(counts, rates, in_color=in_terminal)), flush=True)


def _show_json(counts: _AllCounts, _rates: _Rates) -> None:
    """Print counts for programs."""
    found = {name: each and each._asdict() for name, each in counts.items()}
    print(json.dumps(found), flush=True)


@_command(
    "check",
    _MODULES,
    _many(
        "--priority",
        "queue to check; may be repeated (default: those of the tasks)",
        choices=_PRIORITIES,
    ),
    _AS_JSON,
)
def _check_all(arguments: Any) -> bool:
    """Find what is wrong with settings, queues and tasks.

    example: python -m taskhawk check myapp.tasks --priority high
    """
    with _telling_where(_UNREADABLE):
        findings = list(_check(_priorities(arguments.priority)))
    if arguments.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        for severity, what, why, remedy in findings:
            print(f"{severity}: {what}: {why}. Fix: {remedy}")
        print(f"{len(findings)} found" if findings else "nothing is wrong")
    return any(finding.severity == "error" for finding in findings)


_DASHBOARDS = {"dashboard": _dashboard, "dashboard-terraform": _dashboard_terraform}


@_command(
    "provision",
    _MODULES,
    _many(
        "--priority",
        "queue to make; may be repeated (default: all)",
        choices=_PRIORITIES,
    ),
    _option(
        "--max-receive-count",
        "receives after which a message is a dead letter (default: 5)",
        type=_whole(1, 1000),  # what a redrive policy takes
        default=5,
        metavar="N",
    ),
    _option(
        "--lambda",
        "function to subscribe to the topics",
        dest="function",
        metavar="ARN",
    ),
    _option(
        "--format",
        "print it in this format, for review",
        choices=["terraform", "iam", *_DASHBOARDS],
    ),
    _option(
        "--max-age",
        "dashboard: alarm if a message waits for longer (default: 15m)",
        type=_seconds(1),
        default=900,
        metavar="S",
    ),
    _option(
        "--max-backlog",
        "dashboard: alarm if more messages wait (default: 1000)",
        type=_whole(0),
        default=1000,
        metavar="N",
    ),
    _option("--notify", "dashboard: topic that alarms are sent to", metavar="ARN"),
    _option(
        "--emf",
        "dashboard: namespace of the metrics that workers print",
        type=_namespace,
        metavar="NAMESPACE",
    ),
    _flag("--prune", "delete the schedules of tasks that these modules lack"),
    _DRY_RUN,
)
def _provision(arguments: Any) -> None:
    """Make queues or topics and periodic tasks' schedules, or print them for review.

    example: python -m taskhawk provision myapp.tasks --format terraform > all.tf.json
    """
    if settings.TASKHAWK_BROKER != "sqs":
        _provision_file(arguments)
        return
    _check_provision(arguments)
    resources: list[_Resource] = []
    for priority in _priorities(arguments.priority or _PRIORITIES):
        resources += _resources(
            priority, arguments.max_receive_count, arguments.function
        )
    if arguments.format in _DASHBOARDS:
        watched = _Watched(
            arguments.max_age, arguments.max_backlog, arguments.notify, arguments.emf
        )
        print(json.dumps(_DASHBOARDS[arguments.format](resources, watched), indent=2))
        return
    resources += [*_schedule_resources(), *_table_resources()]
    write = {"terraform": _terraform, "iam": _iam}.get(arguments.format)
    if write:
        print(json.dumps(write(resources), indent=2))
        return
    for resource in resources:
        print(_provide(resource, dry_run=arguments.dry_run))
    _prune(prune=arguments.prune and not arguments.dry_run)


def _check_provision(arguments: Any) -> None:
    """Refuse options that can't be meant, before anything is made."""
    if arguments.function and not settings.IS_LAMBDA_APP:
        raise ConfigurationError("--lambda: expected IS_LAMBDA_APP to be set")
    if (arguments.notify or arguments.emf) and arguments.format not in _DASHBOARDS:
        formats = " or ".join(_DASHBOARDS)
        raise ConfigurationError(f"--notify and --emf: expected --format {formats}")
    if arguments.prune:  # without a task, it would delete all schedules
        _require_tasks("provision --prune", arguments.modules)


def _prune(*, prune: bool) -> None:
    """Say which schedules no task has any more, and delete them if that is wanted."""
    for name in _abandoned_schedules():
        if prune:
            _brokers.get("schedule").delete(name)
            print(f"schedule {name}: deleted")
        else:
            print(f"schedule {name}: no task has it; --prune deletes it")


def _provision_file(arguments: Any) -> None:
    """Make the file of an embedded queue."""
    if arguments.format:
        raise ConfigurationError("--format: expected TASKHAWK_BROKER to be sqs")
    if arguments.dry_run:
        print(f"would be made, unless it is there: {settings.TASKHAWK_BROKER}")
        return
    print(f"ready: {_brokers.broker().url('')}")


# The same filters for all commands that deal with dead letters.
_LETTERS = (
    _option(
        "--priority",
        "queue whose dead letters are meant (default: default)",
        choices=_PRIORITIES,
        default="default",
    ),
    _option(
        "--task",
        "only those of this task; * stands for any text, ? for a character",
        default="*",
        metavar="NAME",
    ),
    _many(
        "--error",
        "only those with this text in their error, or in what is said in its place",
        metavar="TEXT",
    ),
    _many("--header", "only those with this header", type=_pair, metavar="K=V"),
    _option(
        "--older-than",
        "only those sent at least this long ago: 90s, 15m, 36h or 7d",
        type=_age,
        default=0,
        metavar="AGE",
    ),
    _option(
        "--newer-than",
        "only those sent at most this long ago",
        type=_age,
        default=math.inf,
        metavar="AGE",
    ),
    _option(
        "--limit",
        "end after N that match",
        type=_whole(0),
        default=sys.maxsize,
        metavar="N",
    ),
    _MODULE,
)
_ID = _many(
    "--id",
    "only this one: the message's own id, or that of SQS",
    dest="ids",
    metavar="ID",
)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM and a lost terminal interrupt as Ctrl-C does: scans then clean up."""
    with contextlib.ExitStack() as undo:
        for number in (signal.SIGTERM, signal.SIGHUP):
            in_main = threading.current_thread() is threading.main_thread()
            if in_main and signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, signal.default_int_handler)
                undo.callback(signal.signal, number, signal.SIG_DFL)
        yield


def _filter_of(arguments: Any) -> _LetterFilter:
    """Return the filter that the options of a command ask for."""
    return _LetterFilter(
        task=arguments.task,
        errors=tuple(filter(None, arguments.error)),
        headers=dict(arguments.header),
        newest_s=arguments.older_than,
        oldest_s=arguments.newer_than,
        ids=frozenset(arguments.ids),
    )


@contextlib.contextmanager
def _scan_for(arguments: Any, doing: str, done: str) -> Iterator[_Scan]:
    """Yield the scan that the options of a command ask for, and show its progress."""
    scan = _Scan(
        Priority[arguments.priority],
        doing,
        done,
        _filter_of(arguments),
        arguments.limit,
    )
    if _is_terminal(sys.stderr):
        scan.say, scan.warn = _rewrite_line, _warn_in_place
    try:
        with _interruptible(), scan:
            yield scan
    except BaseException:
        _keep_line()
        raise
    _clear_line()


def _keep_line() -> None:
    """Go on in the next line of a terminal: what was said last is to be read."""
    if _is_terminal(sys.stderr):
        print(file=sys.stderr, flush=True)


def _rewrite_line(text: str, *args: object) -> None:
    """Show progress in a terminal, in one line."""
    _clear_line()
    width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
    # A line that is wrapped can't be cleared.
    print((text % args)[: width - 1], end="", file=sys.stderr, flush=True)


def _warn_in_place(text: str, *args: object) -> None:
    """Log a warning in place of the progress, not behind it."""
    _clear_line()
    _log.warning(text, *args)


def _require_found(scan: _Scan) -> None:
    """Raise an error if an id was named that no matching dead letter has."""
    missing = scan.wanted.ids - scan.found_ids
    if missing:
        ids = ", ".join(sorted(missing))
        raise TaskhawkError(f"no dead letter that fits the filters has this id: {ids}")


def _print_letters(
    arguments: Any, doing: str, text_of: Callable[[DeadLetter], str]
) -> None:
    """Print the dead letters that the options ask for, with --json as JSON."""
    if arguments.json:
        text_of = _as_json
    with _scan_for(arguments, doing, "looked at") as scan:
        for letter in scan:
            _clear_line()
            print(_printable(text_of(letter)), flush=True)
    _require_found(scan)


def _printable(text: str) -> str:
    """Replace what would command the terminal: messages are hostile input."""
    return re.sub(r"[^\n]", _visible, text)


def _visible(character: re.Match[str]) -> str:
    """Return a character that shows."""
    return character[0] if character[0].isprintable() else "?"


def _first_line(text: str) -> str:
    """Return a text up to its first line break."""
    return text.partition("\n")[0]


def _in_a_line(text: str) -> str:
    """Replace line breaks: a message could write a line that looks like one of ours."""
    return text.replace("\n", "?")


def _as_line(letter: DeadLetter) -> str:
    """Return a dead letter in one line."""
    name = letter.id or letter.message_id
    reason = _first_line(letter.cause)
    return _in_a_line(f"{name}  {letter.task}  {letter.age_s} s ago  {reason}")


def _as_page(letter: DeadLetter) -> str:
    """Return all that is known of a dead letter, a line each."""
    values = letter.as_dict()
    values["error"] = _first_line(letter.cause)
    if letter.invalid:
        values["body"] = ascii(letter.received.body)
    if letter.record:
        values |= {f"error {name}": value for name, value in letter.record.items()}
    lines = [f"{key}: {value}" for key, value in values.items() if value is not None]
    # What follows a line break in a message is not to look like a line of ours.
    return "".join(line.rstrip().replace("\n", "\n    ") + "\n" for line in lines)


def _as_json(letter: DeadLetter) -> str:
    """Return all that is known of a dead letter, as JSON."""
    return json.dumps(letter.as_dict(), default=str)


def _as_export(letter: DeadLetter) -> str:
    """Return a dead letter as JSON, with its body and its attributes."""
    received = letter.received
    raw = {"body": received.body, "attributes": received.message_attributes}
    return json.dumps(letter.as_dict() | raw, default=str)


@_command("dead-letters list", *_LETTERS, _ID, _AS_JSON)
def _list(arguments: Any) -> None:
    """List dead letters, a line each; a look counts as a receive.

    example: python -m taskhawk dead-letters list --task 'mail.*'
    """
    _print_letters(arguments, "listing", _as_line)


@_command(
    "dead-letters show",
    *_LETTERS,
    _option("ids", "id of the message, or that of SQS", nargs="+", metavar="ID"),
    _AS_JSON,
)
def _show(arguments: Any) -> None:
    """Show dead letters with their arguments and errors.

    example: python -m taskhawk dead-letters show b1328174-a21c-43d3-b303-964dfcc76efc
    """
    _print_letters(arguments, "showing", _as_page)


@_command("dead-letters export", *_LETTERS, _ID)
def _export(arguments: Any) -> None:
    """Print dead letters as JSON lines, with body and attributes.

    example: python -m taskhawk dead-letters export > letters.jsonl
    """
    _print_letters(arguments, "exporting", _as_export)


class _Group:
    """Dead letters of one task that are there for the same kind of error."""

    def __init__(self, first: DeadLetter) -> None:
        self.count = 1
        self.oldest = self.newest = first.sent
        self.example = _first_line(first.cause)  # of the newest
        self.ids = {first.id, first.message_id}

    def add(self, letter: DeadLetter) -> None:
        """Count one more."""
        self.count += 1
        self.ids |= {letter.id, letter.message_id}
        self.oldest = min(self.oldest, letter.sent)
        if letter.sent >= self.newest:
            self.newest = letter.sent
            self.example = _first_line(letter.cause)


@_command("dead-letters summary", *_LETTERS, _ID, _AS_JSON)
def _summary(arguments: Any) -> None:
    """Count dead letters by task and error; a look counts as a receive.

    example: python -m taskhawk dead-letters summary --newer-than 1d
    """
    groups: dict[tuple[str, str], _Group] = {}
    with _scan_for(arguments, "counting", "counted") as scan:
        for letter in scan:
            key = letter.task or "", _kind_of_error(letter)
            if key in groups:
                groups[key].add(letter)
            else:
                groups[key] = _Group(letter)
    _require_found(scan)
    found = [
        _group_as_dict(arguments, *key, group)
        for key, group in sorted(groups.items(), key=lambda item: -item[1].count)
    ]
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for values in found:
        print(_printable(_group_as_page(values)))
    print(f"{scan.matched} dead letters")


def _kind_of_error(letter: DeadLetter) -> str:
    """Return the part of its cause by which a dead letter is counted."""
    if letter.record:
        return f"{letter.record.get('type')}: "
    return letter.cause


def _group_as_dict(
    arguments: Any, task: str, error: str, group: _Group
) -> dict[str, Any]:
    """Return what is known of a group, with the commands that deal with it."""
    ids = [name for name in arguments.ids if name in group.ids]
    words = _words_of(arguments, task, error, ids)
    return {
        "task": task or None,
        "error": error.removesuffix(": "),
        "count": group.count,
        "oldest": group.oldest,
        "newest": group.newest,
        "example": group.example,
        "list": f"{_LETTERS_COMMAND} list{words}",
        "requeue": f"{_LETTERS_COMMAND} requeue{words}",
    }


def _words_of(arguments: Any, task: str, error: str, ids: Iterable[str]) -> str:
    """Return the options that mean a group: its own, and those of the summary."""
    import glob
    import shlex

    words: list[str] = []
    for text in (*arguments.error, error):
        words += ["--error", text]
    if task:
        words += ["--task", glob.escape(task)]
    if arguments.priority != "default":
        words += ["--priority", arguments.priority]
    for name, value in arguments.header:
        words += ["--header", f"{name}={value}"]
    if arguments.older_than:
        words += ["--older-than", f"{arguments.older_than:.0f}s"]
    if arguments.newer_than < math.inf:
        words += ["--newer-than", f"{arguments.newer_than:.0f}s"]
    for message_id in ids:
        words += ["--id", message_id]
    for module in arguments.modules:
        words += ["--module", module]
    return "".join(f" {shlex.quote(word)}" for word in words)


def _group_as_page(values: Mapping[str, Any]) -> str:
    """Return a group for people."""
    lines = (
        f"{values['count']}  {values['task']}  {values['error']}",
        f"    from {values['oldest']} to {values['newest']}",
        f"    the newest: {values['example']}",
        f"    {values['list']}",
        f"    {values['requeue']}",
    )
    return "".join(f"{_in_a_line(line)}\n" for line in lines)


_YES = _flag("--yes", "do not ask, in a terminal, before more than one is meant")


@_command("dead-letters requeue", *_LETTERS, _ID, _YES, _DRY_RUN)
def _requeue(arguments: Any) -> None:
    """Send dead letters back to their queue.

    example: python -m taskhawk dead-letters requeue --error TimeoutError --dry-run
    """
    if arguments.dry_run:
        _print_letters(arguments, "would requeue some of", _as_line)
        return
    with _scan_for(arguments, "requeueing", "requeued") as scan:
        if not _is_agreed(arguments, scan, "requeue", ""):
            print("sent back: 0")
            return
        for letters in scan.pages():
            scan.requeue(letters)
    print(f"sent back: {scan.count()}")
    _require_found(scan)


@_command(
    "dead-letters delete",
    *_LETTERS,
    _ID,
    _flag("--all", "delete all of them, where no filter is given"),
    _YES,
    _DRY_RUN,
)
def _delete(arguments: Any) -> None:
    """Delete dead letters.

    example: python -m taskhawk dead-letters delete --older-than 7d --dry-run
    """
    is_limited = arguments.limit != sys.maxsize
    is_filtered = _filter_of(arguments) != _LetterFilter()
    if not any((arguments.all, is_limited, is_filtered)):
        raise ConfigurationError("delete: expected a filter, or --all for every one")
    if arguments.dry_run:
        _print_letters(arguments, "would delete some of", _as_line)
        return
    with _scan_for(arguments, "deleting", "deleted") as scan:
        if not _is_agreed(arguments, scan, "delete", " for good"):
            print("deleted: 0")
            return
        for letters in scan.pages():
            scan.delete(letters)
    print(f"deleted: {scan.count()}")
    _require_found(scan)


def _is_agreed(arguments: Any, scan: _Scan, verb: str, how: str) -> bool:
    """Ask in a terminal whether to go on, where it may be about more than one."""
    if arguments.yes or not _is_terminal(sys.stdin):
        return True
    total = scan.total()
    most = min(total, scan.limit, len(scan.wanted.ids) or total)
    if most <= 1:
        return True
    which = f"dead letters of {scan.source}"
    if scan.wanted != _LetterFilter():
        which += " that fit the filters"
    question = f"{verb} up to {most} {which}{how}? [y/N] "
    # Someone may have sent the progress away.
    stream = sys.stderr if _is_terminal(sys.stderr) else sys.stdout
    print(question, end="", file=stream, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# --- 27. vendoring --------------------------------------------------------------------
# A copy is the text of this very file, whole or cut before a part, below a header that
# has a hash for each section with text: docstring, banners of parts, rooms. A file is
# overwritten only if it is such a copy and still matches its header, and it is replaced
# whole. Sections are compared by title, because a room's number may change. The hashes
# find what has changed; they are not a signature.


_CUTS = {"publisher": "PART IV:", "service": "PART V:", "production": "PART VI:"}
_BANNER = r"(?m)^# (?:===|---) (?:\d+\. )?(.+?) (?:=|-)+$"
_HEADER_PATTERN = (
    r"# taskhawk (\S+), vendored: (\w+)\n(?:#  .*\n)+((?:# [0-9a-f]{16} .+\n)+)"
)
_COPY_HEADER = """\
# taskhawk {version}, vendored: {part}
#  SPDX-License-Identifier: MIT. Do not edit this copy; compare it with its hashes by
#  python -m taskhawk vendor --check PATH
"""
_Section = tuple[str, str]  # a section's title, and the hash of its text


@dataclasses.dataclass(frozen=True)
class _Copy:
    """A vendored copy: what its header says, and the text below it."""

    version: str
    part: str
    sections: Sequence[_Section]  # as they were written
    text: str

    @classmethod
    def read(cls, text: str) -> _Copy | None:
        """Return the copy that has this text, or None if it has no header of ours."""
        header = re.match(_HEADER_PATTERN, text)
        if header is None:
            return None
        version, part, lines = header.groups()
        pairs = re.findall("# (.{16}) (.+)\n", lines)
        sections = [(title, digest) for digest, title in pairs]
        return cls(version, part, sections, text[header.end() :])

    @classmethod
    def of_this_file(cls, part: str) -> _Copy:
        """Return a copy of this file, whole or up to the end of a part."""
        text = _running_copy().text
        if part in _CUTS:
            kept, _banner, _later = text.partition(f"\n# === {_CUTS[part]}")
            text = kept.rstrip() + "\n"
        return cls(__version__, part, _sections(text), text)

    def __str__(self) -> str:
        lines = [f"# {digest} {title}\n" for title, digest in self.sections]
        header = _COPY_HEADER.format(version=self.version, part=self.part)
        return header + "".join(lines) + self.text

    @property
    def modified(self) -> list[str]:
        """The titles of the sections that were changed by hand."""
        found = _sections(self.text)
        if found == self.sections:
            return []
        titles = {title for title, _ in set(found) ^ set(self.sections)}
        return sorted(titles) or ["the order of the rooms"]

    def require_unmodified(self, name: str) -> None:
        """Raise ConfigurationError if a section was changed by hand."""
        if self.modified:
            raise ConfigurationError(
                f"vendor: {name} was changed by hand: {', '.join(self.modified)}. "
                "Fix: restore it, or move it away"
            )


def _running_copy() -> _Copy:
    """Return this file: as the copy that it is, or as one would be that is made now."""
    text = inspect.getsource(sys.modules[__name__])
    return _Copy.read(text) or _Copy(__version__, "whole", _sections(text), text)


def _sections(text: str) -> list[_Section]:
    """Return the title of each section that has text, with a short hash of it."""
    import hashlib

    parts = ["docstring", *re.split(_BANNER, text)]  # a title, its text, a title, …
    sections = []
    for title, section in zip(parts[::2], parts[1::2], strict=True):
        if not section.strip():  # a part's banner, right above its first room
            continue
        digest = hashlib.sha256(section.strip().encode()).hexdigest()
        sections.append((title, digest[:16]))
    return sections


def _file_named(name: str) -> str:
    """Return the path of a copy, through links; refuse a folder, there or not."""
    path = os.path.realpath(name)
    if os.path.isdir(path) or not os.path.basename(name):
        raise ConfigurationError(
            f"vendor: {path} is a folder. Fix: name the file, such as"
            f" {path}/taskhawk.py"
        )
    return path


def _read_copy(path: str) -> _Copy:
    """Read a vendored copy.

    :raises ConfigurationError: if there is none, or the file is something else
    """
    if not os.path.exists(path):
        raise ConfigurationError(
            f"vendor: {path} does not exist. Fix: name the file of a vendored copy"
        )
    with open(path, encoding="utf-8", errors="replace") as file:
        copy = _Copy.read(file.read())
    if copy is None:
        raise ConfigurationError(
            f"vendor: {path} does not begin with the header of a vendored copy. "
            "Fix: name another path, or move that file away"
        )
    return copy


def _write_copy(path: str, copy: _Copy) -> Sequence[_Section]:
    """Write a copy, whole or not at all; return the sections of the one it replaces.

    :raises ConfigurationError: if the file that stands there, or the copy that runs
        this command, is not as it was written
    """
    _running_copy().require_unmodified("the copy that runs this command")
    if not os.path.isdir(os.path.dirname(path)):
        raise ConfigurationError(
            f"vendor: {os.path.dirname(path)} is not a folder. Fix: make it first"
        )
    replaced: Sequence[_Section] = ()
    if os.path.exists(path):
        old = _read_copy(path)
        old.require_unmodified(path)
        replaced = old.sections
    draft = f"{path}.{os.getpid()}"
    try:
        with open(draft, "w", encoding="utf-8", newline="\n") as file:
            file.write(str(copy))
        os.replace(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)  # still there only if the copy could not be written
    return replaced


@_command(
    "vendor",
    _option("path", "the copy, such as service/vendor/taskhawk.py", metavar="PATH"),
    _option(
        "--part",
        "how much of the file to write (default: whole)",
        choices=[*_CUTS, "whole"],
        default="whole",
    ),
    _flag("--check", "say whether the copy is unmodified, and what to audit again"),
    _AS_JSON,
)
def _vendor(arguments: Any) -> bool:
    """Write this file into a project, or check such a copy.

    example: python -m taskhawk vendor service/vendor/taskhawk.py --part production
    """
    path = _file_named(arguments.path)
    if arguments.check:
        copy = _read_copy(path)
        audited = copy.sections
        current = _Copy.of_this_file(copy.part)
    else:
        copy = current = _Copy.of_this_file(arguments.part)
        audited = _write_copy(path, copy)
    titles = {title for title, _ in current.sections}
    report = {
        "path": arguments.path,
        "version": copy.version,
        "part": copy.part,
        "modified": copy.modified,
        "audit": [
            title
            for title, digest in current.sections
            if (title, digest) not in audited
        ],
        "gone": [title for title, _ in audited if title not in titles],
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print_report(report)
    return bool(copy.modified)


def _print_report(report: Mapping[str, Any]) -> None:
    """Print what to know about a copy, a line for each section that is named."""
    state = "changed by hand" if report["modified"] else "unmodified"
    what = f"taskhawk {report['version']}, part: {report['part']}"
    print(f"{report['path']}: {what}, {state}")
    for key, meaning in (
        ("modified", "changed by hand"),
        ("audit", f"to audit for {__version__}"),
        ("gone", f"gone in {__version__}"),
    ):
        for title in report[key]:
            print(f"{meaning}: {title}")
