from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLMEFF_CACHE", str(folder))
    return folder


@pytest.fixture
def put():
    """Writes an array, or an image of any mode, as a file."""

    def write(path: Path, content) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = content if isinstance(content, Image.Image) else Image.fromarray(np.asarray(content))
        image.save(path)
        return path

    return write
