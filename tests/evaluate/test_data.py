"""Data sets and local files: what is read, and what is said about what cannot be."""

import json
import sys

import pytest
from PIL import Image

from foveate.evaluate.data import DataError, choices_of, load, open_image, references


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGBA", (8, 6), colour).save(tmp_path / name)
    return tmp_path


def lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def row(image="a.png", **changes):
    return {"image": image, "question": "which colour?", "answer": "red", **changes}


def test_jsonl_finds_images_beside_the_file(folder):
    path = lines(folder / "d.jsonl", row(), "", row("b.png", answer=3, kind="count"))
    first, second = load(path)
    assert first.image.getpixel((0, 0)) == (255, 0, 0)
    assert (first.question, first.answer) == ("which colour?", "red")
    assert (second.answer, second.kind, second.image_id) == ("3", "count", "b.png")


def test_answers_of_several_people(folder):
    objects = [{"answer": "red", "answer_id": 1}, {"answer": "blue", "answer_id": 2}]
    first, second, third = load(
        lines(folder / "d.jsonl", row(answer=None, answers=["a", "b", "b"]), row(answers=objects), row(image_id="x7"))
    )
    assert (first.answer, references(first)) == ("b", ("a", "b", "b"))
    assert (second.answer, references(second)) == ("red", ("red", "blue"))
    assert (third.image_id, references(third), choices_of(third)) == ("x7", ("red",), ())


@pytest.mark.parametrize("answer", ["blue", "B", " b ", 1])
def test_options_to_choose_from(folder, answer):
    (sample,) = load(lines(folder / "d.jsonl", row(answer=answer, choices=["red", "blue"])))
    assert (sample.answer, choices_of(sample)) == ("blue", ("red", "blue"))
    assert sample.question == "which colour?\nA. red\nB. blue\nAnswer with the letter of the right option."
    (sample,) = load(lines(folder / "d.jsonl", row(question="red or blue?", answer=answer, choices=["red", "blue"])))
    assert sample.question == "red or blue?"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answers": "red"}, "'answers' must be a list"),
        ({"answers": []}, "'answers' must be a list"),
        ({"choices": ["red", None]}, "'choices' must be a list"),
        ({"choices": ["blue", "green"]}, "'red' is none of the 'choices'"),
        ({"choices": ["a", "b"], "answer": 2}, "2 is none"),
        ({"answer": None}, "no 'answer'"),
    ],
)
def test_columns_that_do_not_fit(folder, changes, said):
    with pytest.raises(DataError, match=f"line 2.*{said}"):
        load(lines(folder / "d.jsonl", row(), row(**changes)))


def test_draw_is_seeded_and_checks_every_line(folder):
    path = lines(folder / "d.jsonl", *(row(answer=str(i)) for i in range(30)))
    drawn = [sample.answer for sample in load(path, count=5, seed=1)]
    assert drawn == [sample.answer for sample in load(path, count=5, seed=1)]
    assert drawn != [sample.answer for sample in load(path, count=5, seed=2)]
    lines(path, row(), "{", row())
    with pytest.raises(DataError, match="line 2"):
        load(path, count=1)


def test_an_image_that_is_gone_is_named_with_its_line(folder):
    path = lines(folder / "d.jsonl", row(), row("gone.png"))
    with pytest.raises(DataError, match=r"line 2.*gone\.png"):
        load(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("d.csv", "a,b", "jsonl or .parquet"), ("d.jsonl", "", "no rows"), ("d.jsonl", "\n\n", "no rows")],
)
def test_files_that_are_no_data(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        load(tmp_path / name)


def test_parquet_says_what_it_needs(tmp_path, monkeypatch):
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        load(tmp_path / "d.parquet")


def test_parquet(folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    inline = {"bytes": (folder / "b.png").read_bytes(), "path": None}
    table = pa.table({"image": [inline], "question": ["?"], "answer": ["blue"]})
    parquet.write_table(table, folder / "d.parquet")
    assert load(folder / "d.parquet")[0].image.getpixel((0, 0)) == (0, 0, 255)


def test_shipped_sets_have_as_many_as_asked_for():
    for name in ("easy-vqa", "scenes"):
        samples = load(name, 13, seed=2)
        assert len(samples) == 13
        assert [s.question for s in samples] == [s.question for s in load(name, 13, seed=2)]
        assert [s.question for s in samples] != [s.question for s in load(name, 13, seed=3)]


def test_images(folder):
    assert open_image(folder / "a.png").mode == "RGB"
    assert open_image((folder / "a.png").read_bytes()).size == (8, 6)
    with pytest.raises(DataError, match="its bytes"):
        open_image(b"nothing")
    with pytest.raises(DataError, match="no such file"):
        open_image(folder)


def test_photographs_stand_upright(tmp_path):
    photo = Image.new("RGB", (8, 6), "red")
    exif = photo.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo.save(tmp_path / "photo.jpg", exif=exif)
    assert open_image(tmp_path / "photo.jpg").size == (6, 8)
