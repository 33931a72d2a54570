"""Content hashes: all that features depend on, and nothing that could be confused."""

from pathlib import Path

from engine.multimodal.hashing import InputHasher


def test_everything_that_features_depend_on_changes_the_hash(tmp_path: Path) -> None:
    def hashed(folder: str = "a", family: str = "llava", served: object = None, **given: object) -> bytes:
        options = {"max_pixels": 5} if served is None else {"max_pixels": served}
        hasher = InputHasher(tmp_path / folder, family, options)
        arguments = {"kind": "image", "data": b"abc", "count": 1, "options": {}, **given}
        return hasher.hash_input(**arguments)  # type: ignore[arg-type]

    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    (tmp_path / "c" / "preprocessor_config.json").write_text("{}")
    found = [
        hashed(), hashed("b"), hashed("c"), hashed(family="llava_next"), hashed(served=6), hashed(kind="audio"),
        hashed(data=b"abd"), hashed(data=b""), hashed(count=2), hashed(options={"min_pixels": 1}),
        hashed(data=b"abc\0"), hashed(options={"min_pixels": "1"}),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert hashed(served=6) == hashed(options={"max_pixels": 6}), "options of a request replace those of the server"
    (tmp_path / "c" / "preprocessor_config.json").write_text("{ }")
    assert hashed("c") not in found, "another processor"


def test_the_order_of_options_does_not_matter(tmp_path: Path) -> None:
    hasher = InputHasher(tmp_path, "llava", {})
    one = hasher.hash_input("image", b"x", 1, {"a": 1, "b": {"c": 2, "d": 3}})
    assert one == hasher.hash_input("image", b"x", 1, {"b": {"d": 3, "c": 2}, "a": 1})
