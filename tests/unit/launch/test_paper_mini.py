"""The miniature's folder and options: whose it is, one program at a time, and what is refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch import paper_mini
from megatron_aligndistil.launch.paper_mini import SETTINGS_FILE, Sizes, alone_in, claim, main, prepare
from megatron_aligndistil.launch.paper_mini_plan import Layout


def test_a_folder_belongs_to_its_first_settings(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "out")
    claim(layout, Sizes(8, 4))
    claim(layout, Sizes(8, 4))
    with pytest.raises(ConfigError, match=r"holds runs with other settings .*give another folder"):
        claim(layout, Sizes(16, 4))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="isn't a miniature's folder"):
        claim(Layout(tmp_path), Sizes(8, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_programs_do_not_work_in_one_folder(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with alone_in(layout), pytest.raises(ConfigError, match="is at work in it; wait"), alone_in(layout):
        pass
    with alone_in(layout):
        pass


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--steps", "12"), "--steps 12: must be a multiple of 8"),
        (("--steps", "0"), "--steps 0: must be at least 8"),
        (("--seeds", "0"), "--seeds 0: must be at least 1"),
        (("--base-steps", "0"), "--base-steps 0: must be at least 1"),
        (("--jobs", "0"), "--jobs 0: must be at least 1"),
        (("--methods", "sft,grpo"), "--methods grpo: no such method"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        main(["--output", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_the_same_sizes_write_the_same_rows_of_the_stated_number(tmp_path: Path) -> None:
    layouts = [Layout(tmp_path / name) for name in ("one", "two")]
    for layout in layouts:
        layout.root.mkdir()
        prepare(layout, [1], Sizes(8, 4))
    one, two = ({path.name: path.read_bytes() for path in (layout.root / "data").iterdir()} for layout in layouts)
    assert one == two
    rows = {name: len(content.splitlines()) for name, content in one.items()}
    assert rows == {"reading.jsonl": 4 * 32, "demonstrations_1.jsonl": 8 * 32, "pairs_1.jsonl": 8 * 32}
    weights = [(layout.random / "model.safetensors").read_bytes() for layout in layouts]
    assert weights[0] == weights[1] and paper_mini.BATCH == 32
    assert not (layouts[0].root / SETTINGS_FILE).exists()  # claim's
