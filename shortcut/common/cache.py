"""Where work that took long is kept, so that it need not be done twice: in the user's cache, beside the Hub's."""

import hashlib
import json
from pathlib import Path
from typing import Any


def place_for(kind: str, key: Any) -> Path:
    """The path in the cache for what depends on plain data, and on nothing else."""
    from huggingface_hub.constants import HF_HOME

    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return Path(HF_HOME) / "shortcut" / kind / name
