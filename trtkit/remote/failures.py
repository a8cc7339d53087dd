"""What the libraries of the object stores raise, as one line of cause and one of fix."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from trtkit.errors import InputError, LacksError, TrtkitError

Kind = Literal["bucket", "missing", "changed", "credentials", "forbidden", "unreachable", "other"]

_KINDS: dict[str, Kind] = {
    # Codes: Amazon S3 API reference, "Error responses"; Cloud Storage, "HTTP status and error codes".
    "NoSuchBucket": "bucket",
    "InvalidBucketName": "bucket",
    "NoSuchKey": "missing",
    "404": "missing",
    "PreconditionFailed": "changed",
    "412": "changed",
    "401": "credentials",
    "ExpiredToken": "credentials",
    "InvalidAccessKeyId": "credentials",
    "InvalidToken": "credentials",
    "SignatureDoesNotMatch": "credentials",
    "403": "forbidden",
    "AccessDenied": "forbidden",
    # Names of exception classes, which need no import of their libraries.
    "NoCredentialsError": "credentials",
    "PartialCredentialsError": "credentials",
    "CredentialRetrievalError": "credentials",
    "TokenRetrievalError": "credentials",
    "SSOError": "credentials",
    "ProfileNotFound": "credentials",
    "GoogleAuthError": "credentials",
    "FSTimeoutError": "unreachable",
    "ConnectTimeoutError": "unreachable",
    "ReadTimeoutError": "unreachable",
    "HTTPClientError": "unreachable",
    "ClientConnectionError": "unreachable",
    "ClientPayloadError": "unreachable",
    "TimeoutError": "unreachable",
    "ConnectionError": "unreachable",
    "gaierror": "unreachable",
    "PermissionError": "forbidden",
    "FileNotFoundError": "missing",
}
_FIXES = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (a public bucket: FSSPEC_S3_ANON=true)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run: gcloud auth application-default login",
}


class ChangedError(Exception):
    """The object is no longer the one that was listed."""


def kind_of(error: BaseException) -> Kind:
    """The kind of a failure: by the code of the most specific error in its chain, else by its class."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for code in (_code(item) for item in chain):
        if code in _KINDS:
            return _KINDS[code]
    for item in chain:
        if isinstance(item, OSError) and str(item).startswith("Forbidden:"):  # gcsfs
            return "forbidden"
        for ancestor in type(item).__mro__:
            if ancestor.__name__ in _KINDS:
                return _KINDS[ancestor.__name__]
    return "other"


def plain(error: BaseException, url: str, endpoint: str) -> TrtkitError:
    """The error to show for what a library raised while it worked on `url`.

    Messages of the libraries are left out, since they repeat addresses and headers. `--debug` shows them.
    """
    scheme = url.partition("://")[0]
    bucket = url.split("/")[2]
    kind = kind_of(error)
    code = _code(error) or _code(error.__cause__) or type(error).__name__
    if kind == "bucket":
        return InputError(f"{url}: there is no bucket '{bucket}'", "check the name, and the endpoint if you set one")
    if kind == "missing":
        return InputError(f"{url} does not exist: no such bucket, or nothing below the prefix", "check the address")
    if kind == "credentials":
        return LacksError(f"{url}: no valid credentials ({code})", _FIXES[scheme])
    if kind == "forbidden":
        return LacksError(
            f"{url}: access is forbidden to these credentials ({code})", "allow them to list and read, or use others"
        )
    if kind == "unreachable":
        variable = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}[scheme]
        return LacksError(
            f"cannot reach {_host(endpoint)} for {url} ({code})",
            f"check the network, a proxy and {variable}; or copy the checkpoint here and give its folder",
        )
    return LacksError(f"{url}: the store answered with an error ({code})", "run again; --debug shows the answer")


def _code(error: BaseException | None) -> str:
    """Error code of botocore's ClientError or status of gcsfs's HttpError; empty for others."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    code = getattr(error, "code", None)
    return str(code) if isinstance(code, (int, str)) else ""


def _host(endpoint: str) -> str:
    """Host and port only: an endpoint may hold a user name and password."""
    parts = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
    try:
        return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname or "the object store"
    except ValueError:
        return "the object store"
