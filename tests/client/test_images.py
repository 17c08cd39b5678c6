"""Images to pixels: what is read, how it is turned and stretched, and what is refused without being shown."""

import csv
import io
import json
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from confide.client import images
from confide.client.data import load_reader, read_examples, read_texts
from confide.client.images import FORMATS, ImageError, ImagePathError, ImageReader, load_image_reader
from confide.common.base import base_digest
from confide.common.errors import DataError, ModelError
from confide.common.examples import Pixels
from confide.common.plan import Plan, read_plan, starter

CANARY = "SECRETCELL"
HEIGHT, WIDTH = 4, 6


@pytest.fixture
def reader() -> ImageReader:
    return ImageReader(HEIGHT, WIDTH)


def picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> Pixels:
    """Draw colours, (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def encoded(pixels: npt.NDArray[Any], form: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(stream, form, **options)
    return stream.getvalue()


def plan_of(**data: object) -> Plan:
    text = starter("test", "tiny", "sha256:" + "0" * 64, ["query"], "image-classification")
    values = "".join(f"\n{key} = {json.dumps(value)}" for key, value in data.items())
    for key in data:
        text = "\n".join(line for line in text.splitlines() if not line.startswith(f"{key} ="))
    return read_plan(text.replace("[data]", f"[data]{values}").encode())


def table_of(folder: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    with (folder / "rows.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["image", "label"])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "rows.csv"


def test_an_image_of_the_model_s_size_keeps_its_pixels_with_channels_first(reader: ImageReader, tmp_path: Path) -> None:
    pixels = reader.read(encoded(picture()), tmp_path)

    assert np.array_equal(pixels, picture().transpose(2, 0, 1))
    assert pixels.shape == reader.shape == (3, HEIGHT, WIDTH)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize("form", FORMATS)
def test_every_named_format_is_read(reader: ImageReader, tmp_path: Path, form: str) -> None:
    flat = np.full((40, 60, 3), 120, np.uint8)

    pixels = reader.read(encoded(flat, form), tmp_path)

    assert abs(pixels.astype(int) - 120).max() <= 2


@pytest.mark.parametrize(
    ("mode", "expected"), [("L", 204), ("1", 255), ("CMYK", 204), ("P", 204), ("LA", 204), ("RGBA", 204)]
)
def test_other_modes_become_three_channels(reader: ImageReader, tmp_path: Path, mode: str, expected: int) -> None:
    flat = np.full((8, 12, 3), 255 if mode == "1" else 204, np.uint8)

    pixels = reader.read(encoded(flat, "TIFF" if mode == "CMYK" else "PNG", mode), tmp_path)

    assert pixels.shape == reader.shape
    assert abs(pixels.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_16_bit_greys_keep_their_upper_eight_bits(reader: ImageReader, tmp_path: Path, kind: str) -> None:
    greys = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 2730).astype(kind)

    pixels = reader.read(encoded(greys, "TIFF"), tmp_path)

    assert np.array_equal(pixels, np.stack([greys >> 8] * 3).astype(np.uint8))


def test_a_transparent_palette_is_read_without_its_transparency(reader: ImageReader, tmp_path: Path) -> None:
    stream = io.BytesIO()
    palette = Image.new("P", (WIDTH, HEIGHT), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(stream, "PNG", transparency=bytes([255, 0]))

    pixels = reader.read(stream.getvalue(), tmp_path)

    assert [channel.tolist() for channel in pixels[:, 0, 0]] == [10, 20, 30]


def test_an_image_is_turned_as_its_exif_data_say(tmp_path: Path) -> None:
    upright = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned a quarter to the left: what is stored lies on its side

    pixels = ImageReader(HEIGHT, WIDTH).read(encoded(np.rot90(upright).copy(), exif=exif), tmp_path)

    assert np.array_equal(pixels, upright.transpose(2, 0, 1))


@pytest.mark.parametrize(("resample", "name"), [(2, Image.Resampling.BILINEAR), (3, Image.Resampling.BICUBIC)])
def test_another_size_is_stretched_by_the_model_s_filter(tmp_path: Path, resample: int, name: Image.Resampling) -> None:
    large = picture(height=31, width=17)

    pixels = ImageReader(HEIGHT, WIDTH, resample).read(encoded(large), tmp_path)

    expected = np.asarray(Image.fromarray(large).resize((WIDTH, HEIGHT), name))
    assert np.array_equal(pixels, expected.transpose(2, 0, 1))


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 60000 × 60000."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def with_a_flipped_bit(raw: bytes) -> bytes:
    place = raw.index(b"IDAT") + 10
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


BROKEN = {
    "nothing": b"",
    "text": b"this is no image",
    "cut short": encoded(picture(height=50, width=50))[:-400],
    "a flipped bit": with_a_flipped_bit(encoded(picture())),
    "a cut JPEG": encoded(picture(height=90, width=90), "JPEG")[:900],
    "a bomb": bomb(),
    "PostScript": encoded(picture(), "EPS"),
    "a format that is not named": encoded(picture(), "PPM"),
    "greys without a white": encoded(np.ones((4, 4), np.float32), "TIFF"),
    "greys of 32 bits": encoded(np.ones((4, 4), np.int32), "TIFF"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_image_that_can_be_read_is_refused(reader: ImageReader, tmp_path: Path, case: str) -> None:
    with pytest.raises(ImageError):
        reader.read(BROKEN[case], tmp_path)


def test_an_image_of_more_pixels_than_allowed_is_refused_before_it_is_unpacked(
    reader: ImageReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = encoded(picture())
    monkeypatch.setattr(images, "MOST_PIXELS", HEIGHT * WIDTH)
    assert reader.read(raw, tmp_path).any()

    monkeypatch.setattr(images, "MOST_PIXELS", HEIGHT * WIDTH - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("unpacked"))

    with pytest.raises(ImageError):
        reader.read(raw, tmp_path)


@pytest.mark.parametrize("as_path", [False, True])
def test_a_file_larger_than_allowed_is_refused(
    reader: ImageReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_path: bool
) -> None:
    raw = encoded(picture())
    (tmp_path / "a.png").write_bytes(raw)
    monkeypatch.setattr(images, "MOST_FILE_BYTES", len(raw) - 1)

    with pytest.raises(ImageError):
        reader.read("a.png" if as_path else raw, tmp_path)


@pytest.mark.parametrize("name", ["a.png", "scans/b.png", "./scans/../a.png", " a.png ", "link.png"])
def test_a_path_is_read_from_the_directory_of_the_table(reader: ImageReader, tmp_path: Path, name: str) -> None:
    (tmp_path / "scans").mkdir()
    for file in ("a.png", "scans/b.png"):
        (tmp_path / file).write_bytes(encoded(picture()))
    (tmp_path / "link.png").symlink_to(tmp_path / "scans" / "b.png")

    assert np.array_equal(reader.read(name, tmp_path), picture().transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["../out.png", "{out}", "inside/../../out.png", "link.png", "{inside}", "/"])
def test_a_path_that_leads_out_of_the_directory_is_refused(reader: ImageReader, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "table"
    (folder / "inside").mkdir(parents=True)
    for path in (tmp_path / "out.png", folder / "in.png"):
        path.write_bytes(encoded(picture()))
    (folder / "link.png").symlink_to(tmp_path / "out.png")

    with pytest.raises(ImagePathError, match="relative to that directory"):
        reader.read(name.format(out=tmp_path / "out.png", inside=folder / "in.png"), folder)


@pytest.mark.parametrize("name", ["none.png", "inside", "a\0b.png", "x" * 5000, "circle", "in.png/more"])
def test_a_path_without_a_file_is_an_image_that_cannot_be_read(reader: ImageReader, tmp_path: Path, name: str) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "in.png").write_bytes(encoded(picture()))
    (tmp_path / "circle").symlink_to(tmp_path / "circle")

    with pytest.raises(ImageError):
        reader.read(name, tmp_path)


def in_every_form(folder: Path) -> list[Path]:
    """Write three images with their labels as paths, as bytes and as datasets keep them."""
    labels = ["positive", "negative", "positive"]
    raw = [encoded(picture(seed)) for seed in range(3)]
    for number, image in enumerate(raw):
        (folder / f"{number}.png").write_bytes(image)
    names = [f"{number}.png" for number in range(3)]
    table_of(folder, [{"image": name, "label": label} for name, label in zip(names, labels, strict=True)])
    lines = "".join(json.dumps({"image": n, "label": label}) + "\n" for n, label in zip(names, labels, strict=True))
    (folder / "rows.jsonl").write_text(lines)
    both = [{"bytes": image, "path": CANARY} for image in raw]
    for name, cells in (("paths", names), ("bytes", raw), ("both", both)):
        pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": labels}), folder / f"{name}.parquet")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["negative", "positive"]))
    columns = {"image": [str(folder / name) for name in names], "label": labels}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder / "saved")
    return [
        folder / name for name in ("rows.csv", "rows.jsonl", "paths.parquet", "bytes.parquet", "both.parquet", "saved")
    ]


def test_every_form_of_a_table_gives_the_same_images(reader: ImageReader, tmp_path: Path) -> None:
    read = [read_examples(path, plan_of(), reader).examples for path in in_every_form(tmp_path)]

    for examples in read:
        batch = examples.batch(np.array([2, 0, 1]))
        assert batch.pixels is not None
        expected = [picture(seed).transpose(2, 0, 1) for seed in (2, 0, 1)]
        assert np.array_equal(batch.pixels, np.stack(expected))
        assert batch.labels.tolist() == [1, 1, 0]
        assert batch.input_ids is None
        assert isinstance(examples.tokens[0], np.memmap)
        assert (examples.tokens[0].dtype, examples.image) == (np.uint8, (3, HEIGHT, WIDTH))


def test_a_row_s_image_does_not_depend_on_any_other_row(reader: ImageReader, tmp_path: Path) -> None:
    in_every_form(tmp_path)
    path = table_of(tmp_path, [{"image": "1.png", "label": "negative"}])

    pixels = read_examples(path, plan_of(), reader).examples.batch(np.array([0])).pixels

    assert pixels is not None
    assert np.array_equal(pixels[0], picture(1).transpose(2, 0, 1))


def test_images_for_prediction_need_no_label(reader: ImageReader, tmp_path: Path) -> None:
    in_every_form(tmp_path)
    (tmp_path / "new.csv").write_text("image\n2.png\n0.png\n")

    examples = read_texts(tmp_path / "new.csv", plan_of(), reader)

    pixels = examples.batch(np.array([0, 1])).pixels
    assert pixels is not None
    assert np.array_equal(pixels[1], picture(0).transpose(2, 0, 1))
    assert examples.labels.tolist() == [0, 0]


def test_broken_and_absent_images_are_counted_and_never_shown(reader: ImageReader, tmp_path: Path) -> None:
    (tmp_path / f"{CANARY}.png").write_bytes(CANARY.encode())
    (tmp_path / "good.png").write_bytes(encoded(picture()))
    names = [f"{CANARY}.png", "good.png", f"{CANARY}-none.png", ""]
    path = table_of(tmp_path, [{"image": name, "label": "positive"} for name in names])

    reading = read_examples(path, plan_of(on_empty_text="skip", on_missing="skip"), reader)

    assert reading.kept == 1
    assert reading.skipped == {"unreadable image": 2, "missing value": 1}
    with pytest.raises(DataError) as caught:
        read_examples(path, plan_of(on_missing="skip"), reader)
    assert "unreadable image in 2 of 4 rows (first in row 1 (line 2), in the column of the image)" in str(caught.value)
    assert CANARY not in str(caught.value)


def test_a_path_out_of_the_directory_is_refused_even_where_rows_may_be_skipped(
    reader: ImageReader, tmp_path: Path
) -> None:
    path = table_of(tmp_path, [{"image": f"../{CANARY}.png", "label": "positive"}])
    plan = plan_of(on_empty_text="skip", on_missing="skip", on_unknown_label="skip")

    with pytest.raises(
        DataError, match=r"image outside the table's directory in 1 of 1 rows .*Mend the table\.$"
    ) as caught:
        read_examples(path, plan, reader)

    assert CANARY not in str(caught.value)


def test_pixels_lie_in_a_file_without_a_name(
    reader: ImageReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    in_every_form(tmp_path)

    examples = read_examples(tmp_path / "bytes.parquet", plan_of(), reader).examples

    assert not examples.tokens[0].flags.writeable
    assert list(scratch.iterdir()) == []


def settings(**files: Mapping[str, object]) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        for name, content in files.items():
            (directory / f"{name}.json").write_text(json.dumps(content))

    return write


@pytest.mark.parametrize(
    ("make", "shape", "resample"),
    [
        (settings(config={"image_size": 8}), (3, 8, 8), 2),
        (settings(config={"image_size": [8, 12], "num_channels": 3}), (3, 8, 12), 2),
        (settings(config={"image_size": 8}, preprocessor_config={"resample": 3}), (3, 8, 8), 3),
        (settings(config={"image_size": 8}, preprocessor_config={"image_mean": [0, 0, 0]}), (3, 8, 8), 2),
    ],
)
def test_the_base_model_says_how_large_an_image_is_and_which_filter_stretches_it(
    tmp_path: Path, make: Callable[[Path], None], shape: tuple[int, int, int], resample: int
) -> None:
    make(tmp_path)

    reader = load_reader(tmp_path, plan_of())

    assert isinstance(reader, ImageReader)
    assert (reader.shape, reader._resample) == (shape, resample)


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (settings(), "config.json is missing or not a JSON object"),
        (settings(config=[]), "config.json is missing or not a JSON object"),  # type: ignore[arg-type]
        (settings(config={}), "names no image_size from 1 to 4096"),
        (settings(config={"image_size": 0}), "names no image_size"),
        (settings(config={"image_size": True}), "names no image_size"),
        (settings(config={"image_size": 1e9}), "names no image_size"),
        (settings(config={"image_size": [8, 8, 8]}), "names no image_size"),
        (settings(config={"image_size": 8, "num_channels": 1}), "do not have 3 channels"),
        (settings(config={"image_size": 8}, preprocessor_config={"resample": 1}), "another filter than bilinear"),
    ],
)
def test_a_base_model_that_does_not_say_so_is_refused(
    tmp_path: Path, make: Callable[[Path], None], fragment: str
) -> None:
    make(tmp_path)

    with pytest.raises(ModelError, match=fragment):
        load_image_reader(tmp_path)


def test_how_pixels_are_prepared_is_covered_by_the_digest_of_the_base(tmp_path: Path) -> None:
    settings(config={"image_size": 8})(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    before = base_digest(tmp_path)

    settings(preprocessor_config={"resample": 3})(tmp_path)

    assert base_digest(tmp_path) != before
