"""Ask pip-audit whether a pinned package has a known vulnerability, and say plainly what was not asked.

pip-audit alone also succeeds where its service knows none of the packages, as behind a mirror.
Exit: 0 nothing known, 1 vulnerabilities, 2 not audited.

    python .ci/audit.py constraints.txt
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

SERVICE = "the list of known vulnerabilities, which PyPI keeps"
_SHOWN = 5


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: audit.py CONSTRAINTS", file=sys.stderr)
        return 2
    command = ["pip_audit", "-r", arguments[0], "--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json"]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    try:
        rows = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (done.stderr.strip() or "it printed no reason").splitlines()[-1]
        print(f"error: {SERVICE}, could not be reached; nothing was audited: {reason}", file=sys.stderr)
        print("hint: check the network and HTTPS_PROXY, or run it where PyPI itself can be reached", file=sys.stderr)
        return 2
    return show(rows)


def show(rows: list[dict[str, Any]]) -> int:
    """Print what pip-audit found, one entry for each package; return the exit code."""
    skipped = [row["name"] for row in rows if "skip_reason" in row]
    num_audited = len(rows) - len(skipped)
    if not num_audited:
        print(f"error: {SERVICE}, knows none of {len(rows)} packages; nothing was audited", file=sys.stderr)
        print("hint: a mirror may answer in its place; run it where PyPI itself can be reached", file=sys.stderr)
        return 2
    if skipped:
        names = ", ".join(skipped[:_SHOWN]) + (", ..." if len(skipped) > _SHOWN else "")
        print(f"{len(skipped)} packages were not audited, because the service does not know them: {names}")
    found = [(row, vulnerability) for row in rows for vulnerability in row.get("vulns", ())]
    for row, vulnerability in found:
        fixed = ", ".join(vulnerability.get("fix_versions") or ()) or "no version"
        print(f"{row['name']} {row['version']}: {vulnerability['id']}, fixed in {fixed}")
    print(f"{num_audited} packages were audited, {len(found)} known vulnerabilities")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
