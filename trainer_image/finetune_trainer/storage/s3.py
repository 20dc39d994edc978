"""S3 clients for places (reading) and stores (writing), and what their errors mean to a user."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_crds import locations
from finetune_crds.v1alpha1 import Location

from ..errors import AlreadyExists, StorageError, UserError
from . import credentials
from .roots import Roots

_AMBIENT = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_ROTATION = timedelta(minutes=15)
_RETRIES = 8
_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"status(?: code)?: (\d{3})")


def client(location: Location, roots: Roots) -> Any:
    """An obstore client for a location's bucket, with full keys as paths.

    Credentials: the Secret if one is named (read again every quarter of an hour), else the service account's cloud identity
    if the pod has one, else none.
    """
    from obstore.store import S3Store

    place = locations.parse(location.uri)
    options: dict[str, Any] = {"region": location.region or os.environ.get("AWS_REGION") or "us-east-1"}
    if location.endpoint:
        options["endpoint"] = location.endpoint
        options["virtual_hosted_style_request"] = False
    if location.secret_ref:
        # Asked here once, so that a missing key is told as such and not as a refused request.
        credentials.require(location, "AWS_SECRET_ACCESS_KEY", roots)

        def provide() -> dict[str, Any]:
            return {
                "access_key_id": credentials.require(location, "AWS_ACCESS_KEY_ID", roots),
                "secret_access_key": credentials.require(location, "AWS_SECRET_ACCESS_KEY", roots),
                "token": credentials.read(location, "AWS_SESSION_TOKEN", roots),
                "expires_at": datetime.now(UTC) + _ROTATION,
            }

        provide()
        options["credential_provider"] = provide
    elif not any(os.environ.get(name) for name in _AMBIENT):
        options["skip_signature"] = True
    return S3Store(
        place.root,
        **options,
        client_options={"timeout": "300s", "connect_timeout": "10s", "allow_http": True},
        retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(minutes=3)},
    )


@contextmanager
def errors(location: Location, *, writing: bool = False) -> Iterator[None]:
    """Turns obstore's errors into ours.

    Raises:
        AlreadyExists: a conditional write found the object there.
        UserError: bucket, key or credentials are wrong.
        StorageError: the store could not be reached, after retries, or has another version than was asked for.
    """
    from obstore import exceptions as of

    try:
        yield
    except of.AlreadyExistsError as error:
        raise AlreadyExists(f"{location.uri}: written by somebody else first") from error
    except of.PreconditionError as error:
        raise StorageError(changed(location)) from error
    except (FileNotFoundError, of.BaseError) as error:
        # Listings fail as GenericError whatever the status, so that is read from the text.
        code, status = _CODE.search(str(error)), _STATUS.search(str(error))
        refusals = (of.PermissionDeniedError, of.UnauthenticatedError)
        if isinstance(error, refusals) or (status and status[1] in ("401", "403")):
            raise UserError(refused(location, "write to" if writing else "read from")) from error
        if isinstance(error, FileNotFoundError | of.NotFoundError) or (code and code[1] == "NoSuchBucket"):
            what = "bucket" if writing or (code and code[1] == "NoSuchBucket") else "object"
            raise UserError(f"{location.uri}: there is no such {what}; correct the uri{_endpoint(location)}") from error
        why = code[1] if code else " ".join(str(error).partition("\n")[0].split())[:300]
        raise StorageError(
            f"{location.uri}: the store did not answer as it should{_endpoint(location)}: {why}"
        ) from error


def changed(location: Location) -> str:
    """The sentence for what is not the version that was listed."""
    return f"{locations.public(location.uri)}: it changed while it was read; leave it as it is till the data are prepared, and try again"


def refused(location: Location, action: str) -> str:
    """The sentence for 401 and 403."""
    if location.secret_ref:
        return f"{location.uri}: the credentials in Secret {location.secret_ref.name} may not {action} it; check the keys and their policy"
    return (
        f"{location.uri}: access was refused without credentials; name a Secret in secretRef, "
        "or give runtime.serviceAccountName a cloud identity that may "
        f"{action} it"
    )


def _endpoint(location: Location) -> str:
    return f" (endpoint {location.endpoint})" if location.endpoint else ""
