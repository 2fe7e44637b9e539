"""Run Python functions later, on AWS SQS, SNS and Lambda, from one file with one dependency.

Quickstart, with nothing set up (without TASKHAWK_BROKER, it talks to AWS)::

    import taskhawk

    taskhawk.configure(TASKHAWK_BROKER="sqlite:///queue.db")

    @taskhawk.task
    def send_email(to: str, subject: str, from_email: str | None = None) -> None:
        print(f"{subject} -> {to}")

    send_email.dispatch("you@example.com", "Hello!")  # returns an id
    taskhawk.listen_for_messages(taskhawk.Priority.default, until_empty=True)

Promises
    1. A message whose dispatch returned is run at least once or ends in the dead-letter
       queue, through ``kill -9``, crashes, network faults and shutdown at any moment.
    2. While its worker lives and reaches the queue, a message is not run twice at the
       same time.
    3. No byte of a message is unpickled, evaluated, or used as an import name.
    4. A malformed message neither stops a worker nor is it silently dropped.
    5. Log texts never hold bodies, arguments, header values or credentials.
    6. Idle, a queue costs one 20 s poll after another; busy, 0.1 receives and 0.1
       deletes a task.

Not here: results, chains, soft time limits, purging or browsing a queue, CloudFormation.

The way of a message; an event of Lambda joins it before it is decoded::

    fn.dispatch(...) -> Message -> encode -> Broker.send
        == queue ==> Broker.receive -> decode -> process() -> Outcome
            -> Broker: delete it, show it again later, or dead-letter it

Words of AWS; lease and acknowledgement are ours
    receipt handle       the token of one receive, needed to delete or delay the message
    visibility timeout   how long a received message is hidden from other receivers
    lease                that timeout, extended for as long as a worker holds the message
    acknowledgement      the delete after a run
    dead-letter queue    where a message goes that was received too often or given up
    redrive policy       a queue's setting: its dead-letter queue, and after how many
                         receives a message goes there

A message that a worker holds; the :class:`Ledger` counts what each becomes::

    received --> started --> finished --> acked          deleted from the queue
        |                        |------> retried        visible again, now or later
        |                        |------> dead_lettered  copied, then deleted
        |                        '------> uncertain      its delete may not be applied
        '--> released                                    never started, visible at once

Parts and rooms; the file still works when it is cut before part IV, V or VI
    I meaning
        1 names and limits, 2 errors, 3 settings, 4 Django, 5 messages,
        6 retry policies
    II queues
        7 the broker contract, 8 SQLite, 9 SQS and SNS, 10 connections
    III tasks
        11 tasks, 12 publishing
    IV work
        13 processing, 14 holdings, 15 the keeper, 16 the worker, 17 log records,
        18 isolation, 19 Lambda
    VI people
        20 dead letters, 21 infrastructure, 22 command line, 23 vendoring
"""

# === PART I: MEANING ==================================================================


# --- 1. names and limits --------------------------------------------------------------
# Importing this file does no I/O, reads no environment and imports no botocore, sqlite3,
# argparse or asyncio: what is slow to load is imported by the first function that needs
# it. What AWS allows in one call and for one message stands here once.
# https://docs.aws.amazon.com/general/latest/gr/sqs-service.html

from __future__ import annotations

__version__ = "5.0.0"

# These names are promised to stay; a name with an underscore may change with any version.
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
    "Priority",
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

import contextlib
import contextvars
import dataclasses
import enum
import functools
import importlib
import inspect
import itertools
import json
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    print("taskhawk: this copy of the file has no command line", file=sys.stderr)
    return 2


if __name__ == "__main__":
    # `python -m taskhawk` runs this file as __main__, and the tasks' modules import it
    # again under its own name: go on in that one, or there would be two registries.
    _name = __spec__.name if __spec__ else inspect.getmodulename(__file__)
    sys.exit(importlib.import_module(_name or "")._run_program(sys.argv[1:]))  # noqa: SLF001 - its own

VERSION = __version__  # the name that taskhawk 1.4 gave it
_MAX_BATCH = 10  # entries in a batch call of SQS and SNS, and messages in a receive
_MAX_SQS_BYTES = 1_048_576  # a message, or the sum of a batch: body plus attributes
_MAX_SNS_BYTES = 262_144  # the same for SNS, whose topics may allow more
_MAX_ATTRIBUTES = 10  # a raw SNS delivery to SQS discards a message that has more
_MAX_DELAY_S = 900  # DelaySeconds of SQS
_MAX_HELD_S = 43_200  # SQS counts these 12 hours from the receive, extensions included
_LONG_POLL_S = 20  # the longest wait of ReceiveMessage, and so the cheapest
_DEFAULT_LEASE_S = 30  # the visibility timeout of a queue that sets none
_ERROR_ATTRIBUTE = "taskhawk.error"  # says why the worker dead-lettered a message
_MAX_ERROR_BYTES = (
    16_384  # of that attribute: enough for a traceback, little against 1 MiB
)
_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Log(logging.LoggerAdapter):  # type: ignore[type-arg]
    """Logs, and goes on where it can't: a filter that fails must not end a worker or undo a run."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        """Leave `extra` to each call."""
        return msg, kwargs

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log; as its place, a record has the line that called us, three frames up."""
        if self.isEnabledFor(level):
            self.safely(super().log, level, msg, *args, stacklevel=3, **kwargs)

    def safely(self, call: Callable[..., object], *args: object, **kwargs: Any) -> None:
        """Make a call of logging; print an error to stderr, as logging does for its handlers."""
        try:
            call(*args, **kwargs)
        except Exception:
            if logging.raiseExceptions:
                traceback.print_exc()


_log = _Log(logging.getLogger(__name__), {})


# --- 2. errors ------------------------------------------------------------------------
# Every failure has a name and a fate: what a person must mend is a ConfigurationError, what a
# message has wrong is a ValidationError, and what was not accepted is a PartialFailure. The last
# four are raised by tasks and retry policies, to say what is to become of the message.


class TaskhawkError(Exception):
    """Base of all errors of taskhawk."""


class ConfigurationError(TaskhawkError):
    """A setting, a task's declaration or the infrastructure is wrong: only a person can mend it.

    A worker that meets one before a first receive has succeeded ends with it; later, it goes on
    trying.
    """


class ValidationError(TaskhawkError):
    """A message is not of the format that :data:`SCHEMA` describes, or can't be sent.

    A worker leaves such a message to the queue's redrive policy, and never deletes it.
    """


class MessageTooLarge(ValidationError):
    """A message is larger than the service takes, attributes included: it was not sent.

    :ivar limit: what the service takes, in bytes: 1 MiB on SQS and SQLite, 256 KiB on SNS, or less
        where the queue is set to less
    """

    def __init__(self, text: str, limit: int) -> None:
        super().__init__(text)
        self.limit = limit


class TaskNotFound(ValidationError):
    """No task of that name is registered, perhaps as its module was not imported.

    An older worker may meet a newer message, so a worker leaves such a message to the queue's
    redrive policy too.
    """


class PartialFailure(TaskhawkError):
    """Some entries of a batch were not accepted.

    ``result`` has the lists ``Successful`` and ``Failed``, an entry a message: its ``Id``, and for
    one that failed the ``Code`` and ``Message`` of the service, if it gave any. ``success_count``
    and ``failure_count`` are their lengths; ``unsent`` are the messages that were not accepted by a
    dispatch, in order, ready for :func:`publish`.
    """

    def __init__(
        self, result: dict[str, Any], *args: Any, unsent: Sequence[Message] = ()
    ) -> None:
        done, failed = result["Successful"], result["Failed"]
        codes = ", ".join(
            sorted({str(entry.get("Code", "unknown")) for entry in failed})
        )
        text = f"{len(failed)} of {len(done) + len(failed)} messages failed: {codes}"
        super().__init__(*(args or (text,)))
        self.result, self.unsent = result, list(unsent)
        self.success_count, self.failure_count = len(done), len(failed)


class TimeLimitExceeded(TaskhawkError):
    """A task ran longer than its time limit, and was killed: a failed run like any other."""


class ChildCrashed(TaskhawkError):
    """The process that ran an isolated task ended, and not because we ended it: a failed run.

    It was killed for its memory, say, or called ``os._exit()``, or crashed in C code.
    """


class RetryException(TaskhawkError):
    """Raised by a task: run me again later. It is expected, and logged without a traceback.

    It counts as a retry like any other: the receive count grows. With a delay of its own it does
    not ask the task's retry policy, so that only the queue's redrive policy puts an end to it.

    :param args: text; a number in the first place is the delay, as in taskhawk 4.7
    :param delay_seconds: until the next run; None leaves it to the task's retry policy or the queue
    :raises ValueError: if the delay is negative or not finite
    """

    delay_seconds: float | None = None  # for subclasses with an __init__ of their own

    def __init__(self, *args: Any, delay_seconds: float | None = None) -> None:
        if delay_seconds is None and args and _is_number(args[0]):
            delay_seconds, *args = args  # type: ignore[assignment]
        if delay_seconds is not None and not 0 <= delay_seconds < math.inf:
            raise ValueError(
                f"delay_seconds: expected 0 or more seconds, got {delay_seconds}"
            )
        self.delay_seconds = delay_seconds
        super().__init__(*args)


