"""Who may import what."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.architecture.source import PACKAGE, ROOT, Source, sources

NAME = PACKAGE.name
# Each imports only from itself and from those before it; the two of the first line cross all borders.
ORDER = (
    ("types", "errors"),
    ("config",),
    ("parallel",),
    ("data",),
    ("models",),
    ("kernels",),
    ("rollout",),
    ("losses",),
    ("algorithms",),
    ("trainer",),
    ("checkpoint",),
    ("evaluation",),
    ("certificate",),
    ("report",),
    ("launch",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}

# The only importers of what the rest of the package must not depend on.
ONLY_IN = {
    "hydra": {"config/compose.py"},
    "omegaconf": {
        "config/compose.py",
        "config/schema.py",
        "config/base_schema.py",
        "config/analysis_schema.py",
        "config/evaluation_schema.py",
    },
    "megatron.core.parallel_state": {"parallel/groups.py", "parallel/setup.py"},
    "megatron.core.mpu": set(),
    # The first reads an index with a restricted unpickler, the second only names an exception.
    "pickle": {"checkpoint/index.py", "checkpoint/weights.py"},
}
TORCH_FREE = (
    "config.checks",
    "config.certify",
    "config.compose",
    "launch.cli",
    "launch.analyze",
    "launch.certify",
    "launch.evaluate",
    "launch.slurm",
    "launch.torchrun",
    "launch.failures",
    "launch.log",
)


def against_the_arrow(source: Source) -> list[str]:
    place = source.path.relative_to(PACKAGE).with_suffix("").parts[0]
    if place == "__init__":
        return [f"{source}:{line}: the package's __init__ imports {name}" for line, name in source.imports()]
    assert place in RANK, f"{source}: {place} has no place in the import order"
    found = []
    for line, imported in source.imports():
        parts = imported.split(".")
        if parts[0] != NAME or len(parts) < 2 or parts[1] == "__version__":
            continue
        if RANK[parts[1]] > RANK[place]:
            found.append(f"{source}:{line}: {place} imports {imported}, which comes after it")
    return found


def outside_its_place(source: Source) -> list[str]:
    own = source.path.relative_to(PACKAGE).as_posix()
    return [
        f"{source}:{line}: imports {imported}; only {sorted(allowed) or 'nobody'} may"
        for line, imported in source.imports()
        for name, allowed in ONLY_IN.items()
        if f"{imported}.".startswith(f"{name}.") and own not in allowed
    ]


@pytest.mark.parametrize("rule", [against_the_arrow, outside_its_place])
def test_package_keeps(rule):
    found = [complaint for source in sources(PACKAGE) for complaint in rule(source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "place", "text"),
    [
        (against_the_arrow, "config/x.py", "from megatron_aligndistil.models import policy"),
        (against_the_arrow, "losses/x.py", "def f():\n    import megatron_aligndistil.trainer.loop"),
        (against_the_arrow, "kernels/x.py", "from ..losses import dpo"),
        (against_the_arrow, "types.py", "from megatron_aligndistil.config.schema import RunConfig"),
        (outside_its_place, "models/x.py", "from megatron.core import parallel_state"),
        (outside_its_place, "trainer/x.py", "from omegaconf import OmegaConf"),
        (outside_its_place, "launch/x.py", "import hydra.core"),
        (outside_its_place, "data/x.py", "import pickle"),
    ],
)
def test_rules_notice(rule, place, text):
    source = Source(PACKAGE / place)
    source.__dict__["text"] = text  # what the cached property would have read
    assert len(rule(source)) == 1


def test_nothing_is_called_utils():
    found = [str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*util*") if path.suffix in ("", ".py")]
    assert not found


def test_configuration_and_command_line_start_without_torch():
    """Help, printed configs and config errors answer at once."""
    lines = [f"import {NAME}.{module}" for module in TORCH_FREE]
    lines += [
        "import sys",
        "heavy = {'torch', 'transformers', 'megatron'} & set(sys.modules)",
        "assert not heavy, heavy",
    ]
    probe = "\n".join(lines)
    result = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
