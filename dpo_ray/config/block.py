"""What every block of the configuration is: frozen, without unknown fields, documented under each field."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict

Dtype = Literal["float32", "bfloat16"]
URI = re.compile(r"^[a-z][a-z0-9+.-]*://")


class Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def changed(self, *names: str) -> list[str]:
        """Those of the fields `names` that differ from their default: what an option that ignores them refuses."""
        fields = type(self).model_fields
        return [n for n in names if getattr(self, n) != fields[n].get_default(call_default_factory=True)]
