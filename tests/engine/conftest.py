"""A model with a chat template, for the tests of the engine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture
def chat_model(model_path: str, tmp_path: Path) -> str:
    """The random model of the tests, with a chat template."""
    from kalman_rl.engine.models.tiny import character_tokenizer

    folder = tmp_path / "chat_model"
    shutil.copytree(model_path, folder)
    spoken = character_tokenizer()
    spoken.chat_template = TEMPLATE
    spoken.save_pretrained(folder)
    return str(folder)
