"""Hugging Face folders of the recorded tiny models, made again without torch."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.fixtures.models import rule

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
NAMES = sorted(path.stem for path in FIXTURES.glob("*.json"))


@functools.cache
def recorded(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What transformers said of a case: names and shapes, logits and tokens."""
    about = json.loads((FIXTURES / f"{name}.json").read_text())
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return about, dict(arrays)


def write_folder(folder: Path, name: str, *, scalar: bool = False) -> Path:
    """The folder that transformers saved, numbers included."""
    about, _ = recorded(name)
    kind = "scalar_" if scalar else ""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(about[f"{kind}config"]))
    tensors = {k: rule.tensor(k, tuple(v)) for k, v in about[f"{kind}shapes"].items()}
    save_file(tensors, folder / "model.safetensors")
    return folder
