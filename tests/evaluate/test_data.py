"""Data sets and local files: what is read, and what is said about what cannot be."""

import dataclasses
import json
import os
import pickle
import struct
import sys
import zlib

import pytest
from PIL import Image
from typer.testing import CliRunner

from foveate.app.run import read_image
from foveate.cli import app
from foveate.evaluate import images
from foveate.evaluate.data import DataError, choices_of, load, open_image, references, size_of
from foveate.train.rows import read_rows


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


# ------------------------------------------------------------------------------------- images: when used, few, no bombs
def photographs(folder, number, side=(40, 30)):
    for i in range(number):
        Image.new("RGB", side, (i, 0, 0)).save(folder / f"p{i}.png")
    return load(lines(folder / "p.jsonl", *(row(f"p{i}.png") for i in range(number))))


def test_images_are_decoded_when_used_and_few_are_kept(folder, monkeypatch):
    decoded = []
    monkeypatch.setattr(images, "open_image", lambda source: decoded.append(source) or open_image(source))
    monkeypatch.setattr(images, "_recent", images._Recent(pixels=3 * 40 * 30))
    samples = photographs(folder, 8)
    assert [size_of(sample) for sample in samples] == [(40, 30)] * 8
    assert not decoded
    assert [sample.image.getpixel((0, 0))[0] for sample in samples] == list(range(8))
    assert samples[7].image is samples[7].image
    assert len(decoded) == 8
    assert len(images._recent._kept) == 3
    assert samples[0].image.size == (40, 30)  # once more from its file
    assert len(decoded) == 9
    other = pickle.loads(pickle.dumps(samples[1]))  # as it goes to a worker
    assert (other.image.getpixel((0, 0)), other.question) == ((1, 0, 0), samples[1].question)
    changed = dataclasses.replace(samples[2], question="why?")
    assert (changed.question, changed.image.getpixel((0, 0))) == ("why?", (2, 0, 0))


def test_a_file_written_anew_is_read_anew(folder):
    (sample,) = load(lines(folder / "d.jsonl", row()))
    assert sample.image.getpixel((0, 0)) == (255, 0, 0)
    Image.new("RGB", (8, 6), "lime").save(folder / "a.png")
    os.utime(folder / "a.png", ns=(1, 1))
    assert sample.image.getpixel((0, 0)) == (0, 255, 0)


def test_an_image_damaged_behind_its_head_is_named_with_its_line_when_used(folder):
    Image.effect_noise((64, 64), 50).save(folder / "c.jpg")
    content = (folder / "c.jpg").read_bytes()
    (folder / "c.jpg").write_bytes(content[: len(content) // 2])
    (sample,) = load(lines(folder / "d.jsonl", row("c.jpg")))
    with pytest.raises(DataError, match=r"line 1.*c\.jpg: cannot be read"):
        _ = sample.image


def png_of(width, height):
    """The head of a PNG of any size: 60 bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "side", [(8000, 8000), (12000, 12000), (60000, 60000), (2**31 - 1, 2**31 - 1), (50_000_001, 1)]
)
def test_one_limit_of_pixels_for_every_door(folder, side):
    (folder / "bomb.png").write_bytes(png_of(*side))
    runner = CliRunner().invoke(app, ["run", "zoo:tiny-llava", "--image", str(folder / "bomb.png"), "--prompt", "?"])
    assert (runner.exit_code, runner.stderr.count("\n")) == (2, 1)
    said = [runner.stderr]
    for act in (
        lambda: open_image(folder / "bomb.png"),
        lambda: open_image(png_of(*side)),
        lambda: load(lines(folder / "d.jsonl", row("bomb.png"))),
        lambda: read_rows(lines(folder / "t.jsonl", row("bomb.png")), "vqa")[0].open(),
        lambda: read_image(folder / "bomb.png"),
    ):
        with pytest.raises(ValueError, match="50 megapixels") as error:
            act()
        said.append(str(error.value))
    assert all("too large" in line for line in said)


def test_pillow_starts_no_other_program(folder):
    (folder / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="not an image"):
        open_image(folder / "a.png")


def test_special_files_are_no_images(folder):
    os.mkfifo(folder / "pipe.png")
    for name, said in (
        ("pipe.png", "plain file"),
        ("/dev/zero", "plain file"),
        ("n" * 300, "no such"),
        ("\0", "no such"),
    ):
        with pytest.raises(DataError, match=said):
            load(lines(folder / "d.jsonl", row(name)))


# --------------------------------------------------------------------------------------------- the ways of writing JSON
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("form", ["lines", "array on a line", "pretty array", "windows"])
def test_json_as_people_write_it(folder, mark, form):
    rows = [row(question="caf\u00e9\u2028or\u0085not?"), row("b.png")]
    text = {
        "lines": "\n\n" + "\n".join(json.dumps(each, ensure_ascii=False) for each in rows),
        "array on a line": json.dumps(rows),
        "pretty array": "\n" + json.dumps(rows, indent=2),
        "windows": "\r\n".join(map(json.dumps, rows)),
    }[form]
    for name in ("d.json", "d.jsonl"):
        (folder / name).write_bytes(mark + text.encode())
        assert [sample.image_id for sample in load(folder / name)] == ["a.png", "b.png"]
        assert [each.text for each in read_rows(folder / name, "vqa")] == [each["question"] for each in rows]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "line 1: expected an object"),
        ("[{}, 2]", "row 1: no 'image'"),
        ('[{"image": "a.png"}, ', "one object per line or one array"),
        ("[]", "no rows"),
        ("[" * 100_000, "not usable JSON|one array"),
        ('{"image": ' * 50_000, "line 1"),
        ('{"image": ' + "9" * 5000 + "}", "line 1"),
        ('{"image": "a.png", "question": "\\ud800?", "answer": "x"}', "line 1.*surrogate"),
        ("\xff", "not JSON"),
    ],
)
def test_what_is_no_data_is_said_in_words(folder, text, said):
    (folder / "d.jsonl").write_text(text)
    with pytest.raises(DataError, match=said) as error:
        load(folder / "d.jsonl")
    assert len(str(error.value)) < 400


def test_damaged_parquet_is_named(folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(
        pa.table({"image": ["a.png"] * 50, "question": ["?"] * 50, "answer": ["x"] * 50}), folder / "d.parquet"
    )
    whole = (folder / "d.parquet").read_bytes()
    for cut in (whole[: len(whole) // 2], whole[:40] + b"\xff" * 60 + whole[100:], b"PAR1" * 3, b""):
        (folder / "d.parquet").write_bytes(cut)
        with pytest.raises(DataError, match=r"d\.parquet"):
            load(folder / "d.parquet")
