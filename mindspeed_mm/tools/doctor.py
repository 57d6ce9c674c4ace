"""`vace doctor`: checks whether this machine is ready for a run, and prints a line with a fix for each check.

It leaves the machine unchanged. It checks what a run needs but cannot check before it starts: packages,
devices, process groups, disks and limits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from mindspeed_mm.config.flags import FlagParser, add_flags, given
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.errors import ConfigError, DataError, LaunchError, MindSpeedMMError
from mindspeed_mm.files import format_json, stat_path
from mindspeed_mm.log import get_logger, one_line_errors

logger = get_logger(__name__)
PROG = "vace doctor"
State = Literal["ok", "warn", "broken"]


@dataclass(frozen=True)
class Finding:
    """A line of output: what was checked, its state, and what to do."""

    name: str
    state: State
    found: str
    fix: str = ""

    @property
    def line(self) -> str:
        """Return the line, such as `ok      clock        …`."""
        return f"{self.state:<8}{self.name:<14}{self.found}" + (f"; {self.fix}" if self.fix else "")


Check = Callable[[], Iterable[Finding]]


class DoctorFlags(Config):
    """The folders to check."""

    data: str = Field(default=".", description="folder of clips or features, whose disk speed is measured")
    out: str = Field(default=".", description="folder that a run would write to, whose free space is checked")
    dry_run: bool = Field(default=False, description="list the checks and stop")
    print_config: bool = Field(default=False, description="print the settings as JSON and stop")


@one_line_errors
def main(argv: Sequence[str], prog: str = PROG) -> None:
    """Run all checks, print a line for each finding, and exit with 1 if something is broken."""
    arguments = job_parser(prog).parse_strict(argv)
    flags = parse(DoctorFlags, given(arguments, DoctorFlags), prog)
    if flags.print_config:
        logger.info(format_json(flags.model_dump(mode="json"), indent=2))
        return
    for key in ("data", "out"):
        path = getattr(flags, key)
        stat_path(path, DataError)
        if not Path(path).is_dir():
            raise ConfigError("got a file", where=f"--{key}: {path}", expected="a folder")
    checks = all_checks(Path(flags.data), Path(flags.out))
    if flags.dry_run:
        logger.info("\n".join(checks))
        return
    start, findings = time.monotonic(), []
    for name, check in checks.items():
        for finding in run_check(name, check):
            findings.append(finding)
            if not arguments.json:
                logger.info(finding.line)
    broken = [finding.name for finding in findings if finding.state == "broken"]
    if arguments.json:
        rows = [asdict(finding) for finding in findings]
        logger.info(format_json({"healthy": not broken, "checks": rows}, indent=2))
    else:
        logger.info(f"{len(findings)} checks in {time.monotonic() - start:.1f} s")
    if broken:
        raise LaunchError(f"broken: {', '.join(broken)}", fix="follow the advice in the lines above")


def job_parser(prog: str = PROG) -> FlagParser:
    """Build the command's parser."""
    parser = FlagParser(prog, "Check whether this machine is ready for a run.")
    add_flags(parser, DoctorFlags, "doctor")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    return parser


def all_checks(data: Path, out: Path) -> dict[str, Check]:
    """Return name → check, fast checks first."""
    from mindspeed_mm.tools import doctor_device, doctor_machine

    return {
        "packages": doctor_machine.check_packages,
        "limits": doctor_machine.check_limits,
        "memory": doctor_machine.check_memory,
        "clock": lambda: doctor_machine.check_clock(out),
        "disk": lambda: doctor_machine.check_space(out),
        "data": lambda: doctor_machine.check_speed(data),
        "video": doctor_machine.check_video,
        "device": doctor_device.check_devices,
        "group": doctor_device.check_groups,
    }


def run_check(name: str, check: Check) -> list[Finding]:
    """Return the findings of a check. An exception becomes a finding with the state broken."""
    try:
        return list(check())
    except MindSpeedMMError as error:
        return [Finding(name, "broken", error.problem, error.fix)]
    except Exception as error:  # a broken driver or library may raise anything
        lines = str(error).strip().splitlines() or [""]
        return [Finding(name, "broken", f"{type(error).__name__}: {lines[0]}")]
