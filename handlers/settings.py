"""Where MongoDB is, from the environment: the settings that the service and the published interface share."""

import os
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class DatabaseSettings(BaseSettings):
    """Field `mongodb_uri` is `DLTASK_MONGODB_URI`, and so on. Raises pydantic.ValidationError that shows no value."""

    # An error of one field is shown with all that was given, the URI too, unless it is shown without anything.
    model_config = SettingsConfigDict(
        env_prefix="DLTASK_",
        frozen=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    #: Where MongoDB is; a replica set, since change streams need one. A secret: it may hold a password.
    mongodb_uri: SecretStr = SecretStr("mongodb://127.0.0.1:27017/?replicaSet=rs0")
    #: A file that holds the URI, as Docker and Kubernetes mount secrets. Instead of `mongodb_uri`, never beside it.
    mongodb_uri_file: Path | None = None
    #: The database with the tables and the tasks.
    database: str = Field("dl", pattern=r"^[^/\\. \"$*<>:|?\x00]{1,63}$")

    @model_validator(mode="before")
    @classmethod
    def _read_uri(cls, values: dict[str, Any]) -> dict[str, Any]:
        if not (file := values.get("mongodb_uri_file")):
            return values
        if values.get("mongodb_uri"):
            raise ValueError("DLTASK_MONGODB_URI and DLTASK_MONGODB_URI_FILE are both set; expected one of them")
        named = f"DLTASK_MONGODB_URI_FILE is {str(file)[:200]!r}"
        try:
            # An editor ends the line, and so does `echo … > FILE`; no URI ends in a space.
            uri = Path(file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ValueError(f"{named}; expected a file that can be read: {error.strerror}") from None
        except ValueError:
            raise ValueError(f"{named}; expected a file with a MongoDB URI in it, and it is no text") from None
        if not uri:
            raise ValueError(f"{named}; expected a file with a MongoDB URI in it, and it is empty")
        return {**values, "mongodb_uri": uri}


def uri_to_mask() -> str:
    """The URI that the environment gives, however wrong the settings are otherwise; never raises."""
    try:
        return DatabaseSettings().mongodb_uri.get_secret_value()
    except ValidationError:
        return os.environ.get("DLTASK_MONGODB_URI", "")
