"""Run Python functions later, on AWS SQS, SNS and Lambda, from one file with one dependency.

Quickstart, with nothing set up (``TASKHAWK_BROKER='sqs'``, the default, talks to AWS instead)::

    import taskhawk

    taskhawk.configure(TASKHAWK_BROKER='sqlite:///queue.db')

    @taskhawk.task
    def send_email(to: str, subject: str, from_email: str | None = None) -> None:
        print(f'{subject} -> {to}')

    send_email.dispatch('you@example.com', 'Hello!')                      # returns the id
    taskhawk.listen_for_messages(taskhawk.Priority.default, until_empty=True)

Promises
    1. A message whose dispatch returned is run at least once or ends in the dead-letter queue,
       through ``kill -9``, crashes, network faults and shutdown at any moment.
    2. While its worker lives and reaches the queue, a message is not run twice at the same time.
    3. No byte of a message is unpickled, evaluated, or used as an import name.
    4. A malformed message neither stops a worker nor is it silently dropped.
    5. Log texts never hold bodies, arguments, header values or credentials.
    6. Idle, a queue costs one 20 s poll after another; busy, 0.1 receives and 0.1 deletes a task.

Not here: results and chains, soft time limits, purging, browsing a queue (SQS can't), CloudFormation.

A message, from the receive to its end; each worker counts them in its :class:`Ledger`::

    received --> started --> finished --> acked          deleted from the queue
        |                        |------> retried        visible again later
        |                        |------> dead_lettered  copied, then deleted
        |                        '------> uncertain      the delete is not known to be applied
        '--> released                                    never started, visible again at once

Rooms
    1. version, names, imports, limits
    2. errors
    3. settings
    4. messages
    5. tasks
    6. processing
    7. the broker contract
    8. SQS and SNS
    9. SQLite
    10. publishing
    11. the worker
    12. Lambda
    14. operations
    15. command line
"""

# --- 1. version, names, imports, limits -----------------------------------------------------------
# Importing this file does no I/O, reads no environment and imports no botocore, sqlite3, argparse
# or asyncio: they are imported by the first function that needs them.

from __future__ import annotations

__version__ = "5.0.0"

__all__ = [
    "SCHEMA",
    "VERSION",
    "AsyncInvocation",
    "Broker",
    "ConfigurationError",
    "Depth",
    "Fate",
    "IgnoreException",
    "Ledger",
    "LoggingException",
    "Message",
    "MessageTooLarge",
    "Metadata",
    "Outcome",
    "Outgoing",
    "PartialFailure",
    "Priority",
    "QueueInfo",
    "QueueMessage",
    "Refusal",
    "RetryException",
    "Sender",
    "StopRetry",
    "Task",
    "TaskNotFound",
    "TaskhawkError",
    "ValidationError",
    "batch",
    "configure",
    "exponential",
    "extend_visibility_timeout",
    "fixed",
    "linear",
    "listen_for_messages",
    "main",
    "process",
    "process_messages_for_lambda_consumer",
    "publish",
    "requeue_dead_letter",
    "settings",
    "task",
]

import abc
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
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

if typing.TYPE_CHECKING:
    import datetime

if __name__ == "__main__":
    # `python -m taskhawk` runs this file under the name __main__, and the tasks' modules import it
    # a second time under its own: go on in that one, or there would be two registries.
    _own_name = __spec__.name if __spec__ else os.path.splitext(os.path.basename(__file__))[0]
    sys.exit(importlib.import_module(_own_name).main())

VERSION = __version__  # the name that 1.4 gave it

_MAX_BATCH = 10  # entries in a batch call of SQS and SNS, and messages in a receive
_MAX_SQS_BYTES = 1_048_576  # a message, or the sum of a batch; body plus attributes
_MAX_SNS_BYTES = 262_144  # the same for SNS, unless the topic says otherwise
_MAX_ATTRIBUTES = 10  # a raw SNS delivery to SQS discards a message that has more
_MAX_DELAY_S = 900  # DelaySeconds of SQS
_MAX_VISIBLE_S = 43_200  # SQS counts these 12 hours from the receive, extensions included
_LONG_POLL_S = 20  # the longest wait of ReceiveMessage, and so the cheapest
_DEFAULT_LEASE_S = 30  # the default visibility timeout of a queue
_ERROR_ATTRIBUTE = "taskhawk.error"  # why the worker dead-lettered a message
_MAX_ERROR_BYTES = 16_384  # of that attribute: enough for a traceback, little against 1 MiB

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_R = TypeVar("_R")


# --- 2. errors ------------------------------------------------------------------------------------
# Every failure has a name. The last four are raised by tasks and retry policies, to say what is to
# become of the message.


class TaskhawkError(Exception):
    """Base of all errors of taskhawk."""


class ConfigurationError(TaskhawkError):
    """A setting, a task's declaration or the infrastructure is wrong: only a person can mend it."""


class ValidationError(TaskhawkError):
    """A message is not of the format that :data:`SCHEMA` describes."""


class MessageTooLarge(ValidationError):
    """A message is larger than the service takes."""

    def __init__(self, text: str, limit: int) -> None:
        """Say what is too large for a limit of so many bytes."""
        super().__init__(text)
        self.limit = limit


class TaskNotFound(ValidationError):
    """No task of that name is registered: is the module that defines it imported?"""


class PartialFailure(TaskhawkError):
    """Some entries of a batch were not accepted."""

    def __init__(
        self, result: Mapping[str, list[Any]], *args: object, unsent: Sequence[Message] = ()
    ) -> None:
        """Take the outcome of each entry: `result` has the lists ``Successful`` and ``Failed``."""
        self.success_count = len(result["Successful"])
        self.failure_count = len(result["Failed"])
        #: what the service answered, an entry a message
        self.result = result
        #: the messages that were not accepted, in order, ready for :func:`publish`
        self.unsent = list(unsent)
        reasons = sorted({str(entry.get("Code", "unknown")) for entry in result["Failed"]})
        total = self.success_count + self.failure_count
        text = f"{self.failure_count} of {total} messages failed: {', '.join(reasons)}"
        super().__init__(*(args or (text,)))


class RetryException(TaskhawkError):
    """Raised by a task: run me again later; this is expected and logged without a traceback."""

    def __init__(self, *args: object, delay_seconds: float | None = None) -> None:
        """Ask for another run.

        :param args: text; a number in the first place is the delay, as in taskhawk 4.7
        :param delay_seconds: when; None leaves it to the task's retry policy or to the queue
        :raises ValueError: if the delay is negative or not finite
        """
        if delay_seconds is None and args and _is_number(args[0]):
            delay_seconds, args = typing.cast("float", args[0]), args[1:]
        if delay_seconds is not None and not 0 <= delay_seconds < math.inf:
            raise ValueError(f"delay_seconds: expected 0 or more seconds, got {delay_seconds}")
        self.delay_seconds = delay_seconds
        super().__init__(*args)


class LoggingException(TaskhawkError):
    """Raised by a task: I failed; log this message with this `extra`."""

    def __init__(self, message: object, extra: Mapping[str, Any] | None = None) -> None:
        """Take the log record's text, and the fields that a log formatter may show."""
        super().__init__(message)
        self.extra = extra


class IgnoreException(TaskhawkError):
    """Raised by a task: there is nothing to do; the message is done with."""


class StopRetry(TaskhawkError):
    """Raised by a retry policy or a task: give up, send the message to the dead letters."""


def _is_number(value: object) -> typing.TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- 3. settings ----------------------------------------------------------------------------------
# The only place where configuration is read. The first source that has a setting wins: configure(),
# the module named by SETTINGS_MODULE, Django's settings, the environment, the default.


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _account(value: object) -> str:
    return f"{value:012d}" if type(value) is int else _text(value)


def _queue(value: object) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,71}", _text(value)):
        raise ValueError
    return _text(value)


def _endpoint(value: object) -> str:
    if not re.match(r"https?://.", _text(value)):
        raise ValueError
    return _text(value).rstrip("/")


def _flag(value: object) -> bool:
    words = {"": False, "0": False, "false": False, "no": False, "off": False}
    words |= {"1": True, "true": True, "yes": True, "on": True}
    return words[value.strip().lower()] if isinstance(value, str) else bool(value)


def _seconds(value: object) -> float:
    number = float(value) if isinstance(value, str) else value
    if not _is_number(number) or not 0 < number < math.inf:
        raise ValueError
    return number


def _count(value: object) -> int:
    number = int(value) if isinstance(value, str) else value
    if type(number) is not int or number < 1:
        raise ValueError
    return number


def _hook(value: object) -> Callable[..., Any]:
    found = _by_path(value) if isinstance(value, str) else value
    if not callable(found):
        raise TypeError
    return found


def _by_path(path: str) -> Any:
    """Find what a dotted path names; 1.4's own defaults, in submodules, are known."""
    if path in _PATHS_OF_1_4:
        return _PATHS_OF_1_4[path]
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _headers_hook(value: object) -> Callable[[Task[Any, Any]], Mapping[str, Any]]:
    """Take a hook that wants `task=`, as 1.4's manual says, or nothing, as 1.4.0 called it."""
    hook = _hook(value)
    kinds = {name: p.kind for name, p in inspect.signature(hook).parameters.items()}
    if "task" in kinds or inspect.Parameter.VAR_KEYWORD in kinds.values():
        return lambda task: hook(task=task)
    return lambda task: hook()  # noqa: ARG005


def _broker_url(value: object) -> str:
    if _text(value) != "sqs" and not _text(value).startswith("sqlite://"):
        raise ValueError
    return _text(value)


_PATHS_OF_1_4: dict[str, Any] = {
    "taskhawk.conf.default_headers_hook": lambda **_: {},
    "taskhawk.conf.noop_hook": lambda **_: None,
}


class _Setting(NamedTuple):
    parse: Callable[[Any], Any]
    rule: str
    example: str
    default: Any = None


_STRING = "a string"
_HOOK = "a function or its dotted path"
_SETTINGS: dict[str, _Setting] = {
    "AWS_ACCESS_KEY": _Setting(_text, _STRING, "AKIAIOSFODNN7EXAMPLE"),
    "AWS_ACCOUNT_ID": _Setting(_account, "an account number", "123456789012"),
    "AWS_CONNECT_TIMEOUT_S": _Setting(_seconds, "a number of seconds above 0", "2", 2),
    "AWS_ENDPOINT_SNS": _Setting(_endpoint, "a URL", "http://127.0.0.1:4566"),
    "AWS_ENDPOINT_SQS": _Setting(_endpoint, "a URL", "http://127.0.0.1:4566"),
    "AWS_READ_TIMEOUT_S": _Setting(_seconds, "a number of seconds above 0", "2", 2),
    "AWS_REGION": _Setting(_text, "the name of a region", "eu-west-1"),
    "AWS_SECRET_KEY": _Setting(_text, _STRING, "wJalrXUtnFEMI/EXAMPLEKEY"),
    "AWS_SESSION_TOKEN": _Setting(_text, _STRING, "AQoDYXdzEJr/EXAMPLETOKEN"),
    "IS_LAMBDA_APP": _Setting(_flag, "true or false", "False", default=False),
    "TASKHAWK_BROKER": _Setting(
        _broker_url, "'sqs' or a URL of SQLite", "sqlite:///queue.db", "sqs"
    ),
    "TASKHAWK_DEFAULT_HEADERS": _Setting(_headers_hook, _HOOK, "myapp.hooks.default_headers"),
    "TASKHAWK_ERROR_HOOK": _Setting(_hook, _HOOK, "myapp.hooks.report_error"),
    "TASKHAWK_HEARTBEAT_HOOK": _Setting(_hook, _HOOK, "myapp.hooks.touch_file"),
    "TASKHAWK_MAX_DB_REUSE_LOOPS": _Setting(_count, "a whole number above 0", "5", 5),
    "TASKHAWK_POST_PROCESS_HOOK": _Setting(_hook, _HOOK, "myapp.hooks.after"),
    "TASKHAWK_PRE_PROCESS_HOOK": _Setting(_hook, _HOOK, "myapp.hooks.before"),
    "TASKHAWK_QUEUE": _Setting(
        _queue, "at most 71 letters, digits, hyphens and underscores", "dev-myapp"
    ),
    "TASKHAWK_SYNC": _Setting(_flag, "true or false", "False", default=False),
    "TASKHAWK_TASK_CLASS": _Setting(_hook, "a class or its dotted path", "myapp.tasks.MyTask"),
}
_SECRETS = {"AWS_ACCESS_KEY", "AWS_SECRET_KEY", "AWS_SESSION_TOKEN"}
_IGNORED = {  # settings of taskhawk 4.7 that have no meaning here
    "TASKHAWK_CONSUMER_BACKEND",
    "TASKHAWK_HEARTBEAT_HOOK_SYNC_CALL_S",
    "TASKHAWK_PUBLISHER_BACKEND",
    "TASKHAWK_PUBLISHER_GCP_BATCH_SETTINGS",
}


class _Settings:
    """The settings as attributes, each read at its first use and remembered."""

    def __init__(self) -> None:
        self._configured: Mapping[str, Any] = {}
        self._values: dict[str, Any] = {}
        self._warned: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name not in _SETTINGS:
            raise AttributeError(f"{name} is not a setting of taskhawk{_nearest(name)}")
        values = self._values  # forget() replaces the dict: a reader that is late fills the old one
        if name not in values:
            values[name] = self.read(name)
        return values[name]

    def read(self, name: str) -> Any:
        """Read a setting from its source, whatever is remembered."""
        for source, get in self._sources():
            value = get(name)
            if value is not None and (value != "" or _SETTINGS[name].parse is _flag):
                return _parse(name, value, source)
        return _SETTINGS[name].default

    def require(self, name: str) -> Any:
        """Read a setting that has no default.

        :raises ConfigurationError: if it is not set
        """
        if (value := getattr(self, name)) is not None:
            return value
        raise ConfigurationError(
            f"{name} is not set: expected {_SETTINGS[name].rule}, such as"
            f" {_SETTINGS[name].example!r}, from taskhawk.configure(), the module named by"
            f" SETTINGS_MODULE, Django's settings or the environment"
        )

    def credentials(self) -> dict[str, str]:
        """Return botocore's arguments, from the one source that has a key; {} leaves it to botocore.

        Taken together, so that a key never meets the secret or the token of another source.
        """
        for source, get in self._sources():
            names = ("AWS_ACCESS_KEY", "AWS_SECRET_KEY", "AWS_SESSION_TOKEN")
            key, secret, token = (_parse(n, v, source) if (v := get(n)) else None for n in names)
            if bool(key) != bool(secret):
                here, missing = names[:2] if key else names[1::-1]
                raise ConfigurationError(
                    f"{here} is set in {source}, but {missing} is not: expected both or neither"
                )
            if key:
                found = {"aws_access_key_id": key, "aws_secret_access_key": secret}
                return {**found, **({"aws_session_token": token} if token else {})}
        return {}

    def replace(self, configured: Mapping[str, Any]) -> None:
        """Take what configure() was given, and read everything anew."""
        self._configured = configured
        self.forget()

    def forget(self, **_: object) -> None:
        """Read everything anew; Django calls it when a test overrides a setting."""
        self._values = {}

    def _sources(self) -> Iterator[tuple[str, Callable[[str], Any]]]:
        yield "configure()", self._configured.get
        if path := os.environ.get("SETTINGS_MODULE"):
            module = _import(path, "the module named by SETTINGS_MODULE")
            self.warn_of_unknown(vars(module), f"the module {path}")
            yield f"the module {path}", lambda name: getattr(module, name, None)
        if (django := _django_settings()) is not None:
            self.warn_of_unknown(dir(django), "Django's settings")
            yield "Django's settings", lambda name: getattr(django, name, None)
        self.warn_of_unknown(os.environ, "the environment")
        yield "the environment", os.environ.get

    def warn_of_unknown(self, names: Iterable[str], source: str) -> None:
        """Log one warning for each name that looks like a setting and is none."""
        ours = {name for name in names if isinstance(name, str) and name.startswith("TASKHAWK_")}
        for name in sorted(ours - _SETTINGS.keys() - _IGNORED - self._warned):
            self._warned.add(name)
            _log.warning("%s in %s is not a setting of taskhawk%s", name, source, _nearest(name))


