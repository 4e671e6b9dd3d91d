"""Write the software bill of materials of icdctl: CycloneDX 1.6 JSON, validated against the schema.

It lists the package and every installed package that it requires, with version, licence and what requires what; tools
for development are not in it. The same packages give the same bytes, but for the time, which `SOURCE_DATE_EPOCH` sets.

    python .ci/sbom.py dist/icdctl.cdx.json
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "icdctl"
_LONGEST_LICENCE = 64
"""Some packages state the whole text of their licence in place of its name."""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: sbom.py FILE", file=sys.stderr)
        return 2
    bom, missing = bill()
    for line in missing:
        print(f"error: {line}", file=sys.stderr)
    if missing:
        print("hint: install the package with its requirements, e.g. `make install`", file=sys.stderr)
        return 1
    text = JsonV1Dot6(bom).output_as_string(indent=2) + "\n"
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if problem is not None:
        print(f"error: the bill does not fit the schema of CycloneDX 1.6: {problem}", file=sys.stderr)
        return 1
    place = Path(arguments[0])
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")
    print(f"{place}: {len(bom.components)} packages that {PACKAGE} requires")
    return 0


def bill() -> tuple[Bom, list[str]]:
    """The bill, and a line for each required package that is not installed."""
    by_name: dict[str, Component] = {}
    edges: dict[str, set[str]] = {}
    missing: list[str] = []
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(PACKAGE, frozenset[str]())]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        by_name.setdefault(name, component(name))
        for wanted, its_extras in required(name, extras):
            try:
                metadata.distribution(wanted)
            except metadata.PackageNotFoundError:
                missing.append(f"`{wanted}`, which `{name}` requires, is not installed")
                continue
            edges.setdefault(name, set()).add(wanted)
            waiting.append((wanted, its_extras))
    bom = Bom(components=[each for name, each in by_name.items() if name != PACKAGE])
    bom.metadata.component = by_name[PACKAGE]
    bom.metadata.timestamp = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())), UTC)
    for name, each in by_name.items():
        bom.register_dependency(each, [by_name[wanted] for wanted in sorted(edges.get(name, ()))])
    listed = " ".join(sorted(str(each.purl) for each in by_name.values()))
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, listed)
    return bom, missing


def required(name: str, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """The packages that an installed package requires here, with some of its extras, and which extras of theirs."""
    for text in metadata.requires(name) or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def component(name: str) -> Component:
    stated = metadata.metadata(name)
    version = stated["Version"]
    licence = stated["License-Expression"] or stated["License"]
    if not licence or len(licence) > _LONGEST_LICENCE or "\n" in licence:
        classified = [row for row in stated.get_all("Classifier") or () if row.startswith("License :: ")]
        licence = classified[0].rpartition(" :: ")[2] if classified else None
    purl = PackageURL("pypi", name=name, version=version)
    return Component(
        name=name,
        version=version,
        type=ComponentType.APPLICATION if name == PACKAGE else ComponentType.LIBRARY,
        description=stated["Summary"],
        purl=purl,
        bom_ref=str(purl),
        licenses=[LicenseFactory().make_from_string(licence)] if licence else [],
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