class LoggingException(TaskhawkError):
    """Raised by a task: I failed; log this message, with this `extra` for the log's formatter.

    In all else it is a failed run: the retry policy decides, and the error hook is told.

    :param message: the text of the log record
    :param extra: attributes of the log record; a name that logging uses itself gets "extra_" before
        it
    """

    extra: Mapping[str, Any] | None = None

    def __init__(self, message: object, extra: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.extra = extra


class IgnoreException(TaskhawkError):
    """Raised by a task: there is nothing to do; the message is done with, as if it had returned."""


class StopRetry(TaskhawkError):
    """Raised by a retry policy or a task: give up, send the message to the dead letters at once."""


def _require(holds: object, text: str) -> None:
    """Raise ConfigurationError with this text, unless the first argument is true."""
    if not holds:
        raise ConfigurationError(text)


def _is_number(value: object) -> typing.TypeGuard[float]:
    """Return whether a value is a number: not True or False, which Python takes for numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text_of(error: object) -> str:
    """Return the text of an error, also if its class can't make it."""
    try:
        return str(error)
    except Exception:  # an exception class with a bug
        return f"{type(error).__name__} (its text can't be made)"


# --- 3. settings ----------------------------------------------------------------------
# The only place where configuration is read. The first source that has a setting wins: configure(),
# the module named by SETTINGS_MODULE, Django's settings, the environment, the default. A value that
# is wrong is an error which says where it came from, at the first use of the setting; values of
# secrets are in no error.


_TEXT, _ACCOUNT, _REGION = "a string", "an account number", "the name of a region"
_FLAG, _SECONDS, _COUNT = (
    "true or false",
    "a number of seconds above 0",
    "a whole number above 0",
)
_HOOK, _CLASS = "a function or its dotted path", "a class or its dotted path"
_URL, _BROKER = "a URL", "'sqs' or a URL of SQLite"
_QUEUE = "at most 71 letters, digits, hyphens and underscores"
_PATTERNS = {
    _URL: "https?://.+",
    _BROKER: "sqs|sqlite://.*",
    _QUEUE: "[A-Za-z0-9_-]{1,71}",
}
_FLAGS = dict.fromkeys(("", "0", "false", "no", "off"), False)
_FLAGS |= dict.fromkeys(("1", "true", "yes", "on"), True)
_SETTINGS: dict[str, tuple[str, str, Any]] = {  # the rule, an example, the default
    "AWS_ACCESS_KEY": (_TEXT, "AKIAIOSFODNN7EXAMPLE", None),
    "AWS_ACCOUNT_ID": (_ACCOUNT, "123456789012", None),
    "AWS_CONNECT_TIMEOUT_S": (_SECONDS, "2", 2),
    "AWS_ENDPOINT_SNS": (_URL, "http://127.0.0.1:4566", None),
    "AWS_ENDPOINT_SQS": (_URL, "http://127.0.0.1:4566", None),
    "AWS_READ_TIMEOUT_S": (_SECONDS, "2", 2),
    "AWS_REGION": (_REGION, "eu-west-1", None),
    "AWS_SECRET_KEY": (_TEXT, "wJalrXUtnFEMI/EXAMPLEKEY", None),
    "AWS_SESSION_TOKEN": (_TEXT, "AQoDYXdzEJr/EXAMPLETOKEN", None),
    "IS_LAMBDA_APP": (_FLAG, "False", False),
    "TASKHAWK_BROKER": (_BROKER, "sqlite:///queue.db", "sqs"),
    "TASKHAWK_DEFAULT_HEADERS": (_HOOK, "myapp.hooks.default_headers", None),
    "TASKHAWK_ERROR_HOOK": (_HOOK, "myapp.hooks.report_error", None),
    "TASKHAWK_HEARTBEAT_HOOK": (_HOOK, "myapp.hooks.touch_file", None),
    "TASKHAWK_MAX_DB_REUSE_LOOPS": (_COUNT, "5", 5),
    "TASKHAWK_POST_PROCESS_HOOK": (_HOOK, "myapp.hooks.after", None),
    "TASKHAWK_PRE_PROCESS_HOOK": (_HOOK, "myapp.hooks.before", None),
    "TASKHAWK_QUEUE": (_QUEUE, "dev-myapp", None),
    "TASKHAWK_SYNC": (_FLAG, "False", False),
    "TASKHAWK_TASK_CLASS": (_CLASS, "myapp.tasks.MyTask", None),
}
_SECRETS = ("AWS_ACCESS_KEY", "AWS_SECRET_KEY", "AWS_SESSION_TOKEN")
_warned = {  # of these names no warning is due any more; it never is of what only 4.7 has
    *("TASKHAWK_CONSUMER_BACKEND", "TASKHAWK_PUBLISHER_BACKEND"),
    *("TASKHAWK_HEARTBEAT_HOOK_SYNC_CALL_S", "TASKHAWK_PUBLISHER_GCP_BATCH_SETTINGS"),
}
_Source = tuple[
    str, Callable[[str], Any]
]  # what errors call it, and what reads a setting of it


def _conform(rule: str, value: Any) -> Any:
    """Return a value as its rule wants it, or raise one of what :meth:`_Settings.read` catches.

    Text is as good as the value itself, for an environment variable can be nothing else.
    """
    if rule == _FLAG:
        return _FLAGS[value.strip().lower()] if isinstance(value, str) else bool(value)
    if rule in (_SECONDS, _COUNT):
        value = (int if rule == _COUNT else float)(str(value))  # so that True is none
        valid = 0 < value < math.inf
    elif rule in (_HOOK, _CLASS):
        if value in ("taskhawk.conf.default_headers_hook", "taskhawk.conf.noop_hook"):
            return None  # the defaults of 1.4 do nothing
        if isinstance(value, str):
            module, _, name = value.rpartition(".")
            ours = value in (
                "taskhawk.Task",
                "taskhawk.task_manager.Task",
            )  # the latter is 1.4's
            value = getattr(importlib.import_module(__name__ if ours else module), name)
        valid = callable(value)
    else:
        if rule == _ACCOUNT and type(value) is int and value >= 0:
            value = f"{value:012d}"
        valid = re.fullmatch(_PATTERNS.get(rule, ".+"), value) is not None
    if not valid:
        raise ValueError
    relative = rule == _BROKER and re.match("sqlite:///(?=[^/?])", value)
    if relative and not re.search(
        r"[?\n]", here := os.getcwd()
    ):  # which no URL can hold
        # From now on the same file, though a task may change the directory.
        return f"{relative[0]}{here}/{value[relative.end() :]}"
    return value.rstrip("/") if rule == _URL else value


class _Settings:
    """The settings as attributes, each read at its first use and remembered.

    Nothing is read when taskhawk is imported, so that an application may configure it afterwards.
    """

    given: Mapping[str, Any] = {}  # by configure()

    def __init__(self) -> None:
        # What to do when settings that connections are made with may have changed.
        self.on_change: list[Callable[[], None]] = []

    def __getattr__(self, name: str) -> Any:
        """Read a setting that is not remembered yet."""
        if name not in _SETTINGS:
            raise AttributeError(_no_setting(name))
        known = vars(
            self
        )  # forget() replaces it: a reader that is late fills the old one
        known[name] = value = self.read(name)
        return value

    def read(self, name: str, sources: Iterable[_Source] = ()) -> Any:
        """Read a setting from its source, whatever is remembered."""
        rule, example, default = _SETTINGS[name]
        for where, get in sources or self._sources():
            value = get(name)
            if value is None or (value == "" and rule != _FLAG):
                continue
            try:
                return _conform(rule, value)
            except (
                ValueError,
                TypeError,
                LookupError,
                ImportError,
                AttributeError,
            ) as error:
                shown = type(value).__name__ if name in _SECRETS else repr(value)
                why = (
                    f" ({error})"
                    if isinstance(error, ImportError | AttributeError)
                    else ""
                )
                text = f"{name} in {where}: expected {rule}, such as {example!r}, got {shown}{why}"
                raise ConfigurationError(text) from error
        return default

    def require(self, name: str) -> Any:
        """Return a setting that has no default; raise ConfigurationError if it is not set."""
        rule, example, _ = _SETTINGS[name]
        where = (
            "the module named by SETTINGS_MODULE, Django's settings or the environment"
        )
        text = (
            f"expected {rule}, such as {example!r}, from taskhawk.configure(), {where}"
        )
        _require(getattr(self, name) is not None, f"{name} is not set: {text}")
        return getattr(self, name)

    def credentials(self) -> dict[str, Any]:
        """Return botocore's arguments, or {} to leave it to botocore.

        All are of one source, so that a key never meets the secret or the token of another.
        """
        for source in self._sources():
            key, secret, token = (self.read(name, [source]) for name in _SECRETS)
            here, missing = _SECRETS[:2] if key else _SECRETS[1::-1]
            text = f"{here} is set in {source[0]}, but {missing} is not: expected both or neither"
            _require(bool(key) == bool(secret), text)
            if key:
                names = (
                    "aws_access_key_id",
                    "aws_secret_access_key",
                    "aws_session_token",
                )
                return dict(zip(names, (key, secret, token), strict=True))
        return {}

    def forget(self, *, setting: str = "AWS_", **_: object) -> None:
        """Read everything anew: after configure(), or as Django's tests override a setting."""
        self.__dict__ = {"given": self.given, "on_change": self.on_change}
        # Clients are made with these. Django's tests name the one setting that they override.
        if setting.startswith("AWS_"):
            for callback in self.on_change:
                callback()

    def _sources(self) -> Iterator[_Source]:
        """Yield where settings may come from, in the order of precedence."""
        yield "configure()", self.given.get
        if path := os.environ.get("SETTINGS_MODULE"):
            module = _import(path, "the module named by SETTINGS_MODULE")
            yield _found_in(module, f"the module {path}")
        if django := _django_settings():
            yield _found_in(django, "Django's settings")
        yield _found_in(os.environ, "the environment")


settings = _Settings()


def _found_in(source: Any, where: str) -> _Source:
    """Make a source of an object or mapping; warn once of a name that only looks like a setting."""
    # os.environ and Flask's config are mappings; modules and Django's settings have attributes.
    is_mapping = isinstance(source, Mapping)
    names = map(str, source if is_mapping else dir(source))
    ours = {name for name in names if name.startswith("TASKHAWK_")}
    for name in sorted(ours - _SETTINGS.keys() - _warned):
        _warned.add(name)
        _log.warning("%s", _no_setting(name, f" in {where}"))
    return where, source.get if is_mapping else lambda name: getattr(source, name, None)


def _no_setting(name: str, where: str = "") -> str:
    """Return a sentence that refuses a name, and suggests one that is close to it."""
    import difflib

    close = "".join(
        f"; did you mean {n}?" for n in difflib.get_close_matches(name, _SETTINGS, 1)
    )
    return f"{name}{where} is not a setting of taskhawk{close}"


def _import(name: str, what: str) -> Any:
    """Import a module that a person named; a name that is wrong is a ConfigurationError."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if f"{name}.".startswith(f"{error.name}."):
            raise ConfigurationError(
                f"{what} {name!r} can't be imported: {error}"
            ) from error
        raise  # the module is there, and something that it imports is not


def configure(obj_or_mapping: object = None, /, **values: Any) -> None:
    """Set settings by hand, ahead of all other sources; replaces what an earlier call set.

    Call it before tasks are dispatched or run: it closes the connections that are open. What is not
    set here is looked up in the module named by SETTINGS_MODULE, in Django's settings and in the
    environment, in this order.

    :param obj_or_mapping: an object with settings as attributes, or a mapping such as Flask's
        ``app.config``; other names are left alone, with a warning if they begin with TASKHAWK_
    :param values: settings by name, ahead of those in `obj_or_mapping`
    :raises ConfigurationError: if a name in `values` is not a setting; a value is looked at when it
        is first used
    """
    # A keyword is typed by hand, so one that is wrong is an error; a module may have any name.
    for name in values.keys() - _SETTINGS.keys():
        raise ConfigurationError(_no_setting(name))
    _, get = _found_in(obj_or_mapping, "configure()")
    settings.given = {name: get(name) for name in _SETTINGS} | values
    settings.forget()


def _call_safely(name: str, **kwargs: Any) -> None:
    """Call a hook whose failure is logged, no more."""
    try:
        if hook := getattr(settings, name):
            hook(**kwargs)
    except KeyboardInterrupt:
        raise
    except BaseException:  # SystemExit and CancelledError too
        _log.exception("%s failed", name)


# --- 4. Django ------------------------------------------------------------------------
# All that this file knows of Django. It is never imported unless the application uses it.


def _django_settings() -> Any:
    """Return Django's settings where Django is in use; it is never imported otherwise."""
    named = os.environ.get("DJANGO_SETTINGS_MODULE")
    # An application may also call Django's settings.configure(), and name no module.
    if not named and "django.conf" not in sys.modules:
        return None
    from django.conf import settings as found
    from django.core.signals import setting_changed

    # It connects but once. A weak connection would leave a finalizer behind at each call.
    setting_changed.connect(settings.forget, weak=False)
    return found if named or found.configured else None


_slot = (
    threading.local()
)  # counts its `runs`; a worker's slot keeps a `loop` for them all, too


def _recycle_django_connections() -> None:
    """Close this thread's database connections after so many runs, where Django is in use."""
    if "django.db" not in sys.modules or not _django_settings():
        return
    try:
        _slot.runs = (
            getattr(_slot, "runs", 0) + 1
        ) % settings.TASKHAWK_MAX_DB_REUSE_LOOPS
        if _slot.runs == 0:
            for connection in sys.modules["django.db"].connections.all(
                initialized_only=True
            ):
                if not connection.in_atomic_block:  # a test's transaction
                    connection.close()
    except Exception:  # the run is over: what became of it stands
        _log.exception("can't close the database connections")


# --- 5. messages ----------------------------------------------------------------------
# Untrusted bytes stop here: what _decode() lets through has the shape that SCHEMA describes, and
# what it refuses, dispatch refuses too. SCHEMA is what the validator goes by, so they can't differ.
# To decode is a pure function: it does no I/O, and reads neither a clock nor a setting.


class Priority(enum.Enum):
    """Which queue a message goes through: each has its own workers, to be scaled apart.

    A worker of several queues runs the most urgent message first: high, default, low, bulk.
    """

    default = 1
    high = 2
    low = 3
    bulk = 4


# The calendar in full, for JSON Schema has nothing else to say that there is no 30th of February.
_ISO_8601 = (
    r"^(?!0000)(?:[0-9]{4}-(?:(?:0[13578]|1[02])-31|(?:0[13-9]|1[0-2])-(?:29|30)"
    r"|(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
    r"(?:[T ](?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9](?:[.,][0-9]{1,9})?)?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):?[0-5][0-9])?)?(?![\s\S])"
)
# Descriptions are what errors say was expected.
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
#: the message format as JSON Schema 2020-12: the contract for publishers in other languages
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
# What errors call the type of a value; one of a subclass is called as what it derives from.
_KINDS = {dict: "object", list: "array", tuple: "array", str: "string", bool: "boolean"}
_KINDS |= {int: "number", float: "number", type(None): "null"}
_MISSING = type("nothing", (), {})()  # errors show the name of its type


def _validate(value: Any, schema: Mapping[str, Any], path: str = "") -> None:
    """Check a value by the keywords that SCHEMA uses; an error shows nothing that may be secret.

    :param path: what the error calls the value by, such as ``metadata.version``
    :raises ValidationError: says where the value differs, what was expected and what came
    """
    kind = _KINDS.get(type(value)) or next(
        filter(None, map(_KINDS.get, type(value).__mro__)), ""
    )
    valid = kind in schema["type"]
    if valid and kind == "string":
        valid = len(value) >= schema.get("minLength", 0) and value in schema.get(
            "enum", (value,)
        )
        if valid and "pattern" in schema:
            valid = re.search(schema["pattern"], value) is not None
    elif valid and kind == "number":
        valid = schema["minimum"] <= value <= schema["maximum"]
    if not valid:
        article = {"array": "an ", "object": "an ", "null": ""}.get(kind, "a ")
        shown = article + kind if kind else type(value).__name__
        if value == "" or (
            path.startswith("metadata.") and isinstance(value, str | int | float)
        ):
            huge = isinstance(value, int) and abs(value) >= 10**18
            small = value[:40] if isinstance(value, str) else value
            shown = "a huge number" if huge else json.dumps(small)
        raise ValidationError(
            f"{path or 'message'}: expected {schema['description']}, got {shown}"
        )
    for key, inner in schema.get("properties", {}).items():
        if key in value or key in schema["required"]:
            _validate(value.get(key, _MISSING), inner, f"{path}.{key}" if path else key)


def _new_id() -> str:
    """Return a random UUID (RFC 9562, version 4) in a third of the time that uuid.uuid4() takes."""
    digits = os.urandom(16).hex()
    return (
        f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"
    )


# The tasks that a message can name. Nothing else is ever looked up for a message.
_registry: dict[str, Task[Any, Any]] = {}


def _find_task(name: str) -> Task[Any, Any]:
    """Return the task registered under a name; raise :exc:`TaskNotFound` if there is none."""
    if found := _registry.get(name):
        return found
    raise TaskNotFound(
        f"no task is registered as {name[:200]!r}: is its module imported?"
    )


class Message:  # noqa: PLW1641 - it may change, so it is no key of a dict
    """One request for a run of a task; what the publisher makes and the worker gets.

    It may be changed until it is sent, as in taskhawk 1.4. Two are equal if they are the same on
    the wire.

    :param data: as :data:`SCHEMA` describes it; unknown keys are ignored
    :raises ValidationError: says where it differs, what was expected and what came
    """

    CURRENT_VERSION = "1.0"
    VERSIONS = ("1.0",)
    delay_s: float = 0  #: for which the queue holds it back; not a part of the format
    received: QueueMessage | None = None  #: what it came as; None at the publisher's

    def __init__(self, data: Mapping[str, Any]) -> None:
        """Check the data, and keep what the format knows: a timestamp as epoch milliseconds."""
        _validate(data, SCHEMA)
        metadata = {"priority": "default", **data["metadata"]}
        if isinstance(timestamp := metadata["timestamp"], str):
            moment = datetime.fromisoformat(timestamp)
            since = moment.replace(tzinfo=moment.tzinfo or UTC) - datetime(
                1970, 1, 1, tzinfo=UTC
            )
            timestamp = max(0, since // timedelta(milliseconds=1))
        metadata["timestamp"] = int(timestamp)
        # Of what the format does not know, nothing is kept, and no task gets to see it. The
        # arguments become a list in any case: the validator takes a tuple too, and JSON has none.
        kept = {
            "args": list(data["args"]),
            "metadata": {key: metadata[key] for key in _METADATA},
        }
        self._data = {key: data[key] for key in SCHEMA["required"]} | kept

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
        :param args: the positional arguments, not checked against the function's signature
        :param kwargs: the keyword arguments, likewise
        :param msg_id: a new UUID if None
        :param headers: of any values that JSON can hold
        :raises TaskNotFound: if there is no such task
        :raises ValidationError: if `msg_id` is empty, or not a string
        """
        _find_task(task)
        if msg_id is not None:
            _validate(msg_id, _NAME, "id")
        message = cls.__new__(cls)  # no look at the rest: what is made here is valid
        now, version = int(time.time() * 1000), cls.CURRENT_VERSION
        message._data = {  # noqa: SLF001 - its own
            "id": msg_id or _new_id(),
            "metadata": {
                "priority": priority.name,
                "timestamp": now,
                "version": version,
            },
            "headers": dict(headers or {}),
            "task": task,
            "args": list(args or ()),
            "kwargs": dict(kwargs or {}),
        }
        return message

    id: str = property(lambda self: self._data["id"])  # type: ignore[assignment]
    metadata = property(
        lambda self: self._data["metadata"], doc="priority, timestamp and version"
    )
    timestamp = property(
        lambda self: self.metadata["timestamp"], doc="epoch milliseconds"
    )
    version = property(lambda self: self.metadata["version"], doc="of the format")
    headers = property(lambda self: self._data["headers"])
    task_name = property(lambda self: self._data["task"])
    args = property(lambda self: self._data["args"])
    kwargs = property(lambda self: self._data["kwargs"])
    #: the queue that the message goes through; can be set, for 1.4 had no other way to
    priority: Priority = property(  # type: ignore[assignment]
        lambda self: Priority[self.metadata["priority"]],
        lambda self, value: self.metadata.update(priority=value.name),
    )

    @property
    def task(self) -> Task[Any, Any]:
        """The registered task; raises :exc:`TaskNotFound` if there is none."""
        return _find_task(self.task_name)

    def call_task(self, receipt: str | None) -> None:
        """Run the task, here and now.

        :param receipt: the receipt handle, for the task's metadata; None where no queue has the
            message
        :raises TaskNotFound: if no such task is registered; what the task raises is not caught
        """
        self.task.call(self, receipt)

    def as_dict(self) -> dict[str, Any]:
        """Return the message as it is on the wire."""
        return self._data

    def items(self) -> typing.ItemsView[str, Any]:
        """Return the items of :meth:`as_dict`."""
        return self._data.items()

    def __eq__(self, other: object) -> bool:
        """Compare what is on the wire."""
        return (
            self._data == other._data if isinstance(other, Message) else NotImplemented
        )


def _from_decimal(value: object) -> float:
    """Make a number of JSON of a Decimal, as databases return them; refuse all else."""
    # Where nobody has imported decimal, no value can be a Decimal.
    if "decimal" in sys.modules and isinstance(value, sys.modules["decimal"].Decimal):
        # Beyond 4300 digits Python writes no int; float() makes it an infinity, which is refused.
        small = value.is_finite() and abs(value.adjusted()) < 4300  # noqa: PLR2004
        return (
            int(value) if small and value == value.to_integral_value() else float(value)
        )
    raise TypeError(f"{type(value).__name__} is not a JSON type")


def _finite(text: str) -> float:
    """Parse a number of JSON; Python's decoder would take NaN and infinities too."""
    if math.isfinite(number := float(text)):
        return number
    raise ValueError


# ASCII only: all of it passes SQS, which refuses some control characters and surrogates.
_DUMP: Any = {"default": _from_decimal, "allow_nan": False, "separators": (",", ":")}
_ENCODER = json.JSONEncoder(
    **_DUMP, check_circular=False
)  # _sizes() says where a circle is
_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def _encode(message: Message) -> str:
    """Encode a message, or raise the error that names the argument which can't be.

    :raises TypeError: if an argument is of a type that JSON does not have
    :raises ValidationError: if it is NaN or infinite, or nested too deeply
    """
    try:
        return _ENCODER.encode(message.as_dict())
    except (TypeError, ValueError, RecursionError) as error:
        _sizes(message)
        raise ValidationError(f"{message.task_name}: not JSON: {error}") from error


def _sizes(message: Message) -> dict[str, int]:
    """Return the encoded size of each argument and header, by the path that errors call it by."""
    parts = {f"args[{index}]": value for index, value in enumerate(message.args)}
    parts |= {f"kwargs.{key}": value for key, value in message.kwargs.items()}
    parts |= {f"headers.{key}": value for key, value in message.headers.items()}
    # Each alone, for the encoder does not say which of them it could not encode.
    for path, value in parts.items():
        try:
            parts[path] = len(json.JSONEncoder(**_DUMP).encode(value))
        except (TypeError, ValueError, RecursionError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValidationError
            raise kind(f"{message.task_name}: {path} is not JSON: {error}") from error
    return parts


def _decode(body: Any) -> Message:
    """Decode a body from the queue; whatever is wrong with it is a ValidationError.

    The body is hostile: an error quotes no more of it than 40 characters of a metadata value, and
    neither its nesting nor its numbers can do more harm than to be refused.
    """
    # A body may be anything: that of a malformed record of Lambda is None.
    _validate(body, {"description": "a string of JSON", "type": ["string"]})
    try:
        return Message(_DECODER.decode(body))
    except RecursionError:
        raise ValidationError("message: nested too deeply") from None
    except ValueError as error:
        # Only the position: the error's own text may quote the body.
        where = (
            f" at character {error.pos}"
            if isinstance(error, json.JSONDecodeError)
            else ""
        )
        raise ValidationError(f"message: not JSON{where}") from None


# --- 6. retry policies ----------------------------------------------------------------
# A policy is a function of the attempt that returns seconds. It does no I/O and holds no state.


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """Gives the seconds to the next run: they grow by factor and step, up to `max_retries` times.

    Made by :func:`fixed`, :func:`linear` and :func:`exponential`. Jitter takes between half of a
    delay and all of it, so that what failed together is spread out:
    https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/

    :raises ConfigurationError: if a number is negative, or is not a number
    """

    base_s: float
    factor: float
    step_s: float
    max_retries: int | None
    max_delay_s: float
    jitter: bool

    def __post_init__(self) -> None:
        """Refuse numbers that make no delay."""
        numbers = (
            self.base_s,
            self.factor,
            self.step_s,
            self.max_delay_s,
            self.max_retries or 0,
        )
        for number in numbers:
            valid = _is_number(number) and number >= 0
            _require(valid, f"retry policy: expected 0 or more, got {number!r}")

    def __call__(self, attempt: int) -> float:
        """Return the delay in seconds after the `attempt`-th run (from 1).

        :param attempt: the message's receive count, so that crashes and releases count too
        :returns: 0 to 43,200, the longest that SQS hides a message
        :raises StopRetry: if all retries are used up
        """
        if self.max_retries is not None and attempt > self.max_retries:
            raise StopRetry(f"all {self.max_retries} retries are used up")
        first, step = (
            min(number, _MAX_HELD_S) for number in (self.base_s, self.step_s)
        )
        # 2.0 ** 1024 is more than a float can hold; the longest delay counts long before.
        growth = sys.float_info.max
        with contextlib.suppress(OverflowError):
            growth = float(self.factor ** (attempt - 1))
        delay_s = min(
            first * growth + step * (attempt - 1), self.max_delay_s, _MAX_HELD_S
        )
        return _jittered(delay_s) if self.jitter else delay_s


def _jittered(delay_s: float) -> float:
    """Return between half of a delay and all of it."""
    import random

    return delay_s * random.uniform(0.5, 1)


def fixed(
    delay_s: float, max_retries: int | None = None, *, jitter: bool = True
) -> RetryPolicy:
    """Return a retry policy of equal delays.

    :param delay_s: seconds from a failed run to the next
    :param max_retries: then the dead letters; None leaves that to the queue's maxReceiveCount
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
    """Return a retry policy of delays that grow by `step_s` seconds; see :func:`fixed`.

    :param base_s: seconds from the first failed run to the next
    :param step_s: seconds that each delay is longer than the one before
    :param max_retries: then the dead letters; None leaves that to the queue's maxReceiveCount
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
    """Return a retry policy of delays that grow by `factor`; see :func:`fixed`.

    :param base_s: seconds from the first failed run to the next
    :param factor: how many times longer each delay is than the one before
    :param max_retries: then the dead letters; None leaves that to the queue's maxReceiveCount
    :param max_delay_s: the longest delay in seconds
    :param jitter: take a random part of each delay, at least half of it
    """
    return RetryPolicy(base_s, factor, 0, max_retries, max_delay_s, jitter)


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
# All the queue I/O that this library can do. A whole call that fails raises: ConfigurationError, if
# only a person can mend it. An entry of a batch that fails is in the answer, and an entry that the
# answer does not name has failed.


_SUFFIXES = dict(
    zip(Priority, ("", "-high-priority", "-low-priority", "-bulk"), strict=True)
)
# Not the order of the enum, whose numbers are 1.4's.
_URGENCY = (Priority.high, Priority.default, Priority.low, Priority.bulk)


# What makes a sender or broker, by the scheme of its URL: later rooms add theirs.
_schemes: dict[str, Callable[[str], Sender]] = {}


class Outgoing(NamedTuple):
    """A message to send; the attributes are as SQS writes them.

    Group and deduplication id are for FIFO queues; a fair queue takes a group too.
    """

    body: str
    attributes: Mapping[str, Mapping[str, Any]]
    delay_s: float = 0
    group_id: str | None = None
    deduplication_id: str | None = None

    def size(self) -> int:
        """Count the bytes as the service does: body, attribute names, types and values."""
        # ASCII, as all of ours is, has a byte a character; copies of others' messages may not.
        size = len(self.body) if self.body.isascii() else len(self.body.encode())
        for name, value in self.attributes.items():
            for text in (name, *value.values()):
                size += len(text.encode() if isinstance(text, str) else text)
        return size


class Refusal(NamedTuple):
    """An entry of a batch call that failed.

    `index` is its place among the entries of the call; `code` is the service's, or the type of an
    exception; `final` says not to try again: the entry is at fault, or was tried often enough.
    """

    index: int  # type: ignore[assignment]
    code: str
    text: str
    final: bool


class QueueInfo(NamedTuple):
    """What a worker wants to know of a queue; None where it has no dead-letter queue."""

    visibility_timeout_s: float
    dead_letter_queue: str | None
    max_receive_count: int | None


class Depth(NamedTuple):
    """How many messages a queue has; SQS says so approximately, and a minute late or more.

    `visible` can be received, `in_flight` was received and is hidden yet, `delayed` was sent with a
    delay that is not over.
    """

    visible: int
    in_flight: int
    delayed: int


class Sender(typing.Protocol):
    """What publishing needs of a service, which sets the most bytes and the longest delay.

    ``send`` takes at most ten messages, which are together within `max_bytes`, and returns those
    that were refused. ``before_fork`` lets go of what a child must not share, until ``after_fork``
    in the parent.

    Calls may come from any thread at once. One that fails as a whole raises; it may have been done
    all the same.
    """

    max_bytes: int
    max_delay_s: float

    def destination(self, priority: Priority) -> str:
        """Return the name of the queue or topic for messages of a priority."""
        name = settings.TASKHAWK_QUEUE
        if name is None and settings.TASKHAWK_BROKER != "sqs":
            name = (
                "default"  # a file needs no names to be kept apart from others' queues
            )
        return f"TASKHAWK-{name or settings.require('TASKHAWK_QUEUE')}{_SUFFIXES[priority]}".upper()

    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]: ...
    def close(self) -> None: ...
    def before_fork(self) -> None: ...
    def after_fork(self) -> None: ...


class Broker(Sender, typing.Protocol):
    """What workers and operations need besides; queues are called by name.

    ``receive`` takes at most ten messages and waits for the first, unless `stop` cuts the wait
    short; they are hidden from others for `lease_s`, or for the queue's own timeout if it is None.
    ``delete`` and ``change_visibility`` are for at most ten receipts: the latter makes messages
    visible again so many seconds from now. ``url`` is what the service calls a queue.
    """

    def receive(
        self,
        queue: str,
        most: int,
        wait_s: float,
        lease_s: float | None,
        stop: threading.Event,
    ) -> list[QueueMessage]: ...
    def delete(self, queue: str, receipts: Sequence[str]) -> list[Refusal]: ...
    def change_visibility(
        self, queue: str, changes: Sequence[tuple[str, float]]
    ) -> list[Refusal]: ...
    def url(self, queue: str) -> str: ...
    def info(self, queue: str) -> QueueInfo: ...
    def depth(self, queue: str) -> Depth: ...


@dataclasses.dataclass(eq=False, repr=False)
class QueueMessage:
    """A received message, as the hooks get it: it reads and acts like boto3's ``sqs.Message``.

    Body and attributes are as the service returned them: nothing is checked here. The receipt
    handle is of this very receive, and None where no queue has the message.
    """

    body: Any
    message_id: str
    receipt_handle: str | None = None
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    message_attributes: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=dict
    )
    queue: str | None = None
    broker: Broker | None = None  # where a queue has the message
    sns_record: Mapping[str, Any] | None = None  # where Lambda got it from a topic
    message: Message | None = (
        None  # once it is known to be valid and its task to be registered
    )
    lease_lost: bool = False  # set by the worker

    #: how often the message was received, from 1
    attempt = property(
        lambda self: int(self.attributes.get("ApproximateReceiveCount", 1))
    )
    #: the URL of the queue; "" where none has the message
    queue_url = property(
        lambda self: self.broker.url(self.queue) if self.broker else ""
    )
    is_fifo = property(lambda self: (self.queue or "").endswith(".fifo"))
    #: the message group, on FIFO and fair queues
    group_id = property(lambda self: self.attributes.get("MessageGroupId"))

    @property
    def hook_kwargs(self) -> dict[str, Any]:
        """What the hooks are called with."""
        if self.sns_record is not None:
            return {"sns_record": self.sns_record}
        return {"queue_name": self.queue, "sqs_queue_message": self}

    def delete(self) -> None:
        """Delete the message from its queue, at once.

        For hooks and old code: a worker by itself deletes what it has run, ten in a call.

        :raises PartialFailure: if the service refuses
        """
        if self.broker and self.queue and self.receipt_handle:
            _accepted(self.broker.delete(self.queue, [self.receipt_handle]))

    def change_visibility(self, *, VisibilityTimeout: float) -> None:  # noqa: N803 - boto3's name
        """Make the message visible again so many seconds from now.

        :param VisibilityTimeout: 0 to 43,200 seconds; SQS counts 12 hours in all from the receive
        :raises PartialFailure: if the service refuses, such as for a message no longer in flight
        """
        if self.broker and self.queue and self.receipt_handle:
            change = (self.receipt_handle, VisibilityTimeout)
            _accepted(self.broker.change_visibility(self.queue, [change]))

    def copy(self, attributes: Mapping[str, Mapping[str, Any]]) -> Outgoing:
        """Return the message as it is sent to another queue.

        On FIFO queues its own MessageId deduplicates it: the body's id was seen before, and SQS
        would accept the copy and drop it.
        """
        once = self.message_id if self.is_fifo else None
        return Outgoing(self.body, attributes, 0, self.group_id, once)


def _accepted(refusals: Sequence[Refusal]) -> None:
    """Raise PartialFailure if anything was refused, for calls of one entry."""
    if refusals:
        failed = [
            {"Id": str(r.index), "Code": r.code, "Message": r.text} for r in refusals
        ]
        raise PartialFailure({"Successful": [], "Failed": failed})


def _in_batches(
    call: Callable[[Sequence[Any]], list[Refusal]],
    entries: Sequence[Any],
    tries: int = 1,
    *,
    max_bytes: float = 0,
    repeated: bool = False,
) -> dict[int, Refusal]:
    """Make batch calls, and return what was refused, by its index among the entries.

    A call that fails as a whole has refused its entries and all after them, which are not tried.

    :param tries: how often in all to ask for what the service fails at
    :param max_bytes: of the sum of a call's entries, where they are messages
    :param repeated: whether botocore has repeated a whole call that failed, which is enough
    """
    refused: dict[int, Refusal] = {}
    start = 0
    while start < len(entries):
        part = entries[start : start + _MAX_BATCH]
        # One entry always goes: if it is too long by itself, the service says so.
        while (
            max_bytes
            and len(part) > 1
            and sum(entry.size() for entry in part) > max_bytes
        ):
            part = part[:-1]
        try:
            refused |= {start + refusal.index: refusal for refusal in call(part)}
        except Exception as error:
            code = _error_code(error)
            whole = Refusal(
                0, code, str(error), repeated or code.startswith("AccessDenied")
            )
            refused |= dict.fromkeys(range(start, len(entries)), whole)
            break
        start += len(part)
    again = [index for index, refusal in refused.items() if not refusal.final]
    if again and tries > 1:
        time.sleep(_jittered(0.3 ** (tries - 1)))  # 0.09 s, then 0.3 s
        answer = _in_batches(
            call, [entries[i] for i in again], tries - 1, max_bytes=max_bytes
        )
        refused = {
            index: refusal for index, refusal in refused.items() if refusal.final
        }
        refused |= {again[index]: refusal for index, refusal in answer.items()}
    return refused


def _send_all(
    sender: Sender, destination: str, entries: Sequence[Outgoing]
) -> dict[int, Refusal]:
    """Send to one destination; return what was refused, by its index among the entries."""
    send = functools.partial(sender.send, destination)
    return _in_batches(send, entries, 3, max_bytes=sender.max_bytes, repeated=True)


def _change_all(call: str, entries: Mapping[QueueMessage, Any], warning: str) -> None:
    """Make batch calls for the messages that a queue has; Lambda's role may not be allowed to.

    :param call: the method of the broker
    :param entries: what it takes of each message
    :param warning: logged with how many of how many were refused, and why
    """
    known = [
        (received, entry) for received, entry in entries.items() if received.broker
    ]
    if known:
        first = known[0][0]
        made = functools.partial(getattr(first.broker, call), first.queue)
        if refused := _in_batches(made, [entry for _, entry in known], 3):
            _log.warning(
                warning, len(refused), len(known), next(iter(refused.values())).text
            )


def _error_code(error: BaseException) -> str:
    """Return an AWS error's code without its prefix, or the error's type.

    Where an AWS error was turned into another one, it is found as that one's cause.
    """
    origin = error.__cause__ or error
    # Such as AWS.SimpleQueueService.NonExistentQueue, in the older of SQS's protocols.
    response = getattr(origin, "response", None) or {}
    return str(
        response.get("Error", {}).get("Code") or type(origin).__name__
    ).rpartition(".")[2]


# --- 8. SQLite ------------------------------------------------------------------------
# The embedded broker, with the semantics of SQS, for any number of processes on one machine. Every
# change is one transaction that is on the disk (synchronous=FULL) before the call returns. A
# message is hidden while its visible_ms is ahead: that one column is delay, visibility timeout and
# retry. A receipt is good for a delete until the message is received again or moved to the dead
# letters, and for a change as long as the message is hidden, too.


_SQLITE_SCHEMA = """BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS message (
    id INTEGER PRIMARY KEY AUTOINCREMENT, -- a receipt names it, so it is never used again
    queue TEXT NOT NULL, message_id TEXT NOT NULL, body TEXT NOT NULL, attributes TEXT NOT NULL,
    sent_ms INTEGER NOT NULL, visible_ms INTEGER NOT NULL,
    receive_count INTEGER NOT NULL DEFAULT 0, receipt TEXT);
CREATE INDEX IF NOT EXISTS message_visible ON message (queue, visible_ms);
PRAGMA user_version = 1; COMMIT;"""
_memory_pid = functools.cache(os.getpid)  # the first process that had a queue in memory


class SqliteBroker(Broker):
    """Queues in a file; or in memory, for the tests of one process.

    Any number of processes may use a file, on one machine: they share memory, which they can't over
    a network's file system (https://www.sqlite.org/wal.html).

    :param url: ``sqlite:///relative.db``, ``sqlite:////absolute.db`` or ``sqlite://`` (memory), and
        perhaps ``?visibility_timeout_s=30&max_receive_count=5``
    :param clock: epoch seconds; passed in by tests
    :raises ConfigurationError: if the URL or the file is not usable
    """

    max_bytes = _MAX_SQS_BYTES  # as on SQS, so that what works here works there
    max_delay_s = 100 * 365 * 86_400  # a number that SQLite can hold

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        """Read the URL, and open the file."""
        self._url, self._clock = url, clock
        options = {
            "visibility_timeout_s": str(_DEFAULT_LEASE_S),
            "max_receive_count": "5",
        }
        try:
            parts: Any = re.fullmatch(r"sqlite://(?:/([^?\n]+))?(?:\?(.*))?", url)
            self._path, query = parts.groups("")
            options |= (pair.partition("=")[::2] for pair in query.split("&") if pair)
            lease_s, most = options.values()
            self._lease_s, self._most = (
                _conform(_SECONDS, lease_s),
                _conform(_COUNT, most),
            )
        except (ValueError, AttributeError) as error:
            text = "TASKHAWK_BROKER: expected sqlite:///relative.db or sqlite:////absolute.db, then"
            then = "perhaps ?visibility_timeout_s=30&max_receive_count=5"
            raise ConfigurationError(f"{text} {then}, got {url!r}") from error
        text = "sqlite:// is the memory of one process, and this is another: use a file, such"
        _require(
            self._path or _memory_pid() == os.getpid(), f"{text} as sqlite:///queue.db"
        )
        # Held while a thread uses the connection, so that its transaction is that thread's alone:
        # `with self._lock, self._db` writes all that is in the block, or nothing.
        self._lock = threading.Lock()
        self._opened = self._open()

    @property
    def _db(self) -> Any:
        """The connection, opened anew after a fork; for who holds the lock."""
        self._opened = self._opened or self._open()
        return self._opened

    def _open(self) -> Any:
        """Open the file, or memory, and make the tables where there are none."""
        import sqlite3

        text = f"SQLite {sqlite3.sqlite_version} is too old: expected 3.30.0 or newer"
        _require(
            sqlite3.sqlite_version_info >= (3, 30), text
        )  # the first with count(*) FILTER
        # IMMEDIATE: a transaction waits for the file's write lock before its first change, for one
        # that has begun to read can't wait: what it has read may be old by then.
        options: Any = {
            "timeout": 30,
            "isolation_level": "IMMEDIATE",
            "check_same_thread": False,
        }
        db, deadline = None, time.monotonic() + 30
        try:
            db = sqlite3.connect(self._path or ":memory:", **options)
            if (version := db.execute("PRAGMA user_version").fetchone()[0]) not in (
                0,
                1,
            ):
                raise sqlite3.OperationalError(
                    f"expected version 1 of its tables, got {version}"
                )
            # WAL: who reads waits for nobody.
            while (
                True
            ):  # alone of all statements, this one does not wait for other processes
                try:
                    db.execute("PRAGMA journal_mode = WAL")
                    break
                except sqlite3.OperationalError as error:
                    if (
                        error.sqlite_errorname != "SQLITE_BUSY"
                        or time.monotonic() > deadline
                    ):
                        raise
                    time.sleep(0.01)
            # FULL: a COMMIT that returned outlives a power failure.
            db.execute("PRAGMA synchronous = FULL")
            db.executescript(_SQLITE_SCHEMA)
        except sqlite3.Error as error:
            if db:
                db.close()
            where = os.path.abspath(self._path or "memory")
            raise ConfigurationError(
                f"TASKHAWK_BROKER: can't open {where}: {error}"
            ) from error
        return db

    def url(self, queue: str) -> str:
        """Return the broker's URL: a queue has none of its own."""
        return self._url

    def close(self) -> None:
        """Close the file; what is in memory is gone."""
        with self._lock:
            if self._opened:
                self._opened.close()

    def before_fork(self) -> None:
        """Close the file: SQLite's locks are the process's, and a child would take them on."""
        self._lock.acquire()
        if self._path and self._opened:
            self._opened = self._opened.close()

    def after_fork(self) -> None:
        self._lock.release()

    def _in_ms(self, seconds: float = 0) -> int:
        """Return the time so many seconds from now, as the tables have it."""
        return math.ceil((self._clock() + seconds) * 1000)

    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        """Write the messages in one transaction: all, or none if it raises."""
        insert = "INSERT INTO message VALUES (NULL, ?, ?, ?, ?, ?, ?, 0, NULL)"
        # One transaction, and so one flush of the disk, for up to ten messages.
        with self._lock, self._db as db:
            for body, attributes, delay_s, *_ in entries:
                what = (destination, _new_id(), body, json.dumps(attributes))
                db.execute(insert, (*what, self._in_ms(), self._in_ms(delay_s)))
        return []

    def receive(
        self,
        queue: str,
        most: int,
        wait_s: float,
        lease_s: float | None,
        stop: threading.Event,
    ) -> list[QueueMessage]:
        """Claim messages; wait for the first without holding any lock.

        The first look comes at once, the others after pauses that grow: a message waits 50 ms at
        most, and an idle worker takes next to no CPU.
        """
        deadline, pause_s = time.monotonic() + wait_s, 0.002
        look = (
            "SELECT EXISTS (SELECT 1 FROM message WHERE queue = ? AND visible_ms <= ?)"
        )
        claim = functools.partial(self._claim, queue, most, lease_s or self._lease_s)
        while True:
            with self._lock:
                (found,) = self._db.execute(look, (queue, self._in_ms())).fetchone()
            if (claimed := claim() if found else []) or time.monotonic() >= deadline:
                return claimed
            if stop.wait(pause_s):
                return []
            pause_s = min(
                pause_s * 2, 0.05
            )  # twenty looks a second cost next to nothing

    def _claim(self, queue: str, most: int, lease_s: float) -> list[QueueMessage]:
        """Take the first messages; those received too often go to the dead-letter queue.

        As on SQS, it is the receive that moves them, and a message keeps its id and its attributes.
        """
        find = """SELECT id, receive_count + 1, sent_ms, attributes, body, message_id FROM message
            WHERE queue = ? AND visible_ms <= ? ORDER BY visible_ms, id LIMIT ?"""
        take = "UPDATE message SET receive_count = ?, visible_ms = ?, receipt = ? WHERE id = ?"
        # It is visible there at once, and counted from the start.
        redrive = "UPDATE message SET queue = ?, receive_count = 0, receipt = NULL WHERE id = ?"
        _, dead, limit = self.info(queue)
        claimed = []
        with self._lock, self._db as db:
            db.execute(
                "BEGIN IMMEDIATE"
            )  # before the look too, or others would find the same
            first = db.execute(
                find, (queue, self._in_ms(), min(most, _MAX_BATCH))
            ).fetchall()
            for row, count, sent_ms, attributes, body, message_id in first:
                if limit and count > limit:
                    db.execute(redrive, (dead, row))
                    continue
                receipt = f"{row}-{os.urandom(16).hex()}"
                db.execute(take, (count, self._in_ms(lease_s), receipt, row))
                system = {
                    "ApproximateReceiveCount": str(count),
                    "SentTimestamp": str(sent_ms),
                }
                parts = (body, message_id, receipt, system, json.loads(attributes))
                claimed.append(QueueMessage(*parts, queue, self))
        return claimed

    def delete(self, queue: str, receipts: Sequence[str]) -> list[Refusal]:
        """Delete; what was deleted before is no error, what another has received since is."""
        # A receipt begins with the number of its row, by which the row is found.
        change = "DELETE FROM message WHERE id = CAST(:receipt AS INTEGER) AND receipt = :receipt"
        refused = "SELECT 1 FROM message WHERE id = CAST(:receipt AS INTEGER)"
        return self._change(
            change, refused, [{"receipt": receipt} for receipt in receipts]
        )

    def change_visibility(
        self, queue: str, changes: Sequence[tuple[str, float]]
    ) -> list[Refusal]:
        """Change when messages are visible again, while they are in flight."""
        now = self._in_ms()
        rows = [{"receipt": r, "until": self._in_ms(s), "now": now} for r, s in changes]
        change = """UPDATE message SET visible_ms = :until
            WHERE id = CAST(:receipt AS INTEGER) AND receipt = :receipt AND visible_ms > :now"""
        return self._change(change, "SELECT 1", rows)

    def _change(
        self, change: str, refused: str, rows: Sequence[dict[str, Any]]
    ) -> list[Refusal]:
        """Make each change; where it meets no row, `refused` asks whether that is an error."""
        text = "the message is no longer in flight, or was received again"
        with self._lock, self._db as db:
            return [
                Refusal(index, "ReceiptHandleIsInvalid", text, final=True)
                for index, row in enumerate(rows)
                if not db.execute(change, row).rowcount
                and db.execute(refused, row).fetchone()
            ]

    def info(self, queue: str) -> QueueInfo:
        """Return what the URL says; the dead-letter queue of a queue has none itself."""
        limits = (
            (None, None) if queue.endswith("-DLQ") else (f"{queue}-DLQ", self._most)
        )
        return QueueInfo(self._lease_s, *limits)

    def depth(self, queue: str) -> Depth:
        """Count exactly, unlike SQS."""
        ask = """SELECT count(*) FILTER (WHERE visible_ms <= :now),
            count(*) FILTER (WHERE visible_ms > :now AND receipt IS NOT NULL),
            count(*) FILTER (WHERE visible_ms > :now AND receipt IS NULL)
            FROM message WHERE queue = :queue"""
        # One statement, and so one moment: no message is counted twice, or not at all.
        with self._lock:
            return Depth(
                *self._db.execute(
                    ask, {"now": self._in_ms(), "queue": queue}
                ).fetchone()
            )


_schemes["sqlite"] = SqliteBroker


# --- 9. SQS and SNS -------------------------------------------------------------------
# Every AWS call of this library. botocore does credentials, signing, endpoints and, for sends, the
# retries. Their number is always set: a receive that botocore retries in secret strands what the
# lost answer held.


# The services, and the protocols they speak, have more than one name for the same error.
_REMEDIES = {  # what a person can do about an error, by its code
    "NonExistentQueue|QueueDoesNotExist": "there is no such queue here: make it, or check"
    " TASKHAWK_QUEUE, AWS_REGION and the account",
    "NotFound": "there is no such topic: make it, or check TASKHAWK_QUEUE and AWS_ACCOUNT_ID",
    "AccessDenied(Exception)?|AuthorizationError": "access denied: the IAM policy of these"
    " credentials does not allow {operation}",
    "(No|Partial)CredentialsError": "no AWS credentials: set AWS_ACCESS_KEY and AWS_SECRET_KEY, or"
    " give botocore a profile or role; to try things out without AWS, set TASKHAWK_BROKER to"
    " sqlite:///queue.db",
    "NoRegionError": "no AWS region: set AWS_REGION, for example eu-west-1",
    "InvalidClientTokenId|UnrecognizedClientException|InvalidAccessKeyId|InvalidSecurity": "AWS"
    " does not know these credentials: check AWS_ACCESS_KEY",
    "SignatureDoesNotMatch|InvalidSignature(Exception)?": "AWS refuses these credentials: check"
    " AWS_SECRET_KEY",
}


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn the errors that a person must mend into a sentence that says how.

    :param where: the queue or topic, which the sentence begins with
    :raises MessageTooLarge: where the service names a limit that is lower than ours
    :raises ConfigurationError: for what :data:`_REMEDIES` knows; all else goes on as it is
    """
    try:
        yield
    except Exception as error:
        if limit := re.search(r"shorter than (\d+) bytes", str(error)):
            text = f"{where} takes messages of at most {limit[1]} bytes"
            raise MessageTooLarge(text, int(limit[1])) from error
        code = _error_code(error)
        for codes, remedy in _REMEDIES.items():
            if re.fullmatch(codes, code):
                # IAM has no actions of their own for batches.
                operation = getattr(error, "operation_name", "").removesuffix("Batch")
                text = remedy.format(operation=operation)
                raise ConfigurationError(f"{where}: {text} ({code})") from error
        raise


class _AwsSender(Sender):
    """What SQS and SNS share: clients, sending, the answers of batch calls, and errors."""

    # The service's names: its own, of the parameters for the queue or topic and for a batch's
    # entries, of the operations that send one message or several, of the parts of an Outgoing.
    service = target_key = entries_key = ""
    sends: Sequence[str] = ()
    fields: Sequence[str] = ()

    def __init__(self, _url: str = "") -> None:
        """Have no client yet: each is made when it is first needed."""
        self._clients: dict[str, Any] = {}

    def client(self, role: str) -> Any:
        """Return the client for "send", "poll" or "keep", which differ in timeouts and retries.

        "send" is for publishers and for people: botocore tries three times. "poll" outlasts a long
        poll, and "keep" must be back before a lease ends: both try once, and the worker does the
        rest.
        """
        if role not in self._clients:
            with _brokers.lock:
                self._clients[role] = self._clients.get(role) or self._make_client(role)
        return self._clients[role]

    def _make_client(self, role: str) -> Any:
        """Make a client; botocore finds credentials and region where the settings have none."""
        from botocore.config import Config
        from botocore.session import get_session

        if not _brokers.session:
            _brokers.session = get_session()
            loader = _brokers.session.get_component("data_loader")
            # botocore looks into 400 folders for this: 8 ms before the first dispatch.
            loader.list_available_services = lambda _type: os.listdir(
                loader.BUILTIN_DATA_PATH
            )
        endpoint = getattr(settings, f"AWS_ENDPOINT_{self.service.upper()}")
        config = Config(
            connect_timeout=settings.AWS_CONNECT_TIMEOUT_S,
            read_timeout=settings.AWS_READ_TIMEOUT_S + (role == "poll") * _LONG_POLL_S,
            max_pool_connections=50,  # one for each thread that dispatches, or they queue
            user_agent=f"taskhawk/{VERSION}",  # botocore would build its own, twice a call
            parameter_validation=False,  # ours are right; with the line above, 13 % of a dispatch
            retries={
                "mode": "standard",
                "total_max_attempts": 3 if role == "send" else 1,
            },
        )
        more = {
            "region_name": settings.AWS_REGION,
            "endpoint_url": endpoint,
            "config": config,
        }
        return _brokers.session.create_client(
            self.service, **more, **settings.credentials()
        )

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def url(self, queue: str, role: str = "send") -> str:
        """Return what the service calls a queue or topic."""
        return queue

    def arn(self, name: str) -> str:
        """Return what AWS calls a queue or topic of this account."""
        account = settings.require("AWS_ACCOUNT_ID")
        with _explained(name):
            meta = self.client("send").meta
        return (
            f"arn:{meta.partition}:{self.service}:{meta.region_name}:{account}:{name}"
        )

    def call(self, role: str, operation: str, where: str, **parameters: Any) -> Any:
        """Make a call to a queue or topic, by botocore's name for the call."""
        to = {self.target_key: self.url(where, role)}
        with _explained(where):
            return getattr(self.client(role), operation)(**to, **parameters)

    def _batch(
        self, role: str, name: str, where: str, entries: Iterable[Any]
    ) -> list[Refusal]:
        """Make a batch call, and return what its answer does not say was done."""
        named = [{"Id": str(index), **entry} for index, entry in enumerate(entries)]
        # A call that succeeds may have done a part of its batch only; what its answer leaves out
        # counts as failed.
        answer = self.call(role, name, where, **{self.entries_key: named})
        done = {entry["Id"] for entry in answer.get("Successful", ())}
        failed = {entry["Id"]: entry for entry in answer.get("Failed", ())}
        silence = {
            "Code": "Unanswered",
            "Message": "the answer does not name this entry",
        }
        left = [
            (e["Id"], failed.get(e["Id"], silence))
            for e in named
            if e["Id"] not in done
        ]
        return [
            Refusal(int(i), e["Code"], e.get("Message", ""), bool(e.get("SenderFault")))
            for i, e in left
        ]

    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        """Send one message alone and several in a batch call, without what they do not have."""
        calls = [
            {n: v for n, v in zip(self.fields, e, strict=False) if v} for e in entries
        ]
        if len(calls) > 1:
            return self._batch("send", self.sends[1], destination, calls)
        self.call("send", self.sends[0], destination, **calls[0])
        return []


class SnsSender(_AwsSender):
    """Publishes to the topics that a Lambda app's functions are subscribed to.

    Between SNS and Lambda their own retries and dead-letter queues apply:
    https://docs.aws.amazon.com/sns/latest/dg/sns-message-delivery-retries.html
    """

    service, target_key, entries_key = "sns", "TopicArn", "PublishBatchRequestEntries"
    sends, fields = ("publish", "publish_batch"), ("Message", "MessageAttributes")
    max_bytes, max_delay_s = _MAX_SNS_BYTES, 0

    def destination(self, priority: Priority) -> str:
        """Return the topic's ARN, put together: looking it up would take another permission."""
        queue = settings.require("TASKHAWK_QUEUE").lower()
        return self.arn(f"taskhawk-{queue}{_SUFFIXES[priority]}")


class SqsBroker(_AwsSender, Broker):
    """Queues on SQS: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/.

    URLs, visibility timeouts and redrive policies of queues are looked up once: only a new process
    sees that they were changed.
    """

    service, target_key, entries_key = "sqs", "QueueUrl", "Entries"
    sends = ("send_message", "send_message_batch")
    fields: Sequence[str] = ("MessageBody", "MessageAttributes", "DelaySeconds")
    fields = (*fields, "MessageGroupId", "MessageDeduplicationId")
    max_bytes, max_delay_s = _MAX_SQS_BYTES, _MAX_DELAY_S

    def __init__(self, _url: str = "sqs") -> None:
        super().__init__()
        self._lock = (
            threading.Lock()
        )  # held while a URL is looked up, so that it is once
        self._urls: dict[str, str] = {}
        self._accounts: dict[str, str] = {}  # of queues whose URL need not be looked up
        self._infos: dict[str, QueueInfo] = {}

    def url(self, queue: str, role: str = "send") -> str:
        """Look up a queue's URL, once; a Lambda's role may not, so it is made up there."""
        if queue not in self._urls:
            with _explained(queue):
                client, account = self.client(role), self._accounts.get(queue)
                made_up = account and f"{client.meta.endpoint_url}/{account}/{queue}"
                with self._lock:
                    known = self._urls.get(queue) or made_up
                    self._urls[queue] = (
                        known or client.get_queue_url(QueueName=queue)["QueueUrl"]
                    )
        return self._urls[queue]

    def queue_of_arn(self, arn: str) -> str:
        """Return the name of a queue that Lambda receives from."""
        _, _, _, _, account, queue = arn.split(":")
        self._accounts[queue] = account
        return queue

    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        """Send, with delays in whole seconds.

        A batch as a whole may be too long for a queue whose limit was set lower than the service's.
        It is sent again, message by message, so that only those are refused which are too long
        themselves.
        """
        entries = [
            e._replace(delay_s=math.ceil(e.delay_s)) if e.delay_s else e
            for e in entries
        ]
        try:
            return super().send(destination, entries)
        except Exception as error:
            if len(entries) == 1 or _error_code(error) != "BatchRequestTooLong":
                raise
        alone = [
            _in_batches(functools.partial(self.send, destination), [e]) for e in entries
        ]
        # final: botocore has repeated what failed; to send it again would help nobody.
        return [r[0]._replace(index=i, final=True) for i, r in enumerate(alone) if r]

    def receive(
        self,
        queue: str,
        most: int,
        wait_s: float,
        lease_s: float | None,
        stop: threading.Event,
    ) -> list[QueueMessage]:
        """Poll once with ReceiveMessage; it is waited out, for its answer may hold messages.

        A long poll asks all of SQS's servers and costs one request in 20 s; a short one asks some,
        and may miss messages:
        https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/
        """
        # Not by AttributeNames, the older parameter for these, which AWS has discontinued.
        names = ["ApproximateReceiveCount", "SentTimestamp", "MessageGroupId"]
        ask: Any = {
            "MessageSystemAttributeNames": names,
            "MessageAttributeNames": ["All"],
        }
        ask |= {} if lease_s is None else {"VisibilityTimeout": math.ceil(lease_s)}
        ask["WaitTimeSeconds"] = min(math.ceil(wait_s), _LONG_POLL_S)
        most = min(most, _MAX_BATCH)
        answer = self.call(
            "poll", "receive_message", queue, MaxNumberOfMessages=most, **ask
        )
        received = []
        for found in answer.get("Messages", ()):
            parts = (found["Body"], found["MessageId"], found["ReceiptHandle"])
            attributes = (
                found.get("Attributes", {}),
                found.get("MessageAttributes", {}),
            )
            received.append(QueueMessage(*parts, *attributes, queue, self))
        return received

    def delete(self, queue: str, receipts: Sequence[str]) -> list[Refusal]:
        """Delete; on a standard queue, a stale receipt is no error to SQS."""
        entries = ({"ReceiptHandle": receipt} for receipt in receipts)
        return self._batch("keep", "delete_message_batch", queue, entries)

    def change_visibility(
        self, queue: str, changes: Sequence[tuple[str, float]]
    ) -> list[Refusal]:
        """Change the visibility timeouts, in whole seconds."""
        entries = (
            {"ReceiptHandle": r, "VisibilityTimeout": math.ceil(s)} for r, s in changes
        )
        return self._batch("keep", "change_message_visibility_batch", queue, entries)

    def attributes(self, queue: str, names: Sequence[str]) -> Any:
        """Read attributes of a queue, by their names on SQS."""
        return self.call("send", "get_queue_attributes", queue, AttributeNames=names)[
            "Attributes"
        ]

    def info(self, queue: str) -> QueueInfo:
        """Read the queue's attributes, once: timeout, dead-letter queue, most receives."""
        if queue not in self._infos:
            found = self.attributes(queue, ["VisibilityTimeout", "RedrivePolicy"])
            redrive = json.loads(found.get("RedrivePolicy") or "{}")
            target, most = (
                redrive.get("deadLetterTargetArn"),
                redrive.get("maxReceiveCount"),
            )
            # The policy's number comes back as it was set: it may be a string.
            lease_s, dead = (
                float(found["VisibilityTimeout"]),
                target and target.rpartition(":")[2],
            )
            self._infos[queue] = QueueInfo(lease_s, dead, most and int(most))
        return self._infos[queue]

    def depth(self, queue: str) -> Depth:
        """Count with three of the queue's attributes, in one call."""
        names = [
            f"ApproximateNumberOfMessages{kind}"
            for kind in ("", "NotVisible", "Delayed")
        ]
        found = self.attributes(queue, names)
        return Depth(*(int(found[name]) for name in names))


_schemes["sns"], _schemes["sqs"] = SnsSender, SqsBroker


# --- 10. connections ------------------------------------------------------------------
# The one sender and the one broker of a process, and what a fork must not share.


class _Brokers:
    """The one sender and the one broker of this process, made at their first use.

    A process that forks keeps its own, and its child makes new ones: connections to AWS can't be
    shared, and a SQLite file must not be open over a fork.
    """

    def __init__(self) -> None:
        # Held while one is made, or a client of its, so that there is never a second; while a batch
        # is added to or closed, so that nothing is added to a closed one; and over a fork.
        # botocore's session, one for all services, is not thread-safe either. Reentrant, as
        # settings that are read meanwhile may be of a module that calls configure().
        self.lock = threading.RLock()
        self._made: dict[str, Any] = {}
        self.session: Any = None
        self.captured_by: Sender | None = None

    def sender(self) -> Sender:
        """Return what publishes: SNS for a Lambda app, else the broker; in sync mode, neither."""
        if self.captured_by is not None:
            return self.captured_by
        name = "sync" if settings.TASKHAWK_SYNC else settings.TASKHAWK_BROKER
        name = "sns" if name == "sqs" and settings.IS_LAMBDA_APP else name
        return typing.cast("Sender", self.get(name))

    def broker(self) -> Broker:
        """Return the broker that TASKHAWK_BROKER names."""
        return typing.cast("Broker", self.get(settings.TASKHAWK_BROKER))

    def get(self, url: str) -> Any:
        """Return the sender or broker of that name."""
        # First without the lock, for each dispatch comes by here: reading a dict is safe.
        if (found := self._made.get(url)) is None:
            with self.lock:
                found = self._made.get(url)
                if found is None:
                    found = self._made[url] = self._make(url)
        return found

    @staticmethod
    def _make(url: str) -> Sender:
        """Make the sender or broker that a URL's scheme stands for."""
        scheme = url.partition(":")[0]
        # A copy of this file may be cut before the part that has it.
        text = f"{scheme!r} is not in this copy of taskhawk: vendor more of its parts"
        _require(scheme in _schemes, text)
        return _schemes[scheme](url)

    def close(self) -> None:
        """Close all; the next use makes them anew."""
        with self.lock:
            made, self._made, self.session = self._made, {}, None
        for sender in made.values():
            sender.close()

    def before_fork(self) -> None:
        """Let go of what a child must not share."""
        # While it is held, no other thread is making anything: the child would have half of it.
        self.lock.acquire()
        for sender in self._made.values():
            sender.before_fork()

    def after_fork(self) -> None:
        """Go on in the parent."""
        for sender in self._made.values():
            sender.after_fork()
        self.lock.release()

    def after_fork_in_child(self) -> None:
        """Begin anew; keep what is the parent's, for closing it would disturb the parent."""
        _inherited.append(self._made)
        self.__init__()  # type: ignore[misc]


_inherited: list[object] = []
_brokers = _Brokers()
# For good, once this file is imported: each fork of the process calls them.
os.register_at_fork(before=_brokers.before_fork, after_in_parent=_brokers.after_fork)
os.register_at_fork(after_in_child=_brokers.after_fork_in_child)
settings.on_change.append(_brokers.close)


# === PART III: TASKS ==================================================================

__all__ += [
    "AsyncInvocation",
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
# Only what is in this registry can be invoked by a message. A name, once taken, is never given to
# another function, so a message can't reach code that its publisher did not mean. A call is held
# against the function's signature where it is dispatched, for the caller can mend it and the worker
# can't.


class Metadata(dict[str, Any]):
    """What a task may know of its run: id, priority, receipt, timestamp, version.

    A dict, as in taskhawk 1.4, whose keys are attributes too. Attributes alone are `headers`;
    `task`, its name; `queue`, None where there is none; `attempt`, counting receives from 1; and
    `lease_lost`: the worker could not keep the message to itself, and another may run it now.
    """

    def __init__(self, message: Message, receipt: str | None) -> None:
        """Describe a run of a message; a receipt of None is a run that no queue knows of."""
        super().__init__(message.metadata, id=message.id, priority=message.priority)
        self["receipt"], self._message = receipt, message
        self._received = message.received or QueueMessage(None, message.id)

    task = property(lambda self: self._message.task_name)
    headers = property(lambda self: self._message.headers)
    attempt = property(lambda self: self._received.attempt)
    queue = property(lambda self: self["receipt"] and self._received.queue)
    lease_lost = property(lambda self: self._received.lease_lost)

    def __getattr__(self, name: str) -> Any:
        """Return a key as an attribute."""
        if name not in self:
            raise AttributeError(f"metadata has no {name!r}")
        return self[name]

    def extend_visibility_timeout(self, visibility_timeout_s: float) -> None:
        """Hide the message from others for so many seconds from now, where a queue has it.

        Only of use in Lambda behind SQS: a worker does it by itself.

        :param visibility_timeout_s: 0 to 43,200 seconds; SQS counts 12 hours from the receive
        :raises PartialFailure: if the service refuses, such as for a message no longer in flight
        :raises ConfigurationError: if the function's role may not change the visibility
        """
        self._received.change_visibility(VisibilityTimeout=visibility_timeout_s)


class AsyncInvocation(Generic[_P]):
    """How to dispatch a task. Immutable: each ``with_…`` returns another invocation.

    So one can be kept and shared between threads: ``urgent = send.with_priority(Priority.high)``.
    """

    _options: Mapping[str, Any] = {}  # what was given of headers, priority and delay_s

    def __init__(self, task: Task[_P, Any]) -> None:
        """Make the plain invocation of a task; it has no options yet."""
        self._task = task

    def _with(self, **options: Any) -> AsyncInvocation[_P]:
        """Return another invocation with these options too."""
        other = AsyncInvocation(self._task)
        vars(other)["_options"] = {**self._options, **options}
        return other

    def with_headers(self, /, **headers: Any) -> AsyncInvocation[_P]:
        """Return an invocation with these headers too; the later value of a name wins.

        :param headers: values are anything that JSON can hold. They are in the message, and up to
            ten of them, as strings, are attributes that SNS can filter by.
        """
        return self._with(headers={**self._options.get("headers", {}), **headers})

    def with_priority(self, priority: Priority) -> AsyncInvocation[_P]:
        """Return an invocation with this priority, whatever the task's is.

        :raises TypeError: if it is not a :class:`Priority`
        """
        if not isinstance(priority, Priority):
            raise TypeError(f"priority: expected a taskhawk.Priority, got {priority!r}")
        return self._with(priority=priority)

    def with_delay(self, delay: float | timedelta) -> AsyncInvocation[_P]:
        """Return an invocation whose messages are held back by the queue.

        :param delay: seconds, or a timedelta: up to 15 minutes on SQS (its DelaySeconds), any
            length on SQLite, none on SNS
        :raises TypeError: if it is neither
        :raises ValueError: if it is negative or not finite; dispatch refuses what is too long
        """
        delay_s = getattr(delay, "total_seconds", lambda: delay)()
        if not _is_number(delay_s):
            raise TypeError(f"delay: expected seconds or a timedelta, got {delay!r}")
        if not 0 <= delay_s < math.inf:
            raise ValueError(f"delay: expected 0 or more seconds, got {delay_s}")
        return self._with(delay_s=delay_s)

    def dispatch(self, /, *args: _P.args, **kwargs: _P.kwargs) -> str:
        """Queue a run of the task: one request, and one more at a queue's first use.

        In a :func:`batch` it is queued at the end; with TASKHAWK_SYNC it runs here and now.

        :param args: for the function; as JSON can hold them, and Decimals become numbers
        :returns: the message's id, which the task finds in its ``metadata``
        :raises TypeError: if the function can't be called so, or an argument is not JSON
        :raises ValidationError: if an argument can't be sent: NaN, too deep, too large
        :raises ConfigurationError: if the queue is missing or forbidden, or the delay too long
        :raises Exception: of botocore or sqlite3, if the call fails otherwise: it may be queued
        """
        return publish(self._message(args, kwargs))

    def dispatch_many(self, calls: Iterable[Any]) -> int:
        """Queue a run for each of `calls`, ten to a request, with bounded memory.

        :param calls: a tuple is a call's positional arguments, a dict its keyword arguments, and
            anything else its only argument
        :returns: how many there were
        :raises PartialFailure: if some were not accepted; no more of `calls` was read then
        :raises TypeError: and others, as :meth:`dispatch`; earlier calls may be queued by then
        """

        def prepare(call: Any) -> _Ready:
            if isinstance(call, dict):
                return _prepare(self._message((), call))
            return _prepare(
                self._message(call if isinstance(call, tuple) else (call,), {})
            )

        # Not map(): there, a StopIteration out of prepare() would pass for the end of `calls`.
        count, ready = 0, (prepare(call) for call in calls)
        while some := list(itertools.islice(ready, _MAX_BATCH)):
            # Ten are in memory, and no more, unless a batch() is around this: `calls` may be long.
            _publish_all(_collect(some))
            count += len(some)
        return count

    def _message(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Message:
        """Make the message of a call, after a check that the worker can make that call."""
        task, options = self._task, self._options
        task.bind(args, kwargs)
        headers = options.get("headers", {})
        if hook := settings.TASKHAWK_DEFAULT_HEADERS:
            # The manual of 1.4 says that it gets the task; 1.4.0 called it with nothing.
            headers = {
                **((hook(task=task) if _takes_task(hook) else hook()) or {}),
                **headers,
            }
        priority = options.get("priority") or task.priority
        message = Message.new(
            task.name, args, kwargs, headers=headers, priority=priority
        )
        message.delay_s = options.get("delay_s", 0)
        return message


@functools.lru_cache
def _takes_task(hook: Callable[..., Any]) -> bool:
    """Return whether a hook wants the task; remembered, as looking takes long."""
    parameters = inspect.signature(hook).parameters.values()
    return any(p.name == "task" or p.kind is p.VAR_KEYWORD for p in parameters)


class Task(AsyncInvocation[_P], Generic[_P, _R]):
    """A function that can be dispatched: its own plain invocation; a call runs it, here and now.

    Made by :func:`task`, which is where its options are described.

    :param fn: the function; a coroutine function is run on an event loop
    :param priority: of its messages, unless an invocation has another
    :param name: what messages call it by
    :raises ConfigurationError: if a message can't call the function
    """

    def __init__(self, fn: Callable[_P, _R], priority: Priority, name: str) -> None:
        """Look at the function's parameters; the options of :func:`task` are set afterwards."""
        super().__init__(self)
        self._fn, self._priority, self._name = fn, priority, name
        try:
            self._signature = inspect.signature(fn)
        except ValueError as error:
            text = f"{name} does not tell its parameters: expected a function written in Python"
            raise ConfigurationError(text) from error
        kinds = {p.name: p.kind for p in self._signature.parameters.values()}
        text = f"{name}: *args can't be a task's parameter: name the arguments, or take a list"
        _require(inspect.Parameter.VAR_POSITIONAL not in kinds.values(), text)
        # What the worker gives: a parameter of that name, or **kwargs, takes it.
        named = {
            n
            for n, kind in kinds.items()
            if kind is not inspect.Parameter.POSITIONAL_ONLY
        }
        takes_all = inspect.Parameter.VAR_KEYWORD in kinds.values()
        self._given_by_worker = {
            n for n in ("metadata", "headers") if takes_all or n in named
        }
        # Remembered: the signature's bind() takes as long as the rest of a dispatch.
        self._check_shape = functools.lru_cache(self._bind_shape)
        #: the retry policy, and the exceptions that it is for: options of :func:`task`
        self.retry: Callable[[int], float] | None = None
        self.retry_on: tuple[type[BaseException], ...] = (BaseException,)
        self.never_retry_on: tuple[type[BaseException], ...] = ()
        #: seconds until a run is killed; whether it has a process of its own
        self.time_limit: float | None = None
        self.isolate = False
        # Tells a function whose module is read again from a second one of that name in it.
        self.loaded_by = getattr(fn, "__globals__", {}).get("__spec__")
        functools.update_wrapper(self, fn, updated=())
        extra = getattr(fn, "__dict__", {}).items()  # it may have names of ours
        vars(self).update(
            {key: value for key, value in extra if not hasattr(self, key)}
        )

    name = property(lambda self: self._name, doc="what messages call the task by")
    priority = property(
        lambda self: self._priority, doc="of its messages, unless they say so"
    )
    fn = property(lambda self: self._fn, doc="the function")
    accepts_metadata = property(lambda self: "metadata" in self._given_by_worker)
    accepts_headers = property(lambda self: "headers" in self._given_by_worker)
    task = property(
        lambda self: self, doc="itself: in 1.4 the decorator returned the function"
    )

    def __call__(self, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run the function."""
        return self._fn(*args, **kwargs)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Check arguments against the signature, exactly as the worker will call the function.

        :raises TypeError: if the worker's call would fail
        """
        self._check_shape(len(args), *kwargs)

    def _bind_shape(self, count: int, *names: str) -> None:
        """Check what alone decides whether a call fits: how many arguments, and which names."""
        for name in sorted(self._given_by_worker.intersection(names)):
            raise TypeError(
                f"{self._name}: {name!r} is given by the worker: leave it out"
            )
        try:
            self._signature.bind(
                *range(count), **dict.fromkeys([*names, *self._given_by_worker])
            )
        except TypeError as error:
            raise TypeError(f"{self._name}: {error}") from None

    def call(self, message: Message, receipt: str | None) -> None:
        """Run the function with a message's arguments; one that is ``async`` to its end.

        :param receipt: the receipt handle; None where no queue has the message
        """
        metadata = Metadata(message, receipt)
        # A sender can't set these two: what the worker gives goes over it.
        given = {"metadata": metadata, "headers": dict(message.headers)}
        kwargs = {
            **message.kwargs,
            **{name: given[name] for name in self._given_by_worker},
        }
        # A context variable: threads and coroutines that copy the context see it too.
        token = _current.set(metadata)
        try:
            result: Any = self._fn(*message.args, **kwargs)
            if inspect.iscoroutine(result):
                _run_coroutine(result)
        finally:
            _current.reset(token)

    @classmethod
    def find_by_name(cls, name: str) -> Task[Any, Any]:
        """Return the task registered under a name; raise :exc:`TaskNotFound` if there is none."""
        return _find_task(name)

    def __reduce__(self) -> str:
        """Be pickled as the function would be: by its name in its module."""
        return str(vars(self).get("__qualname__", self._name))

    def __str__(self) -> str:
        return f"Taskhawk task: {self._name}"

    __repr__ = __str__


_current = contextvars.ContextVar[Metadata | None]("taskhawk task", default=None)


def current_task() -> Metadata | None:
    """Return the metadata of the task that this code runs in; None outside of any.

    Also in threads and coroutines that the task started, as far as they run in its context:
    https://docs.python.org/3/library/contextvars.html
    """
    return _current.get()


def extend_visibility_timeout(
    priority: Priority, receipt: str, visibility_timeout_s: int
) -> None:
    """Hide a message of a queue from others for so many seconds from now.

    A worker does it by itself for as long as a task runs: this is for code that was written for
    taskhawk 1.4.

    :param priority: says which queue
    :param receipt: the receipt handle, which a task finds in its metadata
    :param visibility_timeout_s: 0 to 43,200 seconds
    :raises PartialFailure: if the message is no longer in flight
    """
    broker = _brokers.broker()
    change = (receipt, visibility_timeout_s)
    _accepted(broker.change_visibility(broker.destination(priority), [change]))


@contextlib.contextmanager
def _one_event_loop() -> Iterator[None]:
    """Keep one event loop for all coroutines of this thread, made for the first of them."""
    _slot.loop = None
    try:
        yield
    finally:
        if loop := vars(_slot).pop("loop", None):  # it is gone if a task ran a worker
            loop.close()


def _run_coroutine(coroutine: Any) -> None:
    """Run a coroutine to its end, on the event loop of this thread's slot if it has one."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    context, inside = contextvars.copy_context(), None
    with contextlib.suppress(
        RuntimeError
    ):  # to run in its handler would chain it to our errors
        inside = asyncio.get_running_loop()
    if (
        inside
    ):  # sync mode inside an application's own loop, which is busy until we return
        with ThreadPoolExecutor(1) as pool:
            pool.submit(context.run, asyncio.run, coroutine).result()
    elif hasattr(_slot, "loop"):
        _slot.loop = _slot.loop or asyncio.Runner()
        _slot.loop.run(coroutine, context=context)
    else:
        asyncio.run(coroutine)


@typing.overload
def task(fn: Callable[_P, _R], /) -> Task[_P, _R]: ...
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
) -> Any:
    """Turn a function into a :class:`Task`: ``@task``, or ``@task(priority=Priority.high)``.

    :param priority: of its messages, unless an invocation has another
    :param name: what messages call it by; its module and name if None
    :param retry: gives the seconds from a failed run to the next: :func:`fixed`, :func:`linear`,
        :func:`exponential`, or any function of the attempt (from 1); None leaves it to the queue
    :param retry_on: exceptions to run again after; all others go to the dead letters at once
    :param never_retry_on: exceptions that go to the dead letters at once
    :param time_limit: seconds until a worker kills a run, in whatever code it is; it is isolated
    :param isolate: have a worker run it in a process of its own, which may crash
    :raises ConfigurationError: if a message can't call the function, its name is taken, or an
        option is not as it should be
    """
    options: Any = {
        "retry": retry,
        "retry_on": retry_on,
        "never_retry_on": never_retry_on,
    }
    options |= {"time_limit": time_limit, "isolate": isolate or time_limit is not None}

    def decorate(fn: Any) -> Task[Any, Any]:
        _check_declared(fn, priority, name, options)
        here = _place(fn)
        cls = settings.read("TASKHAWK_TASK_CLASS") or Task
        made: Task[Any, Any] = cls(fn, priority, name or f"{here[0]}.{fn.__name__}")
        text = f"TASKHAWK_TASK_CLASS: expected a subclass of taskhawk.Task, got {cls!r}"
        _require(isinstance(made, Task), text)
        vars(made).update(options)
        # To look at the name and to take it is one step: two threads can't both find it free.
        taken = _registry.setdefault(made.name, made)
        # A module may be read again, also as __main__ and by its name, and a function typed anew.
        there, anew = _place(taken.fn), taken.loaded_by is not made.loaded_by
        reloaded = here[:2] == there[:2] and (anew or here[0] == "__main__")
        if taken.fn is not made.fn and not reloaded:
            text = "{}: the name of {}.{}{} is taken by {}.{}{}: rename one, or pass name= to"
            raise ConfigurationError(
                f"{text.format(made.name, *here, *there)} @taskhawk.task"
            )
        _registry[made.name] = made
        if not name and fn.__module__ == "__main__":
            _registry[f"__main__.{fn.__name__}"] = (
                made  # as 1.4 named it: messages in flight
            )
        return made

    return decorate(*args) if args else decorate


def _check_declared(
    fn: Any, priority: object, name: object, options: Mapping[str, Any]
) -> None:
    """Refuse what a message can't call, and say what to do instead."""
    shown = getattr(fn, "__qualname__", repr(fn))
    # These two first, for what follows looks into the function.
    _require(not isinstance(fn, Task), f"{shown} is a task already: decorate it once")
    _require(callable(fn), f"{shown} can't be called: expected a function")
    # In a class body, a method is a function still: its first parameter gives it away.
    in_class = "." in shown and not shown.rpartition(".")[0].endswith("<locals>")
    takes_self = in_class and [*inspect.signature(fn).parameters][:1] == ["self"]
    method = inspect.ismethod(fn) or takes_self
    generator = inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn)
    retry, limit = options["retry"], options["time_limit"]
    flaws = {
        "is a method: expected a function, which a message can call without an object": method,
        "is a generator: expected a function that runs when it is called": generator,
        "is a lambda: expected a function with a name (def)": shown.endswith(
            "<lambda>"
        ),
        "has no name: pass name= to taskhawk.task": not (
            name or hasattr(fn, "__name__")
        ),
        f"has {name=}: expected a string": not isinstance(name, str | None),
        f"has {priority=}: expected a taskhawk.Priority": not isinstance(
            priority, Priority
        ),
        f"has {retry=}: expected a function of the attempt": retry
        and not callable(retry),
        f"has time_limit={limit!r}: expected {_SECONDS}": limit is not None
        and not (_is_number(limit) and 0 < limit < math.inf),
    }
    for option in ("retry_on", "never_retry_on"):
        kinds = (
            options[option]
            if isinstance(options[option], tuple)
            else (options[option],)
        )
        fit = all(
            isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds
        )
        flaws[f"has {option}={options[option]!r}: expected exceptions"] = not fit
    for flaw, found in flaws.items():
        _require(not found, f"{shown} {flaw}")


_MAINS = (
    "__main__",
    "__mp_main__",
)  # a script, the latter in a process of multiprocessing


def _place(fn: Any) -> tuple[str, str, str]:
    """Return the module that a worker imports a function by, also a script's, its name and line."""
    module, script = fn.__module__, sys.modules.get(fn.__module__)
    if module in _MAINS and (path := getattr(script, "__file__", None)):
        spec = getattr(script, "__spec__", None)
        module = (spec.name if spec else inspect.getmodulename(path)) or module
    code = getattr(fn, "__code__", None)
    line = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return str(module), getattr(fn, "__qualname__", repr(fn)), line


# --- 12. publishing -------------------------------------------------------------------
# Nothing leaves that _decode() would refuse or the service can't hold, and what was not accepted
# raises: after dispatch() returned, the message is in the queue's keeping. In a batch(), all are
# checked and encoded before the first is sent.


# What SQS takes: names with single dots inside, without AWS's prefixes (and ours); characters that
# XML 1.0 has.
_ATTRIBUTE_NAME = re.compile(
    r"(?a)(?!.{257})(?!(?i:aws|amazon|taskhawk)\.)[\w-]+(\.[\w-]+)*"
)
_ATTRIBUTE_TEXT = re.compile("[^\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]+")


class _Ready(NamedTuple):
    """A message that was checked and encoded, and where it goes."""

    message: Message
    sender: Sender
    destination: str
    entry: Outgoing


def _prepare(message: Message) -> _Ready:
    """Check and encode a message, with attributes of the headers that can be: the body has all.

    Nothing is sent here, so that a batch with one message that can't be sent sends none of them.
    """
    body, headers = _encode(message), message.headers
    attributes: dict[str, dict[str, str]] = {}
    for name, text in zip(map(str, headers), map(str, headers.values()), strict=True):
        fits = _ATTRIBUTE_NAME.fullmatch(name) and _ATTRIBUTE_TEXT.fullmatch(text)
        if fits and len(attributes) < _MAX_ATTRIBUTES:
            attributes[name] = {"DataType": "String", "StringValue": text}
    entry, sender = Outgoing(body, attributes, message.delay_s), _brokers.sender()
    if entry.delay_s > sender.max_delay_s:
        most = f"the queue can hold a message back for at most {sender.max_delay_s:g} s"
        raise ConfigurationError(
            f"{message.task_name}: {most}, got {entry.delay_s:g} s"
        )
    if entry.size() > sender.max_bytes:
        raise _too_large(message, entry, sender.max_bytes)
    return _Ready(message, sender, sender.destination(message.priority), entry)


def _too_large(message: Message, entry: Outgoing, limit: int) -> MessageTooLarge:
    """Return the error that names the largest argument, for that is what to look at."""
    has = f"has {entry.size()} bytes (body and attributes), and the limit is {limit}"
    text = f"{message.task_name[:200]}: the message {has}"
    if sizes := _sizes(message):
        largest = max(sizes, key=sizes.__getitem__)
        text += f": the largest argument is {largest[:200]} with {sizes[largest]} bytes"
    return MessageTooLarge(text, limit)


# What a `with batch():` block collects: a box of one list, and empty once the block has ended.
_collecting = contextvars.ContextVar[Sequence[list[_Ready]]](
    "taskhawk batch", default=()
)


@contextlib.contextmanager
def batch() -> Iterator[None]:
    """Collect dispatches, and send them ten to a request when the block ends.

    For a loop that dispatches, and for a function that dispatches in many places::

        with taskhawk.batch():
            for user in users:
                send_email.dispatch(user.email, 'Hello!')

    An exception inside sends nothing. A block inside another joins it. What a thread dispatches is
    sent directly, unless it runs in this context; so is what a task dispatches after the end.

    :raises PartialFailure: on exit, with exactly the messages that were not accepted
    """
    if _collecting.get():
        yield
        return
    # A task or thread that was started inside may outlive the block; it finds the box empty then.
    box: list[list[_Ready]] = [[]]
    token = _collecting.set(box)
    try:
        yield
    finally:
        _collecting.reset(token)
        with _brokers.lock:
            collected = box.pop()
    _publish_all(collected)


def _collect(readies: Sequence[_Ready]) -> Sequence[_Ready]:
    """Add messages to the batch around this call, and return those that it did not take."""
    with _brokers.lock:
        if box := _collecting.get():
            box[0].extend(readies)
            return ()
    return readies


def publish(message: Message) -> str:
    """Send a message, or add it to the :func:`batch` around this call.

    For messages that could not be sent: ``for message in failure.unsent: publish(message)``.

    :param message: from :meth:`Message.new`; its ``delay_s`` is how long the queue holds it back
    :returns: the message's id
    :raises Exception: as :meth:`AsyncInvocation.dispatch`
    """
    for ready in _collect([_prepare(message)]):
        _publish_one(ready)
    return message.id


def _publish_one(ready: _Ready) -> None:
    """Send one message, or raise why it was not accepted."""
    try:
        _accepted(ready.sender.send(ready.destination, [ready.entry]))
    except MessageTooLarge as error:  # the queue's limit is below the service's
        raise _too_large(ready.message, ready.entry, error.limit) from error
    _log.debug("Sent message", extra={"message_body": ready.entry.body})


def _publish_all(readies: Sequence[_Ready]) -> None:
    """Send messages of any priorities; raise PartialFailure if some are not accepted."""
    if settings.TASKHAWK_SYNC:
        for ready in readies:
            _publish_one(ready)
        return
    refused: dict[int, Refusal] = {}  # by the id() of what is ready
    for destination in dict.fromkeys(ready.destination for ready in readies):
        mine = [ready for ready in readies if ready.destination == destination]
        found = _send_all(mine[0].sender, destination, [ready.entry for ready in mine])
        refused |= {id(mine[index]): refusal for index, refusal in found.items()}
    if refused:
        sent = [
            {"Id": ready.message.id} for ready in readies if id(ready) not in refused
        ]
        lost = [(r, refused[id(r)]) for r in readies if id(r) in refused]
        failed = [
            {"Id": r.message.id, "Code": why.code, "Message": why.text}
            for r, why in lost
        ]
        for ready, _ in lost:  # its arguments may have changed since they were encoded
            vars(ready.message)["_data"] = json.loads(ready.entry.body)
        unsent = [ready.message for ready, _ in lost]
        raise PartialFailure({"Successful": sent, "Failed": failed}, unsent=unsent)


class Captured(NamedTuple):
    """A dispatch that :func:`capture` collected; arguments are as the worker would get them.

    So a tuple has become a list, a Decimal a number, and the key of a dict a string.
    """

    task: str
    args: list[Any]
    kwargs: dict[str, Any]
    headers: dict[str, Any]
    priority: Priority
    delay_s: float
    id: str


class _Capture(list[Captured], Sender):
    """Keeps what it is to send, and needs no setting; the limits are those of SQS."""

    max_bytes, max_delay_s = _MAX_SQS_BYTES, _MAX_DELAY_S

    def destination(self, priority: Priority) -> str:
        return priority.name

    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        """Keep the messages as the worker would get them."""
        for entry in entries:
            message = _decode(entry.body)
            call = (message.task_name, message.args, message.kwargs, message.headers)
            self.append(Captured(*call, message.priority, entry.delay_s, message.id))
        return []


@contextlib.contextmanager
def capture() -> Iterator[list[Captured]]:
    """Collect what this process dispatches instead of sending it, for tests.

    Arguments are bound, checked and encoded as for real, so what can't be sent raises here too. No
    setting is needed, and nothing runs.

    :returns: a context manager; its list grows with each dispatch
    """
    before, calls = _brokers.captured_by, _Capture()  # type: ignore[abstract]
    _brokers.captured_by = calls
    try:
        yield calls
    finally:
        _brokers.captured_by = before


# === PART IV: WORK ====================================================================

__all__ += [
    "Fate",
    "Ledger",
    "Outcome",
    "Worker",
    "listen_for_messages",
    "process",
    "process_messages_for_lambda_consumer",
]


# --- 13. processing -------------------------------------------------------------------
# process() is the ONE place that decides what becomes of a message. It does no queue I/O: worker
# and Lambda apply its Outcome. Nothing makes it raise but KeyboardInterrupt. How a run ended is one
# log record (of messages that are not valid, one in ten seconds for each kind of error), and an
# error hook that fails does not change what was decided.


class Fate(enum.Enum):
    """What is to become of a message; a worker does it.

    In Lambda, all but the first is a failure, and Lambda decides.
    """

    acknowledge = "acknowledge"  # it is done with: delete it
    retry = "retry"  # make it visible again
    dead_letter = "dead_letter"  # copy it to the dead-letter queue, then delete it


class Outcome(NamedTuple):
    """How a run ended: what becomes of the message, and the error if the run failed.

    `delay_s` is in how many seconds it is to run again; None leaves that to the lease in force, at
    whose end the queue shows the message by itself.
    """

    fate: Fate
    error: BaseException | None = None
    delay_s: float | None = None


def process(received: QueueMessage) -> Outcome:
    """Run a received message through hooks, decoder and task, and decide what becomes of it.

    Nothing is deleted or changed on the queue: that is for the caller to do, after the Outcome. The
    same function runs in a worker, in its child processes and in Lambda.

    :param received: from any source; its ``message`` is set once it is known to be valid
    :returns: what to do with it, the error if the run failed, and when to run it again
    :raises KeyboardInterrupt: and nothing else, even if the task or a hook calls ``sys.exit()``
    """
    began = time.monotonic()
    try:
        _run(received, began)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit and CancelledError too are failed runs
        return _failed(received, error, began)
    finally:
        # After a failed run too, for the connection may be why it failed.
        _recycle_django_connections()
    return Outcome(Fate.acknowledge)


def _run(received: QueueMessage, began: float) -> None:
    """Run the hooks and the task; what they raise goes on, but for a task's IgnoreException."""
    if hook := settings.TASKHAWK_PRE_PROCESS_HOOK:
        hook(**received.hook_kwargs)
    message = _decode(received.body)
    message.received, task = received, message.task
    received.message = message  # from here on, an error is the task's
    _log.debug("Received message", extra={"message_body": received.body})
    level, outcome = logging.DEBUG, "done"
    try:
        task.call(message, received.receipt_handle)
    except IgnoreException:
        level, outcome = logging.INFO, "ignored"
    if hook := settings.TASKHAWK_POST_PROCESS_HOOK:
        hook(**received.hook_kwargs)
    if _log.isEnabledFor(level):
        facts = _facts(received, outcome, began)
        _log.log(level, "%s %s: %s", task.name, message.id, outcome, extra=facts)


def _facts(received: QueueMessage, outcome: str, began: float) -> dict[str, Any]:
    """Return what the one record of a run says besides its text."""
    facts = {
        "outcome": outcome,
        "duration_ms": round((time.monotonic() - began) * 1000),
    }
    if message := received.message:
        facts |= {
            "task": message.task_name,
            "id": message.id,
            "attempt": received.attempt,
        }
    return facts


_INVALID_EVERY_S = (
    10  # for each kind of error: a poisoned queue must not fill the disk with logs
)
_last_invalid: dict[
    type, tuple[float, int]
] = {}  # when one was logged, how many were not


def _failed(received: QueueMessage, raised: BaseException, began: float) -> Outcome:
    """Decide what becomes of a failed run's message, log it, and tell the hook of an error."""
    outcome = _verdict(received, raised)
    message, error, attempt = received.message, outcome.error, received.attempt
    facts = _facts(received, outcome.fate.value, began)
    what = (
        f"{message.task_name} {message.id}"
        if message
        else f"message {received.message_id}"
    )
    what = re.sub(r"[^ -~]", "?", what)[
        :200
    ]  # ids are free text: one line, and not a long one
    then = "is left to the queue" if outcome.fate is Fate.retry else "is given up"
    if outcome.delay_s is not None:
        then = f"runs again in {outcome.delay_s:g} s"
    level, trace, text = (
        logging.ERROR,
        error,
        f"{what}: attempt {attempt} failed and {then}",
    )
    if message is None and isinstance(error, ValidationError):
        (last, more), now = (
            _last_invalid.get(type(error), (-math.inf, 0)),
            time.monotonic(),
        )
        if now - last < _INVALID_EVERY_S:
            _last_invalid[type(error)] = last, more + 1
            return outcome
        _last_invalid[type(error)] = now, 0
        others = f" ({more} more like it since the last record)" if more else ""
        trace, text = None, f"{what} {then}: {_text_of(error)}{others}"
    elif isinstance(error, RetryException) and outcome.fate is Fate.retry:
        level, trace = logging.INFO, None
        text = f"{what}: attempt {attempt} asked to be retried and {then}"
    elif isinstance(error, LoggingException):
        # logging refuses an `extra` with a name of its own.
        taken = vars(logging.makeLogRecord({})).keys() | {"message", "asctime"}
        given = error.extra if isinstance(error.extra, Mapping) else {}
        facts |= {f"extra_{k}" if k in taken else str(k): v for k, v in given.items()}
        text = _text_of(error)
    _log.log(level, "%s", text, exc_info=trace, extra=facts)
    if level == logging.ERROR:
        _call_safely("TASKHAWK_ERROR_HOOK", exception=error, message=message)
    return outcome


def _verdict(received: QueueMessage, error: BaseException) -> Outcome:
    """Decide what becomes of a message whose run raised."""
    asked = error.delay_seconds if isinstance(error, RetryException) else None
    delay_s = (
        asked if _is_number(asked) and 0 <= asked < math.inf else None
    )  # a subclass may err
    # What is not valid, or unknown here, is left to the queue's redrive policy.
    # A delay that the task asks for goes before its policy, and its policy before the queue's.
    if received.message and delay_s is None:
        task = received.message.task
        again = isinstance(error, task.retry_on) and not isinstance(
            error, task.never_retry_on
        )
        if isinstance(error, StopRetry) or not (
            again or isinstance(error, RetryException)
        ):
            return Outcome(Fate.dead_letter, error)
        try:
            if task.retry is not None:
                delay_s = task.retry(received.attempt)
                text = (
                    f"{task.name}: retry: expected 0 or more seconds, got {delay_s!r}"
                )
                _require(_is_number(delay_s) and 0 <= delay_s < math.inf, text)
        except StopRetry:
            return Outcome(Fate.dead_letter, error)
        except KeyboardInterrupt:
            raise
        except BaseException as defect:  # of the policy: it must not lose the message
            return Outcome(Fate.retry, defect)
    return Outcome(
        Fate.retry, error, None if delay_s is None else min(delay_s, _MAX_HELD_S)
    )


class _SyncSender(Sender):
    """Runs messages where they are sent: through JSON, decoder and hooks; their errors raise."""

    max_bytes, max_delay_s = sys.maxsize, math.inf

    def destination(self, priority: Priority) -> str:
        """Return the queue's name, which the hooks get."""
        return (
            super().destination(priority)
            if settings.TASKHAWK_QUEUE
            else "TASKHAWK-SYNC"
        )

    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        """Run the messages, and let the first error out."""
        for body, attributes, *_ in entries:
            message_id = _decode(body).id
            record = {
                "Sns": {
                    "Message": body,
                    "MessageId": message_id,
                    "MessageAttributes": {},
                }
            }
            received = QueueMessage(body, message_id, None, {}, attributes, destination)
            received.sns_record = record if settings.IS_LAMBDA_APP else None
            _run(received, time.monotonic())
        return []


_schemes["sync"] = lambda _url: _SyncSender()  # type: ignore[abstract]


# --- 14. holdings ---------------------------------------------------------------------


_STEPS = {  # the allowed steps of a message; nothing else moves one
    "received": {"started", "released"},
    "started": {"finished"},
    "finished": {"acked", "retried", "dead_lettered", "uncertain"},
}
_ACK_WAIT_S = 0.05  # how long an acknowledgement waits for others to share its call


@dataclasses.dataclass
class Ledger:
    """How many messages a worker received, and what became of them.

    In the end, each one received is in exactly one of the others: ``acked`` was deleted after its
    run, ``retried`` is visible again now or later, ``dead_lettered`` was copied and then deleted,
    ``released`` was never started, and for ``uncertain`` nobody knows whether its delete was
    applied: it may run again.
    """

    received: int = 0
    acked: int = 0
    retried: int = 0
    dead_lettered: int = 0
    released: int = 0
    uncertain: int = 0

    @property
    def balanced(self) -> bool:
        """Whether every message that was received ended in exactly one way."""
        return bool(2 * self.received == sum(vars(self).values()))

    def __str__(self) -> str:
        """Return it as the command prints it."""
        return ", ".join(
            f"{count} {name.replace('_', '-')}" for name, count in vars(self).items()
        )


@dataclasses.dataclass(eq=False)
class _Held:
    """A message that the worker holds, from its receive to its end."""

    message: QueueMessage
    hide_s: float  # what the next change of its visibility sets: its lease, in the end its delay
    lease_until: float
    renew_at: float  # when the keeper is to extend the lease
    last_at: float  # SQS lets no lease go beyond
    state: str = "received"
    end: str = (
        ""  # what it becomes, once that is decided: it stays held until it is done
    )
    due_at: float = math.inf  # when the keeper is to do it
    tries: int = 0

    to_delete = property(lambda self: self.end in ("acked", "dead_lettered"))

    def move(self, state: str) -> None:
        """Make a step, or raise RuntimeError if _STEPS does not allow it: no message ends twice."""
        if state not in _STEPS.get(self.state, ()):
            raise RuntimeError(f"a message can't go from {self.state} to {state}")
        self.state = state


# --- 15. the keeper -------------------------------------------------------------------


_TICK_S = 0.2  # how soon a signal or a shutdown_event is seen


class _Faults:
    """Logs when something begins to fail and when it works again, and not each failure between."""

    def __init__(self) -> None:
        """Have seen no failure yet; each key is of one thread."""
        self._counts: dict[tuple[str, str], int] = {}

    def note(self, queue: str, what: str, error: object) -> int:
        """Note a failure, or none, and return how many there were one after another."""
        before = self._counts.get((queue, what), 0)
        self._counts[queue, what] = now = before + 1 if error else 0
        if now == 1:
            _log.warning("%s: can't %s, goes on trying: %s", queue, what, error)
        elif before and not now:
            _log.info("%s: can %s again; tries that failed: %d", queue, what, before)
        return now


class _Keeper:
    """The messages that a worker holds, and the one thread that changes them on the queue.

    A slot says what is to become of a message, and goes on at once; the keeper has ten of them done
    in a call. Its client tries once, so that an answer which does not come holds the leases up for
    one timeout only: what failed is due again, a little later.
    """

    def __init__(self, worker: Worker) -> None:
        """Hold nothing yet; the worker starts the thread."""
        self._worker, self.ledger = worker, Ledger()
        # Guards all that follows and the fields of what is held. Slots and pollers wait for
        # `changed`, the keeper for `due`: a thread woken for nothing costs more than the change.
        lock = threading.RLock()
        self.changed, self.due = threading.Condition(lock), threading.Condition(lock)
        self.held: list[_Held] = []
        self.waiting: list[
            _Held
        ] = []  # those of it that are to be started, the most urgent first
        self._leases = True  # until ChangeMessageVisibility is denied
        self._closed = False  # nothing will be added or finished any more
        self.gives_up_at = (
            math.inf
        )  # when it ends, once closed, whatever is not done by then
        self._looks_at = (
            0.0  # when the keeper will look for what is due, if nobody wakes it
        )
        self.thread = threading.Thread(
            target=worker.guard, args=(self._run,), daemon=True
        )

    def take(self, messages: Sequence[QueueMessage], lease_s: float) -> None:
        """Hold received messages from now on."""
        now = self._worker.clock()
        # SQS counts its 12 hours from a little before `now`.
        times = (lease_s, now + lease_s, now + lease_s / 3, now + _MAX_HELD_S - 10)
        with self.changed:
            # Held and waiting in one step: what was started without a lease could run twice.
            taken = [_Held(message, *times) for message in messages]
            self.held += taken
            self.waiting += taken
            self.waiting.sort(
                key=lambda held: self._worker.queues.index(held.message.queue or "")
            )
            self.ledger.received += len(messages)
            self.changed.notify_all()

    def has_room(self) -> bool:
        """Return whether no message waits, a slot is free, and no acknowledgements are overdue.

        Those would be a batch beyond the one whose call is under way.
        """
        ended = sum(1 for held in self.held if held.end)
        running = len(self.held) - ended
        return (
            not self.waiting
            and running < self._worker.concurrency
            and ended < 2 * _MAX_BATCH
        )

    def start_next(self) -> _Held | None:
        """Return the most urgent of the messages that wait, started, or None if there is none.

        Called with the condition held, so that no two slots get the same.
        """
        while self.waiting:
            held = self.waiting[0]
            if not self._leases or held.lease_until > self._worker.clock():
                held.move("started")
                return self.waiting.pop(0)
            # A call that hangs may have kept the keeper from seeing it.
            self._lose(held, "its lease ended while it waited")
        return None

    def decide(self, held: _Held, end: str, visible_in_s: float | None = 0) -> None:
        """Note what a message is to become; None leaves it to its visibility timeout."""
        with self.changed:
            # What was never started has no run to finish.
            if end != "released":
                held.move("finished")
            held.end, held.due_at = end, self._worker.clock()
            # The first of ten waits a little for the others; where nothing else runs, _due() does
            # not.
            if held.to_delete:
                held.due_at += _ACK_WAIT_S
            # Nothing is to be sent: it shows again by itself, or another has it by now.
            elif visible_in_s is None or held.message.lease_lost:
                self._close(held, end)
            else:
                # Out of the lease first, or an extension under way could undo the delay.
                held.hide_s, held.renew_at = visible_in_s, math.inf
            if (
                not self.waiting
            ):  # else this slot takes the next, and the pollers have no room
                self.changed.notify_all()
            if not self.waiting or held.due_at < self._looks_at:
                self.due.notify()

    def close(self, within_s: float | None = None) -> None:
        """See through all that is decided, and end the thread; what still runs is left to run.

        :param within_s: how long to wait for that; None waits until leases end, or it gives up
        """
        with self.changed:
            self._closed = True
            self.due.notify()
        self.thread.join(within_s)
        with self.changed:
            for held in [
                held for held in self.held if held.end or held in self.waiting
            ]:
                self._close(
                    held, "uncertain" if held.to_delete else held.end or "released"
                )
            self.waiting.clear()

    def _run(self) -> None:
        """Make one call after another, each for what is due of one queue."""
        while (
            not self._closed
            or self.waiting
            or any(held.end for held in list(self.held))
        ):
            with self.changed:
                now = self._worker.clock()
                kind, due = self._due(now)
                if self._closed and now >= self.gives_up_at:
                    # What ended after that, in the calling thread, has one try.
                    ended = [held for held in self.held if held.end]
                    if all(
                        held.tries or held.due_at < self.gives_up_at for held in ended
                    ):
                        return
                if not due:
                    times = (
                        time
                        for held in self.held
                        for time in (held.due_at, held.renew_at)
                    )
                    self._looks_at = min(
                        [now + _TICK_S, *(time for time in times if time > now)]
                    )
                    self.due.wait(self._looks_at - now)
                    continue
                queue, broker = due[0].message.queue or "", self._worker.broker
                batch = [held for held in due if held.message.queue == queue][
                    :_MAX_BATCH
                ]
                entries: list[Any] = [held.message.receipt_handle for held in batch]
                call: Any = broker.delete
                if kind != "delete":
                    call = broker.change_visibility
                    seconds = (
                        max(0, min(held.hide_s, held.last_at - now)) for held in batch
                    )
                    entries = list(zip(entries, seconds, strict=True))
            refused = _in_batches(functools.partial(call, queue), entries)
            with self.changed:
                for index, held in enumerate(batch):
                    self._note(kind, held, refused.get(index), now)
                if len(self.held) >= _MAX_BATCH:  # pollers may have waited for it
                    self.changed.notify_all()
            faults = [refusal for refusal in refused.values() if not refusal.final]
            self._worker.faults.note(queue, kind, faults and faults[0].text)
            if kind == "extend leases" and len(faults) < len(batch):
                self._worker.beat()

    def _due(self, now: float) -> tuple[str, list[_Held]]:
        """Return the most urgent of the changes that are due, and what it is due for.

        Leases come first, for one that ends is a message that runs twice; then deletes, whose
        leases go on until they are done; then delays and releases: without them, the message
        still shows again at the end of its lease.
        """
        while self.waiting and (self._closed or self._worker.is_over()):
            self.decide(self.waiting.pop(), "released")
        # At the end the leases bound how long deletes are tried: none is extended any more.
        leased = self.held if self._leases and not self._closed else []
        for held in [h for h in leased if h.renew_at <= now and h.last_at - now < 1]:
            self._lose(held, "it was received 12 hours ago")
        if renewals := [held for held in leased if held.renew_at <= now]:
            return "extend leases", renewals
        # What was refused is not tried before its time only because others are due.
        deletes = [
            h for h in self.held if h.to_delete and (h.due_at <= now or not h.tries)
        ]
        full = len(deletes) >= _MAX_BATCH or all(held.end for held in self.held)
        if deletes and (full or any(held.due_at <= now for held in deletes)):
            return "delete", deletes
        return "set delays", [
            h for h in self.held if h.end and not h.to_delete and h.due_at <= now
        ]

    def _note(
        self, kind: str, held: _Held, refusal: Refusal | None, now: float
    ) -> None:
        """Note the answer for a message; what the service is at fault for is tried again."""
        # `now` is when the call was made: a delete after the lease's end proves nothing.
        late = now >= held.lease_until
        again = refusal and not (refusal.final or late)
        # Slots went on while the call was under way: a run that ended has its delay come next.
        if held.state not in _STEPS or (
            kind == "extend leases" and held.renew_at == math.inf
        ):
            return
        if kind == "extend leases" and not refusal:
            held.lease_until = min(now + held.hide_s, held.last_at)
            held.renew_at = min(now + held.hide_s / 3, held.last_at - 1)
        elif kind == "extend leases" and again:
            # A dozen tries are left until the lease ends.
            held.renew_at = now + held.hide_s / 20
        elif (
            kind == "extend leases"
            and refusal
            and refusal.code.startswith("AccessDenied")
        ):
            if self._leases:  # the policies of 1.4's workers lack the permission
                text = "ChangeMessageVisibility is denied, long tasks may run twice: %s"
                _log.error(text, refusal.text)
            self._leases = False
        elif kind == "extend leases" and refusal:
            self._lose(held, refusal.text)
        elif again:
            held.tries += 1
            held.due_at = now + _jittered(min(0.1 * 2**held.tries, 5))
        else:
            lost = kind == "delete" and (refusal or late)
            if lost or refusal:
                what = (
                    "may run again" if lost else "is visible again when its lease ends"
                )
                why = refusal.text if refusal else "its lease had ended"
                _log.warning("message %s %s: %s", held.message.message_id, what, why)
            self._close(held, "uncertain" if lost else held.end)

    def _lose(self, held: _Held, why: str) -> None:
        """Note that others may have the message; one that waits is not started."""
        _log.warning("message %s may run twice: %s", held.message.message_id, why)
        held.message.lease_lost = True
        held.renew_at, held.lease_until = math.inf, -math.inf
        if held in self.waiting:
            self.waiting.remove(held)
            self.decide(held, "released")

    def _close(self, held: _Held, end: str) -> None:
        """End what is held: the ledger counts it, and nothing more is done for it."""
        held.move(end)
        self.held.remove(held)
        setattr(self.ledger, end, getattr(self.ledger, end) + 1)
        self._worker.unanswered |= self._closed and end == "uncertain"


# --- 16. the worker -------------------------------------------------------------------
# Every thread and process of this file that outlives a call. Pollers receive, slots run tasks (the
# calling thread is one of them), and one keeper alone changes messages on the queue: so an
# extension under way never undoes a delay or a delete. One lock, the keeper's, guards the messages
# held; no call to the queue is made under it. Worker.run() is the order of the shutdown.


_MAX_BACKOFF_S = 60  # between receives that fail
_FLUSH_S = 3  # of the grace, kept for acknowledgements once running tasks are given up


@contextlib.contextmanager
def _signals_to(seen: list[int]) -> Iterator[None]:
    """Note SIGTERM and SIGINT, where nobody else handles them; a second one has its default effect.

    A handler runs between any two instructions of the main thread, so ours does no more than to
    append to a list, and to put back what was there before.
    """

    def note(number: int, _frame: object) -> None:
        seen.append(number)
        restore()

    def restore() -> None:  # a signal may interrupt it, and do it all
        for number in noted:
            signal.signal(number, ours[number])

    ours: dict[int, Any]
    ours = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    in_main = threading.current_thread() is threading.main_thread()
    noted = [
        n for n, default in ours.items() if in_main and signal.getsignal(n) == default
    ]
    try:
        for number in noted:
            signal.signal(number, note)
        yield
    finally:
        restore()


def _find_lease_s(
    broker: Broker, queue: str, wanted_s: float | None
) -> tuple[float, float | None]:
    """Return how long a receive hides messages, and what to ask for: None for the queue's own."""
    if wanted_s is not None:
        return wanted_s, wanted_s
    try:
        # A timeout of 0 would show to all what was just received: then ours is asked for.
        if (lease_s := broker.info(queue).visibility_timeout_s) >= 1:
            return lease_s, None
    except Exception as error:
        if not (code := _error_code(error)).startswith(
            "AccessDenied"
        ):  # as 1.4's policies do
            raise
        _log.warning("%s: can't read its attributes: %s", queue, code)
    return _DEFAULT_LEASE_S, _DEFAULT_LEASE_S


def _are_empty(broker: Broker, queues: Sequence[str]) -> bool:
    """Return whether the queues hold nothing at all; a fault is a no, a denied look a yes."""
    try:
        return not any(any(broker.depth(queue)) for queue in queues)
    except (
        Exception
    ) as error:  # a fault is no reason to end, but what nobody may know is
        return isinstance(error, ConfigurationError)


def _beat(liveness_file: str | None) -> None:
    """Say that the worker lives: it has just polled, or extended leases."""
    try:
        if liveness_file:
            with open(liveness_file, "a"):
                os.utime(liveness_file)
    except OSError as error:
        _log.warning("can't touch the liveness file: %s", error)
    _call_safely("TASKHAWK_HEARTBEAT_HOOK")


def _dead_letter_copy(
    received: QueueMessage, error: BaseException | None, limit: int
) -> Outgoing:
    """Return the copy for the dead-letter queue, which says in ONE attribute why it is there.

    Attributes that were headers give way to it, where there are too many: the body has them.

    :param limit: of the copy in bytes, attributes included
    """
    record: dict[str, Any] = {
        "type": type(error).__name__,
        "message": _text_of(error)[:1000],
    }
    record |= {"traceback": "".join(traceback.format_exception(error))}
    record |= {
        "attempt": received.attempt,
        "worker": f"{os.uname().nodename}:{os.getpid()}",
    }
    record["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    # The body stays as it is: a hundred bytes are for the attribute's name and type.
    room = min(_MAX_ERROR_BYTES, limit - len(received.body.encode()) - 100)
    for key in (
        "traceback",
        "message",
    ):  # cut to fit: of a traceback, the end says most
        while len(text := json.dumps(record)) > room and (value := record[key]):
            cut = math.ceil(
                (len(text) - room) / 6
            )  # of 6 bytes at most is a character in JSON
            record[key] = value[cut:] if key == "traceback" else value[:-cut]
    attributes: dict[str, Any] = {}
    if len(text) <= room:
        attributes[_ERROR_ATTRIBUTE] = {"DataType": "String", "StringValue": text}
    for name, value in received.message_attributes.items():
        more = {name: value, **attributes}
        if len(more) <= _MAX_ATTRIBUTES and received.copy(more).size() <= limit:
            attributes = more
    return received.copy(attributes)


def _dead_letter(
    broker: Broker, received: QueueMessage, error: BaseException | None
) -> bool:
    """Send a copy to the dead-letter queue; return whether it is there, or log why it is not."""
    try:
        target = broker.info(received.queue or "").dead_letter_queue
        _require(target, "it has no dead-letter queue")
        copy = _dead_letter_copy(received, error, broker.max_bytes)
        _accepted(broker.send(target or "", [copy]))
    except (
        Exception
    ) as failure:  # the message is still in its queue, which may redrive it
        text = "%s: message %s can't be dead-lettered and is left to the queue: %s"
        _log.warning(text, received.queue, received.message_id, failure)
        return False
    return True


@dataclasses.dataclass(eq=False, repr=False)
class Worker:
    """Runs the messages of some queues, most urgent first, until it is stopped.

    The options are those of :func:`listen_for_messages`; time is passed in by `clock`, and `wait_s`
    is how long a poll may take. Where runs go on after `grace_s`, `on_overdue` is called with the
    ledger. `liveness_file` is touched after each poll and round of leases. One worker runs once.
    """

    broker: Broker
    queues: Sequence[str]
    num_messages: int = 1
    visibility_timeout_s: float | None = None
    loop_count: int | None = None
    shutdown_event: threading.Event | None = None
    until_empty: bool = False
    concurrency: int = 1
    max_tasks: int | None = None
    grace_s: float | None = None
    isolate: bool = False
    max_tasks_per_child: int = 100
    on_overdue: Callable[[Ledger], object] | None = None
    liveness_file: str | None = None
    clock: Callable[[], float] = time.monotonic
    wait_s: float = _LONG_POLL_S

    def __post_init__(self) -> None:
        for name in ("num_messages", "concurrency", "max_tasks", "max_tasks_per_child"):
            number = getattr(self, name)
            _require(
                number is None or number >= 1,
                f"{name}: expected 1 or more, got {number}",
            )
        lease_s = self.visibility_timeout_s
        text = (
            f"visibility_timeout_s: expected 1 to {_MAX_HELD_S} seconds, got {lease_s}"
        )
        _require(lease_s is None or 1 <= lease_s <= _MAX_HELD_S, text)
        # A poll in flight is waited out, so that it must end before the grace does.
        longest_s = math.inf if self.grace_s is None else self.grace_s - _FLUSH_S - 1
        self.wait_s = min(self.wait_s, 1 if self.until_empty else max(1, longest_s))
        self._start = _start_of_children(everything=self.isolate)
        self.beat = functools.partial(_beat, self.liveness_file)
        self.faults, self._keeper = _Faults(), _Keeper(self)
        self.unanswered = (
            False  # whether a delete was not known to be applied at the end
        )
        self._changed, self.ledger = self._keeper.changed, self._keeper.ledger
        # Guarded by the keeper's condition: pollers that have not ended, and messages started.
        self._polling, self._started = len(self.queues), 0
        self._signals: list[
            int
        ] = []  # a handler may append, but must not wait for a lock
        self._fatal: BaseException | None = None
        self._children: list[_Child] = []
        self._stop = (
            threading.Event()
        )  # ends the waits of the broker and of the pollers
        self._ended = threading.Event()  # nothing runs any more
        self.overdue = threading.Event()  # the grace is over
        self._abandoned = threading.Event()  # and something still runs

    def run(self) -> Ledger:
        """Work until stopped; the order of the shutdown is the order of these lines."""
        # Daemons, for a second signal waits for none.
        make = functools.partial(threading.Thread, target=self.guard, daemon=True)
        pollers = [make(args=(self._poll, queue)) for queue in self.queues]
        slots = [make(args=(self._work,)) for _ in range(self.concurrency - 1)]
        with _signals_to(self._signals):
            self._keeper.thread.start()
            try:
                for thread in (*pollers, *slots, make(args=(self._watch,))):
                    thread.start()
                self._work()
                while (
                    any(slot.is_alive() for slot in slots)
                    and not self._abandoned.is_set()
                ):
                    time.sleep(_TICK_S)
            finally:
                # A second signal ends at once.
                hurried = self._signals and isinstance(
                    sys.exc_info()[1], KeyboardInterrupt
                )
                with self._changed:
                    self._stop.set()
                    self._changed.notify_all()
                # Wait the polls in flight out: what an abandoned one receives, nobody runs.
                for poller in filter(threading.Thread.is_alive, pollers):
                    poller.join(0 if hurried else None)
                # Release only now, or our own poll would take it again; leases end last.
                self._keeper.close(1 if hurried else None)
                self._ended.set()
        if self._fatal:
            raise self._fatal
        level = logging.INFO if self.ledger.balanced else logging.ERROR
        _log.log(level, "worker ended: %s", self.ledger)
        return self.ledger

    def _is_told(self) -> bool:
        """Return whether the worker was told to stop, or can't go on."""
        event = self.shutdown_event
        return bool(self._signals or self._fatal or (event and event.is_set()))

    def is_over(self) -> bool:
        """Return whether nothing more is received or started."""
        return not self._polling and (self._stop.is_set() or self._is_told())

    def _wait(self, look: Callable[[], Any], until: float = math.inf) -> Any:
        """Wait until something is found, and return it; None if the worker stops or time is up."""
        with self._changed:
            while not (self._stop.is_set() or self._is_told()):
                if (found := look()) or until <= (now := self.clock()):
                    return found
                self._changed.wait(min(_TICK_S, until - now))
        return None

    def _watch(self) -> None:
        """See that the worker stops when it is told to, and what is to be done after its grace.

        Isolated runs are killed. Others can't be: their messages reappear when their leases end.
        """
        # A worker that ends by itself has no deadline: nobody waits for it with a kill.
        while not self._is_told() and not self._ended.wait(_TICK_S):
            pass
        self._stop.set()
        if self.grace_s is None or self._ended.wait(
            max(self.grace_s - _FLUSH_S, self.grace_s / 2)
        ):
            return
        flush_s = min(_FLUSH_S, self.grace_s / 2)
        self.overdue.set()
        with self._changed:
            self._keeper.gives_up_at = self.clock() + flush_s
        for child in self._children:
            child.kill()
        if not self._ended.wait(flush_s / 2):
            if (
                self.on_overdue
            ):  # it ends the process: before run() returns, and not beside it
                self._keeper.close(flush_s / 2)
                self.on_overdue(self.ledger)
            self._abandoned.set()

    def guard(self, work: Callable[..., None], *args: Any) -> None:
        """Do the work of a thread; its error ends the worker, and the caller gets it."""
        try:
            work(*args)
        except (
            BaseException
        ) as error:  # such as a KeyboardInterrupt of a task, for the caller
            self._fatal = error

    @_one_event_loop()
    def _work(self) -> None:
        """Run one message after another, in this thread or its child."""
        held = None
        child = _Child(self._start, self.max_tasks_per_child, self.overdue)
        self._children.append(child)
        try:
            while isinstance(held := self._wait(self._next), _Held):
                isolated = self._start and child.takes(held.message)
                outcome = (child.process if isolated else process)(held.message)
                if outcome is None:  # killed at the end of the grace
                    break
                self.settle(held, outcome)
        finally:
            if (
                isinstance(held, _Held) and held.state == "started"
            ):  # killed, or interrupted
                child.kill()  # before others may have the message
                self._keeper.decide(held, "retried")
            child.close()

    def _next(self) -> object:
        """Return a message to run, True if there will be none, or False as yet."""
        if self._started == self.max_tasks:
            self._stop.set()
            return True
        held = self._keeper.start_next()
        self._started += held is not None
        return held or not self._polling

    def _room(self) -> int:
        """Return how many messages to ask for: as many as can start soon."""
        left = (
            self.num_messages
            if self.max_tasks is None
            else self.max_tasks - self._started
        )
        return min(self.num_messages, left) if self._keeper.has_room() else 0

    def settle(self, held: _Held, outcome: Outcome) -> None:
        """Have done what the outcome says; a copy for the dead letters is sent here and now."""
        end = "acked" if outcome.fate is Fate.acknowledge else "retried"
        if outcome.fate is Fate.dead_letter:
            sent = _dead_letter(self.broker, held.message, outcome.error)
            end = "dead_lettered" if sent else end
        self._keeper.decide(held, end, outcome.delay_s)

    def _poll(self, queue: str) -> None:
        """Receive from a queue, in a thread of its own."""
        loops = 0
        lease: tuple[float, float | None] | None = None
        try:
            while loops != self.loop_count and (most := self._wait(self._room)):
                try:
                    if not lease:  # it may take long: look again whether to receive
                        lease = _find_lease_s(
                            self.broker, queue, self.visibility_timeout_s
                        )
                        continue
                    messages = self.broker.receive(
                        queue, most, self.wait_s, lease[1], self._stop
                    )
                except Exception as error:  # a worker goes on for ever
                    if not loops and isinstance(error, ConfigurationError):
                        raise  # but not where only a person can help
                    failures = self.faults.note(queue, "receive", repr(error))
                    pause_s = _jittered(
                        min(0.5 * 2 ** min(failures, 10), _MAX_BACKOFF_S)
                    )
                    self._wait(lambda: None, self.clock() + pause_s)
                    continue
                # At once: from here on the keeper extends the leases.
                self._keeper.take(messages, lease[0])
                self.faults.note(queue, "receive", None)
                loops += 1
                self.beat()
                if (
                    self.until_empty
                    and not messages
                    and _are_empty(self.broker, self.queues)
                ):
                    break
        finally:
            with self._changed:
                self._polling -= 1
                self._changed.notify_all()


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
) -> Ledger:
    """Run the messages of a queue, in the calling thread, until told to stop.

    SIGTERM and SIGINT stop it where the application has no handlers of its own. It stops after the
    running task, and after the poll in flight, which takes up to 20 s on SQS.

    :param priority: the queue, or several: the most urgent message runs first
    :param num_messages: how many to receive at once, up to 10: they wait for each other
    :param visibility_timeout_s: how long a received message is hidden from others, until the worker
        extends it; None takes the queue's own
    :param loop_count: end after so many receives from each queue; None goes on for ever
    :param shutdown_event: set it to stop
    :param until_empty: end once the queues have no message, in flight and delayed ones included
    :param concurrency: how many run at once: 1, in the calling thread, more in threads of their own
    :param max_tasks: end after so many runs
    :param grace_s: how long runs may go on once told to stop; then isolated ones are killed
    :param isolate: run all tasks in child processes, one a slot
    :param max_tasks_per_child: replace a child after so many runs
    :returns: what became of the messages
    :raises ConfigurationError: if a queue is missing or forbidden, or there are no credentials
    """
    options = dict(locals())  # all of these, by name
    queues = _queues_of(options.pop("priority"))
    return Worker(_brokers.broker(), queues, **options).run()


def _queues_of(priority: Priority | Iterable[Priority]) -> list[str]:
    """Return the names of queues, the most urgent first."""
    wanted = {priority} if isinstance(priority, Priority) else set(priority)
    text = f"priority: expected a taskhawk.Priority or several, got {priority!r}"
    _require(wanted and all(isinstance(each, Priority) for each in wanted), text)
    broker = _brokers.broker()
    # Once each, whatever the order and however often it was named.
    return [broker.destination(each) for each in _URGENCY if each in wanted]


# --- 17. log records ------------------------------------------------------------------


def _add_task(record: logging.LogRecord) -> bool:
    """Note in a log record the task that it was made in; a filter of handlers."""
    if task := current_task():
        for name in (
            "task",
            "id",
            "attempt",
        ):  # but what the record has of its own stays
            vars(record).setdefault(name, getattr(task, name))
    return True


def _to_line(values: Mapping[str, Any]) -> str:
    """Return an object of JSON, of a log record, whose values may be anything."""

    def plain(value: object) -> object:
        with contextlib.suppress(Exception):
            return json.loads(json.dumps(value, default=str, allow_nan=False))
        return _text_of(value)

    try:
        return json.dumps(values, default=str, allow_nan=False)
    except (
        Exception
    ):  # a key that is no text, NaN, a circle, too deep, a str() with a bug
        return json.dumps({str(key): plain(value) for key, value in values.items()})


class _LineFormatter(logging.Formatter):
    """Writes a child's log records for its worker."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a line of JSON, with text and traceback made: the arguments may not be JSON."""
        _add_task(record)
        super().format(record)  # notes the text and the traceback in the record
        text = {"msg": record.message, "args": None, "exc_info": None}
        return _to_line(vars(record) | text)


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, with what a record carries as `extra`."""

    # What every record has; all else was given to it as `extra`.
    _own = vars(logging.makeLogRecord({})).keys() | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        """Return a line of JSON; what JSON can't hold, as text."""
        super().format(record)  # notes its message, and its traceback as exc_text
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{when}.{record.msecs:03.0f}Z", "level": record.levelname}
        line |= {"logger": record.name, "message": record.message}
        line |= {"exception": record.exc_text} if record.exc_text else {}
        extra = {
            key: value for key, value in vars(record).items() if key not in self._own
        }
        return _to_line(line | extra)


# --- 18. isolation --------------------------------------------------------------------


_START_S = 60  # how long a child may take to import the tasks


def _start_of_children(*, everything: bool) -> dict[str, Any]:
    """Return what a child begins with, and {} where no task is isolated.

    :raises ConfigurationError: if a child can't import what it is to run
    """
    isolated = [task for task in _registry.values() if everything or task.isolate]
    for task in isolated:
        text = f"{task.name}: a task of __main__ can't be isolated: move it to a module"
        _require(task.fn.__module__ not in _MAINS, text)
    values = {name: getattr(settings, name) for name in _SETTINGS} if isolated else {}
    for name, hook in [
        (name, value) for name, value in values.items() if callable(value)
    ]:
        values[name] = path = f"{hook.__module__}.{getattr(hook, '__qualname__', '')}"
        # What the path leads to must be the very hook: a name may have been given to another since.
        found = None
        with contextlib.suppress(ImportError, AttributeError, ValueError):
            found = _conform(_HOOK, path)
        text = (
            f"{name}: where tasks are isolated, expected a function with a dotted path"
        )
        _require(found is hook, f"{text}, got {hook!r}")
    start = {
        "isolated": [task.name for task in isolated],
        "settings": values,
        "modules": sorted({task.fn.__module__ for task in isolated}),
        "path": [os.path.abspath(folder) for folder in sys.path],
        "environ": {k: v for k, v in os.environ.items() if k == "PYTHONPATH"},
        "level": logging.getLogger().level,
    }
    return start if isolated else {}


class _Child:
    """The process that runs a slot's isolated messages, for it may have to be killed, or crash.

    It gets JSON by a socket, a line each, and answers so: nothing is unpickled, and no setting is
    in an argument or the environment.
    """

    def __init__(
        self, start: Mapping[str, Any], max_tasks: int, given_up: threading.Event
    ) -> None:
        """Start no process yet.

        :param start: what :func:`_start_of_children` returned
        :param max_tasks: after how many runs a process is replaced
        :param given_up: set when the worker's grace is over
        """
        self._start, self._max_tasks, self._given_up = start, max_tasks, given_up
        self._left = 0  # messages until the process is replaced
        # Held to kill and to reap, so that no other process is killed under a number used again.
        self._lock = threading.Lock()
        self._process: Any = None

    def takes(self, received: QueueMessage) -> bool:
        """Return whether a message is the child's to run."""
        with contextlib.suppress(ValidationError):
            message = _decode(received.body)
            if message.task.name in self._start["isolated"]:
                received.message, message.received = message, received
        return received.message is not None

    def process(self, received: QueueMessage) -> Outcome | None:
        """Do as :func:`process` does; None if the worker's grace ended meanwhile."""
        # The limit is the parent's to keep: code that holds the GIL can't be stopped from inside.
        task, began = typing.cast("Message", received.message).task, time.monotonic()
        outcome, why = None, ""
        try:
            self._ensure_process()
            began = time.monotonic()  # the imports of a new process are not the run's
            with self._killed_after(task.time_limit):
                # Nobody would kill what begins after the end of the grace.
                outcome = None if self._given_up.is_set() else self._ask(received)
        except (
            OSError,
            ValueError,
        ) as error:  # it ended, or something else wrote to its socket
            why = str(error)
        self._left -= 1
        late = task.time_limit and time.monotonic() - began >= task.time_limit
        if not outcome or late or not self._left:
            why = self.close() or why
        if outcome or self._given_up.is_set():
            return outcome
        failure: TaskhawkError = ChildCrashed(f"{task.name}: its process ended: {why}")
        if late:
            text = (
                f"{task.name} ran longer than its time limit of {task.time_limit:g} s"
            )
            failure = TimeLimitExceeded(text)
        return _failed(received, failure, began)

    def _ask(self, received: QueueMessage) -> Outcome | None:
        """Have a message run, and return how it ended, or None if the process did."""
        self._send(
            {k: v for k, v in vars(received).items() if k not in ("broker", "message")}
        )
        if (answer := self._answer()) is None:
            return None
        fate, delay_s, *raised = answer
        error: BaseException | None = None
        if raised:  # an error of the same name, with the trace
            name, text, trace = raised
            error = type(name, (TaskhawkError,), {})(text)
            error.add_note(trace)
        return Outcome(Fate(fate), error, delay_s)

    def _answer(self) -> list[Any] | None:
        """Return the process's next answer, once the log records before it are handled."""
        while (line := self._lines.readline()).endswith(b"\n"):
            frame = json.loads(line)
            if isinstance(frame, list):
                return frame
            record = logging.makeLogRecord(frame)
            if (logger := logging.getLogger(record.name)).isEnabledFor(record.levelno):
                _log.safely(logger.handle, record)
        return None

    def _ensure_process(self) -> None:
        """Start a process, unless the last one still lives."""
        import socket
        import subprocess

        with self._lock:
            if self._process and self._process.poll() is None:
                return
        self.close()
        self._socket, theirs = socket.socketpair()
        self._lines = self._socket.makefile("rb")
        command = [
            sys.executable,
            "-m",
            __name__,
            "_child",
            str(theirs.fileno()),
            str(os.getpid()),
        ]
        # It is to find this file and the tasks where we did; tasks then see the variable as it was.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(self._start["path"])}
        options: Any = {
            "stdin": subprocess.DEVNULL,
            "start_new_session": True,
            "env": env,
        }
        with theirs:
            options["pass_fds"] = [theirs.fileno()]
            self._process = subprocess.Popen(command, **options)  # noqa: S603 - it is this file
        self._send(self._start)
        self._left = self._max_tasks
        with self._killed_after(_START_S):
            if not self._given_up.is_set():
                self._answer()  # an empty one: it has imported the tasks

    def _send(self, value: object) -> None:
        self._socket.sendall(json.dumps(value, default=str).encode() + b"\n")

    @contextlib.contextmanager
    def _killed_after(self, seconds: float | None) -> Iterator[None]:
        """Kill the process if what is inside takes longer; it never kills the next one."""
        timer = threading.Timer(seconds or 0, self.kill)
        if seconds:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if seconds:
                timer.join()

    def kill(self) -> None:
        """Kill the process and what it started, also in C code that holds the GIL."""
        with self._lock:
            if self._process and self._process.returncode is None:
                # Not reaped yet, so the number is still its own, and its group's.
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> str:
        """End the process, and say how it ended."""
        import subprocess

        if not self._process:
            return ""
        # A thread that the task left behind would keep the process for ever.
        with (
            contextlib.suppress(OSError),
            self._killed_after(5),
            self._socket,
            self._lines,
        ):
            self._socket.shutdown(1)  # for writing: it ends once it has read all
            self._lines.read()  # until it is gone
        with self._lock:
            try:
                code = self._process.wait(5)
            except subprocess.TimeoutExpired:  # its task closed our socket, and goes on
                os.killpg(self._process.pid, signal.SIGKILL)
                code = self._process.wait()
            self._process = (
                None  # under the lock too, or kill() could meet it half gone
            )
        return f"signal {-code}" if code < 0 else f"exit code {code}"


@_one_event_loop()
def _serve_worker(argv: Sequence[str]) -> int:
    """Run messages for a worker's slot: what ``python -m taskhawk _child`` does.

    :param argv: the number of the socket, and the worker's process id
    """
    number, worker = map(int, argv)
    for each in (signal.SIGINT, signal.SIGTERM):  # they are the worker's to handle
        signal.signal(each, signal.SIG_IGN)
    import ctypes

    with contextlib.suppress(AttributeError):  # only Linux has it
        ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        )  # PR_SET_PDEATHSIG: die with the slot's thread
    if os.getppid() != worker:  # it died before that
        return 1
    os.set_inheritable(number, False)  # noqa: FBT003 - what a task starts must not keep it open
    with (
        open(number, "rb", closefd=False) as lines,
        open(number, "w", closefd=False) as answers,
    ):
        start = json.loads(lines.readline())
        sys.path[:] = start["path"]
        del os.environ["PYTHONPATH"]
        os.environ.update(start["environ"])
        configure(start["settings"])
        handler: Any = logging.StreamHandler(answers)
        handler.setFormatter(_LineFormatter())
        logging.basicConfig(level=start["level"], handlers=[handler])

        def leave() -> (
            None
        ):  # what a task forks must neither answer nor keep the socket open
            os.dup2(nothing, number, inheritable=False)
            handler.stream = sys.stderr

        nothing = os.open(os.devnull, os.O_RDWR)
        os.register_at_fork(after_in_child=leave)
        for module in start["modules"]:
            importlib.import_module(module)
        broker = _brokers.broker() if settings.TASKHAWK_BROKER != "sqlite://" else None
        answer: list[Any] = []  # the first says that we are ready
        while True:
            with handler.lock:  # any thread writes log records
                print(json.dumps(answer), file=answers, flush=True)
            if not (line := lines.readline()):
                return 0
            outcome = process(QueueMessage(**json.loads(line), broker=broker))
            answer = [outcome.fate.value, outcome.delay_s]
            if error := outcome.error:
                trace = "".join(traceback.format_exception(error))
                answer += [type(error).__name__, _text_of(error), trace]


_programs["_child"] = _serve_worker


# --- 19. Lambda -----------------------------------------------------------------------
# The same process() as in the worker; Lambda receives, and deletes what the handler returns without
# an error for. So a failure always raises, or is in the answer; and nothing is deleted here that
# did not succeed.


def process_messages_for_lambda_consumer(
    lambda_event: Mapping[str, Any], *, context: Any = None, partial_batch: bool = False
) -> dict[str, list[dict[str, str]]] | None:
    """Run the messages of an SNS or SQS event; one that fails does not stop the others.

    Where some of an SQS event failed, the others are deleted before the error is raised: that is
    safe with and without ReportBatchItemFailures on the event source mapping.

    :param lambda_event: as Lambda gives it to the handler
    :param context: Lambda's; with it, nothing is started in the last tenth of the time
    :param partial_batch: return the failures of an SQS event instead of raising them: only with
        ReportBatchItemFailures
        (https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-errorhandling.html)
    :returns: None, or with `partial_batch` what Lambda wants to know: ``{"batchItemFailures":
        [...]}``
    :raises ValidationError: if the event has no records; a record that is malformed is a failed run
        with this error
    :raises Exception: the failed run's, or an ExceptionGroup of several
    """
    records = lambda_event.get("Records") if isinstance(lambda_event, Mapping) else None
    if not isinstance(records, list):
        raise ValidationError(
            "Records: expected an array of SNS or SQS records, got none"
        )
    # A tenth is for what follows the last run: the deletes, and the answer.
    left_ms = context.get_remaining_time_in_millis if context else lambda: math.inf
    reserve_ms = left_ms() / 10 if context else 0
    done: list[QueueMessage] = []
    failed: dict[QueueMessage, Outcome] = {}
    # One after another: a FIFO queue's order is that of the records.
    for received in map(_from_record, records):
        why = "no time was left" if left_ms() <= reserve_ms else ""
        if received.is_fifo and received.group_id in {
            other.group_id for other in failed
        }:
            why = "an earlier one of its group failed"
        if why:
            text = f"message {received.message_id} was not started: {why}"
            failed[received] = Outcome(Fate.retry, TaskhawkError(text))
        elif (outcome := process(received)).fate is Fate.acknowledge:
            done.append(received)
        else:
            failed[received] = outcome
    asked = {
        received: o.delay_s for received, o in failed.items() if o.delay_s is not None
    }
    # 20 minutes less than SQS takes: the function's time and the batching window have passed.
    delays = {
        r: (r.receipt_handle, min(s, _MAX_HELD_S - 1200)) for r, s in asked.items()
    }
    text = "can't change when %d of %d failed messages run again: %s"
    _change_all("change_visibility", delays, text)
    if partial_batch and all(received.sns_record is None for received in failed):
        return {"batchItemFailures": [{"itemIdentifier": r.message_id} for r in failed]}
    if failed:
        text = "%d of %d messages that succeeded may run again: can't delete them: %s"
        _change_all(
            "delete", {received: received.receipt_handle for received in done}, text
        )
        errors: list[Any] = [outcome.error for outcome in failed.values()]
        raise (
            errors[0]
            if len(errors) == 1
            else BaseExceptionGroup("several runs failed", errors)
        )
    return None


def _from_record(record: Any) -> QueueMessage:
    """Read a record of either kind; one that is malformed is an invalid message."""
    given = record if isinstance(record, Mapping) else {}
    sns_record = given if "Sns" in given else None
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        if sns_record:
            sns = record["Sns"]
            return QueueMessage(
                sns["Message"], str(sns.get("MessageId")), sns_record=record
            )
        message_attributes = {
            name: {
                kind[:1].upper() + kind[1:]: content for kind, content in value.items()
            }
            for name, value in record.get("messageAttributes", {}).items()
        }
        attributes = record.get("attributes", {})
        int(
            attributes.get("ApproximateReceiveCount", 1)
        )  # fail here rather than in the run
        parts = (record["body"], record["messageId"], record.get("receiptHandle"))
        received = QueueMessage(*parts, attributes, message_attributes)
        broker, arn = _brokers.broker(), record.get("eventSourceARN")
        if isinstance(broker, SqsBroker) and arn is not None:
            received.queue, received.broker = broker.queue_of_arn(arn), broker
        return received
    return QueueMessage(None, str(given.get("messageId", "")), sns_record=sns_record)


# === PART V: STATE ====================================================================
# There is no room here yet: nothing is remembered between two messages, so the file cut
# before this part and the file cut after it do the same.


# === PART VI: PEOPLE ==================================================================

__all__ += [
    "main",
    "requeue_dead_letter",
]


# --- 20. dead letters -----------------------------------------------------------------
# For people: nothing in production depends on it. Nothing is deleted before its copy is confirmed,
# so that a crash or a fault in between leaves a message twice, and never not at all. What is looked
# at is hidden from others for as long, and shown again at the end.


@dataclasses.dataclass
class _DeadLetters:
    """The dead letters of a queue, each looked at once; those that stay are visible again after.

    :param wanted: tells by its description whether a message is meant
    :param lease_s: how long others can't see what was received; None takes the queue's own
    """

    priority: Priority
    num_messages: int = _MAX_BATCH
    lease_s: float | None = 600
    limit: int = sys.maxsize
    wanted: Callable[[Mapping[str, Any]], bool] = lambda _: True

    def __post_init__(self) -> None:
        """Find the queue and its dead-letter queue; nothing is received yet."""
        text = f"num_messages: expected 1 or more, got {self.num_messages}"
        _require(self.num_messages >= 1, text)
        self._broker = _brokers.broker()
        self._queue = self._broker.destination(self.priority)
        self._source = self._broker.info(self._queue).dead_letter_queue or ""
        _require(
            self._source,
            f"{self._queue}: it has no dead-letter queue (no RedrivePolicy)",
        )

    def each(
        self, doing: str, done: str, act: Callable[[list[QueueMessage]], Any]
    ) -> int:
        """Do something to those that are wanted, and return to how many.

        Ends after as many as there were at the start, so that what comes back is not met again.

        :param act: returns what went wrong, by message; None where all of them stay
        """
        # What comes while this runs is for the next time: it may be what was just sent back.
        total = self._broker.depth(self._source).visible
        _log.info("%s about %d messages from %s", doing, total, self._source)
        seen: dict[
            str, QueueMessage | None
        ] = {}  # by their ids; None where it does not stay
        good: list[dict[str, str]] = []
        bad: list[dict[str, str]] = []
        try:
            while len(seen) < max(total, 1) and len(good) + len(bad) < self.limit:
                most = min(self.num_messages, _MAX_BATCH, max(1, total - len(seen)))
                found = self._broker.receive(
                    self._source, most, 1, self.lease_s, threading.Event()
                )
                # One that comes back, because its lease ended meanwhile, was looked at already.
                new = {m.message_id: m for m in found if m.message_id not in seen}
                if not new:
                    break
                seen |= new
                mine = [m for m in new.values() if self.wanted(_describe(m))]
                mine = mine[: self.limit - len(good) - len(bad)]
                errors = act(mine)
                for m in mine:
                    error = (errors or {}).get(m, "")
                    (bad if error else good).append({"Id": m.message_id, "Code": error})
                    seen[m.message_id] = m if errors is None or error else None
                for m in new.values():  # a thousand of a megabyte may follow
                    m.body, m.message_attributes = "", {}
                _log.info(
                    "%s %d of %d messages, %d failed", done, len(good), total, len(bad)
                )
        except BaseException:
            _log.info("stopped: up to %d more messages may be %s too", _MAX_BATCH, done)
            raise
        finally:
            stay = {m: (m.receipt_handle, 0) for m in seen.values() if m}
            text = "%d of %d dead letters that were looked at can't be seen for a while: %s"
            _change_all("change_visibility", stay, text)
        if bad:
            raise PartialFailure({"Successful": good, "Failed": bad})
        return len(good)

    def requeue(self, messages: Sequence[QueueMessage]) -> dict[QueueMessage, str]:
        """Send copies to the queue, delete those whose copy is confirmed, say what went wrong.

        After a crash in between, a message is in both queues: it runs again, and is not lost.
        """
        copies = []
        for message in messages:
            kept = {
                n: v
                for n, v in message.message_attributes.items()
                if n != _ERROR_ATTRIBUTE
            }
            copies.append(message.copy(kept))
        refused = _send_all(self._broker, self._queue, copies)
        errors = self._errors(messages, refused)
        deleted = self.delete(
            [message for message in messages if message not in errors]
        )
        return errors | {
            m: f"copied, but not deleted: {error}" for m, error in deleted.items()
        }

    def delete(self, messages: Sequence[QueueMessage]) -> dict[QueueMessage, str]:
        """Delete messages, and say what went wrong."""
        receipts = [message.receipt_handle or "" for message in messages]
        refused = _in_batches(
            functools.partial(self._broker.delete, self._source), receipts, 3
        )
        return self._errors(messages, refused)

    def _errors(
        self, messages: Sequence[QueueMessage], refused: Mapping[int, Refusal]
    ) -> dict[QueueMessage, str]:
        """Return what went wrong, by message; the first is logged in full, with its remedy."""
        for refusal in [*refused.values()][:1]:
            _log.warning("%s: %s", refusal.code, refusal.text)
        return {messages[index]: refusal.code for index, refusal in refused.items()}


def _describe(received: QueueMessage) -> dict[str, Any]:
    """Describe a dead letter for people: what it is, since when, and why it is there."""
    sent_s = int(received.attributes.get("SentTimestamp", 0)) / 1000
    sent = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(sent_s))
    about: dict[str, Any] = {
        "id": None,
        "message_id": received.message_id,
        "task": None,
    }
    about |= {"headers": {}, "sent": sent, "age_s": max(0, round(time.time() - sent_s))}
    about |= {"receives": received.attempt, "error": None, "invalid": None}
    try:
        # Neither body nor error need be what we wrote: a dead letter may come from anywhere.
        about |= _decode(received.body).as_dict()
        del about["metadata"]
    except ValidationError as error:
        about["invalid"] = str(error)
    record = received.message_attributes.get(_ERROR_ATTRIBUTE, {}).get(
        "StringValue", ""
    )
    with contextlib.suppress(ValueError, RecursionError):
        noted = _DECODER.decode(record)
        about["error"] = noted if isinstance(noted, dict) else None
    return about


def requeue_dead_letter(
    priority: Priority, num_messages: int = 10, visibility_timeout: float | None = None
) -> int:
    """Send the dead letters of a queue back to it, and delete each once its copy is confirmed.

    Ends after as many messages as there were at the start, so that what fails again is not sent in
    circles, or when a receive comes back empty.

    :param priority: says which queue; its dead-letter queue is the one that its redrive policy
        names
    :param num_messages: how many to receive at once, up to 10
    :param visibility_timeout: seconds that a copied message is hidden; None takes the queue's own
    :returns: how many were sent back; 0, with a warning, where IS_LAMBDA_APP is set
    :raises ConfigurationError: if the queue has no dead-letter queue
    :raises PartialFailure: if some were not; they are still among the dead letters
    """
    if settings.IS_LAMBDA_APP:
        text = "not supported for Lambda apps, whose queues are Lambda's"
        _log.warning("requeue_dead_letter: %s", text)
        return 0
    letters = _DeadLetters(priority, num_messages, visibility_timeout)
    return letters.each("requeueing", "requeued", letters.requeue)


# --- 21. infrastructure ---------------------------------------------------------------


def _if_there(call: Callable[..., Any], *args: Any, or_denied: str = "") -> Any:
    """Return what a call does; None where there is no such queue or topic, or it is denied."""
    try:
        return call(*args)
    except ConfigurationError as error:
        absent = f"NonExistentQueue|QueueDoesNotExist|NotFound{or_denied}"
        if not re.fullmatch(absent, _error_code(error)):
            raise
        return None


def _depths() -> dict[str, dict[str, int | None] | None]:
    """Count the messages of each priority, most urgent first; None where none may be seen."""
    broker, found = _brokers.broker(), {}
    look = functools.partial(_if_there, broker.depth, or_denied="|AccessDenied.*")
    for priority in _URGENCY:
        queue = broker.destination(priority)
        depth = look(queue)
        dead = broker.info(queue).dead_letter_queue if depth else None
        letters = look(dead) if dead else None
        counts = {"dead_letters": sum(letters) if letters else None}
        found[priority.name] = {**depth._asdict(), **counts} if depth else None
    for priority in [] if any(found.values()) else _URGENCY:
        _if_there(
            broker.depth, broker.destination(priority)
        )  # raises, if all is denied
    return found


def _depth_lines(
    depths: Mapping[str, Any], before: Mapping[str, Any], seconds: float, *, bars: bool
) -> Iterator[str]:
    """Draw what :func:`_depths` found; with what it found some seconds before, also the trend."""
    yield f"{'':10}{'visible':>10}{'in flight':>11}{'delayed':>9}{'dead letters':>14}"
    queued = {
        name: [d[kind] for kind in Depth._fields] for name, d in depths.items() if d
    }
    # A mark for each message, as long as no queue has more than 30; then shares of 30.
    scale = 30 / max([30, *map(sum, queued.values())])
    for name, counts in depths.items():
        if counts is None:
            yield f"{name:10}{'no queue or access':>20}"
            continue
        visible, in_flight, delayed, dead = counts.values()
        shown = f"{'none/denied' if dead is None else dead:>14}"
        if dead and bars and not os.environ.get("NO_COLOR"):
            shown = f"\x1b[31m{shown}\x1b[0m"
        line = f"{name:10}{visible:>10}{in_flight:>11}{delayed:>9}{shown}"
        if seconds and (was := before.get(name)):
            rate = (
                sum(queued[name]) - sum(was[kind] for kind in Depth._fields)
            ) / seconds
            line += f"{rate:>+10.1f}/s"
        drawn = [
            mark * math.ceil(n * scale)
            for mark, n in zip("█▓░", queued[name], strict=True)
        ]
        yield line + ("  " + "".join(drawn)) * bars


_PROVISION = "python -m taskhawk provision"  # what mends most of what is wrong
_Resource = tuple[
    str, str, dict[str, Any]
]  # Terraform's type, the name, Terraform's attributes
_SEND = "sqs:SendMessage sqs:GetQueueUrl"
_RECEIVE = "sqs:ReceiveMessage sqs:DeleteMessage sqs:ChangeMessageVisibility sqs:GetQueueAttributes"
_GRANTS = [  # the least that each role needs, on topics, queues and dead-letter queues
    ("publisher", "aws_sns_topic", "sns:Publish"),
    ("publisher", "aws_sqs_queue", _SEND),
    ("worker", "aws_sqs_queue", f"{_RECEIVE} sqs:GetQueueUrl"),
    ("worker", "DLQ", _SEND),
    # No sqs:GetQueueUrl: the URL is put together from the event's ARN.
    ("lambda", "aws_sqs_queue", _RECEIVE),
    ("operator", "aws_sns_topic", "sns:ListSubscriptionsByTopic"),
    ("operator", "aws_sqs_queue", f"{_SEND} sqs:GetQueueAttributes"),
    ("operator", "DLQ", f"{_RECEIVE} sqs:GetQueueUrl"),
]


def _resources(
    priority: Priority, most: int, function: str | None
) -> Iterator[_Resource]:
    """Describe what messages of a priority need, in an order in which it can be made."""
    service = settings.require("TASKHAWK_QUEUE")
    valid = 1 <= most <= 1000  # noqa: PLR2004 - what SQS takes
    _require(valid, f"--max-receive-count: expected 1 to 1000, got {most}")
    _require(
        settings.IS_LAMBDA_APP or not function,
        "--lambda: expected IS_LAMBDA_APP to be set",
    )
    tags = {"taskhawk": service}
    topic = f"taskhawk-{service.lower()}{_SUFFIXES[priority]}"
    name = topic if settings.IS_LAMBDA_APP else _brokers.broker().destination(priority)
    label = name.lower().replace("-", "_")
    if settings.IS_LAMBDA_APP:
        yield "aws_sns_topic", name, {"name": name, "tags": tags}
        if function:
            to = {"topic_arn": f"${{aws_sns_topic.{label}.arn}}", "protocol": "lambda"}
            yield "aws_sns_topic_subscription", name, {**to, "endpoint": function}
        return
    # SQS counts the retention from the first sending, so that of dead letters is longer. Where no
    # size is given, Terraform sets 256 KiB.
    both = {"max_message_size": _MAX_SQS_BYTES, "tags": tags}
    dead = {"message_retention_seconds": 14 * 86_400, **both}
    yield "aws_sqs_queue", f"{name}-DLQ", {"name": f"{name}-DLQ", **dead}
    redrive = {
        "deadLetterTargetArn": f"${{aws_sqs_queue.{label}_dlq.arn}}",
        "maxReceiveCount": most,
    }
    kept = {
        "message_retention_seconds": 4 * 86_400,
        "redrive_policy": json.dumps(redrive),
    }
    yield "aws_sqs_queue", name, {"name": name, **kept, **both}


def _terraform(resources: Iterable[_Resource]) -> dict[str, Any]:
    """Write resources in Terraform's JSON syntax."""
    made: dict[str, dict[str, Any]] = {}
    for kind, name, wanted in resources:
        label = name.lower().replace("-", "_")
        made.setdefault(kind, {})[label] = wanted
        if function := wanted.get("endpoint"):
            # Besides its subscription: the function's own policy must let SNS call it.
            allowed = {
                "action": "lambda:InvokeFunction",
                "principal": "sns.amazonaws.com",
            }
            allowed |= {"function_name": function, "source_arn": wanted["topic_arn"]}
            made.setdefault("aws_lambda_permission", {})[label] = allowed
    return {"resource": made}


def _provide(kind: str, name: str, wanted: Mapping[str, Any], *, dry_run: bool) -> str:
    """Make what is missing and raise what is too low; say what was done, or would be."""
    sender = _brokers.get(kind.split("_")[1])  # "sqs" or "sns"
    find = _queue_change if kind == "aws_sqs_queue" else _topic_change
    told, call, options = find(sender, name, sender.arn(name), wanted)
    if told and not dry_run:
        with _explained(name):
            getattr(sender.client("send"), call)(**options)
    would_be = "would be " if told and dry_run else ""
    return f"{kind.rpartition('_')[2]} {name}: {would_be}{told or 'is as it should be'}"


def _queue_change(
    sqs: SqsBroker, name: str, arn: str, wanted: Any
) -> tuple[str, str, Any]:
    """Say what a queue lacks, and return the call for it; what is higher by hand stays."""
    found = _if_there(sqs.attributes, name, ["All"]) or {}
    numbers = {"MessageRetentionPeriod": wanted["message_retention_seconds"]}
    numbers |= {"MaximumMessageSize": wanted["max_message_size"]}
    changes = {key: str(n) for key, n in numbers.items() if int(found.get(key, 0)) < n}
    ours = json.loads(wanted.get("redrive_policy", "{}"))
    theirs: dict[str, Any] = {"deadLetterTargetArn": f"{arn}-DLQ", "maxReceiveCount": 0}
    theirs |= json.loads(found.get("RedrivePolicy") or "{}")
    # What someone set higher has its reason; a lower one would cost messages.
    if int(theirs["maxReceiveCount"]) < (most := ours.get("maxReceiveCount", 0)):
        changes["RedrivePolicy"] = json.dumps({**theirs, "maxReceiveCount": most})
    if not found:
        options = {"QueueName": name, "Attributes": changes, "tags": wanted["tags"]}
        return "made", "create_queue", options
    told = ", ".join(
        f"{key} from {found.get(key, 'none')} to {changes[key]}" for key in changes
    )
    options = {"QueueUrl": sqs.url(name), "Attributes": changes}
    return told and f"changed: {told}", "set_queue_attributes", options


def _topic_change(
    sns: SnsSender, name: str, arn: str, wanted: Any
) -> tuple[str, str, Any]:
    """Say whether a topic or a subscription to it is missing, and return the call for it."""
    lists = sns.client("send").get_paginator("list_subscriptions_by_topic")
    found = _if_there(_explained(name)(lists.paginate(TopicArn=arn).build_full_result))
    if function := wanted.get("endpoint"):
        there = found and function in [
            each["Endpoint"] for each in found["Subscriptions"]
        ]
        options = {"TopicArn": arn, "Protocol": "lambda", "Endpoint": function}
        return "" if there else f"made for {function}", "subscribe", options
    tags = [{"Key": key, "Value": value} for key, value in wanted["tags"].items()]
    return "made" if found is None else "", "create_topic", {"Name": name, "Tags": tags}


def _iam(resources: Iterable[_Resource]) -> dict[str, Any]:
    """Write the least policies, by role."""
    arns: dict[str, list[str]] = {}
    for kind, name, _ in resources:
        arn = _brokers.get(kind.split("_")[1]).arn(name)
        arns.setdefault("DLQ" if name.endswith("-DLQ") else kind, []).append(arn)
    policies: dict[str, Any] = {}
    for role, kind, actions in _GRANTS:
        if kind in arns:
            policy = policies.setdefault(
                role, {"Version": "2012-10-17", "Statement": []}
            )
            grant = {
                "Effect": "Allow",
                "Action": actions.split(),
                "Resource": arns[kind],
            }
            policy["Statement"].append(grant)
    return policies


class _Finding(NamedTuple):
    """What :func:`_check` found: an error loses messages or time, a warning may."""

    severity: str
    what: str
    why: str
    remedy: str = _PROVISION


def _check(priorities: Iterable[Priority]) -> Iterator[_Finding]:
    """Look for what is wrong with settings, queues and tasks."""
    for name in sorted(name for name, found in _registry.items() if name == found.name):
        if name.startswith("__main__."):
            why = "a worker can't find it under that name"
            yield _Finding(
                "error", f"task {name} is of __main__", why, "move it to a module"
            )
    try:
        if settings.TASKHAWK_BROKER == "sqs" and settings.TASKHAWK_QUEUE is None:
            why = "no queue can be named; without AWS, try TASKHAWK_BROKER=sqlite:///queue.db"
            remedy = "export TASKHAWK_QUEUE=dev-myapp"
            yield _Finding("error", "TASKHAWK_QUEUE is not set", why, remedy)
            return
        topics = settings.IS_LAMBDA_APP and settings.TASKHAWK_BROKER == "sqs"
    except ConfigurationError as error:
        yield _Finding(
            "error", str(error), "nothing can be sent or received", "as it says"
        )
        return
    for priority in priorities:
        try:
            yield from (_check_topic if topics else _check_queue)(priority)
        except Exception as error:
            remedy = "check credentials, AWS_REGION, AWS_ENDPOINT_SQS and the network"
            remedy = "as it says" if isinstance(error, ConfigurationError) else remedy
            yield _Finding(
                "error", _text_of(error), "no more can be seen of it", remedy
            )
            if not re.match("AccessDenied|AuthorizationError", _error_code(error)):
                return  # the others would say the same


def _check_topic(priority: Priority) -> Iterator[_Finding]:
    sender = _brokers.get("sns")
    topic = sender.destination(priority)
    found = _if_there(sender.call, "send", "list_subscriptions_by_topic", topic)
    if found is None:
        yield _Finding("error", f"{topic}: no such topic", "dispatch raises")
    elif not found["Subscriptions"]:
        remedy = f"{_PROVISION} --lambda ARN"
        yield _Finding(
            "error", f"{topic}: nobody subscribes", "what is sent is lost", remedy
        )


def _check_queue(priority: Priority) -> Iterator[_Finding]:
    """Look at one queue, and at the tasks whose messages it has."""
    broker = _brokers.broker()
    queue = broker.destination(priority)
    info = _if_there(broker.info, queue)
    if info is None:
        yield _Finding("error", f"{queue}: no such queue", "dispatch raises")
        return
    lease_s, dead, most = info
    aws = isinstance(broker, SqsBroker)
    timeout = "VisibilityTimeout" if aws else "visibility_timeout_s in TASKHAWK_BROKER"
    more = (
        f"{_PROVISION} --max-receive-count "
        if aws
        else "in TASKHAWK_BROKER, max_receive_count="
    )
    for found in [
        task for _, task in sorted(_registry.items()) if task.priority is priority
    ]:
        limit, retries = found.time_limit, getattr(found.retry, "max_retries", None)
        if limit and limit > lease_s:
            what = f"{queue}: its visibility timeout of {lease_s:g} s is below {found.name}'s limit"
            why = "after a worker that can't extend it, or in Lambda, the task runs twice at once"
            remedy = f"set {timeout} above {limit:g} s"
            yield _Finding("warning", f"{what} of {limit:g} s", why, remedy)
        if most and retries is not None and most <= retries:
            what = f"{queue}: its maxReceiveCount of {most} is not above {found.name}'s {retries}"
            why = "the queue gives up before the task's policy does"
            yield _Finding("error", f"{what} retries", why, f"{more}{retries + 2}")
    if not dead or not most:
        why = "what fails is retried until it expires"
        yield _Finding("error", f"{queue}: it has no dead-letter queue", why)
        return
    if most < 5:  # noqa: PLR2004 - what AWS advises
        why = "a few crashes or releases are enough to make a dead letter of a good message"
        yield _Finding(
            "warning", f"{queue}: its maxReceiveCount is {most}", why, f"{more}5"
        )
    if isinstance(broker, SqsBroker):
        yield from _check_attributes(broker, queue, dead)


def _check_attributes(broker: SqsBroker, queue: str, dead: str) -> Iterator[_Finding]:
    """Look at what only a queue on SQS has."""
    names = ["MessageRetentionPeriod", "MaximumMessageSize"]
    ours, theirs = (_if_there(broker.attributes, name, names) for name in (queue, dead))
    if theirs is None:
        remedy = (
            _PROVISION
            if dead == f"{queue}-DLQ"
            else "make it, or correct the RedrivePolicy"
        )
        why = "what fails is retried until it expires"
        yield _Finding("error", f"{dead}: no such queue", why, remedy)
        return
    kept_s, dead_s = (int(found["MessageRetentionPeriod"]) for found in (ours, theirs))
    if dead_s <= kept_s:
        what = f"{dead}: it keeps messages for {dead_s} s, and {queue} for {kept_s} s"
        why = "the time counts from the first sending: a dead letter may expire at once"
        remedy = f"set MessageRetentionPeriod of {queue} below that of {dead}: 1209600 is the most"
        mends = dead == f"{queue}-DLQ" and kept_s < 14 * 86_400
        yield _Finding("warning", what, why, _PROVISION if mends else remedy)
    if int(ours["MaximumMessageSize"]) < _MAX_SQS_BYTES:
        what = (
            f"{queue}: it takes messages of at most {ours['MaximumMessageSize']} bytes"
        )
        why = "SQS takes 1 MiB, and larger ones are refused at dispatch"
        yield _Finding("warning", what, why)


# --- 22. command line -----------------------------------------------------------------
# Glue only. Each command is a function around what is above: its decorator has its options, its
# docstring is its help and ends with an example, and it returns whether it failed. Exit codes:
# 0 done, 1 failed, 2 wrong usage or configuration.


_Option = tuple[str, dict[str, Any]]  # the arguments of argparse's add_argument()
_commands: dict[str, tuple[Callable[[Any], object], Sequence[_Option]]] = {}


def _option(name: str, text: str | None = None, **kwargs: Any) -> _Option:
    return name, {"help": text, **kwargs}


def _command(name: str, *options: _Option) -> Callable[..., Any]:
    """Make a command of a function; its docstring is the help, and ends with an example."""

    def register(run: Callable[[Any], object]) -> Callable[[Any], object]:
        _commands[name] = run, options
        return run

    return register


_flag = functools.partial(_option, action="store_true")
_many = functools.partial(_option, action="append", default=[])
_MODULES = _option(
    "modules", "to import: it has the tasks", nargs="*", metavar="MODULE"
)
_MODULE = _many("--module", "to import first", dest="modules", metavar="MODULE")
_QUEUES = _many("--priority", "which queue: default", choices=_PRIORITIES)
_HEADER = _many("--header", metavar="K=V")
_AS_JSON = _flag("--json", "for programs")
_DRY_RUN = _flag("--dry-run", "only say what would be done")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    :param argv: the arguments; those of the process if None
    :returns: the exit code: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted
    :raises SystemExit: for ``--help``, ``--version`` and arguments that argparse refuses
    """
    argv = sys.argv[1:] if argv is None else argv
    # Such as a worker's child, before all else: it has arguments of its own.
    if argv and argv[0] in _programs:
        return _programs[argv[0]](argv[1:])
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    # On the handlers, for a logger's own filters do not see what its children log.
    for handler in logging.getLogger().handlers:
        handler.addFilter(_add_task)
        if arguments.log_format == "json":
            handler.setFormatter(_JsonFormatter())
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, for the script
    try:
        if name := os.environ.get("DJANGO_SETTINGS_MODULE"):
            _import(name, "the module named by DJANGO_SETTINGS_MODULE")
            _import("django", "the package").setup()
        _load(arguments.modules, arguments.command)
        return int(bool(arguments.run(arguments)))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        _log.debug("taskhawk %s", arguments.command, exc_info=True)
        # In one line, and never an empty one; the text of a KeyError is its key alone.
        text = "" if isinstance(error, KeyError) else " ".join(_text_of(error).split())
        print(f"taskhawk: {text or repr(error)}", file=sys.stderr)
        wrong = ConfigurationError | ValidationError | TypeError | ValueError
        return 2 if isinstance(error, wrong) else 1


_programs[""] = main


def _parser() -> Any:
    import argparse

    parser = argparse.ArgumentParser(
        prog="taskhawk", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--version", action="version", version=VERSION)
    parser.set_defaults(modules=(), ids=(), json=False, log_format="text")
    groups = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    for command, (run, options) in _commands.items():
        text, _, example = (inspect.getdoc(run) or command).partition("\n\n")
        group, _, name = command.rpartition(" ")
        if group not in groups:
            over = groups[""].add_parser(
                group, help="mend dead letters", epilog=example
            )
            groups[group] = over.add_subparsers(required=True, metavar="ACTION")
        made = groups[group].add_parser(
            name, help=text, description=text, epilog=example
        )
        made.formatter_class = (
            argparse.RawDescriptionHelpFormatter
        )  # leaves the example in a line
        made.set_defaults(command=command, run=run)
        for option, kwargs in options:
            made.add_argument(option, **kwargs)
    return parser


def _load(modules: Iterable[str], command: str) -> None:
    """Import the tasks' modules, which may configure taskhawk, and look at what they configured."""
    for name in modules:
        _import(name, "the module")
    # A queue in memory would be gone with this process, and its messages with it.
    shares = re.match(
        "listen|dispatch|dead-letters", command
    )  # a queue, with other processes
    memory = shares and re.match(r"sqlite://(\?|$)", settings.TASKHAWK_BROKER)
    text = (
        "sqlite:// is the memory of one process: use a file, such as sqlite:///queue.db"
    )
    _require(not memory, f"{command}: {text}")


class _DemoWorker(Worker):
    """A worker that prints what became of each message."""

    def settle(self, held: _Held, outcome: Outcome) -> None:
        """Do what the outcome says, then print it."""
        super().settle(held, outcome)
        names = {
            Fate.acknowledge: "ran",
            Fate.retry: "failed",
            Fate.dead_letter: "dead-lettered",
        }
        then = f": {outcome.error}" if outcome.error else ""
        then += "" if outcome.delay_s is None else f"; again in {outcome.delay_s:g} s"
        name = held.message.message.task_name if held.message.message else ""
        print(f"{names[outcome.fate]:15}{name:14}attempt {held.message.attempt}{then}")


@_command("demo")
def _demo(_arguments: Any) -> bool:
    """Show a queue at work, with nothing set up.

    example: python -m taskhawk demo
    """
    import tempfile

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        url = f"sqlite:///{folder}/queue.db"
        configure(TASKHAWK_BROKER=url, TASKHAWK_SYNC=False, IS_LAMBDA_APP=False)
        undo.callback(configure)
        logging.disable()  # what it says is printed below
        undo.callback(logging.disable, logging.NOTSET)
        print(f"A queue in {folder}/queue.db: the real broker, and a real worker.\n")
        return _play()


def _play() -> bool:
    """Dispatch, run, retry, dead-letter and requeue; return whether any of it went wrong."""
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
    print("\nThe bug in demo.divide is mended, and its dead letter sent back:")
    print(f"{'requeued':15}{requeue_dead_letter(Priority.default)} message")
    second = work().run()
    print(f"\nThe ledgers of the two workers:\n  {first}\n  {second}")
    return (first.dead_lettered, second.acked) != (1, 1)


@_command(
    "listen",
    _MODULES,
    _QUEUES,
    _option("--num-messages", "to receive at once", type=int, default=1),
    _option("--visibility-timeout", "seconds", type=float, dest="visibility_timeout_s"),
    _option("--loop-count", "end after N receives", type=int, metavar="N"),
    _flag("--until-empty", "end once nothing is queued"),
    _option("--concurrency", "how many to run at once", type=int, default=1),
    _option("--max-tasks", "end after N runs", type=int, metavar="N"),
    _option(
        "--grace",
        "seconds from a signal to the end",
        type=float,
        default=25,
        dest="grace_s",
    ),
    _flag("--isolate", "run tasks in child processes"),
    _option("--log-format", choices=["text", "json"], default="text"),
    _option("--liveness-file", "to touch while it lives", metavar="PATH"),
)
def _listen(arguments: Any) -> bool:
    """Run a worker.

    example: python -m taskhawk listen myapp.tasks --priority high --priority default
    """
    text = "listen: no task is registered: name the modules that define them, such as myapp.tasks"
    _require(_registry, text)
    queues = _queues_of(Priority[name] for name in arguments.priority or ["default"])
    names = [
        field.name for field in dataclasses.fields(Worker) if field.name in arguments
    ]
    options = {name: vars(arguments)[name] for name in names}
    worker = Worker(_brokers.broker(), queues, **options, on_overdue=_exit_overdue)
    print(worker.run())
    return not worker.ledger.balanced or worker.unanswered or worker.overdue.is_set()


def _exit_overdue(ledger: Ledger) -> None:
    """End at once, for a task still runs: its message is visible again when its lease ends."""
    print(ledger, flush=True)
    # Not sys.exit(): the worker calls this in a thread of its own, and only that would end.
    os._exit(1)


@_command(
    "dispatch",
    _option("task", "its name"),
    _option("--args", "an array", default="[]", metavar="JSON"),
    _option("--kwargs", "an object", default="{}", metavar="JSON"),
    _HEADER,
    _option("--priority", "which queue: the task's", choices=_PRIORITIES),
    _option("--delay", "seconds", type=float, default=0, metavar="S"),
    _MODULE,
)
def _dispatch(arguments: Any) -> None:
    """Queue a run of a task, and print its id.

    example: python -m taskhawk dispatch myapp.tasks.send_email --args '["me@example.com", "Hi"]'
    """
    module = arguments.task.rpartition(".")[0]
    if module and arguments.task not in _registry:
        _load([module], arguments.command)
    found = Task.find_by_name(arguments.task)
    priority = Priority[arguments.priority or found.priority.name]
    invocation = found.with_headers(**_pairs(arguments.header)).with_priority(priority)
    args, kwargs = (
        _json(arguments.args, "--args", list),
        _json(arguments.kwargs, "--kwargs", dict),
    )
    print(invocation.with_delay(arguments.delay).dispatch(*args, **kwargs))


def _pairs(texts: Iterable[str]) -> dict[str, str]:
    """Read headers, K=V each."""
    for text in texts:
        _require("=" in text, f"--header: expected K=V, got {text!r}")
    return dict(text.split("=", 1) for text in texts)


def _json(text: str, option: str, kind: type) -> Any:
    """Read an option whose value is JSON of one kind."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value := _DECODER.decode(text), kind):
            return value
    wanted = "an array" if kind is list else "an object"
    raise ConfigurationError(f"{option}: expected {wanted} of JSON, got {text!r}")


@_command("tasks", _MODULES)
def _tasks(_arguments: Any) -> None:
    """List the registered tasks.

    example: python -m taskhawk tasks myapp.tasks
    """
    for name, found in sorted(_registry.items()):
        if name == found.name:  # not an alias
            print(f"{name}  {found.priority.name}")


@_command("schema")
def _schema(_arguments: Any) -> None:
    """Print the message format as JSON Schema.

    example: python -m taskhawk schema > schema.json
    """
    print(json.dumps(SCHEMA, indent=2))


@_command(
    "stats",
    _flag("--watch", "again and again, with the trend, until Ctrl-C"),
    _option("--interval", "seconds", type=float, default=2, metavar="S"),
    _AS_JSON,
)
def _stats(arguments: Any) -> None:
    """Count the messages of all priorities.

    example: python -m taskhawk stats --watch
    """
    before: Mapping[str, Any] = {}
    tty, seconds, last_s = sys.stdout.isatty(), arguments.interval, 0.0
    _require(
        0 < seconds < math.inf, f"--interval: expected {_SECONDS}, got {seconds:g}"
    )
    clear = "\x1b[H\x1b[2J" * (tty and arguments.watch and not arguments.json)
    # Ctrl-C is how one stops watching, and no error.
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            now_s, depths = time.monotonic(), _depths()
            table = "\n".join(_depth_lines(depths, before, now_s - last_s, bars=tty))
            print(json.dumps(depths) if arguments.json else clear + table, flush=True)
            if not arguments.watch:
                break
            before, last_s = depths, now_s
            time.sleep(seconds)


@_command("check", _MODULES, _QUEUES, _AS_JSON)
def _check_all(arguments: Any) -> bool:
    """Find what is wrong with settings, queues and tasks.

    example: python -m taskhawk check myapp.tasks --priority high
    """
    used = {found.priority for found in _registry.values()} or {Priority.default}
    wanted = {Priority[name] for name in arguments.priority} or used
    findings = list(_check(sorted(wanted, key=_URGENCY.index)))
    if arguments.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        for severity, what, why, remedy in findings:
            print(f"{severity}: {what}: {why}. Mend it: {remedy}")
        print(f"{len(findings)} found" if findings else "nothing is wrong")
    return any(finding.severity == "error" for finding in findings)


@_command(
    "provision",
    _many("--priority", "which queues: all", choices=_PRIORITIES),
    _option(
        "--max-receive-count",
        "before the dead letters",
        type=int,
        default=5,
        metavar="N",
    ),
    _option(
        "--lambda",
        "a function to subscribe to the topics",
        dest="function",
        metavar="ARN",
    ),
    _option("--format", "print it as this", choices=["terraform", "iam"]),
    _DRY_RUN,
)
def _provision(arguments: Any) -> None:
    """Make the queues or topics, or print them for review.

    example: python -m taskhawk provision --format terraform > taskhawk.tf.json
    """
    if settings.TASKHAWK_BROKER != "sqs":
        _require(not arguments.format, "--format: expected TASKHAWK_BROKER to be sqs")
        dry = f"would be made, unless it is there: {settings.TASKHAWK_BROKER}"
        print(dry if arguments.dry_run else f"ready: {_brokers.broker().url('')}")
        return
    wanted = sorted(
        {Priority[name] for name in arguments.priority} or Priority, key=_URGENCY.index
    )
    options = (arguments.max_receive_count, arguments.function)
    resources = [each for priority in wanted for each in _resources(priority, *options)]
    if arguments.format:
        made = _iam(resources) if arguments.format == "iam" else _terraform(resources)
        print(json.dumps(made, indent=2))
        return
    for resource in resources:
        print(_provide(*resource, dry_run=arguments.dry_run))


# The same filters for all commands that deal with dead letters.
_LETTERS = (
    _option(
        "--priority", "of which queue: default", choices=_PRIORITIES, default="default"
    ),
    _option("--task", "only those of this task", metavar="NAME"),
    _option(
        "--error", "only those with this in the error's type or message", metavar="TEXT"
    ),
    _HEADER,
    _option("--older-than", "since they were sent: 90s, 15m, 36h or 7d", metavar="AGE"),
    _option("--newer-than", "likewise", metavar="AGE"),
    _many("--id", "the message's id, or that of SQS"),
    _option("--limit", "at most so many", type=int, metavar="N"),
    _MODULE,
)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM and a lost terminal interrupt as Ctrl-C does: what is hidden is shown again."""
    in_main, default = (
        threading.current_thread() is threading.main_thread(),
        signal.SIG_DFL,
    )
    both = (signal.SIGTERM, signal.SIGHUP)
    numbers = [
        number for number in both if in_main and signal.getsignal(number) == default
    ]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, default)