settings = _Settings()


def _parse(name: str, value: object, source: str) -> Any:
    setting = _SETTINGS[name]
    try:
        return setting.parse(value)
    except (ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
        shown = type(value).__name__ if name in _SECRETS else repr(value)
        why = f" ({error})" if isinstance(error, ImportError | AttributeError) else ""
        raise ConfigurationError(
            f"{name} in {source}: expected {setting.rule}, such as {setting.example!r},"
            f" got {shown}{why}"
        ) from error


def _nearest(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, _SETTINGS, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _import(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise  # the module is there, and something that it imports is not
        raise ConfigurationError(f"{what}, {name!r}, can't be imported: {error}") from error


def _django_settings() -> Any:
    """Return Django's settings where Django is in use; it is never imported otherwise."""
    conf = sys.modules.get("django.conf")
    if conf is None and not os.environ.get("DJANGO_SETTINGS_MODULE"):
        return None
    from django.conf import settings as django_settings
    from django.core.signals import setting_changed

    if not django_settings.configured and not os.environ.get("DJANGO_SETTINGS_MODULE"):
        return None
    setting_changed.connect(settings.forget, weak=False, dispatch_uid=f"{__name__}.forget")
    return django_settings


def configure(obj_or_mapping: object = None, /, **values: Any) -> None:
    """Set settings by hand, ahead of all other sources; replaces what an earlier call set.

    Call it before tasks are dispatched or run: it closes the connections that are open.

    :param obj_or_mapping: an object with settings as attributes, or a mapping such as Flask's
        ``app.config``; names that are no settings of taskhawk are left alone
    :param values: settings by name
    :raises ConfigurationError: if a name in `values` is not a setting
    """
    for name in values:
        if name not in _SETTINGS:
            raise ConfigurationError(f"{name} is not a setting of taskhawk{_nearest(name)}")
    given: dict[str, Any] = {}
    if isinstance(obj_or_mapping, Mapping):
        settings.warn_of_unknown(obj_or_mapping, "configure()")
        given = {name: obj_or_mapping[name] for name in _SETTINGS if name in obj_or_mapping}
    elif obj_or_mapping is not None:
        settings.warn_of_unknown(dir(obj_or_mapping), "configure()")
        given = {n: getattr(obj_or_mapping, n) for n in _SETTINGS if hasattr(obj_or_mapping, n)}
    settings.replace({**given, **values})
    _brokers.close()


# --- 4. messages ----------------------------------------------------------------------------------
# Untrusted bytes stop here: what decode() lets through has the shape that SCHEMA describes, and what
# it refuses, dispatch refuses too. All functions are pure.


class Priority(enum.Enum):
    """Which queue a message goes through: each has its own workers, to be scaled apart."""

    default = 1
    high = 2
    low = 3
    bulk = 4


# The calendar's rules in full, so that other languages, which have only the pattern, agree with us.
_ISO_8601 = (
    r"^(?:[0-9]{4}-(?:(?:0[13578]|1[02])-31|(?:0[13-9]|1[0-2])-(?:29|30)"
    r"|(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
    r"(?:[T ](?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9](?:[.,][0-9]{1,9})?)?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):?[0-5][0-9])?)?(?![\s\S])"
)
_MAX_TIMESTAMP_MS = 8_640_000_000_000_000  # the last date of ECMAScript, year 275760

#: the message format as JSON Schema 2020-12: the contract for publishers in other languages
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "taskhawk message",
    "description": "The body of an SQS or SNS message that asks for a run of a task.",
    "type": "object",
    "required": ["id", "metadata", "headers", "task", "args", "kwargs"],
    "properties": {
        "id": {"description": "identifies the message", "type": "string", "minLength": 1},
        "metadata": {
            "type": "object",
            "required": ["timestamp", "version"],
            "properties": {
                "priority": {"enum": [priority.name for priority in Priority]},
                "timestamp": {
                    "description": "of the dispatch: epoch milliseconds, or ISO 8601 (UTC if"
                    " it names no offset)",
                    "type": ["number", "string"],
                    "minimum": 0,
                    "maximum": _MAX_TIMESTAMP_MS,
                    "pattern": _ISO_8601,
                },
                "version": {"const": "1.0"},
            },
        },
        "headers": {"description": "free for the application", "type": "object"},
        "task": {"description": "the task's name", "type": "string", "minLength": 1},
        "args": {"description": "positional arguments", "type": "array"},
        "kwargs": {"description": "keyword arguments", "type": "object"},
    },
}

_SHAPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "id": (str, "a non-empty string"),
    "metadata": (dict, "an object"),
    "headers": (dict, "an object"),
    "task": (str, "a non-empty string"),
    "args": ((list, tuple), "an array"),
    "kwargs": (dict, "an object"),
}
_JSON_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}


def _wrong(path: str, expected: str, value: object) -> ValidationError:
    """Make the error for a value of a wrong type, without the value: it may be a secret."""
    kind = "null" if value is None else _JSON_NAMES.get(type(value), "a number")
    return ValidationError(f"{path}: expected {expected}, got {kind}")


def _validate(data: object) -> None:
    if not isinstance(data, dict):
        raise _wrong("message", "an object", data)
    for key, (kind, expected) in _SHAPES.items():
        if key not in data:
            raise ValidationError(f"{key}: expected {expected}, got nothing")
        if not isinstance(data[key], kind):
            raise _wrong(key, expected, data[key])
        if data[key] == "":
            raise ValidationError(f'{key}: expected {expected}, got ""')
    metadata = data["metadata"]
    for key, expected in (("version", '"1.0"'), ("timestamp", _TIMESTAMP_RULE)):
        if key not in metadata:
            raise ValidationError(f"metadata.{key}: expected {expected}, got nothing")
    if metadata["version"] not in Message.VERSIONS:
        raise ValidationError(
            f'metadata.version: expected "1.0", got {_shown(metadata["version"])}'
        )
    priority = metadata.get("priority", "default")
    if not isinstance(priority, str) or priority not in Priority.__members__:
        names = ", ".join(Priority.__members__)
        raise ValidationError(f"metadata.priority: expected one of {names}, got {_shown(priority)}")


_TIMESTAMP_RULE = "epoch milliseconds or an ISO 8601 date and time"


