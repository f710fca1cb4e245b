"""Pickles that leave a mark when they are run, in the forms in which models and data have carried them."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_aligndistil.checkpoint import manifest
from megatron_aligndistil.checkpoint.convert import ConvertRequest, convert
from megatron_aligndistil.errors import UserError
from megatron_aligndistil.launch.failures import one_line
from megatron_aligndistil.parallel.setup import Layout, initialize
from tests.fuzz import training
from tests.fuzz.reader import assert_clean


class Marking:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def raw(mark: Path) -> bytes:
    return pickle.dumps({"weights": Marking(mark)})


def zipped(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": Marking(mark)}, buffer)
    return buffer.getvalue()


def legacy(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": Marking(mark)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


FORMS = {"pickle": raw, "torch's zip": zipped, "torch's old form": legacy}


@dataclass(frozen=True)
class Folders:
    """Sound ones: a model, pairs, the run ``root``/run over them, its cache, the converted model, an adapter."""

    root: Path
    model: Path
    pairs: Path
    converted: Path
    adapter: Path

    @property
    def checkpoint(self) -> Path:
        (found,) = (self.root / "run" / "checkpoints").glob("step_*")
        return found


@dataclass
class Outcome:
    """Commands that were run, by what they did."""

    ended: int = 0
    refused: list[str] = field(default_factory=list)


# What others leave beside weights, or instead of them.
BESIDE = (
    *("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("pytorch_model.bin.index.json", "model.pt", "tokenizer.pkl", "vocab.pkl", "dataset.pkl"),
)
EVERYTHING_BESIDE = ", ".join(BESIDE)


def attack(folders: Folders, copy: Path, form: str | None) -> Outcome:
    """Every kind of file that a command reads, replaced by a pickle that leaves a mark; the command is run on it.

    form  one of FORMS for every command; None: the forms in turn, each file for one command

    Raises:
        AssertionError: a mark was left, or a command ended with anything but success or one line.
    """
    outcome = Outcome()
    for number, (folder, name, command, own_form) in enumerate(attacks(folders, form)):
        own, mark = copy / str(number), copy / f"mark-{number}"
        spoiled = Path(shutil.copytree(folder, own / folder.name))
        for one in BESIDE if name == EVERYTHING_BESIDE else (name,):
            size = (spoiled / one).stat().st_size if one.endswith(".distcp") else 0  # as long as the index says
            (spoiled / one).write_bytes(FORMS[own_form](mark).ljust(size, b"\0"))
        for checkpoint in {path.parent for path in spoiled.rglob("state.json") if (path.parent / "weights").is_dir()}:
            if not name.endswith(manifest.MANIFEST):
                manifest.write_manifest(checkpoint)  # whoever replaces a file can make the manifest fit
        try:
            command(folders, spoiled)
            outcome.ended += 1
        except UserError as error:
            assert_clean(one_line(error), ())
            outcome.refused.append(f"{folder.name}/{name}: {one_line(error)}")
        assert not mark.exists(), f"{own_form} in {folder.name}/{name} was run"
        shutil.rmtree(own)
    return outcome


Command = Callable[[Folders, Path], None]


def attacks(folders: Folders, form: str | None) -> list[tuple[Path, str, Command, str]]:
    """Folder, file, command and form of the pickle."""
    found = list(cases(folders))
    if form is not None:
        return [(*case, form) for case in found]
    once = {(folder, name): (folder, name, command) for folder, name, command in found}
    return [(*case, form) for case, form in zip(once.values(), itertools.cycle(FORMS), strict=False)]


def cases(folders: Folders) -> Iterator[tuple[Path, str, Command]]:
    """A folder, a file in it (or one that is put there) and a command that reads the folder."""
    run, cache = folders.root / "run", folders.root / "cache"
    for name in kinds(run):
        yield run, name, train_from
        yield run, name, resume
    for name in kinds(folders.model):
        yield folders.model, name, teach
        yield folders.model, name, train_from
    yield folders.model, EVERYTHING_BESIDE, train_from
    yield folders.adapter, EVERYTHING_BESIDE, to_hugging_face
    for name in kinds(folders.converted):
        yield folders.converted, name, to_hugging_face
    for name in kinds(folders.adapter):
        yield folders.adapter, name, to_hugging_face
    for name in kinds(cache):
        yield cache, name, train_on_cache
    for name in (folders.pairs.name, "more.parquet"):
        yield folders.pairs.parent, name, train_on_data


def kinds(folder: Path) -> list[str]:
    """One file of each kind: what is left of its name without digits tells kinds apart."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(folder))
            found["".join(c for c in name if not c.isdigit())] = name
    return list(found.values())


def _train(folders: Folders, spoiled: Path, recipe: str, *own: str) -> None:
    given = training.overrides(folders.model, folders.pairs.parent, spoiled.parent / "new", steps=1)
    quiet = ("exp_manager.create_tensorboard_logger=false", "exp_manager.create_checkpoint_callback=false")
    training.train(recipe, [*given, *quiet, f"model.data.cache_dir={folders.root / 'cache'}", *own])


def train_from(folders: Folders, spoiled: Path) -> None:
    _train(folders, spoiled, "sft", f"model.restore_from_path={spoiled}")


def teach(folders: Folders, spoiled: Path) -> None:
    paths = (f"model.aligndistil.dpo_path={folders.root / 'run'}", f"model.aligndistil.reverse_dpo_path={spoiled}")
    _train(folders, spoiled, "aligndistil", *paths)


def resume(folders: Folders, spoiled: Path) -> None:
    given = training.overrides(folders.model, folders.pairs.parent, spoiled.parent, steps=2)
    own = (f"exp_manager.explicit_log_dir={spoiled}", "exp_manager.resume_if_exists=true")
    cache = f"model.data.cache_dir={folders.root / 'cache'}"
    quiet = ("exp_manager.create_tensorboard_logger=false",)
    training.train(
        "sft", [*given, *own, *quiet, cache, "exp_manager.checkpoint_callback_params.save_on_train_end=false"]
    )


def train_on_cache(folders: Folders, spoiled: Path) -> None:
    _train(folders, spoiled, "sft", f"model.data.cache_dir={spoiled}")


def train_on_data(folders: Folders, spoiled: Path) -> None:
    _train(folders, spoiled, "sft", f"model.data.data_prefix.train=[{spoiled}]", f"model.data.cache_dir={spoiled}/new")


def to_hugging_face(folders: Folders, spoiled: Path) -> None:
    with training.own_groups():
        initialize(Layout(), 0, "cpu")
        convert(ConvertRequest(spoiled, spoiled.parent / "converted", to="hf"))