@_interruptible()
def _each_letter(arguments: Any, doing: str, done: str = "", told: str = "") -> int:
    """Do what the command's name says to the dead letters that fit all filters, and count them.

    Where nothing is `told` of it afterwards, or in a dry run, they are printed and stay.
    """
    import fnmatch

    oldest_s, newest_s = (
        _age_s(arguments.newer_than, math.inf),
        _age_s(arguments.older_than, 0),
    )
    headers, ids = _pairs(arguments.header), {*arguments.id, *arguments.ids}

    def wanted(letter: Mapping[str, Any]) -> bool:
        error = letter["error"] or {}
        shown = f"{error.get('type')}: {error.get('message')}" if error else ""
        return (
            fnmatch.fnmatchcase(letter["task"] or "", arguments.task or "*")
            and (arguments.error or "") in shown
            and headers.items()
            <= {(name, str(value)) for name, value in letter["headers"].items()}
            and newest_s <= letter["age_s"] <= oldest_s
            and (not ids or bool(ids & {letter["id"], letter["message_id"]}))
        )

    action = arguments.command.split()[1]
    limit = sys.maxsize if arguments.limit is None else arguments.limit
    letters = _DeadLetters(Priority[arguments.priority], limit=limit, wanted=wanted)
    if told and not arguments.dry_run:
        count = letters.each(doing, done, getattr(letters, action))
        print(f"{told}: {count}")
        return count
    doing = f"would {action} some of" if told else doing
    form = "json" if arguments.json else action
    return letters.each(doing, "looked at", functools.partial(_print_letters, form))


