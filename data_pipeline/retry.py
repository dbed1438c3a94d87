"""Try an operation on a server again until it succeeds, is refused for good, or its time is up."""

from __future__ import annotations

import http.client
import logging
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from data_pipeline.errors import ConfigError, EnvironmentFault, UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

SLOWEST_BYTES_PER_S = 1 << 20
READ_ADVICE = "check the network and the server, or raise data.read_deadline_s"

DEFINITIVE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
TRANSIENT_STATUS = (408, 425, 429)
# S3 reports these with a status that otherwise means that the request is wrong.
TRANSIENT_CODES = (
    "RequestTimeout",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "ConditionalRequestConflict",
)
# Failures on the way that are no OSErrors: package -> names of their (base) classes.
TRANSIENT_TYPES = {
    "aiohttp": {"ClientConnectionError", "ClientPayloadError"},
    "botocore": {
        "HTTPClientError",
        "ConnectionError",
        "IncompleteReadError",
        "ChecksumError",
        "FlexibleChecksumError",
        "ResponseParserError",
    },
    "google": {"TransportError"},
    "gcsfs": {"ChecksumError"},
}
REFUSED_STATUS = (401, 403)
REFUSED_TYPES = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "DefaultCredentialsError",
    "RefreshError",
}


@dataclass(frozen=True)
class RetryPolicy:
    """How long to try; all in seconds.

    deadline_s: for one operation with all its attempts; attempt_timeout_s: for one attempt, where the filesystem can
    be interrupted; transfer_s: that an attempt may take besides, for its bytes; first_delay_s, max_delay_s: the pause
    after the first failure, which doubles up to the largest.
    """

    deadline_s: float = 120.0
    first_delay_s: float = 0.2
    max_delay_s: float = 10.0
    attempt_timeout_s: float = 30.0
    transfer_s: float = 0.0

    def for_bytes(self, count: int) -> RetryPolicy:
        """The same with time to move `count` bytes over a slow line."""
        return replace(self, transfer_s=count / SLOWEST_BYTES_PER_S)


DEFAULT_RETRY = RetryPolicy()


def delay_s(policy: RetryPolicy, attempt: int, *, who: str) -> float:
    """Pause after failed attempt 1, 2, ...: doubled each time, then scaled by [0.5, 1) drawn from (who, attempt)."""
    from data_pipeline.rng import mix_seed  # needs torch, which a process that never retries need not load

    fraction = mix_seed(0, "retry", who, attempt) / 2.0**64
    return min(policy.max_delay_s, policy.first_delay_s * 2.0 ** min(attempt - 1, 60)) * (0.5 + 0.5 * fraction)


def call(
    operation: Callable[[float], T],
    *,
    what: str,
    policy: RetryPolicy,
    advice: str = READ_ADVICE,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """`operation(seconds it may take)`, again while it fails for a reason that may pass.

    what: names it in messages ("bytes 0-10 of s3://b/x"). Raises an error that will not pass at once and as it is, and
    EnvironmentFault with `advice` when the next attempt would start after the deadline.
    """
    start = clock()
    who = f"{os.uname().nodename}:{os.getpid()}:{what}"  # workers that failed together do not come back together
    attempt = 0
    while True:
        attempt += 1
        left_s = policy.deadline_s - (clock() - start)
        try:
            return operation(max(0.001, min(policy.attempt_timeout_s, left_s)) + policy.transfer_s)
        except Exception as error:
            if not is_transient(error):
                raise
            elapsed_s = clock() - start
            pause_s = delay_s(policy, attempt, who=who)
            reason = one_line(deciding(error))
            if elapsed_s + pause_s >= policy.deadline_s:
                raise EnvironmentFault(
                    f"{what} failed {attempt} times in {elapsed_s:.1f} s, the last time with {reason}; {advice}"
                ) from error
            level = logging.WARNING if attempt == 1 else logging.DEBUG
            log.log(level, "%s failed (%s); trying again for %.0f s", what, reason, policy.deadline_s)
        sleep(pause_s)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: no answer, a cut answer, a server in trouble or too busy."""
    return _verdict(deciding(error)) is True


def deciding(error: BaseException) -> BaseException:
    """The deepest cause that tells whether the error may pass; the error itself where none does.

    Filesystems wrap what happened in errors of their own choice: a refused connection in a FileNotFoundError.
    """
    return next((link for link in reversed(list(causes(error))) if _verdict(link) is not None), error)


def explained(error: Exception, *, what: str, where: str) -> UserError | None:
    """What an error that will not pass means for the user; None where it says so itself, or is a bug."""
    if server_code(error) == "NoSuchBucket":
        return ConfigError(f"{where} is in a bucket that does not exist; create it or change the URL")
    status = http_status(error)
    reason = one_line(deciding(error))
    names = {kind.__name__ for link in causes(error) for kind in type(link).__mro__}
    if isinstance(error, PermissionError) or status in REFUSED_STATUS or names & REFUSED_TYPES:
        return EnvironmentFault(
            f"{what}: refused ({reason}); check the permissions and the credentials (AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, AWS_PROFILE or GOOGLE_APPLICATION_CREDENTIALS)"
        )
    if isinstance(error, NotImplementedError):
        return ConfigError(f"{what}: this kind of location cannot do it; give a folder or an s3:// URL")
    if isinstance(error, DEFINITIVE):
        return None
    if status is not None or _package(type(error)) in TRANSIENT_TYPES:
        return EnvironmentFault(f"{what}: failed with {reason}; check the URL and the settings of its server")
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def http_status(error: BaseException) -> int | None:
    """The status of the server's answer that the error or one of its causes is about; None where there was none."""
    return next((status for status in map(_status, causes(error)) if status is not None), None)


def server_code(error: BaseException) -> str:
    """The name S3 gave the failure ("NoSuchBucket"), from the error or one of its causes; "" where there is none."""
    answers = (getattr(link, "response", None) for link in causes(error))
    codes = (answer.get("Error", {}).get("Code", "") for answer in answers if isinstance(answer, dict))
    return next((str(code) for code in codes if code), "")


def one_line(error: BaseException) -> str:
    """Type and message on one line, without the query strings of URLs, which may hold signatures."""
    text = " ".join(str(error).split())
    return re.sub(r"\?[^\s'\"]+", "?...", f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _verdict(link: BaseException) -> bool | None:
    status = _status(link)
    if status is not None:
        is_server_trouble = status >= 500 and status != http.client.NOT_IMPLEMENTED
        return is_server_trouble or status in TRANSIENT_STATUS or server_code(link) in TRANSIENT_CODES
    if isinstance(link, (*DEFINITIVE, ssl.SSLCertVerificationError)):
        return False
    if isinstance(link, (OSError, http.client.HTTPException)):
        return True
    for kind in type(link).__mro__:
        if kind.__name__ in TRANSIENT_TYPES.get(_package(kind), ()):
            return True
    return None


def _status(link: BaseException) -> int | None:
    package = _package(type(link))
    if package == "aiohttp":
        status = getattr(link, "status", None)
    elif package == "gcsfs":
        status = getattr(link, "code", None)
    else:
        answer = getattr(link, "response", None)
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
    return status if isinstance(status, int) and status >= 400 else None


def _package(kind: type) -> str:
    return kind.__module__.split(".")[0]
