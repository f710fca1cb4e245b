"""No pickle and no code that comes with a model is run: what could, is called nowhere, or in its harmless form."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.architecture.source import PACKAGE, ROOT, Source, sources

# The checkpoint's index is read by an unpickler of its own that knows descriptions of tensors and nothing else.
MAY_DERIVE_UNPICKLER = {"checkpoint/index.py"}
NEVER = {
    *(f"{module}.{name}" for module in ("pickle", "dill", "cloudpickle", "marshal") for name in ("load", "loads")),
    *("joblib.load", "shelve.open", "pd.read_pickle", "pandas.read_pickle", "pickle.Unpickler", "dill.Unpickler"),
    *(f"yaml.{name}" for name in ("load", "load_all", "unsafe_load", "full_load", "Loader", "UnsafeLoader")),
    *("eval", "exec", "np.lib.format.read_array"),
}


def keyword(call: ast.Call, name: str) -> object:
    """The constant given for ``name``, "computed" where it isn't one, None where it isn't given."""
    for given in call.keywords:
        if given.arg == name:
            return given.value.value if isinstance(given.value, ast.Constant) else "computed"
    return None


def complaints(call: ast.Call) -> Iterator[str]:
    called = ast.unparse(call.func)
    if called in NEVER:
        yield f"calls {called}"
    if called.endswith("torch.load") and keyword(call, "weights_only") is not True:
        yield "calls torch.load without weights_only=True"
    if called in ("np.load", "numpy.load") and keyword(call, "allow_pickle") not in (None, False):
        yield f"calls {called} with allow_pickle"
    if keyword(call, "trust_remote_code") not in (None, False):
        yield "trusts remote code"
    asks = called.startswith("Auto") or called.startswith("kind.")
    if called.endswith(".from_pretrained") and asks and keyword(call, "trust_remote_code") is not False:
        yield f"calls {called} without trust_remote_code=False: transformers would ask whether to run what it finds"


def unpickling(source: Source) -> list[str]:
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            found += [f"{source}:{node.lineno}: {complaint}" for complaint in complaints(node)]
        elif isinstance(node, ast.ClassDef) and any("Unpickler" in ast.unparse(base) for base in node.bases):
            own = source.path.relative_to(PACKAGE).as_posix()
            if own not in MAY_DERIVE_UNPICKLER:
                found.append(f"{source}:{node.lineno}: {node.name} is an unpickler")
        elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "marshal", "cloudpickle"):
            found.append(f"{source}:{node.lineno}: imports names of {node.module}, which hides their use")
    return found


def test_nothing_is_unpickled():
    found = [
        complaint for folder in (PACKAGE, ROOT / "tools") for one in sources(folder) for complaint in unpickling(one)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\npickle.loads(data)",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "AutoTokenizer.from_pretrained(path)",
        "model(path, trust_remote_code=True)",
        "class Mine(pickle.Unpickler): ...",
        "eval(text)",
    ],
)
def test_the_rule_notices(text):
    source = Source(PACKAGE / "models" / "x.py")
    source.__dict__["text"] = text
    assert len(unpickling(source)) == 1


@pytest.mark.parametrize(
    "text",
    ["torch.load(file, weights_only=True)", "np.load(path)", "yaml.safe_load(text)", "json.load(file)", "model.eval()"],
)
def test_the_rule_accepts(text):
    source = Source(PACKAGE / "models" / "x.py")
    source.__dict__["text"] = text
    assert unpickling(source) == []