def _shown(value: object) -> str:
    """Show a small value of the metadata, which is never a user's."""
    if isinstance(value, str):
        return json.dumps(value[:40])
    if value is None or isinstance(value, bool | float):
        return json.dumps(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**18 else "a huge number"
    return _JSON_NAMES.get(type(value), type(value).__name__)


def _epoch_ms(value: object) -> int:
    """Normalise a timestamp to whole epoch milliseconds."""
    if isinstance(value, str) and re.search(_ISO_8601, value):
        import datetime

        moment = datetime.datetime.fromisoformat(value)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
        epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
        return (moment - epoch) // datetime.timedelta(milliseconds=1)
    if _is_number(value) and 0 <= value <= _MAX_TIMESTAMP_MS:
        return int(value)
    raise ValidationError(f"metadata.timestamp: expected {_TIMESTAMP_RULE}, got {_shown(value)}")


class Message:
    """One request for a run of a task. Make it with :meth:`new`; its properties never change."""

    CURRENT_VERSION = "1.0"
    VERSIONS = ("1.0",)

    def __init__(self, data: Mapping[str, Any]) -> None:
        """Take a decoded message.

        :param data: as :data:`SCHEMA` describes it; unknown keys are ignored
        :raises ValidationError: says where it differs
        """
        _validate(data)
        self._id: str = data["id"]
        self._task_name: str = data["task"]
        self._headers: dict[str, Any] = data["headers"]
        self._args: list[Any] = list(data["args"])
        self._kwargs: dict[str, Any] = data["kwargs"]
        self._metadata: dict[str, Any] = {
            "priority": data["metadata"].get("priority", "default"),
            "timestamp": _epoch_ms(data["metadata"]["timestamp"]),
            "version": data["metadata"]["version"],
        }
        #: seconds that the queue holds the message back; not a part of the format
        self.delay_s: float = 0
        #: what the message was received as; None at the publisher's
        self.received: QueueMessage | None = None

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
        :param msg_id: a new UUID if None
        :raises TaskNotFound: if there is no such task
        :raises ValidationError: if an argument is of a wrong type
        """
        Task.find_by_name(task)
        metadata = {
            "priority": priority.name,
            "timestamp": int(time.time() * 1000),
            "version": cls.CURRENT_VERSION,
        }
        return cls(
            {
                "id": msg_id or str(uuid.uuid4()),
                "metadata": metadata,
                "headers": dict(headers or {}),
                "task": task,
                "args": list(args or ()),
                "kwargs": dict(kwargs or {}),
            }
        )

    id = property(lambda self: self._id, doc="identifies the message: a str")
    metadata = property(lambda self: self._metadata, doc="priority, timestamp, version: a dict")
    timestamp = property(lambda self: self._metadata["timestamp"], doc="epoch milliseconds")
    version = property(lambda self: self._metadata["version"], doc="of the format: a str")
    headers = property(lambda self: self._headers, doc="a dict")
    task_name = property(lambda self: self._task_name, doc="a str")
    args = property(lambda self: self._args, doc="a list")
    kwargs = property(lambda self: self._kwargs, doc="a dict")

    @property
    def priority(self) -> Priority:
        """The queue that the message goes through."""
        return Priority[self._metadata["priority"]]

    @priority.setter
    def priority(self, value: Priority) -> None:
        self._metadata["priority"] = value.name  # 1.4 had no other way to set it

    @property
    def task(self) -> Task[Any, Any]:
        """The registered task; raises :exc:`TaskNotFound` if there is none."""
        return Task.find_by_name(self._task_name)

    def call_task(self, receipt: str | None) -> None:
        """Run the task, here and now."""
        self.task.call(self, receipt)

    def as_dict(self) -> dict[str, Any]:
        """Return the message as it is on the wire."""
        return {
            "id": self._id,
            "metadata": self._metadata,
            "headers": self._headers,
            "task": self._task_name,
            "args": self._args,
            "kwargs": self._kwargs,
        }

    def items(self) -> typing.ItemsView[str, Any]:
        """Return the items of :meth:`as_dict`."""
        return self.as_dict().items()

    def __eq__(self, other: object) -> bool:
        return self.as_dict() == other.as_dict() if isinstance(other, Message) else NotImplemented

    __hash__ = None  # type: ignore[assignment]


def _from_decimal(value: object) -> float:
    # Where nobody has imported decimal, no value can be a Decimal.
    if "decimal" in sys.modules and isinstance(value, sys.modules["decimal"].Decimal):
        whole = value.is_finite() and value == value.to_integral_value()
        return int(value) if whole else float(value)
    raise TypeError(f"{type(value).__name__} is not a JSON type")


# ASCII only: all of it passes SQS, which refuses some control characters and surrogates.
_ENCODER = json.JSONEncoder(default=_from_decimal, allow_nan=False, separators=(",", ":"))


def _encode(message: Message) -> str:
    try:
        return _ENCODER.encode(message.as_dict())
    except (TypeError, ValueError, RecursionError) as error:
        for path, value in _leaves(message):
            _encode_one(message, path, value)
        raise ValidationError(f"{message.task_name}: not JSON: {error}") from error


def _encode_one(message: Message, path: str, value: object) -> str:
    """Encode one argument or header, or raise the error that names it."""
    try:
        return _ENCODER.encode(value)
    except TypeError as error:
        raise TypeError(f"{message.task_name}: {path} is not JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"{message.task_name}: {path} is not JSON: {error}") from error


def _leaves(message: Message) -> Iterator[tuple[str, object]]:
    """Yield each argument and header with the path that errors call it by."""
    yield from ((f"args[{index}]", value) for index, value in enumerate(message.args))
    yield from ((f"kwargs.{name}", value) for name, value in message.kwargs.items())
    yield from ((f"headers.{name}", value) for name, value in message.headers.items())


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError("a number too large")
    return number


def _no_constant(name: str) -> typing.NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant)


def _decode(body: object) -> Message:
    """Decode a body from the queue; whatever is wrong with it is a ValidationError."""
    if not isinstance(body, str):
        raise _wrong("message", "a string of JSON", body)
    try:
        data = _DECODER.decode(body)
    except RecursionError:
        raise ValidationError("message: nested too deeply") from None
    except ValueError as error:
        # Only the position: the error's text may quote the body.
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValidationError(f"message: not JSON{where}") from None
    return Message(data)


# --- 5. tasks -------------------------------------------------------------------------------------
# Only what is in this registry can be invoked by a message. A name, once taken, is never given to
# another function, so a message can't reach code that its publisher did not mean.

_registry: dict[str, Task[Any, Any]] = {}
_registering = threading.Lock()  # held from the look at a name to its taking


class Metadata(dict[str, Any]):
    """What a task may know of its run: id, priority, receipt, timestamp, version.

    A dict, as in taskhawk 1.4, whose keys are attributes too; the rest are attributes alone.
    """

    def __init__(self, message: Message, receipt: str | None) -> None:
        """Describe the run of a message."""
        super().__init__(
            id=message.id,
            priority=message.priority,
            receipt=receipt,
            timestamp=message.timestamp,
            version=message.version,
        )
        self._message = message

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"metadata has no {name!r}") from None

    @property
    def headers(self) -> dict[str, Any]:
        """The headers that the message was dispatched with."""
        return typing.cast("dict[str, Any]", self._message.headers)

    @property
    def attempt(self) -> int:
        """How often the message was received, from 1."""
        return self._message.received.attempt if self._message.received else 1

    @property
    def queue(self) -> str | None:
        """The name of the queue; None where the message came by SNS or in sync mode."""
        return self._message.received.queue if self._message.received else None

    @property
    def lease_lost(self) -> bool:
        """Whether the worker could not keep the message to itself: another may run it now."""
        return bool(self._message.received and self._message.received.lease_lost)

    def extend_visibility_timeout(self, visibility_timeout_s: float) -> None:
        """Keep the message invisible for so many seconds from now.

        A worker does so by itself; this is for Lambda. Does nothing where no queue has the message.
        """
        if self._message.received:
            self._message.received.change_visibility(VisibilityTimeout=visibility_timeout_s)


class Task(Generic[_P, _R]):
    """A function that can be dispatched; calling it runs the function, here and now.

    Saved invocations can be used again: ``urgent = send_email.with_priority(Priority.high)``.
    """

    def __init__(self, fn: Callable[_P, _R], priority: Priority, name: str) -> None:
        """Check that a message can call the function. Use the decorator :func:`task` instead.

        :raises ConfigurationError: if it can't
        """
        self._fn, self._priority, self._name = fn, priority, name
        self._signature = inspect.signature(fn)
        self._is_async = inspect.iscoroutinefunction(fn)
        kinds = {p.name: p.kind for p in self._signature.parameters.values()}
        if inspect.Parameter.VAR_POSITIONAL in kinds.values():
            raise ConfigurationError(
                f"{name}: *args can't be a task's parameter: name the arguments, or take a list"
            )
        named = {n for n, kind in kinds.items() if kind is not inspect.Parameter.POSITIONAL_ONLY}
        takes_all = inspect.Parameter.VAR_KEYWORD in kinds.values()
        self._accepts_metadata = takes_all or "metadata" in named
        self._accepts_headers = takes_all or "headers" in named
        self._worker_gives = {
            key: None for key in ("metadata", "headers") if getattr(self, f"_accepts_{key}")
        }
        #: the retry policy, and which exceptions it is for; set by the decorator
        self.retry: Callable[[int], float] | None = None
        self.retry_on: tuple[type[BaseException], ...] = (BaseException,)
        self.never_retry_on: tuple[type[BaseException], ...] = ()
        functools.update_wrapper(self, fn)

    name = property(lambda self: self._name, doc="the name that messages call the task by")
    priority = property(lambda self: self._priority, doc="of its messages, unless they say so")
    fn = property(lambda self: self._fn, doc="the function")
    accepts_metadata = property(lambda self: self._accepts_metadata, doc="whether it is given it")
    accepts_headers = property(lambda self: self._accepts_headers, doc="whether it is given them")

    @property
    def task(self) -> Task[_P, _R]:
        """The task itself; in 1.4 the decorator returned the function, which had it here."""
        return self

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return self._fn(*args, **kwargs)

    def dispatch(self, /, *args: _P.args, **kwargs: _P.kwargs) -> str:
        """Queue a run; see :meth:`AsyncInvocation.dispatch`."""
        return AsyncInvocation(self).dispatch(*args, **kwargs)

    def dispatch_many(self, calls: Iterable[Any]) -> int:
        """Queue a run for each of `calls`; see :meth:`AsyncInvocation.dispatch_many`."""
        return AsyncInvocation(self).dispatch_many(calls)

    def with_headers(self, /, **headers: Any) -> AsyncInvocation[_P]:
        """Return an invocation whose messages have these headers."""
        return AsyncInvocation(self).with_headers(**headers)

    def with_priority(self, priority: Priority) -> AsyncInvocation[_P]:
        """Return an invocation whose messages have this priority."""
        return AsyncInvocation(self).with_priority(priority)

    def with_delay(self, delay: float | datetime.timedelta) -> AsyncInvocation[_P]:
        """Return an invocation whose messages are held back for a time."""
        return AsyncInvocation(self).with_delay(delay)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Check the arguments against the signature, exactly as the worker will call it.

        :raises TypeError: if the worker's call would fail
        """
        twice = self._worker_gives.keys() & kwargs.keys()
        try:
            self._signature.bind(*args, **{**kwargs, **self._worker_gives})
        except TypeError as error:
            raise TypeError(f"{self._name}: {error}") from None
        if twice:
            raise TypeError(f"{self._name}: {min(twice)!r} is given by the worker: leave it out")

    def call(self, message: Message, receipt: str | None) -> None:
        """Run the function with a message's arguments; an ``async def`` one to its end.

        :param receipt: the receipt handle; None where no queue has the message
        """
        kwargs = dict(message.kwargs)
        if self._accepts_metadata:
            kwargs["metadata"] = Metadata(message, receipt)
        if self._accepts_headers:
            kwargs["headers"] = dict(message.headers)
        result: Any = self._fn(*message.args, **kwargs)
        if self._is_async:
            _run_coroutine(result)

    def retries(self, error: BaseException) -> bool:
        """Return whether the task's options allow another run after this error."""
        return isinstance(error, self.retry_on) and not isinstance(error, self.never_retry_on)

    @classmethod
    def find_by_name(cls, name: str) -> Task[Any, Any]:
        """Return the registered task of this name.

        :raises TaskNotFound: if there is none
        """
        if found := _registry.get(name):
            return found
        raise TaskNotFound(f"no task is registered as {name[:200]!r}: is its module imported?")

    def __str__(self) -> str:
        return f"Taskhawk task: {self._name}"

    def __repr__(self) -> str:
        return f"<Task {self._name}>"


_PATHS_OF_1_4["taskhawk.task_manager.Task"] = _PATHS_OF_1_4["taskhawk.Task"] = Task


def _run_coroutine(coroutine: Any) -> None:
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(coroutine)
        return
    # Sync mode inside an application's own loop: that one is busy until we return.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        pool.submit(contextvars.copy_context().run, asyncio.run, coroutine).result()


class AsyncInvocation(Generic[_P]):
    """How to dispatch a task. Immutable: each ``with_…`` returns another invocation."""

    def __init__(self, task: Task[_P, Any]) -> None:
        """Start from the task's own priority and no headers."""
        self._task = task
        self._headers: Mapping[str, Any] = {}
        self._priority: Priority = task.priority
        self._delay_s: float = 0

    def _with(self, **changes: Any) -> AsyncInvocation[_P]:
        other = type(self)(self._task)
        other.__dict__ |= self.__dict__ | changes
        return other

    def with_headers(self, /, **headers: Any) -> AsyncInvocation[_P]:
        """Return an invocation with these headers too."""
        return self._with(_headers={**self._headers, **headers})

    def with_priority(self, priority: Priority) -> AsyncInvocation[_P]:
        """Return an invocation with this priority.

        :raises TypeError: if it is not a :class:`Priority`
        """
        if not isinstance(priority, Priority):
            raise TypeError(f"priority: expected a taskhawk.Priority, got {priority!r}")
        return self._with(_priority=priority)

    def with_delay(self, delay: float | datetime.timedelta) -> AsyncInvocation[_P]:
        """Return an invocation whose messages are held back by the queue.

        :param delay: seconds, or a timedelta: up to 15 minutes on SQS, whose DelaySeconds it is,
            and any length on SQLite
        :raises ValueError: if it is negative or not finite
        """
        delay_s = delay if _is_number(delay) else typing.cast("Any", delay).total_seconds()
        if not 0 <= delay_s < math.inf:
            raise ValueError(f"delay: expected 0 or more seconds, got {delay_s}")
        return self._with(_delay_s=delay_s)

    def dispatch(self, /, *args: _P.args, **kwargs: _P.kwargs) -> str:
        """Queue a run of the task: one request, and one more at a queue's first use.

        :param args: for the function, as JSON can hold them; Decimals become numbers
        :returns: the message's id, which the task finds in its ``metadata``
        :raises TypeError: if the function can't be called so, or an argument is not JSON
        :raises ValidationError: if an argument can't be sent: NaN, too deep, too large
        :raises ConfigurationError: if the queue is missing or forbidden, or the delay is too long
        """
        return publish(self._message(args, kwargs))

    def dispatch_many(self, calls: Iterable[Any]) -> int:
        """Queue a run for each of `calls`, ten to a request, with bounded memory.

        :param calls: a tuple is a call's positional arguments, a dict its keyword arguments, and
            anything else its only argument
        :returns: how many there were
        :raises PartialFailure: if some were not accepted; no more of `calls` was read then
        """
        count = 0
        iterator = iter(calls)
        while True:
            messages = []
            for call in itertools.islice(iterator, _MAX_BATCH):
                args = (
                    call if isinstance(call, tuple) else () if isinstance(call, dict) else (call,)
                )
                messages.append(self._message(args, call if isinstance(call, dict) else {}))
            if not messages:
                return count
            _publish_all([_prepare(message) for message in messages])
            count += len(messages)

    def _message(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Message:
        self._task.bind(args, kwargs)
        defaults = settings.TASKHAWK_DEFAULT_HEADERS
        headers = {**(defaults(self._task) or {} if defaults else {}), **self._headers}
        message = Message.new(
            self._task.name, args, kwargs, headers=headers, priority=self._priority
        )
        message.delay_s = self._delay_s
        return message


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
) -> Callable[[Callable[_P, _R]], Task[_P, _R]]: ...
def task(
    *args: Any, priority: Priority = Priority.default, name: str | None = None, **options: Any
) -> Any:
    """Turn a function into a :class:`Task`: ``@task``, or ``@task(priority=Priority.high)``.

    :param name: what messages call it by; its module and name if None
    :param retry: after a failed run, the seconds to the next one: :func:`fixed`, :func:`linear`,
        :func:`exponential`, or any function of the attempt (from 1); None leaves it to the queue
    :param retry_on: exceptions to run again after; all others go to the dead letters at once
    :param never_retry_on: exceptions that go to the dead letters at once
    :raises ConfigurationError: if a message can't call the function, or the name is taken
    """
    unknown = options.keys() - {"retry", "retry_on", "never_retry_on"}
    if unknown or len(args) > 1 or not isinstance(priority, Priority):
        wrong = next(iter(sorted(unknown)), None) or (args[1:] or (f"priority={priority!r}",))[0]
        raise ConfigurationError(
            f"task(): expected a function, priority (a Priority), name, retry, retry_on or"
            f" never_retry_on, got {wrong}"
        )
    if args:
        return _register(args[0], priority, name, options)
    return lambda fn: _register(fn, priority, name, options)


def _register(
    fn: Any, priority: Priority, name: str | None, options: Mapping[str, Any]
) -> Task[Any, Any]:
    _check_callable(fn, name)
    module = _real_module(fn)
    full_name = name or f"{module}.{fn.__name__}"
    cls = settings.read("TASKHAWK_TASK_CLASS") or Task
    made = cls(fn, priority, full_name)
    if not isinstance(made, Task):
        raise ConfigurationError(
            f"TASKHAWK_TASK_CLASS: expected a subclass of taskhawk.Task, got {cls!r}"
        )
    for option, value in options.items():
        setattr(made, option, value)
    with _registering:
        taken = _registry.get(full_name)
        if taken and not _is_reload(taken.fn, fn):
            raise ConfigurationError(
                f"{full_name}: the name of {_place(fn)} is taken by {_place(taken.fn)}:"
                f" rename one, or pass name= to @taskhawk.task"
            )
        _registry[full_name] = made
        if not name and fn.__module__ == "__main__":
            # 1.4 named it so: its messages may still be in the queue.
            _registry[f"__main__.{fn.__name__}"] = made
    return made


def _check_callable(fn: Any, name: str | None) -> None:
    shown = getattr(fn, "__qualname__", repr(fn))
    if isinstance(fn, Task):
        problem = "is a task already: decorate it once"
    elif not callable(fn):
        problem = "can't be called: expected a function"
    elif inspect.ismethod(fn) or _in_class_body(fn):
        problem = "is a method: expected a function, which a message can call without an object"
    elif shown.endswith("<lambda>"):
        problem = "is a lambda: expected a function with a name (def)"
    elif not name and not hasattr(fn, "__name__"):
        problem = "has no name: pass name= to taskhawk.task"
    else:
        return
    raise ConfigurationError(f"{shown} {problem}")


def _in_class_body(fn: Any) -> bool:
    parents = getattr(fn, "__qualname__", "").split(".")[:-1]
    first = next(iter(inspect.signature(fn).parameters), None)
    return bool(parents) and parents[-1] != "<locals>" and first in ("self", "cls")


def _real_module(fn: Any) -> str:
    """Return the name that a worker imports the function's module by, also of a running script."""
    if fn.__module__ != "__main__":
        return typing.cast("str", fn.__module__)
    main_module = sys.modules["__main__"]
    spec, path = getattr(main_module, "__spec__", None), getattr(main_module, "__file__", None)
    if spec:
        return typing.cast("str", spec.name)
    return os.path.splitext(os.path.basename(path))[0] if path else "__main__"


def _place(fn: Any) -> str:
    code = getattr(fn, "__code__", None)
    where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return f"{_real_module(fn)}.{getattr(fn, '__qualname__', repr(fn))}{where}"


def _is_reload(old: Any, new: Any) -> bool:
    """Return whether `new` is `old` read again: by reload(), as __main__ and as itself, or typed."""
    same = [_place(fn).partition(" (")[0] for fn in (old, new)]
    codes = [getattr(fn, "__code__", None) for fn in (old, new)]
    if same[0] != same[1] or not all(codes):
        return old is new
    specs = [fn.__globals__.get("__spec__") for fn in (old, new)]
    return (
        _place(old) == _place(new)
        or specs[0] is not specs[1]
        or all(code.co_filename.startswith("<") for code in codes)
    )


# --- 6. processing --------------------------------------------------------------------------------
# process() is the ONE place that decides what becomes of a message. It does no queue I/O: workers
# and Lambda apply the Outcome. Nothing that a message or a task does makes it raise, but for
# KeyboardInterrupt.


class Fate(enum.Enum):
    """What is to become of a message."""

    acknowledge = "acknowledge"  # it is done with: delete it
    retry = "retry"  # make it visible again
    dead_letter = "dead_letter"  # copy it to the dead-letter queue, then delete it


class Outcome(NamedTuple):
    """How a run ended."""

    fate: Fate
    error: BaseException | None = None
    #: seconds to the next run; None leaves it to the queue's visibility timeout
    delay_s: float | None = None


def process(received: QueueMessage) -> Outcome:
    """Run a received message through hooks, decoder and task, and decide what becomes of it."""
    try:
        _run(received)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        outcome = _verdict(received, error)
        _report(received, outcome)
        return outcome
    finally:
        _recycle_django_connections()
    return Outcome(Fate.acknowledge)


def _run(received: QueueMessage) -> None:
    _call_hook("TASKHAWK_PRE_PROCESS_HOOK", received)
    message = _decode(received.body)
    message.received = received
    _log.debug("Received message", extra={"message_body": received.body})
    task = message.task
    received.message = message  # from here on, an error is the task's
    try:
        message.call_task(received.receipt_handle)
    except IgnoreException:
        _log.info("%s %s: ignored", task.name, message.id)
    else:
        _log.debug("%s %s: done", task.name, message.id)
    _call_hook("TASKHAWK_POST_PROCESS_HOOK", received)


def _call_hook(name: str, received: QueueMessage) -> None:
    if hook := getattr(settings, name):
        hook(**received.hook_kwargs)


def _verdict(received: QueueMessage, error: BaseException) -> Outcome:
    """Decide what becomes of a message whose run raised."""
    task = received.message.task if received.message else None
    wanted = isinstance(error, RetryException)
    if isinstance(error, RetryException) and error.delay_seconds is not None:
        return Outcome(Fate.retry, error, error.delay_seconds)
    if task is None:
        return Outcome(Fate.retry, error)
    if isinstance(error, StopRetry) or not (wanted or task.retries(error)):
        return Outcome(Fate.dead_letter, error)
    if task.retry is None:
        return Outcome(Fate.retry, error)
    try:
        delay_s = task.retry(received.attempt)
        if not _is_number(delay_s) or not 0 <= delay_s < math.inf:
            raise ConfigurationError(
                f"{task.name}: retry: expected 0 or more seconds, got {delay_s!r}"
            )
    except StopRetry:
        return Outcome(Fate.dead_letter, error)
    except Exception as broken:
        broken.__context__ = error
        return Outcome(Fate.retry, broken)
    return Outcome(Fate.retry, error, delay_s)


def _report(received: QueueMessage, outcome: Outcome) -> None:
    """Log a failed run, and tell the error hook of what is logged as an error."""
    message, error = received.message, outcome.error
    what = f"{message.task_name} {message.id}" if message else f"message {received.message_id}"
    then = "goes to the dead letters"
    if outcome.fate is Fate.retry:
        then = "is left to the queue"
        if outcome.delay_s is not None:
            then = f"runs again in {outcome.delay_s:g} s"
    text, extra, trace = f"{what}: attempt {received.attempt} failed and {then}", {}, True
    if message is None and isinstance(error, ValidationError):
        if not (passed := _invalid_messages.passes(type(error), time.monotonic())):
            return
        text, trace = f"{what} is left to the queue: {error}{passed}", False
    elif isinstance(error, RetryException) and outcome.fate is Fate.retry:
        _log.info("%s: attempt %d asked to be retried and %s", what, received.attempt, then)
        return
    elif isinstance(error, LoggingException):
        text, extra = str(error), _log_extra(error.extra)
    _log.error("%s", text, exc_info=error if trace else None, extra=extra)
    _call_safely("TASKHAWK_ERROR_HOOK", exception=error, message=message)


def _call_safely(name: str, **kwargs: Any) -> None:
    """Call a hook whose failure is logged, no more."""
    try:
        if hook := getattr(settings, name):
            hook(**kwargs)
    except Exception:
        _log.exception("%s failed", name)


def _log_extra(extra: object) -> dict[str, Any]:
    """Rename what a log record has by itself: logging refuses such an `extra`."""
    taken = vars(logging.makeLogRecord({})).keys() | {"message", "asctime"}
    given = extra if isinstance(extra, Mapping) else {}
    return {f"extra_{key}" if key in taken else str(key): value for key, value in given.items()}


class _RateLimit:
    """Lets a record of each kind through once in `period_s`, and tells how many it held back."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._lock = threading.Lock()  # guards _last: a kind's last passing, and the held back
        self._last: dict[object, tuple[float, int]] = {}

    def passes(self, kind: object, now: float) -> str:
        """Return "" if the record is held back, else what to add to its text."""
        with self._lock:
            last, held_back = self._last.get(kind, (-math.inf, 0))
            if now - last < self._period_s:
                self._last[kind] = last, held_back + 1
                return ""
            self._last[kind] = now, 0
        return f" ({held_back} more like it since the last record)" if held_back else " "


_invalid_messages = _RateLimit(10)  # a poisoned queue must not fill the disk with logs


class _Backoff:
    """A retry policy: grows by factor and step, up to a ceiling, for so many retries."""

    def __init__(
        self,
        base_s: float,
        *,
        factor: float = 1,
        step_s: float = 0,
        max_retries: int | None,
        max_delay_s: float = math.inf,
        jitter: bool,
    ) -> None:
        for name, value in (("base_s", base_s), ("step_s", step_s), ("max_delay_s", max_delay_s)):
            if not _is_number(value) or not value >= 0:
                raise ConfigurationError(f"{name}: expected 0 or more seconds, got {value!r}")
        if not _is_number(factor) or not factor >= 1:
            raise ConfigurationError(f"factor: expected 1 or more, got {factor!r}")
        if max_retries is not None and (type(max_retries) is not int or max_retries < 0):
            raise ConfigurationError(f"max_retries: expected 0 or more, got {max_retries!r}")
        self.max_retries = max_retries
        self._base_s, self._factor, self._step_s = base_s, factor, step_s
        self._max_delay_s, self._jitter = max_delay_s, jitter

    def __call__(self, attempt: int) -> float:
        if self.max_retries is not None and attempt > self.max_retries:
            raise StopRetry(f"all {self.max_retries} retries are used up")
        try:
            delay_s = self._base_s * self._factor ** (attempt - 1) + self._step_s * (attempt - 1)
        except OverflowError:
            delay_s = math.inf
        delay_s = min(delay_s, self._max_delay_s, _MAX_VISIBLE_S)
        return _jittered(delay_s) if self._jitter else delay_s


def _jittered(delay_s: float) -> float:
    """Take between half of a delay and all of it, so that what failed together is spread out.

    https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/
    """
    import random

    return delay_s * random.uniform(0.5, 1)


def fixed(
    delay_s: float, max_retries: int | None = None, *, jitter: bool = True
) -> Callable[[int], float]:
    """Return a retry policy of equal delays.

    :param delay_s: seconds between a failed run and the next; with jitter, at least half of it
    :param max_retries: then the dead letters; None leaves that to the queue's maxReceiveCount
    """
    return _Backoff(delay_s, max_retries=max_retries, jitter=jitter)


def linear(
    base_s: float,
    step_s: float,
    max_retries: int | None = None,
    max_delay_s: float = 3600,
    *,
    jitter: bool = True,
) -> Callable[[int], float]:
    """Return a retry policy of delays that grow by `step_s` seconds; see :func:`fixed`."""
    return _Backoff(
        base_s, step_s=step_s, max_retries=max_retries, max_delay_s=max_delay_s, jitter=jitter
    )


def exponential(
    base_s: float = 1,
    factor: float = 2,
    max_retries: int | None = None,
    max_delay_s: float = 3600,
    *,
    jitter: bool = True,
) -> Callable[[int], float]:
    """Return a retry policy of delays that grow by `factor`; see :func:`fixed`."""
    return _Backoff(
        base_s, factor=factor, max_retries=max_retries, max_delay_s=max_delay_s, jitter=jitter
    )


_django_loops = threading.local()


def _recycle_django_connections() -> None:
    """Close this thread's database connections after so many runs, where Django is in use."""
    if "django.db" not in sys.modules or _django_settings() is None:
        return
    _django_loops.count = getattr(_django_loops, "count", 0) + 1
    if _django_loops.count < settings.TASKHAWK_MAX_DB_REUSE_LOOPS:
        return
    _django_loops.count = 0
    for connection in sys.modules["django.db"].connections.all(initialized_only=True):
        if not connection.in_atomic_block:  # sync mode inside a caller's transaction
            connection.close()


# --- 7. the broker contract -----------------------------------------------------------------------
# All the queue I/O that this library can do. A whole call that fails raises; an entry of a batch
# that fails is in the answer, and no answer is ever taken for success without its entry.


class Outgoing(NamedTuple):
    """A message to send; the attributes are as SQS writes them."""

    body: str
    attributes: Mapping[str, Mapping[str, Any]]
    delay_s: float = 0
    group_id: str | None = None
    deduplication_id: str | None = None

    def size(self) -> int:
        """Count the bytes as the service does: body, attribute names, types and values."""
        return len(self.body.encode()) + _attributes_size(self.attributes)


class Refusal(NamedTuple):
    """An entry of a batch call that failed."""

    index: int
    code: str
    text: str
    #: whether it would fail again: the entry is at fault, not the service
    final: bool


class QueueInfo(NamedTuple):
    """What a worker wants to know of a queue."""

    visibility_timeout_s: float
    dead_letter_queue: str | None
    max_receive_count: int | None


class Depth(NamedTuple):
    """How many messages a queue has; SQS says so approximately."""

    visible: int
    in_flight: int
    delayed: int


class Sender(abc.ABC):
    """What publishing needs of a service."""

    max_bytes: int
    max_delay_s: float

    @abc.abstractmethod
    def destination(self, priority: Priority) -> str:
        """Return the name of the queue or topic for messages of this priority."""

    @abc.abstractmethod
    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        """Send at most ten messages that are together within `max_bytes`."""

    @abc.abstractmethod
    def explain(self, error: BaseException, where: str) -> TaskhawkError | None:
        """Return one clear sentence for an error that only a person can mend, else None."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close connections."""


class Broker(Sender):
    """What workers and operations need of a service, besides; queues are called by name."""

    @abc.abstractmethod
    def receive(
        self,
        queue: str,
        max_messages: int,
        wait_s: float,
        visibility_timeout_s: float | None,
        stop: threading.Event,
    ) -> list[QueueMessage]:
        """Receive at most ten messages, waiting for the first; `stop` may cut the wait short."""

    @abc.abstractmethod
    def delete(self, queue: str, receipts: Sequence[str]) -> list[Refusal]:
        """Delete at most ten messages."""

    @abc.abstractmethod
    def change_visibility(self, queue: str, changes: Sequence[tuple[str, float]]) -> list[Refusal]:
        """Make at most ten messages (a receipt each) visible again so many seconds from now."""

    @abc.abstractmethod
    def info(self, queue: str) -> QueueInfo:
        """Describe a queue."""

    @abc.abstractmethod
    def depth(self, queue: str) -> Depth:
        """Count a queue's messages."""


class QueueMessage:
    """A received message, as the hooks get it: it reads and acts like boto3's ``sqs.Message``."""

    def __init__(
        self,
        body: str,
        message_id: str,
        receipt_handle: str | None = None,
        *,
        attributes: Mapping[str, str] | None = None,
        message_attributes: Mapping[str, Mapping[str, Any]] | None = None,
        queue: str | None = None,
        queue_url: str = "",
        broker: Broker | None = None,
        sns_record: Mapping[str, Any] | None = None,
    ) -> None:
        """Describe a message; `broker` is None where no queue has it."""
        self.body, self.message_id, self.receipt_handle = body, message_id, receipt_handle
        self.attributes, self.message_attributes = attributes or {}, message_attributes or {}
        self.queue, self.queue_url, self._broker = queue, queue_url, broker
        self._sns_record = sns_record
        #: the decoded message, once it is known to be valid and its task to be registered
        self.message: Message | None = None
        #: set by the worker
        self.lease_lost = False

    @property
    def attempt(self) -> int:
        """How often the message was received, from 1."""
        return int(self.attributes.get("ApproximateReceiveCount", 1))

    @property
    def group_id(self) -> str | None:
        """The message group, on FIFO and fair queues."""
        return self.attributes.get("MessageGroupId")

    @property
    def hook_kwargs(self) -> dict[str, Any]:
        """What the hooks before and after processing are called with."""
        if self._sns_record is not None:
            return {"sns_record": self._sns_record}
        return {"queue_name": self.queue, "sqs_queue_message": self}

    def delete(self) -> None:
        """Delete the message from its queue, at once."""
        if self._broker and self.queue and self.receipt_handle:
            _accepted(self._broker.delete(self.queue, [self.receipt_handle]))

    def change_visibility(self, *, VisibilityTimeout: float) -> None:  # noqa: N803 - boto3's name
        """Make the message visible again so many seconds from now."""
        if self._broker and self.queue and self.receipt_handle:
            change = (self.receipt_handle, VisibilityTimeout)
            _accepted(self._broker.change_visibility(self.queue, [change]))

    def copy(self, attributes: Mapping[str, Mapping[str, Any]]) -> Outgoing:
        """Return the message as it is sent to another queue.

        On FIFO queues it is deduplicated by its own MessageId: the body's id was seen before, and
        SQS would accept the copy and drop it.
        """
        fifo = bool(self.queue and self.queue.endswith(".fifo"))
        deduplication_id = self.message_id if fifo else None
        return Outgoing(self.body, attributes, 0, self.group_id, deduplication_id)


def _accepted(refusals: Sequence[Refusal]) -> None:
    for refusal in refusals:
        failed = [{"Id": str(refusal.index), "Code": refusal.code, "Message": refusal.text}]
        raise PartialFailure({"Successful": [], "Failed": failed})


def _refused_by(call: Callable[[], list[Refusal]], count: int) -> list[Refusal]:
    """Make a batch call; one that fails as a whole has refused each of its entries, for now."""
    try:
        return call()
    except Exception as error:
        refusal = Refusal(0, _error_code(error), str(error), final=False)
        return [refusal._replace(index=index) for index in range(count)]


def _error_code(error: BaseException) -> str:
    response = getattr(error, "response", None) or {}
    code = response.get("Error", {}).get("Code") or type(error).__name__
    return str(code).rpartition(".")[2]


def _attributes_size(attributes: Mapping[str, Mapping[str, Any]]) -> int:
    size = 0
    for name, value in attributes.items():
        content = value.get("StringValue") or value.get("BinaryValue") or ""
        encoded = content.encode() if isinstance(content, str) else content
        size += len(name.encode()) + len(value["DataType"].encode()) + len(encoded)
    return size


def _chunks(entries: Iterable[Outgoing], max_bytes: int) -> Iterator[list[Outgoing]]:
    """Cut a stream into what batch calls take: ten entries, within the limit of their sum."""
    chunk: list[Outgoing] = []
    total = 0
    for entry in entries:
        size = entry.size()
        if chunk and (len(chunk) == _MAX_BATCH or total + size > max_bytes):
            yield chunk
            chunk, total = [], 0
        chunk.append(entry)
        total += size
    if chunk:
        yield chunk


class _Brokers:
    """The one sender and the one broker of this process, made at their first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held while one is made, so that there is never a second
        self._made: dict[str, Sender] = {}

    def sender(self) -> Sender:
        """Return what publishes: SNS for a Lambda app, else the broker."""
        if settings.IS_LAMBDA_APP and settings.TASKHAWK_BROKER == "sqs":
            return self._get("sns", SnsSender)
        return self.broker()

    def broker(self) -> Broker:
        """Return the broker that TASKHAWK_BROKER names."""
        url = settings.TASKHAWK_BROKER
        make = SqsBroker if url == "sqs" else functools.partial(SqliteBroker, url)
        return typing.cast("Broker", self._get(url, make))

    def _get(self, key: str, make: Callable[[], Sender]) -> Sender:
        if key not in self._made:
            with self._lock:
                if key not in self._made:
                    self._made[key] = make()
        return self._made[key]

    def close(self) -> None:
        """Close all; the next use makes them anew."""
        with self._lock:
            made, self._made = self._made, {}
        for sender in made.values():
            sender.close()

    def after_fork(self) -> None:
        """Begin anew in a forked child, which must not touch its parent's connections.

        They are kept, unused: closing them here would disturb the parent's.
        """
        _inherited.append(self._made)
        self.__init__()  # type: ignore[misc]


_inherited: list[object] = []
_brokers = _Brokers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_brokers.after_fork)


# --- 8. SQS and SNS -------------------------------------------------------------------------------
# Every AWS call of this library. botocore does credentials, signing, endpoints and, for sends, the
# retries; their number is always set, for a receive that botocore retries in secret strands what
# the lost answer held.

_SUFFIXES = {
    Priority.default: "",
    Priority.high: "-high-priority",
    Priority.low: "-low-priority",
    Priority.bulk: "-bulk",
}
_REMEDIES = {  # by the error's code, without its prefix
    "NonExistentQueue": "there is no such queue here: make it, or check TASKHAWK_QUEUE,"
    " AWS_REGION and the account",
    "NotFound": "there is no such topic: make it, or check TASKHAWK_QUEUE and AWS_ACCOUNT_ID",
    "AccessDenied": "access denied: the IAM policy of these credentials does not allow it",
    "NoCredentialsError": "no AWS credentials: set AWS_ACCESS_KEY and AWS_SECRET_KEY, or give"
    " botocore a profile or role; to try things out without AWS, set TASKHAWK_BROKER to"
    " sqlite:///queue.db",
    "NoRegionError": "no AWS region: set AWS_REGION, for example eu-west-1",
    "InvalidClientTokenId": "AWS does not know these credentials: check AWS_ACCESS_KEY",
    "SignatureDoesNotMatch": "AWS refuses these credentials: check AWS_SECRET_KEY",
}
_REMEDIES |= {
    "QueueDoesNotExist": _REMEDIES["NonExistentQueue"],
    "AccessDeniedException": _REMEDIES["AccessDenied"],
    "AuthorizationError": _REMEDIES["AccessDenied"],
    "PartialCredentialsError": _REMEDIES["NoCredentialsError"],
    "UnrecognizedClientException": _REMEDIES["InvalidClientTokenId"],
    "InvalidAccessKeyId": _REMEDIES["InvalidClientTokenId"],
    "InvalidSecurity": _REMEDIES["InvalidClientTokenId"],
}


class _AwsSender(Sender):
    """What SQS and SNS share: clients, and the answers of batch calls."""

    service: str

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held while a client is made: sessions are not thread-safe
        self._session: Any = None
        self._clients: dict[str, Any] = {}

    def client(self, role: str) -> Any:
        """Return the client for "send", "poll" or "keep", which differ in timeouts and retries."""
        if role not in self._clients:
            with self._lock:
                if role not in self._clients:
                    self._clients[role] = self._make_client(role)
        return self._clients[role]

    def _make_client(self, role: str) -> Any:
        from botocore.config import Config
        from botocore.session import get_session

        read_s = settings.AWS_READ_TIMEOUT_S + (_LONG_POLL_S if role == "poll" else 0)
        config = Config(
            connect_timeout=settings.AWS_CONNECT_TIMEOUT_S,
            read_timeout=read_s,
            max_pool_connections=50,  # threads share a client; a connection each, or they queue
            retries={"mode": "standard", "total_max_attempts": 3 if role == "send" else 1},
        )
        self._session = self._session or get_session()
        return self._session.create_client(
            self.service,
            region_name=settings.AWS_REGION,
            endpoint_url=getattr(settings, f"AWS_ENDPOINT_{self.service.upper()}"),
            config=config,
            **settings.credentials(),
        )

    def explain(self, error: BaseException, where: str) -> TaskhawkError | None:
        """Name what to mend."""
        text = str(error)
        if limit := re.search(r"shorter than (\d+) bytes", text):
            text = f"{where} takes messages of at most {limit[1]} bytes"
            return MessageTooLarge(text, int(limit[1]))
        code = _error_code(error)
        if remedy := _REMEDIES.get(code):
            return ConfigurationError(f"{where}: {remedy} ({code})")
        return None

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            client.close()


def _refusals(response: Mapping[str, Any], count: int) -> list[Refusal]:
    """Read a batch call's answer; an entry that it does not name has failed."""
    done = {entry["Id"] for entry in response.get("Successful", ())}
    failed = {entry["Id"]: entry for entry in response.get("Failed", ())}
    unnamed = {"Code": "Unanswered", "Message": "the answer does not name this entry"}
    entries = ((i, failed.get(str(i), unnamed)) for i in range(count) if str(i) not in done)
    return [
        Refusal(i, e["Code"], e.get("Message", ""), bool(e.get("SenderFault"))) for i, e in entries
    ]


def _halved(
    send: Callable[[Sequence[Outgoing]], list[Refusal]], entries: Sequence[Outgoing]
) -> list[Refusal]:
    """Send a batch; where the service finds the sum too long, as two."""
    try:
        return send(entries)
    except Exception as error:
        if _error_code(error) != "BatchRequestTooLong" or len(entries) == 1:
            raise
    middle = len(entries) // 2
    second = (r._replace(index=r.index + middle) for r in _halved(send, entries[middle:]))
    return [*_halved(send, entries[:middle]), *second]


class SnsSender(_AwsSender):
    """Publishes to the topics that a Lambda app's functions are subscribed to."""

    service = "sns"
    max_bytes = _MAX_SNS_BYTES
    max_delay_s = 0

    def destination(self, priority: Priority) -> str:
        """Return the topic's ARN."""
        client = self.client("send")
        partition = client.meta.partition
        account, name = settings.require("AWS_ACCOUNT_ID"), settings.require("TASKHAWK_QUEUE")
        topic = f"taskhawk-{name.lower()}{_SUFFIXES[priority]}"
        return f"arn:{partition}:sns:{client.meta.region_name}:{account}:{topic}"

    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        """Publish (https://docs.aws.amazon.com/sns/latest/api/API_PublishBatch.html)."""
        calls = [{"Message": e.body, "MessageAttributes": e.attributes} for e in entries]
        if len(calls) == 1:
            self.client("send").publish(TopicArn=destination, **calls[0])
            return []
        return _halved(functools.partial(self._send_batch, destination), entries)

    def _send_batch(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        response = self.client("send").publish_batch(
            TopicArn=destination,
            PublishBatchRequestEntries=[
                {"Id": str(i), "Message": e.body, "MessageAttributes": e.attributes}
                for i, e in enumerate(entries)
            ],
        )
        return _refusals(response, len(entries))


class SqsBroker(_AwsSender, Broker):
    """Queues on SQS, which are looked up once."""

    service = "sqs"
    max_bytes = _MAX_SQS_BYTES
    max_delay_s = _MAX_DELAY_S

    def __init__(self) -> None:
        """Make no connection yet."""
        super().__init__()
        self._urls: dict[str, str] = {}
        self._infos: dict[str, QueueInfo] = {}

    def destination(self, priority: Priority) -> str:
        """Return the queue's name."""
        return _queue_name(priority)

    def url(self, queue: str, role: str = "send") -> str:
        """Look up a queue's URL, once."""
        if queue not in self._urls:
            self._urls[queue] = self.client(role).get_queue_url(QueueName=queue)["QueueUrl"]
        return self._urls[queue]

    def url_from_arn(self, arn: str) -> str:
        """Make a queue's URL from its ARN and remember it: a Lambda's role may not look it up.

        :returns: the queue's name
        """
        account, queue = arn.split(":")[4:6]
        self._urls.setdefault(queue, f"{self.client('keep').meta.endpoint_url}/{account}/{queue}")
        return queue

    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        """Send (https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference)."""
        if len(entries) == 1:
            self.client("send").send_message(
                QueueUrl=self.url(destination), **self._send_arguments(entries[0])
            )
            return []
        return _halved(functools.partial(self._send_batch, destination), entries)

    def _send_batch(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        calls = [{"Id": str(i), **self._send_arguments(e)} for i, e in enumerate(entries)]
        response = self.client("send").send_message_batch(
            QueueUrl=self.url(destination), Entries=calls
        )
        return _refusals(response, len(calls))

    @staticmethod
    def _send_arguments(entry: Outgoing) -> dict[str, Any]:
        optional = {
            "MessageAttributes": entry.attributes,
            "DelaySeconds": math.ceil(entry.delay_s),
            "MessageGroupId": entry.group_id,
            "MessageDeduplicationId": entry.deduplication_id,
        }
        return {"MessageBody": entry.body, **{k: v for k, v in optional.items() if v}}

    def receive(
        self,
        queue: str,
        max_messages: int,
        wait_s: float,
        visibility_timeout_s: float | None,
        stop: threading.Event,  # noqa: ARG002 - a poll is waited out: its answer may hold messages
    ) -> list[QueueMessage]:
        """Poll once, for at most 20 s."""
        timeout: dict[str, int] = {}
        if visibility_timeout_s is not None:
            timeout = {"VisibilityTimeout": math.ceil(visibility_timeout_s)}
        url = self.url(queue, "poll")
        response = self.client("poll").receive_message(
            QueueUrl=url,
            MaxNumberOfMessages=min(max_messages, _MAX_BATCH),
            WaitTimeSeconds=min(math.ceil(wait_s), _LONG_POLL_S),
            MessageAttributeNames=["All"],
            MessageSystemAttributeNames=[
                "ApproximateReceiveCount",
                "SentTimestamp",
                "MessageGroupId",
            ],
            **timeout,
        )
        return [
            QueueMessage(
                message["Body"],
                message["MessageId"],
                message["ReceiptHandle"],
                attributes=message.get("Attributes"),
                message_attributes=message.get("MessageAttributes"),
                queue=queue,
                queue_url=url,
                broker=self,
            )
            for message in response.get("Messages", ())
        ]

    def delete(self, queue: str, receipts: Sequence[str]) -> list[Refusal]:
        """Delete; on a standard queue, a stale receipt is no error to SQS."""
        response = self.client("keep").delete_message_batch(
            QueueUrl=self.url(queue, "keep"),
            Entries=[{"Id": str(i), "ReceiptHandle": r} for i, r in enumerate(receipts)],
        )
        return _refusals(response, len(receipts))

    def change_visibility(self, queue: str, changes: Sequence[tuple[str, float]]) -> list[Refusal]:
        """Change the visibility timeouts; SQS has whole seconds."""
        response = self.client("keep").change_message_visibility_batch(
            QueueUrl=self.url(queue, "keep"),
            Entries=[
                {"Id": str(i), "ReceiptHandle": r, "VisibilityTimeout": math.ceil(s)}
                for i, (r, s) in enumerate(changes)
            ],
        )
        return _refusals(response, len(changes))

    def info(self, queue: str) -> QueueInfo:
        """Read the queue's attributes, once."""
        if queue not in self._infos:
            found = self._attributes(queue, ["VisibilityTimeout", "RedrivePolicy"])
            redrive = json.loads(found.get("RedrivePolicy") or "{}")
            target, count = redrive.get("deadLetterTargetArn"), redrive.get("maxReceiveCount")
            self._infos[queue] = QueueInfo(
                visibility_timeout_s=float(found["VisibilityTimeout"]),
                dead_letter_queue=target.rpartition(":")[2] if target else None,
                max_receive_count=int(count) if count else None,
            )
        return self._infos[queue]

    def depth(self, queue: str) -> Depth:
        """Read the approximate numbers of messages."""
        names = [f"ApproximateNumberOfMessages{kind}" for kind in ("", "NotVisible", "Delayed")]
        found = self._attributes(queue, names)
        return Depth(*(int(found[name]) for name in names))

    def _attributes(self, queue: str, names: Sequence[str]) -> dict[str, str]:
        response = self.client("send").get_queue_attributes(
            QueueUrl=self.url(queue), AttributeNames=names
        )
        return typing.cast("dict[str, str]", response["Attributes"])


def _queue_name(priority: Priority) -> str:
    name = settings.TASKHAWK_QUEUE
    if name is None and settings.TASKHAWK_BROKER != "sqs":
        name = "default"  # the embedded broker needs no names to be kept apart
    return f"TASKHAWK-{name or settings.require('TASKHAWK_QUEUE')}{_SUFFIXES[priority]}".upper()


# --- 9. SQLite ------------------------------------------------------------------------------------
# The embedded broker, with the semantics of SQS, for any number of processes on one machine. Every
# change is one transaction that is on the disk (synchronous=FULL) before the call returns.

_OLDEST_SQLITE = (3, 35, 0)  # UPDATE … RETURNING
_SQLITE_SCHEMA = """
CREATE TABLE IF NOT EXISTS message (
    id INTEGER PRIMARY KEY AUTOINCREMENT, -- a receipt names it: never used again
    queue TEXT NOT NULL,
    message_id TEXT NOT NULL,
    body TEXT NOT NULL,
    attributes TEXT NOT NULL,
    sent_ms INTEGER NOT NULL,
    visible_ms INTEGER NOT NULL,
    receive_count INTEGER NOT NULL DEFAULT 0,
    receipt TEXT
);
CREATE INDEX IF NOT EXISTS message_visible ON message (queue, visible_ms);
PRAGMA user_version = 1;
"""


def _parse_sqlite_url(url: str) -> tuple[str, dict[str, float]]:
    from urllib.parse import parse_qsl, unquote, urlsplit

    parts = urlsplit(url)
    options: dict[str, float] = {"visibility_timeout_s": _DEFAULT_LEASE_S, "max_receive_count": 5}
    rules: dict[str, Callable[[object], float]] = {
        "visibility_timeout_s": _seconds,
        "max_receive_count": _count,
    }
    try:
        for name, value in parse_qsl(parts.query, keep_blank_values=True):
            options[name] = rules[name](value)
        if parts.netloc:
            raise ValueError
    except (KeyError, ValueError) as error:
        raise ConfigurationError(
            "TASKHAWK_BROKER: expected sqlite:///relative.db or sqlite:////absolute.db, then perhaps"
            f" ?visibility_timeout_s=30&max_receive_count=5, got {url!r}"
        ) from error
    path = unquote(parts.path[1:])
    return os.path.abspath(path) if path else "", options


class SqliteBroker(Broker):
    """Queues in a file; or in memory, for the tests of one process."""

    max_bytes = _MAX_SQS_BYTES  # as on SQS, so that what works here works there
    max_delay_s = math.inf
    _memory_pid: int | None = None

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        """Open the file, and make it if it is not there.

        :param url: ``sqlite:///relative.db``, ``sqlite:////absolute.db`` or ``sqlite://`` (memory);
            ``?visibility_timeout_s=30&max_receive_count=5``
        :raises ConfigurationError: if the URL or the file is not usable
        """
        self._url, self._clock = url, clock
        self._path, options = _parse_sqlite_url(url)
        self._visibility_timeout_s = options["visibility_timeout_s"]
        self._max_receive_count = int(options["max_receive_count"])
        self._lock = threading.Lock()  # held while a thread uses the connection, one at a time
        self._commits = 0  # of this process: data_version tells of the others' only
        self._looked: dict[str, tuple[tuple[int, int], float]] = {}
        self._db = self._open()

    def _open(self) -> Any:
        import sqlite3

        if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
            raise ConfigurationError(
                f"SQLite {sqlite3.sqlite_version} is too old: expected 3.35.0 or newer"
            )
        if not self._path:
            pid = SqliteBroker._memory_pid = SqliteBroker._memory_pid or os.getpid()
            if pid != os.getpid():
                raise ConfigurationError(
                    "sqlite:// is the memory of one process, and this is another:"
                    " use a file, such as sqlite:///queue.db"
                )
        try:
            db = sqlite3.connect(
                self._path or ":memory:", timeout=30, isolation_level=None, check_same_thread=False
            )
            try:
                return self._prepare(db)
            except BaseException:
                db.close()
                raise
        except sqlite3.Error as error:
            raise ConfigurationError(
                f"TASKHAWK_BROKER: can't open {self._path or 'memory'}: {error}"
            ) from error

    def _prepare(self, db: Any) -> Any:
        # Turning to WAL needs the file for itself, and does not wait for it: take the lock first.
        deadline = time.monotonic() + 30
        while True:
            try:
                mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                break
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if mode not in ("wal", "memory"):
            raise ConfigurationError(
                f"TASKHAWK_BROKER: {self._path} can't have a write-ahead log ({mode}):"
                " it must be on a local disk"
            )
        db.execute("PRAGMA synchronous = FULL")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, 1):
            raise ConfigurationError(
                f"TASKHAWK_BROKER: {self._path} has version {version}: expected 1"
            )
        if version == 0:
            db.executescript(f"BEGIN IMMEDIATE; {_SQLITE_SCHEMA} COMMIT;")
        return db

    def destination(self, priority: Priority) -> str:
        """Return the queue's name."""
        return _queue_name(priority)

    def explain(self, error: BaseException, where: str) -> TaskhawkError | None:  # noqa: ARG002
        """Every error of SQLite is one to wait out, such as a full disk."""
        return None

    def close(self) -> None:
        """Close the file; what is in memory is gone."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        """Hold the lock and the file's write lock; all or nothing is written."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            self._commits += 1

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    def send(self, destination: str, entries: Sequence[Outgoing]) -> list[Refusal]:
        """Write the messages in one transaction."""
        now = self._now_ms()
        rows = [
            (
                destination,
                str(uuid.uuid4()),
                entry.body,
                json.dumps(entry.attributes),
                now,
                now + math.ceil(entry.delay_s * 1000),
            )
            for entry in entries
        ]
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO message (queue, message_id, body, attributes, sent_ms, visible_ms)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                rows,
            )
        return []

    def receive(
        self,
        queue: str,
        max_messages: int,
        wait_s: float,
        visibility_timeout_s: float | None,
        stop: threading.Event,
    ) -> list[QueueMessage]:
        """Claim messages; wait for the first without holding any lock."""
        lease_s = (
            self._visibility_timeout_s if visibility_timeout_s is None else visibility_timeout_s
        )
        deadline = time.monotonic() + wait_s
        while True:
            seen, next_ms = self._look(queue)
            if next_ms <= self._now_ms():
                claimed = self._claim(queue, min(max_messages, _MAX_BATCH), lease_s)
                if claimed:
                    return claimed
            pause_s = 0.002
            while True:
                if time.monotonic() >= deadline or stop.wait(pause_s):
                    return []
                if self._look(queue) != (seen, next_ms) or self._now_ms() >= next_ms:
                    break
                pause_s = min(pause_s * 2, 0.05)  # twenty looks a second cost next to nothing

    def _look(self, queue: str) -> tuple[tuple[int, int], float]:
        """Return the file's version, and when the queue's next message is visible."""
        with self._lock:
            version = self._commits, self._db.execute("PRAGMA data_version").fetchone()[0]
            if self._looked.get(queue, (None,))[0] != version:
                (next_ms,) = self._db.execute(
                    "SELECT min(visible_ms) FROM message WHERE queue = ?", (queue,)
                ).fetchone()
                self._looked[queue] = version, math.inf if next_ms is None else next_ms
            return self._looked[queue]

    def _claim(self, queue: str, count: int, lease_s: float) -> list[QueueMessage]:
        now = self._now_ms()
        with self._transaction() as db:
            if not queue.endswith("-DLQ"):
                db.execute(
                    "UPDATE message SET queue = queue || '-DLQ', receive_count = 0, receipt = NULL"
                    " WHERE queue = ? AND visible_ms <= ? AND receive_count >= ?",
                    (queue, now, self._max_receive_count),
                )
            rows = db.execute(
                "UPDATE message SET receive_count = receive_count + 1, visible_ms = ?,"
                " receipt = id || '-' || hex(randomblob(16)) WHERE id IN (SELECT id FROM message"
                " WHERE queue = ? AND visible_ms <= ? ORDER BY visible_ms, id LIMIT ?)"
                " RETURNING id, message_id, body, attributes, sent_ms, receive_count, receipt",
                (now + math.ceil(lease_s * 1000), queue, now, count),
            ).fetchall()
        return [self._received(queue, *row) for _, *row in sorted(rows)]

    def _received(
        self, queue: str, message_id: str, body: str, attributes: str, *rest: Any
    ) -> QueueMessage:
        sent_ms, receive_count, receipt = rest
        system = {"ApproximateReceiveCount": str(receive_count), "SentTimestamp": str(sent_ms)}
        return QueueMessage(
            body,
            message_id,
            receipt,
            attributes=system,
            message_attributes=json.loads(attributes),
            queue=queue,
            queue_url=self._url,
            broker=self,
        )

    def delete(self, queue: str, receipts: Sequence[str]) -> list[Refusal]:
        """Delete; what was deleted before is no error, what another has received since is."""
        return self._change(
            "DELETE FROM message WHERE id = CAST(:receipt AS INTEGER) AND receipt = :receipt",
            "SELECT 1 FROM message WHERE id = CAST(:receipt AS INTEGER)",
            [{"receipt": receipt} for receipt in receipts],
        )

    def change_visibility(self, queue: str, changes: Sequence[tuple[str, float]]) -> list[Refusal]:
        """Change when messages are visible again, while they are in flight."""
        now = self._now_ms()
        return self._change(
            "UPDATE message SET visible_ms = :until WHERE id = CAST(:receipt AS INTEGER)"
            " AND receipt = :receipt AND visible_ms > :now",
            "SELECT 1",
            [{"receipt": r, "until": now + math.ceil(s * 1000), "now": now} for r, s in changes],
        )

    def _change(self, change: str, refused: str, rows: Sequence[dict[str, Any]]) -> list[Refusal]:
        """Make each change; where it meets no row, `refused` says whether that is an error."""
        refusals = []
        with self._transaction() as db:
            for index, row in enumerate(rows):
                if not db.execute(change, row).rowcount and db.execute(refused, row).fetchone():
                    text = "the message is no longer in flight, or was received again"
                    refusals.append(Refusal(index, "ReceiptHandleIsInvalid", text, final=True))
        return refusals

    def info(self, queue: str) -> QueueInfo:
        """Tell what the URL says."""
        if queue.endswith("-DLQ"):
            return QueueInfo(self._visibility_timeout_s, None, None)
        return QueueInfo(self._visibility_timeout_s, f"{queue}-DLQ", self._max_receive_count)

    def depth(self, queue: str) -> Depth:
        """Count the rows."""
        now = self._now_ms()
        with self._lock:
            row = self._db.execute(
                "SELECT count(*) FILTER (WHERE visible_ms <= ?),"
                " count(*) FILTER (WHERE visible_ms > ? AND receipt IS NOT NULL),"
                " count(*) FILTER (WHERE visible_ms > ? AND receipt IS NULL)"
                " FROM message WHERE queue = ?",
                (now, now, now, queue),
            ).fetchone()
        return Depth(*row)


# --- 10. publishing -------------------------------------------------------------------------------
# Nothing leaves that decode() would refuse or the service can't hold, and what was not accepted
# raises: after dispatch() returned, the message is in the queue's keeping.

_ATTRIBUTE_NAME = re.compile(
    r"(?!(?i:aws|amazon|taskhawk)\.)(?!\.)(?!.*\.\.)[A-Za-z0-9_.-]{1,256}(?<!\.)"
)
_ATTRIBUTE_TEXT = re.compile("[\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]+")


def _attributes(headers: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Make message attributes of the headers that can be: the rest is in the body alone."""
    texts = ((name, str(value)) for name, value in headers.items())
    fit = (
        (name, {"DataType": "String", "StringValue": text})
        for name, text in texts
        if _ATTRIBUTE_NAME.fullmatch(name) and _ATTRIBUTE_TEXT.fullmatch(text)
    )
    return dict(itertools.islice(fit, _MAX_ATTRIBUTES))


class _Ready(NamedTuple):
    """A message that was checked and encoded, and where it goes."""

    message: Message
    destination: str
    entry: Outgoing


def _prepare(message: Message) -> _Ready:
    body = _encode(message)
    if settings.TASKHAWK_SYNC:
        return _Ready(message, "", Outgoing(body, {}))
    sender = _brokers.sender()
    entry = Outgoing(body, _attributes(message.headers), message.delay_s)
    if entry.delay_s > sender.max_delay_s:
        longest = f"at most {sender.max_delay_s:g} s" if sender.max_delay_s else "no delay (SNS)"
        raise ConfigurationError(
            f"{message.task_name}: the queue can hold a message back for {longest},"
            f" got {entry.delay_s:g} s"
        )
    if entry.size() > sender.max_bytes:
        raise _too_large(message, entry.size(), sender.max_bytes)
    with _explained(sender, message.task_name):
        return _Ready(message, sender.destination(message.priority), entry)


def _too_large(message: Message, size: int, limit: int) -> MessageTooLarge:
    sizes = {path: len(_encode_one(message, path, value)) for path, value in _leaves(message)}
    largest = max(sizes, key=sizes.__getitem__, default="its name")
    return MessageTooLarge(
        f"{message.task_name}: the message has {size} bytes (body and attributes), and the limit is"
        f" {limit}: the largest argument is {largest} with {sizes.get(largest, 0)} bytes",
        limit,
    )


@contextlib.contextmanager
def _explained(sender: Sender, where: str) -> Iterator[None]:
    """Turn the errors that a person must mend into a sentence that says how."""
    try:
        yield
    except Exception as error:
        if explained := sender.explain(error, where):
            raise explained from error
        raise


def publish(message: Message) -> str:
    """Send a message, or add it to the :func:`batch` around this call.

    :returns: the message's id
    :raises TaskhawkError: as :meth:`AsyncInvocation.dispatch`
    """
    ready = _prepare(message)
    open_batch = _open_batch.get()
    if open_batch is None or not open_batch.add(ready):
        _publish_one(ready)
    return typing.cast("str", message.id)


def _publish_one(ready: _Ready) -> None:
    if settings.TASKHAWK_SYNC:
        _run_now(ready)
        return
    sender = _brokers.sender()
    try:
        with _explained(sender, ready.destination):
            sender.send(ready.destination, [ready.entry])
    except MessageTooLarge as error:  # a queue whose limit is lower than the service's
        raise _too_large(ready.message, ready.entry.size(), error.limit) from error
    _log.debug("Sent message", extra={"message_body": ready.entry.body})


def _run_now(ready: _Ready) -> None:
    """Run a message in sync mode: through JSON, decoder and hooks, and its errors are raised."""
    body, message = ready.entry.body, ready.message
    record = {"Sns": {"Message": body, "MessageId": message.id, "MessageAttributes": {}}}
    queue = _queue_name(message.priority) if settings.TASKHAWK_QUEUE else "TASKHAWK-SYNC"
    sns_record = record if settings.IS_LAMBDA_APP else None
    _run(QueueMessage(body, message.id, queue=queue, sns_record=sns_record))


class _Batch:
    """The messages that are collected while a ``with batch():`` block runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held to add and to close: nothing is added to a closed one
        self._ready: list[_Ready] | None = []

    def add(self, ready: _Ready) -> bool:
        """Add a message; False where the block has ended."""
        with self._lock:
            if self._ready is None:
                return False
            self._ready.append(ready)
            return True

    def close(self) -> list[_Ready]:
        """Take the messages out; from now on, nothing is added."""
        with self._lock:
            ready, self._ready = self._ready or [], None
            return ready

    @property
    def is_open(self) -> bool:
        """Whether the block still runs."""
        return self._ready is not None


_open_batch: contextvars.ContextVar[_Batch | None] = contextvars.ContextVar("batch", default=None)


@contextlib.contextmanager
def batch() -> Iterator[None]:
    """Collect dispatches, and send them ten to a request when the block ends.

    An exception inside sends nothing. A block inside another joins it. What threads dispatch is
    sent directly, unless they run in this context; so is what a task dispatches after the end.

    :raises PartialFailure: on exit, with exactly the messages that were not accepted
    """
    outer = _open_batch.get()
    if outer is not None and outer.is_open:
        yield
        return
    mine = _Batch()
    token = _open_batch.set(mine)
    try:
        yield
    except BaseException:
        mine.close()
        raise
    finally:
        _open_batch.reset(token)
    _publish_all(mine.close())


class _Unsent(NamedTuple):
    ready: _Ready
    code: str
    text: str


def _publish_all(readies: Sequence[_Ready]) -> None:
    """Send messages of any priorities.

    :raises PartialFailure: if some were not accepted
    """
    if settings.TASKHAWK_SYNC:
        for ready in readies:
            _run_now(ready)
        return
    sender = _brokers.sender()
    groups: dict[str, list[_Ready]] = {}
    for ready in readies:
        groups.setdefault(ready.destination, []).append(ready)
    unsent = [u for group in groups.values() for u in _send_group(sender, group)]
    if not unsent:
        return
    failed = {id(u.ready): u for u in unsent}

    raise PartialFailure(
        {
            "Successful": [{"Id": r.message.id} for r in readies if id(r) not in failed],
            "Failed": [
                {"Id": r.message.id, "Code": failed[id(r)].code, "Message": failed[id(r)].text}
                for r in readies
                if id(r) in failed
            ],
        },
        unsent=[ready.message for ready in readies if id(ready) in failed],
    )


def _send_group(sender: Sender, group: Sequence[_Ready]) -> Iterator[_Unsent]:
    """Send to one destination; after a call that fails as a whole, the rest of it stays unsent."""
    position = 0
    for chunk in _chunks((ready.entry for ready in group), sender.max_bytes):
        mine = group[position : position + len(chunk)]
        try:
            refusals = _send_chunk(sender, group[0].destination, chunk)
        except Exception as error:
            text = str(sender.explain(error, group[0].destination) or error)
            yield from (_Unsent(ready, _error_code(error), text) for ready in group[position:])
            return
        yield from (_Unsent(mine[r.index], r.code, r.text) for r in refusals)
        position += len(chunk)


def _send_chunk(sender: Sender, destination: str, chunk: Sequence[Outgoing]) -> list[Refusal]:
    """Send one batch call's worth, and what the service failed at twice more."""
    indexes = list(range(len(chunk)))
    final: list[Refusal] = []
    for pause_s in (0.1, 0.3, None):
        refusals = sender.send(destination, [chunk[i] for i in indexes])
        refusals = [refusal._replace(index=indexes[refusal.index]) for refusal in refusals]
        final += [refusal for refusal in refusals if refusal.final or pause_s is None]
        indexes = [refusal.index for refusal in refusals if not refusal.final]
        if not indexes or pause_s is None:
            break
        time.sleep(_jittered(pause_s))
    return final


def _dead_letter_copy(received: QueueMessage, error: BaseException | None, limit: int) -> Outgoing:
    """Return the copy for the dead-letter queue, which says in ONE attribute why it is there.

    Attributes that were headers give way to it, where there are too many: the body has them.
    """
    import socket

    record = {
        "type": type(error).__name__,
        "message": str(error)[:1000],
        "traceback": "".join(traceback.format_exception(error))[-_MAX_ERROR_BYTES // 2 :],
        "attempt": received.attempt,
        "worker": f"{socket.gethostname()}:{os.getpid()}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    room = min(_MAX_ERROR_BYTES, limit - len(received.body.encode())) - 100
    while len(text := json.dumps(record)) > room and record["traceback"]:
        record["traceback"] = record["traceback"][len(text) - room :]
    attributes: dict[str, Mapping[str, Any]] = {}
    if len(text) <= room:
        attributes[_ERROR_ATTRIBUTE] = {"DataType": "String", "StringValue": text}
    for name, value in received.message_attributes.items():
        more = {**attributes, name: value}
        fits = received.copy(more).size() <= limit and len(more) <= _MAX_ATTRIBUTES
        if fits and name != _ERROR_ATTRIBUTE:
            attributes = more
    return received.copy(attributes)


# --- 11. the worker -------------------------------------------------------------------------------
# Every thread of this file. Pollers receive, the calling thread runs tasks, and one keeper alone
# changes messages on the queue: so an extension under way never undoes a delay or a delete. They
# share the fields below under one condition; Worker.run() has the shutdown order.

_STEPS = {  # the allowed steps of a message; nothing else moves one
    "received": {"started", "released"},
    "started": {"finished"},
    "finished": {"acked", "retried", "dead_lettered", "uncertain"},
}
_TICK_S = 0.2  # how soon the keeper sees a signal or a shutdown_event
_ACK_WAIT_S = 0.05  # how long an acknowledgement waits for others to share its call
_MAX_BACKOFF_S = 60  # between receives that fail


@dataclasses.dataclass
class Ledger:
    """How many messages a worker received, and what became of them."""

    received: int = 0
    acked: int = 0
    retried: int = 0
    dead_lettered: int = 0
    released: int = 0
    uncertain: int = 0

    @property
    def balanced(self) -> bool:
        """Whether every message that was received ended in exactly one way."""
        ends = self.acked + self.retried + self.dead_lettered + self.released + self.uncertain
        return self.received == ends

    def __str__(self) -> str:
        names = (field.name for field in dataclasses.fields(self))
        return ", ".join(f"{getattr(self, name)} {name.replace('_', '-')}" for name in names)


class _Held:
    """A message that the worker holds, from its receive to its end."""

    def __init__(self, message: QueueMessage, now: float, lease_s: float) -> None:
        self.message, self.state = message, "received"
        self.last_at = now + _MAX_VISIBLE_S  # SQS extends no lease beyond
        self.lease_until = now + lease_s
        self.renew_at = now + lease_s / 3
        self.end = ""  # what it becomes once the change below is made
        self.visible_in_s: float | None = None  # None: to be deleted
        self.due_at = math.inf  # when the keeper may make the change
        self.tries = 0

    @property
    def receipt(self) -> str:
        return self.message.receipt_handle or ""


class Worker:
    """Runs the messages of some queues, highest priority first, until it is stopped."""

    def __init__(
        self,
        broker: Broker,
        queues: Sequence[str],
        *,
        num_messages: int = 1,
        visibility_timeout_s: float | None = None,
        loop_count: int | None = None,
        shutdown_event: threading.Event | None = None,
        until_empty: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wait_s: float = _LONG_POLL_S,
    ) -> None:
        """See :func:`listen_for_messages`."""
        self._broker, self._queues, self._num_messages = broker, list(queues), num_messages
        self._loop_count, self._until_empty = loop_count, until_empty
        self._visibility_timeout_s, self._wait_s = visibility_timeout_s, wait_s
        self._shutdown_event = shutdown_event or threading.Event()
        self._clock = clock
        self.ledger = Ledger()
        self._lease_s: dict[str, float] = {}
        # One condition guards all that follows, and is notified of every change of it.
        self._changed = threading.Condition()
        self._waiting: dict[str, list[_Held]] = {queue: [] for queue in self._queues}
        self._held: list[_Held] = []  # all that are leased, or to be changed on the queue
        self._running = 0
        self._pollers = 0
        self._finished = False  # nothing will be added to _held any more
        self._fatal: TaskhawkError | None = None
        self._leases = True  # False once ChangeMessageVisibility was denied
        # Set without the condition: by a signal handler, which must not wait for it, ...
        self._signalled = False
        # ... and once, to end the waits of the broker and the pollers.
        self._stop = threading.Event()

    def run(self) -> Ledger:
        """Work until stopped; the order of the shutdown is the order of these lines."""
        with self._signals():
            try:
                for queue in self._queues:
                    self._lease_s[queue] = self._find_lease_s(queue)
                keeper = threading.Thread(target=self._keep, name="taskhawk keeper", daemon=True)
                pollers = self._start_pollers()
                keeper.start()
                try:
                    self._work()
                finally:
                    self._begin_stop()
                    # Wait the polls in flight out: what an abandoned one receives, nobody runs.
                    for poller in pollers:
                        poller.join()
                    # Only now, or our own poll would take what is released again.
                    self._release_rest()
                    # Acknowledgements are flushed last, and leases are kept until then.
                    with self._changed:
                        self._finished = True
                        self._changed.notify_all()
                    keeper.join()
            finally:
                self._stop.set()
        if self._fatal:
            raise self._fatal
        level = logging.INFO if self.ledger.balanced else logging.ERROR
        _log.log(level, "worker ended: %s", self.ledger)
        return self.ledger

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT stop us, where nobody else handles them; a second one kills."""
        defaults = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
        ours: dict[signal.Signals, Any] = {}

        def restore(*_: object) -> None:
            for number, default in ours.items():
                signal.signal(number, default)

        def handle(number: int, _frame: object) -> None:
            self._signalled = True
            restore()

        if threading.current_thread() is threading.main_thread():
            ours = {n: d for n, d in defaults.items() if signal.getsignal(n) == d}
            for number in ours:
                signal.signal(number, handle)
        try:
            yield
        finally:
            restore()

    def _find_lease_s(self, queue: str) -> float:
        """Return the visibility timeout; 1.4's workers lack the permission to read the queue's."""
        if self._visibility_timeout_s is not None:
            return self._visibility_timeout_s
        try:
            return self._broker.info(queue).visibility_timeout_s
        except Exception as error:
            _log.warning("%s: can't read its attributes: %s", queue, _error_code(error))
            self._visibility_timeout_s = _DEFAULT_LEASE_S
            return _DEFAULT_LEASE_S

    # -- pollers: one a queue

    def _start_pollers(self) -> list[threading.Thread]:
        self._pollers = len(self._queues)
        pollers = [
            threading.Thread(target=self._poll, args=(q,), name=f"taskhawk {q}", daemon=True)
            for q in self._queues
        ]
        for poller in pollers:
            poller.start()
        return pollers

    def _poll(self, queue: str) -> None:
        loops = failures = 0
        try:
            while self._loop_count is None or loops < self._loop_count:
                if not self._wait_for_room():
                    return
                try:
                    received = self._receive(queue)
                except Exception as error:
                    failures += 1
                    if not self._survives(queue, error, failures, loops):
                        return
                    continue
                if failures:
                    _log.info("%s: receives again after %d failures", queue, failures)
                loops, failures = loops + 1, 0
                if self._until_empty and not received and self._is_empty(queue):
                    return
        finally:
            with self._changed:
                self._pollers -= 1
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Wait until what is received can start; False if the worker stops."""
        with self._changed:
            while not self._stopping():
                waits = any(self._waiting.values()) or self._running
                refused = sum(held.visible_in_s is None and held.tries > 0 for held in self._held)
                if not waits and refused < _MAX_BATCH:  # and acknowledgements get through
                    return True
                self._changed.wait()
            return False

    def _receive(self, queue: str) -> list[QueueMessage]:
        wait_s = min(self._wait_s, 1) if self._until_empty else self._wait_s
        received = self._broker.receive(
            queue, self._num_messages, wait_s, self._visibility_timeout_s, self._stop
        )
        now = self._clock()
        with self._changed:
            taken = [_Held(message, now, self._lease_s[queue]) for message in received]
            self._waiting[queue] += taken
            self._held += taken
            self.ledger.received += len(taken)
            self._changed.notify_all()
        _call_safely("TASKHAWK_HEARTBEAT_HOOK")
        return received

    def _survives(self, queue: str, error: Exception, failures: int, loops: int) -> bool:
        """Back off after a receive that failed; at the start, end where only a person can help."""
        if not loops and (fatal := self._broker.explain(error, queue)):
            fatal.__cause__ = error
            self._fatal = fatal
            self._begin_stop()
            return False
        if failures == 1:
            _log.warning("%s: can't receive, goes on trying: %r", queue, error)
        self._stop.wait(_jittered(min(0.5 * 2 ** min(failures, 10), _MAX_BACKOFF_S)))
        return True

    def _is_empty(self, queue: str) -> bool:
        with contextlib.suppress(
            Exception
        ):  # a fault is no reason to end: the next poll asks again
            return not any(self._broker.depth(queue))
        return False

    # -- the calling thread

    def _work(self) -> None:
        while held := self._next():
            try:
                outcome = process(held.message)
            except KeyboardInterrupt:
                self._finish(held, "retried", visible_in_s=0)
                raise
            self._settle(held, outcome)

    def _next(self) -> _Held | None:
        """Wait for a message to run; None if the worker stops."""
        with self._changed:
            while not self._stopping():
                for waiting in self._waiting.values():
                    if waiting:
                        return self._start(waiting.pop(0))
                if not self._pollers:
                    return None
                self._changed.wait()
            return None

    def _start(self, held: _Held) -> _Held:
        self._move(held, "started")
        self._running += 1
        return held

    def _settle(self, held: _Held, outcome: Outcome) -> None:
        """Have done what the outcome says."""
        if outcome.fate is Fate.acknowledge:
            self._finish(held, "acked")
        elif outcome.fate is Fate.dead_letter and self._send_to_dead_letters(held, outcome):
            self._finish(held, "dead_lettered")
        else:
            self._finish(
                held, "retried", visible_in_s=outcome.delay_s, left=outcome.delay_s is None
            )

    def _send_to_dead_letters(self, held: _Held, outcome: Outcome) -> bool:
        """Copy a message to the dead-letter queue; False leaves it to its queue's redrive policy."""
        message = held.message
        try:
            target = self._broker.info(message.queue or "").dead_letter_queue
            if not target:
                raise ConfigurationError("it has no dead-letter queue")
            copy = _dead_letter_copy(message, outcome.error, self._broker.max_bytes)
            _accepted(self._broker.send(target, [copy]))
        except Exception as error:
            _log.warning(
                "%s: message %s can't be dead-lettered and is left to the queue: %s",
                message.queue,
                message.message_id,
                error,
            )
            return False
        return True

    def _finish(
        self, held: _Held, end: str, *, visible_in_s: float | None = None, left: bool = False
    ) -> None:
        """Hand a finished message to the keeper; one that is left to its timeout ends here."""
        with self._changed:
            self._running -= 1
            self._move(held, "finished")
            if left:
                self._end(held, end)
            else:
                self._ask(held, end, visible_in_s)
            self._changed.notify_all()

    # -- the keeper

    def _ask(self, held: _Held, end: str, visible_in_s: float | None) -> None:
        """Ask the keeper for a delete, or a change of visibility, before which the lease ends."""
        held.end, held.visible_in_s, held.due_at = end, visible_in_s, self._clock()
        if visible_in_s is None:
            held.due_at += _ACK_WAIT_S
        elif held.message.lease_lost:
            self._end(held, end)  # the receipt may be another's by now
        else:
            held.renew_at = math.inf

    def _release_rest(self) -> None:
        """Release what was not started, and what an interrupt of ours left half done."""
        with self._changed:
            for waiting in self._waiting.values():
                waiting.clear()
            for held in [h for h in self._held if not h.end]:
                if held.state == "started":
                    self._move(held, "finished")
                self._ask(held, "released" if held.state == "received" else "retried", 0)

    def _keep(self) -> None:
        while True:
            with self._changed:
                if self._stopping():
                    self._begin_stop()
                now = self._clock()
                if not (work := self._due(now)):
                    if self._finished and not self._held:
                        return
                    next_at = min((min(h.renew_at, h.due_at) for h in self._held), default=now + 1)
                    self._changed.wait(min(_TICK_S, next_at - now))
                    continue
            change, batch = work
            change(batch)

    def _due(self, now: float) -> tuple[Callable[[list[_Held]], None], list[_Held]] | None:
        """Return what to do now: leases first, then deletes, then delays and releases."""
        if due := [h for h in self._held if h.renew_at <= now]:
            return self._extend, self._one_call(due)
        deletes = [h for h in self._held if h.end and h.visible_in_s is None]
        fresh = [h for h in deletes if not h.tries]
        idle = not self._running and not any(self._waiting.values())
        if len(fresh) >= _MAX_BATCH or (fresh and idle) or any(h.due_at <= now for h in deletes):
            return self._delete, self._one_call(
                sorted((h for h in deletes if not h.tries or h.due_at <= now), key=_due_at)
            )
        if due := [h for h in self._held if h.visible_in_s is not None and h.due_at <= now]:
            return self._delay, self._one_call(due)
        return None

    @staticmethod
    def _one_call(due: Sequence[_Held]) -> list[_Held]:
        """Take what fits into a batch call: ten messages of one queue."""
        return [h for h in due if h.message.queue == due[0].message.queue][:_MAX_BATCH]

    def _extend(self, batch: list[_Held]) -> None:
        now = self._clock()
        lease_s = self._lease_s[batch[0].message.queue or ""]
        changes = [(h.receipt, max(0, min(lease_s, h.last_at - now))) for h in batch]
        refused = self._try(batch, self._broker.change_visibility, changes)
        with self._changed:
            for held in batch:
                if held.renew_at == math.inf:
                    continue  # a task ended meanwhile, and its delay or release comes next
                refusal = refused.get(held)
                if refusal is None and held.last_at - now > 1:
                    held.lease_until, held.renew_at = now + lease_s, now + lease_s / 3
                elif refusal and _is_denied(refusal):
                    self._give_up_leases(refusal)
                elif refusal and not refusal.final and now < held.lease_until:
                    held.renew_at = now + lease_s / 20
                else:
                    self._lose(held, refusal)
        _call_safely("TASKHAWK_HEARTBEAT_HOOK")

    def _delete(self, batch: list[_Held]) -> None:
        now = self._clock()
        refused = self._try(batch, self._broker.delete, [h.receipt for h in batch])
        with self._changed:
            for held in batch:
                refusal, late = refused.get(held), now >= held.lease_until
                if refusal and not (refusal.final or late or _is_denied(refusal)):
                    self._try_later(held, now)
                    continue
                if refusal or late:
                    why = refusal.text if refusal else "its lease had ended"
                    _log.warning("message %s may run again: %s", held.message.message_id, why)
                self._end(held, "uncertain" if refusal or late else held.end)

    def _delay(self, batch: list[_Held]) -> None:
        now = self._clock()
        changes = [(h.receipt, min(h.visible_in_s or 0, max(0, h.last_at - now))) for h in batch]
        refused = self._try(batch, self._broker.change_visibility, changes)
        with self._changed:
            for held in batch:
                refusal, late = refused.get(held), now >= held.lease_until
                if refusal and not (refusal.final or late or _is_denied(refusal)):
                    self._try_later(held, now)
                    continue
                if refusal:  # it is visible again when its lease ends, which is not what was asked
                    _log.warning("message %s: %s", held.message.message_id, refusal.text)
                self._end(held, held.end)

    @staticmethod
    def _try(
        batch: Sequence[_Held], call: Callable[[str, Any], list[Refusal]], entries: Sequence[Any]
    ) -> dict[_Held, Refusal]:
        make = functools.partial(call, batch[0].message.queue or "", entries)
        return {batch[refusal.index]: refusal for refusal in _refused_by(make, len(batch))}

    @staticmethod
    def _try_later(held: _Held, now: float) -> None:
        held.tries += 1
        held.due_at = now + _jittered(min(0.1 * 2**held.tries, 5))

    def _give_up_leases(self, refusal: Refusal) -> None:
        """Go on without leases: 1.4's workers may lack the permission."""
        _log.error("ChangeMessageVisibility is denied, long tasks may run twice: %s", refusal.text)
        self._leases = False
        for held in self._held:
            held.renew_at = math.inf

    def _lose(self, held: _Held, refusal: Refusal | None) -> None:
        """Note that another may have the message; one that waits is not started."""
        why = refusal.text if refusal else "it was received 12 hours ago"
        _log.warning("message %s may run twice: %s", held.message.message_id, why)
        held.message.lease_lost, held.renew_at = True, math.inf
        held.lease_until = -math.inf
        if held.state == "received":
            self._waiting[held.message.queue or ""].remove(held)
            self._end(held, "released")

    # -- the states

    def _begin_stop(self) -> None:
        with self._changed:
            self._stop.set()
            self._changed.notify_all()

    def _stopping(self) -> bool:
        return self._signalled or self._stop.is_set() or self._shutdown_event.is_set()

    def _end(self, held: _Held, end: str) -> None:
        self._move(held, end)
        self._held.remove(held)
        setattr(self.ledger, end, getattr(self.ledger, end) + 1)
        self._changed.notify_all()

    @staticmethod
    def _move(held: _Held, state: str) -> None:
        if state not in _STEPS.get(held.state, ()):
            raise RuntimeError(f"a message can't go from {held.state} to {state}")
        held.state = state


def _due_at(held: _Held) -> float:
    return held.due_at


def _is_denied(refusal: Refusal) -> bool:
    return refusal.code.startswith("AccessDenied")


def listen_for_messages(
    priority: Priority | Iterable[Priority],
    num_messages: int = 1,
    visibility_timeout_s: float | None = None,
    loop_count: int | None = None,
    shutdown_event: threading.Event | None = None,
    *,
    until_empty: bool = False,
) -> Ledger:
    """Run the messages of a queue, in the calling thread, until told to stop.

    SIGTERM and SIGINT stop it where the application has no handlers of its own. It stops after the
    running task and after the poll in flight, which takes up to 20 s on SQS.

    :param priority: the queue, or several: the most urgent message runs first
    :param num_messages: how many to receive at once, up to 10: they wait for each other
    :param visibility_timeout_s: how long a received message is hidden from others, until the worker
        extends it; None takes the queue's own
    :param loop_count: end after so many receives from each queue; None goes on for ever
    :param shutdown_event: set it to stop
    :param until_empty: end once the queues have no message, in flight and delayed ones included
    :returns: what became of the messages
    :raises ConfigurationError: if a queue is missing or forbidden, or there are no credentials
    """
    if num_messages < 1:
        raise ConfigurationError(f"num_messages: expected 1 or more, got {num_messages}")
    if visibility_timeout_s is not None and not 1 <= visibility_timeout_s <= _MAX_VISIBLE_S:
        raise ConfigurationError(
            f"visibility_timeout_s: expected 1 to {_MAX_VISIBLE_S} seconds, got"
            f" {visibility_timeout_s}"
        )
    wanted = {priority} if isinstance(priority, Priority) else set(priority)
    broker = _brokers.broker()
    return Worker(
        broker,
        [broker.destination(p) for p in _URGENCY if p in wanted],
        num_messages=num_messages,
        visibility_timeout_s=visibility_timeout_s,
        loop_count=loop_count,
        shutdown_event=shutdown_event,
        until_empty=until_empty,
    ).run()


_URGENCY = (Priority.high, Priority.default, Priority.low, Priority.bulk)


def extend_visibility_timeout(priority: Priority, receipt: str, visibility_timeout_s: int) -> None:
    """Keep a message of a queue invisible for so many seconds from now.

    :raises PartialFailure: if the message is no longer in flight
    """
    broker = _brokers.broker()
    change = (receipt, visibility_timeout_s)
    _accepted(broker.change_visibility(broker.destination(priority), [change]))


# --- 12. Lambda -----------------------------------------------------------------------------------
# The same process() as in the worker; Lambda receives, and deletes what the handler returns without
# an error for. So a failure always raises, or is in the answer.


def process_messages_for_lambda_consumer(
    lambda_event: Mapping[str, Any], *, context: Any = None, partial_batch: bool = False
) -> dict[str, list[dict[str, str]]] | None:
    """Run the messages of an SNS or SQS event; one that fails does not stop the others.

    Where some of an SQS event failed, the others are deleted before the error is raised, so that it
    is safe without ReportBatchItemFailures too, where Lambda retries the batch as a whole.

    :param context: Lambda's; with it, nothing is started in the last tenth of the time
    :param partial_batch: return the failures of an SQS event instead of raising them: only for an
        event source mapping with ReportBatchItemFailures
        (https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-errorhandling.html)
    :raises Exception: the failed run's, or an ExceptionGroup of several
    """
    records = lambda_event.get("Records") if isinstance(lambda_event, Mapping) else None
    if not isinstance(records, list):
        raise ValidationError("Records: expected an array of SNS or SQS records, got none")
    remaining_ms = context.get_remaining_time_in_millis if context else lambda: math.inf
    reserve_ms = remaining_ms() / 10 if context else 0
    done: list[QueueMessage] = []
    failed: list[tuple[QueueMessage, Outcome]] = []
    for received in map(_from_record, records):
        outcome = _skipped(received, failed, remaining_ms() >= reserve_ms) or process(received)
        if outcome.fate is Fate.acknowledge:
            done.append(received)
        else:
            failed.append((received, outcome))
    if failed:
        _change_delays(failed)
    if partial_batch:
        return {"batchItemFailures": [{"itemIdentifier": r.message_id} for r, _ in failed]}
    if failed:
        _delete_done(done)
        errors = [typing.cast("BaseException", outcome.error) for _, outcome in failed]
        raise errors[0] if len(errors) == 1 else BaseExceptionGroup("several runs failed", errors)
    return None


def _skipped(
    received: QueueMessage, failed: Sequence[tuple[QueueMessage, Outcome]], in_time: bool
) -> Outcome | None:
    """Return the outcome of a message that must not be started, if it must not."""
    if not in_time:
        error = TaskhawkError(f"message {received.message_id} was not started: no time was left")
        return Outcome(Fate.retry, error)
    ordered = received.queue and received.queue.endswith(".fifo")
    if ordered and any(other.group_id == received.group_id for other, _ in failed):
        error = TaskhawkError(
            f"message {received.message_id} was not started: an earlier one of its group failed"
        )
        return Outcome(Fate.retry, error)
    return None


def _from_record(record: Any) -> QueueMessage:
    """Read a record of either kind; what it lacks makes the message invalid."""
    record = record if isinstance(record, dict) else {}
    if isinstance(sns := record.get("Sns"), dict):
        return QueueMessage(sns.get("Message"), sns.get("MessageId", ""), sns_record=record)
    attributes = {
        name: {kind[:1].upper() + kind[1:]: content for kind, content in value.items()}
        for name, value in record.get("messageAttributes", {}).items()
    }
    queue = broker = None
    if arn := record.get("eventSourceARN"):
        broker = typing.cast("SqsBroker", _brokers.broker())
        queue = broker.url_from_arn(arn)
    return QueueMessage(
        record.get("body"),
        record.get("messageId", ""),
        record.get("receiptHandle"),
        attributes=record.get("attributes"),
        message_attributes=attributes,
        queue=queue,
        queue_url=broker.url(queue) if broker and queue else "",
        broker=broker,
    )


def _change_delays(failed: Sequence[tuple[QueueMessage, Outcome]]) -> None:
    """Set the delays that retries asked for; Lambda's role may not be allowed to."""
    for received, outcome in failed:
        if outcome.delay_s is None:
            continue
        try:
            received.change_visibility(VisibilityTimeout=min(outcome.delay_s, _MAX_VISIBLE_S))
        except Exception as error:
            _log.warning("can't change when failed messages run again: %s", error)
            return


def _delete_done(done: Sequence[QueueMessage]) -> None:
    """Delete what succeeded, lest Lambda's retry of the batch runs it again."""
    held = [received for received in done if received.queue]
    for start in range(0, len(held), _MAX_BATCH):
        part = held[start : start + _MAX_BATCH]
        try:
            broker = _brokers.broker()
            _accepted(broker.delete(part[0].queue or "", [r.receipt_handle or "" for r in part]))
        except Exception as error:
            _log.warning("messages that succeeded may run again: can't delete them: %s", error)


# --- 14. operations -------------------------------------------------------------------------------
# For people, not for production code. Nothing is deleted before its copy is confirmed.


def requeue_dead_letter(
    priority: Priority, num_messages: int = 10, visibility_timeout: float | None = None
) -> int:
    """Send the dead letters of a queue back to it, and delete each once its copy is confirmed.

    Ends after as many messages as there were at the start, so that what fails again is not sent in
    circles, or when a receive comes back empty.

    :param num_messages: how many to receive at once, up to 10
    :param visibility_timeout: seconds that a copied message is hidden; None takes the queue's own
    :returns: how many were sent back
    :raises ConfigurationError: if the queue has no dead-letter queue
    :raises PartialFailure: if some were not; they are still among the dead letters
    """
    if settings.IS_LAMBDA_APP:
        _log.warning(
            "requeue_dead_letter: not supported for Lambda apps, whose queues are Lambda's"
        )
        return 0
    broker = _brokers.broker()
    queue = broker.destination(priority)
    with _explained(broker, queue):
        source = broker.info(queue).dead_letter_queue
        if not source:
            raise ConfigurationError(f"{queue}: it has no dead-letter queue (no RedrivePolicy)")
        total = broker.depth(source).visible
        _log.info("requeueing about %d messages from %s to %s", total, source, queue)
        done: list[dict[str, str]] = []
        failed: list[dict[str, str]] = []
        while not (count := len(done) + len(failed)) or count < total:
            most = min(num_messages, _MAX_BATCH, max(1, total - count))
            found = broker.receive(source, most, 1, visibility_timeout, threading.Event())
            if not found:
                break
            for message, error in _move_back(broker, source, queue, found):
                entry = {"Id": message.message_id}
                (failed if error else done).append({**entry, "Code": error} if error else entry)
            _log.info("requeued %d of %d messages, %d failed", len(done), total, len(failed))
    if failed:
        raise PartialFailure({"Successful": done, "Failed": failed})
    return len(done)


def _move_back(
    broker: Broker, source: str, target: str, messages: Sequence[QueueMessage]
) -> Iterator[tuple[QueueMessage, str]]:
    """Copy messages, delete those whose copy is confirmed, and yield each with what went wrong."""
    position = 0
    for chunk in _chunks(map(_without_error, messages), broker.max_bytes):
        part = messages[position : position + len(chunk)]
        position += len(chunk)
        send = functools.partial(_send_chunk, broker, target, chunk)
        errors = {r.index: r.code for r in _refused_by(send, len(part))}
        copied = [index for index in range(len(part)) if index not in errors]
        receipts = [part[index].receipt_handle or "" for index in copied]
        delete = functools.partial(broker.delete, source, receipts)
        for refusal in _refused_by(delete, len(copied)) if copied else ():
            errors[copied[refusal.index]] = f"copied, but not deleted: {refusal.code}"
        yield from ((message, errors.get(index, "")) for index, message in enumerate(part))


def _without_error(message: QueueMessage) -> Outgoing:
    kept = {n: v for n, v in message.message_attributes.items() if n != _ERROR_ATTRIBUTE}
    return message.copy(kept)


# --- 15. command line -----------------------------------------------------------------------------
# Glue only: each command is an argument parser around what is above. Exit codes: 0 done, 1 failed,
# 2 wrong usage or configuration.

_EXAMPLES = {
    "demo": "python -m taskhawk demo",
    "listen": "python -m taskhawk listen myapp.tasks --priority high --priority default",
    "dispatch": "python -m taskhawk dispatch myapp.tasks.send_email --args '[\"me@example.com\"]'",
    "tasks": "python -m taskhawk tasks myapp.tasks",
    "schema": "python -m taskhawk schema > schema.json",
    "dead-letters": "python -m taskhawk dead-letters requeue --priority high",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    :param argv: the arguments; those of the process if None
    :returns: the exit code
    """
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, for the script
    try:
        if os.environ.get("DJANGO_SETTINGS_MODULE"):
            import django

            django.setup()
        return typing.cast("int", arguments.run(arguments))
    except (ConfigurationError, ValidationError, TypeError) as error:
        print(f"taskhawk: {error}", file=sys.stderr)
        return 2
    except (PartialFailure, OSError) as error:
        print(f"taskhawk: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> Any:
    import argparse

    parser = argparse.ArgumentParser(prog="taskhawk", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Any], int], text: str, parent: Any = commands) -> Any:
        made = parent.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: {_EXAMPLES.get(name, _EXAMPLES['dead-letters'])}",
        )
        made.set_defaults(run=run)
        return made

    command("demo", _run_demo, "show a queue at work, with nothing set up")
    listen = command("listen", _run_listen, "run a worker")
    _add_modules(listen)
    _add_priority(listen, action="append")
    listen.add_argument("--num-messages", type=int, default=1, help="to receive at once")
    listen.add_argument("--visibility-timeout", type=float, metavar="S", help="seconds")
    listen.add_argument("--loop-count", type=int, help="end after so many receives")
    listen.add_argument("--until-empty", action="store_true", help="end once nothing is queued")
    dispatch = command("dispatch", _run_dispatch, "queue a run of a task, and print its id")
    dispatch.add_argument("task", help="its name")
    dispatch.add_argument("--args", default="[]", metavar="JSON", help="an array")
    dispatch.add_argument("--kwargs", default="{}", metavar="JSON", help="an object")
    dispatch.add_argument("--header", action="append", default=[], metavar="K=V")
    dispatch.add_argument("--delay", type=float, default=0, metavar="S", help="seconds")
    dispatch.add_argument("--module", action="append", default=[], help="to import first")
    _add_priority(dispatch)
    _add_modules(command("tasks", _run_tasks, "list the registered tasks"))
    command("schema", _run_schema, "print the message format as JSON Schema")
    letters = command("dead-letters", _run_requeue, "mend dead letters")
    actions = letters.add_subparsers(required=True, metavar="ACTION")
    _add_priority(command("requeue", _run_requeue, "send them back to their queue", actions))
    return parser


def _add_modules(parser: Any) -> None:
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="to import: it has the tasks")


def _add_priority(parser: Any, **options: Any) -> None:
    names = [priority.name for priority in Priority]
    parser.add_argument("--priority", choices=names, help="default: default", **options)


def _import_modules(modules: Iterable[str]) -> None:
    for name in modules:
        _import(name, "the module")


def _one_process(what: str) -> None:
    if (
        settings.TASKHAWK_BROKER.startswith("sqlite://")
        and not _parse_sqlite_url(settings.TASKHAWK_BROKER)[0]
    ):
        raise ConfigurationError(
            f"{what}: sqlite:// is the memory of one process: use a file, such as sqlite:///queue.db"
        )


def _run_listen(arguments: Any) -> int:
    _one_process("listen")
    _import_modules(arguments.modules)
    if not _registry:
        raise ConfigurationError(
            "listen: no task is registered: name the modules that define them, such as myapp.tasks"
        )
    names = arguments.priority or ["default"]
    ledger = listen_for_messages(
        [Priority[name] for name in names],
        num_messages=arguments.num_messages,
        visibility_timeout_s=arguments.visibility_timeout,
        loop_count=arguments.loop_count,
        until_empty=arguments.until_empty,
    )
    print(ledger)
    return 0 if ledger.balanced and not ledger.uncertain else 1


def _run_dispatch(arguments: Any) -> int:
    _one_process("dispatch")
    _import_modules(arguments.module)
    if arguments.task not in _registry and "." in arguments.task:
        _import_modules([arguments.task.rpartition(".")[0]])
    invocation = AsyncInvocation(Task.find_by_name(arguments.task))
    if arguments.priority:
        invocation = invocation.with_priority(Priority[arguments.priority])
    headers = dict(_key_and_value(text) for text in arguments.header)
    invocation = invocation.with_headers(**headers).with_delay(arguments.delay)
    args, kwargs = _json(arguments.args, "--args", list), _json(arguments.kwargs, "--kwargs", dict)
    print(invocation.dispatch(*args, **kwargs))
    return 0


def _key_and_value(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigurationError(f"--header: expected K=V, got {text!r}")
    return name, value


def _json(text: str, option: str, kind: type) -> Any:
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{option}: expected JSON: {error}") from error
    if not isinstance(value, kind):
        raise _wrong(option, _JSON_NAMES[kind], value)
    return value


def _run_tasks(arguments: Any) -> int:
    _import_modules(arguments.modules)
    for name, registered in sorted(_registry.items()):
        if name == registered.name:
            print(f"{name}  {registered.priority.name}")
    return 0


def _run_schema(_arguments: Any) -> int:
    print(json.dumps(SCHEMA, indent=2))
    return 0


def _run_requeue(arguments: Any) -> int:
    _one_process("dead-letters requeue")
    count = requeue_dead_letter(Priority[arguments.priority or "default"])
    print(f"{count} messages were sent back")
    return 0


class _DemoWorker(Worker):
    """A worker that prints what became of each message."""

    def _settle(self, held: _Held, outcome: Outcome) -> None:
        super()._settle(held, outcome)
        then = f": {outcome.error}" if outcome.error else ""
        if outcome.delay_s is not None:
            then += f"; again in {outcome.delay_s:g} s"
        names = {Fate.acknowledge: "ran", Fate.retry: "failed", Fate.dead_letter: "dead-lettered"}
        name = held.message.message.task_name if held.message.message else ""
        print(f"{names[outcome.fate]:15}{name:13}attempt {held.message.attempt}{then}")


def _run_demo(_arguments: Any) -> int:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "queue.db")
        configure(
            TASKHAWK_BROKER=f"sqlite:///{path}",
            TASKHAWK_QUEUE="demo",
            TASKHAWK_SYNC=False,
            IS_LAMBDA_APP=False,
        )
        logging.disable()  # what it says is printed below
        try:
            print(f"A queue in {path}: the real broker, and a real worker.\n")
            return _demo()
        finally:
            logging.disable(logging.NOTSET)
            configure()


def _demo() -> int:
    broken = {"demo.divide"}

    @task(name="demo.greet")
    def greet(name: str) -> None:
        print(f"{'':28}Hello, {name}!")

    @task(name="demo.connect", retry=fixed(0.5, max_retries=3, jitter=False))
    def connect(metadata: Metadata | None = None) -> None:
        if metadata and metadata.attempt == 1:
            raise RetryException("the network is down")

    @task(name="demo.divide", retry=fixed(0.2, max_retries=1, jitter=False))
    def divide(number: int, by: int) -> None:
        print(f"{'':28}{number} / {by} = {number / (by if broken else 1)}")

    calls: list[tuple[Task[Any, Any], tuple[Any, ...]]] = [
        (greet, ("world",)),
        (connect, ()),
        (divide, (1, 0)),
    ]
    for called, args in calls:
        print(f"{'dispatched':15}{called.name:13}{called.dispatch(*args)}")
    print("\nThe worker runs until nothing is queued:")
    broker = _brokers.broker()
    queues = [broker.destination(Priority.default)]
    first = _DemoWorker(broker, queues, num_messages=10, until_empty=True).run()
    print(
        f"\nThe bug in demo.divide is mended, and its dead letter sent back:\n{'requeued':15}",
        end="",
    )
    broken.clear()
    print(f"{requeue_dead_letter(Priority.default)} message")
    second = _DemoWorker(broker, queues, until_empty=True).run()
    print(f"\nThe ledgers of the two workers:\n  {first}\n  {second}")
    return 0 if (first.dead_lettered, second.acked) == (1, 1) else 1
