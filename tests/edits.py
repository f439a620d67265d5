"""Files of a run changed by hand, as the messages say that it is done."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instruct_jax.files import SEAL


def edit(path: Path, changes: Mapping[str, Any]) -> None:
    """Changes fields of a JSON object and deletes its hash; a field that becomes None is gone."""
    value = json.loads(path.read_text())
    value.pop(SEAL, None)
    kept = {k: v for k, v in {**value, **changes}.items() if k not in changes or v is not None}
    path.write_text(json.dumps(kept))