def _age_s(text: str | None, default: float) -> float:
    """Read an age, in seconds; where none is given, the default."""
    valid = text is None or re.fullmatch(r"\d+(\.\d+)?[smhd]", text)
    _require(
        valid,
        f"age: expected a number and one of s, m, h, d, such as 36h, got {text!r}",
    )
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    return default if text is None else float(text[:-1]) * units[text[-1]]


def _print_letters(form: str, messages: Sequence[QueueMessage]) -> None:
    """Print dead letters in a form: a line each for "list", all of it for "show", or JSON."""
    for message in messages:
        letter = _describe(message)
        error = letter["error"] or {}
        why = (
            f"{error.get('type')}: {error.get('message')}"
            if error
            else letter["invalid"]
        )
        why = str(why or "moved by the queue itself, after too many receives").split(
            "\n"
        )[0]
        name, age = letter["id"] or message.message_id, f"{letter['age_s']} s ago"
        text = f"{name}  {letter['task']}  {age}  {why}".replace("\n", "?")
        if form == "show":
            shown = (
                letter | {"error": why} | {f"error {key}": error[key] for key in error}
            )
            text = "".join(f"{k}: {shown[k]}\n" for k in shown if shown[k] is not None)
        elif form in ("json", "export"):
            more = {"body": message.body, "attributes": message.message_attributes}
            text = json.dumps(letter | (more if form == "export" else {}), default=str)
        # Messages are hostile input: what would command the terminal is replaced.
        print("".join(c if c.isprintable() or c == "\n" else "?" for c in text))


