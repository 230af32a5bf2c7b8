"""What an error of a remote filesystem means: worth a retry or not, and which of our errors it becomes.

The filesystems and the clients below them are optional packages, so nothing is imported from them: errors are told
apart by HTTP status, by the service's error code, and by the names of their classes.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from torchsnapshot.errors import (
    BucketNotFoundError,
    CredentialsError,
    KeyAbsentError,
    KeyExistsError,
    ReadOnlyError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)

_TRANSIENT_CODES = frozenset(
    {
        "408",
        "429",
        "500",
        "502",
        "503",
        "504",
        "509",
        "SlowDown",
        "InternalError",
        "ServiceUnavailable",
        "RequestTimeout",
    }
    | {"Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded", "BandwidthLimitExceeded"}
    | {"ConditionalRequestConflict", "OperationAborted", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
    | {"XAmzContentChecksumMismatch", "ServerBusy", "OperationTimedOut"}
)
_TRANSIENT_CLASSES = frozenset(
    {"botocore.HTTPClientError", "botocore.ConnectionError", "botocore.ResponseParserError", "aiohttp.ClientError"}
    | {"botocore.IncompleteReadError", "requests.ConnectionError", "requests.Timeout", "requests.ChunkedEncodingError"}
    | {"gcsfs.ChecksumError", "asyncio.TimeoutError", "http.IncompleteRead", "azure.ServiceRequestError"}
    | {"azure.ServiceResponseError", "torchsnapshot.UploadChecksumError"}
)
_TRANSIENT_ERRNOS = frozenset(
    {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.EAGAIN}
)
_CREDENTIAL_CODES = frozenset(
    {"401", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
    | {"InvalidSecurity", "AuthorizationHeaderMalformed", "RequestTimeTooSkewed", "AuthFailure", "InvalidClientTokenId"}
    | {
        "UnrecognizedClientException",
        "NotSignedUp",
        "AccountProblem",
        "AuthenticationFailed",
        "CredentialsNotSupported",
    }
)
_CREDENTIAL_CLASSES = frozenset(
    {"botocore.NoCredentialsError", "botocore.PartialCredentialsError", "botocore.CredentialRetrievalError"}
    | {"botocore.TokenRetrievalError", "botocore.SSOError", "botocore.ProfileNotFound", "botocore.NoAuthTokenError"}
    | {"botocore.UnauthorizedSSOTokenError", "google.GoogleAuthError", "azure.ClientAuthenticationError"}
    | {"paramiko.AuthenticationException"}
)
_REFUSED_CODES = frozenset(
    {"403", "AccessDenied", "AllAccessDisabled", "MethodNotAllowed", "405", "AuthorizationPermissionMismatch"}
    | {"InvalidObjectState", "Forbidden"}
)
_BUCKET_CODES = frozenset({"NoSuchBucket", "InvalidBucketName", "ContainerNotFound"})
_TAKEN_CODES = frozenset({"412", "PreconditionFailed"})
_FULL_CODES = frozenset(
    {"507", "QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "XRustfsStorageFull", "StorageFull"}
)

CREDENTIALS_CURE = (
    "pass storage_options (for S3: key, secret, token or profile; for GCS: token), or set up the provider's usual "
    "environment; expired credentials need a new login"
)
_CURES: dict[type[StoreError], str] = {
    CredentialsError: CREDENTIALS_CURE,
    ReadOnlyError: "these credentials may read but not write here: give them permission to put, list and delete",
    BucketNotFoundError: "create the bucket, or check its name and the endpoint",
    StoreUnavailableError: "check the network and the endpoint in storage_options, then try again",
    StoreFullError: "free space (delete snapshots, then run gc) or have the quota raised; what was committed is intact",
}
_MAX_REASON = 600


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    codes = error_codes(error)
    if codes & _TRANSIENT_CODES:
        return True
    if "401" in codes and "Invalid Credentials" in str(error):
        return True  # a Google token that expired this minute: the next request fetches a new one
    if codes:
        return False  # a clear answer
    for each in _chain(error):
        if _class_names(each) & _CREDENTIAL_CLASSES:
            return False
        if isinstance(each, (ConnectionError, TimeoutError)) or _class_names(each) & _TRANSIENT_CLASSES:
            return True
        if isinstance(each, OSError) and each.errno in _TRANSIENT_ERRNOS:
            return True
    return False


def is_out_of_range(error: BaseException) -> bool:
    """Whether a ranged read failed because the object ends before the range."""
    return bool(error_codes(error) & {"416", "InvalidRange"})


def is_taken(error: BaseException) -> bool:
    """Whether a conditional put failed because the key is taken."""
    return isinstance(error, FileExistsError) or bool(error_codes(error) & _TAKEN_CODES)


def translate(error: Exception, url: str, action: str, key: str, *, writing: bool) -> StoreError:
    """The error to raise for ``error``, met while doing ``action`` to ``key`` in the store at ``url``."""
    if isinstance(error, StoreError):
        return error
    kind = _kind(error, writing)
    reason = f"{type(error).__name__}: {error}"
    if len(reason) > _MAX_REASON:
        reason = reason[:_MAX_REASON] + "…"
    # clients quote URLs with all that is in them
    reason = without_password(reason)
    message = f"{url}: {action} {key!r}: {reason}" if key else f"{url}: {action}: {reason}"
    cure = _CURES.get(kind)
    return kind(f"{message} ({cure})" if cure else message)


def without_password(text: str) -> str:
    """A message or URL in which no URL shows a password."""
    return re.sub(r"://([^/@:\s]*):[^/@\s]*@", r"://\1:***@", text)


def error_codes(error: BaseException) -> frozenset[str]:
    """HTTP statuses and the service's own codes, as text, of an error and of what caused it."""
    codes: set[str] = set()
    for each in _chain(error):
        if "aiohttp.HttpProcessingError" in _class_names(each):
            continue  # the client's own: an answer that broke off has 400 there, whatever the service said
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            codes.add(str(response.get("Error", {}).get("Code", "")))
            codes.add(str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")))
        for attribute in ("code", "status", "status_code", "error_code"):
            value = getattr(each, attribute, None)
            if isinstance(value, (int, str)) and not isinstance(value, bool):
                codes.add(str(value))
        if isinstance(each, OSError) and str(each).startswith("Forbidden"):
            codes.add("403")  # gcsfs gives no more than this text
    return frozenset(code for code in codes if code and code != "200")


def _kind(error: Exception, writing: bool) -> type[StoreError]:
    codes = error_codes(error)
    names = frozenset(name for each in _chain(error) for name in _class_names(each))
    by_code: tuple[tuple[frozenset[str], type[StoreError]], ...] = (
        (_BUCKET_CODES, BucketNotFoundError),
        (_CREDENTIAL_CODES, CredentialsError),
        (_FULL_CODES, StoreFullError),
        (_TAKEN_CODES, KeyExistsError),
        (_REFUSED_CODES, ReadOnlyError if writing else CredentialsError),
    )
    if names & _CREDENTIAL_CLASSES:
        return CredentialsError
    for known, kind in by_code:
        if codes & known:
            return kind
    if is_transient(error):
        return StoreUnavailableError
    return _kind_of_plain(error, writing)


def _kind_of_plain(error: Exception, writing: bool) -> type[StoreError]:
    if isinstance(error, FileExistsError):
        return KeyExistsError
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return StoreError if writing else KeyAbsentError
    if isinstance(error, PermissionError):
        return ReadOnlyError if writing else CredentialsError
    if isinstance(error, NotImplementedError) and writing:
        return ReadOnlyError  # a filesystem that can only read
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreFullError
        if error.errno == errno.EROFS:
            return ReadOnlyError
    return StoreError


def _chain(error: BaseException) -> Iterator[BaseException]:
    each: BaseException | None = error
    for _ in range(8):
        if each is None:
            return
        yield each
        each = each.__cause__


def _class_names(error: BaseException) -> frozenset[str]:
    return frozenset(f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__)
