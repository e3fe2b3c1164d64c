"""Whose packages are these? Other distributions on PyPI install `trainer`, `cluster` or `conf` too, and pip overwrites.

    check_one_folder()    fast, at every command: the four packages that Python finds lie side by side
    check_owners()        at run, submit, doctor: no other distribution lists one of our four names

The surprise: a folder `conf/` in the working folder wins over an installed one under `python -m cluster`.
"""

import importlib.metadata
import importlib.util
import os

PACKAGES = ("conf", "data_pipeline", "trainer", "cluster")
DISTRIBUTION = "zeroray"


class Shadowed(Exception):  # noqa: N818 (what it is)
    """One of the four packages is somebody else's; `conf` itself may be, so nothing of it is imported to say so."""


def check_one_folder() -> None:
    """Raise Shadowed when Python finds one of the four packages elsewhere than beside this one."""
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name, place in locations().items():
        if place is None or not os.path.samefile(os.path.dirname(place), home):
            raise Shadowed(
                f"import {name}: Python finds {place or 'nothing'}, not zeroray's {home}/{name}\n"
                "leave the folder that holds it, or install zeroray into an environment of its own (make install)"
            )


def locations() -> dict[str, str | None]:
    """The folder in which Python finds each package; None where it finds none."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found[name] = os.path.dirname(os.path.abspath(spec.origin)) if spec and spec.origin else None
    return found


def check_owners() -> None:
    """Raise ValueError when another distribution installed one of the four packages."""
    from conf.refusal import BadRequest

    for name, foreign in foreign_owners().items():
        raise BadRequest(
            f"import {name}: also installed by {', '.join(foreign)}, which overwrites zeroray's\n"
            f"pip uninstall -y {' '.join(foreign)}, then install zeroray again, best into an environment of its own"
        )


def foreign_owners() -> dict[str, list[str]]:
    """The other distributions that list one of the four packages.

    Same answer as `importlib.metadata.packages_distributions`, which parses every line of every RECORD: 190 ms, not 40.
    """
    owners: dict[str, list[str]] = {}
    for distribution in importlib.metadata.distributions():
        top_level = (distribution.read_text("top_level.txt") or "").split()
        record = "\n" + (distribution.read_text("RECORD") or "")
        mine = [n for n in PACKAGES if n in top_level or f"\n{n}/" in record or f"\n{n}.py," in record]
        if not mine or distribution.name.lower() == DISTRIBUTION:
            continue
        for name in mine:
            owners.setdefault(name, []).append(distribution.name)
    return owners


def installed(name: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
