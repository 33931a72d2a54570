"""Synthetic images: sizes, formats, repetitions, and that no two images are equal unless they are repeated."""

import base64
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bench.errors import BenchError
from bench.workloads import make_workload
from bench.workloads.base import RequestSpec
from bench.workloads.images import repeats


def urls(spec: RequestSpec) -> list[str]:
    assert spec.messages is not None
    return [part["image_url"]["url"] for part in spec.messages[0]["content"] if part["type"] == "image_url"]


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


@pytest.mark.parametrize("image_format", ["jpeg", "png"])
def test_sizes_and_formats_are_as_requested(image_format: str) -> None:
    spec = {"kind": "images", "images": [1, 3], "image_size": "40x30,70x20", "image_format": image_format}
    found = [url for one in make_workload(spec, None).requests(30, 3) for url in urls(one)]
    assert {opened(url).size for url in found} == {(40, 30), (70, 20)}
    assert {opened(url).format for url in found} == {image_format.upper()}
    assert len(set(found)) == len(found)


def test_the_number_of_images_and_the_lengths_are_in_their_ranges() -> None:
    spec = {"kind": "images", "images": [1, 3], "image_size": "32x32", "input": [5, 9], "output": [2, 4]}
    found = make_workload(spec, None).requests(60, 1)
    assert {len(urls(one)) for one in found} == {1, 2, 3}
    assert {one.output_tokens for one in found} == {2, 3, 4}
    texts = [one.messages[0]["content"][-1]["text"] for one in found if one.messages]
    assert {len(text.split()) for text in texts} == {5, 6, 7, 8, 9}


def test_a_seed_gives_the_same_requests_and_another_seed_others() -> None:
    workload = make_workload({"kind": "images", "image_size": "32x32"}, None)
    assert workload.requests(5, 1) == workload.requests(9, 1)[:5]
    assert not {url for one in workload.requests(5, 1) for url in urls(one)} & {
        url for one in workload.requests(5, 2) for url in urls(one)
    }


@given(percent=st.integers(0, 100), count=st.integers(2, 60))
def test_the_share_of_repetitions_is_right_for_any_number_of_requests(percent: int, count: int) -> None:
    repeated = sum(repeats(i, percent, first=i == 0) for i in range(count))
    assert abs(repeated - count * percent / 100) <= 1


def test_repeated_requests_have_the_same_images() -> None:
    found = make_workload({"kind": "images", "image_size": "32x32", "repeat": 50}, None).requests(20, 1)
    assert len({tuple(urls(one)) for one in found}) == 10


def test_the_description_makes_the_same_workload() -> None:
    workload = make_workload({"kind": "images", "images": [1, 4], "image_size": ["512x512", "1275x1650"]}, None)
    assert make_workload(workload.describe(), None).name == workload.name == "images 1-4 x 512x512,1275x1650 64/64"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": "12"}, "WIDTHxHEIGHT.*--image-size"),
        ({"image_size": "0x5"}, "from 1 to 16384"),
        ({"image_size": 7}, "WIDTHxHEIGHT or a list"),
        ({"image_format": "gif"}, "image_format must be one of jpeg, png"),
        ({"images": 0}, "images must be an integer from 1"),
        ({"repeat": 101}, "percentage from 0 to 100"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BenchError, match=words):
        make_workload({"kind": "images", **fields}, None)