@_command("dead-letters list", *_LETTERS, _AS_JSON)
def _list(arguments: Any) -> None:
    """List dead letters, a line each; a look counts as a receive.

    example: python -m taskhawk dead-letters list --task 'mail.*'
    """
    _each_letter(arguments, "listing")


@_command(
    "dead-letters show", _option("ids", nargs="+", metavar="ID"), *_LETTERS, _AS_JSON
)
def _show(arguments: Any) -> None:
    """Show dead letters with their arguments and errors.

    example: python -m taskhawk dead-letters show b1328174-a21c-43d3-b303-964dfcc76efc
    """
    if not _each_letter(arguments, "showing"):
        raise TaskhawkError(
            "show: no such dead letter, among those that fit all filters"
        )


@_command("dead-letters export", *_LETTERS)
def _export(arguments: Any) -> None:
    """Print dead letters as JSON lines, with body and attributes.

    example: python -m taskhawk dead-letters export > letters.jsonl
    """
    _each_letter(arguments, "exporting")


@_command("dead-letters requeue", *_LETTERS, _DRY_RUN)
def _requeue(arguments: Any) -> None:
    """Send dead letters back to their queue.

    example: python -m taskhawk dead-letters requeue --error TimeoutError --dry-run
    """
    _each_letter(arguments, "requeueing", "requeued", told="sent back")


