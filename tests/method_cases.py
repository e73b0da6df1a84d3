"""Every method with every structure that it takes, and the overrides that choose them."""

from okddip.assembly import CONFIG_HOME

CASES = [  # the gate of ONE needs a shared trunk
    (path.stem, structure)
    for path in sorted((CONFIG_HOME / "conf" / "method").glob("*.yaml"))
    for structure in ("branch", "network")
    if (path.stem, structure) != ("one", "network")
]


def overrides_of(method: str, structure: str) -> list[str]:
    """What follows `method=...`; a test has to hand over kd's teacher itself."""
    overrides = [f"method.structure={structure}"]
    if method == "cl_ilr":
        overrides.append(f"method.rescale={str(structure == 'branch').lower()}")
    if method == "kd":
        overrides.append("method.teacher=given")
    return overrides
