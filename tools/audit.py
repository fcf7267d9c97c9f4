"""Known weaknesses of the tested versions (constraints.txt), by pip-audit in an environment of its own.

Exit code 1 for a weakness, 0 for none, and 0 with a sentence where nobody answers: no network, or a mirror of the
registry that holds packages but no advisories.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".venv" / "audit"
QUESTION = (
    "-r",
    "constraints.txt",
    "--no-deps",
    "--disable-pip",
    "--format",
    "json",
    "--progress-spinner",
    "off",
)


def summary(found: dict[str, Any]) -> tuple[int, list[str]]:
    """Exit code and sentences from what pip-audit found."""
    packages = found["dependencies"]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    weak = [
        f"{package['name']} {package['version']}: {one['id']}, mended in {', '.join(one['fix_versions']) or 'none'}"
        for package in packages
        for one in package.get("vulns", [])
    ]
    said = [
        f"audit: {len(packages) - len(unknown)} of {len(packages)} packages looked up, {len(weak)} weaknesses"
    ]
    if unknown:
        said.append(f"audit: nobody here knows about {len(unknown)} of them, such as {unknown[0]}")
    return int(bool(weak)), [*said, *weak]


def main() -> int:
    """Look the versions up and print what is known."""
    program = HOME / "bin" / "pip-audit"
    if not program.exists():
        venv.create(HOME, with_pip=True)
        made = subprocess.run(
            [HOME / "bin" / "pip", "install", "--quiet", "pip-audit"], capture_output=True, text=True
        )
        if made.returncode:
            print("audit: pip-audit cannot be installed here, nothing was looked up")
            return 0
    asked = subprocess.run([program, *QUESTION], cwd=ROOT, capture_output=True, text=True)
    try:
        found = json.loads(asked.stdout)
    except ValueError:
        print(f"audit: nobody answers here, nothing was looked up: {asked.stderr.strip().splitlines()[-1:]}")
        return 0
    code, said = summary(found)
    print(*said, sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
