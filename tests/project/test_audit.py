"""What is said about weaknesses of the tested versions."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_what_nobody_knows_is_said() -> None:
    spec = importlib.util.spec_from_file_location("audit", Path(__file__).parents[2] / "tools" / "audit.py")
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)
    fine = {"name": "a", "version": "1", "vulns": []}
    weak = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
    assert audit.summary({"dependencies": [fine, fine]}) == (
        0,
        ["audit: 2 of 2 packages looked up, 0 weaknesses"],
    )
    code, said = audit.summary({"dependencies": [fine, weak, {"name": "c", "skip_reason": "not found"}]})
    assert code == 1 and said[0] == "audit: 2 of 3 packages looked up, 1 weaknesses"
    assert "nobody here knows about 1 of them, such as c" in said[1] and said[2] == "b 2: CVE-1, mended in 3"
