"""Spellings of --limit-mm-per-prompt, and options of media."""

from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.media.limits import MediaLimits, parse_per_prompt


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, {}),
        ("", {}),
        ("image=4", {"image": 4}),
        (" image = 4 , video=1,", {"image": 4, "video": 1}),
        ('{"image": 4, "audio": 0}', {"image": 4, "audio": 0}),
        ('{"video": {"count": 1, "num_frames": 32}}', {"video": 1}),
        ({"image": 2}, {"image": 2}),
    ],
)
def test_spellings_of_limits(given: Any, found: dict[str, int]) -> None:
    assert parse_per_prompt(given) == found


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("image", "takes image=4"),
        ("image=x", "takes image=4"),
        ("image=-1", "takes image=4"),
        ("picture=1", "'picture' is not a kind"),
        ("image=1,image=2", "names image twice"),
        ("{image: 4}", "not valid JSON"),
        ('{"image": -1}', "from 0, not -1"),
        ('{"image": 1.5}', "from 0, not 1.5"),
        ('{"image": true}', "from 0, not True"),
        ({"video": {}}, "from 0, not None"),
    ],
)
def test_other_spellings_are_refused(given: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=r"--limit-mm-per-prompt") as caught:
        parse_per_prompt(given)
    assert reason in str(caught.value)


def test_options_of_an_engine(tmp_path: Path) -> None:
    config = EngineConfig(
        model="m", limit_mm_per_prompt="image=2", allowed_local_media_path=str(tmp_path),
        allowed_media_domains=["a.example"], media_limits={"max_bytes": 5},
    )  # fmt: skip
    assert config.limit_mm_per_prompt == {"image": 2}
    options = EngineConfig(**config.describe()).media_options  # as another process gets it
    assert options.local_path == str(tmp_path)
    assert options.domains == ("a.example",)
    assert options.limits == MediaLimits(max_bytes=5)
    for wrong, reason in (
        ({"allowed_local_media_path": str(tmp_path / "none")}, "is not a folder"),
        ({"allowed_media_networks": ["10.0.0.1/8"]}, "--allowed-media-networks"),
        ({"allowed_media_domains": ["https://a.example"]}, "is not a host; write it as"),
        ({"allowed_media_domains": ["a.example:80"]}, "is not a host"),
        ({"media_limits": {"max_byte": 5}}, "no field 'max_byte'"),
        ({"media_limits": {"max_bytes": 0}}, "above 0"),
    ):
        with pytest.raises(ConfigError, match=reason):
            EngineConfig(model="m", **wrong)