@_command(
    "dead-letters delete", *_LETTERS, _flag("--all", "without a filter"), _DRY_RUN
)
def _delete(arguments: Any) -> None:
    """Delete dead letters.

    example: python -m taskhawk dead-letters delete --older-than 7d --dry-run
    """
    filters = (
        "task",
        "error",
        "header",
        "older_than",
        "newer_than",
        "id",
        "limit",
        "all",
    )
    named = any(vars(arguments)[name] for name in filters)
    _require(named, "delete: expected a filter, or --all for every one")
    _each_letter(arguments, "deleting", "deleted", told="deleted")


# --- 23. vendoring --------------------------------------------------------------------
# A copy is the text of this very file, whole or cut before a part, below a header that
# has a hash for each section: the docstring, each part's banner, each room. A file is
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
        text = _own_text()
        running = cls.read(text)
        if running is not None:
            text = running.text
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


def _own_text() -> str:
    """Return the text of this file, with its header if it is a copy itself."""
    return inspect.getsource(sys.modules[__name__])


def _sections(text: str) -> list[_Section]:
    """Return the title of each section, with a short hash of its text."""
    import hashlib

    sections = []
    for title, section in _split_sections(text):
        digest = hashlib.sha256(section.strip().encode()).hexdigest()
        sections.append((title, digest[:16]))
    return sections


def _split_sections(text: str) -> Iterator[tuple[str, str]]:
    """Yield the title and the text of each section; it ends where the next banner is."""
    title, start = "docstring", 0
    for banner in re.finditer(_BANNER, text):
        yield title, text[start : banner.start()]
        title, start = banner[1], banner.end()
    yield title, text[start:]


def _read_copy(path: str) -> _Copy:
    """Read a vendored copy.

    :raises ConfigurationError: if the file is something else
    """
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

    :raises ConfigurationError: if the file that stands there, or the copy that runs this
        command, is not as it was written
    """
    running = _Copy.read(_own_text())
    if running is not None:
        running.require_unmodified("the copy that runs this command")
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
    path = os.path.realpath(arguments.path)
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
    for title in report["modified"]:
        print(f"changed by hand: {title}")
    for title in report["audit"]:
        print(f"to audit for {__version__}: {title}")
    for title in report["gone"]:
        print(f"gone in {__version__}: {title}")
