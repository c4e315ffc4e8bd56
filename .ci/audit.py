"""Looks the pinned packages up among known vulnerabilities, with pip-audit.

python .ci/audit.py PIP_AUDIT constraints/leg-a.txt [...]

Exits 1 for a finding. Where the data cannot be reached it says so and exits 0: a check that needs the network must not
stop work without one.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path


# Identifier of a finding -> why it does not concern us.
ACCEPTED: dict[str, str] = {}
SECONDS = 120  # for a file; a package takes a tenth of one


def audit(pip_audit: str, constraints: str) -> tuple[list[str], str | None]:
    """The findings in a file of pins, and why some or all of it could not be looked up."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [pip_audit, "--requirement", constraints, "--no-deps", "--disable-pip", "--timeout", "10"]
        command += ["--progress-spinner", "off", "--format", "json", "--output", str(report)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except FileNotFoundError:
            return [], "pip-audit is not installed"
        except subprocess.TimeoutExpired:
            return [], f"no answer within {SECONDS} s"
        if not report.is_file():
            return [], (done.stderr.strip().splitlines() or [f"pip-audit exited with {done.returncode}"])[-1]
        packages = json.loads(report.read_text(encoding="utf-8"))["dependencies"]
    findings = [
        f"{package['name']} {package['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'none'}"
        for package in packages
        for found in package.get("vulns", ())
        if not ACCEPTED.keys() & {found["id"], *found.get("aliases", ())}
    ]
    # A mirror without this data answers "not found" for each, and pip-audit calls that "no known vulnerabilities".
    unknown = [package["name"] for package in packages if "vulns" not in package]
    if not unknown:
        return findings, None
    return findings, f"nothing is known of {len(unknown)} of {len(packages)} packages ({', '.join(unknown[:3])}, ...)"


def main() -> None:
    pip_audit, *files = sys.argv[1:]
    is_clean = True
    for constraints in files:
        findings, gap = audit(pip_audit, constraints)
        for finding in findings:
            sys.stdout.write(f"{constraints}: {finding}\n")
        if gap is not None:
            sys.stdout.write(f"{constraints}: SKIPPED pip-audit, whose data cannot be reached: {gap:.300}\n")
        elif not findings:
            sys.stdout.write(f"{constraints}: no known vulnerabilities\n")
        is_clean = is_clean and not findings
    sys.exit(0 if is_clean else 1)


if __name__ == "__main__":
    main()
