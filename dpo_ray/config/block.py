"""What every block of the configuration is: frozen, without unknown fields, documented under each field."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

Dtype = Literal["float32", "bfloat16"]
URI = re.compile(r"^[a-z][a-z0-9+.-]*://")
CREDENTIALS = re.compile(
    r"(?<=://)[^/?#@\s]+@|(?<=[?&])[^=&#]*(?:secret|token|passw|signature|credential|access_?key)[^=&#]*=[^&#]*", re.IGNORECASE
)
"""Who may read a URI, inside the URI."""


class Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def no_credentials_in_uris(cls, value: Any) -> Any:
        """The configuration is written into resolved.yaml, manifests and logs, as it is."""
        if isinstance(value, str) and URI.match(value) and CREDENTIALS.search(value):
            raise ValueError(
                "a URI holds credentials, and would be written into resolved.yaml, manifests and logs; take them out: they "
                "are read on each node, from its environment, its credential files or its workload identity"
            )
        return value

    def changed(self, *names: str) -> list[str]:
        """Those of the fields `names` that differ from their default: what an option that ignores them refuses."""
        fields = type(self).model_fields
        return [n for n in names if getattr(self, n) != fields[n].get_default(call_default_factory=True)]
